# flint - 10L x 512, sp1024, int6 columns with feedback, lzma. torchrun --standalone --nproc_per_node=8 train_gpt.py
# knobs: every key of O may be set as FL_<KEY> in the environment.
import glob
import io
import itertools
import json
import lzma
import math
import os
import random
import struct
import sys
import time

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F

O = dict(
    seed=1337,
    run="flint",
    data="./data/datasets/fineweb10B_sp1024",
    spm="./data/tokenizers/fineweb_1024_bpe.model",
    # net
    vocab=1024,
    d=512,
    depth=10,
    heads=8,
    kv=4,
    ff=1536,
    rot=16,
    base=10000.0,
    cap=30.0,
    gram=3072,
    gramd=96,
    # schedule
    T=2048,
    batch=786432,
    iters=20000,
    clock=600.0,
    keep=11.0,
    down=3400,
    floor=0.05,
    lr_m=0.024,
    lr_e=0.034,
    lr_s=0.022,
    wd=0.045,
    mu0=0.92,
    mu1=0.985,
    mu_steps=1400,
    clip=0.35,
    ema=0.997,
    warm=16,
    every=1000,
    say=200,
    # storage
    bits=6,
    ebits=8,
    damp=0.01,
    calib=192,
    blk=128,
    prune=0.03,
    lim=16000000,
    # evaluation
    S=64,
    eb=32,
    K=32768,
    ep=3,
    lr_t=0.002,
    mom=0.9,
    clip_t=1.0,
    freeze=2,
    hint=1,
    hint_n=12,
    hint_min=3,
    hint_conf=0.7,
    hint_b=2.0,
    eclock=600.0,
)
for _k, _v in list(O.items()):
    _e = os.environ.get("FL_" + _k.upper())
    if _e is not None:
        O[_k] = type(_v)(_e)

RANK, WORLD, LOCAL = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
dev = torch.device("cuda", LOCAL)
torch.cuda.set_device(dev)
if WORLD > 1:
    dist.init_process_group("nccl", device_id=dev)
torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.allow_tf32 = True
random.seed(O["seed"])
np.random.seed(O["seed"])
torch.manual_seed(O["seed"])
torch.cuda.manual_seed_all(O["seed"])

LOGF = f"logs/{O['run']}_{O['seed']}.txt"
if RANK == 0:
    os.makedirs("logs", exist_ok=True)
    open(LOGF, "w").close()


def say(*a):
    if RANK:
        return
    s = " ".join(str(x) for x in a)
    print(s, flush=True)
    with open(LOGF, "a") as f:
        f.write(s + "\n")


def red(t, op="sum"):
    if WORLD > 1:
        dist.all_reduce(t, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "avg": dist.ReduceOp.AVG}[op])
    return t


def fence():
    torch.cuda.synchronize()
    if WORLD > 1:
        dist.barrier()


# ------------------------------------------------------------------ tokens
def shard(p):
    h = np.fromfile(p, dtype="<i4", count=256)
    assert h[0] == 20240520 and h[1] == 1, p
    n = int(h[2])
    assert os.path.getsize(p) == 1024 + 2 * n, p
    return np.memmap(p, dtype="<u2", mode="r", offset=1024, shape=(n,))


def names(split):
    fs = sorted(glob.glob(os.path.join(O["data"], f"fineweb_{split}_*.bin")))
    assert fs, f"no {split} shards under {O['data']}"
    return fs


TRAIN = names("train")
HELD = names("val")


def whole(fs):
    return torch.from_numpy(np.concatenate([np.asarray(shard(f)) for f in fs]).astype(np.int32))


def hop(n, rng):
    while True:
        s = rng.randrange(1, n)
        if math.gcd(s, n) == 1:
            return s


