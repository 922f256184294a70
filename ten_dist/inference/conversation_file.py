"""Conversations in files: the state of a model in safetensors, as large after any length.

The metadata tell the model that the state is of, and a checksum of all else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import printable, write_bytes
from ten_dist.inference.conversation import ConversationState
from ten_dist.model.network import NetworkState
from ten_dist.model.state import named_leaves, of_named_leaves, state_tensors

_FORMAT = "ten_dist.conversation.1"


def save_conversation(path: Path, state: ConversationState, model: str) -> int:
    """Write a conversation; returns the bytes of the file.

    Args:
        path: replaced atomically.
        state: of a conversation that has begun.
        model: what identifies the model, see
            :meth:`ten_dist.trained_model.TrainedModel.fingerprint`.

    Raises:
        ConfigurationError: the conversation has not begun.
        OSError: the file cannot be written.
    """
    if state.network is None:
        raise ConfigurationError("nothing has been said that could be saved")
    leaves = named_leaves(state.network)
    tensors = {name: leaf.cpu().contiguous() for name, leaf in leaves}
    values = dataclasses.asdict(dataclasses.replace(state, network=None))
    text = json.dumps(values)
    metadata = {"format": _FORMAT, "model": model, "conversation": text}
    metadata["sha256"] = _checksum(tensors, metadata)
    content = save(tensors, metadata)
    write_bytes(path, content)
    return len(content)


def load_conversation(path: Path, model: str, like: NetworkState) -> ConversationState:
    """Read a conversation.

    Args:
        path: what :func:`save_conversation` wrote.
        model: as there.
        like: a state of one row of the model, on its device.

    Raises:
        DataError: it cannot be read, is damaged, or is of another model.
    """
    shown = printable(str(path))
    try:
        tensors, metadata = _read(path)
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}") from None
    except SafetensorError:
        raise DataError(f"{shown} is no file of a conversation") from None
    if metadata.get("format") != _FORMAT:
        raise DataError(f"{shown} is no file of a conversation")
    if metadata.pop("sha256", None) != _checksum(tensors, metadata):
        raise DataError(f"{shown} is damaged: it does not have its checksum")
    if metadata.get("model") != model:
        raise DataError(f"{shown} is of a conversation with another model")
    try:
        values = json.loads(metadata["conversation"])
        values["unread"] = tuple(values["unread"])
        device = next(state_tensors(like)).device
        placed = {name: tensor.to(device) for name, tensor in tensors.items()}
        values["network"] = of_named_leaves(placed, like)
        return ConversationState(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{shown} is damaged: {error!r}") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    # The library does not say what the system says.
    path.open("rb").close()
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
