"""Parameter Golf entry "haskeir": weight banks, minifloat codes, a counted bigram beside the net, biases that learn.

One file. `torchrun --standalone --nproc_per_node=8 train_gpt.py` trains (600 s at most, packing included), writes
final_model.bin, reads it back and scores the whole validation split once, from left to right.

What is in it:
  net     10 blocks of width 512, 8 heads on 4 key heads, rotary on half of a head, own value taken out of the answer,
          leaky-relu squared, skips from the first half of the blocks to the second, tied output with a bias
  train   Muon on banks sharded by layer, Adam on the rest; half-length sequences first; a second task (the token after
          the next) that fades out; straight-through rounding once the rate is low; EMA mixed with snapshots
  file    minifloats (2 exponent bits, 2 or 3 of mantissa) rounded by GPTQ against Hessians of training tokens, coded by
          rANS; a temperature fitted to training tokens
  score   stride 64; chunks of 65,536 targets; a counted bigram mixed in by how often its context was seen; after a chunk
          is scored its tokens are counted and the biases take two epochs of Adam on it

Expected on 8xH100: about 7,100 steps, 15.3 MB in all, evaluation about 260 s.

Names: B sequences, T positions, V vocabulary, D width, L layers, H heads, K key heads, d head width, W the dict of weights.
"""

from __future__ import annotations

import glob
import hashlib
import json
import lzma
import math
import os
import random
import struct
import sys
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F

# ---- settings: every one may be overridden by its upper-case name in the environment

DEFAULTS = dict(
    run_id="haskeir",
    seed=1337,
    # data
    data="./data/datasets/fineweb10B_sp1024",
    tok="./data/tokenizers/fineweb_1024_bpe.model",
    # net
    vocab=1024,
    layers=10,
    dim=512,
    heads=8,
    kv=4,
    mlp=3.0,
    softcap=30.0,
    rope=10000.0,
    rope_dims=32,
    qk_gain=1.5,
    # schedule
    steps=20000,
    batch=524288,
    micro=65536,
    seq=2048,
    warmup=20,
    ramp=10,
    down=0.45,
    short=0.35,
    qat=0.12,
    ahead=0.15,
    ahead_until=0.6,
    train_s=600.0,
    tail_s=75.0,
    log_every=200,
    val_every=4000,
    # optimisers
    lr_mat=0.025,
    lr_emb=0.035,
    lr_vec=0.02,
    wd=0.04,
    mom=0.97,
    mom0=0.90,
    mom_steps=1200,
    ns=5,
    b1=0.9,
    b2=0.95,
    clip=0.3,
    # averages
    ema=0.997,
    ema_every=2,
    swa_from=0.25,
    swa_every=50,
    swa_mix=0.5,
    # minifloats: exponent bits, mantissa bits
    fmt_att="2,3",
    fmt_mlp="2,2",
    fmt_emb="3,4",
    cal_seqs=96,
    damp=0.01,
    block=128,
    out="final_model.bin",
    limit=16000000,
    keep="",
    eval_only=False,
    # evaluation
    stride=64,
    ev_batch=64,
    chunk=65536,
    temp_seqs=32,
    cache=True,
    c_back=24.0,
    c_half=4000.0,
    c_max=0.06,
    ttt=True,
    ttt_lr=0.002,
    ttt_epochs=2,
    ttt_batch=4,
    eval_s=600.0,
    eval_tail=60.0,
    probe=True,
)
Config = SimpleNamespace()
for _k, _v in DEFAULTS.items():
    _s = os.environ.get(_k.upper())
    setattr(Config, _k, _v if _s is None else bool(int(_s)) if isinstance(_v, bool) else type(_v)(_s))

BF = torch.bfloat16
MATS = ("q", "k", "v", "o", "up", "dn")  # banks [L, in, out], Muon's
TUNED = ("ab", "mb", "lb")  # what test-time training may touch
MAGIC = 20240520
MARK = "\u2581"

# ---- ranks, clock, log


def ranks():
    """(rank, world, device); starts the process group where torchrun asks for one."""
    r, w, l = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    dev = torch.device("cuda", l)
    torch.cuda.set_device(dev)
    if w > 1:
        dist.init_process_group("nccl", device_id=dev)
    return r, w, dev


def summed(t):
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def same(x, dev):
    """Rank 0's number, on every rank: what a clock decides must be decided once."""
    t = torch.tensor([x], dtype=torch.float64, device=dev)
    if dist.is_initialized():
        dist.broadcast(t, 0)
    return t.item()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def logger(rank):
    Path("logs").mkdir(exist_ok=True)
    path = Path("logs") / f"{Config.run_id}.txt"

    def say(s, echo=True):
        if rank:
            return
        if echo:
            print(s, flush=True)
        with path.open("a") as f:
            f.write(s + "\n")

    return say


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def stopwatch():
    """A clock that can be stopped: now() in seconds, off() a context during which it stands."""
    s = SimpleNamespace(t0=time.perf_counter(), lost=0.0)

    def now():
        torch.cuda.synchronize()
        return time.perf_counter() - s.t0 - s.lost

    @contextmanager
    def off():
        torch.cuda.synchronize()
        a = time.perf_counter()
        yield
        torch.cuda.synchronize()
        s.lost += time.perf_counter() - a

    return now, off


# ---- tokens


