"""configuration.md: every option of every command, and the fields of a model.

Names, texts and defaults are those of the argument parsers and of the model's dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator

from data_prep.options import make_parser
from docs.generate.pages import COMMAND, anchor
from ten_dist import PRESETS, TemporalEigenstateConfig
from ten_dist.cli import command_parsers

_DEFAULT = re.compile(r"\s*[\[(]default: (.*)[\])]$")
_FIELDS = {field.name: field for field in dataclasses.fields(TemporalEigenstateConfig)}
_HEAD = f"""# Configuration

<!-- made by `{COMMAND}`: change the texts in the code, not here -->

Every option of every command, with its default: what `ten-dist COMMAND --help` shows. A dash in the
column of defaults stands for an option that has no effect, or that follows from others as its text says,
where it is not given. Options of several commands are described at the first of them.

"""


def page() -> str:
    """The text of configuration.md as it should be."""
    parsers = {**command_parsers(), "data_prep.shard": make_parser()}
    names = {
        name: name if "." in name else f"ten-dist {name}" for name in sorted(parsers)
    }
    # Training first: most of the others take some of its options.
    order = ["train", *(name for name in names if name != "train")]
    known: dict[tuple[str, str], str] = {}
    parts = [_HEAD + "\n".join(f"- [{names[n]}](#{anchor(names[n])})" for n in order)]
    parts[0] += "\n- [Presets](#presets)\n"
    for name in order:
        parts.append("\n".join(_command(names[name], parsers[name], known, 2)))
    parts.append("\n".join(_presets()))
    return "\n".join(parts)


def _command(
    title: str,
    parser: argparse.ArgumentParser,
    known: dict[tuple[str, str], str],
    level: int,
) -> Iterator[str]:
    """Lines of the section of a command, and of those of its actions.

    Args:
        known: (option, text) of what is described already, with the title of where it
            is; gains the options of this section.
    """
    yield f"{'#' * level} {title}"
    yield ""
    if parser.description:
        paragraph = " ".join(parser.description.strip().split("\n\n")[0].split())
        yield re.sub(r"(?<=\.) .*", "", paragraph)
        yield ""
    inner: dict[str, argparse.ArgumentParser] = {}
    unnamed, named = [], []
    # argparse has no public way to ask a parser for its groups.
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if _is_shown(a)]
        for action in shown:
            if isinstance(action.choices, dict):
                inner.update(action.choices)
        options = [a for a in shown if not isinstance(a.choices, dict)]
        if group.title in ("options", "positional arguments"):
            unnamed += options
        elif options:
            named.append((group, options))
    yield from _options(title, unnamed, known)
    for group, options in named:
        said = f": {group.description}" if group.description else ""
        yield f"**{group.title}**{said}"
        yield ""
        yield from _options(title, options, known)
    for name, action_parser in inner.items():
        yield from _command(f"{title} {name}", action_parser, known, level + 1)


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and action.dest != "help"


def _options(
    title: str, actions: list[argparse.Action], known: dict[tuple[str, str], str]
) -> Iterator[str]:
    new, repeated = [], {}
    for action in actions:
        key = (_name(action), action.help or "")
        if known.get(key, title) != title:
            repeated.setdefault(known[key], []).append(f"`{_name(action).split()[0]}`")
        else:
            known[key] = title
            new.append(action)
    if new:
        yield "| option | default | meaning |"
        yield "|---|---|---|"
        for action in new:
            text, default = _text_and_default(action)
            yield f"| `{_cell(_name(action))}` | {default} | {text} |"
        yield ""
    for where, names in repeated.items():
        yield f"As in [{where}](#{anchor(where)}): {', '.join(names)}."
        yield ""


def _name(action: argparse.Action) -> str:
    """How an argument is written, with its placeholder."""
    metavar = action.metavar
    if action.choices is not None and metavar is None:
        metavar = "|".join(map(str, action.choices))
    if not action.option_strings:
        return str(metavar or action.dest)
    name = action.option_strings[0]
    # A switch takes nothing.
    if action.nargs == 0:
        return name
    several = " ..." if action.nargs == "+" else ""
    return f"{name} {metavar or action.dest.upper()}{several}"


def _text_and_default(action: argparse.Action) -> tuple[str, str]:
    """The help of an argument without its default, and that; as cells of a table."""
    values = {**vars(action), "prog": ""}
    text = " ".join((action.help or "").split()) % values
    match = _DEFAULT.search(text)
    default = "-"
    if match:
        text = text[: match.start()]
        # The interpreter is another one on every machine.
        default = match[1].replace(sys.executable, "the interpreter that runs it")
        default = {"True": "on", "False": "off"}.get(default, default)
    elif action.nargs == 0:
        default = "off"
    if default == "the preset's":
        default = _of_model(action.dest)
    return _cell(text), _cell(default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _of_model(name: str) -> str:
    """The value of a model's field where no option is given."""
    default = _FIELDS[name].default
    differs = any(fields.get(name, default) != default for fields in PRESETS.values())
    return (
        f"[the preset's](#presets), or {_value(default)}"
        if differs
        else _value(default)
    )


def _presets() -> Iterator[str]:
    """What each preset says of a model."""
    names = [
        name for name in _FIELDS if any(name in fields for fields in PRESETS.values())
    ]
    yield "## Presets"
    yield ""
    yield "What each preset of `--config` sets; other fields of a model have the defaults above."
    yield ""
    yield f"| `--config` | {' | '.join(f'`{name}`' for name in names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for preset, fields in PRESETS.items():
        values = [_value(fields.get(name, _FIELDS[name].default)) for name in names]
        yield f"| {preset} | {' | '.join(values)} |"
    yield ""


def _value(value: object) -> str:
    """A default as one would write it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else str(value)
