"""Whatever an option holds: it is used, or refused by its name in one line with status 2."""

import os

import pytest

from data_prep.shard import main as prepare
from ten_dist.cli import main
from tests.conftest import contents, write_corpus
from tests.tools.launching import SMALL_MODEL

TRAINING = [
    *SMALL_MODEL,
    *("--data", "data", "--steps", "2", "--seq_len", "32", "--global_batch_size", "4"),
    *("--precision", "fp32", "--num_workers", "0"),
]
LONG = "x" * 5000
HUGE = str(2**64)
LARGE = str(2**62)
COMMANDS = {
    "prepare": ["--input", "corpus", "--output", "new", "--tokenizer", "bytes"],
    "train": ["train", *TRAINING, "--output_dir", "new", "--dry_run"],
    "train in earnest": ["train", *TRAINING, "--output_dir", "new"],
    "evaluate": ["evaluate", "run"],
    "generate": ["generate", "run", "--prompt", "the", "--max_new_tokens", "2"],
    "chat": ["chat", "run"],
    "plan": ["plan"],
    "convert": ["checkpoint", "convert", "run", "--output", "new"],
    "sample": ["data", "sample", "data"],
    "supervise": ["supervise"],
    "launch": ["launch", "--hosts", "localhost:1", "--dry_run"],
    "preflight": ["preflight", "--hosts", "localhost:1"],
    "plan droplets": ["droplets", "plan"],
    "setup": ["droplets", "setup", "--run", "name"],
    "reap": ["droplets", "reap", "--dry_run"],
}
REFUSED = [
    ("prepare", "--input", ""),
    ("prepare", "--input", "co\0rpus"),
    ("prepare", "--input", LONG),
    ("prepare", "--output", "corpus"),
    ("prepare", "--output", "/dev/null"),
    ("prepare", "--output", LONG),
    ("prepare", "--tokenizer", "corpus"),
    ("prepare", "--tokenizer", LONG),
    ("prepare", "--val_fraction", "nan"),
    ("prepare", "--val_fraction", "1"),
    ("prepare", "--val_fraction", "1e-45"),
    ("prepare", "--shard_megabytes", "1e309"),
    ("prepare", "--shard_megabytes", "0"),
    ("prepare", "--min_length", "1.5"),
    ("prepare", "--min_length", HUGE),
    ("prepare", "--text_field", "te\0xt"),
    ("train", "--data", LONG),
    ("train", "--data", "a=data:nan"),
    ("train", "--data", "a=data:1,,b=data:1"),
    ("train", "--data", "https://["),
    ("train", "--data", "/dev/null"),
    ("train", "--data", "odd://host/folder"),
    ("train", "--data", "da\udce9ta"),
    ("train", "--data", ""),
    ("train", "--val_data", ""),
    ("train", "--output_dir", ""),
    ("train", "--output_dir", "/dev/null"),
    ("train", "--resume", "corpus"),
    ("train", "--nvme_path", LONG),
    ("train", "--deepspeed_config", ""),
    ("train", "--deepspeed_config", LONG),
    ("train", "--deepspeed_config", "corpus"),
    ("train", "--deepspeed_config", "/dev/null"),
    ("train", "--deepspeed_config", "zero\n2"),
    ("train", "--hten_scales", "1,,2"),
    ("train", "--hten_scales", ""),
    ("train", "--levels", "0"),
    ("train", "--selection_range", "nan,1"),
    ("train", "--seq_len", "1e3"),
    ("train", "--seq_len", LARGE),
    ("train", "--global_batch_size", "0"),
    ("train", "--steps", HUGE),
    ("train", "--tokens", "nan"),
    ("train", "--seed", "-1"),
    ("train", "--seed", HUGE),
    ("train", "--learning_rate", "inf"),
    ("train", "--learning_rate", "١e"),
    ("train", "--dropout", "nan"),
    ("train", "--dim", LARGE),
    ("train", "--n_layers", LARGE),
    ("train", "--vocab_size", LARGE),
    ("train", "--ffn_multiplier", "1e18"),
    ("train", "--hang_timeout", "1e18"),
    ("train", "--precision", "fp32\0"),
    ("train", "--dollars_per_hour", "-inf"),
    ("train in earnest", "--output_dir", LONG),
    ("train in earnest", "--output_dir", "/dev/null"),
    ("train in earnest", "--output_dir", "corpus"),
    ("train in earnest", "--resume", LONG),
    ("train in earnest", "--resume", "corpus"),
    ("train in earnest", "--resume", "/dev/null"),
    ("train in earnest", "--data_cache", "/dev/null"),
    ("evaluate", "--data", LONG),
    ("evaluate", "--data", "run"),
    ("evaluate", "--batch_size", "0"),
    ("evaluate", "--batch_size", "2.0"),
    ("evaluate", "--seq_len", LARGE),
    ("evaluate", "--max_rows", "-1"),
    ("generate", "--temperature", "nan"),
    ("generate", "--temperature", "inf"),
    ("generate", "--temperature", "-1"),
    ("generate", "--top_k", "0"),
    ("generate", "--top_k", HUGE),
    ("generate", "--top_p", "nan"),
    ("generate", "--top_p", "0"),
    ("generate", "--seed", HUGE),
    ("generate", "--seed", "-1"),
    ("generate", "--prompt", "caf\udce9"),
    ("generate", "--prompt", "the\0"),
    ("generate", "--max_new_tokens", "1e18"),
    ("generate", "--prompts", LONG),
    ("generate", "--output", LONG),
    ("generate", "--output", "corpus"),
    ("generate", "--samples", "0"),
    ("generate", "--batch_size", "1.5"),
    ("generate", "--logprobs", "-1"),
    ("generate", "--stop", ""),
    ("chat", "--system", ""),
    ("chat", "--max_new_tokens", "0"),
    ("plan", "--dim", LARGE),
    ("plan", "--nodes", "0"),
    ("plan", "--mfu", "nan"),
    ("plan", "--json", ""),
    ("plan", "--json", "corpus"),
    ("plan", "--json", LONG),
    ("convert", "--output", ""),
    ("convert", "--output", "corpus"),
    ("convert", "--output", LONG),
    ("convert", "--dtype", "fp\n16"),
    ("sample", "--count", LARGE),
    ("sample", "--seed", HUGE),
    ("supervise", "--backoff", "1e18"),
    ("supervise", "--grace", "nan"),
    ("supervise", "--max_restarts", "1.5"),
    ("launch", "--host_timeout", "1e18"),
    ("launch", "--hostfile", LONG),
    ("preflight", "--report_timeout", LARGE),
    ("preflight", "--ssh_config", LONG),
    ("plan droplets", "--count", LARGE),
    ("setup", "--wait_minutes", "inf"),
    ("reap", "--poll_interval", "1e18"),
]
USED = [
    ("prepare", "--shard_megabytes", "1e18"),
    ("train", "--seed", str(2**32 - 1)),
    ("train", "--data", ",".join(f"{'long_name_' * 3}{i}=data:1" for i in range(9))),
    ("evaluate", "--batch_size", str(10**9)),
    ("evaluate", "--max_rows", LARGE),
    ("generate", "--temperature", "1e-45"),
    ("generate", "--temperature", "1e30"),
    ("generate", "--top_k", LARGE),
    ("generate", "--top_p", "1e-45"),
    ("generate", "--seed", str(2**63 - 1)),
    ("generate", "--prompt", LONG),
    ("generate", "--prompt", ""),
    ("generate", "--batch_size", LARGE),
    ("generate", "--stop", LONG),
    ("sample", "--max_tokens", LARGE),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus, token shards and a short run."""
    folder = tmp_path_factory.mktemp("odd")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_corpus(folder / "corpus", files=12, words=100)
        prepared = ["--output", "data", "--val_fraction", "0.2"]
        assert prepare([*COMMANDS["prepare"], *prepared]) == 0
        trained = [*COMMANDS["train in earnest"], "--output_dir", "run"]
        assert main(trained) == 0
    return folder


@pytest.fixture
def status(place, monkeypatch):
    """Runs a command in that folder with an option more, for its exit status."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("DIGITALOCEAN_TOKEN", raising=False)

    def run(command, option, value):
        arguments = [*COMMANDS[command], f"{option}={value}"]
        if command == "launch":
            if option == "--hostfile":
                arguments.remove("--hosts")
                arguments.remove("localhost:1")
            arguments += ["--", *TRAINING, "--output_dir", "new"]
        try:
            return (prepare if command == "prepare" else main)(arguments)
        except SystemExit as ended:
            return ended.code

    return run


def _name(value):
    return ascii(value)[:40]


@pytest.mark.parametrize(("command", "option", "value"), REFUSED, ids=_name)
def test_refused(capsys, place, status, command, option, value):
    before = contents(place)
    capsys.readouterr()
    assert status(command, option, value) == 2
    errors = capsys.readouterr().err
    # Of what argparse refuses it shows the usage first.
    (line,) = [
        line
        for line in errors.splitlines()
        if line.startswith(("ten-dist", "data_prep"))
    ]
    assert errors.endswith(f"{line}\n")
    # A path that is given with an option is enough to find it.
    assert option.lstrip("-") in line or (value and value in line)
    assert contents(place) == before


@pytest.mark.parametrize(("command", "option", "value"), USED, ids=_name)
def test_used(capsys, place, status, command, option, value):
    assert status(command, option, value) == 0
    assert "Traceback" not in capsys.readouterr().err
    if command == "prepare":
        for path in sorted((place / "new").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (place / "new").rmdir()


def test_what_is_no_file_is_written_to_and_not_replaced(place, status, tmp_path):
    """As root a rename would put a file in the place of /dev/null, for all programs."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert status("plan", "--json", pipe) == 0
        assert pipe.is_fifo() and os.read(reader, 1 << 20).startswith(b"{")
        assert status("convert", "--output", pipe) == 2
        assert pipe.is_fifo()
    finally:
        os.close(reader)
