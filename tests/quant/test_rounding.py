"""Every rounding technique keeps the slot's promise; GPTQ is GPTQ."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from fairway.base import slots
from fairway.base.errors import ContractError
from fairway.quant import ScaleSpec, largest, objective, row_scales
from fairway.quant.rounding import ascending_plain, gptq, nearest

FOLDER = "fairway.quant.rounding"
TECHNIQUES = [slots.technique(FOLDER, kind) for kind in slots.kinds(FOLDER)]
each = pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda module: module.__name__.rsplit(".", 1)[-1])


def problem(rows: int, cols: int, seed: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Random weights, and the Hessian of strongly correlated inputs."""
    chance = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or cols, cols, generator=chance) * torch.rand(cols, generator=chance) ** 2
    inputs = torch.randn(4 * cols, rank or cols, generator=chance) @ mixing + 0.3 * torch.randn(1, generator=chance)
    return torch.randn(rows, cols, generator=chance), inputs.T @ inputs / len(inputs)


def by_down_dating(weight: Tensor, scales: Tensor, bits: int, hessian: Tensor, damping: float) -> Tensor:
    """GPTQ as its paper derives it from Optimal Brain Quantisation: after each column the explicit inverse loses that
    column by Gaussian elimination, and every weight still free moves at once. No Cholesky factor, no blocks."""
    w, h, limit = weight.double().clone(), hessian.double().clone(), largest(bits)
    for j in range(len(h)):
        if h[j, j] == 0:
            h[j, j], w[:, j] = 1.0, 0.0
    diagonal = h.diagonal().clone()
    inverse = torch.linalg.inv(h + damping * diagonal.mean() * torch.eye(len(h), dtype=torch.float64))
    codes = torch.zeros_like(w)
    for j in sorted(range(len(h)), key=lambda j: -float(diagonal[j])):
        codes[:, j] = torch.clamp(torch.round(w[:, j] / scales.double()), -limit, limit)
        error = (w[:, j] - codes[:, j] * scales.double()) / inverse[j, j]
        w -= error[:, None] * inverse[j][None, :]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0.0
        inverse[j, j] = 1.0  # never read again
    return codes.to(torch.int8)


@pytest.mark.parametrize(
    ("rows", "cols", "bits", "block"), [(5, 17, 5, 128), (8, 40, 3, 7), (3, 64, 8, 1), (6, 33, 2, 16)]
)
def test_gptq_is_the_obq_update_with_an_explicit_inverse(rows: int, cols: int, bits: int, block: int) -> None:
    weight, hessian = problem(rows, cols, seed=cols)
    hessian[:, 3] = hessian[3, :] = 0.0  # a dead column
    scales = row_scales(weight, bits, ScaleSpec())
    solution = gptq.solve(weight, scales, bits, hessian, gptq.Spec(block=block))
    assert torch.equal(solution.codes, by_down_dating(weight, scales, bits, hessian, 0.01))
    assert solution.facts == {"dead_columns": 1.0, "damping": 0.01, "damping_raised": 0.0}
    assert not solution.codes[:, 3].any()


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_gptq_beats_round_to_nearest_on_the_same_scales_and_hessian(bits: int, seed: int) -> None:
    weight, hessian = problem(24, 48, seed)
    scales = row_scales(weight, bits, ScaleSpec())
    errors = {
        technique.__name__: objective(
            weight, technique.solve(weight, scales, bits, hessian, technique.Spec()).codes * scales[:, None], hessian
        )
        for technique in (gptq, nearest, ascending_plain)
    }
    assert errors[gptq.__name__] < errors[nearest.__name__]
    assert errors[gptq.__name__] < errors[ascending_plain.__name__]


def test_the_objective_is_the_squared_error_of_the_outputs() -> None:
    chance = torch.Generator().manual_seed(1)
    inputs, weight = torch.randn(50, 6, generator=chance), torch.randn(4, 6, generator=chance)
    rounded = torch.round(weight)
    difference = inputs @ weight.T - inputs @ rounded.T
    expected = float(difference.square().sum()) / len(inputs)
    assert objective(weight, rounded, inputs.T @ inputs / len(inputs)) == pytest.approx(expected, rel=1e-5)


def test_with_a_diagonal_hessian_nothing_beats_nearest() -> None:
    weight, _ = problem(9, 20, seed=0)
    scales = row_scales(weight, 4, ScaleSpec())
    diagonal = torch.diag(torch.rand(20) + 0.1)
    expected = nearest.solve(weight, scales, 4, None, nearest.Spec()).codes
    assert torch.equal(gptq.solve(weight, scales, 4, diagonal, gptq.Spec()).codes, expected)


