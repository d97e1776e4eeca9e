"""
SP8192 + 3-layer depth recurrence + parallel residuals + QK-gain + MuonEq-R + EMA + GPTQ(SDClip) + chunked TTT.

One file, everything counted.  Run with

    SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py

Stages: train (<= 587 s) -> EMA -> Hessians on train batches (inside the same 600 s) -> GPTQ int6/int8 ->
byte-shuffle + brotli -> read the artifact back -> plain eval, sliding eval, score-first TTT eval.
"""
import collections
import copy
import glob
import io
import lzma
import math
import os
import random
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
    from flash_attn_interface import flash_attn_func as flash_attn_3_func

    HAS_FA3 = True
except ImportError:
    flash_attn_3_func = None
    HAS_FA3 = False


# ----------------------------------------
# Hyperparameters
# ----------------------------------------


class Hyperparameters:
    # where things are
    data_dir = os.environ.get("DATA_DIR", "./data/")
    seed = int(os.environ.get("SEED", 1337))
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    bos_id = int(os.environ.get("BOS_ID", 1))

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))

    # validation
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 2048 * 32 * 8))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))

    # model
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    skip_gates_enabled = bool(int(os.environ.get("SKIP_GATES_ENABLED", "1")))
    smear_enabled = bool(int(os.environ.get("SMEAR_ENABLED", "1")))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.25))

    # depth recurrence
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))
    parallel_residual_start = int(os.environ.get("PARALLEL_RESIDUAL_START", 7))

    # optimiser
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
    embed_init_std = float(os.environ.get("EMBED_INIT_STD", 0.005))
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

    # quantisation & compression
    compressor = os.environ.get("COMPRESSOR", "brotli")
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 13.0))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))

    # test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size

    # outputs
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    quantized_model_path = "final_model.int6.ptz"
    size_limit = 16_000_000


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
        print(msg)
    if _logger_hparams.logfile is not None:
        with open(_logger_hparams.logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)


# ----------------------------------------
# Data
# ----------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype("<i4").itemsize

_SHARD_NTOKENS_CACHE = {}
_MMAP_CACHE = {}


def load_data_shard(file):
    """One .bin shard as a uint16 tensor."""
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = SHARD_HEADER_BYTES + num_tokens * np.dtype("<u2").itemsize
    if Path(file).stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=SHARD_HEADER_BYTES)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def _read_num_tokens(file):
    key = str(file)
    cached = _SHARD_NTOKENS_CACHE.get(key)
    if cached is not None:
        return cached
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {file}")
    n = int(header[2])
    _SHARD_NTOKENS_CACHE[key] = n
    return n


def _get_shard_memmap(file):
    key = str(file)
    mm = _MMAP_CACHE.get(key)
    if mm is None:
        n = _read_num_tokens(file)
        mm = np.memmap(file, mode="r", dtype="<u2", offset=SHARD_HEADER_BYTES, shape=(n,))
        _MMAP_CACHE[key] = mm
    return mm


class ShuffledSequenceLoader:
    """Every rank owns a slice of the shards and walks through each one in a random order of sequences."""

    def __init__(self, h, device):
        self.world_size = h.world_size
        self.seq_len = h.train_seq_len
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"No files found for pattern: {h.train_files}")
        self.files = all_files[h.rank :: h.world_size]
        self.rng = np.random.Generator(np.random.PCG64(h.seed * 1000 + h.rank))
        self.num_tokens = [_read_num_tokens(f) for f in self.files]
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
            probs = remaining / total
            si = int(self.rng.choice(len(self.files), p=probs))
            start_ind = self.start_inds[si].pop()
            remaining[si] -= 1
            mm = _get_shard_memmap(self.files[si])
            window = torch.as_tensor(np.array(mm[start_ind : start_ind + self.seq_len + 1], dtype=np.int64))
            x[bi] = window[:-1]
            y[bi] = window[1:]
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# ----------------------------------------
# Validation data and byte tables
# ----------------------------------------


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


def build_sentencepiece_luts(sp, vocab_size, device):
    """Bytes of every piece without its leading space, whether it has one, and whether nothing is printed for it."""
    sp_vocab_size = int(sp.vocab_size())
    assert sp.piece_to_id("\u2581") != sp.unk_id(), "tokenizer must have the bare-space piece"
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
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {int(self.sp.vocab_size())} pieces")
        self.val_tokens = load_validation_tokens(h.val_files)
        tables = build_sentencepiece_luts(self.sp, h.vocab_size, device)
        self.base_bytes_lut, self.has_leading_space_lut, self.is_boundary_token_lut = tables

    @property
    def num_targets(self):
        return self.val_tokens.numel() - 1

    def target_bytes(self, prev_ids, tgt_ids):
        """UTF-8 bytes that each target adds to the text, given the token before it."""
        nbytes = self.base_bytes_lut[tgt_ids].to(torch.float64)
        space = self.has_leading_space_lut[tgt_ids] & ~self.is_boundary_token_lut[prev_ids]
        return nbytes + space.to(torch.float64)

    def slice_xy(self, start, length, device):
        local = self.val_tokens[start : start + length + 1].to(device=device, dtype=torch.int64)
        return local[:-1], local[1:]


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
    """fp32 weight, cast to the activation's dtype on use."""

    def forward(self, x):
        w = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


