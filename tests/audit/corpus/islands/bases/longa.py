"""
Parameter Golf submission: LoRA test-time training with Polyak-averaged adapters.

This script is a reorganised version of the official baseline. It contains the whole pipeline:

    1. ``Trainer``          trains the transformer on the FineWeb training shards (Muon + Adam, EMA of the weights).
    2. ``Quantizer``        int6 GPTQ; the Hessians come from *training* batches and are collected inside the
                            600 s training budget.
    3. ``ArtifactPacker``   serialises the model, compresses it (zstd) and verifies the submission size.
    4. ``TTTEvaluator``     scores the validation split document by document. Every chunk is scored first and only
                            afterwards used to update the document's LoRA adapters and the bigram cache.

Run with:

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import logging
import math
import os
import random
import subprocess
import sys
import time
import uuid
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# Optional dependencies. Everything below has a fallback, so the script also runs on a bare machine.
try:
    from flash_attn_interface import flash_attn_func as _flash_attn_func

    HAVE_FLASH_ATTN = True
except ImportError:
    _flash_attn_func = None
    HAVE_FLASH_ATTN = False

try:
    import zstandard

    HAVE_ZSTD = True
except ImportError:
    zstandard = None
    HAVE_ZSTD = False

try:
    import brotli

    HAVE_BROTLI = True
except ImportError:
    brotli = None
    HAVE_BROTLI = False

# ---- Configuration -------------------------------------------------------------------------------------------------
def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_str(name: str, default: str) -> str:
    return os.environ.get(name, default)


def env_bool(name: str, default: bool) -> bool:
    """Read a boolean ("0" / "1") from the environment."""
    return bool(int(os.environ.get(name, "1" if default else "0")))


@dataclass
class DataConfig:
    """Where the data lives and how it is tokenised."""

    data_path: str = field(default_factory=lambda: env_str("DATA_PATH", "./data/datasets/fineweb10B_sp1024"))
    tokenizer_path: str = field(
        default_factory=lambda: env_str("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    )
    vocab_size: int = field(default_factory=lambda: env_int("VOCAB_SIZE", 1024))
    bos_id: int = field(default_factory=lambda: env_int("BOS_ID", 1))

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")


@dataclass
class ModelConfig:
    """Shape of the transformer."""

    num_layers: int = field(default_factory=lambda: env_int("NUM_LAYERS", 11))
    model_dim: int = field(default_factory=lambda: env_int("MODEL_DIM", 512))
    num_heads: int = field(default_factory=lambda: env_int("NUM_HEADS", 8))
    num_kv_heads: int = field(default_factory=lambda: env_int("NUM_KV_HEADS", 4))
    mlp_mult: int = field(default_factory=lambda: env_int("MLP_MULT", 3))
    rope_base: float = field(default_factory=lambda: env_float("ROPE_BASE", 10000.0))
    logit_softcap: float = field(default_factory=lambda: env_float("LOGIT_SOFTCAP", 30.0))
    qk_gain_init: float = field(default_factory=lambda: env_float("QK_GAIN_INIT", 1.5))
    tied_embed_init_std: float = field(default_factory=lambda: env_float("TIED_EMBED_INIT_STD", 0.005))


@dataclass
class TrainConfig:
    """Optimisation and wall-clock budget."""

    seed: int = field(default_factory=lambda: env_int("SEED", 1337))
    iterations: int = field(default_factory=lambda: env_int("ITERATIONS", 20000))
    warmdown_iters: int = field(default_factory=lambda: env_int("WARMDOWN_ITERS", 3000))
    warmup_steps: int = field(default_factory=lambda: env_int("WARMUP_STEPS", 20))
    train_batch_tokens: int = field(default_factory=lambda: env_int("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len: int = field(default_factory=lambda: env_int("TRAIN_SEQ_LEN", 1024))
    val_batch_size: int = field(default_factory=lambda: env_int("VAL_BATCH_SIZE", 524_288))
    val_loss_every: int = field(default_factory=lambda: env_int("VAL_LOSS_EVERY", 4000))
    train_log_every: int = field(default_factory=lambda: env_int("TRAIN_LOG_EVERY", 500))
    # Hard cap of the challenge. The reserve covers calibration, GPTQ and packing, which count as training time here.
    max_wallclock_seconds: float = field(default_factory=lambda: env_float("MAX_WALLCLOCK_SECONDS", 600.0))
    quant_reserve_seconds: float = field(default_factory=lambda: env_float("QUANT_RESERVE_SECONDS", 45.0))
    embed_lr: float = field(default_factory=lambda: env_float("EMBED_LR", 0.035))
    matrix_lr: float = field(default_factory=lambda: env_float("MATRIX_LR", 0.025))
    scalar_lr: float = field(default_factory=lambda: env_float("SCALAR_LR", 0.025))
    muon_momentum: float = field(default_factory=lambda: env_float("MUON_MOMENTUM", 0.99))
    muon_backend_steps: int = field(default_factory=lambda: env_int("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start: float = field(default_factory=lambda: env_float("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps: int = field(default_factory=lambda: env_int("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_weight_decay: float = field(default_factory=lambda: env_float("MUON_WEIGHT_DECAY", 0.04))
    beta1: float = field(default_factory=lambda: env_float("BETA1", 0.9))
    beta2: float = field(default_factory=lambda: env_float("BETA2", 0.95))
    adam_eps: float = field(default_factory=lambda: env_float("ADAM_EPS", 1e-8))
    grad_clip_norm: float = field(default_factory=lambda: env_float("GRAD_CLIP_NORM", 0.3))
    ema_decay: float = field(default_factory=lambda: env_float("EMA_DECAY", 0.997))


@dataclass
class QuantConfig:
    """Settings of the int6 GPTQ quantiser and of the artifact."""

    bits: int = field(default_factory=lambda: env_int("QUANT_BITS", 6))
    embed_bits: int = field(default_factory=lambda: env_int("EMBED_BITS", 8))
    calibration_batches: int = field(default_factory=lambda: env_int("CALIBRATION_BATCHES", 16))
    calibration_sequences: int = field(default_factory=lambda: env_int("CALIBRATION_SEQUENCES", 32))
    block_size: int = field(default_factory=lambda: env_int("GPTQ_BLOCK_SIZE", 128))
    percdamp: float = field(default_factory=lambda: env_float("GPTQ_PERCDAMP", 0.01))
    passthrough_numel: int = field(default_factory=lambda: env_int("PASSTHROUGH_NUMEL", 65_536))
    codec: str = field(default_factory=lambda: env_str("CODEC", "zstd"))
    max_submission_bytes: int = field(default_factory=lambda: env_int("MAX_SUBMISSION_BYTES", 16_000_000))
    artifact_path: str = field(default_factory=lambda: env_str("ARTIFACT_PATH", "final_model.int6.ptz"))


@dataclass
class EvalConfig:
    """Sliding window, test-time training and cache mixture."""

    eval_seq_len: int = field(default_factory=lambda: env_int("EVAL_SEQ_LEN", 1024))
    eval_stride: int = field(default_factory=lambda: env_int("EVAL_STRIDE", 64))
    eval_batch_seqs: int = field(default_factory=lambda: env_int("EVAL_BATCH_SEQS", 128))
    run_sliding: bool = field(default_factory=lambda: env_bool("RUN_SLIDING", True))
    max_eval_seconds: float = field(default_factory=lambda: env_float("MAX_EVAL_SECONDS", 600.0))
    ttt_lora_rank: int = field(default_factory=lambda: env_int("TTT_LORA_RANK", 8))
    ttt_chunk_size: int = field(default_factory=lambda: env_int("TTT_CHUNK_SIZE", 256))
    ttt_batch_docs: int = field(default_factory=lambda: env_int("TTT_BATCH_DOCS", 64))
    ttt_lr: float = field(default_factory=lambda: env_float("TTT_LR", 0.008))
    ttt_min_lr_frac: float = field(default_factory=lambda: env_float("TTT_MIN_LR_FRAC", 0.1))
    ttt_horizon_chunks: int = field(default_factory=lambda: env_int("TTT_HORIZON_CHUNKS", 64))
    ttt_steps_per_chunk: int = field(default_factory=lambda: env_int("TTT_STEPS_PER_CHUNK", 1))
    ttt_weight_decay: float = field(default_factory=lambda: env_float("TTT_WEIGHT_DECAY", 0.01))
    ttt_beta1: float = field(default_factory=lambda: env_float("TTT_BETA1", 0.9))
    ttt_beta2: float = field(default_factory=lambda: env_float("TTT_BETA2", 0.95))
    ttt_polyak_decay: float = field(default_factory=lambda: env_float("TTT_POLYAK_DECAY", 0.6))
    cache_enabled: bool = field(default_factory=lambda: env_bool("CACHE_ENABLED", True))
    cache_max_weight: float = field(default_factory=lambda: env_float("CACHE_MAX_WEIGHT", 0.12))
    cache_prior: float = field(default_factory=lambda: env_float("CACHE_PRIOR", 0.05))
    cache_half_count: float = field(default_factory=lambda: env_float("CACHE_HALF_COUNT", 200.0))
    cache_sharpness: float = field(default_factory=lambda: env_float("CACHE_SHARPNESS", 1.0))


@dataclass
class Config:
    """All settings of a run in one place."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    run_id: str = field(default_factory=lambda: env_str("RUN_ID", str(uuid.uuid4())))

    def validate(self) -> None:
        """Fail early, before any GPU time is spent."""
        if self.model.model_dim % self.model.num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if self.model.num_heads % self.model.num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        if self.train.quant_reserve_seconds >= self.train.max_wallclock_seconds:
            raise ValueError("the quantisation reserve leaves no time for training")
        if self.evaluation.ttt_chunk_size > self.evaluation.eval_seq_len:
            raise ValueError("a TTT chunk must fit into the evaluation context")
        if not 0.0 <= self.evaluation.cache_max_weight < 1.0:
            raise ValueError("cache_max_weight must be in [0, 1)")

