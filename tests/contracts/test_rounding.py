"""The promise of the slot quant/rounding, run on every file in it: codes on the grid, the same for the same input, each
row by itself, and where a Hessian is asked for an error of the outputs that is at most round-to-nearest's.

A technique offers `Spec`, `NEEDS_HESSIAN` and `solve(weight, scales, bits, hessian, spec) -> Solution`; with
TAKES_BOOKS its codes may number the levels of a book.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.quant import QuantSpec, ScaleSpec, largest, nearest_codes, objective, row_scales
from fairway.quant.books import Book, lloyd_max

FOLDER = "fairway.quant.rounding"
VARIANTS = {"gptq": [{"damping": 0.002, "block": 7}], "ascending_plain": [{"block": 7}]}
CASES = [(kind, table) for kind in kinds(FOLDER) for table in ({}, *VARIANTS.get(kind, ()))]
SCALES = [
    ScaleSpec(),
    ScaleSpec("fixed"),
    ScaleSpec("sdclip", k=4.0),
    ScaleSpec("sdclip", k=4.0, hessian_weight=0.175),
    ScaleSpec("absolute", k=4.0),
]
CLAIMED = [  # the others read no Hessian
    (kind, table, scale)
    for kind, table in CASES
    if technique(FOLDER, kind).NEEDS_HESSIAN
    for scale in (SCALES[:1] if kind == "ascending_plain" else SCALES)  # the study's solver loses where much is clipped
]
every_technique = pytest.mark.parametrize(("kind", "table"), CASES, ids=lambda value: str(value))


def problem(rows, cols, seed):
    """Random weights, and the Hessian of 4·cols inputs whose columns are correlated and unequally loud."""
    chance = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=chance) * torch.rand(cols, generator=chance) ** 2
    inputs = torch.randn(4 * cols, cols, generator=chance) @ mixing
    return torch.randn(rows, cols, generator=chance), inputs.T @ inputs / len(inputs)


def solve(kind, table, weight, scales, bits, hessian, dead_zone=0.0):
    module = technique(FOLDER, kind)
    return module.solve(weight, scales, bits, hessian, build(module.Spec, table), dead_zone)


@every_technique
def test_a_dead_zone_makes_zeros_and_no_code_longer_than_the_grid(kind, table):
    weight, hessian = problem(20, 24, 5)
    scales = row_scales(weight, 3, ScaleSpec("absolute", k=3.0))
    found = [solve(kind, table, weight, scales, 3, hessian, width).codes for width in (0.0, 0.15, 0.4)]
    zeros = [int((codes == 0).sum()) for codes in found]
    assert zeros[0] < zeros[1] < zeros[2]
    assert max(int(codes.abs().max()) for codes in found) <= largest(3)


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


@every_technique
def test_a_row_may_be_solved_stacked_at_several_scales(kind, table):
    """What a search over steps does: one solve for all of them."""
    weight, hessian = problem(4, 23, 3)
    steps = [row_scales(weight, 5, ScaleSpec(rule="absolute", k=k)) for k in (4.0, 8.0, 14.0)]
    stacked = solve(kind, table, weight.repeat(3, 1), torch.cat(steps), 5, hessian).codes
    alone = [solve(kind, table, weight, scales, 5, hessian).codes for scales in steps]
    assert torch.equal(stacked, torch.cat(alone))


@every_technique
def test_a_factor_gives_the_codes_of_its_hessian(kind, table):
    module = technique(FOLDER, kind)
    if not hasattr(module, "factorise"):
        pytest.skip("nothing in it depends on the Hessian alone")
    spec = build(module.Spec, table)
    weight, hessian = problem(5, 19, 4)
    hessian[:, 2] = hessian[2, :] = 0.0
    factor = module.factorise(hessian, spec)
    for bits in (3, 5):
        scales = row_scales(weight, bits, ScaleSpec())
        expected = solve(kind, table, weight, scales, bits, hessian)
        found = module.solve(weight, scales, bits, factor, spec)
        assert torch.equal(found.codes, expected.codes)
        assert found.facts == expected.facts


@pytest.mark.parametrize(("kind", "table", "scale"), CLAIMED, ids=lambda value: str(getattr(value, "rule", value)))
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_the_error_of_the_outputs_is_at_most_nearests(kind, table, scale, bits):
    """tr((W−Ŵ)H(W−Ŵ)ᵀ), summed over several matrices."""
    ours = nearest = 0.0
    for seed in range(4):
        weight, hessian = problem(16, 32, seed)
        scales = row_scales(weight, bits, scale, hessian)
        step = scales.float()[:, None]
        ours += objective(weight, solve(kind, table, weight, scales, bits, hessian).codes * step, hessian)
        nearest += objective(weight, nearest_codes(weight, scales, bits) * step, hessian)
    assert ours <= nearest


@pytest.mark.parametrize("kind", [kind for kind in kinds(FOLDER) if hasattr(technique(FOLDER, kind), "TAKES_BOOKS")])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_one_that_takes_books_numbers_levels_and_is_better_than_their_nearest(kind, bits):
    """Codes ±1 … ±2^(b−1), none 0; each row by itself; the error of the outputs summed over several matrices."""
    module, book = technique(FOLDER, kind), Book(lloyd_max(bits), torch.device("cpu"))
    ours = nearest = 0.0
    for seed in range(4):
        weight, hessian = problem(16, 32, seed)
        scales = weight.square().mean(dim=1).sqrt().to(torch.float16)
        step = scales.float()[:, None]
        codes = module.solve(weight, scales, bits, hessian, module.Spec(), 0.0, book).codes
        assert codes.dtype == torch.int8
        assert 1 <= int(codes.abs().min()) <= int(codes.abs().max()) <= 2 ** (bits - 1)
        alone = module.solve(weight[3:4], scales[3:4], bits, hessian, module.Spec(), 0.0, book).codes
        assert torch.equal(alone, codes[3:4])
        ours += objective(weight, book.values(codes.double()).float() * step, hessian)
        nearest += objective(weight, book.values(book.nearest(weight.double() / step)).float() * step, hessian)
    assert ours < nearest


@every_technique
def test_its_spec_survives_a_recipe(kind, table):
    spec = build(QuantSpec, {"rounding": {"kind": kind, **table}})
    assert build(QuantSpec, to_plain(spec)) == spec
