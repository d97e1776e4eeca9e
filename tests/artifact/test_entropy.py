"""The integer tables, the interleaved rANS and the model of `rans`, each against an independent source."""

import math
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.artifact import Group, GroupLayout, TensorLayout
from fairway.artifact.coder import context, rans
from fairway.artifact.entropy import energy, halves, lanes, mixing, regression, tables
from fairway.artifact.entropy import rans as streams
from fairway.artifact.entropy.centre import FINE, Centre
from fairway.artifact.squeeze import squeeze, unsqueeze


def test_logarithms_are_those_of_decimals() -> None:
    values = np.concatenate([np.arange(1, 3000), 2 ** np.arange(44), np.random.default_rng(0).integers(1, 2**44, 500)])
    for value, found in zip(values.tolist(), tables.log2(values.astype(np.int64)).tolist(), strict=True):
        exact = 64 * Decimal(value).ln() / Decimal(2).ln()
        assert found <= exact + Decimal("1e-9")
        assert found + 1 > exact


def test_powers_and_the_normal_distribution_are_those_of_the_math_library() -> None:
    for exponent in range(-600, 600, 7):
        found = int(tables.exp2(np.array([exponent], dtype=np.int64), 20)[0])
        assert found == pytest.approx(2 ** (exponent / 64 + 20), abs=1, rel=1e-8)
    points = np.linspace(-9.5, 9.5, 501)
    found = tables.normal_at(np.round(points * 65536).astype(np.int64)) / 2**40
    exact = [math.erfc(-round(x * 65536) / 65536 / math.sqrt(2)) / 2 for x in points]
    assert np.abs(found - exact).max() < 3e-6


def test_stretch_and_squash_are_the_logit_and_its_inverse() -> None:
    shares = np.arange(1, 65536)
    assert np.abs(mixing.stretches()[1:] - 256 * np.log2(shares / (65536 - shares))).max() <= 1
    odds = np.arange(-mixing.FARTHEST, mixing.FARTHEST + 1)
    exact = np.clip(65536 / (1 + 2.0 ** (-odds / 256)), mixing.LEAST, 65536 - mixing.LEAST)
    assert np.abs(mixing.squashes() - exact).max() < 1.3


