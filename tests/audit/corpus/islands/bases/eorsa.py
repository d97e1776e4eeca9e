"""SP8192, looped middle layers, parallel residual lanes, MuonEq-R, SD-clip GPTQ, score-first TTT with a prefix-only n-gram tilt."""

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

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    quant_reserve_seconds = float(os.environ.get("QUANT_RESERVE_SECONDS", 24.0))

    # evaluation
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 2048 * 32 * 8))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))
    max_eval_seconds = float(os.environ.get("MAX_EVAL_SECONDS", 600.0))

    # test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 1))

    # n-gram tilt
    tilt_enabled = bool(int(os.environ.get("TILT_ENABLED", "1")))
    tilt_order = int(os.environ.get("TILT_ORDER", 16))
    tilt_beta_token = float(os.environ.get("TILT_BETA_TOKEN", 2.6))
    tilt_beta_within = float(os.environ.get("TILT_BETA_WITHIN", 0.9))
    tilt_beta_start = float(os.environ.get("TILT_BETA_START", 0.7))
    tilt_min_rate = float(os.environ.get("TILT_MIN_RATE", 0.6))
    tilt_min_tries = int(os.environ.get("TILT_MIN_TRIES", 2))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    skip_gates_enabled = bool(int(os.environ.get("SKIP_GATES_ENABLED", "1")))
    smear_enabled = bool(int(os.environ.get("SMEAR_ENABLED", "1")))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    rope_train_seq_len = int(os.environ.get("ROPE_TRAIN_SEQ_LEN", 2048))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.25))

    # depth recurrence
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))

    # parallel residual lanes
    parallel_start_layer = int(os.environ.get("PARALLEL_START_LAYER", 7))

    # optimizers
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    embed_lr = float(os.environ.get("EMBED_LR", 0.6))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
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
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # quantization
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = max(8 // world_size, 1)

    # paths
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    quantized_model_path = f"final_model.int{matrix_bits}.ptz"


_logger_h = None


def set_logging_hparams(h: Hyperparameters) -> None:
    global _logger_h
    _logger_h = h


def log(msg, console: bool = True) -> None:
    if _logger_h is None:
        print(msg)
        return
    if _logger_h.is_main_process:
        if console:
            print(msg, flush=True)
        if _logger_h.logfile is not None:
            with open(_logger_h.logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)


# ----------------------------------------
# Data
# ----------------------------------------

SHARD_MAGIC = 20240520
SHARD_HEADER_INTS = 256
BOS_ID = 1


def load_data_shard(file: Path) -> Tensor:
    header_bytes = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * token_bytes
    if file.stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str, seq_len: int) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() <= seq_len:
        raise ValueError(f"Validation split is too short for seq_len={seq_len}")
    return tokens


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
    sp_vocab_size = int(sp.vocab_size())
    assert sp.piece_to_id("\u2581") != sp.unk_id(), "tokenizer must have the space mark as its own piece"
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
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} does not match the tokenizer ({int(self.sp.vocab_size())})")
        self.val_tokens = load_validation_tokens(h.val_files, h.eval_seq_len)
        self.base_bytes_lut, self.has_leading_space_lut, self.is_boundary_token_lut = build_sentencepiece_luts(
            self.sp, h.vocab_size, device
        )

    def count_bytes(self, prev_ids: Tensor, tgt_ids: Tensor) -> Tensor:
        nbytes = self.base_bytes_lut[tgt_ids].to(torch.float64)
        spaced = self.has_leading_space_lut[tgt_ids] & ~self.is_boundary_token_lut[prev_ids]
        return nbytes + spaced.to(torch.float64)