def feeder(files, T, rows, seed):
    """Endless (x, y) of `rows` rows for this rank: per shard a phase, a start and a stride coprime to its block count."""
    rng = random.Random(seed)
    maps = [shard(f) for f in files]

    def lane(m):
        ph = rng.randrange(T)
        n = (len(m) - 1 - ph) // T
        at, st = rng.randrange(n), hop(n, rng)
        for i in itertools.count():
            b = ph + ((at + i * st) % n) * T
            yield m[b : b + T + 1]

    lanes = [lane(m) for m in maps]
    buf = torch.empty(rows, T + 1, dtype=torch.int64).pin_memory()
    for turn in itertools.count():
        pick = [lanes[(turn * rows * WORLD + j) % len(lanes)] for j in range(rows * WORLD)]
        for j, ln in enumerate(pick):
            row = next(ln)
            if j % WORLD == RANK:
                buf[j // WORLD].copy_(torch.from_numpy(row.astype(np.int64)))
        g = buf.to(dev, non_blocking=True)
        yield g[:, :-1].contiguous(), g[:, 1:].contiguous()


# ------------------------------------------------------------------ what a token weighs
SP = spm.SentencePieceProcessor(model_file=O["spm"])
assert SP.vocab_size() == O["vocab"]


def weights_of_tokens():
    n = O["vocab"]
    w, lead, edge = np.zeros(n, np.int64), np.zeros(n, bool), np.ones(n, bool)
    for t in range(n):
        if SP.is_control(t) or SP.is_unknown(t) or SP.is_unused(t):
            continue
        edge[t] = False
        if SP.is_byte(t):
            w[t] = 1
            continue
        s = SP.id_to_piece(t)
        if s[:1] == "\u2581":
            lead[t], s = True, s[1:]
        w[t] = len(s.encode("utf-8"))
    return tuple(torch.from_numpy(a).to(dev) for a in (w, lead, edge))


TB, LEAD, EDGE = weights_of_tokens()


def heft(prev, tgt):
    return TB[tgt] + (LEAD[tgt] & ~EDGE[prev]).to(torch.int64)


# ------------------------------------------------------------------ the net: a dict of tensors and one function
P = {}
TAP = None
MATS, TABS, VECS = [], [], []


def mat(k, o, i, zero=False):
    w = torch.zeros(o, i) if zero else torch.empty(o, i)
    if not zero:
        torch.nn.init.orthogonal_(w)
    P[k] = w
    MATS.append(k)


def vec(k, v):
    P[k] = v.float()
    VECS.append(k)


def build():
    d, h, kv = O["d"], O["heads"], O["kv"]
    hd = d // h
    P["wte"] = torch.randn(O["vocab"], d) * 0.006
    P["big"] = torch.zeros(O["gram"], O["gramd"])
    TABS.extend(("wte", "big"))
    mat("bigp", d, O["gramd"])
    vec("bigs", torch.tensor(0.05))
    for i in range(O["depth"]):
        mat(f"{i}.q", d, d)
        mat(f"{i}.k", kv * hd, d)
        mat(f"{i}.v", kv * hd, d)
        mat(f"{i}.o", d, d, zero=True)
        mat(f"{i}.u", O["ff"], d)
        mat(f"{i}.w", d, O["ff"], zero=True)
        vec(f"{i}.mix", torch.stack([torch.ones(d), torch.zeros(d)]))
        vec(f"{i}.ga", torch.ones(d))
        vec(f"{i}.gm", torch.ones(d))
        vec(f"{i}.gain", torch.full((h,), 1.5))
        vec(f"{i}.vr", torch.tensor(0.0))
    for j in range(O["depth"] // 2):
        vec(f"skip{j}", torch.ones(d))
    for k in list(P):
        P[k] = P[k].to(dev).requires_grad_(True)
    if WORLD > 1:
        for k in P:
            dist.broadcast(P[k].data, 0)


build()


def lin(x, k):
    if TAP is not None and k in TAP:
        z = x.detach().reshape(-1, x.shape[-1]).float()
        TAP[k].addmm_(z.t(), z)
    return F.linear(x, P[k].to(x.dtype))


def nrm(x):
    return F.rms_norm(x, (x.shape[-1],))


_ANG = {}


def angles(T):
    if T not in _ANG:
        r = O["rot"]
        b = O["base"] * (max(T, 1024) / 1024) ** (r / (r - 2))
        f = b ** (-torch.arange(0, r, 2, device=dev).float() / r)
        a = torch.arange(T, device=dev).float()[:, None] * f[None]
        _ANG[T] = (a.cos()[None, :, None], a.sin()[None, :, None])
    return _ANG[T]


def spin(x, cs):
    r = O["rot"]
    c, s = (z.to(x.dtype) for z in cs)
    a, b = x[..., : r // 2], x[..., r // 2 : r]
    return torch.cat((a * c + b * s, b * c - a * s, x[..., r:]), -1)


def attend(x, i, v0, cs):
    B, T, d = x.shape
    h, kv = O["heads"], O["kv"]
    hd = d // h
    q = nrm(lin(x, f"{i}.q").view(B, T, h, hd))
    k = nrm(lin(x, f"{i}.k").view(B, T, kv, hd))
    v = lin(x, f"{i}.v").view(B, T, kv, hd)
    if v0 is not None:
        v = v + torch.sigmoid(P[f"{i}.vr"]).to(v.dtype) * v0
    q, k = spin(q, cs) * P[f"{i}.gain"].to(q.dtype)[None, None, :, None], spin(k, cs)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    u = F.normalize(v, dim=-1)[:, :, :, None]
    y = y.reshape(B, T, kv, h // kv, hd)
    y = y - (y * u).sum(-1, keepdim=True) * u
    return lin(y.reshape(B, T, d), f"{i}.o"), v


def block(x, x0, i, v0, cs):
    m = P[f"{i}.mix"].to(x.dtype)
    x = m[0] * x + m[1] * x0
    s = (i + 1) ** -0.5
    a, v = attend(s * nrm(x), i, v0, cs)
    x = x + P[f"{i}.ga"].to(x.dtype) * a
    z = F.leaky_relu(lin(s * nrm(x), f"{i}.u"), 0.5).square()
    return x + P[f"{i}.gm"].to(x.dtype) * lin(z, f"{i}.w"), v


def pairs(ids):
    n = O["gram"] - 1
    j = torch.full_like(ids, n)
    j[:, 1:] = torch.bitwise_xor(ids[:, 1:] * 40503, ids[:, :-1] * 30011) % n
    return j


def trunk(ids):
    bf = torch.bfloat16
    x = P["wte"].to(bf)[ids] + P["bigs"].to(bf) * lin(P["big"].to(bf)[pairs(ids)], "bigp")
    x = x0 = nrm(x)
    cs = angles(ids.shape[1])
    v0, st, half = None, [], O["depth"] // 2
    for i in range(O["depth"]):
        if i >= half and st:
            x = x + P[f"skip{len(st) - 1}"].to(bf) * st.pop()
        x, v = block(x, x0, i, v0, cs)
        v0 = v if i == 0 else v0
        if i < half:
            st.append(x)
    return nrm(x)


def head(x):
    z = F.linear(x, P["wte"].to(x.dtype)).float()
    return O["cap"] * torch.tanh(z / O["cap"])


def ce(ids, tgt):
    return F.cross_entropy(head(trunk(ids)).flatten(0, 1), tgt.flatten())


ce_fast = torch.compile(ce, dynamic=False)
logits_fast = torch.compile(lambda ids: head(trunk(ids)), dynamic=False)


# ------------------------------------------------------------------ optimiser: one closure over the dict
ABC = ((4.05, -6.61, 3.46), (3.99, -6.40, 3.32), (3.54, -5.11, 2.51), (2.86, -3.62, 1.75), (2.18, -2.20, 1.02))


def polar(g):
    x = g.bfloat16()
    flip = x.shape[0] > x.shape[1]
    x = x.t() if flip else x
    x = x / (x.norm() + 1e-7)
    for a, b, c in ABC:
        m = x @ x.t()
        x = a * x + (b * m + c * m @ m) @ x
    return x.t() if flip else x


def make_step():
    mom = {k: torch.zeros_like(P[k]) for k in MATS}
    m1 = {k: torch.zeros_like(P[k]) for k in TABS + VECS}
    m2 = {k: torch.zeros_like(P[k]) for k in TABS + VECS}
    n = [0]

    def muon(scale, mu):
        flat = torch.zeros(sum(P[k].numel() for k in MATS), device=dev, dtype=torch.bfloat16)
        at, cut = 0, {}
        for j, k in enumerate(MATS):
            w = P[k]
            cut[k] = flat[at : at + w.numel()].view_as(w)
            at += w.numel()
            mom[k].mul_(mu).add_(w.grad)
            if j % WORLD == RANK:
                u = w.grad.add(mom[k], alpha=mu)
                u = u / u.norm(dim=1, keepdim=True).clamp_min(1e-7)
                cut[k].copy_(polar(u) * max(1.0, w.shape[0] / w.shape[1]) ** 0.5)
        red(flat)
        lr = O["lr_m"] * scale
        for k in MATS:
            P[k].data.mul_(1 - lr * O["wd"]).add_(cut[k].float(), alpha=-lr)

    def adam(scale):
        n[0] += 1
        for k in TABS + VECS:
            w, g = P[k], P[k].grad
            lr = scale * (O["lr_e"] if k in TABS else O["lr_s"])
            m1[k].lerp_(g, 0.1)
            m2[k].lerp_(g * g, 0.05)
            d = (m2[k] / (1 - 0.95 ** n[0])).sqrt_().add_(1e-8)
            w.data.mul_(1 - lr * O["wd"]).addcdiv_(m1[k] / (1 - 0.9 ** n[0]), d, value=-lr)

    def step(scale, mu):
        gs = [P[k].grad for k in P]
        for g in gs:
            red(g, "avg")
        t = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gs]))
        torch._foreach_mul_(gs, (O["clip"] / (t + 1e-6)).clamp(max=1.0))
        muon(scale, mu)
        adam(scale)
        for k in P:
            P[k].grad = None

    def wipe():
        n[0] = 0
        for box in (mom, m1, m2):
            for t in box.values():
                t.zero_()

    return step, wipe


# ------------------------------------------------------------------ the books
def books():
    acc = torch.zeros(3, dtype=torch.float64, device=dev)

    def put(nll, prev, tgt):
        acc[0] += nll.double().sum()
        acc[1] += nll.numel()
        acc[2] += heft(prev, tgt).double().sum()

    def close():
        t = red(acc.clone())
        loss = (t[0] / t[1]).item()
        return loss, (t[0] / math.log(2.0) / t[2]).item(), int(t[1].item()), int(t[2].item())

    return put, close


def plain_loss(V):
    """Validation for the log: rows side by side, no overlap, nothing kept."""
    T = O["T"]
    n = (V.numel() - 1) // T
    put, close = books()
    with torch.inference_mode():
        for a in range(RANK * O["eb"], n, WORLD * O["eb"]):
            b = min(a + O["eb"], n)
            z = V[a * T : b * T + 1].to(dev).long()
            x, y = z[:-1].view(-1, T), z[1:].view(-1, T)
            nll = F.cross_entropy(logits_fast(x).flatten(0, 1), y.flatten(), reduction="none")
            put(nll, x.flatten(), y.flatten())
    return close()


# ------------------------------------------------------------------ training
def pace(el, it):
    left = O["clock"] - O["keep"] - el
    span = O["down"] * el / max(it, 1)
    return 1.0 if it < 10 or left > span else max(left / span, O["floor"])


def train(V):
    T = O["T"]
    rows = O["batch"] // T // WORLD
    step, wipe = make_step()
    start = {k: v.detach().clone() for k, v in P.items()}
    toy = torch.randint(0, O["vocab"], (rows, T + 1), device=dev)
    for i in range(O["warm"]):
        ce_fast(toy[:, :-1].contiguous(), toy[:, 1:].contiguous()).backward()
        step(0.0, O["mu0"])
    for k, v in start.items():
        P[k].data.copy_(v)
    wipe()
    del start, toy
    feed = feeder(TRAIN, T, rows, O["seed"])
    avg = {k: v.detach().clone() for k, v in P.items()}
    fence()
    t0, spent, it, last = time.perf_counter(), 0.0, 0, False
    while True:
        el = spent + time.perf_counter() - t0
        flag = torch.tensor([float(it >= O["iters"] or el >= O["clock"] - O["keep"])], device=dev)
        last = bool(red(flag, "max").item())
        if last or it % O["every"] == 0:
            fence()
            spent += time.perf_counter() - t0
            l, b, _, _ = plain_loss(V)
            say(f"it {it} held {l:.4f} bpb {b:.4f} clock {spent:.1f}s")
            fence()
            t0 = time.perf_counter()
        if last:
            break
        x, y = next(feed)
        loss = ce_fast(x, y)
        loss.backward()
        f = min(it / O["mu_steps"], 1.0)
        step(pace(el, it), O["mu0"] + f * (O["mu1"] - O["mu0"]))
        torch._foreach_lerp_(list(avg.values()), [P[k].data for k in avg], 1 - O["ema"])
        it += 1
        if it % O["say"] == 0:
            el = spent + time.perf_counter() - t0
            say(f"it {it} loss {loss.item():.4f} clock {el:.1f}s {1000 * el / it:.2f}ms/it")
    for k in P:
        P[k].data.copy_(avg[k])
    return it, spent, feed


# ------------------------------------------------------------------ columns to integers
def gauge(feed, spent):
    """Second moments of every matrix's inputs, from the next rows of the training stream, on the training clock."""
    global TAP
    t = time.perf_counter()
    TAP = {k: torch.zeros(P[k].shape[1], P[k].shape[1], device=dev) for k in MATS}
    seen = 0
    with torch.no_grad():
        while seen < O["calib"]:
            x, _ = next(feed)
            for r in x.split(8):
                trunk(r)
                seen += r.shape[0] * WORLD
                if seen >= O["calib"]:
                    break
    H, TAP = TAP, None
    for h in H.values():
        red(h, "avg")
    torch.cuda.synchronize()
    total = spent + time.perf_counter() - t
    say(f"moments: {seen} rows in {time.perf_counter() - t:.1f}s, training clock {total:.1f}s of {O['clock']:.0f}s")
    assert total <= O["clock"], "moments ran past the training clock"
    return H


def rowscale(w, q):
    best, err = None, None
    for p in (0.999, 0.9995, 0.9999, 1.0):
        s = (torch.quantile(w.abs(), p, dim=1) / q).clamp_min(1e-8).half().float()
        e = (w - (w / s[:, None]).round().clamp(-q, q) * s[:, None]).square().sum(1)
        if best is None:
            best, err = s, e
        else:
            best, err = torch.where(e < err, s, best), torch.minimum(e, err)
    return best


def columns(w, H, bits):
    w = w.float().clone()
    q = 2 ** (bits - 1) - 1
    n = w.shape[1]
    dg = H.diagonal()
    dead = dg <= 0
    H = H.clone()
    H.diagonal()[dead] = 1.0
    w[:, dead] = 0
    H.diagonal().add_(O["damp"] * H.diagonal().mean())
    order = torch.argsort(H.diagonal(), descending=True)
    w, H = w[:, order], H[order][:, order]
    s = rowscale(w, q)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    out = torch.zeros_like(w)
    for a in range(0, n, O["blk"]):
        b = min(a + O["blk"], n)
        E = torch.zeros(w.shape[0], b - a, device=w.device)
        for j in range(a, b):
            c = (w[:, j] / s).round().clamp(-q, q)
            out[:, j] = c
            e = (w[:, j] - c * s) / U[j, j]
            w[:, j + 1 : b] -= e[:, None] * U[j, j + 1 : b][None]
            E[:, j - a] = e
        w[:, b:] -= E @ U[a:b, b:]
    back = torch.empty_like(order)
    back[order] = torch.arange(n, device=order.device)
    return out[:, back].to(torch.int8), s.half()


def table(w, bits):
    q = 2 ** (bits - 1) - 1
    s = (w.float().abs().amax(1) / q).clamp_min(1e-8).half()
    return (w.float() / s.float()[:, None]).round().clamp(-q, q).to(torch.int8), s


def thin(w):
    if O["prune"] <= 0:
        return w
    v = w.detach().abs().flatten()
    k = max(1, int(O["prune"] * v.numel()))
    return torch.where(w.abs() <= v.kthvalue(k).values, torch.zeros_like(w), w)


# container: magic, header length, json header, then the raw arrays in the header's order, all through lzma
def pack(H):
    hdr, raw = [], io.BytesIO()

    def put(k, t):
        a = t.detach().cpu().contiguous().numpy()
        hdr.append([k, str(a.dtype), list(a.shape)])
        raw.write(a.tobytes())

    for k in MATS:
        c, s = columns(thin(P[k].data), H[k], O["bits"])
        put(k + "#c", c.t())
        put(k + "#s", s)
    for k in TABS:
        c, s = table(P[k].data, O["ebits"])
        put(k + "#t", c)
        put(k + "#s", s)
    for k in VECS:
        put(k, P[k].data.half())
    j = json.dumps(hdr, separators=(",", ":")).encode()
    body = b"FLNT" + struct.pack("<I", len(j)) + j + raw.getvalue()
    flt = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26, "lc": 2, "lp": 0, "pb": 0}]
    return lzma.compress(body, format=lzma.FORMAT_XZ, filters=flt)