@given(st.lists(st.lists(st.integers(0, 2**30), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(4, 16))
def test_frequencies_sum_and_none_is_zero(rows: list[list[int]], bits: int) -> None:
    weights = np.array(rows, dtype=np.int64)
    weights[:, 0] += 1
    found = tables.quantised(weights, bits)
    assert (found.sum(axis=1) == 1 << bits).all()
    assert (found >= 1).all()


def scalar_encode(symbols: list[tuple[int, int]], widths: list[int], count: int, bits: int) -> bytes:
    """rANS in plain Python, one lane after another: the reference."""
    states, words = [1 << 16] * count, []
    end = len(symbols)
    for width in reversed(widths):
        for lane in reversed(range(width)):
            start, freq = symbols[end - width + lane]
            x = states[lane]
            if x >= freq << (32 - bits):
                words.append(x & 0xFFFF)
                x >>= 16
            states[lane] = (x // freq << bits) + x % freq + start
        end -= width
    states_out = b"".join(x.to_bytes(4, "little") for x in states)
    return states_out + b"".join(word.to_bytes(2, "little") for word in reversed(words))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(2, 16),
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.integers(0, 2**16),
)
def test_interleaved_rans_is_the_scalar_one_and_decodes(count: int, bits: int, widths: list[int], seed: int) -> None:
    chance = np.random.default_rng(seed)
    widths = [min(width, count) for width in widths]
    cuts = np.sort(chance.choice(np.arange(1, 1 << bits), size=min(5, (1 << bits) - 1), replace=False))
    edges = np.concatenate([[0], cuts, [1 << bits]])
    symbols = chance.integers(0, len(edges) - 1, sum(widths))
    starts, freqs = edges[symbols].astype(np.uint32), np.diff(edges)[symbols].astype(np.uint32)
    blob = streams.encode(starts, freqs, widths, count, bits)
    assert blob == scalar_encode(list(zip(starts.tolist(), freqs.tolist(), strict=True)), widths, count, bits)
    decoder, at = streams.Decoder(blob, count, bits), 0
    for width in widths:
        slots = decoder.slots(width)
        assert np.array_equal(np.searchsorted(edges, slots, side="right") - 1, symbols[at : at + width])
        decoder.advance(slots, starts[at : at + width], freqs[at : at + width])
        at += width
    decoder.finish()


def test_a_stream_that_ends_early_or_late_is_refused() -> None:
    starts, freqs = np.zeros(4000, np.uint32), np.full(4000, 3, np.uint32)
    blob = streams.encode(starts, freqs, [4] * 1000, 4, 12)
    for wrong, words in ((blob[:-2], "ends early"), (blob + b"\0\0", "left over"), (blob[:15], "cannot hold")):
        with pytest.raises(ValueError, match=words):
            read(wrong)
    unread = streams.Decoder(streams.encode(starts[:4], freqs[:4], [4], 4, 12), 4, 12)
    with pytest.raises(ValueError, match="does not end where it began"):
        unread.finish()
    with pytest.raises(ValueError, match="too small"):
        streams.Decoder(bytes(16), 4, 12)


def read(blob: bytes) -> None:
    decoder = streams.Decoder(blob, 4, 12)
    for _ in range(1000):
        decoder.advance(decoder.slots(4), np.zeros(4, np.uint32), np.full(4, 3, np.uint32))
    decoder.finish()


def group(shapes: list[tuple[int, int]], sigma: float, bits: int = 5, seed: int = 0) -> Group:
    """Gaussian codes whose rows and columns differ in size."""
    chance, limit = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    codes, layouts = [], []
    for place, shape in enumerate(shapes):
        sizes = np.exp(chance.normal(0, 0.3, (shape[0], 1)) + chance.normal(0, 0.3, (1, shape[1])))
        codes.append(np.clip(np.round(chance.normal(0, sigma, shape) * sizes), -limit, limit).astype(np.int8))
        layouts.append(TensorLayout(f"t{place}", *shape, place, np.full(shape[0], 0.05, np.float16)))
    return Group(GroupLayout("up", bits, tuple(layouts)), tuple(codes))


def test_rans_comes_within_three_thousandths_of_its_model() -> None:
    """800,000 codes; the states of their 99 lanes, the model's parameters and the words' waste together."""
    large = group([(400, 500)] * 4, 3.0)
    blob = rans.encode(large, rans.Spec())
    assert rans.ideal_bytes(large) < len(blob) < 1.003 * rans.ideal_bytes(large)
    found = rans.decode(blob, large.layout)
    assert all(np.array_equal(one, other) for one, other in zip(found, large.codes, strict=True))


def test_rans_knows_rows_and_columns() -> None:
    """Against the oracle: codes of known Gaussians, each coded with its own distribution."""
    chance, rows, cols = np.random.default_rng(3), 600, 200
    sizes = 4 * np.exp(chance.normal(0, 0.3, (rows, 1)) + chance.normal(0, 0.3, (1, cols)))
    codes = np.clip(np.round(chance.normal(0, 1, (rows, cols)) * sizes), -15, 15).astype(np.int8)
    phi = np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2)
    high = np.where(codes == 15, 1.0, phi((codes + 0.5) / sizes))
    oracle = -np.log2(high - np.where(codes == -15, 0.0, phi((codes - 0.5) / sizes))).sum() / 8
    one = Group(GroupLayout("up", 5, (TensorLayout("t", rows, cols, 0, np.ones(rows, np.float16)),)), (codes,))
    shares = np.bincount(codes.reshape(-1).astype(int) + 15) / codes.size
    order0 = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() * codes.size / 8
    stored = len(rans.encode(one, rans.Spec()))
    assert oracle < stored < order0 - 0.7 * (order0 - oracle)


def test_rows_alike_are_coded_as_their_distance() -> None:
    """Half of the rows are one vector and a little noise, as tokens are that training never saw."""
    chance = np.random.default_rng(5)
    codes = np.round(chance.normal(0, 8, (256, 96)))
    codes[:128] = np.round(np.round(chance.normal(0, 8, 96)) + chance.normal(0, 0.3, (128, 96)))
    codes = np.clip(codes, -31, 31).astype(np.int8)
    one = Group(GroupLayout("embedding", 6, (TensorLayout("t", 256, 96, None, np.ones(256, np.float16)),)), (codes,))
    for coder in (rans, context):
        blob = coder.encode(one, coder.Spec())
        assert np.array_equal(coder.decode(blob, one.layout)[0], codes)
        assert 8 * len(blob) < codes.size * (5.05 + 2.2) / 2  # 5.05 bits a Gaussian code of σ = 8


def test_a_centre_is_where_most_rows_are() -> None:
    chance, centre = np.random.default_rng(1), Centre(40)
    point = np.round(chance.normal(0, 6, 40))
    for _ in range(20):
        centre.add(np.clip(np.stack([point, point + np.round(chance.normal(0, 0.4, 40))]), -31, 31).astype(np.int8))
        centre.add(np.clip(np.round(chance.normal(0, 6, (2, 40))), -31, 31).astype(np.int8))
    assert np.abs(centre.place() / FINE - point).max() < 0.6


def test_the_fixed_point_factor_is_the_cholesky_one() -> None:
    chance = np.random.default_rng(2)
    mixed = chance.normal(0, 9, (400, 24)) @ (np.eye(24) + 0.3 * chance.normal(0, 1, (24, 24)))
    codes = np.clip(np.round(mixed), -127, 127).astype(np.int8)
    one = regression.Regression(24, 16, 16 * 100)
    one.add(codes)
    wide = codes.astype(float)
    covariance = wide.T @ wide + 16 * 100 * np.eye(24)
    root = np.linalg.cholesky(covariance)
    assert np.abs(one.lower / 65536 + np.eye(24) - root / root.diagonal()).max() < 1e-3
    gains = 64 * np.log2(covariance.diagonal() / root.diagonal() ** 2)
    assert np.abs(one.gains - gains).max() <= 2
    residuals = np.zeros((24, 400), dtype=np.int64)
    for column in range(24):
        residuals[column] = 16 * codes[:, column].astype(np.int64) - one.expected(column, residuals)
    exact = np.linalg.solve(root / root.diagonal(), wide.T)
    assert np.abs(residuals / 16 - exact).max() < 0.5


def test_context_uses_what_a_row_foretells() -> None:
    """Columns that follow from others: four numbers make 32."""
    chance = np.random.default_rng(4)
    base = chance.normal(0, 7, (512, 4))
    codes = np.round(base @ chance.normal(0, 0.6, (4, 32)) + chance.normal(0, 0.5, (512, 32)))
    codes = np.clip(codes, -31, 31).astype(np.int8)
    one = Group(GroupLayout("value", 6, (TensorLayout("t", 512, 32, None, np.ones(512, np.float16)),)), (codes,))
    blob = context.encode(one, context.Spec())
    assert np.array_equal(context.decode(blob, one.layout)[0], codes)
    assert len(blob) < 0.75 * len(rans.encode(one, rans.Spec()))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12))
