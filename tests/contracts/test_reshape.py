"""The promise of the slot score/reshape, run on every file in it: a distribution is changed, never told its target.

A technique offers `Spec`, `STILL` (a Spec that changes nothing) and `LEARNS`. One that learns nothing is
`reshape(logits, spec)`; one that learns is `reshape(logits, hints, spec)` and `Lane(spec)`, which is told the tokens of
a lane one by one (`perceive_token`) and asked before each (`hint`).
"""

import copy
import dataclasses
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fairway.base.errors import HonestyError
from fairway.base.ranks import Ranks, in_threads
from fairway.base.slots import kind_of, kinds, technique
from fairway.base.specs import build, to_plain
from fairway.model import ValueEmbeddingSpec
from fairway.score import Ledger, ScoreSpec, Tape, examine
from fairway.score.adapt import none, ttt
from fairway.score.evaluate import predictor_of, score_model, stream_of
from fairway.score.reshape import entropy_temperature, ngram_tilt
from fairway.score.reshaping import Hint, Reshaped
from fairway.score.tape import BlankTape
from fairway.score.windows import plain, rolling, sliding
from tests.model.variants import VOCAB, varied

FOLDER = "fairway.score.reshape"
CONTEXT, TARGETS, BOS = 16, 83, 0
WINDOWS = {"plain": plain.Spec(), "sliding": sliding.Spec(3), "rolling": rolling.Spec()}
ADAPT = ttt.Spec(chunk=21, epochs=1, batch=2, lr=0.02)
LIVELY = {  # values that change something on a short text; a new technique takes its own
    "entropy_temperature": entropy_temperature.Spec(certain=0.8, uniform=1.3),
    "ngram_tilt": ngram_tilt.Spec(levels=(ngram_tilt.Level((3, 2), 0.6, 2), ngram_tilt.Level((1,), 0.5, 1))),
}
every_technique = pytest.mark.parametrize("kind", kinds(FOLDER))
every_order = pytest.mark.parametrize(("windows", "lanes"), [(w, n) for w in WINDOWS for n in (1, 3)])


def lively(kind):
    return LIVELY.get(kind) or technique(FOLDER, kind).Spec()


@functools.cache
def model():
    return varied(context=CONTEXT, layers=3, value_embedding=ValueEmbeddingSpec(width=8, layers=(1, 2)))


def text(change=None) -> np.ndarray:
    """Phrases that come again, in a text of its own length; change: the token that is another."""
    random = np.random.default_rng(3)
    phrases = random.integers(1, VOCAB, (3, 7))
    drawn = np.concatenate([phrases[i] for i in random.integers(0, 3, 12)])[:TARGETS]
    tokens = np.concatenate([[BOS], drawn]).astype(np.uint16)
    if change is not None:
        tokens[change] = (tokens[change] + 5) % VOCAB
    return tokens


def spec_with(specs, windows="sliding", lanes=1, adapts=False, **more) -> ScoreSpec:
    result = "adapted" if adapts else "sliding"
    adapt = ADAPT if adapts else none.Spec()
    table = {"windows": WINDOWS[windows], "adapt": adapt, "lanes": lanes, "reshape": tuple(specs), "context": CONTEXT}
    return ScoreSpec(result=result, **table, **more)


def predicted(spec, tokens, network=None, stage=None, targets=TARGETS, whole=0) -> torch.Tensor:
    """Log-probabilities (N, V) in batches, as a scorer makes them."""
    stage = stage or spec.result
    stream = stream_of(stage, targets, spec, CONTEXT, whole)
    found = torch.full((targets, VOCAB), float("nan"), dtype=torch.float64)

    def keep(positions, chances):
        found[torch.from_numpy(positions)] = chances

    score_model(copy.deepcopy(network or model()), tokens, stream, spec, stage, VOCAB, Ledger(targets), listen=keep)
    assert not found.isnan().any()
    return found


def stepped(spec, tokens) -> torch.Tensor:
    """The same step by step on a blank tape, as a decoder makes them."""
    stream = stream_of(spec.result, TARGETS, spec, CONTEXT)
    tape = BlankTape(BOS, stream.edges)
    predictor = predictor_of(copy.deepcopy(model()), tape, stream, spec, spec.result)
    found = torch.full((TARGETS, VOCAB), float("nan"), dtype=torch.float64)
    for unit in stream:
        for windows, step, logits in predictor.steps(unit):
            places = windows.first + step
            found[torch.from_numpy(places)] = torch.log_softmax(logits, dim=1)
            tape.write(windows, step, tokens[1 + places].astype(np.int64))
        predictor.perceive(unit)
    return found


