"""Lunga: SP8192, 11 looped layers, Muon, GPTQ int6 + int8 embeddings, brotli.

The score is made by one left-to-right pass over the validation stream in chunks of 32,768 tokens. A chunk is scored
with sliding windows first; only then the model takes a few SGD epochs on it and its n-grams enter the hint tables.
The hint tables (orders 2-16) propose one token for a position from the tokens before it; the logit of that token is
raised by an amount that depends on how sure the context is, and the softmax runs over the whole vocabulary.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import math
import os
import random
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Optional

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------------------------
# settings
# --------------------------------------------------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, int(default))))


def env_str(name: str, default: str) -> str:
    return os.environ.get(name, default)


@dataclass
class DataSettings:
    folder: str = field(default_factory=lambda: env_str("DATA_PATH", "./data/datasets/fineweb10B_sp8192"))
    tokenizer: str = field(
        default_factory=lambda: env_str("TOKENIZER_PATH", "./data/tokenizers/fineweb_8192_bpe.model")
    )
    train_seq_len: int = field(default_factory=lambda: env_int("TRAIN_SEQ_LEN", 2048))
    batch_tokens: int = field(default_factory=lambda: env_int("TRAIN_BATCH_TOKENS", 786_432))
    bos_id: int = field(default_factory=lambda: env_int("BOS_ID", 1))

    @property
    def train_pattern(self) -> str:
        return os.path.join(self.folder, "fineweb_train_*.bin")

    @property
    def val_pattern(self) -> str:
        return os.path.join(self.folder, "fineweb_val_*.bin")


@dataclass
class ModelSettings:
    vocab_size: int = field(default_factory=lambda: env_int("VOCAB_SIZE", 8192))
    num_layers: int = field(default_factory=lambda: env_int("NUM_LAYERS", 11))
    dim: int = field(default_factory=lambda: env_int("MODEL_DIM", 512))
    heads: int = field(default_factory=lambda: env_int("NUM_HEADS", 8))
    kv_heads: int = field(default_factory=lambda: env_int("NUM_KV_HEADS", 4))
    mlp_mult: float = field(default_factory=lambda: env_float("MLP_MULT", 4.0))
    rope_base: float = field(default_factory=lambda: env_float("ROPE_BASE", 10000.0))
    rope_dims: int = field(default_factory=lambda: env_int("ROPE_DIMS", 16))
    qk_gain: float = field(default_factory=lambda: env_float("QK_GAIN_INIT", 5.0))
    softcap: float = field(default_factory=lambda: env_float("LOGIT_SOFTCAP", 30.0))
    embed_std: float = field(default_factory=lambda: env_float("TIED_EMBED_INIT_STD", 0.005))
    xsa_last: int = field(default_factory=lambda: env_int("XSA_LAST_N", 11))
    loop_first: int = field(default_factory=lambda: env_int("LOOP_FIRST", 3))
    loop_last: int = field(default_factory=lambda: env_int("LOOP_LAST", 5))
    loop_times: int = field(default_factory=lambda: env_int("LOOP_TIMES", 2))


@dataclass
class TrainSettings:
    steps: int = field(default_factory=lambda: env_int("ITERATIONS", 20_000))
    cap_seconds: float = field(default_factory=lambda: env_float("MAX_WALLCLOCK_SECONDS", 600.0))
    reserve_seconds: float = field(default_factory=lambda: env_float("GPTQ_RESERVE_SECONDS", 24.0))
    warmup_steps: int = field(default_factory=lambda: env_int("WARMUP_STEPS", 20))
    warmdown_frac: float = field(default_factory=lambda: env_float("WARMDOWN_FRAC", 0.72))
    min_lr_frac: float = field(default_factory=lambda: env_float("MIN_LR_FRAC", 0.0))
    loop_on_frac: float = field(default_factory=lambda: env_float("ENABLE_LOOPING_AT", 0.35))
    embed_lr: float = field(default_factory=lambda: env_float("TIED_EMBED_LR", 0.03))
    matrix_lr: float = field(default_factory=lambda: env_float("MATRIX_LR", 0.022))
    scalar_lr: float = field(default_factory=lambda: env_float("SCALAR_LR", 0.02))
    muon_momentum: float = field(default_factory=lambda: env_float("MUON_MOMENTUM", 0.99))
    muon_momentum_start: float = field(default_factory=lambda: env_float("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_steps: int = field(default_factory=lambda: env_int("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_ns_steps: int = field(default_factory=lambda: env_int("MUON_BACKEND_STEPS", 5))
    muon_wd: float = field(default_factory=lambda: env_float("MUON_WD", 0.095))
    embed_wd: float = field(default_factory=lambda: env_float("EMBED_WD", 0.085))
    scalar_wd: float = field(default_factory=lambda: env_float("ADAM_WD", 0.02))
    beta1: float = field(default_factory=lambda: env_float("BETA1", 0.9))
    beta2: float = field(default_factory=lambda: env_float("BETA2", 0.95))
    adam_eps: float = field(default_factory=lambda: env_float("ADAM_EPS", 1e-8))
    grad_clip: float = field(default_factory=lambda: env_float("GRAD_CLIP_NORM", 0.3))
    ema_decay: float = field(default_factory=lambda: env_float("EMA_DECAY", 0.9965))
    val_every: int = field(default_factory=lambda: env_int("VAL_LOSS_EVERY", 4000))
    log_every: int = field(default_factory=lambda: env_int("TRAIN_LOG_EVERY", 500))


@dataclass
class QuantSettings:
    matrix_bits: int = field(default_factory=lambda: env_int("MATRIX_BITS", 6))
    embed_bits: int = field(default_factory=lambda: env_int("EMBED_BITS", 8))
    matrix_sigmas: float = field(default_factory=lambda: env_float("MATRIX_CLIP_SIGMAS", 12.85))
    embed_sigmas: float = field(default_factory=lambda: env_float("EMBED_CLIP_SIGMAS", 20.0))
    calib_batches: int = field(default_factory=lambda: env_int("GPTQ_CALIBRATION_BATCHES", 64))
    calib_rows: int = field(default_factory=lambda: env_int("GPTQ_CALIBRATION_ROWS", 8))
    block: int = field(default_factory=lambda: env_int("GPTQ_BLOCK", 128))
    damp: float = field(default_factory=lambda: env_float("GPTQ_DAMP", 0.01))
    byte_limit: int = 16_000_000
    artifact: str = field(default_factory=lambda: env_str("ARTIFACT", "final_model.int6.ptz"))


@dataclass
class EvalSettings:
    seq_len: int = field(default_factory=lambda: env_int("EVAL_SEQ_LEN", 2048))
    stride: int = field(default_factory=lambda: env_int("EVAL_STRIDE", 64))
    batch_rows: int = field(default_factory=lambda: env_int("EVAL_BATCH_ROWS", 32))
    chunk_tokens: int = field(default_factory=lambda: env_int("TTT_CHUNK_TOKENS", 32_768))
    ttt: bool = field(default_factory=lambda: env_flag("TTT_ENABLED", True))
    ttt_lr: float = field(default_factory=lambda: env_float("TTT_LR", 0.005))
    ttt_epochs: int = field(default_factory=lambda: env_int("TTT_EPOCHS", 3))
    ttt_momentum: float = field(default_factory=lambda: env_float("TTT_MOMENTUM", 0.9))
    ttt_clip: float = field(default_factory=lambda: env_float("TTT_GRAD_CLIP", 1.0))
    ttt_freeze: int = field(default_factory=lambda: env_int("TTT_FREEZE_BLOCKS", 0))
    ttt_rows: int = field(default_factory=lambda: env_int("TTT_BATCH_ROWS", 16))
    hints: bool = field(default_factory=lambda: env_flag("NGRAM_HINTS", True))
    hint_low: int = field(default_factory=lambda: env_int("NGRAM_ORDER_MIN", 2))
    hint_high: int = field(default_factory=lambda: env_int("NGRAM_ORDER_MAX", 16))
    hint_bits: int = field(default_factory=lambda: env_int("NGRAM_TABLE_BITS", 22))
    hint_floor: float = field(default_factory=lambda: env_float("NGRAM_CONF_FLOOR", 0.45))
    hint_gain: float = field(default_factory=lambda: env_float("NGRAM_GAIN", 2.6))
    hint_cap: float = field(default_factory=lambda: env_float("NGRAM_BOOST_CAP", 2.2))
    budget_seconds: float = field(default_factory=lambda: env_float("EVAL_BUDGET_SECONDS", 570.0))


@dataclass
class Settings:
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    quant: QuantSettings = field(default_factory=QuantSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    seed: int = field(default_factory=lambda: env_int("SEED", 1337))
    run_id: str = field(default_factory=lambda: env_str("RUN_ID", str(uuid.uuid4())))


# --------------------------------------------------------------------------------------------------------------------
# ranks and the log
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Team:
    """This process among the ranks."""

    rank: int
    world: int
    local: int
    device: torch.device

    @classmethod
    def join(cls) -> "Team":
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        rank, world, local = env_int("RANK", 0), env_int("WORLD_SIZE", 1), env_int("LOCAL_RANK", 0)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend="nccl", device_id=device)
            dist.barrier()
        return cls(rank, world, local, device)

    @property
    def chief(self) -> bool:
        return self.rank == 0

    @property
    def many(self) -> bool:
        return dist.is_available() and dist.is_initialized()

    def total(self, tensor: Tensor) -> Tensor:
        if self.many:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def largest(self, number: float) -> float:
        box = torch.tensor([number], dtype=torch.float64, device=self.device)
        if self.many:
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return float(box.item())

    def wait(self) -> None:
        torch.cuda.synchronize()
        if self.many:
            dist.barrier()

    def leave(self) -> None:
        if self.many:
            dist.destroy_process_group()


class Journal:
    """Prints on the chief and keeps a copy under logs/."""

    def __init__(self, team: Team, run_id: str):
        self.team = team
        self.path: Optional[Path] = None
        if team.chief:
            Path("logs").mkdir(exist_ok=True)
            self.path = Path("logs") / f"{run_id}.txt"

    def say(self, text: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            print(text, file=file)


class Stopwatch:
    """Wall clock that can be halted (validation inside the training is not training)."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: Optional[float] = None

    def go(self) -> "Stopwatch":
        torch.cuda.synchronize()
        self.since = time.perf_counter()
        return self

    def halt(self) -> None:
        torch.cuda.synchronize()
        if self.since is not None:
            self.spent += time.perf_counter() - self.since
            self.since = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.spent + running


