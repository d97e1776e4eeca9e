"""Approaches against a baseline: what is compared, what is refused, and what is said, by hand and against scipy."""

import json
import os
import shutil

import numpy as np
import pytest
from scipy import stats

from fairway.base.errors import RecipeError
from fairway.lab.compare import compare, markdown, tables
from fairway.lab.statistics import paired_by_size
from fairway.score.profile import read_profile
from tests.lab.made import SIZES, made_run

OURS, THEIRS = (1.731, 1.727, 1.735), (1.741, 1.739, 1.748)
LESS = "model.hidden=32"


@pytest.fixture
def pair(tmp_path):
    """A folder of two approaches, three seeds each; the better one proven on its first seed."""
    for seed, (ours, theirs) in enumerate(zip(OURS, THEIRS, strict=True), 1):
        made_run(tmp_path / f"base-{seed}", seed, theirs, name="base")
        made_run(tmp_path / f"less-{seed}", seed, ours, LESS, name="less", proven=seed == 1)
    return tmp_path


def against(found, label):
    return next(row.against for row in found.rows if row.label == label)


def refused(answer, family, *says):
    assert (answer.code, answer.err.count("\n")) == (2 if family == "RecipeError" else 1, 1), answer.err
    assert answer.err.startswith(f"{family}: ")
    for words in says:
        assert words in answer.err
    return True


def test_three_tests_of_one_difference_are_those_of_scipy(pair):
    found = compare([pair])
    assert (found.baseline, [row.label for row in found.rows]) == ("base", ["base", "less"])
    one = against(found, "less")
    welch = stats.ttest_ind(OURS, THEIRS, equal_var=False, alternative="less")
    wide = stats.ttest_ind(OURS, THEIRS, equal_var=False).confidence_interval(0.95)
    assert (one.welch.below, one.welch.freedom) == pytest.approx((welch.pvalue, welch.df), rel=1e-9)
    assert (one.welch.low, one.welch.high) == pytest.approx((wide.low, wide.high), rel=1e-9)
    pairs = stats.ttest_rel(OURS, THEIRS, alternative="less")
    assert one.by_seed.difference.below == pytest.approx(pairs.pvalue, rel=1e-8)
    assert one.by_seed.seeds == (1, 2, 3)
    assert one.bits_per_byte == pytest.approx(np.mean(OURS) - np.mean(THEIRS))
    assert one.nats_per_token == pytest.approx(one.bits_per_byte * np.log(2) * sum(SIZES) / 2_000)
    mean, base = found.rows[1], found.rows[0]
    low, high = stats.ttest_1samp(OURS, 0).confidence_interval(0.95)
    assert (mean.mean, mean.spread, mean.low, mean.high) == pytest.approx(
        (np.mean(OURS), np.std(OURS, ddof=1), low, high)
    )
    assert base.against is None


def test_documents_are_averaged_over_the_seeds_that_both_have(tmp_path):
    """Seeds 1 and 2 of both; seed 3 stands on one side alone, and seed 4 left no profile."""
    drawn = np.random.default_rng(0)
    bits = {key: drawn.gamma(9, 0.2, 6) * SIZES for key in ("a1", "a2", "a3", "b1", "b2")}
    for key, each in bits.items():
        score = each.sum() / sum(SIZES)
        made_run(
            tmp_path / key, int(key[1]), score, *([LESS] if key[0] == "a" else []), name=key[0], documents=tuple(each)
        )
    for name in "ab":
        made_run(tmp_path / f"{name}4", 4, 1.8, *([LESS] if name == "a" else []), name=name, documents=None)
    one = against(compare([tmp_path], baseline="b"), "a").by_document
    expected = paired_by_size((bits["a1"] - bits["b1"] + bits["a2"] - bits["b2"]) / 2, SIZES)
    assert (one.seeds, one.documents) == ((1, 2), 6)
    assert one.difference.mean == pytest.approx(expected.mean)
    assert one.difference.below == pytest.approx(expected.below)


def test_a_profile_of_another_score_is_not_taken(pair):
    shutil.copy(pair / "base-1" / "profile.npz", pair / "less-1" / "profile.npz")
    assert against(compare([pair]), "less").by_document.seeds == (2, 3)


