import base64
import collections
import copy
import glob
import hashlib
import io
import json
import lzma
import math
import os
import random
import struct
import sys
import time
import uuid

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


# ---- settings


def env(name, default):
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


class h:
    run_id = env("RUN_ID", str(uuid.uuid4()))
    seed = env("SEED", 1337)
    data_dir = env("DATA_DIR", "./data")
    vocab_size = env("VOCAB_SIZE", 8192)
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    log_dir = env("LOG_DIR", "logs")
    model_path = env("MODEL_PATH", "final_model.pt")
    artifact_path = env("ARTIFACT_PATH", "final_model.rum")
    size_limit = 16_000_000
    # shape of the model
    num_layers = env("NUM_LAYERS", 11)
    model_dim = env("MODEL_DIM", 512)
    embed_dim = env("EMBED_DIM", 512)
    num_heads = env("NUM_HEADS", 8)
    num_kv_heads = env("NUM_KV_HEADS", 4)
    mlp_mult = env("MLP_MULT", 4.0)
    rope_base = env("ROPE_BASE", 10000.0)
    rope_dims = env("ROPE_DIMS", 16)
    rope_train_len = env("ROPE_TRAIN_LEN", 2048)
    logit_softcap = env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env("QK_GAIN_INIT", 5.25)
    ln_scale = env("LN_SCALE", True)
    xsa_last_n = env("XSA_LAST_N", 11)
    parallel_start = env("PARALLEL_START", 7)
    skip_gates = env("SKIP_GATES", True)
    smear = env("SMEAR", True)
    smear_dims = env("SMEAR_DIMS", 12)
    bos_id = env("BOS_ID", 1)
    num_loops = env("NUM_LOOPS", 2)
    loop_start = env("LOOP_START", 3)
    loop_end = env("LOOP_END", 5)
    loop_at = env("LOOP_AT", 0.35)
    # training
    iterations = env("ITERATIONS", 20000)
    cap_s = env("MAX_WALLCLOCK_SECONDS", 600.0)
    batch_tokens = env("TRAIN_BATCH_TOKENS", 2048 * 48 * 8)
    train_len = env("TRAIN_SEQ_LEN", 2048)
    warmup_steps = env("WARMUP_STEPS", 20)
    warmdown_frac = env("WARMDOWN_FRAC", 0.72)
    min_lr = env("MIN_LR", 0.0)
    log_every = env("TRAIN_LOG_EVERY", 500)
    val_every = env("VAL_LOSS_EVERY", 4000)
    ema_decay = env("EMA_DECAY", 0.9965)
    grad_clip = env("GRAD_CLIP_NORM", 0.3)
    # optimisers
    embed_lr = env("TIED_EMBED_LR", 0.03)
    embed_std = env("TIED_EMBED_INIT_STD", 0.005)
    embed_wd = env("EMBED_WD", 0.085)
    matrix_lr = env("MATRIX_LR", 0.022)
    scalar_lr = env("SCALAR_LR", 0.02)
    muon_momentum = env("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_steps = env("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_steps = env("MUON_BACKEND_STEPS", 5)
    muon_wd = env("MUON_WD", 0.095)
    muon_row_norm = env("MUON_ROW_NORMALIZE", True)
    adam_wd = env("ADAM_WD", 0.02)
    beta1 = env("BETA1", 0.9)
    beta2 = env("BETA2", 0.95)
    adam_eps = env("ADAM_EPS", 1e-8)
    # quantisation
    calib_batches = env("GPTQ_CALIBRATION_BATCHES", 64)
    calib_seqs = env("GPTQ_CALIBRATION_SEQS", 8)
    calib_reserve_s = env("GPTQ_RESERVE_SECONDS", 13.0)
    matrix_bits = env("MATRIX_BITS", 6)
    embed_bits = env("EMBED_BITS", 8)
    matrix_sigmas = env("MATRIX_CLIP_SIGMAS", 12.85)
    embed_sigmas = env("EMBED_CLIP_SIGMAS", 20.0)
    gptq_block = env("GPTQ_BLOCK", 128)
    gptq_damp = env("GPTQ_DAMP", 0.01)
    # evaluation
    val_batch_tokens = env("VAL_BATCH_TOKENS", 2048 * 32 * 8)
    eval_len = env("EVAL_SEQ_LEN", 2048)
    eval_stride = env("EVAL_STRIDE", 64)
    eval_batch = env("EVAL_BATCH_SEQS", 32)
    sliding_on = env("SLIDING_WINDOW_ENABLED", True)
    ttt_on = env("TTT_ENABLED", True)
    ttt_chunk = env("TTT_CHUNK_TOKENS", 32768)
    ttt_epochs = env("TTT_EPOCHS", 3)
    ttt_lr = env("TTT_LR", 0.005)
    ttt_momentum = env("TTT_MOMENTUM", 0.9)
    ttt_clip = env("TTT_GRAD_CLIP", 1.0)
    ttt_seqs = env("TTT_BATCH_SEQS", 32)
    ttt_budget_s = env("TTT_BUDGET_SECONDS", 420.0)
    # ranks
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = env("RANK", 0)
    world = env("WORLD_SIZE", 1)
    local_rank = env("LOCAL_RANK", 0)
    is_main = rank == 0
    accum = max(8 // world, 1)
    logfile = os.path.join(log_dir, f"{run_id}.txt")


SCALAR_KEYS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_w", "skip_g", "smear_w", "smear_lam")


def log(msg, console=True):
    if not h.is_main:
        return
    if console:
        print(msg, flush=True)
    with open(h.logfile, "a", encoding="utf-8") as f:
        print(msg, file=f)


def settings():
    return {k: v for k, v in vars(h).items() if not k.startswith("_")}


class Clock:
    """Wall clock in milliseconds that can be held while something else is looked at."""

    def __init__(self):
        self.sum = 0.0
        self.t0 = None

    def go(self):
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def hold(self):
        torch.cuda.synchronize()
        self.sum += 1000.0 * (time.perf_counter() - self.t0)
        self.t0 = None

    def ms(self):
        if self.t0 is None:
            return self.sum
        return self.sum + 1000.0 * (time.perf_counter() - self.t0)


# ---- ranks


def setup_ranks():
    dev = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(dev)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=dev)
        dist.barrier()
    return dev


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def rsum(*ts):
    if h.distributed:
        for t in ts:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return ts


def rmean_(ts):
    if h.distributed:
        for t in ts:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)


