"""The promise of the slot model/mlp, run on every file in it: position-wise, deterministic, float64-clean.

A technique offers `Spec` and `Technique(spec, width, hidden, layer)`, called with z: (..., width) -> (..., width).
"""

import pytest
import torch

from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.model import ModelSpec, build_model, tags

FOLDER, F64 = "fairway.model.mlp", torch.float64
VARIANTS = {"leaky_relu2": [{"slope": 0.3}]}
CASES = [(kind, table) for kind in kinds(FOLDER) for table in ({}, *VARIANTS.get(kind, ()))]
every_technique = pytest.mark.parametrize(("kind", "table"), CASES, ids=lambda value: str(value))


def made(kind, table):
    module, chance = technique(FOLDER, kind), torch.Generator().manual_seed(3)
    part = module.Technique(build(module.Spec, table), 12, 20, 0).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=chance, dtype=F64))
    return part, torch.randn(3, 7, 12, generator=chance, dtype=F64)


@every_technique
def test_each_position_is_computed_by_itself(kind, table):
    part, z = made(kind, table)
    alone = torch.stack([torch.stack([part(position) for position in row]) for row in z])
    assert (part(z) - alone).abs().max() <= 1e-12
    other = z.clone()
    other[1, 4] += 1.0
    moved = (part(other) - part(z)).abs().amax(-1) > 0
    assert moved.nonzero().tolist() == [[1, 4]]


@every_technique
def test_it_is_deterministic_and_changes_no_argument(kind, table):
    part, z = made(kind, table)
    kept = z.clone()
    assert torch.equal(part(z), part(z))
    assert torch.equal(z, kept)


@every_technique
def test_it_is_clean_in_float64(kind, table):
    part, z = made(kind, table)
    y = part(z)
    assert y.dtype == F64
    assert y.shape == z.shape
    assert 0 < (part(z * (1 + 1e-11)) - y).abs().max() < 1e-7 * y.abs().max()


@every_technique
def test_its_gradient_is_that_of_its_function(kind, table):
    part, z = made(kind, table)
    assert torch.autograd.gradcheck(part, (z[0, :2].detach().requires_grad_(),))


@every_technique
def test_a_model_of_it_knows_the_role_of_every_parameter_and_survives_a_recipe(kind, table):
    spec = build(ModelSpec, {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "hidden": 24, "rotary": {"dims": 4}})
    spec = build(ModelSpec, to_plain(spec) | {"mlp": {"kind": kind, **table}})
    assert build(ModelSpec, to_plain(spec)) == spec
    model = build_model(spec, 40, 0)
    assert set(tags(model)) == {name for name, _ in model.named_parameters()}
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()), "all are initialised"
