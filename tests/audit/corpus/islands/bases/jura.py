"""SP8192 / 11L x 512 / MLP x4 / loop 3-5 / parallel residuals 7+ / MuonEq-R / SDClip GPTQ / score-first TTT.

torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

import collections
import copy
import glob
import io
import json
import math
import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func
except ImportError:
    flash_attn_3_func = None


# ----------------------------------------
# Hyperparameters
# ----------------------------------------


class Hyperparameters:
    # run
    data_dir = os.environ.get("DATA_DIR", "./data/")
    seed = int(os.environ.get("SEED", 1337))
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))

    # training length
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))

    # validation / eval
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 2048 * 32 * 8))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    skip_gates_enabled = bool(int(os.environ.get("SKIP_GATES_ENABLED", "1")))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    rope_train_seq_len = int(os.environ.get("ROPE_TRAIN_SEQ_LEN", 2048))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.0))

    # depth recurrence
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))

    # parallel residuals
    parallel_residual_start = int(os.environ.get("PARALLEL_RESIDUAL_START", 7))

    # optimizer
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_row_normalize = bool(int(os.environ.get("MUON_ROW_NORMALIZE", "1")))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # quantization & compression
    compressor = os.environ.get("COMPRESSOR", "brotli")
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 30.0))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))
    size_limit_bytes = 16_000_000

    # legal score-first TTT
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 32))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size

    # paths
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    quantized_model_path = "final_model.int6.ptz"


_logger_hparams = None


def set_logging_hparams(h):
    global _logger_hparams
    _logger_hparams = h


def log(msg, console=True):
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
# Distributed helpers
# ----------------------------------------


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def all_reduce_sum(*tensors):
    if is_distributed():
        for t in tensors:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)


def barrier():
    if is_distributed():
        dist.barrier()


def split_range(n, rank, world_size):
    """Contiguous slice [lo, hi) of range(n) that belongs to this rank."""
    return n * rank // world_size, n * (rank + 1) // world_size


def agreed_stop(flag, device):
    """Any rank over its budget stops all of them, so that nobody hangs in a collective."""
    if not is_distributed():
        return flag
    t = torch.tensor(int(flag), device=device)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return bool(t.item())


# ----------------------------------------
# Data
# ----------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
_SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
_SHARD_NTOKENS_CACHE = {}
_MMAP_CACHE = {}


def read_header(file):
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {file}")
    return header


def load_data_shard(file):
    num_tokens = int(read_header(file)[2])
    expected = _SHARD_HEADER_BYTES + num_tokens * 2
    if file.stat().st_size != expected:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected} bytes")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=_SHARD_HEADER_BYTES)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def num_tokens_in_shard(file):
    key = str(file)
    if key not in _SHARD_NTOKENS_CACHE:
        _SHARD_NTOKENS_CACHE[key] = int(read_header(file)[2])
    return _SHARD_NTOKENS_CACHE[key]


def shard_memmap(file):
    key = str(file)
    if key not in _MMAP_CACHE:
        n = num_tokens_in_shard(file)
        _MMAP_CACHE[key] = np.memmap(file, mode="r", dtype="<u2", offset=_SHARD_HEADER_BYTES, shape=(n,))
    return _MMAP_CACHE[key]


class ShuffledSequenceLoader:
    """Random-phase sequences out of this rank's share of the shards, without replacement within a pass."""

    def __init__(self, h, device, pattern=None, seed_offset=0):
        self.world_size = h.world_size
        self.seq_len = h.train_seq_len
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(pattern or h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"No files found for pattern: {pattern or h.train_files}")
        self.files = all_files[h.rank :: h.world_size] or all_files
        self.rng = np.random.Generator(np.random.PCG64([h.seed + seed_offset, h.rank]))
        self.num_tokens = [num_tokens_in_shard(f) for f in self.files]
        self.start_inds = [[] for _ in self.files]
        for si in range(len(self.files)):
            self._reset_shard(si)

    def _reset_shard(self, si):
        max_phase = min(self.seq_len - 1, max(0, self.num_tokens[si] - self.seq_len - 1))
        phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
        num_sequences = (self.num_tokens[si] - 1 - phase) // self.seq_len
        order = self.rng.permutation(num_sequences)
        self.start_inds[si] = (phase + order * self.seq_len).tolist()

    def next_batch(self, global_tokens, grad_accum_steps):
        device_tokens = global_tokens // (self.world_size * grad_accum_steps)
        device_batch_size = device_tokens // self.seq_len
        remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
        x = torch.empty((device_batch_size, self.seq_len), dtype=torch.int64)
        y = torch.empty((device_batch_size, self.seq_len), dtype=torch.int64)
        for bi in range(device_batch_size):
            total = remaining.sum()
            if total <= 0:
                for si in range(len(self.files)):
                    self._reset_shard(si)
                remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
                total = remaining.sum()
            si = int(self.rng.choice(len(self.files), p=remaining / total))
            start = self.start_inds[si].pop()
            remaining[si] -= 1
            window = np.asarray(shard_memmap(self.files[si])[start : start + self.seq_len + 1], dtype=np.int64)
            window = torch.from_numpy(window)
            x[bi] = window[:-1]
            y[bi] = window[1:]
        x = x.pin_memory().to(self.device, non_blocking=True)
        y = y.pin_memory().to(self.device, non_blocking=True)
        return x, y


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # the shards are one stream; keep every token of it, also the ragged tail
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is too short")
    return tokens


