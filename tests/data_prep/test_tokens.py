"""Tokens of documents: those of the tokenizer, however a document is cut, and no separator."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models

from data_prep.pieces import cut_pieces, cuts_of
from data_prep.tokenizer import train_tokenizer
from ten_dist.cli import main
from ten_dist.data import Manifest, TextTokenizer
from ten_dist.data.shards import read_shard
from ten_dist.data.tokenizer import SEPARATOR, byte_tokenizer
from ten_dist.errors import ConfigurationError, DataError
from tests.tools.families import FAMILIES, random_text
from tests.tools.launching import ROOT, SMALL_MODEL

DOCUMENTS = 200


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(content of tokenizer.json, whether it can be cut) of each family."""
    make, can_be_cut = FAMILIES[request.param]
    return make().to_str(), can_be_cut


def plain(content):
    """The tokenizer itself, with special tokens as text and nothing put around or left out."""
    tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def spelled_out(ids, separator_id, whole):
    """`ids` with other tokens, always the same ones, in the place of each separator."""
    count = ids.count(separator_id)
    if not count:
        return ids
    parts, rest = divmod(len(whole) - len(ids) + count, count)
    assert parts > 0 and rest == 0
    first = ids.index(separator_id)
    found = whole[first : first + parts]
    return [i for one in ids for i in (found if one == separator_id else [one])]


def documents(separator):
    draw = random.Random(0)
    return [random_text(draw, separator) for _ in range(DOCUMENTS)]


def test_tokens_are_those_of_the_whole_document_in_pieces_of_any_size(family):
    content, can_be_cut = family
    tokenizer, library = TextTokenizer(content), plain(content)
    cuts = cuts_of(tokenizer)
    assert (cuts is not None) == can_be_cut
    draw, cut = random.Random(2), 0
    for text in documents(tokenizer.separator):
        expected = library.encode(text, add_special_tokens=False).ids
        whole = tokenizer.encode([text])[0].tolist()
        assert tokenizer.separator_id not in whole
        assert whole == spelled_out(expected, tokenizer.separator_id, whole)
        size = draw.choice([1, 7, 64, 500])
        starts = range(0, len(text), draw.choice([3, 50, 1000]) if text else 1)
        step = starts.step
        pieces = list(cut_pieces((text[at : at + step] for at in starts), cuts, size))
        cut += len(pieces) > 1
        assert sum(map(len, pieces)) <= len(text)
        joined = np.concatenate(tokenizer.encode(pieces)).tolist()
        assert joined == whole, repr(text)
        # Where a text is cut does not depend on how it came.
        assert pieces == list(cut_pieces([text], cuts, size))
    assert cut > DOCUMENTS / 2 or not can_be_cut


def test_a_text_that_spells_the_separator_keeps_it_through_decoding(family):
    content, _ = family
    tokenizer = TextTokenizer(content)
    ids = tokenizer.encode([f"the {tokenizer.separator} of"])[0].tolist()
    assert tokenizer.separator_id not in ids
    # Lossless where the tokenizer is: those of bytes and with byte fallback.
    if tokenizer.decode(tokenizer.encode(["the <🙂 of"])[0].tolist()) == "the <🙂 of":
        assert tokenizer.decode(ids) == f"the {tokenizer.separator} of"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("llama", 3), ("unigram", 2)])
def test_long_documents_are_the_same_on_any_number_of_ranks(name, ranks, tmp_path):
    content = FAMILIES[name][0]().to_str()
    library = TextTokenizer(content)
    (tmp_path / "tokenizer.json").write_text(content)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    draw = random.Random(3)
    for number in range(3):
        # Longer than a piece, and the last one than what is held in memory as a whole.
        text = "".join(
            random_text(draw, "</s>") for _ in range(450 if number < 2 else 6500)
        )
        (corpus / f"{number}.txt").write_bytes(text.encode())
    command = [sys.executable, "-m", "mpi4py", "-m", "data_prep.shard"]
    command += ["--input", corpus, "--output", tmp_path / "data"]
    command += ["--tokenizer", tmp_path / "tokenizer.json"]
    command += ["--shard_megabytes", "0.1"]
    launcher = ["mpiexec", "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    launcher += ["--allow-run-as-root"]
    subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, check=True, capture_output=True
    )
    manifest = Manifest.load(tmp_path / "data")
    found = [
        read_shard(manifest, index).tolist() for index in range(len(manifest.shards))
    ]
    texts = [path.read_bytes().decode() for path in sorted(corpus.iterdir())]
    texts = [text.removeprefix("\ufeff") for text in texts]
    expected = [[*ids.tolist(), library.separator_id] for ids in library.encode(texts)]
    assert sorted(found) == sorted(expected)


