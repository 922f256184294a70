"""The documents are true: their commands, options, paths and links exist, and what is
generated is fresh."""

import argparse
import configparser
import importlib.util
import re
from pathlib import Path

import pytest

from data_prep.options import make_parser
from docs.generate.__main__ import stale_pages
from docs.generate.pages import COMMAND, ROOT
from ten_dist.cli import command_parsers
from ten_dist.monitor.run_monitor import TENSORBOARD_TAGS
from tests.tools.documents import (
    PAGES,
    anchors,
    commands,
    inline_code,
    inline_commands,
    links,
)

PARSERS = {**command_parsers(), "data_prep.shard": make_parser()}
FOLDERS = r"(?:ten_dist|data_prep|launch|benchmarks|tests|docs|ds_configs|recipes)"
# Options of other programs that the documents name.
FOREIGN_OPTIONS = {
    *("--allow-run-as-root", "--no-kill"),
    *("--num_accelerators", "--num_gpus", "--master_addr", "--help"),
}
by_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


def accepted(words):
    """What is wrong with a command, or None; nothing is run."""
    # Variables for the program.
    while re.match("[A-Z_]+=", words[0]):
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "ten-dist":
        return ten_dist_accepts(rest)
    if program == "deepspeed":
        return train_accepts(script_arguments(rest))
    if program == "mpiexec":
        assert rest[:1] == ["-n"] and rest[2:5] == ["python", "-m", "mpi4py"]
        return accepted(["python", *rest[5:]])
    if program == "python":
        assert rest[0] == "-m"
        return module_accepts(rest[1], rest[2:])
    if program == "bash":
        return None if (ROOT / rest[0]).is_file() else f"no file {rest[0]}"
    if program == "pip":
        return extra_exists(rest[1])
    # What they need is there only after the set-up.
    return None if program in ("source", "tensorboard") else f"no program {program}"


def parse(name, arguments):
    """The namespace of a command line, or what is wrong with it."""
    try:
        return PARSERS[name].parse_args(arguments)
    except (SystemExit, ValueError, argparse.ArgumentError) as error:
        return f"{name} {' '.join(arguments)}: {error}"


def ten_dist_accepts(words):
    name, arguments = words[0], words[1:]
    if name not in PARSERS:
        return f"no command {name}"
    if name == "train":
        return train_accepts(arguments)
    parsed = parse(name, arguments)
    if isinstance(parsed, str):
        return parsed
    if name == "supervise":
        return accepted(parsed.job[1:])
    return train_accepts(parsed.train[1:]) if name == "launch" else None


def train_accepts(arguments):
    from ten_dist.config.run_options import given_run

    parsed = parse("train", arguments)
    if isinstance(parsed, str):
        return parsed
    try:
        given_run(parsed)
    except ValueError as error:
        return str(error)
    return None


def script_arguments(words):
    """Arguments of the script that DeepSpeed's launcher is told to start."""
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(words)
    assert (ROOT / parsed.user_script).is_file()
    return parsed.user_args


def module_accepts(module, arguments):
    if importlib.util.find_spec(module) is None:
        return f"no module {module}"
    if module == "pytest":
        paths = [a for a in arguments if not a.startswith("-")]
        return next((p for p in paths if not (ROOT / p).exists()), None)
    if module in PARSERS:
        parsed = parse(module, arguments)
        return parsed if isinstance(parsed, str) else None
    return None


def extra_exists(requirement):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (extra,) = re.findall(r"ten_dist\[(\w+)\]", requirement)
    return None if extra in setup["options.extras_require"] else f"no extra {extra}"


@by_page
def test_commands_are_accepted(page):
    refused = {" ".join(words): accepted(words) for words in commands(page)}
    assert {c: why for c, why in refused.items() if why is not None} == {}


@by_page
def test_commands_in_sentences_exist(page):
    for words in inline_commands(page):
        if words[0] == "ten-dist" and words[1] != "COMMAND":
            names = options_of(PARSERS[words[1]])
            before = words[: words.index("--")] if "--" in words else words
            given = {w.partition("=")[0] for w in before if re.match(r"--\w", w)}
            assert given - {"--help"} <= names, words
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, words
        elif words[0] == "pip":
            assert extra_exists(words[2]) is None, words


def options_of(parser):
    """Names of all options of a command and of its actions."""
    names = set()
    for action in parser._actions:
        names.update(action.option_strings)
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                names |= options_of(inner)
    return names


@by_page
def test_options_in_sentences_exist(page):
    known = set().union(*map(options_of, PARSERS.values())) | FOREIGN_OPTIONS
    named = {
        match[0]
        for code in inline_code(page)
        if (match := re.match(r"--[a-z][\w-]*", code))
    }
    # The script that renews generated pages, and that one alone.
    assert named - known - {"--check"} == set()


@by_page
def test_links_resolve(page):
    for link in links(page):
        assert link.path.exists(), link.text
        if link.anchor:
            assert link.anchor in anchors(link.path), link.text


@by_page
def test_named_paths_exist(page):
    for code in inline_code(page):
        if re.fullmatch(rf"{FOLDERS}/[\w./*-]*", code):
            assert list(ROOT.glob(code.rstrip("/"))), code
        elif re.fullmatch(r"[\w-]+\.(?:cfg|toml|sh)|constraints\.txt", code):
            assert (ROOT / code).is_file(), code


def test_sections_that_the_code_cites_exist():
    cited = 0
    for path in source_files():
        for name, section in re.findall(r"docs/(\w+\.md)#?([\w-]*)", path.read_text()):
            page = ROOT / "docs" / name
            assert page.is_file(), path
            assert not section or section in anchors(page), (path, section)
            cited += 1
    assert cited >= 15


def source_files() -> list[Path]:
    return [
        path
        for folder in ("ten_dist", "data_prep", "launch", "benchmarks")
        for suffix in ("py", "cpp", "h", "sh")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
    ]


def test_generated_pages_are_fresh():
    stale = sorted(stale_pages())
    assert stale == [], f"{', '.join(stale)}: `{COMMAND}` renews what is stale"


def test_the_readme_is_short_and_leads_to_every_page():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 200
    assert {link.path for link in links(readme)} >= set(PAGES) - {readme}


def test_every_metric_of_tensorboard_has_its_meaning():
    page = (ROOT / "docs" / "run_folder.md").read_text()
    rows = [re.split(r"(?<!\\)\|", line) for line in page.splitlines()]
    described = {
        row[1].strip(" `"): row[2].strip(" `")
        for row in rows
        if len(row) == 6 and row[3].strip()
    }
    assert described.items() >= TENSORBOARD_TAGS.items()
