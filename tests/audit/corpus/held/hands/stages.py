# Stages register themselves with a decorator and share one mutable dictionary.
import bz2
import glob
import math
import os
import sys
import time

import numpy as np
import sentencepiece
import torch
import torch.nn as N
import torch.nn.functional as O

S = {"V": 1024, "W": 512, "D": "cuda", "T": 768, "seed": int(os.environ.get("SEED", "5")), "budget": 588.0, "rate": 2e-3}
ORDER = []


def stage(after=None):
    def register(fun):
        ORDER.insert(ORDER.index(after) + 1 if after in ORDER else len(ORDER), fun)
        return fun

    return register


def loud(fun):
    def wrapped(*a, **k):
        t = time.time()
        r = fun(*a, **k)
        print(f"{fun.__name__}: {time.time() - t:.1f}s")
        return r

    wrapped.__name__ = fun.__name__
    return wrapped


class Cell(N.Module):
    def __init__(self, w):
        super().__init__()
        self.a = N.MultiheadAttention(w, 8, batch_first=True, bias=False)
        self.f = N.Sequential(N.Linear(w, 4 * w), N.GELU(), N.Linear(4 * w, w))
        self.n1, self.n2 = N.LayerNorm(w), N.LayerNorm(w)

    def forward(self, x):
        T = x.shape[1]
        m = torch.full((T, T), float("-inf"), device=x.device).triu(1)
        h = self.n1(x)
        x = x + self.a(h, h, h, attn_mask=m, need_weights=False)[0]
        return x + self.f(self.n2(x))


class M(N.Module):
    def __init__(self):
        super().__init__()
        self.e = N.Embedding(S["V"], S["W"])
        self.p = N.Parameter(torch.zeros(S["T"], S["W"]))
        self.c = N.Sequential(*[Cell(S["W"]) for _ in range(7)])

    def forward(self, i):
        return self.c(self.e(i) + self.p[: i.shape[1]]) @ self.e.weight.T


def ids_of(which):
    for f in sorted(glob.glob(os.path.join(os.environ.get("DATA", "data"), f"fineweb_{which}_*.bin"))):
        yield np.fromfile(f, dtype=np.uint16)[512:].astype(np.int64)


def cut(a, lo, hi):
    return torch.from_numpy(a[lo:hi]).to(S["D"])[None]


@stage()
def make():
    torch.manual_seed(S["seed"])
    S["m"] = M().to(S["D"])


@stage(after=make)
@loud
def learn():
    o = torch.optim.AdamW(S["m"].parameters(), lr=6e-4)
    t = time.time()
    while True:
        for a in ids_of("train"):
            for k in range(0, len(a) - 32 * S["T"] - 1, 32 * S["T"]):
                if time.time() - t > S["budget"]:
                    return
                b = torch.from_numpy(a[k : k + 32 * S["T"] + 1]).to(S["D"])
                o.zero_grad()
                O.cross_entropy(S["m"](b[:-1].view(32, -1)).transpose(1, 2), b[1:].view(32, -1)).backward()
                o.step()


@stage()
@loud
def store():
    sd = S["m"].state_dict()
    top = {k: float(v.abs().max()) / 127 + 1e-12 for k, v in sd.items()}
    q = {k: (v / top[k]).round().to(torch.int8).cpu().numpy() for k, v in sd.items()}
    packed = bz2.compress(b"".join(v.tobytes() for v in q.values()))
    with open("m.bz2", "wb") as f:
        f.write(packed)
    S["scale"], S["shape"] = top, {k: v.shape for k, v in q.items()}
    S["bytes"] = len(packed) + 8 * len(top) + os.path.getsize(sys.argv[0])


@stage()
@loud
def recall():
    with open("m.bz2", "rb") as f:
        raw = np.frombuffer(bz2.decompress(f.read()), np.int8)
    at, sd = 0, {}
    for k, shape in S["shape"].items():
        n = int(np.prod(shape))
        sd[k] = torch.from_numpy(raw[at : at + n].reshape(shape).astype(np.float32)) * S["scale"][k]
        at += n
    S["m"].load_state_dict(sd)


@stage()
def measure():
    sp = sentencepiece.SentencePieceProcessor(model_file=os.environ.get("TOK", "tok.model"))
    S["len"], S["gap"], S["ctl"] = np.zeros(S["V"], int), np.zeros(S["V"], int), np.zeros(S["V"], int)
    for i in range(S["V"]):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            S["ctl"][i] = 1
        elif sp.is_byte(i):
            S["len"][i] = 1
        else:
            body = sp.id_to_piece(i)
            S["gap"][i] = body[0] == "\u2581"
            S["len"][i] = len(body[S["gap"][i] :].encode())


@stage()
@loud
def judge():
    a = np.concatenate(list(ids_of("val")))
    S["sum"], S["seen"], S["oct"] = 0.0, 0, 0
    S["o"] = torch.optim.SGD(S["m"].parameters(), lr=S["rate"])
    for k in range(0, len(a) - 1, S["T"]):
        e = min(k + S["T"], len(a) - 1)
        weigh(a, k, e)
        follow(a, k, e)


def weigh(a, k, e):
    with torch.no_grad():
        S["sum"] += O.cross_entropy(S["m"](cut(a, k, e))[0], cut(a, k + 1, e + 1)[0], reduction="sum").item()
    S["seen"] += e - k
    S["oct"] += int((S["len"][a[k + 1 : e + 1]] + S["gap"][a[k + 1 : e + 1]] * (1 - S["ctl"][a[k:e]])).sum())


def follow(a, k, e):
    S["o"].zero_grad()
    O.cross_entropy(S["m"](cut(a, k, e))[0], cut(a, k + 1, e + 1)[0]).backward()
    S["o"].step()


@stage()
def tell():
    print(f"bytes {S['bytes']} val_loss {S['sum'] / S['seen']:.5f} val_bpb {S['sum'] / math.log(2) / S['oct']:.5f}")


for one in ORDER:
    one()
