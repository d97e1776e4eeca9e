"""Coders and the byte streams beneath them: what was encoded comes back, and nothing else is believed."""

import tracemalloc
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fairway.artifact import Group, GroupLayout, TensorLayout, bytestreams
from fairway.artifact.coder import plain, zstd
from fairway.artifact.groups import ORDERS, byte_count, digits_in_byte, flatten, from_bytes, to_bytes, unflatten
from fairway.artifact.squeeze import squeeze, unsqueeze
from fairway.base import slots
from fairway.quant import entropy, largest

FOLDER = "fairway.artifact.coder"
CODERS = [slots.technique(FOLDER, kind) for kind in slots.kinds(FOLDER)]
each = pytest.mark.parametrize("coder", CODERS, ids=lambda module: module.__name__.rsplit(".", 1)[-1])
STREAMS = [
    (bytestreams.lzma_pack, bytestreams.lzma_unpack),
    (zstd.zstd_pack, zstd.zstd_unpack),
    (bytestreams.brotli_pack, bytestreams.brotli_unpack),
]
streams = pytest.mark.parametrize(("pack", "unpack"), STREAMS, ids=["lzma", "zstd", "brotli"])


def group(bits: int, shapes: list[tuple[int, int]], seed: int = 0, spread: float = 0.4) -> Group:
    chance, limit = np.random.default_rng(seed), largest(bits)
    codes = tuple(
        np.clip(np.round(chance.normal(0, spread * limit, shape)), -limit, limit).astype(np.int8) for shape in shapes
    )
    layouts = tuple(TensorLayout(f"t{i}", *shape, i, np.ones(shape[0], np.float16)) for i, shape in enumerate(shapes))
    return Group(GroupLayout("q", bits, layouts), codes)


@st.composite
def codes_of_some_bits(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(2, 8))
    limit = largest(bits)
    return draw(arrays(np.int8, st.integers(0, 70), elements=st.integers(-limit, limit))), bits


@given(codes_of_some_bits())
def test_packed_bits_come_back_and_take_what_they_say(case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    packed = plain.pack(codes, bits)
    assert len(packed) == -(-len(codes) * bits // 8)
    # Independent: the same number written in base 2^bits.
    number = int(
        "".join(f"{code + largest(bits):0{bits}b}" for code in codes.tolist()).ljust(8 * len(packed), "0") or "0", 2
    )
    assert packed == number.to_bytes(len(packed), "big")
    assert np.array_equal(plain.unpack(packed, len(codes), bits), codes)


def test_packing_in_pieces_is_packing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = group(5, [(1, 1003)]).codes[0].reshape(-1)
    whole = plain.pack(codes, 5)
    monkeypatch.setattr(plain, "CHUNK", 64)
    assert plain.pack(codes, 5) == whole
    assert np.array_equal(plain.unpack(whole, 1003, 5), codes)


@given(codes_of_some_bits())
def test_digits_come_back(case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    raw = to_bytes(codes, bits)
    assert len(raw) == byte_count(len(codes), bits)
    assert np.array_equal(from_bytes(raw, len(codes), bits), codes)


@pytest.mark.parametrize(("bits", "digits"), [(2, 5), (3, 2), (4, 2), (5, 1), (6, 1), (7, 1), (8, 1)])
def test_as_many_digits_as_fit(bits: int, digits: int) -> None:
    assert digits_in_byte(bits) == digits
    assert (2 * largest(bits) + 1) ** digits <= 256


def test_a_byte_that_is_no_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="holds more than 5 codes of int2"):
        from_bytes(bytes([243]), 5, 2)
    with pytest.raises(ValueError, match="outside int5"):
        unflatten(
            from_bytes(bytes([31]), 1, 8),
            GroupLayout("q", 5, (TensorLayout("t", 1, 1, 0, np.ones(1, np.float16)),)),
            "rows",
        )


@pytest.mark.parametrize("order", ORDERS)
def test_both_orders_come_back(order: str) -> None:
    some = group(5, [(3, 4), (1, 7), (5, 1)])
    flat = flatten(some, order)
    assert flat[1] == (some.codes[0][0, 1] if order == "rows" else some.codes[0][1, 0])
    assert all(np.array_equal(a, b) for a, b in zip(unflatten(flat, some.layout, order), some.codes, strict=True))


@each
@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(2, 8),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 0.2, 3.0]),
)
def test_any_group_comes_back(
    coder: ModuleType, bits: int, shapes: list[tuple[int, int]], seed: int, spread: float
) -> None:
    some = group(bits, shapes, seed, spread)
    found = coder.decode(coder.encode(some, coder.Spec()), some.layout)
    for codes, original in zip(found, some.codes, strict=True):
        assert codes.dtype == np.int8
        assert np.array_equal(codes, original)


