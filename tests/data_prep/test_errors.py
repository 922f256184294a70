"""Whatever is wrong: one line that names it, status 2, and nothing written."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models

from ten_dist.data.tokenizer import byte_tokenizer
from tests.conftest import contents


@pytest.fixture
def refused(tmp_path, prepare):
    """Function: arguments -> the error, after checking that nothing was written."""

    def run(*arguments, output=None):
        output = output or tmp_path / "out"
        before = contents(tmp_path)
        status, _, errors = prepare(*arguments, "--output", output)
        lines = [line for line in errors.splitlines() if "error: " in line]
        assert status == 2
        assert len(lines) == 1 and "Traceback" not in errors
        assert contents(tmp_path) == before
        assert not (tmp_path / "out").exists()
        return lines[0]

    return run


BYTES = ("--tokenizer", "bytes")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "give one of --input, --corpus and --dataset"),
        (["--input", "x", "--corpus", "python-stdlib", *BYTES], "cannot both be"),
        (
            ["--input", "{corpus}", *BYTES, "--dataset_split", "test"],
            "--dataset_split has an effect only with --dataset",
        ),
        (["--input", "{corpus}"], "--vocab_size is needed"),
        (
            ["--input", "{corpus}", "--vocab_size", "256"],
            "--vocab_size must be at least",
        ),
        (["--input", "{corpus}", "--vocab_size", "many"], "--vocab_size"),
        (["--input", "{corpus}", *BYTES, "--vocab_size", "999"], "999 is not that of"),
        (
            ["--input", "{corpus}", *BYTES, "--val_fraction", "1"],
            "--val_fraction must be 0 or more and below 1",
        ),
        (["--input", "{corpus}", *BYTES, "--val_fraction", "nan"], "--val_fraction"),
        (
            ["--input", "{corpus}", *BYTES, "--shard_megabytes", "0"],
            "--shard_megabytes",
        ),
        (["--input", "{corpus}", *BYTES, "--separator", "x"], "--separator"),
        (["--input", "{corpus}", *BYTES, "--colour", "x"], "--colour"),
        (["--input", "{corpus}", *BYTES, "--include", "*.zzz"], "--include '*.zzz'"),
        (
            [
                *("--input", "{corpus}", *BYTES, "--exclude", "deep"),
                *("--include", "*.md", "--include", "deep/*"),
            ],
            "--include 'deep/*' matches no file in {corpus} that --exclude leaves",
        ),
        (["--input", "{corpus}", *BYTES, "--include", ""], "--include is empty"),
        (["--input", "{corpus}", *BYTES, "--exclude", "*"], "no text was found"),
        (["--input", "{corpus}/absent", *BYTES], "absent is missing"),
        (["--input", "{corpus}/empty.txt", *BYTES], "no documents"),
        (
            ["--input", "{corpus}", "--tokenizer", "byte"],
            "give a tokenizer.json, or 'bytes'",
        ),
        (["--input", "{corpus}", "--tokenizer", "{corpus}/note.md"], "not a tokenizer"),
        (
            ["--input", "{corpus}/note.md", *BYTES, "--val_fraction", "1e-9"],
            "none of the 1 documents fell in the held-out set: give a --val_fraction",
        ),
        (
            ["--input", "{corpus}/note.md", *BYTES, "--val_fraction", "0.9999999"],
            "fell in the train set: give a --val_fraction of less",
        ),
    ],
)
def test_wrong_arguments(corpus, refused, arguments, expected):
    filled = [argument.replace("{corpus}", str(corpus)) for argument in arguments]
    assert expected.replace("{corpus}", str(corpus)) in refused(*filled)


@pytest.mark.parametrize(
    "line, expected",
    [
        (b"{broken", "not a line of JSON"),
        (b'{"text": "\xff"', "not a line of JSON"),
        (b"[1]", "no field 'text'"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'{"text": ["x"]}', "field 'text' is not a string"),
        (b"[" * 100000, "not a line of JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path, refused, line, expected):
    """By file and line, also far behind the first range of lines."""
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    path.write_bytes(good * 1500 + line + b"\n" + good)
    assert f"{path}:1501: {expected}" in refused("--input", path, *BYTES)


def test_a_tokenizer_without_separator(tmp_path, corpus, refused):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    arguments = ["--input", corpus, "--tokenizer", tmp_path / "t.json"]
    assert "--separator" in refused(*arguments)
    assert "--separator '<end>'" in refused(*arguments, "--separator", "<end>")


def test_an_output_that_cannot_be_used(tmp_path, corpus, refused):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "shard-00000.tar").write_text("mine")
    arguments = ["--input", corpus, *BYTES]
    assert "is a file" in refused(*arguments, output=tmp_path / "file")
    under = refused(*arguments, output=tmp_path / "file" / "out")
    assert "--output" in under
    assert "is not empty" in refused(*arguments, output=tmp_path / "full")
    # A place where not even root can create a folder.
    assert "cannot write to --output" in refused(*arguments, output="/proc/self/out")


def test_run_again(tmp_path, corpus, prepare):
    """The same is already prepared; anything else is refused, and nothing is touched."""
    output = tmp_path / "out"
    arguments = ["--output", output, "--val_fraction", 0.2, "--input", corpus]
    assert prepare(*arguments, "--vocab_size", 300)[0] == 0
    before = contents(output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    status, said, _ = prepare(*arguments, "--vocab_size", 300)
    assert status == 0 and "already prepared" in said
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == times
    status, _, errors = prepare(*arguments, "--vocab_size", 301)
    assert status == 2 and "other options" in errors
    (corpus / "new.txt").write_text("new")
    status, _, errors = prepare(*arguments, "--vocab_size", 300)
    assert status == 2 and "another corpus" in errors
    assert contents(output) == before
    (corpus / "new.txt").unlink()
    (output / "shard-00000.tar").unlink()
    status, _, errors = prepare(*arguments, "--vocab_size", 300)
    assert status == 2 and "shard-00000.tar is missing" in errors


def test_what_lies_in_the_output_folder_is_no_input(tmp_path, corpus, prepare):
    """Preparing into a folder of the corpus does not change the corpus."""
    output = corpus / "tokens"
    arguments = ["--input", corpus, "--include", "*", "--exclude", "*.png"]
    arguments += [*BYTES, "--output", output]
    assert prepare(*arguments)[0] == 0
    status, said, _ = prepare(*arguments)
    assert status == 0 and "already prepared" in said


def test_help_explains_every_option(prepare):
    status, said, _ = prepare("--help")
    assert status == 0
    for option in ("--input", "--tokenizer", "--val_fraction", "--shard_megabytes"):
        assert option in said
    assert "[default: 32.0]" in said


def test_byte_tokenizer_ids_are_the_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("aλ\n").ids == list("aλ\n".encode())
    assert tokenizer.token_to_id("<|endoftext|>") == 256
