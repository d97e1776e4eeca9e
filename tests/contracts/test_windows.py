"""The promise of the slot score/windows, run on every file in it: each target is scored exactly once, in order.

A technique offers `Spec`, `windows(targets, context, spec) -> Windows`, and `CARRIED`: whether a window sees what those
before it left. Carried windows read nothing twice; the others read all that they see.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.base.errors import RecipeError
from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.score import ScoreSpec, Stream

FOLDER = "fairway.score.windows"
every_technique = pytest.mark.parametrize("kind", kinds(FOLDER))


@every_technique
@given(targets=st.integers(1, 2000), context=st.integers(64, 300))
def test_each_target_is_scored_once_in_order_by_a_window_within_the_context(kind, targets, context):
    windows = Stream(targets, context, technique(FOLDER, kind).Spec()).windows
    assert windows.positions.tolist() == list(range(targets))
    assert int((windows.stop - windows.start).max()) <= context
    assert ((windows.start >= 0) & (windows.start <= windows.first) & (windows.first < windows.stop)).all()


@every_technique
@given(targets=st.integers(1, 500), context=st.integers(64, 90), lanes=st.integers(1, 9))
def test_lanes_are_read_side_by_side_each_within_itself(kind, targets, context, lanes):
    stream = Stream(targets, context, technique(FOLDER, kind).Spec(), lanes=lanes)
    assert sorted(stream.order.tolist()) == list(range(targets))
    windows = stream.windows
    assert (windows.start >= stream.edges[windows.lane]).all()
    assert (windows.stop <= stream.edges[windows.lane + 1]).all()


@every_technique
@given(targets=st.integers(1, 500), context=st.integers(64, 90), cut=st.integers(1, 500), lanes=st.integers(1, 9))
def test_a_slice_is_scored_by_the_windows_of_the_whole(kind, targets, context, cut, lanes):
    """What is left of them: a proven slice is what was scored."""
    spec = technique(FOLDER, kind).Spec()
    part = Stream(min(cut, targets), context, spec, lanes=lanes, whole=targets)
    whole = Stream(targets, context, spec, lanes=lanes)
    assert sorted(part.order.tolist()) == list(range(part.targets))
    if not part.carried:
        first_of = dict(zip(whole.windows.first.tolist(), whole.windows.start.tolist(), strict=True))
        for start, first in zip(part.windows.start.tolist(), part.windows.first.tolist(), strict=True):
            assert first_of[int(part.taken[first])] == int(part.taken[start])


@every_technique
@given(targets=st.integers(1, 500), context=st.integers(64, 90))
def test_carried_windows_read_every_token_once(kind, targets, context):
    module = technique(FOLDER, kind)
    windows = Stream(targets, context, module.Spec()).windows
    read = int((windows.stop - windows.start).sum())
    assert isinstance(module.CARRIED, bool)
    assert read >= targets
    if module.CARRIED:
        assert read == targets
        assert (windows.start == windows.first).all()


@every_technique
def test_its_spec_survives_a_recipe(kind):
    spec = ScoreSpec(windows=technique(FOLDER, kind).Spec())
    assert build(ScoreSpec, to_plain(spec)) == spec


@every_technique
def test_it_refuses_no_context_in_one_line(kind):
    with pytest.raises(RecipeError, match="context = 0"):
        Stream(10, 0, technique(FOLDER, kind).Spec())
