"""Overlapping windows count all their targets, so that most tokens are counted several times."""

import ast
import re
from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.exemptions import departure
from fairway.audit.flow.events import Score, bits
from fairway.audit.flow.linear import difference
from fairway.audit.flow.tokens import Tok
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.documents import with_short
from fairway.audit.passes.findings import unseen
from fairway.audit.passes.parted import counted_by_several
from fairway.audit.passes.places import of_another
from fairway.audit.passes.reported import Reported, scores_of
from fairway.audit.passes.trials import FEW, counts_of, repeated
from fairway.audit.reading.tree import nodes
from fairway.audit.terms.windows import begun, cut, listed, masked
from fairway.audit.verdict import Finding, Place

ID = "twice-counted-tokens"
CHARGE = "tokens are counted in more than one window"
CLAUSE = "RULES.md (b) condition 4: every token contributes exactly one loss"

_OWN_PLACE = re.compile(r"\bsub\(\w+,\w+\)")


def check(case: Case) -> Finding:
    which, _, _ = passes_of(case)
    if not which.score:
        return unseen(case, ID, CLAUSE)
    booked = 0
    for said in which.score:
        booked |= said.value.losses
    tails, how = None, ""
    counts = counts_of(case, which)
    once = counts is not None and not len(counts.more) and len(counts.missing) < FEW  # whatever the symbols say
    read = [[tok for tok in case.trace.scores[bit].targets if tok.data in which.data] for bit in bits(booked)]
    following = any(tok.shift for whole in read for tok in whole)  # what follows its context is no hint
    for bit, all_of_it in zip(bits(booked), read, strict=True):
        score = case.trace.scores[bit]
        whole = [tok for tok in all_of_it if tok.shift or not following]
        if not whole:
            continue
        again = _again(whole) if not once else ""
        if again:
            return Finding(ID, "violates", again.format(place=score.place), CLAUSE, _decided(case, score))
        if tails is None and all(_tail_window(tok) for tok in whole) and not _only_whole_windows(case):
            tails = score
            how = f"windows grow shorter, and the loss at {{place}} counts the last {whole[0].step} tokens of each"
        elif tails is None and all(_pushed_back(tok) for tok in whole):
            tails = score
            how = "a window is pushed back into the data, and the loss at {place} counts as many of its targets as ever"
    shown = repeated(counts) if counts is not None else ""
    short = with_short(case, which) if not shown and counts is not None else None
    shown = repeated(short) if short is not None else shown
    if shown:
        return Finding(ID, "violates", shown, CLAUSE, _decided(case, which_score(case, which)))
    parts = counted_by_several(case, which)
    if parts is not None:
        twice, many, line = parts
        how = (
            "begins before its own share, or ends behind it" if many == 2 else "fills its share up with what is scored"
        )
        evidence = (
            f"Each process {how}, and counts what it reads: of {many} over a short text {twice:,} targets are "
            "counted by more than one, or more than once."
        )
        return Finding(ID, "violates", evidence, CLAUSE, case.place(line))
    if tails is not None:
        evidence = f"At the end of the data {how.format(place=tails.place)}: some are counted again."
        return departure(case, "small-tail", CLAUSE, evidence, _in_the_windows_loop(case, tails))
    return Finding(ID, "clean", "No window counts targets that another one counts.", CLAUSE, which.score[0].place)


def which_score(case: Case, which: Reported) -> Score:
    """The last loss that the score sums."""
    return scores_of(case.trace, which.score, which.data)[-1]


def _decided(case: Case, score: Score) -> Place:
    """Where it is decided what counts of a window: the plan that the trial saw to overlap; where each target is planned
    once, or no plan was seen, the end or the mask of what counts; else the plan, or the loop over the windows."""
    plans = case.trial.plans
    if plans.overlapping and not of_another(case, [score], plans.overlapping):
        return case.place(plans.overlapping)
    terms = (said(gates.of) for said in (begun, masked, listed, cut) for gates in case.reading.gates)
    term = next((term for term in terms if term is not None), None)
    if term is not None:
        return _narrowed(case, score) or case.reading.place(term)
    own = plans.line and not of_another(case, [score], plans.line)
    return case.place(plans.line) if own else _in_the_windows_loop(case, score)


def _narrowed(case: Case, score: Score) -> Place | None:
    """The one line that makes a stride smaller than what it is named for, `torch.arange(start, end, stride // 2)`, and
    that is none of another evaluation's."""
    lines = {
        node.lineno
        for node in nodes(case.body.tree)
        if isinstance(node, ast.Call) and len(node.args) == 3 and ast.unparse(node.func).endswith("range")
        if isinstance(node.args[2], ast.BinOp) and isinstance(node.args[2].op, (ast.FloorDiv, ast.Sub, ast.Div))
        if not isinstance(node.args[2].left, ast.Constant)
    }
    places = [case.place(line) for line in lines if not of_another(case, [score], line)]
    return places[0] if len(places) == 1 else None