class Rotary(nn.Module):
    def __init__(self, rope_dims, max_len, base=10000.0):
        super().__init__()
        inv_freq = 1.0 / base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims)
        t = torch.arange(max_len, dtype=torch.float32)
        freqs = torch.outer(t, inv_freq)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, seq_len, dtype):
        return self.cos[:, :seq_len].to(dtype), self.sin[:, :seq_len].to(dtype)


def apply_rotary_emb(x, cos, sin, rope_dims):
    """Partial RoPE: only the first rope_dims of each head turn."""
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    x_rope = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((x_rope, x_pass), dim=-1)


def causal_attention(q, k, v):
    """q: (B, T, H, D); k, v: (B, T, Hkv, D)."""
    if HAS_FA3:
        return flash_attn_3_func(q, k, v, causal=True)
    groups = q.size(2) // k.size(2)
    k = k.repeat_interleave(groups, dim=2)
    v = v.repeat_interleave(groups, dim=2)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return y.transpose(1, 2).contiguous()


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, qk_gain_init, rope_dims):
        super().__init__()
        if dim % num_heads != 0 or num_heads % num_kv_heads != 0:
            raise ValueError("model_dim, num_heads and num_kv_heads do not fit")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = rope_dims
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.use_xsa = False

    def _xsa_efficient(self, y, v):
        """Takes each token's own value direction out of what its heads read."""
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        y_g = y.reshape(B, T, Hkv, H // Hkv, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        proj = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - proj).reshape(B, T, H, D)

    def forward(self, x, cos, sin):
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = causal_attention(q, k, v)
        if self.use_xsa:
            y = self._xsa_efficient(y, v)
        return self.proj(y.reshape(bsz, seqlen, dim))


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
        self.attn = CausalSelfAttention(dim, h.num_heads, h.num_kv_heads, h.qk_gain_init, h.rope_dims)
        self.mlp = MLP(dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = h.parallel_residual_start >= 0 and layer_idx >= h.parallel_residual_start

    def forward(self, x, x0, cos, sin):
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor, cos, sin)
        attn_scale = self.attn_scale.to(dtype=x_in.dtype)[None, None, :]
        mlp_scale = self.mlp_scale.to(dtype=x_in.dtype)[None, None, :]
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
            return x_in + attn_scale * attn_out + mlp_scale * mlp_out
        x_out = x_in + attn_scale * attn_out
        return x_out + mlp_scale * self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)


class SmearGate(nn.Module):
    """Mixes a bit of the previous token's embedding into each one; a document's first token takes nothing."""

    def __init__(self, dim, bos_id):
        super().__init__()
        self.bos_id = bos_id
        self.smear_gate = nn.Parameter(torch.full((dim,), -2.0, dtype=torch.float32))

    def forward(self, x, input_ids):
        g = torch.sigmoid(self.smear_gate).to(dtype=x.dtype)[None, None, :]
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        keep = (input_ids != self.bos_id).to(dtype=x.dtype).unsqueeze(-1)
        return x + g * keep * (prev - x)


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        if h.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {h.logit_softcap}")
        self.logit_softcap = h.logit_softcap
        self.embed_init_std = h.embed_init_std
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.model_dim, h.bos_id) if h.smear_enabled else None
        self.rotary = Rotary(h.rope_dims, max(h.train_seq_len, h.eval_seq_len), h.rope_base)
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        if h.xsa_last_n > 0:
            for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
                self.blocks[i].attn.use_xsa = True

        # which block is run when: once plain, once with the recurrent segment unrolled
        self.looping_active = False
        plain = list(range(h.num_layers))
        self.plain_order = (plain[: h.num_layers // 2], plain[h.num_layers // 2 :])
        if h.num_loops > 0:
            segment = list(range(h.loop_start, h.loop_end + 1))
            unrolled = list(range(h.loop_start))
            for _ in range(h.num_loops + 1):
                unrolled.extend(segment)
            unrolled.extend(range(h.loop_end + 1, h.num_layers))
        else:
            unrolled = plain
        num_enc = len(unrolled) // 2
        self.loop_order = (unrolled[:num_enc], unrolled[num_enc:])
        self.num_skip_weights = min(len(self.loop_order[0]), len(self.loop_order[1]))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, h.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(self.num_skip_weights, h.model_dim, dtype=torch.float32))
            if h.skip_gates_enabled
            else None
        )
        self._init_weights()

    def _init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def forward_hidden(self, input_ids):
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        if self.smear is not None:
            x = self.smear(x, input_ids)
        x0 = x
        cos, sin = self.rotary(input_ids.size(1), x.dtype)
        enc_order, dec_order = self.loop_order if self.looping_active else self.plain_order
        skips = []
        for i in enc_order:
            x = self.blocks[i](x, x0, cos, sin)
            skips.append(x)
        for skip_idx, i in enumerate(dec_order):
            if skip_idx < self.num_skip_weights and skips:
                scaled_skip = self.skip_weights[skip_idx].to(dtype=x.dtype)[None, None, :] * skips.pop()
                if self.skip_gates is not None:
                    g = torch.sigmoid(self.skip_gates[skip_idx].to(dtype=x.dtype))[None, None, :]
                    x = torch.lerp(scaled_skip, x, g)
                else:
                    x = x + scaled_skip
            x = self.blocks[i](x, x0, cos, sin)
        return self.final_norm(x)

    def project_logits(self, hidden):
        logits = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids):
        return self.project_logits(self.forward_hidden(input_ids))

    def forward(self, input_ids, target_ids):
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


