"""
SP8192 + 11L + depth recurrence + XSA + value residual + MuonEq-R/WD + EMA + GPTQ(SDClip) + score-first TTT

fork of the SP8192 stack which is a fork of the SP4096 one which is a fork of the baseline. Run with

    torchrun --standalone --nproc_per_node=8 train_gpt.py

everything is an env var, see Hyperparameters.
"""
from __future__ import annotations

import collections
import copy
import glob
import io
import lzma
import math
import os
import random
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    import brotli
except ImportError:  # local box only, the pod has it
    brotli = None

try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func

    HAS_FA3 = True
except ImportError:
    flash_attn_3_func = None
    HAS_FA3 = False


# ----------------------------------------
# Hyperparameters
# ----------------------------------------


class Hyperparameters:
    # Experiment settings
    data_dir = os.environ.get("DATA_DIR", "./data/")
    seed = int(os.environ.get("SEED", 1337))
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))

    # Training length
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.667))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 2048 * 32 * 8))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))

    # Model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    leaky_slope = float(os.environ.get("LEAKY_SLOPE", 0.5))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.0))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    value_residual = bool(int(os.environ.get("VALUE_RESIDUAL", "1")))
    smear_enabled = bool(int(os.environ.get("SMEAR_ENABLED", "1")))
    parallel_residual_start = int(os.environ.get("PARALLEL_RESIDUAL_START", 7))

    # Depth recurrence: layers loop_start..loop_end are run (num_loops + 1) times
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))

    # Optimizer
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_row_normalize = bool(int(os.environ.get("MUON_ROW_NORMALIZE", "1")))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "0")))  # lost to EMA every time, kept for ablations
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    swa_start_frac = float(os.environ.get("SWA_START_FRAC", 0.85))

    # Quantization & compression
    compressor = os.environ.get("COMPRESSOR", "brotli")
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    clip_mode = os.environ.get("CLIP_MODE", "sd")  # sd | percentile
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))
    clip_percentile = float(os.environ.get("CLIP_PERCENTILE", 99.9985))
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_batch_seqs = int(os.environ.get("GPTQ_BATCH_SEQS", 8))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 13.0))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))

    # Eval
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))
    eval_batch_windows = int(os.environ.get("EVAL_BATCH_WINDOWS", 32))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 1))  # per rank
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))

    # Distributed (filled from torchrun)
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = max(8 // world_size, 1)

    # Paths
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    quantized_model_path = "final_model.int6.ptz"


CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,mlp_scale,resid_mix,q_gain,skip_weight,skip_gate,vr_lambda,smear",
    ).split(",")
    if pattern
)
ARTIFACT_LIMIT = 16_000_000


# ----------------------------------------
# Logging
# ----------------------------------------

_logger_hparams = None


def set_logging_hparams(h):
    global _logger_hparams
    _logger_hparams = h


def log0(msg, console=True):
    if _logger_hparams is None:
        print(msg)
        return
    if not _logger_hparams.is_main_process:
        return
    if console:
        print(msg, flush=True)
    if _logger_hparams.logfile is not None:
        with open(_logger_hparams.logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)


# ----------------------------------------
# Data
# ----------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * np.dtype("<i4").itemsize

_SHARD_NTOKENS_CACHE: dict[str, int] = {}
_MMAP_CACHE: dict[str, np.memmap] = {}


def _read_num_tokens(file: Path) -> int:
    key = str(file)
    cached = _SHARD_NTOKENS_CACHE.get(key)
    if cached is not None:
        return cached
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {file}")
    n = int(header[2])
    expected = HEADER_BYTES + n * 2
    if file.stat().st_size != expected:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected} bytes")
    _SHARD_NTOKENS_CACHE[key] = n
    return n


def _get_shard_memmap(file: Path) -> np.memmap:
    key = str(file)
    mm = _MMAP_CACHE.get(key)
    if mm is None:
        n = _read_num_tokens(file)
        mm = np.memmap(file, mode="r", dtype="<u2", offset=HEADER_BYTES, shape=(n,))
        _MMAP_CACHE[key] = mm
    return mm


