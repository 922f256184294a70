"""A batch that is always the same: do weights compute what they did, and a recurrence?"""

from __future__ import annotations

import dataclasses
import math

import deepspeed
import torch

from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.watched_scans import watched
from ten_dist.errors import TrainingError
from ten_dist.recurrence.bound import EnergyBound

# Weights are float32 and equal to the bit, but another device, or another version of a
# kernel, may add up in another order.
_TOLERANCE = {"fp32": 1e-4}
_LOW_PRECISION_TOLERANCE = 1e-2
# What rounding of states to 16 bits may add to the bound of their energy.
_BOUND_TOLERANCE = 1e-2
_ROWS = 2


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a model makes of the batch."""

    loss: float
    """Cross-entropy, nats a token."""
    energy_bound_ratio: float
    """Largest sqrt(E(t)) of all layers beside its bound (docs/model.md#energy-bound)."""
    eigenvalue_distance: float
    """Least 1 - |lambda| of all layers."""

    def check(self) -> None:
        """Check that a recurrence has been computed.

        Raises:
            TrainingError: it has not, or the loss is not finite.
        """
        if not math.isfinite(self.loss):
            raise TrainingError("the weights give a loss that is not finite")
        if not self.energy_bound_ratio <= 1 + _BOUND_TOLERANCE:
            raise TrainingError(
                "an eigenstate is larger than its inputs can have made it, "
                f"{self.energy_bound_ratio:.4f} times the bound of theorem 4: the scan "
                "does not compute the recurrence; try another --scan_backend"
            )
        if not self.eigenvalue_distance >= 0:
            raise TrainingError("an eigenvalue lies outside of the unit circle")


@torch.no_grad()
def run_probe(
    engine: deepspeed.DeepSpeedEngine, ranks: Ranks, run: ResolvedRun
) -> Probe:
    """Run the model on random tokens; every rank must call this.

    The tokens depend on the model's vocabulary and the run's sequence length only.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        run.model_config.vocab_size,
        (_ROWS, run.schedule.seq_len + 1),
        generator=generator,
    ).to(engine.device)
    with watched(engine, run, EnergyBound()) as bound:
        losses = engine(tokens[:, :-1], targets=tokens[:, 1:])
    return Probe(
        loss=ranks.mean(losses["ce_loss"].double()).item(),
        energy_bound_ratio=bound.largest_ratio,
        eigenvalue_distance=bound.eigenvalue_distance,
    )


def check_probe(found: float, recorded: float, precisions: set[str]) -> None:
    """Compare the loss after loading with that at saving, nats a token.

    Args:
        found, recorded: the two.
        precisions: of the runs that load and saved.

    Raises:
        TrainingError: they differ by more than rounding.
    """
    tolerance = max(_TOLERANCE.get(p, _LOW_PRECISION_TOLERANCE) for p in precisions)
    # A loss that is not a number fails as well.
    if not abs(found - recorded) <= tolerance * abs(recorded):
        raise TrainingError(
            f"the loaded weights are not those that were saved: the loss of the "
            f"checkpoint's probe is {found:.6f} and was {recorded:.6f}. Continue from an "
            "older checkpoint: --resume PATH in another --output_dir"
        )
