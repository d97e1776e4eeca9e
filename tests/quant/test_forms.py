"""Codebooks and rotations: what codes stand for, how good the levels are, what is refused."""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairway.base.errors import ContractError, FairwayError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import build, to_plain
from fairway.model import GPT, tags
from fairway.quant import (
    FakeQuant,
    FakeSpec,
    Quantized,
    QuantSpec,
    dequantized,
    gather,
    objective,
    plan,
    quantize,
    quantize_tensor,
)
from fairway.quant.books import Book, lloyd_max, turned
from fairway.quant.forms import NONE, Form, Formed, block, rotated
from fairway.quant.grid import LowRank

Batches = Callable[..., list[Tensor]]
PUBLISHED = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}  # Max 1960, table I, to its own accuracy
FORMS = ("lloyd_max", "rotated", "turbo")


def hadamard(size: int) -> np.ndarray:  # type: ignore[type-arg]
    """By its definition: entry (i, j) is the sign of the parity of i & j."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / math.sqrt(size)


def test_a_rotation_is_signs_then_the_transform_of_each_block() -> None:
    identity = np.eye(24)
    made = rotated(identity, 5).T  # columns are the images of the unit vectors
    signs = np.sign(made[::8].sum(axis=0))  # the first row of a Hadamard matrix is of ones
    expected = np.kron(np.eye(3), hadamard(8)) * signs
    np.testing.assert_allclose(made, expected, atol=1e-12)
    assert {-1.0, 1.0} == set(signs.tolist())


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), cols=st.integers(1, 96), seed=st.integers(0, 2**32 - 1))
def test_a_rotation_keeps_lengths_and_is_undone(rows: int, cols: int, seed: int) -> None:
    weight = np.random.default_rng(cols).normal(size=(rows, cols))
    turned_ = rotated(weight, seed)
    np.testing.assert_allclose((turned_**2).sum(axis=1), (weight**2).sum(axis=1), rtol=1e-10)
    codes = np.random.default_rng(seed).integers(-7, 8, (rows, cols)).astype(np.int8)
    value = Formed(codes, np.full(rows, 0.25, np.float16), 4, form=Form(seed, ()))
    np.testing.assert_allclose(rotated(value.dequantize().astype(np.float64), seed), codes * 0.25, atol=1e-5)


def test_rows_of_any_kind_become_gaussian() -> None:
    """Rows of a few loud weights, 448 and 1,792 columns: blocks of 64 and 256. Kurtosis of a Gaussian is 3."""
    for cols, size in ((448, 64), (1792, 256), (512, 512)):
        assert block(cols) == size
        weight = np.random.default_rng(0).standard_t(3, (200, cols))
        before, after = (float((x**4).mean() / (x**2).mean() ** 2) for x in (weight, rotated(weight, 0)))
        assert before > 8
        assert abs(after - 3) < 1.2, cols


def test_other_seeds_are_other_rotations() -> None:
    weight = np.ones((1, 64))
    images = {rotated(weight, seed).tobytes() for seed in range(20)}
    assert len(images) == 20


@pytest.mark.parametrize("bits", range(1, 8))
def test_levels_are_centroids_and_edges_midpoints(bits: int) -> None:
    """Against cell by cell integration with the error function; to float16's half a unit in the last place."""
    levels = np.array(lloyd_max(bits))
    edges = [0.0, *((levels[1:] + levels[:-1]) / 2), math.inf]
    assert len(levels) == 2 ** (bits - 1)
    for level, low, high in zip(levels, edges, edges[1:], strict=False):
        density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
        share = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
        assert level == pytest.approx((density[0] - density[1]) / share, rel=2.5e-3)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_the_error_is_the_published_one(bits: int) -> None:
    x = np.linspace(-8, 8, 400_001)
    book = Book(lloyd_max(bits), torch.device("cpu"))
    y = torch.from_numpy(x)
    error = (x - book.values(book.nearest(y)).numpy()) ** 2 * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    assert float(error.sum() * (x[1] - x[0])) == pytest.approx(PUBLISHED[bits], rel=3e-3)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_rotated_rows_lose_what_gaussian_numbers_lose(bits: int) -> None:
    """Rows far from Gaussian, each of another size: what is lost is the same share of every one."""
    weight = torch.from_numpy(np.random.default_rng(1).laplace(size=(256, 512))).float()
    weight *= torch.logspace(-3, 1, 256)[:, None]
    spec = build(QuantSpec, {"matrix": {"bits": bits, "form": "turbo"}, "rounding": "nearest"})
    value, facts = quantize_tensor("x", weight, spec.matrix, spec, None, None)
    lost = ((torch.from_numpy(value.dequantize()) - weight) ** 2).mean(dim=1) / weight.square().mean(dim=1)
    assert float(lost.mean()) == pytest.approx(PUBLISHED[bits], rel=0.06)
    assert float(lost.median()) < PUBLISHED[bits], "the mean holds a few rows with weights far beyond the levels"
    assert (facts["form"], facts["bits"], value.bits, facts["zeros"]) == ("turbo", bits, bits + 1, 0.0)


