"""What a preparation calls: files, JSON, patterns, the normal forms of Unicode, pools of processes."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import numpy as np

from fairway.audit.preparing.asking import Options
from fairway.audit.preparing.patterns import Pattern
from fairway.audit.trial.acting import all_items
from fairway.audit.trial.arrays import Array, scalar
from fairway.audit.trial.builtin import BUILTIN
from fairway.audit.trial.files import text_of
from fairway.audit.trial.holding import held
from fairway.audit.trial.threads import Executor
from fairway.audit.trial.values import UNKNOWN, Raised, Unknown, Value


def _len(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    found = BUILTIN["len"](machine, args, kwargs, line)
    if isinstance(args[0], (bytes, bytearray)):
        machine.lengths[machine.line].append(found)
    return found


def _by_pattern(name: str) -> Any:
    def act(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        pattern = Pattern(machine, args[0], kwargs.pop("flags", 0))
        return getattr(pattern, name)(*args[1:], **kwargs)

    return act


def _normal(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    form, text = args
    if form not in ("NFC", "NFD", "NFKC", "NFKD") or not isinstance(text, str):
        return UNKNOWN
    found = unicodedata.normalize(form, text)
    machine.changed(text, found)
    return found


def _of_sign(name: str) -> Any:
    return lambda machine, args, kwargs, line: (
        getattr(unicodedata, name)(*args) if all(isinstance(each, str) for each in args) else UNKNOWN
    )


def _loads(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    try:
        return json.loads(args[0]) if isinstance(args[0], (str, bytes)) else UNKNOWN
    except ValueError as error:
        raise Raised("ValueError", str(error)) from None


def _dumps(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    def plain(value: Value) -> Any:
        number = scalar(value)
        return number.item() if isinstance(number, np.generic) else number if isinstance(number, int) else str(value)

    return json.dumps(args[0], default=plain)[:100_000] if not isinstance(args[0], Unknown) else UNKNOWN


def _dump(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    text = _dumps(machine, args, {}, line)
    write = getattr(args[1], "write", None)
    return write(text) if write is not None and isinstance(text, str) else UNKNOWN


def _save(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    array = args[1] if len(args) > 1 else None
    if isinstance(array, Array) and array.num is not None:
        machine.write(args[0], array.num.tobytes())
    return None


class Numbers(list[Value]):
    """array.array."""

    def __init__(self, machine: Any, kind: Value, items: Value = ()) -> None:
        super().__init__(all_items(machine, items))
        self.machine = machine
        self.kind = np.dtype({"H": "u2", "B": "u1", "I": "u4", "i": "i4", "L": "u8", "h": "i2"}.get(str(kind), "i8"))

    def tobytes(self) -> bytes:
        return np.asarray(list(self), dtype=self.kind).tobytes()

    def tofile(self, where: Value) -> None:
        self.machine.write(where, self.tobytes())


class Pool:
    """multiprocessing.Pool: one process."""

    def __init__(self, machine: Any, initializer: Value = None, initargs: Value = ()) -> None:
        self.machine = machine
        if initializer is not None:
            machine.call(initializer, tuple(machine.items(initargs)), {}, machine.line)

    def entered(self) -> Pool:
        return self

    def left(self, error: Value) -> bool:
        return False

    def imap(self, func: Value, source: Value, *_: Value, **__: Value) -> Value:
        return (self.machine.call(func, (each,), {}, self.machine.line) for each in self.machine.items(source))

    imap_unordered = imap

    def map(self, func: Value, source: Value, *_: Value, **__: Value) -> Value:
        return list(self.imap(func, source))

    def starmap(self, func: Value, source: Value, *_: Value, **__: Value) -> Value:
        return [self.machine.call(func, tuple(each), {}, self.machine.line) for each in self.machine.items(source)]

    def close(self) -> None:
        return None

    join = terminate = close


def _pool(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    given = dict(zip(("processes", "initializer", "initargs"), args, strict=False)) | kwargs
    return Pool(machine, given.get("initializer"), given.get("initargs", ()))


def _options(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    return Options(machine, machine.words, kwargs.get("parents", ()))


def _packed_open(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """gzip.open: bytes where nobody asks for text."""
    mode = args[1] if len(args) > 1 else kwargs.get("mode", "rb")
    kind = mode if not isinstance(mode, str) or mode[-1:] in ("b", "t") else mode + "b"
    return BUILTIN["open"](machine, args[:1], {"mode": kind}, line)


def _through(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    return args[0] if args else UNKNOWN


def _cutter(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    return machine.cutter


def _loaded(machine: Any, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    machine.disk.asked |= {each for each in (*args, *kwargs.values()) if isinstance(each, str)}
    return machine.disk.rows()


FUNCTIONS: dict[str, Any] = {
    "len": _len,
    "io.open": BUILTIN["open"],
    **dict.fromkeys(["gzip.open", "bz2.open", "lzma.open"], _packed_open),
    "os.path.exists": lambda machine, args, kwargs, line: machine.disk.exists(text_of(args[0]) or ""),
    "os.path.isfile": lambda machine, args, kwargs, line: machine.disk.exists(text_of(args[0]) or ""),
    "re.compile": lambda machine, args, kwargs, line: Pattern(machine, *args, **kwargs),
    **{f"re.{name}": _by_pattern(name) for name in ("sub", "subn", "match", "search", "fullmatch", "findall", "split")},
    "re.finditer": _by_pattern("finditer"),
    "unicodedata.normalize": _normal,
    **{f"unicodedata.{name}": _of_sign(name) for name in ("category", "combining", "name", "is_normalized")},
    "json.loads": _loads,
    "json.dumps": _dumps,
    "json.dump": _dump,
    "numpy.save": _save,
    "array.array": lambda machine, args, kwargs, line: Numbers(machine, *args),
    "bytearray": held(bytearray),
    "bytes": held(bytes),
    "str.maketrans": lambda machine, args, kwargs, line: str.maketrans(*args),
    **dict.fromkeys(["multiprocessing.Pool", "multiprocessing.pool.Pool"], _pool),
    "concurrent.futures.ProcessPoolExecutor": lambda machine, args, kwargs, line: Executor(machine),
    "argparse.ArgumentParser": _options,
    **dict.fromkeys(["tqdm.tqdm", "tqdm.auto.tqdm", "rich.progress.track", "tqdm"], _through),
    "sentencepiece.SentencePieceProcessor": _cutter,
    "datasets.load_dataset": _loaded,
}


__all__ = ["FUNCTIONS"]
