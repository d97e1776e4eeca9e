"""stroma: SP8192, 11 physical layers with 3-5 looped, XSA on every layer, partial RoPE, MuonEq-R,
EMA, SDClip GPTQ int6 + byte shuffle + brotli, sliding window and score-first TTT.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

import collections
import copy
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
    from flash_attn_interface import flash_attn_func as flash_attn_3
except ImportError:
    flash_attn_3 = None


# ----------------------------------------------------------------------------
# settings
# ----------------------------------------------------------------------------


class Hyperparameters:
    # data
    data_dir = os.environ.get("DATA_DIR", "./data/")
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    datasets_dir = os.environ.get("DATASETS_DIR", os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}"))
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get(
        "TOKENIZER_PATH", os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    )
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    min_lr = float(os.environ.get("MIN_LR", 0.0))

    # validation
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 2048 * 32 * 8))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_windows = int(os.environ.get("EVAL_BATCH_WINDOWS", 32))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))

    # model
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    embedding_dim = int(os.environ.get("EMBEDDING_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    rope_train_seq_len = int(os.environ.get("ROPE_TRAIN_SEQ_LEN", 2048))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    leaky_slope = float(os.environ.get("LEAKY_SLOPE", 0.5))
    parallel_residual_start = int(os.environ.get("PARALLEL_RESIDUAL_START", 7))
    skip_gates_enabled = bool(int(os.environ.get("SKIP_GATES_ENABLED", "1")))

    # depth recurrence
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))

    # optimiser
    embed_lr = float(os.environ.get("EMBED_LR", 0.6))
    head_lr = float(os.environ.get("HEAD_LR", 0.008))
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

    # test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 16))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))

    # quantisation
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 16.0))
    gptq_margin_seconds = float(os.environ.get("GPTQ_MARGIN_SECONDS", 4.0))
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    calib_source = os.environ.get("CALIB_SOURCE", "train")
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))
    size_limit = 16_000_000

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size

    # files
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    quantized_model_path = "final_model.int6.ptz"


_logger_hparams = None


def set_logging_hparams(h: Hyperparameters) -> None:
    global _logger_hparams
    _logger_hparams = h


def log(msg, console: bool = True) -> None:
    h = _logger_hparams
    if h is None:
        print(msg)
        return
    if not h.is_main_process:
        return
    if console:
        print(msg, flush=True)
    with open(h.logfile, "a", encoding="utf-8") as f:
        print(msg, file=f)


# ----------------------------------------------------------------------------
# tokenizer tables, validation stream
# ----------------------------------------------------------------------------


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
    """bytes of a piece without its leading space, whether it has one, whether it is a document mark"""
    sp_vocab_size = int(sp.vocab_size())
    assert sp.piece_to_id("\u2581") != sp.unk_id(), "tokenizer has no bare space piece, the byte table would be wrong"
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes = np.zeros((table_size,), dtype=np.int16)
    has_leading_space = np.zeros((table_size,), dtype=np.bool_)
    is_boundary = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary[token_id] = False
        if sp.is_byte(token_id):
            base_bytes[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("\u2581"):
            has_leading_space[token_id] = True
            piece = piece[1:]
        base_bytes[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space, dtype=torch.bool, device=device),
        torch.tensor(is_boundary, dtype=torch.bool, device=device),
    )


SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
_SHARD_NTOKENS_CACHE: dict[str, int] = {}
_MMAP_CACHE: dict[str, np.memmap] = {}


def shard_num_tokens(file: Path) -> int:
    key = str(file)
    if key in _SHARD_NTOKENS_CACHE:
        return _SHARD_NTOKENS_CACHE[key]
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header: {file}")
    n = int(header[2])
    expected = SHARD_HEADER_BYTES + n * np.dtype("<u2").itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"shard size mismatch: {file}: expected {expected} bytes")
    _SHARD_NTOKENS_CACHE[key] = n
    return n


def shard_memmap(file: Path) -> np.memmap:
    key = str(file)
    if key not in _MMAP_CACHE:
        n = shard_num_tokens(file)
        _MMAP_CACHE[key] = np.memmap(file, mode="r", dtype="<u2", offset=SHARD_HEADER_BYTES, shape=(n,))
    return _MMAP_CACHE[key]


def load_data_shard(file: Path) -> Tensor:
    n = shard_num_tokens(file)
    tokens = np.fromfile(file, dtype="<u2", count=n, offset=SHARD_HEADER_BYTES)
    if tokens.size != n:
        raise ValueError(f"short read: {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no validation shards: {pattern}")
    tokens = torch.cat([load_data_shard(f) for f in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("validation stream is too short")
    return tokens


class ValidationData:
    """the whole validation stream and the byte tables"""

    def __init__(self, h: Hyperparameters, device: torch.device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but tokenizer has {int(self.sp.vocab_size())}")
        self.tokens = load_validation_tokens(h.val_files)
        self.base_bytes, self.has_leading_space, self.is_boundary = build_sentencepiece_luts(
            self.sp, h.vocab_size, device
        )

    @property
    def num_targets(self) -> int:
        return self.tokens.numel() - 1

    def target_bytes(self, prev_ids: Tensor, target_ids: Tensor) -> Tensor:
        nbytes = self.base_bytes[target_ids].to(torch.float64)
        nbytes += (self.has_leading_space[target_ids] & ~self.is_boundary[prev_ids]).to(torch.float64)
        return nbytes


class Tally:
    """running sums of a scoring pass: nats, bytes, tokens"""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)

    def add(self, nll: Tensor, nbytes: Tensor, mask: Tensor) -> None:
        self.sums[0] += nll.to(torch.float64)[mask].sum()
        self.sums[1] += nbytes[mask].sum()
        self.sums[2] += mask.sum()

    def reduce(self) -> "Tally":
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums, op=dist.ReduceOp.SUM)
        return self

    def running_bpb(self) -> float:
        return (self.sums[0] / math.log(2.0) / self.sums[1].clamp_min(1)).item()

    def result(self) -> tuple[float, float]:
        nats, nbytes, tokens = self.sums.tolist()
        val_loss = nats / tokens
        val_bpb = val_loss / math.log(2.0) * (tokens / nbytes)
        return val_loss, val_bpb


# ----------------------------------------------------------------------------
# training data
# ----------------------------------------------------------------------------


class ShuffledSequenceLoader:
    """Sequences in shuffled order from the train shards; every rank owns its own shards."""

    def __init__(self, h: Hyperparameters, device: torch.device, seed: int = 0):
        self.world_size = h.world_size
        self.seq_len = h.train_seq_len
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"no train shards: {h.train_files}")
        self.files = all_files[h.rank :: h.world_size] or [all_files[h.rank % len(all_files)]]
        self.rng = np.random.Generator(np.random.PCG64(seed * 1000 + h.rank))
        self.num_tokens = [shard_num_tokens(f) for f in self.files]
        self.start_inds: list[list[int]] = [[] for _ in self.files]
        for si in range(len(self.files)):
            self._reset_shard(si)

    def _reset_shard(self, si: int) -> None:
        max_phase = min(self.seq_len - 1, max(0, self.num_tokens[si] - self.seq_len - 1))
        phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
        num_sequences = (self.num_tokens[si] - 1 - phase) // self.seq_len
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
            mm = shard_memmap(self.files[si])
            window = torch.from_numpy(np.array(mm[start : start + self.seq_len + 1], dtype=np.int64))
            x[bi] = window[:-1]
            y[bi] = window[1:]
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# ----------------------------------------------------------------------------
# model
# ----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    """fp32 weights, matmul in the dtype of the input"""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float = 10000.0, train_seq_len: int = 1024, rope_dims: int = 0):
        super().__init__()
        self.dim = dim
        self.base = base
        self.train_seq_len = train_seq_len
        self.rope_dims = rope_dims if rope_dims > 0 else dim
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos_cached is None or self._seq_len_cached != seq_len or self._cos_cached.device != device:
            rd = self.rope_dims
            # no buffer: model.bfloat16() would round the frequencies
            scale = max(seq_len / self.train_seq_len, 1.0)
            base = self.base * (scale ** (rd / (rd - 2)))
            inv_freq = 1.0 / (base ** (torch.arange(0, rd, 2, dtype=torch.float32, device=device) / rd))
            t = torch.arange(seq_len, device=device, dtype=inv_freq.dtype)
            freqs = torch.outer(t, inv_freq)
            self._cos_cached = freqs.cos()[None, :, None, :]
            self._sin_cached = freqs.sin()[None, :, None, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    if rope_dims < x.size(-1):
        x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
        half = rope_dims // 2
        x1, x2 = x_rope[..., :half], x_rope[..., half:]
        x_rope = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
        return torch.cat((x_rope, x_pass), dim=-1)
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, D] in and out"""
    if flash_attn_3 is not None:
        out = flash_attn_3(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None,
        is_causal=True,
        enable_gqa=(q.size(2) != k.size(2)),
    )
    return out.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float, train_seq_len: int
    ):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rope_dims = 0  # set by GPT
        self.rotary = Rotary(self.head_dim, base=rope_base, train_seq_len=train_seq_len)
        self.use_xsa = False  # set by GPT

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        # remove from each head's output what lies along its own value vector
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        y_g = y.reshape(B, T, Hkv, H // Hkv, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        along = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - along).reshape(B, T, H, D)

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
            y = self._xsa(y, v)
        return self.proj(y.reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: float, slope: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=self.slope).square())