# ----------------------------------------
# Optimisers
# ----------------------------------------

CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "skip_gates",
    "smear_gate",
)


@torch.compile
def zeropower_via_newtonschulz5(G, steps=5, eps=1e-7):
    a, b, c = 3.4445, -4.775, 2.0315
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
    """Muon with rows brought to unit norm before the Newton-Schulz steps (MuonEq-R); work is split over the ranks."""

    def __init__(self, params, lr, momentum, backend_steps, nesterov=True, weight_decay=0.0, row_normalize=True):
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
            lr = group["lr"]
            momentum = group["momentum"]
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
                    update = g.add(buf, alpha=momentum) if group["nesterov"] else buf.clone()
                    if group["row_normalize"]:
                        row_norms = update.float().norm(dim=-1, keepdim=True).clamp_min(1e-7)
                        update = update / row_norms.to(update.dtype)
                    update = zeropower_via_newtonschulz5(update, steps=group["backend_steps"])
                    update = update * max(1, update.size(0) / update.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = update.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                if group["weight_decay"] > 0.0:
                    p.data.mul_(1.0 - lr * group["weight_decay"])
                update = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                p.add_(update, alpha=-lr)
                curr += p.numel()
        return loss


def is_control_tensor(name):
    return any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)


class Optimizers:
    def __init__(self, h, base_model):
        named = list(base_model.named_parameters())
        matrix_params = [p for n, p in named if n.startswith("blocks.") and p.ndim == 2 and not is_control_tensor(n)]
        scalar_params = [p for n, p in named if n != "tok_emb.weight" and (p.ndim < 2 or is_control_tensor(n))]
        assert len(matrix_params) + len(scalar_params) + 1 == len(named)
        betas = (h.beta1, h.beta2)
        self.optimizer_tok = torch.optim.AdamW(
            [{"params": [base_model.tok_emb.weight], "lr": h.embed_lr, "base_lr": h.embed_lr}],
            betas=betas,
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
            betas=betas,
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

    def set_lr_scale(self, scale):
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self):
        for opt in self.optimizers:
            opt.step()
        self.zero_grad_all()


def restore_fp32_params(model):
    """Weights of linear layers and small control tensors stay in fp32 under a bf16 model."""
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        if (param.ndim < 2 or is_control_tensor(name)) and param.dtype != torch.float32:
            param.data = param.data.float()


