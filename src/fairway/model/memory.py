"""Keys and values of one layer so far: of all positions, or of the last `window` in room allocated once.

The room holds twice the window. When it is full, the last window − 1 positions move to its front, which costs less than
one position's copy a step; what attention reads is a view of the room, never a copy.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValue(NamedTuple):
    """Of every position so far. Never written in place, so that gradients flow and an earlier one stays valid."""

    k: Tensor  # (B, G, T, h)
    v: Tensor

    @property
    def window(self) -> int:
        """0: a position sees all before it."""
        return 0

    def extend(self, k: Tensor, v: Tensor) -> "KeyValue":
        """k, v: (B, G, S, h) of the next positions."""
        return KeyValue(torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2))

    def narrow(self, rows: int) -> "KeyValue":
        """Of the first `rows` sequences."""
        return KeyValue(self.k[:rows], self.v[:rows])


class Rolling:
    """Of the positions that the newest ones see, for decoding without gradients.

    room: (2, B, G, C, h), keys and values, C = 2·window or all positions of a shorter sequence; k, v: views of at most
    window − 1 + S positions that end with the S newest. A memory is consumed by `extend` and `narrow`: the one they
    return shares its room, and extending the old one again raises ValueError.
    """

    def __init__(self, room: Tensor, window: int, start: int = 0, end: int = 0) -> None:
        self.room, self.window, self.end, self.consumed = room, window, end, False
        self.k, self.v = room[:, :, :, start:end]

    def extend(self, k: Tensor, v: Tensor) -> "Rolling":
        """k, v: (B, G, S, h) of the next positions, S ≤ window.

        ValueError for more of them, or for more than the room was asked for.
        """
        new = k.shape[2]
        if new > self.window:
            raise ValueError(f"{new} positions at once: a rolling past of window {self.window} takes at most as many")
        room = self._consume()
        kept = min(self.end, self.window - 1)
        begin = self.end if self.end + new <= room.shape[3] else self._to_front(kept)
        room[0, :, :, begin : begin + new] = k
        room[1, :, :, begin : begin + new] = v
        return Rolling(room, self.window, begin - kept, begin + new)

    def narrow(self, rows: int) -> "Rolling":
        """Of the first `rows` sequences; the others have ended."""
        return Rolling(self._consume()[:, :rows], self.window, self.end - self.k.shape[2], self.end)

    def _consume(self) -> Tensor:
        if self.consumed:
            raise ValueError("a rolling past is written in place and serves once; go on with the one that was returned")
        self.consumed = True
        return self.room

    def _to_front(self, kept: int) -> int:
        """Moves the last `kept` positions to the room's front -> where the next one goes."""
        size = self.room.shape[3]
        if size < 2 * self.window:
            raise ValueError(f"the sequence is longer than the {size} positions that room was asked for")
        # Blocks may fill the room only to window + 1: then the two places overlap, hence the copy.
        self.room[:, :, :, :kept] = self.room[:, :, :, self.end - kept : self.end].clone()
        return kept


Memory = KeyValue | Rolling