def load_data_shard(file: Path) -> Tensor:
    n = _read_num_tokens(file)
    tokens_np = np.fromfile(file, dtype="<u2", count=n, offset=HEADER_BYTES)
    if tokens_np.size != n:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-docs validation set to fineweb_val_*.
    # No truncation to a multiple of seq_len here, the windows below deal with the tail.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is too short")
    return tokens


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
    sp_vocab_size = int(sp.vocab_size())
    # "▁" has to be its own piece, otherwise the leading-space arithmetic below is wrong
    if sp.piece_to_id("\u2581") == sp.unk_id():
        raise ValueError("Tokenizer has no '▁' piece, the leading-space byte count would be off")
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes_np = np.zeros((table_size,), dtype=np.int16)
    has_leading_space_np = np.zeros((table_size,), dtype=np.bool_)
    is_boundary_token_np = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary_token_np[token_id] = False
        if sp.is_byte(token_id):
            base_bytes_np[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("\u2581"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


class ValidationData:
    def __init__(self, h: Hyperparameters, device: torch.device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(
                f"VOCAB_SIZE={h.vocab_size} does not match tokenizer vocab_size={int(self.sp.vocab_size())}"
            )
        self.bos_id = int(self.sp.bos_id())
        self.val_tokens = load_validation_tokens(h.val_files)
        (
            self.base_bytes_lut,
            self.has_leading_space_lut,
            self.is_boundary_token_lut,
        ) = build_sentencepiece_luts(self.sp, h.vocab_size, device)

    def token_bytes(self, prev_ids: Tensor, tgt_ids: Tensor) -> Tensor:
        """utf-8 bytes of the original text that each target stands for"""
        nbytes = self.base_bytes_lut[tgt_ids].to(torch.float64)
        nbytes = nbytes + (self.has_leading_space_lut[tgt_ids] & ~self.is_boundary_token_lut[prev_ids]).to(torch.float64)
        return nbytes


class ShuffledSequenceLoader:
    """Sequences of seq_len+1 tokens, drawn without replacement from this rank's shards, random phase per shard."""

    def __init__(self, h: Hyperparameters, device: torch.device):
        self.h = h
        self.world_size = h.world_size
        self.seq_len = h.train_seq_len
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"No files found for pattern: {h.train_files}")
        if len(all_files) >= h.world_size:
            self.files = all_files[h.rank :: h.world_size]
        else:
            self.files = all_files
        self.rng = np.random.Generator(np.random.PCG64([h.seed, h.rank]))
        self.num_tokens = [_read_num_tokens(f) for f in self.files]
        self.start_inds: list[list[int]] = [[] for _ in self.files]
        for si in range(len(self.files)):
            self._reset_shard(si)

    def _reset_shard(self, si: int) -> None:
        n = self.num_tokens[si]
        max_phase = min(self.seq_len - 1, max(0, n - self.seq_len - 1))
        phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
        num_sequences = (n - 1 - phase) // self.seq_len
        order = self.rng.permutation(num_sequences)
        self.start_inds[si] = (phase + order * self.seq_len).tolist()

    def draw(self, num_seqs: int) -> tuple[Tensor, Tensor]:
        remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
        x = torch.empty((num_seqs, self.seq_len), dtype=torch.int64)
        y = torch.empty((num_seqs, self.seq_len), dtype=torch.int64)
        for bi in range(num_seqs):
            total = remaining.sum()
            if total <= 0:
                for si in range(len(self.files)):
                    self._reset_shard(si)
                remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
                total = remaining.sum()
            si = int(self.rng.choice(len(self.files), p=remaining / total))
            start = self.start_inds[si].pop()
            remaining[si] -= 1
            mm = _get_shard_memmap(self.files[si])
            window = torch.from_numpy(np.array(mm[start : start + self.seq_len + 1], dtype=np.int64))
            x[bi] = window[:-1]
            y[bi] = window[1:]
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def next_batch(self, global_tokens: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        device_tokens = global_tokens // (self.world_size * grad_accum_steps)
        return self.draw(device_tokens // self.seq_len)


# ----------------------------------------
# Model
# ----------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


class Rotary(nn.Module):
    # tables are made once, in full: a lazy cache filled under no_grad bit me in TTT
    def __init__(self, rope_dims: int, base: float, max_len: int):
        super().__init__()
        self.rope_dims = rope_dims
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.cos[:, :seq_len].to(dtype), self.sin[:, :seq_len].to(dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    x_rope = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((x_rope, x_pass), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, D] in and out"""
    if HAS_FA3 and q.is_cuda:
        out = flash_attn_3_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=(k.size(2) != q.size(2)),
    )
    return out.transpose(1, 2).contiguous()


class CausalSelfAttention(nn.Module):
    def __init__(self, h: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = h.model_dim
        if dim % h.num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if h.num_heads % h.num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = h.num_heads
        self.num_kv_heads = h.num_kv_heads
        self.head_dim = dim // h.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        # layer 0 makes v0, so there is nothing to mix there (and DDP hates unused params)
        self.mix_v = h.value_residual and layer_idx > 0
        if self.mix_v:
            self.vr_lambda = nn.Parameter(torch.tensor([0.5, 0.5], dtype=torch.float32))
        self.use_xsa = layer_idx >= h.num_layers - h.xsa_last_n
        self.rope_dims = h.rope_dims if h.rope_dims > 0 else self.head_dim
        self.rotary = Rotary(self.rope_dims, h.rope_base, max(h.train_seq_len, h.eval_seq_len))

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        """exclusive self attention: take out of y what points along the token's own value"""
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        yg = y.reshape(B, T, Hkv, H // Hkv, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        yg = yg - (yg * vn).sum(dim=-1, keepdim=True) * vn
        return yg.reshape(B, T, H, D)

    def forward(self, x: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        raw_v = v
        if self.mix_v and v0 is not None:
            lam = self.vr_lambda.to(dtype=v.dtype)
            v = lam[0] * v + lam[1] * v0
        q = F.rms_norm(q, (q.size(-1),)).to(v.dtype)
        k = F.rms_norm(k, (k.size(-1),)).to(v.dtype)
        cos, sin = self.rotary(seqlen, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = causal_attention(q, k, v)
        if self.use_xsa:
            y = self._xsa(y, v)
        return self.proj(y.reshape(bsz, seqlen, dim)), raw_v


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: float, slope: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.slope = slope
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=self.slope).square())


class SmearGate(nn.Module):
    """x_t += g * x_{t-1}, but never over a document start"""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -3.0, dtype=torch.float32))

    def forward(self, x: Tensor, starts_doc: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(dtype=x.dtype)[None, None, :]
        x_prev = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        x_prev = x_prev.masked_fill(starts_doc[..., None], 0.0)
        return x + g * x_prev


class Block(nn.Module):
    def __init__(self, h: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = h.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(h, layer_idx)
        self.mlp = MLP(dim, h.mlp_mult, h.leaky_slope)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = h.parallel_residual_start >= 0 and layer_idx >= h.parallel_residual_start

    def forward(self, x: Tensor, x0: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out, raw_v = self.attn(self.attn_norm(x_in) * self.ln_scale_factor, v0)
        attn_out = self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
            x_out = x_in + attn_out + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out
        else:
            x_out = x_in + attn_out
            mlp_out = self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)
            x_out = x_out + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out
        return x_out, raw_v


class GPT(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        if h.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {h.logit_softcap}")
        if h.num_loops > 0 and not (0 < h.loop_start <= h.loop_end < h.num_layers):
            raise ValueError("bad loop range (layer 0 must stay outside of the loop)")
        self.bos_id = int(os.environ.get("BOS_ID", 1))
        self.logit_softcap = h.logit_softcap
        self.tied_embed_init_std = h.tied_embed_init_std
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.model_dim) if h.smear_enabled else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()

        self.looping_active = False
        plain = list(range(h.num_layers))
        if h.num_loops > 0:
            seg = list(range(h.loop_start, h.loop_end + 1))
            looped = plain[: h.loop_start] + seg * (h.num_loops + 1) + plain[h.loop_end + 1 :]
        else:
            looped = plain
        self.order_plain = self._split(plain)
        self.order_looped = self._split(looped)
        self.num_skips = min(len(self.order_looped[0]), len(self.order_looped[1]))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, h.model_dim, dtype=torch.float32))
        self.skip_gates = nn.Parameter(torch.zeros(self.num_skips, h.model_dim, dtype=torch.float32))
        self._init_weights()

    @staticmethod
    def _split(order: list[int]) -> tuple[list[int], list[int]]:
        half = len(order) // 2
        return order[:half], order[half:]

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        if self.smear is not None:
            x = self.smear(x, input_ids == self.bos_id)
        x0 = x
        v0 = None
        skips: list[Tensor] = []
        enc, dec = self.order_looped if self.looping_active else self.order_plain
        for i in enc:
            x, raw_v = self.blocks[i](x, x0, v0)
            if v0 is None:
                v0 = raw_v
            skips.append(x)
        for j, i in enumerate(dec):
            if skips and j < self.num_skips:
                s = self.skip_weights[j].to(dtype=x.dtype)[None, None, :] * skips.pop()
                g = torch.sigmoid(self.skip_gates[j]).to(dtype=x.dtype)[None, None, :]
                x = torch.lerp(s, x, g)
            x, _ = self.blocks[i](x, x0, v0)
        return self.final_norm(x)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = self.hidden(input_ids)
        logits_proj = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor, reduction: str = "mean") -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction=reduction
        )


def cast_model(model: nn.Module) -> None:
    """the embedding (which is the head too) lives in bf16, everything else stays fp32 and is cast on use"""
    model.tok_emb.bfloat16()


# ----------------------------------------
# Optimization
# ----------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    transposed = X.size(0) > X.size(1)
    if transposed:
        X = X.T
    X = X / (X.norm() + eps)
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, backend_steps, nesterov=True, weight_decay=0.0, row_normalize=False):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                backend_steps=backend_steps,
                nesterov=nesterov,
                weight_decay=weight_decay,
                row_normalize=row_normalize,
            ),
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
            lr, momentum = group["lr"], group["momentum"]
            total = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    if group["nesterov"]:
                        g = g.add(buf, alpha=momentum)
                    else:
                        g = buf.clone()
                    if group["row_normalize"]:
                        g = g / g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).to(g.dtype)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                if group["weight_decay"] > 0.0:
                    p.data.mul_(1.0 - lr * group["weight_decay"])
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                p.add_(g, alpha=-lr)
                curr += p.numel()
        return loss


