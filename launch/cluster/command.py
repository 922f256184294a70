"""Start a training on several hosts, and start it again until it is complete.

ten-dist launch --hostfile hostfile -- --config large --data DATA --output_dir RUN

What stands after -- are the options of `ten-dist train`. Before anything is started, the
options and the batch are checked, what earlier starts have left on any host is ended, and
the hosts are checked as by `ten-dist preflight`. The ranks run on all hosts; what each one prints goes to
OUTPUT_DIR/logs/start_NNN/rankNNNN.log, that of rank 0 also to the terminal. A run that was
killed, crashed or hung is started again from its newest complete checkpoint, as by
`ten-dist supervise`; when a host is lost, on the hosts that are left, with the same global
batch. When the job ends, for whatever reason, so do its processes on every host.

Every host has this checkout, the environment and the data at the same path; OUTPUT_DIR is
on a file system that they and this machine share.

Exit status: 0 the run is complete; 1 gave up; 2 something has to be changed first; 3
stopped by a signal, and the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import sys

from launch.cluster.config import NAME, Launch, LaunchConfig
from launch.cluster.jobs import HostsJobs
from launch.cluster.own_node import own_node_rank, run_own_node
from launch.droplets.removal import ReapingConfig, reaping
from launch.hosts import HostsConfig, count_slots
from launch.preflight.settings import DEFAULT_PORT
from launch.rank_environment import add_environment_option, rank_environment
from launch.remote import Remote, SshConfig
from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.config.run_options import add_run_options, given_run
from ten_dist.config.training import TrainingConfig
from ten_dist.config_file import add_config_file
from ten_dist.errors import ConfigurationError
from ten_dist.run_folder import RunFolder
from ten_dist.supervision.job import CommandJobs, Jobs, find_output_dir
from ten_dist.supervision.policy import SupervisionConfig
from ten_dist.supervision.supervisor import Supervisor


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist launch`."""
    add_options(parser, HostsConfig)
    add_options(parser, LaunchConfig)
    add_environment_option(parser)
    parser.add_argument(
        "--no_ssh",
        action="store_true",
        help="start only the ranks of this machine, once: the same command runs on "
        "every host, each with its --node_rank",
    )
    parser.add_argument(
        "--no_preflight",
        action="store_true",
        help="leave out the checks of `ten-dist preflight` before the first start, which "
        "--launcher slurm and --no_ssh do in any case",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check what can be checked here, show what would be started, and end",
    )
    add_options(parser, SshConfig)
    add_options(parser, SupervisionConfig)
    add_options(parser, ReapingConfig)
    parser.add_argument(
        "train",
        nargs=argparse.REMAINDER,
        metavar="-- TRAIN OPTIONS",
        help="options of `ten-dist train`, --output_dir among them",
    )


def run(arguments: argparse.Namespace) -> int:
    """Launch as the options say; returns the exit status, see above.

    Raises:
        ConfigurationError: options, hosts or batch do not fit, or a host is not there.
        TrainingError: processes of the job cannot be killed.
    """
    config = given(arguments, LaunchConfig)
    ssh = given(arguments, SshConfig)
    supervision = given(arguments, SupervisionConfig)
    reaper = given(arguments, ReapingConfig)
    train = arguments.train[1:] if arguments.train[:1] == ["--"] else arguments.train
    if not train:
        raise ConfigurationError(
            "there is no training to launch: give the options of `ten-dist train` after "
            "--, such as `ten-dist launch --hostfile hostfile -- --config nano "
            "--data DATA --output_dir RUN`"
        )
    parser = ArgumentParser(prog=f"{NAME} --", allow_abbrev=False)
    add_run_options(parser)
    add_config_file(parser)
    # Other hosts may not have the file.
    train = parser.expand(train)
    folder = RunFolder(find_output_dir(train))
    named = given(arguments, HostsConfig)
    hosts = named.read(slurm=config.launcher == "slurm")
    if config.min_hosts > len(hosts):
        raise ConfigurationError(
            f"--min_hosts {config.min_hosts} is more than the {len(hosts)} hosts"
        )
    training, _ = given_run(parser.parse_args(train))
    _check_training(training, count_slots(hosts))
    folder.check_writable()
    environment = rank_environment(arguments.env)
    launch = Launch(
        config, ssh, supervision, reaper, hosts, environment, training, train, folder
    )
    # A port of the first host that all hosts know without asking.
    port = config.master_port or DEFAULT_PORT
    if arguments.no_ssh:
        return _run_here(launch, port, arguments.dry_run)
    if config.launcher == "slurm":
        return _run_by_slurm(launch, port, arguments.dry_run)
    return _run_by_ssh(launch, not arguments.no_preflight, arguments.dry_run)