def agree(flag, dev):
    """One answer for all ranks: true as soon as one of them says so."""
    t = torch.tensor(int(flag), device=dev)
    if h.distributed:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return bool(t.item())


def barrier():
    if h.distributed:
        dist.barrier()


def share(n, rank=None, world=None):
    """The part [a, b) of n things that is this rank's."""
    r = h.rank if rank is None else rank
    w = h.world if world is None else world
    return n * r // w, n * (r + 1) // w


# ---- data

SHARD_MAGIC = 20240520
SHARD_HEAD = 256


def shard_len(path):
    head = np.fromfile(path, dtype="<i4", count=SHARD_HEAD)
    if head.size != SHARD_HEAD or head[0] != SHARD_MAGIC or head[1] != 1:
        raise ValueError(f"not a shard: {path}")
    n = int(head[2])
    if os.path.getsize(path) != 4 * SHARD_HEAD + 2 * n:
        raise ValueError(f"size of {path} does not fit its header")
    return n


def read_shard(path):
    n = shard_len(path)
    a = np.fromfile(path, dtype="<u2", count=n, offset=4 * SHARD_HEAD)
    return torch.from_numpy(a.astype(np.uint16, copy=False))


def open_shard(path):
    return np.memmap(path, mode="r", dtype="<u2", offset=4 * SHARD_HEAD, shape=(shard_len(path),))


def shard_paths(pattern):
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no shards match {pattern}")
    return paths


