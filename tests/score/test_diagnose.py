"""Each dishonest way claims what it is known to claim, and the instruments made for it catch it; honest ones go free.

The claims are computed again by hand, from the file's model and plain loops.
"""

import numpy as np
import pytest
import torch

from fairway.artifact import open_artifact
from fairway.base.errors import HonestyError, RecipeError
from fairway.base.journal import Run
from fairway.score import evaluate, state_hash
from fairway.score.diagnose import PROCEDURES, diagnose
from fairway.score.diagnose.accounts import old_windows
from fairway.score.diagnose.instruments import by_ledger, verdicts
from fairway.score.diagnose.ngrams import GoldNgram, OracleGate
from fairway.score.diagnose.passes import BestOfPasses, Rescored
from fairway.score.diagnose.scene import HONEST, Adapted, Scene, Sliding, claim

TARGETS = 400
CAUGHT_AT_LEAST_BY = {
    "rescored": {"tape", "ledger", "probe"},
    "temperature": {"tape", "ledger", "probe"},
    "slot_batch": {"tape", "probe"},
    "slot_sample": {"tape", "probe"},
    "pretrained": {"tape", "probe"},
    "best_of_passes": {"tape", "ledger", "normalised"},
    "oracle_gate": {"tape", "normalised"},
    "gold_ngram": {"tape", "probe", "normalised"},
    "best_averaging": {"tape", "ledger", "probe"},
    "duplicated_tails": {"ledger", "bytes"},
    "inflated_bytes": {"bytes"},
}


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.fixture(scope="module")
def variants(files, held_out, spec, run):
    return {one.name: one for one in diagnose(files[1], held_out, spec, run, tokens=TARGETS)}


@pytest.fixture(scope="module")
def scene(files, spec):
    return Scene.of(open_artifact(files[1]), spec)


@pytest.fixture(scope="module")
def text(held_out):
    return np.array(held_out.read(0, TARGETS + 1))


def prices(claimed):
    """The last word on each position: (N,) nats."""
    found = np.full(TARGETS, np.nan)
    for positions, nats in claimed.payments:
        found[positions] = nats
    return found


def nats_by_hand(model, text, window, temperature=1.0):
    """Window by window: what one [start, stop) says of its targets first..stop-1."""
    start, stop, first = window
    tokens = torch.from_numpy(text.astype(np.int64))
    with torch.no_grad():
        hidden, _ = model(tokens[None, start:stop])
        chances = torch.log_softmax(model.logits(hidden)[0].double() / temperature, dim=1)
    return -chances[first - start :].gather(1, tokens[first + 1 : stop + 1, None])[:, 0].numpy()


def rows(windows):
    return zip(windows.start.tolist(), windows.stop.tolist(), windows.first.tolist(), strict=True)


def test_every_way_is_caught_by_the_instruments_made_for_it(variants):
    assert {name: set(one.caught_by) for name, one in variants.items()}.keys() == CAUGHT_AT_LEAST_BY.keys()
    for name, one in variants.items():
        assert CAUGHT_AT_LEAST_BY[name] <= set(one.caught_by), (name, one.caught_by)


def test_an_instrument_does_not_catch_what_it_cannot_see(variants):
    assert variants["inflated_bytes"].caught_by == ("bytes",), "its losses are honest"
    for name in ("pretrained", "slot_batch", "slot_sample", "oracle_gate", "gold_ngram"):
        assert "ledger" not in variants[name].caught_by, "each position is paid once, if with false coin"
    assert "bytes" not in variants["rescored"].caught_by


def test_the_evidence_is_in_the_instruments_own_words(variants):
    for one in variants.values():
        assert len(one.evidence) == len(one.caught_by)
        for name, seen in zip(one.caught_by, one.evidence, strict=True):
            assert seen.startswith(f"{name}: ")
    assert (
        "second payment"
        in dict(zip(variants["rescored"].caught_by, variants["rescored"].evidence, strict=True))["ledger"]
    )
    batch = dict(zip(variants["slot_batch"].caught_by, variants["slot_batch"].evidence, strict=True))["probe"]
    assert "batch moved" in batch
    assert "flip moved" in batch
    assert all(one.charge for one in variants.values())


