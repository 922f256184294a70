"""AdamW with weight decay where it belongs."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from ten_dist.config.training import TrainingConfig
from ten_dist.deepspeed_config import offloads
from ten_dist.model import TemporalEigenstateNetwork


def make_optimizer(
    model: TemporalEigenstateNetwork,
    training: TrainingConfig,
    deepspeed_config: dict[str, Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW over two groups: matrices with weight decay, everything else without.

    Recurrence parameters, norms and biases take no decay (docs/model.md#scan). The learning rate
    is set at every step by the trainer.
    """
    groups = model.parameter_groups(training.weight_decay)
    options = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
    }
    if device.type == "cuda" and offloads(deepspeed_config, "offload_optimizer"):
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    # One pass over each tensor, without copies of it on the way, on CPUs as well.
    return torch.optim.AdamW(groups, fused=True, **options)
