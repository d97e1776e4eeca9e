"""Quantisation-aware training: the weights that the forward sees really change."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fairway.base.errors import RecipeError
from fairway.base.specs import build
from fairway.model import GPT, ValueEmbeddingSpec, projections
from fairway.quant import FakeQuant, FakeSpec, QuantSpec, ScaleSpec, nearest_codes, row_scales, soft_round
from fairway.quant.fake import soft_staircase, straight_through
from quant.conftest import small_model

FIXED = ScaleSpec(rule="fixed", percentile=0.9995)
Batches = Callable[..., list[Tensor]]


def on_grid(weight: Tensor, bits: int = 5) -> Tensor:
    scales = row_scales(weight, bits, FIXED)
    return nearest_codes(weight, scales, bits) * scales.float()[:, None]


def test_the_forward_value_is_the_grid_and_the_gradient_is_the_identity() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    seen = straight_through(weight, 5, FIXED)
    torch.testing.assert_close(seen.detach(), on_grid(weight.detach()), rtol=0, atol=1e-6)
    upstream = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    (seen * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("alpha", [1.0, 3.0, 16.0])
def test_soft_round_follows_its_formula(alpha: float) -> None:
    points = [-2.7, -1.5, -0.5, -0.2, 0.0, 0.3, 0.5, 0.999, 1.0, 14.6]
    expected = [
        math.floor(y) + 0.5 + 0.5 * math.tanh(alpha * (y - math.floor(y) - 0.5)) / math.tanh(alpha / 2) for y in points
    ]
    found = soft_staircase(torch.tensor(points, dtype=torch.float64), torch.tensor(alpha, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_soft_round_s_gradient_is_its_derivative() -> None:
    y = torch.tensor([-1.3, 0.2, 0.77, 2.41], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(5.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: soft_staircase(x, alpha), (y,))


def test_soft_round_goes_from_the_weight_itself_to_its_rounding() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    gentle, sharp = (soft_round(weight, 5, FIXED, torch.tensor(alpha)) for alpha in (1e-2, 1e6))
    scales = row_scales(weight, 5, FIXED).float()[:, None]
    torch.testing.assert_close(gentle, weight.clamp(-15 * scales, 15 * scales), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sharp, on_grid(weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("straight_through", None), ("soft_round", None), ("straight_through", "aot_eager"), ("soft_round", "eager")],
)
def test_the_weights_the_forward_sees_change_also_when_compiled(
    batches: Batches, kind: str, backend: str | None
) -> None:
    torch._dynamo.reset()
    model = small_model(layers=1, value_embedding=ValueEmbeddingSpec(0))
    tokens = batches(1)[0]

    def loss_of(tokens: Tensor) -> Tensor:
        return model.logits(model(tokens)[0]).square().mean()

    def run() -> Tensor:
        forward = loss_of if backend is None else torch.compile(loss_of, backend=backend, fullgraph=True)
        return forward(tokens)

    plain = run().detach()
    fake = FakeQuant(model, build(QuantSpec, {"matrix": {"bits": 3}}), build(FakeSpec, {"kind": kind}))
    assert not fake.update(1.0)
    assert torch.equal(run(), plain)
    assert fake.update(0.25)  # below the start of 0.5: the caller compiles again
    quantised = run()
    assert abs(float(quantised.detach() - plain)) > 1e-4 * abs(float(plain))
    with torch.no_grad():  # the same by other means: the weights themselves replaced
        kept = {name: owner.weight.clone() for name, owner in projections(model).items() if owner.fake_quant}
        plugs = {name: projections(model)[name].fake_quant for name in kept}
        for name, plug in plugs.items():
            projections(model)[name].weight.copy_(plug(kept[name]))
        fake.remove()
        torch.testing.assert_close(run(), quantised.detach(), rtol=1e-5, atol=1e-7)
    quantised.backward()
    assert float(model.get_parameter("blocks.0.mlp.down.weight").grad.abs().max()) > 0


@torch.no_grad()
def test_the_compiled_graph_reads_the_present_alpha(batches: Batches) -> None:
    torch._dynamo.reset()
    model = small_model(layers=1, value_embedding=ValueEmbeddingSpec(0))
    tokens = batches(1)[0]
    fake = FakeQuant(model, build(QuantSpec, {"matrix": {"bits": 3}}), FakeSpec(kind="soft_round"))
    fake.update(0.45)
    compiled = torch.compile(lambda t: model.logits(model(t)[0]).square().mean(), backend="aot_eager", fullgraph=True)
    first = float(compiled(tokens))
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not fake.update(0.05)  # no plug changed, nothing to compile
    second = float(compiled(tokens))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count
    assert abs(first - second) > 1e-5 * abs(first)
    assert second == pytest.approx(float(model.logits(model(tokens)[0]).square().mean()), rel=1e-5)


def test_when_it_begins_and_how_sharp_it_grows(model: GPT) -> None:
    fake = FakeQuant(model, QuantSpec(), FakeSpec(kind="soft_round", start=0.5))
    sharpness = []
    for factor in (1.0, 0.6, 0.5, 0.4, 0.25, 0.0):
        fake.update(factor)
        sharpness.append(float(fake.alpha) if fake.active else None)
    assert sharpness == pytest.approx([None, None, None, 4.0, 8.5, 16.0])
    off = FakeQuant(model, QuantSpec(), FakeSpec())
    assert not off.update(0.0)
    early = FakeQuant(model, QuantSpec(), FakeSpec(kind="straight_through", start=1.0))
    assert early.update(1.0)


def test_matrices_get_their_planned_bits_and_tables_only_on_request(model: GPT) -> None:
    spec = build(QuantSpec, {"override": [{"parts": ["v"], "bits": 2}], "matrix": {"bits": 6}})
    for tables in (False, True):
        fake = FakeQuant(model, spec, FakeSpec(kind="straight_through", tables=tables))
        fake.update(0.1)
        owners = projections(model)
        assert (owners["embedding.weight"].fake_quant is not None) == tables
        value = owners["blocks.0.attention.v.weight"]
        assert len(torch.unique(torch.round(value.fake_quant(value.weight)[0].detach(), decimals=6))) <= 3
        fake.remove()
        assert all(owner.fake_quant is None for owner in owners.values())


def test_clips_that_read_hessians_are_refused_while_training() -> None:
    with pytest.raises(RecipeError, match=r"scale\.hessian_weight = 0\.1: training has no Hessians"):
        build(FakeSpec, {"scale": {"rule": "sdclip", "hessian_weight": 0.1}})