@pytest.mark.parametrize("kind", HONEST, ids=lambda kind: kind.name)
def test_no_instrument_raises_a_false_alarm(kind, scene, text):
    assert list(verdicts(kind, claim(kind, scene, text), scene, text)) == []


def test_a_verdict_does_not_come_from_a_name(scene, text):
    honest = type("Honest", (Sliding,), {"name": "rescored", "charge": Rescored.charge})
    cheat = type("Cheat", (Rescored,), {"name": "sliding"})
    assert not list(verdicts(honest, claim(honest, scene, text), scene, text))
    assert {"ledger", "tape"} <= {name for name, _ in verdicts(cheat, claim(cheat, scene, text), scene, text)}


def test_the_honest_figures_are_those_of_the_stages(files, held_out, spec, scene):
    whole = np.array(held_out.tokens)
    stages = {kind.name: claim(kind, scene, whole).bits_per_byte for kind in HONEST}
    ledgers = {
        "plain": evaluate(files[1], held_out, spec, Run(), "quantized"),
        "sliding": evaluate(files[1], held_out, spec, Run(), "sliding"),
    }
    for name, score in ledgers.items():
        assert stages[name] == pytest.approx(score.bits_per_byte, rel=1e-12)


def test_dishonest_work_claims_less(variants):
    """All but the tails, which are merely wrong."""
    for name, one in variants.items():
        if name == "duplicated_tails":
            assert one.claimed_bits_per_byte != one.honest_bits_per_byte
        else:
            assert one.claimed_bits_per_byte < one.honest_bits_per_byte, name


def test_more_dishonesty_claims_more(variants):
    claimed = {name: one.claimed_bits_per_byte for name, one in variants.items()}
    assert claimed["temperature"] <= claimed["rescored"], "1 is among the temperatures"
    assert claimed["best_averaging"] <= claimed["rescored"], "the last weights are among the candidates"
    assert claimed["slot_sample"] < claimed["slot_batch"]


def test_rescored_is_the_adapted_model_scoring_again(scene, text):
    claimed = claim(Rescored, scene, text)
    adapted = claim(Adapted, scene, text)
    first, second = claimed.payments[: len(adapted.payments)], claimed.payments[len(adapted.payments) :]
    for (_, mine), (_, honest) in zip(first, adapted.payments, strict=True):
        assert (mine == honest).all(), "the first pass is the honest one"
    assert sum(len(positions) for positions, _ in second) == TARGETS
    assert prices(claimed).sum() < prices(adapted).sum()


def test_pretrained_scores_in_windows_with_weights_that_know_the_text(scene, text):
    kind = next(kind for kind in PROCEDURES if kind.name == "pretrained")
    before = state_hash(scene.model)
    claimed = claim(kind, scene, text)
    assert state_hash(scene.model) == before, "procedures work on copies"
    assert sum(len(positions) for positions, _ in claimed.payments) == TARGETS
    assert prices(claimed).sum() < prices(claim(Sliding, scene, text)).sum()


def test_duplicated_tails_are_the_old_window_set_by_hand(scene, text):
    stride, context = scene.windows.stride, scene.context
    windows = old_windows(TARGETS, context, stride)
    assert windows.start.tolist() == list(range(0, TARGETS, stride))
    by_hand = [nats_by_hand(scene.model, text, window) for window in rows(windows)]
    assert sum(map(len, by_hand)) > TARGETS
    lengths = scene.tokenizer.byte_lengths(text[1:], text[:-1])
    counted = sum(int(lengths[first:stop].sum()) for _, stop, first in rows(windows))
    kind = next(kind for kind in PROCEDURES if kind.name == "duplicated_tails")
    expected = sum(part.sum() for part in by_hand) / np.log(2) / counted
    assert claim(kind, scene, text).bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_inflated_bytes_are_counted_as_the_bugs_counted_them(scene, text, variants):
    """Spaces by their piece, but after a boundary, where they are none; U+FFFD by what each piece decodes to."""
    pieces = [scene.tokenizer.pieces[token] for token in text[1:]]
    spaces = [
        piece.startswith(b" ") and not scene.tokenizer.boundary[b] for b, piece in zip(text, pieces, strict=False)
    ]
    counted = sum(len(piece.decode(errors="replace").encode()) for piece in pieces) + sum(spaces)
    true = len(b"".join(pieces))
    assert counted > true
    one = variants["inflated_bytes"]
    assert one.claimed_bits_per_byte == pytest.approx(one.honest_bits_per_byte * true / counted, rel=1e-12)


