"""The probe clears what is honest and catches what is not: each way of cheating is a positive control."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fairway.base import ranks as ranks_module
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.score import WindowPredictor, evaluate, examine, probe, state_hash
from fairway.score.adapt import none, ttt
from fairway.score.stream import Stream
from fairway.score.windows import plain, rolling, sliding

from .fakes import Tiny

VOCAB, TARGETS = 17, 200
ADAPT = ttt.Spec(chunk=64, epochs=2, batch=4, lr=0.05, params="all")


def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, TARGETS + 1).astype(np.uint16)


def look(cheat=WindowPredictor, adapt=ADAPT, windows=None, **options):
    """Probes `cheat`, a predictor class, on 200 targets in 4 chunks."""

    def make(tape, stream, block):
        model = Tiny(VOCAB)
        technique = ttt if isinstance(adapt, ttt.Spec) else none
        return cheat(model, tape, technique.Adapter(model, adapt, len(stream), Ranks()), block)

    windows = windows or sliding.Spec(4)
    chunk = getattr(adapt, "chunk", 0)
    options = {"flips": 6, "block_tokens": 128, **options}
    return examine(make, lambda targets: Stream(targets, 16, windows, chunk), tokens(), VOCAB, **options)


def failed(report):
    return {finding.check for finding in report.findings if not finding.honest}


@pytest.mark.parametrize("adapt", [none.Spec(), ADAPT])
@pytest.mark.parametrize("windows", [plain.Spec(), sliding.Spec(4), sliding.Spec(16)])
def test_honest_predictors_move_nothing_at_all(adapt, windows):
    report = look(adapt=adapt, windows=windows)
    assert report.honest
    assert {f.check for f in report.findings} == {"normalised", "state", "repeat", "batch", "flip", "future"}
    assert all(f.worst == 0 for f in report.findings if f.check in ("flip", "future", "repeat", "state"))


class Peeks(WindowPredictor):
    """Adds a little to the logit of the true target, read behind the tape's back."""

    def predict(self, unit):
        for positions, logits in super().predict(unit):
            target = torch.from_numpy(self.tape._targets[positions].astype(np.int64))
            yield positions, logits + 0.01 * F.one_hot(target, VOCAB)


class PeeksWithinTheWindow(WindowPredictor):
    """Not causal: every position of a window sees the window's mean. The tape cannot forbid it."""

    def __init__(self, model, *rest):
        super().__init__(model, *rest)
        inner = model.forward

        def forward(x, past=None):
            hidden, state = inner(x, past)
            return hidden + 1e-4 * hidden.mean(dim=1, keepdim=True), state

        model.forward = forward


class TrainsBeforeScoring(WindowPredictor):
    """One step on the unit's own text (what the tape shows of it), then its score."""

    @torch.enable_grad()
    def predict(self, unit):
        inputs = self.tape.read(np.array([unit.done - 32]), 32)
        hidden, _ = self.model(inputs[:, :-1])
        loss = F.cross_entropy(self.model.logits(hidden).flatten(0, 1), inputs[:, 1:].flatten())
        for parameter, slope in zip(
            self.model.parameters(), torch.autograd.grad(loss, list(self.model.parameters())), strict=True
        ):
            parameter.data -= 0.01 * slope
        with torch.no_grad():
            yield from super().predict(unit)


class SharesADelta(WindowPredictor):
    """SLOT: one correction of the logits for all windows of a batch, from their own inputs."""

    def predict(self, unit):
        for positions, logits in super().predict(unit):
            seen = torch.from_numpy(self.tape._targets[positions - 1].astype(np.int64))
            yield positions, logits + 0.05 * torch.bincount(seen, minlength=VOCAB)


class LearnsAndForgetsNothing(WindowPredictor):
    """Counts tokens while predicting: a hidden state that the next block feels, though not the first."""

    counts = None

    def predict(self, unit):
        self.counts = torch.zeros(VOCAB) if self.counts is None else self.counts
        ahead = torch.from_numpy(self.tape._targets[unit.done - 1 : unit.done + 7].astype(np.int64))
        self.counts = self.counts + torch.bincount(ahead, minlength=VOCAB)
        for positions, logits in super().predict(unit):
            yield positions, logits + 0.01 * self.counts


@pytest.mark.parametrize("adapt", [none.Spec(), ADAPT])
@pytest.mark.parametrize("cheat", [Peeks, PeeksWithinTheWindow, TrainsBeforeScoring, SharesADelta])
def test_a_cheat_is_caught(cheat, adapt):
    report = look(cheat, adapt)
    assert not report.honest
    assert {"flip", "future"} <= failed(report)
    assert not report.worst.honest


