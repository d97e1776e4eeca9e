"""Low-rank repair: what it gives back, on which grids, to which matrices."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fairway.base.errors import ContractError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import build, to_plain
from fairway.model import GPT, tags
from fairway.quant import (
    LowRank,
    Quantized,
    QuantSpec,
    RepairSpec,
    dequantized,
    gather,
    objective,
    observed,
    quantize,
    repaired,
)
from fairway.quant.repair import low_rank

Batches = Callable[..., list[Tensor]]
PUBLISHED = RepairSpec("lqer", weighting="plain", refit=False)


def hessian_of(cols: int, seed: int = 0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * cols, cols, generator=chance) @ torch.randn(cols, cols, generator=chance)
    return inputs.T @ inputs / len(inputs)


def an_addend(rows: int = 5, cols: int = 9, rank: int = 2, group: int = 4) -> LowRank:
    chance = np.random.default_rng(0)
    left = chance.integers(-2, 2, (rows, rank)).astype(np.int8)
    right = chance.integers(-8, 8, (rank, cols)).astype(np.int8)
    scales = chance.uniform(0.01, 0.1, -(-rank * cols // group)).astype(np.float16)
    return LowRank(left, np.array([0.37], np.float16), right, scales, group)


def test_an_addend_is_the_sum_of_its_outer_products_to_the_bit() -> None:
    addend = an_addend()
    for row in range(5):
        for col in range(9):
            total = np.float32(0)
            for k in range(2):
                a = np.float32(addend.left[row, k]) * np.float32(addend.left_scale[0])
                b = np.float32(addend.right[k, col]) * np.float32(addend.right_scales[(k * 9 + col) // 4])
                total = np.float32(total + np.float32(a * b))
            assert addend.dequantize()[row, col] == total


def test_a_repaired_matrix_is_the_codes_and_the_addend() -> None:
    codes = np.arange(-22, 23, dtype=np.int8).reshape(5, 9)
    scales = np.linspace(0.1, 0.5, 5).astype(np.float16)
    expected = Quantized(codes, scales, 6).dequantize() + an_addend().dequantize()
    assert np.array_equal(Quantized(codes, scales, 6, an_addend()).dequantize(), expected)


def test_rank_one_by_hand() -> None:
    """E = a bᵀ has one singular value, |a||b|: A = ±a|b| in steps of max/1.5, B = ±b/|b| in steps of max/7.5."""
    a, b = np.array([1.5, -0.9, 0.1, 1.0, -1.4]), np.array([7.0, -3.1, 0.2, 6.2])
    addend = low_rank(torch.from_numpy(np.outer(a, b)), None, replace(PUBLISHED, rank=1))
    sign, length = np.sign(addend.right[0, 0]), np.linalg.norm(b)
    assert addend.left_scale == np.float16(1.5 * length / 1.5)
    assert addend.right_scales == np.float16(7.0 / length / 7.5)
    steps = sign * a * length / addend.left_scale.astype(np.float64)
    assert addend.left[:, 0].tolist() == np.clip(np.round(steps), -2, 1).tolist()
    steps = sign * b / length / addend.right_scales.astype(np.float64)
    assert addend.right[0].tolist() == np.clip(np.round(steps), -8, 7).tolist()


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("weighting", ["plain", "hessian"])
def test_an_error_of_that_rank_is_reproduced_before_the_addend_is_rounded(
    rank: int, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = torch.Generator().manual_seed(rank)
    error = torch.randn(20, rank, generator=chance).double() @ torch.randn(rank, 15, generator=chance).double()
    seen: list[Tensor] = []
    monkeypatch.setattr("fairway.quant.repair._on", lambda x, scale, grid: seen.append(x) or torch.zeros_like(x))
    hessian = hessian_of(15) if weighting == "hessian" else None
    low_rank(error, hessian, RepairSpec("lqer", rank=rank, weighting=weighting, refit=False, group=15))
    left, right = seen
    torch.testing.assert_close(left @ right, error, rtol=1e-8, atol=1e-8)


def test_the_weighted_product_is_the_best_of_its_rank() -> None:
    """Eckart and Young in the metric of H: tr(DHDᵀ) of the rest is the sum of the squared singular values
    that were cut off."""
    chance = torch.Generator().manual_seed(7)
    error, hessian = torch.randn(12, 10, generator=chance).double(), hessian_of(10).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    root = vectors @ values.sqrt().diag() @ vectors.T  # the symmetric root, where the code takes Cholesky's
    u, s, v = torch.linalg.svd(error @ root)
    best = (u[:, :4] * s[:4]) @ v[:4] @ torch.linalg.inv(root)
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fairway.quant.repair._on", lambda x, scale, grid: seen.append(x) or torch.zeros_like(x))
        low_rank(error, hessian, RepairSpec("lqer", refit=False, group=10))
    found = seen[0] @ seen[1]
    torch.testing.assert_close(found, best, rtol=1e-8, atol=1e-8)
    rest = float(((error - found) @ damped * (error - found)).sum())
    assert rest == pytest.approx(float(s[4:].square().sum()), rel=1e-6)


@pytest.mark.parametrize("weighting", ["plain", "hessian"])
@pytest.mark.parametrize("refit", [False, True])
def test_addends_lie_on_their_grids_and_make_the_error_smaller(weighting: str, refit: bool) -> None:
    chance = torch.Generator().manual_seed(3)
    error = torch.randn(60, 4, generator=chance) @ torch.randn(4, 50, generator=chance)
    error += 0.3 * torch.randn(60, 50, generator=chance)
    hessian = hessian_of(50)
    spec = RepairSpec("lqer", rank=4, weighting=weighting, refit=refit, group=16)
    addend = low_rank(error, hessian if weighting == "hessian" else None, spec)
    assert (addend.left.min(), addend.left.max()) >= (-2, -2)
    assert addend.left.max() <= 1
    assert addend.right.min() >= -8
    assert addend.right.max() <= 7
    assert addend.right_scales.shape == (-(-4 * 50 // 16),)
    left = float(objective(error, torch.from_numpy(addend.dequantize()), hessian))
    assert left < 0.75 * float(objective(error, torch.zeros_like(error), hessian))


def test_refitting_answers_the_a_that_is_stored() -> None:
    """No B gives a smaller squared error with this A: the gradient of the unrounded B vanishes; and the published form
    on the same error is worse."""
    chance = torch.Generator().manual_seed(4)
    factors = torch.tensor([10.0, 4.0, 2.0, 1.0])  # singular values far apart: one int2 scale hardly serves them
    error = (torch.randn(64, 4, generator=chance) * factors) @ torch.randn(4, 64, generator=chance)
    left: dict[bool, float] = {}
    for refit in (False, True):
        addend = low_rank(error, None, RepairSpec("lqer", weighting="plain", refit=refit))
        left[refit] = float((error - torch.from_numpy(addend.dequantize())).square().sum())
    assert left[True] < 0.8 * left[False]
    stored = addend.left.astype(np.float64) * float(addend.left_scale[0])
    best, *_ = np.linalg.lstsq(stored, error.double().numpy(), rcond=None)
    steps = np.repeat(addend.right_scales.astype(np.float64), 64)[: addend.right.size].reshape(addend.right.shape)
    assert np.all(np.abs(addend.right * steps - best) <= 0.51 * steps)


def test_the_matrices_with_the_largest_error_are_repaired() -> None:
    chance = torch.Generator().manual_seed(5)
    weights, tensors, hessians = {}, {}, {}
    for i, (size, loud) in enumerate([(1.0, 1.0), (3.0, 1.0), (2.0, 9.0), (4.0, 0.01)]):
        name = f"matrix{i}"
        weights[name] = size * torch.randn(6, 8, generator=chance)
        tensors[name] = Quantized(np.zeros((6, 8), np.int8), np.ones(6, np.float16), 5)
        hessians[name] = loud * torch.eye(8)
    tensors["gain"] = np.ones(3, np.float16)  # type: ignore[assignment]

    def chosen(spec: RepairSpec, known: dict[str, Tensor]) -> set[str]:
        found = repaired(tensors, weights, known, spec)  # type: ignore[arg-type]
        assert list(found) == list(tensors)
        return {name for name, value in found.items() if isinstance(value, Quantized) and value.repair is not None}

    assert chosen(RepairSpec("lqer", count=2, weighting="plain"), hessians) == {"matrix1", "matrix3"}
    assert chosen(RepairSpec("lqer", count=2), hessians) == {"matrix1", "matrix2"}
    assert chosen(RepairSpec("lqer", count=9), {"matrix0": hessians["matrix0"]}) == {"matrix0"}
    assert chosen(RepairSpec("none", count=2), hessians) == set()
    with pytest.raises(ContractError, match="repair: no matrix has a Hessian"):
        chosen(RepairSpec("lqer"), {})
    with pytest.raises(ContractError, match="matrix0: repair needs its float weights"):
        repaired(tensors, {}, hessians, PUBLISHED)  # type: ignore[arg-type]


def test_a_repaired_model_is_nearer_and_its_journal_says_so(model: GPT, batches: Batches) -> None:
    hessians = gather(model, batches(16))
    table = {"matrix": {"bits": 3}, "embedding_hessian": True}
    plain, mended = Run(), Run()
    before = quantize(model, hessians, build(QuantSpec, table), plain)
    spec = build(QuantSpec, {**table, "repair": {"kind": "lqer", "rank": 2, "count": 4}})
    after = quantize(model, hessians, spec, mended)
    touched = [name for name, value in after.items() if isinstance(value, Quantized) and value.repair is not None]
    assert len(touched) == 4
    facts = {name: plain.facts[f"quant.{name}"] for name in hessians}
    assert set(touched) == set(sorted(facts, key=lambda name: -facts[name]["objective"])[:4])
    weights, rounded = dict(model.named_parameters()), dequantized(after)
    for name in hessians:
        fact = mended.facts[f"quant.{name}"]
        assert fact["objective"] == pytest.approx(objective(weights[name].detach(), rounded[name], hessians[name]))
        assert (fact["objective"] < facts[name]["objective"]) == (name in touched)
        assert fact.get("repair_rank") == (2 if name in touched else None)
        assert np.array_equal(before[name].codes, after[name].codes)  # type: ignore[union-attr]
    assert mended.facts["quant"]["objective"] < plain.facts["quant"]["objective"]


def test_repair_by_hessians_calibrates_even_where_the_rounding_needs_none(model: GPT, batches: Batches) -> None:
    spec = build(QuantSpec, {"rounding": "nearest", "repair": {"kind": "lqer", "count": 1, "rank": 1}})
    tensors = quantize(model, gather(model, batches(8)), spec, Run())
    assert len(observed(model, spec)) == 1 + sum(tag.role == "matrix" for tag in tags(model).values())
    assert sum(isinstance(v, Quantized) and v.repair is not None for v in tensors.values()) == 1


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "lqe"}, "repair.kind = 'lqe'"),
        ({"rank": 0}, "repair: rank = 0: at least 1"),
        ({"count": -1}, "repair: count = -1"),
        ({"group": 0}, "repair: group = 0"),
        ({"group": 65_537}, "repair: group = 65537: at most 65,536"),
        ({"weighting": "some"}, "repair.weighting = 'some'"),
    ],
)
def test_an_impossible_repair_is_refused(table: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace(".", r"\.")):
        build(QuantSpec, {"repair": table})


def test_its_spec_survives_a_recipe() -> None:
    spec = build(QuantSpec, {"repair": {"kind": "lqer", "rank": 6, "weighting": "plain", "refit": False}})
    assert build(QuantSpec, to_plain(spec)) == spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"left": np.full((5, 2), 2, np.int8)}, "leave -2 … 1"),
        ({"right": np.full((2, 9), -9, np.int8)}, "leave -8 … 7"),
        ({"left": np.zeros((5, 3), np.int8)}, r"\(5, 3\) · \(2, 9\)"),
        ({"left": np.zeros((5, 2), np.int16)}, "int16"),
        ({"left": np.zeros((0, 2), np.int8)}, r"\(0, 2\)"),
        ({"left_scale": np.ones(2, np.float16)}, r"\(1,\) float16 is expected"),
        ({"right_scales": np.ones(4, np.float16)}, r"\(5,\) float16 is expected"),
        ({"right_scales": np.full(5, np.inf, np.float16)}, "not finite"),
        ({"left_scale": np.full(1, -1, np.float16)}, "negative"),
        ({"group": 0}, "groups of 0"),
    ],
)
def test_what_is_no_addend_cannot_be_made(changes: dict[str, object], words: str) -> None:
    addend = an_addend()
    fields = {name: getattr(addend, name) for name in ("left", "left_scale", "right", "right_scales", "group")}
    with pytest.raises(ContractError, match=words):
        LowRank(**{**fields, **changes})  # type: ignore[arg-type]


def test_an_addend_of_another_shape_is_refused() -> None:
    with pytest.raises(ContractError, match="repair: "):
        Quantized(np.zeros((5, 8), np.int8), np.ones(5, np.float16), 5, an_addend())
