"""SP8192 · 11L x 512 · loop 3-5 · parallel residuals · int6 GPTQ + brotli · per-document LoRA TTT · causal hint tilt.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Stages and clocks
  A  train      <= MAX_WALLCLOCK_S, which includes Hessians and GPTQ (packing, after it, reads no data)
  B  read back  everything below starts from the bytes of final_model.seil
  C  evaluate   <= EVAL_CAP_S; documents are independent of each other, each starts with a zero LoRA
"""

import collections
import contextlib
import copy
import glob
import io
import json
import lzma
import math
import os
import random
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import brotli
except ImportError:
    brotli = None

torch._dynamo.config.cache_size_limit = 64


# ---- config


def E(k, d):
    v = os.environ.get(k)
    if v is None:
        return d
    if isinstance(d, bool):
        return bool(int(v))
    return type(d)(v)


@dataclass
class H:
    # run
    run_id: str = E("RUN_ID", "")
    seed: int = E("SEED", 1337)
    out: str = E("OUT_DIR", ".")
    # data
    data: str = E("DATA_PATH", "./data/datasets/fineweb10B_sp8192")
    tok: str = E("TOKENIZER_PATH", "./data/tokenizers/fineweb_8192_bpe.model")
    train_glob: str = E("TRAIN_GLOB", "fineweb_train_*.bin")
    val_glob: str = E("VAL_GLOB", "fineweb_val_*.bin")
    V: int = E("VOCAB_SIZE", 8192)
    bos: int = E("BOS_ID", 1)
    # shape
    L: int = E("NUM_LAYERS", 11)
    D: int = E("MODEL_DIM", 512)
    nh: int = E("NUM_HEADS", 8)
    nkv: int = E("NUM_KV_HEADS", 4)
    mlp: float = E("MLP_MULT", 4.0)
    rope_dims: int = E("ROPE_DIMS", 16)
    rope_base: float = E("ROPE_BASE", 10000.0)
    cap: float = E("LOGIT_SOFTCAP", 30.0)
    qk_gain: float = E("QK_GAIN_INIT", 5.25)
    xsa_from: int = E("XSA_FROM", 0)
    par_from: int = E("PARALLEL_FROM", 7)
    loop_lo: int = E("LOOP_START", 3)
    loop_hi: int = E("LOOP_END", 5)
    loop_n: int = E("NUM_LOOPS", 2)
    loop_at: float = E("ENABLE_LOOPING_AT", 0.35)
    smear: bool = E("SMEAR", True)
    # schedule
    iters: int = E("ITERATIONS", 20000)
    max_wallclock_s: float = E("MAX_WALLCLOCK_S", 600.0)
    gptq_reserve_s: float = E("GPTQ_RESERVE_S", 30.0)
    warmup: int = E("WARMUP_STEPS", 20)
    warmdown: float = E("WARMDOWN_FRAC", 0.72)
    min_lr: float = E("MIN_LR", 0.0)
    batch_tokens: int = E("TRAIN_BATCH_TOKENS", 786432)
    T: int = E("TRAIN_SEQ_LEN", 2048)
    log_every: int = E("TRAIN_LOG_EVERY", 500)
    # optimisers
    lr_mat: float = E("MATRIX_LR", 0.022)
    lr_emb: float = E("TIED_EMBED_LR", 0.03)
    lr_sca: float = E("SCALAR_LR", 0.02)
    mom: float = E("MUON_MOMENTUM", 0.97)
    mom0: float = E("MUON_MOMENTUM_START", 0.92)
    mom_steps: int = E("MUON_MOMENTUM_WARMUP", 1500)
    ns: int = E("MUON_NS_STEPS", 5)
    wd_mat: float = E("MUON_WD", 0.095)
    wd_emb: float = E("EMBED_WD", 0.085)
    wd_sca: float = E("ADAM_WD", 0.02)
    clip: float = E("GRAD_CLIP", 0.3)
    ema: float = E("EMA_DECAY", 0.9965)
    # quantisation
    calib_batches: int = E("GPTQ_CALIB_BATCHES", 64)
    calib_seqs: int = E("GPTQ_CALIB_SEQS", 8)
    mat_bits: int = E("MATRIX_BITS", 6)
    emb_bits: int = E("EMBED_BITS", 8)
    mat_k: float = E("MATRIX_CLIP_SIGMAS", 12.85)
    emb_k: float = E("EMBED_CLIP_SIGMAS", 20.0)
    damp: float = E("GPTQ_DAMP", 0.01)
    blk: int = E("GPTQ_BLOCK", 128)
    codec: str = E("CODEC", "brotli")
    # evaluation
    eval_T: int = E("EVAL_SEQ_LEN", 2048)
    stride: int = E("EVAL_STRIDE", 64)
    win_batch: int = E("EVAL_WINDOW_BATCH", 32)
    eval_cap_s: float = E("EVAL_CAP_S", 600.0)
    eval_margin_s: float = E("EVAL_MARGIN_S", 45.0)
    slide_too: bool = E("SLIDING_DIAG", False)
    ttt_on: bool = E("TTT_ENABLED", True)
    ttt_rank: int = E("TTT_LORA_RANK", 96)
    ttt_lr: float = E("TTT_LORA_LR", 1e-4)
    ttt_b1: float = E("TTT_BETA1", 0.0)
    ttt_b2: float = E("TTT_BETA2", 0.999)
    ttt_wd: float = E("TTT_WD", 0.5)
    ttt_chunk: int = E("TTT_CHUNK", 48)
    ttt_bs: int = E("TTT_BATCH", 64)
    ttt_T: int = E("TTT_EVAL_SEQ_LEN", 2048)
    ttt_steps: int = E("TTT_GRAD_STEPS", 1)
    tilt: bool = E("HINT_TILT", True)
    hint_ctx: int = E("HINT_CTX", 6)
    hint_min: float = E("HINT_MIN_CONF", 0.55)
    hint_beta: float = E("HINT_BETA", 2.1)


LIMIT = 16_000_000


