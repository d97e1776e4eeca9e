"""
train_gpt.py - 11L/512d banked transformer, parallel Muon, EMA+SWA, GPTQ int6 + lzma,
and an evaluation-time n-gram cache (orders 2..7) that is filled score-first.

Run:  torchrun --standalone --nproc_per_node=8 train_gpt.py

How the evaluation works (everything happens in `evaluate_with_cache`):
  * the validation stream is cut into chunks of CHUNK_TOKENS targets
  * the windows of a chunk are dealt out over the ranks, every target belongs to exactly one window
  * the cache answers with a distribution over the *whole* vocabulary, which is blended with the softmax
  * only when all ranks are through with the chunk do its tokens enter the tables (the same on every rank)
"""
from __future__ import annotations

import copy
import glob
import io
import lzma
import math
import os
import random
import sys
import time
import uuid
from pathlib import Path
from typing import Iterator

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def env(name: str, default):
    """Setting from the environment, cast to the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return bool(int(raw))
    return type(default)(raw)


class Hyperparameters:
    # data
    data_path = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = env("RUN_ID", str(uuid.uuid4()))
    seed = env("SEED", 1337)

    # schedule
    iterations = env("ITERATIONS", 20000)
    warmdown_iters = env("WARMDOWN_ITERS", 3500)
    warmup_steps = env("WARMUP_STEPS", 20)
    train_batch_tokens = env("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds = env("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env("GPTQ_RESERVE_SECONDS", 48.0)
    val_loss_every = env("VAL_LOSS_EVERY", 4000)
    val_batch_size = env("VAL_BATCH_SIZE", 524_288)
    train_log_every = env("TRAIN_LOG_EVERY", 500)

    # model
    vocab_size = env("VOCAB_SIZE", 1024)
    num_layers = env("NUM_LAYERS", 11)
    model_dim = env("MODEL_DIM", 512)
    num_heads = env("NUM_HEADS", 8)
    num_kv_heads = env("NUM_KV_HEADS", 4)
    mlp_mult = env("MLP_MULT", 3)
    rope_base = env("ROPE_BASE", 10000.0)
    rope_dims = env("ROPE_DIMS", 16)
    logit_softcap = env("LOGIT_SOFTCAP", 30.0)
    bigram_buckets = env("BIGRAM_BUCKETS", 1536)
    bigram_dim = env("BIGRAM_DIM", 128)
    xsa_last_n = env("XSA_LAST_N", 4)
    bos_id = env("BOS_ID", 1)

    # optimizer
    matrix_lr = env("MATRIX_LR", 0.025)
    scalar_lr = env("SCALAR_LR", 0.025)
    embed_lr = env("EMBED_LR", 0.035)
    muon_momentum = env("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env("MUON_MOMENTUM_STEPS", 1500)
    muon_backend_steps = env("MUON_BACKEND_STEPS", 5)
    muon_wd = env("MUON_WD", 0.04)
    adam_wd = env("ADAM_WD", 0.04)
    beta1 = env("BETA1", 0.9)
    beta2 = env("BETA2", 0.95)
    grad_clip = env("GRAD_CLIP", 0.3)

    # averaging
    ema_decay = env("EMA_DECAY", 0.997)
    swa_start_scale = env("SWA_START_SCALE", 0.2)
    swa_every = env("SWA_EVERY", 50)
    swa_mix = env("SWA_MIX", 0.5)

    # quantisation
    calib_batches = env("CALIB_BATCHES", 32)
    calib_seqs = env("CALIB_SEQS", 16)
    gptq_block = env("GPTQ_BLOCK", 128)
    gptq_damp = env("GPTQ_DAMP", 0.01)
    artifact_path = env("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit = 16_000_000

    # evaluation
    eval_stride = env("EVAL_STRIDE", 64)
    eval_seq_len = env("EVAL_SEQ_LEN", 2048)
    eval_batch_windows = env("EVAL_BATCH_WINDOWS", 64)
    chunk_tokens = env("CHUNK_TOKENS", 262_144)
    logit_temp = env("LOGIT_TEMP", 1.0)
    eval_limit_seconds = env("EVAL_LIMIT_SECONDS", 600.0)

    # n-gram cache
    ngram_enabled = env("NGRAM_ENABLED", True)
    ngram_min_order = env("NGRAM_MIN_ORDER", 2)
    ngram_max_order = env("NGRAM_MAX_ORDER", 7)
    ngram_rows_log2 = env("NGRAM_ROWS_LOG2", 19)
    ngram_min_count = env("NGRAM_MIN_COUNT", 2)
    ngram_weight = env("NGRAM_WEIGHT", 0.45)
    ngram_entropy_mid = env("NGRAM_ENTROPY_MID", 2.6)
    ngram_entropy_slope = env("NGRAM_ENTROPY_SLOPE", 1.4)
    ngram_count_half = env("NGRAM_COUNT_HALF", 6.0)

    # adaptation of the control tensors on chunks that are already scored
    adapt_enabled = env("ADAPT_ENABLED", True)
    adapt_lr = env("ADAPT_LR", 2e-3)
    adapt_momentum = env("ADAPT_MOMENTUM", 0.9)
    adapt_batch_seqs = env("ADAPT_BATCH_SEQS", 8)


# ---------------------------------------------------------------------------
# small helpers: process group, log file, progress line
# ---------------------------------------------------------------------------


class Comm:
    """What we need to know about the process group, with no-ops for a single process."""

    def __init__(self) -> None:
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = env("RANK", 0)
        self.world = env("WORLD_SIZE", 1)
        self.local_rank = env("LOCAL_RANK", 0)
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def master(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def sum_(self, t: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)
        return t

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class Logger:
    def __init__(self, comm: Comm, run_id: str) -> None:
        self.master = comm.master
        self.path = None
        if self.master:
            os.makedirs("logs", exist_ok=True)
            self.path = Path("logs") / f"{run_id}.txt"

    def __call__(self, msg: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(msg, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(msg, file=f)


class Progress:
    """A poor man's tqdm: one line now and then, so that the log stays readable."""

    def __init__(self, total: int, desc: str, log: Logger, every: int = 24) -> None:
        self.total, self.desc, self.log, self.every = total, desc, log, every
        self.n = 0
        self.t0 = time.perf_counter()

    def update(self, **stats: float) -> None:
        self.n += 1
        if self.n % self.every and self.n != self.total:
            return
        took = time.perf_counter() - self.t0
        filled = int(20 * self.n / max(self.total, 1))
        bar = "#" * filled + "." * (20 - filled)
        tail = " ".join(f"{k}={v:.5f}" for k, v in stats.items())
        eta = took / self.n * (self.total - self.n)
        self.log(f"{self.desc} [{bar}] {self.n}/{self.total} {took:.1f}s eta:{eta:.1f}s {tail}")


