"""In which order codes are coded: rows side by side, column by column.

Tensors of one shape form a band. Its rows are taken in turns, one of each tensor (of each layer, that is), and cut into
blocks; a block's rows are the lanes, all of them at the same column in one step. So a lane knows the left part of its
row, and of every column the rows of all earlier blocks, in its own tensor too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairway.artifact.groups import Codes, GroupLayout


@dataclass(frozen=True)
class Band:
    """Tensors of one shape. places: which of the layout's they are."""

    rows: int
    cols: int
    places: tuple[int, ...]

    @property
    def tall(self) -> int:
        """Rows of all tensors together."""
        return self.rows * len(self.places)


def bands(layout: GroupLayout) -> list[Band]:
    """The layout's tensors by shape, in the order of their first."""
    found: dict[tuple[int, int], list[int]] = {}
    for place, tensor in enumerate(layout.tensors):
        found.setdefault((tensor.rows, tensor.cols), []).append(place)
    return [Band(*shape, tuple(places)) for shape, places in found.items()]


def blocks(tall: int, first: int, lanes: int) -> Iterator[tuple[int, int]]:
    """(from, to) of rows. Blocks double from `first` rows to `lanes`: the first rows teach the next ones early."""
    begin, size = 0, min(first, lanes)
    while begin < tall:
        yield begin, min(begin + size, tall)
        begin, size = begin + size, min(2 * size, lanes)


def stacked(pieces: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    """Rows of equal tensors in turns: each (rows, ...) -> (rows · tensors, ...)."""
    return np.stack(pieces, axis=1).reshape(-1, *pieces[0].shape[1:])


def unstacked(band: Band, codes: Codes) -> list[Codes]:
    """The inverse of `stacked` for codes (tall, cols)."""
    apart = codes.reshape(band.rows, len(band.places), band.cols)
    return [np.ascontiguousarray(apart[:, place]) for place in range(len(band.places))]


def owners(band: Band, begin: int, end: int) -> NDArray[np.int64]:
    """(end − begin,) the tensor of each row, counted in the band."""
    return np.arange(begin, end, dtype=np.int64) % len(band.places)


def lane_count(layout: GroupLayout, codes_each: int, extra: int) -> int:
    """How many lanes a group is coded in: one for `codes_each` codes and some `extra`, at most one for each row."""
    return min(layout.count // codes_each + extra, max(band.tall for band in bands(layout)))
