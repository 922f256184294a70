"""GPU measurements, each with its sides in one run. Not yet measured on a GPU.

    python -m benchmarks.gpu [scan] [step] [length] [tune] [--quick] [--output FILE]

First every backend of the scan is checked against the float64 oracle, forward and
backward; where one is wrong nothing is measured and the exit status is 1. Then

    scan    GB/s of the scan, forward and backward, beside a copy of as many bytes
    step    a training step of each preset, beside a transformer of its size, as written
            and with each block compiled: time, tokens/s, MFU, peak memory
    length  the same for the largest preset from T = 2048 to 131072 at constant tokens a
            step, blocks recomputed in backward on both sides
    tune    the scan with other sizes of its kernels; only if it is named

Times are medians by the GPU's own clock, all sides in turn, A B A B .... A training step
is forward, backward and AdamW, float32 parameters under bfloat16 autocast. MFU is what
`flops.py` counts over the dense bfloat16 peak of the GPU. Bytes of the scan are what it
must move: in bfloat16, 12 forward and 20 backward for each complex element (p, q, beta
read and c written; p, q, c, dc read and dbeta, dp, dq written).

Without a GPU, `--device cpu` runs everything in miniature, to see that it works.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import Report, gpu_seconds_of, paired, seconds_of
from benchmarks.scan_comparison import TOLERANCE, assert_near, make_inputs, run
from ten_dist import PRESETS, TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.model.precision import autocast
from ten_dist.planning.machines import peak_tflops
from ten_dist.planning.step_time import training_flops_per_token
from ten_dist.recurrence import available_backends, eigenstate_scan, triton_scan

BYTES_FORWARD, BYTES_BACKWARD = 6, 10
"""Numbers that the scan must move for each complex element, each way."""
COLD_BYTES = 2**29
"""Inputs of one timed call together: several times the cache of any GPU."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is that is measured."""

    repeats: int
    scan_batch: int
    scan_width: int
    scan_lengths: tuple[int, ...]
    presets: tuple[str, ...]
    step_tokens: int
    step_lengths: tuple[int, ...]
    long_tokens: int
    long_lengths: tuple[int, ...]


GPU_SIZES = Sizes(
    repeats=10,
    scan_batch=8,
    scan_width=256,
    scan_lengths=(2048, 8192, 32768, 131072),
    presets=tuple(name for name in PRESETS if name != "pico"),
    step_tokens=16384,
    step_lengths=(2048, 8192),
    long_tokens=131072,
    long_lengths=(2048, 8192, 32768, 131072),
)
QUICK_SIZES = dataclasses.replace(
    GPU_SIZES,
    repeats=3,
    scan_lengths=(2048, 131072),
    presets=("micro", "xlarge"),
    step_lengths=(2048,),
    long_lengths=(2048, 131072),
)
CPU_SIZES = Sizes(
    repeats=1,
    scan_batch=2,
    scan_width=16,
    scan_lengths=(32, 100),
    presets=("pico",),
    step_tokens=64,
    step_lengths=(32,),
    long_tokens=64,
    long_lengths=(16, 64),
)


class Bench:
    """What is measured on, and how."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        on_gpu = self.device.type == "cuda"
        sizes = QUICK_SIZES if options.quick else GPU_SIZES
        self.sizes = sizes if on_gpu else CPU_SIZES
        if options.preset:
            self.sizes = dataclasses.replace(self.sizes, presets=(options.preset,))
        self.backend = "triton" if on_gpu else "blocked"
        self.compiler = options.compiler
        self.with_transformer = not options.no_transformer
        self.report = Report()
        self.name = torch.cuda.get_device_name() if on_gpu else "cpu"
        self.peak_tflops = options.peak_tflops or peak_tflops(self.name)

    def seconds(self, sides: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each side by the clock of the device, in turn."""
        timed = gpu_seconds_of if self.device.type == "cuda" else seconds_of
        return paired(sides, self.sizes.repeats, timed)

    def replayed(self, function: Callable[[], object]) -> Callable[[], object]:
        """The work of `function` on the GPU without the time that Python needs to
        launch it: a CUDA graph, which replays with the same inputs."""
        if self.device.type != "cuda":
            return function
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def facts(self) -> dict[str, object]:
        """For the report: the device and the versions of what runs on it."""
        facts: dict[str, object] = {
            "device": self.name,
            "backend": self.backend,
            "cuda": torch.version.cuda,
            "peak_tflops": self.peak_tflops,
        }
        if self.device.type == "cuda":
            import triton

            properties = torch.cuda.get_device_properties(self.device)
            facts["triton"] = triton.__version__
            facts["device_memory"] = properties.total_memory
            facts["multiprocessors"] = properties.multi_processor_count
        return facts


