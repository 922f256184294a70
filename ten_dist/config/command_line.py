"""Command-line options made from the fields of an options dataclass."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Container
from typing import Any, TypeVar

from ten_dist.arguments import ArgumentParser, real_number, whole_number
from ten_dist.config.options import Option, Options, options_of

_CONVERTERS: dict[type, Callable[[str], Any]] = {
    int: whole_number,
    float: real_number,
    str: str,
}
_Options = TypeVar("_Options", bound=Options)


def add_options(
    parser: ArgumentParser,
    config_class: type[Options],
    *,
    default_help: str | None = None,
    only: Container[str] | None = None,
) -> None:
    """Add one option for each field of `config_class`, or some, in their groups.

    An option that is not given does not appear in the parsed namespace.

    Args:
        parser: what to add to.
        config_class: dataclass whose fields are each followed by a docstring.
        default_help: what the help says of a default, instead of the field's.
        only: fields that get an option; by default all.
    """
    for option in options_of(config_class).values():
        if only is None or option.name in only:
            place = parser.group(option.group) if option.group else parser
            place.add_argument(f"--{option.name}", **_argument(option, default_help))
            if default_help is not None:
                option = dataclasses.replace(option, default=dataclasses.MISSING)
            parser.declared[option.name] = option


def given(namespace: argparse.Namespace, config_class: type[_Options]) -> _Options:
    """The options of `config_class` as the command line gives them.

    Raises:
        ConfigurationError: an option is out of range, or two do not fit together.
    """
    return config_class(**given_options(namespace, config_class))


def given_options(namespace: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The options of `config_class` that were given on the command line."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in vars(namespace).items() if name in names}


def _argument(option: Option, default_help: str | None) -> dict[str, Any]:
    """What `add_argument` takes for an option."""
    required = option.default is dataclasses.MISSING
    description = option.description
    default = default_help
    if default is None and not required and option.default not in (None, (), ""):
        shown = option.default
        default = ",".join(map(str, shown)) if isinstance(shown, tuple) else str(shown)
    if default is not None:
        description = f"{description} [default: {default}]"
    argument: dict[str, Any] = {
        "help": description.replace("%", "%%"),
        "default": argparse.SUPPRESS,
        "required": required,
    }
    if option.kind is bool:
        return argument | {"action": argparse.BooleanOptionalAction}
    argument |= {"metavar": option.metavar}
    if option.repeated:
        return argument | {"action": "append"}
    if option.several_words:
        return argument | {"nargs": "+"}
    return argument | {"type": _converter(option)}


def _converter(option: Option) -> Callable[[str], Any]:
    convert = _CONVERTERS[option.kind]
    if option.length is None:
        return convert

    def values(text: str) -> tuple[Any, ...]:
        parts = text.split(",")
        if option.length not in (0, len(parts)):
            raise argparse.ArgumentTypeError(
                f"must be {option.length} values with commas, such as "
                f"{option.metavar}, not {text!r}"
            )
        return tuple(convert(part) for part in parts)

    return values
