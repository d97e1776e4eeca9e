"""What changes logits before they are normalised, driven: hints first, each before its own token is told.

A technique of score/reshape is a map of the logits of a position. One that learns has an object for every lane, which
is told the lane's tokens one by one (`perceive_token`) and says before each of them what it expects (`hint`): it is
never handed a token that it has not answered for. Scorer, encoder and decoder run the same lines. They are told what
the network itself reads at a position, through the same tape: the input of target i is target i-1, and the lane begins
with BOS. In a block of many positions so nothing is known at one that the network's own windows do not see there.

A lane's objects know their lane alone, so that hints are the same on any number of ranks (each goes over all tokens,
and asks at its own positions), in a slice, and in a chunk that is proven by itself.
"""

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fairway.base.errors import HonestyError, RecipeError
from fairway.base.slots import module_of
from fairway.score.predictor import Block, Step, WindowPredictor
from fairway.score.stream import Index, Unit, Windows

MOST = 8  # techniques of one score: a compressed file could name any number


class Hint(NamedTuple):
    """A token that is expected, and what is added to its logit."""

    token: int
    addend: float


NOTHING = Hint(0, 0.0)


class Lane(Protocol):
    """What a technique that learns keeps of one lane."""

    def hint(self) -> Hint:
        """What the tokens so far say of the next one. Changes nothing."""
        ...

    def perceive_token(self, token: int) -> None:
        """The lane's next token (first BOS): every answer before it is given."""
        ...


class Hints(NamedTuple):
    """The hints of n positions: tokens (n,) int64 and addends (n,), of the logits' type and device."""

    tokens: Tensor
    addends: Tensor


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) changes logits before they are normalised."""
    return bool(recipe["score"]["reshape"])


def learns(specs: tuple[Any, ...]) -> bool:
    """Whether one of these techniques is told the tokens: what it says then depends on all that its lane has shown."""
    return any(module_of(spec).LEARNS for spec in specs)


def check(specs: tuple[Any, ...], result: str = "") -> None:
    """RecipeError for more techniques than a file may ask for, and for a result that none of them touches."""
    if len(specs) > MOST:
        raise RecipeError(f"score.reshape: {len(specs)} techniques; at most {MOST} can be decoded")
    if specs and result == "quantized":
        raise RecipeError(
            'score.reshape: score.result = "quantized" is read in plain windows, unreshaped; take sliding or adapted'
        )


class Reshaped(WindowPredictor):
    """The same predictor, its logits changed by techniques of score/reshape, in order.

    RecipeError for more techniques than a file may ask for.
    """

    def __init__(self, inner: WindowPredictor, specs: tuple[Any, ...]) -> None:
        super().__init__(inner.model, inner.tape, inner.adapter, inner.block_tokens, inner.carried, inner.exact)
        check(specs)
        self.techniques: list[tuple[ModuleType, Any, list[Lane]]] = []
        for spec in specs:
            module = module_of(spec)
            lanes = [module.Lane(spec) for _ in self.tape.edges[1:]] if module.LEARNS else []
            self.techniques.append((module, spec, lanes))
        self.told = self.tape.edges[:-1].copy()  # of each lane: the inputs before this one are told

    @torch.no_grad()
    def predict(self, unit: Unit) -> Iterator[Block]:
        for positions, logits in super().predict(unit):
            yield positions, self._reshaped(positions, logits)

    @torch.no_grad()
    def steps(self, unit: Unit) -> Iterator[Step]:
        for windows, step, logits in super().steps(unit):
            yield windows, step, self._reshaped(windows.first + step, logits)

    def _reshaped(self, positions: Index, logits: Tensor) -> Tensor:
        """logits: (n, vocab) of some positions, those of each lane in ascending order."""
        learners = [lanes for _, _, lanes in self.techniques if lanes]
        found = iter(self._hints(positions, learners, logits))
        for module, spec, lanes in self.techniques:
            logits = module.reshape(logits, next(found), spec) if lanes else module.reshape(logits, spec)
        return logits

    def _hints(self, positions: Index, learners: list[list[Lane]], logits: Tensor) -> list[Hints]:
        """What each technique that learns says at each position."""
        tokens = np.zeros((len(learners), len(positions)), np.int64)
        addends = np.zeros((len(learners), len(positions)))
        if not learners:
            return []
        lane_of = np.searchsorted(self.tape.edges[1:-1], positions, side="right")
        for lane in np.unique(lane_of).tolist():
            rows = np.flatnonzero(lane_of == lane)
            asked = dict(zip(positions[rows].tolist(), rows.tolist(), strict=True))
            for place, token in self._news(lane, int(positions[rows[0]]), int(positions[rows[-1]]) + 1):
                for i, lanes in enumerate(learners):
                    lanes[lane].perceive_token(token)
                    if place in asked:
                        tokens[i, asked[place]], addends[i, asked[place]] = lanes[lane].hint()
        return [
            Hints(torch.from_numpy(token).to(logits.device), torch.from_numpy(addend).to(logits))
            for token, addend in zip(tokens, addends, strict=True)
        ]

    def _news(self, lane: int, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The places told[lane]..stop-1 of a lane, each with the token that is its input; the tape refuses those that
        are not known yet. HonestyError where `first` was told already: a hint there would know its own token."""
        begin = int(self.told[lane])
        if first < begin:
            raise HonestyError(f"reshape: position {first} was asked for after its token was told; the order is fixed")
        self.told[lane] = stop
        span = Windows(np.array([begin]), np.array([stop]), np.array([begin]))
        yield from zip(range(begin, stop), self.tape.inputs(span)[0].tolist(), strict=True)
