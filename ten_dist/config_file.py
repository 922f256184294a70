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
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ten_dist.arguments import ArgumentParser, check_text
from ten_dist.config.model import EIGENSTATE_FIELDS, TemporalEigenstateConfig
from ten_dist.config.options import (
    Option,
    check_alternatives,
    nearest,
    options_of,
)
from ten_dist.config.training import RUN_FORMAT
from ten_dist.errors import ConfigurationError
from ten_dist.files import read_user_text

_OPTION = "--config_file"
_SWITCHES = {"true": True, "false": False}
# With these a command line says that it is about another model than a record.
_OTHER_MODEL = {"config", "paper", "use_hten", "mixer"}


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
    """The options of a file by name; values are text, or lists or mappings of it, and
    None where one is not given.

    Raises:
        ConfigurationError: it cannot be read, or has no options by name.
    """
    content, _ = _load(path)
    return {name: value for _, name, value in _flattened(content, path)}


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
    for option in parser.declared.values():
        check_alternatives(
            option.alternatives, lambda name: getattr(namespace, name, None)
        )
    values = {**groups.pop("options", {}), **groups}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # Some characters come back only as escape sequences.
    return text if yaml.safe_load(text) == values else yaml.safe_dump(values)


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    # Where the locale is not of UTF-8, what is not ASCII came as single bytes.
    return os.fsencode(str(value)).decode("utf-8")


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
    if names.count(_OPTION) > 1:
        raise ConfigurationError(f"{_OPTION} is given twice: keep one")
    starts_another = any(a.nargs == argparse.REMAINDER for a in parser._actions)
    if starts_another and not {"--", "--print_config"} & set(arguments):
        raise ConfigurationError(
            f"put -- before the other command, to say whose {_OPTION} this is"
        )
    at = names.index(_OPTION)
    path = own[at].partition("=")[2] or next(iter(own[at + 1 :]), "")
    if not path:
        raise ConfigurationError(f"{_OPTION} is given no file")
    del arguments[at : at + (1 if "=" in own[at] else 2)]
    actions = {a.dest: a for a in parser._actions if _from_file(a)}
    given = {
        action.dest
        for action in actions.values()
        if not set(names).isdisjoint(action.option_strings)
    }
    words: list[str] = []
    for name, value in _options_for(parser, path, given).items():
        option = parser.declared.get(name)
        replaced = given.intersection(option.alternatives if option else ())
        if value is not None and name not in given and not replaced:
            words += _words(actions[name], option, value, path)
    # As the command line has them, in any locale.
    words = [os.fsdecode(word.encode("utf-8", "surrogatepass")) for word in words]
    check_text(words)
    return words + arguments


def _options_for(parser: ArgumentParser, path: str, given: set[str]) -> dict[str, Any]:
    """The options of a file that the command has, by name; those that are `given` on the
    command line will win."""
    content, is_run = _load(path)
    known = {a.dest for a in parser._actions if _from_file(a)}
    if is_run:
        if not parser.takes_runs:
            raise ConfigurationError(
                f"{path} is the record of a run, whose options are those of train and "
                "plan: give this command a file of its own"
            )
        if not given.isdisjoint(_OTHER_MODEL):
            model = options_of(TemporalEigenstateConfig)
            content = {n: v for n, v in content.items() if n not in model}
        # It was not written for this command, which may have only some of its options.
        return {name: value for name, value in content.items() if name in known}
    titles = {str(g.title) for g in parser._action_groups if g._group_actions}
    titles.update(option.group for option in parser.passed_over.values())
    found = {}
    for group, name, value in _flattened(content, path):
        if group is not None and group not in titles:
            raise ConfigurationError(
                f"{path}: unknown group {nearest(group, titles)} (see --help)"
            )
        if name in known:
            found[name] = value
        elif group is None and name in titles:
            if value is not None:
                raise ConfigurationError(
                    f"{path}: {name} is a group, below which its options stand"
                )
        elif name not in parser.passed_over:
            raise ConfigurationError(
                f"{path}: unknown option {nearest(name, known)} (see --help)"
            )
    return found


def _flattened(
    content: dict[str, Any], path: str
) -> Iterator[tuple[str | None, str, Any]]:
    """Group, name and value of each option; the group is None where there is none."""
    seen = set()
    for key, values in content.items():
        group, options = (
            (key, values) if isinstance(values, dict) else (None, {key: values})
        )
        for name, value in options.items():
            if name in seen:
                raise ConfigurationError(f"{path}: {name} is given twice: keep one")
            seen.add(name)
            yield group, name, value


def _words(
    action: argparse.Action, option: Option | None, value: Any, path: str
) -> list[str]:
    """What an option of a file is on a command line."""
    name = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, str) or value not in _SWITCHES:
            raise ConfigurationError(
                f"{path}: {action.dest} must be true or false, not {value!r}"
            )
        if isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[not _SWITCHES[value]]]
        return [name] if _SWITCHES[value] == action.const else []
    appended = isinstance(action, argparse._AppendAction)
    several = appended or option is not None and option.length is not None
    values = value if several and isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in values):
        wanted = "one value or a list of them" if several else "one value"
        raise ConfigurationError(f"{path}: {action.dest} must be {wanted}")
    if appended:
        return [f"{name}={part}" for part in values]
    if action.nargs == "+":
        for part in values:
            if part.startswith("-"):
                raise ConfigurationError(
                    f"{path}: {action.dest} begins with -: write ./{part}"
                )
        return [name, *values]
    return [f"{name}={','.join(values)}"]


def _recorded(text: str, path: str) -> dict[str, Any]:
    """The options of a run, as :func:`_load` gives them, from its config.json."""
    # Imports torch, which takes seconds.
    from ten_dist.run_record import RunRecord

    try:
        record = RunRecord.from_dict(json.loads(text))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path} {error}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from None
    # It follows from the data.
    left_out = {"document_separator_id"}
    if record.model.mixer == "attention":
        left_out.update(EIGENSTATE_FIELDS)
    options = {**record.training.to_dict(), **record.model.to_dict()}
    return {n: _as_text(value) for n, value in options.items() if n not in left_out}


def _as_text(value: Any) -> Any:
    """A plain value as :class:`_Loader` gives it."""
    if isinstance(value, list):
        return [str(part) for part in value]
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)


_NOTHING = ("", "~", "null", "Null", "NULL")


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


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> str | None:
    text = loader.construct_scalar(node)
    return None if node.style is None and text in _NOTHING else text


def _refuse_tag(loader: _Loader, node: yaml.Node) -> None:
    raise yaml.MarkedYAMLError(
        problem=f"a tag, {node.tag}, has no meaning here", problem_mark=node.start_mark
    )


_Loader.add_constructor(None, _refuse_tag)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)


def _load(path: str) -> tuple[dict[str, Any], bool]:
    """The content of a file, of text, None, and lists and mappings of them; and whether
    that is the options of a run, by name, from its record."""
    text = read_user_text(
        Path(path), f"{_OPTION} {path}", "it is a YAML file of options"
    )
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigurationError(f"{_OPTION} {path} is not YAML: {reason}") from None
    if content is None:
        return {}, False
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{_OPTION} {path} has no options by name: each is a line `name: value`"
        )
    if content.get("format") == RUN_FORMAT:
        return _recorded(text, path), True
    return content, False
