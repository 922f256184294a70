"""`--chat`: conversations become shards whose blocks say which tokens count."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ten_dist.data import Manifest, TokenReader, verify_shards
from ten_dist.data.shards import COUNTED
from ten_dist.data.tokenizer import set_tokenizer
from ten_dist.errors import DataError
from tests.conftest import contents

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% endfor %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_lines(path, *records):
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path, sentence):
    """A folder of conversations of several units, and what is none among them."""
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "notes.txt").write_text("no conversation")
    for number in range(4):
        records = [
            {
                "messages": [
                    user(f"{number} {index}: {sentence(index, 40)}"),
                    assistant(sentence(index + 1, 60)),
                    user("and <|endoftext|> then?"),
                    assistant("n"),
                ]
            }
            for index in range(30)
        ]
        write_lines(folder / f"{number}.jsonl", *records, {"messages": []})
    return folder


def counted_texts(folder):
    """What the mask counts of each document of a set, decoded."""
    manifest = Manifest.load(folder)
    tokenizer = set_tokenizer(manifest)
    stored = TokenReader(manifest).read_stored(0, manifest.tokens)
    ids, counted = stored & ~COUNTED, (stored & COUNTED) != 0
    assert counted.sum() == manifest.counted_tokens
    np.testing.assert_array_equal(ids, TokenReader(manifest).read(0, manifest.tokens))
    ends = np.flatnonzero(ids == manifest.separator_id) + 1
    assert ends[-1] == manifest.tokens and ends.size == manifest.documents
    return [
        tokenizer.decode(part[mask].tolist())
        for part, mask in zip(np.split(ids, ends[:-1]), np.split(counted, ends[:-1]))
    ]


def test_what_the_assistant_says_counts(tmp_path, prepare):
    lines = write_lines(
        tmp_path / "chat.jsonl",
        {
            "messages": [
                user("hi"),
                assistant("hello"),
                user("bye"),
                assistant("so long"),
            ]
        },
        {"prompt": "what?", "completion": "nothing"},
        {
            "prompt": [user("a"), assistant("not learned"), user("c")],
            "completion": [assistant("learned")],
        },
    )
    arguments = ("--input", lines, "--tokenizer", "bytes", "--chat")
    status, output, _ = prepare(*arguments, "--output", tmp_path / "out")
    assert status == 0 and "30 tokens counted" in output
    assert counted_texts(tmp_path / "out") == [
        "hello\x03so long\x03",
        "nothing\x03",
        "learned\x03",
    ]
    verify_shards(Manifest.load(tmp_path / "out"))


def test_a_template_is_given_or_lies_beside_the_tokenizer(tmp_path, prepare):
    lines = write_lines(tmp_path / "a.jsonl", {"messages": [user("a"), assistant("b")]})
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    given = ("--input", lines, "--chat", "--tokenizer")
    first, second = tmp_path / "first", tmp_path / "second"
    status, output, _ = prepare(
        *given, "bytes", "--output", first, "--chat_template", tmp_path / "t.jinja"
    )
    assert status == 0
    # It writes the separator behind every turn: documents are what stands between.
    assert counted_texts(first) == ["a<|endoftext|>", "b<|endoftext|>"]
    assert "note: 1 conversations in which the template writes the separator" in output
    assert prepare(*given, first / "tokenizer.json", "--output", second)[0] == 0
    assert Manifest.load(second).fingerprint == Manifest.load(first).fingerprint
    assert (second / "chat_template.jinja").read_text() == TEMPLATE


def test_the_result_does_not_depend_on_ranks(tmp_path, chats, mpiexec):
    outputs = []
    for ranks in (1, 2):
        output = tmp_path / f"out{ranks}"
        done = mpiexec(
            *(ranks, "-m", "mpi4py", "-m", "data_prep.shard", "--input", chats),
            *("--output", output, "--chat", "--vocab_size", 300, "--val_fraction", 0.2),
            *("--shard_megabytes", 0.02, "--deduplicate"),
        )
        assert done.returncode == 0, done.stderr
        outputs.append(contents(output))
    assert outputs[0] == outputs[1]
    manifest = Manifest.load(output)
    assert len(manifest.shards) > 1
    assert len(counted_texts(output)) + len(counted_texts(output / "val")) == 120
    left_out = manifest.source["left_out"]
    assert left_out["no_conversation"]["count"] == 4
    assert left_out["not_lines"]["first"] == ["notes.txt"]


NESTED = functools.reduce(lambda inner, _: [inner], range(100), "a")
KILLED_AT = """
import os, signal, sys
from data_prep.ranks import Ranks
from data_prep.shard import main
calls, replace = 0, os.replace
def counted(*names):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = counted
sys.exit(main(sys.argv[2:], Ranks()))
"""


def test_a_preparation_that_was_cut_off_continues(tmp_path, chats, prepare):
    options = [
        "--input",
        chats,
        "--chat",
        "--tokenizer",
        "bytes",
        "--val_fraction",
        0.2,
    ]
    options += ["--shard_megabytes", 0.02, "--output"]
    assert prepare(*options, tmp_path / "whole")[0] == 0
    arguments = [*map(str, options), str(tmp_path / "cut")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT, "12", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    status, output, _ = prepare(*options, tmp_path / "cut")
    assert status == 0 and "continuing: " in output and "continuing: 0" not in output
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": "no messages"}, "neither messages nor prompt and completion"),
        ({"messages": "hello"}, "the messages are not a list"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "not judge"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has no content"),
        ({"messages": [user("a")]}, "the assistant says nothing in it"),
        ({"messages": [user("\ufdd0"), assistant("a")]}, "U+FDD0"),
        ({"prompt": 3, "completion": "a"}, "neither text nor messages"),
        ({"messages": [{**user("a"), "x": NESTED}]}, "more than 50 deep"),
        ([1, 2], "neither messages nor prompt and completion"),
    ],
)
def test_what_is_no_conversation_is_left_out_and_said(tmp_path, prepare, line, reason):
    good = {"messages": [user("a"), assistant("b")]}
    lines = write_lines(tmp_path / "chat.jsonl", good, line)
    given = ("--tokenizer", "bytes", "--chat", "--output", tmp_path / "out", "--input")
    status, output, _ = prepare(*given, lines)
    (said,) = [text for text in output.splitlines() if "left out" in text]
    assert status == 0 and "1 lines that are no conversation" in said
    assert f"chat.jsonl:2 ({reason}" in said or reason in said
    alone = write_lines(tmp_path / "alone.jsonl", line)
    status, _, errors = prepare(*given[:-2], tmp_path / "none", "--input", alone)
    (error,) = [text for text in errors.splitlines() if "error" in text]
    assert status == 2 and reason in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--chat_template", "nothing.jinja", "--chat"],
            "nothing.jinja cannot be read",
        ),
        (["--chat_template", "bad.jinja", "--chat"], "does not parse: line 1"),
        (["--chat_template", "endless.jinja", "--chat"], "nothing ends a turn"),
        (["--chat_template", "bad.jinja"], "has an effect only with --chat"),
    ],
)
def test_a_wrong_template_is_one_line(tmp_path, prepare, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    lines = write_lines(tmp_path / "a.jsonl", {"messages": [user("a"), assistant("b")]})
    Path("bad.jinja").write_text("{% for %}")
    Path("endless.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    arguments = ("--input", lines, "--tokenizer", "bytes", "--output", "out", *options)
    status, _, errors = prepare(*arguments)
    assert status == 2 and reason in errors and errors.count("\n") == 1
    assert not Path("out").exists()


def test_a_damaged_mask_is_found(tmp_path, prepare, capsys):
    from ten_dist.cli import main as ten_dist

    lines = write_lines(
        tmp_path / "a.jsonl", {"messages": [user("a"), assistant("bc")]}
    )
    output = tmp_path / "out"
    given = ("--input", lines, "--tokenizer", "bytes", "--chat", "--output", output)
    assert prepare(*given)[0] == 0
    assert ten_dist(["data", "verify", str(output)]) == 0
    assert "3 tokens counted" in capsys.readouterr().out
    assert ten_dist(["data", "sample", str(output), "--count", "1"]) == 0
    assert "«bc\x03»" in capsys.readouterr().out
    (output / "chat_template.jinja").write_text("{{ other }}")
    path = output / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "loss_mask": {"counted_tokens": 4}}))
    assert ten_dist(["data", "verify", str(output)]) == 2
    errors = capsys.readouterr().err
    assert "is not the chat template" in errors and "counts 3 tokens" in errors
    del content["loss_mask"]
    path.write_text(json.dumps(content))
    manifest = Manifest.load(output)
    with pytest.raises(DataError, match=r"has 00000000.mask.npy in the place"):
        TokenReader(manifest).read(0, manifest.tokens)
