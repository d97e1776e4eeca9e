"""Focal loss at its corners, its slope against finite differences, and who does not learn by it."""

import ast
import inspect

import pytest
import torch
import torch.nn.functional as F

from fairway.base.specs import build
from fairway.score.adapt import ttt
from fairway.train import TrainSpec
from fairway.train.objective import cross_entropy, focal

F64 = torch.float64


def drawn(tokens: int = 40, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(8)
    return scale * torch.randn(tokens, 9, generator=chance, dtype=F64), torch.randint(0, 9, (tokens,), generator=chance)


def test_without_focus_it_is_cross_entropy_to_the_last_bit_value_and_gradient() -> None:
    found = []
    for module, spec in ((focal, focal.Spec(gamma=0.0)), (cross_entropy, cross_entropy.Spec())):
        logits, targets = drawn()
        value = module.loss(spec, logits.requires_grad_(), targets)
        value.sum().backward()
        found.append((value.detach(), logits.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_its_slope_is_that_of_the_closed_form(gamma: float) -> None:
    """d/dc (1−e^−c)^γ c by central differences of 1e-6 in float64."""
    ce = torch.linspace(1e-3, 12, 50, dtype=F64, requires_grad=True)
    focal.focal(ce, gamma).sum().backward()
    step, at = 1e-6, ce.detach()
    above, below = ((1 - torch.exp(-c)) ** gamma * c for c in (at + step, at - step))
    torch.testing.assert_close(ce.grad, (above - below) / (2 * step), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_token_that_is_certain_costs_nothing_and_gives_no_gradient_that_is_not_finite(gamma, dtype) -> None:
    logits = torch.tensor([[900.0, 0.0, -900.0]], dtype=dtype, requires_grad=True)
    value = focal.loss(focal.Spec(gamma), logits, torch.tensor([0]))
    value.sum().backward()
    assert value.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(1, 3, dtype=dtype))


def test_small_prices_are_exact_where_one_minus_p_would_be_rounded_away() -> None:
    """ce = 1e-9 in float32: p rounds to 1, yet the loss is 1e-27."""
    value = focal.focal(torch.tensor([1e-9]), 2.0)
    torch.testing.assert_close(value, torch.tensor([1e-27]), rtol=1e-6, atol=0)


def test_it_weighs_certain_tokens_less_and_never_adds() -> None:
    ce = torch.linspace(0.01, 10, 200, dtype=F64)
    share = focal.focal(ce, 2.0) / ce
    assert bool((share.diff() > 0).all())
    assert bool((share < 1).all())


@pytest.mark.parametrize("gamma", [-1.0, float("nan"), float("inf")])
def test_a_focus_that_means_nothing_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma = .*: a number from 0 to 100 is needed"):
        focal.Spec(gamma)


def test_test_time_training_keeps_cross_entropy() -> None:
    """The trap of the study's focal run: the loss of training also drove adaptation. Here it is another function: it
    reads no objective, and one step on a small net is that of cross-entropy."""
    assert build(TrainSpec, {"objective": {"kind": "focal"}}).objective == focal.Spec()
    names = {node.attr for node in ast.walk(ast.parse(inspect.getsource(ttt))) if isinstance(node, ast.Attribute)}
    assert "objective" not in names

    class Net(torch.nn.Module):
        def forward(self, tokens):
            return F.one_hot(tokens, 9).double(), None

        def logits(self, hidden):
            return 3 * hidden

    tokens, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 3]])
    expected = F.cross_entropy(3 * F.one_hot(tokens[0], 9).double(), targets[0], reduction="sum")
    torch.testing.assert_close(ttt.cross_entropy_sum(Net(), tokens, targets), expected)