class WeightEMA:
    def __init__(self, model, decay):
        self.decay = decay
        self.state = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for name, t in model.state_dict().items():
            self.state[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def copy_to(self, model):
        current = model.state_dict()
        averaged = {name: t.to(dtype=current[name].dtype) for name, t in self.state.items()}
        model.load_state_dict(averaged, strict=True)


# ----------------------------------------
# GPTQ
# ----------------------------------------


def collect_hessians(model, train_loader, h, device, n_calibration_batches=64, deadline=None):
    """X^T X of the input of every linear layer, and of the head, over batches of the training set."""
    hessians = {}
    hooks = []

    def accumulate(name, x):
        x = x.detach().float()
        if x.ndim == 3:
            x = x.reshape(-1, x.shape[-1])
        if name not in hessians:
            hessians[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=device)
        hessians[name].addmm_(x.T, x)

    def input_hook(name):
        def hook_fn(module, inp, out):
            accumulate(name, inp[0])

        return hook_fn

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
            hooks.append(module.register_forward_hook(input_hook(name + ".weight")))
    # the head is tied to the embedding, so the embedding's Hessian is that of the final hidden states
    hooks.append(model.final_norm.register_forward_hook(lambda module, inp, out: accumulate("tok_emb.weight", out)))

    model.eval()
    done = 0
    with torch.no_grad():
        for _ in range(n_calibration_batches):
            if deadline is not None and done > 0 and time.perf_counter() > deadline:
                break
            x, _ = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.forward_logits(x)
            torch.cuda.synchronize()
            done += 1
    for hook in hooks:
        hook.remove()
    count = torch.tensor(float(done), device=device)
    if h.distributed:
        dist.all_reduce(count, op=dist.ReduceOp.SUM)
        for name in sorted(hessians):
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
    for name in hessians:
        hessians[name] = hessians[name].cpu() / count.item()
    return hessians


def gptq_quantize_weight(w, H, clip_sigmas=3.0, clip_range=63, block_size=128):
    """GPTQ with act-order; the scale of a row is its standard deviation times clip_sigmas (SDClip)."""
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.to(W_orig.device).float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    damp = 0.01 * H.diag().mean()
    H.diagonal().add_(damp)
    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_perm = W_orig[:, perm].clone()
    W_perm[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)
    row_std = W_orig.std(dim=1)
    s = (clip_sigmas * row_std / clip_range).clamp_min(1e-10).to(torch.float16)
    sf = s.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W_orig.device)
    W_work = W_perm.clone()
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


def gptq_mixed_quantize(state_dict, hessians, h, device):
    result = {}
    meta = {}
    for name, tensor in state_dict.items():
        t = tensor.detach().cpu().contiguous()
        if not t.is_floating_point() or t.numel() <= 65536:
            result[name] = t.to(torch.float16) if t.is_floating_point() else t
            meta[name] = "passthrough (float16)"
            continue
        is_emb = "tok_emb" in name
        cs = h.embed_clip_sigmas if is_emb else h.matrix_clip_sigmas
        bits = h.embed_bits if is_emb else h.matrix_bits
        q, s = gptq_quantize_weight(t.to(device), hessians[name], clip_sigmas=cs, clip_range=2 ** (bits - 1) - 1)
        result[name + ".q"] = q.cpu()
        result[name + ".scale"] = s.cpu()
        meta[name] = f"gptq (int{bits})"
    categories = collections.defaultdict(list)
    for name, cat in meta.items():
        categories[cat].append(name)
    log("Quantized weights:")
    for cat in sorted(categories):
        log(f"  {cat}: {len(categories[cat])} tensors")
    return result, meta


def dequantize_mixed(result, meta, template_sd):
    out = {}
    for name, orig in template_sd.items():
        info = meta.get(name)
        if info is None:
            raise KeyError(f"{name} is not in the artifact")
        if "passthrough" in info:
            t = result[name]
            if t.dtype == torch.float16 and orig.dtype in (torch.float32, torch.bfloat16):
                t = t.to(orig.dtype)
            out[name] = t
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        out[name] = (q.float() * s.float().view(q.shape[0], *[1] * (q.ndim - 1))).to(orig.dtype)
    return out


# ----------------------------------------
# Compression
# ----------------------------------------

_BSHF_MAGIC = b"BSHF"


def byte_shuffle(data, stride=2):
    """All first bytes of each pair, then all second ones: halves of fp16 scales compress better apart."""
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


def byte_unshuffle(data):
    if len(data) < 5 or data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    n = len(payload)
    out = np.empty(n, dtype=np.uint8)
    src_off = 0
    for pos in range(stride):
        chunk_len = n // stride + (1 if pos < n % stride else 0)
        out[pos::stride][:chunk_len] = payload[src_off : src_off + chunk_len]
        src_off += chunk_len
    return out.tobytes()


def compress_blob(data, compressor):
    data = byte_shuffle(data)
    if compressor == "lzma":
        return lzma.compress(data, preset=6)
    if compressor == "brotli":
        import brotli

        return brotli.compress(data, quality=11)
    raise ValueError(f"Unknown compressor: {compressor!r}")


def decompress_blob(data, compressor):
    if compressor == "lzma":
        raw = lzma.decompress(data)
    elif compressor == "brotli":
        import brotli

        raw = brotli.decompress(data)
    else:
        raise ValueError(f"Unknown compressor: {compressor!r}")
    return byte_unshuffle(raw)


