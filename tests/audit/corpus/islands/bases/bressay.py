"""
train_gpt.py -- SP8192 + depth recurrence + parallel residuals + QK gain + XSA + SmearGate + MuonEq-R
+ EMA + full-Hessian GPTQ (SDClip, int6 matrices / int8 embeddings) + brotli + score-first TTT.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Everything is set through environment variables, see Hyperparameters.
"""

import collections
import copy
import glob
import hashlib
import io
import lzma
import math
import os
import random
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

try:
    import brotli

    _HAVE_BROTLI = True
except ImportError:
    _HAVE_BROTLI = False

try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func

    _HAVE_FA3 = True
except ImportError:
    flash_attn_3_func = None
    _HAVE_FA3 = False


# -----------------------------------------------------------------------------
# hyperparameters
# -----------------------------------------------------------------------------


class Hyperparameters:
    # run
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))
    quantized_model_path = os.environ.get("QUANTIZED_MODEL_PATH", "final_model.int6.ptz")
    logs_dir = os.environ.get("LOGS_DIR", "logs")

    # data
    data_dir = os.environ.get("DATA_DIR", "./data/")
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    bos_id = int(os.environ.get("BOS_ID", 1))

    # training length
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 13.0))

    # evaluation
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 2048 * 32 * 8))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))

    # test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 32))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))

    # model
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    parallel_start_layer = int(os.environ.get("PARALLEL_START_LAYER", 7))
    skip_gates_enabled = bool(int(os.environ.get("SKIP_GATES_ENABLED", "1")))
    smear_gate_enabled = bool(int(os.environ.get("SMEAR_GATE_ENABLED", "1")))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.25))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    leaky_slope = float(os.environ.get("LEAKY_SLOPE", 0.5))

    # depth recurrence: layers loop_start..loop_end run num_loops extra times
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))

    # optimizer
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_row_normalize = bool(int(os.environ.get("MUON_ROW_NORMALIZE", "1")))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # quantization
    compressor = os.environ.get("COMPRESSOR", "brotli")
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 13.1))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))
    size_limit_bytes = int(os.environ.get("SIZE_LIMIT_BYTES", 16_000_000))
    prune_to_fit = bool(int(os.environ.get("PRUNE_TO_FIT", "1")))

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size


# anything whose name matches stays in fp32 and goes to AdamW
CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "skip_gates",
    "smear",
)


# -----------------------------------------------------------------------------
# logging
# -----------------------------------------------------------------------------

_logfile = None


def set_logging(h):
    global _logfile
    if not h.is_main_process:
        return
    os.makedirs(h.logs_dir, exist_ok=True)
    _logfile = os.path.join(h.logs_dir, f"{h.run_id}.txt")


def log(msg, console=True):
    if _logfile is None:
        return
    if console:
        print(msg, flush=True)
    with open(_logfile, "a", encoding="utf-8") as f:
        print(msg, file=f)


# -----------------------------------------------------------------------------
# data
# -----------------------------------------------------------------------------

SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
SHARD_MAGIC = 20240520
SHARD_VERSION = 1

_shard_ntokens_cache = {}
_mmap_cache = {}


def read_num_tokens(file):
    key = str(file)
    cached = _shard_ntokens_cache.get(key)
    if cached is not None:
        return cached
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {file}")
    n = int(header[2])
    expected = SHARD_HEADER_BYTES + n * np.dtype("<u2").itemsize
    if os.path.getsize(file) != expected:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected} bytes")
    _shard_ntokens_cache[key] = n
    return n


def get_shard_memmap(file):
    key = str(file)
    mm = _mmap_cache.get(key)
    if mm is None:
        n = read_num_tokens(file)
        mm = np.memmap(file, mode="r", dtype="<u2", offset=SHARD_HEADER_BYTES, shape=(n,))
        _mmap_cache[key] = mm
    return mm


def load_data_shard(file):
    n = read_num_tokens(file)
    tokens = np.fromfile(file, dtype="<u2", count=n, offset=SHARD_HEADER_BYTES)
    if tokens.size != n:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.int64))


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # keep the tail: every token after the very first one gets scored
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError(f"Validation split matched by {pattern} is empty")
    return tokens


