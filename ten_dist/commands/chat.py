"""Talk with a run's model.

What has been said is kept as the state that it left in the model, not as text: a turn
reads its own tokens alone, and a conversation of any length is as large, in memory and in
a file. Lines that begin with / are commands; /help lists them. From a pipe, each line is
said in turn, and the answers alone are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from ten_dist.arguments import ArgumentParser, text_of
from ten_dist.config.command_line import add_options, given
from ten_dist.config.options import at_least, metavar
from ten_dist.console import warn
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import printable
from ten_dist.generation import Sampling
from ten_dist.inference.conversation import Conversation, ConversationState
from ten_dist.inference.conversation_file import load_conversation, save_conversation
from ten_dist.inference.terminal_text import show
from ten_dist.inference.turn_tokens import TurnTokens
from ten_dist.run_folder import RunFolder
from ten_dist.termination import Terminated
from ten_dist.threads import compute_in_one_thread
from ten_dist.trained_model import (
    CheckpointOptions,
    TrainedModel,
    chat_template_of,
    tokenizer_of,
)

_HELP = """\
/reset      forget what was said
/save FILE  keep the conversation in a file
/load FILE  go on with the conversation of a file
/help       this list
/quit       end, as Ctrl-D does; Ctrl-C stops an answer
//...       say what begins with /"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions(CheckpointOptions, Sampling):
    """How answers are given; each field is an option of `ten-dist chat`."""

    system: Annotated[str | None, metavar("TEXT")] = None
    """What a conversation starts with, in the role "system"; by default nothing."""
    max_new_tokens: Annotated[int, at_least(1)] = 1000
    """Most tokens of an answer."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist chat`."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    add_options(parser, ChatOptions)


def run(arguments: argparse.Namespace) -> None:
    """Talk until the input ends.

    Raises:
        ConfigurationError: the folder holds no usable run, its chat template cannot be
            used turn by turn, or an option is out of range; from a pipe also what a
            command cannot do.
    """
    options = given(arguments, ChatOptions)
    folder = RunFolder(arguments.run)
    tokenizer = tokenizer_of(folder)
    system = None if options.system is None else text_of(options.system)
    turns = TurnTokens(chat_template_of(folder), tokenizer, system)
    model = TrainedModel.load(folder, options.checkpoint)
    if model.prefers_one_thread():
        compute_in_one_thread()
    decoder = model.decoder()
    conversation = Conversation(
        decoder, turns, tokenizer, options, options.max_new_tokens
    )
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    session = _Session(conversation, model.fingerprint(), on_terminal)
    for line in _typed_lines() if on_terminal else _piped_lines():
        if not session.take(line):
            break


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(f"standard input, line {number} is not UTF-8") from None


def _typed_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        # Keys for editing and for earlier lines, from now on.
        import readline  # noqa: F401
    while True:
        try:
            yield text_of(input("> "))
        except UnicodeError:
            warn("that was not UTF-8")
        except EOFError:
            show("\n")
            return
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Terminated):
                raise
            show("\n")
            warn("Ctrl-D or /quit ends the conversation")


class _Session:
    """What is done for each line.

    Args:
        conversation: goes on with what is said.
        model: fingerprint of the model.
        on_terminal: whether a person is there, who can go on after an error.
    """

    def __init__(
        self, conversation: Conversation, model: str, on_terminal: bool
    ) -> None:
        self._conversation = conversation
        self._model = model
        self._on_terminal = on_terminal

    def take(self, line: str) -> bool:
        """Obey a line or answer it; returns whether to go on.

        Raises:
            ConfigurationError: it cannot be done, and no person is there.
        """
        try:
            if line.startswith("/") and not line.startswith("//"):
                return self._obey(*line.partition(" ")[::2])
            if line.strip():
                self._answer(line[line.startswith("//") :])
        except ConfigurationError as error:
            if not self._on_terminal:
                raise
            warn(str(error))
        return True

    def _answer(self, said: str) -> None:
        conversation = self._conversation
        before = conversation.state
        with _interrupts(self._on_terminal) as interrupted:
            for piece in conversation.answer(said, interrupted):
                show(piece)
            show("\n")
            if conversation.state is before:
                warn("stopped before it was read: nothing has been said")
            elif conversation.finish_reason == "length":
                warn(
                    f"the answer was cut at {conversation.max_new_tokens} tokens: "
                    "--max_new_tokens allows more"
                )

    def _obey(self, command: str, place: str) -> bool:
        place = place.strip()
        if command in ("/save", "/load") and not place:
            raise ConfigurationError(f"{command} needs the name of a file")
        if command == "/quit":
            return False
        if command == "/help":
            show(f"{_HELP}\n")
        elif command == "/reset":
            self._conversation.state = ConversationState()
        elif command == "/save":
            self._save(Path(place).expanduser())
        elif command == "/load":
            self._load(Path(place).expanduser())
        else:
            raise ConfigurationError(f"no command {printable(command)}: see /help")
        return True

    def _save(self, path: Path) -> None:
        state = self._conversation.state
        try:
            size = save_conversation(path, state, self._model)
        except OSError as error:
            raise ConfigurationError(
                f"{printable(str(path))} cannot be written: {error.strerror}"
            ) from None
        warn(
            f"saved {state.tokens:,} tokens as {size:,} bytes in {printable(str(path))}"
        )

    def _load(self, path: Path) -> None:
        like = self._conversation.empty_state()
        self._conversation.state = load_conversation(path, self._model, like)
        warn(f"loaded {self._conversation.state.tokens:,} tokens")


@contextlib.contextmanager
def _interrupts(taken: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which then does nothing else, if interrupts are taken.

    A step of the decoder that was cut off would leave its rows half changed.
    """
    pressed = threading.Event()
    if not taken:
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
