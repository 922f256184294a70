"""launch/train.py with a fault in it, for tests; FAULT in the environment is its JSON.

{"nan_row": r}               the loss of any micro-batch with row r is not a number
{"scaled_row": r, "by": x}   ... is x times what it is
"once": path                 only until the fault has happened; the file at path tells
"""

import json
import math
import os
import sys
from pathlib import Path

import ten_dist.engine.step
import ten_dist.engine.trainer
from ten_dist.cli import run_and_exit


def install(fault):
    """Put a fault into this process."""
    current = {}
    real_batches = ten_dist.engine.trainer.training_batches
    real_losses = ten_dist.engine.step.Stepper.losses_of

    def training_batches(*arguments, **options):
        for batch in real_batches(*arguments, **options):
            current["rows"] = batch.rows.tolist()
            yield batch
            current["rows"] = []

    def losses_of(self, inputs, targets):
        losses = real_losses(self, inputs, targets)
        row = fault.get("nan_row", fault.get("scaled_row"))
        if row in current.get("rows", ()):
            once = Path(fault["once"]) if "once" in fault else None
            if once is None or not once.exists():
                losses["loss"] = losses["loss"] * fault.get("by", math.nan)
                if once is not None:
                    once.touch()
        return losses

    ten_dist.engine.trainer.training_batches = training_batches
    ten_dist.engine.step.Stepper.losses_of = losses_of


if __name__ == "__main__":
    install(json.loads(os.environ["FAULT"]))
    sys.argv.insert(1, "train")
    run_and_exit()
