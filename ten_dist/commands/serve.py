"""Serve a model over HTTP, in the interface of OpenAI's completions and chat.

Any client of that interface works with http://ADDRESS:PORT/v1; a page to try the model is at
http://ADDRESS:PORT. Sequences join and leave a running batch at any token. SIGTERM ends what
is under way and takes nothing new.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.extras import require_packages
from ten_dist.serving.serving_options import ServingOptions

_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "jinja2")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist serve`."""
    parser.add_argument(
        "model",
        metavar="RUN|EXPORTED",
        help="folder of a run, or one that `ten-dist export` wrote",
    )
    add_options(parser, ServingOptions)


def run(arguments: argparse.Namespace) -> None:
    """Serve as the options say.

    Raises:
        ConfigurationError: the folder holds no usable run, an option is out of range, or
            a package is missing.
    """
    options = given(arguments, ServingOptions)
    require_packages("serving", _PACKAGES, "serve")
    from ten_dist.serving.served_model import ServedModel
    from ten_dist.serving.server import serve

    served = ServedModel.load(
        Path(arguments.model),
        options.checkpoint,
        options.model_name,
        options.max_new_tokens,
    )
    serve(served, options)
