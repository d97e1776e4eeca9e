"""Functions of ours in the machine's form: of plain values, and of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fairway.audit.trial.arrays import scalar
from fairway.audit.trial.core import Core
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.values import Raised, Value, mixed

Act = Callable[["Core", tuple[Value, ...], dict[str, Value], int], Value]


def plain(func: Callable[..., Value]) -> Act:
    """A function of ours that knows nothing of the machine."""
    return lambda machine, args, kwargs, line: func(*args, **kwargs)


def numeric(func: Callable[..., Any]) -> Act:
    """A function of numbers: a Sum comes out as it is, what nobody knows stays so."""

    def act(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        given = [scalar(each) for each in args]
        sums = [each for each in given if isinstance(each, Sum)]
        if sums:
            return sums[0]
        if not all(isinstance(each, (bool, int, float, str, np.number)) for each in given):
            return mixed(*given)
        try:
            return func(*given, **kwargs)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise Raised(type(error).__name__, str(error)) from None

    return act


def all_items(machine: Core, value: Value) -> list[Value]:
    found = []
    for each in machine.items(value):
        machine.step()
        found.append(each)
    return found