def serialize(h, base_model, hessians, device):
    """Quantises, compresses and writes the artifact; returns (bytes of the artifact, bytes of code)."""
    code = Path(__file__).read_text(encoding="utf-8")
    code_bytes = len(code.encode("utf-8"))
    sd_cpu = {k: v.detach().cpu() for k, v in base_model.state_dict().items()}
    if h.is_main_process:
        torch.save(sd_cpu, h.model_path)
        log(f"Serialized model: {os.path.getsize(h.model_path)} bytes")
        log(f"Code size: {code_bytes} bytes")
    quant_result, quant_meta = gptq_mixed_quantize(sd_cpu, hessians, h, device)
    quant_buf = io.BytesIO()
    torch.save({"w": quant_result, "m": quant_meta}, quant_buf)
    quant_blob = compress_blob(quant_buf.getvalue(), h.compressor)
    if h.is_main_process:
        with open(h.quantized_model_path, "wb") as f:
            f.write(quant_blob)
        total = len(quant_blob) + code_bytes
        log(f"Serialized model quantized+{h.compressor}: {len(quant_blob)} bytes")
        log(f"Total submission size quantized+{h.compressor}: {total} bytes (limit {h.size_limit})")
        if total > h.size_limit:
            log("WARNING: over the size limit")
    if h.distributed:
        dist.barrier()
    return len(quant_blob), code_bytes


def build_model(h, device):
    model = GPT(h).to(device).bfloat16()
    restore_fp32_params(model)
    return model


def deserialize(h, device):
    """A fresh model filled from the artifact on disk and nothing else."""
    model = build_model(h, device)
    with open(h.quantized_model_path, "rb") as f:
        blob = f.read()
    quant_state = torch.load(io.BytesIO(decompress_blob(blob, h.compressor)), map_location="cpu")
    sd_cpu = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    model.load_state_dict(dequantize_mixed(quant_state["w"], quant_state["m"], sd_cpu), strict=True)
    if h.num_loops > 0:
        model.looping_active = True
    return model


# ----------------------------------------
# Evaluation
# ----------------------------------------


class ScoreSums:
    """Running sums of loss, targets and bytes on one rank, put together over the ranks at the end."""

    def __init__(self, device):
        self.loss = torch.zeros((), device=device, dtype=torch.float64)
        self.tokens = torch.zeros((), device=device, dtype=torch.float64)
        self.bytes = torch.zeros((), device=device, dtype=torch.float64)

    def add(self, nll, prev_ids, tgt_ids, val_data):
        self.loss += nll.to(torch.float64).sum()
        self.tokens += float(nll.numel())
        self.bytes += val_data.target_bytes(prev_ids, tgt_ids).sum()

    def reduce(self):
        if dist.is_available() and dist.is_initialized():
            for t in (self.loss, self.tokens, self.bytes):
                dist.all_reduce(t, op=dist.ReduceOp.SUM)

    def result(self):
        val_loss = (self.loss / self.tokens).item()
        val_bpb = (self.loss / math.log(2.0) / self.bytes).item()
        return val_loss, val_bpb