@every_technique
def test_its_spec_is_frozen_and_survives_a_recipe(kind):
    spec = ScoreSpec(reshape=(lively(kind), technique(FOLDER, kind).STILL))
    assert build(ScoreSpec, to_plain(spec)) == spec
    assert kind_of(spec.reshape[0]) == kind
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.reshape[0].anything = 1


@every_technique
def test_it_says_what_it_is_and_where_it_comes_from(kind):
    module = technique(FOLDER, kind)
    assert len(module.__doc__) > 40
    assert module.Spec.__doc__
    assert isinstance(module.LEARNS, bool)


@every_technique
@every_order
def test_every_distribution_sums_to_one_over_the_whole_vocabulary(kind, windows, lanes):
    found = predicted(spec_with([lively(kind)], windows, lanes), text())
    assert bool(found.isfinite().all())
    assert float(torch.logsumexp(found, dim=1).abs().max()) < 1e-12


@every_technique
@every_order
def test_a_changed_token_moves_nothing_at_or_before_it(kind, windows, lanes):
    """Exactly, in equal shapes; and something after it, where it is in sight."""
    spec = spec_with([lively(kind)], windows, lanes)
    turn = np.empty(TARGETS, np.int64)
    turn[stream_of("sliding", TARGETS, spec, CONTEXT).order] = np.arange(TARGETS)
    base = predicted(spec, text())
    for token in (1, 20, 41, 60, TARGETS):
        moved = (predicted(spec, text(change=token)) - base).abs().amax(dim=1).numpy()
        assert moved[turn <= turn[token - 1]].max() == 0
        assert token == TARGETS or moved.max() > 0


@every_technique
@pytest.mark.parametrize(
    ("windows", "lanes", "adapts"),
    [(w, n, False) for w in WINDOWS for n in (1, 3)] + [("sliding", 1, True), ("rolling", 3, True)],
)
def test_a_decoder_s_steps_have_the_distributions_of_a_scorer_s_blocks(kind, windows, lanes, adapts):
    spec = spec_with([lively(kind)], windows, lanes, adapts)
    blocks = predicted(spec, text())
    assert float((blocks - stepped(spec, text())).abs().max()) < 1e-10
    still = predicted(spec_with([], windows, lanes, adapts), text())
    assert float((blocks - still).abs().max()) > 1e-2, "and the technique did something"


@every_technique
@pytest.mark.parametrize("windows", WINDOWS)
def test_tokens_of_a_forward_are_memory_alone(kind, windows):
    spec = spec_with([lively(kind)], windows, 3)
    for block in (1, 40):
        parts = predicted(replace(spec, block_tokens=block), text())
        assert float((predicted(spec, text()) - parts).abs().max()) < 1e-10


@every_technique
def test_it_is_deterministic(kind):
    spec = spec_with([lively(kind)])
    assert (predicted(spec, text()) == predicted(spec, text())).all()


@every_technique
def test_it_keeps_the_precision_of_the_logits(kind):
    spec = spec_with([lively(kind)])
    coarse = predicted(spec, text(), copy.deepcopy(model()).to(torch.float32))
    np.testing.assert_allclose(coarse, predicted(spec, text()), atol=1e-3)
    for precision in (torch.float32, torch.float64):
        predictor = made(spec, text(), copy.deepcopy(model()).to(precision))
        predictor.tape.open_to(np.array([TARGETS - 1]))
        blocks = predictor.predict(next(iter(stream_of("sliding", TARGETS, spec, CONTEXT))))
        assert {logits.dtype for _, logits in blocks} == {precision}


@every_technique
@every_order
def test_its_still_form_changes_no_bit(kind, windows, lanes):
    still = spec_with([technique(FOLDER, kind).STILL], windows, lanes)
    assert (predicted(still, text()) == predicted(spec_with([], windows, lanes), text())).all()


@every_technique
def test_what_learns_changes_no_bit_where_nothing_has_come_again(kind):
    tokens = np.random.default_rng(1).permutation(VOCAB).astype(np.uint16)[:40]
    if technique(FOLDER, kind).LEARNS:
        specs = ([lively(kind)], [])
        one, other = (predicted(spec_with(each), tokens, targets=39) for each in specs)
        assert (one == other).all()


@every_technique
def test_the_stages_before_it_stay_plain(kind):
    for stage in ("float", "quantized"):
        found = (predicted(spec_with(each), text(), stage=stage) for each in ([lively(kind)], []))
        assert (next(found) == next(found)).all()


