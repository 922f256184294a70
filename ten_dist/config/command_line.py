"""Command-line options made from the fields of a configuration dataclass.

A setting has one home: its name, type, default and help are those of the field.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Container
from typing import Any

from ten_dist.arguments import real_number
from ten_dist.config.model import parse_scales

_PLACEHOLDERS = {
    "data": "DATA",
    "val_data": "DIR|URL",
    "data_cache": "DIR",
    "data_cache_gigabytes": "N",
    "output_dir": "DIR",
    "python": "PATH",
    "ssh_config": "FILE",
    "hostfile": "FILE",
    "hosts": "ADDRESS:N,...",
    "deepspeed_config": "FILE",
    "nvme_path": "DIR",
    "resume": "auto|never|PATH",
    "endpoint": "URL",
    "repository": "URL",
    "pip_index": "URL",
    "ssh_key": "KEY,...",
    "ssh_from": "ADDRESS,...",
}


def add_options(
    parser: argparse._ArgumentGroup | argparse.ArgumentParser,
    config_class: type,
    *,
    default_help: str | None = None,
    only: Container[str] | None = None,
) -> None:
    """Add one option for each field of the dataclass `config_class`, or some.

    An option that is not given does not appear in the parsed namespace.

    Args:
        parser: what to add to.
        config_class: dataclass whose fields are each followed by a docstring.
        default_help: what the help says of a default, instead of the field's.
        only: fields that get an option; by default all.
    """
    descriptions = field_descriptions(config_class)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if only is not None and field.name not in only:
            continue
        description = descriptions[field.name]
        default = default_help
        if default is None and field.default not in (None, dataclasses.MISSING):
            default = str(field.default)
        if default is not None:
            description = f"{description} [default: {default}]"
        arguments: dict[str, Any] = {
            "help": description.replace("%", "%%"),
            "default": argparse.SUPPRESS,
        }
        if hints[field.name] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["type"], arguments["metavar"] = _argument_type(
                field.name, hints[field.name]
            )
        parser.add_argument(f"--{field.name}", **arguments)


def given_options(namespace: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The options of `config_class` that were given on the command line."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in vars(namespace).items() if name in names}


@functools.cache
def field_descriptions(config_class: type) -> dict[str, str]:
    """The string that follows each field in the source of a dataclass, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    body = tree.body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _argument_type(name: str, hint: Any) -> tuple[Any, str]:
    """Converter and placeholder of a field's type."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if name == "hten_scales":
        return parse_scales_argument, "1,2,4"
    if typing.get_origin(hint) is tuple:
        return _number_pair, "A,B"
    return hint, _PLACEHOLDERS.get(name) or {int: "N", float: "X", str: "NAME"}[hint]


def parse_scales_argument(text: str) -> tuple[int, ...]:
    """`parse_scales` with the error type that argparse shows."""
    try:
        return parse_scales(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number_pair(text: str) -> tuple[float, float]:
    try:
        first, second = (real_number(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"two numbers with a comma are needed, such as 0.1,0.1, not '{text}'"
        ) from None
    return first, second
