"""Fits integers to a byte budget: of all grids whose file fits, the one with the least expected damage.

Tensors are weighed against each other by Lagrange: for a price λ each takes the step and the dead zone that minimise
damage + λ · bytes, and λ is bisected until the bytes are those wanted (Shoham and Gersho 1988); a last common factor on
all steps hits them exactly. Bytes are foretold by the entropy law, corrected by what solved codes come to, and at most
twice by writing the file: the first shows what the coder and all other sections take, the second lands.

Knows neither weights nor Hessians: `solve` and `write` are handed over.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fairway.base.errors import BudgetError

Floats = NDArray[np.float64]
End = Literal["", "finest", "coarsest"]

SLACK = 0.006  # a file may end so far below its budget, as a share of it
AIM = 0.0025  # below the budget: coders put the second file from 0.3 % below this to 0.2 % above it
USUAL, CAUTION, LOWEST_AIM = 0.03, 0.04, 0.0045  # the second is aimed lower by a share of the first's miss beyond usual
NEAR = 0.001  # of the budget: solved codes so close to what is wanted are written
NEAREST = 0.0002  # the same before the second writing
SURPRISE = 0.15  # of the damage foretold: with more, tensors are weighed against each other again
SOLVES = 4  # at most, before a writing
STRETCH = 8.0  # the largest common factor on steps
LEAST, MOST = 1e-15, 1e3  # nats per token for a byte: every tensor takes its best, its smallest choice
BETWEEN = 8  # steps laid between two of a curve's


@dataclass(frozen=True, eq=False)
class Curve:
    """One tensor's choices. steps: (S,) ascending; dead_zones: (Z,); bytes, damage: (S, Z), of the whole tensor."""

    steps: Floats
    dead_zones: tuple[float, ...]
    bytes: Floats
    damage: Floats

    def __post_init__(self) -> None:
        shape = (len(self.steps), len(self.dead_zones))
        if self.bytes.shape != shape or self.damage.shape != shape or np.any(np.diff(self.steps) <= 0):
            raise ValueError(f"curve: {self.bytes.shape} and {self.damage.shape} for {shape} ascending choices")

    def finer(self) -> "Curve":
        """The same with BETWEEN steps for each: bytes linear, damage geometric over the logarithm of the step."""
        known = np.log(self.steps)
        wanted = np.interp(np.arange(0, len(known) - 1 + 1e-9, 1 / BETWEEN), np.arange(len(known)), known)
        sizes = [np.interp(wanted, known, column) for column in self.bytes.T]
        harm = [np.exp(np.interp(wanted, known, np.log(np.maximum(column, 1e-300)))) for column in self.damage.T]
        return Curve(np.exp(wanted), self.dead_zones, np.stack(sizes, axis=1), np.stack(harm, axis=1))


class Choice(NamedTuple):
    """One tensor's grid, and what is expected of it."""

    step: float
    dead_zone: float
    bytes: float
    damage: float


Choices = dict[str, Choice]


class Solved(Protocol):
    """What `solve` made of a tensor: its codes' entropy in bytes, and the damage that was measured."""

    @property
    def entropy_bytes(self) -> float: ...
    @property
    def damage(self) -> float: ...


S = TypeVar("S", bound=Solved)


class Written(NamedTuple):
    """A file. bytes: all of it; codes: of the coded section of each tensor's group; group: of each tensor, by name."""

    bytes: int
    codes: Mapping[str, int]
    group: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Fitted(Generic[S]):
    """The result. file: which of the writings it is, from 1; foretold: its bytes before it was written; damage: as
    solved, nats per token; price: λ, nats per token for a byte; rest: bytes of the file without its codes; largest:
    bytes of the largest useful file, foretold; full: the file is that one; coarsest: it is the smallest."""

    budget: int
    choices: Choices
    solved: dict[str, S]
    bytes: int
    file: int
    foretold: float
    damage: float
    price: float
    rest: float
    largest: float
    full: bool
    coarsest: bool
    solves: int
    writings: int

    @property
    def landed(self) -> bool:
        """Within SLACK below the budget, or as large as is useful."""
        return self.bytes <= self.budget and (self.full or self.bytes > (1 - SLACK) * self.budget)


