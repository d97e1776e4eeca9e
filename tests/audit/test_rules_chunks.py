"""Chunks one off: a lesson that reaches into the chunk that comes next, and lessons that only seem to."""

import pytest

from fairway.audit.passes.reaching import reaching
from tests.audit.order import HEAD, HONEST, MAIN, broken, case_of, doubted, findings, line_of

LESSON = "for s in range(start, end, args.seq_len):"
ENDS = "start, end = ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)"


def lesson(ends: str) -> str:
    """The honest script, whose lessons go through another piece of the text than was scored."""
    assert LESSON in HONEST
    return HONEST.replace(LESSON, f"a, b = {ends}\n                for s in range(a, b, args.seq_len):")


@pytest.mark.parametrize(
    "ends",
    [
        "start, min((ci + 2) * args.chunk, val.numel() - 1)",
        "(ci + 1) * args.chunk, min((ci + 2) * args.chunk, val.numel() - 1)",
    ],
)
def test_a_lesson_that_reaches_into_the_next_chunk_comes_before_its_scoring(ends: str) -> None:
    assert "training-before-scoring" in broken(lesson(ends))


@pytest.mark.parametrize(
    "ends",
    [
        "start, end",
        "max(ci - 1, 0) * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)",
        "0, end",
    ],
)
def test_a_lesson_of_what_was_scored_is_clean(ends: str) -> None:
    assert doubted(lesson(ends)) == set()


ROWS = """
            n = (UNTIL - start) // args.seq_len
            for at in range(0, n, 8):
                a = start + at * args.seq_len
                b = start + min(at + 8, n) * args.seq_len + 1
                if b > val.numel():
                    continue
                local = val[a:b]
                opt.zero_grad()
                model(local[:-1].view(-1, args.seq_len), local[1:].view(-1, args.seq_len)).backward()
                opt.step()
"""


def by_rows(until: str) -> str:
    """Rows counted from the length of a chunk, as many scripts go through it."""
    at = HONEST.index("            for _epoch")
    tail = HONEST.index("    return (total / count).item()\n", at)
    return HONEST[:at] + ROWS.replace("UNTIL", until) + HONEST[tail:]


def test_rows_counted_over_two_chunks_reach_into_the_next_one() -> None:
    assert doubted(by_rows("end")) == set()
    assert "training-before-scoring" in broken(by_rows("min((ci + 2) * args.chunk, val.numel() - 1)"))


BLOCKS = """
def blocks(args, n):
    out = [(0, 1, min(args.seq_len + 1, n))]
    while out[-1][2] < n:
        lo = out[-1][2]
        hi = min(lo + args.stride, n)
        out.append((hi - args.seq_len - 1, lo, hi))
    chunks = {}
    for w in out:
        chunks.setdefault((w[1] - 1) // args.chunk, []).append(w)
    return [chunks[k] for k in sorted(chunks)]
def eval_blocks(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = 0.0, 0
    chunks = blocks(args, val.numel())
    for c, ws in enumerate(chunks):
        for at, lo, hi in ws:
            with torch.no_grad():
                logits = model.forward_logits(val[at : hi - 1][None])[0]
                nll = F.cross_entropy(logits[lo - at - 1 :], val[lo:hi], reduction="none")
            total += nll.double().sum().item()
            count += hi - lo
        lo, hi = ENDS
        opt.zero_grad()
        model(val[lo - 1 : hi - 1][None], val[lo:hi][None]).backward()
        opt.step()
    return total / count
"""


def by_blocks(ends: str) -> str:
    return HEAD + BLOCKS.replace("ENDS", ends) + MAIN.replace("eval_ttt(args", "eval_blocks(args")


def test_the_end_of_the_next_list_of_windows_is_ahead() -> None:
    ahead = by_blocks("ws[0][1], chunks[min(c + 1, len(chunks) - 1)][-1][2]")
    assert "training-before-scoring" in broken(ahead)
    assert doubted(by_blocks("ws[0][1], ws[-1][2]")) == set()
    assert doubted(by_blocks("chunks[max(c - 1, 0)][0][1], ws[-1][2]")) == set()


STARTS = """
def eval_starts(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = 0.0, 0
    starts = list(range(0, val.numel() - 1, args.chunk)) + [val.numel() - 1]
    for c in range(len(starts) - 1):
        x, y = val[starts[c] : starts[c + 1]][None], val[starts[c] + 1 : starts[c + 1] + 1][None]
        total += model(x, y).detach().item() * y.numel()
        count += y.numel()
        opt.zero_grad()
        model(x, y).backward()
        opt.step()
    return total / count
"""


def test_an_end_where_the_next_chunk_starts_holds_nothing_of_it() -> None:
    assert doubted(HEAD + STARTS + MAIN.replace("eval_ttt(args", "eval_starts(args")) == set()


WINDOWS = """
def eval_windows(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count, S = 0.0, 0, args.stride
    for w in range((val.numel() - 1) // S - 1):
        x, y = val[w * S : (w + 2) * S][None], val[w * S + 1 : (w + 2) * S + 1][None]
        with torch.no_grad():
            nll = F.cross_entropy(model.forward_logits(x)[0], y[0], reduction="none")
        total += nll[S if w else 0 :].sum().item()
        count += S if w else 2 * S
        opt.zero_grad()
        model(x, y).backward()
        opt.step()
    return total / count
"""


def test_overlapping_windows_are_told_apart_by_where_they_begin() -> None:
    assert doubted(HEAD + WINDOWS + MAIN.replace("eval_ttt(args", "eval_windows(args")) == set()


