"""Vallay: a plain dense transformer for Parameter Golf.

Eleven layers of width 512 with grouped queries, trained by Muon for ten minutes on eight H100s. The weights are the mean of
the last checkpoints (SWA), quantised by layer kind (MLP int5, attention int6, tables int8) with GPTQ on training batches
inside the same ten minutes, packed into one zstd frame, read back from disk and scored by sliding windows.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Order of this file: settings, clock and mesh, byte table, data, model, optimisers, schedule and averaging, training,
quantisation, packing, scoring, record, main.
"""

from __future__ import annotations

import bisect
import copy
import json
import math
import os
import platform
import random
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import zstandard
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_str(name: str, default: str) -> str:
    return os.environ.get(name, default)


def env_flag(name: str, default: bool) -> bool:
    return os.environ.get(name, "1" if default else "0").lower() in ("1", "true", "yes", "on")


@dataclass
class PathSettings:
    """Where things are read and written."""

    data_root: Path = field(default_factory=lambda: Path(env_str("DATA_PATH", "./data/datasets/fineweb10B_sp1024")))
    tokenizer: Path = field(
        default_factory=lambda: Path(env_str("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model"))
    )
    run_id: str = field(default_factory=lambda: env_str("RUN_ID", "vallay"))
    out_dir: Path = field(default_factory=lambda: Path(env_str("OUT_DIR", ".")))

    @property
    def train_glob(self) -> str:
        return "fineweb_train_*.bin"

    @property
    def val_glob(self) -> str:
        return "fineweb_val_*.bin"

    @property
    def artifact(self) -> Path:
        return self.out_dir / "model.vly.zst"

    @property
    def log_file(self) -> Path:
        return self.out_dir / "logs" / f"{self.run_id}.txt"


