"""Branches of a run: a new run in a folder of its own that begins at a checkpoint of another."""

from __future__ import annotations

import dataclasses
import os

from ten_dist.checkpoint import damage
from ten_dist.engine.checkpointing.load import check_same_run, describe_changes
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.errors import ConfigurationError
from ten_dist.run_folder import RunFolder, checkpoint_step
from ten_dist.run_record import RunRecord


@dataclasses.dataclass(frozen=True)
class Parent:
    """The run that a checkpoint is of."""

    folder: RunFolder
    record: RunRecord


def find_parent(run: ResolvedRun) -> Parent | None:
    """The run whose checkpoint `--resume PATH` names; None where it lies in no run.

    Raises:
        ConfigurationError: `--extend` is to make that run longer, and it is not there, had
            other options or is longer.
    """
    path = run.training.resume
    folder = RunFolder(os.path.normpath(os.path.join(path, "..", "..")))
    try:
        parent = Parent(folder, folder.read())
    except ConfigurationError:
        parent = None
    if run.training.extend:
        if parent is None:
            raise ConfigurationError(
                f"--extend makes a run longer, and --resume {path} lies in the folder of "
                "none: leave --extend out"
            )
        check_same_run(f"{folder.path} holds a run", folder, parent.record, run)
    return parent


def describe_branch(run: ResolvedRun, parent: Parent, done: int) -> str:
    """What a run takes over from another and what it does otherwise, in words.

    Args:
        run: the new one.
        parent: the one whose checkpoint it begins with.
        done: steps that this has done.
    """
    path, schedule, before = parent.folder.path, run.schedule, parent.record.schedule
    where = f"branching off at step {done:,} of {path}, which stays as it is: "
    # What only shapes steps to come is told by the learning rates.
    later = {"steps": None, "decay_fraction": None}
    changed = describe_changes(parent.record.identity | later, run.identity() | later)
    if done <= parent.record.common_steps(schedule) and not changed:
        return (
            f"{where}exactly what a run of {schedule.steps:,} steps with these options "
            "would have been from its start"
        )
    if done < schedule.steps:
        changed += "; " if changed else ""
        changed += f"the learning rate is {schedule.describe_change(before, done)}"
    return f"{where}{changed}"


def describe_late_extension(
    run: ResolvedRun, folder: RunFolder, record: RunRecord, done: int
) -> str:
    """That the decay had begun when a run was extended, and what to do, in words.

    Args:
        run: the longer one.
        folder, record: of the one that is extended.
        done: steps that the run has done.

    Returns:
        The end of a sentence; empty where no decay had begun.
    """
    common = record.common_steps(run.schedule)
    if run.schedule.kind != "wsd" or done <= common or done >= run.schedule.steps:
        return ""
    for path in folder.all_checkpoints():
        if checkpoint_step(path) <= common and damage(path) is None:
            return (
                "; the decay had begun: to extend the plateau instead, give --resume "
                f"{path} --extend and a new --output_dir"
            )
    return "; the decay had begun, and no checkpoint of the plateau is left"
