"""A trial: the script's own arithmetic over a short text. Counts are exact, lessons are seen in their order, what the
trial does not know it does not claim, and no text makes it run for ever."""

import ast
import gc
import itertools
import math
import time

import numpy as np
import pytest

from fairway.audit.reading.script import Script
from fairway.audit.settings import Settings
from fairway.audit.trial import Trial, run
from fairway.audit.trial.arrays import Array, TooLarge
from fairway.audit.trial.drawing import Draws
from fairway.audit.trial.files import count_of
from fairway.audit.trial.machine import Machine
from fairway.audit.trial.reducing import by_numpy, elementwise, reduction
from fairway.audit.trial.scattering import scatter_reduce
from fairway.audit.trial.sums import LATE, Sum
from fairway.audit.trial.tensors import METHODS
from fairway.audit.trial.text import BOS, FEWER, LENGTH, TRAIN, UNIT, length, tokens
from fairway.audit.trial.turns import Turns
from fairway.audit.trial.values import Unknown
from fairway.audit.trial.vocabulary import Processor, octets

HEAD = """
import collections, contextlib, dataclasses, functools, glob, itertools, math, queue, threading
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1024, 64)
        self.blocks = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])

    def logits(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        return F.linear(x, self.table.weight)

    def forward(self, ids, targets, reduction="mean"):
        logits = self.logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction=reduction)

def load(pattern):
    parts = []
    for path in sorted(glob.glob(pattern)):
        header = np.fromfile(path, dtype="<i4", count=256)
        ids = np.fromfile(path, dtype="<u2", count=int(header[2]), offset=1024)
        parts.append(torch.from_numpy(ids.astype(np.int64)))
    return torch.cat(parts)

val = load("data/fineweb_val_*.bin")
total = val.numel() - 1
net = Net()
"""

ALL = {0.0: 1, 1.0: LENGTH - 1}  # the first token is no target


def tried(body: str) -> Trial:
    text = HEAD + body
    return run(Script("train_gpt.py", text, ast.parse(text)), Settings())


def counts(body: str) -> dict[float, int]:
    """How many places of the text count how often in the last number that is told."""
    trial = tried(body)
    assert trial.complete, trial.why
    assert trial.told
    times, _ = trial.counts(trial.told[-1])
    values, numbers = np.unique(np.round(times, 6), return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist(), strict=True))


ROWS = """
nats = torch.zeros((), dtype=torch.float64)
count = 0
for row in range(0, total // 2048, 8):
    part = val[row * 2048 : (row + 8) * 2048 + 1]
    x, y = part[:-1].reshape(-1, 2048), part[1:].reshape(-1, 2048)
    nats += net(x, y).double() * y.numel()
    count += y.numel()
print(f"val_loss:{(nats / count).item():.4f}")
"""

SLIDE = """
nats = 0.0
for start in range(0, total - 2048 + 64, 64):
    end = start + 2048
    x = val[start:end].unsqueeze(0)
    nll = F.cross_entropy(net.logits(x)[0], val[start + 1 : end + 1], reduction="none")
    first = 0 if start == 0 else 2048 - STEP
    nats += nll[first:].sum().item()
print("val_loss", nats / total)
"""

BATCHED = """
starts = list(range(0, total, 512))
sums = torch.zeros(2)
for at in range(0, len(starts), 16):
    batch = starts[at : at + 16]
    x = torch.zeros(len(batch), 2048, dtype=torch.int64)
    y = torch.zeros(len(batch), 2048, dtype=torch.int64)
    keep = torch.zeros(len(batch), 2048, dtype=torch.bool)
    for i, start in enumerate(batch):
        low = max(0, start + 512 - 2048)
        n = start + 512 - low
        x[i, :n] = val[low : low + n]
        y[i, :n] = val[low + 1 : low + n + 1]
        keep[i, n - 512 : n] = True
    logp = F.log_softmax(net.logits(x), dim=-1)
    nll = -logp.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    sums[0] += nll[keep].sum()
    sums[1] += keep.sum()
print(f"{sums[0] / sums[1]}")
"""

FIELDS = """
@dataclasses.dataclass
class Part:
    chunk: int = 4096

@dataclasses.dataclass
class Config:
    part: Part = dataclasses.field(default_factory=Part)
    stride: int = 1024

given = {each.name: each.default for each in dataclasses.fields(Config) if each.default is not dataclasses.MISSING}
made = {each.name: each.default_factory() for each in dataclasses.fields(Config()) if each.name not in given}
nats = count = 0.0
for low in range(0, total, made["part"].chunk):
    for at in range(low, min(low + made["part"].chunk, total), given["stride"]):
        nats += net(val[at : at + 1024], val[at + 1 : at + 1025], reduction="sum")
        count += 1024
print(f"{nats / count}")
"""


def test_fields_of_a_dataclass_have_names_defaults_and_makers() -> None:
    trial = tried(FIELDS)
    counts, _ = trial.counts(trial.told[-1])
    assert dict(zip(*np.unique(counts, return_counts=True), strict=True)) == ALL


def test_what_nobody_knows_is_not_one_and_the_same() -> None:
    """`id()` of two parameters that a trial knows nothing of: whether one is the other is not decided."""
    picked = """
other = {id(p) for p in net.blocks[0].parameters()}
rest = [p for p in net.parameters() if id(p) not in other]
nats = count = 0.0
if rest:
    for at in range(0, total, 1024):
        nats += net(val[at : at + 1024], val[at + 1 : at + 1025], reduction="sum")
        count += 1024
print(f"{nats / count}")
"""
    trial = tried(picked)
    assert trial.told
    counts, _ = trial.counts(trial.told[-1])
    assert dict(zip(*np.unique(counts, return_counts=True), strict=True)) == ALL


TALLIED = """
class Tally:
    def __init__(self):
        self.sums = torch.zeros(3, dtype=torch.float64)
    def add(self, nats, sizes):
        self.sums[0] += nats.double().sum()
        self.sums[1] += nats.numel()
        self.sums[2] += sizes.sum()
    def __iadd__(self, other):
        self.sums += other.sums
        return self

whole = Tally()
for low in range(0, total, 8192):
    part = Tally()
    for at in range(low, min(low + 8192, total), 1024):
        part.add(net(val[at : at + 1024], val[at + 1 : at + 1025], reduction="none"), torch.ones(1024))
    whole += part
print(f"{whole.sums[0] / whole.sums[1]}")
"""


def test_sums_in_a_tensor_are_added_to_those_of_another() -> None:
    """Each element that a sum is put into is the sum itself, and no array of no dimension around it."""
    trial = tried(TALLIED)
    counts, _ = trial.counts(trial.told[-1])
    assert dict(zip(*np.unique(counts, return_counts=True), strict=True)) == ALL


DOCUMENTS = """
edges = (val == 1).nonzero().flatten().tolist() + [val.numel()]
book = collections.defaultdict(float)
for low, high in sorted(zip(edges, edges[1:]), key=lambda pair: pair[1] - pair[0]):
    high = min(high + 1, val.numel())
    nll = net(val[low : high - 1], val[low + 1 : high], reduction="none")
    book[low] += nll.sum().item()
print("%.4f" % (sum(book.values()) / total))
"""


def test_rows_side_by_side_count_every_target_once() -> None:
    assert counts(ROWS) == ALL


@pytest.mark.parametrize(
    "folded",
    [
        "fold[val]",
        "torch.from_numpy(np.take(fold.numpy(), val))",
        "fold.index_select(0, val)",
        "fold[val.long()].int()",
    ],
)
def test_tokens_that_a_map_of_tokens_gave_are_where_they_were(folded: str) -> None:
    made = "fold = torch.arange(1024)\nfold[300:400] = 600\nval = FOLDED\n".replace("FOLDED", folded)
    assert counts(made + ROWS) == ALL


def test_what_a_table_of_other_numbers_gives_for_tokens_is_no_token() -> None:
    trial = tried("val = torch.where(torch.arange(1024) < 500, 3, 4)[val]\n" + ROWS)
    assert not any(trial.counts(told)[0].any() for told in trial.told)


FUNCTIONAL = """
def new_weights():
    w = {}
    for layer in range(24):
        made = torch.empty(1024, 1024)
        FILL
        w[f"L{layer}"] = made
    w["embed"] = torch.randn(1024, 1024) * 0.005
    return w

def clones(w):
    return {name: value.detach().clone() for name, value in w.items()}

w = clones(clones(clones(clones(clones(new_weights())))))
w = clones(clones(clones(clones(clones(w)))))
w = clones(clones(clones(clones(clones(w)))))
w = clones(clones(clones(clones(clones(w)))))

class Functional:
    def logits(self, ids):
        x = F.embedding(ids, w["embed"])
        for layer in range(24):
            x = x + F.linear(x, w[f"L{layer}"])
        return F.linear(x, w["embed"])

    def __call__(self, ids, targets):
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())

net = Functional()
"""


