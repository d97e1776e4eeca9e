"""The promise of the slot train/objective, run on every file in it: `loss(spec, logits, targets)` gives nats for each
token by itself, weighted or not, float32 or better."""

import math

import pytest
import torch

from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.train import TrainSpec

FOLDER, F64 = "fairway.train.objective", torch.float64


def cross_entropy(logits, target):
    """−ln of the target's share, one token, with Python's own numbers."""
    top = max(logits)
    return math.log(math.fsum(math.exp(z - top) for z in logits)) + top - logits[target]


def focal(logits, target, gamma=2.0):
    ce = cross_entropy(logits, target)
    return (1 - math.exp(-ce)) ** gamma * ce


FORMULAS = {"cross_entropy": cross_entropy, "focal": focal}  # each technique's default Spec, written a second time
every_technique = pytest.mark.parametrize("kind", kinds(FOLDER))


def drawn(scale=3.0):
    chance = torch.Generator().manual_seed(4)
    return scale * torch.randn(6, 11, generator=chance, dtype=F64), torch.randint(0, 11, (6,), generator=chance)


def loss(kind, logits, targets):
    module = technique(FOLDER, kind)
    return module.loss(module.Spec(), logits, targets)


@every_technique
def test_it_is_its_formula_in_nats(kind):
    if kind not in FORMULAS:
        pytest.skip(f"no second formula for {kind}: write one into FORMULAS")
    for scale in (0.0, 3.0, 300.0):
        logits, targets = drawn(scale)
        expected = [FORMULAS[kind](z, t) for z, t in zip(logits.tolist(), targets.tolist(), strict=True)]
        torch.testing.assert_close(loss(kind, logits, targets), torch.tensor(expected, dtype=F64))


@every_technique
def test_it_is_finite_for_each_token_and_float32_or_better(kind):
    logits, targets = drawn()
    for given, wanted in ((F64, F64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        found = loss(kind, logits.to(given), targets)
        assert found.shape == (6,)
        assert found.dtype == wanted
        assert bool(torch.isfinite(found).all())


@every_technique
def test_a_token_s_loss_is_its_own_and_falls_as_its_logit_rises(kind):
    logits, targets = drawn()
    before = loss(kind, logits, targets)
    better = logits.clone()
    better[2, targets[2]] += 0.5
    after = loss(kind, better, targets)
    assert after[2] < before[2]
    rest = torch.arange(6) != 2
    assert torch.equal(after[rest], before[rest])


@every_technique
def test_its_gradient_is_that_of_its_function(kind):
    logits, targets = drawn()
    assert torch.autograd.gradcheck(lambda z: loss(kind, z, targets), (logits.requires_grad_(),))


@every_technique
def test_its_spec_survives_a_recipe(kind):
    spec = build(TrainSpec, {"objective": kind})
    assert build(TrainSpec, to_plain(spec)) == spec
