"""What a score had seen: each way in which it can have learned from, or been chosen by, the tokens that it scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from fairway.audit.flow.events import MOVING, Choice, Event, Forward, Said, Score, Trace, Update, bits
from fairway.audit.flow.tokens import ALL_BEFORE, Tok, perhaps_apart, related
from fairway.audit.passes.past import by_the_past
from fairway.audit.passes.reported import Reported, scores_of
from fairway.audit.terms.report import IN_BITS

Kind = Literal[
    "rescoring-after-adaptation", "training-before-scoring", "multi-epoch-last", "min-over-passes", "two-pass-cache",
    "slot-on-scored", "slot-shared-delta", "temperature-from-validation", "choice-by-validation",
    "calibration-on-validation", "validation-in-training",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """kind: the rule that is broken; score: the loss it concerns; cause: what it had seen; before: the first pass;
    doubt: why it may be none after all."""

    kind: Kind
    score: Score
    cause: Update | Choice
    before: Score | None = None
    doubt: str = ""


class Passes:
    """The questions to one trace."""

    def __init__(self, trace: Trace, reported: Reported) -> None:
        self.trace, self.reported, self.data = trace, reported, reported.data
        trained = 0
        for update in trace.updates:
            trained |= update.losses
        followed = {score.bit for score in trace.scored(trained)}
        followed |= _only_in_parts(trace, followed)
        self.booked = [
            score
            for score in trace.scores
            if score.bit not in followed and any(tok.data in self.data for tok in score.targets)
        ]
        self.wide = {
            loop
            for score in (*self.booked, *scores_of(trace, reported.score, self.data))  # some learn from what they say
            for tok in score.targets
            for loop, low, high in tok.spans
            if high > low and any(loop == each for each, _ in score.nest)
        }  # loops whose windows overlap
        taught = [update for update in trace.updates if any(tok.data == "train" for tok in update.learned)]
        self.train_places = {update.place for update in taught}
        self.trained = {update.state for update in taught}  # weights, if need be in a dict of tensors: no slots
        self.carried = {(update.place, update.state) for update in trace.updates if _older(update)}
        self.last_trained = max((update.number for update in taught if update.how == "gradient"), default=None)

    def faults(self, said: tuple[Said, ...]) -> list[Fault]:
        """All faults of these numbers, in the order of the script."""
        scores = scores_of(self.trace, said, self.data)
        found: list[Fault] = []
        for score in scores:
            for update in self.trace.learned(score.knows):
                fault = self._learned(score, update)
                if fault is not None:
                    found.append(fault)
                    if fault.kind == "training-before-scoring" and self._in_artifact(score, update):
                        found.append(replace(fault, kind="validation-in-training"))
        chosen = list(self._choices(said, scores))
        if any(fault.kind == "min-over-passes" for fault in chosen):  # it says all that the passes say one by one
            found = [fault for fault in found if fault.kind not in ("multi-epoch-last", "rescoring-after-adaptation")]
            chosen = [fault for fault in chosen if fault.kind != "choice-by-validation"]
        return found + chosen

    # Learning.
    def _learned(self, score: Score, update: Update) -> Fault | None:
        order = [loop for loop, _ in score.nest]
        learned = [tok for tok in update.learned if tok.data in self.data]
        if not learned:
            return None
        targets = [self._begun(target) for target in score.targets]
        how = {related(self._begun(tok), target, order) for tok in learned for target in targets}
        if how & {"same", "later"}:
            return self._doubted(self._classified(score, update, learned), learned, order)
        if "apart" in how and update.how != "table" and self._shared(score, update, learned):
            return Fault("slot-shared-delta", score, update)
        return None

    def _begun(self, tok: Tok) -> Tok:
        """A window that overlaps the next one, as the place where it begins."""
        if not self.wide:
            return tok
        spans = tuple((loop, low, low if loop in self.wide else high) for loop, low, high in tok.spans)
        return replace(tok, spans=spans)

    def _classified(self, score: Score, update: Update, learned: list[Tok]) -> Fault:
        state = update.state
        if update.how == "table":
            kind = self._table_kind(score, update, learned)
            before = self._companion(score, update, learned) if kind == "training-before-scoring" else None
            if before is not None and before.place == score.place and before.stack != score.stack:
                return Fault("rescoring-after-adaptation", score, update, before)  # by the same lines, called again
            return Fault(kind, score, update)
        if update.how == "computed":
            trained = self._trained_on(score, learned)
            return Fault("validation-in-training" if trained else "calibration-on-validation", score, update)
        alone = state is not None and state.kind == "tensor" and state.owner is None and state not in self.trained
        if alone and score.scaled and state in self.trace.scalers:
            return Fault("temperature-from-validation", score, update)
        if any(tok.data == "train" for tok in update.learned) and self._in_artifact(score, update):
            return Fault("validation-in-training", score, update)  # whatever was looked at while it trained
        if self._before_artifact(score, update):
            return Fault("training-before-scoring", score, update)  # whichever number was looked at before
        before = self._companion(score, update, learned)
        if before is not None and _earlier_turn(before, score):  # of this very pass: what reaches on was not scored yet
            return Fault("training-before-scoring", score, update)
        called = self._first_call(score, update, learned)
        if called is not None:
            return Fault("rescoring-after-adaptation", score, update, called)
        if self._is_delta(score, update, alone) and not self._passes_again(score, update):
            return Fault("slot-on-scored", score, update)
        if before is not None:
            if before.place == score.place and before.stack[:-1] == score.stack[:-1] and self._epochs(before, score):
                return Fault("multi-epoch-last", score, update, before)
            return Fault("rescoring-after-adaptation", score, update, before)
        first = self._in_one_evaluation(score, update, learned)
        if first is not None:
            return Fault("rescoring-after-adaptation", score, update, first)
        if self._in_training(score, update):
            return Fault("validation-in-training", score, update)
        return Fault("training-before-scoring", score, update)

    def _trained_on(self, score: Score, learned: list[Tok]) -> bool:
        """Whether the training took its steps on the same read of these tokens: its stream goes on."""
        steps = [each for each in self.trace.learned(score.knows) if each.place in self.train_places]
        taken = {
            tok.origin for each in steps if each.how == "gradient" for tok in each.learned if tok.data in self.data
        }
        return all(tok.origin >= 0 and tok.origin in taken for tok in learned)

    @staticmethod
    def _doubted(fault: Fault, learned: list[Tok], order: list[int]) -> Fault:
        """A vector that is found on the places before an end that nothing holds against the beginning of the score."""
        pairs = [(tok, target) for tok in learned for target in fault.score.targets]
        met = [pair for pair in pairs if related(*pair, order) in ("same", "later")]
        if fault.kind != "slot-on-scored" or not all(perhaps_apart(*pair) for pair in met):
            return fault
        return replace(
            fault, doubt="It is found on the places before a bound that may lie before those that are scored."
        )

    def _table_kind(self, score: Score, update: Update, learned: list[Tok]) -> Kind:
        """Filled for the model's file, in the same turn before the token is scored, or in a pass of its own."""
        if self._in_artifact(score, update):
            return "validation-in-training"
        cut = {loop for tok in learned for loop, _, _ in tok.spans}
        both = cut & {loop for tok in score.targets for loop, _, _ in tok.spans}
        inner = [each for each in update.nest if each[0] in (both or cut)]
        same = bool(inner) and set(inner) <= set(score.nest)
        same = same and self.trace.in_one_call(inner[0][0], update, score)
        turns = dict(update.nest)
        same = same and all(turns.get(loop, turn) == turn or loop in cut for loop, turn in score.nest)  # or pass
        apart = _own_loops(update, learned, score) and _own_loops(score, score.targets, update)  # over parts of a part
        return "training-before-scoring" if same and not apart else "two-pass-cache"

    def _companion(self, score: Score, update: Update, learned: list[Tok]) -> Score | None:
        """The first scoring of the tokens that the update learned from, in the same turn of the loop that cuts them."""
        cutting = {loop for tok in learned for loop, _, _ in tok.spans}
        turns = set(update.nest)
        found = None
        for first in self.booked:
            if first.number >= update.number or first.number == score.number or (update.losses >> first.bit) & 1:
                continue
            if not _of_one_part(first, score):
                continue
            shared = [
                loop
                for loop, turn in first.nest
                if (loop, turn) in turns and loop in cutting and self.trace.in_one_call(loop, first, update)
            ]
            same = any(
                related(tok, target, shared) == "same" and self._cut_by(target, shared)
                for tok in learned
                for target in first.targets
            )
            if shared and same and (found is None or first.number < found.number):
                found = first
        if found is not None:
            return self._booked_alike(score, update, found)
        return self._same_site(score, update, learned) or self._followed(score, update, learned)

    def _booked_alike(self, score: Score, update: Update, first: Score) -> Score:
        """What was made of a first scoring where this one was made of its own: `sums += (nll * mask).sum()`."""
        if first.place != score.place:
            made = (each for each in self.booked if first.number < each.number < update.number)
            same = (each for each in made if each.place == score.place and each.stack[:-1] == score.stack[:-1])
            return next((each for each in same if ((each.parts | each.whole) >> first.bit) & 1), first)
        return first

    def _in_one_evaluation(self, score: Score, update: Update, learned: list[Tok]) -> Score | None:
        """A first scoring of what was learned, where it, the learning and this scoring are steps of one function that
        evaluates. Of the main program: where the same calls of another line made it, and all of it, and told it in bits
        per byte: `evaluate(); adapt(); evaluate()`; any other scoring there is another evaluation, or a look."""
        for first in self.booked:
            if first.number >= update.number:
                break
            below = _common(first, update, score) > 1
            twice = first.stack != score.stack and first.stack[2:] == score.stack[2:] and first.targets == score.targets
            if first.place != score.place or not (below or (twice and self._told_in_bits(first))):
                continue
            if _nearness(first, update) < _nearness(update, score) or not _of_one_part(first, score):
                continue
            if any(related(tok, target) == "same" for tok in learned for target in first.targets):
                return first
        return None

    def _told_in_bits(self, first: Score) -> bool:
        told = (said for said in self.trace.said if IN_BITS.search(said.text))
        return any(self.trace.family(said.value.losses) >> first.bit & 1 for said in told)

    def _first_call(self, score: Score, update: Update, learned: list[Tok]) -> Score | None:
        """A scoring of what was learned, in a call that scored and learned, where this scoring is in another call of
        the same lines: a vector that one pass has learned is handed to the next."""
        for first in self.booked:
            if first.number >= update.number:
                break
            again = first.place == score.place and first.stack != score.stack
            again = again and _common(first, update) > _common(update, score)
            if again and any(related(tok, target) == "same" for tok in learned for target in first.targets):
                return first
        return None

    def _same_site(self, score: Score, update: Update, learned: list[Tok]) -> Score | None:
        """An earlier scoring in the same line, in the turn of a loop in which the update is made: a loop over a list
        that holds each chunk several times."""
        turns = set(update.nest)
        for first in self.booked:
            near = first.place == score.place and first.number < min(update.number, score.number)
            near = near and any(each in turns for each in first.nest)
            if near and any(related(tok, target) == "same" for tok in learned for target in first.targets):
                return first
        return None

    def _followed(self, score: Score, update: Update, learned: list[Tok]) -> Score | None:
        """The loss that the update itself followed, where the very same calls make this one: a loop over passes that
        books what it learns from."""
        for first in self.trace.scored(update.losses):
            near = first.stack == score.stack and first.number < score.number
            if near and any(related(tok, target) == "same" for tok in learned for target in first.targets):
                return first
        return None

    def _epochs(self, before: Score, score: Score) -> bool:
        """Whether the loop that repeats the pass stands in the function of the pass itself."""
        turns = dict(before.nest)
        cut = {loop for tok in score.targets for loop, _, _ in tok.spans}
        repeated = [loop for loop, turn in score.nest if turns.get(loop, turn) != turn and loop not in cut]
        inner = {self.trace.within.get(loop) for loop in cut}
        return any(self.trace.within.get(loop) in inner for loop in repeated)

    @staticmethod
    def _cut_by(tok: Tok, loops: list[int]) -> bool:
        return any(loop in loops for loop, _, _ in tok.spans)

    def _is_delta(self, score: Score, update: Update, alone: bool) -> bool:
        """Whether the state is made for the windows that are scored with it: a delta, not the model."""
        state = update.state
        if state is None or "#copy" in state.slots or (update.place, state) in self.carried:
            return False
        if alone:
            return True
        if not update.fresh:
            return False
        turns = list(score.nest)
        inside = list(update.fresh) == turns[: len(update.fresh)]
        cut = {loop for tok in score.targets for loop, _, _ in tok.spans}
        own = [loop for loop, _ in turns[len(update.fresh) :] if loop in cut and not self._row_loop(score, loop)]
        return inside and not own and update.fresh[-1][0] in cut

    @staticmethod
    def _passes_again(score: Score, update: Update) -> bool:
        """Whether it learned in an earlier turn of a loop over the same tokens again, and was made before that loop."""
        turns, made = dict(update.nest), dict(update.fresh)
        cut = {loop for tok in score.targets for loop, _, _ in tok.spans}
        return any(turns.get(loop, turn) != turn and loop not in cut and loop not in made for loop, turn in score.nest)

    def _row_loop(self, score: Score, loop: int) -> bool:
        """Whether a loop only goes through the rows of one batch: the loss was made before it."""
        return bool(score.whole) and any(
            loop not in {each for each, _ in whole.nest} for whole in self.trace.scored(score.whole)
        )

    def _shared(self, score: Score, update: Update, learned: list[Tok]) -> bool:
        """One delta for overlapping windows: a later window's context holds what an earlier one is scored on."""
        if score.one_row or not one_row(update):
            return False
        if all(any(end.startswith(ALL_BEFORE) for _, end, _ in tok.cuts) for tok in learned):
            return False
        order = [loop for loop, _ in score.nest]
        bare = [replace(tok, cuts=frozenset()) for tok in learned]
        goals = [replace(tok, cuts=frozenset()) for tok in score.targets]
        return any(related(tok, target, order) == "same" for tok in bare for target in goals)

    def _in_training(self, score: Score, update: Update) -> bool:
        """Whether the training itself saw validation tokens, and no adaptation of its own after it."""
        if any(tok.data == "train" for tok in update.learned) or update.place in self.train_places:
            other = [each for each in self.trace.updates if each.place == update.place and each.stack == update.stack]
            return any(tok.data == "train" for each in other for tok in each.learned)
        trained = [
            each
            for each in self.trace.learned(score.knows)
            if each.how == "gradient" and any(tok.data not in self.data for tok in each.learned)
        ]
        return not trained and not set(score.nest) & set(update.nest)  # one turn holds both: that is an evaluation

    def _in_artifact(self, score: Score, update: Update) -> bool:
        """Whether what was learned went into the file that is scored: it was a part of the training."""
        return any(update.number < saved <= score.number for saved in self.trace.saved)

    def _before_artifact(self, score: Score, update: Update) -> bool:
        """Whether the first file of weights after the training was written with what this update learned in it."""
        last = self.last_trained
        if last is None or last > update.number or not self._in_artifact(score, update):
            return False
        return not any(last < saved < update.number for saved in self.trace.saved)

    # Choices.
    def _choices(self, said: tuple[Said, ...], scores: list[Score]) -> Iterator[Fault]:
        shown, past = 0, dict[int, bool]()
        for each in said:
            shown |= each.value.choices
        for score in scores:
            order = [loop for loop, _ in score.nest]
            for choice in self.trace.chosen(score.choices | shown):
                if choice.bit not in past:
                    past[choice.bit] = by_the_past(self.trace, choice)
                seen = [
                    other
                    for other in self.trace.scored(choice.losses)
                    if any(tok.data in self.data for tok in other.targets)
                ]
                whole = _beforehand(choice, score)
                about = [
                    other
                    for other in seen
                    if any(
                        related(whole(tok), whole(target), order) in ("same", "later")
                        for tok in other.targets
                        for target in score.targets
                    )
                ]
                if not about:
                    continue
                family = self.trace.family(choice.losses)
                direct = any(
                    each.value.choices >> choice.bit & 1 and self.trace.family(each.value.losses) & family
                    for each in said
                )
                if past[choice.bit] and not (direct and choice.form in _LEAST):
                    continue
                columns = self._of_columns(choice)
                if direct and (columns or self._repeated(seen)):
                    swept = _swept(seen)
                    one = not columns and self._of_one_run(seen, choice)
                    least: Kind = "choice-by-validation" if one else "min-over-passes"
                    yield Fault("temperature-from-validation" if swept else least, score, choice, about[0])
                elif not past[choice.bit] and score.choices >> choice.bit & 1 and choice.number < score.number:
                    scaled = score.scaled and not self.trace.weighed >> choice.bit & 1
                    scaled = scaled or _swept(seen) or (choice.form == "fit" and _scales(choice, scores))
                    kind: Kind = "temperature-from-validation" if scaled else "choice-by-validation"
                    yield Fault(kind, score, choice, about[0])

    def _of_one_run(self, scores: list[Score], choice: Choice) -> bool:
        """Whether all losses were made in the turn of the choice, of one run of the model: no pass is chosen there, but
        a prediction."""
        first, depth = min(score.number for score in scores), len(choice.nest)
        made_of = self.trace.scored(self.trace.family(choice.losses))
        together = all(score.nest[:depth] == choice.nest for score in made_of)
        return together and not any(isinstance(each, Forward) for each in self.trace.events[first : choice.number])

    def _of_columns(self, choice: Choice) -> bool:
        """Whether the least of several sums in one tensor is picked, one for each of the ways in which the same lines
        score the tokens side by side."""
        if choice.form == "if" or not self.trace.own >> choice.bit & 1:
            return False  # a mask keeps all that are so large
        summed = self.trace.scored(self.trace.family(choice.losses))
        return any(len(each.nest) > len(choice.nest) for each in summed)

    def _repeated(self, scores: list[Score]) -> bool:
        """Whether the losses come from more than one pass over the same tokens: not one from the other, with what a
        table says of the same token mixed in."""
        made_of = {score.bit: self.trace.family(1 << score.bit) for score in scores[:60]}
        for n, one in enumerate(scores[:60]):
            for other in scores[n + 1 : 60]:
                if made_of[one.bit] & made_of[other.bit]:
                    continue
                if any(related(a, b) == "same" for a in one.targets for b in other.targets) and _apart(one, other):
                    return True
        return False


