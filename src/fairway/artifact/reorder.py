"""The rows of a group's tensors in an order in which neighbours are alike, for byte coders: a permutation stands before
the codes (#1855)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairway.artifact.groups import Codes, Group, GroupLayout
from fairway.artifact.squeeze import squeeze, unsqueeze

MOST_CHAINED = 1 << 16  # rows of a tensor that is reordered


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) has rows reordered."""
    return bool(recipe["pack"]["coder"].get("reorder"))


def chained(group: Group) -> tuple[bytes, Group]:
    """What tells the order of the rows, and the group in that order."""
    chains = [chain(codes) for codes in group.codes]
    moved = Group(group.layout, tuple(codes[rows] for codes, rows in zip(group.codes, chains, strict=True)))
    places = squeeze(np.concatenate(chains).astype("<u2").tobytes(), pairs=True)
    return len(places).to_bytes(4, "little") + places, moved


def chains(blob: bytes, layout: GroupLayout) -> tuple[int, list[NDArray[np.int64]]]:
    """(where the codes start, the permutation of each tensor's rows). ValueError where it is none."""
    start = 5 + int.from_bytes(blob[1:5], "little")
    if len(blob) < start:
        raise ValueError("cut short in the order of the rows")
    return start, _permutations(unsqueeze(blob[5:start], 2 * sum(t.rows for t in layout.tensors)), layout)


def chain(codes: Codes) -> NDArray[np.int64]:
    """Rows so that each is followed by the nearest in L1 of those left, from row 0 on (as #1855 did): (rows,).

    ValueError for more than 65,536 rows, whose numbers would not fit in two bytes.
    """
    rows = len(codes)
    if rows > MOST_CHAINED:
        raise ValueError(f"{rows:,} rows: at most {MOST_CHAINED:,} can be reordered; reorder = false")
    wide, found = codes.astype(np.int16), np.zeros(rows, dtype=np.int64)
    left = np.arange(1, rows)
    for place in range(1, rows):
        distances = np.abs(wide[left] - wide[found[place - 1]]).sum(axis=1)
        nearest = int(distances.argmin())
        found[place] = left[nearest]
        left = np.delete(left, nearest)
    return found


def _permutations(raw: bytes, layout: GroupLayout) -> list[NDArray[np.int64]]:
    """The permutation of each tensor's rows. ValueError where it is none."""
    if len(raw) != 2 * sum(tensor.rows for tensor in layout.tensors):
        raise ValueError("the order of the rows does not fit the tensors")
    numbers, found, start = np.frombuffer(raw, dtype="<u2").astype(np.int64), [], 0
    for tensor in layout.tensors:
        rows = numbers[start : start + tensor.rows]
        if not np.array_equal(np.sort(rows), np.arange(tensor.rows)):
            raise ValueError(f"{tensor.name}: the order of the rows is no permutation")
        found.append(rows)
        start += tensor.rows
    return found
