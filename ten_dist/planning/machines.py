"""The machines that a run is planned for: GPUs by data sheet, and their assumed speeds.

Nothing here was measured. Figures are those of the manufacturers: NVIDIA's data sheets of
the A100, H100, H200 and L40S, AMD's of the Instinct MI300X and MI325X. Peaks are dense;
data sheets that give them "with sparsity" give twice as much.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from ten_dist.config.options import Options, at_least, more_than
from ten_dist.errors import ConfigurationError
from ten_dist.planning.communication import Topology
from ten_dist.planning.step_time import Speeds

GIB = 2**30
"""Bytes."""
# Bytes a second: 400, 200 and 100 Gbit/s of InfiniBand or RoCE for each GPU.
_NDR, _HDR, _EDR = 50e9, 25e9, 12.5e9


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of GPU, and what usually joins several of it."""

    memory_bytes: float
    peak_flops: float
    """Dense matrix products in bfloat16 or float16, which are equally fast on all of
    these, operations a second."""
    memory_bandwidth: float
    """Bytes a second between the GPU and its own memory."""
    node_bandwidth: float
    """Bytes a second, one way, from a GPU to the others of its node."""
    node_link: str
    """What that goes over."""
    network_bandwidth: float
    """Bytes a second, one way, from a node to others for each of its GPUs: what nodes
    of eight are usually built with, by no means what every node has."""


DEVICES = {
    "h100": Device(80e9, 989.5e12, 3.35e12, 450e9, "NVLink", _NDR),
    "h100_pcie": Device(80e9, 756e12, 2.0e12, 64e9, "PCIe 5", _EDR),
    "h200": Device(141e9, 989.5e12, 4.8e12, 450e9, "NVLink", _NDR),
    "a100": Device(80e9, 312e12, 2.04e12, 300e9, "NVLink", _HDR),
    "a100_40gb": Device(40e9, 312e12, 1.555e12, 300e9, "NVLink", _HDR),
    "l40s": Device(48e9, 362.05e12, 0.864e12, 32e9, "PCIe 4", _EDR),
    "mi300x": Device(192e9, 1307.4e12, 5.3e12, 448e9, "Infinity Fabric", _NDR),
    "mi325x": Device(256e9, 1307.4e12, 6.0e12, 448e9, "Infinity Fabric", _NDR),
}
# By what torch.cuda.get_device_name() says. The same chips on PCIe cards and in pairs
# ("NVL") run slower and are not meant.
_DEVICE_OF_TORCH_NAME = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA GH200 120GB": "h100",
    "NVIDIA GH200 480GB": "h100",
    "NVIDIA H200": "h200",
}


def peak_tflops(torch_name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU by what torch calls it, or None where not known."""
    name = _DEVICE_OF_TORCH_NAME.get(torch_name)
    return None if name is None else DEVICES[name].peak_flops / 1e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineOptions(Options):
    """The machines that a run is planned for; every field is an option."""

    GROUP: ClassVar[str] = "machine"

    nodes: Annotated[int, at_least(1)] = 1
    """Machines."""
    gpus_per_node: Annotated[int, at_least(1)] = 8
    """GPUs of each."""
    device: str = "h100"
    """Kind of GPU, by data sheet: h100, h100_pcie, h200, a100, a100_40gb, l40s, mi300x or
    mi325x."""
    gpu_memory_gib: Annotated[float | None, more_than(0)] = None
    """Memory of a GPU in GiB, instead of the data sheet's."""
    peak_tflops: Annotated[float | None, more_than(0)] = None
    """TFLOP/s of a GPU, instead of the data sheet's of dense bfloat16, which are those of
    float16 too; in float32 with --precision fp32."""
    usable_memory: Annotated[float, more_than(0, most=1)] = 0.9
    """Share of a GPU's memory that tensors can have: the rest goes to the driver, NCCL
    and what the allocator cannot use. Assumed."""
    mfu: Annotated[float, more_than(0, most=1)] = 0.3
    """Share of the peak that the operations reach. Assumed; `benchmarks.gpu` measures
    it."""
    overlap: Annotated[float, at_least(0, most=1)] = 0.0
    """Share of the computation behind which communication hides; none as long as
    overlap_comm is off in ds_configs/."""
    node_gigabytes: Annotated[float | None, more_than(0)] = None
    """GB/s, one way, from a GPU to the others of its node, instead of the data
    sheet's."""
    node_microseconds: Annotated[float, at_least(0)] = 3.0
    """Latency of a message in a node. Assumed."""
    network_gigabits: Annotated[float | None, more_than(0)] = None
    """Gbit/s, one way, from a whole node to the others; by default what nodes of such
    GPUs are usually built with."""
    network_microseconds: Annotated[float, at_least(0)] = 10.0
    """Latency of a message between nodes. Assumed."""
    dollars_per_gpu_hour: Annotated[float | None, more_than(0)] = None
    """Price of one GPU for one hour, for the cost of the run."""

    @property
    def gpus(self) -> int:
        """Of all machines."""
        return self.nodes * self.gpus_per_node

    @property
    def kind(self) -> Device:
        """The GPU by its data sheet.

        Raises:
            ConfigurationError: `device` is not known.
        """
        if self.device not in DEVICES:
            raise ConfigurationError(
                f"--device {self.device} is not known: choose one of "
                f"{', '.join(DEVICES)}, or give --gpu_memory_gib and --peak_tflops of yours"
            )
        return DEVICES[self.device]

    @property
    def memory_bytes(self) -> float:
        """Of a GPU."""
        if self.gpu_memory_gib is None:
            return self.kind.memory_bytes
        return self.gpu_memory_gib * GIB

    def speeds(self) -> Speeds:
        """How fast a GPU is."""
        kind = self.kind
        peak = kind.peak_flops if self.peak_tflops is None else self.peak_tflops * 1e12
        return Speeds(peak, self.mfu, kind.memory_bandwidth, overlap=self.overlap)

    def topology(self) -> Topology:
        """The links that join the GPUs."""
        kind = self.kind
        node = kind.node_bandwidth
        network = kind.network_bandwidth * self.gpus_per_node
        if self.node_gigabytes is not None:
            node = self.node_gigabytes * 1e9
        if self.network_gigabits is not None:
            network = self.network_gigabits * 1e9 / 8
        return Topology(
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            node_bandwidth=node,
            network_bandwidth=network,
            node_latency=self.node_microseconds * 1e-6,
            network_latency=self.network_microseconds * 1e-6,
        )

    def describe(self) -> str:
        """The GPU in words."""
        return (
            f"{self.device} (assumed: {self.memory_bytes / GIB:.1f} GiB, "
            f"{self.speeds().peak_flops / 1e12:.1f} TFLOP/s dense bfloat16; "
            f"{self.kind.node_link} in a node)"
        )
