"""A hint, a weight or a switch depends on the very token that is scored: does it start a word, how likely was it."""

import ast
from collections import Counter

from fairway.audit.case import Case
from fairway.audit.flow.events import Score
from fairway.audit.passes.charged import chosen_by_losses, passes_of
from fairway.audit.passes.past import places_of_contexts, places_of_the_past
from fairway.audit.passes.reaching import around
from fairway.audit.passes.reported import scores_of
from fairway.audit.reading.guesses import Answer, answers
from fairway.audit.reading.tree import last_name, nodes
from fairway.audit.terms.choices import is_product
from fairway.audit.terms.gates import Gates
from fairway.audit.terms.mixtures import gold_ratios, spread_over_bytes
from fairway.audit.terms.term import Term, walk
from fairway.audit.terms.verdicts import clean, unsaid
from fairway.audit.verdict import Finding, Place
from fairway.audit.weighing import PIECES
from fairway.audit.weighing.alternatives import Weight, is_whole
from fairway.audit.weighing.foreseeing import learned_before

ID = "target-gated-tilt"
CHARGE = "a tilt, a mixing weight or a gate reads the target"
CLAUSE = 'RULES.md (b) 1, (c) "n-gram tilt, target-gated" and "Target-keyed mixing gate"'
APART = "weighing"

_LEAST = frozenset(("argmin", "argmax", "nanargmin", "min", "max", "amin", "amax"))
_OFF = 1e-3  # from one: no rounding


def check(case: Case) -> Finding:
    reading = case.reading
    past = places_of_the_past(case.trace) if reading.gates else set()
    contexts = places_of_contexts(case.trace, _scored(case)) if reading.gates else set()

    def settled(term: Term) -> bool:
        by_the_past = term.called in _LEAST and reading.place(term) in past
        return by_the_past or (is_product(term) and reading.place(term) in contexts)

    for each in reading.gates:
        gates = Gates(each.of, settled) if past or contexts else each
        if any(
            next(found, None) is not None for found in (gates.oracles(), spread_over_bytes(gates), gold_ratios(gates))
        ):
            continue  # oracle-gate, byte-mixture and gold-token-ngram say it
        term = next((one for one in gates.gated() if reading.place(one) not in past or gates.looks_up(one)), None)
        if term is not None and not chosen_by_losses(case) and not _least_of_passes(case):
            evidence = (
                "What is mixed into the prediction, or how strongly, is decided by the token that is being scored; "
                "with another target at the same place the distribution would be another."
            )
            origin = gates.origin(term)
            if origin is term and not gates.asks_the_answer(term) and _is_whole(case):
                evidence = (
                    "Worked out with a made-up model over a short text: what the script says of all tokens that may "
                    "stand at one place adds up to one, as it does where the target decides nothing."
                )
                return clean(ID, CLAUSE, evidence)
            if origin is term and _of_one_row(case, gates, term):
                evidence = (
                    "Worked out with a made-up model over a short text: whichever token stands at one place, it is "
                    "read from the one row."
                )
                return clean(ID, CLAUSE, evidence)
            way = reading.way(gates.of.term, term, origin)
            return Finding(ID, "violates", evidence, CLAUSE, _asked_at(case, term, origin), way)
    if not reading.reported:
        return unsaid(ID, CLAUSE)
    answer = _of_a_guess(case)
    if answer is not None:
        read, stored = (case.body.line(line) for line in answer)
        evidence = (
            "The loop that hands out a hint for each token, and learns the token after it, reads the token at line "
            f"{read} already: what stands at line {stored} was worked out of it, or under a condition that was."
        )
        return Finding(ID, "violates", evidence, CLAUSE, case.place(answer.line))
    weight = _of_another_row(case)
    if weight is not None:
        evidence = (
            "Worked out with a made-up model over a short text: the row over the vocabulary that a token is read from "
            "sums to one, and is another for another token in the same context."
        )
        return Finding(ID, "violates", evidence, CLAUSE, case.place(weight.line))
    weight = _of_another_bonus(case)
    if weight is not None:
        evidence = (
            "Worked out with a made-up model over a short text: how strongly the hint is raised at one place is "
            f"another for another token that stands there; all {PIECES} of them come to {weight.total:.4f}."
        )
        return Finding(ID, "violates", evidence, CLAUSE, case.place(weight.gate))
    weight = _of_one_softmax(case)
    if weight is not None:
        evidence = (
            "The loss is read off one softmax, which sums to one whatever its logits are; worked out with a made-up "
            f"model over a short text, all tokens that may stand at one place come to {weight.total:.4f}: the logits "
            "are others for another target."
        )
        line = weight.stored or weight.line
        place = case.place(line) if line else case.reading.place(case.reading.gates[0].of.term)
        return Finding(ID, "violates", evidence, CLAUSE, place)
    return clean(ID, CLAUSE, "weights, hints and switches of the scored losses read the context alone")


