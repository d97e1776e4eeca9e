"""Context-only SLOT: each window's shift is the plain AdamW loop over its own context, and nothing else."""

import pytest
import torch
import torch.nn.functional as F

from fairway.base.ranks import Ranks
from fairway.score.adapt import slot

from .fakes import Tiny

VOCAB, WINDOWS, CONTEXT, WIDTH = 17, 5, 12, 8
SPEC = slot.Spec(steps=6, lr=0.02, weight_decay=0.1)  # a decay that would show


class Capped(Tiny):
    """With a softcap, as the house's model has one."""

    def logits(self, hidden, last=None):
        return 3 * torch.tanh(super().logits(hidden, last) / 3)


def case(dtype=torch.float64, model=Capped):
    """(model, hidden (n, C, d), targets (n, C))"""
    drawn = torch.Generator().manual_seed(1)
    network = model(VOCAB, WIDTH).to(dtype)
    tokens = torch.randint(0, VOCAB, (WINDOWS, CONTEXT + 1), generator=drawn)
    with torch.no_grad():
        hidden, _ = network(tokens[:, :-1])
    return network, hidden, tokens[:, 1:]


def adapter(network, spec=SPEC):
    return slot.Adapter(network, spec, 1, Ranks())


def adamw_by_hand(network, hidden, targets, spec):
    """One window, (C, d) and (C,): the textbook update, with gradients taken for this window alone."""
    delta = torch.zeros(hidden.shape[1], dtype=hidden.dtype)
    first, second = torch.zeros_like(delta), torch.zeros_like(delta)
    a, b = spec.betas
    for step in range(1, spec.steps + 1):
        moved = delta.clone().requires_grad_()
        loss = F.cross_entropy(network.logits((hidden + moved)[None])[0], targets)
        (slope,) = torch.autograd.grad(loss, moved)
        delta = delta * (1 - spec.lr * spec.weight_decay)
        first, second = a * first + (1 - a) * slope, b * second + (1 - b) * slope**2
        delta = delta - spec.lr * (first / (1 - a**step)) / ((second / (1 - b**step)).sqrt() + spec.eps)
    return delta


def test_each_shift_is_the_textbook_adamw_of_its_own_window():
    network, hidden, targets = case()
    found = adapter(network).correct(hidden, targets)
    assert found.shape == (WINDOWS, 1, WIDTH)
    for window in range(WINDOWS):
        by_hand = adamw_by_hand(network, hidden[window], targets[window], SPEC)
        assert by_hand.abs().max() > 0.01
        torch.testing.assert_close(found[window, 0], by_hand, rtol=1e-10, atol=1e-12)


def test_a_shift_does_not_depend_on_the_other_windows():
    network, hidden, targets = case()
    before = adapter(network).correct(hidden, targets)
    hidden, targets = hidden.clone(), targets.clone()
    hidden[1:], targets[1:] = hidden[1:].flip(1), (targets[1:] + 3) % VOCAB
    after = adapter(network).correct(hidden, targets)
    assert (after[0] == before[0]).all(), "equal shapes: bit for bit"
    assert (after[1:] != before[1:]).any(dim=2).all(), "the others did change"
    alone = adapter(network).correct(hidden[:1], targets[:1])
    torch.testing.assert_close(alone[0], before[0], rtol=1e-10, atol=1e-12)


def test_many_windows_are_fitted_in_parts_that_change_nothing(monkeypatch):
    network, hidden, targets = case()
    whole = adapter(network).correct(hidden, targets)
    monkeypatch.setattr(slot, "_BLOCK_ELEMENTS", 2 * CONTEXT * VOCAB)
    torch.testing.assert_close(adapter(network).correct(hidden, targets), whole, rtol=1e-10, atol=1e-12)


def test_the_context_is_predicted_better_in_every_window():
    network, hidden, targets = case()
    found = adapter(network, slot.Spec()).correct(hidden, targets)

    def loss(shift):
        logits = network.logits(hidden + shift)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(WINDOWS, -1).mean(1)

    assert (loss(found) < loss(torch.zeros_like(found))).all()


def test_a_window_without_context_is_left_as_it_is():
    network, hidden, targets = case()
    assert adapter(network).correct(hidden[:, :0], targets[:, :0]) is None


def test_the_model_neither_changes_nor_takes_a_gradient():
    network, hidden, targets = case()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = adapter(network).correct(hidden, targets)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all((network.state_dict()[name] == value).all() for name, value in before.items())


def test_it_fits_while_a_predictor_takes_no_gradients():
    network, hidden, targets = case()
    outside = adapter(network).correct(hidden, targets)
    with torch.no_grad():
        inside = adapter(network).correct(hidden, targets)
    assert (inside == outside).all(), "and it is deterministic"


def test_it_computes_in_the_type_of_the_hidden_vectors():
    network, hidden, targets = case()
    exact = adapter(network).correct(hidden, targets)
    assert exact.dtype == torch.float64
    single = adapter(network.float()).correct(hidden.float(), targets)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-4)


def test_nothing_is_learned_between_units():
    network, hidden, targets = case()
    first = adapter(network)
    before = first.correct(hidden, targets)
    first.learn(None, None)
    assert (first.correct(hidden, targets) == before).all()
    assert slot.Spec().chunk == 0


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": -1.0}, {"betas": (0.3, 1.0)}, {"weight_decay": -1e-9}])
def test_impossible_values_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        slot.Spec(**wrong)