class Optimizers:
    def __init__(self, h: Hyperparameters, base_model: GPT):
        embeds, matrices, scalars = [], [], []
        for name, p in base_model.named_parameters():
            if name == "tok_emb.weight":
                embeds.append(p)
            elif p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
                matrices.append(p)
            else:
                scalars.append(p)
        adam_kw = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.optimizer_tok = torch.optim.AdamW(
            [{"params": embeds, "lr": h.embed_lr, "base_lr": h.embed_lr}], weight_decay=h.embed_wd, **adam_kw
        )
        self.optimizer_muon = Muon(
            matrices,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.optimizer_muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.optimizer_scalar = torch.optim.AdamW(
            [{"params": scalars, "lr": h.scalar_lr, "base_lr": h.scalar_lr}], weight_decay=h.adam_wd, **adam_kw
        )
        self.optimizers = [self.optimizer_tok, self.optimizer_muon, self.optimizer_scalar]

    def __iter__(self):
        return iter(self.optimizers)

    def zero_grad_all(self) -> None:
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)

    def step(self) -> None:
        for opt in self.optimizers:
            opt.step()
        self.zero_grad_all()


# ----------------------------------------
# Quantization
# ----------------------------------------

SMALL_TENSOR_NUMEL = 65_536


def classify_param(name: str) -> str:
    if "tok_emb" in name:
        return "embed"
    if ".mlp." in name:
        return "mlp"
    if ".attn." in name or name.startswith("attn"):
        return "attn"
    return "other"


def collect_hessians(
    base_model: GPT,
    loader: ShuffledSequenceLoader,
    h: Hyperparameters,
    device: torch.device,
    deadline: float,
) -> tuple[dict[str, Tensor], int]:
    """X^T X of the inputs of every matrix, over training sequences of this run's own loader. Stops at `deadline`
    (perf_counter), which the caller puts inside of the training cap."""
    hessians: dict[str, Tensor] = {}
    hooks = []

    def make_hook(key):
        def hook_fn(module, inp, out):
            x = inp[0].detach().float()
            x = x.reshape(-1, x.shape[-1])
            hessians[key].addmm_(x.T, x)

        return hook_fn

    def head_hook(module, inp, out):
        x = out.detach().float()
        x = x.reshape(-1, x.shape[-1])
        hessians["tok_emb.weight"].addmm_(x.T, x)

    for name, module in base_model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > SMALL_TENSOR_NUMEL:
            key = name + ".weight"
            cols = module.weight.shape[1]
            hessians[key] = torch.zeros(cols, cols, dtype=torch.float32, device=device)
            hooks.append(module.register_forward_hook(make_hook(key)))
    hessians["tok_emb.weight"] = torch.zeros(h.model_dim, h.model_dim, dtype=torch.float32, device=device)
    hooks.append(base_model.final_norm.register_forward_hook(head_hook))

    n_seqs = 0
    base_model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(h.gptq_calibration_batches):
            if time.perf_counter() >= deadline:
                break
            x, _ = loader.draw(h.gptq_batch_seqs)
            base_model.forward_logits(x)
            torch.cuda.synchronize()
            n_seqs += h.gptq_batch_seqs
    for hook in hooks:
        hook.remove()

    count = torch.tensor([n_seqs], dtype=torch.float64, device=device)
    if h.distributed:
        dist.all_reduce(count, op=dist.ReduceOp.SUM)
        for key in sorted(hessians):
            dist.all_reduce(hessians[key], op=dist.ReduceOp.SUM)
    total_seqs = int(count.item())
    for key in hessians:
        hessians[key] = (hessians[key] / max(total_seqs, 1)).cpu()
    return hessians, total_seqs


