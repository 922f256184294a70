"""The plan's memory and communication beside those of real training, and by hand."""

import dataclasses

import pytest

from benchmarks.plan import (
    logged_collectives,
    measured,
    planned_collectives,
    planned_memory,
)
from benchmarks.plan_worker import Case
from ten_dist import TemporalEigenstateConfig
from ten_dist.planning.communication import ALL_TO_ALL, collectives_of_step
from ten_dist.planning.memory import peak_memory
from ten_dist.planning.sharding import (
    Sharding,
    Workload,
    count,
    parameters_of,
    touched_elements,
)

NANO = TemporalEigenstateConfig.preset("nano")
PARAMETERS = count(parameters_of(NANO))


@pytest.mark.slow
def test_peaks_and_volumes_are_those_of_training(tmp_path):
    shapes = {"pico": (2, 256), "nano": (1, 64)}
    cases = [
        Case(preset, stage, *shape)
        for preset, shape in shapes.items()
        for stage in range(4)
    ]
    for case, found in zip(cases, measured(cases, tmp_path), strict=True):
        planned = planned_memory(case).total
        assert planned == pytest.approx(found.peak_bytes, rel=0.15), case
        sent, logged = planned_collectives(case), logged_collectives(found)
        for name in logged.keys() | sent.keys():
            # A few numbers more are sent: losses, norms, flags.
            assert logged.get(name, 0) == pytest.approx(
                sent.get(name, 0), rel=1e-4, abs=2e4
            ), (case, name)


def parts(stage, ranks, rows=1, **work):
    workload = Workload(rows, 128, precision="fp32", **work)
    return peak_memory(NANO, Sharding(stage, ranks), workload)


def test_state_is_divided_as_the_stage_says():
    bytes_of = 4 * PARAMETERS
    whole = parts(0, 8)
    assert (whole.parameters, whole.moments) == (bytes_of, 2 * bytes_of)
    assert whole.master_copies == 0
    for stage in (1, 2, 3):
        memory = parts(stage, 8)
        assert memory.moments == 2 * bytes_of / 8
        assert memory.master_copies == bytes_of / 8
    assert parts(1, 8).parameters == bytes_of


def test_offload_moves_the_state_to_the_host():
    on_device = peak_memory(NANO, Sharding(3, 8), Workload(1, 128))
    offloaded = peak_memory(
        NANO, Sharding(3, 8, offload=True, offload_parameters=True), Workload(1, 128)
    )
    assert offloaded.moments == offloaded.master_copies == 0
    assert offloaded.total < on_device.total
    # What checkpoints are written from is on the host in any case.
    assert on_device.host == 12 * PARAMETERS / 8
    assert offloaded.host > 28 * PARAMETERS / 8


def test_recomputation_keeps_less():
    block = dataclasses.replace(NANO, gradient_checkpointing="block")
    work = Workload(8, 1024)
    kept = [peak_memory(c, Sharding(2, 8), work) for c in (NANO, block)]
    assert kept[1].activations < 0.3 * kept[0].activations
    assert kept[1].total < kept[0].total


def test_gathered_weights_stay_only_within_the_reuse_distance():
    work = Workload(1, 128, precision="fp32")
    near = peak_memory(NANO, Sharding(3, 8, reuse_distance=0, bucket=1), work)
    far = peak_memory(NANO, Sharding(3, 8), work)
    assert far.parameters - near.parameters > 4 * 0.4 * PARAMETERS


def test_gradients_are_copied_whole_where_a_partition_touches_them():
    parameters = parameters_of(NANO)
    assert touched_elements(parameters, 1) == PARAMETERS
    # The embedding is most of it, and reaches into the parts of several ranks.
    head = NANO.vocab_size * NANO.dim
    assert touched_elements(parameters, 8) >= head
    assert touched_elements(parameters, 8) < head + PARAMETERS / 4


def test_muon_has_one_moment_of_a_matrix_and_exchanges_matrices():
    sizes, *_ = parameters_of(NANO, "muon")
    matrices = sum(sizes)
    assert 0 < matrices < PARAMETERS - NANO.vocab_size * NANO.dim
    for stage in range(4):
        adamw, muon = parts(stage, 8), parts(stage, 8, optimizer="muon")
        share = 4 * matrices / (8 if stage else 1)
        assert adamw.moments - muon.moments == share
        assert adamw.host - muon.host == 4 * matrices / 8
    # To their owners, and back.
    work = Workload(1, 128, precision="fp32", optimizer="muon")
    sent = collectives_of_step(NANO, Sharding(2, 8), work)
    (exchanged,) = [one for one in sent if one.kind == ALL_TO_ALL]
    assert exchanged.bytes == 2 * 4 * matrices / 8
    assert exchanged.calls % 2 == 0