def build_sentencepiece_luts(sp, vocab_size, device):
    """Per token: bytes of its text without the leading space, whether it starts with one, whether it ends a document."""
    sp_vocab_size = int(sp.vocab_size())
    if sp.piece_to_id("\u2581") == sp.unk_id():
        raise ValueError("Tokenizer must hold the bare space piece, or spaces would fall back to bytes")
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
        piece = piece.replace("\u2581", " ")
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


class ValidationData:
    def __init__(self, h, device):
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

    def count_bytes(self, prev_ids, tgt_ids):
        token_bytes = self.base_bytes_lut[tgt_ids].to(torch.float64)
        space = self.has_leading_space_lut[tgt_ids] & ~self.is_boundary_token_lut[prev_ids]
        token_bytes += space.to(torch.float64)
        return token_bytes

    @property
    def num_targets(self):
        return self.val_tokens.numel() - 1

    def count_documents(self):
        return int((self.val_tokens.to(torch.int32) == self.bos_id).sum())


# ----------------------------------------
# Model
# ----------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    def forward(self, x):
        w = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


class Rotary(nn.Module):
    def __init__(self, dim, base=10000.0, train_seq_len=1024, rope_dims=0):
        super().__init__()
        self.dim = dim
        self.base = base
        self.train_seq_len = train_seq_len
        self.rope_dims = rope_dims if rope_dims > 0 else dim
        inv_freq = 1.0 / base ** (torch.arange(0, self.rope_dims, 2, dtype=torch.float32) / self.rope_dims)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = None
        self._sin_cached = None

    def forward(self, seq_len, device, dtype):
        if self._cos_cached is None or self._seq_len_cached != seq_len or self._cos_cached.device != device:
            rd = self.rope_dims
            if seq_len > self.train_seq_len:
                scale = seq_len / self.train_seq_len
                new_base = self.base * scale ** (rd / (rd - 2))
                inv_freq = 1.0 / new_base ** (torch.arange(0, rd, 2, dtype=torch.float32, device=device) / rd)
            else:
                inv_freq = self.inv_freq.to(device)
            t = torch.arange(seq_len, device=device, dtype=inv_freq.dtype)
            freqs = torch.outer(t, inv_freq)
            self._cos_cached = freqs.cos()[None, :, None, :]
            self._sin_cached = freqs.sin()[None, :, None, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x, cos, sin, rope_dims=0):
    if 0 < rope_dims < x.size(-1):
        x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
        half = rope_dims // 2
        x1, x2 = x_rope[..., :half], x_rope[..., half:]
        x_rope = torch.cat((x1 * cos + x2 * sin, x1 * -sin + x2 * cos), dim=-1)
        return torch.cat((x_rope, x_pass), dim=-1)
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * -sin + x2 * cos), dim=-1)


def causal_attention(q, k, v):
    """q [B,T,H,D], k and v [B,T,KV,D]"""
    if flash_attn_3_func is not None:
        out = flash_attn_3_func(q, k, v, causal=True)
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
    def __init__(self, dim, num_heads, num_kv_heads, rope_base, qk_gain_init, train_seq_len):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        if self.head_dim % 2 != 0:
            raise ValueError("head_dim must be even for RoPE")
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rope_dims = 0
        self.rotary = Rotary(self.head_dim, base=rope_base, train_seq_len=train_seq_len)
        self.use_xsa = False

    def _xsa(self, y, v):
        """Exclusive self attention: take the component along the own value out of the output."""
        B, T, H, D = y.shape
        kv = v.size(-2)
        group = H // kv
        y_g = y.reshape(B, T, kv, group, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        proj = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - proj).reshape(B, T, H, D)

    def forward(self, x):
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = causal_attention(q, k, v)
        if self.use_xsa:
            y = self._xsa(y, v)
        y = y.reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, dim, mlp_mult):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        dim = h.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(
            dim,
            h.num_heads,
            h.num_kv_heads,
            h.rope_base,
            h.qk_gain_init,
            h.rope_train_seq_len,
        )
        self.mlp = MLP(dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = False

    def forward(self, x, x0):
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor)
        attn_out = self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        mlp_scale = self.mlp_scale.to(dtype=x.dtype)[None, None, :]
        if self.parallel:
            # both branches read the same input, GPT-J style
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
            return x_in + attn_out + mlp_scale * mlp_out
        x_out = x_in + attn_out
        return x_out + mlp_scale * self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        if h.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {h.logit_softcap}")
        self.tied_embed_init_std = h.tied_embed_init_std
        self.logit_softcap = h.logit_softcap
        self.vocab_size = h.vocab_size
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.num_encoder_layers = h.num_layers // 2
        self.num_decoder_layers = h.num_layers - self.num_encoder_layers
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self._configure_blocks(h)
        self.final_norm = RMSNorm()
        self.looping_active = False
        self.encoder_indices, self.decoder_indices = self._loop_schedule(h)
        self.num_skip_weights = min(len(self.encoder_indices), len(self.decoder_indices))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, h.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(self.num_skip_weights, h.model_dim, dtype=torch.float32))
            if h.skip_gates_enabled
            else None
        )
        self._init_weights()

    def _configure_blocks(self, h):
        head_dim = h.model_dim // h.num_heads
        for i, block in enumerate(self.blocks):
            if h.rope_dims > 0:
                block.attn.rope_dims = h.rope_dims
                block.attn.rotary = Rotary(
                    head_dim,
                    base=h.rope_base,
                    train_seq_len=h.rope_train_seq_len,
                    rope_dims=h.rope_dims,
                )
            if i >= h.num_layers - h.xsa_last_n:
                block.attn.use_xsa = True
            if i >= h.parallel_residual_start:
                block.parallel = True

    def _loop_schedule(self, h):
        """Order of the physical layers, once the segment loop_start..loop_end is repeated; split into two halves."""
        if h.num_loops <= 0:
            return list(range(self.num_encoder_layers)), list(range(self.num_encoder_layers, h.num_layers))
        segment = list(range(h.loop_start, h.loop_end + 1))
        indices = list(range(h.loop_start))
        for _ in range(h.num_loops + 1):
            indices.extend(segment)
        indices.extend(range(h.loop_end + 1, h.num_layers))
        half = len(indices) // 2
        return indices[:half], indices[half:]

    def _init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for _, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def _skip(self, x, skip, i):
        scaled = self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skip
        if self.skip_gates is None:
            return x + scaled
        gate = torch.sigmoid(self.skip_gates[i].to(dtype=x.dtype))[None, None, :]
        return torch.lerp(scaled, x, gate)

    def forward_hidden(self, input_ids):
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        if self.looping_active:
            enc, dec = self.encoder_indices, self.decoder_indices
        else:
            enc = range(self.num_encoder_layers)
            dec = range(self.num_encoder_layers, self.num_encoder_layers + self.num_decoder_layers)
        skips = []
        for i in enc:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for skip_idx, i in enumerate(dec):
            if skip_idx < self.num_skip_weights and skips:
                x = self._skip(x, skips.pop(), skip_idx)
            x = self.blocks[i](x, x0)
        return self.final_norm(x)

    def project(self, hidden):
        logits = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids):
        return self.project(self.forward_hidden(input_ids))

    def forward(self, input_ids, target_ids):
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1))


