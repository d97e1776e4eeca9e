"""SP8192 + loop(3-5) + parallel residuals + Muon + full-Hessian GPTQ int6/int8 + brotli + score-first TTT."""

import collections
import copy
import glob
import hashlib
import io
import json
import math
import os
import random
import struct
import sys
import time
import uuid
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from flash_attn_interface import flash_attn_func as fa3
except ImportError:
    fa3 = None

E = os.environ.get


def ei(k, d):
    return int(E(k, d))


def ef(k, d):
    return float(E(k, d))


def eb(k, d):
    return bool(int(E(k, d)))


# ---------------------------------------------------------------- settings


class Cfg:
    # data
    root = E("DATA_DIR", "./data")
    V = ei("VOCAB_SIZE", 8192)
    data = E("DATASET_DIR", os.path.join(root, "datasets", f"fineweb10B_sp{V}"))
    tok = E("TOKENIZER_PATH", os.path.join(root, "tokenizers", f"fineweb_{V}_bpe.model"))
    train_glob = os.path.join(data, "fineweb_train_*.bin")
    val_glob = os.path.join(data, "fineweb_val_*.bin")
    bos = ei("BOS_ID", 1)
    run = E("RUN_ID", str(uuid.uuid4())[:8])
    seed = ei("SEED", 1337)
    probe_tok = ei("PROBE_TOKENS", 1 << 20)

    # clock
    iters = ei("ITERATIONS", 20000)
    wall = ef("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve = ef("GPTQ_RESERVE_SECONDS", 16.0)
    warmup = ei("WARMUP_STEPS", 20)
    warmdown = ef("WARMDOWN_FRAC", 0.72)
    min_lr = ef("MIN_LR", 0.0)
    batch_tok = ei("TRAIN_BATCH_TOKENS", 786432)
    L = ei("TRAIN_SEQ_LEN", 2048)
    val_every = ei("VAL_LOSS_EVERY", 4000)
    log_every = ei("TRAIN_LOG_EVERY", 500)
    val_batch = ei("VAL_BATCH_TOKENS", 524288)

    # model
    layers = ei("NUM_LAYERS", 11)
    dim = ei("MODEL_DIM", 512)
    emb = ei("EMBEDDING_DIM", 512)
    heads = ei("NUM_HEADS", 8)
    kv = ei("NUM_KV_HEADS", 4)
    mlp_mult = ef("MLP_MULT", 4.0)
    cap = ef("LOGIT_SOFTCAP", 30.0)
    rope_base = ef("ROPE_BASE", 10000.0)
    rope_dims = ei("ROPE_DIMS", 16)
    qk_gain = ef("QK_GAIN_INIT", 5.0)
    xsa_last = ei("XSA_LAST_N", 11)
    skips = eb("SKIP_GATES_ENABLED", 1)
    smear = eb("SMEAR_GATE", 1)
    smear_w = ei("SMEAR_WIDTH", 12)
    loop_a = ei("LOOP_START", 3)
    loop_b = ei("LOOP_END", 5)
    loops = ei("NUM_LOOPS", 2)
    loop_on = ef("ENABLE_LOOPING_AT", 0.35)
    par_from = ei("PARALLEL_START_LAYER", 7)
    tied_std = ef("TIED_EMBED_INIT_STD", 0.005)

    # optimisers
    emb_lr = ef("TIED_EMBED_LR", 0.03)
    mat_lr = ef("MATRIX_LR", 0.022)
    scal_lr = ef("SCALAR_LR", 0.02)
    mom = ef("MUON_MOMENTUM", 0.99)
    mom0 = ef("MUON_MOMENTUM_WARMUP_START", 0.92)
    mom_steps = ei("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    ns = ei("MUON_BACKEND_STEPS", 5)
    muon_wd = ef("MUON_WD", 0.095)
    adam_wd = ef("ADAM_WD", 0.02)
    emb_wd = ef("EMBED_WD", 0.085)
    b1 = ef("BETA1", 0.9)
    b2 = ef("BETA2", 0.95)
    eps = ef("ADAM_EPS", 1e-8)
    clip = ef("GRAD_CLIP_NORM", 0.3)
    ema_fast = ef("EMA_FAST", 0.995)
    ema_slow = ef("EMA_SLOW", 0.9965)

    # quantisation
    calib_n = ei("GPTQ_CALIBRATION_BATCHES", 64)
    calib_bs = ei("GPTQ_CALIBRATION_SEQS", 8)
    damp = ef("GPTQ_DAMP", 0.01)
    blk = ei("GPTQ_BLOCK", 128)
    mat_bits = ei("MATRIX_BITS", 6)
    emb_bits = ei("EMBED_BITS", 8)
    mat_k = ef("MATRIX_CLIP_SIGMAS", 12.85)
    emb_k = ef("EMBED_CLIP_SIGMAS", 20.0)
    br_q = ei("BROTLI_QUALITY", 11)
    limit = ei("SIZE_LIMIT", 16_000_000)

    # evaluation
    stride = ei("EVAL_STRIDE", 64)
    ev_bs = ei("EVAL_WINDOWS", 32)
    slide = eb("SLIDING_WINDOW_ENABLED", 1)
    ttt = eb("TTT_ENABLED", 1)
    ttt_lr = ef("TTT_LR", 0.005)
    ttt_mom = ef("TTT_MOMENTUM", 0.9)
    ttt_ep = ei("TTT_EPOCHS", 3)
    ttt_chunk = ei("TTT_CHUNK_TOKENS", 32768)
    ttt_bs = ei("TTT_BATCH_SEQS", 32)
    ttt_clip = ef("TTT_GRAD_CLIP", 1.0)
    ttt_freeze = ei("TTT_FREEZE_BLOCKS", 0)
    ttt_wd = ef("TTT_WD", 0.0)
    eval_wall = ef("EVAL_WALLCLOCK_SECONDS", 600.0)

    # pair counts of scored text
    pair_w = ef("PAIR_WEIGHT", 0.0)
    pair_d = ef("PAIR_SMOOTH", 4.0)
    pair_half = ef("PAIR_HALF", 64.0)

    # files
    art = E("ARTIFACT", "final_model.rona.br")
    raw = E("RAW_MODEL", "")
    logs = E("LOG_DIR", "logs")


h = Cfg()

# ---------------------------------------------------------------- ranks

RANK, WORLD, LOCAL = ei("RANK", 0), ei("WORLD_SIZE", 1), ei("LOCAL_RANK", 0)
DDP = "RANK" in os.environ and "WORLD_SIZE" in os.environ
HEAD = RANK == 0
dev = torch.device("cuda", LOCAL)
_logf = None


def open_log():
    global _logf
    if HEAD:
        os.makedirs(h.logs, exist_ok=True); _logf = os.path.join(h.logs, f"{h.run}.txt")
        print(_logf)


def log(s, con=True):
    if not HEAD:
        return
    if con:
        print(s, flush=True)
    if _logf:
        with open(_logf, "a", encoding="utf-8") as f:
            print(s, file=f)


def rsum(*ts):
    """Sums the tensors over the ranks, in place."""
    if DDP and WORLD > 1:
        for t in ts:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return ts if len(ts) > 1 else ts[0]


def rmean(t):
    if DDP and WORLD > 1:
        dist.all_reduce(t, op=dist.ReduceOp.AVG)
    return t


def bar():
    if DDP and WORLD > 1:
        dist.barrier()


def now():
    torch.cuda.synchronize(); return time.perf_counter()


def seed_all(s):
    random.seed(s); np.random.seed(s); torch.manual_seed(s); torch.cuda.manual_seed_all(s)


def grad_share(ps):
    """Averages the gradients of all ranks in one flat buffer per dtype."""
    if not (DDP and WORLD > 1):
        return
    by = collections.defaultdict(list)
    for p in ps:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        by[p.grad.dtype].append(p.grad)
    for gs in by.values():
        flat = torch.cat([g.reshape(-1) for g in gs]); dist.all_reduce(flat, op=dist.ReduceOp.AVG); i = 0
        for g in gs:
            n = g.numel(); g.copy_(flat[i : i + n].view_as(g)); i += n


# ---------------------------------------------------------------- tokens and bytes


class Bytes:
    """UTF-8 bytes of a target given the token before it: own bytes, plus one for a mark that is a real space."""

    def __init__(self, path, V):
        sp = spm.SentencePieceProcessor(model_file=path); n = max(int(sp.vocab_size()), V)
        own = np.zeros(n, np.int16); lead = np.zeros(n, bool); edge = np.ones(n, bool)
        for i in range(int(sp.vocab_size())):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            edge[i] = False
            if sp.is_byte(i):
                own[i] = 1
                continue
            s = sp.id_to_piece(i)
            if s.startswith("\u2581"):
                lead[i] = True; s = s[1:]
            own[i] = len(s.encode("utf-8"))
        self.sp = sp
        self.own = torch.from_numpy(own).to(dev); self.lead = torch.from_numpy(lead).to(dev)
        self.edge = torch.from_numpy(edge).to(dev)

    def count(self, prev, tgt):
        b = self.own[tgt].to(torch.float64)
        return b + (self.lead[tgt] & ~self.edge[prev]).to(torch.float64)

    def total(self, toks, step=1 << 22):
        """Bytes of a whole stream, for the log."""
        s = 0.0
        for i in range(0, toks.numel() - 1, step):
            t = toks[i : i + step + 1].to(dev, torch.int64); s += self.count(t[:-1], t[1:]).sum().item()
        return int(s)


HDR = 256
MAGIC = 20240520


def shard_len(f):
    x = np.fromfile(f, "<i4", HDR)
    if x.size != HDR or x[0] != MAGIC or x[1] != 1:
        raise ValueError(f"{f}: not a token shard")
    return int(x[2])


def shard(f):
    n = shard_len(f); a = np.memmap(f, "<u2", "r", offset=HDR * 4, shape=(n,))
    return a


def files(pat):
    fs = sorted(glob.glob(pat))
    if not fs:
        raise FileNotFoundError(pat)
    return fs


def load_val(L):
    """The whole validation stream: every target once, nothing cut off."""
    t = torch.cat([torch.from_numpy(np.array(shard(f), dtype=np.uint16, copy=True)) for f in files(h.val_glob)])
    if t.numel() <= L:
        raise ValueError("validation stream is shorter than one window")
    return t


class Feed:
    """Training batches. Every rank owns every WORLD-th shard; sequences of a shard in random order at a random phase.

    The last `hold` tokens of the last shard are never given out: they are the probe of training text.
    """

    def __init__(self, L, hold=0, seed=0):
        fs = files(h.train_glob); self.L = L; self.hold = hold; self.last = fs[-1]
        self.fs = [f for i, f in enumerate(fs) if i % WORLD == RANK] or [fs[RANK % len(fs)]]
        self.g = np.random.Generator(np.random.PCG64([seed, RANK])); self.arr = {}; self.todo = {}
        self.size = {f: shard_len(f) - (hold if f == self.last else 0) for f in self.fs}
        for f in self.fs:
            self.refill(f)

    def refill(self, f):
        if f not in self.arr:
            self.arr[f] = shard(f)
        n = self.size[f]; ph = int(self.g.integers(0, min(self.L, max(1, n - self.L - 1))))
        k = (n - 1 - ph) // self.L
        self.todo[f] = (ph + self.L * self.g.permutation(k)).tolist()

    def seq(self):
        w = np.array([len(self.todo[f]) for f in self.fs], float)
        if w.sum() == 0:
            for f in self.fs:
                self.refill(f)
            w = np.array([len(self.todo[f]) for f in self.fs], float)
        f = self.fs[int(self.g.choice(len(self.fs), p=w / w.sum()))]; a = self.todo[f].pop()
        return self.arr[f][a : a + self.L + 1]

    def batch(self, rows):
        t = np.stack([self.seq() for _ in range(rows)]).astype(np.int64); t = torch.from_numpy(t).pin_memory()
        return t[:, :-1].to(dev, non_blocking=True), t[:, 1:].to(dev, non_blocking=True)

    def state(self):
        return copy.deepcopy((self.g.bit_generator.state, self.todo))

    def restore(self, s):
        self.g.bit_generator.state, self.todo = copy.deepcopy(s)


def probe_rows(L, n):
    """The training text that Feed holds back, as rows of L + 1 tokens; for choices made at the end of training."""
    a = shard(files(h.train_glob)[-1]); a = np.array(a[len(a) - n :], dtype=np.int64); k = (len(a) - 1) // L
    ix = np.arange(L + 1)[None] + L * np.arange(k)[:, None]
    return torch.from_numpy(a[ix])


# ---------------------------------------------------------------- model


def rn(x, eps=1e-6):
    return F.rms_norm(x, (x.size(-1),), eps=eps)


class Lin(nn.Linear):
    """Weights are kept in fp32 and used in the input's type."""

    def __init__(self, i, o, zero=False):
        super().__init__(i, o, bias=False); self.zero = zero

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rope(nn.Module):
    def __init__(self, hd, base, dims, L):
        super().__init__(); self.dims = dims or hd; self.base = base; self.L = L; self._g = None
        inv = 1.0 / (base ** (torch.arange(0, self.dims, 2, dtype=torch.float32) / self.dims))
        self.register_buffer("inv", inv, persistent=False); self._c = None

    def forward(self, n, d, ty):
        if self._c is None or self._c[0].size(1) < n or self._c[0].device != d or torch.is_grad_enabled() != self._g:
            inv = self.inv.to(d)
            if n > self.L:
                s = n / self.L; b = self.base * s ** (self.dims / max(self.dims - 2, 1))
                inv = 1.0 / (b ** (torch.arange(0, self.dims, 2, dtype=torch.float32, device=d) / self.dims))
            f = torch.outer(torch.arange(n, device=d, dtype=torch.float32), inv)
            self._c = (f.cos()[None, :, None], f.sin()[None, :, None]); self._g = torch.is_grad_enabled()
        c, s = self._c
        return c[:, :n].to(ty), s[:, :n].to(ty)


def rot(x, c, s, d):
    y, z = x[..., :d], x[..., d:]; a, b = y.chunk(2, -1)
    return torch.cat((a * c + b * s, b * c - a * s, z), -1)


def attend(q, k, v):
    """Causal grouped attention over (B, T, heads, hd)."""
    if fa3 is not None:
        return fa3(q, k, v, causal=True)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2).contiguous()


class Attn(nn.Module):
    def __init__(self, i):
        super().__init__(); D = h.dim; self.H, self.K = h.heads, h.kv; self.hd = D // self.H
        self.q = Lin(D, D); self.k = Lin(D, self.K * self.hd); self.v = Lin(D, self.K * self.hd)
        self.o = Lin(D, D, zero=True); self.gain = nn.Parameter(torch.full((self.H,), h.qk_gain))
        self.rope = Rope(self.hd, h.rope_base, h.rope_dims, h.L); self.xsa = i >= h.layers - h.xsa_last

    def minus_self(self, y, v):
        """Takes out of every head's output its part along the position's own value."""
        B, T, H, d = y.shape; g = H // self.K; y = y.reshape(B, T, self.K, g, d)
        u = F.normalize(v, dim=-1).unsqueeze(-2)
        return (y - (y * u).sum(-1, keepdim=True) * u).reshape(B, T, H, d)

    def forward(self, x):
        B, T, D = x.shape
        q = self.q(x).view(B, T, self.H, self.hd); k = self.k(x).view(B, T, self.K, self.hd)
        v = self.v(x).view(B, T, self.K, self.hd); q, k = rn(q), rn(k)
        c, s = self.rope(T, x.device, q.dtype); q, k = rot(q, c, s, self.rope.dims), rot(k, c, s, self.rope.dims)
        q = q * self.gain.to(q.dtype)[None, None, :, None]; y = attend(q, k, v)
        if self.xsa:
            y = self.minus_self(y, v)
        return self.o(y.reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__(); n = int(h.mlp_mult * h.dim)
        self.up = Lin(h.dim, n); self.down = Lin(n, h.dim, zero=True)

    def forward(self, x):
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    """Serial below `par_from`; from there on attention and MLP read the same input and are added together."""

    def __init__(self, i):
        super().__init__(); self.i = i; self.attn = Attn(i); self.mlp = Mlp(); D = h.dim
        self.a_s = nn.Parameter(torch.ones(D)); self.m_s = nn.Parameter(torch.ones(D))
        self.mix = nn.Parameter(torch.stack((torch.ones(D), torch.zeros(D)))); self.par = i >= h.par_from
        self.ln = 1.0 / math.sqrt(i + 1)

    def forward(self, x, x0):
        m = self.mix.to(x.dtype); x = m[0] * x + m[1] * x0; a_s, m_s = self.a_s.to(x.dtype), self.m_s.to(x.dtype)
        z = rn(x) * self.ln; a = a_s * self.attn(z)
        if self.par:
            return x + a + m_s * self.mlp(z)
        x = x + a
        return x + m_s * self.mlp(rn(x) * self.ln)


class Smear(nn.Module):
    """Adds a gated part of the previous token's embedding; never across a document's start."""

    def __init__(self):
        super().__init__(); self.w = nn.Parameter(torch.zeros(h.smear_w)); self.lam = nn.Parameter(torch.zeros(()))

    def forward(self, e, ids):
        g = torch.sigmoid((e[:, 1:, : h.smear_w] * self.w.to(e.dtype)).sum(-1, keepdim=True))
        keep = (ids[:, 1:] != h.bos).unsqueeze(-1).to(e.dtype)
        add = self.lam.to(e.dtype) * g * keep * e[:, :-1]
        return torch.cat((e[:, :1], e[:, 1:] + add), 1)


class Gpt(nn.Module):
    def __init__(self):
        super().__init__(); self.wte = nn.Embedding(h.V, h.emb); self.blocks = nn.ModuleList(map(Block, range(h.layers)))
        self.pin = Lin(h.emb, h.dim) if h.emb != h.dim else None
        self.pout = Lin(h.dim, h.emb) if h.emb != h.dim else None
        self.smear = Smear() if h.smear else None
        seg = list(range(h.loop_a, h.loop_b + 1))
        self.flat = list(range(h.layers))
        self.deep = self.flat[: h.loop_a] + seg * (h.loops + 1) + self.flat[h.loop_b + 1 :]
        self.loop = False; n = len(self.deep) // 2
        self.sw = nn.Parameter(torch.ones(n, h.dim)); self.sg = nn.Parameter(torch.zeros(n, h.dim)) if h.skips else None
        self.reset()

    def reset(self):
        nn.init.normal_(self.wte.weight, 0.0, h.tied_std)
        for m in self.modules():
            if isinstance(m, Lin):
                if m.zero:
                    nn.init.zeros_(m.weight)
                elif min(m.weight.shape) >= 64:
                    nn.init.orthogonal_(m.weight, 1.0)

    def trunk(self, ids):
        """Last hidden states (B, T, dim), normalised."""
        x = self.wte(ids).to(torch.bfloat16)
        if self.smear is not None:
            x = self.smear(x, ids)
        x = rn(x)
        if self.pin is not None:
            x = self.pin(x)
        x0 = x; order = self.deep if self.loop else self.flat; n = len(order) // 2; st = []
        for i in order[:n]:
            x = self.blocks[i](x, x0); st.append(x)
        for j, i in enumerate(order[n:]):
            if j < n and st:
                s = self.sw[j].to(x.dtype) * st.pop()
                x = torch.lerp(s, x, torch.sigmoid(self.sg[j].to(x.dtype))) if self.sg is not None else x + s
            x = self.blocks[i](x, x0)
        return rn(x)

    def head(self, x):
        """Soft-capped logits of hidden states."""
        if self.pout is not None:
            x = self.pout(x)
        return h.cap * torch.tanh(F.linear(x, self.wte.weight.to(x.dtype)) / h.cap)

    def logits(self, ids):
        return self.head(self.trunk(ids))

    def forward(self, ids, tgt):
        z = self.logits(ids); return F.cross_entropy(z.reshape(-1, z.size(-1)).float(), tgt.reshape(-1))


CTRL = ("a_s", "m_s", "mix", "gain", "sw", "sg", "smear", "lam")


def is_mat(k, p):
    return k.startswith("blocks.") and p.ndim == 2 and not any(c in k.split(".") for c in CTRL)


# ---------------------------------------------------------------- optimisers

NS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))