@each
def test_encoding_is_a_pure_function(coder: ModuleType) -> None:
    some = group(5, [(20, 30)])
    before = some.codes[0].copy()
    assert coder.encode(some, coder.Spec()) == coder.encode(some, coder.Spec())
    assert np.array_equal(some.codes[0], before)


@each
def test_foreign_bytes_are_refused_or_are_codes_of_the_grid(coder: ModuleType) -> None:
    """Never anything else: no other exception, no code outside the grid, no other shape."""
    some, chance = group(3, [(11, 13)]), np.random.default_rng(5)
    good = coder.encode(some, coder.Spec())
    blobs = [b"", good[:-1], good + b"\0", good[1:], chance.bytes(54), chance.bytes(500)]
    blobs += [bytes([*good[:i], good[i] ^ (1 << int(chance.integers(8))), *good[i + 1 :]]) for i in range(len(good))]
    for blob in blobs:
        try:
            (codes,) = coder.decode(blob, some.layout)
        except ValueError:
            continue
        assert codes.shape == (11, 13)
        assert np.abs(codes).max() <= largest(3)
    for blob in (b"", good[:-1], good + b"\0"):
        with pytest.raises(ValueError, match=r"."):
            coder.decode(blob, some.layout)


@each
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_an_entropy_coder_comes_near_the_entropy(coder: ModuleType, bits: int) -> None:
    some = group(bits, [(256, 256)], spread=0.5 if bits == 2 else 0.2)
    stored = 8 * len(coder.encode(some, coder.Spec())) / 256**2
    floor = entropy(some.codes[0])
    name = coder.__name__.rsplit(".", 1)[-1]
    if name == "plain":
        assert stored == bits
    else:
        assert floor * 0.999 < stored < floor * (1.09 if name == "lzma" else 1.04) + 0.02


@streams
@settings(max_examples=30, deadline=None)
@given(raw=st.binary(max_size=3000))
def test_bytes_come_back(pack, unpack, raw: bytes) -> None:  # type: ignore[no-untyped-def]
    blob = pack(raw)
    assert unpack(blob, len(raw)) == raw
    for wrong in {max(len(raw) - 1, 0), len(raw) + 1} - {len(raw)}:
        with pytest.raises(ValueError, match=r"does not hold exactly|lzma"):
            unpack(blob, wrong)


@streams
def test_a_bomb_gives_no_more_than_was_announced(pack, unpack) -> None:  # type: ignore[no-untyped-def]
    bomb = pack(bytes(50_000_000))
    assert len(bomb) < 20_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"."):
        unpack(bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@given(raw=st.binary(max_size=600), pairs=st.booleans())
@settings(deadline=None)
def test_squeezed_sections_come_back(raw: bytes, pairs: bool) -> None:
    blob = squeeze(raw, pairs, neighbours=True)
    assert len(blob) <= len(raw) + 5
    assert unsqueeze(blob, len(raw)) == raw
    if raw:
        with pytest.raises(ValueError, match="at most"):
            unsqueeze(blob, len(raw) - 1)


def test_float16_numbers_are_squeezed_apart() -> None:
    numbers = np.random.default_rng(0).uniform(0.01, 0.02, 4000).astype("<f2").tobytes()
    blob = squeeze(numbers, pairs=True)
    assert len(blob) < len(squeeze(numbers))
    assert unsqueeze(blob, len(numbers)) == numbers


@pytest.mark.parametrize("blob", [b"", b"\x00\x01\x00\x00", b"\x07\x00\x00\x00\x00", b"\x00\x02\x00\x00\x00a"])
def test_what_squeeze_did_not_write_is_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut short|unknown|holds"):
        unsqueeze(blob, 100)
