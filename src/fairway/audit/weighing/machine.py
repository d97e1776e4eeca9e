"""The trial's machine with a made-up model: what a model says of tokens are numbers, and prices are written down."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairway.audit.reading.script import Script
from fairway.audit.reading.tree import classes, nodes, over_weights
from fairway.audit.settings import Settings
from fairway.audit.trial.arrays import Array
from fairway.audit.trial.core import Core
from fairway.audit.trial.limits import Forced
from fairway.audit.trial.tensors import METHODS
from fairway.audit.trial.told import together
from fairway.audit.trial.turns import Turns
from fairway.audit.trial.values import NET, UNKNOWN, Raised, Unknown, Value, mixed
from fairway.audit.weighing import stream
from fairway.audit.weighing.model import DOUBTS, Model, Way, is_text
from fairway.audit.weighing.rows import ROWS, gather, log_softmax, priced
from fairway.audit.weighing.stream import PIECES
from fairway.audit.weighing.strengths import RAISING, Strengths

_RAMP, _LONG = 5_000, 1_000_000  # tokens: of a share that grows slowly, and of a text in which it is grown
_TRAIL = 2_000
_ROWS = 64  # kept: an evaluation reads the last target once, or once for each of its predictions
_SAME = 1e-5  # of a loss: rounding to float32
_NUMBERS = 5_000  # of an array: a step
_SUMMING = frozenset(("sum", "mean", "nansum", "nanmean", "item", "tolist", "dot"))
_FEWEST = 32  # turns of a loop over tokens
_A_TOKEN = 100  # steps
_CALLS = 2  # the main program's, and its line: they name an evaluation
_JOINING = frozenset(("cat", "concatenate", "stack"))
_LOG = 0.2  # of a probability that is no more than 1.2
_DRAWN = ("uniform_", "normal_", "orthogonal_")  # weights that are new: none of a price
_EXPERTS = 16  # that are mixed
_SCALARS = 16  # numbers of a gate
_FILLING = frozenset(("copy_", "fill_", "to"))  # that leave them what they began with, where nobody knows with what
_SHAPING = frozenset(("tanh", "sigmoid", "relu", "square", "abs", "sqrt"))  # of what is no distribution yet


class Weigher(Model):
    """A trial over the text of `stream`. said: by the calls and the line that sum it, the price of the last token;
    doubted: the calls and the lines of what may have changed a number and is not known, and the step; asked: the
    calls, and the calls around them, in which the text is used, and the step in which it is for the first time;
    training: the calls around losses of other texts; rows: lines that made rows over the vocabulary which sum to more
    than one; mixed: the last line that made a price."""

    idle_steps = 2_000  # calibration goes on for longer, and says nothing of prices
    idle_again = 200
    heavy_turns = 3  # one batch of another text says as little of prices as ten
    least_cut = 0

    def __init__(self, script: Script, settings: Settings, forced: tuple[Forced, ...] = (), most: int = 0) -> None:
        """most: steps, where not as many as a trial takes."""
        super().__init__(script, settings, forced)
        self.most_steps = most or self.most_steps
        self.vocabulary = min(self.vocabulary, PIECES)
        self.functions.update(_FUNCTIONS)
        self.said: dict[Way, float] = {}
        self.doubted: list[tuple[Way, int]] = []
        self.asked: dict[Way, int] = {}
        self.tests: dict[int, ast.If | ast.While] = {}
        self.rows: list[int] = []
        self.paid: dict[Way, NDArray[np.float64]] = {}  # the price of each place
        self.order: dict[Way, NDArray[np.float64]] = {}  # and when it was summed for the first time
        self.booked_so_far = 0
        self.sums_read: dict[int, NDArray[np.float64]] = {}  # by line and place: a price, and what its row comes to
        self.read: list[NDArray[np.float64]] = []  # rows of probabilities that the last target's was read from
        self.trail: list[tuple[int, NDArray[Any]]] = []  # lines that made rows over the vocabulary, and the last rows
        self.mixed = 0
        self.said_last: NDArray[Any] | None = None  # prices
        self.learned_at = 0
        self.strengths = Strengths()
        self.scalars: dict[int, Array] = {}  # parameters of a gate, by their ids: as good as what they have learned

    # -- what is not known ----------------------------------------------------------------------------------------

    def doubtful(self, line: int = 0) -> None:
        """Something may have changed a number that a price hangs on."""
        if not self.within and len(self.doubted) < DOUBTS:
            self.doubted.append(((*self.stack, line or self.line), self.trial.steps))

    def doubt(self, line: int) -> None:
        super().doubt(line)
        if self._decides(line):
            self.doubtful(line)

    def _decides(self, line: int) -> bool:
        """Whether a number may hang on the condition in a line: an arm binds a name, fills a place, or leaves. Not a
        check that raises, nor one that freezes weights, or picks them."""
        if not self.tests and self.script.tree is not None:
            picked = over_weights(self.script.tree)
            self.tests = {
                node.lineno: node
                for node in nodes(self.script.tree)
                if isinstance(node, (ast.If, ast.While)) and not any(node.lineno in each for each in picked)
            }
        test = self.tests.get(line)
        parts = [part for arm in (test.body, test.orelse) for each in arm for part in nodes(each)] if test else []
        return any(
            isinstance(part, (ast.Continue, ast.Break, ast.Return))
            or (isinstance(part, (ast.Name, ast.Subscript)) and isinstance(part.ctx, ast.Store))
            for part in parts
        )

    def passed_over(self, error: Raised, node: ast.stmt, made: int) -> bool:
        passes = super().passed_over(error, node, made)
        if passes and not isinstance(node, (ast.Raise, ast.Assert)):  # a check of the script's own, of so short a text
            self.doubtful(node.lineno)
        return passes

    def unsure(self, way: Way) -> bool:
        """Whether there are doubts in the evaluation that comes to a price: the calls that no training shares."""
        shared = max((together(way, each) for each in self.training), default=0)
        calls = way[: max(shared + 1, _CALLS)]
        beside = len(calls) + 1  # a call beside it that uses nothing of the text reads the model back
        begun = self.asked.get(way[:beside], 0)
        near = ((each, step) for each, step in self.doubted if each[: len(calls)] == calls)
        return any(
            len(each) <= beside or (each[:beside] in self.asked and (step >= begun or each[:-1] in self.asked))
            for each, step in near
        )

    def aimless(self, since: Turns) -> bool:
        """A loop over tokens one by one may fill a table for long before a price is made of it."""
        found = super().aimless(since)
        tokens = _FEWEST <= since.known <= stream.TOKENS and since.each(self.trial.steps) < _A_TOKEN
        if found and tokens and since.line in self.idled:
            self.idled.discard(since.line)
            return False
        return found

    def text_used(self) -> None:
        calls = tuple(self.stack)
        while calls and calls not in self.asked:
            self.asked[calls] = self.trial.steps
            calls = calls[:-1]

    def learn(self, value: Value) -> None:
        if self.made == self.learned_at:  # nothing of the text since
            self.trained += 1
            if not self.made and len(self.training) < DOUBTS:  # by a loss of which nobody knows what it is of
                self.training.add(tuple(self.stack))
        self.learned_at = self.made

    def ramp(self, part: Value, whole: Value) -> Value:
        """A share that grows to its half within some 100,000 tokens is as large in the short text as in the midst of a
        long one: what a mixture does to prices is seen, and not a share of a thousandth."""
        numbers = isinstance(part, (int, float)) and isinstance(whole, (int, float))
        most = whole - part if numbers else 0.0
        return part + most * stream.TOKENS / _LONG if numbers and most > _RAMP else whole

    # -- prices ---------------------------------------------------------------------------------------------------

    def of_array(self, name: str, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        held = args[0] if args and isinstance(args[0], Array) else None
        if held is not None and id(held) in self.scalars and any(isinstance(each, Unknown) for each in args):
            return held if name in _FILLING else UNKNOWN
        if held is not None and name.rstrip("_") in RAISING:
            self.strengths.raise_(name, held, self.line)
        found = self._of_rows(name, args, kwargs) if held is not None and name in ROWS else None
        if found is None:
            found = super().of_array(name, args, kwargs)
        if held is not None and held.price is not None:
            places = _folded(held, found)
            if places is not None:
                return priced(found, places)
            if name in _SUMMING:
                self.book(held)
        if isinstance(found, Unknown):
            nets = [each for each in args if isinstance(each, Array) and each.net]
            if len(nets) == 1 and name not in METHODS and name not in ROWS:
                return nets[0]  # a layer
            if held is not None and name.endswith("_") and not name.endswith(_DRAWN):
                self.doubtful()
        elif isinstance(found, Array) and found is not held:
            self._marked(found, name, args)
        return found

    def _of_rows(self, name: str, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        try:
            found = ROWS[name](*args, **kwargs)
        except NotImplementedError:
            return None
        except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
            return None
        for each in found if isinstance(found, tuple) else (found,):
            self.weigh(each)
        if ROWS[name] is gather:
            self.read_from(args[0], found)
        return found

    def _marked(self, found: Array, name: str, args: tuple[Value, ...]) -> None:
        """What a function leaves of prices, and of what is no distribution yet."""
        parts = args[0] if args and isinstance(args[0], (list, tuple)) else args
        arrays = [each for each in parts if isinstance(each, Array)]
        if not arrays:
            return
        if (name in _SHAPING and arrays[0].net) or (name in _JOINING and all(each.net for each in arrays)):
            found.net = True
        if name in _SUMMING and arrays[0].price is not None:
            found.net = True  # what is learned from it is learned from the text
        elif found.num is not None and found.num.dtype.kind == "f" and found.price is None:
            prices = [each for each in arrays if each.price is not None and each.shape == found.shape]
            if prices:
                found.pos, found.price = prices[0].pos, found.num

    def book(self, array: Array) -> None:
        """Prices are summed, or looked at one by one. Of a row that a mask leaves out, as of the copies that fill up
        the last batch, nought is summed."""
        if array.pos is None or array.price is None:
            return
        places, prices = array.pos.reshape(-1), array.price.reshape(-1)
        places = np.where(prices == 0.0, -1, places)
        paid = self.paid.setdefault((*self.stack, self.line), np.full(stream.TOKENS, np.nan))
        inside = (places >= 0) & (places < stream.TOKENS)
        paid[places[inside]] = prices[inside]
        self.booked_so_far += 1
        order = self.order.setdefault((*self.stack, self.line), np.full(stream.TOKENS, np.inf))
        order[places[inside]] = np.minimum(order[places[inside]], self.booked_so_far)
        here = np.flatnonzero(places == stream.TOKENS - 1)
        if here.size:
            self.said[(*self.stack, self.line)] = float(prices[here[-1]])

    def weigh(self, array: Array) -> None:
        self.trial.steps += array.body.size // _NUMBERS
        if array.price is not None and array.price is array.num:
            if self.said_last is None or not np.array_equal(array.price, self.said_last):  # and no other dtype of it
                self.mixed = self.line
            self.said_last = array.price
        num = array.num
        if num is None or num.dtype.kind != "f" or array.net or not num.size or num.shape[-1:] != (PIECES,):
            return
        if array.pos is not None:  # losses of so many places
            return
        last = num.reshape(-1, PIECES)[-64:]
        if len(self.trail) < _TRAIL:
            self.trail.append((self.line, last[-1].copy()))
        logs = num.max() <= _LOG and num.min() < 0.0  # of probabilities
        sums = (np.exp(last) if logs else last).sum(axis=-1)
        whole = np.abs(sums - np.round(sums)) <= 1e-6
        whole |= logs & (sums > PIECES / 2)  # p log p, of which an entropy is made
        if (logs or num.min() >= 0.0) and bool(((sums > 1.001) & ~whole).any()):
            self.rows.append(self.line)

    def item(self, value: Value, index: Value) -> Value:
        touched = self.touched
        found = super().item(value, index)
        if self.touched > touched:
            self.text_used()
        if isinstance(found, Array) and isinstance(value, Array) and isinstance(index, tuple) and found.price is None:
            ids = [each for each in index if is_text(each)]
            if ids and found.num is not None and found.num.dtype.kind == "f":
                self.read_from(value, priced(found, ids[-1].pos))
        return found

    def read_from(self, rows: Array, found: Array) -> None:
        """Keeps the row of the last place's target, where rows over all pieces are read at targets, one for each."""
        num = rows.num
        if num is None or num.dtype.kind != "f" or num.shape[-1:] != (PIECES,) or found.pos is None:
            return
        if found.pos.size * PIECES != num.size or len(self.read) >= _ROWS:
            return
        rows_read, places = num.reshape(-1, PIECES), found.pos.reshape(-1)
        logs = bool(rows_read.min() < 0.0)
        if found.num is not None and not rows.net:
            self._summed(np.exp(rows_read) if logs else rows_read, places, found.num.reshape(-1), logs)
        here = np.flatnonzero(places == stream.TOKENS - 1)
        if here.size:
            row = rows_read[here[-1]].astype(np.float64)
            self.read.append(np.exp(row) if logs else row)

    def _summed(self, rows: NDArray[Any], places: NDArray[Any], read: NDArray[Any], logs: bool) -> None:
        """Keeps what each row comes to, and the price that was read from it."""
        inside = np.flatnonzero((places >= 0) & (places < stream.TOKENS))
        with np.errstate(all="ignore"):
            prices = -read[inside] if logs else -np.log(read[inside])
        held = self.sums_read.setdefault(self.line, np.full((2, stream.TOKENS), np.nan))
        held[:, places[inside]] = prices, rows[inside].sum(axis=-1, dtype=np.float64)

    def most_read(self, ways: set[Way]) -> float:
        """The most that a row comes to from which a price of these ways was read, and nothing else was made of it."""
        paid = [np.abs(self.paid[way]) for way in ways if way in self.paid]
        near = [sums[np.abs(prices - each) < _SAME] for prices, sums in self.sums_read.values() for each in paid]
        return max((float(each.max()) for each in near if each.size), default=0.0)

    def row_of(self, price: float, last: int) -> NDArray[np.float64] | None:
        """The one in which what is said of the last token stands, and nothing else is made of it."""
        return next(
            (row for row in self.read if row[last] > 0.0 and abs(-math.log(row[last]) - abs(price)) < _SAME), None
        )

    def picked(self, value: Unknown, index: Value) -> Value:
        """What nobody knows, at tokens: a logarithm, a probability or a logit."""
        asked = any(is_text(part) for part in (index if isinstance(index, tuple) else (index,)))
        if value.net and asked:
            self.picks += 1
            self.doubtful()
        return value

    def assign_item(self, value: Value, index: Value, new: Value) -> None:
        if isinstance(value, Array) and (isinstance(new, Unknown) or isinstance(index, Unknown)):
            self.doubtful()
        if isinstance(value, (Array, list)) and isinstance(new, (bool, int, float)):
            self.strengths.store(new, self.line)
        elif isinstance(value, Array) and isinstance(new, Array):
            self.strengths.store_all(new, self.line)
        super().assign_item(value, index, new)

    def grown(self, name: str, old: Value, more: Value) -> Value:
        if isinstance(old, Array) and old.body.ndim and not old.net and isinstance(more, Unknown):
            self.doubtful()
        return super().grown(name, old, more)


