"""Two tokenizers beside each other: whether they are one, and which tokens they share."""

from __future__ import annotations

import json

import numpy as np

from ten_dist.data.tokenizer import TextTokenizer


def same_tokens(left: TextTokenizer, right: TextTokenizer) -> bool:
    """Whether two tokenizers encode every text alike, and end documents with one token.

    How the files are written does not count, nor what they say of padding, truncation and
    tokens around a text, which programs add when they save a tokenizer again.
    """
    if left.separator_id != right.separator_id:
        return False
    one, other = json.loads(left.to_json()), json.loads(right.to_json())
    return one == other


def matched_tokens(theirs: TextTokenizer, ours: TextTokenizer) -> np.ndarray:
    """The tokens that two tokenizers spell alike, and their separators whatever these are
    called: int64 [n, 2], the id of theirs and of ours, in the order of ours."""
    found = {
        number: theirs.vocabulary[token]
        for token, number in ours.vocabulary.items()
        if token in theirs.vocabulary
    }
    found[ours.separator_id] = theirs.separator_id
    pairs = [(found[number], number) for number in sorted(found)]
    return np.array(pairs, dtype=np.int64)
