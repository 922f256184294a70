"""What every command line is held to before a command looks at it.

Python takes more for a number or a text than a command can use: nan, integers of any
size, bytes that are not UTF-8. They are refused here, once, by the name of their option.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ten_dist.errors import ConfigurationError

LONGEST_SECONDS = 1e7
"""Most seconds that an option can give, some months: timers cannot count to any number."""
LARGEST = 2**63
_NOT_A_NAME = {
    errno.ENAMETOOLONG: "is longer than a file name can be",
    errno.ELOOP: "is a symbolic link that leads to itself",
}
_SHOWN = 60
_MAY_BE_EMPTY = ("--prompt",)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose options of type int and float are numbers that can be computed with.

    Parsers of sub-commands are of this class, too.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", int, whole_number)
        self.register("type", float, real_number)
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        self.expand: Callable[[list[str]], list[str]] = list
        """What stands for the arguments before they are parsed."""
        self.declared: dict[str, Any] = {}
        """What an option was made of, by name, where :mod:`ten_dist.config` has."""
        self.takes_runs = False
        """Whether a file of options can be the record of a run."""
        self.passed_over: dict[str, Any] = {}
        """Options of other commands that a file can have without effect here."""

    def group(
        self, title: str, description: str | None = None
    ) -> argparse._ArgumentGroup:
        """The group of options of a title, made when it is first asked for."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title, description)
        return self._groups[title]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(self.expand(list(given)), namespace)


def whole_number(text: str) -> int:
    """An integer that fits into 64 bits, with the error type that argparse shows."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a whole number, not {_shortened(text)}"
        ) from None
    if not -LARGEST <= number < LARGEST:
        raise argparse.ArgumentTypeError(
            f"must be a number of 64 bits, not {_shortened(text)}"
        )
    return number


def real_number(text: str) -> float:
    """A number, perhaps infinite but not nan, with the error type that argparse shows."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"must be a number, not {_shortened(text)}")
    return number


def check_text(arguments: Sequence[str]) -> None:
    """Refuse what is no text, and options that are given nothing.

    Raises:
        ConfigurationError: an argument is not UTF-8, has a NUL character, or is empty.
    """
    # What stands after -- is the command of another program.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for number, argument in enumerate(arguments):
        what = None
        option, equals, value = argument.partition("=")
        nothing = not argument or (option.startswith("--") and equals and not value)
        if (
            nothing
            and number < end
            and _option_at(arguments, number) not in _MAY_BE_EMPTY
        ):
            # As a path it would be the current folder, which nobody means: rather a
            # variable of a shell that is not set.
            what = "is empty"
        elif "\0" in argument:
            what = "has a NUL character in it"
        elif not argument.isascii():
            try:
                # In a locale that is not of UTF-8 Python takes each byte by itself.
                os.fsencode(argument).decode("utf-8")
            except UnicodeError:
                what = "is not UTF-8"
        if what is not None:
            place = _option_at(arguments, number)
            raise ConfigurationError(f"{place} {what}: {_shortened(argument)}")


def text_of(argument: str) -> str:
    """An argument as text: where the locale is not of UTF-8, what is not ASCII came as
    single bytes."""
    return os.fsencode(argument).decode("utf-8")


def refused_name(error: OSError, arguments: Sequence[str]) -> str | None:
    """What to say of a text that cannot be the name of a file, whatever files there are;
    None where that is not the error."""
    reason = _NOT_A_NAME.get(error.errno or 0)
    if reason is None or not isinstance(error.filename, str):
        return None
    name = error.filename
    values = ((n, a.partition("=")[2] or a) for n, a in enumerate(arguments))
    places = (_option_at(arguments, n) for n, a in values if a and a in name)
    return f"{next(places, 'a file name')} {reason}: {_shortened(name)}"


def _option_at(arguments: Sequence[str], number: int) -> str:
    """The option that an argument is, or is a value of."""
    before: Iterable[str] = reversed(arguments[: number + 1])
    option = next((a for a in before if a.startswith("--") and len(a) > 2), None)
    return option.partition("=")[0] if option is not None else f"argument {number + 1}"


def _shortened(text: str) -> str:
    """A text on one line, in quotes, and no longer than can be read."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
