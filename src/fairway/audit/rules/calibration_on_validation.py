"""Quantisation is calibrated on validation tokens."""

from fairway.audit.case import Case
from fairway.audit.flow.events import Update
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.consequences import ran_on
from fairway.audit.passes.findings import verdict_on
from fairway.audit.rules import paid_prefix
from fairway.audit.verdict import Finding

ID = "calibration-on-validation"
CHARGE = "quantisation is calibrated on validation tokens"
CLAUSE = 'RULES.md (b) condition 1, R5; (c) "GPTQ on val"'
_CLEAN = "The weights hang on no activations of validation tokens."


def check(case: Case) -> Finding:
    finding = verdict_on(case, ID, CLAUSE, _CLEAN)
    if finding.verdict in ("violates", "suspect") and _only_stored(case):
        return Finding(ID, "clean", _CLEAN, CLAUSE)
    return finding


def _only_stored(case: Case) -> bool:
    """Whether the validation tokens in the weights' file are ids that were put there, which another rule says."""
    which, own, beside = passes_of(case)
    causes = [fault.cause for fault in (*own, *beside) if fault.kind == ID]
    stored = all(isinstance(each, Update) and not ran_on(case.trace, each, which.data) for each in causes)
    return stored and paid_prefix.check(case).verdict == "violates"
