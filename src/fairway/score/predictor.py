"""Who predicts: the protocol, and the predictor of a network over windows.

`predict(unit)` yields (positions, logits) in blocks of bounded size; the harness normalises and pays them all; only
then `perceive(unit)` may learn. There is no other door. `steps(unit)` gives the same distributions one step at a time,
for a decoder, which writes each step's tokens on the tape before it asks for the next. (What learns token by token is a
technique of score/reshape: scorer, encoder and decoder drive its `perceive_token`, and the harness refuses a predictor
that has one of its own.)
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fairway.base.devices import threads
from fairway.base.slots import optional
from fairway.score.stream import Index, Stream, Unit, Windows
from fairway.score.tape import Tape

Block = tuple[Index, Tensor]
"""Positions (n,) int64 and their logits (n, vocab)."""

Step = tuple[Windows, int, Tensor]
"""Windows of one round, which of their scored positions it is, and the logits of that position: (n, vocab)."""

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

    def begin(self, rows: int, window: int, length: int) -> Any: ...

    def logits(self, hidden: Tensor, last: int | None = None) -> Tensor: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


class Adapter:
    """What a technique of score/adapt offers; one that does not need a part of it leaves it as it is here."""

    def correct(self, hidden: Tensor, targets: Tensor) -> Tensor | None:
        """hidden: (n, C, d) of the context of n windows; targets: (n, C), what that context predicted, all paid
        -> (n, 1, d) to be added to the hidden vectors of the scored positions; None: nothing."""
        return None

    def learn(self, unit: Unit, tape: Tape) -> None:
        """The unit is paid: its update may be learned from."""

    def state(self) -> dict[str, Tensor]:
        """All that learning has changed: weights and the optimiser's moments, by name; empty where nothing learns."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave."""


class WindowPredictor:
    """A network read over windows, equal ones together, up to `block_tokens` tokens in a forward.

    carried: the stream, where its windows see what those before them left: the past of every lane is kept; exact: what
    is learned is learned in one thread, so that a decoder learns the same (DESIGN: tiny differences grow).
    """

    def __init__(
        self,
        model: Network,
        tape: Tape,
        adapter: Adapter,
        block_tokens: int = 32768,
        carried: Stream | None = None,
        exact: bool = False,
    ) -> None:
        self.model, self.tape, self.adapter, self.block_tokens = model, tape, adapter, block_tokens
        self.carried, self.exact = carried, exact
        self.past: Any = None  # of the lanes, where windows are carried

    @torch.no_grad()
    def predict(self, unit: Unit) -> Iterator[Block]:
        if self.carried is not None:
            yield from optional("fairway.score.carried").carry(self, unit)
            return
        for run in unit.windows.runs():
            length, scored = int(run.stop[0] - run.start[0]), int(run.stop[0] - run.first[0])
            rows = max(1, self.block_tokens // length)
            for begin in range(0, len(run), rows):
                windows = run[begin : begin + rows]
                hidden, _ = self.model(self.tape.inputs(windows))
                hidden = self._corrected(hidden, windows, length - scored)
                yield from blocks_of(self.model, windows.first, hidden[:, length - scored :])

    @torch.no_grad()
    def steps(self, unit: Unit) -> Iterator[Step]:
        """The same distributions, in the order in which they are coded; each step's tokens must be on the tape before
        the next is asked for."""
        for windows in unit.windows.rounds():
            context, scored = int(windows.first[0] - windows.start[0]), int(windows.stop[0] - windows.first[0])
            length, delta = context + scored, None
            if self.carried is None:
                past = self.model.begin(len(windows), length, length)
            else:
                past = optional("fairway.score.carried").past_of(self, windows)
            if context:
                hidden, past = self.model(self.tape.inputs(windows, 0, context), past)
                delta = self._correction(hidden, self.tape.targets(windows, 0, context))
            for step in range(scored):
                hidden, past = self.model(self.tape.inputs(windows, context + step, context + step + 1), past)
                if delta is not None:
                    hidden = hidden + delta
                yield windows, step, self.model.logits(hidden)[:, 0]
            self.past = past if self.carried is not None else None

    def perceive(self, unit: Unit) -> None:
        with threads(1 if self.exact else 0):
            self.adapter.learn(unit, self.tape)

    def _corrected(self, hidden: Tensor, windows: Windows, context: int) -> Tensor:
        """hidden: (n, T, d). In exact mode corrections are computed round by round, in the shapes of a decoder."""
        if type(self.adapter).correct is Adapter.correct or not context:
            return hidden
        targets, deltas, begin = self.tape.targets(windows, 0, context), [], 0
        for part in windows.rounds() if self.exact else [windows]:
            rows = slice(begin, begin := begin + len(part))
            deltas.append(self._correction(hidden[rows, :context], targets[rows]))
        return hidden + torch.cat([delta for delta in deltas if delta is not None])

    def _correction(self, hidden: Tensor, targets: Tensor) -> Tensor | None:
        with threads(1 if self.exact else 0):
            return self.adapter.correct(hidden.contiguous(), targets)


def blocks_of(model: Network, first: Index, hidden: Tensor) -> Iterator[Block]:
    """hidden: (n, scored, d) at positions first, first + 1, ... -> blocks of logits, several where one is too large."""
    scored = hidden.shape[1]
    rows = max(1, _BLOCK_ELEMENTS // (scored * model.vocab))
    for begin in range(0, len(first), rows):
        positions = first[begin : begin + rows, None] + torch.arange(scored).numpy()[None, :]
        yield positions.reshape(-1), model.logits(hidden[begin : begin + rows]).flatten(0, 1)
