"""Slices of tokens: which are the same, which come before."""

from hypothesis import given
from hypothesis import strategies as st

from fairway.audit.flow.tokens import MOST, START, Tok, merged, merged_spans, narrowed, related

CHUNKS, WINDOWS = 1, 2


def test_an_earlier_turn_of_the_loop_that_cuts_both_is_earlier() -> None:
    assert related(Tok("val", ((CHUNKS, 1, 1),)), Tok("val", ((CHUNKS, 2, 2), (WINDOWS, 1, 1)))) == "earlier"
    assert related(Tok("val", ((CHUNKS, 2, 2),)), Tok("val", ((CHUNKS, 1, 1),))) == "later"


def test_the_outermost_loop_that_keeps_them_apart_decides() -> None:
    learned, scored = Tok("val", ((CHUNKS, 1, 1), (WINDOWS, 2, 2))), Tok("val", ((CHUNKS, 2, 2), (WINDOWS, 1, 1)))
    assert related(learned, scored, (CHUNKS, WINDOWS)) == "earlier"


def test_what_no_loop_keeps_apart_is_the_same() -> None:
    assert related(Tok("val", ((CHUNKS, 1, 1),)), Tok("val", ((WINDOWS, 2, 2),))) == "same"
    assert related(Tok("val"), Tok("val", ((CHUNKS, 2, 2),))) == "same"


def test_a_beginning_of_what_one_turn_cut_is_of_that_turn() -> None:
    window = Tok("val", ((CHUNKS, 2, 2),))
    assert narrowed(window, [(CHUNKS, START, 1), (WINDOWS, START, 0)]).spans == ((CHUNKS, 2, 2), (WINDOWS, START, 0))
    assert narrowed(Tok("val"), [(CHUNKS, START, 1)]).spans == ((CHUNKS, START, 1),)  # of all tokens: those before


def test_other_data_and_the_other_side_of_a_cut_are_apart() -> None:
    head = Tok("val", cuts=frozenset([("head", "T - s", frozenset(["s"]))]))
    tail = Tok("val", cuts=frozenset([("tail", "n - s", frozenset(["s"]))]))
    assert related(Tok("train"), Tok("val")) == "apart"
    assert related(head, tail) == "apart"
    assert related(head, head) == "same"


spans = st.dictionaries(st.integers(1, 4), st.tuples(st.integers(1, 3), st.integers(1, 3)).map(sorted), max_size=4).map(
    lambda table: tuple(sorted((loop, low, high) for loop, (low, high) in table.items()))
)


@given(spans, spans)
def test_merged_spans_cover_both(
    one: tuple[tuple[int, int, int], ...], other: tuple[tuple[int, int, int], ...]
) -> None:
    both = {loop: (low, high) for loop, low, high in merged_spans(one, other)}
    assert set(both) == {loop for loop, _, _ in (*one, *other)}
    assert all(both[loop][0] <= low and both[loop][1] >= high for loop, low, high in (*one, *other))


@given(st.lists(spans, min_size=1, max_size=40), spans)
def test_a_merged_set_is_small_and_calls_nothing_apart_that_one_of_it_is_the_same_as(
    cuts: list[tuple[tuple[int, int, int], ...]], other: tuple[tuple[int, int, int], ...]
) -> None:
    kept = merged(Tok("val", each) for each in cuts)
    assert len(kept) <= MOST
    if any(related(Tok("val", each), Tok("val", other)) == "same" for each in cuts):
        assert any(related(tok, Tok("val", other)) == "same" for tok in kept)
