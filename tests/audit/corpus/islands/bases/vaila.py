"""Parameter Golf submission: two-headed transformer, int5/int6 GPTQ, score-first adapters.

Process overview (every stage is one class below):

    Trainer    600 s clock: Muon + Adam, weight averaging, head-mixture fit, Hessians, rounding, packing.
    Packer     GPTQ (int5 for MLP, int6 for attention, int8 for embeddings), LZMA container, read-back.
    Evaluator  streams the validation tokens in segments; a segment is scored first and learned from afterwards.
    Report     the figures of one run, written to the log file and to the console of rank 0.

Start with:  torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import logging
import lzma
import math
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
LN2 = math.log(2.0)


# =====================================================================================================
# 1. Settings
# =====================================================================================================


def setting(name: str, default):
    """The one place where the environment is read. The type of the default decides how the text is parsed."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


@dataclass(frozen=True)
class PathSettings:
    data_dir: str = field(default_factory=lambda: setting("DATA_PATH", "./data/datasets/fineweb10B_sp1024"))
    tokenizer: str = field(
        default_factory=lambda: setting("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    )
    log_dir: str = field(default_factory=lambda: setting("LOG_DIR", "logs"))
    artifact: str = field(default_factory=lambda: setting("ARTIFACT", "final_model.int56.xz"))

    @property
    def train_pattern(self) -> str:
        return os.path.join(self.data_dir, "fineweb_train_*.bin")

    @property
    def val_pattern(self) -> str:
        return os.path.join(self.data_dir, "fineweb_val_*.bin")


@dataclass(frozen=True)
class ModelSettings:
    vocab: int = field(default_factory=lambda: setting("VOCAB_SIZE", 1024))
    layers: int = field(default_factory=lambda: setting("NUM_LAYERS", 10))
    dim: int = field(default_factory=lambda: setting("MODEL_DIM", 512))
    heads: int = field(default_factory=lambda: setting("NUM_HEADS", 8))
    kv_heads: int = field(default_factory=lambda: setting("NUM_KV_HEADS", 4))
    mlp_mult: int = field(default_factory=lambda: setting("MLP_MULT", 3))
    rope_base: float = field(default_factory=lambda: setting("ROPE_BASE", 10000.0))
    rope_dims: int = field(default_factory=lambda: setting("ROPE_DIMS", 32))
    softcap: float = field(default_factory=lambda: setting("LOGIT_SOFTCAP", 30.0))
    side_layer: int = field(default_factory=lambda: setting("SIDE_LAYER", 7))
    side_rank: int = field(default_factory=lambda: setting("SIDE_RANK", 160))
    side_weight: float = field(default_factory=lambda: setting("SIDE_LOSS_WEIGHT", 0.25))
    qk_gain: float = field(default_factory=lambda: setting("QK_GAIN_INIT", 1.5))


@dataclass(frozen=True)
class TrainSettings:
    seed: int = field(default_factory=lambda: setting("SEED", 1337))
    seq_len: int = field(default_factory=lambda: setting("TRAIN_SEQ_LEN", 1024))
    batch_tokens: int = field(default_factory=lambda: setting("TRAIN_BATCH_TOKENS", 524_288))
    max_steps: int = field(default_factory=lambda: setting("ITERATIONS", 20_000))
    cap_seconds: float = field(default_factory=lambda: setting("MAX_WALLCLOCK_SECONDS", 600.0))
    reserve_seconds: float = field(default_factory=lambda: setting("RESERVE_SECONDS", 84.0))
    warmup_runs: int = field(default_factory=lambda: setting("COMPILE_WARMUP_STEPS", 12))
    warmdown_frac: float = field(default_factory=lambda: setting("WARMDOWN_FRAC", 0.42))
    matrix_lr: float = field(default_factory=lambda: setting("MATRIX_LR", 0.025))
    scalar_lr: float = field(default_factory=lambda: setting("SCALAR_LR", 0.025))
    embed_lr: float = field(default_factory=lambda: setting("EMBED_LR", 0.035))
    side_lr: float = field(default_factory=lambda: setting("SIDE_LR", 0.01))
    momentum: float = field(default_factory=lambda: setting("MUON_MOMENTUM", 0.97))
    momentum_start: float = field(default_factory=lambda: setting("MUON_MOMENTUM_START", 0.88))
    momentum_steps: int = field(default_factory=lambda: setting("MUON_MOMENTUM_STEPS", 800))
    muon_steps: int = field(default_factory=lambda: setting("MUON_NS_STEPS", 5))
    muon_wd: float = field(default_factory=lambda: setting("MUON_WD", 0.04))
    adam_wd: float = field(default_factory=lambda: setting("ADAM_WD", 0.01))
    grad_clip: float = field(default_factory=lambda: setting("GRAD_CLIP", 0.3))
    ema_decay: float = field(default_factory=lambda: setting("EMA_DECAY", 0.997))
    log_every: int = field(default_factory=lambda: setting("TRAIN_LOG_EVERY", 200))
    look_every: int = field(default_factory=lambda: setting("VAL_LOOK_EVERY", 2000))
    look_tokens: int = field(default_factory=lambda: setting("VAL_LOOK_TOKENS", 1_048_576))


@dataclass(frozen=True)
class PackSettings:
    mlp_bits: int = field(default_factory=lambda: setting("MLP_BITS", 5))
    attn_bits: int = field(default_factory=lambda: setting("ATTN_BITS", 6))
    embed_bits: int = field(default_factory=lambda: setting("EMBED_BITS", 8))
    block: int = field(default_factory=lambda: setting("GPTQ_BLOCK", 128))
    damp: float = field(default_factory=lambda: setting("GPTQ_DAMP", 0.01))
    calib_batches: int = field(default_factory=lambda: setting("CALIB_BATCHES", 24))
    calib_seqs: int = field(default_factory=lambda: setting("CALIB_SEQS", 16))
    mix_batches: int = field(default_factory=lambda: setting("MIX_BATCHES", 12))
    mix_rounds: int = field(default_factory=lambda: setting("MIX_EM_ROUNDS", 30))
    prior_tokens: int = field(default_factory=lambda: setting("PRIOR_TOKENS", 50_000_000))
    limit_bytes: int = field(default_factory=lambda: setting("SIZE_LIMIT", 16_000_000))
    lzma_preset: int = field(default_factory=lambda: setting("LZMA_PRESET", 6))


@dataclass(frozen=True)
class EvalSettings:
    seq_len: int = field(default_factory=lambda: setting("EVAL_SEQ_LEN", 1024))
    stride: int = field(default_factory=lambda: setting("EVAL_STRIDE", 64))
    batch: int = field(default_factory=lambda: setting("EVAL_BATCH_WINDOWS", 64))
    segment_tokens: int = field(default_factory=lambda: setting("EVAL_SEGMENT_TOKENS", 524_288))
    adapt: bool = field(default_factory=lambda: setting("ADAPT", True))
    adapt_epochs: int = field(default_factory=lambda: setting("ADAPT_EPOCHS", 1))
    adapt_rank: int = field(default_factory=lambda: setting("ADAPT_RANK", 8))
    adapt_alpha: float = field(default_factory=lambda: setting("ADAPT_ALPHA", 16.0))
    adapt_lr: float = field(default_factory=lambda: setting("ADAPT_LR", 4e-4))
    adapt_wd: float = field(default_factory=lambda: setting("ADAPT_WD", 0.01))
    adapt_seqs: int = field(default_factory=lambda: setting("ADAPT_SEQS_PER_RANK", 8))
    adapt_clip: float = field(default_factory=lambda: setting("ADAPT_CLIP", 1.0))
    bias_strength: float = field(default_factory=lambda: setting("UNIGRAM_BIAS", 0.3))
    bias_alpha: float = field(default_factory=lambda: setting("UNIGRAM_ALPHA", 200_000.0))
    cap_seconds: float = field(default_factory=lambda: setting("EVAL_CAP_SECONDS", 600.0))
    adapt_until: float = field(default_factory=lambda: setting("ADAPT_UNTIL_SECONDS", 470.0))


@dataclass(frozen=True)
class Settings:
    paths: PathSettings = field(default_factory=PathSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    pack: PackSettings = field(default_factory=PackSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    run_id: str = field(default_factory=lambda: setting("RUN_ID", uuid.uuid4().hex[:12]))

    def check(self, world: int) -> None:
        """Settings that cannot work together are refused before a GPU second is spent."""
        if self.model.dim % self.model.heads or self.model.heads % self.model.kv_heads:
            raise ValueError("MODEL_DIM, NUM_HEADS and NUM_KV_HEADS must divide each other")
        if self.train.batch_tokens % (world * self.train.seq_len):
            raise ValueError("TRAIN_BATCH_TOKENS must be a multiple of world size times TRAIN_SEQ_LEN")
        if self.eval.segment_tokens % self.eval.stride or self.eval.segment_tokens % self.eval.seq_len:
            raise ValueError("EVAL_SEGMENT_TOKENS must be a multiple of EVAL_STRIDE and of EVAL_SEQ_LEN")
        if (self.eval.segment_tokens // self.eval.seq_len) % (world * self.eval.adapt_seqs):
            raise ValueError("a segment must hold a whole number of adaptation steps")
        if not 0 < self.eval.stride <= self.eval.seq_len:
            raise ValueError("EVAL_STRIDE must lie in 1..EVAL_SEQ_LEN")
        if not 0 <= self.model.side_layer < self.model.layers:
            raise ValueError("SIDE_LAYER must name a layer")


# =====================================================================================================
# 2. Ranks, logging, clocks
# =====================================================================================================


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and the collectives the other classes need."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def start() -> Ranks:
        if not torch.cuda.is_available():
            raise RuntimeError("a CUDA device is required")
        rank = setting("RANK", 0)
        world = setting("WORLD_SIZE", 1)
        device = torch.device("cuda", setting("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl", device_id=device)
        return Ranks(rank, world, device)

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        return tensor

    def latest(self, seconds: float) -> float:
        """The largest of the ranks' clocks, so that all ranks take the same decision."""
        reading = torch.tensor(seconds, device=self.device, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(reading, op=dist.ReduceOp.MAX)
        return reading.item()

    def share(self, tensor: Tensor, source: int) -> Tensor:
        if self.world > 1:
            dist.broadcast(tensor, src=source)
        return tensor

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def make_logger(settings: Settings, ranks: Ranks) -> logging.Logger:
    logger = logging.getLogger("golf")
    logger.propagate = False
    logger.setLevel(logging.INFO if ranks.chief else logging.ERROR)
    formatter = logging.Formatter("%(message)s")
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(formatter)
    logger.addHandler(console)
    if ranks.chief:
        Path(settings.paths.log_dir).mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(Path(settings.paths.log_dir) / f"{settings.run_id}.txt", encoding="utf-8")
        to_file.setFormatter(formatter)
        logger.addHandler(to_file)
    return logger


class Clock:
    """Wall clock of one stage. It is never paused."""

    def __init__(self, ranks: Ranks, cap: float):
        self.ranks = ranks
        self.cap = cap
        ranks.barrier()
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def agreed(self) -> float:
        torch.cuda.synchronize()
        return self.ranks.latest(self.seconds())

    def left(self) -> float:
        return self.cap - self.agreed()


# =====================================================================================================
# 3. Data
# =====================================================================================================


def read_shard(path: str | Path) -> Tensor:
    """The tokens of one shard file, as uint16 on the host."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: {tokens.size} tokens, header says {count}")
    return torch.from_numpy(tokens)


def list_shards(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no shard matches {pattern}")
    return files


class ShardStream:
    """An endless stream over shards, in the order of their names."""

    def __init__(self, files: list[str]):
        self.files = files
        self.index = 0
        self.position = 0
        self.tokens = read_shard(files[0])

    def take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        while count > 0:
            available = self.tokens.numel() - self.position
            if available == 0:
                self.index = (self.index + 1) % len(self.files)
                self.tokens = read_shard(self.files[self.index])
                self.position = 0
                continue
            n = min(available, count)
            parts.append(self.tokens[self.position : self.position + n])
            self.position += n
            count -= n
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class BatchLoader:
    """Cuts the stream into batches; every rank reads the stream and keeps its own part."""

    def __init__(self, files: list[str], ranks: Ranks):
        self.stream = ShardStream(files)
        self.ranks = ranks

    def next(self, tokens_per_rank: int, seq_len: int) -> tuple[Tensor, Tensor]:
        span = tokens_per_rank + 1
        chunk = self.stream.take(span * self.ranks.world)
        mine = chunk[self.ranks.rank * span : (self.ranks.rank + 1) * span].to(torch.int64)
        mine = mine.pin_memory().to(self.ranks.device, non_blocking=True)
        return mine[:-1].view(-1, seq_len), mine[1:].view(-1, seq_len)


class TrainData:
    """Training shards: all but the last feed the optimizer, the last one feeds the fits made after training."""

    def __init__(self, settings: Settings, ranks: Ranks):
        files = list_shards(settings.paths.train_pattern)
        self.body = files[:-1] if len(files) > 1 else files
        self.tail = files[-1:]
        self.ranks = ranks
        self.batches = BatchLoader(self.body, ranks)

    def held_out(self) -> BatchLoader:
        return BatchLoader(self.tail, self.ranks)


def load_validation(pattern: str) -> Tensor:
    """The whole validation split, in order."""
    return torch.cat([read_shard(file) for file in list_shards(pattern)]).contiguous()


@dataclass(frozen=True)
class ByteTable:
    """How many UTF-8 bytes of text a token stands for, given the token before it."""

    length: Tensor  # bytes of the piece without its leading space
    spaced: Tensor  # the piece begins with the mark of a space
    silent: Tensor  # control pieces: no text, and a space after them is not written

    @staticmethod
    def build(path: str, vocab: int, device: torch.device) -> ByteTable:
        sp = spm.SentencePieceProcessor(model_file=path)
        size = max(sp.vocab_size(), vocab)
        length = np.zeros(size, dtype=np.int16)
        spaced = np.zeros(size, dtype=bool)
        silent = np.ones(size, dtype=bool)
        for token in range(sp.vocab_size()):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            silent[token] = False
            if sp.is_byte(token):
                length[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith("\u2581"):
                spaced[token] = True
                piece = piece[1:]
            length[token] = len(piece.encode("utf-8"))
        return ByteTable(
            torch.from_numpy(length).to(device),
            torch.from_numpy(spaced).to(device),
            torch.from_numpy(silent).to(device),
        )

    def count(self, before: Tensor, tokens: Tensor) -> Tensor:
        """Bytes of each of `tokens`; `before` holds the token in front of each."""
        space = self.spaced[tokens] & ~self.silent[before]
        return self.length[tokens].to(torch.int32) + space.to(torch.int32)


# =====================================================================================================
# 4. Model
# =====================================================================================================


class Adapter(nn.Module):
    """A low-rank addition to a linear layer, zero at the start."""

    def __init__(self, fan_in: int, fan_out: int, rank: int, alpha: float):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, fan_in))
        self.up = nn.Parameter(torch.zeros(fan_out, rank))
        self.scale = alpha / rank
        nn.init.normal_(self.down, std=fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype)) * self.scale


class Linear(nn.Linear):
    """Weights in fp32, arithmetic in the dtype of the input; carries an adapter during evaluation."""

    def __init__(self, fan_in: int, fan_out: int, zero: bool = False):
        super().__init__(fan_in, fan_out, bias=False)
        self.adapter: Adapter | None = None
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        if self.adapter is not None:
            y = y + self.adapter(x)
        return y


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Rotary positions on the first `dims` channels of a head."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        self.dims = dims
        self.register_buffer("inv_freq", base ** (-torch.arange(0, dims, 2).float() / dims), persistent=False)

    def forward(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(length, device=device).float(), self.inv_freq.to(device))
        return angle.cos()[None, None], angle.sin()[None, None]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, kept), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: ModelSettings):
        super().__init__()
        self.heads = cfg.heads
        self.kv_heads = cfg.kv_heads
        self.width = cfg.dim // cfg.heads
        kv = self.kv_heads * self.width
        self.q = Linear(cfg.dim, cfg.dim)
        self.k = Linear(cfg.dim, kv)
        self.v = Linear(cfg.dim, kv)
        self.out = Linear(cfg.dim, cfg.dim, zero=True)
        self.gain = nn.Parameter(torch.full((cfg.heads,), cfg.qk_gain))
        self.rotary = Rotary(min(cfg.rope_dims, self.width), cfg.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = self.q(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        cos, sin = self.rotary(length, x.device)
        q = self.rotary.rotate(norm(q), cos, sin) * self.gain.to(x.dtype)[None, :, None, None]
        k = self.rotary.rotate(norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class FeedForward(nn.Module):
    def __init__(self, cfg: ModelSettings):
        super().__init__()
        self.up = Linear(cfg.dim, cfg.dim * cfg.mlp_mult)
        self.down = Linear(cfg.dim * cfg.mlp_mult, cfg.dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: ModelSettings, depth: int):
        super().__init__()
        self.attn = Attention(cfg)
        self.mlp = FeedForward(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.dim))
        self.lanes = nn.Parameter(torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim))))
        self.damping = (depth + 1) ** -0.5

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        lanes = self.lanes.to(x.dtype)
        x = lanes[0] * x + lanes[1] * first
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x) * self.damping)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x) * self.damping)


class SideHead(nn.Module):
    """The second head: reads an inner layer through a narrow waist and has an output matrix of its own."""

    def __init__(self, cfg: ModelSettings):
        super().__init__()
        self.waist = Linear(cfg.dim, cfg.side_rank)
        self.out = Linear(cfg.side_rank, cfg.vocab, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.waist(norm(x))))


class TwoHeaded(nn.Module):
    """Decoder with U-net skips and two heads over the same vocabulary."""

    def __init__(self, cfg: ModelSettings):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg, depth) for depth in range(cfg.layers))
        self.half = cfg.layers // 2
        self.skip_scale = nn.Parameter(torch.ones(self.half, cfg.dim))
        self.side = SideHead(cfg)
        self.head_bias = nn.Parameter(torch.zeros(cfg.vocab))
        nn.init.normal_(self.embed.weight, std=0.005)

    def cap(self, logits: Tensor) -> Tensor:
        limit = self.cfg.softcap
        return limit * torch.tanh(logits.float() / limit)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the main head and of the side head, both of shape (batch, length, vocab)."""
        x = norm(self.embed(ids).to(torch.bfloat16))
        first = x
        skips: list[Tensor] = []
        inner = x
        for depth, block in enumerate(self.blocks):
            if depth < self.half:
                skips.append(x)
            elif depth >= self.cfg.layers - self.half:
                i = self.cfg.layers - 1 - depth
                x = x + self.skip_scale[i].to(x.dtype) * skips[i]
            x = block(x, first)
            if depth == self.cfg.side_layer:
                inner = x
        main = F.linear(norm(x), self.embed.weight.to(x.dtype)) + self.head_bias.to(x.dtype)
        return self.cap(main), self.cap(self.side(inner))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        main, side = self.forward(ids)
        flat = targets.reshape(-1)
        loss = F.cross_entropy(main.flatten(0, 1), flat)
        return loss + self.cfg.side_weight * F.cross_entropy(side.flatten(0, 1), flat)


def mixed_log_probs(main: Tensor, side: Tensor, weight: float, bias: Tensor | None = None) -> Tensor:
    """log(w * softmax(main + bias) + (1 - w) * softmax(side + bias)), over the whole vocabulary."""
    if bias is not None:
        main, side = main + bias, side + bias
    return torch.logaddexp(
        F.log_softmax(main, dim=-1) + math.log(weight),
        F.log_softmax(side, dim=-1) + math.log1p(-weight),
    )


def target_nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# =====================================================================================================
# 5. Optimizers
# =====================================================================================================


@torch.compile
def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; each rank does its share of the matrices and the updates are summed."""

    def __init__(self, params: list[nn.Parameter], ranks: Ranks, lr: float, momentum: float, steps: int, wd: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, wd=wd))
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = group["params"]
            updates = torch.zeros(
                sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16
            )
            offset = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(p.grad)
                    state["buffer"].mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(state["buffer"], alpha=group["momentum"])
                    g = orthogonalize(g, group["steps"]) * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    updates[offset : offset + p.numel()] = g.reshape(-1)
                offset += p.numel()
            self.ranks.total(updates)
            offset = 0
            for p in params:
                update = updates[offset : offset + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["wd"]).add_(update, alpha=-group["lr"])
                offset += p.numel()


class OptimizerSet:
    """Muon for the matrices of the blocks, Adam for everything else, one schedule for both."""

    def __init__(self, model: TwoHeaded, cfg: TrainSettings, ranks: Ranks):
        self.cfg = cfg
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 2]
        chosen = {id(p) for p in matrices}
        scalars = [p for p in model.blocks.parameters() if id(p) not in chosen]
        scalars += [model.skip_scale, model.head_bias]
        self.muon = Muon(matrices, ranks, cfg.matrix_lr, cfg.momentum, cfg.muon_steps, cfg.muon_wd)
        self.adam = torch.optim.AdamW(
            [
                dict(params=[model.embed.weight], lr=cfg.embed_lr, weight_decay=cfg.adam_wd),
                dict(params=list(model.side.parameters()), lr=cfg.side_lr, weight_decay=cfg.adam_wd),
                dict(params=scalars, lr=cfg.scalar_lr, weight_decay=0.0),
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=True,
        )
        self.all = [self.muon, self.adam]
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    def schedule(self, step: int, scale: float) -> None:
        warm = min(step / max(self.cfg.momentum_steps, 1), 1.0)
        for group in self.muon.param_groups:
            group["momentum"] = (1 - warm) * self.cfg.momentum_start + warm * self.cfg.momentum
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


class WeightAverage:
    """Exponential moving average of the weights; it alone is what gets packed."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 1.0 - decay)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])


# =====================================================================================================
# 6. Report
# =====================================================================================================


@dataclass
class Score:
    """Sums over scored tokens; every token is added once."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def loss(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def bpb(self) -> float:
        return self.nats / LN2 / max(self.bytes, 1)


@dataclass
class Report:
    """The figures of a run, gathered by the stages and printed at the end."""

    logger: logging.Logger
    steps: int = 0
    train_seconds: float = 0.0
    build_seconds: float = 0.0
    eval_seconds: float = 0.0
    code_bytes: int = 0
    model_bytes: int = 0
    mix_weight: float = 1.0
    segments_adapted: int = 0
    score: Score = field(default_factory=Score)

    @property
    def total_bytes(self) -> int:
        return self.code_bytes + self.model_bytes

    def say(self, text: str) -> None:
        self.logger.info(text)

    def opening(self, settings: Settings, ranks: Ranks, model: nn.Module) -> None:
        self.say(f"run:{settings.run_id} python:{sys.version.split()[0]} torch:{torch.__version__}")
        self.say(f"world_size:{ranks.world} seed:{settings.train.seed}")
        for name in ("paths", "model", "train", "pack", "eval"):
            self.say(f"settings.{name}:{asdict(getattr(settings, name))}")
        self.say(f"model_params:{sum(p.numel() for p in model.parameters())}")
        try:
            smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
            self.say(smi.strip())
        except OSError:
            self.say("nvidia-smi: not found")

    def sizes(self, limit: int) -> None:
        self.say(f"Code size: {self.code_bytes} bytes")
        self.say(f"Serialized model int5/int6 lzma: {self.model_bytes} bytes")
        self.say(f"Total submission size: {self.total_bytes} bytes (limit {limit})")
        if self.total_bytes > limit:
            raise RuntimeError(f"submission is {self.total_bytes - limit} bytes over the limit")

    def closing(self) -> None:
        self.say(
            f"summary steps:{self.steps} train_seconds:{self.train_seconds:.1f} "
            f"build_seconds:{self.build_seconds:.1f} eval_seconds:{self.eval_seconds:.1f} "
            f"mix_weight:{self.mix_weight:.4f} segments_adapted:{self.segments_adapted}"
        )
        self.say(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
        self.say(f"final tokens:{self.score.tokens} bytes:{self.score.bytes}")
        self.say(f"final_exact val_loss:{self.score.loss:.8f} val_bpb:{self.score.bpb:.8f}")


# =====================================================================================================
# 7. Training
# =====================================================================================================


@dataclass
class Trained:
    """What the training hands to the packer."""

    model: TwoHeaded
    hessians: dict[str, Tensor]
    mix_weight: float
    log_prior: Tensor


class Trainer:
    def __init__(self, settings: Settings, ranks: Ranks, report: Report, data: TrainData, val: Tensor):
        self.settings = settings
        self.cfg = settings.train
        self.ranks = ranks
        self.report = report
        self.data = data
        self.val = val
        self.model = TwoHeaded(settings.model).to(ranks.device)
        for p in self.model.parameters():
            ranks.share(p.data, 0)
        self.compiled_loss = torch.compile(self.model.loss, dynamic=False)
        self.optimizers = OptimizerSet(self.model, self.cfg, ranks)
        self.tokens_per_rank = self.cfg.batch_tokens // ranks.world

    # ---- the optimizer loop

    def run(self) -> tuple[Trained, Clock]:
        self.compile_warmup()
        self.average = WeightAverage(self.model, self.cfg.ema_decay)
        clock = Clock(self.ranks, self.cfg.cap_seconds)
        budget = self.cfg.cap_seconds - self.cfg.reserve_seconds
        step, elapsed = 0, 0.0
        while step < self.cfg.max_steps:
            if step % 8 == 0:  # all ranks must see the same time, the learning rate depends on it
                elapsed = clock.agreed()
                if elapsed >= budget:
                    break
            loss = self.one_step(step, self.lr_scale(step, elapsed, budget))
            step += 1
            self.average.update(self.model, step)
            if step <= 5 or step % self.cfg.log_every == 0:
                shown = self.ranks.mean(loss.detach().clone()).item()
                spent = clock.seconds()
                self.report.say(
                    f"step:{step}/{self.cfg.max_steps} train_loss:{shown:.4f} "
                    f"train_time:{1000 * spent:.0f}ms step_avg:{1000 * spent / step:.2f}ms"
                )
            if self.cfg.look_every and step % self.cfg.look_every == 0:
                self.look(step)
        self.report.steps = step
        self.report.train_seconds = clock.agreed()
        self.report.say(f"stopped at step {step} after {self.report.train_seconds:.2f}s, cap {clock.cap:.0f}s")
        self.average.apply(self.model)
        trained = self.after_training(clock)
        return trained, clock

    def one_step(self, step: int, scale: float) -> Tensor:
        ids, targets = self.data.batches.next(self.tokens_per_rank, self.cfg.seq_len)
        loss = self.compiled_loss(ids, targets)
        loss.backward()
        self.average_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        self.optimizers.schedule(step, scale)
        self.optimizers.step()
        self.optimizers.zero()
        return loss

    def average_gradients(self, model: nn.Module) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        self.ranks.mean(flat)
        offset = 0
        for g in grads:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()

    def lr_scale(self, step: int, elapsed: float, budget: float) -> float:
        """Flat, then linear to zero; progress is the larger of the share of steps and the share of time."""
        progress = max(step / self.cfg.max_steps, elapsed / budget)
        if progress < 1.0 - self.cfg.warmdown_frac:
            return 1.0
        return max((1.0 - progress) / self.cfg.warmdown_frac, 0.0)

    def compile_warmup(self) -> None:
        """Compiles the kernels on random tokens; weights and optimizer states are put back afterwards."""
        weights = copy.deepcopy(self.model.state_dict())
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers.all]
        shape = (self.tokens_per_rank // self.cfg.seq_len, self.cfg.seq_len)
        for _ in range(self.cfg.warmup_runs):
            noise = torch.randint(self.settings.model.vocab, shape, device=self.ranks.device)
            self.compiled_loss(noise, noise.roll(-1, dims=1)).backward()
            self.average_gradients(self.model)
            self.optimizers.step()
            self.optimizers.zero()
        self.model.load_state_dict(weights)
        for optimizer, state in zip(self.optimizers.all, states):
            optimizer.load_state_dict(state)
        self.report.say(f"compile warm-up: {self.cfg.warmup_runs} steps on random tokens")

    @torch.no_grad()
    def look(self, step: int) -> None:
        """A progress figure for the log, from the beginning of the validation split. Nothing depends on it."""
        length = self.cfg.seq_len
        rows = min(self.cfg.look_tokens, self.val.numel() - 1) // length
        sums = torch.zeros(2, device=self.ranks.device, dtype=torch.float64)
        for row in range(self.ranks.rank * 32, rows, self.ranks.world * 32):
            last = min(row + 32, rows)
            chunk = self.val[row * length : last * length + 1].to(self.ranks.device, torch.int64)
            main, _ = self.model(chunk[:-1].view(-1, length))
            sums[0] += F.cross_entropy(main.flatten(0, 1), chunk[1:], reduction="sum").double()
            sums[1] += chunk.numel() - 1
        self.ranks.total(sums)
        self.report.say(f"step:{step} look_loss:{(sums[0] / sums[1]).item():.4f} ({int(sums[1].item())} tokens)")

    # ---- what is fitted after the last step, still on the training clock

    def after_training(self, clock: Clock) -> Trained:
        held_out = self.data.held_out()
        mix_weight = self.fit_mixture(held_out)
        self.report.mix_weight = mix_weight
        self.report.say(f"mixture: main head weight {mix_weight:.5f}, at {clock.agreed():.1f}s")
        log_prior = self.unigram_prior()
        hessians = self.collect_hessians(held_out, clock)
        self.report.say(f"calibration on training shards ended at {clock.agreed():.1f}s")
        return Trained(self.model, hessians, mix_weight, log_prior)

    @torch.no_grad()
    def fit_mixture(self, loader: BatchLoader) -> float:
        """EM for the weight of the main head, on training tokens the optimizer has not seen."""
        pack = self.settings.pack
        main_p: list[Tensor] = []
        side_p: list[Tensor] = []
        for _ in range(pack.mix_batches):
            ids, targets = loader.next(pack.calib_seqs * self.cfg.seq_len, self.cfg.seq_len)
            main, side = self.model(ids)
            main_p.append(target_nll(F.log_softmax(main, dim=-1), targets).neg().exp().double().reshape(-1))
            side_p.append(target_nll(F.log_softmax(side, dim=-1), targets).neg().exp().double().reshape(-1))
        a, b = torch.cat(main_p), torch.cat(side_p)
        weight = torch.tensor(0.9, device=self.ranks.device, dtype=torch.float64)
        for _ in range(pack.mix_rounds):
            share = weight * a / (weight * a + (1.0 - weight) * b)
            weight = self.ranks.mean(share.mean())
        return min(max(weight.item(), 1e-4), 1.0 - 1e-4)

    @torch.no_grad()
    def unigram_prior(self) -> Tensor:
        """Log frequencies of the tokens in the first training shards, smoothed by one."""
        vocab = self.settings.model.vocab
        counts = torch.ones(vocab, dtype=torch.float64)
        seen = 0
        for file in self.data.body:
            tokens = read_shard(file)[: self.settings.pack.prior_tokens - seen]
            counts += torch.bincount(tokens.to(torch.int64), minlength=vocab)[:vocab]
            seen += tokens.numel()
            if seen >= self.settings.pack.prior_tokens:
                break
        return (counts / counts.sum()).log().float()

    @torch.no_grad()
    def collect_hessians(self, loader: BatchLoader, clock: Clock) -> dict[str, Tensor]:
        """X'X of the inputs of every linear layer, summed over training batches and ranks."""
        pack = self.settings.pack
        sums: dict[str, Tensor] = {}
        handles = []

        def watch(name: str, layer: Linear) -> None:
            sums[name] = torch.zeros(layer.in_features, layer.in_features, device=self.ranks.device)

            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
                x = inputs[0].reshape(-1, layer.in_features).float()
                sums[name].addmm_(x.T, x)

            handles.append(layer.register_forward_hook(hook))

        for name, layer in self.model.named_modules():
            if isinstance(layer, Linear):
                watch(name, layer)
        used = 0
        for _ in range(pack.calib_batches):
            if clock.left() < 0.6 * self.cfg.reserve_seconds:
                break
            ids, _ = loader.next(pack.calib_seqs * self.cfg.seq_len, self.cfg.seq_len)
            self.model(ids)
            used += 1
        for handle in handles:
            handle.remove()
        for matrix in sums.values():
            self.ranks.total(matrix)
        self.report.say(f"hessians: {used} batches of {pack.calib_seqs * self.cfg.seq_len} tokens a rank")
        return sums


# =====================================================================================================
# 8. Packing
# =====================================================================================================


@dataclass(frozen=True)
class Quantized:
    codes: Tensor  # int8
    scale: Tensor  # fp16, one a row

    def restore(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]


class Packer:
    """Rounds the weights, writes the artifact and reads it back."""

    def __init__(self, settings: Settings, ranks: Ranks, report: Report):
        self.settings = settings
        self.cfg = settings.pack
        self.ranks = ranks
        self.report = report
        self.path = Path(settings.paths.artifact)

    def bits_for(self, name: str) -> int:
        if ".mlp." in name:
            return self.cfg.mlp_bits
        if ".attn." in name or name.startswith("side."):
            return self.cfg.attn_bits
        return self.cfg.embed_bits

    # ---- rounding

    def best_scale(self, weight: Tensor, bits: int) -> Tensor:
        """Per row the clipping that rounds with the smallest squared error; the weights alone decide."""
        top = 2 ** (bits - 1) - 1
        peak = weight.abs().amax(dim=1).clamp_min(1e-8)
        best = peak / top
        best_error = torch.full_like(peak, float("inf"))
        for clip in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65):
            scale = (peak * clip / top).half().float().clamp_min(1e-7)
            rounded = (weight / scale[:, None]).round().clamp(-top, top) * scale[:, None]
            error = (rounded - weight).square().sum(dim=1)
            better = error < best_error
            best = torch.where(better, scale, best)
            best_error = torch.where(better, error, best_error)
        return best

    def round_plain(self, weight: Tensor, bits: int) -> Quantized:
        top = 2 ** (bits - 1) - 1
        scale = self.best_scale(weight, bits)
        codes = (weight / scale[:, None]).round().clamp(-top, top)
        return Quantized(codes.to(torch.int8), scale.half())

    def round_gptq(self, weight: Tensor, hessian: Tensor, bits: int) -> Quantized:
        """GPTQ: column after column, the rounding error is passed on to the columns still to come."""
        top = 2 ** (bits - 1) - 1
        w = weight.float().clone()
        h = hessian.float().clone()
        diagonal = torch.arange(h.size(0), device=h.device)
        dead = h.diagonal() == 0
        h[diagonal[dead], diagonal[dead]] = 1.0
        w[:, dead] = 0.0
        order = h.diagonal().argsort(descending=True)
        back = order.argsort()
        w, h = w[:, order], h[order][:, order]
        h[diagonal, diagonal] += self.cfg.damp * h.diagonal().mean()
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        scale = self.best_scale(w, bits)
        codes = torch.zeros_like(w)
        for start in range(0, w.size(1), self.cfg.block):
            stop = min(start + self.cfg.block, w.size(1))
            block = w[:, start:stop].clone()
            errors = torch.zeros_like(block)
            corner = inverse[start:stop, start:stop]
            for j in range(stop - start):
                column = block[:, j]
                code = (column / scale).round().clamp(-top, top)
                codes[:, start + j] = code
                error = (column - code * scale) / corner[j, j]
                block[:, j:] -= error[:, None] * corner[j, j:][None, :]
                errors[:, j] = error
            w[:, stop:] -= errors @ inverse[start:stop, stop:]
        return Quantized(codes[:, back].to(torch.int8), scale.half())

    @torch.no_grad()
    def quantize(self, trained: Trained) -> dict[str, Quantized]:
        """All matrices, dealt out to the ranks in turn and exchanged afterwards."""
        result: dict[str, Quantized] = {}
        names = [name for name, p in trained.model.named_parameters() if self.is_matrix(name, p)]
        params = dict(trained.model.named_parameters())
        for i, name in enumerate(names):
            owner = i % self.ranks.world
            weight = params[name].detach().float()
            if owner == self.ranks.rank:
                hessian = trained.hessians.get(name.removesuffix(".weight"))
                bits = self.bits_for(name)
                if hessian is None:
                    result[name] = self.round_plain(weight, bits)
                else:
                    result[name] = self.round_gptq(weight, hessian, bits)
            else:
                result[name] = Quantized(
                    torch.empty(weight.shape, dtype=torch.int8, device=weight.device),
                    torch.empty(weight.size(0), dtype=torch.float16, device=weight.device),
                )
        for i, name in enumerate(names):
            self.ranks.share(result[name].codes, i % self.ranks.world)
            self.ranks.share(result[name].scale, i % self.ranks.world)
        return result

    @staticmethod
    def is_matrix(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and min(p.shape) > 16 and name.endswith(".weight")

    # ---- the container

    def pack(self, trained: Trained, clock: Clock) -> None:
        quantized = self.quantize(trained)
        record: dict[str, dict[str, Tensor] | float | Tensor] = {
            "codes": {name: q.codes.cpu() for name, q in quantized.items()},
            "scales": {name: q.scale.cpu() for name, q in quantized.items()},
            "plain": {
                name: p.detach().half().cpu()
                for name, p in trained.model.named_parameters()
                if name not in quantized
            },
            "mix_weight": trained.mix_weight,
            "log_prior": trained.log_prior.half().cpu(),
        }
        if self.ranks.chief:
            buffer = io.BytesIO()
            torch.save(record, buffer)
            packed = lzma.compress(buffer.getvalue(), preset=self.cfg.lzma_preset)
            self.path.write_bytes(packed)
            self.report.say(f"packed {buffer.tell()} bytes into {len(packed)}")
        self.ranks.barrier()
        self.report.code_bytes = len(Path(__file__).read_bytes())
        self.report.model_bytes = self.path.stat().st_size
        self.report.build_seconds = clock.agreed()
        self.report.say(f"artifact written at {self.report.build_seconds:.1f}s of {clock.cap:.0f}s")
        if self.report.build_seconds > clock.cap:
            raise RuntimeError("training and packing took longer than the cap")
        self.report.sizes(self.cfg.limit_bytes)

    def unpack(self) -> Unpacked:
        """The model as the evaluation sees it: from the bytes of the artifact and nothing else."""
        record = torch.load(io.BytesIO(lzma.decompress(self.path.read_bytes())), map_location="cpu")
        model = TwoHeaded(self.settings.model)
        state = {name: tensor.float() for name, tensor in record["plain"].items()}
        for name, codes in record["codes"].items():
            state[name] = Quantized(codes, record["scales"][name]).restore()
        model.load_state_dict(state)
        model.to(self.ranks.device).eval()
        for p in model.parameters():
            p.requires_grad_(False)
        return Unpacked(model, float(record["mix_weight"]), record["log_prior"].float().to(self.ranks.device))


@dataclass
class Unpacked:
    model: TwoHeaded
    mix_weight: float
    log_prior: Tensor


# =====================================================================================================
# 9. Evaluation
# =====================================================================================================
#
# Position i of the stream is the prediction of tokens[i + 1] from tokens[0..i]. The positions are cut into
# segments. Per segment: (1) all of its positions are scored, with the adapters and the unigram counts left by
# the segments before it; (2) its tokens are counted; (3) the adapters get one epoch on it.


@dataclass(frozen=True)
class Segment:
    index: int
    begin: int
    end: int


@dataclass(frozen=True)
class Window:
    start: int  # first position in the context
    first: int  # first position that is scored
    end: int  # one past the last position


def plan_segments(positions: int, size: int) -> list[Segment]:
    return [
        Segment(index, begin, min(begin + size, positions))
        for index, begin in enumerate(range(0, positions, size))
    ]


def plan_windows(segment: Segment, seq_len: int, stride: int) -> list[Window]:
    """Windows whose scored parts tile the segment; the context may reach back before the segment."""
    windows = []
    for first in range(segment.begin, segment.end, stride):
        end = min(first + stride, segment.end)
        windows.append(Window(max(0, end - seq_len), first, end))
    return windows


class UnigramBias:
    """What the frequencies seen so far say against those of the training text, as an addition to the logits."""

    def __init__(self, log_prior: Tensor, cfg: EvalSettings):
        self.log_prior = log_prior
        self.alpha = cfg.bias_alpha
        self.strength = cfg.bias_strength
        self.counts = torch.zeros_like(log_prior, dtype=torch.float64)

    def vector(self) -> Tensor:
        prior = self.log_prior.double().exp()
        posterior = (self.counts + self.alpha * prior) / (self.counts.sum() + self.alpha)
        return (self.strength * (posterior.log() - self.log_prior.double())).float()

    def learn(self, tokens: Tensor) -> None:
        self.counts += torch.bincount(tokens, minlength=self.counts.numel()).double()


class AdapterSet:
    """The adapters of a model, their AdamW and the averaging of their gradients."""

    def __init__(self, model: TwoHeaded, cfg: EvalSettings, ranks: Ranks):
        self.cfg = cfg
        self.ranks = ranks
        self.params: list[nn.Parameter] = []
        for block in model.blocks:
            for layer in (block.attn.q, block.attn.v, block.attn.out):
                layer.adapter = Adapter(
                    layer.in_features, layer.out_features, cfg.adapt_rank, cfg.adapt_alpha
                ).to(ranks.device)
                self.params += list(layer.adapter.parameters())
        for p in self.params:
            ranks.share(p.data, 0)
        self.optimizer = torch.optim.AdamW(
            self.params, lr=cfg.adapt_lr, betas=(0.9, 0.99), weight_decay=cfg.adapt_wd
        )

    def set_progress(self, done: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.adapt_lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    def step(self) -> None:
        flat = torch.cat([p.grad.reshape(-1) for p in self.params])
        self.ranks.mean(flat)
        offset = 0
        for p in self.params:
            p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
        torch.nn.utils.clip_grad_norm_(self.params, self.cfg.adapt_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Evaluator:
    def __init__(
        self,
        settings: Settings,
        ranks: Ranks,
        report: Report,
        unpacked: Unpacked,
        val: Tensor,
        table: ByteTable,
        clock: Clock,
    ):
        self.cfg = settings.eval
        self.ranks = ranks
        self.report = report
        self.clock = clock
        self.model = unpacked.model
        self.mix_weight = unpacked.mix_weight
        self.table = table
        self.tokens = val.to(ranks.device, torch.int32)
        self.positions = self.tokens.numel() - 1
        self.bias = UnigramBias(unpacked.log_prior, self.cfg)
        self.adapters = AdapterSet(self.model, self.cfg, ranks)
        self.heads = torch.compile(self.model, dynamic=False)
        self.sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)

    def run(self) -> Score:
        segments = plan_segments(self.positions, self.cfg.segment_tokens)
        adapting = self.cfg.adapt
        for segment in segments:
            self.score_segment(segment)
            self.bias.learn(self.slice(segment.begin + 1, segment.end + 1))
            if adapting and segment is not segments[-1]:
                if self.clock.agreed() > self.cfg.adapt_until:
                    adapting = False
                    self.report.say(f"adaptation ends after segment {segment.index}: time")
                else:
                    self.adapt_segment(segment, len(segments))
            if segment.index % 10 == 0 or segment is segments[-1]:
                self.progress(segment, len(segments))
        return self.finish()

    def slice(self, begin: int, end: int) -> Tensor:
        return self.tokens[begin:end].to(torch.int64)

    # ---- scoring

    @torch.no_grad()
    def score_segment(self, segment: Segment) -> None:
        """Adds the segment's losses to the sums; every rank takes every world-th batch of windows."""
        windows = plan_windows(segment, self.cfg.seq_len, self.cfg.stride)
        bias = self.bias.vector()
        size = self.cfg.batch
        for start in range(self.ranks.rank * size, len(windows), self.ranks.world * size):
            self.score_windows(windows[start : start + size], bias)

    def score_windows(self, windows: list[Window], bias: Tensor) -> None:
        length, stride = self.cfg.seq_len, self.cfg.stride
        ids = torch.zeros(self.cfg.batch, length, dtype=torch.int64, device=self.ranks.device)
        places = torch.zeros(self.cfg.batch, stride, dtype=torch.int64, device=self.ranks.device)
        targets = torch.zeros_like(places)
        before = torch.zeros_like(places)
        real = torch.zeros_like(places, dtype=torch.bool)
        for row, window in enumerate(windows):
            count = window.end - window.first
            ids[row, : window.end - window.start] = self.slice(window.start, window.end)
            places[row, :count] = torch.arange(
                window.first - window.start, window.end - window.start, device=self.ranks.device
            )
            targets[row, :count] = self.slice(window.first + 1, window.end + 1)
            before[row, :count] = self.slice(window.first, window.end)
            real[row, :count] = True
        main, side = self.heads(ids)
        chosen = places.unsqueeze(-1).expand(-1, -1, main.size(-1))
        log_probs = mixed_log_probs(main.gather(1, chosen), side.gather(1, chosen), self.mix_weight, bias)
        nll = target_nll(log_probs, targets)
        self.sums[0] += nll[real].double().sum()
        self.sums[1] += real.sum()
        self.sums[2] += self.table.count(before, targets)[real].sum()

    # ---- learning

    def adapt_segment(self, segment: Segment, segments: int) -> None:
        """One epoch of AdamW over a segment that has been scored, in rows of the context length."""
        length = self.cfg.seq_len
        rows = (segment.end - segment.begin) // length
        per_step = self.ranks.world * self.cfg.adapt_seqs
        bias = self.bias.vector()
        self.adapters.set_progress(segment.index / segments)
        for _ in range(self.cfg.adapt_epochs):
            for step in range(rows // per_step):
                row = step * per_step + self.ranks.rank * self.cfg.adapt_seqs
                begin = segment.begin + row * length
                chunk = self.slice(begin, begin + self.cfg.adapt_seqs * length + 1)
                ids, targets = chunk[:-1].view(-1, length), chunk[1:].view(-1, length)
                main, side = self.heads(ids)
                nll = target_nll(mixed_log_probs(main, side, self.mix_weight, bias), targets)
                nll.mean().backward()
                self.adapters.step()
        self.report.segments_adapted += 1

    # ---- sums

    def gathered(self) -> Score:
        sums = self.ranks.total(self.sums.clone()).tolist()
        return Score(nats=sums[0], tokens=int(sums[1]), bytes=int(sums[2]))

    def progress(self, segment: Segment, segments: int) -> None:
        score = self.gathered()
        self.report.say(
            f"segment:{segment.index + 1}/{segments} loss:{score.loss:.4f} bpb:{score.bpb:.4f} "
            f"time:{self.clock.seconds():.1f}s"
        )

    def finish(self) -> Score:
        score = self.gathered()
        self.report.eval_seconds = self.clock.agreed()
        self.report.say(
            f"evaluation: {score.tokens} of {self.positions} positions in {self.report.eval_seconds:.1f}s "
            f"of {self.clock.cap:.0f}s"
        )
        return score


# =====================================================================================================
# 10. Main
# =====================================================================================================


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def set_backend() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)


def main() -> None:
    ranks = Ranks.start()
    settings = Settings()
    settings.check(ranks.world)
    logger = make_logger(settings, ranks)
    report = Report(logger)
    seed_everything(settings.train.seed)
    set_backend()

    data = TrainData(settings, ranks)
    val = load_validation(settings.paths.val_pattern)
    table = ByteTable.build(settings.paths.tokenizer, settings.model.vocab, ranks.device)
    report.say(f"train shards: {len(data.body)} + {len(data.tail)} held out, validation tokens: {val.numel()}")

    trainer = Trainer(settings, ranks, report, data, val)
    report.opening(settings, ranks, trainer.model)
    trained, train_clock = trainer.run()
    packer = Packer(settings, ranks, report)
    packer.pack(trained, train_clock)
    del trainer, trained, data
    torch.cuda.empty_cache()

    eval_clock = Clock(ranks, settings.eval.cap_seconds)
    unpacked = packer.unpack()
    evaluator = Evaluator(settings, ranks, report, unpacked, val, table, eval_clock)
    report.score = evaluator.run()
    if report.eval_seconds > eval_clock.cap:
        report.say("WARNING: evaluation took longer than its cap, the figure below is void")
    report.closing()
    ranks.stop()


if __name__ == "__main__":
    main()
