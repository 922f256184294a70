"""What cannot work is refused with one clear line, before anything is written."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from ten_dist.cli import main
from ten_dist.data import Manifest
from tests.tools.launching import SMALL_MODEL, train

# DeepSpeed swaps no moments of another optimizer to a disk.
SWAPPING = {"deepspeed_config": "nvme", "optimizer": "adamw"}


@pytest.fixture
def options(token_data, tmp_path):
    """A training that would work."""
    return {
        "data": str(token_data),
        "output_dir": str(tmp_path / "run"),
        "steps": "2",
        "global_batch_size": "4",
        "seq_len": "32",
        "precision": "fp32",
        "num_workers": "0",
    }


def refusal(capsys, options, *flags):
    """The error line of a training that must be refused."""
    arguments = [*SMALL_MODEL, *flags]
    for name, value in options.items():
        arguments += [f"--{name}", value]
    try:
        status = main(["train", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2, error
    lines = [line for line in error.splitlines() if "ten-dist" in line]
    lines = [line for line in lines if not line.startswith("usage")]
    assert len(lines) == 1, error
    return lines[0]


def test_levels_take_the_place_of_scales(capsys, options):
    levels = {**options, "levels": "4,16"}
    for others in (["--use_hten"], ["--hten_scales", "1,2"]):
        line = refusal(capsys, levels, *others)
        assert f"{others[0]} and --levels cannot both be given" in line


@pytest.mark.parametrize("flag", ["--paper", "--use_hten"])
def test_what_does_nothing_for_a_transformer_is_refused(capsys, options, flag):
    line = refusal(capsys, {**options, "mixer": "attention"}, flag)
    assert f"{flag} has no effect with --mixer attention" in line


def test_compile_is_refused_where_it_cannot_work(capsys, options, monkeypatch):
    line = refusal(capsys, {**options, "scan_backend": "blocked"}, "--compile")
    assert "--compile does not go with --scan_backend blocked" in line
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = refusal(capsys, options, "--compile")
    assert "--compile needs a C++ compiler, and no-such-compiler" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "huge"}, "unknown preset 'huge'"),
        ({"hten_scales": "1,3"}, "powers of two"),
        ({"hten_scales": "2,4"}, "start with 1"),
        ({"hten_scales": "1,2,4,8,16"}, "num_eigenstates 24 does not divide"),
        ({"levels": "4,6"}, "levels 4,6 must be increasing lengths of blocks"),
        ({"global_batch_size": "6", "micro_batch_size": "4"}, "global_batch_size"),
        ({"vocab_size": "200"}, "--vocab_size 200 is smaller"),
        ({"seq_len": "10000000"}, "--seq_len"),
        ({"warmup_steps": "2"}, "--warmup_steps 2 does not fit"),
        ({"schedule": "step"}, "--schedule must be one of cosine, wsd, linear"),
        ({"decay_fraction": "0.1"}, "--decay_fraction has no effect without"),
        ({"schedule": "wsd", "decay_fraction": "0"}, "--decay_fraction must be more"),
        ({"schedule": "wsd"}, "--warmup_steps 40, the default with --schedule wsd,"),
        (
            {"schedule": "wsd", "warmup_steps": "1", "decay_fraction": "1"},
            "--decay_fraction 1 of 2 steps is 2, more than the 1 after the warm-up",
        ),
        (
            {"schedule": "constant", "min_learning_rate": "0"},
            "--min_learning_rate has no effect with --schedule constant",
        ),
        (
            {"schedule": "inverse_sqrt", "warmup_steps": "0"},
            "--schedule inverse_sqrt falls with the root of --warmup_steps",
        ),
        ({"grace_seconds": "0"}, "--grace_seconds must be more than 0"),
        ({"on_anomaly": "ignore"}, "--on_anomaly must be one of skip, rollback, stop"),
        ({"spike_threshold": "-1"}, "--spike_threshold must be 0 or more"),
        ({"keep_checkpoint_every": "5"}, "without --keep_checkpoints"),
        (
            {"deepspeed_config": "zero9"},
            "neither a file nor one of nvme, offload, zero0",
        ),
        ({"deepspeed_config": "nvme"}, "--nvme_path is missing"),
        ({"nvme_path": "/tmp"}, "--nvme_path has no effect with"),
        (
            {**SWAPPING, "nvme_path": "/nowhere"},
            "--nvme_path /nowhere is not a folder",
        ),
        (
            {**SWAPPING, "nvme_path": __file__},
            "test_refusals.py is not a folder",
        ),
        (
            {"optimizer": "adamw", "muon_learning_rate": "1"},
            "--muon_learning_rate has no effect without",
        ),
        (
            {"optimizer": "adamw", "muon_momentum": "0.9"},
            "--muon_momentum has no effect without",
        ),
        (
            {"optimizer": "muon", "deepspeed_config": "nvme", "nvme_path": "/tmp"},
            "--optimizer muon does not go with offload_optimizer.device nvme",
        ),
        ({"resume": "/nowhere"}, "/nowhere has no readable checkpoint.json"),
        ({"output_dir": "/proc/run"}, "--output_dir /proc/run cannot be made"),
        ({"tokens": "100"}, "--steps and --tokens cannot both"),
        (
            {"precision": "bf16_params", "deepspeed_config": "zero0"},
            "--precision bf16_params needs ZeRO stage 1, 2 or 3",
        ),
        ({"scan_backend": "cuda"}, "scan_backend must be one of"),
        ({"ffn_multiplier": "inf"}, "ffn_multiplier"),
        ({"seed": "99999999999999999999"}, "--seed: must be a number of 64 bits"),
        ({"learning_rate": "fast"}, "--learning_rate"),
        ({"lerning_rate": "1"}, "lerning_rate"),
    ],
)
def test_wrong_option(capsys, tmp_path, options, change, message):
    assert message in refusal(capsys, {**options, **change})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100000, "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("\ufeff[]", "is not a JSON object"),
        ('{"steps_per_print": NaN}', "NaN is not a number of JSON"),
        ('{"aio": {}, "aio": {}}', "the key 'aio' comes twice"),
        ('{"steps_per_print": "often"}', "steps_per_print in"),
        ('{"steps_per_print": 1e999}', "steps_per_print in"),
        ('{"prescale_gradients": "no"}', "must be true or false, not 'no'"),
        ('{"communication_data_type": "fp33"}', "communication_data_type in"),
        ('{"comms_logger": 3}', "comms_logger in"),
        ('{"aio": {"queue_depth": "deep"}}', "aio.queue_depth in"),
        ('{"aio": {"depth": 8}}', "DeepSpeed knows no 'aio.depth'"),
        ('{"data_types": {"grad_accum_dtype": "fp33"}}', "data_types.grad_accum_dtype"),
        ('{"zero_optimizations": {}}', "did you mean 'zero_optimization'?"),
        (
            '{"zero_optimization": {"bucket_size": 1}}',
            "no 'zero_optimization.bucket_size'",
        ),
        ('{"zero_optimization": {"stage": true}}', "must be 0, 1, 2 or 3"),
        (
            '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}}',
            "zero_optimization.reduce_bucket_size in",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"pin_memory": 7}}}',
            "zero_optimization.offload_param.pin_memory in",
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}',
            "zero_optimization.reduce_bucket_size in",
        ),
        ('{"activation_checkpointing": {}}', "it is set by --gradient_checkpointing"),
        ('{"train_batch_size": 8}', "it is set by --global_batch_size"),
        ('{"bf16": {"enabled": true}}', "it is set by --precision"),
        ('{"elasticity": {}}', "DeepSpeed no longer has it"),
        ('{"zero_optimization": {"mics_shard_size": 2}}', "no longer has it"),
        (
            '{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}',
            "remove 'round_robin_gradients' from",
        ),
        ('{"zero_optimization": {"stage": 4}}', "must be 0, 1, 2 or 3"),
        ('{"zero_optimization": true}', "zero_optimization in"),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
            "is cpu, which needs ZeRO stage 1 or more",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            "is cpu, which needs ZeRO stage 3 or more",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}',
            "is nvme, which needs ZeRO stage 3",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "ssd"}}}',
            "cannot be 'ssd': input should be 'none', 'cpu' or 'nvme'",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"nvme_path": "/"}}}',
            "it is set by --nvme_path",
        ),
        (
            """{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme",
            "buffer_count": 3}}}""",
            "offload_optimizer.buffer_count in",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "is nvme, with which DeepSpeed fails",
        ),
    ],
)
def test_wrong_deepspeed_file(capsys, tmp_path, options, content, message):
    file = tmp_path / "deepspeed.json"
    file.write_text(content)
    given = {**options, "deepspeed_config": str(file)}
    line = refusal(capsys, given)
    assert message in line and str(file) in line
    assert refusal(capsys, given, "--dry_run") == line


def test_no_room_to_swap(capsys, tmp_path, options, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    usage_of = shutil.disk_usage

    def usage(path):
        usage = usage_of(path)
        return usage._replace(free=1000) if str(path) == str(small) else usage

    monkeypatch.setattr(shutil, "disk_usage", usage)
    given = {**SWAPPING, "nvme_path": str(small)}
    line = refusal(capsys, {**options, **given})
    assert f"--nvme_path {small} has 1e-06 GB free" in line
    assert not (tmp_path / "run").exists()


def test_no_libaio(capsys, tmp_path, options, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    def fail(_):
        raise RuntimeError("Unable to JIT load the async_io op\nin many words")

    builder = get_accelerator().get_op_builder("AsyncIOBuilder")
    monkeypatch.setattr(builder, "load", fail)
    given = {**SWAPPING, "nvme_path": str(tmp_path)}
    line = refusal(capsys, {**options, **given})
    assert "apt-get install libaio-dev" in line and "Unable to JIT load" in line
    assert not (tmp_path / "run").exists()


def damage(data, kind):
    """Damage the training shards of a folder; returns what the error must name."""
    manifest = Manifest.load(data)
    shard = manifest.shard_path(0)
    content = bytearray(shard.read_bytes())
    if kind == "no manifest":
        (data / "manifest.json").unlink()
        return "manifest.json"
    if kind == "missing shard":
        shard.unlink()
    elif kind == "truncated shard":
        shard.write_bytes(content[:-2000])
    elif kind == "altered shard":
        content[700] ^= 1
        shard.write_bytes(content)
    elif kind == "another tokenizer":
        (data / "tokenizer.json").write_text(
            (data / "tokenizer.json").read_text() + " "
        )
        return "tokenizer.json"
    return shard.name


@pytest.mark.parametrize(
    "kind",
    [
        "no manifest",
        "missing shard",
        "truncated shard",
        "altered shard",
        "another tokenizer",
    ],
)
def test_damaged_data(capsys, tmp_path, token_data, options, kind):
    data = tmp_path / "data"
    shutil.copytree(token_data, data)
    named = damage(data, kind)
    assert named in refusal(capsys, {**options, "data": str(data)})
    assert not (tmp_path / "run").exists()


def test_token_out_of_range(capsys, tmp_path, token_data, options):
    """A manifest that understates its vocabulary: the hashes agree, the ids do not."""
    data = tmp_path / "data"
    shutil.copytree(token_data, data)
    shutil.rmtree(data / "val")
    manifest = Manifest.load(data)
    dataclasses.replace(manifest, vocab_size=100, separator_id=0).write()
    error = refusal(capsys, {**options, "data": str(data)})
    assert manifest.shards[0].name in error and "100" in error


def test_validation_data_of_another_tokenizer(capsys, tmp_path, token_data, options):
    data = tmp_path / "data"
    shutil.copytree(token_data, data)
    manifest = Manifest.load(data / "val")
    file = data / "val" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    from ten_dist.data import file_sha256

    dataclasses.replace(manifest, tokenizer_sha256=file_sha256(file)).write()
    error = refusal(capsys, {**options, "data": str(data)})
    assert "another tokenizer than --data" in error


def test_folder_of_something_else(capsys, tmp_path, options):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    assert "holds files but no run" in refusal(capsys, options)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_folder_of_another_run(capsys, tmp_path, options):
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert main(["train", *SMALL_MODEL, *arguments]) == 0
    capsys.readouterr()
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    error = refusal(capsys, {**options, "learning_rate": "2e-3"})
    assert "learning_rate was 0.004, now 0.002" in error
    error = refusal(capsys, options, "--resume", "never")
    assert "already holds a run" in error
    after = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    assert after == before


def test_a_run_that_stops_being_finite_is_stopped(capsys, tmp_path, options):
    arguments = {**options, "steps": "1", "checkpoint_interval": "1"}
    arguments |= {"warmup_steps": "0"}
    given = [f"--{name}={value}" for name, value in arguments.items()]
    assert main(["train", *SMALL_MODEL, *given]) == 0
    newest = str(tmp_path / "run" / "checkpoints" / "step_00000001")
    arguments |= {"output_dir": str(tmp_path / "wild"), "resume": newest}
    arguments |= {"learning_rate": "1e30", "steps": "5"}
    given = [f"--{name}={value}" for name, value in arguments.items()]
    assert main(["train", *SMALL_MODEL, *given]) == 1
    error = capsys.readouterr().err
    assert "not saved" in error and "--learning_rate" in error
    assert not (tmp_path / "wild" / "COMPLETED").exists()
    assert not list((tmp_path / "wild" / "checkpoints").iterdir())
    # What the message recommends works: another folder, from the checkpoint before.
    arguments |= {"output_dir": str(tmp_path / "again")}
    arguments |= {"learning_rate": "1e-9", "steps": "1"}
    given = [f"--{name}={value}" for name, value in arguments.items()]
    assert main(["train", *SMALL_MODEL, *given]) == 0
    assert f"continuing from {newest}, 1 steps done" in capsys.readouterr().out
    # Of another model, or of a longer run, it is refused.
    arguments |= {"output_dir": str(tmp_path / "other")}
    assert "dropout was 0.0, now 0.5" in refusal(
        capsys, {**arguments, "dropout": "0.5"}
    )
    two = newest.replace("step_00000001", "step_00000002")
    shutil.copytree(newest, two)
    record = json.loads((tmp_path / two / "checkpoint.json").read_text())
    record["step"] = 2
    del record["crc32"]
    (tmp_path / two / "checkpoint.json").write_text(json.dumps(record))
    assert "has done 2 steps, more than the 1" in refusal(
        capsys, {**arguments, "resume": two}
    )


def test_a_disk_without_room(capsys, tmp_path, options, monkeypatch):
    """Refused where the first checkpoint has no room; stopped where a later one has none."""
    usage = shutil.disk_usage(tmp_path)
    first = tmp_path / "run" / "checkpoints" / "step_00000001"
    room = {False: 1000, True: 1000}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=room[first.exists()])
    )
    options = {**options, "checkpoint_interval": "1"}
    line = refusal(capsys, options)
    assert "has 1e-06 GB free, and a checkpoint takes 0.000272 GB" in line
    assert not (tmp_path / "run").exists()
    room[False] = usage.free
    given = [f"--{name}={value}" for name, value in options.items()]
    assert main(["train", *SMALL_MODEL, *given]) == 1
    assert "make room, perhaps with --keep_checkpoints, then start" in (
        capsys.readouterr().err
    )
    room[True] = usage.free
    assert main(["train", *SMALL_MODEL, *given]) == 0
    output = capsys.readouterr().out
    assert f"continuing from {first}, 1 steps done" in output


def test_a_save_that_fails_in_the_background_ends_the_run(
    capsys, tmp_path, options, monkeypatch
):
    def fail(*_):
        raise ValueError("a fault of the program")

    monkeypatch.setattr("ten_dist.engine.checkpointing.save.write_tensors", fail)
    given = [f"--{name}={value}" for name, value in options.items()]
    assert main(["train", *SMALL_MODEL, *given]) == 1
    assert "a fault of the program" in capsys.readouterr().err
    assert not (tmp_path / "run" / "COMPLETED").exists()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_only_the_newest_checkpoints_are_kept(tmp_path, options):
    arguments = {**options, "steps": "5", "checkpoint_interval": "1"}
    given = [f"--{name}={value}" for name, value in arguments.items()]
    assert main(["train", *SMALL_MODEL, *given, "--keep_checkpoints", "2"]) == 0
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert names == ["step_00000004", "step_00000005"]
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert latest == "step_00000005"


def test_another_programs_folder(capsys, tmp_path, options):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"name": "a web site"}')
    assert "its config.json is another's" in refusal(capsys, options)


def test_a_start_killed_before_its_first_file_is_no_obstacle(tmp_path, options):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert main(["train", *SMALL_MODEL, *arguments]) == 0


def test_a_launcher_that_names_no_ranks_is_refused(capsys, monkeypatch, options):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert "SLURM_NTASKS is 8, but WORLD_SIZE and RANK" in refusal(capsys, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch_size": "7"}, "--global_batch_size 7 does not divide over 2"),
        ({"data": "DAMAGED"}, "altered"),
    ],
)
def test_no_rank_is_left_hanging(tmp_path, token_data, options, change, message):
    data = tmp_path / "data"
    shutil.copytree(token_data, data)
    # Only one of the two ranks reads this shard.
    shard = Manifest.load(data).shard_path(1)
    content = np.fromfile(shard, dtype=np.uint8)
    content[700] ^= 1
    content.tofile(shard)
    options = {**options, **change}
    if options["data"] == "DAMAGED":
        options["data"] = str(data)
        message = shard.name
    arguments = [f"--{name}={value}" for name, value in options.items()]
    output = train([*SMALL_MODEL, *arguments], ranks=2, expect=2, timeout=120)
    errors = [line for line in output.splitlines() if line.startswith("ten-dist:")]
    assert len(errors) == 1 and message in errors[0], output
    assert not (tmp_path / "run").exists()


def test_resolved_configuration_is_written(tmp_path, options):
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert main(["train", *SMALL_MODEL, *arguments, "--use_hten"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["hten_scales"] == [1, 2, 4]
    assert config["model"]["vocab_size"] == 257
    assert config["schedule"]["steps"] == 2
    assert config["deepspeed"]["train_batch_size"] == 4
    assert config["training"]["seq_len"] == 32
    assert config["data"]["fingerprint"] == Manifest.load(options["data"]).fingerprint
    assert config["versions"]["torch"] and config["versions"]["deepspeed"]


def test_muon_is_refused_where_deepspeed_would_update(capsys, options, tmp_path):
    offload = {"device": "cpu", "ratio": 0.5}
    content = {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}
    (tmp_path / "part.json").write_text(json.dumps(content))
    changed = {"optimizer": "muon", "deepspeed_config": str(tmp_path / "part.json")}
    line = refusal(capsys, {**options, **changed})
    assert "--optimizer muon does not go with offload_optimizer.ratio" in line
