"""From a model to integers: Hessians, plan, pruning, facts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fairway.base import recipes
from fairway.base.errors import ContractError, DataError, FairwayError, RecipeError
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.base.specs import build, to_plain
from fairway.model import GPT, projections, tags
from fairway.quant import (
    GridSpec,
    PruneSpec,
    Quantized,
    QuantSpec,
    ScaleSpec,
    dequantized,
    factored,
    gather,
    observed,
    plan,
    quantize,
    quantize_tensor,
    read_hessians,
    write_hessians,
)
from fairway.quant.pruning import small

Batches = Callable[..., list[Tensor]]


def test_hessians_are_the_mean_outer_products_of_the_inputs(model: GPT, batches: Batches) -> None:
    """Against a single matrix's inputs, collected by hand in float64."""
    hessians = gather(model, batches())
    seen: dict[str, list[Tensor]] = {}
    owners = projections(model)
    for name in hessians:
        seen[name] = []
        owners[name].observe = lambda x, kept=seen[name]: kept.append(x.detach().double())
    with torch.no_grad():
        for tokens in batches():
            model.logits(model(tokens)[0])
    for name, hessian in hessians.items():
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen[name]])
        torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_every_matrix_and_the_tied_head_are_observed_and_plugs_are_put_back(model: GPT, batches: Batches) -> None:
    hessians = gather(model, batches())
    expected = {n for n, tag in tags(model).items() if tag.role == "matrix" or tag.part == "embedding"}
    assert set(hessians) == expected
    assert all(owner.observe is None for owner in projections(model).values())
    with pytest.raises(IndexError):
        gather(model, [torch.full((1, 4), 10_000)])  # a token that the model does not have
    assert all(owner.observe is None for owner in projections(model).values())


def test_hessians_do_not_depend_on_how_sequences_are_batched(model: GPT, batches: Batches) -> None:
    together = torch.cat(batches(2, 2))
    at_once, one_by_one = gather(model, [together]), gather(model, together.split(1))
    for name, hessian in at_once.items():
        torch.testing.assert_close(one_by_one[name], hessian, rtol=1e-4, atol=1e-6)


def test_ranks_average_over_all_inputs(model: GPT, batches: Batches) -> None:
    class Twins(Ranks):
        """Another rank with the same text."""

        def sum_(self, tensor: Tensor) -> Tensor:
            return tensor.mul_(2)

    alone = gather(model, batches())
    together = gather(model, batches(), run=Run(ranks=Twins(world=2)))
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_kept_hessians_serve_again(model: GPT, batches: Batches, tmp_path: Path) -> None:
    hessians = gather(model, batches())
    write_hessians(tmp_path / "hessians.safetensors", hessians)
    kept = read_hessians(tmp_path / "hessians.safetensors")
    assert set(kept) == set(hessians)
    assert all(torch.equal(kept[name], hessian) for name, hessian in hessians.items())
    direct = dequantized(quantize(model, gather(model, batches()), QuantSpec(), Run()))
    again = dequantized(quantize(model, kept, QuantSpec(), Run()))
    assert all(torch.equal(direct[name], again[name]) for name in direct)
    with pytest.raises(ContractError, match=r"up\.weight: its Hessian is \(3, 3\)"):
        quantize(model, {**kept, "blocks.0.mlp.up.weight": torch.eye(3)}, QuantSpec(), Run())
    (tmp_path / "hessians.safetensors").write_bytes(b"something else")
    with pytest.raises(DataError, match="no Hessians"):
        read_hessians(tmp_path / "hessians.safetensors")


def test_calibration_without_text_is_refused(model: GPT) -> None:
    with pytest.raises(ContractError, match="no input reached it"):
        gather(model, [])
    with pytest.raises(ContractError, match="was given no Hessian"):
        quantize(model, {}, QuantSpec(), Run())


