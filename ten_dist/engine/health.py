"""Whether a step may update the weights: losses that are not finite, and spikes.

The loss of a step is judged on the device before its last backward pass. A bad loss is
replaced by NaN there, so that no rank can apply its gradients: the host does not wait for
the verdict, and a loss spike is caught before its update. Spikes of the gradient norm are
seen after the update, which clipping has bounded.

A spike lies more than `threshold` standard deviations above the mean of the last steps
(z-score); for gradient norms, which vary by factors, logarithms are compared. Checkpoints
keep the window, so that a resumed run judges like one that was never interrupted.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ten_dist.checkpoint import HealthState

WINDOW = 128
# The spread of fewer values says little.
_FEWEST = 32
# As a part of the mean, so that a loss that has converged can still move.
_SMALLEST_DEVIATION = 1e-3
# A gradient of zero has no logarithm.
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """What was wrong with a step."""

    kind: str
    """not_finite, loss_spike or gradient_spike."""
    value: float
    """Loss or gradient norm."""
    z_score: float | None
    """Of a spike."""

    @property
    def applied(self) -> bool:
        """Whether the weights were updated all the same."""
        return self.kind == "gradient_spike"

    def describe(self) -> str:
        """The finding in words."""
        if self.kind == "not_finite":
            return "loss or gradient is not finite"
        what = "loss" if self.kind == "loss_spike" else "gradient norm"
        return (
            f"the {what} is {self.value:.4g}, {self.z_score:.1f} standard deviations "
            "above those of the steps before"
        )


def _z_score(values: Sequence[float], value: Tensor, logarithmic: bool) -> Tensor:
    """Standard deviations of a value above the mean of others; 0 where they are few.

    Args:
        values: the last ones.
        value: float64 scalar, on any device.
        logarithmic: whether logarithms are compared.
    """
    if len(values) < _FEWEST:
        return torch.zeros_like(value)
    window = value.new_tensor(list(values))
    unit = window.mean().abs()
    if logarithmic:
        # A small difference of logarithms is a part of the value.
        window, value = (v.clamp_min(_TINY).log() for v in (window, value))
        unit = torch.ones_like(unit)
    deviation = torch.maximum(window.std(), _SMALLEST_DEVIATION * unit)
    return (value - window.mean()) / deviation


class Health:
    """Judges the steps of a run.

    Args:
        threshold: z-score from which a value is a spike; 0 looks for none.
        state: as :meth:`state` gave it.
    """

    def __init__(self, threshold: float, state: HealthState) -> None:
        self._threshold = threshold or math.inf
        self._losses = collections.deque(state.losses, WINDOW)
        self._norms = collections.deque(state.gradient_norms, WINDOW)
        self.skipped_steps = state.skipped_steps
        """Steps of the run without an update, but for those of an overflow alone."""
        self.consecutive = state.consecutive
        """Of those, the last in a row."""
        self._z_score = torch.zeros(())

    def factor(self, loss: Tensor) -> Tensor:
        """What the loss of this rank must be multiplied with: 1, or NaN.

        Args:
            loss: of the step, the mean over all ranks, a scalar on the device.
        """
        self._z_score = _z_score(self._losses, loss.double(), False)
        bad = ~loss.isfinite() | (self._z_score > self._threshold)
        return torch.where(bad, torch.nan, 1.0).to(loss.dtype)

    def only_gradient_overflowed(self, loss: float, gradient_norm: float) -> bool:
        """Whether only the gradient was wrong, as too large a loss scale makes it.

        Such a step is no anomaly, and not part of the window. Arguments as of
        :meth:`judge`.
        """
        right = math.isfinite(loss) and float(self._z_score) <= self._threshold
        return right and not math.isfinite(gradient_norm)

    def judge(self, loss: float, gradient_norm: float) -> Anomaly | None:
        """What was wrong with a step.

        Args:
            loss: the one that :meth:`factor` was asked about.
            gradient_norm: before clipping; not finite where the step was not applied.
        """
        z_score = float(self._z_score)
        norm = torch.tensor(gradient_norm, dtype=torch.float64)
        anomaly = None
        if z_score > self._threshold:
            anomaly = Anomaly("loss_spike", loss, z_score)
        elif not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            anomaly = Anomaly("not_finite", loss, None)
        elif (norm_z := float(_z_score(self._norms, norm, True))) > self._threshold:
            anomaly = Anomaly("gradient_spike", gradient_norm, norm_z)
        if anomaly is not None and not anomaly.applied:
            self.skipped_steps += 1
            self.consecutive += 1
            return anomaly
        self.consecutive = 0
        if anomaly is None:
            self._losses.append(loss)
            self._norms.append(gradient_norm)
        return anomaly

    def state(self) -> HealthState:
        """What a checkpoint keeps."""
        return HealthState(
            list(self._losses),
            list(self._norms),
            self.skipped_steps,
            self.consecutive,
        )
