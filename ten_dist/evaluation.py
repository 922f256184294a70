"""The cross-entropy of a model on held-out tokens, in the figures that a user compares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ten_dist.config.model import IGNORED_TARGET
from ten_dist.data import Manifest, TokenBatch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Cross-entropy of a model on a token set."""

    loss: float
    """Mean over the tokens that count, nats; not a number where none does."""
    tokens: int
    """Target tokens it is the mean of, those that count."""
    bytes_per_token: float
    """UTF-8 bytes of text a token, over the whole set."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy in bits per byte of text: comparable between tokenizers."""
        return self.loss / math.log(2) / self.bytes_per_token

    def metrics(self) -> dict[str, float]:
        """The figures under the names that metrics.jsonl uses."""
        return {
            "val_loss": self.loss,
            "val_perplexity": self.perplexity,
            "val_bits_per_byte": self.bits_per_byte,
            "val_tokens": self.tokens,
        }


def combine(results: Sequence[Evaluation], weights: Sequence[float]) -> Evaluation:
    """What the evaluations of several sets say of their mixture.

    Args:
        results: one of each set.
        weights: tokens of each in the mixture, relative to each other.
    """
    total = sum(weights)

    def mean(values: Iterable[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / total

    return Evaluation(
        loss=mean(result.loss for result in results),
        tokens=sum(result.tokens for result in results),
        bytes_per_token=mean(result.bytes_per_token for result in results),
    )


@torch.no_grad()
def evaluate(
    compute_losses: Callable[[Tensor, Tensor], dict[str, Tensor]],
    batches: Iterable[TokenBatch],
    manifest: Manifest,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda totals: totals,
) -> Evaluation:
    """Evaluate a model on batches of `manifest`.

    Args:
        compute_losses: (inputs, targets), both [B, T] on `device`, to a dict with
            `ce_loss`, the mean over targets that are not -100.
        batches: this rank's share.
        manifest: the set the batches come from.
        device: where to compute.
        sum_over_ranks: adds a tensor up over the ranks.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        targets = batch.targets.to(device)
        ce_loss = compute_losses(batch.inputs.to(device), targets)["ce_loss"]
        count = (targets != IGNORED_TARGET).sum()
        totals += torch.stack([ce_loss.double() * count, count.double()])
    loss_sum, tokens = sum_over_ranks(totals).tolist()
    return Evaluation(
        loss=loss_sum / tokens if tokens else math.nan,
        tokens=int(tokens),
        bytes_per_token=manifest.text_bytes / manifest.tokens,
    )
