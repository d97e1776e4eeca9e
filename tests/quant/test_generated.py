"""Calibration text that the model writes: its distribution, its cache, who writes what."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fairway.base.devices import generator
from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.model import GPT
from fairway.quant import QuantSpec, gather, observed
from fairway.quant.calibration import generated
from tests.quant.conftest import VOCAB, small_model

SPEC = generated.Spec(sequences=6, tokens=16)


def written(
    model: GPT, spec: generated.Spec = SPEC, seed: int = 1, ranks: Ranks | None = None, batch: int = 4
) -> Tensor:
    return torch.cat(generated.write(model, spec, batch, seed, Run(ranks=ranks)))


def test_a_token_is_drawn_as_often_as_the_softmax_says() -> None:
    """Exactly: of N chances at even distances a token gets N·p of them, within the one that straddles its end."""
    logits, count = torch.tensor([0.0, 2.0, -1.0, -torch.inf, 0.5]), 10_000
    chance = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = generated.draw(logits.expand(count, -1), 0.8, chance).bincount(minlength=5).numpy()
    weights = np.exp(np.array([0.0, 2.0, -1.0, -np.inf, 0.5]) / 0.8)
    assert np.abs(drawn - count * weights / weights.sum()).max() <= 1
    assert drawn[3] == 0


def test_the_ends_of_chance_draw_tokens_that_can_come() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert generated.draw(logits, 1.0, ends).tolist() == [1, 2]


def test_first_tokens_are_uniform_and_second_ones_the_model_s(model: GPT) -> None:
    """Chi-square of 4,000 sequences of two tokens, 63 degrees of freedom: below 103.4 in 999 of 1,000 seeds."""
    count = 4_000
    pairs = written(model, generated.Spec(count, 2, 0.8), batch=500)
    with torch.no_grad():
        logits = model.logits(model(torch.arange(VOCAB)[:, None])[0])[:, 0].double()
    firsts = pairs[:, 0].bincount(minlength=VOCAB).double()
    expected = firsts @ torch.softmax(logits / 0.8, dim=1)
    assert expected.max() > 2 * expected.min(), "a model that tells tokens apart"
    for found, wanted in ((firsts, count / VOCAB), (pairs[:, 1].bincount(minlength=VOCAB).double(), expected)):
        assert float(((found - wanted) ** 2 / wanted).sum()) < 103.4


@pytest.mark.parametrize("apart", [False, True])
def test_the_cache_writes_what_a_whole_forward_would(apart: bool) -> None:
    """Every token again, from logits of the finished sequence and the same random numbers, by numpy."""
    model = small_model(apart=apart).double()
    tokens = written(model)
    with torch.no_grad():
        logits = model.logits(model(tokens)[0]).numpy() / SPEC.temperature
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    ends = np.cumsum(shares / shares.sum(-1, keepdims=True), axis=-1)
    for number, row in enumerate(tokens.tolist()):
        chance = torch.rand(16, generator=generator(1, f"calibration/{number}"), dtype=torch.float64).numpy()
        assert row[0] == int(chance[0] * VOCAB)
        assert row[1:] == [int(np.searchsorted(ends[number, t - 1], chance[t], "right")) for t in range(1, 16)]


def test_ranks_write_different_text_and_the_same_in_all(model: GPT) -> None:
    whole = written(model)
    parts = [written(model, ranks=Ranks(rank, 2), batch=2) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(row) for row in whole.tolist()}) == len(whole) == SPEC.sequences
    assert not torch.equal(written(model, seed=2), whole)
    assert generated.write(model, generated.Spec(1, 4), 4, 0, Run(ranks=Ranks(1, 2))) == [], "more ranks than sequences"


def test_a_low_temperature_takes_the_likeliest_token(model: GPT) -> None:
    tokens = written(model, replace(SPEC, temperature=1e-6))
    with torch.no_grad():
        likeliest = model.logits(model(tokens)[0]).argmax(-1)
    assert torch.equal(tokens[:, 1:], likeliest[:, :-1])


def test_its_hessians_are_those_of_the_text_it_wrote(model: GPT) -> None:
    quant, run = QuantSpec(calibration=SPEC, calibration_batch=4), Run()
    names = observed(model, quant)
    found, again = generated.hessians(quant, model, names, (), run, 1), gather(model, [written(model)], names)
    for name, hessian in again.items():
        torch.testing.assert_close(found[name], hessian, rtol=1e-4, atol=1e-6)
    fact = run.facts["generated"]
    assert (fact["sequences"], fact["tokens"]) == (6, 96)
    assert fact["seconds"] >= fact["writing_seconds"] > 0


def test_sequences_beyond_the_context_are_refused_before_training(model: GPT) -> None:
    quant = QuantSpec(calibration=generated.Spec(4, 17))
    with pytest.raises(RecipeError, match=r"quant\.calibration\.tokens = 17: .* model\.context = 16; write at most"):
        generated.observer(quant, model, observed(model, quant), Run())
