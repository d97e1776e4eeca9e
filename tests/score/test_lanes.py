"""Lanes, rounds and slices of a stream against brute force, and the tape that shows each lane no more than is paid."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fairway.base.errors import DataError, HonestyError, RecipeError
from fairway.base.ranks import Ranks
from fairway.score.stream import Stream, Windows
from fairway.score.tape import BlankTape, Tape
from fairway.score.windows import plain, rolling, sliding

BOS = 900  # no target is it


@st.composite
def shapes(draw, chunked=None, kinds=("plain", "sliding", "rolling")):
    """Arguments of a Stream: a text in lanes, often with fewer targets than lanes or contexts; a slice half the time
    where `whole` is over `targets`."""
    lanes, context = draw(st.integers(1, 7)), draw(st.integers(1, 20))
    whole = draw(st.integers(1, 200))
    kind = draw(st.sampled_from(kinds))
    windows = {"plain": plain.Spec(), "rolling": rolling.Spec()}.get(kind)
    windows = windows or sliding.Spec(draw(st.integers(1, context)))
    with_chunks = draw(st.booleans()) if chunked is None else chunked
    chunk = lanes * draw(st.integers(1, 30)) if with_chunks else 0
    block = draw(st.integers(1, 5))
    return {"context": context, "windows": windows, "chunk": chunk, "block": block, "lanes": lanes}, whole


def sizes_of(targets: int, lanes: int) -> list[int]:
    """Equal parts, the remainder to the first; one part where there are more lanes than targets."""
    return [len(part) for part in np.array_split(np.arange(targets), lanes)]


def lanes_of(given, whole: int) -> int:
    return given["lanes"] if given["lanes"] <= whole else 1


def rows(windows: Windows) -> list[tuple[int, int, int]]:
    return list(zip(windows.start.tolist(), windows.stop.tolist(), windows.first.tolist(), strict=True))


def begins_of(sizes: list[int]) -> list[int]:
    return [sum(sizes[:lane]) for lane in range(len(sizes) + 1)]


@given(shapes())
def test_every_target_is_scored_once_whatever_the_lanes(shape):
    given_, whole = shape
    stream = Stream(whole, **given_)
    scored = np.concatenate([unit.windows.positions for unit in stream])
    assert sorted(scored.tolist()) == list(range(whole))
    assert sorted(stream.order.tolist()) == list(range(whole))
    assert [unit.done for unit in stream] == np.cumsum([unit.windows.scored for unit in stream]).tolist()


@given(shapes())
def test_lanes_are_equal_parts_with_the_remainder_first_and_no_window_crosses_one(shape):
    given_, whole = shape
    stream = Stream(whole, **given_)
    sizes = sizes_of(whole, lanes_of(given_, whole))
    assert stream.lanes == len(sizes)
    assert np.diff(stream.edges).tolist() == sizes
    begins = begins_of(sizes)
    for (start, stop, _), lane in zip(rows(stream.windows), stream.windows.lane.tolist(), strict=True):
        assert begins[lane] <= start < stop <= begins[lane + 1]


@given(shapes(kinds=("plain", "sliding")))
def test_a_lane_has_the_windows_of_a_text_of_its_own(shape):
    given_, whole = shape
    stream = Stream(whole, **given_)
    sizes = sizes_of(whole, stream.lanes)
    for lane, begin in enumerate(begins_of(sizes)[:-1]):
        mine = stream.windows[stream.windows.lane == lane]
        alone = Stream(sizes[lane], given_["context"], given_["windows"])
        assert [(a - begin, b - begin, c - begin) for a, b, c in rows(mine)] == rows(alone.windows)
        assert mine.turn.tolist() == list(range(len(mine))), "its windows are of one round after the other"


@given(shapes(kinds=("rolling",)), st.integers(1, 200))
def test_a_carried_lane_is_read_in_steps_of_a_context_and_no_round_has_two_shapes(shape, targets):
    """Longer lanes end with one target more, in a round of their own: lanes of one round share one past."""
    given_, whole = shape
    targets = min(targets, whole)
    stream = Stream(targets, **given_, whole=whole)
    kept = np.diff(stream.edges).tolist()
    for lane, begin in enumerate(stream.edges[:-1].tolist()):
        context, shortest, own = given_["context"], min(kept), kept[lane]
        expected = [(a, min(a + context, shortest)) for a in range(0, shortest, context)]
        if own > shortest:
            whole_steps = [(a, min(a + context, own)) for a in range(0, own, context)]
            assert own == shortest + 1
            expected = [*expected, (shortest, own)]
            assert [a for a, _ in whole_steps] == [a for a, _ in expected if a % context == 0]
        mine = rows(stream.windows[stream.windows.lane == lane])
        assert mine == [(begin + a, begin + b, begin + a) for a, b in expected]
    for turn in np.unique(stream.windows.turn).tolist():
        together = stream.windows[stream.windows.turn == turn]
        assert len({(stop - start, stop - first) for start, stop, first in rows(together)}) == 1
        assert together.lane.tolist() == list(range(len(together))), "lanes that have ended are the last ones"


def brute_order(stream: Stream) -> list[int]:
    """Round by round (where lanes end differently: the longer windows first), step by step, lane by lane."""
    order = []
    for unit in stream:
        found = list(zip(rows(unit.windows), unit.windows.lane.tolist(), unit.windows.turn.tolist(), strict=True))
        for turn in sorted({turn for _, _, turn in found}):
            now = [(row, lane) for row, lane, its in found if its == turn]
            for shape in sorted({(b - a, b - c) for (a, b, c), _ in now}, reverse=True):
                firsts = [c for (a, b, c), _ in sorted(now, key=lambda entry: entry[1]) if (b - a, b - c) == shape]
                order += [first + step for step in range(shape[1]) for first in firsts]
    return order


@given(shapes())
def test_the_order_is_round_by_round_step_by_step_lane_by_lane(shape):
    given_, whole = shape
    stream = Stream(whole, **given_)
    assert stream.order.tolist() == brute_order(stream)


def test_the_order_of_two_lanes_written_out():
    """7 targets in lanes [0, 4) and [4, 7), windows of 2: rounds {0 1, 4 5} and {2 3, 6}."""
    assert Stream(7, 2, plain.Spec(), lanes=2).order.tolist() == [0, 4, 1, 5, 2, 3, 6]
    assert Stream(7, 2, rolling.Spec(), lanes=2).order.tolist() == [0, 4, 1, 5, 2, 6, 3]
    assert Stream(8, 2, plain.Spec(), lanes=2).order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert Stream(7, 2, plain.Spec(), lanes=1).order.tolist() == [*range(7)]


@given(shapes())
def test_a_decoder_knows_of_each_lane_all_that_it_reads(shape):
    """When a window's step is coded, all that lies before it in its lane is coded already."""
    given_, whole = shape
    stream = Stream(whole, **given_)
    turn = {place: at for at, place in enumerate(stream.order.tolist())}
    for (start, stop, first), lane in zip(rows(stream.windows), stream.windows.lane.tolist(), strict=True):
        before = range(int(stream.edges[lane]), first)
        assert start >= int(stream.edges[lane])
        assert all(turn[place] < turn[first] for place in before)
        assert [turn[a] < turn[a + 1] for a in range(first, stop - 1)] == [True] * (stop - 1 - first)


