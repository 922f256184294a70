"""The loss of a batch that is always the same: do loaded weights compute what they did?"""

from __future__ import annotations

import deepspeed
import torch

from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.errors import TrainingError
from ten_dist.model.precision import autocast

# Weights are float32 and equal to the bit. What may differ is the order in which another
# device, or another version of a kernel, adds up.
_TOLERANCE = {"fp32": 1e-4}
_LOW_PRECISION_TOLERANCE = 1e-2
# One row would be a case of its own for torch.compile.
_ROWS = 2


@torch.no_grad()
def probe_loss(
    engine: deepspeed.DeepSpeedEngine, ranks: Ranks, run: ResolvedRun
) -> float:
    """Cross-entropy, nats, of random tokens; every rank must call this.

    The tokens depend on the model's vocabulary and the run's sequence length only.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        run.model_config.vocab_size, (_ROWS, run.plan.seq_len + 1), generator=generator
    ).to(engine.device)
    engine.eval()
    with autocast(engine.device, run.training.precision):
        losses = engine(tokens[:, :-1], targets=tokens[:, 1:])
    engine.train()
    return ranks.mean(losses["ce_loss"].double()).item()


def check_probe(found: float, recorded: float, precisions: set[str]) -> None:
    """Compare the loss after loading with that at saving.

    Args:
        found, recorded: nats.
        precisions: of the run that loads, and of that which saved.

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