_LEAST = frozenset(("min", "minimum", "fmin", "amin"))  # what is chosen is a loss itself, and no place or setting


def _only_in_parts(trace: Trace, followed: set[int]) -> set[int]:
    """The losses of which nothing but parts are used, and each part is followed: `(nll * mask).sum().backward()`."""
    said = 0
    for each in trace.said:
        said |= each.value.losses
    told = {score.bit for score in trace.scored(said)}
    of_followed, of_others = 0, 0
    for score in trace.scores:
        if score.bit in followed:
            of_followed |= score.whole
        else:
            of_others |= score.whole
    return set(bits(of_followed & ~of_others)) - told


def _beforehand(choice: Choice, score: Score) -> Callable[[Tok], Tok]:
    """Of a choice that is made before the windows are gone through, their parts say nothing of those that it compares:
    they are other windows."""
    cutting = {loop for tok in score.targets for loop, _, _ in tok.spans}
    within = any(loop in cutting for loop, _ in set(choice.nest) & set(score.nest))
    return (lambda tok: tok) if within else (lambda tok: replace(tok, cuts=frozenset()))


def _swept(scores: list[Score]) -> bool:
    """Whether these are losses of the same weights, whose logits were divided by several numbers."""
    scales = {each.scale for each in scores if each.scale is not None}
    return (len(scales) > 1 or MOVING in scales) and len({each.knows for each in scores}) == 1