@torch.compile
def orth(G, steps):
    """Nearest semi-orthogonal matrix, by a quintic iteration whose coefficients change from step to step."""
    X = G.bfloat16(); t = X.size(-2) > X.size(-1)
    if t:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in NS[:steps]:
        A = X @ X.mT; B = b * A + c * (A @ A); X = a * X + B @ X
    return X.mT if t else X


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov, orthogonalised; every rank works out its share of the matrices and the rest is gathered."""

    def __init__(self, ps, lr, mom, ns, wd):
        super().__init__(ps, dict(lr=lr, mom=mom, ns=ns, wd=wd))

    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            ps = [p for p in g["params"] if p.grad is not None]
            if not ps:
                continue
            n = sum(p.numel() for p in ps); flat = torch.zeros(n, device=dev, dtype=torch.bfloat16); o = 0
            for i, p in enumerate(ps):
                if i % WORLD == RANK:
                    s = self.state[p]
                    if "m" not in s:
                        s["m"] = torch.zeros_like(p)
                    s["m"].mul_(g["mom"]).add_(p.grad)
                    u = orth(p.grad.add(s["m"], alpha=g["mom"]), g["ns"])
                    u = u * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[o : o + p.numel()] = u.reshape(-1)
                o += p.numel()
            rsum(flat); o = 0
            for p in ps:
                u = flat[o : o + p.numel()].view_as(p); o += p.numel()
                p.mul_(1.0 - g["lr"] * g["wd"]).add_(u.to(p.dtype), alpha=-g["lr"])


class Opts:
    """Muon for the blocks' matrices, AdamW for the embedding, AdamW for vectors and gates."""

    def __init__(self, m):
        mats, vecs = [], []
        for k, p in m.named_parameters():
            if k == "wte.weight":
                continue
            (mats if is_mat(k, p) or k in ("pin.weight", "pout.weight") else vecs).append(p)
        self.ps = [m.wte.weight, *mats, *vecs]
        self.mu = Muon(mats, h.mat_lr, h.mom, h.ns, h.muon_wd)
        self.em = torch.optim.AdamW([m.wte.weight], lr=h.emb_lr, betas=(h.b1, h.b2), eps=h.eps, weight_decay=h.emb_wd, fused=True)
        self.sc = torch.optim.AdamW(vecs, lr=h.scal_lr, betas=(h.b1, h.b2), eps=h.eps, weight_decay=h.adam_wd, fused=True)
        self.all = (self.mu, self.em, self.sc)
        for o in self.all:
            for g in o.param_groups:
                g["lr0"] = g["lr"]

    def set(self, scale, step):
        f = min(step / h.mom_steps, 1.0) if h.mom_steps > 0 else 1.0; mom = (1 - f) * h.mom0 + f * h.mom
        for g in self.mu.param_groups:
            g["mom"] = mom
        for o in self.all:
            for g in o.param_groups:
                g["lr"] = g["lr0"] * scale

    def step(self):
        grad_share(self.ps)
        if h.clip > 0:
            nn.utils.clip_grad_norm_(self.ps, h.clip)
        for o in self.all:
            o.step()
        self.zero()

    def zero(self):
        for o in self.all:
            o.zero_grad(set_to_none=True)

    def state(self):
        return [copy.deepcopy(o.state_dict()) for o in self.all]

    def restore(self, s):
        for o, x in zip(self.all, s, strict=True):
            o.load_state_dict(x)


