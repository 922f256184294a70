"""Commands on hosts."""

import os
import signal
import threading
import time

import pytest

from launch.hosts import Host
from launch.remote import Remote, SshConfig

HERE = Host("127.0.0.1", 1)


def test_a_command_is_given_up_in_time():
    remote = Remote(SshConfig())
    words = ["sh", "-c", "read word; echo $word >&2; echo begun; sleep 30"]
    outcome = remote.run(HERE, words, timeout=1, stdin=b"why\n")
    assert outcome.status is None and outcome.unreachable
    assert (outcome.output, outcome.complaint()) == ("begun\n", "why")


def test_an_interrupt_waits_for_no_host():
    remote = Remote(SshConfig())
    start = time.monotonic()
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        remote.run_on_all([HERE, HERE], ["sleep", "30"], timeout=60)
    assert time.monotonic() - start < 20