CONTROL_TENSOR_NAME_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "skip_gate")


def is_control_tensor(name):
    return any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)


def classify_param(name):
    if "tok_emb" in name:
        return "embed"
    if ".mlp." in name:
        return "mlp"
    if ".attn." in name:
        return "attn"
    return "other"


def restore_fp32_params(model):
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        if (param.ndim < 2 or is_control_tensor(name)) and param.dtype != torch.float32:
            param.data = param.data.float()


def count_parameters(model):
    groups = collections.Counter()
    for name, p in model.named_parameters():
        groups[classify_param(name)] += p.numel()
    return groups


# ----------------------------------------
# Optimizers
# ----------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(G, steps=10, eps=1e-7):
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X /= X.norm() + eps
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    """Muon with optional row normalisation before the orthogonalisation (MuonEq-R)."""

    def __init__(self, params, lr, momentum, backend_steps, nesterov=True, weight_decay=0.0, row_normalize=False):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, nesterov=nesterov,
                 weight_decay=weight_decay, row_normalize=row_normalize),
        )

    @torch.no_grad()
    def step(self):
        distributed = is_distributed()
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
                    if group["row_normalize"]:
                        row_norms = g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7)
                        g = g / row_norms.to(g.dtype)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            wd = group["weight_decay"]
            curr = 0
            for p in params:
                if wd > 0.0:
                    p.data.mul_(1.0 - lr * wd)
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                p.add_(g, alpha=-lr)
                curr += p.numel()


class Optimizers:
    def __init__(self, h, base_model):
        block_named_params = list(base_model.blocks.named_parameters())
        matrix_params = [p for name, p in block_named_params if p.ndim == 2 and not is_control_tensor(name)]
        scalar_params = [p for name, p in block_named_params if p.ndim < 2 or is_control_tensor(name)]
        if base_model.skip_weights.numel() > 0:
            scalar_params.append(base_model.skip_weights)
        if base_model.skip_gates is not None and base_model.skip_gates.numel() > 0:
            scalar_params.append(base_model.skip_gates)

        token_lr = h.tied_embed_lr
        self.optimizer_tok = torch.optim.AdamW(
            [{"params": [base_model.tok_emb.weight], "lr": token_lr, "base_lr": token_lr}],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            weight_decay=h.embed_wd,
            fused=True,
        )
        self.optimizer_muon = Muon(
            matrix_params,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.optimizer_muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.optimizer_scalar = torch.optim.AdamW(
            [{"params": scalar_params, "lr": h.scalar_lr, "base_lr": h.scalar_lr}],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            weight_decay=h.adam_wd,
            fused=True,
        )
        self.optimizers = [self.optimizer_tok, self.optimizer_muon, self.optimizer_scalar]

    def __iter__(self):
        return iter(self.optimizers)

    def zero_grad_all(self):
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)

    def step(self):
        for opt in self.optimizers:
            opt.step()
        self.zero_grad_all()


# ----------------------------------------
# EMA
# ----------------------------------------


