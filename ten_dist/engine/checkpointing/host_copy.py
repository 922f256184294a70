"""A copy of tensors in host memory that is made while training goes on.

Weights and moments only change in the update at the end of a step. So another thread can
copy them during the next forward and backward, and training waits only if the copy is not
done before the update. On GPUs the copy has a stream of its own.

The memory is kept for the next copy: 4 bytes an element, or up to twice that where it is
pinned, as torch rounds the size of a pinned block up to a power of two.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class HostCopy:
    """Values of tensors as they were when :meth:`begin` was called, float32.

    :meth:`make` is for the other thread, everything else for the one that trains.
    """

    def __init__(self) -> None:
        self._values: list[tuple[str, Tensor]] = []
        self._host: dict[str, Tensor] = {}
        self._computed: torch.cuda.Event | None = None
        self._made = threading.Event()
        self._made.set()

    def begin(self, values: list[tuple[str, Tensor]]) -> None:
        """Name what is to be copied by its key; it must not change before :meth:`wait`."""
        self._values = values
        self._computed = None
        if any(tensor.device.type == "cuda" for _, tensor in values):
            self._computed = torch.cuda.Event()
            self._computed.record()
        self._made.clear()

    @torch.no_grad()
    def make(self) -> None:
        """Copy; whatever happens, :meth:`wait` then returns."""
        try:
            if self._computed is None:
                self._copy()
                return
            device = next(t.device for _, t in self._values if t.device.type == "cuda")
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                stream.wait_event(self._computed)
                self._copy()
            stream.synchronize()
        finally:
            self._values = []
            self._made.set()

    def _copy(self) -> None:
        for key, values in self._values:
            if key not in self._host:
                pinned = values.device.type == "cuda"
                self._host[key] = torch.empty(
                    values.shape, dtype=torch.float32, pin_memory=pinned
                )
            self._host[key].copy_(values, non_blocking=True)

    def wait(self) -> None:
        """Wait until what :meth:`begin` was given may change."""
        self._made.wait()

    def __getitem__(self, key: str) -> Tensor:
        """The copy of the tensor with a key, in host memory."""
        return self._host[key]