# --------------------------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def shard_length(path: Path) -> int:
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {path}")
    return int(header[2])


def open_shard(path: Path) -> np.ndarray:
    length = shard_length(path)
    offset = HEADER_INTS * np.dtype("<i4").itemsize
    if path.stat().st_size != offset + 2 * length:
        raise ValueError(f"size of {path} does not fit its header")
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(length,))


def shard_paths(pattern: str) -> list[Path]:
    found = [Path(name) for name in sorted(glob.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"no shards match {pattern}")
    return found


class SequenceFeed:
    """Random non-overlapping sequences of the train shards; every rank draws from its own share of the shards."""

    def __init__(self, pattern: str, team: Team, seq_len: int, seed: int):
        self.team = team
        self.seq_len = seq_len
        paths = shard_paths(pattern)
        mine = paths[team.rank :: team.world] or paths
        self.shards = [open_shard(path) for path in mine]
        self.rng = np.random.default_rng([seed, team.rank])
        self.pending: list[tuple[int, int]] = []

    def refill(self) -> None:
        order = []
        for number, shard in enumerate(self.shards):
            phase = int(self.rng.integers(0, self.seq_len))
            count = (len(shard) - 1 - phase) // self.seq_len
            order.extend((number, phase + k * self.seq_len) for k in range(count))
        self.rng.shuffle(order)
        self.pending = order

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        picked = []
        for _ in range(count):
            if not self.pending:
                self.refill()
            number, at = self.pending.pop()
            picked.append(np.asarray(self.shards[number][at : at + self.seq_len + 1], dtype=np.int64))
        block = torch.from_numpy(np.stack(picked))
        block = block.pin_memory().to(self.team.device, non_blocking=True)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


class ScoredStream:
    """The whole validation split as one array of tokens, with what is needed to count bytes."""

    def __init__(self, data: DataSettings, model: ModelSettings):
        pieces = [np.asarray(open_shard(path), dtype=np.uint16) for path in shard_paths(data.val_pattern)]
        self.tokens: np.ndarray = np.ascontiguousarray(np.concatenate(pieces))
        self.bos_id = data.bos_id
        processor = spm.SentencePieceProcessor(model_file=data.tokenizer)
        if processor.vocab_size() != model.vocab_size:
            raise ValueError(f"tokenizer has {processor.vocab_size()} pieces, the model {model.vocab_size}")
        self.meter = ByteMeter.from_processor(processor, model.vocab_size)
        starts = np.where(self.tokens == self.bos_id, np.arange(len(self.tokens)), 0)
        #: how many tokens back the current document begins, this token included
        self.depth: np.ndarray = (np.arange(len(self.tokens)) - np.maximum.accumulate(starts) + 1).astype(np.int32)

    @property
    def targets(self) -> int:
        """Position i predicts token i + 1."""
        return len(self.tokens) - 1

    def slice(self, begin: int, end: int) -> Tensor:
        return torch.from_numpy(self.tokens[begin:end].astype(np.int64))


@dataclass
class ByteMeter:
    """UTF-8 bytes of a token, given the one before it."""

    plain: np.ndarray  # bytes of the piece without its leading mark
    spaced: np.ndarray  # the piece begins with the mark of a space
    silent: np.ndarray  # control, unknown and unused pieces: no text, and no space after them

    @classmethod
    def from_processor(cls, processor: spm.SentencePieceProcessor, vocab_size: int) -> "ByteMeter":
        plain = np.zeros(vocab_size, dtype=np.int32)
        spaced = np.zeros(vocab_size, dtype=bool)
        silent = np.ones(vocab_size, dtype=bool)
        for token in range(processor.vocab_size()):
            if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
                continue
            silent[token] = False
            if processor.is_byte(token):
                plain[token] = 1
                continue
            piece = processor.id_to_piece(token)
            if piece.startswith("\u2581"):
                spaced[token] = True
                piece = piece[1:]
            plain[token] = len(piece.encode("utf-8"))
        return cls(plain, spaced, silent)

    def count(self, before: np.ndarray, tokens: np.ndarray) -> int:
        size = self.plain[tokens].astype(np.int64)
        size += self.spaced[tokens] & ~self.silent[before]
        return int(size.sum())


# --------------------------------------------------------------------------------------------------------------------
# model
# --------------------------------------------------------------------------------------------------------------------

SCALAR_MARKS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "skip_gate")


