"""Overlapping windows count all their targets, so that most tokens are counted several times."""

from fairway.audit.case import Case
from fairway.audit.flow.events import bits
from fairway.audit.flow.tokens import Tok
from fairway.audit.passes.findings import passes_of, unseen
from fairway.audit.verdict import Finding

ID = "twice-counted-tokens"
CHARGE = "tokens are counted in more than one window"
CLAUSE = "RULES.md (b) condition 4: every token contributes exactly one loss"


def check(case: Case) -> Finding:
    which, _, _ = passes_of(case)
    if not which.score:
        return unseen(case, ID, CLAUSE)
    booked = 0
    for said in which.score:
        booked |= said.value.losses
    for bit in bits(booked):
        score = case.trace.scores[bit]
        whole = [tok for tok in score.targets if tok.data in which.data]
        if whole and all(tok.step and _tail_of(tok) > tok.step for tok in whole):
            evidence = (
                f"Windows move on by {whole[0].step} tokens, and the loss at {score.place} counts the last "
                f"{_tail_of(whole[0])} of each: tokens are counted several times."
            )
            return Finding(ID, "violates", evidence, CLAUSE, score.place)
        if whole and all(tok.wide and not _tail(tok) for tok in whole):
            evidence = (
                f"Windows overlap, and the loss at {score.place} counts all their targets: "
                "tokens are counted several times."
            )
            return Finding(ID, "violates", evidence, CLAUSE, score.place)
    return Finding(ID, "clean", "No window counts targets that another one counts.", CLAUSE, which.score[0].place)


def _tail(tok: Tok) -> bool:
    """Whether only the last targets of a window are counted: a cut at a constant, or at `length - stride`."""
    return any(side == "tail" and (less or end.lstrip("-").isdigit()) for side, end, less in tok.cuts)


def _tail_of(tok: Tok) -> int:
    """How many targets of a window are counted, where a number says so: `[-64:]`, `[length - 64:]`; else 0."""
    tails = [less for side, _, less in tok.cuts if side == "tail" and len(less) == 1]
    numbers = [int(each) for less in tails for each in less if each.isdigit()]
    return min(numbers) if numbers and len(numbers) == len([cut for cut in tok.cuts if cut[0] == "tail"]) else 0
