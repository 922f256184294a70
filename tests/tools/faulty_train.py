"""`launch/train.py` with a fault: one rank stops or fails at one step.

The fault is FAULT=KIND:RANK:STEP in the environment: `sleep` waits for data for ever,
`hold` never gives the interpreter's lock back in a forward pass, `die` ends with SIGKILL,
`orphan` kills the launcher and waits for ever,
`fail` with an exception, `slow` takes 0.1 s longer for data from that step on.
`fail` strikes at every start, the others only at the first, which leaves FAULT_MARK.
Where FAULT_AFTER names a path, that has to be there first: a checkpoint, which is written
while training goes on.
`nan:RANK:ROW` makes the loss of each micro-batch that holds a row of the data not a number;
its rank may be `any`. `overflow:RANK:ROW` leaves the loss as it is and makes its gradient too
large for float16.
`short_pipes` is none: processes that read data read a few micro-batches ahead, where they would
be through with a small set before anything could happen to them.
"""

import ctypes
import math
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def strike(kind):
    """What happens to the rank."""
    if kind == "orphan":
        os.kill(os.getppid(), signal.SIGKILL)
    if kind in ("sleep", "orphan"):
        while True:
            time.sleep(1)
    if kind == "hold":
        # The C library's sleep, called without giving the lock back.
        while True:
            ctypes.PyDLL(None).sleep(100)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "fail":
        raise RuntimeError("a fault that comes back")
    if kind == "slow":
        time.sleep(0.1)


def inject(fault):
    """Have the trainer meet the fault."""
    from ten_dist.data import workers
    from ten_dist.engine import trainer
    from ten_dist.engine.step import Stepper

    if fault == "short_pipes":
        workers._READ_AHEAD_BYTES = 1
        return
    kind, rank, step = fault.split(":")
    mark, after = os.environ.get("FAULT_MARK"), os.environ.get("FAULT_AFTER")
    elsewhere = rank not in ("any", os.environ.get("RANK", "0"))
    if elsewhere or (mark and Path(mark).exists()):
        return
    batches_of = trainer.training_batches
    losses_of = Stepper._losses_of
    rows = []

    def wait():
        while after and not Path(after).exists():
            time.sleep(0.01)

    def meets(number):
        wanted = number >= int(step) if kind == "slow" else number == int(step)
        if wanted:
            wait()
        if wanted and mark:
            Path(mark).touch()
        return wanted

    def training_batches(*arguments, **options):
        for batch in batches_of(*arguments, **options):
            if kind in ("nan", "overflow"):
                rows[:] = batch.rows.tolist()
            elif kind != "hold" and meets(batch.step + 1):
                strike(kind)
            yield batch

    def _losses_of(self, inputs, targets):
        losses = losses_of(self, inputs, targets)
        if kind == "hold":
            self.calls = getattr(self, "calls", 0) + 1
            if meets(self.calls):
                strike(kind)
        elif kind == "nan" and int(step) in rows:
            wait()
            losses["loss"] = losses["loss"] * math.nan
        elif kind == "overflow" and int(step) in rows:
            loss = losses["loss"]
            losses["loss"] = loss + 1e30 * (loss - loss.detach())
        return losses

    trainer.training_batches = training_batches
    Stepper._losses_of = _losses_of


def train_with(monkeypatch, fault, arguments):
    """Train in this process, with a fault that is gone afterwards."""
    from ten_dist.cli import main
    from ten_dist.engine import trainer
    from ten_dist.engine.step import Stepper

    with monkeypatch.context() as patch:
        # Set to themselves, so that they are put back afterwards.
        patch.setattr(trainer, "training_batches", trainer.training_batches)
        patch.setattr(Stepper, "_losses_of", Stepper._losses_of)
        inject(fault)
        return main(["train", *map(str, arguments)])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from ten_dist.cli import run_and_exit

    os.environ.setdefault("RANK", "0")
    if "FAULT" in os.environ:
        inject(os.environ["FAULT"])
    sys.argv.insert(1, "train")
    run_and_exit()
