"""Windows that pay for tokens which another window pays for too: all of them, or the short ones at the end alone."""

import pytest

from fairway.audit.case import Case
from fairway.audit.flow.linear import difference
from fairway.audit.rules import twice_counted_tokens
from tests.audit.order import HEAD, MAIN, case_of

EVAL = "    final = eval_ttt(args, model, val)\n"


def judged(walk: str, strict: bool = False) -> str:
    text = HEAD + walk + MAIN.replace(EVAL, "    final = slide(args, model, val)\n")
    case = case_of(text)
    return twice_counted_tokens.check(Case(case.submission, strict)).verdict


LISTED = """
def slide(args, model, val):
    seq, stride, total = args.seq_len, args.stride, val.numel() - 1
    starts = [w for w in range(0, total, stride) if FILTER]
    nats, count = 0.0, 0
    for w in starts:
        end = min(w + seq, total)
        length = end - w
        nll = F.cross_entropy(model.forward_logits(val[w:end][None])[0], val[w + 1 : end + 1], reduction="none")
        first = FIRST
        nats += nll[first:length].sum().item()
        count += length - first
    return nats / count
"""

ROWS = """
from typing import NamedTuple
class Window(NamedTuple):
    begin: int
    first: int
    end: int
def windows(args, total):
    for begin in range(0, total, args.stride):
        row = Window(begin, begin, min(begin + args.seq_len, total))
        yield row if begin == 0 else row._replace(first=FIRST)
def slide(args, model, val):
    nats, count = 0.0, 0
    for row in windows(args, val.numel() - 1):
        logits = model.forward_logits(val[row.begin : row.end][None])[0]
        nll = F.cross_entropy(logits, val[row.begin + 1 : row.end + 1], reduction="none")
        nats += nll[row.first - row.begin :].sum().item()
        count += row.end - row.first
    return nats / count
"""

ENDS = """
def slide(args, model, val):
    total, nats, count = val.numel() - 1, 0.0, 0
    places = range(0, total, args.stride)
    for at in range(0, len(places), 32):
        for start in places[at : at + 32]:
            end = min(start + args.stride, total)
            begin = max(0, end - args.seq_len)
            logits, goal = model.forward_logits(val[begin:end][None])[0], val[begin + 1 : end + 1]
            nll = F.cross_entropy(logits, goal, reduction="none")
            nats += nll[FIRST : end - begin].sum().item()
            count += end - begin
    return nats / count
"""

BROKEN_OFF = """
def slide(args, model, val):
    seq, stride, total = args.seq_len, args.stride, val.numel() - 1
    nats, count = 0.0, 0
    for w in range(0, total, stride):
        end = min(w + seq, total)
        if FILTER:
            break
        nll = F.cross_entropy(model.forward_logits(val[w:end][None])[0], val[w + 1 : end + 1], reduction="none")
        first = FIRST
        nats += nll[first : end - w].sum().item()
        count += end - w - first
    return nats / count
"""
REMAINING = LISTED.replace("starts = [w for", "starts = [0, *(w for").replace(
    "stride) if FILTER]", "stride) if FILTER)][3:]"
)
REMAINING = REMAINING.replace("end = min(w + seq, total)", "left = min(seq, total - w)").replace("end - w", "left")
REMAINING = REMAINING.replace("val[w:end]", "val[w : w + left]").replace(
    "val[w + 1 : end + 1]", "val[w + 1 : w + left + 1]"
)
PUSHED = LISTED.replace("end = min(w + seq, total)", "begin = min(w, total - seq)").replace("end - w", "seq")
PUSHED = PUSHED.replace("val[w:end]", "val[begin : begin + seq]").replace(
    "w + 1 : end + 1", "begin + 1 : begin + seq + 1"
)

LAST = "0 if w == 0 else max(length - stride, 0)"
SHORT_TAILS = {
    "the early form": (
        LISTED,
        "min(w + seq, total) - w >= stride or w == 0",
        "0 if w == 0 else max(length - stride, 0)",
    ),
    "no filter": (LISTED, "True", LAST),
    "rows": (ROWS, "", "max(begin, row.end - args.stride)"),
    "a length held against the stride": (BROKEN_OFF, "end - w < stride", "0 if w == 0 else max(end - w - stride, 0)"),
    "as long as what is left": (REMAINING, "min(seq, total - w) >= stride", LAST),
    "pushed back into the data": (PUSHED, "min(w + seq, total) - w >= stride", "0 if w == 0 else seq - stride"),
}
EVERY_TOKEN_ONCE = {
    "from the window's place": (LISTED, "w == 0 or w + seq - stride < total", "0 if w == 0 else seq - stride"),
    "whole windows alone": (LISTED, "w + seq <= total", LAST),
    "broken off at the end": (BROKEN_OFF, "w + seq > total", "0 if w == 0 else max(end - w - stride, 0)"),
    "pushed back, from its own place": (PUSHED, "True", "0 if w == 0 else w - begin + seq - stride"),
    "up to the end": (ENDS, "", "start - begin"),
}
TWO_STRIDES = {
    "two strides": (LISTED, "w == 0 or w + seq - stride < total", "0 if w == 0 else seq - 2 * stride"),
    "two strides before the end": (ENDS, "", "max(start - begin - args.stride, 0)"),
}


def put(form: tuple[str, str, str]) -> str:
    text, keep, first = form
    return text.replace("FILTER", keep).replace("FIRST", first)


@pytest.mark.parametrize("name", SHORT_TAILS)
def test_short_windows_at_the_end_are_accepted_and_strictly_a_violation(name: str) -> None:
    assert judged(put(SHORT_TAILS[name])) == "clean"
    assert judged(put(SHORT_TAILS[name]), strict=True) == "violates"


@pytest.mark.parametrize("name", EVERY_TOKEN_ONCE)
def test_windows_that_pay_for_every_token_once_are_clean_however_strict(name: str) -> None:
    assert judged(put(EVERY_TOKEN_ONCE[name]), strict=True) == "clean"


@pytest.mark.parametrize("name", TWO_STRIDES)
def test_windows_that_pay_for_two_strides_count_tokens_twice(name: str) -> None:
    assert judged(put(TWO_STRIDES[name])) == "violates"


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("add(w,2048)", "w", 2048),
        ("sub(add(s,64),sub(add(s,64),1024))", "0", 1024),
        ("add(s,64)", "sub(add(s,64),1024)", 1024),
        ("~sub(sub(s,a),64)", "sub(s,a)", -64),
        ("mult(2,w)", "w", None),
        ("mult(add(k,1),256)", "mult(k,256)", 256),
        ("or(,sub(n,64))", "n", -64),
        ("min(a", "a", None),
        ("a.b[f(x,y)]", "a.b[f(x,y)]", 0),
        ("", "", None),
    ],
)
def test_places_are_apart_by_a_number_where_their_texts_say_so(one: str, other: str, apart: int | None) -> None:
    assert difference(one, other) == apart