def test_nearest_is_the_nearest_level_of_either_sign() -> None:
    book = Book((0.5, 1.5, 4.0), torch.device("cpu"))
    y = torch.tensor([0.0, 0.9, -0.9, 1.1, -1.1, 2.7, 2.8, -99.0])
    assert book.nearest(y).tolist() == [1, 1, -1, 2, -2, 2, 3, -3]
    assert book.values(torch.tensor([1.0, -3.0, 0.0])).tolist() == [0.5, -4.0, 0.0]


def test_decoding_is_the_same_on_every_machine() -> None:
    """The sum was taken on 2026-11-26: a look-up, products and a butterfly of float32, in one order."""
    codes = (np.arange(5 * 96).reshape(5, 96) * 7 % 17 - 8).astype(np.int8)
    scales = np.array([0.1, 3.0, 1e-4, 60_000.0, 0.0], np.float16)
    value = Formed(codes, scales, 5, form=Form(2**32 - 1, lloyd_max(4)))
    digest = hashlib.sha256(value.dequantize().astype("<f4").tobytes()).hexdigest()
    assert digest == "6ae4a9755c3b30788ffee7acff94208e742dd53788974a32a92f155eeefa9032"


def test_a_repaired_tensor_has_its_addend_after_the_rotation() -> None:
    half = np.array([0.5], np.float16)
    addend = LowRank(np.ones((2, 1), np.int8), half, np.ones((1, 8), np.int8), half, 64)
    plain = Formed(np.ones((2, 8), np.int8), np.ones(2, np.float16), 4, form=Form(3, ()))
    both = Formed(plain.codes, plain.scales, 4, addend, plain.form)
    assert np.array_equal(both.dequantize(), plain.dequantize() + np.float32(0.25))


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (Form(NONE, ()), "neither levels nor a rotation"),
        (Form(-2, (1.0,)), "seed -2"),
        (Form(2**32, ()), "seed 4294967296"),
        (Form(0, (1.0, 1.0)), "do not rise"),
        (Form(0, (2.0, 1.0)), "do not rise"),
        (Form(0, (0.0, 1.0)), "do not rise"),
        (Form(0, (-1.0, 1.0)), "do not rise"),
        (Form(0, (0.1,)), "no finite float16"),
        (Form(0, (1e9,)), "no finite float16"),
        (Form(0, (math.inf,)), "no finite float16"),
        (Form(0, (math.nan,)), "no finite float16"),
        (Form(0, tuple(float(i + 1) for i in range(8))), "8 levels on int4's ±7"),
        (Form(0, (1.0, 2.0)), "codes -3 … 3 leave a book of ±2"),
    ],
)
def test_a_form_that_is_none_is_refused(form: Form, says: str) -> None:
    codes = np.array([[-3, 3]], np.int8)
    with pytest.raises(ContractError, match=says):
        Formed(codes, np.ones(1, np.float16), 4, form=form)


@pytest.mark.parametrize("form", FORMS)
def test_every_matrix_is_better_than_nearest_in_every_form(model: GPT, batches: Batches, form: str) -> None:
    run, spec = Run(), build(QuantSpec, {"matrix": {"bits": 3, "form": form}})
    hessians = gather(model, batches(8))
    tensors = quantize(model, hessians, spec, run)
    weights = dequantized(tensors)
    for name, tag in tags(model).items():
        if tag.role == "matrix":
            fact, value = run.facts[f"quant.{name}"], tensors[name]
            assert isinstance(value, Formed)
            assert fact["objective"] < fact["objective_nearest"], name
            measured = objective(model.get_parameter(name).detach(), weights[name], hessians[name])
            assert fact["objective"] == pytest.approx(measured)
            assert bool(value.form.levels) == (form != "rotated")
            assert (value.form.rotation == NONE) == (form == "lloyd_max")


def test_the_hessian_is_turned_with_the_rows() -> None:
    """tr(E H Eᵀ) is the same in both coordinates, which is why GPTQ may go on in the rotated ones."""
    chance = torch.Generator().manual_seed(0)
    weight, other = torch.randn(3, 48, generator=chance), torch.randn(3, 48, generator=chance)
    inputs = torch.randn(200, 48, generator=chance)
    hessian = inputs.T @ inputs
    moved = turned(turned(hessian, 9).T, 9)
    assert objective(turned(weight, 9), turned(other, 9), moved) == pytest.approx(
        objective(weight, other, hessian), rel=1e-4
    )


def test_overrides_give_parts_of_some_layers_another_form(model: GPT) -> None:
    """As approach D has it: fewer bits for some parts of some layers, in levels; equal steps for the rest."""
    table = {"matrix": {"bits": 5}, "override": [{"parts": ["v", "o"], "layers": [1, 1], "bits": 4, "form": "turbo"}]}
    spec = build(QuantSpec, table)
    assert build(QuantSpec, to_plain(spec)) == spec
    planned, found = plan(model, spec), tags(model)
    for name, grid in planned.items():
        if grid is not None and found[name].role == "matrix":
            formed = found[name].part in ("v", "o") and found[name].layer == 1
            assert (grid.bits, grid.form) == ((4, "turbo") if formed else (5, "steps"))


