"""Several token sets mixed in fixed proportions, row by row.

Positions count the rows of the mixture from the start of training. They come in cycles of
``CYCLE``; in each a source has the same number of rows, spread evenly, so that any window
of positions has its share to within a row for each source. A source is read in its own
:class:`RowOrder`, epoch after epoch at its own pace: where a run stands in every source
follows from the one position.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

from ten_dist.data.manifest import Manifest
from ten_dist.data.order import RowOrder
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import exists

CYCLE = 1 << 16
"""Rows after which the pattern of sources repeats. Changing it changes every mixture."""
_NAMED = re.compile(r"[A-Za-z0-9_-]+=")
_SOURCE = re.compile(r"([A-Za-z0-9_-]+)=(.+):([^:/]+)")


@dataclasses.dataclass(frozen=True)
class SourceOption:
    """One part of ``--data NAME=DATA:WEIGHT,...``; shares of a mixture add up to 1."""

    name: str
    address: str
    share: float


def parse_mixture(option: str) -> list[SourceOption] | None:
    """The sources that ``--data`` names; None where it is a single folder or URL.

    Raises:
        ConfigurationError: a part is not NAME=DATA:WEIGHT, a name comes twice, or a
            weight is not a positive number.
    """
    if not _NAMED.match(option) or exists(Path(option)):
        return None
    sources = []
    for part in option.split(","):
        match = _SOURCE.fullmatch(part)
        if match is None:
            raise ConfigurationError(
                f"--data part '{part}' is not NAME=DATA:WEIGHT, such as code=DIR:0.7"
            )
        name, address, weight = match.groups()
        try:
            share = float(weight)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise ConfigurationError(
                f"--data gives {name} the weight '{weight}': it must be a number "
                "more than 0"
            )
        sources.append(SourceOption(name, address, share))
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ConfigurationError("--data names a source twice: choose other names")
    total = sum(source.share for source in sources)
    return [dataclasses.replace(s, share=s.share / total) for s in sources]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Token sets of one tokenizer, read in proportion to ``shares``, which add up to 1.

    What can be asked of a :class:`Manifest` as training data can be asked of it.

    Raises:
        ConfigurationError: a share is too small for one row in ``CYCLE``.
        DataError: the sets were not made with one tokenizer.
    """

    names: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        first = self.manifests[0]
        for name, manifest in zip(self.names, self.manifests, strict=True):
            if (manifest.tokenizer_sha256, manifest.separator_id) != (
                first.tokenizer_sha256,
                first.separator_id,
            ):
                raise DataError(
                    f"{manifest.directory} ({name}) was made with another tokenizer than "
                    f"{first.directory}: prepare it with --tokenizer "
                    f"{first.tokenizer_path}"
                )
        for name, count in zip(self.names, self.rows_per_cycle):
            if count < 1:
                raise ConfigurationError(
                    f"--data gives {name} less than one row in {CYCLE}: leave it out, or "
                    "raise its weight"
                )

    @functools.cached_property
    def rows_per_cycle(self) -> tuple[int, ...]:
        """Rows of each source in ``CYCLE`` positions: the shares, by largest remainder."""
        exact = np.array(self.shares) * CYCLE
        counts = np.floor(exact).astype(np.int64)
        missing = CYCLE - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        return tuple(counts.tolist())

    @property
    def tokenizer_set(self) -> Manifest:
        """A set that has the tokenizer of all."""
        return self.manifests[0]

    @property
    def tokens(self) -> int:
        """Tokens in all sets."""
        return sum(manifest.tokens for manifest in self.manifests)

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the tokenizer."""
        return self.manifests[0].vocab_size

    @property
    def separator_id(self) -> int:
        """Id of the token that ends a document."""
        return self.manifests[0].separator_id

    @property
    def masked(self) -> bool:
        """Whether any set has a loss mask; of the others all tokens count."""
        return any(manifest.masked for manifest in self.manifests)

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer of all sets."""
        return self.manifests[0].tokenizer_sha256

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of what decides the rows: the sets and their proportions."""
        content = [
            [manifest.fingerprint, count]
            for manifest, count in zip(self.manifests, self.rows_per_cycle)
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def rows(self, seq_len: int) -> tuple[int, ...]:
        """Rows of one epoch of each source; raises as :meth:`Manifest.rows`."""
        return tuple(manifest.rows(seq_len) for manifest in self.manifests)

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray]:
        """For each position of a cycle its source, and which of the source's rows it is.

        Row k of n is due at (k + 1/2) / n of the cycle; rows go in the order in which
        they are due.
        """
        counts = self.rows_per_cycle
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        order = np.argsort(due, kind="stable")
        sources = np.repeat(np.arange(len(counts)), counts)
        numbers = np.concatenate([np.arange(n) for n in counts])
        return sources[order], numbers[order]

    def sources_at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of positions, and the position of each within its source.

        Returns:
            (sources, positions), both int64 [stop - start].
        """
        cycles, slots = np.divmod(np.arange(start, stop, dtype=np.int64), CYCLE)
        sources, numbers = self._pattern
        counts = np.array(self.rows_per_cycle, dtype=np.int64)
        return sources[slots], cycles * counts[sources[slots]] + numbers[slots]

    def rows_before(self, position: int) -> tuple[int, ...]:
        """Rows that each source has given before a position."""
        cycle, slot = divmod(position, CYCLE)
        taken = np.bincount(self._pattern[0][:slot], minlength=len(self.names))
        return tuple(
            cycle * count + int(more)
            for count, more in zip(self.rows_per_cycle, taken, strict=True)
        )


class MixedOrder:
    """The rows of a mixture, each source in an order of its own.

    Raises:
        ConfigurationError, DataError: as :class:`RowOrder`.
    """

    def __init__(self, mixture: Mixture, seq_len: int, seed: int) -> None:
        self._mixture = mixture
        self.orders = [RowOrder(m, seq_len, seed) for m in mixture.manifests]
        """The order of each source."""

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows at positions ``start`` to ``stop``.

        Returns:
            (sources, epochs, rows), each int64 [stop - start].
        """
        sources, positions = self._mixture.sources_at(start, stop)
        epochs, rows = np.empty_like(positions), np.empty_like(positions)
        for source, order in enumerate(self.orders):
            here = sources == source
            if here.any():
                # Those of one source follow one another.
                first = int(positions[here][0])
                epochs[here], rows[here] = order.rows(first, first + int(here.sum()))
        return sources, epochs, rows
