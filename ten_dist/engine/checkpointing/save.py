"""Writing checkpoints while training goes on.

A thread of each rank copies what the rank holds to host memory during the next forward and
backward, and then writes its own files into a folder with a temporary name. When all have,
rank 0 checks them, adds index and record, renames the folder, and replaces the pointer
`latest`. A run killed at any moment leaves the checkpoint before it as the newest.

The copy takes 12 bytes for each float32 weight that the rank holds, 8 of a matrix with Muon,
and up to twice that on GPUs, where it is pinned. Where weights and moments lie on NVMe
because host memory is short, they are written without a copy, a group of parameters at a
time, and training waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from ten_dist.checkpoint import (
    MOMENTS,
    WEIGHT,
    CheckpointRecord,
    FileRecord,
    RunState,
    TensorSlice,
    write_tensors,
)
from ten_dist.checkpoint.layout import INDEX_NAME, tensor_file_name
from ten_dist.checkpoint.record import RECORD_NAME
from ten_dist.engine.checkpointing.held_state import KINDS, held_state
from ten_dist.engine.checkpointing.host_copy import HostCopy
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.errors import TrainingError
from ten_dist.files import sync, write_json, write_text
from ten_dist.run_folder import RunFolder

# Of what a checkpoint takes, for index, record and the file system's own needs.
_SPACE_MARGIN = 1.02


@dataclasses.dataclass
class _Part:
    """What one rank has written of a checkpoint."""

    folder: Path
    slices: list[TensorSlice]
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    error: str | None = None
    """Why it could not be written."""

    @contextlib.contextmanager
    def keeping_error(self) -> Iterator[None]:
        """Raise nothing: the other ranks wait to hear of this one."""
        try:
            yield
        except Exception as failure:  # noqa: BLE001 - of files, host memory or the GPU
            reason = getattr(failure, "strerror", None) or repr(failure)
            self.error = f"{self.folder} cannot be written: {reason}"


class CheckpointWriter:
    """Saves one run. Every rank has one, and calls the same methods in the same order.

    Args:
        engine, ranks, run, folder: of the training.
        report: told how each checkpoint was written, by the names of metrics.jsonl.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        ranks: Ranks,
        run: ResolvedRun,
        folder: RunFolder,
        report: Callable[[dict[str, Any]], None] = lambda metrics: None,
    ) -> None:
        self._report = report
        self._ranks = ranks
        self._run = run
        self._folder = folder
        self._zero_stage = engine.zero_optimization_stage()
        self._held = held_state(engine, ranks)
        self._copy = HostCopy()
        self._held_seconds = 0.0
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._saved: dict[str, Any] | None = None

    def save(
        self,
        state: RunState,
        probe_loss: float,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin a checkpoint.

        Args:
            state: of the run.
            probe_loss: of its weights, nats a token, see :func:`run_probe`.
            tick: called again and again while training waits for a write.

        Raises:
            TrainingError: on all ranks where the file system refuses on any, now or for
                the checkpoint before this; checkpoints before stay as they are.
        """
        started = time.perf_counter()
        self.wait()
        partial = self._folder.checkpoints / f"step_{state.step:08d}.partial"
        with self._ranks.agreeing():
            if self._ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                reason = lacking_space(self._folder, self._run)
                if reason is not None:
                    raise TrainingError(f"{reason}, then start again to continue")
        part = _Part(partial, self._held.slices + self._held.buffer_slices)
        writing_since = time.perf_counter()
        with torch.no_grad():
            self._held.prepare()
            if self._held.on_disk:
                with part.keeping_error():
                    self._write_files(part, tick)
            else:
                self._copy.begin(list(self._held.values(KINDS)))
        record = CheckpointRecord(
            state=state,
            optimizer_steps=self._held.optimizer_steps(),
            probe_loss=probe_loss,
            state_identity=self._run.state_identity(),
            precision=self._run.training.precision,
            world_size=self._ranks.world_size,
            zero_stage=self._zero_stage,
        )
        finish = functools.partial(self._finish, part, record, writing_since)
        self._thread = threading.Thread(target=finish, name="checkpoint", daemon=True)
        self._held_seconds = time.perf_counter() - started
        self._thread.start()

    def before_update(self) -> None:
        """Wait until what an update changes has been copied: call it before each."""
        started = time.perf_counter()
        self._copy.wait()
        self._held_seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the checkpoint that was begun last is complete, and report it.

        Raises:
            TrainingError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.report_saved()
        if self._failure is not None:
            raise TrainingError(self._failure)

    def abandon(self, seconds: float) -> None:
        """Give a checkpoint that was begun some seconds to complete; raises nothing."""
        if self._thread is not None:
            self._thread.join(seconds)

    def report_saved(self) -> None:
        """Report a checkpoint that has become complete."""
        saved, self._saved = self._saved, None
        if saved is not None:
            self._report(saved)

    def _write_files(
        self, part: _Part, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Write this rank's files and add them to `part`."""
        for kinds in ((WEIGHT,), MOMENTS):
            name = tensor_file_name(kinds[0], self._ranks.rank, self._ranks.world_size)
            values = self._held.values(kinds, tick)
            read = self._copy.__getitem__
            if self._held.on_disk:
                read = functools.partial(_take, values)
            part.files[name] = write_tensors(
                part.folder / name,
                self._held.value_shapes(kinds),
                torch.float32,
                read,
            )
            # Frees the memory into which the last values were read from the disk.
            values.close()

    def _finish(self, part: _Part, record: CheckpointRecord, started: float) -> None:
        """What the thread does. All ranks end with the same result, whatever happened."""
        with part.keeping_error():
            if not self._held.on_disk:
                self._copy.make()
                self._write_files(part)
            # All together: the disk is busy from the first byte on.
            for name in part.files:
                sync(part.folder / name)
        try:
            parts = self._ranks.background.gather(part)
            error = None
            if self._ranks.is_first:
                error = self._complete(parts, record, started)
            self._failure = self._ranks.background.from_first(error)
        except Exception as failure:  # noqa: BLE001 - a thread's error is seen by nobody
            self._failure = f"a rank was lost while a checkpoint was written: {failure}"

    def _complete(
        self, parts: list[_Part], record: CheckpointRecord, started: float
    ) -> str | None:
        """Make a checkpoint of what the ranks have written; what went wrong, or None."""
        partial = parts[0].folder
        try:
            for part in parts:
                if part.error is not None:
                    raise OSError(part.error)
            files = {n: file for part in parts for n, file in part.files.items()}
            for name, file in files.items():
                if (size := (partial / name).stat().st_size) != file.bytes:
                    raise OSError(
                        f"{partial / name} has {size} bytes, not the {file.bytes} that "
                        "were written: is it one folder on every node?"
                    )
            write_json(partial / INDEX_NAME, self._index(parts))
            files[INDEX_NAME] = FileRecord.of(partial / INDEX_NAME)
            record = dataclasses.replace(
                record,
                held_seconds=self._held_seconds,
                write_seconds=time.perf_counter() - started,
                files=files,
            )
            write_json(partial / RECORD_NAME, record.to_dict())
            self._publish(partial)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            return str(error)
        self._saved = {
            "step": record.state.step,
            "checkpoint_held_seconds": record.held_seconds,
            "checkpoint_write_seconds": record.write_seconds,
            "checkpoint_bytes": sum(file.bytes for file in files.values()),
        }
        return None

    def _index(self, parts: list[_Part]) -> dict[str, Any]:
        tensors: dict[str, dict[str, list]] = {
            name: {"shape": list(shape), "slices": []}
            for name, shape in self._held.shapes.items()
        }
        for writer, part in enumerate(parts):
            for piece in part.slices:
                entry = [piece.start, piece.stop, writer]
                tensors[piece.name]["slices"].append(entry)
        return {"writers": len(parts), "tensors": tensors}

    def _publish(self, partial: Path) -> None:
        final = partial.with_suffix("")
        sync(partial)
        # A folder of this name is a damaged checkpoint that was passed over.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        sync(final.parent)
        write_text(final.parent / "latest", final.name + "\n")
        self._folder.delete_old_checkpoints(self._run.training)


def _take(tensors: Iterator[tuple[str, Tensor]], expected: str) -> Tensor:
    """The next values, in host memory, which are those of a key."""
    key, values = next(tensors)
    assert key == expected
    return values.cpu()


def lacking_space(folder: RunFolder, run: ResolvedRun) -> str | None:
    """Why the disk has no room for a checkpoint of a run, or None."""
    needed = int(4 * (run.parameters + run.moments) * _SPACE_MARGIN)
    place = folder.checkpoints
    while not place.exists():
        place = place.parent
    total, _, free = shutil.disk_usage(place)
    # A file system of no size, /proc for one, says nothing of its room.
    if not total or free >= needed:
        return None
    return (
        f"--output_dir {folder.path} has {free / 1e9:.3g} GB free, and a checkpoint takes "
        f"{needed / 1e9:.3g} GB: make room, perhaps with --keep_checkpoints"
    )
