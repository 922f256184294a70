"""GPUs by data sheet."""

import pytest

from ten_dist.errors import ConfigurationError
from ten_dist.planning.machines import DEVICES, MachineOptions, peak_tflops


def test_peak_is_that_of_the_chip_meant():
    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989.5
    assert peak_tflops("NVIDIA H100 PCIe") is None


def test_devices_are_found_by_name():
    assert MachineOptions(device="mi300x").kind.memory_bytes == 192e9
    # Peaks are dense: data sheets of these say 1,979 and 733 with sparsity.
    assert DEVICES["h100"].peak_flops < 1000e12
    assert DEVICES["l40s"].peak_flops < 400e12
    with pytest.raises(ConfigurationError, match="h100, .*mi325x, or give") as refused:
        _ = MachineOptions(device="h100x").kind
    assert all(name in str(refused.value) for name in DEVICES)
