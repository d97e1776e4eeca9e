"""Losses, gradients and what learns from them."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import replace

from fairway.audit.flow import events
from fairway.audit.flow.core import Core
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.tokens import Cut, Tok, related
from fairway.audit.flow.values import (
    GRAD,
    MISSING,
    NO_TOKENS,
    NOTHING,
    ONE_ROW,
    SCALED,
    WEIGHTS,
    Value,
    blend,
    join,
)

_APART = 64  # windows of a ledger, for each of its experts, that are told apart


class Learning(Core):
    """Scores, Choices, Updates."""

    # Losses.
    def scored(self, logits: Value, targets: Value, node: ast.AST | None) -> Value:
        """The loss of `targets` under what `logits` came from."""
        toks = targets.toks or logits.toks
        bit = len(self.trace.scores)
        choices = logits.choices | targets.choices
        flags = (logits.flags | targets.flags) & (ONE_ROW | SCALED)
        score = self.note(
            events.Score, node, bit=bit, targets=toks, states=logits.states, knows=logits.knows, choices=choices,
            parts=logits.losses | targets.losses, scaled=bool(logits.flags & SCALED),
            one_row=bool(targets.flags & ONE_ROW),
            scale=logits.limit,
        )  # fmt: skip
        self.trace.scores.append(score)
        return Value(
            toks=toks, states=logits.states, losses=1 << bit, choices=choices, flags=flags & ONE_ROW,
            env=logits.env,
        )  # fmt: skip

    def newest(self, toks: frozenset[Tok]) -> frozenset[Tok]:
        """Those that come after all others, as far as loops tell: of a probability, the token, not its context."""
        order = [loop for loop, _ in self.nest]
        return frozenset(tok for tok in toks if not any(related(tok, other, order) == "earlier" for other in toks))

    def past(self, losses: int) -> bool:
        """Whether losses were all made in earlier turns of the loops that cut their tokens."""
        turns = dict(self.nest)
        for score in self.trace.scored(losses):
            cutting = {loop for tok in score.targets for loop, _, _ in tok.spans}
            if not any(loop in cutting and turns.get(loop, turn) != turn for loop, turn in score.nest):
                return False
        return True

    def ended(self, losses: int) -> bool:
        """Whether losses were all made in loops over tokens that are over."""
        turns = dict(self.nest)
        for score in self.trace.scored(losses):
            own = {loop for loop, _ in score.nest}
            cutting = {loop for tok in score.targets for loop, _, _ in tok.spans if loop in own}
            if not cutting or any(loop in turns for loop in cutting):
                return False
        return bool(losses)

    def following(self, logits: Value) -> Value:
        """Logits that follow earlier losses: they know what those knew."""
        knows = logits.knows | _united(each.knows for each in self.trace.scored(logits.losses))
        return logits.but(losses=0, knows=knows)

    def rescored(self, loss: Value, other: Value, node: ast.AST | None) -> Value:
        """A loss into which another state's answer is mixed."""
        bit = len(self.trace.scores)
        score = self.note(
            events.Score, node, bit=bit, targets=loss.toks, states=loss.states | other.states, knows=other.knows,
            choices=loss.choices | other.choices, parts=loss.losses,
        )  # fmt: skip
        self.trace.scores.append(score)
        if not loss.losses & ~self.logs:  # rows still, until a target is picked
            self.logs |= 1 << bit
        return loss.but(
            states=loss.states | other.states, losses=1 << bit, choices=loss.choices | other.choices, const=MISSING
        )

    def cut(self, value: Value, cuts: Iterable[Cut], node: ast.AST | None) -> Value:
        """The part of a value within its window; for a loss, a Score of its own."""
        added = frozenset(cuts)
        if not added or not value.toks:
            return value
        toks = frozenset(replace(tok, cuts=tok.cuts | added) if len(tok.cuts) < 6 else tok for tok in value.toks)
        if not value.losses or toks == value.toks or value.flags & GRAD:
            return value.but(toks=toks)
        whole = list(self.trace.scored(value.losses))
        own = [frozenset(tok for tok in toks if any(_within(tok, other) for other in each.targets)) for each in whole]
        if not 1 < len(whole) <= _APART or not all(own) or any(each == toks for each in own):
            return value.but(toks=toks, losses=self._cut_out(toks, whole, value, node))
        # A ledger holds the losses of many windows, and each knows what its own window knew.
        parts = [self._cut_out(mine, [each], value, node) for mine, each in zip(own, whole, strict=True)]
        return value.but(toks=toks, losses=_united(parts))

    def _cut_out(self, toks: frozenset[Tok], whole: list[events.Score], value: Value, node: ast.AST | None) -> int:
        """A Score of these targets alone, a part of others: its bit as a mask."""
        bit = len(self.trace.scores)
        first = whole[0]
        score = self.note(
            events.Score, node, bit=bit, targets=toks, states=value.states,
            knows=_united(each.knows for each in whole), choices=value.choices, scaled=any(s.scaled for s in whole),
            one_row=first.one_row, scale=first.scale, whole=_united(1 << each.bit for each in whole),
        )  # fmt: skip
        self.trace.scores.append(score)
        if not score.whole & ~self.logs:
            self.logs |= 1 << bit
        return 1 << bit

    # Choices.
    def choose(self, form: str, operands: list[Value], node: ast.AST | None) -> int:
        """A choice by comparing losses: its bit as a mask."""
        bit = len(self.trace.choices)
        operands = [self.flat(each) for each in operands]
        losses = _united(each.losses for each in operands)
        choice = self.note(events.Choice, node, bit=bit, losses=losses, form=form, operands=tuple(operands))
        self.trace.choices.append(choice)
        return 1 << bit

    # Learning.
    def learn(
        self,
        obj: Obj,
        learned: frozenset[Tok],
        how: events.How,
        node: ast.AST | None,
        losses: int = 0,
        still: bool = False,
    ) -> int:
        """A state learns; returns the Update's bit as a mask. still: the step moves nothing, and nobody knows of it."""
        bit = len(self.trace.updates)
        fresh = obj.slots.get("#fresh", obj.born)
        update = self.note(
            events.Update, node, bit=bit, state=obj, learned=learned, how=how, losses=losses, fresh=fresh, still=still
        )
        self.trace.updates.append(update)
        if still:
            return 0
        mask = 1 << bit
        self.heap.set(obj, "#learned", obj.slots.get("#learned", 0) | mask)
        root = obj.root
        if root is not obj:
            self.heap.set(root, "#family", root.slots.get("#family", 0) | mask)
        if self.chosen:
            self.heap.set(root, "#choices", root.slots.get("#choices", 0) | self.chosen)
        return mask

    def backward(self, loss: Value, node: ast.AST | None) -> None:
        """Gradients of a loss reach every state that it read."""
        loss = self.flat(loss)
        grad = self.gradient(loss)
        for state in loss.states:
            old = state.slots.get("#grad", NOTHING)
            used = state.slots.get("#stepped", 0)  # what a step has followed is taken to be cleared
            self.heap.set(state, "#grad", join(old, grad) if old.toks and not used else grad)
            self.heap.set(state, "#stepped", 0)

    def gradient(self, loss: Value) -> Value:
        """The gradient of a loss."""
        return Value(toks=loss.toks, losses=loss.losses, states=loss.states, flags=GRAD, choices=loss.choices)

    def step(self, optimizer: Value, node: ast.AST | None) -> None:
        """An optimizer moves the states that have gradients."""
        for each in optimizer.refs:
            targets = each.slots.get("#targets")
            if targets is None:
                continue
            for obj in self.leaves(targets):
                grad = obj.root.slots.get("#grad", NOTHING)
                if grad.toks or grad.losses:
                    self.learn(obj, grad.toks, "gradient", node, grad.losses, still=_moves_nothing(each))
            rate = self.content(each).choices  # a rate that was chosen by losses
            for obj in self.leaves(targets):
                self.heap.set(obj.root, "#stepped", 1)
                if rate:
                    self.heap.set(obj.root, "#choices", obj.root.slots.get("#choices", 0) | rate)

    def forget_gradient(self, value: Value) -> None:
        """zero_grad."""
        for each in value.refs:
            targets = each.slots.get("#targets")
            for obj in self.leaves(targets) if targets is not None else [each]:
                if "#grad" in obj.root.slots:
                    self.heap.set(obj.root, "#grad", NOTHING)

    def grow(self, obj: Obj) -> None:
        """A tensor that takes gradients from now on: a vector of its own, or a copy of a model's weights."""
        self.heap.set(obj, "#leaf", 1)
        held = self.content(obj)
        trained = (each for each in self.trace.learned(held.knows) if any(tok.data == "train" for tok in each.learned))
        if any("#module" in state.slots for state in held.states) or next(trained, None) is not None:
            self.heap.set(obj, "#copy", 1)

    def grown(self, value: Value, node: ast.AST | None, leaf: bool = True) -> Value:
        """The tensors of a value, as leaves; of a value that is no tensor (a copy on another device), a new one."""
        tensors = [obj for obj in value.refs if obj.kind == "tensor"]
        if not tensors:
            cell = self.new("tensor", None, node)
            flat = self.flat(value)
            cell.slots["#content"] = Value(choices=flat.choices)
            if flat.knows:
                cell.slots["#learned"] = flat.knows
            tensors = [cell]
        for obj in tensors if leaf else ():
            self.grow(obj)
        return Value(refs=frozenset(tensors), flags=value.flags)

    def leaves(self, value: Value, deep: int = 5) -> list[Obj]:
        """The models and tensors in a nest of lists and dicts."""
        found: dict[Obj, None] = {}
        for obj in sorted(value.refs, key=lambda each: each.number):
            if obj.kind in ("list", "dict", "generator") and deep:
                for held in self.held(obj):
                    found.update(dict.fromkeys(self.leaves(held, deep - 1)))
            elif obj.kind in ("tensor", "instance", "thing"):
                found[obj] = None
        for item in value.items or ():
            if deep:
                found.update(dict.fromkeys(self.leaves(item, deep - 1)))
        return list(found)

    # Writing in place.
    def write(self, obj: Obj, value: Value, node: ast.AST | None, strong: bool = False, part: bool = False) -> None:
        """value is written into a tensor or a model's parameters. strong: nothing of the old stays; part: a slice."""
        value = self.flat(value)
        if self.chosen:
            value = value.but(choices=value.choices | self.chosen)
        if obj.kind != "tensor" or obj.owner is not None or "#leaf" in obj.slots:
            self._write_state(obj, value, node, strong and not part)
        if obj.kind == "tensor":
            self.heap.drop(obj, "#columns")
            old = NOTHING if strong and not part else self.content(obj)
            if obj.owner is not None or "#leaf" in obj.slots:
                value = Value(choices=value.choices, words=value.words)
            kept = blend(old, value) if old is not NOTHING else value.but(const=MISSING)
            self.heap.set(obj, "#content", kept)

    def _write_state(self, obj: Obj, value: Value, node: ast.AST | None, strong: bool) -> None:
        if value.toks:  # what was computed for them is learned here
            value = value.but(knows=value.knows & ~self.computed)
        mask = value.knows & ~self.knows(obj) if not strong else value.knows
        old = 0 if strong else obj.slots.get("#learned", 0)
        if strong:
            self.reset(obj)
        self.heap.set(obj, "#learned", old | mask)
        root = obj.root
        if root is not obj and mask:
            self.heap.set(root, "#family", root.slots.get("#family", 0) | mask)
        if value.choices:
            if obj.kind != "tensor" and value.states and value.flags & WEIGHTS:  # a model takes over weights as a whole
                self.trace.weighed |= value.choices & ~root.slots.get("#choices", 0)
            self.heap.set(root, "#choices", root.slots.get("#choices", 0) | value.choices)
        if value.toks:
            self.learn(obj, value.toks, "gradient" if value.flags & GRAD else "computed", node, value.losses)

    def reset(self, obj: Obj) -> None:
        """A state forgets all it learned."""
        root = obj.root
        gone = obj.slots.get("#learned", 0)
        for part in self.parts_of(obj):
            gone |= part.slots.get("#learned", 0)
            self.heap.set(part, "#learned", 0)
        self.heap.set(obj, "#learned", 0)
        self.heap.set(obj, "#family", 0)
        self.heap.set(obj, "#fresh", tuple(self.nest))
        if root is not obj and gone:
            self.heap.set(root, "#family", root.slots.get("#family", 0) & ~gone)
        if root is not obj:
            self._made_anew(root)

    def _made_anew(self, root: Obj) -> None:
        """A model whose every weight was set anew in this turn of a loop has forgotten all it learned."""
        weights = [part for part in self.parts_of(root) if part.kind == "tensor"]
        nests = [part.slots.get("#fresh", part.born) for part in weights]
        fresh = nests[0] if nests else ()
        for nest in nests[1:]:
            fresh = fresh[: next((n for n, (a, b) in enumerate(zip(fresh, nest, strict=False)) if a != b), len(nest))]
        old = root.slots.get("#fresh", root.born)
        if fresh and old[: len(fresh)] != fresh:
            self.heap.set(root, "#learned", 0)
            self.heap.set(root, "#family", 0)
            self.heap.set(root, "#fresh", fresh)

    def load(self, model: Value, weights: Value, node: ast.AST | None) -> None:
        """load_state_dict: the model is now what the weights are."""
        self.note(events.Call, node, name="load_state_dict")
        held = self.flat(weights)
        if self.chosen:
            held = held.but(choices=held.choices | self.chosen)
            self.trace.weighed |= self.chosen
        for obj in sorted(model.refs, key=lambda each: each.number):
            self.heap.set(obj.root, "#choices", held.choices)
            made = obj.slots.get("#fresh", obj.born)
            self._write_state(obj, held, node, strong=True)
            if self._goes_on(held):
                self.heap.set(obj, "#fresh", made)

    def _goes_on(self, weights: Value) -> bool:
        """Whether weights hold what was learned in an earlier turn of a loop under way: a state that was put aside and
        comes back is not made anew."""
        turns = dict(self.nest)
        return any(
            turns.get(loop, turn) > turn for update in self.trace.learned(weights.knows) for loop, turn in update.nest
        )

    def parts_of(self, obj: Obj, listed: bool = False) -> list[Obj]:
        """The modules and tensors below a model; of a list whose elements are known one by one, none, or listed."""
        found: dict[Obj, None] = {obj: None}
        waiting = [obj]
        while waiting and len(found) < 400:
            for value in list(waiting.pop().slots.values()):
                items = value.items or () if listed and isinstance(value, Value) else ()
                for part in (part for each in (value, *items) if isinstance(each, Value) for part in each.refs):
                    if part not in found and (part.owner is not None or part.kind in ("list", "dict")):
                        found[part] = None
                        waiting.append(part)
        return [part for part in found if part is not obj and part.owner is not None]

    def earlier_dropped(self, value: Value) -> Value:
        """What a position holds may know the positions before it: such Updates are no fault wherever it is read. Of
        what is no token (a count, an id that a table proposes) only what its tables have learned is dropped."""
        if not value.knows:
            return value
        keep = 0
        order = [loop for loop, _ in self.nest]
        if order and order[-1] in self.backwards:  # the turns before it are the positions after it
            return value
        now = Tok("", tuple(self.here()))
        asked = [tok for tok in value.toks if order and any(loop == order[-1] for loop, _, _ in tok.spans)]

        def before(tok: Tok, update: events.Update) -> bool:
            """Whether it comes before this position, or is in the context that the value was looked up by; or is what
            an earlier turn has learned, and not after this position: `table[...] = tokens[i + 1]`."""
            how = related(replace(tok, data=""), now, order)
            passed = bool(self.nest) and any(loop == order[-1] and n < self.nest[-1][1] for loop, n in update.nest)
            return (
                how == "earlier"
                or (how == "same" and passed)
                or (update.how != "gradient" and any(_not_after(tok, each, order[-1]) for each in asked))
            )

        for update in self.trace.learned(value.knows):
            known = bool(update.learned) and all(before(tok, update) for tok in update.learned)
            if not known or (not value.toks and update.how != "table"):
                keep |= 1 << update.bit
        return value.but(knows=keep)

    def written_toks(self, old: Value, spans: tuple[tuple[int, int, int], ...]) -> Value:
        """The old content of a buffer that is written again in a later iteration, without what the write replaces."""
        covered = {loop for loop, _, _ in spans}
        turns = {loop: turn for loop, turn in self.nest if loop not in covered}
        kept = frozenset(
            tok for tok in old.toks if not any(loop in turns and high < turns[loop] for loop, _, high in tok.spans)
        )
        return old if kept == old.toks else old.but(toks=kept or NO_TOKENS)


