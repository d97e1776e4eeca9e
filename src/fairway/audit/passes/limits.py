"""A number that lets only so many chunks, windows or documents through: seen in a trial, and tried in another one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fairway.audit.case import Case
from fairway.audit.passes.groups import GROUPS, in_smaller_groups
from fairway.audit.passes.places import of_another
from fairway.audit.passes.reported import Reported, scores_of
from fairway.audit.passes.trials import Counts, counted
from fairway.audit.reading.tree import nodes
from fairway.audit.trial import run
from fairway.audit.trial.limits import Forced, Seen, Site, is_named
from fairway.audit.trial.text import DOCUMENT, SHORT
from fairway.audit.trial.told import Trial
from fairway.audit.verdict import Place

_TEXT = 62_000_000  # tokens of the validation split, at most (TECHNIQUES.md 1)
_DOCUMENTS = 50_000  # of the split (RULES.md R7)
_SHARE = 0.9  # of either: a number that lets through nearly all is no limit
_TRIED = 2  # numbers: each costs another trial
_FEW = 4  # of whatever is counted: half of fewer says little, so the longer text is asked, for five times as long
_LESS = 0.95  # of the targets
_PLAINLY = ("most", "limit", "cap")  # names of such a number, besides those of the blocks themselves
_FEWEST = 16  # blocks: less is written out for many things
_SHORTEST = 8  # tokens: what has less has nothing to be scored
_LONGEST = 32_768  # tokens: a larger number may be a guard


def cut_short(case: Case, which: Reported, counts: Counts) -> tuple[str, int] | None:
    """A number that is larger than anything in the text of the trial and smaller than the whole text's, and for less
    than which targets do not count: a sentence, and its line. None where there is none."""
    for tried in _limits(case):
        whole = counts if tried.text is case.trial else counted(tried.text, which)
        if whole is None:
            continue
        length, many = tried.text.length, float((whole.times > 0).sum())
        left = _left(case, which, Forced(tried.site, tried.limit, tried.most // 2), tried.text)
        if left is not None and left < _LESS * many:
            evidence = (
                f"Only {tried.limit:,} are let through. Worked out for a text of {length - 1:,} targets, which has "
                f"{tried.most:,} of them, half as many leave {1 - left / many:.0%} of the targets out; the validation "
                f"tokens are {_TEXT / length:,.0f} times as many."
            )
            return evidence, tried.site[0]
    return None


def by_length(case: Case, which: Reported, counts: Counts) -> tuple[str, int] | None:
    """A number of tokens that a document, or a window, must have to be scored, or may have at most, where all in the
    text of the trial have more, or less: taken for one between them, some do not count. A sentence, and its line."""
    scores = scores_of(case.trace, which.score, which.data)
    skipping = {line for line in _skipping(case) if not of_another(case, scores, line)}
    for site, seen in counts.trial.limits.seen.items():
        if seen.limit is None or site[0] not in skipping or not seen.least < seen.most:
            continue
        short = _SHORTEST <= seen.limit < seen.least
        if not short and not (seen.most < seen.limit <= _LONGEST and _of_documents(case, site[0])):
            continue
        forced = Forced(site, seen.limit, (seen.least + seen.most) // 2, here=not site[2])
        left = _left(case, which, forced, counts.trial)
        many = float((counts.times > 0).sum())
        if left is not None and left < _LESS * many:
            evidence = (
                f"What has {'less' if short else 'more'} than {seen.limit:,} tokens is left out of the score: of the "
                f"text of a trial, where all have {seen.least:,} to {seen.most:,}, {1 - left / many:.0%} when it is "
                f"{forced.value:,}."
            )
            return evidence, site[0]
    return None


def _of_documents(case: Case, line: int) -> bool:
    """Whether a line speaks of documents: of windows a number that none is longer than says how long they are."""
    return "doc" in case.body.text.split("\n")[line - 1].lower()


def _left(case: Case, which: Reported, forced: Forced, text: Trial) -> float | None:
    """Of how many targets the score is, where a number is taken for another in a trial like this one; None where that
    comes to no end, or only over a shorter text: a stride of 64 is one of 5 then, and takes twelve times as long."""
    taken = (forced, *text.limits.forced)
    again = run(case.script, case.settings, text.length, taken, cut=False, native=case.trial.native)
    less = counted(again, which) if again.length == text.length else None
    return None if less is None else float((less.times > 0).sum())


def _skipping(case: Case) -> set[int]:
    """Lines of conditions under which a loop goes on to its next turn, or that let through what is listed, yielded."""
    found: set[int] = set()
    for node in nodes(case.body.tree):
        if isinstance(node, ast.If) and (isinstance(node.body[-1], ast.Continue) or _lists(node)):
            found.add(node.test.lineno)
        elif isinstance(node, ast.comprehension):
            found.update(test.lineno for test in node.ifs)
    return found


def _lists(node: ast.If) -> bool:
    """`if n >= least: docs.append(...)`, and nothing else otherwise."""
    done = node.body[-1].value if isinstance(node.body[-1], ast.Expr) and not node.orelse else None
    added = isinstance(done, ast.Call) and isinstance(done.func, ast.Attribute) and done.func.attr == "append"
    return added or isinstance(done, ast.Yield)


def stated_at(case: Case, limit: float) -> Place | None:
    """Where the trial met this number as one that others are held against: before it cuts anything."""
    lines = [site[0] for site, seen in case.trial.limits.seen.items() if seen.limit == limit]
    return case.place(lines[0]) if lines else None


def _in_the_split(many: int, trial: Trial) -> float:
    """How many the whole split has at least of what the text of a trial has so many: tokens, documents, or parts."""
    if trial.length - 1 <= many <= trial.length:
        return _TEXT
    documents = trial.length // DOCUMENT
    return _DOCUMENTS if many in (documents, documents + 1) else _parts_of_the_split(many, trial)


def _parts_of_the_split(many: int, trial: Trial) -> float:
    """The same of parts of some length, of which the last may be a short one, unless they were made so small for the
    trial that all are of one length."""
    forced = trial.limits.forced
    smaller = min((each.value / each.limit for each in forced), default=1.0)
    whole = many if any(each.value * many == trial.length - 1 for each in forced) else many - 1
    return whole * _TEXT / trial.length * min(smaller, 1.0)


def lets_all_through(case: Case, limit: float) -> bool:
    """Whether a number is at least as large as all that the whole split has of what it was held against:
    `documents[:50_000]`."""
    held = [seen for seen in case.trial.limits.seen.values() if seen.limit == limit and not seen.reached]
    return bool(held) and all(limit >= _in_the_split(seen.most, case.trial) for seen in held)


@dataclass(frozen=True)
class _Limit:
    """A number of the script, the most that was held against it, and the trial in which that was."""

    site: Site
    limit: int
    most: int
    text: Trial


def _limits(case: Case) -> Iterator[_Limit]:
    """The numbers that do not move with the text, held against what does."""
    long = case.trial
    shorter = next((length for length in (SHORT, DOCUMENT + 1) if length < long.length), None)
    unmet = long.limits.unmet(lambda many: _SHARE * _in_the_split(many, long))
    unmet |= _of_unforced_parts(case, unmet)
    unmet = {site: seen for site, seen in unmet.items() if seen.limit != long.length - 1}
    tried: dict[tuple[int, str], _Limit] = {}
    short = long  # of a number that the text sets, less is seen in a shorter one
    if unmet and shorter is not None:
        short = run(case.script, case.settings, shorter, cut=False, native=long.native)
    for site, seen in sorted(reversed(unmet.items()), key=lambda each: not is_named(each[0])):
        other = short.limits.seen.get(site)
        if seen.limit is not None and other is not None and other.limit == seen.limit and other.most < seen.most:
            few = other.most < _FEW
            most, text = (seen.most, long) if few else (other.most, short)
            tried[seen.limit, site[2]] = _Limit(site, seen.limit, most, text)
    found = list(tried.values())[:_TRIED]
    yield from found
    if not found:
        yield from _of_groups(case)


def _of_unforced_parts(case: Case, unmet: dict[Site, Seen]) -> dict[Site, Seen]:
    """The same where a number that was taken for another has made no parts smaller: as many were held against the limit
    in a trial in which it is taken for half as much."""
    long = case.trial
    plain = replace(long, limits=replace(long.limits, forced=()))
    more = long.limits.unmet(lambda many: _SHARE * _in_the_split(many, plain))
    more = {site: seen for site, seen in more.items() if site not in unmet}
    if not more:
        return {}
    halved = tuple(replace(each, value=max(each.value // 2, 1)) for each in long.limits.forced)
    again = run(case.script, case.settings, long.length, halved, cut=False, native=long.native)
    met = {site: again.limits.seen.get(site) for site in more}
    return {site: seen for site, seen in more.items() if (other := met[site]) is not None and other.most == seen.most}


def _of_groups(case: Case) -> Iterator[_Limit]:
    """The same of blocks of windows, of which the text of a trial has one or two: in a trial with smaller ones."""
    long = case.trial
    named = (each for each in long.limits.seen.items() if is_named(each[0]))
    asked = (each for each in named if not each[1].reached and 0 < each[1].most <= _FEW)
    few = {site: seen for site, seen in asked if site[2] in _PLAINLY or GROUPS.search(site[2])}
    limits = {seen.limit for seen in few.values() if seen.limit is not None and seen.limit >= _FEWEST}
    fine = in_smaller_groups(case, but=limits) if limits else None
    if fine is None:
        return
    for site, seen in few.items():
        met = fine.limits.seen.get(site)
        if seen.limit is None or met is None or met.limit != seen.limit or not seen.most < met.most < seen.limit:
            continue
        if seen.limit in limits and seen.limit < _SHARE * _parts_of_the_split(met.most, fine):
            yield _Limit(site, seen.limit, met.most, fine)
            return


__all__ = ["by_length", "cut_short", "lets_all_through", "stated_at"]
