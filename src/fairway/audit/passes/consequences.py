"""Faults that are nothing but another fault seen again: one deed, one charge."""

from __future__ import annotations

from collections.abc import Sequence

from fairway.audit.flow.events import Forward, Trace, Update
from fairway.audit.passes.faults import Fault
from fairway.audit.verdict import Place


def without_consequences(trace: Trace, faults: list[Fault], data: frozenset[str]) -> list[Fault]:
    """The faults, but for a calibration on what the training's own loader gives: training on it is the charge."""
    taught = [fault.cause for fault in faults if fault.kind == "validation-in-training"]
    reads = {tok.origin for cause in taught if isinstance(cause, Update) for tok in cause.learned if tok.data in data}
    scored = {tok.origin for fault in faults for tok in fault.score.targets}
    return [
        fault
        for fault in faults
        if fault.kind != "calibration-on-validation"
        or not isinstance(fault.cause, Update)
        or not all(
            tok.origin in reads or _by_one_loader(trace, tok.origin, reads, scored)
            for tok in fault.cause.learned
            if tok.data in data
        )
    ]


def _by_one_loader(trace: Trace, origin: int, reads: set[int], scored: set[int]) -> bool:
    """Whether a read shares more of its innermost calls with a read of the training than with one of the evaluation."""
    if origin < 0 or not reads:
        return False
    stack = trace.reads[origin].stack
    taught = max(_alike(stack, trace.reads[each].stack) for each in reads if each >= 0)
    return taught > max((_alike(stack, trace.reads[each].stack) for each in scored if each >= 0), default=0)


def _alike(one: Sequence[Place], other: Sequence[Place]) -> int:
    """How many calls two stacks share at their inner end."""
    count = 0
    for mine, theirs in zip(reversed(one), reversed(other), strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def ran_on(trace: Trace, update: Update, data: frozenset[str]) -> bool:
    """Whether a model was run on the validation tokens that an update holds: they may be activations. Token ids that
    were only stored beside the weights have gone through no loop of a run."""
    for tok in update.learned:
        loops = {loop for loop, _, _ in tok.spans}
        for event in trace.events[: update.number] if tok.data in data else ():
            if isinstance(event, Forward) and any(
                run.data == tok.data and run.origin == tok.origin and {loop for loop, _, _ in run.spans} <= loops
                for run in event.toks
            ):
                return True
    return False
