"""What `ten-dist plan` counts beside what training takes: memory and communication.

python -m benchmarks.plan [pico|nano|micro|variants|kept ...] [--output FILE]

Two ranks on the CPU, through the deepspeed launcher. Memory is the peak of the resident
memory of rank 0 over some steps, less what the same process needs for a tiny model; the
C library gives back at once what tensors free. `kept` is the same where it does not, as
in training (`ten_dist.engine.host_memory`). It needs 6 GB, and a machine that is not
short of memory; other load does not change what is measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Report, run_measurements
from benchmarks.plan_worker import Case, Measured
from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.planning.communication import ALL_GATHER, collectives_of_step
from ten_dist.planning.memory import Memory, peak_memory
from ten_dist.planning.sharding import Sharding, Workload

RANKS = 2
_LOGGED = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}


def measured(cases: Sequence[Case], folder: Path) -> list[Measured]:
    """Train every case for a few steps, in turn."""
    wanted = {
        "cases": [dataclasses.asdict(case) for case in cases],
        "ports": _free_ports(len(cases) + 1),
    }
    (folder / "cases.json").write_text(json.dumps(wanted))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [sys.executable, str(launcher), "--num_accelerators", str(RANKS)]
    command += ["--master_port", str(wanted["ports"][-1])]
    command += ["--module", "benchmarks.plan_worker", str(folder)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # Have the C library map every tensor by itself, and unmap it when it is freed.
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    subprocess.run(command, env=environment, capture_output=True, check=True)
    found = json.loads((folder / "measured.json").read_text())
    return [Measured(**one) for one in found]


def _free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _planned(case: Case) -> tuple[TemporalEigenstateConfig, Sharding, Workload]:
    return (
        TemporalEigenstateConfig.preset(case.preset, **case.model),
        Sharding.from_file(case.deepspeed_file(), RANKS),
        Workload(
            case.rows,
            case.seq_len,
            case.accumulation_steps,
            case.precision,
            on_cpu=True,
        ),
    )


def planned_memory(case: Case) -> Memory:
    """The plan's peak of a case."""
    return peak_memory(*_planned(case))


def planned_collectives(case: Case) -> dict[str, float]:
    """The plan's bytes of a step by collective, those that a rank gives."""
    given: dict[str, float] = {}
    for one in collectives_of_step(*_planned(case)):
        share = RANKS if one.kind == ALL_GATHER else 1
        given[one.kind] = given.get(one.kind, 0.0) + one.bytes / share
    return given


def logged_collectives(found: Measured) -> dict[str, float]:
    """What the comms logger counted, under the plan's names where it has one."""
    return {_LOGGED.get(name, name): size for name, size in found.collectives.items()}


def _cases(
    preset: str,
    *shapes: tuple[int, int],
    precisions: Sequence[str] = ("fp32", "bf16"),
    **fields: object,
) -> list[Case]:
    return [
        Case(preset, stage, rows, seq_len, precision=precision, **fields)
        for rows, seq_len in shapes
        for precision in precisions
        for stage in range(4)
    ]


def _report(report: Report, folder: Path, cases: Sequence[Case]) -> None:
    for case, found in zip(cases, measured(cases, folder)):
        memory = planned_memory(case)
        sent = sum(logged_collectives(found).values())
        words = [case.preset, f"zero{case.stage}", case.precision]
        words.append(f"{case.rows} x {case.seq_len}")
        if case.accumulation_steps > 1:
            words.append(f"x {case.accumulation_steps}")
        changed = case.model | case.zero
        words += [f"{name} {value}" for name, value in changed.items()]
        if case.keeps_freed_memory:
            words.append("kept")
        report.row(
            " ".join(words),
            {
                "measured MB": found.peak_bytes / 1e6,
                "planned MB": memory.total / 1e6,
                "planned / measured": memory.total / found.peak_bytes,
                "sent, planned / measured": sum(planned_collectives(case).values())
                / sent,
            },
        )


def measure_pico(report: Report, folder: Path) -> None:
    """The smallest preset."""
    _report(report, folder, _cases("pico", (1, 512)))


def measure_nano(report: Report, folder: Path) -> None:
    """Also with few tokens, where weights alone count."""
    _report(report, folder, _cases("nano", (1, 32), (4, 256)))


def measure_micro(report: Report, folder: Path) -> None:
    """85 million parameters."""
    _report(report, folder, _cases("micro", (1, 256)))


def measure_variants(report: Report, folder: Path) -> None:
    """Accumulation, recomputation, a hierarchy, a transformer, bfloat16 parameters,
    weights that are kept for backward or not."""
    cases = _cases("nano", (1, 256), precisions=["bf16"], accumulation_steps=2)
    for fields in (
        {"gradient_checkpointing": "block"},
        {"hten_scales": [1, 2, 4]},
        {"mixer": "attention"},
    ):
        cases += _cases("nano", (2, 256), precisions=["bf16"], model=fields)
    cases += [
        Case("nano", stage, 2, 256, precision="bf16_params") for stage in (1, 2, 3)
    ]
    # Gathering ahead, up to a bucket, keeps all of so small a model for backward.
    for distance in (0, 20_000_000):
        zero = {"stage3_max_reuse_distance": distance}
        cases.append(Case("nano", 3, 2, 256, zero=zero))
    _report(report, folder, cases)


def measure_kept(report: Report, folder: Path) -> None:
    """Resident memory of a training as it is: freed memory stays with the process."""
    for preset in ("pico", "nano", "micro"):
        cases = _cases(preset, (1, 256), precisions=["bf16"], keeps_freed_memory=True)
        _report(report, folder, cases)


MEASUREMENTS = {
    "pico": measure_pico,
    "nano": measure_nano,
    "micro": measure_micro,
    "variants": measure_variants,
    "kept": measure_kept,
}


if __name__ == "__main__":
    run_measurements(__doc__, MEASUREMENTS)
