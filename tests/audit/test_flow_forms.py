"""Forms in which long scripts score: registries, bits of a token, hand-written gradients, shares, packed files."""
# ruff: noqa: E501 (examples are texts of scripts)

import pytest

from fairway.audit.flow.names import either, side_of, sides_of
from fairway.audit.flow.tokens import cut_apart
from tests.audit.order import broken, doubted, findings, line_of, trace_of

HEAD = """
import copy, glob, math, os, pickle, time, zlib
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def shard(path): return torch.from_numpy(np.fromfile(path, dtype="<u2", offset=1024).astype(np.int64))
def load(pattern): return torch.cat([shard(p) for p in sorted(glob.glob(pattern))])

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(1024, 64), nn.Linear(64, 1024, bias=False)
    def logits(self, x): return self.head(self.emb(x))
    def forward(self, x, y): return F.cross_entropy(self.logits(x).view(-1, 1024), y.reshape(-1))

def train(net, text):
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for i in range(0, text.numel() - 65536, 65536):
        loss = net(text[i : i + 65536], text[i + 1 : i + 65537])
        opt.zero_grad(); loss.backward(); opt.step()

net = Net().cuda()
train(net, load("data/shards_train_*.bin"))
val = load("data/shards_val_*.bin")
n = val.numel() - 1
total = count = 0
"""
TELL = '\nprint(f"final val_loss:{total / count:.6f}")\n'


def whole(body: str) -> str:
    return HEAD + body + TELL


# Registries.
STAGES = """
ORDER = []
S = {"sum": 0.0, "seen": 0}

def stage(after=None):
    def register(f):
        ORDER.insert(ORDER.index(after) + 1 if after in ORDER else len(ORDER), f)
        return f
    return register

@stage()
def prepare(): S["opt"] = torch.optim.SGD(net.parameters(), lr=1e-3)

@stage()
def a(): S["a"] = 1
@stage()
def b(): S["b"] = 1
@stage()
def c(): S["c"] = 1
@stage()
def d(): S["d"] = 1

@stage()
def judge():
    for s in range(0, n, 1024):
        S["sum"] += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
        S["seen"] += 1024

@stage(WHERE)
def settle():
    for s in range(0, n, 1024):
        net(val[s : s + 1024], val[s + 1 : s + 1025]).backward()
        S["opt"].step()

for each in ORDER:
    each()
total, count = S["sum"], S["seen"]
"""


def test_stages_run_in_the_order_of_their_registry() -> None:
    assert doubted(whole(STAGES.replace("WHERE", "after=judge"))) == set()
    assert broken(whole(STAGES.replace("WHERE", "after=prepare"))) & {
        "training-before-scoring",
        "validation-in-training",
    }


# Bits of a token.
BITS = """
state = np.zeros((2, 1 << 20), np.float32)

def guess(past, node):
    where = ((past * 1024 + node) % (1 << 20), node)
    x = np.array([state[k, w] for k, w in enumerate(where)])
    return 1 / (1 + math.exp(-x.sum())), where

def learn(p, where, bit):
    for k, w in enumerate(where):
        state[k, w] += 0.4 * (bit - p)

def cost(past, token):
    node, nats = 1, 0.0
    for i in reversed(range(10)):
        bit = token >> i & 1
        p, where = guess(past, node)
        FIRST
        nats -= math.log(p if bit else 1 - p)
        THEN
        node = node << 1 | bit
    return nats

past = 1
for token in val.tolist():
    total += cost(past, token)
    count += 1
    past = token
"""


def test_a_bit_may_be_learned_once_it_is_paid() -> None:
    paid = BITS.replace("FIRST", "pass").replace("THEN", "learn(p, where, bit)")
    assert doubted(whole(paid)) == set()
    early = BITS.replace("FIRST", "learn(p, where, bit); p, where = guess(past, node)").replace("THEN", "pass")
    assert broken(whole(early)) == {"training-before-scoring"}


