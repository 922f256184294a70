"""Where a rank keeps what ZeRO moves to NVMe, for as long as it runs.

DeepSpeed names its swap files after ranks and parameters, not after runs: two runs in one
folder would overwrite each other's weights. So each rank has a folder of its own in
`--nvme_path`, with a lock that is free again when its process ends, however that ends. A
folder whose lock is free is what a killed rank has left, and goes when the next one starts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ten_dist.deepspeed_config import swaps_to_nvme, with_nvme_path
from ten_dist.engine.distributed import Ranks
from ten_dist.errors import ConfigurationError, TrainingError
from ten_dist.files import exists, unwritable
from ten_dist.native.library import compiled_once

_PREFIX = "ten_dist_swap_"
_LOCK = "lock"
# Of a weight that the rank holds: itself in float32, two moments and the gradient.
_BYTES = 16
# Of what is swapped: rounding up to whole blocks, and the file system's own needs.
_SPACE_MARGIN = 1.05


def check_swap_path(
    deepspeed_config: dict[str, Any], parameters: int, ranks: Ranks
) -> None:
    """Find out, without writing, whether this rank can swap to `--nvme_path`.

    Args:
        deepspeed_config: the derived one.
        parameters: weights of the model.
        ranks: those of this machine share the folder.

    Raises:
        ConfigurationError: it cannot: no such folder, too little room in it, or no libaio.
    """
    if not swaps_to_nvme(deepspeed_config):
        return
    path = _path_of(deepspeed_config)
    if not (exists(path) and path.is_dir()):
        raise ConfigurationError(
            f"--nvme_path {path} is not a folder: make one on the disk to swap to"
        )
    reason = unwritable(path)
    if reason is not None:
        raise ConfigurationError(f"--nvme_path {path} {reason}")
    share = parameters * ranks.local_world_size / ranks.world_size
    needed = int(share * _BYTES * _SPACE_MARGIN)
    free = shutil.disk_usage(path).free + sum(map(_size, _abandoned(path)))
    if free < needed:
        raise ConfigurationError(
            f"--nvme_path {path} has {free / 1e9:.3g} GB free, and the ranks of this "
            f"machine swap {needed / 1e9:.3g} GB to it: make room, or use more machines"
        )
    load_operator()


@contextlib.contextmanager
def swap_folder(
    deepspeed_config: dict[str, Any], ranks: Ranks
) -> Iterator[dict[str, Any]]:
    """A folder of this rank's own to swap to, gone at the end of the block.

    Folders that killed ranks have left go at its start. Every rank must call this.

    Args:
        deepspeed_config: the derived one.
        ranks: of the run.

    Yields:
        The same configuration with that folder, for `deepspeed.initialize`; unchanged
        where nothing is swapped.

    Raises:
        ConfigurationError: on all ranks where a file system refuses on any, or cannot
            write past its cache.
    """
    if not swaps_to_nvme(deepspeed_config):
        yield deepspeed_config
        return
    path = _path_of(deepspeed_config)
    with contextlib.ExitStack() as stack:
        with ranks.agreeing():
            folder = stack.enter_context(_locked_folder(path))
            _check_direct_writes(folder, path)
        # DeepSpeed does not look at the results of its writes: on a full disk it would
        # go on with what it could not write. Written again, a file needs no more room.
        operator = load_operator()
        plain = getattr(operator.aio_handle, "plain", operator.aio_handle)
        operator.aio_handle = _reserving(plain, path)
        yield with_nvme_path(deepspeed_config, str(folder))


def _path_of(deepspeed_config: dict[str, Any]) -> Path:
    return Path(deepspeed_config["zero_optimization"]["offload_optimizer"]["nvme_path"])


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    """A new folder in `path` that is this process's own.

    Raises:
        ConfigurationError: the file system refuses.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                # Between making a folder and locking it, another rank would take it for
                # abandoned.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                for abandoned in _abandoned(path):
                    shutil.rmtree(abandoned, ignore_errors=True)
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path))
                lock = stack.enter_context(open(folder / _LOCK, "wb"))
                # A lock of the process, not of the open file: processes that it forks to
                # read data may live a little longer than it, and must not hold it.
                # Another rank that looks whether it is locked holds it for a moment.
                fcntl.lockf(lock, fcntl.LOCK_EX)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ConfigurationError(
                f"--nvme_path {path} cannot be used: {error.strerror}"
            ) from None
        # Before the lock is let go.
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _abandoned(path: Path) -> list[Path]:
    """Swap folders whose process has ended."""
    return [folder for folder in path.glob(f"{_PREFIX}*") if not _is_locked(folder)]


def _is_locked(folder: Path) -> bool:
    """Whether somebody uses a swap folder; those of other users are theirs to delete."""
    try:
        with open(folder / _LOCK, "r+b") as lock:
            # Shared: two that look at the same time must not take each other for its owner.
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    return False


def _size(folder: Path) -> int:
    """Bytes on the disk of the files in a folder; one that vanishes meanwhile has none."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, file)).st_blocks * 512
    return total


def _check_direct_writes(folder: Path, path: Path) -> None:
    """Refuse a file system that cannot write past its cache, as DeepSpeed does.

    Raises:
        ConfigurationError: it cannot.
    """
    try:
        os.close(os.open(folder / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        raise ConfigurationError(
            f"--nvme_path {path} is on a file system without direct input and output "
            f"(O_DIRECT: {error.strerror}): choose a folder on a local disk, such as "
            "ext4 or xfs"
        ) from None


def load_operator() -> Any:
    """DeepSpeed's operator for asynchronous input and output.

    Raises:
        ConfigurationError: it cannot be had.
    """
    try:
        with compiled_once("DeepSpeed's operator for offload to NVMe (minutes)"):
            return get_accelerator().create_op_builder("AsyncIOBuilder").load()
    except (RuntimeError, OSError, ImportError) as error:
        raise ConfigurationError(
            "offload to NVMe needs DeepSpeed's async_io operator, which cannot be "
            "loaded: install libaio with its headers (Debian, Ubuntu: apt-get install "
            f"libaio-dev) and a C++ compiler. The reason: {str(error).splitlines()[0]}"
        ) from None


def _reserving(plain: type, path: Path) -> type:
    """DeepSpeed's class of input and output, allocating a file before its first write."""

    @functools.cache
    def reserve(file: str, size: int) -> None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise TrainingError(
                    f"--nvme_path {path} is full: make room, and start again to continue"
                ) from None
            raise
        finally:
            os.close(descriptor)

    class Handle(plain):
        def async_pwrite(self, buffer: torch.Tensor, file: str, offset: int) -> int:
            reserve(file, buffer.nbytes)
            return super().async_pwrite(buffer, file, offset)

    Handle.plain = plain
    return Handle
