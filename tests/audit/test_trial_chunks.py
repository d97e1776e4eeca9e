"""Trials of scripts whose chunks are larger than the short text, whose documents end anywhere, or that loop for long
over what nobody knows."""

import ast

import numpy as np
import pytest

from fairway.audit.reading.script import Script
from fairway.audit.settings import Settings
from fairway.audit.trial import run
from fairway.audit.trial.named import numbers
from fairway.audit.trial.text import DOCUMENT, LENGTH, LONGER, ODD, tokens
from fairway.audit.trial.told import Trial
from tests.audit.order import HEAD, MAIN, broken, doubted, findings, line_of

PLANNED = """
def plan_chunks(total, most):
    chunks, begun = [], 0
    for end in range(1024, total + 1, 1024):
        if end - begun >= most:
            chunks.append((begun, end))
            begun = end
    if begun < total:
        chunks.append((begun, total))
    return chunks
def adapt(args, model, opt, val, start, end):
    top = min(REACH, val.numel() - 1)
    for s in range(start, top, args.seq_len):
        opt.zero_grad()
        model(val[s : s + args.seq_len][None], val[s + 1 : s + args.seq_len + 1][None]).backward()
        opt.step()
def eval_planned(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = 0.0, 0
    chunks = plan_chunks(val.numel() - 1, args.CHUNK)
    for n, (start, end) in enumerate(chunks):
        with torch.no_grad():
            total += model(val[start:end][None], val[start + 1 : end + 1][None]).item() * (end - start)
        count += end - start
        if n + 1 < len(chunks):
            adapt(args, model, opt, val, start, end)
    return total / count
"""


def planned(reach: str, chunk: str = "block = 131_072") -> str:
    name = chunk.split()[0]
    head = HEAD.replace("    chunk = int", f"    {chunk}\n    chunk = int", 1)
    main = MAIN.replace("eval_ttt(args", "eval_planned(args")
    return head + PLANNED.replace("REACH", reach).replace("args.CHUNK", f"args.{name}") + main


@pytest.mark.parametrize("chunk", ["block = 131_072", 'piece_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 262144))'])
def test_chunks_larger_than_the_text_are_taken_for_smaller_ones(chunk: str) -> None:
    """All of the text is held against the first number in vain; the name of the second says what it is."""
    text = planned("end + 4096", chunk)
    found = findings(text)["training-before-scoring"]
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text, "range(start, top")
    assert doubted(planned("end", chunk)) == set()


def test_what_reaches_beyond_a_chunk_is_blamed_where_its_range_is_made() -> None:
    text = planned("end + 2048", "block = 8192")
    place = findings(text)["training-before-scoring"].place
    assert place is not None
    assert place.line == line_of(text, "range(start, top")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("TTT_CHUNK_TOKENS = 32_768", {32_768}),
        ('chunk = int(os.environ.get("CHUNK", "65536"))', {65_536}),
        ('parser.add_argument("--chunk-tokens", type=int, default=262_144)', {262_144}),
        ('rows = [("chunk_tokens", int, 262_144), ("seq_len", int, 1024)]', {262_144}),
        ("class Config:\n    chunk_size: int = 100_000", {100_000}),
        ("chunk, batch = 512 * 1024, 1 << 4", {524_288}),
        ("class Table:\n    def __init__(self, chunk, rows): ...\nmade = Table(1 << 20, 4096)", {1_048_576}),
        ("@dataclass\nclass Plan:\n    rows: int\n    chunk: int\nplan = Plan(32, 8192)", {8_192}),
        ("def plan(tokens, *, chunk=16_384): ...", {16_384}),
        ('CONFIG = """{"score": {"chunk": 65536, "rows": 32}}"""', {65_536}),
        ('sizes = os.environ.get("CHUNKS", "131_072,65536").split(",")', {131_072, 65_536}),
        ('"""chunk: 32768 tokens each"""', set()),
        ("chunks = plan(4096 * n)", set()),
    ],
)
def test_numbers_that_a_name_is_given(text: str, found: set[int]) -> None:
    assert numbers("chunk", script_of(text), {}) == found