def test_reading_ahead_is_caught():
    assert {"flip"} <= failed(look(LearnsAndForgetsNothing))


def test_a_correction_that_a_batch_shares_depends_on_the_batch():
    assert "batch" in failed(look(SharesADelta))
    assert "batch" not in failed(look(Peeks))


def test_training_before_scoring_changes_the_state():
    assert "state" in failed(look(TrainsBeforeScoring))
    assert "state" not in failed(look(Peeks))


def test_the_cheats_would_have_won():
    """They are worth catching: on the same text they claim fewer nats than honest work."""
    from fairway.score.harness import drive
    from fairway.score.ledger import Ledger
    from fairway.score.predictor import Tape

    def nats(cheat):
        text, stream, model = tokens(), Stream(TARGETS, 16, sliding.Spec(4), 64), Tiny(VOCAB)
        tape = Tape(text)
        predictor = cheat(model, tape, none.Adapter(model, none.Spec(), 4, Ranks()), 128)
        return drive(predictor, stream, tape, text, VOCAB, Ledger(TARGETS))

    honest = nats(WindowPredictor)
    assert nats(Peeks) < honest
    assert nats(TrainsBeforeScoring) < honest


def test_a_random_predictor_does_not_repeat():
    class Dice(WindowPredictor):
        def predict(self, unit):
            for positions, logits in super().predict(unit):
                yield positions, logits + 1e-6 * torch.rand_like(logits)

    assert {"repeat", "flip"} <= failed(look(Dice))


def test_the_state_hash_sees_one_bit():
    model = Tiny(VOCAB)
    before = state_hash(model)
    assert before == state_hash(Tiny(VOCAB))
    with torch.no_grad():
        model.mix[0, 0] = torch.nextafter(model.mix[0, 0], torch.tensor(9.0))
    assert state_hash(model) != before


def test_a_file_is_probed_at_both_stages_and_reported(files, held_out, spec):
    run = Run()
    sliding_report, adapted_report = probe(files[1], held_out, spec, run, flips=4)
    assert sliding_report.honest
    assert adapted_report.honest
    assert (sliding_report.stage, adapted_report.stage) == ("sliding", "adapted")
    assert adapted_report.targets == 224  # three and a half contexts of 64
    assert adapted_report.units >= 3
    assert adapted_report.chunk == 74, "shortened so that there is learning to look at, and said so"
    assert run.facts["probe_adapted"]["honest"] is True
    assert run.facts["probe_adapted"]["chunk"] == 74


def test_probing_leaves_the_score_as_it_was(files, held_out, spec):
    before = evaluate(files[1], held_out, spec, Run(), "sliding").code_length_bits
    probe(files[1], held_out, spec, Run(), ("sliding",), flips=2)
    assert evaluate(files[1], held_out, spec, Run(), "sliding").code_length_bits == before


# Lanes, ranks and exact mode.

STILL, PLAIN = none.Spec(), plain.Spec()


def look_at_lanes(cheat=WindowPredictor, adapt=STILL, windows=PLAIN, **options):
    """The same on three lanes, read round by round."""

    def make(tape, stream, block, ranks=None):
        model = Tiny(VOCAB)
        technique = ttt if isinstance(adapt, ttt.Spec) else none
        return cheat(model, tape, technique.Adapter(model, adapt, len(stream), ranks or Ranks()), block)

    def stream(targets):
        return Stream(targets, 16, windows, adapt.chunk, lanes=3)

    options = {"flips": 8, "block_tokens": 128, "ranked": make, **options}
    return examine(make, stream, tokens(), VOCAB, **options)


LEARNING_LANES = ttt.Spec(chunk=48, epochs=2, batch=4, lr=0.05, params="all")


@pytest.mark.parametrize("adapt", [none.Spec(), LEARNING_LANES], ids=["still", "learning"])
@pytest.mark.parametrize("windows", [plain.Spec(), sliding.Spec(4)])
def test_honest_lanes_move_nothing_that_is_coded_before_a_change(adapt, windows):
    report = look_at_lanes(adapt=adapt, windows=windows)
    assert report.honest
    assert {f.check for f in report.findings} == {"normalised", "state", "repeat", "batch", "ranks", "flip", "future"}
    assert all(f.worst == 0 for f in report.findings if f.check in ("flip", "future", "repeat", "state"))
    changed = {f.changed for f in report.findings if f.check == "flip"}
    assert {int(np.searchsorted([67, 134], token - 1, side="right")) for token in changed} == {0, 1, 2}, "in every lane"