def eval_val(h, device, val_data, model):
    """Loss over rows of eval_seq_len tokens side by side; the last row may be shorter."""
    seq_len = h.eval_seq_len
    total = val_data.num_targets
    num_rows = (total + seq_len - 1) // seq_len
    row_lo = num_rows * h.rank // h.world_size
    row_hi = num_rows * (h.rank + 1) // h.world_size
    rows_per_batch = max(1, h.val_batch_tokens // (h.world_size * h.grad_accum_steps * seq_len))
    full_hi = min(row_hi, total // seq_len)
    sums = ScoreSums(device)
    logits_fn = getattr(model, "compiled_logits", model.forward_logits)
    model.eval()
    with torch.no_grad():
        spans = [(r, min(r + rows_per_batch, full_hi)) for r in range(row_lo, full_hi, rows_per_batch)]
        jobs = [(lo * seq_len, (hi - lo) * seq_len, hi - lo) for lo, hi in spans]
        if row_hi == num_rows and row_hi > row_lo and total % seq_len:
            jobs.append(((num_rows - 1) * seq_len, total % seq_len, 1))
        for start, length, rows in jobs:
            x, y = val_data.slice_xy(start, length, device)
            x, y = x.reshape(rows, -1), y.reshape(rows, -1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction="none")
            sums.add(nll, x.reshape(-1), y.reshape(-1), val_data)
    model.train()
    sums.reduce()
    return sums.result()


def plan_windows(total, seq_len, stride):
    """(start, length, first scored position) of each window, so that every target falls to exactly one.

    The first window scores all it has, each later one only its last `stride` positions.
    """
    context = seq_len - stride
    plan = []
    for ws in range(0, total, stride):
        if ws > 0 and ws + context >= total:
            break
        wlen = min(seq_len, total - ws)
        plan.append((ws, wlen, 0 if ws == 0 else context))
    return plan


def load_windows(windows, val_data, seq_len, device):
    """Rows of inputs and targets, padded on the right with zeros."""
    x_batch = torch.zeros(len(windows), seq_len, dtype=torch.int64, device=device)
    y_batch = torch.zeros(len(windows), seq_len, dtype=torch.int64, device=device)
    for i, (ws, wlen, _) in enumerate(windows):
        x, y = val_data.slice_xy(ws, wlen, device)
        x_batch[i, :wlen] = x
        y_batch[i, :wlen] = y
    return x_batch, y_batch


def window_nll(logits, y_batch):
    flat = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none")
    return flat.reshape(y_batch.shape)


def score_windows(h, windows, val_data, logits_fn, device, sums):
    """Scores a list of windows in batches and adds what they are there for to the sums."""
    for bi in range(0, len(windows), h.eval_batch_seqs):
        batch = windows[bi : bi + h.eval_batch_seqs]
        x_batch, y_batch = load_windows(batch, val_data, h.eval_seq_len, device)
        with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x_batch)
        nll = window_nll(logits, y_batch)
        for i, (ws, wlen, s) in enumerate(batch):
            sums.add(nll[i, s:wlen], x_batch[i, s:wlen], y_batch[i, s:wlen], val_data)


def rank_share(items, h):
    lo = len(items) * h.rank // h.world_size
    hi = len(items) * (h.rank + 1) // h.world_size
    return items[lo:hi]


def eval_val_sliding(h, device, val_data, base_model):
    """Sliding windows with the fixed model."""
    base_model.eval()
    logits_fn = getattr(base_model, "compiled_logits", base_model.forward_logits)
    total = val_data.num_targets
    windows = plan_windows(total, h.eval_seq_len, h.eval_stride)
    mine = rank_share(windows, h)
    sums = ScoreSums(device)
    report_every = 200 * h.eval_batch_seqs
    for lo in range(0, len(mine), report_every):
        score_windows(h, mine[lo : lo + report_every], val_data, logits_fn, device, sums)
        if h.is_main_process and sums.tokens.item() > 0:
            log(f"  sliding {100 * min(1.0, (lo + report_every) / len(mine)):.1f}% running_loss:{sums.result()[0]:.5f}")
    sums.reduce()
    log(f"sliding: scored_tokens:{int(sums.tokens.item())} of {total} bytes:{int(sums.bytes.item())}")
    base_model.train()
    return sums.result()


class ChunkTrainer:
    """SGD on the whole model over a chunk of tokens; gradients are averaged over the ranks."""

    def __init__(self, h, model, num_chunks):
        self.h = h
        self.model = model
        self.num_chunks = num_chunks
        self.params = [p for p in model.parameters()]
        for p in self.params:
            p.requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.params, lr=h.ttt_lr, momentum=h.ttt_momentum)
        self.loss_fn = getattr(model, "compiled_loss", model)

    def set_lr(self, chunk_index):
        frac = chunk_index / max(self.num_chunks - 1, 1)
        lr = self.h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * frac))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def average_grads(self):
        if self.h.world_size == 1:
            return
        for p in self.params:
            if p.grad is not None:
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)

    def train_on(self, val_data, chunk_start, chunk_end, device, epochs):
        """Every rank takes the same number of rows, or the all-reduce would hang."""
        seq_len = self.h.eval_seq_len
        rows = (chunk_end - chunk_start) // seq_len
        per_rank = rows // self.h.world_size
        if per_rank == 0:
            return
        row_lo = per_rank * self.h.rank
        self.model.train()
        for _ in range(epochs):
            for r in range(row_lo, row_lo + per_rank, self.h.eval_batch_seqs):
                n = min(self.h.eval_batch_seqs, row_lo + per_rank - r)
                x, y = val_data.slice_xy(chunk_start + r * seq_len, n * seq_len, device)
                self.optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = self.loss_fn(x.reshape(n, seq_len), y.reshape(n, seq_len))
                loss.backward()
                self.average_grads()
                torch.nn.utils.clip_grad_norm_(self.params, self.h.ttt_grad_clip)
                self.optimizer.step()
        self.model.eval()


