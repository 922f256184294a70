"""Where documents begin in a batch of tokens, for a model that keeps them apart.

A document is the tokens up to and including a separator. With document masking a model
carries nothing from one to the next, neither within a row nor from piece to piece of a
stream. Of the tokens alone it derives

    resets_t  = (token_{t-1} is the separator)      a document starts at t
    number_t  = resets_0 + ... + resets_t           0: the document that was open before

and every part that looks back compares numbers: i is of the document of t, i <= t, where
number_i = number_t. What a part carries beyond the end of a piece is emptied of all that
is not of the document open there: to the next piece, all that is carried has number 0.

The loss counts the first token of a document like any other; it is predicted at the
separator, from the document that this ends.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(
    input_ids: Tensor, separator_id: int, after_separator: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where documents start in a piece of a stream.

    Args:
        input_ids: [B, T] int64.
        separator_id: the token that ends a document.
        after_separator: [B] bool, whether the token before these was the separator, or
            None at the start of the stream.

    Returns:
        resets: [B, T] bool.
        after_separator: [B] bool, for the piece that follows.
    """
    ends = input_ids == separator_id
    if after_separator is None:
        after_separator = torch.zeros_like(ends[:, 0])
    resets = torch.cat([after_separator.unsqueeze(1), ends[:, :-1]], dim=1)
    return resets, ends[:, -1]


def document_numbers(resets: Tensor) -> Tensor:
    """[B, T] int64 number of the document of each position, 0 for the one that was open
    before them; `resets` [B, T] bool."""
    return resets.cumsum(dim=1)
