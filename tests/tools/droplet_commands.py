"""`ten-dist droplets` as tests run it, against a server that behaves as the API does."""

import json
import os
import signal

import pytest

from ten_dist.cli import main
from tests.tools.digitalocean import TOKEN, DigitalOcean


def interrupt():
    """A fault: Ctrl-C while the command waits for its answer."""
    os.kill(os.getpid(), signal.SIGINT)


class Commands:
    """Runs `ten-dist droplets` in this process against a server.

    Attributes:
        api: the server.
        output: all that was printed.
    """

    QUICK = ("--retry_wait", 0.001)
    POLLS = ("--poll_interval", 0.001)
    UP = (
        *("--size", "gpu-eight", "--region", "tor1", "--image", "gpu-base"),
        *("--ssh_key", "laptop", "--ssh_from", "198.51.100.7,2001:db8::/32"),
        *("--max_hours", 10, "--commit", "abc123"),
        *("--repository", "https://git.example/ten_dist.git"),
        *POLLS,
    )

    def __init__(self, monkeypatch, capsys):
        self.api, self.output = None, ""
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def use(self, api):
        """Turn to a server."""
        self.api = api
        self._monkeypatch.setenv("DIGITALOCEAN_API_URL", api.url)

    def run(self, action, *words):
        """Returns the status."""
        arguments = ["droplets", action, *words, *self.QUICK]
        return main([str(word) for word in arguments])

    def __call__(self, action, *words, status=0):
        """Returns (output, lines of the error output); asserts the status."""
        self.show()
        ended = self.run(action, *words)
        out, err = self.show()
        assert ended == status, (out, err)
        return out, err.splitlines()

    def show(self):
        """What was printed since this was last called."""
        shown = self._capsys.readouterr()
        self.output += shown.out + shown.err
        return shown

    def up(self, run, count, *words, **expected):
        return self("up", "--run", run, "--count", count, *self.UP, *words, **expected)

    def down(self, run, *words, **expected):
        return self("down", "--run", run, *self.POLLS, *words, **expected)

    def reap(self, *words, **expected):
        return self("reap", *self.POLLS, *words, **expected)

    def status(self, *words):
        return json.loads(self("status", "--json", *words)[0])

    def refusal(self, action, *words):
        """The one line of a command that is refused, and asserts that nothing changed."""
        changes = len(self.api.changes())
        _, errors = self(action, *words, status=2)
        assert len(errors) == 1, errors
        assert len(self.api.changes()) == changes
        return errors[0]


@pytest.fixture
def droplets(monkeypatch, capsys):
    """Commands against a server; at the end, that none of them has shown the token."""
    monkeypatch.delenv("DIGITALOCEAN_ACCESS_TOKEN", raising=False)
    monkeypatch.setenv("DIGITALOCEAN_TOKEN", TOKEN)
    commands = Commands(monkeypatch, capsys)
    with DigitalOcean() as api:
        commands.use(api)
        yield commands
    commands.show()
    assert TOKEN not in commands.output
