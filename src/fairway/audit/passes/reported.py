"""Which of the numbers that a script prints is its score."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fairway.audit.flow.events import Said, Score, Trace
from fairway.audit.submission import Submission
from fairway.audit.terms.report import DIAGNOSIS, IN_BITS, last_of_kind

_WORD = re.compile(r"[A-Za-z_]{3,}")
_SELF = ("train", "random", "generated")


@dataclass(frozen=True)
class Reported:
    """score: where the number that is claimed is said; others: other final numbers; data: the validation tokens."""

    score: tuple[Said, ...]
    others: tuple[Said, ...]
    data: frozenset[str]
    by_record: bool = False


def targets_of(trace: Trace, said: Said) -> set[str]:
    """The data sets whose tokens a number is the loss of."""
    return {tok.data for score in trace.scored(said.value.losses) for tok in score.targets}


def reported(trace: Trace, submission: Submission | None) -> Reported:
    """The score: what the record claims where its log shows which line printed it, else the last final number."""
    kinds = {said.number: targets_of(trace, said) for said in trace.said}
    every = set().union(*kinds.values()) if kinds else set()
    data = frozenset(["val"] if "val" in every else [kind for kind in every if kind not in _SELF])
    about = [said for said in trace.said if kinds[said.number] & data]
    if not about:
        return Reported((), (), data)
    level = min(len(said.nest) for said in about)
    finals = _once([said for said in about if len(said.nest) == level])
    finals += _of_the_last_pass(trace, [said for said in about if said.number > finals[-1].number], data)
    named = _by_record(_once(about), submission) if submission is not None else []
    if named:
        others = [said for said in finals if said not in named]
        return Reported(tuple(named), tuple(others), data, True)
    plain = [said for said in finals if not is_diagnosis(said)] or finals
    last = _in_bits(trace, plain)
    same = [said for said in plain if said.value.losses == last.value.losses and said.number <= last.number]
    score = [said for said in same if not _picked_beside(said, last)]
    return Reported(tuple(score), tuple(said for said in finals if said not in score), data)


def _picked_beside(said: Said, last: Said) -> bool:
    """Whether a number that says no bits per byte was picked among losses, and the score itself was not: the loss of
    the easiest chunk."""
    told = IN_BITS.search(last.text) and not IN_BITS.search(said.text)
    return bool(told and said.value.choices & ~last.value.choices)


def _in_bits(trace: Trace, plain: list[Said]) -> Said:
    """The last of these numbers; where its text says no bits per byte, the last one of the same losses that does: how
    the losses lie over documents is told after it."""
    last = plain[-1]
    if IN_BITS.search(last.text):
        return last
    family = trace.family(last.value.losses)
    same = (each for each in reversed(plain) if trace.family(each.value.losses) & family)
    return next((each for each in same if IN_BITS.search(each.text)), last)


def is_diagnosis(said: Said) -> bool:
    """Whether the text of a number says that it is no score."""
    return bool(DIAGNOSIS.search(said.text))


def _of_the_last_pass(trace: Trace, later: list[Said], data: frozenset[str]) -> list[Said]:
    """Of numbers that are said after the last one outside of loops: those of a loop over passes that learn, which goes
    through no tokens itself. `for _ in range(passes): report(adapt(model, tokens))`"""
    found: list[Said] = []
    for said in later:
        cut = {loop for score in trace.scored(said.value.losses) for tok in score.targets for loop, _, _ in tok.spans}
        passes = {loop for loop, _ in said.nest}
        learnt = any(
            passes <= {loop for loop, _ in update.nest} and any(tok.data in data for tok in update.learned)
            for update in trace.updates
            if update.number < said.number
        )
        if passes and not passes & cut and learnt:
            found.append(said)
    level = min((len(said.nest) for said in found), default=0)
    return _once([said for said in found if len(said.nest) == level])


def _once(said: list[Said]) -> list[Said]:
    """One for each number: a log helper prints it and writes it to a file, a loop tells it on the way, a line beside it
    says of how many tokens it is. Of several that say bits per byte the last: what was summed side by side and gathered
    in one tensor is one number here, and the model alone is told before the mixture."""
    found: dict[tuple[object, ...], Said] = {}
    for each in said:
        key = (each.stack[:-1], each.value.losses)
        old = found.get(key)
        in_bits = old is not None and IN_BITS.search(each.text) and not is_diagnosis(each)
        if old is None or in_bits or (len(each.text) > 0 and not old.text) or len(each.nest) < len(old.nest):
            found[key] = each
    return sorted(found.values(), key=lambda each: each.number)


def _by_record(said: list[Said], submission: Submission) -> list[Said]:
    """The numbers whose line in the log shows the claimed score."""
    claims = claimed(submission)
    if not claims:
        return []
    logs = [text.splitlines() for text in submission.logs.values()]
    fitting: list[tuple[tuple[int, int], Said]] = []
    for each in said:
        words = [word for word in _WORD.findall(each.text) if word not in ("val_loss", "val_bpb", "logs", "txt")]
        found = [
            line for line in last_of_kind(logs, words) if any(claim in n for claim in claims for n in _numbers(line))
        ]
        if words and found:  # "quantized" stands in a line that says "quantized_ttt", but is no word of it
            whole = max(len(set(words) & set(_WORD.findall(line))) for line in found)
            fitting.append(((whole, len(words)), each))
    level = min((len(each.nest) for _, each in fitting), default=0)  # a line on the way may show the last number, too
    most = max((count for count, each in fitting if len(each.nest) == level), default=(0, 0))
    return [each for count, each in fitting if count == most and len(each.nest) == level]


def claimed(submission: Submission) -> list[str]:
    """The claimed bits per byte, as texts to look for (four decimals, or as it stands)."""
    found: list[str] = []
    waiting: list[tuple[str, object]] = list(submission.claims.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}", each) for name, each in value.items()]
        elif isinstance(value, list):
            waiting += [(key, each) for each in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and "bpb" in key.lower():
            found.append(f"{value:.4f}")
            found.append(f"{int(value * 10_000) / 10_000:.4f}")
    return list(dict.fromkeys(found))


def _numbers(line: str) -> list[str]:
    return re.findall(r"\d\.\d{3,}", line)


def scores_of(trace: Trace, said: tuple[Said, ...], data: frozenset[str]) -> list[Score]:
    """The losses in these numbers, with what they were made of: of validation tokens alone."""
    mask = 0
    for each in said:
        mask |= each.value.losses
    found = []
    for score in trace.scored(mask):
        targets = frozenset(tok for tok in score.targets if tok.data in data)
        if targets:
            found.append(replace(score, targets=targets))
    return sorted(found, key=lambda each: each.number)
