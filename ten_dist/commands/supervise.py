"""Start a training, and start it again until it is complete.

ten-dist supervise -- deepspeed launch/train.py --config nano --data DATA --output_dir RUN

A run that was killed, crashed, hung or was preempted is started again from its newest
complete checkpoint, after every process of it has ended. Whether it is complete is judged
by OUTPUT_DIR/COMPLETED, as launchers may end with status 0 after a rank was killed. Every
start is recorded in OUTPUT_DIR/supervisor.jsonl. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are
passed on to the ranks, and end the supervisor as well.

Exit status: 0 the run is complete; 1 gave up; 2 the job was refused and would be again;
3 stopped by a signal, and the same command continues.
"""

from __future__ import annotations

import argparse

from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.errors import ConfigurationError
from ten_dist.supervision.job import CommandJobs, find_output_dir
from ten_dist.supervision.policy import SupervisionConfig


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist supervise`."""
    add_options(parser, SupervisionConfig)
    parser.add_argument(
        "job",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND",
        help="what to run: `ten-dist train ...`, `deepspeed ... launch/train.py ...` or "
        "another launcher, with --output_dir among its options or in its --config_file",
    )


def run(arguments: argparse.Namespace) -> int:
    """Supervise as the options say.

    Returns:
        The exit status, see above.

    Raises:
        ConfigurationError: the options or the command make no sense.
        TrainingError: processes of the job cannot be killed.
    """
    config = given(arguments, SupervisionConfig)
    command = arguments.job[1:] if arguments.job[:1] == ["--"] else arguments.job
    if not command:
        raise ConfigurationError(
            "there is no command to supervise: give one after --, such as "
            "`ten-dist supervise -- ten-dist train --output_dir RUN ...`"
        )
    output_dir = find_output_dir(command)
    from ten_dist.supervision.supervisor import Supervisor

    jobs = CommandJobs(command, str(output_dir.resolve()), config.keep_lines)
    return Supervisor(jobs, output_dir, config, "ten-dist supervise").run()