def test_runs_from_before_profiles_are_compared_without_documents(tmp_path):
    for seed in (1, 2):
        made_run(tmp_path / f"base-{seed}", seed, 1.7 + seed / 100, name="base", documents=None)
        made_run(tmp_path / f"less-{seed}", seed, 1.6, LESS, name="less", documents=None)
    one = against(compare([tmp_path]), "less")
    assert one.welch is not None
    assert (one.by_document.difference, one.by_document.why) == (None, "no profile")
    assert "Not by document: less (no profile); `fairway score RUN` writes a profile." in compare([tmp_path]).notes


def test_seeds_and_what_hangs_on_them_do_not_make_another_approach(tmp_path):
    made_run(tmp_path / "1", 1, 1.7)
    made_run(tmp_path / "2", 2, 1.8, "proof_bytes=0", "baselines=false", "summary=other words")
    (row,) = compare([tmp_path]).rows
    assert (row.label, row.seeds, row.proofs) == ("tiny", (1, 2), ("not proven", "not proven"))


def test_one_name_for_two_recipes_is_two_approaches_named_apart(tmp_path):
    made_run(tmp_path / "1", 1, 1.7)
    made_run(tmp_path / "2", 2, 1.8, LESS)
    labels = [row.label for row in compare([tmp_path]).rows]
    assert labels == ["tiny (model.hidden=64)", "tiny (model.hidden=32)"]


def test_a_proof_on_another_seed_is_said_and_refuses_nothing(pair):
    base, less = compare([pair]).rows
    assert (base.proof, less.proof) == ("not proven", "proven on seed 1")
    assert less.proofs == ("proven", *["proven on another seed of the same recipe"] * 2)


def test_the_baseline_is_the_one_named_or_b6_or_the_first(pair):
    assert compare([pair], baseline="less").baseline == "less"
    made_run(pair / "z", 1, 1.7, "model.hidden=48", name="pocket_b6")
    assert compare([pair]).baseline == "pocket_b6"
    with pytest.raises(RecipeError, match="--baseline other: none of these: base; less; pocket_b6"):
        compare([pair], baseline="other")


def test_a_plan_names_its_baseline_and_what_has_not_begun(tmp_path, pair):
    lines = []
    for name in ("less", "base", "late"):
        row = {"id": "1", "recipe": name, "seed": 1, "approach": name, "sha256": "0", "parent": None}
        lines.append({**row, "baseline": name == "base"})
    (pair / "plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("less", "base"):
        (pair / f"{name}-1").rename(pair / f"{name}-1-1")
    found = compare([pair])
    assert (found.baseline, [row.label for row in found.rows]) == ("base", ["base", "less"])
    assert [(left.run[-8:], left.why) for left in found.left_out] == [("late-1-1", "not begun")]


def test_an_unfinished_run_is_left_out_and_said(pair, fairway):
    made_run(pair / "less-4", 4, 1.5, LESS, name="less", finished=False)
    found = compare([pair])
    assert [(left.run, left.why) for left in found.left_out] == [(str(pair / "less-4"), "not finished (no score.json)")]
    assert f"Left out: {pair / 'less-4'}: not finished" in fairway("compare", pair).out
    shutil.copytree(pair / "less-4", pair / "less-5")
    assert "Left out: 2 runs, not finished (no score.json): less-4, less-5." in fairway("compare", pair).out


def test_of_a_seed_that_ran_twice_the_newer_run_counts(pair):
    """Twice the same seed is no second seed."""
    made_run(pair / "less-again", 1, 1.9, LESS, name="less")
    os.utime(pair / "less-again" / "score.json", (9e9, 9e9))
    found = compare([pair])
    assert found.rows[1].scores[0] == 1.9
    assert found.left_out[0].run == str(pair / "less-1")
    assert "seed 1 again" in found.left_out[0].why


def test_a_run_named_twice_counts_once(pair):
    (pair / "latest").symlink_to("less-1")
    found = compare([pair, pair / "latest", pair / "less-1"])
    assert found.rows[1].seeds == (1, 2, 3)
    assert not found.left_out


@pytest.mark.parametrize(
    ("change", "family", "says"),
    [
        ({"text": "other"}, "DataError", ("text_sha256 = ", ", but ", "different text")),
        ({"text_bytes": 6_001}, "DataError", ("text_bytes = 6,001, but 6,000 in",)),
        ({"steps": 61}, "RecipeError", ("trained 61 steps, but 60 in", "--by clock")),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(pair, fairway, change, family, says):
    made_run(pair / "odd", 9, 1.7, "model.hidden=48", name="odd", **change)
    assert refused(fairway("compare", pair), family, *says, str(pair / "odd"), str(pair / "base-1"))


def test_by_the_clock_other_step_counts_are_compared(pair, fairway):
    made_run(pair / "odd", 9, 1.7, "model.hidden=48", name="odd", steps=61)
    assert fairway("compare", pair, "--by", "clock").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--stage", "final"), "--stage final: choices: result, float"),
        (("--by", "luck"), "--by luck: choices: steps, clock"),
        (("--stage", "adapted"), "stage adapted was not scored, but float, quantized, sliding"),
    ],
)
def test_wrong_words_are_one_line(pair, fairway, words, says):
    made_run(pair / "odd", 9, 1.7, "score.adapt=none", "score.result=sliding", name="odd")
    assert refused(fairway("compare", pair, *words), "RecipeError", says)


def test_places_without_runs_are_one_line(tmp_path, fairway):
    assert refused(fairway("compare", tmp_path / "none"), "RecipeError", "no such folder")
    assert refused(fairway("compare", tmp_path), "RecipeError", "no run folder, and none in it")
    made_run(tmp_path / "a", 1, 1.7, finished=False)
    assert refused(fairway("compare", tmp_path), "RecipeError", "1 runs, none of them finished")


@pytest.mark.parametrize(
    ("name", "content", "family"),
    [
        ("score.json", b'{"result": "adap', "DataError"),
        ("score.json", b"[]", "DataError"),
        ("journal.jsonl", b"", "DataError"),
        ("profile.npz", b"no zip", "DataError"),
        ("recipe.toml", b"name = 1", "RecipeError"),
    ],
)
def test_a_damaged_run_is_one_line(pair, fairway, name, content, family):
    (pair / "less-2" / name).write_bytes(content)
    assert refused(fairway("compare", pair), family)


def test_a_score_that_was_edited_is_refused(pair, fairway):
    path = pair / "less-2" / "score.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bits_per_byte": 1.0}))
    assert refused(fairway("compare", pair), "RecipeError", "bits_per_byte = 1.0, but 1.727 in the journal")


