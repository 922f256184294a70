"""What `ten-dist launch` refuses, with one line and status 2, before anything is started."""

import subprocess
import sys

import pytest

from ten_dist.cli import main
from tests.tools.launching import ROOT, SMALL_MODEL, launch_environment

TWO_HOSTS = ["--hosts", "192.0.2.1:2,192.0.2.2:2"]


def train_options(folder):
    options = ["--data", folder / "data", "--output_dir", folder / "run"]
    return [*SMALL_MODEL, *map(str, options), "--steps", "4"]


def refusal(capsys, launch, train):
    """The line that refuses a launch."""
    capsys.readouterr()
    assert main(["launch", *map(str, launch), "--", *map(str, train)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ([], "there are no hosts: give --hostfile FILE or --hosts"),
        (["--hostfile", "nowhere"], "--hostfile nowhere cannot be read"),
        (
            ["--hostfile", "f", *TWO_HOSTS],
            "--hostfile and --hosts cannot both be given",
        ),
        (["--hosts", "nowhere.invalid"], "nowhere.invalid does not resolve"),
        ([*TWO_HOSTS, "--launcher", "mpi"], "--launcher must be one of ssh, slurm"),
        ([*TWO_HOSTS, "--min_hosts", 3], "--min_hosts 3 is more than the 2 hosts"),
        ([*TWO_HOSTS, "--host_timeout", 1], "--host_timeout must be from 10"),
        ([*TWO_HOSTS, "--env", "A"], "--env `A` is not NAME=VALUE"),
        ([*TWO_HOSTS, "--no_ssh"], "--no_ssh needs --node_rank N"),
        ([*TWO_HOSTS, "--no_ssh", "--node_rank", 2], "must be from 0 to 1"),
        (["--launcher", "slurm"], "SLURM_JOB_NODELIST is not set"),
    ],
)
def test_wrong_hosts_and_options(capsys, tmp_path, launch, message):
    assert message in refusal(capsys, launch, train_options(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--global_batch_size", 6], "6 does not divide over 4 ranks"),
        (["--micro_batch_size", 3], "not a multiple of --micro_batch_size 3 x 4 ranks"),
        (["--config", "colossal"], "colossal"),
        (["--deepspeed_config", "nowhere.json"], "nowhere.json"),
        (["--dry_run"], "--dry_run writes nothing"),
        (["--seq_len", 0], "--seq_len must be 1 or more"),
    ],
)
def test_wrong_trainings(capsys, tmp_path, change, message):
    train = [*train_options(tmp_path), *change]
    assert message in refusal(capsys, TWO_HOSTS, train)


def test_a_run_without_a_folder(capsys):
    assert "no --output_dir" in refusal(capsys, TWO_HOSTS, ["--data", "DATA"])


def test_train_options_belong_behind_two_dashes(capsys):
    assert "there is no training to launch" in refusal(capsys, TWO_HOSTS, [])
    with pytest.raises(SystemExit) as ended:
        main(["launch", "--hosts", "127.0.0.1:1", "--config", "nano"])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--config" in last and "options of `ten-dist train` stand after --" in last


def test_a_folder_with_other_things(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    line = refusal(capsys, TWO_HOSTS, train_options(tmp_path))
    assert "holds files but no run" in line


def test_a_dry_run_shows_what_would_start(capsys, tmp_path):
    launch = ["launch", *TWO_HOSTS, "--dry_run", "--env", "NCCL_DEBUG=WARN"]
    launch += ["--master_port", "29400"]
    assert main([*launch, "--", *train_options(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "192.0.2.2: ranks 2, 3" in output
    assert "master: 192.0.2.1:29400" in output
    assert "NCCL_DEBUG=WARN" in output
    (line,) = [line for line in output.splitlines() if line.startswith("on 192.0.2.2")]
    assert "--no_ssh --node_rank 1 --master_addr 192.0.2.1 --master_port 29400" in line
    assert f"--output_dir {tmp_path / 'run'}" in line
    assert not (tmp_path / "run").exists()


def test_srun_starts_one_launch_on_each_node(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "192.0.2.[1-2]")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "h100:2")
    launch = ["launch", "--launcher", "slurm", "--env", "A=1", "--dry_run"]
    assert main([*launch, "--", *train_options(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("srun --nodes 2 --ntasks 2 --ntasks-per-node 1 ")
    assert "--nodelist 192.0.2.1,192.0.2.2 " in output
    assert " launch --no_ssh --hosts 192.0.2.1:2,192.0.2.2:2 " in output
    assert " --master_address 192.0.2.1 --master_port 29500 " in output
    assert " --env A=1 -- " in output


def launch_on(fleet, folder, *options):
    """Launch on the hosts of a fleet, from its first; returns the process."""
    launch = ["--hostfile", fleet.hostfile(), "--ssh_config", fleet.ssh_config]
    launch += ["--connect_timeout", "2", *options, "--"]
    command = [sys.executable, "-m", "ten_dist.cli", "launch", *launch]
    return subprocess.run(
        fleet.hosts[0].login([*command, *train_options(folder)]),
        cwd=ROOT,
        env=launch_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_a_host_that_does_not_answer(fleet_of, tmp_path):
    fleet = fleet_of(2)
    fleet.hosts[1].kill()
    result = launch_on(fleet, tmp_path, "--no_preflight")
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert "host 10.77.0.2 does not answer: ssh: connect to host 10.77.0.2" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_preflight_measures_with_the_variables_of_the_ranks(
    fleet_of, token_data, tmp_path
):
    (tmp_path / "data").symlink_to(token_data)
    variable = ["--env", "GLOO_SOCKET_IFNAME=nowhere0"]
    result = launch_on(fleet_of(2), tmp_path, *variable)
    assert result.returncode == 2, result.stderr
    assert "the all-reduce failed while connecting" in result.stderr
    assert "nowhere0" in result.stderr


@pytest.mark.slow
def test_a_run_folder_that_the_hosts_do_not_share(fleet_of, tmp_path):
    fleet = fleet_of(2)
    folder = tmp_path / "own"
    (folder / "data").mkdir(parents=True)
    fleet.hosts[1].start_sshd([["-t", "tmpfs", "none", folder]])
    # Preflight has more to say, such as that there is no data.
    result = launch_on(fleet, folder)
    assert result.returncode == 2, result.stderr
    assert "ten-dist launch: preflight\n" in result.stderr
    assert "10.77.0.2" in result.stderr and "data" in result.stderr
    assert "leave it out with --no_preflight" in result.stderr.splitlines()[-1]
    assert not (folder / "run").exists()

    result = launch_on(fleet, folder, "--no_preflight")
    assert result.returncode == 2, result.stderr
    line = result.stderr.splitlines()[-1]
    assert "10.77.0.2: " in line
    assert "put --output_dir on a file system that all hosts" in line
    assert not (folder / "run").exists()
