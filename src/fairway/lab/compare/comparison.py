"""Approaches against a baseline: means, intervals, three tests, the challenge's bar, cost and proof.

Three questions, and an answer to each. Welch: would other seeds of both recipes give this order on this text? Paired by
seed: the same, where a seed moves both alike. Paired by document: would these very models, averaged over the seeds that
both have, give this order on other text of this kind? The verdict is Welch's, raised by Holm for the number of
approaches; the other two stand beside it and never take its place.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from fairway.base.errors import RecipeError
from fairway.lab.compare.approaches import Approach, approaches, gather
from fairway.lab.compare.notes import notes_of
from fairway.lab.compare.result import SURE, Against, Compared, Comparison, Documents, Seeds
from fairway.lab.compare.same import RESULT, booked, refuse_unlike, stage_of, steps_of
from fairway.lab.finished import Finished, whole
from fairway.lab.statistics import (
    CHANCE,
    MARGIN,
    Difference,
    holm,
    interval,
    nats_per_token,
    paired,
    paired_by_size,
    seeds_needed_of_both,
    welch,
)
from fairway.score.profile import Profile, read_profile

NATURAL = ("b6", "pocket_b6")  # the baselines of sweeps, where no other is named


def compare(places: Sequence[Path], baseline: str = "", stage: str = RESULT, by: str = "steps") -> Comparison:
    """Runs, sweeps and folders of runs as a table. baseline: an approach's label or its recipe's name; stage: one of
    the four, or `result`: each run's own; by: steps or clock, what the runs share, or either: the clock where all of
    them were scheduled by it.

    Raises RecipeError (nothing to compare, no such baseline, a stage that was not scored, different step counts),
    DataError (different text, a damaged run).
    """
    runs, left, planned = gather(places)
    found, again = approaches(runs, planned)
    runs = [run for approach in found for run in approach.runs]
    refuse_unlike(runs, stage, by)
    base = _baseline(found, baseline)
    tests = {one.label: _tests(one, base, stage) for one in found if one is not base}
    shown = [label for label, test in tests.items() if test[0] is not None]
    better = holm([test.below for label in shown if (test := tests[label][0]) is not None])
    worse = holm([test.above for label in shown if (test := tests[label][0]) is not None])
    raised = {label: (a, b) for label, a, b in zip(shown, better, worse, strict=True)}
    rows = []
    for one in [base, *(one for one in found if one is not base)]:
        against = None if one is base else _against(one, base, stage, tests[one.label], raised.get(one.label))
        rows.append(_row(one, stage, against))
    first = booked(runs[0], stage)
    notes = tuple(notes_of(found, base, stage, rows))
    left_out = (*left, *again)
    return Comparison(base.label, stage, first["text_sha256"], first["text_bytes"], tuple(rows), left_out, notes)


def _baseline(found: Sequence[Approach], named: str) -> Approach:
    """The one that is named; else b6 or its pocket form, a plan's baseline, the first."""
    if named:
        for kind in (lambda one: one.label, lambda one: one.runs[0].recipe.name):
            fitting = [one for one in found if kind(one) == named]
            if len(fitting) == 1:
                return fitting[0]
        there = "; ".join(one.label for one in found)
        raise RecipeError(f"--baseline {named}: {'more than one of' if fitting else 'none of'} these: {there}")
    natural = [one for one in found if one.runs[0].recipe.name in NATURAL]
    return [*natural, *(one for one in found if one.baseline), *found][0]


def _scores(one: Approach, stage: str) -> list[float]:
    return [float(booked(run, stage)["bits_per_byte"]) for run in one.runs]


def _tests(one: Approach, base: Approach, stage: str) -> tuple[Difference | None, Seeds, Documents]:
    ours, theirs = _scores(one, stage), _scores(base, stage)
    both = welch(ours, theirs) if min(len(ours), len(theirs)) > 1 else None
    common = tuple(seed for seed in one.seeds if seed in base.seeds)
    mine, its = dict(zip(one.seeds, ours, strict=True)), dict(zip(base.seeds, theirs, strict=True))
    pairs = paired([mine[seed] for seed in common], [its[seed] for seed in common]) if len(common) > 1 else None
    return both, Seeds(pairs, common), _documents(one, base, common, stage)