def test_a_chunk_learned_in_the_turn_that_scores_the_next_one_was_scored_before() -> None:
    turned = HONEST.replace(ENDS, "start, end = ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)")
    assert findings(turned)["training-before-scoring"].verdict == "clean"
    ahead = """
def eval_ahead(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count, K = 0.0, 0, args.chunk
    x, y = val[:K][None], val[1 : K + 1][None]
    total += model(x, y).detach().item() * y.numel()
    count += y.numel()
    for c in range(val.numel() // K - 1):
        x, y = val[c * K : (c + 1) * K][None], val[c * K + 1 : (c + 1) * K + 1][None]
        opt.zero_grad()
        model(x, y).backward()
        opt.step()
        x, y = val[(c + 1) * K : (c + 2) * K][None], val[(c + 1) * K + 1 : (c + 2) * K + 1][None]
        total += model(x, y).detach().item() * y.numel()
        count += y.numel()
    return total / count
"""
    assert doubted(HEAD + ahead + MAIN.replace("eval_ttt(args", "eval_ahead(args")) == set()


TABLE = """
from itertools import islice
from typing import NamedTuple
class Chunk(NamedTuple):
    index: int
    first: int
    last: int
class Window(NamedTuple):
    start: int
    first: int
    last: int
def plan(args, total):
    for index, first in enumerate(range(1, total, args.chunk)):
        yield Chunk(index, first, min(first + args.chunk, total))
def windows(args, chunk):
    for first in range(chunk.first, chunk.last, args.stride):
        yield Window(max(0, first - args.seq_len), first, min(first + args.stride, chunk.last))
def batches(rows, size):
    source = iter(rows)
    while batch := list(islice(source, size)):
        yield batch
def eval_table(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = torch.zeros((), dtype=torch.float64), 0
    chunks = list(plan(args, val.numel()))
    for chunk in chunks:
        BEFORE
        for batch in batches(list(windows(args, chunk)), 32):
            start, first, last = (column.unsqueeze(1) for column in torch.tensor(batch).unbind(1))
            goal = first + torch.arange(args.stride)
            x = val[(start + torch.arange(args.seq_len)).clamp_max(val.numel() - 1)]
            logits = model.forward_logits(x).gather(1, (goal - 1 - start).unsqueeze(-1))
            live = goal < last
            nll = F.cross_entropy(logits[live], val[goal.clamp_max(val.numel() - 1)][live], reduction="none")
            total += nll.double().sum()
            count += nll.numel()
        AFTER
    return (total / count).item()
"""
STEP = "model(val[chunk.first - 1 : chunk.last - 1], val[chunk.first : chunk.last]).backward(); opt.step()"


@pytest.mark.parametrize(
    ("before", "after", "wanted"), [("pass", STEP, set()), (STEP, "pass", {"training-before-scoring"})]
)
def test_chunks_and_windows_that_are_named_tuples_are_told_apart(before: str, after: str, wanted: set[str]) -> None:
    table = TABLE.replace("BEFORE", before).replace("AFTER", after)
    text = HEAD + table + MAIN.replace("eval_ttt(args", "eval_table(args")
    assert doubted(text) == wanted


CALLED = """
def learn(args, model, opt, val, begin, end):
    model.train()
    for _epoch in range(args.epochs):
        at = begin
        while at < end:
            x, y = val[at : min(at + args.seq_len, end)], val[at + 1 : min(at + args.seq_len, end) + 1]
            opt.zero_grad()
            model(x[None], y[None]).backward()
            opt.step()
            at += args.seq_len

def eval_called(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = torch.zeros((), dtype=torch.float64), 0
    n = (val.numel() - 1 + args.chunk - 1) // args.chunk
    for ci in range(n):
        start, end = ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)
        model.eval()
        with torch.inference_mode():
            logits = model.forward_logits(val[start:end][None])
            nll = F.cross_entropy(logits.view(-1, 1024), val[start + 1 : end + 1], reduction="none")
            total += nll.double().sum()
            count += end - start
        if ci < n - 1:
            learn(args, model, opt, val, start, REACH)
    return (total / count).item()
"""


@pytest.mark.parametrize(("reach", "wanted"), [("end", False), ("min(end + args.seq_len, val.numel() - 1)", True)])
def test_the_call_that_says_how_far_a_lesson_reaches_is_named(reach: str, wanted: bool) -> None:
    text = HEAD + CALLED.replace("REACH", reach) + MAIN.replace("eval_ttt(args", "eval_called(args")
    found = findings(text)["training-before-scoring"]
    assert (found.verdict == "violates") == wanted
    if wanted:
        assert found.place is not None
        assert found.place.line == line_of(text, "learn(args, model, opt, val, start")


BY_A_HELPER = """
def parts_of(val, start, end):
    ahead = min(end + 2048, val.numel() - 1)
    return [val[at : at + 2049] for at in range(start, ahead - 2047, 2048)]

def told(val):
    return min(len(val) + 1, 5)

def adapt(model, opt, val, start, end):
    for part in parts_of(val, start, end):
        opt.zero_grad()
        model(part[None, :-1], part[None, 1:]).backward()
        opt.step()

def evaluate(model, opt, val):
    adapt(model, opt, val, 0, 8192)
    told(val)
"""


def test_how_far_a_lesson_reaches_may_be_said_by_who_cuts_its_parts() -> None:
    lines = tuple(line_of(BY_A_HELPER, text) for text in ("adapt(model, opt, val, 0", "(part[None, :-1]"))
    assert reaching(case_of(BY_A_HELPER), lines) == line_of(BY_A_HELPER, "ahead = min(")