class Block(nn.Module):
    def __init__(self, h: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = h.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(
            dim, h.num_heads, h.num_kv_heads, h.rope_base, h.qk_gain_init, h.rope_train_seq_len
        )
        self.mlp = MLP(dim, h.mlp_mult, h.leaky_slope)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = layer_idx >= h.parallel_residual_start

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor)
        attn_scale = self.attn_scale.to(dtype=x.dtype)[None, None, :]
        mlp_scale = self.mlp_scale.to(dtype=x.dtype)[None, None, :]
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
            return x_in + attn_scale * attn_out + mlp_scale * mlp_out
        x_out = x_in + attn_scale * attn_out
        return x_out + mlp_scale * self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)


class GPT(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        if h.logit_softcap <= 0.0:
            raise ValueError("logit_softcap must be positive")
        self.tie_embeddings = h.tie_embeddings
        self.tied_embed_init_std = h.tied_embed_init_std
        self.logit_softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.embedding_dim)
        if h.embedding_dim != h.model_dim:
            self.embed_proj = CastedLinear(h.embedding_dim, h.model_dim, bias=False)
            self.head_proj = CastedLinear(h.model_dim, h.embedding_dim, bias=False)
        else:
            self.embed_proj = None
            self.head_proj = None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        head_dim = h.model_dim // h.num_heads
        for block in self.blocks:
            block.attn.rope_dims = h.rope_dims if h.rope_dims > 0 else head_dim
            block.attn.rotary = Rotary(
                head_dim, base=h.rope_base, train_seq_len=h.rope_train_seq_len, rope_dims=block.attn.rope_dims
            )
        for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
            self.blocks[i].attn.use_xsa = True
        self.final_norm = RMSNorm()
        self.lm_head = None if h.tie_embeddings else CastedLinear(h.embedding_dim, h.vocab_size, bias=False)
        if self.lm_head is not None:
            self.lm_head._zero_init = True

        # depth recurrence: 0 1 2 [3 4 5] x (num_loops + 1) 6 ... 10
        self.looping_active = False
        if h.num_loops > 0:
            segment = list(range(h.loop_start, h.loop_end + 1))
            order = list(range(h.loop_start))
            for _ in range(h.num_loops + 1):
                order.extend(segment)
            order.extend(range(h.loop_end + 1, h.num_layers))
            cut = len(order) // 2
            self.looped_order = (order[:cut], order[cut:])
        else:
            cut = h.num_layers // 2
            self.looped_order = (list(range(cut)), list(range(cut, h.num_layers)))
        plain_cut = h.num_layers // 2
        self.plain_order = (list(range(plain_cut)), list(range(plain_cut, h.num_layers)))
        num_skips = min(len(self.looped_order[0]), len(self.looped_order[1]))
        self.num_skips = max(num_skips, min(len(self.plain_order[0]), len(self.plain_order[1])))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, h.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(self.num_skips, h.model_dim, dtype=torch.float32))
            if h.skip_gates_enabled
            else None
        )
        self._init_weights()

    def _init_weights(self) -> None:
        if self.tie_embeddings:
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
        if self.embed_proj is not None:
            x = self.embed_proj(x)
        x0 = x
        skips: list[Tensor] = []
        encoder, decoder = self.looped_order if self.looping_active else self.plain_order
        for i in encoder:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for skip_idx, i in enumerate(decoder):
            if skip_idx < self.num_skips and skips:
                skip = skips.pop()
                scaled = self.skip_weights[skip_idx].to(dtype=x.dtype)[None, None, :] * skip
                if self.skip_gates is not None:
                    g = torch.sigmoid(self.skip_gates[skip_idx].to(dtype=x.dtype))[None, None, :]
                    x = torch.lerp(scaled, x, g)
                else:
                    x = x + scaled
            x = self.blocks[i](x, x0)
        x = self.final_norm(x)
        if self.head_proj is not None:
            x = self.head_proj(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        if self.tie_embeddings:
            logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        else:
            logits = self.lm_head(x)
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.head(self.hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


CONTROL_TENSOR_NAME_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "skip_gate")


def is_control_tensor(name: str) -> bool:
    return any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)


