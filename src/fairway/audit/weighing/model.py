"""A made-up model: what it says of tokens are numbers that are known, whatever its layers do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fairway.audit.reading.script import Script
from fairway.audit.settings import Settings
from fairway.audit.trial.arrays import Array
from fairway.audit.trial.limits import Forced
from fairway.audit.trial.machine import Machine
from fairway.audit.trial.values import NET, UNKNOWN, Func, Lib, Obj, Spent, Unknown, Value
from fairway.audit.weighing import stream
from fairway.audit.weighing.heads import as_given, endings, mixers
from fairway.audit.weighing.rows import priced
from fairway.audit.weighing.stream import PIECES

DOUBTS = 1_000  # that are written down
_MOST = 20_000_000  # numbers that a model makes at once
_SECOND = 0.75  # of the first head's logits: the larger of both is more than one of them

Way = tuple[int, ...]


class Model(Machine):
    """Mixed into the weigher. training: the calls around losses of other texts; within: how deep in a model's own
    functions; picks: times that what nobody knows was read at tokens; pricing: functions of weights and rows of tokens
    that are no model."""

    def __init__(self, script: Script, settings: Settings, forced: tuple[Forced, ...] = ()) -> None:
        super().__init__(script, settings, forced)
        self.within = 0
        self.mixing = 0  # how deep in functions that mix what a model has said
        self.picks = 0
        self.pricing: set[Func] = set()
        self.training: set[Way] = set()
        self.begun = 0  # from which place on the model under way goes on, as its own lines say: x[:, tail:]
        self.ends: dict[Func, int | str] = {}  # the argument that said so

    def text_used(self) -> None:
        """Tokens of the text are read, or scored."""
        raise NotImplementedError

    def logits(self, ids: Array) -> Array:
        assert ids.pos is not None
        if ids.pos.size * PIECES > _MOST:
            raise Spent
        made = Array(stream.logits()[np.where(ids.pos >= 0, ids.pos, stream.TOKENS)])
        made.net = True
        self.weigh(made)
        return made

    def losses(self, target: Array) -> Array:
        """What the model says of these targets, each by the place before it."""
        if target.pos is None or target.num is None or not (target.pos >= 0).any():
            self.apart += 1
            if len(self.training) < DOUBTS:
                self.training.add(tuple(self.stack))
            return Array(np.zeros(target.shape))
        self.made += 1
        self.text_used()
        before = np.where(target.pos > 0, target.pos - 1, stream.TOKENS)
        return priced(Array(stream.losses()[before, np.minimum(target.num.astype(np.int64), PIECES - 1)]), target.pos)

    def of_module(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        given = [*args[1:], *kwargs.values()]
        asked = [each for each in given if is_text(each)]
        states = [part for each in given for part in (each if isinstance(each, (tuple, list)) else (each,))]
        made = [each for each in states if isinstance(each, Array) and each.net]
        mixes = made and not self.within and id(func.args) in mixers(self.script.tree)
        if made and not asked and not mixes:
            return made[0]  # logits out of what a model has made, `tail((x, x0, skips), masks)`
        if self.mixing or mixes:
            return self._mixed(func, args, kwargs)
        self.begun = self.begun if self.within else 0
        self.within += 1
        try:
            found = super().of_module(func, args, kwargs)
        finally:
            self.within -= 1
        begun = 0 if self.within else self._begun(func, dict([*enumerate(args), *kwargs.items()]))
        how = endings(self.script.tree).get(id(func.args), "")
        return self._as_logits(found, given, raw=self._makes_losses(func), begun=begun, how=how)

    def _mixed(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """What is done with a model's rows, in this function and those that it calls."""
        self.mixing += 1
        try:
            return self.call_function(func, args, kwargs)
        finally:
            self.mixing -= 1

    def _begun(self, func: Func, named: dict[int | str, Value]) -> int:
        """From which place of its windows on a model goes on, of the arguments that it is handed; its own lines said
        once which of them that is, and are not gone through again."""
        said = next((key for key, value in named.items() if type(value) is int and value == self.begun), None)
        if self.begun and said is not None:
            self.ends.setdefault(func, said)
        found = named.get(self.ends[func], 0) if func in self.ends else 0
        return found if type(found) is int else 0

    def _makes_losses(self, func: Func) -> bool:
        """Whether a model that made losses of tokens and their targets before is asked by the same method: what makes
        something else of them now, `net(x, y, raw=True)`, makes logits."""
        return any(key[0] is func and form[0] != "net" for key, form in self.forms.items())

    def call(self, func: Value, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        given = (*args, *kwargs.values())
        if isinstance(func, Func) and not self.within and func not in self.pricing and _of_weights(given):
            return self._of_function(func, args, kwargs, line)  # of weights in a dict `of_module` does the same
        found = super().call(func, args, kwargs, line)
        if isinstance(func, Unknown) and isinstance(found, Unknown):
            made = [each for each in given if isinstance(each, Array) and each.net]
            return made[0] if len(made) == 1 else self._asked(found, given)
        return found

    def _of_function(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        """What a function makes of weights of which nothing at all is known and of rows of tokens: logits, if it embeds
        them. What makes prices of them is no model, from its second call on."""
        given, embedded, prices = (*args, *kwargs.values()), self.embedded, self.made + self.picks
        self.within += 1
        try:
            found = super().call(func, args, kwargs, line)
        finally:
            self.within -= 1
        if self.made + self.picks > prices:
            self.pricing.add(func)
        elif self.embedded > embedded:
            return self._as_logits(found, given)
        return found

    def _asked(self, found: Unknown, given: tuple[Value, ...]) -> Value:
        """What something unknown is asked for: a model that came out of a file is asked for tokens."""
        return self._as_logits(found, given) if found is NET else found

    def _as_logits(
        self, found: Value, given: Sequence[Value], raw: bool = False, begun: int = 0, how: str = ""
    ) -> Value:
        """What a model that nobody knows makes of the tokens among what it is given; of several arrays of them those
        with the most: beside windows the token to the left of each may be handed over. raw: logits even where targets
        are handed over as well; how: by which softmax its own lines end."""
        asked = sorted((each for each in given if is_text(each)), key=lambda each: int(each.body.size), reverse=True)
        targets = len(asked) > 1 and asked[0].body.size == asked[1].body.size and not raw
        if self.within or not asked or targets:
            return found
        if isinstance(found, Unknown):
            return as_given(_at_places(self.logits(asked[0]), given, begun), how)
        if isinstance(found, tuple) and found and isinstance(found[0], Unknown):
            said = _at_places(self.logits(asked[0]), given, begun)
            return (said, *(_flatter(said) if isinstance(each, Unknown) else each for each in found[1:]))
        return found

    def item(self, value: Value, index: Value) -> Value:
        if self.within and isinstance(value, Unknown) and isinstance(index, tuple) and len(index) > 1:
            part = index[1]
            begun = part.start if isinstance(part, slice) and part.stop is None else None
            if type(begun) is int and begun > 1:  # not x[:, 1:], what comes before each token
                self.begun = begun
        return super().item(value, index)


def _flatter(logits: Array) -> Array:
    """What a second head says of the same places."""
    assert logits.num is not None
    made = Array(_SECOND * logits.num)
    made.net = True
    return made


def _at_places(logits: Array, given: Sequence[Value], begun: int) -> Array:
    """Those that a model keeps of its own, where it is handed which: `model(ids, pick, lora)` of pick [rows, n] places
    in each window, or `model(ids, tail=64)`, from where on, as its own lines cut it."""
    assert logits.num is not None
    if logits.num.ndim != 3:
        return logits
    rows, width, _ = logits.num.shape
    picks = [each for each in given if _are_places(each, rows, width)]
    if len(picks) == 1:
        logits.num = np.take_along_axis(logits.num, picks[0].num[..., None].astype(np.int64), 1)
    elif 0 < begun < width:
        logits.num = logits.num[:, begun:]
    return logits


def _are_places(value: Value, rows: int, width: int) -> bool:
    """Whether these are places in windows, other than all of them: [rows, n] numbers below their width."""
    held = isinstance(value, Array) and value.num is not None and value.num.dtype.kind in "iu" and not is_text(value)
    shaped = held and value.num.ndim == 2 and len(value.num) == rows and 0 < value.num.shape[1] != width
    return shaped and bool(((value.num >= 0) & (value.num < width)).all())


def _of_weights(given: tuple[Value, ...]) -> bool:
    """Whether a function is handed weights of which nothing at all is known and rows of tokens, and no model that might
    be asked for them: `forward(torch.load(path), ids)`."""
    texts = [each for each in given if is_text(each)]
    rows = len(texts) == 1 and texts[0].body.ndim > 1
    whole = any(each is UNKNOWN for each in given)
    return rows and whole and not any(each is NET or isinstance(each, (Obj, Func, Lib)) for each in given)


def is_text(value: Value) -> bool:
    """Whether these are token ids of the text."""
    held = isinstance(value, Array) and value.pos is not None and value.num is not None and value.num.dtype.kind in "iu"
    return held and bool((value.pos >= 0).any())


__all__ = ["DOUBTS", "Model", "Way", "is_text"]
