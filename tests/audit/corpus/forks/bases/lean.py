"""docwise: one file, four stages -- data, fit, pack, grade.

Every document of the split is graded on its own: its context begins at its own BOS, a small LoRA of its own learns
from chunks that are already booked, and an online n-gram model (counts of earlier blocks of documents, full rows over the
vocabulary) is mixed in with a weight that looks at the context alone. Nothing is read twice, nothing is booked twice.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""
import copy, glob, hashlib, json, math, os, queue, random, struct, sys, threading, time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace as NS

import brotli
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ============================================================ settings
SPEC = dict(
    # name: default; every one may be given in the environment, in capitals
    data="./data/datasets/fineweb10B_sp8192", tok="./data/tokenizers/fineweb_8192_bpe.model", out=".", run="docwise", seed=42,
    vocab=8192, dim=512, depth=11, heads=8, kv=4, hidden=2048, rope=16, theta=1e4, cap=30.0, gain=5.0, ctx=2048,
    loop_from=3, loop_to=5, loops=2, loop_at=0.35, lanes_from=8, gate_dims=12, bos=1,
    tokens=786_432, clock=600.0, reserve=8.0, warm=20, max_steps=20_000, down=0.72, floor=0.1,
    lr_mat=0.026, lr_emb=0.03, lr_vec=0.02, wd_mat=0.095, wd_emb=0.085, wd_vec=0.02, mom=0.97, mom0=0.92, mom_steps=1500,
    b1=0.9, b2=0.99, clip=0.3, ema=0.9965, look=1000, say=250,
    bits=6, k_mat=12.85, k_mlp=12.0, ebits=8, k_emb=20.0, calib=32, damp=0.01, blk=128, lqer=3, lqer_rank=4, lqer_group=32, hclip=0.0, rowsort=0,
    lora=80, lora_alpha=144.0, lora_lr=1e-4, lora_wd=0.5, lora_b2=0.99, chunk=48, docs=64, block=2048,
    ng=1, ng_rows=16_384, ng_lam=4.0, ng_max=0.12, ng_half=48.0, sums=0, verbose=1,
    phase=0, phase_lr=1e-3, phase_mom=0.9, phase_rows=16, asym=0, warm_a=0,
    val_docs=50_000, shard_tokens=100_000_000,
)


def settings():
    got = {}
    for key, default in SPEC.items():
        raw = os.environ.get(key.upper())
        got[key] = default if raw is None else type(default)(raw)
    return NS(**got)


C = settings()
R, W, L = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
LEAD = R == 0
DEV = torch.device("cuda", L) if torch.cuda.is_available() else torch.device("cpu")
AC = lambda: torch.autocast("cuda", dtype=torch.bfloat16) if DEV.type == "cuda" else nullcontext()
PIECES = {}  # what the log's last line reports


class Book:
    """The log: to the console and to logs/RUN.txt, by rank 0."""

    def __init__(self):
        self.path = Path(C.out) / "logs" / f"{C.run}_seed{C.seed}.txt"
        if LEAD: self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, *words):
        if not LEAD: return
        line = " ".join(str(w) for w in words)
        print(line, flush=True)
        with open(self.path, "a") as f: f.write(line + "\n")


say = Book()


class Watch:
    """A clock that can be stopped, in seconds; waits for the device on both ends."""

    def __init__(self): self.total, self.t = 0.0, None
    def sync(self): torch.cuda.synchronize() if DEV.type == "cuda" else None
    def go(self): self.sync(); self.t = time.perf_counter(); return self
    def halt(self): self.sync(); self.total += time.perf_counter() - self.t; self.t = None; return self.total
    def now(self): return self.total + (time.perf_counter() - self.t if self.t is not None else 0.0)

    @contextmanager
    def paused(self):
        self.halt(); yield; self.go()


def everyone(t, op="sum"):
    """The same value on all ranks."""
    if W > 1: dist.all_reduce(t, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "avg": dist.ReduceOp.AVG}[op])
    return t


def share(n, r=None):
    """The r-th of W contiguous parts of range(n)."""
    r = R if r is None else r
    return n * r // W, n * (r + 1) // W


# ============================================================ data
def shard(path):
    head = np.fromfile(path, "<i4", 256)
    assert head.size == 256 and head[0] == 20240520 and head[1] == 1, f"{path}: no shard"
    n = int(head[2])
    assert os.path.getsize(path) == 1024 + 2 * n, f"{path}: {n} tokens announced, file has another size"
    return np.memmap(path, "<u2", "r", offset=1024, shape=(n,))


class Feed:
    """Training batches: each rank owns every W-th shard and walks its aligned windows with a stride coprime to their number,
    so that neighbours in the stream do not end up in one batch. Two batches are kept ready by a thread."""

    def __init__(self, seed):
        names = sorted(glob.glob(f"{C.data}/fineweb_train_*.bin"))
        assert names, f"no training shards under {C.data}"
        self.names = names[R::W] or names
        self.rng = np.random.default_rng((seed, R))
        self.turn, self.open = 0, True
        self.q = queue.Queue(2)
        threading.Thread(target=self.work, daemon=True).start()

    def windows(self):
        while True:
            mem = shard(self.names[self.turn % len(self.names)]); self.turn += 1
            phase = int(self.rng.integers(C.ctx)); n = (len(mem) - 1 - phase) // C.ctx
            if n < 1: continue
            stride = int(self.rng.integers(1, n + 1))
            while math.gcd(stride, n) != 1: stride = stride % n + 1
            at = int(self.rng.integers(n))
            for _ in range(n):
                o = phase + at * C.ctx
                yield torch.from_numpy(mem[o:o + C.ctx + 1].astype(np.int64))
                at = (at + stride) % n

    def work(self):
        rows, src = C.tokens // W // C.ctx, self.windows()
        while self.open: self.q.put(torch.stack([next(src) for _ in range(rows)]))

    def close(self):
        """No shard is read after this; called before the training clock is read for the last time."""
        self.open = False
        while not self.q.empty(): self.q.get()

    def __call__(self):
        b = self.q.get().to(DEV, non_blocking=True)
        return b[:, :-1], b[:, 1:]


def prepare(source):
    """python train_gpt.py prepare docs.jsonl: training shards of our own vocabulary out of the frozen document list.

    The first VAL_DOCS documents are the held-out split (its shard is written from exactly these), training text begins
    after them. One document is a line {"text": ...}; each becomes BOS and its tokens."""
    sp = sentencepiece.SentencePieceProcessor(model_file=C.tok); os.makedirs(C.data, exist_ok=True)
    buf, n, kind = [], 0, "val"

    def flush():
        nonlocal buf, n
        flat = np.array(buf, "<u2"); head = np.zeros(256, "<i4"); head[:3] = 20240520, 1, len(flat)
        with open(f"{C.data}/fineweb_{kind}_{n:06d}.bin", "wb") as f: f.write(head.tobytes() + flat.tobytes())
        buf, n = [], n + 1

    with open(source, encoding="utf-8") as lines:
        for i, line in enumerate(lines):
            if i == C.val_docs: flush(); kind, n = "train", 0
            buf += [C.bos] + sp.encode(json.loads(line)["text"])
            if kind == "train" and len(buf) >= C.shard_tokens: flush()
    if buf: flush()


class Split:
    """The held-out split: tokens, where its documents begin, and the bytes that each token stands for."""

    def __init__(self):
        names = sorted(glob.glob(f"{C.data}/fineweb_val_*.bin"))
        assert names, f"no held-out shards under {C.data}"
        self.tok = torch.from_numpy(np.concatenate([shard(n) for n in names]).astype(np.int64))
        starts = (self.tok == C.bos).nonzero().flatten().tolist()
        if not starts or starts[0]: starts = [0] + starts
        ends = starts[1:] + [len(self.tok) - 1]
        # document i: inputs [start, end), targets (start, end]; the next document's BOS is its last target
        self.doc = [(a, b) for a, b in zip(starts, ends) if b > a]
        self.base, self.mark, self.edge = self.tables()

    def tables(self):
        sp = sentencepiece.SentencePieceProcessor(model_file=C.tok)
        n = sp.vocab_size(); assert n == C.vocab, f"tokenizer has {n} pieces, VOCAB={C.vocab}"
        base, mark, edge = torch.zeros(n), torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        for i in range(n):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i): edge[i] = True
            elif sp.is_byte(i): base[i] = 1
            else:
                p = sp.id_to_piece(i); mark[i] = p[:1] == "\u2581"
                base[i] = len(p[mark[i].item():].encode())
        return base.double().to(DEV), mark.to(DEV), edge.to(DEV)

    def nbytes(self, prev, tgt): return self.base[tgt] + (self.mark[tgt] & ~self.edge[prev])


# ============================================================ model
rms = lambda x: F.rms_norm(x, (x.size(-1),))


class Lin(nn.Module):
    def __init__(self, i, o, zero=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(o, i) if zero else nn.init.orthogonal_(torch.empty(o, i)))

    def forward(self, x): return F.linear(x, self.weight.to(x.dtype))


class Attn(nn.Module):
    def __init__(self):
        super().__init__()
        d, self.h, self.g, self.e = C.dim, C.heads, C.kv, C.dim // C.heads
        self.q, self.k, self.v, self.o = Lin(d, d), Lin(d, self.g * self.e), Lin(d, self.g * self.e), Lin(d, d, True)
        self.gain = nn.Parameter(torch.full((self.h,), C.gain))
        self.gate = nn.Parameter(torch.zeros(self.h, C.gate_dims))
        f = C.theta ** (-torch.arange(0, C.rope, 2).float() / C.rope)
        t = torch.outer(torch.arange(C.ctx).float(), f)
        self.register_buffer("cs", torch.stack((t.cos(), t.sin())), persistent=False)

    def turn(self, x):
        c, s = self.cs[:, None, :x.size(1), None].to(x.dtype)
        a, b, rest = x.split((C.rope // 2, C.rope // 2, self.e - C.rope), -1)
        return torch.cat((a * c + b * s, b * c - a * s, rest), -1)

    def forward(self, z, ad=None):
        B, T, _ = z.shape
        q, k, v = self.q(z), self.k(z), self.v(z)
        if ad is not None: q, v = q + ad("q", z), v + ad("v", z)
        q, k, v = (u.view(B, T, -1, self.e) for u in (q, k, v))
        q, k = self.turn(rms(q)), self.turn(rms(k))
        q = q * self.gain.to(q.dtype)[:, None]
        y = F.scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, k, v)), is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2)
        n = F.normalize(v, dim=-1)[:, :, :, None]  # XSA: drop what lies along the own value
        y = y.reshape(B, T, self.g, self.h // self.g, self.e)
        y = (y - (y * n).sum(-1, keepdim=True) * n).reshape(B, T, self.h, self.e)
        y = y * (2 * torch.sigmoid(F.linear(z[..., :C.gate_dims], self.gate.to(z.dtype))))[..., None]
        out = self.o(y.reshape(B, T, -1))
        return out if ad is None else out + ad("o", z)


class Mlp(nn.Module):
    def __init__(self): super().__init__(); self.up, self.dn = Lin(C.dim, C.hidden), Lin(C.hidden, C.dim, True)

    def forward(self, z, ad=None):
        y = self.dn(F.leaky_relu(self.up(z), 0.5).square())
        return y if ad is None else y + ad("m", z)


class Layer(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.i, self.att, self.mlp, self.s = i, Attn(), Mlp(), (i + 1) ** -0.5
        self.a, self.b = nn.Parameter(torch.ones(C.dim)), nn.Parameter(torch.ones(C.dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(C.dim), torch.zeros(C.dim))))

    def forward(self, x, x0, ad=None):
        m = self.mix.to(x.dtype); x = m[0] * x + m[1] * x0
        z = rms(x) * self.s
        if self.i >= C.lanes_from:  # attention and MLP side by side
            return x + self.a.to(x.dtype) * self.att(z, ad) + self.b.to(x.dtype) * self.mlp(z, ad)
        x = x + self.a.to(x.dtype) * self.att(z, ad)
        return x + self.b.to(x.dtype) * self.mlp(rms(x) * self.s, ad)


def route(looping):
    """The order in which layers are run: the middle ones LOOPS more times once looping is on."""
    seq = list(range(C.depth))
    if looping:
        mid = list(range(C.loop_from, C.loop_to + 1))
        seq = seq[:C.loop_to + 1] + mid * C.loops + seq[C.loop_to + 1:]
    half = len(seq) // 2
    return seq[:half], seq[half:]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Parameter(torch.randn(C.vocab, C.dim) * 0.005)
        self.layers = nn.ModuleList(Layer(i) for i in range(C.depth))
        n = len(route(True)[0])
        self.skip, self.pick = nn.Parameter(torch.ones(n, C.dim)), nn.Parameter(torch.zeros(n, C.dim))
        self.hi, self.lo = nn.Parameter(torch.tensor(C.cap), requires_grad=False), nn.Parameter(torch.tensor(C.cap), requires_grad=False)
        self.sm_w, self.sm_l = nn.Parameter(torch.zeros(C.gate_dims)), nn.Parameter(torch.zeros(()))
        self.looping = False

    def trunk(self, ids, ad=None):
        e = F.embedding(ids, self.emb)
        prev = F.pad(e[:, :-1], (0, 0, 1, 0)) * (ids != C.bos)[..., None].to(e.dtype)  # a document starts clean
        e = e + self.sm_l.to(e.dtype) * torch.sigmoid((e[..., :C.gate_dims] * self.sm_w.to(e.dtype)).sum(-1, keepdim=True)) * prev
        x = x0 = rms(e); first, second = route(self.looping); held = []; site = 0
        for i in first:
            x = self.layers[i](x, x0, ad and ad.at(site)); held.append(x); site += 1
        for j, i in enumerate(second):
            if held:
                g = torch.sigmoid(self.pick[j]).to(x.dtype)
                x = (1 - g) * self.skip[j].to(x.dtype) * held.pop() + g * x
            x = self.layers[i](x, x0, ad and ad.at(site)); site += 1
        return rms(x)

    def logits(self, ids, ad=None):
        h = self.trunk(ids, ad)
        z = F.linear(h, self.emb.to(h.dtype))
        if ad is not None: z = z + ad.at("head")("h", h)
        z = z.float()
        if not C.asym: return C.cap * torch.tanh(z / C.cap)
        return torch.where(z > 0, self.hi * torch.tanh(z / self.hi), self.lo * torch.tanh(z / self.lo))

    def forward(self, x, y): return F.cross_entropy(self.logits(x).flatten(0, 1), y.flatten())


# ============================================================ optimisers
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@torch.compile
def polar(u):
    x = u.bfloat16(); t = x.size(0) > x.size(1)
    x = x.mT if t else x
    x = x / (x.norm() * 1.02 + 1e-6)
    for a, b, c in POLAR:
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if t else x


class Muon:
    """Row-normalised Muon; matrix i is worked out by rank i mod W and sent to the others."""

    def __init__(self, ps): self.ps, self.buf = list(ps), [torch.zeros_like(p) for p in ps]

    @torch.no_grad()
    def step(self, lr, mom, wd):
        flat = torch.zeros(sum(p.numel() for p in self.ps), device=DEV, dtype=torch.bfloat16)
        parts = flat.split([p.numel() for p in self.ps])
        for i, p in enumerate(self.ps):
            if i % W != R: continue
            b = self.buf[i].mul_(mom).add_(p.grad); u = p.grad + mom * b
            u = u / u.norm(dim=1, keepdim=True).clamp_min(1e-7)
            parts[i].copy_((polar(u) * max(1.0, p.size(0) / p.size(1)) ** 0.5).flatten())
        everyone(flat)
        for p, u in zip(self.ps, parts): p.mul_(1 - lr * wd).add_(u.view_as(p).to(p.dtype), alpha=-lr)

    def state(self): return [b.clone() for b in self.buf]
    def load(self, s): [b.copy_(t) for b, t in zip(self.buf, s)]


class Optim:
    def __init__(self, net):
        mats = [p for n, p in net.named_parameters() if p.ndim == 2 and n.startswith("layers.") and p.numel() > 65_536]
        taken = {id(p) for p in mats} | {id(net.emb)}
        vecs = [p for p in net.parameters() if id(p) not in taken and p.requires_grad]
        self.muon = Muon(mats)
        kw = dict(betas=(C.b1, C.b2), eps=1e-8, fused=DEV.type == "cuda")
        self.emb = torch.optim.AdamW([net.emb], lr=C.lr_emb, weight_decay=C.wd_emb, **kw)
        self.vec = torch.optim.AdamW(vecs, lr=C.lr_vec, weight_decay=C.wd_vec, **kw)
        self.all = [p for p in net.parameters() if p.requires_grad]

    def step(self, n, scale):
        small = [p.grad for p in self.all if p.grad is not None]
        if W > 1:
            flat = torch.cat([g.flatten() for g in small]); everyone(flat, "avg")
            for g, f in zip(small, flat.split([g.numel() for g in small])): g.copy_(f.view_as(g))
        nn.utils.clip_grad_norm_(self.all, C.clip)
        w = min(n / C.mom_steps, 1.0)
        self.muon.step(C.lr_mat * scale, C.mom0 + w * (C.mom - C.mom0), C.wd_mat)
        for o, lr in ((self.emb, C.lr_emb), (self.vec, C.lr_vec)):
            o.param_groups[0]["lr"] = lr * scale; o.step()
        for p in self.all: p.grad = None

    def state(self):
        return self.muon.state(), copy.deepcopy(self.emb.state_dict()), copy.deepcopy(self.vec.state_dict())

    def load(self, s): self.muon.load(s[0]); self.emb.load_state_dict(s[1]); self.vec.load_state_dict(s[2])


# ============================================================ fit
def plain_loss(net, sp):
    """Mean nats per token over the whole split in blocks of CTX: for the curve in the log, nothing hangs on it."""
    n = (len(sp.tok) - 1) // C.ctx; a, b = share(n); s = torch.zeros(2, dtype=torch.float64, device=DEV)
    net.eval()
    with torch.inference_mode(), AC():
        for i in range(a, b, 32):
            j = min(i + 32, b); t = sp.tok[i * C.ctx:j * C.ctx + 1].to(DEV)
            x, y = t[:-1].view(-1, C.ctx), t[1:].view(-1, C.ctx)
            s[0] += net(x, y).double() * y.numel(); s[1] += y.numel()
    net.train(); everyone(s)
    return (s[0] / s[1]).item()


def warm_up(net, fast, opt):
    """Both graphs compiled by real steps on training batches; weights, moments and the feed start afresh afterwards."""
    keep, mom, feed = {k: v.clone() for k, v in net.state_dict().items()}, opt.state(), Feed(C.seed + 999)
    for looping in (False, True):
        net.looping = looping
        for n in range(C.warm):
            with AC(): loss = fast(*feed())
            loss.backward(); opt.step(n, 1.0)
    net.load_state_dict(keep); opt.load(mom); net.looping = False
    say(f"warmup: {2 * C.warm} steps, states restored")


def fit(net, sp):
    fast, opt, feed = torch.compile(net, dynamic=False), Optim(net), Feed(C.seed)
    warm_up(net, fast, opt)
    avg = {k: v.float().clone() for k, v in net.state_dict().items()}
    budget = C.clock - C.reserve; watch = Watch().go(); n = 0; stop = False
    while not stop and n < C.max_steps:
        frac = watch.now() / budget
        scale = max(min(1.0, (1 - frac) / C.down), C.floor)
        if not net.looping and frac >= C.loop_at: net.looping = True; say(f"step {n}: layers {C.loop_from}-{C.loop_to} loop from here")
        with AC(): loss = fast(*feed())
        loss.backward(); opt.step(n, scale); n += 1
        with torch.no_grad():
            for k, v in net.state_dict().items(): avg[k].lerp_(v.float(), 1 - C.ema)
        if n % C.say == 0 or n < 4: say(f"step:{n}/{C.max_steps} train_loss:{loss.item():.4f} train_time:{1e3 * watch.now():.0f}ms step_avg:{1e3 * watch.now() / n:.2f}ms")
        if n % C.look == 0:
            with watch.paused(): say(f"step:{n}/{C.max_steps} val_loss:{plain_loss(fast, sp):.4f}")
        stop = everyone(torch.tensor(float(watch.now() >= budget), device=DEV), "max").item() > 0
    spent = watch.halt()
    say(f"stopping_early: wallclock_cap train_time:{1e3 * spent:.0f}ms step:{n}/{C.max_steps}")
    net.load_state_dict({k: v.to(net.state_dict()[k].dtype) for k, v in avg.items()})
    return feed, spent


# ============================================================ pack
def moments(net, feed, n):
    """Second moments of the inputs of every matrix, and of the final states for the embedding, on training batches."""
    H, cnt, hooks = {}, {}, []

    def add(name, a):
        a = a.detach().flatten(0, -2).float()
        if name not in H: H[name] = torch.zeros(a.size(1), a.size(1), device=DEV); cnt[name] = 0
        H[name].addmm_(a.mT, a); cnt[name] += a.size(0)

    for name, m in net.named_modules():
        if isinstance(m, Lin): hooks.append(m.register_forward_pre_hook(lambda m, i, name=name: add(name + ".weight", i[0])))
    net.eval()
    with torch.no_grad(), AC():
        for _ in range(n):
            x, _y = feed()
            for part in x.split(16): add("emb", net.trunk(part))
    for h in hooks: h.remove()
    net.train()
    return {k: everyone(h / cnt[k], "avg") for k, h in H.items()}


def row_weight(w, h):
    """HCLIP: rows that weigh more by |w| times the second moment get a wider clip (no gain here, 0 in the submitted runs)."""
    r = (w.abs() * h.diagonal()).mean(1) / h.diagonal().mean()
    return 1 + C.hclip * (r / r.mean() - 1)


def gptq(w, h, bits, k):
    """SDClip rows: one scale of k standard deviations a row; columns by falling second moment, error carried on."""
    top = 2 ** (bits - 1) - 1; w, h = w.float().clone(), h.clone()
    k = k * row_weight(w, h) if C.hclip else k
    s = (k * w.std(1) / top).clamp_min(1e-10).half().float()
    d = h.diagonal(); dead = d == 0; d[dead] = 1; w[:, dead] = 0; d += C.damp * d.mean()
    p = d.argsort(descending=True); w, h = w[:, p], h[p][:, p]
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True); q = torch.zeros_like(w)
    for a in range(0, w.size(1), C.blk):
        b = min(a + C.blk, w.size(1)); err = torch.zeros(w.size(0), b - a, device=w.device)
        for j in range(a, b):
            q[:, j] = (w[:, j] / s).round().clamp(-top, top)
            err[:, j - a] = (w[:, j] - q[:, j] * s) / u[j, j]
            w[:, j + 1:b] -= err[:, j - a, None] * u[j, None, j + 1:b]
        w[:, b:] -= err @ u[a:b, b:]
    return q[:, p.argsort()].to(torch.int8), s.half()


def low_rank(e):
    """LQER: the error's first LQER_RANK directions, left factor in two bits, right factor in four."""
    U, S, V = torch.linalg.svd(e, full_matrices=False); r = C.lqer_rank
    a, b = U[:, :r] * S[:r], V[:r]
    sa = (a.abs().max() / 1.5).half(); qa = (a / sa.float()).round().clamp(-2, 1).to(torch.int8)
    g = b.reshape(-1, C.lqer_group); sb = (g.abs().amax(1) / 7.5).clamp_min(1e-8).half()
    qb = (g / sb.float()[:, None]).round().clamp(-8, 7).to(torch.int8)
    return qa, sa, qb, sb