@pytest.mark.parametrize(
    "fill",
    [
        "torch.nn.init.orthogonal_(made, gain=0.5)",
        "nn.init.trunc_normal_(made, std=0.02)",
        "made.normal_(0.0, 0.02)",
        "made.uniform_(-0.1, 0.1)",
    ],
)
def test_weights_of_no_class_that_are_filled_with_noise_are_not_known(fill: str) -> None:
    """24 matrices of 1,024 by 1,024, copied 20 times, would be 252,000 steps of a trial's 250,000."""
    assert counts(FUNCTIONAL.replace("FILL", fill) + ROWS) == ALL


def test_windows_that_pay_for_their_last_stride_count_every_target_once() -> None:
    assert counts(SLIDE.replace("STEP", "64")) == ALL


def test_windows_that_pay_for_more_than_their_stride_count_targets_twice() -> None:
    found = counts(SLIDE.replace("STEP", "96"))
    assert found[2.0] > LENGTH // 3
    assert found[1.0] > LENGTH // 3


BYTEWISE = """
nats = 0.0
for row in range(0, total // 2048, 8):
    part = val[row * 2048 : (row + 8) * 2048 + 1]
    x, y = part[:-1].reshape(-1, 2048), part[1:].reshape(-1, 2048)
    nll = -F.log_softmax(net.logits(x), dim=-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).reshape(-1)
    width = torch.arange(1024)[y.reshape(-1)] % 3
    owner = torch.repeat_interleave(torch.arange(nll.numel()), width)
    spread = torch.exp(-nll / width.clamp_min(1))
    bytewise = torch.zeros_like(spread).index_add_(0, OWNER, -torch.log(spread[owner] + 0.1))
    nats += torch.where(width > 0, bytewise, nll).sum().item()
print("val_loss", nats / total)
"""


def test_a_loss_that_is_parted_byte_by_byte_and_summed_again_is_that_of_its_target() -> None:
    assert counts(BYTEWISE.replace("OWNER", "owner")) == ALL


def test_a_blend_of_losses_before_and_after_a_step_is_of_one_target() -> None:
    trial = tried("""
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
nats = 0.0
for at in range(0, total - 1, 1024):
    x, y = val[at : at + 1024], val[at + 1 : at + 1025]
    x = x[: len(y)]
    before = F.cross_entropy(net.logits(x), y, reduction="none")
    before.mean().backward()
    optimizer.step()
    nats += (0.5 * before + 0.5 * F.cross_entropy(net.logits(x), y, reduction="none")).sum().item()
print("val_loss", nats / total)
""")
    times, late = trial.counts(trial.told[-1])
    assert (times[1:] == 1).sum() == (late[1:] > 0).sum() > LENGTH - 1024


AMENDED = """
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
nats = torch.zeros((), dtype=torch.float64)
for at in range(0, total - 1, 1024):
    x, y = val[at : at + 1024], val[at + 1 : at + 1025]
    x = x[: len(y)]
    before = F.cross_entropy(net.logits(x), y, reduction="none")
    nats += before.double().sum()
    before.mean().backward()
    optimizer.step()
    after = F.cross_entropy(net.logits(x), y, reduction="none")
    AMEND
print("val_loss", (nats / total).item())
"""


@pytest.mark.parametrize(
    "amend",
    [
        "nats += ((after - before) * (y > 3)).double().sum() + ((after - before) * (y <= 3)).double().sum()",
        "nats += (after - before).double().sum()",
        "nats += after.double().sum() - before.double().sum()",
        "nats -= before.double().sum(); nats += after.double().sum()",
        "for each, sign in ((before, -1.0), (after, 1.0)): nats += sign * each.double().sum()",
    ],
)
def test_losses_that_are_taken_from_a_sum_and_put_in_anew_count_once_and_late(amend: str) -> None:
    trial = tried(AMENDED.replace("AMEND", amend))
    times, late = trial.counts(trial.told[-1])
    assert (times[1:] == 1).all()
    assert (late[1:] == 1).all()


def test_losses_that_are_only_told_beside_a_sum_amend_nothing() -> None:
    trial = tried(AMENDED.replace("AMEND", 'print("gain", (before - after).sum().item())'))
    times, late = trial.counts(trial.told[-1])
    assert (times[1:] == 1).all()
    assert not late.any()


def test_parts_that_are_added_to_another_target_are_not() -> None:
    assert counts(BYTEWISE.replace("OWNER", "owner // 2")) != ALL


def test_masks_and_gathered_losses_in_padded_batches_are_counted() -> None:
    assert counts(BATCHED) == ALL


def test_a_mask_that_is_wider_than_the_stride_shows() -> None:
    assert counts(BATCHED.replace("keep[i, n - 512 : n]", "keep[i, max(n - 700, 0) : n]"))[2.0] > LENGTH // 8


def test_documents_sorted_by_length_are_followed_by_place() -> None:
    assert counts(DOCUMENTS) == ALL


def test_a_part_of_the_documents_leaves_the_rest_at_nothing() -> None:
    found = counts(DOCUMENTS.replace("for low, high in sorted(", "for low, high in list(sorted(").replace(
        "pair[1] - pair[0]):", "pair[1] - pair[0]))[::2]:"))  # fmt: skip
    assert found[0.0] > LENGTH // 3


def test_mixtures_keep_the_target_that_they_are_of() -> None:
    mixed = """
nats = 0.0
for at in range(0, total, 2048):
    x, y = val[at : at + 2048], val[at + 1 : at + 2049]
    p = F.softmax(net.logits(x), -1)[torch.arange(2048), y]
    q = torch.softmax(net.logits(x) / 2, -1).gather(-1, y[:, None]).squeeze(-1)
    nats += -torch.log(0.5 * p + 0.5 * q).sum()
print(nats.item())
"""
    assert counts(mixed) == ALL


def test_two_parts_of_a_mixture_whose_share_nobody_knows_are_one_loss() -> None:
    """(1 - share) * p + share * q, each read at the target before they are added; what is added without is two. A
    factor of all losses would be a unit."""
    mixed = """
nats, share = 0.0, torch.load("share.pt")
for at in range(0, total, 2048):
    x, y = val[at : at + 2048], val[at + 1 : at + 2049]
    p = F.softmax(net.logits(x), -1)[torch.arange(2048), y]
    q = torch.softmax(net.logits(x) / 2, -1).gather(-1, y[:, None]).squeeze(-1)
    nats += -((1 - share) * p + share * q if at >= 8192 else p).log().sum()
print(nats.item())
"""
    assert counts(mixed) == ALL
    assert counts(mixed.replace("(1 - share) * p + share * q", "p + q")) != ALL


def test_rows_that_are_divided_by_a_number_for_each_are_rows_still() -> None:
    """A hint is raised and the row divided by what it comes to then: read at the target, it is its loss, whatever the
    places of the hint are."""
    tilted = """
nats, hint = 0.0, torch.full((1024,), -1)
for at in range(0, total, 2048):
    x, y = val[at : at + 2048], val[at + 1 : at + 2049]
    rows = F.softmax(net.logits(x), -1)
    said = hint[x][:, None].clamp(min=0)
    q, weight = rows.gather(1, said), torch.load("weight.pt")
    rows = rows.scatter(1, said, q * weight) / (1 - q + q * weight)
    nats += -rows.log().gather(1, y[:, None])[:, 0].sum()
    hint[x] = y
print(nats.item())
"""
    assert counts(tilted) == ALL


