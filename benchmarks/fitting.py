"""The training loop of the quality experiments: plain torch, one process.

The model, its loss, its parameter groups and the data are those of the project; DeepSpeed
is left out, since thousands of small runs would spend their time in starting it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from benchmarks.tasks import Task
from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.config.training import MUON_MOMENTUM
from ten_dist.model.precision import autocast
from ten_dist.optimizer.muon import Muon


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

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the peak at step `step` from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    config: TemporalEigenstateConfig, task: Task, recipe: Recipe, seed: int
) -> dict[str, float]:
    """Train a model from its initial weights and measure it.

    Args:
        config: the model; its vocabulary is replaced by that of the task.
        task: data and figures.
        recipe: how to train.
        seed: of the initial weights and of the data.

    Returns:
        The task's figures, and `parameters`.
    """
    torch.manual_seed(seed)
    config = dataclasses.replace(config, vocab_size=task.vocab_size)
    model = TemporalEigenstateNetwork(config)
    optimizer = _make_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.learning_rate_factor)
    context = autocast(torch.device("cpu"), recipe.precision)
    for inputs, targets in task.batches(recipe.rows, recipe.steps, seed):
        with context:
            losses = model.compute_loss(inputs, targets)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with context:
        figures = task.figures(model)
    return {**figures, "parameters": model.num_parameters()}


def _make_optimizer(
    model: TemporalEigenstateNetwork, recipe: Recipe
) -> torch.optim.Optimizer:
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
