"""Weights of a model in one safetensors file."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ten_dist.errors import ConfigurationError


@torch.no_grad()
def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Set all parameters and buffers of `model` from a file that a checkpoint holds.

    A tied weight is in the file once, under its first name.

    Raises:
        ConfigurationError: the file is damaged, or of a model of another shape.
    """
    try:
        values = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in sorted(tensors.keys() ^ values.keys()):
        raise ConfigurationError(
            f"{path} is of another model: {name} is only in "
            f"{'the model' if name in tensors else 'the file'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != values[name].shape:
            raise ConfigurationError(
                f"{path} is of another model: {name} is {list(values[name].shape)}, "
                f"not {list(tensor.shape)}"
            )
        tensor.copy_(values[name])
