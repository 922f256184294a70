"""`--init_from`: a new run that begins with the weights of another model.

They come from a run, one of its checkpoints, or an exported model; moments, step, order
of the data and schedule begin anew, on any data, batch, precision, stage and ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from ten_dist.checkpoint import WEIGHT, CheckpointReader, damage, read_record
from ten_dist.checkpoint.record import RECORD_NAME, FileRecord
from ten_dist.console import warn
from ten_dist.data.token_matching import matched_tokens, same_tokens
from ten_dist.data.tokenizer import (
    TextTokenizer,
    read_tokenizer,
)
from ten_dist.engine.checkpointing.held_state import held_state
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.errors import ConfigurationError
from ten_dist.export.exported_model import (
    ExportedReader,
    exported_tokenizer,
    read_exported_config,
    weight_files,
)
from ten_dist.export.huggingface import exported_config
from ten_dist.model.network import TokenEmbedding
from ten_dist.run_folder import RunFolder
from ten_dist.run_record import BEFORE_OPTIONS, Origin
from ten_dist.trained_model import tokenizer_of

# These say how a model begins or is trained, not what its weights mean.
_FREE = {
    "dropout",
    "eigenvalue_init",
    "max_timescale",
    "depth_increasing_memory",
    "document_separator_id",
}
_EMBEDDING = "embedding.weight"


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The weights of a new run, and where they lie."""

    path: Path
    """A checkpoint, or the folder of an exported model."""
    exported: bool
    origin: Origin
    kept_rows: np.ndarray | None = None
    """Where the tokenizer is another, rows of the embedding there and here of tokens that
    are in both: int64 [n, 2]."""

    def describe_rows(self, vocab_size: int) -> str:
        """What becomes of an embedding that has so many rows here, in words."""
        assert self.kept_rows is not None
        kept = len(self.kept_rows)
        return (
            f"another tokenizer: {kept:,} of {vocab_size:,} tokens keep their embedding, "
            f"{vocab_size - kept:,} begin as in a new model, normal with deviation "
            f"{TokenEmbedding.STD:g}"
        )


def find_initial_weights(run: ResolvedRun) -> InitialWeights:
    """What `--init_from` names.

    Raises:
        ConfigurationError: there is none, or it is of another model than the run's or
            of another tokenizer.
    """
    given = Path(run.training.init_from or "")
    theirs = read_exported_config(given)
    if theirs is not None:
        path, step, files = given, None, _files_of_exported(given)
        tokenizer = exported_tokenizer(given, theirs)
        if theirs.get("tie_word_embeddings") is False:
            raise ConfigurationError(
                f"--init_from {given} has a head of its own, where ours shares the "
                "embedding"
            )
    else:
        path = _checkpoint(given)
        record = read_record(path)
        theirs, step = record.state_identity, record.state.step
        files = {n: file for n, file in record.files.items() if n.startswith(WEIGHT)}
        tokenizer = _tokenizer_of_run(path)
    rows = None
    if tokenizer is not None or theirs.get("data") != run.state_identity()["data"]:
        rows = _check_tokenizer(run, tokenizer)
        if rows is not None:
            # A tokenizer may have got tokens that its model knows nothing of.
            rows = rows[rows[:, 0] < theirs.get("vocab_size", 0)]
    _check_model(run, theirs, resized=rows is not None)
    digest = hashlib.sha256(
        json.dumps({n: dataclasses.astuple(files[n]) for n in sorted(files)}).encode()
    ).hexdigest()
    kept = None if rows is None else len(rows)
    origin = Origin(os.path.abspath(given), step, digest, kept)
    return InitialWeights(path, step is None, origin, rows)


def _checkpoint(given: Path) -> Path:
    """The checkpoint that is meant by its folder or by that of a run."""
    path = given
    if RunFolder(given).exists():
        path = RunFolder(given).usable_checkpoint()
    if not (path / RECORD_NAME).is_file():
        raise ConfigurationError(
            f"--init_from {given} is neither the folder of a run, nor a checkpoint, "
            "nor a model of `ten-dist export`"
        )
    found = damage(path)
    if found is not None:
        raise ConfigurationError(f"--init_from {given} cannot be used: {found}")
    return path


def _files_of_exported(folder: Path) -> dict[str, FileRecord]:
    try:
        return {path.name: FileRecord.of(path) for path in weight_files(folder)}
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"--init_from {folder} cannot be read: {error}"
        ) from None


