"""Write-once: what the ledger refuses, and what it adds up."""

import math

import numpy as np
import pytest

from fairway.base.errors import HonestyError
from fairway.score.ledger import Ledger


def at(*positions: int) -> np.ndarray:
    return np.array(positions, dtype=np.int64)


def test_the_score_is_the_exact_sum_of_what_was_paid():
    prices = np.random.default_rng(0).exponential(3.0, 100_000)
    ledger = Ledger(len(prices))
    order = np.random.default_rng(1).permutation(len(prices))
    for part in np.array_split(order, 7):
        ledger.pay(part, prices[part])
    assert ledger.settle() == pytest.approx(math.fsum(prices), rel=1e-13)
    assert ledger.code_length_bits == pytest.approx(math.fsum(prices) / math.log(2), rel=1e-13)


def test_a_position_cannot_be_paid_twice():
    ledger = Ledger(4)
    ledger.pay(at(1), np.ones(1))
    with pytest.raises(HonestyError, match=r"position 1.*second payment"):
        ledger.pay(at(0, 1), np.zeros(2))


def test_a_position_cannot_be_paid_twice_in_one_payment():
    with pytest.raises(HonestyError, match=r"position 2.*second payment"):
        Ledger(4).pay(at(2, 3, 2), np.ones(3))


@pytest.mark.parametrize("price", [float("nan"), float("inf"), -float("inf")])
def test_a_price_that_is_not_finite_is_refused(price):
    with pytest.raises(HonestyError, match=r"position 3.*not finite"):
        Ledger(4).pay(at(2, 3), np.array([1.0, price]))


def test_a_negative_price_is_refused_beyond_noise():
    ledger = Ledger(2)
    ledger.pay(at(0), np.array([-1e-12]))
    assert ledger.price(at(0)) == 0.0
    with pytest.raises(HonestyError, match="no probability is above 1"):
        ledger.pay(at(1), np.array([-1e-6]))


@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_that_does_not_exist_is_refused(position):
    with pytest.raises(HonestyError, match=f"position {position} does not exist"):
        Ledger(4).pay(at(0, position), np.ones(2))


def test_unequal_lengths_are_refused():
    with pytest.raises(HonestyError, match="pay one for each"):
        Ledger(4).pay(at(0, 1), np.ones(1))


def test_a_refused_payment_books_nothing():
    ledger = Ledger(2)
    with pytest.raises(HonestyError):
        ledger.pay(at(0, 1), np.array([1.0, float("nan")]))
    assert not ledger.paid(at(0, 1)).any()


def test_there_is_no_score_until_everything_is_paid():
    ledger = Ledger(3)
    ledger.pay(at(0, 2), np.ones(2))
    with pytest.raises(HonestyError, match="no score yet"):
        _ = ledger.code_length_bits
    with pytest.raises(HonestyError, match="position 1 of 3 is paid 0 times"):
        ledger.settle()
    ledger.pay(at(1), np.ones(1))
    assert ledger.settle() == 3.0


def test_a_settled_ledger_takes_no_more():
    ledger = Ledger(1)
    ledger.pay(at(0), np.ones(1))
    ledger.settle()
    with pytest.raises(HonestyError, match="final"):
        ledger.pay(at(0), np.zeros(1))


def test_the_prices_it_hands_out_are_copies():
    ledger = Ledger(1)
    ledger.pay(at(0), np.ones(1))
    ledger.price(at(0))[0] = 0.0
    ledger.price(slice(None))[0] = 0.0
    assert ledger.settle() == 1.0