def _check_training(training: TrainingConfig, ranks: int) -> None:
    """Check the options of the training as its ranks will, without the data;
    ConfigurationError also where the batch does not divide over the ranks."""
    from ten_dist.deepspeed_config import check_nvme_path, load_deepspeed_file
    from ten_dist.schedule import make_schedule

    check_nvme_path(load_deepspeed_file(training.deepspeed_config), training)
    make_schedule(dataclasses.replace(training, epochs=None), ranks, None)


def _run_by_ssh(launch: Launch, preflight: bool, dry_run: bool) -> int:
    """Start the ranks of all hosts, over ssh."""
    command = [NAME, *sys.argv[2:]]
    jobs = HostsJobs(launch, Remote(launch.ssh), command, preflight)
    if dry_run:
        print("\n".join(jobs.describe()))
        return 0
    return _supervise(launch, jobs)


def _run_by_slurm(launch: Launch, port: int, dry_run: bool) -> int:
    """Have srun start this command with --no_ssh on all nodes."""
    command = _srun_command(launch, port)
    if dry_run:
        print(shlex.join(command))
        return 0
    if shutil.which("srun") is None:
        raise ConfigurationError(
            "--launcher slurm: there is no srun on this machine: install it (Debian: "
            "slurm-client), or use --launcher ssh"
        )
    keep_lines = launch.supervision.keep_lines
    return _supervise(launch, CommandJobs(command, launch.mark, keep_lines))


def _srun_command(launch: Launch, master_port: int) -> list[str]:
    """A command that runs `ten-dist launch --no_ssh` once on every node.

    Each task finds its number in SLURM_NODEID. Slurm itself ends all tasks when one fails
    or its node is lost.
    """
    hosts = launch.hosts
    nodes = str(len(hosts))
    variables = [f"{name}={value}" for name, value in launch.environment.items()]
    return [
        "srun",
        *("--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1"),
        *("--nodelist", ",".join(host.address for host in hosts)),
        # By default a task gets one processor.
        *("--cpu-bind", "none", "--kill-on-bad-exit=1", "--export=ALL"),
        *(sys.executable, "-m", "ten_dist.cli", "launch", "--no_ssh"),
        *("--hosts", ",".join(f"{host}:{host.slots}" for host in hosts)),
        *("--master_address", launch.master_address(hosts)),
        *("--master_port", str(master_port)),
        *("--grace", f"{launch.supervision.grace:g}"),
        *(word for text in variables for word in ("--env", text)),
        *("--", *launch.train),
    ]


def _run_here(launch: Launch, port: int, dry_run: bool) -> int:
    """Start the ranks of this machine."""
    hosts = launch.hosts
    node = own_node_rank(launch.config.node_rank, hosts)
    if dry_run:
        print(
            f"host {node} of {len(hosts)}: {hosts[node]}, {hosts[node].slots} ranks, "
            f"master {launch.master_address(hosts)}:{port}"
        )
        return 0
    return run_own_node(launch, node, port)


def _supervise(launch: Launch, jobs: Jobs) -> int:
    with reaping(launch.reaping):
        return Supervisor(jobs, launch.folder.path, launch.supervision, NAME).run()
