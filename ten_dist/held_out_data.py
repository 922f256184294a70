"""Held-out data that fit a run: its own, or others made with its tokenizer."""

from __future__ import annotations

from ten_dist.data import Manifest, RemoteAccess
from ten_dist.data.access import load_set
from ten_dist.errors import ConfigurationError
from ten_dist.run_record import RunRecord


def held_out_place(option: str | None, record: RunRecord) -> str:
    """Folder or URL of a held-out set: that of `--data`, or else the run's own.

    Raises:
        ConfigurationError: there is none, or there are several.
    """
    places = record.data.validation
    if option or "" in places:
        return option or places[""]
    if not places:
        raise ConfigurationError(
            "the run was trained without validation data: give a folder with --data"
        )
    found = ", ".join(f"{place} ({name})" for name, place in places.items())
    raise ConfigurationError(
        f"the run was trained on a mixture: say with --data which to use, {found}"
    )


def held_out_data(place: str, record: RunRecord, access: RemoteAccess) -> Manifest:
    """The token set at a place.

    Raises:
        ConfigurationError: it has another tokenizer or separator than the run.
        DataError: it cannot be read.
    """
    manifest = load_set(place, access)
    if manifest.tokenizer_sha256 != record.data.tokenizer_sha256:
        raise ConfigurationError(
            f"--data {place} was made with another tokenizer than the run's: prepare "
            "it with the tokenizer.json of the run folder"
        )
    masked = record.model.document_separator_id
    if masked not in (None, manifest.separator_id):
        raise ConfigurationError(
            f"--data {manifest.directory} ends documents with token "
            f"{manifest.separator_id}, and the run keeps documents apart by token "
            f"{masked}: prepare it with the run's --separator"
        )
    return manifest
