"""Under MPI: the same bytes for any number of ranks, and never a rank left waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ten_dist.data import Manifest, verify_shards

ROOT = Path(__file__).resolve().parents[2]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_result_does_not_depend_on_the_number_of_ranks(tmp_path, corpus, mpiexec):
    options = ["--vocab_size", 400, "--val_fraction", 0.2, "--shard_megabytes", 0.1]
    outputs = []
    for ranks in (1, 2, 3):
        output = tmp_path / f"out{ranks}"
        done = mpiexec(
            ranks,
            *("-m", "mpi4py", "-m", "data_prep.shard", "--input", corpus),
            *("--output", output, *options),
        )
        assert done.returncode == 0, done.stderr
        # One rank speaks for all.
        assert done.stdout.count("train: ") == done.stdout.count("held out: ") == 1
        outputs.append(contents(output))
    assert outputs[0] == outputs[1] == outputs[2]
    manifest = Manifest.load(output)
    assert len(manifest.shards) >= 6
    names = {shard.name for shard in manifest.shards}
    own = {"manifest.json", "tokenizer.json"}
    assert {name for name in outputs[0] if "/" not in name} == names | own
    verify_shards(manifest)
    verify_shards(Manifest.load(output / "val"))


@pytest.mark.parametrize("bad_first", [True, False])
def test_an_error_on_one_rank_ends_all_with_one_line(
    tmp_path, sentence, mpiexec, bad_first
):
    """The larger unit goes to rank 0, the other to rank 1."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    sizes = (40000, 90000) if bad_first else (90000, 40000)
    (folder / "good.txt").write_text(sentence(1, sizes[0]), encoding="utf-8")
    line = '{"text": "' + "x" * 6 * sizes[1] + '"}\n'
    (folder / "bad.jsonl").write_text(line + '{"text": 1}\n')
    done = mpiexec(
        2,
        *("-m", "mpi4py", "-m", "data_prep.shard", "--input", folder),
        *("--output", tmp_path / "out", "--tokenizer", "bytes"),
        *("--shard_megabytes", 0.4),
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert f"error: {folder / 'bad.jsonl'}:2: field 'text'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


WORK = """
import sys, time
from data_prep.ranks import FileError, Ranks
ranks, _ = Ranks.start()
failing = int(sys.argv[1])

def job(tick):
    if ranks.rank == failing:
        raise OSError(f"disk of {failing}")
    while True:
        tick(1, 1)
        time.sleep(0.01)

for attempt in range(2):
    try:
        ranks.work(job, lambda *work: None)
    except FileError as error:
        assert str(error) == f"disk of {failing}", error
    else:
        raise SystemExit("the failure was not seen")
results = ranks.work(lambda tick: ranks.rank * 10, lambda *work: None)
assert results == ([0, 10, 20] if ranks.rank == 0 else None), results
assert ranks.from_root(lambda: ranks.rank + 7) == 7
print(f"rank {ranks.rank} ended", flush=True)
"""


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failing_rank_stops_the_others_at_work(mpiexec, failing):
    done = mpiexec(3, "-m", "mpi4py", "-c", WORK, failing)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == [
        "",
        *(f"rank {r} ended" for r in range(3)),
    ]


def run_alone(tmp_path, corpus, **environment):
    return subprocess.run(
        [
            *(sys.executable, "-m", "data_prep.shard", "--input", str(corpus)),
            *("--output", str(tmp_path / "out"), "--tokenizer", "bytes"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


def test_without_an_mpi_library_one_process_does_the_work_and_says_so(tmp_path, corpus):
    hidden = tmp_path / "hidden" / "mpi4py"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("")
    (hidden / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    path = f"{hidden.parent}{os.pathsep}{ROOT}"
    done = run_alone(tmp_path, corpus, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "MPI is not available" in done.stdout
    # Processes that an MPI launcher started, blind to each other, would write the same
    # files.
    done = run_alone(tmp_path, corpus, PYTHONPATH=path, PMI_SIZE="2")
    assert done.returncode == 2
    assert "each sees only itself" in done.stderr