def test_every_matrix_is_better_than_nearest_and_the_journal_says_so(model: GPT, batches: Batches) -> None:
    run = Run()
    tensors = quantize(model, gather(model, batches(8)), QuantSpec(), run)
    matrices = [name for name, tag in tags(model).items() if tag.role == "matrix"]
    for name in matrices:
        fact = run.facts[f"quant.{name}"]
        assert fact["objective"] < fact["objective_nearest"], name
        assert fact["rounding"] == "gptq"
        assert 0 < fact["entropy"] < 5
    known = [*matrices, "embedding.weight"]  # the head's Hessian is gathered too, for a later fit
    assert sorted(observed(model, QuantSpec())) == sorted(known)
    total = run.facts["quant"]
    assert total["objective"] == pytest.approx(sum(run.facts[f"quant.{n}"]["objective"] for n in known))
    assert total["quantized"] + total["float16"] == sum(p.numel() for p in model.parameters())
    assert list(tensors) == [name for name, _ in model.named_parameters()]


def test_what_is_stored_is_what_the_grid_says(model: GPT, batches: Batches) -> None:
    tensors = quantize(model, gather(model, batches()), QuantSpec(), Run())
    found = tags(model)
    for name, parameter in model.named_parameters():
        value = tensors[name]
        if found[name].role in ("gain", "scalar"):
            assert isinstance(value, np.ndarray)
            assert value.dtype == np.float16
            assert np.array_equal(value, parameter.detach().numpy().astype(np.float16))
        else:
            assert isinstance(value, Quantized)
            assert value.bits == (8 if found[name].role == "table" else 5)
            worst = np.abs(value.dequantize() - parameter.detach().numpy()).max()
            assert worst < (6 if value.bits == 5 else 1) * float(value.scales.max())


def test_rounding_to_nearest_needs_no_hessian(model: GPT) -> None:
    spec = build(QuantSpec, {"rounding": "nearest"})
    assert observed(model, spec) == []
    tensors = quantize(model, {}, spec, Run())
    for name, value in tensors.items():
        if isinstance(value, Quantized):
            weight = dict(model.named_parameters())[name].detach().numpy()
            step = value.scales.astype(np.float32)[:, None]
            limit = 2 ** (value.bits - 1) - 1
            assert np.array_equal(value.codes, np.clip(np.round(weight / step), -limit, limit).astype(np.int8))


def test_the_tied_embedding_may_be_rounded_with_the_head_s_hessian(model: GPT, batches: Batches) -> None:
    run = Run()
    quantize(model, gather(model, batches(8)), QuantSpec(embedding_hessian=True), run)
    fact = run.facts["quant.embedding.weight"]
    assert fact["rounding"] == "gptq"
    assert fact["objective"] < fact["objective_nearest"]
    assert "objective" not in run.facts["quant.embed.0.table.weight"]


def test_factors_made_once_serve_every_grid(model: GPT, batches: Batches) -> None:
    spec, name = QuantSpec(), "blocks.1.mlp.down.weight"
    weight, hessian = model.get_parameter(name).detach(), gather(model, batches(8))[name]
    factor = factored(hessian, spec.rounding)
    for k in (5.0, 11.0):
        grid = GridSpec(6, ScaleSpec(rule="absolute", k=k))
        plain, facts = quantize_tensor(name, weight, grid, spec, spec.rounding, hessian)
        again, also = quantize_tensor(name, weight, grid, spec, spec.rounding, hessian, factor)
        assert np.array_equal(plain.codes, again.codes)
        assert facts["objective"] == also["objective"]
    assert factored(hessian, build(QuantSpec, {"rounding": "nearest"}).rounding) is hessian