def shard(path):
    """The tokens of one .bin file: 256 int32 of header, then uint16."""
    head = np.fromfile(path, dtype="<i4", count=256)
    if head.size != 256 or head[0] != MAGIC or head[1] != 1:
        raise ValueError(f"{path}: not a token shard")
    n = int(head[2])
    t = np.fromfile(path, dtype="<u2", count=n, offset=1024)
    if t.size != n:
        raise ValueError(f"{path}: {t.size} tokens, header says {n}")
    return torch.from_numpy(t.astype(np.int32))


def shards(kind):
    fs = sorted(glob.glob(os.path.join(Config.data, f"fineweb_{kind}_*.bin")))
    if not fs:
        raise FileNotFoundError(f"no fineweb_{kind}_*.bin under {Config.data}")
    return fs


def survey(say):
    """Logs what lies in the data folder; stops where a file would be read as both kinds."""
    seen = {}
    for kind in ("train", "val"):
        fs = shards(kind)
        n = sum(int(np.fromfile(f, dtype="<i4", count=3)[2]) for f in fs)
        say(f"{kind}: {len(fs)} files, {n} tokens, {Path(fs[0]).name} .. {Path(fs[-1]).name}")
        for f in fs:
            if seen.setdefault(os.path.realpath(f), kind) != kind:
                raise ValueError(f"{f} is both kinds")


def stream(files, rank, world, n):
    """For ever: this rank's n + 1 tokens out of the next world * n, shard after shard."""
    i, buf = 0, torch.empty(0, dtype=torch.int32)
    need = world * n + 1
    while True:
        while buf.numel() < need:
            buf = torch.cat([buf, shard(files[i % len(files)])])
            i += 1
        yield buf[rank * n : rank * n + n + 1]
        buf = buf[world * n :]


