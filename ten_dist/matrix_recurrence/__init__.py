"""Eigenstates that carry vectors, read by queries: the scan of matrix layers
(docs/model.md#matrix-states)."""

from ten_dist.matrix_recurrence.matrix_inputs import MatrixScanInputs
from ten_dist.matrix_recurrence.matrix_scan import available_backends, matrix_scan

__all__ = ["MatrixScanInputs", "available_backends", "matrix_scan"]
