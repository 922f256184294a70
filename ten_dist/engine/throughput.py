"""How fast each device is, from how long a step took."""

from __future__ import annotations

import dataclasses

import torch

from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.planning.machines import peak_tflops
from ten_dist.planning.step_time import count_operations


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What the time of a step says."""

    tokens_per_step: int
    """Of all devices together."""
    devices: int
    flops_per_token: float
    """Of the model in forward and backward, without what is computed again."""
    peak_flops: float | None
    """Of a device a second, dense, in the precision of the run; None where not known."""

    @classmethod
    def of(cls, run: ResolvedRun, ranks: Ranks) -> Throughput:
        """That of a run. The peak is `--peak_tflops`, or else that of a known GPU."""
        peak = run.training.peak_tflops
        # What is known of GPUs is their peak in 16 bits.
        known = ranks.device.type == "cuda" and run.training.precision != "fp32"
        if peak is None and known:
            peak = peak_tflops(torch.cuda.get_device_name(ranks.device))
        return cls(
            tokens_per_step=run.schedule.tokens_per_step,
            devices=ranks.world_size,
            flops_per_token=count_operations(
                run.model_config, run.schedule.seq_len
            ).per_token,
            peak_flops=None if peak is None else peak * 1e12,
        )

    def metrics(self, seconds: float, data_seconds: float) -> dict[str, float]:
        """Metrics of a step.

        Args:
            seconds: that it took.
            data_seconds: of these, those that this rank waited for data.
        """
        rate = self.tokens_per_step / seconds
        metrics = {
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / self.devices,
        }
        if self.peak_flops is not None:
            metrics["mfu"] = (
                rate / self.devices * self.flops_per_token / self.peak_flops
            )
        metrics |= {"step_seconds": seconds, "data_seconds": data_seconds}
        return metrics | {"data_share": data_seconds / seconds}
