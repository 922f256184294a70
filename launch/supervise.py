"""`ten-dist supervise`, which also reaps rented machines if it is asked to.

python -m launch.supervise -- deepspeed launch/train.py --config nano --data DATA --output_dir RUN
"""

from __future__ import annotations

import argparse
import sys

from launch.droplets.removal import ReapingConfig, reaping
from ten_dist.arguments import ArgumentParser
from ten_dist.commands import supervise
from ten_dist.config.command_line import add_options, given

__doc__ = supervise.__doc__


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist supervise`."""
    supervise.add_arguments(parser)
    add_options(parser, ReapingConfig)


def run(arguments: argparse.Namespace) -> int:
    """Supervise as the options say; returns the exit status.

    Raises:
        ConfigurationError: the options or the command make no sense, or the machines
            cannot be reaped.
        TrainingError: processes of the job cannot be killed.
    """
    with reaping(given(arguments, ReapingConfig)):
        return supervise.run(arguments)


if __name__ == "__main__":
    from ten_dist.cli import run_and_exit

    sys.argv.insert(1, "supervise")
    run_and_exit()