def ema_init(model):
    return {name: t.detach().float().clone() for name, t in model.state_dict().items()}


@torch.no_grad()
def ema_update(ema_state, model, decay):
    for name, t in model.state_dict().items():
        ema_state[name].mul_(decay).add_(t.detach().float(), alpha=1.0 - decay)


def ema_apply(ema_state, model):
    current = model.state_dict()
    model.load_state_dict({name: t.to(dtype=current[name].dtype) for name, t in ema_state.items()}, strict=True)


# ----------------------------------------
# Quantization: GPTQ with standard-deviation clipping
# ----------------------------------------


def register_hessian_hooks(model, hessians, counts, device):
    hooks = []

    def accumulate(name, x):
        x = x.reshape(-1, x.shape[-1]).float()
        if name not in hessians:
            hessians[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=device)
        hessians[name].addmm_(x.T, x)
        counts[name] += x.shape[0]

    def make_input_hook(name):
        def hook_fn(module, inp, out):
            accumulate(name, inp[0].detach())

        return hook_fn

    def make_output_hook(name):
        def hook_fn(module, inp, out):
            accumulate(name, out.detach())

        return hook_fn

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
            if classify_param(name + ".weight") in ("mlp", "attn"):
                hooks.append(module.register_forward_hook(make_input_hook(name + ".weight")))
    # the tied head sees the normed hidden states
    hooks.append(model.final_norm.register_forward_hook(make_output_hook("tok_emb.weight")))
    return hooks