def _folded(held: Array, found: Value) -> NDArray[Any] | None:
    """The places of what several prices of each were made one price of: of experts, side by side in the first axis or
    in the last one."""
    if held.pos is None or held.body.ndim < 2 or not isinstance(found, Array) or found.num is None:
        return None
    for axis in (0, -1):
        places = np.moveaxis(held.pos, axis, 0)
        if found.num.dtype.kind == "f" and places.shape[1:] == found.shape and (places == places[:1]).all():
            return places[0] if 1 < len(places) <= _EXPERTS else None
    return None


def _cross_entropy(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """F.cross_entropy of logits that are known, or of a model that nobody knows."""
    return _loss(machine, args, kwargs, read=_paid)


def _nll_loss(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """F.nll_loss: what is handed to it are logarithms of probabilities, and no softmax makes them sum to one."""
    logits = isinstance(args[0], Array) and args[0].net  # what a model that nobody knows makes: rows of logits here
    return _loss(machine, args, kwargs, read=_paid if logits else _picked)


def _loss(
    machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], read: Callable[[NDArray[Any], Array], Array]
) -> Value:
    assert isinstance(machine, Weigher)
    rows, target = args[0], kwargs.get("target", kwargs.get("targets", args[1] if len(args) > 1 else None))
    if not isinstance(target, Array) or target.num is None:
        return NET
    known = isinstance(rows, Array) and is_text(target) and not (rows.net and _of_other_places(rows, target))
    losses = read(_rows_for(rows, target), target) if known else machine.losses(target)
    if isinstance(rows, Array):
        machine.made += 1
    reduction = kwargs.get("reduction", "mean")
    return losses if reduction == "none" else machine.of_array(str(reduction), (losses,), {})


def _of_other_places(rows: Array, target: Array) -> bool:
    """Whether a model whose inside nobody knows was asked for more places than are scored: it picks them itself,
    `head(hidden.gather(1, places))`, and what it says of each target is known all the same."""
    return rows.body.size != target.body.size * PIECES


def _rows_for(rows: Array, target: Array) -> NDArray[Any]:
    """The pieces last, [batch, pieces, places] as torch has them or [places, pieces]."""
    assert rows.num is not None
    moved = rows.num.ndim == 3 and target.body.ndim == 2 and rows.num.shape[-1] != PIECES
    return np.moveaxis(rows.num, 1, -1) if moved else rows.num


def _paid(rows: NDArray[Any], target: Array) -> Array:
    return _picked(log_softmax(Array(rows)).num, target)


def _picked(logs: Any, target: Array) -> Array:
    assert target.num is not None
    picked = np.take_along_axis(logs, target.num.astype(np.int64)[..., None], -1)[..., 0]
    return priced(Array(-picked), target.pos)


def _gather(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    assert isinstance(machine, Weigher)
    if isinstance(args[0], Array):
        return machine.of_array("gather", args, kwargs)
    return machine.picked(args[0], next((each for each in (*args[1:], *kwargs.values()) if is_text(each)), None))


def _parameter(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """nn.Parameter(torch.tensor(-3.0)) of a module: whatever a gate of a few numbers has learned, it makes rows that
    sum to one of any; what it began with is as good."""
    assert isinstance(machine, Weigher)
    held = args[0] if args and isinstance(args[0], Array) else None
    if held is None or held.num is None or held.num.dtype.kind != "f" or held.num.size > _SCALARS:
        return mixed(*args)
    if not any(line in each for each in classes(machine.script.tree)):
        return mixed(*args)
    made = Array(held.num.copy())
    machine.scalars[id(made)] = made
    return made


def _itself(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """torch.compile(f): f."""
    return args[0] if args else (lambda value: value)


_FUNCTIONS = {
    **dict.fromkeys(["torch.nn.functional.cross_entropy"], _cross_entropy),
    **dict.fromkeys(["torch.nn.functional.nll_loss"], _nll_loss),
    "torch.nn.Parameter": _parameter,
    **dict.fromkeys(["*.gather", "*.take_along_dim", "*.take_along_axis"], _gather),
    **dict.fromkeys(["torch.compile", "torch.jit.script", "torch.compiler.disable"], _itself),
}


__all__ = ["Way", "Weigher"]