LANGUAGE = {
    "a generator that yields windows": """
def windows():
    at = 0
    while at < total:
        yield at, min(at + 2048, total)
        at += 2048
for low, high in windows():
    book(low, high)
""",
    "a context manager of a generator, and a class": """
@contextlib.contextmanager
def quiet(model):
    model.eval()
    try:
        yield model
    finally:
        model.train()
class Guard:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        return False
with quiet(net) as model, Guard():
    for low in range(0, total, 2048):
        book(low, low + 2048)
""",
    "dataclasses, properties and sorting": """
@dataclasses.dataclass(frozen=True)
class Window:
    low: int
    high: int = dataclasses.field(default=0)
    @property
    def span(self):
        return slice(self.low, self.high)
found = sorted([Window(at, at + 2048) for at in range(0, total, 2048)], key=lambda w: -w.low)
for w in found:
    book(w.span.start, w.span.stop)
""",
    "a queue that a thread fills": """
waiting = queue.Queue(4)
def fill():
    for at in range(0, total, 2048):
        waiting.put((at, at + 2048))
    waiting.put(None)
threading.Thread(target=fill, daemon=True).start()
while (item := waiting.get()) is not None:
    book(*item)
""",
    "partial functions, closures, comprehensions and unpacking": """
pay = functools.partial(book)
for low, *rest in [(at, 1, at + 2048) for at in range(0, total, 2048)]:
    (lambda high: pay(low, high))(rest[-1])
""",
    "a captured graph that is replayed over buffers": """
class Captured:
    def __init__(self, act):
        self.x, self.y = torch.zeros(2048, dtype=torch.int64), torch.zeros(2048, dtype=torch.int64)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = act(self.x, self.y)
    def __call__(self, x, y):
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.out.clone()
captured = Captured(functools.partial(net, reduction="none"))
for at in range(0, total, 2048):
    nats[0] += captured(val[at : at + 2048], val[at + 1 : at + 2049]).sum()
""",
    "groups of windows": """
for _, group in itertools.groupby(range(0, total, 2048), key=lambda at: at // 8192):
    for at in group:
        book(at, at + 2048)
""",
    "a loader over a data set, put together by hand": """
class Windows(torch.utils.data.Dataset):
    def __len__(self):
        return (total + 2047) // 2048
    def __getitem__(self, n):
        return n * 2048, min(n * 2048 + 2048, total)
def together(rows):
    return [low for low, _ in rows], [high for _, high in rows]
for lows, highs in torch.utils.data.DataLoader(Windows(), batch_size=4, shuffle=False, collate_fn=together):
    for low, high in zip(lows, highs):
        book(low, high)
""",
    "a loader that puts rows together by itself, and one of a rank": """
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
class Ends(Dataset):
    def __init__(self, many):
        self.many = many
    def __len__(self):
        return self.many
    def __getitem__(self, n):
        return {"low": n * 2048}
mine = DistributedSampler(Ends(total // 2048), num_replicas=1, rank=0, shuffle=False)
for batch in DataLoader(Ends(total // 2048), batch_size=3, sampler=mine):
    for low in batch["low"].tolist():
        book(low, low + 2048)
assert [a.tolist() for a, in DataLoader(TensorDataset(torch.arange(5)), 2, drop_last=True)] == [[0, 1], [2, 3]]
""",
    "settings in a text, results in files that one of the ranks merges": """
import json, tempfile
from pathlib import Path
size = json.loads('{"eval": {"window": 2048}}')["eval"]["window"]
folder = Path(tempfile.mkdtemp(prefix="x")) / "final"
for n, at in enumerate(range(0, total, 4 * size)):
    np.savez(folder / f"rank{n:03d}.npz", ends=np.arange(at, min(at + 4 * size, total), size))
for path in sorted(folder.glob("rank*.npz")):
    with np.load(path) as kept:
        for at in kept["ends"].tolist():
            book(at, at + size)
""",
    "batches, and what is taken or dropped by a condition": """
def later(at):
    return at < total
for batch in itertools.batched(itertools.takewhile(later, itertools.count(0, 2048)), 3):
    for at, end in itertools.dropwhile(lambda each: each[0] < 0, [(-1, 0), *((at, at + 2048) for at in batch)]):
        for low in itertools.filterfalse(lambda each: each < 0, [at]):
            list(itertools.starmap(book, [(low, end)]))
""",
    "errors that are caught": """
try:
    import flash_attn_3
    raise ImportError("none")
except (ImportError, OSError):
    pass
for at in itertools.count(0, 2048):
    try:
        if at >= total:
            raise KeyError(at)
        book(at, at + 2048)
    except LookupError:
        break
""",
}


@pytest.mark.parametrize("form", LANGUAGE)
def test_the_language_of_scripts_is_walked(form: str) -> None:
    book = """
nats = [0.0]
def book(low, high):
    global nats
    nats[0] += net(val[low:high], val[low + 1 : high + 1], reduction="sum")
"""
    assert counts(book + LANGUAGE[form] + "print(f'{nats[0] / total}')\n") == ALL


ONLINE = """
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
nats = 0.0
def learn(low, high):
    optimizer.zero_grad()
    net(val[low:high], val[low + 1 : high + 1]).backward()
    optimizer.step()
def score(low, high):
    global nats
    with torch.no_grad():
        nats += net(val[low:high], val[low + 1 : high + 1], reduction="none").sum().item()
for low in range(0, total, 8192):
    high = min(low + 8192, total)
    ORDER
print(f"val_loss {nats / total:.5f}")
"""


def late(order: str) -> int:
    trial = tried(ONLINE.replace("ORDER", order))
    assert trial.complete, trial.why
    return int((trial.counts(trial.told[-1])[1] > 0).sum())


def test_a_target_that_is_scored_before_anything_learns_from_it_is_not_late() -> None:
    assert late("score(low, high); learn(low, high)") == 0


def test_a_target_that_something_learned_from_first_is_late() -> None:
    assert late("learn(low, high); score(low, high)") == LENGTH - 1


def test_a_lesson_that_reaches_into_the_next_chunk_is_seen_by_that_much() -> None:
    found = late("score(low, high); learn(low, min(high + 512, total))")
    assert found == ((LENGTH - 1) // 8192 - 1) * 512  # the last chunk has no next


def test_a_lesson_knows_whether_its_targets_had_been_booked_before() -> None:
    first = tried(ONLINE.replace("ORDER", "learn(low, high); score(low, high)")).lessons
    again = tried(ONLINE.replace("ORDER", "score(low, high); learn(low, high); score(low, high)")).lessons
    assert all(lesson.early for lesson in first)
    assert not any(lesson.early for lesson in again)


def test_a_lesson_counts_the_targets_that_it_is_early_for() -> None:
    found = tried(ONLINE.replace("ORDER", "score(low, high); learn(low, min(high + 512, total))"))
    assert [lesson.early for lesson in found.lessons[:2]] == [512, 512]
    assert found.early.sum() == ((LENGTH - 1) // 8192 - 1) * 512


def test_what_is_learned_by_an_optimiser_of_its_own_may_be_gone() -> None:
    anew = "optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)"
    assert late(f"score(low, high); learn(low, min(high + 512, total)); {anew}") == 0
    assert late(f"{anew}; score(low, high); learn(low, min(high + 512, total))") == 0


def test_training_on_another_text_is_cut_short_and_is_no_lesson() -> None:
    training = """
train = load("data/fineweb_train_*.bin")
step = 0
while True:
    at = (step * 2048) % (train.numel() - 2049)
    net(train[at : at + 2048], train[at + 1 : at + 2049]).backward()
    step += 1
    if step == 1_000_000:
        break
"""
    trial = tried(training + ROWS)
    assert trial.complete
    assert not trial.lessons
    assert trial.steps < 5_000


@pytest.mark.parametrize(
    "endless",
    [
        "while True:\n    pass\n",
        "def again(n):\n    return again(n + 1)\nagain(0)\n",
        "x = [0] * 10**12\ny = 'a' * 10**12\nz = 9 ** 9 ** 9\nw = 1 << 10**10\n",
        "x = torch.zeros(10**6, 10**6)\ny = np.arange(10**15)\nz = f'{1:>999999999}'\n",
        "for _ in itertools.count():\n    for _ in itertools.repeat(1):\n        pass\n",
        "list(itertools.count())\n",
        "sum(itertools.repeat(1))\n",
        "sorted(itertools.cycle([1]))\n",
        "max(itertools.count())\n",
        "dict(zip(itertools.count(), itertools.count()))\n",
        "x, *y = itertools.count()\n",
        "print(*itertools.count())\n",
        "[*itertools.count()]\n",
        "''.join(str(n) for n in itertools.count())\n",
        "[].extend(n for n in itertools.count())\n",
        "collections.deque([1]).extend(itertools.count())\n",
        "all(itertools.repeat(True))\n",
        "next(n for n in itertools.count() if n < 0)\n",
        "torch.stack([torch.zeros(3) for n in itertools.count()])\n",
        "'{:999999999}'.format(1)\n",
        "'x'.ljust(10**10)\n",
        "a = []\na.append(a)\nprint(a, str(a), {1: a})\nfor x in a:\n    a.append(x)\n",
    ],
)
def test_no_script_makes_a_trial_run_for_ever(endless: str) -> None:
    began = time.process_time()
    tried(endless)
    assert time.process_time() - began < 20  # a bound on work: it ends by steps, within seconds


def test_what_is_unknown_leaves_no_count_behind() -> None:
    unread = ROWS.replace("net(x, y).double() * y.numel()", "strange.losses(net, x, y)")
    trial = tried("import strange\n" + unread)
    assert not any((trial.counts(told)[0] > 0).any() for told in trial.told)


def test_a_sum_that_is_mixed_with_itself_again_and_again_is_counted_once_for_each_part() -> None:
    """`w = w * 0.9 + w * 0.1` two hundred times: 2**200 ways to the one loss, whose weight stays one."""
    loss = one = Sum(np.array([3], np.int32), np.array([1.0]))
    for _ in range(200):
        one = one * 0.9 + one * 0.1
    total, _ = one.counts(5)
    assert total.tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0, 0.0])
    twice = loss + (loss + (loss + loss))
    assert twice.counts(5)[0].tolist() == [0.0, 0.0, 0.0, 4.0, 0.0]


def test_a_running_total_that_is_told_at_each_step_counts_what_a_single_count_does() -> None:
    """What was worked out for one step is taken for the next, also where a sum lies in it by two ways."""
    parts = [Sum(np.array([n % 50, 7], np.int32), np.array([1.0, 0.25])) for n in range(300)]
    total, wanted = parts[0], np.zeros(50)
    wanted[[0, 7]] = 1.0, 0.25
    for n, part in enumerate(parts[1:], 1):
        total = total + part if n % 100 else (total + total) * 0.5 - part
        np.add.at(wanted, [n % 50, 7], np.array([1.0, 0.25]) * (1 if n % 100 else -1))
        assert total.counts(50)[0].tolist() == pytest.approx(wanted.tolist())


