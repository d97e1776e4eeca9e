"""Arrays worked down to less, or in place: sums, extremes, comparisons, clamps, where, bincount."""

from __future__ import annotations

import numpy as np

from fairway.audit.trial.arrays import Array, limited, put, scalar, summed
from fairway.audit.trial.binary import binary, merged
from fairway.audit.trial.given import Act, body_of, kept, numbers_of, sizes_of
from fairway.audit.trial.growing import grown_in_place
from fairway.audit.trial.operators import combine
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.values import NET, UNKNOWN, Lib, Unknown, Value, mixed


def reduction(name: str) -> Act:
    turn = _reduction(name)
    if name not in ("max", "min"):
        return turn

    def act(array: Value, *args: Value, **kwargs: Value) -> Value:
        """x.max(dim=-1), as torch has it: the values, and where they stand."""
        if "dim" not in kwargs or args:
            return turn(array, *args, **kwargs)
        numbers, axis = numbers_of(array), scalar(kwargs["dim"])
        values = turn(array, **kwargs)
        return Extremes(
            (values, Array(getattr(np, f"arg{name}")(numbers, axis=axis, keepdims=bool(kwargs.get("keepdim")))))
        )

    return act


def _reduction(name: str) -> Act:
    def act(
        array: Value, dim: Value = None, keepdim: Value = False, axis: Value = None, keepdims: Value = False, **_: Value
    ) -> Value:
        along = dim if dim is not None else axis
        along = sizes_of((along,)) if isinstance(along, (tuple, list)) else scalar(along)
        keep = bool(keepdim or keepdims)
        if isinstance(array, Sum):
            return array
        held = body_of(array)
        if held.lossy or (held.num is not None and held.num.dtype == object):
            if name not in ("sum", "mean", "nansum", "nanmean"):
                return NET
            if isinstance(along, (bool, Lib)):
                along = None
            found = summed(held, along, keep)
            if name.endswith("sum"):
                return found
            axes = along if isinstance(along, tuple) else (along,)
            count = held.body.size if along is None else int(np.prod([held.shape[each] for each in axes]))
            return found / count if isinstance(found, Sum) else binary("Div", found, count)
        assert held.num is not None
        limited(held.body.size)
        if name in ("max", "min") and isinstance(along, int) and not isinstance(along, bool):
            return Array(getattr(held.num, name)(axis=along, keepdims=keep))
        turn = {"nansum": "sum", "nanmean": "mean", "amax": "max", "amin": "min"}.get(name, name)
        if turn == "mean" and not held.num.size:  # numpy warns of it, torch does not
            return Array(np.full(np.sum(held.num, axis=along, keepdims=keep).shape, np.nan))
        return Array(np.asarray(getattr(np, turn)(held.num, axis=along, keepdims=keep)))

    return act


class Extremes(tuple[Value, ...]):
    """What torch gives of extremes along an axis: the values, and where they stand."""

    @property
    def values(self) -> Value:
        return self[0]

    @property
    def indices(self) -> Value:
        return self[1]


def running(name: str) -> Act:
    """cummax, cummin."""

    def act(array: Value, dim: Value = 0, **_: Value) -> Value:
        numbers = numbers_of(array)
        return Extremes((Array(getattr(np, name).accumulate(numbers, axis=scalar(dim))), UNKNOWN))

    return act


def ordered(array: Value, dim: Value = -1, descending: Value = False, **_: Value) -> Value:
    """torch.sort, x.sort(): stable."""
    numbers = numbers_of(array)
    at = np.argsort(-numbers.astype(np.float64) if descending else numbers, axis=scalar(dim), kind="stable")
    return Extremes((Array(np.take_along_axis(numbers, at, scalar(dim))), Array(at)))


def elementwise(name: str) -> Act:
    """A function of each number; of losses, losses of the same targets."""

    def act(array: Value, *args: Value, **kwargs: Value) -> Value:
        if isinstance(array, Sum) or (isinstance(array, Array) and array.lossy):
            return array
        numbers = numbers_of(array)
        limited(numbers.size)
        with np.errstate(all="ignore"):
            return Array(np.asarray(getattr(np, name)(numbers)))

    return act


def rounded(array: Value, decimals: Value = 0, **_: Value) -> Value:
    held = array if isinstance(array, Sum) else body_of(array)
    return held if isinstance(held, Sum) or held.lossy else Array(np.round(numbers_of(held), scalar(decimals)))


def unique_consecutive(array: Value, return_inverse: Value = False, return_counts: Value = False, **_: Value) -> Value:
    """Of equal numbers that follow one another the first; with the run of each, and how long the runs are."""
    numbers = numbers_of(array).reshape(-1)
    first = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1) != 0)
    found = [Array(numbers[first])]
    if return_inverse is True:
        found.append(Array(np.repeat(np.arange(first.size), np.diff(first, append=numbers.size))))
    if return_counts is True:
        found.append(Array(np.diff(first, append=numbers.size)))
    return found[0] if len(found) == 1 else tuple(found)


def divided(one: Value, two: Value, *_: Value, rounding_mode: Value = None, **__: Value) -> Value:
    """torch.div(x, y, rounding_mode="floor")."""
    if rounding_mode == "trunc":
        return elementwise("trunc")(combine("Div", one, two))
    return combine("FloorDiv" if rounding_mode == "floor" else "Div", one, two)


def pairwise(name: str) -> Act:
    """A function of two arrays: of losses of the same targets, losses of them."""

    def act(one: Value, two: Value, *_: Value, **__: Value) -> Value:
        for held in (one, two):
            if isinstance(held, Unknown):
                return kept((one, two)) if not isinstance(one, Unknown) or not isinstance(two, Unknown) else held
        if isinstance(one, Sum) or isinstance(two, Sum):
            return one if isinstance(one, Sum) else two
        left, right = body_of(one), body_of(two)
        if left.lossy and right.lossy:
            return merged(left, right, add=False)
        if left.lossy or right.lossy:
            return left if left.lossy else right
        return Array(np.asarray(getattr(np, name)(numbers_of(left), numbers_of(right))))

    return act


