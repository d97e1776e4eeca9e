"""What seeds and documents allow to say, against scipy and by simulation."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fairway.lab.statistics import (
    chance_above,
    holm,
    interval,
    nats_per_token,
    paired,
    paired_by_size,
    seeds_needed,
    seeds_needed_of_both,
    student_quantile,
    student_tail,
    welch,
)

OURS, THEIRS = [1.731, 1.727, 1.735], [1.741, 1.739, 1.748, 1.744]


@pytest.mark.parametrize("freedom", [0.3, 1, 1.7, 2, 3, 4, 7.25, 30, 31, 333.3, 5_000])
def test_the_tail_is_that_of_students_distribution(freedom):
    for t in (-4.0, -0.3, 0.0, 0.01, 0.7, 2.5, 9.0, 40.0):
        assert student_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-10, abs=1e-14)


@given(st.floats(1e-9, 0.5), st.floats(0.5, 2_000))
def test_the_quantile_is_where_the_tail_is(tail, freedom):
    assert student_tail(student_quantile(tail, freedom), freedom) == pytest.approx(tail, rel=1e-9)


def test_the_quantile_is_that_of_students_distribution():
    for tail, freedom in ((0.025, 2), (0.025, 3.7), (0.01, 11), (0.5, 4)):
        assert student_quantile(tail, freedom) == pytest.approx(stats.t.isf(tail, freedom), rel=1e-10, abs=1e-12)


def test_the_chance_is_that_of_the_one_sided_t_test():
    values = [1.1175, 1.1180, 1.1177]
    for bound in (1.10, 1.118, 1.12, 1.2):
        expected = stats.ttest_1samp(values, bound, alternative="less").pvalue
        assert chance_above(values, bound) == pytest.approx(expected, abs=1e-12)
    assert chance_above([1.0, 1.0], 1.1) == 0.0
    assert chance_above([1.0, 1.0], 1.0) == 1.0


def test_an_interval_is_that_of_the_t_test():
    expected = stats.ttest_1samp(OURS, 0.0).confidence_interval(0.95)
    assert interval(OURS) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert interval([2.0, 2.0]) == (2.0, 2.0)


def test_welch_by_hand():
    """Means 1.731 and 1.743; variances 1.6e-5 and 46e-6 / 3, over 3 and 4."""
    found = welch(OURS, THEIRS)
    a, b = 1.6e-5 / 3, 46e-6 / 3 / 4
    assert found.mean == pytest.approx(-0.012, rel=1e-12)
    assert found.freedom == pytest.approx((a + b) ** 2 / (a**2 / 2 + b**2 / 3), rel=1e-9)
    assert found.below == pytest.approx(stats.t.cdf(-0.012 / math.sqrt(a + b), found.freedom), rel=1e-9)


def test_welch_is_that_of_scipy():
    less = stats.ttest_ind(OURS, THEIRS, equal_var=False, alternative="less")
    more = stats.ttest_ind(OURS, THEIRS, equal_var=False, alternative="greater")
    wide = stats.ttest_ind(OURS, THEIRS, equal_var=False).confidence_interval(0.95)
    found = welch(OURS, THEIRS)
    assert (found.below, found.above, found.freedom) == pytest.approx((less.pvalue, more.pvalue, less.df), rel=1e-10)
    assert (found.low, found.high) == pytest.approx((wide.low, wide.high), rel=1e-10)
    moved = stats.ttest_ind([v + 0.005 for v in OURS], THEIRS, equal_var=False, alternative="less")
    assert welch(OURS, THEIRS, margin=-0.005).below == pytest.approx(moved.pvalue, rel=1e-9)


def test_pairs_are_those_of_scipy():
    less = stats.ttest_rel(OURS, THEIRS[:3], alternative="less")
    wide = stats.ttest_rel(OURS, THEIRS[:3]).confidence_interval(0.95)
    found = paired(OURS, THEIRS[:3])
    assert (found.below, found.low, found.high) == pytest.approx((less.pvalue, wide.low, wide.high), rel=1e-9)
    with pytest.raises(ValueError, match="longer"):
        paired(OURS, THEIRS)


def test_no_spread_leaves_no_doubt():
    found = welch([1.0, 1.0], [2.0, 2.0])
    assert (found.mean, found.low, found.high, found.below, found.above) == (-1.0, -1.0, -1.0, 0.0, 1.0)
    same = paired([1.0, 2.0], [1.0, 2.0])
    assert (same.below, same.above) == (1.0, 1.0), "the same numbers show nothing"


def test_documents_of_equal_size_are_plain_pairs():
    """Leaving out 1 of D of them widens Student's error by (D - 1) / D under the root."""
    drawn = np.random.default_rng(1)
    differences, count = drawn.normal(-0.3, 1.0, 40), 40
    found, plain = paired_by_size(differences, np.full(count, 7.0)), paired(differences / 7, np.zeros(count))
    assert (found.mean, found.freedom) == pytest.approx((plain.mean, count - 1), rel=1e-9)
    assert found.high - found.mean == pytest.approx(
        (plain.high - plain.mean) * math.sqrt(count / (count - 1)), rel=1e-9
    )


