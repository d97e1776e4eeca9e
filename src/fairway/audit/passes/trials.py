"""What a trial over a short text shows of the score: how often each target counts, and what was learned before."""

from __future__ import annotations

import ast
import weakref
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fairway.audit.case import Case
from fairway.audit.flow.events import Score, Trace, Update
from fairway.audit.flow.heap import Obj
from fairway.audit.passes.faults import Kind
from fairway.audit.passes.groups import in_smaller_groups
from fairway.audit.passes.reaching import around, further_end, reaching
from fairway.audit.passes.reported import Reported, scores_of
from fairway.audit.reading.tree import last_name, nodes, over_weights
from fairway.audit.trial.text import BOS, UNIT, tokens
from fairway.audit.trial.told import Lesson, Told, Trial
from fairway.audit.verdict import Place

_ENDS = 2 * UNIT  # tokens at the end of the text: what windows make of them is a rule of its own
_WHOLE = 0.02  # times: how near to a whole number what is counted again must come
_TWICE = 1.4  # times: what is less is a weight, as that of a window that is shorter than others
_MOST = 0.5  # of the targets: an epoch of them
_LEFT = 0.05  # of the targets
_SEVERAL = 4  # lessons
_STEPPED = 3  # arguments of range
FEW = 32  # targets: fewer that count otherwise are edges of documents

