"""How long an optimizer step takes, as a sum of terms that are all told.

Floating-point operations are counted from the model itself. Nothing here was measured on
a GPU. The peak and the bandwidths are those of data sheets; how much of the peak is
reached, how much of a link, and what is hidden behind the computation are assumptions,
which are arguments.
"""

from __future__ import annotations

import dataclasses
import functools

from torch import nn

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.attention import CausalSelfAttention
from ten_dist.model.eigenstate_module import RECURRENCE_PARAMETERS
from ten_dist.model.hierarchy import MixedScale
from ten_dist.model.matrix_mixer import MatrixMixer
from ten_dist.model.mixer import EigenstateMixer
from ten_dist.planning.communication import Topology, collectives_of_step
from ten_dist.planning.sharding import (
    Sharding,
    Workload,
    count,
    meta_model,
    parameters_of,
    rounds_of_muon,
)


@dataclasses.dataclass(frozen=True)
class Operations:
    """What a model computes in training."""

    per_token: float
    """Forward and backward of a token, the operations that utilization is told of."""
    recomputed_per_token: float
    """Forward of the blocks again, where checkpointing keeps no activations of them."""
    per_micro_batch: float
    """Whatever the number of tokens is: the coupling, which multiplies weights."""

    def of_micro_batch(self, tokens: int) -> float:
        """All operations that are executed for a micro-batch of so many tokens."""
        each = self.per_token + self.recomputed_per_token
        return tokens * each + self.per_micro_batch


@functools.lru_cache(maxsize=64)
def count_operations(config: TemporalEigenstateConfig, steps: int) -> Operations:
    """Operations of a network in training on sequences of `steps` tokens."""
    model = meta_model(config)
    per_token = training_flops_per_token(model, steps)
    recomputed, coupling = 0.0, 0.0
    recomputes = config.gradient_checkpointing == "block"
    if recomputes:
        # Forward is a third. The head keeps what it needs, and torch stops where backward
        # has all that it needs: before the last product of a block.
        last = 2 * config.n_layers * config.ffn_dim * config.dim
        recomputed = (per_token - 6 * model.head.weight.numel()) / 3 - last
    for module in model.modules():
        if isinstance(module, EigenstateMixer):
            head = module.num_eigenstates // module.num_heads
            products = 2 * module.output_weight.numel() * head
            coupling += (4 if recomputes else 3) * products
    return Operations(per_token, recomputed, coupling)


def training_flops_per_token(model: nn.Module, steps: int) -> float:
    """Operations of forward and backward for one token of a sequence of `steps`.

    6 for each element of each matrix that a token is multiplied with: all weights of the
    blocks, those of scale s of a hierarchy at its rate, 1/s, and the head. Not counted:
    the embedding, which is looked up; the coupling of the eigenstates, which multiplies a
    weight once a step; norms, biases and the scan, a few operations a number; and what
    checkpointing computes again.

    Attention adds its two products with the (steps + 1) / 2 positions that a token sees
    on average, a matrix layer the update and the read-out of its states
    (docs/model.md#matrix-states), backward twice that.
    """
    rate: dict[int, float] = {}
    products = 0.0
    for module in model.modules():
        if isinstance(module, MixedScale):
            # The first of each `scale` tokens makes a coarse step.
            ticks = -(-steps // module.scale)
            rate |= {id(p): ticks / steps for p in module.parameters()}
        elif isinstance(module, CausalSelfAttention):
            # Forward 2 products of 2 operations an element, backward twice that.
            products += 12 * module.output_weight.shape[0] * (steps + 1) / 2
        elif isinstance(module, MatrixMixer):
            ticks = -(-steps // module.step)
            numbers = module.num_eigenstates * module.state_dim
            products += 3 * 14 * numbers * ticks / steps
    # The head is the embedding, which named_parameters() names once. Vectors are norms,
    # biases and eigenvalues.
    matrices = sum(
        parameter.numel() * rate.get(id(parameter), 1)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.split(".")[-1] not in RECURRENCE_PARAMETERS
    )
    return 6 * matrices + products


# Of AdamW in float32, a parameter: weight, gradient and both moments are read, all but
# the gradient are written.
_BYTES_OF_UPDATE = 28
# Of Muon, whose products are counted apart: mean of the gradient, Nesterov's sum, decay of
# the weight and its step read two numbers each, but for the decay, and write one.
_BYTES_OF_MUON = 44
# Tokens a second that one reading process delivers. Reading goes on beside training.
TOKENS_READ_PER_SECOND = 500_000


@dataclasses.dataclass(frozen=True)
class Speeds:
    """How fast a GPU is assumed to be."""

    peak_flops: float
    utilization: float
    """Share of the peak that executed operations reach."""
    memory_bandwidth: float
    """Bytes a second."""
    host_bandwidth: float = 32e9
    """Bytes a second, one way, between a GPU and host memory, for offload."""
    overlap: float = 0.0
    """Share of the computation that communication can hide behind."""


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by term."""

    compute: float
    """Forward and backward of all micro-batches of a rank, what is recomputed included."""
    communication: float
    """All collectives one after the other."""
    hidden: float
    """Of the communication, what goes on beside the computation."""
    update: float
    """AdamW, which is as fast as memory is; Muon's products."""
    data: float
    """Reading the rows. It goes on beside the step, and counts where it is longer."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        step = self.compute + self.communication - self.hidden + self.update
        return max(step, self.data)


def flops_of_update(
    config: TemporalEigenstateConfig, sharding: Sharding, work: Workload
) -> float:
    """Operations of Newton-Schulz in a step, of the rank that has most; 0 with AdamW."""
    if work.optimizer != "muon":
        return 0.0
    owned = [0] * sharding.ranks
    for taken in rounds_of_muon(config, sharding.ranks):
        for owner, matrix in taken:
            owned[owner] += matrix.flops
    return max(owned)


def step_time(
    config: TemporalEigenstateConfig,
    sharding: Sharding,
    work: Workload,
    topology: Topology,
    speeds: Speeds,
) -> StepTime:
    """Time of a step on every rank of `topology`."""
    tokens = work.rows * work.seq_len
    operations = count_operations(config, work.seq_len)
    executed = operations.of_micro_batch(tokens) * work.accumulation_steps
    compute = executed / (speeds.peak_flops * speeds.utilization)
    communication = sum(
        topology.seconds(collective)
        for collective in collectives_of_step(config, sharding, work)
    )
    groups = parameters_of(config, work.optimizer)
    matrices = sum(groups[0]) if work.optimizer == "muon" else 0
    updated = _BYTES_OF_UPDATE * (count(groups) - matrices) + _BYTES_OF_MUON * matrices
    share = 1 / sharding.ranks if sharding.stage else 1.0
    bandwidth = speeds.memory_bandwidth
    if sharding.offload:
        # Gradients to the host, weights back; the update itself is the CPU's.
        bandwidth = speeds.host_bandwidth
    return StepTime(
        compute=compute,
        communication=communication,
        hidden=min(communication, speeds.overlap * compute),
        update=share * updated / bandwidth
        + flops_of_update(config, sharding, work)
        / (speeds.peak_flops * speeds.utilization),
        data=tokens * work.accumulation_steps / TOKENS_READ_PER_SECOND,
    )