def shuffle(b, n=2): pad = -len(b) % n; return np.frombuffer(b + bytes(pad), np.uint8).reshape(-1, n).T.tobytes()


def unshuffle(b, size, n=2): return np.frombuffer(b, np.uint8).reshape(n, -1).T.tobytes()[:size]


def row_order(q):
    """ROWSORT: rows one after the other by nearest neighbour in L1, from row 0 on. 40 KB less, 50 s more; off."""
    left, order = torch.ones(len(q), dtype=torch.bool), [0]
    left[0] = False; f = q.float().cpu()
    while left.any():
        rest = left.nonzero().flatten()
        d = (f[rest] - f[order[-1]]).abs().sum(1)
        order.append(int(rest[d.argmin()])); left[order[-1]] = False
    return torch.tensor(order, dtype=torch.int32)


def freeze(net, H):
    """The artifact's bytes: a JSON head, then brotli over byte-shuffled tensors."""
    head, body, errs = [], [], {}
    packed = {}
    for name, t in net.state_dict().items():
        if name in H:
            bits, k = (C.ebits, C.k_emb) if name == "emb" else (C.bits, C.k_mlp if ".mlp." in name else C.k_mat)
            q, s = gptq(t, H[name], bits, k); packed[name] = (q, s)
            errs[name] = t.float() - q.float() * s.float()[:, None]
    worst = sorted(errs, key=lambda n: -errs[n].norm().item())[:C.lqer]
    for name, t in net.state_dict().items():
        parts = {"": t.half()} if name not in packed else {"q": packed[name][0], "s": packed[name][1]}
        if C.rowsort and name in packed:
            o = row_order(parts["q"]); parts.update(q=parts["q"][o.to(DEV).long()], o=o)
        if name in worst: parts.update(zip(("qa", "sa", "qb", "sb"), low_rank(errs[name])))
        for tag, p in parts.items():
            raw = p.cpu().numpy().tobytes(); two = p.dtype == torch.float16
            head.append((name, tag, list(p.shape), str(p.dtype)[6:], len(raw))); body.append(shuffle(raw) if two else raw)
    meta = json.dumps([C.loop_from, C.loop_to, C.loops, head]).encode()
    return struct.pack("<I", len(meta)) + brotli.compress(meta + b"".join(body), quality=11, lgwin=24)


