"""Options declared once: a field of a dataclass is the setting, its check and its help.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class BatchOptions(Options):
        seq_len: Annotated[int, at_least(1), metavar("N")] = 1024
        \"\"\"Tokens of a row, T.\"\"\"

:mod:`ten_dist.config.command_line` makes the option `--seq_len N` of it. Choices are a
`Literal`; a field that may be None is not checked while it is.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ten_dist.arguments import LARGEST, LONGEST_SECONDS
from ten_dist.errors import ConfigurationError

if TYPE_CHECKING:
    from typing import Self


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that a field takes; they are always finite."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and self.least <= number <= self.most
            and self.above < number < self.below
        )

    def __str__(self) -> str:
        limits = ("least", "above", "most", "below")
        finite = {
            name: f"{getattr(self, name):,.16g}"
            for name in limits
            if math.isfinite(getattr(self, name))
        }
        if finite.keys() == {"least", "most"}:
            return "from {least} to {most}".format(**finite)
        words = {
            "least": "{} or more",
            "above": "more than {}",
            "most": "at most {}",
            "below": "below {}",
        }
        return " and ".join(words[name].format(n) for name, n in finite.items())


def at_least(least: float, *, most: float = math.inf, below: float = math.inf) -> Range:
    """Numbers of `least` or more."""
    return Range(least=least, most=most, below=below)


def more_than(above: float, *, most: float = math.inf) -> Range:
    """Numbers above `above`."""
    return Range(above=above, most=most)


SECONDS = at_least(0, most=LONGEST_SECONDS)
PORT = at_least(1, most=65535)


@dataclasses.dataclass(frozen=True)
class Metavar:
    """What stands for the value in the help."""

    text: str


metavar = Metavar


REPEATED = "repeated"
"""Note on a tuple: the option is given once for each value."""
SEVERAL_WORDS = "several words"
"""Note on a tuple: the option takes all words up to the next one."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One field as an option."""

    name: str
    kind: Any
    """Its type, without None and annotations; of a tuple that of its values."""
    default: Any
    """`dataclasses.MISSING` where the option is required."""
    description: str
    group: str
    """Title of the options that it stands among in help and files."""
    optional: bool
    """Whether it may be None."""
    length: int | None
    """Values of a tuple, 0 for any number; None where the field is no tuple."""
    choices: tuple[str, ...]
    range: Range | None
    metavar: str
    repeated: bool
    several_words: bool
    alternatives: tuple[str, ...]
    """Options of which only one can be given, this one among them."""

    def check(self, value: Any) -> None:
        """Raise a ConfigurationError unless the field can hold the value."""
        if value is None and self.optional:
            return
        values = value if self.length is not None else (value,)
        length = len(values) if isinstance(values, tuple) else -1
        if length < 0 or self.length not in (None, 0, length):
            wanted = f"{self.length or 'several'} values"
        elif not all(type(part) in _KINDS[self.kind] for part in values):
            wanted = _KIND_NAMES[self.kind]
        elif any(type(p) is int and not -LARGEST <= p < LARGEST for p in values):
            wanted = "a number of 64 bits"
        elif self.choices and not all(part in self.choices for part in values):
            wanted = "one of " + ", ".join(self.choices)
        elif self.range and not all(part in self.range for part in values):
            wanted = str(self.range)
        else:
            return
        real = type(value) is float and self.kind is float
        shown = f"{value:g}" if real else repr(value)
        if len(shown) > _SHOWN:
            shown = f"{shown[:_SHOWN]}..."
        raise ConfigurationError(f"--{self.name} must be {wanted}, not {shown}")