def collect_hessians(model, train_loader, h, device, deadline):
    """Sums x^T x over training batches; stops at the deadline (time.perf_counter), which lies inside the 600 s."""
    hessians = {}
    counts = collections.Counter()
    hooks = register_hessian_hooks(model, hessians, counts, device)
    model.eval()
    done = 0
    with torch.no_grad():
        for _ in range(h.gptq_calibration_batches):
            x, _y = train_loader.next_batch(h.train_batch_tokens, 8 // h.world_size)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.forward_logits(x)
            done += 1
            torch.cuda.synchronize()
            if agreed_stop(time.perf_counter() >= deadline, device):
                break
    for hook in hooks:
        hook.remove()
    for name in sorted(hessians):
        n = torch.tensor(float(counts[name]), device=device)
        all_reduce_sum(hessians[name], n)
        hessians[name] = (hessians[name] / n.clamp_min(1.0)).cpu()
    return hessians, done


def sdclip_scale(w, clip_sigmas, clip_range):
    row_std = w.std(dim=1)
    return (clip_sigmas * row_std / clip_range).clamp_min(1e-10).to(torch.float16)


def damped_hessian(H, percdamp=0.01):
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    damp = percdamp * H.diag().mean()
    H.diagonal().add_(damp)
    return H, dead


def gptq_quantize_weight(w, H, clip_sigmas=3.0, clip_range=63, block_size=128):
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H, dead = damped_hessian(H)
    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_perm = W_orig[:, perm].clone()
    W_perm[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)

    s = sdclip_scale(W_orig, clip_sigmas, clip_range)
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
            err = (w_col - q_col.float() * sf) / d
            Err[:, j] = err
            W_block[:, j:] -= err.unsqueeze(1) * Hinv_block[j, j:].unsqueeze(0)
        if i2 < cols:
            W_work[:, i2:] -= Err @ Hinv[i1:i2, i2:]
    return Q[:, invperm], s


def gptq_mixed_quantize(state_dict, hessians, h):
    result = {}
    meta = {}
    for name, tensor in state_dict.items():
        t = tensor.detach().cpu().contiguous()
        if not t.is_floating_point() or t.numel() <= 65536 or name not in hessians:
            result[name] = t.to(torch.float16) if t.is_floating_point() else t
            meta[name] = "passthrough (float16)"
            continue
        is_embed = classify_param(name) == "embed"
        bits = h.embed_bits if is_embed else h.matrix_bits
        sigmas = h.embed_clip_sigmas if is_embed else h.matrix_clip_sigmas
        q, s = gptq_quantize_weight(
            t,
            hessians[name],
            clip_sigmas=sigmas,
            clip_range=2 ** (bits - 1) - 1,
            block_size=h.gptq_block_size,
        )
        result[name + ".q"] = q
        result[name + ".scale"] = s
        meta[name] = f"gptq (int{bits})"
    return result, meta


def dequantize_mixed(result, meta, template_sd):
    out = {}
    for name, orig in template_sd.items():
        info = meta.get(name)
        if info is None:
            continue
        orig_dtype = orig.dtype
        if "passthrough" in info:
            t = result[name]
            if t.dtype == torch.float16 and orig_dtype in (torch.float32, torch.bfloat16):
                t = t.to(orig_dtype)
            out[name] = t
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        out[name] = (q.float() * s.float().view(q.shape[0], *[1] * (q.ndim - 1))).to(orig_dtype)
    return out


# ----------------------------------------
# Compression
# ----------------------------------------

_BSHF_MAGIC = b"BSHF"


def _byte_shuffle(data, stride=2):
    """All even bytes, then all odd ones: the halves of a float16 compress better apart."""
    if stride <= 1 or len(data) < stride:
        return data
    src = np.frombuffer(data, dtype=np.uint8)
    n = len(src)
    out = np.empty(n, dtype=np.uint8)
    dest_off = 0
    for pos in range(stride):
        chunk = src[pos::stride]
        out[dest_off : dest_off + len(chunk)] = chunk
        dest_off += len(chunk)
    return _BSHF_MAGIC + bytes([stride]) + out.tobytes()


def _byte_unshuffle(data):
    if len(data) < 5 or data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    n = len(payload)
    out = np.empty(n, dtype=np.uint8)
    src_off = 0
    for pos in range(stride):
        chunk_len = n // stride + (1 if pos < n % stride else 0)
        out[pos::stride] = payload[src_off : src_off + chunk_len]
        src_off += chunk_len
    return out.tobytes()


def _compress(data, compressor):
    data = _byte_shuffle(data)
    if compressor == "brotli":
        return brotli.compress(data, quality=11)
    raise ValueError(f"Unknown compressor: {compressor!r}")


def _decompress(data, compressor):
    if compressor == "brotli":
        raw = brotli.decompress(data)
    else:
        raise ValueError(f"Unknown compressor: {compressor!r}")
    return _byte_unshuffle(raw)


def read_own_code():
    return Path(__file__).read_text(encoding="utf-8")


def serialize(h, base_model, hessians):
    """Quantises, packs and writes the artifact. Needs the weights and the Hessians, no data."""
    code_bytes = len(read_own_code().encode("utf-8"))
    if h.is_main_process:
        torch.save(base_model.state_dict(), h.model_path)
        log(f"Serialized model: {os.path.getsize(h.model_path)} bytes")
        log(f"Code size: {code_bytes} bytes")
    sd_cpu = {k: v.detach().cpu() for k, v in base_model.state_dict().items()}
    quant_result, quant_meta = gptq_mixed_quantize(sd_cpu, hessians, h)
    log(f"quantized: {dict(collections.Counter(quant_meta.values()))}")
    quant_buf = io.BytesIO()
    torch.save({"w": quant_result, "m": quant_meta}, quant_buf)
    quant_raw = quant_buf.getvalue()
    quant_blob = _compress(quant_raw, h.compressor)
    quant_file_bytes = len(quant_blob)
    bytes_total = quant_file_bytes + code_bytes
    if h.is_main_process:
        with open(h.quantized_model_path, "wb") as f:
            f.write(quant_blob)
        log(f"Serialized model quantized+{h.compressor}: {quant_file_bytes} bytes")
        log(f"Total submission size quantized+{h.compressor}: {bytes_total} bytes")
        if bytes_total > h.size_limit_bytes:
            log(f"WARNING: over the limit by {bytes_total - h.size_limit_bytes} bytes")
    barrier()
    return bytes_total, quant_file_bytes


def deserialize(h, device):
    """A fresh model out of nothing but the artifact."""
    eval_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(eval_model)
    template = {k: v.detach().cpu() for k, v in eval_model.state_dict().items()}
    with open(h.quantized_model_path, "rb") as f:
        quant_blob_disk = f.read()
    quant_state = torch.load(
        io.BytesIO(_decompress(quant_blob_disk, h.compressor)), map_location="cpu", weights_only=True
    )
    deq_state = dequantize_mixed(quant_state["w"], quant_state["m"], template)
    eval_model.load_state_dict(deq_state, strict=True)
    if h.num_loops > 0:
        eval_model.looping_active = True
    return eval_model


# ----------------------------------------
# Evaluation
# ----------------------------------------


class Tally:
    """Sum of losses, targets and bytes over this rank's share."""

    def __init__(self, device):
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.token_count = torch.zeros((), device=device, dtype=torch.float64)
        self.byte_count = torch.zeros((), device=device, dtype=torch.float64)

    def add(self, nll, prev_ids, tgt_ids, val_data):
        self.loss_sum += nll.to(torch.float64).sum()
        self.token_count += float(nll.numel())
        self.byte_count += val_data.count_bytes(prev_ids, tgt_ids).sum()

    def reduce(self):
        all_reduce_sum(self.loss_sum, self.token_count, self.byte_count)
        return self

    def result(self):
        val_loss = (self.loss_sum / self.token_count).item()
        val_bpb = val_loss / math.log(2.0) * (self.token_count.item() / self.byte_count.item())
        return val_loss, val_bpb

    def running_bpb(self):
        return (self.loss_sum / max(self.byte_count.item(), 1.0)).item() / math.log(2.0)


def token_nll(logits, targets):
    flat = logits.reshape(-1, logits.size(-1)).float()
    return F.cross_entropy(flat, targets.reshape(-1), reduction="none").view_as(targets)


def eval_val(h, device, val_data, model):
    """Non-overlapping sequences; the last one may be short."""
    seq_len = h.eval_seq_len
    total = val_data.num_targets
    n_full = total // seq_len
    batch_seqs = max(1, h.val_batch_tokens // (h.world_size * seq_len))
    lo, hi = split_range(n_full, h.rank, h.world_size)
    tally = Tally(device)
    spans = [(s * seq_len, min(s + batch_seqs, hi) * seq_len, seq_len) for s in range(lo, hi, batch_seqs)]
    if h.rank == h.world_size - 1 and n_full * seq_len < total:
        spans.append((n_full * seq_len, total, total - n_full * seq_len))
    model.eval()
    with torch.no_grad():
        for start, end, width in spans:
            local = val_data.val_tokens[start : end + 1].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, width)
            y = local[1:].reshape(-1, width)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                logits = model.forward_logits(x)
            tally.add(token_nll(logits, y).reshape(-1), x.reshape(-1), y.reshape(-1), val_data)
    model.train()
    return tally.reduce().result()


def sliding_window_starts(total_tokens, seq_len, stride):
    """Every window but the first scores only what lies behind its context, so each target falls into one window."""
    context_size = seq_len - stride
    return [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context_size < total_tokens]


def scored_from(ws, seq_len, stride):
    return 0 if ws == 0 else seq_len - stride


def load_window_batch(val_tokens, batch_ws, seq_len, total_tokens, device):
    bsz = len(batch_ws)
    x_batch = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
    y_batch = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
    wlens = []
    for i, ws in enumerate(batch_ws):
        we = min(ws + seq_len, total_tokens)
        wlen = we - ws
        wlens.append(wlen)
        chunk_tok = val_tokens[ws : we + 1].to(dtype=torch.int64, device=device)
        x_batch[i, :wlen] = chunk_tok[:-1]
        y_batch[i, :wlen] = chunk_tok[1:]
    return x_batch, y_batch, wlens


def score_windows(h, val_data, logits_fn, batch_ws, tally, device):
    seq_len, stride = h.eval_seq_len, h.eval_stride
    total_tokens = val_data.num_targets
    x_batch, y_batch, wlens = load_window_batch(val_data.val_tokens, batch_ws, seq_len, total_tokens, device)
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        logits = logits_fn(x_batch)
    nll = token_nll(logits, y_batch)
    for i, ws in enumerate(batch_ws):
        s = scored_from(ws, seq_len, stride)
        tally.add(nll[i, s : wlens[i]], x_batch[i, s : wlens[i]], y_batch[i, s : wlens[i]], val_data)


def eval_val_sliding(h, device, val_data, base_model):
    base_model.eval()
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    window_starts = sliding_window_starts(val_data.num_targets, h.eval_seq_len, h.eval_stride)
    lo, hi = split_range(len(window_starts), h.rank, h.world_size)
    my_windows = window_starts[lo:hi]
    tally = Tally(device)
    with torch.no_grad():
        for bi in range(0, len(my_windows), h.eval_batch_seqs):
            batch_ws = my_windows[bi : bi + h.eval_batch_seqs]
            score_windows(h, val_data, logits_fn, batch_ws, tally, device)
    base_model.train()
    return tally.reduce().result()


# ----------------------------------------
# Test-time training (score first)
# ----------------------------------------


def assign_windows_to_chunks(window_starts, h, total_tokens):
    """A window belongs to the chunk in which its first scored target lies."""
    num_chunks = (total_tokens + h.ttt_chunk_tokens - 1) // h.ttt_chunk_tokens
    chunk_windows = [[] for _ in range(num_chunks)]
    for ws in window_starts:
        first = ws + scored_from(ws, h.eval_seq_len, h.eval_stride)
        chunk_windows[min(first // h.ttt_chunk_tokens, num_chunks - 1)].append(ws)
    return chunk_windows


def ttt_parameters(h, base_model):
    frozen = tuple(f"blocks.{i}." for i in range(min(h.ttt_freeze_blocks, len(base_model.blocks))))
    params = []
    for name, p in base_model.named_parameters():
        keep = not (frozen and name.startswith(frozen))
        p.requires_grad_(keep)
        if keep:
            params.append(p)
    return params


def average_gradients(params, world_size):
    if world_size <= 1:
        return
    for p in params:
        if p.grad is not None:
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)


def ttt_cosine_lr(h, ci, num_chunks):
    return h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))


