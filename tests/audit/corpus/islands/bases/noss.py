"""
Parameter Golf record script: 11 layers x 512 dims, SmearGate, BigramHash, XSA on the last layers, partial RoPE,
EMA and SWA of the weights, late int6 QAT, GPTQ-lite clip search, zstd-22, sliding windows with a causal n-gram cache.

Run from this folder:  torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import math
import os
import random
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn

# --------------------------------------------------------------------------------------
# Configuration: every field can be overridden by the environment variable of its name.
# --------------------------------------------------------------------------------------


def env(name: str, default):
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


@dataclass
class Config:
    # data
    data_path: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_pattern: str = env("TRAIN_PATTERN", "fineweb_train_*.bin")
    val_pattern: str = env("VAL_PATTERN", "fineweb_val_*.bin")
    tokenizer_path: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = env("RUN_ID", str(uuid.uuid4()))
    seed: int = env("SEED", 1337)

    # length of training
    iterations: int = env("ITERATIONS", 9000)
    warmdown_iters: int = env("WARMDOWN_ITERS", 3500)
    warmup_steps: int = env("WARMUP_STEPS", 20)
    max_wallclock_seconds: float = env("MAX_WALLCLOCK_SECONDS", 600.0)
    quant_reserve_seconds: float = env("QUANT_RESERVE_SECONDS", 22.0)
    train_batch_tokens: int = env("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len: int = env("TRAIN_SEQ_LEN", 2048)
    log_every: int = env("LOG_EVERY", 250)
    val_every: int = env("VAL_EVERY", 4000)
    val_batch_tokens: int = env("VAL_BATCH_TOKENS", 524_288)

    # model
    vocab_size: int = env("VOCAB_SIZE", 1024)
    num_layers: int = env("NUM_LAYERS", 11)
    model_dim: int = env("MODEL_DIM", 512)
    num_heads: int = env("NUM_HEADS", 8)
    num_kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_mult: float = env("MLP_MULT", 3.0)
    rope_base: float = env("ROPE_BASE", 10_000.0)
    rope_dims: int = env("ROPE_DIMS", 16)
    xsa_last_n: int = env("XSA_LAST_N", 4)
    logit_softcap: float = env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init: float = env("QK_GAIN_INIT", 1.5)
    tied_embed_std: float = env("TIED_EMBED_STD", 0.005)
    bigram_buckets: int = env("BIGRAM_BUCKETS", 2048)
    bigram_dim: int = env("BIGRAM_DIM", 128)
    bos_id: int = env("BOS_ID", 1)

    # optimisation
    matrix_lr: float = env("MATRIX_LR", 0.025)
    scalar_lr: float = env("SCALAR_LR", 0.025)
    embed_lr: float = env("EMBED_LR", 0.035)
    muon_momentum: float = env("MUON_MOMENTUM", 0.99)
    muon_momentum_start: float = env("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps: int = env("MUON_MOMENTUM_STEPS", 1500)
    muon_ns_steps: int = env("MUON_NS_STEPS", 5)
    muon_wd: float = env("MUON_WD", 0.04)
    adam_wd: float = env("ADAM_WD", 0.04)
    beta1: float = env("BETA1", 0.9)
    beta2: float = env("BETA2", 0.95)
    adam_eps: float = env("ADAM_EPS", 1e-8)
    grad_clip: float = env("GRAD_CLIP", 0.3)

    # averages of the weights
    ema_decay: float = env("EMA_DECAY", 0.997)
    swa_every: int = env("SWA_EVERY", 50)
    swa_start_scale: float = env("SWA_START_SCALE", 0.2)
    swa_share: float = env("SWA_SHARE", 0.5)

    # quantisation
    qat_start_scale: float = env("QAT_START_SCALE", 0.15)
    matrix_bits: int = env("MATRIX_BITS", 6)
    embed_bits: int = env("EMBED_BITS", 8)
    calib_batches: int = env("CALIB_BATCHES", 16)
    calib_rows: int = env("CALIB_ROWS", 16)
    zstd_level: int = env("ZSTD_LEVEL", 22)
    size_limit: int = env("SIZE_LIMIT", 16_000_000)
    artifact_path: str = env("ARTIFACT_PATH", "final_model.int6.ptz")

    # evaluation
    eval_seq_len: int = env("EVAL_SEQ_LEN", 2048)
    eval_stride: int = env("EVAL_STRIDE", 64)
    eval_batch_windows: int = env("EVAL_BATCH_WINDOWS", 32)
    cache_enabled: bool = env("CACHE_ENABLED", True)
    cache_orders: str = env("CACHE_ORDERS", "1,2,3")
    cache_buckets: int = env("CACHE_BUCKETS", 65_536)
    cache_strength: float = env("CACHE_STRENGTH", 2.0)
    cache_weight_max: float = env("CACHE_WEIGHT_MAX", 0.30)
    cache_entropy_mid: float = env("CACHE_ENTROPY_MID", 2.4)
    cache_entropy_slope: float = env("CACHE_ENTROPY_SLOPE", 1.6)

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, self.train_pattern)

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, self.val_pattern)

    def describe(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


# --------------------------------------------------------------------------------------
# Ranks and the log
# --------------------------------------------------------------------------------------


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def chief(self) -> bool:
        return self.rank == 0

    @property
    def active(self) -> bool:
        return self.world > 1

    def add_up(self, tensor: Tensor) -> Tensor:
        if self.active:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def largest(self, value: float) -> float:
        cell = torch.tensor([value], device=self.device, dtype=torch.float64)
        if self.active:
            dist.all_reduce(cell, op=dist.ReduceOp.MAX)
        return float(cell.item())

    def barrier(self) -> None:
        if self.active:
            dist.barrier()


def open_ranks() -> Ranks:
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if 8 % world != 0:
        raise ValueError(f"WORLD_SIZE={world} must divide 8")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return Ranks(rank, world, device)


class Log:
    def __init__(self, ranks: Ranks, run_id: str):
        self.file = Path("logs") / f"{run_id}.txt" if ranks.chief else None
        if self.file is not None:
            self.file.parent.mkdir(exist_ok=True)
            print(self.file)

    def __call__(self, text: str, screen: bool = True) -> None:
        if self.file is None:
            return
        if screen:
            print(text, flush=True)
        with self.file.open("a", encoding="utf-8") as out:
            print(text, file=out)


# --------------------------------------------------------------------------------------
# Shards and batches
# --------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(file: Path) -> Tensor:
    """The tokens of a .bin shard: 256 little-endian int32 of header, then uint16 tokens."""
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {file}")
    count = int(header[2])
    offset = HEADER_INTS * np.dtype("<i4").itemsize
    if file.stat().st_size != offset + 2 * count:
        raise ValueError(f"shard size mismatch in {file}: header says {count} tokens")
    body = np.fromfile(file, dtype="<u2", count=count, offset=offset)
    if body.size != count:
        raise ValueError(f"short read of {file}")
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[Path]:
    found = [Path(p) for p in sorted(glob.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"no shards match {pattern}")
    return found


def load_val_stream(pattern: str) -> Tensor:
    """All validation shards one after the other, as the official split orders them."""
    return torch.cat([read_shard(f) for f in list_shards(pattern)]).contiguous()


class TokenStream:
    """Reads shards in order and starts again at the first when the last is used up."""

    def __init__(self, pattern: str):
        self.shards = list_shards(pattern)
        self.at = 0
        self.current = read_shard(self.shards[0])
        self.pos = 0

    def advance(self) -> None:
        self.at = (self.at + 1) % len(self.shards)
        self.current = read_shard(self.shards[self.at])
        self.pos = 0

    def take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        left = count
        while left > 0:
            free = self.current.numel() - self.pos
            if free <= 0:
                self.advance()
                continue
            n = min(left, free)
            parts.append(self.current[self.pos : self.pos + n])
            self.pos += n
            left -= n
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class BatchSource:
    """Disjoint slices of one token stream for the ranks; every rank reads the same stream."""

    def __init__(self, pattern: str, ranks: Ranks):
        self.ranks = ranks
        self.stream = TokenStream(pattern)

    def next(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.ranks.world * accum)
        span = local + 1
        chunk = self.stream.take(span * self.ranks.world)
        begin = self.ranks.rank * span
        piece = chunk[begin : begin + span].to(dtype=torch.int64)
        x = piece[:-1].reshape(-1, seq_len)
        y = piece[1:].reshape(-1, seq_len)
        return x.to(self.ranks.device, non_blocking=True), y.to(self.ranks.device, non_blocking=True)


# --------------------------------------------------------------------------------------
# Bytes of the tokens
# --------------------------------------------------------------------------------------


@dataclass
class ByteTables:
    """For each token id: its bytes without a leading space, whether it has one, whether it is a boundary."""

    plain: Tensor
    spaced: Tensor
    boundary: Tensor

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes that each target adds to the text, given the token before it."""
        n = self.plain[target].to(torch.int64)
        n = n + (self.spaced[target] & ~self.boundary[prev]).to(torch.int64)
        return n


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTables:
    size = max(int(sp.vocab_size()), vocab_size)
    plain = np.zeros((size,), dtype=np.int16)
    spaced = np.zeros((size,), dtype=np.bool_)
    boundary = np.ones((size,), dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        if sp.is_byte(i):
            plain[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            spaced[i] = True
            piece = piece[1:]
        plain[i] = len(piece.encode("utf-8"))
    return ByteTables(
        torch.tensor(plain, dtype=torch.int16, device=device),
        torch.tensor(spaced, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


# --------------------------------------------------------------------------------------
# Muon, with the matrices shared out over the ranks
# --------------------------------------------------------------------------------------


def newton_schulz(grad: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + eps)
    flip = x.size(0) > x.size(1)
    if flip:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float, ns_steps: int, weight_decay: float, ranks: Ranks):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay))
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=self.ranks.device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(p.grad)
                    buffer = state["buffer"]
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    update = p.grad.add(buffer, alpha=group["momentum"])
                    update = newton_schulz(update, group["ns_steps"])
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.reshape(-1)
                at += p.numel()
            self.ranks.add_up(flat)
            at = 0
            for p in params:
                if group["weight_decay"] > 0.0:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()
        return loss


# --------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------

CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear", "bigram.scale")


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


def fake_round(weight: Tensor, bits: int) -> Tensor:
    """Straight-through rounding of each row to a symmetric grid of so many bits."""
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        w32 = weight.float()
        scale = (w32.abs().amax(dim=1, keepdim=True) / top).clamp_min(1e-8)
        rounded = (torch.round(w32 / scale).clamp(-top - 1, top) * scale).to(weight.dtype)
    return weight + (rounded - weight).detach()


class QLinear(nn.Linear):
    """A linear layer with float32 weights that computes in the input's type; rounds its weights late in training."""

    fake_bits: int = 0

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)
        self.zero_init = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)
        if QLinear.fake_bits and self.training and w.ndim == 2:
            w = fake_round(w, QLinear.fake_bits)
        return F.linear(x, w)


