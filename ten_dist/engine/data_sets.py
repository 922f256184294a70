"""The token sets that a run's options name: training data, mixture, held-out data."""

from __future__ import annotations

from collections.abc import Mapping

from ten_dist.config.training import TrainingConfig
from ten_dist.data import (
    Manifest,
    Mixture,
    RemoteAccess,
    held_out_set,
    parse_mixture,
)
from ten_dist.data.access import check_cache, chosen_cache
from ten_dist.data.storage import Location
from ten_dist.errors import ConfigurationError


def sets_of(data: Manifest | Mixture | None) -> tuple[Manifest, ...]:
    """The token sets that data is made of."""
    if data is None:
        return ()
    return data.manifests if isinstance(data, Mixture) else (data,)


def names_of(data: Manifest | Mixture) -> tuple[str, ...]:
    """Names of the sources of a mixture; "" for a single token set."""
    return data.names if isinstance(data, Mixture) else ("",)


def load_data(
    training: TrainingConfig,
) -> tuple[Manifest | Mixture | None, dict[str, Manifest]]:
    """The training data, and the held-out sets by the name of their source.

    A held-out set that was asked for by itself has the name "", like that of a single
    training set.

    Raises:
        ConfigurationError: a set cannot be used, or sets do not fit together.
    """
    if training.data is None:
        return None, {}
    sources = parse_mixture(training.data)
    addresses = [source.address for source in sources or ()] or [training.data]
    cache = chosen_cache(training, [*addresses, training.val_data])
    # A dry run writes nothing, this folder included.
    access = RemoteAccess(cache=None if training.dry_run else cache)
    sets = tuple(Manifest.load(address, access) for address in addresses)
    data: Manifest | Mixture = sets[0]
    if sources is not None:
        names, shares = zip(*((source.name, source.share) for source in sources))
        data = Mixture(names, sets, shares)
    places: Mapping[str, str | Location | None] = {"": training.val_data}
    if training.val_data is None:
        places = {
            name: held_out_set(found.directory)
            for name, found in zip(names_of(data), sets)
        }
    validation = {
        name: Manifest.load(place, access)
        for name, place in places.items()
        if place is not None
    }
    if cache is not None:
        check_cache(cache, [*sets, *validation.values()])
    for held_out in validation.values():
        _check_held_out(held_out, sets[0], training)
    return data, validation


def _check_held_out(
    held_out: Manifest, first: Manifest, training: TrainingConfig
) -> None:
    if held_out.tokenizer_sha256 != first.tokenizer_sha256:
        raise ConfigurationError(
            f"--val_data {held_out.directory} was made with another tokenizer than "
            f"--data {training.data}: prepare it with --tokenizer "
            f"{first.tokenizer_path}"
        )
    if training.document_masking and held_out.separator_id != first.separator_id:
        raise ConfigurationError(
            f"--val_data {held_out.directory} ends documents with another token than "
            f"--data {training.data}, which --document_masking cannot have: prepare it "
            f"with --separator '{first.separator_token}'"
        )
    held_out.rows(training.seq_len)