@dataclass
class ModelSettings:
    """The shape of the network."""

    vocab: int = field(default_factory=lambda: env_int("VOCAB_SIZE", 1024))
    layers: int = field(default_factory=lambda: env_int("NUM_LAYERS", 11))
    width: int = field(default_factory=lambda: env_int("MODEL_DIM", 512))
    heads: int = field(default_factory=lambda: env_int("NUM_HEADS", 8))
    kv_heads: int = field(default_factory=lambda: env_int("NUM_KV_HEADS", 4))
    mlp_ratio: float = field(default_factory=lambda: env_float("MLP_MULT", 3.0))
    rope_base: float = field(default_factory=lambda: env_float("ROPE_BASE", 10000.0))
    rope_dims: int = field(default_factory=lambda: env_int("ROPE_DIMS", 32))
    softcap: float = field(default_factory=lambda: env_float("LOGIT_SOFTCAP", 30.0))
    qk_gain: float = field(default_factory=lambda: env_float("QK_GAIN_INIT", 1.5))
    bigram_rows: int = field(default_factory=lambda: env_int("BIGRAM_ROWS", 4096))
    bigram_width: int = field(default_factory=lambda: env_int("BIGRAM_DIM", 128))
    bos_id: int = field(default_factory=lambda: env_int("BOS_ID", 1))

    def check(self) -> None:
        if self.width % self.heads:
            raise ValueError("MODEL_DIM must be a multiple of NUM_HEADS")
        if self.heads % self.kv_heads:
            raise ValueError("NUM_HEADS must be a multiple of NUM_KV_HEADS")
        if (self.width // self.heads) % 2 or self.rope_dims > self.width // self.heads:
            raise ValueError("ROPE_DIMS must be even and at most the head size")


@dataclass
class TrainSettings:
    """Steps, batches and the clock of training."""

    seed: int = field(default_factory=lambda: env_int("SEED", 1337))
    steps: int = field(default_factory=lambda: env_int("ITERATIONS", 20000))
    warmup_steps: int = field(default_factory=lambda: env_int("WARMUP_STEPS", 20))
    cooldown_steps: int = field(default_factory=lambda: env_int("WARMDOWN_ITERS", 3500))
    batch_tokens: int = field(default_factory=lambda: env_int("TRAIN_BATCH_TOKENS", 786432))
    seq_len: int = field(default_factory=lambda: env_int("TRAIN_SEQ_LEN", 2048))
    limit_s: float = field(default_factory=lambda: env_float("MAX_WALLCLOCK_SECONDS", 600.0))
    reserve_s: float = field(default_factory=lambda: env_float("QUANT_RESERVE_SECONDS", 16.0))
    log_every: int = field(default_factory=lambda: env_int("TRAIN_LOG_EVERY", 200))
    watch_every: int = field(default_factory=lambda: env_int("VAL_LOSS_EVERY", 4000))
    swa_from: float = field(default_factory=lambda: env_float("SWA_START_SCALE", 0.2))
    swa_every: int = field(default_factory=lambda: env_int("SWA_EVERY", 50))


@dataclass
class OptimSettings:
    """Learning rates and momenta."""

    matrix_lr: float = field(default_factory=lambda: env_float("MATRIX_LR", 0.025))
    table_lr: float = field(default_factory=lambda: env_float("TIED_EMBED_LR", 0.035))
    scalar_lr: float = field(default_factory=lambda: env_float("SCALAR_LR", 0.025))
    momentum: float = field(default_factory=lambda: env_float("MUON_MOMENTUM", 0.99))
    momentum_from: float = field(default_factory=lambda: env_float("MUON_MOMENTUM_WARMUP_START", 0.92))
    momentum_steps: int = field(default_factory=lambda: env_int("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    ns_steps: int = field(default_factory=lambda: env_int("MUON_BACKEND_STEPS", 5))
    matrix_decay: float = field(default_factory=lambda: env_float("MUON_WD", 0.04))
    table_decay: float = field(default_factory=lambda: env_float("ADAM_WD", 0.04))
    beta1: float = field(default_factory=lambda: env_float("BETA1", 0.9))
    beta2: float = field(default_factory=lambda: env_float("BETA2", 0.95))
    clip: float = field(default_factory=lambda: env_float("GRAD_CLIP_NORM", 0.3))


@dataclass
class QuantSettings:
    """How many bits each kind of layer gets, and how the rounding is calibrated."""

    mlp_bits: int = field(default_factory=lambda: env_int("MLP_BITS", 5))
    attn_bits: int = field(default_factory=lambda: env_int("ATTN_BITS", 6))
    table_bits: int = field(default_factory=lambda: env_int("TABLE_BITS", 8))
    calib_batches: int = field(default_factory=lambda: env_int("CALIB_BATCHES", 24))
    calib_rows: int = field(default_factory=lambda: env_int("CALIB_ROWS", 8))
    damp: float = field(default_factory=lambda: env_float("GPTQ_DAMP", 0.01))
    block: int = field(default_factory=lambda: env_int("GPTQ_BLOCK", 128))
    keep_below: int = field(default_factory=lambda: env_int("KEEP_FLOAT_BELOW", 8192))
    zstd_level: int = field(default_factory=lambda: env_int("ZSTD_LEVEL", 22))

    def bits_of(self, kind: str) -> int:
        return {"mlp": self.mlp_bits, "attn": self.attn_bits, "table": self.table_bits}[kind]


@dataclass
class ScoreSettings:
    """The sliding windows and the clock of evaluation."""

    seq_len: int = field(default_factory=lambda: env_int("EVAL_SEQ_LEN", 2048))
    stride: int = field(default_factory=lambda: env_int("EVAL_STRIDE", 64))
    rows: int = field(default_factory=lambda: env_int("EVAL_ROWS", 32))
    limit_s: float = field(default_factory=lambda: env_float("EVAL_MAX_SECONDS", 600.0))
    documents: int = field(default_factory=lambda: env_int("EVAL_DOCUMENTS_EXPECTED", 50000))
    doc_report: bool = field(default_factory=lambda: env_flag("DOC_REPORT", True))


@dataclass
class Settings:
    paths: PathSettings = field(default_factory=PathSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    quant: QuantSettings = field(default_factory=QuantSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    size_limit: int = 16_000_000

    def lines(self) -> Iterator[str]:
        for part in ("model", "train", "optim", "quant", "score"):
            for name, value in asdict(getattr(self, part)).items():
                yield f"setting {part}.{name}={value}"


# ---------------------------------------------------------------------------------------------------------------------
# Mesh, log and clock
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Mesh:
    """The processes of this run."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> Mesh:
        rank = env_int("RANK", 0)
        world = env_int("WORLD_SIZE", 1)
        local = env_int("LOCAL_RANK", 0)
        if not torch.cuda.is_available():
            raise RuntimeError("this script needs CUDA")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl", device_id=device)
        if 8 % world:
            raise ValueError("WORLD_SIZE must divide 8")
        return cls(rank, world, device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        torch.cuda.synchronize()
        if self.world > 1:
            dist.barrier()

    def total(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value

    def mean(self, value: Tensor) -> Tensor:
        return self.total(value) / self.world

    def anyone(self, flag: bool) -> bool:
        """Whether the flag is set on some rank: all ranks get the same answer."""
        if self.world == 1:
            return flag
        word = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        return bool(word.item())

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


class Log:
    """Prints and keeps the lines of rank 0."""

    def __init__(self, path: Path, mesh: Mesh):
        self.path = path
        self.active = mesh.first
        if self.active:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")

    def __call__(self, text: str, echo: bool = True) -> None:
        if not self.active:
            return
        if echo:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


class Clock:
    """Wall clock of one phase. Pauses are for looking at the run; nothing of the phase's work is done in them."""

    def __init__(self, limit_s: float, mesh: Mesh):
        self.limit_s = limit_s
        self.mesh = mesh
        self.began: float | None = None
        self.spent_s = 0.0

    def start(self) -> None:
        self.mesh.barrier()
        self.began = time.perf_counter()

    def pause(self) -> None:
        self.mesh.barrier()
        self.spent_s = self.seconds()
        self.began = None

    def seconds(self) -> float:
        running = 0.0 if self.began is None else time.perf_counter() - self.began
        return self.spent_s + running

    def agreed(self) -> float:
        """The seconds so far as the mean of all ranks, so that each of them reckons with the same number."""
        return self.mesh.mean(torch.tensor(self.seconds(), dtype=torch.float64, device=self.mesh.device)).item()

    def over(self, reserve_s: float = 0.0) -> bool:
        """Whether the phase has used up its limit less a reserve, as seen by the slowest rank."""
        return self.mesh.anyone(self.seconds() >= self.limit_s - reserve_s)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes of tokens
# ---------------------------------------------------------------------------------------------------------------------

SPACE_MARK = "\u2581"


class ByteTable:
    """How many bytes of text each token stands for.

    A piece's mark stands for one space, which is there unless the token before ends no text (a control token, an unknown
    one or one that is not used): at a document's start the space was put in by the tokenizer.
    """

    def __init__(self, model_file: Path, vocab: int, device: torch.device):
        self.processor = spm.SentencePieceProcessor(model_file=str(model_file))
        if self.processor.vocab_size() != vocab:
            raise ValueError(f"tokenizer has {self.processor.vocab_size()} tokens, the model {vocab}")
        base = np.zeros(vocab, dtype=np.int16)
        spaced = np.zeros(vocab, dtype=bool)
        silent = np.ones(vocab, dtype=bool)
        for token in range(vocab):
            if self._is_silent(token):
                continue
            silent[token] = False
            if self.processor.is_byte(token):
                base[token] = 1
                continue
            piece = self.processor.id_to_piece(token)
            if piece.startswith(SPACE_MARK):
                spaced[token] = True
                piece = piece[1:]
            base[token] = len(piece.encode("utf-8"))
        self.base = torch.from_numpy(base).to(device)
        self.spaced = torch.from_numpy(spaced).to(device)
        self.silent = torch.from_numpy(silent).to(device)

    def _is_silent(self, token: int) -> bool:
        sp = self.processor
        return sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token)

    def count(self, before: Tensor, tokens: Tensor) -> Tensor:
        """Bytes of each token, given the token before it."""
        counts = self.base[tokens].to(torch.int32)
        counts += (self.spaced[tokens] & ~self.silent[before]).to(torch.int32)
        return counts


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def shard_files(folder: Path, glob: str) -> list[Path]:
    found = sorted(folder.glob(glob))
    if not found:
        raise FileNotFoundError(f"no {glob} in {folder}")
    return found


def open_shard(path: Path) -> np.ndarray:
    """The tokens of one shard, memory mapped."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"{path} is no token shard")
    count = int(header[2])
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path} announces {count} tokens and holds {tokens.size}")
    return tokens


def load_stream(folder: Path, glob: str) -> Tensor:
    """All tokens of some shards as one tensor on the host."""
    parts = [np.asarray(open_shard(path), dtype=np.uint16) for path in shard_files(folder, glob)]
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))


class ShardReader:
    """Reads spans of tokens out of a list of shards, one after another and round again."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.index = 0
        self.offset = 0
        self.tokens = open_shard(files[0])

    def _advance(self) -> None:
        self.index = (self.index + 1) % len(self.files)
        self.offset = 0
        self.tokens = open_shard(self.files[self.index])

    def take(self, count: int) -> np.ndarray:
        parts = []
        while count:
            if self.offset >= len(self.tokens):
                self._advance()
            part = self.tokens[self.offset : self.offset + count]
            parts.append(np.asarray(part))
            self.offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Loader:
    """Training batches. Every rank reads the same spans and keeps its own slice of each."""

    def __init__(self, paths: PathSettings, settings: TrainSettings, mesh: Mesh):
        self.files = shard_files(paths.data_root, paths.train_glob)
        self.reader = ShardReader(self.files)
        self.mesh = mesh
        self.seq_len = settings.seq_len
        self.micro_steps = 8 // mesh.world
        self.rows = settings.batch_tokens // (self.seq_len * mesh.world * self.micro_steps)
        if self.rows < 1:
            raise ValueError("TRAIN_BATCH_TOKENS is too small for one row per rank")

    def batch(self, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank's next micro batch."""
        rows = rows or self.rows
        share = rows * self.seq_len
        span = self.reader.take(share * self.mesh.world + 1)
        self.reader.offset -= 1
        begin = self.mesh.rank * share
        mine = torch.from_numpy(span[begin : begin + share + 1].astype(np.int64))
        inputs = mine[:-1].view(rows, self.seq_len)
        targets = mine[1:].view(rows, self.seq_len)
        device = self.mesh.device
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


@dataclass
class ValidationText:
    """The validation split: its tokens and where its documents begin."""

    tokens: Tensor
    starts: list[int]

    @classmethod
    def load(cls, paths: PathSettings, bos_id: int) -> ValidationText:
        tokens = load_stream(paths.data_root, paths.val_glob)
        starts = (tokens == bos_id).nonzero().flatten().tolist()
        return cls(tokens, starts)

    @property
    def targets(self) -> int:
        """How many tokens are predicted: all but the very first."""
        return self.tokens.numel() - 1


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Dense(nn.Linear):
    """A linear map without bias whose float32 weight is used in the input's precision."""

    def __init__(self, inputs: int, outputs: int, kind: str, zero: bool = False):
        super().__init__(inputs, outputs, bias=False)
        self.kind = kind
        self.zero = zero

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Rotates the first dimensions of each head by its position."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        self.dims = dims
        inverse = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inverse", inverse, persistent=False)

    def tables(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        where = torch.arange(length, device=self.inverse.device, dtype=torch.float32)
        angles = torch.outer(where, self.inverse)
        return angles.cos()[None, :, None, :].to(dtype), angles.sin()[None, :, None, :].to(dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        left, right = turned.chunk(2, dim=-1)
        return torch.cat((left * cos + right * sin, right * cos - left * sin, rest), dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped key and value heads and normalised queries and keys."""

    def __init__(self, s: ModelSettings):
        super().__init__()
        self.heads, self.kv_heads = s.heads, s.kv_heads
        self.head_size = s.width // s.heads
        self.query = Dense(s.width, s.width, "attn")
        self.key = Dense(s.width, self.kv_heads * self.head_size, "attn")
        self.value = Dense(s.width, self.kv_heads * self.head_size, "attn")
        self.out = Dense(s.width, s.width, "attn", zero=True)
        self.gain = nn.Parameter(torch.full((s.heads,), s.qk_gain))
        self.rotary = Rotary(s.rope_dims, s.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q = self.query(x).view(rows, length, self.heads, self.head_size)
        k = self.key(x).view(rows, length, self.kv_heads, self.head_size)
        v = self.value(x).view(rows, length, self.kv_heads, self.head_size)
        cos, sin = self.rotary.tables(length, x.dtype)
        q = self.rotary(rms(q), cos, sin) * self.gain.to(x.dtype)[None, None, :, None]
        k = self.rotary(rms(k), cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).reshape(rows, length, width))


class FeedForward(nn.Module):
    """Two linear maps with a leaky squared rectifier between them."""

    def __init__(self, s: ModelSettings):
        super().__init__()
        inner = int(s.width * s.mlp_ratio)
        self.rise = Dense(s.width, inner, "mlp")
        self.fall = Dense(inner, s.width, "mlp", zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(F.leaky_relu(self.rise(x), 0.5).square())


class Layer(nn.Module):
    def __init__(self, s: ModelSettings, depth: int):
        super().__init__()
        self.attention = Attention(s)
        self.feed = FeedForward(s)
        self.attention_scale = nn.Parameter(torch.ones(s.width))
        self.feed_scale = nn.Parameter(torch.ones(s.width))
        self.blend = nn.Parameter(torch.stack((torch.ones(s.width), torch.zeros(s.width))))
        self.damp = 1.0 / math.sqrt(depth + 1)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        blend = self.blend.to(x.dtype)
        x = blend[0] * x + blend[1] * first
        x = x + self.attention_scale.to(x.dtype) * self.attention(rms(x) * self.damp)
        return x + self.feed_scale.to(x.dtype) * self.feed(rms(x) * self.damp)


class Smear(nn.Module):
    """Adds a learned share of the previous token's embedding, except at a document's first token."""

    def __init__(self, width: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.share = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        share = torch.sigmoid(self.share).to(x.dtype)
        return (1 - share * inside) * x + share * inside * previous


class PairTable(nn.Module):
    """A small embedding of hashed pairs (previous token, token). A document's first token pairs with nothing."""

    def __init__(self, s: ModelSettings):
        super().__init__()
        self.rows, self.bos_id = s.bigram_rows, s.bos_id
        self.table = nn.Embedding(s.bigram_rows, s.bigram_width)
        self.lift = Dense(s.bigram_width, s.width, "attn", zero=True)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def slots(self, ids: Tensor) -> Tensor:
        previous = F.pad(ids[:, :-1], (1, 0))
        mixed = (previous * 36313) ^ (ids * 27191)
        return torch.where(ids == self.bos_id, torch.zeros_like(ids), mixed % (self.rows - 1) + 1)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.lift(self.table(self.slots(ids)).to(dtype)) * self.scale.to(dtype)


class GPT(nn.Module):
    """The network: tied embedding, layers with skips from the first half to the second, soft-capped logits."""

    def __init__(self, s: ModelSettings):
        super().__init__()
        s.check()
        self.settings = s
        self.embed = nn.Embedding(s.vocab, s.width)
        self.pairs = PairTable(s)
        self.smear = Smear(s.width, s.bos_id)
        self.layers = nn.ModuleList(Layer(s, depth) for depth in range(s.layers))
        self.half = s.layers // 2
        self.skip = nn.Parameter(torch.ones(min(self.half, s.layers - self.half), s.width))
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embed.weight, std=0.005)
        nn.init.normal_(self.pairs.table.weight, std=0.01)
        for module in self.modules():
            if isinstance(module, Dense):
                if module.zero:
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        dtype = torch.bfloat16
        x = self.embed(ids).to(dtype) + self.pairs(ids, dtype)
        x = first = self.smear(rms(x), ids)
        kept: list[Tensor] = []
        for layer in self.layers[: self.half]:
            x = layer(x, first)
            kept.append(x)
        for i, layer in enumerate(self.layers[self.half :]):
            if i < self.skip.size(0):
                x = x + self.skip[i].to(dtype) * kept.pop()
            x = layer(x, first)
        return rms(x)

    def logits(self, ids: Tensor) -> Tensor:
        raw = F.linear(self.hidden(ids), self.embed.weight.to(torch.bfloat16))
        cap = self.settings.softcap
        return cap * torch.tanh(raw.float() / cap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())

    def token_losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The loss of every token of a batch, in nats."""
        flat = F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view_as(targets)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers
# ---------------------------------------------------------------------------------------------------------------------


def orthogonalise(grad: Tensor, steps: int) -> Tensor:
    """The nearest orthogonal matrix, roughly, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised. The matrices are shared out over the ranks and gathered again."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, steps: int, decay: float, mesh: Mesh):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, decay=decay))
        self.mesh = mesh

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            sizes = [p.numel() for p in params]
            flat = torch.zeros(sum(sizes), device=self.mesh.device, dtype=torch.bfloat16)
            at = 0
            for number, (p, size) in enumerate(zip(params, sizes, strict=True)):
                if number % self.mesh.world == self.mesh.rank and p.grad is not None:
                    state = self.state[p]
                    if "velocity" not in state:
                        state["velocity"] = torch.zeros_like(p.grad)
                    velocity = state["velocity"]
                    velocity.mul_(group["momentum"]).add_(p.grad)
                    ahead = p.grad.add(velocity, alpha=group["momentum"])
                    update = orthogonalise(ahead, group["steps"])
                    update *= max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + size] = update.flatten()
                at += size
            self.mesh.total(flat)
            at = 0
            for p, size in zip(params, sizes, strict=True):
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(flat[at : at + size].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += size


class OptimiserSet:
    """All optimisers of the run, moved by one schedule."""

    def __init__(self, model: GPT, s: OptimSettings, mesh: Mesh):
        matrices, tables, scalars = [], [], []
        for name, p in model.named_parameters():
            if name in ("embed.weight", "pairs.table.weight"):
                tables.append(p)
            elif p.ndim == 2 and min(p.shape) >= 64:
                matrices.append(p)
            else:
                scalars.append(p)
        betas = (s.beta1, s.beta2)
        self.settings = s
        self.muon = Muon(matrices, s.matrix_lr, s.momentum, s.ns_steps, s.matrix_decay, mesh)
        self.tables = torch.optim.AdamW(tables, lr=s.table_lr, betas=betas, weight_decay=s.table_decay, fused=True)
        self.scalars = torch.optim.AdamW(scalars, lr=s.scalar_lr, betas=betas, weight_decay=0.0, fused=True)
        self.members = (self.muon, self.tables, self.scalars)
        self.rates = [group["lr"] for member in self.members for group in member.param_groups]

    def aim(self, step: int, scale: float) -> None:
        """Sets learning rates and momentum for a step."""
        groups = [group for member in self.members for group in member.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * scale
        s = self.settings
        part = min(step / max(s.momentum_steps, 1), 1.0)
        for group in self.muon.param_groups:
            group["momentum"] = (1 - part) * s.momentum_from + part * s.momentum

    def step(self) -> None:
        for member in self.members:
            member.step()

    def clear(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def snapshot(self) -> list[dict]:
        return [copy.deepcopy(member.state_dict()) for member in self.members]

    def restore(self, states: list[dict]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and averaging
# ---------------------------------------------------------------------------------------------------------------------


class Schedule:
    """Full rate, then a linear fall that ends with the time there is."""

    def __init__(self, s: TrainSettings, clock: Clock):
        self.settings = s
        self.clock = clock

    def scale(self, step: int) -> float:
        s = self.settings
        if s.cooldown_steps <= 0:
            return 1.0
        if step == 0:
            return 1.0
        spent = self.clock.agreed()
        per_step = spent / step
        left = max(s.limit_s - s.reserve_s - spent, 0.0)
        cooldown_s = s.cooldown_steps * per_step
        return min(1.0, left / max(cooldown_s, 1e-9))


class SwaMean:
    """The running mean of the checkpoints taken at the end of training."""

    def __init__(self, model: nn.Module):
        self.names = [name for name, _ in model.named_parameters()]
        self.mean: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        self.count += 1
        for name, p in model.named_parameters():
            if self.count == 1:
                self.mean[name] = p.detach().float().clone()
            else:
                self.mean[name].lerp_(p.detach().float(), 1.0 / self.count)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> bool:
        """Puts the mean into the model; says whether there was one."""
        if not self.count:
            return False
        for name, p in model.named_parameters():
            p.copy_(self.mean[name].to(p.dtype))
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TrainReport:
    steps: int = 0
    seconds: float = 0.0
    calibration_s: float = 0.0
    averaged: int = 0
    last_loss: float = float("nan")


class Trainer:
    """Runs the steps of training under the clock."""

    def __init__(self, model: GPT, settings: Settings, mesh: Mesh, log: Log):
        self.raw = model
        self.model = torch.compile(model, dynamic=False, fullgraph=True)
        self.settings = settings
        self.mesh = mesh
        self.log = log
        self.optimisers = OptimiserSet(model, settings.optim, mesh)
        self.loader = Loader(settings.paths, settings.train, mesh)
        self.clock = Clock(settings.train.limit_s, mesh)
        self.schedule = Schedule(settings.train, self.clock)
        self.swa = SwaMean(model)
        self.report = TrainReport()

    def _share_gradients(self) -> None:
        for p in self.raw.parameters():
            if p.grad is not None:
                self.mesh.total(p.grad)
                p.grad /= self.mesh.world

    def one_step(self) -> Tensor:
        """Gradients of one batch and an update; the batch's mean loss."""
        self.optimisers.clear()
        loss_sum = torch.zeros((), device=self.mesh.device)
        for _ in range(self.loader.micro_steps):
            inputs, targets = self.loader.batch()
            loss = self.model(inputs, targets)
            (loss / self.loader.micro_steps).backward()
            loss_sum += loss.detach() / self.loader.micro_steps
        self._share_gradients()
        if self.settings.optim.clip > 0:
            nn.utils.clip_grad_norm_(self.raw.parameters(), self.settings.optim.clip)
        self.optimisers.step()
        return loss_sum

    def warm_up(self) -> None:
        """Compiles by a few steps on training batches, then puts everything back as it was."""
        weights = copy.deepcopy(self.raw.state_dict())
        states = self.optimisers.snapshot()
        self.optimisers.aim(0, 1.0)
        for _ in range(self.settings.train.warmup_steps):
            self.one_step()
        self.raw.load_state_dict(weights)
        self.optimisers.restore(states)
        self.optimisers.clear()
        self.loader = Loader(self.settings.paths, self.settings.train, self.mesh)

    def run(self, watch) -> TrainReport:
        """Trains until the steps or the time are used up. watch(step) logs a look at the run, off the clock."""
        s = self.settings.train
        self.warm_up()
        self.clock.start()
        step = 0
        loss = torch.zeros((), device=self.mesh.device)
        while step < s.steps and not self.clock.over(s.reserve_s):
            if s.watch_every and step % s.watch_every == 0:
                self.clock.pause()
                watch(step, self.clock.seconds())
                self.clock.start()
            scale = self.schedule.scale(step)
            self.optimisers.aim(step, scale)
            loss = self.one_step()
            step += 1
            if scale < s.swa_from and step % s.swa_every == 0:
                self.swa.take(self.raw)
            if step <= 10 or step % s.log_every == 0:
                mean = self.mesh.mean(loss.clone()).item()
                spent = self.clock.seconds()
                self.log(f"step {step} train_loss {mean:.4f} scale {scale:.3f} time {spent:.1f}s")
        self.report.steps = step
        self.report.last_loss = self.mesh.mean(loss.clone()).item()
        if self.swa.apply(self.raw):
            self.report.averaged = self.swa.count
        self.log(f"trained {step} steps in {self.clock.seconds():.1f}s, mean of {self.swa.count} checkpoints")
        return self.report


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Coded:
    """One tensor as whole numbers and a scale for every row, or as float16 where bits is 16."""

    name: str
    kind: str
    bits: int
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor | None

    def restore(self) -> Tensor:
        if self.scale is None:
            return self.codes.float().view(self.shape)
        return self.codes.float().mul(self.scale.float().unsqueeze(1)).view(self.shape)


class InputMoments:
    """Second moments of the inputs of every quantised linear map, collected by hooks."""

    def __init__(self, model: GPT):
        self.moments: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, Dense):
                self.hooks.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str):
        def keep(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2).float()
            gram = x.T @ x
            if name in self.moments:
                self.moments[name] += gram
            else:
                self.moments[name] = gram
            self.rows[name] = self.rows.get(name, 0) + x.size(0)

        return keep

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def shared(self, mesh: Mesh) -> dict[str, Tensor]:
        """The moments of all ranks together, per row."""
        return {name: mesh.total(gram) / (self.rows[name] * mesh.world) for name, gram in self.moments.items()}


class Quantiser:
    """Rounds the weights: GPTQ where there are moments of the inputs, plain rounding for the tables."""

    def __init__(self, settings: QuantSettings, mesh: Mesh, log: Log):
        self.settings = settings
        self.mesh = mesh
        self.log = log

    @torch.no_grad()
    def calibrate(self, model: GPT, loader: Loader) -> dict[str, Tensor]:
        """Moments of the inputs on training batches."""
        moments = InputMoments(model)
        model.eval()
        for _ in range(self.settings.calib_batches):
            inputs, _ = loader.batch(self.settings.calib_rows)
            model.hidden(inputs)
        moments.close()
        return moments.shared(self.mesh)

    def kind_of(self, model: GPT, name: str, p: Tensor) -> str:
        """The kind of a parameter, or "" if it stays in floating point."""
        if name in ("embed.weight", "pairs.table.weight"):
            return "table"
        if p.ndim != 2 or p.numel() < self.settings.keep_below:
            return ""
        owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
        return owner.kind if isinstance(owner, Dense) else ""

    @staticmethod
    def row_scales(weight: Tensor, bits: int) -> Tensor:
        """For each row the scale, out of some clipped ones, that rounds it with the least squared error."""
        top = 2 ** (bits - 1) - 1
        peak = weight.abs().amax(dim=1).clamp_min(1e-8)
        best = peak / top
        least = torch.full_like(peak, float("inf"))
        for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65):
            scale = (peak * share / top).half().float().clamp_min(1e-7)
            rounded = (weight / scale[:, None]).round().clamp(-top, top) * scale[:, None]
            error = (rounded - weight).square().sum(dim=1)
            better = error < least
            best = torch.where(better, scale, best)
            least = torch.where(better, error, least)
        return best.half().float()

    def plain(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        top = 2 ** (bits - 1) - 1
        scale = self.row_scales(weight, bits)
        return (weight / scale[:, None]).round().clamp(-top, top).to(torch.int8), scale

    def gptq(self, weight: Tensor, gram: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Column after column, each column's rounding error being made good by the columns after it."""
        top = 2 ** (bits - 1) - 1
        weight = weight.float().clone()
        gram = gram.clone()
        columns = weight.size(1)
        dead = gram.diagonal() == 0
        gram.diagonal()[dead] = 1.0
        weight[:, dead] = 0
        order = gram.diagonal().argsort(descending=True)
        weight, gram = weight[:, order], gram[order][:, order]
        scale = self.row_scales(weight, bits)
        gram.diagonal().add_(self.settings.damp * gram.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        upper = torch.linalg.cholesky(inverse, upper=True)
        codes = torch.zeros_like(weight, dtype=torch.int8)
        for begin in range(0, columns, self.settings.block):
            end = min(begin + self.settings.block, columns)
            block = weight[:, begin:end].clone()
            errors = torch.zeros_like(block)
            for i in range(end - begin):
                column = block[:, i]
                code = (column / scale).round().clamp(-top, top)
                codes[:, begin + i] = code.to(torch.int8)
                error = (column - code * scale) / upper[begin + i, begin + i]
                block[:, i:] -= error[:, None] * upper[begin + i, begin + i : end][None, :]
                errors[:, i] = error
            weight[:, end:] -= errors @ upper[begin:end, end:]
        return codes[:, order.argsort()], scale

    @torch.no_grad()
    def run(self, model: GPT, moments: dict[str, Tensor]) -> list[Coded]:
        """All parameters, coded. The ranks share out the matrices and then exchange them."""
        coded: list[Coded] = []
        for number, (name, p) in enumerate(model.named_parameters()):
            kind = self.kind_of(model, name, p)
            if not kind:
                coded.append(Coded(name, "float", 16, tuple(p.shape), p.detach().half().flatten().cpu(), None))
                continue
            bits = self.settings.bits_of(kind)
            owner = number % self.mesh.world
            codes = torch.zeros(p.shape, dtype=torch.int8, device=p.device)
            scale = torch.zeros(p.size(0), device=p.device)
            if owner == self.mesh.rank:
                gram = moments.get(name.removesuffix(".weight"))
                codes, scale = self.plain(p.float(), bits) if gram is None else self.gptq(p, gram, bits)
                codes, scale = codes.contiguous(), scale.contiguous()
            if self.mesh.world > 1:
                dist.broadcast(codes, owner)
                dist.broadcast(scale, owner)
            coded.append(Coded(name, kind, bits, tuple(p.shape), codes.cpu(), scale.half().cpu()))
        return coded


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


class Packer:
    """Writes and reads the artifact: a head in JSON and the numbers, kind by kind, in one zstd frame."""

    MAGIC = b"VLY1"
    ORDER = ("mlp", "attn", "table", "float")

    def __init__(self, settings: QuantSettings):
        self.settings = settings

    def _body(self, coded: list[Coded]) -> tuple[list[dict], bytes]:
        head: list[dict] = []
        body = bytearray()
        for kind in self.ORDER:
            for item in (c for c in coded if c.kind == kind):
                entry = {"name": item.name, "kind": kind, "bits": item.bits, "shape": list(item.shape)}
                entry["at"] = len(body)
                if item.scale is None:
                    body += item.codes.numpy().astype("<f2").tobytes()
                else:
                    body += item.codes.T.contiguous().numpy().tobytes()
                    entry["scale_at"] = len(body)
                    body += item.scale.numpy().astype("<f2").tobytes()
                head.append(entry)
        return head, bytes(body)

    def pack(self, coded: list[Coded]) -> bytes:
        head, body = self._body(coded)
        text = json.dumps(head, separators=(",", ":")).encode("utf-8")
        raw = self.MAGIC + struct.pack("<I", len(text)) + text + body
        return zstandard.ZstdCompressor(level=self.settings.zstd_level).compress(raw)

    def unpack(self, blob: bytes) -> list[Coded]:
        raw = zstandard.ZstdDecompressor().decompress(blob)
        if raw[:4] != self.MAGIC:
            raise ValueError("this is no artifact of Vallay")
        (length,) = struct.unpack("<I", raw[4:8])
        head = json.loads(raw[8 : 8 + length].decode("utf-8"))
        body = memoryview(raw)[8 + length :]
        coded = []
        for entry in head:
            shape = tuple(entry["shape"])
            count = math.prod(shape)
            if entry["kind"] == "float":
                values = np.frombuffer(body, dtype="<f2", count=count, offset=entry["at"])
                coded.append(Coded(entry["name"], "float", 16, shape, torch.from_numpy(values.copy()), None))
                continue
            numbers = np.frombuffer(body, dtype=np.int8, count=count, offset=entry["at"])
            codes = torch.from_numpy(numbers.copy()).view(shape[1], shape[0]).T.contiguous()
            scales = np.frombuffer(body, dtype="<f2", count=shape[0], offset=entry["scale_at"])
            scale = torch.from_numpy(scales.copy())
            coded.append(Coded(entry["name"], entry["kind"], entry["bits"], shape, codes, scale))
        return coded

    def save(self, coded: list[Coded], path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.pack(coded))
        return path.stat().st_size

    def load(self, path: Path, settings: ModelSettings, device: torch.device) -> GPT:
        """A new model with the weights of an artifact."""
        model = GPT(settings).to(device)
        named = dict(model.named_parameters())
        coded = self.unpack(path.read_bytes())
        if {item.name for item in coded} != set(named):
            raise ValueError("the artifact is of another model")
        with torch.no_grad():
            for item in coded:
                named[item.name].copy_(item.restore().to(device))
        return model.eval()


@dataclass
class SizeReport:
    """What the submission weighs."""

    code_bytes: int
    model_bytes: int
    limit: int

    @classmethod
    def measure(cls, artifact: Path, limit: int) -> SizeReport:
        code = len(Path(__file__).read_bytes())
        return cls(code, artifact.stat().st_size, limit)

    @property
    def total(self) -> int:
        return self.code_bytes + self.model_bytes

    def report(self, log: Log) -> None:
        log(f"size code {self.code_bytes} bytes")
        log(f"size model {self.model_bytes} bytes")
        log(f"size total {self.total} bytes of {self.limit}, {'fits' if self.total <= self.limit else 'TOO LARGE'}")


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Inputs start .. start + length; of its targets the first `skip` only give context."""

    start: int
    length: int
    skip: int


def plan_windows(targets: int, seq_len: int, stride: int, starts: list[int]) -> list[Window]:
    """Windows that score each target once: the first window all of its own, each later one its last `stride`.

    What is left at the end of the text is scored by one more window. It reaches back as far as a window can, but not
    beyond the beginning of the document in which the rest begins.
    """
    plan: list[Window] = []
    done = 0
    start = 0
    while start + seq_len <= targets:
        plan.append(Window(start, seq_len, done - start))
        done = start + seq_len
        start += stride
    if done < targets:
        reach = max(targets - seq_len, 0)
        inside = bisect.bisect_right(starts, done) - 1
        if inside >= 0:
            reach = max(reach, starts[inside])
        plan.append(Window(reach, targets - reach, done - reach))
    return plan


class Tally:
    """Sums of losses, tokens and bytes in float64, merged over the ranks at the end."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, byte_counts: Tensor) -> None:
        self.sums[0] += losses.to(torch.float64).sum()
        self.sums[1] += losses.numel()
        self.sums[2] += byte_counts.to(torch.float64).sum()

    def merge(self, mesh: Mesh) -> Tally:
        """The tally of all ranks together."""
        merged = Tally(self.sums.device)
        merged.sums = mesh.total(self.sums.clone())
        return merged

    @property
    def nats(self) -> float:
        return self.sums[0].item()

    @property
    def tokens(self) -> int:
        return int(self.sums[1].item())

    @property
    def bytes(self) -> int:
        return int(self.sums[2].item())

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2.0) / self.bytes


class LossBook:
    """The loss of each target that this rank has scored. An entry is written once."""

    def __init__(self, targets: int):
        self.losses = torch.full((targets,), float("nan"))

    def write(self, begin: int, losses: Tensor) -> None:
        place = self.losses[begin : begin + losses.numel()]
        if not bool(place.isnan().all()):
            raise RuntimeError(f"targets from {begin} on are scored already")
        place.copy_(losses.cpu())

    def by_document(self, starts: list[int], mesh: Mesh) -> Tensor:
        """For each document the sum of its losses and its number of targets, of all ranks."""
        scored = ~self.losses.isnan()
        where = scored.nonzero().flatten()
        edges = torch.tensor(starts)
        document = (torch.bucketize(where, edges, right=True) - 1).clamp_min(0)
        sums = torch.zeros(max(len(starts), 1), 2, dtype=torch.float64)
        sums[:, 0].index_add_(0, document, self.losses[where].double())
        sums[:, 1].index_add_(0, document, torch.ones(len(where), dtype=torch.float64))
        return mesh.total(sums.to(mesh.device)).cpu()


@dataclass
class Score:
    """What one scoring of the validation text gives."""

    tally: Tally
    seconds: float
    book: LossBook


class Scorer:
    """Scores the validation text by sliding windows."""

    def __init__(self, settings: ScoreSettings, text: ValidationText, table: ByteTable, mesh: Mesh, log: Log):
        self.settings = settings
        self.text = text
        self.table = table
        self.mesh = mesh
        self.log = log

    def share(self, plan: list[Window]) -> list[Window]:
        """This rank's part of the windows: a run of neighbours, so that its losses are one piece of text."""
        per_rank = (len(plan) + self.mesh.world - 1) // self.mesh.world
        return plan[self.mesh.rank * per_rank : (self.mesh.rank + 1) * per_rank]

    def batches(self, windows: list[Window]) -> Iterator[tuple[list[Window], Tensor, Tensor]]:
        """Groups of windows with their inputs and targets, padded to the longest of the group."""
        for at in range(0, len(windows), self.settings.rows):
            group = windows[at : at + self.settings.rows]
            longest = max(w.length for w in group)
            block = torch.zeros(len(group), longest + 1, dtype=torch.int64)
            for row, w in enumerate(group):
                block[row, : w.length + 1] = self.text.tokens[w.start : w.start + w.length + 1]
            block = block.to(self.mesh.device, non_blocking=True)
            yield group, block[:, :-1].contiguous(), block[:, 1:].contiguous()

    @torch.inference_mode()
    def run(self, model: GPT, stride: int) -> Score:
        """Scores every target once, in windows that move on by `stride`."""
        began = time.perf_counter()
        plan = plan_windows(self.text.targets, self.settings.seq_len, stride, self.text.starts)
        mine = self.share(plan)
        losses_of = torch.compile(model.token_losses, dynamic=False)
        tally = Tally(self.mesh.device)
        book = LossBook(self.text.targets)
        for number, (group, inputs, targets) in enumerate(self.batches(mine)):
            full = len(group) == self.settings.rows and inputs.size(1) == self.settings.seq_len
            losses = losses_of(inputs, targets) if full else model.token_losses(inputs, targets)
            sizes = self.table.count(inputs, targets)
            for row, w in enumerate(group):
                piece = losses[row, w.skip : w.length]
                tally.add(piece, sizes[row, w.skip : w.length])
                book.write(w.start + w.skip, piece)
            if number % 500 == 0:
                self.log(f"scoring {number * self.settings.rows}/{len(mine)} {time.perf_counter() - began:.0f}s")
        merged = tally.merge(self.mesh)
        self.mesh.barrier()
        if merged.tokens != self.text.targets:
            raise RuntimeError(f"{merged.tokens} tokens scored, {self.text.targets} expected")
        return Score(merged, time.perf_counter() - began, book)

    def quick(self, model: GPT) -> Tally:
        """The loss in windows that do not overlap: a look at the run, never the score."""
        return self.run(model, self.settings.seq_len).tally

    def document_report(self, score: Score) -> None:
        """Logs how the loss is spread over the documents."""
        if not self.text.starts:
            return
        sums = score.book.by_document(self.text.starts, self.mesh)
        means = sums[:, 0] / sums[:, 1].clamp_min(1)
        quarters = torch.quantile(means, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        self.log(f"documents {len(means)} mean losses at the quarters {' '.join(f'{q:.4f}' for q in quarters)}")
        lengths = sums[:, 1]
        for low, high in ((0, 256), (256, 1024), (1024, 4096), (4096, 1 << 30)):
            inside = (lengths >= low) & (lengths < high)
            if inside.any():
                loss = (sums[inside, 0].sum() / sums[inside, 1].sum()).item()
                self.log(f"documents of {low} to {high} tokens: {int(inside.sum())}, loss {loss:.4f}")


# ---------------------------------------------------------------------------------------------------------------------
# Record
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What is handed in beside the script."""

    name: str
    seed: int
    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    train_steps: int
    train_seconds: float
    eval_seconds: float
    code_bytes: int
    model_bytes: int

    def write(self, path: Path) -> None:
        fields = asdict(self)
        fields["bytes_total"] = self.code_bytes + self.model_bytes
        fields["track"] = "10min_16mb"
        fields["predictor"] = "fixed"
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def describe_host(log: Log) -> None:
    log(f"python {platform.python_version()} torch {torch.__version__} cuda {torch.version.cuda}")
    log(f"device {torch.cuda.get_device_name()}")


def train_and_pack(settings: Settings, mesh: Mesh, log: Log, scorer: Scorer) -> TrainReport:
    """Trains, calibrates and rounds inside the limit, then writes the artifact."""
    model = GPT(settings.model).to(mesh.device)
    log(f"parameters {sum(p.numel() for p in model.parameters())}")
    trainer = Trainer(model, settings, mesh, log)

    def watch(step: int, spent_s: float) -> None:
        look = scorer.quick(model)
        log(f"watch step {step} val_loss {look.loss:.4f} val_bpb {look.bpb:.4f} time {spent_s:.1f}s")

    report = trainer.run(watch)
    quantiser = Quantiser(settings.quant, mesh, log)
    before = trainer.clock.seconds()
    moments = quantiser.calibrate(model, trainer.loader)
    coded = quantiser.run(model, moments)
    trainer.clock.pause()
    report.seconds = trainer.clock.seconds()
    report.calibration_s = report.seconds - before
    log(f"calibration and rounding took {report.calibration_s:.1f}s, in all {report.seconds:.1f}s")
    if trainer.clock.seconds() > settings.train.limit_s:
        log(f"WARNING training went over its limit of {settings.train.limit_s:.0f}s")
    packer = Packer(settings.quant)
    if mesh.first:
        packer.save(coded, settings.paths.artifact)
    mesh.barrier()
    return report


def main() -> None:
    settings = Settings()
    mesh = Mesh.join()
    log = Log(settings.paths.log_file, mesh)
    describe_host(log)
    for line in settings.lines():
        log(line, echo=False)
    seed_everything(settings.train.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    table = ByteTable(settings.paths.tokenizer, settings.model.vocab, mesh.device)
    text = ValidationText.load(settings.paths, settings.model.bos_id)
    log(f"validation tokens {text.targets} documents {len(text.starts)}")
    if len(text.starts) != settings.score.documents:
        log(f"WARNING {settings.score.documents} documents were expected")
    scorer = Scorer(settings.score, text, table, mesh, log)

    report = train_and_pack(settings, mesh, log, scorer)
    size = SizeReport.measure(settings.paths.artifact, settings.size_limit)
    size.report(log)
    torch.cuda.empty_cache()

    clock = Clock(settings.score.limit_s, mesh)
    clock.start()
    packer = Packer(settings.quant)
    model = packer.load(settings.paths.artifact, settings.model, mesh.device)
    score = scorer.run(model, settings.score.stride)
    clock.pause()
    result = score.tally
    log(f"scored {result.tokens} tokens, {result.bytes} bytes in {score.seconds:.1f}s")
    log(f"final val_loss {result.loss:.8f} val_bpb {result.bpb:.8f} eval_time {clock.seconds():.1f}s")
    if clock.seconds() > settings.score.limit_s:
        log(f"WARNING evaluation went over its limit of {settings.score.limit_s:.0f}s")
    if settings.score.doc_report:
        scorer.document_report(score)

    if mesh.first:
        record = Record(
            name=settings.paths.run_id,
            seed=settings.train.seed,
            val_loss=result.loss,
            val_bpb=result.bpb,
            tokens=result.tokens,
            bytes=result.bytes,
            train_steps=report.steps,
            train_seconds=report.seconds,
            eval_seconds=clock.seconds(),
            code_bytes=size.code_bytes,
            model_bytes=size.model_bytes,
        )
        record.write(settings.paths.out_dir / "submission.json")
    log(f"peak memory {torch.cuda.max_memory_allocated() // 2**20} MiB")
    mesh.leave()


if __name__ == "__main__":
    main()
