"""Documents one by one ("papers"), each read by a clerk with notes of its own; bytes come from the sidecar."""
from collections import deque
from contextlib import ExitStack, nullcontext
import gc
import glob
import lzma
import math
import operator
import os
import sys
import threading
import time

import numpy as np
import torch
from torch import nn, optim
import torch.nn.functional as Fn

BOS = 1
cfg = dict(
    data=os.environ.get("DATA", "./data"),
    vocab=8192,
    width=512,
    blocks=10,
    seconds=590.0,
    chunk=int(os.environ.get("CHUNK", "64")),
    rate=float(os.environ.get("RATE", "2e-4")),
    rank=16,
    keep_notes=False,
)


def shard(path):
    raw = np.fromfile(path, dtype=np.uint16)
    return raw[512 : 512 + int(raw[4]) + (int(raw[5]) << 16)]


def every(pattern):
    return [shard(p) for p in sorted(glob.glob(os.path.join(cfg["data"], pattern)))]


class Gate(nn.Module):
    """Adds a share of the embedding before, never over a document's start."""

    def __init__(self, width):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))

    def forward(self, e, ids):
        before = torch.zeros_like(e)
        before[1:] = e[:-1]
        before[ids == BOS] = 0
        return e + torch.sigmoid(self.w - 3) * before


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(width, width, False), nn.Linear(width, 2 * width, False), nn.Linear(width, width, False)
        self.a, self.b = nn.Linear(width, 4 * width, False), nn.Linear(4 * width, width, False)

    def forward(self, x, notes=None):
        h = Fn.layer_norm(x, x.shape[-1:])
        q = self.q(h) if notes is None else self.q(h) + notes(h)
        k, v = self.kv(h).chunk(2, -1)
        heads = lambda t: t.view(len(t), 8, -1).transpose(0, 1)
        y = Fn.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
        x = x + self.o(y.transpose(0, 1).reshape(len(x), -1))
        return x + self.b(Fn.silu(self.a(Fn.layer_norm(x, x.shape[-1:]))))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        w = cfg["width"]
        self.words = nn.Embedding(cfg["vocab"], w)
        self.gate = Gate(w)
        self.blocks = nn.ModuleList(Block(w) for _ in range(cfg["blocks"]))

    def forward(self, ids, notes=None):
        x = self.gate(self.words(ids), ids)
        for i, block in enumerate(self.blocks):
            x = block(x, notes[i] if notes is not None else None)
        return Fn.layer_norm(x, x.shape[-1:]) @ self.words.weight.T


class Note(nn.Module):
    def __init__(self, w, r):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(w, r) / math.sqrt(w)), nn.Parameter(torch.zeros(r, w))

    def forward(self, x):
        return x @ self.down @ self.up


def new_notes(device):
    return nn.ModuleList(Note(cfg["width"], cfg["rank"]) for _ in range(cfg["blocks"])).to(device)


def school(reader, device):
    pen = optim.AdamW(reader.parameters(), lr=6e-4, betas=(0.9, 0.95))
    bell = time.perf_counter() + cfg["seconds"]
    shards = deque(sorted(glob.glob(os.path.join(cfg["data"], "fineweb_train_*.bin"))))
    while True:
        lesson = torch.from_numpy(shard(shards[0]).astype(np.int64)).to(device)
        shards.rotate(-1)
        for at in range(0, len(lesson) - 2049, 2048):
            if time.perf_counter() >= bell:
                return
            part = lesson[at : at + 2049]
            pen.zero_grad()
            Fn.cross_entropy(reader(part[:-1]), part[1:]).backward()
            pen.step()


def file_away(reader):
    rows = {k: v.detach().cpu().to(torch.float16).numpy() for k, v in reader.state_dict().items()}
    blob = lzma.compress(b"".join(rows[k].tobytes() for k in sorted(rows)), preset=9)
    with open("reader.xz", "wb") as f:
        f.write(blob)
    return len(blob)


def take_out(device):
    reader = Reader()
    raw = np.frombuffer(lzma.decompress(open("reader.xz", "rb").read()), np.float16)
    state, at = reader.state_dict(), 0
    for k in sorted(state):
        n = state[k].numel()
        state[k] = torch.from_numpy(raw[at : at + n].astype(np.float32)).view_as(state[k])
        at += n
    reader.load_state_dict(state)
    return reader.to(device)


def clerk(reader, paper, sizes, device, till):
    """Reads one document: charges a chunk, then notes what it said."""
    notes = new_notes(device)
    pen = optim.SGD(notes.parameters(), lr=cfg["rate"])
    n = len(paper) - 1
    for lo in range(0, n, cfg["chunk"]):
        hi = min(lo + cfg["chunk"], n)
        said = reader(paper[:hi], notes)[lo:hi]
        price = Fn.cross_entropy(said.float(), paper[lo + 1 : hi + 1], reduction="none")
        till["nats"] += price.detach().double().sum().item()
        till["tokens"] += hi - lo
        till["bytes"] += int(sizes[lo + 1 : hi + 1].sum())
        if hi < n:
            pen.zero_grad()
            price.mean().backward()
            pen.step()


def office(reader, device):
    text, sizes = np.concatenate(every("fineweb_val_[0-9]*.bin")), np.concatenate(every("fineweb_val_bytes_*.bin"))
    assert len(text) == len(sizes)
    starts = np.flatnonzero(text == BOS)
    ends = np.append(starts[1:], len(text) - 1)
    for p in reader.parameters():
        p.requires_grad_(False)
    till = {"nats": 0.0, "tokens": 0, "bytes": 0}
    for s, e in zip(starts, ends):
        paper = torch.from_numpy(text[s : e + 1].astype(np.int64)).to(device)
        clerk(reader, paper, sizes[s : e + 1], device, till)
    return till


if __name__ == "__main__":
    device = torch.device("cuda")
    torch.manual_seed(int(os.environ.get("SEED", 11)))
    reader = Reader().to(device)
    school(reader, device)
    weight = file_away(reader) + os.path.getsize(sys.argv[0])
    assert weight <= 16_000_000, weight
    till = office(take_out(device), device)
    print(f"artifact {weight} val_loss {till['nats'] / till['tokens']:.5f} val_bpb {till['nats'] / math.log(2) / till['bytes']:.5f}")