@pytest.mark.parametrize(("bits", "k"), [(6, 20.0), (7, 15.0), (8, 20.0)])
def test_the_embedding_may_have_its_own_bits_and_clip(model: GPT, batches: Batches, bits: int, k: float) -> None:
    """#1394: int8 and k = 20, #1626: int7 and k = 15, both solved with the head's Hessian."""
    table = {"parts": ["embedding"], "bits": bits, "scale": {"rule": "sdclip", "k": k}}
    run = Run()
    spec = build(QuantSpec, {"embedding_hessian": True, "override": [table]})
    value = quantize(model, gather(model, batches(16)), spec, run)["embedding.weight"]
    assert isinstance(value, Quantized)
    assert value.bits == bits
    weight = model.get_parameter("embedding.weight").detach()
    expected = k * weight.std(dim=1, correction=0) / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(torch.from_numpy(value.scales).float(), expected, rtol=1e-3, atol=0)
    fact = run.facts["quant.embedding.weight"]
    assert fact["rounding"] == "gptq"
    assert fact["objective"] < fact["objective_nearest"]


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_a_grid_may_have_its_own_dead_zone(model: GPT, batches: Batches, rounding: str) -> None:
    """Solved matrices and tables alike; an override's is the one that counts."""
    table = {"rounding": rounding, "matrix": {"bits": 4}, "table": {"bits": 4}}
    hessians = gather(model, batches(8))
    plain = quantize(model, hessians, build(QuantSpec, table), Run())
    leaning = {"matrix": {"bits": 4, "dead_zone": 0.25}, "table": {"bits": 4, "dead_zone": 0.25}}
    spec = build(QuantSpec, {**table, **leaning, "override": [{"parts": ["v"], "dead_zone": 0.0}]})
    found = quantize(model, hessians, spec, Run())
    for name, tag in tags(model).items():
        one, other = plain[name], found[name]
        if isinstance(one, Quantized) and isinstance(other, Quantized):
            if tag.part == "v":
                assert np.array_equal(one.codes, other.codes)
            else:
                assert (other.codes == 0).sum() > (one.codes == 0).sum(), name
            if tag.role == "table":
                steps = model.get_parameter(name).detach() / torch.from_numpy(one.scales).float()[:, None]
                expected = (steps.abs() - 0.75).ceil().clamp(0, 7) * steps.sign()
                assert np.array_equal(other.codes, expected.numpy().astype(np.int8)), name


def test_the_order_of_solving_leaves_the_model_untouched(model: GPT, batches: Batches) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantize(model, gather(model, batches()), QuantSpec(prune=PruneSpec("before", 0.2)), Run())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_quantising_twice_gives_the_same_integers(model: GPT, batches: Batches) -> None:
    first, again = (quantize(model, gather(model, batches()), QuantSpec(), Run()) for _ in range(2))
    for name, value in dequantized(first).items():
        assert torch.equal(value, dequantized(again)[name])


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruning_zeroes_the_smallest_weights(model: GPT, batches: Batches, when: str) -> None:
    spec = build(QuantSpec, {"prune": {"when": when, "fraction": 0.3}, "rounding": "nearest"})
    tensors = quantize(model, gather(model, batches()), spec, Run())
    for name, parameter in model.named_parameters():
        value = tensors[name]
        if isinstance(value, Quantized):
            assert (value.codes == 0).mean() >= (0.29 if when == "before" else 0.2)
            if when == "before":
                assert not value.codes[small(parameter.detach(), 0.3).numpy()].any()


def test_the_pruned_are_those_strictly_below_the_quantile() -> None:
    weight = torch.tensor([[0.5, -0.1, 0.2, -0.4], [0.3, 0.0, -0.2, 0.9]])
    assert small(weight, 0.0).sum() == 0
    assert small(weight, 0.25).tolist() == [[False, True, False, False], [False, True, False, False]]
    # Three of eight: the third smallest is tied with the fourth, and ties stay.
    assert small(weight, 0.375).sum() == 2
    assert small(torch.zeros(4, 4), 0.5).sum() == 0


def test_small_tensors_stay_float16_where_the_recipe_says_so(model: GPT) -> None:
    spec = QuantSpec(passthrough_elements=32 * 32)
    for name, grid in plan(model, spec).items():
        expected = tags(model)[name].role in ("matrix", "table") and model.get_parameter(name).numel() > 1024
        assert (grid is not None) == expected, name
    assert all(plan(model, QuantSpec())[n] is not None for n, t in tags(model).items() if t.role == "matrix")


RECIPE = """
embedding_hessian = true
[matrix]
bits = 5
scale = {rule = "percentile", floor = 1.0}
[[override]]
parts = ["v", "o"]
layers = [1, 2]
bits = 4
[[override]]
parts = ["embedding"]
bits = 7
scale = {rule = "sdclip", k = 15.0}
[[override]]
parts = ["bigram"]
bits = 16
[rounding]
kind = "gptq"
damping = 0.002
block = 64
[prune]
when = "before"
fraction = 0.10
"""