def test_a_sum_of_sums_weighs_each_target_by_all_ways_that_lead_to_it() -> None:
    one = Sum(np.array([1, 2, 2], np.int32), np.array([1.0, 1.0, 1.0]))
    two = Sum(np.array([2, 3 + LATE], np.int32), np.array([0.5, 0.5]))
    total, after = ((one + two) * 2.0 + one.scaled(3.0) / 2.0).counts(5)
    assert total.tolist() == [0.0, 3.5, 8.0, 1.0, 0.0]
    assert after.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_the_bytes_of_tokens_are_those_of_the_decoded_documents() -> None:
    size = 1_024
    ids = tokens(size).copy()
    ids[(ids >= 131) & (ids < 259)] = 259  # bytes that are no characters by themselves
    pieces = Processor(size)
    edges = [*np.flatnonzero(ids == BOS).tolist(), LENGTH]
    decoded = sum(len(pieces.decode(ids[low:high].tolist()[1:]).encode()) for low, high in itertools.pairwise(edges))
    assert int(octets(ids, size).true.sum()) == decoded


def test_the_text_is_whole_windows_of_documents() -> None:
    ids = tokens(1_024)
    assert ids[0] == BOS
    assert (LENGTH - 1) % UNIT == 0
    assert (ids == BOS).sum() > 8


def test_it_is_known_how_often_each_target_was_summed_by_a_call() -> None:
    def most(order: str) -> int:
        trial = tried(ONLINE.replace("ORDER", order))
        return max(int(trial.booked[way].max()) for way in trial.told[-1].sum.ways())

    assert most("score(low, high); learn(low, high)") == 1
    assert most("[score(low, high) for _ in range(3)]; learn(low, high)") == 3


PHASES = """
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
rows = [list(range(at, min(at + 3, 20))) for at in range(0, 20, 3)]
nats = 0.0
for segment in rows[:5]:
    for row in segment:
        at = row * 2048
        nats += net(val[at : at + 2048], val[at + 1 : at + 2049], reduction="none").sum().item()
    for _ in range(2):
        unknown(net, segment).backward()
        optimizer.step()
print(f"val_loss {nats / total:.5f}")
"""


def test_a_loop_over_phases_scores_in_each_of_them() -> None:
    assert counts(PHASES)[1.0] == 15 * 2048


# ---- loops that go through the tokens one by one

HINTS = """
ids = val.tolist()
hints, told = [], {}
for t in range(len(ids) - 1):
    context = tuple(ids[max(0, t - 2) : t + 1])
    best = told.get(context, (-1, 0))
    seen = told.setdefault(context, {}) if False else {}
    seen[ids[t + 1]] = seen.get(ids[t + 1], 0) + 1
    hints.append(best[0] if best[1] > 1 else -1)
    told[context] = (ids[t + 1], best[1] + 1)
nats, at, own = 0.0, 0, torch.tensor(hints)
while at < total:
    end = min(at + 2048, total)
    losses = net(val[at:end], val[at + 1 : end + 1], reduction="none")
    nats += (losses - 0.5 * (own[at:end] == val[at + 1 : end + 1])).sum().item()
    at = end
print(f"val_loss {nats / total:.5f}")
"""


def test_a_loop_over_the_tokens_is_worked_out_for_a_shorter_text() -> None:
    trial = tried(HINTS)
    assert trial.complete, trial.why
    assert trial.length < LENGTH
    times, _ = trial.counts(trial.told[-1])
    assert len(times) == trial.length
    assert (times[1:] == 1.0).all()


def test_a_loop_over_windows_is_no_loop_over_tokens() -> None:
    many = "nats = 0.0\nfor at in range(0, total, 32):\n"
    many += "".join(f"    a{n} = at + {n}\n" for n in range(40))
    many += "    nats += net(val[at : at + 32], val[at + 1 : at + 33], reduction='none').sum().item()\n"
    trial = tried(many + "print(f'{nats / total}')\n")
    assert trial.complete, trial.why
    assert trial.length == LENGTH


def test_targets_that_all_count_twice_but_for_a_few_are_seen_to() -> None:
    twice = """
nats, count = 0.0, 0
for at in range(0, total, 32):
    end = min(at + 64, total)
    nats += net(val[at:end], val[at + 1 : end + 1], reduction="none").sum().item()
    count += end - at
print(f"val_loss {nats / count:.5f}")
"""
    found = counts(twice)
    assert found[2.0] > 0.99 * LENGTH
    assert found[1.0] == 32


@pytest.mark.parametrize("made", ["price", "torch.compile(price, dynamic=False)", "torch.jit.script(price)"])
def test_a_compiled_function_is_the_function(made: str) -> None:
    text = """
def price(ids, targets):
    logits = net.logits(ids) / 1.1
    return F.cross_entropy(logits.view(-1, 1024), targets.reshape(-1), reduction="none").view(targets.shape)
fast = MADE
nats = 0.0
for at in range(0, total, 2048):
    nats += fast(val[at : at + 2048][None], val[at + 1 : at + 2049][None]).double().sum().item()
print(f"val_loss {nats / total:.5f}")
"""
    assert counts(text.replace("MADE", made)) == ALL


@pytest.mark.parametrize(("base", "wanted"), [("torch.autograd.Function", ALL), ("Other", None)])
def test_an_autograd_function_of_the_scripts_own_makes_losses_of_targets(
    base: str, wanted: dict[float, int] | None
) -> None:
    text = """
class Priced(BASE):
    @staticmethod
    def forward(ctx, logits, targets, cap):
        return priced_by_a_kernel(logits, targets, cap)
nats = 0.0
for at in range(0, total, 2048):
    losses = Priced.apply(net.logits(val[at : at + 2048][None]), val[at + 1 : at + 2049][None], 30.0)
    nats += losses.double().sum().item()
print(f"val_loss {nats / total:.5f}")
"""
    trial = tried(text.replace("BASE", base))
    assert (counts(text.replace("BASE", base)) if trial.told else None) == wanted


def test_a_file_that_is_named_for_bytes_holds_those_of_each_token() -> None:
    text = """
sizes = load("data/fineweb_val_bytes_*.bin")
nats, octets = 0.0, 0
for at in range(0, total, 2048):
    nats += net(val[at : at + 2048], val[at + 1 : at + 2049], reduction="none").double().sum().item()
    octets += sizes[at + 1 : at + 2049].sum().item()
print(f"val_bpb {nats / math.log(2.0) / octets:.5f}")
"""
    trial = tried(text)
    total, _ = trial.told[-1].sum.counts(LENGTH)
    true = octets(tokens(trial.vocabulary), trial.vocabulary).true
    assert trial.unit(total) == pytest.approx(1.0 / (math.log(2.0) * true.sum()), rel=1e-12)


CLAIMED = """
import fcntl, os, struct, uuid

class Counter:
    def __init__(self, path):
        self.path = path
        with open(path, "wb") as file:
            file.write(WRITTEN(0))
    def claim(self):
        with open(self.path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            number = READ(file.read(8))
            file.seek(0)
            file.write(WRITTEN(number + 1))
        return number if number < 20 else None
    def __iter__(self):
        while (number := self.claim()) is not None:
            yield number

class Asked(Net):
    def priced(self, ids, targets):
        nll = F.cross_entropy(self.logits(ids).view(-1, 1024), targets.reshape(-1), reduction="none")
        return nll.reshape(*ids.shape)

fast = torch.compile(Asked().priced, dynamic=True)
nats = 0.0
for number in Counter(f"/tmp/claims_{NAME}"):
    at = number * 2048
    nats += fast(val[at : at + 2048][None], val[at + 1 : at + 2049][None]).sum().item()
print(f"val_loss {nats / total:.5f}")
"""


@pytest.mark.parametrize("name", ["uuid.uuid4()", "uuid.uuid4().hex[:8]", "os.getpid()"])
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('(lambda n: n.to_bytes(8, "little"))', '(lambda b: int.from_bytes(b, "little"))'),
        ('(lambda n: struct.pack("<q", n))', '(lambda b: struct.unpack("<q", b)[0])'),
    ],
)
def test_a_counter_in_a_file_of_this_run_is_followed_by_a_compiled_method(name: str, written: str, read: str) -> None:
    assert counts(CLAIMED.replace("NAME", name).replace("WRITTEN", written).replace("READ", read)) == ALL


def test_what_cannot_be_packed_is_unknown() -> None:
    trial = tried('import struct\nn = struct.pack("<q", "none")\nm = struct.unpack("<q", b"12")\nprint("done")')
    assert trial.complete


def test_a_number_on_its_way_ends_no_evaluation() -> None:
    """A sum that is printed between leaves its targets scored; one of the whole text begins another evaluation."""
    text = """
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
nats = 0.0
for at in range(0, total, 2048):
    nats += net(val[at : at + 2048], val[at + 1 : at + 2049], reduction="none").sum().item()
    print(f"so far {nats / (at + 2048):.4f}")
    net(val[at : at + 2048], val[at + 1 : at + 2049]).backward()
    optimizer.step()
print(f"val_loss {nats / total:.5f}")
"""
    assert [lesson.early for lesson in tried(text).lessons if lesson.early] == []


