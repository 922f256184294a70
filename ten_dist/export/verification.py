"""Whether an exported model computes what the run's does: both are asked, and compared."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ten_dist.checkpoint import CheckpointReader
from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.errors import TrainingError
from ten_dist.model import TemporalEigenstateNetwork

LARGEST_DIFFERENCE = 1e-5
"""Of a logit, beside one of the size of 1 or smaller."""
_PROBE_TOKENS = 300
_PROMPT_TOKENS = 16
_NEW_TOKENS = 64


def verify(
    exported: Path,
    config: TemporalEigenstateConfig,
    checkpoint: Path,
    dtype: torch.dtype,
) -> float:
    """Compare logits and a greedy continuation, both in float64.

    In float32 two right models differ by rounding, which grows with depth: of a deep one by
    more than a small error would. In float64 whatever is left is an error.

    The exported model is loaded by transformers alone, in a process of its own in which
    ten_dist cannot be imported.

    Args:
        exported: its folder.
        config: of the run's model.
        checkpoint: with the run's weights, which are rounded to `dtype` first.
        dtype: of the exported weights.

    Returns:
        The largest difference of a logit.

    Raises:
        TrainingError: they differ, or the exported model cannot be loaded.
    """
    network = _network(config, checkpoint, dtype)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(config.vocab_size, (1, _PROBE_TOKENS), generator=generator)
    if config.document_separator_id is not None:
        probe[:, _PROBE_TOKENS // 3] = config.document_separator_id
    theirs = _ask(exported, probe, probe[:, :_PROMPT_TOKENS])
    with torch.no_grad():
        logits = network(probe)
        continued = network(theirs["continuation"])
    difference = _difference(logits, theirs["logits"])
    chosen = theirs["continuation"][:, _PROMPT_TOKENS:]
    before = continued[:, _PROMPT_TOKENS - 1 : -1]
    # Where two tokens are as likely, either is right.
    missed = before.max(dim=-1).values - before.gather(2, chosen.unsqueeze(2)).squeeze(
        2
    )
    worst = max(difference, float(missed.max()) / 2)
    # nan is more than any limit.
    if not worst <= LARGEST_DIFFERENCE * max(1.0, float(logits.abs().max())):
        raise TrainingError(
            f"the exported model differs from the run's by {worst:.2g} in a logit: this is "
            "an error of ten_dist; nothing was exported"
        )
    return difference


def _network(
    config: TemporalEigenstateConfig, checkpoint: Path, dtype: torch.dtype
) -> TemporalEigenstateNetwork:
    # Backends for one device do not compute in float64.
    config = dataclasses.replace(config, scan_backend="auto")
    network = TemporalEigenstateNetwork(config).eval()
    with CheckpointReader(checkpoint) as reader:
        reader.load_into(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.to(dtype))
    return network.double()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def _ask(exported: Path, probe: Tensor, prompt: Tensor) -> dict[str, Tensor]:
    """Logits of the exported model for `probe`, and its greedy continuation of `prompt`."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "answer.safetensors")
        question = {
            "folder": str(exported),
            "probe": probe.tolist(),
            "prompt": prompt.tolist(),
            "new_tokens": _NEW_TOKENS,
            "answer": str(answer),
        }
        # transformers copies the modelling file, and asks the Hub for nothing.
        paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        environment = {
            **os.environ,
            # The process has another current folder.
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
            "HF_HOME": scratch,
            "HF_MODULES_CACHE": scratch,
            "HF_HUB_OFFLINE": "1",
        }
        script = Path(__file__).with_name("answer_probe.py")
        process = subprocess.run(
            # Run as a file, it could import the files beside it.
            [sys.executable, "-c", script.read_text(encoding="utf-8")],
            input=json.dumps(question),
            env=environment,
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise TrainingError(f"transformers cannot load the exported model: {last}")
        return load_file(answer)