def operated(name: str) -> Act:
    def act(one: Value, two: Value, *_: Value, alpha: Value = 1, **kwargs: Value) -> Value:

        return combine(name, one, two if alpha == 1 else combine("Mult", two, alpha))

    return act


def in_place(name: str) -> Act:
    """add_, mul_: and what it came to is the array itself."""

    def act(array: Value, other: Value, *_: Value, alpha: Value = 1, **kwargs: Value) -> Value:

        more = other if alpha == 1 else combine("Mult", other, alpha)
        return grown_in_place(name, array, more) if isinstance(array, Array) else array

    return act


def clamp(array: Value, *args: Value, **kwargs: Value) -> Value:
    """clamp, clip, and their one-sided forms."""
    if isinstance(array, Sum) or (isinstance(array, Array) and array.lossy):
        return array
    low = kwargs.get("min", kwargs.get("a_min", args[0] if args else None))
    high = kwargs.get("max", kwargs.get("a_max", args[1] if len(args) > 1 else None))
    held = body_of(array)
    found = np.clip(
        numbers_of(held), None if low is None else numbers_of(low), None if high is None else numbers_of(high)
    )
    return Array(found, held.pos)


def clamp_max(array: Value, high: Value) -> Value:
    return clamp(array, max=high)


def where(*args: Value, **_: Value) -> Value:
    """where(mask), where(mask, one, other)."""
    mask = args[0]
    if len(args) == 1:
        return tuple(Array(each) for each in np.nonzero(numbers_of(mask)))
    one, other = args[1], args[2]
    if not _is_mask(mask) and _is_mask(one):  # x.where(mask, other)
        mask, one = one, mask
    if isinstance(mask, Unknown):
        both = isinstance(one, Array) and isinstance(other, Array) and one.lossy and other.lossy
        return merged(one, other, add=False) if both else kept((one, other))
    if isinstance(one, Unknown) and isinstance(other, Unknown):
        return mixed(one, other)
    chosen = numbers_of(mask).astype(bool)
    if isinstance(one, Unknown) or isinstance(other, Unknown):
        return kept((one, other))
    left, right = body_of(one), body_of(other)
    if left.lossy or right.lossy:
        first = binary("Mult", left, Array(chosen.astype(np.float64))) if left.lossy else None
        second = binary("Mult", right, Array((~chosen).astype(np.float64))) if right.lossy else None
        if first is None or second is None:
            return first if second is None else second
        return merged(first, second, add=True)
    pos = None
    if left.pos is not None or right.pos is not None:
        nothing = np.asarray(-1, np.int32)
        pos = np.where(chosen, nothing if left.pos is None else left.pos, nothing if right.pos is None else right.pos)
    return Array(np.where(chosen, numbers_of(left), numbers_of(right)), pos)


def _is_mask(value: Value) -> bool:
    return isinstance(value, Array) and value.num is not None and value.num.dtype == bool


def masked_fill(array: Value, mask: Value, value: Value) -> Value:
    return where(binary("Eq", mask, False), array, value)


def copy_(array: Value, other: Value, *_: Value, **__: Value) -> Value:
    if isinstance(array, Array):
        put(array, Ellipsis, other)
    return array


def fill_(array: Value, value: Value) -> Value:
    return copy_(array, value)


def zero_(array: Value) -> Value:
    return copy_(array, 0)


def bincount(array: Value, weights: Value = None, minlength: Value = 0, **_: Value) -> Value:
    numbers = numbers_of(array)
    limited(float(numbers.max(initial=0)))
    held = None if weights is None else numbers_of(weights)
    return Array(np.bincount(numbers, held, scalar(minlength)))


def by_numpy(name: str) -> Act:
    """A function of numbers, as numpy has it."""

    def act(*args: Value, **kwargs: Value) -> Value:
        if any(isinstance(each, (Unknown, Sum)) for each in args):
            return mixed(*args)
        given = [
            numbers_of(each) if isinstance(each, (Array, list, tuple)) else scalar(each)
            for each in args
            if not isinstance(each, Lib)
        ]
        named = {key: scalar(each) for key, each in kwargs.items() if key in _KEYWORDS}
        for torch_said, said in (("dim", "axis"), ("keepdim", "keepdims")):
            if torch_said in named:
                named[said] = named.pop(torch_said)
        if name == "searchsorted" and scalar(kwargs.get("right", False)) is True:
            named["side"] = "right"
        if name == "outer":
            limited(float(np.size(given[0])) * np.size(given[1]))
        found = getattr(np, name)(*given, **named)
        if isinstance(found, tuple):
            return tuple(Array(np.asarray(each)) for each in found)
        return Array(np.asarray(found))

    return act


_KEYWORDS = {
    "axis",
    "dim",
    "keepdim",
    "keepdims",
    "side",
    "return_index",
    "return_counts",
    "return_inverse",
    "kind",
    "stable",
    "prepend",
    "append",
    "minlength",
}


def nonzero(array: Value, as_tuple: Value = False, **_: Value) -> Value:
    found = np.nonzero(numbers_of(array))
    return tuple(Array(each) for each in found) if as_tuple else Array(np.stack(found, -1))


def numpy_nonzero(array: Value) -> Value:
    return tuple(Array(each) for each in np.nonzero(numbers_of(array)))


def equal(one: Value, two: Value, **_: Value) -> Value:
    return bool(np.array_equal(numbers_of(one), numbers_of(two)))
