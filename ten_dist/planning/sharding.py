"""How a model's parameters and the work on them are divided over ranks."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.deepspeed_config import offloads, zero_stage
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.optimizer.shared_matrices import (
    LogicalMatrix,
    rounds_of,
    split_weights,
)

Groups = tuple[tuple[int, ...], ...]
"""Elements of each parameter, in the order in which the optimizer has them: of those with
weight decay, and of those without; with Muon the matrices before them."""


@functools.lru_cache(maxsize=64)
def parameters_of(config: TemporalEigenstateConfig, optimizer: str = "adamw") -> Groups:
    """All parameters, as `--optimizer` has them; the tied weight is there once."""
    groups = meta_model(config).parameter_groups(0.0, optimizer == "muon")
    return tuple(tuple(p.numel() for p in group["params"]) for group in groups)


@functools.lru_cache(maxsize=64)
def matrices_of(config: TemporalEigenstateConfig) -> tuple[LogicalMatrix, ...]:
    """What Muon orthogonalizes."""
    model = meta_model(config)
    rows = model.hidden_matrices()
    shapes = {name: model.get_parameter(name).shape for name in rows}
    return tuple(split_weights(shapes, rows))


@functools.lru_cache(maxsize=64)
def rounds_of_muon(
    config: TemporalEigenstateConfig, ranks: int
) -> list[list[tuple[int, LogicalMatrix]]]:
    """Who orthogonalizes what, see :func:`rounds_of`."""
    return rounds_of(matrices_of(config), ranks)


def count_moments(config: TemporalEigenstateConfig, optimizer: str) -> int:
    """Numbers that an optimizer keeps: two of each parameter, one of a matrix of Muon's."""
    groups = parameters_of(config, optimizer)
    return 2 * count(groups) - (sum(groups[0]) if optimizer == "muon" else 0)


def meta_model(config: TemporalEigenstateConfig) -> TemporalEigenstateNetwork:
    """The network without any values."""
    with torch.device("meta"):
        return TemporalEigenstateNetwork(config)


def count(groups: Groups) -> int:
    """Elements of all of them together."""
    return sum(map(sum, groups))


def touched_elements(groups: Groups, ranks: int) -> int:
    """Elements of all parameters that reach into the partition of a rank, the largest.

    At stages 1 and 2 the parameters of a group lie one behind the other, and each rank
    has an equal range. DeepSpeed copies the gradient of every parameter in it whole.
    """
    totals = [0] * ranks
    for group in groups:
        share = math.ceil(sum(group) / ranks)
        start = 0
        for elements in group:
            for rank in range(start // share, (start + elements - 1) // share + 1):
                totals[rank] += elements
            start += elements
    return max(totals)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How the state of training is divided; the keys of ds_configs/."""

    stage: int
    """Of ZeRO, 0 to 3."""
    ranks: int
    offload: bool = False
    """The optimizer's weights and moments in host memory."""
    offload_parameters: bool = False
    """The parameters of the model, too, at stage 3."""
    bucket: int = 50_000_000
    """Elements that are communicated at one time: reduce_bucket_size, and
    stage3_prefetch_bucket_size."""
    persistence_threshold: int = 100_000
    """Parameters of fewer elements stay whole on every rank at stage 3."""
    reuse_distance: int = 100_000_000
    """Elements: a gathered parameter that is needed again within this is kept."""

    @classmethod
    def from_file(cls, content: dict[str, Any], ranks: int = 1) -> Sharding:
        """That of a DeepSpeed configuration, by :func:`load_deepspeed_file`.

        Where a key is missing, what ds_configs/ say counts, not what DeepSpeed does.
        """
        zero = content.get("zero_optimization", {})
        names = {
            "bucket": "reduce_bucket_size",
            "persistence_threshold": "stage3_param_persistence_threshold",
            "reuse_distance": "stage3_max_reuse_distance",
        }
        return cls(
            stage=zero_stage(content),
            ranks=ranks,
            offload=offloads(content, "offload_optimizer"),
            offload_parameters=offloads(content, "offload_param"),
            **{field: int(zero[key]) for field, key in names.items() if key in zero},
        )


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a rank computes at one time."""

    rows: int
    """Of a micro-batch."""
    seq_len: int
    accumulation_steps: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    on_cpu: bool = False
    """On a CPU memory that nobody has touched costs nothing."""


def gathered_again(config: TemporalEigenstateConfig, sharding: Sharding) -> float:
    """Elements that stage 3 gathers for forward and once more for backward.

    DeepSpeed keeps a gathered parameter where it is needed again before `reuse_distance`
    elements of others were, or where gathering ahead comes past it. From its forward to
    its backward that of a block sees those of all later blocks twice, or three times where
    blocks are computed again. What is gathered ahead makes this a little too much: 8 % of
    all that is sent for `micro`, by DeepSpeed's comms logger.
    """
    head = config.vocab_size * config.dim
    blocks = count(parameters_of(config)) - head
    times = 3 if config.gradient_checkpointing == "block" else 2
    distance = max(sharding.reuse_distance, sharding.bucket)
    kept = max(0.0, (distance - head) / times)
    return max(0.0, blocks - kept)
