"""Look after the checkpoints of a run.

ten-dist checkpoint list RUN        step, loss, size and age of each, and whether it is whole
ten-dist checkpoint verify PATH     read every byte of one checkpoint, or of all of a run
ten-dist checkpoint convert PATH    weights of one checkpoint into one safetensors file
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from ten_dist.checkpoint import (
    CheckpointReader,
    checksum_damage,
    damage,
    read_record,
)
from ten_dist.checkpoint.record import RECORD_NAME
from ten_dist.console import complain, say
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.run_folder import RunFolder, checkpoint_step

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ten-dist checkpoint`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="those of a run", allow_abbrev=False)
    verify = actions.add_parser("verify", help="are they whole", allow_abbrev=False)
    convert = actions.add_parser(
        "convert", help="weights into one file", allow_abbrev=False
    )
    listing.add_argument("run", metavar="RUN", help="folder of the run")
    for action in (verify, convert):
        action.add_argument(
            "path",
            metavar="PATH",
            help="folder of a checkpoint; or of a run, for "
            + ("all of its checkpoints" if action is verify else "its newest one"),
        )
    convert.add_argument(
        "--output", metavar="FILE", required=True, help="safetensors file to write"
    )
    convert.add_argument(
        "--dtype",
        choices=tuple(_DTYPES),
        default="fp32",
        help="of the weights [default: fp32]",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run an action.

    Raises:
        ConfigurationError: there is no checkpoint, or one is damaged.
    """
    if arguments.action == "list":
        _list(RunFolder(arguments.run))
    elif arguments.action == "verify":
        _verify(Path(arguments.path))
    else:
        _convert(Path(arguments.path), Path(arguments.output), _DTYPES[arguments.dtype])


def _list(folder: RunFolder) -> None:
    folder.read()
    checkpoints = folder.all_checkpoints()
    if not checkpoints:
        say(f"{folder.path} has no checkpoint yet")
        return
    say(f"{'step':>10}  {'loss':>8}  {'val_loss':>8}  {'GB':>8}  saved (UTC)")
    for path in reversed(checkpoints):
        found = damage(path)
        if found is not None:
            say(f"{checkpoint_step(path):>10,}  damaged: {found}")
            continue
        record = read_record(path)
        size = sum(file.bytes for file in record.files.values())
        saved = time.gmtime((path / RECORD_NAME).stat().st_mtime)
        figures = [record.state.metrics.get(name) for name in ("loss", "val_loss")]
        words = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
        say(
            f"{record.state.step:>10,}  {words[0]:>8}  {words[1]:>8}  {size / 1e9:>8.3f}  "
            f"{time.strftime('%Y-%m-%d %H:%M:%S', saved)}"
        )


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoint at a path; of a run, all of its checkpoints, newest first."""
    folder = RunFolder(path)
    if not folder.exists():
        if not (path / RECORD_NAME).is_file():
            raise ConfigurationError(
                f"{path} is neither a checkpoint nor the folder of a run"
            )
        return [path]
    checkpoints = folder.all_checkpoints()
    if not checkpoints:
        raise ConfigurationError(f"{path} has no checkpoint yet")
    return checkpoints


def _verify(path: Path) -> None:
    found = 0
    for checkpoint in _checkpoints(path):
        fault = damage(checkpoint) or checksum_damage(checkpoint)
        if fault is None:
            # Sound bytes may still leave out a part of a tensor.
            with CheckpointReader(checkpoint) as reader:
                elements = sum(shape.numel() for shape in reader.shapes.values())
            say(f"{checkpoint} is whole: {elements:,} weights, every checksum right")
        else:
            found += 1
            complain(fault)
    if found:
        raise DataError(
            f"{found} damaged: remove what is damaged, and the run continues from the "
            "newest that is whole"
        )


def _convert(path: Path, output: Path, dtype: torch.dtype) -> None:
    _checkpoints(path)
    if RunFolder(path).exists():
        path = RunFolder(path).usable_checkpoint()
    fault = damage(path) or checksum_damage(path)
    if fault is not None:
        raise ConfigurationError(f"the checkpoint cannot be converted: {fault}")
    with CheckpointReader(path) as reader:
        try:
            reader.export(output, dtype)
        except OSError as error:
            raise ConfigurationError(
                f"--output {output} cannot be written: {error.strerror}"
            ) from None
    say(f"{output}: weights of {path}, {output.stat().st_size / 1e9:.3f} GB")
