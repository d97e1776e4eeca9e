"""Two range coders that must write the same words, read them back, and waste nothing."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.base.errors import ArtifactError, ContractError
from fairway.score import range_coder
from fairway.score.range_coder import TOTAL, ReferenceDecoder, ReferenceEncoder, intervals

pytest.importorskip("constriction")
# What the factories give where constriction is installed, and the plain twin.
CODERS = {
    "constriction": (range_coder.encoder, range_coder.decoder),
    "python": (ReferenceEncoder, ReferenceDecoder),
}
each = pytest.mark.parametrize("coder", CODERS.values(), ids=CODERS)


def draw_counts(n: int, vocab: int, evenness: float, seed: int) -> np.ndarray:
    """(n, vocab) counts: Dirichlet shares of what 1 for each leaves; the rest to the largest."""
    shares = np.random.default_rng(seed).dirichlet(np.full(vocab, evenness), n).reshape(n, vocab)
    counts = 1 + np.floor(shares * (TOTAL - vocab)).astype(np.int64)
    counts[np.arange(n), counts.argmax(axis=1)] += TOTAL - counts.sum(axis=1)
    return counts


@st.composite
def texts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Counts (n, vocab) and symbols (n,): likely ones, unlikely ones, or those at the edges."""
    n, vocab = draw(st.integers(0, 80)), draw(st.sampled_from([2, 3, 4, 17, 300]))
    counts = draw_counts(n, vocab, draw(st.sampled_from([0.01, 0.1, 1.0])), draw(st.integers(0, 2**32)))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["likely", "unlikely", "edges", "any"]))
    if kind == "likely":
        return counts, counts.argmax(axis=1)
    if kind == "unlikely":
        return counts, counts.argmin(axis=1)
    return counts, chance.choice([0, vocab - 1], n) if kind == "edges" else chance.integers(0, vocab, n)


def written(coder, counts, symbols) -> bytes:
    encoder = coder[0]()
    encoder.encode(*intervals(counts, symbols))
    return encoder.finish()


def ideal_bits(counts, symbols) -> float:
    return float(-np.log2(counts[np.arange(len(counts)), symbols] / TOTAL).sum())


@given(texts())
@settings(max_examples=150, deadline=None)
def test_both_write_the_same_words_and_read_them_back(text):
    counts, symbols = text
    words = {name: written(coder, counts, symbols) for name, coder in CODERS.items()}
    assert words["constriction"] == words["python"]
    for _, decoder in CODERS.values():
        decoded = decoder(words["python"]).decode(counts)
        assert decoded.dtype == np.int64
        assert decoded.tolist() == symbols.tolist()
    assert 8 * len(words["python"]) <= 1.0001 * ideal_bits(counts, symbols) + 64


@each
def test_a_long_text_costs_what_it_is_worth(coder):
    counts = draw_counts(20_000, 64, 0.3, 1)
    draws = np.random.default_rng(2).integers(0, TOTAL, len(counts))
    symbols = (counts.cumsum(axis=1) <= draws[:, None]).sum(axis=1)
    words = written(coder, counts, symbols)
    ideal = ideal_bits(counts, symbols)
    assert ideal > 40_000
    assert ideal <= 8 * len(words) <= 1.0001 * ideal + 64
    assert coder[1](words).decode(counts).tolist() == symbols.tolist()


@each
def test_a_vocabulary_of_65536_comes_back(coder):
    counts = draw_counts(40, 65_536, 0.05, 3)
    symbols = np.random.default_rng(4).integers(0, 65_536, 40)
    symbols[:2] = 0, 65_535
    assert coder[1](written(coder, counts, symbols)).decode(counts).tolist() == symbols.tolist()


@pytest.mark.parametrize("vocab", [2, 3, 2048])
@pytest.mark.parametrize("place", ["first", "last", "by turns"])
@pytest.mark.parametrize("likely", [True, False])
def test_extreme_counts_at_the_edges_agree(vocab, place, likely):
    """One symbol has TOTAL − V + 1 counts, the others 1; 3,000 times the same kind of symbol."""
    n = 3000 if vocab < 100 else 300
    symbols = {
        "first": np.zeros(n, np.int64),
        "last": np.full(n, vocab - 1),
        "by turns": np.arange(n) % 2 * (vocab - 1),
    }[place]
    counts = np.ones((n, vocab), np.int64)
    counts[np.arange(n), symbols if likely else (symbols + 1) % vocab] = TOTAL - vocab + 1
    words = [written(coder, counts, symbols) for coder in CODERS.values()]
    assert words[0] == words[1]
    assert 8 * len(words[0]) <= 1.0001 * ideal_bits(counts, symbols) + 64
    assert all(coder[1](words[0]).decode(counts).tolist() == symbols.tolist() for coder in CODERS.values())


def test_a_carry_runs_through_many_words():
    """Symbols read from the number 1/2 keep it inside the interval: until the last one decides, the words may become
    7FFFFFFF FFFFFFFF… or 80000000 00000000…"""
    counts = draw_counts(201, 8, 1.0, 9)
    symbols = ReferenceDecoder(b"\x00\x00\x00\x80").decode(counts)
    for last, first_word, next_word in ((0, 0x7FFFFFFF, 0xFFFFFFFF), (7, 0x80000000, 0)):
        symbols[-1] = last
        words = [written(coder, counts, symbols) for coder in CODERS.values()]
        assert words[0] == words[1]
        assert np.frombuffer(words[0], "<u4")[:10].tolist() == [first_word] + [next_word] * 9
        assert all(coder[1](words[0]).decode(counts).tolist() == symbols.tolist() for coder in CODERS.values())


