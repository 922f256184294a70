"""Trainings as a user starts them, for benchmarks, and the token shards that they read."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.shard import main as prepare
from ten_dist.monitor.metrics_log import read_metrics
from ten_dist.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
_DOCUMENT_CHARACTERS = 4000


def corpus_options(description: str) -> tuple[str, Path | None]:
    """The text of `--corpus`, and where `--output` says to write the figures."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args()
    return options.corpus.read_text(encoding="utf-8"), options.output


def make_shards(text: str, folder: Path, *options: object) -> Path:
    """Token shards of a text, cut into documents of which a tenth is held out.

    Args:
        text: at least some hundred thousand characters.
        folder: new.
        options: of `data_prep.shard`.
    """
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for start in range(0, len(text), _DOCUMENT_CHARACTERS):
        document = text[start : start + _DOCUMENT_CHARACTERS]
        (corpus / f"{start:09d}.txt").write_text(document, encoding="utf-8")
    arguments = ["--input", corpus, "--output", folder / "tokens", *options]
    if prepare([*map(str, arguments), "--val_fraction", "0.1"]):
        raise RuntimeError("the corpus cannot be prepared")
    return folder / "tokens"


def train(options: Sequence[object], ranks: int) -> None:
    """Train on some processes of this machine, one thread each."""
    arguments = [str(ROOT / "launch" / "train.py"), *map(str, options)]
    command = [sys.executable, *arguments]
    if ranks > 1:
        launcher = Path(sys.executable).with_name("deepspeed")
        started = [str(launcher), "--num_accelerators", str(ranks)]
        command = [sys.executable, *started, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    folder = RunFolder(options[options.index("--output_dir") + 1])  # type: ignore[arg-type]
    if folder.completed() is None:
        raise RuntimeError(f"{result.stdout}{result.stderr}"[-4000:])


def metrics_by_step(folder: Path, name: str) -> dict[int, float]:
    """{step: value} of a metric of a run, by its name in metrics.jsonl."""
    metrics = read_metrics(RunFolder(folder).metrics_file)
    return {m["step"]: m[name] for m in metrics if name in m}