@dataclass
class Ctx:
    """Where this process stands among its peers."""

    rank: int = 0
    world: int = 1
    local: int = 0
    dev: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    file: str = ""

    @property
    def head(self):
        return self.rank == 0

    def log(self, *a, quiet=False):
        if not self.head:
            return
        s = " ".join(str(x) for x in a)
        if not quiet:
            print(s, flush=True)
        if self.file:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(s + "\n")

    def sync(self):
        torch.cuda.synchronize()
        if self.world > 1:
            dist.barrier()

    def all_sum(self, t):
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def all_max(self, v):
        if self.world == 1:
            return v
        t = torch.tensor([v], dtype=torch.float64, device=self.dev)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return float(t.item())

    def everyone(self, obj):
        """One object per rank, in rank order, on every rank."""
        if self.world == 1:
            return [obj]
        out = [None] * self.world
        dist.all_gather_object(out, obj)
        return out


def start(h):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if not torch.cuda.is_available():
        raise SystemExit("needs CUDA")
    if 8 % world:
        raise SystemExit(f"WORLD_SIZE={world} does not divide 8")
    dev = torch.device("cuda", local)
    torch.cuda.set_device(dev)
    if world > 1:
        dist.init_process_group("nccl", device_id=dev)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    rid = h.run_id or (str(uuid.uuid4()) if rank == 0 else "")
    c = Ctx(rank, world, local, dev)
    rid = c.everyone(rid)[0]
    if rank == 0:
        os.makedirs(f"{h.out}/logs", exist_ok=True)
    c.file = f"{h.out}/logs/{rid}.txt"
    return c


# ---- data

MAGIC, VERSION, HEAD = 20240520, 1, 256


def shard_len(p):
    hd = np.fromfile(p, dtype="<i4", count=HEAD)
    if hd.size != HEAD or hd[0] != MAGIC or hd[1] != VERSION:
        raise ValueError(f"bad shard header: {p}")
    n = int(hd[2])
    if os.path.getsize(p) != HEAD * 4 + n * 2:
        raise ValueError(f"bad shard size: {p}")
    return n


def read_shard(p):
    n = shard_len(p)
    a = np.fromfile(p, dtype="<u2", count=n, offset=HEAD * 4)
    return torch.from_numpy(a.astype(np.int32, copy=False))


def shards(h, pat):
    ps = sorted(glob.glob(os.path.join(h.data, pat)))
    if not ps:
        raise FileNotFoundError(f"{h.data}/{pat}")
    return ps