@each
def test_nothing_costs_nothing(coder):
    encoder = coder[0]()
    assert encoder.finish() == b""
    encoder.encode(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert encoder.finish() == b""
    assert coder[1](b"").decode(np.zeros((0, 5), np.int64)).tolist() == []


@given(texts(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_parts_of_a_text_are_the_text(text, width):
    counts, symbols = text
    for coder in CODERS.values():
        encoder = coder[0]()
        for begin in range(0, len(symbols), width):
            encoder.encode(*intervals(counts[begin : begin + width], symbols[begin : begin + width]))
            encoder.finish()  # a look at the words changes nothing
        words = encoder.finish()
        assert words == written(coder, counts, symbols)
        decoder = coder[1](words)
        parts = [decoder.decode(counts[begin : begin + width]) for begin in range(0, len(symbols), width)]
        assert np.concatenate([np.zeros(0, np.int64), *parts]).tolist() == symbols.tolist()


@given(texts(), st.binary(max_size=12).map(lambda more: more[: len(more) // 4 * 4]))
@settings(max_examples=80, deadline=None)
def test_what_follows_in_a_file_changes_no_symbol(text, more):
    counts, symbols = text
    words = written(CODERS["python"], counts, symbols)
    if words:
        for _, decoder in CODERS.values():
            assert decoder(words + more).decode(counts).tolist() == symbols.tolist()


def outcome(decoder, words: bytes, counts: np.ndarray) -> list[int] | str:
    try:
        return decoder(words).decode(counts).tolist()
    except ArtifactError as error:
        return str(error)


@given(st.binary(max_size=60).map(lambda words: words[: len(words) // 4 * 4]), texts())
@settings(max_examples=200, deadline=None)
def test_foreign_words_decode_to_something_or_are_refused_by_both_alike(words, text):
    counts, _ = text
    found = {name: outcome(decoder, words, counts) for name, (_, decoder) in CODERS.items()}
    assert found["constriction"] == found["python"]
    if isinstance(found["python"], list):
        assert all(0 <= symbol < counts.shape[1] for symbol in found["python"])


@each
def test_words_that_no_encoder_writes_are_refused(coder):
    with pytest.raises(ArtifactError, match="no encoder"):
        coder[1](b"\xff" * 12).decode(draw_counts(3, 10, 1.0, 0))


@each
@pytest.mark.parametrize("kept", [0, 4, 40, 200])
def test_a_text_cut_short_decodes_to_another_or_is_refused(coder, kept):
    counts = draw_counts(500, 50, 0.5, 5)
    symbols = np.random.default_rng(6).integers(0, 50, 500)
    words = written(coder, counts, symbols)
    assert len(words) > 200
    found = outcome(coder[1], words[:kept], counts)
    assert found != symbols.tolist()
    assert found == outcome(ReferenceDecoder, words[:kept] + bytes(len(words)), counts), "zeros are read past the end"


@each
@pytest.mark.parametrize("length", [1, 2, 3, 5, 4095])
def test_bytes_that_are_no_whole_words_are_refused(coder, length):
    with pytest.raises(ArtifactError, match=f"{length} bytes"):
        coder[1](bytes(length))


@each
@pytest.mark.parametrize(("left", "count"), [(-1, 5), (0, 0), (5, -5), (0, TOTAL), (TOTAL - 3, 4), (TOTAL, 1)])
def test_an_interval_that_does_not_exist_is_refused(coder, left, count):
    with pytest.raises(ContractError, match="symbol 1 of count"):
        coder[0]().encode(np.array([0, left]), np.array([1, count]))


@each
def test_as_many_intervals_as_counts_are_asked_for(coder):
    with pytest.raises(ContractError, match="one"):
        coder[0]().encode(np.array([0, 1]), np.array([1]))


def test_intervals_are_sums_of_counts():
    counts = draw_counts(50, 9, 0.5, 7)
    symbols = np.arange(50) % 9
    left, count = intervals(counts, symbols)
    assert left.tolist() == [int(sum(row[:symbol])) for row, symbol in zip(counts.tolist(), symbols, strict=True)]
    assert count.tolist() == [row[symbol] for row, symbol in zip(counts.tolist(), symbols, strict=True)]
    assert np.array_equal(intervals(counts[::2], symbols[::2]), (left[::2], count[::2]))
    for wrong in (np.full(50, 9), np.full(50, -1), symbols[:49]):
        with pytest.raises(ContractError, match="symbols"):
            intervals(counts, wrong)


def test_the_last_words_are_little_endian():
    """A half and a half: the second half's interval begins at 1/2, and one word says so."""
    words = written(CODERS["python"], np.array([[TOTAL // 2, TOTAL // 2]]), np.array([1]))
    assert words == b"\x00\x00\x00\x80"
    assert math.isclose(np.frombuffer(words, "<u4")[0] / 2**32, 0.5)


def test_the_factories_say_what_they_give():
    assert range_coder.name() == "constriction"
    assert not isinstance(range_coder.encoder(), ReferenceEncoder)
    assert not isinstance(range_coder.decoder(b""), ReferenceDecoder)


def test_without_constriction_the_plain_coder_serves(monkeypatch):
    counts, symbols = draw_counts(30, 12, 0.4, 8), np.arange(30) % 12
    before = written(CODERS["constriction"], counts, symbols)
    monkeypatch.setitem(sys.modules, "constriction", None)
    assert range_coder.name() == "python"
    assert isinstance(range_coder.encoder(), ReferenceEncoder)
    assert isinstance(range_coder.decoder(before), ReferenceDecoder)
    assert range_coder.decoder(before).decode(counts).tolist() == symbols.tolist()
