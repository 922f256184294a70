"""`ten-dist launch` across real hosts: ssh, by hand; hosts and links that fail."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.tools.launching import (
    ROOT,
    SMALL_MODEL,
    launch_environment,
    read_ledger,
    read_metrics,
)

BATCH = 12
OPTIONS = [
    *SMALL_MODEL,
    *("--use_hten", "--hten_scales", "1,2", "--deepspeed_config", "zero3"),
    *("--precision", "fp32", "--global_batch_size", BATCH, "--seq_len", 32),
    *("--checkpoint_interval", 4, "--num_workers", 0, "--eval_rows", 16, "--ledger"),
]


class Launch:
    """A `ten-dist launch` that runs on a host of a fleet."""

    def __init__(self, fleet, host, options, train):
        command = [sys.executable, "-m", "ten_dist.cli", "launch"]
        command += ["--ssh_config", fleet.ssh_config, "--connect_timeout", 3]
        command += ["--backoff", 1, "--no_preflight", *options, "--", *OPTIONS, *train]
        self._output = (fleet.folder / f"launch_{time.monotonic_ns()}.log").open("w+b")
        self.process = subprocess.Popen(
            host.login(command),
            cwd=ROOT,
            env=launch_environment(),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def send(self, number):
        (inner,) = psutil.Process(self.process.pid).children()
        inner.send_signal(number)

    def output(self):
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def wait_for(self, condition, timeout=150):
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.output()[-6000:]
            assert time.monotonic() < deadline, self.output()[-6000:]
            time.sleep(0.1)

    def end(self, expect=0, timeout=150):
        """Wait for the end; returns what was printed."""
        try:
            status = self.process.wait(timeout)
        finally:
            self.process.kill()
        assert status == expect, self.output()[-6000:]
        return self.output()


def events(folder, name):
    lines = (folder / "supervisor.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == name]


def steps_done(folder):
    return max((m["step"] for m in read_metrics(folder)), default=0)


def assert_every_row_was_used_once(folder, steps):
    ledger = read_ledger(folder)
    assert sorted(ledger) == list(range(1, steps + 1))
    rows = [row for ranks in ledger.values() for used in ranks.values() for row in used]
    assert len(rows) == len(set(rows)) == steps * BATCH
    return ledger


def assert_only_sshd_is_left(fleet, dead=()):
    for host in fleet.hosts:
        names = {psutil.Process(pid).name() for pid in host.pids()}
        # Of a host that was killed, not even that.
        assert names == (set() if host in dead else {"unshare", "sshd"}), host.name


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_by_hand(fleet_of, token_data, tmp_path):
    fleet, folder = fleet_of(2), tmp_path / "run"
    train = ["--data", token_data, "--output_dir", folder, "--steps", 30]
    hostfile = ["--hostfile", fleet.hostfile()]
    launch = Launch(fleet, fleet.hosts[0], hostfile, train)
    launch.wait_for(lambda: steps_done(folder) >= 3)
    launch.send(signal.SIGTERM)
    output = launch.end(expect=3)
    assert "SIGTERM: passed on to the job" in output
    assert "the same command continues from step_" in output
    # Rank 0 speaks at the terminal, every rank in its log.
    assert "starting from initial weights" in output
    logs = folder / "logs" / "start_001"
    assert "starting from initial weights" in (logs / "rank0000.log").read_text()
    assert (logs / "rank0001.log").is_file()
    assert_only_sshd_is_left(fleet)
    stopped_at = steps_done(folder)
    assert stopped_at < 30

    both = [
        Launch(fleet, host, [*hostfile, "--no_ssh", "--node_rank", node], train)
        for node, host in enumerate(fleet.hosts)
    ]
    outputs = [one.end() for one in both]
    assert f"{stopped_at:,} steps done" in outputs[0]
    assert (folder / "COMPLETED").is_file()
    assert set(assert_every_row_was_used_once(folder, 30)[30]) == {0, 1}
    assert_only_sshd_is_left(fleet)


@pytest.mark.slow
def test_a_run_goes_on_without_a_host_that_died(fleet_of, token_data, tmp_path):
    fleet, folder = fleet_of(3), tmp_path / "run"
    # The share of two ranks is not a multiple of this one.
    train = ["--data", token_data, "--output_dir", folder, "--micro_batch_size", 4]
    launch = Launch(
        fleet,
        fleet.hosts[0],
        ["--hostfile", fleet.hostfile(), "--host_timeout", 20],
        [*train, "--steps", 24],
    )
    launch.wait_for((folder / "checkpoints" / "step_00000004").exists)
    fleet.hosts[2].kill()
    killed = time.monotonic()
    launch.wait_for(lambda: events(folder, "end"))
    assert time.monotonic() - killed < 60
    output = launch.end()
    assert "host 10.77.0.3 is lost, no word for 20 s" in output
    assert "2 of 3 hosts, 2 ranks: 10.77.0.1, 10.77.0.2" in output
    assert "--micro_batch_size 3 in place of 4, which does not divide" in output
    first, second = events(folder, "end")
    assert (first["completed"], second["completed"]) == (False, True)
    ledger = assert_every_row_was_used_once(folder, 24)
    assert (set(ledger[1]), set(ledger[24])) == ({0, 1, 2}, {0, 1})
    assert_only_sshd_is_left(fleet, dead=[fleet.hosts[2]])


@pytest.mark.slow
def test_a_bad_link_is_ridden_out(fleet_of, token_data, tmp_path):
    fleet, folder = fleet_of(2), tmp_path / "run"
    first, second = fleet.hosts

    def shell(host, *commands):
        for command in commands:
            words = ["sh", "-c", f"PATH=$PATH:/usr/sbin; {command}"]
            done = subprocess.run(
                host.command(words), capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"`{command}` is not possible here: {done.stderr}")
        return done.stdout

    loss = "nft add rule inet faults input numgen random mod 100 '<' 3 counter drop"
    shell(
        second,
        "nft add table inet faults",
        "nft add chain inet faults input '{ type filter hook input priority 0; }'",
        "tc qdisc add dev eth0 root tbf rate 20mbit burst 32kbit latency 400ms",
        loss,
    )
    train = ["--data", token_data, "--output_dir", folder, "--steps", 40]
    launch = Launch(fleet, first, ["--hostfile", fleet.hostfile()], train)
    launch.wait_for(lambda: steps_done(folder) >= 8)
    dropped = shell(second, "nft list table inet faults")
    limited = shell(second, "tc -s qdisc show dev eth0")
    shell(second, "nft delete table inet faults", "tc qdisc del dev eth0 root")
    assert "counter packets 0 " not in dropped and "counter packets" in dropped
    assert "overlimits 0 " not in limited and "overlimits" in limited
    second.link("down")
    time.sleep(20)
    second.link("up")
    launch.end()
    assert_every_row_was_used_once(folder, 40)
    # How long TCP waits before it tries again decides which.
    reasons = [end["reason"] for end in events(folder, "end")]
    assert reasons[-1] is None
    assert all("10.77.0.2 is lost" in reason for reason in reasons[:-1])
    assert_only_sshd_is_left(fleet)
