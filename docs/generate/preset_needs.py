"""The table of planning.md: what each preset takes on one GPU, as `ten-dist plan` counts it."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path

from docs.generate.pages import with_part
from ten_dist import PRESETS
from ten_dist.cli import main

COMMAND = (
    "ten-dist plan --gpus_per_node 1 --tokens 1e9 --seq_len 1024 --global_batch_size 64 "
    "--micro_batch_size 8 --deepspeed_config zero0"
)
_GIB, _TOKENS = 2**30, 1e9


def page() -> str:
    """The text of planning.md with the table as it should be."""
    lines = [
        (
            "| `--config` | parameters | GiB, activations kept | GiB, recomputed | "
            "hours for 1e9 tokens | hours for 20 tokens a parameter |"
        ),
        "|---|---|---|---|---|---|",
        *map(_row, PRESETS),
        "",
        f"`{COMMAND} --config NAME`",
    ]
    return with_part("docs/planning.md", "presets", "\n".join(lines))


def _row(preset: str) -> str:
    plan = _plan(preset)
    sizes = {
        layout["gradient_checkpointing"]: layout["memory_bytes"]["total"] / _GIB
        for layout in plan["layouts"]
    }
    hours = plan["days"] * 24
    of_rule = hours * 20 * plan["parameters"] / _TOKENS
    return (
        f"| {preset} | {plan['parameters']:,} | {sizes['none']:.1f} | "
        f"{sizes['block']:.1f} | {hours:.1f} | {of_rule:.1f} |"
    )


def _plan(preset: str) -> dict:
    """What `ten-dist plan --json` writes for a preset on one GPU.

    Raises:
        RuntimeError: the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        words = [*COMMAND.split()[1:], "--config", preset, "--json", str(file)]
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(words)
        if status:
            raise RuntimeError(
                f"{COMMAND} --config {preset} ended with status {status}"
            )
        return json.loads(file.read_text())
