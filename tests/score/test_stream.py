"""The order of everything, against brute force and the reference's own numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.base.errors import DataError, RecipeError
from fairway.base.ranks import Ranks
from fairway.score.stream import Stream, optimizer_steps
from fairway.score.windows import plain, sliding

lengths = st.integers(1, 300)
contexts = st.integers(1, 40)


def brute_sliding(targets: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, stop, first) one after the other, as TECHNIQUES words it."""
    found = [(0, min(context, targets), 0)]
    start = stride
    while start + context - stride < targets:
        found.append((start, min(start + context, targets), start + context - stride))
        start += stride
    return found


def rows(windows):
    return list(zip(windows.start.tolist(), windows.stop.tolist(), windows.first.tolist(), strict=True))


@given(lengths, contexts)
def test_plain_windows_cut_the_text_without_overlap(targets, context):
    stream = Stream(targets, context, plain.Spec())
    expected = [(w, min(w + context, targets), w) for w in range(0, targets, context)]
    assert rows(stream.windows) == expected


@given(lengths, contexts, st.integers(1, 40))
def test_sliding_windows_are_those_of_brute_force(targets, context, stride):
    stride = min(stride, context)
    stream = Stream(targets, context, sliding.Spec(stride))
    assert rows(stream.windows) == brute_sliding(targets, context, stride)


@given(lengths, contexts, st.integers(1, 40), st.integers(0, 90), st.integers(1, 9))
def test_each_target_is_scored_exactly_once_in_order(targets, context, stride, chunk, block):
    stream = Stream(targets, context, sliding.Spec(min(stride, context)), chunk, block)
    scored = np.concatenate([unit.windows.positions for unit in stream])
    assert scored.tolist() == list(range(targets))
    assert [unit.index for unit in stream] == list(range(len(stream)))


@given(lengths, contexts, st.integers(1, 40))
def test_a_sliding_target_has_at_least_T_minus_S_tokens_of_context(targets, context, stride):
    stride = min(stride, context)
    for start, stop, first in rows(Stream(targets, context, sliding.Spec(stride)).windows):
        assert stop - start <= context
        assert first == 0 or first - start == context - stride


@settings(max_examples=200)
@given(lengths, contexts, st.integers(1, 40), st.integers(1, 90))
def test_learning_covers_each_chunk_but_the_last_once_and_only_what_is_paid(targets, context, stride, chunk):
    stream = Stream(targets, context, sliding.Spec(min(stride, context)), chunk)
    chunks = -(-targets // chunk)
    assert len(stream) == chunks
    paid: set[int] = set()
    trained: list[int] = []
    for unit in stream:
        for start, _, first in rows(unit.windows):
            assert first // chunk == unit.index
            assert start <= first
        paid.update(unit.windows.positions.tolist())
        assert unit.done == len(paid) == int(unit.stop[0])
        if unit.index == chunks - 1:
            assert unit.update is None
        else:
            assert unit.update is not None
            assert int((unit.update.stop - unit.update.start).max()) <= context
            learned = unit.update.positions.tolist()
            assert set(learned) <= paid, "a target was learned from before it was paid"
            trained += learned
    assert trained == list(range((chunks - 1) * chunk))


@given(lengths, contexts, st.integers(1, 40), st.integers(0, 90), st.integers(1, 5))
def test_ranks_split_the_windows_of_a_unit_and_nothing_is_lost(targets, context, stride, chunk, world):
    stream = Stream(targets, context, sliding.Spec(min(stride, context)), chunk)
    for unit in stream:
        parts = [unit.share(Ranks(rank, world)) for rank in range(world)]
        together = np.concatenate([part.windows.positions for part in parts])
        assert together.tolist() == unit.windows.positions.tolist()
        assert all(part.update is unit.update and part.done == unit.done for part in parts)


def test_the_reference_run_has_the_windows_chunks_and_steps_of_its_sheet():
    """TECHNIQUES 6.1: 969,088 windows of which 31 score the tail again, 474 chunks, 1,419 optimiser steps."""
    stream = Stream(62_021_632, 2048, sliding.Spec(64), 131_072)
    assert len(stream.windows) == 969_088 - 31
    assert len(stream) == 474
    units = iter(stream)
    assert len(next(units).windows) == 2_017
    rest = list(units)
    assert {len(unit.windows) for unit in rest[:-1]} == {2_048}
    assert len(rest[-1].windows) == 384
    assert rest[-1].windows.scored == 24_576
    assert optimizer_steps(stream, epochs=3, batch=64) == 1_419
    assert {len(unit.update) for unit in rest[:-1]} == {64}


def test_windows_of_one_shape_run_together():
    shapes = [
        ({(int(b - a), int(b - f)) for a, b, f in rows(run)}, len(run))
        for run in Stream(100, 16, sliding.Spec(4)).windows.runs()
    ]
    assert shapes == [({(16, 16)}, 1), ({(16, 4)}, 21)]
    assert [len(run) for run in Stream(103, 16, sliding.Spec(4)).windows.runs()] == [1, 21, 1]


@pytest.mark.parametrize(
    ("stride", "context", "chunk", "words"),
    [(65, 64, 0, "stride = 65"), (8, 0, 0, "context = 0"), (8, 64, -1, "chunk = -1")],
)
def test_an_impossible_shape_is_refused(stride, context, chunk, words):
    with pytest.raises(RecipeError, match=words):
        Stream(100, context, sliding.Spec(stride), chunk)


def test_a_text_without_a_target_is_refused():
    with pytest.raises(DataError, match="nothing to predict"):
        Stream(0, 16, plain.Spec())