def ttt_train_chunk(h, device, val_tokens, base_model, params, optimizer, chunk_start, chunk_end):
    """A few epochs of SGD over the targets of one whole chunk, its sequences shared among the ranks."""
    seq_len = h.eval_seq_len
    chunk_seqs = (chunk_end - chunk_start) // seq_len
    if chunk_seqs == 0:
        return
    seq_lo, seq_hi = split_range(chunk_seqs, h.rank, h.world_size)
    base_model.train()
    for _epoch in range(h.ttt_epochs):
        for bs in range(seq_lo, seq_hi, h.ttt_batch_seqs):
            be = min(bs + h.ttt_batch_seqs, seq_hi)
            start = chunk_start + bs * seq_len
            end = chunk_start + be * seq_len + 1
            local = val_tokens[start:end].to(device=device, dtype=torch.int64)
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = base_model(x, y)
            loss.backward()
            average_gradients(params, h.world_size)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            optimizer.step()


def eval_val_sliding_ttt(h, device, val_data, base_model):
    """Score a chunk with the weights as they are, book its losses for good, only then learn from it."""
    seq_len, stride = h.eval_seq_len, h.eval_stride
    total_tokens = val_data.num_targets
    window_starts = sliding_window_starts(total_tokens, seq_len, stride)
    chunk_windows = assign_windows_to_chunks(window_starts, h, total_tokens)
    num_chunks = len(chunk_windows)
    params = ttt_parameters(h, base_model)
    optimizer = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    log(
        f"ttt:start chunks={num_chunks} ttt_lr={h.ttt_lr} ttt_epochs={h.ttt_epochs} "
        f"params={sum(p.numel() for p in params)}"
    )
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    tally = Tally(device)
    t0 = time.perf_counter()
    for ci in range(num_chunks):
        windows = chunk_windows[ci]
        chunk_start = ci * h.ttt_chunk_tokens
        chunk_end = min(chunk_start + h.ttt_chunk_tokens, total_tokens)

        # Phase 1: score
        lo, hi = split_range(len(windows), h.rank, h.world_size)
        my_windows = windows[lo:hi]
        base_model.eval()
        with torch.no_grad():
            for bi in range(0, len(my_windows), h.eval_batch_seqs):
                batch_ws = my_windows[bi : bi + h.eval_batch_seqs]
                score_windows(h, val_data, logits_fn, batch_ws, tally, device)

        # Phase 2: learn from what was just scored; nothing comes after the last chunk
        if ci < num_chunks - 1 and h.ttt_epochs > 0:
            for group in optimizer.param_groups:
                group["lr"] = ttt_cosine_lr(h, ci, num_chunks)
            ttt_train_chunk(
                h, device, val_data.val_tokens, base_model, params, optimizer, chunk_start, chunk_end
            )

        if h.is_main_process and (ci % 100 == 0 or ci == num_chunks - 1):
            log(f"  ttt_chunk [{ci + 1}/{num_chunks}] bpb={tally.running_bpb():.6f} time={time.perf_counter() - t0:.1f}s")
    base_model.eval()
    for p in base_model.parameters():
        p.requires_grad_(True)
    return tally.reduce().result()


