"""The eigenstate scan: one function, several backends, one oracle (DESIGN 2.1)."""

from ten_dist.recurrence.initialization import initial_eigenvalues
from ten_dist.recurrence.scan import available_backends, eigenstate_scan

__all__ = ["available_backends", "eigenstate_scan", "initial_eigenvalues"]
