"""GPUs by data sheet: memory, peak, links.

Nothing here was measured. Figures are those of the manufacturers: NVIDIA's data sheets of
the A100, H100, H200 and L40S, AMD's of the Instinct MI300X and MI325X. Peaks are dense;
data sheets that give them "with sparsity" give twice as much.
"""

from __future__ import annotations

import dataclasses

from ten_dist.errors import ConfigurationError

_GIGA = 1e9
# 400, 200 and 100 Gbit/s of InfiniBand or RoCE for each GPU.
_NDR, _HDR, _EDR = 50 * _GIGA, 25 * _GIGA, 12.5 * _GIGA


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of GPU, and what usually joins several of it."""

    name: str
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
    torch_names: tuple[str, ...] = ()
    """What torch.cuda.get_device_name() calls it."""


_DEVICES = (
    Device(
        "h100",
        80e9,
        989.5e12,
        3.35e12,
        450 * _GIGA,
        "NVLink",
        _NDR,
        ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 120GB", "NVIDIA GH200 480GB"),
    ),
    Device("h100_pcie", 80e9, 756e12, 2.0e12, 64 * _GIGA, "PCIe 5", _EDR),
    Device(
        "h200",
        141e9,
        989.5e12,
        4.8e12,
        450 * _GIGA,
        "NVLink",
        _NDR,
        ("NVIDIA H200",),
    ),
    Device("a100", 80e9, 312e12, 2.04e12, 300 * _GIGA, "NVLink", _HDR),
    Device("a100_40gb", 40e9, 312e12, 1.555e12, 300 * _GIGA, "NVLink", _HDR),
    Device("l40s", 48e9, 362.05e12, 0.864e12, 32 * _GIGA, "PCIe 4", _EDR),
    Device("mi300x", 192e9, 1307.4e12, 5.3e12, 448 * _GIGA, "Infinity Fabric", _NDR),
    Device("mi325x", 256e9, 1307.4e12, 6.0e12, 448 * _GIGA, "Infinity Fabric", _NDR),
)
DEVICES: dict[str, Device] = {device.name: device for device in _DEVICES}


def find_device(name: str) -> Device:
    """The device that `--device` names.

    Raises:
        ConfigurationError: it is not known here.
    """
    if name not in DEVICES:
        raise ConfigurationError(
            f"--device {name} is not known: choose one of {', '.join(DEVICES)}, or give "
            "--gpu_memory_gib and --peak_tflops of yours"
        )
    return DEVICES[name]


def peak_tflops(torch_name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU by what torch calls it, or None where not known.

    The same chips on PCIe cards and in pairs ("NVL") run slower and are not meant.
    """
    for device in _DEVICES:
        if torch_name in device.torch_names:
            return device.peak_flops / 1e12
    return None
