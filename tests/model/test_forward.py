"""The one forward: causal, the same in batch and step by step, float64-clean."""

import math

import pytest
import torch

from fairway.model import ModelSpec, build_model, tags
from fairway.model.gpt import GPT
from fairway.model.roles import projections
from tests.model.variants import BASE, VOCAB, grid, tokens, varied


@pytest.mark.parametrize("changes", grid())
def test_batch_and_cached_decoding_agree_to_1e_12(changes: dict) -> None:
    model, text = varied(**changes), tokens()
    whole, _ = model(text)
    past, steps = None, []
    for t in range(text.shape[1]):
        hidden, past = model(text[:, t : t + 1], past)
        steps.append(hidden)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-12, rtol=0)
    first, past = model(text[:, :5])
    rest, past = model(text[:, 5:], past)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, atol=1e-12, rtol=0)
    assert past.length == text.shape[1]


@pytest.mark.parametrize("changes", grid())
def test_a_changed_token_moves_nothing_before_it_and_something_after(changes: dict) -> None:
    model, text = varied(**changes), tokens()
    before = model.logits(model(text)[0])
    for place in (0, 7, 13):
        other = text.clone()
        other[:, place] = (other[:, place] + 1) % VOCAB
        after = model.logits(model(other)[0])
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize("changes", grid())
def test_rows_of_a_batch_do_not_see_each_other(changes: dict) -> None:
    model, text = varied(**changes), tokens()
    whole, _ = model(text)
    alone = torch.cat([model(row[None])[0] for row in text])
    torch.testing.assert_close(alone, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", grid())
def test_every_parameter_of_a_moved_model_gets_a_gradient(changes: dict) -> None:
    model, text = varied(**changes), tokens()
    torch.nn.functional.cross_entropy(model.logits(model(text)[0]).flatten(0, 1), text.roll(-1, 1).flatten()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_a_fresh_model_knows_nothing_its_loss_is_ln_vocab() -> None:
    model, text = build_model(ModelSpec(**BASE), VOCAB, seed=1), tokens()
    loss = torch.nn.functional.cross_entropy(model.logits(model(text)[0]).flatten(0, 1), tokens(seed=9).flatten())
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.05)


def test_the_last_logits_are_the_last_of_all_logits_and_softcapped() -> None:
    model, text = varied(), tokens()
    hidden, _ = model(text)
    everything = model.logits(hidden)
    torch.testing.assert_close(model.logits(hidden, last=3), everything[:, -3:], atol=1e-13, rtol=0)
    z = hidden @ model.embedding.weight.T
    torch.testing.assert_close(everything, 30 * torch.tanh(z / 30))


def test_hidden_and_mean_square_one() -> None:
    hidden, _ = varied()(tokens())
    torch.testing.assert_close(hidden.square().mean(-1), torch.ones(3, 14, dtype=torch.float64), atol=1e-5, rtol=0)


def test_unet_skips_join_the_layers_in_reverse_order() -> None:
    """With every block silenced the stream is the embedding plus its weighted copies: x0·Π(1+s_j) up to the norm."""
    model = varied(residual_mix=False, embed=())
    with torch.no_grad():
        for name, tag in tags(model).items():
            if tag.part in ("attn_scale", "mlp_scale"):
                model.get_parameter(name).zero_()
    text = tokens()
    x0 = torch.nn.functional.rms_norm(model.embedding.weight[text], (32,), eps=1e-7)
    # layers 0, 1 push x0 twice; layers 2, 3 pop them with weights s_0, s_1; layer 4 has none to pop
    expected = x0 * (1 + model.skip[0] + model.skip[1])
    torch.testing.assert_close(model(text)[0], torch.nn.functional.rms_norm(expected, (32,), eps=1e-7))


def test_initialisation_follows_its_seed_and_its_rules() -> None:
    one, same, other = (build_model(ModelSpec(**BASE), VOCAB, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    found = tags(one)
    for name, parameter in one.named_parameters():
        part = found[name].part
        if part in ("o", "down", "bigram"):
            assert parameter.abs().max() == 0
        elif part in ("q", "k", "up", "bigram_proj", "value_proj"):
            wide = parameter if parameter.shape[0] <= parameter.shape[1] else parameter.T
            gain = 1 / math.sqrt(10) if part.endswith("proj") else 1.0
            torch.testing.assert_close(wide @ wide.T, gain**2 * torch.eye(len(wide)), atol=1e-5, rtol=0)
    assert one.embedding.weight.std().item() == pytest.approx(0.005, rel=0.1)


def test_plugs_of_a_linear_replace_observe_and_add() -> None:
    model, text = varied(), tokens()
    owner, seen = projections(model)["blocks.2.mlp.up.weight"], []
    plain, _ = model(text)
    owner.observe = seen.append
    observed, _ = model(text)
    assert torch.equal(plain, observed)
    assert seen[0].shape == (3, 14, 32)
    owner.fake_quant = torch.zeros_like
    silenced, _ = model(text)
    assert not torch.equal(plain, silenced)
    owner.adapter = lambda x: x @ owner.weight.T
    adapted, _ = model(text)
    torch.testing.assert_close(adapted, plain)


def test_the_head_observes_but_a_lookup_does_not() -> None:
    model, seen = varied(), []
    model.embedding.observe = seen.append
    hidden, _ = model(tokens())
    assert seen == []
    model.logits(hidden)
    assert torch.equal(seen[0], hidden)


def test_a_model_computes_in_the_type_it_is_told_and_keeps_its_masters() -> None:
    model = GPT(ModelSpec(**BASE), VOCAB)
    model.load_state_dict(varied().float().state_dict())
    model.compute = torch.bfloat16
    hidden, _ = model(tokens())
    assert hidden.dtype == torch.bfloat16
    assert model.embedding.weight.dtype == torch.float32
    exact, _ = varied().float()(tokens())
    assert (hidden.float() - exact).abs().mean() < 0.05
