"""Weights of a model from a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from ten_dist.checkpoint import WEIGHT, CheckpointReader


@torch.no_grad()
def load_weights(model: nn.Module, reader: CheckpointReader) -> None:
    """Set all parameters and buffers of `model` from a checkpoint.

    Raises:
        ConfigurationError: it is damaged, or of a model of another shape.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    reader.check_shapes({name: tensor.shape for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        tensor.copy_(reader.tensor(WEIGHT, name))
