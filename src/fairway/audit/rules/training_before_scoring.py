"""The model is trained on validation tokens before it scores them."""

from collections.abc import Iterator
from dataclasses import replace

from fairway.audit.case import Case
from fairway.audit.exemptions import Made, departures
from fairway.audit.passes.charged import all_of_tables, of_no_step, passes_of
from fairway.audit.passes.findings import verdict_on
from fairway.audit.passes.phases import phase_of
from fairway.audit.passes.places import own_call
from fairway.audit.passes.rehearsals import thrown_away
from fairway.audit.passes.trials import counts_of, learned_first, lesson_before, reached_too_far
from fairway.audit.verdict import Finding
from fairway.audit.weighing import as_foreseen

ID = "training-before-scoring"
CHARGE = "the model is trained on validation tokens before it scores them"
CLAUSE = 'RULES.md (b) conditions 1 and 3, R5, R6; (c) "Pre-eval TTT", "Pre-quant TTT"'
APART = "weighing"


def check(case: Case) -> Finding:
    found = verdict_on(case, ID, CLAUSE, "Nothing that scores had been trained on the tokens that it scores.")
    found = as_foreseen(case, found) if all_of_tables(case, ID) else found
    phase = phase_of(case) if found.verdict == "clean" else None
    early = learned_first(case, passes_of(case)[0], phase) if phase is not None else None
    if early is not None:
        return Finding(ID, "violates", early[0], CLAUSE, case.place(early[1]))
    made = list(_departures(case)) if found.verdict == "clean" else []
    shown = _by_trial(case, found) if thrown_away(case) is None else found
    further = (
        reached_too_far(case, passes_of(case)[0]) if found.verdict == "violates" and not all_of_tables(case, ID) else 0
    )
    shown = replace(shown, place=case.place(further)) if further else shown
    return departures(case, CLAUSE, made) if made and shown.verdict == "clean" else shown


def _by_trial(case: Case, found: Finding) -> Finding:
    """What the trial shows where the walk charges the score with no step."""
    which, _, _ = passes_of(case)
    counts = counts_of(case, which) if found.verdict == "clean" and of_no_step(case) else None
    shown = lesson_before(case, which, counts) if counts is not None else None
    if shown is None:
        return found
    evidence, line = shown
    return Finding(ID, "violates", evidence, CLAUSE, case.place(line))


def _departures(case: Case) -> Iterator[Made]:
    phase = phase_of(case)
    if phase is not None:
        evidence = (
            f"At {phase.place} the model itself learns from documents that were scored, beside the adapters that are "
            "made for each of them, and scores the rest with what it learned."
        )
        yield Made("phased-adaptation", evidence, own_call(case.trace, phase))
    warming = thrown_away(case)
    if warming is not None:
        lost = "its rate moves no weight" if warming.still else "what it learned is thrown away before the score"
        evidence = f"A step at {warming.place} learns from validation tokens before they are scored; {lost}."
        yield Made("warm-up-on-validation", evidence, own_call(case.trace, warming))
