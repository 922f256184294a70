"""`--config_file`: the options of a command from a YAML file, and `--print_config`.

A file has options by name, or groups of them as `--help` shows them; the `config.json` of
a run is such a file, too. Its options are put before those of the command line, and are
read and checked exactly as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ten_dist.arguments import ArgumentParser
from ten_dist.config.model import EIGENSTATE_FIELDS
from ten_dist.config.options import nearest
from ten_dist.errors import ConfigurationError
from ten_dist.files import read_user_text

_OPTION = "--config_file"
_SWITCHES = {"true": True, "false": False}


def add_config_file(parser: ArgumentParser) -> None:
    """Add `--config_file` and `--print_config` to a parser that has all other options,
    or to the parsers of its actions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for of_action in action.choices.values():
                add_config_file(of_action)
            return
    group = parser.group("configuration file")
    group.add_argument(
        _OPTION,
        metavar="FILE",
        help="YAML file with options by name, in the groups of this help or in none, or "
        "config.json of a run; options on the command line win",
    )
    group.add_argument(
        "--print_config",
        action="store_true",
        help="print all options as such a file, and end",
    )
    parser.set_defaults(parser=parser)
    parser.expand = functools.partial(_expand, parser)


def options_in(path: str) -> dict[str, Any]:
    """The options of a file by name, whatever their groups; values are text, or lists or
    mappings of it, and None where one is not given.

    Raises:
        ConfigurationError: it cannot be read, or is no mapping.
    """
    recorded = _recorded(path)
    if recorded is not None:
        return recorded
    content = _read(path)
    return {
        name: value
        for key, values in content.items()
        for name, value in (
            values if isinstance(values, dict) else {key: values}
        ).items()
    }


def config_text(namespace: argparse.Namespace) -> str:
    """The options of a command as a file that :func:`add_config_file` reads.

    Args:
        namespace: what the command's parser made of its arguments.

    Raises:
        ConfigurationError: the value of an option is out of range.
    """
    parser: ArgumentParser = namespace.parser
    groups: dict[str, dict[str, Any]] = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            if not _from_file(action):
                continue
            option = parser.declared.get(action.dest)
            value = getattr(namespace, action.dest, action.default)
            if option is not None and action.dest in namespace:
                option.check(tuple(value) if isinstance(value, list) else value)
            elif option is not None:
                value = option.default
            # What the preset says is not the file's to say.
            if value is not dataclasses.MISSING:
                groups.setdefault(str(group.title), {})[action.dest] = _plain(value)
    loose = groups.pop("options", {})
    return yaml.safe_dump({**loose, **groups}, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return (
        value if value is None or isinstance(value, (bool, int, float)) else str(value)
    )


def _from_file(action: argparse.Action) -> bool:
    """Whether an argument is an option that a file can give."""
    own = ("help", "config_file", "print_config")
    shown = action.help != argparse.SUPPRESS
    return bool(action.option_strings) and shown and action.dest not in own


def _expand(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """The arguments, with those that their `--config_file` stands for before them."""
    # What stands behind -- is the command of another program.
    own = list(itertools.takewhile(lambda word: word != "--", arguments))
    names = [word.partition("=")[0] for word in own]
    if _OPTION not in names:
        return arguments
    at = names.index(_OPTION)
    if names.count(_OPTION) > 1:
        raise ConfigurationError(f"{_OPTION} is given twice: keep one")
    path = own[at].partition("=")[2] or next(iter(own[at + 1 :]), "")
    if not path:
        raise ConfigurationError(f"{_OPTION} is given no file")
    actions = {a.dest: a for a in parser._actions if _from_file(a)}
    del arguments[at : at + (1 if "=" in own[at] else 2)]
    given = {
        action.dest
        for action in actions.values()
        if not set(names).isdisjoint(action.option_strings)
    }
    words: list[str] = []
    for name, value in _options_for(parser, path, actions):
        option = parser.declared.get(name)
        replaced = given.intersection(option.alternatives if option else ())
        if value is not None and name not in given and not replaced:
            words += _words(actions[name], value, path)
    return words + arguments


def _options_for(
    parser: ArgumentParser, path: str, actions: Mapping[str, argparse.Action]
) -> Iterator[tuple[str, Any]]:
    """Name and value of each option in a file that the command has."""
    recorded = _recorded(path)
    if recorded is not None:
        # It was not written for this command, which may have only some of its options.
        yield from ((n, value) for n, value in recorded.items() if n in actions)
        return
    content = _read(path)
    others = parser.passed_over
    titles = {str(g.title) for g in parser._action_groups if g._group_actions}
    titles.update(option.group for option in others.values())
    seen = set()
    for key, values in content.items():
        if isinstance(values, dict) and key not in titles:
            raise ConfigurationError(
                f"{path}: unknown group {nearest(key, titles)} (see --help)"
            )
        inner = values if isinstance(values, dict) else {key: values}
        for name, value in inner.items():
            if name not in actions and name not in others:
                raise ConfigurationError(
                    f"{path}: unknown option {nearest(name, actions)} (see --help)"
                )
            if name in seen:
                raise ConfigurationError(f"{path}: {name} is given twice: keep one")
            seen.add(name)
            if name in actions:
                yield name, value


def _words(action: argparse.Action, value: Any, path: str) -> list[str]:
    """What an option of a file is on a command line."""
    name = action.option_strings[0]
    if action.nargs == 0:
        if value not in _SWITCHES:
            raise ConfigurationError(
                f"{path}: {action.dest} must be true or false, not {value!r}"
            )
        if isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[not _SWITCHES[value]]]
        return [name] if _SWITCHES[value] == action.const else []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in values):
        raise ConfigurationError(
            f"{path}: {action.dest} must be one value or a list, not {value!r}"
        )
    if isinstance(action, argparse._AppendAction):
        return [f"{name}={part}" for part in values]
    if action.nargs == "+":
        return [name, *values]
    return [f"{name}={','.join(values)}"]


