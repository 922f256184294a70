"""A Hugging Face data set by name: its Parquet or JSONL files, as a corpus of files.

The library `datasets` says which files make up a split, at one commit; huggingface_hub
brings those of the Hub into its cache on the local disk, where a start after an
interruption finds them again. From there on they are read like any other files.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_prep.corpus import JSON_NAME, PARQUET_NAME
from ten_dist.errors import ConfigurationError
from ten_dist.files import printable

INSTALL_COMMAND = "pip install 'ten_dist[huggingface]'"
DEFAULT_SPLIT = "train"
_HUB_FILE = re.compile(
    r"hf://datasets/(?P<name>[^@]+)@(?P<commit>[^/]+)/(?P<path>.+)", re.DOTALL
)


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a split: pairs of (path within the data set, path on this machine).

    ``source``, of JSON values, says what it is, for the manifest; without machine paths.
    """

    files: list[tuple[str, str]]
    source: dict[str, Any]


def find_dataset(dataset: str, split: str | None, revision: str | None) -> DatasetFiles:
    """The files of one split of a data set, brought here where they are on the Hub.

    Args:
        dataset: ``NAME`` or ``NAME:CONFIG``; a name is that of a data set on the Hub, or
            a folder that holds one.
        split: such as ``test``; "train" by default.
        revision: branch, tag or commit; the newest of the default branch if None.

    Raises:
        ConfigurationError: the library is not installed; there is no such data set,
            configuration or split, or it cannot be reached; or its files are neither
            Parquet nor JSONL.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            f"--dataset needs a package that is not installed ({error}): "
            f"{INSTALL_COMMAND} brings it"
        ) from None
    name, _, config = dataset.partition(":")
    split = split or DEFAULT_SPLIT
    with _naming(dataset), tempfile.TemporaryDirectory() as cache:
        # It only says what there is; what it would keep here is not needed again.
        builder = datasets.load_dataset_builder(
            name, config or None, revision=revision, cache_dir=cache
        )
    splits = {str(key): list(files) for key, files in builder.config.data_files.items()}
    if split not in splits:
        raise ConfigurationError(
            f"--dataset {dataset} has no split {split!r}: give one of "
            f"{' '.join(sorted(splits))} with --dataset_split"
        )
    for file in splits[split]:
        if not (PARQUET_NAME.fullmatch(file) or JSON_NAME.fullmatch(file)):
            shown = printable(os.path.basename(file))
            raise ConfigurationError(
                f"--dataset {dataset}: {shown} is neither Parquet nor JSON Lines "
                "(.jsonl, .json, .ndjson, compressed or not); for a data set of the Hub, "
                "--dataset_revision refs/convert/parquet may have it as Parquet"
            )
    source = {"config": builder.config.name, "split": split}
    hub = [_HUB_FILE.fullmatch(file) for file in splits[split]]
    if first := next(filter(None, hub), None):
        source |= {"name": name, "commit": first["commit"]}
    found = []
    for file, of_hub in zip(splits[split], hub, strict=True):
        if of_hub:
            with _naming(dataset):
                found.append((of_hub["path"], _download(**of_hub.groupdict())))
        elif "://" in file:
            raise ConfigurationError(
                f"--dataset {dataset}: {file} is not within the data set: fetch it, and "
                "give it with --input"
            )
        else:
            relative = os.path.relpath(file, builder.base_path)
            found.append((Path(relative).as_posix(), file))
    return DatasetFiles(found, source)


def _download(name: str, commit: str, path: str) -> str:
    """Bring a file of the Hub into the cache of huggingface_hub; where it is there."""
    from huggingface_hub import hf_hub_download

    return hf_hub_download(name, path, repo_type="dataset", revision=unquote(commit))


@contextlib.contextmanager
def _naming(dataset: str) -> Iterator[None]:
    """Turn whatever the libraries raise into one line that names the data set."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - each library below has its own
        # The first line says what is wrong, later ones are advice on Python code.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) if lines else type(error).__name__
        raise ConfigurationError(f"--dataset {dataset}: {reason}") from None
