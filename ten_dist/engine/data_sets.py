"""The token sets that a run's options name: training data, mixture, held-out data."""

from __future__ import annotations

from ten_dist.config.training import TrainingConfig
from ten_dist.data import (
    Manifest,
    Mixture,
    RemoteAccess,
    held_out_set,
    is_url,
    parse_mixture,
)
from ten_dist.data.access import chosen_cache
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
    options = parse_mixture(training.data)
    cache = chosen_cache(
        training,
        [training.data, training.val_data, *(s.address for s in options or ())],
    )
    # A dry run writes nothing, this folder included.
    access = RemoteAccess(cache=None if training.dry_run else cache)
    data: Manifest | Mixture
    if options is None:
        data = Manifest.load(training.data, access)
    else:
        data = Mixture(
            tuple(source.name for source in options),
            tuple(Manifest.load(source.address, access) for source in options),
            tuple(source.share for source in options),
        )
    if training.val_data is not None:
        validation = {"": Manifest.load(training.val_data, access)}
    else:
        beside = {
            name: held_out_set(found.directory)
            for name, found in zip(names_of(data), sets_of(data))
        }
        validation = {
            name: Manifest.load(place, access)
            for name, place in beside.items()
            if place is not None
        }
    if cache is not None:
        loaded = [*sets_of(data), *validation.values()]
        remote = [found for found in loaded if is_url(found.directory)]
        cache.check(max(shard.bytes for found in remote for shard in found.shards))
    first = sets_of(data)[0]
    for held_out in validation.values():
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
    return data, validation
