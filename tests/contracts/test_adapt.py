"""The promise of the slot score/adapt, run on every file in it: scored by the file's model first, learned from after.

A technique offers `Spec` (frozen, with `chunk`: targets between two updates, 0 for none) and
`Adapter(model, spec, chunks, ranks)` with `learn(unit, tape)`.
"""

import dataclasses

import numpy as np
import pytest
import torch

from fairway.base.ranks import Ranks
from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.model import ModelSpec, build_model
from fairway.score import Adapter, Ledger, ScoreSpec, Stream, Tape, WindowPredictor, drive, examine, state_hash
from fairway.score.windows import sliding

FOLDER = "fairway.score.adapt"
VOCAB, TARGETS, CONTEXT, CHUNK = 31, 300, 32, 96
every_technique = pytest.mark.parametrize("kind", kinds(FOLDER))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(seed=0):
    table = {
        "width": 16,
        "layers": 3,
        "heads": 2,
        "kv_heads": 2,
        "hidden": 32,
        "context": CONTEXT,
        "rotary": {"dims": 4},
    }
    table["embed"] = [{"kind": "bigram_hash", "rows": 41, "width": 4}, "smear"]
    model = build_model(build(ModelSpec, table), VOCAB, seed)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # a model is built with much of it at zero; here everything takes part
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn))
    return model


def text(change_from=None):
    tokens = np.random.default_rng(5).integers(0, VOCAB, TARGETS + 1).astype(np.uint16)
    if change_from is not None:
        tokens[change_from:] = (tokens[change_from:] + 7) % VOCAB
    return tokens


def small(kind):
    spec = technique(FOLDER, kind).Spec()
    return dataclasses.replace(spec, chunk=CHUNK) if spec.chunk else spec


def stream(spec, targets=TARGETS):
    return Stream(targets, CONTEXT, sliding.Spec(8), spec.chunk, block=4)


def score(model, kind, tokens, spec=None):
    """(prices in nats, the adapter)"""
    spec = spec or small(kind)
    order, tape, ledger = stream(spec), Tape(tokens), Ledger(TARGETS)
    adapter = technique(FOLDER, kind).Adapter(model, spec, len(order), Ranks())
    drive(WindowPredictor(model, tape, adapter, 128), order, tape, tokens, VOCAB, ledger)
    return ledger.price(slice(None))


@every_technique
def test_its_spec_is_frozen_and_survives_a_recipe(kind):
    spec = ScoreSpec(adapt=technique(FOLDER, kind).Spec())
    assert build(ScoreSpec, to_plain(spec)) == spec
    assert isinstance(spec.adapt.chunk, int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.adapt.anything = 1


@every_technique
def test_it_says_what_it_is_and_where_it_comes_from(kind):
    module = technique(FOLDER, kind)
    assert len(module.__doc__) > 40
    assert module.Spec.__doc__


@every_technique
def test_it_scores_as_if_unadapted_until_it_has_learned(kind):
    """The first chunk, bit for bit, in equal shapes; of a technique that corrects windows, the first, which has no
    context to learn from."""
    spec, order = small(kind), stream(small(kind))
    tokens, tape, ledger = text(), Tape(text()), Ledger(TARGETS)
    model = model_of()
    none = technique(FOLDER, "none")
    predictor = WindowPredictor(model, tape, none.Adapter(model, none.Spec(), 1, Ranks()), 128)
    drive(predictor, order, tape, tokens, VOCAB, ledger)
    corrects = technique(FOLDER, kind).Adapter.correct is not Adapter.correct
    first = CONTEXT if corrects else next(iter(order)).done if spec.chunk else TARGETS
    assert (score(model_of(), kind, tokens)[:first] == ledger.price(slice(0, first))).all()


@every_technique
def test_it_learns_in_every_chunk_but_the_last(kind):
    """Prices after the first chunk move; other tokens in the last chunk leave the learned weights alone."""
    spec = small(kind)
    if not spec.chunk:
        model = model_of()
        before = state_hash(model)
        score(model, kind, text())
        assert state_hash(model) == before
        return
    last = (TARGETS - 1) // CHUNK * CHUNK
    hashes = []
    for tokens in (text(), text(change_from=last + 1)):
        model = model_of()
        before = state_hash(model)
        score(model, kind, tokens)
        assert state_hash(model) != before
        hashes.append(state_hash(model))
    assert hashes[0] == hashes[1]


@every_technique
def test_it_is_deterministic(kind):
    assert (score(model_of(), kind, text()) == score(model_of(), kind, text())).all()


@every_technique
def test_it_is_clean_in_float64(kind):
    """No cast in between: the prices agree with float32's, and the weights are still float64."""
    model = model_of().double()
    exact = score(model, kind, text())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    np.testing.assert_allclose(exact, score(model_of(), kind, text()), atol=1e-3)


@every_technique
def test_the_probe_finds_nothing(kind):
    spec = small(kind)

    def make(tape, order, block):
        model = model_of()
        return WindowPredictor(model, tape, technique(FOLDER, kind).Adapter(model, spec, len(order), Ranks()), block)

    report = examine(make, lambda targets: stream(spec, targets), text(), VOCAB, flips=6, block_tokens=128)
    assert report.honest, report.worst
