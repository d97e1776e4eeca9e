"""Ternary GPT with document-wise low-rank adaptation: training, packing and evaluation in one script.

The submission trains a transformer whose matrices are ternary from the first step (quantisation-aware training with a
straight-through estimator), packs five trits to a byte, reads the packed file back and scores the FineWeb validation
split in bits per byte. Three scoring strategies are implemented; the one that is reported is fixed in the settings:

    full       disjoint windows of the training length,
    sliding    overlapping windows, each token scored once with at least `seq_len - stride` tokens of context,
    adaptive   document by document in chunks; a chunk is scored first, then a per-document LoRA learns from it.

Run with `torchrun --standalone --nproc_per_node=8 train_gpt.py`.
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
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# ======================================================================================================================
# Settings
# ======================================================================================================================


def parse_setting(name: str, default):
    """The environment's value of a setting, in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        assert raw in ("0", "1"), f"{name} must be 0 or 1, not {raw!r}"
        return raw == "1"
    return type(default)(raw)


def setting(name: str, default):
    """A dataclass field that is read from the environment when the configuration is built."""
    return field(default_factory=lambda: parse_setting(name, default))


@dataclass(frozen=True)
class DataConfig:
    """Where the shards and the tokenizer lie."""

    root: str = setting("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer: str = setting("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    held_out_shards: int = setting("HELD_OUT_SHARDS", 1)

    @property
    def train_pattern(self) -> str:
        return os.path.join(self.root, "fineweb_train_*.bin")

    @property
    def val_pattern(self) -> str:
        return os.path.join(self.root, "fineweb_val_*.bin")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer."""

    vocab_size: int = setting("VOCAB_SIZE", 1024)
    num_layers: int = setting("NUM_LAYERS", 12)
    dim: int = setting("MODEL_DIM", 768)
    num_heads: int = setting("NUM_HEADS", 12)
    num_kv_heads: int = setting("NUM_KV_HEADS", 4)
    mlp_mult: int = setting("MLP_MULT", 3)
    rope_base: float = setting("ROPE_BASE", 10000.0)
    logit_softcap: float = setting("LOGIT_SOFTCAP", 30.0)
    qk_gain: float = setting("QK_GAIN_INIT", 1.5)
    embed_std: float = setting("TIED_EMBED_INIT_STD", 0.005)


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the matrices, Adam for the rest."""

    matrix_lr: float = setting("MATRIX_LR", 0.03)
    embed_lr: float = setting("TIED_EMBED_LR", 0.04)
    scalar_lr: float = setting("SCALAR_LR", 0.03)
    momentum: float = setting("MUON_MOMENTUM", 0.95)
    momentum_start: float = setting("MUON_MOMENTUM_WARMUP_START", 0.85)
    momentum_steps: int = setting("MUON_MOMENTUM_WARMUP_STEPS", 500)
    newton_schulz_steps: int = setting("MUON_BACKEND_STEPS", 5)
    beta1: float = setting("BETA1", 0.9)
    beta2: float = setting("BETA2", 0.95)
    eps: float = setting("ADAM_EPS", 1e-8)
    grad_clip: float = setting("GRAD_CLIP_NORM", 1.0)
    ema_decay: float = setting("EMA_DECAY", 0.997)
    ema_start: int = setting("EMA_START_STEP", 500)


@dataclass(frozen=True)
class ScheduleConfig:
    """Lengths, in steps, tokens and seconds."""

    iterations: int = setting("ITERATIONS", 20000)
    warmup_steps: int = setting("WARMUP_STEPS", 20)
    warmdown_iters: int = setting("WARMDOWN_ITERS", 2000)
    batch_tokens: int = setting("TRAIN_BATCH_TOKENS", 524288)
    seq_len: int = setting("TRAIN_SEQ_LEN", 1024)
    wallclock_s: float = setting("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve_s: float = setting("FINISH_RESERVE_SECONDS", 40.0)
    log_every: int = setting("TRAIN_LOG_EVERY", 200)
    val_every: int = setting("VAL_LOSS_EVERY", 2000)


@dataclass(frozen=True)
class QuantConfig:
    """Ternary quantisation and packing."""

    group: int = setting("TERNARY_GROUP", 128)
    calibration_batches: int = setting("CALIBRATION_BATCHES", 16)
    calibration_rows: int = setting("CALIBRATION_ROWS", 16)
    refit: float = setting("SCALE_REFIT", 0.5)
    limit_bytes: int = setting("SIZE_LIMIT_BYTES", 16_000_000)
    artifact: str = setting("ARTIFACT_PATH", "final_model.ternary.xz")


@dataclass(frozen=True)
class TemperatureConfig:
    """Dynamic temperature, fitted on the held-out training shard."""

    windows: int = setting("TEMP_WINDOWS", 64)
    iterations: int = setting("TEMP_ITERS", 60)
    lr: float = setting("TEMP_LR", 0.02)


@dataclass(frozen=True)
class AdaptConfig:
    """Test-time training by one LoRA per document."""

    rank: int = setting("TTT_LORA_RANK", 8)
    lr: float = setting("TTT_LORA_LR", 0.01)
    batch_docs: int = setting("TTT_BATCH_DOCS", 32)
    chunk: int = setting("TTT_CHUNK", 256)
    steps: int = setting("TTT_STEPS_PER_CHUNK", 1)
    cache_weight: float = setting("CACHE_WEIGHT", 0.03)
    cache_alpha: float = setting("CACHE_ALPHA", 0.1)
    cache_half: float = setting("CACHE_HALF_COUNT", 256.0)


@dataclass(frozen=True)
class EvalConfig:
    """What is scored, how, and for how long."""

    seq_len: int = setting("EVAL_SEQ_LEN", 1024)
    stride: int = setting("EVAL_STRIDE", 64)
    batch_windows: int = setting("EVAL_BATCH_WINDOWS", 64)
    strategies: str = setting("EVAL_STRATEGIES", "full,sliding,adaptive")
    reported: str = setting("EVAL_REPORTED", "adaptive")
    limit_s: float = setting("EVAL_LIMIT_SECONDS", 600.0)
    adapt_until_s: float = setting("EVAL_ADAPT_UNTIL_SECONDS", 480.0)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    run_id: str = setting("RUN_ID", "ternary_lora")
    seed: int = setting("SEED", 1337)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        assert self.model.dim % self.model.num_heads == 0, "MODEL_DIM must divide by NUM_HEADS"
        assert self.model.num_heads % self.model.num_kv_heads == 0, "NUM_HEADS must divide by NUM_KV_HEADS"
        assert self.model.dim % self.quant.group == 0, "MODEL_DIM must divide by TERNARY_GROUP"
        assert self.evaluation.reported in self.evaluation.strategies.split(","), "EVAL_REPORTED is not evaluated"
        assert self.evaluation.seq_len % self.adapt.chunk == 0, "TTT_CHUNK must divide EVAL_SEQ_LEN"
        assert 0 < self.evaluation.stride <= self.evaluation.seq_len


def describe(config, prefix: str = "") -> list[str]:
    """The configuration as lines `section.name=value`."""
    lines = []
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            lines += describe(value, f"{prefix}{f.name}.")
        else:
            lines.append(f"{prefix}{f.name}={value}")
    return lines


# ======================================================================================================================
# Arithmetic helpers
# ======================================================================================================================

LN2 = math.log(2.0)


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    assert b > 0
    return -(-a // b)


def bits_from_nats(nats: float) -> float:
    """Information in bits."""
    return nats / LN2


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """The challenge's score from a total of nats and a total of bytes."""
    assert num_bytes > 0, "nothing was scored"
    return bits_from_nats(nats) / num_bytes


def log_mix(log_p: Tensor, log_q: Tensor, weight: Tensor) -> Tensor:
    """log((1 - w) p + w q) for distributions given by their logarithms; w in [0, 1)."""
    return torch.logaddexp(log_p + torch.log1p(-weight), log_q + torch.log(weight.clamp_min(1e-12)))


def entropy_from_log_probs(log_p: Tensor) -> Tensor:
    """Shannon entropy in nats over the last dimension."""
    return -(log_p.exp() * log_p).sum(dim=-1)


def assert_normalised(log_p: Tensor, tolerance: float = 1e-3) -> None:
    """Every row of `log_p` must be a distribution over the whole vocabulary."""
    total = torch.logsumexp(log_p.double(), dim=-1)
    worst = float(total.abs().max())
    assert worst < tolerance, f"probabilities sum to exp({worst:.2e})"


def pick(log_p: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the targets."""
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# ======================================================================================================================
# Processes, clock and log
# ======================================================================================================================


class Processes:
    """The ranks of a run: who we are and how sums are taken over all of us."""

    def __init__(self) -> None:
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        assert torch.cuda.is_available(), "CUDA is required"
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max(self, value: float) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        if self.distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class Clock:
    """Wall clock that can be held while something is logged that the submission does not need."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def start(self) -> None:
        assert self.since is None, "the clock is running"
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def hold(self) -> None:
        assert self.since is not None, "the clock is not running"
        torch.cuda.synchronize()
        self.spent += time.perf_counter() - self.since
        self.since = None

    def seconds(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.spent + running


class Log:
    """Console and file, written by the main rank."""

    def __init__(self, run_id: str, main: bool) -> None:
        self.main = main
        self.path = Path("logs") / f"{run_id}.txt"
        if main:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, message: str) -> None:
        if not self.main:
            return
        print(message, flush=True)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(message + "\n")


# ======================================================================================================================
# Data
# ======================================================================================================================

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
BOS_ID = 1


def read_shard(path: str) -> Tensor:
    """The tokens of one shard as uint16 values in an int32-safe tensor."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    assert header.size == HEADER_INTS, f"{path}: truncated header"
    assert int(header[0]) == SHARD_MAGIC and int(header[1]) == SHARD_VERSION, f"{path}: not a token shard"
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    assert tokens.size == count, f"{path}: expected {count} tokens, found {tokens.size}"
    return torch.from_numpy(tokens.astype(np.int32))


def list_shards(pattern: str) -> list[str]:
    """Shard files of a pattern in a fixed order."""
    paths = sorted(glob.glob(pattern))
    assert paths, f"no shards match {pattern}"
    return paths


class TokenStream:
    """Endless stream over a list of shards."""

    def __init__(self, paths: list[str]) -> None:
        assert paths
        self.paths = paths
        self.index = 0
        self.position = 0
        self.tokens = read_shard(self.paths[0])

    def advance(self) -> None:
        self.index = (self.index + 1) % len(self.paths)
        self.tokens = read_shard(self.paths[self.index])
        self.position = 0

    def take(self, count: int) -> Tensor:
        parts = []
        while count > 0:
            available = self.tokens.numel() - self.position
            if available <= 0:
                self.advance()
                continue
            step = min(available, count)
            parts.append(self.tokens[self.position : self.position + step])
            self.position += step
            count -= step
        return torch.cat(parts)


class TrainLoader:
    """Batches of training tokens; each rank reads the same stream and keeps its own span of it."""

    def __init__(self, config: DataConfig, procs: Processes) -> None:
        self.procs = procs
        shards = list_shards(config.train_pattern)
        assert len(shards) > config.held_out_shards, "no training shard is left beside the held-out ones"
        self.train_shards = shards[: len(shards) - config.held_out_shards]
        self.held_out = shards[len(shards) - config.held_out_shards :]
        self.stream = TokenStream(self.train_shards)

    def next(self, rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of shape [rows, seq_len] for this rank."""
        span = rows * seq_len + 1
        block = self.stream.take(span * self.procs.world)
        local = block[self.procs.rank * span : (self.procs.rank + 1) * span].to(self.procs.device, dtype=torch.int64)
        return local[:-1].view(rows, seq_len), local[1:].view(rows, seq_len)

    def held_out_windows(self, windows: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Windows of the held-out training shard, another part of it on each rank."""
        tokens = read_shard(self.held_out[0])
        start = self.procs.rank * windows * seq_len
        local = tokens[start : start + windows * seq_len + 1].to(self.procs.device, dtype=torch.int64)
        assert local.numel() == windows * seq_len + 1, "the held-out shard is too short"
        return local[:-1].view(windows, seq_len), local[1:].view(windows, seq_len)


@dataclass(frozen=True)
class Document:
    """A document of the validation stream: its tokens from its BOS to the next document's, which is its last target."""

    start: int
    stop: int

    @property
    def targets(self) -> int:
        return self.stop - self.start - 1


class ValidationText:
    """The fixed validation split as one stream of tokens."""

    def __init__(self, pattern: str) -> None:
        self.tokens = torch.cat([read_shard(path) for path in list_shards(pattern)]).to(torch.int64)
        assert self.tokens.numel() > 1

    @property
    def num_targets(self) -> int:
        return self.tokens.numel() - 1

    def documents(self) -> list[Document]:
        """All documents in the order of the stream; together they cover every target once."""
        starts = (self.tokens == BOS_ID).nonzero(as_tuple=True)[0].tolist()
        assert starts and starts[0] == 0, "the stream must begin with a document"
        stops = [s + 1 for s in starts[1:]] + [self.tokens.numel()]
        found = [Document(a, b) for a, b in zip(starts, stops) if b - a > 1]
        assert sum(d.targets for d in found) == self.num_targets
        return found


# ======================================================================================================================
# Bytes
# ======================================================================================================================


class ByteTable:
    """UTF-8 bytes of the original text that a token stands for, given the token before it."""

    def __init__(self, tokenizer: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> None:
        assert tokenizer.vocab_size() <= vocab_size, "the model's vocabulary is smaller than the tokenizer's"
        base = torch.zeros(vocab_size, dtype=torch.int32)
        leading = torch.zeros(vocab_size, dtype=torch.bool)
        boundary = torch.ones(vocab_size, dtype=torch.bool)
        for token in range(tokenizer.vocab_size()):
            if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
                continue
            boundary[token] = False
            if tokenizer.is_byte(token):
                base[token] = 1
                continue
            piece = tokenizer.id_to_piece(token)
            if piece.startswith("\u2581"):
                leading[token] = True
                piece = piece[1:]
            base[token] = len(piece.encode("utf-8"))
        self.base = base.to(device)
        self.leading = leading.to(device)
        self.boundary = boundary.to(device)

    def count(self, previous: Tensor, targets: Tensor) -> Tensor:
        """Bytes of each target; a leading space is one byte unless the text begins there."""
        space = self.leading[targets] & ~self.boundary[previous]
        return self.base[targets] + space.to(torch.int32)


class ByteLedger:
    """Accumulates nats, bytes and tokens in float64 and turns them into bits per byte."""

    def __init__(self, table: ByteTable, procs: Processes) -> None:
        self.table = table
        self.procs = procs
        self.nats = torch.zeros((), dtype=torch.float64, device=procs.device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=procs.device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=procs.device)
        self.closed = False

    @torch.no_grad()
    def add(self, nll: Tensor, previous: Tensor, targets: Tensor) -> None:
        """Enters the losses of tokens that have not been entered before."""
        assert not self.closed, "the ledger is closed"
        assert nll.shape == previous.shape == targets.shape, "losses and tokens do not match"
        self.nats += nll.detach().double().sum()
        self.bytes += self.table.count(previous, targets).double().sum()
        self.tokens += targets.numel()

    def close(self, expected_tokens: int) -> None:
        """Sums over the ranks and checks that every target was entered once."""
        assert not self.closed
        for total in (self.nats, self.bytes, self.tokens):
            self.procs.sum_(total)
        self.closed = True
        assert int(self.tokens) == expected_tokens, f"{int(self.tokens)} tokens entered, not {expected_tokens}"

    def loss(self) -> float:
        assert self.closed
        return float(self.nats / self.tokens)

    def bpb(self) -> float:
        assert self.closed
        return bits_per_byte(float(self.nats), float(self.bytes))


# ======================================================================================================================
# Ternary layers
# ======================================================================================================================


class Ternary:
    """Arithmetic of grouped ternary matrices: w ~ scale[group] * code, code in {-1, 0, 1}."""

    @staticmethod
    def scales(weight: Tensor, group: int) -> Tensor:
        """Mean absolute value of each group of `group` inputs, shape [out, groups]."""
        rows, cols = weight.shape
        assert cols % group == 0
        return weight.view(rows, cols // group, group).abs().mean(dim=-1).clamp_min(1e-8)

    @staticmethod
    def codes(weight: Tensor, scales: Tensor, group: int) -> Tensor:
        rows, cols = weight.shape
        scaled = weight.view(rows, cols // group, group) / scales.unsqueeze(-1)
        return scaled.round().clamp(-1, 1).view(rows, cols)

    @staticmethod
    def dequantise(codes: Tensor, scales: Tensor, group: int) -> Tensor:
        rows, cols = codes.shape
        return (codes.view(rows, cols // group, group) * scales.unsqueeze(-1)).view(rows, cols)


class TernaryLinear(nn.Module):
    """Linear layer that computes with ternary weights and passes gradients straight through to the latent ones.

    After the packed model is read back the weights are ternary already; `frozen` then skips the quantiser.
    """

    def __init__(self, in_features: int, out_features: int, group: int, zero: bool = False) -> None:
        super().__init__()
        self.group = group
        self.frozen = False
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        bound = math.sqrt(3.0) / math.sqrt(in_features)
        if zero:
            nn.init.normal_(self.weight, std=1e-3)
        else:
            nn.init.uniform_(self.weight, -bound, bound)

    def effective_weight(self) -> Tensor:
        if self.frozen:
            return self.weight
        with torch.no_grad():
            scales = Ternary.scales(self.weight, self.group)
            ternary = Ternary.dequantise(Ternary.codes(self.weight, scales, self.group), scales, self.group)
        return self.weight + (ternary - self.weight).detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight().to(x.dtype))


# ======================================================================================================================
# Transformer
# ======================================================================================================================


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Rotary position embedding in half-split form."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        self.register_buffer("inv_freq", inv, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, heads, time, head_dim]."""
        steps = torch.arange(x.size(2), device=x.device, dtype=torch.float32)
        angles = torch.outer(steps, self.inv_freq.float())
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class LowRank(nn.Module):
    """One low-rank map per document of a batch: x[d] @ down[d] @ up[d]. It begins as zero."""

    def __init__(self, docs: int, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.std = 1.0 / math.sqrt(in_features)
        self.down = nn.Parameter(torch.empty(docs, in_features, rank))
        self.up = nn.Parameter(torch.empty(docs, rank, out_features))

    @torch.no_grad()
    def reset(self) -> None:
        self.down.normal_(std=self.std)
        self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class DocumentLoRA(nn.Module):
    """The adapters of a batch of documents: queries and values of every block, and the output head."""

    def __init__(self, config: ModelConfig, docs: int, rank: int) -> None:
        super().__init__()
        kv_dim = config.dim // config.num_heads * config.num_kv_heads
        self.docs = docs
        self.q = nn.ModuleList(LowRank(docs, config.dim, config.dim, rank) for _ in range(config.num_layers))
        self.v = nn.ModuleList(LowRank(docs, config.dim, kv_dim, rank) for _ in range(config.num_layers))
        self.head = LowRank(docs, config.dim, config.vocab_size, rank)
        self.reset()

    def reset(self) -> None:
        for module in self.modules():
            if isinstance(module, LowRank):
                module.reset()


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys."""

    def __init__(self, config: ModelConfig, group: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.dim // config.num_heads
        kv_dim = self.head_dim * config.num_kv_heads
        self.q = TernaryLinear(config.dim, config.dim, group)
        self.k = TernaryLinear(config.dim, kv_dim, group)
        self.v = TernaryLinear(config.dim, kv_dim, group)
        self.out = TernaryLinear(config.dim, config.dim, group, zero=True)
        self.gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain))
        self.rotary = Rotary(self.head_dim, config.rope_base)

    def forward(self, x: Tensor, lora_q: LowRank | None = None, lora_v: LowRank | None = None) -> Tensor:
        batch, steps, dim = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if lora_q is not None:
            q = q + lora_q(x)
        if lora_v is not None:
            v = v + lora_v(x)
        q = q.view(batch, steps, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, steps, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch, steps, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = self.rotary(rms_norm(q)) * self.gain.to(q.dtype)[None, :, None, None]
        k = self.rotary(rms_norm(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads)
        return self.out(y.transpose(1, 2).reshape(batch, steps, dim))


class MLP(nn.Module):
    """Two ternary matrices around a squared ReLU."""

    def __init__(self, config: ModelConfig, group: int) -> None:
        super().__init__()
        hidden = config.dim * config.mlp_mult
        self.up = TernaryLinear(config.dim, hidden, group)
        self.down = TernaryLinear(hidden, config.dim, group, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Attention and MLP with learned residual scales and a skip from the embedding."""

    def __init__(self, config: ModelConfig, group: int) -> None:
        super().__init__()
        self.attn = Attention(config, group)
        self.mlp = MLP(config, group)
        self.attn_scale = nn.Parameter(torch.ones(config.dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(config.dim), torch.zeros(config.dim))))

    def forward(self, x: Tensor, x0: Tensor, lora_q: LowRank | None, lora_v: LowRank | None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x), lora_q, lora_v)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))


class GPT(nn.Module):
    """The language model. `forward` gives the training loss, `token_logits` the logits of every position."""

    def __init__(self, config: ModelConfig, group: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embed.weight, std=config.embed_std)
        self.blocks = nn.ModuleList(Block(config, group) for _ in range(config.num_layers))

    def token_logits(self, tokens: Tensor, lora: DocumentLoRA | None = None) -> Tensor:
        """Logits of shape [batch, time, vocab] in float32; position t has seen tokens up to t."""
        x = rms_norm(self.embed(tokens))
        x0 = x
        for i, block in enumerate(self.blocks):
            x = block(x, x0, lora.q[i] if lora is not None else None, lora.v[i] if lora is not None else None)
        x = rms_norm(x)
        raw = F.linear(x, self.embed.weight.to(x.dtype))
        if lora is not None:
            raw = raw + lora.head(x)
        cap = self.config.logit_softcap
        return cap * torch.tanh(raw.float() / cap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.token_logits(tokens)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    def ternary_layers(self) -> dict[str, TernaryLinear]:
        return {name: module for name, module in self.named_modules() if isinstance(module, TernaryLinear)}

    def freeze_ternary(self) -> None:
        for layer in self.ternary_layers().values():
            layer.frozen = True


def autocast():
    return torch.autocast(device_type="cuda", dtype=torch.bfloat16)


# ======================================================================================================================
# Optimisation
# ======================================================================================================================


def orthogonalise(grad: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Quintic Newton-Schulz iteration towards the nearest semi-orthogonal matrix."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = grad.bfloat16()
    x = x / (x.norm() + eps)
    transposed = x.size(0) > x.size(1)
    if transposed:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz; the matrices are shared out among the ranks."""

    def __init__(self, params, lr: float, momentum: float, steps: int, procs: Processes) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps))
        self.procs = procs

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            updates = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cursor = 0
            for i, p in enumerate(params):
                if i % self.procs.world == self.procs.rank and p.grad is not None:
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(p.grad)
                    buffer = state["buffer"]
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    update = orthogonalise(p.grad.add(buffer, alpha=group["momentum"]), group["steps"])
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    updates[cursor : cursor + p.numel()] = update.reshape(-1)
                cursor += p.numel()
            self.procs.sum_(updates)
            cursor = 0
            for p in params:
                p.add_(updates[cursor : cursor + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                cursor += p.numel()


class OptimizerBank:
    """The optimizers of a model with one schedule over all of them."""

    def __init__(self, model: GPT, config: OptimConfig, procs: Processes) -> None:
        self.config = config
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 2]
        scalars = [p for p in model.blocks.parameters() if p.ndim != 2 or min(p.shape) <= 2]
        assert len(matrices) + len(scalars) + 1 == len(list(model.parameters())), "a parameter has no optimizer"
        betas = (config.beta1, config.beta2)
        self.muon = Muon(matrices, config.matrix_lr, config.momentum, config.newton_schulz_steps, procs)
        self.embed = torch.optim.Adam([model.embed.weight], lr=config.embed_lr, betas=betas, eps=config.eps, fused=True)
        self.scalar = torch.optim.Adam(scalars, lr=config.scalar_lr, betas=betas, eps=config.eps, fused=True)
        self.all = [self.muon, self.embed, self.scalar]
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    def step(self, step: int, lr_scale: float) -> None:
        fraction = min(step / max(self.config.momentum_steps, 1), 1.0)
        momentum = (1 - fraction) * self.config.momentum_start + fraction * self.config.momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> list[dict]:
        return [copy.deepcopy(optimizer.state_dict()) for optimizer in self.all]

    def restore(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


class Average:
    """Exponential moving average of the latent weights."""

    def __init__(self, model: GPT, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] | None = None
        self.model = model

    @torch.no_grad()
    def update(self) -> None:
        if self.values is None:
            self.values = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            return
        for name, p in self.model.named_parameters():
            self.values[name].lerp_(p.detach(), 1.0 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Puts the average in place of the last weights; nothing to do where training was too short for one."""
        if self.values is None:
            return
        for name, p in self.model.named_parameters():
            p.copy_(self.values[name])


# ======================================================================================================================
# Calibration and dynamic temperature, both on training shards and inside the training budget
# ======================================================================================================================


class InputMoments:
    """Mean square of every input of every ternary layer: the diagonal of the layer's Hessian."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def hook(self, name: str):
        def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            total = x.square().sum(dim=0)
            self.sums[name] = total if name not in self.sums else self.sums[name] + total
            self.counts[name] = self.counts.get(name, 0) + x.size(0)

        return observe

    @torch.no_grad()
    def collect(self, loader: TrainLoader, batches: int, rows: int, seq_len: int) -> dict[str, Tensor]:
        """Runs training batches through the model and returns the moments, averaged over the ranks."""
        handles = [layer.register_forward_hook(self.hook(name)) for name, layer in self.model.ternary_layers().items()]
        try:
            for _ in range(batches):
                inputs, _ = loader.next(rows, seq_len)
                with autocast():
                    self.model.token_logits(inputs)
        finally:
            for handle in handles:
                handle.remove()
        moments = {}
        for name in self.sums:
            moments[name] = loader.procs.sum_(self.sums[name] / self.counts[name]) / loader.procs.world
        return moments


def refit_scales(weight: Tensor, codes: Tensor, scales: Tensor, moment: Tensor, group: int, amount: float) -> Tensor:
    """Moves the scales towards the least-squares ones under the inputs' second moments; the codes stay."""
    rows, cols = weight.shape
    shape = (rows, cols // group, group)
    w, c, h = weight.view(shape), codes.view(shape), moment.view(1, cols // group, group)
    best = (h * w * c).sum(dim=-1) / (h * c * c).sum(dim=-1).clamp_min(1e-12)
    best = torch.where(best > 0, best, scales)
    return torch.lerp(scales, best, amount)


class DynamicTemperature:
    """A temperature that is a function of the prediction's own entropy: ln T = offset + slope (H - pivot).

    H is the entropy of the untempered distribution, so that T is known before the next token is.
    """

    def __init__(self, offset: float = 0.0, slope: float = 0.0, pivot: float = 0.0) -> None:
        self.offset, self.slope, self.pivot = offset, slope, pivot

    def log_probs(self, logits: Tensor) -> Tensor:
        entropy = entropy_from_log_probs(F.log_softmax(logits, dim=-1))
        temperature = torch.exp(self.offset + self.slope * (entropy - self.pivot))
        return F.log_softmax(logits / temperature.unsqueeze(-1), dim=-1)

    def values(self) -> dict[str, float]:
        return dict(offset=self.offset, slope=self.slope, pivot=self.pivot)

    @classmethod
    def fit(cls, model: GPT, inputs: Tensor, targets: Tensor, config: TemperatureConfig, procs: Processes):
        """Minimises the loss of the given windows over offset and slope."""
        with torch.no_grad(), autocast():
            logits = torch.cat([model.token_logits(rows) for rows in inputs.split(8)])
        with torch.no_grad():
            entropy = entropy_from_log_probs(F.log_softmax(logits, dim=-1))
            pivot = float(procs.sum_(entropy.mean())) / procs.world
        params = torch.zeros(2, device=logits.device, requires_grad=True)
        optimizer = torch.optim.Adam([params], lr=config.lr)
        for _ in range(config.iterations):
            temperature = torch.exp(params[0] + params[1] * (entropy - pivot))
            loss = F.cross_entropy((logits / temperature.unsqueeze(-1)).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            procs.sum_(params.grad).div_(procs.world)
            optimizer.step()
        offset, slope = params.detach().tolist()
        return cls(offset, slope, pivot)


# ======================================================================================================================
# Packing
# ======================================================================================================================

TRITS_PER_BYTE = 5
POWERS = (1, 3, 9, 27, 81)


def pack_trits(codes: Tensor) -> Tensor:
    """Codes in {-1, 0, 1} as base-3 numbers, five to a byte."""
    digits = (codes.reshape(-1).to(torch.int16) + 1).cpu()
    assert int(digits.min()) >= 0 and int(digits.max()) <= 2, "not ternary"
    padding = -digits.numel() % TRITS_PER_BYTE
    digits = F.pad(digits, (0, padding)).view(-1, TRITS_PER_BYTE)
    return (digits * torch.tensor(POWERS, dtype=torch.int16)).sum(dim=1).to(torch.uint8)


def unpack_trits(packed: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `pack_trits`."""
    digits = packed.to(torch.int16).unsqueeze(1) // torch.tensor(POWERS, dtype=torch.int16) % 3
    return (digits.reshape(-1)[: rows * cols] - 1).view(rows, cols).float()


class Artifact:
    """The packed model: ternary matrices in base 3, the embedding in eight bits, the small tensors in halves."""

    def __init__(self, config: QuantConfig) -> None:
        self.config = config
        self.path = Path(config.artifact)

    def encode(self, model: GPT, moments: dict[str, Tensor], temperature: DynamicTemperature) -> bytes:
        """The artifact's bytes."""
        group = self.config.group
        packed: dict[str, object] = {"temperature": temperature.values()}
        layers = model.ternary_layers()
        for name, layer in layers.items():
            weight = layer.weight.detach().float()
            scales = Ternary.scales(weight, group)
            codes = Ternary.codes(weight, scales, group)
            scales = refit_scales(weight, codes, scales, moments[name], group, self.config.refit)
            packed[f"{name}.weight"] = ("ternary", pack_trits(codes), scales.half().cpu(), tuple(weight.shape))
        for name, parameter in model.named_parameters():
            if name in packed:
                continue
            value = parameter.detach().float()
            if name == "embed.weight":
                scale = (value.abs().amax(dim=1, keepdim=True) / 127.0).clamp_min(1e-8).half().float()
                codes = (value / scale).round().clamp(-127, 127).to(torch.int8)
                packed[name] = ("int8", codes.cpu(), scale.half().cpu())
            else:
                packed[name] = ("half", value.half().cpu())
        buffer = io.BytesIO()
        torch.save(packed, buffer)
        return lzma.compress(buffer.getvalue(), preset=6)

    def write(self, blob: bytes, log: Log) -> None:
        """Writes the file and prints the submission's size."""
        self.path.write_bytes(blob)
        model_bytes = self.path.stat().st_size
        code_bytes = Path(__file__).stat().st_size
        total = model_bytes + code_bytes
        log(f"artifact: model {model_bytes} bytes, code {code_bytes} bytes")
        log(f"Total submission size: {total} bytes")
        assert total <= self.config.limit_bytes, f"submission is {total} bytes, limit {self.config.limit_bytes}"

    @torch.no_grad()
    def read(self, model: GPT) -> DynamicTemperature:
        """Fills the model from the file and returns the temperature stored with it."""
        packed = torch.load(io.BytesIO(lzma.decompress(self.path.read_bytes())), map_location="cpu", weights_only=True)
        for name, parameter in model.named_parameters():
            kind, *parts = packed[name]
            if kind == "ternary":
                trits, scales, (rows, cols) = parts
                codes = unpack_trits(trits, rows, cols)
                value = Ternary.dequantise(codes, scales.float(), self.config.group)
            elif kind == "int8":
                value = parts[0].float() * parts[1].float()
            else:
                assert kind == "half"
                value = parts[0].float()
            assert value.shape == parameter.shape, name
            parameter.copy_(value)
        model.freeze_ternary()
        return DynamicTemperature(**packed["temperature"])


# ======================================================================================================================
# Evaluation
# ======================================================================================================================


class DocumentCache:
    """Smoothed unigram counts of the tokens that a document has been scored on, one row per document of a batch.

    p(a) = (count(a) + alpha) / (n + alpha V) sums to one over the vocabulary.
    """

    def __init__(self, docs: int, vocab_size: int, config: AdaptConfig, device: torch.device) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.counts = torch.zeros(docs, vocab_size, device=device)

    def log_probs(self) -> Tensor:
        """[docs, 1, vocab]"""
        total = self.counts.sum(dim=-1, keepdim=True)
        p = (self.counts + self.config.cache_alpha) / (total + self.config.cache_alpha * self.vocab_size)
        return p.log().unsqueeze(1)

    def weight(self) -> Tensor:
        """Share of the cache in the mixture: it grows with the number of tokens seen. [docs, 1, 1]"""
        total = self.counts.sum(dim=-1)
        return (self.config.cache_weight * total / (total + self.config.cache_half))[:, None, None]

    @torch.no_grad()
    def observe(self, targets: Tensor, mask: Tensor) -> None:
        self.counts.scatter_add_(1, targets, mask.float())


class Strategy:
    """A way to score the validation text. `run` enters every target into the ledger exactly once over all ranks."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.model = evaluator.model
        self.text = evaluator.text
        self.config = evaluator.config.evaluation
        self.procs = evaluator.procs
        self.temperature = evaluator.temperature

    def run(self, ledger: ByteLedger) -> None:
        raise NotImplementedError

    def mine(self, items: list) -> list:
        """This rank's share of a list of independent pieces of work."""
        return items[self.procs.rank :: self.procs.world]


class WindowStrategy(Strategy):
    """Scores windows (start, first scored target, stop), given as positions of targets in the stream."""

    def windows(self) -> list[tuple[int, int, int]]:
        raise NotImplementedError

    @torch.no_grad()
    def run(self, ledger: ByteLedger) -> None:
        mine = self.mine(self.windows())
        seq_len = self.config.seq_len
        for first in range(0, len(mine), self.config.batch_windows):
            batch = mine[first : first + self.config.batch_windows]
            inputs = torch.zeros(len(batch), seq_len, dtype=torch.int64)
            targets = torch.zeros(len(batch), seq_len, dtype=torch.int64)
            mask = torch.zeros(len(batch), seq_len, dtype=torch.bool)
            for row, (start, scored, stop) in enumerate(batch):
                inputs[row, : stop - start] = self.text.tokens[start:stop]
                targets[row, : stop - start] = self.text.tokens[start + 1 : stop + 1]
                mask[row, scored - start : stop - start] = True
            inputs, targets, mask = (t.to(self.procs.device) for t in (inputs, targets, mask))
            with autocast():
                logits = self.model.token_logits(inputs)
            nll = pick(self.temperature.log_probs(logits), targets)
            ledger.add(nll[mask], inputs[mask], targets[mask])


class FullWindows(WindowStrategy):
    """Disjoint windows."""

    def windows(self) -> list[tuple[int, int, int]]:
        total, seq_len = self.text.num_targets, self.config.seq_len
        return [(s, s, min(s + seq_len, total)) for s in range(0, total, seq_len)]


class SlidingWindows(WindowStrategy):
    """Windows that end every `stride` targets; each scores the targets that no earlier one reached."""

    def windows(self) -> list[tuple[int, int, int]]:
        total, seq_len, stride = self.text.num_targets, self.config.seq_len, self.config.stride
        found = [(0, 0, min(seq_len, total))]
        while found[-1][2] < total:
            scored = found[-1][2]
            stop = min(scored + stride, total)
            found.append((max(0, stop - seq_len), scored, stop))
        return found


class AdaptiveDocuments(Strategy):
    """Test-time training: a LoRA per document, reset before each, that learns a chunk after it has been scored."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__(evaluator)
        self.adapt = evaluator.config.adapt
        self.vocab_size = evaluator.config.model.vocab_size
        self.loras: dict[int, DocumentLoRA] = {}

    def lora(self, docs: int) -> DocumentLoRA:
        """Adapters for so many documents, in their initial state."""
        if docs not in self.loras:
            self.loras[docs] = DocumentLoRA(self.evaluator.config.model, docs, self.adapt.rank).to(self.procs.device)
        self.loras[docs].reset()
        return self.loras[docs]

    def batches(self) -> list[list[Document]]:
        """Documents in the order of the stream, a fixed number at a time."""
        documents = self.text.documents()
        size = self.adapt.batch_docs
        return [documents[i : i + size] for i in range(0, len(documents), size)]

    def run(self, ledger: ByteLedger) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for batch in self.mine(self.batches()):
            self.score_batch(batch, ledger)

    def chunk(self, batch: list[Document], index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and the mask of the targets of chunk `index`, with the context that precedes them."""
        stop = (index + 1) * self.adapt.chunk
        start = max(0, stop - self.config.seq_len)
        width = stop - start
        inputs = torch.zeros(len(batch), width, dtype=torch.int64)
        targets = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, document in enumerate(batch):
            tokens = self.text.tokens[document.start : document.stop]
            end = min(stop, document.targets)
            if end <= start:
                continue
            inputs[row, : end - start] = tokens[start:end]
            targets[row, : end - start] = tokens[start + 1 : end + 1]
            mask[row, index * self.adapt.chunk - start : max(end - start, 0)] = True
        return tuple(t.to(self.procs.device) for t in (inputs, targets, mask))

    def predict(self, logits: Tensor, cache: DocumentCache) -> Tensor:
        """The distribution of every position over the vocabulary: tempered model and document cache, mixed."""
        log_p = self.temperature.log_probs(logits)
        return log_mix(log_p, cache.log_probs(), cache.weight())

    def score_batch(self, batch: list[Document], ledger: ByteLedger) -> None:
        lora = self.lora(len(batch))
        optimizer = torch.optim.Adam(lora.parameters(), lr=self.adapt.lr, betas=(0.9, 0.95), eps=1e-10)
        cache = DocumentCache(len(batch), self.vocab_size, self.adapt, self.procs.device)
        chunks = ceil_div(max(d.targets for d in batch), self.adapt.chunk)
        for index in range(chunks):
            inputs, targets, mask = self.chunk(batch, index)
            with torch.no_grad(), autocast():
                logits = self.model.token_logits(inputs, lora)
            log_p = self.predict(logits, cache)
            if index == 0:
                assert_normalised(log_p[:1])
            nll = pick(log_p, targets)
            ledger.add(nll[mask], inputs[mask], targets[mask])
            if index + 1 < chunks and self.evaluator.may_adapt():
                self.learn(lora, optimizer, inputs, targets, mask)
            cache.observe(targets, mask)

    def learn(self, lora: DocumentLoRA, optimizer, inputs: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Gradient steps on a chunk that has been scored. Documents do not share parameters, so losses are summed."""
        for _ in range(self.adapt.steps):
            with autocast():
                logits = self.model.token_logits(inputs, lora)
            loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            loss = ((loss * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


STRATEGIES: dict[str, type[Strategy]] = {
    "full": FullWindows,
    "sliding": SlidingWindows,
    "adaptive": AdaptiveDocuments,
}


@dataclass(frozen=True)
class Score:
    """Result of one strategy."""

    loss: float
    bpb: float
    seconds: float


class Evaluator:
    """Scores the validation text by one strategy at a time and keeps the evaluation's clock."""

    def __init__(
        self,
        config: RunConfig,
        model: GPT,
        text: ValidationText,
        table: ByteTable,
        temperature: DynamicTemperature,
        procs: Processes,
    ) -> None:
        self.config = config
        self.model = model
        self.text = text
        self.table = table
        self.temperature = temperature
        self.procs = procs
        self.clock = Clock()

    def may_adapt(self) -> bool:
        """Whether time is left to learn; once it is short the remaining documents are scored without."""
        return self.clock.seconds() < self.config.evaluation.adapt_until_s

    def score(self, strategy: str) -> Score:
        """Runs a strategy over the whole split."""
        began = time.perf_counter()
        self.model.eval()
        ledger = ByteLedger(self.table, self.procs)
        STRATEGIES[strategy](self).run(ledger)
        ledger.close(self.text.num_targets)
        seconds = self.procs.max(time.perf_counter() - began)
        return Score(ledger.loss(), ledger.bpb(), seconds)


# ======================================================================================================================
# The run
# ======================================================================================================================


class Experiment:
    """Training, packing and evaluation of one seed."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.procs = Processes()
        assert 8 % self.procs.world == 0, "the number of ranks must divide eight"
        self.accumulation = 8 // self.procs.world
        self.log = Log(config.run_id, self.procs.main)
        self.seed_everything(config.seed)
        for line in describe(config):
            self.log(line)
        self.log(f"python {sys.version.split()[0]} torch {torch.__version__} world {self.procs.world}")

        tokenizer = spm.SentencePieceProcessor(model_file=config.data.tokenizer)
        assert tokenizer.bos_id() == BOS_ID
        self.table = ByteTable(tokenizer, config.model.vocab_size, self.procs.device)
        self.text = ValidationText(config.data.val_pattern)
        self.loader = TrainLoader(config.data, self.procs)
        self.log(f"shards: {len(self.loader.train_shards)} train, {len(self.loader.held_out)} held out")
        self.log(f"validation: {self.text.num_targets} targets")

        self.model = GPT(config.model, config.quant.group).to(self.procs.device)
        self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
        self.train_model = (
            DDP(self.compiled, device_ids=[self.procs.local], broadcast_buffers=False)
            if self.procs.distributed
            else self.compiled
        )
        self.bank = OptimizerBank(self.model, config.optim, self.procs)
        self.average = Average(self.model, config.optim.ema_decay)
        self.clock = Clock()
        self.log(f"parameters: {sum(p.numel() for p in self.model.parameters())}")

    @staticmethod
    def seed_everything(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True

    # ---- training

    @property
    def train_seconds(self) -> float:
        """Seconds for the steps; what remains of the budget is for calibration, temperature and packing."""
        return self.config.schedule.wallclock_s - self.config.schedule.reserve_s

    def lr_scale(self, step: int) -> float:
        """One until the time left equals the warm-down's share, then linear to zero."""
        elapsed = self.clock.seconds()
        step_s = elapsed / max(step, 1)
        warmdown_s = self.config.schedule.warmdown_iters * step_s
        remaining_s = max(self.train_seconds - elapsed, 0.0)
        return remaining_s / max(warmdown_s, 1e-9) if remaining_s <= warmdown_s else 1.0

    def train_step(self, step: int, lr_scale: float) -> Tensor:
        """One optimizer step over `accumulation` micro-batches; returns the mean loss of this rank."""
        schedule = self.config.schedule
        rows = schedule.batch_tokens // (self.procs.world * self.accumulation * schedule.seq_len)
        assert rows > 0
        self.bank.zero_grad()
        total = torch.zeros((), device=self.procs.device)
        for micro in range(self.accumulation):
            last = micro == self.accumulation - 1
            hold = nullcontext() if last or not self.procs.distributed else self.train_model.no_sync()
            inputs, targets = self.loader.next(rows, schedule.seq_len)
            with hold:
                with autocast():
                    loss = self.train_model(inputs, targets)
                (loss / self.accumulation).backward()
            total += loss.detach() / self.accumulation
        if self.config.optim.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip)
        self.bank.step(step, lr_scale)
        return total

    def warm_up(self) -> None:
        """Compiles the step on training batches, then puts weights, optimizers and stream back."""
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        optimizers = self.bank.state()
        self.model.train()
        for step in range(self.config.schedule.warmup_steps):
            self.train_step(step, 1.0)
        self.model.load_state_dict(weights)
        self.bank.restore(optimizers)
        self.bank.zero_grad()
        self.loader = TrainLoader(self.config.data, self.procs)
        self.log(f"warm-up: {self.config.schedule.warmup_steps} steps, state restored")

    def validate(self, step: int) -> None:
        """Logs the validation loss of the weights as they are; nothing depends on it."""
        evaluator = Evaluator(self.config, self.model, self.text, self.table, DynamicTemperature(), self.procs)
        score = evaluator.score("full")
        self.log(f"step:{step} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} train_time:{self.clock.seconds():.1f}s")
        self.model.train()

    def train(self) -> None:
        """Steps until the iterations or the seconds are used up."""
        schedule = self.config.schedule
        self.procs.barrier()
        self.model.train()
        self.clock.start()
        step = 0
        while step < schedule.iterations:
            if schedule.val_every > 0 and step % schedule.val_every == 0:
                self.clock.hold()
                self.validate(step)
                self.procs.barrier()
                self.clock.start()
            loss = self.train_step(step, self.lr_scale(step))
            step += 1
            if step >= self.config.optim.ema_start:
                self.average.update()
            if step <= 5 or step % schedule.log_every == 0:
                seconds = self.clock.seconds()
                self.log(f"step:{step} train_loss:{float(loss):.4f} train_time:{seconds:.1f}s avg:{1e3 * seconds / step:.1f}ms")
            if step % 10 == 0 and self.procs.max(self.clock.seconds()) >= self.train_seconds:
                self.log(f"stopping: {self.clock.seconds():.1f}s used, step {step}")
                break
        self.log(f"peak memory: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- from latent weights to the artifact

    def finish(self) -> Artifact:
        """Average, calibrate, fit the temperature and pack, all on the training clock."""
        config = self.config
        self.average.apply()
        self.model.eval()
        began = self.clock.seconds()
        moments = InputMoments(self.model).collect(
            self.loader, config.quant.calibration_batches, config.quant.calibration_rows, config.schedule.seq_len
        )
        self.log(f"calibration: {config.quant.calibration_batches} training batches, {self.clock.seconds() - began:.1f}s")
        inputs, targets = self.loader.held_out_windows(config.temperature.windows, config.schedule.seq_len)
        temperature = DynamicTemperature.fit(self.model, inputs, targets, config.temperature, self.procs)
        self.log(f"temperature on held-out training shard: {temperature.values()}")
        artifact = Artifact(config.quant)
        if self.procs.main:
            artifact.write(artifact.encode(self.model, moments, temperature), self.log)
        self.procs.barrier()
        self.clock.hold()
        used = self.procs.max(self.clock.seconds())
        self.log(f"training, calibration and packing: {used:.1f}s of {config.schedule.wallclock_s:.0f}s")
        assert used <= config.schedule.wallclock_s, f"training took {used:.1f}s"
        return artifact

    # ---- evaluation

    def evaluate(self, artifact: Artifact) -> Score:
        """Reads the artifact into a fresh model, scores it by every strategy and returns the reported one."""
        config = self.config
        clock = Clock()
        clock.start()
        model = GPT(config.model, config.quant.group).to(self.procs.device)
        temperature = artifact.read(model)
        evaluator = Evaluator(config, model, self.text, self.table, temperature, self.procs)
        evaluator.clock = clock
        scores: dict[str, Score] = {}
        for strategy in config.evaluation.strategies.split(","):
            scores[strategy] = evaluator.score(strategy)
            s = scores[strategy]
            self.log(f"eval {strategy} val_loss:{s.loss:.6f} val_bpb:{s.bpb:.6f} time:{s.seconds:.1f}s")
        clock.hold()
        used = self.procs.max(clock.seconds())
        self.log(f"evaluation: {used:.1f}s of {config.evaluation.limit_s:.0f}s")
        assert used <= config.evaluation.limit_s, f"evaluation took {used:.1f}s"
        return scores[config.evaluation.reported]

    def run(self) -> None:
        self.warm_up()
        self.train()
        artifact = self.finish()
        score = self.evaluate(artifact)
        self.log(f"final {self.config.evaluation.reported} val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
        self.procs.close()


def main() -> None:
    Experiment(RunConfig()).run()


if __name__ == "__main__":
    main()
