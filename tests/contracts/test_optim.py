"""The promise of the slot train/optim, run on every file in it: it lowers a loss, and its state restores bit for bit.

A technique offers `Spec` with `lr`, and `build(spec, parameters, ranks)` -> a torch Optimizer.
"""

import copy
import dataclasses

import pytest
import torch

from fairway.base.ranks import Ranks
from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.train import TrainSpec

FOLDER, F64 = "fairway.train.optim", torch.float64
VARIANTS = {"muon": [{"row_norm": True}, {"coefficients": "polar_express"}, {"nesterov": False}]}
CASES = [(kind, table) for kind in kinds(FOLDER) for table in ({}, *VARIANTS.get(kind, ()))]
every_technique = pytest.mark.parametrize(("kind", "table"), CASES, ids=lambda value: str(value))


class Regression:
    """|X W − X W*|² / n for two matrices of equal and one of another shape; W* has entries of about 0.3."""

    def __init__(self, kind, table):
        module, chance = technique(FOLDER, kind), torch.Generator().manual_seed(2)
        shapes = [(6, 10), (6, 10), (10, 4)]
        self.goals = [0.3 * torch.randn(s, generator=chance, dtype=F64) for s in shapes]
        self.inputs = [torch.randn(64, s[0], generator=chance, dtype=F64) for s in shapes]
        self.weights = [torch.nn.Parameter(torch.zeros(s, dtype=F64)) for s in shapes]
        spec = build(module.Spec, table)
        self.make = lambda: module.build(spec, self.weights, Ranks())
        self.lr, self.optimizer = spec.lr, self.make()

    def loss(self):
        parts = zip(self.inputs, self.weights, self.goals, strict=True)
        return sum((x @ (w - goal)).square().mean() for x, w, goal in parts)

    def descend(self, steps, of=200):
        for step in steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (1 - step / of)  # the loop sets the rate of each step
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()


@every_technique
def test_it_lowers_a_loss(kind, table):
    problem = Regression(kind, table)
    before = problem.loss().item()
    problem.descend(range(200))
    assert problem.loss().item() < 0.1 * before


@every_technique
def test_its_state_restores_bit_for_bit(kind, table):
    whole, halved = Regression(kind, table), Regression(kind, table)
    whole.descend(range(20))
    halved.descend(range(11))
    saved = copy.deepcopy(halved.optimizer.state_dict())
    halved.optimizer = halved.make()
    halved.optimizer.load_state_dict(saved)
    halved.descend(range(11, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, halved.weights, strict=True))


@every_technique
def test_a_rate_of_zero_moves_nothing_and_nothing_is_left_to_chance(kind, table):
    first, again = Regression(kind, table), Regression(kind, table)
    first.descend(range(5))
    again.descend(range(5))
    kept = [weight.detach().clone() for weight in first.weights]
    assert all(torch.equal(a, b) for a, b in zip(kept, again.weights, strict=True))
    first.descend([200])
    assert all(torch.equal(a, b) for a, b in zip(kept, first.weights, strict=True))


@every_technique
def test_a_parameter_without_a_gradient_stays(kind, table):
    problem = Regression(kind, table)
    with torch.no_grad():
        problem.weights[1].fill_(0.5)
    problem.loss().backward()
    problem.weights[1].grad = None
    problem.optimizer.step()
    assert torch.equal(problem.weights[1], torch.full((6, 10), 0.5, dtype=F64))
    assert not torch.equal(problem.weights[0], torch.zeros(6, 10, dtype=F64))


@every_technique
def test_its_spec_survives_a_recipe_and_is_frozen(kind, table):
    spec = build(TrainSpec, {"optim": {"matrix": {"kind": kind, **table}}})
    assert build(TrainSpec, to_plain(spec)) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.optim.matrix.lr = 1.0