def unpack(blob):
    z = lzma.decompress(blob)
    assert z[:4] == b"FLNT"
    n = struct.unpack("<I", z[4:8])[0]
    hdr, at, got = json.loads(z[8 : 8 + n]), 8 + n, {}
    for k, dt, sh in hdr:
        c = int(np.prod(sh)) * np.dtype(dt).itemsize
        got[k] = torch.from_numpy(np.frombuffer(z, np.dtype(dt), int(np.prod(sh)), at).reshape(sh).copy()).to(dev)
        at += c
    for k in MATS:
        P[k].data.copy_(got[k + "#c"].t().float() * got[k + "#s"].float()[:, None])
    for k in TABS:
        P[k].data.copy_(got[k + "#t"].float() * got[k + "#s"].float()[:, None])
    for k in VECS:
        P[k].data.copy_(got[k].float())


def ship(H):
    path = "flint.bin"
    if RANK == 0:
        blob = pack(H)
        with open(path, "wb") as f:
            f.write(blob)
        code = os.path.getsize(os.path.abspath(__file__))
        say(f"model {len(blob)} bytes")
        say(f"code {code} bytes")
        say(f"sum {len(blob) + code} bytes, limit {O['lim']}")
        assert len(blob) + code <= O["lim"], "too big"
    fence()
    with open(path, "rb") as f:
        unpack(f.read())


