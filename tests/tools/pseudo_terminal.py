"""A command in a terminal of its own, as a person has it."""

import os
import pty
import re
import select
import subprocess
import time

from tests.tools.launching import ROOT, launch_environment


class PseudoTerminal:
    """A process whose standard streams are a terminal.

    Attributes:
        text: what it has shown so far, in UTF-8.
    """

    def __init__(self, command, timeout=60):
        self._deadline = time.monotonic() + timeout
        self._terminal, other = pty.openpty()
        self.text = ""
        self._process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={**launch_environment(), "TERM": "dumb", "LC_ALL": "C.UTF-8"},
            stdin=other,
            stdout=other,
            stderr=other,
            # A session of its own, whose terminal this is: it then sends the signals of keys.
            preexec_fn=lambda: _take_terminal(other),  # noqa: PLW1509
            start_new_session=True,
        )
        os.close(other)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def type(self, keys):
        """Press keys."""
        os.write(self._terminal, keys.encode())

    def read_until(self, pattern):
        """Wait until what is shown beyond what was waited for matches a pattern; returns it."""
        start = getattr(self, "_seen", 0)
        while not (found := re.compile(pattern, re.DOTALL).search(self.text, start)):
            assert self._read(), self.text[-2000:]
        self._seen = found.end()
        return self.text[start : found.end()]

    def read_to_end(self):
        """Everything that it shows until it ends; returns its status."""
        while self._read():
            pass
        return self._process.wait(timeout=30)

    def _read(self):
        """Read one piece; false when the process is gone."""
        left = self._deadline - time.monotonic()
        ready = left > 0 and select.select([self._terminal], [], [], left)[0]
        assert ready, self.text[-2000:]
        try:
            piece = os.read(self._terminal, 1 << 16)
        except OSError:
            return False
        # Pieces are whole characters: half of one would be seen as such by the person.
        self.text += piece.decode().replace("\r\n", "\n")
        return bool(piece)


def _take_terminal(descriptor):
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