# ---- Distributed helpers, logging, clocks --------------------------------------------------------------------------
@dataclass
class DistContext:
    """Describes this process within the job."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_master(self) -> bool:
        """True on the one rank that logs and writes files."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """True if there is more than one process group member to talk to."""
        return dist.is_available() and dist.is_initialized()

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier()

    def reduce_(self, tensor: Tensor, op: Optional[object] = None) -> Tensor:
        """All-reduce in place (sum by default); does nothing on a single process."""
        if self.is_distributed:
            dist.all_reduce(tensor, op=op if op is not None else dist.ReduceOp.SUM)
        return tensor


def setup_distributed() -> DistContext:
    """Initialise CUDA and NCCL from the torchrun environment."""
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    rank = env_int("RANK", 0)
    world_size = env_int("WORLD_SIZE", 1)
    local_rank = env_int("LOCAL_RANK", 0)
    if world_size <= 0 or 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so that gradient accumulation stays integral")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return DistContext(rank, local_rank, world_size, device)


def setup_logging(ctx: DistContext, run_id: str) -> logging.Logger:
    """Log to ``logs/<run_id>.txt`` and to the console; silent on all ranks but the first."""
    logger = logging.getLogger("parameter_golf")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not ctx.is_master:
        logger.addHandler(logging.NullHandler())
        return logger
    os.makedirs("logs", exist_ok=True)
    formatter = logging.Formatter("%(message)s")
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(f"logs/{run_id}.txt", encoding="utf-8")):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


class StageClock:
    """A stopwatch for one stage of the run that knows its budget."""
    def __init__(self, name: str, budget_seconds: float):
        self.name = name
        self.budget_seconds = budget_seconds
        self.elapsed = 0.0
        self._started_at: Optional[float] = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self._started_at = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock and keep what has elapsed so far."""
        torch.cuda.synchronize()
        if self._started_at is not None:
            self.elapsed += time.perf_counter() - self._started_at
            self._started_at = None

    def seconds(self) -> float:
        """Seconds spent in this stage up to now."""
        running = time.perf_counter() - self._started_at if self._started_at is not None else 0.0
        return self.elapsed + running

    def check(self) -> None:
        """Raise if the stage took longer than it may."""
        if self.seconds() > self.budget_seconds:
            raise RuntimeError(f"{self.name} took {self.seconds():.1f}s, the budget is {self.budget_seconds:.1f}s")

# ---- Tokenizer bytes -----------------------------------------------------------------------------------------------
@dataclass
class ByteTables:
    """Lookup tables that turn (previous token, token) pairs into a number of UTF-8 bytes."""
    base_bytes: Tensor
    has_leading_space: Tensor
    is_boundary: Tensor

    def count(self, prev_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Bytes of each target. A leading space is only text if the previous token is not a boundary token."""
        counts = self.base_bytes[target_ids].to(torch.float64)
        space = self.has_leading_space[target_ids] & ~self.is_boundary[prev_ids]
        return counts + space.to(torch.float64)


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTables:
    """Build the byte tables from the sentencepiece model, exactly as the official baseline does."""
    table_size = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros((table_size,), dtype=np.int16)
    has_leading_space = np.zeros((table_size,), dtype=np.bool_)
    is_boundary = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(int(sp.vocab_size())):
        # Control tokens (BOS and friends) produce no text at all.
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary[token_id] = False
        if sp.is_byte(token_id):
            base_bytes[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("▁"):
            has_leading_space[token_id] = True
            piece = piece[1:]
        base_bytes[token_id] = len(piece.encode("utf-8"))
    return ByteTables(
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space, dtype=torch.bool, device=device),
        torch.tensor(is_boundary, dtype=torch.bool, device=device),
    )

# ---- Data ----------------------------------------------------------------------------------------------------------
def load_data_shard(file: Path) -> Tensor:
    """Read one ``.bin`` shard: a header of 256 int32 followed by uint16 tokens."""
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * token_bytes
    if file.stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    """Read the complete validation split, in order."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("The validation split is empty")
    return tokens


class TokenStream:
    """Reads training shards one after the other and starts over at the end."""
    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.file_index = 0
        self.tokens = load_data_shard(self.files[0])
        self.position = 0

    def _advance_file(self) -> None:
        self.file_index = (self.file_index + 1) % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_index])
        self.position = 0

    def take(self, n: int) -> Tensor:
        chunks: List[Tensor] = []
        remaining = n
        while remaining > 0:
            available = self.tokens.numel() - self.position
            if available <= 0:
                self._advance_file()
                continue
            k = min(remaining, available)
            chunks.append(self.tokens[self.position : self.position + k])
            self.position += k
            remaining -= k
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class DistributedTokenLoader:
    """Every rank takes its own disjoint span out of a shared contiguous chunk of the training stream."""
    def __init__(self, pattern: str, ctx: DistContext):
        self.ctx = ctx
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> Tuple[Tensor, Tensor]:
        """Return inputs and targets of shape (sequences, seq_len)."""
        local_tokens = global_tokens // (self.ctx.world_size * grad_accum_steps)
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * self.ctx.world_size)
        start = self.ctx.rank * per_rank_span
        local = chunk[start : start + per_rank_span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.ctx.device, non_blocking=True), y.to(self.ctx.device, non_blocking=True)