@dataclass(frozen=True)
class _Law:
    """From what is foretold to what comes of it. rest: bytes of the file without its codes; coder: bytes written for
    one of a tensor's entropy; codes: bytes of a solved tensor's entropy for one foretold; harm: its damage for one
    foretold (far below 1 where repair takes most of it back)."""

    rest: float
    coder: dict[str, float]
    codes: dict[str, float]
    harm: dict[str, float]

    def tell(self, curves: Mapping[str, Curve]) -> dict[str, Curve]:
        return {
            name: replace(
                curve,
                bytes=curve.bytes * self.coder[name] * self.codes[name],
                damage=curve.damage * self.harm[name],
            )
            for name, curve in curves.items()
        }

    def after(self, choices: Choices, solved: Mapping[str, Solved]) -> "_Law":
        """With what a solve came to."""
        codes = {
            name: self.codes[name] * self.coder[name] * one.entropy_bytes / max(choices[name].bytes, 1.0)
            for name, one in solved.items()
        }
        harm = {
            name: self.harm[name] * one.damage / choices[name].damage if one.damage and choices[name].damage else 1.0
            for name, one in solved.items()
        }
        return replace(self, codes=codes, harm=harm)

    def foretell(self, solved: Mapping[str, Solved]) -> float:
        return self.rest + sum(self.coder[name] * one.entropy_bytes for name, one in solved.items())


def allocate(curves: Mapping[str, Curve], wanted: float) -> tuple[Choices, float]:
    """The choices of least damage whose bytes come to `wanted`, and λ. Past an end of the curves: that end."""
    low, high = LEAST, MOST
    while high / low > 1.0001:
        price = math.sqrt(low * high)
        low, high = (price, high) if _bytes(_cheapest(curves, price)) > wanted else (low, price)
    return _exactly(curves, _cheapest(curves, high), wanted), high


def least(curves: Mapping[str, Curve]) -> float:
    """Bytes of the smallest choices."""
    return sum(float(curve.bytes.min()) for curve in curves.values())


def largest(curves: Mapping[str, Curve]) -> float:
    """Bytes of the finest grids: there is nothing to gain beyond."""
    return sum(float(curve.bytes.max()) for curve in curves.values())


def fit(
    budget: int,
    curves: Mapping[str, Curve],
    rest: float,
    solve: Callable[[Choices, float], dict[str, S]],
    write: Callable[[dict[str, S]], Written],
    say: Callable[[str], None] = lambda _: None,
    beside: int = 0,
) -> Fitted[S]:
    """Solves, and writes at most twice, until the file lies within SLACK below the budget.

    curves: bytes by the entropy law; rest: bytes of everything but codes, as guessed before the first writing; solve:
    choices and λ -> what they come to; say: told of every solve and writing; beside: bytes of code that come on top of
    the file in what messages say.
    BudgetError where no choice is small enough, with the size of the smallest file as it was written, or where both
    files are too large.
    """
    search = _Search(budget, {name: curve.finer() for name, curve in curves.items()}, rest, solve, write, say)
    first = last = search.step(None)
    if not (first.landed or (first.coarsest and first.bytes > budget)):
        last = search.step(None if first.coarsest else first.choices)
    if last.bytes <= budget:
        return last
    if first.bytes <= budget:
        return replace(first, solves=last.solves, writings=last.writings)
    if last.coarsest:
        whole = f"{budget + beside:,} bytes" + (f", {beside:,} of them code," if beside else "")
        raise BudgetError(
            f"fit: {whole} cannot hold this model: {last.rest:,.0f} bytes of it are no integers, and with the coarsest "
            f"grids the least possible file has {last.bytes:,}; raise the budget to {last.bytes + beside:,}"
        )
    raise BudgetError(
        f"fit: files of {first.bytes:,} and {last.bytes:,} bytes for a budget of {budget:,}; change it a little"
    )