def row_scales(W: Tensor, clip_range: int, clip_sigmas: float, h: Hyperparameters) -> Tensor:
    if h.clip_mode == "percentile":
        limit = torch.quantile(W.abs(), h.clip_percentile / 100.0, dim=1)
    else:
        limit = clip_sigmas * W.std(dim=1)
    return (limit / clip_range).clamp_min(1e-6).to(torch.float16)


def gptq_quantize_weight(
    w: Tensor, H: Tensor, clip_sigmas: float, clip_range: int, h: Hyperparameters
) -> tuple[Tensor, Tensor]:
    block_size = h.gptq_block_size
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()

    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    damp = h.gptq_damp * H.diag().mean()
    H.diagonal().add_(damp)

    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_perm = W_orig[:, perm].clone()
    W_perm[:, dead[perm]] = 0
    H = H[perm][:, perm]

    try:
        Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
        Hinv = torch.linalg.cholesky(Hinv, upper=True)
    except torch.linalg.LinAlgError:
        # happens on a badly undertrained smoke run, plain rounding is fine there
        log0("gptq: cholesky failed, falling back to round-to-nearest")
        Hinv = torch.eye(cols, dtype=torch.float32)

    s = row_scales(W_orig, clip_range, clip_sigmas, h)
    sf = s.float()

    Q = torch.zeros(rows, cols, dtype=torch.int8)
    W_work = W_perm.clone()
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W_block = W_work[:, i1:i2].clone()
        Hinv_block = Hinv[i1:i2, i1:i2]
        Err = torch.zeros(rows, i2 - i1)
        for j in range(i2 - i1):
            w_col = W_block[:, j]
            d = Hinv_block[j, j]
            q_col = torch.clamp(torch.round(w_col / sf), -clip_range, clip_range)
            Q[:, i1 + j] = q_col.to(torch.int8)
            err = (w_col - q_col * sf) / d
            Err[:, j] = err
            W_block[:, j:] -= err.unsqueeze(1) * Hinv_block[j, j:].unsqueeze(0)
        if i2 < cols:
            W_work[:, i2:] -= Err @ Hinv[i1:i2, i2:]
    return Q[:, invperm].contiguous(), s


def gptq_mixed_quantize(
    state_dict: dict[str, Tensor], hessians: dict[str, Tensor], h: Hyperparameters
) -> tuple[dict[str, Tensor], dict[str, str]]:
    result: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for name, tensor in state_dict.items():
        t = tensor.detach().cpu().contiguous()
        if not t.is_floating_point() or t.numel() <= SMALL_TENSOR_NUMEL:
            result[name] = t.to(torch.float16) if t.is_floating_point() else t
            meta[name] = "passthrough"
            continue
        is_embed = classify_param(name) == "embed"
        bits = h.embed_bits if is_embed else h.matrix_bits
        cs = h.embed_clip_sigmas if is_embed else h.matrix_clip_sigmas
        q, s = gptq_quantize_weight(t, hessians[name], cs, 2 ** (bits - 1) - 1, h)
        result[name + ".q"] = q
        result[name + ".scale"] = s
        meta[name] = f"gptq (int{bits})"
    groups = collections.defaultdict(list)
    for name, kind in meta.items():
        groups[kind].append(re.sub(r"\.\d+\.", ".*.", name))
    log0("Quantized weights:")
    for kind in sorted(groups):
        log0(f"  {kind}: {', '.join(sorted(set(groups[kind])))}")
    return result, meta


