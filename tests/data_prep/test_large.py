"""Text files too large for memory give what smaller ones would, in flat memory."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.tokenizer import train_tokenizer
from ten_dist.data import Manifest
from ten_dist.data.tokenizer import SEPARATOR
from tests.conftest import contents

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def in_pieces(monkeypatch):
    """Read every file in small pieces, which cut through characters of many bytes."""
    monkeypatch.setattr("data_prep.documents.LARGE_BYTES", 1000)
    monkeypatch.setattr("data_prep.documents.CHUNK_BYTES", 777)


def test_read_in_pieces_or_whole_the_result_is_the_same(
    tmp_path, corpus, prepare, monkeypatch, in_pieces
):
    """Also the counts of what is left out, and the tokenizer."""
    (corpus / "blank.txt").write_text(" \n" * 2000)
    (corpus / "latin1.txt").write_bytes(b"good " * 1000 + b"\xe9")
    text = "a text behind a mark\n" * 100
    (corpus / "marked.txt").write_text(text, encoding="utf-8-sig")
    (corpus / "text.txt.gz").write_bytes(gzip.compress(text[1:].encode() * 9))
    (corpus / "cut.txt").write_bytes("模型".encode() * 1000 + b"\xe6\xa8")
    (corpus / "copy.txt").write_bytes((corpus / "code" / "m0.py").read_bytes())
    monkeypatch.setattr("data_prep.pieces.PIECE_CHARACTERS", 1000)
    monkeypatch.setattr("data_prep.tokenizer._PART_CHARACTERS", 500)
    options = ["--input", corpus, "--vocab_size", 400, "--val_fraction", 0.3]
    options += ["--deduplicate", "--min_length", 200]
    status, said, errors = prepare(*options, "--output", tmp_path / "pieces")
    assert status == 0, errors
    assert "3 blank texts: blank.txt, empty.txt, records.jsonl:152" in said
    assert "4 not text in UTF-8: cut.txt, latin.txt, latin1.txt, ..." in said
    assert "1 texts shorter than --min_length: note.md" in said
    assert "1 copies of earlier texts" in said
    monkeypatch.setattr("data_prep.documents.LARGE_BYTES", 1 << 26)
    assert prepare(*options, "--output", tmp_path / "whole")[0] == 0
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def plainly_trained(text, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer.to_str()


def test_how_a_text_is_cut_makes_no_difference_to_training(monkeypatch):
    monkeypatch.setattr("data_prep.tokenizer._PART_CHARACTERS", 40)
    draw = random.Random(0)
    parts = ["ab", "don't", "we'll", " ", "  ", "\n", "\n\n", "\t", "\u3000", "\x1c"]
    parts += ["12", "模型", "-->", "é", "\xa0", "'s", ".\n", "\u200b", "\x85"]
    text = "".join(draw.choices(parts, k=20000))
    expected = plainly_trained(text, 340)
    for _ in range(3):
        cuts = sorted(draw.sample(range(len(text)), 300))
        starts, stops = [0, *cuts], [*cuts, len(text)]
        pieces = [text[a:b] for a, b in zip(starts, stops, strict=True)]
        assert train_tokenizer([pieces], 340).to_str() == expected
    # Runs that are cut, because training on them takes very long, are so wherever the
    # pieces end.
    text = f"{'base64' * 500} word{' ' * 3000}{'word ' * 9}{'x' * 1999}\n" * 3
    whole = train_tokenizer([[text]], 300).to_str()
    for size in (1, 300, 512, 513, 1025):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert train_tokenizer([pieces], 300).to_str() == whole


def test_a_large_file_that_changes_is_noticed(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr("data_prep.documents.LARGE_BYTES", 1000)
    path = tmp_path / "a.txt"
    path.write_text("one " * 1000)
    held_out = "data_prep.documents.LargeDocument.is_held_out"

    def changing(document, val_fraction):
        path.write_text("two " * 1000)
        return False

    monkeypatch.setattr(held_out, changing)
    arguments = ["--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes"]
    status, _, errors = prepare(*arguments)
    assert status == 2 and f"{path} changed while it was being prepared" in errors
    assert not (tmp_path / "out").exists()


MEASURED = """
import resource, sys
from data_prep.ranks import Ranks
from data_prep.shard import main
assert main(sys.argv[1:], Ranks()) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_document(tmp_path):
    """A larger document takes no more, up to what an allocator keeps back."""
    peaks = []
    for megabytes in (5, 12):
        path = tmp_path / f"{megabytes}.txt"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines("eigenstates décay\n" * 55_188 for _ in range(megabytes))
        done = subprocess.run(
            [
                *(sys.executable, "-c", MEASURED, "--input", str(path)),
                *("--output", str(tmp_path / f"out{megabytes}")),
                *(
                    "--tokenizer",
                    "bytes",
                ),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split("peak ")[1]))
        manifest = Manifest.load(tmp_path / f"out{megabytes}")
        assert (manifest.documents, manifest.text_bytes) == (1, path.stat().st_size)
    # In MB. The first has two pieces of the largest size already; whole, the tokens of
    # the second would take several hundred more.
    assert peaks[1] - peaks[0] < 100, peaks