def test_results_of_different_stages_are_said_and_one_stage_can_be_named(pair):
    for seed in (1, 2):
        made_run(pair / f"plain-{seed}", seed, 1.75, "score.adapt=none", "score.result=sliding", name="plain")
    found = compare([pair])
    assert [row.stage for row in found.rows] == ["adapted", "adapted", "sliding"]
    assert any("different stages (adapted: base, less; sliding: plain)" in note for note in found.notes)
    same = compare([pair], stage="sliding")
    assert [row.stage for row in same.rows] == ["sliding"] * 3
    assert same.rows[1].scores == pytest.approx([score + 0.01 for score in OURS])
    assert not any("different stages" in note for note in same.notes)


def test_one_seed_has_no_deviation_and_no_test(tmp_path, fairway):
    made_run(tmp_path / "a", 1, 1.7)
    made_run(tmp_path / "b", 1, 1.6, LESS, name="less")
    found = compare([tmp_path])
    row = found.rows[1]
    assert (row.spread, row.low, row.against.welch, row.against.holm) == (None, None, None, None)
    assert (row.against.verdict, row.against.bar_met, row.against.bar_seeds) == ("not enough seeds", False, 2)
    assert row.against.by_document.difference.mean == pytest.approx(-0.1)
    assert any(note.startswith("One seed: tiny, less") for note in found.notes)
    assert "not enough seeds" in fairway("compare", tmp_path).out


def test_twelve_ideas_are_not_one(tmp_path):
    """A p that would do alone does not among twelve: Holm's is twelve times the smallest."""
    for seed, theirs in enumerate((1.740, 1.744, 1.742), 1):
        made_run(tmp_path / f"0base-{seed}", seed, theirs, name="base")
        for idea in range(12):
            score = theirs - (0.0045 if idea == 5 else 0.0)
            made_run(tmp_path / f"idea{idea}-{seed}", seed, score, f"model.hidden={32 + idea}", name=f"idea{idea}")
    found = compare([tmp_path], baseline="base")
    one = against(found, "idea5")
    assert one.welch.below < 0.05 < one.holm
    assert one.holm == pytest.approx(12 * one.welch.below)
    assert one.verdict == "no difference shown"
    alone = compare([*tmp_path.glob("0base-*"), *tmp_path.glob("idea5-*")], baseline="base")
    assert against(alone, "idea5").verdict == "better"