def spec_with(added, base=None):
    spec = json.loads((base or byte_tokenizer()).to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [
        {"id": 256 + at, "content": token, "special": special, **flags}
        for at, (token, special) in enumerate(added)
    ]
    return json.dumps(spec)


@pytest.mark.parametrize(
    ("added", "wanted", "separator"),
    [
        # A tag of HTML, as in a vocabulary that has tags of its own.
        ([("<eos>", True), ("</s>", False)], None, "<eos>"),
        ([("<eos>", True), ("</s>", False)], "</s>", "</s>"),
        ([("<|endoftext|>", True), ("<|im_end|>", True)], None, "<|endoftext|>"),
        ([("<end>", True)], "<end>", "<end>"),
        # Not special, but what else could it mean.
        ([("<|endoftext|>", False), ("</s>", False)], None, "<|endoftext|>"),
    ],
)
def test_the_separator_is_special_or_named(added, wanted, separator):
    tokenizer = TextTokenizer(spec_with(added), wanted)
    assert tokenizer.separator == separator
    ids = tokenizer.encode([f"1 {separator} 2"])[0].tolist()
    assert tokenizer.separator_id not in ids
    assert tokenizer.decode(ids) == f"1 {separator} 2"


@pytest.mark.parametrize(
    ("added", "wanted", "reason"),
    [
        ([("<eos>", True), ("</s>", True)], None, "more than one token"),
        ([("</s>", False)], None, "none of .* as a special token"),
        ([("<end>", True)], None, r"it has <end>.*--separator"),
        ([("<eos>", True)], "a", "none of the tokenizer's added tokens"),
        ([("<eos>", True)], "<none>", "none of the tokenizer's added tokens"),
    ],
)
def test_a_separator_in_doubt_has_to_be_named(added, wanted, reason):
    with pytest.raises(ConfigurationError, match=reason) as caught:
        TextTokenizer(spec_with(added), wanted)
    assert "\n" not in str(caught.value) and "--separator" in str(caught.value)


def test_two_tokens_of_one_id_are_refused():
    # The library numbers added tokens on from the number of pieces, over a gap.
    pieces = {piece: at for at, piece in enumerate("ab</s>")} | {"d": 7}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(ConfigurationError, match="'</s>' and 'd' one id, 7"):
        TextTokenizer(tokenizer.to_str())


def test_a_vocabulary_of_nothing_is_refused():
    with pytest.raises(DataError, match="it has no tokens"):
        TextTokenizer(Tokenizer(models.BPE()).to_str())


@pytest.mark.parametrize("form", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_a_text_that_is_one_word_with_forms_of_its_ends_is_encoded_whole(form):
    spec = json.loads(FAMILIES["llama"][0]().to_str())
    spec["model"] |= {form: "##", "merges": []}
    assert cuts_of(TextTokenizer(json.dumps(spec))) is None


def test_a_special_token_that_hides_another_keeps_a_text_whole():
    tokenizer = FAMILIES["gpt2"][0]()
    tokenizer.add_special_tokens(["ab cd"])
    assert cuts_of(TextTokenizer(tokenizer.to_str())) is not None
    tokenizer.add_tokens([AddedToken("cd", normalized=False)])
    assert cuts_of(TextTokenizer(tokenizer.to_str())) is None


def test_a_panic_of_the_library_is_named_in_one_line():
    tokenizer = FAMILIES["bert"][0]()
    tokenizer.add_tokens([AddedToken("\u0301", normalized=True)])
    with pytest.raises(DataError, match="cannot encode a document") as caught:
        TextTokenizer(tokenizer.to_str()).encode(["中", "ß a"])
    assert "\n" not in str(caught.value)


def test_the_unknown_token_separates_nothing():
    content = FAMILIES["unigram"][0]().to_str()
    with pytest.raises(ConfigurationError, match="stands for what"):
        TextTokenizer(content, "<unk>")


def test_a_text_that_cannot_be_encoded_is_named_in_one_line():
    spec = json.loads(FAMILIES["unigram"][0]().to_str())
    spec["model"]["unk_id"] = None
    with pytest.raises(DataError, match="cannot encode a document") as caught:
        TextTokenizer(json.dumps(spec)).encode(["\u1234"])
    assert "\n" not in str(caught.value)


def test_encodings_do_not_change_from_one_time_to_the_next():
    spec = json.loads(train_tokenizer([["the river of the stone " * 50]], 300).to_str())
    spec["model"]["dropout"] = 0.5
    tokenizer = TextTokenizer(json.dumps(spec))
    first = tokenizer.encode(["the river of the stone"] * 20)
    assert all((ids == first[0]).all() for ids in first)


def test_characters_that_are_left_out_are_announced():
    tokenizer = TextTokenizer(byte_tokenizer().to_str())
    assert not tokenizer.drops_unknown_characters()
    spec = json.loads(byte_tokenizer().to_str())
    spec["model"]["vocab"]["aaa"] = spec["model"]["vocab"].pop("a")
    assert TextTokenizer(json.dumps(spec), SEPARATOR).drops_unknown_characters()


def prepared_before(folder, **source):
    """Rewrite the manifest of a set as an earlier version would have written it."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["source"] = {**content["source"], **source}
    path.write_text(json.dumps(content))


def verified(folder, capsys):
    status = main(["data", "verify", str(folder)])
    return status, capsys.readouterr().err


def test_long_documents_that_were_cut_wrongly_are_recognised_and_the_cure_works(
    tmp_path, prepare, capsys
):
    (tmp_path / "a.txt").write_text("the river stone.\n" * 9000)
    content = FAMILIES["unigram"][0]().to_str()
    (tmp_path / "tokenizer.json").write_text(content)
    options = ["--input", tmp_path / "a.txt"]
    options += ["--tokenizer", tmp_path / "tokenizer.json", "--output"]
    assert prepare(*options, tmp_path / "before")[0] == 0
    prepared_before(tmp_path / "before", layout=2)
    status, errors = verified(tmp_path / "before", capsys)
    assert status == 2 and "encoded in pieces" in errors
    assert "into another folder" in errors
    assert prepare(*options, tmp_path / "again")[0] == 0
    assert verified(tmp_path / "again", capsys) == (0, "")


def test_a_separator_in_doubt_is_recognised_and_the_cure_works(
    tmp_path, prepare, capsys
):
    content = spec_with([("<eos>", True), ("</s>", False)])
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "a.txt").write_text("price <s>10</s> 8 coins")
    options = ["--input", tmp_path / "a.txt", "--output", tmp_path / "before"]
    options += ["--tokenizer", tmp_path / "tokenizer.json", "--separator", "</s>"]
    assert prepare(*options)[0] == 0
    assert verified(tmp_path / "before", capsys) == (0, "")
    prepared_before(tmp_path / "before", separator=None)
    status, errors = verified(tmp_path / "before", capsys)
    assert status == 2 and "name the token that ends documents with --sep" in errors
    options[3] = tmp_path / "again"
    assert prepare(*options[:-1], "<eos>")[0] == 0
    assert verified(tmp_path / "again", capsys) == (0, "")


def test_more_separators_than_documents_are_not_trained_on(tmp_path, prepare, capsys):
    (tmp_path / "a.txt").write_text("the river stone.\n" * 100)
    options = ["--input", tmp_path / "a.txt", "--tokenizer", "bytes"]
    assert prepare(*options, "--output", tmp_path / "data")[0] == 0
    path = tmp_path / "data" / "manifest.json"
    content = json.loads(path.read_text())
    content["documents"] += 1
    path.write_text(json.dumps(content))
    status, errors = verified(tmp_path / "data", capsys)
    assert status == 2 and "1 separators, its manifest says 2 documents" in errors
    train = [*SMALL_MODEL, "--data", tmp_path / "data", "--steps", 1]
    train += ["--output_dir", tmp_path / "run", "--seq_len", 32]
    assert main(["train", *map(str, train)]) == 2
    assert "1 separators, its manifest says 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
