"""One rank of the all-reduce of a preflight: measures latency and bandwidth.

Started on each host by :mod:`launch.preflight.all_reduce`, with a JSON object as its
argument. Prints `{"stage": ...}` lines, and rank 0 at last what it measured. Ends when its
input does, which is when its controller has gone, and when its time is up.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import threading
import time
from typing import Any

_WARM_UP = 5
_FIRST_BYTES = 1 << 20
_LAST_BYTES = {"gloo": 1 << 25, "nccl": 1 << 28}
_LONG = 0.5
"""Seconds of an all-reduce after which a larger one tells nothing new."""


def main(wanted: dict[str, Any]) -> None:
    """Take part; see the module."""
    # The controller ends this; where it cannot, the signal does, whatever hangs here.
    signal.alarm(wanted["seconds"] + 10)
    threading.Thread(target=_end_with_input, daemon=True).start()
    _tell(stage="importing torch")
    import torch
    import torch.distributed as dist

    backend, rank, size = wanted["backend"], wanted["rank"], wanted["size"]
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", wanted["local_rank"])
        torch.cuda.set_device(device)
    _tell(stage="connecting")
    timeout = datetime.timedelta(seconds=wanted["seconds"])
    address, port = wanted["address"], wanted["port"]
    store = dist.TCPStore(address, port, size, is_master=rank == 0, timeout=timeout)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timeout
    )

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_of(count: int, repeats: int) -> float:
        """Median time of an all-reduce of some float32."""
        times = []
        for _ in range(repeats):
            tensor = torch.full((count,), float(rank + 1), device=device)
            synchronize()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            synchronize()
            times.append(time.perf_counter() - start)
            if not bool((tensor == size * (size + 1) / 2).all()):
                raise RuntimeError(f"the sum of {count} numbers came out wrong")
        return sorted(times)[repeats // 2]

    _tell(stage="reducing one number")
    seconds_of(1, _WARM_UP)
    latency = seconds_of(1, 20)
    count = _FIRST_BYTES
    while True:
        _tell(stage=f"reducing {count >> 20} MiB")
        seconds = torch.tensor([seconds_of(count // 4, 3)], device=device)
        # The slowest rank decides, so that all go on to the next size or none.
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        if seconds.item() > _LONG or count >= _LAST_BYTES[backend]:
            break
        count *= 2
    if rank == 0:
        bandwidth = 2 * (size - 1) / size * count / seconds.item()
        found = {"latency_seconds": latency, "bytes": count}
        _tell(measured={**found, "bus_bytes_per_second": bandwidth})
    # The store is rank 0's: it must not go before the others have finished.
    dist.barrier()
    _tell(stage="done")


def _end_with_input() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    status = 0
    try:
        main(json.loads(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - the controller shows it in one line
        print(
            f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr
        )
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of torch may abort a process that ends after its peers.
    os._exit(status)