class CastLinear(nn.Linear):
    """Weights in fp32, product in the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float):
        super().__init__()
        inverse = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inverse", inverse, persistent=False)
        self.length = 0
        self.cos: Optional[Tensor] = None
        self.sin: Optional[Tensor] = None

    def forward(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.cos is None or self.sin is None or self.length < length or self.cos.device != device:
            angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), self.inverse.to(device))
            self.cos, self.sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]
            self.length = length
        return self.cos[:, :length].to(dtype), self.sin[:, :length].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    turned, kept = x[..., :dims], x[..., dims:]
    left, right = turned.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin, kept), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention, q/k normalised, the part along the own value removed where asked."""

    def __init__(self, cfg: ModelSettings, exclusive: bool):
        super().__init__()
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads
        self.head_dim = cfg.dim // cfg.heads
        self.rope_dims = cfg.rope_dims
        self.exclusive = exclusive
        kv_dim = self.kv_heads * self.head_dim
        self.to_q = CastLinear(cfg.dim, cfg.dim, bias=False)
        self.to_k = CastLinear(cfg.dim, kv_dim, bias=False)
        self.to_v = CastLinear(cfg.dim, kv_dim, bias=False)
        self.out = CastLinear(cfg.dim, cfg.dim, bias=False)
        self.out.zero_start = True
        self.q_gain = nn.Parameter(torch.full((cfg.heads,), cfg.qk_gain, dtype=torch.float32))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base)

    def without_self(self, y: Tensor, v: Tensor) -> Tensor:
        rows, length, heads, size = y.shape
        grouped = y.reshape(rows, length, self.kv_heads, heads // self.kv_heads, size)
        unit = F.normalize(v, dim=-1).unsqueeze(-2)
        return (grouped - (grouped * unit).sum(dim=-1, keepdim=True) * unit).reshape(rows, length, heads, size)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, dim = x.shape
        q = self.to_q(x).view(rows, length, self.heads, self.head_dim)
        k = self.to_k(x).view(rows, length, self.kv_heads, self.head_dim)
        v = self.to_v(x).view(rows, length, self.kv_heads, self.head_dim)
        q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(length, x.device, q.dtype)
        q, k = rotate(q, cos, sin, self.rope_dims), rotate(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        ).transpose(1, 2)
        if self.exclusive:
            y = self.without_self(y, v)
        return self.out(y.reshape(rows, length, dim))


class FeedForward(nn.Module):
    def __init__(self, cfg: ModelSettings):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.dim)
        self.up = CastLinear(cfg.dim, hidden, bias=False)
        self.down = CastLinear(hidden, cfg.dim, bias=False)
        self.down.zero_start = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), negative_slope=0.5).square())


class Layer(nn.Module):
    def __init__(self, cfg: ModelSettings, index: int):
        super().__init__()
        self.attn = Attention(cfg, exclusive=index >= cfg.num_layers - cfg.xsa_last)
        self.mlp = FeedForward(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim))).float())
        self.depth_factor = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        normed = F.rms_norm(x, (x.size(-1),)) * self.depth_factor
        x = x + self.attn_scale.to(x.dtype) * self.attn(normed)
        normed = F.rms_norm(x, (x.size(-1),)) * self.depth_factor
        return x + self.mlp_scale.to(x.dtype) * self.mlp(normed)