@every_technique
@pytest.mark.parametrize(("windows", "world"), [("plain", 2), ("sliding", 4), ("rolling", 2), ("rolling", 4)])
def test_ranks_pay_what_one_does(kind, windows, world):
    """A share of the windows each, and the hints of one lane that all of them go over."""
    spec, tokens = spec_with([lively(kind)], windows, 3, adapts=True, block_tokens=40), text()
    stream = stream_of(spec.result, TARGETS, spec, CONTEXT)
    kept = {}

    def score(ranks: Ranks) -> None:
        ledger = Ledger(TARGETS)
        network = copy.deepcopy(model())
        score_model(network, tokens, stream, spec, spec.result, VOCAB, ledger, ranks)
        kept[ranks.rank] = ledger.price(slice(None))

    score(Ranks())
    one = kept.pop(0)
    in_threads(world, score)
    prices = np.stack([kept[rank] for rank in range(world)])
    assert (np.isfinite(prices).sum(axis=0) == 1).all(), "every target is paid by one rank"
    np.testing.assert_allclose(np.nansum(prices, axis=0), one, atol=1e-10)


@every_technique
@pytest.mark.parametrize("windows", WINDOWS)
def test_a_slice_is_predicted_as_the_whole_is(kind, windows):
    spec, tokens = spec_with([lively(kind)], windows, 3), text()
    whole = predicted(spec, tokens)
    for targets in (4, 44, 70):
        stream = stream_of(spec.result, targets, spec, CONTEXT, TARGETS)
        own = np.concatenate([tokens[:1], tokens[1 + stream.taken]])
        part = predicted(spec, own, targets=targets, whole=TARGETS)
        assert float((part - whole[torch.from_numpy(stream.taken)]).abs().max()) < 1e-10


@every_technique
@pytest.mark.parametrize("lanes", [1, 3])
def test_the_probe_finds_nothing(kind, lanes):
    report = probed(spec_with([lively(kind)], "sliding", lanes, adapts=True), predictor_of)
    assert report.honest, report.worst


# Positive controls: a technique that is told the token it answers for


def made(spec, tokens, network):
    stream = stream_of(spec.result, TARGETS, spec, CONTEXT)
    return predictor_of(network, Tape(tokens, "cpu", stream.edges), stream, spec, spec.result)


def probed(spec, make):
    """make: as predictor_of."""

    def ranked(tape, stream, block, ranks):
        return make(copy.deepcopy(model()), tape, stream, replace(spec, block_tokens=block), spec.result, ranks)

    return examine(
        make=lambda tape, stream, block: ranked(tape, stream, block, Ranks()),
        stream=lambda count: stream_of(spec.result, count, spec, CONTEXT),
        tokens=text(),
        vocab=VOCAB,
        flips=4,
        ranked=ranked,
    )


class Early(Reshaped):
    """Tells a lane its tokens one place too early."""

    ahead = staticmethod(lambda predictor, place, stop: predictor.tape.read(np.array([place + 1]), stop - place)[0])

    def _news(self, lane, first, stop):
        begin = int(self.told[lane])
        self.told[lane] = stop
        yield from zip(range(begin, stop), self.ahead(self, begin, stop).tolist(), strict=True)


class FromTheText(Early):
    """The same, past the tape: as in a program that holds the whole text."""

    ahead = staticmethod(lambda predictor, place, stop: torch.from_numpy(predictor.tape._targets[place:stop] + 0))


class Told:
    """Expects the token that it was told last."""

    LEARNS, STILL, Spec, Lane = True, None, None, None
    token = 0

    def perceive_token(self, token):
        self.token = token

    def hint(self):
        return Hint(self.token, 3.0)


def with_lanes_of(kind):
    """predictor_of, its technique told too early."""

    def make(*arguments):
        predictor = kind(predictor_of(*arguments[:3], replace(arguments[3], reshape=()), *arguments[4:]), ())
        module = technique(FOLDER, "ngram_tilt")
        predictor.techniques = [(module, module.Spec(), [Told() for _ in predictor.tape.edges[1:]])]
        return predictor

    return make


def test_a_technique_that_is_told_its_own_token_is_refused_by_the_tape():
    with pytest.raises(HonestyError, match="was read before it was paid"):
        probed(spec_with([]), with_lanes_of(Early))


def test_a_technique_that_is_told_its_own_token_past_the_tape_is_found_by_the_probe():
    honest, cheat = (probed(spec_with([]), with_lanes_of(kind)) for kind in (Reshaped, FromTheText))
    assert honest.honest, honest.worst
    assert not cheat.honest
    found = {finding.check: finding.honest for finding in cheat.findings}
    assert not found["flip"]
    assert not found["future"]
    assert found["normalised"], "it sums to one, and is no score"


def test_a_hint_cannot_be_asked_for_once_its_token_is_told():
    spec = spec_with([LIVELY["ngram_tilt"]])
    predictor = made(spec, text(), model())
    predictor.tape.open_to(np.array([TARGETS - 1]))
    unit = next(iter(stream_of("sliding", TARGETS, spec, CONTEXT)))
    list(predictor.predict(unit))
    with pytest.raises(HonestyError, match="after its token was told"):
        list(predictor.predict(unit))
