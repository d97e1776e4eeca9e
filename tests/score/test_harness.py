"""Pay, then learn: what the harness lets through and what it refuses; the score against an independent sum."""

import numpy as np
import pytest
import torch

from fairway.base.errors import ContractError, HonestyError
from fairway.score.adapt import none
from fairway.score.harness import drive
from fairway.score.ledger import Ledger
from fairway.score.predictor import WindowPredictor
from fairway.score.stream import Stream
from fairway.score.tape import Tape
from fairway.score.tellers import Softmax, normalise
from fairway.score.windows import plain, sliding

from .fakes import Tiny

VOCAB = 17


def text(targets: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, targets + 1).astype(np.uint16)


def score(predictor_of, stream, tokens, **options):
    tape, ledger = Tape(tokens), Ledger(len(tokens) - 1)
    return drive(predictor_of(tape), stream, tape, tokens, VOCAB, ledger, **options), ledger


def windowed(model, block_tokens=4096):
    return lambda tape: WindowPredictor(model, tape, none.Adapter(model, none.Spec(), 1, None), block_tokens)


def by_hand(model, tokens, windows, temperature=1.0):
    """One window at a time, one target at a time, softmax written out."""
    nats = np.zeros(len(tokens) - 1)
    for start, stop, first in zip(windows.start, windows.stop, windows.first, strict=True):
        hidden, _ = model(torch.from_numpy(tokens[start:stop].astype(np.int64))[None])
        z = model.logits(hidden)[0].double().numpy() / temperature
        for target in range(first, stop):
            row = z[target - start]
            nats[target] = np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[target + 1]]
    return nats


@pytest.mark.parametrize("windows", [plain.Spec(), sliding.Spec(3), sliding.Spec(16)])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_the_score_is_that_of_softmax_written_out(windows, temperature):
    model, tokens = Tiny(VOCAB).double(), text(101)
    stream = Stream(101, 16, windows)
    with torch.no_grad():
        expected = by_hand(model, tokens, stream.windows, temperature)
    nats, ledger = score(windowed(model, 64), stream, tokens, teller=Softmax(temperature))
    np.testing.assert_allclose(ledger.price(slice(None)), expected, atol=1e-12)
    assert nats == pytest.approx(expected.sum(), abs=1e-9)


@pytest.mark.parametrize("block_tokens", [1, 16, 40, 100_000])
def test_the_block_size_moves_no_digit_beyond_float_noise(block_tokens):
    model, tokens = Tiny(VOCAB), text(300)
    stream = Stream(300, 16, sliding.Spec(4))
    one, _ = score(windowed(model, 16), stream, tokens)
    other, _ = score(windowed(model, block_tokens), stream, tokens)
    assert other == pytest.approx(one, rel=1e-6)


def test_predictions_are_normalised_in_float64():
    logits = torch.randn(5, 8192, generator=torch.Generator().manual_seed(0)) * 30
    chances = normalise(logits, 0.98)
    assert chances.dtype == torch.float64
    assert float((chances.exp().sum(1) - 1).abs().max()) < 1e-12


class Scripted:
    """A predictor that answers what a test tells it to."""

    def __init__(self, predict, perceive=lambda unit: None):
        self.predict, self.perceive = predict, perceive


def uniform(unit, drop=0, vocab=VOCAB):
    positions = unit.windows.positions
    yield positions[drop:], torch.zeros(len(positions) - drop, vocab)


def test_uniform_guesses_cost_ln_V_each():
    nats, _ = score(lambda tape: Scripted(uniform), Stream(50, 8, plain.Spec()), text(50))
    assert nats == pytest.approx(50 * np.log(VOCAB), rel=1e-14)


def test_a_position_left_out_is_noticed_before_anything_is_learned():
    learned = []
    with pytest.raises(HonestyError, match="2 of 8 positions were not predicted"):
        score(
            lambda tape: Scripted(lambda unit: uniform(unit, drop=2), learned.append),
            Stream(50, 8, plain.Spec()),
            text(50),
        )
    assert learned == []


def test_part_of_a_vocabulary_is_refused():
    with pytest.raises(HonestyError, match="whole vocabulary of 17"):
        score(lambda tape: Scripted(lambda unit: uniform(unit, vocab=16)), Stream(50, 8, plain.Spec()), text(50))


def test_an_answer_given_twice_is_refused():
    def twice(unit):
        yield from uniform(unit)
        yield from uniform(unit)

    with pytest.raises(HonestyError, match="second payment"):
        score(lambda tape: Scripted(twice), Stream(50, 8, plain.Spec()), text(50))


@pytest.mark.parametrize("position", [-1, 50, 8])
def test_positions_out_of_turn_are_refused(position):
    """Before the text, after it, and in the next unit (units of 8)."""

    def outside(unit):
        yield np.array([position]), torch.zeros(1, VOCAB)

    with pytest.raises(HonestyError, match=rf"unit 0: position {position} was predicted out of its turn"):
        score(lambda tape: Scripted(outside), Stream(50, 8, plain.Spec(), chunk=8), text(50))


def test_a_predictor_cannot_move_the_windows():
    def move(unit):
        unit.windows.first[0] += 1
        yield from uniform(unit)

    with pytest.raises(ValueError, match="read-only"):
        score(lambda tape: Scripted(move), Stream(50, 8, plain.Spec()), text(50))


@pytest.mark.parametrize(("context", "chunk"), [(16, 5), (40, 8), (7, 50), (64, 64)])
def test_chunks_of_any_length_beside_the_context_are_scored(context, chunk):
    """Chunks shorter than a window leave units without windows of their own."""
    nats, _ = score(lambda tape: Scripted(uniform), Stream(50, context, sliding.Spec(3), chunk), text(50))
    assert nats == pytest.approx(50 * np.log(VOCAB), rel=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_refused(bad):
    def broken(unit):
        positions = unit.windows.positions
        yield positions, torch.full((len(positions), VOCAB), bad)

    with pytest.raises(HonestyError, match="not finite"):
        score(lambda tape: Scripted(broken), Stream(50, 8, plain.Spec()), text(50))


def test_a_target_cannot_be_read_before_its_unit_is_paid():
    """8 targets a unit: while targets 0..7 are predicted, tokens 0..7 are open and token 8 (target 7) is not."""
    seen = []

    def scripted(tape):
        def predict(unit):
            tape.read(np.array([0]), unit.done)
            seen.append(int(tape.known[0]) + 1)
            with pytest.raises(HonestyError, match="read before it was paid"):
                tape.read(np.array([0]), unit.done + 1)
            yield from uniform(unit)

        return Scripted(predict, lambda unit: tape.read(np.array([0]), unit.done + 1))

    score(scripted, Stream(40, 8, plain.Spec(), chunk=8), text(40))
    assert seen == [8, 16, 24, 32, 40]


def test_every_unit_is_paid_before_it_is_perceived():
    order = []
    tokens, stream = text(40), Stream(40, 8, plain.Spec(), chunk=16)
    tape, ledger = Tape(tokens), Ledger(40)

    def perceive(unit):
        assert ledger.paid(unit.windows.positions).all()
        assert not ledger.paid(np.arange(unit.done, 40)).any()
        order.append(unit.index)

    drive(Scripted(uniform, perceive), stream, tape, tokens, VOCAB, ledger)
    assert order == [0, 1, 2]


def test_a_predictor_has_no_door_of_its_own_to_single_tokens():
    predictor = Scripted(uniform)
    predictor.perceive_token = lambda token: None
    with pytest.raises(ContractError, match="perceive_token is for score/reshape"):
        score(lambda tape: predictor, Stream(50, 8, plain.Spec()), text(50))