# ------------------------------------------------------------------ hints: what the tokens so far say of the next
def hints(V):
    """For every target i (token V[i+1]): the most frequent follower of the last n tokens among V[:i+1], or -1."""
    v = V.numpy()
    n, N = O["hint_n"], len(v) - 1
    out = np.full(N, -1, np.int32)
    seen = {}
    key, M = 0, (1 << 61) - 1
    top = pow(1000003, n, M)
    for i in range(N):
        key = (key * 1000003 + int(v[i]) + 1) % M
        if i >= n:
            key = (key - (int(v[i - n]) + 1) * top) % M
        if i + 1 < n:
            continue
        cell = seen.get(key)
        if cell is None:
            cell = seen[key] = {}
        else:
            tot = cell[-1]
            w = cell[-2]
            if tot >= O["hint_min"] and cell[w] >= O["hint_conf"] * tot:
                out[i] = w
        y = int(v[i + 1])
        cell[y] = cell.get(y, 0) + 1
        cell[-1] = cell.get(-1, 0) + 1
        if cell[y] >= cell.get(cell.get(-2, y), 0):
            cell[-2] = y
    return torch.from_numpy(out)


def lean(z, h):
    """z: [B, T, V] logits; h: [B, T] hinted token or -1. Adds the weight before the softmax, so it stays one."""
    on = (h >= 0).float() * O["hint_b"]
    return z.scatter_add(2, h.clamp_min(0).long()[..., None], on[..., None])


