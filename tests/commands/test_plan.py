"""ten-dist plan: what it says, that its figures agree with each other, what it refuses."""

import json

import pytest

from ten_dist.cli import main

XLARGE = [
    *("plan", "--config", "xlarge", "--nodes", "4", "--gpus_per_node", "8"),
    *("--tokens", "26e9", "--global_batch_size", "512", "--seq_len", "2048"),
]
NANO = ["plan", "--config", "nano", "--gpus_per_node", "2", "--seq_len", "256"]


def planned(tmp_path, *arguments):
    path = tmp_path / "plan.json"
    assert main([*map(str, arguments), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_a_plan_can_be_followed_figure_by_figure(capsys, tmp_path):
    plan = planned(tmp_path, *XLARGE, "--dollars_per_gpu_hour", 3.39)
    output = capsys.readouterr().out
    assert "1,196,815,968 parameters" in output and "(assumed)" in output
    assert plan["measured"] is False
    chosen = plan["chosen"]
    step = chosen["step_seconds"]
    # Memory is the sum of its parts, and fits.
    memory = dict(chosen["memory_bytes"])
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    assert chosen["memory_bytes"]["total"] <= plan["usable_memory_bytes"]
    # The step is the sum of its terms.
    terms = step["compute"] + step["communication"] - step["hidden"] + step["update"]
    assert step["total"] == pytest.approx(max(terms, step["data"]))
    sent = sum(one["seconds"] for one in chosen["collectives"])
    assert step["communication"] == pytest.approx(sent)
    # Compute is operations over the share of the peak that is reached.
    tokens = chosen["micro_batch_size"] * 2048 * chosen["accumulation_steps"]
    assert tokens * 32 == plan["tokens_per_step"]
    executed = tokens * chosen["flops_per_token"]
    assert step["compute"] == pytest.approx(executed / (989.5e12 * 0.3), rel=0.01)
    # Days and dollars follow from the rate.
    assert plan["tokens_per_second"] == pytest.approx(
        plan["tokens_per_step"] / step["total"]
    )
    seconds = plan["steps"] * step["total"]
    assert plan["days"] == pytest.approx(seconds / 86400)
    assert plan["dollars"] == pytest.approx(seconds / 3600 * 32 * 3.39)
    assert f"{plan['dollars']:,.2f} dollars" in output


def test_every_stage_is_there_with_and_without_recomputation(tmp_path):
    plan = planned(tmp_path, *XLARGE)
    ways = {
        (one["deepspeed_config"], one["gradient_checkpointing"])
        for one in plan["layouts"]
    }
    names = ("zero0", "zero1", "zero2", "zero3", "offload")
    assert ways == {(name, mode) for name in names for mode in ("none", "block")}
    fastest = min(
        one["step_seconds"]["total"] for one in plan["layouts"] if one["fits"]
    )
    assert plan["chosen"]["step_seconds"]["total"] <= 1.02 * fastest
    only = planned(
        tmp_path,
        *XLARGE,
        "--deepspeed_config",
        "zero3",
        "--gradient_checkpointing",
        "block",
    )
    assert [one["deepspeed_config"] for one in only["layouts"]] == ["zero3"]
    assert only["chosen"]["flops_recomputed_per_token"] > 0


def test_it_scales_until_gpus_wait_for_each_other(tmp_path, capsys):
    plan = planned(tmp_path, *XLARGE)
    points = {point["gpus"]: point for point in plan["scaling"]}
    assert list(points) == [2**n for n in range(11)]
    assert points[1]["efficiency"] == 1
    efficiencies = [p["efficiency"] for p in plan["scaling"] if "layout" in p]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert "more GPUs than the batch has rows" in points[1024]["reason"]
    rate = points[32]["tokens_per_second"]
    assert rate == pytest.approx(plan["tokens_per_second"])
    assert "it stops to scale at" in capsys.readouterr().out
    # Over a network a hundred times slower it stops earlier.
    slow = planned(tmp_path, *XLARGE, "--network_gigabits", 32)
    stops = [
        next(p["gpus"] for p in one["scaling"] if p["reason"]) for one in (plan, slow)
    ]
    assert stops[1] < stops[0]


def test_options_of_the_model_count(tmp_path):
    plain = planned(tmp_path, *NANO)
    hten = planned(tmp_path, *NANO, "--use_hten", "--hten_scales", "1,2")
    assert plain["model"]["hten_scales"] is None
    assert hten["model"]["hten_scales"] == [1, 2]
    assert hten["parameters"] > plain["parameters"]
    small = planned(tmp_path, *NANO, "--vocab_size", 256)
    assert small["parameters"] == plain["parameters"] - 320 * (50257 - 256)


def test_the_machine_may_be_any(tmp_path):
    own = [*NANO, "--gpu_memory_gib", 10, "--peak_tflops", 100, "--usable_memory", 1]
    plan = planned(tmp_path, *own)
    assert plan["usable_memory_bytes"] == 10 * 2**30
    assert plan["speeds"]["peak_flops"] == 100e12
    full = planned(tmp_path, *own, "--precision", "fp32")
    assert (
        full["activation_bytes_of_a_row"]["none"]
        > 1.5 * (plan["activation_bytes_of_a_row"]["none"])
    )
    mi300x = planned(tmp_path, *NANO, "--device", "mi300x")
    assert mi300x["usable_memory_bytes"] == pytest.approx(0.9 * 192e9)
    assert mi300x["days"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "h1000"], "--device h1000 is not known: choose one of h100,"),
        (["--gpus_per_node", "5"], "does not divide over 5 ranks"),
        (["--micro_batch_size", "5"], "--micro_batch_size"),
        (["--nodes", "0"], "--nodes must be 1 or more"),
        (["--mfu", "1.5"], "--mfu must be more than 0 and at most 1"),
        (["--overlap", "-1"], "--overlap must be from 0 to 1"),
        (["--dollars_per_gpu_hour", "0"], "--dollars_per_gpu_hour must be more than 0"),
        (["--config", "huge"], "unknown preset 'huge'"),
        (["--precision", "fp32"], "give --peak_tflops"),
        (["--hten_scales", "1,3"], "hten_scales 1,3 must be increasing powers of two"),
        (["--deepspeed_config", "zero9"], "--deepspeed_config zero9 is neither"),
        (["--deepspeed_config", "nvme"], "--deepspeed_config nvme swaps to NVMe"),
        (
            ["--precision", "bf16_params", "--deepspeed_config", "zero0"],
            "--precision bf16_params needs ZeRO stage 1",
        ),
    ],
)
def test_what_cannot_be_is_one_line(capsys, options, says):
    assert says in refusal(capsys, *NANO, *options)