def restore_fp32_params(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        if (param.ndim < 2 or is_control_tensor(name)) and param.dtype != torch.float32:
            param.data = param.data.float()


# ----------------------------------------------------------------------------
# optimisers
# ----------------------------------------------------------------------------


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
    """Muon with decoupled weight decay and optional row normalisation before the orthogonalisation."""

    def __init__(
        self,
        params,
        lr: float,
        momentum: float,
        backend_steps: int,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        row_normalize: bool = False,
    ):
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
                    if group["nesterov"]:
                        g = g.add(buf, alpha=momentum)
                    else:
                        g = buf
                    if group["row_normalize"]:
                        row_norms = g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7)
                        g = g / row_norms.to(g.dtype)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["weight_decay"] > 0.0:
                    p.data.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                curr += p.numel()
        return loss


class Optimizers:
    def __init__(self, h: Hyperparameters, base_model: GPT):
        block_named = list(base_model.blocks.named_parameters())
        matrix_params = [p for name, p in block_named if p.ndim == 2 and not is_control_tensor(name)]
        scalar_params = [p for name, p in block_named if p.ndim < 2 or is_control_tensor(name)]
        scalar_params.append(base_model.skip_weights)
        if base_model.skip_gates is not None:
            scalar_params.append(base_model.skip_gates)
        if base_model.embed_proj is not None:
            matrix_params.append(base_model.embed_proj.weight)
            matrix_params.append(base_model.head_proj.weight)
        token_lr = h.tied_embed_lr if h.tie_embeddings else h.embed_lr
        adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.tok = torch.optim.AdamW(
            [{"params": [base_model.tok_emb.weight], "lr": token_lr, "base_lr": token_lr}],
            weight_decay=h.embed_wd,
            **adam,
        )
        self.muon = Muon(
            matrix_params,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.scalar = torch.optim.AdamW(
            [{"params": scalar_params, "lr": h.scalar_lr, "base_lr": h.scalar_lr}], weight_decay=h.adam_wd, **adam
        )
        self.all = [self.tok, self.muon, self.scalar]
        if base_model.lm_head is not None:
            self.head = torch.optim.Adam(
                [{"params": [base_model.lm_head.weight], "lr": h.head_lr, "base_lr": h.head_lr}], **adam
            )
            self.all.insert(1, self.head)

    def __iter__(self):
        return iter(self.all)

    def zero_grad(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def set_scale(self, scale: float) -> None:
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self) -> None:
        for opt in self.all:
            opt.step()
        self.zero_grad()


class WeightAverage:
    """exponential moving average of the whole state, kept in fp32 on the device"""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({name: t.to(dtype=current[name].dtype) for name, t in self.shadow.items()}, strict=True)


# ----------------------------------------------------------------------------
# GPTQ
# ----------------------------------------------------------------------------


def classify_param(name: str) -> str:
    if "tok_emb" in name or "lm_head" in name:
        return "embed"
    if ".mlp." in name:
        return "mlp"
    if ".attn." in name or "embed_proj" in name or "head_proj" in name:
        return "attn"
    return "other"


class HessianCollector:
    """sums X^T X of the inputs of every matrix, and of the final hidden states for the tied head"""

    def __init__(self, model: GPT, device: torch.device):
        self.device = device
        self.hessians: dict[str, Tensor] = {}
        self.rows: dict[str, float] = {}
        self.hooks = []
        self.active = False
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
                self.hooks.append(module.register_forward_hook(self._on_input(name + ".weight")))
        if model.tie_embeddings:
            source = model.head_proj if model.head_proj is not None else model.final_norm
            self.hooks.append(source.register_forward_hook(self._on_output("tok_emb.weight")))

    def _accumulate(self, key: str, t: Tensor) -> None:
        if not self.active:
            return
        t = t.detach().float()
        if t.ndim == 3:
            t = t.reshape(-1, t.shape[-1])
        if key not in self.hessians:
            self.hessians[key] = torch.zeros(t.shape[1], t.shape[1], dtype=torch.float32, device=self.device)
            self.rows[key] = 0.0
        self.hessians[key].addmm_(t.T, t)
        self.rows[key] += t.shape[0]

    def _on_input(self, key: str):
        def hook(module, inputs, output):
            self._accumulate(key, inputs[0])

        return hook

    def _on_output(self, key: str):
        def hook(module, inputs, output):
            self._accumulate(key, output)

        return hook

    def finish(self) -> dict[str, Tensor]:
        for hook in self.hooks:
            hook.remove()
        out = {}
        for key in sorted(self.hessians):
            H = self.hessians[key]
            n = torch.tensor([self.rows[key]], dtype=torch.float64, device=self.device)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(H, op=dist.ReduceOp.SUM)
                dist.all_reduce(n, op=dist.ReduceOp.SUM)
            out[key] = (H / n.item()).cpu()
        return out


@torch.no_grad()
def sample_sequences(model: GPT, h: Hyperparameters, device: torch.device, count: int, length: int, seed: int) -> Tensor:
    """plain ancestral sampling without a KV cache, short on purpose"""
    gen = torch.Generator(device=device).manual_seed(seed)
    ids = torch.randint(0, h.vocab_size, (count, 1), device=device, generator=gen)
    for _ in range(length):
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = model.forward_logits(ids)[:, -1].float()
        probs = torch.softmax(logits / 0.8, dim=-1)
        ids = torch.cat((ids, torch.multinomial(probs, 1, generator=gen)), dim=1)
    return ids


def calibration_inputs(h: Hyperparameters, model: GPT, device: torch.device):
    """yields input batches for the Hessians"""
    if h.calib_source == "train":
        loader = ShuffledSequenceLoader(h, device, seed=h.seed + 101)
        for _ in range(h.gptq_calibration_batches):
            x, _y = loader.next_batch(h.train_batch_tokens, 8 // h.world_size * 6)
            yield x
    elif h.calib_source == "selfgen":
        for i in range(h.gptq_calibration_batches):
            yield sample_sequences(model, h, device, count=64, length=128, seed=h.seed * 7919 + i * h.world_size + h.rank)
    else:
        raise ValueError(f"CALIB_SOURCE={h.calib_source}")


def collect_hessians(h: Hyperparameters, model: GPT, device: torch.device, seconds: float) -> dict[str, Tensor]:
    """seconds: what is left of the training budget; collection stops before it is spent"""
    t0 = time.perf_counter()
    model.eval()
    collector = HessianCollector(model, device)
    batches = 0
    with torch.no_grad():
        for x in calibration_inputs(h, model, device):
            if time.perf_counter() - t0 > seconds - h.gptq_margin_seconds:
                break
            collector.active = True
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.forward_logits(x)
            collector.active = False
            torch.cuda.synchronize()
            batches += 1
    hessians = collector.finish()
    torch.cuda.synchronize()
    log(f"gptq:{len(hessians)} hessians from {batches} batches ({h.calib_source}) in {time.perf_counter() - t0:.1f}s")
    return hessians


def row_scales(w: Tensor, clip_sigmas: float, clip_range: int) -> Tensor:
    """SDClip: a row's range is a multiple of its standard deviation"""
    std = w.std(dim=1)
    return (clip_sigmas * std / clip_range).clamp_min(1e-7).to(torch.float16)


def gptq_quantize_weight(
    w: Tensor, H: Tensor, clip_sigmas: float, clip_range: int, block_size: int, damp: float
) -> tuple[Tensor, Tensor]:
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    H.diagonal().add_(damp * H.diag().mean())

    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_perm = W_orig[:, perm].clone()
    W_perm[:, dead[perm]] = 0
    H = H[perm][:, perm]

    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)

    s = row_scales(W_orig, clip_sigmas, clip_range)
    sf = s.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W_orig.device)
    W_work = W_perm.clone()
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W_block = W_work[:, i1:i2].clone()
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
            W_work[:, i2:] -= Err @ Hinv[i1:i2, i2:]
    return Q[:, invperm], s