_KINDS = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
_SHOWN = 60
_METAVARS = {int: "N", float: "X", str: "NAME", bool: ""}
_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the frozen dataclasses whose fields are options.

    Every instance is valid: what no field can hold is refused when it is made, by a
    :class:`ConfigurationError` that names the option.
    """

    GROUP: ClassVar[str] = ""
    """Title of the class's own options in help and files; by default that of a base."""
    ALTERNATIVES: ClassVar[tuple[str, ...]] = ()
    """Options of which only one can be given."""
    _OPTIONS: ClassVar[Mapping[str, Option]] = {}

    def __post_init__(self) -> None:
        for option in options_of(type(self)).values():
            value = getattr(self, option.name)
            if option.length is not None and isinstance(value, list):
                # As JSON has it.
                value = tuple(value)
                object.__setattr__(self, option.name, value)
            option.check(value)
        for owner in type(self).__mro__:
            names = vars(owner).get("ALTERNATIVES", ())
            check_alternatives(names, functools.partial(getattr, self))
            # Each class checks its own options, and those of its bases are checked there.
            check = vars(owner).get("check_together")
            if check is not None:
                check(self)

    def check_together(self) -> None:
        """Raise a ConfigurationError if options of this class do not fit together."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values of all fields, ready for JSON."""
        values = {name: getattr(self, name) for name in options_of(type(self))}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values, as :meth:`to_dict` gives them.

        Raises:
            ConfigurationError: a name is not an option, or a value is not valid.
        """
        known = options_of(cls)
        for name in values:
            if name not in known:
                raise ConfigurationError(
                    f"unknown {cls.GROUP} option {nearest(name, known)}"
                )
        return cls(**values)


def check_alternatives(names: Iterable[str], value_of: Callable[[str], Any]) -> None:
    """Raise a ConfigurationError if more than one of some options is given."""
    given = [name for name in names if value_of(name) is not None]
    if len(given) > 1:
        raise ConfigurationError(
            f"--{given[0]} and --{given[1]} cannot both be given: keep one"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A name that is not known, with the known one that is most like it."""
    hint = alike(name, known)
    return f"'{name}': {hint}" if hint else f"'{name}'"


def alike(name: str, known: Iterable[str]) -> str:
    """The known name that is most like another, in words; empty where none is."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"do you mean {found[0]}?" if found else ""


def options_of(config_class: type[Options]) -> Mapping[str, Option]:
    """Every field of an options dataclass, by name: its own, then those of its bases."""
    # Reading the source of a class takes milliseconds.
    if "_OPTIONS" not in vars(config_class):
        options: dict[str, Option] = {}
        for name, option in _options(config_class):
            options.setdefault(name, option)
        config_class._OPTIONS = options
    return config_class._OPTIONS


def _options(config_class: type[Options]) -> Iterator[tuple[str, Option]]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, text in _descriptions(config_class):
        if name in fields:
            yield name, _option(fields[name], hints[name], text, config_class)
    for base in config_class.__bases__:
        if issubclass(base, Options) and base is not Options:
            yield from options_of(base).items()


def _descriptions(config_class: type) -> Iterator[tuple[str, str]]:
    """Each name that is declared in a class, and the string after it on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    definition = tree.body[0]
    assert isinstance(definition, ast.ClassDef)
    for field, text in itertools.pairwise(definition.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            yield field.target.id, " ".join(str(text.value.value).split())


def _option(
    field: dataclasses.Field[Any], hint: Any, description: str, owner: type[Options]
) -> Option:
    notes: list[Any] = []
    optional = False
    # Annotated, Optional and tuple, in whatever order they are nested.
    length = None
    while typing.get_origin(hint) is not None and typing.get_origin(hint) != Literal:
        parts = typing.get_args(hint)
        if typing.get_origin(hint) is typing.Annotated:
            notes += hint.__metadata__
            hint = parts[0]
        elif typing.get_origin(hint) is tuple:
            length = 0 if parts[-1] is ... else len(parts)
            hint = parts[0]
        else:
            optional = True
            (hint,) = (part for part in parts if part is not type(None))
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    kind = str if choices else hint
    return Option(
        name=field.name,
        kind=kind,
        default=field.default,
        description=description,
        group=owner.GROUP,
        optional=optional,
        length=length,
        choices=choices,
        range=next((note for note in notes if isinstance(note, Range)), None),
        metavar=next(
            (note.text for note in notes if isinstance(note, Metavar)),
            "|".join(choices) or _METAVARS[kind],
        ),
        repeated=REPEATED in notes,
        several_words=SEVERAL_WORDS in notes,
        alternatives=owner.ALTERNATIVES if field.name in owner.ALTERNATIVES else (),
    )
