"""The t-test of a few seeds, against scipy."""

import pytest
from scipy import stats

from fairway.lab.statistics import chance_above, seeds_needed, student_tail


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 31])
def test_the_tail_is_that_of_students_distribution(freedom):
    for t in (-4.0, -0.3, 0.0, 0.7, 2.5, 9.0, 40.0):
        assert student_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), abs=1e-14)


def test_the_chance_is_that_of_the_one_sided_t_test():
    values = [1.1175, 1.1180, 1.1177]
    for bound in (1.10, 1.118, 1.12, 1.2):
        expected = stats.ttest_1samp(values, bound, alternative="less").pvalue
        assert chance_above(values, bound) == pytest.approx(expected, abs=1e-12)
    assert chance_above([1.0, 1.0], 1.1) == 0.0
    assert chance_above([1.0, 1.0], 1.0) == 1.0


def test_the_seeds_still_needed_are_the_fewest_that_would_show_it():
    values = [1.1, 1.12, 1.09]
    needed = seeds_needed(values, 1.15)
    spread, mean = stats.tstd(values), sum(values) / 3
    first = next(n for n in range(3, 99) if stats.t.sf((1.15 - mean) / (spread / n**0.5), n - 1) < 0.01)
    assert needed == first - 3 > 0
    assert seeds_needed(values, 2.0) == 0
    assert seeds_needed(values, 1.0) is None
    assert seeds_needed([1.0], 9.9) == 2, "one value has no spread; three are usual"