def windows_by_chunk(windows, chunk_tokens, total):
    """Windows grouped by the chunk that holds their first scored position."""
    num_chunks = (total + chunk_tokens - 1) // chunk_tokens
    chunks = [[] for _ in range(num_chunks)]
    for w in windows:
        ws, _, s = w
        chunks[min((ws + s) // chunk_tokens, num_chunks - 1)].append(w)
    return chunks


def eval_val_ttt(h, device, val_data, base_model):
    """Score-first test-time training.

    All targets of a chunk are scored with the weights that the chunks before it left behind; then the model
    is trained on that chunk.  Chunks are whole multiples of the stride, so no window's scored part crosses
    into the next one.
    """
    assert h.ttt_chunk_tokens % h.eval_stride == 0 and h.ttt_chunk_tokens >= h.eval_seq_len
    total = val_data.num_targets
    windows = plan_windows(total, h.eval_seq_len, h.eval_stride)
    chunks = windows_by_chunk(windows, h.ttt_chunk_tokens, total)
    num_chunks = len(chunks)
    logits_fn = getattr(base_model, "compiled_logits", base_model.forward_logits)
    trainer = ChunkTrainer(h, base_model, num_chunks)
    sums = ScoreSums(device)
    log(f"ttt: chunks:{num_chunks} chunk_tokens:{h.ttt_chunk_tokens} lr:{h.ttt_lr} epochs:{h.ttt_epochs}")
    t0 = time.perf_counter()
    base_model.eval()
    for ci in range(num_chunks):
        chunk_start = ci * h.ttt_chunk_tokens
        chunk_end = min(chunk_start + h.ttt_chunk_tokens, total)
        mine = rank_share(chunks[ci], h)

        # score the chunk
        score_windows(h, mine, val_data, logits_fn, device, sums)

        # then learn from it, unless nothing comes after
        if ci < num_chunks - 1 and h.ttt_epochs > 0:
            trainer.set_lr(ci)
            trainer.train_on(val_data, chunk_start, chunk_end, device, h.ttt_epochs)

        if h.is_main_process and (ci % 100 == 0 or ci == num_chunks - 1):
            loss, bpb = sums.result()
            log(f"  ttt chunk {ci + 1}/{num_chunks} rank0_bpb:{bpb:.6f} time:{time.perf_counter() - t0:.1f}s")
    sums.reduce()
    log(f"ttt: scored_tokens:{int(sums.tokens.item())} of {total} bytes:{int(sums.bytes.item())}")
    return sums.result()


def timed_eval(label, fn, *args):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms")
    return val_loss, val_bpb


# ----------------------------------------
# Training
# ----------------------------------------


def lr_multiplier(h, frac):
    """Flat, then down in a line to min_lr over the last warmdown_frac of the run."""
    if h.warmdown_frac <= 0:
        return 1.0
    if frac >= 1.0 - h.warmdown_frac:
        return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
    return 1.0


def compile_warmup(h, base_model, model, optimizers, device):
    """A few steps to compile both graphs; weights, optimiser states and loader are put back afterwards."""
    if h.warmup_steps <= 0:
        return
    loader = ShuffledSequenceLoader(h, device)
    initial_model = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
    initial_opt = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    model.train()
    for looping in (False, True) if h.num_loops > 0 else (False,):
        base_model.looping_active = looping
        for step in range(h.warmup_steps):
            for micro in range(h.grad_accum_steps):
                if h.distributed:
                    model.require_backward_grad_sync = micro == h.grad_accum_steps - 1
                x, y = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x, y)
                (loss / h.grad_accum_steps).backward()
            optimizers.step()
        log(f"warmup_step: {h.warmup_steps}/{h.warmup_steps} looping:{int(looping)}")
    base_model.looping_active = False
    base_model.load_state_dict(initial_model, strict=True)
    for opt, state in zip(optimizers, initial_opt, strict=True):
        opt.load_state_dict(state)
    optimizers.zero_grad_all()
    if h.distributed:
        model.require_backward_grad_sync = True


def train_model(h, device, val_data):
    """Trains, averages and collects the Hessians, all within max_wallclock_seconds.

    Returns the averaged model and the Hessians.
    """
    base_model = build_model(h, device)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    if h.distributed:
        model = DDP(compiled_model, device_ids=[h.local_rank], broadcast_buffers=False)
    else:
        model = compiled_model
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    optimizers = Optimizers(h, base_model)
    compile_warmup(h, base_model, model, optimizers, device)

    train_loader = ShuffledSequenceLoader(h, device)
    ema = WeightEMA(base_model, h.ema_decay)
    max_wallclock_ms = 1000.0 * h.max_wallclock_seconds if h.max_wallclock_seconds > 0 else None
    if max_wallclock_ms is not None:
        train_cap_ms = max_wallclock_ms - 1000.0 * h.gptq_reserve_seconds
        log(f"gptq: reserving {h.gptq_reserve_seconds:.0f}s, training stops at {train_cap_ms:.0f}ms")
    else:
        train_cap_ms = None

    def training_frac(step, elapsed_ms):
        if train_cap_ms is None:
            return step / max(h.iterations, 1)
        return elapsed_ms / max(train_cap_ms, 1e-9)

    def step_fn(step, lr_scale):
        train_loss = torch.zeros((), device=device)
        for micro in range(h.grad_accum_steps):
            if h.distributed:
                model.require_backward_grad_sync = micro == h.grad_accum_steps - 1
            x, y = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss / h.grad_accum_steps).backward()
        train_loss /= h.grad_accum_steps

        warm = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1.0 - warm) * h.muon_momentum_warmup_start + warm * h.muon_momentum
        for group in optimizers.optimizer_muon.param_groups:
            group["momentum"] = momentum
        optimizers.set_lr_scale(lr_scale)
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        optimizers.step()
        return train_loss

    training_time_ms = 0.0
    stop_after_step = None
    model.train()
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        if not last_step and h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0:
            # a look at the validation loss; the clock stands meanwhile
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, base_model)
            log(f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after_step is not None and step < h.iterations:
                log(f"stopping_early: wallclock_cap step: {step}/{h.iterations}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = training_frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{base_model.loop_order}")
        train_loss = step_fn(step, lr_multiplier(h, frac))
        ema.update(base_model)
        step += 1

        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if h.train_log_every > 0 and (step <= 5 or step % h.train_log_every == 0):
            tok_per_sec = step * h.train_batch_tokens / (approx_ms / 1000.0)
            log(
                f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} "
                f"train_time: {approx_ms / 60000:.1f}m tok/s: {tok_per_sec:.0f}"
            )
        reached_cap = train_cap_ms is not None and approx_ms >= train_cap_ms
        if h.distributed and train_cap_ms is not None:
            flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    peak = torch.cuda.max_memory_allocated() // 1024 // 1024
    log(f"train_time: {training_time_ms:.0f}ms step_avg: {training_time_ms / max(step, 1):.2f}ms peak: {peak} MiB")

    # average and calibrate; this belongs to the training time
    t1 = time.perf_counter()
    ema.copy_to(base_model)
    if h.num_loops > 0:
        base_model.looping_active = True
    deadline = None
    if max_wallclock_ms is not None:
        deadline = t1 + (max_wallclock_ms - training_time_ms) / 1000.0 - 2.0
    hessians = collect_hessians(base_model, train_loader, h, device, h.gptq_calibration_batches, deadline)
    torch.cuda.synchronize()
    calibration_ms = 1000.0 * (time.perf_counter() - t1)
    log(f"gptq: ema+calibration {calibration_ms:.0f}ms, train+calibration {training_time_ms + calibration_ms:.0f}ms")
    return base_model, hessians