class LoopedGPT(nn.Module):
    """U-shaped stack; layers loop_first..loop_last are run several times once looping is switched on."""

    def __init__(self, cfg: ModelSettings):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Layer(cfg, index) for index in range(cfg.num_layers))
        self.looping = False
        straight = list(range(cfg.num_layers))
        loop = list(range(cfg.loop_first, cfg.loop_last + 1))
        rolled = straight[: cfg.loop_first] + loop * (cfg.loop_times + 1) + straight[cfg.loop_last + 1 :]
        self.routes = {False: self.split(straight), True: self.split(rolled)}
        skips = max(min(len(down), len(up)) for down, up in self.routes.values())
        self.skip_weight = nn.Parameter(torch.ones(skips, cfg.dim, dtype=torch.float32))
        self.skip_gate = nn.Parameter(torch.zeros(skips, cfg.dim, dtype=torch.float32))
        self.reset()

    @staticmethod
    def split(route: list[int]) -> tuple[list[int], list[int]]:
        return route[: len(route) // 2], route[len(route) // 2 :]

    def reset(self) -> None:
        nn.init.normal_(self.embed.weight, mean=0.0, std=self.cfg.embed_std)
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                continue
            if getattr(module, "zero_start", False):
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight, gain=1.0)

    def logits(self, tokens: Tensor) -> Tensor:
        x = F.rms_norm(self.embed(tokens), (self.cfg.dim,))
        x0 = x
        down, up = self.routes[self.looping]
        kept: list[Tensor] = []
        for index in down:
            x = self.layers[index](x, x0)
            kept.append(x)
        for number, index in enumerate(up):
            if kept and number < self.skip_weight.size(0):
                skipped = self.skip_weight[number].to(x.dtype) * kept.pop()
                gate = torch.sigmoid(self.skip_gate[number].to(x.dtype))
                x = torch.lerp(skipped, x, gate)
            x = self.layers[index](x, x0)
        x = F.rms_norm(x, (self.cfg.dim,))
        raw = F.linear(x, self.embed.weight.to(x.dtype))
        return self.cfg.softcap * torch.tanh(raw / self.cfg.softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def keep_small_in_fp32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or any(mark in name for mark in SCALAR_MARKS):
            parameter.data = parameter.data.float()


def fresh_model(cfg: Settings, team: Team) -> LoopedGPT:
    model = LoopedGPT(cfg.model).to(team.device)
    for module in model.modules():
        if isinstance(module, CastLinear):
            module.float()
    keep_small_in_fp32(model)
    return model


# --------------------------------------------------------------------------------------------------------------------
# optimisers
# --------------------------------------------------------------------------------------------------------------------


@torch.compile
def orthogonalise(gradient: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.bfloat16()
    x = x / (x.norm() + 1e-7)
    flipped = x.size(0) > x.size(1)
    if flipped:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flipped else x


class Muon(torch.optim.Optimizer):
    """Momentum, rows normalised, orthogonalised; the matrices are shared out over the ranks."""

    def __init__(self, params: list[nn.Parameter], team: Team, lr: float, momentum: float, ns_steps: int, decay: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, decay=decay))
        self.team = team

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], float]] = None) -> None:
        for group in self.param_groups:
            params: list[nn.Parameter] = group["params"]
            total = sum(p.numel() for p in params)
            updates = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for number, p in enumerate(params):
                if number % self.team.world == self.team.rank and p.grad is not None:
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(p.grad)
                    buffer = state["buffer"]
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    update = p.grad.add(buffer, alpha=group["momentum"])
                    update = update / update.norm(dim=1, keepdim=True).clamp_min(1e-7)
                    update = orthogonalise(update, group["ns_steps"])
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    updates[at : at + p.numel()] = update.flatten()
                at += p.numel()
            self.team.total(updates)
            at = 0
            for p in params:
                if group["decay"] > 0:
                    p.mul_(1.0 - group["lr"] * group["decay"])
                p.add_(updates[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


class OptimiserSet:
    """Muon for the matrices, AdamW for the embedding and the scalars; one schedule for all."""

    def __init__(self, model: LoopedGPT, cfg: TrainSettings, team: Team):
        matrices, scalars = [], []
        for name, p in model.named_parameters():
            if name == "embed.weight":
                continue
            is_scalar = p.ndim < 2 or any(mark in name for mark in SCALAR_MARKS)
            (scalars if is_scalar else matrices).append(p)
        adam = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.muon = Muon(matrices, team, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_ns_steps, cfg.muon_wd)
        embed = torch.optim.AdamW([model.embed.weight], lr=cfg.embed_lr, weight_decay=cfg.embed_wd, **adam)
        scalar = torch.optim.AdamW(scalars, lr=cfg.scalar_lr, weight_decay=cfg.scalar_wd, **adam)
        self.members: list[torch.optim.Optimizer] = [embed, scalar, self.muon]
        self.start_lr = [[group["lr"] for group in member.param_groups] for member in self.members]
        self.cfg = cfg

    def zero(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def step(self, scale: float, number: int) -> None:
        warm = min(number / max(self.cfg.muon_momentum_steps, 1), 1.0)
        momentum = (1 - warm) * self.cfg.muon_momentum_start + warm * self.cfg.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for member, starts in zip(self.members, self.start_lr):
            for group, start in zip(member.param_groups, starts):
                group["lr"] = start * scale
            member.step()

    def snapshot(self) -> list[dict]:
        return [copy.deepcopy(member.state_dict()) for member in self.members]

    def restore(self, states: list[dict]) -> None:
        for member, state in zip(self.members, states):
            member.load_state_dict(state)


class RunningAverage:
    """Exponential average of the weights, in fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            self.shadow[name].lerp_(tensor.detach().float(), 1.0 - self.decay)

    def write_to(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({name: t.to(current[name].dtype) for name, t in self.shadow.items()}, strict=True)


# --------------------------------------------------------------------------------------------------------------------
# training
# --------------------------------------------------------------------------------------------------------------------


class Trainer:
    def __init__(self, cfg: Settings, team: Team, journal: Journal, stream: ScoredStream):
        self.cfg, self.team, self.journal, self.stream = cfg, team, journal, stream
        self.model = fresh_model(cfg, team)
        self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
        self.optimisers = OptimiserSet(self.model, cfg.train, team)
        self.feed = SequenceFeed(cfg.data.train_pattern, team, cfg.data.train_seq_len, cfg.seed)
        self.rows = cfg.data.batch_tokens // (cfg.data.train_seq_len * team.world)
        self.micro = max(1, 8 // team.world)
        self.watch = Stopwatch()
        self.limit = cfg.train.cap_seconds - cfg.train.reserve_seconds

    def gradients(self, feed: SequenceFeed) -> Tensor:
        """One batch, forward and backward; gradients averaged over the ranks."""
        seen = torch.zeros((), device=self.team.device)
        for _ in range(self.micro):
            tokens, targets = feed.rows(max(1, self.rows // self.micro))
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.compiled(tokens, targets)
            (loss / self.micro).backward()
            seen += loss.detach() / self.micro
        if self.team.many:
            for p in self.model.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        return seen

    def warm_up(self) -> None:
        """Compiles both routes with train batches; weights and optimiser states are put back afterwards."""
        weights = {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()}
        states = self.optimisers.snapshot()
        feed = SequenceFeed(self.cfg.data.train_pattern, self.team, self.cfg.data.train_seq_len, self.cfg.seed + 1)
        for looping in (False, True):
            self.model.looping = looping
            for number in range(self.cfg.train.warmup_steps):
                self.gradients(feed)
                self.optimisers.step(1.0, number)
                self.optimisers.zero()
        self.model.looping = False
        self.model.load_state_dict(weights, strict=True)
        self.optimisers.restore(states)
        self.journal.say(f"warm-up: {self.cfg.train.warmup_steps} steps per route, state restored")

    def progress(self, number: int) -> float:
        by_time = self.watch.seconds / self.limit if self.cfg.train.cap_seconds > 0 else 0.0
        return min(1.0, max(by_time, number / self.cfg.train.steps))

    def lr_scale(self, progress: float) -> float:
        if progress < 1.0 - self.cfg.train.warmdown_frac:
            return 1.0
        return max((1.0 - progress) / self.cfg.train.warmdown_frac, self.cfg.train.min_lr_frac)

    def report_validation(self, number: int) -> None:
        self.watch.halt()
        loss, bpb = plain_score(self.model, self.stream, self.cfg, self.team)
        self.journal.say(f"step {number}: validation loss {loss:.4f} bpb {bpb:.4f}")
        self.watch.go()

    def run(self) -> LoopedGPT:
        cfg = self.cfg.train
        if cfg.warmup_steps > 0:
            self.warm_up()
        average = RunningAverage(self.model, cfg.ema_decay)
        self.team.wait()
        self.watch.go()
        number = 0
        while True:
            progress = self.team.largest(self.progress(number))
            if progress >= 1.0:
                break
            if cfg.val_every > 0 and number > 0 and number % cfg.val_every == 0:
                self.report_validation(number)
            if not self.model.looping and progress >= cfg.loop_on_frac:
                self.model.looping = True
                self.journal.say(f"looping on at step {number}, {self.watch.seconds:.1f} s")
            loss = self.gradients(self.feed)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
            self.optimisers.step(self.lr_scale(progress), number)
            self.optimisers.zero()
            average.update(self.model)
            number += 1
            if number <= 5 or number % cfg.log_every == 0:
                pace = self.watch.seconds / number
                self.journal.say(
                    f"step {number}: train loss {loss.item():.4f}, {self.watch.seconds:.1f} s, {1000 * pace:.2f} ms/step"
                )
        self.model.looping = True
        average.write_to(self.model)
        self.journal.say(f"training stopped at step {number} after {self.watch.seconds:.1f} s, EMA weights in place")
        return self.model


# --------------------------------------------------------------------------------------------------------------------
# quantiser
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class PackedTensor:
    """A matrix as whole numbers with one scale a row, or a small tensor in fp16."""

    values: Tensor
    scale: Optional[Tensor] = None

    def unpack(self, dtype: torch.dtype) -> Tensor:
        if self.scale is None:
            return self.values.to(dtype)
        return (self.values.float() * self.scale.float()[:, None]).to(dtype)


class HessianTap:
    """Sums x x^T over the inputs of every linear layer, and of the output head."""

    def __init__(self, model: LoopedGPT):
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def add(self, name: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        product = flat.T @ flat
        if name in self.sums:
            self.sums[name] += product
        else:
            self.sums[name] = product

    def __enter__(self) -> "HessianTap":
        for name, module in self.model.named_modules():
            if isinstance(module, CastLinear):
                hook = lambda _, inputs, out, key=name + ".weight": self.add(key, inputs[0])
                self.handles.append(module.register_forward_hook(hook))
        last = self.model.layers[-1]
        hook = lambda _, inputs, out: self.add("embed.weight", F.rms_norm(out, (out.size(-1),)))
        self.handles.append(last.register_forward_hook(hook))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


class Quantiser:
    def __init__(self, cfg: Settings, team: Team, journal: Journal):
        self.cfg, self.team, self.journal = cfg, team, journal

    def collect(self, model: LoopedGPT, watch: Stopwatch) -> dict[str, Tensor]:
        """Hessians from train shards, inside the reserve that the training left of the cap."""
        quant = self.cfg.quant
        feed = SequenceFeed(self.cfg.data.train_pattern, self.team, self.cfg.data.train_seq_len, self.cfg.seed + 7)
        model.eval()
        with HessianTap(model) as tap, torch.no_grad():
            for _ in range(max(1, quant.calib_batches // self.team.world)):
                if self.team.largest(watch.seconds) > self.cfg.train.cap_seconds - 14.0:
                    break
                tokens, _ = feed.rows(quant.calib_rows)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    model.logits(tokens)
        for name in sorted(tap.sums):
            self.team.total(tap.sums[name])
        self.journal.say(f"calibrated on train shards, {watch.seconds:.1f} s of {self.cfg.train.cap_seconds:.0f} s")
        return tap.sums

    def gptq(self, weight: Tensor, hessian: Tensor, bits: int, sigmas: float) -> PackedTensor:
        """Column by column; the error of a column is spread over the columns that follow."""
        top = 2 ** (bits - 1) - 1
        w = weight.detach().float().clone()
        scale = (sigmas * w.std(dim=1) / top).clamp_min(1e-10).to(torch.float16)
        step = scale.float()
        h = hessian.clone()
        dead = torch.diag(h) == 0
        h[dead, dead] = 1.0
        h.diagonal().add_(self.cfg.quant.damp * torch.diag(h).mean())
        order = torch.argsort(torch.diag(h), descending=True)
        back = torch.argsort(order)
        w, h = w[:, order], h[order][:, order]
        w[:, dead[order]] = 0.0
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        codes = torch.zeros_like(w)
        columns, block = w.size(1), self.cfg.quant.block
        for begin in range(0, columns, block):
            end = min(begin + block, columns)
            part, errors = w[:, begin:end].clone(), torch.zeros_like(w[:, begin:end])
            local = inverse[begin:end, begin:end]
            for j in range(end - begin):
                code = torch.clamp(torch.round(part[:, j] / step), -top, top)
                codes[:, begin + j] = code
                error = (part[:, j] - code * step) / local[j, j]
                part[:, j:] -= error[:, None] * local[j, j:][None, :]
                errors[:, j] = error
            w[:, end:] -= errors @ inverse[begin:end, end:]
        return PackedTensor(codes[:, back].to(torch.int8).cpu(), scale.cpu())

    def quantise(self, model: LoopedGPT, hessians: dict[str, Tensor]) -> dict[str, PackedTensor]:
        quant = self.cfg.quant
        packed: dict[str, PackedTensor] = {}
        for name, tensor in model.state_dict().items():
            if name in hessians:
                is_embed = name == "embed.weight"
                bits = quant.embed_bits if is_embed else quant.matrix_bits
                sigmas = quant.embed_sigmas if is_embed else quant.matrix_sigmas
                packed[name] = self.gptq(tensor, hessians[name], bits, sigmas)
            else:
                packed[name] = PackedTensor(tensor.detach().to(torch.float16).cpu())
        return packed

    @staticmethod
    def serialise(packed: dict[str, PackedTensor]) -> bytes:
        plain = {name: (p.values, p.scale) for name, p in packed.items()}
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        raw = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
        lanes = [raw[k::2] for k in range(2)]
        shuffled = np.concatenate(lanes).tobytes()
        return brotli.compress(shuffled, quality=11, lgwin=24)

    @staticmethod
    def parse(blob: bytes) -> dict[str, PackedTensor]:
        shuffled = np.frombuffer(brotli.decompress(blob), dtype=np.uint8)
        raw = np.empty_like(shuffled)
        half = (len(shuffled) + 1) // 2
        raw[0::2], raw[1::2] = shuffled[:half], shuffled[half:]
        plain = torch.load(io.BytesIO(raw.tobytes()), map_location="cpu", weights_only=True)
        return {name: PackedTensor(values, scale) for name, (values, scale) in plain.items()}

    def write(self, packed: dict[str, PackedTensor]) -> int:
        """Artifact on disk; returns its size. The chief writes, all wait."""
        path = Path(self.cfg.quant.artifact)
        if self.team.chief:
            path.write_bytes(self.serialise(packed))
        self.team.wait()
        artifact_bytes = path.stat().st_size
        code_bytes = len(Path(__file__).read_bytes())
        total_bytes = code_bytes + artifact_bytes
        self.journal.say(f"artifact: {artifact_bytes} bytes")
        self.journal.say(f"code: {code_bytes} bytes")
        self.journal.say(f"total: {total_bytes} bytes of {self.cfg.quant.byte_limit}")
        if total_bytes > self.cfg.quant.byte_limit:
            raise SystemExit(f"submission too large: {total_bytes} bytes")
        return total_bytes

    def load(self) -> LoopedGPT:
        """A model as it is read back from the artifact."""
        packed = self.parse(Path(self.cfg.quant.artifact).read_bytes())
        model = fresh_model(self.cfg, self.team)
        current = model.state_dict()
        model.load_state_dict({name: p.unpack(current[name].dtype) for name, p in packed.items()}, strict=True)
        model.looping = True
        return model


# --------------------------------------------------------------------------------------------------------------------
# hints: hashed context tables
# --------------------------------------------------------------------------------------------------------------------

HASH_PRIMES = np.array(
    [
        36_313,
        27_191,
        51_647,
        81_929,
        131_071,
        175_447,
        209_591,
        262_147,
        299_993,
        350_377,
        393_241,
        444_443,
        499_979,
        550_007,
        611_953,
        655_373,
    ],
    dtype=np.uint64,
)


@dataclass
class Hints:
    """For each position of a span: the token proposed (-1: none) and how sure its context is."""

    token: np.ndarray
    confidence: np.ndarray

    @classmethod
    def nothing(cls, count: int) -> "Hints":
        return cls(np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.float32))


class ContextTable:
    """One order: hashed context -> the token that followed most often, how often, and how often the context was met."""

    def __init__(self, order: int, bits: int):
        self.order = order
        self.size = 1 << bits
        self.token = np.full(self.size, -1, dtype=np.int32)
        self.hits = np.zeros(self.size, dtype=np.int32)
        self.total = np.zeros(self.size, dtype=np.int32)
        self.check = np.zeros(self.size, dtype=np.uint16)

    def keys(self, stream: ScoredStream, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bucket, check value and validity of the order - 1 tokens that end at each position."""
        context = self.order - 1
        valid = (positions >= context - 1) & (stream.depth[positions] >= context)
        mixed = np.zeros(len(positions), dtype=np.uint64)
        for back in range(context):
            at = np.maximum(positions - back, 0)
            mixed ^= (stream.tokens[at].astype(np.uint64) + np.uint64(1)) * HASH_PRIMES[back]
            mixed = (mixed << np.uint64(7)) ^ (mixed >> np.uint64(9)) ^ mixed
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        bucket = ((mixed >> np.uint64(20)) & np.uint64(self.size - 1)).astype(np.int64)
        check = (mixed >> np.uint64(48)).astype(np.uint16)
        return bucket, check, valid

    def look(self, stream: ScoredStream, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bucket, check, valid = self.keys(stream, positions)
        known = valid & (self.token[bucket] >= 0) & (self.check[bucket] == check)
        share = self.hits[bucket] / np.maximum(self.total[bucket] + 1.0, 1.0)
        token = np.where(known, self.token[bucket], -1).astype(np.int64)
        return token, np.where(known, share, 0.0).astype(np.float32)

    def learn(self, stream: ScoredStream, positions: np.ndarray) -> None:
        bucket, check, valid = self.keys(stream, positions)
        follower = stream.tokens[positions + 1].astype(np.int64)
        bucket, check, follower = bucket[valid], check[valid], follower[valid]
        if not len(bucket):
            return
        pair, first, count = np.unique((bucket << 16) | follower, return_index=True, return_counts=True)
        where, token = pair >> 16, (pair & 0xFFFF).astype(np.int32)
        np.add.at(self.total, where, count.astype(np.int32))
        rank = np.lexsort((token, count, where))
        top = rank[np.append(where[rank][1:] != where[rank][:-1], True)]
        where, token, count, first = where[top], token[top], count[top].astype(np.int32), first[top]
        same = self.token[where] == token
        self.hits[where[same]] += count[same]
        better = ~same & (count > self.hits[where])
        self.token[where[better]] = token[better]
        self.hits[where[better]] = count[better]
        self.check[where[better]] = check[first[better]]


class HintBook:
    """All orders. The longest context that is known gives the hint; every rank keeps the same book."""

    def __init__(self, cfg: EvalSettings, stream: ScoredStream):
        self.cfg, self.stream = cfg, stream
        self.tables = [ContextTable(order, cfg.hint_bits) for order in range(cfg.hint_low, cfg.hint_high + 1)]
        self.filled_to = 0

    def propose(self, begin: int, end: int) -> Hints:
        """Hints for the positions begin..end-1, from tables that hold nothing at or after begin."""
        if self.filled_to > begin:
            raise RuntimeError(f"hint tables are filled to {self.filled_to}, asked for {begin}")
        positions = np.arange(begin, end)
        hints = Hints.nothing(len(positions))
        for table in reversed(self.tables):
            open_ = hints.token < 0
            if not open_.any():
                break
            token, confidence = table.look(self.stream, positions[open_])
            sure = confidence >= self.cfg.hint_floor
            slots = np.flatnonzero(open_)[sure]
            hints.token[slots] = token[sure]
            hints.confidence[slots] = confidence[sure]
        return hints

    def absorb(self, begin: int, end: int) -> None:
        """Takes in the positions begin..end-1, which have been scored."""
        positions = np.arange(begin, end)
        for table in self.tables:
            table.learn(self.stream, positions)
        self.filled_to = end

    def boosts(self, hints: Hints) -> np.ndarray:
        """What is added to the hinted token's logit, out of the confidence alone."""
        rise = self.cfg.hint_gain * hints.confidence
        return np.where(hints.token >= 0, np.minimum(rise, self.cfg.hint_cap), 0.0).astype(np.float32)


def tilted_nll(logits: Tensor, targets: Tensor, hint: Tensor, boost: Tensor) -> Tensor:
    """-ln p of the targets after the hinted tokens' logits were raised; softmax over the whole vocabulary."""
    raised = logits.float().scatter_add(-1, hint.clamp_min(0)[:, None], boost[:, None])
    return F.cross_entropy(raised, targets, reduction="none")


# --------------------------------------------------------------------------------------------------------------------
# evaluation
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """Tokens start..end-1 are read; the last `fresh` positions of them are scored."""

    start: int
    end: int
    fresh: int

    @property
    def length(self) -> int:
        return self.end - self.start


class Tally:
    """Sums of this rank: nats, scored tokens, their bytes."""

    def __init__(self, stream: ScoredStream, team: Team):
        self.stream, self.team = stream, team
        self.nats = torch.zeros((), dtype=torch.float64, device=team.device)
        self.tokens = 0
        self.bytes = 0

    def add(self, nll: Tensor, begin: int, end: int) -> None:
        """nll of the positions begin..end-1, in order."""
        self.nats += nll.double().sum()
        self.tokens += end - begin
        self.bytes += self.stream.meter.count(self.stream.tokens[begin:end], self.stream.tokens[begin + 1 : end + 1])

    def result(self) -> tuple[float, float, int]:
        counts = torch.tensor([self.tokens, self.bytes], dtype=torch.float64, device=self.team.device)
        sums = self.team.total(torch.cat((self.nats.view(1), counts))).cpu()
        nats, tokens, size = (float(v) for v in sums)
        return nats / tokens, nats / math.log(2.0) / size, int(tokens)


def plain_score(model: LoopedGPT, stream: ScoredStream, cfg: Settings, team: Team) -> tuple[float, float]:
    """Non-overlapping sequences, nothing adapted: a diagnosis, quick."""
    seq_len, rows = cfg.eval.seq_len, cfg.eval.batch_rows
    tally = Tally(stream, team)
    starts = list(range(0, stream.targets - seq_len + 1, seq_len))[team.rank :: team.world]
    model.eval()
    with torch.no_grad():
        for at in range(0, len(starts), rows):
            group = starts[at : at + rows]
            block = torch.stack([stream.slice(s, s + seq_len + 1) for s in group]).to(team.device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = model.logits(block[:, :-1])
            nll = F.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten(), reduction="none")
            for row, s in zip(nll.view(len(group), seq_len), group):
                tally.add(row, s, s + seq_len)
    loss, bpb, _ = tally.result()
    model.train()
    return loss, bpb


class ChunkLearner:
    """SGD on a chunk that has been scored; learning rate on a cosine over the chunks."""

    def __init__(self, model: LoopedGPT, cfg: EvalSettings, stream: ScoredStream, team: Team):
        self.model, self.cfg, self.stream, self.team = model, cfg, stream, team
        frozen = {id(p) for layer in model.layers[: cfg.ttt_freeze] for p in layer.parameters()}
        self.params = [p for p in model.parameters() if id(p) not in frozen]
        for p in model.parameters():
            p.requires_grad_(id(p) not in frozen)
        self.sgd = torch.optim.SGD(self.params, lr=cfg.ttt_lr, momentum=cfg.ttt_momentum)

    def rate(self, chunk: int, chunks: int) -> float:
        return self.cfg.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * chunk / max(chunks - 1, 1)))

    def step_on(self, starts: list[int]) -> None:
        """One step on the sequences of a group; each rank takes its share, gradients are summed."""
        seq_len = self.cfg.seq_len
        self.sgd.zero_grad(set_to_none=False)
        mine = starts[self.team.rank :: self.team.world]
        if mine:
            block = torch.stack([self.stream.slice(s, s + seq_len + 1) for s in mine]).to(self.team.device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = self.model.logits(block[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten(), reduction="sum")
            (loss / (len(starts) * seq_len)).backward()
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.team.total(p.grad)
        torch.nn.utils.clip_grad_norm_(self.params, self.cfg.ttt_clip)
        self.sgd.step()

    def learn(self, begin: int, end: int, rate: float) -> None:
        for group in self.sgd.param_groups:
            group["lr"] = rate
        starts = list(range(begin, end - self.cfg.seq_len + 1, self.cfg.seq_len))
        self.model.train()
        for _ in range(self.cfg.ttt_epochs):
            for at in range(0, len(starts), self.cfg.ttt_rows):
                self.step_on(starts[at : at + self.cfg.ttt_rows])
        self.model.eval()


class Evaluator:
    """The reported score: each chunk is scored, then learned from, once and from left to right."""

    def __init__(self, model: LoopedGPT, cfg: Settings, stream: ScoredStream, team: Team, journal: Journal):
        self.model, self.stream, self.team, self.journal = model, stream, team, journal
        self.cfg = cfg.eval
        self.book: Optional[HintBook] = HintBook(cfg.eval, stream) if cfg.eval.hints else None
        self.learner: Optional[ChunkLearner] = ChunkLearner(model, cfg.eval, stream, team) if cfg.eval.ttt else None
        self.tally = Tally(stream, team)
        self.hinted = 0
        self.clock = Stopwatch()

    def chunks(self) -> list[tuple[int, int]]:
        size = self.cfg.chunk_tokens
        return [(begin, min(begin + size, self.stream.targets)) for begin in range(0, self.stream.targets, size)]

    def windows(self, begin: int, end: int) -> list[Window]:
        """Every position begin..end-1 is fresh in exactly one window."""
        made = []
        for at in range(begin, end, self.cfg.stride):
            stop = min(at + self.cfg.stride, end)
            made.append(Window(max(0, stop - self.cfg.seq_len), stop, stop - at))
        return made

    def batches(self, windows: list[Window]) -> Iterator[list[Window]]:
        mine = windows[self.team.rank :: self.team.world]
        for at in range(0, len(mine), self.cfg.batch_rows):
            yield mine[at : at + self.cfg.batch_rows]

    def window_logits(self, batch: list[Window]) -> Tensor:
        tokens = torch.zeros(len(batch), self.cfg.seq_len, dtype=torch.int64)
        for row, window in enumerate(batch):
            tokens[row, : window.length] = self.stream.slice(window.start, window.end)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return self.model.logits(tokens.to(self.team.device, non_blocking=True))

    def hints_for(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        hints = Hints.nothing(end - begin) if self.book is None else self.book.propose(begin, end)
        boost = np.zeros(end - begin, dtype=np.float32) if self.book is None else self.book.boosts(hints)
        self.hinted += int((hints.token >= 0).sum())
        return torch.from_numpy(hints.token).to(self.team.device), torch.from_numpy(boost).to(self.team.device)

    @torch.no_grad()
    def score_chunk(self, begin: int, end: int) -> None:
        hint, boost = self.hints_for(begin, end)
        for batch in self.batches(self.windows(begin, end)):
            logits = self.window_logits(batch)
            for row, window in enumerate(batch):
                first = window.end - window.fresh
                fresh = logits[row, window.length - window.fresh : window.length]
                targets = self.stream.slice(first + 1, window.end + 1).to(self.team.device)
                local = slice(first - begin, window.end - begin)
                nll = tilted_nll(fresh, targets, hint[local], boost[local])
                self.tally.add(nll, first, window.end)

    def may_adapt(self) -> bool:
        return self.team.largest(self.clock.seconds) < self.cfg.budget_seconds - 90.0

    def run(self) -> tuple[float, float]:
        spans = self.chunks()
        self.model.eval()
        self.clock.go()
        for number, (begin, end) in enumerate(spans):
            self.score_chunk(begin, end)
            if number + 1 < len(spans):
                if self.book is not None:
                    self.book.absorb(begin, end)
                if self.learner is not None and self.may_adapt():
                    self.learner.learn(begin, end, self.learner.rate(number, len(spans)))
            if number % 100 == 0:
                self.journal.say(f"  chunk {number + 1}/{len(spans)}, {self.clock.seconds:.1f} s")
        loss, bpb, scored = self.tally.result()
        self.clock.halt()
        if scored != self.stream.targets:
            raise RuntimeError(f"{scored} positions scored of {self.stream.targets}")
        self.journal.say(f"scored {scored} tokens, hints for {self.hinted / scored:.1%}, {self.clock.seconds:.1f} s")
        return loss, bpb


# --------------------------------------------------------------------------------------------------------------------
# the run
# --------------------------------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def set_backends() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)


def tell_settings(cfg: Settings, journal: Journal) -> None:
    journal.say(Path(__file__).read_text(encoding="utf-8"), console=False)
    journal.say(f"python {sys.version.split()[0]}, torch {torch.__version__}", console=False)
    for part, values in asdict(cfg).items():
        if isinstance(values, dict):
            for key, value in sorted(values.items()):
                journal.say(f"  {part}.{key} = {value}")
        else:
            journal.say(f"  {part} = {values}")


def build_artifact(cfg: Settings, team: Team, journal: Journal, stream: ScoredStream) -> Quantiser:
    """Everything that the 600 s of training hold: training, calibration, quantisation."""
    trainer = Trainer(cfg, team, journal, stream)
    journal.say(f"parameters: {sum(p.numel() for p in trainer.model.parameters())}")
    journal.say(f"ranks: {team.world}, rows per rank: {trainer.rows}, micro steps: {trainer.micro}")
    model = trainer.run()
    quantiser = Quantiser(cfg, team, journal)
    hessians = quantiser.collect(model, trainer.watch)
    packed = quantiser.quantise(model, hessians)
    trainer.watch.halt()
    journal.say(f"training, calibration and quantisation: {trainer.watch.seconds:.1f} s")
    loss, bpb = plain_score(model, stream, cfg, team)
    journal.say(f"before quantisation: loss {loss:.6f} bpb {bpb:.6f}")
    quantiser.write(packed)
    del trainer, model, hessians, packed
    torch.cuda.empty_cache()
    return quantiser


def evaluate_artifact(cfg: Settings, team: Team, journal: Journal, stream: ScoredStream, quantiser: Quantiser) -> None:
    """Reads the artifact back and makes the score."""
    began = Stopwatch().go()
    model = quantiser.load()
    loss, bpb = plain_score(model, stream, cfg, team)
    journal.say(f"round trip: loss {loss:.6f} bpb {bpb:.6f}, {began.seconds:.1f} s")
    evaluator = Evaluator(model, cfg, stream, team, journal)
    loss, bpb = evaluator.run()
    journal.say(f"evaluation: {began.seconds:.1f} s")
    journal.say(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main() -> None:
    cfg = Settings()
    team = Team.join()
    journal = Journal(team, cfg.run_id)
    set_backends()
    seed_all(cfg.seed)
    tell_settings(cfg, journal)
    stream = ScoredStream(cfg.data, cfg.model)
    journal.say(f"validation: {len(stream.tokens)} tokens")
    journal.say(f"train shards: {len(shard_paths(cfg.data.train_pattern))}")
    quantiser = build_artifact(cfg, team, journal, stream)
    evaluate_artifact(cfg, team, journal, stream, quantiser)
    team.leave()


if __name__ == "__main__":
    main()