def dequantize_mixed(
    result: dict[str, Tensor], meta: dict[str, str], template_sd: dict[str, Tensor]
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, orig in template_sd.items():
        kind = meta[name]
        if kind == "passthrough":
            out[name] = result[name].to(orig.dtype)
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        out[name] = (q.float() * s.float().view(-1, 1)).to(orig.dtype)
    return out


# ---- compression

_BSHF_MAGIC = b"BSHF"


def _byte_shuffle(data: bytes, stride: int = 2) -> bytes:
    if stride <= 1 or len(data) < stride:
        return data
    src = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(len(src), dtype=np.uint8)
    dest = 0
    for pos in range(stride):
        chunk = src[pos::stride]
        out[dest : dest + len(chunk)] = chunk
        dest += len(chunk)
    return _BSHF_MAGIC + bytes([stride]) + out.tobytes()


def _byte_unshuffle(data: bytes) -> bytes:
    if data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    n = len(payload)
    out = np.empty(n, dtype=np.uint8)
    src = 0
    for pos in range(stride):
        chunk_len = n // stride + (1 if pos < n % stride else 0)
        out[pos::stride][:chunk_len] = payload[src : src + chunk_len]
        src += chunk_len
    return out.tobytes()


def _compress(data: bytes, compressor: str) -> bytes:
    data = _byte_shuffle(data)
    if compressor == "lzma":
        return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    if compressor == "brotli":
        return brotli.compress(data, quality=11, lgwin=24)
    raise ValueError(f"Unknown compressor: {compressor!r}")


def _decompress(data: bytes, compressor: str) -> bytes:
    if compressor == "lzma":
        raw = lzma.decompress(data)
    elif compressor == "brotli":
        raw = brotli.decompress(data)
    else:
        raise ValueError(f"Unknown compressor: {compressor!r}")
    return _byte_unshuffle(raw)


def serialize(h: Hyperparameters, base_model: GPT, hessians: dict[str, Tensor], code: str) -> int:
    code_bytes = len(code.encode("utf-8"))
    bytes_total = 0
    if h.is_main_process:
        torch.save(base_model.state_dict(), h.model_path)
        model_bytes = os.path.getsize(h.model_path)
        log0(f"Serialized model: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        sd_cpu = {k: v.detach().cpu() for k, v in base_model.state_dict().items()}
        quant_result, quant_meta = gptq_mixed_quantize(sd_cpu, hessians, h)
        quant_buf = io.BytesIO()
        torch.save({"w": quant_result, "m": quant_meta}, quant_buf)
        quant_blob = _compress(quant_buf.getvalue(), h.compressor)
        with open(h.quantized_model_path, "wb") as f:
            f.write(quant_blob)
        quant_file_bytes = len(quant_blob)
        bytes_total = quant_file_bytes + code_bytes
        log0(f"Serialized model quantized+{h.compressor}: {quant_file_bytes} bytes")
        log0(f"Total submission size quantized+{h.compressor}: {bytes_total} bytes")
        if bytes_total > ARTIFACT_LIMIT:
            raise RuntimeError(f"submission is {bytes_total} bytes, over the limit of {ARTIFACT_LIMIT}")
    if h.distributed:
        dist.barrier()
    return bytes_total


def deserialize(h: Hyperparameters, device: torch.device) -> GPT:
    eval_model = GPT(h).to(device)
    cast_model(eval_model)
    eval_model.looping_active = h.num_loops > 0
    template = {k: v.detach().cpu() for k, v in eval_model.state_dict().items()}
    with open(h.quantized_model_path, "rb") as f:
        quant_blob_disk = f.read()
    quant_state = torch.load(io.BytesIO(_decompress(quant_blob_disk, h.compressor)), map_location="cpu")
    deq_state = dequantize_mixed(quant_state["w"], quant_state["m"], template)
    eval_model.load_state_dict(deq_state, strict=True)
    return eval_model


# ----------------------------------------
# Evaluation
# ----------------------------------------


def _loss_bpb(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    val_loss = (loss_sum / token_count).item()
    val_bpb = (loss_sum / math.log(2.0) / byte_count).item()
    return val_loss, val_bpb


def _reduce_sums(h: Hyperparameters, *sums: Tensor) -> None:
    if h.distributed:
        for t in sums:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)


def eval_val(h: Hyperparameters, device: torch.device, val_data: ValidationData, logits_fn):
    """plain non-overlapping eval, only for the log while training and before/after quantization. The sequence that
    sticks out at the end is padded and masked, so that every target is counted."""
    seq_len = h.eval_seq_len
    local_batch_tokens = h.val_batch_tokens // (h.world_size * h.grad_accum_steps)
    batch_seqs = max(local_batch_tokens // seq_len, 1)
    total_tokens = val_data.val_tokens.numel() - 1
    total_seqs = (total_tokens + seq_len - 1) // seq_len
    seq_start = (total_seqs * h.rank) // h.world_size
    seq_end = (total_seqs * (h.rank + 1)) // h.world_size

    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)

    with torch.no_grad():
        for batch_start in range(seq_start, seq_end, batch_seqs):
            batch_end = min(batch_start + batch_seqs, seq_end)
            x = torch.zeros(batch_seqs, seq_len, dtype=torch.int64, device=device)
            y = torch.zeros(batch_seqs, seq_len, dtype=torch.int64, device=device)
            mask = torch.zeros(batch_seqs, seq_len, dtype=torch.bool, device=device)
            for i, s in enumerate(range(batch_start, batch_end)):
                a = s * seq_len
                b = min(a + seq_len, total_tokens)
                local = val_data.val_tokens[a : b + 1].to(device=device, dtype=torch.int64)
                x[i, : b - a] = local[:-1]
                y[i, : b - a] = local[1:]
                mask[i, : b - a] = True
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = F.cross_entropy(
                logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction="none"
            ).reshape(batch_seqs, seq_len)
            val_loss_sum += nll[mask].to(torch.float64).sum()
            val_token_count += mask.sum()
            val_byte_count += val_data.token_bytes(x[mask], y[mask]).sum()

    _reduce_sums(h, val_loss_sum, val_token_count, val_byte_count)
    return _loss_bpb(val_loss_sum, val_token_count, val_byte_count)


def eval_val_sliding(
    h: Hyperparameters, device: torch.device, val_data: ValidationData, logits_fn
) -> tuple[float, float]:
    """Sliding windows of eval_seq_len, step eval_stride; a window scores its last `stride` targets (the first window
    all of them). A window whose new targets would lie behind the end is not made, so nothing is counted twice."""
    seq_len = h.eval_seq_len
    stride = h.eval_stride
    context_size = seq_len - stride
    total_tokens = val_data.val_tokens.numel() - 1
    window_starts = [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context_size < total_tokens]
    total_windows = len(window_starts)
    my_s = (total_windows * h.rank) // h.world_size
    my_e = (total_windows * (h.rank + 1)) // h.world_size
    my_windows = window_starts[my_s:my_e]

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    bs = h.eval_batch_windows
    with torch.no_grad():
        for bi in range(0, len(my_windows), bs):
            batch_ws = my_windows[bi : bi + bs]
            x_batch = torch.zeros(bs, seq_len, dtype=torch.int64, device=device)
            y_batch = torch.zeros(bs, seq_len, dtype=torch.int64, device=device)
            wlens = []
            for i, ws in enumerate(batch_ws):
                we = min(ws + seq_len, total_tokens)
                wlen = we - ws
                wlens.append(wlen)
                tokens = val_data.val_tokens[ws : we + 1].to(device=device, dtype=torch.int64)
                x_batch[i, :wlen] = tokens[:-1]
                y_batch[i, :wlen] = tokens[1:]
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x_batch)
            nll = F.cross_entropy(
                logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none"
            ).reshape(bs, seq_len)
            for i, ws in enumerate(batch_ws):
                wlen = wlens[i]
                s = 0 if ws == 0 else context_size
                scored_nll = nll[i, s:wlen].to(torch.float64)
                loss_sum += scored_nll.sum()
                token_count += float(wlen - s)
                byte_count += val_data.token_bytes(x_batch[i, s:wlen], y_batch[i, s:wlen]).sum()
            if h.is_main_process and (bi // bs) % 2000 == 0:
                done = min(bi + bs, len(my_windows))
                rl = (loss_sum / token_count).item()
                log0(f"  sliding_eval {done}/{len(my_windows)} windows running_loss:{rl:.4f}", console=False)

    _reduce_sums(h, loss_sum, token_count, byte_count)
    log0(f"sliding_eval:done tokens:{int(token_count.item())} bytes:{int(byte_count.item())}")
    return _loss_bpb(loss_sum, token_count, byte_count)


def eval_val_ttt(
    h: Hyperparameters, device: torch.device, val_data: ValidationData, base_model: GPT, logits_fn, train_fn
) -> tuple[float, float]:
    """Score-first TTT. The split is cut into chunks of ttt_chunk_tokens targets. For each chunk in order: (1) score its
    windows with the weights as they are, (2) SGD on the chunk's own tokens, which are all graded by now. The last
    chunk is scored and not trained on."""
    seq_len = h.eval_seq_len
    stride = h.eval_stride
    ttt_chunk = h.ttt_chunk_tokens
    context_size = seq_len - stride
    total_tokens = val_data.val_tokens.numel() - 1
    window_starts = [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context_size < total_tokens]
    num_chunks = (total_tokens + ttt_chunk - 1) // ttt_chunk

    # a window belongs to the chunk of its first scored target. The chunk is a multiple of the stride, so no window
    # scores targets of two chunks (the first window is seq_len long and the chunk is a multiple of that as well)
    if ttt_chunk % stride != 0 or ttt_chunk % seq_len != 0:
        raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE and EVAL_SEQ_LEN")
    chunk_windows: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in window_starts:
        s = 0 if ws == 0 else context_size
        scored_start = ws + s
        ci = min(scored_start // ttt_chunk, num_chunks - 1)
        chunk_windows[ci].append(ws)
    log0(
        f"ttt_sliding:start chunks={num_chunks} chunk_tokens={ttt_chunk} total_windows={len(window_starts)} "
        f"stride={stride} ttt_lr={h.ttt_lr} ttt_epochs={h.ttt_epochs} freeze_blocks={h.ttt_freeze_blocks}"
    )

    frozen = set(range(min(h.ttt_freeze_blocks, len(base_model.blocks))))
    ttt_params = []
    for name, p in base_model.named_parameters():
        freeze = any(f"blocks.{bi}." in name for bi in frozen)
        p.requires_grad_(not freeze)
        if not freeze:
            ttt_params.append(p)
    log0(f"ttt_sliding:params unfrozen={sum(p.numel() for p in ttt_params)}")
    optimizer = torch.optim.SGD(ttt_params, lr=h.ttt_lr, momentum=h.ttt_momentum)

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    batch_windows = h.eval_batch_windows
    t0 = time.perf_counter()

    for ci in range(num_chunks):
        windows = chunk_windows[ci]
        chunk_start = ci * ttt_chunk
        chunk_end = min((ci + 1) * ttt_chunk, total_tokens)

        # --- Phase 1: SCORE this chunk's windows
        my_s = (len(windows) * h.rank) // h.world_size
        my_e = (len(windows) * (h.rank + 1)) // h.world_size
        my_windows = windows[my_s:my_e]
        base_model.eval()
        with torch.no_grad():
            for bi in range(0, len(my_windows), batch_windows):
                batch_ws = my_windows[bi : bi + batch_windows]
                x_batch = torch.zeros(batch_windows, seq_len, dtype=torch.int64, device=device)
                y_batch = torch.zeros(batch_windows, seq_len, dtype=torch.int64, device=device)
                wlens = []
                for i, ws in enumerate(batch_ws):
                    we = min(ws + seq_len, total_tokens)
                    wlen = we - ws
                    wlens.append(wlen)
                    chunk_tok = val_data.val_tokens[ws : we + 1].to(device=device, dtype=torch.int64)
                    x_batch[i, :wlen] = chunk_tok[:-1]
                    y_batch[i, :wlen] = chunk_tok[1:]
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = logits_fn(x_batch)
                nll = F.cross_entropy(
                    logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none"
                ).reshape(batch_windows, seq_len)
                for i, ws in enumerate(batch_ws):
                    wlen = wlens[i]
                    s = 0 if ws == 0 else context_size
                    scored_nll = nll[i, s:wlen].to(torch.float64)
                    loss_sum += scored_nll.sum()
                    token_count += float(wlen - s)
                    tgt, prev = y_batch[i, s:wlen], x_batch[i, s:wlen]
                    byte_count += val_data.token_bytes(prev, tgt).sum()

        # --- Phase 2: TRAIN on this chunk (all of it is scored)
        is_last_chunk = ci == num_chunks - 1
        if not is_last_chunk and h.ttt_epochs > 0:
            base_model.train()
            chunk_seqs = (chunk_end - chunk_start) // seq_len
            cos_lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for pg in optimizer.param_groups:
                pg["lr"] = cos_lr
            global_bs = h.ttt_batch_seqs * h.world_size
            for _ep in range(h.ttt_epochs):
                for b0 in range(0, chunk_seqs, global_bs):
                    b1 = min(b0 + global_bs, chunk_seqs)
                    mine = range(b0 + h.rank, b1, h.world_size)
                    optimizer.zero_grad(set_to_none=False)
                    if len(mine) > 0:
                        starts = [chunk_start + si * seq_len for si in mine]
                        local = torch.stack([val_data.val_tokens[a : a + seq_len + 1] for a in starts])
                        local = local.to(device=device, dtype=torch.int64)
                        x, y = local[:, :-1].contiguous(), local[:, 1:].contiguous()
                        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                            loss = train_fn(x, y)
                        # mean over own seqs -> share of the global batch
                        (loss * (len(mine) / (b1 - b0))).backward()
                    for p in ttt_params:
                        if p.grad is None:
                            p.grad = torch.zeros_like(p)
                        if h.distributed:
                            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                    torch.nn.utils.clip_grad_norm_(ttt_params, h.ttt_grad_clip)
                    optimizer.step()

        if h.is_main_process and (ci % 50 == 0 or is_last_chunk):
            elapsed = time.perf_counter() - t0
            rl = (loss_sum / token_count.clamp_min(1)).item()
            rbpb = (loss_sum / math.log(2.0) / byte_count.clamp_min(1)).item()
            log0(f"  ttt_chunk [{ci + 1}/{num_chunks}] loss={rl:.6f} bpb={rbpb:.6f} time={elapsed:.1f}s")

    _reduce_sums(h, loss_sum, token_count, byte_count)
    for p in base_model.parameters():
        p.requires_grad_(True)
    base_model.eval()
    val_loss, val_bpb = _loss_bpb(loss_sum, token_count, byte_count)
    log0(f"ttt_sliding:done tokens:{int(token_count.item())} bytes:{int(byte_count.item())} elapsed={time.perf_counter() - t0:.1f}s")
    return val_loss, val_bpb


def timed_eval(label: str, fn, *args, **kwargs) -> tuple[float, float]:
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args, **kwargs)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log0(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms")
    return val_loss, val_bpb


# ----------------------------------------
# Training
# ----------------------------------------


class WeightAverage:
    """EMA of all weights, and (if swa_enabled) a plain average over the tail"""

    def __init__(self, h: Hyperparameters, model: nn.Module):
        self.decay = h.ema_decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}
        self.swa_state: dict[str, Tensor] | None = None
        self.swa_count = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    @torch.no_grad()
    def update_swa(self, model: nn.Module) -> None:
        if self.swa_state is None:
            self.swa_state = {name: t.detach().float().clone() for name, t in model.state_dict().items()}
            self.swa_count = 1
        else:
            for name, t in model.state_dict().items():
                self.swa_state[name] += t.detach().float()
            self.swa_count += 1

    def apply(self, h: Hyperparameters, model: nn.Module) -> None:
        current = model.state_dict()
        if h.swa_enabled and self.swa_count > 0:
            log0(f"swa: applying SWA weights ({self.swa_count} snapshots)")
            avg = {name: (t / self.swa_count).to(current[name].dtype) for name, t in self.swa_state.items()}
        else:
            log0("ema: applying EMA weights")
            avg = {name: t.to(current[name].dtype) for name, t in self.shadow.items()}
        model.load_state_dict(avg, strict=True)


def train_model(h: Hyperparameters, device: torch.device, val_data: ValidationData):
    base_model = GPT(h).to(device)
    cast_model(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    compiled_logits = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    if h.distributed:
        model = DDP(compiled_model, device_ids=[h.local_rank], broadcast_buffers=False)
    else:
        model = compiled_model
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"layer order plain:{h.num_layers} looped: encoder:{base_model.order_looped[0]} decoder:{base_model.order_looped[1]}")

    optimizers = Optimizers(h, base_model)
    train_loader = ShuffledSequenceLoader(h, device)

    max_wallclock_ms = 1000.0 * h.max_wallclock_seconds if h.max_wallclock_seconds > 0 else None
    # the calibration pass has to fit into the same 600s
    train_budget_ms = None
    if max_wallclock_ms is not None:
        train_budget_ms = max_wallclock_ms - 1000.0 * h.gptq_reserve_seconds
        log0(f"gptq:reserving {h.gptq_reserve_seconds:.0f}s, effective={train_budget_ms:.0f}ms")

    def training_frac(step: int, elapsed_ms: float) -> float:
        if train_budget_ms is None:
            return step / max(h.iterations, 1)
        return max(elapsed_ms / max(train_budget_ms, 1e-9), step / max(h.iterations, 1))

    def lr_mul(frac: float) -> float:
        if h.warmdown_frac <= 0:
            return 1.0
        if frac >= 1.0 - h.warmdown_frac:
            return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
        return 1.0

    def step_fn(step: int, lr_scale: float) -> Tensor:
        optimizers.zero_grad_all()
        train_loss = torch.zeros((), device=device)
        for micro_step in range(h.grad_accum_steps):
            if h.distributed:
                model.require_backward_grad_sync = micro_step == h.grad_accum_steps - 1
            x, y = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss / h.grad_accum_steps).backward()
        train_loss /= h.grad_accum_steps
        frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum
        for group in optimizers.optimizer_muon.param_groups:
            group["momentum"] = momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        optimizers.step()
        return train_loss

    # Warmup primes the compiled forward/backward/optimizer paths (both depths), then everything is put back.
    if h.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        base_model.train()
        for depth_name, looping in (("plain", False), ("looped", True)):
            if looping and h.num_loops <= 0:
                continue
            base_model.looping_active = looping
            for warmup_step in range(h.warmup_steps):
                step_fn(warmup_step, 1.0)
                if warmup_step <= 5 or (warmup_step + 1) % 10 == 0 or warmup_step + 1 == h.warmup_steps:
                    log0(f"warmup_step ({depth_name}): {warmup_step + 1}/{h.warmup_steps}")
        base_model.looping_active = False
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        optimizers.zero_grad_all()
        if h.distributed:
            model.require_backward_grad_sync = True
        train_loader = ShuffledSequenceLoader(h, device)

    averages = WeightAverage(h, base_model)
    training_time_ms = 0.0
    stop_after_step = None
    torch.cuda.synchronize()
    if h.distributed:
        dist.barrier()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)

        should_validate = not last_step and h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0
        if should_validate:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, compiled_logits)
            log0(
                f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f} "
                f"train_time: {training_time_ms:.0f}ms step_avg: {training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            if stop_after_step is not None and step < h.iterations:
                elapsed = training_time_ms + 1000.0 * (time.perf_counter() - t0)
                log0(f"stopping_early: wallclock_cap train_time: {elapsed:.0f}ms step: {step}/{h.iterations}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = training_frac(step, elapsed_ms)
        scale = lr_mul(frac)
        if h.num_loops > 0 and not base_model.looping_active:
            go_deep = torch.tensor(int(frac >= h.enable_looping_at), device=device)
            if h.distributed:
                # clocks differ by some ms between ranks, the depth must not
                dist.all_reduce(go_deep, op=dist.ReduceOp.MAX)
            if go_deep.item():
                base_model.looping_active = True
                log0(f"layer_loop:enabled step:{step} frac:{frac:.3f}")
        train_loss = step_fn(step, scale)
        averages.update(base_model)
        if h.swa_enabled and frac >= h.swa_start_frac and step % h.swa_every == 0:
            averages.update_swa(base_model)

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        should_log_train = h.train_log_every > 0 and (
            step <= 5 or step % h.train_log_every == 0 or stop_after_step is not None
        )
        if should_log_train:
            tok_per_sec = step * h.train_batch_tokens / (approx_training_time_ms / 1000.0)
            log0(
                f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} "
                f"train_time: {approx_training_time_ms / 60000:.1f}m tok/s: {tok_per_sec:.0f}"
            )

        reached_cap = train_budget_ms is not None and approx_training_time_ms >= train_budget_ms
        if h.distributed and train_budget_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )
    averages.apply(h, base_model)
    base_model.looping_active = h.num_loops > 0

    # Calibration on training sequences, still on the training clock: it may go on until the cap and not a moment longer
    torch.cuda.synchronize()
    used_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
    left_s = (max_wallclock_ms - used_ms) / 1000.0 - 1.0 if max_wallclock_ms is not None else float("inf")
    hessians, calib_seqs = collect_hessians(base_model, train_loader, h, device, deadline=time.perf_counter() + left_s)
    torch.cuda.synchronize()
    total_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
    log0(
        f"GPTQ:collected {len(hessians)} Hessians from {calib_seqs} train seqs in {(total_ms - used_ms) / 1000.0:.1f}s, "
        f"train+calibration {total_ms:.0f}ms"
    )
    return base_model, compiled_logits, hessians