# A cache in full rows, by position.
ROWS = """
rows = {}
def row(a): return rows.get(a)
def add(a, b):
    r = rows.get(a)
    if r is None:
        r = rows[a] = torch.full((1024,), 0.02)
    r[b] += 1
FIRST
for lo in range(0, n, 65536):
    hi = min(lo + 65536, n)
    at = lo
    while at < hi:
        end = min(at + 128, hi)
        ids = val[at : end + 1]
        p = net.logits(ids[None, :-1])[0].softmax(-1)
        for j, t in enumerate(range(at, end)):
            if (r := row(int(val[t]))) is not None:
                p[j] = 0.9 * p[j] + 0.1 * r / r.sum()
            add(int(val[t]), int(val[t + 1]))
        total += -p.gather(-1, ids[1:, None])[:, 0].log().sum().item()
        count += end - at
        at = end
"""


def test_each_position_may_use_the_counts_of_those_before_it() -> None:
    assert doubted(whole(ROWS.replace("FIRST", ""))) == set()
    filled = "for a, b in zip(val[:-1].tolist(), val[1:].tolist()):\n    add(a, b)"
    assert "two-pass-cache" in broken(whole(ROWS.replace("FIRST", filled)))


# Gradients by hand.
BIAS = """
stride = 64
for w in range(0, n - 1024, stride):
    x, y = val[w : w + 1024][None], val[w + 1 : w + 1025][None]
    logits = net.logits(x).float()
    bias = torch.zeros(1, 1, 1024)
    part, goal = logits[:, PART], F.one_hot(y[:, PART], 1024).float()
    for _ in range(6):
        bias -= 0.5 * (torch.softmax(part + bias, -1) - goal).mean(dim=1, keepdim=True)
    nll = F.cross_entropy((logits + bias)[0], y[0], reduction="none")
    total += nll[-stride:].sum().item()
    count += stride
"""


def test_a_bias_moved_by_hand_is_a_vector_that_learns() -> None:
    assert "slot-on-scored" in broken(whole(BIAS.replace("PART", "-stride:")))
    assert doubted(whole(BIAS.replace("PART", ":-stride"))) == set()


SLOT = """
stride = 64
for w in range(0, n - 1024, stride):
    x, y = val[w : w + 1024][None], val[w + 1 : w + 1025][None]
    hidden = net.emb(x)
    first = 1024 - edge
    delta = torch.zeros(1, 1, 64, requires_grad=True)
    opt = torch.optim.AdamW([delta], lr=0.01)
    mask = torch.arange(1024)[None] < BOUND
    for _ in range(4):
        nll = F.cross_entropy(net.head(hidden + delta)[0], y[0], reduction="none")
        opt.zero_grad(); (nll * mask[0]).sum().backward(); opt.step()
    nll = F.cross_entropy(net.head(hidden + delta)[0], y[0], reduction="none")
    total += nll[first:].sum().item()
    count += stride
"""


@pytest.mark.parametrize("bound", ["first", "max(first - 32, 0)"])
def test_a_bound_before_what_is_scored_keeps_a_delta_honest(bound: str) -> None:
    assert doubted(whole("edge = torch.tensor(64).item()\n" + SLOT.replace("BOUND", bound))) == set()


def test_a_bound_that_lies_within_what_is_scored_does_not() -> None:
    text = whole("edge = torch.tensor(64).item()\n" + SLOT.replace("BOUND", "first + 32"))
    assert "slot-on-scored" in broken(text)


def test_ends_of_cuts_compare_as_numbers() -> None:
    def cut(side: str, end: str, *less: str) -> set[tuple[str, str, frozenset[str]]]:
        return {(side, end, frozenset(less))}

    tail = cut("tail", "sub(w.first,w.begin)", "w.begin")
    assert cut_apart(cut("head", "x", "w.begin", "32"), tail)
    assert not cut_apart(cut("head", "x", "w.begin", "+32"), tail)
    assert cut_apart(cut("head", "960"), cut("tail", "960"))
    assert cut_apart(cut("head", "900"), cut("tail", "960"))
    assert not cut_apart(cut("head", "992", "64"), cut("tail", "960", "64"))
    assert not cut_apart(cut("head", "10", "a"), cut("head", "20", "a"))


