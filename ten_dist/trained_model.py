"""The model of a run, loaded for use: no DeepSpeed, one process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Protocol

import torch
from torch import Tensor, nn

from ten_dist.checkpoint import (
    WEIGHT,
    CheckpointReader,
    checksum_damage,
    read_record,
)
from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.options import Options, metavar
from ten_dist.console import warn
from ten_dist.data.chat_template import ChatTemplate
from ten_dist.data.tokenizer import TextTokenizer, read_tokenizer_file
from ten_dist.errors import ConfigurationError
from ten_dist.generation import Decoder
from ten_dist.generation.decoder import StateCache
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.model.precision import autocast
from ten_dist.run_folder import RunFolder

_PARAMETERS_FOR_THREADS = 50_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """Which checkpoint of a run is used."""

    checkpoint: Annotated[str | None, metavar("STEP|PATH|best")] = None
    """Checkpoint of the run: its step, its folder, or best for the one with the lowest
    held-out loss; by default the newest."""


def tokenizer_of(folder: RunFolder) -> TextTokenizer:
    """The tokenizer of a run.

    Raises:
        ConfigurationError: the folder holds no run, or its tokenizer cannot be read.
    """
    separator_id = folder.read().data.separator_id
    path = folder.tokenizer_file
    content = read_tokenizer_file(path, str(path))
    return TextTokenizer.with_separator_id(content, separator_id)


def chat_template_of(folder: RunFolder) -> ChatTemplate:
    """The chat template of a run or of an exported model, which have it under one name;
    where there is none the own one, with a warning.

    Raises:
        ConfigurationError: it cannot be read, or Jinja2 is not installed.
    """
    path = folder.chat_template_file
    if not path.is_file():
        warn(
            "the model was not trained on conversations: they get ten_dist's own template"
        )
        return ChatTemplate.default()
    return ChatTemplate.read(path, str(path))


class WeightReader(Protocol):
    """What has the weights of a model."""

    def load_into(self, model: nn.Module) -> None:
        """Set all parameters and buffers of `model`."""


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A network with the weights of a checkpoint, computing as it was trained."""

    network: TemporalEigenstateNetwork
    checkpoint: Path
    device: torch.device
    precision: str
    """In which it computes: that of its training, but fp32 for fp16 on a CPU."""

    @classmethod
    def load(cls, folder: RunFolder, checkpoint: str | None = None) -> TrainedModel:
        """A checkpoint of a run, on the GPU if there is one.

        Args:
            folder: the run.
            checkpoint: as :meth:`RunFolder.chosen_checkpoint` takes it; by default the
                newest complete one.

        Raises:
            ConfigurationError: the folder holds no run, or no complete checkpoint, or
                its weights are damaged.
        """
        record = folder.read()
        path = folder.chosen_checkpoint(checkpoint)
        found = checksum_damage(path, kind=WEIGHT)
        if found is not None:
            raise ConfigurationError(
                f"{found}: remove {path}, and the one before is used"
            )
        with CheckpointReader(path) as reader:
            return cls.read(reader, path, record.model, record.training.precision)

    @classmethod
    def read(
        cls,
        reader: WeightReader,
        path: Path,
        config: TemporalEigenstateConfig,
        precision: str,
    ) -> TrainedModel:
        """A model whose weights a reader has.

        Args:
            reader: of the weights.
            path: where they lie.
            config: of the model.
            precision: of its training.

        Raises:
            ConfigurationError: they are damaged, or of a model of another shape.
        """
        # Values come from the file; making initial ones would take longer than reading.
        with torch.device("meta"):
            network = TemporalEigenstateNetwork(config)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = network.to_empty(device=device).eval()
        network.head.tie(network.embedding)
        reader.load_into(network)
        if precision == "fp16" and device.type == "cpu":
            warn("computing in fp32: processors are many times slower in fp16")
            precision = "fp32"
        return cls(network, path, device, precision)

    def fingerprint(self) -> str:
        """What tells the weights of a run's checkpoint from any others, by the checksums of
        their files."""
        files = read_record(self.checkpoint).files
        content = [(name, *dataclasses.astuple(files[name])) for name in sorted(files)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def autocast(self) -> torch.autocast:
        """Context in which the model computes in its precision."""
        return autocast(self.device, self.precision)

    def prefers_one_thread(self) -> bool:
        """Whether a step of decoding is too little work to share: threads would only wait
        for each other."""
        return self.network.num_parameters() < _PARAMETERS_FOR_THREADS

    def decoder(self, cache: StateCache | None = None) -> Decoder:
        """What continues prompts with this model, which is of no other use from then on."""
        dtypes = {"fp32": torch.float32, "fp16": torch.float16}
        self.network.freeze(dtypes.get(self.precision, torch.bfloat16))
        return Decoder(self.network, self.autocast, cache)

    def compute_losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses of a batch, [B, T] int64 each, on the model's device."""
        with self.autocast():
            return self.network.compute_loss(inputs, targets)
