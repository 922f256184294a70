"""A small corpus, and the ways to run the command on it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.ranks import Ranks
from data_prep.shard import main
from ten_dist.data import Manifest, TokenReader
from ten_dist.data.tokenizer import set_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["tensor", "state", "décay", "模型", "λ", "=", "0.5", "return", "x.y", "None\n"]


@pytest.fixture(scope="session")
def sentence():
    """Function: seed, length in words -> text."""

    def make(seed, length):
        return " ".join(random.Random(seed).choices(WORDS, k=length))

    return make


@pytest.fixture
def corpus(tmp_path, sentence):
    """A tree of text, source code and JSONL, with what must be left out of it."""
    folder = tmp_path / "corpus"
    (folder / "code" / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.py").write_text("hidden")
    for index in range(30):
        text = f"# file {index}\n{sentence(index, 4000)}\n"
        place = folder / "code" / ("deep" if index % 3 else ".") / f"m{index}.py"
        place.write_text(text, encoding="utf-8")
    (folder / "note.md").write_text("a note that says <|endoftext|> in the middle")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "image.png").write_bytes(b"\x89PNG")
    # More than two ranges of lines, which lines straddle.
    with open(folder / "records.jsonl", "w", encoding="utf-8") as file:
        for index in range(150):
            record = {"id": index, "text": f"record {index}: {sentence(index, 2000)}"}
            file.write(json.dumps(record, ensure_ascii=index % 2 == 0) + "\n")
        file.write("\n" + json.dumps({"text": ""}) + "\n")
        file.write('{"text": "half a pair \\ud800"}\n')
    return folder


@pytest.fixture(scope="session")
def documents_of():
    """Function: corpus folder -> its documents, read in the plainest way."""

    def read(folder):
        texts = [
            path.read_bytes().decode("utf-8")
            for path in folder.rglob("*")
            if path.suffix in (".py", ".md") and ".git" not in path.parts
        ]
        lines = (folder / "records.jsonl").read_text(encoding="utf-8").split("\n")
        texts += [json.loads(line)["text"] for line in lines[:150]]
        return texts

    return read


@pytest.fixture(scope="session")
def decoded():
    """Function: prepared folder -> its documents, decoded from all tokens in order."""

    def decode(folder):
        manifest = Manifest.load(folder)
        tokenizer = set_tokenizer(manifest)
        tokens = TokenReader(manifest).read(0, manifest.tokens)
        ends = np.flatnonzero(tokens == manifest.separator_id)
        assert ends[-1] == tokens.size - 1
        starts = [0, *(ends[:-1] + 1)]
        return [
            tokenizer.decode(tokens[start:end].tolist())
            for start, end in zip(starts, ends, strict=True)
        ]

    return decode


@pytest.fixture
def prepare(capsys):
    """Function: arguments -> (status, standard output, standard error), in this process.

    Without MPI, which can be started only once in a process.
    """

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments], Ranks())
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def mpiexec_command():
    """Function: ranks -> the words of a command up to the running Python."""
    beside = Path(sys.executable).parent / "mpiexec"
    program = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert program, "mpiexec is neither beside the running Python nor on PATH"
    about = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True
    )
    open_mpi = "open mpi" in about.stdout.lower() or "open-mpi" in about.stdout.lower()
    options = ["--allow-run-as-root", "--oversubscribe"] if open_mpi else []
    return lambda ranks: [program, *options, "-n", str(ranks), sys.executable]


@pytest.fixture(scope="session")
def mpiexec(mpiexec_command):
    """Function: ranks, Python arguments -> the finished process."""

    def run(ranks, *arguments):
        return subprocess.run(
            [*mpiexec_command(ranks), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )

    return run
