"""Score-first test-time training: the order, the rate, the parameters, and an independent replay."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fairway.base.ranks import Ranks
from fairway.base.specs import build
from fairway.model import ModelSpec, parameter_count
from fairway.model.gpt import GPT
from fairway.score.adapt import none, ttt
from fairway.score.harness import drive
from fairway.score.ledger import Ledger
from fairway.score.predictor import Tape, WindowPredictor
from fairway.score.stream import Stream
from fairway.score.windows import sliding

from .fakes import Tiny

VOCAB = 17


def text(targets: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, targets + 1).astype(np.uint16)


def adapted(model, tokens, spec, windows=None, context=16, technique=ttt, ranks=None):
    stream = Stream(len(tokens) - 1, context, windows or sliding.Spec(4), spec.chunk or 64)
    tape, ledger = Tape(tokens), Ledger(len(tokens) - 1)
    adapter = technique.Adapter(model, spec, len(stream), ranks or Ranks())
    nats = drive(WindowPredictor(model, tape, adapter, 256), stream, tape, tokens, VOCAB, ledger, ranks=ranks)
    return nats, ledger, adapter


SPEC = ttt.Spec(chunk=64, epochs=2, batch=3, micro_batch=2, lr=0.01, params="all")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_is_the_loop_of_the_formula_replayed_by_hand(optimizer):
    """Every window of a chunk scored, then E epochs of batches of 3 sequences, clip 1, cosine over chunks."""
    spec = ttt.Spec(chunk=64, epochs=2, batch=3, micro_batch=2, lr=0.05, params="all", optimizer=optimizer)
    tokens = text(300)
    nats, ledger, adapter = adapted(Tiny(VOCAB).double(), tokens, spec)

    model = Tiny(VOCAB).double()
    x = torch.from_numpy(tokens.astype(np.int64))
    parameters = list(model.parameters())
    optim = (
        torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        if optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    )
    paid, steps, chunks = np.zeros(300), 0, 5
    for chunk in range(chunks):
        for target in range(chunk * 64, min((chunk + 1) * 64, 300)):
            start = 0 if target < 16 else (target - 16) // 4 * 4 + 4  # the window that scores it last
            with torch.no_grad():
                hidden, _ = model(x[None, start : target + 1])
                paid[target] = F.cross_entropy(model.logits(hidden)[0, -1:], x[target + 1 : target + 2])
        if chunk == chunks - 1:
            break
        for group in optim.param_groups:
            group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * chunk / 4))
        rows = torch.stack([x[s : s + 17] for s in range(chunk * 64, (chunk + 1) * 64, 16)])
        for _ in range(2):
            for batch in rows.split(3):
                optim.zero_grad()
                hidden, _ = model(batch[:, :-1])
                F.cross_entropy(model.logits(hidden).flatten(0, 1), batch[:, 1:].flatten()).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optim.step()
                steps += 1
    np.testing.assert_allclose(ledger.price(slice(None)), paid, atol=1e-9)
    assert nats == pytest.approx(paid.sum(), abs=1e-8)
    assert adapter.steps == steps == 16


def test_the_first_chunk_is_scored_by_the_model_of_the_file():
    tokens = text(300)
    _, learned, _ = adapted(Tiny(VOCAB), tokens, SPEC)
    _, still, _ = adapted(Tiny(VOCAB), tokens, none.Spec(), technique=none)
    difference = np.abs(learned.price(slice(None)) - still.price(slice(None)))
    assert (difference[:64] == 0).all()
    assert (difference[64:] > 0).mean() > 0.9


def test_the_last_chunk_is_scored_and_never_trained_on():
    """Other tokens in the last chunk change no weight."""
    weights = []
    for change in (0, 1):
        tokens = text(300)
        tokens[257:] = (tokens[257:] + change) % VOCAB
        model = Tiny(VOCAB)
        adapted(model, tokens, SPEC)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)


def test_a_single_chunk_learns_nothing():
    model = Tiny(VOCAB)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    _, _, adapter = adapted(model, text(64), SPEC)
    assert adapter.steps == 0
    assert torch.equal(before, torch.nn.utils.parameters_to_vector(model.parameters()))


def test_learning_lowers_the_code_length_of_a_repetitive_text():
    tokens = np.tile(text(31), 20)[:601]
    learned, _, _ = adapted(Tiny(VOCAB), tokens, SPEC)
    still, _, _ = adapted(Tiny(VOCAB), tokens, none.Spec(), technique=none)
    assert learned < 0.97 * still


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("context", [16, 10])
def test_the_micro_batch_moves_nothing_but_float_noise(micro_batch, context):
    """Context 10 cuts chunks of 64 into sequences of unequal length: each token must still weigh the same."""
    one, _, _ = adapted(Tiny(VOCAB).double(), text(300), SPEC, sliding.Spec(2), context)
    spec = ttt.Spec(**{**SPEC.__dict__, "micro_batch": micro_batch})
    other, _, _ = adapted(Tiny(VOCAB).double(), text(300), spec, sliding.Spec(2), context)
    assert other == pytest.approx(one, rel=1e-10)


def test_the_rate_falls_as_a_cosine_over_chunks_to_zero():
    """B6: 474 chunks, lr_c = 1e-4 · ½ (1 + cos(π c / 473))."""
    spec = ttt.Spec()
    assert ttt.learning_rate(spec, 0, 474) == 1e-4
    assert ttt.learning_rate(spec, 473, 474) == pytest.approx(0, abs=1e-20)
    assert ttt.learning_rate(spec, 100, 474) == pytest.approx(1e-4 * 0.5 * (1 + math.cos(math.pi * 100 / 473)))
    assert ttt.learning_rate(ttt.Spec(schedule="constant"), 300, 474) == 1e-4


def test_the_reference_unfreezes_5_780_500_parameters_of_its_33_580_124():
    """2 · 2,885,640 of the last two blocks + 9 · 1,024 scale vectors + 4 scalars (TECHNIQUES 5.2)."""
    table = {"embed": [{"kind": "bigram_hash", "rows": 8192}, "smear"], "value_embedding": {"layers": [9, 10]}}
    model = GPT(build(ModelSpec, table), 1024)
    assert parameter_count(model) == 33_580_124
    learned = ttt.chosen(model, "last_blocks", 2)
    assert sum(parameter.numel() for parameter in learned) == 5_780_500
    assert sum(parameter.numel() for parameter in ttt.chosen(model, "all", 0)) == 33_580_124
    assert sum(p.numel() for p in ttt.chosen(model, "last_blocks", 0)) == 11 * 1_024 + 4


@pytest.mark.parametrize("wrong", [{"chunk": 0}, {"epochs": 0}, {"batch": 0}, {"lr": -1.0}])
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ttt.Spec(**wrong)
