"""The eigenstate scan: one function, several backends, one oracle (docs/model.md#scan)."""

from ten_dist.recurrence.eigenvalue_initialization import initial_eigenvalues
from ten_dist.recurrence.inputs import ScanInputs, as_ranges
from ten_dist.recurrence.scan import (
    available_backends,
    eigenstate_scan,
    eigenstate_scan_with_energy,
)

__all__ = [
    "ScanInputs",
    "as_ranges",
    "available_backends",
    "eigenstate_scan",
    "eigenstate_scan_with_energy",
    "initial_eigenvalues",
]
