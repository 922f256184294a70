"""`ten-dist chat`, from a pipe and at a terminal."""

import io
import re
import shutil
import sys
import time

import pytest

from ten_dist.cli import main
from tests.tools.pseudo_terminal import PseudoTerminal

GREEDY = ["--temperature", "0", "--max_new_tokens", "8"]


@pytest.fixture
def chat(capsys, monkeypatch, short_run):
    """Talk from a pipe; returns the answers, or where it fails the error."""

    def talk(*lines, run=short_run, options=GREEDY, status=0):
        said = b"".join(
            (line if isinstance(line, bytes) else line.encode()) + b"\n"
            for line in lines
        )
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said)))
        capsys.readouterr()
        assert main(["chat", str(run), *options]) == status
        printed = capsys.readouterr()
        if status:
            return printed.err.splitlines()[-1]
        return printed.out

    return talk


def test_each_line_is_answered_and_what_was_said_is_remembered(chat):
    once = chat("hello")
    assert len(once) > 1
    both = chat("hello", "", "hello")
    assert both.startswith(once) and both != once * 2
    assert chat("hello", "/reset", "hello") == once * 2
    assert chat("hello", "/quit", "hello") == once
    assert chat("hello", options=[*GREEDY, "--system", "be kind"]) != once
    assert chat("//reset") != chat("/reset")
    assert "/save FILE" in chat("/help")


def test_a_conversation_goes_on_from_its_file(chat, tmp_path):
    place = tmp_path / "with space"
    options = ["--max_new_tokens", "20", "--seed", "4"]
    whole = chat("hello", f"/save {place}", "and then?", "now?", options=options)
    first = chat("hello", options=options)
    rest = chat(f"/load {place}", "and then?", "now?", options=options)
    assert whole == first + rest


def test_what_cannot_be_done_ends_a_pipe(chat, short_run, tmp_path):
    place = tmp_path / "saved"
    chat("hello", f"/save {place}")
    other = tmp_path / "run"
    shutil.copytree(short_run, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}")
    assert "chat_template.jinja does not parse" in chat(run=other, status=2)
    endless = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (other / "chat_template.jinja").write_text(endless)
    assert "nobody could tell where an answer ends" in chat(run=other, status=2)
    content = place.read_bytes()
    place.write_bytes(content[:-1] + b"\xff")
    for line, message in [
        (f"/load {place}", f"{place} is damaged"),
        (f"/load {short_run}", f"{short_run} cannot be read: Is a directory"),
        (f"hello\n/save {tmp_path}/no/file", "no/file cannot be written: No such file"),
        (f"/save {place}", "nothing has been said"),
        ("/save", "/save needs the name of a file"),
        ("/sing", "no command /sing: see /help"),
        (b"\xff", "standard input, line 1 is not UTF-8"),
        ("\ufdd0", "holds a character from U+FDD0"),
    ]:
        assert message in chat(line, "hello", status=2)
    assert place.read_bytes() == content[:-1] + b"\xff"


def test_a_conversation_at_a_terminal(short_run, tmp_path):
    place = tmp_path / "saved"
    options = ["--temperature", "0", "--max_new_tokens", "1000000"]
    command = [sys.executable, "-m", "ten_dist", "chat", short_run, *options]
    with PseudoTerminal(command) as terminal:
        terminal.read_until("> ")
        # The last character is taken back before the line is sent.
        terminal.type("hellx\x7fo\n")
        terminal.read_until(r"o\n.{20}")
        terminal.type("\x03")
        terminal.read_until("\n> ")
        terminal.type(f"/save {place}\n")
        terminal.read_until(r"saved [\d,]+ tokens as [\d,]+ bytes in .*> ")
        terminal.type("/sing\n")
        terminal.read_until("no command /sing.*> ")
        terminal.type("/load nothing\n")
        terminal.read_until("nothing cannot be read.*> ")
        # Who sees what they type is in the line, where an interrupt gives it up.
        terminal.type("abandoned")
        terminal.read_until("abandoned")
        # Python looks for a signal when readline waits for the next key, which it does a
        # moment after it has shown this one.
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.read_until("Ctrl-D or /quit ends.*> ")
        terminal.type("\x04")
        assert terminal.read_to_end() == 0
    assert place.exists() and "Traceback" not in terminal.text
    assert not re.search(r"[\x00-\x06\x0e-\x1a]", terminal.text)
