"""What int-b is, and where a row's grid ends."""

import numpy as np
import pytest
import torch

from fairway.base.errors import ContractError, RecipeError
from fairway.base.specs import build, to_plain
from fairway.quant import Quantized, ScaleSpec, entropy, largest, nearest_codes, row_scales
from fairway.quant.scales import row_quantiles


def _weights(rows: int = 24, cols: int = 96, seed: int = 0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=chance) * torch.rand(rows, 1, generator=chance)


@pytest.mark.parametrize(("bits", "limit"), [(2, 1), (3, 3), (4, 7), (5, 15), (6, 31), (7, 63), (8, 127)])
def test_the_grid_is_symmetric(bits: int, limit: int) -> None:
    assert largest(bits) == limit
    weight = torch.tensor([[-1e9, 1e9, 0.0]])
    assert nearest_codes(weight, torch.ones(1), bits).tolist() == [[-limit, limit, 0]]


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ContractError, match=f"bits = {bits}"):
        largest(bits)


def test_dequantising_is_code_times_the_stored_scale_to_the_bit() -> None:
    codes = np.array([[-15, 0, 7], [1, 2, 15]], dtype=np.int8)
    scales = np.array([0.1, 3.1e-5], dtype=np.float16)
    expected = [[np.float32(c) * np.float32(s) for c in row] for row, s in zip(codes, scales, strict=True)]
    assert np.array_equal(Quantized(codes, scales, 5).dequantize(), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize(
    ("codes", "scales", "words"),
    [
        (np.full((1, 2), 16, np.int8), np.ones(1, np.float16), "leave int5"),
        (np.full((1, 2), -128, np.int8), np.ones(1, np.float16), "leave int5"),
        (np.zeros((1, 2), np.int16), np.ones(1, np.float16), "codes: int16"),
        (np.zeros((1, 2), np.int8), np.ones(2, np.float16), "scales: float16 \\(2,\\)"),
        (np.zeros((1, 2), np.int8), np.ones(1, np.float32), "scales: float32"),
        (np.zeros((1, 2), np.int8), np.full(1, np.nan, np.float16), "non-finite"),
        (np.zeros((1, 2), np.int8), np.full(1, -1, np.float16), "negative"),
    ],
)
def test_what_is_not_on_the_grid_cannot_be_made(codes: np.ndarray, scales: np.ndarray, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        Quantized(codes, scales, 5)


@pytest.mark.parametrize("quantiles", [(0.5,), (0.999, 0.9995, 0.9999, 0.99999, 1.0), (0.1, 0.9)])
def test_row_quantiles_are_torchs(quantiles: tuple[float, ...]) -> None:
    weight = _weights(cols=1792)
    found = torch.stack(row_quantiles(weight, quantiles))
    expected = torch.quantile(weight.abs().double(), torch.tensor(quantiles, dtype=torch.float64), dim=1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-7)


def test_a_single_column_has_a_quantile() -> None:
    assert row_scales(torch.tensor([[0.3], [-0.6]]), 5, ScaleSpec()).tolist() == pytest.approx([0.02, 0.04], rel=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_the_percentile_rule_takes_the_candidate_with_the_least_error(bits: int) -> None:
    weight, spec = _weights(cols=2048), ScaleSpec()
    chosen = row_scales(weight, bits, spec)
    tried = torch.stack([row_scales(weight, bits, ScaleSpec(rule="fixed", percentile=q)) for q in spec.candidates])
    for row in range(len(weight)):
        errors = []
        for scale in tried[:, row].tolist():  # one weight at a time
            codes = np.clip(np.round(weight[row].numpy() / np.float32(scale)), -largest(bits), largest(bits))
            errors.append(float(((codes * np.float32(scale) - weight[row].numpy()) ** 2).sum()))
        assert float(chosen[row]) == pytest.approx(tried[int(np.argmin(errors)), row].item())


@pytest.mark.parametrize("rule", ["percentile", "fixed", "sdclip", "absolute"])
def test_no_row_is_clipped_below_the_floor(rule: str) -> None:
    weight = _weights() * 0.1
    floored = row_scales(weight, 5, ScaleSpec(rule=rule, floor=1.0, k=4.0)).float() * 15
    assert torch.all((floored - 1.0).abs() < 1e-3)  # it binds everywhere: the scales carry no information
    free = row_scales(weight, 5, ScaleSpec(rule=rule, k=4.0)).float() * 15
    assert torch.all(free < 0.5)


def test_sdclip_follows_its_formula_and_its_entropy_law() -> None:
    weight, k, bits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(3)), 12.85, 6
    scales = row_scales(weight, bits, ScaleSpec(rule="sdclip", k=k))
    torch.testing.assert_close(scales.float(), k * weight.std(dim=1, correction=0) / 31, rtol=1e-3, atol=0)
    measured = entropy(nearest_codes(weight, scales, bits).to(torch.int8).numpy())
    # The law b + 1.047 − log2 k of #1394, for 31 steps to the clip instead of 2^(b−1); exact only for fine steps.
    assert measured == pytest.approx(np.log2(2 * 31) + 0.5 * np.log2(np.pi * np.e / 2) - np.log2(k), abs=0.02)


def test_absolute_is_one_step_of_the_whole_tensor_s_root_mean_square() -> None:
    weight, k = _weights(rows=40, cols=300) + 0.5, 9.0
    scales = row_scales(weight, 6, ScaleSpec(rule="absolute", k=k))
    rms = float(np.sqrt((weight.numpy().astype(np.float64) ** 2).mean()))
    assert scales.unique().tolist() == pytest.approx([k * rms / 31], rel=1e-3)
    assert scales.shape == (40,)


def test_one_step_for_all_rows_is_cheaper_at_the_same_error_than_a_step_for_each() -> None:
    """Reverse water-filling: rows of unequal spread, each coded with its own frequencies; closed form log2 of the
    arithmetic over the geometric mean of the spreads, in bits, for fine steps."""
    chance = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0]).repeat_interleave(8)
    weight = torch.randn(40, 20_000, generator=chance) * spread[:, None]

    def cost(rule: str, k: float) -> tuple[float, float]:
        scales = row_scales(weight, 8, ScaleSpec(rule=rule, k=k))
        codes = nearest_codes(weight, scales, 8)
        error = float((codes * scales.float()[:, None] - weight).square().mean())
        return sum(entropy(row) for row in codes.to(torch.int8).numpy()) / len(weight), error

    bits, error = cost("sdclip", 14.0)
    low, high = 1.0, 60.0
    for _ in range(25):
        k = (low + high) / 2
        low, high = (k, high) if cost("absolute", k)[1] < error else (low, k)
    fewer, same = cost("absolute", low)
    assert same == pytest.approx(error, rel=1e-2)
    mean_square, geometric = float(spread.square().mean()), float(spread.log().mean().exp())
    assert bits - fewer == pytest.approx(0.5 * np.log2(mean_square / geometric**2), abs=0.05)


