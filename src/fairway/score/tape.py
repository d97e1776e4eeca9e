"""The tape: the text, readable only as far as it is known.

A scorer's tape holds the whole text and is opened as it is paid; a decoder's is blank, and is written as it is decoded.
A predictor cannot tell them apart.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.base.errors import HonestyError
from fairway.score.stream import Index, Windows, edges_of


class Tape:
    """Inputs and targets of a text in lanes.

    tokens: (N+1,) integers, BOS first; edges: (lanes + 1,) where lanes begin (None: one lane). Target i is tokens[i+1];
    input i is tokens[i], but BOS where a lane begins. Of each lane the targets before `known` may be read, and the
    inputs up to it: input i tells no more than target i-1.
    """

    def __init__(
        self, tokens: npt.NDArray[Any], device: torch.device | str = "cpu", edges: Index | None = None
    ) -> None:
        self.edges = edges_of(len(tokens) - 1, 1) if edges is None else edges
        self.known = self.edges[:-1].copy()
        self.device = torch.device(device)
        self._bos, self._targets = int(tokens[0]), tokens[1:]

    def open_to(self, stop: Index) -> None:
        """The harness alone calls this: the targets before stop[lane] are paid. A tape is never rolled back."""
        self.known = np.maximum(self.known, stop)

    def read(self, start: Index, length: int) -> Tensor:
        """The tokens start[i] .. start[i]+length-1 of the text in each row, whatever the lanes: (n, length) int64."""
        places = start[:, None] + np.arange(length)[None, :] - 1  # token t is target t-1; token 0 is BOS
        lane = np.searchsorted(self.edges[1:-1], places, side="right")
        unknown = places >= self.known[lane]
        if unknown.any():
            raise HonestyError(f"tape: token {int(places[unknown].min()) + 1} was read before it was paid")
        rows = np.where(places < 0, self._bos, self._targets[np.maximum(places, 0)].astype(np.int64))
        return torch.from_numpy(rows).to(self.device)

    def inputs(self, windows: Windows, begin: int = 0, end: int | None = None) -> Tensor:
        """What windows of equal length read, or columns begin..end-1 of that: (n, length) int64."""
        columns = np.arange(int(windows.stop[0] - windows.start[0]))[begin:end]
        places = windows.start[:, None] + columns[None, :]
        lane = self._lane(windows)
        self._check(places, lane, 1, "input")
        first = places == self.edges[lane][:, None]
        rows = np.where(first, self._bos, self._targets[np.maximum(places - 1, 0)].astype(np.int64))
        return torch.from_numpy(rows).to(self.device)

    def targets(self, windows: Windows, begin: int = 0, end: int | None = None) -> Tensor:
        """What windows of equal length predict, once it is known, or columns begin..end-1 of that: (n, length)."""
        columns = np.arange(int(windows.stop[0] - windows.start[0]))[begin:end]
        places = windows.start[:, None] + columns[None, :]
        self._check(places, self._lane(windows), 0, "target")
        return torch.from_numpy(self._targets[places].astype(np.int64)).to(self.device)

    def _lane(self, windows: Windows) -> Index:
        return np.searchsorted(self.edges, windows.start, side="right") - 1

    def _check(self, places: Index, lane: Index, ahead: int, what: str) -> None:
        if places.size:
            far = places[:, -1] - self.known[lane] - ahead
            if (far >= 0).any():
                row = int(far.argmax())
                raise HonestyError(
                    f"tape: {what} {places[row, -1]} was read before it was paid; "
                    f"{self.known[lane[row]] - self.edges[lane[row]]} targets of its lane are known"
                )


class BlankTape(Tape):
    """A decoder's tape: nothing is known of it until it is written."""

    def __init__(self, bos: int, edges: Index) -> None:
        tokens = np.zeros(int(edges[-1]) + 1, np.uint16)
        tokens[0] = bos
        super().__init__(tokens, "cpu", edges)

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All targets, once they are known. HonestyError before."""
        if (self.known < self.edges[1:]).any():
            raise HonestyError(f"tape: {int((self.edges[1:] - self.known).sum())} targets are not known yet")
        return self._targets

    @property
    def so_far(self) -> npt.NDArray[Any]:
        """(N,) targets, 0 where they are not known yet."""
        return self._targets

    def write(self, windows: Windows, step: int, symbols: npt.NDArray[np.int64]) -> None:
        """The decoder alone calls this: target `step` of each window's scored ones, which is the next of its lane."""
        places = windows.first + step
        if (self.known[windows.lane] != places).any():
            raise HonestyError("tape: written out of order")
        self._targets[places] = symbols
        self.known[windows.lane] = places + 1

    def given(self, spans: Sequence[tuple[int, int]], targets: npt.NDArray[Any]) -> None:
        """Targets [low, high) of one or several lanes that are known from elsewhere: what a chunk's windows look back
        on. What is before low stays blank, and is not read by them."""
        begin = 0
        for low, high in spans:
            self._targets[low:high] = targets[begin : begin + high - low]
            begin += high - low
            lane = int(np.searchsorted(self.edges, low, side="right")) - 1
            self.known[lane] = high