def test_the_inverse_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    _, hessian = problem(1, 30, seed=4)
    upper, damping = gptq.inverse_factor(hessian.double(), 0.01)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(30, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(upper, expected, rtol=1e-8, atol=1e-8)
    assert damping == 0.01


def test_raised_damping_is_a_fact() -> None:
    weight, hessian = problem(4, 12, seed=2)
    shift = torch.linalg.eigvalsh(hessian)[0] + 0.05 * hessian.diagonal().mean()
    indefinite = hessian - shift * torch.eye(12)
    scales = row_scales(weight, 5, ScaleSpec())
    solution = gptq.solve(weight, scales, 5, indefinite, gptq.Spec())
    assert solution.facts["damping_raised"] == 1.0
    assert solution.facts["damping"] == pytest.approx(0.1)


def test_a_hopeless_hessian_is_refused() -> None:
    weight, scales = torch.randn(2, 4), torch.ones(2, dtype=torch.float16)
    with pytest.raises(ContractError, match="not positive definite"):
        gptq.solve(weight, scales, 5, -torch.eye(4), gptq.Spec())
    with pytest.raises(ContractError, match="non-finite"):
        gptq.solve(weight, scales, 5, torch.full((4, 4), float("nan")), gptq.Spec())


def test_the_study_s_solver_differs_only_as_described() -> None:
    """Two columns by hand: ascending order, plain inverse."""
    weight, scales = torch.tensor([[0.7, 0.2]]), torch.tensor([1.0], dtype=torch.float16)
    hessian = torch.tensor([[2.0, 0.9], [0.9, 1.0]])  # the second column is the less used one: it goes first
    spec = ascending_plain.Spec()
    inverse = torch.linalg.inv(hessian.double() + 0.01 * 1.5 * torch.eye(2, dtype=torch.float64))
    moved = 0.7 - 0.2 / inverse[1, 1] * inverse[1, 0]  # column 1 rounds to 0 and column 0 makes up for it
    solution = ascending_plain.solve(weight, scales, 5, hessian, spec)
    assert solution.codes.tolist() == [[int(torch.round(moved)), 0]]
    assert solution.facts == {"damping": 0.01, "diagonal_fallback": 0.0}
    fallen = ascending_plain.solve(weight, scales, 5, -hessian, spec)
    assert fallen.facts["diagonal_fallback"] == 1.0


@each
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_codes_lie_on_the_grid_and_arguments_stay(technique: ModuleType, bits: int) -> None:
    weight, hessian = problem(7, 29, seed=bits, rank=5)  # fewer directions than columns: H is singular
    hessian[:, :2] = hessian[:2, :] = 0.0
    scales = row_scales(weight, bits, ScaleSpec(rule="sdclip", k=2.0))
    before = (weight.clone(), scales.clone(), hessian.clone())
    first = technique.solve(weight, scales, bits, hessian, technique.Spec())
    again = technique.solve(weight, scales, bits, hessian, technique.Spec())
    assert first.codes.dtype == torch.int8
    assert first.codes.shape == weight.shape
    assert int(first.codes.abs().max()) <= largest(bits)
    assert torch.equal(first.codes, again.codes)
    assert all(torch.equal(x, y) for x, y in zip(before, (weight, scales, hessian), strict=True))


@each
def test_a_row_s_codes_depend_on_no_other_row(technique: ModuleType) -> None:
    weight, hessian = problem(6, 21, seed=9)
    scales = row_scales(weight, 4, ScaleSpec())
    whole = technique.solve(weight, scales, 4, hessian, technique.Spec()).codes
    alone = technique.solve(weight[2:3], scales[2:3], 4, hessian, technique.Spec()).codes
    assert torch.equal(whole[2:3], alone)


@each
def test_weights_that_lie_on_the_grid_stay_where_they_are(technique: ModuleType) -> None:
    chance = torch.Generator().manual_seed(6)
    codes = torch.randint(-15, 16, (5, 18), generator=chance).to(torch.int8)
    scales = (0.1 * torch.rand(5, generator=chance) + 0.01).to(torch.float16)
    _, hessian = problem(1, 18, seed=6)
    weight = codes.float() * scales.float()[:, None]
    assert torch.equal(technique.solve(weight, scales, 5, hessian, technique.Spec()).codes, codes)


def test_a_factor_of_another_damping_is_refused() -> None:
    weight, hessian = problem(4, 12, seed=2)
    factor = gptq.factorise(hessian, gptq.Spec(damping=0.05))
    scales = row_scales(weight, 5, ScaleSpec())
    with pytest.raises(ContractError, match=r"a factor of damping 0\.05, 0\.01 is wanted"):
        gptq.solve(weight, scales, 5, factor, gptq.Spec())


@each
def test_a_missing_hessian_is_named(technique: ModuleType) -> None:
    weight, scales = torch.randn(2, 4), torch.ones(2, dtype=torch.float16)
    if technique.NEEDS_HESSIAN:
        with pytest.raises(ContractError, match="no Hessian"):
            technique.solve(weight, scales, 5, None, technique.Spec())
    else:
        assert technique.solve(weight, scales, 5, None, technique.Spec()).codes.shape == (2, 4)