def test_numbers_that_the_environment_gives() -> None:
    assert numbers("chunk", script_of(""), {"TTT_CHUNK": "4096", "SEED": "42", "CHUNKED": "yes"}) == {4_096}


def script_of(text: str) -> Script:
    return Script("train_gpt.py", text, ast.parse(text))


def trial_of(text: str) -> Trial:
    return run(script_of(text), Settings())


HEAP = """
import heapq, torch
state = torch.load("model.pt")
heap = [(0, name) for name in state]
bits = {name: 4 for name in state}
while heap:
    _, name = heapq.heappop(heap)
    if state[name].numel() > 100:
        continue
    here = bits[name]
    above = here + 1
    saved = 1.0 / above
    spent = saved * above
    left = 4_000_000 - spent
    bits[name] = above
    heapq.heappush(heap, (bits[name], name))
"""
SCORE = """
import glob
import numpy as np
import torch.nn.functional as F
val = torch.from_numpy(np.fromfile(sorted(glob.glob("fineweb_val_*.bin"))[0], dtype=np.uint16)[512:].astype(np.int64))
net = torch.load("net.pt")
nll = F.cross_entropy(net(val[None, :-1])[0], val[1:], reduction="none")
print("val_loss", nll.double().mean().item())
"""


def test_a_loop_that_hangs_on_what_nobody_knows_does_not_shorten_the_text() -> None:
    """Bits are handed out until a budget is spent that hangs on the weights."""
    trial = trial_of(HEAP + SCORE)
    assert trial.complete, trial.why
    assert trial.length == LENGTH
    times, _ = trial.counts(trial.told[-1])
    assert times[1:].tolist() == [1.0] * (LENGTH - 1)


def test_two_documents_of_the_text_are_longer_and_shorter_than_the_others() -> None:
    lengths = np.diff([*np.flatnonzero(tokens(1024) == 1), LENGTH - 1])
    assert sorted(lengths.tolist()) == sorted([*[DOCUMENT] * 8, DOCUMENT + ODD, DOCUMENT - ODD])
    assert LONGER % DOCUMENT == 0


WINDOWS = """
def eval_documents(args, model, val):
    total, count = 0.0, 0
    starts = [*torch.nonzero(val == 1).flatten().tolist(), val.numel() - 1]
    for first, last in zip(starts, starts[1:]):
        reached = first
        while reached < last:
            stop = min(reached + args.seq_len, last) if reached == first else min(reached + args.stride * 8, last)
            begin = max(stop - args.seq_len, first)
            skip = SKIP
            logits = model.forward_logits(val[begin:stop][None])[0]
            nll = F.cross_entropy(logits, val[begin + 1 : stop + 1], reduction="none")
            total += nll[skip:].double().sum().item()
            count += stop - begin - skip
            reached = stop
    return total / count
"""


def test_the_last_window_of_a_document_counts_no_target_again() -> None:
    """It begins a window's length before the document's end, so less than a stride of it is new."""

    def by_document(skip: str) -> str:
        return HEAD + WINDOWS.replace("SKIP", skip) + MAIN.replace("eval_ttt(args", "eval_documents(args")

    again = "0 if reached == first else args.seq_len - args.stride * 8"
    assert "twice-counted-tokens" in broken(by_document(again))
    assert doubted(by_document("reached - begin")) == set()


LOGGED = """
def eval_counted(args, model, val):
    counts = torch.zeros(1024, 1024)
    counts.index_put_((val[:-1], val[1:]), torch.ones(val.numel() - 1), accumulate=True)
    say(f"counted {int(counts.sum().item())} pairs")
    total, count = 0.0, 0
    for start in range(0, val.numel() - 1, args.chunk):
        end = min(start + args.chunk, val.numel() - 1)
        x, y = val[start:end], val[start + 1 : end + 1]
        rows = counts[x] + 0.1
        mixed = 0.9 * torch.softmax(model.forward_logits(x[None])[0], -1) + 0.1 * rows / rows.sum(-1, keepdim=True)
        total += -mixed.gather(1, y.unsqueeze(1)).log().sum().item()
        count += y.numel()
    return total / count
"""
SAY = """
from pathlib import Path
def say(text):
    with OPEN as f:
        WRITE
"""
ADDED = ('open("log.txt", "a")', 'Path("log.txt").open("a")', 'open("log.txt", mode="a", encoding="utf-8")')


