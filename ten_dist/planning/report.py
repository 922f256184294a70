"""A plan in words and tables, and as an object for JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.planning.communication import collectives_of_step
from ten_dist.planning.cost_plan import AS_FAST, CostPlan, Layout, ScalePoint
from ten_dist.planning.machines import GIB
from ten_dist.planning.memory import Precision, kept_by_network
from ten_dist.planning.sharding import count, parameters_of
from ten_dist.planning.step_time import (
    TOKENS_READ_PER_SECOND,
    count_operations,
    flops_of_update,
)

_PARTS = {
    "parameters": "params",
    "master_copies": "master",
    "moments": "moments",
    "gradients": "grads",
    "activations": "activ.",
    "loss": "loss",
    "buffers": "buffers",
}


def describe(plan: CostPlan) -> list[str]:
    """The plan as lines of text."""
    sections = (_what, _memory, _step, _scaling, _assumptions)
    lines = [line for section in sections for line in ("", *section(plan))]
    return lines[1:]


def describe_model(name: str, config: TemporalEigenstateConfig) -> str:
    """A model in one line; `name` is that of its preset."""
    kind = "transformer" if config.mixer == "attention" else "TEN"
    if config.hten_scales is not None:
        kind = f"HTEN {','.join(map(str, config.hten_scales))}"
    if config.levels is not None:
        kind = f"TEN with levels {','.join(map(str, config.levels))}"
    return (
        f"model: {name}, {kind}, {count(parameters_of(config)):,} parameters, width "
        f"{config.dim}, {config.n_layers} layers, {config.describe_eigenstates()}, "
        f"vocabulary {config.vocab_size}, energy weight {config.energy_reg_weight}"
    )


def _what(plan: CostPlan) -> list[str]:
    request, config = plan.training, plan.chosen.config
    operations = count_operations(config, request.seq_len)
    step = f"{request.global_batch_size} rows x {request.seq_len} tokens"
    length = "" if plan.steps is None else f"{plan.steps:,} steps of "
    total = plan.tokens_per_step * (plan.steps or 1)
    return [
        describe_model(request.config, config),
        f"run: {length}{step} = {total:,} tokens, {request.precision}",
        (
            f"machine: {plan.topology.nodes} x {plan.topology.gpus_per_node} "
            f"{plan.machine.describe()}"
        ),
        (
            f"operations: {operations.per_token / 1e9:.3f} GFLOP a token, forward and "
            f"backward; the coupling {operations.per_micro_batch / 1e9:.3f} GFLOP a "
            "micro-batch"
        ),
    ]


def _memory(plan: CostPlan) -> Iterator[str]:
    usable = plan.memory_bytes
    kept = ", ".join(
        f"{size / GIB:.3f} recomputing {mode}"
        for mode, size in _kept_by_row(plan).items()
    )
    words = "".join(f"{word:>9}" for word in _PARTS.values())
    yield f"activations of a row in GiB: {kept}"
    yield f"memory of a GPU in GiB at its peak, {usable / GIB:.1f} usable:"
    yield (
        f"  {'':8}{'recompute':>10}{'rows':>6}{words}{'total':>9}  {'peak at':10}"
        f"{'step s':>8}"
    )
    for layout in plan.layouts:
        parts = layout.memory.parts()
        numbers = "".join(f"{parts[name] / GIB:9.2f}" for name in _PARTS)
        verdict = f"{layout.time.total:8.3f}" if layout.fits else "too large"
        if layout is plan.chosen:
            verdict += "  chosen"
        yield (
            f"  {layout.name:8}{layout.config.gradient_checkpointing:>10}"
            f"{layout.work.rows:>6}{numbers}{layout.memory.total / GIB:9.2f}  "
            f"{layout.memory.moment_of_peak:10}{verdict}"
        )
    chosen = plan.chosen
    yield (
        f"  {chosen.name} with micro-batches of {chosen.work.rows} rows x "
        f"{chosen.work.accumulation_steps}, recomputing "
        f"{chosen.config.gradient_checkpointing}: of those that fit and are within "
        f"{AS_FAST - 1:.0%} of the fastest, the one that shards and recomputes least"
    )
    if chosen.memory.host:
        host = chosen.memory.host * plan.topology.gpus_per_node / GIB
        yield f"  in the memory of every host: {host:.1f} GiB"


def _kept_by_row(plan: CostPlan) -> dict[str, float]:
    """Bytes of activations of one row, by what is recomputed."""
    precision = Precision.of(plan.training.precision)
    return {
        config.gradient_checkpointing: kept_by_network(
            config, precision, plan.training.seq_len
        ).per_row
        for config in plan.configs
    }


def _step(plan: CostPlan) -> Iterator[str]:
    layout, time, speeds = plan.chosen, plan.chosen.time, plan.speeds
    operations = count_operations(layout.config, layout.work.seq_len)
    tokens = layout.work.rows * layout.work.seq_len
    executed = operations.of_micro_batch(tokens) * layout.work.accumulation_steps
    yield f"one step, {time.total:.4g} s (assumed):"
    yield (
        f"  compute        {time.compute:10.4f} s  {executed / 1e12:.4g} TFLOP a GPU "
        f"at {speeds.utilization:g} x {speeds.peak_flops / 1e12:g} TFLOP/s"
    )
    yield f"  communication  {time.communication:10.4f} s  one after the other:"
    for one in collectives_of_step(layout.config, layout.sharding, layout.work):
        yield (
            f"    {one.kind:14} {plan.topology.seconds(one):9.4f} s  "
            f"{one.bytes / 1e9:.4g} GB of {one.what} in {one.calls} calls"
        )
    yield f"  hidden         {time.hidden:10.4f} s  of the communication"
    newton_schulz = flops_of_update(layout.config, layout.sharding, layout.work)
    yield f"  update         {time.update:10.4f} s  " + (
        f"AdamW and Muon, whose products are {newton_schulz / 1e12:.4g} TFLOP a GPU"
        if newton_schulz
        else "AdamW, at the speed of memory"
    )
    yield (
        f"  data           {time.data:10.4f} s  read beside it, at "
        f"{TOKENS_READ_PER_SECOND:,} tokens/s a GPU"
    )
    rate, gpus = plan.tokens_per_second, plan.topology.ranks
    model_flops = rate / gpus * operations.per_token / 1e12
    yield (
        f"rate: {rate:,.0f} tokens/s, {rate / gpus:,.0f} a GPU "
        f"({model_flops:.0f} TFLOP/s of the model)"
    )
    cost = plan.cost(gpus, rate)
    if plan.steps is None or cost.days is None:
        yield "length: not known, give --tokens or --steps for days and dollars"
        return
    yield (
        f"length: {plan.steps * plan.tokens_per_step:,} tokens, "
        f"{cost.days:.2f} days, {gpus * cost.days * 24:,.0f} GPU-hours"
    )
    if cost.dollars is None:
        yield "cost: not known, give --dollars_per_gpu_hour"
    else:
        price = plan.machine.dollars_per_gpu_hour
        yield f"cost: {cost.dollars:,.2f} dollars at {price:g} a GPU and hour"


def _scaling(plan: CostPlan) -> Iterator[str]:
    yield "the same run on other numbers of GPUs, each with what is fastest there:"
    yield (
        f"  {'GPUs':>5} {'with':8}{'rows':>5}{'step s':>10}{'communic.':>10}"
        f"{'tokens/s':>14}{'efficiency':>11}{'days':>9}{'dollars':>12}"
    )
    for point in plan.scaling:
        layout = point.layout
        if layout is None:
            yield f"  {point.gpus:>5} {point.reason}"
            continue
        cost = plan.cost(point.gpus, point.tokens_per_second)
        days = "-" if cost.days is None else f"{cost.days:.2f}"
        dollars = "-" if cost.dollars is None else f"{cost.dollars:,.0f}"
        yield (
            f"  {point.gpus:>5} {layout.name:8}{layout.work.rows:>5}"
            f"{layout.time.total:>10.4f}"
            f"{layout.time.communication - layout.time.hidden:>10.4f}"
            f"{point.tokens_per_second:>14,.0f}{point.efficiency:>11.1%}{days:>9}"
            f"{dollars:>12}"
        )
    started = itertools.dropwhile(lambda point: point.layout is None, plan.scaling)
    stop = next((point for point in started if point.reason), None)
    if stop is None:
        yield "  it scales to the end of the table"
    else:
        yield (
            f"  it stops to scale at {stop.gpus} GPUs: {stop.reason}; a larger "
            "--global_batch_size scales further"
        )


def _assumptions(plan: CostPlan) -> list[str]:
    speeds, topology = plan.speeds, plan.topology
    return [
        "assumed, not measured, each an option:",
        (
            f"  --mfu {speeds.utilization:g} of {speeds.peak_flops / 1e12:.1f} TFLOP/s "
            f"dense bfloat16; --overlap {speeds.overlap:g}: how much computation hides "
            "communication"
        ),
        (
            f"  --node_gigabytes {topology.node_bandwidth / 1e9:g} GB/s from a GPU to its "
            f"node, {topology.node_latency * 1e6:g} us a step of a ring "
            "(--node_microseconds)"
        ),
        (
            f"  --network_gigabits {topology.network_bandwidth * 8 / 1e9:g} Gbit/s from a "
            f"node to others, {topology.network_latency * 1e6:g} us "
            "(--network_microseconds)"
        ),
        "not counted: start, validation, checkpoints, failures",
    ]


def to_dict(plan: CostPlan) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, tokens, dollars."""
    rate = plan.tokens_per_second
    return {
        "format": "ten_dist.plan",
        "version": 1,
        "preset": plan.training.config,
        "model": plan.chosen.config.to_dict(),
        "parameters": count(parameters_of(plan.chosen.config)),
        "steps": plan.steps,
        "tokens_per_step": plan.tokens_per_step,
        "precision": plan.training.precision,
        "optimizer": plan.training.optimizer,
        "device": plan.machine.describe(),
        "usable_memory_bytes": plan.memory_bytes,
        "activation_bytes_of_a_row": _kept_by_row(plan),
        "topology": dataclasses.asdict(plan.topology),
        "speeds": dataclasses.asdict(plan.speeds),
        "measured": False,
        "layouts": [_layout(plan, layout) for layout in plan.layouts],
        "chosen": _layout(plan, plan.chosen),
        "tokens_per_second": rate,
        **dataclasses.asdict(plan.cost(plan.topology.ranks, rate)),
        "scaling": [_point(plan, point) for point in plan.scaling],
    }