def _scales(choice: Choice, scores: list[Score]) -> bool:
    """Whether a number that was computed from losses scales the logits of any of these scores."""
    return any(score.scaled and score.choices >> choice.bit & 1 for score in scores)


def _common(*events: Event) -> int:
    """How many calls events share, outermost first."""
    count = 0
    for places in zip(*(event.stack for event in events), strict=False):
        if len(set(places)) > 1:
            break
        count += 1
    return count


def _nearness(one: Event, other: Event) -> tuple[int, int]:
    """How many calls two events share, and how many turns of loops, outermost first."""
    pairs = zip(one.nest, other.nest, strict=False)
    return _common(one, other), next(
        (n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.nest), len(other.nest))
    )


def _of_one_part(one: Score, other: Score) -> bool:
    """Whether two scorings may be of the same tokens: not of two parts that a cut keeps apart."""
    return any(related(mine, its) != "apart" for mine in one.targets for its in other.targets)


def _own_loops(event: Event, toks: Iterable[Tok], other: Event) -> bool:
    """Whether a loop that cuts an event's tokens, and stands around it, stands not around another one."""
    cut = {loop for tok in toks for loop, _, _ in tok.spans}
    return bool(cut.intersection(loop for loop, _ in event.nest) - {loop for loop, _ in other.nest})