# ---- Model ---------------------------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """Root-mean-square normalisation without a learned gain."""
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Keeps its weights in fp32 for the optimizer and casts them at matmul time."""
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    """Rotary position embedding with cached cos / sin tables."""
    def __init__(self, dim: int, base: float):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._cached_len = 0
        self._cos: Optional[Tensor] = None
        self._sin: Optional[Tensor] = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        if self._cos is None or self._cached_len != seq_len or self._cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos = freqs.cos()[None, :, None, :]
            self._sin = freqs.sin()[None, :, None, :]
            self._cached_len = seq_len
        return self._cos.to(dtype), self._sin.to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels; ``x`` has shape (batch, time, heads, head_dim)."""
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention; inputs have shape (batch, time, heads, head_dim)."""
    # rms_norm may have promoted q and k under autocast; the kernels want one dtype.
    q, k = q.to(v.dtype), k.to(v.dtype)
    if HAVE_FLASH_ATTN:
        out = _flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=q.size(2) != k.size(2),
    )
    return out.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with optional low-rank deltas on the query and value projections."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.num_kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(cfg.model_dim, cfg.model_dim, bias=False)
        self.c_k = CastedLinear(cfg.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(cfg.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(cfg.model_dim, cfg.model_dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, cfg.rope_base)

    def forward(self, x: Tensor, q_delta: Optional[Tensor] = None, v_delta: Optional[Tensor] = None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if q_delta is not None:
            q = q + q_delta.to(q.dtype)
        if v_delta is not None:
            v = v + v_delta.to(v.dtype)
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = k.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary(q, cos, sin) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = apply_rotary(k, cos, sin)
        y = causal_attention(q, k, v)
        return self.proj(y.reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    """relu^2 feed-forward network."""
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        self.fc = CastedLinear(dim, mlp_mult * dim, bias=False)
        self.proj = CastedLinear(mlp_mult * dim, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(cfg)
        self.mlp = MLP(cfg.model_dim, cfg.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))).float())

    def forward(self, x: Tensor, x0: Tensor, lora: Optional["BatchedLoRA"] = None, layer: int = 0) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        n = self.attn_norm(x)
        q_delta = lora.q_delta(layer, n) if lora is not None else None
        v_delta = lora.v_delta(layer, n) if lora is not None else None
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(n, q_delta, v_delta)
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    """The language model: U-shaped skip connections, tied embeddings, soft-capped logits."""
    def __init__(self, cfg: ModelConfig, vocab_size: int):
        super().__init__()
        self.cfg = cfg
        self.vocab_size = vocab_size
        self.tok_emb = nn.Embedding(vocab_size, cfg.model_dim)
        self.num_encoder_layers = cfg.num_layers // 2
        self.num_decoder_layers = cfg.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, cfg.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.cfg.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)

    def forward_logits(self, input_ids: Tensor, lora: Optional["BatchedLoRA"] = None) -> Tensor:
        """Logits for every position, shape (batch, time, vocab)."""
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: List[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0, lora, i)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            layer = self.num_encoder_layers + i
            x = self.blocks[layer](x, x0, lora, layer)
        x = self.final_norm(x)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.cfg.logit_softcap * torch.tanh(logits / self.cfg.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, self.vocab_size).float(), target_ids.reshape(-1), reduction="mean")

# ---- Optimizers ----------------------------------------------------------------------------------------------------
def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Orthogonalise a matrix with the quintic Newton-Schulz iteration."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates; the matrices are divided among the ranks."""
    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, backend_steps: int, weight_decay: float):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            total = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            offset = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[offset : offset + p.numel()] = g.reshape(-1)
                offset += p.numel()
            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            offset = 0
            for p in params:
                g = updates_flat[offset : offset + p.numel()].view_as(p).to(dtype=p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(g, alpha=-group["lr"])
                offset += p.numel()
        return loss


class OptimizerSet:
    """Muon for the matrices, Adam for the embedding and for the vectors."""
    def __init__(self, model: GPT, cfg: TrainConfig):
        self.cfg = cfg
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 2]
        scalars = [p for p in model.blocks.parameters() if p.ndim != 2 or min(p.shape) <= 2]
        scalars.append(model.skip_weights)
        adam_args = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.muon = Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_backend_steps, cfg.muon_weight_decay)
        self.embed = torch.optim.Adam([{"params": [model.tok_emb.weight], "lr": cfg.embed_lr}], **adam_args)
        self.scalar = torch.optim.Adam([{"params": scalars, "lr": cfg.scalar_lr}], **adam_args)
        for optimizer in self.all():
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    def all(self) -> List[torch.optim.Optimizer]:
        return [self.muon, self.embed, self.scalar]

    def set_schedule(self, step: int, lr_scale: float) -> None:
        """Apply the learning-rate multiplier and the momentum warm-up."""
        frac = min(step / max(self.cfg.muon_momentum_warmup_steps, 1), 1.0)
        momentum = (1 - frac) * self.cfg.muon_momentum_warmup_start + frac * self.cfg.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for optimizer in self.all():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_scale

    def step(self) -> None:
        for optimizer in self.all():
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all():
            optimizer.zero_grad(set_to_none=True)


class WeightEMA:
    """Exponential moving average of the weights during training."""
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow: Dict[str, Tensor] = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average a little towards the current weights."""
        for name, value in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(value.detach().float(), alpha=1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Replace the model's weights with the average."""
        model.load_state_dict(self.shadow, strict=True)

