"""Interleaved rANS (Duda 2013, arXiv 1311.2540): many coders in lockstep share one stream of 16-bit words.

Each lane has a state x in [2^16, 2^32). Coding a symbol that has `freq` of the 2^bits slots from `start`:

    encode  x ← (x // freq) · 2^bits + x mod freq + start      after giving off a word if x ≥ freq · 2^(32 − bits)
    decode  slot = x mod 2^bits;  x ← freq · (x >> bits) + slot − start      then takes a word if x < 2^16

The encoder runs backwards, so that the decoder reads forwards: at every step the lanes that need a word take the next
ones in the order of the lanes. The stream is the lanes' last states (4 bytes each) and the words, all little-endian. A
whole stream ends with every state at 2^16, where the encoder began, and no word left over.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

LOW = 1 << 16


def encode(
    starts: NDArray[np.unsignedinteger[Any]],
    freqs: NDArray[np.unsignedinteger[Any]],
    widths: list[int],
    lanes: int,
    bits: int,
) -> bytes:
    """starts, freqs: (symbols,), step after step, in a step lane after lane; widths: how many lanes each step has, the
    first ones; bits: 1 … 16."""
    states = np.full(lanes, LOW, dtype=np.uint64)
    words: list[NDArray[np.uint16]] = []
    end = len(starts)
    wide, start64 = freqs.astype(np.uint64), starts.astype(np.uint64)
    limits = wide << np.uint64(32 - bits)
    shift = np.uint64(bits)
    for width in reversed(widths):
        begin = end - width
        x, freq = states[:width], wide[begin:end]
        full = np.flatnonzero(x >= limits[begin:end])
        if full.size:
            over = x[full]
            words.append(over.astype(np.uint16))
            x[full] = over >> np.uint64(16)
        quotient = x // freq
        states[:width] = (quotient << shift) + (x - quotient * freq) + start64[begin:end]
        end = begin
    words.append(np.zeros(0, dtype=np.uint16))
    stream = np.concatenate(words[::-1]).astype("<u2").tobytes()
    return states.astype("<u4").tobytes() + stream


class Decoder:
    """Takes symbols out of a stream, a step at a time. ValueError where it is not `encode`'s."""

    def __init__(self, blob: bytes, lanes: int, bits: int) -> None:
        if len(blob) < 4 * lanes or len(blob) % 2:
            raise ValueError(f"{len(blob):,} bytes cannot hold the states of {lanes:,} lanes and words of two bytes")
        self.states = np.frombuffer(blob, dtype="<u4", count=lanes).astype(np.uint32)
        if bool((self.states < LOW).any()):
            raise ValueError("a lane's state is too small")
        self.words = np.frombuffer(blob, dtype="<u2", offset=4 * lanes).astype(np.uint32)
        self.place, self.bits = 0, np.uint32(bits)
        self.mask = np.uint32((1 << bits) - 1)

    def slots(self, width: int) -> NDArray[np.uint32]:
        """(width,) the slots that the first lanes' next symbols lie in."""
        return self.states[:width] & self.mask

    def advance(self, slots: NDArray[np.uint32], starts: NDArray[np.uint32], freqs: NDArray[np.uint32]) -> None:
        """Takes out the symbols whose ranges these are. slots: what `slots` gave."""
        x = self.states[: len(slots)]
        x >>= self.bits
        x *= freqs
        x += slots
        x -= starts
        empty = np.flatnonzero(x < LOW)
        if empty.size:
            end = self.place + empty.size
            if end > self.words.size:
                raise ValueError("the stream ends early")
            x[empty] = x[empty] << np.uint32(16) | self.words[self.place : end]
            self.place = end

    def finish(self) -> None:
        """ValueError unless the stream ends here."""
        if self.place != self.words.size:
            raise ValueError(f"{2 * (self.words.size - self.place):,} bytes are left over")
        if bool((self.states != LOW).any()):
            raise ValueError("the stream does not end where it began; a symbol or a table was altered")
