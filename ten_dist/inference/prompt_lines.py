"""Files of prompts and of their completions, a JSON object a line."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ten_dist.console import say
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import printable, replaced, unwritable

STANDARD = "-"
"""What stands for the standard input or output."""
OUTPUT_FIELDS = ("sample", "text", "tokens", "finish_reason", "logprobs")
"""Fields that a line of output has of its own, beside those of its prompt."""


def check_prompts(place: str, option: str = "--prompts") -> None:
    """Read a file of prompts through, if it can be read again.

    Args:
        place: the file, or :data:`STANDARD`.
        option: that names it.

    Raises:
        ConfigurationError: it cannot be read.
        DataError: a line is not as :func:`read_prompts` wants it, or there is none.
    """
    if place == STANDARD:
        return
    path = Path(place)
    if path.exists() and not path.is_file() and not path.is_dir():
        # What comes through a pipe comes once.
        return
    try:
        count = sum(1 for _ in read_prompts(place))
    except OSError as error:
        raise ConfigurationError(
            f"{option} {printable(place)} cannot be read: {error.strerror}"
        ) from None
    if not count:
        raise DataError(f"{option} {printable(place)} has no prompts")


def read_prompts(place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file of prompts: where each stands, and its fields.

    Blank lines are passed over.

    Raises:
        DataError: a line is no JSON object in UTF-8 with a text as its prompt.
    """
    name = "standard input" if place == STANDARD else printable(place)
    with contextlib.ExitStack() as stack:
        lines: Iterable[bytes] = sys.stdin.buffer
        if place != STANDARD:
            lines = stack.enter_context(open(place, "rb"))
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{name}, line {number}"
                yield where, _fields(line, where)


def _fields(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or error
        raise DataError(f"{where} is not JSON in UTF-8: {reason}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise DataError(f'{where} is no object with a text as its "prompt"')
    try:
        fields["prompt"].encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where} has half of a character in its prompt") from None
    for field in OUTPUT_FIELDS:
        if field in fields:
            raise DataError(
                f'{where} has a field "{field}", which the output has of its own: give '
                "it another name"
            )
    return fields


def check_output(place: str) -> None:
    """Find out without writing whether a file can be written.

    Raises:
        ConfigurationError: it cannot.
    """
    if place == STANDARD:
        return
    path = Path(place)
    shown = f"--output {printable(place)}"
    if path.is_dir():
        raise ConfigurationError(f"{shown} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ConfigurationError(f"{shown} cannot be made: its folder is not there")
    if not path.exists() and (reason := unwritable(path.parent)):
        raise ConfigurationError(f"{shown}: its folder {reason}")


@contextlib.contextmanager
def lines_to(place: str) -> Iterator[Callable[[dict[str, Any]], object]]:
    """A function that writes an object as a line.

    A file is there when all its lines are; the standard output, or what else is no file,
    has each line at once.

    Raises:
        OSError: it cannot be written.
    """
    if place == STANDARD:
        ascii_only = sys.stdout.encoding.lower() != "utf-8"
        yield lambda fields: say(_line(fields, ascii_only))
        return
    path = Path(place)
    direct = path.exists() and not path.is_file()
    writing = contextlib.nullcontext(path) if direct else replaced(path)
    with _naming(path), writing as target, _opened(target, direct) as file:
        yield lambda fields: file.write(f"{_line(fields)}\n")


def _line(fields: dict[str, Any], ascii_only: bool = False) -> str:
    """A JSON object; halves of characters, which a prompt's line may have, are escaped."""
    text = json.dumps(fields, ensure_ascii=ascii_only)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _opened(path: Path, each_line_at_once: bool) -> TextIO:
    return open(path, "w", 1 if each_line_at_once else -1, "utf-8")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an error of writing say which file it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