def quantize_state(state_dict: dict[str, Tensor], hessians: dict[str, Tensor], h: Hyperparameters, device: torch.device):
    result: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for name, tensor in state_dict.items():
        t = tensor.detach().cpu().contiguous()
        if not t.is_floating_point() or t.numel() <= 65536 or is_control_tensor(name):
            result[name] = t.to(torch.float16) if t.is_floating_point() else t
            meta[name] = "passthrough"
            continue
        is_embed = classify_param(name) == "embed"
        sigmas = h.embed_clip_sigmas if is_embed else h.matrix_clip_sigmas
        bits = h.embed_bits if is_embed else h.matrix_bits
        q, s = gptq_quantize_weight(
            t.to(device),
            hessians[name].to(device),
            sigmas,
            2 ** (bits - 1) - 1,
            h.gptq_block_size,
            h.gptq_damp,
        )
        result[name + ".q"] = q.cpu()
        result[name + ".scale"] = s.cpu()
        meta[name] = f"gptq int{bits}"
    kinds = collections.defaultdict(list)
    for name, kind in meta.items():
        kinds[kind].append(re.sub(r"\.\d+\.", ".", name))
    log("quantized weights:")
    for kind in sorted(kinds):
        log(f"  {kind}: {', '.join(sorted(set(kinds[kind])))}")
    return result, meta


