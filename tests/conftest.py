"""What all tests share."""

import os
import random
import signal
from collections import Counter

import pytest

# Ranks of a test share two cores: with more threads than cores they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# A suite that was started in the background ignores interrupts, and so would the programs
# that its tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Put files first by the share of their tests that are slow.

    Workers take whole files in this order: a long one that began last would leave the
    others nothing to do.
    """
    slow, tests = Counter(), Counter()
    for item in items:
        tests[item.path] += 1
        slow[item.path] += item.get_closest_marker("slow") is not None
    # Sorting keeps the order of what is equal, and so files together.
    items.sort(key=lambda item: -slow[item.path] / tests[item.path])


_WORDS = [
    "the",
    "state",
    "of",
    "a",
    "wave",
    "decays",
    "turns",
    "and",
    "is",
    "read",
    "again",
    "by",
    "every",
    "later",
    "token",
]


def write_corpus(folder, files=40, words=300, seed=0):
    """Text files with some structure to learn."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        text = " ".join(draw.choice(_WORDS) for _ in range(words))
        (folder / f"{number:03d}.txt").write_text(text + "\n")
    return folder


def contents(folder):
    """Bytes of every file below a folder, by their path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", autouse=True)
def functional_linear():
    """Torch's own F.linear for every file of tests: DeepSpeed's stage 3 puts another in its
    place, for as long as the process lives."""
    import torch.nn.functional as F

    linear = F.linear
    yield
    F.linear = linear


@pytest.fixture(scope="session")
def token_data(tmp_path_factory):
    """A folder of byte-token shards with held-out shards in val/."""
    from data_prep.shard import main

    folder = tmp_path_factory.mktemp("tokens")
    corpus = write_corpus(folder / "corpus")
    output = folder / "shards"
    arguments = ["--input", corpus, "--output", output, "--tokenizer", "bytes"]
    arguments += ["--val_fraction", "0.15", "--shard_megabytes", "0.02"]
    assert main([str(a) for a in arguments]) == 0
    return output