def test_where_nothing_fits_it_says_what_would(capsys):
    line = refusal(
        capsys,
        *("plan", "--config", "xlarge", "--gpus_per_node", 1, "--seq_len", 4096),
        *("--gpu_memory_gib", 6, "--micro_batch_size", 4),
    )
    assert "nothing fits: 5.4 GiB of a GPU are usable, and the least is" in line
    assert "--deepspeed_config offload, --gradient_checkpointing block" in line
    assert "h100" in line and "--seq_len" in line


def test_the_file_cannot_be_written(capsys, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    assert main([*NANO, "--json", str(path / "plan.json")]) == 2
    assert "--json" in capsys.readouterr().err


def test_matrix_layers_are_told_and_counted(capsys, tmp_path):
    plain = planned(tmp_path, *NANO)
    options = ("--state_dim", 32, "--matrix_layers", "1,3", "--matrix_eigenstates", 120)
    some = planned(tmp_path, *NANO, *options)
    told = "240 eigenstates (120 of 32 numbers in 2 matrix layers), vocabulary"
    assert told in capsys.readouterr().out
    every = planned(tmp_path, *NANO, "--state_dim", 32)
    assert "240 eigenstates of 32 numbers, vocabulary" in capsys.readouterr().out
    assert len({plan["parameters"] for plan in (plain, some, every)}) == 3
    more, less = (plan["chosen"]["flops_per_token"] for plan in (every, plain))
    # The products of their weights, and update and read-out of what they carry.
    weights = 320 * (6 * 240 + 3 * 4 * 32 - (6 * 240 + 320))
    assert more - less == 12 * (6 * weights + 3 * 14 * 240 * 32)
