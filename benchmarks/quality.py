"""How well models learn: ablations and comparisons over several seeds.

    python -m benchmarks.quality characters --corpus FILE
    python -m benchmarks.quality characters-tuned --corpus FILE
    python -m benchmarks.quality tokens --data DIR
    python -m benchmarks.quality recall copying

Each experiment trains every variant with every seed and prints a table of means and
standard deviations. Results go to a file for each experiment in --output as they come;
run again, the same command does only what is missing. Variants of an experiment have equal
numbers of parameters where they are compared, and read the same batches.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.fitting import Recipe, fit
from benchmarks.tasks import (
    AssociativeRecall,
    Characters,
    SelectiveCopying,
    Task,
    TokenShards,
)
from ten_dist import TemporalEigenstateConfig
from ten_dist.config.model import PAPER
from ten_dist.errors import ConfigurationError
from ten_dist.files import write_json

# Each variant adds one option to the one before it.
TIMESCALE = {**PAPER, "eigenvalue_init": "timescale"}
NORMED = {**TIMESCALE, "input_norm": "dynamic"}
SELECTIVE = {
    **NORMED,
    "learnable_selection_range": True,
    "selection_range": (8.0, 0.1),
}
DEEPENING = {**SELECTIVE, "depth_increasing_memory": True}
CONVOLVED = {**DEEPENING, "short_convolution": 4}
ABLATION: dict[str, dict[str, Any]] = {
    "transformer": {"mixer": "attention"},
    "paper": PAPER,
    "+ timescale": TIMESCALE,
    "+ dynamic norm": NORMED,
    "+ learned selection from 8": SELECTIVE,
    "+ memory by depth": DEEPENING,
    "+ short convolution": CONVOLVED,
}


# What is compared where the ablation has been made elsewhere.
COMPARED = ("transformer", "paper", "+ memory by depth")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Variants of a model, a task and a recipe."""

    task: Task
    recipe: Recipe
    base: dict[str, Any]
    """Fields of the model that all variants share."""
    variants: dict[str, dict[str, Any]]
    rates: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Learning rates of the recipe by variant, where they are its own."""

    def recipe_of(self, variant: str) -> Recipe:
        """How a variant is trained."""
        return dataclasses.replace(self.recipe, **self.rates.get(variant, {}))

    def config(self, variant: str) -> TemporalEigenstateConfig:
        """Model of a variant."""
        return TemporalEigenstateConfig(**{**self.base, **self.variants[variant]})


def make_experiment(name: str, corpus: Path | None, data: Path | None) -> Experiment:
    """The experiment `name` of :data:`EXPERIMENTS`.

    Raises:
        ConfigurationError: the option with its corpus is missing.
    """
    if name.startswith("characters"):
        if corpus is None:
            raise ConfigurationError(f"{name} needs --corpus, a text file")
        if name == "characters-tuned":
            return _characters_tuned(corpus)
        return _characters(corpus, 256 if name.endswith("256") else 64)
    if name == "tokens":
        if data is None:
            raise ConfigurationError("tokens needs --data, prepared token shards")
        return _tokens(data)
    task = AssociativeRecall() if name == "recall" else SelectiveCopying()
    return Experiment(
        task,
        Recipe(steps=2000, rows=32, learning_rate=2e-3),
        {"dim": 64, "n_layers": 2, "num_eigenstates": 64, "num_heads": 4}
        | {"max_timescale": 64.0, "energy_reg_weight": 0.0},
        {**ABLATION, "transformer": {"mixer": "attention", "ffn_multiplier": 5.625}},
    )


def _characters(corpus: Path, context: int) -> Experiment:
    """About 0.8 M parameters on a text of characters.

    At 64 characters 2000 steps of 12 rows, the small recipe of nanoGPT; at 256 as many
    tokens a step in four times the rows' length.
    """
    base = {"dim": 128, "n_layers": 4, "num_eigenstates": 64, "num_heads": 4}
    base["max_timescale"] = float(context)
    variants = dict(ABLATION)
    wide = {**CONVOLVED, "num_eigenstates": 128, "ffn_multiplier": 2.4}
    if context == 256:
        variants = {name: variants[name] for name in COMPARED}
    else:
        variants |= {
            "static norm for dynamic": {**CONVOLVED, "input_norm": "static"},
            "state gate for output gate": {
                **CONVOLVED,
                "gate": "state",
                "ffn_multiplier": 3.9375,
            },
        }
    variants["+ 128 eigenstates, narrower MLP"] = wide
    variants["HTEN 1,2 of the same size"] = {
        **wide,
        "hten_scales": (1, 2),
        "ffn_multiplier": 0.984375,
    }
    return Experiment(
        Characters(corpus, context),
        Recipe(steps=2000, rows=12 * 64 // context),
        base,
        variants,
    )


def _characters_tuned(corpus: Path) -> Experiment:
    """Models of 0.8 M parameters, each with learning rates of its own: a sweep.

    Muon's runs keep the 1e-3 of AdamW for embeddings, norms and recurrence, but for one.
    """
    base = {"dim": 128, "n_layers": 4, "num_eigenstates": 128, "num_heads": 4}
    ten = {**DEEPENING, "max_timescale": 64.0, "ffn_multiplier": 2.4}
    models = {
        "TEN": ten,
        "TEN, gated MLP": {**ten, "ffn_gate": True},
        "TEN, levels 4,16": {**ten, "levels": (4, 16), "ffn_multiplier": 2.36},
        "HTEN 1,2": {**ten, "hten_scales": (1, 2), "ffn_multiplier": 0.984375},
        "transformer": {"mixer": "attention"},
        "transformer, gated MLP": {"mixer": "attention", "ffn_gate": True},
    }
    sweep: dict[str, list[dict[str, float]]] = {
        "TEN": [*_adamw(1e-3, 4e-3), *_muon(4e-3, 8e-3, 16e-3)],
        "TEN, gated MLP": [
            *_muon(4e-3, 8e-3),
            {"muon_learning_rate": 8e-3, "learning_rate": 4e-3},
        ],
        "TEN, levels 4,16": _muon(8e-3),
        "HTEN 1,2": [*_adamw(4e-3), *_muon(4e-3, 8e-3)],
        "transformer": [*_adamw(1e-3, 4e-3), *_muon(4e-3, 8e-3, 16e-3)],
        "transformer, gated MLP": _muon(8e-3, 16e-3),
    }
    variants, rates = {}, {}
    for model, chosen in sweep.items():
        for each in chosen:
            words = ", ".join(f"{name} {rate:g}" for name, rate in each.items())
            words = words.replace("_learning_rate", "").replace(
                "learning_rate", "AdamW"
            )
            variants[f"{model}: {words}"] = models[model]
            rates[f"{model}: {words}"] = each
    recipe = Recipe(steps=2000, rows=12)
    return Experiment(Characters(corpus, 64), recipe, base, variants, rates)


def _adamw(*rates: float) -> list[dict[str, float]]:
    return [{"learning_rate": rate} for rate in rates]


def _muon(*rates: float) -> list[dict[str, float]]:
    return [{"muon_learning_rate": rate} for rate in rates]


def _tokens(data: Path) -> Experiment:
    """Models of the size of `pico` on prepared tokens, 512 of context."""
    base = {"dim": 160, "n_layers": 4, "num_eigenstates": 120, "num_heads": 2}
    base["max_timescale"] = 512.0
    wide = {**CONVOLVED, "num_eigenstates": 240, "num_heads": 8}
    wide["ffn_multiplier"] = 1.8125
    variants = {
        "transformer": {"mixer": "attention", "num_heads": 5, "ffn_multiplier": 4.9},
        "paper": PAPER,
        "+ memory by depth": DEEPENING,
        "+ short convolution": CONVOLVED,
        "+ 240 eigenstates, narrower MLP": wide,
        "HTEN 1,2 of the same size": {
            **wide,
            "hten_scales": (1, 2),
            "ffn_multiplier": 0.5,
        },
    }
    return Experiment(
        TokenShards(data, 512, lengths=(2048, 8192)),
        Recipe(steps=300, rows=8, learning_rate=2e-3, precision="bf16"),
        base,
        variants,
    )


EXPERIMENTS = (
    "characters",
    "characters-tuned",
    "characters-256",
    "tokens",
    "recall",
    "copying",
)


def run_one(
    name: str, corpus: Path | None, data: Path | None, variant: str, seed: int
) -> dict[str, float]:
    """Train one variant with one seed, on one thread."""
    torch.set_num_threads(1)
    experiment = make_experiment(name, corpus, data)
    recipe = experiment.recipe_of(variant)
    return fit(experiment.config(variant), experiment.task, recipe, seed)


class Results:
    """Figures of one experiment by variant and seed, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"variants": {}}
        if path.is_file():
            self.content = json.loads(path.read_text())

    def runs(self, variant: str) -> dict[str, dict[str, float]]:
        """Figures by seed."""
        return self.content["variants"].get(variant, {})

    def add(self, variant: str, seed: int, figures: dict[str, float]) -> None:
        """Keep the figures of one run, on the disk as well."""
        self.content["variants"].setdefault(variant, {})[str(seed)] = {
            name: round(value, 5) for name, value in figures.items()
        }
        self.content |= {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def table(results: Results, name: str, variants: list[str]) -> str:
    """Markdown table: mean and standard deviation over seeds of every figure."""
    runs = {variant: list(results.runs(variant).values()) for variant in variants}
    runs = {variant: found for variant, found in runs.items() if found}
    if not runs:
        return f"{name}: nothing measured"
    columns = [c for c in next(iter(runs.values()))[0] if c != "parameters"]
    lines = [
        f"| {name} | seeds | parameters | {' | '.join(columns)} |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for variant, found in runs.items():
        cells = [variant, str(len(found)), f"{found[0]['parameters']:,.0f}"]
        for column in columns:
            values = [run[column] for run in found]
            cell = f"{statistics.mean(values):.4f}"
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values):.4f}"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
                    run_one, name, options.corpus, options.data, variant, seed
                ): (variant, seed)
                for seed in range(options.seeds)
                for variant in variants
                if str(seed) not in results.runs(variant)
            }
            for done in concurrent.futures.as_completed(pending):
                variant, seed = pending[done]
                results.add(variant, seed, done.result())
                print(f"{name}, {variant}, seed {seed}: {done.result()}", flush=True)
        print(table(results, name, variants), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
