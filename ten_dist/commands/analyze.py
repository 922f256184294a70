"""Look at what a run's model has learned, on held-out data.

ten-dist analyze RUN

writes RUN/analysis/analysis.html, a page that needs nothing else, and analysis.json with its
figures: eigenvalues, memory, what a text writes and erases, what each part is worth, health.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from ten_dist.analysis import Analysis, analyze
from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.config.options import at_least, metavar
from ten_dist.config.training import CacheOptions
from ten_dist.console import say, warn
from ten_dist.data import Manifest, verify_shards
from ten_dist.data.access import access_of
from ten_dist.errors import ConfigurationError
from ten_dist.extras import require_packages
from ten_dist.files import printable, read_user_text, unwritable, write_json, write_text
from ten_dist.held_out_data import held_out_data, held_out_place
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import CheckpointOptions, TrainedModel, tokenizer_of

_PACKAGES = ("matplotlib", "jinja2")
_QUESTIONS = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisOptions(CheckpointOptions, CacheOptions):
    """What a model is looked at with; each field is an option of `ten-dist analyze`."""

    data: Annotated[str | None, metavar("DIR|URL")] = None
    """Held-out token shards; by default the run's validation data."""
    text: Annotated[str | None, metavar("FILE")] = None
    """A text to look at token by token; by default the start of the data."""
    text_tokens: Annotated[int, at_least(1, most=4096)] = 256
    """How many of its first tokens."""
    seq_len: Annotated[int | None, at_least(1)] = None
    """Row length; by default the run's."""
    rows: Annotated[int, at_least(1)] = 32
    """Rows of the data to look at."""
    context_tokens: Annotated[int, at_least(0)] = 32768
    """Tokens to read for each length of context, 16 to 32,768: more are more exact; 0 leaves
    the question out."""
    output: Annotated[str | None, metavar("DIR")] = None
    """Where to write; by default `analysis` in the folder of the run."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist analyze`."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    add_options(parser, AnalysisOptions)


def run(arguments: argparse.Namespace) -> None:
    """Analyze as the options say.

    Raises:
        ConfigurationError: an option is out of range; the folder, its checkpoint, the data
            or the text is missing, damaged, or does not fit; or a package is missing.
        OSError: the page cannot be written.
    """
    options = given(arguments, AnalysisOptions)
    require_packages("an analysis", _PACKAGES, "analysis")
    folder = RunFolder(arguments.run)
    record = folder.read()
    output = Path(options.output) if options.output else folder.path / "analysis"
    reason = unwritable(output)
    if reason is not None:
        raise ConfigurationError(f"--output {printable(str(output))} {reason}")
    tokens = _tokens_of(folder, options.text)
    place = held_out_place(options.data, record)
    manifest = held_out_data(place, record, access_of(options, [place]))
    verify_shards(manifest, 0, 1)
    seq_len = options.seq_len or record.schedule.seq_len
    manifest.rows(seq_len)  # refuses what has none
    model = TrainedModel.load(folder, options.checkpoint)
    found = _analyzed(model, manifest, seq_len, tokens, options)
    # Here, as matplotlib takes a second to import.
    from ten_dist.analysis.page import page_of

    about = f"{model.checkpoint.name}, {manifest.directory}"
    page = page_of(
        found, folder.path.resolve().name, about, tokenizer_of(folder).decode
    )
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "analysis.json", found.to_dict())
    write_text(output / "analysis.html", page)
    say(
        f"{output / 'analysis.html'}: {model.checkpoint}, held-out loss {found.loss:.4f}"
    )


def _analyzed(
    model: TrainedModel,
    manifest: Manifest,
    seq_len: int,
    tokens: list[int] | None,
    options: AnalysisOptions,
) -> Analysis:
    with tqdm(total=_QUESTIONS, desc="analyze", dynamic_ncols=True) as bar:

        def progress(question: str) -> None:
            bar.set_postfix_str(question)
            bar.update()

        return analyze(
            model.network,
            manifest,
            seq_len,
            rows=options.rows,
            context_tokens=options.context_tokens,
            text=tokens,
            text_tokens=options.text_tokens,
            progress=progress,
        )


def _tokens_of(folder: RunFolder, text: str | None) -> list[int] | None:
    """The tokens of a text as a document, which begins behind a separator."""
    if text is None:
        return None
    tokenizer = tokenizer_of(folder)
    content = read_user_text(Path(text), f"--text {printable(text)}")
    (ids,) = tokenizer.encode([content])
    if len(ids) == 0:
        raise ConfigurationError(
            f"--text {printable(text)} has no tokens: it is empty, or of characters that "
            "the run's tokenizer does not know"
        )
    if lost := sorted(set(content) - set(tokenizer.decode(ids.tolist()))):
        warn(
            f"--text {printable(text)} has {len(lost)} kinds of characters that the run's "
            f"tokenizer does not give back, such as {lost[0]!r}"
        )
    return [tokenizer.separator_id, *ids.tolist()]
