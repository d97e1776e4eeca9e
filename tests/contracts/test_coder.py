"""The promise of the slot artifact/coder, run on every file in it: any codes come back, equal, from the bytes and the
layout alone; other bytes are refused.

A technique offers `Spec`, `encode(group, spec) -> bytes` and `decode(blob, layout) -> codes`.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.artifact import Group, GroupLayout, PackSpec, TensorLayout
from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.quant import largest

FOLDER = "fairway.artifact.coder"
VARIANTS = {"brotli": [{"orders": ["columns"]}], "zstd": [{"level": 3, "orders": ["rows"]}], "lzma": [{"preset": 1}]}
CASES = [(kind, table) for kind in kinds(FOLDER) for table in ({}, *VARIANTS.get(kind, ()))]
every_technique = pytest.mark.parametrize(("kind", "table"), CASES, ids=lambda value: str(value))


def group(bits, shapes, seed, spread):
    """Codes of one part; spread: their standard deviation in units of the largest, 0: all equal."""
    chance, limit = np.random.default_rng(seed), largest(bits)
    codes = [np.clip(np.round(chance.normal(0, spread * limit, s)), -limit, limit).astype(np.int8) for s in shapes]
    layouts = [
        TensorLayout(f"t{i}", *s, None if i % 2 else i, chance.random(s[0]).astype(np.float16))
        for i, s in enumerate(shapes)
    ]
    return Group(GroupLayout("up", bits, tuple(layouts)), tuple(codes))


groups = st.builds(
    group,
    st.integers(2, 8),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(0, 2**16),
    st.sampled_from([0.0, 0.05, 0.4, 3.0]),
)


def check_round_trip(coder, spec, one):
    blob = coder.encode(one, spec)
    assert isinstance(blob, bytes)
    found = coder.decode(blob, one.layout)
    assert len(found) == len(one.codes)
    for a, b in zip(found, one.codes, strict=True):
        assert a.dtype == np.int8
        assert np.array_equal(a, b)
    assert coder.encode(one, spec) == blob, "the same codes give the same bytes"


@every_technique
@settings(max_examples=30, deadline=None)
@given(one=groups)
def test_any_codes_come_back(kind, table, one):
    coder = technique(FOLDER, kind)
    check_round_trip(coder, build(coder.Spec, table), one)


@every_technique
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_ends_of_every_grid_come_back(kind, table, bits):
    coder, one = technique(FOLDER, kind), group(bits, [(40, 33), (1, 1)], bits, 0.5)
    one.codes[0][0], one.codes[0][1] = largest(bits), -largest(bits)
    check_round_trip(coder, build(coder.Spec, table), one)


@every_technique
def test_a_blob_that_is_cut_short_or_too_long_or_empty_is_refused(kind, table):
    coder, one = technique(FOLDER, kind), group(5, [(20, 30)], 0, 0.4)
    blob = coder.encode(one, build(coder.Spec, table))
    for other in (blob[:-1], blob[: len(blob) // 2], blob + b"\0", b""):
        with pytest.raises(ValueError):  # noqa: PT011 - each coder says it in its own words, the container adds the place
            coder.decode(other, one.layout)


@every_technique
def test_gaussian_codes_cost_little_more_than_their_entropy(kind, table):
    """20,000 int5 codes, σ = 5: 4.37 bits each; packed bits alone would cost 5."""
    coder, one = technique(FOLDER, kind), group(5, [(100, 200)], 7, 1 / 3)
    assert 8 * len(coder.encode(one, build(coder.Spec, table))) / 20_000 <= 5.001


@every_technique
def test_its_spec_survives_a_recipe(kind, table):
    spec = build(PackSpec, {"coder": {"kind": kind, **table}})
    assert build(PackSpec, to_plain(spec)) == spec


def _plain_bytes(one, spec):
    return b"".join(codes.tobytes() for codes in one.codes)


def _by_columns(blob, layout):
    """Wrong by one transposition, which square or constant tensors would hide."""
    flat, start, found = np.frombuffer(blob, np.int8), 0, []
    for tensor in layout.tensors:
        size = tensor.rows * tensor.cols
        found.append(flat[start : start + size].reshape(tensor.cols, tensor.rows).T)
        start += size
    return tuple(found)


def _losing_the_lowest_code(blob, layout):
    right = [np.frombuffer(blob, np.int8).reshape(t.rows, t.cols) for t in layout.tensors]
    return tuple(np.maximum(codes, -14) for codes in right)


@pytest.mark.parametrize("decode", [_by_columns, _losing_the_lowest_code])
def test_a_broken_coder_is_found_out(decode):
    with pytest.raises(AssertionError):
        check_round_trip(SimpleNamespace(encode=_plain_bytes, decode=decode), None, group(5, [(4, 7)], 1, 3.0))