# ------------------------------------------------------------------ windows and chunks
def spans(n):
    """(start, first, end) of each window: targets first..end-1 are its own, and no target has two owners."""
    T, S = O["T"], O["S"]
    yield 0, 0, min(T, n)
    for b in range(T, n, S):
        e = min(b + S, n)
        yield e - T, b, e


def chunked(n):
    K = O["K"]
    box = [[] for _ in range((n + K - 1) // K)]
    for w in spans(n):
        box[w[1] // K].append(w)
    return box


def lot(ws):
    for i in range(0, len(ws), O["eb"]):
        yield ws[i : i + O["eb"]]


def score(V, ws, put, hint=None):
    T = O["T"]
    with torch.inference_mode():
        for g in lot(ws):
            rows = torch.zeros(O["eb"], T + 1, dtype=torch.int64)
            hs = torch.full((O["eb"], T), -1, dtype=torch.int32)
            for r, (s, _, e) in enumerate(g):
                rows[r, : e - s + 1] = V[s : e + 1]
                if hint is not None:
                    hs[r, : e - s] = hint[s:e]
            rows = rows.to(dev)
            z = logits_fast(rows[:, :-1].contiguous())
            if hint is not None:
                z = lean(z, hs.to(dev))
            lp = torch.log_softmax(z, -1)
            nll = -lp.gather(2, rows[:, 1:, None])[..., 0]
            for r, (s, b, e) in enumerate(g):
                put(nll[r, b - s : e - s], rows[r, b - s : e - s], rows[r, b - s + 1 : e - s + 1])


def learner(C):
    ks = [k for k in P if not (k.split(".")[0].isdigit() and int(k.split(".")[0]) < O["freeze"])]
    vel = {k: torch.zeros_like(P[k]) for k in ks}

    def learn(V, c):
        T, K = O["T"], O["K"]
        z = V[c * K : (c + 1) * K + 1].to(dev).long()
        m = (z.numel() - 1) // T
        x, y = z[: m * T].view(m, T), z[1 : m * T + 1].view(m, T)
        lr = O["lr_t"] * 0.5 * (1 + math.cos(math.pi * c / max(C - 1, 1)))
        per = max(1, m // WORLD)
        for _ in range(O["ep"]):
            a = RANK * per % max(m, 1)
            loss = ce_fast(x[a : a + per].contiguous(), y[a : a + per].contiguous())
            for k in ks:
                P[k].grad = None
            loss.backward()
            gs = [P[k].grad for k in ks]
            for g in gs:
                red(g, "avg")
            t = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gs]))
            f = (O["clip_t"] / (t + 1e-6)).clamp(max=1.0)
            for k, g in zip(ks, gs):
                vel[k].mul_(O["mom"]).add_(g * f)
                P[k].data.add_(vel[k], alpha=-lr)
            for k in P:
                P[k].grad = None

    return learn


def slide(V):
    put, close = books()
    score(V, list(spans(V.numel() - 1))[RANK::WORLD], put)
    return close()


def march(V):
    """Chunk by chunk: all its targets are scored and booked, then the net may learn from them."""
    n = V.numel() - 1
    box = chunked(n)
    put, close = books()
    learn = learner(len(box))
    hint = hints(V) if O["hint"] else None
    for c, ws in enumerate(box):
        score(V, ws[RANK::WORLD], put, hint)
        if c + 1 < len(box) and O["ep"] > 0:
            learn(V, c)
        if c % 200 == 0:
            say(f"chunk {c}/{len(box)}")
    return close()


def main():
    say("flint", json.dumps(O), f"world {WORLD} torch {torch.__version__}")
    V = whole(HELD)
    say(f"held {V.numel()} tokens in {len(HELD)} shard(s); train {len(TRAIN)} shards")
    say(f"params {sum(v.numel() for v in P.values())}")
    it, spent, feed = train(V)
    H = gauge(feed, spent)
    say(f"trained {it} it in {spent:.1f}s, {1000 * spent / max(it, 1):.2f}ms/it")
    say(f"peak {torch.cuda.max_memory_allocated() >> 20} MiB")
    ship(H)
    del H, feed
    fence()
    t0 = time.perf_counter()
    l, b, _, _ = slide(V)
    say(f"window loss {l:.5f} bpb {b:.5f} in {time.perf_counter() - t0:.1f}s")
    l, b, n, by = march(V)
    fence()
    t = time.perf_counter() - t0
    say(f"FINAL loss {l:.6f} bpb {b:.6f} tokens {n} bytes {by} evaluation {t:.1f}s")
    assert n == V.numel() - 1, "not every token was booked"
    assert t <= O["eclock"], "evaluation ran over"
    if RANK == 0:
        json.dump(dict(name=O["run"], seed=O["seed"], val_loss=l, val_bpb=b), open("result.json", "w"))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    if "--check" in sys.argv:
        V = whole(HELD[:1])[:20000]
        assert sorted(t for _, b, e in spans(V.numel() - 1) for t in range(b, e)) == list(range(V.numel() - 1))
        say("spans ok")
    else:
        main()