class Shuffled:
    """Sequences of the training shards: every rank has its own shards, every shard a random phase and order."""

    def __init__(self, pattern, seq_len, dev, seed=0):
        files = shard_paths(pattern)
        self.files = files[h.rank :: h.world] or files
        self.seq_len = seq_len
        self.dev = dev
        self.rng = np.random.Generator(np.random.PCG64(1000 * (h.seed + seed) + h.rank))
        self.maps = {}
        self.left = {}
        for i in range(len(self.files)):
            self.refill(i)

    def refill(self, i):
        n = shard_len(self.files[i])
        span = min(self.seq_len - 1, max(0, n - self.seq_len - 1))
        phase = int(self.rng.integers(span + 1))
        count = (n - 1 - phase) // self.seq_len
        self.left[i] = (phase + self.rng.permutation(count) * self.seq_len).tolist()

    def one(self):
        weights = np.array([len(self.left[i]) for i in range(len(self.files))], dtype=np.float64)
        if weights.sum() <= 0:
            for i in range(len(self.files)):
                self.refill(i)
            weights = np.array([len(self.left[i]) for i in range(len(self.files))], dtype=np.float64)
        i = int(self.rng.choice(len(self.files), p=weights / weights.sum()))
        if i not in self.maps:
            self.maps[i] = open_shard(self.files[i])
        at = self.left[i].pop()
        return np.asarray(self.maps[i][at : at + self.seq_len + 1], dtype=np.int64)

    def batch(self, seqs):
        rows = torch.from_numpy(np.stack([self.one() for _ in range(seqs)]))
        x = rows[:, :-1].contiguous().pin_memory().to(self.dev, non_blocking=True)
        y = rows[:, 1:].contiguous().pin_memory().to(self.dev, non_blocking=True)
        return x, y

    def step_batch(self):
        return self.batch(h.batch_tokens // (h.world * h.accum * self.seq_len))


def byte_tables(sp, vocab, dev):
    """Bytes of every token without its leading space, whether it has one, and whether it ends the text before it."""
    size = max(int(sp.vocab_size()), vocab)
    nbytes = np.zeros(size, dtype=np.int16)
    spaced = np.zeros(size, dtype=np.bool_)
    edge = np.ones(size, dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        edge[i] = False
        if sp.is_byte(i):
            nbytes[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            spaced[i] = True
            piece = piece[1:]
        nbytes[i] = len(piece.encode("utf-8"))
    put = lambda a, t: torch.tensor(a, dtype=t, device=dev)
    return put(nbytes, torch.int16), put(spaced, torch.bool), put(edge, torch.bool)


class Val:
    """The validation split as it lies in its shards, with the tables that count its bytes."""

    def __init__(self, dev):
        sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, not {h.vocab_size}")
        self.tok = torch.cat([read_shard(p) for p in shard_paths(h.val_files)]).contiguous()
        self.n = self.tok.numel() - 1
        self.nbytes, self.spaced, self.edge = byte_tables(sp, h.vocab_size, dev)

    def count_bytes(self, prev, tgt):
        b = self.nbytes[tgt].to(torch.float64)
        b += (self.spaced[tgt] & ~self.edge[prev]).to(torch.float64)
        return b

    def span(self, a, b, dev):
        return self.tok[a:b].to(device=dev, dtype=torch.int64, non_blocking=True)


# ---- model


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class Lin(nn.Linear):
    """A linear map whose weights stay in fp32 and are cast to the type of its input."""

    def __init__(self, fan_in, fan_out, zero=False):
        super().__init__(fan_in, fan_out, bias=False)
        self.zero = zero

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dim, base, train_len, rope_dims):
        super().__init__()
        self.base = base
        self.train_len = train_len
        self.rd = rope_dims if rope_dims > 0 else dim
        inv = 1.0 / (base ** (torch.arange(0, self.rd, 2, dtype=torch.float32) / self.rd))
        self.register_buffer("inv", inv, persistent=False)
        self.len = 0
        self.cos = self.sin = None

    def forward(self, n, dev, dtype):
        if self.cos is None or self.len < n or self.cos.device != dev:
            inv = self.inv.to(dev)
            if n > self.train_len:
                base = self.base * (n / self.train_len) ** (self.rd / (self.rd - 2))
                inv = 1.0 / (base ** (torch.arange(0, self.rd, 2, dtype=torch.float32, device=dev) / self.rd))
            f = torch.outer(torch.arange(n, dtype=torch.float32, device=dev), inv)
            self.cos = f.cos()[None, :, None, :]
            self.sin = f.sin()[None, :, None, :]
            self.len = n
        return self.cos[:, :n].to(dtype), self.sin[:, :n].to(dtype)


def rope(x, cos, sin, rd):
    a, rest = x[..., :rd], x[..., rd:]
    p, q = a.chunk(2, dim=-1)
    return torch.cat((p * cos + q * sin, q * cos - p * sin, rest), dim=-1)


def attend(q, k, v):
    if fa3 is not None:
        return fa3(q, k, v, causal=True)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class Attn(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.kv = heads, kv_heads
        self.hd = dim // heads
        self.wq = Lin(dim, dim)
        self.wk = Lin(dim, kv_heads * self.hd)
        self.wv = Lin(dim, kv_heads * self.hd)
        self.wo = Lin(dim, dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((heads,), h.qk_gain_init, dtype=torch.float32))
        self.rot = Rotary(self.hd, h.rope_base, h.rope_train_len, h.rope_dims)
        self.xsa = False

    def drop_self(self, y, v):
        """Takes out of every head's result what lies along the position's own value."""
        b, t, hh, d = y.shape
        yg = y.reshape(b, t, self.kv, hh // self.kv, d)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (yg - (yg * vn).sum(dim=-1, keepdim=True) * vn).reshape(b, t, hh, d)

    def forward(self, x):
        b, t, d = x.shape
        q = self.wq(x).view(b, t, self.heads, self.hd)
        k = self.wk(x).view(b, t, self.kv, self.hd)
        v = self.wv(x).view(b, t, self.kv, self.hd)
        q, k = F.rms_norm(q, (self.hd,)), F.rms_norm(k, (self.hd,))
        cos, sin = self.rot(t, x.device, q.dtype)
        q, k = rope(q, cos, sin, self.rot.rd), rope(k, cos, sin, self.rot.rd)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = attend(q, k, v)
        if self.xsa:
            y = self.drop_self(y, v)
        return self.wo(y.reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, dim, mult):
        super().__init__()
        self.up = Lin(dim, int(dim * mult))
        self.down = Lin(int(dim * mult), dim, zero=True)

    def forward(self, x):
        return self.down(F.leaky_relu(self.up(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, i):
        super().__init__()
        d = h.model_dim
        self.n1, self.n2 = RMSNorm(), RMSNorm()
        self.attn = Attn(d, h.num_heads, h.num_kv_heads)
        self.mlp = MLP(d, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(d, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(d, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(d), torch.zeros(d))).float())
        self.s = 1.0 / math.sqrt(i + 1) if h.ln_scale else 1.0
        self.par = i >= h.parallel_start

    def forward(self, x, x0):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        a = self.attn_scale.to(x.dtype) * self.attn(self.n1(x) * self.s)
        if self.par:
            return x + a + self.mlp_scale.to(x.dtype) * self.mlp(self.n2(x) * self.s)
        x = x + a
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.n2(x) * self.s)


def layer_order(loops):
    """The layers in the order in which they run, split in the half that stores skips and the half that takes them."""
    mid = list(range(h.loop_start, h.loop_end + 1))
    seq = list(range(h.loop_start)) + mid * (loops + 1) + list(range(h.loop_end + 1, h.num_layers))
    return seq[: len(seq) // 2], seq[len(seq) // 2 :]


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        d = h.model_dim
        self.emb = nn.Embedding(h.vocab_size, h.embed_dim)
        self.proj_in = Lin(h.embed_dim, d) if h.embed_dim != d else None
        self.proj_out = Lin(d, h.embed_dim) if h.embed_dim != d else None
        self.blocks = nn.ModuleList(Block(i) for i in range(h.num_layers))
        self.norm = RMSNorm()
        self.plain = layer_order(0)
        self.looped = layer_order(h.num_loops)
        self.looping = False
        ns = max(min(len(a), len(b)) for a, b in (self.plain, self.looped))
        self.skip_w = nn.Parameter(torch.ones(ns, d, dtype=torch.float32))
        self.skip_g = nn.Parameter(torch.zeros(ns, d, dtype=torch.float32)) if h.skip_gates else None
        if h.smear:
            self.smear_w = nn.Parameter(torch.zeros(h.smear_dims, dtype=torch.float32))
            self.smear_lam = nn.Parameter(torch.zeros((), dtype=torch.float32))
        for b in self.blocks[max(0, h.num_layers - h.xsa_last_n) :]:
            b.attn.xsa = True
        self.init()

    @torch.no_grad()
    def init(self):
        nn.init.normal_(self.emb.weight, mean=0.0, std=h.embed_std)
        for m in self.modules():
            if isinstance(m, Lin):
                if m.zero:
                    nn.init.zeros_(m.weight)
                elif min(m.weight.shape) >= 64:
                    nn.init.orthogonal_(m.weight, gain=1.0)

    def mix_prev(self, x, ids):
        """Adds to a token a gated part of the token before it, but never over the start of a document."""
        gate = torch.sigmoid(x[:, 1:, : h.smear_dims] @ self.smear_w.to(x.dtype))
        keep = (ids[:, 1:] != h.bos_id).to(x.dtype)
        gate = (self.smear_lam.to(x.dtype) * gate * keep).unsqueeze(-1)
        return torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)

    def hidden(self, ids):
        x = self.emb(ids)
        if h.smear:
            x = self.mix_prev(x, ids)
        x = F.rms_norm(x, (x.size(-1),))
        if self.proj_in is not None:
            x = self.proj_in(x)
        x0 = x
        enc, dec = self.looped if self.looping else self.plain
        skips = []
        for i in enc:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for j, i in enumerate(dec):
            if j < self.skip_w.size(0) and skips:
                s = self.skip_w[j].to(x.dtype) * skips.pop()
                if self.skip_g is not None:
                    x = torch.lerp(s, x, torch.sigmoid(self.skip_g[j].to(x.dtype) + 2.0))
                else:
                    x = x + s
            x = self.blocks[i](x, x0)
        x = self.norm(x)
        return self.proj_out(x) if self.proj_out is not None else x

    def logits(self, ids):
        z = F.linear(self.hidden(ids), self.emb.weight.to(torch.bfloat16))
        return h.logit_softcap * torch.tanh(z / h.logit_softcap)

    def forward(self, ids, tgt):
        z = self.logits(ids)
        return F.cross_entropy(z.reshape(-1, z.size(-1)).float(), tgt.reshape(-1), reduction="mean")


def new_model(dev):
    m = GPT().to(dev).bfloat16()
    for x in m.modules():
        if isinstance(x, (Lin, nn.Embedding)):
            x.float()
    with torch.no_grad():
        for name, p in m.named_parameters():
            if p.ndim < 2 or any(k in name for k in SCALAR_KEYS):
                p.data = p.data.float()
    return m


# ---- optimisers


@torch.compile
def newton_schulz(g, steps=5, eps=1e-7):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + eps)
    tall = g.size(0) > g.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return x.T if tall else x


class MuonEqR(torch.optim.Optimizer):
    """Muon whose update is brought to rows of equal length before it is made orthogonal; ranks share the matrices."""

    def __init__(self, params, lr, momentum, steps, wd, row_norm):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, wd=wd, row_norm=row_norm))

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            ps = g["params"]
            if not ps:
                continue
            flat = torch.zeros(sum(p.numel() for p in ps), device=ps[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(ps):
                if i % h.world == h.rank and p.grad is not None:
                    st = self.state[p]
                    if "buf" not in st:
                        st["buf"] = torch.zeros_like(p.grad)
                    st["buf"].mul_(g["momentum"]).add_(p.grad)
                    u = p.grad.add(st["buf"], alpha=g["momentum"])
                    if g["row_norm"]:
                        u = u / u.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).to(u.dtype)
                    u = newton_schulz(u, steps=g["steps"])
                    u = u * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = u.reshape(-1)
                at += p.numel()
            rsum(flat)
            at = 0
            for p in ps:
                if g["wd"] > 0:
                    p.mul_(1.0 - g["lr"] * g["wd"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-g["lr"])
                at += p.numel()


def make_opts(m):
    named = list(m.named_parameters())
    is_scalar = lambda n, p: p.ndim < 2 or any(k in n for k in SCALAR_KEYS)
    mats = [p for n, p in named if not is_scalar(n, p) and not n.startswith("emb.")]
    scal = [p for n, p in named if is_scalar(n, p)]
    betas = (h.beta1, h.beta2)
    emb = torch.optim.AdamW(
        [{"params": [m.emb.weight], "lr": h.embed_lr, "base_lr": h.embed_lr}],
        betas=betas,
        eps=h.adam_eps,
        weight_decay=h.embed_wd,
        fused=True,
    )
    mu = MuonEqR(mats, h.matrix_lr, h.muon_momentum, h.muon_steps, h.muon_wd, h.muon_row_norm)
    for g in mu.param_groups:
        g["base_lr"] = h.matrix_lr
    sc = torch.optim.AdamW(
        [{"params": scal, "lr": h.scalar_lr, "base_lr": h.scalar_lr}],
        betas=betas,
        eps=h.adam_eps,
        weight_decay=h.adam_wd,
        fused=True,
    )
    return [emb, mu, sc], mu


def lr_mul(frac):
    """Flat, then a straight line down to min_lr. frac: the part of the training that is over, by time or by steps."""
    if h.warmdown_frac <= 0 or frac < 1.0 - h.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / h.warmdown_frac, h.min_lr)


class Ema:
    def __init__(self, m, decay):
        self.decay = decay
        self.avg = {k: v.detach().float().clone() for k, v in m.state_dict().items()}

    @torch.no_grad()
    def add(self, m):
        for k, v in m.state_dict().items():
            self.avg[k].lerp_(v.detach().float(), 1.0 - self.decay)

    def put(self, m):
        m.load_state_dict({k: self.avg[k].to(v.dtype) for k, v in m.state_dict().items()}, strict=True)


# ---- training


def grad_step(fwd, m, opts, loader, scale, mom, mu):
    for o in opts:
        o.zero_grad(set_to_none=True)
    total = torch.zeros((), device=loader.dev)
    for _ in range(h.accum):
        x, y = loader.step_batch()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = fwd(x, y)
        total += loss.detach()
        (loss / h.accum).backward()
    rmean_([p.grad for p in m.parameters() if p.grad is not None])
    for g in mu.param_groups:
        g["momentum"] = mom
    for o in opts:
        for g in o.param_groups:
            g["lr"] = g["base_lr"] * scale
    if h.grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(m.parameters(), h.grad_clip)
    for o in opts:
        o.step()
    return total / h.accum


def warm_up(fwd, m, opts, mu, dev):
    """Compiles both graphs on batches of training data; weights and optimisers are put back afterwards."""
    keep = {k: v.detach().cpu().clone() for k, v in m.state_dict().items()}
    keep_o = [copy.deepcopy(o.state_dict()) for o in opts]
    loader = Shuffled(h.train_files, h.train_len, dev, seed=77)
    for looping in (False, True):
        m.looping = looping and h.num_loops > 0
        for _ in range(h.warmup_steps):
            grad_step(fwd, m, opts, loader, 1.0, h.muon_momentum_start, mu)
        log(f"warmup: looping={m.looping} steps:{h.warmup_steps}")
    m.load_state_dict(keep, strict=True)
    for o, s in zip(opts, keep_o, strict=True):
        o.load_state_dict(s)
    mu.state.clear()
    m.looping = False


def train_model(val, dev):
    m = new_model(dev)
    fwd = torch.compile(m, dynamic=False, fullgraph=True)
    opts, mu = make_opts(m)
    log(f"model_params:{sum(p.numel() for p in m.parameters())}")
    if h.warmup_steps > 0:
        warm_up(fwd, m, opts, mu, dev)
    loader = Shuffled(h.train_files, h.train_len, dev)
    ema = Ema(m, h.ema_decay)
    cap_ms = 1000.0 * (h.cap_s - h.calib_reserve_s)
    clk = Clock()
    barrier()
    clk.go()
    step, last = 0, None
    while True:
        done = step == h.iterations or (last is not None and step >= last)
        if done or (h.val_every > 0 and step > 0 and step % h.val_every == 0):
            clk.hold()
            vl, vb = eval_val(m, val, dev)
            log(f"step:{step}/{h.iterations} val_loss:{vl:.4f} val_bpb:{vb:.4f} train_time:{clk.ms():.0f}ms")
            clk.go()
        if done:
            break
        frac = max(step / h.iterations, clk.ms() / cap_ms)
        if h.num_loops > 0 and not m.looping and agree(frac >= h.loop_at, dev):
            m.looping = True
            log(f"looping on at step:{step} frac:{frac:.3f} order:{m.looped}")
        w = min(step / max(h.muon_momentum_steps, 1), 1.0)
        mom = (1.0 - w) * h.muon_momentum_start + w * h.muon_momentum
        loss = grad_step(fwd, m, opts, loader, lr_mul(frac), mom, mu)
        ema.add(m)
        step += 1
        if step <= 5 or step % h.log_every == 0:
            t = clk.ms() / 1000.0
            log(f"step:{step} train_loss:{loss.item():.4f} time:{t:.1f}s tok/s:{step * h.batch_tokens / max(t, 1e-9):.0f}")
        if last is None and agree(clk.ms() >= cap_ms, dev):
            last = step
    log(f"stopped at step:{step} train_time:{clk.ms():.0f}ms cap:{cap_ms:.0f}ms")
    log(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    ema.put(m)
    m.looping = h.num_loops > 0
    hess = calibrate(m, Shuffled(h.train_files, h.train_len, dev, seed=11), dev, clk)
    log(f"train and calibration: {clk.ms():.0f}ms of {1000 * h.cap_s:.0f}ms")
    clk.hold()
    return m, hess


# ---- calibration


def calibrate(m, loader, dev, clk):
    """Second moments of every linear map's inputs, on batches of training data, while time under the cap is left."""
    hess, hooks = {}, []

    def watch(name, take_out):
        def hook(mod, inp, out):
            x = (out if take_out else inp[0]).detach().float()
            x = x.reshape(-1, x.size(-1))
            if name not in hess:
                hess[name] = torch.zeros(x.size(1), x.size(1), device=dev)
            hess[name].addmm_(x.T, x)

        return hook

    for name, mod in m.named_modules():
        if isinstance(mod, Lin) and mod.weight.numel() > 65536:
            hooks.append(mod.register_forward_hook(watch(name + ".weight", False)))
    last = m.proj_out if m.proj_out is not None else m.norm
    hooks.append(last.register_forward_hook(watch("emb.weight", True)))
    m.eval()
    seen = 0
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(h.calib_batches):
            if agree(clk.ms() >= 1000.0 * h.cap_s - 1500.0, dev):
                break
            x, _ = loader.batch(h.calib_seqs)
            m.logits(x)
            seen += 1
    for k in hooks:
        k.remove()
    m.train()
    rsum(*(hess[n] for n in sorted(hess)))
    for n in hess:
        hess[n].div_(max(seen, 1) * h.world)
    log(f"calibration: {seen} batches of {h.calib_seqs} sequences per rank, {len(hess)} maps")
    return {n: v.cpu() for n, v in hess.items()}


# ---- quantisation


def row_scales(w, bits, sigmas):
    top = 2 ** (bits - 1) - 1
    s = sigmas * w.float().std(dim=1) / top
    return s.clamp_min(1e-10).to(torch.float16), top


@torch.no_grad()
def gptq(w, hs, bits, sigmas, block, damp):
    """Rounds a matrix column by column and carries every column's error on to those that follow."""
    w = w.float().clone()
    rows, cols = w.shape
    hs = hs.float().clone()
    dead = torch.diag(hs) == 0
    hs[dead, dead] = 1.0
    hs.diagonal().add_(damp * hs.diagonal().mean())
    perm = torch.argsort(hs.diagonal(), descending=True)
    inv = torch.argsort(perm)
    s, top = row_scales(w, bits, sigmas)
    sf = s.float()
    w[:, dead] = 0.0
    w = w[:, perm]
    hs = hs[perm][:, perm]
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hs)), upper=True)
    q = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    for a in range(0, cols, block):
        b = min(a + block, cols)
        wb = w[:, a:b].clone()
        err = torch.zeros_like(wb)
        ub = u[a:b, a:b]
        for j in range(b - a):
            col = wb[:, j]
            z = torch.clamp(torch.round(col / sf), -top, top)
            q[:, a + j] = z.to(torch.int8)
            e = (col - z * sf) / ub[j, j]
            err[:, j] = e
            wb[:, j:] -= e.unsqueeze(1) * ub[j, j:].unsqueeze(0)
        if b < cols:
            w[:, b:] -= err @ u[a:b, b:]
    return q[:, inv], s


def quantize(sd, hess, dev):
    out, kinds = {}, {}
    for name, t in sd.items():
        t = t.detach()
        if not t.is_floating_point() or t.numel() <= 65536 or name not in hess:
            out[name] = t.to(torch.float16).cpu() if t.is_floating_point() else t.cpu()
            kinds[name] = "fp16" if t.is_floating_point() else "as is"
            continue
        emb = name.startswith("emb.")
        bits = h.embed_bits if emb else h.matrix_bits
        sig = h.embed_sigmas if emb else h.matrix_sigmas
        q, s = gptq(t.to(dev), hess[name].to(dev), bits, sig, h.gptq_block, h.gptq_damp)
        out[name + "|q"] = q.contiguous().cpu()
        out[name + "|s"] = s.contiguous().cpu()
        kinds[name] = f"int{bits}"
    return out, kinds


def dequantize(packed, like):
    sd = {}
    for name, t in like.items():
        if name + "|q" in packed:
            q, s = packed[name + "|q"], packed[name + "|s"]
            sd[name] = (q.float() * s.float()[:, None]).to(t.dtype)
        else:
            sd[name] = packed[name].to(t.dtype)
    return sd


def kinds_table(kinds, sd):
    by = collections.defaultdict(lambda: [0, 0])
    for name, kind in kinds.items():
        by[kind][0] += 1
        by[kind][1] += sd[name].numel()
    return " ".join(f"{k}:{n} tensors/{c} values" for k, (n, c) in sorted(by.items()))


# ---- packing

PACK_MAGIC = b"RUM1"
KINDS = {"int8": torch.int8, "float16": torch.float16, "int64": torch.int64, "bool": torch.bool}


def shuffle_bytes(raw, width):
    """All first bytes, then all second bytes, ...: bytes of one significance lie side by side."""
    if width <= 1:
        return raw
    a = np.frombuffer(raw, dtype=np.uint8)
    return np.ascontiguousarray(a.reshape(-1, width).T).tobytes()


def unshuffle_bytes(raw, width):
    if width <= 1:
        return raw
    a = np.frombuffer(raw, dtype=np.uint8)
    return np.ascontiguousarray(a.reshape(width, -1).T).tobytes()


def flatten(tensors):
    """An index as JSON and one string of bytes, tensors of one type side by side."""
    index, parts = [], []
    for name in sorted(tensors, key=lambda n: (str(tensors[n].dtype), n)):
        t = tensors[name].contiguous()
        raw = shuffle_bytes(t.numpy().tobytes(), t.element_size())
        index.append([name, str(t.dtype).removeprefix("torch."), list(t.shape), len(raw)])
        parts.append(raw)
    head = json.dumps(index, separators=(",", ":")).encode()
    return struct.pack("<I", len(head)) + head + b"".join(parts)


def unflatten(raw):
    (n,) = struct.unpack_from("<I", raw)
    index = json.loads(raw[4 : 4 + n])
    at, out = 4 + n, {}
    for name, kind, shape, size in index:
        dt = KINDS[kind]
        width = torch.empty(0, dtype=dt).element_size()
        part = bytearray(unshuffle_bytes(raw[at : at + size], width))
        out[name] = torch.frombuffer(part, dtype=dt).reshape(shape).clone()
        at += size
    if at != len(raw):
        raise ValueError("the artifact does not end where its index says")
    return out


def own_code():
    with open(os.path.abspath(__file__), "rb") as f:
        return f.read()


def pack_code(code):
    filt = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "pb": 0}]
    return lzma.compress(code, format=lzma.FORMAT_XZ, filters=filt)