def timed_eval(label, fn, *args, **kwargs):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args, **kwargs)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms")
    return val_loss, val_bpb


# ----------------------------------------
# Training
# ----------------------------------------


class TrainClock:
    """Milliseconds spent in training; stopped while the validation loss is logged."""

    def __init__(self):
        self.total_ms = 0.0
        self.started = None

    def start(self):
        torch.cuda.synchronize()
        self.started = time.perf_counter()

    def stop(self):
        torch.cuda.synchronize()
        self.total_ms += 1000.0 * (time.perf_counter() - self.started)
        self.started = None

    def now_ms(self):
        if self.started is None:
            return self.total_ms
        return self.total_ms + 1000.0 * (time.perf_counter() - self.started)


def training_frac(h, step, elapsed_ms, max_wallclock_ms):
    if max_wallclock_ms is None:
        return step / max(h.iterations, 1)
    return elapsed_ms / max(max_wallclock_ms, 1e-9)


def lr_mul(h, frac):
    if h.warmdown_frac <= 0:
        return 1.0
    if frac >= 1.0 - h.warmdown_frac:
        return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
    return 1.0


def muon_momentum_at(h, step):
    frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
    return (1 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum


def train_step(h, model, base_model, optimizers, train_loader, step, lr_scale, device):
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
    momentum = muon_momentum_at(h, step)
    for group in optimizers.optimizer_muon.param_groups:
        group["momentum"] = momentum
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
    if h.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
    optimizers.step()
    return train_loss


def warmup_kernels(h, model, base_model, optimizers, device):
    """Primes the compiled graphs, plain and looped, then puts weights and optimizer states back."""
    if h.warmup_steps <= 0:
        return
    initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
    initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    model.train()
    loader = ShuffledSequenceLoader(h, device)
    for looped in (False, True) if h.num_loops > 0 else (False,):
        base_model.looping_active = looped
        for warmup_step in range(h.warmup_steps):
            train_step(h, model, base_model, optimizers, loader, warmup_step, 1.0, device)
            if warmup_step <= 5 or warmup_step + 1 == h.warmup_steps:
                log(f"{'loop_' if looped else ''}warmup_step: {warmup_step + 1}/{h.warmup_steps}")
    base_model.looping_active = False
    base_model.load_state_dict(initial_model_state, strict=True)
    for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
        opt.load_state_dict(state)
    optimizers.zero_grad_all()


def log_train_progress(h, step, train_loss, elapsed_ms):
    tok_per_sec = step * h.train_batch_tokens / max(elapsed_ms / 1000.0, 1e-9)
    log(
        f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} "
        f"train_time: {elapsed_ms / 60000:.1f}m tok/s: {tok_per_sec:.0f}"
    )