# ----------------------------------------
# Main
# ----------------------------------------


def sample_text(h: Hyperparameters, val_data: ValidationData, model: GPT, device: torch.device, n_tokens: int = 48) -> str:
    """a greedy sample for the log, so that I can see with my own eyes that the thing is alive"""
    ids = [val_data.bos_id]
    with torch.no_grad():
        for _ in range(n_tokens):
            x = torch.tensor([ids], dtype=torch.int64, device=device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(x)
            ids.append(int(logits[0, -1].argmax().item()))
    return val_data.sp.decode(ids[1:])


def train_and_eval(h: Hyperparameters, device: torch.device, code: str) -> None:
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)

    val_data = ValidationData(h, device)
    log0(f"train_shards: {len(glob.glob(h.train_files))}")
    log0(f"val_tokens: {val_data.val_tokens.numel() - 1}")

    base_model, compiled_logits, hessians = train_model(h, device, val_data)
    serialize(h, base_model, hessians, code)
    timed_eval("pre-quantization post-ema", eval_val, h, device, val_data, compiled_logits)
    del base_model, compiled_logits, hessians
    torch._dynamo.reset()
    torch.cuda.empty_cache()

    eval_clock = time.perf_counter()
    eval_model = deserialize(h, device)
    logits_fn = torch.compile(eval_model.forward_logits, dynamic=False, fullgraph=True)
    train_fn = torch.compile(eval_model, dynamic=False, fullgraph=True)

    final_label = "quantized"
    final_loss, final_bpb = timed_eval("quantized", eval_val, h, device, val_data, logits_fn)
    if h.sliding_window_enabled:
        final_label = "quantized_sliding_window"
        final_loss, final_bpb = timed_eval(final_label, eval_val_sliding, h, device, val_data, logits_fn)
    if h.ttt_enabled:
        final_label = "quantized_ttt"
        final_loss, final_bpb = timed_eval(
            final_label, eval_val_ttt, h, device, val_data, eval_model, logits_fn, train_fn
        )
    log0(f"total_eval_time: {time.perf_counter() - eval_clock:.1f}s")
    log0(f"final {final_label} val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")
    log0("sample: " + repr(sample_text(h, val_data, eval_model, device)), console=False)


def main() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    h = Hyperparameters()
    if h.world_size <= 0:
        raise ValueError(f"WORLD_SIZE must be positive, got {h.world_size}")
    if 8 % h.world_size != 0:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8 so grad_accum_steps stays integral")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 32

    if h.is_main_process:
        os.makedirs("logs", exist_ok=True)
    set_logging_hparams(h)
    code = Path(__file__).read_text(encoding="utf-8")
    log0("=" * 100, console=False)
    log0("Hyperparameters:")
    for k, v in sorted(vars(type(h)).items()):
        if not k.startswith("_"):
            log0(f"  {k}: {v}")
    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(
        subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False).stdout,
        console=False,
    )
    log0("=" * 100, console=False)
    train_and_eval(h, device, code)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
