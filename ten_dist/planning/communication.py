"""What the ranks send each other in one optimizer step, by collective.

As DeepSpeed 0.19 does it with the settings of ds_configs/: everything in the precision of
the parameters (float32, but with `bf16_params`), nothing beside the computation
(`overlap_comm` is off).

    stage 0   all gradients reduced to every rank, once a step
    stage 1   the same, then the updated weights gathered
    stage 2   the same, but gradients are reduced in every micro-batch
    stage 3   weights gathered and gradients reduced to their owners in every micro-batch

Stages 1 and 2 reduce to every rank, too, although each needs its own part alone
(`use_multi_rank_bucket_allreduce`).
"""

from __future__ import annotations

import dataclasses
import math

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.planning.activations import Precision
from ten_dist.planning.parameters import count, parameters_of
from ten_dist.planning.sharding import Sharding, Workload, gathered_again

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_gather", "reduce_scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective in one step."""

    kind: str
    what: str
    """Is sent, in words."""
    bytes: float
    """Of the whole: of what is reduced, or of what all ranks have gathered."""
    calls: int
    """In which it is sent."""


def collectives_of_step(
    config: TemporalEigenstateConfig, sharding: Sharding, work: Workload
) -> list[Collective]:
    """The collectives of one step; none with one rank."""
    if sharding.ranks == 1:
        return []
    parameters = parameters_of(config)
    elements, low = count(parameters), Precision.of(work.precision).parameters
    micro_steps = work.accumulation_steps

    def collective(kind: str, what: str, sent: float, times: int) -> Collective:
        calls = times * math.ceil(sent / sharding.bucket)
        return Collective(kind, what, low * sent * times, calls)

    if sharding.stage == 3:
        again = gathered_again(config, sharding)
        return [
            collective(ALL_GATHER, "weights", elements + again, micro_steps),
            collective(REDUCE_SCATTER, "gradients", elements, micro_steps),
        ]
    reductions = micro_steps if sharding.stage == 2 else 1
    sent = [collective(ALL_REDUCE, "gradients", elements, reductions)]
    if sharding.stage > 0:
        sent.append(collective(ALL_GATHER, "weights", elements, 1))
    return sent