def _documents(one: Approach, base: Approach, common: tuple[int, ...], stage: str) -> Documents:
    """Each document's difference, averaged over the seeds that both have and that left a profile."""
    if not common:
        return Documents(None, why="no seed in common")
    kept: list[tuple[int, Profile, Profile, Finished, Finished]] = []
    for seed in common:
        ours, theirs = one.runs[one.seeds.index(seed)], base.runs[base.seeds.index(seed)]
        a, b = _profile(ours, stage), _profile(theirs, stage)
        if a is not None and b is not None:
            kept.append((seed, a, b, ours, theirs))
    if not kept:
        return Documents(None, why="no profile")
    sizes = kept[0][1].documents[2]
    if any(not np.array_equal(each.documents[2], sizes) for _, a, b, _, _ in kept for each in (a, b)):
        return Documents(None, why="cut into other documents")
    if len(sizes) < 2:
        return Documents(None, len(sizes), why="one document")
    differences = np.mean(
        [a.stages[stage_of(x, stage)].documents - b.stages[stage_of(y, stage)].documents for _, a, b, x, y in kept], 0
    )
    return Documents(paired_by_size(differences, sizes), len(sizes), tuple(seed for seed, *_ in kept))


def _profile(run: Finished, stage: str) -> Profile | None:
    """The profile of the very score that is compared; None where there is none, or it is another score's."""
    profile, scored = read_profile(run.folder), booked(run, stage)
    bits = profile.stages.get(stage_of(run, stage)) if profile is not None else None
    if profile is None or bits is None:
        return None
    same = (profile.text_sha256, bits.artifact_sha256) == (scored["text_sha256"], scored.get("artifact_sha256"))
    return profile if same else None


def _against(
    one: Approach,
    base: Approach,
    stage: str,
    tests: tuple[Difference | None, Seeds, Documents],
    raised: tuple[float, float] | None,
) -> Against:
    ours, theirs = _scores(one, stage), _scores(base, stage)
    row = booked(base.runs[0], stage)
    difference = fmean(ours) - fmean(theirs)
    margin = -MARGIN / nats_per_token(1.0, row["text_bytes"], row["tokens"])
    barred = welch(ours, theirs, margin).below if tests[0] is not None else None
    return Against(
        bits_per_byte=difference,
        nats_per_token=nats_per_token(difference, row["text_bytes"], row["tokens"]),
        welch=tests[0],
        holm=raised[0] if raised else None,
        holm_worse=raised[1] if raised else None,
        by_seed=tests[1],
        by_document=tests[2],
        verdict=_verdict(raised),
        bar_chance=barred,
        bar_met=barred is not None and barred < CHANCE,
        bar_seeds=seeds_needed_of_both(ours, theirs, margin),
    )


def _verdict(raised: tuple[float, float] | None) -> str:
    if raised is None:
        return "not enough seeds"
    better, worse = raised
    return "better" if better < SURE else "worse" if worse < SURE else "no difference shown"


def _row(one: Approach, stage: str, against: Against | None) -> Compared:
    scores = _scores(one, stage)
    rows = [booked(run, stage) for run in one.runs]
    low, high = interval(scores) if len(scores) > 1 else (None, None)
    proven = [isinstance(run.outcome.get("proof"), dict) for run in one.runs]
    with whole(one.runs[0].folder):
        trained = [float(run.facts["train"]["seconds"]) for run in one.runs]
        sizes = [float(run.facts["artifact"]["bytes"]) for run in one.runs]
    return Compared(
        label=one.label,
        seeds=tuple(one.seeds),
        runs=tuple(str(run.folder) for run in one.runs),
        stage=stage_of(one.runs[0], stage),
        scores=tuple(scores),
        mean=fmean(scores),
        spread=stdev(scores) if len(scores) > 1 else None,
        low=low,
        high=high,
        nats_per_token=fmean(
            nats_per_token(s, r["text_bytes"], r["tokens"]) for s, r in zip(scores, rows, strict=True)
        ),
        artifact_bytes=fmean(sizes),
        ms_per_step=fmean(
            1e3 * seconds / max(steps_of(run), 1) for seconds, run in zip(trained, one.runs, strict=True)
        ),
        train_seconds=fmean(trained),
        score_seconds=fmean(float(row["seconds"]) for row in rows),
        steps=steps_of(one.runs[0]),
        proof=_proof(one.seeds, proven),
        proofs=tuple(
            "proven" if each else "proven on another seed of the same recipe" if any(proven) else "not proven"
            for each in proven
        ),
        against=against,
    )


def _proof(seeds: Sequence[int], proven: Sequence[bool]) -> str:
    if all(proven) or not any(proven):
        return "proven" if all(proven) else "not proven"
    return "proven on seed " + ", ".join(str(seed) for seed, each in zip(seeds, proven, strict=True) if each)
