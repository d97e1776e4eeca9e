#!/usr/bin/env python3
"""
scarba -- a transformer with an old-fashioned context model bolted to its side.

I come from the archiver corner (PPM, CM, lots of hash tables), so the plan is the one we have used for thirty years:

  1. a strong static model (here: 11 layers of attention, int6, about 15.8 MB after zstd), and
  2. a weak but *adaptive* one, which has seen the text so far and knows how often "foo" came after "bar" in it.

The static one is trained in ten minutes. The adaptive one starts empty when the decoder starts, and a decoder could run
it: at every moment it holds only symbols that have been coded already. Both give a whole distribution over the 1,024
symbols, the two are mixed linearly, and the ideal code length of the symbol under the mixture is what is added up.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import json
import math
import os
import random
import struct
import sys
import time
import uuid
import zlib
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import zstandard
except ImportError:  # the container falls back to deflate, some 4 % worse
    zstandard = None

HERE = Path(__file__).resolve().parent
SIZE_LIMIT = 16_000_000


# ======================================================================================================================
# settings
# ======================================================================================================================


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_str(name: str, default: str) -> str:
    return os.environ.get(name, default)


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, str(int(default)))))


class Config:
    # where things are
    data_path = env_str("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_pattern = env_str("TRAIN_PATTERN", "fineweb_train_*.bin")
    val_pattern = env_str("VAL_PATTERN", "fineweb_val_*.bin")
    tokenizer_path = env_str("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = env_str("RUN_ID", str(uuid.uuid4()))
    out_dir = env_str("OUT_DIR", "logs")
    artifact_name = env_str("ARTIFACT", "scarba.model")
    seed = env_int("SEED", 1337)

    # clock
    iterations = env_int("ITERATIONS", 20_000)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    quant_reserve_seconds = env_float("QUANT_RESERVE_SECONDS", 22.0)  # Hessians + GPTQ live in here
    warmup_steps = env_int("WARMUP_STEPS", 12)
    warmdown_fraction = env_float("WARMDOWN_FRACTION", 0.42)
    monitor_every = env_int("MONITOR_EVERY", 4000)
    log_every = env_int("LOG_EVERY", 250)

    # batch
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)

    # network
    vocab_size = env_int("VOCAB_SIZE", 1024)
    bos_id = env_int("BOS_ID", 1)
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_hidden = env_int("MLP_HIDDEN", 1536)
    rope_base = env_float("ROPE_BASE", 10_000.0)
    rope_dims = env_int("ROPE_DIMS", 32)
    qk_gain = env_float("QK_GAIN", 1.5)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    pair_buckets = env_int("PAIR_BUCKETS", 3072)
    pair_dim = env_int("PAIR_DIM", 112)
    embed_std = env_float("EMBED_STD", 0.005)

    # optimisers
    matrix_lr = env_float("MATRIX_LR", 0.025)
    embed_lr = env_float("EMBED_LR", 0.035)
    scalar_lr = env_float("SCALAR_LR", 0.025)
    muon_momentum = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_ramp = env_int("MUON_MOMENTUM_RAMP", 1500)
    muon_steps = env_int("MUON_STEPS", 5)
    muon_decay = env_float("MUON_DECAY", 0.04)
    adam_decay = env_float("ADAM_DECAY", 0.04)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    clip_norm = env_float("CLIP_NORM", 0.3)
    ema_decay = env_float("EMA_DECAY", 0.997)

    # quantiser
    matrix_bits = env_int("MATRIX_BITS", 6)
    calib_batches = env_int("CALIB_BATCHES", 24)
    calib_sequences = env_int("CALIB_SEQUENCES", 16)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    zstd_level = env_int("ZSTD_LEVEL", 22)

    # evaluation: windows
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)

    # evaluation: context model
    chunk_tokens = env_int("CHUNK_TOKENS", 32_768)
    max_order = env_int("MAX_ORDER", 7)
    row_bits = env_int("ROW_BITS", 17)
    count_limit = env_int("COUNT_LIMIT", 32_000)
    unigram_alpha = env_float("UNIGRAM_ALPHA", 512.0)
    weight_prior = env_float("WEIGHT_PRIOR", 64.0)
    weight_floor = env_float("WEIGHT_FLOOR", 0.002)
    weight_ceiling = env_float("WEIGHT_CEILING", 0.90)


# ======================================================================================================================
# one process of the run
# ======================================================================================================================


class Run:
    """Rank, device and log of this process."""

    def __init__(self, cfg: Config):
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = env_int("RANK", 0)
        self.world = env_int("WORLD_SIZE", 1)
        self.local_rank = env_int("LOCAL_RANK", 0)
        if not torch.cuda.is_available():
            raise RuntimeError("a CUDA device is needed")
        if 8 % self.world != 0:
            raise ValueError(f"WORLD_SIZE={self.world} must divide 8")
        self.accum = 8 // self.world
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()
        self.master = self.rank == 0
        self.logfile = None
        if self.master:
            os.makedirs(cfg.out_dir, exist_ok=True)
            self.logfile = Path(cfg.out_dir) / f"{cfg.run_id}.txt"
            print(self.logfile)

    def log(self, text: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(text, flush=True)
        with open(self.logfile, "a", encoding="utf-8") as f:
            print(text, file=f)

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def total(self, t: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def any(self, flag: bool) -> bool:
        if not self.distributed:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def everyone(self, thing: object) -> list:
        """One python object of every rank."""
        if not self.distributed:
            return [thing]
        things: list = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class Stopwatch:
    """The build clock. Runs from the first training step to the last quantised row; stands still only while monitoring."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def stop(self) -> None:
        torch.cuda.synchronize()
        self.spent += time.perf_counter() - self.since
        self.since = None

    def seconds(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.spent + running


# ======================================================================================================================
# data
# ======================================================================================================================

SHARD_MAGIC = 20240520
SHARD_VERSION = 1


def read_shard(path: Path) -> np.ndarray:
    """The tokens of one .bin shard as uint16."""
    head_bytes = 256 * np.dtype("<i4").itemsize
    head = np.fromfile(path, dtype="<i4", count=256)
    if head.size != 256 or int(head[0]) != SHARD_MAGIC or int(head[1]) != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    n = int(head[2])
    if path.stat().st_size != head_bytes + 2 * n:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, header says {n} tokens")
    tokens = np.fromfile(path, dtype="<u2", count=n, offset=head_bytes)
    if tokens.size != n:
        raise ValueError(f"{path}: short read")
    return tokens


def list_shards(folder: str, pattern: str) -> list[Path]:
    files = [Path(p) for p in sorted(glob.glob(os.path.join(folder, pattern)))]
    if not files:
        raise FileNotFoundError(f"nothing matches {pattern} in {folder}")
    return files


class ShardReader:
    """An endless tape over the shards."""

    def __init__(self, files: list[Path], first: int = 0):
        self.files = files
        self.index = first % len(files)
        self.tokens = read_shard(files[self.index])
        self.pos = 0

    def _next_file(self) -> None:
        self.index = (self.index + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.index])
        self.pos = 0

    def take(self, n: int) -> np.ndarray:
        parts = []
        while n > 0:
            left = self.tokens.size - self.pos
            if left == 0:
                self._next_file()
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class BatchFeeder:
    """Every rank reads the same tape and cuts its own span out of each global batch."""

    def __init__(self, files: list[Path], run: Run, first: int = 0):
        self.reader = ShardReader(files, first)
        self.run = run

    def next(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.run.world * accum)
        local -= local % seq_len
        span = local + 1
        tape = self.reader.take(span * self.run.world)
        mine = tape[self.run.rank * span : (self.run.rank + 1) * span].astype(np.int64)
        t = torch.from_numpy(mine)
        x = t[:-1].reshape(-1, seq_len).pin_memory().to(self.run.device, non_blocking=True)
        y = t[1:].reshape(-1, seq_len).pin_memory().to(self.run.device, non_blocking=True)
        return x, y


