"""Exported models where nothing of ten_dist is, and back again.

    python -m benchmarks.export --corpus FILE [--output FILE]

Makes a new virtual environment with torch and transformers of constraints.txt alone (pip's
settings say from where). Then, of several models after a few steps of training (so that
nothing is left at the zeros that it began with): exports one, compares its logits in
float32 and its greedy continuation in that environment with those of the run, and begins a
run with the exported folder, whose first validation is compared with the run's last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.measure import Report
from benchmarks.trainings import (
    ROOT,
    corpus_options,
    make_shards,
    metrics_by_step,
    train,
)
from ten_dist.checkpoint import CheckpointReader
from ten_dist.cli import main as ten_dist
from ten_dist.generation import Sampling, generate
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel

MODELS = {
    "pico": ["--config", "pico"],
    "nano": ["--config", "nano"],
    "HTEN 1,2,4": ["--config", "pico", "--hten_scales", "1,2,4"],
    "every option": [
        *("--config", "pico", "--hten_scales", "1,2,4", "--short_convolution", 4),
        *("--gate", "state", "--input_norm", "static", "--document_masking"),
        *("--eigenvalue_init", "paper", "--no-learnable_selection_range"),
    ],
}
STEPS = 8
NEW_TOKENS = 200
PROBE_TOKENS, PROMPT_TOKENS = 512, 32


def make_environment(folder: Path) -> Path:
    """A virtual environment of torch and transformers alone; its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    install = ["-m", "pip", "install", "--quiet", "-c", constraints]
    subprocess.run(
        [python, *install, "torch", "transformers"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return python


def write_question(run: Path, path: Path) -> None:
    """What the run's model makes of a probe and of a prompt, in float32."""
    network = TrainedModel.load(RunFolder(run)).network
    generator = torch.Generator().manual_seed(0)
    size = network.config.vocab_size
    probe = torch.randint(size, (1, PROBE_TOKENS), generator=generator)
    separator = network.config.document_separator_id
    if separator is not None:
        probe[:, PROBE_TOKENS // 2] = separator
    prompt = probe[0, :PROMPT_TOKENS].tolist()
    (added,) = generate(network, [prompt], NEW_TOKENS, Sampling(temperature=0))
    with torch.no_grad():
        answers = {
            "probe": probe,
            "prompt": torch.tensor([prompt]),
            "logits": network(probe),
            "continued": torch.tensor([prompt + added]),
        }
    save_file({name: tensor.contiguous() for name, tensor in answers.items()}, path)


def tensors_of_zeros(run: Path) -> int:
    """Weights that are zero throughout, in which an export could not show an error."""
    with CheckpointReader(RunFolder(run).usable_checkpoint()) as reader:
        return sum(not reader.tensor("weight", name).any() for name in reader.shapes)


def measure(report: Report, name: str, data: Path, python: Path, folder: Path) -> dict:
    """All figures of one model; returns what the environment says of itself."""
    run, exported, back = folder / "run", folder / "exported", folder / "back"
    options = [
        *MODELS[name],
        *("--data", data, "--seq_len", 256, "--global_batch_size", 4),
        *("--precision", "fp32", "--eval_rows", 64, "--num_workers", 0),
        *("--learning_rate", "1e-2", "--warmup_steps", 2),
    ]
    train([*options, "--steps", STEPS, "--output_dir", run], ranks=1)
    if ten_dist(["export", str(run), "--output", str(exported)]):
        raise RuntimeError(f"{name} cannot be exported")
    write_question(run, folder / "question")
    worker = Path(__file__).with_name("export_worker.py")
    environment = os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    answered = folder / "answer"
    subprocess.run(
        [python, "-I", worker, exported, folder / "question", answered],
        cwd=folder,
        env=environment,
        check=True,
    )
    answer = json.loads(answered.read_text())
    begin = ["--init_from", exported, "--steps", 1, "--output_dir", back]
    train([*options, *begin], ranks=1)
    last = metrics_by_step(run, "val_loss")[STEPS]
    first = metrics_by_step(back, "val_loss")[0]
    report.row(
        name,
        {
            "weights that are all zero": tensors_of_zeros(run),
            "largest difference of a logit": answer.pop("difference"),
            f"equal tokens of {NEW_TOKENS}": answer.pop("equal_tokens"),
            "validation loss of the run": last,
            "difference of the run that begins with it": abs(first - last),
        },
    )
    return answer


def main() -> None:
    """Measure all models."""
    text, output = corpus_options(__doc__)
    report, facts = Report(), {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = make_shards(text, folder / "data", "--vocab_size", 1024)
        python = make_environment(folder / "environment")
        for number, name in enumerate(MODELS):
            own = folder / str(number)
            own.mkdir()
            facts = measure(report, name, data, python, own)
    if output is not None:
        report.write(output, **{f"{n} of the exports": v for n, v in facts.items()})


if __name__ == "__main__":
    sys.exit(main())