class Ema:
    """Running average of the weights in fp32."""

    def __init__(self, m, d):
        self.d = d; self.w = {k: v.detach().float().clone() for k, v in m.state_dict().items()}

    @torch.no_grad()
    def add(self, m):
        ks = list(self.w); sd = m.state_dict()
        torch._foreach_lerp_([self.w[k] for k in ks], [sd[k].float() for k in ks], 1.0 - self.d)

    def put(self, m):
        m.load_state_dict({k: v.to(m.state_dict()[k].dtype) for k, v in self.w.items()})


# ---------------------------------------------------------------- quantisation


class Hess:
    """X'X of the input of every matrix that GPTQ will round, and of the tied head."""

    def __init__(self, m):
        self.m = m; self.H = {}; self.n = collections.Counter(); self.hk = []

    def _tap(self, k):
        def f(mod, inp, out=None):
            x = inp[0].detach().reshape(-1, inp[0].size(-1)).float()
            if k not in self.H:
                self.H[k] = torch.zeros(x.size(1), x.size(1), device=dev)
            self.H[k].addmm_(x.T, x); self.n[k] += x.size(0)

        return f

    def __enter__(self):
        for k, mod in self.m.named_modules():
            if isinstance(mod, Lin) and k.startswith("blocks."):
                self.hk.append(mod.register_forward_hook(self._tap(k + ".weight")))
        tap = self._tap("wte.weight"); self.hk.append(self.m.blocks[-1].register_forward_hook(lambda mod, inp, out: tap(mod, (rn(out),))))
        return self

    def __exit__(self, *a):
        for x in self.hk:
            x.remove()

    def done(self):
        for k in sorted(self.H):
            c = torch.tensor(float(self.n[k]), device=dev); rsum(self.H[k], c); self.H[k] /= c
        return {k: v.cpu() for k, v in self.H.items()}


