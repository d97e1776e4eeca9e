"""Arrays that are changed in place: x += y."""

from __future__ import annotations

import numpy as np

from fairway.audit.trial.arrays import Array, put
from fairway.audit.trial.binary import binary
from fairway.audit.trial.values import Raised, Unknown, Value


def grown_in_place(name: str, old: Array, more: Value) -> Value:
    """In place: every view of it sees the change."""
    try:
        found = binary(name, old, more)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise Raised(type(error).__name__, str(error)) from None
    if isinstance(found, Unknown) or not isinstance(found, Array):
        return old
    if found.shape != old.shape:
        return found
    if found.lossy:
        if not old.lossy:
            old.pos, old.coef, old.num = np.array(found.pos), np.array(found.coef), None
        else:
            assert old.pos is not None
            assert old.coef is not None
            old.pos[...] = found.pos
            old.coef[...] = found.coef
        return old
    assert found.num is not None
    assert old.num is not None
    if found.price is not None:
        old.pos, old.price = found.pos, found.price
    if found.num.dtype == object or old.num.dtype == object or not old.num.flags.writeable:
        old.num = found.num
        if old.whole is not None:
            put(*old.whole, old)
    else:
        old.num[...] = found.num.astype(old.num.dtype, copy=False)
    return old