def _of_a_guess(case: Case) -> Answer | None:
    """A loop whose guesses come to what is scored, and hang on what they are of."""
    found = sorted(set(answers(case.body.tree)))
    places = {case.reading.place(term) for gates in case.reading.gates for term in gates.nodes} if found else set()
    return next((each for each in found if case.place(each.stored) in places), None)


def _scored(case: Case) -> list[Score]:
    which = passes_of(case)[0]
    return scores_of(case.trace, which.score, which.data)


def _asked_at(case: Case, term: Term, origin: Term) -> Place:
    """Where the target is asked: in a helper that others call as well, for the bytes of a token, the line that calls it
    before what it decides."""
    place, decides = case.reading.place(origin), case.reading.place(term)
    helper, own = (around(case, each.line) for each in (place, decides))
    if place.file != case.body.path or helper is None or own is None:
        return place
    called = [each for each in nodes(case.body.tree) if isinstance(each, ast.Call)]
    calls = [each.lineno for each in called if last_name(each.func) == helper.name]
    if helper is own:  # the loss of one row decides what another is made of: the first of the two
        callers = Counter(around(case, line) for line in calls)
        twice = [line for line in calls if callers[around(case, line)] > 1]
        return case.place(min(twice)) if twice else place
    before = [line for line in calls if own.lineno <= line <= decides.line]
    return case.place(max(before)) if before and len(calls) > 1 else place


def _of_one_row(case: Case, gates: Gates, term: Term) -> bool:
    """Whether a weight, `share * pointer`, that nothing of the target decides is read from one row whichever token
    stands there, each kind of them tried: it is given what it predicts, and masks it."""
    weighs = is_product(term) and not any(gates.matches(one) for one in walk(term))
    return weighs and case.weight is not None and case.weight.same


def _least_of_passes(case: Case) -> bool:
    """Whether the lower of two passes' losses is kept for each token, which hangs on it: another rule says it."""
    return any(fault.kind == "min-over-passes" for fault in passes_of(case)[1])


def _of_another_row(case: Case) -> Weight | None:
    """What is said of a token where its row hangs on it, and nothing is seen to have learned of it before."""
    weight = case.weight
    return weight if weight is not None and weight.differs and not learned_before(case) else None


def _of_another_bonus(case: Case) -> Weight | None:
    """What all tokens come to where the bonus of a hint hangs on the token, and nothing had learned of it before."""
    weight = case.weight
    return weight if weight is not None and weight.gate and not learned_before(case) else None


def _of_one_softmax(case: Case) -> Weight | None:
    """What all tokens come to, where that is not one and nothing had learned of them before they were scored."""
    gates = case.reading.gates
    whole = bool(gates) and all(is_whole(each.of.term) for each in gates)
    weight = case.weight if whole and not passes_of(case)[1] else None
    if weight is None or abs(weight.total - 1.0) < _OFF or case.foresees:
        return None
    return weight


def _is_whole(case: Case) -> bool:
    """Whether all tokens come to one. It says nothing of a table that is looked up by the target (does it begin a
    word), nor of how likely the answer was: of a made-up text's few pieces all may be alike there."""
    weight = case.weight
    return weight is not None and weight.whole