def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)

    val_data = ValidationData(h, device)
    num_train = len(glob.glob(h.train_files))
    log(f"train_shards: {num_train} val_tokens: {val_data.num_targets}")

    base_model, hessians = train_model(h, device, val_data)
    timed_eval("pre-quantization post-ema", eval_val, h, device, val_data, base_model)
    serialize(h, base_model, hessians, device)
    del base_model, hessians
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    if h.distributed:
        dist.barrier()

    # from here on only the artifact counts
    eval_t0 = time.perf_counter()
    eval_model = deserialize(h, device)
    eval_model.compiled_logits = torch.compile(eval_model.forward_logits, dynamic=False, fullgraph=True)
    eval_model.compiled_loss = torch.compile(eval_model.forward, dynamic=False, fullgraph=True)
    final_loss, final_bpb = timed_eval("quantized", eval_val, h, device, val_data, eval_model)
    if h.sliding_window_enabled:
        final_loss, final_bpb = timed_eval(
            "quantized_sliding_window", eval_val_sliding, h, device, val_data, eval_model
        )
    if h.ttt_enabled:
        final_loss, final_bpb = timed_eval("quantized_ttt", eval_val_ttt, h, device, val_data, eval_model)
    log(f"eval_total: {time.perf_counter() - eval_t0:.1f}s")
    log(f"final_metric val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")


# ----------------------------------------
# Entry
# ----------------------------------------


def setup_device(h):
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if h.world_size <= 0 or 8 % h.world_size != 0:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 64
    return device


def log_header(h):
    log("=" * 100, console=False)
    log("Hyperparameters:")
    for k, v in sorted(vars(type(h)).items()):
        if not k.startswith("_"):
            log(f"  {k}: {v}")
    log("=" * 100, console=False)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__} flash_attn_3:{HAS_FA3}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)
    log("=" * 100, console=False)


def main():
    h = Hyperparameters()
    device = setup_device(h)
    if h.is_main_process:
        os.makedirs("logs", exist_ok=True)
    set_logging_hparams(h)
    log_header(h)
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
