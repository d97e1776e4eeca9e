"""fladda: a ten-layer GQA transformer and an online n-gram backoff cache.

Training is the usual 600 s affair: Muon for the matrices, AdamW for the rest, a shadow (EMA) of the weights, then int5
for the MLP and int6 for attention with activation-aware pruning, zstd on top. At evaluation every rank walks over its own
contiguous part of the validation stream; windows of the model give log-probabilities over the whole vocabulary, hashed
n-gram tables of orders 2..7 give a second distribution over the whole vocabulary, and the two are mixed by a weight that
depends on the entropy of the model. Tables take a block's tokens in only after that block has been scored.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

HERE = Path(__file__).resolve()
SIZE_LIMIT = 16_000_000

# ----------------------------------------------------------------------------------------------------------------------
# settings
# ----------------------------------------------------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_str(name: str, default: str) -> str:
    return os.environ.get(name, default)


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, int(default))))


@dataclass
class DataConfig:
    root: str = field(default_factory=lambda: env_str("DATA_PATH", "./data/datasets/fineweb10B_sp1024"))
    tokenizer: str = field(default_factory=lambda: env_str("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model"))
    vocab: int = field(default_factory=lambda: env_int("VOCAB_SIZE", 1024))
    bos: int = field(default_factory=lambda: env_int("BOS_ID", 1))

    @property
    def train_glob(self) -> str:
        return os.path.join(self.root, "fineweb_train_*.bin")

    @property
    def val_glob(self) -> str:
        return os.path.join(self.root, "fineweb_val_*.bin")


@dataclass
class ModelConfig:
    layers: int = field(default_factory=lambda: env_int("NUM_LAYERS", 10))
    width: int = field(default_factory=lambda: env_int("MODEL_DIM", 512))
    heads: int = field(default_factory=lambda: env_int("NUM_HEADS", 8))
    kv_heads: int = field(default_factory=lambda: env_int("NUM_KV_HEADS", 4))
    mlp_mult: int = field(default_factory=lambda: env_int("MLP_MULT", 3))
    rope_base: float = field(default_factory=lambda: env_float("ROPE_BASE", 10000.0))
    rope_dims: int = field(default_factory=lambda: env_int("ROPE_DIMS", 32))
    softcap: float = field(default_factory=lambda: env_float("LOGIT_SOFTCAP", 30.0))
    qk_gain: float = field(default_factory=lambda: env_float("QK_GAIN_INIT", 1.5))
    tied_std: float = field(default_factory=lambda: env_float("TIED_EMBED_INIT_STD", 0.005))
    bigram_slots: int = field(default_factory=lambda: env_int("BIGRAM_SLOTS", 4096))
    bigram_width: int = field(default_factory=lambda: env_int("BIGRAM_WIDTH", 96))


@dataclass
class TrainConfig:
    seed: int = field(default_factory=lambda: env_int("SEED", 1337))
    iterations: int = field(default_factory=lambda: env_int("ITERATIONS", 20000))
    batch_tokens: int = field(default_factory=lambda: env_int("TRAIN_BATCH_TOKENS", 786_432))
    seq_len: int = field(default_factory=lambda: env_int("TRAIN_SEQ_LEN", 2048))
    cap_s: float = field(default_factory=lambda: env_float("MAX_WALLCLOCK_SECONDS", 600.0))
    reserve_s: float = field(default_factory=lambda: env_float("EXPORT_RESERVE_SECONDS", 24.0))
    warmup_steps: int = field(default_factory=lambda: env_int("WARMUP_STEPS", 20))
    warmdown: int = field(default_factory=lambda: env_int("WARMDOWN_ITERS", 3000))
    log_every: int = field(default_factory=lambda: env_int("TRAIN_LOG_EVERY", 200))
    val_every: int = field(default_factory=lambda: env_int("VAL_LOSS_EVERY", 2000))
    val_batch_tokens: int = field(default_factory=lambda: env_int("VAL_BATCH_SIZE", 524_288))
    embed_lr: float = field(default_factory=lambda: env_float("TIED_EMBED_LR", 0.035))
    matrix_lr: float = field(default_factory=lambda: env_float("MATRIX_LR", 0.025))
    scalar_lr: float = field(default_factory=lambda: env_float("SCALAR_LR", 0.025))
    muon_momentum: float = field(default_factory=lambda: env_float("MUON_MOMENTUM", 0.97))
    muon_momentum_start: float = field(default_factory=lambda: env_float("MUON_MOMENTUM_START", 0.90))
    muon_momentum_steps: int = field(default_factory=lambda: env_int("MUON_MOMENTUM_STEPS", 1200))
    muon_steps: int = field(default_factory=lambda: env_int("MUON_BACKEND_STEPS", 5))
    muon_wd: float = field(default_factory=lambda: env_float("MUON_WD", 0.04))
    adam_wd: float = field(default_factory=lambda: env_float("ADAM_WD", 0.01))
    beta1: float = field(default_factory=lambda: env_float("BETA1", 0.9))
    beta2: float = field(default_factory=lambda: env_float("BETA2", 0.95))
    grad_clip: float = field(default_factory=lambda: env_float("GRAD_CLIP_NORM", 0.3))
    ema_decay: float = field(default_factory=lambda: env_float("EMA_DECAY", 0.997))
    ema_start: int = field(default_factory=lambda: env_int("EMA_START_STEP", 300))


@dataclass
class QuantConfig:
    mlp_bits: int = field(default_factory=lambda: env_int("MLP_BITS", 5))
    attn_bits: int = field(default_factory=lambda: env_int("ATTN_BITS", 6))
    embed_bits: int = field(default_factory=lambda: env_int("EMBED_BITS", 8))
    prune: float = field(default_factory=lambda: env_float("PRUNE_FRACTION", 0.04))
    calib_batches: int = field(default_factory=lambda: env_int("CALIB_BATCHES", 12))
    calib_seqs: int = field(default_factory=lambda: env_int("CALIB_SEQS", 16))
    zstd_level: int = field(default_factory=lambda: env_int("ZSTD_LEVEL", 22))
    keep_below: int = field(default_factory=lambda: env_int("KEEP_FLOAT_NUMEL", 32_768))


@dataclass
class EvalConfig:
    seq_len: int = field(default_factory=lambda: env_int("EVAL_SEQ_LEN", 2048))
    stride: int = field(default_factory=lambda: env_int("EVAL_STRIDE", 64))
    windows: int = field(default_factory=lambda: env_int("EVAL_WINDOWS_PER_BLOCK", 32))
    order_lo: int = field(default_factory=lambda: env_int("NGRAM_MIN_ORDER", 2))
    order_hi: int = field(default_factory=lambda: env_int("NGRAM_MAX_ORDER", 7))
    slot_bits: int = field(default_factory=lambda: env_int("NGRAM_SLOT_BITS", 26))
    strength: float = field(default_factory=lambda: env_float("NGRAM_BACKOFF_STRENGTH", 4.0))
    fill_chunk: int = field(default_factory=lambda: env_int("NGRAM_FILL_CHUNK", 1 << 20))
    mix_max: float = field(default_factory=lambda: env_float("MIX_MAX", 0.35))
    mix_slope: float = field(default_factory=lambda: env_float("MIX_SLOPE", 1.4))
    mix_centre: float = field(default_factory=lambda: env_float("MIX_CENTRE", 3.1))
    mix_support: float = field(default_factory=lambda: env_float("MIX_SUPPORT", 2.0))
    audit_every: int = field(default_factory=lambda: env_int("SUM_AUDIT_EVERY", 500))
    cap_s: float = field(default_factory=lambda: env_float("EVAL_CAP_SECONDS", 600.0))


@dataclass
class Config:
    run_id: str = field(default_factory=lambda: env_str("RUN_ID", str(uuid.uuid4())))
    artifact: str = field(default_factory=lambda: env_str("ARTIFACT", "final_model.fl.zst"))
    log_dir: str = field(default_factory=lambda: env_str("LOG_DIR", "logs"))
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# ----------------------------------------------------------------------------------------------------------------------
# the crew: ranks, device, log
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Crew:
    rank: int
    local: int
    world: int
    device: torch.device
    parallel: bool
    log_path: Path | None = None

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def say(self, text: str, console: bool = True) -> None:
        if not self.lead:
            return
        if console:
            print(text, flush=True)
        if self.log_path is not None:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def wait(self) -> None:
        torch.cuda.synchronize()
        if self.parallel:
            dist.barrier()

    def total(self, value: Tensor) -> Tensor:
        if self.parallel:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value

    def mean(self, value: Tensor) -> Tensor:
        if self.parallel:
            dist.all_reduce(value, op=dist.ReduceOp.AVG)
        return value

    def any_true(self, flag: bool) -> bool:
        if not self.parallel:
            return flag
        signal = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(signal, op=dist.ReduceOp.MAX)
        return bool(signal.item())


def assemble_crew(cfg: Config) -> Crew:
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    parallel = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, world = env_int("RANK", 0), env_int("WORLD_SIZE", 1)
    local = env_int("LOCAL_RANK", 0)
    if 8 % world:
        raise ValueError(f"WORLD_SIZE={world} must divide 8 so that gradient accumulation stays whole")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if parallel:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    log_path = None
    if rank == 0:
        os.makedirs(cfg.log_dir, exist_ok=True)
        log_path = Path(cfg.log_dir) / f"{cfg.run_id}.txt"
    return Crew(rank, local, world, device, parallel, log_path)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


class Stopwatch:
    """Seconds between `go` and `halt`, summed; synchronises the device at both ends."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def go(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def halt(self) -> float:
        torch.cuda.synchronize()
        if self.since is not None:
            self.spent += time.perf_counter() - self.since
            self.since = None
        return self.spent

    def read(self) -> float:
        if self.since is None:
            return self.spent
        return self.spent + time.perf_counter() - self.since


