"""`ten-dist generate`: files of prompts, samples, stop strings, and text as it comes."""

import io
import json
import re
import sys

import pytest

from ten_dist.cli import main
from tests.tools.pseudo_terminal import PseudoTerminal

PROMPTS = ["the state", "", "a wave decays and is read again by every later token", "ä"]
LENGTH = ["--max_new_tokens", "12"]


@pytest.fixture
def generate(capsys, short_run):
    """Run the command; returns what it printed."""

    def run(*arguments, status=0):
        capsys.readouterr()
        assert main(["generate", str(short_run), *map(str, arguments)]) == status
        printed = capsys.readouterr()
        if not status:
            return printed.out
        (line,) = printed.err.splitlines()
        return line

    return run


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_prompts_of_a_file_are_continued_as_each_alone(generate, tmp_path):
    prompts = [{"prompt": text, "id": n} for n, text in enumerate(PROMPTS * 2)]
    place = write_lines(tmp_path / "prompts.jsonl", prompts)
    output = tmp_path / "output.jsonl"
    options = [*LENGTH, "--batch_size", 3, "--samples", 2, "--seed", 5]
    assert generate("--prompts", place, "--output", output, *options) == ""
    lines = read_lines(output.read_text())
    assert [line["id"] for line in lines] == [n for n in range(8) for _ in range(2)]
    alone = {}
    for number, line in enumerate(lines):
        prompt, sample = PROMPTS[line["id"] % 4], number % 2
        assert (line["prompt"], line["sample"]) == (prompt, sample)
        assert (line["tokens"], line["finish_reason"]) == (12, "length")
        if (prompt, sample) not in alone:
            alone[prompt, sample] = generate(
                "--prompt", prompt, *LENGTH, "--seed", 5 + sample
            )
        assert alone[prompt, sample] == f"{prompt}{line['text']}\n"


def test_prompts_come_from_the_standard_input(generate, monkeypatch):
    lines = (
        b'\xef\xbb\xbf{"prompt": "the"}\n\n{"prompt": "of", "kind": [1, "\\ud800"]}\n'
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    printed = read_lines(generate("--prompts", "-", *LENGTH))
    assert [line["prompt"] for line in printed] == ["the", "of"]
    assert printed[1]["kind"] == [1, "\ud800"]
    assert generate("--prompt", "of", *LENGTH) == f"of{printed[1]['text']}\n"


def test_log_probabilities_of_every_token(generate):
    options = ["--prompt", "the", "--output", "-", *LENGTH, "--logprobs", 3]
    (line,) = read_lines(generate(*options, "--top_k", 3))
    assert len(line["logprobs"]) == line["tokens"] == 12
    for token in line["logprobs"]:
        likeliest = [(other["id"], other["logprob"]) for other in token["likeliest"]]
        assert likeliest == sorted(likeliest, key=lambda pair: -pair[1])
        assert (token["id"], token["logprob"]) in likeliest
    (line,) = read_lines(generate(*options[:-1], 0))
    assert all(token["likeliest"] == [] for token in line["logprobs"])


def test_stop_strings_end_a_continuation(generate):
    whole = generate("--prompt", "the", "--max_new_tokens", 40)[3:-1]
    stop = whole[9:11]
    at = whole.index(stop)
    options = ["--prompt", "the", "--stop", "never", "--stop", stop]
    assert generate(*options, "--max_new_tokens", 40) == f"the{whole[:at]}\n"
    (line,) = read_lines(generate(*options, "--output", "-"))
    assert (line["text"], line["finish_reason"]) == (whole[:at], "stop")


def test_samples_are_those_of_the_seeds_that_follow(generate):
    options = ["--prompt", "the", *LENGTH]
    alone = [generate(*options, "--seed", seed) for seed in (3, 4, 5)]
    together = generate(*options, "--seed", 3, "--samples", 3, "--batch_size", 2)
    headings = [f"== {n} of 3, seed {2 + n}\n" for n in (1, 2, 3)]
    pairs = zip(headings, alone, strict=True)
    assert together == "".join(heading + text for heading, text in pairs)


BAD_LINES = {
    "not json": (b'{"prompt": "a",}', "is not JSON in UTF-8"),
    "not utf-8": (b'{"prompt": "\xff"}', "is not JSON in UTF-8"),
    "a number": (b"3", 'is no object with a text as its "prompt"'),
    "no prompt": (b'{"promt": "a"}', 'is no object with a text as its "prompt"'),
    "no text": (b'{"prompt": 3}', 'is no object with a text as its "prompt"'),
    "half": (b'{"prompt": "\\ud800"}', "has half of a character"),
    "taken name": (b'{"prompt": "a", "text": "b"}', 'has a field "text"'),
    "deep": (b"[" * 100_000, "is not JSON in UTF-8"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_done(generate, tmp_path, name):
    line, message = BAD_LINES[name]
    place, output = tmp_path / "prompts.jsonl", tmp_path / "output.jsonl"
    place.write_bytes(b'{"prompt": "good"}\n\n' + line + b"\n")
    error = generate("--prompts", place, "--output", output, status=2)
    assert error.startswith(f"ten-dist: {place}, line 3 {message}")
    assert not output.exists()


def test_places_that_cannot_be_used_are_refused(generate, tmp_path):
    empty = write_lines(tmp_path / "empty.jsonl", [])
    missing = tmp_path / "missing"
    for options, message in [
        (("--prompts", missing), "No such file or directory"),
        (("--prompts", tmp_path), "Is a directory"),
        (("--prompts", empty), "has no prompts"),
        (("--output", tmp_path), "is a folder"),
        (("--output", missing / "file"), "its folder is not there"),
        (("--prompts", empty, "--prompt", "a"), "cannot both be given"),
        (("--logprobs", 3), "--logprobs are written in JSON"),
        (("--stream", "--output", "-"), "--stream shows plain text"),
        (("--samples", 2, "--seed", 2**63 - 1), "--seed must be"),
    ]:
        assert message in generate(*options, status=2)
    assert "/dev/full" in generate("--output", "/dev/full", status=1)


def test_text_on_a_terminal_is_of_whole_and_harmless_characters(generate, short_run):
    # So hot that any byte comes: of control characters and of characters half.
    options = ["--prompt", "the", "--temperature", 5, "--max_new_tokens", 100]
    lines = read_lines(generate(*options, "--samples", 9, "--output", "-"))
    is_control = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
    sample = next(line for line in lines if is_control.search(line["text"]))
    harmless = is_control.sub(lambda found: repr(found[0])[1:-1], sample["text"])
    options += ["--seed", sample["sample"]]
    assert generate(*options) == f"the{sample['text']}\n"
    command = [sys.executable, "-m", "ten_dist", "generate", short_run, *options]
    with PseudoTerminal(command) as terminal:
        assert terminal.read_to_end() == 0
    assert terminal.text == f"the{harmless}\n"


def test_text_appears_on_a_terminal_as_it_comes(short_run):
    options = ["--prompt", "the", "--temperature", 0, "--max_new_tokens", 10**6]
    command = [sys.executable, "-m", "ten_dist", "generate", short_run, *options]
    with PseudoTerminal(command) as terminal:
        terminal.read_until("the.{20}")
        terminal.type("\x03")
        assert terminal.read_to_end() == 130
    assert terminal.text.endswith("\nten-dist: interrupted\n")
