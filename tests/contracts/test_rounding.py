"""The promise of the slot quant/rounding, run on every file in it: codes on the grid, the same for the same input, each
row by itself, and where a Hessian is asked for an error of the outputs that is at most round-to-nearest's.

A technique offers `Spec`, `NEEDS_HESSIAN` and `solve(weight, scales, bits, hessian, spec) -> Solution`.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.quant import QuantSpec, ScaleSpec, largest, nearest_codes, objective, row_scales

FOLDER = "fairway.quant.rounding"
VARIANTS = {"gptq": [{"damping": 0.002, "block": 7}], "ascending_plain": [{"block": 7}]}
CASES = [(kind, table) for kind in kinds(FOLDER) for table in ({}, *VARIANTS.get(kind, ()))]
CLAIMS = [case for case in CASES if technique(FOLDER, case[0]).NEEDS_HESSIAN]  # the others read no Hessian
every_technique = pytest.mark.parametrize(("kind", "table"), CASES, ids=lambda value: str(value))


def problem(rows, cols, seed):
    """Random weights, and the Hessian of 4·cols inputs whose columns are correlated and unequally loud."""
    chance = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=chance) * torch.rand(cols, generator=chance) ** 2
    inputs = torch.randn(4 * cols, cols, generator=chance) @ mixing
    return torch.randn(rows, cols, generator=chance), inputs.T @ inputs / len(inputs)


def solve(kind, table, weight, scales, bits, hessian):
    module = technique(FOLDER, kind)
    return module.solve(weight, scales, bits, hessian, build(module.Spec, table))


@every_technique
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), cols=st.integers(1, 24), bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_codes_are_int8_on_the_grid_and_arguments_stay(kind, table, rows, cols, bits, seed):
    weight, hessian = problem(rows, cols, seed)
    hessian[:, 0] = hessian[0, :] = 0.0  # a column that no input ever excites
    scales = row_scales(weight, bits, ScaleSpec())
    kept = [x.clone() for x in (weight, scales, hessian)]
    found = solve(kind, table, weight, scales, bits, hessian)
    assert found.codes.dtype == torch.int8
    assert found.codes.shape == weight.shape
    assert int(found.codes.abs().max()) <= largest(bits)
    assert all(math.isfinite(value) for value in found.facts.values())
    assert all(torch.equal(x, y) for x, y in zip(kept, (weight, scales, hessian), strict=True))
    assert torch.equal(found.codes, solve(kind, table, weight, scales, bits, hessian).codes)


@every_technique
def test_a_row_depends_on_no_other_row(kind, table):
    weight, hessian = problem(5, 19, 1)
    scales = row_scales(weight, 4, ScaleSpec())
    whole = solve(kind, table, weight, scales, 4, hessian).codes
    turned = solve(kind, table, weight.flip(0), scales.flip(0), 4, hessian).codes
    assert torch.equal(turned.flip(0), whole)
    assert torch.equal(solve(kind, table, weight[3:4], scales[3:4], 4, hessian).codes, whole[3:4])


@every_technique
def test_weights_on_the_grid_stay_where_they_are(kind, table):
    _, hessian = problem(1, 15, 2)
    codes = torch.randint(-7, 8, (4, 15), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    scales = torch.tensor([0.5, 0.01, 1.0, 0.125]).to(torch.float16)
    assert torch.equal(solve(kind, table, codes * scales.float()[:, None], scales, 4, hessian).codes, codes)


@pytest.mark.parametrize(("kind", "table"), CLAIMS, ids=lambda value: str(value))
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_the_error_of_the_outputs_is_at_most_nearests(kind, table, bits):
    """tr((W−Ŵ)H(W−Ŵ)ᵀ), summed over several matrices."""
    ours = nearest = 0.0
    for seed in range(4):
        weight, hessian = problem(16, 32, seed)
        scales = row_scales(weight, bits, ScaleSpec())
        step = scales.float()[:, None]
        ours += objective(weight, solve(kind, table, weight, scales, bits, hessian).codes * step, hessian)
        nearest += objective(weight, nearest_codes(weight, scales, bits) * step, hessian)
    assert ours <= nearest


@every_technique
def test_its_spec_survives_a_recipe(kind, table):
    spec = build(QuantSpec, {"rounding": {"kind": kind, **table}})
    assert build(QuantSpec, to_plain(spec)) == spec
