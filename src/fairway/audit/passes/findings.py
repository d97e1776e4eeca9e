"""From faults to a rule's verdict, with its place, its way and a sentence that can be pasted."""

from __future__ import annotations

import ast
import weakref
from dataclasses import replace

from fairway.audit.case import Case
from fairway.audit.flow.events import Choice, Event, Forward, Said, Score, Trace, Update, bits
from fairway.audit.passes.consequences import without_consequences
from fairway.audit.passes.faults import Fault, Passes, one_row
from fairway.audit.passes.patterns import pattern_at
from fairway.audit.passes.reported import Reported, is_diagnosis, reported
from fairway.audit.passes.trials import order_of
from fairway.audit.passes.vectors import fitted, fitted_to_scored
from fairway.audit.reading.tree import nodes
from fairway.audit.terms.choices import forked
from fairway.audit.verdict import Finding, Place, Step, Verdict

_SEEN: weakref.WeakKeyDictionary[Trace, tuple[Reported, list[Fault], list[Fault]]] = weakref.WeakKeyDictionary()


def passes_of(case: Case) -> tuple[Reported, list[Fault], list[Fault]]:
    """What is reported; the faults of the score; the faults of other final numbers. Computed once for a trace."""
    trace = case.trace
    found = _SEEN.get(trace)
    if found is None:
        which = reported(trace, case.submission)
        passes = Passes(trace, which)
        own, beside = (
            without_consequences(trace, passes.faults(said), which.data) for said in (which.score, which.others)
        )
        own = [tried for fault in own if (tried := _as_tried(case, which, fault)) is not None]
        found = _SEEN[trace] = which, own, beside
    return found


def verdict_on(case: Case, rule: str, clause: str, clean: str) -> Finding:
    """The rule's finding: a violation in the score, else what is only printed beside it, else clean or cannot tell."""
    which, own, beside = passes_of(case)
    mine = [fault for fault in own if fault.kind == rule and not _is_gate(case, fault)]
    if mine:
        fault = _clearest(mine)
        guards = (*fault.score.guards, *fault.cause.guards)
        verdict: Verdict = "suspect" if guards or fault.doubt else "violates"
        doubt = f" {fault.doubt}" if fault.doubt else ""
        doubt += f" This depends on the setting at {guards[0]}, which nothing here decides." if guards else ""
        return Finding(
            rule, verdict, _sentence(fault) + doubt, clause, place_of(case, fault), way(case.trace, fault, which.score)
        )
    if not which.score:
        return unseen(case, rule, clause)
    open_ends = not case.trace.complete
    if open_ends:
        last = case.trace.unknowns()[-1:]
        place = last[0].place if last else None
        why = last[0].why if last else "the walk did not end"
        return Finding(rule, "cannot tell", f"The script could not be followed to its end: {why}.", clause, place)
    other = [fault for fault in beside if fault.kind == rule]
    if other and not all(is_diagnosis(said) for said in which.others) and not _before(which, other):
        fault = _clearest(other)
        evidence = f"{_sentence(fault)} That number is not the last one reported; make sure that it is not the score."
        return Finding(rule, "suspect", evidence, clause, place_of(case, fault), way(case.trace, fault, which.others))
    note = " A number printed beside it would break the rule, but it is not the score." if other else ""
    return Finding(rule, "clean", clean + note, clause, which.score[0].place)


def vectors_on(case: Case, rule: str, clause: str, clean: str) -> Finding:
    """The same of vectors that are fitted to windows; where the walk finds no fault at all, as a trial shows them."""
    found = verdict_on(case, rule, clause, clean)
    which, own, _ = passes_of(case)
    shown = fitted_to_scored(case, which) if found.verdict == "clean" and not own and which.score else None
    if shown is None or shown[0] != rule:
        return found
    return Finding(rule, "violates", shown[1], clause, case.place(shown[2] or which.score[0].place.line))


