"""What a trained model is worth to the next run: other data, longer rows, more steps.

    python -m benchmarks.tuning --corpus FILE [--output FILE]

A source, pico, is trained on one half of a corpus by two ranks with ZeRO-2. Then, each by
another number of ranks at another stage: it is tuned on the other half, beside a run of the
same steps from nothing; its rows are lengthened eightfold; and it is extended to twice its
length, which is counted row by row.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.measure import Report
from benchmarks.trainings import corpus_options, make_shards, metrics_by_step, train
from ten_dist.run_folder import RunFolder

STEPS, TUNING_STEPS, CONTEXT_STEPS = 80, 20, 10
ROWS, CONTEXT = 16, 256
MODEL = ["--config", "pico", "--precision", "fp32", "--eval_rows", 0]
SOURCE = [
    *(*MODEL, "--steps", STEPS, "--learning_rate", "2e-3", "--warmup_steps", 10),
    *("--global_batch_size", ROWS, "--seq_len", CONTEXT, "--ledger"),
]


def measure_other_data(report: Report, source: Path, other: Path, folder: Path) -> None:
    """The other half of the corpus, on one rank."""
    options = [
        *(*MODEL, "--data", other, "--steps", TUNING_STEPS, "--seq_len", CONTEXT),
        *("--global_batch_size", ROWS, "--learning_rate", "1e-3"),
        *("--warmup_steps", 5, "--deepspeed_config", "zero0"),
    ]
    begin = ["--init_from", source]
    train([*options, *begin, "--output_dir", folder / "tuned"], ranks=1)
    train([*options, "--output_dir", folder / "anew"], ranks=1)
    tuned = metrics_by_step(folder / "tuned", "val_loss")
    anew = metrics_by_step(folder / "anew", "val_loss")
    report.row(
        "other data, 1 rank, ZeRO-0",
        {
            "validation before": tuned[0],
            f"validation after {TUNING_STEPS} steps": tuned[TUNING_STEPS],
            "validation of as many from nothing": anew[TUNING_STEPS],
        },
    )


def measure_longer_rows(report: Report, source: Path, data: Path, folder: Path) -> None:
    """Rows of eight times the length, one on each of four ranks."""
    longer = 8 * CONTEXT
    options = [
        *(*MODEL, "--data", data, "--init_from", source, "--seq_len", longer),
        *("--steps", CONTEXT_STEPS, "--global_batch_size", 4),
        *("--learning_rate", "1e-3", "--warmup_steps", 5),
        *("--deepspeed_config", "zero3", "--output_dir", folder / "longer"),
    ]
    train(options, ranks=4)
    losses = metrics_by_step(folder / "longer", "val_loss")
    report.row(
        f"rows of {longer}, 4 ranks, ZeRO-3",
        {
            f"validation in rows of {CONTEXT}": _last(source, "val_loss"),
            f"validation in rows of {longer} before": losses[0],
            f"after {CONTEXT_STEPS} steps": losses[CONTEXT_STEPS],
        },
    )


def measure_extension(report: Report, source: Path, data: Path, folder: Path) -> None:
    """Twice the steps, on one rank."""
    run = folder / "extended"
    shutil.copytree(source, run)
    more = ["--steps", 2 * STEPS, "--extend", "--deepspeed_config", "zero1"]
    train([*SOURCE, "--data", data, *more, "--output_dir", run], ranks=1)
    losses = metrics_by_step(run, "val_loss")
    rates = metrics_by_step(run, "learning_rate")
    rows = _rows_read(run)
    report.row(
        "extended, 1 rank, ZeRO-1",
        {
            f"validation after {STEPS} steps": losses[STEPS],
            f"validation after {2 * STEPS}": losses[2 * STEPS],
            f"learning rate of step {STEPS}": rates[STEPS],
            f"learning rate of step {STEPS + 1}": rates[STEPS + 1],
            "steps in the metrics": len(rates),
            "rows read": sum(rows.values()),
            "rows read twice in an epoch": sum(n > 1 for n in rows.values()),
        },
    )


def _last(run: Path, name: str) -> float:
    values = metrics_by_step(run, name)
    return values[max(values)]


def _rows_read(run: Path) -> Counter[tuple[int, int]]:
    """How often each row of each epoch was read, over all ranks."""
    counts: Counter[tuple[int, int]] = Counter()
    for path in RunFolder(run).ledger.glob("rank*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            counts.update((line["epoch"], row) for row in line["rows"])
    return counts


def main() -> None:
    """Train the source, and all that begin with it."""
    text, output = corpus_options(__doc__)
    report = Report()
    half = len(text) // 2
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = make_shards(text[:half], folder / "one", "--vocab_size", 2048)
        same = ["--tokenizer", data / "tokenizer.json"]
        other = make_shards(text[half:], folder / "other", *same)
        source = folder / "source"
        train([*SOURCE, "--data", data, "--output_dir", source], ranks=2)
        report.add("source, 2 ranks, ZeRO-2: validation", _last(source, "val_loss"))
        measure_other_data(report, source, other, folder)
        measure_longer_rows(report, source, data, folder)
        measure_extension(report, source, data, folder)
    if output is not None:
        report.write(output)


if __name__ == "__main__":
    sys.exit(main())
