"""Choices that read nothing but losses of what came before the tokens whose scoring they decide."""

import itertools
from collections.abc import Callable, Iterable

from fairway.audit.flow.events import Choice, Score, Trace
from fairway.audit.flow.tokens import ALL_BEFORE, Tok, related
from fairway.audit.verdict import Place

Holds = Callable[[Tok, Tok, Score], bool]


def _compares(trace: Trace, choice: Choice, holds: Holds) -> bool | None:
    """Whether it holds of all tokens whose losses a choice compares, and of the target of each loss that hangs on it;
    None where none does, as of the last turn's choice for the next. Of losses of whole windows, of which only a part
    counts, that part is asked."""
    compared = [tok for score in trace.scored(choice.losses) for tok in score.targets]
    hanging = [score for score in trace.scores if score.choices >> choice.bit & 1 and score.number > choice.number]
    divided = 0
    for score in hanging:
        divided |= score.whole
    decided = [score for score in hanging if not divided >> score.bit & 1]
    if not decided:
        return None
    asked = ((tok, target, score) for tok in compared for score in decided for target in score.targets)
    return bool(compared) and all(itertools.starmap(holds, asked))


def _before(tok: Tok, target: Tok, score: Score) -> bool:
    how = related(tok, target, [loop for loop, _ in score.nest])
    return how == "earlier" or (how == "apart" and any(end.startswith(ALL_BEFORE) for _, end, _ in tok.cuts))


def _apart(tok: Tok, target: Tok, score: Score) -> bool:
    return related(tok, target, [loop for loop, _ in score.nest]) in ("earlier", "apart")


def by_the_past(trace: Trace, choice: Choice) -> bool:
    """Whether all losses that a choice compares are of earlier tokens than each loss that hangs on it."""
    return bool(_compares(trace, choice, _before))


def places_of_the_past(trace: Trace) -> set[Place]:
    """The lines in which every choice is one by the past."""
    return _everywhere(trace, _before)


def places_of_others(trace: Trace) -> set[Place]:
    """The lines in which every choice compares losses of other tokens alone than those that hang on it: of a window's
    context, whose head ends where what is scored of the window begins."""
    return _everywhere(trace, _apart)


def places_of_contexts(trace: Trace, scored: Iterable[Score]) -> set[Place]:
    """The lines in which a mask leaves of losses only those of other tokens than are scored, `(nll * ~fresh).sum(1)`
    beside `nll[fresh]`: of the context of each window. scored: the losses that the score sums; what both masks pick is
    of the context, which decides how strongly something is mixed, and none of them."""
    targets = [(tok, score) for score in scored for tok in score.targets if not _of_both(tok)]
    held: dict[Place, bool] = {}
    for part in trace.scores:
        if part.whole and part.targets and targets:
            apart = all(_apart(tok, target, score) for tok in part.targets for target, score in targets)
            held[part.place] = held.get(part.place, True) and apart
    return {place for place, apart in held.items() if apart}


def _of_both(tok: Tok) -> bool:
    """Whether a mask and its opposite were both applied."""
    heads = {(end, names) for side, end, names in tok.cuts if side == "head"}
    return any((end, names) in heads for side, end, names in tok.cuts if side == "tail")


def _everywhere(trace: Trace, holds: Holds) -> set[Place]:
    told = [(choice.place, _compares(trace, choice, holds)) for choice in trace.choices]
    return {place for place, held in told if held} - {place for place, held in told if held is False}