def _not_after(tok: Tok, other: Tok, inner: int) -> bool:
    """Whether a slice ends where another of the same tokens begins, or before, as the inner loop goes."""
    ends = [high for loop, _, high in tok.spans if loop == inner]
    begins = [low for loop, low, _ in other.spans if loop == inner]
    return tok.data == other.data and bool(ends and begins) and ends[0] <= begins[0] and related(tok, other) != "later"


def _united(masks: Iterable[int]) -> int:
    mask = 0
    for each in masks:
        mask |= each
    return mask


def _within(part: Tok, whole: Tok) -> bool:
    """Whether a part was cut out of what these turns of loops cut out."""
    return part.data == whole.data and part.origin == whole.origin and set(whole.spans) <= set(part.spans)


_STILL = 1e-8  # a rate: float32 holds a weight of 0.02 to 2e-9, and bfloat16 to 1e-4


def _moves_nothing(optimizer: Obj) -> bool:
    """Whether the rate that an optimizer was given last, or made with, is a number that moves no weight."""
    group = optimizer.slots.get("#group")
    given = group.slots.get(("k", "lr")) if isinstance(group, Obj) else None
    rate = given if isinstance(given, Value) else optimizer.slots.get("#rate", NOTHING)
    return isinstance(rate.const, (int, float)) and not isinstance(rate.const, bool) and 0 <= rate.const <= _STILL
