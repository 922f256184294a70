"""Tables as text."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence


def table(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Lines whose cells stand below each other; a row may lack the last ones.

    The columns with the numbers in `right` are aligned at their right edge.
    """
    columns = list(itertools.zip_longest(*rows, fillvalue=""))
    for number, column in enumerate(columns):
        width = max(map(len, column))
        adjust = str.rjust if number in right else str.ljust
        columns[number] = tuple(adjust(cell, width) for cell in column)
    return ["  ".join(cells).rstrip() for cells in zip(*columns)]