def dequantize_state(result: dict[str, Tensor], meta: dict[str, str], template: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, orig in template.items():
        info = meta.get(name)
        if info is None:
            continue
        if info == "passthrough":
            out[name] = result[name].to(orig.dtype)
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        out[name] = (q.float() * s.float().view(q.shape[0], *([1] * (q.ndim - 1)))).to(orig.dtype)
    return out


# ----------------------------------------------------------------------------
# artifact
# ----------------------------------------------------------------------------

_SHUFFLE_TAG = b"BSHF"


def byte_shuffle(data: bytes, stride: int = 2) -> bytes:
    """de-interleaves: all bytes at 0 mod stride, then 1 mod stride, ..."""
    src = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(len(src), dtype=np.uint8)
    at = 0
    for pos in range(stride):
        part = src[pos::stride]
        out[at : at + len(part)] = part
        at += len(part)
    return _SHUFFLE_TAG + bytes([stride]) + out.tobytes()


def byte_unshuffle(data: bytes) -> bytes:
    if data[:4] != _SHUFFLE_TAG:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    n = len(payload)
    out = np.empty(n, dtype=np.uint8)
    at = 0
    for pos in range(stride):
        length = n // stride + (1 if pos < n % stride else 0)
        out[pos::stride][:length] = payload[at : at + length]
        at += length
    return out.tobytes()


def pack(obj) -> bytes:
    buf = io.BytesIO()
    torch.save(obj, buf)
    return brotli.compress(byte_shuffle(buf.getvalue()), quality=11)


def unpack(blob: bytes):
    return torch.load(io.BytesIO(byte_unshuffle(brotli.decompress(blob))), map_location="cpu")


def serialize(h: Hyperparameters, model: GPT, hessians: dict[str, Tensor], device: torch.device, code: str) -> int:
    code_bytes = len(code.encode("utf-8"))
    quantized, meta = quantize_state(model.state_dict(), hessians, h, device)
    total = 0
    if h.is_main_process:
        torch.save(model.state_dict(), h.model_path)
        log(f"Serialized model: {os.path.getsize(h.model_path)} bytes")
        blob = pack({"w": quantized, "m": meta})
        with open(h.quantized_model_path, "wb") as f:
            f.write(blob)
        model_bytes = os.path.getsize(h.quantized_model_path)
        total = code_bytes + model_bytes
        log(f"Code size: {code_bytes} bytes")
        log(f"Serialized model int{h.matrix_bits}+brotli: {model_bytes} bytes")
        log(f"Total submission size: {total} bytes")
        if total > h.size_limit:
            raise RuntimeError(f"artifact too big: {total} > {h.size_limit}")
    if h.distributed:
        dist.barrier()
    return total


def deserialize(h: Hyperparameters, device: torch.device) -> GPT:
    """the model that is scored: from the artifact and nothing else"""
    model = GPT(h).to(device).bfloat16()
    restore_fp32_params(model)
    state = unpack(Path(h.quantized_model_path).read_bytes())
    template = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    model.load_state_dict(dequantize_state(state["w"], state["m"], template), strict=True)
    model.looping_active = h.num_loops > 0
    return model


# ----------------------------------------------------------------------------
# evaluation
# ----------------------------------------------------------------------------


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """per-token nats, same shape as targets"""
    flat = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="none")
    return flat.reshape(targets.shape)


