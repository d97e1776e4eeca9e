"""Changes of shape: views, axes, gathers, windows; places and losses move with the numbers."""

from __future__ import annotations

import numpy as np

from fairway.audit.trial.arrays import Array, array_of, joined, limited, scalar, stacked, taken
from fairway.audit.trial.given import body_of, numbers_of, sizes_of
from fairway.audit.trial.ids import mapped
from fairway.audit.trial.values import UNKNOWN, Unknown, Value, mixed


def reshape(array: Value, *shape: Value, **_: Value) -> Value:
    """Of losses into what nobody knows, `.view(*logits.shape[:2])`: into what they were before they were made flat."""
    held = body_of(array)
    try:
        sizes = sizes_of(shape)
    except TypeError:
        if not held.lossy or len(held.was) != len(shape) or held.body.ndim != 1:
            return mixed()
        sizes = held.was
    return _flat(held, held.all(lambda body: body.reshape(sizes)))


def _flat(before: Array, made: Array) -> Array:
    if made.body.ndim == 1:
        made.was = before.shape
    return made


def unflatten(array: Value, dim: int, sizes: Value) -> Value:
    held = body_of(array)
    before = held.shape[: dim % held.body.ndim]
    after = held.shape[dim % held.body.ndim + 1 :]
    return held.all(lambda body: body.reshape(*before, *sizes_of((sizes,)), *after))


def flatten(array: Value, start: int = 0, end: int = -1, **_: Value) -> Value:
    held = body_of(array)
    shape = held.shape
    first, last = start % max(len(shape), 1), end % max(len(shape), 1)
    return _flat(held, held.all(lambda body: body.reshape(*shape[:first], -1, *shape[last + 1 :])))


def transposed(array: Value, *dims: Value, **_: Value) -> Value:
    """numpy's x.transpose(1, 0) and torch's x.permute(1, 0)."""
    order = sizes_of(dims) if dims else None
    held = body_of(array)
    return held.all(lambda body: body.transpose(order) if order is None or len(order) == body.ndim else body)


def turned(array: Value, *dims: Value, **named: Value) -> Value:
    """x.transpose(0, 1): two axes change places; numpy's gives all of them."""
    two = [scalar(each) for each in (*dims, *(named[each] for each in ("dim0", "dim1") if each in named))]
    return swapped(array, *two) if len(two) == 2 else transposed(array, *dims)


def swapped(array: Value, one: int, other: int) -> Value:
    return body_of(array).all(lambda body: np.swapaxes(body, one, other))


def squeeze(array: Value, dim: Value = None, axis: Value = None, **_: Value) -> Value:
    along = dim if dim is not None else axis
    held = body_of(array)
    if along is not None and held.shape[along] != 1:
        return held
    return held.all(lambda body: body.squeeze(along))


def unsqueeze(array: Value, dim: Value = 0, axis: Value = None, **_: Value) -> Value:
    return body_of(array).all(lambda body: np.expand_dims(body, dim if axis is None else axis))


def expand(array: Value, *shape: Value) -> Value:
    held = body_of(array)
    if len(shape) == 1 and isinstance(shape[0], Unknown):
        return held  # as wide as the model's rows are: each place once
    sizes = list(sizes_of(shape))
    for n in range(1, len(held.shape) + 1):
        if sizes[-n] == -1:
            sizes[-n] = held.shape[-n]
    limited(float(np.prod(sizes)))
    return held.all(lambda body: np.broadcast_to(body, sizes))


def expand_as(array: Value, other: Value) -> Value:
    return expand(array, body_of(other).shape)


def masked_select(array: Value, mask: Value) -> Value:
    return taken(body_of(array), numbers_of(mask).astype(bool))


def index_select(array: Value, dim: Value, index: Value = None, **_: Value) -> Value:
    held, at = body_of(array), numbers_of(index)
    found = held.all(lambda body: np.take(body, at, axis=dim))
    if isinstance(index, Array) and found.pos is None:
        found.pos = mapped(index, found)
    return found


def gather(array: Value, *args: Value, **kwargs: Value) -> Value:
    """torch.gather(x, dim, index), take_along_dim: of arrays that are known."""
    index = kwargs.get("index", next((each for each in args if isinstance(each, Array)), None))
    dim = kwargs.get("dim", kwargs.get("axis", next((each for each in args if isinstance(each, int)), 0)))
    held, at = body_of(array), numbers_of(index)
    if isinstance(dim, int) and held.shape[dim] == 1:
        at = np.zeros_like(at)  # a weight for each row, times rows that nobody knows: all of one are alike
    return held.all(lambda body: np.take_along_axis(body, at, axis=dim))


def picked(array: Value, index: Value, axis: Value = None, **_: Value) -> Value:
    """torch.take, np.take: of all numbers one after the other, or along an axis."""
    held, at = body_of(array), numbers_of(index)
    if axis is None:
        found = taken(held.all(lambda body: body.reshape(-1)), at)
        if isinstance(index, Array) and isinstance(found, Array) and found.pos is None:
            found.pos = mapped(index, found)
        return found
    return held.all(lambda body: np.take(body, at, axis=scalar(axis)))