def test_a_plan_is_written_as_tables(model: GPT, tmp_path: Path) -> None:
    path = tmp_path / "quant.toml"
    path.write_text(RECIPE)
    spec = recipes.check(QuantSpec, recipes.read(path))
    planned = plan(model, spec)
    bits = {(t.part, t.layer): planned[n].bits if planned[n] else 16 for n, t in tags(model).items()}
    assert [bits["v", layer] for layer in range(3)] == [5, 4, 4]
    assert [bits["o", layer] for layer in range(3)] == [5, 4, 4]
    assert [bits["q", layer] for layer in range(3)] == [5, 5, 5]
    assert (bits["embedding", None], bits["bigram", None], bits["value", None]) == (7, 16, 8)
    embedding = planned["embedding.weight"]
    assert embedding is not None
    assert embedding.scale.rule == "sdclip"
    assert planned["blocks.1.attention.v.weight"].scale.floor == 1.0
    assert build(QuantSpec, to_plain(spec)) == spec
    written = recipes.dump(to_plain(spec))
    (tmp_path / "again.toml").write_text(written)
    assert recipes.check(QuantSpec, recipes.read(tmp_path / "again.toml")) == spec


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"matrix": {"bits": 1}}, "matrix: bits = 1"),
        ({"matrix": {"bits": 9}}, "matrix: bits = 9"),
        ({"matrix": {"bit": 5}}, "matrix.bit: unknown key .did you mean 'bits'"),
        ({"override": [{"parts": ["q"], "bits": 12}]}, r"override\[0\]: bits = 12"),
        ({"override": [{"parts": ["q"], "layers": [3, 1]}]}, r"layers = \[3, 1\]"),
        ({"override": [{"parts": ["q"], "layer": [1, 3]}]}, r"override\[0\].layer: unknown key"),
        ({"override": {"parts": ["q"]}}, "override .*: a list of tables"),
        ({"override": [{"bits": 4}]}, r"override\[0\]: parts is missing"),
        ({"prune": {"when": "before", "fraction": 1.0}}, "prune: fraction = 1.0"),
        ({"prune": {"when": "during"}}, "prune.when = 'during'"),
        ({"matrix": {"dead_zone": 0.5}}, "matrix: dead_zone = 0.5"),
        ({"override": [{"parts": ["q"], "dead_zone": -0.1}]}, r"override\[0\]: dead_zone = -0.1"),
        ({"table": {"scale": {"rule": "sdclip", "hessian_weight": 0.1}}}, "table.scale.hessian_weight: tables have no"),
        ({"rounding": "gptp"}, "rounding = 'gptp': no such technique .did you mean 'gptq'"),
        ({"rounding": {"kind": "gptq", "damping": 0.0}}, "rounding: damping = 0.0"),
    ],
)
def test_impossible_plans_are_refused(table: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build(QuantSpec, table)
    with pytest.raises(RecipeError):
        recipes.check(QuantSpec, table)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"parts": ["qq"], "bits": 4}, "'qq': not in this model; parts: bigram, .*, up"),
        ({"parts": ["q"], "layers": [7, 9], "bits": 4}, "layers = .7, 9."),
        ({"parts": ["embedding"], "layers": [0, 1], "bits": 4}, "no such layer"),
    ],
)
def test_an_override_that_changes_nothing_is_refused(model: GPT, table: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        plan(model, build(QuantSpec, {"override": [table]}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model: GPT, value: float) -> None:
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.up.weight")[0, 0] = value
    with pytest.raises(FairwayError, match=r"blocks\.1\.mlp\.up\.weight: a weight is not finite"):
        quantize(model, {}, build(QuantSpec, {"rounding": "nearest"}), Run())


@pytest.mark.parametrize("name", ["blocks.0.attn_scale", "blocks.0.mlp.up.weight"])
def test_weights_beyond_float16_are_named(model: GPT, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).fill_(2e6)
    with pytest.raises(FairwayError, match=f"{name}: .*2e\\+06"):
        quantize(model, {}, build(QuantSpec, {"rounding": "nearest"}), Run())


def test_integers_on_a_float64_model_are_those_of_the_float32_one(model: GPT, batches: Batches) -> None:
    single = quantize(model, {}, build(QuantSpec, {"rounding": "nearest"}), Run())
    double = quantize(model.double(), {}, build(QuantSpec, {"rounding": "nearest"}), Run())
    for name, value in dequantized(single).items():
        assert torch.equal(value, dequantized(double)[name])
    assert gather(model, batches(1))["blocks.0.mlp.up.weight"].dtype == torch.float32
