"""How long an optimizer step takes, as a sum of terms that are all told.

Nothing here was measured on a GPU. The peak and the bandwidths are those of data sheets;
how much of the peak is reached, how much of a link, and what is hidden behind the
computation are assumptions, which are arguments.
"""

from __future__ import annotations

import dataclasses

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.planning.communication import collectives_of_step
from ten_dist.planning.flops import Operations
from ten_dist.planning.parameters import count, parameters_of
from ten_dist.planning.sharding import Sharding, Workload
from ten_dist.planning.topology import Topology

# Of AdamW in float32, a parameter: weight, gradient and both moments are read, all but
# the gradient are written.
_BYTES_OF_UPDATE = 28
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
    """AdamW, which is as fast as memory is."""
    data: float
    """Reading the rows. It goes on beside the step, and counts where it is longer."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        step = self.compute + self.communication - self.hidden + self.update
        return max(step, self.data)


def step_time(
    config: TemporalEigenstateConfig,
    operations: Operations,
    sharding: Sharding,
    work: Workload,
    topology: Topology,
    speeds: Speeds,
) -> StepTime:
    """Time of a step on every rank of `topology`."""
    tokens = work.rows * work.seq_len
    executed = operations.of_micro_batch(tokens) * work.accumulation_steps
    compute = executed / (speeds.peak_flops * speeds.utilization)
    communication = sum(
        topology.seconds(collective)
        for collective in collectives_of_step(config, sharding, work)
    )
    elements = count(parameters_of(config))
    updated = elements / (sharding.ranks if sharding.stage else 1)
    bandwidth = speeds.memory_bandwidth
    if sharding.offload:
        # Gradients to the host, weights back; the update itself is the CPU's.
        bandwidth = speeds.host_bandwidth
    return StepTime(
        compute=compute,
        communication=communication,
        hidden=min(communication, speeds.overlap * compute),
        update=_BYTES_OF_UPDATE * updated / bandwidth,
        data=tokens * work.accumulation_steps / TOKENS_READ_PER_SECOND,
    )
