"""A part of the validation tokens is scored and reported as all of them."""

from fairway.audit.case import Case
from fairway.audit.flow.events import Score
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.findings import unseen
from fairway.audit.passes.limits import by_length, cut_short, lets_all_through, stated_at
from fairway.audit.passes.reported import Reported, scores_of
from fairway.audit.passes.trials import counts_of, left_out
from fairway.audit.records import record_of
from fairway.audit.verdict import Finding, Place

ID = "subset-as-full"
CHARGE = "a part of the validation tokens is reported as all"
CLAUSE = 'RULES.md R7; (c) "Subset reported as full"'
APART = "parts"

BYTES = 151_080_891  # of the validation split (RULES.md R7)
RANKS = 8  # a rank that tells of its own share tells of an eighth
FULL = 30_000_000  # tokens: the split has 40 to 62 million, by vocabulary (TECHNIQUES.md 1)


def check(case: Case) -> Finding:
    which, _, _ = passes_of(case)
    if not which.score:
        return _counted(case) or unseen(case, ID, CLAUSE)
    scores = scores_of(case.trace, which.score, which.data)
    cut = [(score, tok.part) for score in scores for tok in score.targets if tok.part and float(tok.part) < FULL]
    whole = [score for score in scores if all(not tok.part for tok in score.targets)]
    if cut and not whole and not _all_count(case, which, max(float(part) for _, part in cut)):
        score, part = cut[0]
        first = case.trace.files.get(part)
        if first is not None:
            share = float(part)
            which_files = f"the first {part} are" if share >= 1 else f"one in {1 / share:.0f} is"
            evidence = f"Of the validation files only {which_files} read, at {first}."
            return Finding(ID, "violates", evidence, CLAUSE, first)
        within = stated_at(case, float(part))
        let = f"what a constant of {float(part):,.0f} lets through" if float(part) >= 1 else f"{float(part):.0%}"
        limit = within or case.trace.limits.get(part, score.place)
        at = f", at {limit}" if limit != score.place else ""
        evidence = f"The reported loss at {score.place} covers only {let}{at}."
        return Finding(ID, "violates", evidence, CLAUSE, limit)
    ended = [
        (score, case.trace.broken[loop])
        for score in scores
        for tok in score.targets
        for loop, _, _ in tok.spans
        if loop in case.trace.broken and any(loop == each for each, _ in score.nest)
    ]
    if ended:
        score, place = ended[0]
        evidence = (
            f"The loop over the validation tokens is left at {place} when a counter or the clock says so; "
            "the rest is not scored."
        )
        return Finding(ID, "violates", evidence, CLAUSE, place)
    gaps = [
        (score, loop)
        for score in scores
        for tok in score.targets
        for loop, _, _ in tok.spans
        if loop in case.trace.gaps
    ]
    if gaps:
        score, loop = gaps[0]
        evidence = (
            f"The loop's step is longer than the slice at {case.trace.gaps[loop]}: what lies between is not scored."
        )
        return Finding(ID, "violates", evidence, CLAUSE, case.trace.loops[loop])
    alone = [score for score in scores if _of_one_rank(case, which, score)]
    if alone and len(alone) == len(scores):
        score = alone[0]
        place = _in_its_loop(case, score)
        evidence = (
            f"The loss at {place} is that of one process's share of the windows; nothing sums it over the others "
            "before it is reported."
        )
        return Finding(ID, "violates", evidence, CLAUSE, place)
    passed_by = _passed_by(case, which, scores)
    if passed_by is not None:
        score, where = passed_by
        evidence = (
            f"The condition at {where} leaves out of the sum what is too short, too long, too dear or too late; the "
            f"losses of {score.place} are reported as all."
        )
        return Finding(ID, "violates", evidence, CLAUSE, where)
    counted = _counted(case)
    if counted is not None:
        return counted
    counts = counts_of(case, which, doubtful=True)
    limited = left_out(case, which)
    if limited is None and counts is not None:
        limited = cut_short(case, which, counts) or by_length(case, which, counts)
    if limited is not None:
        evidence, line = limited
        return Finding(ID, "violates", evidence, CLAUSE, case.place(line))
    return Finding(ID, "clean", "No constant cuts the validation tokens short.", CLAUSE, which.score[0].place)


def _passed_by(case: Case, which: Reported, scores: list[Score]) -> tuple[Score, Place] | None:
    """A loss beside which a condition leaves others out of the sum, and where. What a mask on losses picks must be in
    the last number that is reported: the losses of long documents may be told beside those of all."""
    told = which.score[-1].value.choices
    for score in scores:
        where, mask = case.trace.picked.get(score.bit), case.trace.masked.get(score.bit, 0)
        if where is not None and (not mask or mask & told):
            return score, where
    return None


def _all_count(case: Case, which: Reported, limit: float) -> bool:
    """Whether a trial over a longer text than a limit of tokens shows that every target counts: it is the length of a
    window, or of the first one. Or it is a number of documents, and the split has no more."""
    if lets_all_through(case, limit):
        return True
    counts = counts_of(case, which, doubtful=True) if limit > 1 else None
    return counts is not None and not len(counts.missing) and limit < 0.9 * counts.trial.length


def _counted(case: Case) -> Finding | None:
    """The bytes that a log counts beside the score that it ends with: fewer than the split has, and no rank's share."""
    record = record_of(case.submission)
    for log in record.logs:
        final, claimed = log.final, record.claims.score
        if final is not None and claimed is not None and abs(final.bits_per_byte - claimed) > 0.005:
            continue  # of another run than the claim's
        if final is None or final.step is not None or not final.bytes or final.bytes > 0.9 * BYTES:
            continue
        if abs(BYTES / final.bytes / RANKS - 1) < 0.1:
            continue
        if any(size.value == final.bytes for size in (log.total, *log.models, *log.codes) if size):
            continue  # of what is handed in
        evidence = f"{log.path}: the score is that of {final.bytes:,.0f} bytes, and the validation split has {BYTES:,}"
        return Finding(ID, "violates", evidence, CLAUSE, Place(log.path, final.line))
    return None


def _of_one_rank(case: Case, which: Reported, score: Score) -> bool:
    """Whether only a rank's share of the targets is scored, and no collective comes between the loss and its report."""
    shares = [tok.ranked for tok in score.targets if tok.data in which.data]
    last = which.score[-1].number
    summed = any(
        score.number < number <= last and (not mask or mask >> score.bit & 1 or score.whole & mask)
        for number, mask in case.trace.gathered
    )
    return bool(shares) and all(shares) and not summed


def _in_its_loop(case: Case, score: Score) -> Place:
    """The line of the loop over the windows in which a loss is computed, not that of the model's own forward."""
    cutting = {loop for tok in score.targets for loop, _, _ in tok.spans}
    loops = [loop for loop, _ in score.nest if loop in cutting]
    depth = case.trace.depth.get(loops[-1], 0) if loops else 0
    return score.stack[depth - 1] if 0 < depth <= len(score.stack) < 12 else score.place