def load_validation(cfg: Config) -> np.ndarray:
    """The whole validation stream, in the order of the shards."""
    parts = [read_shard(p) for p in list_shards(cfg.data_path, cfg.val_pattern)]
    tokens = np.concatenate(parts)
    if tokens.size < 2:
        raise ValueError("validation stream is empty")
    return tokens


# ======================================================================================================================
# what a token is worth in bytes
# ======================================================================================================================


class PieceBytes:
    """
    Bytes of the original text per piece. A piece that begins with the space mark stands for one space plus the rest;
    that space is real text except right after a control symbol (document start), where SentencePiece has put it there.
    """

    def __init__(self, tokenizer_path: str, vocab_size: int, device: torch.device):
        sp = spm.SentencePieceProcessor(model_file=tokenizer_path)
        n = max(int(sp.vocab_size()), vocab_size)
        width = np.zeros(n, dtype=np.int32)
        spaced = np.zeros(n, dtype=np.bool_)
        control = np.ones(n, dtype=np.bool_)
        for i in range(int(sp.vocab_size())):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            control[i] = False
            if sp.is_byte(i):
                width[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                spaced[i] = True
                piece = piece[1:]
            width[i] = len(piece.encode("utf-8"))
        self.sp = sp
        self.width = torch.from_numpy(width).to(device)
        self.spaced = torch.from_numpy(spaced).to(device)
        self.control = torch.from_numpy(control).to(device)
        if int(sp.bos_id()) >= 0 and int(sp.bos_id()) != Config.bos_id:
            raise ValueError(f"tokenizer has bos {sp.bos_id()}, settings say {Config.bos_id}")

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target, given the token before it."""
        space = self.spaced[target] & ~self.control[prev]
        return self.width[target] + space.to(torch.int32)


# ======================================================================================================================
# network
# ======================================================================================================================


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class Linear(nn.Linear):
    """Weights are kept in fp32 for the optimiser, products run in the dtype of the activations."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)
        self.zero_init = False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Partial rotary embedding: the first `dims` of each head turn, the rest stay."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv", inv, persistent=False)
        self.dims = dims
        self._len = 0
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def forward(self, n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._len != n or self._cos.device != device:
            t = torch.arange(n, device=device, dtype=self.inv.dtype)
            f = torch.outer(t, self.inv.to(device))
            self._cos = f.cos()[None, None]
            self._sin = f.sin()[None, None]
            self._len = n
        return self._cos.to(dtype), self._sin.to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    head, tail = x[..., :dims], x[..., dims:]
    a, b = head.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, tail), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        if cfg.model_dim % cfg.num_heads or cfg.num_heads % cfg.num_kv_heads:
            raise ValueError("heads do not fit the width")
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv = self.kv_heads * self.head_dim
        self.q = Linear(cfg.model_dim, cfg.model_dim)
        self.k = Linear(cfg.model_dim, kv)
        self.v = Linear(cfg.model_dim, kv)
        self.out = Linear(cfg.model_dim, cfg.model_dim)
        self.out.zero_init = True
        self.gain = nn.Parameter(torch.full((self.heads,), cfg.qk_gain, dtype=torch.float32))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base)
        self.rope_dims = cfg.rope_dims

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(n, x.device, q.dtype)
        q = turn(q, cos, sin, self.rope_dims)
        k = turn(k, cos, sin, self.rope_dims)
        q = q * self.gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        y = y.transpose(1, 2).reshape(b, n, d)
        return self.out(y)


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.up = Linear(cfg.model_dim, cfg.mlp_hidden)
        self.down = Linear(cfg.mlp_hidden, cfg.model_dim)
        self.down.zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.up(x), negative_slope=0.5)
        return self.down(h.square())


class Block(nn.Module):
    def __init__(self, cfg: Config, depth: int):
        super().__init__()
        self.norm_a = RMSNorm()
        self.norm_m = RMSNorm()
        self.attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim, dtype=torch.float32))
        self.mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))).float())
        self.ln_factor = 1.0 / math.sqrt(depth + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0][None, None] * x + mix[1][None, None] * x0
        a = self.attn(self.norm_a(x) * self.ln_factor)
        x = x + self.attn_scale.to(x.dtype)[None, None] * a
        m = self.mlp(self.norm_m(x) * self.ln_factor)
        return x + self.mlp_scale.to(x.dtype)[None, None] * m


