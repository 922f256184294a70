"""Compressed JSONL and Parquet: the same documents, and damage named by its place."""

from __future__ import annotations

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ten_dist.data import Manifest

BYTES = ("--tokenizer", "bytes")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def texts(sentence):
    return [f"text {index}: {sentence(index, 30 + index)}" for index in range(300)]


def lines_of(texts):
    return [json.dumps({"text": text}).encode() + b"\n" for text in texts]


def write_zstandard(path, parts):
    """A frame for each part, as tools that compress in parallel write them."""
    path.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, parts)))


def write_parquet(path, texts, rows=100, column="text", kind=None, **options):
    table = pyarrow.table(
        {"id": list(range(len(texts))), column: pyarrow.array(texts, kind)}
    )
    pyarrow.parquet.write_table(table, path, row_group_size=rows, **options)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("frames", [1, 3])
def test_compressed_lines(tmp_path, prepare, decoded, texts, suffix, frames):
    lines = [b"\xef\xbb\xbf" + lines_of(texts)[0], b"\n", *lines_of(texts)[1:]]
    parts = [b"".join(lines[start::frames]) for start in range(frames)]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"a.jsonl.{suffix}"
    if suffix == "gz":
        path.write_bytes(b"".join(map(gzip.compress, parts)))
    else:
        write_zstandard(path, parts)
    # A whole folder, to find it by its name.
    arguments = ["--input", tmp_path / "in", "--output", tmp_path / "out", *BYTES]
    status, said, errors = prepare(*arguments)
    assert status == 0, errors
    found = decoded(tmp_path / "out")
    assert sorted(found) == sorted(texts)
    assert (
        f"left out: 1 blank lines: a.jsonl.{suffix}:{2 if frames == 1 else 102}" in said
    )
    if frames == 1:
        assert found == texts


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_parquet(tmp_path, prepare, decoded, texts, kind):
    path = tmp_path / "a.parquet"
    rows = [*texts, "", None]
    rows = [row.encode() if row and kind == pyarrow.binary() else row for row in rows]
    rows[300] = b"" if kind == pyarrow.binary() else ""
    write_parquet(path, rows, kind=kind, column="body")
    arguments = ["--input", path, "--output", tmp_path / "out", "--text_field", "body"]
    status, said, errors = prepare(*arguments, *BYTES, "--shard_megabytes", 0.02)
    assert status == 0, errors
    assert sorted(decoded(tmp_path / "out")) == sorted(texts)
    assert "left out: 1 nulls: a.parquet row 302\n" in said
    assert "left out: 1 blank texts: a.parquet row 301\n" in said
    # Row groups are units of work of their own.
    assert 1 < len(Manifest.load(tmp_path / "out").shards) <= 4


def test_parquet_text_that_is_not_utf8(tmp_path, prepare, decoded):
    binary = pyarrow.array([b"good", b"caf\xe9"])
    table = pyarrow.table({"text": binary.cast(pyarrow.string(), safe=False)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    arguments = ["--input", tmp_path / "a.parquet", "--output", tmp_path / "out"]
    status, said, _ = prepare(*arguments, *BYTES)
    assert status == 0 and "1 not text in UTF-8: a.parquet row 2" in said
    assert decoded(tmp_path / "out") == ["good"]


def test_ranks_share_all_formats(tmp_path, prepare, mpiexec, texts):
    folder = tmp_path / "in"
    folder.mkdir()
    write_parquet(folder / "a.parquet", texts, rows=50)
    write_zstandard(folder / "b.jsonl.zst", [b"".join(lines_of(texts))])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b"".join(lines_of(texts))))
    (folder / "d.jsonl").write_bytes(b"".join(lines_of(texts)))
    options = ["--input", folder, *BYTES, "--shard_megabytes", 0.02]
    module = ["-m", "mpi4py", "-m", "data_prep.shard"]
    done = mpiexec(2, *module, *options, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert prepare(*options, "--output", tmp_path / "one")[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert Manifest.load(tmp_path / "one").documents == 4 * len(texts)


@pytest.fixture
def refused(tmp_path, prepare):
    """Function: path, arguments -> the one line of the error; nothing is written."""

    def run(path, *arguments):
        arguments = ["--input", path, "--output", tmp_path / "out", *BYTES, *arguments]
        status, _, errors = prepare(*arguments)
        lines = [line for line in errors.splitlines() if "error: " in line]
        assert status == 2 and len(lines) == 1 and "Traceback" not in errors
        assert not (tmp_path / "out").exists()
        return lines[0]

    return run


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_that_are_damaged(tmp_path, refused, texts, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    data = b"".join(lines_of(texts))
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    whole = (gzip.compress if suffix == "gz" else compressor.compress)(data)
    path.write_bytes(whole[: len(whole) // 2])
    error = refused(path)
    assert f"{path}:" in error and "damaged or cut off here" in error
    assert 1 < int(error.split(f"{path}:")[1].split(":")[0]) < 300
    path.write_bytes(whole[:-2])
    assert f"{path}:301: the compressed file is damaged" in refused(path)
    path.write_bytes(whole[:-2] + b"xx")
    assert "damaged or cut off here" in refused(path)
    path.write_bytes(whole + b"rest")
    assert f"{path}:301: the compressed file is damaged" in refused(path)
    bad = b"".join([*lines_of(texts[:7]), b'{"text": 5}\n', *lines_of(texts)])
    path.write_bytes((gzip.compress if suffix == "gz" else compressor.compress)(bad))
    assert f"{path}:8: field 'text' is not a string" in refused(path)


def test_parquet_files_that_are_damaged(tmp_path, refused, texts):
    path = tmp_path / "a.parquet"
    write_parquet(path, texts, use_dictionary=False, write_page_checksum=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path}: damaged, or not Parquet" in refused(path)
    path.write_bytes(b"no Parquet at all")
    assert f"{path}: damaged, or not Parquet" in refused(path)
    # The text of the last row group, whose footer stays as it was.
    metadata = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(whole)).metadata
    column = metadata.row_group(2).column(1)
    middle = column.data_page_offset + column.total_compressed_size // 2
    path.write_bytes(whole[:middle] + bytes(20) + whole[middle + 20 :])
    assert f"{path}: row group 2: damaged" in refused(path)


def test_parquet_columns_that_hold_no_text(tmp_path, refused, texts):
    path = tmp_path / "a.parquet"
    write_parquet(path, texts)
    error = refused(path, "--text_field", "body")
    assert f"{path}: no column 'body', it has id text: give the column" in error
    error = refused(path, "--text_field", "id")
    assert f"{path}: column 'id' holds int64, not text" in error


@pytest.mark.parametrize(
    "name, package",
    [
        ("a.parquet", "pyarrow"),
        ("a.jsonl.zst", "zstandard"),
        ("a.txt.zst", "zstandard"),
        ("a.jsonl", "zstandard"),
    ],
)
def test_a_library_that_is_not_installed(tmp_path, refused, monkeypatch, name, package):
    path = tmp_path / name
    path.write_bytes(zstandard.ZstdCompressor().compress(b"whatever"))
    for module in [module for module in sys.modules if module.startswith(package)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(path)
    assert f"{path} cannot be read without {package}" in error
    assert "pip install 'ten_dist[formats]'" in error and "--exclude" in error
