"""Nothing is left out in silence: what is not used is counted, and the first named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ten_dist.data import Manifest

MARK = b"\xef\xbb\xbf"
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.fixture
def read(tmp_path, prepare, decoded):
    """Function: contents by name, arguments -> (documents, reason -> names, said)."""

    def run(files, *arguments):
        folder = tmp_path / "in"
        for name, content in files.items():
            path = os.path.join(os.fsencode(folder), os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
        output = tmp_path / "out"
        status, said, errors = prepare(
            *("--input", folder, "--output", output, "--tokenizer", "bytes"), *arguments
        )
        assert status == 0, errors
        left_out = Manifest.load(output).source["left_out"]
        first = {reason: found["first"] for reason, found in left_out.items()}
        return sorted(decoded(output)), first, said

    return run


@pytest.fixture
def refused(tmp_path, prepare):
    """Function: name, content, arguments -> the one line that ends the preparation."""

    def run(name, content, *arguments):
        path = tmp_path / name
        path.write_bytes(content)
        output = tmp_path / "out"
        status, _, errors = prepare(
            *("--input", path, "--output", output, "--tokenizer", "bytes"), *arguments
        )
        lines = [line for line in errors.splitlines() if "error: " in line]
        assert status == 2 and len(lines) == 1 and "Traceback" not in errors
        assert not output.exists()
        return lines[0]

    return run


def lines_of(*values):
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


def parquet_of(*values):
    table = pyarrow.table({"text": pyarrow.array(values, pyarrow.binary())})
    output = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, output, row_group_size=2)
    return output.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz", "a.json.zst"])
def test_every_format_treats_rows_alike(read, name):
    """Nulls, blanks, bytes that are not UTF-8, marks and short texts."""
    if name == "a.parquet":
        place = "a.parquet row {}"
        rows = [MARK + b"one", None, b" \n", b"caf\xe9", "ä".encode(), b"three"]
        content = parquet_of(*rows)
    else:
        place = name + ":{}"
        content = MARK + lines_of("\ufeffone", None, " \n")
        content += b'{"text": "caf\xe9"}\n' + MARK + lines_of("ä", "three")
        compress = COMPRESS[os.path.splitext(name)[1].replace(".jsonl", "")]
        content = compress(content)
    documents, first, said = read({name: content}, "--min_length", 2)
    assert documents == ["one", "three"]
    reasons = ["null", "blank", "not_utf8", "too_short"]
    assert first == {
        reason: [place.format(number)] for number, reason in enumerate(reasons, 2)
    }
    assert f"left out: 1 nulls: {place.format(2)}\n" in said


def test_bytes_that_are_not_utf8_in_another_field_do_no_harm(read):
    content = b'{"id": "\xe9", "text": "one"}\n'
    assert read({"a.jsonl": content})[:2] == (["one"], {})


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSON", "a.ndjson", "a.jsonlines"])
def test_json_lines_by_any_name(read, name, ending):
    content = COMPRESS[ending](lines_of("one", "two"))
    assert read({name + ending: content})[:2] == (["one", "two"], {})


@pytest.mark.parametrize("ending", COMPRESS)
def test_text_however_it_is_compressed(read, ending):
    """The content says so, not the name alone."""
    content = COMPRESS[ending](MARK + b"text")
    files = {f"a.txt{ending}": content, "b.md": content, "c.txt.gz": content}
    assert read(files)[:2] == (["text"] * 3, {})


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_text_that_is_damaged(refused, ending):
    whole = COMPRESS[ending](os.urandom(3000).hex().encode())
    damaged = "the compressed file is damaged or cut off here"
    assert damaged in refused(f"a.txt{ending}", whole[:-9])
    assert damaged in refused(f"a.txt{ending}", whole + b"what is no frame")


def test_compressed_json_lines_by_a_plain_name(read):
    content = gzip.compress(lines_of("one", "two"))
    plain = lines_of("three")
    files = {"a.jsonl": content, "b.jsonl.gz": plain}
    assert read(files)[:2] == (["one", "three", "two"], {})


def test_json_that_is_no_lines_is_named(read):
    files = {
        "a.json": b'[\n{"text": "one"}\n]\n',
        "b.json": b'{"name": "package"}',
        "c.json.gz": gzip.compress(b'[{"text": "one"}]'),
        "d.txt": b"text",
    }
    documents, first, said = read(files)
    assert documents == ["text"]
    assert first == {"json": ["a.json", "b.json", "c.json.gz"]}
    assert "`jq -c '.[]' FILE > FILE.jsonl` makes lines" in said


def test_json_lines_by_the_name_of_a_text_are_noted(read):
    documents, first, said = read({"a.txt": lines_of("one"), "b.txt": b'{"other": 1}'})
    assert len(documents) == 2 and first == {}
    assert (
        "note: 1 text files that look like JSON Lines" in said and ": a.txt\n" in said
    )
    assert "left out: nothing" in said


def archive(path):
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "a.py")
    return path.read_bytes()


def test_what_is_no_text_is_named_by_what_it_is(tmp_path, read):
    files = {
        "a.txt": "text".encode("utf-16"),
        "b.jsonl": lines_of("one").decode().encode("utf-16"),
        "c.md": parquet_of(b"one"),
        "d.json.gz": gzip.compress(b"%PDF-1.4 no more"),
        "e.txt": archive(tmp_path / "e.tar"),
        "f.txt": bytes(700),
        "g.txt": "text".encode("utf-16-le"),
        "h.txt": b"text",
    }
    documents, first, said = read(files)
    assert documents == ["text"]
    utf_16 = "(UTF-16: `iconv -f UTF-16 -t UTF-8` converts it)"
    assert first["not_utf8"] == [
        f"a.txt {utf_16}",
        f"b.jsonl {utf_16}",
        "c.md (Parquet: name it .parquet)",
    ]
    assert "left out: 7 not text in UTF-8: a.txt" in said


@pytest.mark.parametrize(
    "name, kind", [("a.txt", "PDF"), ("b.txt", "tar archive"), ("c.txt", "zero bytes")]
)
def test_a_corpus_of_nothing_else_is_refused_with_the_reasons(
    tmp_path, refused, name, kind
):
    tar = archive(tmp_path / "x.tar")
    content = {"a.txt": b"%PDF-1.4", "b.txt": tar, "c.txt": bytes(9)}[name]
    error = refused(name, content)
    assert "the corpus has no documents: 1 not text in UTF-8" in error
    assert f"{name} (" in error and kind in error


def test_empty_files_of_every_format(read):
    files = {f"a.{end}": b"" for end in ("jsonl", "json", "parquet", "txt", "txt.gz")}
    files |= {"b.jsonl.gz": gzip.compress(b""), "b.txt.zst": COMPRESS[".zst"](b"")}
    files |= {"b.parquet": parquet_of(), "c.txt": b"text"}
    documents, first, said = read(files)
    assert documents == ["text"]
    assert first == {"empty": ["a.json", "a.jsonl", "a.parquet"]}
    assert "left out: 8 empty files: a.json, a.jsonl, a.parquet, ...\n" in said


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_nothing_but_an_empty_file(tmp_path, refused, name):
    error = refused(name, b"")
    assert f"no text was found in {tmp_path / name}: 1 empty files: {name}" in error


def test_names_of_any_kind(read):
    """Read, and where they are named, in one line that can be printed."""
    files = {
        "line\nfeed.txt": b"one",
        "UPPER.TXT": b"two",
        b"latin-\xe9.txt": b"three",
        "sub\nfolder/carriage\rreturn.jsonl": lines_of("four", None),
        b"bad-\xff.txt": b"\xff",
        " blank.txt ": b"x",
        "escape\x1b[2J.txt": b"",
    }
    documents, first, said = read(files)
    assert documents == ["four", "one", "three", "two"]
    assert first == {
        "null": ["sub\\nfolder/carriage\\rreturn.jsonl:2"],
        "not_utf8": ["bad-\\xff.txt"],
        "unknown_name": ["' blank.txt '"],
        "empty": ["escape\\x1b[2J.txt"],
    }
    assert all(line.isprintable() for line in said.split("\n"))


def test_what_lies_in_a_folder_and_is_not_taken(tmp_path, read):
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "a.txt").write_text("hidden")
    (folder / "kept").mkdir()
    (folder / "linked").symlink_to(folder / "kept")
    (folder / "alias.txt").symlink_to(folder / "kept" / "a.txt")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "nowhere.txt").symlink_to("absent")
    os.mkfifo(folder / "pipe.txt")
    files = {"kept/a.txt": b"text", "b.png": b"x", "c.csv": b"x", "old/d.txt": b"x"}
    documents, first, said = read(files, "--exclude", "old", "--exclude", "*.csv")
    assert documents == ["text"]
    assert first == {
        "unknown_name": ["b.png"],
        "excluded": ["c.csv", "old/"],
        "hidden_folder": [".git/"],
        "linked_folder": ["linked/"],
        "broken_link": ["loop.txt", "nowhere.txt"],
        "special": ["pipe.txt"],
        "repeated": ["kept/a.txt"],
    }
    # Before the work, too: it may take hours.
    assert "  not in it: 1 hidden folders (--input takes them): .git/\n" in said


def test_files_that_no_include_matches(read):
    files = {"a.txt": b"one", "b.md": b"two", "c.md": b"three"}
    documents, first, _ = read(files, "--include", "*.txt")
    assert (documents, first) == (["one"], {"not_included": ["b.md", "c.md"]})


def test_a_file_that_is_named_itself_is_not_counted_as_left_out(
    tmp_path, prepare, decoded
):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.dat").write_text("one")
    arguments = ["--input", folder, folder / "a.dat", "--output", tmp_path / "out"]
    status, said, _ = prepare(*arguments, "--tokenizer", "bytes")
    assert status == 0 and decoded(tmp_path / "out") == ["one"]
    assert "left out: nothing" in said


def test_the_same_is_named_however_the_work_is_divided(tmp_path, prepare):
    """The lines of a file that is read in ranges, and files of several shards.

    On several ranks: tests/data_prep/test_deduplicate.py compares whole manifests.
    """
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [f"{n} " + "x" * 3000 if n % 7 else None for n in range(1500)]
    (folder / "a.jsonl").write_bytes(lines_of(*rows))
    for n in range(20):
        (folder / f"{n:02}.txt").write_bytes(b"\xff" * (40000 + n))
    for megabytes, shards in ((0.5, 4), (32, 1)):
        output = tmp_path / str(megabytes)
        arguments = ["--input", folder, "--output", output, "--tokenizer", "bytes"]
        assert prepare(*arguments, "--shard_megabytes", megabytes)[0] == 0
        manifest = Manifest.load(output)
        assert len(manifest.shards) == shards
        assert manifest.source["left_out"] == {
            "null": {"count": 215, "first": ["a.jsonl:1", "a.jsonl:8", "a.jsonl:15"]},
            "not_utf8": {"count": 20, "first": ["00.txt", "01.txt", "02.txt"]},
        }


def test_a_column_of_the_same_name_twice(tmp_path, refused):
    column = pyarrow.array(["one"])
    table = pyarrow.Table.from_arrays([column, column], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    assert "2 columns are called 'text'" in refused("a.parquet", content)