def test_hessian_aware_clips_follow_their_formula() -> None:
    """c_i = k σ_i [1 + λ(r_i − 1)], one row at a time."""
    weight, spec = _weights(rows=6, cols=20), ScaleSpec(rule="sdclip", k=8.0, hessian_weight=0.175)
    inputs = torch.randn(50, 20, generator=torch.Generator().manual_seed(1)) * torch.arange(20)
    hessian = inputs.T @ inputs / 50
    loud = [sum(abs(float(w)) * float(h) for w, h in zip(row, hessian.diagonal(), strict=True)) for row in weight]
    mean = sum(loud) / len(loud)
    for row, loudness, scale in zip(weight, loud, row_scales(weight, 5, spec, hessian).tolist(), strict=True):
        deviation = float(np.std(row.numpy().astype(np.float64)))
        assert scale == pytest.approx(8.0 * deviation * (1 + 0.175 * (loudness / mean - 1)) / 15, rel=1e-3)
    plain = row_scales(weight, 5, ScaleSpec(rule="sdclip", k=8.0))
    assert torch.equal(row_scales(weight, 5, spec), plain)  # a table has no Hessian
    assert torch.equal(row_scales(weight, 5, spec, torch.zeros(20, 20)), plain)
    scaled = row_scales(weight, 5, spec, 7.0 * hessian)  # how loud the inputs are as a whole does not matter
    torch.testing.assert_close(scaled, row_scales(weight, 5, spec, hessian), rtol=2e-3, atol=0)


def test_rows_of_zeros_keep_a_scale_that_divides() -> None:
    scales = row_scales(torch.zeros(3, 8), 5, ScaleSpec())
    assert torch.all(scales > 0)
    assert not nearest_codes(torch.zeros(3, 8), scales, 5).any()
    assert torch.all(row_scales(torch.zeros(3, 8), 5, ScaleSpec(rule="absolute")) > 0)


def test_entropy_of_known_codes() -> None:
    assert entropy(np.zeros((4, 4), np.int8)) == 0.0
    assert entropy(np.array([-1, 1, -1, 1], np.int8)) == pytest.approx(1.0)
    assert entropy(np.arange(-127, 128).astype(np.int8)) == pytest.approx(np.log2(255))


@pytest.mark.parametrize(
    "table",
    [
        {"floor": -1.0},
        {"k": 0.0},
        {"candidates": [1.5]},
        {"candidates": []},
        {"rule": "sdclip", "hessian_weight": 1.0},
        {"rule": "sdclip", "hessian_weight": -0.1},
        {"rule": "percentile", "hessian_weight": 0.1},
    ],
)
def test_impossible_scale_rules_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        build(ScaleSpec, table, "quant.matrix.scale")


def test_a_scale_rule_survives_its_plain_table() -> None:
    spec = ScaleSpec(rule="sdclip", k=7.5, floor=0.25)
    assert build(ScaleSpec, to_plain(spec)) == spec