def _as_tried(case: Case, which: Reported, fault: Fault) -> Fault | None:
    """A fault of the order as a trial bears it out: none where every target was scored before the step learned from it,
    and no second epoch where each was scored but once; none of a vector that was fitted to no target that it scores."""
    if fault.kind in _OF_VECTORS and isinstance(fault.cause, Update):
        return _vector_as_tried(case, which, fault, fault.cause)
    # A vector beside a temperature is none; a temperature that is fitted to what it scores stays a fault.
    if fault.kind == "temperature-from-validation" and isinstance(fault.cause, Update):
        apart = fitted(case, which, fault.cause, shared=False) == "apart"
        return None if apart or order_of(case, which, fault.score, fault.cause) == "first" else fault
    if fault.kind not in _OF_THE_ORDER or not isinstance(fault.cause, Update):
        return fault
    order = order_of(case, which, fault.score, fault.cause)
    if order == "late" and fault.kind == "multi-epoch-last":
        return replace(fault, kind="training-before-scoring")
    return None if order == "first" else fault


def _vector_as_tried(case: Case, which: Reported, fault: Fault, cause: Update) -> Fault | None:
    """Where a trial tells contexts from what is scored by numbers, masks that the walk cannot follow are none."""
    shared = fault.kind == "slot-shared-delta"
    shown = fitted(case, which, cause, shared)
    if shown != "apart":
        return replace(fault, doubt="") if shown == "met" else fault
    if not shared and one_row(cause) and fitted(case, which, cause, shared=True) == "met":
        return replace(fault, kind="slot-shared-delta", doubt="")
    return None


_OF_THE_ORDER = ("multi-epoch-last", "training-before-scoring", "rescoring-after-adaptation")
_OF_VECTORS = ("slot-on-scored", "slot-shared-delta")
_BY_LOSSES = ("choice-by-validation", "temperature-from-validation")


def chosen_by_losses(case: Case) -> bool:
    """Whether the score hangs on a choice by validation losses: rules of the order say so."""
    return any(fault.kind in _BY_LOSSES and not _is_gate(case, fault) for fault in passes_of(case)[1])


def gate_by_losses(case: Case) -> Place | None:
    """Where predictions of tokens are compared by how well they did, in the turn of a loop over the text in which these
    tokens are scored with what came of it."""
    return next((fault.cause.place for fault in passes_of(case)[1] if _in_its_turn(fault)), None)


def _in_its_turn(fault: Fault) -> bool:
    cause, score = fault.cause, fault.score
    if fault.kind not in _BY_LOSSES or not isinstance(cause, Choice) or cause.form == "fit" or cause.nest != score.nest:
        return False
    cut = {loop for tok in score.targets for loop, _, _ in tok.spans}
    return any(loop in cut for loop, _ in cause.nest)


def _is_gate(case: Case, fault: Fault) -> bool:
    """Whether a choice is one between predictions token by token, by the token itself: a rule of the distribution's."""
    if fault.kind in _BY_LOSSES and fault.cause.place == gate_by_losses(case):
        return True
    if fault.kind not in _BY_LOSSES or not isinstance(fault.cause, Choice) or fault.cause.nest != fault.score.nest:
        return False
    for gates in case.reading.gates:
        for term in (*gates.oracles(), *gates.gated()):
            fork = forked(term)
            tests = (one for one in gates.of.below(fork[0]) if one.op == "compare") if fork is not None else ()
            if any(case.reading.place(one) == fault.cause.place for one in (term, *tests)):
                return True
    return False


def _before(which: Reported, faults: list[Fault]) -> bool:
    """Whether the score was said after what is doubtful, or the record says which number it is."""
    return which.by_record or all(fault.score.number < which.score[-1].number for fault in faults)


def unseen(case: Case, rule: str, clause: str) -> Finding:
    """No number could be followed."""
    gaps = case.trace.unknowns()
    place = gaps[0].place if gaps else None
    why = f": {gaps[0].why}" if gaps else ""
    return Finding(
        rule, "cannot tell", f"No printed number could be traced to losses on validation tokens{why}.", clause, place
    )


def _clearest(faults: list[Fault]) -> Fault:
    """The fault without doubts and open conditions, and the earliest cause."""

    def rank(fault: Fault) -> tuple[bool, int, int]:
        return bool(fault.doubt), len(fault.score.guards) + len(fault.cause.guards), fault.cause.number

    return min(faults, key=rank)