def batches(files, rank, world, dev):
    """give(T) -> (x, y) [B, T] on the device; B falls as T rises, the tokens stay as many."""
    T = Config.seq
    n = min(Config.batch // world, Config.micro) // T * T
    feed = stream(files, rank, world, n)

    def give(T):
        s = next(feed).pin_memory().to(dev, non_blocking=True).long()
        return s[:-1].view(-1, T), s[1:].view(-1, T)

    return give


def held(dev):
    """All validation tokens, in order, nothing cut off."""
    return torch.cat([shard(f) for f in shards("val")]).to(dev).long()


# ---- bytes


def tables(dev):
    """Per token: its own bytes, whether it opens with a space, whether it is no text at all (control, unknown, unused)."""
    sp = spm.SentencePieceProcessor(model_file=Config.tok)
    n, V = sp.vocab_size(), Config.vocab
    if n != V:
        raise ValueError(f"tokenizer has {n} pieces, VOCAB={V}")

    def row(i):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            return 0, False, True
        if sp.is_byte(i):
            return 1, False, False
        s = sp.id_to_piece(i)
        lead = s.startswith(MARK)
        return len(s[lead:].replace(MARK, " ").encode()), lead, False

    own, lead, none = zip(*(row(i) for i in range(n)), strict=True)
    f = lambda a, t: torch.tensor(a, dtype=t, device=dev)
    return f(own, torch.float64), f(lead, torch.bool), f(none, torch.bool)


def weigh(lut, prev, cur):
    """UTF-8 bytes of each token of cur: a leading space is a byte unless nothing stands before it."""
    own, lead, none = lut
    return own[cur] + (lead[cur] & ~none[prev]).double()


# ---- the net: a dict of weights and functions of it


def sizes():
    L, D, H, K = Config.layers, Config.dim, Config.heads, Config.kv
    return L, D, H, K, D // H, int(D * Config.mlp)


def init(dev):
    """Weights in fp32: banks drawn by width, projections back into the stream at zero, vectors at their neutral value."""
    L, D, H, K, d, M = sizes()
    g = torch.Generator().manual_seed(Config.seed)
    r = lambda *s: torch.randn(*s, generator=g) / math.sqrt(s[-2])
    o = torch.ones
    z = torch.zeros
    W = dict(
        emb=torch.randn(Config.vocab, D, generator=g) * 0.02,
        q=r(L, D, H * d),
        k=r(L, D, K * d),
        v=r(L, D, K * d),
        o=z(L, H * d, D),
        up=r(L, D, M),
        dn=z(L, M, D),
        qg=o(L, H) * Config.qk_gain,
        sa=o(L, D),
        sm=o(L, D),
        mix=torch.stack([o(L, D), z(L, D)], 1),
        skip=o(L // 2, D),
        ab=z(L, D),
        mb=z(L, D),
        lb=z(Config.vocab),
        far=torch.eye(D),
    )
    return {n: w.to(dev) for n, w in W.items()}


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def angles(T, dev):
    R = Config.rope_dims
    f = Config.rope ** (-torch.arange(0, R, 2, device=dev, dtype=torch.float32) / R)
    a = torch.arange(T, device=dev, dtype=torch.float32)[:, None] * f
    return a.cos().to(BF), a.sin().to(BF)


def turn(x, cs):
    """Rotary positions on the first rope_dims of a head; x [B, T, heads, d]."""
    (c, s), R = cs, Config.rope_dims
    c, s = c[:, None], s[:, None]
    a, b, rest = x[..., : R // 2], x[..., R // 2 : R], x[..., R:]
    return torch.cat([a * c - b * s, a * s + b * c, rest], -1)


def attend(W, l, x, cs, tap):
    B, T, D = x.shape
    H, K, d = Config.heads, Config.kv, D // Config.heads
    tap("q", l, x)
    p = lambda n, h: torch.einsum("btd,de->bte", x, W[n][l].to(BF)).view(B, T, h, d)
    q, k, v = p("q", H), p("k", K), p("v", K)
    q = turn(norm(q), cs) * W["qg"][l].to(BF)[:, None]
    k = turn(norm(k), cs)
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=H != K)
    # what the position's own value already says is taken out of the answer
    u = F.normalize(v, dim=-1).repeat_interleave(H // K, 2)
    y = y.transpose(1, 2)
    y = (y - (y * u).sum(-1, keepdim=True) * u).reshape(B, T, H * d)
    tap("o", l, y)
    return torch.einsum("bte,ed->btd", y, W["o"][l].to(BF))


def think(W, l, x, tap):
    tap("up", l, x)
    a = F.leaky_relu(torch.einsum("btd,dm->btm", x, W["up"][l].to(BF)), 0.5).square()
    tap("dn", l, a)
    return torch.einsum("btm,md->btd", a, W["dn"][l].to(BF))


def hidden(W, x, tap=lambda *_: None):
    """[B, T] tokens to [B, T, D]: pre-norm blocks, the first half's outputs handed to the second half."""
    L = Config.layers
    cs = angles(x.size(1), x.device)
    h = h0 = norm(W["emb"][x].to(BF))
    up = []
    for l in range(L):
        if l >= L - L // 2:
            h = h + W["skip"][l - (L - L // 2)].to(BF) * up.pop()
        m = W["mix"][l].to(BF)
        h = m[0] * h + m[1] * h0
        h = h + W["sa"][l].to(BF) * attend(W, l, norm(h), cs, tap) + W["ab"][l].to(BF)
        h = h + W["sm"][l].to(BF) * think(W, l, norm(h), tap) + W["mb"][l].to(BF)
        if l < L // 2:
            up.append(h)
    return norm(h)


def logits(W, h):
    z = torch.einsum("...d,vd->...v", h, W["emb"].to(BF)).float() + W["lb"]
    return Config.softcap * torch.tanh(z / Config.softcap)


def loss(W, x, y, ahead=0.0):
    """Mean nats per token; ahead weighs a second task, the token after the next from the same output bank."""
    h = fast(W, x)
    l = F.cross_entropy(logits(W, h).flatten(0, 1), y.flatten())
    if ahead:
        far = torch.einsum("btd,de->bte", h[:, :-1], W["far"].to(BF))
        l = l + ahead * F.cross_entropy(logits(W, norm(far)).flatten(0, 1), y[:, 1:].flatten())
    return l


fast = torch.compile(hidden, dynamic=False)

# ---- optimisers: Muon on the banks, sharded by layer; Adam on the rest


def orthogonal(G, n):
    """Newton-Schulz on a stack of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(BF)
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def muon(W, rank, world):
    """step(lr, mom): every rank has the momentum of its own layers of each bank."""
    pad = -(-Config.layers // world) * world
    k = pad // world
    mine = slice(rank * k, rank * k + k)
    M = {n: torch.zeros(k, *W[n].shape[1:], device=W[n].device) for n in MATS}

    def wide(t):
        return F.pad(t, (0, 0, 0, 0, 0, pad - t.size(0)))

    def reduced(g):
        g = wide(g)
        if world == 1:
            return g
        out = torch.empty(k, *g.shape[1:], device=g.device)
        dist.reduce_scatter_tensor(out, g.contiguous(), op=dist.ReduceOp.AVG)
        return out

    def spread(u):
        if world == 1:
            return u
        out = torch.empty(pad, *u.shape[1:], device=u.device, dtype=u.dtype)
        dist.all_gather_into_tensor(out, u.contiguous())
        return out

    @torch.no_grad()
    def step(lr, mom):
        for n in MATS:
            w, m = W[n], M[n]
            g = reduced(w.grad)
            m.lerp_(g, 1 - mom)
            u = orthogonal(g.lerp(m, mom), Config.ns)
            u = spread(u)[: Config.layers].float()
            # weights decay only where the step shrinks them anyway
            w.sub_(w * (u * w > 0), alpha=lr * Config.wd)
            w.add_(u, alpha=-lr * max(1.0, w.size(-1) / w.size(-2)) ** 0.5)
            w.grad = None

    return step, mine


def adam(W, names, lrs, betas=(0.9, 0.95), eps=1e-8):
    """step(f): Adam with bias correction, the rates lrs[n] times f; gradients are averaged over ranks first."""
    S = {n: (torch.zeros_like(W[n]), torch.zeros_like(W[n])) for n in names}
    t = [0]

    @torch.no_grad()
    def step(f, div=1):
        t[0] += 1
        c1, c2 = (1 - b ** t[0] for b in betas)
        for n in names:
            w, (m, v) = W[n], S[n]
            g = summed(w.grad) / div
            m.lerp_(g, 1 - betas[0])
            v.lerp_(g * g, 1 - betas[1])
            w.addcdiv_(m / c1, (v / c2).sqrt_().add_(eps), value=-f * lrs[n])
            w.grad = None

    return step


def clipped(W, names, top):
    """Scales the gradients of the small weights to a common norm."""
    g = [W[n].grad for n in names]
    s = torch.stack([t.norm() for t in g]).norm()
    f = (top / (s + 1e-6)).clamp(max=1.0)
    for t in g:
        t.mul_(f)


def census(W):
    """One line a kind of weight: how many, in which format, the bytes before any coding."""
    fmt = lambda n: Config.fmt_mlp if n in ("up", "dn") else Config.fmt_att if n in MATS else Config.fmt_emb
    bits = lambda n: 1 + sum(map(int, fmt(n).split(","))) if n in MATS + ("emb",) else 16
    return [f"{n} {w.numel()} at {bits(n)} bits, {w.numel() * bits(n) // 8} bytes" for n, w in W.items() if n != "far"]


# ---- averages


def averages(W):
    """keep(step, f) after each step, mean() at the end: an exponential average, mixed with a plain one of the decay."""
    E = {n: w.detach().clone() for n, w in W.items()}
    A, n_a = {n: torch.zeros_like(w) for n, w in W.items()}, [0]

    @torch.no_grad()
    def keep(step, f):
        if step % Config.ema_every == 0:
            d = min(Config.ema, (1 + step) / (10 + step)) ** Config.ema_every
            for n, e in E.items():
                e.lerp_(W[n], 1 - d)
        if f <= Config.swa_from and step % Config.swa_every == 0:
            n_a[0] += 1
            for n, a in A.items():
                a.add_(W[n])

    def mean():
        s = Config.swa_mix if n_a[0] else 0.0
        return {n: (1 - s) * E[n] + s * A[n] / max(n_a[0], 1) for n in W}, n_a[0]

    return keep, mean


# ---- training


def rounded(W):
    """W with its banks on their minifloat levels, straight through for gradients; scales by the largest weight."""

    def near(n):
        w, g = W[n], levels(Config.fmt_mlp if n in ("up", "dn") else Config.fmt_att, W[n].device)
        with torch.no_grad():
            s = w.abs().amax(1, keepdim=True).clamp(min=1e-8) * 0.85
            d = snap(w, s, g)[1] - w
        return w + d

    return W | {n: near(n) for n in MATS}


def factor(step, t):
    """Learning-rate factor: a short ramp, then flat, then down to 0 by the clock."""
    end = Config.train_s - Config.tail_s
    rate = t / max(step, 1)
    total = min(Config.steps, end / rate) if step > 10 else Config.steps
    left = max(total - step, 0) / max(total * Config.down, 1)
    return min(1.0, (step + 1) / Config.ramp, left)


def momentum(step):
    a = min(step / Config.mom_steps, 1)
    return (1 - a) * Config.mom0 + a * Config.mom


def train(W, rank, world, dev, say, lut):
    """Trains in place until the clock or the last step; returns (averaged weights, its clock)."""
    small = [n for n in W if n not in MATS]
    rates = {n: Config.lr_emb if n == "emb" else Config.lr_vec for n in small}
    feed = batches(shards("train"), rank, world, dev)
    parts = max(1, Config.batch // world // Config.micro)
    for w in W.values():
        w.requires_grad_(True)

    def once(T, push, qat=False, ahead=0.0):
        R, l = rounded(W) if qat else W, 0.0
        for i in range(parts):
            k = loss(R, *feed(T), ahead) / parts
            k.backward(retain_graph=qat and i + 1 < parts)
            l = l + k.detach()
        if W["far"].grad is None:
            W["far"].grad = torch.zeros_like(W["far"])
        push()
        return l

    def fresh():
        m, mine = muon(W, rank, world)
        a = adam(W, small, rates, (Config.b1, Config.b2))

        def push(f, mom):
            clipped(W, small, Config.clip)
            m(Config.lr_mat * f, mom)
            a(f, world)

        return push, mine

    # the compiler's steps, before the clock: weights and optimisers are thrown away afterwards, as are the batches
    kept = {n: w.detach().clone() for n, w in W.items()}
    push, _ = fresh()
    for i in range(Config.warmup):
        once(Config.seq // (1 + i % 2), lambda: push(1.0, Config.mom), i % 4 > 1, Config.ahead * (i % 3 > 0))
    with torch.no_grad():
        for n, w in W.items():
            w.copy_(kept[n])
    push, mine = fresh()
    feed = batches(shards("train"), rank, world, dev)
    say(f"warmup {Config.warmup} steps, rank 0 owns layers {mine.start}..{mine.stop - 1}")

    keep, mean = averages(W)
    barrier()
    now, off = stopwatch()
    end = Config.train_s - Config.tail_s
    step, t, f = 0, 0.0, 1.0
    while step < Config.steps:
        t = same(now(), dev)
        if t >= end:
            say(f"clock: {t:.1f}s of {end:.1f}s, stop at step {step}")
            break
        f = factor(step, t)
        T = Config.seq // 2 if t < Config.short * end else Config.seq
        aux = Config.ahead * max(0.0, 1 - t / (Config.ahead_until * end))
        l = once(T, lambda: push(f, momentum(step)), f < Config.qat and step > 100, aux)
        keep(step, f)
        step += 1
        if step % Config.log_every == 0 or step <= 5:
            l = summed(l) / world
            say(f"step {step} loss {l.item():.4f} lr x{f:.3f} {t:.1f}s {1e3 * t / step:.1f}ms/step")
        if Config.val_every and step % Config.val_every == 0:
            with off():
                n, b = plain(W, held(dev), rank, world, lut)
                say(f"step {step} val_loss {n:.4f} val_bpb {b:.4f} (logged only, clock stopped)")
    A, n_a = mean()
    A.pop("far")  # served its purpose
    if Config.keep and rank == 0:
        torch.save({n: w.cpu() for n, w in A.items()}, Config.keep)
    say(f"trained {step} steps in {t:.1f}s; average of ema {Config.ema} and {n_a} snapshots")
    say(f"peak memory {torch.cuda.max_memory_allocated() >> 20} MiB")
    for w in W.values():
        w.requires_grad_(False)
        w.grad = None
    return A, now


# ---- minifloats: a sign, e exponent bits, m mantissa bits, one scale per output


@lru_cache(maxsize=None)
def levels(fmt, dev):
    """The values of a minifloat in order, subnormals included, the largest 1."""
    e, m = (int(s) for s in fmt.split(","))
    p = [2 * f / 2**m if x == 0 else (1 + f / 2**m) * 2**x for x in range(2**e) for f in range(2**m)]
    top = max(p)
    return torch.tensor(sorted({s * v / top for v in p for s in (-1, 1)}), device=dev)


def snap(w, s, g):
    """(codes, values) of w on the levels g times the scales s."""
    c = torch.bucketize((w / s).contiguous(), (g[1:] + g[:-1]) / 2)
    return c, g[c] * s


def scales(w, g, h):
    """Per output (column) the scale with the least squared error, weighted by the inputs' power h."""
    top = w.abs().amax(0).clamp(min=1e-8)
    tries = [(k * top).half().float().clamp(min=6e-8) for k in torch.linspace(0.6, 1.0, 17).tolist()]
    errs = torch.stack([((snap(w, s, g)[1] - w).square() * h[:, None]).sum(0) for s in tries])
    return torch.stack(tries).gather(0, errs.argmin(0)[None])[0]


def powers(W, files, rank, world, dev):
    """Hessians X^T X of every matrix's input, by (name, layer), from training tokens; ranks take turns and are summed."""
    L, D, H, K, d, M = sizes()
    wide = dict(q=D, o=H * d, up=D, dn=M)
    P = {(n, l): torch.zeros(k, k, device=dev) for n, k in wide.items() for l in range(L)}

    def tap(n, l, x):
        x = x.reshape(-1, x.size(-1)).float()
        P[n, l].addmm_(x.mT, x)

    T = Config.seq
    feed = stream(files, rank, world, T)
    with torch.no_grad():
        for _ in range(-(-Config.cal_seqs // world)):
            x = next(feed)[:-1].to(dev).long().view(1, T)
            hidden(W, x, tap)
    for p in P.values():
        summed(p)
    return {(n, l): P["q" if n in "kv" else n, l] for n in MATS for l in range(L)}


def gptq(w, h, g):
    """Codes and scales of w [in, out]: inputs one by one, each one's error handed on to those not yet rounded."""
    n = w.size(0)
    w, h = w.clone(), h.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[dead] = 0
    s = scales(w, g, h.diagonal())
    order = h.diagonal().argsort(descending=True)
    w, h = w[order], h[order][:, order]
    h.diagonal().add_(Config.damp * h.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    code = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for a in range(0, n, Config.block):
        b = min(a + Config.block, n)
        E = torch.zeros(b - a, w.size(1), device=w.device)
        for i in range(a, b):
            c, v = snap(w[i], s, g)
            code[i] = c.to(torch.uint8)
            E[i - a] = (w[i] - v) / U[i, i]
            w[i:b] -= U[i, i:b, None] * E[i - a]
        w[b:] -= U[a:b, b:].mT @ E
    return code[order.argsort()], s


def quantised(W, P, rank, world, dev):
    """Codes, scales and halves by name. Matrices are dealt out to the ranks, then every rank gets all of them."""
    grid = {n: levels(Config.fmt_mlp if n in ("up", "dn") else Config.fmt_att, dev) for n in MATS}
    jobs = [(n, l) for n in MATS for l in range(Config.layers)]
    done = {}
    for i, (n, l) in enumerate(jobs):
        if i % world == rank:
            c, s = gptq(W[n][l], P[n, l], grid[n])
            done[n, l] = c, s.half()
    for i, (n, l) in enumerate(jobs):
        c, s = done.get((n, l)) or (
            torch.empty(W[n][l].shape, dtype=torch.uint8, device=dev),
            torch.empty(W[n].size(-1), dtype=torch.half, device=dev),
        )
        if world > 1:
            dist.broadcast(c, i % world)
            dist.broadcast(s, i % world)
        done[n, l] = c, s
    Q = {}
    for n in MATS:
        Q[n + ".c"], Q[n + ".s"] = (torch.stack([done[n, l][j] for l in range(Config.layers)]) for j in (0, 1))
    w = W["emb"].mT
    g = levels(Config.fmt_emb, dev)
    s = scales(w, g, torch.ones(w.size(0), device=dev))
    Q["emb.c"], Q["emb.s"] = snap(w, s, g)[0].to(torch.uint8), s.half()
    Q |= {n: W[n].half() for n in W if n not in MATS and n != "emb"}
    return Q


# ---- rANS: order-0 coding of a matrix of codes, one coder per column, all columns in step


def counted(syms):
    """Frequencies of 0..255 that sum to 4096, none of those that occur being 0."""
    n = np.bincount(syms.reshape(-1), minlength=256)
    f = np.where(n > 0, np.maximum(n * 4096 // n.sum(), 1), 0)
    while d := 4096 - int(f.sum()):
        i = int(f.argmax())
        f[i] += d if d > 0 else -min(-d, int(f[i]) // 2)
    return f.astype(np.uint16)


def squeeze(syms):
    """Bytes of a uint8 matrix [n, lanes]: frequencies, final states, words in the order in which they are read."""
    f = counted(syms)
    F_, C_ = f.astype(np.uint64), np.concatenate([[0], np.cumsum(f[:-1])]).astype(np.uint64)
    x = np.full(syms.shape[1], 1 << 16, np.uint64)
    words = []
    for s in syms[::-1]:
        a, c = F_[s], C_[s]
        full = x >= a << np.uint64(20)
        words.append(x[full].astype(np.uint16))
        x = np.where(full, x >> np.uint64(16), x)
        x = (x // a << np.uint64(12)) + x % a + c
    return f.tobytes() + x.astype(np.uint32).tobytes() + np.concatenate(words[::-1]).tobytes()


def unsqueeze(raw, n, lanes):
    """The inverse of squeeze."""
    f = np.frombuffer(raw, np.uint16, 256)
    x = np.frombuffer(raw, np.uint32, lanes, 512).astype(np.uint64)
    w = np.frombuffer(raw, np.uint16, offset=512 + 4 * lanes)
    F_, C_ = f.astype(np.uint64), np.concatenate([[0], np.cumsum(f[:-1])]).astype(np.uint64)
    which = np.repeat(np.arange(256, dtype=np.uint8), f)
    out, at = np.empty((n, lanes), np.uint8), 0
    for i in range(n):
        slot = x & np.uint64(4095)
        s = out[i] = which[slot]
        x = F_[s] * (x >> np.uint64(12)) + slot - C_[s]
        low = x < 1 << 16
        k = int(low.sum())
        x[low] = x[low] << np.uint64(16) | w[at : at + k].astype(np.uint64)
        at += k
    return out


# ---- the packed file: a head in JSON, the codes by rANS layer by layer, the rest as halves under LZMA


def packed(Q):
    """Bytes of a dict of uint8 codes [.., in, out] and half tensors."""
    arrs = {n: q.contiguous().cpu().numpy() for n, q in Q.items()}
    codes, rest = ([n for n in sorted(arrs) if n.endswith(".c") == k] for k in (True, False))
    parts = {n: [squeeze(a) for a in arrs[n].reshape(-1, *arrs[n].shape[-2:])] for n in codes}
    head = dict(
        codes=[[n, list(arrs[n].shape), [len(p) for p in parts[n]]] for n in codes],
        rest=[[n, list(arrs[n].shape)] for n in rest],
    )
    tail = b"".join(arrs[n].astype("<f2").tobytes() for n in rest)
    # halves: all low bytes, then all high ones
    tail = lzma.compress(tail[0::2] + tail[1::2], preset=9 | lzma.PRESET_EXTREME)
    head = lzma.compress(json.dumps(head, separators=(",", ":")).encode())
    return b"".join([struct.pack("<II", len(head), len(tail)), head, tail, *(p for n in codes for p in parts[n])])


def unpacked(raw, dev):
    """The inverse of packed."""
    h, t = struct.unpack_from("<II", raw)
    head, at = json.loads(lzma.decompress(raw[8 : 8 + h])), 8 + h + t
    tail = np.frombuffer(lzma.decompress(raw[8 + h : at]), np.uint8)
    halves, i, Q = np.ascontiguousarray(tail.reshape(2, -1).T).view("<f2").reshape(-1), 0, {}
    for n, shape in head["rest"]:
        k = math.prod(shape)
        Q[n] = torch.from_numpy(halves[i : i + k].reshape(shape).copy()).to(dev)
        i += k
    for n, shape, lens in head["codes"]:
        mats = []
        for k in lens:
            mats.append(unsqueeze(raw[at : at + k], *shape[-2:]))
            at += k
        Q[n] = torch.from_numpy(np.stack(mats).reshape(shape)).to(dev)
    return Q


def restored(Q, dev):
    """Weights in fp32 from codes, scales and halves."""
    grid = {n: levels(Config.fmt_mlp if n in ("up", "dn") else Config.fmt_att, dev) for n in MATS}
    W = {n: grid[n][Q[n + ".c"].long()] * Q[n + ".s"].float()[:, None] for n in MATS}
    W["emb"] = (levels(Config.fmt_emb, dev)[Q["emb.c"].long()] * Q["emb.s"].float()).mT.contiguous()
    W |= {n: q.float() for n, q in Q.items() if "." not in n}
    return {n: w.contiguous() for n, w in W.items()}


@torch.no_grad()
def temperature(W, files, rank, world, dev):
    """The divisor of the logits that suits the rounded weights, by tokens of the last training shard."""
    tries = [0.90 + 0.01 * i for i in range(21)]
    sums = torch.zeros(len(tries), dtype=torch.float64, device=dev)
    feed = stream(files[::-1], rank, world, Config.seq)
    for _ in range(-(-Config.temp_seqs // world)):
        s = next(feed).to(dev).long()
        z = logits(W, hidden(W, s[None, :-1]))[0]
        sums += torch.stack([F.cross_entropy(z / t, s[1:]).double() for t in tries])
    return tries[int(summed(sums).argmin())]


def pack(W, rank, world, dev, say, now):
    """Calibrates, quantises, writes and weighs the model, all of it on the training clock."""
    t = now()
    P = powers(W, shards("train"), rank, world, dev)
    say(f"hessians of {Config.cal_seqs} training sequences {now() - t:.1f}s")
    t = now()
    Q = quantised(W, P, rank, world, dev)
    say(f"gptq {now() - t:.1f}s")
    t = now()
    temp = temperature(restored(Q, dev), shards("train"), rank, world, dev)
    Q["temp"] = torch.tensor([temp], device=dev).half()
    say(f"temperature {temp:.2f} by training tokens {now() - t:.1f}s")
    t = now()
    if rank == 0:
        raw = packed(Q)
        back = unpacked(raw, dev)
        if back.keys() != Q.keys() or not all(torch.equal(back[n], Q[n]) for n in Q):
            raise RuntimeError("the packed model does not read back")
        Path(Config.out).write_bytes(raw)
        code = len(Path(__file__).read_bytes())
        total = code + len(raw)
        bits = 8 * len(raw) / sum(w.numel() for w in W.values())
        say(f"code {code} bytes, model {len(raw)} bytes ({bits:.2f} bits a weight)")
        say(f"sha256 code {digest(__file__)} model {digest(Config.out)}")
        say(f"total submission size {total} bytes of {Config.limit}")
        if total > Config.limit:
            raise SystemExit(f"{total - Config.limit} bytes too many")
    barrier()
    say(f"packing {now() - t:.1f}s, training clock at the end {now():.1f}s of {Config.train_s:.0f}s")
    if now() > Config.train_s:
        say("WARNING: over the training cap, this run does not count")


# ---- evaluation


def windows(a, b, step):
    """Spans [s, e) that part the targets [a, b): each target lies in exactly one."""
    return [(s, min(s + step, b)) for s in range(a, b, step)]


def dealt(spans, rank, world, B):
    """This rank's spans in batches of B, the last one filled up with spans of nothing, so that the shape never changes."""
    mine = spans[rank::world]
    mine = mine + [(1, 1)] * (-len(mine) % B)
    return [mine[i : i + B] for i in range(0, len(mine), B)]


def view(tok, spans):
    """(x, y, m) [B, T]: windows that end with their span, m true where the span's own targets are."""
    T, N = Config.seq, tok.numel()
    s, e = torch.tensor(spans, device=tok.device).T[..., None]
    at = (e - 1 - T).clamp(min=0) + torch.arange(T, device=tok.device)
    x, y = tok[at.clamp(max=N - 2)], tok[(at + 1).clamp(max=N - 1)]
    return x, y, (at + 1 >= s) & (at + 1 < e)


def verdict(acc, want):
    """(nats per token, bits per byte) of summed (nats, tokens, bytes); every target must be there once."""
    nats, n, size = summed(acc).tolist()
    if int(n) != want:
        raise RuntimeError(f"{int(n)} tokens scored, {want} expected")
    return nats / n, nats / math.log(2) / size


@torch.no_grad()
def plain(W, tok, rank, world, lut):
    """The net alone on windows that do not overlap; only logged."""
    acc = torch.zeros(3, dtype=torch.float64, device=tok.device)
    for spans in dealt(windows(1, tok.numel(), Config.seq), rank, world, Config.ev_batch // 2):
        x, y, m = view(tok, spans)
        l = F.cross_entropy(logits(W, fast(W, x))[m], y[m], reduction="none").double()
        acc += torch.stack([l.sum(), m.sum().double(), weigh(lut, x[m], y[m]).sum()])
    return verdict(acc, tok.numel() - 1)


def counter(dev):
    """Counts of what was scored: rows(prev) gives whole distributions [n, V] and weights [n, 1], add(tokens) counts.

    The bigram's row is smoothed by the unigram, the unigram by one of each; both sum to 1 over the vocabulary by
    construction. The weight knows how often prev was seen and nothing else.
    """
    V = Config.vocab
    one = torch.zeros(V, device=dev)
    two = torch.zeros(V, V, device=dev)

    def rows(prev):
        u = (one + 1) / (one.sum() + V)
        c = two[prev]
        n = c.sum(-1, keepdim=True)
        q = (c + Config.c_back * u) / (n + Config.c_back)
        return q, Config.c_max * n / (n + Config.c_half)

    def add(t):
        one.add_(torch.bincount(t[1:], minlength=V))
        two.view(-1).add_(torch.bincount(t[:-1] * V + t[1:], minlength=V * V))

    return rows, add


def buckets(dev):
    """see(prev, nats), add(tokens), text(): mean nats by how common the token before is (logged, nothing hangs on it)."""
    sums = torch.zeros(6, 2, dtype=torch.float64, device=dev)
    n = torch.zeros(Config.vocab, device=dev)

    def see(prev, l):
        b = (n[prev] + 1).log10().long().clamp(max=5)
        sums[:, 0].index_add_(0, b, l)
        sums[:, 1].index_add_(0, b, torch.ones_like(l))

    def add(t):
        n.add_(torch.bincount(t[1:], minlength=Config.vocab))

    def text():
        s = summed(sums.clone()).tolist()
        return ", ".join(f"1e{i}: {a / max(k, 1):.3f} ({int(k)})" for i, (a, k) in enumerate(s))

    return see, add, text


def mixture(z, prev, rows):
    """The distribution over the vocabulary that is scored: the net's and, where wanted, the counts'."""
    p = torch.softmax(z, -1)
    if rows:
        q, w = rows(prev)
        p = (1 - w) * p + w * q
    return p


def learner(W, rank, world):
    """(weights with biases of their own, learn(part, f)): Adam on the biases over tokens whose losses are fixed."""
    Z = {n: w.clone().requires_grad_(n in TUNED) if n in TUNED else w for n, w in W.items()}
    step = adam(Z, TUNED, {n: Config.ttt_lr for n in TUNED}, (0.9, 0.99))

    def learn(part, f):
        T, B = Config.seq, Config.ttt_batch
        n = (part.numel() - 1) // T
        X, Y = (part[i : i + n * T].view(n, T) for i in (0, 1))
        for _ in range(Config.ttt_epochs):
            for i in range(0, n, world * B):
                ids = (torch.arange(B, device=part.device) + i + rank * B) % n
                loss(Z, X[ids], Y[ids]).backward()
                step(f, world)

    return Z, learn


def versions(Z):
    """How often each bias was written to: must not move while a chunk is being scored."""
    return tuple(Z[n]._version for n in TUNED)


def score(W, tok, rank, world, lut, say, now):
    """The score: chunk by chunk, first every target's loss, then what may be learnt from the chunk.

    Within a chunk the ranks share the windows; counts and biases are those of the chunks before, the same on all ranks.
    """
    N, dev = tok.numel(), tok.device
    acc = torch.zeros(3, dtype=torch.float64, device=dev)
    rows, add = counter(dev) if Config.cache else (None, lambda t: None)
    Z, learn = learner(W, rank, world) if Config.ttt else (W, None)
    see, note, text = buckets(dev)
    spans = windows(1, N, Config.chunk)
    tenth = max(len(spans) // 10, 1)
    for c, (a, b) in enumerate(spans):
        state = versions(Z)
        with torch.no_grad():
            for part in dealt(windows(a, b, Config.stride), rank, world, Config.ev_batch):
                x, y, m = view(tok, part)
                prev, gold = x[m], y[m]
                p = mixture(logits(Z, fast(Z, x)[m]) / Z["temp"], prev, rows)
                l = -p.gather(1, gold[:, None])[:, 0].double().log()
                acc += torch.stack([l.sum(), m.sum().double(), weigh(lut, prev, gold).sum()])
                see(prev, l)
        if versions(Z) != state:
            raise RuntimeError("a bias moved while its chunk was scored")
        # the chunk's losses are fixed: now it may be counted and learnt from
        add(tok[a - 1 : b])
        note(tok[a - 1 : b])
        if learn and c + 1 < len(spans):
            if same(now(), dev) < Config.eval_s - Config.eval_tail:
                learn(tok[a - 1 : b], 0.5 + 0.5 * math.cos(math.pi * c / len(spans)))
            else:
                say(f"chunk {c}: {now():.0f}s, no more learning")
                learn = None
        if (c + 1) % tenth == 0:
            n, k, s = summed(acc.clone()).tolist()
            say(f"chunk {c + 1}/{len(spans)} {int(k)} tokens, bpb so far {n / math.log(2) / s:.4f}, {now():.0f}s")
    say(f"nats by count of the token before: {text()}")
    return verdict(acc, N - 1)


# ---- checks on random tokens, before anything is scored


@torch.no_grad()
def probe(W, dev, say):
    """Later tokens must not matter, sums must be 1, spans must part the targets."""
    g = torch.Generator().manual_seed(7)
    T, V, t = Config.seq, Config.vocab, Config.seq // 3
    x = torch.randint(V, (Config.ev_batch, T), generator=g)
    y = x.clone()
    y[:, t + 1 :] = torch.randint(V, (Config.ev_batch, T - t - 1), generator=g)
    a, b = (logits(W, fast(W, s.to(dev))[:, : t + 1]) for s in (x, y))
    gap = (a - b).abs().max().item()
    rows, add = counter(dev)
    add(x.to(dev).flatten())
    p = mixture(a[:, t], x[:, t].to(dev), rows)
    off = (p.double().sum(-1) - 1).abs().max().item()
    cover = [i for s, e in windows(1, 1000, 64) for i in range(s, e)]
    say(f"probe: change by later tokens {gap:.2e}, sums off by {off:.2e}")
    if gap > 1e-2 or off > 1e-4 or cover != list(range(1, 1000)):
        raise RuntimeError("probe failed")


# ---- all of it

if __name__ == "__main__":
    rank, world, dev = ranks()
    say = logger(rank)
    random.seed(Config.seed)
    np.random.seed(Config.seed)
    torch.manual_seed(Config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    torch.set_float32_matmul_precision("high")

    say(Path(__file__).read_text(encoding="utf-8"), echo=False)
    say(f"python {sys.version.split()[0]} torch {torch.__version__} world {world}")
    say(json.dumps(vars(Config)))
    lut = tables(dev)
    if rank == 0:
        survey(say)
    W = init(dev)
    say(f"{sum(w.numel() for w in W.values())} weights, " + ", ".join(f"{n} {tuple(w.shape)}" for n, w in W.items()))

    for line in census(W):
        say(line, echo=False)

    if not Config.eval_only:
        A, now = train(W, rank, world, dev, say, lut)
        pack(A, rank, world, dev, say, now)
        del A
    del W
    torch.cuda.empty_cache()

    # the evaluation's clock: reading the packed model is on it
    barrier()
    now, _ = stopwatch()
    W = restored(unpacked(Path(Config.out).read_bytes(), dev), dev)
    tok = held(dev)
    say(f"{tok.numel()} validation tokens in {len(shards('val'))} files")
    if Config.probe:
        probe(W, dev, say)
    n, b = plain(W, tok, rank, world, lut)
    say(f"round trip: val_loss {n:.4f} val_bpb {b:.4f} {now():.1f}s (net alone, no overlap)")
    n, b = score(W, tok, rank, world, lut, say, now)
    say(f"evaluation took {now():.1f}s of {Config.eval_s:.0f}s")
    say(f"final val_loss {n:.8f} val_bpb {b:.8f}")
    if dist.is_initialized():
        dist.destroy_process_group()
