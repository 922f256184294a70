"""What is prepared: every document, once, without loss, on a stable side of the split."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data_prep.ranks import assign_units
from ten_dist.data import Manifest, TokenReader, file_sha256, verify_shards
from ten_dist.data.tokenizer import byte_tokenizer


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("tokenizer", ["trained", "bytes", "file"])
def test_decoding_the_tokens_gives_the_documents(
    tmp_path, corpus, prepare, documents_of, decoded, tokenizer
):
    expected = documents_of(corpus)
    output = tmp_path / "out"
    options = {
        "trained": ["--vocab_size", 400],
        "bytes": ["--tokenizer", "bytes"],
        "file": ["--tokenizer", tmp_path / "mine.json", "--vocab_size", 257],
    }[tokenizer]
    byte_tokenizer().save(str(tmp_path / "mine.json"))
    status, said, _ = prepare(
        *("--input", corpus, "--output", output, "--shard_megabytes", 0.2, *options)
    )
    assert status == 0
    assert Counter(decoded(output)) == Counter(expected)
    manifest = Manifest.load(output)
    verify_shards(manifest)
    assert len(manifest.shards) > 3
    assert manifest.documents == len(expected) == 181
    assert manifest.text_bytes == sum(len(text.encode()) for text in expected)
    assert manifest.vocab_size == (400 if tokenizer == "trained" else 257)
    assert manifest.dtype == "uint16"
    assert "left out: 2 not text in UTF-8: latin.txt, records.jsonl:153\n" in said
    assert "left out: 2 blank texts: empty.txt, records.jsonl:152\n" in said
    assert "left out: 1 blank lines: records.jsonl:151\n" in said
    assert f"{manifest.tokens} tokens" in said
    if tokenizer == "file":
        assert manifest.tokenizer_sha256 == file_sha256(tmp_path / "mine.json")
    if tokenizer != "trained":
        # One token a byte, and a separator a document.
        assert manifest.tokens == manifest.text_bytes + manifest.documents
        tokens = TokenReader(manifest).read(0, manifest.tokens)
        text = bytes(tokens[: tokens.tolist().index(256)].tolist()).decode()
        assert text in expected


def test_how_texts_are_batched_for_the_tokenizer_makes_no_difference(
    tmp_path, corpus, prepare, monkeypatch
):
    """Batches under way at the same time are put back in order."""
    options = ["--input", corpus, "--vocab_size", 300, "--val_fraction", 0.3]
    assert prepare(*options, "--output", tmp_path / "one")[0] == 0
    monkeypatch.setattr("data_prep.writer.BATCH_CHARACTERS", 10)
    assert prepare(*options, "--output", tmp_path / "many")[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_shards_mix_the_sources(tmp_path, corpus, prepare, decoded):
    prepare(
        *("--input", corpus, "--output", tmp_path / "out", "--tokenizer", "bytes"),
        *("--shard_megabytes", 0.2),
    )
    kinds = [text.startswith("record") for text in decoded(tmp_path / "out")]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert changes > 2


def test_the_result_does_not_depend_on_where_the_corpus_lies(tmp_path, corpus, prepare):
    options = ["--vocab_size", 300, "--val_fraction", 0.1]
    prepare("--input", corpus, "--output", tmp_path / "a", *options)
    moved = tmp_path / "elsewhere" / "under another name"
    moved.parent.mkdir()
    corpus.rename(moved)
    prepare("--input", moved, "--output", tmp_path / "b", *options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()


def test_a_document_stays_on_its_side_when_the_corpus_grows(
    tmp_path, corpus, prepare, decoded, sentence
):
    options = ["--tokenizer", "bytes", "--val_fraction", 0.25]
    prepare("--input", corpus, "--output", tmp_path / "a", *options)
    with open(corpus / "records.jsonl", "a", encoding="utf-8") as file:
        new = [{"text": sentence(1000 + index, 100)} for index in range(100)]
        file.writelines(json.dumps(record) + "\n" for record in new)
    (corpus / "code" / "m0.py").unlink()
    prepare("--input", corpus, "--output", tmp_path / "b", *options)
    train, val = (set(decoded(tmp_path / "a" / side)) for side in (".", "val"))
    new_train, new_val = (set(decoded(tmp_path / "b" / side)) for side in (".", "val"))
    assert 20 < len(val) < 75 and len(train) + len(val) == 181
    assert not train & val and not new_train & new_val
    assert len((train - new_train) | (val - new_val)) == 1
    assert len(new_train | new_val) == 280


def test_the_tokenizer_is_trained_on_train_documents_only(tmp_path, prepare):
    """A string that only held-out documents have is never merged into a token."""
    lines = [f"{index} " + "qzjxv " * 40 for index in range(400)]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in lines)
    )
    options = ["--vocab_size", 400, "--output", tmp_path / "out"]
    prepare("--input", tmp_path / "c.jsonl", *options, "--val_fraction", 0.5)
    held_out = Manifest.load(tmp_path / "out" / "val").documents
    assert 100 < held_out < 300
    (tmp_path / "out2.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in lines_of(tmp_path))
    )
    options = ["--vocab_size", 400, "--output", tmp_path / "again"]
    prepare("--input", tmp_path / "out2.jsonl", *options)
    first = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == first


def lines_of(tmp_path):
    """The train documents of ``out``."""
    manifest = Manifest.load(tmp_path / "out")
    tokens = TokenReader(manifest).read(0, manifest.tokens)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    return text.split("<|endoftext|>")[:-1]


def test_the_val_folder_is_a_token_set_of_its_own(tmp_path, corpus, prepare):
    prepare(
        *("--input", corpus, "--output", tmp_path / "out", "--vocab_size", 300),
        *("--val_fraction", 0.2),
    )
    train = Manifest.load(tmp_path / "out")
    val = Manifest.load(tmp_path / "out" / "val")
    verify_shards(val)
    assert val.tokenizer_sha256 == train.tokenizer_sha256
    assert val.fingerprint != train.fingerprint
    assert train.documents + val.documents == 181


def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_so(tmp_path, prepare):
    (tmp_path / "a.txt").write_text("ab ab ab")
    output = tmp_path / "out"
    arguments = ["--input", tmp_path / "a.txt", "--output", output]
    status, said, _ = prepare(*arguments, "--vocab_size", 5000)
    vocab_size = Manifest.load(output).vocab_size
    assert status == 0 and 257 < vocab_size < 270
    assert f"the vocabulary is {vocab_size}, not --vocab_size 5000" in said


def test_a_users_tokenizer_with_a_separator_and_a_template(
    tmp_path, corpus, prepare, documents_of, decoded
):
    """Tokens that it adds to a single text, and its truncation, must not get in."""
    mine = byte_tokenizer()
    mine.add_special_tokens(["<s>", "<end>"])
    mine.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    mine.enable_truncation(10)
    mine.save(str(tmp_path / "mine.json"))
    status, _, _ = prepare(
        *("--input", corpus, "--output", tmp_path / "out"),
        *("--tokenizer", tmp_path / "mine.json", "--separator", "<end>"),
    )
    assert status == 0
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.separator_token, manifest.separator_id) == ("<end>", 258)
    assert manifest.vocab_size == 259
    assert Counter(decoded(tmp_path / "out")) == Counter(documents_of(corpus))


def test_a_large_vocabulary_takes_32_bits(tmp_path, prepare):
    words = {f"w{index}": index for index in range(70000)}
    words["</s>"] = 70001  # A gap: the embedding needs 70002 rows.
    mine = Tokenizer(models.WordLevel(words, unk_token="w0"))
    mine.pre_tokenizer = pre_tokenizers.Whitespace()
    mine.add_special_tokens(["</s>"])
    mine.save(str(tmp_path / "mine.json"))
    (tmp_path / "a.txt").write_text("w69999 w1")
    status, _, _ = prepare(
        *("--input", tmp_path / "a.txt", "--output", tmp_path / "out"),
        *("--tokenizer", tmp_path / "mine.json"),
    )
    manifest = Manifest.load(tmp_path / "out")
    assert (status, manifest.dtype, manifest.vocab_size) == (0, "uint32", 70002)
    assert TokenReader(manifest).read(0, 3).tolist() == [69999, 1, 70001]


def test_patterns_choose_the_files(tmp_path, corpus, prepare, decoded):
    arguments = ["--input", corpus, "--tokenizer", "bytes", "--output"]
    prepare(*arguments, tmp_path / "a", "--include", "*.py", "--exclude", "deep")
    assert len(decoded(tmp_path / "a")) == 10
    prepare(*arguments, tmp_path / "b", "--include", "code/deep/*", "--include", "*.md")
    assert len(decoded(tmp_path / "b")) == 21


def test_files_of_one_name_and_files_named_twice(tmp_path, prepare, decoded):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"text of {name}")
    status, _, _ = prepare(
        *("--input", tmp_path / "x", tmp_path / "y", tmp_path / "x" / "a.txt"),
        *("--output", tmp_path / "out", "--tokenizer", "bytes"),
    )
    assert status == 0
    assert sorted(decoded(tmp_path / "out")) == ["text of x", "text of y"]


def test_text_field_and_byte_order_mark(tmp_path, prepare, decoded):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"body": "one"}\r\n{"body": "two"}'
    )
    status, _, _ = prepare(
        *("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out"),
        *("--tokenizer", "bytes", "--text_field", "body"),
    )
    assert status == 0
    assert decoded(tmp_path / "out") == ["one", "two"]


def test_a_very_long_document_is_encoded_without_loss(
    tmp_path, prepare, decoded, sentence
):
    text = sentence(1, 500000) + "x" * 1500000
    assert len(text) > 3 << 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepare(
        *("--input", tmp_path / "a.txt", "--output", tmp_path / "out"),
        *("--vocab_size", 300, "--tokenizer_sample_megabytes", 0.1),
    )
    assert decoded(tmp_path / "out") == [text]


def test_python_stdlib(tmp_path, prepare, decoded, monkeypatch):
    """Of a stand-in library: sources only, and none of what is installed into it."""
    library = tmp_path / "lib"
    for folder in ("json", "site-packages/torch", "dist-packages", "__pycache__"):
        (library / folder).mkdir(parents=True)
        (library / folder / "a.py").write_text(f"in {folder}")
    (library / "LICENSE.txt").write_text("license")
    monkeypatch.setattr("sysconfig.get_path", {"stdlib": str(library)}.get)
    status, _, _ = prepare(
        *("--corpus", "python-stdlib", "--output", tmp_path / "out"),
        *("--tokenizer", "bytes"),
    )
    assert status == 0
    assert decoded(tmp_path / "out") == ["in json"]


def test_work_is_shared_evenly():
    shares = assign_units([5, 90, 40, 50, 30], 3)
    assert shares == [[1], [3, 0], [2, 4]]
    assert assign_units([1], 3) == [[0], [], []]
