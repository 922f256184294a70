"""`ten-dist COMMAND`: the table of commands, and how each one ends."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from ten_dist.arguments import ArgumentParser, check_text, refused_name
from ten_dist.errors import (
    EXIT_CONFIGURATION_ERROR,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    ConfigurationError,
    RunStoppedError,
    TrainingError,
)

_SECONDS_FOR_FIRST_RANK = 5

# Modules are imported when their command is used: `ten-dist generate` needs no DeepSpeed.
_COMMANDS = {
    "train": ("ten_dist.train", "train a model, or continue a run"),
    "evaluate": ("ten_dist.evaluate", "held-out loss of a run's newest checkpoint"),
    "checkpoint": (
        "ten_dist.checkpoint_command",
        "list, verify or convert the checkpoints of a run",
    ),
    "plan": ("ten_dist.plan_command", "memory, time and cost of a run, before it"),
    "preflight": ("launch.preflight", "check the hosts of a run before it begins"),
    "supervise": (
        "ten_dist.supervise",
        "start a training, and again whenever it ends early",
    ),
    "launch": (
        "launch.run",
        "start a training on several hosts, and again whenever it ends early",
    ),
    "droplets": (
        "launch.droplets.command",
        "rent the machines of a run from DigitalOcean, and give them back",
    ),
    "data": ("ten_dist.data_command", "inspect, verify or sample token shards"),
    "generate": ("ten_dist.generate", "continue a prompt with a run's model"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0 success; 1 the work failed; 2 the command was refused before anything was written;
    others are in :mod:`ten_dist.errors`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((a for a in arguments if not a.startswith("-")), None)
    try:
        check_text(arguments)
        return _run(name, arguments)
    except ConfigurationError as error:
        _complain(error)
        return EXIT_CONFIGURATION_ERROR
    except RunStoppedError as stopped:
        _complain(stopped)
        return EXIT_STOPPED
    except BrokenPipeError:
        # Whoever read the output has seen enough, such as `head`. The interpreter
        # would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (TrainingError, OSError) as error:
        refused = isinstance(error, OSError) and refused_name(error, arguments)
        _complain(refused or error)
        return EXIT_CONFIGURATION_ERROR if refused else EXIT_FAILED
    except KeyboardInterrupt:
        # A request that was under way is of no interest any more.
        logging.getLogger("asyncio").disabled = True
        continued = name in ("train", "droplets")
        again = "; the same command again continues" if continued else ""
        _complain(f"interrupted{again}")
        return EXIT_INTERRUPTED


def _run(name: str | None, arguments: Sequence[str]) -> int:
    """Parse the arguments, the first word among which is `name`, and run the command.

    Returns:
        The exit status.
    """
    parser = ArgumentParser(
        prog="ten-dist",
        description="Train, evaluate and use Temporal Eigenstate Networks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = None
    for command, (module_name, help_text) in _COMMANDS.items():
        # An abbreviated option would change its meaning when a longer one is added.
        command_parser = commands.add_parser(
            command, help=help_text, allow_abbrev=False
        )
        if command == name:
            module = importlib.import_module(module_name)
            command_parser.description = module.__doc__
            command_parser.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command_parser)
            run = module.run
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        # The options of the training have to be told from those of its launch.
        where = "; options of `ten-dist train` stand after --"
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}: see `ten-dist {name} --help`"
            f"{where if name == 'launch' else ''}"
        )
    assert run is not None, "argparse accepts no other command"
    # A command that has more to say than success returns its status.
    return run(parsed) or 0


def run_and_exit() -> NoReturn:
    """The console script: run the command of the command line, end with its status."""
    status = main()
    if status and os.environ.get("LOCAL_RANK", "0") != "0":
        # The launcher ends all ranks of a machine as soon as one has: the first must
        # have had the time to say what is wrong.
        time.sleep(_SECONDS_FOR_FIRST_RANK)
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads that torch keeps for its peers can abort a process that ends after
        # them, and the launcher would report that instead of the status.
        os._exit(status)
    sys.exit(status)


def _complain(error: Exception | str) -> None:
    from ten_dist.monitor.console import complain

    if not getattr(error, "reported", False):
        complain(str(error))


if __name__ == "__main__":
    run_and_exit()
