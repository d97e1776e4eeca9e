"""A hash of everything that an object holds: unequal where one number in it differs."""

import hashlib
from collections.abc import Mapping
from typing import Any

_DEPTH = 12
_OUTSIDE = {"tape", "stream"}  # the house's own: what is told is no state of the predictor


def state_hash(predictor: Any) -> str:
    """Of what `state()` gives, where there is one; else of all attributes but those that `caches` names."""
    digest = hashlib.sha256()
    own = getattr(predictor, "state", None)
    if callable(own):
        _add(digest, own(), set(), 0)
    else:
        skipped = _OUTSIDE | set(getattr(predictor, "caches", ()))
        held = {name: value for name, value in getattr(predictor, "__dict__", {}).items() if name not in skipped}
        _add(digest, held, set(), 0)
    return digest.hexdigest()


def _add(digest: Any, value: Any, seen: set[int], depth: int) -> None:
    digest.update(type(value).__name__.encode())
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        digest.update(repr(value).encode())
    elif isinstance(value, (bytes, bytearray)):
        digest.update(value)
    elif hasattr(value, "detach") and hasattr(value, "numpy"):  # a tensor of torch, of any precision
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(str((tuple(value.shape), value.dtype)).encode())
        digest.update(plain.view(_octets(plain)).numpy().tobytes())
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):
        digest.update(str((value.shape, value.dtype)).encode() + value.tobytes())
    elif id(value) in seen or depth > _DEPTH:
        return
    else:
        seen.add(id(value))
        for part in _parts(value):
            _add(digest, part, seen, depth + 1)


def _octets(tensor: Any) -> Any:
    import torch

    return torch.uint8


def _parts(value: Any) -> list[Any]:
    """What a container or an object is made of, in a fixed order."""
    if isinstance(value, Mapping):
        return [part for pair in sorted(value.items(), key=lambda pair: repr(pair[0])) for part in pair]
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return list(value)
    if hasattr(value, "bit_generator"):  # a generator of numpy
        return [value.bit_generator.state]
    if hasattr(value, "getstate"):  # one of the standard library
        return [value.getstate()]
    if hasattr(value, "state_dict"):  # a module or an optimizer of torch
        return [value.state_dict()]
    return [pair for pair in sorted(getattr(value, "__dict__", {}).items())]