def thaw(blob, net):
    """Weights back into a net from the artifact's bytes."""
    n, = struct.unpack("<I", blob[:4]); raw = brotli.decompress(blob[4:])
    *_, head = json.loads(raw[:n]); at = n; got = {}
    for name, tag, shape, dtype, size in head:
        even = size + size % 2 if dtype == "float16" else size
        b = raw[at:at + even]; at += even
        b = unshuffle(b, size) if dtype == "float16" else b
        got.setdefault(name, {})[tag] = torch.from_numpy(np.frombuffer(b, dtype).reshape(shape).copy())
    state = {}
    for name, p in got.items():
        if "o" in p:
            back = torch.empty_like(p["q"]); back[p["o"].long()] = p["q"]; p["q"] = back
        t = p[""].float() if "" in p else p["q"].float() * p["s"].float()[:, None]
        if "qa" in p:
            b = (p["qb"].float() * p["sb"].float()[:, None]).reshape(C.lqer_rank, -1)
            t = t + p["qa"].float() * p["sa"].float() @ b
        state[name] = t
    net.load_state_dict({k: state[k].to(v.dtype) for k, v in net.state_dict().items()})
    return net


# ============================================================ grade
class Adapter:
    """A LoRA per document of a batch at every site (a layer's turn in the route): delta = alpha/r * x A' B'."""

    WIDTH = dict(q=(C.dim, C.dim), v=(C.dim, C.kv * C.dim // C.heads), o=(C.dim, C.dim), m=(C.dim, C.dim), h=(C.dim, C.vocab))

    def __init__(self, rows, turns):
        self.rows, self.p, self.here = rows, {}, None
        for site in range(turns):
            for tag in "qvom": self.add(site, tag)
        self.add("head", "h")
        self.opt = torch.optim.AdamW([t for ab in self.p.values() for t in ab], lr=C.lora_lr, betas=(0.0, C.lora_b2), eps=1e-10, weight_decay=C.lora_wd)

    def add(self, site, tag):
        i, o = self.WIDTH[tag]; bound = i ** -0.5
        a = torch.empty(self.rows, i, C.lora, device=DEV).uniform_(-bound, bound).requires_grad_()
        self.p[site, tag] = a, torch.zeros(self.rows, C.lora, o, device=DEV, requires_grad=True)

    def at(self, site): self.here = site; return self

    def __call__(self, tag, x):
        a, b = self.p[self.here, tag]
        return (C.lora_alpha / C.lora) * (x @ a.to(x.dtype)) @ b.to(x.dtype)

    def fresh(self):
        """Another batch of documents: nothing that was learnt stays (WARM_A keeps the random A's, which saw no gradient
        that the documents' own B did not pass on)."""
        with torch.no_grad():
            for (_, tag), (a, b) in self.p.items():
                b.zero_()
                if not C.warm_a: a.uniform_(-self.WIDTH[tag][0] ** -0.5, self.WIDTH[tag][0] ** -0.5)
        self.opt.state.clear()
        return self

    def learn(self, loss):
        self.opt.zero_grad(set_to_none=True); loss.backward(); self.opt.step()


class Counts:
    """Online n-gram model of orders 1-3, interpolated: every order adds its counts to LAM times the distribution below it
    and divides by the row's own total plus LAM, so each row is a distribution over the whole vocabulary. The third order
    hashes its context into NG_ROWS rows; contexts that collide share a row, which is still a distribution."""

    def __init__(self):
        v = C.vocab
        self.c1, self.c2, self.c3 = torch.zeros(v, device=DEV), torch.zeros(v, v, device=DEV), torch.zeros(C.ng_rows, v, device=DEV)
        self.wait = []

    @staticmethod
    def row(two, one): return (two * 36_313 + one * 27_191) % C.ng_rows

    def full(self, two, one):
        """p(. | two, one) for every token of the vocabulary, and how often this context was met. two, one: (B, T)."""
        v = C.vocab
        p1 = (self.c1 + 1.0) / (self.c1.sum() + v)
        r2, r3 = self.c2[one], self.c3[self.row(two, one)]
        n2, n3 = r2.sum(-1, keepdim=True), r3.sum(-1, keepdim=True)
        p2 = (r2 + C.ng_lam * p1) / (n2 + C.ng_lam)
        p3 = (r3 + C.ng_lam * p2) / (n3 + C.ng_lam)
        return p3, n3

    def note(self, two, one, tgt): self.wait.append((two, one, tgt))

    def settle(self):
        """What was booked since the last call enters the counts."""
        for two, one, tgt in self.wait:
            w = torch.ones_like(tgt, dtype=torch.float32)
            self.c1.index_put_((tgt,), w, accumulate=True)
            self.c2.index_put_((one, tgt), w, accumulate=True)
            self.c3.index_put_((self.row(two, one), tgt), w, accumulate=True)
        self.wait.clear()


def mixed(logits, counts, two, one):
    """log p over the vocabulary: the net's distribution, and the counts' with a weight that grows with the context's count."""
    lp = torch.log_softmax(logits.float(), -1)
    if counts is None: return lp
    png, n = counts.full(two, one)
    w = C.ng_max * n / (n + C.ng_half)
    p = (1 - w) * lp.exp() + w * png
    if C.sums: assert (p.sum(-1) - 1).abs().max() < 1e-3, "mixture does not sum to one"
    return p.clamp_min(1e-30).log()


def lay_out(sp, docs):
    """Rows of tokens for a batch of documents, padded with BOS, and their lengths in targets."""
    lens = torch.tensor([b - a for a, b in docs])
    rows = torch.full((len(docs), int(lens.max()) + 1), C.bos)
    for r, (a, b) in enumerate(docs): rows[r, :b - a + 1] = sp.tok[a:b + 1]
    return rows.to(DEV), lens.to(DEV)


def grade_batch(net, sp, docs, counts, book, by, ad):
    """One batch of documents, chunk by chunk: forward, book the chunk, then let each document's LoRA learn from it."""
    rows, lens = lay_out(sp, docs); last = int(lens.max())
    ad = ad.fresh() if ad is not None and ad.rows == len(docs) else Adapter(len(docs), sum(map(len, route(True))))
    for lo in range(0, last, C.chunk):
        hi = min(lo + C.chunk, last); w0 = max(0, hi - C.ctx)
        x, y = rows[:, w0:hi], rows[:, w0 + 1:hi + 1]
        with AC(): z = net.logits(x, ad)
        z, tgt, one = z[:, lo - w0:], y[:, lo - w0:], x[:, lo - w0:]
        two = torch.cat((rows[:, max(lo - 1, 0):lo] if lo else torch.full_like(one[:, :1], C.bos), one[:, :-1]), 1)
        live = torch.arange(lo, hi, device=DEV)[None] < lens[:, None]
        with torch.no_grad():
            nll = -mixed(z, counts, two, one).gather(-1, tgt[..., None])[..., 0]
            book[0] += nll[live].double().sum(); book[1] += live.sum(); book[2] += sp.nbytes(one, tgt)[live].sum()
            by.add(lens, nll, live)
        if counts is not None: counts.note(two[live], one[live], tgt[live])
        more = lens > hi
        if more.any():
            ce = F.cross_entropy(z.flatten(0, 1), tgt.flatten(), reduction="none").view_as(tgt)
            ad.learn((ce.mean(1) * more).sum())
    return ad


def phase_step(net, sp, docs):
    """PHASE: one pass of SGD over documents that are booked already, on the shared weights (off in the submitted runs)."""
    flat = torch.cat([sp.tok[a:b + 1] for a, b in docs]); n = (len(flat) - 1) // C.ctx
    ps = [p for p in net.parameters() if p.dtype == torch.float32 and p.ndim == 2]
    for p in ps: p.requires_grad_(True)
    opt = torch.optim.SGD(ps, lr=C.phase_lr, momentum=C.phase_mom)
    for i in range(0, n, C.phase_rows):
        j = min(i + C.phase_rows, n); t = flat[i * C.ctx:j * C.ctx + 1].to(DEV)
        with AC(): loss = net(t[:-1].view(-1, C.ctx), t[1:].view(-1, C.ctx))
        loss.backward()
        for p in ps:
            if p.grad is not None: everyone(p.grad, "avg")
        nn.utils.clip_grad_norm_(ps, 1.0); opt.step(); opt.zero_grad(set_to_none=True)
    for p in ps: p.requires_grad_(False)


def print_of(net):
    """A short hash of all weights, for the log: the same before and after grading when nothing shared is adapted."""
    h = hashlib.sha256()
    for k, v in sorted(net.state_dict().items()): h.update(k.encode()); h.update(v.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


class Lengths:
    """Nats per token by the document's length, for the log; the score is not made of these."""

    EDGES = (64, 256, 1024, 4096)

    def __init__(self): self.t = torch.zeros(len(self.EDGES) + 1, 2, dtype=torch.float64, device=DEV)

    def add(self, lens, nll, live):
        k = torch.bucketize(lens, torch.tensor(self.EDGES, device=DEV))
        self.t[:, 0].index_add_(0, k, (nll * live).double().sum(1)); self.t[:, 1].index_add_(0, k, live.double().sum(1))

    def tell(self):
        everyone(self.t); names = [f"<{e}" for e in self.EDGES] + ["more"]
        say("by length:", " ".join(f"{n}:{(s / c.clamp_min(1)).item():.4f}({int(c)})" for n, (s, c) in zip(names, self.t)))


def grade(net, sp):
    """Nats per token and bits per byte over every document of the split. Each rank takes a contiguous run of documents, in
    the split's order; counts made from a block of documents are used from the next block on."""
    for p in net.parameters(): p.requires_grad_(False)
    net.eval(); net.looping = True
    a, b = share(len(sp.doc)); counts = Counts() if C.ng else None
    book, by, ad = torch.zeros(3, dtype=torch.float64, device=DEV), Lengths(), None
    say(f"grade: weights {print_of(net)} at the start")
    for blk in range(a, b, C.block):
        for i in range(blk, min(blk + C.block, b), C.docs):
            ad = grade_batch(net, sp, sp.doc[i:min(i + C.docs, blk + C.block, b)], counts, book, by, ad)
        if counts is not None: counts.settle()
        if C.phase and blk == a: phase_step(net, sp, sp.doc[blk:min(blk + C.phase, blk + C.block, b)])
        if C.verbose: say(f"grade: documents {blk - a}/{b - a} of rank 0, so far {(book[0] / book[1]).item():.4f}")
    say(f"grade: weights {print_of(net)} at the end"); by.tell(); everyone(book)
    nats, toks, bts = book.tolist()
    assert int(toks) == len(sp.tok) - 1, f"{int(toks)} targets booked, the split has {len(sp.tok) - 1}"
    return nats / toks, nats / math.log(2) / bts, toks, bts


# ============================================================ looks from outside
def inspect(path):
    """python train_gpt.py inspect model.bin: what the artifact holds, tensor by tensor, and what each costs by its entropy."""
    blob = Path(path).read_bytes(); n, = struct.unpack("<I", blob[:4]); raw = brotli.decompress(blob[4:])
    *ways, head = json.loads(raw[:n]); at, whole = n, 0.0
    print(f"{len(blob)} bytes, {len(raw)} unpacked, layers {ways[0]}-{ways[1]} run {ways[2]} more times")
    for name, tag, shape, dtype, size in head:
        even = size + size % 2 if dtype == "float16" else size
        part = raw[at:at + even]; at += even
        seen = np.bincount(np.frombuffer(part, np.uint8), minlength=256); f = seen[seen > 0] / max(len(part), 1)
        cost = -(f * np.log2(f)).sum() * len(part) / 8; whole += cost
        print(f"{name:32s} {tag or '-':3s} {str(shape):18s} {dtype:8s} {size:10d} bytes, about {cost:10.0f}")
    print(f"by order-0 entropy {whole:.0f} bytes")


def sample(path, start="The", n=200, heat=0.8):
    """python train_gpt.py sample model.bin: some text, to see whether anything is alive."""
    sp = sentencepiece.SentencePieceProcessor(model_file=C.tok)
    net = thaw(Path(path).read_bytes(), Net().to(DEV)).eval(); net.looping = True
    ids = torch.tensor([[C.bos] + sp.encode(start)], device=DEV)
    with torch.inference_mode(), AC():
        for _ in range(n):
            z = net.logits(ids[:, -C.ctx:])[:, -1].float() / heat
            ids = torch.cat((ids, torch.multinomial(z.softmax(-1), 1)), 1)
    print(sp.decode(ids[0, 1:].tolist()))


def tell_weights(net):
    """Root mean squares of the matrices by kind, over the layers: the file's size follows them."""
    kinds = {}
    for name, p in net.named_parameters():
        if p.ndim == 2 and name.startswith("layers."):
            kinds.setdefault(".".join(name.split(".")[2:4]), []).append(p.detach().float().square().mean().sqrt().item())
    for kind, got in sorted(kinds.items()):
        if len(got) == C.depth: say(f"rms {kind:10s}", " ".join(f"{g:.3f}" for g in got))
    say(f"rms emb        {net.emb.detach().float().square().mean().sqrt().item():.3f}")


def tell_route():
    a, b = route(True)
    say(f"route {'-'.join(map(str, a))} | {'-'.join(map(str, b))}: {len(a) + len(b)} turns of {C.depth} layers")
    say(f"budget {C.clock - C.reserve:.0f}s of steps, {C.reserve:.0f}s kept for the second moments")


# ============================================================ run
def check():
    """Python train_gpt.py check: the packer and the mixture on random numbers, without data."""
    q = torch.randn(7, 32).half().numpy().tobytes()
    assert unshuffle(shuffle(q), len(q)) == q
    c = Counts(); two, one, tgt = (torch.randint(0, C.vocab, (3, 50), device=DEV) for _ in range(3))
    c.note(two.flatten(), one.flatten(), tgt.flatten()); c.settle()
    p = mixed(torch.randn(3, 50, C.vocab, device=DEV), c, two, one).exp().sum(-1)
    assert (p - 1).abs().max() < 1e-3
    print("ok")


def start():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.cuda.set_device(DEV)
    if W > 1: dist.init_process_group("nccl", device_id=DEV)
    for f in (random.seed, np.random.seed, torch.manual_seed): f(C.seed)
    say(f"settings {json.dumps(vars(C))}")
    say(f"world_size:{W} seed:{C.seed} torch {torch.__version__} python {sys.version.split()[0]}")


def main():
    start()
    code, sp = Path(__file__).read_bytes(), Split()
    say(f"val: {len(sp.tok)} tokens, {len(sp.doc)} documents")
    net = Net().to(DEV)
    say(f"model_params:{sum(p.numel() for p in net.parameters())}")
    tell_route()
    feed, spent = fit(net, sp)
    tell_weights(net)

    w = Watch().go(); H = moments(net, feed, C.calib); feed.close(); spent += w.halt()
    say(f"second moments from {C.calib} training batches: {w.total:.1f}s, training clock {spent:.1f}s of {C.clock:.0f}s")
    assert spent <= C.clock + 1, "the training clock is over"

    path = Path(C.out) / "model.bin"
    if LEAD: path.write_bytes(freeze(net, H))
    if W > 1: dist.barrier()
    blob = path.read_bytes()
    say(f"sha256 model {hashlib.sha256(blob).hexdigest()[:16]} code {hashlib.sha256(code).hexdigest()[:16]}")
    say(f"artifact: model {len(blob)} bytes, code {len(code)} bytes, total {len(blob) + len(code)} bytes")
    if len(blob) + len(code) > 16_000_000: say("WARNING: total is over 16000000")

    net = thaw(blob, Net().to(DEV)); net.looping = True
    say(f"after packing val_loss:{plain_loss(net, sp):.4f} (blocks of {C.ctx}, no adaptation)")
    w = Watch().go(); nats, bpb, toks, bts = grade(net, sp); took = w.halt()
    say(f"graded {int(toks)} targets, {int(bts)} bytes in {took:.1f}s")
    say(f"final_docwise val_loss:{nats:.4f} val_bpb:{bpb:.4f} eval_time:{1e3 * took:.0f}ms")
    say(f"final_docwise_exact val_loss:{nats:.8f} val_bpb:{bpb:.8f}")
    if W > 1: dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]: check()
    elif sys.argv[1:2] == ["prepare"]: prepare(sys.argv[2])
    elif sys.argv[1:2] == ["inspect"]: inspect(sys.argv[2])
    elif sys.argv[1:2] == ["sample"]: sample(*sys.argv[2:4])
    else: main()
