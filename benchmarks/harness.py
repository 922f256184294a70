"""Benchmarks through lm-evaluation-harness beside a plain loop, and long documents.

    python -m benchmarks.harness [scores] [time] [memory] [--output FILE]

`scores` is of two tasks, 200 multiple-choice questions and 20 documents: the largest
difference of a log-likelihood from that of a loop, which reads each text whole and by
itself, and the figures that lm_eval makes of both; `time` is that of both. `memory` is the
peak of a process that scores one document of 5,000 or 50,000 tokens in pieces, or in one
pass.
Models are `pico` of initial weights and a vocabulary of bytes, on the CPU.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.measure import Report, paired, run_measurements
from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.data.tokenizer import TextTokenizer, byte_tokenizer
from ten_dist.harness.language_model import HarnessModel
from ten_dist.harness.scoring import Score, Scorer, TokenSequence
from ten_dist.harness.tasks import Tasks

VARIANTS: dict[str, dict] = {"TEN": {}, "HTEN 1,2,4": {"hten_scales": (1, 2, 4)}}
CPU = torch.device("cpu")
LENGTHS = (5_000, 50_000)
TASKS = ("choosing", "reading")
_WORDS = [
    "the",
    "state",
    "of",
    "a",
    "wave",
    "decays",
    "turns",
    "and",
    "is",
    "read",
    "again",
    "by",
    "every",
    "later",
    "token",
]
_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
{more}
"""
_CHOOSING = """doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]"""
_READING = """doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]"""


def make_network(variant: str) -> TemporalEigenstateNetwork:
    """The model of a variant, the same in every process."""
    torch.manual_seed(0)
    config = TemporalEigenstateConfig.preset(
        "pico", vocab_size=257, **VARIANTS[variant]
    )
    return TemporalEigenstateNetwork(config).eval()


class LoopScorer(Scorer):
    """Scores as the formula says: one sequence, one pass."""

    @torch.no_grad()
    def score(
        self, sequences: Sequence[TokenSequence], after_batch=None
    ) -> list[Score]:
        """As :meth:`Scorer.score`."""
        scores = []
        for sequence in sequences:
            tokens = torch.tensor([sequence.tokens])
            logprobs = self.model(tokens[:, :-1])[0].log_softmax(-1)
            logprobs = logprobs[sequence.first_scored - 1 :]
            targets = tokens[0, sequence.first_scored :]
            picked = logprobs.gather(1, targets[:, None]).double().sum()
            greedy = bool((logprobs.argmax(1) == targets).all())
            scores.append(Score(picked.item(), greedy))
        return scores


def write_tasks(folder: Path) -> None:
    """The two tasks, with the same texts each time."""
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(1, most)))

    choosing = [
        {
            "question": text(120),
            "choices": [text(20) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for _ in range(200)
    ]
    reading = [{"text": text(1500)} for _ in range(20)]
    kinds = {
        "choosing": ("multiple_choice", choosing, _CHOOSING),
        "reading": ("loglikelihood_rolling", reading, _READING),
    }
    for name, (kind, documents, more) in kinds.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        content = _TASK.format(name=name, data=data, kind=kind, more=more)
        (folder / f"{name}.yaml").write_text(content)


def _answers(tasks: Tasks) -> list[float]:
    """Log-likelihoods of all requests of the tasks, as they were answered last."""
    requests = [r for task in tasks.loaded["tasks"].values() for r in task.instances]
    found = [request.resps[-1] for request in requests]
    return [value[0] if isinstance(value, tuple) else value for value in found]


def _both(folder: Path) -> Iterator[tuple[str, Tasks, dict[str, HarnessModel]]]:
    """Of each variant its name, the tasks, and the model with either way of scoring."""
    write_tasks(folder)
    tasks = Tasks.load(TASKS, str(folder), ("--tasks", "--include_path"))
    tokenizer = TextTokenizer(byte_tokenizer().to_str())
    for variant in VARIANTS:
        network = make_network(variant)
        scorers = {"harness": Scorer, "loop": LoopScorer}
        models = {
            name: HarnessModel(kind(network, network.config.vocab_size, CPU), tokenizer)
            for name, kind in scorers.items()
        }
        yield variant, tasks, models


def measure_scores(report: Report, folder: Path) -> None:
    """Figures of lm_eval by both ways, and the largest difference of a log-likelihood."""
    for variant, tasks, models in _both(folder):
        answers, found = {}, {}
        for name, model in models.items():
            found[name] = tasks.run(model, quiet=True, bootstrap_iterations=0)
            answers[name] = _answers(tasks)
        for task in TASKS:
            for figure, value in found["harness"][task].items():
                columns = {"harness": value, "loop": found["loop"][task][figure]}
                report.row(f"{variant}, {task} {figure}", columns)
        pairs = list(zip(answers["harness"], answers["loop"], strict=True))
        difference = max(abs(a - b) for a, b in pairs)
        relative = max(abs(a - b) / abs(b) for a, b in pairs)
        report.add(f"{variant}: largest difference, 1e-5 nats", difference / 1e-5)
        report.add(f"{variant}: largest relative difference, 1e-5", relative / 1e-5)


def measure_time(report: Report, folder: Path) -> None:
    """Time of the tasks by a loop beside that by the harness."""
    for variant, tasks, models in _both(folder):
        sides = {
            name: functools.partial(
                tasks.run, model, quiet=True, bootstrap_iterations=0
            )
            for name, model in models.items()
        }
        seconds = paired(sides, repeats=3)
        report.add(
            f"{variant}: time of loop / harness", seconds["loop"] / seconds["harness"]
        )


def score_document(variant: str, length: int, kind: str) -> None:
    """Score one document of random bytes, and print the peak memory of this process."""
    network = make_network(variant)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (length,), generator=generator).tolist()
    chosen = Scorer if kind == "pieces" else LoopScorer
    scorer = chosen(network, network.config.vocab_size, CPU)
    (score,) = scorer.score([TokenSequence(tokens, 1)])
    # What getrusage tells of a process begins with the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    kibibytes = int(status.partition("VmHWM:")[2].split()[0])
    print(json.dumps([kibibytes / 1024, score.log_likelihood]))


def measure_memory(report: Report, folder: Path) -> None:
    """Peak memory of a document in pieces and in one pass, and what both say of it."""
    root = Path(__file__).resolve().parents[1]
    # Have the C library give back at once what tensors free.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    for variant in VARIANTS:
        for length in LENGTHS:
            peaks, values = {}, []
            for kind in ("pieces", "one pass"):
                call = f"score_document({variant!r}, {length}, {kind!r})"
                code = f"import benchmarks.harness as b; b.{call}"
                output = subprocess.check_output(
                    [sys.executable, "-c", code], cwd=root, env=environment, text=True
                )
                peak, value = json.loads(output.splitlines()[-1])
                peaks[f"MiB in {kind}"] = peak
                values.append(value)
            report.row(f"{variant}, {length:,} tokens", peaks)
            relative = abs(values[0] / values[1] - 1)
            report.add(
                f"{variant}, {length:,} tokens: relative difference, 1e-5",
                relative / 1e-5,
            )


MEASUREMENTS = {
    "scores": measure_scores,
    "time": measure_time,
    "memory": measure_memory,
}

if __name__ == "__main__":
    run_measurements(__doc__, MEASUREMENTS)