def place_of(case: Case, fault: Fault) -> Place:
    """Where a reader should look."""
    if fault.kind == "two-pass-cache" and isinstance(fault.cause, Update):
        filled = _filled(case.trace, fault.cause, fault.score)
        if filled is not None:
            return filled
    if fault.kind in ("rescoring-after-adaptation", "two-pass-cache") and isinstance(fault.cause, Update):
        place = parting_of(fault.score, fault.before or fault.cause)
        return _repeated(case.trace, fault) if place == fault.score.place else place
    if fault.kind == "multi-epoch-last":
        return _loop_again(case.trace, fault)
    if fault.kind == "calibration-on-validation" and isinstance(fault.cause, Update):
        return _calibrated(case, fault.cause, fault.score)
    if fault.kind == "slot-on-scored" and isinstance(fault.cause, Update):
        return _objective(case.trace, fault.cause)
    if fault.kind == "validation-in-training" and isinstance(fault.cause, Update):
        taken = _taken_in(case, fault.cause, fault.score)
        return taken or _called_as_well(case, fault.cause) or _parted(case.trace, fault.cause) or fault.cause.place
    if fault.kind in ("training-before-scoring", "slot-shared-delta") and isinstance(fault.cause, Update):
        shared = fault.cause.state if fault.kind == "slot-shared-delta" else None
        if shared is not None and "#broadcast" in shared.slots and isinstance(shared.place, Place):
            return shared.place  # made for all windows, as its shape says; else it is handed all of them
        return parting_of(fault.cause, fault.score)
    if fault.kind == "temperature-from-validation":  # the call of what fits it
        return parting_of(fault.cause, fault.score)
    return fault.cause.place


def _called_as_well(case: Case, update: Update) -> Place | None:
    """The call of what takes a step on validation tokens, where the evaluation calls it, too, from elsewhere."""
    data = passes_of(case)[0].data
    for other in case.trace.updates:
        if (
            other.place == update.place
            and other.stack != update.stack
            and any(tok.data in data for tok in other.learned)
        ):
            pairs = zip(reversed(update.stack), reversed(other.stack), strict=False)
            return next((mine for mine, theirs in pairs if mine != theirs), None)
    return None


def own_call(trace: Trace, update: Update) -> Place:
    """The call that leads to an update alone, where other calls lead to its line too; else its line."""
    first = next((each for each in trace.updates if each.place == update.place and each.stack != update.stack), None)
    return update.place if first is None else parting_of(update, first)


def _own_reads(case: Case, update: Update, score: Score) -> list[int]:
    """The reads of validation tokens that an update learned from and that the evaluation did not make."""
    kinds = passes_of(case)[0].data
    scored = {tok.origin for tok in score.targets}
    return sorted({tok.origin for tok in update.learned if tok.data in kinds and tok.origin >= 0} - scored)


def _taken_in(case: Case, update: Update, score: Score) -> Place | None:
    """Where the training's own validation tokens come in; None where they are those that the evaluation has read."""
    own, reads = _own_reads(case, update, score), case.trace.reads
    if not own:
        return None
    first = reads[own[0]]
    if first.mixed:  # one read of both: where its pattern is written, else where its file is asked for
        asked = first.stack[-2] if len(first.stack) > 1 else first.stack[-1]
        return (pattern_at(case, first.pattern) if first.pattern else None) or asked
    mine = {reads[n].stack[:-1] for n in own}  # its header is read apart, in a line of its own
    others = {place for read in reads if read.stack[:-1] not in mine for place in read.stack}
    return next((place for place in first.stack if place not in others), None)


def _filled(trace: Trace, update: Update, score: Score) -> Place | None:
    """Where a table is filled: the line of its loop, the call that fills it at once, or the one of several calls that
    does it early; None where the loop that fills it scores too, and the second pass is the fault."""
    cutting = {loop for tok in update.learned for loop, _, _ in tok.spans}
    own = [each for each in update.nest if each[0] in cutting]
    if own and any(own[0] in each.nest for each in trace.scores):
        return None
    if not own:
        together = {loop for loop, _ in update.nest} & {loop for loop, _ in score.nest}
        return None if together else parting_of(update, score)
    depth = trace.depth.get(own[0][0], 0)
    for other in trace.updates:
        if own[0][0] in dict(other.nest) and other.stack[: depth - 1] != update.stack[: depth - 1]:
            return parting_of(update, other)
    return update.stack[depth - 1] if 0 < depth <= len(update.stack) < 12 else None