def test_the_best_of_passes_is_the_least_of_three_losses(scene, text):
    claimed = claim(BestOfPasses, scene, text)
    each = [np.full(TARGETS, np.inf) for _ in BestOfPasses.rates]
    turns = np.zeros(TARGETS, int)
    for positions, nats in claimed.payments:
        if turns[positions[0]] < len(each):
            each[turns[positions[0]]][positions] = nats
            turns[positions] += 1
    np.testing.assert_allclose(prices(claimed), np.min(each, axis=0), rtol=1e-12)


def test_the_gate_of_the_oracle_never_loses(scene, text):
    gated, honest = prices(claim(OracleGate, scene, text)), prices(claim(Sliding, scene, text))
    assert (gated <= honest + 1e-12).all()
    assert (gated < honest - 1e-3).any()


def test_an_ungated_blend_of_counts_is_a_distribution(scene, text):
    """What is wrong with the oracle's gate is the gate."""

    class Ungated(OracleGate):
        def charges(self, unit):
            for positions, _, blend in self.blended(unit):
                yield positions, blend

        predict = charges

    claimed = claim(Ungated, scene, text)
    assert list(verdicts(Ungated, claimed, scene, text)) == []
    assert prices(claimed).sum() > prices(claim(OracleGate, scene, text)).sum()


def test_fewer_buckets_claim_more(scene, text):
    """The sign of a table that is only asked for the true token (#886): collisions pay."""

    class Crowded(GoldNgram):
        def __init__(self, *scene):
            super().__init__(*scene)
            self.buckets = 4

    class Roomy(GoldNgram):
        def __init__(self, *scene):
            super().__init__(*scene)
            self.buckets = 1 << 16
            self.full = np.zeros((4, self.buckets), np.int64)
            self.context = np.zeros((4, self.buckets), np.int64)

    crowded, normal, roomy = (claim(kind, scene, text) for kind in (Crowded, GoldNgram, Roomy))
    assert crowded.bits < normal.bits < roomy.bits
    assert crowded.excess >= normal.excess > 1 > 1e-9 > claim(Sliding, scene, text).excess


def test_nothing_is_booked_as_a_score(variants, run):
    assert run.facts.keys() == {f"not_a_score_{name}" for name in variants}
    assert run.facts["not_a_score_rescored"]["tokens"] == TARGETS


def test_a_position_that_nobody_paid_is_seen(scene, text):
    claimed = claim(Sliding, scene, text)
    assert by_ledger(claimed, TARGETS) == ""
    assert by_ledger(claimed, TARGETS + 1) == "ledger: 1 of 401 positions are not paid"


def test_a_diagnosis_repeats(files, held_out, spec, variants):
    again = diagnose(files[1], held_out, spec, Run(), tokens=TARGETS)
    assert again == tuple(variants.values())


def test_a_recipe_that_neither_slides_nor_adapts_is_diagnosed_all_the_same(files, held_out):
    from fairway.score import ScoreSpec
    from fairway.score.windows import plain

    bare = Scene.of(open_artifact(files[1]), ScoreSpec(result="quantized", windows=plain.Spec()))
    assert bare.windows.stride == 16
    assert bare.learning(TARGETS).chunk == bare.context


def test_too_few_tokens_are_refused(files, held_out, spec):
    with pytest.raises(RecipeError, match="more than a stride of 16"):
        diagnose(files[1], held_out, spec, Run(), tokens=10)


def test_the_harness_refuses_a_cheat_that_reads_the_tape(scene, text):
    """The verdict is the tape's own error, not a guess from outside."""
    from fairway.score import Ledger, Tape, drive

    stream, tape = scene.stream(TARGETS, "adapted"), Tape(text)
    with pytest.raises(HonestyError, match=r"^tape: "):
        drive(Rescored(scene, tape, stream, 1024), stream, tape, text, scene.vocab, Ledger(TARGETS))