def test_blocks_cover_every_row_once(tall: int, first: int, count: int) -> None:
    found = [row for begin, end in lanes.blocks(tall, first, count) for row in range(begin, end)]
    assert found == list(range(tall))
    assert all(0 < end - begin <= count for begin, end in lanes.blocks(tall, first, count))


def test_rows_of_a_band_come_back() -> None:
    some = group([(5, 3), (2, 4), (5, 3)], 3.0)
    band, other = lanes.bands(some.layout)
    assert (band.places, other.places) == ((0, 2), (1,))
    stacked = np.asarray(lanes.stacked([some.codes[0], some.codes[2]]), np.int8)
    assert np.array_equal(stacked[1], some.codes[2][0]), "row 0 of the second tensor follows row 0 of the first"
    for found, place in zip(lanes.unstacked(band, stacked), band.places, strict=True):
        assert np.array_equal(found, some.codes[place])


def test_a_row_divided_by_more_is_expected_smaller() -> None:
    """On a grid with a clip for each row the scale says what the codes will be: log2 σ² falls by 2 an octave."""
    scales = np.array([0.5, 1.0, 2.0, 2.0**-24], np.float16)
    layout = TensorLayout("t", 4, 8, 0, scales)
    terms = energy.scale_terms(lanes.Band(4, 8, (0,)), [layout])
    assert np.diff(terms).tolist() == [-128, -128, 64 * 50]