class ShuffledSequenceLoader:
    """Every rank owns a slice of the shards and draws fixed-length sequences in a seeded random order."""

    def __init__(self, h: Hyperparameters, device: torch.device):
        self.world_size = h.world_size
        self.seq_len = h.train_seq_len
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"No files found for pattern: {h.train_files}")
        self.files = all_files[h.rank :: h.world_size] or all_files
        self.rng = np.random.Generator(np.random.PCG64(h.seed * 7919 + h.rank))
        self.shards = [load_data_shard(file) for file in self.files]
        self.start_inds: list[list[int]] = [[] for _ in self.files]
        for si in range(len(self.files)):
            self._reset_shard(si)

    def _reset_shard(self, si: int) -> None:
        num_tokens = self.shards[si].numel()
        phase = int(self.rng.integers(0, max(1, min(self.seq_len, num_tokens - self.seq_len - 1))))
        num_sequences = (num_tokens - 1 - phase) // self.seq_len
        order = self.rng.permutation(num_sequences)
        self.start_inds[si] = (phase + order * self.seq_len).tolist()

    def next_batch(self, global_tokens: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
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
            window = self.shards[si][start : start + self.seq_len + 1].to(dtype=torch.int64)
            x[bi] = window[:-1]
            y[bi] = window[1:]
        return x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(self.device, non_blocking=True)


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
    def __init__(self, dim: int, base: float, train_seq_len: int, rope_dims: int):
        super().__init__()
        self.base = base
        self.train_seq_len = train_seq_len
        self.rope_dims = rope_dims if rope_dims > 0 else dim
        inv_freq = 1.0 / (base ** (torch.arange(0, self.rope_dims, 2, dtype=torch.float32) / self.rope_dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos_cached is None or self._seq_len_cached != seq_len or self._cos_cached.device != device:
            inv_freq = self.inv_freq.to(device)
            if seq_len > self.train_seq_len:
                rd = self.rope_dims
                base = self.base * (seq_len / self.train_seq_len) ** (rd / (rd - 2))
                inv_freq = 1.0 / (base ** (torch.arange(0, rd, 2, dtype=torch.float32, device=device) / rd))
            freqs = torch.outer(torch.arange(seq_len, device=device, dtype=inv_freq.dtype), inv_freq)
            self._cos_cached = freqs.cos()[None, :, None, :]
            self._sin_cached = freqs.sin()[None, :, None, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    rot, rest = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    a, b = rot[..., :half], rot[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if flash_attn_3_func is not None:
        return flash_attn_3_func(q, k, v, causal=True)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return y.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.num_heads = h.num_heads
        self.num_kv_heads = h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rope_dims = h.rope_dims
        self.rotary = Rotary(self.head_dim, h.rope_base, h.rope_train_seq_len, h.rope_dims)
        self.use_xsa = False

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        B, T, H, D = y.shape
        y_g = y.reshape(B, T, self.num_kv_heads, H // self.num_kv_heads, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, T, H, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).reshape(B, T, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(T, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = causal_attention(q, k, v)
        if self.use_xsa:
            y = self._xsa(y, v)
        return self.proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.fc = CastedLinear(h.model_dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, h.model_dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Smear(nn.Module):
    """Adds a gated copy of the previous position's embedding; a document's first token takes nothing."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.width = width
        self.gate = CastedLinear(width, 1, bias=False)
        self.gate._zero_init = True
        self.lam = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = self.lam.to(x.dtype) * torch.sigmoid(self.gate(x[:, 1:, : self.width]))
        inside = (ids[:, 1:] != BOS_ID).to(x.dtype).unsqueeze(-1)
        return torch.cat((x[:, :1], x[:, 1:] + g * inside * x[:, :-1]), dim=1)


class Block(nn.Module):
    def __init__(self, h: Hyperparameters, layer_idx: int, parallel: bool):
        super().__init__()
        self.parallel = parallel
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(h)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        if parallel:
            self.lane_mix = nn.Parameter(torch.tensor([1.0, 0.5, 0.5, 1.0], dtype=torch.float32))
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0] * x + mix[1] * x0
        x = x_in + self.attn_scale.to(x.dtype) * self.attn(self.attn_norm(x_in) * self.ln_scale_factor)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.ln_scale_factor)

    def forward_lanes(self, la: Tensor, lm: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        mix = self.resid_mix.to(dtype=la.dtype)
        w = self.lane_mix.to(dtype=la.dtype)
        a_in = mix[0] * la + mix[1] * x0
        a_out = self.attn_scale.to(la.dtype) * self.attn(self.attn_norm(a_in) * self.ln_scale_factor)
        m_out = self.mlp_scale.to(lm.dtype) * self.mlp(self.mlp_norm(lm) * self.ln_scale_factor)
        return a_in + w[0] * a_out + w[1] * m_out, lm + w[2] * a_out + w[3] * m_out


class GPT(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.logit_softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = Smear() if h.smear_enabled else None
        self.blocks = nn.ModuleList([Block(h, i, i >= h.parallel_start_layer) for i in range(h.num_layers)])
        for block in self.blocks[max(0, h.num_layers - h.xsa_last_n) :]:
            block.attn.use_xsa = True
        self.final_norm = RMSNorm()
        self.looping_active = False
        flat = list(range(h.num_layers))
        loop = flat[h.loop_start : h.loop_end + 1]
        looped = flat[: h.loop_start] + loop * (h.num_loops + 1) + flat[h.loop_end + 1 :]
        self.flat_order = flat
        self.looped_order = looped
        num_skips = len(looped) // 2
        self.skip_weights = nn.Parameter(torch.ones(num_skips, h.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(num_skips, h.model_dim, dtype=torch.float32)) if h.skip_gates_enabled else None
        )
        self.lane_out = nn.Parameter(torch.tensor([0.5, 0.5], dtype=torch.float32))
        self._init_weights(h)

    def _init_weights(self, h: Hyperparameters) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def _skip(self, x: Tensor, skip: Tensor, i: int) -> Tensor:
        scaled = self.skip_weights[i].to(x.dtype) * skip
        if self.skip_gates is None:
            return x + scaled
        gate = torch.sigmoid(self.skip_gates[i].to(x.dtype))
        return torch.lerp(scaled, x, gate)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
        if self.smear is not None:
            x = self.smear(x, input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        order = self.looped_order if self.looping_active else self.flat_order
        half = len(order) // 2
        skips: list[Tensor] = []
        lanes: tuple[Tensor, Tensor] | None = None
        for pos, layer in enumerate(order):
            block = self.blocks[layer]
            if pos >= half and skips:
                skip = skips.pop()
                si = min(len(order) - 1 - pos, self.skip_weights.size(0) - 1)
                if lanes is None:
                    x = self._skip(x, skip, si)
                else:
                    lanes = (self._skip(lanes[0], skip, si), lanes[1])
            if block.parallel:
                lanes = block.forward_lanes(*(lanes if lanes is not None else (x, x)), x0)
            else:
                x = block(x, x0)
            if pos < half:
                skips.append(x)
        if lanes is not None:
            w = self.lane_out.to(x.dtype)
            x = w[0] * lanes[0] + w[1] * lanes[1]
        x = self.final_norm(x)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


def classify_param(name: str) -> str:
    if "tok_emb" in name:
        return "embed"
    if ".mlp." in name:
        return "mlp"
    if ".attn." in name:
        return "attn"
    return "other"


# ----------------------------------------
# Optimization
# ----------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
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
    """MuonEq-R: rows of the momentum are brought to unit norm before the orthogonalisation; work is dealt to the ranks."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float, row_normalize: bool):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                backend_steps=backend_steps,
                weight_decay=weight_decay,
                row_normalize=row_normalize,
            ),
        )

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            total = sum(p.numel() for p in params)
            updates_flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(g)
                    g = g.add(buf, alpha=group["momentum"])
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
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(updates_flat[curr : curr + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                curr += p.numel()


CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "skip_gates",
    "lane_mix",
    "lane_out",
    "smear",
)


class Optimizers:
    def __init__(self, h: Hyperparameters, base_model: GPT):
        matrices, scalars = [], []
        for name, p in base_model.named_parameters():
            if "tok_emb" in name:
                continue
            control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            (scalars if p.ndim < 2 or control else matrices).append(p)
        adam_args = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.optimizer_tok = torch.optim.AdamW(
            [{"params": [base_model.tok_emb.weight], "lr": h.tied_embed_lr, "base_lr": h.tied_embed_lr}],
            weight_decay=h.embed_wd,
            **adam_args,
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
            [{"params": scalars, "lr": h.scalar_lr, "base_lr": h.scalar_lr}], weight_decay=h.adam_wd, **adam_args
        )
        self.optimizers = [self.optimizer_tok, self.optimizer_muon, self.optimizer_scalar]

    def __iter__(self):
        return iter(self.optimizers)

    def zero_grad_all(self) -> None:
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)

    def set_lr_scale(self, scale: float) -> None:
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self) -> None:
        for opt in self.optimizers:
            opt.step()
        self.zero_grad_all()


def restore_fp32_params(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
        if (param.ndim < 2 or control) and param.dtype != torch.float32:
            param.data = param.data.float()


# ----------------------------------------
# Quantization
# ----------------------------------------


def collect_hessians(
    h: Hyperparameters, model: GPT, loader: ShuffledSequenceLoader, device: torch.device
) -> dict[str, Tensor]:
    """X^T X of every quantised matrix's input, from training sequences."""
    hessians: dict[str, Tensor] = {}
    hooks = []

    def accumulate(key: str, x: Tensor) -> None:
        x = x.detach().float()
        if x.ndim == 3:
            x = x.reshape(-1, x.shape[-1])
        if key not in hessians:
            hessians[key] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=device)
        hessians[key].addmm_(x.T, x)

    def input_hook(key: str):
        return lambda module, inputs, output: accumulate(key, inputs[0])

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
            hooks.append(module.register_forward_hook(input_hook(name + ".weight")))
    hooks.append(
        model.final_norm.register_forward_hook(lambda module, inputs, output: accumulate("tok_emb.weight", output))
    )
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(h.gptq_calibration_batches):
            x, _ = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            model.forward_logits(x)
    for hook in hooks:
        hook.remove()
    for key in sorted(hessians):
        if h.distributed:
            dist.all_reduce(hessians[key], op=dist.ReduceOp.SUM)
        hessians[key] = hessians[key].cpu() / (h.gptq_calibration_batches * h.world_size)
    return hessians


def gptq_quantize_weight(
    w: Tensor, H: Tensor, clip_sigmas: float, clip_range: int, block_size: int
) -> tuple[Tensor, Tensor]:
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    damp = 0.01 * H.diag().mean()
    H.diagonal().add_(damp)
    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_work = W_orig[:, perm].clone()
    W_work[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)
    s = (clip_sigmas * W_orig.std(dim=1) / clip_range).clamp_min(1e-10).to(torch.float16)
    sf = s.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W_orig.device)
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W_block = W_work[:, i1:i2].clone()
        Hinv_block = Hinv[i1:i2, i1:i2]
        Err = torch.zeros(rows, i2 - i1, device=W_orig.device)
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
    return Q[:, invperm], s


def gptq_mixed_quantize(
    h: Hyperparameters, state_dict: dict[str, Tensor], hessians: dict[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    result: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for name, tensor in state_dict.items():
        t = tensor.detach()
        if not t.is_floating_point() or t.numel() <= 65536:
            result[name] = t.cpu().to(torch.float16) if t.is_floating_point() else t.cpu()
            meta[name] = "passthrough (float16)"
            continue
        embed = classify_param(name) == "embed"
        bits = h.embed_bits if embed else h.matrix_bits
        sigmas = h.embed_clip_sigmas if embed else h.matrix_clip_sigmas
        q, s = gptq_quantize_weight(
            t.to(device), hessians[name].to(device), sigmas, 2 ** (bits - 1) - 1, h.gptq_block_size
        )
        result[name + ".q"] = q.cpu()
        result[name + ".scale"] = s.cpu()
        meta[name] = f"gptq (int{bits})"
    groups = collections.defaultdict(set)
    for name, kind in meta.items():
        groups[kind].add(re.sub(r"\.\d+$", "", re.sub(r"blocks\.\d+", "blocks", name)))
    log("Quantized weights:")
    for kind in sorted(groups):
        log(f"  {kind}: {', '.join(sorted(groups[kind]))}")
    return result, meta


def dequantize_mixed(
    result: dict[str, Tensor], meta: dict[str, str], template: dict[str, Tensor]
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, orig in template.items():
        info = meta[name]
        if "passthrough" in info:
            t = result[name]
            out[name] = t.to(orig.dtype) if t.is_floating_point() else t
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        out[name] = (q.float() * s.float().view(q.shape[0], *([1] * (q.ndim - 1)))).to(orig.dtype)
    return out


# ----------------------------------------
# Artifact
# ----------------------------------------

_BSHF_MAGIC = b"BSHF"


def _byte_shuffle(data: bytes, stride: int = 2) -> bytes:
    src = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(src.size, dtype=np.uint8)
    dest = 0
    for pos in range(stride):
        chunk = src[pos::stride]
        out[dest : dest + chunk.size] = chunk
        dest += chunk.size
    return _BSHF_MAGIC + bytes([stride]) + out.tobytes()


def _byte_unshuffle(data: bytes) -> bytes:
    if data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    out = np.empty(payload.size, dtype=np.uint8)
    src = 0
    for pos in range(stride):
        size = (payload.size - pos + stride - 1) // stride
        out[pos::stride] = payload[src : src + size]
        src += size
    return out.tobytes()


def _compress(data: bytes) -> bytes:
    return brotli.compress(_byte_shuffle(data), quality=11)


def _decompress(data: bytes) -> bytes:
    return _byte_unshuffle(brotli.decompress(data))


def serialize(
    h: Hyperparameters, base_model: GPT, loader: ShuffledSequenceLoader, device: torch.device, train_seconds: float
) -> int:
    code_bytes = len(Path(__file__).read_bytes())
    if h.is_main_process:
        torch.save(base_model.state_dict(), h.model_path)
        log(f"Serialized model: {os.path.getsize(h.model_path)} bytes")
        log(f"Code size: {code_bytes} bytes")
    t0 = time.perf_counter()
    hessians = collect_hessians(h, base_model, loader, device)
    log(f"GPTQ:collected {len(hessians)} hessians from train shards in {time.perf_counter() - t0:.1f}s")
    sd_cpu = {k: v.detach().cpu() for k, v in base_model.state_dict().items()}
    quant_result, quant_meta = gptq_mixed_quantize(h, sd_cpu, hessians, device)
    torch.cuda.synchronize()
    spent = train_seconds + time.perf_counter() - t0
    log(f"GPTQ:done, train+gptq {spent:.1f}s of {h.max_wallclock_seconds:.0f}s")
    quant_buf = io.BytesIO()
    torch.save({"w": quant_result, "m": quant_meta, "looping": base_model.looping_active}, quant_buf)
    if h.is_main_process:
        quant_blob = _compress(quant_buf.getvalue())
        with open(h.quantized_model_path, "wb") as f:
            f.write(quant_blob)
        total = len(quant_blob) + code_bytes
        log(f"Serialized model quantized+brotli: {len(quant_blob)} bytes")
        log(f"Total submission size quantized+brotli: {total} bytes (limit 16000000, fits: {total <= 16_000_000})")
    if h.distributed:
        dist.barrier()
    return code_bytes


def deserialize(h: Hyperparameters, device: torch.device) -> GPT:
    eval_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(eval_model)
    with open(h.quantized_model_path, "rb") as f:
        state = torch.load(io.BytesIO(_decompress(f.read())), map_location="cpu")
    template = {k: v.cpu() for k, v in eval_model.state_dict().items()}
    eval_model.load_state_dict(dequantize_mixed(state["w"], state["m"], template), strict=True)
    eval_model.looping_active = state["looping"]
    return eval_model


# ----------------------------------------
# N-gram tilt: one hinted token per position, from the prefix alone
# ----------------------------------------


class PrefixHints:
    """For position t every expert looks up where its context last stood before t and recalls what followed there.

    A context's key covers stream[a:t] only. A recall is trusted by its own record at earlier places of the same key.
    """

    MULT = np.uint64(0x9E3779B97F4A7C15)
    INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))

    def __init__(self, h: Hyperparameters, stream: np.ndarray, word_start: np.ndarray):
        self.h = h
        self.stream = stream.astype(np.int64)
        self.word_start = word_start
        size = self.stream.size
        self.t = np.arange(size, dtype=np.int64)
        powers = np.full(size + 1, self.MULT, dtype=np.uint64)
        powers[0] = 1
        powers = np.cumprod(powers, dtype=np.uint64)
        self.prefix = np.zeros(size + 1, dtype=np.uint64)
        np.cumsum((self.stream.astype(np.uint64) + np.uint64(1)) * powers[:size], out=self.prefix[1:])
        powers[1:] = self.INVERSE
        powers[0] = 1
        self.inverse_powers = np.cumprod(powers, dtype=np.uint64)
        self.doc_begin = self._last_before(self.stream == BOS_ID)
        self.word_begin = self._last_before(word_start[self.stream])

    def _last_before(self, flags: np.ndarray) -> np.ndarray:
        """For every t the last u < t with flags[u], or 0."""
        seen = np.maximum.accumulate(np.where(flags, self.t, 0))
        return np.concatenate((np.zeros(1, dtype=np.int64), seen[:-1]))

    def keys(self, begin: np.ndarray) -> np.ndarray:
        span = (self.prefix[self.t] - self.prefix[begin]) * self.inverse_powers[begin]
        span ^= (self.t - begin).astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        return span ^ (span >> np.uint64(29))

    def recall(self, keys: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """The recalled token at every position, -1 where there is none or it is not trusted."""
        pos = np.flatnonzero(valid)
        order = pos[np.argsort(keys[pos], kind="stable")]
        sorted_keys = keys[order]
        again = np.zeros(order.size, dtype=bool)
        again[1:] = sorted_keys[1:] == sorted_keys[:-1]
        recalled = np.full(order.size, -1, dtype=np.int64)
        recalled[1:][again[1:]] = self.stream[order[:-1]][again[1:]]
        hit = (recalled == self.stream[order]).astype(np.int64)
        index = np.arange(order.size, dtype=np.int64)
        first = np.maximum.accumulate(np.where(again, 0, index))
        hits_so_far = np.cumsum(hit) - hit
        hits_before = hits_so_far - hits_so_far[first]
        tries_before = index - first - 1
        trusted = again & (tries_before >= self.h.tilt_min_tries)
        trusted &= hits_before >= self.h.tilt_min_rate * tries_before
        out = np.full(self.stream.size, -1, dtype=np.int64)
        out[order[trusted]] = recalled[trusted]
        return out

    def token_expert(self) -> np.ndarray:
        begin = np.maximum(self.t - self.h.tilt_order, 0)
        return self.recall(self.keys(begin), begin >= self.doc_begin)

    def start_expert(self) -> np.ndarray:
        begin = np.maximum(self.word_begin[self.word_begin], self.doc_begin)
        out = self.recall(self.keys(begin), self.t > 0)
        return np.where((out >= 0) & self.word_start[out], out, -1)

    def within_expert(self) -> np.ndarray:
        begin = np.maximum(self.word_begin, self.doc_begin)
        out = self.recall(self.keys(begin), self.t > 0)
        return np.where((out >= 0) & ~self.word_start[out], out, -1)


def precompute_hints(h: Hyperparameters, val_data: ValidationData, device: torch.device) -> tuple[Tensor, Tensor]:
    """(hint, beta) for every position of the stream; the experts are dealt to the ranks and broadcast."""
    t0 = time.perf_counter()
    stream = val_data.val_tokens.numpy()
    word_start = (val_data.has_leading_space_lut | val_data.is_boundary_token_lut).cpu().numpy()
    names = ("token_expert", "start_expert", "within_expert")
    betas = (h.tilt_beta_token, h.tilt_beta_start, h.tilt_beta_within)
    mine = [i for i in range(len(names)) if i % h.world_size == h.rank]
    builder = PrefixHints(h, stream, word_start) if mine else None
    hint = torch.full((stream.size,), -1, dtype=torch.int64, device=device)
    beta = torch.zeros(stream.size, dtype=torch.float32, device=device)
    for i, name in enumerate(names):
        found = torch.full((stream.size,), -1, dtype=torch.int64, device=device)
        if i in mine:
            found.copy_(torch.from_numpy(getattr(builder, name)()))
        if h.distributed:
            dist.broadcast(found, src=i % h.world_size)
        take = (hint < 0) & (found >= 0)
        hint[take] = found[take]
        beta[take] = betas[i]
        log(f"tilt:{name} hints:{int((found >= 0).sum())}")
    log(f"tilt:hints for {int((hint >= 0).sum())} of {stream.size} positions in {time.perf_counter() - t0:.1f}s")
    return hint, beta


def tilted_nll(logits: Tensor, targets: Tensor, hint: Tensor, beta: Tensor) -> Tensor:
    """-log of p * exp(beta * 1[hint]) / Z at the targets."""
    logits = logits.float()
    lse = torch.logsumexp(logits, dim=-1)
    nll = lse - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    b = torch.where(hint >= 0, beta, torch.zeros_like(beta))
    p_hint = (logits.gather(-1, hint.clamp_min(0).unsqueeze(-1)).squeeze(-1) - lse).exp()
    log_z = torch.log1p(p_hint * torch.expm1(b))
    return nll + log_z - b * (targets == hint).float()


# ----------------------------------------
# Evaluation
# ----------------------------------------


class Tally:
    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)

    def add(self, val_data: ValidationData, nll: Tensor, prev_ids: Tensor, tgt_ids: Tensor) -> None:
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += float(nll.numel())
        self.sums[2] += val_data.count_bytes(prev_ids, tgt_ids).sum()

    def reduce(self) -> tuple[float, float]:
        total = self.sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
        loss_sum, tokens, nbytes = total.tolist()
        val_loss = loss_sum / tokens
        return val_loss, val_loss / math.log(2.0) * tokens / nbytes


def eval_val(h: Hyperparameters, device: torch.device, val_data: ValidationData, model: nn.Module) -> tuple[float, float]:
    seq_len = h.eval_seq_len
    local_batch_seqs = max(1, h.val_batch_tokens // (h.world_size * h.grad_accum_steps) // seq_len)
    total_seqs = (val_data.val_tokens.numel() - 1) // seq_len
    seq_start = total_seqs * h.rank // h.world_size
    seq_end = total_seqs * (h.rank + 1) // h.world_size
    tally = Tally(device)
    model.eval()
    with torch.no_grad():
        for lo in range(seq_start, seq_end, local_batch_seqs):
            hi = min(lo + local_batch_seqs, seq_end)
            chunk = val_data.val_tokens[lo * seq_len : hi * seq_len + 1].to(device=device, dtype=torch.int64)
            x, y = chunk[:-1].reshape(-1, seq_len), chunk[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                batch_loss = model(x, y).detach()
            tally.add(val_data, batch_loss.expand(y.numel()), x.reshape(-1), y.reshape(-1))
    model.train()
    return tally.reduce()


def window_plan(total_tokens: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, length, first scored position) of every window; the scored parts tile the stream."""
    context = seq_len - stride
    plan = []
    for ws in range(0, total_tokens, stride):
        if ws + context >= total_tokens and ws > 0:
            break
        plan.append((ws, min(ws + seq_len, total_tokens) - ws, context if ws > 0 else 0))
    return plan


def score_windows(h, val_data, device, logits_fn, windows, tally, hints=None) -> None:
    """Adds the loss of every window's scored part to the tally."""
    seq_len = h.eval_seq_len
    with torch.no_grad():
        for bi in range(0, len(windows), h.eval_batch_seqs):
            batch = windows[bi : bi + h.eval_batch_seqs]
            x = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=device)
            y = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=device)
            for i, (ws, wlen, _) in enumerate(batch):
                span = val_data.val_tokens[ws : ws + wlen + 1].to(device=device, dtype=torch.int64)
                x[i, :wlen] = span[:-1]
                y[i, :wlen] = span[1:]
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            for i, (ws, wlen, s) in enumerate(batch):
                scored, tgt, prev = logits[i, s:wlen], y[i, s:wlen], x[i, s:wlen]
                if hints is None:
                    nll = F.cross_entropy(scored.float(), tgt, reduction="none")
                else:
                    at = slice(ws + s + 1, ws + wlen + 1)
                    nll = tilted_nll(scored, tgt, hints[0][at], hints[1][at])
                tally.add(val_data, nll, prev, tgt)


def eval_val_sliding(h, device, val_data, base_model, hints=None) -> tuple[float, float]:
    base_model.eval()
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    windows = window_plan(val_data.val_tokens.numel() - 1, h.eval_seq_len, h.eval_stride)
    lo, hi = len(windows) * h.rank // h.world_size, len(windows) * (h.rank + 1) // h.world_size
    tally = Tally(device)
    score_windows(h, val_data, device, logits_fn, windows[lo:hi], tally, hints)
    base_model.train()
    return tally.reduce()


def adapt_on_span(h, device, val_data, base_model, optimizer, params, begin: int, end: int) -> None:
    """SGD epochs over the sequences of [begin, end); gradients are averaged over the ranks."""
    seq_len = h.eval_seq_len
    starts = list(range(begin, end - seq_len + 1, seq_len))
    per_step = h.ttt_batch_seqs * h.world_size
    base_model.train()
    for _ in range(h.ttt_epochs):
        for lo in range(0, len(starts), per_step):
            mine = starts[lo : lo + per_step][h.rank :: h.world_size]
            optimizer.zero_grad(set_to_none=False)
            if mine:
                rows = torch.stack([val_data.val_tokens[a : a + seq_len + 1] for a in mine])
                rows = rows.to(device=device, dtype=torch.int64)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = base_model(rows[:, :-1], rows[:, 1:])
                loss.backward()
            if h.distributed:
                for p in params:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            optimizer.step()
    base_model.eval()


def eval_val_ttt(h, device, val_data, base_model, hints=None) -> tuple[float, float]:
    """Chunk by chunk: all windows of a chunk are scored, then the model is trained on that chunk."""
    total_tokens = val_data.val_tokens.numel() - 1
    windows = window_plan(total_tokens, h.eval_seq_len, h.eval_stride)
    num_chunks = (total_tokens + h.ttt_chunk_tokens - 1) // h.ttt_chunk_tokens
    chunk_windows: list[list[tuple[int, int, int]]] = [[] for _ in range(num_chunks)]
    for window in windows:
        chunk_windows[(window[0] + window[2]) // h.ttt_chunk_tokens].append(window)
    log(f"ttt:start chunks={num_chunks} ttt_lr={h.ttt_lr} ttt_epochs={h.ttt_epochs}")
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    params = list(base_model.parameters())
    optimizer = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    tally = Tally(device)
    base_model.eval()
    t0 = time.perf_counter()
    for ci, own in enumerate(chunk_windows):
        lo, hi = len(own) * h.rank // h.world_size, len(own) * (h.rank + 1) // h.world_size
        score_windows(h, val_data, device, logits_fn, own[lo:hi], tally, hints)
        if ci == num_chunks - 1:
            break
        scale = 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
        for group in optimizer.param_groups:
            group["lr"] = h.ttt_lr * scale
        begin = ci * h.ttt_chunk_tokens
        adapt_on_span(h, device, val_data, base_model, optimizer, params, begin, begin + h.ttt_chunk_tokens)
        if ci % 100 == 0:
            log(f"ttt:chunk {ci + 1}/{num_chunks} time:{time.perf_counter() - t0:.1f}s")
    return tally.reduce()


def timed_eval(label: str, fn, *args, **kwargs) -> tuple[float, float]:
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


def train_model(h: Hyperparameters, device: torch.device, val_data: ValidationData):
    base_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    if h.distributed:
        model = DDP(compiled_model, device_ids=[h.local_rank], broadcast_buffers=False)
    else:
        model = compiled_model
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    optimizers = Optimizers(h, base_model)
    train_loader = ShuffledSequenceLoader(h, device)
    max_wallclock_ms = 1000.0 * (h.max_wallclock_seconds - h.quant_reserve_seconds)
    log(f"gptq:reserving {h.quant_reserve_seconds:.0f}s, effective={max_wallclock_ms:.0f}ms")

    def training_frac(step: int, elapsed_ms: float) -> float:
        return elapsed_ms / max(max_wallclock_ms, 1e-9)

    def lr_mul(frac: float) -> float:
        if h.warmdown_frac <= 0 or frac < 1.0 - h.warmdown_frac:
            return 1.0
        return max((1.0 - frac) / h.warmdown_frac, h.min_lr)

    def step_fn(step: int, lr_scale: float) -> Tensor:
        train_loss = torch.zeros((), device=device)
        for micro_step in range(h.grad_accum_steps):
            if h.distributed:
                model.require_backward_grad_sync = micro_step == h.grad_accum_steps - 1
            x, y = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss / h.grad_accum_steps).backward()
        frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum
        for group in optimizers.optimizer_muon.param_groups:
            group["momentum"] = momentum
        optimizers.set_lr_scale(lr_scale)
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        optimizers.step()
        return train_loss / h.grad_accum_steps

    if h.warmup_steps > 0:
        initial_model = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for looping in (False, True) if h.num_loops > 0 else (False,):
            base_model.looping_active = looping
            for warmup_step in range(h.warmup_steps):
                step_fn(warmup_step, 1.0)
            log(f"warmup_steps:{h.warmup_steps} looping:{looping}")
        base_model.looping_active = False
        base_model.load_state_dict(initial_model, strict=True)
        for opt, state in zip(optimizers, initial_opts, strict=True):
            opt.load_state_dict(state)
        optimizers.zero_grad_all()
        train_loader = ShuffledSequenceLoader(h, device)

    ema_state = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (h.val_loss_every > 0 and step % h.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, model)
            log(f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after_step is not None and step < h.iterations:
                log(f"stopping_early: wallclock_cap train_time: {training_time_ms:.0f}ms step: {step}/{h.iterations}")
            break
        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = training_frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{base_model.looped_order}")
        train_loss = step_fn(step, lr_mul(frac))
        with torch.no_grad():
            for name, t in base_model.state_dict().items():
                ema_state[name].mul_(h.ema_decay).add_(t.detach().float(), alpha=1.0 - h.ema_decay)
        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if h.train_log_every > 0 and (step <= 5 or step % h.train_log_every == 0):
            tok_per_sec = step * h.train_batch_tokens / (approx_ms / 1000.0)
            log(f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} tok/s: {tok_per_sec:.0f}")
        reached_cap = approx_ms >= max_wallclock_ms
        if h.distributed:
            cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    log("ema:applying EMA weights")
    current_state = base_model.state_dict()
    base_model.load_state_dict({name: t.to(current_state[name].dtype) for name, t in ema_state.items()}, strict=True)
    return base_model, compiled_model, train_loader, training_time_ms / 1000.0


def train_and_eval(h: Hyperparameters, device: torch.device) -> None:
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    val_data = ValidationData(h, device)
    log(f"train_shards: {len(list(Path(h.datasets_dir).resolve().glob('fineweb_train_*.bin')))}")
    log(f"val_tokens: {val_data.val_tokens.numel() - 1}")

    base_model, compiled_model, train_loader, train_seconds = train_model(h, device, val_data)
    serialize(h, base_model, train_loader, device, train_seconds)
    torch._dynamo.reset()
    timed_eval("pre-quantization post-ema", eval_val, h, device, val_data, base_model)
    del compiled_model, train_loader, base_model
    torch.cuda.empty_cache()

    torch.cuda.synchronize()
    eval_start = time.perf_counter()
    eval_model = deserialize(h, device)
    final = timed_eval("quantized", eval_val, h, device, val_data, eval_model)
    if h.sliding_window_enabled:
        final = timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val_data, eval_model)
    if h.ttt_enabled:
        hints = precompute_hints(h, val_data, device) if h.tilt_enabled else None
        torch._dynamo.reset()
        final = timed_eval("quantized_ttt", eval_val_ttt, h, device, val_data, eval_model, hints)
    torch.cuda.synchronize()
    log(f"evaluation took {time.perf_counter() - eval_start:.1f}s of {h.max_eval_seconds:.0f}s")
    log(f"final val_loss:{final[0]:.8f} val_bpb:{final[1]:.8f}")


def main() -> None:
    h = Hyperparameters()
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if h.world_size <= 0 or 8 % h.world_size != 0:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8 so grad_accum_steps stays integral")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device, timeout=datetime.timedelta(minutes=20))
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    if h.is_main_process:
        os.makedirs("logs", exist_ok=True)
    set_logging_hparams(h)
    log("Hyperparameters:")
    for name in sorted(dir(type(h))):
        if not name.startswith("_"):
            log(f"  {name}: {getattr(h, name)}")
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
