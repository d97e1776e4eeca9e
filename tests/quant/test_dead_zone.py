"""Rounding that leans towards zero: where its thresholds lie, what it buys, and that without it nothing changes."""

import math

import pytest
import torch

from fairway.quant import ScaleSpec, entropy, nearest_codes, row_scales
from fairway.quant.dead_zone import towards_zero
from fairway.quant.rounding import gptq, nearest


def by_the_definition(y: float, width: float) -> int:
    """One number: the code moves towards zero unless |y| exceeds the threshold below it."""
    code = 0
    while abs(y) > code + 0.5 + width:
        code += 1
    return int(math.copysign(code, y))


@pytest.mark.parametrize("width", [0.125, 0.25, 0.4375])
def test_a_code_falls_unless_its_weight_exceeds_the_threshold(width: float) -> None:
    y = torch.arange(-640, 641, dtype=torch.float64) / 128  # every threshold exactly, and both its sides
    found = towards_zero(y, width)
    assert found.tolist() == [by_the_definition(value, width) for value in y.tolist()]
    assert float(found[y == 0.5 + width]) == 0
    assert float(found[y == -1.5 - width]) == -1


def test_whole_codes_stay_and_signs_mirror() -> None:
    whole = torch.arange(-127.0, 128.0)
    y = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 4
    for width in (0.0, 0.2, 0.49):
        assert torch.equal(towards_zero(whole, width), whole)
        assert torch.equal(towards_zero(-y, width), -towards_zero(y, width))


def test_without_a_width_it_is_round_to_nearest() -> None:
    y = torch.arange(-64, 65) / 16
    assert torch.equal(towards_zero(y, 0.0), torch.round(y))
    assert torch.equal(towards_zero(y, 0.0), torch.round(y))
    weight = torch.randn(9, 31, generator=torch.Generator().manual_seed(1))
    scales = row_scales(weight, 4, ScaleSpec())
    expected = nearest_codes(weight, scales, 4).to(torch.int8)
    assert torch.equal(nearest.solve(weight, scales, 4, None, nearest.Spec()).codes, expected)


def laplacian(width: float, step: float) -> tuple[float, float]:
    """(bits per code, mean squared error) of a unit Laplacian on a grid, by adding up its cells' integrals."""
    grid = torch.arange(-60, 61, dtype=torch.float64)
    x = torch.linspace(-40, 40, 4_000_001, dtype=torch.float64)
    density = torch.exp(-x.abs()) / 2 * (x[1] - x[0])
    codes = towards_zero(x / step, width).clamp(-60, 60)
    share = torch.zeros_like(grid).scatter_add_(0, (codes + 60).long(), density)
    share = share[share > 0]
    return float(-(share * share.log2()).sum()), float((density * (codes * step - x).square()).sum())


def test_on_laplacian_weights_a_dead_zone_is_cheaper_at_the_same_error() -> None:
    """Sullivan 1996: at low rates the best entropy-coded quantiser of a Laplacian has a wider cell at zero."""
    bits, error = laplacian(0.0, 1.5)
    low, high = 0.5, 1.5  # the step at which the dead zone's error is the same
    for _ in range(30):
        step = (low + high) / 2
        low, high = (step, high) if laplacian(0.15, step)[1] < error else (low, step)
    wider, same = laplacian(0.15, low)
    assert same == pytest.approx(error, rel=1e-4)
    assert wider < 0.98 * bits


def test_gptq_s_zeros_grow_with_the_width_and_its_entropy_falls() -> None:
    chance = torch.Generator().manual_seed(2)
    inputs = torch.randn(200, 48, generator=chance) @ torch.randn(48, 48, generator=chance)
    weight = torch.randn(64, 48, generator=chance)
    scales = row_scales(weight, 4, ScaleSpec(rule="absolute", k=6.0))
    found = [
        gptq.solve(weight, scales, 4, inputs.T @ inputs, gptq.Spec(), width).codes for width in (0.0, 0.1, 0.2, 0.3)
    ]
    zeros = [float((codes == 0).double().mean()) for codes in found]
    bits = [entropy(codes.numpy()) for codes in found]
    assert zeros == sorted(zeros)
    assert zeros[-1] > 1.2 * zeros[0]
    assert bits == sorted(bits, reverse=True)