def gather_windows(val: ValidationData, spans: list[tuple[int, int, int]], rows: int, seq_len: int, device: torch.device):
    """spans: (start, end, first scored position). Rows are padded on the right; the mask holds what counts."""
    x = torch.zeros(rows, seq_len, dtype=torch.int64)
    y = torch.zeros(rows, seq_len, dtype=torch.int64)
    mask = torch.zeros(rows, seq_len, dtype=torch.bool)
    for i, (start, end, first) in enumerate(spans):
        n = end - start
        piece = val.tokens[start : end + 1].to(torch.int64)
        x[i, :n] = piece[:-1]
        y[i, :n] = piece[1:]
        mask[i, first - start : n] = True
    return x.to(device), y.to(device), mask.to(device)


def disjoint_spans(num_targets: int, seq_len: int) -> list[tuple[int, int, int]]:
    return [(s, min(s + seq_len, num_targets), s) for s in range(0, num_targets, seq_len)]


def sliding_spans(num_targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """The first window scores everything it holds, every later one its last `stride` targets (fewer at the end)."""
    context = seq_len - stride
    spans = [(0, min(seq_len, num_targets), 0)]
    for start in range(stride, num_targets - context, stride):
        end = min(start + seq_len, num_targets)
        spans.append((start, end, start + context))
    return spans


def rank_share(items: list, h: Hyperparameters) -> list:
    n = len(items)
    return items[n * h.rank // h.world_size : n * (h.rank + 1) // h.world_size]


def score_spans(h: Hyperparameters, device: torch.device, val: ValidationData, logits_fn, spans: list, tally: Tally) -> None:
    rows = h.eval_batch_windows
    with torch.no_grad():
        for bi in range(0, len(spans), rows):
            x, y, mask = gather_windows(val, spans[bi : bi + rows], rows, h.eval_seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = token_nll(logits, y)
            tally.add(nll, val.target_bytes(x, y), mask)


def eval_val(h: Hyperparameters, device: torch.device, val: ValidationData, model: GPT) -> tuple[float, float]:
    """quick figure over disjoint windows"""
    model.eval()
    tally = Tally(device)
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    spans = rank_share(disjoint_spans(val.num_targets, h.eval_seq_len), h)
    score_spans(h, device, val, logits_fn, spans, tally)
    model.train()
    return tally.reduce().result()


def eval_val_sliding(h: Hyperparameters, device: torch.device, val: ValidationData, model: GPT) -> tuple[float, float]:
    model.eval()
    tally = Tally(device)
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    spans = sliding_spans(val.num_targets, h.eval_seq_len, h.eval_stride)
    score_spans(h, device, val, logits_fn, rank_share(spans, h), tally)
    return tally.reduce().result()


def chunk_plan(h: Hyperparameters, num_targets: int) -> list[list[tuple[int, int, int]]]:
    """windows by the chunk in which their scored targets lie"""
    if h.ttt_chunk_tokens % h.eval_stride or h.ttt_chunk_tokens % h.eval_seq_len:
        raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE and EVAL_SEQ_LEN")
    num_chunks = (num_targets + h.ttt_chunk_tokens - 1) // h.ttt_chunk_tokens
    plan: list[list[tuple[int, int, int]]] = [[] for _ in range(num_chunks)]
    for span in sliding_spans(num_targets, h.eval_seq_len, h.eval_stride):
        plan[span[2] // h.ttt_chunk_tokens].append(span)
    return plan


def ttt_parameters(h: Hyperparameters, model: GPT) -> list[nn.Parameter]:
    frozen = {f"blocks.{i}." for i in range(h.ttt_freeze_blocks)}
    params = []
    for name, p in model.named_parameters():
        p.requires_grad_(not any(name.startswith(prefix) for prefix in frozen))
        if p.requires_grad:
            params.append(p)
    return params


class ChunkTrainer:
    """SGD on a chunk of the stream, the gradient summed over ranks"""

    def __init__(self, h: Hyperparameters, device: torch.device, val: ValidationData, model: GPT):
        self.h = h
        self.device = device
        self.val = val
        self.model = model
        self.params = ttt_parameters(h, model)
        self.opt = torch.optim.SGD(self.params, lr=h.ttt_lr, momentum=h.ttt_momentum)
        self.loss_fn = torch.compile(model, dynamic=False, fullgraph=True)

    def set_lr(self, done: float) -> float:
        lr = self.h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * done))
        for group in self.opt.param_groups:
            group["lr"] = lr
        return lr

    def fit(self, begin: int, end: int) -> None:
        """on the targets begin .. end - 1, whose last token is tokens[end]"""
        h = self.h
        count = (end - begin) // h.eval_seq_len
        if count == 0:
            return
        chunk = self.val.tokens[begin : begin + count * h.eval_seq_len + 1].to(device=self.device, dtype=torch.int64)
        x_all = chunk[:-1].view(count, h.eval_seq_len)
        y_all = chunk[1:].view(count, h.eval_seq_len)
        self.model.train()
        for _epoch in range(h.ttt_epochs):
            for b in range(0, count, h.ttt_batch_seqs):
                stop = min(b + h.ttt_batch_seqs, count)
                mine = list(range(b + h.rank, stop, h.world_size))
                self.opt.zero_grad(set_to_none=True)
                if mine:
                    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                        loss = self.loss_fn(x_all[mine], y_all[mine])
                    (loss * (len(mine) / (stop - b))).backward()
                self._sync_grads()
                torch.nn.utils.clip_grad_norm_(self.params, h.ttt_grad_clip)
                self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.model.eval()

    def _sync_grads(self) -> None:
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if self.h.distributed:
                dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)


def eval_val_ttt(h: Hyperparameters, device: torch.device, val: ValidationData, model: GPT) -> tuple[float, float]:
    """Score-first: a chunk is scored with the weights that the chunks before it left, then trained on."""
    torch.manual_seed(h.seed)
    t0 = time.perf_counter()
    plan = chunk_plan(h, val.num_targets)
    num_chunks = len(plan)
    trainer = ChunkTrainer(h, device, val, model)
    model.eval()
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    tally = Tally(device)
    log(f"ttt:start chunks:{num_chunks} chunk_tokens:{h.ttt_chunk_tokens} lr:{h.ttt_lr} epochs:{h.ttt_epochs}")
    for ci, spans in enumerate(plan):
        begin = ci * h.ttt_chunk_tokens
        end = min(begin + h.ttt_chunk_tokens, val.num_targets)

        score_spans(h, device, val, logits_fn, rank_share(spans, h), tally)

        if ci + 1 < num_chunks:
            trainer.set_lr(ci / max(num_chunks - 1, 1))
            trainer.fit(begin, end)
        if ci % 200 == 0 or ci + 1 == num_chunks:
            log(f"  ttt_chunk [{ci + 1}/{num_chunks}] bpb={tally.running_bpb():.6f} time={time.perf_counter() - t0:.1f}s")
    for p in model.parameters():
        p.requires_grad_(True)
    return tally.reduce().result()


def timed_eval(label: str, fn, *args) -> tuple[float, float]:
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms")
    return val_loss, val_bpb


# ----------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------


class Schedule:
    """what depends on how much of the time is spent"""

    def __init__(self, h: Hyperparameters):
        self.h = h
        self.budget_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
        if self.budget_ms <= 0:
            raise ValueError("the reserve is longer than the training budget")

    def frac(self, step: int, elapsed_ms: float) -> float:
        return max(step / max(self.h.iterations, 1), elapsed_ms / self.budget_ms)

    def lr_scale(self, frac: float) -> float:
        if self.h.warmdown_frac <= 0:
            return 1.0
        if frac >= 1.0 - self.h.warmdown_frac:
            return max((1.0 - frac) / self.h.warmdown_frac, self.h.min_lr)
        return 1.0

    def momentum(self, step: int) -> float:
        h = self.h
        if h.muon_momentum_warmup_steps <= 0:
            return h.muon_momentum
        f = min(step / h.muon_momentum_warmup_steps, 1.0)
        return (1 - f) * h.muon_momentum_warmup_start + f * h.muon_momentum

    def spent(self, elapsed_ms: float) -> bool:
        return elapsed_ms >= self.budget_ms


class Trainer:
    def __init__(self, h: Hyperparameters, device: torch.device, val: ValidationData):
        self.h = h
        self.device = device
        self.val = val
        self.base_model = GPT(h).to(device).bfloat16()
        restore_fp32_params(self.base_model)
        compiled = torch.compile(self.base_model, dynamic=False, fullgraph=True)
        if h.distributed:
            self.model = DDP(compiled, device_ids=[h.local_rank], broadcast_buffers=False)
        else:
            self.model = compiled
        self.optimizers = Optimizers(h, self.base_model)
        self.schedule = Schedule(h)
        self.loader = ShuffledSequenceLoader(h, device, seed=h.seed)
        self.elapsed_ms = 0.0
        log(f"model_params:{sum(p.numel() for p in self.base_model.parameters())}")
        log(f"train_shards (this rank):{len(self.loader.files)}")

    def recurrence(self, on: bool) -> None:
        self.base_model.looping_active = on

    def train_step(self, step: int, lr_scale: float) -> Tensor:
        h = self.h
        self.optimizers.zero_grad()
        train_loss = torch.zeros((), device=self.device)
        for micro_step in range(h.grad_accum_steps):
            if h.distributed:
                self.model.require_backward_grad_sync = micro_step == h.grad_accum_steps - 1
            x, y = self.loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = self.model(x, y)
            train_loss += loss.detach()
            (loss / h.grad_accum_steps).backward()
        train_loss /= h.grad_accum_steps

        momentum = self.schedule.momentum(step)
        for group in self.optimizers.muon.param_groups:
            group["momentum"] = momentum
        self.optimizers.set_scale(lr_scale)
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.base_model.parameters(), h.grad_clip_norm)
        self.optimizers.step()
        return train_loss

    def compile_warmup(self) -> None:
        """runs both graphs a few times on train data, then puts everything back as it was"""
        h = self.h
        if h.warmup_steps <= 0:
            return
        model_state = {n: t.detach().cpu().clone() for n, t in self.base_model.state_dict().items()}
        opt_states = [copy.deepcopy(opt.state_dict()) for opt in self.optimizers]
        self.model.train()
        for phase, on in (("plain", False), ("looped", True)):
            if on and h.num_loops == 0:
                continue
            self.recurrence(on)
            for step in range(h.warmup_steps):
                self.train_step(step, 1.0)
            log(f"warmup:{phase} {h.warmup_steps} steps")
        self.recurrence(False)
        self.base_model.load_state_dict(model_state, strict=True)
        for opt, state in zip(self.optimizers, opt_states, strict=True):
            opt.load_state_dict(state)
        self.optimizers.zero_grad()
        self.loader = ShuffledSequenceLoader(h, self.device, seed=h.seed)

    def run(self) -> None:
        h = self.h
        self.compile_warmup()
        self.average = WeightAverage(self.base_model, h.ema_decay)
        stop_after_step: int | None = None
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        step = 0
        while True:
            last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
            if last_step or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
                torch.cuda.synchronize()
                self.elapsed_ms += 1000.0 * (time.perf_counter() - t0)
                val_loss, val_bpb = eval_val(h, self.device, self.val, self.base_model)
                log(f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}")
                torch.cuda.synchronize()
                t0 = time.perf_counter()
            if last_step:
                log(f"stopping train_time: {self.elapsed_ms:.0f}ms step: {step}/{h.iterations}")
                break

            now_ms = self.elapsed_ms + 1000.0 * (time.perf_counter() - t0)
            frac = self.schedule.frac(step, now_ms)
            if h.num_loops > 0 and not self.base_model.looping_active and frac >= h.enable_looping_at:
                self.recurrence(True)
                log(f"recurrence on at step {step} order:{self.base_model.looped_order}")
            train_loss = self.train_step(step, self.schedule.lr_scale(frac))
            self.average.update(self.base_model)
            step += 1

            now_ms = self.elapsed_ms + 1000.0 * (time.perf_counter() - t0)
            if step <= 5 or step % h.train_log_every == 0:
                tok_per_sec = step * h.train_batch_tokens / (now_ms / 1000.0)
                log(
                    f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} "
                    f"train_time: {now_ms / 60000:.1f}m tok/s: {tok_per_sec:.0f}"
                )
            if stop_after_step is None and self._all_ranks(self.schedule.spent(now_ms)):
                stop_after_step = step
        log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    def _all_ranks(self, flag: bool) -> bool:
        if not self.h.distributed:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def finish(self) -> dict[str, Tensor]:
        """averaged weights into the model; Hessians within what is left of the 600 s"""
        log("ema:applying EMA weights")
        t0 = time.perf_counter()
        self.average.copy_to(self.base_model)
        self.recurrence(self.h.num_loops > 0)
        torch.cuda.synchronize()
        self.elapsed_ms += 1000.0 * (time.perf_counter() - t0)
        left = self.h.max_wallclock_seconds - self.elapsed_ms / 1000.0
        t0 = time.perf_counter()
        hessians = collect_hessians(self.h, self.base_model, self.device, left)
        self.elapsed_ms += 1000.0 * (time.perf_counter() - t0)
        log(f"train+calibration: {self.elapsed_ms:.0f}ms of {1000 * self.h.max_wallclock_seconds:.0f}ms")
        return hessians


