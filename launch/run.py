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
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.hosts import Host, check_names, parse_hosts, read_hostfile, slurm_hosts
from launch.multi_node.config import Launch, LaunchConfig
from launch.multi_node.exports import check_for_pdsh, rank_environment
from launch.multi_node.jobs import HostsJobs
from launch.multi_node.own_node import own_node_rank, run_own_node
from launch.multi_node.slurm import srun_command
from launch.remote import Remote, SshConfig
from ten_dist.arguments import ArgumentParser
from ten_dist.errors import ConfigurationError
from ten_dist.options import add_options, given_options
from ten_dist.run_folder import RunFolder
from ten_dist.supervise import find_output_dir, reaping
from ten_dist.supervision.job import CommandJobs, Jobs
from ten_dist.supervision.policy import SupervisionConfig
from ten_dist.supervision.supervisor import Supervisor, tell
from ten_dist.training_config import TrainingConfig

_NAME = "ten-dist launch"
_DEFAULT_PORT = 29500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ten-dist launch`."""
    add_options(parser.add_argument_group("hosts"), LaunchConfig)
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable of all ranks; may be given several times. "
        ".deepspeed_env in the home or current folder has them too, a line each",
    )
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
    add_options(parser.add_argument_group("ssh"), SshConfig)
    add_options(parser.add_argument_group("supervision"), SupervisionConfig)
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
    config = LaunchConfig(**given_options(arguments, LaunchConfig))
    ssh = SshConfig(**given_options(arguments, SshConfig))
    supervision = SupervisionConfig(**given_options(arguments, SupervisionConfig))
    train = arguments.train[1:] if arguments.train[:1] == ["--"] else arguments.train
    if not train:
        raise ConfigurationError(
            "there is no training to launch: give the options of `ten-dist train` after "
            "--, such as `ten-dist launch --hostfile hostfile -- --config nano "
            "--data DATA --output_dir RUN`"
        )
    folder = RunFolder(find_output_dir(train))
    hosts = _hosts(config)
    training = _check_training(train, sum(host.slots for host in hosts))
    folder.check_writable()
    environment = rank_environment(arguments.env)
    launch = Launch(
        config, ssh, supervision, hosts, environment, training, train, folder
    )
    if arguments.no_ssh:
        return _run_here(launch, arguments.dry_run)
    if config.launcher == "slurm":
        return _run_by_slurm(launch, arguments.dry_run)
    return _run_by_ssh(launch, not arguments.no_preflight, arguments.dry_run)


def _hosts(config: LaunchConfig) -> list[Host]:
    """The hosts that the options name.

    Raises:
        ConfigurationError: they name none, or some that cannot be used.
    """
    if config.hostfile is not None:
        hosts = read_hostfile(Path(config.hostfile))
    elif config.hosts is not None:
        hosts = parse_hosts(config.hosts)
    elif config.launcher == "slurm" or "SLURM_JOB_NODELIST" in os.environ:
        hosts = slurm_hosts()
    else:
        raise ConfigurationError(
            "there are no hosts: give --hostfile FILE or --hosts ADDRESS:GPUS,..."
        )
    if config.min_hosts > len(hosts):
        raise ConfigurationError(
            f"--min_hosts {config.min_hosts} is more than the {len(hosts)} hosts"
        )
    check_names(hosts)
    return hosts


def _check_training(train: Sequence[str], ranks: int) -> TrainingConfig:
    """Check the options of the training as its ranks will, without the data.

    Raises:
        ConfigurationError: they are wrong, or the batch does not divide over the ranks.
    """
    from ten_dist import train as train_command
    from ten_dist.engine.deepspeed_config import check_nvme_path, load_deepspeed_file
    from ten_dist.engine.plan import make_plan

    parser = ArgumentParser(prog=f"{_NAME} --", allow_abbrev=False)
    train_command.add_arguments(parser)
    parsed = parser.parse_args(train)
    training = TrainingConfig(**given_options(parsed, TrainingConfig))
    train_command.resolve_model_options(parsed, training.config)
    check_nvme_path(load_deepspeed_file(training.deepspeed_config), training)
    make_plan(dataclasses.replace(training, epochs=None), ranks, None)
    return training


def _run_by_ssh(launch: Launch, preflight: bool, dry_run: bool) -> int:
    """Start the ranks of all hosts, with ssh or pdsh."""
    remote = Remote(launch.ssh)
    if launch.config.launcher == "pdsh":
        check_for_pdsh(launch.environment, launch.train)
        if not dry_run:
            _require_program("pdsh", "pdsh")
    jobs = HostsJobs(launch, remote, [_NAME, *sys.argv[2:]], preflight, _tell)
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
    _require_program("srun", "slurm-client")
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
    return launch.config.master_port or _DEFAULT_PORT


def _supervise(launch: Launch, jobs: Jobs) -> int:
    folder, supervision = launch.folder.path, launch.supervision
    with reaping(supervision):
        return Supervisor(jobs, folder, supervision, _NAME).run()


def _require_program(name: str, package: str) -> None:
    if shutil.which(name) is None:
        raise ConfigurationError(
            f"--launcher {name if name != 'srun' else 'slurm'}: there is no {name} on "
            f"this machine: install it (Debian: {package}), or use --launcher ssh"
        )


def _tell(message: str) -> None:
    tell(_NAME, message)
