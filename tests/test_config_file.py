"""`--config_file` and `--print_config`: options from files, for every command."""

import json

import pytest
import yaml

from data_prep.shard import main as prepare
from ten_dist.cli import main
from ten_dist.errors import ConfigurationError
from ten_dist.supervision.job import find_output_dir
from tests.conftest import write_corpus
from tests.tools.launching import ROOT, step_metrics

TRAINING = """\
output_dir: run  # the folder
data:
  data: tokens
batch: {seq_len: 32, global_batch_size: 4, steps: 3}
compute:
  precision: fp32
data_verification: size
num_workers: 0
learning_rate: 1e-2
model:
  dim: 32
  n_layers: 2
  num_eigenstates: 24
  hten_scales: [1, 2]
  learnable_selection_range: false
  ffn_multiplier: 2
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys, *arguments):
    """The options that a command would take, by group."""
    capsys.readouterr()
    assert main([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_options_come_from_groups_or_without_and_the_command_line_wins(capsys, here):
    (here / "run.yaml").write_text(TRAINING)
    options = printed(
        capsys, "train", "--config_file", "run.yaml", "--seq_len=64", "--tokens", "1e6"
    )
    assert options["run"]["output_dir"] == "run" and options["data"]["data"] == "tokens"
    assert options["batch"]["seq_len"] == 64
    # One of these says what the other did.
    assert options["batch"]["tokens"] == 1e6 and options["batch"]["steps"] is None
    assert options["optimizer"]["learning_rate"] == 0.01
    assert options["model"]["hten_scales"] == [1, 2]
    assert options["model"]["learnable_selection_range"] is False
    # Of a preset's fields only those that were given.
    assert "max_timescale" not in options["model"]


def test_what_is_printed_is_the_same_command(capsys, here):
    (here / "run.yaml").write_text(TRAINING)
    first = printed(capsys, "train", "--config_file", "run.yaml", "--document_masking")
    (here / "printed.yaml").write_text(yaml.safe_dump(first))
    assert printed(capsys, "train", "--config_file", "printed.yaml") == first
    off = printed(
        capsys, "train", "--config_file=printed.yaml", "--no-document_masking"
    )
    assert off["data"]["document_masking"] is False


def test_a_run_is_reproduced_by_a_file_and_by_its_own_record(capsys, here, token_data):
    (here / "tokens").symlink_to(token_data)
    (here / "run.yaml").write_text(TRAINING)
    for arguments in (
        ["--config_file", "run.yaml"],
        ["--config_file", "run/config.json", "--output_dir", "again"],
    ):
        assert main(["train", *arguments]) == 0
    losses = [step_metrics(here / folder) for folder in ("run", "again")]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    # A record was not written for this command, which takes what it knows.
    plan = printed(capsys, "plan", "--config_file", "run/config.json")
    assert plan["batch"]["seq_len"] == 32 and plan["model"]["dim"] == 32
    assert plan["machine"]["nodes"] == 1


def test_every_command_takes_one(capsys, here):
    (here / "options.yaml").write_text("nodes: 2\nmachine: {device: h200}\n")
    machine = printed(capsys, "plan", "--config_file", "options.yaml")["machine"]
    assert machine["nodes"] == 2 and machine["device"] == "h200"
    (here / "options.yaml").write_text("prompt: '--x: null'\ntop_k: 3\n")
    options = printed(capsys, "generate", "RUN", "--config_file", "options.yaml")
    assert options["prompt"] == "--x: null" and options["top_k"] == 3
    (here / "options.yaml").write_text("count: 5\nseed: ~\n")
    options = printed(capsys, "data", "sample", "D", "--config_file", "options.yaml")
    assert options["count"] == 5 and options["seed"] == 0
    (here / "options.yaml").write_text(
        "checks: {network_test: false}\nenv: [A=1, B=2]\n"
    )
    options = printed(capsys, "preflight", "--config_file", "options.yaml")
    assert options["checks"]["network_test"] is False and options["env"] == [
        "A=1",
        "B=2",
    ]
    (here / "options.yaml").write_text("hosts: {hosts: 'a:1', min_hosts: 1}\n")
    options = printed(capsys, "launch", "--config_file", "options.yaml")
    assert options["hosts"]["hosts"] == "a:1" and options["hosts"]["hostfile"] is None


def test_a_corpus_is_prepared_from_one(capsys, here):
    write_corpus(here / "corpus", files=5)
    (here / "corpus" / "left.md").write_text("out\n")
    (here / "corpus.yaml").write_text(
        "corpus:\n  input: [corpus]\n  include: ['*.txt']\n"
        "tokenizer: {tokenizer: bytes}\noutput: {output: tokens}\n"
    )
    assert prepare(["--config_file", "corpus.yaml"]) == 0
    manifest = json.loads((here / "tokens" / "manifest.json").read_text())
    assert manifest["documents"] == 5
    capsys.readouterr()
    arguments = ["--config_file", "corpus.yaml", "--output", "x", "--print_config"]
    assert prepare(arguments) == 0
    options = yaml.safe_load(capsys.readouterr().out)
    assert options["corpus"]["include"] == ["*.txt"]
    assert options["output"]["output"] == "x" and not (here / "x").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lerning_rate: 1",
            "unknown option 'lerning_rate': do you mean learning_rate?",
        ),
        ("optimiser: {seed: 1}", "unknown group 'optimiser': do you mean optimizer?"),
        ("run: {lerning_rate: 1}", "'lerning_rate': do you mean learning_rate?"),
        ("zzz: 1", "run.yaml: unknown option 'zzz' (see --help)"),
        ("seed: 1\nrun: {seed: 2}", "seed is given twice"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("seed: [1", "is not YAML"),
        ("- seed", "has no options by name"),
        ("just text", "has no options by name"),
        ("compile: maybe", "compile must be true or false, not 'maybe'"),
        ("learning_rate: {a: 1}", "unknown group 'learning_rate'"),
        ("run: {seed: {a: 1}}", "seed must be one value"),
        ("seed: [1, 2]", "seed must be one value"),
        ("compile: [true]", "compile must be true or false, not ['true']"),
        ("seed: !!str [1]", "is not YAML"),
        ("seed: !!int 1", "a tag, tag:yaml.org,2002:int, has no meaning here"),
        ("run: !x {seed: 1, seed: 2}", "a tag, !x, has no meaning here"),
        ('data: "\\UFFFFFFFF"', "is not YAML"),
        ("seed: " + "[" * 3000, "is not YAML"),
        ('nvme_path: ""', "--nvme_path is empty"),
        ('nvme_path: "a\\0b"', "--nvme_path has a NUL character in it"),
        ("run: 1", "run is a group, below which its options stand"),
        ("precision: int8", "--precision must be one of fp32, bf16"),
        ("seed: -1", "--seed must be 0 or more and below 4,294,967,296, not -1"),
        ("adam_beta1: 1", "--adam_beta1 must be 0 or more and below 1, not 1"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(capsys, here, text, message):
    (here / "run.yaml").write_text(text)
    arguments = ["--config_file", "run.yaml", "--data", "d", "--output_dir", "o"]
    assert message in refusal(capsys, "train", *arguments)
    assert not (here / "o").exists()


def test_files_that_cannot_be_read_are_named(capsys, here):
    line = refusal(capsys, "plan", "--config_file", "nowhere.yaml")
    assert "--config_file nowhere.yaml cannot be read: No such file" in line
    (here / "a.yaml").write_bytes(b"\xff\xfe")
    line = refusal(capsys, "plan", "--config_file", "a.yaml")
    assert "UTF-16" in line
    (here / "config.json").write_text('{"format": "ten_dist.run", "version": 1}')
    line = refusal(capsys, "plan", "--config_file", "config.json")
    assert "config.json is of version 1" in line
    twice = ["--config_file", "a.yaml", "--config_file", "b.yaml"]
    assert "is given twice" in refusal(capsys, "plan", *twice)


def test_a_record_gives_way_to_another_model(capsys, here, token_data):
    (here / "tokens").symlink_to(token_data)
    (here / "run.yaml").write_text(TRAINING)
    assert main(["train", "--config_file", "run.yaml", "--steps", "1"]) == 0
    record = ["train", "--config_file", "run/config.json"]
    assert printed(capsys, *record)["model"]["dim"] == 32
    assert printed(capsys, *record)["model"]["vocab_size"] == 257
    assert "dim" not in printed(capsys, *record, "--config", "large")["model"]
    # What it calls data is not what this command does.
    line = refusal(capsys, "evaluate", "run", *record[1:])
    assert "run/config.json is the record of a run" in line


def test_values_are_never_taken_for_options(capsys, here):
    (here / "corpus.yaml").write_text(
        "input: [corpus, --deduplicate]\ntokenizer: bytes\noutput: tokens\n"
    )
    assert prepare(["--config_file", "corpus.yaml"]) == 2
    assert "input begins with -: write ./--deduplicate" in capsys.readouterr().err
    (here / "corpus.yaml").write_text('input: [c]\ntokenizer: bytes\noutput: ""\n')
    assert prepare(["--config_file", "corpus.yaml"]) == 2
    assert "--output is empty" in capsys.readouterr().err


def test_empty_groups_and_any_characters_come_through(capsys, here):
    (here / "options.yaml").write_text("machine:\nrun: ~\nnodes: 2\n")
    options = printed(capsys, "plan", "--config_file", "options.yaml")
    assert options["machine"]["nodes"] == 2
    for prompt in ("héllo 日本", "a\x85b", "'", "null", "- x", "1e3", ""):
        (here / "options.yaml").write_text(json.dumps({"prompt": prompt}))
        options = printed(capsys, "generate", "RUN", "--config_file", "options.yaml")
        assert options["prompt"] == prompt


def test_it_is_clear_whose_file_it_is(capsys, here):
    (here / "options.yaml").write_text("grace: 3\n")
    line = refusal(capsys, "supervise", "echo", "--config_file", "options.yaml")
    assert "put -- before the other command" in line


def test_a_supervisor_finds_the_run_folder_in_the_file(here):
    (here / "run.yaml").write_text("run: {output_dir: there}\n")
    command = ["deepspeed", "launch/train.py", "--config_file", "run.yaml"]
    assert str(find_output_dir(command)) == "there"
    assert str(find_output_dir([*command, "--output_dir=here"])) == "here"
    (here / "run.yaml").write_text("run: {output_dir: there, dry_run: true}\n")
    with pytest.raises(ConfigurationError, match="--dry_run writes nothing"):
        find_output_dir(command)
    assert str(find_output_dir([*command, "--no-dry_run"])) == "there"
    (here / "run.yaml").write_text("run: {output_dir: [a, b]}\n")
    with pytest.raises(ConfigurationError, match="has no --output_dir"):
        find_output_dir(command)


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_what_they_are_and_are_accepted(capsys, recipe):
    text = recipe.read_text()
    assert text.startswith("# ") and "\n\n" in text
    assert str(recipe.relative_to(ROOT)) in text, "it does not say how it is run"
    if "data_prep.shard --config_file" in text:
        assert prepare(["--config_file", str(recipe), "--print_config"]) == 0
    else:
        printed(capsys, "train", "--config_file", str(recipe))
        # One file for the training and for its plan.
        printed(capsys, "plan", "--config_file", str(recipe))
