"""The GPU benchmark where there is no GPU: its counts, its refusals, a run in miniature."""

import json

import pytest
import torch

from benchmarks import gpu
from ten_dist import PRESETS, TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.planning.devices import peak_tflops
from ten_dist.planning.flops import training_flops_per_token

SMALL = {"vocab_size": 50, "dim": 16, "n_layers": 3, "num_eigenstates": 12}
HEAD = 50 * 16
MLP = 2 * 16 * 64


def network(**fields):
    return TemporalEigenstateNetwork(
        TemporalEigenstateConfig(**SMALL, num_heads=2, **fields)
    )


def test_operations_of_a_ten_by_hand():
    # W_in and W_sel 2K each, the gate d, then W_out.
    mixer = 16 * (24 + 24 + 16) + 24 * 16
    expected = 6 * (3 * (mixer + MLP) + HEAD)
    assert training_flops_per_token(network(), steps=100) == expected
    learnable = network(learnable_selection_range=True)
    assert training_flops_per_token(learnable, steps=7) == expected


def test_coarse_scales_count_at_their_rate():
    # Of one scale: 6 eigenstates, its own gate, and the mixing matrix.
    scale = 16 * (12 + 12 + 16) + 12 * 16 + 16 * 16
    expected = 6 * (3 * (scale * (1 + 1 / 4) + MLP) + HEAD)
    model = network(hten_scales=(1, 4))
    assert training_flops_per_token(model, steps=100) == pytest.approx(expected)


def test_attention_counts_the_positions_that_a_token_sees():
    model = network(mixer="attention")
    matrices = 6 * (3 * (4 * 16 * 16 + MLP) + HEAD)
    # One token attends to itself alone: 2 products of 16, 2 operations each, 3 times.
    one = training_flops_per_token(model, steps=1)
    assert one == matrices + 3 * (2 * 2 * 16) * 3
    three = training_flops_per_token(model, steps=3)
    assert three - matrices == 2 * (one - matrices)


@pytest.mark.parametrize("preset", PRESETS)
def test_transformer_has_the_size_of_the_preset(preset):
    config = TemporalEigenstateConfig.preset(preset)
    with torch.device("meta"):
        sizes = [
            TemporalEigenstateNetwork(c).num_parameters()
            for c in (config, gpu.transformer_like(config))
        ]
    assert abs(sizes[1] / sizes[0] - 1) < 0.02


def test_peak_is_that_of_the_chip_meant():
    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989.5
    assert peak_tflops("NVIDIA H100 PCIe") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "torch finds no GPU" in error


def test_nothing_is_measured_where_the_scan_is_wrong(monkeypatch, capsys):
    right = gpu.run

    def wrong(inputs, backend, *arguments, **options):
        results = right(inputs, backend, *arguments, **options)
        if backend == "blocked":
            results["grad omega"] = -results["grad omega"]
        return results

    monkeypatch.setattr(gpu, "run", wrong)
    assert gpu.main(["scan", "--device", "cpu"]) == 1
    output = capsys.readouterr()
    assert "blocked torch.float32 none" in output.err and "grad omega" in output.err
    assert "cpu torch" not in output.err and "GB/s" not in output.out


@pytest.mark.slow
def test_everything_runs_in_miniature(tmp_path):
    output = tmp_path / "results" / "gpu.json"
    arguments = ["--device", "cpu", "--compiler", "eager", "--peak_tflops", "0.5"]
    assert gpu.main([*arguments, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    figures = report["figures"]
    assert report["device"] == "cpu" and report["backend"] == "blocked"
    assert figures["scan bfloat16 T=100 forward: GB/s"] > 0
    assert "scan float32 T=32 backward: % of a copy" in figures
    for side in ("ten", "ten compiled", "transformer", "transformer compiled"):
        for title in ("step pico T=32", "length pico T=16", "length pico T=64"):
            row = f"{title} {side}"
            assert figures[f"{row}: tokens/s"] > 0
            share = figures[f"{row}: TFLOP/s"] / 0.5
            assert figures[f"{row}: MFU %"] == pytest.approx(100 * share, abs=0.02)
