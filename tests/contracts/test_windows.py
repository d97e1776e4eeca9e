"""The promise of the slot score/windows, run on every file in it: each target is scored exactly once, in order.

A technique offers `Spec` and `windows(targets, context, spec) -> Windows`.
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
def test_its_spec_survives_a_recipe(kind):
    spec = ScoreSpec(windows=technique(FOLDER, kind).Spec())
    assert build(ScoreSpec, to_plain(spec)) == spec


@every_technique
def test_it_refuses_no_context_in_one_line(kind):
    with pytest.raises(RecipeError, match="context = 0"):
        Stream(10, 0, technique(FOLDER, kind).Spec())
