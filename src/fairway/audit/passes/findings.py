"""From faults to a rule's verdict, with its place, its way and a sentence that can be pasted."""

from __future__ import annotations

from fairway.audit.case import Case
from fairway.audit.flow.events import Said, Trace, Update
from fairway.audit.passes.charged import chosen_by_losses, is_gate, of_no_step, passes_of
from fairway.audit.passes.faults import Fault
from fairway.audit.passes.places import place_of
from fairway.audit.passes.reported import Reported, is_diagnosis
from fairway.audit.passes.rounds import best_of, passed_again
from fairway.audit.passes.trials import counts_of
from fairway.audit.passes.vectors import fitted_to_scored
from fairway.audit.verdict import Finding, Place, Step, Verdict


def verdict_on(case: Case, rule: str, clause: str, clean: str) -> Finding:
    """The rule's finding: a violation in the score, else what is only printed beside it, else clean or cannot tell."""
    which, own, beside = passes_of(case)
    mine = [fault for fault in own if fault.kind == rule and not is_gate(case, fault)]
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


def passes_on(case: Case, rule: str, clause: str, clean: str) -> Finding:
    """The same of several passes, as a trial counts them: where the walk finds no step at fault, or, of the best of
    several, no choice."""
    found = verdict_on(case, rule, clause, clean)
    which, _, _ = passes_of(case)
    counts = counts_of(case, which) if found.verdict == "clean" and not chosen_by_losses(case) else None
    told = (
        (passed_again(case, which, counts) if of_no_step(case) else None, best_of(counts)) if counts is not None else ()
    )
    shown = next((each for each in told if each is not None and each[0] == rule), None)
    return found if shown is None else Finding(rule, "violates", shown[1], clause, case.place(shown[2]))


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