def join_artifact(code_xz, model_br):
    return PACK_MAGIC + struct.pack("<II", len(code_xz), len(model_br)) + code_xz + model_br


def split_artifact(blob):
    if blob[:4] != PACK_MAGIC:
        raise ValueError("not an artifact of this script")
    nc, nm = struct.unpack_from("<II", blob, 4)
    if len(blob) != 12 + nc + nm:
        raise ValueError(f"artifact has {len(blob)} bytes, its head says {12 + nc + nm}")
    return blob[12 : 12 + nc], blob[12 + nc :]


def serialize(m, hess, dev):
    """Writes the artifact: this script, packed, and the quantised weights. Every rank waits until it lies there."""
    sd = m.state_dict()
    code = own_code()
    if h.is_main:
        torch.save(sd, h.model_path)
        log(f"Serialized model: {os.path.getsize(h.model_path)} bytes")
        t0 = time.perf_counter()
        packed, kinds = quantize(sd, hess, dev)
        log(f"quantised in {time.perf_counter() - t0:.1f}s {kinds_table(kinds, sd)}")
        for err, name in round_error(sd, dequantize(packed, sd))[:3]:
            log(f"  rounding moved {name} by {err:.4f} of its length", console=False)
        model_br = brotli.compress(flatten(packed), quality=11, lgwin=24)
        blob = join_artifact(pack_code(code), model_br)
        with open(h.artifact_path, "wb") as f:
            f.write(blob)
        total = len(code) + len(blob)
        log(f"Code size: {len(code)} bytes (packed {len(blob) - len(model_br) - 12})")
        log(f"Serialized model quantized+brotli: {len(model_br)} bytes")
        log(f"Total submission size quantized+brotli: {total} bytes")
        if total > h.size_limit:
            raise SystemExit(f"too large: {total} > {h.size_limit}")
    barrier()