@torch.inference_mode()
def collect(m, feed):
    """Hessians over training batches; each rank reads its own and they are summed."""
    m.eval()
    with Hess(m) as hs:
        for _ in range(max(1, h.calib_n // WORLD)):
            x, _y = feed.batch(h.calib_bs); m.trunk(x)
    return hs.done()


def gptq(W, H, bits, k):
    """Columns in order of falling diagonal, rounding errors pushed on; rows clipped at k standard deviations."""
    W = W.float().to(dev).clone(); H = H.float().to(dev).clone(); r, n = W.shape; q = 2 ** (bits - 1) - 1
    dead = H.diagonal() == 0; H.diagonal()[dead] = 1.0; W[:, dead] = 0.0
    H.diagonal().add_(h.damp * H.diagonal().mean()); p = H.diagonal().argsort(descending=True); ip = p.argsort()
    s = (k * W.std(1) / q).clamp_min(1e-10).half(); sf = s.float()[:, None]
    W = W[:, p]; H = H[p][:, p]
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.zeros_like(W)
    for a in range(0, n, h.blk):
        b = min(a + h.blk, n); B = W[:, a:b].clone(); Er = torch.zeros_like(B); u = U[a:b, a:b]
        for i in range(b - a):
            w = B[:, i : i + 1]; z = (w / sf).round().clamp(-q, q); Q[:, a + i : a + i + 1] = z
            e = (w - z * sf) / u[i, i]; B[:, i:] -= e * u[i : i + 1, i:]; Er[:, i : i + 1] = e
        if b < n:
            W[:, b:] -= Er @ U[a:b, b:]
    return Q[:, ip].to(torch.int8).cpu(), s.cpu()


def rtn(W, bits, k):
    W = W.float(); q = 2 ** (bits - 1) - 1; s = (k * W.std(1) / q).clamp_min(1e-10).half()
    return (W / s.float()[:, None]).round().clamp(-q, q).to(torch.int8), s


# ---------------------------------------------------------------- the artifact
#
# "RONA" | u32 length of the table | table (json) | bodies. Bodies of one kind lie together: int8 matrices, half scales,
# half vectors. Each kind is shuffled by byte position and compressed on its own, best first.

TAG = b"RONA"
KINDS = (("q", np.int8), ("s", np.float16), ("v", np.float16))


def shuf(b, n):
    """All first bytes of the n-byte items, then all second ones, and so on."""
    if n <= 1:
        return bytes(b)
    a = np.frombuffer(b, np.uint8); t = len(a) // n * n
    return a[:t].reshape(-1, n).T.tobytes() + a[t:].tobytes()


def unshuf(b, n):
    if n <= 1:
        return bytes(b)
    a = np.frombuffer(b, np.uint8); t = len(a) // n * n
    return a[:t].reshape(n, -1).T.tobytes() + a[t:].tobytes()


def order_q(a):
    """Matrices are stored column by column where that is the shorter way round."""
    return a if a.shape[0] <= a.shape[1] else np.ascontiguousarray(a.T)


def bpack(items):
    """items: name -> dict of kind -> array. Returns the artifact's bytes."""
    tab = []; body = {k: io.BytesIO() for k, _ in KINDS}
    for name in sorted(items):
        row = {"n": name, "p": []}
        for k, ty in KINDS:
            if k in items[name]:
                a = np.ascontiguousarray(items[name][k], dtype=ty)
                if k == "q":
                    row["sh"] = list(a.shape); a = order_q(a)
                else:
                    row.setdefault("sh", list(a.shape))
                row["p"].append([k, list(a.shape)]); body[k].write(a.tobytes())
        tab.append(row)
    out = []; head = {"t": tab, "b": []}
    for k, ty in KINDS:
        raw = body[k].getvalue(); n = np.dtype(ty).itemsize; c = brotli.compress(shuf(raw, n), quality=h.br_q, lgwin=24)
        head["b"].append([k, len(c), len(raw)]); out.append(c)
    j = brotli.compress(json.dumps(head, separators=(",", ":")).encode(), quality=h.br_q)
    return TAG + struct.pack("<I", len(j)) + j + b"".join(out)


def bopen(b):
    if b[:4] != TAG:
        raise ValueError("not an artifact of this script")
    n = struct.unpack("<I", b[4:8])[0]; head = json.loads(brotli.decompress(b[8 : 8 + n])); o = 8 + n; body = {}
    for k, c, r in head["b"]:
        raw = unshuf(brotli.decompress(b[o : o + c]), np.dtype(dict(KINDS)[k]).itemsize); o += c
        if len(raw) != r:
            raise ValueError(f"{k}: {len(raw)} bytes, {r} expected")
        body[k] = [raw, 0]
    out = {}
    for row in head["t"]:
        it = {}
        for k, sh in row["p"]:
            ty = np.dtype(dict(KINDS)[k]); raw, at = body[k]; m = int(np.prod(sh)) if sh else 1
            a = np.frombuffer(raw, ty, m, at).reshape(sh); body[k][1] = at + m * ty.itemsize
            if k == "q" and list(a.shape) != row["sh"]:
                a = a.T
            it[k] = a.copy()
        out[row["n"]] = it
    return out


def squeeze(m, Hs):
    """Rounds every matrix of the model; what is left goes as half floats. Ranks share the matrices."""
    sd = {k: v.detach().cpu() for k, v in m.state_dict().items()}; big = [k for k, v in sd.items() if v.ndim == 2 and v.numel() > 16384]
    mine = {}; err = {}
    for i, k in enumerate(sorted(big, key=lambda k: (-sd[k].numel(), k))):
        if i % WORLD != RANK:
            continue
        bits, ks = (h.emb_bits, h.emb_k) if k == "wte.weight" else (h.mat_bits, h.mat_k)
        Q, s = gptq(sd[k], Hs[k], bits, ks) if k in Hs else rtn(sd[k], bits, ks)
        mine[k] = {"q": Q.numpy(), "s": s.numpy()}; d = sd[k].float() - Q.float() * s.float()[:, None]
        err[k] = (d.norm() / sd[k].float().norm()).item()
    if DDP and WORLD > 1:
        parts = [None] * WORLD; dist.all_gather_object(parts, (mine, err)); mine, err = {}, {}
        for a, e in parts:
            mine.update(a); err.update(e)
    for k, v in sd.items():
        if k not in mine:
            mine[k] = {"v": v.float().numpy()}
    return mine, err


def revive(m, items):
    """Puts the artifact's weights into a model."""
    sd = m.state_dict(); new = {}
    for k, it in items.items():
        w = it["q"].astype(np.float32) * it["s"].astype(np.float32)[:, None] if "q" in it else it["v"].astype(np.float32)
        new[k] = torch.from_numpy(w).view(sd[k].shape).to(sd[k].dtype)
    m.load_state_dict(new, strict=True); m.loop = h.loops > 0
    return m


def sizes(blob):
    """Bytes of the code (this one file) and of the artifact."""
    code = len(Path(__file__).read_bytes()); model = len(blob); tot = code + model
    log(f"code bytes:{code} model bytes:{model} total:{tot} limit:{h.limit}")
    if tot > h.limit:
        raise SystemExit(f"too large: {tot} > {h.limit}")
    return tot


# ---------------------------------------------------------------- scoring


class Tally:
    """Nats, tokens and bytes of what was scored; fp64 on the device, summed over the ranks when read."""

    def __init__(self, by):
        self.by = by; self.nll = torch.zeros((), device=dev, dtype=torch.float64)
        self.tok = torch.zeros((), device=dev, dtype=torch.float64); self.byt = torch.zeros((), device=dev, dtype=torch.float64)

    def add(self, nll, prev, tgt):
        self.nll += nll.to(torch.float64).sum(); self.tok += float(tgt.numel())
        self.byt += self.by.count(prev, tgt).sum()

    def read(self):
        a, b, c = (t.clone() for t in (self.nll, self.tok, self.byt)); rsum(a, b, c)
        a, b, c = a.item(), b.item(), c.item()
        return a / b, a / math.log(2.0) / c, int(b), int(c)


def ce(z, y):
    """Nats of every target: (B, T, V) logits, (B, T) targets."""
    return F.cross_entropy(z.reshape(-1, z.size(-1)).float(), y.reshape(-1), reduction="none").view(y.shape)


def spans(T, L, stride):
    """(window's start, first scored position, end), such that the scored parts are 0..T-1 without gap or overlap.

    Position i predicts token i + 1. The first window scores all it holds, the others their last `stride` positions.
    """
    out = [(0, 0, min(L, T))]; e = out[0][2]
    while e < T:
        a, e = e, min(e + stride, T); out.append((e - L, a, e))
    return out


def score(f, val, ws, tl, mix=None):
    """Scores the spans `ws` with the logits of `f`; all windows of a batch have the same length."""
    for i in range(0, len(ws), h.ev_bs):
        part = ws[i : i + h.ev_bs]; n = part[0][2] - part[0][0]
        t = torch.stack([val[s : s + n + 1] for s, _, _ in part]).to(dev, torch.int64, non_blocking=True)
        x, y = t[:, :-1], t[:, 1:]
        nll = ce(f(x), y) if mix is None else mix.nll(f(x), x, y)
        for r, (s, a, e) in enumerate(part):
            tl.add(nll[r, a - s : e - s], x[r, a - s : e - s], y[r, a - s : e - s])


@torch.inference_mode()
def ev_plain(f, val, by):
    """Blocks of L tokens side by side, shared out over the ranks."""
    T = val.numel() - 1; tl = Tally(by); bl = [(a, a, min(a + h.L, T)) for a in range(0, T, h.L)]; lo, hi = share(len(bl))
    mine = bl[lo:hi]; short = [w for w in mine if w[2] - w[0] < h.L]; k = max(1, h.val_batch // (h.L * WORLD))
    for i in range(0, len(mine) - len(short), k):
        part = mine[i : min(i + k, len(mine) - len(short))]
        t = val[part[0][0] : part[-1][2] + 1].to(dev, torch.int64); x, y = t[:-1].view(-1, h.L), t[1:].view(-1, h.L)
        tl.add(ce(f(x), y), x, y)
    for s, _, e in short:
        t = val[s : e + 1].to(dev, torch.int64)[None]; tl.add(ce(f(t[:, :-1]), t[:, 1:]), t[:, :-1], t[:, 1:])
    return tl.read()


def share(n):
    """This rank's part of n things in a row."""
    return n * RANK // WORLD, n * (RANK + 1) // WORLD


@torch.inference_mode()
def ev_slide(f, val, by):
    """Sliding windows, the weights fixed."""
    T = val.numel() - 1; ws = spans(T, h.L, h.stride); lo, hi = share(len(ws)); tl = Tally(by); t0 = time.perf_counter()
    mine = ws[lo:hi]
    for i in range(0, len(mine), h.ev_bs * 256):
        score(f, val, mine[i : i + h.ev_bs * 256], tl)
        if RANK == 0 and i // (h.ev_bs * 256) % 8 == 0:
            log(f"slide {i}/{len(mine)} {time.perf_counter() - t0:.0f}s", con=False)
    return tl.read()


# ---------------------------------------------------------------- pair counts (off unless PAIR_WEIGHT > 0)


class Pairs:
    """Counts of (token, next token) in the text scored so far, mixed in as a distribution over the whole vocabulary."""

    def __init__(self):
        self.t = torch.zeros(h.V, h.V, device=dev); self.seen = 0

    def add(self, ids):
        """ids: scored tokens in order, the first one only as context. The same on all ranks."""
        a, b = ids[:-1], ids[1:]; self.t.index_put_((a, b), torch.ones_like(a, dtype=torch.float32), accumulate=True)
        self.seen += b.numel()

    def row(self, x):
        """q(. | x), smoothed towards even, and how often x was seen; q sums to one over the vocabulary."""
        c = self.t[x]; n = c.sum(-1, keepdim=True)
        return (c + h.pair_d / h.V) / (n + h.pair_d), n

    def weight(self, n):
        return h.pair_w * n / (n + h.pair_half)

    def nll(self, z, x, y):
        q, n = self.row(x); w = self.weight(n); p = torch.log_softmax(z.float(), -1).exp_()
        p.mul_(1.0 - w).add_(q * w)
        return -p.gather(-1, y.unsqueeze(-1)).squeeze(-1).clamp_min(1e-30).log()


# ---------------------------------------------------------------- test-time training


def ttt_params(m):
    """All weights but those of the frozen first blocks."""
    cut = set(range(h.ttt_freeze)); ps = []
    for k, p in m.named_parameters():
        on = not (k.startswith("blocks.") and int(k.split(".")[1]) in cut)
        p.requires_grad_(on)
        if on:
            ps.append(p)
    return ps


def by_chunk(ws, C):
    """Spans of every chunk: a span belongs to the chunk in which its first scored position lies."""
    out = collections.OrderedDict()
    for w in ws:
        out.setdefault(w[1] // C, []).append(w)
    return out


def fit(m, opt, ps, x, y):
    """One step on a batch of rows that all ranks share: every rank has its rows, the gradients are averaged."""
    n = x.size(0); lo, hi = share(n)
    opt.zero_grad(set_to_none=True)
    if hi > lo:
        loss = m(x[lo:hi], y[lo:hi]) * ((hi - lo) * WORLD / n); loss.backward()
    grad_share(ps); nn.utils.clip_grad_norm_(ps, h.ttt_clip); opt.step()


def adapt(m, opt, ps, val, a, b, lr):
    """Trains on the positions a..b-1, all of which have been scored, `ttt_ep` times over."""
    k = (b - a) // h.L
    if k == 0:
        return
    for g in opt.param_groups:
        g["lr"] = lr
    t = val[a : a + k * h.L + 1].to(dev, torch.int64); x, y = t[:-1].view(k, h.L), t[1:].view(k, h.L)
    m.train()
    for _ in range(h.ttt_ep):
        for i in range(0, k, h.ttt_bs):
            fit(m, opt, ps, x[i : i + h.ttt_bs], y[i : i + h.ttt_bs])
    m.eval()


def ev_ttt(m, val, by):
    """Chunk by chunk: all ranks score the chunk's windows with the weights as they are, then all train on the chunk.

    A chunk's loss is final before the first step on it; the last chunk is scored and not trained on.
    """
    T = val.numel() - 1; C = h.ttt_chunk; ck = by_chunk(spans(T, h.L, h.stride), C); N = len(ck)
    ps = ttt_params(m); opt = torch.optim.SGD(ps, lr=h.ttt_lr, momentum=h.ttt_mom, weight_decay=h.ttt_wd); tl = Tally(by)
    t0 = time.perf_counter(); f = m.logits; mix = Pairs() if h.pair_w > 0 else None
    log(f"ttt chunks:{N} of {C} params:{sum(p.numel() for p in ps)} lr:{h.ttt_lr} epochs:{h.ttt_ep}")
    for j, (c, ws) in enumerate(ck.items()):
        lo, hi = share(len(ws)); m.eval()
        with torch.inference_mode():
            score(f, val, ws[lo:hi], tl, mix)
        if mix is not None:
            mix.add(val[ws[0][1] : ws[-1][2] + 1].to(dev, torch.int64))
        if j < N - 1:
            lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * j / max(N - 1, 1)))
            adapt(m, opt, ps, val, c * C, (c + 1) * C, lr)
        if HEAD and (j % 100 == 0 or j == N - 1):
            s = tl.nll.item() / math.log(2.0) / max(tl.byt.item(), 1.0)
            log(f"ttt {j + 1}/{N} bpb(rank 0):{s:.5f} {time.perf_counter() - t0:.0f}s")
    for p in m.parameters():
        p.requires_grad_(True)
    return tl.read()


# ---------------------------------------------------------------- training


def scale_of(frac):
    if h.warmdown <= 0 or frac <= 1.0 - h.warmdown:
        return 1.0
    return max((1.0 - frac) / h.warmdown, h.min_lr)


class Clock:
    """Seconds of training: started before the first step, paused only while validation loss is worked out for the log."""

    def __init__(self):
        self.done = 0.0; self.t = None

    def start(self):
        self.t = now()

    def stop(self):
        self.done += now() - self.t; self.t = None

    def __call__(self):
        return self.done + (time.perf_counter() - self.t if self.t is not None else 0.0)


def over(sec, cap):
    """True on every rank as soon as one has passed the cap."""
    t = torch.tensor(float(sec >= cap), device=dev)
    if DDP and WORLD > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item() > 0


def grad_step(cm, feed, rows, accum):
    tot = 0.0
    for _ in range(accum):
        x, y = feed.batch(rows); loss = cm(x, y); (loss / accum).backward(); tot = tot + loss.detach() / accum
    return tot


def warm(m, cm, opts, feed, rows, accum):
    """Compiles both depths on training batches; weights, optimisers and the feed are put back afterwards."""
    if h.warmup <= 0:
        return
    w = {k: v.detach().clone() for k, v in m.state_dict().items()}; o = opts.state(); s = feed.state()
    for deep in (False, True) if h.loops > 0 else (False,):
        m.loop = deep
        for _ in range(h.warmup):
            grad_step(cm, feed, rows, accum); opts.set(0.1, 0); opts.step()
    m.loop = False; m.load_state_dict(w); opts.restore(o); feed.restore(s)
    opts.zero()
    log(f"warm-up: {h.warmup} steps per depth, state put back")


@torch.inference_mode()
def probe_loss(m, rows):
    """Mean loss on held-out training text; the ranks share the rows."""
    lo, hi = share(len(rows)); a = torch.zeros(2, device=dev, dtype=torch.float64); m.eval()
    for i in range(lo, hi, 16):
        t = rows[i : min(i + 16, hi)].to(dev); nll = ce(m.logits(t[:, :-1]), t[:, 1:]); a[0] += nll.double().sum(); a[1] += nll.numel()
    rsum(a); return (a[0] / a[1]).item()


def pick(m, emas):
    """Of the averages, the one with the least loss on the probe of training text; it is left in the model."""
    rows = probe_rows(h.L, h.probe_tok); got = []
    for e in emas:
        e.put(m); got.append(probe_loss(m, rows))
    i = min(range(len(got)), key=got.__getitem__); emas[i].put(m)
    log("averages: " + " ".join(f"{e.d}:{g:.5f}" for e, g in zip(emas, got, strict=True)) + f" taken:{emas[i].d}")
    return emas[i].d


def train(m, val, by):
    """Trains until the cap less the reserve; averages, calibrates and rounds inside the reserve. Returns the artifact."""
    feed = Feed(h.L, h.probe_tok, h.seed); opts = Opts(m); cm = torch.compile(m, dynamic=False, fullgraph=True)
    accum = max(1, 8 // WORLD); rows = h.batch_tok // (h.L * WORLD * accum)
    log(f"rows:{rows} accum:{accum} tokens/step:{rows * accum * WORLD * h.L} shards(rank 0):{len(feed.fs)}")
    m.train(); warm(m, cm, opts, feed, rows, accum)
    emas = [Ema(m, h.ema_fast), Ema(m, h.ema_slow)]; ck = Clock(); cap = h.wall - h.reserve; step = 0; last = False
    bar(); ck.start()
    while True:
        last = last or step >= h.iters
        if h.val_every > 0 and step > 0 and step % h.val_every == 0 and not last:
            ck.stop(); m.eval(); vl, vb, _, _ = ev_plain(m.logits, val, by); m.train()
            log(f"step:{step}/{h.iters} val_loss:{vl:.4f} val_bpb:{vb:.4f} train_time:{ck():.1f}s"); bar(); ck.start()
        if last:
            break
        sec = ck(); frac = max(sec / cap, step / h.iters)
        if h.loops > 0 and not m.loop and over(frac, h.loop_on):
            m.loop = True; log(f"loop on: step:{step} order:{m.deep}")
        opts.set(scale_of(frac), step); loss = grad_step(cm, feed, rows, accum); opts.step(); step += 1
        for e in emas:
            e.add(m)
        if step <= 5 or step % h.log_every == 0:
            log(f"step:{step}/{h.iters} train_loss:{rmean(loss).item():.4f} train_time:{ck():.1f}s step_avg:{1e3 * ck() / step:.1f}ms")
        last = over(ck(), cap)
    log(f"stop: step:{step} train_time:{ck():.1f}s peak:{torch.cuda.max_memory_allocated() >> 20}MiB")
    m.loop = h.loops > 0
    pick(m, emas)
    if h.raw and HEAD:
        torch.save(m.state_dict(), h.raw)
    t0 = ck(); Hs = collect(m, feed); log(f"calibration: {len(Hs)} matrices {ck() - t0:.1f}s")
    items, err = squeeze(m, Hs); bar(); ck.stop()
    log(f"training and calibration: {ck():.1f}s of {h.wall:.0f}s")
    worst = sorted(err, key=err.get)[-3:]
    log(f"rounding: mean {sum(err.values()) / max(len(err), 1):.5f} worst " + " ".join(f"{k}:{err[k]:.5f}" for k in worst))
    blob = bpack(items) if HEAD else b""
    return blob


# ---------------------------------------------------------------- checks and the run


def checks():
    """Cheap checks of what a wrong figure would come from."""
    for T, L, s in ((1000, 64, 8), (64, 64, 8), (77, 64, 64), (4099, 256, 32)):
        ws = spans(T, L, s); seen = np.zeros(T, int)
        for a, b, e in ws:
            seen[b:e] += 1
            if not (0 <= a <= b < e <= T) or e - a != min(L, T):
                raise AssertionError(("span", a, b, e, T))
        if not (seen == 1).all():
            raise AssertionError(("spans", T, L, s))
        for c, part in by_chunk(ws, 2 * L).items():
            if any(b // (2 * L) != c for _, b, _ in part):
                raise AssertionError(("chunk", c))
    g = np.random.Generator(np.random.PCG64(0)); b = g.integers(0, 256, 1003, np.uint8).tobytes()
    if any(unshuf(shuf(b, n), n) != b for n in (1, 2, 4)):
        raise AssertionError("shuffle")
    it = {"a": {"q": g.integers(-31, 32, (12, 5)).astype(np.int8), "s": np.ones(12, np.float16)}, "b": {"v": np.zeros(7, np.float16)}}
    back = bopen(bpack(it))
    if not ((back["a"]["q"] == it["a"]["q"]).all() and back["b"]["v"].shape == (7,)):
        raise AssertionError("pack")


def about(val, by):
    """What the stream is, for the log: documents, tokens, bytes."""
    n = val.numel(); starts = (val.to(torch.int32) == h.bos).nonzero().flatten(); d = starts.numel()
    lens = torch.diff(torch.cat((starts, torch.tensor([n])))).float() if d else torch.tensor([float(n)])
    b = by.total(val)
    log(f"val tokens:{n} documents:{d} mean length:{lens.mean():.0f} longest:{lens.max():.0f} bytes:{b} per token:{b / (n - 1):.4f}")


def weights(m):
    """Parameters by part, for the log."""
    n = collections.Counter()
    for k, p in m.named_parameters():
        n[k.split(".")[2] if k.startswith("blocks.") else k.split(".")[0]] += p.numel()
    log("params: " + " ".join(f"{k}:{v}" for k, v in n.most_common()) + f" all:{sum(n.values())}")


def setup():
    global dev
    if not torch.cuda.is_available():
        raise SystemExit("needs CUDA")
    torch.cuda.set_device(dev)
    if DDP:
        dist.init_process_group("nccl", device_id=dev)
    if 8 % WORLD:
        raise SystemExit("WORLD_SIZE must divide 8")
    torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high"); torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.optimize_ddp = False
    open_log(); log(Path(__file__).read_text(encoding="utf-8"), con=False)
    log(f"python {sys.version.split()[0]} torch {torch.__version__} ranks:{WORLD} fa3:{fa3 is not None}")
    for k in sorted(k for k in vars(Cfg) if not k.startswith("_")):
        log(f"  {k}: {getattr(h, k)}", con=False)


def sha(b):
    return hashlib.sha256(b).hexdigest()[:16]


def report(name, r, sec):
    log(f"{name} val_loss:{r[0]:.8f} val_bpb:{r[1]:.8f} tokens:{r[2]} bytes:{r[3]} eval_time:{sec:.1f}s")


def put_artifact(blob):
    """Rank 0 writes; every rank reads the file back, so that what is scored is what is counted."""
    if HEAD:
        Path(h.art).write_bytes(blob); sizes(blob)
    bar(); b = Path(h.art).read_bytes()
    log(f"sha256 code:{sha(Path(__file__).read_bytes())} artifact:{sha(b)}")
    return b


def evaluate(val, by):
    """Everything from the artifact on: round trip, sliding windows, then the record's number by score-first TTT."""
    t_all = now()
    m = revive(Gpt().to(dev), bopen(Path(h.art).read_bytes())); m.eval(); f = torch.compile(m.logits, dynamic=False)
    t = now(); r = ev_plain(m.logits, val, by); report("roundtrip", r, now() - t); res = r
    if h.slide:
        t = now(); r = ev_slide(f, val, by); report("sliding", r, now() - t); res = r
    if h.ttt:
        t = now(); r = ev_ttt(m, val, by); report("ttt", r, now() - t); res = r
    sec = now() - t_all
    if res[2] != val.numel() - 1:
        raise SystemExit(f"{res[2]} tokens scored, {val.numel() - 1} expected")
    log(f"evaluation: {sec:.1f}s of {h.eval_wall:.0f}s" + ("" if sec <= h.eval_wall else " OVER"))
    return res


def main():
    setup(); checks(); seed_all(h.seed)
    by = Bytes(h.tok, h.V); val = load_val(h.L)
    about(val, by); log(f"train shards:{len(files(h.train_glob))}")
    m = Gpt().to(dev)
    if DDP and WORLD > 1:
        for p in m.state_dict().values():
            dist.broadcast(p, 0)
    weights(m); log(f"loop order:{m.deep}")
    blob = train(m, val, by)
    put_artifact(blob)
    del m; torch.cuda.empty_cache(); torch._dynamo.reset()
    res = evaluate(val, by)
    log(f"final val_loss:{res[0]:.8f} val_bpb:{res[1]:.8f}")
    if DDP:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
