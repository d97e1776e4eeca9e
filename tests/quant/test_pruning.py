"""Selective pruning of codes ±1: which go first, how many go, and that nothing else moves."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fairway.base.errors import ContractError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import build
from fairway.model import GPT
from fairway.quant import (
    Quantized,
    QuantSpec,
    Tensors,
    dequantized,
    gather,
    objective,
    ones,
    quantize,
    rankable,
    selective,
)

Batches = Callable[..., list[Tensor]]


def two_matrices() -> tuple[Tensors, dict[str, Tensor], dict[str, Tensor]]:
    """Codes of −3 … 3 with a step for each row, weights near them, correlated Hessians; and a gain."""
    chance = np.random.default_rng(1)
    tensors: Tensors = {}
    weights, hessians = {}, {}
    for name, (rows, cols) in {"first": (4, 6), "second": (5, 3)}.items():
        codes = chance.integers(-3, 4, (rows, cols)).astype(np.int8)
        scales = chance.uniform(0.05, 0.5, rows).astype(np.float16)
        tensors[name] = Quantized(codes, scales, 3)
        noise = chance.uniform(-0.5, 0.5, codes.shape) * scales[:, None]
        weights[name] = torch.from_numpy(tensors[name].dequantize() + noise).float()
        inputs = torch.from_numpy(chance.normal(size=(20, cols)) * chance.uniform(0.2, 3, cols)).float()
        hessians[name] = inputs.T @ inputs / 20
    tensors["gain"] = np.ones(3, np.float16)
    return tensors, weights, hessians


def by_hand(
    tensors: Tensors, weights: dict[str, Tensor], hessians: dict[str, Tensor], by: str
) -> list[tuple[float, str, int, int]]:
    """Every code ±1 with its rank, least first, one code at a time; "damage" by the objective's own difference."""
    found = []
    for name in hessians:
        value = tensors[name]
        assert isinstance(value, Quantized)
        before = objective(weights[name], torch.from_numpy(value.dequantize()), hessians[name])
        for (i, j), code in np.ndenumerate(value.codes):
            if abs(code) != 1:
                continue
            rank = float(value.scales[i]) ** 2
            if by == "hessian":
                rank *= float(hessians[name][j, j])
            if by == "damage":
                codes = value.codes.copy()
                codes[i, j] = 0
                after = Quantized(codes, value.scales, value.bits).dequantize()
                rank = objective(weights[name], torch.from_numpy(after), hessians[name]) - before
            found.append((rank, name, i, j))
    return sorted(found, key=lambda item: item[0])


@pytest.mark.parametrize("by", ["scale", "hessian", "damage"])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_the_pruned_are_those_of_the_least_rank(by: str, count: int) -> None:
    tensors, weights, hessians = two_matrices()
    ranked = by_hand(tensors, weights, hessians, by)
    found = selective(tensors, count, by, weights, hessians)  # type: ignore[arg-type]
    assert list(found) == list(tensors)
    assert found["gain"] is tensors["gain"]
    zeroed = []
    for name in hessians:
        one, other = tensors[name], found[name]
        assert isinstance(one, Quantized)
        assert isinstance(other, Quantized)
        changed = one.codes != other.codes
        assert not other.codes[changed].any()
        assert np.all(np.abs(one.codes[changed]) == 1)
        assert np.array_equal(one.scales, other.scales)
        zeroed += [(name, i, j) for i, j in np.argwhere(changed).tolist()]
    assert len(zeroed) == count
    if by == "scale":  # a row's codes all have one rank: which of them go is the order of the file
        steps = [float(tensors[name].scales[i]) ** 2 for name, i, _ in zeroed]  # type: ignore[union-attr]
        assert sorted(steps) == [rank for rank, *_ in ranked[:count]]
    else:
        assert set(zeroed) == {(name, i, j) for _, name, i, j in ranked[:count]}


def test_equal_ranks_go_in_the_model_s_order() -> None:
    codes = np.array([[1, 0, -1], [-1, 2, 1]], np.int8)
    tensors: Tensors = {name: Quantized(codes, np.ones(2, np.float16), 3) for name in ("a", "b")}
    found = selective(tensors, 5)
    first, second = (found[name].codes.tolist() for name in ("a", "b"))  # type: ignore[union-attr]
    assert first == [[0, 0, 0], [0, 2, 0]]
    assert second == [[0, 0, -1], [-1, 2, 1]]


def test_no_more_go_than_there_are() -> None:
    tensors, _, _ = two_matrices()
    found = selective(tensors, 10**9)
    assert ones(rankable(found, "scale", {})) == 0
    for name in ("first", "second"):
        one, other = tensors[name], found[name]
        assert isinstance(one, Quantized)
        assert isinstance(other, Quantized)
        assert np.array_equal(np.where(np.abs(one.codes) == 1, 0, one.codes), other.codes)
    assert selective({"gain": np.ones(3, np.float16)}, 5)["gain"].shape == (3,)
    with pytest.raises(ContractError, match=r"prune\.by = 'hessian': no matrix has a Hessian"):
        selective(tensors, 1, "hessian")
    with pytest.raises(ContractError, match="first: pruning by damage needs its float weights"):
        selective(tensors, 1, "damage", {}, {"first": torch.eye(6)})


def test_a_plan_prunes_its_share_of_the_ones_and_by_damage_costs_least(model: GPT, batches: Batches) -> None:
    hessians = gather(model, batches(8))
    table = {"matrix": {"bits": 3}, "table": {"bits": 4}, "embedding_hessian": True}
    plain = quantize(model, hessians, build(QuantSpec, table), Run())
    weights = dict(model.named_parameters())
    cost = {}
    for by in ("scale", "hessian", "damage"):
        run = Run()
        prune = {"when": "selective", "fraction": 0.1, "by": by}
        found = quantize(model, hessians, build(QuantSpec, {**table, "prune": prune}), run)
        known = {} if by == "scale" else hessians
        before, after = (ones(rankable(x, by, known)) for x in (plain, found))  # type: ignore[arg-type]
        assert after == before - int(0.1 * before)
        rounded = dequantized(found)
        cost[by] = sum(objective(weights[name].detach(), rounded[name], hessians[name]) for name in hessians)
        assert run.facts["quant"]["objective"] == pytest.approx(cost[by], rel=1e-6)
        zeros = float((found["blocks.0.mlp.up.weight"].codes == 0).mean())  # type: ignore[union-attr]
        assert run.facts["quant.blocks.0.mlp.up.weight"]["zeros"] == pytest.approx(zeros, abs=1e-4)
    assert cost["damage"] < cost["hessian"] < cost["scale"]


def test_pruning_before_rounding_is_measured_against_the_trained_weights(model: GPT, batches: Batches) -> None:
    hessians = gather(model, batches(8))
    run = Run()
    spec = build(QuantSpec, {"prune": {"when": "before", "fraction": 0.3}})
    rounded = dequantized(quantize(model, hessians, spec, run))
    name = "blocks.1.attention.o.weight"
    expected = objective(model.get_parameter(name).detach(), rounded[name], hessians[name])
    assert run.facts[f"quant.{name}"]["objective"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"when": "selective", "fraction": 1.0}, "prune: fraction = 1.0"),
        ({"when": "selective", "by": "size"}, "prune.by = 'size'"),
    ],
)
def test_impossible_pruning_is_refused(table: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace(".", r"\.")):
        build(QuantSpec, {"prune": table})