def _earlier_turn(before: Score, score: Score) -> bool:
    """Whether a loss was made in an earlier turn of the same pass, of the tokens of that turn."""
    turns = dict(score.nest)
    cut = {loop for tok in score.targets for loop, _, _ in tok.spans}
    moved = [loop for loop, turn in before.nest if turns.get(loop, turn) != turn]
    order = [loop for loop, _ in score.nest]
    lies = {related(mine, other, order) for mine in before.targets for other in score.targets}
    return before.stack[:-1] == score.stack[:-1] and bool(moved) and set(moved) <= cut and lies == {"earlier"}


def _older(update: Update) -> bool:
    """Whether a state was last made anew in an earlier turn of a loop than the one in which it learns: it was put
    aside meanwhile, and came back as it was."""
    turns = dict(update.nest)
    return any(turns.get(loop, turn) > turn for loop, turn in update.fresh)


def one_row(update: Update) -> bool:
    """Whether what learned is a vector of its own with one row for all windows."""
    state = update.state
    alone = state is not None and state.kind == "tensor" and state.owner is None
    return alone and state is not None and state.slots.get("#rows") == "one"


def _apart(one: Score, other: Score) -> bool:
    """Whether two scores of the same tokens belong to two passes."""
    if one.stack != other.stack or one.states != other.states or one.knows != other.knows:
        return True
    turns = dict(one.nest)
    cut = {loop for score in (one, other) for tok in score.targets for loop, _, _ in tok.spans}
    return any(loop in turns and turns[loop] != turn and loop not in cut for loop, turn in other.nest)


__all__ = ["Fault", "Kind", "Passes", "bits", "one_row"]
