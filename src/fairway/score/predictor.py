"""Who predicts: the protocol, the tape that it reads from, and the predictor of a network over windows.

`predict(unit)` yields (positions, logits) in blocks of bounded size; the harness normalises and pays them all; only
then `perceive(unit)` may learn. There is no other door. (`perceive_token` is reserved for techniques that learn token
by token; the harness refuses a predictor that has it, until it is driven by scorer and decoder alike.)
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.base.errors import HonestyError
from fairway.score.stream import Index, Unit, Windows

Block = tuple[Index, Tensor]
"""Positions (n,) int64 and their logits (n, vocab)."""

# Elements of one block of logits: 134 MB once they are float64.
_BLOCK_ELEMENTS = 1 << 24


class Predictor(Protocol):
    """What the harness drives. Both calls are made once for each unit of the stream, in order, on every rank."""

    def predict(self, unit: Unit) -> Iterator[Block]:
        """Logits over the whole vocabulary for each position of `unit.windows` (this rank's share of them)."""
        ...

    def perceive(self, unit: Unit) -> None:
        """Everything of the unit is paid: now it may be learned from."""
        ...


class Network(Protocol):
    """The one forward, as scoring sees it (fairway.model.GPT)."""

    @property
    def vocab(self) -> int: ...

    def __call__(self, tokens: Tensor, past: Any = None) -> tuple[Tensor, Any]: ...

    def logits(self, hidden: Tensor, last: int | None = None) -> Tensor: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


class Tape:
    """The text, readable up to where the harness has opened it.

    tokens: (N+1,) integers, BOS first. Inputs of a unit are open while it is predicted; its last target, and all that
    comes after, only when it is paid.
    """

    def __init__(self, tokens: npt.NDArray[Any], device: torch.device | str = "cpu") -> None:
        self._tokens = tokens
        self._open = 0
        self.device = torch.device(device)

    @property
    def open(self) -> int:
        """How many tokens may be read."""
        return self._open

    def open_to(self, tokens: int) -> None:
        """The harness alone calls this; a tape is never rolled back."""
        self._open = max(self._open, tokens)

    def read(self, start: Index, length: int) -> Tensor:
        """The tokens start[i] .. start[i]+length-1 of each row: (n, length) int64."""
        if length and len(start) and int(start.max()) + length > self._open:
            last = int(start.max()) + length - 1
            raise HonestyError(f"tape: token {last} read before it was paid; {self._open} are open")
        rows = self._tokens[start[:, None] + np.arange(length)[None, :]]
        return torch.from_numpy(rows.astype(np.int64)).to(self.device)

    def inputs(self, windows: Windows) -> Tensor:
        """What windows of equal length read: (n, length) int64."""
        return self.read(windows.start, int(windows.stop[0] - windows.start[0]))

    def targets(self, windows: Windows) -> Tensor:
        """What windows of equal length predict, once it is paid: (n, length) int64."""
        return self.read(windows.start + 1, int(windows.stop[0] - windows.start[0]))


class Adapter(Protocol):
    """What a technique of score/adapt offers."""

    def learn(self, unit: Unit, tape: Tape) -> None: ...


class WindowPredictor:
    """A network read over windows, equal ones together, up to `block_tokens` tokens in a forward."""

    def __init__(self, model: Network, tape: Tape, adapter: Adapter, block_tokens: int = 32768) -> None:
        self.model, self.tape, self.adapter, self.block_tokens = model, tape, adapter, block_tokens

    @torch.no_grad()
    def predict(self, unit: Unit) -> Iterator[Block]:
        for run in unit.windows.runs():
            length, scored = int(run.stop[0] - run.start[0]), int(run.stop[0] - run.first[0])
            rows = max(1, self.block_tokens // length)
            for begin in range(0, len(run), rows):
                windows = run[begin : begin + rows]
                hidden, _ = self.model(self.tape.inputs(windows))
                yield from _blocks(self.model, windows, hidden[:, length - scored :], scored)

    def perceive(self, unit: Unit) -> None:
        self.adapter.learn(unit, self.tape)


def _blocks(model: Network, windows: Windows, hidden: Tensor, scored: int) -> Iterator[Block]:
    """hidden: (n, scored, d) -> blocks of logits, several where one would be too large."""
    rows = max(1, _BLOCK_ELEMENTS // (scored * model.vocab))
    for begin in range(0, len(windows), rows):
        part = windows[begin : begin + rows]
        logits = model.logits(hidden[begin : begin + rows], last=scored)
        yield part.positions, logits.flatten(0, 1)
