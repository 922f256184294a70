"""Train a TEN or HTEN, or continue a run.

Under a launcher:  deepspeed launch/train.py --config nano --data DATA --output_dir RUN
As one process:    ten-dist train --config nano --data DATA --output_dir RUN

Batch arithmetic, the derived DeepSpeed configuration and everything that was resolved
are printed first and written to RUN/config.json.
"""

from __future__ import annotations

import argparse

from ten_dist.config.run_options import add_run_options, given_run
from ten_dist.library_settings import check_library_settings
from ten_dist.own_rank import take_part

add_arguments = add_run_options


def run(arguments: argparse.Namespace) -> None:
    """Train as the options say.

    Raises:
        ConfigurationError: see :func:`ten_dist.engine.run.train`.
    """
    take_part()
    training, model_options = given_run(arguments)
    check_library_settings()
    from ten_dist.engine.run import train

    train(training, model_options)
