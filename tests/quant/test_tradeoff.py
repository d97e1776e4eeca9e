"""What a grid is expected to cost and to do, against what rounding really does and against closed forms."""

import math

import numpy as np
import pytest
import torch

from fairway.model import Tag
from fairway.quant import entropy, factored, objective
from fairway.quant.dead_zone import towards_zero
from fairway.quant.rounding import gptq
from fairway.quant.tradeoff import DEAD_ZONES, EMBEDDING, HEAD, MATRIX, TABLE, kappa, tradeoff

UP, HEADED, LOOKED_UP = Tag("matrix", "up", 0), Tag("table", "embedding", None), Tag("table", "bigram", None)


def drawn(rows: int, cols: int, seed: int, correlated: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the Hessian of inputs that go together as a trained model's do."""
    chance = torch.Generator().manual_seed(seed)
    weight = 0.03 * torch.randn(rows, cols, generator=chance)
    inputs = torch.randn(4 * cols, cols, generator=chance)
    if correlated:
        inputs = inputs @ torch.randn(cols, cols, generator=chance) / math.sqrt(cols) + inputs[:, :1]
    return weight, inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0, 1.8])
@pytest.mark.parametrize("zone", [0, 2])
def test_it_foretells_what_gptq_comes_to(share: float, zone: int) -> None:
    weight, hessian = drawn(160, 96, 5)
    factor = factored(hessian, gptq.Spec())
    known = tradeoff(UP, weight, hessian, factor)
    i = int(np.argmin(abs(np.log(known.steps / (share * known.rms)))))
    scales = torch.full((160,), float(known.steps[i])).half()
    codes = _solve(weight, scales, factor, DEAD_ZONES[zone])
    harm = objective(weight, codes.float() * scales.float()[:, None], hessian)
    assert known.damage[i, zone] == pytest.approx(kappa(UP, weight, hessian) * harm, rel=0.12)
    assert known.bits[i, zone] == pytest.approx(entropy(codes.numpy()), abs=0.03)


def _solve(weight, scales, factor, dead_zone):
    return gptq.solve(weight, scales, 8, factor, gptq.Spec(), dead_zone).codes


def test_fine_grids_follow_the_closed_forms() -> None:
    """h(w) − log2 s bits for a Gaussian, s²/12 of error, κ tr(H)/cols per unit where inputs are uncorrelated."""
    weight, _ = drawn(256, 128, 6)
    hessian = 3.0 * torch.eye(128)
    known = tradeoff(UP, weight, hessian, factored(hessian, gptq.Spec(damping=1e-9)))
    step = known.steps[0]
    differential = math.log2(known.rms * math.sqrt(2 * math.pi * math.e))
    assert known.bits[0, 0] == pytest.approx(differential - math.log2(step), abs=0.02)
    expected = MATRIX / (3 * float(weight.square().sum())) * 3 * step**2 / 12 * weight.numel()
    assert known.damage[0, 0] == pytest.approx(expected, rel=0.03)


def test_a_table_is_rounded_to_nearest() -> None:
    weight, _ = drawn(100, 40, 7)
    known = tradeoff(LOOKED_UP, weight, None, None)
    for i in (0, len(known.steps) // 2, -1):
        for j, zone in enumerate(DEAD_ZONES):
            codes = towards_zero(weight.double() / known.steps[i], zone).clamp(-127, 127)
            error = float((weight.double() - codes * known.steps[i]).square().sum())
            assert known.damage[i, j] == pytest.approx(TABLE * error / float(weight.double().square().sum()), rel=1e-6)
            assert known.bits[i, j] == pytest.approx(entropy(codes.to(torch.int8).numpy()), abs=1e-9)


def test_the_weight_of_an_error_is_that_of_its_kind() -> None:
    weight, hessian = drawn(50, 30, 8)
    assert kappa(UP, weight, hessian) == pytest.approx(MATRIX / objective(weight, 0 * weight, hessian))
    assert kappa(HEADED, weight, hessian) == HEAD / 50
    assert kappa(HEADED, weight, None) == pytest.approx(EMBEDDING / float(weight.square().sum()))
    assert kappa(LOOKED_UP, weight, None) == pytest.approx(TABLE / float(weight.square().sum()))


def test_damage_rises_and_bits_fall_with_the_step() -> None:
    weight, hessian = drawn(64, 48, 9)
    known = tradeoff(UP, weight, hessian, factored(hessian, gptq.Spec()))
    assert (np.diff(known.steps) > 0).all()
    assert (np.diff(known.damage[:, 0]) > 0).all()
    assert (np.diff(known.bits[:, 0]) < 0.02).all()
    assert (known.bits[:, -1] <= known.bits[:, 0] + 1e-9).all(), "a dead zone makes codes cheaper"


def test_the_finest_step_is_the_one_beyond_which_cutting_off_costs_more() -> None:
    weight, _ = drawn(400, 50, 11)
    known = tradeoff(LOOKED_UP, weight, None, None)
    for step in known.steps[0] * 2.0 ** np.array([-0.5, -0.25]):
        codes = torch.round(weight.double() / step).clamp(-127, 127)
        error = float((weight.double() - codes * step).square().sum())
        assert TABLE * error / float(weight.double().square().sum()) > known.damage[0, 0]
    assert known.largest > 127 * known.steps[0], "a few weights are cut off where that is best"


def test_it_is_the_same_every_time_and_a_tensor_of_zeros_is_no_trouble() -> None:
    weight, hessian = drawn(300, 260, 10)  # more than are sampled
    factor = factored(hessian, gptq.Spec())
    a, b = tradeoff(UP, weight, hessian, factor), tradeoff(UP, weight, hessian, factor)
    assert (a.bits == b.bits).all()
    assert (a.damage == b.damage).all()
    empty = tradeoff(UP, torch.zeros(8, 260), hessian, factor)
    assert np.isfinite(empty.damage).all()
    assert (empty.bits == 0).all()