class ReadsTheOtherLanes(WindowPredictor):
    """Lane 0's logits feel what the next lane says in the same round: coded at the same time, not before."""

    def predict(self, unit):
        for positions, logits in super().predict(unit):
            ahead = np.minimum(positions + 67, len(self.tape._targets) - 1)  # the same place of the next lane
            seen = torch.from_numpy(self.tape._targets[ahead].astype(np.int64))
            first = torch.from_numpy(positions < 67)
            yield positions, logits + 0.05 * first[:, None] * F.one_hot(seen, VOCAB)


class KnowsWhatOtherLanesHavePaid(WindowPredictor):
    """Counts of all that is paid in all lanes when a unit begins: shared between lanes, and allowed."""

    def predict(self, unit):
        known = [
            self.tape._targets[low : min(high, paid)]
            for low, high, paid in zip(self.tape.edges[:-1], self.tape.edges[1:], self.before, strict=True)
        ]
        counts = torch.bincount(torch.from_numpy(np.concatenate(known).astype(np.int64)), minlength=VOCAB)
        for positions, logits in super().predict(unit):
            yield positions, logits + 0.01 * counts

    def perceive(self, unit):
        super().perceive(unit)
        self.before = self.tape.known.copy()

    def __init__(self, *rest):
        super().__init__(*rest)
        self.before = self.tape.known.copy()


def test_a_leak_from_lane_to_lane_is_caught():
    assert {"flip", "future"} <= failed(look_at_lanes(ReadsTheOtherLanes, flips=24))


def test_what_another_lane_has_paid_may_be_used():
    """The order of coding counts, not the order of the text: a change in the first lane moves the others later on."""
    report = look_at_lanes(KnowsWhatOtherLanesHavePaid, flips=24)
    assert report.honest


def test_a_predictor_that_depends_on_the_number_of_ranks_is_caught(monkeypatch):
    """Each rank learns from its own share, and nobody sums."""
    assert look_at_lanes(adapt=LEARNING_LANES).honest
    monkeypatch.setattr(ranks_module._ThreadRanks, "sum_gradients", lambda self, parameters: None)
    assert failed(look_at_lanes(adapt=LEARNING_LANES)) == {"ranks"}


REAL = {
    "sliding": {"result": "sliding"},
    "adapted": {},
    "adapted lanes": {"lanes": 2},
    "rolling lanes": {"result": "sliding", "windows": rolling.Spec(), "lanes": 3, "adapt": none.Spec()},
    "adapted rolling lanes": {"windows": rolling.Spec(), "lanes": 2},
}


@pytest.mark.parametrize("mode", ["float32", "exact"])
@pytest.mark.parametrize("way", REAL)
def test_a_file_is_probed_over_ranks_lanes_and_in_exact_mode(files, held_out, spec, way, mode):
    spec = dataclasses.replace(spec, exact=mode == "exact", **REAL[way])
    (report,) = probe(files[1], held_out, spec, Run(), (spec.result,), flips=3, targets=150)
    assert report.honest
    by_name = {finding.check: finding for finding in report.findings}
    assert {"ranks", "batch", "flip", "future", "normalised", "state", "repeat"} == set(by_name)
    assert by_name["flip"].worst == by_name["future"].worst == by_name["state"].worst == 0
    if mode == "exact":
        assert by_name["batch"].worst == by_name["ranks"].worst == 0, "the grid takes in the noise of other shapes"


@pytest.mark.parametrize("way", ["adapted lanes", "rolling lanes"])
def test_peeking_is_caught_in_exact_mode_too(files, held_out, spec, way, monkeypatch):
    class PeeksInFloat64(WindowPredictor):
        def predict(self, unit):
            for positions, logits in super().predict(unit):
                target = torch.from_numpy(self.tape._targets[positions].astype(np.int64))
                yield positions, logits + 0.05 * F.one_hot(target, logits.shape[1])

    monkeypatch.setattr(sys.modules["fairway.score.evaluate"], "WindowPredictor", PeeksInFloat64)
    spec = dataclasses.replace(spec, exact=True, **REAL[way])
    (report,) = probe(files[1], held_out, spec, Run(), (spec.result,), flips=3, targets=150)
    assert {"flip", "future"} <= failed(report)
