"""The map of files in architecture.md, from the first line of what each file says of itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from docs.generate.pages import ROOT, with_part

FOLDERS = ("ten_dist", "data_prep", "launch", "benchmarks", "docs/generate", "tests")
_SUFFIXES = (".py", ".sh", ".cpp", ".h")


def page() -> str:
    """The text of architecture.md with the map as it should be."""
    lines = [line for folder in FOLDERS for line in _lines(ROOT / folder, 0)]
    return with_part("docs/architecture.md", "map", "\n".join(["```", *lines, "```"]))


def first_line(path: Path) -> str:
    """What a file says of itself, up to the end of the first line; pages that it cites
    are left out.

    Raises:
        ValueError: it says nothing: it has no docstring, or no comment at its start.
    """
    text = path.read_text()
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        mark = "#" if path.suffix == ".sh" else "//"
        lines = [line for line in text.splitlines() if not line.startswith("#!")]
        said = lines[0].removeprefix(mark) if lines[0].startswith(mark) else ""
    if not said.strip():
        raise ValueError(f"{path.relative_to(ROOT)} does not begin with what it is for")
    return re.sub(r" \(docs/[^)]*\)", "", said.strip().splitlines()[0])


def _lines(folder: Path, depth: int) -> list[str]:
    """A line for the folder, one for each of its files, then those of its folders."""
    entries = [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith((".", "_"))
    ]
    init = folder / "__init__.py"
    said = ""
    if init.is_file() and init.read_text().strip():
        said = first_line(init)
    name = folder.relative_to(ROOT) if depth == 0 else folder.name
    lines = [_line(f"{name}/", said, depth)]
    for path in entries:
        # Tests of a file have its name, and need no word of their own.
        if path.suffix in _SUFFIXES and not path.name.startswith("test_"):
            lines.append(_line(path.name, first_line(path), depth + 1))
    for path in entries:
        if path.is_dir() and not path.is_symlink() and any(_sources(path)):
            lines += _lines(path, depth + 1)
    return lines


def _sources(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in _SUFFIXES]


def _line(name: str, said: str, depth: int) -> str:
    return f"{'  ' * depth}{name:<{30 - 2 * depth}} {said}".rstrip()
