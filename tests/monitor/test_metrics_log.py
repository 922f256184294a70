"""metrics.jsonl and the ledger of a run that was killed and resumed."""

import json

import numpy as np

from ten_dist.monitor.ledger import Ledger
from ten_dist.monitor.metrics_log import MetricsLog, read_metrics


def test_steps_after_the_checkpoint_are_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, first_step=0)
    for step in range(1, 6):
        log.write({"step": step, "loss": float(step)})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # the process was killed here
    log = MetricsLog(path, first_step=3)
    log.write({"step": 4, "loss": 40.0})
    log.close()
    assert [m["step"] for m in read_metrics(path)] == [1, 2, 3, 4]
    assert list(read_metrics(path))[-1]["loss"] == 40.0


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", first_step=0)
    log.write({"step": 1})
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 1}]
    log.close()


def test_ledger_separates_epochs_and_attempts(tmp_path):
    for attempt in (1, 2):
        ledger = Ledger(tmp_path / "ledger", rank=3, attempt=attempt)
        ledger.write(7, np.zeros(3, int), np.array([0, 0, 1]), np.array([8, 9, 2]))
        ledger.close()
    lines = (tmp_path / "ledger" / "rank0003.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"attempt": attempt, "step": 7, "epoch": epoch, "rows": rows}
        for attempt in (1, 2)
        for epoch, rows in ((0, [8, 9]), (1, [2]))
    ]


def test_ledger_names_the_sources_of_a_mixture(tmp_path):
    ledger = Ledger(tmp_path, rank=0, attempt=1, sources=("code", "prose"))
    ledger.write(7, np.array([1, 0, 1]), np.array([0, 2, 0]), np.array([8, 9, 2]))
    ledger.close()
    lines = (tmp_path / "rank0000.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"attempt": 1, "step": 7, "source": "code", "epoch": 2, "rows": [9]},
        {"attempt": 1, "step": 7, "source": "prose", "epoch": 0, "rows": [8, 2]},
    ]
