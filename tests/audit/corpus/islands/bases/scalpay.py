"""
11 layers, int6 GPTQ, and a causal n-gram expert over the whole vocabulary.

Forked from the baseline `train_gpt.py`. What differs from it:

- eleven blocks with a 3x relu^2 MLP, partial rotary embedding, a smear gate that stops at document starts,
  hashed bigram embeddings, U-net skips;
- weight decay in Muon and AdamW, momentum warm-up, an exponential average of the weights;
- GPTQ to six bits, its Hessians taken from TRAIN shards inside the 600 s of training;
- an evaluation that mixes the model's distribution with an interpolated n-gram distribution. Both are complete
  distributions over the vocabulary. The counts come only from tokens that were scored before, block by block.
"""

from __future__ import annotations

import copy
import glob
import io
import lzma
import math
import os
import random
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------------------------------------------------------
# SETTINGS
# -----------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, int(default))))


class Settings:
    # Data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)

    # Training length
    iterations = env_int("ITERATIONS", 20000)
    warmdown_iters = env_int("WARMDOWN_ITERS", 3500)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env_float("GPTQ_RESERVE_SECONDS", 16.0)
    train_log_every = env_int("TRAIN_LOG_EVERY", 200)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    val_batch_size = env_int("VAL_BATCH_SIZE", 524_288)

    # Model shape
    vocab_size = env_int("VOCAB_SIZE", 1024)
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 3.0)
    rope_base = env_float("ROPE_BASE", 10000.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 1.5)
    bigram_buckets = env_int("BIGRAM_BUCKETS", 2048)
    bigram_dim = env_int("BIGRAM_DIM", 128)
    bos_id = env_int("BOS_ID", 1)

    # Optimisers
    tied_embed_lr = env_float("TIED_EMBED_LR", 0.035)
    tied_embed_init_std = env_float("TIED_EMBED_INIT_STD", 0.005)
    matrix_lr = env_float("MATRIX_LR", 0.025)
    scalar_lr = env_float("SCALAR_LR", 0.025)
    muon_momentum = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_backend_steps = env_int("MUON_BACKEND_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.04)
    adam_wd = env_float("ADAM_WD", 0.04)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    grad_clip_norm = env_float("GRAD_CLIP_NORM", 0.3)
    ema_decay = env_float("EMA_DECAY", 0.997)

    # Quantisation
    calib_sequences = env_int("CALIB_SEQUENCES", 128)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    size_limit = env_int("SIZE_LIMIT", 16_000_000)

    # Evaluation
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_batch_windows = env_int("EVAL_BATCH_WINDOWS", 32)
    eval_limit_seconds = env_float("EVAL_LIMIT_SECONDS", 600.0)

    # The n-gram expert
    ngram_max_order = env_int("NGRAM_MAX_ORDER", 5)
    ngram_bits = env_int("NGRAM_BITS", 18)
    ngram_alpha = env_float("NGRAM_ALPHA", 4.0)
    ngram_block_windows = env_int("NGRAM_BLOCK_WINDOWS", 2048)
    mix_max = env_float("MIX_MAX", 0.30)
    mix_center = env_float("MIX_CENTER", 3.2)
    mix_width = env_float("MIX_WIDTH", 0.8)

    # Tuning of the small vectors on blocks that were scored (tried, of little use, off)
    tune_blocks = env_flag("TUNE_BLOCKS", False)
    tune_lr = env_float("TUNE_LR", 2e-4)
    tune_seq_batch = env_int("TUNE_SEQ_BATCH", 4)


SMALL_TENSORS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear", "bigram_scale")


# -----------------------------------------------------------------------------
# RANKS AND LOG
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    local: int
    device: torch.device

    @property
    def chief(self) -> bool:
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.world > 1

    def sum(self, t: Tensor) -> Tensor:
        if self.many:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def meet(self) -> None:
        if self.many:
            dist.barrier()


def start_ranks() -> Ranks:
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world != 0:
        raise ValueError(f"WORLD_SIZE={world} must divide 8")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return Ranks(rank, world, local, device)


class Logbook:
    """Prints on the chief rank and appends to a file there."""

    def __init__(self, ranks: Ranks, run_id: str) -> None:
        self.path: Path | None = None
        if ranks.chief:
            folder = Path("logs")
            folder.mkdir(exist_ok=True)
            self.path = folder / f"{run_id}.txt"
            print(self.path)

    def __call__(self, line: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            print(line, file=f)


class Stopwatch:
    """Wall-clock seconds that can be paused. The GPU is drained at both ends."""

    def __init__(self) -> None:
        self.done = 0.0
        self.begun: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.begun = time.perf_counter()

    def pause(self) -> None:
        torch.cuda.synchronize()
        if self.begun is not None:
            self.done += time.perf_counter() - self.begun
            self.begun = None

    def seconds(self) -> float:
        running = 0.0 if self.begun is None else time.perf_counter() - self.begun
        return self.done + running


# -----------------------------------------------------------------------------
# DATA
# -----------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(path: Path) -> Tensor:
    """The tokens of one shard: a header of 256 int32, then uint16."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {path}")
    count = int(header[2])
    expected = HEADER_INTS * 4 + count * 2
    if path.stat().st_size != expected:
        raise ValueError(f"Shard size mismatch for {path}: expected {expected} bytes")
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"Short read for {path}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def shard_paths(pattern: str) -> list[Path]:
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return paths


def read_validation(pattern: str) -> Tensor:
    """The whole validation split as one stream, nothing cut off."""
    return torch.cat([read_shard(p) for p in shard_paths(pattern)]).contiguous()


class ShardStream:
    """Walks over the train shards in order, for ever."""

    def __init__(self, pattern: str) -> None:
        self.paths = shard_paths(pattern)
        self.at = 0
        self.tokens = read_shard(self.paths[0])
        self.pos = 0

    def _next_shard(self) -> None:
        self.at = (self.at + 1) % len(self.paths)
        self.tokens = read_shard(self.paths[self.at])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        left = n
        while left > 0:
            have = self.tokens.numel() - self.pos
            if have <= 0:
                self._next_shard()
                continue
            k = min(left, have)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            left -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class BatchFeeder:
    """Every rank reads the same stream and takes its own span of each global batch."""

    def __init__(self, pattern: str, ranks: Ranks) -> None:
        self.ranks = ranks
        self.stream = ShardStream(pattern)

    def batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.ranks.world * accum)
        span = local_tokens + 1
        chunk = self.stream.take(span * self.ranks.world)
        begin = self.ranks.rank * span
        local = chunk[begin : begin + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.ranks.device, non_blocking=True), y.to(self.ranks.device, non_blocking=True)


# -----------------------------------------------------------------------------
# BYTES
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ByteTable:
    """How many bytes of the original text a token stands for, given the token before it."""

    plain: Tensor  # bytes without the leading space
    spaced: Tensor  # the piece begins with the mark of a space
    edge: Tensor  # control, unknown and unused pieces: no space is written after them

    def count(self, prev: Tensor, tgt: Tensor) -> Tensor:
        n = self.plain[tgt].to(torch.int16)
        n += (self.spaced[tgt] & ~self.edge[prev]).to(torch.int16)
        return n


def make_byte_table(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTable:
    pieces = int(sp.vocab_size())
    size = max(pieces, vocab_size)
    plain = np.zeros((size,), dtype=np.int16)
    spaced = np.zeros((size,), dtype=np.bool_)
    edge = np.ones((size,), dtype=np.bool_)
    for i in range(pieces):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        edge[i] = False
        if sp.is_byte(i):
            plain[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            spaced[i] = True
            piece = piece[1:]
        plain[i] = len(piece.encode("utf-8"))
    return ByteTable(
        torch.tensor(plain, dtype=torch.int16, device=device),
        torch.tensor(spaced, dtype=torch.bool, device=device),
        torch.tensor(edge, dtype=torch.bool, device=device),
    )


@dataclass
class Tally:
    """Sums of one evaluation: nats, tokens, bytes; float64 on the device."""

    sums: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> "Tally":
        return cls(torch.zeros(3, dtype=torch.float64, device=device))

    def add(self, nats: Tensor, n_bytes: Tensor) -> None:
        self.sums[0] += nats.to(torch.float64).sum()
        self.sums[1] += float(nats.numel())
        self.sums[2] += n_bytes.to(torch.float64).sum()

    def result(self, ranks: Ranks) -> "Score":
        total = ranks.sum(self.sums.clone())
        nats, tokens, n_bytes = (float(v) for v in total.tolist())
        return Score(nats / tokens, nats / math.log(2.0) / n_bytes, int(tokens), int(n_bytes))


@dataclass(frozen=True)
class Score:
    loss: float
    bpb: float
    tokens: int
    n_bytes: int


# -----------------------------------------------------------------------------
# MUON
# -----------------------------------------------------------------------------


def orthogonalise(g: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iteration of the fifth order, in bfloat16."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = g.bfloat16()
    x /= x.norm() + eps
    tall = g.size(0) > g.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the matrices are dealt out to the ranks, the updates summed."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float, ranks: Ranks):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            flat = torch.zeros(
                sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16
            )
            at = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(g)
                    buf = state["buffer"]
                    buf.mul_(group["momentum"]).add_(g)
                    g = g.add(buf, alpha=group["momentum"])
                    g = orthogonalise(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            self.ranks.sum(flat)
            at = 0
            for p in params:
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


# -----------------------------------------------------------------------------
# MODEL
# -----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """float32 weights, bfloat16 matmul."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def keep_small_in_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            small = param.ndim < 2 or any(tag in name for tag in SMALL_TENSORS)
            if small and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    """cos and sin for the first `dims` dimensions of a head; the others carry no position."""

    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv, persistent=False)
        self.length = 0
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def forward(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.cos is None or self.length != length or self.cos.device != device:
            t = torch.arange(length, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self.cos = freqs.cos()[None, None, :, :]
            self.sin = freqs.sin()[None, None, :, :]
            self.length = length
        return self.cos.to(dtype=dtype), self.sin.to(dtype=dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    turned, rest = x[..., :dims], x[..., dims:]
    half = dims // 2
    a, b = turned[..., :half], turned[..., half:]
    turned = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: type[Settings]) -> None:
        super().__init__()
        dim = cfg.model_dim
        if dim % cfg.num_heads or cfg.num_heads % cfg.num_kv_heads:
            raise ValueError("model_dim, num_heads and num_kv_heads do not fit")
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.head_dim = dim // cfg.num_heads
        self.rope_dims = min(cfg.rope_dims, self.head_dim)
        self.q = CastedLinear(dim, dim, bias=False)
        self.k = CastedLinear(dim, self.kv_heads * self.head_dim, bias=False)
        self.v = CastedLinear(dim, self.kv_heads * self.head_dim, bias=False)
        self.out = CastedLinear(dim, dim, bias=False)
        self.out._zero_init = True
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, cfg.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.q(x).reshape(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).reshape(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).reshape(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = rotate(q, cos, sin, self.rope_dims)
        k = rotate(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=self.kv_heads != self.heads
        )
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float) -> None:
        super().__init__()
        hidden = int(mult * dim)
        self.up = CastedLinear(dim, hidden, bias=False)
        self.down = CastedLinear(hidden, dim, bias=False)
        self.down._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, cfg: type[Settings], index: int) -> None:
        super().__init__()
        dim = cfg.model_dim
        self.norm1 = RMSNorm()
        self.norm2 = RMSNorm()
        self.attn = Attention(cfg)
        self.mlp = MLP(dim, cfg.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.depth_gain = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        h = self.attn(self.norm1(x) * self.depth_gain)
        x = x + self.attn_scale.to(x.dtype)[None, None, :] * h
        h = self.mlp(self.norm2(x) * self.depth_gain)
        return x + self.mlp_scale.to(x.dtype)[None, None, :] * h


class Smear(nn.Module):
    """Adds a gated share of the previous token's embedding. A document's first token takes none."""

    def __init__(self, dim: int, bos_id: int) -> None:
        super().__init__()
        self.bos_id = bos_id
        self.smear = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.smear.to(x.dtype) - 3.0)[None, None, :]
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + gate * before * inside


class BigramHash(nn.Module):
    """An embedding of the pair (previous token, token), hashed into few rows."""

    def __init__(self, buckets: int, width: int, dim: int, bos_id: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.table = nn.Embedding(buckets, width)
        nn.init.zeros_(self.table.weight)
        self.proj = CastedLinear(width, dim, bias=False)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        before = F.pad(ids[:, :-1], (1, 0), value=0)
        before = torch.where(ids == self.bos_id, torch.zeros_like(before), before)
        slot = (before * 36313 + ids * 27191) % self.buckets
        return self.proj(self.table(slot)) * self.bigram_scale


class GPT(nn.Module):
    def __init__(self, cfg: type[Settings]) -> None:
        super().__init__()
        self.softcap = cfg.logit_softcap
        self.embed_std = cfg.tied_embed_init_std
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram = BigramHash(cfg.bigram_buckets, cfg.bigram_dim, cfg.model_dim, cfg.bos_id)
        self.smear_in = Smear(cfg.model_dim, cfg.bos_id)
        self.n_down = cfg.num_layers // 2
        self.n_up = cfg.num_layers - self.n_down
        self.n_skip = min(self.n_down, self.n_up)
        self.skip_weights = nn.Parameter(torch.ones(self.n_skip, cfg.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(cfg, i) for i in range(cfg.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.embed_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.bigram(ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear_in(x, ids)
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.n_down):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.n_up):
            if skips:
                x = x + self.skip_weights[i].to(x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.n_down + i](x, x0)
        return self.final_norm(x)

    def head(self, h: Tensor) -> Tensor:
        raw = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return self.softcap * torch.tanh(raw / self.softcap)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        out = self.logits(ids)
        return F.cross_entropy(out.reshape(-1, out.size(-1)).float(), targets.reshape(-1), reduction="mean")


def build_model(cfg: type[Settings], device: torch.device) -> GPT:
    model = GPT(cfg).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    keep_small_in_fp32(model)
    return model


def build_optimizers(model: GPT, cfg: type[Settings], ranks: Ranks) -> tuple[list[torch.optim.Optimizer], Muon]:
    matrices: list[Tensor] = []
    scalars: list[Tensor] = []
    for name, p in model.named_parameters():
        if name in ("tok_emb.weight", "bigram.table.weight"):
            continue
        if p.ndim == 2 and not any(tag in name for tag in SMALL_TENSORS):
            matrices.append(p)
        else:
            scalars.append(p)
    tables = [model.tok_emb.weight, model.bigram.table.weight]
    adam = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
    opt_tables = torch.optim.AdamW(
        [{"params": tables, "lr": cfg.tied_embed_lr, "base_lr": cfg.tied_embed_lr}], weight_decay=cfg.adam_wd, **adam
    )
    opt_scalars = torch.optim.AdamW(
        [{"params": scalars, "lr": cfg.scalar_lr, "base_lr": cfg.scalar_lr}], weight_decay=cfg.adam_wd, **adam
    )
    opt_muon = Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_backend_steps, cfg.muon_wd, ranks)
    for group in opt_muon.param_groups:
        group["base_lr"] = cfg.matrix_lr
    return [opt_tables, opt_muon, opt_scalars], opt_muon


class Average:
    """Exponential moving average of the weights, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.shadow[k].mul_(self.decay).add_(v.detach().float(), alpha=1.0 - self.decay)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        own = model.state_dict()
        model.load_state_dict({k: v.to(dtype=own[k].dtype) for k, v in self.shadow.items()}, strict=True)


# -----------------------------------------------------------------------------
# GPTQ
# -----------------------------------------------------------------------------


class HessianCollector:
    """Sums of x x^T of what every large linear layer reads, over the batches that are run through the model."""

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear) and module.weight.numel() >= 65_536:
                self.hooks.append(module.register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str):
        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].size(-1)).float()
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
                self.rows[name] = 0
            self.sums[name].addmm_(x.T, x)
            self.rows[name] += x.size(0)

        return take

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def reduced(self, ranks: Ranks) -> dict[str, Tensor]:
        out = {}
        for name in sorted(self.sums):
            total = ranks.sum(self.sums[name])
            out[name] = total / float(self.rows[name] * ranks.world)
        return out


@torch.no_grad()
def collect_hessians(model: GPT, feeder: BatchFeeder, cfg: type[Settings], ranks: Ranks) -> dict[str, Tensor]:
    """Hessians from the next sequences of the train stream, shared among the ranks."""
    collector = HessianCollector(model)
    model.eval()
    per_batch = 8 * ranks.world
    for _ in range(max(1, cfg.calib_sequences // per_batch)):
        x, _y = feeder.batch(per_batch * cfg.train_seq_len, cfg.train_seq_len, 1)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.hidden(x)
    collector.close()
    model.train()
    return collector.reduced(ranks)


def row_scales(w: Tensor, top: int) -> Tensor:
    """One scale per row: of five clipping points, the one with the least squared error."""
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best = torch.ones(w.size(0), device=w.device)
    for q in (0.995, 0.999, 0.9995, 0.9999, 1.0):
        clip = torch.quantile(w.abs(), q, dim=1).clamp_min(1e-8)
        scale = (clip / top).half().float().clamp_min(1e-7)
        back = (w / scale[:, None]).round().clamp(-top - 1, top) * scale[:, None]
        err = (back - w).square().sum(dim=1)
        better = err < best_err
        best = torch.where(better, scale, best)
        best_err = torch.where(better, err, best_err)
    return best


@torch.no_grad()
def gptq_int6(weight: Tensor, hessian: Tensor, cfg: type[Settings]) -> tuple[Tensor, Tensor]:
    """Columns in the order of their Hessian's diagonal, the error of each pushed on to those that follow."""
    top = 31
    w = weight.detach().float().clone()
    cols = w.size(1)
    h = hessian.clone()
    dead = torch.diag(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(torch.diag(h), descending=True)
    w = w[:, order]
    h = h[order][:, order]
    scale = row_scales(w, top)
    damp = cfg.gptq_damp * torch.diag(h).mean()
    h.diagonal().add_(damp)
    inv = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inv, upper=True)
    q_out = torch.zeros_like(w)
    for lo in range(0, cols, cfg.gptq_block):
        hi = min(lo + cfg.gptq_block, cols)
        part = w[:, lo:hi].clone()
        errors = torch.zeros_like(part)
        tri = upper[lo:hi, lo:hi]
        for j in range(hi - lo):
            col = part[:, j]
            q = (col / scale).round().clamp(-top - 1, top)
            q_out[:, lo + j] = q
            err = (col - q * scale) / tri[j, j]
            part[:, j:] -= err[:, None] * tri[j, j:][None, :]
            errors[:, j] = err
        w[:, hi:] -= errors @ upper[lo:hi, hi:]
    back = torch.argsort(order)
    return q_out[:, back].to(torch.int8), scale.half()


@torch.no_grad()
def round_int8(t: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings: eight bits, one scale per row."""
    f = t.detach().float()
    scale = (f.abs().amax(dim=1) / 127.0).clamp_min(1e-8).half()
    q = (f / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return q, scale


def quantise(model: GPT, hessians: dict[str, Tensor], cfg: type[Settings]) -> dict[str, dict[str, Tensor]]:
    """What is stored: int6 in int8 for the large matrices, int8 for embeddings, float16 for the rest."""
    packed: dict[str, dict[str, Tensor]] = {"q": {}, "s": {}, "raw": {}}
    for name, t in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in hessians:
            q, s = gptq_int6(t, hessians[layer], cfg)
        elif name in ("tok_emb.weight", "bigram.table.weight"):
            q, s = round_int8(t)
        else:
            packed["raw"][name] = t.detach().half().cpu().contiguous()
            continue
        packed["q"][name] = q.cpu().contiguous()
        packed["s"][name] = s.cpu().contiguous()
    return packed


def dequantise(packed: dict[str, dict[str, Tensor]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, q in packed["q"].items():
        value = q.float() * packed["s"][name].float()[:, None]
        state[name] = value.to(dtype=like[name].dtype)
    for name, t in packed["raw"].items():
        state[name] = t.to(dtype=like[name].dtype)
    return state


def pack_bytes(packed: dict[str, dict[str, Tensor]]) -> bytes:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def unpack_bytes(blob: bytes) -> dict[str, dict[str, Tensor]]:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)


def report_sizes(blob: bytes, code: str, cfg: type[Settings], log: Logbook) -> int:
    n_model = len(blob)
    n_code = len(code.encode("utf-8"))
    total = n_model + n_code
    log(f"Serialized model int6+lzma: {n_model} bytes")
    log(f"Code size: {n_code} bytes")
    log(f"Total submission size: {total} bytes")
    if total > cfg.size_limit:
        raise RuntimeError(f"submission of {total} bytes is over {cfg.size_limit}")
    return total


# -----------------------------------------------------------------------------
# WINDOWS
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Inputs stream[start : start + length]; the last `fresh` of its targets are scored here and nowhere else."""

    start: int
    length: int
    fresh: int

    @property
    def end(self) -> int:
        return self.start + self.length


def plan_windows(n_targets: int, seq_len: int, stride: int) -> list[Window]:
    """Windows whose fresh targets cover 0 .. n_targets - 1 once each, from left to right."""
    first = min(seq_len, n_targets)
    plan = [Window(0, first, first)]
    done = first
    while done < n_targets:
        end = min(done + stride, n_targets)
        start = max(0, end - seq_len)
        plan.append(Window(start, end - start, end - done))
        done = end
    return plan


def batched(items: list[Window], size: int) -> list[list[Window]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def gather_fresh(logits: Tensor, batch: list[Window], device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of a batch's logits that are scored, and the target index of each."""
    rows = torch.cat([logits[r, w.length - w.fresh : w.length] for r, w in enumerate(batch)]).float()
    where = torch.cat([torch.arange(w.end - w.fresh, w.end, device=device) for w in batch])
    return rows, where


def stack_inputs(stream: Tensor, batch: list[Window]) -> Tensor:
    return torch.stack([stream[w.start : w.end] for w in batch])


def by_length(batch: list[Window]) -> list[list[Window]]:
    """Only windows of one length can be stacked."""
    groups: dict[int, list[Window]] = {}
    for w in batch:
        groups.setdefault(w.length, []).append(w)
    return list(groups.values())


# -----------------------------------------------------------------------------
# EVALUATION BY THE MODEL ALONE
# -----------------------------------------------------------------------------


@torch.no_grad()
def evaluate_model(
    logits_of, stream: Tensor, table: ByteTable, cfg: type[Settings], ranks: Ranks, stride: int, per_batch: int
) -> Score:
    """Plain (stride = window) or sliding evaluation. Every target once, the ranks take every world-th window."""
    tally = Tally.empty(ranks.device)
    plan = plan_windows(stream.numel() - 1, cfg.eval_seq_len, stride)
    mine = plan[ranks.rank :: ranks.world]
    for some in batched(mine, per_batch):
        for batch in by_length(some):
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_of(stack_inputs(stream, batch))
            rows, where = gather_fresh(logits, batch, ranks.device)
            tgt = stream[where + 1]
            nats = F.cross_entropy(rows, tgt, reduction="none")
            tally.add(nats, table.count(stream[where], tgt))
    return tally.result(ranks)


# -----------------------------------------------------------------------------
# THE N-GRAM EXPERT
# -----------------------------------------------------------------------------


class NgramExpert:
    """Counts of the next token after the last 1 .. max_order - 1 tokens, one row of V counts per hashed context.

    A row is divided by its own sum, so it is a distribution whatever contexts collide in it. The orders are
    interpolated from the shortest to the longest; a row that was seen often takes over from the shorter order.
    """

    MULTIPLIER = 1_000_003

    def __init__(self, cfg: type[Settings], device: torch.device) -> None:
        self.vocab = cfg.vocab_size
        self.bos_id = cfg.bos_id
        self.alpha = cfg.ngram_alpha
        self.mask = (1 << cfg.ngram_bits) - 1
        self.orders = list(range(2, cfg.ngram_max_order + 1))
        self.device = device
        self.counts: dict[int, Tensor] = {}
        for order in self.orders:
            rows = self.vocab if order == 2 else self.mask + 1
            self.counts[order] = torch.zeros(rows, self.vocab, dtype=torch.float32, device=device)
        self.seen = 0

    def slots(self, stream: Tensor, pos: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """The rows of the contexts before `pos`, and whether each context is whole and within one document."""
        k = order - 1
        back = pos[:, None] - torch.arange(k, 0, -1, device=pos.device)[None, :]
        usable = back[:, 0] >= 0
        ctx = stream[back.clamp_min(0)]
        if k > 1:
            usable = usable & ~(ctx[:, 1:] == self.bos_id).any(dim=1)
        if order == 2:
            return ctx[:, 0], usable
        h = torch.full_like(ctx[:, 0], order)
        for j in range(k):
            h = (h * self.MULTIPLIER + ctx[:, j] + 1) & 0x7FFFFFFFFFFF
            h = h ^ (h >> 17)
        return h & self.mask, usable

    def distribution(self, stream: Tensor, pos: Tensor) -> Tensor:
        """(N, V): what the counts say of the token at each position, from the tokens before it only."""
        p = torch.full((pos.numel(), self.vocab), 1.0 / self.vocab, device=self.device)
        for order in self.orders:
            slot, usable = self.slots(stream, pos, order)
            row = self.counts[order][slot] * usable[:, None]
            mass = row.sum(dim=1, keepdim=True)
            trust = mass / (mass + self.alpha)
            p = trust * (row / mass.clamp_min(1.0)) + (1.0 - trust) * p
        return p

    def absorb(self, stream: Tensor, lo: int, hi: int, piece: int = 65_536) -> None:
        """Counts the targets lo .. hi - 1, that is the tokens stream[lo + 1 : hi + 1]."""
        for a in range(lo, hi, piece):
            pos = torch.arange(a, min(a + piece, hi), device=self.device) + 1
            tok = stream[pos]
            for order in self.orders:
                slot, usable = self.slots(stream, pos, order)
                flat = slot[usable] * self.vocab + tok[usable]
                ones = torch.ones(flat.numel(), device=self.device)
                self.counts[order].view(-1).index_add_(0, flat, ones)
        self.seen += hi - lo

    def filled(self) -> dict[int, float]:
        return {n: float((c.sum(dim=1) > 0).float().mean()) for n, c in self.counts.items()}


class EntropyGate:
    """The expert's weight, from the entropy of the model's own distribution."""

    def __init__(self, cfg: type[Settings]) -> None:
        self.most = cfg.mix_max
        self.center = cfg.mix_center
        self.width = cfg.mix_width

    def __call__(self, log_p: Tensor) -> Tensor:
        entropy = -(log_p.exp() * log_p).sum(dim=1, keepdim=True)
        return self.most * torch.sigmoid((entropy - self.center) / self.width)


class BlockTuner:
    """Steps on the small vectors with a block that was scored. Off by default."""

    def __init__(self, model: GPT, cfg: type[Settings], ranks: Ranks) -> None:
        self.model = model
        self.cfg = cfg
        self.ranks = ranks
        self.params = [p for n, p in model.named_parameters() if any(tag in n for tag in SMALL_TENSORS)]
        self.opt = torch.optim.AdamW(self.params, lr=cfg.tune_lr, weight_decay=0.0)

    def learn(self, stream: Tensor, lo: int, hi: int) -> float:
        """One pass over the targets lo .. hi - 1; the ranks share the sequences and add up their gradients."""
        seq = self.cfg.eval_seq_len
        starts = list(range(lo, hi - seq + 1, seq))
        step = self.cfg.tune_seq_batch * self.ranks.world
        last = 0.0
        for i in range(0, len(starts) - step + 1, step):
            own = starts[i + self.ranks.rank : i + step : self.ranks.world]
            x = torch.stack([stream[s : s + seq] for s in own])
            y = torch.stack([stream[s + 1 : s + seq + 1] for s in own])
            self.opt.zero_grad(set_to_none=True)
            with torch.enable_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = self.model(x, y)
            loss.backward()
            for p in self.params:
                if p.grad is not None:
                    self.ranks.sum(p.grad)
                    p.grad.div_(self.ranks.world)
            self.opt.step()
            last = float(loss.detach())
        self.model.zero_grad(set_to_none=True)
        return last


class MixedEvaluation:
    """The score: model and n-gram expert, mixed over the vocabulary, block by block.

    All ranks score their windows of a block with the counts of the blocks before it. Only when every rank has done
    so are the block's tokens counted, by every rank alike, and the next block begins.
    """

    def __init__(
        self,
        model: GPT,
        logits_of,
        stream: Tensor,
        table: ByteTable,
        cfg: type[Settings],
        ranks: Ranks,
        log: Logbook,
    ) -> None:
        self.model = model
        self.logits_of = logits_of
        self.stream = stream
        self.table = table
        self.cfg = cfg
        self.ranks = ranks
        self.log = log
        self.expert = NgramExpert(cfg, ranks.device)
        self.gate = EntropyGate(cfg)
        self.tuner = BlockTuner(model, cfg, ranks) if cfg.tune_blocks else None
        self.worst_sum = torch.zeros((), device=ranks.device)

    @torch.no_grad()
    def mix(self, rows: Tensor, where: Tensor) -> Tensor:
        """(N, V): the distribution that is scored."""
        log_p = F.log_softmax(rows, dim=1)
        weight = self.gate(log_p)
        counted = self.expert.distribution(self.stream, where + 1)
        mixed = (1.0 - weight) * log_p.exp() + weight * counted
        self.worst_sum = torch.maximum(self.worst_sum, (mixed.sum(dim=1) - 1.0).abs().max())
        return mixed

    @torch.no_grad()
    def score_batch(self, batch: list[Window], tally: Tally) -> None:
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = self.logits_of(stack_inputs(self.stream, batch))
        rows, where = gather_fresh(logits, batch, self.ranks.device)
        tgt = self.stream[where + 1]
        mixed = self.mix(rows, where)
        nats = -mixed.gather(1, tgt[:, None]).squeeze(1).clamp_min(1e-12).log()
        tally.add(nats, self.table.count(self.stream[where], tgt))

    def run(self) -> Score:
        cfg, ranks = self.cfg, self.ranks
        tally = Tally.empty(ranks.device)
        plan = plan_windows(self.stream.numel() - 1, cfg.eval_seq_len, cfg.eval_stride)
        blocks = batched(plan, cfg.ngram_block_windows)
        for number, block in enumerate(blocks):
            for some in batched(block[ranks.rank :: ranks.world], cfg.eval_batch_windows):
                for batch in by_length(some):
                    self.score_batch(batch, tally)
            ranks.meet()
            lo = block[0].end - block[0].fresh
            hi = block[-1].end
            self.expert.absorb(self.stream, lo, hi)
            if self.tuner is not None:
                self.tuner.learn(self.stream, lo, hi)
            if number % 100 == 0:
                nats, tokens, _ = tally.sums.tolist()
                self.log(f"mix block:{number}/{len(blocks)} rank0_loss:{nats / max(tokens, 1.0):.4f}")
        return tally.result(ranks)


# -----------------------------------------------------------------------------
# TRAINING
# -----------------------------------------------------------------------------


class Trainer:
    """The training loop: it ends when the wall clock, less what GPTQ needs, is used up."""

    def __init__(
        self,
        model: GPT,
        cfg: type[Settings],
        ranks: Ranks,
        log: Logbook,
        stream: Tensor,
        table: ByteTable,
    ) -> None:
        self.model = model
        self.cfg = cfg
        self.ranks = ranks
        self.log = log
        self.stream = stream
        self.table = table
        self.accum = 8 // ranks.world
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
        self.net: nn.Module = (
            DDP(compiled, device_ids=[ranks.local], broadcast_buffers=False) if ranks.many else compiled
        )
        self.opts, self.muon = build_optimizers(model, cfg, ranks)
        self.feeder = BatchFeeder(cfg.train_files, ranks)
        self.average = Average(model, cfg.ema_decay)
        self.watch = Stopwatch()
        self.cap = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds

    def lr_factor(self, step: int) -> float:
        """Constant, then linear to zero; the warm-down's length in seconds follows from the speed so far."""
        cfg = self.cfg
        spent = self.watch.seconds()
        per_step = spent / max(step, 1)
        warmdown = cfg.warmdown_iters * per_step
        left = max(self.cap - spent, 0.0)
        return left / max(warmdown, 1e-9) if left <= warmdown else 1.0

    def backward(self) -> Tensor:
        cfg = self.cfg
        total = torch.zeros((), device=self.ranks.device)
        for opt in self.opts:
            opt.zero_grad(set_to_none=True)
        for micro in range(self.accum):
            if self.ranks.many:
                self.net.require_backward_grad_sync = micro == self.accum - 1
            x, y = self.feeder.batch(cfg.train_batch_tokens, cfg.train_seq_len, self.accum)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = self.net(x, y)
            total += loss.detach()
            (loss / self.accum).backward()
        return total / self.accum

    def apply(self, step: int, factor: float) -> None:
        cfg = self.cfg
        part = min(step / max(cfg.muon_momentum_steps, 1), 1.0)
        for group in self.muon.param_groups:
            group["momentum"] = (1 - part) * cfg.muon_momentum_start + part * cfg.muon_momentum
        for opt in self.opts:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * factor
        if cfg.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip_norm)
        for opt in self.opts:
            opt.step()

    def warm_up(self) -> None:
        """Compiles and tunes the kernels on train batches, then puts everything back as it was."""
        if self.cfg.warmup_steps <= 0:
            return
        weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        states = [copy.deepcopy(opt.state_dict()) for opt in self.opts]
        self.model.train()
        for i in range(self.cfg.warmup_steps):
            self.backward()
            self.apply(i, 1.0)
        self.model.load_state_dict(weights, strict=True)
        for opt, state in zip(self.opts, states, strict=True):
            opt.load_state_dict(state)
            opt.zero_grad(set_to_none=True)
        self.feeder = BatchFeeder(self.cfg.train_files, self.ranks)
        self.log(f"warmup_step:{self.cfg.warmup_steps}/{self.cfg.warmup_steps}")

    def validate(self, step: int) -> None:
        cfg = self.cfg
        self.watch.pause()
        self.model.eval()
        per_batch = max(1, cfg.val_batch_size // (self.ranks.world * cfg.eval_seq_len))
        score = evaluate_model(
            self.model.logits, self.stream, self.table, cfg, self.ranks, cfg.eval_seq_len, per_batch
        )
        self.model.train()
        self.log(
            f"step:{step}/{cfg.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
            f"train_time:{1000 * self.watch.seconds():.0f}ms"
        )
        self.watch.start()

    def time_is_up(self) -> bool:
        flag = torch.tensor(int(self.watch.seconds() >= self.cap), device=self.ranks.device)
        if self.ranks.many:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def run(self) -> int:
        cfg = self.cfg
        self.model.train()
        self.watch.start()
        step = 0
        while step < cfg.iterations:
            if cfg.val_loss_every > 0 and step % cfg.val_loss_every == 0:
                self.validate(step)
            factor = self.lr_factor(step)
            loss = self.backward()
            self.apply(step, factor)
            self.average.update(self.model)
            step += 1
            if step <= 10 or step % cfg.train_log_every == 0:
                ms = 1000 * self.watch.seconds()
                self.log(
                    f"step:{step}/{cfg.iterations} train_loss:{loss.item():.4f} "
                    f"train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms"
                )
            if step % 8 == 0 and self.time_is_up():
                self.log(f"stopping_early: wallclock_cap train_time:{1000 * self.watch.seconds():.0f}ms step:{step}")
                break
        return step

    def finish(self) -> dict[str, dict[str, Tensor]]:
        """The average goes into the model; GPTQ, calibrated on the next train sequences, on the same clock."""
        self.average.put_into(self.model)
        begun = self.watch.seconds()
        hessians = collect_hessians(self.model, self.feeder, self.cfg, self.ranks)
        packed = quantise(self.model, hessians, self.cfg)
        self.watch.pause()
        used = self.watch.seconds()
        self.log(f"gptq: {len(hessians)} layers in {used - begun:.1f}s, training with gptq {used:.1f}s")
        if used > self.cfg.max_wallclock_seconds:
            raise RuntimeError(f"training took {used:.1f}s")
        return packed


# -----------------------------------------------------------------------------
# MAIN
# -----------------------------------------------------------------------------


def set_up_torch(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64


def log_environment(log: Logbook, code: str) -> None:
    log(code, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)


def load_tokenizer(cfg: type[Settings]) -> spm.SentencePieceProcessor:
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    if int(sp.vocab_size()) != cfg.vocab_size:
        raise ValueError(f"VOCAB_SIZE={cfg.vocab_size} does not match the tokenizer's {int(sp.vocab_size())}")
    return sp


def write_artifact(packed: dict[str, dict[str, Tensor]], code: str, cfg: type[Settings], ranks: Ranks, log: Logbook):
    if ranks.chief:
        blob = pack_bytes(packed)
        report_sizes(blob, code, cfg, log)
        Path("final_model.int6.ptz").write_bytes(blob)
    ranks.meet()


def read_artifact(cfg: type[Settings], ranks: Ranks) -> GPT:
    """A fresh model with the weights that were written, and nothing else."""
    packed = unpack_bytes(Path("final_model.int6.ptz").read_bytes())
    model = build_model(cfg, ranks.device)
    model.load_state_dict(dequantise(packed, model.state_dict()), strict=True)
    return model.eval()


def log_score(log: Logbook, name: str, score: Score, seconds: float) -> None:
    log(f"{name} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} eval_time:{1000 * seconds:.0f}ms")
    log(f"{name}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")


def final_evaluation(
    cfg: type[Settings], ranks: Ranks, log: Logbook, stream: Tensor, table: ByteTable
) -> Score:
    """Three evaluations of the artifact: plain and sliding to know where one stands, the mixture for the score."""
    clock = Stopwatch()
    clock.start()
    model = read_artifact(cfg, ranks)
    logits_of = torch.compile(model.logits, dynamic=False)

    before = clock.seconds()
    plain = evaluate_model(model.logits, stream, table, cfg, ranks, cfg.eval_seq_len, cfg.eval_batch_windows)
    log_score(log, "final_int6_roundtrip", plain, clock.seconds() - before)

    before = clock.seconds()
    sliding = evaluate_model(logits_of, stream, table, cfg, ranks, cfg.eval_stride, cfg.eval_batch_windows)
    log_score(log, "final_int6_sliding", sliding, clock.seconds() - before)

    before = clock.seconds()
    evaluation = MixedEvaluation(model, logits_of, stream, table, cfg, ranks, log)
    score = evaluation.run()
    clock.pause()
    log_score(log, "final_ngram_mix", score, clock.seconds() - before)
    log(f"scored tokens:{score.tokens} bytes:{score.n_bytes} worst |sum - 1|:{float(evaluation.worst_sum):.2e}")
    log(f"ngram rows filled: {evaluation.expert.filled()}")
    log(f"eval_total: {clock.seconds():.1f}s of {cfg.eval_limit_seconds:.0f}s")
    if clock.seconds() > cfg.eval_limit_seconds:
        raise RuntimeError(f"evaluation took {clock.seconds():.1f}s")
    return score


def main() -> None:
    cfg = Settings
    code = Path(__file__).read_text(encoding="utf-8")
    ranks = start_ranks()
    log = Logbook(ranks, cfg.run_id)
    log_environment(log, code)
    set_up_torch(cfg.seed)

    sp = load_tokenizer(cfg)
    table = make_byte_table(sp, cfg.vocab_size, ranks.device)
    val_tokens = read_validation(cfg.val_files)
    stream = val_tokens.to(device=ranks.device, dtype=torch.int64)
    log(f"val_loader: pattern={cfg.val_files} tokens:{val_tokens.numel() - 1}")
    log(f"train_loader: shards:{len(shard_paths(cfg.train_files))}")

    model = build_model(cfg, ranks.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    log(f"world_size:{ranks.world} seed:{cfg.seed} cap:{cfg.max_wallclock_seconds:.0f}s")

    trainer = Trainer(model, cfg, ranks, log, stream, table)
    trainer.warm_up()
    steps = trainer.run()
    log(f"trained {steps} steps, peak memory {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    packed = trainer.finish()
    write_artifact(packed, code, cfg, ranks, log)
    del trainer, packed, model
    torch.cuda.empty_cache()

    score = final_evaluation(cfg, ranks, log, stream, table)
    log(f"final val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    if ranks.many:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