def train_model(h, device, val_data):
    """Trains under the wall-clock cap and gathers the Hessians in the reserve at its end."""
    base_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    if h.distributed:
        model = DDP(compiled_model, device_ids=[h.local_rank], broadcast_buffers=False)
    else:
        model = compiled_model
    groups = count_parameters(base_model)
    log(f"model_params:{sum(groups.values())} ({', '.join(f'{k}={v}' for k, v in sorted(groups.items()))})")

    optimizers = Optimizers(h, base_model)
    warmup_kernels(h, model, base_model, optimizers, device)
    train_loader = ShuffledSequenceLoader(h, device)

    max_wallclock_ms = 1000.0 * h.max_wallclock_seconds if h.max_wallclock_seconds > 0 else None
    if max_wallclock_ms is not None:
        max_wallclock_ms -= h.gptq_reserve_seconds * 1000.0
        log(f"gptq:reserving {h.gptq_reserve_seconds:.0f}s, effective={max_wallclock_ms:.0f}ms")

    ema_state = ema_init(base_model)
    clock = TrainClock()
    stop_after_step = None
    step = 0
    model.train()
    clock.start()
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        should_validate = last_step or (h.val_loss_every > 0 and step % h.val_loss_every == 0)
        if should_validate:
            clock.stop()
            val_loss, val_bpb = eval_val(h, device, val_data, base_model)
            log(f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}")
            model.train()
            clock.start()
        if last_step:
            if stop_after_step is not None and step < h.iterations:
                log(f"stopping_early: wallclock_cap train_time: {clock.now_ms():.0f}ms step: {step}/{h.iterations}")
            break

        frac = training_frac(h, step, clock.now_ms(), max_wallclock_ms)
        scale = lr_mul(h, frac)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} encoder:{base_model.encoder_indices}")
        train_loss = train_step(h, model, base_model, optimizers, train_loader, step, scale, device)
        ema_update(ema_state, base_model, h.ema_decay)
        step += 1

        approx_ms = clock.now_ms()
        if h.train_log_every > 0 and (step <= 5 or step % h.train_log_every == 0 or stop_after_step is not None):
            log_train_progress(h, step, train_loss, approx_ms)
        reached_cap = max_wallclock_ms is not None and approx_ms >= max_wallclock_ms
        if agreed_stop(reached_cap, device) and stop_after_step is None:
            stop_after_step = step

    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    log("ema:applying EMA weights")
    ema_apply(ema_state, base_model)

    # calibration belongs to the training budget: it ends two seconds before the 600th at the latest
    hessians, n_batches = calibrate(h, device, base_model, clock)
    clock.stop()
    log(f"train+calibration: {clock.total_ms:.0f}ms, {n_batches} calibration batches, {len(hessians)} Hessians")
    return base_model, hessians, clock.total_ms


def calibrate(h, device, base_model, clock):
    if h.max_wallclock_seconds > 0:
        left_s = h.max_wallclock_seconds - 2.0 - clock.now_ms() / 1000.0
        deadline = time.perf_counter() + max(left_s, 0.0)
    else:
        deadline = float("inf")
    calib_loader = ShuffledSequenceLoader(h, device, seed_offset=1000)
    return collect_hessians(base_model, calib_loader, h, device, deadline)


# ----------------------------------------
# Bookkeeping
# ----------------------------------------


def set_seeds(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def setup_distributed(h):
    if h.world_size <= 0:
        raise ValueError(f"WORLD_SIZE must be positive, got {h.world_size}")
    if 8 % h.world_size != 0:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8 so grad_accum_steps stays integral")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return device


def setup_backends():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 32


def log_header(h):
    os.makedirs("logs", exist_ok=True)
    log(100 * "=", console=False)
    log("Hyperparameters:", console=True)
    for k, v in sorted(vars(type(h)).items()):
        if not k.startswith("_"):
            log(f"  {k}: {v}", console=True)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)
    log("=" * 100, console=False)


def log_data(h, val_data):
    log(f"train_shards: {len(glob.glob(h.train_files))}")
    log(f"val_tokens: {val_data.num_targets} val_documents: {val_data.count_documents()}")


def write_summary(h, results, train_ms, bytes_total, quant_file_bytes):
    """What goes into submission.json; the last evaluation that ran is the score."""
    label, (val_loss, val_bpb) = list(results.items())[-1]
    summary = {
        "seed": h.seed,
        "scored_by": label,
        "val_loss": round(val_loss, 8),
        "val_bpb": round(val_bpb, 8),
        "bytes_total": bytes_total,
        "bytes_model": quant_file_bytes,
        "train_ms": round(train_ms),
        "world_size": h.world_size,
    }
    if h.is_main_process:
        with open(f"logs/summary_seed{h.seed}.json", "w", encoding="utf-8") as f:
            json.dump(summary, f, indent=2)
    log(f"final: {json.dumps(summary)}")


def main():
    h = Hyperparameters()
    device = setup_distributed(h)
    setup_backends()
    set_logging_hparams(h)
    if h.is_main_process:
        log_header(h)
    set_seeds(h.seed)

    val_data = ValidationData(h, device)
    log_data(h, val_data)

    base_model, hessians, train_ms = train_model(h, device, val_data)
    torch._dynamo.reset()
    bytes_total, quant_file_bytes = serialize(h, base_model, hessians)
    results = {}
    timed_eval("pre-quantization post-ema", eval_val, h, device, val_data, base_model)
    del base_model, hessians
    torch.cuda.empty_cache()

    eval_model = deserialize(h, device)
    results["quantized"] = timed_eval("quantized", eval_val, h, device, val_data, eval_model)
    if h.sliding_window_enabled:
        results["quantized_sliding_window"] = timed_eval(
            "quantized_sliding_window", eval_val_sliding, h, device, val_data, eval_model
        )
    if h.ttt_enabled and h.sliding_window_enabled:
        del eval_model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        ttt_model = deserialize(h, device)
        results["quantized_ttt"] = timed_eval(
            "quantized_ttt", eval_val_sliding_ttt, h, device, val_data, ttt_model
        )
        del ttt_model
    write_summary(h, results, train_ms, bytes_total, quant_file_bytes)

    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