@given(shapes(chunked=True))
def test_chunks_are_shared_by_the_lanes_and_learning_covers_what_is_paid_of_them_once(shape):
    given_, whole = shape
    stream = Stream(whole, **given_)
    share = given_["chunk"] // stream.lanes
    longest = sizes_of(whole, stream.lanes)[0]
    assert len(stream) == stream.chunks == -(-longest // share)
    paid: set[int] = set()
    learned: list[int] = []
    for unit in stream:
        local = unit.windows.first - stream.edges[unit.windows.lane]
        assert (local // share == unit.index).all()
        paid.update(unit.windows.positions.tolist())
        known = [max((p + 1 for p in paid if a <= p < b), default=a) for a, b in lane_spans(stream)]
        assert unit.stop.tolist() == known
        if unit.index == len(stream) - 1:
            assert unit.update is None
            continue
        assert unit.update is not None
        expected = [
            place
            for low, high in lane_spans(stream)
            for place in range(low + unit.index * share, min(low + (unit.index + 1) * share, high))
        ]
        assert unit.update.positions.tolist() == expected
        assert set(expected) <= paid, "a target was learned from before it was paid"
        assert int((unit.update.stop - unit.update.start).max()) <= given_["context"]
        learned += expected
    assert len(learned) == len(set(learned))


def lane_spans(stream: Stream) -> list[tuple[int, int]]:
    return list(zip(stream.edges[:-1].tolist(), stream.edges[1:].tolist(), strict=True))


@given(shapes(), st.integers(1, 200))
def test_a_slice_takes_the_first_targets_of_every_lane(shape, targets):
    given_, whole = shape
    targets = min(targets, whole)
    stream = Stream(targets, **given_, whole=whole)
    full = begins_of(sizes_of(whole, stream.lanes))
    kept = sizes_of(targets, stream.lanes)
    expected = [full[lane] + place for lane in range(stream.lanes) for place in range(kept[lane])]
    assert stream.taken.tolist() == expected
    assert len(stream.taken) == targets == sum(unit.windows.scored for unit in stream)
    assert stream.order.tolist() == brute_order(stream)


@example(({"context": 3, "windows": rolling.Spec(), "chunk": 14, "block": 1, "lanes": 2}, 30), 29)
@given(shapes(), st.integers(1, 200))
def test_a_slice_has_the_windows_chunks_and_schedule_of_the_whole_cut_off(shape, targets):
    given_, whole = shape
    targets = min(targets, whole)
    part, full = Stream(targets, **given_, whole=whole), Stream(whole, **given_)
    assert part.lanes == full.lanes
    taken = part.taken
    if given_["chunk"]:
        assert part.chunks == full.chunks == len(full), "the schedule is the whole text's"
    there = {}  # target of the whole -> (start, first) of the window that scores it
    units = {}
    for unit in full:
        for start, stop, first in rows(unit.windows):
            for place in range(first, stop):
                there[place], units[place] = (start, first), unit.index
    wholes = list(full)
    # A carried window longer than its lane's share of a chunk is paid where it begins; cut off, it ends a unit later.
    longest = int((full.windows.stop - full.windows.first).max())
    straddling = part.carried and given_["chunk"] // part.lanes < longest
    # Where a slice leaves one lane a target more than the others, carried windows pay it in a round of its own.
    ends = np.cumsum(sizes_of(targets, part.lanes)).tolist() if part.carried else []
    for unit in part:
        for start, stop, first in rows(unit.windows):
            assert there[taken[first]][0] <= taken[start]
            for place in range(first, stop):
                free = given_["chunk"] == 0 or straddling or place + 1 in ends
                assert free or units[taken[place]] == unit.index
                if not part.carried:
                    assert there[taken[place]] == (taken[start], taken[first])
        if unit.update is not None:
            other = wholes[unit.index].update
            assert [(taken[a], taken[b - 1]) for a, b, _ in rows(unit.update)] == [
                (a, b - 1) for a, b, _ in rows(other)
            ]
    if given_["chunk"]:
        assert sum(unit.update is not None for unit in part) == len(part) - 1


@pytest.mark.parametrize("windows", [plain.Spec(), sliding.Spec(3), rolling.Spec()])
@pytest.mark.parametrize("whole", range(1, 12))
def test_texts_of_a_few_tokens_in_many_lanes(whole, windows):
    """Fewer targets than lanes: one lane. A slice may leave whole lanes empty."""
    stream = Stream(whole, 4, windows, lanes=5)
    assert stream.lanes == (5 if whole >= 5 else 1)
    for targets in range(1, whole + 1):
        part = Stream(targets, 4, windows, lanes=5, whole=whole)
        assert part.lanes == stream.lanes
        assert sorted(part.order.tolist()) == list(range(targets))


@given(shapes(kinds=("rolling",)), st.integers(1, 9))
def test_ranks_share_carried_windows_by_whole_lanes(shape, world):
    given_, whole = shape
    stream = Stream(whole, **given_)
    owners: dict[int, int] = {}
    for unit in stream:
        parts = [unit.share(Ranks(rank, world), stream.lanes) for rank in range(world)]
        assert sorted(np.concatenate([p.windows.positions for p in parts]).tolist()) == sorted(
            unit.windows.positions.tolist()
        )
        for rank, part in enumerate(parts):
            assert all(owners.setdefault(lane, rank) == rank for lane in part.windows.lane.tolist())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lanes": 0}, "lanes = 0"),
        ({"lanes": 3, "chunk": 64}, "chunk = 64 is no multiple of lanes = 3"),
        ({"whole": 99}, "100 targets in a text of 99"),
    ],
)
def test_impossible_lanes_and_slices_are_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        Stream(100, 16, plain.Spec(), **options)
    with pytest.raises(DataError, match="nothing to predict"):
        Stream(0, 16, plain.Spec(), lanes=3)