# ---------------------------------------------------------------------------
# Muon over banks: one 3-D parameter per kind of matrix, its slices shared out over the ranks
# ---------------------------------------------------------------------------


@torch.compile
def newton_schulz(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Orthogonalises every matrix of a batch (quintic iteration of Keller Jordan)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16()
    flip = X.size(-2) > X.size(-1)
    if flip:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X.mT if flip else X


class ParallelMuon(torch.optim.Optimizer):
    """reduce-scatter the gradient of a bank, orthogonalise the own slices, all-gather the update."""

    def __init__(self, banks: list[nn.Parameter], lr: float, momentum: float, backend_steps: int, wd: float, comm: Comm):
        super().__init__(banks, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, wd=wd))
        self.comm = comm

    def _buffers(self, p: nn.Parameter) -> dict:
        state = self.state[p]
        if not state:
            world = self.comm.world
            per = -(-p.shape[0] // world)
            tail = p.shape[1:]
            state["padded"] = torch.zeros((per * world, *tail), device=p.device, dtype=torch.bfloat16)
            state["shard"] = torch.zeros((per, *tail), device=p.device, dtype=torch.bfloat16)
            state["full"] = torch.zeros((per * world, *tail), device=p.device, dtype=torch.bfloat16)
            state["mom"] = torch.zeros((per, *tail), device=p.device, dtype=torch.float32)
        return state

    def start_reduce(self) -> None:
        """Queue the reduce-scatters, the biggest bank first, so that they overlap with Adam's small all-reduces."""
        for group in self.param_groups:
            for p in sorted(group["params"], key=lambda q: -q.numel()):
                state = self._buffers(p)
                state["padded"][: p.shape[0]].copy_(p.grad)
                if self.comm.distributed:
                    state["handle"] = dist.reduce_scatter_tensor(
                        state["shard"], state["padded"], op=dist.ReduceOp.AVG, async_op=True
                    )
                else:
                    state["shard"].copy_(state["padded"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            gathers = []
            for p in sorted(group["params"], key=lambda q: -q.numel()):
                state = self._buffers(p)
                if self.comm.distributed:
                    state.pop("handle").wait()
                g = state["shard"].float()
                state["mom"].mul_(group["momentum"]).add_(g)
                g = g.add(state["mom"], alpha=group["momentum"])
                update = newton_schulz(g, steps=group["backend_steps"])
                if self.comm.distributed:
                    handle = dist.all_gather_into_tensor(state["full"], update.contiguous(), async_op=True)
                    gathers.append((p, state, handle))
                else:
                    state["full"].copy_(update)
                    gathers.append((p, state, None))
            for p, state, handle in gathers:
                if handle is not None:
                    handle.wait()
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1.0 - group["lr"] * group["wd"])
                p.add_(state["full"][: p.shape[0]].to(p.dtype), alpha=-group["lr"] * scale)


# ---------------------------------------------------------------------------
# bytes of a token, shards
# ---------------------------------------------------------------------------


class ByteTable:
    """UTF-8 bytes per token. A leading space (the mark of sentencepiece) counts one byte unless a control
    token stands before it, because sentencepiece drops it there."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> None:
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros((size,), dtype=np.int16)
        space = np.zeros((size,), dtype=np.bool_)
        boundary = np.ones((size,), dtype=np.bool_)
        for tid in range(int(sp.vocab_size())):
            if sp.is_control(tid) or sp.is_unknown(tid) or sp.is_unused(tid):
                continue
            boundary[tid] = False
            if sp.is_byte(tid):
                base[tid] = 1
                continue
            piece = sp.id_to_piece(tid)
            if piece.startswith("\u2581"):
                space[tid] = True
                piece = piece[1:]
            base[tid] = len(piece.encode("utf-8"))
        self.base = torch.from_numpy(base).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.boundary = torch.from_numpy(boundary).to(device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.base[target].to(torch.int32)
        n = n + (self.space[target] & ~self.boundary[prev]).to(torch.int32)
        return n.to(torch.float64)


def load_shard(path: str | Path) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"bad shard header: {path}")
    n = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=n, offset=256 * 4)
    if tokens.size != n:
        raise ValueError(f"short shard: {path}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation(pattern: str) -> Tensor:
    """The whole validation split, in the order of its shards."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(pattern)
    return torch.cat([load_shard(f) for f in files]).contiguous()


class TokenStream:
    """Endless stream over the train shards."""

    def __init__(self, pattern: str) -> None:
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(pattern)
        self.i = 0
        self.pos = 0
        self.tokens = load_shard(self.files[0])

    def _next_file(self) -> None:
        self.i = (self.i + 1) % len(self.files)
        self.tokens = load_shard(self.files[self.i])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self._next_file()
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Every rank reads the same stream and keeps its own span of it."""

    def __init__(self, pattern: str, comm: Comm) -> None:
        self.stream = TokenStream(pattern)
        self.comm = comm

    def next_batch(self, global_tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        per_rank = global_tokens // self.comm.world // seq_len * seq_len
        span = self.stream.take(per_rank * self.comm.world + 1)
        start = self.comm.rank * per_rank
        local = span[start : start + per_rank + 1].to(torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.comm.device, non_blocking=True), y.to(self.comm.device, non_blocking=True)


# ---------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Partial rotary embedding: only the first `dims` of a head are turned."""

    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv, persistent=False)
        self._len = 0
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def tables(self, n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._len < n or self._cos.device != device:
            t = torch.arange(n, device=device, dtype=torch.float32)
            f = torch.outer(t, self.inv_freq.to(device))
            self._cos, self._sin = f.cos()[None, :, None, :], f.sin()[None, :, None, :]
            self._len = n
        return self._cos[:, :n].to(dtype), self._sin[:, :n].to(dtype)

    def apply_to(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = self.dims // 2
        a, b, rest = x[..., :half], x[..., half : self.dims], x[..., self.dims :]
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class BigramHash(nn.Module):
    """Embedding of the hashed pair (previous token, token); at a document's start the pair is empty."""

    def __init__(self, buckets: int, dim: int, model_dim: int, bos_id: int) -> None:
        super().__init__()
        self.buckets, self.bos_id = buckets, bos_id
        self.embed = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = nn.Parameter(torch.randn(model_dim, dim) * 0.02)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0), value=self.bos_id)
        prev = torch.where(ids == self.bos_id, torch.zeros_like(prev), prev)
        h = (prev * 36313 ^ ids * 27191) % (self.buckets - 1)
        return F.linear(self.embed(h), self.proj.to(self.embed.weight.dtype)) * self.scale


class SmearGate(nn.Module):
    """x_t += gate * x_{t-1}, shut where a document begins."""

    def __init__(self, dim: int, bos_id: int) -> None:
        super().__init__()
        self.bos_id = bos_id
        self.gate = nn.Parameter(torch.full((dim,), -3.0))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        back = F.pad(x[:, :-1], (0, 0, 1, 0))
        keep = (ids != self.bos_id).to(x.dtype)[..., None]
        return x + torch.sigmoid(self.gate).to(x.dtype) * back * keep


class HessianRecorder:
    """Sums x x^T of what goes into each matrix while calibration batches run."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        h = flat.T @ flat
        if name in self.sums:
            self.sums[name] += h
        else:
            self.sums[name] = h
        self.rows[name] = self.rows.get(name, 0) + flat.shape[0]

    def finish(self, comm: Comm) -> dict[str, Tensor]:
        out = {}
        for name in sorted(self.sums):
            n = torch.tensor(float(self.rows[name]), device=comm.device)
            out[name] = comm.sum_(self.sums[name]) / comm.sum_(n)
        return out


class Block(nn.Module):
    """Norm scales, gains and mixes of one layer; its matrices live in the banks of GPT."""

    def __init__(self, a: type[Hyperparameters], layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = a.num_heads, a.num_kv_heads
        self.head_dim = a.model_dim // a.num_heads
        self.q_gain = nn.Parameter(torch.full((a.num_heads,), 1.5))
        self.attn_scale = nn.Parameter(torch.ones(a.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(a.model_dim))
        self.resid_mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.ln_factor = 1.0 / math.sqrt(layer + 1)
        self.xsa = layer >= a.num_layers - a.xsa_last_n
        self.rotary = Rotary(a.rope_dims, a.rope_base)

    def attention(self, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, rec: HessianRecorder | None) -> Tensor:
        B, T, D = x.shape
        if rec is not None:
            rec.add(f"qkv.{self.layer}", x)
        q = F.linear(x, wq).view(B, T, self.heads, self.head_dim)
        k = F.linear(x, wk).view(B, T, self.kv_heads, self.head_dim)
        v = F.linear(x, wv).view(B, T, self.kv_heads, self.head_dim)
        cos, sin = self.rotary.tables(T, x.device, x.dtype)
        q = self.rotary.apply_to(rms(q), cos, sin) * self.q_gain.to(x.dtype)[None, None, :, None]
        k = self.rotary.apply_to(rms(k), cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.xsa:
            # take out what points along the position's own value
            g = self.heads // self.kv_heads
            yg = y.reshape(B, T, self.kv_heads, g, self.head_dim)
            vn = F.normalize(v, dim=-1)[:, :, :, None, :]
            y = (yg - (yg * vn).sum(-1, keepdim=True) * vn).reshape(B, T, self.heads, self.head_dim)
        y = y.reshape(B, T, D)
        if rec is not None:
            rec.add(f"out.{self.layer}", y)
        return F.linear(y, wo)

    def mlp(self, x: Tensor, up: Tensor, down: Tensor, rec: HessianRecorder | None) -> Tensor:
        if rec is not None:
            rec.add(f"up.{self.layer}", x)
        h = F.leaky_relu(F.linear(x, up), 0.5).square()
        if rec is not None:
            rec.add(f"down.{self.layer}", h)
        return F.linear(h, down)

    def forward(self, x: Tensor, x0: Tensor, w: tuple[Tensor, ...], rec: HessianRecorder | None) -> Tensor:
        wq, wk, wv, wo, up, down = w
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attention(rms(x) * self.ln_factor, wq, wk, wv, wo, rec)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.ln_factor, up, down, rec)


class GPT(nn.Module):
    def __init__(self, a: type[Hyperparameters]) -> None:
        super().__init__()
        L, D = a.num_layers, a.model_dim
        kv = D // a.num_heads * a.num_kv_heads
        hidden = D * a.mlp_mult
        self.num_layers = L
        self.softcap = a.logit_softcap
        self.tok_emb = nn.Embedding(a.vocab_size, D)
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        self.bigram = BigramHash(a.bigram_buckets, a.bigram_dim, D, a.bos_id)
        self.smear = SmearGate(D, a.bos_id)
        self.qo_bank = nn.Parameter(torch.empty(2 * L, D, D))
        self.kv_bank = nn.Parameter(torch.empty(2 * L, kv, D))
        self.up_bank = nn.Parameter(torch.empty(L, hidden, D))
        self.down_bank = nn.Parameter(torch.empty(L, D, hidden))
        self.blocks = nn.ModuleList([Block(a, i) for i in range(L)])
        self.enc = L // 2
        self.skip_weights = nn.Parameter(torch.ones(min(self.enc, L - self.enc), D))
        self.recorder: HessianRecorder | None = None
        self._init_banks()

    def _init_banks(self) -> None:
        L = self.num_layers
        for bank in (self.qo_bank, self.kv_bank, self.up_bank):
            for m in bank.data:
                nn.init.orthogonal_(m)
        self.qo_bank.data[L:].zero_()  # output projections start at zero
        self.down_bank.data.zero_()

    def banks(self) -> list[nn.Parameter]:
        return [self.qo_bank, self.kv_bank, self.up_bank, self.down_bank]

    def layer_weights(self, i: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        L = self.num_layers
        mats = (self.qo_bank[i], self.kv_bank[i], self.kv_bank[L + i], self.qo_bank[L + i], self.up_bank[i], self.down_bank[i])
        return tuple(m.to(dtype) for m in mats)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.bigram(ids)
        x = rms(x.to(torch.bfloat16))
        x = self.smear(x, ids)
        x0 = x
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.enc and skips:
                x = x + self.skip_weights[i - self.enc].to(x.dtype) * skips.pop()
            x = block(x, x0, self.layer_weights(i, x.dtype), self.recorder)
            if i < self.enc:
                skips.append(x)
        return rms(x)

    def head(self, h: Tensor) -> Tensor:
        z = F.linear(h, self.tok_emb.weight.to(h.dtype)).float()
        return self.softcap * torch.tanh(z / self.softcap)

    def logits_at(self, ids: Tensor, pos: Tensor) -> Tensor:
        """Logits (B, S, V) at the positions pos (B, S) of each row."""
        h = self.hidden(ids)
        return self.head(h.gather(1, pos[..., None].expand(-1, -1, h.size(-1))))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        z = self.head(self.hidden(ids))
        return F.cross_entropy(z.reshape(-1, z.size(-1)), targets.reshape(-1))


def build_model(a: type[Hyperparameters], device: torch.device) -> GPT:
    model = GPT(a).to(device)
    model.tok_emb.to(torch.bfloat16)
    model.bigram.embed.to(torch.bfloat16)
    return model


# ---------------------------------------------------------------------------
# averaging of weights
# ---------------------------------------------------------------------------


class Averager:
    """EMA over every step plus an equal-weight average of snapshots late in the warmdown."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.ema = {k: v.detach().float().clone() for k, v in model.state_dict().items()}
        self.swa: dict[str, Tensor] | None = None
        self.swa_n = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.ema[k].lerp_(v.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def snapshot(self, model: nn.Module) -> None:
        state = model.state_dict()
        if self.swa is None:
            self.swa = {k: torch.zeros_like(v, dtype=torch.float32) for k, v in state.items()}
        for k, v in state.items():
            self.swa[k] += v.detach().float()
        self.swa_n += 1

    def result(self, mix: float) -> dict[str, Tensor]:
        if self.swa is None:
            return self.ema
        return {k: torch.lerp(self.ema[k], self.swa[k] / self.swa_n, mix) for k in self.ema}


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, strict=True)


# ---------------------------------------------------------------------------
# validation during training (plain, not overlapping), for the log
# ---------------------------------------------------------------------------


def eval_val(a, model: nn.Module, val: Tensor, bytes_of: ByteTable, comm: Comm) -> tuple[float, float]:
    seq = a.train_seq_len
    total = (val.numel() - 1) // seq
    lo, hi = total * comm.rank // comm.world, total * (comm.rank + 1) // comm.world
    per = max(1, a.val_batch_size // comm.world // seq)
    acc = torch.zeros(3, device=comm.device, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for s in range(lo, hi, per):
            e = min(s + per, hi)
            span = val[s * seq : e * seq + 1].to(comm.device, torch.int64)
            x, y = span[:-1].reshape(-1, seq), span[1:].reshape(-1, seq)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            acc[0] += loss.double() * y.numel()
            acc[1] += y.numel()
            acc[2] += bytes_of.count(x.reshape(-1), y.reshape(-1)).sum()
    comm.sum_(acc)
    model.train()
    return (acc[0] / acc[1]).item(), (acc[0] / math.log(2.0) / acc[2]).item()


# ---------------------------------------------------------------------------
# quantisation: GPTQ to int6 for the banks, int8 rows for the embeddings, float16 for the rest
# ---------------------------------------------------------------------------


def bank_entries(a) -> Iterator[tuple[str, int, str]]:
    """(bank, index, name of the Hessian) of every matrix."""
    L = a.num_layers
    for i in range(L):
        yield "qo_bank", i, f"qkv.{i}"
        yield "kv_bank", i, f"qkv.{i}"
        yield "kv_bank", L + i, f"qkv.{i}"
        yield "qo_bank", L + i, f"out.{i}"
        yield "up_bank", i, f"up.{i}"
        yield "down_bank", i, f"down.{i}"


@torch.no_grad()
def collect_hessians(a, model: GPT, loader: TrainLoader, comm: Comm) -> dict[str, Tensor]:
    """Input covariances of all matrices over batches of the training stream."""
    model.recorder = HessianRecorder()
    model.eval()
    for _ in range(a.calib_batches):
        x, _ = loader.next_batch(a.calib_seqs * a.train_seq_len * comm.world, a.train_seq_len)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model.hidden(x)
    hessians = model.recorder.finish(comm)
    model.recorder = None
    return hessians


def row_scales(w: Tensor, top: int) -> Tensor:
    """Scale per row: the clipping quantile with the least squared error."""
    best_err, best = None, None
    for q in (1.0, 0.9999, 0.9995, 0.999, 0.998):
        amax = torch.quantile(w.abs(), q, dim=1) if q < 1.0 else w.abs().amax(dim=1)
        s = (amax / top).clamp_min(1e-8).half().float()
        err = (w - (w / s[:, None]).round().clamp(-top, top) * s[:, None]).square().sum(1)
        if best is None:
            best_err, best = err, s
        else:
            better = err < best_err
            best_err, best = torch.where(better, err, best_err), torch.where(better, s, best)
    return best


@torch.no_grad()
def gptq(w: Tensor, H: Tensor, top: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """Rounds column by column and pushes each column's error on to the columns that are still to come."""
    W = w.detach().float().clone()
    cols = W.shape[1]
    H = H.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    H.diagonal().add_(damp * H.diagonal().mean())
    order = torch.argsort(H.diagonal(), descending=True)
    W, H = W[:, order], H[order][:, order]
    s = row_scales(W, top)
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.zeros_like(W)
    for i in range(0, cols, block):
        j = min(i + block, cols)
        Wb, Eb, Hb = W[:, i:j].clone(), torch.zeros_like(W[:, i:j]), Hinv[i:j, i:j]
        for c in range(j - i):
            col = Wb[:, c]
            qc = (col / s).round().clamp(-top, top)
            Q[:, i + c] = qc
            e = (col - qc * s) / Hb[c, c]
            Wb[:, c:] -= e[:, None] * Hb[c, c:][None, :]
            Eb[:, c] = e
        W[:, j:] -= Eb @ Hinv[i:j, j:]
    return Q[:, torch.argsort(order)].to(torch.int8), s.half()


def quantise_model(a, model: GPT, hessians: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    packed: dict[str, dict[str, Tensor]] = {}
    state = model.state_dict()
    for bank in ("qo_bank", "kv_bank", "up_bank", "down_bank"):
        w = state[bank]
        packed[bank] = {
            "q": torch.zeros(w.shape, dtype=torch.int8),
            "s": torch.zeros(w.shape[:2], dtype=torch.float16),
        }
    for bank, idx, hname in bank_entries(a):
        q, s = gptq(state[bank][idx], hessians[hname], 31, a.gptq_block, a.gptq_damp)
        packed[bank]["q"][idx] = q.cpu()
        packed[bank]["s"][idx] = s.cpu()
    for name, t in state.items():
        if name in packed:
            continue
        if t.ndim == 2 and t.numel() > 16_384:
            w = t.float()
            s = row_scales(w, 127)
            q = (w / s[:, None]).round().clamp(-127, 127).to(torch.int8)
            packed[name] = {"q": q.cpu(), "s": s.half().cpu()}
        else:
            packed[name] = {"t": t.half().cpu()}
    return packed


def pack(packed: dict[str, dict[str, Tensor]]) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    return lzma.compress(buf.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def unpack(blob: bytes) -> dict[str, Tensor]:
    packed = torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu")
    out = {}
    for name, entry in packed.items():
        if "t" in entry:
            out[name] = entry["t"].float()
        else:
            out[name] = entry["q"].float() * entry["s"].float()[..., None]
    return out


def write_artifact(a, blob: bytes, log: Logger) -> int:
    """Writes the model and prints the counted size: this file plus the compressed model."""
    with open(a.artifact_path, "wb") as f:
        f.write(blob)
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + len(blob)
    log(f"Serialized model int6+lzma: {len(blob)} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size: {total} bytes")
    if total > a.size_limit:
        raise RuntimeError(f"over the size limit: {total} > {a.size_limit}")
    return total


# ---------------------------------------------------------------------------
# n-gram cache
# ---------------------------------------------------------------------------


class HashedOrder:
    """Counts of one order. A row of the table belongs to the first context that hashes to it and holds a count
    for every token of the vocabulary, so that a row divided by its sum is a distribution."""

    def __init__(self, order: int, rows_log2: int, vocab: int, device: torch.device) -> None:
        self.order = order
        self.vocab = vocab
        self.mask = (1 << rows_log2) - 1
        self.counts = torch.zeros((1 << rows_log2, vocab), dtype=torch.int32, device=device)
        self.owner = torch.zeros((1 << rows_log2,), dtype=torch.int64, device=device)

    def row_of(self, key: Tensor) -> Tensor:
        return (key >> 11) & self.mask

    def lookup(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (n, V) of all continuations and their sums (n,); zeros where the context is unknown."""
        row = self.row_of(key)
        hit = (key > 0) & (self.owner[row] == key)
        counts = self.counts[row].float() * hit[:, None]
        return counts, counts.sum(dim=-1)

    def add(self, key: Tensor, token: Tensor) -> None:
        known = key > 0
        key, token = key[known], token[known]
        row = self.row_of(key)
        # free rows go to the smallest key that asks for them: the same answer on every rank
        top = torch.iinfo(torch.int64).max
        claim = torch.full_like(self.owner, top).scatter_reduce_(0, row, key, reduce="amin")
        free = (self.owner == 0) & (claim < top)
        self.owner = torch.where(free, claim, self.owner)
        mine = self.owner[row] == key
        cell = row[mine] * self.vocab + token[mine]
        self.counts.view(-1).index_add_(0, cell, torch.ones_like(cell, dtype=torch.int32))


class NgramCache:
    """Backoff over orders max..min. All the questions it is asked are of the kind "given the tokens before t"."""

    PRIME = 6364136223846793005
    BITS = (1 << 62) - 1

    def __init__(self, a, device: torch.device) -> None:
        self.a = a
        self.device = device
        self.vocab = a.vocab_size
        self.orders = [
            HashedOrder(n, a.ngram_rows_log2, a.vocab_size, device)
            for n in range(a.ngram_max_order, a.ngram_min_order - 1, -1)
        ]
        self.filled_to = 1  # targets below this position are in the tables

    def context_key(self, tokens: Tensor, t: Tensor, order: int) -> Tensor:
        """Hash of the order-1 tokens before position t; 0 where there are not so many within the document."""
        key = torch.full_like(t, order)
        valid = t >= order - 1
        for back in range(1, order):
            tok = tokens[(t - back).clamp_min(0)].to(torch.int64)
            if back < order - 1:
                valid = valid & (tok != self.a.bos_id)
            key = (key ^ (tok + 1)) * self.PRIME
            key = (key ^ (key >> 29)) & self.BITS
        return torch.where(valid, key | 1, torch.zeros_like(key))

    def predict(self, tokens: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution (n, V) of the highest order whose context has been seen often enough, and that context's
        count (n,). Where no order has one the count is 0 and the row is uniform."""
        probs = torch.full((t.numel(), self.vocab), 1.0 / self.vocab, device=self.device)
        seen = torch.zeros(t.numel(), device=self.device)
        open_ = torch.ones(t.numel(), dtype=torch.bool, device=self.device)
        for table in self.orders:
            counts, total = table.lookup(self.context_key(tokens, t, table.order))
            use = open_ & (total >= self.a.ngram_min_count)
            probs = torch.where(use[:, None], counts / total.clamp_min(1.0)[:, None], probs)
            seen = torch.where(use, total, seen)
            open_ = open_ & ~use
        return probs, seen

    def weight(self, entropy: Tensor, seen: Tensor) -> Tensor:
        """Share of the n-gram distribution: more where the model is unsure and the context is well known."""
        a = self.a
        unsure = torch.sigmoid(a.ngram_entropy_slope * (entropy - a.ngram_entropy_mid))
        return a.ngram_weight * unsure * seen / (seen + a.ngram_count_half)

    def blend(self, logits: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """Full distribution (n, V) for the positions t."""
        logp = F.log_softmax(logits, dim=-1)
        p = logp.exp()
        entropy = -(p * logp).sum(dim=-1)
        q, seen = self.predict(tokens, t)
        lam = self.weight(entropy, seen)[:, None]
        return (1.0 - lam) * p + lam * q

    def fill(self, tokens: Tensor, start: int, end: int) -> None:
        """Enters the targets start..end-1, which must have been scored and must follow what is there."""
        if start != self.filled_to:
            raise RuntimeError(f"cache is filled to {self.filled_to}, asked to go on at {start}")
        t = torch.arange(start, end, device=self.device)
        token = tokens[start:end].to(torch.int64)
        for table in self.orders:
            table.add(self.context_key(tokens, t, table.order), token)
        self.filled_to = end


# ---------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------


class WindowBatch:
    """Some windows of a chunk as tensors: inputs, places of the scored targets in them, and those targets."""

    def __init__(self, a, tokens: Tensor, starts: list[int], chunk_end: int) -> None:
        device = tokens.device
        seq, stride = a.eval_seq_len, a.eval_stride
        first = torch.tensor(starts, device=device)
        last = (first + stride).clamp_max(chunk_end)  # one behind the last target
        begin = (last - 1 - seq).clamp_min(0)
        cols = torch.arange(seq, device=device)[None, :]
        index = begin[:, None] + cols
        inside = index < (last - 1)[:, None]
        self.x = torch.where(inside, tokens[index.clamp_max(tokens.numel() - 1)].to(torch.int64), torch.zeros_like(index))
        target_pos = first[:, None] + torch.arange(stride, device=device)[None, :]
        self.real = target_pos < last[:, None]
        target_pos = torch.minimum(target_pos, (last - 1)[:, None])
        self.pos = target_pos - 1 - begin[:, None]
        self.t = target_pos[self.real]
        self.y = tokens[self.t].to(torch.int64)
        self.prev = tokens[self.t - 1].to(torch.int64)


class Adapter:
    """A little SGD on norm scales and gains, on chunks whose losses are already booked."""

    def __init__(self, a, model: GPT, comm: Comm) -> None:
        self.a, self.model, self.comm = a, model, comm
        self.params = [p for n, p in model.named_parameters() if p.ndim <= 1 and "embed" not in n]
        for p in model.parameters():
            p.requires_grad_(False)
        for p in self.params:
            p.requires_grad_(True)
        self.opt = torch.optim.SGD(self.params, lr=a.adapt_lr, momentum=a.adapt_momentum)

    def learn(self, tokens: Tensor, start: int, end: int, frac: float) -> None:
        a, comm = self.a, self.comm
        seq = a.eval_seq_len
        for group in self.opt.param_groups:
            group["lr"] = a.adapt_lr * 0.5 * (1.0 + math.cos(math.pi * frac))
        n_seq = (end - start) // seq
        per_step = a.adapt_batch_seqs * comm.world
        for s in range(0, n_seq // per_step * per_step, per_step):
            base = start - 1 + (s + comm.rank * a.adapt_batch_seqs) * seq
            span = tokens[base : base + a.adapt_batch_seqs * seq + 1].to(torch.int64)
            x, y = span[:-1].view(-1, seq), span[1:].view(-1, seq)
            self.opt.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.model(x, y)
            loss.backward()
            for p in self.params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                comm.mean_(p.grad)
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.opt.step()


def score_chunk(
    a,
    logits_fn,
    cache: NgramCache | None,
    tokens: Tensor,
    start: int,
    end: int,
    bytes_of: ByteTable,
    comm: Comm,
    acc: Tensor,
) -> float:
    """Adds nats, tokens and bytes of this rank's windows to acc; returns the worst |sum of a distribution - 1|."""
    starts = list(range(start, end, a.eval_stride))
    mine = starts[comm.rank :: comm.world]
    worst = 0.0
    with torch.no_grad():
        for i in range(0, len(mine), a.eval_batch_windows):
            batch = WindowBatch(a, tokens, mine[i : i + a.eval_batch_windows], end)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = logits_fn(batch.x, batch.pos)
            logits = logits.float()[batch.real] / a.logit_temp
            if cache is not None:
                probs = cache.blend(logits, tokens, batch.t)
                nll = -probs.gather(1, batch.y[:, None]).squeeze(1).clamp_min(1e-30).log()
                if i == 0:
                    worst = (probs.double().sum(-1) - 1.0).abs().max().item()
            else:
                nll = F.cross_entropy(logits, batch.y, reduction="none")
            acc[0] += nll.double().sum()
            acc[1] += batch.y.numel()
            acc[2] += bytes_of.count(batch.prev, batch.y).sum()
    return worst


def evaluate_with_cache(
    a, model: GPT, val: Tensor, bytes_of: ByteTable, comm: Comm, log: Logger
) -> tuple[float, float, int, int]:
    """One pass from left to right: score a chunk, then let the cache and the adapter see it."""
    tokens = val.to(comm.device, torch.int32)
    model.eval()
    logits_fn = torch.compile(model.logits_at, dynamic=False)
    cache = NgramCache(a, comm.device) if a.ngram_enabled else None
    adapter = Adapter(a, model, comm) if a.adapt_enabled else None
    acc = torch.zeros(3, device=comm.device, dtype=torch.float64)
    edges = list(range(1, tokens.numel(), a.chunk_tokens)) + [tokens.numel()]
    bar = Progress(len(edges) - 1, "eval", log)
    for c, (start, end) in enumerate(zip(edges[:-1], edges[1:])):
        worst = score_chunk(a, logits_fn, cache, tokens, start, end, bytes_of, comm, acc)
        if worst > 1e-3:
            raise RuntimeError(f"chunk {c}: a distribution sums to 1 {worst:+.2e}")
        comm.barrier()
        if end < tokens.numel():
            if cache is not None:
                cache.fill(tokens, start, end)
            if adapter is not None:
                adapter.learn(tokens, start, end, c / max(len(edges) - 2, 1))
        bar.update(loss=(acc[0] / acc[1]).item(), off=worst)
    comm.sum_(acc)
    n_tokens, n_bytes = int(acc[1].item()), int(acc[2].item())
    if n_tokens != tokens.numel() - 1:
        raise RuntimeError(f"scored {n_tokens} of {tokens.numel() - 1} targets")
    loss = (acc[0] / acc[1]).item()
    bpb = (acc[0] / math.log(2.0) / acc[2]).item()
    return loss, bpb, n_tokens, n_bytes


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


class Trainer:
    def __init__(self, a, model: GPT, comm: Comm, log: Logger) -> None:
        self.a, self.model, self.comm, self.log = a, model, comm, log
        self.compiled = torch.compile(model, dynamic=False, fullgraph=True)
        self.averager: Averager | None = None
        self.make_optimizers()

    def make_optimizers(self) -> None:
        a, model = self.a, self.model
        banks = model.banks()
        ids = {id(p) for p in banks}
        embeds = [model.tok_emb.weight, model.bigram.embed.weight]
        ids |= {id(p) for p in embeds}
        rest = [p for p in model.parameters() if id(p) not in ids]
        self.muon = ParallelMuon(
            banks, a.matrix_lr, a.muon_momentum, a.muon_backend_steps, a.muon_wd, self.comm
        )
        self.adam = torch.optim.AdamW(
            [
                {"params": embeds, "lr": a.embed_lr, "weight_decay": a.adam_wd},
                {"params": rest, "lr": a.scalar_lr, "weight_decay": 0.0},
            ],
            betas=(a.beta1, a.beta2),
            eps=1e-8,
            fused=True,
        )
        self.replicated = embeds + rest
        for opt in (self.muon, self.adam):
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def lr_scale(self, step: int, elapsed: float) -> float:
        """Constant, then linear warmdown. With a time cap the warmdown is placed by the measured step time."""
        a = self.a
        budget = a.max_wallclock_seconds - a.gptq_reserve_seconds
        if budget <= 0:
            start = a.iterations - a.warmdown_iters
            return 1.0 if step < start else max(0.0, (a.iterations - step) / a.warmdown_iters)
        per_step = elapsed / max(step, 1)
        span = a.warmdown_iters * per_step
        left = max(budget - elapsed, 0.0)
        return left / max(span, 1e-9) if left <= span else 1.0

    def train_step(self, x: Tensor, y: Tensor, scale: float, step: int) -> Tensor:
        a = self.a
        frac = min(step / a.muon_momentum_steps, 1.0) if a.muon_momentum_steps > 0 else 1.0
        for group in self.muon.param_groups:
            group["momentum"] = (1 - frac) * a.muon_momentum_start + frac * a.muon_momentum
        for opt in (self.muon, self.adam):
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.compiled(x, y)
        loss.backward()
        self.muon.start_reduce()
        for p in self.replicated:
            if p.grad is not None:
                self.comm.mean_(p.grad)
        if a.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.replicated, a.grad_clip)
        self.adam.step()
        self.muon.step()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def warmup(self) -> None:
        """Compiles everything on a few batches of training data, then puts weights and optimizers back."""
        a = self.a
        before = copy.deepcopy(self.model.state_dict())
        loader = TrainLoader(a.train_files, self.comm)
        self.model.train()
        for i in range(a.warmup_steps):
            x, y = loader.next_batch(a.train_batch_tokens, a.train_seq_len)
            self.train_step(x, y, 1.0, 0)
            if i + 1 == a.warmup_steps or i % 10 == 9:
                self.log(f"warmup_step:{i + 1}/{a.warmup_steps}")
        self.model.load_state_dict(before)
        self.make_optimizers()

    def stop_agreed(self, elapsed: float) -> bool:
        """All ranks must leave the loop at the same step: any rank over the cap stops all."""
        budget = self.a.max_wallclock_seconds - self.a.gptq_reserve_seconds
        flag = torch.tensor([float(budget > 0 and elapsed >= budget)], device=self.comm.device)
        if self.comm.distributed:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def run(self, loader: TrainLoader, val: Tensor, bytes_of: ByteTable) -> float:
        """Trains until the cap; returns the seconds used (validation for the log is not counted)."""
        a, comm, log = self.a, self.comm, self.log
        self.averager = Averager(self.model, a.ema_decay)
        self.model.train()
        step, elapsed, stop_at = 0, 0.0, a.iterations
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        while True:
            last = step >= stop_at
            if last or (a.val_loss_every > 0 and step % a.val_loss_every == 0):
                torch.cuda.synchronize()
                elapsed += time.perf_counter() - t0
                loss, bpb = eval_val(a, self.compiled, val, bytes_of, comm)
                log(
                    f"step:{step}/{a.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} "
                    f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / max(step, 1):.2f}ms"
                )
                torch.cuda.synchronize()
                t0 = time.perf_counter()
            if last:
                break
            now = elapsed + time.perf_counter() - t0
            scale = self.lr_scale(step, now)
            x, y = loader.next_batch(a.train_batch_tokens, a.train_seq_len)
            loss = self.train_step(x, y, scale, step)
            step += 1
            self.averager.update(self.model)
            if scale < a.swa_start_scale and step % a.swa_every == 0:
                self.averager.snapshot(self.model)
            now = elapsed + time.perf_counter() - t0
            if step % a.train_log_every == 0 or step <= 5:
                log(
                    f"step:{step}/{a.iterations} train_loss:{loss.item():.4f} "
                    f"train_time:{1000 * now:.0f}ms step_avg:{1000 * now / step:.2f}ms"
                )
            if step % 8 == 0 and stop_at == a.iterations and self.stop_agreed(now):
                stop_at = step
                log(f"stopping_early: wallclock_cap train_time:{1000 * now:.0f}ms step:{step}/{a.iterations}")
        log(f"averaging: ema {a.ema_decay} with {self.averager.swa_n} swa snapshots, mix {a.swa_mix}")
        return elapsed


def build_artifact(a, trainer: Trainer, loader: TrainLoader, comm: Comm, log: Logger, train_s: float) -> None:
    """Averages, quantises and packs. All of it happens inside the seconds that the training loop left over."""
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    model = trainer.model
    load_state(model, trainer.averager.result(a.swa_mix))
    hessians = collect_hessians(a, model, loader, comm)
    log(f"gptq: {len(hessians)} hessians from {a.calib_batches} train batches, {time.perf_counter() - t0:.1f}s")
    if comm.master:
        blob = pack(quantise_model(a, model, hessians))
        write_artifact(a, blob, log)
    comm.barrier()
    took = time.perf_counter() - t0
    log(f"build: train {train_s:.1f}s + average, gptq and packing {took:.1f}s = {train_s + took:.1f}s")
    if train_s + took > a.max_wallclock_seconds:
        log(f"WARNING: build took longer than {a.max_wallclock_seconds:.0f}s, raise GPTQ_RESERVE_SECONDS")


def load_artifact(a, comm: Comm) -> GPT:
    """A fresh model out of nothing but the artifact."""
    with open(a.artifact_path, "rb") as f:
        state = unpack(f.read())
    model = build_model(a, comm.device)
    load_state(model, state)
    return model


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main() -> None:
    a = Hyperparameters
    comm = Comm()
    log = Logger(comm, a.run_id)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    seed_everything(a.seed)
    log(f"Python {sys.version.split()[0]} PyTorch {torch.__version__} world_size:{comm.world} seed:{a.seed}")

    sp = spm.SentencePieceProcessor(model_file=a.tokenizer_path)
    if int(sp.vocab_size()) != a.vocab_size:
        raise ValueError(f"VOCAB_SIZE={a.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    bytes_of = ByteTable(sp, a.vocab_size, comm.device)
    val = load_validation(a.val_files)
    log(f"val: {a.val_files} tokens:{val.numel() - 1}")

    model = build_model(a, comm.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    trainer = Trainer(a, model, comm, log)
    if a.warmup_steps > 0:
        trainer.warmup()
    loader = TrainLoader(a.train_files, comm)
    train_s = trainer.run(loader, val, bytes_of)
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    build_artifact(a, trainer, loader, comm, log, train_s)

    # from here on only the artifact and the validation tokens are used
    del trainer, loader, model
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    comm.barrier()
    t0 = time.perf_counter()
    model = load_artifact(a, comm)
    loss, bpb, n_tokens, n_bytes = evaluate_with_cache(a, model, val, bytes_of, comm, log)
    torch.cuda.synchronize()
    eval_s = time.perf_counter() - t0
    log(f"eval: tokens:{n_tokens} bytes:{n_bytes} stride:{a.eval_stride} chunk:{a.chunk_tokens} time:{eval_s:.1f}s")
    if eval_s > a.eval_limit_seconds:
        raise RuntimeError(f"evaluation took {eval_s:.0f}s, allowed are {a.eval_limit_seconds:.0f}s")
    log(f"final_ngram_cache val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * eval_s:.0f}ms")
    log(f"final_ngram_cache_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    comm.close()


if __name__ == "__main__":
    main()