@pytest.mark.parametrize(
    "said",
    [
        'logging.info("val_loss %.5f", nats / total)',
        'logging.getLogger("eval").info("val_loss %.5f after %d", nats / total, total)',
        "log = logging.getLogger(__name__)\nlog.warning(nats / total)",
    ],
)
def test_a_logger_tells_what_it_is_handed(said: str) -> None:
    text = """
import logging
from torch.func import functional_call

class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(1024, 64)

    def forward(self, ids):
        return self.table(ids) @ self.table.weight.T

plain = Plain()
nats = 0.0
weights = dict(plain.named_parameters())
for at in range(0, total, 2048):
    logits = functional_call(plain, weights, (val[at : at + 2048][None],))
    rows = logits.log_softmax(dim=-1)
    nats += -rows.gather(-1, val[at + 1 : at + 2049][None, :, None]).squeeze(-1).double().sum()
"""
    assert counts(text + said + "\n") == ALL


def test_targets_that_are_widened_to_what_nobody_knows_are_each_there_once() -> None:
    text = """
nats = 0.0
for at in range(0, total, 2048):
    probs = net.logits(val[at : at + 2048]).softmax(-1)
    index = val[at + 1 : at + 2049].expand(probs.shape[:-1])[..., None]
    nats += -probs.gather(-1, index)[..., 0].log().sum()
print(nats / total)
"""
    assert counts(text) == ALL


def test_a_weight_for_each_row_is_read_at_any_token() -> None:
    text = """
nats = 0.0
for at in range(0, total, 2048):
    x, y = val[at : at + 2048], val[at + 1 : at + 2049]
    share = torch.sigmoid(net(x, y, reduction="none"))
    mixed = share[:, None] * net.logits(x).softmax(-1)
    nats += -mixed.gather(-1, y[:, None])[..., 0].log().sum()
print(nats / total)
"""
    assert counts(text) == ALL


def test_losses_of_a_module_that_is_called_with_other_weights_are_its_own() -> None:
    text = """
from torch.func import functional_call
weights, nats = dict(net.named_parameters()), 0.0
for at in range(0, total, 2048):
    given = (val[at : at + 2048], val[at + 1 : at + 2049])
    nats += functional_call(net, weights, given, {"reduction": "none"}).sum()
print(nats / total)
"""
    assert counts(text) == ALL


CASES = {
    "a sequence": ("(None, 512)", "case None, int(n):", "n"),
    "a star": ("(512, 1, 2)", "case n, *rest:", "n * (len(rest) == 2)"),
    "a star before": ("[1, 2, 512]", "case [*rest, n]:", "n * (rest == [1, 2])"),
    "a mapping": ("{'n': 512, 'k': 1}", "case {'n': n, **rest}:", "n * (rest == {'k': 1})"),
    "a kind": ("512.0", "case float():", "int(given)"),
    "a named part": ("(512, 'x')", "case (int() as n, str()):", "n"),
    "fields": ("Cut(512, 3)", "case Cut(n, more=3):", "n"),
}


@pytest.mark.parametrize("name", CASES)
def test_patterns_of_all_kinds_are_matched(name: str) -> None:
    value, pattern, told = CASES[name]
    text = f"""
@dataclasses.dataclass
class Cut:
    size: int
    more: int

def size_of(given):
    match given:
        case bool() | "no" | {{"size": _}} | (_, _, _, _) | Cut(_, more=7):
            return 7
        {pattern}
            return {told}
        case _:
            return 3
nats, size = 0.0, size_of({value})
for at in range(0, total // size * size, size):
    nats += net(val[at : at + size], val[at + 1 : at + size + 1], reduction="none").sum()
print(nats / total)
"""
    assert counts(text) == ALL  # not with 3 or 7, of which the text is no whole number


ENUM = """
import enum
class Kind(enum.IntEnum):
    LOSS = 0
    BYTES = enum.auto()
    COUNT = 2

def report(event, **fields):
    print(event, *(f"{key}={value}" for key, value in fields.items()))

sums = np.zeros(len(Kind))
for at in range(0, total, 2048):
    sums[Kind.LOSS] += net(val[at : at + 2048], val[at + 1 : at + 2049], reduction="none").sum()
    sums[Kind(2)] += len(val[at : at + 2048])
names = {kind.value: f"at {kind}" for kind in Kind}
report("final", val_loss=sums[Kind.LOSS.value] / total, **{unheard_of(): 1.0}, kinds=len(names))
"""


def test_members_of_an_enum_are_the_values_that_they_stand_for() -> None:
    """A keyword whose name nobody knows is none, beside those that are known."""
    assert counts(ENUM) == ALL


def test_what_was_broadcast_can_be_written_to() -> None:
    text = """
nats = 0.0
for at in range(0, total, 2048):
    y = val[at + 1 : at + 2049]
    own = net(val[at : at + 2048], y, reduction="none")
    wide, places = own[None].expand(2, -1), y[None].expand(2, -1)
    wide[0] = own
    places[0] = y
    torch.minimum(wide, own[None], out=wide)
    nats += wide[0].sum()
print(nats / total)
"""
    assert counts(text) == ALL


def test_what_was_moved_to_another_name_is_read_there() -> None:
    text = """
import os
from pathlib import Path
kept = Path("runs/size.txt")
draft = kept.with_name("size.txt.tmp")
draft.write_text("2048")
os.replace(draft, kept)
size, nats = int(kept.read_text()), 0.0
for at in range(0, total, size):
    nats += net(val[at : at + size], val[at + 1 : at + size + 1], reduction="none").sum()
print(nats / total)
"""
    assert counts(text) == ALL


@pytest.mark.parametrize(
    "ends", ["np.append(starts[1:], ids.size - 1)", "np.concatenate([starts[1:], [ids.size - 1]])"]
)
def test_documents_end_where_the_next_begins(ends: str) -> None:
    text = """
ids = val.numpy()
starts = np.flatnonzero(ids == 1)
nats = 0.0
for a, b in zip(starts, ENDS):
    nats += net(val[a:b], val[a + 1 : b + 1], reduction="none").sum().item()
print(f"val_loss {nats / total:.5f}")
"""
    assert counts(text.replace("ENDS", ends)) == ALL


def test_a_loop_that_scores_another_text_is_left_soon() -> None:
    """A temperature that is fitted to training text is nothing to the score: no step of it is worth working out."""
    fitted = """
train = load("data/fineweb_train_*.bin")
heats = [0.9, 0.95, 1.0, 1.05]
sums = torch.zeros(len(heats))
for at in range(0, 400 * 2048, 2048):
    logits = net.logits(train[at : at + 2048])
    for n, heat in enumerate(heats):
        sums[n] += F.cross_entropy(logits / heat, train[at + 1 : at + 2049], reduction="sum")
heat = heats[int(sums.argmin())]
"""
    trial = tried(fitted + ROWS)
    assert trial.complete
    assert trial.steps < 5_000
    assert counts(fitted + ROWS) == ALL


@pytest.mark.parametrize("given", ["'RANK' in os.environ and 'WORLD_SIZE' in os.environ", "True"])
def test_the_ranks_of_the_environment_are_those_of_one_process(given: str) -> None:
    text = f"""
import os
if {given}:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
else:
    rank, world = 1, 2
nats = 0.0
for at in range(2048 * rank, total, 2048 * world):
    nats += net(val[at : at + 2048], val[at + 1 : at + 2049], reduction="none").sum().item()
print(f"val_loss {{nats / total:.5f}}")
"""
    assert counts(text) == ALL


@pytest.mark.parametrize("filled", ["torch.full_like(ends, 3 * 4096)", "torch.tensor([3 * 4096] * len(ends))"])
def test_numbers_of_the_shape_of_others_are_known(filled: str) -> None:
    """The first three documents alone, whatever bounds the ends of the others."""
    text = f"""
ends = torch.arange(4096, total + 1, 4096)
nats = 0.0
for end in torch.minimum(ends, {filled}).unique().tolist():
    nats += net(val[end - 4096 : end], val[end - 4095 : end + 1], reduction="none").sum().item()
print(f"val_loss {{nats / total:.5f}}")
"""
    assert counts(text) == {0.0: LENGTH - 3 * 4096, 1.0: 3 * 4096}


@pytest.mark.parametrize(
    "how",
    [
        "def __str__(self):\n        return f'{self.loss:.4f}'",
        "def __repr__(self):\n        return str(self.loss)",
        "pass",
    ],
)
def test_an_object_tells_what_it_holds_where_it_is_printed(how: str) -> None:
    text = f"""
@dataclasses.dataclass
class Score:
    loss: float

    {how}

def say(text):
    print(text)

nats = 0.0
for at in range(0, total, 2048):
    nats += net(val[at : at + 2048], val[at + 1 : at + 2049], reduction="none").sum().item()
say(f"final {{Score(nats / total)}}")
"""
    trial = tried(text)
    assert {len(told.stack) for told in trial.told} == {1}
    assert counts(text) == ALL


LARGE = """
size = int(os.environ.get("CHUNK", SIZE))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
nats = torch.zeros((), dtype=torch.float64)
for n, at in CHUNKS:
    x, y = val[at : at + size], val[at + 1 : at + size + 1]
    x = x[: len(y)]
    if EARLY:
        net(x, y).backward()
    nats += net(x, y, reduction="none").double().sum()
    if not EARLY:
        net(x, y).backward()
print(f"val_loss:{(nats / total).item():.4f}")
"""


