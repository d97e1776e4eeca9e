"""Messages between the two processes: one line of JSON, then raw bytes of the length that it names. Nothing is pickled,
so that what the sealed process sends can only be numbers and words."""

import json
import os
import select
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

_HEAD = 1 << 20
_BODY = 1 << 30


@dataclass(frozen=True)
class Message:
    """kind, plain values, and rows of float64 or int64 where it has any."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    rows: npt.NDArray[Any] | None = None


class Broken(Exception):
    """The other side closed, or sent what is no message."""


class Pipe:
    """One end: `incoming` and `outgoing` are file descriptors."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming, self.outgoing, self.rest = incoming, outgoing, b""

    def send(self, message: Message) -> None:
        body = b"" if message.rows is None else np.ascontiguousarray(message.rows).tobytes()
        kind = "" if message.rows is None else message.rows.dtype.str
        head = {"kind": message.kind, "facts": message.facts, "bytes": len(body), "type": kind}
        whole = memoryview(json.dumps(head).encode() + b"\n" + body)
        while whole:
            whole = whole[os.write(self.outgoing, whole[: 1 << 20]) :]

    def receive(self, until: float | None = None) -> Message:
        """The next message. TimeoutError at the time `until` (monotonic); Broken where none can come."""
        head, _, self.rest = self._fill(b"\n", _HEAD, until).partition(b"\n")
        try:
            said = json.loads(head)
            size, kind, facts = int(said["bytes"]), str(said["type"]), dict(said["facts"])
            name = str(said["kind"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Broken("no message") from error
        if not 0 <= size <= _BODY or kind not in ("", "<f8", "<i8"):
            raise Broken("no message")
        self._fill(size, _BODY, until)
        body, self.rest = self.rest[:size], self.rest[size:]
        return Message(name, facts, np.frombuffer(body, kind) if kind and size % 8 == 0 else None)

    def _fill(self, what: bytes | int, most: int, until: float | None) -> bytes:
        """Reads until the buffer holds a sign, or so many bytes."""
        parts, size = [self.rest], len(self.rest)
        while (what not in parts[-1]) if isinstance(what, bytes) else size < what:
            if until is not None and not select.select([self.incoming], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError
            more = os.read(self.incoming, 1 << 20)
            if not more or size > most + (1 << 20):
                raise Broken("closed")
            parts.append(more)
            size += len(more)
        self.rest = b"".join(parts)
        return self.rest