def build_sentencepiece_luts(sp, vocab_size, device):
    sp_vocab_size = int(sp.vocab_size())
    # the byte count below only makes sense if a space really is a separate piece prefix
    assert sp.piece_to_id("\u2581") != sp.unk_id(), "tokenizer has no plain space piece"
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
        base_bytes_np[token_id] = len(piece.replace("\u2581", " ").encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


class ValidationData:
    """Validation tokens plus the tables that turn target ids into bytes of text."""

    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(
                f"VOCAB_SIZE={h.vocab_size} does not match tokenizer vocab_size={int(self.sp.vocab_size())}"
            )
        self.val_tokens = load_validation_tokens(h.val_files)
        (
            self.base_bytes_lut,
            self.has_leading_space_lut,
            self.is_boundary_token_lut,
        ) = build_sentencepiece_luts(self.sp, h.vocab_size, device)

    def target_bytes(self, prev_ids, tgt_ids):
        token_bytes = self.base_bytes_lut[tgt_ids].to(torch.int32)
        # a leading space is a byte of text unless it was only put there by the tokenizer at a document start
        lead = self.has_leading_space_lut[tgt_ids] & ~self.is_boundary_token_lut[prev_ids]
        token_bytes = token_bytes + lead.to(torch.int32)
        return token_bytes


class ShuffledSequenceLoader:
    """Every rank owns a slice of the shards and draws sequences from them without replacement."""

    def __init__(self, h, device):
        self.world_size = h.world_size
        self.seq_len = h.train_seq_len
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"No files found for pattern: {h.train_files}")
        self.files = all_files[h.rank :: h.world_size]
        if not self.files:
            raise RuntimeError(f"rank {h.rank} got no shard, only {len(all_files)} there")
        self.rng = np.random.Generator(np.random.PCG64([h.seed, h.rank]))
        self.num_tokens = [read_num_tokens(f) for f in self.files]
        self.start_inds = [[] for _ in self.files]
        for si in range(len(self.files)):
            self._reset_shard(si)

    def _reset_shard(self, si):
        max_phase = min(self.seq_len - 1, max(0, self.num_tokens[si] - self.seq_len - 1))
        phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
        num_sequences = (self.num_tokens[si] - 1 - phase) // self.seq_len
        sequence_order = self.rng.permutation(num_sequences)
        self.start_inds[si] = (phase + sequence_order * self.seq_len).tolist()

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
            mm = get_shard_memmap(self.files[si])
            window = torch.as_tensor(np.array(mm[start_ind : start_ind + self.seq_len + 1], dtype=np.int64))
            x[bi] = window[:-1]
            y[bi] = window[1:]
        return (
            x.pin_memory().to(self.device, non_blocking=True),
            y.pin_memory().to(self.device, non_blocking=True),
        )