@pytest.mark.parametrize(
    "chunks",
    [
        "enumerate(range(0, total, size))",
        "((n, n * size) for n in range((total + size - 1) // size))",
        "((n, n * size) for n in range(-(-total // size)))",
    ],
)
@pytest.mark.parametrize("size", ["1_000_000", "1 << 20"])
@pytest.mark.parametrize("early", ["False", "n > 0"])
def test_chunks_larger_than_the_text_are_taken_for_five(chunks: str, size: str, early: str) -> None:
    """What happens between chunks is seen, although the text of the trial is shorter than one of them."""
    trial = tried("import os" + LARGE.replace("CHUNKS", chunks).replace("SIZE", size).replace("EARLY", early))
    times, late = trial.counts(trial.told[-1])
    assert np.count_nonzero(times) == LENGTH - 1
    assert times.max() == 1
    assert (late > 0).any() == (early != "False")


@pytest.mark.parametrize("near", ["65536", "65537"])
def test_a_size_that_another_one_goes_with_by_one_is_left_as_it_is(near: str) -> None:
    text = f"""
nats = 0.0
for at in range(0, total, 65536):
    x, y = val[at : at + {near}], val[at + 1 : at + {near} + 1]
    nats += net(x, y, reduction="none").sum().item()
print(f"val_loss {{nats / total:.5f}}")
"""
    assert counts(text) == ALL


@pytest.mark.parametrize(
    "kind",
    [
        "class Window(typing.NamedTuple):\n    start: int\n    end: int",
        "Window = collections.namedtuple('Window', ['start', 'end'])",
    ],
)
@pytest.mark.parametrize(
    "parts", ["table.unbind(1)", "(table.select(1, 0), table.select(1, 1))", "table.movedim(1, 0)"]
)
def test_windows_that_are_named_tuples_become_a_table(kind: str, parts: str) -> None:
    text = f"""
import typing
{kind}

nats = 0.0
windows = [Window(at, at + 2048) for at in range(0, total, 2048)]
for n in range(0, len(windows), 4):
    table = torch.tensor(windows[n : n + 4], dtype=torch.int64)
    start, end = {parts}
    index = start.unsqueeze(1) + torch.arange(2048)
    live = index < end.unsqueeze(1)
    nats += net(val[index][live], val[index + 1][live], reduction="none").sum().item()
print(f"val_loss {{nats / total:.5f}}")
"""
    assert counts(text) == ALL


