"""Batches and single steps: an encoder's whole windows and a decoder's steps see the same distributions."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fairway.base.errors import HonestyError, RecipeError
from fairway.base.ranks import Ranks, in_threads
from fairway.model import ValueEmbeddingSpec
from fairway.score import Ledger, ScoreSpec
from fairway.score.adapt import none, slot, ttt
from fairway.score.evaluate import predictor_of, score_model, stream_of
from fairway.score.tape import BlankTape
from fairway.score.windows import plain, rolling, sliding
from tests.model.test_rolling import WINDOW, brute_force
from tests.model.variants import VOCAB, varied

CONTEXT, TARGETS, BOS = WINDOW, 59, 0
WINDOWS = {"plain": plain.Spec(), "sliding": sliding.Spec(3), "rolling": rolling.Spec()}
ADAPTS = {
    "none": none.Spec(),
    "ttt": ttt.Spec(chunk=21, epochs=2, batch=2, micro_batch=1, lr=0.02),
    "slot": slot.Spec(steps=2, lr=0.1),
}


@functools.cache
def model():
    return varied(context=CONTEXT, layers=3, value_embedding=ValueEmbeddingSpec(width=8, layers=(1, 2)))


def text() -> np.ndarray:
    drawn = np.random.default_rng(5).integers(1, VOCAB, TARGETS)
    return np.concatenate([[BOS], drawn]).astype(np.uint16)


def spec_with(windows: str, lanes: int, adapt: str, **more) -> ScoreSpec:
    table = {"windows": WINDOWS[windows], "adapt": ADAPTS[adapt], "lanes": lanes, "context": CONTEXT}
    return ScoreSpec(result="sliding" if adapt == "none" else "adapted", **table, **more)


def predicted(spec: ScoreSpec, tokens: np.ndarray) -> torch.Tensor:
    """Log-probabilities (N, V) in batches, as a scorer makes them."""
    stream = stream_of(spec.result, TARGETS, spec, CONTEXT)
    found = torch.full((TARGETS, VOCAB), float("nan"), dtype=torch.float64)

    def keep(positions, chances):
        found[torch.from_numpy(positions)] = chances

    score_model(copy.deepcopy(model()), tokens, stream, spec, spec.result, VOCAB, Ledger(TARGETS), listen=keep)
    assert not found.isnan().any()
    return found


def stepped(spec: ScoreSpec, tokens: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    """The same step by step on a blank tape, as a decoder makes them, and the order in which they came."""
    stream = stream_of(spec.result, TARGETS, spec, CONTEXT)
    tape = BlankTape(BOS, stream.edges)
    predictor = predictor_of(copy.deepcopy(model()), tape, stream, spec, spec.result)
    found, order = torch.full((TARGETS, VOCAB), float("nan"), dtype=torch.float64), []
    for unit in stream:
        for windows, step, logits in predictor.steps(unit):
            places = windows.first + step
            assert logits.shape == (len(windows), VOCAB)
            found[torch.from_numpy(places)] = torch.log_softmax(logits, dim=1)
            order += places.tolist()
            tape.write(windows, step, tokens[1 + places].astype(np.int64))
        predictor.perceive(unit)
    return found, order


@pytest.mark.parametrize("windows", ["plain", "rolling"])
def test_what_learns_from_a_window_s_context_is_refused_where_there_is_none(windows):
    with pytest.raises(RecipeError, match="'slot' learns from the context of a window"):
        stream_of("adapted", TARGETS, spec_with(windows, 1, "slot"), CONTEXT)


@pytest.mark.parametrize(
    ("windows", "adapt"), [(w, a) for w in WINDOWS for a in ADAPTS if a != "slot" or w == "sliding"]
)
@pytest.mark.parametrize("lanes", [1, 3])
def test_steps_give_the_distributions_of_whole_windows_in_the_order_of_coding(windows, lanes, adapt):
    spec, tokens = spec_with(windows, lanes, adapt), text()
    batched, (single, order) = predicted(spec, tokens), stepped(spec, tokens)
    assert order == stream_of(spec.result, TARGETS, spec, CONTEXT).order.tolist()
    assert float((batched - single).abs().max()) < 1e-10
    if adapt == "ttt" or (adapt == "slot" and windows == "sliding"):  # and the adaptation did something
        still = predicted(spec_with(windows, lanes, "none"), tokens)
        assert float((batched - still).abs().max()) > 1e-4


@pytest.mark.parametrize("lanes", [1, 3])
def test_rolling_lanes_are_each_one_reading_with_a_banded_mask(lanes, monkeypatch):
    """Every lane by itself: BOS, then its own tokens, attention by its definition limited to the context."""
    tokens = text()
    found = predicted(spec_with("rolling", lanes, "none"), tokens)
    for part in np.array_split(np.arange(TARGETS), lanes):
        inputs = np.concatenate([[BOS], tokens[1 + part[:-1]]]).astype(np.int64)
        with torch.no_grad():
            hidden = brute_force(model(), torch.from_numpy(inputs)[None], monkeypatch)
            expected = torch.log_softmax(model().logits(hidden)[0], dim=1)
        torch.testing.assert_close(found[part[0] : part[-1] + 1], expected, atol=1e-10, rtol=0)


def test_rolling_sees_what_plain_windows_forget():
    """After the first context the two differ at every target; before it they do not."""
    tokens = text()
    rolled, cut = (predicted(spec_with(windows, 1, "none"), tokens) for windows in ("rolling", "plain"))
    apart = (rolled - cut).abs()
    assert float(apart[:CONTEXT].max()) < 1e-10
    assert float(apart[CONTEXT:].amax(dim=1).min()) > 1e-6


@pytest.mark.parametrize("adapt", ["none", "ttt"])
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("windows", WINDOWS)
def test_tokens_of_a_forward_are_memory_alone(windows, lanes, adapt):
    tokens = text()
    whole = predicted(spec_with(windows, lanes, adapt), tokens)
    for block in (1, 16):
        parts = predicted(spec_with(windows, lanes, adapt, block_tokens=block), tokens)
        assert float((whole - parts).abs().max()) < 1e-10


@pytest.mark.parametrize("adapt", ["none", "ttt"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_score_rolling_lanes_as_one_does(world, adapt):
    """Three lanes over two ranks, and over four, of which one has none."""
    spec, tokens = spec_with("rolling", 3, adapt), text()
    stream = stream_of(spec.result, TARGETS, spec, CONTEXT)

    def score(ranks: Ranks, totals: dict[int, float], kept: dict[int, np.ndarray]) -> None:
        ledger = Ledger(TARGETS)
        network = copy.deepcopy(model())
        totals[ranks.rank] = score_model(network, tokens, stream, spec, spec.result, VOCAB, ledger, ranks)
        kept[ranks.rank] = ledger.price(slice(None))

    alone, one = {}, {}
    score(Ranks(), alone, one)
    totals, kept = {}, {}
    in_threads(world, lambda ranks: score(ranks, totals, kept))
    assert len(set(totals.values())) == 1
    assert totals[0] == pytest.approx(alone[0], abs=1e-9)
    prices = np.stack([kept[rank] for rank in range(world)])
    assert (np.isfinite(prices).sum(axis=0) == 1).all(), "every target is paid by one rank"
    np.testing.assert_allclose(np.nansum(prices, axis=0), one[0], atol=1e-10)
    owners = [{int(np.flatnonzero(np.isfinite(prices[:, place]))[0]) for place in part} for part in lanes_of(3)]
    assert all(len(own) == 1 for own in owners), "a lane's past lives on one rank"


def lanes_of(lanes: int) -> list[np.ndarray]:
    return np.array_split(np.arange(TARGETS), lanes)


def test_a_slice_of_rolling_lanes_is_predicted_as_the_whole_is():
    """Slices that end in the middle of a window, with lanes of two lengths."""
    spec, tokens = spec_with("rolling", 3, "ttt"), text()
    whole = predicted(spec, tokens)
    for targets in (1, 2, 4, 22, 43, 44, 45, 58):
        stream = stream_of(spec.result, targets, spec, CONTEXT, TARGETS)
        own = np.concatenate([tokens[:1], tokens[1 + stream.taken]])
        found = torch.full((targets, VOCAB), float("nan"), dtype=torch.float64)

        def keep(positions, chances, found=found):
            found[torch.from_numpy(positions)] = chances

        score_model(copy.deepcopy(model()), own, stream, spec, "adapted", VOCAB, Ledger(targets), listen=keep)
        assert float((found - whole[torch.from_numpy(stream.taken)]).abs().max()) < 1e-10


def test_a_step_cannot_be_asked_for_before_the_last_ones_tokens_are_written():
    spec = spec_with("plain", 3, "none")
    stream = stream_of("sliding", TARGETS, spec, CONTEXT)
    predictor = predictor_of(copy.deepcopy(model()), BlankTape(BOS, stream.edges), stream, spec, "sliding")
    steps = predictor.steps(next(iter(stream)))
    next(steps)
    with pytest.raises(HonestyError, match="read before it was paid"):
        next(steps)


def test_exact_mode_learns_in_one_thread(monkeypatch):
    """A decoder learns in one; sums over other numbers of threads differ in the last bit."""
    seen = {}
    learn = ttt.Adapter.learn

    def watched(self, unit, tape):
        seen.setdefault(mode, set()).add(torch.get_num_threads())
        learn(self, unit, tape)

    monkeypatch.setattr(ttt.Adapter, "learn", watched)
    torch.set_num_threads(2)
    try:
        for mode in (True, False):
            predicted(replace(spec_with("plain", 1, "ttt"), exact=mode), text())
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == {True: {1}, False: {2}}