class _Search(Generic[S]):
    """A fit as it goes on: what is known of the law, and how often it solved and wrote."""

    def __init__(
        self,
        budget: int,
        curves: Mapping[str, Curve],
        rest: float,
        solve: Callable[[Choices, float], dict[str, S]],
        write: Callable[[dict[str, S]], Written],
        say: Callable[[str], None],
    ) -> None:
        one = dict.fromkeys(curves, 1.0)
        self.budget, self.curves, self.law = budget, curves, _Law(rest, one, one, one)
        self.solve, self.write, self.say = solve, write, say
        self.wanted = (1 - AIM) * budget
        self.solves = self.writings = 0

    def step(self, start: Choices | None) -> Fitted[S]:
        """One file. start: choices that are only stretched, because the coder is known near them; None: any."""
        choices, solved, price, end = self._approach(start)
        foretold = self.law.foretell(solved)
        written, self.writings = self.write(solved), self.writings + 1
        self.law = _taught(self.law, written, solved)
        missed = max(abs(written.bytes / foretold - 1) - USUAL, 0.0)
        self.wanted = (1 - min(AIM + CAUTION * missed, LOWEST_AIM)) * self.budget
        one = dict.fromkeys(self.curves, 1.0)
        most = self.law.rest + largest(replace(self.law, codes=one).tell(self.curves))
        self.say(f"fit           {written.bytes:,} bytes written, {written.bytes / self.budget:.2%} of the budget")
        return Fitted(
            budget=self.budget,
            choices=choices,
            solved=solved,
            bytes=written.bytes,
            file=self.writings,
            foretold=foretold,
            damage=sum(solution.damage for solution in solved.values()),
            price=price,
            rest=self.law.rest,
            largest=most,
            full=end == "finest",
            coarsest=end == "coarsest",
            solves=self.solves,
            writings=self.writings,
        )

    def _approach(self, start: Choices | None) -> tuple[Choices, dict[str, S], float, End]:
        """Solves until the file is foretold to have the bytes that are wanted, with what every solve taught; λ; and
        which end of the curves was reached."""
        for turn in range(SOLVES):
            told = self.law.tell(self.curves)
            choices, price, end = self._chosen(told, start)
            solved, self.solves = self.solve(choices, price), self.solves + 1
            foretold = self.law.foretell(solved)
            self.say(f"fit           {foretold:,.0f} bytes foretold, {foretold / self.budget:.2%} of the budget")
            harm = sum(one.damage for one in solved.values()) / max(sum(c.damage for c in choices.values()), 1e-300)
            near = (NEAR if start is None else NEAREST) * self.budget
            ended = abs(foretold - self.wanted) < near and (start is not None or abs(harm - 1) < SURPRISE)
            self.law = self.law.after(choices, solved)
            if ended or end or turn == SOLVES - 1:
                break
        return choices, solved, price, end

    def _chosen(self, told: Mapping[str, Curve], start: Choices | None) -> tuple[Choices, float, End]:
        """The choices that the law asks for: `start` stretched, where a stretch reaches so far."""
        if self.law.rest + least(told) > (1 - SLACK) * self.budget:
            return _cheapest(told, MOST), MOST, "coarsest"
        wanted = self.wanted - self.law.rest
        finest = _cheapest(told, LEAST)
        if _bytes(finest) <= wanted:
            return finest, LEAST, "finest"
        choices, price = allocate(told, wanted)
        stretched = choices if start is None else _exactly(told, start, wanted)
        if _bytes(stretched) > (1 - NEAR) * wanted:
            choices = stretched
        return choices, price, ""


def _taught(law: _Law, written: Written, solved: Mapping[str, Solved]) -> _Law:
    """What a file says of its coder and of all that is not codes."""
    spent = dict.fromkeys(written.codes, 0.0)
    for name, one in solved.items():
        spent[written.group[name]] += one.entropy_bytes
    coder = {name: written.codes[group] / max(spent[group], 1.0) for name, group in written.group.items()}
    return replace(law, rest=float(written.bytes - sum(written.codes.values())), coder=coder)


def _cheapest(curves: Mapping[str, Curve], price: float) -> Choices:
    found = {}
    for name, curve in curves.items():
        place = np.unravel_index(int(np.argmin(curve.damage + price * curve.bytes)), curve.bytes.shape)
        found[name] = _choice(curve, float(curve.steps[place[0]]), int(place[1]))
    return found


def _exactly(curves: Mapping[str, Curve], choices: Choices, wanted: float) -> Choices:
    """All steps times one factor, such that the bytes are those wanted; no step leaves its curve."""
    low, high = -math.log(STRETCH), math.log(STRETCH)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _bytes(_stretched(curves, choices, middle)) > wanted else (low, middle)
    return _stretched(curves, choices, high)


def _stretched(curves: Mapping[str, Curve], choices: Choices, by: float) -> Choices:
    found = {}
    for name, choice in choices.items():
        steps = curves[name].steps
        step = float(np.clip(choice.step * math.exp(by), steps[0], steps[-1]))
        found[name] = _choice(curves[name], step, curves[name].dead_zones.index(choice.dead_zone))
    return found


def _choice(curve: Curve, step: float, zone: int) -> Choice:
    known, at = np.log(curve.steps), math.log(step)
    size = float(np.interp(at, known, curve.bytes[:, zone]))
    harm = math.exp(float(np.interp(at, known, np.log(np.maximum(curve.damage[:, zone], 1e-300)))))
    return Choice(step, curve.dead_zones[zone], size, harm)


def _bytes(choices: Choices) -> float:
    return sum(choice.bytes for choice in choices.values())