def _point(plan: CostPlan, point: ScalePoint) -> dict[str, Any]:
    values = dataclasses.asdict(dataclasses.replace(point, layout=None))
    del values["layout"]
    if point.layout is None:
        return values
    cost = plan.cost(point.gpus, point.tokens_per_second)
    return {
        **values,
        "layout": point.layout.name,
        "step_seconds": dataclasses.asdict(point.layout.time),
        **dataclasses.asdict(cost),
    }


def _layout(plan: CostPlan, layout: Layout) -> dict[str, Any]:
    operations = count_operations(layout.config, layout.work.seq_len)
    return {
        "deepspeed_config": layout.name,
        "stage": layout.sharding.stage,
        "offload": layout.sharding.offload,
        "gradient_checkpointing": layout.config.gradient_checkpointing,
        "micro_batch_size": layout.work.rows,
        "accumulation_steps": layout.work.accumulation_steps,
        "fits": layout.fits,
        "memory_bytes": {**layout.memory.parts(), "total": layout.memory.total},
        "moment_of_peak": layout.memory.moment_of_peak,
        "host_bytes": layout.memory.host,
        "flops_per_token": operations.per_token,
        "flops_recomputed_per_token": operations.recomputed_per_token,
        "flops_of_update": flops_of_update(layout.config, layout.sharding, layout.work),
        "step_seconds": {
            **dataclasses.asdict(layout.time),
            "total": layout.time.total,
        },
        "collectives": [
            {**dataclasses.asdict(one), "seconds": plan.topology.seconds(one)}
            for one in collectives_of_step(layout.config, layout.sharding, layout.work)
        ],
    }
