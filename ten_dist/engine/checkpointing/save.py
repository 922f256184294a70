"""Writing checkpoints while training goes on.

A thread of each rank copies what the rank holds to host memory while the next step goes
forward and backward, and then writes its own files into a folder with a temporary name.
When all have, rank 0 checks them, adds index and record, renames the folder, and replaces
the pointer `latest`. A run killed at any moment leaves the checkpoint before it as the
newest.

The copy takes 12 bytes for each float32 weight that the rank holds; of a GPU's memory that
is pinned, and torch may take up to twice as much. Where weights and moments lie on NVMe
there is no host memory for that: they are then written without a copy, a sub-group of
parameters at a time, and training waits for it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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
from ten_dist.checkpoint.layout import (
    INDEX_NAME,
    tensor_file_name,
)
from ten_dist.checkpoint.record import RECORD_NAME
from ten_dist.engine.checkpointing.held_state import held_state
from ten_dist.engine.checkpointing.host_copy import HostCopy
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.errors import TrainingError
from ten_dist.files import sync, write_json, write_text
from ten_dist.run_folder import RunFolder

Source = Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]]

Written = tuple[str | None, dict[str, FileRecord]]
"""What went wrong, or None, and the files that a rank has written, by name."""

# Of what a checkpoint takes, for index, record and the file system's own needs.
_SPACE_MARGIN = 1.02


@dataclasses.dataclass(frozen=True)
class SavedCheckpoint:
    """How a checkpoint was written."""

    step: int
    held_seconds: float
    """That training waited."""
    write_seconds: float
    """From the first byte that was copied or written until the checkpoint was complete."""
    bytes: int
    """Of all files."""

    def metrics(self) -> dict[str, float]:
        """The figures under the names that metrics.jsonl uses."""
        return {
            "step": self.step,
            "checkpoint_held_seconds": self.held_seconds,
            "checkpoint_write_seconds": self.write_seconds,
            "checkpoint_bytes": self.bytes,
        }


class CheckpointWriter:
    """Saves one run. Every rank has one, and calls the same methods in the same order."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        ranks: Ranks,
        run: ResolvedRun,
        folder: RunFolder,
    ) -> None:
        self._ranks = ranks
        self._run = run
        self._folder = folder
        self._zero_stage = engine.zero_optimization_stage()
        self._held = held_state(engine, ranks)
        # Of the module's buffers, which all ranks have, rank 0 writes all.
        self._buffers = [
            TensorSlice(name, 0, buffer.numel())
            for name, buffer in self._held.buffers.items()
            if ranks.is_first
        ]
        self._copy = HostCopy()
        self._held_seconds = 0.0
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._saved: SavedCheckpoint | None = None

    def save(
        self,
        state: RunState,
        probe_loss: float,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin the checkpoint of a run.

        Args:
            state: how far the run is.
            probe_loss: what its weights give of the probe, nats a token.
            tick: called again and again while training waits for a write.

        Raises:
            TrainingError: on all ranks where the file system refuses on any, now or for
                the checkpoint before this; checkpoints before stay as they are.
        """
        started = time.perf_counter()
        self.wait()
        name = f"step_{state.step:08d}"
        partial = self._folder.checkpoints / f"{name}.partial"
        with self._ranks.agreeing():
            if self._ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                reason = lacking_space(self._folder, self._run.parameters)
                if reason is not None:
                    raise TrainingError(f"{reason}, then start again to continue")
        with torch.no_grad():
            self._held.prepare()
            written, writing_since = None, time.perf_counter()
            if self._held.on_disk:
                source = functools.partial(self._values, tick=tick)
                written = self._write_files(partial, source)
            else:
                self._copy.begin(list(self._values(_KINDS)))
        record = CheckpointRecord(
            state=state,
            optimizer_steps=self._held.optimizer_steps(),
            probe_loss=probe_loss,
            state_identity=self._run.state_identity(),
            precision=self._run.training.precision,
            world_size=self._ranks.world_size,
            zero_stage=self._zero_stage,
        )
        self._thread = threading.Thread(
            target=self._finish,
            args=(partial, record, written, writing_since),
            name="checkpoint",
            daemon=True,
        )
        self._held_seconds = time.perf_counter() - started
        self._thread.start()

    def before_update(self) -> None:
        """Wait until what an update changes has been copied: call it before each."""
        started = time.perf_counter()
        self._copy.wait()
        self._held_seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the checkpoint that was begun last is complete.

        Raises:
            TrainingError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise TrainingError(self._failure)

    def abandon(self, seconds: float) -> None:
        """Give a checkpoint that was begun some seconds to complete; raises nothing."""
        if self._thread is not None:
            self._thread.join(seconds)

    def take_saved(self) -> SavedCheckpoint | None:
        """How the last checkpoint was written, told once, when it is complete."""
        saved, self._saved = self._saved, None
        return saved

    def _values(
        self, kinds: Sequence[str], tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[str, Tensor]]:
        """Key and values of all that this rank writes, by :meth:`HeldState.values`."""
        for piece, kind, values in self._held.values(kinds):
            tick()
            yield piece.key(kind), values
        if WEIGHT in kinds:
            for piece in self._buffers:
                yield piece.key(WEIGHT), self._held.buffers[piece.name].view(-1)

    def _shapes(self, kinds: Sequence[str]) -> dict[str, tuple[int]]:
        """Shapes by key, in the order of :meth:`_values`."""
        held = [(p, kind) for p in self._held.slices for kind in kinds]
        if WEIGHT in kinds:
            held += [(piece, WEIGHT) for piece in self._buffers]
        return {piece.key(kind): (piece.stop - piece.start,) for piece, kind in held}

    def _copied(self, kinds: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The same from the copy in host memory."""
        return ((key, self._copy[key]) for key in self._shapes(kinds))

    def _write_files(self, partial: Path, source: Source) -> Written:
        """Write this rank's files; raises nothing.

        Args:
            partial: the folder.
            source: key and values of all slices of some kinds, in the order of
                :meth:`_shapes`; values may change when the next are asked for.
        """
        rank, world_size = self._ranks.rank, self._ranks.world_size
        files = {}
        try:
            for kinds in ((WEIGHT,), MOMENTS):
                name = tensor_file_name(kinds[0], rank, world_size)
                shapes, tensors = self._shapes(kinds), source(kinds)
                read = functools.partial(_take, tensors)
                files[name] = write_tensors(partial / name, shapes, torch.float32, read)
                # To its end, where what the last values came from is let go.
                next(tensors, None)
        except Exception as failure:  # noqa: BLE001 - others wait for the word of this rank
            return _describe(partial, failure), {}
        return None, files

    def _finish(
        self,
        partial: Path,
        record: CheckpointRecord,
        written: Written | None,
        started: float,
    ) -> None:
        """What the thread does. Ends with all ranks of one mind, whatever happened."""
        if written is None:
            try:
                self._copy.make()
            except Exception as failure:  # noqa: BLE001 - host memory, or a GPU, gives out
                written = _describe(partial, failure), {}
        error, files = written or self._write_files(partial, self._copied)
        try:
            # All together: the disk is busy from the first byte on.
            for name in files:
                sync(partial / name)
        except OSError as failure:
            error = _describe(partial, failure)
        slices = self._held.slices + self._buffers
        try:
            written = self._ranks.background.gather((error, files, slices))
            if self._ranks.is_first:
                error = self._complete(partial, record, written, started)
            self._failure = self._ranks.background.from_first(error)
        except Exception as failure:  # noqa: BLE001 - a thread's error is seen by nobody
            self._failure = f"a rank was lost while a checkpoint was written: {failure}"

    def _complete(
        self,
        partial: Path,
        record: CheckpointRecord,
        written: list[tuple[str | None, dict[str, FileRecord], list[TensorSlice]]],
        started: float,
    ) -> str | None:
        """Make a checkpoint of what the ranks have written; what went wrong, or None."""
        errors = [error for error, _, _ in written if error is not None]
        try:
            if errors:
                raise OSError(errors[0])
            files = {
                name: file for _, part, _ in written for name, file in part.items()
            }
            for name, file in files.items():
                if (size := (partial / name).stat().st_size) != file.bytes:
                    raise OSError(
                        f"{partial / name} has {size} bytes, not the {file.bytes} that "
                        "were written: is it one folder on every node?"
                    )
            index = {
                "writers": len(written),
                "tensors": {
                    name: {"shape": list(shape), "slices": []}
                    for name, shape in self._held.shapes.items()
                },
            }
            for writer, (_, _, slices) in enumerate(written):
                for piece in slices:
                    entry = [piece.start, piece.stop, writer]
                    index["tensors"][piece.name]["slices"].append(entry)
            write_json(partial / INDEX_NAME, index)
            files[INDEX_NAME] = FileRecord.of(partial / INDEX_NAME)
            write_seconds = time.perf_counter() - started
            record = dataclasses.replace(
                record,
                held_seconds=self._held_seconds,
                write_seconds=write_seconds,
                files=files,
            )
            write_json(partial / RECORD_NAME, record.to_dict())
            self._publish(partial)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            return str(error)
        self._saved = SavedCheckpoint(
            step=record.state.step,
            held_seconds=record.held_seconds,
            write_seconds=write_seconds,
            bytes=sum(file.bytes for file in files.values()),
        )
        return None

    def _publish(self, partial: Path) -> None:
        final = partial.with_suffix("")
        sync(partial)
        # A folder of this name is a damaged checkpoint that was passed over.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        sync(final.parent)
        write_text(final.parent / "latest", final.name + "\n")
        training = self._run.training
        self._folder.delete_old_checkpoints(
            training.keep_checkpoints, training.keep_checkpoint_every
        )


_KINDS = (WEIGHT, *MOMENTS)


def _take(tensors: Iterator[tuple[str, Tensor]], expected: str) -> Tensor:
    """The next values, in host memory, which are those of a key."""
    key, values = next(tensors)
    assert key == expected
    return values.cpu()


def _describe(partial: Path, failure: Exception) -> str:
    """Why a checkpoint could not be written."""
    reason = getattr(failure, "strerror", None) or repr(failure)
    return f"{partial} cannot be written: {reason}"


def lacking_space(folder: RunFolder, parameters: int) -> str | None:
    """Why the disk has no room for a checkpoint of a run, or None."""
    needed = int(4 * len(_KINDS) * parameters * _SPACE_MARGIN)
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