# -----------------------------------------------------------------------------
# model
# -----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    # weights stay fp32, matmul happens in the dtype of the input
    def forward(self, x: Tensor) -> Tensor:
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
                # NTK-ish rescale, only matters if EVAL_SEQ_LEN > TRAIN_SEQ_LEN
                scale = seq_len / self.train_seq_len
                new_base = self.base * scale ** (rd / (rd - 2))
                inv_freq = 1.0 / new_base ** (torch.arange(0, rd, 2, dtype=torch.float32, device=device) / rd)
            else:
                inv_freq = 1.0 / self.base ** (torch.arange(0, rd, 2, dtype=torch.float32, device=device) / rd)
            t = torch.arange(seq_len, device=device, dtype=torch.float32)
            freqs = torch.outer(t, inv_freq)
            self._cos_cached = freqs.cos()[None, :, None, :]
            self._sin_cached = freqs.sin()[None, :, None, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int = 0) -> Tensor:
    if rope_dims > 0 and rope_dims < x.size(-1):
        x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
        half = rope_dims // 2
        x1, x2 = x_rope[..., :half], x_rope[..., half:]
        x_rope = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
        return torch.cat((x_rope, x_pass), dim=-1)
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, H, D) in and out, GQA."""
    if _HAVE_FA3:
        out = flash_attn_3_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    rep = q.size(2) // k.size(2)
    if rep > 1:
        k = k.repeat_interleave(rep, dim=2)
        v = v.repeat_interleave(rep, dim=2)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
    )
    return y.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, rope_base, qk_gain_init, train_seq_len, rope_dims):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = rope_dims
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, base=rope_base, train_seq_len=train_seq_len, rope_dims=rope_dims)
        self.use_xsa = False

    def _xsa_efficient(self, y: Tensor, v: Tensor) -> Tensor:
        # exclusive self attention: take out of y what points along the token's own value
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        group = H // Hkv
        y_g = y.reshape(B, T, Hkv, group, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        proj = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - proj).reshape(B, T, H, D)

    def forward(self, x: Tensor) -> Tensor:
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
            y = self._xsa_efficient(y, v)
        y = y.reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, dim, mlp_mult, leaky_slope):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.leaky_slope = leaky_slope
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=self.leaky_slope).square())


class SmearGate(nn.Module):
    """x_t += lambda * gate(x_t) * x_{t-1}. Positions that hold BOS get nothing from the document before."""

    def __init__(self, dim, bos_id, gate_dim=12):
        super().__init__()
        self.bos_id = bos_id
        self.gate_dim = gate_dim
        self.gate = CastedLinear(gate_dim, 1, bias=False)
        self.gate._zero_init = True
        self.smear_lambda = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x[:, 1:, : self.gate_dim]))
        keep = (input_ids[:, 1:] != self.bos_id).to(x.dtype).unsqueeze(-1)
        mixed = x[:, 1:] + self.smear_lambda.to(x.dtype) * gate * keep * x[:, :-1]
        return torch.cat((x[:, :1], mixed), dim=1)


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
            h.train_seq_len,
            h.rope_dims,
        )
        self.mlp = MLP(dim, h.mlp_mult, h.leaky_slope)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = layer_idx >= h.parallel_start_layer

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor)
        attn_out = self.attn_scale.to(dtype=x_in.dtype)[None, None, :] * attn_out
        if self.parallel:
            # GPT-J style: both branches read the same input
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
            return x_in + attn_out + self.mlp_scale.to(dtype=x_in.dtype)[None, None, :] * mlp_out
        x_out = x_in + attn_out
        mlp_out = self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)
        return x_out + self.mlp_scale.to(dtype=x_out.dtype)[None, None, :] * mlp_out


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        if h.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {h.logit_softcap}")
        self.logit_softcap = h.logit_softcap
        self.tied_embed_init_std = h.tied_embed_init_std
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.model_dim, h.bos_id) if h.smear_gate_enabled else None
        self.num_encoder_layers = h.num_layers // 2
        self.num_decoder_layers = h.num_layers - self.num_encoder_layers
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
            self.blocks[i].attn.use_xsa = True
        self.final_norm = RMSNorm()

        # depth recurrence: unrolled list of layer indices, switched on late in training
        self.looping_active = False
        if h.num_loops > 0:
            loop_seg = list(range(h.loop_start, h.loop_end + 1))
            all_indices = list(range(h.loop_start))
            for _ in range(h.num_loops + 1):
                all_indices.extend(loop_seg)
            all_indices.extend(range(h.loop_end + 1, h.num_layers))
            num_enc = len(all_indices) // 2
            self.encoder_indices = all_indices[:num_enc]
            self.decoder_indices = all_indices[num_enc:]
        else:
            self.encoder_indices = list(range(self.num_encoder_layers))
            self.decoder_indices = list(range(self.num_encoder_layers, h.num_layers))
        self.num_skip_weights = min(len(self.encoder_indices), len(self.decoder_indices))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, h.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(self.num_skip_weights, h.model_dim, dtype=torch.float32))
            if h.skip_gates_enabled
            else None
        )
        self._init_weights()

    def _init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def forward_hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        if self.smear is not None:
            x = self.smear(x, input_ids)
        x0 = x
        skips = []
        if self.looping_active:
            enc_iter, dec_iter = self.encoder_indices, self.decoder_indices
        else:
            enc_iter = range(self.num_encoder_layers)
            dec_iter = range(self.num_encoder_layers, self.num_encoder_layers + self.num_decoder_layers)
        for i in enc_iter:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for skip_idx, i in enumerate(dec_iter):
            if skip_idx < self.num_skip_weights and skips:
                scaled_skip = self.skip_weights[skip_idx].to(dtype=x.dtype)[None, None, :] * skips.pop()
                if self.skip_gates is not None:
                    g = torch.sigmoid(self.skip_gates[skip_idx].to(dtype=x.dtype))[None, None, :]
                    x = torch.lerp(scaled_skip, x, g)
                else:
                    x = x + scaled_skip
            x = self.blocks[i](x, x0)
        return self.final_norm(x)

    def lm_head(self, hidden: Tensor) -> Tensor:
        logits_proj = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.forward_hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor, reduction: str = "mean") -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(),
            target_ids.reshape(-1),
            reduction=reduction,
        )


def restore_fp32_params(model):
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        is_control = any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS)
        if (param.ndim < 2 or is_control) and param.dtype != torch.float32:
            param.data = param.data.float()


# -----------------------------------------------------------------------------
# optimizers
# -----------------------------------------------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
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
    """MuonEq-R: rows of the momentum are scaled to unit norm before Newton-Schulz."""

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
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr = group["lr"]
            momentum = group["momentum"]
            total_params = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total_params, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    g = g.add(buf, alpha=momentum) if group["nesterov"] else buf
                    if group["row_normalize"]:
                        row_norms = g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7)
                        g = g / row_norms.to(g.dtype)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
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
        matrix_params = [
            p
            for name, p in block_named_params
            if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
        ]
        scalar_params = [
            p
            for name, p in block_named_params
            if p.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
        ]
        if base_model.skip_weights.numel() > 0:
            scalar_params.append(base_model.skip_weights)
        if base_model.skip_gates is not None:
            scalar_params.append(base_model.skip_gates)
        if base_model.smear is not None:
            scalar_params.extend(base_model.smear.parameters())

        self.optimizer_tok = torch.optim.AdamW(
            [{"params": [base_model.tok_emb.weight], "lr": h.tied_embed_lr, "base_lr": h.tied_embed_lr}],
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


def allreduce_grads(h, base_model):
    if not h.distributed:
        return
    for p in base_model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)


# -----------------------------------------------------------------------------
# GPTQ
# -----------------------------------------------------------------------------

MIN_QUANT_NUMEL = 65536


def collect_hessians(h, base_model, train_loader, device, budget_s):
    """X^T X of the input of every big linear, over training batches, for at most budget_s seconds."""
    t0 = time.perf_counter()
    hessians = {}
    counts = collections.Counter()
    hooks = []

    def accumulate(name, x):
        x = x.detach().reshape(-1, x.size(-1)).float()
        if name not in hessians:
            hessians[name] = torch.zeros(x.size(1), x.size(1), dtype=torch.float32, device=device)
        hessians[name].addmm_(x.T, x)
        counts[name] += x.size(0)

    def make_linear_hook(name):
        def hook_fn(module, inp, out):
            accumulate(name, inp[0])

        return hook_fn

    def make_output_hook(name):
        def hook_fn(module, inp, out):
            accumulate(name, out)

        return hook_fn

    for name, module in base_model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() >= MIN_QUANT_NUMEL:
            hooks.append(module.register_forward_hook(make_linear_hook(name + ".weight")))
    # tied head: what multiplies tok_emb.weight is the output of final_norm
    hooks.append(base_model.final_norm.register_forward_hook(make_output_hook("tok_emb.weight")))

    base_model.eval()
    n_batches = 0
    with torch.no_grad():
        for bi in range(h.gptq_calibration_batches):
            if bi > 0 and time.perf_counter() - t0 > budget_s:
                break
            x, _ = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                base_model.forward_logits(x)
            torch.cuda.synchronize()
            n_batches += 1
    for hook in hooks:
        hook.remove()

    if h.distributed:
        for name in sorted(hessians):
            n = torch.tensor(float(counts[name]), device=device)
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
            dist.all_reduce(n, op=dist.ReduceOp.SUM)
            hessians[name] /= n
    else:
        for name in hessians:
            hessians[name] /= counts[name]
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - t0
    log(f"gptq:collected {len(hessians)} hessians from {n_batches} train batches per rank in {elapsed:.1f}s")
    return hessians


def gptq_quantize_weight(w, H, clip_sigmas, clip_range, block_size=128, damp=0.01):
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    H.diagonal().add_(damp * H.diag().mean())

    # act-order: the columns that matter most go first
    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_perm = W_orig[:, perm].clone()
    W_perm[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)

    # SDClip: clip at clip_sigmas row standard deviations
    row_std = W_orig.std(dim=1)
    s = (clip_sigmas * row_std / clip_range).clamp_min(1e-6).to(torch.float16)
    sf = s.float()

    Q = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    W_work = W_perm.clone()
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W_block = W_work[:, i1:i2].clone()
        Hinv_block = Hinv[i1:i2, i1:i2]
        Err = torch.zeros(rows, i2 - i1, device=w.device)
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


def gptq_mixed_quantize(h, state_dict, hessians):
    result = {}
    meta = {}
    for name, tensor in state_dict.items():
        t = tensor.detach()
        if not t.is_floating_point() or t.ndim != 2 or t.numel() < MIN_QUANT_NUMEL:
            result[name] = t.to(torch.float16).cpu() if t.is_floating_point() else t.cpu()
            meta[name] = "passthrough (float16)"
            continue
        is_embed = "tok_emb" in name
        bits = h.embed_bits if is_embed else h.matrix_bits
        cs = h.embed_clip_sigmas if is_embed else h.matrix_clip_sigmas
        clip_range = 2 ** (bits - 1) - 1
        q, s = gptq_quantize_weight(
            t,
            hessians[name],
            clip_sigmas=cs,
            clip_range=clip_range,
            block_size=h.gptq_block_size,
            damp=h.gptq_damp,
        )
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
        info = meta[name]
        if "passthrough" in info:
            t = result[name]
            out[name] = t.to(orig.dtype) if t.is_floating_point() else t
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        out[name] = (q.float() * s.float().view(q.shape[0], 1)).to(orig.dtype)
    return out


# -----------------------------------------------------------------------------
# compression
# -----------------------------------------------------------------------------

_BSHF_MAGIC = b"BSHF"


def byte_shuffle(data, stride=2):
    if stride <= 1 or len(data) < stride:
        return data
    src = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(len(src), dtype=np.uint8)
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
        out[pos::stride] = payload[src_off : src_off + chunk_len]
        src_off += chunk_len
    return out.tobytes()


def compress_blob(raw, compressor):
    shuffled = byte_shuffle(raw)
    if compressor == "brotli" and _HAVE_BROTLI:
        return b"B" + brotli.compress(shuffled, quality=11, lgwin=24)
    return b"L" + lzma.compress(shuffled, preset=9 | lzma.PRESET_EXTREME)


def decompress_blob(blob):
    kind, payload = blob[:1], blob[1:]
    if kind == b"B":
        return byte_unshuffle(brotli.decompress(payload))
    if kind == b"L":
        return byte_unshuffle(lzma.decompress(payload))
    raise ValueError(f"unknown container {kind!r}")


def pack_model(h, quant_result, quant_meta):
    buf = io.BytesIO()
    torch.save({"w": quant_result, "m": quant_meta}, buf)
    return compress_blob(buf.getvalue(), h.compressor)


def prune_smallest(h, quant_result, quant_meta, limit):
    """Zeroes the +-1 codes of the rows with the smallest scales until the blob fits. Touches int6 matrices only."""
    candidates = []
    for name, info in quant_meta.items():
        if "passthrough" in info or "tok_emb" in name:
            continue
        q = quant_result[name + ".q"]
        cost = quant_result[name + ".scale"].float().square().view(-1, 1).expand_as(q)
        hit = q.abs() == 1
        candidates.append((name, hit.nonzero(as_tuple=False), cost[hit]))
    all_costs = torch.cat([c for _, _, c in candidates]).sort().values
    log(f"prune: {all_costs.numel()} candidate codes")

    def pruned(fraction):
        n = int(fraction * all_costs.numel())
        if n == 0:
            return quant_result
        threshold = all_costs[min(n, all_costs.numel() - 1)]
        out = dict(quant_result)
        for name, where, cost in candidates:
            sel = where[cost < threshold]
            if sel.numel() == 0:
                continue
            q = out[name + ".q"].clone()
            q[sel[:, 0], sel[:, 1]] = 0
            out[name + ".q"] = q
        return out

    lo, hi = 0.0, 0.5
    best = None
    for _ in range(6):
        mid = 0.5 * (lo + hi)
        trial = pruned(mid)
        blob = pack_model(h, trial, quant_meta)
        log(f"prune: fraction {mid:.4f} -> {len(blob)} bytes")
        if len(blob) <= limit:
            best, hi = blob, mid
        else:
            lo = mid
    if best is None:
        raise RuntimeError("pruning half of the +-1 codes is not enough, lower MLP_MULT or raise MATRIX_CLIP_SIGMAS")
    return best


def serialize(h, base_model, hessians, code):
    code_bytes = len(code.encode("utf-8"))
    if h.is_main_process:
        sd = {name: t.detach() for name, t in base_model.state_dict().items()}
        t0 = time.perf_counter()
        quant_result, quant_meta = gptq_mixed_quantize(h, sd, hessians)
        log(f"gptq:quantized in {time.perf_counter() - t0:.1f}s")
        quant_blob = pack_model(h, quant_result, quant_meta)
        limit = h.size_limit_bytes - code_bytes
        if len(quant_blob) > limit and h.prune_to_fit:
            log(f"prune: blob of {len(quant_blob)} bytes, {limit} allowed")
            quant_blob = prune_smallest(h, quant_result, quant_meta, limit)
        with open(h.quantized_model_path, "wb") as f:
            f.write(quant_blob)
        quant_file_bytes = os.path.getsize(h.quantized_model_path)
        bytes_total = quant_file_bytes + code_bytes
        log(f"Serialized model quantized+{h.compressor}: {quant_file_bytes} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size quantized+{h.compressor}: {bytes_total} bytes")
        if bytes_total > h.size_limit_bytes:
            raise RuntimeError(f"submission too large: {bytes_total} > {h.size_limit_bytes}")
    if h.distributed:
        dist.barrier()


def deserialize(h, device):
    eval_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(eval_model)
    template_sd = {name: t.detach().cpu() for name, t in eval_model.state_dict().items()}
    with open(h.quantized_model_path, "rb") as f:
        blob = f.read()
    packed = torch.load(io.BytesIO(decompress_blob(blob)), map_location="cpu", weights_only=True)
    eval_model.load_state_dict(dequantize_mixed(packed["w"], packed["m"], template_sd), strict=True)
    return eval_model


# -----------------------------------------------------------------------------
# evaluation
# -----------------------------------------------------------------------------


def _loss_bpb(loss_sum, token_count, byte_count):
    val_loss = (loss_sum / token_count).item()
    val_bpb = val_loss / math.log(2.0) * (token_count.item() / byte_count.item())
    return val_loss, val_bpb


def eval_val(h, device, val_data, model):
    """Plain pass: non-overlapping sequences, the last one may be short."""
    seq_len = h.eval_seq_len
    val_tokens = val_data.val_tokens
    total_tokens = val_tokens.numel() - 1
    local_batch_seqs = max(1, h.val_batch_tokens // (h.world_size * seq_len))
    seq_starts = list(range(0, total_tokens, seq_len))
    my_starts = seq_starts[h.rank :: h.world_size]

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        full = [s for s in my_starts if s + seq_len <= total_tokens]
        groups = [full[i : i + local_batch_seqs] for i in range(0, len(full), local_batch_seqs)]
        groups += [[s] for s in my_starts if s + seq_len > total_tokens]
        for group in groups:
            end = [min(s + seq_len, total_tokens) for s in group]
            x = torch.stack([val_tokens[s:e] for s, e in zip(group, end)]).to(device, non_blocking=True)
            y = torch.stack([val_tokens[s + 1 : e + 1] for s, e in zip(group, end)]).to(device, non_blocking=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                batch_loss = model(x, y, reduction="sum").detach()
            loss_sum += batch_loss.to(torch.float64)
            token_count += float(y.numel())
            byte_count += val_data.target_bytes(x, y).sum().to(torch.float64)
    if h.distributed:
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)
    model.train(was_training)
    return _loss_bpb(loss_sum, token_count, byte_count)


def eval_val_sliding(h, device, val_data, base_model, batch_seqs=32):
    """Windows of eval_seq_len every eval_stride tokens. The first one scores all it has, the others their tail."""
    base_model.eval()
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)

    seq_len = h.eval_seq_len
    stride = h.eval_stride
    context_size = seq_len - stride
    val_tokens = val_data.val_tokens
    total_tokens = val_tokens.numel() - 1

    window_starts = [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context_size < total_tokens]
    total_windows = len(window_starts)
    my_s = (total_windows * h.rank) // h.world_size
    my_e = (total_windows * (h.rank + 1)) // h.world_size
    my_windows = window_starts[my_s:my_e]

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    with torch.no_grad():
        for bi in range(0, len(my_windows), batch_seqs):
            batch_ws = my_windows[bi : bi + batch_seqs]
            bsz = len(batch_ws)
            x_batch = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
            y_batch = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
            wlens = []
            for i, ws in enumerate(batch_ws):
                we = min(ws + seq_len, total_tokens)
                wlen = we - ws
                wlens.append(wlen)
                chunk = val_tokens[ws : we + 1].to(device, non_blocking=True)
                x_batch[i, :wlen] = chunk[:-1]
                y_batch[i, :wlen] = chunk[1:]
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x_batch)
            nll = F.cross_entropy(
                logits.reshape(-1, logits.size(-1)).float(),
                y_batch.reshape(-1),
                reduction="none",
            ).reshape(bsz, seq_len)
            for i, ws in enumerate(batch_ws):
                wlen = wlens[i]
                s = 0 if ws == 0 else context_size
                loss_sum += nll[i, s:wlen].to(torch.float64).sum()
                token_count += float(wlen - s)
                byte_count += val_data.target_bytes(x_batch[i, s:wlen], y_batch[i, s:wlen]).sum().to(torch.float64)

    if h.distributed:
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)
    log(f"  sliding: {total_windows} windows, {int(token_count.item())} of {total_tokens} targets")
    base_model.train()
    return _loss_bpb(loss_sum, token_count, byte_count)


def eval_val_ttt(h, device, val_data, base_model):
    """Score-first TTT. Per chunk: (1) score its windows with the current weights, (2) SGD on the chunk.

    Every rank holds a full copy of the weights; windows and training sequences are dealt out to the ranks,
    gradients are summed, so all copies stay equal.
    """
    rank, world_size = h.rank, h.world_size
    seq_len = h.eval_seq_len
    stride = h.eval_stride
    ttt_chunk = h.ttt_chunk_tokens
    batch_seqs = h.ttt_batch_seqs
    context_size = seq_len - stride
    assert seq_len % stride == 0 and ttt_chunk % seq_len == 0

    val_tokens = val_data.val_tokens
    total_tokens = val_tokens.numel() - 1
    num_chunks = (total_tokens + ttt_chunk - 1) // ttt_chunk

    # a window belongs to the chunk that holds the first target it scores; stride divides the chunk, so it
    # never scores beyond it
    window_starts = [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context_size < total_tokens]
    chunk_windows = [[] for _ in range(num_chunks)]
    for ws in window_starts:
        first_scored = ws if ws == 0 else ws + context_size
        chunk_windows[first_scored // ttt_chunk].append(ws)

    log(
        f"ttt:start chunks={num_chunks} windows={len(window_starts)} ttt_lr={h.ttt_lr} "
        f"ttt_epochs={h.ttt_epochs} freeze_blocks={h.ttt_freeze_blocks}"
    )

    ttt_params = []
    for name, p in base_model.named_parameters():
        frozen = any(name.startswith(f"blocks.{i}.") for i in range(h.ttt_freeze_blocks))
        p.requires_grad_(not frozen)
        if not frozen:
            ttt_params.append(p)
    optimizer = torch.optim.SGD(ttt_params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    compiled_logits = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    t0 = time.perf_counter()

    for ci in range(num_chunks):
        windows = chunk_windows[ci]
        chunk_start = ci * ttt_chunk
        chunk_end = min(chunk_start + ttt_chunk, total_tokens)

        # ---- (1) score
        my_s = (len(windows) * rank) // world_size
        my_e = (len(windows) * (rank + 1)) // world_size
        my_windows = windows[my_s:my_e]
        base_model.eval()
        with torch.no_grad():
            for bi in range(0, len(my_windows), batch_seqs):
                batch_ws = my_windows[bi : bi + batch_seqs]
                bsz = len(batch_ws)
                xb = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
                yb = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
                wlens = []
                for i, ws in enumerate(batch_ws):
                    we = min(ws + seq_len, total_tokens)
                    wlens.append(we - ws)
                    tok = val_tokens[ws : we + 1].to(device, non_blocking=True)
                    xb[i, : we - ws] = tok[:-1]
                    yb[i, : we - ws] = tok[1:]
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = compiled_logits(xb)
                nll = F.cross_entropy(
                    logits.float().flatten(0, 1),
                    yb.flatten(),
                    reduction="none",
                ).view(bsz, seq_len)
                for i, ws in enumerate(batch_ws):
                    s = 0 if ws == 0 else context_size
                    e = wlens[i]
                    loss_sum += nll[i, s:e].double().sum()
                    token_count += float(e - s)
                    byte_count += val_data.target_bytes(xb[i, s:e], yb[i, s:e]).double().sum()

        # ---- (2) train on what has just been scored; nothing is left to profit after the last chunk
        is_last_chunk = ci == num_chunks - 1
        if not is_last_chunk and h.ttt_epochs > 0:
            base_model.train()
            lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            chunk_seqs = (chunk_end - chunk_start) // seq_len
            round_seqs = batch_seqs * world_size
            for _epoch in range(h.ttt_epochs):
                for r0 in range(0, chunk_seqs, round_seqs):
                    round_ids = list(range(r0, min(r0 + round_seqs, chunk_seqs)))
                    my_ids = round_ids[rank::world_size]
                    optimizer.zero_grad(set_to_none=True)
                    if my_ids:
                        begins = [chunk_start + j * seq_len for j in my_ids]
                        x = torch.stack([val_tokens[b : b + seq_len] for b in begins]).to(device)
                        y = torch.stack([val_tokens[b + 1 : b + seq_len + 1] for b in begins]).to(device)
                        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                            loss = base_model(x, y, reduction="sum")
                        (loss / (len(round_ids) * seq_len)).backward()
                    for p in ttt_params:
                        if p.grad is None:
                            p.grad = torch.zeros_like(p)
                        if h.distributed:
                            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                    torch.nn.utils.clip_grad_norm_(ttt_params, h.ttt_grad_clip)
                    optimizer.step()

        if ci % 100 == 0 or is_last_chunk:
            running_loss = loss_sum.item() / max(token_count.item(), 1.0)
            running_bpb = running_loss / math.log(2.0) * token_count.item() / max(byte_count.item(), 1.0)
            log(f"  ttt_chunk [{ci + 1}/{num_chunks}] bpb={running_bpb:.6f} time={time.perf_counter() - t0:.1f}s")

    if h.distributed:
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)
    base_model.eval()
    val_loss, val_bpb = _loss_bpb(loss_sum, token_count, byte_count)
    log(
        f"ttt:done val_loss={val_loss:.6f} val_bpb={val_bpb:.6f} targets={int(token_count.item())} "
        f"bytes={int(byte_count.item())} elapsed={time.perf_counter() - t0:.1f}s"
    )
    return val_loss, val_bpb


def timed_eval(label, fn, *args, extra=""):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} {extra}eval_time:{elapsed_ms:.0f}ms")
    log(f"{label}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    return val_loss, val_bpb


# -----------------------------------------------------------------------------
# training
# -----------------------------------------------------------------------------


def train_model(h, device, val_data):
    base_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(base_model)
    if h.distributed:
        for t in base_model.state_dict().values():
            dist.broadcast(t, src=0)
    model = torch.compile(base_model, dynamic=False, fullgraph=True)
    optimizers = Optimizers(h, base_model)
    train_loader = ShuffledSequenceLoader(h, device)
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log(f"layers encoder:{base_model.encoder_indices} decoder:{base_model.decoder_indices} (once looping is on)")

    max_wallclock_ms = None
    if h.max_wallclock_seconds > 0:
        # GPTQ calibration reads training data, so its seconds come out of the same 600
        max_wallclock_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
        log(f"gptq:reserving {h.gptq_reserve_seconds:.0f}s, effective={max_wallclock_ms:.0f}ms")

    def training_frac(step, elapsed_ms):
        if max_wallclock_ms is None:
            return step / max(h.iterations, 1)
        return elapsed_ms / max(max_wallclock_ms, 1e-9)

    def lr_mul(frac):
        if h.warmdown_frac <= 0:
            return 1.0
        if frac >= 1.0 - h.warmdown_frac:
            return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
        return 1.0

    def step_fn(step, lr_scale):
        optimizers.zero_grad_all()
        train_loss = torch.zeros((), device=device)
        for _micro in range(h.grad_accum_steps):
            x, y = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss / h.grad_accum_steps).backward()
        train_loss /= h.grad_accum_steps
        allreduce_grads(h, base_model)

        ramp = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
        muon_momentum = (1 - ramp) * h.muon_momentum_warmup_start + ramp * h.muon_momentum
        for group in optimizers.optimizer_muon.param_groups:
            group["momentum"] = muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        optimizers.step()
        return train_loss

    # compile both graphs on throw-away steps, then put weights and optimizer state back
    if h.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_opt_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for looping in (False, True) if h.num_loops > 0 else (False,):
            base_model.looping_active = looping
            for warmup_step in range(h.warmup_steps):
                step_fn(warmup_step, 1.0)
            log(f"warmup_step: {h.warmup_steps}/{h.warmup_steps} looping:{looping}")
        base_model.looping_active = False
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_opt_states):
            opt.load_state_dict(state)
        optimizers.zero_grad_all()
        train_loader = ShuffledSequenceLoader(h, device)

    ema_state = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
    ema_decay = h.ema_decay

    training_time_ms = 0.0
    stop_after_step = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)

        should_validate = last_step or (h.val_loss_every > 0 and step % h.val_loss_every == 0)
        if should_validate:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, model)
            log(
                f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f} "
                f"train_time: {training_time_ms:.0f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            if stop_after_step is not None and step < h.iterations:
                log(
                    f"stopping_early: wallclock_cap train_time: {training_time_ms:.0f}ms "
                    f"step: {step}/{h.iterations}"
                )
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = training_frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f}")
        model.train()
        train_loss = step_fn(step, lr_mul(frac))

        with torch.no_grad():
            for name, t in base_model.state_dict().items():
                ema_state[name].mul_(ema_decay).add_(t.detach().float(), alpha=1.0 - ema_decay)

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if h.train_log_every > 0 and (step <= 5 or step % h.train_log_every == 0 or stop_after_step is not None):
            tok_per_sec = step * h.train_batch_tokens / (approx_training_time_ms / 1000.0)
            log(
                f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} "
                f"train_time: {approx_training_time_ms / 60000:.1f}m tok/s: {tok_per_sec:.0f}"
            )

        reached_cap = max_wallclock_ms is not None and approx_training_time_ms >= max_wallclock_ms
        if h.distributed and max_wallclock_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # t0 restarted after the last validation, so the clock goes on from training_time_ms
    log("ema:applying EMA weights")
    current_state = base_model.state_dict()
    avg_state = {name: t.to(dtype=current_state[name].dtype) for name, t in ema_state.items()}
    base_model.load_state_dict(avg_state, strict=True)

    used_s = training_time_ms / 1000.0 + (time.perf_counter() - t0)
    budget_s = h.max_wallclock_seconds - used_s - 3.0 if h.max_wallclock_seconds > 0 else float("inf")
    hessians = collect_hessians(h, base_model, train_loader, device, budget_s)
    total_s = training_time_ms / 1000.0 + (time.perf_counter() - t0)
    log(f"gptq:train+calibration {1000.0 * total_s:.0f}ms of {1000.0 * h.max_wallclock_seconds:.0f}ms")
    return base_model, model, hessians


def train_and_eval(h, device, code):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)

    val_data = ValidationData(h, device)
    log(f"train_shards: {len(glob.glob(h.train_files))}")
    log(f"val_tokens: {val_data.val_tokens.numel() - 1}")

    base_model, compiled_model, hessians = train_model(h, device, val_data)
    serialize(h, base_model, hessians, code)
    del hessians
    timed_eval("pre-quantization post-ema", eval_val, h, device, val_data, compiled_model)
    del base_model, compiled_model
    torch._dynamo.reset()
    torch.cuda.empty_cache()

    # from here on only the artifact counts
    eval_start = time.perf_counter()
    eval_model = deserialize(h, device)
    eval_model.looping_active = h.num_loops > 0
    compiled_eval = torch.compile(eval_model, dynamic=False, fullgraph=True)
    timed_eval("final_int6_roundtrip", eval_val, h, device, val_data, compiled_eval)
    if h.sliding_window_enabled:
        timed_eval(
            "final_int6_sliding_window",
            eval_val_sliding,
            h,
            device,
            val_data,
            eval_model,
            extra=f"stride:{h.eval_stride} ",
        )
    if h.ttt_enabled:
        # the two passes above changed nothing in eval_model, TTT starts from the artifact's weights
        timed_eval("legal_ttt", eval_val_ttt, h, device, val_data, eval_model)
    log(f"total_eval_time:{time.perf_counter() - eval_start:.1f}s")


def main():
    args = Hyperparameters()
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if args.world_size <= 0 or 8 % args.world_size != 0:
        raise ValueError(f"WORLD_SIZE={args.world_size} must divide 8 so grad_accum_steps stays integral")
    device = torch.device("cuda", args.local_rank)
    torch.cuda.set_device(device)
    if args.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 32

    set_logging(args)
    code = Path(__file__).read_text(encoding="utf-8")
    log(code, console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__} fa3:{_HAVE_FA3} brotli:{_HAVE_BROTLI}")
    log(f"code_sha256: {hashlib.sha256(code.encode('utf-8')).hexdigest()}")
    log("Hyperparameters:")
    for k in sorted(k for k in dir(type(args)) if not k.startswith("_")):
        log(f"  {k}: {getattr(args, k)}")
    log("=" * 100, console=False)

    train_and_eval(args, device, code)

    if args.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
