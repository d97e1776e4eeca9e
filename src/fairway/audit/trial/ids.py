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


__all__ = ["Id", "ids_of"]
