"""The pages of the documentation: their code, links and headings, and the commands they name."""

import dataclasses
import re
import shlex
from pathlib import Path

from docs.generate.pages import ROOT, anchor

PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
] + sorted((ROOT / "docs").glob("*.md"))
PAGES.append(ROOT / "ds_configs" / "README.md")
# A command in the middle of a sentence; what is in capitals there stands for something.
_COMMAND_WORDS = ("ten-dist", "deepspeed", "mpiexec", "python", "bash", "pip")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Link:
    """A link to a file of the repository, or to a section of one."""

    path: Path
    anchor: str
    text: str


def code_blocks(page, *languages):
    """Contents of the fenced blocks of some languages, in their order."""
    return [
        content
        for _, language, content in _FENCE.findall(page.read_text())
        if language in languages
    ]


def commands(page):
    """The words of each command in the blocks of a page, those that are run or not."""
    lines = "".join(code_blocks(page, "bash", "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def inline_code(page):
    """What stands between single backticks outside of the blocks of a page."""
    return [" ".join(c.split()) for c in _INLINE.findall(_prose(page))]


def inline_commands(page):
    """The words of each command within the sentences of a page."""
    found = [code for code in inline_code(page) if " " in code and "..." not in code]
    return [shlex.split(code) for code in found if code.split()[0] in _COMMAND_WORDS]


def links(page):
    """The links of a page into the repository."""
    targets = [t for t in _LINK.findall(_prose(page)) if not t.startswith("http")]
    return [
        Link((page.parent / t.partition("#")[0]).resolve(), t.partition("#")[2], t)
        if not t.startswith("#")
        else Link(page, t[1:], t)
        for t in targets
    ]


def anchors(page):
    """What links to the sections of a page can end with."""
    return {
        anchor(title) for title in _HEADING.findall(_FENCE.sub("", page.read_text()))
    }


def _prose(page):
    return _FENCE.sub("", page.read_text())
