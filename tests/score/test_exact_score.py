"""Exact mode: a score made of the integer distributions that a decoder computes again, and what it leaves booked."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fairway.artifact import open_artifact
from fairway.base.journal import Run
from fairway.score import Exact, evaluate, exact, range_coder, tokens_of
from fairway.score.adapt import none, ttt
from fairway.score.booking import read_booked, read_state, snapshot_path
from fairway.score.codec.part import encode_part
from fairway.score.evaluate import is_exact
from fairway.score.prices import PRICES, read_prices
from fairway.score.windows import plain, rolling

from .conftest import text_of

WAYS = {
    "adapted": {},
    "sliding": {"result": "sliding"},
    "rolling": {"result": "sliding", "windows": rolling.Spec(), "lanes": 3, "adapt": none.Spec()},
    "plain": {"windows": plain.Spec(), "lanes": 2},
}


@pytest.fixture(scope="module")
def ways(files, held_out, spec, tmp_path_factory):
    """By name: (score in float32, exact score, run folder of the exact one, its spec)."""
    found = {}
    for name, change in WAYS.items():
        one = replace(spec, **change)
        other, folder = replace(one, exact=True, snapshots=2), tmp_path_factory.mktemp(name)
        single = evaluate(files[1], held_out, one, Run(), one.result)
        with Run(folder) as run:
            found[name] = (single, evaluate(files[1], held_out, other, run, one.result), folder, other)
    return found


def test_exact_mode_costs_less_than_2e_4_bits_per_token(files, spec):
    """On 43,000 tokens: what rounding moves one price by, 0.0065 bits, averages to 3e-5 over so many."""
    text = tokens_of(open_artifact(files[1]), text_of(0, 60_000))
    assert len(text) > 40_000
    one = replace(spec, result="quantized")
    loose = evaluate(files[1], text, one, Run(), "quantized")
    tight = evaluate(files[1], text, replace(one, exact=True), Run(), "quantized")
    apart = (tight.code_length_bits - loose.code_length_bits) / tight.tokens
    assert 0 < abs(apart) < 2e-4, "0 would say that nothing was rounded"


@pytest.mark.parametrize("way", WAYS)
def test_exact_mode_is_near_float32_in_every_way_of_reading(ways, way):
    """1,400 tokens: rounding moves a price by 0.0065 bits (logits by 1/64/√12), the sum by that times √N."""
    single, whole, _, _ = ways[way]
    apart = abs(whole.code_length_bits - single.code_length_bits)
    assert 0 < apart < 2e-4 * whole.tokens + 4 * 0.0065 * whole.tokens**0.5
    assert whole.exact
    assert whole.compute == "float64"
    assert not single.exact
    assert single.compute == "float32"
    assert (whole.tokens, whole.text_bytes, whole.text_sha256) == (single.tokens, single.text_bytes, single.text_sha256)


def test_a_price_is_minus_the_logarithm_of_a_count_of_2_to_the_24():
    logits = torch.randn(50, 33, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 4
    targets = torch.arange(50) % 33
    heard = {}
    teller = Exact(0.7, lambda positions, chances: heard.update({"positions": positions, "chances": chances}))
    prices = teller.price(np.arange(100, 150), logits, targets)
    counts = exact.counts(exact.grid(logits, 0.7))
    assert counts.sum(axis=1).tolist() == [2**24] * 50
    assert prices.tolist() == [-math.log(int(row[target]) / 2**24) for row, target in zip(counts, targets, strict=True)]
    assert heard["positions"].tolist() == list(range(100, 150))
    np.testing.assert_allclose(heard["chances"].exp().sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(-heard["chances"].gather(1, targets[:, None])[:, 0], prices, atol=1e-14)


@pytest.mark.parametrize("way", WAYS)
def test_the_booked_prices_are_the_score_and_whole_counts(ways, way):
    """Each price is that of an integer count, as far as float32 can tell counts apart; together they are the score."""
    _, score, folder, _ = ways[way]
    prices = read_prices(folder)
    assert prices.shape == (score.tokens,)
    assert prices.sum(dtype=np.float64) / math.log(2) == pytest.approx(score.code_length_bits, rel=1e-6)
    counts = np.exp(-prices.astype(np.float64)) * 2**24
    rare = counts < 100_000  # known to 100,000 · 17 nats · 2^-25 = 0.05
    assert rare.sum() > 100
    np.testing.assert_allclose(counts[rare], np.rint(counts[rare]), atol=0.1, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_the_block_size_moves_no_bit_of_an_exact_score(ways, way, files, held_out):
    """In float64 batches differ by some 5e-15; the grid of 1/64 takes that in, and what is learned has fixed shapes."""
    _, score, folder, spec = ways[way]
    for block in (1, 1000):
        with Run(folder / f"again{block}") as run:
            again = evaluate(files[1], held_out, replace(spec, block_tokens=block), run, spec.result)
        assert again.code_length_bits == score.code_length_bits
        assert (read_prices(folder / f"again{block}") == read_prices(folder)).all()
        if spec.result == "adapted":
            assert read_booked(folder / f"again{block}") == read_booked(folder)


def test_a_float32_score_does_depend_on_the_block_size_in_its_last_digits(ways, files, held_out):
    """The control of the test above: it could have failed."""
    single, _, _, rolled = ways["rolling"]
    again = evaluate(files[1], held_out, replace(rolled, exact=False, snapshots=0, block_tokens=1), Run(), "sliding")
    assert again.code_length_bits != single.code_length_bits


def test_only_the_stage_of_the_result_is_exact(files, held_out, spec):
    both = replace(spec, exact=True, result="sliding")
    assert [is_exact(both, stage) for stage in both.stages] == [False, False, True, False]
    run = Run()
    assert not evaluate(files[1], held_out, both, run, "quantized").exact
    assert evaluate(files[1], held_out, both, run, "sliding").exact
    assert run.facts["score_quantized"]["compute"] == "float32"
    assert run.facts["score_sliding"]["exact"] is True
    assert run.facts["score_sliding"]["compute"] == "float64"


def test_the_prices_of_the_result_alone_are_kept(files, held_out, spec, tmp_path):
    with Run(tmp_path) as run:
        evaluate(files[1], held_out, spec, run, "sliding")
        assert not (tmp_path / PRICES).exists()
        score = evaluate(files[1], held_out, spec, run, "adapted")
    prices = read_prices(tmp_path)
    assert prices.sum(dtype=np.float64) / math.log(2) == pytest.approx(score.code_length_bits, rel=1e-6)


def test_a_coder_driven_by_these_distributions_writes_as_many_bytes(ways, files, held_out):
    """The score is the size of a file: the words of the range coder, 24 bits of precision, over the same counts."""
    _, score, _, spec = ways["sliding"]
    part = encode_part(open_artifact(files[1]), held_out.tokens, spec, "sliding", 1000)
    assert part.coded_bits == pytest.approx(score.code_length_bits, rel=1e-12)
    assert 0 <= 8 * len(part.part.words) - score.code_length_bits < 80
    assert range_coder.TOTAL == exact.TOTAL == 2**24


def test_the_books_of_an_adapted_score(ways, files, held_out):
    _, score, folder, spec = ways["adapted"]
    booked = read_booked(folder)
    chunks = -(-score.tokens // spec.adapt.chunk)
    assert chunks >= 4
    assert booked.artifact_sha256 == score.artifact_sha256
    assert booked.text_sha256 == score.text_sha256
    assert booked.chunk == spec.adapt.chunk
    assert len(booked.states) == len(booked.nats) == chunks
    assert len(set(booked.states)) == chunks, "every step changed the state"
    nats = [float.fromhex(value) for value in booked.nats]
    assert sum(nats) / math.log(2) == pytest.approx(score.code_length_bits, rel=1e-12)
    prices = read_prices(folder)
    ends = range(0, score.tokens, spec.adapt.chunk)
    assert nats == pytest.approx([float(prices[a : a + spec.adapt.chunk].sum(dtype=np.float64)) for a in ends], 1e-6)
    assert booked.snapshots == tuple(range(2, chunks, 2))
    kept = sorted(path.name for path in snapshot_path(folder / "snapshots", 2).parent.iterdir())
    assert kept == [f"{chunk:06d}.safetensors" for chunk in booked.snapshots]
    names = set(read_state(snapshot_path(folder / "snapshots", 2)))
    assert {name.split(".")[0] for name in names} == {"weight", "step", "exp_avg", "exp_avg_sq"}
    assert json.loads((folder / "booked.json").read_text())["chunk"] == spec.adapt.chunk


def test_a_score_that_is_not_exact_or_does_not_learn_books_no_chunks(ways, files, held_out, spec, tmp_path):
    assert not (ways["sliding"][2] / "booked.json").exists()
    with Run(tmp_path) as run:
        evaluate(files[1], held_out, spec, run, "adapted")
    assert not (tmp_path / "booked.json").exists()


def test_an_unfinished_score_leaves_no_books(ways, files, held_out, tmp_path, monkeypatch):
    """Not even those of the score before it: they would be another's."""
    (tmp_path / "booked.json").write_text("those of an earlier score")
    learn = ttt.Adapter.learn

    def interrupted(self, unit, tape):
        if unit.index == 2:
            raise KeyboardInterrupt
        learn(self, unit, tape)

    monkeypatch.setattr(ttt.Adapter, "learn", interrupted)
    with Run(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        evaluate(files[1], held_out, ways["adapted"][3], run, "adapted")
    assert not (tmp_path / "booked.json").exists()


def test_another_temperature_is_another_distribution(files, spec):
    text = tokens_of(open_artifact(files[1]), b"import os\nimport sys\n" * 4)
    noise = 2e-4 * len(text) + 4 * 0.0065 * len(text) ** 0.5
    warm = replace(spec, exact=True, result="sliding", temperature=2.0)
    loose = evaluate(files[1], text, replace(warm, exact=False), Run(), "sliding")
    tight = evaluate(files[1], text, warm, Run(), "sliding")
    cold = evaluate(files[1], text, replace(warm, temperature=1.0), Run(), "sliding")
    assert abs(tight.code_length_bits - loose.code_length_bits) < noise
    assert abs(tight.code_length_bits - cold.code_length_bits) > 10 * noise
