"""The GPU benchmark where there is no GPU: its refusals, a run in miniature."""

import json

import pytest
import torch

from benchmarks import gpu
from ten_dist import PRESETS, TemporalEigenstateConfig, TemporalEigenstateNetwork


@pytest.mark.parametrize("preset", PRESETS)
def test_transformer_has_the_size_of_the_preset(preset):
    config = TemporalEigenstateConfig.preset(preset)
    with torch.device("meta"):
        sizes = [
            TemporalEigenstateNetwork(c).num_parameters()
            for c in (config, gpu.transformer_like(config))
        ]
    assert abs(sizes[1] / sizes[0] - 1) < 0.02


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
