"""The training loop of the quality experiments: plain torch, one process.

The model, its loss, its parameter groups and the data are those of the project; DeepSpeed
is left out, since thousands of small runs would spend their time in starting it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Baseline, BaselineConfig
from benchmarks.tasks import Task
from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.config.training import MUON_MOMENTUM
from ten_dist.model.precision import autocast
from ten_dist.model.trainable_model import TrainableModel
from ten_dist.optimizer.muon import Muon

ModelConfig = TemporalEigenstateConfig | BaselineConfig

SECONDS_UNSAVED = 120.0
"""Seconds of training after which a checkpoint is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained: linear warm-up, cosine to a tenth of the peak."""

    steps: int
    rows: int
    """Rows of a batch."""
    learning_rate: float = 1e-3
    """Peak of AdamW."""
    muon_learning_rate: float | None = None
    """Peak of Muon for the matrices; without it AdamW has them, too."""
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clipping: float = 1.0
    precision: str = "fp32"
    evaluations: int = 0
    """Points of the curve of held-out loss, evenly over the steps."""

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the peak at step `step` from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))

    def evaluates_after(self, step: int) -> bool:
        """Whether the curve has a point after `step` steps."""
        every = self.steps // self.evaluations if self.evaluations else 0
        return every > 0 and step % every == 0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Variants of a model, a task and a recipe."""

    task: Task
    recipe: Recipe
    variants: dict[str, ModelConfig]
    changes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Fields of the recipe by variant, where they are its own."""

    def recipe_of(self, variant: str) -> Recipe:
        """How a variant is trained."""
        return dataclasses.replace(self.recipe, **self.changes.get(variant, {}))


def make_model(config: ModelConfig) -> TrainableModel:
    """A model with initial weights that depend on torch's seed alone."""
    if isinstance(config, BaselineConfig):
        return Baseline(config)
    return TemporalEigenstateNetwork(config)


def fit(
    config: ModelConfig,
    task: Task,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train a model from its initial weights and measure it.

    Args:
        config: the model; its vocabulary is replaced by that of the task.
        task: data and figures.
        recipe: how to train.
        seed: of the initial weights and of the data.
        checkpoint: file in which the training is kept from time to time, and from which it
            goes on where it is there; at the end it is deleted.

    Returns:
        The task's figures; `parameters`; `seconds` of processor time in training alone;
        and, where the recipe evaluates, `curve`: [step, seconds, quick loss] of each time.
    """
    torch.manual_seed(seed)
    model = make_model(dataclasses.replace(config, vocab_size=task.vocab_size))
    training = _Training(model, recipe)
    if checkpoint is not None and checkpoint.is_file():
        training.load(checkpoint)
    context = autocast(torch.device("cpu"), recipe.precision)
    batches = task.batches(recipe.rows, recipe.steps, seed)
    last_saved = time.monotonic()
    for inputs, targets in itertools.islice(batches, training.step, None):
        training.make_step(inputs, targets, context)
        if recipe.evaluates_after(training.step):
            training.evaluate(task, context)
        if checkpoint is not None and time.monotonic() - last_saved > SECONDS_UNSAVED:
            training.save(checkpoint)
            last_saved = time.monotonic()
    model.eval()
    with context:
        figures: dict[str, Any] = task.figures(model)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    if training.curve:
        figures["curve"] = training.curve
    return {
        **figures,
        "seconds": training.seconds,
        "parameters": model.num_parameters(),
    }


class _Training:
    """A model on its way: after `step` steps and `seconds` of processor time."""

    def __init__(self, model: TrainableModel, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.optimizer = _make_optimizer(model, recipe)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float, float]] = []

    def make_step(
        self, inputs: Tensor, targets: Tensor, context: torch.autocast
    ) -> None:
        """One step on one batch."""
        started = time.process_time()
        factor = self.recipe.learning_rate_factor(self.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        with context:
            losses = self.model.compute_loss(inputs, targets)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.process_time() - started

    def evaluate(self, task: Task, context: torch.autocast) -> None:
        """Add a point to the curve."""
        self.model.eval()
        with context:
            loss = task.quick_loss(self.model)
        self.model.train()
        self.curve.append((self.step, self.seconds, loss))

    def save(self, path: Path) -> None:
        """Keep everything that the next step depends on, all or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        content = {
            "model": self.model.state_dict(),
            "moments": [self.optimizer.state[p] for p in self.model.parameters()],
            "progress": (self.step, self.seconds, self.curve),
        }
        torch.save(content, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Go on where :meth:`save` was."""
        content = torch.load(path)
        self.model.load_state_dict(content["model"])
        for parameter, moments in zip(self.model.parameters(), content["moments"]):
            self.optimizer.state[parameter].update(moments)
        self.step, self.seconds, self.curve = content["progress"]


def _make_optimizer(model: TrainableModel, recipe: Recipe) -> torch.optim.Optimizer:
    """As training has it, in one process."""
    rate = recipe.muon_learning_rate
    groups = model.parameter_groups(
        recipe.weight_decay, matrices_apart=rate is not None
    )
    matrices = groups.pop(0) if rate is not None else {}
    adamw = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True
    )
    if rate is None:
        return adamw
    muon = Muon({**matrices, "lr": rate, "momentum": MUON_MOMENTUM}, adamw)
    rows = model.hidden_matrices()
    muon.keep_whole({name: model.get_parameter(name) for name in rows}, rows)
    return muon