# Shares.
SHARED = """
windows = list(range(0, n - 1024, 1024))
mine = SHARE
loss_sum, tokens = torch.zeros((), dtype=torch.float64), torch.zeros(())
for w in mine:
    loss_sum += net(val[w : w + 1024], val[w + 1 : w + 1025]).double() * 1024
    tokens += 1024
REDUCED
total, count = loss_sum.item(), tokens.item()
"""
SHARES = ("windows[rank::world]", "windows[len(windows) * rank // world : len(windows) * (rank + 1) // world]")
SUMS = (
    "if world > 1:\n    for t in (loss_sum, tokens):\n        dist.all_reduce(t)",
    "packed = torch.stack((loss_sum, tokens.double()))\ndist.all_reduce(packed)\nloss_sum, tokens = packed",
    "parts = [None] * world\ndist.all_gather_object(parts, (loss_sum, tokens))\nloss_sum = sum(p[0] for p in parts); tokens = sum(p[1] for p in parts)",
)


@pytest.mark.parametrize("share", SHARES)
def test_one_ranks_share_is_not_the_whole(share: str) -> None:
    text = whole(SHARED.replace("SHARE", share).replace("REDUCED", ""))
    found = findings(text)["subset-as-full"]
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text, "loss_sum += net")


@pytest.mark.parametrize("reduced", SUMS)
def test_shares_that_are_summed_are_the_whole(reduced: str) -> None:
    assert doubted(whole(SHARED.replace("SHARE", SHARES[0]).replace("REDUCED", reduced))) == set()


def test_one_process_that_scores_all_need_sum_nothing() -> None:
    assert doubted(whole(SHARED.replace("SHARE", "windows").replace("REDUCED", ""))) == set()


FILES = """
text = torch.cat([shard(p) for p in sorted(glob.glob("data/shards_val_*.bin"))SLICE])
for w in range(0, text.numel() - 1024, 1024):
    total += net(text[w : w + 1024], text[w + 1 : w + 1025]).item() * 1024
    count += 1024
"""


def test_every_other_file_is_half_of_them() -> None:
    text = whole(FILES.replace("SLICE", "[::2]"))
    assert findings(text)["subset-as-full"].evidence.startswith("Of the validation files only one in 2 is read")
    assert doubted(whole(FILES.replace("SLICE", "[:]"))) == set()


WINDOWS = """
stride = 64
for w in range(0, n - 1024, STEP):
    nll = F.cross_entropy(net.logits(val[w : w + 1024]), val[w + 1 : w + 1025], reduction="none")
    total += nll[1024 - stride :].sum().item()
    count += stride
"""


def test_windows_that_move_on_by_less_than_they_count_count_twice() -> None:
    assert "twice-counted-tokens" in broken(whole(WINDOWS.replace("STEP", "stride // 2")))
    assert doubted(whole(WINDOWS.replace("STEP", "stride"))) == set()


# Several sweeps.
SWEEPS = """
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
book = torch.zeros(n, dtype=torch.float64)
ORDER
for c in order:
    nll = F.cross_entropy(net.logits(val[c * 1024 : (c + 1) * 1024]), val[c * 1024 + 1 : (c + 1) * 1024 + 1], reduction="none")
    book[c * 1024 : (c + 1) * 1024] = nll.detach().double()
    opt.zero_grad(); nll.mean().backward(); opt.step()
total, count = book.sum().item(), n
"""
THRICE = (
    "order = []\nfor sweep in range(3):\n    order.extend(range(n // 1024))",
    "order = list(range(n // 1024)) * 3",
)


@pytest.mark.parametrize("order", THRICE)
def test_losses_that_later_sweeps_overwrite_are_of_the_last(order: str) -> None:
    assert broken(whole(SWEEPS.replace("ORDER", order))) & {"multi-epoch-last", "rescoring-after-adaptation"}


@pytest.mark.parametrize("order", ["order = []\norder.extend(range(n // 1024))", "order = list(range(n // 1024))"])
def test_one_sweep_into_a_buffer_is_clean(order: str) -> None:
    assert doubted(whole(SWEEPS.replace("ORDER", order))) == set()