def _calibrated(case: Case, update: Update, score: Score) -> Place:
    """Where the model was run on what it was calibrated on; where that was read for it alone, the line that asks for
    it."""
    kinds = {tok.data for tok in update.learned} & passes_of(case)[0].data
    runs = [
        event
        for event in case.trace.events[: update.number]
        if isinstance(event, Forward) and any(tok.data in kinds for tok in event.toks)
    ]
    runs = [run for run in runs if not _scores(case, run)] or runs
    learned = {(tok.data, tok.spans) for tok in update.learned}
    fitting = [event for event in runs if any((tok.data, tok.spans) in learned for tok in event.toks)]
    run = fitting[-1] if fitting else runs[-1] if runs else update
    for origin in _own_reads(case, update, score)[:1]:
        asked = _asked_for(case, origin)
        if asked is not None:
            return asked
    called, handed = run_for(case, run, called_at(run)), _handed_over(case, run, score)
    return max((place for place in (called, handed) if place in run.stack), key=run.stack.index, default=called)


def _scores(case: Case, run: Event) -> bool:
    """Whether losses are made in the call in which the model is run."""
    way = tuple(place for place in run.stack if not _in_a_model(case, place))[:-1]
    return any(score.stack[: len(way)] == way for score in case.trace.scores)


def run_for(case: Case, run: Event, least: Place) -> Place:
    """The call of what runs the model for something. least: at least as far in as this line of the run's way."""
    own = [place for place in run.stack if not _in_a_model(case, place)]
    inside = own[own.index(least) :] if least in own else []
    return inside[-2] if len(inside) > 1 else least


def _in_a_model(case: Case, place: Place) -> bool:
    """Whether a line stands in a class that is a torch module by its own words."""
    return any(
        isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("Module") for base in node.bases)
        and script.line(node.lineno) <= place.line <= script.line(node.end_lineno or node.lineno)
        for script in case.script.all()
        if script.path == place.file
        for node in nodes(script.tree)
    )


def _handed_over(case: Case, run: Event, score: Score) -> Place | None:
    """The innermost call that names what the evaluation's tokens were read into: `collect(model, self.val_tokens)`."""
    reads = [case.trace.reads[tok.origin] for tok in score.targets if tok.origin >= 0]
    lines = {place for read in reads for place in read.stack}
    named: set[str] = set()
    told: dict[Place, set[str]] = {}
    for script in case.script.all():
        for node in nodes(script.tree):
            if isinstance(node, ast.Assign) and Place(script.path, script.line(node.lineno)) in lines:
                named |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, (ast.Name, ast.Attribute)):
                word = node.id if isinstance(node, ast.Name) else node.attr
                told.setdefault(Place(script.path, script.line(node.lineno)), set()).add(word)
    return next((place for place in reversed(run.stack) if told.get(place, set()) & named), None)


def _asked_for(case: Case, origin: int) -> Place | None:
    """The innermost line of a read's calls that leads to no other read: above the loader that the training has, too.
    Where the loader was made in the call of what goes through it, that call."""
    reads = case.trace.reads
    read = reads[origin].stack
    for depth in range(len(read) - 1, -1, -1):
        way = read[: depth + 1]
        if all(each.stack[: depth + 1] == way for each in reads if read[depth] in each.stack):
            others = [each.stack[depth] for each in reads[:origin] if each.stack[:depth] == way[:-1] != each.stack]
            own = _function_of(case, way[-1])
            made = depth > 1 and any(_function_of(case, other) != own for other in others)
            return way[-2] if made else way[-1]
    return None


