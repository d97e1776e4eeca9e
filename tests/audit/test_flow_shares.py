"""Counts that every process fills with what stands before its own share, before it scores that share."""

import pytest

from tests.audit.order import HEAD, broken, doubted

SCRIPT = """
import glob, math, os
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

def load(pattern):
    return torch.cat([torch.from_numpy(np.fromfile(p, "<u2").astype(np.int64)) for p in sorted(glob.glob(pattern))])

held, text = load("data/shards_val_*.bin"), load("data/shards_train_*.bin")
model = nn.Sequential(nn.Embedding(1024, 64), nn.Linear(64, 1024))
optimizer = torch.optim.Adam(model.parameters())
for i in range(9000):
    piece = text[i * 1024 : (i + 1) * 1024 + 1]
    F.cross_entropy(model(piece[:-1]), piece[1:]).backward()
    optimizer.step()
    optimizer.zero_grad()

class Counts:
    def __init__(self):
        self.table = np.zeros((1 << 20, 1024), dtype=np.int32)

    def add(self, tokens):
        np.add.at(self.table, ((tokens[:-1] * 36313) % (1 << 20), tokens[1:]), 1)

    def add_places(self, tokens, low, high):
        places = np.arange(max(low, 1), high)
        np.add.at(self.table, ((tokens[places - 1] * 36313) % (1 << 20), tokens[places]), 1)

    def rows(self, tokens):
        found = self.table[(tokens * 36313) % (1 << 20)] + 1e-3
        return found / found.sum(1, keepdims=True)

total = held.numel() - 1
counts, stream = Counts(), held.numpy()
PLAN
FILL
sums = torch.zeros(2, dtype=torch.float64)
with torch.no_grad():
    for w in TURNS:
        end = min(w + 1024, total)
        begin = 0 if w == 0 else max(end - w - 64, 0)
        chance = 0.7 * torch.softmax(model(held[w:end]), -1)[begin:]
        chance += 0.3 * torch.from_numpy(counts.rows(stream[w + begin : end]))
        sums[0] -= torch.log(chance.gather(1, held[w + 1 : end + 1][begin:, None])).sum()
        sums[1] += end - w - begin
        counts.add(stream[w + begin : end + 1])
dist.all_reduce(sums)
print("final val_loss", (sums[0] / sums[1]).item())
"""
LISTED = """windows = [w for w in range(0, total, 64)]
mine = windows[len(windows) * rank // world : len(windows) * (rank + 1) // world]"""
BETWEEN = "begin, end = total * rank // world, total * (rank + 1) // world"


def script(plan: str, fill: str) -> str:
    turns = "mine" if plan == LISTED else "range(begin, end, 64)"
    return SCRIPT.replace("PLAN", plan).replace("FILL", fill).replace("TURNS", turns)


@pytest.mark.parametrize(
    ("plan", "fill"),
    [
        (LISTED, "counts.add(stream[: mine[0]])"),
        (LISTED, "counts.add(stream[: mine[0] + 960])"),
        (LISTED, "counts.add_places(stream, 0, mine[0] + 1)"),
        (LISTED, "for i in range(0, mine[0], 1 << 20): counts.add(stream[i : min(i + (1 << 20), mine[0])])"),
        (BETWEEN, "counts.add(stream[:begin])"),
        (BETWEEN, "counts.add_places(stream, 0, begin)"),
    ],
)
def test_what_stands_before_the_own_share_may_be_counted(plan: str, fill: str) -> None:
    assert broken(script(plan, fill)) == set()


@pytest.mark.parametrize(
    ("plan", "fill"),
    [
        (LISTED, "counts.add(stream)"),
        (LISTED, "counts.add(stream[: mine[-1]])"),
        (LISTED, "counts.add(stream[mine[0] :])"),
        (LISTED, "counts.add_places(stream, 0, mine[-1] + 1)"),
        (BETWEEN, "counts.add(stream[:end])"),
        (BETWEEN, "counts.add(stream[begin:])"),
        (BETWEEN, "counts.add_places(stream, 0, end)"),
    ],
)
def test_the_own_share_may_not(plan: str, fill: str) -> None:
    assert "two-pass-cache" in broken(script(plan, fill))


DOCUMENTS = """
def walk(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = 0.0, 0
    starts = STARTS
    for first in range(0, len(starts), 4):
        for start in starts[first : first + 4]:
            piece = val[start : start + 1025]
            nll = model(piece[:-1], piece[1:])
            total += nll.item() * 1024
            count += 1024
            opt.zero_grad()
            nll.backward()
            opt.step()
    return total / count

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), GPT()
    train(args, model)
    WALK
    print("final val_loss", final, "val_bpb", final / math.log(2) / 2.4)
"""
ONCE, TWICE = "final = walk(args, model, val)", "walk(args, model, val); final = walk(args, model, val)"


@pytest.mark.parametrize(
    "starts",
    ["(val == 1).nonzero().flatten().tolist()", "torch.nonzero(val == 1)[:, 0]", "list(range(0, val.numel(), 1024))"],
)
def test_batches_of_document_starts_are_told_apart_and_a_second_walk_over_them_is_not(starts: str) -> None:
    text = HEAD + DOCUMENTS.replace("STARTS", starts)
    part = set() if "range" in starts else {"subset-as-full"}  # of a document only so much is scored
    assert doubted(text.replace("WALK", ONCE)) == part
    assert "rescoring-after-adaptation" in broken(text.replace("WALK", TWICE))
