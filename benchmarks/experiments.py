"""The quality experiments: which models are trained on what, and how.

Variants of an experiment read the same batches, and have equal numbers of parameters where
they are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.baselines import BaselineConfig
from benchmarks.fitting import Experiment, ModelConfig, Recipe
from benchmarks.ladder import make_ladder
from benchmarks.tasks import (
    AssociativeRecall,
    Characters,
    Parity,
    PermutationWords,
    SelectiveCopying,
    Task,
    TokenShards,
)
from ten_dist import TemporalEigenstateConfig
from ten_dist.config.model import PAPER
from ten_dist.errors import ConfigurationError

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
    "transformer": {"mixer": "attention", "ffn_gate": False},
    "paper": PAPER,
    "+ timescale": TIMESCALE,
    "+ dynamic norm": NORMED,
    "+ learned selection from 8": SELECTIVE,
    "+ memory by depth": DEEPENING,
    "+ short convolution": CONVOLVED,
}


# What is compared where the ablation has been made elsewhere.
COMPARED = ("transformer", "paper", "+ memory by depth")


def make_experiment(name: str, corpus: Path | None, data: Path | None) -> Experiment:
    """The experiment `name` of :data:`EXPERIMENTS`.

    Raises:
        ConfigurationError: the option with its corpus is missing.
    """
    if name.startswith("characters"):
        if corpus is None:
            raise ConfigurationError(f"{name} needs --corpus, a text file")
        context = 256 if "256" in name else 64
        if name.endswith("tuned"):
            return _characters_tuned(corpus, context)
        return _characters(corpus, context)
    if name in ("tokens", "ladder"):
        if data is None:
            raise ConfigurationError(f"{name} needs --data, prepared token shards")
        return _tokens(data) if name == "tokens" else make_ladder(data)
    if name == "copying":
        return _copying()
    make_task, rows = SYNTHETIC[name]
    return _synthetic(make_task(), rows)


def _copying() -> Experiment:
    base = {"dim": 64, "n_layers": 2, "num_eigenstates": 64, "num_heads": 4}
    base |= {"max_timescale": 64.0, "energy_reg_weight": 0.0}
    wide = {"mixer": "attention", "ffn_gate": False, "ffn_multiplier": 5.625}
    return Experiment(
        SelectiveCopying(),
        Recipe(steps=2000, rows=32, learning_rate=2e-3),
        _networks(base, {**ABLATION, "transformer": wide}),
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
        _networks(base, variants),
    )


def _characters_tuned(corpus: Path, context: int) -> Experiment:
    """Models of 0.8 M parameters, each with learning rates of its own: a sweep.

    Muon's runs keep the 1e-3 of AdamW for embeddings, norms and recurrence, but for some. A
    new kind of TEN is a line in `models` and one in `sweep`.
    """
    base = {"dim": 128, "n_layers": 4, "num_eigenstates": 128, "num_heads": 4}
    ten = {**DEEPENING, "max_timescale": float(context), "ffn_multiplier": 2.4}
    models = _networks(
        base,
        {
            "TEN": ten,
            "TEN, gated MLP": {**ten, "ffn_gate": True},
            "TEN, gated MLP, one matrix layer": {
                **ten,
                "ffn_gate": True,
                "ffn_multiplier": 2.32,
                "state_dim": 16,
                "matrix_layers": (2,),
            },
            "TEN, levels 4,16": {**ten, "levels": (4, 16), "ffn_multiplier": 2.36},
            "HTEN 1,2": {**ten, "hten_scales": (1, 2), "ffn_multiplier": 0.984375},
            "transformer": {"mixer": "attention", "ffn_gate": False},
            "transformer, gated MLP": {"mixer": "attention"},
        },
    ) | _baselines(
        {"dim": 128, "n_layers": 4},
        {
            "modern transformer": {"mixer": "attention", "ffn_dim": 344},
            "modern transformer, short convolution": {
                "mixer": "attention",
                "ffn_dim": 344,
                "convolution": 4,
            },
            "minGRU": {
                "mixer": "min_gru",
                "ffn_dim": 264,
                "inner_dim": 256,
                "convolution": 4,
            },
            "Mamba-2": {
                "mixer": "mamba2",
                "ffn_dim": 216,
                "inner_dim": 256,
                "state_dim": 64,
            },
            "Mamba-2 without MLPs": {
                "mixer": "mamba2",
                "n_layers": 7,
                "ffn_dim": 0,
                "inner_dim": 248,
                "state_dim": 64,
            },
            "gated delta net": {
                "mixer": "delta_net",
                "ffn_dim": 168,
                "inner_dim": 256,
                "state_dim": 32,
            },
        },
    )
    both = [{"muon_learning_rate": 8e-3, "learning_rate": 4e-3}]
    sweep: dict[str, list[dict[str, float]]] = {
        "TEN": [*_adamw(1e-3, 4e-3), *_muon(4e-3, 8e-3, 16e-3)],
        "TEN, gated MLP": [*_muon(4e-3, 8e-3, 16e-3), *both],
        "TEN, gated MLP, one matrix layer": both,
        "TEN, levels 4,16": _muon(8e-3),
        "HTEN 1,2": [*_adamw(4e-3), *_muon(4e-3, 8e-3)],
        "transformer": [*_adamw(1e-3, 4e-3), *_muon(4e-3, 8e-3, 16e-3)],
        "transformer, gated MLP": _muon(8e-3, 16e-3, 32e-3),
        "modern transformer": [*_muon(4e-3, 8e-3, 16e-3, 32e-3), *both],
        "modern transformer, short convolution": _muon(8e-3, 16e-3),
        "minGRU": [*_muon(4e-3, 8e-3, 16e-3), *both],
        "Mamba-2": [*_muon(4e-3, 8e-3, 16e-3), *both],
        "Mamba-2 without MLPs": _muon(8e-3),
        "gated delta net": [*_muon(4e-3, 8e-3, 16e-3), *both],
    }
    recipe = Recipe(steps=2000, rows=12 * 64 // context, evaluations=20)
    return Experiment(Characters(corpus, context), recipe, *_swept(models, sweep))


def _synthetic(task: Task, rows: int) -> Experiment:
    """Models of two layers of width 64 and 0.12 to 0.13 M parameters, the matrices by Muon.

    The embeddings are much of what has to be learned: AdamW has a high rate for them.
    """
    base = {"dim": 64, "n_layers": 2, "num_eigenstates": 64, "num_heads": 4}
    base |= {"max_timescale": 256.0, "energy_reg_weight": 0.0}
    matrix = {"state_dim": 16, "ffn_multiplier": 3.5}
    models = _networks(
        base,
        {
            "TEN": {},
            "TEN, short convolution": {"short_convolution": 4},
            "TEN, half turns by the input": {"selection_range": (8.0, 3.2)},
            "TEN, matrix layer first": {**matrix, "matrix_layers": (0,)},
            "TEN, matrix layer last": {**matrix, "matrix_layers": (1,)},
        },
    ) | _baselines(
        {"dim": 64, "n_layers": 2},
        {
            "modern transformer": {"mixer": "attention", "ffn_dim": 240},
            "modern transformer, short convolution": {
                "mixer": "attention",
                "ffn_dim": 240,
                "convolution": 4,
            },
            "minGRU": {
                "mixer": "min_gru",
                "ffn_dim": 196,
                "inner_dim": 128,
                "convolution": 4,
            },
            "Mamba-2": {
                "mixer": "mamba2",
                "ffn_dim": 148,
                "inner_dim": 128,
                "state_dim": 64,
            },
            "gated delta net": {
                "mixer": "delta_net",
                "ffn_dim": 146,
                "inner_dim": 128,
                "state_dim": 16,
                "negative_eigenvalues": True,
            },
        },
    )
    recipe = Recipe(steps=1000, rows=rows, learning_rate=4e-3, evaluations=20)
    sweep = dict.fromkeys(models, _muon(4e-3, 16e-3))
    return Experiment(task, recipe, *_swept(models, sweep))


def _tokens(data: Path) -> Experiment:
    """Models of the size of `pico` on prepared tokens, 512 of context."""
    base = {"dim": 160, "n_layers": 4, "num_eigenstates": 120, "num_heads": 2}
    base["max_timescale"] = 512.0
    wide = {**CONVOLVED, "num_eigenstates": 240, "num_heads": 8}
    wide["ffn_multiplier"] = 1.8125
    variants = {
        "transformer": {
            "mixer": "attention",
            "ffn_gate": False,
            "num_heads": 5,
            "ffn_multiplier": 4.9,
        },
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
        _networks(base, variants),
    )


def _networks(
    base: dict[str, Any], variants: dict[str, dict[str, Any]]
) -> dict[str, ModelConfig]:
    return {
        name: TemporalEigenstateConfig(**{**base, **fields})
        for name, fields in variants.items()
    }


def _baselines(
    base: dict[str, Any], variants: dict[str, dict[str, Any]]
) -> dict[str, ModelConfig]:
    return {
        name: BaselineConfig(**{**base, **fields}) for name, fields in variants.items()
    }


def _adamw(*rates: float) -> list[dict[str, float]]:
    return [{"learning_rate": rate} for rate in rates]


def _muon(*rates: float) -> list[dict[str, float]]:
    return [{"muon_learning_rate": rate} for rate in rates]


def _swept(
    models: dict[str, ModelConfig], sweep: dict[str, list[dict[str, float]]]
) -> tuple[dict[str, ModelConfig], dict[str, dict[str, float]]]:
    """Each model with each of its rates as a variant, and the rates by variant."""
    variants, changes = {}, {}
    for model, chosen in sweep.items():
        for rates in chosen:
            words = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
            words = words.replace("_learning_rate", "")
            words = words.replace("learning_rate", "AdamW")
            variants[f"{model}: {words}"] = models[model]
            changes[f"{model}: {words}"] = rates
    return variants, changes


SYNTHETIC: dict[str, tuple[Callable[[], Task], int]] = {
    "mqar": (AssociativeRecall, 16),
    "parity": (Parity, 64),
    "permutation": (lambda: PermutationWords(3), 64),
    "permutation-5": (lambda: PermutationWords(5), 64),
}
"""Tasks of rows drawn anew, and rows of a batch, by the names of their experiments."""

EXPERIMENTS = (
    "characters",
    "characters-tuned",
    "characters-256",
    "characters-256-tuned",
    "tokens",
    "ladder",
    "copying",
    *SYNTHETIC,
)
