"""`ten-dist COMMAND`: the table of commands, and how each one ends."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import ten_dist
from ten_dist.arguments import ArgumentParser, check_text, refused_name
from ten_dist.config.options import alike
from ten_dist.config_file import add_config_file, config_text
from ten_dist.console import say
from ten_dist.errors import (
    EXIT_CONFIGURATION_ERROR,
    EXIT_FAILED,
    EXIT_STOPPED,
    ConfigurationError,
    RunStoppedError,
    TrainingError,
)
from ten_dist.files import check_current_folder
from ten_dist.own_rank import OwnRank, likely_rank, own_rank
from ten_dist.streams import flush_streams, prepare_streams
from ten_dist.termination import exit_status, interrupt_on_termination
from ten_dist.threads import settle_threads

_SECONDS_FOR_FIRST_RANK = 5

# Modules are imported when their command is used: `ten-dist generate` needs no DeepSpeed.
_COMMANDS = {
    "train": ("ten_dist.commands.train", "train a model, or continue a run"),
    "evaluate": (
        "ten_dist.commands.evaluate",
        "held-out loss of a checkpoint of a run",
    ),
    "checkpoint": (
        "ten_dist.commands.checkpoint",
        "list, verify or convert the checkpoints of a run",
    ),
    "plan": ("launch.plan", "memory, time and cost of a run, before it"),
    "preflight": (
        "launch.preflight.command",
        "check the hosts of a run before it begins",
    ),
    "supervise": (
        "launch.supervise",
        "start a training, and again whenever it ends early",
    ),
    "launch": (
        "launch.cluster.command",
        "start a training on several hosts, and again whenever it ends early",
    ),
    "droplets": (
        "launch.droplets.command",
        "rent the machines of a run from DigitalOcean, and give them back",
    ),
    "analyze": (
        "ten_dist.commands.analyze",
        "what a run's model has learned: eigenvalues, memory, worth, health",
    ),
    "report": ("ten_dist.commands.report_runs", "compare runs on one page"),
    "data": ("ten_dist.commands.data", "inspect, verify or sample token shards"),
    "export": ("ten_dist.commands.export", "a run's model for other tools"),
    "generate": ("ten_dist.commands.generate", "continue prompts with a run's model"),
    "chat": ("ten_dist.commands.chat", "talk with a run's model"),
    "serve": ("ten_dist.commands.serve", "serve a run's model over HTTP"),
}
# The others start or watch processes, which settle it for themselves.
_COMPUTING = ("train", "evaluate", "analyze", "generate", "chat", "export", "serve")

# What these do is worth more than what they print about it.
_LASTING = ("train", "supervise", "launch", "droplets", "serve")
# These obey signals in ways of their own.
_TOLD_BY_SIGNALS = ("train", "supervise", "launch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0 success; 1 the work failed; 2 the command was refused before anything was written;
    others are in :mod:`ten_dist.errors`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = _command(arguments)
    try:
        check_text(arguments)
        check_current_folder()
        status = _run(name, arguments)
        # Here, where it is known what to do if nobody takes it.
        flush_streams()
        return status
    except ConfigurationError as error:
        _complain(error)
        return EXIT_CONFIGURATION_ERROR
    except RunStoppedError as stopped:
        _complain(stopped)
        return EXIT_STOPPED
    except BrokenPipeError:
        # Whoever read the output has seen enough, such as `head`.
        return EXIT_FAILED
    except (TrainingError, OSError) as error:
        refused = isinstance(error, OSError) and refused_name(error, arguments)
        _complain(refused or error)
        return EXIT_CONFIGURATION_ERROR if refused else EXIT_FAILED
    except KeyboardInterrupt as interrupt:
        # A request that was under way is of no interest any more.
        logging.getLogger("asyncio").disabled = True
        continued = name in ("train", "droplets")
        again = "; the same command again continues" if continued else ""
        _complain(f"interrupted{again}")
        return exit_status(interrupt)


def _command(arguments: Sequence[str]) -> str | None:
    return next((a for a in arguments if not a.startswith("-")), None)


def _run(name: str | None, arguments: Sequence[str]) -> int:
    """Parse the arguments, the first word among which is `name`, and run the command.

    Returns:
        The exit status.
    """
    parser = ArgumentParser(
        prog="ten-dist",
        description="Train, evaluate and use Temporal Eigenstate Networks.",
    )
    parser.add_argument(
        "--version", action="version", version=f"ten-dist {ten_dist.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = None
    for command, (module_name, help_text) in _COMMANDS.items():
        # An abbreviated option would change its meaning when a longer one is added.
        command_parser = commands.add_parser(
            command, help=help_text, allow_abbrev=False
        )
        if command == name:
            if name in _COMPUTING:
                # Only a training has ranks, whatever the environment says.
                ranked = name == "train"
                settle_threads(likely_rank(os.environ) if ranked else OwnRank())
            run = _add_command(command_parser, module_name)
    # argparse would name all commands, but not the one that is meant.
    mistyped = name is not None and name not in _COMMANDS
    if mistyped and (hint := alike(name or "", _COMMANDS)):
        parser.error(f"there is no command '{name}' ({hint})")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        # The options of the training have to be told from those of its launch.
        where = "; options of `ten-dist train` stand after --"
        known = [option for a in parsed.parser._actions for option in a.option_strings]
        hint = alike(unknown[0].partition("=")[0], known)
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}"
            f"{f' ({hint})' if hint else ''}: see `ten-dist {name} --help`"
            f"{where if name == 'launch' else ''}"
        )
    assert run is not None, "argparse accepts no other command"
    if parsed.print_config:
        say(config_text(parsed).rstrip())
        return 0
    # A command that has more to say than success returns its status.
    return run(parsed) or 0


def _add_command(
    parser: ArgumentParser, module_name: str
) -> Callable[[argparse.Namespace], int | None]:
    """Give a parser the description and the options of a command; returns its `run`."""
    module = importlib.import_module(module_name)
    parser.description = module.__doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    add_config_file(parser)
    return module.run


def command_parsers() -> dict[str, ArgumentParser]:
    """A parser with all options of each command, by the name of the command.

    `ten-dist` itself makes only that of the command it runs; these are for documents.
    """
    parsers = {}
    for command, (module_name, _) in _COMMANDS.items():
        parsers[command] = ArgumentParser(
            prog=f"ten-dist {command}", allow_abbrev=False
        )
        _add_command(parsers[command], module_name)
    return parsers


def run_and_exit() -> NoReturn:
    """The console script: run the command of the command line, end with its status."""
    name = _command(sys.argv[1:])
    words = {"-h", "--help"} & set(sys.argv)
    prepare_streams(keep_going=name in _LASTING and not words)
    if name not in _TOLD_BY_SIGNALS:
        interrupt_on_termination()
    try:
        status = main()
    except SystemExit as end:
        # Of argparse, which has said why.
        status = end.code if isinstance(end.code, int) else EXIT_FAILED
    with contextlib.suppress(OSError):
        flush_streams()
    if status and own_rank().local_rank != 0:
        # The launcher ends all ranks of a machine as soon as one has: the first must
        # have had the time to say what is wrong.
        time.sleep(_SECONDS_FOR_FIRST_RANK)
    if own_rank().world_size > 1:
        # Threads that torch keeps for its peers can abort a process that ends after
        # them, and the launcher would report that instead of the status.
        os._exit(status)
    sys.exit(status)


def _complain(error: Exception | str) -> None:
    from ten_dist.console import complain

    if not getattr(error, "reported", False):
        complain(str(error))


if __name__ == "__main__":
    run_and_exit()