def test_the_bar_is_met_by_gains_that_are_large_and_sure(tmp_path):
    """0.005 nats per token are 0.0024 bits per byte on this text."""
    for seed, noise in enumerate((-0.0004, 0.0, 0.0004), 1):
        made_run(tmp_path / f"base-{seed}", seed, 1.74 + noise, name="base")
        made_run(tmp_path / f"far-{seed}", seed, 1.73 + noise, LESS, name="far")
        made_run(tmp_path / f"near-{seed}", seed, 1.738 + noise, "model.hidden=48", name="near")
        made_run(tmp_path / f"worse-{seed}", seed, 1.75 + noise, "model.hidden=40", name="worse")
    found = compare([tmp_path], baseline="base")
    far, near, worse = (against(found, label) for label in ("far", "near", "worse"))
    margin = -0.005 / (np.log(2) * sum(SIZES) / 2_000)
    expected = stats.ttest_ind([0.0004, 0, -0.0004], [0.01 + margin + n for n in (0.0004, 0, -0.0004)], equal_var=False)
    assert far.bar_chance == pytest.approx(expected.pvalue / 2, rel=1e-6)
    assert (far.verdict, far.bar_met, far.bar_seeds) == ("better", True, 0)
    assert (near.verdict, near.bar_met, near.bar_seeds) == ("better", False, None)
    assert (worse.verdict, worse.bar_met, worse.bar_seeds) == ("worse", False, None)


def test_a_tests_chance_is_on_its_own_side(tmp_path, fairway):
    """Over all seeds the approach is better; on the one seed in common, by which documents are paired, it is worse."""
    worse = tuple(bits + 10 for bits in (1.71 * size for size in SIZES))
    made_run(tmp_path / "base-1", 1, 1.7, name="base")
    made_run(tmp_path / "base-2", 2, 1.9, name="base")
    made_run(tmp_path / "less-1", 1, 1.71, LESS, name="less", documents=worse)
    found = compare([tmp_path], baseline="base")
    test = against(found, "less").by_document.difference
    assert against(found, "less").bits_per_byte < 0 < test.mean
    assert test.above < 0.05
    (row,) = tables(found)[1].rows
    assert row[-1] == f"{test.above:.4f}"


def test_costs_are_the_means_of_the_runs(pair):
    row = compare([pair]).rows[1]
    assert (row.artifact_bytes, row.ms_per_step, row.train_seconds, row.score_seconds) == pytest.approx(
        (40_000, 100.0, 6.0, 3.0)
    )


def test_json_holds_everything_and_markdown_is_one_table(pair, fairway):
    told = json.loads(fairway("compare", pair, "--json").out)
    assert told["rows"][1]["against"]["by_seed"]["difference"]["below"] < 0.05
    assert told["rows"][1]["runs"] == [str(pair / f"less-{seed}") for seed in (1, 2, 3)]
    lines = fairway("compare", pair, "--markdown").out.splitlines()
    assert {line.count("|") for line in lines[:4]} == {15}
    assert "| less | 3 | 1.7310 ± 0.0040 |" in lines[3]
    assert "-0.0117" in lines[3]


def test_the_terminal_shows_every_approach_in_each_of_three_tables(pair, fairway):
    out = fairway("compare", pair).out
    assert out.count("less ") >= 3
    assert [sheet.title[:5] for sheet in tables(compare([pair]))] == ["score", "tests", "cost,"]
    assert markdown(compare([pair])).endswith("\n")


def test_real_runs_are_compared_document_by_document(two_runs):
    """Two seeds of the tiny recipe: their documents add up to their scores, and one approach is no comparison."""
    found = compare([two_runs])
    (row,) = found.rows
    assert (row.label, row.seeds, row.against) == ("tiny", (1, 2), None)
    for folder, score in zip(row.runs, row.scores, strict=True):
        profile = read_profile(two_runs / folder.rsplit("/", 1)[1])
        assert profile.stages["adapted"].documents.sum() / profile.text_bytes == pytest.approx(score, rel=1e-12)
