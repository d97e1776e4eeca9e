"""Exact mode against its definition in Python's own integers, and what it costs against the float64 softmax."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fairway.base.errors import ArtifactError, ContractError, HonestyError, RecipeError
from fairway.score import exact

FORMAT = "8870be9b33a31ab85e4a813a3e501f5ef36b7b5d928f549c657f316fc1422afd"


def by_definition(logits: np.ndarray, temperature: float = 1.0) -> tuple[list[list[int]], list[list[int]]]:
    """z and counts, one number at a time: float only in the first line, where Python rounds half to even, exactly."""
    all_z, all_counts, table = [], [], exact.table().tolist()
    for row in logits.tolist():
        z = [round(logit / temperature * 64) for logit in row]
        top = max(z)
        weights = [table[min(top - own, len(table) - 1)] for own in z]
        total = sum(weights)
        counts = [1 + weight * (2**24 - len(row)) // total for weight in weights]
        counts[z.index(top)] += 2**24 - sum(counts)
        all_z.append(z)
        all_counts.append(counts)
    return all_z, all_counts


def normal(n: int, vocab: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Logits as a model with a softcap of 30 gives them."""
    draws = np.random.default_rng(seed).normal(0, spread, (n, vocab))
    return torch.from_numpy(30 * np.tanh(draws / 30))


def agrees(logits: np.ndarray, temperature: float = 1.0) -> None:
    z = exact.grid(torch.from_numpy(logits), temperature)
    counts = exact.counts(z)
    expected_z, expected_counts = by_definition(logits, temperature)
    assert z.tolist() == expected_z
    assert counts.tolist() == expected_counts
    assert counts.min() >= 1
    assert (counts.sum(axis=1) == 2**24).all()


def test_the_table_is_the_exponential_by_another_way():
    """Taylor's series of exp(−1/64) in fixed point of 300 bits, then powers of it: no decimal arithmetic."""
    one = 1 << 300
    base, term, k = 0, one, 0
    while term:
        base += term if k % 2 == 0 else -term
        k += 1
        term //= 64 * k
    power, expected = one, []
    while not expected or expected[-1]:
        expected.append(((power << 32) + one // 2) // one)
        power = power * base // one
    table = exact.table()
    assert table.tolist() == expected
    assert len(table) == 1465
    assert table[0] == 2**32
    assert [abs(w - 2**32 * math.exp(-d / 64)) <= 0.5 + 1e-5 for d, w in enumerate(table.tolist())] == [True] * 1465


def test_the_table_is_part_of_the_format():
    """A changed digit is another format version."""
    assert hashlib.sha256(exact.table().astype("<i8").tobytes()).hexdigest() == FORMAT


def test_the_table_does_not_depend_on_the_callers_decimal_context():
    import decimal

    with decimal.localcontext(decimal.Context(prec=5, rounding=decimal.ROUND_UP)):
        built = exact.table.__wrapped__()
    assert np.array_equal(built, exact.table())


def test_the_table_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        exact.table()[0] = 1


@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 4), st.integers(2, 40)),
        elements=st.floats(-40, 40) | st.sampled_from([-30.0, 0.0, 30.0, 1 / 128, 3 / 128, -1 / 128, 22.875, 1e300]),
    ),
    st.sampled_from([1.0, 0.97, 1.3, 0.1]),
)
@settings(max_examples=150, deadline=None)
def test_grid_and_counts_are_their_definition(logits, temperature):
    limit = 2.0**55 * temperature  # further logits count as that
    agrees(np.clip(logits, -limit, limit), temperature)
    clipped = exact.grid(torch.from_numpy(np.clip(logits, -limit, limit)), temperature)
    assert np.array_equal(exact.grid(torch.from_numpy(logits), temperature), clipped)


@pytest.mark.parametrize("vocab", [2, 300, 2048, 65536])
@pytest.mark.parametrize("temperature", [1.0, 0.93])
def test_counts_are_their_definition_in_every_vocabulary(vocab, temperature):
    chance = np.random.default_rng(vocab)
    rows = [
        *normal(3, vocab).numpy(),
        np.zeros(vocab),  # all equal: the rest goes to the first
        np.full(vocab, -30.0),
        np.where(np.arange(vocab) == vocab - 1, 1e6, 0.0),  # one huge
        np.where(np.arange(vocab) % 2, 30.0, -30.0),
        np.round(chance.normal(0, 1, vocab)),  # ties
        (chance.integers(-500, 500, vocab) + 0.5) / 64,  # each on a boundary: to even
    ]
    agrees(np.array(rows), temperature)


def test_many_rows_are_one_row_many_times():
    """Blocks of rows are worked on in turn: none is left out, none is seen twice."""
    logits = normal(200, 700)
    z, counts = exact.grid(logits, 0.9), exact.counts(exact.grid(logits, 0.9))
    assert np.array_equal(z, np.concatenate([exact.grid(row[None], 0.9) for row in logits]))
    assert np.array_equal(counts, np.concatenate([exact.counts(row[None]) for row in z]))


def test_what_is_left_goes_to_the_first_of_the_largest():
    counts = exact.counts(np.array([[5, 7, 7, 7]]))
    assert counts[0, 1] > counts[0, 2] == counts[0, 3]
    assert counts[0, 1] - counts[0, 2] < 4


def test_counts_follow_the_softmax_of_the_grid():
    z = exact.grid(normal(20, 500))
    shares = torch.softmax(torch.from_numpy(z / 64), dim=1).numpy()
    assert np.abs(exact.counts(z) - 1 - shares * (2**24 - 500)).max() < 500, "at most one count each, and the rest"
    smaller = z < z.max(axis=1, keepdims=True)
    assert np.abs((exact.counts(z) - 1 - shares * (2**24 - 500))[smaller]).max() < 1.01