def deserialize(dev):
    with open(h.artifact_path, "rb") as f:
        code_xz, model_br = split_artifact(f.read())
    if hashlib.sha256(lzma.decompress(code_xz)).digest() != hashlib.sha256(own_code()).digest():
        raise ValueError("the artifact was written by another script")
    m = new_model(dev)
    m.load_state_dict(dequantize(unflatten(brotli.decompress(model_br)), m.state_dict()), strict=True)
    m.looping = h.num_loops > 0
    return m


# ---- looks at the data and the weights, all off by default


DIAG = env("DIAG", False)


def weight_table(m):
    """Names, shapes and spreads of the weights, for the log file only."""
    for name, p in sorted(m.named_parameters()):
        f = p.detach().float()
        log(f"  {name} {tuple(p.shape)} mean:{f.mean().item():+.2e} std:{f.std().item():.2e}", console=False)


def sigma_table(m):
    """How many values of every matrix lie beyond the clip, by layer."""
    rows = []
    for name, p in m.named_parameters():
        if p.ndim != 2 or p.numel() <= 65536:
            continue
        emb = name.startswith("emb.")
        bits = h.embed_bits if emb else h.matrix_bits
        s, top = row_scales(p.detach(), bits, h.embed_sigmas if emb else h.matrix_sigmas)
        over = (p.detach().float().abs() > s.float()[:, None] * top).float().mean().item()
        rows.append((over, name))
    for over, name in sorted(rows, reverse=True)[:12]:
        log(f"  beyond the clip: {over:.2e} {name}", console=False)