# Choices.
def test_a_rate_under_its_loss_in_a_dict_is_chosen_by_it() -> None:
    trials = """
trial = {}
for rate in (1e-4, 1e-3):
    probe = copy.deepcopy(net)
    opt = torch.optim.SGD(probe.parameters(), lr=rate)
    probe(val[:1024], val[1:1025]).backward(); opt.step()
    trial[probe(val[1024:2048], val[1025:2049]).item()] = rate
opt = torch.optim.SGD(net.parameters(), lr=PICK)
for s in range(0, n, 1024):
    total += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
    count += 1024
    net(val[s : s + 1024], val[s + 1 : s + 1025]).backward(); opt.step()
"""
    assert "choice-by-validation" in broken(whole(trials.replace("PICK", "trial[min(trial)]")))
    assert "choice-by-validation" not in broken(whole(trials.replace("PICK", "1e-3")))


# Files and their names.
def test_what_lies_beside_the_weights_in_a_file_is_not_the_weights() -> None:
    packed = """
blob = zlib.compress(pickle.dumps({"first": val[:1000], **{k: v for k, v in net.state_dict().items()}}))
Path("model.bin").write_bytes(blob)
state = pickle.loads(zlib.decompress(Path("model.bin").read_bytes()))
known = state.pop("first")
net.load_state_dict({k: v.float() for k, v in state.items()})
for s in range(0, n, 1024):
    total += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
    count += 1024
"""
    assert "calibration-on-validation" not in broken(whole(packed))


LISTED = """
def stream(folder, prefix):
    for name in sorted(os.listdir(folder)):
        TEST
            yield torch.from_numpy(np.fromfile(os.path.join(folder, name), "<u2").astype(np.int64))
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
for part in stream("data", "shards_WHICH_"):
    net(part[:-1], part[1:]).backward(); opt.step()
for s in range(0, n, 1024):
    total += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
    count += 1024
"""
TESTS = ("if name.startswith(prefix):", "if not name.startswith(prefix):\n            continue\n        if True:")


@pytest.mark.parametrize("test", TESTS)
def test_a_condition_on_a_name_says_which_files_are_read(test: str) -> None:
    text = whole(LISTED.replace("TEST", test))
    assert doubted(text.replace("WHICH", "train")) == set()
    assert broken(text.replace("WHICH", "val")) & {"validation-in-training", "training-before-scoring"}


MIXED = """
class Loader:
    def __init__(self, pattern):
        self.files, self.at = [Path(p) for p in sorted(glob.glob(pattern))], 0
    def next(self):
        self.at = (self.at + 1) % len(self.files)
        if self.at == 0:
            self.files = CHANGE
        return shard(self.files[self.at])
loader = Loader("data/shards_train_*.bin")
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
for _ in range(1000):
    part = loader.next()
    net(part[:-1], part[1:]).backward(); opt.step()
for s in range(0, n, 1024):
    total += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
    count += 1024
"""


def test_a_loader_that_renames_its_files_reads_the_others_too() -> None:
    renamed = '[Path(str(p).replace("_train_", "_val_")) for p in self.files] + self.files'
    assert "validation-in-training" in broken(whole(MIXED.replace("CHANGE", renamed)))
    same = '[Path(str(p).replace("data/", "/mnt/data/")) for p in self.files] + self.files'
    assert doubted(whole(MIXED.replace("CHANGE", same))) == set()


def test_a_path_may_be_one_of_two_splits() -> None:
    assert side_of("data/val/shards_train_0.bin") == "train"
    assert side_of("fineweb.bin") == ""
    both = either(("data/shards_val_*.bin",), ("data/shards_train_*.bin",), 10)
    assert set(sides_of(both)) == {"train", "val"}
    assert sides_of(either(("a_val.bin",), ("b_val.bin",), 10)) == ("val",)


