"""Validation tokens are read by the training."""

import ast

from fairway.audit.case import Case
from fairway.audit.flow.tokens import UNTOLD
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.findings import verdict_on
from fairway.audit.reading.tree import nodes
from fairway.audit.verdict import Finding

ID = "validation-in-training"
CHARGE = "validation tokens are read by the training"
CLAUSE = 'RULES.md R5; (c) "Val-only training"'


_GRADIENTS = frozenset(("backward", "value_and_grad", "grad_and_value"))
_MADE_UP = frozenset(("random", "generated"))


def check(case: Case) -> Finding:
    found = verdict_on(case, ID, CLAUSE, "Training reads no validation tokens.")
    if found.verdict != "clean":
        return found
    scored = passes_of(case)[0].data
    learned = {tok.data for update in case.trace.updates for tok in update.learned} - scored - _MADE_UP
    evidence = ""
    if all(any(kind.startswith(UNTOLD) for kind in kinds) for kinds in (scored, learned)):
        evidence = "Nothing here tells the files that are trained on from those that are scored."
    elif not learned and _unfollowed(case):
        evidence = (
            "Gradients are taken by the script that no step was seen to follow: what its training reads is not known."
        )
    return Finding(ID, "cannot tell", evidence, CLAUSE, found.place) if evidence else found


def _unfollowed(case: Case) -> bool:
    """Whether gradients are taken in more places than steps were seen to follow them."""
    calls = [node.func for script in case.script.all() for node in nodes(script.tree) if isinstance(node, ast.Call)]
    names = [call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls]
    followed = {update.place for update in case.trace.updates if update.how == "gradient"}
    return sum(name in _GRADIENTS for name in names) > len(followed)
