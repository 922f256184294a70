"""`ten-dist plan` for machines to rent: `--size` takes their GPUs and price of the moment."""

from __future__ import annotations

import argparse
import contextlib

from launch.droplets.api import Api, ApiConfig
from launch.droplets.catalogue import Catalogue
from ten_dist.arguments import ArgumentParser
from ten_dist.commands import plan
from ten_dist.console import say
from ten_dist.errors import ConfigurationError

__doc__ = plan.__doc__


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist plan`."""
    plan.add_arguments(parser)
    parser.add_argument(
        "--size",
        metavar="SLUG",
        help="size of the nodes at DigitalOcean, whose GPUs and price of this moment are "
        "read from its API with the token in DIGITALOCEAN_TOKEN; replaces "
        "--gpus_per_node and --dollars_per_gpu_hour",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print a plan.

    Raises:
        ConfigurationError: as :func:`ten_dist.commands.plan.run`; or there is no such
            size with GPUs, or an option contradicts it.
    """
    if arguments.size is None:
        plan.run(arguments)
        return
    for name in ("gpus_per_node", "dollars_per_gpu_hour"):
        if name in arguments:
            raise ConfigurationError(
                f"--size and --{name} both say what a node is: leave one out"
            )
    with contextlib.closing(Api(ApiConfig())) as api:
        size = Catalogue(api).size(arguments.size)
    if not size.gpus:
        raise ConfigurationError(f"--size {size.slug} has no GPUs: choose another")
    say(
        f"{size.slug}: {size.gpus} x {size.gpu_model}, ${size.hourly_price:,.2f} an hour "
        f"now, in {', '.join(size.regions) or 'no region at the moment'}"
    )
    arguments.gpus_per_node = size.gpus
    arguments.dollars_per_gpu_hour = size.hourly_price / size.gpus
    plan.run(arguments)