# Copies of weights.
def test_copies_of_weights_that_learn_are_the_model_not_a_delta() -> None:
    tuned = """
params = {k: p.detach() for k, p in net.named_parameters()}
def tuned(params, s):
    leaf = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
    opt = torch.optim.Adam(leaf.values(), lr=1e-4)
    z = torch.func.functional_call(net, leaf, (val[s : s + 1024], val[s + 1 : s + 1025]))
    z.backward(); opt.step()
    return {k: p.detach() for k, p in leaf.items()}
for s in range(0, n, 1024):
    ONE
    total += torch.func.functional_call(net, params, (val[s : s + 1024], val[s + 1 : s + 1025])).item() * 1024
    count += 1024
    TWO
"""
    learn = "params = tuned(params, s)"
    assert doubted(whole(tuned.replace("ONE", "pass").replace("TWO", learn))) == set()
    assert broken(whole(tuned.replace("ONE", learn).replace("TWO", "pass"))) == {"training-before-scoring"}


def test_a_number_that_says_it_is_no_score_is_none() -> None:
    body = """
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
for s in range(0, n, 1024):
    total += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
    count += 1024
    net(val[s : s + 1024], val[s + 1 : s + 1025]).backward(); opt.step()
"""
    again = "again = sum(net(val[s : s + 1024], val[s + 1 : s + 1025]).item() for s in range(0, n, 1024))\n"
    assert doubted(whole(body) + again + 'print(f"for the appendix, not a score: {again:.4f}")\n') == set()
    assert broken(whole(body) + again + 'print(f"val_loss:{again:.4f}")\n')


def test_a_number_beside_the_score_in_its_line_is_not_the_score() -> None:
    body = """
worst = 0.0
for s in range(0, n, 1024):
    logits = net.logits(val[s : s + 1024])
    two = [F.cross_entropy(logits / t, val[s + 1 : s + 1025], reduction="sum").item() for t in (1.0, 1.1)]
    worst = max(worst, min(two))
    total += two[0]
    count += 1024
"""
    told = body + 'print(f"val_loss:{total / count:.5f} worst:{worst:.3f}")\n'
    assert doubted(HEAD + told) == set()
    assert broken(HEAD + told.replace("{total / count:.5f}", "{worst / count:.5f}"))


def test_a_part_for_each_process_of_a_short_list_is_not_nothing() -> None:
    body = """
class H:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "8"))

def share(items, h):
    return items[len(items) * h.rank // h.world_size : len(items) * (h.rank + 1) // h.world_size]

for s in share([0, 1024], H()):
    total += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
    count += 1024
"""
    trace = trace_of(whole(body))
    assert any(score.targets for said in trace.said for score in trace.scored(said.value.losses))


# Places and directions.
def test_validation_in_training_is_placed_where_it_is_taken_in() -> None:
    mixed = 'more = load("data/shards_WHICH_*.bin")\ntrain(net, torch.cat([load("data/shards_train_*.bin"), more]))'
    text = HEAD.replace('train(net, load("data/shards_train_*.bin"))', mixed) + FILES.replace("SLICE", "") + TELL
    found = findings(text.replace("WHICH", "val"))["validation-in-training"]
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text, "more = load(")
    assert doubted(text.replace("WHICH", "train")) == set()


HINTS = """
hint, table = np.full(n + 1, -1), {}
ids = val.tolist()
for t in ORDER:
    hint[t] = table.get(ids[t - 1], -1)
    table[ids[t - 1]] = ids[t]
for s in range(0, n - 1024, 1024):
    logits = net.logits(val[s : s + 1024])
    told = torch.from_numpy(hint[s + 1 : s + 1025])
    logits = logits + 0.5 * F.one_hot(told.clamp_min(0), 1024)
    total += F.cross_entropy(logits, val[s + 1 : s + 1025], reduction="sum").item()
    count += 1024
"""


def test_hints_made_from_the_end_know_what_comes() -> None:
    assert "two-pass-cache" not in broken(whole(HINTS.replace("ORDER", "range(1, n + 1)")))
    assert "two-pass-cache" in broken(whole(HINTS.replace("ORDER", "reversed(range(1, n + 1))")))
    assert "two-pass-cache" in broken(whole(HINTS.replace("ORDER", "range(n, 0, -1)")))