# ---- Quantisation --------------------------------------------------------------------------------------------------
class HessianCollector:
    """Accumulates X^T X of the inputs of every linear layer while the model runs on training batches."""
    def __init__(self, model: GPT):
        self.hessians: Dict[str, Tensor] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.handles.append(module.register_forward_hook(self._make_hook(name + ".weight")))

    def _make_hook(self, name: str):
        def hook(module: nn.Module, inputs: Tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in self.hessians:
                self.hessians[name] = torch.zeros(x.size(1), x.size(1), device=x.device, dtype=torch.float32)
            self.hessians[name].addmm_(x.T, x)

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Quantizer:
    """GPTQ with per-row scales. Large matrices become int6, the embedding int8, small tensors stay fp16."""
    def __init__(self, cfg: QuantConfig, ctx: DistContext, logger: logging.Logger):
        self.cfg = cfg
        self.ctx = ctx
        self.logger = logger

    @torch.no_grad()
    def collect_hessians(self, model: GPT, loader: DistributedTokenLoader, seq_len: int) -> Dict[str, Tensor]:
        """Run the model on a few more training batches and sum the Hessians over the ranks."""
        collector = HessianCollector(model)
        model.eval()
        tokens_per_batch = self.cfg.calibration_sequences * seq_len * self.ctx.world_size
        for _ in range(self.cfg.calibration_batches):
            x, _ = loader.next_batch(tokens_per_batch, seq_len, 1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.forward_logits(x)
        collector.close()
        for name in sorted(collector.hessians):
            self.ctx.reduce_(collector.hessians[name])
        return collector.hessians

    def row_scales(self, weight: Tensor, qmax: int) -> Tensor:
        """Pick, per row, the clipping factor with the smallest squared error of the weights."""
        amax = weight.abs().amax(dim=1).clamp_min(1e-8)
        best_scale = amax / qmax
        best_err = torch.full_like(amax, float("inf"))
        for factor in (1.0, 0.97, 0.94, 0.9, 0.86, 0.82):
            scale = amax * factor / qmax
            q = torch.clamp(torch.round(weight / scale[:, None]), -qmax - 1, qmax)
            err = (q * scale[:, None] - weight).square().sum(dim=1)
            better = err < best_err
            best_err = torch.where(better, err, best_err)
            best_scale = torch.where(better, scale, best_scale)
        return best_scale.to(torch.float16).float().clamp_min(1e-7)

    @torch.no_grad()
    def gptq(self, weight: Tensor, hessian: Tensor, bits: int) -> Tuple[Tensor, Tensor]:
        """Quantise one matrix column by column and push the error into the columns that are still open."""
        W = weight.detach().float().clone()
        H = hessian.clone()
        qmax = 2 ** (bits - 1) - 1
        columns = W.size(1)
        dead = torch.diag(H) == 0
        H[dead, dead] = 1.0
        W[:, dead] = 0.0
        order = torch.argsort(torch.diag(H), descending=True)
        W, H = W[:, order], H[order][:, order]
        damp = self.cfg.percdamp * torch.mean(torch.diag(H))
        H.diagonal().add_(damp)
        try:
            Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        except RuntimeError:
            # Very rarely the matrix is numerically singular: use a much larger damping.
            H.diagonal().add_(100.0 * damp)
            Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        scale = self.row_scales(W, qmax)
        Q = torch.zeros_like(W)
        for start in range(0, columns, self.cfg.block_size):
            end = min(start + self.cfg.block_size, columns)
            block = W[:, start:end].clone()
            errors = torch.zeros_like(block)
            for j in range(end - start):
                d = Hinv[start + j, start + j]
                q = torch.clamp(torch.round(block[:, j] / scale), -qmax - 1, qmax)
                Q[:, start + j] = q
                err = (block[:, j] - q * scale) / d
                block[:, j:] -= err[:, None] * Hinv[start + j, start + j : end][None, :]
                errors[:, j] = err
            W[:, end:] -= errors @ Hinv[start:end, end:]
        inverse = torch.argsort(order)
        return Q[:, inverse].to(torch.int8), scale

    def round_to_nearest(self, weight: Tensor, bits: int) -> Tuple[Tensor, Tensor]:
        """Plain rounding, for matrices without a Hessian (the embedding)."""
        qmax = 2 ** (bits - 1) - 1
        scale = self.row_scales(weight.float(), qmax)
        q = torch.clamp(torch.round(weight.float() / scale[:, None]), -qmax - 1, qmax)
        return q.to(torch.int8), scale

    @torch.no_grad()
    def quantize(self, model: GPT, hessians: Dict[str, Tensor]) -> Dict[str, Dict[str, Tensor]]:
        """Quantise the state dict. The matrices are divided among the ranks and broadcast afterwards."""
        packed: Dict[str, Dict[str, Tensor]] = {"q": {}, "scale": {}, "plain": {}}
        names = [n for n, t in model.state_dict().items() if t.ndim == 2 and t.numel() > self.cfg.passthrough_numel]
        state = model.state_dict()
        for i, name in enumerate(names):
            owner = i % self.ctx.world_size
            weight = state[name]
            q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
            scale = torch.empty(weight.size(0), dtype=torch.float32, device=weight.device)
            if owner == self.ctx.rank:
                if name in hessians:
                    q, scale = self.gptq(weight, hessians[name], self.cfg.bits)
                else:
                    q, scale = self.round_to_nearest(weight, self.cfg.embed_bits)
                q, scale = q.contiguous(), scale.contiguous()
            packed["q"][name] = q
            packed["scale"][name] = scale
        if self.ctx.is_distributed:
            for i, name in enumerate(names):
                dist.broadcast(packed["q"][name], src=i % self.ctx.world_size)
                dist.broadcast(packed["scale"][name], src=i % self.ctx.world_size)
        for name, tensor in state.items():
            if name not in packed["q"]:
                packed["plain"][name] = tensor.detach().to(torch.float16).cpu()
        packed["q"] = {k: v.cpu() for k, v in packed["q"].items()}
        packed["scale"] = {k: v.to(torch.float16).cpu() for k, v in packed["scale"].items()}
        return packed

    @staticmethod
    def dequantize(packed: Dict[str, Dict[str, Tensor]]) -> Dict[str, Tensor]:
        state: Dict[str, Tensor] = {}
        for name, q in packed["q"].items():
            state[name] = q.float() * packed["scale"][name].float()[:, None]
        for name, tensor in packed["plain"].items():
            state[name] = tensor.float()
        return state

# ---- Artifact: compression, size check, reading back ---------------------------------------------------------------
def compress_bytes(raw: bytes, codec: str) -> bytes:
    """Compress with the requested codec; the first byte of the result remembers which one was available."""
    if codec == "zstd" and HAVE_ZSTD:
        return b"Z" + zstandard.ZstdCompressor(level=22).compress(raw)
    if codec in ("zstd", "brotli") and HAVE_BROTLI:
        return b"B" + brotli.compress(raw, quality=11)
    return b"L" + zlib.compress(raw, level=9)


def decompress_bytes(blob: bytes) -> bytes:
    """Inverse of :func:`compress_bytes`."""
    kind, body = blob[:1], blob[1:]
    if kind == b"Z":
        return zstandard.ZstdDecompressor().decompress(body)
    if kind == b"B":
        return brotli.decompress(body)
    if kind == b"L":
        return zlib.decompress(body)
    raise ValueError(f"Unknown codec marker {kind!r}")


class ArtifactPacker:
    """Writes the artifact, checks the size of the submission and reads the artifact back."""
    def __init__(self, cfg: QuantConfig, ctx: DistContext, logger: logging.Logger):
        self.cfg = cfg
        self.ctx = ctx
        self.logger = logger

    def code_bytes(self) -> int:
        """Size of this very file. There is no other code."""
        return len(Path(__file__).read_bytes())

    def write(self, packed: Dict[str, Dict[str, Tensor]]) -> int:
        """Serialise and compress on the first rank; returns the number of bytes."""
        model_bytes = 0
        if self.ctx.is_master:
            buffer = io.BytesIO()
            torch.save(packed, buffer)
            blob = compress_bytes(buffer.getvalue(), self.cfg.codec)
            Path(self.cfg.artifact_path).write_bytes(blob)
            model_bytes = len(blob)
        self.ctx.barrier()
        return model_bytes

    def check_size(self, model_bytes: int) -> None:
        """Print the sizes and refuse to go on with a submission that is too large."""
        if not self.ctx.is_master:
            return
        code_bytes = self.code_bytes()
        total_bytes = code_bytes + model_bytes
        self.logger.info(f"Serialized model int6+{self.cfg.codec}: {model_bytes} bytes")
        self.logger.info(f"Code size: {code_bytes} bytes")
        self.logger.info(f"Total submission size: {total_bytes} bytes (limit {self.cfg.max_submission_bytes})")
        if total_bytes > self.cfg.max_submission_bytes:
            raise RuntimeError(f"Submission too large: {total_bytes} > {self.cfg.max_submission_bytes} bytes")

    def read(self) -> Dict[str, Dict[str, Tensor]]:
        raw = decompress_bytes(Path(self.cfg.artifact_path).read_bytes())
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)

# ---- Scores --------------------------------------------------------------------------------------------------------
@dataclass
class ScoreSums:
    """Running sums of a score: nats, bytes and tokens. Every token must be added exactly once."""

    nats: Tensor
    num_bytes: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> "ScoreSums":
        """Empty sums in double precision."""
        return cls(*(torch.zeros((), device=device, dtype=torch.float64) for _ in range(3)))

    def add(self, nll: Tensor, prev_ids: Tensor, target_ids: Tensor, tables: ByteTables) -> None:
        """Add the losses of some tokens together with the bytes that they stand for."""
        self.nats += nll.to(torch.float64).sum()
        self.num_bytes += tables.count(prev_ids, target_ids).sum()
        self.tokens += float(target_ids.numel())

    def reduce(self, ctx: DistContext) -> None:
        for tensor in (self.nats, self.num_bytes, self.tokens):
            ctx.reduce_(tensor)

    def loss_and_bpb(self) -> Tuple[float, float]:
        """Mean loss per token in nats and bits per byte."""
        val_loss = (self.nats / self.tokens).item()
        val_bpb = (self.nats / math.log(2.0) / self.num_bytes).item()
        return val_loss, val_bpb


def require_complete(sums: ScoreSums, val_tokens: Tensor, what: str) -> None:
    """Every token except the very first one must have been scored."""
    expected = val_tokens.numel() - 1
    if int(sums.tokens.item()) != expected:
        raise RuntimeError(f"{what}: scored {int(sums.tokens.item())} tokens, expected {expected}")


def rank_slice(total: int, ctx: DistContext) -> Tuple[int, int]:
    """Contiguous share of ``total`` items that belongs to this rank."""
    return (total * ctx.rank) // ctx.world_size, (total * (ctx.rank + 1)) // ctx.world_size


@torch.no_grad()
def monitor_validation(
    model: nn.Module, cfg: TrainConfig, ctx: DistContext, val_tokens: Tensor, tables: ByteTables
) -> Tuple[float, float]:
    """The baseline's validation pass with non-overlapping sequences. Only logged; nothing depends on it."""
    seq_len = cfg.train_seq_len
    total_seqs = (val_tokens.numel() - 1) // seq_len
    local_batch_seqs = max(cfg.val_batch_size // (ctx.world_size * seq_len), 1)
    first, last = rank_slice(total_seqs, ctx)
    sums = ScoreSums.zeros(ctx.device)
    model.eval()
    for start in range(first, last, local_batch_seqs):
        end = min(start + local_batch_seqs, last)
        local = val_tokens[start * seq_len : end * seq_len + 1].to(device=ctx.device, dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(x, y).detach()
        sums.add(loss.double() * y.numel(), x.reshape(-1), y.reshape(-1), tables)
    sums.reduce(ctx)
    model.train()
    return sums.loss_and_bpb()


class SlidingWindowEvaluator:
    """Scores the stream with a frozen model; each token is scored in exactly one window."""
    def __init__(self, cfg: EvalConfig, ctx: DistContext, tables: ByteTables):
        self.cfg = cfg
        self.ctx = ctx
        self.tables = tables

    def windows(self, total: int) -> List[Tuple[int, int, int]]:
        """(window start, first scored position, end of the scored positions), without gaps and overlaps."""
        spans: List[Tuple[int, int, int]] = []
        scored_upto = 0
        while scored_upto < total:
            # The first window scores all of its positions, the others only the last `stride` ones.
            step = self.cfg.eval_seq_len if scored_upto == 0 else self.cfg.eval_stride
            end = min(scored_upto + step, total)
            spans.append((max(0, end - self.cfg.eval_seq_len), scored_upto, end))
            scored_upto = end
        return spans

    @torch.no_grad()
    def run(self, model: GPT, val_tokens: Tensor) -> ScoreSums:
        """Return the summed score over all ranks."""
        seq_len = self.cfg.eval_seq_len
        spans = self.windows(val_tokens.numel() - 1)
        first, last = rank_slice(len(spans), self.ctx)
        sums = ScoreSums.zeros(self.ctx.device)
        model.eval()
        forward = torch.compile(model.forward_logits, dynamic=False)
        for begin in range(first, last, self.cfg.eval_batch_seqs):
            batch = spans[begin : min(begin + self.cfg.eval_batch_seqs, last)]
            x = torch.zeros(self.cfg.eval_batch_seqs, seq_len, dtype=torch.int64)
            y = torch.zeros(self.cfg.eval_batch_seqs, seq_len, dtype=torch.int64)
            mask = torch.zeros(self.cfg.eval_batch_seqs, seq_len, dtype=torch.bool)
            for row, (window_start, score_start, score_end) in enumerate(batch):
                piece = val_tokens[window_start : score_end + 1].to(torch.int64)
                x[row, : piece.numel() - 1] = piece[:-1]
                y[row, : piece.numel() - 1] = piece[1:]
                mask[row, score_start - window_start : score_end - window_start] = True
            x, y, mask = x.to(self.ctx.device), y.to(self.ctx.device), mask.to(self.ctx.device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = forward(x)
            nll = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none").reshape(y.shape)
            sums.add(nll[mask], x[mask], y[mask], self.tables)
        sums.reduce(self.ctx)
        return sums

# ---- Test-time training --------------------------------------------------------------------------------------------
class BatchedLoRA(nn.Module):
    """Independent low-rank adapters on the q and v projections, one set for every document of a batch."""
    def __init__(self, docs: int, cfg: ModelConfig, rank: int, device: torch.device):
        super().__init__()
        kv_dim = cfg.num_kv_heads * (cfg.model_dim // cfg.num_heads)
        self.in_dim = cfg.model_dim
        self.layers = cfg.num_layers
        self.q_a = nn.Parameter(torch.empty(self.layers, docs, rank, cfg.model_dim, device=device))
        self.q_b = nn.Parameter(torch.empty(self.layers, docs, cfg.model_dim, rank, device=device))
        self.v_a = nn.Parameter(torch.empty(self.layers, docs, rank, cfg.model_dim, device=device))
        self.v_b = nn.Parameter(torch.empty(self.layers, docs, kv_dim, rank, device=device))
        self.rows: Optional[Tensor] = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fresh adapters: random A, zero B, so that the delta is exactly zero."""
        bound = 1.0 / math.sqrt(self.in_dim)
        for a in (self.q_a, self.v_a):
            a.uniform_(-bound, bound)
        for b in (self.q_b, self.v_b):
            b.zero_()

    def select(self, rows: Tensor) -> "BatchedLoRA":
        """Choose the documents that take part in the next forward pass."""
        self.rows = rows
        return self

    def _delta(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a, b = a[self.rows].to(x.dtype), b[self.rows].to(x.dtype)
        return (x @ a.transpose(1, 2)) @ b.transpose(1, 2)

    def q_delta(self, layer: int, x: Tensor) -> Tensor:
        return self._delta(x, self.q_a[layer], self.q_b[layer])

    def v_delta(self, layer: int, x: Tensor) -> Tensor:
        return self._delta(x, self.v_a[layer], self.v_b[layer])


class PolyakAverage:
    """Exponential average of the adapters along the optimisation path. The average is what scores."""
    def __init__(self, live: BatchedLoRA, decay: float):
        self.decay = decay
        self.averaged = copy.deepcopy(live)
        for p in self.averaged.parameters():
            p.requires_grad_(False)

    @torch.no_grad()
    def restart(self, live: BatchedLoRA) -> None:
        """Forget the path and start from the live adapters."""
        for avg, p in zip(self.averaged.parameters(), live.parameters()):
            avg.copy_(p)

    @torch.no_grad()
    def update(self, live: BatchedLoRA) -> None:
        for avg, p in zip(self.averaged.parameters(), live.parameters()):
            avg.lerp_(p, 1.0 - self.decay)


class BigramCache:
    """
    Counts of (previous token, token) pairs among the tokens that this rank has already scored.

    A row of the table is turned into a distribution with a softmax over the whole vocabulary, so the mixture below is
    a proper distribution as well. The weight of the cache depends on the context only: on how often the previous
    token was seen and on how confident the model itself is.
    """

    def __init__(self, cfg: EvalConfig, vocab_size: int, device: torch.device):
        self.cfg = cfg
        self.vocab_size = vocab_size
        self.counts = torch.zeros(vocab_size, vocab_size, device=device, dtype=torch.float32)

    def log_probs(self, prev_ids: Tensor) -> Tensor:
        """log p_cache( . | prev) over the whole vocabulary."""
        scores = torch.log(self.counts[prev_ids] + self.cfg.cache_prior) * self.cfg.cache_sharpness
        return F.log_softmax(scores, dim=-1)

    def gate(self, prev_ids: Tensor, model_log_probs: Tensor) -> Tensor:
        """Mixture weight in [0, 1): large where the context is well known and the model is unsure."""
        seen = self.counts[prev_ids].sum(dim=-1)
        familiarity = seen / (seen + self.cfg.cache_half_count)
        confidence = model_log_probs.amax(dim=-1).exp()
        return self.cfg.cache_max_weight * familiarity * (1.0 - confidence)

    def mix(self, model_log_probs: Tensor, prev_ids: Tensor) -> Tensor:
        """log of the mixture of the model and the cache, for every token of the vocabulary."""
        weight = self.gate(prev_ids, model_log_probs).unsqueeze(-1)
        return torch.logaddexp(
            model_log_probs + torch.log1p(-weight),
            self.log_probs(prev_ids) + torch.log(weight.clamp_min(1e-20)),
        )

    @torch.no_grad()
    def update(self, prev_ids: Tensor, target_ids: Tensor) -> None:
        flat = prev_ids * self.vocab_size + target_ids
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))


@dataclass(frozen=True)
class Document:
    """A document of the validation stream: ``num_targets`` tokens after ``start`` are predicted."""

    start: int
    num_targets: int

    def num_chunks(self, chunk_size: int) -> int:
        return (self.num_targets + chunk_size - 1) // chunk_size


def find_documents(val_tokens: Tensor, bos_id: int) -> List[Document]:
    """
    Split the stream at the BOS tokens. The BOS of the next document is the last target of a document, so the
    documents together predict every token of the stream except the very first one.
    """
    starts = (val_tokens.to(torch.int64) == bos_id).nonzero(as_tuple=True)[0].tolist()
    if not starts or starts[0] != 0:
        starts = [0] + starts
    bounds = starts + [val_tokens.numel() - 1]
    return [Document(a, b - a) for a, b in zip(bounds[:-1], bounds[1:]) if b > a]


@dataclass
class ChunkBatch:
    """One chunk of several documents, padded to a common length."""

    rows: Tensor
    inputs: Tensor
    targets: Tensor
    score_mask: Tensor
    train_rows: Tensor


class TTTEvaluator:
    """
    Score-first test-time training.

    The documents of a rank are visited in the order of the stream, ``ttt_batch_docs`` at a time. For every chunk:

        1. the averaged adapters score the chunk (no gradients),
        2. the losses are added to the sums, for good,
        3. only then the live adapters take their AdamW steps on the chunk, the average moves along and the cache
           learns the chunk's pairs.
    """

    def __init__(
        self,
        cfg: EvalConfig,
        model_cfg: ModelConfig,
        data_cfg: DataConfig,
        ctx: DistContext,
        tables: ByteTables,
        logger: logging.Logger,
    ):
        self.cfg = cfg
        self.ctx = ctx
        self.tables = tables
        self.logger = logger
        self.bos_id = data_cfg.bos_id
        self.lora = BatchedLoRA(cfg.ttt_batch_docs, model_cfg, cfg.ttt_lora_rank, ctx.device)
        self.polyak = PolyakAverage(self.lora, cfg.ttt_polyak_decay)
        self.cache = BigramCache(cfg, data_cfg.vocab_size, ctx.device) if cfg.cache_enabled else None

    def chunk_lr(self, chunk_index: int) -> float:
        """Cosine over a fixed horizon of chunks (the length of a document is not known in advance)."""
        progress = min(chunk_index / self.cfg.ttt_horizon_chunks, 1.0)
        floor = self.cfg.ttt_min_lr_frac
        return self.cfg.ttt_lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.lora.parameters(),
            lr=self.cfg.ttt_lr,
            betas=(self.cfg.ttt_beta1, self.cfg.ttt_beta2),
            eps=1e-10,
            weight_decay=self.cfg.ttt_weight_decay,
        )

    def make_chunk(self, val_tokens: Tensor, docs: List[Document], chunk_index: int) -> Optional[ChunkBatch]:
        """Cut chunk ``chunk_index`` out of every document that still has one."""
        size = self.cfg.ttt_chunk_size
        rows = [i for i, doc in enumerate(docs) if doc.num_chunks(size) > chunk_index]
        if not rows:
            return None
        chunk_start = chunk_index * size
        window_start = max(0, chunk_start + size - self.cfg.eval_seq_len)
        width = chunk_start + size - window_start
        inputs = torch.zeros(len(rows), width, dtype=torch.int64)
        targets = torch.zeros(len(rows), width, dtype=torch.int64)
        score_mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for r, i in enumerate(rows):
            doc = docs[i]
            chunk_end = min(chunk_start + size, doc.num_targets)
            piece = val_tokens[doc.start + window_start : doc.start + chunk_end + 1].to(torch.int64)
            inputs[r, : piece.numel() - 1] = piece[:-1]
            targets[r, : piece.numel() - 1] = piece[1:]
            score_mask[r, chunk_start - window_start : chunk_end - window_start] = True
        # The last chunk of a document is only scored: nothing follows that could profit from training on it.
        train_rows = [r for r, i in enumerate(rows) if docs[i].num_chunks(size) > chunk_index + 1]
        device = self.ctx.device
        return ChunkBatch(
            torch.tensor(rows, device=device),
            inputs.to(device, non_blocking=True),
            targets.to(device, non_blocking=True),
            score_mask.to(device, non_blocking=True),
            torch.tensor(train_rows, device=device, dtype=torch.int64),
        )

    @torch.no_grad()
    def score_chunk(self, model: GPT, chunk: ChunkBatch, sums: ScoreSums) -> None:
        """Score a chunk with the averaged adapters and the cache as they were before the chunk."""
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = model.forward_logits(chunk.inputs, self.polyak.averaged.select(chunk.rows))
        mask = chunk.score_mask
        prev_ids, target_ids = chunk.inputs[mask], chunk.targets[mask]
        log_probs = F.log_softmax(logits[mask].float(), dim=-1)
        if self.cache is not None:
            log_probs = self.cache.mix(log_probs, prev_ids)
        nll = -log_probs.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
        sums.add(nll, prev_ids, target_ids, self.tables)

    def train_on_chunk(self, model: GPT, chunk: ChunkBatch, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """AdamW steps of the live adapters on a chunk that has been scored."""
        if chunk.train_rows.numel() == 0:
            return
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = chunk.rows[chunk.train_rows]
        inputs, targets = chunk.inputs[chunk.train_rows], chunk.targets[chunk.train_rows]
        mask = chunk.score_mask[chunk.train_rows].float()
        for _ in range(self.cfg.ttt_steps_per_chunk):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(inputs, self.lora.select(rows))
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            # The sum over documents keeps their gradients independent of each other.
            per_doc = (loss.reshape(mask.shape) * mask).sum(dim=1) / mask.sum(dim=1)
            per_doc.sum().backward()
            optimizer.step()
            self.polyak.update(self.lora)

    def learn_from_chunk(self, model: GPT, chunk: ChunkBatch, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Everything that may happen with a chunk after it was scored."""
        self.train_on_chunk(model, chunk, optimizer, lr)
        if self.cache is not None:
            mask = chunk.score_mask
            self.cache.update(chunk.inputs[mask], chunk.targets[mask])

    def run_documents(self, model: GPT, val_tokens: Tensor, docs: List[Document], sums: ScoreSums) -> None:
        """Score and learn one batch of documents, chunk by chunk."""
        self.lora.reset()
        self.polyak.restart(self.lora)
        optimizer = self.make_optimizer()
        num_chunks = max(doc.num_chunks(self.cfg.ttt_chunk_size) for doc in docs)
        for chunk_index in range(num_chunks):
            chunk = self.make_chunk(val_tokens, docs, chunk_index)
            if chunk is None:
                break
            self.score_chunk(model, chunk, sums)
            self.learn_from_chunk(model, chunk, optimizer, self.chunk_lr(chunk_index))

    def run(self, model: GPT, val_tokens: Tensor) -> ScoreSums:
        """Score the whole validation split; the documents are split by rank."""
        docs = find_documents(val_tokens, self.bos_id)
        first, last = rank_slice(len(docs), self.ctx)
        my_docs = docs[first:last]
        model.eval()
        for p in model.parameters():
            p.requires_grad_(False)
        sums = ScoreSums.zeros(self.ctx.device)
        for begin in range(0, len(my_docs), self.cfg.ttt_batch_docs):
            batch = my_docs[begin : begin + self.cfg.ttt_batch_docs]
            self.run_documents(model, val_tokens, batch, sums)
            if (begin // self.cfg.ttt_batch_docs) % 20 == 0:
                running = (sums.nats / sums.tokens.clamp_min(1.0)).item()
                self.logger.info(f"ttt: documents {begin + len(batch)}/{len(my_docs)} running_loss:{running:.4f}")
        sums.reduce(self.ctx)
        return sums

# ---- Training ------------------------------------------------------------------------------------------------------
class Trainer:
    """Trains the model until the wall-clock budget, less the reserve for quantisation, is used up."""
    def __init__(self, cfg: Config, ctx: DistContext, logger: logging.Logger, val_tokens: Tensor, tables: ByteTables):
        self.cfg = cfg
        self.ctx = ctx
        self.logger = logger
        self.val_tokens = val_tokens
        self.tables = tables
        self.grad_accum_steps = 8 // ctx.world_size
        self.model = GPT(cfg.model, cfg.data.vocab_size).to(ctx.device)
        self.compiled = torch.compile(self.model, dynamic=False, fullgraph=not HAVE_FLASH_ATTN)
        self.ddp = (
            DDP(self.compiled, device_ids=[ctx.local_rank], broadcast_buffers=False)
            if ctx.is_distributed
            else self.compiled
        )
        self.optimizers = OptimizerSet(self.model, cfg.train)
        self.loader = DistributedTokenLoader(cfg.data.train_files, ctx)
        self.clock = StageClock("training", cfg.train.max_wallclock_seconds)

    def lr_scale(self, step: int) -> float:
        """Linear warm-down that ends with the training time, not with the number of steps."""
        budget = self.cfg.train.max_wallclock_seconds - self.cfg.train.quant_reserve_seconds
        elapsed = self.clock.seconds()
        step_seconds = elapsed / max(step, 1)
        warmdown_seconds = self.cfg.train.warmdown_iters * step_seconds
        remaining = max(budget - elapsed, 0.0)
        return remaining / max(warmdown_seconds, 1e-9) if remaining <= warmdown_seconds else 1.0

    def forward_backward(self) -> Tensor:
        self.optimizers.zero_grad()
        train_loss = torch.zeros((), device=self.ctx.device)
        for micro_step in range(self.grad_accum_steps):
            if self.ctx.is_distributed:
                self.ddp.require_backward_grad_sync = micro_step == self.grad_accum_steps - 1
            x, y = self.loader.next_batch(
                self.cfg.train.train_batch_tokens, self.cfg.train.train_seq_len, self.grad_accum_steps
            )
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = self.ddp(x, y)
            train_loss += loss.detach() / self.grad_accum_steps
            (loss / self.grad_accum_steps).backward()
        return train_loss

    def warmup(self) -> None:
        """Compile and prime everything, then restore the initial weights, optimizer states and the data stream."""
        model_state = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        optimizer_states = [copy.deepcopy(o.state_dict()) for o in self.optimizers.all()]
        for _ in range(self.cfg.train.warmup_steps):
            self.forward_backward()
            self.optimizers.step()
        self.optimizers.zero_grad()
        self.model.load_state_dict(model_state, strict=True)
        for optimizer, state in zip(self.optimizers.all(), optimizer_states):
            optimizer.load_state_dict(state)
        self.loader = DistributedTokenLoader(self.cfg.data.train_files, self.ctx)

    def out_of_time(self) -> bool:
        """All ranks agree on whether the training share of the budget is spent."""
        budget = self.cfg.train.max_wallclock_seconds - self.cfg.train.quant_reserve_seconds
        flag = torch.tensor(int(self.clock.seconds() >= budget), device=self.ctx.device)
        self.ctx.reduce_(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def log_validation(self, step: int) -> None:
        """Log the validation loss with the clock paused, as the baseline does."""
        self.clock.pause()
        loss, bpb = monitor_validation(self.compiled, self.cfg.train, self.ctx, self.val_tokens, self.tables)
        self.logger.info(f"step:{step} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{self.clock.elapsed:.1f}s")
        self.clock.start()

    def run(self) -> GPT:
        """The training loop. The clock is left running: quantisation belongs to the training budget."""
        cfg = self.cfg.train
        self.warmup()
        ema = WeightEMA(self.model, cfg.ema_decay)
        self.model.train()
        self.clock.start()
        step = 0
        while step < cfg.iterations and not self.out_of_time():
            if cfg.val_loss_every > 0 and step > 0 and step % cfg.val_loss_every == 0:
                self.log_validation(step)
            self.optimizers.set_schedule(step, self.lr_scale(step))
            train_loss = self.forward_backward()
            if cfg.grad_clip_norm > 0:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip_norm)
            self.optimizers.step()
            ema.update(self.model)
            step += 1
            if step <= 10 or step % cfg.train_log_every == 0:
                self.logger.info(f"step:{step} train_loss:{train_loss.item():.4f} t:{self.clock.seconds():.1f}s")
        self.optimizers.zero_grad()
        self.logger.info(f"training stopped at step {step} after {self.clock.seconds():.1f}s; applying the EMA weights")
        ema.copy_to(self.model)
        return self.model

# ---- Main ----------------------------------------------------------------------------------------------------------
def build_artifact(trainer: Trainer, model: GPT, packer: ArtifactPacker) -> int:
    """Calibrate, quantise and write the artifact while the training clock is still running."""
    quantizer = Quantizer(trainer.cfg.quant, trainer.ctx, trainer.logger)
    hessians = quantizer.collect_hessians(model, trainer.loader, trainer.cfg.train.train_seq_len)
    trainer.logger.info(f"gptq: calibrated on training batches, t:{trainer.clock.seconds():.1f}s")
    packed = quantizer.quantize(model, hessians)
    model_bytes = packer.write(packed)
    trainer.clock.pause()
    trainer.logger.info(f"artifact written, training stage took {trainer.clock.elapsed:.1f}s in total")
    trainer.clock.check()
    return model_bytes


def evaluate(
    cfg: Config, ctx: DistContext, logger: logging.Logger, packer: ArtifactPacker, val_tokens: Tensor, tables: ByteTables
) -> Tuple[float, float]:
    """Read the artifact and score the validation split; the TTT score is the result."""
    clock = StageClock("evaluation", cfg.evaluation.max_eval_seconds)
    clock.start()
    model = GPT(cfg.model, cfg.data.vocab_size).to(ctx.device)
    model.load_state_dict(Quantizer.dequantize(packer.read()), strict=True)
    if cfg.evaluation.run_sliding:
        sliding = SlidingWindowEvaluator(cfg.evaluation, ctx, tables).run(model, val_tokens)
        require_complete(sliding, val_tokens, "sliding window")
        loss, bpb = sliding.loss_and_bpb()
        logger.info(f"sliding_window val_loss:{loss:.8f} val_bpb:{bpb:.8f} t:{clock.seconds():.1f}s")
    ttt = TTTEvaluator(cfg.evaluation, cfg.model, cfg.data, ctx, tables, logger)
    sums = ttt.run(model, val_tokens)
    require_complete(sums, val_tokens, "ttt")
    loss, bpb = sums.loss_and_bpb()
    clock.pause()
    logger.info(f"ttt: tokens:{int(sums.tokens.item())} bytes:{int(sums.num_bytes.item())} t:{clock.elapsed:.1f}s")
    clock.check()
    return loss, bpb


def log_environment(logger: logging.Logger, cfg: Config, ctx: DistContext) -> None:
    """Write the script, the versions and the settings into the log file."""
    logger.info(Path(__file__).read_text(encoding="utf-8"))
    logger.info(f"Running Python {sys.version} with PyTorch {torch.__version__}")
    try:
        logger.info(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)
    except FileNotFoundError:
        logger.info("nvidia-smi is not available")
    logger.info(f"config: {asdict(cfg)}")
    logger.info(f"world_size:{ctx.world_size} flash_attn:{HAVE_FLASH_ATTN} zstd:{HAVE_ZSTD} brotli:{HAVE_BROTLI}")


def main() -> None:
    cfg = Config()
    cfg.validate()
    ctx = setup_distributed()
    logger = setup_logging(ctx, cfg.run_id)
    log_environment(logger, cfg, ctx)
    seed_everything(cfg.train.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    sp = spm.SentencePieceProcessor(model_file=cfg.data.tokenizer_path)
    if int(sp.vocab_size()) != cfg.data.vocab_size:
        raise ValueError(f"VOCAB_SIZE={cfg.data.vocab_size} does not match the tokenizer ({int(sp.vocab_size())})")
    tables = build_byte_tables(sp, cfg.data.vocab_size, ctx.device)
    val_tokens = load_validation_tokens(cfg.data.val_files)
    logger.info(f"val tokens: {val_tokens.numel()} from {cfg.data.val_files}")

    trainer = Trainer(cfg, ctx, logger, val_tokens, tables)
    logger.info(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    model = trainer.run()
    packer = ArtifactPacker(cfg.quant, ctx, logger)
    model_bytes = build_artifact(trainer, model, packer)
    packer.check_size(model_bytes)
    del trainer, model
    torch.cuda.empty_cache()

    val_loss, val_bpb = evaluate(cfg, ctx, logger, packer, val_tokens, tables)
    logger.info(f"final_ttt_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if ctx.is_distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