class PartialRotary(nn.Module):
    """Rotates the first `dims` channels of each head and leaves the others as they are."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        self.dims = dims
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv", inv, persistent=False)
        self.length = 0
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.cos is None or self.length != length or self.cos.device != device:
            t = torch.arange(length, device=device, dtype=torch.float32)
            angle = torch.outer(t, self.inv.to(device))
            self.cos = angle.cos()[None, :, None, :]
            self.sin = angle.sin()[None, :, None, :]
            self.length = length
        return self.cos.to(dtype), self.sin.to(dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = x[..., : self.dims], x[..., self.dims :]
        half = self.dims // 2
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
        return torch.cat((turned, kept), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        if cfg.model_dim % cfg.num_heads or cfg.num_heads % cfg.num_kv_heads:
            raise ValueError("the heads must divide the width, and the kv heads the heads")
        kv_dim = self.kv_heads * self.head_dim
        self.to_q = QLinear(cfg.model_dim, cfg.model_dim)
        self.to_k = QLinear(cfg.model_dim, kv_dim)
        self.to_v = QLinear(cfg.model_dim, kv_dim)
        self.proj = QLinear(cfg.model_dim, cfg.model_dim)
        self.proj.zero_init = True
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init, dtype=torch.float32))
        self.rotary = PartialRotary(cfg.rope_dims, cfg.rope_base)
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n

    def drop_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: takes from each head's output its component along the position's own value."""
        b, t, h, d = y.shape
        grouped = y.reshape(b, t, self.kv_heads, h // self.kv_heads, d)
        unit = F.normalize(v, dim=-1).unsqueeze(3)
        along = (grouped * unit).sum(dim=-1, keepdim=True) * unit
        return (grouped - along).reshape(b, t, h, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q = self.to_q(x).reshape(b, t, self.heads, self.head_dim)
        k = self.to_k(x).reshape(b, t, self.kv_heads, self.head_dim)
        v = self.to_v(x).reshape(b, t, self.kv_heads, self.head_dim)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary.tables(t, x.device, q.dtype)
        q = self.rotary(q, cos, sin) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = self.rotary(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.kv_heads != self.heads,
        ).transpose(1, 2)
        if self.exclusive:
            y = self.drop_self(y, v)
        return self.proj(y.reshape(b, t, c))


class FeedForward(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.model_dim * cfg.mlp_mult)
        self.up = QLinear(cfg.model_dim, hidden)
        self.down = QLinear(hidden, cfg.model_dim)
        self.down.zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.norm_a = RMSNorm()
        self.norm_m = RMSNorm()
        self.attn = Attention(cfg, layer)
        self.mlp = FeedForward(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))).float())
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.norm_a(x) * self.depth_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.norm_m(x) * self.depth_scale)


