"""
auskerry: 11L / 512d GPT for the 16 MB track.

  train   : Muon + AdamW, EMA, warmdown on the wall clock, everything up to the written artifact inside 600 s
  artifact: GPTQ int6 for matrices, int8 for tables, lzma
  eval    : chunked score-first TTT (AdamW on blocks 2..10) + online n-gram counts mixed by the entropy of the net

Run:  torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

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
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------
# settings
# ------------------------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_str(name: str, default: str) -> str:
    return os.environ.get(name, default)


def env_flag(name: str, default: bool) -> bool:
    return os.environ.get(name, "1" if default else "0").lower() in ("1", "true", "yes", "on")


@dataclass
class Settings:
    # data
    data_dir: str = env_str("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = env_str("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = env_str("RUN_ID", str(uuid.uuid4()))
    seed: int = env_int("SEED", 1337)

    # schedule
    iterations: int = env_int("ITERATIONS", 20000)
    warmup_steps: int = env_int("WARMUP_STEPS", 20)
    warmdown_iters: int = env_int("WARMDOWN_ITERS", 3500)
    batch_tokens: int = env_int("TRAIN_BATCH_TOKENS", 786_432)
    seq_len: int = env_int("TRAIN_SEQ_LEN", 2048)
    cap_s: float = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    # kept free at the end of the 600 s for calibration, GPTQ and lzma
    reserve_s: float = env_float("EXPORT_RESERVE_SECONDS", 52.0)
    val_every: int = env_int("VAL_LOSS_EVERY", 4000)
    log_every: int = env_int("TRAIN_LOG_EVERY", 500)

    # model
    vocab_size: int = env_int("VOCAB_SIZE", 1024)
    num_layers: int = env_int("NUM_LAYERS", 11)
    model_dim: int = env_int("MODEL_DIM", 512)
    num_heads: int = env_int("NUM_HEADS", 8)
    num_kv_heads: int = env_int("NUM_KV_HEADS", 4)
    mlp_hidden: int = env_int("MLP_HIDDEN", 1536)
    leaky_slope: float = env_float("LEAKY_SLOPE", 0.5)
    rope_dims: int = env_int("ROPE_DIMS", 16)
    rope_base: float = env_float("ROPE_BASE", 10000.0)
    qk_gain: float = env_float("QK_GAIN_INIT", 1.5)
    softcap: float = env_float("LOGIT_SOFTCAP", 30.0)
    xsa_last: int = env_int("XSA_LAST_N", 4)
    bigram_buckets: int = env_int("BIGRAM_BUCKETS", 2048)
    bigram_dim: int = env_int("BIGRAM_DIM", 128)
    ve_dim: int = env_int("VE_DIM", 128)
    ve_layers: str = env_str("VE_LAYERS", "9,10")
    embed_std: float = env_float("TIED_EMBED_INIT_STD", 0.005)
    bos_id: int = env_int("BOS_ID", 1)

    # optimisers
    matrix_lr: float = env_float("MATRIX_LR", 0.025)
    scalar_lr: float = env_float("SCALAR_LR", 0.025)
    embed_lr: float = env_float("TIED_EMBED_LR", 0.035)
    muon_momentum: float = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start: float = env_float("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_steps: int = env_int("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_ns_steps: int = env_int("MUON_BACKEND_STEPS", 5)
    muon_wd: float = env_float("MUON_WD", 0.04)
    adam_wd: float = env_float("ADAM_WD", 0.04)
    beta1: float = env_float("BETA1", 0.9)
    beta2: float = env_float("BETA2", 0.95)
    adam_eps: float = env_float("ADAM_EPS", 1e-8)
    grad_clip: float = env_float("GRAD_CLIP_NORM", 0.3)

    # averaging
    ema_decay: float = env_float("EMA_DECAY", 0.997)
    average: str = env_str("AVERAGE", "ema")  # ema | swa | none
    swa_every: int = env_int("SWA_EVERY", 50)
    swa_scale: float = env_float("SWA_START_SCALE", 0.2)

    # export
    calib_batches: int = env_int("CALIB_BATCHES", 24)
    calib_rows: int = env_int("CALIB_ROWS", 16)
    gptq_block: int = env_int("GPTQ_BLOCK", 128)
    gptq_damp: float = env_float("GPTQ_DAMP", 0.01)
    artifact_path: str = env_str("ARTIFACT", "final_model.int6.ptz")
    size_limit: int = env_int("SIZE_LIMIT", 16_000_000)

    # evaluation
    stride: int = env_int("EVAL_STRIDE", 64)
    eval_batch: int = env_int("EVAL_BATCH_WINDOWS", 32)
    eval_limit_s: float = env_float("EVAL_LIMIT_SECONDS", 600.0)
    logit_temp: float = env_float("LOGIT_TEMP", 1.0)

    # test-time training
    ttt: bool = env_flag("TTT_ENABLED", True)
    ttt_chunk: int = env_int("TTT_CHUNK_TOKENS", 32_768)
    ttt_epochs: int = env_int("TTT_EPOCHS", 3)
    ttt_lr: float = env_float("TTT_LR", 1e-4)
    ttt_wd: float = env_float("TTT_WD", 0.0)
    ttt_clip: float = env_float("TTT_GRAD_CLIP", 1.0)
    ttt_freeze: int = env_int("TTT_FREEZE_BLOCKS", 2)
    ttt_stop_s: float = env_float("TTT_STOP_SECONDS", 520.0)

    # n-gram counts
    ngram: bool = env_flag("NGRAM_ENABLED", True)
    ngram_max_order: int = env_int("NGRAM_MAX_ORDER", 5)
    ngram_bits: int = env_int("NGRAM_BITS", 18)
    ngram_strength: float = env_float("NGRAM_STRENGTH", 2.0)
    mix_lo: float = env_float("MIX_LO", 0.02)
    mix_hi: float = env_float("MIX_HI", 0.35)
    mix_centre: float = env_float("MIX_CENTRE", 3.0)
    mix_slope: float = env_float("MIX_SLOPE", 1.2)

    # optional extras, off in the record run
    report_plain: bool = env_flag("REPORT_PLAIN", False)
    self_check: bool = env_flag("SELF_CHECK", False)

    train_glob: str = field(init=False)
    val_glob: str = field(init=False)

    def __post_init__(self) -> None:
        self.train_glob = os.path.join(self.data_dir, "fineweb_train_*.bin")
        self.val_glob = os.path.join(self.data_dir, "fineweb_val_*.bin")
        if self.ttt_chunk % self.stride:
            raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE")
        if self.model_dim % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("heads do not divide")

    @property
    def ve_layer_ids(self) -> list[int]:
        return [int(x) for x in self.ve_layers.split(",") if x.strip()]


# ------------------------------------------------------------------------------------------
# process group and log
# ------------------------------------------------------------------------------------------


class World:
    """Rank, size and device; the collectives become no-ops on one process."""

    def __init__(self) -> None:
        self.rank = env_int("RANK", 0)
        self.size = env_int("WORLD_SIZE", 1)
        self.local = env_int("LOCAL_RANK", 0)
        if 8 % self.size:
            raise ValueError(f"WORLD_SIZE={self.size} must divide 8")
        self.accum = 8 // self.size
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        self.active = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        if self.active:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def master(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.active:
            dist.barrier()

    def sum_(self, t: Tensor) -> Tensor:
        if self.active:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        if self.active:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
            t.div_(self.size)
        return t

    def any(self, flag: bool) -> bool:
        if not self.active:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def share(self, n: int) -> range:
        """The contiguous part of range(n) that falls to this rank."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def close(self) -> None:
        if self.active:
            dist.destroy_process_group()