def _recorded(path: str) -> dict[str, Any] | None:
    """The options of the run whose config.json a file is, as :func:`_read` gives them;
    None where it is another file."""
    if Path(path).suffix != ".json":
        return None
    # Imports torch, which takes seconds.
    from ten_dist.run_record import RunRecord, is_run_record

    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError:
        return None
    if not is_run_record(content):
        return None
    try:
        record = RunRecord.from_dict(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path} {error}") from None
    model = record.model.to_dict()
    # It follows from the data.
    left_out = {"document_separator_id"}
    if record.model.mixer == "attention":
        left_out.update(EIGENSTATE_FIELDS)
    options = record.training.to_dict()
    options |= {n: v for n, v in model.items() if n not in left_out}
    return {name: _as_text(value) for name, value in options.items()}


def _as_text(value: Any) -> Any:
    """A plain value as :class:`_Loader` gives it."""
    if isinstance(value, list):
        return [str(part) for part in value]
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)


class _Loader(yaml.BaseLoader):
    """Takes every scalar as text, as a command line does, and no key twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    pairs = loader.construct_pairs(node, deep=True)
    content = {}
    for (key, value), (key_node, _) in zip(pairs, node.value, strict=True):
        if not isinstance(key, str) or key in content:
            raise yaml.MarkedYAMLError(
                problem=f"{key!r} is given twice or is no name",
                problem_mark=key_node.start_mark,
            )
        content[key] = value
    return content


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> str | None:
    plain = node.style is None and node.value in ("", "~", "null")
    return None if plain else loader.construct_scalar(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)


def _text(path: str) -> str:
    return read_user_text(
        Path(path), f"{_OPTION} {path}", "it is a YAML file of options"
    )


def _read(path: str) -> dict[str, Any]:
    """The content of a YAML file: text, None, and lists and mappings of them."""
    try:
        content = yaml.load(_text(path), _Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{_OPTION} {path} is not YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{_OPTION} {path} has no options by name: each is a line `name: value`"
        )
    return content