def _function_of(case: Case, place: Place) -> int:
    """The line of the innermost function around a place; 0 outside of any."""
    scripts = (each for each in case.script.all() if each.path == place.file and each.tree is not None)
    lines = (
        script.line(node.lineno)
        for script in scripts
        for node in nodes(script.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and script.line(node.lineno) <= place.line <= script.line(node.end_lineno or node.lineno)
    )
    return max(lines, default=0)


def called_at(event: Event) -> Place:
    """The line of the main program in which something happens."""
    return event.stack[1] if len(event.stack) > 2 else event.place


def _loop_again(trace: Trace, fault: Fault) -> Place:
    """The loop that goes over the same tokens again."""
    turns = dict((fault.before or fault.cause).nest)
    cut = {loop for tok in fault.score.targets for loop, _, _ in tok.spans}
    for loop, turn in fault.score.nest:
        if turns.get(loop, turn) != turn and loop not in cut:
            return trace.loops.get(loop, fault.score.place)
    return fault.score.place


def _objective(trace: Trace, update: Update) -> Place:
    """Where the loss that a vector follows is made, in the function that optimises it."""
    followed = [trace.scores[bit] for bit in bits(update.losses)]
    depth = len(update.stack)
    for score in reversed(followed):
        if score.whole and score.stack[: depth - 1] == update.stack[:-1] and len(score.stack) >= depth:
            return score.stack[depth - 1]
    return _parted(trace, update) or update.place


def _parted(trace: Trace, update: Update) -> Place | None:
    """Where the loss that a step follows is made, in the last function that both stand in: the step may be taken by a
    helper that is handed the loss."""
    for bit in reversed(list(bits(update.losses))):
        score = trace.scores[bit]
        shared = next((n for n, (a, b) in enumerate(zip(score.stack, update.stack, strict=False)) if a != b), 0)
        if shared:
            return score.stack[shared]
    return None


def _repeated(trace: Trace, fault: Fault) -> Place:
    """The call in the body of the loop that repeats the pass."""
    turns = dict((fault.before or fault.cause).nest)
    for loop, turn in fault.score.nest:
        depth = trace.depth.get(loop, 0)
        if turns.get(loop, turn) != turn and 0 < depth <= len(fault.score.stack):
            return fault.score.stack[depth - 1]
    return fault.score.place


def parting_of(event: Event, other: Event) -> Place:
    """The call in which two events part: of the first, the line in the last function that both stand in."""
    for mine, theirs in zip(event.stack, other.stack, strict=False):
        if mine != theirs:
            return mine
    return event.place


def way(trace: Trace, fault: Fault, said: tuple[Said, ...]) -> tuple[Step, ...]:
    """From the reported number back to the cause."""
    steps: list[Step] = []
    for each in said[:1]:
        steps.append(Step(_outer(each), f"the number is reported: {each.text[:80].strip()!r}"))
    score = fault.score
    steps += [Step(place, "through this call") for place in score.stack[1:-1][-3:]]
    steps.append(Step(score.place, "the loss is computed"))
    if fault.before is not None:
        steps.append(Step(fault.before.place, "the same tokens were scored here before"))
    cause = fault.cause
    if isinstance(cause, Update):
        steps += [Step(place, "through this call") for place in cause.stack[1:-1][-3:]]
        steps.append(Step(cause.place, f"what scores them learned here ({cause.how}) from the tokens that are scored"))
    else:
        steps.append(Step(cause.place, f"a choice is made here by comparing losses ({cause.form})"))
    return tuple(steps)


def _outer(said: Said) -> Place:
    """Where a message was written, not the log helper that prints it."""
    return said.stack[1] if len(said.stack) > 1 and not said.nest else said.place


_SAID = {
    "rescoring-after-adaptation": (
        "The reported loss at {score} is a second pass: the model adapted at {cause} on these tokens after they "
        "were first scored at {before}."
    ),
    "training-before-scoring": (
        "The model that scores at {score} was trained at {cause} on the validation tokens that it scores, before "
        "they were scored."
    ),
    "multi-epoch-last": (
        "Validation tokens are scored at {score} again in each epoch after training on them at {cause}; the last "
        "epoch's losses are what is reported."
    ),
    "two-pass-cache": (
        "The table filled at {cause} already holds the validation tokens that are scored with it at {score}."
    ),
    "slot-on-scored": (
        "The vector optimised at {cause} on the loss of the scored positions is what scores them at {score}."
    ),
    "slot-shared-delta": (
        "One vector, optimised at {cause} on the context of all windows of a batch, scores them at {score}: a "
        "later window's context holds the targets of an earlier one."
    ),
    "temperature-from-validation": (
        "A scale of the logits at {score} is fitted or chosen at {cause} by the loss of the validation tokens that "
        "are scored."
    ),
    "choice-by-validation": (
        "The weights that score at {score} were chosen at {cause} by comparing validation losses."
    ),
    "min-over-passes": ("The reported loss is the best of several passes over the same tokens, chosen at {cause}."),
    "calibration-on-validation": (
        "The weights that score at {score} were computed at {cause} from activations on the validation tokens."
    ),
    "validation-in-training": ("The training at {cause} reads the validation tokens that are scored at {score}."),
}


def _sentence(fault: Fault) -> str:
    before = fault.before.place if fault.before is not None else fault.score.place
    return _SAID[fault.kind].format(score=fault.score.place, cause=fault.cause.place, before=before)