def test_weights_are_pruned_before_they_get_their_levels(model: GPT, batches: Batches) -> None:
    table = {
        "matrix": {"form": "lloyd_max", "bits": 6},
        "prune": {"when": "before", "fraction": 0.3},
        "rounding": "nearest",
    }
    pruned = quantize(model, {}, build(QuantSpec, table), Run())
    whole = quantize(model, {}, build(QuantSpec, table | {"prune": {}}), Run())
    name = "blocks.0.mlp.up.weight"
    weight = model.get_parameter(name).detach()
    small = weight.abs() < weight.abs().flatten().kthvalue(int(0.3 * weight.numel()) + 1).values
    first, second = (dequantized(one)[name][small].square().mean() for one in (pruned, whole))
    assert first < 0.5 * second


def test_a_rotated_table_has_its_dead_zone(model: GPT) -> None:
    zeros = []
    for zone in (0.0, 0.4):
        spec = build(QuantSpec, {"table": {"form": "rotated", "dead_zone": zone}, "rounding": "nearest"})
        value = quantize(model, {}, spec, Run())["embedding.weight"]
        assert isinstance(value, Formed)
        zeros.append(float((value.codes == 0).mean()))
    assert zeros[1] > 1.2 * zeros[0]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (
            {"matrix": {"form": "turbo"}, "prune": {"when": "after", "fraction": 0.1}},
            "prune.when = 'after': .* 'turbo'",
        ),
        ({"table": {"form": "rotated"}, "prune": {"when": "selective", "fraction": 0.1}}, "'selective': .* 'rotated'"),
        (
            {"matrix": {"form": "rotated"}, "prune": {"when": "before", "fraction": 0.1}},
            "prune.when = 'before': .* a zero before a rotation is none after it; take never",
        ),
        ({"matrix": {"form": "rotated"}, "prune": {"budget": 9999}}, "prune.budget = 9999: .* form = 'steps'"),
        ({"matrix": {"form": "rotated"}, "fit": {"budget": 9999}}, "fit.budget = 9999, .* form = 'steps'"),
        ({"matrix": {"form": "turbo"}, "rounding": "ascending_plain"}, "'ascending_plain': knows no levels; take gptq"),
        ({"override": [{"parts": ["v"], "form": "lloyd_max"}], "rounding": "ascending_plain"}, "knows no levels"),
        ({"matrix": {"form": "turbot"}}, "turbot"),
    ],
)
def test_what_forms_do_not_do_is_refused_when_the_recipe_is_read(table: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        build(QuantSpec, table)
    assert "\n" not in str(caught.value)


def test_a_rotation_alone_goes_with_every_rounding(model: GPT, batches: Batches) -> None:
    spec = build(QuantSpec, {"matrix": {"form": "rotated"}, "rounding": "ascending_plain"})
    tensors = quantize(model, gather(model, batches(4)), spec, Run())
    assert isinstance(tensors["blocks.0.mlp.up.weight"], Formed)
    assert type(tensors["embedding.weight"]) is Quantized


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({"bits": 8, "form": "turbo"}, "bits = 8: form = 'turbo' takes 7 at most"),
        ({"form": "lloyd_max", "dead_zone": 0.1}, "dead_zone = 0.1: form = 'lloyd_max' has none; take 0"),
        ({"form": "turbo", "scale": {"floor": 1.0}}, "scale.floor = 1.0: form = 'turbo' has none; take 0"),
        ({"form": "turbo", "scale": {"rule": "sdclip", "hessian_weight": 0.2}}, "scale.hessian_weight = 0.2"),
    ],
)
def test_what_a_book_has_not_is_refused_before_training(model: GPT, grid: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=rf"weight: {says}"):
        plan(model, build(QuantSpec, {"matrix": grid}))
    assert plan(model, build(QuantSpec, {"matrix": grid | {"form": "rotated"}}))


def test_training_on_the_grid_refuses_forms(model: GPT) -> None:
    spec = build(QuantSpec, {"matrix": {"form": "turbo"}})
    with pytest.raises(RecipeError, match=r"qat.kind = 'soft_round': .* form = 'steps'"):
        FakeQuant(model, spec, FakeSpec("soft_round"))
    FakeQuant(model, QuantSpec(), FakeSpec("soft_round"))


def test_weights_beyond_float16_scales_are_refused(model: GPT) -> None:
    spec = build(QuantSpec, {"matrix": {"form": "turbo"}, "rounding": "nearest"})
    with pytest.raises(FairwayError, match=r"x: weights of .* exceed float16 scales"):
        quantize_tensor("x", torch.full((2, 8), 1e6), spec.matrix, spec, None, None)


def test_a_row_of_zeros_stays_small() -> None:
    spec = build(QuantSpec, {"matrix": {"form": "turbo"}, "rounding": "nearest"})
    value, _ = quantize_tensor("x", torch.zeros(2, 8), spec.matrix, spec, None, None)
    assert float(np.abs(value.dequantize()).max()) < 1e-6
