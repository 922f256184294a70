"""Copies and short documents are left out, the same ones on any number of ranks."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from data_prep.deduplicate import PEAK_BYTES, find_duplicates
from ten_dist.data import Manifest
from tests.conftest import contents

BYTES = ("--tokenizer", "bytes")


@pytest.fixture
def copied(tmp_path, sentence):
    """Text files and JSONL that share texts, among and within each other."""
    folder = tmp_path / "copied"
    folder.mkdir()
    counts = [200 + 5 * (index % 40) for index in range(120)]
    texts = [f"{n}: {sentence(n, n)}" for n in counts]
    for index in range(30):
        (folder / f"{index}.txt").write_text(texts[2 * index], encoding="utf-8")
    with open(folder / "a.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        # Nearly a copy is none.
        file.write(json.dumps({"text": texts[0] + " "}) + "\n")
    return folder, {*texts, texts[0] + " "}


def test_of_equal_documents_the_first_stays(tmp_path, copied, prepare, decoded):
    folder, texts = copied
    arguments = ["--input", folder, *BYTES, "--shard_megabytes", 0.02]
    assert prepare(*arguments, "--output", tmp_path / "all")[0] == 0
    once = list(dict.fromkeys(decoded(tmp_path / "all")))
    status, said, _ = prepare(
        *arguments, "--output", tmp_path / "once", "--deduplicate"
    )
    assert status == 0
    assert decoded(tmp_path / "once") == once and set(once) == texts
    assert "left out: 110 copies of earlier texts: " in said
    source = Manifest.load(tmp_path / "once").source
    assert source["deduplicate"] is True
    assert source["left_out"]["duplicate"]["count"] == 110
    assert "copies" not in prepare(*arguments, "--output", tmp_path / "again")[1]


def test_ranks_leave_out_the_same(tmp_path, copied, prepare, mpiexec):
    folder, _ = copied
    options = ["--input", folder, "--deduplicate", "--min_length", 1200]
    options += ["--vocab_size", 300, "--val_fraction", 0.3, "--shard_megabytes", 0.02]
    module = ["-m", "mpi4py", "-m", "data_prep.shard"]
    done = mpiexec(3, *module, *options, "--output", tmp_path / "three")
    assert done.returncode == 0, done.stderr
    assert prepare(*options, "--output", tmp_path / "one")[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_copies_do_not_train_the_tokenizer(tmp_path, copied, prepare):
    folder, texts = copied
    options = ["--vocab_size", 400, "--output"]
    prepare("--input", folder, "--deduplicate", *options, tmp_path / "a")
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    prepare("--input", tmp_path / "b.jsonl", *options, tmp_path / "b")
    tokenizers = [(tmp_path / side / "tokenizer.json").read_bytes() for side in "ab"]
    assert tokenizers[0] == tokenizers[1]


def test_short_documents_are_left_out(tmp_path, prepare, decoded):
    """Counted in characters; what is empty is counted as that."""
    lines = ["ab", "abc", "λλλ", "λλ", " ", "模型模型"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = ["--input", path, *BYTES]
    output = tmp_path / "out"
    status, said, _ = prepare(*arguments, "--output", output, "--min_length", 3)
    assert status == 0 and decoded(output) == ["abc", "λλλ", "模型模型"]
    assert "1 blank texts: a.jsonl:5" in said
    assert "2 texts shorter than --min_length: a.jsonl:1, a.jsonl:4" in said
    source = Manifest.load(output).source
    assert source["min_length"] == 3 and source["left_out"]["too_short"]["count"] == 2
    # What an option changes is another set of data.
    assert prepare(*arguments, "--output", output)[0] == 2
    for wrong, expected in ((-1, "--min_length must be 0 or more"), (9, "no doc")):
        status, _, errors = prepare(
            *arguments, "--output", tmp_path / "new", "--min_length", wrong
        )
        assert status == 2 and expected in errors
        assert not (tmp_path / "new").exists()


def test_find_duplicates():
    rows = np.random.default_rng(0).integers(0, 2**63, (1000, 2)).astype(np.uint64)
    # Equal in one half only is not equal.
    rows[700:900] = rows[100:300]
    rows[700, 1] += np.uint64(1)
    rows[701] = rows[0]
    copies = find_duplicates(rows)
    seen, expected = set(), []
    for row in map(tuple, rows.tolist()):
        expected.append(row in seen)
        seen.add(row)
    assert copies.tolist() == expected and sum(expected) == 199
    assert find_duplicates(np.empty((0, 2), np.uint64)).size == 0


def test_memory_for_each_document_is_as_stated():
    rows = np.random.default_rng(0).integers(0, 2**63, (400_000, 2)).astype(np.uint64)
    tracemalloc.start()
    find_duplicates(rows)
    peak = tracemalloc.get_traced_memory()[1] + rows.nbytes
    tracemalloc.stop()
    assert peak < PEAK_BYTES * len(rows)