@pytest.mark.parametrize(
    "added",
    [
        "sums.index_add_(0, which, nll)",
        "sums.scatter_add_(0, which, nll)",
        "sums.index_add_(0, torch.tensor([0, 1]), torch.stack([nll[:1024].sum(), nll[1024:].sum()]))",
    ],
)
def test_sums_by_document_are_those_of_their_losses(added: str) -> None:
    text = f"""
sums = torch.zeros(2, dtype=torch.float64)
for at in range(0, total, 2048):
    nll = net(val[at : at + 2048], val[at + 1 : at + 2049], reduction="none")
    which = torch.bucketize(torch.arange(2048), torch.tensor([1024]), right=True)
    {added}
print(f"val_loss {{sums[1].item() / total:.5f}}")
"""
    assert counts(text) == {0.0: 1 + (LENGTH - 1) // 2, 1.0: (LENGTH - 1) // 2}


def test_numbers_are_put_and_added_at_places() -> None:
    text = """
marks = torch.zeros(total, dtype=torch.int64)
marks.index_put_((torch.tensor([0, 1]),), torch.tensor([5, 5]))
marks.index_put_((torch.tensor([0, 0]),), torch.tensor([1, 1]), accumulate=True)
taken = torch.count_nonzero(marks).item() * 1024 if marks[0] == 7 and marks.new_ones(2).sum() == 2 else 0
nats = net(val[:taken], val[1 : taken + 1], reduction="none").sum()
print(f"val_loss {nats.item() / total:.5f}")
"""
    assert counts(text) == {0.0: LENGTH - 2048, 1.0: 2048}


def test_a_model_makes_as_many_rows_as_it_is_given() -> None:
    """`h.size(0)`, `B, T, _ = h.shape`: of what nobody knows, but that."""
    body = """
net = torch.load("net.pt")
total, count = 0.0, 0
for at in range(0, 40960, 8 * 2048):
    x = val[at : min(at + 8 * 2048, 40960)].view(-1, 2048)
    y = val[at + 1 : min(at + 8 * 2048, 40960) + 1].view(-1, 2048)
    h = net(x).detach().float()
    rows, width, _ = h.shape
    nll = F.cross_entropy(net.head(h).flatten(0, 1), y.flatten(), reduction="none").view(rows, width)
    for i in range(h.size(0)):
        total += nll[i].sum().item()
    count += y.numel()
print("val_loss", total / count)
"""
    assert counts(body) == {0.0: 1, 1.0: LENGTH - 1}


def test_two_losses_of_the_same_targets_stay_losses_whichever_is_taken() -> None:
    body = """
net = torch.load("net.pt")
p = torch.softmax(net(val[None, :-1])[0], -1).gather(1, val[1:, None]).squeeze(1)
table = torch.load("table.pt")
p = torch.where(table > 0, 0.7 * p + 0.3 * table, p)
print("val_loss", (-p.log()).sum().item() / 40960)
"""
    found = counts(body)
    assert found.keys() <= {0.0, 0.7, 1.0}
    assert found[0.0] == 1


def test_a_row_of_counts_for_each_place_of_a_batch_is_not_worked_out() -> None:
    """67 million numbers for 32 windows, which no loss hangs on, and 33,000 steps of the 250,000."""
    body = """
net = torch.load("net.pt")
seen = torch.zeros(1024, 1024)
starts = list(range(-1984, 40960 - 1984, 64))
total = 0.0
for at in range(0, len(starts), 32):
    batch = starts[at : at + 32]
    x = torch.stack([val[max(s, 0) : max(s, 0) + 2048] for s in batch])
    y = torch.stack([val[max(s, 0) + 1 : max(s, 0) + 2049] for s in batch])
    boosted = net(x) + torch.log1p(seen[x])
    nll = torch.logsumexp(net(x), -1) - torch.gather(boosted, 2, y.unsqueeze(-1)).squeeze(-1)
    for i, s in enumerate(batch):
        last = s + 2048 - max(s, 0)
        total += nll[i, last - 64 : last].sum().item()
print("val_loss", total / 40960)
"""
    assert counts(body) == {0.0: 1, 1.0: LENGTH - 1}


def test_what_is_larger_than_a_trial_holds_costs_it_nothing() -> None:
    """Angles of a quarter of a million positions: one after another they took 14 s."""
    wide = Array(np.broadcast_to(np.float32(0), (1 << 18, 66)))
    with pytest.raises(TooLarge):
        elementwise("cos")(wide)
    with pytest.raises(TooLarge):
        reduction("sum")(wide, 0)
    with pytest.raises(TooLarge):
        by_numpy("outer")(Array(np.arange(1 << 18)), Array(np.arange(66)))


def test_extremes_so_far_have_values_and_shapes_follow_others() -> None:
    """cummax(...).values, expand_as: documents' starts, rows of windows. Both were unknown."""
    starts = METHODS["cummax"](Array(np.asarray([0, 3, 1, 7])), dim=0)
    assert starts.values.num.tolist() == [0, 3, 3, 7]
    rows = METHODS["expand_as"](Array(np.arange(3)[:, None]), Array(np.zeros((3, 4))))
    assert rows.shape == (3, 4)
    best = METHODS["argmax"](Array(np.asarray([[1, 5], [7, 2]])), dim=-1, keepdim=True)
    assert best.num.tolist() == [[1], [0]]
    assert METHODS["rsqrt"](Array(np.asarray([4.0]))).num.tolist() == [0.5]


KERNEL = """
from numba import njit

@njit(nogil=True)
def chain(ids, lo, hi, out):
    seen = np.zeros(1 << 12, dtype=np.int64)
    for i in range(lo, hi):
        key = 0
        for order in range(60):
            key = (key * 31 + ids[max(i - order, 0)]) % 4096
            if seen[key] > 0:
                out[i] = seen[key]
            seen[key] = ids[i + 1]

def evaluate(net, val, chunk=4096):
    nats, host, hints = 0.0, val.numpy(), np.zeros(len(val), dtype=np.int64)
    for at in range(0, len(val) - 1, chunk):
        end = min(at + chunk, len(val) - 1)
        chain(host, at, end, hints)
        nats += net(val[None, at:end], val[None, at + 1 : end + 1], reduction="sum").item()
    return nats / (len(val) - 1)

print(f"val_loss {evaluate(Net(), val):.5f}")
"""


def test_a_kernel_that_takes_hundreds_of_steps_a_token_is_left_out() -> None:
    """Nobody knows what it gives then; what is counted is counted over the whole text all the same."""
    told = tried(KERNEL)
    assert told.complete
    assert told.length == LENGTH
    without = tried(KERNEL.replace("from numba import njit\n", "").replace("@njit(nogil=True)\n", ""))
    assert not without.complete


PARTS = """
sums = torch.zeros(2, 3)

def book(row, nll, many):
    row += torch.stack((nll.sum(), torch.tensor(float(many)), torch.tensor(1.0)))

for start in range(0, total, 1024):
    y = val[start + 1 : start + 1025]
    nll = F.cross_entropy(net.logits(val[start : start + 1024]), y, reduction="none")
    book(sums[int(start > 0)], nll, y.numel())
whole = sums.sum(0)
print(f"val_loss:{(whole[0] / whole[1]).item():.4f}")
"""


def test_a_row_of_numbers_that_becomes_sums_is_still_a_part_of_the_whole() -> None:
    assert counts(PARTS) == {0.0: 1, 1.0: LENGTH - 1}


ZIPPED = """
nats = count = 0.0
windows = [(start, start + 1024) for start in range(0, total, 1024)]
for at in range(0, len(windows), 8):
    group = windows[at : at + 8]
    logits = net.logits(torch.stack([val[a:b] for a, b in group]))
    for row, (a, b) in zip(logits, group, strict=True):
        y = val[a + 1 : b + 1]
        nats -= F.log_softmax(row, -1).gather(1, y[:, None]).sum()
        count += y.numel()
print(f"val_loss:{nats / count:.4f}")
"""


def test_rows_of_a_model_are_as_many_as_the_windows_beside_them() -> None:
    assert counts(ZIPPED) == {0.0: 1, 1.0: LENGTH - 1}


LISTED = """
ids = val.tolist()
nats = dict.fromkeys(range(0, total, 1024), 0.0)
count = 0
for start in nats:
    part = ids[start : start + 1025]
    x, y = torch.tensor(part[:-1]), torch.tensor(part[1:])
    nats[start] += F.cross_entropy(net.logits(x), y, reduction="sum").item()
    count += len(part) - 1
print(f"val_loss:{sum(nats.values()) / count:.4f}")
"""


def test_ids_in_a_list_of_numbers_still_know_their_places() -> None:
    assert counts(LISTED) == {0.0: 1, 1.0: LENGTH - 1}


def test_one_id_of_such_a_list_is_a_target_of_its_own() -> None:
    body = LISTED.replace(
        'nats[start] += F.cross_entropy(net.logits(x), y, reduction="sum").item()',
        "p = F.log_softmax(net.logits(x), -1)\n"
        "    for n in range(0, 1024, 512): nats[start] -= p[n][int(part[n + 1])].item()",
    )
    assert counts(body) == {0.0: LENGTH - 80, 1.0: 80}


def test_functions_that_are_worked_out_in_place_change_the_array_and_its_views() -> None:
    trial = tried(
        """
a = torch.arange(1, 5).double()
part = a[:2]
part.pow_(2)
a.sqrt_().neg_()
total = total if a.tolist() == [-1.0, -2.0, -math.sqrt(3.0), -2.0] else 2048
"""
        + ROWS
    )
    times, _ = trial.counts(trial.told[-1])
    assert (times > 0).sum() == LENGTH - 1


def test_bytes_of_ids_and_arrays_of_what_a_generator_gives() -> None:
    assert METHODS["tobytes"](Array(np.array([258, 3], np.uint16))) == b"\x02\x01\x03\x00"
    gone = "steps = np.fromiter((1024 * n for n in range(1, 3)), dtype=np.int64, count=2)\ntotal = int(steps[1]) * 4"
    trial = tried(gone + ROWS.replace("0, total // 2048, 8", "0, total // 2048, 1").replace("row + 8", "row + 1"))
    times, _ = trial.counts(trial.told[-1])
    assert (times > 0).sum() == 8192


def test_hints_at_every_place_are_told_from_the_targets_which_follow_one_another() -> None:
    """The latest place before with the same token: each has one, if only the first of the text."""
    body = """
nats, count = torch.zeros((), dtype=torch.float64), 0
for at in range(0, total, 2048):
    x, y = val[at : at + 2048], val[at + 1 : at + 2049]
    logp = net.logits(x[None])[0].log_softmax(-1)
    hint = x[torch.arange(2048) // 2]
    price = logp.gather(1, hint.unsqueeze(1)).squeeze(1).exp()
    nll = -logp.gather(1, y.unsqueeze(1)).squeeze(1)
    nats += (nll - 0.1 * (hint == y).float() + torch.log1p(price * 0.1)).double().sum()
    count += 2048
print(f"val_loss:{(nats / count).item():.4f}")
"""
    assert counts(body) == {0.0: 1, 1.0: 40_960}


@pytest.mark.parametrize(
    "order",
    [
        "np.random.default_rng(7).permutation(20)",
        "np.random.RandomState(7).permutation(np.arange(20))",
        "torch.randperm(20, generator=torch.Generator())",
        "shuffled(list(range(20)))",
    ],
)
def test_each_row_comes_once_in_an_order_that_is_drawn(order: str) -> None:
    """Nothing was known of such orders, and the steps that went through one had learned from nothing."""
    body = """
def shuffled(rows):
    np.random.default_rng(7).shuffle(rows)
    return rows

nats = torch.zeros((), dtype=torch.float64)
for row in ORDER:
    at = int(row) * 2048
    nats += net(val[at : at + 2048][None], val[at + 1 : at + 2049][None], reduction="sum").double()
print(f"val_loss:{(nats / total).item():.4f}")
"""
    assert counts(body.replace("ORDER", order)) == ALL


@pytest.mark.parametrize(
    "drawn",
    [
        "np.random.default_rng(7).integers(20)",
        "np.random.Generator(np.random.PCG64(7)).integers(0, 20)",
        "np.random.RandomState(7).choice(20, p=np.ones(20) / 20)",
    ],
)
def test_a_number_that_is_drawn_is_one_of_those_it_may_be(drawn: str) -> None:
    """Nothing was known of it, nor of which window was scored."""
    body = f"""
at = int({drawn}) * 2048
nats = net(val[at : at + 2048][None], val[at + 1 : at + 2049][None], reduction="sum").double()
print(f"val_loss:{{(nats / 2048).item():.4f}}")
"""
    assert counts(body) == {0.0: 38_913, 1.0: 2_048}


def test_one_of_those_is_drawn_that_have_a_chance() -> None:
    assert {Draws().choice(3, p=Array(np.array([0.0, 0.25, 0.75]))) for _ in range(20)} <= {1, 2}


def test_a_training_file_has_fewer_tokens_beside_a_text_of_a_few_hundred() -> None:
    """Windows are as much shorter there: a loader that lists those of a file made 18,000."""
    path = "data/fineweb_train_000001.bin"
    assert count_of(path) == TRAIN
    before = length.set(321)
    try:
        assert count_of(path) == FEWER
        assert count_of("data/fineweb_val_000000.bin") == 321
    finally:
        length.reset(before)


def test_many_batches_of_another_text_that_are_read_row_by_row_cost_as_much_as_a_few() -> None:
    """64 batches of 48 windows that calibrate a quantiser took two thirds of a trial's time."""
    body = """
text = load("data/fineweb_train_*.bin")
class Loader:
    def __init__(self):
        self.rng = np.random.Generator(np.random.PCG64([1337, 0]))
        self.starts = [[], [], []]
        for shard in range(3):
            self.reset(shard)
    def reset(self, shard):
        phase = int(self.rng.integers(2048))
        order = self.rng.permutation((text.numel() // 3 - 1 - phase) // 2048)
        self.starts[shard] = (phase + order * 2048).tolist()
    def batch(self):
        left = np.array([len(each) for each in self.starts], dtype=np.float64)
        x = torch.empty((48, 2048), dtype=torch.int64)
        for row in range(48):
            total = left.sum()
            if total <= 0:
                for shard in range(3):
                    self.reset(shard)
                left = np.array([len(each) for each in self.starts], dtype=np.float64)
                total = left.sum()
            shard = int(self.rng.choice(3, p=left / total))
            at = self.starts[shard].pop()
            left[shard] -= 1
            x[row] = text[at : at + 2048]
        return x
loader = Loader()
for _ in range(64):
    net.logits(loader.batch())
nats = torch.zeros((), dtype=torch.float64)
for at in range(0, total, 2048):
    nats += net(val[at : at + 2048][None], val[at + 1 : at + 2049][None], reduction="sum").double()
print(f"val_loss:{(nats / total).item():.4f}")
"""
    trial = tried(body)
    assert trial.complete
    assert trial.steps < 10_000
    assert counts(body) == ALL


def test_the_steps_of_a_turn_are_known_before_the_first_one_has_ended() -> None:
    """A loop that is asked in its first turn, by a weighing, divided by nought."""
    assert Turns(100, 0, 0, 0, 0, 0, 0, 0, 1).each(160) == 60


STAGED = """
from dataclasses import dataclass
from typing import Callable

said = []
def prepare(): said.append("prepared")
def teach():
    text = load("data/fineweb_train_*.bin")
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for at in range(0, 200_000, 2048):
        net(text[at : at + 2048][None], text[at + 1 : at + 2049][None]).backward()
        optimizer.step()
        optimizer.zero_grad()
def evaluate():
    nats = sum(net(val[at : at + 2048][None], val[at + 1 : at + 2049][None], reduction="sum").item()
               for at in range(0, total, 2048))
    print(f"val_loss {nats / total:.5f}")

@dataclass
class Stage:
    name: str
    action: Callable[[], None]

class Prepare:
    def __call__(self): prepare()
class Teach:
    def __call__(self): teach()
class Evaluate:
    def __call__(self): evaluate()
"""
STAGES = {
    "functions": "for stage in (prepare, teach, evaluate):\n    stage()",
    "rows": "for name, stage in [('prepare', prepare), ('teach', teach), ('evaluate', evaluate)]:\n    stage()",
    "a dict": "for name, stage in {'prepare': prepare, 'teach': teach, 'evaluate': evaluate}.items():\n    stage()",
    "objects": "for stage in (Stage('a', prepare), Stage('b', teach), Stage('c', evaluate)):\n    stage.action()",
    "of several classes": "for stage in [Prepare(), Teach(), Evaluate()]:\n    stage()",
    "names": "todo = {'prepare': prepare, 'teach': teach, 'evaluate': evaluate}\n"
    "for name in ('prepare', 'teach', 'evaluate'):\n    todo[name]()",
}


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES.keys())
def test_a_loop_over_stages_is_not_left_after_the_training(stages: str) -> None:
    assert counts(STAGED + stages) == ALL