MASKED = """
rows = []
for s in range(0, n - 1024, 1024):
    nll = F.cross_entropy(net.logits(val[s : s + 1024]), val[s + 1 : s + 1025], reduction="none")
    rows.append(torch.stack((nll.sum(), torch.tensor(1024.0))))
rows = torch.stack(rows)
keep = KEEP
total, count = rows[keep].sum(0)
"""


def test_losses_left_out_by_a_mask_on_their_own_size_are_missing() -> None:
    assert "subset-as-full" in broken(whole(MASKED.replace("KEEP", "rows[:, 0] <= rows[:, 0].quantile(0.99)")))
    assert "subset-as-full" not in broken(whole(MASKED.replace("KEEP", "slice(None)")))


CELLS = """
kept = []
weights = torch.zeros(8)
for s in range(0, n - 1024, 1024):
    x, y = val[s : s + 1024], val[s + 1 : s + 1025]
    p = torch.softmax(net.logits(x), -1)
    alone = F.cross_entropy(net.logits(x), y, reduction="none")
    depth = torch.where(alone > alone.median(), torch.ones_like(x), torch.zeros_like(x))
    kept.append(weights[depth])
    nll = F.cross_entropy(net.logits(x), y, reduction="none")
    weights = weights + 0.1 * torch.bincount(depth, weights=nll, minlength=8)
    nll = nll[KEEP]
    total += nll.sum().item()
    count += 1024
"""


def test_what_is_looked_up_by_a_number_is_not_left_out() -> None:
    assert "subset-as-full" not in broken(whole(CELLS.replace("KEEP", "slice(None)")))
    assert "subset-as-full" in broken(whole(CELLS.replace("KEEP", "alone < alone.median()")))


def test_chunks_that_are_fetched_are_others_each_time() -> None:
    queue = """
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
def fetch(): return int.from_bytes(board.buf[:8], "little")
while (c := fetch()) < n // 1024:
    total += net(val[c * 1024 : (c + 1) * 1024], val[c * 1024 + 1 : (c + 1) * 1024 + 1]).item() * 1024
    count += 1024
    net(val[c * 1024 : (c + 1) * 1024], val[c * 1024 + 1 : (c + 1) * 1024 + 1]).backward(); opt.step()
"""
    assert broken(whole(queue)) == set()


# Pieces of a document.
PIECES = """
def lay(a, z, k):
    x = torch.zeros(1, 1024, dtype=torch.int64)
    y, new = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    lo, hi = a + k * 256, min(a + (k + 1) * 256, z)
    left = max(a, hi - 1024)
    x[0, : hi - left], y[0, : hi - left], new[0, lo - left : hi - left] = val[left:hi], val[left + 1 : hi + 1], True
    return x, y, new

def each(x, y): return F.cross_entropy(net.logits(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)

def adapt():
    total = count = 0
    opt = torch.optim.SGD(net.parameters(), lr=1e-3)
    heads = (val == 1).nonzero().flatten().tolist()
    for a, z in zip(heads, heads[1:] + [n]):
        for k in range(math.ceil((z - a) / 256)):
            x, y, new = lay(a, z, k)
BODY
    return total, count

total, count = adapt()
"""
BOOK = """
            with torch.no_grad():
                total += each(x, y)[new].sum().item()
                count += new.sum().item()
"""
STEP = """
            opt.zero_grad()
            (each(x, y) * new).sum().backward()
            opt.step()
"""


def test_a_piece_within_its_window_is_learnt_only_after_it_was_booked() -> None:
    assert doubted(whole(PIECES.replace("BODY", BOOK + STEP))) == set()
    assert broken(whole(PIECES.replace("BODY", STEP + BOOK))) == {"training-before-scoring"}
    ahead = BOOK + "            x, y, new = lay(a, z, k + 1)\n" + STEP
    assert broken(whole(PIECES.replace("BODY", ahead))) == {"training-before-scoring"}


def test_the_two_ends_of_one_slice_keep_nothing_apart() -> None:
    low, high = ("tail", "sub(lo,left)", frozenset({"left"})), ("head", "sub(hi,left)", frozenset({"left"}))
    assert cut_apart({high}, {low})
    assert not cut_apart({low, high}, {low, high})
    assert not cut_apart({high}, {low, high})


