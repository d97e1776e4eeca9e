import collections
import copy
import datetime
import glob
import io
import math
import os
import random
import re
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

from flash_attn_interface import flash_attn_func as flash_attn_3_func


# ----------------------------------------
# Hyperparameters
# ----------------------------------------


class Hyperparameters:
    # Run identity and data
    data_dir = os.environ.get("DATA_DIR", "./data/")
    seed = int(os.environ.get("SEED", 1337))
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Training length
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))

    # Validation and sliding evaluation
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 2048 * 32 * 8))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))

    # Architecture
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    skip_gates_enabled = bool(int(os.environ.get("SKIP_GATES_ENABLED", "1")))
    smear_enabled = bool(int(os.environ.get("SMEAR_ENABLED", "1")))
    smear_width = int(os.environ.get("SMEAR_WIDTH", 12))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.25))

    # Depth recurrence and parallel residuals
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))
    parallel_residual_start = int(os.environ.get("PARALLEL_RESIDUAL_START", 7))

    # Optimizer
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
    embed_init_std = float(os.environ.get("EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_row_normalize = bool(int(os.environ.get("MUON_ROW_NORMALIZE", "1")))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # Test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 32))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))

    # Token hints (longest repeated context) during test-time training
    hint_enabled = bool(int(os.environ.get("HINT_ENABLED", "1")))
    hint_order = int(os.environ.get("HINT_ORDER", 6))
    hint_bits = int(os.environ.get("HINT_BITS", 22))
    hint_min_runs = int(os.environ.get("HINT_MIN_RUNS", 2))
    hint_beta = float(os.environ.get("HINT_BETA", 1.25))

    # Compression
    compressor = os.environ.get("COMPRESSOR", "brotli")
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 14.0))
    size_limit_bytes = int(os.environ.get("SIZE_LIMIT_BYTES", 16_000_000))

    # Distributed setup
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size

    # Paths
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    quantized_model_path = "final_model.int6.ptz"


# ----------------------------------------
# Logging
# ----------------------------------------

_active_hparams = None


def set_logging_hparams(h):
    global _active_hparams
    _active_hparams = h


def log0(msg, console=True):
    """Rank zero's line to the console and to the run's log file."""
    h = _active_hparams
    if h is None:
        print(msg)
        return
    if not h.is_main_process:
        return
    if console:
        print(msg)
    if h.logfile is not None:
        with open(h.logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)


# ----------------------------------------
# Tokenizer byte tables and validation data
# ----------------------------------------