def round_error(sd, back):
    """The relative error of every quantised matrix, largest first."""
    errs = []
    for name, t in sd.items():
        if t.ndim == 2 and t.numel() > 65536:
            d = (t.float().cpu() - back[name].float().cpu()).norm() / t.float().cpu().norm().clamp_min(1e-12)
            errs.append((d.item(), name))
    return sorted(errs, reverse=True)


@torch.no_grad()
def position_curve(m, loader, parts=8, batches=16):
    """The loss on training data by place in the sequence: whether a longer context still helps."""
    L = loader.seq_len
    acc = torch.zeros(parts, device=loader.dev, dtype=torch.float64)
    for _ in range(batches):
        x, y = loader.batch(8)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = m.logits(x)
        nll = F.cross_entropy(z.reshape(-1, z.size(-1)).float(), y.reshape(-1), reduction="none").view_as(y)
        acc += nll.double().view(-1, parts, L // parts).mean(dim=(0, 2))
    rsum(acc)
    return (acc / (batches * h.world)).tolist()


@torch.no_grad()
def looks_ahead(m, loader, at=1000):
    """Whether a change of one token moves the logits before it; must be zero."""
    x, _ = loader.batch(1)
    y = x.clone()
    y[:, at] = (y[:, at] + 17) % h.vocab_size
    with torch.autocast("cuda", dtype=torch.bfloat16):
        d = (m.logits(x)[:, :at] - m.logits(y)[:, :at]).abs().max()
    return d.item()


def loop_loss(m, loader, batches=8):
    """The loss on training data with the loop and without."""
    was, out = m.looping, {}
    for flag in (False, True):
        m.looping = flag
        s = torch.zeros((), device=loader.dev, dtype=torch.float64)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            for _ in range(batches):
                x, y = loader.batch(8)
                s += m(x, y).double()
        rsum(s)
        out["looped" if flag else "plain"] = s.item() / (batches * h.world)
    m.looping = was
    return out


def diagnose(m, dev):
    loader = Shuffled(h.train_files, h.train_len, dev, seed=91)
    weight_table(m)
    sigma_table(m)
    log("loss by place: " + " ".join(f"{v:.4f}" for v in position_curve(m, loader)))
    log(f"looks ahead by: {looks_ahead(m, loader):.2e}")
    log("loops: " + " ".join(f"{k}:{v:.4f}" for k, v in loop_loss(m, loader).items()))


# ---- evaluation


def finish(acc):
    """(loss per token, bits per byte, tokens) of sums over all ranks. acc: nats, bytes, tokens."""
    rsum(acc)
    nats, nbytes, count = acc.tolist()
    return nats / count, nats / math.log(2.0) / nbytes, int(count)


def eval_val(m, val, dev):
    """The loss on sequences that do not overlap: quick, for the log."""
    L = h.eval_len
    seqs = val.n // L
    a, b = share(seqs)
    per = max(1, h.val_batch_tokens // (L * h.world))
    acc = torch.zeros(3, device=dev, dtype=torch.float64)
    was = m.training
    m.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for i in range(a, b, per):
            j = min(i + per, b)
            t = val.span(i * L, j * L + 1, dev)
            x, y = t[:-1].view(-1, L), t[1:].view(-1, L)
            z = m.logits(x)
            nll = F.cross_entropy(z.reshape(-1, z.size(-1)).float(), y.reshape(-1), reduction="none")
            acc[0] += nll.double().sum()
            acc[1] += val.count_bytes(x.reshape(-1), y.reshape(-1)).sum()
            acc[2] += y.numel()
    m.train(was)
    loss, bpb, _ = finish(acc)
    return loss, bpb


def window_starts(n):
    """Starts of the windows. The first scores all that it holds, every other one its last `eval_stride` positions."""
    ctx = h.eval_len - h.eval_stride
    return [w for w in range(0, n, h.eval_stride) if w == 0 or w + ctx < n]


def scored_from(w):
    return 0 if w == 0 else h.eval_len - h.eval_stride


def window_batch(val, ws, dev):
    """Inputs, targets and lengths of some windows, padded to one shape so that the graph is compiled once."""
    x = torch.zeros(h.eval_batch, h.eval_len, dtype=torch.int64)
    y = torch.zeros(h.eval_batch, h.eval_len, dtype=torch.int64)
    lens = []
    for i, w in enumerate(ws):
        t = val.tok[w : min(w + h.eval_len, val.n) + 1].long()
        x[i, : t.numel() - 1] = t[:-1]
        y[i, : t.numel() - 1] = t[1:]
        lens.append(t.numel() - 1)
    return x.to(dev, non_blocking=True), y.to(dev, non_blocking=True), lens


@torch.no_grad()
def score_windows(fn, val, ws, dev, acc):
    """Adds nats, bytes and tokens of what these windows score to acc."""
    x, y, lens = window_batch(val, ws, dev)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        z = fn(x)
    nll = F.cross_entropy(z.reshape(-1, z.size(-1)).float(), y.reshape(-1), reduction="none").view_as(y)
    for i, w in enumerate(ws):
        s, e = scored_from(w), lens[i]
        acc[0] += nll[i, s:e].double().sum()
        acc[1] += val.count_bytes(x[i, s:e], y[i, s:e]).sum()
        acc[2] += e - s


def eval_val_sliding(m, val, dev):
    m.eval()
    fn = torch.compile(m.logits, dynamic=False, fullgraph=True)
    ws = window_starts(val.n)
    a, b = share(len(ws))
    acc = torch.zeros(3, device=dev, dtype=torch.float64)
    for i in range(a, b, h.eval_batch):
        score_windows(fn, val, ws[i : min(i + h.eval_batch, b)], dev, acc)
        if i > a and ((i - a) // h.eval_batch) % 500 == 0:
            part = acc[0] / math.log(2.0) / acc[1]
            log(f"  sliding {100.0 * (i - a) / (b - a):5.1f}% rank0 bpb:{part.item():.5f}")
    loss, bpb, count = finish(acc)
    if count != val.n:
        raise RuntimeError(f"sliding windows scored {count} of {val.n} tokens")
    return loss, bpb


# ---- test-time training


def chunk_windows(n):
    """The windows of every chunk: those whose scored positions lie in it."""
    parts = [[] for _ in range(-(-n // h.ttt_chunk))]
    for w in window_starts(n):
        parts[(w + scored_from(w)) // h.ttt_chunk].append(w)
    return parts


def chunk_lr(ci, chunks):
    return h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(chunks - 1, 1)))


def adapt(m, opt, val, a, b, dev):
    """Some epochs of SGD on the tokens of [a, b), all of which have been scored. The ranks share the sequences."""
    L = h.eval_len
    seqs = (b - a) // L
    lo, hi = share(seqs)
    rounds = -(-(-(-seqs // h.world)) // h.ttt_seqs)
    ps = [p for g in opt.param_groups for p in g["params"]]
    for _ in range(h.ttt_epochs):
        for r in range(rounds):
            i = lo + r * h.ttt_seqs
            j = min(i + h.ttt_seqs, hi)
            opt.zero_grad(set_to_none=False)
            if i < j:
                t = val.span(a + i * L, a + j * L + 1, dev)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = m(t[:-1].view(-1, L), t[1:].view(-1, L))
                loss.backward()
            for p in ps:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            rmean_([p.grad for p in ps])
            torch.nn.utils.clip_grad_norm_(ps, h.ttt_clip)
            opt.step()


def eval_val_ttt(m, val, dev):
    """Chunk by chunk: its tokens are scored with what came before it, then the model is trained on them."""
    t0 = time.perf_counter()
    m.eval()
    fn = torch.compile(m.logits, dynamic=False, fullgraph=True)
    parts = chunk_windows(val.n)
    opt = torch.optim.SGD(m.parameters(), lr=h.ttt_lr, momentum=h.ttt_momentum)
    acc = torch.zeros(3, device=dev, dtype=torch.float64)
    learning = True
    log(f"ttt: {len(parts)} chunks of {h.ttt_chunk} tokens, lr {h.ttt_lr}, {h.ttt_epochs} epochs")
    for ci, ws in enumerate(parts):
        lo, hi = share(len(ws))
        for i in range(lo, hi, h.eval_batch):
            score_windows(fn, val, ws[i : min(i + h.eval_batch, hi)], dev, acc)
        if ci == len(parts) - 1:
            break
        if learning and agree(time.perf_counter() - t0 > h.ttt_budget_s, dev):
            learning = False
            log(f"ttt: budget spent at chunk {ci}, the rest is scored with the weights as they are")
        if learning:
            for g in opt.param_groups:
                g["lr"] = chunk_lr(ci, len(parts))
            adapt(m, opt, val, ci * h.ttt_chunk, (ci + 1) * h.ttt_chunk, dev)
        if ci % 100 == 0:
            part = acc[0] / math.log(2.0) / acc[1]
            log(f"  ttt chunk {ci}/{len(parts)} rank0 bpb:{part.item():.5f} {time.perf_counter() - t0:.0f}s")
    loss, bpb, count = finish(acc)
    if count != val.n:
        raise RuntimeError(f"ttt scored {count} of {val.n} tokens")
    return loss, bpb


def timed_eval(label, fn, *args):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    loss, bpb = fn(*args)
    torch.cuda.synchronize()
    log(f"{label} val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * (time.perf_counter() - t0):.0f}ms")
    return loss, bpb


# ---- the run


def describe_data(val, dev):
    """Logs what is trained on and what is scored; the bytes are those that the score is divided by."""
    shards = shard_paths(h.train_files)
    log(f"train shards:{len(shards)} tokens:{sum(shard_len(p) for p in shards)}")
    nbytes = torch.zeros((), device=dev, dtype=torch.float64)
    for a in range(0, val.n, 1 << 22):
        t = val.span(a, min(a + (1 << 22), val.n) + 1, dev)
        nbytes += val.count_bytes(t[:-1], t[1:]).sum()
    docs = int((val.tok == h.bos_id).sum())
    log(f"val tokens:{val.n} documents:{docs} bytes:{int(nbytes.item())}")


def write_result(scores, seconds):
    """What goes into submission.json: the last of the scores is the one that is handed in."""
    label, loss, bpb = scores[-1]
    body = dict(
        run_id=h.run_id,
        seed=h.seed,
        evaluation=label,
        val_loss=round(loss, 8),
        val_bpb=round(bpb, 8),
        eval_seconds=round(seconds, 1),
        bytes_total=len(own_code()) + os.path.getsize(h.artifact_path),
    )
    if h.is_main:
        with open(os.path.join(h.log_dir, f"{h.run_id}.json"), "w", encoding="utf-8") as f:
            json.dump(body, f, indent=2)
    log(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f} ({label})")


def train_and_eval(dev):
    seed_all(h.seed)
    val = Val(dev)
    describe_data(val, dev)
    m, hess = train_model(val, dev)
    torch._dynamo.reset()
    if DIAG:
        diagnose(m, dev)
    timed_eval("pre-quantization", eval_val, m, val, dev)
    serialize(m, hess, dev)
    del m, hess
    torch.cuda.empty_cache()
    barrier()
    t0 = time.perf_counter()
    scores = []
    m = deserialize(dev)
    scores.append(("quantized", *timed_eval("quantized", eval_val, m, val, dev)))
    if h.sliding_on:
        torch._dynamo.reset()
        scores.append(("sliding", *timed_eval("quantized_sliding_window", eval_val_sliding, m, val, dev)))
    if h.ttt_on:
        torch._dynamo.reset()
        scores.append(("ttt", *timed_eval("quantized_ttt", eval_val_ttt, m, val, dev)))
    spent = time.perf_counter() - t0
    log(f"evaluation in all: {spent:.1f}s")
    write_result(scores, spent)


def main():
    if not torch.cuda.is_available():
        raise RuntimeError("a GPU is needed")
    if 8 % h.world:
        raise ValueError(f"WORLD_SIZE={h.world} must divide 8")
    dev = setup_ranks()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    if h.is_main:
        os.makedirs(h.log_dir, exist_ok=True)
    barrier()
    log(f"Python {sys.version.split()[0]} PyTorch {torch.__version__} ranks:{h.world}")
    log(f"code sha256:{hashlib.sha256(own_code()).hexdigest()}")
    for k, v in sorted(settings().items()):
        log(f"  {k}: {v}", console=False)
    train_and_eval(dev)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