def check(bench: Bench) -> list[str]:
    """What is wrong with the backends of this device, against the float64 oracle."""
    wrong = []
    backends = {"cuda": ("triton", "blocked"), "cpu": ("cpu", "blocked")}
    for backend in backends[bench.device.type]:
        if backend not in available_backends():
            wrong.append(f"{backend} is not available")
            continue
        cases = itertools.product(
            TOLERANCE, ("none", "static", "dynamic"), ((300, 33), (64, 5))
        )
        for dtype, input_norm, (steps, width) in cases:
            inputs = make_inputs(steps, width, dtype)
            if dtype == torch.bfloat16:
                # Rounded states at a decay of 0.9999 are off by their own resolution.
                inputs["alpha"] = inputs["alpha"].clamp(max=4.0)
            on_device = {n: t.to(bench.device) for n, t in inputs.items()}
            actual = run(on_device, backend, input_norm)
            expected = run(inputs, "reference", input_norm, wide=True)
            try:
                assert_near(actual, expected, TOLERANCE[dtype])
            except AssertionError as error:
                case = f"{backend} {dtype} {input_norm} T={steps} K={width}"
                wrong.append(f"{case}: {error}")
    return wrong


def scan_sides(
    bench: Bench, dtype: torch.dtype, steps: int
) -> tuple[dict[str, Callable[[], object]], int]:
    """Forward, forward and backward, and copies of their bytes, over several inputs.

    Returns:
        The sides, and how many complex elements one call of each has.
    """
    batch, width = bench.sizes.scan_batch, bench.sizes.scan_width
    size = torch.finfo(dtype).bits // 8
    elements = batch * steps * width
    inputs = 1
    if bench.device.type == "cuda":
        inputs = max(1, math.ceil(COLD_BYTES / (BYTES_FORWARD * size * elements)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=bench.device, dtype=dtype)

    cases = [
        (normal(batch, steps, 2 * width), normal(batch, steps, 2 * width))
        for _ in range(inputs)
    ]
    gradient = normal(batch, steps, 2 * width)
    alpha = torch.linspace(-2, 7, width, device=bench.device)
    omega = torch.rand(width, device=bench.device)

    def forward() -> None:
        with torch.no_grad():
            for beta, modulation in cases:
                eigenstate_scan(beta, alpha, omega, modulation, backend=bench.backend)

    def both() -> None:
        for beta, modulation in cases:
            # New leaves each time: autograd ties a leaf to the stream that it is first
            # used on, and a graph is captured on a stream of its own.
            leaves = [
                t.detach().requires_grad_() for t in (beta, alpha, omega, modulation)
            ]
            states, _ = eigenstate_scan(*leaves, backend=bench.backend)
            torch.autograd.grad(states, leaves, gradient)

    # A copy reads half of what it moves and writes the other half.
    source = normal(inputs * elements * BYTES_FORWARD // 2)
    target = torch.empty_like(source)
    sides = {
        "forward": bench.replayed(forward),
        "both": bench.replayed(both),
        "copy": bench.replayed(lambda: target.copy_(source)),
    }
    return sides, inputs * elements


def measure_scan(bench: Bench) -> None:
    """Bandwidth of the scan, each way, and as a part of that of a copy."""
    for dtype, steps in itertools.product(TOLERANCE, bench.sizes.scan_lengths):
        sides, elements = scan_sides(bench, dtype, steps)
        seconds = bench.seconds(sides)
        bytes_ = elements * torch.finfo(dtype).bits // 8
        copy = BYTES_FORWARD * bytes_ / seconds["copy"]
        backward_seconds = seconds["both"] - seconds["forward"]
        name = f"scan {str(dtype).removeprefix('torch.')} T={steps}"
        for way, numbers, time in (
            ("forward", BYTES_FORWARD, seconds["forward"]),
            ("backward", BYTES_BACKWARD, backward_seconds),
        ):
            rate = numbers * bytes_ / time
            columns = {"GB/s": rate / 1e9, "% of a copy": 100 * rate / copy}
            bench.report.row(f"{name} {way}", columns)
        bench.report.row(f"{name} copy", {"GB/s": copy / 1e9})


def measure_tuning(bench: Bench) -> None:
    """GB/s of the scan for other sizes of the kernels than those it has."""
    tuned = ("BLOCK", "WARPS", "UNROLL", "UNROLL_BACKWARD", "chunk_steps")
    kept = {name: getattr(triton_scan, name) for name in tuned}
    programs = ((32, 1), (64, 1), (64, 2), (128, 4))
    reads_ahead = ((4, 2), (8, 4), (8, 8))
    try:
        for steps in (bench.sizes.scan_lengths[0], bench.sizes.scan_lengths[-1]):
            usual = kept["chunk_steps"](steps)
            for (block, warps), (unroll, backward), chunk in itertools.product(
                programs, reads_ahead, (usual // 2, usual, 2 * usual)
            ):
                values = (block, warps, unroll, backward, lambda _, chunk=chunk: chunk)
                for name, value in zip(tuned, values):
                    setattr(triton_scan, name, value)
                sides, elements = scan_sides(bench, torch.bfloat16, steps)
                seconds = bench.seconds(sides)
                rates = {
                    "GB/s forward": BYTES_FORWARD / seconds["forward"],
                    "GB/s both": (BYTES_FORWARD + BYTES_BACKWARD) / seconds["both"],
                }
                bench.report.row(
                    f"tune T={steps} {block=} {warps=} {unroll=} {backward=} {chunk=}",
                    {n: 2 * elements * r / 1e9 for n, r in rates.items()},
                )
    finally:
        for name, value in kept.items():
            setattr(triton_scan, name, value)


def transformer_like(config: TemporalEigenstateConfig) -> TemporalEigenstateConfig:
    """A transformer of as many parameters; the width of its MLP makes up the rest."""

    def with_ffn(ffn_dim: int) -> TemporalEigenstateConfig:
        return dataclasses.replace(
            config,
            mixer="attention",
            hten_scales=None,
            num_heads=config.dim // 64 if config.dim % 64 == 0 else config.num_heads,
            # Half more than whole: the product with dim must not round below it. A gated
            # MLP takes two thirds.
            ffn_multiplier=(1.5 if config.ffn_gate else 1)
            * (ffn_dim + 0.5)
            / config.dim,
        )

    def parameters(config: TemporalEigenstateConfig) -> int:
        with torch.device("meta"):
            return TemporalEigenstateNetwork(config).num_parameters()

    least = parameters(with_ffn(64))
    each = parameters(with_ffn(128)) - least
    return with_ffn(64 * max(1, 1 + round((parameters(config) - least) / each)))


class Contender:
    """A model in training, with its blocks as they are and compiled."""

    def __init__(
        self, bench: Bench, name: str, config: TemporalEigenstateConfig
    ) -> None:
        self.bench = bench
        self.model = TemporalEigenstateNetwork(config).to(bench.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        compiled = nn.ModuleList(
            torch.compile(block, fullgraph=True, dynamic=False, backend=bench.compiler)
            for block in self.model.blocks
        )
        # Both have the same parameters.
        self.blocks = {name: self.model.blocks, f"{name} compiled": compiled}

    def step(self, side: str, tokens: Tensor) -> None:
        """Train on tokens [B, T + 1] with the blocks of a side."""
        self.model.blocks = self.blocks[side]
        with autocast(self.bench.device, "bf16"):
            losses = self.model.compute_loss(tokens[:, :-1], tokens[:, 1:])
        losses["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resident_bytes(self) -> int:
        """Parameters and optimizer state."""
        tensors = [*self.model.parameters()]
        for state in self.optimizer.state.values():
            tensors += [t for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def peak_bytes(contender: Contender, run_step: Callable[[], object]) -> int | None:
    """Most memory of a step, without what other contenders hold; None on a CPU."""
    if contender.bench.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_step()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    return used + contender.resident_bytes()


def compare_steps(
    bench: Bench, title: str, sides: dict[str, Contender], batch: int, steps: int
) -> None:
    """Measure a training step of each side on [batch, steps] tokens."""
    # Graphs compiled for another length are of no use for this one.
    torch.compiler.reset()
    vocab = next(iter(sides.values())).model.config.vocab_size
    tokens = torch.randint(vocab, (batch, steps + 1), device=bench.device)
    runs: dict[str, Callable[[], object]] = {}
    peaks = {}
    for side, contender in sides.items():
        run_step = functools.partial(contender.step, side, tokens)
        try:
            run_step()
            peaks[side] = peak_bytes(contender, run_step)
        except torch.OutOfMemoryError:
            contender.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            print(f"{title} T={steps} {side}: out of memory", flush=True)
            bench.report.figures[f"{title} T={steps} {side}: out of memory"] = True
            continue
        runs[side] = run_step
    for side, seconds in bench.seconds(runs).items():
        flops = training_flops_per_token(sides[side].model, steps)
        rate = batch * steps / seconds
        peak = bench.peak_tflops
        columns = {
            "ms": 1000 * seconds,
            "tokens/s": rate,
            "TFLOP/s": rate * flops / 1e12,
            "MFU %": None if peak is None else 100 * rate * flops / (peak * 1e12),
            "GiB": None if peaks[side] is None else peaks[side] / 2**30,
        }
        bench.report.row(f"{title} T={steps} {side}", columns)


def compare_lengths(
    bench: Bench,
    title: str,
    config: TemporalEigenstateConfig,
    tokens: int,
    lengths: tuple[int, ...],
) -> None:
    """Measure `tokens` tokens a step in rows of each length, all sides in turn."""
    configs = {"ten": config}
    if bench.with_transformer:
        configs["transformer"] = transformer_like(config)
    sides = {}
    for name, its_config in configs.items():
        contender = Contender(bench, name, its_config)
        sides |= dict.fromkeys(contender.blocks, contender)
    for steps in lengths:
        compare_steps(bench, title, sides, tokens // steps, steps)


def measure_steps(bench: Bench) -> None:
    """A training step of every preset."""
    sizes = bench.sizes
    for preset in sizes.presets:
        config = TemporalEigenstateConfig.preset(preset, scan_backend=bench.backend)
        compare_lengths(
            bench, f"step {preset}", config, sizes.step_tokens, sizes.step_lengths
        )
        # The next two models need the memory of these.
        gc.collect()


def measure_length(bench: Bench) -> None:
    """The largest preset over lengths, at constant tokens a step."""
    sizes = bench.sizes
    preset = sizes.presets[-1]
    config = TemporalEigenstateConfig.preset(
        preset, scan_backend=bench.backend, gradient_checkpointing="block"
    )
    compare_lengths(
        bench, f"length {preset}", config, sizes.long_tokens, sizes.long_lengths
    )


MEASUREMENTS = {
    "scan": measure_scan,
    "step": measure_steps,
    "length": measure_length,
    "tune": measure_tuning,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with a usage error where they cannot be met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(MEASUREMENTS))
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--preset", choices=PRESETS, help="this preset alone")
    parser.add_argument(
        "--peak_tflops",
        type=float,
        help="dense bfloat16 peak of a GPU that is not known here, for the MFU",
    )
    parser.add_argument("--no_transformer", action="store_true", help="without it")
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(MEASUREMENTS)
    if unknown:
        parser.error(f"no measurement {', '.join(sorted(unknown))}")
    if options.device == "cpu" and "tune" in options.names:
        parser.error("tune needs a GPU")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Check, then run the measurements named on the command line, or all but `tune`."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch finds no GPU; --device cpu runs everything in "
            "miniature, to see that it works",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    bench = Bench(options)
    wrong = check(bench)
    if wrong:
        print("\n".join(["not measured: the scan is wrong", *wrong]), file=sys.stderr)
        return 1
    print(f"scan backends agree with the float64 oracle on {bench.name}")
    if bench.peak_tflops is None and bench.device.type == "cuda":
        print(f"no MFU: the peak of {bench.name} is not known, give --peak_tflops")
    for name in options.names or [n for n in MEASUREMENTS if n != "tune"]:
        MEASUREMENTS[name](bench)
    if options.output is not None:
        bench.report.write(options.output, **bench.facts())
    return 0


if __name__ == "__main__":
    sys.exit(main())