@pytest.mark.parametrize("opened", ADDED)
@pytest.mark.parametrize("write", ["print(text, file=f)", 'f.write(text + "\\n")'])
def test_a_line_of_a_log_is_no_artifact(opened: str, write: str) -> None:
    """A table that is spoken of in a log was taken for a part of the training."""
    say = SAY.replace("OPEN", opened).replace("WRITE", write)
    assert broken(HEAD + say + LOGGED + MAIN.replace("eval_ttt(args", "eval_counted(args")) == {"two-pass-cache"}


LIMITED = "    n = (val.numel() - 1 + args.chunk - 1) // args.chunk\n"


@pytest.mark.parametrize("chunk", ["32768", "8192", "262144"])
def test_a_limit_of_chunks_is_found_whether_the_short_text_is_one_of_them_or_not(chunk: str) -> None:
    """Chunks are taken for smaller ones in the trial, and not where the trial is held against a shorter text."""
    text = (HEAD + MAIN).replace(LIMITED, LIMITED + "    n = min(n, args.most) if args.most > 0 else n\n")
    text = text.replace("    chunk = int", '    most = int(os.environ.get("MOST", 0))\n    chunk = int', 1)
    assert "subset-as-full" in broken(text, MOST="200", CHUNK=chunk)
    assert "subset-as-full" not in broken(text, CHUNK=chunk)


BLOCKS = """
def eval_blocks(args, model, val):
    last = val.numel() - 1
    total = count = 0
    for a in range(0, last, STEP):
        b = min(a + args.eval_block, last)
        for s in range(a, b, 256):
            e = min(s + 256, b)
            nll = F.cross_entropy(model.forward_logits(val[s:e][None])[0], val[s + 1 : e + 1], reduction="sum")
            total += nll.item()
            count += e - s
    return total / count
"""


@pytest.mark.parametrize(
    ("step", "wanted"), [("args.eval_block", set()), ("args.eval_block * 3 // 4", {"twice-counted-tokens"})]
)
def test_blocks_that_move_on_by_less_than_they_are_long(step: str, wanted: set[str]) -> None:
    """The short text is a part of one block of the script's own size."""
    head = HEAD.replace(
        "    chunk = int", '    eval_block = int(os.environ.get("EVAL_BLOCK", 131_072))\n    chunk = int', 1
    )
    text = head + BLOCKS.replace("STEP", step) + MAIN.replace("eval_ttt(args", "eval_blocks(args")
    assert broken(text) == wanted


def test_a_condition_that_another_number_hangs_on_says_nothing_of_the_score() -> None:
    """Whether the plain loss of the model has an auxiliary part, nobody knows; the score is read off its logits."""
    plain = "        return F.cross_entropy(logits.view(-1, 1024).float(), y.reshape(-1))\n"
    assert plain in HEAD
    aside = plain.replace("return", "loss =") + (
        "        if self.training and self.aside > 0:\n            loss = loss + self.aside * F.cross_entropy("
        "logits[:, :-1].reshape(-1, 1024).float(), y[:, 1:].reshape(-1))\n        return loss\n"
    )
    windows = BLOCKS.replace("STEP", "32768").replace("args.eval_block", "32768")
    head = HEAD.replace(plain, aside).replace("def forward(", "aside = open('aside.txt').read()\n    def forward(", 1)
    main = MAIN.replace(
        "    final = eval_ttt(args", "    print('plain', eval_val(args, model, val))\n    final = eval_blocks(args"
    )
    text = head + windows + main
    assert "aside" in text
    twice = text.replace("for s in range(a, b, 256):", "for s in range(max(a - 256, 0), b, 256):")
    assert doubted(text) == set()
    assert broken(twice) == {"twice-counted-tokens"}