class Smear(nn.Module):
    """A little of the previous embedding in each one. The first symbol of a document takes nothing from its left."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))
        self.bos_id = bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(x.dtype)[None, None]
        left = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        inside = (ids != self.bos_id).to(x.dtype).unsqueeze(-1)
        return (1.0 - g * inside) * x + g * inside * left


class PairEmbedding(nn.Module):
    """Hashed embedding of (previous, current), the order-2 helper that every CM has."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.buckets = cfg.pair_buckets
        self.bos_id = cfg.bos_id
        self.table = nn.Embedding(cfg.pair_buckets, cfg.pair_dim)
        nn.init.zeros_(self.table.weight)
        self.proj = Linear(cfg.pair_dim, cfg.model_dim)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bucket(self, ids: Tensor) -> Tensor:
        prev = torch.cat((torch.full_like(ids[:, :1], self.bos_id), ids[:, :-1]), dim=1)
        prev = torch.where(ids == self.bos_id, ids, prev)
        mixed = (prev * 36313) ^ (ids * 27191)
        return mixed % self.buckets

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(self.bucket(ids))
        h = self.proj(h)
        return h * self.scale.to(h.dtype)


class GPT(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.softcap = cfg.logit_softcap
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.pair = PairEmbedding(cfg)
        self.smear = Smear(cfg.model_dim, cfg.bos_id)
        self.n_down = cfg.num_layers // 2
        self.n_up = cfg.num_layers - self.n_down
        self.n_skip = min(self.n_down, self.n_up)
        self.skips = nn.Parameter(torch.ones(self.n_skip, cfg.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(cfg, i) for i in range(cfg.num_layers)])
        self.norm = RMSNorm()
        self.reset(cfg)

    def reset(self, cfg: Config) -> None:
        nn.init.normal_(self.embed.weight, mean=0.0, std=cfg.embed_std)
        depth = 1.0 / math.sqrt(2 * cfg.num_layers)
        for name, m in self.named_modules():
            if not isinstance(m, Linear) or name.startswith("pair"):
                continue
            if m.zero_init:
                nn.init.zeros_(m.weight)
            else:
                nn.init.orthogonal_(m.weight, gain=1.0)
                if name.endswith("attn.v"):
                    m.weight.data.mul_(1.0 - depth)

    def features(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).to(torch.bfloat16) + self.pair(ids).to(torch.bfloat16)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, ids)
        x0 = x
        stack: list[Tensor] = []
        for i in range(self.n_down):
            x = self.blocks[i](x, x0)
            stack.append(x)
        for i in range(self.n_up):
            if stack:
                x = x + self.skips[i].to(x.dtype)[None, None] * stack.pop()
            x = self.blocks[self.n_down + i](x, x0)
        return self.norm(x)

    def head(self, h: Tensor) -> Tensor:
        raw = F.linear(h, self.embed.weight.to(h.dtype))
        return self.softcap * torch.tanh(raw.float() / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        h = self.features(ids)
        logits = self.head(h.reshape(-1, h.size(-1)))
        return F.cross_entropy(logits, targets.reshape(-1), reduction="mean")


def bf16() -> torch.autocast:
    return torch.autocast(device_type="cuda", dtype=torch.bfloat16)


# ======================================================================================================================
# optimisers
# ======================================================================================================================


def orthogonalise(g: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz, quintic, coefficients as in modded-nanogpt."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16)
    x = x / (x.norm() + eps)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Each matrix is orthogonalised by one rank; the updates travel in one flat bf16 buffer."""

    def __init__(self, params, lr: float, momentum: float, steps: int, decay: float, run: Run):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, decay=decay))
        self.run = run

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr, momentum, decay = group["lr"], group["momentum"], group["decay"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.run.world == self.run.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(momentum).add_(p.grad)
                    g = p.grad.add(buf, alpha=momentum)
                    u = orthogonalise(g, group["steps"])
                    u = u * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = u.reshape(-1)
                at += p.numel()
            self.run.total(flat)
            at = 0
            for p in params:
                u = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                if decay > 0:
                    p.mul_(1.0 - lr * decay)
                p.add_(u, alpha=-lr)
                at += p.numel()


class Optimisers:
    """Muon for the matrices of the blocks, AdamW for whatever is looked up or is a vector."""

    def __init__(self, model: GPT, cfg: Config, run: Run):
        matrices, vectors, tables = [], [], []
        for name, p in model.named_parameters():
            if name in ("embed.weight", "pair.table.weight"):
                tables.append(p)
            elif p.ndim == 2 and (name.startswith("blocks.") or name == "pair.proj.weight") and "mix" not in name:
                matrices.append(p)
            else:
                vectors.append(p)
        betas = (cfg.beta1, cfg.beta2)
        self.muon = Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_steps, cfg.muon_decay, run)
        self.adam_tables = torch.optim.AdamW(
            tables, lr=cfg.embed_lr, betas=betas, eps=1e-8, weight_decay=cfg.adam_decay, fused=True
        )
        self.adam_vectors = torch.optim.AdamW(
            vectors, lr=cfg.scalar_lr, betas=betas, eps=1e-8, weight_decay=0.0, fused=True
        )
        self.all = [self.adam_tables, self.adam_vectors, self.muon]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]
        self.cfg = cfg

    def schedule(self, step: int, lr_scale: float) -> None:
        ramp = min(step / max(self.cfg.muon_momentum_ramp, 1), 1.0)
        lo, hi = self.cfg.muon_momentum_start, self.cfg.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = lo + (hi - lo) * ramp
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale

    def step(self) -> None:
        for opt in self.all:
            opt.step()

    def zero(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def snapshot(self) -> list:
        return [copy.deepcopy(opt.state_dict()) for opt in self.all]

    def restore(self, states: list) -> None:
        for opt, state in zip(self.all, states):
            opt.load_state_dict(state)


def average_grads(params: list[nn.Parameter], run: Run) -> None:
    if not run.distributed:
        return
    handles = [dist.all_reduce(p.grad, op=dist.ReduceOp.AVG, async_op=True) for p in params if p.grad is not None]
    for h in handles:
        h.wait()


class Shadow:
    """Exponential moving average of the weights, fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [n for n, _ in model.named_parameters()]
        self.live = [p for _, p in model.named_parameters()]
        self.avg = [p.detach().float().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.avg, [p.detach() for p in self.live], 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        mine = dict(zip(self.names, self.avg))
        for name, p in model.named_parameters():
            p.copy_(mine[name].to(p.dtype))


# ======================================================================================================================
# training
# ======================================================================================================================


@torch.no_grad()
def monitor(cfg: Config, run: Run, net, stream: np.ndarray, pieces: PieceBytes) -> tuple[float, float]:
    """Plain windows side by side, no cache. Only there to see where the run stands; the tail of the stream is left out."""
    length = cfg.train_seq_len
    windows = (stream.size - 1) // length
    first = windows * run.rank // run.world
    last = windows * (run.rank + 1) // run.world
    per_batch = 32
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)
    net.eval()
    for w in range(first, last, per_batch):
        stop = min(w + per_batch, last)
        raw = stream[w * length : stop * length + 1].astype(np.int64)
        tape = torch.from_numpy(raw).to(run.device)
        x = tape[:-1].view(-1, length)
        y = tape[1:].view(-1, length)
        with bf16():
            loss = net(x, y)
        sums[0] += loss.double() * y.numel()
        sums[1] += y.numel()
        sums[2] += pieces.count(x.reshape(-1), y.reshape(-1)).double().sum()
    net.train()
    run.total(sums)
    nats, tokens, nbytes = sums.tolist()
    return nats / tokens, nats / math.log(2.0) / nbytes


def lr_scale_at(seconds: float, budget: float, cfg: Config) -> float:
    """Flat, then linear to zero over the last part of the budget; by the clock, not by the step."""
    down = cfg.warmdown_fraction * budget
    left = max(budget - seconds, 0.0)
    return min(left / max(down, 1e-9), 1.0)


def one_step(cfg: Config, run: Run, net, model: GPT, opts: Optimisers, feeder: BatchFeeder) -> Tensor:
    total = torch.zeros((), device=run.device)
    for _ in range(run.accum):
        x, y = feeder.next(cfg.train_batch_tokens, cfg.train_seq_len, run.accum)
        with bf16():
            loss = net(x, y)
        (loss / run.accum).backward()
        total += loss.detach() / run.accum
    average_grads(list(model.parameters()), run)
    if cfg.clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
    opts.step()
    opts.zero()
    return total


def warm_up(cfg: Config, run: Run, net, model: GPT, opts: Optimisers, files: list[Path]) -> None:
    """Compiles everything on a few training batches and then forgets them: weights, moments and tape start afresh."""
    if cfg.warmup_steps <= 0:
        return
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    moments = opts.snapshot()
    feeder = BatchFeeder(files, run)
    for i in range(cfg.warmup_steps):
        one_step(cfg, run, net, model, opts, feeder)
        if i + 1 == cfg.warmup_steps:
            run.log(f"warmup: {i + 1} steps, thrown away")
    model.load_state_dict(weights, strict=True)
    opts.restore(moments)
    opts.zero()


def train(
    cfg: Config, run: Run, model: GPT, files: list[Path], stream: np.ndarray, pieces: PieceBytes, watch: Stopwatch
) -> Shadow:
    net = torch.compile(model, dynamic=False, fullgraph=True)
    opts = Optimisers(model, cfg, run)
    warm_up(cfg, run, net, model, opts, files)
    feeder = BatchFeeder(files, run)
    shadow = Shadow(model, cfg.ema_decay)
    budget = cfg.max_wallclock_seconds - cfg.quant_reserve_seconds

    run.barrier()
    watch.start()
    step = 0
    while True:
        seconds = watch.seconds()
        finished = run.any(step >= cfg.iterations or seconds >= budget)
        if cfg.monitor_every > 0 and (finished or step % cfg.monitor_every == 0):
            watch.stop()
            loss, bpb = monitor(cfg, run, net, stream, pieces)
            run.log(f"step:{step} monitor_loss:{loss:.4f} monitor_bpb:{bpb:.4f} train_time:{1000 * watch.seconds():.0f}ms")
            watch.start()
        if finished:
            break
        opts.schedule(step, lr_scale_at(seconds, budget, cfg))
        loss = one_step(cfg, run, net, model, opts, feeder)
        shadow.update()
        step += 1
        if step <= 5 or step % cfg.log_every == 0:
            spent = watch.seconds()
            run.log(
                f"step:{step} train_loss:{loss.item():.4f} train_time:{1000 * spent:.0f}ms avg:{1000 * spent / step:.2f}ms"
            )
    run.log(f"training stopped at {watch.seconds():.1f}s of {cfg.max_wallclock_seconds:.0f}s, step {step}")
    run.log(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    return shadow


# ======================================================================================================================
# quantiser
# ======================================================================================================================


def gptq_names(model: GPT) -> list[str]:
    """The matrices that get error feedback: everything a block multiplies with."""
    return [n for n, m in model.named_modules() if isinstance(m, Linear) and n.startswith("blocks.")]


@torch.no_grad()
def collect_hessians(cfg: Config, run: Run, model: GPT, feeder: BatchFeeder, watch: Stopwatch) -> dict[str, Tensor]:
    """X'X of the inputs of every block matrix over some training batches. Stops early rather than late."""
    names = set(gptq_names(model))
    hess: dict[str, Tensor] = {}
    hooks = []

    def catcher(name: str):
        def catch(_module, inputs, _output):
            x = inputs[0].detach()
            x = x.reshape(-1, x.size(-1)).float()
            hess[name].addmm_(x.T, x)

        return catch

    for name, m in model.named_modules():
        if name in names:
            hess[name] = torch.zeros(m.in_features, m.in_features, device=run.device, dtype=torch.float32)
            hooks.append(m.register_forward_hook(catcher(name)))
    latest = cfg.max_wallclock_seconds - 0.45 * cfg.quant_reserve_seconds
    done = 0
    model.eval()
    while done < cfg.calib_batches and not run.any(watch.seconds() > latest):
        x, _ = feeder.next(cfg.calib_sequences * cfg.train_seq_len * run.world, cfg.train_seq_len, 1)
        with bf16():
            model.features(x)
        done += 1
    for h in hooks:
        h.remove()
    for name in sorted(hess):
        run.total(hess[name])
        hess[name] /= max(done, 1) * run.world
    run.log(f"calibration: {done} batches of training text, clock {watch.seconds():.1f}s")
    return hess


def row_scales(w: Tensor, qmax: int) -> Tensor:
    """Per row, the clipping point with the least squared error out of a few."""
    top = w.abs().amax(dim=1).clamp_min(1e-8)
    best = top / qmax
    best_err = torch.full_like(top, float("inf"))
    for shrink in (1.0, 0.97, 0.94, 0.90, 0.86, 0.82, 0.78):
        s = (top * shrink / qmax).half().float().clamp_min(1e-7)
        q = torch.clamp(torch.round(w / s[:, None]), -qmax, qmax)
        err = (w - q * s[:, None]).square().sum(dim=1)
        better = err < best_err
        best = torch.where(better, s, best)
        best_err = torch.where(better, err, best_err)
    return best


def round_rows(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    qmax = 2 ** (bits - 1) - 1
    w = w.float()
    s = row_scales(w, qmax)
    q = torch.clamp(torch.round(w / s[:, None]), -qmax, qmax).to(torch.int8)
    return q, s.half()


def gptq_rows(w: Tensor, h: Tensor, bits: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """GPTQ with columns in order of falling activity."""
    qmax = 2 ** (bits - 1) - 1
    w = w.float().clone()
    h = h.clone()
    n = w.size(1)
    dead = torch.diagonal(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(torch.diagonal(h), descending=True)
    back = torch.argsort(order)
    w = w[:, order]
    h = h[order][:, order]
    h.diagonal().add_(damp * torch.diagonal(h).mean())
    s = row_scales(w, qmax)
    try:
        inv = torch.cholesky_inverse(torch.linalg.cholesky(h))
        u = torch.linalg.cholesky(inv, upper=True)
    except torch.linalg.LinAlgError:
        return round_rows(w[:, back], bits)
    q = torch.zeros_like(w, dtype=torch.int8)
    for lo in range(0, n, block):
        hi = min(lo + block, n)
        part = w[:, lo:hi].clone()
        err = torch.zeros_like(part)
        ub = u[lo:hi, lo:hi]
        for j in range(hi - lo):
            col = part[:, j]
            qc = torch.clamp(torch.round(col / s), -qmax, qmax)
            q[:, lo + j] = qc.to(torch.int8)
            e = (col - qc * s) / ub[j, j]
            part[:, j:] -= e[:, None] * ub[j, j:][None]
            err[:, j] = e
        w[:, hi:] -= err @ u[lo:hi, hi:]
    return q[:, back].contiguous(), s.half()


def quantise(cfg: Config, run: Run, model: GPT, hess: dict[str, Tensor]) -> list[tuple[str, str, Tensor, Tensor | None]]:
    """All tensors as (name, kind, values, scales). The block matrices are dealt out to the ranks."""
    params = dict(model.named_parameters())
    names = gptq_names(model)
    mine = {}
    for i, name in enumerate(names):
        if i % run.world == run.rank:
            q, s = gptq_rows(params[name + ".weight"], hess[name], cfg.matrix_bits, cfg.gptq_block, cfg.gptq_damp)
            mine[name + ".weight"] = (q.cpu(), s.cpu())
    solved: dict[str, tuple[Tensor, Tensor]] = {}
    for part in run.everyone(mine):
        solved.update(part)
    records = []
    for name, p in params.items():
        if name in solved:
            q, s = solved[name]
            records.append((name, "rows", q, s))
        elif name == "embed.weight":
            q, s = round_rows(p.detach(), 8)
            records.append((name, "rows", q.cpu(), s.cpu()))
        elif p.ndim == 2 and p.numel() > 16_384:
            q, s = round_rows(p.detach(), cfg.matrix_bits)
            records.append((name, "rows", q.cpu(), s.cpu()))
        else:
            records.append((name, "half", p.detach().half().cpu(), None))
    return records


# ======================================================================================================================
# container:  "SCRB" | codec | u32 length of the directory | directory (json) | payload; all but the first 5 bytes packed
# ======================================================================================================================

MAGIC = b"SCRB"


def pack(cfg: Config, records: list[tuple[str, str, Tensor, Tensor | None]]) -> bytes:
    directory = []
    payload = bytearray()
    for name, kind, values, scales in records:
        directory.append([name, kind, list(values.shape)])
        if kind == "rows":
            # columns first: neighbours in one column share a scale of activity, zstd likes that a bit better
            payload += values.numpy().T.copy().tobytes()
            payload += scales.numpy().tobytes()
        else:
            payload += values.numpy().tobytes()
    head = json.dumps(directory, separators=(",", ":")).encode()
    raw = struct.pack("<I", len(head)) + head + bytes(payload)
    if zstandard is not None:
        return MAGIC + b"Z" + zstandard.ZstdCompressor(level=cfg.zstd_level).compress(raw)
    return MAGIC + b"D" + zlib.compress(raw, 9)


def unpack(blob: bytes) -> dict[str, Tensor]:
    if blob[:4] != MAGIC:
        raise ValueError("not a scarba container")
    codec, body = blob[4:5], blob[5:]
    if codec == b"Z":
        raw = zstandard.ZstdDecompressor().decompress(body)
    elif codec == b"D":
        raw = zlib.decompress(body)
    else:
        raise ValueError(f"unknown codec {codec!r}")
    (n,) = struct.unpack_from("<I", raw, 0)
    directory = json.loads(raw[4 : 4 + n].decode())
    at = 4 + n
    state: dict[str, Tensor] = {}
    for name, kind, shape in directory:
        if kind == "rows":
            rows, cols = shape
            q = np.frombuffer(raw, dtype=np.int8, count=rows * cols, offset=at).reshape(cols, rows).T
            at += rows * cols
            s = np.frombuffer(raw, dtype=np.float16, count=rows, offset=at).astype(np.float32)
            at += 2 * rows
            state[name] = torch.from_numpy(q.astype(np.float32) * s[:, None])
        else:
            k = int(np.prod(shape)) if shape else 1
            v = np.frombuffer(raw, dtype=np.float16, count=k, offset=at).astype(np.float32)
            at += 2 * k
            state[name] = torch.from_numpy(v.reshape(shape).copy())
    if at != len(raw):
        raise ValueError(f"container has {len(raw) - at} bytes too many")
    return state


def code_bytes() -> int:
    return len(Path(__file__).resolve().read_bytes())


def build_artifact(cfg: Config, run: Run, model: GPT, files: list[Path], watch: Stopwatch) -> Path:
    """Calibrates, quantises (both on the build clock) and writes the file. Packing touches neither data nor weights."""
    feeder = BatchFeeder(files, run, first=len(files) // 2)
    hess = collect_hessians(cfg, run, model, feeder, watch)
    records = quantise(cfg, run, model, hess)
    watch.stop()
    run.log(f"build clock: {watch.seconds():.1f}s of {cfg.max_wallclock_seconds:.0f}s (training + calibration + GPTQ)")
    path = Path(cfg.out_dir) / cfg.artifact_name
    if run.master:
        blob = pack(cfg, records)
        path.write_bytes(blob)
        model_bytes, script_bytes = len(blob), code_bytes()
        total = model_bytes + script_bytes
        run.log(f"Serialized model {'zstd' if blob[4:5] == b'Z' else 'zlib'}: {model_bytes} bytes")
        run.log(f"Code size: {script_bytes} bytes")
        run.log(f"Total submission size: {total} bytes")
        if total > SIZE_LIMIT:
            raise RuntimeError(f"{total} bytes are {total - SIZE_LIMIT} too many")
    run.barrier()
    return path


def load_artifact(cfg: Config, run: Run, path: Path) -> GPT:
    """A fresh network, filled from the file and from nothing else."""
    model = GPT(cfg).to(run.device)
    model.load_state_dict(unpack(path.read_bytes()), strict=True)
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    return model


# ======================================================================================================================
# the context model
# ======================================================================================================================
#
# One table per order. A row belongs to one context (hash of the n-1 symbols before, with a 16-bit tag against strangers)
# and holds the counts of all 1,024 successors, so the row sum *is* the number of events the row has seen. No count is
# ever looked up alone. Two contexts that fight for a row cost compression, not correctness: whoever owns the row, it is
# still a distribution.
#
# Smoothing is Witten-Bell, i.e. PPM's method C written as an interpolation, from the unigram upwards:
#
#     p_n(a) = ( c_n(a) + d_n * p_{n-1}(a) ) / ( sum c_n + d_n )        d_n = different successors seen
#
# which sums to one if p_{n-1} does.

HASH_SEED = np.uint64(0x9E3779B97F4A7C15)
HASH_MULT = np.array(
    [
        0xD6E8FEB86659FD93,
        0xA0761D6478BD642F,
        0xE7037ED1A0B428DB,
        0x8EBC6AF09C88C6E3,
        0x589965CC75374CC3,
        0x1D8E4E27C47D124F,
        0xEB44ACCAB455D165,
        0xC2B2AE3D27D4EB4F,
    ],
    dtype=np.uint64,
)

Keys = dict[int, tuple[np.ndarray, np.ndarray]]


def context_keys(hist: np.ndarray, lo: int, hi: int, max_order: int, bos_id: int) -> Keys:
    """
    For the positions lo..hi-1: per order n a hash of the n-1 symbols before the position, and whether there are that many
    in the document. The symbol at the position itself takes no part.
    """
    at = np.arange(lo, hi, dtype=np.int64)
    h = np.full(at.size, HASH_SEED, dtype=np.uint64)
    alive = np.ones(at.size, dtype=np.bool_)
    keys: Keys = {}
    for back in range(1, max_order):
        q = at - back
        alive = alive & (q >= 0)
        sym = hist[np.maximum(q, 0)]
        h = (h ^ (sym.astype(np.uint64) + np.uint64(1))) * HASH_MULT[back % len(HASH_MULT)]
        h = h ^ (h >> np.uint64(29))
        keys[back + 1] = (h * HASH_MULT[0], alive)
        alive = alive & (sym != bos_id)  # do not look behind the start of the document
    return keys


class RowTable:
    """Successor counts of the contexts of one order."""

    def __init__(self, order: int, bits: int, vocab: int, limit: int):
        rows = 1 << bits
        self.order = order
        self.bits = bits
        self.vocab = vocab
        self.limit = limit
        self.counts = np.zeros((rows, vocab), dtype=np.uint16)
        self.total = np.zeros(rows, dtype=np.uint32)
        self.kinds = np.zeros(rows, dtype=np.uint16)
        self.tag = np.zeros(rows, dtype=np.uint16)
        self.life = np.zeros(rows, dtype=np.int16)

    def locate(self, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row = (key >> np.uint64(64 - self.bits)).astype(np.int64)
        tag = np.maximum((key & np.uint64(0xFFFF)).astype(np.uint16), np.uint16(1))
        return row, tag

    def fetch(self, key: np.ndarray, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts [n, V], their sum [n] and the number of kinds [n]; sum and kinds are 0 where the context is unknown."""
        row, tag = self.locate(key)
        own = alive & (self.tag[row] == tag)
        total = np.where(own, self.total[row], 0).astype(np.float32)
        kinds = np.where(own, self.kinds[row], 0).astype(np.float32)
        return self.counts[row], total, kinds

    def absorb(self, key: np.ndarray, alive: np.ndarray, symbols: np.ndarray) -> None:
        row, tag = self.locate(key[alive])
        symbols = symbols[alive]
        if row.size == 0:
            return
        self._settle(row, tag)
        own = self.tag[row] == tag
        row, symbols = row[own], symbols[own]
        if row.size == 0:
            return
        flat = self.counts.reshape(-1)
        cells, times = np.unique(row * self.vocab + symbols, return_counts=True)
        before = flat[cells]
        flat[cells] = before + times.astype(np.uint16)
        r, k = np.unique(cells[before == 0] // self.vocab, return_counts=True)
        self.kinds[r] += k.astype(np.uint16)
        r, n = np.unique(row, return_counts=True)
        self.total[r] += n.astype(np.uint32)
        self.life[r] = np.minimum(self.life[r] + 1, 255)
        self._halve(np.unique(cells[flat[cells] > self.limit] // self.vocab))

    def _settle(self, row: np.ndarray, tag: np.ndarray) -> None:
        """The first context of the chunk that wants a row may claim it; an owner with life left only loses some."""
        uniq, first = np.unique(row, return_index=True)
        claim = tag[first]
        stranger = self.tag[uniq] != claim
        dead = stranger & (self.life[uniq] <= 0)
        worn = uniq[stranger & ~dead]
        self.life[worn] -= 1
        free = uniq[dead]
        self.counts[free] = 0
        self.total[free] = 0
        self.kinds[free] = 0
        self.life[free] = 0
        self.tag[free] = claim[dead]

    def _halve(self, hot: np.ndarray) -> None:
        """Keeps the 16 bits from running over, and forgets a little, as every PPM does."""
        if hot.size == 0:
            return
        half = self.counts[hot] >> 1
        self.counts[hot] = half
        self.total[hot] = half.sum(axis=1, dtype=np.uint32)
        self.kinds[hot] = np.count_nonzero(half, axis=1).astype(np.uint16)


class ContextModel:
    """Orders 1 to max_order, kept in numpy, blended on the device."""

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg = cfg
        self.device = device
        self.vocab = cfg.vocab_size
        self.unigram = np.zeros(cfg.vocab_size, dtype=np.int64)
        self.tables: list[RowTable] = []
        for order in range(2, cfg.max_order + 1):
            bits = min(cfg.row_bits, 14 if order == 2 else cfg.row_bits - (order == 3))
            self.tables.append(RowTable(order, bits, cfg.vocab_size, cfg.count_limit))

    def _up(self, counts: np.ndarray) -> Tensor:
        """uint16 travels as int16, torch knows little about the former."""
        t = torch.from_numpy(counts.view(np.int16)).to(self.device)
        return (t.to(torch.int32) & 0xFFFF).float()

    def order_one(self) -> Tensor:
        c = torch.from_numpy(self.unigram).to(self.device).double()
        alpha = self.cfg.unigram_alpha
        return ((c + alpha / self.vocab) / (c.sum() + alpha)).float()

    def distribution(self, keys: Keys, sel: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """For the selected positions: p [n, V], the longest order that knew the context, and how often it was there."""
        n = sel.size
        p = self.order_one()[None].expand(n, self.vocab)
        depth = torch.zeros(n, dtype=torch.int64, device=self.device)
        mass = torch.zeros(n, dtype=torch.float32, device=self.device)
        for table in self.tables:
            key, alive = keys[table.order]
            counts, total, kinds = table.fetch(key[sel], alive[sel])
            c = self._up(counts)
            t = torch.from_numpy(total).to(self.device)
            d = torch.from_numpy(kinds).to(self.device)
            seen = t > 0
            blend = (c + d[:, None] * p) / (t + d).clamp_min(1.0)[:, None]
            p = torch.where(seen[:, None], blend, p)
            depth = torch.where(seen, torch.full_like(depth, table.order), depth)
            mass = torch.where(seen, t, mass)
        p = p / p.sum(dim=-1, keepdim=True)
        return p, depth, mass

    def absorb(self, hist: np.ndarray, lo: int, hi: int, keys: Keys) -> None:
        symbols = hist[lo:hi].astype(np.int64)
        self.unigram += np.bincount(symbols, minlength=self.vocab)[: self.vocab]
        for table in self.tables:
            key, alive = keys[table.order]
            table.absorb(key, alive, symbols)


class WeightBook:
    """
    How much the context model is believed, per cell of (entropy of the network, order reached, log of the count).
    All three are known before the symbol is. The entries are posterior means of "the context model said it", learned from
    the chunks that are done.
    """

    ENTROPY_BINS = 12
    MASS_BINS = 6

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg = cfg
        self.depths = cfg.max_order + 1
        n = self.ENTROPY_BINS * self.depths * self.MASS_BINS
        depth = (torch.arange(n, device=device) // self.MASS_BINS) % self.depths
        start = 0.01 + 0.02 * depth.double()
        self.seen = torch.full((n,), cfg.weight_prior, dtype=torch.float64, device=device)
        self.share = start * self.seen
        self.new_seen = torch.zeros_like(self.seen)
        self.new_share = torch.zeros_like(self.seen)

    def cell(self, entropy: Tensor, depth: Tensor, mass: Tensor) -> Tensor:
        e = (entropy / 0.8).long().clamp(0, self.ENTROPY_BINS - 1)
        m = (torch.log2(1.0 + mass) / 2.0).long().clamp(0, self.MASS_BINS - 1)
        return (e * self.depths + depth) * self.MASS_BINS + m

    def weight(self, cell: Tensor) -> Tensor:
        w = self.share[cell] / self.seen[cell]
        return w.clamp(self.cfg.weight_floor, self.cfg.weight_ceiling).float()

    def note(self, cell: Tensor, share: Tensor) -> None:
        self.new_seen.index_add_(0, cell, torch.ones_like(share))
        self.new_share.index_add_(0, cell, share)

    def commit(self, run: Run) -> None:
        """End of a chunk: what all ranks noted goes into the book."""
        run.total(self.new_seen)
        run.total(self.new_share)
        self.seen += self.new_seen
        self.share += self.new_share
        self.new_seen.zero_()
        self.new_share.zero_()


# ======================================================================================================================
# evaluation
# ======================================================================================================================


def cut_blocks(lo: int, hi: int, stride: int) -> list[tuple[int, int]]:
    """Target positions lo..hi-1 in blocks of `stride`; every position is in one block."""
    return [(s, min(s + stride, hi)) for s in range(lo, hi, stride)]


def share_of(blocks: list[tuple[int, int]], rank: int, world: int) -> list[tuple[int, int]]:
    return blocks[len(blocks) * rank // world : len(blocks) * (rank + 1) // world]


class Coder:
    """
    Goes through the stream once, chunk by chunk. Inside a chunk the ranks share the blocks, and nobody's tables move; when
    all have their code lengths, every rank enters the whole chunk into its own copy of the tables.
    """

    def __init__(self, cfg: Config, run: Run, model: GPT, stream: np.ndarray, pieces: PieceBytes):
        self.cfg = cfg
        self.run = run
        self.model = model
        self.hist = stream.astype(np.int32)
        self.pieces = pieces
        self.cm = ContextModel(cfg, run.device)
        self.book = WeightBook(cfg, run.device)
        self.features = torch.compile(model.features, dynamic=False)
        self.batch = -(-(-(-cfg.chunk_tokens // cfg.eval_stride)) // run.world)
        # nats of the mixture, nats of the network alone, tokens, bytes
        self.ledger = torch.zeros(4, dtype=torch.float64, device=run.device)

    def neural(self, mine: list[tuple[int, int]]) -> tuple[Tensor, np.ndarray]:
        """Log-probabilities of the network at the targets of these blocks, [n, V], and the target positions."""
        length = self.cfg.eval_seq_len
        x = torch.zeros(self.batch, length, dtype=torch.int64)
        rows, cols, places = [], [], []
        for i, (s, e) in enumerate(mine):
            start = max(0, e - 1 - length)
            x[i, : e - 1 - start] = torch.from_numpy(self.hist[start : e - 1].astype(np.int64))
            p = np.arange(s, e, dtype=np.int64)
            rows.append(np.full(p.size, i, dtype=np.int64))
            cols.append(p - 1 - start)
            places.append(p)
        r = torch.from_numpy(np.concatenate(rows)).to(self.run.device)
        c = torch.from_numpy(np.concatenate(cols)).to(self.run.device)
        with bf16():
            h = self.features(x.to(self.run.device))
        logits = self.model.head(h[r, c])
        return F.log_softmax(logits, dim=-1), np.concatenate(places)

    def symbols(self, places: np.ndarray) -> Tensor:
        return torch.from_numpy(self.hist[places].astype(np.int64)).to(self.run.device)

    @torch.no_grad()
    def score(self, mine: list[tuple[int, int]], lo: int, keys: Keys) -> None:
        """Code lengths of these blocks under the present state; notes, but does not apply, what was learned."""
        logp, places = self.neural(mine)
        prob = logp.exp()
        entropy = -(prob * logp).sum(dim=-1) / math.log(2.0)
        q, depth, mass = self.cm.distribution(keys, places - lo)
        cell = self.book.cell(entropy, depth, mass)
        w = self.book.weight(cell)[:, None]
        mixed = (1.0 - w) * prob + w * q

        target = self.symbols(places)
        prev = self.symbols(places - 1)
        took = mixed.gather(1, target[:, None]).squeeze(1).double()
        nats = -took.log()
        alone = -logp.gather(1, target[:, None]).squeeze(1).double()
        self.ledger[0] += nats.sum()
        self.ledger[1] += alone.sum()
        self.ledger[2] += nats.numel()
        self.ledger[3] += self.pieces.count(prev, target).double().sum()

        said = w.squeeze(1).double() * q.gather(1, target[:, None]).squeeze(1).double()
        self.book.note(cell, said / took)

    def run_through(self) -> dict[str, float]:
        cfg, run = self.cfg, self.run
        end = self.hist.size
        chunks = [(lo, min(lo + cfg.chunk_tokens, end)) for lo in range(1, end, cfg.chunk_tokens)]
        began = time.perf_counter()
        for number, (lo, hi) in enumerate(chunks):
            keys = context_keys(self.hist, lo, hi, cfg.max_order, cfg.bos_id)
            mine = share_of(cut_blocks(lo, hi, cfg.eval_stride), run.rank, run.world)
            if mine:
                self.score(mine, lo, keys)
            self.book.commit(run)
            self.cm.absorb(self.hist, lo, hi, keys)
            if number % 200 == 0 and run.master:
                nats, _, tokens, nbytes = self.ledger.tolist()
                run.log(
                    f"chunk {number + 1}/{len(chunks)} rank0_bpb:{nats / math.log(2.0) / max(nbytes, 1.0):.4f} "
                    f"time:{time.perf_counter() - began:.0f}s"
                )
        run.total(self.ledger)
        nats, alone, tokens, nbytes = self.ledger.tolist()
        if int(tokens) != end - 1:
            raise RuntimeError(f"{int(tokens)} code lengths for {end - 1} symbols")
        ln2 = math.log(2.0)
        return dict(
            loss=nats / tokens,
            bpb=nats / ln2 / nbytes,
            network_bpb=alone / ln2 / nbytes,
            tokens=tokens,
            nbytes=nbytes,
        )


def evaluate(cfg: Config, run: Run, path: Path, stream: np.ndarray, pieces: PieceBytes) -> dict[str, float]:
    """Reads the artifact and codes the stream with it. The evaluation clock is this function."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    model = load_artifact(cfg, run, path)
    loss, bpb = monitor(cfg, run, model, stream, pieces)
    run.log(f"roundtrip monitor_loss:{loss:.4f} monitor_bpb:{bpb:.4f} time:{time.perf_counter() - began:.1f}s")
    coder = Coder(cfg, run, model, stream, pieces)
    result = coder.run_through()
    torch.cuda.synchronize()
    result["seconds"] = time.perf_counter() - began
    return result


# ======================================================================================================================
# main
# ======================================================================================================================


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main() -> None:
    cfg = Config()
    run = Run(cfg)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    seed_everything(cfg.seed)

    run.log(Path(__file__).read_text(encoding="utf-8"), console=False)
    run.log(f"Running Python {sys.version.split()[0]} PyTorch {torch.__version__} world_size:{run.world} seed:{cfg.seed}")

    files = list_shards(cfg.data_path, cfg.train_pattern)
    stream = load_validation(cfg)
    pieces = PieceBytes(cfg.tokenizer_path, cfg.vocab_size, run.device)
    run.log(f"train shards:{len(files)} val tokens:{stream.size - 1}")

    model = GPT(cfg).to(run.device)
    run.log(f"model_params:{sum(p.numel() for p in model.parameters())}")

    watch = Stopwatch()
    shadow = train(cfg, run, model, files, stream, pieces, watch)
    shadow.copy_to(model)
    path = build_artifact(cfg, run, model, files, watch)
    del shadow, model
    torch.cuda.empty_cache()

    result = evaluate(cfg, run, path, stream, pieces)
    run.log(f"network alone, same pass: bpb:{result['network_bpb']:.6f}")
    run.log(f"coded tokens:{result['tokens']:.0f} bytes:{result['nbytes']:.0f}")
    run.log(
        f"final_cache val_loss:{result['loss']:.4f} val_bpb:{result['bpb']:.4f} "
        f"eval_time:{1000 * result['seconds']:.0f}ms"
    )
    run.log(f"final_cache_exact val_loss:{result['loss']:.8f} val_bpb:{result['bpb']:.8f}")
    run.close()


if __name__ == "__main__":
    main()
