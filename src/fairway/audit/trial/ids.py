"""Ids of tokens as Python has them, in lists and by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np


class Id(int):
    """The id of a token as a number of Python, which still knows its place in the text."""

    place: int


def ids_of(num: Any, pos: Any) -> Any:
    """Numbers with places, as Python has them: nested lists, or one."""
    if np.ndim(num):
        return [ids_of(*each) for each in zip(num, pos, strict=True)]
    if pos < 0:
        return num.item()
    made = Id(num)
    made.place = int(pos)
    return made


def mapped(index: Any, found: Any) -> Any:
    """The places of what a table gave for tokens, where it maps tokens onto tokens, most of them onto themselves:
    `fold[tokens]`. None of a table of anything else. index, found: Arrays."""
    pos = index.pos
    if pos is None or found.num is None or found.num.dtype.kind not in "iu" or found.shape != pos.shape:
        return None
    tokens = pos >= 0
    same = (found.num == index.num)[tokens]
    return pos.copy() if same.size and same.mean() > _SAME else None


_SAME = 0.5  # of the tokens

__all__ = ["Id", "ids_of", "mapped"]
