"""Look at token shards: what is in them, whether they are whole, what they say.

ten-dist data inspect DATA   tokens, documents and their lengths, bytes a token
ten-dist data verify DATA    sizes, sha256, token range, documents; every fault is named
ten-dist data sample DATA    decoded documents to read
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from ten_dist.arguments import ArgumentParser
from ten_dist.config.command_line import add_options, given
from ten_dist.config.options import Options, at_least
from ten_dist.config.training import CacheOptions
from ten_dist.console import complain, say
from ten_dist.data import Manifest, RemoteAccess, held_out_set
from ten_dist.data.access import access_of, load_set
from ten_dist.data.documents import (
    DocumentLengths,
    document_lengths,
    sample_documents,
)
from ten_dist.data.tokenizer import TextTokenizer, set_tokenizer
from ten_dist.data.verify import damages
from ten_dist.errors import DataError

_BAR = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """What is shown; each field is an option of `ten-dist data sample`."""

    count: Annotated[int, at_least(1, most=1_000_000)] = 3
    """Documents."""
    max_tokens: Annotated[int, at_least(1)] = 200
    """Most tokens to show of each."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the choice."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `ten-dist data`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="what is in it", allow_abbrev=False)
    verify = actions.add_parser("verify", help="is it whole", allow_abbrev=False)
    sample = actions.add_parser("sample", help="read in it", allow_abbrev=False)
    for action in (inspect, verify, sample):
        action.add_argument(
            "data", metavar="DATA", help="folder of prepared token shards, or its URL"
        )
    # To verify is to see what the server has, not what a cache has.
    for action in (inspect, sample):
        add_options(action, CacheOptions)
    inspect.add_argument("--json", action="store_true", help="print JSON instead")
    add_options(sample, SampleOptions)


def run(arguments: argparse.Namespace) -> None:
    """Run an action.

    Raises:
        ConfigurationError: an option is out of range.
        DataError: the set is missing or damaged.
    """
    cache = given(arguments, CacheOptions)
    sets = _sets(arguments.data, access_of(cache, [arguments.data]))
    if arguments.action == "inspect":
        _inspect(sets, arguments.json)
    elif arguments.action == "verify":
        _verify(sets)
    else:
        _sample(sets[0], given(arguments, SampleOptions))


def _sets(data: str, access: RemoteAccess) -> list[Manifest]:
    """The manifest of a folder, and of the held-out set in it if there is one."""
    manifest = load_set(data, access)
    held_out = held_out_set(manifest.directory)
    return [manifest] if held_out is None else [manifest, load_set(held_out, access)]


def _reading(manifest: Manifest) -> tqdm:
    return tqdm(
        total=manifest.tokens,
        desc=str(manifest.directory),
        unit="token",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )


def _inspect(sets: list[Manifest], as_json: bool) -> None:
    described = []
    for manifest in sets:
        with _reading(manifest) as bar:
            lengths = document_lengths(manifest, bar.update)
        if as_json:
            described.append(_as_dict(manifest, lengths))
        else:
            for line in _describe(manifest, lengths):
                say(line)
    if as_json:
        say(json.dumps(described, indent=2))


def _as_dict(manifest: Manifest, lengths: DocumentLengths) -> dict[str, Any]:
    return {
        "directory": str(manifest.directory),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes,
        "bytes_per_token": manifest.text_bytes / manifest.tokens,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "separator": manifest.separator_token,
        "fingerprint": manifest.fingerprint,
        "document_tokens": dataclasses.asdict(lengths),
        "source": dict(manifest.source),
        "counted_tokens": manifest.counted_tokens,
    }


def _describe(manifest: Manifest, lengths: DocumentLengths) -> list[str]:
    size = sum(shard.bytes for shard in manifest.shards)
    facts = {
        "tokens": f"{manifest.tokens:,} in {len(manifest.shards):,} shards, "
        f"{size / 1e6:,.1f} MB of {manifest.dtype}",
        "text": f"{manifest.documents:,} documents, "
        f"{manifest.text_bytes / 1e6:,.1f} MB, "
        f"{manifest.text_bytes / manifest.tokens:.2f} bytes a token",
        "tokenizer": f"{manifest.tokenizer_file}, vocabulary "
        f"{manifest.vocab_size:,}, separator {manifest.separator_token} "
        f"(id {manifest.separator_id})",
        "fingerprint": manifest.fingerprint,
        **_describe_mask(manifest),
        "document": f"{lengths.shortest:,} to {lengths.longest:,} tokens, mean "
        f"{lengths.mean:,.0f}; half up to {lengths.quantile(0.5):,}, nine tenths up "
        f"to {lengths.quantile(0.9):,}",
    }
    lines = [str(manifest.directory)]
    lines += [f"  {name:<12} {fact}" for name, fact in facts.items()]
    most = max(lengths.histogram)
    first = next(i for i, count in enumerate(lengths.histogram) if count)
    for exponent, count in enumerate(lengths.histogram[first:], first):
        bar = "#" * -(-count * _BAR // most)
        lines.append(f"    up to {2**exponent:>10,}  {count:>10,}  {bar}".rstrip())
    return lines


def _describe_mask(manifest: Manifest) -> dict[str, str]:
    if manifest.counted_tokens is None:
        return {}
    share = manifest.counted_tokens / manifest.tokens
    return {"loss mask": f"counts {manifest.counted_tokens:,} tokens, {share:.1%}"}


def _verify(sets: list[Manifest]) -> None:
    faults = 0
    for manifest in sets:
        with _reading(manifest) as bar:
            for damage in damages(manifest, bar.update):
                complain(str(damage))
                faults += 1
    if faults:
        raise DataError(f"{faults} fault{'s' * (faults > 1)} in {sets[0].directory}")
    for manifest in sets:
        counted = manifest.counted_tokens
        say(
            f"{manifest.directory} is whole: {len(manifest.shards):,} shards, "
            f"{manifest.tokens:,} tokens, {manifest.documents:,} documents"
            + ("" if counted is None else f", {counted:,} tokens counted")
        )


def _sample(manifest: Manifest, options: SampleOptions) -> None:
    tokenizer = set_tokenizer(manifest)
    for document in sample_documents(manifest, options.count, options.seed):
        shown = document.tokens[: options.max_tokens].tolist()
        extent = f"{document.tokens.size:,} tokens"
        if len(shown) < document.tokens.size:
            extent = f"the first {len(shown):,} of {extent}"
        counted = document.counted
        if counted is not None:
            extent += f", {int(counted.sum()):,} counted, within « »"
        say(f"--- {document.shard}, from token {document.start:,}: {extent}")
        if counted is None:
            say(tokenizer.decode(shown))
        else:
            say(_with_counted(tokenizer, shown, counted))


def _with_counted(
    tokenizer: TextTokenizer, shown: Sequence[int], counted: np.ndarray
) -> str:
    """The text of tokens, what the loss counts of it within « »; both arrays [n]."""
    changes = np.flatnonzero(np.diff(counted[: len(shown)])) + 1
    bounds = [0, *changes.tolist(), len(shown)]
    texts = (
        (tokenizer.decode(shown[start:stop]), bool(counted[start]))
        for start, stop in itertools.pairwise(bounds)
        if start < stop
    )
    return "".join(f"«{text}»" if is_counted else text for text, is_counted in texts)
