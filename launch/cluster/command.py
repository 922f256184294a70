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

from launch.cluster.config import Launch, LaunchConfig
from launch.cluster.jobs import HostsJobs
from launch.cluster.own_node import own_node_rank, run_own_node
from launch.cluster.slurm import srun_command
from launch.droplets.reaping import ReapingConfig, reaping
from launch.hosts import Host, HostsConfig
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
from ten_dist.supervision.supervisor import Supervisor, tell

_NAME = "ten-dist launch"


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
    """Launch as the options say.

    Returns:
        The exit status, see above.

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
    parser = ArgumentParser(prog=f"{_NAME} --", allow_abbrev=False)
    add_run_options(parser)
    add_config_file(parser)
    # Other hosts may not have the file.
    train = parser.expand(train)
    folder = RunFolder(find_output_dir(train))
    hosts = _hosts(arguments, config)
    training, _ = given_run(parser.parse_args(train))
    _check_training(training, sum(host.slots for host in hosts))
    folder.check_writable()
    environment = rank_environment(arguments.env)
    launch = Launch(
        config, ssh, supervision, reaper, hosts, environment, training, train, folder
    )
    if arguments.no_ssh:
        return _run_here(launch, arguments.dry_run)
    if config.launcher == "slurm":
        return _run_by_slurm(launch, arguments.dry_run)
    return _run_by_ssh(launch, not arguments.no_preflight, arguments.dry_run)


def _hosts(arguments: argparse.Namespace, config: LaunchConfig) -> list[Host]:
    """The hosts that the options name.

    Raises:
        ConfigurationError: they name none, too few, or some that cannot be used.
    """
    named = given(arguments, HostsConfig)
    hosts = named.read(slurm=config.launcher == "slurm")
    if config.min_hosts > len(hosts):
        raise ConfigurationError(
            f"--min_hosts {config.min_hosts} is more than the {len(hosts)} hosts"
        )
    return hosts


def _check_training(training: TrainingConfig, ranks: int) -> None:
    """Check the options of the training as its ranks will, without the data.

    Raises:
        ConfigurationError: they are wrong, or the batch does not divide over the ranks.
    """
    from ten_dist.deepspeed_config import check_nvme_path, load_deepspeed_file
    from ten_dist.schedule import make_schedule

    check_nvme_path(load_deepspeed_file(training.deepspeed_config), training)
    make_schedule(dataclasses.replace(training, epochs=None), ranks, None)


def _run_by_ssh(launch: Launch, preflight: bool, dry_run: bool) -> int:
    """Start the ranks of all hosts, over ssh."""
    jobs = HostsJobs(
        launch, Remote(launch.ssh), [_NAME, *sys.argv[2:]], preflight, _tell
    )
    if dry_run:
        print("\n".join(jobs.describe()))
        return 0
    return _supervise(launch, jobs)


def _run_by_slurm(launch: Launch, dry_run: bool) -> int:
    """Have srun start this command with --no_ssh on all nodes."""
    command = srun_command(launch, _known_port(launch))
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


def _run_here(launch: Launch, dry_run: bool) -> int:
    """Start the ranks of this machine."""
    node = own_node_rank(launch.config.node_rank, launch.hosts)
    port = _known_port(launch)
    if dry_run:
        address = launch.master_address(launch.hosts)
        print(
            f"host {node} of {len(launch.hosts)}: {launch.hosts[node]}, "
            f"{launch.hosts[node].slots} ranks, master {address}:{port}"
        )
        return 0
    return run_own_node(launch, node, port, _tell)


def _known_port(launch: Launch) -> int:
    """A port of the first host that all hosts know without asking."""
    return launch.config.master_port or DEFAULT_PORT


def _supervise(launch: Launch, jobs: Jobs) -> int:
    folder, supervision = launch.folder.path, launch.supervision
    with reaping(launch.reaping):
        return Supervisor(jobs, folder, supervision, _NAME).run()


def _tell(message: str) -> None:
    tell(_NAME, message)