def narrow(array: Value, dim: int, start: Value, length: Value) -> Value:
    at = [slice(None)] * dim + [slice(scalar(start), scalar(start) + scalar(length))]
    return taken(body_of(array), tuple(at))


def unfold(array: Value, dim: int, size: Value, step: Value) -> Value:
    """x.unfold(0, size, step): the windows behind the other axes, as views."""
    held, width, stride = body_of(array), scalar(size), scalar(step)
    at = (slice(None),) * (dim % held.body.ndim) + (slice(None, None, stride),)
    return held.all(lambda body: np.lib.stride_tricks.sliding_window_view(body, width, dim)[at])


def sliding_window_view(array: Value, window_shape: Value, axis: Value = None, **_: Value) -> Value:
    """numpy.lib.stride_tricks.sliding_window_view(x, width, axis): the windows behind the other axes, as views."""
    held, width, along = body_of(array), scalar(window_shape), scalar(axis)
    return held.all(lambda body: np.lib.stride_tricks.sliding_window_view(body, width, along))


def unbind(array: Value, dim: int = 0, **_: Value) -> Value:
    held = body_of(array)
    return tuple(taken(held, (*[slice(None)] * (dim % held.body.ndim), n)) for n in range(held.shape[dim]))


def select(array: Value, dim: int, index: Value) -> Value:
    held = body_of(array)
    return taken(held, (*[slice(None)] * (dim % held.body.ndim), scalar(index)))


def moved(array: Value, source: Value, destination: Value) -> Value:
    return body_of(array).all(lambda body: np.moveaxis(body, source, destination))


def split(array: Value, size: Value, dim: int = 0, **_: Value) -> Value:
    held = body_of(array)
    step = scalar(size)
    if isinstance(step, int):
        return [taken(held, (slice(None),) * dim + (slice(at, at + step),)) for at in range(0, held.shape[dim], step)]
    ends = np.cumsum(list(step))
    return [
        taken(held, (slice(None),) * dim + (slice(int(end - n), int(end)),)) for end, n in zip(ends, step, strict=True)
    ]


def chunk(array: Value, count: Value, dim: int = 0, **_: Value) -> Value:
    held = body_of(array)
    size = -(-held.shape[dim] // scalar(count))
    return split(held, size, dim)


def cat(parts: Value, dim: Value = 0, axis: Value = None, **_: Value) -> Value:
    if isinstance(parts, (list, tuple)) and not parts:
        return Array(np.empty(0, dtype=np.int64))  # the short text has less than a script expects, and that may be none
    held = [each for each in (array_of(part) for part in parts) if each is not None]
    if len(held) != len(list(parts)) or not held:
        return mixed(*parts)
    return joined(
        [each if each.body.ndim else each.all(lambda body: body.reshape(1)) for each in held],
        scalar(axis if axis is not None else dim),
    )


def stack(parts: Value, dim: Value = 0, axis: Value = None, **_: Value) -> Value:
    held = [each for each in (array_of(part) for part in parts) if each is not None]
    if len(held) != len(list(parts)) or not held:
        return mixed(*parts)
    found = stacked(held, scalar(axis if axis is not None else dim))
    return found if found is not None else UNKNOWN


def roll(array: Value, shifts: Value, dims: Value = None, **kwargs: Value) -> Value:
    return body_of(array).all(lambda body: np.roll(body, scalar(shifts), kwargs.get("axis", dims)))


def flip(array: Value, *dims: Value, **_: Value) -> Value:
    return body_of(array).all(lambda body: np.flip(body, sizes_of(dims) if dims else None))


def repeat_interleave(array: Value, count: Value, dim: Value = None, **kwargs: Value) -> Value:
    along = kwargs.get("axis", dim)
    times = scalar(count) if not isinstance(count, Array) or count.body.size == 1 else numbers_of(count)
    return body_of(array).all(lambda body: np.repeat(body, times, along))


def repeat(array: Value, *times: Value) -> Value:
    return body_of(array).all(lambda body: np.tile(body, sizes_of(times)))


def pad(array: Value, widths: Value, *args: Value, **kwargs: Value) -> Value:
    """F.pad: pairs from the last dimension on. ids of the padding have no place."""
    held = body_of(array)
    numbers = sizes_of((widths,))
    pairs = [(0, 0)] * held.body.ndim
    for n in range(len(numbers) // 2):
        pairs[-1 - n] = (numbers[2 * n], numbers[2 * n + 1])
    value = kwargs.get("value", args[1] if len(args) > 1 else 0) or 0
    if held.num is None:
        assert held.pos is not None
        assert held.coef is not None
        return Array(None, np.pad(held.pos, pairs, constant_values=-1), np.pad(held.coef, pairs))
    pos = None if held.pos is None else np.pad(held.pos, pairs, constant_values=-1)
    return Array(np.pad(held.num, pairs, constant_values=value), pos)