def test_lanes_stay_few() -> None:
    """33.3M weights in eleven groups as the challenge has them: at most 4,096 lanes; the pocket recipe's: 256."""

    def count(*groups: tuple[int, int, int]) -> int:
        layouts = [
            SimpleNamespace(tensors=[SimpleNamespace(rows=r, cols=c)] * n, count=n * r * c) for n, r, c in groups
        ]
        return sum(rans.lane_count(layout) for layout in layouts)  # type: ignore[arg-type]

    square, tables_ = [(11, 512, 512)] * 4, [(1, 1024, 512), (1, 6144, 128), (1, 512, 128), (1, 1024, 128)]
    assert count(*square, (11, 1792, 512), (11, 512, 1792), *tables_, (1, 512, 128)) <= 4096
    small = [(1, 2048, 128), (1, 4096, 64), (1, 128, 64), (1, 2048, 64), (1, 128, 64), *[(3, 128, 128)] * 4]
    assert count(*small, (3, 448, 128), (3, 128, 448)) <= 256


@pytest.mark.parametrize("coder", [rans, context])
def test_a_model_that_cannot_be_is_refused(coder) -> None:  # type: ignore[no-untyped-def]
    some = group([(20, 30)], 3.0)
    blob = coder.encode(some, coder.Spec())
    zero = blob[:8] + bytes(4) + blob[12:]
    with pytest.raises(ValueError, match="impossible on this grid"):
        coder.decode(zero, some.layout)
    with pytest.raises(ValueError, match="cut short before its model"):
        coder.decode(blob[:7], some.layout)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), max_size=60), st.sampled_from([0, 11_000]))
def test_two_byte_numbers_come_back(values: list[int], centre: int) -> None:
    raw = ((np.array(values, dtype=np.int64) // (64 if centre else 1) + centre) % 2**16).astype("<u2").tobytes()
    blob = halves.pack(raw)
    assert halves.unpack(blob, len(raw)) == raw
    for wrong in (blob[:-2], blob + b"\0\0", blob[:3]):
        with pytest.raises(ValueError, match=r"states|early|left over|began|small"):
            halves.unpack(wrong, len(raw))
    with pytest.raises(ValueError, match="no two-byte numbers"):
        halves.unpack(blob, 3)


def test_scales_near_one_another_cost_little_more_than_their_entropy() -> None:
    """4,000 log-normal scales, σ = 0.2: a Gaussian's entropy over the float16 steps, about 10 bits each."""
    scales = np.exp(np.random.default_rng(0).normal(-3, 0.2, 4000)).astype("<f2")
    steps = scales.view(np.uint16).astype(float)
    ideal = 4000 * math.log2(steps.std() * math.sqrt(2 * math.pi * math.e)) / 8
    blob = squeeze(scales.tobytes(), pairs=True, neighbours=True)
    assert blob[0] == 3, "the new method wins over lzma and brotli"
    assert 0.99 * ideal < len(blob) < 1.03 * ideal
    assert unsqueeze(blob, 8000) == scales.tobytes()
