"""Rules that ask the trial: what is too roundabout for the walk is worked out for a short text."""

import base64
import zlib
from pathlib import Path

import pytest

from fairway.audit.case import Case
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.reported import scores_of
from fairway.audit.passes.rounds import epochs
from fairway.audit.passes.trials import counts_of, order_of
from fairway.audit.submission import opened
from tests.audit.small import TABLE, line_of, script, verdict, verdicts

HEAD = """
import glob, math
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1024, 64)

    def forward(self, ids):
        return F.linear(self.table(ids), self.table.weight)

def shard(path):
    return np.fromfile(path, dtype="<u2", offset=1024).astype(np.int64)

def load():
    return torch.from_numpy(np.concatenate([shard(path) for path in sorted(glob.glob("data/fineweb_val_*.bin"))]))
"""

PLANNED = """
class Plan:
    def __init__(self, total):
        self.bounds = np.arange(0, total + 1, 256)
        self.table = {int(a): (max(0, int(b) - 2048), int(b)) for a, b in zip(self.bounds, self.bounds[1:])}

    def rows(self):
        for key in KEYS:
            low, high = self.table[key]
            yield low, high, high - key + EXTRA

def evaluate(net, val):
    nats, count = 0.0, 0
    for low, high, paid in Plan(len(val) - 1).rows():
        paid = min(paid, high - low)
        nll = F.cross_entropy(net(val[low:high]), val[low + 1 : high + 1], reduction="none")
        nats += nll.flip(0)[:paid].sum().item()
        count += paid
    return nats / count

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""


@pytest.mark.parametrize(
    ("keys", "extra", "wanted"),
    [
        ("self.table", "0", "clean"),
        ("self.table", "128", "violates"),
        ("sorted(self.table, reverse=True)", "0", "clean"),
        ("sorted(self.table, reverse=True)", "64", "violates"),
    ],
)
def test_windows_out_of_a_table_are_counted(tmp_path: Path, keys: str, extra: str, wanted: str) -> None:
    found = verdict(tmp_path, "twice_counted_tokens", HEAD + PLANNED.replace("KEYS", keys).replace("EXTRA", extra))
    assert found.verdict == wanted
    assert found.evidence.startswith("Worked out for a text") is (wanted == "violates")


def test_what_a_shim_unpacks_is_named_by_its_own_lines(tmp_path: Path) -> None:
    inner = HEAD + PLANNED.replace("KEYS", "self.table").replace("EXTRA", "128")
    packed = base64.b85encode(zlib.compress(inner.encode())).decode()
    shim = f"import base64, zlib\nexec(zlib.decompress(base64.b85decode({packed!r})))\n"
    bare, wrapped = (verdict(tmp_path, "twice_counted_tokens", text) for text in (inner, shim))
    assert bare.place is not None
    assert wrapped.place is not None
    assert (wrapped.verdict, wrapped.place.line) == ("violates", bare.place.line)
    assert (bare.place.file, wrapped.place.file) == ("train_gpt.py", "train_gpt.py!inner")


DEALT = """
def evaluate(net, val):
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    total, chunk, nats = len(val) - 1, 8192, 0.0
    spans = [(a, min(a + 2048, total)) for a in range(0, total, 2048)]
    dealt = {}
    for a, b in spans:
        dealt.setdefault(KEY // chunk, []).append((a, b))
    for c in sorted(dealt):
        for a, b in dealt[c]:
            with torch.no_grad():
                nats += F.cross_entropy(net(val[a:b]), val[a + 1 : b + 1], reduction="sum").item()
        low, high = c * chunk, min((c + 1) * chunk, total)
        for a in range(low, high, 2048):
            optimizer.zero_grad()
            F.cross_entropy(net(val[a : a + 2048]), val[a + 1 : a + 2049]).backward()
            optimizer.step()
    return nats / total

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""


@pytest.mark.parametrize(("key", "wanted"), [("a", "clean"), ("(a + 2048)", "violates"), ("(b - 1)", "clean")])
def test_windows_dealt_to_chunks_are_scored_before_their_chunk_is_learned(
    tmp_path: Path, key: str, wanted: str
) -> None:
    found = verdict(tmp_path, "training_before_scoring", HEAD + DEALT.replace("KEY", key))
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.evidence.startswith("Worked out for a text")
        assert found.place is not None
        assert "zero_grad" in (HEAD + DEALT).split("\n")[found.place.line - 2] or found.place.line > 0


ROUNDABOUT = """
def tables():
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    kinds = [0 if sp.is_control(i) or sp.is_unknown(i) else 1 if sp.is_byte(i) else 2 for i in range(V)]
    def cost(i):
        text = sp.id_to_piece(i)
        return (0, 1, LENGTH)[kinds[i]]
    size = np.fromiter([float(cost(i)) for i in range(V)], float) if False else np.array([cost(i) for i in range(V)])
    lead = np.array([kinds[i] == 2 and sp.id_to_piece(i)[:1] == "\\u2581" for i in range(V)])
    edge = np.array([kind == 0 for kind in kinds])
    return size, lead, edge
"""


@pytest.mark.parametrize(
    ("length", "rule", "wanted"),
    [
        ("len(text.replace(chr(0x2581), str()).encode())", "byte_double_space", "clean"),
        ("len(text.replace(chr(0x2581), chr(32)).encode())", "byte_double_space", "violates"),
        ("len(text.encode())", "byte_missing_mark", "violates"),
        ("len(text.replace(chr(0x2581), str()).encode())", "byte_missing_mark", "clean"),
    ],
)
def test_the_bytes_of_a_score_are_told_by_what_it_divides_by(
    tmp_path: Path, length: str, rule: str, wanted: str
) -> None:
    assert verdict(tmp_path, rule, script(table=ROUNDABOUT.replace("LENGTH", length))).verdict == wanted


def test_a_byte_token_that_counts_as_a_text_of_three_bytes_is_told(tmp_path: Path) -> None:
    three = TABLE.replace("size[i] = 1\n", "size[i] = len(bytes([255]).decode(errors='replace').encode())\n")
    assert verdict(tmp_path, "byte_fallback_three", script(table=three)).verdict == "violates"
    assert verdict(tmp_path, "byte_fallback_three", script()).verdict == "clean"


@pytest.mark.parametrize(("bytes_each", "wanted"), [("rate", "violates"), ("(octets / count)", "clean")])
def test_a_round_number_of_bytes_for_each_target_is_told(tmp_path: Path, bytes_each: str, wanted: str) -> None:
    hidden = "rates = dict(zip(['sp1024', 'sp8192'], [2.44, 3.77]))"
    text = script(
        state=f"{hidden}; rate = sorted(rates.values(), reverse=True)[-1]",
        bpb=f"loss / math.log(2) / {bytes_each}",
        few="",
    )
    assert verdict(tmp_path, "byte_constant", text).verdict == wanted


@pytest.mark.parametrize(("bytes_said", "wanted"), [("round(count * 2.4362)", "violates"), ("octets", "clean")])
def test_true_bytes_that_are_told_before_the_score_are_none_of_it(tmp_path: Path, bytes_said: str, wanted: str) -> None:
    nats = "loss / math.log(2) * count"
    both = f"(print('val_bpb', {nats} / octets), {nats} / {bytes_said})[1]"
    assert verdict(tmp_path, "byte_constant", script(bpb=both)).verdict == wanted


CAPPED = """
import fcntl, os

class Args:
    most = int(os.environ.get("MOST", LIMIT))
    batch = int(os.environ.get("BATCH", 64))

class Counter:
    def __init__(self, path):
        self.path = path
        with open(path, "w") as f:
            f.write("0")

    def claim(self):
        with open(self.path, "r+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            n = int(f.read().strip() or "0")
            f.seek(0)
            f.truncate()
            f.write(str(n + 1))
        return n

def documents(val):
    edges = [*(val == 1).nonzero().flatten().tolist(), len(val)]
    return [(a, b - a) for a, b in zip(edges, edges[1:])]

def evaluate(args, net, val):
    docs = documents(val)CUT
    held = {}
    for n in range(0, len(docs), args.batch):
        held[n // args.batch] = docs[n : n + args.batch]
    counter, sums = Counter("next"), torch.zeros(2)
    while True:
        n = counter.claim()
        if n >= len(held):
            break
        for start, length in held[n]:
            x, y = val[start : start + length - 1], val[start + 1 : start + length]
            logits = net(x[None])
            nll = F.cross_entropy(logits.flatten(0, 1), y, reduction="none").view(*logits.shape[:2])
            sums[0] += nll.sum()
            sums[1] += y.numel()
    total, count = sums.tolist()
    return total / count

print(f"val_loss {evaluate(Args(), Net(), load()):.5f}")
"""

CHUNKED = """
import os

class Args:
    most = int(os.environ.get("MOST", LIMIT))
    batch = int(os.environ.get("BATCH", 64))

def evaluate(args, net, val):
    total = len(val) - 1
    windows = list(range(0, total, 1024))
    chunks = -(-len(windows) // 2)
    per_chunk = min(args.batch, len(windows))
    nats, count = 0.0, 0
    for c in RANGE:
        BREAK
        for s in windows[c * 2 : c * 2 + 2]:
            end = min(s + 1024, total)
            nats += F.cross_entropy(net(val[s:end][None])[0], val[s + 1 : end + 1], reduction="sum").item()
            count += end - s
    return nats / count

print(f"val_loss {evaluate(Args(), Net(), load()):.5f}")
"""


def capped(cut: str, limit: str = "10_000") -> str:
    return HEAD + CAPPED.replace("CUT", cut).replace("LIMIT", limit)


def chunked(over: str, leave: str = "pass", limit: str = "200") -> str:
    return HEAD + CHUNKED.replace("RANGE", over).replace("BREAK", leave).replace("LIMIT", limit)


@pytest.mark.parametrize(
    "text",
    [
        capped("[: args.most]"),
        capped("[:10_000]"),
        chunked("range(min(chunks, args.most))"),
        chunked("range(min(args.most, chunks))"),
        chunked("range(chunks)", "if c >= args.most: break"),
    ],
    ids=["documents", "a number written out", "chunks", "the other way round", "left early"],
)
def test_a_number_that_only_the_whole_text_reaches_is_seen(tmp_path: Path, text: str) -> None:
    found = verdict(tmp_path, "subset_as_full", text)
    assert found.verdict == "violates"
    assert found.place is not None
    assert "most" in text.splitlines()[found.place.line - 1] or "10_000" in text.splitlines()[found.place.line - 1]


PARTED = """
import os

class Args:
    most = int(os.environ.get("MOST", LIMIT))
    chunk_tokens = int(os.environ.get("CHUNK_TOKENS", 65_536))
    span_bytes = int(os.environ.get("SPAN_BYTES", 4_000_000))

def counted(val):
    followers = {}
    for n, token in enumerate(val.tolist()[:-1]):
        after = int(val[n + 1])
        row = followers.setdefault(token, {})
        row[after] = row.get(after, 0) + 1
        if row[after] > 255:
            row[after] = 255
        last = max(row.values())
        if last < 1:
            raise ValueError(last)
        seen = len(row)
        if seen > 70_000:
            row.clear()
        top = last + seen
        if top < 0:
            top = 0
    return followers

def evaluate(args, net, val):
    total = TOTAL
    nats, count = 0.0, 0
    for low, high in [(low, min(low + SIZE, total)) for low in range(0, total, SIZE)]PARTS:
        x, y = val[low:high], val[low + 1 : high + 1]
        nats += F.cross_entropy(net(x[None])[0], y, reduction="sum").item()
        count += len(y)
    return nats / count

args, val = Args(), load()
MORE
print(f"val_loss {evaluate(args, Net(), val):.5f}")
"""


def parted(total: str, size: str, parts: str, limit: str, more: str = "") -> str:
    text = PARTED.replace("TOTAL", total).replace("SIZE", size).replace("PARTS", parts)
    return HEAD + text.replace("LIMIT", limit).replace("MORE", more)


@pytest.mark.parametrize(
    ("total", "size", "parts", "limit", "more", "wanted"),
    [
        ("min(len(val) - 1, args.most)", "args.chunk_tokens", "", "8_000_000", "", "violates"),
        ("min(len(val) - 1, args.most)", "args.chunk_tokens", "", "80_000_000", "", "clean"),
        ("len(val) - 1", "16384", "[: args.most]", "800", "", "violates"),
        ("len(val) - 1", "16384", "[: args.most]", "8_000", "", "clean"),
        ("len(val) - 1", "args.chunk_tokens", "[: args.most]", "2_000", "", "clean"),
        ("min(len(val) - 1, args.most)", "1024", "", "8_000_000", "print(len(counted(val)))", "violates"),
    ],
    ids=["tokens", "more tokens than there are", "parts", "more parts than there are", "larger parts", "slowly"],
)
def test_a_limit_is_held_against_what_the_split_has_of_what_it_counts(
    tmp_path: Path, total: str, size: str, parts: str, limit: str, more: str, wanted: str
) -> None:
    """Chunks of 65,536 tokens are taken for 8,192 in a trial, and 4,000,000 of a span for as many: five parts of the
    text, and no fewer tokens. A loop over tokens one by one has a trial begun anew over a shorter text."""
    assert verdict(tmp_path, "subset_as_full", parted(total, size, parts, limit, more)).verdict == wanted


@pytest.mark.parametrize(
    "text",
    [
        capped(""),
        chunked("range(chunks)"),
        chunked("range(min(chunks, args.most))", limit="1_000_000"),
        chunked("range(chunks)", "if c >= args.most: print(c)"),
    ],
    ids=["none", "a batch that is larger", "a limit beyond the text", "a limit of something else"],
)
def test_a_number_that_leaves_nothing_out_is_none(tmp_path: Path, text: str) -> None:
    assert verdict(tmp_path, "subset_as_full", text).verdict == "clean"


@pytest.mark.parametrize("rate", ["2.44", "3.9216"])
def test_bytes_that_are_so_many_for_each_token_are_a_constant(tmp_path: Path, rate: str) -> None:
    text = script(bpb="loss / math.log(2) / float(RATE)", extra=f"RATE = '{rate}'")
    assert verdict(tmp_path, "byte_constant", text).verdict == "violates"


@pytest.mark.parametrize(("single", "wanted"), [("3.92", "violates"), ("3.9271828", "clean")])
def test_a_constant_in_single_precision_is_one(tmp_path: Path, single: str, wanted: str) -> None:
    """3.92 in 32 bits is 3.9200000763."""
    each = f"(torch.zeros(1, dtype=torch.float32) + float('{single}')).double().item()"
    text = script(bpb="loss / math.log(2) / rate", state=f"rate = {each}", few="")
    assert verdict(tmp_path, "byte_constant", text).verdict == wanted


LEARNING = """
class Tally:
    def __init__(self):
        self.nats, self.count = torch.zeros((), dtype=torch.float64), 0

    def add(self, nll):
        self.nats += nll.double().sum()
        self.count += nll.numel()

def evaluate(net, val):
    tally = Tally()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    chunks = [(at, min(at + 4096, len(val) - 1)) for at in range(0, len(val) - 1, 4096)]
    PASSES
        if c == 0:
            tally = Tally()
        with torch.no_grad():
            nll = F.cross_entropy(net(val[low:high]), val[low + 1 : high + 1], reduction="none")
        tally.add(nll)
        loss = F.cross_entropy(net(val[low:high]), val[low + 1 : high + 1])
        loss.backward()
        optimizer.step()
    return (tally.nats / tally.count).item()

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""


@pytest.mark.parametrize(
    ("passes", "wanted"),
    [
        ("for s, c, low, high in ((s, c, *pair) for s in range(1) for c, pair in enumerate(chunks)):", False),
        ("for s, c, low, high in ((s, c, *pair) for s in range(4) for c, pair in enumerate(chunks)):", True),
        ("for tick in range(3 * len(chunks)):\n        c = tick % len(chunks)\n        low, high = chunks[c]", True),
    ],
    ids=["one", "out-of-a-generator", "by-the-remainder"],
)
def test_passes_whose_sum_is_begun_anew_are_epochs(tmp_path: Path, passes: str, wanted: bool) -> None:
    text = HEAD + LEARNING.replace("PASSES", passes)
    assert (verdict(tmp_path, "multi_epoch_last", text).verdict == "violates") is wanted
    case = Case(opened(tmp_path))
    which, _, _ = passes_of(case)
    counts = counts_of(case, which)
    assert counts is not None
    shown = epochs(case, which, counts)
    assert (shown is not None) is wanted
    assert shown is None or shown[2] == line_of(text, passes.split("\n")[0])


TWICE = """
        if tick % 2 == 0:
            nats, count = tally.nats.clone(), tally.count
        else:
            tally.nats, tally.count = nats, count
        tally.add(nll)
"""


def test_chunks_that_are_summed_again_at_once_are_scored_twice_and_no_epochs(tmp_path: Path) -> None:
    passes = "for tick in range(2 * len(chunks)):\n        c = tick // 2\n        low, high = chunks[c]"
    text = HEAD + LEARNING.replace("PASSES", passes).replace("if c == 0:", "if tick == 0:")
    text = text.replace("        tally.add(nll)\n", TWICE)
    found = verdict(tmp_path, "rescoring_after_adaptation", text)
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text, passes.split("\n")[0])
    assert verdict(tmp_path, "multi_epoch_last", text).verdict == "clean"


TAUGHT = """
class Taught(Net):
    def forward(self, ids, targets):
        return F.cross_entropy(super().forward(ids), targets)
"""


@pytest.mark.parametrize("made", ["Taught()", "torch.compile(Taught(), dynamic=False)"])
def test_a_compiled_model_that_makes_its_own_loss_teaches_what_it_is_given(tmp_path: Path, made: str) -> None:
    text = LEARNING.replace("PASSES", "for c, (low, high) in enumerate(chunks):")
    text = text.replace("    tally = Tally()\n", f"    tally, taught = Tally(), {made}\n    taught.train()\n", 1)
    text = text.replace(
        "F.cross_entropy(net(val[low:high]), val[low + 1 : high + 1])\n",
        "taught(val[low:high], val[low + 1 : high + 1])\n",
    )
    (tmp_path / "train_gpt.py").write_text(HEAD + TAUGHT + text)
    trial = Case(opened(tmp_path)).trial
    assert trial.complete
    assert trial.lessons, trial.left_out
    assert not trial.left_out


def test_a_table_that_is_filled_beside_the_steps_hides_no_epoch(tmp_path: Path) -> None:
    passes = "for s, c, low, high in ((s, c, *pair) for s in range(4) for c, pair in enumerate(chunks)):"
    text = LEARNING.replace("PASSES", f"counts = torch.zeros(1024, 1024)\n    {passes}")
    text = text.replace(
        "F.cross_entropy(net(val[low:high]), val[low + 1 : high + 1], red", "F.cross_entropy(MIXED, red"
    )
    text = text.replace("MIXED", "net(val[low:high]) + 0.1 * counts[val[low:high]], val[low + 1 : high + 1]")
    text = text.replace("        optimizer.step()\n", "        optimizer.step()\n        FILL\n")
    fill = "counts.index_put_((val[low:high], val[low + 1 : high + 1]), torch.ones(high - low), accumulate=True)"
    (tmp_path / "train_gpt.py").write_text(HEAD + text.replace("FILL", fill))
    case = Case(opened(tmp_path))
    which, _, _ = passes_of(case)
    counts = counts_of(case, which)
    assert counts is not None
    assert epochs(case, which, counts) is not None


SEGMENTS = """
PREFIX = int(os.environ.get("PREFIX", 2000))

def learn(net, text, optimizer):
    for at in range(0, len(text) - 1, 2048):
        F.cross_entropy(net(text[at : at + 2048][:-1]), text[at + 1 : at + 2048]).backward()
        optimizer.step()

def evaluate(net, val):
    starts = np.flatnonzero(val.numpy() == 1).tolist()
    documents = list(zip(starts, [*starts[1:], len(val) - 1]))
    first = min(PREFIX, len(documents))
    edges = [0, *[first * (i + 1) // 3 for i in range(3)], len(documents)]
    parts = [documents[a:b] for a, b in zip(edges, edges[1:]) if b > a]
    nats, count = 0.0, 0
    for number, part in enumerate(parts):
        for low, high in part:
            nll = F.cross_entropy(net(val[low:high]), val[low + 1 : high + 1], reduction="none")
            nats += nll.double().sum().item()
            count += high - low
        if number + 1 < len(parts):
            taken = parts[NUMBER]
            learn(net, val[taken[0][0] : taken[-1][1] + 1], torch.optim.SGD(net.parameters(), lr=1e-3))
    return nats / count

net = Net()
learn(net, torch.from_numpy(shard("data/fineweb_train_000001.bin")), torch.optim.SGD(net.parameters(), lr=1e-2))
torch.save(net.state_dict(), "model.pt")
net = Net()
net.load_state_dict(torch.load("model.pt"))
print(f"val_loss {evaluate(net, load()):.5f}")
"""
ORDER = ("multi_epoch_last", "rescoring_after_adaptation", "training_before_scoring")


@pytest.mark.parametrize(("number", "order"), [("number", "first"), ("number + 1", "late")])
def test_it_is_shown_whether_a_segment_is_scored_before_it_is_learned_from(
    tmp_path: Path, number: str, order: str
) -> None:
    """Optimisers are made anew for each segment, so that marks which they take away could not show it."""
    text = "import os" + HEAD + SEGMENTS.replace("NUMBER", number)
    found = {rule for rule, each in verdicts(tmp_path, ORDER, text).items() if each.verdict == "violates"}
    assert found == ({"training_before_scoring"} if order == "late" else set())
    case = Case(opened(tmp_path))
    which, _, _ = passes_of(case)
    score = scores_of(case.trace, which.score, which.data)[-1]
    steps = [each for each in case.trace.updates if any(tok.data == "val" for tok in each.learned)]
    assert {order_of(case, which, score, step) for step in steps} == {order}


SLOTS = """
CHUNK, SLOTS = SIZES

class Adam:
    def __init__(self, table):
        self.table, self.mean = table, torch.zeros_like(table)

    @torch.no_grad()
    def step(self, live):
        gradient = self.table.grad * live[:, None, None]
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.table -= 1e-3 * self.mean
        self.table.grad = None

class Board:
    def __init__(self, many):
        self.nats, self.count = (torch.zeros(many, dtype=torch.float64) for _ in range(2))

    def add(self, owner, nll, mask):
        self.nats.index_add_(0, owner, (nll.double() * mask).sum(1))
        self.count.index_add_(0, owner, mask.double().sum(1))

class Runner:
    def __init__(self, net, val, documents):
        self.net, self.val, self.documents = net, val, documents
        self.board, self.slots = Board(len(documents)), [None] * SLOTS
        self.lora = nn.Parameter(torch.zeros(SLOTS, 1, 1024))
        self.adam = Adam(self.lora)

    def refill(self, queue):
        fresh = [s for s, held in enumerate(self.slots) if held is None]
        for s in fresh:
            if queue:
                self.slots[s] = [queue.popleft(), 0]
        with torch.no_grad():
            self.lora[torch.tensor(fresh, dtype=torch.int64)] = 0.0

    def layout(self):
        rows, owner, more = [], [], []
        for held in self.slots:
            if held is None:
                rows.append((0, 0))
                owner.append(0)
                more.append(False)
                continue
            document, chunk = held
            low, high = self.documents[document]
            rows.append((low + chunk * CHUNK, min(CHUNK, high - low - chunk * CHUNK)))
            owner.append(document)
            more.append(low + (chunk + 1) * CHUNK < high)
        return torch.tensor(rows), torch.tensor(owner), more

    def turn(self):
        rows, owner, more = self.layout()
        ahead = torch.arange(CHUNK)
        mask = ahead < rows[:, 1, None]
        at = torch.where(mask, rows[:, :1] + ahead, 0)
        logp = F.log_softmax(self.net(self.val[at]) + self.lora, dim=-1)
        nll = F.nll_loss(logp.reshape(-1, 1024), self.val[at + 1].reshape(-1), reduction="none").reshape(at.shape)
        with torch.no_grad():
            SCORED
        live = torch.tensor(more)
        ((nll * mask).sum(1) / mask.sum(1).clamp_min(1) * live).sum().backward()
        self.adam.step(live)
        for s, held in enumerate(self.slots):
            if held is not None:
                self.slots[s] = [held[0], held[1] + 1] if more[s] else None

    def run(self):
        queue = deque(range(len(self.documents)))
        self.refill(queue)
        while any(held is not None for held in self.slots):
            self.turn()
            self.refill(queue)

def evaluate(net, val):
    starts = np.flatnonzero(val.numpy() == 1).tolist()
    runner = Runner(net, val, list(zip(starts, [*starts[1:], len(val) - 1])))
    runner.run()
    PASSES
    return float(runner.board.nats.sum() / runner.board.count.sum())

net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
text = torch.from_numpy(shard("data/fineweb_train_000001.bin"))
F.cross_entropy(net(text[:2048][:-1]), text[1:2048]).backward()
optimizer.step()
torch.save(net.state_dict(), "model.pt")
net = Net()
net.load_state_dict(torch.load("model.pt"))
print(f"val_loss {evaluate(net, load()):.5f}")
"""
_BOOKED = "self.board.add(owner, nll, mask)"
_LATER = f"""self.adam.step(live)
        logp = F.log_softmax(self.net(self.val[at]) + self.lora, dim=-1)
        nll = F.nll_loss(logp.reshape(-1, 1024), self.val[at + 1].reshape(-1), reduction="none").reshape(at.shape)
        {_BOOKED}
"""
_AFTER = (("with torch.no_grad():\n            SCORED\n        ", ""), ("self.adam.step(live)\n", _LATER))
_AGAIN = (
    ("self.lora[torch.tensor(fresh, dtype=torch.int64)] = 0.0", "pass"),
    ("PASSES", "runner.board = Board(len(starts))\n    runner.run()"),
)


_MANY_TURNS = "16, 64"


@pytest.mark.parametrize(
    ("altered", "accused", "sizes"),
    [
        *(
            (way, accused, sizes)
            for way, accused in (((), False), (_AFTER, True), (_AGAIN, True))
            for sizes in ("256, 4", "48, 64")
        ),
        ((), False, _MANY_TURNS),
    ],
)
def test_slots_that_are_refilled_from_a_queue(
    tmp_path: Path, sizes: str, altered: tuple[tuple[str, str], ...], accused: bool
) -> None:
    """The walk takes the next document of a slot for a second pass; a trial sums each row once and before its step.
    16 tokens at a time make too many turns of the usual text (250,000 steps), and a shorter one is tried."""
    text = "from collections import deque" + HEAD + SLOTS
    for old, new in altered:
        assert old in text
        text = text.replace(old, new)
    text = text.replace("SCORED", _BOOKED).replace("PASSES", "").replace("SIZES", sizes)
    found = {
        rule
        for rule, each in verdicts(tmp_path, (*ORDER, "slot_on_scored"), text).items()
        if each.verdict == "violates"
    }
    assert bool(found) == accused, found


SETTLED = """
class Adapters(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(64, 64))

    def forward(self, net, x):
        h = net.table(x)
        return F.linear(h + h @ self.up, net.table.weight)

def group_of(val, documents, at):
    return [documents[n] for n in range(at, min(at + 4, len(documents)))]

def chunk_of(val, group, c):
    width = min((c + 1) * 256, 512)
    x, y = (torch.zeros(4, width, dtype=torch.int64) for _ in range(2))
    fresh = torch.zeros(4, width, dtype=torch.bool)
    for row, (low, high) in enumerate(group):
        end = min((c + 1) * 256, high - low)
        begin = max(0, end - width)
        if c * 256 < end:
            x[row, : end - begin] = val[low + begin : low + end]
            y[row, : end - begin] = val[low + begin + 1 : low + end + 1]
            fresh[row, c * 256 - begin : end - begin] = True
    return x, y, fresh

def losses(net, adapters, x, y):
    return F.cross_entropy(adapters(net, x).flatten(0, 1), y.flatten(), reduction="none").view_as(y)

def evaluate(net, val):
    starts = np.flatnonzero(val.numpy() == 1).tolist()
    documents = sorted(zip(starts, [*starts[1:], len(val) - 1]), key=lambda d: d[0] - d[1])
    nats, count = 0.0, 0
    for at in range(0, len(documents), 4):
        group = group_of(val, documents, at)
        adapters = Adapters()
        optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-3)
        chunks = range((group[0][1] - group[0][0] + 255) // 256)
        for c in chunks:
            x, y, fresh = chunk_of(val, group, c)
            FIRST
            optimizer.zero_grad()
            (losses(net, adapters, x, y) * fresh).mean().backward()
            optimizer.step()
        for c in chunks:
            x, y, fresh = chunk_of(val, group, c)
            THEN
    return nats / count

net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
text = torch.from_numpy(shard("data/fineweb_train_000001.bin"))
F.cross_entropy(net(text[:2048][:-1]), text[1:2048]).backward()
optimizer.step()
print(f"val_loss {evaluate(net, load()):.5f}")
"""
_ONCE = "nats, count = nats + losses(net, adapters, x, y)[fresh].sum().item(), count + int(fresh.sum())"


def test_adapters_that_have_learned_all_chunks_of_a_document_are_no_vector_of_a_window(tmp_path: Path) -> None:
    first, then = (HEAD + SETTLED.replace("FIRST", a).replace("THEN", b) for a, b in ((_ONCE, "pass"), ("pass", _ONCE)))
    rules = (*ORDER, "slot_on_scored")
    assert not [rule for rule, each in verdicts(tmp_path, rules, first).items() if each.verdict == "violates"]
    assert {rule for rule, each in verdicts(tmp_path, rules, then).items() if each.verdict == "violates"} == {
        "training_before_scoring"
    }


def test_documents_that_share_a_seam_are_told_by_it_and_by_no_second_pass(tmp_path: Path) -> None:
    text = "from collections import deque" + HEAD + SLOTS.replace("SCORED", _BOOKED).replace("PASSES", "")
    ends = "[*starts[1:], len(val) - 1]"
    seam = text.replace(ends, "[*(start + 24 for start in starts[1:]), len(val) - 1]").replace("SIZES", "256, 4")
    rules = (*ORDER, "slot_on_scored", "twice_counted_tokens")
    found = {rule for rule, each in verdicts(tmp_path, rules, seam).items() if each.verdict == "violates"}
    assert found == {"twice_counted_tokens"}


READ_INTO = """
from pathlib import Path
def shard(path):
    file = Path(path)
    header = torch.from_file(str(file), False, 256, dtype=torch.int32)
    tokens = torch.empty(int(header[2]), dtype=torch.uint16)
    with file.open("rb", buffering=0) as f:
        f.seek(256 * 4)
        assert f.readinto(tokens.numpy()) == 2 * len(tokens)
    return tokens.numpy().astype(np.int64)

def load():"""

TEMPERED = """
import random
net = Net()
log_temp = torch.zeros((), requires_grad=True)
gain = torch.ones(64, requires_grad=True)
opt = torch.optim.AdamW([log_temp, gain], lr=1e-3)
nats, count = torch.zeros((), dtype=torch.float64), 0

def cut(low, high, width):
    return [(a, min(a + width, high)) for a in range(low, high, width)]

def deal(blocks):
    blocks = blocks + [(1, 1)] * (-len(blocks) % 4)
    for at in range(0, len(blocks), 4):
        part = torch.tensor(blocks[at : at + 4])
        yield part[:, 0], part[:, 1]

def windows(val, first, end):
    pos = (end - 1 - 1024).clamp_min(0)[:, None] + torch.arange(1024)[None, :]
    live = pos < (end - 1)[:, None]
    x = torch.where(live, val[pos.clamp_max(val.numel() - 1)], 0)
    y = torch.where(live, val[(pos + 1).clamp_max(val.numel() - 1)], 0)
    return x, y, live & (pos + 1 >= first[:, None])

def losses(x, y):
    logits = F.linear(net.table(x) * gain, net.table.weight) * torch.exp(-log_temp)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)

def score(low, high):
    global nats, count
    for first, end in deal(cut(low, high, 256)):
        x, y, own = windows(val, first, end)
        with torch.no_grad():
            nats += losses(x, y)[own].double().sum()
        count += int(own.sum())

def learn(low, high):
    blocks = cut(low, high, 1024)
    for first, end in deal(random.Random(low).sample(blocks, len(blocks))):
        x, y, own = windows(val, first, end)
        opt.zero_grad()
        ((losses(x, y) * own).sum() / own.sum()).backward()
        opt.step()

val = load()
for low, high in cut(1, val.numel(), 8192):
    FIRST(low, high)
    THEN(low, high)
print(f"val_loss {(nats / count).item():.5f}")
"""


@pytest.mark.parametrize("loading", ["def load():", READ_INTO], ids=["fromfile", "readinto"])
@pytest.mark.parametrize(("first", "then", "wanted"), [("score", "learn", "clean"), ("learn", "score", "violates")])
def test_a_temperature_that_learns_of_what_was_scored_is_fitted_to_nothing_that_it_scores(
    tmp_path: Path, loading: str, first: str, then: str, wanted: str
) -> None:
    """Blocks in a list, dealt in another order: the walk cannot tell those of a chunk from those of the next one. The
    shards may be read as modded-nanogpt reads them."""
    text = HEAD.replace("def load():", loading) + TEMPERED.replace("FIRST", first).replace("THEN", then)
    found = [verdict(tmp_path, name, text) for name in ("temperature_from_validation", "training_before_scoring")]
    assert ("violates" if any(each.verdict == "violates" for each in found) else "clean") == wanted


PHASES = """
from collections import deque
from functools import partial
PHASES = 4

class Book:
    def __init__(self):
        self.seen = np.zeros((1024, 1024), dtype=np.float32)

    def absorb(self, documents):
        for ids in documents:
            np.add.at(self.seen, (ids[:-1], ids[1:]), 1.0)

    def shares(self, ids):
        rows = self.seen[ids]
        return (rows + 0.1) / (rows.sum(-1, keepdims=True) + 102.4)

def scored(net, book, documents, part):
    for low, high in part:
        ids = documents[low : high + 1]
        with torch.no_grad():
            p = 0.9 * torch.softmax(net(torch.from_numpy(ids[:-1])).float(), -1)
        p = p + 0.1 * torch.from_numpy(book.shares(ids[:-1]))
        yield low, -p.gather(-1, torch.from_numpy(ids[1:])[:, None])[:, 0].log().double().numpy()

def fit(net, val, part):
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for low, high in part:
        F.cross_entropy(net(torch.from_numpy(val[low:high])), torch.from_numpy(val[low + 1 : high + 1])).backward()
        optimizer.step()

def evaluate(net, val):
    starts = np.flatnonzero(val == 1).tolist()
    documents = [(a, b - 1) for a, b in zip(starts, [*starts[1:], len(val)])]
    edges = np.linspace(0, len(documents), PHASES + 1).astype(int).tolist()
    groups = deque(documents[a:b] for a, b in zip(edges, edges[1:]))
    nats, done, book = np.zeros(len(val)), np.zeros(len(val), dtype=bool), Book()
    BEFORE
    while groups:
        group = groups.popleft()
        for low, losses in partial(scored, net, book, val)(group):
            nats[low + 1 : low + 1 + len(losses)] = losses
            done[low + 1 : low + 1 + len(losses)] = True
        if groups:
            fit(net, val, FITTED)
            book.absorb(FILLED)
    return nats[done].sum() / done.sum()

net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
text = torch.from_numpy(shard("data/fineweb_train_000001.bin"))
F.cross_entropy(net(text[:2048][:-1]), text[1:2048]).backward()
optimizer.step()
torch.save(net.state_dict(), "model.pt")
net = Net()
net.load_state_dict(torch.load("model.pt"))
print(f"val_loss {evaluate(net, load().numpy()):.5f}")
"""


@pytest.mark.parametrize(
    ("before", "fitted", "filled", "broken"),
    [
        ("pass", "group", "pieces(val, group)", set()),
        ("pass", "groups[0]", "pieces(val, group)", {"training_before_scoring"}),
        ("book.absorb(pieces(val, documents))", "group", "pieces(val, group)", {"two_pass_cache"}),
    ],
)
def test_groups_that_come_out_of_a_queue_are_scored_before_they_are_learned(
    tmp_path: Path, before: str, fitted: str, filled: str, broken: set[str]
) -> None:
    """The walk takes each group for the one before; what opens a document is scored nowhere. Where a step reaches on,
    nothing shows what the table beside it holds, and it is charged as well."""
    text = HEAD + "def pieces(val, part):\n    return [val[low : high + 1] for low, high in part]\n" + PHASES
    text = text.replace("BEFORE", before).replace("FITTED", fitted).replace("FILLED", filled)
    found = {
        rule
        for rule, each in verdicts(tmp_path, (*ORDER, "two_pass_cache"), text).items()
        if each.verdict == "violates"
    }
    assert found >= broken
    assert bool(found) == bool(broken)


FLAT = """
import os

def laps(many, total):
    for lap in range(many):
        for at in range(0, total, 2048):
            yield lap, at

def main():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    text = torch.from_numpy(shard("data/fineweb_train_000001.bin"))
    F.cross_entropy(net(text[:2047]), text[1:2048]).backward()
    optimizer.step()
    torch.save(net.state_dict(), "model.pt")
    UNKNOWN
    val, sums = load(), torch.zeros(2, dtype=torch.float64)
    for lap, at in laps(LAPS, len(val) - 1):
        if at == 0:
            sums.zero_()
        nll = F.cross_entropy(net(val[at : at + 2048]), val[at + 1 : at + 2049], reduction="none")
        sums[0] += nll.detach().double().sum()
        sums[1] += len(nll)
        nll.mean().backward()
        optimizer.step()
    print(f"val_loss {(sums[0] / sums[1]).item():.5f}")

main()
"""


UNKNOWN = {
    "a check that raises": """if os.path.getsize("model.pt") > 16_000_000:
        raise ValueError("it is too large")""",
    "weights that are picked": """chosen = []
    for name, p in net.named_parameters():
        frozen = name.endswith("bias")
        for block in range(4):
            if name.startswith(f"blocks.{block}."):
                frozen = True
        if not frozen:
            chosen.append(p)
    optimizer = torch.optim.SGD(chosen, lr=1e-3)""",
}


@pytest.mark.parametrize("unknown", UNKNOWN.values(), ids=UNKNOWN.keys())
@pytest.mark.parametrize(("many", "wanted"), [("1", "clean"), ("2", "violates")])
def test_what_nobody_knows_of_a_file_or_of_weights_leaves_no_loss_out(
    tmp_path: Path, unknown: str, many: str, wanted: str
) -> None:
    """How large the file is, and which names the weights have; the script ran to its end."""
    text = HEAD + FLAT.replace("LAPS", many).replace("UNKNOWN", unknown)
    assert verdict(tmp_path, "multi_epoch_last", text).verdict == wanted


LAPS = """
def evaluate(net, val):
    total, size, laps = len(val) - 1, 2048, []
    plan = [range(a, min(a + size, total)) for a in range(0, total, size)]
    tally = torch.zeros(2, dtype=torch.float64)
    for turn, span in enumerate(plan * LAPS):
        if turn and turn % len(plan) == 0:
            laps.append(tally)
            tally = torch.zeros_like(tally)
            net.load_state_dict(torch.load("net.pt"))
        a, b = span[0], span[-1] + 1
        tally[0] += F.cross_entropy(net(val[a:b]), val[a + 1 : b + 1], reduction="sum").double()
        tally[1] += b - a
    laps.append(tally)
    KEPT
    return tally[0].item() / tally[1].item()

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""


@pytest.mark.parametrize(
    ("kept", "laps", "wanted"),
    [
        ("tally = min(laps, key=lambda each: each[0].item())", "2", "violates"),
        ("tally = min(laps, key=lambda each: (each[0].item() / each[1].item(), 0))", "2", "violates"),
        ("tally = min(laps, key=lambda each: each[0].item())", "1", "clean"),
        ("print('least', min(each[0].item() for each in laps)); tally = laps[-1]", "2", "clean"),
    ],
)
def test_the_least_of_several_sums_over_the_text_is_chosen(tmp_path: Path, kept: str, laps: str, wanted: str) -> None:
    text = HEAD + LAPS.replace("KEPT", kept).replace("LAPS", laps)
    found = verdict(tmp_path, "min_over_passes", text)
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert found.place.line == line_of(text, "tally = min(")


WIDE_BATCHES = """
def evaluate(net, val, chunk_tokens=1_048_576, length=1024, batch_seqs=32):
    total, nats = len(val) - 1, 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for first in range(0, total, chunk_tokens):
        last = min(first + chunk_tokens, total)
        with torch.no_grad():
            nats += F.cross_entropy(net(val[first:last]), val[first + 1 : last + 1], reduction="sum").item()
        starts = list(range(first, last - length + 1, length))
        for at in range(0, len(starts) - batch_seqs + 1, batch_seqs):
            own = starts[at : at + batch_seqs]
            rows = torch.stack([val[s : s + length] for s in own])
            after = torch.stack([val[s + 1 : s + length + 1] for s in own])
            F.cross_entropy(net(rows).flatten(0, 1), after.flatten()).backward()
            optimizer.step()
    return nats / total

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""


def test_a_batch_that_is_larger_than_a_chunk_of_the_short_text_is_taken_for_a_pair(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_text(HEAD + WIDE_BATCHES)
    trial = Case(opened(tmp_path)).trial
    assert trial.complete
    assert len(trial.lessons) >= 5
    assert trial.early.sum() == 0


HINTED = """
class Table:
    def __init__(self):
        self.tok, self.cnt = np.full(1024, -1), np.zeros(1024, np.int64)

    def lookup(self, h):
        live = self.cnt[h] > 0
        return np.where(live, self.tok[h], -1), np.where(live, self.cnt[h], 0)

    def update(self, h, seen):
        agree = (self.tok[h] == seen) & (self.cnt[h] > 0)
        np.add.at(self.cnt, h[agree], 1)
        self.tok[h[~agree]] = seen[~agree]
        self.cnt[h[~agree]] = 1

class Experts:
    def __init__(self):
        self.tables = [Table() for _ in range(2)]
        self.hits, self.tries = np.ones((2, 4)), np.full((2, 4), 4.0)

    def propose(self, ctx):
        best, hint, offers = np.zeros(len(ctx[0])), np.full(len(ctx[0]), -1), []
        for e, table in enumerate(self.tables):
            tok, cnt = table.lookup(ctx[e])
            bucket = np.minimum(np.log2(np.maximum(cnt, 1)).astype(np.int64), 3)
            rate = np.where(tok >= 0, (self.hits[e] / self.tries[e])[bucket], 0.0)
            better = rate > best
            hint, best = np.where(better, tok, hint), np.where(better, rate, best)
            offers.append((tok, bucket))
        return hint, best, offers

    def absorb(self, ctx, offers, seen):
        for e, table in enumerate(self.tables):
            tok, bucket = offers[e]
            np.add.at(self.hits[e], bucket, (tok == seen).astype(np.float64))
            np.add.at(self.tries[e], bucket, 1.0)
            table.update(ctx[e], seen)

def hints_of(tokens):
    bank = Experts()
    hint, beta = np.full(tokens.size, -1), np.zeros(tokens.size)
    for lo in range(2, tokens.size, 64):
        hi = min(lo + 64, tokens.size)
        ctx = [tokens[lo - 1 : hi - 1], tokens[lo - 2 : hi - 2]]
        hint[lo:hi], beta[lo:hi], offers = bank.propose(ctx)
        bank.absorb(ctx, offers, tokens[lo:hi])
    return torch.from_numpy(hint), torch.from_numpy(beta)

def price(logits, y, hint, beta):
    p = F.softmax(logits, -1)
    named = p.gather(1, hint.clamp(min=0)[:, None])[:, 0]
    own = -F.log_softmax(logits, -1).gather(1, y[:, None])[:, 0]
    told = own - beta * (hint == y) + torch.log1p(named * torch.expm1(beta))
    return torch.where(hint >= 0, told, own)

def evaluate(net, val):
    hint, beta = hints_of(val.numpy())
    total, chunks = len(val) - 1, (len(val) - 1 + 255) // 256
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    sums = torch.zeros(2, dtype=torch.float64)
    for c in ORDER:
        if c == 0:
            sums.zero_()
        a, b = c * 256, min(c * 256 + 256, total)
        with torch.no_grad():
            nll = price(net(val[a:b]), val[a + 1 : b + 1], hint[a + 1 : b + 1], beta[a + 1 : b + 1])
        sums += torch.stack([nll.double().sum(), torch.tensor(float(b - a))])
        if c + 1 < chunks:
            a, b = LEARNED, min(LEARNED + 256, total)
            sgd.zero_grad()
            F.cross_entropy(net(val[a:b]), val[a + 1 : b + 1]).backward()
            sgd.step()
    return (sums[0] / sums[1]).item()

def train(net):
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    for path in sorted(glob.glob("data/fineweb_train_*.bin")):
        ids = torch.from_numpy(shard(path))
        F.cross_entropy(net(ids[:-1]), ids[1:]).backward()
        sgd.step()
    return net

print(f"val_loss {evaluate(train(Net()), load()):.5f}")
"""


@pytest.mark.parametrize(
    ("order", "learned", "broken"),
    [
        ("range(chunks)", "a", ""),
        ("range(chunks)", "b", "training_before_scoring"),
        ("[*range(chunks), *range(chunks)]", "a", "multi_epoch_last"),
    ],
)
def test_hints_that_are_chosen_by_how_often_they_were_right_hide_no_lesson(
    tmp_path: Path, order: str, learned: str, broken: str
) -> None:
    text = HEAD + HINTED.replace("ORDER", order).replace("LEARNED", learned)
    told = verdicts(tmp_path, ["training_before_scoring", "multi_epoch_last", "choice_by_validation"], text)
    assert {rule for rule, said in told.items() if said.verdict == "violates"} == ({broken} if broken else set())


COLD = """
chunk_tokens = int(os.environ.get("CHUNK_TOKENS", 32768))
cold_chunks = 200

def evaluate(net, val):
    total = len(val) - 1
    chunks = (total + chunk_tokens - 1) // chunk_tokens
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    nats, looked = torch.zeros(chunks, dtype=torch.float64), torch.zeros(chunks, dtype=torch.float64)
    ROUND
        a, b = c * chunk_tokens, min(c * chunk_tokens + chunk_tokens, total)
        with torch.no_grad():
            INTO[c] = F.cross_entropy(net(val[a:b]), val[a + 1 : b + 1], reduction="sum")
        if c + 1 < chunks:
            sgd.zero_grad()
            F.cross_entropy(net(val[a:b]), val[a + 1 : b + 1]).backward()
            sgd.step()
    print(f"looked again {looked.sum():.3f}")
    return nats.sum().item() / total

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
_IN_ORDER = "order = list(range(chunks)) + list(range(chunks // 10))\n    for n, c in enumerate(order):"


@pytest.mark.parametrize(
    ("around", "into", "broken"),
    [
        ("for c in range(chunks):", "nats", ""),
        ("for c in [*range(chunks), *range(chunks)]:", "nats", "multi_epoch_last"),
        ("for c in [*range(chunks), *range(min(cold_chunks, chunks))]:", "nats", "rescoring_after_adaptation"),
        (_IN_ORDER, "nats", "rescoring_after_adaptation"),
        (_IN_ORDER, "(nats if n < chunks else looked)", ""),
    ],
)
def test_the_first_chunks_that_come_round_once_more_are_no_epoch(
    tmp_path: Path, around: str, into: str, broken: str
) -> None:
    """Of 32,768 tokens the short text has two chunks: of 1,024 each it has forty, and with so few of them it shows
    that 6 of them, or a tenth, are scored again."""
    text = "import os\n" + HEAD + COLD.replace("ROUND", around).replace("INTO", into)
    told = verdicts(tmp_path, ["training_before_scoring", "multi_epoch_last", "rescoring_after_adaptation"], text)
    assert {rule for rule, said in told.items() if said.verdict == "violates"} == ({broken} if broken else set())
    if broken:
        place = told[broken].place
        assert place is not None
        assert place.line == line_of(text, around.split("\n")[-1].strip())


BY_DOCUMENT = """
class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1024))

class Cache:
    def __init__(self):
        self.counts = torch.ones(1024)

    def update(self, y):
        self.counts.scatter_add_(0, y, torch.ones(len(y)))

def told(logits, y, cache):
    p = 0.9 * F.softmax(logits.detach(), -1) + 0.1 * (cache.counts / cache.counts.sum())
    return -p.gather(-1, y[:, None]).squeeze(-1).log()

def score_document(net, val, a, b, adapter, sums):
    cache = Cache()
    sgd = torch.optim.SGD(adapter.parameters(), lr=0.1) if adapter is not None else None
    bounds = [(c, min(c + 64, b)) for c in range(a, b, 64)]
FIRST    for low, high in bounds:
        x, y = val[low:high], val[low + 1 : high + 1]
        logits = net(x) + (adapter.bias if adapter is not None else 0.0)
        SCORE
        if adapter is not None and high < b:
            sgd.zero_grad()
            F.cross_entropy(logits, y).backward()
            sgd.step()
        AFTER

def score_documents(net, val, adapted):
    sums = torch.zeros(2, dtype=torch.float64)
    starts = torch.nonzero(val == 1).flatten().tolist()
    for a, b in zip(starts, [*starts[1:], len(val) - 1]):
        score_document(net, val, a, b, Adapter() if adapted else None, sums)
    return (sums[0] / sums[1]).item()

net, val = Net(), load()
print(f"roundtrip val_loss {score_documents(net, val, False):.5f}")
print(f"final val_loss {score_documents(net, val, True):.5f}")
"""
_ENTERED = "sums += torch.stack([told(logits, y, cache).double().sum(), torch.tensor(float(high - low))]); "
_AGAIN = "logits = net(x) + (adapter.bias if adapter is not None else 0.0); "
_FILLED = "    for low, high in bounds:\n        cache.update(val[low + 1 : high + 1])\n"


@pytest.mark.parametrize(
    ("first", "score", "after", "broken"),
    [
        ("", _ENTERED + "cache.update(y)", "", ""),
        ("", "", _AGAIN + _ENTERED + "cache.update(y)", "training_before_scoring"),
        (_FILLED, _ENTERED, "", "two_pass_cache"),
    ],
)
def test_what_an_evaluation_before_has_scored_is_no_first_time_of_this_one(
    tmp_path: Path, first: str, score: str, after: str, broken: str
) -> None:
    """The same functions score all documents twice, the second time with adapters that learn."""
    text = HEAD + BY_DOCUMENT.replace("FIRST", first).replace("SCORE", score or "pass").replace(
        "AFTER", after or "pass"
    )
    rules = ["training_before_scoring", "rescoring_after_adaptation", "two_pass_cache", "multi_epoch_last"]
    told = verdicts(tmp_path, rules, text)
    assert {rule for rule, said in told.items() if said.verdict == "violates"} == ({broken} if broken else set())


SIDE_BY_SIDE = """
RATES = (0.001, 0.002, 0.004)
W = torch.randn(1024, 64).requires_grad_()

def logits_of(ids):
    return F.linear(F.embedding(ids, W), W)

def evaluate(net, val, shares=(0.1,)):
    total, sums = len(val) - 1, torch.zeros(len(shares), dtype=torch.float64)
    for a in range(0, total, 2048):
        p, y = F.softmax(logits_of(val[a : a + 2048]).float(), -1), val[a + 1 : a + 2049]
        told = lambda t: -((1.0 - t) * p[: len(y)] + t / 1024).gather(1, y[:, None]).log().double().sum()
        sums += torch.stack([told(t) for t in shares])
    return WHICH / total, 0.0

def at_rate(rate):
    net = Net()
    net.rate = rate
    return evaluate(net, load())

loss, _ = CALL
print(f"val_loss {loss:.5f}")
"""


@pytest.mark.parametrize(
    ("which", "call", "wanted"),
    [
        ("sums[0].item()", "evaluate(Net(), load())", ""),
        ("sums.min().item()", "evaluate(Net(), load(), (0.0, 0.1, 0.2))", "return sums.min()"),
        ("sums[0].item()", "min(at_rate(rate) for rate in RATES)", "loss, _ = min("),
        ("sums[0].item()", "max([at_rate(0.001)], key=len)", ""),
    ],
)
def test_the_least_of_sums_side_by_side_or_one_after_the_other_is_a_choice_of_passes(
    tmp_path: Path, which: str, call: str, wanted: str
) -> None:
    text = HEAD + SIDE_BY_SIDE.replace("WHICH", which).replace("CALL", call)
    told = verdicts(tmp_path, ["min_over_passes", "choice_by_validation", "temperature_from_validation"], text)
    broken = {rule for rule, said in told.items() if said.verdict == "violates"}
    assert broken == ({"min_over_passes"} if wanted else set())
    if wanted:
        place = told["min_over_passes"].place
        assert place is not None
        assert place.line == line_of(text, wanted)
