"""What a profile says, in words: phases of the steps, kinds of work, costliest operators."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STEP_PREFIX = "step "
"""How a range that is a step is named in the trace."""
_OPERATORS_SHOWN = 20
_PHASES = {
    "data": "waiting for data",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "update of the weights, and gathering figures",
}
COMMUNICATION = "communication between ranks"
# By what stands in the name of an operator, the first that fits.
_KINDS = (
    (("nccl", "gloo", "mpi", "c10d", "allreduce", "all_reduce", "all_gather",
      "reduce_scatter", "broadcast"), COMMUNICATION),
    (("adam",), "update of the weights"),
    (("ten_dist", "scan"), "scan and other own kernels"),
    (("crossentropy", "cross_entropy", "softmax", "nll_loss"), "loss and softmax"),
    (("accumulategrad",), "adding up gradients"),
    (("attention",), "attention"),
    (("mm", "matmul", "linear", "einsum", "gemm"), "matrix products"),
    (("view", "slice", "narrow", "reshape", "transpose", "expand", "select", "unbind",
      "permute", "as_strided"), "views of tensors, without computing"),
    (("norm", "rsqrt"), "norms"),
    (("embedding", "index", "gather", "scatter"), "embedding and look-up"),
    (("copy", "_to_", "clone", "cat", "contiguous", "stack", "memcpy"),
     "copies and conversions"),
    (("empty", "resize", "zero", "fill", "ones", "malloc", "free"),
     "allocating and filling"),
    (("sum", "mean", "max", "min", "cumsum"), "sums and extremes"),
    (("add", "mul", "sub", "div", "neg", "pow", "sqrt", "exp", "log", "sin", "cos",
      "sigmoid", "silu", "gelu", "relu", "tanh", "where", "foreach", "softplus"),
     "element by element"),
)  # fmt: skip
_OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Spent:
    """Times of the traced steps of one rank, microseconds."""

    steps: list[float]
    """Of each step, by the clock."""
    phases: Mapping[str, float]
    """Of each phase of all steps together, as the host sees it."""
    operators: Mapping[str, float]
    """Of each operator itself, without those that it calls: of the GPU where there is one,
    else of the processor."""
    calls: Mapping[str, int]
    on_gpu: bool

    @classmethod
    def of(cls, events: Sequence[Any], phases: Mapping[str, float]) -> Spent:
        """Sum up the events of a torch profiler; those between steps do not count."""
        ranges = [
            (event.time_range.start, event.time_range.end)
            for event in events
            if event.name.startswith(STEP_PREFIX)
        ]
        inside = [
            event
            for event in events
            if not event.name.startswith(STEP_PREFIX)
            and any(a <= event.time_range.start < b for a, b in ranges)
        ]
        # Kernels appear below the operators that started them.
        on_host = [event for event in inside if "CPU" in str(event.device_type)]
        on_gpu = any(event.self_device_time_total for event in on_host)
        operators: Counter[str] = Counter()
        for event in on_host:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            operators[event.name] += round(own)
        return cls(
            # On a GPU the range appears on the device, too.
            steps=sorted({(a, b): b - a for a, b in ranges}.values()),
            phases=phases,
            operators=operators,
            calls=Counter(event.name for event in on_host),
            on_gpu=on_gpu,
        )


def describe(spent: Spent, rank: int, steps: Sequence[int]) -> str:
    """The table of one rank, in Markdown.

    Args:
        spent: of these steps.
        rank: whose they are.
        steps: the first and the last count.
    """
    total = sum(spent.steps) or 1.0
    device = "GPU" if spent.on_gpu else "processor"
    kinds: Counter[str] = Counter()
    for name, time in spent.operators.items():
        kinds[kind_of(name)] += round(time)
    phases = [(_PHASES.get(name, name), time) for name, time in spent.phases.items()]
    costliest = sorted(spent.operators.items(), key=lambda item: -item[1])
    operators = [
        (f"`{name}`, {kind_of(name)}, {spent.calls[name]:,} calls", time)
        for name, time in costliest[:_OPERATORS_SHOWN]
    ]
    steps_traced = len(spent.steps)
    lines = [
        f"# Rank {rank}, steps {steps[0]} to {steps[-1]}",
        "",
        f"A step took {_milliseconds(statistics.median(spent.steps or [0.0]))}, the median "
        + f"of {steps_traced}; tracing makes steps slower. Shares are of the time of all "
        + "traced steps.",
        "",
        "## Phases of a step",
        "",
        "As the host sees them: what a GPU still computes counts where the host waits for it.",
        "",
        *_table("phase", phases, total, steps_traced),
        "",
        f"## Kinds of work on the {device}",
        "",
        *_table("kind", kinds.most_common(), total, steps_traced),
        "",
        f"## Costliest operators on the {device}",
        "",
        "Each without the operators that it calls.",
        "",
        *_table("operator", operators, total, steps_traced),
    ]
    return "\n".join(lines) + "\n"


def kind_of(operator: str) -> str:
    """What an operator does, in words, by its name."""
    lowered = operator.lower()
    for parts, kind in _KINDS:
        if any(part in lowered for part in parts):
            return kind
    return _OTHER


def _table(
    title: str, rows: Iterable[tuple[str, float]], total: float, steps: int
) -> list[str]:
    lines = [f"| {title} | a step | share |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {_milliseconds(time / max(1, steps))} | {time / total:.1%} |"
        for name, time in rows
    ]
    return lines


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1e3:,.2f} ms"