# ----------------------------------------------------------------------------------------------------------------------
# shards, streams
# ----------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(path: Path) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"not a token shard: {path}")
    count = int(header[2])
    skip = HEADER_INTS * np.dtype("<i4").itemsize
    if path.stat().st_size != skip + count * np.dtype("<u2").itemsize:
        raise ValueError(f"{path}: size does not fit its header")
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=skip)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def shard_paths(pattern: str) -> list[Path]:
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no shards match {pattern}")
    return paths


def load_validation(pattern: str) -> Tensor:
    """All tokens of the validation split, in order."""
    stream = torch.cat([read_shard(path) for path in shard_paths(pattern)]).contiguous()
    if stream.numel() < 2:
        raise ValueError("the validation split is empty")
    return stream


class ShardReel:
    """An endless run over the training shards, one after another."""

    def __init__(self, pattern: str) -> None:
        self.paths = shard_paths(pattern)
        self.index = 0
        self.tokens = read_shard(self.paths[0])
        self.at = 0

    def turn(self) -> None:
        self.index = (self.index + 1) % len(self.paths)
        self.tokens = read_shard(self.paths[self.index])
        self.at = 0

    def take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        while count > 0:
            left = self.tokens.numel() - self.at
            if left <= 0:
                self.turn()
                continue
            step = min(left, count)
            parts.append(self.tokens[self.at : self.at + step])
            self.at += step
            count -= step
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainFeed:
    """Each call takes one contiguous piece of the reel per rank, so that ranks never see the same tokens."""

    def __init__(self, pattern: str, crew: Crew) -> None:
        self.reel = ShardReel(pattern)
        self.crew = crew

    def batch(self, tokens_all: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        mine = tokens_all // (self.crew.world * accum)
        span = mine + 1
        piece = self.reel.take(span * self.crew.world)
        own = piece[self.crew.rank * span : (self.crew.rank + 1) * span].to(torch.int64)
        x = own[:-1].reshape(-1, seq_len)
        y = own[1:].reshape(-1, seq_len)
        return x.to(self.crew.device, non_blocking=True), y.to(self.crew.device, non_blocking=True)


# ----------------------------------------------------------------------------------------------------------------------
# bytes of pieces
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class PieceBytes:
    """How many bytes of the original text a token stands for, given the token before it."""

    width: Tensor  # bytes of the piece without its mark
    spaced: Tensor  # the piece begins with the mark of a space
    edge: Tensor  # control, unknown or unused: no text, and no space after it

    def count(self, before: Tensor, target: Tensor) -> Tensor:
        out = self.width[target].to(torch.int32)
        out += (self.spaced[target] & ~self.edge[before]).to(torch.int32)
        return out


def piece_bytes(path: str, vocab: int, device: torch.device) -> PieceBytes:
    sp = spm.SentencePieceProcessor(model_file=path)
    pieces = int(sp.vocab_size())
    if pieces > vocab:
        raise ValueError(f"the tokenizer has {pieces} pieces, VOCAB_SIZE={vocab}")
    width = np.zeros(vocab, dtype=np.int16)
    spaced = np.zeros(vocab, dtype=np.bool_)
    edge = np.ones(vocab, dtype=np.bool_)
    for token in range(pieces):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        edge[token] = False
        if sp.is_byte(token):
            width[token] = 1
            continue
        text = sp.id_to_piece(token)
        if text.startswith("\u2581"):
            spaced[token] = True
            text = text[1:]
        width[token] = len(text.encode("utf-8"))
    return PieceBytes(
        torch.tensor(width, device=device),
        torch.tensor(spaced, device=device),
        torch.tensor(edge, device=device),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Muon
# ----------------------------------------------------------------------------------------------------------------------


def orthogonalise(grad: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + eps)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then Newton-Schulz. Every rank works on its share of the matrices; the updates are summed."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, steps: int, decay: float) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, decay=decay))

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        parallel = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if parallel else 1
        rank = dist.get_rank() if parallel else 0
        for group in self.param_groups:
            params: list[nn.Parameter] = group["params"]
            if not params:
                continue
            updates = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
                    state = self.state[p]
                    if "velocity" not in state:
                        state["velocity"] = torch.zeros_like(p.grad)
                    velocity = state["velocity"]
                    velocity.mul_(group["momentum"]).add_(p.grad)
                    look = p.grad.add(velocity, alpha=group["momentum"])
                    turned = orthogonalise(look, group["steps"])
                    turned *= max(1.0, turned.size(0) / turned.size(1)) ** 0.5
                    updates[at : at + p.numel()] = turned.reshape(-1)
                at += p.numel()
            if parallel:
                dist.all_reduce(updates, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                delta = updates[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["decay"])
                p.add_(delta, alpha=-group["lr"])
                at += p.numel()


# ----------------------------------------------------------------------------------------------------------------------
# the model
# ----------------------------------------------------------------------------------------------------------------------

SMALL_NAMES = ("attn_gain", "mlp_gain", "blend", "q_gain", "smear", "skip_gain", "bigram.scale")


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Kept in float32 for the optimiser, cast to the activation's type on use."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.zero_start = False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        inverse = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inverse", inverse, persistent=False)
        self.dims = dims
        self.length = 0
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def forward(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.cos is None or self.length != length or self.cos.device != device:
            t = torch.arange(length, device=device, dtype=torch.float32)
            angles = torch.outer(t, self.inverse.to(device))
            self.cos = angles.cos()[None, None]
            self.sin = angles.sin()[None, None]
            self.length = length
        return self.cos.to(dtype), self.sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    turning, still = x[..., :dims], x[..., dims:]
    half = dims // 2
    a, b = turning[..., :half], turning[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, still), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        if cfg.width % cfg.heads or cfg.heads % cfg.kv_heads:
            raise ValueError("MODEL_DIM, NUM_HEADS and NUM_KV_HEADS do not fit together")
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads
        self.head_dim = cfg.width // cfg.heads
        self.rope_dims = min(cfg.rope_dims, self.head_dim)
        kv_width = cfg.kv_heads * self.head_dim
        self.to_q = Linear(cfg.width, cfg.width)
        self.to_k = Linear(cfg.width, kv_width)
        self.to_v = Linear(cfg.width, kv_width)
        self.out = Linear(cfg.width, cfg.width)
        self.out.zero_start = True
        self.q_gain = nn.Parameter(torch.full((cfg.heads,), cfg.qk_gain, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, cfg.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.to_q(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.to_k(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.to_v(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(length, x.device, q.dtype)
        q = rotate(q, cos, sin, self.rope_dims)
        k = rotate(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(cfg.width, cfg.mlp_mult * cfg.width)
        self.down = Linear(cfg.mlp_mult * cfg.width, cfg.width)
        self.down.zero_start = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Smear(nn.Module):
    """Mixes a part of the previous embedding into each; never over the start of a document."""

    def __init__(self, width: int, bos: int) -> None:
        super().__init__()
        self.smear = nn.Parameter(torch.full((width,), -2.0, dtype=torch.float32))
        self.bos = bos

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        share = torch.sigmoid(self.smear.to(x.dtype))
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos).unsqueeze(-1).to(x.dtype)
        return x + inside * share * previous


class BigramTable(nn.Module):
    """A hashed embedding of the last two tokens of a document."""

    def __init__(self, cfg: ModelConfig, bos: int) -> None:
        super().__init__()
        self.slots = cfg.bigram_slots
        self.bos = bos
        self.table = nn.Embedding(cfg.bigram_slots, cfg.bigram_width)
        self.lift = Linear(cfg.bigram_width, cfg.width)
        self.lift.zero_start = True
        self.scale = nn.Parameter(torch.tensor(0.1, dtype=torch.float32))
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        previous = F.pad(ids[:, :-1], (1, 0), value=self.bos)
        previous = torch.where(ids == self.bos, torch.full_like(ids, self.bos), previous)
        slot = (previous * 36313 ^ ids * 27191) % (self.slots - 1) + 1
        return self.lift(self.table(slot).to(torch.bfloat16)) * self.scale.to(torch.bfloat16)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, depth: int) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attn, self.mlp = Attention(cfg), FeedForward(cfg)
        self.attn_gain = nn.Parameter(torch.ones(cfg.width, dtype=torch.float32))
        self.mlp_gain = nn.Parameter(torch.ones(cfg.width, dtype=torch.float32))
        self.blend = nn.Parameter(torch.stack((torch.ones(cfg.width), torch.zeros(cfg.width))).float())
        self.damp = 1.0 / math.sqrt(depth + 1)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        blend = self.blend.to(x.dtype)
        x = blend[0] * x + blend[1] * first
        x = x + self.attn_gain.to(x.dtype) * self.attn(self.attn_norm(x) * self.damp)
        return x + self.mlp_gain.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.damp)


class Fladda(nn.Module):
    def __init__(self, cfg: ModelConfig, data: DataConfig) -> None:
        super().__init__()
        self.softcap = cfg.softcap
        self.embed = nn.Embedding(data.vocab, cfg.width)
        self.bigram = BigramTable(cfg, data.bos)
        self.smear = Smear(cfg.width, data.bos)
        self.down_count = cfg.layers // 2
        self.up_count = cfg.layers - self.down_count
        skips = min(self.down_count, self.up_count)
        self.skip_gain = nn.Parameter(torch.ones(skips, cfg.width, dtype=torch.float32))
        self.blocks = nn.ModuleList(Block(cfg, depth) for depth in range(cfg.layers))
        self.final_norm = RMSNorm()
        nn.init.normal_(self.embed.weight, std=cfg.tied_std)
        for module in self.modules():
            if isinstance(module, Linear):
                if module.zero_start:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).to(torch.bfloat16) + self.bigram(ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, ids)
        first = x
        kept: list[Tensor] = []
        for i in range(self.down_count):
            x = self.blocks[i](x, first)
            kept.append(x)
        for i in range(self.up_count):
            if kept:
                x = x + self.skip_gain[i].to(x.dtype) * kept.pop()
            x = self.blocks[self.down_count + i](x, first)
        return self.final_norm(x)

    def logits(self, ids: Tensor) -> Tensor:
        raw = F.linear(self.hidden(ids), self.embed.weight.to(torch.bfloat16)).float()
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())


def build_model(cfg: Config, device: torch.device) -> Fladda:
    model = Fladda(cfg.model, cfg.data).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, (Linear, Rotary)):
            module.float()
    small_to_float(model)
    return model


@torch.no_grad()
def small_to_float(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.ndim < 2 or any(word in name for word in SMALL_NAMES):
            p.data = p.data.float()


def build_optimisers(model: Fladda, cfg: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    matrices, small = [], []
    for name, p in model.blocks.named_parameters():
        if p.ndim == 2 and not any(word in name for word in SMALL_NAMES):
            matrices.append(p)
        else:
            small.append(p)
    small += [model.skip_gain, model.smear.smear, model.bigram.scale]
    matrices.append(model.bigram.lift.weight)
    tables = [model.embed.weight, model.bigram.table.weight]
    betas = (cfg.beta1, cfg.beta2)
    made: dict[str, torch.optim.Optimizer] = {
        "embed": torch.optim.AdamW(tables, lr=cfg.embed_lr, betas=betas, weight_decay=cfg.adam_wd, fused=True),
        "matrix": Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_steps, cfg.muon_wd),
        "scalar": torch.optim.AdamW(small, lr=cfg.scalar_lr, betas=betas, weight_decay=0.0, fused=True),
    }
    for optimiser in made.values():
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return made


class Shadow:
    """An exponential average of the weights, kept in float32."""

    def __init__(self, model: nn.Module, decay: float, start: int) -> None:
        self.decay, self.start = decay, start
        self.weights = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int) -> None:
        if step < self.start:
            decay = 0.0
        else:
            decay = min(self.decay, (1.0 + step - self.start) / (10.0 + step - self.start))
        for k, v in model.state_dict().items():
            self.weights[k].mul_(decay).add_(v.detach().float(), alpha=1.0 - decay)

    def give(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({k: v.to(current[k].dtype) for k, v in self.weights.items()}, strict=True)


# ----------------------------------------------------------------------------------------------------------------------
# calibration, pruning, quantisation
# ----------------------------------------------------------------------------------------------------------------------


class InputPower:
    """Mean square of every input channel of every linear layer, gathered by hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.power: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.handles = [
            module.register_forward_pre_hook(self.hook(f"{name}.weight"))
            for name, module in model.named_modules()
            if isinstance(module, Linear)
        ]

    def hook(self, key: str):
        def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            seen = x.square().sum(dim=0)
            self.power[key] = self.power[key] + seen if key in self.power else seen
            self.rows[key] = self.rows.get(key, 0) + x.size(0)

        return gather

    def finish(self, crew: Crew) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        means = {key: total / max(self.rows[key], 1) for key, total in self.power.items()}
        return {key: crew.mean(means[key]) for key in sorted(means)}


@torch.no_grad()
def calibrate(model: Fladda, feed: TrainFeed, cfg: Config, crew: Crew) -> dict[str, Tensor]:
    power = InputPower(model)
    model.eval()
    tokens = cfg.quant.calib_seqs * cfg.train.seq_len * crew.world
    for _ in range(cfg.quant.calib_batches):
        x, _ = feed.batch(tokens, cfg.train.seq_len, 1)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model.hidden(x)
    model.train()
    return power.finish(crew)


def bits_for(name: str, cfg: QuantConfig) -> int:
    if ".mlp." in name:
        return cfg.mlp_bits
    if ".attn." in name:
        return cfg.attn_bits
    return cfg.embed_bits


def prune_weight(weight: Tensor, power: Tensor, fraction: float) -> Tensor:
    """Zeroes, in every row, the weights that matter least to the layer's output."""
    count = int(weight.size(1) * fraction)
    if count <= 0:
        return weight
    worth = weight.abs() * power.clamp_min(1e-8).sqrt()
    least = worth.topk(count, dim=1, largest=False).indices
    return weight.scatter(1, least, 0.0)


CLIPS = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78, 0.74)


def quantise_rows(weight: Tensor, power: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Per row the clip with the least output error; symmetric integers and float16 scales."""
    top = 2 ** (bits - 1) - 1
    peak = weight.abs().amax(dim=1).clamp_min(1e-8)
    best_error = torch.full_like(peak, float("inf"))
    best_codes = torch.zeros_like(weight, dtype=torch.int8)
    best_scale = torch.ones_like(peak, dtype=torch.float16)
    for clip in CLIPS:
        scale = (peak * clip / top).clamp_min(1e-7).to(torch.float16)
        step = scale.float()[:, None]
        codes = (weight / step).round().clamp(-top, top)
        error = ((codes * step - weight).square() * power).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better[:, None], codes.to(torch.int8), best_codes)
        best_scale = torch.where(better, scale, best_scale)
    return best_codes, best_scale


@dataclass
class Packed:
    """What the artifact holds: integer codes with scales, and the rest in float16."""

    codes: dict[str, np.ndarray] = field(default_factory=dict)
    scales: dict[str, np.ndarray] = field(default_factory=dict)
    plain: dict[str, np.ndarray] = field(default_factory=dict)

    def to_bytes(self, level: int) -> bytes:
        table, body = [], io.BytesIO()
        for kind in ("codes", "scales", "plain"):
            for name, array in sorted(getattr(self, kind).items()):
                table.append([kind, name, str(array.dtype), list(array.shape)])
                body.write(np.ascontiguousarray(array).tobytes())
        head = json.dumps(table, separators=(",", ":")).encode()
        raw = struct.pack("<I", len(head)) + head + body.getvalue()
        return zstandard.ZstdCompressor(level=level).compress(raw)

    @classmethod
    def from_bytes(cls, blob: bytes) -> Packed:
        raw = zstandard.ZstdDecompressor().decompress(blob)
        (length,) = struct.unpack_from("<I", raw, 0)
        table = json.loads(raw[4 : 4 + length])
        out, at = cls(), 4 + length
        for kind, name, dtype, shape in table:
            count = int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(raw, dtype=np.dtype(dtype), count=count, offset=at).reshape(shape)
            getattr(out, kind)[name] = array
            at += array.nbytes
        return out


@torch.no_grad()
def pack_model(model: nn.Module, power: dict[str, Tensor], cfg: QuantConfig) -> Packed:
    packed = Packed()
    for name, value in model.state_dict().items():
        weight = value.detach().float()
        if weight.ndim != 2 or weight.numel() < cfg.keep_below or any(word in name for word in SMALL_NAMES):
            packed.plain[name] = weight.to(torch.float16).cpu().numpy()
            continue
        worth = power.get(name, torch.ones(weight.size(1), device=weight.device))
        if ".mlp." in name:
            weight = prune_weight(weight, worth, cfg.prune)
        codes, scale = quantise_rows(weight, worth, bits_for(name, cfg))
        packed.codes[name] = codes.cpu().numpy()
        packed.scales[name] = scale.cpu().numpy()
    return packed


def unpack_state(packed: Packed, like: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, target in like.items():
        if name in packed.codes:
            codes = torch.from_numpy(packed.codes[name].astype(np.float32))
            value = codes * torch.from_numpy(packed.scales[name].astype(np.float32))[:, None]
        else:
            value = torch.from_numpy(packed.plain[name].astype(np.float32))
        state[name] = value.to(device=target.device, dtype=target.dtype)
    return state


def write_artifact(model: Fladda, power: dict[str, Tensor], cfg: Config, crew: Crew) -> None:
    if crew.lead:
        blob = pack_model(model, power, cfg.quant).to_bytes(cfg.quant.zstd_level)
        Path(cfg.artifact).write_bytes(blob)
    crew.wait()


def report_size(cfg: Config, crew: Crew) -> None:
    code = len(HERE.read_bytes())
    model = Path(cfg.artifact).stat().st_size
    total = code + model
    crew.say(f"Serialized model int5/int6+zstd: {model} bytes")
    crew.say(f"Code size: {code} bytes")
    crew.say(f"Total submission size: {total} bytes (limit {SIZE_LIMIT})")
    if total > SIZE_LIMIT:
        raise RuntimeError(f"the submission is {total - SIZE_LIMIT} bytes too large")


def load_artifact(cfg: Config, crew: Crew) -> Fladda:
    packed = Packed.from_bytes(Path(cfg.artifact).read_bytes())
    model = build_model(cfg, crew.device)
    model.load_state_dict(unpack_state(packed, model.state_dict()), strict=True)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# plain validation: adjoining pieces, no cache
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    loss: float
    bpb: float
    tokens: int


class Ledger:
    """Sums of one scoring run, in float64 on the device."""

    def __init__(self, device: torch.device) -> None:
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.octets = torch.zeros((), dtype=torch.float64, device=device)

    def enter(self, nll: Tensor, octets: Tensor) -> None:
        self.nats += nll.to(torch.float64).sum()
        self.tokens += nll.numel()
        self.octets += octets.to(torch.float64).sum()

    def close(self, crew: Crew) -> Score:
        sums = crew.total(torch.stack((self.nats, self.tokens, self.octets)))
        nats, tokens, octets = (float(v) for v in sums)
        return Score(nats / tokens, nats / math.log(2.0) / octets, int(tokens))


@torch.no_grad()
def quick_score(loss_of, tokens: Tensor, table: PieceBytes, cfg: Config, crew: Crew) -> Score:
    """The usual score over adjoining pieces of the training length; for the log."""
    length = cfg.train.seq_len
    pieces = (tokens.numel() - 1) // length
    first, last = pieces * crew.rank // crew.world, pieces * (crew.rank + 1) // crew.world
    per_batch = max(cfg.train.val_batch_tokens // (length * crew.world), 1)
    ledger = Ledger(crew.device)
    for start in range(first, last, per_batch):
        stop = min(start + per_batch, last)
        part = tokens[start * length : stop * length + 1].to(device=crew.device, dtype=torch.int64)
        x, y = part[:-1].view(-1, length), part[1:].view(-1, length)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = loss_of(x)
        nll = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none")
        ledger.enter(nll, table.count(x.flatten(), y.flatten()))
    return ledger.close(crew)


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


def rate_scale(step: int, elapsed_s: float, cfg: TrainConfig) -> float:
    if cfg.warmdown <= 0:
        return 1.0
    if cfg.cap_s <= 0:
        begin = max(cfg.iterations - cfg.warmdown, 0)
        return max((cfg.iterations - step) / cfg.warmdown, 0.0) if step >= begin else 1.0
    per_step = elapsed_s / max(step, 1)
    down_s = cfg.warmdown * per_step
    left_s = max(cfg.cap_s - cfg.reserve_s - elapsed_s, 0.0)
    return left_s / max(down_s, 1e-9) if left_s <= down_s else 1.0


class Trainer:
    def __init__(self, cfg: Config, crew: Crew, tokens: Tensor, table: PieceBytes) -> None:
        self.cfg, self.crew = cfg, crew
        self.val_tokens, self.table = tokens, table
        self.accum = 8 // crew.world
        self.model = build_model(cfg, crew.device)
        self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
        self.wrapped: nn.Module = (
            DDP(self.compiled, device_ids=[crew.local], broadcast_buffers=False) if crew.parallel else self.compiled
        )
        self.optimisers = build_optimisers(self.model, cfg.train)
        self.feed = TrainFeed(cfg.data.train_glob, crew)
        self.clock = Stopwatch()

    def clear(self) -> None:
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)

    def gradients(self) -> Tensor:
        cfg = self.cfg.train
        self.clear()
        loss_sum = torch.zeros((), device=self.crew.device)
        for micro in range(self.accum):
            if self.crew.parallel:
                self.wrapped.require_backward_grad_sync = micro == self.accum - 1
            x, y = self.feed.batch(cfg.batch_tokens, cfg.seq_len, self.accum)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.wrapped(x, y)
            loss_sum += loss.detach()
            (loss / self.accum).backward()
        return loss_sum / self.accum

    def update(self, step: int, scale: float) -> None:
        cfg = self.cfg.train
        share = min(step / cfg.muon_momentum_steps, 1.0) if cfg.muon_momentum_steps > 0 else 1.0
        for group in self.optimisers["matrix"].param_groups:
            group["momentum"] = (1 - share) * cfg.muon_momentum_start + share * cfg.muon_momentum
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * scale
        if cfg.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
        for optimiser in self.optimisers.values():
            optimiser.step()
        self.clear()

    def warm_up(self) -> None:
        """Compiles and fills caches; weights, optimisers and the feed are put back afterwards."""
        cfg = self.cfg.train
        if cfg.warmup_steps <= 0:
            return
        weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        states = {k: copy.deepcopy(o.state_dict()) for k, o in self.optimisers.items()}
        self.wrapped.train()
        for step in range(cfg.warmup_steps):
            self.gradients()
            self.update(step, 1.0)
        self.crew.say(f"warmup_step:{cfg.warmup_steps}/{cfg.warmup_steps}")
        self.model.load_state_dict(weights, strict=True)
        for k, optimiser in self.optimisers.items():
            optimiser.load_state_dict(states[k])
        self.clear()
        self.feed = TrainFeed(self.cfg.data.train_glob, self.crew)

    def log_validation(self, step: int) -> Score:
        self.model.eval()
        score = quick_score(self.model.logits, self.val_tokens, self.table, self.cfg, self.crew)
        self.model.train()
        self.crew.say(
            f"step:{step}/{self.cfg.train.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
            f"train_time:{1000 * self.clock.read():.0f}ms"
        )
        return score

    def run(self) -> dict[str, Tensor]:
        """Trains until the cap less the reserve, takes the shadow's weights, calibrates and writes the artifact."""
        cfg = self.cfg.train
        self.warm_up()
        shadow = Shadow(self.model, cfg.ema_decay, cfg.ema_start)
        self.model.train()
        self.crew.wait()
        self.clock.go()
        step, stop = 0, False
        while step < cfg.iterations and not stop:
            if cfg.val_every > 0 and step > 0 and step % cfg.val_every == 0:
                self.clock.halt()
                self.log_validation(step)
                self.clock.go()
            scale = rate_scale(step, self.clock.read(), cfg)
            loss = self.gradients()
            self.update(step, scale)
            step += 1
            shadow.follow(self.model, step)
            if step <= 5 or step % cfg.log_every == 0:
                self.crew.say(
                    f"step:{step}/{cfg.iterations} train_loss:{loss.item():.4f} "
                    f"train_time:{1000 * self.clock.read():.0f}ms step_avg:{1000 * self.clock.read() / step:.2f}ms"
                )
            if cfg.cap_s > 0 and step % 4 == 0:
                stop = self.crew.any_true(self.clock.read() >= cfg.cap_s - cfg.reserve_s)
        self.crew.say(f"stopped at step {step}: train_time:{1000 * self.clock.read():.0f}ms")
        shadow.give(self.model)
        power = calibrate(self.model, self.feed, self.cfg, self.crew)
        self.crew.say(f"calibrated on train shards: train_time:{1000 * self.clock.read():.0f}ms")
        write_artifact(self.model, power, self.cfg, self.crew)
        spent = self.clock.halt()
        self.crew.say(f"artifact written: train_time:{1000 * spent:.0f}ms (cap {1000 * cfg.cap_s:.0f}ms)")
        peak = torch.cuda.max_memory_allocated() // 2**20
        self.crew.say(f"peak memory allocated: {peak} MiB")
        return power


# ----------------------------------------------------------------------------------------------------------------------
# the n-gram cache
# ----------------------------------------------------------------------------------------------------------------------

MULTIPLIERS = (1000003, 805306457, 402653189, 201326611, 100663319, 50331653, 25165843, 12582917)
TOKEN_MULTIPLIER = 2654435761


@dataclass
class Contexts:
    """Hashes of the tokens before each position, one row per order, and whether the order may be used there."""

    keys: Tensor  # [orders, n] int64
    usable: Tensor  # [orders, n] bool


class BackoffCache:
    """Counts of n-grams seen so far and the distribution over the vocabulary that they give.

    A position i predicts token i + 1; an order-n context is the n - 1 tokens up to and including position i. A context
    reaches back no further than the start of its document. Counts of a context and each of the vocabulary's tokens lie
    in hashed slots; the distribution of an order is always divided by the sum over the vocabulary of what lies there.
    """

    def __init__(self, cfg: EvalConfig, data: DataConfig, device: torch.device) -> None:
        self.orders = list(range(cfg.order_lo, cfg.order_hi + 1))
        self.vocab, self.bos, self.device = data.vocab, data.bos, device
        self.mask = (1 << cfg.slot_bits) - 1
        self.strength = cfg.strength
        self.tables = [torch.zeros(1 << cfg.slot_bits, dtype=torch.int32, device=device) for _ in self.orders]
        self.unigrams = torch.zeros(data.vocab, dtype=torch.int64, device=device)
        self.alphabet = torch.arange(data.vocab, device=device, dtype=torch.int64) * TOKEN_MULTIPLIER
        self.taken = 0

    def contexts(self, tokens: Tensor, lo: int, hi: int) -> Contexts:
        """Contexts of the positions lo..hi-1 of the stream."""
        reach = self.orders[-1] - 1
        begin = max(lo - reach + 1, 0)
        part = tokens[begin:hi].to(device=self.device, dtype=torch.int64)
        part = F.pad(part, (reach - 1 - (lo - begin), 0), value=self.bos)
        n = hi - lo
        key = torch.zeros(n, dtype=torch.int64, device=self.device)
        whole = torch.ones(n, dtype=torch.bool, device=self.device)
        keys, usable = [], []
        for back in range(reach):
            at = reach - 1 - back
            token = part[at : at + n]
            key = key ^ (token + 1) * MULTIPLIERS[back]
            if back + 2 in self.orders:
                keys.append(key)
                usable.append(whole)
            whole = whole & (token != self.bos)
        return Contexts(torch.stack(keys), torch.stack(usable))

    def slots(self, key: Tensor, addend: Tensor) -> Tensor:
        mixed = (key * 31 + addend) * 6364136223846793005
        return (mixed ^ (mixed >> 29)) & self.mask

    def distribution(self, found: Contexts) -> tuple[Tensor, Tensor]:
        """p(a | context) for every a of the vocabulary, and how often the longest known context was seen."""
        n = found.keys.size(1)
        base = self.unigrams.float() + 1.0
        p = (base / base.sum()).expand(n, -1)
        support = torch.zeros(n, device=self.device)
        for row, table in enumerate(self.tables):
            slot = self.slots(found.keys[row][:, None], self.alphabet[None, :])
            counts = table[slot].float() * found.usable[row][:, None]
            mass = counts.sum(dim=-1, keepdim=True)
            p = (counts + self.strength * p) / (mass + self.strength)
            support = torch.where(mass[:, 0] > 0, mass[:, 0], support)
        return p, support

    def absorb(self, tokens: Tensor, lo: int, hi: int) -> None:
        """Takes in the targets of positions lo..hi-1. They must have been scored, or lie before this rank's part."""
        if lo != self.taken:
            raise RuntimeError(f"the cache is at {self.taken}, not at {lo}")
        found = self.contexts(tokens, lo, hi)
        target = tokens[lo + 1 : hi + 1].to(device=self.device, dtype=torch.int64)
        self.unigrams += torch.bincount(target, minlength=self.vocab)
        addend = target * TOKEN_MULTIPLIER
        for row, table in enumerate(self.tables):
            slot = self.slots(found.keys[row], addend)
            table.index_add_(0, slot, found.usable[row].to(torch.int32))
        self.taken = hi

    def prefill(self, tokens: Tensor, hi: int, chunk: int) -> None:
        for lo in range(self.taken, hi, chunk):
            self.absorb(tokens, lo, min(lo + chunk, hi))


# ----------------------------------------------------------------------------------------------------------------------
# the scored evaluation
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A block of neighbouring windows: positions lo..hi-1 are scored, each once."""

    lo: int
    hi: int


def rank_span(positions: int, stride: int, rank: int, world: int) -> tuple[int, int]:
    strides = math.ceil(positions / stride)
    first = strides * rank // world * stride
    last = strides * (rank + 1) // world * stride
    return min(first, positions), min(last, positions)


def pieces_of(span: tuple[int, int], cfg: EvalConfig) -> Iterator[Piece]:
    size = cfg.stride * cfg.windows
    for lo in range(span[0], span[1], size):
        yield Piece(lo, min(lo + size, span[1]))


def window_batch(tokens: Tensor, piece: Piece, cfg: EvalConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs of the piece's windows and, flat, which outputs belong to its positions in order.

    A window ends with its `stride` positions and looks back as far as its length allows.
    """
    rows, picks = [], []
    for row, start in enumerate(range(piece.lo, piece.hi, cfg.stride)):
        end = min(start + cfg.stride, piece.hi)
        left = max(end - cfg.seq_len, 0)
        rows.append(tokens[left : left + cfg.seq_len])
        picks.append(torch.arange(start - left, end - left) + row * cfg.seq_len)
    return torch.stack(rows).to(device=device, dtype=torch.int64), torch.cat(picks).to(device)


@dataclass
class Mixture:
    """How much the cache is trusted, by what is known before the target: entropy and support."""

    top: float
    slope: float
    centre: float
    support: float

    def weight(self, log_p: Tensor, support: Tensor) -> Tensor:
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        trust = support / (support + self.support)
        return self.top * torch.sigmoid(self.slope * (entropy - self.centre)) * trust

    def blend(self, log_p: Tensor, cached: Tensor, support: Tensor) -> Tensor:
        w = self.weight(log_p, support)[:, None]
        return torch.log((1.0 - w) * log_p.exp() + w * cached + 1e-20)


class Assessor:
    """Scores this rank's part of the stream, block by block, each block before the cache has seen it."""

    def __init__(self, model: Fladda, tokens: Tensor, table: PieceBytes, cfg: Config, crew: Crew) -> None:
        self.model, self.tokens, self.table = model, tokens, table
        self.cfg, self.crew = cfg, crew
        self.positions = tokens.numel() - 1
        self.span = rank_span(self.positions, cfg.eval.stride, crew.rank, crew.world)
        self.cache = BackoffCache(cfg.eval, cfg.data, crew.device)
        e = cfg.eval
        self.mixture = Mixture(e.mix_max, e.mix_slope, e.mix_centre, e.mix_support)
        self.network = torch.compile(model.logits, dynamic=False)
        self.drift = 0.0
        self.neural = Ledger(crew.device)

    @torch.no_grad()
    def neural_log_probs(self, piece: Piece) -> Tensor:
        x, picks = window_batch(self.tokens, piece, self.cfg.eval, self.crew.device)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = self.network(x)
        return F.log_softmax(logits.flatten(0, 1)[picks].float(), dim=-1)

    @torch.no_grad()
    def score_piece(self, piece: Piece, ledger: Ledger, number: int) -> None:
        before = self.tokens[piece.lo : piece.hi].to(device=self.crew.device, dtype=torch.int64)
        target = self.tokens[piece.lo + 1 : piece.hi + 1].to(device=self.crew.device, dtype=torch.int64)
        log_p = self.neural_log_probs(piece)
        cached, support = self.cache.distribution(self.cache.contexts(self.tokens, piece.lo, piece.hi))
        mixed = self.mixture.blend(log_p, cached, support)
        nll = -mixed.gather(1, target[:, None])[:, 0]
        octets = self.table.count(before, target)
        ledger.enter(nll, octets)
        self.neural.enter(-log_p.gather(1, target[:, None])[:, 0], octets)
        if number % self.cfg.eval.audit_every == 0:
            self.audit(mixed)

    def audit(self, mixed: Tensor) -> None:
        """The mixture must sum to one over the vocabulary, whatever the target."""
        off = (mixed.double().exp().sum(dim=-1) - 1.0).abs().max().item()
        self.drift = max(self.drift, off)
        if off > 1e-3:
            raise RuntimeError(f"the mixture's sum is off by {off:.2e}")

    def run(self) -> Score:
        ledger = Ledger(self.crew.device)
        begun = time.perf_counter()
        self.cache.prefill(self.tokens, self.span[0], self.cfg.eval.fill_chunk)
        self.crew.say(f"cache: rank 0 begins at {self.span[0]}, orders {self.cache.orders}")
        for number, piece in enumerate(pieces_of(self.span, self.cfg.eval)):
            self.score_piece(piece, ledger, number)
            self.cache.absorb(self.tokens, piece.lo, piece.hi)
            if number % 1000 == 0:
                done = (piece.hi - self.span[0]) / max(self.span[1] - self.span[0], 1)
                self.crew.say(f"  eval {100 * done:5.1f}% {time.perf_counter() - begun:.1f}s")
        score = ledger.close(self.crew)
        if score.tokens != self.positions:
            raise RuntimeError(f"{score.tokens} tokens scored, the split has {self.positions}")
        return score


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def crew_of(cfg: Config) -> Iterator[Crew]:
    crew = assemble_crew(cfg)
    try:
        yield crew
    finally:
        if crew.parallel:
            dist.destroy_process_group()


def announce(cfg: Config, crew: Crew, tokens: Tensor) -> None:
    crew.say(HERE.read_text(encoding="utf-8"), console=False)
    crew.say("=" * 100, console=False)
    crew.say(f"Running Python {sys.version}", console=False)
    crew.say(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    crew.say(smi.stdout, console=False)
    crew.say(json.dumps(asdict(cfg)))
    crew.say(f"world_size:{crew.world} grad_accum_steps:{8 // crew.world}")
    crew.say(f"train_loader: {len(shard_paths(cfg.data.train_glob))} shards of {cfg.data.train_glob}")
    crew.say(f"val_loader: {cfg.data.val_glob} tokens:{tokens.numel() - 1}")


def evaluate(cfg: Config, crew: Crew, tokens: Tensor, table: PieceBytes) -> Score:
    clock = Stopwatch()
    clock.go()
    model = load_artifact(cfg, crew)
    plain = quick_score(model.logits, tokens, table, cfg, crew)
    crew.say(f"final_roundtrip val_loss:{plain.loss:.4f} val_bpb:{plain.bpb:.4f} eval_time:{clock.read():.1f}s")
    assessor = Assessor(model, tokens, table, cfg, crew)
    score = assessor.run()
    neural = assessor.neural.close(crew)
    spent = clock.halt()
    crew.say(f"final_windows_without_cache val_loss:{neural.loss:.4f} val_bpb:{neural.bpb:.4f}")
    crew.say(f"final_cache tokens:{score.tokens} drift:{assessor.drift:.1e} eval_time:{1000 * spent:.0f}ms")
    if spent > cfg.eval.cap_s:
        raise RuntimeError(f"evaluation took {spent:.0f} s of {cfg.eval.cap_s:.0f} s")
    return score


def main() -> None:
    cfg = Config()
    with crew_of(cfg) as crew:
        seed_everything(cfg.train.seed)
        tokens = load_validation(cfg.data.val_glob)
        table = piece_bytes(cfg.data.tokenizer, cfg.data.vocab, crew.device)
        announce(cfg, crew, tokens)
        trainer = Trainer(cfg, crew, tokens, table)
        params = sum(p.numel() for p in trainer.model.parameters())
        crew.say(f"model_params:{params}")
        trainer.run()
        report_size(cfg, crew)
        del trainer
        torch.cuda.empty_cache()
        score = evaluate(cfg, crew, tokens, table)
        crew.say(f"final_val val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}")
        crew.say(f"final_val_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")


if __name__ == "__main__":
    main()