class Feed:
    """Random rows of T+1 tokens. Every rank walks its own shards (or its own rows of shared ones); rows of a
    shard come in a shuffled order, with a random phase, and none is drawn twice before the shard is through."""

    def __init__(self, h, c, paths, seed=0):
        self.h, self.c = h, c
        self.ps = paths[c.rank :: c.world] or paths
        self.rng = np.random.default_rng(1000 * (h.seed + seed) + c.rank)
        self.maps, self.q = {}, []
        self.epoch = -1
        self.refill()

    def view(self, i):
        if i not in self.maps:
            p = self.ps[i]
            self.maps[i] = np.memmap(p, mode="r", dtype="<u2", offset=HEAD * 4, shape=(shard_len(p),))
        return self.maps[i]

    def refill(self):
        self.epoch += 1
        rows, T = [], self.h.T
        for i in range(len(self.ps)):
            n = self.view(i).size
            ph = int(self.rng.integers(0, T))
            k = max(0, (n - 1 - ph) // T)
            rows.append(np.stack([np.full(k, i), ph + T * np.arange(k)], 1))
        rows = np.concatenate(rows)
        self.rng.shuffle(rows)
        self.q = rows
        self.at = 0

    def rows(self, k):
        T = self.h.T
        xs = np.empty((k, T + 1), dtype=np.int64)
        for j in range(k):
            if self.at >= len(self.q):
                self.refill()
            i, o = self.q[self.at]
            self.at += 1
            xs[j] = self.view(int(i))[int(o) : int(o) + T + 1]
        t = torch.from_numpy(xs).pin_memory().to(self.c.dev, non_blocking=True)
        return t[:, :-1].contiguous(), t[:, 1:].contiguous()

    def batch(self, accum):
        return self.rows(self.h.batch_tokens // (self.c.world * accum * self.h.T))


# ---- bytes


@dataclass
class Bytes:
    """Bytes of the text per token: n[id], plus one for a leading space unless the token before is a boundary."""

    n: Tensor
    sp: Tensor
    edge: Tensor

    def of(self, prev, tgt):
        return self.n[tgt] + (self.sp[tgt] & ~self.edge[prev]).to(self.n.dtype)

    def cpu(self):
        return Bytes(self.n.cpu(), self.sp.cpu(), self.edge.cpu())


def byte_tables(sp, V, dev):
    m = max(V, sp.vocab_size())
    n, lead, edge = np.zeros(m, np.int32), np.zeros(m, bool), np.ones(m, bool)
    for i in range(sp.vocab_size()):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        edge[i] = False
        if sp.is_byte(i):
            n[i] = 1
            continue
        s = sp.id_to_piece(i)
        if s.startswith("\u2581"):
            lead[i] = True
            s = s[1:]
        n[i] = len(s.replace("\u2581", " ").encode("utf-8"))
    return Bytes(*(torch.from_numpy(a).to(dev) for a in (n, lead, edge)))


@dataclass
class Doc:
    """A document of the validation stream: `at` is the place of its BOS, `n` how many tokens are predicted (the BOS
    that follows it is the last of them, so that the documents together predict every token but the first)."""

    i: int
    at: int
    n: int


@dataclass
class Val:
    tok: Tensor
    docs: list

    @property
    def preds(self):
        return self.tok.numel() - 1


def load_val(h):
    tok = torch.cat([read_shard(p) for p in shards(h, h.val_glob)]).long().contiguous()
    return Val(tok, split_docs(tok, h.bos))


def split_docs(tok, bos):
    at = torch.nonzero(tok == bos).flatten().tolist()
    if not at or at[0] != 0:
        at = [0] + at
    ends = at[1:] + [tok.numel() - 1]
    return [Doc(i, a, e - a) for i, (a, e) in enumerate(zip(at, ends, strict=True)) if e > a]


# ---- model


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


class Lin(nn.Linear):
    """fp32 weights, used in the dtype of the input."""

    def __init__(self, i, o, zero=False):
        super().__init__(i, o, bias=False)
        self.zero = zero

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rope(nn.Module):
    def __init__(self, dims, base):
        super().__init__()
        self.dims = dims
        self.register_buffer("f", base ** -(torch.arange(0, dims, 2).float() / dims), persistent=False)
        self.memo = None

    def forward(self, T, dev, dt):
        if self.memo is None or self.memo[0] < T or self.memo[1].device != dev or self.memo[1].dtype != dt:
            a = torch.outer(torch.arange(T, device=dev).float(), self.f.to(dev))
            self.memo = (T, a.cos().to(dt)[None, :, None], a.sin().to(dt)[None, :, None])
        return self.memo[1][:, :T], self.memo[2][:, :T]


def rot(x, cos, sin, r):
    a, b, rest = x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


class Attn(nn.Module):
    def __init__(self, h, i):
        super().__init__()
        self.nh, self.nkv, self.hd = h.nh, h.nkv, h.D // h.nh
        kv = self.nkv * self.hd
        self.q, self.k, self.v = Lin(h.D, h.D), Lin(h.D, kv), Lin(h.D, kv)
        self.o = Lin(h.D, h.D, zero=True)
        self.gain = nn.Parameter(torch.full((h.nh,), h.qk_gain))
        self.rope = Rope(h.rope_dims, h.rope_base)
        self.xsa = i >= h.xsa_from

    def forward(self, x, ad=None):
        B, T, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if ad is not None:
            q, k, v = q + ad("q", x), k + ad("k", x), v + ad("v", x)
        q = rms(q.view(B, T, self.nh, self.hd))
        k = rms(k.view(B, T, self.nkv, self.hd))
        v = v.view(B, T, self.nkv, self.hd)
        cos, sin = self.rope(T, x.device, q.dtype)
        q, k = rot(q, cos, sin, self.rope.dims), rot(k, cos, sin, self.rope.dims)
        q = q * self.gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.nkv != self.nh
        ).transpose(1, 2)
        if self.xsa:  # take each head's own value out of what it read
            g = y.reshape(B, T, self.nkv, self.nh // self.nkv, self.hd)
            u = F.normalize(v, dim=-1).unsqueeze(3)
            y = g - (g * u).sum(-1, keepdim=True) * u
        y = y.reshape(B, T, -1)
        z = self.o(y)
        return z if ad is None else z + ad("o", y)


class MLP(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.up, self.down = Lin(h.D, int(h.D * h.mlp)), Lin(int(h.D * h.mlp), h.D, zero=True)

    def forward(self, x, ad=None):
        u = self.up(x) if ad is None else self.up(x) + ad("up", x)
        return self.down(F.leaky_relu(u, 0.5).square())


class Block(nn.Module):
    def __init__(self, h, i):
        super().__init__()
        self.attn, self.mlp = Attn(h, i), MLP(h)
        self.sa, self.sm = nn.Parameter(torch.ones(h.D)), nn.Parameter(torch.ones(h.D))
        self.mix = nn.Parameter(torch.stack([torch.ones(h.D), torch.zeros(h.D)]))
        self.par = i >= h.par_from
        self.s = 1.0 / math.sqrt(i + 1)

    def forward(self, x, x0, ad=None):
        m = self.mix.to(x.dtype)
        x = m[0] * x + m[1] * x0
        sa, sm = self.sa.to(x.dtype), self.sm.to(x.dtype)
        u = rms(x) * self.s
        a = self.attn(u, ad)
        if self.par:  # both lanes read the same input
            return x + sa * a + sm * self.mlp(u, ad)
        x = x + sa * a
        return x + sm * self.mlp(rms(x) * self.s, ad)


class Smear(nn.Module):
    """Mixes the token before into each position, through a learned gate; a document's first token gets nothing."""

    def __init__(self, h):
        super().__init__()
        self.g = nn.Parameter(torch.zeros(h.D))
        self.bos = h.bos

    def forward(self, e, ids):
        g = torch.sigmoid(self.g.to(e.dtype) - 3.0)
        prev = F.pad(e[:, :-1], (0, 0, 1, 0))
        keep = (ids != self.bos).unsqueeze(-1).to(e.dtype)
        return e + keep * g * prev


class Net(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h = h
        self.emb = nn.Embedding(h.V, h.D)
        self.smear = Smear(h) if h.smear else None
        self.blocks = nn.ModuleList(Block(h, i) for i in range(h.L))
        loop = list(range(h.loop_lo, h.loop_hi + 1))
        full = list(range(h.loop_lo)) + loop * (h.loop_n + 1) + list(range(h.loop_hi + 1, h.L))
        self.orders = {False: list(range(h.L)), True: full}
        self.looping = False
        half = len(full) // 2
        self.skip_w = nn.Parameter(torch.ones(half, h.D))
        self.skip_g = nn.Parameter(torch.zeros(half, h.D))
        self.reset()

    def reset(self):
        nn.init.normal_(self.emb.weight, std=0.005)
        for m in self.modules():
            if isinstance(m, Lin):
                if m.zero:
                    nn.init.zeros_(m.weight)
                else:
                    nn.init.orthogonal_(m.weight, gain=1.0)

    def passes(self):
        return len(self.orders[True])

    def hidden(self, ids, lora=None):
        e = self.emb(ids).bfloat16()
        if self.smear is not None:
            e = self.smear(e, ids)
        x = x0 = rms(e)
        od = self.orders[self.looping]
        half, st = len(od) // 2, []
        for j, i in enumerate(od):
            if j < half:
                st.append(x) if j else None
            elif st:
                s = st.pop()
                k = len(st)
                g = torch.sigmoid(self.skip_g[k].to(x.dtype))
                x = torch.lerp(self.skip_w[k].to(x.dtype) * s, x, g)
            x = self.blocks[i](x, x0, None if lora is None else lora.at(j))
        return rms(x)

    def logits(self, ids, lora=None):
        z = self.hidden(ids, lora)
        y = F.linear(z, self.emb.weight.to(z.dtype))
        if lora is not None:
            y = y + lora.head(z)
        return self.h.cap * torch.tanh(y.float() / self.h.cap)

    def forward(self, ids, tgt, lora=None):
        y = self.logits(ids, lora)
        return F.cross_entropy(y.flatten(0, 1), tgt.flatten(), reduction="none").view_as(tgt)


# ---- optimisers


@torch.compile
def ns5(g, steps):
    """Orthogonalises by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    if tall := x.size(-2) > x.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        m = x @ x.mT
        x = a * x + (b * m + c * m @ m) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Row-normalised Muon. Rank r updates every world-th matrix; the updates are summed over the ranks."""

    def __init__(self, ps, lr, mom, wd, ns, c):
        super().__init__(ps, dict(lr=lr, mom=mom, wd=wd, ns=ns))
        self.c = c

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            ps = g["params"]
            flat = torch.zeros(sum(p.numel() for p in ps), dtype=torch.bfloat16, device=self.c.dev)
            o = 0
            for j, p in enumerate(ps):
                if j % self.c.world == self.c.rank and p.grad is not None:
                    s = self.state[p]
                    if "m" not in s:
                        s["m"] = torch.zeros_like(p.grad)
                    s["m"].lerp_(p.grad, 1 - g["mom"])
                    u = p.grad.lerp(s["m"], g["mom"])
                    u = u / (u.norm(dim=-1, keepdim=True) + 1e-7)
                    u = ns5(u, g["ns"]) * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[o : o + p.numel()] = u.reshape(-1)
                o += p.numel()
            self.c.all_sum(flat)
            o = 0
            for p in ps:
                p.mul_(1 - g["lr"] * g["wd"])
                p.add_(flat[o : o + p.numel()].view_as(p).to(p.dtype), alpha=-g["lr"])
                o += p.numel()


class Opts:
    """All the optimisers as one, with a common schedule."""

    def __init__(self, h, c, net):
        mats = [m.weight for m in net.modules() if isinstance(m, Lin)]
        rest = [p for n, p in net.named_parameters() if not n.endswith(("emb.weight",)) and p.ndim < 2]
        rest += [net.skip_w, net.skip_g] + [b.mix for b in net.blocks]
        ids = {id(p) for p in mats} | {id(net.emb.weight)}
        rest = [p for p in rest if id(p) not in ids]
        k = dict(betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.muon = Muon(mats, h.lr_mat, h.mom, h.wd_mat, h.ns, c)
        self.adam = [
            torch.optim.AdamW([net.emb.weight], lr=h.lr_emb, weight_decay=h.wd_emb, **k),
            torch.optim.AdamW(rest, lr=h.lr_sca, weight_decay=h.wd_sca, **k),
        ]
        self.all = [self.muon, *self.adam]
        self.base = [[g["lr"] for g in o.param_groups] for o in self.all]
        self.h = h

    def step(self, i, scale):
        f = min(1.0, i / max(1, self.h.mom_steps))
        for g in self.muon.param_groups:
            g["mom"] = self.h.mom0 + f * (self.h.mom - self.h.mom0)
        for o, b in zip(self.all, self.base, strict=True):
            for g, lr in zip(o.param_groups, b, strict=True):
                g["lr"] = lr * scale
            o.step()

    def zero(self):
        for o in self.all:
            o.zero_grad(set_to_none=True)


class Ema:
    def __init__(self, net, decay):
        self.d = decay
        self.w = {k: v.detach().float().clone() for k, v in net.state_dict().items()}

    @torch.no_grad()
    def push(self, net):
        a = [self.w[k] for k in self.w]
        b = [v.detach().float() for v in net.state_dict().values()]
        torch._foreach_lerp_(a, b, 1 - self.d)

    def put(self, net):
        net.load_state_dict({k: v.to(net.state_dict()[k].dtype) for k, v in self.w.items()})


# ---- training


def lr_scale(h, frac):
    if frac < 1 - h.warmdown:
        return 1.0
    return max(h.min_lr, (1 - frac) / h.warmdown)


def reduce_grads(c, net):
    gs = [p.grad for p in net.parameters() if p.grad is not None]
    if c.world > 1:
        flat = torch.cat([g.reshape(-1) for g in gs])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        o = 0
        for g in gs:
            g.copy_(flat[o : o + g.numel()].view_as(g))
            o += g.numel()


def micro(h, net, feed, accum):
    tot = 0.0
    for _ in range(accum):
        x, y = feed.batch(accum)
        loss = net(x, y).mean() / accum
        loss.backward()
        tot += loss.detach()
    return tot


def warm(h, c, net, fast, feed, accum):
    """Compiles both depths and fills the allocator; weights and optimiser states are put back."""
    w0 = copy.deepcopy(net.state_dict())
    ops = Opts(h, c, net)
    for looped in (False, True):
        net.looping = looped
        for i in range(h.warmup // 2):
            micro(h, fast, feed, accum)
            reduce_grads(c, net)
            ops.step(i, 1.0)
            ops.zero()
    net.looping = False
    net.load_state_dict(w0)
    torch.cuda.empty_cache()


def train(h, c, net, clk):
    accum = 8 // c.world
    fast = torch.compile(net, dynamic=False, fullgraph=True)
    warm(h, c, net, fast, Feed(h, c, shards(h, h.train_glob), seed=77), accum)
    feed = Feed(h, c, shards(h, h.train_glob))
    ops, ema = Opts(h, c, net), Ema(net, h.ema)
    budget = h.max_wallclock_s - h.gptq_reserve_s
    c.sync()
    clk.go()
    i, stop, loss = 0, None, torch.zeros((), device=c.dev)
    while True:
        frac = max(i / h.iters, clk() / budget)
        if i >= h.iters or (stop is not None and i >= stop):
            break
        if not net.looping and frac >= h.loop_at:
            net.looping = True
            c.log(f"loop:on step:{i} frac:{frac:.3f} order:{net.orders[True]}")
        loss = micro(h, fast, feed, accum)
        reduce_grads(c, net)
        if h.clip > 0:
            nn.utils.clip_grad_norm_(net.parameters(), h.clip)
        ops.step(i, lr_scale(h, min(frac, 1.0)))
        ops.zero()
        ema.push(net)
        i += 1
        if i <= 5 or i % h.log_every == 0:
            c.log(f"step:{i}/{h.iters} train_loss:{loss.item():.4f} train_time:{clk():.1f}s")
        if stop is None and i % 8 == 0:  # the slowest rank decides, for all
            if c.all_max(clk()) >= budget:
                stop = i
    c.log(f"train:done steps:{i} train_loss:{loss.item():.4f} train_time:{clk():.1f}s epoch:{feed.epoch}")
    ema.put(net)
    net.looping = True
    return i


class Clock:
    def __init__(self):
        self.t = None

    def go(self):
        torch.cuda.synchronize()
        self.t = time.perf_counter()
        return self

    def __call__(self):
        return 0.0 if self.t is None else time.perf_counter() - self.t


# ---- quantisation


class Hess:
    """Sums x x^T of the input of every matrix, over calibration rows; the head's too, for the tied embedding."""

    def __init__(self, net):
        self.net, self.H, self.n = net, {}, collections.Counter()
        self.hooks = [m.register_forward_hook(self.hook(k)) for k, m in net.named_modules() if isinstance(m, Lin)]

    def hook(self, k):
        def f(m, inp, out):
            self.add(k + ".weight", inp[0])

        return f

    def add(self, k, x):
        x = x.detach().reshape(-1, x.size(-1)).float()
        if k not in self.H:
            self.H[k] = torch.zeros(x.size(1), x.size(1), device=x.device)
        self.H[k].addmm_(x.T, x)
        self.n[k] += x.size(0)

    def close(self, c):
        for k in self.hooks:
            k.remove()
        for k in sorted(self.H):
            c.all_sum(self.H[k])
            self.H[k] /= max(1, self.n[k] * c.world)
        return self.H


@torch.no_grad()
def collect(h, c, net, feed):
    hs = Hess(net)
    per = max(1, h.calib_batches // c.world)
    for _ in range(per):
        x, _ = feed.rows(h.calib_seqs)
        hs.add("emb.weight", net.hidden(x))
    return hs.close(c)


@torch.no_grad()
def gptq(W, Hm, bits, k, damp, blk):
    """Rows to ints of `bits` bits with one scale a row; columns in order of falling diagonal, errors fed forward."""
    W, Hm = W.float().clone(), Hm.clone()
    n = W.size(1)
    top = 2 ** (bits - 1) - 1
    dead = Hm.diagonal() == 0
    Hm[dead, dead] = 1
    W[:, dead] = 0
    Hm.diagonal().add_(damp * Hm.diagonal().mean())
    pm = torch.argsort(Hm.diagonal(), descending=True)
    W, Hm = W[:, pm], Hm[pm][:, pm]
    s = (k * W.std(1) / top).clamp_min(1e-8).half().float()
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(Hm)), upper=True)
    Q = torch.zeros_like(W)
    for a in range(0, n, blk):
        b = min(a + blk, n)
        w, err, u = W[:, a:b].clone(), torch.zeros_like(W[:, a:b]), U[a:b, a:b]
        for j in range(b - a):
            q = (w[:, j] / s).round().clamp(-top, top)
            Q[:, a + j] = q
            e = (w[:, j] - q * s) / u[j, j]
            w[:, j:] -= e[:, None] * u[j, j:][None]
            err[:, j] = e
        W[:, b:] -= err @ U[a:b, b:]
    return Q[:, torch.argsort(pm)].to(torch.int8), s.half()


def quantise(h, net, Hs):
    out = {}
    for k, w in net.state_dict().items():
        if w.ndim == 2 and k in Hs:
            bits, sig = (h.emb_bits, h.emb_k) if k == "emb.weight" else (h.mat_bits, h.mat_k)
            q, s = gptq(w, Hs[k], bits, sig, h.damp, h.blk)
            out[k] = ("q", q.cpu(), s.cpu())
        else:
            out[k] = ("f", w.detach().half().cpu(), None)
    return out


# ---- the artifact: one file, header + planes, compressed


def codec_of(name):
    if name == "brotli" and brotli is not None:
        return "b", lambda b: brotli.compress(b, quality=11, lgwin=24), brotli.decompress
    return "x", lambda b: lzma.compress(b, preset=9 | lzma.PRESET_EXTREME), lzma.decompress


def planes(b, w):
    """Byte planes of an array of w-byte items: all first bytes, then all second ones, ..."""
    a = np.frombuffer(b, np.uint8)
    return a.tobytes() if w == 1 else a.reshape(-1, w).T.tobytes()


def unplanes(b, w):
    a = np.frombuffer(b, np.uint8)
    return a if w == 1 else np.ascontiguousarray(a.reshape(w, -1).T).reshape(-1)


def pack(h, qs):
    toc, body = [], io.BytesIO()
    for k in sorted(qs, key=lambda k: (qs[k][0], k.split(".")[-2:], k)):
        kind, a, s = qs[k]
        toc.append([k, kind, list(a.shape)])
        if kind == "q":
            body.write(planes(a.numpy().tobytes(), 1))
            body.write(planes(s.numpy().tobytes(), 2))
        else:
            body.write(planes(a.contiguous().numpy().tobytes(), 2))
    head = json.dumps(dict(v=1, toc=toc), separators=(",", ":")).encode()
    raw = len(head).to_bytes(4, "little") + head + body.getvalue()
    tag, enc, _ = codec_of(h.codec)
    return tag.encode() + enc(raw)


def unpack(blob):
    _, _, dec = codec_of("brotli" if blob[:1] == b"b" else "lzma")
    raw = dec(blob[1:])
    m = int.from_bytes(raw[:4], "little")
    meta, o = json.loads(raw[4 : 4 + m]), 4 + m
    sd = {}

    def take(n, w, dt):
        nonlocal o
        b = raw[o : o + n * w]
        o += n * w
        return torch.from_numpy(unplanes(b, w).view(dt).copy())

    for k, kind, shp in meta["toc"]:
        n = math.prod(shp)
        if kind == "q":
            q = take(n, 1, np.int8).view(shp)
            s = take(shp[0], 2, np.float16)
            sd[k] = q.float() * s.float()[:, None]
        else:
            sd[k] = take(n, 2, np.float16).view(shp).float()
    if o != len(raw):
        raise ValueError(f"artifact: {len(raw) - o} bytes left over")
    return sd, meta


def sizes(c, blob):
    code = len(Path(__file__).read_bytes())
    total = code + len(blob)
    c.log(f"size: code {code} + model {len(blob)} = {total} bytes, limit {LIMIT}, spare {LIMIT - total}")
    return total


def save(h, c, qs, path):
    """Rank 0 writes; everybody waits for the file."""
    if c.head:
        blob = pack(h, qs)
        total = sizes(c, blob)
        if total > LIMIT:
            c.log(f"WARNING: over the limit by {total - LIMIT} bytes")
        Path(path).write_bytes(blob)
    c.sync()


def revive(h, c, path):
    sd, meta = unpack(Path(path).read_bytes())
    net = Net(h).to(c.dev)
    net.load_state_dict(sd)
    net.looping = True
    net.eval().requires_grad_(False)
    return net, meta


# ---- low-rank adapters, one set a document of the batch


class Lora(nn.Module):
    """B documents, each with its own pair (A, B) for every matrix of every pass and for the head. B starts at zero."""

    def __init__(self, h, net, bs, dev):
        super().__init__()
        kv, up, r = h.D // h.nh * h.nkv, int(h.D * h.mlp), h.ttt_rank
        self.bs, self.r = bs, r
        dims = dict(q=(h.D, h.D), k=(h.D, kv), v=(h.D, kv), o=(h.D, h.D), up=(h.D, up))
        self.A, self.Z = nn.ParameterDict(), nn.ParameterDict()
        for j in range(net.passes()):
            for nm, (i, o) in dims.items():
                self.make(f"{nm}{j}", i, o, dev)
        self.make("head", h.D, h.V, dev)
        self.restart()

    def make(self, k, i, o, dev):
        self.A[k] = nn.Parameter(torch.empty(self.bs, self.r, i, device=dev))
        self.Z[k] = nn.Parameter(torch.empty(self.bs, o, self.r, device=dev))

    @torch.no_grad()
    def restart(self):
        for k in self.A:
            self.A[k].uniform_(-1, 1).mul_(self.A[k].size(-1) ** -0.5)
            self.Z[k].zero_()

    def run(self, k, x):
        a, z = self.A[k].to(x.dtype), self.Z[k].to(x.dtype)
        return (x @ a.mT) @ z.mT

    def at(self, j):
        return lambda nm, x: self.run(f"{nm}{j}", x)

    def head(self, x):
        return self.run("head", x)


def lora_opt(h, lora):
    return torch.optim.AdamW(
        lora.parameters(), lr=h.ttt_lr, betas=(h.ttt_b1, h.ttt_b2), eps=1e-10, weight_decay=h.ttt_wd, fused=True
    )


# ---- hints: what followed the same context earlier in the document


def hint_track(seq, k, floor, beta):
    """For each predicted place t (its target is seq[t + 1]): a hinted token and how far to tilt towards it.

    Both are functions of seq[: t + 1] alone: the table learns seq[t + 1] after the hint for it is laid down."""
    n = len(seq) - 1
    hid, amt = np.zeros(n, np.int64), np.zeros(n, np.float32)
    tab = {}
    for t in range(k - 1, n):
        key = tuple(seq[t + 1 - k : t + 1])
        seen = tab.setdefault(key, {})
        if seen:
            a, m = max(seen.items(), key=lambda kv: (kv[1], -kv[0]))
            conf = m / (sum(seen.values()) + 0.5)
            if conf >= floor:
                hid[t], amt[t] = a, beta * conf
        nxt = seq[t + 1]
        seen[nxt] = seen.get(nxt, 0) + 1
    return hid, amt


def tilted_nll(logits, tgt, hid, amt):
    """-ln p'(tgt), where p'(a) = p(a) exp(amt [a = hid]) / Z and Z = 1 + p(hid) (exp(amt) - 1) is its sum over a."""
    lse = logits.logsumexp(-1)
    ly = logits.gather(-1, tgt.unsqueeze(-1)).squeeze(-1) - lse
    lh = logits.gather(-1, hid.unsqueeze(-1)).squeeze(-1) - lse
    lz = torch.log1p(lh.exp() * torch.expm1(amt))
    return lz - ly - amt * (tgt == hid).to(amt.dtype)


# ---- evaluation


@dataclass
class Tally:
    """Sums of one or many documents. bits / bytes is the score."""

    nll: float = 0.0
    byt: int = 0
    tok: int = 0

    def __add__(self, o):
        return Tally(self.nll + o.nll, self.byt + o.byt, self.tok + o.tok)

    @property
    def loss(self):
        return self.nll / max(1, self.tok)

    @property
    def bpb(self):
        return self.nll / math.log(2.0) / max(1, self.byt)


def merge(c, mine):
    """mine: Tally by document. All ranks' documents, each of which exactly one rank may have."""
    led = {}
    for part in c.everyone(mine):
        for i, t in part.items():
            if i in led:
                raise RuntimeError(f"document {i} was scored twice")
            led[i] = t
    return led


def total(led):
    return sum((led[i] for i in sorted(led)), Tally())


@torch.no_grad()
def eval_plain(h, c, net, val, tabs):
    """Rows side by side, no overlap, no adaptation: what quantisation cost. Only for the log."""
    T, n = h.eval_T, val.preds
    starts = list(range(0, n, T))[c.rank :: c.world]
    t = Tally()
    for s in starts:
        e = min(s + T, n)
        w = val.tok[s : e + 1].to(c.dev)
        x, y = w[:-1][None], w[1:][None]
        nll = net(x, y).double().sum().item()
        t = t + Tally(nll, int(tabs.of(x, y).sum().item()), e - s)
    return sum(c.everyone(t), Tally())


def windows(n, T, stride):
    """(start, end, first scored) of windows over n predictions; every prediction is scored by exactly one."""
    out, done = [(0, min(T, n), 0)], min(T, n)
    while done < n:
        e = min(done + stride, n)
        out.append((max(0, e - T), e, done))
        done = e
    return out


@torch.no_grad()
def eval_sliding(h, c, net, val, tabs, limit=0):
    """The frozen model with a full context for every token. limit: windows a rank, 0 for all."""
    n, B = val.preds, h.win_batch
    ws = windows(n, h.eval_T, h.stride)
    lo, hi = len(ws) * c.rank // c.world, len(ws) * (c.rank + 1) // c.world
    mine = ws[lo:hi][: limit or None]
    fast = torch.compile(net.logits, dynamic=True)
    t = Tally()
    for o in range(0, len(mine), B):
        part = mine[o : o + B]
        W = max(e - s for s, e, _ in part)
        x = torch.zeros(len(part), W, dtype=torch.long)
        y, m = torch.zeros_like(x), torch.zeros(len(part), W, dtype=torch.bool)
        for r, (s, e, f) in enumerate(part):
            x[r, : e - s], y[r, : e - s] = val.tok[s:e], val.tok[s + 1 : e + 1]
            m[r, f - s : e - s] = True
        x, y, m = x.to(c.dev), y.to(c.dev), m.to(c.dev)
        nll = F.cross_entropy(fast(x).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        t = t + Tally(nll[m].double().sum().item(), int(tabs.of(x, y)[m].sum().item()), int(m.sum().item()))
    return sum(c.everyone(t), Tally())


def deal(docs, bs, c):
    """Documents of like length together, long ones first; batch b goes to rank b mod world. Fixed before any score."""
    by = sorted(docs, key=lambda d: (-d.n, d.i))
    groups = [by[o : o + bs] for o in range(0, len(by), bs)]
    return groups[c.rank :: c.world]


@dataclass
class Slab:
    """One chunk of every document of a batch: padded windows, what of them is scored, whose document goes on."""

    x: Tensor
    y: Tensor
    m: Tensor
    hid: Tensor
    amt: Tensor
    live: Tensor


class Group:
    """The documents of a batch with their hints, cut into chunks."""

    def __init__(self, h, val, docs, dev):
        self.h, self.docs, self.dev = h, docs, dev
        self.seq = [val.tok[d.at : d.at + d.n + 1] for d in docs]
        self.chunks = [-(-d.n // h.ttt_chunk) for d in docs]
        self.hints = [self.track(s) for s in self.seq]

    def track(self, s):
        h = self.h
        if not h.tilt:
            n = s.numel() - 1
            return torch.zeros(n, dtype=torch.long), torch.zeros(n)
        hid, amt = hint_track(s.tolist(), h.hint_ctx, h.hint_min, h.hint_beta)
        return torch.from_numpy(hid), torch.from_numpy(amt)

    def __len__(self):
        return max(self.chunks)

    def span(self, r, ci):
        """Of document r and chunk ci: window start, first scored place, end. None once the document is through."""
        if ci >= self.chunks[r]:
            return None
        a = ci * self.h.ttt_chunk
        b = min(a + self.h.ttt_chunk, self.docs[r].n)
        return max(0, b - self.h.ttt_T), a, b

    def slab(self, ci):
        B, sp = len(self.docs), [self.span(r, ci) for r in range(len(self.docs))]
        W = max(s[2] - s[0] for s in sp if s)
        x = torch.zeros(B, W, dtype=torch.long)
        y, hid = torch.zeros_like(x), torch.zeros_like(x)
        m, amt = torch.zeros(B, W, dtype=torch.bool), torch.zeros(B, W)
        for r, s in enumerate(sp):
            if s is None:
                continue
            w, a, b = s
            x[r, : b - w], y[r, : b - w] = self.seq[r][w:b], self.seq[r][w + 1 : b + 1]
            m[r, a - w : b - w] = True
            hid[r, : b - w], amt[r, : b - w] = self.hints[r][0][w:b], self.hints[r][1][w:b]
        live = torch.tensor([float(ci + 1 < k) for k in self.chunks])
        return Slab(*(t.to(self.dev, non_blocking=True) for t in (x, y, m, hid, amt, live)))


class DocTTT:
    """Scores documents chunk by chunk; a document's adapter learns each chunk once all of it is scored."""

    def __init__(self, h, c, net, val, tabs, clk):
        self.h, self.c, self.net, self.val, self.tabs, self.clk = h, c, net, val, tabs, clk
        self.f_logits = torch.compile(net.logits, dynamic=True)
        self.f_loss = torch.compile(net.forward, dynamic=True)
        self.kept = {}
        self.late = 0

    def adapter(self, n):
        """A zero adapter for n documents, with a new optimiser."""
        if n not in self.kept:
            self.kept[n] = Lora(self.h, self.net, n, self.c.dev)
        lo = self.kept[n]
        lo.restart()
        return lo, lora_opt(self.h, lo)

    @torch.no_grad()
    def score(self, sl, lora):
        """Loss of every place of the slab, those outside the mask set to 0."""
        nll = tilted_nll(self.f_logits(sl.x, lora), sl.y, sl.hid, sl.amt)
        return torch.where(sl.m, nll, 0.0).double()

    def learn(self, sl, lora, opt):
        for _ in range(self.h.ttt_steps):
            opt.zero_grad(set_to_none=True)
            nll = self.f_loss(sl.x, sl.y, lora)
            per = (nll * sl.m).sum(1) / sl.m.sum(1).clamp_min(1)
            (per * sl.live).sum().backward()
            opt.step()

    def in_time(self):
        """Past the budget less its margin, documents are scored with what their adapter knows by then."""
        ok = self.clk() < self.h.eval_cap_s - self.h.eval_margin_s
        self.late += not ok
        return ok

    def batch(self, docs):
        """Tally by document."""
        g = Group(self.h, self.val, docs, self.c.dev)
        lora, opt = self.adapter(len(docs))
        nll = torch.zeros(len(docs), dtype=torch.float64, device=self.c.dev)
        byt = torch.zeros(len(docs), dtype=torch.long, device=self.c.dev)
        tok = torch.zeros_like(byt)
        for ci in range(len(g)):
            sl = g.slab(ci)
            loss = self.score(sl, lora)
            nll += loss.sum(1)
            byt += (self.tabs.of(sl.x, sl.y) * sl.m).sum(1)
            tok += sl.m.sum(1)
            if ci + 1 < len(g) and self.in_time():
                self.learn(sl, lora, opt)
        rows = zip(docs, nll.tolist(), byt.tolist(), tok.tolist(), strict=True)
        return {d.i: Tally(a, b, k) for d, a, b, k in rows}

    def run(self, docs):
        """Tally by document of all the documents given, over all ranks."""
        mine, groups = {}, deal(docs, self.h.ttt_bs, self.c)
        for j, ds in enumerate(groups):
            mine.update(self.batch(ds))
            if j % 16 == 0 or j + 1 == len(groups):
                t = total(mine)
                self.c.log(f"ttt:{j + 1}/{len(groups)} len:{ds[0].n} run_bpb:{t.bpb:.5f} time:{self.clk():.1f}s")
        return merge(self.c, mine)


def eval_ttt(h, c, net, val, tabs, clk):
    ttt = DocTTT(h, c, net, val, tabs, clk)
    warm_ttt(h, c, ttt)
    led = ttt.run(val.docs)
    t = total(led)
    c.log(f"ttt:late_chunks rank0:{ttt.late}")
    if len(led) != len(val.docs) or t.tok != val.preds:
        raise RuntimeError(f"{len(led)} of {len(val.docs)} documents, {t.tok} of {val.preds} tokens")
    return t


def warm_ttt(h, c, ttt):
    """Compiles both graphs on random tokens; the adapter is a throw-away one."""
    g = torch.Generator().manual_seed(h.seed)
    for W in (h.ttt_chunk, h.ttt_T):
        x = torch.randint(0, h.V, (h.ttt_bs, W + 1), generator=g).to(c.dev)
        m = torch.ones(h.ttt_bs, W, dtype=torch.bool, device=c.dev)
        z = torch.zeros(h.ttt_bs, W, device=c.dev)
        sl = Slab(x[:, :-1], x[:, 1:], m, torch.zeros_like(x[:, 1:]), z, torch.ones(h.ttt_bs, device=c.dev))
        lo, op = ttt.adapter(h.ttt_bs)
        ttt.score(sl, lo)
        ttt.learn(sl, lo, op)
    torch.cuda.synchronize()


def evaluate(h, c, net, val, tabs):
    """The reported score, from the revived model."""
    clk = Clock().go()
    p = eval_plain(h, c, net, val, tabs)
    c.log(f"quantised val_loss:{p.loss:.6f} val_bpb:{p.bpb:.6f} tokens:{p.tok} bytes:{p.byt} time:{clk():.1f}s")
    if h.slide_too:
        s = eval_sliding(h, c, net, val, tabs)
        c.log(f"sliding val_loss:{s.loss:.6f} val_bpb:{s.bpb:.6f} stride:{h.stride} time:{clk():.1f}s")
    if h.ttt_on:
        t = eval_ttt(h, c, net, val, tabs, clk)
    else:
        t = eval_sliding(h, c, net, val, tabs)
    c.sync()
    c.log(f"eval:done tokens:{t.tok} bytes:{t.byt} eval_time:{clk():.1f}s cap:{h.eval_cap_s:.0f}s")
    return t


# ---- self checks, cheap


def check_tables(h, c, sp, tabs):
    """The tables against decoded text, on sentences that have spaces, marks and byte fallback."""
    b = tabs.cpu()
    for s in ("A plain sentence, with 3 numbers: 10, 200.", "caf\u00e9 \u4e2d\u6587 \U0001f642 end", "tabs\tand\nlines"):
        ids = torch.tensor([h.bos] + sp.encode(s))
        got = int(b.of(ids[:-1], ids[1:]).sum())
        want = len(sp.decode(ids[1:].tolist()).encode("utf-8"))
        if got != want:
            c.log(f"tables: {s!r} has {want} bytes, counted {got}")


def check_tilt():
    """The tilted distribution sums to 1 over the vocabulary."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, 97, generator=g, dtype=torch.float64)
    hid, amt = torch.tensor([[5]]), torch.tensor([[1.7]], dtype=torch.float64)
    p = sum(math.exp(-tilted_nll(z, torch.tensor([[a]]), hid, amt).item()) for a in range(97))
    assert abs(p - 1) < 1e-9, p


def check_windows():
    for n, T, st in ((1, 8, 2), (8, 8, 2), (31, 8, 3), (64, 16, 16)):
        hit = collections.Counter(i for _, e, f in windows(n, T, st) for i in range(f, e))
        assert sorted(hit) == list(range(n)) and set(hit.values()) == {1}


# ---- main


def smi():
    with contextlib.suppress(Exception):
        return subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    return ""


def headline(h, c, val):
    c.log(Path(__file__).read_text(encoding="utf-8"), quiet=True)
    c.log("=" * 100, quiet=True)
    c.log(f"python {sys.version.split()[0]} torch {torch.__version__} world {c.world}", quiet=True)
    c.log(smi(), quiet=True)
    for k, v in sorted(asdict(h).items()):
        c.log(f"  {k}: {v}", quiet=True)
    ps = shards(h, h.train_glob)
    c.log(f"data: {len(ps)} train shards; val {val.tok.numel()} tokens in {len(val.docs)} documents")
    c.log(f"data: longest document {max(d.n for d in val.docs)}, mean {val.preds / len(val.docs):.1f} tokens")


def build(h, c):
    net = Net(h).to(c.dev)
    c.log(f"params: {sum(p.numel() for p in net.parameters())} passes:{net.passes()} seed:{h.seed}")
    return net


def produce(h, c, path):
    """Everything before the artifact exists. Reads train shards only."""
    clk = Clock()
    net = build(h, c)
    train(h, c, net, clk)
    Hs = collect(h, c, net, Feed(h, c, shards(h, h.train_glob), seed=991))
    qs = quantise(h, net, Hs) if c.head else None
    c.sync()
    c.log(f"gptq:done matrices:{len(Hs)} time:{clk():.1f}s cap:{h.max_wallclock_s:.0f}s")
    save(h, c, qs, path)
    c.log(f"memory: {torch.cuda.max_memory_allocated() >> 20} MiB peak")
    del net, Hs, qs
    torch.cuda.empty_cache()


def main():
    h = H()
    c = start(h)
    check_tilt()
    check_windows()
    sp = spm.SentencePieceProcessor(model_file=h.tok)
    if sp.vocab_size() != h.V:
        raise SystemExit(f"VOCAB_SIZE={h.V}, the tokenizer has {sp.vocab_size()}")
    tabs = byte_tables(sp, h.V, c.dev)
    check_tables(h, c, sp, tabs)
    val = load_val(h)
    headline(h, c, val)
    path = os.path.join(h.out, "final_model.seil")
    produce(h, c, path)
    net, _ = revive(h, c, path)
    t = evaluate(h, c, net, val, tabs)
    c.log(f"final val_loss:{t.loss:.8f} val_bpb:{t.bpb:.8f}")
    if c.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