def test_documents_weigh_by_their_bytes():
    found = paired_by_size([-10.0, 1.0, 1.0], [100, 10, 10])
    assert found.mean == pytest.approx(-8 / 120)
    assert found.freedom == pytest.approx(120**2 / (100**2 + 200) - 1), "little more than one document in effect"
    assert found.below > 0.1


def test_one_document_that_is_all_of_the_text_shows_nothing():
    found = paired_by_size([-100.0, 0.0], [1e12, 1.0])
    assert found.below > 0.01
    assert found.low < 0 < found.high


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_raises_and_keeps_the_order(chances):
    raised = holm(chances)
    assert all(a <= b <= 1 for a, b in zip(chances, raised, strict=True))
    order = sorted(range(len(chances)), key=lambda at: chances[at])
    assert all(raised[a] <= raised[b] for a, b in pairwise(order))


def test_the_seeds_still_needed_are_the_fewest_that_would_show_it():
    values = [1.1, 1.12, 1.09]
    needed = seeds_needed(values, 1.15)
    spread, mean = stats.tstd(values), sum(values) / 3
    first = next(n for n in range(3, 99) if stats.t.sf((1.15 - mean) / (spread / n**0.5), n - 1) < 0.01)
    assert needed == first - 3 > 0
    assert seeds_needed(values, 2.0) == 0
    assert seeds_needed(values, 1.0) is None
    assert seeds_needed([1.0], 9.9) == 2, "one value has no spread; three are usual"


def test_the_seeds_needed_of_both_are_the_fewest_that_would_show_it():
    ours, theirs, margin = [1.10, 1.12, 1.09], [1.15, 1.16, 1.13], -0.005

    def chance(more):
        spreads = [(stats.tstd(v), len(v) + more) for v in (ours, theirs)]
        (s1, n1), (s2, n2) = spreads
        return stats.ttest_ind_from_stats(
            np.mean(ours) - margin, s1, n1, np.mean(theirs), s2, n2, equal_var=False, alternative="less"
        ).pvalue

    assert seeds_needed_of_both(ours, theirs, margin) == next(k for k in range(99) if chance(k) < 0.01) > 0
    assert seeds_needed_of_both(ours, theirs, -0.0433) is None, "that far apart they are not"
    assert seeds_needed_of_both(ours, [2.0, 2.001, 2.002], margin) == 0
    assert seeds_needed_of_both([1.0], theirs, margin) == 2


def test_a_score_in_nats_per_token():
    assert nats_per_token(1.7334, 95_255, 28_570) == pytest.approx(1.7334 * 95_255 * math.log(2) / 28_570)


def test_the_interval_covers_and_the_test_errs_as_often_as_they_say():
    """4,000 sweeps of 3 seeds against 5, of unequal spreads, that differ in nothing: 95 % and 1 %, within 4 sigma."""
    drawn, covered, wrong = np.random.default_rng(2), 0, 0
    for ours, theirs in zip(drawn.normal(1.7, 0.004, (4_000, 3)), drawn.normal(1.7, 0.002, (4_000, 5)), strict=True):
        found = welch(ours.tolist(), theirs.tolist())
        covered += found.low <= 0 <= found.high
        wrong += found.below < 0.01
    assert covered / 4_000 == pytest.approx(0.95, abs=0.014)
    assert wrong / 4_000 == pytest.approx(0.01, abs=0.0065)


def test_documents_of_unequal_length_do_not_make_a_null_difference_sure():
    """3,000 texts of 34 documents whose lengths vary as pocket's do (log-normal, sigma 1.5): at 1 % at most 1.7 %."""
    drawn, wrong, covered = np.random.default_rng(3), 0, 0
    for _ in range(3_000):
        sizes = drawn.lognormal(0, 1.5, 34)
        found = paired_by_size(sizes**0.75 * drawn.normal(0, 1, 34), sizes)
        wrong += found.below < 0.01
        covered += found.low <= 0 <= found.high
    assert wrong / 3_000 < 0.017
    assert covered / 3_000 > 0.94