def _check_model(run: ResolvedRun, theirs: dict[str, Any], resized: bool) -> None:
    """Refuse weights of a model with other fields."""
    free = _FREE | {"vocab_size"} if resized else _FREE
    theirs = BEFORE_OPTIONS | theirs
    differ = [
        f"{name} is {theirs.get(name)} there and {value} here"
        for name, value in exported_config(run.model_config).items()
        if name not in free and theirs.get(name) != value
    ]
    if differ:
        raise ConfigurationError(
            f"--init_from {run.training.init_from} is of another model: "
            f"{', '.join(differ)}: give the options of that model"
        )


def _tokenizer_of_run(checkpoint: Path) -> TextTokenizer | None:
    """The tokenizer of the run that a checkpoint lies in; None of one by itself."""
    folder = RunFolder(checkpoint.resolve().parent.parent)
    return tokenizer_of(folder) if folder.exists() else None


def _check_tokenizer(
    run: ResolvedRun, theirs: TextTokenizer | None
) -> np.ndarray | None:
    """What `--init_tokenizer_mismatch` says of another tokenizer than that of the data.

    Args:
        run: whose data counts.
        theirs: of the weights; None where it is not known.

    Returns:
        None where the tokenizers are the same, or else see
        :attr:`InitialWeights.kept_rows`.
    """
    training, manifests = run.training, run.manifests()
    if not manifests:
        return None
    ours = TextTokenizer.with_separator_id(
        read_tokenizer(manifests[0]).decode("utf-8-sig"), manifests[0].separator_id
    )
    resize = training.init_tokenizer_mismatch == "resize"
    if theirs is None:
        lacks = f"--init_from {training.init_from} has no tokenizer beside it"
        if resize:
            raise ConfigurationError(
                f"{lacks}, by which --init_tokenizer_mismatch resize could tell tokens: "
                "name the folder of its run, or of an exported model"
            )
        warn(f"{lacks} to compare: --data must be of the one that it was trained with")
        return None
    if same_tokens(theirs, ours):
        return None
    if not resize:
        raise ConfigurationError(
            f"--init_from {training.init_from} is of another tokenizer than "
            f"--data {training.data}: prepare the data with the tokenizer.json that lies "
            "there, or keep what both share with --init_tokenizer_mismatch resize"
        )
    return matched_tokens(theirs, ours)


@torch.no_grad()
def load_initial_weights(
    engine: deepspeed.DeepSpeedEngine,
    ranks: Ranks,
    weights: InitialWeights,
    seed: int,
) -> None:
    """Set the weights of a run that has made no step; every rank must call this.

    Args:
        engine: of the run.
        ranks: of the run.
        weights: as :func:`find_initial_weights` gives them on the first rank.
        seed: of rows of the embedding that begin anew.

    Raises:
        ConfigurationError: it is damaged.
    """
    held = held_state(engine, ranks)
    shapes = dict(held.shapes)
    with ranks.agreeing():
        source: CheckpointReader | ExportedReader
        reader = ExportedReader if weights.exported else CheckpointReader
        with reader(weights.path) as source:
            embedding = None
            if weights.kept_rows is not None:
                there = source.tensor(WEIGHT, _EMBEDDING)
                embedding = _resized(there, shapes[_EMBEDDING], weights.kept_rows, seed)
                shapes[_EMBEDDING] = there.shape
            source.check_shapes(shapes)

            def read(kind: str, name: str, start: int, stop: int) -> Tensor:
                # Moments begin anew.
                if kind != WEIGHT:
                    return torch.zeros(stop - start)
                if embedding is not None and name == _EMBEDDING:
                    return embedding.flatten()[start:stop]
                return source.read(kind, name, start, stop)

            held.load(read, 0)
            for name, buffer in held.buffers.items():
                buffer.copy_(source.tensor(WEIGHT, name))
    held.settle()


def _resized(
    there: Tensor, shape: torch.Size, kept_rows: np.ndarray, seed: int
) -> Tensor:
    """An embedding of another vocabulary, [V, d] float32: rows that are kept, and others as
    a new model would have them, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = TokenEmbedding(*shape).weight.detach()
    rows = torch.from_numpy(kept_rows)
    embedding[rows[:, 1]] = there[rows[:, 0]]
    return embedding