# ----------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def describe(h: Hyperparameters, code: str) -> None:
    os.makedirs("logs", exist_ok=True)
    log(100 * "=", console=False)
    log("Hyperparameters:")
    for k in sorted(dir(type(h))):
        if not k.startswith("_"):
            log(f"  {k}: {getattr(h, k)}")
    log(100 * "=", console=False)
    log(code, console=False)
    log(100 * "=", console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)


def train_and_pack(h: Hyperparameters, device: torch.device, val: ValidationData, code: str) -> None:
    trainer = Trainer(h, device, val)
    trainer.run()
    hessians = trainer.finish()
    timed_eval("pre-quantization post-ema", eval_val, h, device, val, trainer.base_model)
    serialize(h, trainer.base_model, hessians, device, code)


def evaluate_artifact(h: Hyperparameters, device: torch.device, val: ValidationData) -> tuple[float, float]:
    clock = time.perf_counter()
    model = deserialize(h, device)
    val_loss, val_bpb = timed_eval("quantized", eval_val, h, device, val, model)
    if h.sliding_window_enabled:
        val_loss, val_bpb = timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val, model)
    if h.ttt_enabled:
        del model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        ttt_model = deserialize(h, device)
        val_loss, val_bpb = timed_eval("quantized_ttt", eval_val_ttt, h, device, val, ttt_model)
        del ttt_model
    log(f"evaluation took {time.perf_counter() - clock:.1f}s")
    return val_loss, val_bpb


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    h = Hyperparameters()
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
    torch._dynamo.config.cache_size_limit = 32

    set_logging_hparams(h)
    describe(h, code)
    seed_everything(h.seed)

    val = ValidationData(h, device)
    log(f"val_tokens: {val.tokens.numel()} targets: {val.num_targets}")

    train_and_pack(h, device, val, code)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    seed_everything(h.seed)
    val_loss, val_bpb = evaluate_artifact(h, device, val)
    log(f"final val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")

    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