_DOUBTFUL: weakref.WeakKeyDictionary[Trace, dict[Reported, bool]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Counts:
    """Of the score: how often each target of the text counts, and how much of that came after a lesson."""

    times: NDArray[np.float64]
    late: NDArray[np.float64]
    trial: Trial
    said: tuple[Told, ...] = ()

    @property
    def more(self) -> NDArray[np.int64]:
        """The targets before the end of the text that count more than once."""
        found: NDArray[np.int64] = np.flatnonzero(self.times[: self.trial.length - _ENDS] > _TWICE)
        return found

    @property
    def missing(self) -> NDArray[np.int64]:
        """The targets that do not count; the first token is no target."""
        found: NDArray[np.int64] = np.flatnonzero(self.times[1:] < 0.01) + 1
        return found

    @property
    def lessons(self) -> list[Lesson]:
        """Those whose targets were scored, or scored again, after them."""
        return [lesson for lesson in self.trial.lessons if lesson.asked]


def counts_of(case: Case, which: Reported, doubtful: bool = False) -> Counts | None:
    """None where the trial came to no end, or the number that is reported is not among those that it told; or,
    unless `doubtful` ones are asked for, where a condition that nobody knows may leave losses out."""
    if not doubtful and case.trial.complete and _is_doubtful(case, which):
        return None
    return counted(case.trial, which)


def counted(trial: Trial, which: Reported) -> Counts | None:
    """The same of any trial of the script."""
    if not trial.complete or trial.unsure or not trial.told:
        return None
    said = _told(trial, which)
    while said:
        times, late = trial.counts(said[-1])
        if (times > 0).any():
            return Counts(times, late, trial, said)
        said = said[:-1]  # a difference of two scores counts no target
    return None


def _told(trial: Trial, which: Reported) -> tuple[Told, ...]:
    """What the trial told of the score; its last numbers where it told it in no line that the walk knows."""
    ways = [tuple(place.line for place in said.stack) for said in which.score]
    named = [told for told in trial.told if any(_same_way(told.stack, way) for way in ways)]
    return tuple(named) if named or which.others else tuple(trial.told[-4:])


def _is_doubtful(case: Case, which: Reported) -> bool:
    """Asked by many rules and for each fault, worked out once."""
    known = _DOUBTFUL.setdefault(case.trace, {})
    if which not in known:
        ways = {way for told in _told(case.trial, which) for way in told.sum.ways() if way}
        known[which] = _doubtful(case, {way[-1] for way in ways} or case.trial.summed)
    return known[which]


def _doubtful(case: Case, summed: set[int]) -> bool:
    """Whether a condition that nobody knows stands in a function that sums the losses of the score, in these lines: it
    may leave some out. What is summed to learn from it, or for another number, is no score."""
    trial = case.trial
    functions = [
        (node.lineno, node.end_lineno or node.lineno)
        for node in nodes(case.body.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]

    def span_of(line: int) -> tuple[int, int] | None:
        return max((each for each in functions if each[0] <= line <= each[1]), default=None)

    summing = {span_of(line) for line in summed}
    tests = {node.lineno: node for node in nodes(case.body.tree) if isinstance(node, ast.If)}
    tried = [node for node in nodes(case.body.tree) if isinstance(node, ast.Try) and node.handlers]

    def decides(test: ast.If) -> bool:
        caught = any(each.lineno <= test.lineno <= (each.end_lineno or 0) for each in tried)
        return _decides(test, trial.summed, caught)

    picked = over_weights(case.body.tree)
    asked = (line for line in trial.doubts if not any(line in each for each in picked))
    return any(span_of(line) in summing and (line not in tests or decides(tests[line])) for line in asked)


def _decides(test: ast.If, summed: set[int], caught: bool) -> bool:
    """Whether what counts may hang on a condition: its arms sum, leave, or bind a name. `if frozen: p.requires_grad =
    False` does none of it, nor does what raises, where that is not caught: the script ran to its end."""
    arms = [each for arm in (*test.body, *test.orelse) for each in nodes(arm)]
    leaves = (ast.Continue, ast.Break, ast.Return, ast.Yield, ast.YieldFrom)
    return any(
        isinstance(each, leaves)
        or (caught and isinstance(each, ast.Raise))
        or (isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store))
        or getattr(each, "lineno", 0) in summed
        for each in arms
    )


def _same_way(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one is the beginning of the other: a helper that prints knows one call more than who formats."""
    shared = min(len(one), len(other))
    return shared > 0 and one[:shared] == other[:shared]


def repeated(counts: Counts) -> str:
    """How many targets count more than once, as a sentence; "" where so few do that it is an edge."""
    more = counts.more
    whole = np.abs(counts.times[more] - np.round(counts.times[more])) < _WHOLE
    if len(more) < FEW or whole.mean() < 0.95 or counts.trial.bent:
        return ""  # few, or weights of another kind: a mean of the means of documents, bytes of a token
    most = counts.times[more].max()
    return (
        f"Worked out for a text of {counts.trial.length - 1:,} targets, {len(more):,} of them count more than once in "
        f"the score (up to {most:.3g} times), the first of them at place {more[0]:,}."
    )


def left_out(case: Case, which: Reported) -> tuple[str, int] | None:
    """Targets before the last one that counts which count nowhere, where no number that is told later holds more: a
    sentence, and where every so many are taken, else where they are summed. What is missing behind it is an end that
    makes no whole window or chunk, and so short a text has as much of that as a long one."""
    counts = counts_of(case, which)
    if counts is None or not len(counts.missing) or counts.trial.bent:
        return None
    return _left_out(case, counts) or _left_out_of_groups(case, which, counts)


def _left_out_of_groups(case: Case, which: Reported, counts: Counts) -> tuple[str, int] | None:
    """The same where much is missing at the end alone: in a trial with smaller chunks."""
    if len(counts.missing) < _LEFT * counts.trial.length:
        return None
    fine = in_smaller_groups(case)
    again = counted(fine, which) if fine is not None else None
    found = _left_out(case, again) if again is not None and len(again.missing) >= len(counts.missing) else None
    if found is None or again is None:
        return None
    lines = {line for way in again.said[-1].sum.ways() for line in way}
    return found[0], _in_steps(case, lines) or found[1]


def _in_steps(case: Case, lines: set[int]) -> int:
    """The line of the outermost loop around one of these lines that goes on in steps, range(0, chunks, 4)."""
    for node in nodes(case.body.tree):
        if not isinstance(node, ast.For) or not isinstance(node.iter, ast.Call):
            continue
        within = any(node.lineno < line <= (node.end_lineno or 0) for line in lines)
        if within and last_name(node.iter.func) == "range" and len(node.iter.args) == _STEPPED:
            return node.lineno
    return 0


def _left_out(case: Case, counts: Counts) -> tuple[str, int] | None:
    trial, last = counts.trial, int(np.flatnonzero(counts.times).max())
    missing = counts.missing[counts.missing < last]
    later = trial.told[counts.said[-1].number + 1 :]
    most = max((int((trial.counts(told)[0] > 0).sum()) for told in later), default=0)
    ways = sorted(way for way in counts.said[-1].sum.ways() if way)
    if len(missing) < _LEFT * trial.length or most > int((counts.times > 0).sum()) or not ways:
        return None
    evidence = (
        f"Worked out for a text of {trial.length - 1:,} targets, {len(missing):,} of them count nowhere in the score, "
        f"the first of them at place {missing[0]:,}."
    )
    return evidence, _every_so_many(case, ways[-1]) or ways[-1][-1]


def _every_so_many(case: Case, way: tuple[int, ...]) -> int:
    """The line, in the functions through which a sum is made, that takes every so many of something: x[::n]."""
    around = [
        node
        for node in nodes(case.body.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and any(node.lineno <= line <= (node.end_lineno or 0) for line in way)
    ]
    steps = (
        part.lineno
        for node in around
        for part in nodes(node)
        if isinstance(part, ast.Slice) and part.step is not None and not isinstance(part.step, ast.UnaryOp)
    )
    return min(steps, default=0)


def lesson_before(case: Case, which: Reported, counts: Counts) -> tuple[str, int] | None:
    """Targets of the score from which something learned before: a sentence, and where the order is decided."""
    if counts.trial.fitted or not learns(case, which):
        return None  # what is fitted to one window is nothing to another, and the trial does not tell them apart
    after = np.flatnonzero((counts.late > 0) & counts.trial.early[: len(counts.late)])
    lesson = next((each for each in counts.lessons if each.early >= FEW), None)  # a second pass is the walk's to tell
    if len(after) < FEW or lesson is None:
        return None
    scores = scores_of(case.trace, which.score, which.data)
    calls = {tuple(place.line for place in score.stack[:-1]) for score in scores}
    apart = [stack for stack in lesson.asked if stack[:-1] != lesson.stack[:-1]] or lesson.asked
    asked = next((stack for stack in apart if stack[:-1] in calls), apart[0])
    few = sum(each.early >= FEW for each in counts.trial.lessons) * 2 < len(counts.trial.lessons)
    line = parting(lesson.stack, asked)  # lessons that come too soon, or reach too far
    if few or lesson.early < lesson.many:
        line = reaching(case, lesson.stack[lesson.stack.index(line) :]) or lesson.cut or line
    evidence = (
        f"Worked out for a text of {counts.trial.length - 1:,} targets, {len(after):,} of those that the score counts "
        f"were learned from before: the step at line {lesson.stack[-1]} comes before the loss at line {asked[-1]}."
    )
    return evidence, line


def reached_too_far(case: Case, which: Reported) -> int:
    """Where lessons are told how far they reach, of which a trial shows that they reached into what was to be scored; 0
    where none do, or where all came too soon."""
    counts = counts_of(case, which)
    lessons = counts.trial.lessons if counts is not None and not counts.trial.fitted else []
    early = next((each.stack for each in lessons if each.early >= FEW), ())
    partly = any(each.early < each.many for each in lessons if each.stack == early)
    return further_end(case, early) if partly else 0


def mixes(case: Case, which: Reported) -> bool:
    """Whether a function through which the score is summed makes a softmax, or reads one at the targets, by itself."""
    counts = counts_of(case, which, doubtful=True)
    ways = counts.said[-1].sum.ways() if counts is not None else set()
    inside = [around(case, line) for line in {line for way in ways for line in way[1:]}]
    names = {
        getattr(each.func, "attr", getattr(each.func, "id", ""))
        for function in inside
        if function is not None
        for each in nodes(function)
        if isinstance(each, ast.Call)
    }
    return bool(names & _MIXING)


_MIXING = frozenset(("softmax", "log_softmax", "logsumexp", "logaddexp", "gather", "take_along_dim"))


def learns(case: Case, which: Reported) -> bool:
    """Whether what scores has learned from the text, and is one state that is carried on, or parts of one that learn in
    the same steps; states that are made anew with optimisers of their own; or both: the walk follows copies, vectors
    fitted to windows, and what is thrown away, which the trial does not tell apart."""
    steps = steps_of(case, which)
    carried_on: dict[Obj | None, set[tuple[Place, ...]]] = {}
    for update in steps:
        if not update.fresh:
            carried_on.setdefault(update.state, set()).add(update.stack)
    models = all(update.state is not None and _of_a_model(update.state) for update in steps)
    return bool(steps) and models and len(set(map(frozenset, carried_on.values()))) <= 1


def _of_a_model(state: Obj) -> bool:
    """Whether a state is a model, or of the weights of one that has no class."""
    return state.kind == "instance" or "#copy" in state.slots


def steps_of(case: Case, which: Reported) -> list[Update]:
    """What a gradient of the text taught, of what the score's losses know or were made by: tables are filled in the
    same order. Losses that were put in a list know nothing any more of what came before them."""
    knows, last = 0, 0
    states: set[Obj] = set()
    for said in which.score:
        for score in case.trace.scored(said.value.losses):
            knows, states, last = knows | score.knows, states | score.states, max(last, score.number)
    return [
        update
        for update in case.trace.updates
        if (knows >> update.bit & 1 or (update.state in states and update.number < last))
        and update.how == "gradient"
        and any(tok.data in which.data for tok in update.learned)
    ]


def order_of(case: Case, which: Reported, score: Score, step: Update) -> Literal["first", "late", "own", ""]:
    """What a trial that came to this score and to this step shows, where every target was summed once by the calls that
    sum it: "first" where no loss that counts was made after the step had learned from its target; "late" where the step
    is none of the score's own pass and came before; "own" where it is one of that pass, and all that it learned from
    was scored after it. "" where it shows none of these. Where some targets count twice, "first" if no others were made
    after the step."""
    once = counted_once(case, which)
    counts = once or _seldom_again(case, which)
    if counts is None:
        return ""
    trial, told = counts.trial, counts.said[-1].sum
    asked, calls = (tuple(place.line for place in each.stack[:-1]) for each in (score, step))
    mark = trial.taught_in.get(calls) or _handed_on(case, trial, step)
    # What a helper reads at a hint is made where the losses are: the trial knows no hint of a kernel.
    met = bool({asked, asked[:-1]} & set(trial.asked_in)) or tuple(p.line for p in score.stack) in told.ways()
    if mark is None or not met:
        return ""
    if not told.taught() & mark or (once is None and (counts.times[told.marked(mark)] > _TWICE).all()):
        return "first"
    if once is None:
        return ""
    lessons = [lesson for lesson in trial.lessons if lesson.stack[:-1] == calls]
    if asked[: len(calls)] != calls:
        return "late" if any(lesson.early for lesson in lessons) else ""
    return "own" if lessons and all(lesson.early == lesson.many for lesson in lessons) else ""


def _handed_on(case: Case, trial: Trial, step: Update) -> int | None:
    """The mark of the lesson whose gradient is handed to an optimiser of the script's own, which takes this step: the
    only one by the calls around the lesson."""
    around = step.stack[:-2]
    others = any(each.stack[:-1] == around for each in case.trace.updates)
    return None if others else trial.taught_in.get(tuple(place.line for place in around))


def learned_in_turn(case: Case, which: Reported, score: Score, step: Update) -> Kind | None:
    """Of weights that a step in a loop of its own taught, what a trial shows: each of its lessons is of targets that it
    had not learned from, so that they are parts of a text one after the other, and no vector is fitted to one window;
    and targets were scored after it. The rule, by whether all had been scored before as well."""
    counts = counts_of(case, which)
    own = {loop for loop, _ in step.nest} - {loop for loop, _ in score.nest}
    if counts is None or counts.trial.fitted or not own or step.state is None or step.state.kind != "instance":
        return None
    calls = tuple(place.line for place in step.stack[:-1])
    lessons = [each for each in counts.trial.lessons if each.stack[:-1] == calls]
    if len(lessons) < _SEVERAL or not all(each.many for each in lessons) or (counts.late > 0).sum() < FEW:
        return None
    early = any(each.early >= FEW for each in lessons)
    return "training-before-scoring" if early else "rescoring-after-adaptation"


def learned_first(case: Case, which: Reported, step: Update) -> tuple[str, int] | None:
    """Whether a trial shows losses that count of targets from which this step had learned: a sentence, and the line in
    which its way and that of the losses part."""
    counts = counts_of(case, which)
    calls = tuple(place.line for place in step.stack)
    vectors = (each for each in case.trace.updates if each.state is not None and each.state.kind == "tensor")
    beside = {tuple(place.line for place in each.stack[:-1]) for each in vectors if each.state is not step.state}
    if counts is None or (counts.trial.fitted and calls[:-1] in beside):  # they leave the same mark
        return None
    told = counts.said[-1].sum
    many = round(told.share(counts.trial.taught_in.get(calls[:-1], 0)) * int((counts.times > 0).sum()))
    way = next((way for way in sorted(told.ways()) if way), None)
    if many < FEW or way is None:
        return None
    evidence = (
        f"Worked out for a text of {counts.trial.length - 1:,} targets, the step at line {calls[-1]} had learned from "
        f"about {many:,} of those that the score counts before their losses were made."
    )
    return evidence, parting(calls, way)


def counted_once(case: Case, which: Reported) -> Counts | None:
    """The counts, where every target was summed once by the calls that sum it, and none is left out but tokens that
    open a document."""
    counts = counts_of(case, which)
    if counts is None or len(counts.more) or (tokens(counts.trial.vocabulary)[counts.missing] != BOS).any():
        return None
    times = [counts.trial.booked.get(way) for way in counts.said[-1].sum.ways()]
    return counts if times and all(each is not None and each.max() == 1 for each in times) else None


def _seldom_again(case: Case, which: Reported) -> Counts | None:
    """The counts, where some targets count more than once, but less than a second pass of any kind would make."""
    counts = counts_of(case, which)
    return counts if counts is not None and 0 < len(counts.more) < _MOST * counts.trial.length else None


def parting(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The line of `one` in the function in which the two ways part."""
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return mine
    return one[-1]