class SmearGate(nn.Module):
    """Mixes into each position a gated share of the embedding before it, never over a document's start."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.smear = nn.Parameter(torch.full((dim,), -2.0, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.smear.to(x.dtype))
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        inside = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + gate * before * inside


class BigramHash(nn.Module):
    """A hashed embedding of the pair (token before, token), projected to the width of the model."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.buckets = cfg.bigram_buckets
        self.bos_id = cfg.bos_id
        self.table = nn.Embedding(cfg.bigram_buckets, cfg.bigram_dim)
        nn.init.zeros_(self.table.weight)
        self.proj = QLinear(cfg.bigram_dim, cfg.model_dim)
        self.proj.zero_init = True
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def slots(self, ids: Tensor) -> Tensor:
        before = F.pad(ids[:, :-1], (1, 0), value=self.bos_id)
        before = torch.where(ids == self.bos_id, torch.full_like(before, self.bos_id), before)
        return torch.bitwise_xor(36313 * ids, 27191 * before) % self.buckets

    def forward(self, ids: Tensor) -> Tensor:
        e = self.proj(self.table(self.slots(ids)).bfloat16())
        return e * self.scale.to(e.dtype)


class GolfGPT(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.softcap = cfg.logit_softcap
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram = BigramHash(cfg)
        self.smear = SmearGate(cfg.model_dim, cfg.bos_id)
        self.encoders = cfg.num_layers // 2
        self.decoders = cfg.num_layers - self.encoders
        self.skips = min(self.encoders, self.decoders)
        self.skip_weights = nn.Parameter(torch.ones(self.skips, cfg.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        self.norm_out = RMSNorm()
        self.reset(cfg)

    def reset(self, cfg: Config) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=cfg.tied_embed_std)
        for name, module in self.named_modules():
            if not isinstance(module, QLinear):
                continue
            if module.zero_init:
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids).bfloat16() + self.bigram(ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, ids)
        x0 = x
        kept: list[Tensor] = []
        for i in range(self.encoders):
            x = self.blocks[i](x, x0)
            kept.append(x)
        for i in range(self.decoders):
            if kept:
                x = x + self.skip_weights[i].to(x.dtype) * kept.pop()
            x = self.blocks[self.encoders + i](x, x0)
        return self.norm_out(x)

    def head(self, h: Tensor) -> Tensor:
        raw = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return self.softcap * torch.tanh(raw / self.softcap)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        out = self.logits(ids)
        return F.cross_entropy(out.reshape(-1, out.size(-1)).float(), targets.reshape(-1), reduction="mean")


def keep_small_in_fp32(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 or any(c in name for c in CONTROL_NAMES):
                p.data = p.data.float()


# --------------------------------------------------------------------------------------
# Averages of the weights, by training step
# --------------------------------------------------------------------------------------


class EmaWeights:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.state = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.state[k].lerp_(v.detach().float(), 1.0 - self.decay)


class SwaWeights:
    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def collect(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            if k in self.total:
                self.total[k].add_(v.detach().float())
            else:
                self.total[k] = v.detach().float().clone()
        self.count += 1

    def mean(self) -> dict[str, Tensor]:
        return {k: v / self.count for k, v in self.total.items()}


def averaged_state(ema: EmaWeights, swa: SwaWeights, share: float) -> dict[str, Tensor]:
    """EMA and SWA mixed in a fixed share; EMA alone where no step was collected."""
    if swa.count == 0:
        return ema.state
    flat = swa.mean()
    return {k: (1.0 - share) * ema.state[k] + share * flat[k] for k in ema.state}


# --------------------------------------------------------------------------------------
# Quantisation: int6 rows for matrices, int8 rows for embeddings, half precision for the rest
# --------------------------------------------------------------------------------------

CLIP_RATIOS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8, 0.75)


class InputMoments:
    """Mean square of each input channel of every QLinear, gathered by hooks while the model runs."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, QLinear):
                self.handles.append(module.register_forward_pre_hook(self.hook(name + ".weight")))

    def hook(self, key: str):
        def gather(_module, args):
            x = args[0].detach().float().reshape(-1, args[0].size(-1))
            part = x.square().sum(dim=0)
            self.sums[key] = self.sums[key] + part if key in self.sums else part
            self.seen[key] = self.seen.get(key, 0) + x.size(0)

        return gather

    def close(self, ranks: Ranks) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        out = {}
        for key in sorted(self.sums):
            total = ranks.add_up(self.sums[key])
            out[key] = total / max(1, self.seen[key] * ranks.world)
        return out


@torch.no_grad()
def collect_moments(cfg: Config, model: GolfGPT, source: BatchSource, ranks: Ranks) -> dict[str, Tensor]:
    """Runs a few batches of the training stream through the float model for the clip search."""
    model.eval()
    moments = InputMoments(model)
    for _ in range(cfg.calib_batches):
        x, _y = source.next(cfg.calib_rows * cfg.train_seq_len * ranks.world, cfg.train_seq_len, 1)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.hidden(x)
    out = moments.close(ranks)
    model.train()
    return out


def round_rows(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.round(w / scale[:, None]).clamp(-top - 1, top)


def search_clip(w: Tensor, bits: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per row, the clip of least squared error weighted by the inputs' mean squares (GPTQ-lite)."""
    top = 2 ** (bits - 1) - 1
    w32 = w.float()
    weight = torch.ones(w32.size(1), device=w32.device) if weight is None else weight.to(w32.device)
    peak = w32.abs().amax(dim=1).clamp_min(1e-8)
    best_error = torch.full((w32.size(0),), float("inf"), device=w32.device)
    best_scale = peak / top
    for ratio in CLIP_RATIOS:
        scale = (ratio * peak / top).half().float().clamp_min(1e-7)
        error = ((round_rows(w32, scale, bits) * scale[:, None] - w32).square() * weight).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    best_scale = best_scale.half()
    q = round_rows(w32, best_scale.float().clamp_min(1e-7), bits).to(torch.int8)
    return q.cpu(), best_scale.cpu()


def bits_of(cfg: Config, name: str, t: Tensor) -> int:
    if t.ndim != 2 or t.numel() <= 8192 or any(c in name for c in CONTROL_NAMES):
        return 0
    if "tok_emb" in name or "bigram.table" in name:
        return cfg.embed_bits
    return cfg.matrix_bits


def quantise_state(cfg: Config, state: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, object]:
    packed: dict[str, object] = {"q": {}, "scale": {}, "half": {}}
    for name, t in state.items():
        bits = bits_of(cfg, name, t)
        if bits == 0:
            packed["half"][name] = t.detach().half().cpu()
            continue
        q, scale = search_clip(t.detach(), bits, moments.get(name))
        packed["q"][name] = q
        packed["scale"][name] = scale
    return packed


def restore_state(packed: dict[str, object], device: torch.device) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in packed["q"].items():
        scale = packed["scale"][name].to(device).float()
        out[name] = q.to(device).float() * scale[:, None]
    for name, t in packed["half"].items():
        out[name] = t.to(device).float()
    return out


def compress(packed: dict[str, object], level: int) -> bytes:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    return zstandard.ZstdCompressor(level=level).compress(buffer.getvalue())


def decompress(blob: bytes) -> dict[str, object]:
    raw = zstandard.ZstdDecompressor().decompress(blob)
    return torch.load(io.BytesIO(raw), map_location="cpu")


# --------------------------------------------------------------------------------------
# The causal n-gram cache
# --------------------------------------------------------------------------------------


class NgramCache:
    """
    Counts of next tokens after hashed contexts of several orders, over the whole vocabulary. A context that collides
    with another shares its row, which stays a distribution over the vocabulary all the same. The orders back off into
    each other, the lowest into the model: p_n = (counts_n + s * p_{n-1}) / (sum of counts_n + s).
    """

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg = cfg
        self.orders = sorted(int(part) for part in cfg.cache_orders.split(","))
        self.depth = self.orders[-1]
        self.rows = {n: torch.zeros(cfg.cache_buckets, cfg.vocab_size, device=device) for n in self.orders}

    def slots(self, history: Tensor, order: int) -> Tensor:
        """history[:, 0] is the token just before the target, history[:, 1] the one before that, ..."""
        key = torch.full_like(history[:, 0], 1_000_003 * order)
        for j in range(order):
            key = (key * 1_000_193 + history[:, j] * 97 + 11) % 2_147_483_647
        return key % self.cfg.cache_buckets

    def weight(self, logp: Tensor, support: Tensor) -> Tensor:
        """The cache's share: grows with the entropy of the model's distribution and with the counts of the context."""
        entropy = -(logp.exp() * logp).sum(dim=-1, keepdim=True)
        lift = torch.sigmoid(self.cfg.cache_entropy_slope * (entropy - self.cfg.cache_entropy_mid))
        return self.cfg.cache_weight_max * lift * support / (support + 1.0)

    def blend(self, logits: Tensor, history: Tensor) -> Tensor:
        """The mixed distribution over the vocabulary at each position, from the context alone."""
        logp = F.log_softmax(logits.float(), dim=-1)
        model_p = logp.exp()
        cached = model_p
        strength = self.cfg.cache_strength
        support = torch.zeros_like(logp[:, :1])
        for n in self.orders:
            counts = self.rows[n][self.slots(history, n)]
            total = counts.sum(dim=-1, keepdim=True)
            cached = (counts + strength * cached) / (total + strength)
            support = torch.maximum(support, total)
        share = self.weight(logp, support)
        mixed = (1.0 - share) * model_p + share * cached
        return mixed

    def observe(self, history: Tensor, targets: Tensor) -> None:
        """Adds tokens that have been scored."""
        ones = torch.ones(targets.size(0), device=targets.device)
        for n in self.orders:
            self.rows[n].index_put_((self.slots(history, n), targets), ones, accumulate=True)


def history_of(tokens: Tensor, at: Tensor, depth: int, bos_id: int) -> Tensor:
    """The `depth` tokens up to and including position `at`, newest first, filled with BOS before a document's start."""
    columns = []
    open_ = torch.ones_like(at, dtype=torch.bool)
    for j in range(depth):
        back = at - j
        token = tokens[back.clamp_min(0)].to(torch.int64)
        token = torch.where(open_ & (back >= 0), token, torch.full_like(token, bos_id))
        open_ = open_ & (back >= 0) & (token != bos_id)
        columns.append(token)
    return torch.stack(columns, dim=1)


# --------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------


@dataclass
class Window:
    """Inputs tokens[start:end], of which the predictions from `first` on are counted."""

    start: int
    first: int
    end: int


@dataclass
class Score:
    loss_sum: Tensor
    tokens: Tensor
    bytes: Tensor

    @staticmethod
    def empty(device: torch.device) -> Score:
        return Score(*(torch.zeros((), device=device, dtype=torch.float64) for _ in range(3)))

    def add(self, nll: Tensor, n_bytes: Tensor) -> None:
        self.loss_sum += nll.to(torch.float64).sum()
        self.tokens += nll.numel()
        self.bytes += n_bytes.to(torch.float64).sum()

    def over_ranks(self, ranks: Ranks) -> Score:
        for cell in (self.loss_sum, self.tokens, self.bytes):
            ranks.add_up(cell)
        return self

    @property
    def loss(self) -> float:
        return float(self.loss_sum / self.tokens)

    @property
    def bpb(self) -> float:
        return float(self.loss_sum / math.log(2.0) / self.bytes)


def plan_windows(total: int, seq_len: int, stride: int) -> list[Window]:
    """Windows that count every one of the `total` predictions once: the first whole, each other its last `stride`."""
    plan = [Window(0, 0, min(seq_len, total))]
    start = stride
    while start + seq_len - stride < total:
        plan.append(Window(start, start + seq_len - stride, min(start + seq_len, total)))
        start += stride
    return plan


def share_of(count: int, ranks: Ranks) -> tuple[int, int]:
    return count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world


def pack_windows(batch: list[Window], tokens: Tensor, seq_len: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of a batch of windows; row and column of each counted prediction, and its place in the stream."""
    x = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=tokens.device)
    rows, columns, places = [], [], []
    for i, w in enumerate(batch):
        x[i, : w.end - w.start] = tokens[w.start : w.end].to(torch.int64)
        place = torch.arange(w.first, w.end, device=tokens.device)
        rows.append(torch.full_like(place, i))
        columns.append(place - w.start)
        places.append(place)
    return x, torch.cat(rows), torch.cat(columns), torch.cat(places)


@torch.no_grad()
def eval_val_plain(
    cfg: Config, model, tokens: Tensor, tables: ByteTables, ranks: Ranks, seq_len: int
) -> tuple[float, float]:
    """Validation loss and bpb by windows side by side, for the log during training and after the round trip."""
    was_training = model.training
    model.eval()
    score = Score.empty(ranks.device)
    total = tokens.numel() - 1
    pieces = (total + seq_len - 1) // seq_len
    lo, hi = share_of(pieces, ranks)
    per_batch = max(1, cfg.val_batch_tokens // (seq_len * ranks.world))
    for b in range(lo, hi, per_batch):
        group = [Window(i * seq_len, i * seq_len, min((i + 1) * seq_len, total)) for i in range(b, min(b + per_batch, hi))]
        x, rows, columns, places = pack_windows(group, tokens, seq_len)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            out = model.logits(x)
        targets = tokens[places + 1].to(torch.int64)
        nll = F.cross_entropy(out[rows, columns].float(), targets, reduction="none")
        score.add(nll, tables.count(tokens[places].to(torch.int64), targets))
    score.over_ranks(ranks)
    model.train(was_training)
    return score.loss, score.bpb


@torch.no_grad()
def eval_val_sliding(
    cfg: Config, model: GolfGPT, tokens: Tensor, tables: ByteTables, ranks: Ranks, log: Log
) -> tuple[float, float, int]:
    """
    The score of the record: windows of eval_seq_len, eval_stride apart, in batches; each rank walks through its own
    stretch of the stream from left to right. The n-gram cache of a rank learns a batch once the batch is scored.
    """
    model.eval()
    seq_len, stride = cfg.eval_seq_len, cfg.eval_stride
    total = tokens.numel() - 1
    plan = plan_windows(total, seq_len, stride)
    lo, hi = share_of(len(plan), ranks)
    forward = torch.compile(model.hidden, dynamic=False)
    cache = NgramCache(cfg, ranks.device) if cfg.cache_enabled else None
    depth = cache.depth if cache is not None else 1
    score = Score.empty(ranks.device)
    started = time.perf_counter()
    for step, b in enumerate(range(lo, hi, cfg.eval_batch_windows)):
        batch = plan[b : min(b + cfg.eval_batch_windows, hi)]
        x, rows, columns, places = pack_windows(batch, tokens, seq_len)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            h = forward(x)[rows, columns]
            logits = model.head(h).float()
        targets = tokens[places + 1].to(torch.int64)
        history = history_of(tokens, places, depth, cfg.bos_id)
        if cache is not None:
            mixed = cache.blend(logits, history)
            nll = -mixed.gather(1, targets[:, None]).squeeze(1).clamp_min(1e-30).log()
        else:
            nll = F.cross_entropy(logits, targets, reduction="none")
        score.add(nll, tables.count(tokens[places].to(torch.int64), targets))
        if cache is not None:
            cache.observe(history, targets)
        if ranks.chief and step % 500 == 0:
            share_done = (b - lo) / max(1, hi - lo)
            log(f"sliding: {100 * share_done:.1f}% bpb:{score.bpb:.5f} time:{time.perf_counter() - started:.1f}s")
    score.over_ranks(ranks)
    return score.loss, score.bpb, int(score.tokens.item())


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


def build_optimisers(cfg: Config, model: GolfGPT, ranks: Ranks) -> list[torch.optim.Optimizer]:
    matrices, scalars = [], []
    for name, p in model.named_parameters():
        if name in ("tok_emb.weight", "bigram.table.weight"):
            continue
        if p.ndim == 2 and not any(c in name for c in CONTROL_NAMES):
            matrices.append(p)
        else:
            scalars.append(p)
    embeds = [model.tok_emb.weight, model.bigram.table.weight]
    common = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, weight_decay=cfg.adam_wd, fused=True)
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([{"params": embeds, "lr": cfg.embed_lr}], **common),
        torch.optim.AdamW([{"params": scalars, "lr": cfg.scalar_lr}], **common),
        Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_ns_steps, cfg.muon_wd, ranks),
    ]
    for opt in optimisers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimisers


def lr_scale(cfg: Config, step: int, elapsed_ms: float, cap_ms: float) -> float:
    """1 until the warmdown, then straight down to 0 at the last step or at the cap, whichever comes first."""
    if cfg.warmdown_iters <= 0:
        return 1.0
    if cap_ms <= 0:
        return min(1.0, max(0.0, (cfg.iterations - step) / cfg.warmdown_iters))
    per_step = elapsed_ms / max(1, step)
    left = min((cap_ms - elapsed_ms) / max(per_step, 1e-9), cfg.iterations - step)
    return min(1.0, max(0.0, left / cfg.warmdown_iters))


def share_gradients(model: nn.Module, ranks: Ranks) -> None:
    if not ranks.active:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    at = 0
    for g in grads:
        g.copy_(flat[at : at + g.numel()].view_as(g))
        at += g.numel()


def train_step(cfg, compiled, model, optimisers, source, ranks: Ranks, scale: float, step: int) -> Tensor:
    accum = 8 // ranks.world
    for opt in optimisers:
        opt.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), device=ranks.device)
    for _ in range(accum):
        x, y = source.next(cfg.train_batch_tokens, cfg.train_seq_len, accum)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = compiled(x, y)
        (loss / accum).backward()
        loss_sum += loss.detach() / accum
    share_gradients(model, ranks)
    blend = min(1.0, step / max(1, cfg.muon_momentum_steps))
    for opt in optimisers:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * scale
            if isinstance(opt, Muon):
                group["momentum"] = (1.0 - blend) * cfg.muon_momentum_start + blend * cfg.muon_momentum
    if cfg.grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    for opt in optimisers:
        opt.step()
    return loss_sum


def warm_up(cfg, compiled, model, optimisers, ranks: Ranks, log: Log) -> None:
    """Compiles and primes the kernels on training batches, then puts weights and optimisers back."""
    if cfg.warmup_steps <= 0:
        return
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    opt_states = [copy.deepcopy(opt.state_dict()) for opt in optimisers]
    source = BatchSource(cfg.train_files, ranks)
    for i in range(cfg.warmup_steps):
        train_step(cfg, compiled, model, optimisers, source, ranks, 1.0, 0)
        if i + 1 == cfg.warmup_steps or i % 10 == 9:
            log(f"warmup_step:{i + 1}/{cfg.warmup_steps}")
    model.load_state_dict(weights, strict=True)
    for opt, state in zip(optimisers, opt_states):
        opt.load_state_dict(state)
        opt.zero_grad(set_to_none=True)


@dataclass
class Trained:
    state: dict[str, Tensor]
    source: BatchSource
    steps: int
    train_ms: float


def train(cfg: Config, model: GolfGPT, ranks: Ranks, log: Log, val_tokens: Tensor, tables: ByteTables) -> Trained:
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    optimisers = build_optimisers(cfg, model, ranks)
    warm_up(cfg, compiled, model, optimisers, ranks, log)
    source = BatchSource(cfg.train_files, ranks)
    ema = EmaWeights(model, cfg.ema_decay)
    swa = SwaWeights()
    cap_ms = 1000.0 * (cfg.max_wallclock_seconds - cfg.quant_reserve_seconds) if cfg.max_wallclock_seconds > 0 else 0.0
    model.train()
    torch.cuda.synchronize()
    spent_ms = 0.0
    started = time.perf_counter()
    step = 0
    while True:
        last = step == cfg.iterations
        if cfg.val_every > 0 and (last or step % cfg.val_every == 0):
            torch.cuda.synchronize()
            spent_ms += 1000.0 * (time.perf_counter() - started)
            val_loss, val_bpb = eval_val_plain(cfg, model, val_tokens, tables, ranks, cfg.train_seq_len)
            log(f"step:{step}/{cfg.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{spent_ms:.0f}ms")
            torch.cuda.synchronize()
            started = time.perf_counter()
        if last:
            break
        elapsed_ms = spent_ms + 1000.0 * (time.perf_counter() - started)
        scale = lr_scale(cfg, step, elapsed_ms, cap_ms)
        if not QLinear.fake_bits and scale < cfg.qat_start_scale and step > 0:
            QLinear.fake_bits = cfg.matrix_bits
            log(f"late_qat: step:{step} scale:{scale:.4f} bits:{cfg.matrix_bits}")
        loss = train_step(cfg, compiled, model, optimisers, source, ranks, scale, step)
        step += 1
        ema.update(model)
        if scale < cfg.swa_start_scale and step % cfg.swa_every == 0:
            swa.collect(model)
        torch.cuda.synchronize()
        elapsed_ms = spent_ms + 1000.0 * (time.perf_counter() - started)
        if step <= 10 or step % cfg.log_every == 0:
            log(f"step:{step}/{cfg.iterations} train_loss:{loss.item():.4f} train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / step:.2f}ms")
        if cap_ms > 0 and ranks.largest(elapsed_ms) >= cap_ms:
            log(f"stopping_early: wallclock_cap train_time:{elapsed_ms:.0f}ms step:{step}/{cfg.iterations}")
            break
    torch.cuda.synchronize()
    train_ms = spent_ms + 1000.0 * (time.perf_counter() - started)
    QLinear.fake_bits = 0
    log(f"averaging: ema_decay:{cfg.ema_decay} swa_count:{swa.count} swa_share:{cfg.swa_share}")
    return Trained(averaged_state(ema, swa, cfg.swa_share), source, step, train_ms)


# --------------------------------------------------------------------------------------
# The artifact
# --------------------------------------------------------------------------------------


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def build_artifact(cfg: Config, model: GolfGPT, trained: Trained, ranks: Ranks, log: Log) -> None:
    """Calibrates on the training stream, rounds, compresses and writes the artifact: all of it training time."""
    began = time.perf_counter()
    model.load_state_dict({k: v.to(ranks.device) for k, v in trained.state.items()}, strict=True)
    moments = collect_moments(cfg, model, trained.source, ranks)
    packed = quantise_state(cfg, model.state_dict(), moments)
    torch.cuda.synchronize()
    quant_ms = 1000.0 * (time.perf_counter() - began)
    log(f"gptq_lite: calibration on train shards and clip search took {quant_ms:.0f}ms, train+quant {trained.train_ms + quant_ms:.0f}ms")
    if ranks.chief:
        blob = compress(packed, cfg.zstd_level)
        Path(cfg.artifact_path).write_bytes(blob)
        model_size = len(blob)
        code_size = code_bytes()
        total_size = model_size + code_size
        log(f"Serialized model int6+zstd: {model_size} bytes")
        log(f"Code size: {code_size} bytes")
        log(f"Total submission size: {total_size} bytes")
        if total_size > cfg.size_limit:
            raise RuntimeError(f"submission of {total_size} bytes is over the limit of {cfg.size_limit}")
    ranks.barrier()


def load_artifact(cfg: Config, ranks: Ranks) -> GolfGPT:
    """A fresh model with nothing in it but what the artifact holds."""
    packed = decompress(Path(cfg.artifact_path).read_bytes())
    model = GolfGPT(cfg).to(ranks.device).bfloat16()
    for module in model.modules():
        if isinstance(module, QLinear):
            module.float()
    keep_small_in_fp32(model)
    model.load_state_dict(restore_state(packed, ranks.device), strict=True)
    return model


# --------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def fast_kernels() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def log_machine(cfg: Config, log: Log) -> None:
    log(Path(__file__).read_text(encoding="utf-8"), screen=False)
    log(f"Running Python {sys.version}", screen=False)
    log(f"Running PyTorch {torch.__version__}", screen=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, screen=False)
    log(cfg.describe(), screen=False)


def build_model(cfg: Config, ranks: Ranks) -> GolfGPT:
    model = GolfGPT(cfg).to(ranks.device).bfloat16()
    for module in model.modules():
        if isinstance(module, QLinear):
            module.float()
    keep_small_in_fp32(model)
    return model


def main() -> None:
    cfg = Config()
    ranks = open_ranks()
    log = Log(ranks, cfg.run_id)
    fast_kernels()
    seed_everything(cfg.seed)
    log_machine(cfg, log)

    if not cfg.tokenizer_path.endswith(".model"):
        raise ValueError(f"a SentencePiece model is needed, not {cfg.tokenizer_path}")
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    if int(sp.vocab_size()) != cfg.vocab_size:
        raise ValueError(f"VOCAB_SIZE={cfg.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    tables = build_byte_tables(sp, cfg.vocab_size, ranks.device)
    val_tokens = load_val_stream(cfg.val_files).to(torch.int32).to(ranks.device)
    log(f"val_loader: pattern:{cfg.val_files} tokens:{val_tokens.numel() - 1}")
    log(f"train_loader: pattern:{cfg.train_files} shards:{len(list_shards(cfg.train_files))}")

    model = build_model(cfg, ranks)
    log(f"model_params:{sum(p.numel() for p in model.parameters())} world_size:{ranks.world} seed:{cfg.seed}")
    trained = train(cfg, model, ranks, log, val_tokens, tables)
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    build_artifact(cfg, model, trained, ranks, log)
    del model, trained
    torch.cuda.empty_cache()

    eval_started = time.perf_counter()
    scorer = load_artifact(cfg, ranks)
    loss, bpb = eval_val_plain(cfg, scorer, val_tokens, tables, ranks, cfg.eval_seq_len)
    log(f"roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000.0 * (time.perf_counter() - eval_started):.0f}ms")

    val_loss, val_bpb, counted = eval_val_sliding(cfg, scorer, val_tokens, tables, ranks, log)
    torch.cuda.synchronize()
    if counted != val_tokens.numel() - 1:
        raise RuntimeError(f"{counted} predictions were counted, {val_tokens.numel() - 1} were due")
    eval_ms = 1000.0 * (time.perf_counter() - eval_started)
    log(f"final_sliding_ngram val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} stride:{cfg.eval_stride} eval_time:{eval_ms:.0f}ms")
    log(f"final_sliding_ngram_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")

    if ranks.active:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
