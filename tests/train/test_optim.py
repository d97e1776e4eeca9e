"""Muon against its formula, torch's own, and an exact decomposition."""

import math

import pytest
import torch

from fairway.base.ranks import Ranks
from fairway.train.optim import adamw, muon
from fairway.train.orthogonal import QUINTIC, newton_schulz
from fairway.train.polar_express import COEFFICIENTS

F64 = torch.float64


def matrices(*shapes: tuple[int, int], seed: int = 0) -> list[torch.nn.Parameter]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=chance, dtype=F64)) for shape in shapes]


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_newton_schulz_pushes_singular_values_to_one_and_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    u = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    out = newton_schulz(u)
    assert ((torch.linalg.svdvals(out) > 0.6) & (torch.linalg.svdvals(out) < 1.25)).all()
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    along = left.T @ out @ right.T
    torch.testing.assert_close(along, torch.diag(along.diag()), atol=1e-9, rtol=0)


def test_polar_express_comes_nearer_to_one_than_the_quintic() -> None:
    u = torch.randn(32, 32, dtype=F64, generator=torch.Generator().manual_seed(2))
    quintic, polar = ((torch.linalg.svdvals(newton_schulz(u, c)) - 1).square().mean() for c in (QUINTIC, COEFFICIENTS))
    assert polar < 0.3 * quintic


def test_a_batch_of_matrices_is_orthogonalised_like_each_alone() -> None:
    stack = torch.randn(3, 8, 20, dtype=F64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(newton_schulz(stack), torch.stack([newton_schulz(u) for u in stack]))


def test_the_step_is_the_formula() -> None:
    """Two steps by hand: momentum, Nesterov, decoupled decay with the scheduled rate, the factor of tall matrices."""
    spec = muon.Spec(lr=0.1, momentum=0.9, momentum_start=0.5, momentum_warmup=2, weight_decay=0.2)
    (weight,) = matrices((12, 6))
    expected, buffer = weight.detach().clone(), torch.zeros(12, 6, dtype=F64)
    optimizer = muon.build(spec, [weight], Ranks())
    for step, mu in enumerate((0.5, 0.7, 0.9, 0.9)):
        gradient = torch.randn(12, 6, dtype=F64, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient.clone()
        rate = 0.1 / (step + 1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        buffer = mu * buffer + gradient
        update = newton_schulz(gradient + mu * buffer)
        expected = expected * (1 - rate * 0.2) - rate * math.sqrt(2) * update
        torch.testing.assert_close(weight.detach(), expected)


def test_a_first_step_agrees_with_torchs_own_muon() -> None:
    """An oracle: torch.optim.Muon, whose Newton–Schulz is in bfloat16 and whose momentum is an average of gradients:
    after one step the two velocities differ by a factor only, which orthogonalising takes away."""
    (ours,) = matrices((16, 16))
    theirs = torch.nn.Parameter(ours.detach().float().clone())
    gradient = torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
    ours.grad, theirs.grad = gradient.double(), gradient.clone()
    before = ours.detach().clone()
    muon.build(muon.Spec(lr=0.1, weight_decay=0.0), [ours], Ranks()).step()
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0).step()
    moved, expected = ours.detach() - before, theirs.detach().double() - before
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.99


def test_normalised_rows_have_no_length() -> None:
    (weight,) = matrices((6, 10))
    optimizer = muon.Muon([weight], muon.Spec(row_norm=True, nesterov=False), Ranks())
    weight.grad = torch.randn(6, 10, dtype=F64) * torch.logspace(-3, 3, 6, dtype=F64)[:, None]
    torch.testing.assert_close(optimizer._velocity(weight, 0.9).norm(dim=1), torch.ones(6, dtype=F64))


@pytest.mark.parametrize(("module", "spec"), [(muon, muon.Spec()), (adamw, adamw.Spec())])
def test_state_restores_bit_for_bit(module, spec) -> None:
    def descend(optimizer: torch.optim.Optimizer, parameters: list, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(parameters):
                p.grad = torch.randn(p.shape, dtype=F64, generator=torch.Generator().manual_seed(31 * step + i))
            optimizer.step()

    whole = matrices((5, 7), (5, 7), (4, 4))
    descend(module.build(spec, whole, Ranks()), whole, range(6))
    halved = matrices((5, 7), (5, 7), (4, 4))
    first = module.build(spec, halved, Ranks())
    descend(first, halved, range(3))
    second = module.build(spec, halved, Ranks())
    second.load_state_dict(first.state_dict())
    descend(second, halved, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, halved, strict=True))
