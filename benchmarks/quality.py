"""How well models learn: ablations and comparisons over several seeds.

    python -m benchmarks.quality characters --corpus FILE
    python -m benchmarks.quality characters-tuned characters-256-tuned --corpus FILE
    python -m benchmarks.quality tokens --data DIR
    python -m benchmarks.quality ladder --data DIR --checkpoints DIR --seeds 1 --jobs 1
    python -m benchmarks.quality copying mqar parity permutation permutation-5

Each experiment trains every variant with every seed and prints a table of means and
standard deviations. Results go to a file for each experiment in --output as they come;
run again, the same command does only what is missing. Variants of an experiment have equal
numbers of parameters where they are compared, and read the same batches.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments import EXPERIMENTS, make_experiment
from benchmarks.fitting import fit
from benchmarks.ladder import fitted
from benchmarks.quality_results import Results, curves, table
from ten_dist.errors import ConfigurationError


def run_one(
    name: str,
    corpus: Path | None,
    data: Path | None,
    variant: str,
    seed: int,
    checkpoints: Path | None,
) -> dict[str, Any]:
    """Train one variant with one seed, on one thread."""
    torch.set_num_threads(1)
    experiment = make_experiment(name, corpus, data)
    checkpoint = None
    if checkpoints is not None:
        checkpoint = checkpoints / f"{name}, {variant}, seed {seed}.pt"
    return fit(
        experiment.variants[variant],
        experiment.task,
        experiment.recipe_of(variant),
        seed,
        checkpoint,
    )


def main() -> int:
    """Run the experiments named on the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS, metavar="EXPERIMENT")
    parser.add_argument(
        "--corpus", type=Path, metavar="FILE", help="text, for characters"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards, for tokens")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--variants", metavar="PART", help="only those that contain it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="keep unfinished trainings there, and go on with them",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), metavar="DIR"
    )
    options = parser.parse_args()
    # Threads and processes do not mix under fork.
    context = multiprocessing.get_context("spawn")
    for name in options.names:
        try:
            experiment = make_experiment(name, options.corpus, options.data)
        except ConfigurationError as error:
            print(f"benchmarks.quality: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(
                f"benchmarks.quality: --corpus {options.corpus} cannot be read: "
                f"{error.strerror}",
                file=sys.stderr,
            )
            return 2
        variants = [v for v in experiment.variants if (options.variants or "") in v]
        results = Results(options.output / f"quality-{name}.json")
        with concurrent.futures.ProcessPoolExecutor(options.jobs, context) as pool:
            pending = {
                pool.submit(
                    run_one,
                    name,
                    options.corpus,
                    options.data,
                    variant,
                    seed,
                    options.checkpoints,
                ): (variant, seed)
                for seed in range(options.seeds)
                for variant in variants
                if str(seed) not in results.runs(variant)
            }
            for done in concurrent.futures.as_completed(pending):
                variant, seed = pending[done]
                figures = done.result()
                results.add(variant, seed, figures)
                told = {n: value for n, value in figures.items() if n != "curve"}
                print(f"{name}, {variant}, seed {seed}: {told}", flush=True)
        tables = [table(results, name, variants), curves(results, name, variants)]
        if name == "ladder":
            tables.append(fitted(results))
        print("\n\n".join(filter(None, tables)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