@pytest.mark.parametrize("wild", [1e300, 1.7e308, 2.0**60])
def test_finite_logits_however_wild_have_counts(wild):
    logits = torch.tensor([[wild, -wild, 0.0], [-wild, 0.0, 1.0], [wild, wild, -wild]], dtype=torch.float64)
    counts = exact.counts(exact.grid(logits, 0.5))
    assert (counts.sum(axis=1) == 2**24).all()
    assert counts[0].tolist() == [2**24 - 2, 1, 1]
    assert counts[1, 0] == 1
    assert counts[1, 2] / counts[1, 1] == pytest.approx(math.e**2, rel=1e-5)
    assert counts[2].tolist() == [2**23, 2**23 - 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("look", [exact.grid, exact.near])
def test_a_logit_that_is_not_finite_is_refused_with_its_place(bad, look):
    logits = normal(300, 400)
    logits[217, 33] = bad
    with pytest.raises(ArtifactError, match=r"row 217, symbol 33\b"):
        look(logits)


def test_wrong_precision_shape_and_temperature_are_refused():
    with pytest.raises(HonestyError, match="float64"):
        exact.grid(normal(2, 5).to(torch.float32))
    with pytest.raises(HonestyError, match="float64"):
        exact.grid(torch.zeros(2, 5, dtype=torch.int64))
    for shape in [(5,), (2, 1), (1, 65537), (1, 2, 3)]:
        with pytest.raises(ContractError, match="shape"):
            exact.grid(torch.zeros(shape, dtype=torch.float64))
        with pytest.raises(ContractError, match="shape"):
            exact.counts(np.zeros(shape, np.int64))
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="temperature"):
            exact.grid(normal(1, 3), temperature)


def test_no_rows_are_no_counts():
    none = torch.zeros(0, 7, dtype=torch.float64)
    assert exact.counts(exact.grid(none)).shape == (0, 7)
    assert [len(column) for column in exact.near(none)] == [0, 0, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_logits_near_a_boundary_are_listed_with_their_rounding(temperature):
    logits = torch.round(normal(300, 400) * 64)  # far from any boundary, in steps
    distances = {(0, 3): 0.9e-10, (7, 399): -0.9e-10, (150, 0): 0.0, (299, 12): 1.1e-10, (299, 13): -1.1e-10}
    for (row, symbol), distance in distances.items():
        logits[row, symbol] = 10.5 + row + 64 * distance
    logits *= temperature / 64
    found = exact.near(logits, temperature)
    assert list(zip(found.rows.tolist(), found.symbols.tolist(), strict=True)) == [(0, 3), (7, 399), (150, 0)]
    assert found.z.tolist()[:2] == [11, 17]
    assert np.array_equal(found.z, exact.grid(logits, temperature)[found.rows, found.symbols])


def test_rounding_is_the_same_on_two_machines_once_the_near_are_overruled():
    """The second machine's logits differ by 5e-15, and the first's lie on boundaries wherever that can matter."""
    here = normal(64, 300)
    here[::2, ::3] = (torch.round(here[::2, ::3] * 64) + 0.5) / 64
    there = here + 5e-15 * torch.from_numpy(np.random.default_rng(1).choice([-1.0, 1.0], here.shape))
    z, other, listed = exact.grid(here), exact.grid(there), exact.near(here)
    assert (z != other).sum() > 500
    exact.overrule(other, listed)
    assert np.array_equal(z, other)
    assert np.array_equal(exact.counts(z), exact.counts(other))


def test_near_boundaries_are_as_rare_as_the_margin_says():
    assert len(exact.near(normal(1000, 1024)).rows) < 5, "expected: 0.013"


@pytest.mark.parametrize("place", [(2, 0), (-1, 0), (0, 3), (0, -1)])
def test_a_rounding_listed_nowhere_is_refused(place):
    row, symbol = (np.array([number]) for number in place)
    with pytest.raises(ArtifactError, match="listed for row"):
        exact.overrule(np.zeros((2, 3), np.int64), exact.Near(row, symbol, np.array([0])))


def test_a_rounding_may_be_one_step_off_and_no_more():
    z = np.zeros((2, 3), np.int64)
    exact.overrule(z, exact.Near(np.array([0, 1]), np.array([1, 2]), np.array([1, -1])))
    assert z.tolist() == [[0, 1, 0], [0, 0, -1]]
    for far in (2, -3, 2**62, -(2**63)):
        with pytest.raises(ArtifactError, match="row 1, symbol 0"):
            exact.overrule(z, exact.Near(np.array([0, 1]), np.array([0, 0]), np.array([0, far])))
    assert z.tolist() == [[0, 1, 0], [0, 0, -1]], "refused before anything was set"


def test_prices_are_code_lengths():
    prices = exact.prices(np.array([1, 2**23, 2**24, 12345]))
    assert prices.dtype == np.float64
    assert prices.tolist() == pytest.approx([24 * math.log(2), math.log(2), 0.0, math.log(2**24 / 12345)], rel=1e-15)
    assert math.copysign(1, prices[2]) == 1.0


@pytest.mark.parametrize(("vocab", "bits"), [(1024, 3e-5), (2048, 4e-5), (8192, 1e-4)])
def test_exactness_costs_next_to_nothing(vocab, bits):
    logits = normal(300, vocab)
    chances = torch.log_softmax(logits, dim=1).numpy()
    extra = (np.exp(chances) * (exact.prices(exact.counts(exact.grid(logits))) + chances)).sum(axis=1) / math.log(2)
    assert 0 < extra.mean() < bits
