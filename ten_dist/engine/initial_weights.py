"""`--init_from`: a new run that begins with the weights of another model.

They come from a run, one of its checkpoints, or an exported model; moments, step, order
of the data and schedule begin anew, on any data, batch, precision, stage and ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ten_dist.checkpoint import WEIGHT, CheckpointReader, damage, read_record
from ten_dist.checkpoint.record import RECORD_NAME
from ten_dist.data.tokenizer import TextTokenizer, read_tokenizer
from ten_dist.engine.checkpointing.held_state import held_state
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.errors import ConfigurationError
from ten_dist.export.huggingface import exported_config, exported_name
from ten_dist.run_folder import RunFolder

# These say how a model begins or is trained, not what its weights mean.
_FREE = {
    "dropout",
    "eigenvalue_init",
    "max_timescale",
    "depth_increasing_memory",
    "document_separator_id",
}


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Where the weights of a new run lie."""

    path: Path
    """A checkpoint, or the folder of an exported model."""
    exported: bool


class ExportedReader(contextlib.ExitStack):
    """Tensors of an exported model, read as those of a checkpoint are.

    Raises:
        ConfigurationError: it is no such model, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._last: tuple[str, Tensor] | None = None
        try:
            for path in sorted(folder.glob("model*.safetensors")):
                file = self.enter_context(safe_open(path, framework="pt"))
                self._files.update(dict.fromkeys(file.keys(), file))
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(
                f"--init_from {folder} cannot be read: {error}"
            ) from None
        if not self._files:
            raise ConfigurationError(
                f"--init_from {folder} has no model*.safetensors on every node"
            )

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole weight, float32."""
        if self._last is None or self._last[0] != name:
            key = exported_name(name)
            self._last = (name, self._files[key].get_tensor(key).float())
        return self._last[1]

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a weight in row-major order, float32."""
        return self.tensor(kind, name).flatten()[start:stop]

    def check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a model that lacks tensors of these shapes.

        Raises:
            ConfigurationError: it is one.
        """
        for name, shape in shapes.items():
            key = exported_name(name)
            if key not in self._files:
                raise ConfigurationError(f"--init_from {self._folder} lacks {key}")
            found = list(self._files[key].get_slice(key).get_shape())
            if found != list(shape):
                raise ConfigurationError(
                    f"--init_from {self._folder} is of another model: {name} is {found}, "
                    f"not {list(shape)}"
                )


def find_initial_weights(run: ResolvedRun) -> InitialWeights:
    """What `--init_from` names.

    Raises:
        ConfigurationError: there is none, or it is of another model than the run's or
            of another tokenizer.
    """
    given = Path(run.training.init_from or "")
    path = given
    theirs = _exported_config(given)
    if theirs is not None:
        weights = InitialWeights(given, exported=True)
        _check_exported_tokenizer(run, given)
        if theirs.get("tie_word_embeddings") is False:
            raise ConfigurationError(
                f"--init_from {given} has a head of its own, where ours shares the "
                "embedding"
            )
    else:
        if RunFolder(given).exists():
            path = RunFolder(given).usable_checkpoint()
        if not (path / RECORD_NAME).is_file():
            raise ConfigurationError(
                f"--init_from {given} is neither the folder of a run, nor a checkpoint, "
                "nor a model of `ten-dist export`"
            )
        found = damage(path)
        if found is not None:
            raise ConfigurationError(f"--init_from {given} cannot be used: {found}")
        weights = InitialWeights(path, exported=False)
        theirs = read_record(path).state_identity
        # checkpoints/step_N of a run.
        folder = RunFolder(path.resolve().parent.parent)
        if folder.exists():
            _check_tokenizer(run, folder.read().data.tokenizer_sha256)
    ours = exported_config(run.model_config)
    differ = [
        f"{name} is {theirs.get(name)} there and {value} here"
        for name, value in ours.items()
        if name not in _FREE and theirs.get(name) != value
    ]
    if differ:
        raise ConfigurationError(
            f"--init_from {given} is of another model: {', '.join(differ)}: give the "
            "options of that model"
        )
    return weights


def _exported_config(path: Path) -> dict[str, Any] | None:
    """The configuration of an exported model; None where the folder is another."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and content.get("model_type") == "ten"
    return content if ours else None


def _check_tokenizer(run: ResolvedRun, sha256: str) -> None:
    for manifest in run.manifests()[:1]:
        if manifest.tokenizer_sha256 != sha256:
            raise ConfigurationError(
                f"--init_from {run.training.init_from} is of another tokenizer than "
                f"--data {run.training.data}: prepare the data with the tokenizer.json "
                "that lies there"
            )


def _check_exported_tokenizer(run: ResolvedRun, path: Path) -> None:
    for manifest in run.manifests()[:1]:
        ours = TextTokenizer.with_separator_id(
            read_tokenizer(manifest).decode("utf-8-sig"), manifest.separator_id
        ).to_json()
        try:
            theirs = (path / "tokenizer.json").read_text(encoding="utf-8")
        except (OSError, ValueError):
            theirs = ""
        same = theirs == ours
        digest = hashlib.sha256(ours.encode()).hexdigest()
        _check_tokenizer(run, manifest.tokenizer_sha256 if same else digest)


@torch.no_grad()
def load_initial_weights(
    engine: deepspeed.DeepSpeedEngine, ranks: Ranks, weights: InitialWeights
) -> None:
    """Set the weights of a run that has made no step; every rank must call this.

    Args:
        engine: of the run.
        ranks: of the run.
        weights: as :func:`find_initial_weights` gives them on the first rank.

    Raises:
        ConfigurationError: it is damaged.
    """
    held = held_state(engine, ranks)
    with ranks.agreeing():
        source: CheckpointReader | ExportedReader
        reader = ExportedReader if weights.exported else CheckpointReader
        with reader(weights.path) as source:
            source.check_shapes(held.shapes)

            def read(kind: str, name: str, start: int, stop: int) -> Tensor:
                # Moments begin anew.
                if kind != WEIGHT:
                    return torch.zeros(stop - start)
                return source.read(kind, name, start, stop)

            held.load(read, 0)
            for name, buffer in held.buffers.items():
                buffer.copy_(source.tensor(WEIGHT, name))
    held.settle()
