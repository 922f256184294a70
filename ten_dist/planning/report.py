"""A plan in words and tables, and as an object for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.planning.choice import AS_FAST, Layout, stops_at
from ten_dist.planning.communication import collectives_of_step
from ten_dist.planning.cost_plan import Cost, CostPlan
from ten_dist.planning.machines import GIB
from ten_dist.planning.memory import Precision, kept_by_network
from ten_dist.planning.sharding import count, parameters_of
from ten_dist.planning.step_time import TOKENS_READ_PER_SECOND

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
    return [
        *_what(plan),
        "",
        *_memory(plan),
        "",
        *_step(plan),
        "",
        *_scaling(plan),
        "",
        *_assumptions(plan),
    ]


def describe_model(name: str, config: TemporalEigenstateConfig) -> str:
    """A model in one line; `name` is that of its preset."""
    kind = "transformer" if config.mixer == "attention" else "TEN"
    if config.hten_scales is not None:
        kind = f"HTEN {','.join(map(str, config.hten_scales))}"
    return (
        f"model: {name}, {kind}, {count(parameters_of(config)):,} parameters, width "
        f"{config.dim}, {config.n_layers} layers, {config.num_eigenstates} eigenstates, "
        f"vocabulary {config.vocab_size}, energy weight {config.energy_reg_weight}"
    )


def _what(plan: CostPlan) -> list[str]:
    request, config = plan.planner.request, plan.chosen.config
    operations = plan.planner.operations(config)
    step = f"{request.global_batch_size} rows x {request.seq_len} tokens"
    length = "" if plan.steps is None else f"{plan.steps:,} steps of "
    total = request.tokens_per_step * (plan.steps or 1)
    return [
        describe_model(plan.preset, config),
        f"run: {length}{step} = {total:,} tokens, {request.precision}",
        (
            f"machine: {plan.topology.nodes} x {plan.topology.gpus_per_node} "
            f"{plan.device}"
        ),
        (
            f"operations: {operations.per_token / 1e9:.3f} GFLOP a token, forward and "
            f"backward; the coupling {operations.per_micro_batch / 1e9:.3f} GFLOP a "
            "micro-batch"
        ),
    ]


def _memory(plan: CostPlan) -> list[str]:
    usable = plan.planner.request.memory_bytes
    kept = ", ".join(
        f"{size / GIB:.3f} recomputing {mode}"
        for mode, size in _kept_by_row(plan).items()
    )
    lines = [
        f"activations of a row in GiB: {kept}",
        f"memory of a GPU in GiB at its peak, {usable / GIB:.1f} usable:",
        f"  {'':8}{'recompute':>10}{'rows':>6}"
        + "".join(f"{word:>9}" for word in _PARTS.values())
        + f"{'total':>9}  {'peak at':10}{'step s':>8}",
    ]
    for layout in plan.layouts:
        parts = layout.memory.parts()
        numbers = "".join(f"{parts[name] / GIB:9.2f}" for name in _PARTS)
        verdict = f"{layout.time.total:8.3f}" if layout.fits else "too large"
        if layout is plan.chosen:
            verdict += "  chosen"
        lines.append(
            f"  {layout.name:8}{layout.config.gradient_checkpointing:>10}"
            f"{layout.work.rows:>6}{numbers}{layout.memory.total / GIB:9.2f}  "
            f"{layout.memory.moment_of_peak:10}{verdict}"
        )
    chosen = plan.chosen
    lines.append(
        f"  {chosen.name} with micro-batches of {chosen.work.rows} rows x "
        f"{chosen.work.accumulation_steps}, recomputing "
        f"{chosen.config.gradient_checkpointing}: of those that fit and are within "
        f"{AS_FAST - 1:.0%} of the fastest, the one that shards and recomputes least"
    )
    if chosen.memory.host:
        host = chosen.memory.host * plan.topology.gpus_per_node / GIB
        lines.append(f"  in the memory of every host: {host:.1f} GiB")
    return lines


def _kept_by_row(plan: CostPlan) -> dict[str, float]:
    """Bytes of activations of one row, by what is recomputed."""
    request = plan.planner.request
    precision = Precision.of(request.precision)
    return {
        config.gradient_checkpointing: kept_by_network(
            config, precision, request.seq_len
        ).per_row
        for config in request.configs
    }


def _step(plan: CostPlan) -> list[str]:
    layout, time = plan.chosen, plan.chosen.time
    request, speeds = plan.planner.request, plan.planner.speeds
    operations = plan.planner.operations(layout.config)
    tokens = layout.work.rows * layout.work.seq_len
    executed = operations.of_micro_batch(tokens) * layout.work.accumulation_steps
    lines = [
        f"one step, {time.total:.4g} s (assumed):",
        (
            f"  compute        {time.compute:10.4f} s  {executed / 1e12:.4g} TFLOP a GPU "
            f"at {speeds.utilization:g} x {speeds.peak_flops / 1e12:g} TFLOP/s"
        ),
        f"  communication  {time.communication:10.4f} s  one after the other:",
    ]
    for one in collectives_of_step(layout.config, layout.sharding, layout.work):
        lines.append(
            f"    {one.kind:14} {plan.topology.seconds(one):9.4f} s  "
            f"{one.bytes / 1e9:.4g} GB of {one.what} in {one.calls} calls"
        )
    lines += [
        f"  hidden         {time.hidden:10.4f} s  of the communication",
        f"  update         {time.update:10.4f} s  AdamW, at the speed of memory",
        (
            f"  data           {time.data:10.4f} s  read beside it, at "
            f"{TOKENS_READ_PER_SECOND:,} tokens/s a GPU"
        ),
    ]
    rate = plan.tokens_per_second
    gpus = plan.topology.ranks
    model_flops = rate / gpus * operations.per_token / 1e12
    lines.append(
        f"rate: {rate:,.0f} tokens/s, {rate / gpus:,.0f} a GPU "
        f"({model_flops:.0f} TFLOP/s of the model)"
    )
    cost = plan.cost(gpus, rate)
    if cost is None:
        lines.append("length: not known, give --tokens or --steps for days and dollars")
        return lines
    tokens_of_run = plan.steps * request.tokens_per_step
    lines.append(
        f"length: {tokens_of_run:,} tokens, {cost.days:.2f} days, "
        f"{cost.gpu_hours:,.0f} GPU-hours"
    )
    if cost.dollars is None:
        lines.append("cost: not known, give --dollars_per_gpu_hour")
    else:
        lines.append(
            f"cost: {cost.dollars:,.2f} dollars at {cost.dollars_per_gpu_hour:g} a GPU "
            "and hour"
        )
    return lines


def _scaling(plan: CostPlan) -> list[str]:
    lines = [
        "the same run on other numbers of GPUs, each with what is fastest there:",
        (
            f"  {'GPUs':>5} {'with':8}{'rows':>5}{'step s':>10}{'communic.':>10}"
            f"{'tokens/s':>14}{'efficiency':>11}{'days':>9}{'dollars':>12}"
        ),
    ]
    for point in plan.scaling:
        if point.layout is None:
            lines.append(f"  {point.gpus:>5} {point.reason}")
            continue
        layout = point.layout
        cost = plan.cost(point.gpus, point.tokens_per_second)
        days = "-" if cost is None else f"{cost.days:.2f}"
        dollars = "-"
        if cost is not None and cost.dollars is not None:
            dollars = f"{cost.dollars:,.0f}"
        lines.append(
            f"  {point.gpus:>5} {layout.name:8}{layout.work.rows:>5}"
            f"{layout.time.total:>10.4f}"
            f"{layout.time.communication - layout.time.hidden:>10.4f}"
            f"{point.tokens_per_second:>14,.0f}{point.efficiency:>11.1%}{days:>9}"
            f"{dollars:>12}"
        )
    stop = stops_at(list(plan.scaling))
    if stop is None:
        lines.append("  it scales to the end of the table")
    else:
        lines.append(
            f"  it stops to scale at {stop.gpus} GPUs: {stop.reason}; a larger "
            "--global_batch_size scales further"
        )
    return lines


def _assumptions(plan: CostPlan) -> list[str]:
    speeds, topology = plan.planner.speeds, plan.topology
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
    request = plan.planner.request
    rate = plan.tokens_per_second
    return {
        "format": "ten_dist.plan",
        "version": 1,
        "preset": plan.preset,
        "model": plan.chosen.config.to_dict(),
        "parameters": count(parameters_of(plan.chosen.config)),
        "steps": plan.steps,
        "tokens_per_step": request.tokens_per_step,
        "precision": request.precision,
        "device": plan.device,
        "usable_memory_bytes": request.memory_bytes,
        "activation_bytes_of_a_row": _kept_by_row(plan),
        "topology": dataclasses.asdict(plan.topology),
        "speeds": dataclasses.asdict(plan.planner.speeds),
        "measured": False,
        "layouts": [_layout(plan, layout) for layout in plan.layouts],
        "chosen": _layout(plan, plan.chosen),
        "tokens_per_second": rate,
        **_cost(plan.cost(plan.topology.ranks, rate)),
        "scaling": [
            {
                "gpus": point.gpus,
                "tokens_per_second": point.tokens_per_second,
                "efficiency": point.efficiency,
                "reason": point.reason,
                **(
                    {}
                    if point.layout is None
                    else {
                        "layout": point.layout.name,
                        "step_seconds": dataclasses.asdict(point.layout.time),
                        **_cost(plan.cost(point.gpus, point.tokens_per_second)),
                    }
                ),
            }
            for point in plan.scaling
        ],
    }


def _cost(cost: Cost | None) -> dict[str, float | None]:
    if cost is None:
        return {"days": None, "dollars": None}
    return {"days": cost.days, "dollars": cost.dollars}


def _layout(plan: CostPlan, layout: Layout) -> dict[str, Any]:
    operations = plan.planner.operations(layout.config)
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
        "step_seconds": {
            **dataclasses.asdict(layout.time),
            "total": layout.time.total,
        },
        "collectives": [
            {**dataclasses.asdict(one), "seconds": plan.topology.seconds(one)}
            for one in collectives_of_step(layout.config, layout.sharding, layout.work)
        ],
    }