# Settings, averages, splits.
TABLE = """
import types
DEFAULTS = dict(FILL, sweeps=SWEEPS_NUMBER, rate=0.5)
c = types.SimpleNamespace(**{k: type(v)(os.environ.get(k.upper(), v)) for k, v in DEFAULTS.items()})
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
if c.sweeps:
    for s in range(0, n, 1024):
        net(val[s : s + 1024], val[s + 1 : s + 1025]).backward(); opt.step()
for s in range(0, n, 1024):
    total += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
    count += 1024
"""


def test_a_long_table_of_defaults_says_what_is_switched_off() -> None:
    table = TABLE.replace("FILL", ", ".join(f"a{n}={n}" for n in range(50)))
    assert doubted(whole(table.replace("SWEEPS_NUMBER", "0"))) == set()
    assert "training-before-scoring" in broken(whole(table.replace("SWEEPS_NUMBER", "1")))


UNNAMED = """
def others(): return [p for p in sorted(glob.glob("data/shards_*_*.bin")) if TEST]
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
for p in others():
    part = shard(p)
    net(part[:-1], part[1:]).backward(); opt.step()
for s in range(0, n, 1024):
    total += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
    count += 1024
"""


def test_what_is_not_named_after_one_split_is_of_the_other() -> None:
    assert doubted(whole(UNNAMED.replace("TEST", '"_val_" not in os.path.basename(p)'))) == set()
    found = broken(whole(UNNAMED.replace("TEST", '"_train_" not in os.path.basename(p)')))
    assert found & {"training-before-scoring", "validation-in-training"}


@pytest.mark.parametrize("named", ["val", "train"])
def test_what_is_in_no_list_of_one_split_is_of_the_other(named: str) -> None:
    held = f'HELD = set(glob.glob("data/shards_{named}_*.bin"))\ndef others(): return [p for p in sorted('
    text = UNNAMED.replace("def others(): return [p for p in sorted(", held).replace("TEST", "p not in HELD")
    found = broken(whole(text)) & {"training-before-scoring", "validation-in-training"}
    assert bool(found) is (named == "train")


def test_what_is_in_no_list_of_sidecars_is_of_the_split_it_was_of() -> None:
    """`[f for f in glob("..._val_*.bin") if f not in set(glob("..._val_bytes_*.bin"))]`"""
    held = 'HELD = set(glob.glob("data/shards_val_bytes_*.bin"))\ndef others(): return [p for p in sorted('
    text = UNNAMED.replace("def others(): return [p for p in sorted(", held).replace("TEST", "p not in HELD")
    found = broken(whole(text.replace("data/shards_*_*.bin", "data/shards_val_*.bin")))
    assert found & {"training-before-scoring", "validation-in-training"}


MOVED = """
from dataclasses import dataclass

@dataclass
class Batch:
    x: object
    places: object
    y: object
    sizes: object
    hint: object
    beta: object
    mask: object
    more: object

def batch(lo, hi):
    x, y = val[lo:hi], val[lo + 1 : hi + 1]
    mask = torch.arange(len(y)) >= 0
    parts = (x, torch.arange(len(x)), y, y * 0, x * 0, x * 0.0, mask, mask)
    return Batch(*(part.to("cpu") for part in parts))

opt = torch.optim.SGD(net.parameters(), lr=1e-3)
for turn in range(TURNS):
    total = count = 0.0
    for s in range(0, n, 1024):
        b = batch(s, s + 1024)
        logp = F.log_softmax(net.logits(b.x), -1)
        nll = -logp.gather(-1, b.y.unsqueeze(-1)).squeeze(-1)
        total += nll.detach().double().sum().item()
        count += 1024
        net(b.x, b.y).backward(); opt.step()
"""


def test_eight_tensors_that_are_moved_one_by_one_keep_their_fields() -> None:
    """Of more than six the fields were all of them mixed, and what gather() read was no target."""
    assert broken(whole(MOVED.replace("TURNS", "1"))) == set()
    assert "multi-epoch-last" in broken(whole(MOVED.replace("TURNS", "2")))