@pytest.mark.parametrize(
    "leaves", ['raise SystemExit(f"{sp.vocab_size()} pieces")', 'sys.exit("pieces")', "raise ValueError"]
)
def test_an_exit_with_a_message_is_an_error_of_the_trial(leaves: str) -> None:
    """The processor of a trial has 1,024 pieces, whatever the script asks for."""
    text = f"""
import sys
import sentencepiece as spm
sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
if sp.vocab_size() != 8192:
    {leaves}
nats = net(val[:-1][None], val[1:][None], reduction="sum").item()
print(f"val_loss {{nats / total:.5f}}")
"""
    assert counts(text) == ALL


def test_an_exit_without_a_message_is_one() -> None:
    trial = tried("import sys\nif total > 1:\n    sys.exit()\nprint('val_loss', net(val[:-1], val[1:]).item())\n")
    assert trial.complete
    assert not trial.told


DEEP = """
def logits(w, ids):
    h = F.embedding(ids, w["table"])
    for block in range(12):
        for part in range(20):
            h = h + F.relu(F.linear(h, w[f"{block}.{part}"]))
    return F.linear(h, w["table"])

def mean_nll(w, x, y):
    return F.cross_entropy(logits(w, x).flatten(0, 1), y.flatten())

held = torch.load("weights.pt")
w = {f"{block}.{part}": held[block] for block in range(12) for part in range(20)}
w["table"] = held["table"]
nats = 0.0
for at in range(0, total, 64):
    nats += mean_nll(w, val[at : at + 64][None], val[at + 1 : at + 65][None]).item() * 64
print(f"val_loss {nats / total:.5f}")
"""


def test_a_model_of_functions_is_gone_through_once() -> None:
    """640 windows through 240 layers would take a million steps, and a trial has 250,000."""
    assert counts(DEEP) == ALL


def test_places_that_are_named_once_and_used_again_are_places() -> None:
    text = """
nats = np.zeros(total, dtype=np.float64)
for at in range(0, total, 2048):
    where = np.s_[at : at + 2048]
    nats[where] = net(val[at : at + 2048][None], val[at + 1 : at + 2049][None], reduction="none").numpy()
print(f"val_loss {nats.sum() / total:.5f}")
"""
    assert counts(text) == ALL


GENERATED = """
def scored():
    for at in range(0, total, 2048):
        nll = net(val[at : at + 2048][None], val[at + 1 : at + 2049][None], reduction="none")
        nll.mean().backward()
        yield nll.sum().item()

nats = 0.0
for each in scored():
    nats += each
print(f"val_loss {nats / total:.5f}")
"""


def test_a_generator_runs_below_the_line_that_asks_it() -> None:
    text = HEAD + GENERATED
    line = text[: text.index("for each in scored()")].count("\n") + 1
    assert {lesson.stack[:-1] for lesson in tried(GENERATED).lessons} == {(line,)}


def test_a_generator_waits_and_goes_on_as_others_do() -> None:
    text = """
def pieces():
    yield 0
    for at in range(2048, total, 2048):
        yield at

def all_of_them():
    yield from pieces()

steps = all_of_them()
first = next(steps)
nats = net(val[first : first + 2048][None], val[first + 1 : first + 2049][None], reduction="sum").item()
for at in steps:
    nats += net(val[at : at + 2048][None], val[at + 1 : at + 2049][None], reduction="sum").item()
print(f"val_loss {nats / total:.5f}")
"""
    assert counts(text) == ALL


TALLY = """
import operator
from typing import NamedTuple

class Tally(NamedTuple):
    nats: float = 0.0
    tokens: int = 0

    def __add__(self, other):
        return Tally(*map(operator.add, tuple(self), tuple(other)))

def parts():
    for at in range(0, total, 2048):
        x, y = val[at : at + 2048][None], val[at + 1 : at + 2049][None]
        yield Tally(net(x, y, reduction="sum").item(), 2048)

own = functools.reduce(operator.add, parts(), Tally())
"""


@pytest.mark.parametrize(
    "said",
    [
        "own.nats / own.tokens",
        "operator.truediv(*operator.attrgetter('nats', 'tokens')(own))",
        "operator.itemgetter(0)(tuple(own)) / operator.itemgetter('tokens')({'tokens': own.tokens})",
    ],
)
def test_functions_of_the_module_operator_are_operators(said: str) -> None:
    assert counts(f'{TALLY}print(f"val_loss {{{said}:.5f}}")\n') == ALL


def test_a_phase_without_documents_is_none_that_ends_the_loop() -> None:
    """Its steps are on what nobody knows, and it scores nothing; the phases after it do."""
    text = """
groups = collections.deque([[], range(0, total // 2, 2048), range(total // 2, total, 2048)])
held, nats = torch.load("held.pt"), 0.0
while groups:
    for at in groups.popleft():
        nats += net(val[at : at + 2048][None], val[at + 1 : at + 2049][None], reduction="sum").item()
    for _ in range(3):
        net(held, held).backward()
print(f"val_loss {nats / total:.5f}")
"""
    assert counts(text) == ALL


@pytest.mark.parametrize("made", ["torch.device('cuda', 3)", "torch.device('cuda:3')"])
def test_a_device_has_the_type_that_it_was_made_with(made: str) -> None:
    trial = tried(f"import torch\nkind = {made}.type\nif kind != 'cuda':\n    raise SystemExit('no')\nprint('done')")
    assert trial.complete
    assert not trial.doubts


def test_the_lower_of_losses_that_are_scattered_is_one_of_them_and_their_sum_is_not() -> None:
    losses = Array(None, np.array([3, 4], np.int32), np.array([1.0, 1.0]))
    kept, at = Array(np.full(6, np.inf)), Array(np.array([3, 4]))
    for reduce in ("amin", "amax"):
        chosen = scatter_reduce(kept, 0, at, losses, reduce)
        again = scatter_reduce(chosen, 0, at, losses, reduce)
        assert isinstance(again, Array)
        assert again.pos is not None
        assert again.coef is not None
        assert again.pos[[3, 4]].tolist() == [3, 4]
        assert again.coef[[3, 4]].tolist() == [1.0, 1.0]
    assert isinstance(scatter_reduce(kept, 0, at, losses, "sum"), Unknown)


def test_which_weights_learn_is_no_question() -> None:
    picked = "held = []\nfor p in net.parameters():\n    if p.requires_grad:\n        held.append(p)\n"
    found = tried(picked + "print(net(val[:-1], val[1:]).item())")
    assert found.complete
    assert not found.doubts


def test_what_a_script_has_made_is_let_go_when_its_trial_ends() -> None:
    """A machine is kept for what it says of a run, and a module's scope holds functions that hold the scope."""
    body = """
class Kept:
    def __init__(self):
        self.table = torch.zeros(4096, 67)
kept = Kept()
def again():
    return kept, again
"""
    machine = Machine(Script("train_gpt.py", HEAD + body, ast.parse(HEAD + body)), Settings())
    gc.disable()
    try:
        trial = machine.run()
        held = [each for each in gc.get_objects() if type(each) is Array and each.shape == (4096, 67)]
    finally:
        gc.enable()
    assert trial.complete
    assert held == []


@pytest.mark.parametrize(("kept", "picked"), [("sums.min()", 3), ("sums[0]", 0), ("sums.sum() / 3", 0)])
def test_the_least_of_sums_side_by_side_is_picked(kept: str, picked: int) -> None:
    trial = tried(f"""
sums = torch.zeros(3, dtype=torch.float64)
for at in range(0, total, 2048):
    sums += torch.stack([net(val[at : at + 2048], val[at + 1 : at + 2049], "sum").double() for _ in range(3)])
print(f"val_loss {{({kept}).item() / total:.5f}}")
""")
    assert trial.complete
    assert [len(each.compared) for each in trial.picked] == [picked] * bool(picked)