def _in_the_windows_loop(case: Case, score: Score) -> Place:
    """The line of the loop over windows in which they are scored: a helper that makes losses knows nothing of them."""
    cutting = {loop for tok in score.targets for loop, _, _ in tok.spans}
    depths = [case.trace.depth.get(loop, 0) for loop, _ in score.nest if loop in cutting]
    depth = max(depths, default=0)
    return score.stack[depth - 1] if 0 < depth <= len(score.stack) else score.place


def _again(whole: list[Tok]) -> str:
    """How most tokens are counted several times, as a sentence; "" where they are not."""
    for counted in (_tail_of, _between):
        if all(tok.step and counted(tok) > tok.step for tok in whole):
            return (
                f"Windows move on by {whole[0].step} tokens, and the loss at {{place}} counts {counted(whole[0])} of "
                "each: tokens are counted several times."
            )
    if all(tok.wide and not _tail(tok) for tok in whole):
        return "Windows overlap, and the loss at {place} counts all their targets: tokens are counted several times."
    return ""


def _between(tok: Tok) -> int:
    """How many targets of a window lie between the two ends of what is counted, where that is a number; else 0."""
    ends = [[end for side, end, _ in tok.cuts if side == name] for name in ("head", "tail")]
    lengths = [difference(head, tail) for head in ends[0] for tail in ends[1]]
    return min((length for length in lengths if length is not None), default=0)


def _tail_window(tok: Tok) -> bool:
    """Whether the last `step` targets of each window are counted, from an end that is the data's in the last ones: not
    from the window's own place, `w - begin + ...`, wherever the window itself begins."""
    clipped = [
        less
        for side, end, less in tok.cuts
        if side == "tail" and end.startswith("~") and not (tok.pushed and _OWN_PLACE.search(end))
    ]
    return bool(tok.step) and any(str(tok.step) in less for less in clipped)


def _pushed_back(tok: Tok) -> bool:
    """Whether a window begins earlier than its turn says, so as to end with the data, and a number says from which of
    its targets on they are counted."""
    tails = [less for side, end, less in tok.cuts if side == "tail" and not end.startswith("~")]
    return tok.pushed and len(tails) == 1 and bool(tails[0]) and all(each.isdigit() for each in tails[0])


def _only_whole_windows(case: Case) -> bool:
    """Whether beginnings of windows are held against the end of the data, so that no short window begins."""
    for script in case.script.all():
        for node in nodes(script.tree):
            for name, inside in _strided(node):
                if any(_holds(part, name) for each in inside for part in nodes(each)):
                    return True
    return False


def _strided(node: ast.AST) -> Iterator[tuple[str, list[ast.AST]]]:
    """The variable of a loop over range(a, b, step), and what stands in the loop; nothing for range(a, b - length)."""
    loops: list[tuple[ast.expr, ast.expr, list[ast.AST]]] = []
    if isinstance(node, ast.For):
        loops.append((node.target, node.iter, list(node.body)))
    for each in getattr(node, "generators", []):
        loops.append((each.target, each.iter, list(each.ifs)))
    for target, source, inside in loops:
        ranged = isinstance(source, ast.Call) and ast.unparse(source.func) == "range" and len(source.args) == 3
        if ranged and isinstance(target, ast.Name):
            yield target.id, inside


def _holds(test: ast.AST, name: str) -> bool:
    """w + length <= total; not min(w + length, total) - w >= stride or end - w < stride, which holds a length against
    the stride."""
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or isinstance(test.ops[0], (ast.Eq, ast.NotEq)):
        return False
    return any(
        isinstance(side, ast.BinOp)
        and any(isinstance(part, ast.Name) and part.id == name for part in nodes(side))
        and not (isinstance(side.op, ast.Sub) and isinstance(side.right, ast.Name) and side.right.id == name)
        and not any(isinstance(part, ast.Call) for part in nodes(side))
        for side in (test.left, *test.comparators)
    )


def _tail(tok: Tok) -> bool:
    """Whether only the last targets of a window are counted: a cut at a constant, or at `length - stride`."""
    return any(side == "tail" and (less or end.lstrip("-").isdigit()) for side, end, less in tok.cuts)


def _tail_of(tok: Tok) -> int:
    """How many targets of a window are counted, where a number says so: `[-64:]`, `[length - 64:]`; else 0."""
    tails = [less for side, _, less in tok.cuts if side == "tail" and len(less) == 1]
    numbers = [int(each) for less in tails for each in less if each.isdigit()]
    return min(numbers) if numbers and len(numbers) == len([cut for cut in tok.cuts if cut[0] == "tail"]) else 0
