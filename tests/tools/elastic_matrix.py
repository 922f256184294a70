"""Resume from every number of ranks and ZeRO stage on another one.

    python -m tests.tools.elastic_matrix [--full]

For 1, 2 and 4 ranks and stages 0 to 3: a run is started on each of the twelve, and what
it saved is compared with what the others saved; then its checkpoint is continued on the
next of the twelve (with --full on all of them) for 20 steps, and the losses are compared
with those of a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from ten_dist.checkpoint import WEIGHT, CheckpointReader
from tests.conftest import write_corpus
from tests.tools.launching import SMALL_MODEL, step_metrics, train

CELLS = [(ranks, stage) for ranks in (1, 2, 4) for stage in range(4)]
SAVED, STEPS = 5, 25
TOLERANCE = 1e-4


def options(data):
    """Options of all runs."""
    return [
        *SMALL_MODEL,
        *(
            "--use_hten",
            "--hten_scales",
            "1,2",
            "--dropout",
            0.1,
            "--precision",
            "fp32",
        ),
        *("--data", data, "--steps", STEPS, "--global_batch_size", 8, "--seq_len", 64),
        *("--micro_batch_size", 2, "--checkpoint_interval", SAVED, "--num_workers", 0),
        *("--warmup_steps", 3, "--data_verification", "size"),
    ]


def run(given, folder, cell):
    """Train a run, or continue it, on the ranks and stage of a cell."""
    ranks, stage = cell
    stage = ["--deepspeed_config", f"zero{stage}"]
    # One rank needs no launcher.
    train([*given, "--output_dir", folder, *stage], ranks=ranks if ranks > 1 else 0)


def stored(checkpoint):
    """Kind and name of every tensor in the files of a checkpoint."""
    found = set()
    for path in checkpoint.glob("*.safetensors"):
        found |= {tuple(key.split("[")[0].split(".", 1)) for key in load_file(path)}
    return found


def largest_difference(one, other):
    """Between the tensors of two checkpoints, relative to their largest values.

    Moments of a single number are left out: it has no larger ones beside it.
    """
    found, tensors = 0.0, stored(one)
    assert tensors == stored(other)
    with CheckpointReader(one) as a, CheckpointReader(other) as b:
        for kind, name in tensors:
            x, y = a.tensor(kind, name), b.tensor(kind, name)
            if kind == WEIGHT or x.numel() > 1:
                scale = x.abs().max().clamp(min=1e-12)
                found = max(found, ((x - y).abs().max() / scale).item())
    return found


def main():
    """Fill the matrix; status 1 if a cell is too far off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    full = parser.parse_args().full
    started = time.monotonic()
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        from data_prep.shard import main as shard

        folder = Path(scratch)
        corpus, data = write_corpus(folder / "corpus"), folder / "data"
        arguments = ["--input", corpus, "--output", data, "--tokenizer", "bytes"]
        assert shard([str(a) for a in [*arguments, "--shard_megabytes", 0.02]]) == 0
        given = options(data)
        expected = None
        for number, source in enumerate(CELLS):
            whole = folder / f"{source[0]}-{source[1]}"
            run(given, whole, source)
            losses = step_metrics(whole)
            expected = expected or losses
            saved = whole / "checkpoints" / f"step_{SAVED:08d}"
            first = folder / "1-0" / "checkpoints" / saved.name
            print(
                f"ranks {source[0]}, stage {source[1]}: saved state differs from that of "
                f"one rank at stage 0 by {largest_difference(first, saved):.1e}",
                flush=True,
            )
            targets = CELLS if full else [CELLS[(number + 5) % len(CELLS)]]
            for target in targets:
                resumed = folder / "resumed"
                shutil.copytree(whole, resumed)
                (resumed / "COMPLETED").unlink()
                for path in (resumed / "checkpoints").glob("step_*"):
                    if path.name != saved.name:
                        shutil.rmtree(path)
                run(given, resumed, target)
                found = step_metrics(resumed)
                off = max(abs(found[s] - expected[s]) for s in range(SAVED, STEPS + 1))
                worst = max(worst, off)
                print(
                    f"  to ranks {target[0]}, stage {target[1]}: {STEPS - SAVED} losses "
                    f"within {off:.1e}",
                    flush=True,
                )
                shutil.rmtree(resumed)
    print(
        f"worst: {worst:.1e}, allowed {TOLERANCE}, {time.monotonic() - started:.0f} s"
    )
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