class Log:
    def __init__(self, world: World, run_id: str) -> None:
        self.on = world.master
        self.path = Path("logs") / f"{run_id}.txt"
        if self.on:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.on:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            print(text, file=f)


# ------------------------------------------------------------------------------------------
# data
# ------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_HEADER_INTS = 256


def read_shard(path: str | Path) -> Tensor:
    path = Path(path)
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"bad shard header in {path}")
    count = int(header[2])
    offset = SHARD_HEADER_INTS * 4
    if path.stat().st_size != offset + 2 * count:
        raise ValueError(f"size of {path} does not fit its header")
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=offset)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


class TokenStream:
    """Endless sequence of tokens over the shards in name order."""

    def __init__(self, pattern: str) -> None:
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(pattern)
        self.which = 0
        self.tokens = read_shard(self.files[0])
        self.pos = 0

    def _next_file(self) -> None:
        self.which = (self.which + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.which])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
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


class BatchLoader:
    """Every rank reads the same stream and keeps its own slice of each global batch."""

    def __init__(self, pattern: str, world: World, seq_len: int) -> None:
        self.stream = TokenStream(pattern)
        self.world = world
        self.seq_len = seq_len

    def next(self, global_tokens: int) -> tuple[Tensor, Tensor]:
        per_rank = global_tokens // self.world.size
        span = per_rank + 1
        block = self.stream.take(span * self.world.size)
        mine = block[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        x = mine[:-1].reshape(-1, self.seq_len)
        y = mine[1:].reshape(-1, self.seq_len)
        return (
            x.to(self.world.device, non_blocking=True),
            y.to(self.world.device, non_blocking=True),
        )


def read_validation(pattern: str) -> Tensor:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(pattern)
    return torch.cat([read_shard(f) for f in files]).to(torch.int64)


# ------------------------------------------------------------------------------------------
# bytes
# ------------------------------------------------------------------------------------------


@dataclass
class ByteTables:
    base: Tensor  # bytes of the piece without its leading mark
    space: Tensor  # the piece begins with the mark, i.e. with one space
    boundary: Tensor  # control/unknown/unused: no text, and no space after it

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.base[target].to(torch.int64)
        n += (self.space[target] & ~self.boundary[prev]).to(torch.int64)
        return n


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTables:
    size = max(int(sp.vocab_size()), vocab_size)
    base = np.zeros(size, dtype=np.int16)
    space = np.zeros(size, dtype=np.bool_)
    boundary = np.ones(size, dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        if sp.is_byte(i):
            base[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            space[i] = True
            piece = piece[1:]
        base[i] = len(piece.encode("utf-8"))
    return ByteTables(
        torch.from_numpy(base).to(device),
        torch.from_numpy(space).to(device),
        torch.from_numpy(boundary).to(device),
    )


# ------------------------------------------------------------------------------------------
# model
# ------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """fp32 master weight, matmul in the dtype of the input."""

    def __init__(self, fan_in: int, fan_out: int, zero: bool = False) -> None:
        super().__init__(fan_in, fan_out, bias=False)
        self.zero_init = zero

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        inv = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        self.register_buffer("inv", inv, persistent=False)

    def forward(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(length, device=self.inv.device, dtype=torch.float32)
        ang = torch.outer(t, self.inv)[None, None]
        return ang.cos().to(dtype), ang.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial rotation: the first 2*cos.size(-1) dims turn, the rest pass."""
    n = 2 * cos.size(-1)
    head, tail = x[..., :n], x[..., n:]
    a, b = head.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, tail), dim=-1)


class Attention(nn.Module):
    def __init__(self, s: Settings, layer: int) -> None:
        super().__init__()
        self.heads = s.num_heads
        self.kv_heads = s.num_kv_heads
        self.head_dim = s.model_dim // s.num_heads
        kv = self.kv_heads * self.head_dim
        self.q = Linear(s.model_dim, s.model_dim)
        self.k = Linear(s.model_dim, kv)
        self.v = Linear(s.model_dim, kv)
        self.o = Linear(s.model_dim, s.model_dim, zero=True)
        self.gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain))
        self.exclude_self = layer >= s.num_layers - s.xsa_last

    def _without_self(self, y: Tensor, v: Tensor) -> Tensor:
        # XSA: remove from each head's output the part along the token's own value
        b, h, t, d = y.shape
        group = h // v.size(1)
        y = y.reshape(b, v.size(1), group, t, d)
        u = F.normalize(v, dim=-1).unsqueeze(2)
        y = y - (y * u).sum(-1, keepdim=True) * u
        return y.reshape(b, h, t, d)

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, c = x.shape
        q = self.q(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x)
        if ve is not None:
            v = v + ve.to(v.dtype)
        v = v.view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q = rotate(rms(q), cos, sin) * self.gain.to(q.dtype)[None, :, None, None]
        k = rotate(rms(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if self.exclude_self:
            y = self._without_self(y, v)
        return self.o(y.transpose(1, 2).reshape(b, t, c))


class FeedForward(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.up = Linear(s.model_dim, s.mlp_hidden)
        self.down = Linear(s.mlp_hidden, s.model_dim, zero=True)
        self.slope = s.leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), negative_slope=self.slope).square())


class Block(nn.Module):
    def __init__(self, s: Settings, layer: int) -> None:
        super().__init__()
        self.attn = Attention(s, layer)
        self.ff = FeedForward(s)
        self.attn_scale = nn.Parameter(torch.ones(s.model_dim))
        self.ff_scale = nn.Parameter(torch.ones(s.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(s.model_dim), torch.zeros(s.model_dim))))
        self.depth = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.depth, ve, cos, sin)
        x = x + self.ff_scale.to(x.dtype) * self.ff(rms(x) * self.depth)
        return x


class BigramTable(nn.Module):
    """Hashed (previous, current) embedding."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.buckets = s.bigram_buckets
        self.bos = s.bos_id
        self.table = nn.Embedding(s.bigram_buckets, s.bigram_dim)
        self.proj = Linear(s.bigram_dim, s.model_dim, zero=True)
        self.scale = nn.Parameter(torch.tensor(0.05))
        nn.init.zeros_(self.table.weight)

    def forward(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0), value=self.bos)
        slot = ((36313 * ids) ^ (27191 * prev)) % self.buckets
        e = self.table(slot).to(torch.bfloat16)
        e = e * (ids != self.bos).unsqueeze(-1).to(e.dtype)
        return self.proj(e) * self.scale.to(e.dtype)


class ValueTable(nn.Module):
    """One token table shared by the value-embedding layers, each with its own gain."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        kv = s.num_kv_heads * (s.model_dim // s.num_heads)
        self.layers = s.ve_layer_ids
        self.table = nn.Embedding(s.vocab_size, s.ve_dim)
        nn.init.normal_(self.table.weight, std=0.01)
        self.proj = Linear(s.ve_dim, kv)
        self.gains = nn.Parameter(torch.full((max(len(self.layers), 1),), 0.1))

    def forward(self, ids: Tensor) -> dict[int, Tensor]:
        e = self.proj(self.table(ids).to(torch.bfloat16))
        return {layer: e * self.gains[i].to(e.dtype) for i, layer in enumerate(self.layers)}


class Smear(nn.Module):
    """Lets a little of the previous token's embedding in, but not over the start of a document."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((s.model_dim,), -3.0))
        self.bos = s.bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos).unsqueeze(-1).to(x.dtype)
        g = torch.sigmoid(self.gate).to(x.dtype) * inside
        return (1 - g) * x + g * before


class Model(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocab_size, s.model_dim)
        self.bigram = BigramTable(s)
        self.values = ValueTable(s)
        self.smear = Smear(s)
        self.rotary = Rotary(s.rope_dims, s.rope_base)
        self.blocks = nn.ModuleList(Block(s, i) for i in range(s.num_layers))
        self.half = s.num_layers // 2
        self.skips = nn.Parameter(torch.ones(self.half, s.model_dim))
        self.reset()

    def reset(self) -> None:
        nn.init.normal_(self.embed.weight, std=self.s.embed_std)
        for m in self.modules():
            if not isinstance(m, Linear):
                continue
            if m.zero_init:
                nn.init.zeros_(m.weight)
            elif min(m.weight.shape) >= 64:
                nn.init.orthogonal_(m.weight)

    def trunk(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).to(torch.bfloat16) + self.bigram(ids)
        x = self.smear(rms(x), ids)
        x0 = x
        ves = self.values(ids)
        cos, sin = self.rotary(ids.size(1), x.dtype)
        saved: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < self.half:
                x = block(x, x0, ves.get(i), cos, sin)
                saved.append(x)
            else:
                if saved and i > self.half:
                    x = x + self.skips[len(saved) - 1].to(x.dtype) * saved.pop()
                x = block(x, x0, ves.get(i), cos, sin)
        return rms(x)

    def head(self, h: Tensor) -> Tensor:
        z = F.linear(h, self.embed.weight.to(h.dtype)).float()
        return self.s.softcap * torch.tanh(z / self.s.softcap)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        z = self.head(self.trunk(ids))
        return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction=reduction)


def build_model(s: Settings, device: torch.device) -> Model:
    model = Model(s).to(device)
    for p in model.parameters():
        p.data = p.data.float()
    return model


# ------------------------------------------------------------------------------------------
# optimisers
# ------------------------------------------------------------------------------------------


@torch.compile
def orthogonalise(g: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Matrices are dealt out over the ranks; the finished updates are summed into one flat buffer."""

    def __init__(self, params: list[nn.Parameter], world: World, lr: float, momentum: float, ns: int, wd: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns=ns, wd=wd))
        self.world = world

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = orthogonalise(g, group["ns"])
                    g = g * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.flatten()
                at += p.numel()
            self.world.sum_(flat)
            at = 0
            for p in params:
                upd = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["wd"])
                p.add_(upd, alpha=-group["lr"])
                at += p.numel()


class Optimisers:
    def __init__(self, model: Model, s: Settings, world: World) -> None:
        tables = [model.embed.weight, model.bigram.table.weight, model.values.table.weight]
        known = {id(p) for p in tables}
        matrices, scalars = [], []
        for p in model.parameters():
            if id(p) in known:
                continue
            small = p.ndim < 2 or min(p.shape) < 64
            (scalars if small else matrices).append(p)
        adam = dict(betas=(s.beta1, s.beta2), eps=s.adam_eps, fused=True)
        self.muon = Muon(matrices, world, s.matrix_lr, s.muon_momentum, s.muon_ns_steps, s.muon_wd)
        self.tables = torch.optim.AdamW(tables, lr=s.embed_lr, weight_decay=s.adam_wd, **adam)
        self.scalars = torch.optim.AdamW(scalars, lr=s.scalar_lr, weight_decay=0.0, **adam)
        self.all = [self.muon, self.tables, self.scalars]
        self.s = s
        self.params = list(model.parameters())
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def prepare(self, step: int, scale: float) -> None:
        frac = min(step / self.s.muon_momentum_steps, 1.0) if self.s.muon_momentum_steps > 0 else 1.0
        momentum = (1 - frac) * self.s.muon_momentum_start + frac * self.s.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self) -> None:
        if self.s.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.params, self.s.grad_clip)
        for opt in self.all:
            opt.step()

    def zero(self) -> None:
        for p in self.params:
            p.grad = None

    def state(self) -> list[dict]:
        return [opt.state_dict() for opt in self.all]

    def load(self, states: list[dict]) -> None:
        for opt, st in zip(self.all, states, strict=True):
            opt.load_state_dict(st)


def reduce_grads(params: list[nn.Parameter], world: World, average: bool = True) -> None:
    """One flat all_reduce; a parameter without a gradient takes part with zeros."""
    if not world.active:
        return
    grads = []
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
    flat = torch.cat([g.flatten() for g in grads])
    world.mean_(flat) if average else world.sum_(flat)
    at = 0
    for g in grads:
        g.copy_(flat[at : at + g.numel()].view_as(g))
        at += g.numel()


# ------------------------------------------------------------------------------------------
# averages of the weights
# ------------------------------------------------------------------------------------------


class Averages:
    """EMA over every step, SWA over the tail of the warmdown. One of them is exported."""

    def __init__(self, model: Model, s: Settings) -> None:
        self.s = s
        self.params = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.swa: list[Tensor] | None = None
        self.swa_n = 0

    @torch.no_grad()
    def after_step(self, step: int, lr_scale: float) -> None:
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1.0 - self.s.ema_decay)
        if self.s.average != "swa" or lr_scale > self.s.swa_scale or step % self.s.swa_every:
            return
        if self.swa is None:
            self.swa = [torch.zeros_like(p) for p in self.params]
        torch._foreach_add_(self.swa, [p.detach() for p in self.params])
        self.swa_n += 1

    @torch.no_grad()
    def install(self, kind: str) -> str:
        """Overwrites the model's weights with the average; returns what was really installed."""
        if kind == "swa" and self.swa is not None and self.swa_n:
            for p, acc in zip(self.params, self.swa, strict=True):
                p.copy_(acc / self.swa_n)
            return f"swa over {self.swa_n}"
        if kind in ("ema", "swa"):
            for p, avg in zip(self.params, self.ema, strict=True):
                p.copy_(avg)
            return f"ema {self.s.ema_decay}"
        return "last weights"


# ------------------------------------------------------------------------------------------
# training
# ------------------------------------------------------------------------------------------


class Clock:
    """Seconds of GPU-synchronised wall clock; validation for the log is taken out with pause/resume."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def resume(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def pause(self) -> None:
        torch.cuda.synchronize()
        if self.since is not None:
            self.spent += time.perf_counter() - self.since
            self.since = None

    def read(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.spent + running


def lr_scale_at(step: int, elapsed: float, budget: float, s: Settings) -> float:
    if s.warmdown_iters <= 0:
        return 1.0
    if budget <= 0:
        start = max(s.iterations - s.warmdown_iters, 0)
        return max((s.iterations - step) / s.warmdown_iters, 0.0) if step >= start else 1.0
    per_step = elapsed / max(step, 1)
    span = s.warmdown_iters * per_step
    left = max(budget - elapsed, 0.0)
    return left / max(span, 1e-9) if left <= span else 1.0


def train_step(step_model, loader: BatchLoader, opts: Optimisers, s: Settings, world: World) -> Tensor:
    """Gradients of one global batch, reduced over the ranks; the update is the caller's."""
    total = torch.zeros((), device=world.device)
    opts.zero()
    for _ in range(world.accum):
        x, y = loader.next(s.batch_tokens // world.accum)
        loss = step_model(x, y) / world.accum
        loss.backward()
        total += loss.detach()
    reduce_grads(opts.params, world)
    return total


def warm_up(step_model, model: Model, opts: Optimisers, s: Settings, world: World, log: Log) -> None:
    """Compiles and primes the kernels on training batches, then puts weights and optimisers back."""
    if s.warmup_steps <= 0:
        return
    before = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    opt_before = opts.state()
    loader = BatchLoader(s.train_glob, world, s.seq_len)
    for i in range(s.warmup_steps):
        train_step(step_model, loader, opts, s, world)
        opts.step()
        if i + 1 == s.warmup_steps or (i + 1) % 10 == 0:
            log(f"warmup_step:{i + 1}/{s.warmup_steps}")
    model.load_state_dict(before)
    opts.load(opt_before)
    opts.zero()


def train(
    model: Model,
    s: Settings,
    world: World,
    log: Log,
    clock: Clock,
    val_tokens: Tensor,
    tables: ByteTables,
) -> None:
    step_model = torch.compile(model, dynamic=False, fullgraph=True)
    opts = Optimisers(model, s, world)
    warm_up(step_model, model, opts, s, world, log)
    averages = Averages(model, s)
    loader = BatchLoader(s.train_glob, world, s.seq_len)
    budget = s.cap_s - s.reserve_s if s.cap_s > 0 else 0.0

    step = 0
    stop_at: int | None = None
    world.barrier()
    clock.resume()
    while True:
        last = step == s.iterations or (stop_at is not None and step >= stop_at)
        if last or (s.val_every > 0 and step > 0 and step % s.val_every == 0):
            clock.pause()
            loss, bpb = evaluate_blocks(model, val_tokens, tables, s, world)
            log(
                f"step:{step}/{s.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} "
                f"train_time:{1000 * clock.read():.0f}ms step_avg:{1000 * clock.read() / max(step, 1):.2f}ms"
            )
            world.barrier()
            clock.resume()
        if last:
            break

        scale = lr_scale_at(step, clock.read(), budget, s)
        train_loss = train_step(step_model, loader, opts, s, world)
        opts.prepare(step, scale)
        opts.step()
        step += 1
        averages.after_step(step, scale)

        if s.log_every > 0 and (step <= 5 or step % s.log_every == 0):
            log(f"step:{step}/{s.iterations} train_loss:{train_loss.item():.4f} train_time:{1000 * clock.read():.0f}ms")
        if stop_at is None and budget > 0 and world.any(clock.read() >= budget):
            stop_at = step

    opts.zero()
    log(f"training stopped at step {step}, {clock.read():.1f}s on the clock")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    log(f"exporting {averages.install(s.average)}")


# ------------------------------------------------------------------------------------------
# GPTQ
# ------------------------------------------------------------------------------------------

Q6 = 31
Q8 = 127


class HessianTap:
    """Collects sum of x x^T at the input of each linear layer while batches run through the model."""

    def __init__(self, model: Model) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.handles = []
        for name, m in model.named_modules():
            if isinstance(m, Linear):
                self.handles.append(m.register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str):
        def hook(module, args):
            x = args[0].detach().flatten(0, -2).float()
            h = x.T @ x
            if name in self.sums:
                self.sums[name] += h
                self.rows[name] += x.size(0)
            else:
                self.sums[name] = h
                self.rows[name] = x.size(0)

        return hook

    def close(self, world: World) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        return {name: world.sum_(h) / (self.rows[name] * world.size) for name, h in self.sums.items()}


def calibration_batches(s: Settings, world: World):
    """Rows for the Hessians: the head of the training stream, a different part on each rank."""
    loader = BatchLoader(s.train_glob, world, s.seq_len)
    for _ in range(s.calib_batches):
        x, _ = loader.next(s.calib_rows * s.seq_len * world.size)
        yield x


@torch.no_grad()
def collect_hessians(model: Model, s: Settings, world: World) -> dict[str, Tensor]:
    tap = HessianTap(model)
    for ids in calibration_batches(s, world):
        model.trunk(ids)
    return tap.close(world)


def row_scales(w: Tensor, top: int) -> Tensor:
    """Per row: the clip among a few quantiles that gives the smallest squared error of the weights."""
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best = torch.ones(w.size(0), device=w.device)
    mag = w.abs()
    for quant in (1.0, 0.9999, 0.9995, 0.999, 0.998, 0.995):
        clip = mag.amax(1) if quant == 1.0 else torch.quantile(mag, quant, dim=1)
        scale = (clip / top).clamp_min(1e-8)
        scale = scale.half().float().clamp_min(6e-8)
        back = (w / scale[:, None]).round().clamp(-top, top) * scale[:, None]
        err = (back - w).square().sum(1)
        take = err < best_err
        best_err = torch.where(take, err, best_err)
        best = torch.where(take, scale, best)
    return best


def round_rows(w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    scale = row_scales(w, top)
    q = (w / scale[:, None]).round().clamp(-top, top)
    return q.to(torch.int8), scale.half()


def gptq(w: Tensor, hessian: Tensor, s: Settings, top: int) -> tuple[Tensor, Tensor]:
    """Column-wise rounding with the error pushed into the columns that are still to come."""
    w = w.float().clone()
    h = hessian.float().clone()
    cols = w.size(1)
    dead = torch.diagonal(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(torch.diagonal(h), descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(s.gptq_damp * torch.diagonal(h).mean())
    try:
        inv = torch.cholesky_inverse(torch.linalg.cholesky(h))
        u = torch.linalg.cholesky(inv, upper=True)
    except torch.linalg.LinAlgError:
        back = torch.argsort(order)
        return round_rows(w[:, back], top)
    scale = row_scales(w, top)
    q = torch.zeros_like(w)
    for lo in range(0, cols, s.gptq_block):
        hi = min(lo + s.gptq_block, cols)
        block = w[:, lo:hi].clone()
        errs = torch.zeros_like(block)
        ub = u[lo:hi, lo:hi]
        for j in range(hi - lo):
            col = block[:, j]
            qc = (col / scale).round().clamp(-top, top)
            q[:, lo + j] = qc
            e = (col - qc * scale) / ub[j, j]
            block[:, j:] -= e[:, None] * ub[j, j:][None, :]
            errs[:, j] = e
        if hi < cols:
            w[:, hi:] -= errs @ u[lo:hi, hi:]
    back = torch.argsort(order)
    return q[:, back].to(torch.int8), scale.half()


# ------------------------------------------------------------------------------------------
# artifact
# ------------------------------------------------------------------------------------------


def quantise_model(model: Model, hessians: dict[str, Tensor], s: Settings, world: World) -> dict[str, dict[str, Tensor]]:
    """Matrices are dealt out over the ranks; each result is broadcast by the rank that made it."""
    packed: dict[str, dict[str, Tensor]] = {"q": {}, "scale": {}, "raw": {}}
    matrix = 0
    for name, p in model.state_dict().items():
        w = p.detach()
        if w.ndim != 2 or min(w.shape) < 64:
            packed["raw"][name] = w.half().cpu()
            continue
        owner = matrix % world.size
        matrix += 1
        q = torch.zeros(w.shape, dtype=torch.int8, device=world.device)
        scale = torch.zeros(w.size(0), dtype=torch.float16, device=world.device)
        if owner == world.rank:
            module = name.removesuffix(".weight")
            if module in hessians:
                q, scale = gptq(w, hessians[module], s, Q6)
            else:
                q, scale = round_rows(w.float(), Q8)
            q, scale = q.contiguous(), scale.contiguous()
        if world.active:
            dist.broadcast(q, src=owner)
            dist.broadcast(scale, src=owner)
        packed["q"][name] = q.cpu()
        packed["scale"][name] = scale.cpu()
    return packed


def compress(packed: dict[str, dict[str, Tensor]]) -> bytes:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(buffer.getvalue(), format=lzma.FORMAT_XZ, filters=filters)


def export(model: Model, s: Settings, world: World, log: Log, clock: Clock) -> None:
    """Calibration, GPTQ, compression and the written file, all on the training clock."""
    began = clock.read()
    hessians = collect_hessians(model, s, world)
    log(f"hessians of {len(hessians)} layers from training text, {clock.read() - began:.1f}s")
    packed = quantise_model(model, hessians, s, world)
    log(f"quantised, {clock.read() - began:.1f}s")
    if world.master:
        Path(s.artifact_path).write_bytes(compress(packed))
    world.barrier()
    clock.pause()
    log(f"artifact written, {clock.read() - began:.1f}s; training and export {clock.read():.1f}s of {s.cap_s:.0f}s")
    if s.cap_s > 0 and world.any(clock.read() > s.cap_s):
        raise RuntimeError("training and export took longer than the cap")


def check_size(s: Settings, log: Log) -> int:
    code = len(Path(__file__).read_bytes())
    model = Path(s.artifact_path).stat().st_size
    total = code + model
    log(f"Serialized model lzma: {model} bytes")
    log(f"Code size: {code} bytes")
    log(f"Total submission size: {total} bytes")
    if total > s.size_limit:
        raise RuntimeError(f"{total} bytes are more than {s.size_limit}")
    return total


def load_artifact(s: Settings, device: torch.device) -> Model:
    raw = lzma.decompress(Path(s.artifact_path).read_bytes())
    packed = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = {name: t.float() for name, t in packed["raw"].items()}
    for name, q in packed["q"].items():
        state[name] = q.float() * packed["scale"][name].float()[:, None]
    model = build_model(s, device)
    model.load_state_dict(state, strict=True)
    return model


# ------------------------------------------------------------------------------------------
# scoring
#
# tokens x[0..T]; prediction i reads x[..i] and is about x[i+1], so there are T predictions 0..T-1.
# Segment k is the predictions k*stride .. (k+1)*stride-1 (the last one may be shorter). It is scored
# from one window that ends with the segment, so every prediction belongs to exactly one window.
# ------------------------------------------------------------------------------------------


class Ledger:
    """Sums of one evaluation. nll in fp64; tokens and bytes are whole numbers."""

    def __init__(self, device: torch.device) -> None:
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.bytes = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, nll: Tensor, n_bytes: Tensor) -> None:
        self.nll += nll.double().sum()
        self.tokens += nll.numel()
        self.bytes += n_bytes.sum()

    def running_bpb(self) -> float:
        return self.nll.item() / math.log(2.0) / max(self.bytes.item(), 1)

    def close(self, world: World, expected: int) -> tuple[float, float]:
        for t in (self.nll, self.tokens, self.bytes):
            world.sum_(t)
        if int(self.tokens.item()) != expected:
            raise RuntimeError(f"{int(self.tokens.item())} predictions scored, {expected} expected")
        loss = self.nll.item() / self.tokens.item()
        bpb = self.nll.item() / math.log(2.0) / self.bytes.item()
        return loss, bpb


@dataclass
class Windows:
    ids: Tensor  # [B, L] inputs
    rows: Tensor  # [n] row of each scored prediction
    cols: Tensor  # [n] its column in the window
    pred: Tensor  # [n] its index in the stream


def cut_windows(tokens: Tensor, segments: Tensor, stride: int, length: int, batch: int) -> Windows:
    """Windows of the segments, padded to `batch` rows so that the compiled shape stays the same."""
    total = tokens.numel() - 1
    n = segments.numel()
    if n < batch:
        segments = torch.cat((segments, segments[-1:].expand(batch - n)))
    start = segments * stride
    end = (start + stride).clamp(max=total)
    begin = (end - length).clamp(min=0)
    at = begin[:, None] + torch.arange(length, device=tokens.device)
    ids = tokens[at.clamp(max=total - 1)]
    ids = torch.where(at < end[:, None], ids, torch.zeros_like(ids))
    pred = start[:, None] + torch.arange(stride, device=tokens.device)
    real = pred < end[:, None]
    real[n:] = False
    rows = torch.arange(batch, device=tokens.device)[:, None].expand_as(pred)
    cols = pred - begin[:, None]
    return Windows(ids, rows[real], cols[real], pred[real])


def count_segments(n_predictions: int, stride: int) -> int:
    return -(-n_predictions // stride)


@torch.no_grad()
def evaluate_blocks(model: Model, tokens: Tensor, tables: ByteTables, s: Settings, world: World) -> tuple[float, float]:
    """Disjoint blocks of seq_len, for the training log and as a check of the artifact."""
    ledger = Ledger(world.device)
    total = tokens.numel() - 1
    mine = world.share(count_segments(total, s.seq_len))
    trunk = torch.compile(model.trunk, dynamic=False)
    for lo in range(mine.start, mine.stop, s.eval_batch):
        segs = torch.arange(lo, min(lo + s.eval_batch, mine.stop), device=world.device)
        w = cut_windows(tokens, segs, s.seq_len, s.seq_len, s.eval_batch)
        z = model.head(trunk(w.ids)[w.rows, w.cols])
        target = tokens[w.pred + 1]
        nll = F.cross_entropy(z, target, reduction="none")
        ledger.add(nll, tables.count(tokens[w.pred], target))
    return ledger.close(world, total)


# ------------------------------------------------------------------------------------------
# online n-gram counts
# ------------------------------------------------------------------------------------------


class NgramCounts:
    """
    Counts of next tokens after contexts of 0 .. max_order-1 tokens, filled with text that has been scored.

    A row of a table is a whole vector over the vocabulary. Contexts of two tokens and more share rows by
    a hash of the context (never of the next token), so a collision makes a row blunter but each row is
    still turned into a distribution by its own sum. Orders are interpolated from short to long:

        p_k = (c_k + lam_k * p_{k-1}) / (sum c_k + lam_k),   lam_k = strength * distinct next tokens
    """

    def __init__(self, s: Settings, device: torch.device) -> None:
        self.vocab = s.vocab_size
        self.bits = s.ngram_bits
        self.strength = s.ngram_strength
        self.seen = 0
        self.uni = torch.zeros(self.vocab, dtype=torch.int32, device=device)
        self.tables: list[Tensor] = []
        for k in range(1, s.ngram_max_order):
            rows = self.vocab if k == 1 else 1 << self.bits
            self.tables.append(torch.zeros(rows, self.vocab, dtype=torch.int32, device=device))

    def slots(self, tokens: Tensor, pred: Tensor, k: int) -> Tensor:
        """Row of the context x[i-k+1..i] of prediction i."""
        if k == 1:
            return tokens[pred]
        h = torch.full_like(pred, 0x9E37 + k)
        for back in range(k):
            t = tokens[(pred - back).clamp(min=0)]
            h = (h * 1_000_003 + t * 7919 + 12289) & 0x7FFFFFFFFFFF
            h = h ^ (h >> 17)
        return h & ((1 << self.bits) - 1)

    def predict(self, tokens: Tensor, pred: Tensor) -> Tensor:
        """[n, vocab]: for each prediction the distribution that its context gives."""
        p = (self.uni.float() + 1.0) / (self.uni.sum().float() + self.vocab)
        p = p.expand(pred.numel(), -1)
        for k, table in enumerate(self.tables, start=1):
            c = table[self.slots(tokens, pred, k)].float()
            n = c.sum(-1, keepdim=True)
            lam = self.strength * (c > 0).sum(-1, keepdim=True).clamp(min=1)
            p = (c + lam * p) / (n + lam)
        return p

    def add(self, tokens: Tensor, lo: int, hi: int) -> None:
        """Counts the targets of predictions lo .. hi-1."""
        pred = torch.arange(lo, hi, device=tokens.device)
        target = tokens[pred + 1]
        one = torch.ones_like(target, dtype=torch.int32)
        self.uni.scatter_add_(0, target, one)
        for k, table in enumerate(self.tables, start=1):
            flat = self.slots(tokens, pred, k) * self.vocab + target
            table.view(-1).scatter_add_(0, flat, one)
        self.seen += hi - lo


def entropy_weight(logp: Tensor, seen: int, s: Settings) -> Tensor:
    """Share of the counts: more where the net is unsure, little while the counts are young."""
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    weight = s.mix_lo + (s.mix_hi - s.mix_lo) * torch.sigmoid(s.mix_slope * (entropy - s.mix_centre))
    return weight * (seen / (seen + 200_000.0))


def predictive_logp(z: Tensor, tokens: Tensor, pred: Tensor, counts: NgramCounts | None, s: Settings) -> Tensor:
    """[n, vocab] log-probabilities: the net alone, or the net mixed with the counts."""
    logp = F.log_softmax(z / s.logit_temp, dim=-1)
    if counts is None or counts.seen == 0:
        return logp
    weight = entropy_weight(logp, counts.seen, s)
    mixed = (1.0 - weight) * logp.exp() + weight * counts.predict(tokens, pred)
    if s.self_check:
        off = (mixed.sum(-1) - 1.0).abs().max().item()
        if off > 1e-3:
            raise RuntimeError(f"mixture sums to one within {off:.2e} only")
    return mixed.clamp_min(1e-12).log()


# ------------------------------------------------------------------------------------------
# test-time training
# ------------------------------------------------------------------------------------------


class ChunkTrainer:
    """AdamW on the later blocks; fed with one chunk at a time, after that chunk's losses are in the ledger."""

    def __init__(self, model: Model, s: Settings, world: World, n_chunks: int) -> None:
        self.model = model
        self.s = s
        self.world = world
        self.n_chunks = n_chunks
        for p in model.parameters():
            p.requires_grad_(False)
        self.params: list[nn.Parameter] = []
        for block in model.blocks[s.ttt_freeze :]:
            for p in block.parameters():
                p.requires_grad_(True)
                self.params.append(p)
        self.opt = torch.optim.AdamW(self.params, lr=s.ttt_lr, betas=(0.9, 0.99), weight_decay=s.ttt_wd, fused=True)

    def lr_at(self, chunk: int) -> float:
        return self.s.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * chunk / max(self.n_chunks - 1, 1)))

    def sequences(self, tokens: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Whole rows of predictions lo .. hi-1, inputs and targets."""
        length = min(self.s.seq_len, hi - lo)
        n = (hi - lo) // length
        span = tokens[lo : lo + n * length + 1]
        return span[:-1].view(n, length), span[1:].view(n, length)

    def learn(self, tokens: Tensor, lo: int, hi: int, chunk: int) -> None:
        x, y = self.sequences(tokens, lo, hi)
        mine = self.world.share(x.size(0))
        for group in self.opt.param_groups:
            group["lr"] = self.lr_at(chunk)
        for _ in range(self.s.ttt_epochs):
            self.opt.zero_grad(set_to_none=True)
            for row in range(mine.start, mine.stop, 4):
                part = slice(row, min(row + 4, mine.stop))
                loss = self.model(x[part], y[part], reduction="sum") / y.numel()
                loss.backward()
            if self.world.size > 1:
                reduce_grads(self.params, self.world, average=False)
            torch.nn.utils.clip_grad_norm_(self.params, self.s.ttt_clip)
            self.opt.step()


# ------------------------------------------------------------------------------------------
# the reported evaluation
# ------------------------------------------------------------------------------------------


class Scorer:
    """Scores segments with the state of the model and the counts as they are at the call."""

    def __init__(self, model: Model, tokens: Tensor, tables: ByteTables, s: Settings, world: World) -> None:
        self.model = model
        self.tokens = tokens
        self.tables = tables
        self.s = s
        self.world = world
        self.trunk = torch.compile(model.trunk, dynamic=False)

    def segments_of(self, lo: int, hi: int) -> range:
        """This rank's part of the segments of predictions lo .. hi-1 (lo is a multiple of the stride)."""
        first = lo // self.s.stride
        part = self.world.share(count_segments(hi, self.s.stride) - first)
        return range(first + part.start, first + part.stop)

    @torch.no_grad()
    def score(self, lo: int, hi: int, counts: NgramCounts | None, ledger: Ledger) -> None:
        mine = self.segments_of(lo, hi)
        for at in range(mine.start, mine.stop, self.s.eval_batch):
            segs = torch.arange(at, min(at + self.s.eval_batch, mine.stop), device=self.world.device)
            w = cut_windows(self.tokens, segs, self.s.stride, self.s.seq_len, self.s.eval_batch)
            hidden = self.trunk(w.ids)[w.rows, w.cols]
            z = self.model.head(hidden)
            logp = predictive_logp(z, self.tokens, w.pred, counts, self.s)
            target = self.tokens[w.pred + 1]
            nll = -logp.gather(-1, target[:, None]).squeeze(-1)
            ledger.add(nll, self.tables.count(self.tokens[w.pred], target))


def evaluate_adaptive(
    model: Model,
    tokens: Tensor,
    tables: ByteTables,
    s: Settings,
    world: World,
    log: Log,
    clock: Clock,
) -> tuple[float, float]:
    """
    Left to right over chunks. All ranks score their windows of a chunk with the state left by the chunks
    before it; then every rank counts the chunk's n-grams and takes part in the training steps on it.
    """
    total = tokens.numel() - 1
    n_chunks = -(-total // s.ttt_chunk)
    scorer = Scorer(model, tokens, tables, s, world)
    trainer = ChunkTrainer(model, s, world, n_chunks) if s.ttt else None
    counts = NgramCounts(s, world.device) if s.ngram else None
    ledger = Ledger(world.device)
    log(f"adaptive: {total} predictions, {n_chunks} chunks, ttt:{s.ttt} ngram:{s.ngram}")

    for chunk in range(n_chunks):
        lo = chunk * s.ttt_chunk
        hi = min(lo + s.ttt_chunk, total)
        scorer.score(lo, hi, counts, ledger)

        if counts is not None:
            counts.add(tokens, lo, hi)
        if trainer is not None and chunk + 1 < n_chunks:
            trainer.learn(tokens, lo, hi, chunk)
            if chunk % 16 == 15 and world.any(clock.read() > s.ttt_stop_s):
                log(f"ttt stops after chunk {chunk}, {clock.read():.0f}s used; scoring goes on")
                trainer = None
        if chunk % 100 == 0 or chunk + 1 == n_chunks:
            log(f"  chunk {chunk + 1}/{n_chunks} bpb(rank 0):{ledger.running_bpb():.5f} t:{clock.read():.1f}s")

    return ledger.close(world, total)


@torch.no_grad()
def evaluate_windows(
    model: Model,
    tokens: Tensor,
    tables: ByteTables,
    s: Settings,
    world: World,
) -> tuple[float, float]:
    """Sliding windows with frozen weights and no counts, for ablations (REPORT_PLAIN=1)."""
    total = tokens.numel() - 1
    scorer = Scorer(model, tokens, tables, s, world)
    ledger = Ledger(world.device)
    scorer.score(0, total, None, ledger)
    return ledger.close(world, total)


# ------------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def log_environment(log: Log, s: Settings) -> None:
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version.split()[0]}, PyTorch {torch.__version__}")
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)
    for f in fields(s):
        log(f"  {f.name} = {getattr(s, f.name)}", console=False)


def load_tokenizer(s: Settings) -> spm.SentencePieceProcessor:
    sp = spm.SentencePieceProcessor(model_file=s.tokenizer_path)
    if int(sp.vocab_size()) != s.vocab_size:
        raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {s.vocab_size}")
    return sp


def main() -> None:
    s = Settings()
    world = World()
    log = Log(world, s.run_id)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    seed_everything(s.seed)
    log_environment(log, s)

    sp = load_tokenizer(s)
    tables = build_byte_tables(sp, s.vocab_size, world.device)
    val_tokens = read_validation(s.val_glob).to(world.device)
    log(f"train shards:{len(glob.glob(s.train_glob))} val tokens:{val_tokens.numel()}")

    model = build_model(s, world.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())} world_size:{world.size} accum:{world.accum} seed:{s.seed}")

    # ---- training phase: 600 s up to the written artifact
    train_clock = Clock()
    train(model, s, world, log, train_clock, val_tokens, tables)
    export(model, s, world, log, train_clock)
    total_bytes = check_size(s, log)
    del model
    torch.cuda.empty_cache()

    # ---- evaluation phase: a clock of its own, begins with the reading of the artifact
    torch._dynamo.reset()
    eval_clock = Clock()
    eval_clock.resume()
    model = load_artifact(s, world.device)
    loss, bpb = evaluate_blocks(model, val_tokens, tables, s, world)
    log(f"roundtrip_blocks val_loss:{loss:.4f} val_bpb:{bpb:.4f} t:{eval_clock.read():.1f}s")
    if s.report_plain:
        loss, bpb = evaluate_windows(model, val_tokens, tables, s, world)
        log(f"sliding_frozen val_loss:{loss:.4f} val_bpb:{bpb:.4f} t:{eval_clock.read():.1f}s")

    loss, bpb = evaluate_adaptive(model, val_tokens, tables, s, world, log, eval_clock)
    eval_clock.pause()
    log(f"eval_time:{eval_clock.read():.1f}s of {s.eval_limit_s:.0f}s")
    if world.any(eval_clock.read() > s.eval_limit_s):
        raise RuntimeError("the evaluation took longer than its limit")
    log(f"final_adaptive val_loss:{loss:.4f} val_bpb:{bpb:.4f}")
    log(f"final_adaptive_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if world.master:
        result = {"val_loss": loss, "val_bpb": bpb, "bytes_total": total_bytes, "seed": s.seed}
        Path("logs", f"{s.run_id}.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    world.close()


if __name__ == "__main__":
    main()