def build_sentencepiece_luts(sp, vocab_size, device):
    """Per token: bytes of its own text, whether a space goes before it, whether it stands at a text's edge."""
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes = np.zeros((table_size,), dtype=np.int16)
    leading_space = np.zeros((table_size,), dtype=np.bool_)
    boundary = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        boundary[token_id] = False
        if sp.is_byte(token_id):
            base_bytes[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("\u2581"):
            leading_space[token_id] = True
            piece = piece[1:]
        base_bytes[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(leading_space, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


class ValidationData:
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {int(self.sp.vocab_size())} pieces")
        self.val_tokens = load_validation_tokens(h.val_files)
        self.base_bytes_lut, self.leading_space_lut, self.boundary_lut = build_sentencepiece_luts(
            self.sp, h.vocab_size, device
        )

    def count_bytes(self, prev_ids, tgt_ids):
        """UTF-8 bytes of the original text that each target token stands for."""
        count = self.base_bytes_lut[tgt_ids].to(torch.float64)
        count += (self.leading_space_lut[tgt_ids] & ~self.boundary_lut[prev_ids]).to(torch.float64)
        return count


# ----------------------------------------
# Data shards
# ----------------------------------------

SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
SHARD_MAGIC = 20240520
_SHARD_NTOKENS = {}
_MMAP_CACHE = {}


def load_data_shard(file):
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=SHARD_HEADER_BYTES)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def read_num_tokens(file):
    key = str(file)
    if key not in _SHARD_NTOKENS:
        header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
        if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC:
            raise ValueError(f"Unexpected shard header for {file}")
        _SHARD_NTOKENS[key] = int(header[2])
    return _SHARD_NTOKENS[key]


def get_shard_memmap(file):
    key = str(file)
    if key not in _MMAP_CACHE:
        n = read_num_tokens(file)
        _MMAP_CACHE[key] = np.memmap(file, mode="r", dtype="<u2", offset=SHARD_HEADER_BYTES, shape=(n,))
    return _MMAP_CACHE[key]


class ShuffledSequenceLoader:
    """Draws sequences without replacement from this rank's shards, each shard in proportion to what is left in it."""

    def __init__(self, h, device):
        self.world_size = h.world_size
        self.seq_len = h.train_seq_len
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"No files found for pattern: {h.train_files}")
        self.files = all_files[h.rank :: h.world_size]
        self.rng = np.random.Generator(np.random.PCG64(h.rank))
        self.num_tokens = [read_num_tokens(f) for f in self.files]
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
        batch = device_tokens // self.seq_len
        remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
        x = torch.empty((batch, self.seq_len), dtype=torch.int64)
        y = torch.empty((batch, self.seq_len), dtype=torch.int64)
        for bi in range(batch):
            total = remaining.sum()
            if total <= 0:
                for si in range(len(self.files)):
                    self._reset_shard(si)
                remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
                total = remaining.sum()
            si = int(self.rng.choice(len(self.files), p=remaining / total))
            start = self.start_inds[si].pop()
            remaining[si] -= 1
            window = torch.as_tensor(
                np.array(get_shard_memmap(self.files[si])[start : start + self.seq_len + 1], dtype=np.int64)
            )
            x[bi] = window[:-1]
            y[bi] = window[1:]
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# ----------------------------------------
# Model
# ----------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class Rotary(nn.Module):
    """Cached cosines and sines; beyond the training length the base is stretched."""

    def __init__(self, dim, base=10000.0, train_seq_len=2048, rope_dims=0):
        super().__init__()
        self.base = base
        self.train_seq_len = train_seq_len
        self.rope_dims = rope_dims if rope_dims > 0 else dim
        inv_freq = 1.0 / base ** (torch.arange(0, self.rope_dims, 2, dtype=torch.float32) / self.rope_dims)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = None
        self._sin_cached = None

    def forward(self, seq_len, device, dtype):
        if self._cos_cached is None or self._seq_len_cached < seq_len or self._cos_cached.device != device:
            rd = self.rope_dims
            if seq_len > self.train_seq_len:
                scale = seq_len / self.train_seq_len
                new_base = self.base * scale ** (rd / (rd - 2))
                inv_freq = 1.0 / new_base ** (torch.arange(0, rd, 2, dtype=torch.float32, device=device) / rd)
            else:
                inv_freq = self.inv_freq.float().to(device)
            t = torch.arange(seq_len, device=device, dtype=torch.float32)
            freqs = torch.outer(t, inv_freq)
            self._cos_cached = freqs.cos()[None, :, None, :]
            self._sin_cached = freqs.sin()[None, :, None, :]
            self._seq_len_cached = seq_len
        return self._cos_cached[:, :seq_len].to(dtype=dtype), self._sin_cached[:, :seq_len].to(dtype=dtype)


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


class CausalSelfAttention(nn.Module):
    """Grouped-query attention whose matrices come from the model's banks."""

    def __init__(self, dim, num_heads, num_kv_heads, rope_base, qk_gain_init, train_seq_len, rope_dims):
        super().__init__()
        if dim % num_heads != 0 or num_heads % num_kv_heads != 0:
            raise ValueError("model_dim, num_heads and num_kv_heads do not divide")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = rope_dims
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, base=rope_base, train_seq_len=train_seq_len, rope_dims=rope_dims)
        self.use_xsa = False
        self.tap = None

    def _xsa(self, y, v):
        """Takes the part along the token's own value out of each head's result."""
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        y_g = y.reshape(B, T, Hkv, H // Hkv, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        proj = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - proj).reshape(B, T, H, D)

    def forward(self, x, q_w, k_w, v_w, o_w):
        bsz, seqlen, dim = x.shape
        if self.tap is not None:
            self.tap("attn_in", x)
        q = F.linear(x, q_w.to(x.dtype)).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = F.linear(x, k_w.to(x.dtype)).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = F.linear(x, v_w.to(x.dtype)).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = flash_attn_3_func(q, k, v, causal=True)
        if self.use_xsa:
            y = self._xsa(y, v)
        y = y.reshape(bsz, seqlen, dim)
        if self.tap is not None:
            self.tap("attn_out", y)
        return F.linear(y, o_w.to(x.dtype))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.tap = None

    def forward(self, x, up_w, down_w):
        if self.tap is not None:
            self.tap("mlp_in", x)
        hidden = F.leaky_relu(F.linear(x, up_w.to(x.dtype)), negative_slope=0.5).square()
        if self.tap is not None:
            self.tap("mlp_hid", hidden)
        return F.linear(hidden, down_w.to(x.dtype))


class Block(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(
            h.model_dim, h.num_heads, h.num_kv_heads, h.rope_base, h.qk_gain_init, h.train_seq_len, h.rope_dims
        )
        self.mlp = MLP()
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = layer_idx >= h.parallel_residual_start

    def forward(self, x, x0, q_w, k_w, v_w, o_w, up_w, down_w):
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor, q_w, k_w, v_w, o_w)
        attn_out = self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor, up_w, down_w)
            return x_in + attn_out + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out
        x_mid = x_in + attn_out
        mlp_out = self.mlp(self.mlp_norm(x_mid) * self.ln_scale_factor, up_w, down_w)
        return x_mid + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.num_layers = h.num_layers
        self.logit_softcap = h.logit_softcap
        self.bos_id = h.bos_id
        self.embed_init_std = h.embed_init_std
        hidden_dim = int(h.mlp_mult * h.model_dim)
        kv_dim = h.num_kv_heads * (h.model_dim // h.num_heads)
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        # q of layer i at i, o at num_layers + i; k at i, v at num_layers + i
        self.qo_bank = nn.Parameter(torch.empty(2 * h.num_layers, h.model_dim, h.model_dim))
        self.kv_bank = nn.Parameter(torch.empty(2 * h.num_layers, kv_dim, h.model_dim))
        self.mlp_up_bank = nn.Parameter(torch.empty(h.num_layers, hidden_dim, h.model_dim))
        self.mlp_down_bank = nn.Parameter(torch.empty(h.num_layers, h.model_dim, hidden_dim))
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
            self.blocks[i].attn.use_xsa = True
        self.final_norm = RMSNorm()
        self.smear_gate = nn.Parameter(torch.zeros(h.smear_width)) if h.smear_enabled else None
        self.smear_lambda = nn.Parameter(torch.zeros(1)) if h.smear_enabled else None
        self.looping_active = False
        if h.num_loops > 0:
            segment = list(range(h.loop_start, h.loop_end + 1))
            order = list(range(h.loop_start))
            for _ in range(h.num_loops + 1):
                order.extend(segment)
            order.extend(range(h.loop_end + 1, h.num_layers))
        else:
            order = list(range(h.num_layers))
        half = len(order) // 2
        self.loop_encoder, self.loop_decoder = order[:half], order[half:]
        plain_half = h.num_layers // 2
        self.plain_encoder = list(range(plain_half))
        self.plain_decoder = list(range(plain_half, h.num_layers))
        self.num_skip_weights = min(len(self.loop_encoder), len(self.loop_decoder))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, h.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(self.num_skip_weights, h.model_dim, dtype=torch.float32))
            if h.skip_gates_enabled
            else None
        )
        self.tap = None
        self._init_weights()

    def _init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.embed_init_std)
        n = self.num_layers
        for i in range(n):
            nn.init.orthogonal_(self.qo_bank.data[i])
            nn.init.zeros_(self.qo_bank.data[n + i])
            nn.init.orthogonal_(self.kv_bank.data[i])
            nn.init.orthogonal_(self.kv_bank.data[n + i])
            nn.init.orthogonal_(self.mlp_up_bank.data[i])
            nn.init.zeros_(self.mlp_down_bank.data[i])

    def _smear(self, x, input_ids):
        """A gated share of the token before, save at a document's start."""
        width = self.smear_gate.numel()
        gate = torch.sigmoid((x[..., :width] * self.smear_gate.to(x.dtype)).sum(dim=-1, keepdim=True))
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (input_ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + self.smear_lambda.to(x.dtype) * gate * prev * inside

    def _run_block(self, i, x, x0):
        n = self.num_layers
        return self.blocks[i](
            x,
            x0,
            self.qo_bank[i],
            self.kv_bank[i],
            self.kv_bank[n + i],
            self.qo_bank[n + i],
            self.mlp_up_bank[i],
            self.mlp_down_bank[i],
        )

    def forward_features(self, input_ids):
        x = self.tok_emb(input_ids)
        if self.smear_gate is not None:
            x = self._smear(x, input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips = []
        encoder = self.loop_encoder if self.looping_active else self.plain_encoder
        decoder = self.loop_decoder if self.looping_active else self.plain_decoder
        for i in encoder:
            x = self._run_block(i, x, x0)
            skips.append(x)
        for skip_idx, i in enumerate(decoder):
            if skip_idx < self.num_skip_weights and skips:
                scaled = self.skip_weights[skip_idx].to(dtype=x.dtype)[None, None, :] * skips.pop()
                if self.skip_gates is not None:
                    g = torch.sigmoid(self.skip_gates[skip_idx].to(dtype=x.dtype))[None, None, :]
                    x = torch.lerp(scaled, x, g)
                else:
                    x = x + scaled
            x = self._run_block(i, x, x0)
        return self.final_norm(x)

    def project(self, features):
        if self.tap is not None:
            self.tap("head", features)
        logits = F.linear(features, self.tok_emb.weight.to(features.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids):
        return self.project(self.forward_features(input_ids))

    def forward(self, input_ids, target_ids):
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


# ----------------------------------------
# Parallel Muon over the banks
# ----------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(G, steps=5, eps=1e-7):
    """Orthogonalises every matrix of a stack."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16()
    transposed = X.size(-2) > X.size(-1)
    if transposed:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X.mT if transposed else X


class Muon(torch.optim.Optimizer):
    """Each rank orthogonalises its share of a bank: reduce-scatter, Newton-Schulz, all-gather."""

    def __init__(self, params, lr, momentum, backend_steps, nesterov=True, weight_decay=0.0, row_normalize=False):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            backend_steps=backend_steps,
            nesterov=nesterov,
            weight_decay=weight_decay,
            row_normalize=row_normalize,
        )
        super().__init__(params, defaults)
        self._metas = None

    def _build(self):
        self._distributed = dist.is_available() and dist.is_initialized()
        self._world_size = dist.get_world_size() if self._distributed else 1
        self._metas = []
        for group in self.param_groups:
            for p in group["params"]:
                B = p.shape[0]
                padded = ((B + self._world_size - 1) // self._world_size) * self._world_size
                shard_B = padded // self._world_size
                tail = p.shape[1:]
                self._metas.append(
                    dict(
                        p=p,
                        B=B,
                        padded_grad=torch.zeros(padded, *tail, device=p.device, dtype=torch.bfloat16),
                        shard=torch.zeros(shard_B, *tail, device=p.device, dtype=torch.bfloat16),
                        momentum=torch.zeros(shard_B, *tail, device=p.device, dtype=torch.bfloat16),
                        full_update=torch.zeros(padded, *tail, device=p.device, dtype=torch.bfloat16),
                        scale=max(1, p.shape[-2] / p.shape[-1]) ** 0.5,
                    )
                )
        self._metas.sort(key=lambda m: -m["p"].numel())
        self._futures = []

    def reset_momentum(self):
        for m in self._metas or []:
            m["momentum"].zero_()

    def launch_reduce_scatters(self):
        """Right after backward: the largest banks go first, so that their transfer hides the small ones'."""
        if self._metas is None:
            self._build()
        self._futures = []
        for m in self._metas:
            pg = m["padded_grad"]
            pg[: m["B"]].copy_(m["p"].grad)
            if pg.shape[0] > m["B"]:
                pg[m["B"] :].zero_()
            if self._distributed:
                self._futures.append(dist.reduce_scatter_tensor(m["shard"], pg, op=dist.ReduceOp.AVG, async_op=True))
            else:
                m["shard"].copy_(pg)
                self._futures.append(None)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, wd, momentum = group["lr"], group["weight_decay"], group["momentum"]
            gathers = []
            for m, fut in zip(self._metas, self._futures, strict=True):
                if fut is not None:
                    fut.wait()
                g = m["shard"]
                buf = m["momentum"]
                buf.mul_(momentum).add_(g)
                update = g.add(buf, alpha=momentum) if group["nesterov"] else buf
                if group["row_normalize"]:
                    norms = update.float().norm(dim=-1, keepdim=True).clamp_min(1e-7)
                    update = update / norms.to(update.dtype)
                update = zeropower_via_newtonschulz5(update, steps=group["backend_steps"])
                if self._distributed:
                    gathers.append(dist.all_gather_into_tensor(m["full_update"], update.contiguous(), async_op=True))
                else:
                    m["full_update"].copy_(update)
                    gathers.append(None)
            for m, gather in zip(self._metas, gathers, strict=True):
                if gather is not None:
                    gather.wait()
                p = m["p"]
                if wd > 0.0:
                    p.data.mul_(1.0 - lr * wd)
                p.data.add_(m["full_update"][: m["B"]].to(p.dtype), alpha=-lr * m["scale"])
        self._futures = []


class Optimizers:
    BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")

    def __init__(self, h, base_model):
        banks = [getattr(base_model, name) for name in self.BANKS]
        bank_ids = {id(p) for p in banks}
        embed = base_model.tok_emb.weight
        scalars = [p for p in base_model.parameters() if id(p) not in bank_ids and p is not embed]
        self.replicated = [embed, *scalars]
        self.optimizer_tok = torch.optim.AdamW(
            [{"params": [embed], "lr": h.embed_lr, "base_lr": h.embed_lr}],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            weight_decay=h.embed_wd,
            fused=True,
        )
        self.optimizer_muon = Muon(
            banks,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.optimizer_muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.optimizer_scalar = torch.optim.AdamW(
            [{"params": scalars, "lr": h.scalar_lr, "base_lr": h.scalar_lr}],
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

    def step(self, distributed):
        self.optimizer_muon.launch_reduce_scatters()
        if distributed:
            handles = [
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG, async_op=True)
                for p in self.replicated
                if p.grad is not None
            ]
            for handle in handles:
                handle.wait()
        self.optimizer_tok.step()
        self.optimizer_scalar.step()
        self.optimizer_muon.step()
        self.zero_grad_all()


# ----------------------------------------
# GPTQ
# ----------------------------------------


def restore_fp32_params(model):
    """Banks, gains and gates stay fp32 masters; the embedding computes in bf16 under autocast."""
    for name, param in model.named_parameters():
        if param.dtype != torch.float32:
            param.data = param.data.float()


class HessianTaps:
    """Sums X^T X of what goes into each matrix, by the matrix's name in the unbanked state dict."""

    FEEDS = {
        "attn_in": ("attn.q", "attn.k", "attn.v"),
        "attn_out": ("attn.o",),
        "mlp_in": ("mlp.up",),
        "mlp_hid": ("mlp.down",),
    }

    def __init__(self, model):
        self.model = model
        self.sums = {}

    def _adder(self, names):
        def add(kind, x):
            flat = x.detach().reshape(-1, x.size(-1)).float()
            gram = flat.t() @ flat
            for name in names(kind):
                if name not in self.sums:
                    self.sums[name] = torch.zeros_like(gram)
                self.sums[name].add_(gram)

        return add

    def __enter__(self):
        for i, block in enumerate(self.model.blocks):
            add = self._adder(lambda kind, i=i: [f"blocks.{i}.{part}" for part in self.FEEDS[kind]])
            block.attn.tap = add
            block.mlp.tap = add
        self.model.tap = self._adder(lambda kind: ["tok_emb"])
        return self

    def __exit__(self, *exc):
        for block in self.model.blocks:
            block.attn.tap = None
            block.mlp.tap = None
        self.model.tap = None


def collect_hessians(model, batches, h):
    """Hessians over the given batches of input tokens, averaged over the ranks."""
    model.eval()
    count = 0
    with HessianTaps(model) as taps, torch.no_grad():
        for x in batches:
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.forward_logits(x)
            count += 1
    for name in sorted(taps.sums):
        taps.sums[name].div_(max(count, 1))
        if h.distributed:
            dist.all_reduce(taps.sums[name], op=dist.ReduceOp.AVG)
    return taps.sums


def calibration_batches(h, device):
    """Input tokens of fresh sequences from the training shards."""
    loader = ShuffledSequenceLoader(h, device)
    for _ in range(h.gptq_calibration_batches):
        x, _ = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
        yield x


def gptq_quantize_weight(w, H, clip_sigmas, clip_range, block_size=128):
    """Columns in the order of their Hessian diagonal; each one's rounding error is passed on to the later ones."""
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    damp = 0.01 * H.diag().mean()
    H.diagonal().add_(damp)
    perm = torch.argsort(H.diag(), descending=True)
    inv_perm = torch.argsort(perm)
    W = W_orig[:, perm].clone()
    W[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)
    row_std = W_orig.std(dim=1)
    s = (clip_sigmas * row_std / clip_range).clamp_min(1e-10).to(torch.float16)
    sf = s.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W_block = W[:, i1:i2].clone()
        Hinv_block = Hinv[i1:i2, i1:i2]
        Err = torch.zeros_like(W_block)
        for j in range(i2 - i1):
            w_col = W_block[:, j]
            d = Hinv_block[j, j]
            q_col = torch.clamp(torch.round(w_col / sf), -clip_range, clip_range)
            Q[:, i1 + j] = q_col.to(torch.int8)
            err = (w_col - q_col * sf) / d
            Err[:, j] = err
            W_block[:, j:] -= err.unsqueeze(1) * Hinv_block[j, j:].unsqueeze(0)
        if i2 < cols:
            W[:, i2:] -= Err @ Hinv[i1:i2, i2:]
    return Q[:, inv_perm].contiguous(), s


def unbank_state_dict(state_dict, n):
    """Bank slices under names of their own: what GPTQ sees as single matrices."""
    out = {}
    for name, t in state_dict.items():
        if name == "qo_bank":
            for i in range(n):
                out[f"blocks.{i}.attn.q"] = t[i]
                out[f"blocks.{i}.attn.o"] = t[n + i]
        elif name == "kv_bank":
            for i in range(n):
                out[f"blocks.{i}.attn.k"] = t[i]
                out[f"blocks.{i}.attn.v"] = t[n + i]
        elif name == "mlp_up_bank":
            for i in range(n):
                out[f"blocks.{i}.mlp.up"] = t[i]
        elif name == "mlp_down_bank":
            for i in range(n):
                out[f"blocks.{i}.mlp.down"] = t[i]
        elif name == "tok_emb.weight":
            out["tok_emb"] = t
        else:
            out[name] = t
    return out


def rebank_state_dict(flat, n, template):
    """The inverse of unbank_state_dict, in the dtypes of the template."""

    def stack(*parts):
        return torch.stack([flat[f"blocks.{i}.{part}"] for part in parts for i in range(n)])

    out = {
        "qo_bank": stack("attn.q", "attn.o"),
        "kv_bank": stack("attn.k", "attn.v"),
        "mlp_up_bank": stack("mlp.up"),
        "mlp_down_bank": stack("mlp.down"),
        "tok_emb.weight": flat["tok_emb"],
    }
    for name, t in template.items():
        out[name] = (out[name] if name in out else flat[name]).to(dtype=t.dtype)
    return out


def gptq_mixed_quantize(flat, hessians, h):
    """Matrices to int6, the embedding to int8, everything small as fp16."""
    packed, meta = {}, {}
    for name, tensor in flat.items():
        t = tensor.detach()
        if name in hessians:
            bits = h.embed_bits if name == "tok_emb" else h.matrix_bits
            sigmas = h.embed_clip_sigmas if name == "tok_emb" else h.matrix_clip_sigmas
            q, s = gptq_quantize_weight(t, hessians[name].to(t.device), sigmas, 2 ** (bits - 1) - 1)
            packed[name + ".q"] = q.cpu()
            packed[name + ".scale"] = s.cpu()
            meta[name] = f"gptq (int{bits})"
        else:
            packed[name] = t.to(torch.float16).cpu() if t.is_floating_point() else t.cpu()
            meta[name] = "passthrough"
    categories = collections.defaultdict(set)
    for name, cat in meta.items():
        categories[cat].add(re.sub(r"\.\d+$", "", re.sub(r"blocks\.\d+", "blocks", name)))
    log0("Quantized weights:")
    for cat in sorted(categories):
        log0(f"  {cat}: {', '.join(sorted(categories[cat]))}")
    return packed, meta


def dequantize_mixed(packed, meta):
    out = {}
    for name, info in meta.items():
        if info == "passthrough":
            out[name] = packed[name].float()
        else:
            out[name] = packed[name + ".q"].float() * packed[name + ".scale"].float()[:, None]
    return out


# ----------------------------------------
# Compression
# ----------------------------------------

_BSHF_MAGIC = b"BSHF"


def _byte_shuffle(data, stride=2):
    """First all even bytes, then all odd ones: the high halves of fp16 lie together."""
    if stride <= 1 or len(data) < stride:
        return data
    src = np.frombuffer(data, dtype=np.uint8)
    return _BSHF_MAGIC + bytes([stride]) + b"".join(src[pos::stride].tobytes() for pos in range(stride))


def _byte_unshuffle(data):
    if data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    n = len(payload)
    out = np.empty(n, dtype=np.uint8)
    offset = 0
    for pos in range(stride):
        length = n // stride + (1 if pos < n % stride else 0)
        out[pos::stride] = payload[offset : offset + length]
        offset += length
    return out.tobytes()


def _compress(data, compressor):
    data = _byte_shuffle(data)
    if compressor == "brotli":
        return brotli.compress(data, quality=11)
    raise ValueError(f"Unknown compressor: {compressor!r}")


def _decompress(data, compressor):
    if compressor == "brotli":
        return _byte_unshuffle(brotli.decompress(data))
    raise ValueError(f"Unknown compressor: {compressor!r}")


def serialize(h, base_model, hessians, code):
    """Quantises, packs and writes the artifact; returns the bytes of artifact and code together."""
    code_bytes = len(code.encode("utf-8"))
    flat = unbank_state_dict(base_model.state_dict(), h.num_layers)
    packed, meta = gptq_mixed_quantize(flat, hessians, h)
    buf = io.BytesIO()
    torch.save({"w": packed, "m": meta}, buf)
    blob = _compress(buf.getvalue(), h.compressor)
    bytes_total = len(blob) + code_bytes
    if h.is_main_process:
        torch.save(base_model.state_dict(), h.model_path)
        log0(f"Serialized model: {os.path.getsize(h.model_path)} bytes")
        log0(f"Code size: {code_bytes} bytes")
        with open(h.quantized_model_path, "wb") as f:
            f.write(blob)
        log0(f"Serialized model quantized+{h.compressor}: {len(blob)} bytes")
        log0(f"Total submission size quantized+{h.compressor}: {bytes_total} bytes")
        if bytes_total > h.size_limit_bytes:
            raise RuntimeError(f"{bytes_total} bytes are more than {h.size_limit_bytes}")
    if h.distributed:
        dist.barrier()
    return bytes_total


def deserialize(h, device):
    eval_model = GPT(h).to(device)
    restore_fp32_params(eval_model)
    with open(h.quantized_model_path, "rb") as f:
        raw = _decompress(f.read(), h.compressor)
    state = torch.load(io.BytesIO(raw), map_location="cpu")
    flat = dequantize_mixed(state["w"], state["m"])
    eval_model.load_state_dict(rebank_state_dict(flat, h.num_layers, eval_model.state_dict()), strict=True)
    if h.num_loops > 0:
        eval_model.looping_active = True
    return eval_model


# ----------------------------------------
# Evaluation
# ----------------------------------------


def fill_windows(val_tokens, starts, seq_len, device):
    """Inputs and targets of the windows that begin at the given positions; a short one is filled up with zeros."""
    last = val_tokens.numel() - 1
    x = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    y = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    lengths = []
    for i, ws in enumerate(starts):
        end = min(ws + seq_len, last)
        piece = val_tokens[ws : end + 1].to(torch.int64)
        x[i, : end - ws] = piece[:-1]
        y[i, : end - ws] = piece[1:]
        lengths.append(end - ws)
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True), lengths


class LossTally:
    """Nats, tokens and bytes of what was scored on this rank; `reduce` adds the ranks up."""

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, val_data, nll, prev, tgt):
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += float(nll.numel())
        self.sums[2] += val_data.count_bytes(prev, tgt).sum()

    def reduce(self):
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums, op=dist.ReduceOp.SUM)
        nats, tokens, nbytes = self.sums.tolist()
        loss = nats / tokens
        return loss, loss / math.log(2.0) * (tokens / nbytes)


def timed_eval(label, fn, *args, **kwargs):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args, **kwargs)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log0(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms")
    return val_loss, val_bpb


def eval_val(h, device, val_data, model):
    """Windows side by side, each position with the context of its own window only."""
    seq_len = h.eval_seq_len
    starts = list(range(0, val_data.val_tokens.numel() - 1, seq_len))
    mine = starts[len(starts) * h.rank // h.world_size : len(starts) * (h.rank + 1) // h.world_size]
    batch_seqs = max(1, h.val_batch_tokens // (seq_len * h.world_size))
    tally = LossTally(device)
    model.eval()
    with torch.no_grad():
        for bi in range(0, len(mine), batch_seqs):
            x, y, lengths = fill_windows(val_data.val_tokens, mine[bi : bi + batch_seqs], seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(x)
            nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)
            for i, length in enumerate(lengths):
                tally.add(val_data, nll[i, :length], x[i, :length], y[i, :length])
    model.train()
    return tally.reduce()


def sliding_starts(total_tokens, seq_len, stride):
    """Where the sliding windows begin: each but the first scores only what the one before did not reach."""
    context_size = seq_len - stride
    return [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context_size < total_tokens]


def first_scored(ws, seq_len, stride):
    return 0 if ws == 0 else seq_len - stride


def eval_val_sliding(h, device, val_data, base_model):
    base_model.eval()
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    seq_len, stride = h.eval_seq_len, h.eval_stride
    total_tokens = val_data.val_tokens.numel() - 1
    starts = sliding_starts(total_tokens, seq_len, stride)
    mine = starts[len(starts) * h.rank // h.world_size : len(starts) * (h.rank + 1) // h.world_size]
    tally = LossTally(device)
    with torch.no_grad():
        for bi in range(0, len(mine), h.eval_batch_seqs):
            batch = mine[bi : bi + h.eval_batch_seqs]
            x, y, lengths = fill_windows(val_data.val_tokens, batch, seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)
            for i, ws in enumerate(batch):
                s = first_scored(ws, seq_len, stride)
                tally.add(val_data, nll[i, s : lengths[i]], x[i, s : lengths[i]], y[i, s : lengths[i]])
    base_model.train()
    return tally.reduce()


# ----------------------------------------
# Token hints
# ----------------------------------------


class HintTable:
    """What came after each context of `order` tokens the last time, and how often in a row it came again.

    `suggest` looks up, `absorb` learns; a context that crosses a document's start is left out of both.
    """

    MULT = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, h, tokens):
        self.order = h.hint_order
        self.shift = np.uint64(64 - h.hint_bits)
        self.min_runs = h.hint_min_runs
        self.tokens = tokens.numpy()
        self.doc = np.cumsum(self.tokens == h.bos_id, dtype=np.int32)
        self.follow = np.zeros(1 << h.hint_bits, dtype=np.uint16)
        self.runs = np.zeros(1 << h.hint_bits, dtype=np.uint8)

    def _slots(self, lo, hi):
        """Table slots of the targets lo..hi-1, from the tokens before each, and which of them may be used."""
        key = np.zeros(hi - lo, dtype=np.uint64)
        for back in range(self.order, 0, -1):
            key = (key + self.tokens[lo - back : hi - back].astype(np.uint64) + np.uint64(1)) * self.MULT
            key ^= key >> np.uint64(29)
        usable = self.doc[lo - self.order : hi - self.order] == self.doc[lo - 1 : hi - 1]
        return (key >> self.shift).astype(np.int64), usable

    def suggest(self, lo, hi):
        """The token hinted at for each target lo..hi-1; -1 where there is none."""
        hints = np.full(hi - lo, -1, dtype=np.int64)
        start = max(lo, self.order)
        if start < hi:
            slots, usable = self._slots(start, hi)
            usable &= self.runs[slots] >= self.min_runs
            hints[start - lo :] = np.where(usable, self.follow[slots].astype(np.int64), -1)
        return hints

    def absorb(self, lo, hi):
        """Learns the targets lo..hi-1."""
        start = max(lo, self.order)
        if start >= hi:
            return
        slots, usable = self._slots(start, hi)
        slots, tok = slots[usable], self.tokens[start:hi][usable]
        again = (self.follow[slots] == tok) & (self.runs[slots] > 0)
        self.runs[slots] = np.where(again, np.minimum(self.runs[slots].astype(np.int32) + 1, 255), 1).astype(np.uint8)
        self.follow[slots] = tok


def tilted_nll(logits, targets, hints, beta):
    """-log p'(target), where p' is p with the hinted token's odds raised by exp(beta) and divided by its sum."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    nll = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    p_hint = logp.gather(-1, hints.clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
    log_z = torch.log1p(p_hint * math.expm1(beta))
    tilted = nll - beta * (hints == targets).to(nll.dtype) + log_z
    return torch.where(hints >= 0, tilted, nll)


# ----------------------------------------
# Test-time training: every chunk is scored, then learnt
# ----------------------------------------


def eval_val_ttt(h, device, val_data, base_model):
    seq_len, stride, chunk_tokens = h.eval_seq_len, h.eval_stride, h.ttt_chunk_tokens
    val_tokens = val_data.val_tokens
    total_tokens = val_tokens.numel() - 1
    num_chunks = (total_tokens + chunk_tokens - 1) // chunk_tokens
    chunk_windows = [[] for _ in range(num_chunks)]
    for ws in sliding_starts(total_tokens, seq_len, stride):
        chunk_windows[(ws + first_scored(ws, seq_len, stride)) // chunk_tokens].append(ws)
    log0(f"ttt:start chunks={num_chunks} lr={h.ttt_lr} epochs={h.ttt_epochs} hints={int(h.hint_enabled)}")
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    loss_fn = torch.compile(base_model, dynamic=False, fullgraph=True)
    ttt_params = [p for p in base_model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(ttt_params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    table = HintTable(h, val_tokens) if h.hint_enabled else None
    hints = torch.full((total_tokens + 1,), -1, dtype=torch.int64)
    tally = LossTally(device)
    t0 = time.perf_counter()

    for ci in range(num_chunks):
        chunk_start = ci * chunk_tokens
        chunk_end = min(chunk_start + chunk_tokens, total_tokens)

        # score
        windows = chunk_windows[ci]
        mine = windows[len(windows) * h.rank // h.world_size : len(windows) * (h.rank + 1) // h.world_size]
        if table is not None:
            hints[chunk_start + 1 : chunk_end + 1] = torch.from_numpy(table.suggest(chunk_start + 1, chunk_end + 1))
        base_model.eval()
        with torch.no_grad():
            for bi in range(0, len(mine), h.ttt_batch_seqs):
                batch = mine[bi : bi + h.ttt_batch_seqs]
                x, y, lengths = fill_windows(val_tokens, batch, seq_len, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = logits_fn(x)
                for i, ws in enumerate(batch):
                    s, e = first_scored(ws, seq_len, stride), lengths[i]
                    prev, tgt = x[i, s:e], y[i, s:e]
                    hint = hints[ws + s + 1 : ws + e + 1].to(device)
                    nll = tilted_nll(logits[i, s:e], tgt, hint, h.hint_beta)
                    tally.add(val_data, nll, prev, tgt)

        # learn
        if ci < num_chunks - 1:
            if table is not None:
                table.absorb(chunk_start + 1, chunk_end + 1)
            ttt_train_chunk(h, device, val_tokens, chunk_start, chunk_end, loss_fn, base_model, optimizer, ci / num_chunks)
        if ci % 200 == 0:
            log0(f"  ttt_chunk:{ci + 1}/{num_chunks} time:{time.perf_counter() - t0:.1f}s")
    base_model.eval()
    return tally.reduce()


def ttt_train_chunk(h, device, val_tokens, chunk_start, chunk_end, loss_fn, base_model, optimizer, progress):
    """Some epochs of SGD over one chunk; the ranks share its sequences and average their gradients."""
    seq_len = h.eval_seq_len
    num_seqs = (chunk_end - chunk_start) // seq_len
    if num_seqs == 0:
        return
    for group in optimizer.param_groups:
        group["lr"] = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    mine = range(num_seqs * h.rank // h.world_size, num_seqs * (h.rank + 1) // h.world_size)
    starts = [chunk_start + k * seq_len for k in mine]
    base_model.train()
    for _ in range(h.ttt_epochs):
        x, y, _ = fill_windows(val_tokens, starts, seq_len, device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = loss_fn(x, y)
        loss.backward()
        params = [p for p in base_model.parameters() if p.grad is not None]
        if h.distributed:
            for p in params:
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
        optimizer.step()


# ----------------------------------------
# Training
# ----------------------------------------


class TrainState:
    """What goes along with the steps: the model, its compiled form, the optimizers and the shards."""

    def __init__(self, h, device):
        self.base_model = GPT(h).to(device)
        restore_fp32_params(self.base_model)
        self.compiled_model = torch.compile(self.base_model, dynamic=False, fullgraph=True)
        self.optimizers = Optimizers(h, self.base_model)
        self.train_loader = ShuffledSequenceLoader(h, device)

    def set_looping(self, on):
        self.base_model.looping_active = on


def lr_multiplier(h, frac):
    if h.warmdown_frac <= 0 or frac < 1.0 - h.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / h.warmdown_frac, h.min_lr)


def train_step(h, state, step, lr_scale):
    """One optimizer step; returns the mean loss of this rank's micro-batches."""
    opts = state.optimizers
    opts.zero_grad_all()
    train_loss = torch.zeros((), device=next(state.base_model.parameters()).device)
    for _ in range(h.grad_accum_steps):
        x, y = state.train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
            loss = state.compiled_model(x, y)
        train_loss += loss.detach()
        (loss / h.grad_accum_steps).backward()
    frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
    momentum = (1 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum
    for group in opts.optimizer_muon.param_groups:
        group["momentum"] = momentum
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
    if h.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(state.base_model.parameters(), h.grad_clip_norm)
    opts.step(h.distributed)
    return train_loss / h.grad_accum_steps


def warm_up(h, state, device):
    """Some steps to have everything compiled, after which weights, optimizers and shards start anew."""
    if h.warmup_steps <= 0:
        return
    weights = {name: t.detach().cpu().clone() for name, t in state.base_model.state_dict().items()}
    adam_states = [copy.deepcopy(o.state_dict()) for o in (state.optimizers.optimizer_tok, state.optimizers.optimizer_scalar)]
    state.base_model.train()
    for looping in (False, True) if h.num_loops > 0 else (False,):
        state.set_looping(looping)
        for warmup_step in range(h.warmup_steps):
            train_step(h, state, warmup_step, 1.0)
            if warmup_step <= 5 or warmup_step + 1 == h.warmup_steps:
                log0(f"warmup_step:{warmup_step + 1}/{h.warmup_steps} looping:{int(looping)}")
    state.set_looping(False)
    state.base_model.load_state_dict(weights, strict=True)
    for opt, saved in zip((state.optimizers.optimizer_tok, state.optimizers.optimizer_scalar), adam_states, strict=True):
        opt.load_state_dict(saved)
    state.optimizers.optimizer_muon.reset_momentum()
    state.optimizers.zero_grad_all()
    state.train_loader = ShuffledSequenceLoader(h, device)


class WeightEMA:
    """Exponential average of all weights, kept in fp32 on the device."""

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def copy_to(self, model):
        own = model.state_dict()
        model.load_state_dict({name: t.to(dtype=own[name].dtype) for name, t in self.shadow.items()}, strict=True)


def train_model(h, device, val_data):
    """Trains up to the wall clock less the time kept for GPTQ; returns the averaged model and the milliseconds used."""
    state = TrainState(h, device)
    base_model = state.base_model
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    max_wallclock_ms = 1000.0 * h.max_wallclock_seconds if h.max_wallclock_seconds > 0 else None
    if max_wallclock_ms is not None:
        max_wallclock_ms -= 1000.0 * h.gptq_reserve_seconds
        log0(f"gptq:reserving {h.gptq_reserve_seconds:.0f}s, effective={max_wallclock_ms:.0f}ms")

    def training_frac(step, elapsed_ms):
        if max_wallclock_ms is None:
            return step / max(h.iterations, 1)
        return elapsed_ms / max(max_wallclock_ms, 1e-9)

    warm_up(h, state, device)
    ema = WeightEMA(base_model, h.ema_decay)
    training_time_ms = 0.0
    stop_after_step = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (h.val_loss_every > 0 and step % h.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, base_model)
            log0(f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after_step is not None and step < h.iterations:
                log0(f"stopping_early: wallclock_cap train_time: {training_time_ms:.0f}ms step: {step}/{h.iterations}")
            break
        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = training_frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            state.set_looping(True)
            log0(f"layer_loop:enabled step:{step} frac:{frac:.3f} encoder:{base_model.loop_encoder}")
        train_loss = train_step(h, state, step, lr_multiplier(h, frac))
        ema.update(base_model)
        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if h.train_log_every > 0 and (step <= 5 or step % h.train_log_every == 0):
            tok_per_sec = step * h.train_batch_tokens / (approx_ms / 1000.0)
            log0(
                f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} "
                f"train_time: {approx_ms / 60000:.1f}m tok/s: {tok_per_sec:.0f}"
            )
        reached_cap = max_wallclock_ms is not None and approx_ms >= max_wallclock_ms
        if h.distributed and max_wallclock_ms is not None:
            flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    log0("ema:applying EMA weights")
    ema.copy_to(base_model)
    return base_model, training_time_ms


def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    code = Path(__file__).read_text(encoding="utf-8")
    val_data = ValidationData(h, device)
    log0(f"train_shards: {len(glob.glob(h.train_files))}")
    log0(f"val_tokens: {val_data.val_tokens.numel() - 1}")

    base_model, train_ms = train_model(h, device, val_data)
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    hessians = collect_hessians(base_model, calibration_batches(h, device), h)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t0)
    log0(f"gptq:collected {len(hessians)} Hessians in {calib_ms:.0f}ms, train+calibration {train_ms + calib_ms:.0f}ms")
    serialize(h, base_model, hessians, code)
    del base_model, hessians
    torch._dynamo.reset()
    torch.cuda.empty_cache()

    eval_model = deserialize(h, device)
    timed_eval("quantized", eval_val, h, device, val_data, eval_model)
    if h.sliding_window_enabled:
        timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val_data, eval_model)
    if h.ttt_enabled:
        del eval_model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        ttt_model = deserialize(h, device)
        val_loss, val_bpb = timed_eval("quantized_ttt", eval_val_ttt, h, device, val_data, ttt_model)
        log0(f"final val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")


def main():
    h = Hyperparameters()
    set_logging_hparams(h)
    if h.world_size <= 0 or 8 % h.world_size != 0:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device, timeout=datetime.timedelta(minutes=20))
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 32
    if h.is_main_process:
        os.makedirs("logs", exist_ok=True)
        log0(Path(__file__).read_text(encoding="utf-8"), console=False)
        log0("=" * 100, console=False)
        log0("Hyperparameters:")
        for k, v in sorted(vars(type(h)).items()):
            if not k.startswith("_"):
                log0(f"  {k}: {v}")
        log0(f"Running Python {sys.version}", console=False)
        log0(f"Running PyTorch {torch.__version__}", console=False)
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
        log0(smi, console=False)
        log0("=" * 100, console=False)
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
