"""CPU measurements, each with both of its sides in one run.

    python -m benchmarks.cpu [scan] [step] [length] [loss] [generate] [--output FILE]

Every figure is a ratio of two medians measured in turn, A B A B ..., because the speed of
a shared machine drifts. The model has width 512, 6 layers, 64 eigenstates, vocabulary
50257, 41 M parameters; the transformer beside it has the same size (its MLP is narrower by
what attention needs more). A step is forward, backward and AdamW. Results are printed as a
table and written as JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measure import Report, chosen_measurements, paired
from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.config.model import PAPER
from ten_dist.engine.host_memory import keep_freed_memory
from ten_dist.model.precision import autocast
from ten_dist.recurrence import eigenstate_scan

CPU = torch.device("cpu")
TEN = TemporalEigenstateConfig(
    vocab_size=50257,
    dim=512,
    n_layers=6,
    num_eigenstates=64,
    num_heads=4,
    ffn_gate=False,
)
TRANSFORMER = dataclasses.replace(
    TEN, mixer="attention", num_heads=8, ffn_multiplier=2.875
)
PRECISIONS = ("fp32", "bf16")
# Selection range and input gain: small ranges have a shorter way to the eigenvalues.
SCAN_OPTIONS = {
    "paper": (PAPER["selection_range"], PAPER["input_norm"]),
    "default": (TEN.selection_range, TEN.input_norm),
}


def training_step(model, precision: str, batch: int, steps: int) -> Callable[[], None]:
    """A function that trains `model` on one batch of random tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(TEN.vocab_size, (batch, steps + 1))

    def step() -> None:
        with autocast(CPU, precision):
            losses = model.compute_loss(tokens[:, :-1], tokens[:, 1:])
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _scan_layers(
    batch: int, steps: int, dtype: torch.dtype
) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Inputs of the scan of each layer, and a gradient of its states."""
    width, layers = TEN.num_eigenstates, []
    for _ in range(TEN.n_layers):
        projected = torch.randn(batch, steps, 4 * width + TEN.dim).to(dtype)
        layer = {
            "beta": projected[..., : 2 * width].requires_grad_(),
            "modulation": projected[..., 2 * width : 4 * width].requires_grad_(),
            "alpha": torch.rand(width).requires_grad_(),
            "omega": torch.rand(width).requires_grad_(),
        }
        layers.append((layer, torch.randn(batch, steps, 2 * width).to(dtype)))
    return layers


def measure_scan(report: Report) -> None:
    """The C++ scan, forward and backward, beside `blocked` and a copy of its bytes.

    As in a training step, all layers run forward and then backward, on parts of one
    projection each: when a layer is used again, what the others moved has pushed it out
    of the cache. The copy goes through as many buffers in the same way, once into memory
    that is there and once, as the results of an operator are, into memory fresh from the
    allocator.
    """
    batch, steps, width = 4, 2048, TEN.num_eigenstates
    cases = itertools.product((torch.float32, torch.bfloat16), SCAN_OPTIONS.items())
    for dtype, (label, (selection_range, input_norm)) in cases:
        layers = _scan_layers(batch, steps, dtype)
        options = {"selection_range": selection_range, "input_norm": input_norm}

        def scan(backend: str, layers=layers, options=options) -> None:
            states = [
                eigenstate_scan(**layer, **options, backend=backend)[0]
                for layer, _ in layers
            ]
            for (layer, gradient), out in zip(reversed(layers), reversed(states)):
                torch.autograd.grad(out, list(layer.values()), gradient)

        # Forward reads p, q and complex beta and writes complex c: 6 numbers. Backward
        # reads p, q, c, dc and writes dbeta, dp, dq: 10, and with a gain it reads beta. A
        # copy reads half of what it moves and writes the other half.
        numbers = 6 + 10 + 2 * (input_norm != "none")
        elements = numbers * batch * steps * width // 2
        sources = [torch.randn(elements).to(dtype) for _ in layers]
        targets = [torch.empty_like(source) for source in sources]

        def copy(sources=sources, targets=targets) -> None:
            for source, target in zip(sources, targets):
                target.copy_(source)

        def clone(sources=sources) -> None:
            for source in sources:
                source.clone()

        seconds = paired(
            {
                "cpu": lambda scan=scan: scan("cpu"),
                "blocked": lambda scan=scan: scan("blocked"),
                "copy": copy,
                "clone": clone,
            },
            repeats=15,
        )
        name = f"{str(dtype).removeprefix('torch.')}, {label}"
        report.add(f"scan {name}: blocked / cpu", seconds["blocked"] / seconds["cpu"])
        report.add(f"scan {name}: cpu / copy", seconds["cpu"] / seconds["copy"])
        report.add(
            f"scan {name}: cpu / copy into fresh memory",
            seconds["cpu"] / seconds["clone"],
        )


def measure_step(report: Report) -> None:
    """Training tokens per second beside the transformer, and float32 beside bf16."""
    for steps in (2048, 8192):
        sides = {}
        for precision in PRECISIONS:
            for name, model in (
                ("ten", TemporalEigenstateNetwork(TEN)),
                ("transformer", TemporalEigenstateNetwork(TRANSFORMER)),
            ):
                key = f"{name} {precision}"
                sides[key] = training_step(model, precision, 8192 // steps, steps)
        seconds = paired(sides, repeats=3)
        for precision in PRECISIONS:
            ratio = seconds[f"transformer {precision}"] / seconds[f"ten {precision}"]
            report.add(f"step {precision} T={steps}: TEN / transformer tokens/s", ratio)
        ratio = seconds["ten fp32"] / seconds["ten bf16"]
        report.add(f"step T={steps}: TEN bf16 / fp32 tokens/s", ratio)
        for key, value in seconds.items():
            report.add(f"step {key} T={steps}: tokens/s", 8192 / value)


def measure_scan_share(report: Report) -> None:
    """Part of a training step that the scan takes."""
    model = TemporalEigenstateNetwork(TEN)
    for precision in PRECISIONS:
        step = training_step(model, precision, 4, 2048)
        step()
        with torch.profiler.profile() as profile:
            step()
        rows = profile.key_averages()
        total = sum(row.self_cpu_time_total for row in rows)
        scan = sum(
            row.self_cpu_time_total
            for row in rows
            if row.key.startswith("ten_dist_cpu::scan")
        )
        report.add(f"scan share of a {precision} step, percent", 100 * scan / total)


def measure_length(report: Report) -> None:
    """Tokens per second from T = 512 to 32768 at 32768 tokens a step."""
    model = TemporalEigenstateNetwork(TEN)
    lengths = (512, 2048, 8192, 32768)
    sides = {
        str(steps): training_step(model, "bf16", 32768 // steps, steps)
        for steps in lengths
    }
    seconds = paired(sides, repeats=2)
    for steps in lengths:
        report.add(
            f"length T={steps}: tokens/s beside T=512",
            seconds["512"] / seconds[str(steps)],
        )


def loss_of_whole_logits(model, inputs, targets) -> dict[str, torch.Tensor]:
    """The training loss as torch computes it from all logits at once."""
    logits = model(inputs).flatten(0, 1)
    return {"loss": F.cross_entropy(logits, targets.flatten())}


def peak_of_a_step(whole_logits: bool, batch: int = 8, steps: int = 2048) -> float:
    """Peak memory, in bytes, of a step of batch x steps tokens, in a process of its own."""
    code = (
        "import functools, resource, benchmarks.cpu as b\n"
        "b.keep_freed_memory()\n"
        "model = b.TemporalEigenstateNetwork(b.TEN)\n"
        f"if {whole_logits}:\n"
        "    model.compute_loss = functools.partial(b.loss_of_whole_logits, model)\n"
        f"b.training_step(model, 'fp32', {batch}, {steps})()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    root = Path(__file__).resolve().parents[1]
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return float(output.split()[-1])


def measure_loss(report: Report) -> None:
    """Peak memory of a step of 16384 tokens, the loss in pieces or of whole logits."""
    pieces, whole = peak_of_a_step(False), peak_of_a_step(True)
    report.add("loss: peak memory in pieces / whole logits", pieces / whole)
    report.add("loss: peak memory in pieces, GiB", pieces / 2**30)


@torch.no_grad()
def measure_generate(report: Report) -> None:
    """Time of a token at position 100,000 beside position 100, and the state."""
    model = TemporalEigenstateNetwork(TEN).eval()
    states = {}
    for position in (100, 100_000):
        state = None
        for piece in torch.randint(TEN.vocab_size, (1, position)).split(4096, dim=1):
            _, state = model(piece, state=state, return_state=True, last_only=True)
        states[str(position)] = state
    token = torch.zeros(1, 1, dtype=torch.int64)

    def tokens(state) -> None:
        for _ in range(20):
            model(token, state=state, return_state=True)

    seconds = paired(
        {name: lambda s=state: tokens(s) for name, state in states.items()}, repeats=9
    )
    report.add(
        "generate: time at position 100,000 / 100", seconds["100000"] / seconds["100"]
    )
    size = sum(state.mixer.numel() for state in states["100000"].blocks)
    report.add("generate: state, numbers", size)


MEASUREMENTS = {
    "scan": measure_scan,
    "share": measure_scan_share,
    "step": measure_step,
    "length": measure_length,
    "loss": measure_loss,
    "generate": measure_generate,
}


def main() -> None:
    """Run the measurements named on the command line, or all."""
    names, output = chosen_measurements(__doc__, MEASUREMENTS)
    torch.manual_seed(0)
    # As the trainer does it, for both sides.
    keep_freed_memory()
    report = Report()
    for name in names:
        MEASUREMENTS[name](report)
    if output is not None:
        report.write(output)


if __name__ == "__main__":
    main()
