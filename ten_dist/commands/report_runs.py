"""Compare runs on one page.

ten-dist report RUN [RUN ...] --output FILE.html

The page needs nothing else: curves over steps, tokens, hours or dollars, the options in which
the runs differ, held-out results, speed, cost, starts and anomalies. Runs may still go on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ten_dist.arguments import ArgumentParser
from ten_dist.console import say, warn
from ten_dist.errors import ConfigurationError
from ten_dist.files import printable, unwritable, write_text


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist report`."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument(
        "--output", metavar="FILE", default="report.html", help="page to write"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page. A folder that is no run is passed over with a warning, unless all are.

    Raises:
        ConfigurationError: none of the folders is that of a run with metrics, or the page
            cannot be written where it should.
    """
    output = Path(arguments.output)
    reason = unwritable(output.parent)
    if output.is_dir() or reason is not None:
        raise ConfigurationError(
            f"--output {printable(str(output))} {reason or 'is a folder: name a file'}"
        )
    from ten_dist.report.comparison_page import page_of
    from ten_dist.report.run_history import RunHistory, named_apart

    runs, refused = [], []
    for path in arguments.runs:
        try:
            runs.append(RunHistory.read(Path(path)))
        except ConfigurationError as error:
            refused.append(error)
    if not runs:
        raise refused[0]
    for reason_for_one in refused:
        warn(f"left out: {reason_for_one}")
    named = named_apart(runs)
    write_text(output, page_of(named))
    say(f"{output}: {', '.join(run.name for run in named)}")