# The tape.


def taped(targets: int = 11, lanes: int = 3) -> tuple[Tape, Stream, np.ndarray]:
    """Target i is 100 + i; lanes [0, 4), [4, 8), [8, 11)."""
    stream = Stream(targets, 4, plain.Spec(), lanes=lanes)
    tokens = np.concatenate([[BOS], 100 + np.arange(targets)]).astype(np.uint16)
    return Tape(tokens, "cpu", stream.edges), stream, tokens


def test_every_lane_begins_with_bos_and_goes_on_with_its_own_tokens():
    tape, stream, _ = taped()
    tape.open_to(stream.edges[1:])
    windows = stream.windows[stream.windows.turn == 0]
    longer = windows[:2]
    assert tape.inputs(longer).tolist() == [[BOS, 100, 101, 102], [BOS, 104, 105, 106]]
    assert tape.targets(longer).tolist() == [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert tape.inputs(windows[2:]).tolist() == [[BOS, 108, 109]]
    middle = Windows(*(np.array([v]) for v in (5, 7, 5)), np.array([1]), np.array([0]))
    assert tape.inputs(middle).tolist() == [[104, 105]], "in the middle of a lane there is no BOS"


def test_of_each_lane_the_inputs_up_to_what_is_paid_can_be_read_and_no_more():
    for known in np.ndindex(5, 5, 4):
        tape, stream, _ = taped()
        tape.open_to(stream.edges[:-1] + np.array(known))
        for lane, (low, high) in enumerate(lane_spans(stream)):
            for place in range(low, high):
                one = Windows(*(np.array([v]) for v in (place, place + 1, place)), np.array([lane]), np.array([0]))
                readable = place <= low + known[lane]
                if readable:
                    assert tape.inputs(one).item() == (BOS if place == low else 99 + place)
                else:
                    with pytest.raises(HonestyError, match=f"input {place} was read before it was paid"):
                        tape.inputs(one)
                if place < low + known[lane]:
                    assert tape.targets(one).item() == 100 + place
                else:
                    with pytest.raises(HonestyError, match=f"target {place} was read before it was paid"):
                        tape.targets(one)


def test_one_row_that_is_not_paid_refuses_all_of_a_block():
    tape, stream, _ = taped()
    both = stream.windows[:2]
    tape.open_to(np.array([4, 5, 8]))
    with pytest.raises(HonestyError, match="input 7 was read"):
        tape.inputs(both)
    assert tape.inputs(both, 0, 2).tolist() == [[BOS, 100], [BOS, 104]]


def test_plain_reading_of_the_text_is_held_to_the_lanes_too():
    tape, _, tokens = taped()
    tape.open_to(np.array([4, 6, 8]))
    assert tape.read(np.array([0, 3]), 4).tolist() == [tokens[0:4].tolist(), tokens[3:7].tolist()]
    with pytest.raises(HonestyError, match="token 7 was read before it was paid"):
        tape.read(np.array([0, 4]), 4)
    with pytest.raises(HonestyError, match="token 9 was read before it was paid"):
        tape.read(np.array([9]), 1)


def test_what_is_known_is_never_rolled_back():
    tape, _, _ = taped()
    tape.open_to(np.array([3, 6, 8]))
    tape.open_to(np.array([1, 7, 8]))
    assert tape.known.tolist() == [3, 7, 8]


@pytest.mark.parametrize("windows", [plain.Spec(), sliding.Spec(2), rolling.Spec()])
@pytest.mark.parametrize("lanes", [1, 3])
def test_a_blank_tape_is_written_in_the_order_of_coding_alone(lanes, windows):
    stream = Stream(11, 4, windows, lanes=lanes)
    tape, written = BlankTape(BOS, stream.edges), []
    with pytest.raises(HonestyError, match="11 targets are not known yet"):
        _ = tape.tokens
    for unit in stream:
        for together in unit.windows.rounds():
            scored = int(together.stop[0] - together.first[0])
            for step in range(scored):
                for wrong in {step - 1, step + 1} - {-1}:
                    with pytest.raises(HonestyError, match="written out of order"):
                        tape.write(together, wrong, 100 + together.first + step)
                tape.write(together, step, 100 + together.first + step)
                written += (together.first + step).tolist()
    assert written == stream.order.tolist()
    assert tape.tokens.tolist() == list(range(100, 111))
    with pytest.raises(HonestyError, match="written out of order"):
        tape.write(stream.windows[:1], 0, np.array([7]))


def test_what_a_chunk_looks_back_on_is_laid_on_a_blank_tape():
    """Targets 1..2 of the first lane and 5..5 of the second: they can be read, what is before and after cannot."""
    _, stream, _ = taped()
    tape = BlankTape(BOS, stream.edges)
    tape.given([(1, 3), (5, 6)], np.array([101, 102, 105]))
    assert tape.known.tolist() == [3, 6, 8]
    back = Windows(*(np.array(v) for v in ([2, 6], [4, 7], [3, 6])), np.array([0, 1]), np.array([0, 0]))
    assert tape.inputs(back[:1]).tolist() == [[101, 102]]
    assert tape.inputs(back[1:]).tolist() == [[105]]
    with pytest.raises(HonestyError, match="was read before it was paid"):
        tape.targets(back[:1])
