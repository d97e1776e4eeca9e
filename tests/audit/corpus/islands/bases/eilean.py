"""
11L 3xMLP int6: partial RoPE, LN scale, XSA on the last four layers, shared value embedding, SmearGate, bigram hash,
EMA, warmdown, late QAT, GPTQ-lite clip search, zstd-22, sliding window and legal score-first TTT.

torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
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
import zstandard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func
except ImportError:
    flash_attn_3_func = None

# -----------------------------
# HYPERPARAMETERS
# -----------------------------


class Hyperparameters:
    # Data paths are shard globs produced by the existing preprocessing pipeline.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation cadence. Training-time validation only prints; nothing reads it.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    bos_id = int(os.environ.get("BOS_ID", 1))
    bigram_vocab_size = int(os.environ.get("BIGRAM_VOCAB_SIZE", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    ve_dim = int(os.environ.get("VE_DIM", 128))
    ve_layers = os.environ.get("VE_LAYERS", "9,10")

    # Optimizer.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # Averaging and quantization.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    late_qat_threshold = float(os.environ.get("LATE_QAT_THRESHOLD", 0.15))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))

    # Evaluation.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 2e-4))
    ttt_wd = float(os.environ.get("TTT_WD", 0.0))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32_768))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------


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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay),
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
                    g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()

            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)

            curr = 0
            for p in params:
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                curr += p.numel()
        return None


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION
# -----------------------------


def build_sentencepiece_luts(
    sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    sp_vocab_size = int(sp.vocab_size())
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
        if piece.startswith("▁"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


def count_token_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """UTF-8 bytes of each target. The space of a leading mark is a byte unless the text starts there."""
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
    return token_bytes.to(torch.float64)


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is too short")
    return tokens


def bpb_from_sums(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    val_loss = (loss_sum / token_count).item()
    val_bpb = loss_sum.item() / math.log(2.0) / byte_count.item()
    return val_loss, val_bpb


def eval_val(
    args: Hyperparameters,
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Plain non-overlapping validation, for the training log and the roundtrip line."""
    seq_len = args.eval_seq_len
    local_batch_seqs = max(args.val_batch_size // world_size // seq_len, 1)
    total_seqs = (val_tokens.numel() - 1) // seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    with torch.no_grad():
        for batch_seq_start in range(seq_start, seq_end, local_batch_seqs):
            batch_seq_end = min(batch_seq_start + local_batch_seqs, seq_end)
            raw_start = batch_seq_start * seq_len
            raw_end = batch_seq_end * seq_len + 1
            local = val_tokens[raw_start:raw_end].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                batch_loss = model(x, y).detach()
            batch_token_count = float(y.numel())
            val_loss_sum += batch_loss.to(torch.float64) * batch_token_count
            val_token_count += batch_token_count
            val_byte_count += count_token_bytes(x.reshape(-1), y.reshape(-1), luts).sum()

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(val_loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_byte_count, op=dist.ReduceOp.SUM)
    model.train()
    return bpb_from_sums(val_loss_sum, val_token_count, val_byte_count)


# -----------------------------
# QUANTIZATION
# -----------------------------

CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,mlp_scale,resid_mix,q_gain,skip_weight,smear.gate,bigram.scale,ve_shared.scale,ve_layer_scales",
    ).split(",")
    if pattern
)
INT6_CATEGORIES = frozenset(os.environ.get("INT6_CATEGORIES", "mlp,attn").split(","))
INT6_CLIP_QUANTILES = (0.9990, 0.9995, 0.9999, 0.99999, 1.0)
INT8_CLIP_Q = 0.9999984


def tensor_category(name: str) -> str:
    if "tok_emb" in name or "bigram.embed" in name or "ve_shared.embed" in name:
        return "embed"
    if ".mlp." in name:
        return "mlp"
    if ".attn." in name:
        return "attn"
    return "other"


def quantize_int6_per_row(t: Tensor, clip_range: int = 31) -> tuple[Tensor, Tensor]:
    """GPTQ-lite: per row the clip quantile with the least squared error of the weights. Needs no data."""
    t32 = t.float()
    if t32.ndim != 2:
        amax = t32.abs().max().item()
        scale = torch.tensor(amax / clip_range if amax > 0 else 1.0, dtype=torch.float16)
        q = torch.clamp(torch.round(t32 / scale.float()), -clip_range, clip_range).to(torch.int8)
        return q, scale
    best_q = torch.zeros_like(t32, dtype=torch.int8)
    best_s = torch.ones(t32.shape[0], dtype=torch.float16)
    best_err = torch.full((t32.shape[0],), float("inf"))
    for quantile in INT6_CLIP_QUANTILES:
        row_clip = torch.quantile(t32.abs(), quantile, dim=1) if quantile < 1.0 else t32.abs().amax(dim=1)
        s = (row_clip / clip_range).clamp_min(1.0 / 16384.0).to(torch.float16)
        q = torch.clamp(torch.round(t32 / s.float()[:, None]), -clip_range, clip_range)
        err = (t32 - q * s.float()[:, None]).square().mean(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_s = torch.where(better, s, best_s)
        best_q = torch.where(better[:, None], q.to(torch.int8), best_q)
    return best_q, best_s


def quantize_float_tensor(t: Tensor) -> tuple[Tensor, Tensor]:
    t32 = t.float()
    if t32.ndim == 2:
        clip_abs = torch.quantile(t32.abs(), INT8_CLIP_Q, dim=1)
        clipped = torch.maximum(torch.minimum(t32, clip_abs[:, None]), -clip_abs[:, None])
        scale = (clip_abs / 127.0).clamp_min(1.0 / 127.0 / 256.0)
        q = torch.clamp(torch.round(clipped / scale[:, None]), -127, 127).to(torch.int8).contiguous()
        return q, scale.to(dtype=torch.float16).contiguous()
    clip_abs = float(torch.quantile(t32.abs().flatten(), INT8_CLIP_Q).item()) if t32.numel() else 0.0
    scale = torch.tensor(clip_abs / 127.0 if clip_abs > 0 else 1.0, dtype=torch.float32)
    q = torch.clamp(torch.round(torch.clamp(t32, -clip_abs, clip_abs) / scale), -127, 127).to(torch.int8).contiguous()
    return q, scale


def mixed_quantize_int6(
    state_dict: dict[str, Tensor], int6_cats: frozenset[str]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    result: dict[str, Tensor] = {}
    meta: dict[str, object] = {}
    for name, tensor in state_dict.items():
        t = tensor.detach().cpu().contiguous()
        if any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            result[name] = t.float()
            meta[name] = "passthrough_ctrl"
        elif not t.is_floating_point() or t.numel() <= 65536:
            result[name] = t.to(torch.float16) if t.is_floating_point() else t
            meta[name] = "passthrough"
        elif tensor_category(name) in int6_cats:
            q, s = quantize_int6_per_row(t)
            result[name + ".q"] = q
            result[name + ".scale"] = s
            meta[name] = {"type": "int6"}
        else:
            q, s = quantize_float_tensor(t)
            result[name + ".q"] = q
            result[name + ".scale"] = s
            meta[name] = {"type": "int8"}
    return result, meta


def dequantize_mixed_int6(
    result: dict[str, Tensor], meta: dict[str, object], template_sd: dict[str, Tensor]
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, orig in template_sd.items():
        info = meta[name]
        if info in ("passthrough", "passthrough_ctrl"):
            out[name] = result[name].to(orig.dtype)
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        if s.ndim > 0:
            out[name] = (q.float() * s.float().view(q.shape[0], *([1] * (q.ndim - 1)))).to(orig.dtype)
        else:
            out[name] = (q.float() * float(s.item())).to(orig.dtype)
    return out


# -----------------------------
# DATA LOADING
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    # SHARD HEADER INTS & SHARD_MAGIC
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


class TokenStream:
    # Reads shards sequentially and wraps around forever.
    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.file_idx = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def _advance_file(self) -> None:
        self.file_idx = (self.file_idx + 1) % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        chunks: list[Tensor] = []
        remaining = n
        while remaining > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self._advance_file()
                continue
            k = min(remaining, avail)
            chunks.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            remaining -= k
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class DistributedTokenLoader:
    # Each call consumes a contiguous chunk from the shared stream, then slices out one disjoint span per rank.
    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * self.world_size)
        start = self.rank * per_rank_span
        local = chunk[start : start + per_rank_span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# TRANSFORMER MODULES
# -----------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    # Weights stay fp32 for the optimizer and are cast at matmul time. With `qat` on, the forward pass sees the
    # int6 grid and the gradient passes straight through.
    qat: bool = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)
        if self.qat and self.training and w.ndim == 2:
            with torch.no_grad():
                w32 = self.weight.float()
                scale = (w32.abs().amax(dim=1) / 31.0).clamp_min(1.0 / 16384.0)
                w_q = (torch.clamp(torch.round(w32 / scale[:, None]), -31, 31) * scale[:, None]).to(x.dtype)
            w = w + (w_q - w).detach()
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


def set_late_qat(module: nn.Module, enabled: bool) -> None:
    for m in module.modules():
        if isinstance(m, CastedLinear):
            m.qat = enabled


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if (param.ndim < 2 or control) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Partial RoPE: only the first `rope_dims` of each head turn.
    def __init__(self, rope_dims: int, base: float = 10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos_cached is None or self._seq_len_cached != seq_len or self._cos_cached.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos_cached = freqs.cos()[None, :, None, :]
            self._sin_cached = freqs.sin()[None, :, None, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, rope_dims: int, qk_gain_init: float
    ):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = rope_dims if rope_dims > 0 else self.head_dim
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, base=rope_base)
        self.use_xsa = False

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        # Exclusive self attention: take out of each head's output its part along the token's own value.
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        y_g = y.reshape(B, T, Hkv, H // Hkv, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, T, H, D)

    def forward(self, x: Tensor, v_embed: Tensor | None = None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = self.c_v(x)
        if v_embed is not None:
            v = v + v_embed
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        if flash_attn_3_func is not None:
            y = flash_attn_3_func(q, k, v, causal=True)
        else:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                is_causal=True,
                enable_gqa=(self.num_kv_heads != self.num_heads),
            ).transpose(1, 2)
        if self.use_xsa:
            y = self._xsa(y, v)
        return self.proj(y.reshape(bsz, seqlen, dim))


class SmearGate(nn.Module):
    """Blends each position with the one before it; never across the start of a document."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate.to(dtype=x.dtype))[None, None, :]
        x_prev = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        inside = (input_ids != self.bos_id).to(x.dtype).unsqueeze(-1)
        return x + inside * g * (x_prev - x)


class BigramHashEmbedding(nn.Module):
    def __init__(self, bigram_vocab_size: int, bigram_dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.bigram_vocab_size = bigram_vocab_size
        self.bos_id = bos_id
        self.embed = nn.Embedding(bigram_vocab_size, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bigram_hash(self, tokens: Tensor) -> Tensor:
        t = tokens.to(torch.int32)
        mod = self.bigram_vocab_size - 1
        out = torch.full_like(t, mod)
        out[..., 1:] = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % mod
        return torch.where(t == self.bos_id, torch.full_like(out, mod), out).long()

    def forward(self, token_ids: Tensor) -> Tensor:
        h = self.proj(self.embed(self.bigram_hash(token_ids)))
        return h * self.scale.to(dtype=h.dtype)


class ValueEmbedding(nn.Module):
    def __init__(self, vocab_size: int, ve_dim: int, kv_dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, ve_dim)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.proj = CastedLinear(ve_dim, kv_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.1, dtype=torch.float32))

    def forward(self, token_ids: Tensor) -> Tensor:
        h = self.proj(self.embed(token_ids))
        return h * self.scale.to(dtype=h.dtype)


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.fc(x), negative_slope=0.5)
        return self.proj(x.square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(
            dim, args.num_heads, args.num_kv_heads, args.rope_base, args.rope_dims, args.qk_gain_init
        )
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if args.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, v_embed: Tensor | None = None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_scale_factor, v_embed=v_embed)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        mlp_out = self.mlp(self.mlp_norm(x) * self.ln_scale_factor)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramHashEmbedding(args.bigram_vocab_size, args.bigram_dim, args.model_dim, args.bos_id)
        self.smear = SmearGate(args.model_dim, args.bos_id)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        for i in range(max(0, args.num_layers - args.xsa_last_n), args.num_layers):
            self.blocks[i].attn.use_xsa = True
        self.ve_layer_indices = [int(i) for i in args.ve_layers.split(",") if i.strip()]
        kv_dim = args.num_kv_heads * (args.model_dim // args.num_heads)
        self.ve_shared = ValueEmbedding(args.vocab_size, args.ve_dim, kv_dim)
        self.ve_layer_scales = nn.ParameterList(
            [nn.Parameter(torch.ones(1, dtype=torch.float32)) for _ in self.ve_layer_indices]
        )
        self.final_norm = RMSNorm()
        self._init_weights(args.tied_embed_init_std)

    def _init_weights(self, tied_embed_init_std: float) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=tied_embed_init_std)
        num_layers = len(self.blocks)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight, gain=1.0)
                    if name.endswith("c_v"):
                        with torch.no_grad():
                            module.weight.mul_(1.0 / math.sqrt(2 * num_layers))

    def _run_block(self, i: int, x: Tensor, x0: Tensor, ve_base: Tensor) -> Tensor:
        v_embed = None
        if i in self.ve_layer_indices:
            v_embed = ve_base * self.ve_layer_scales[self.ve_layer_indices.index(i)].to(dtype=ve_base.dtype)
        return self.blocks[i](x, x0, v_embed=v_embed)

    def forward_hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, input_ids)
        x0 = x
        ve_base = self.ve_shared(input_ids)
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self._run_block(i, x, x0, ve_base)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self._run_block(self.num_encoder_layers + i, x, x0, ve_base)
        return self.final_norm(x)

    def logits_from_hidden(self, hidden: Tensor) -> Tensor:
        logits_proj = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.logits_from_hidden(self.forward_hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# SLIDING WINDOW AND TEST-TIME TRAINING
# -----------------------------


def sliding_window_starts(total_tokens: int, seq_len: int, stride: int) -> list[int]:
    """Starts of the windows. The first scores all its positions, every other one the positions past its context."""
    context = seq_len - stride
    return [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context < total_tokens]


def first_scored(ws: int, seq_len: int, stride: int) -> int:
    return 0 if ws == 0 else seq_len - stride


def make_window_batch(
    val_tokens: Tensor, batch_ws: list[int], seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    total_tokens = val_tokens.numel() - 1
    x_batch = torch.zeros(len(batch_ws), seq_len, dtype=torch.int64, device=device)
    y_batch = torch.zeros(len(batch_ws), seq_len, dtype=torch.int64, device=device)
    wlens: list[int] = []
    for i, ws in enumerate(batch_ws):
        wend = min(ws + seq_len, total_tokens)
        wlens.append(wend - ws)
        chunk = val_tokens[ws : wend + 1].to(dtype=torch.int64, device=device)
        x_batch[i, : wend - ws] = chunk[:-1]
        y_batch[i, : wend - ws] = chunk[1:]
    return x_batch, y_batch, wlens


def eval_val_sliding(
    args: Hyperparameters,
    base_model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    stride: int,
    batch_seqs: int = 32,
) -> tuple[float, float]:
    """Sliding window with frozen weights: each token is scored once, with up to seq_len - stride tokens before it."""
    seq_len = args.eval_seq_len
    window_starts = sliding_window_starts(val_tokens.numel() - 1, seq_len, stride)
    my_s = (len(window_starts) * rank) // world_size
    my_e = (len(window_starts) * (rank + 1)) // world_size
    my_windows = window_starts[my_s:my_e]

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    base_model.eval()
    compiled_logits = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    with torch.no_grad():
        for bi in range(0, len(my_windows), batch_seqs):
            batch_ws = my_windows[bi : bi + batch_seqs]
            x_batch, y_batch, wlens = make_window_batch(val_tokens, batch_ws, seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = compiled_logits(x_batch)
            nll = F.cross_entropy(
                logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none"
            ).reshape(len(batch_ws), seq_len)
            for i, ws in enumerate(batch_ws):
                s = first_scored(ws, seq_len, stride)
                loss_sum += nll[i, s : wlens[i]].to(torch.float64).sum()
                token_count += float(wlens[i] - s)
                byte_count += count_token_bytes(x_batch[i, s : wlens[i]], y_batch[i, s : wlens[i]], luts).sum()

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)
    base_model.train()
    return bpb_from_sums(loss_sum, token_count, byte_count)


def assign_windows_to_chunks(
    window_starts: list[int], total_tokens: int, chunk_tokens: int, seq_len: int, stride: int
) -> list[list[int]]:
    """Each window goes to the chunk that holds its first scored token."""
    num_chunks = (total_tokens + chunk_tokens - 1) // chunk_tokens
    chunk_windows: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in window_starts:
        chunk_windows[(ws + first_scored(ws, seq_len, stride)) // chunk_tokens].append(ws)
    return chunk_windows


def ttt_parameters(model: nn.Module, freeze_blocks: int) -> list[nn.Parameter]:
    frozen = tuple(f"blocks.{i}." for i in range(freeze_blocks))
    ttt_params: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen) if frozen else True)
        if p.requires_grad:
            ttt_params.append(p)
    return ttt_params


def ttt_train_chunk(
    args: Hyperparameters,
    base_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ttt_params: list[nn.Parameter],
    val_tokens: Tensor,
    chunk_start: int,
    chunk_end: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    """Epochs over one scored chunk. Every rank makes the same number of steps; gradients are averaged."""
    seq_len = args.eval_seq_len
    num_seqs = (chunk_end - chunk_start) // seq_len
    global_batch = args.ttt_batch_seqs * world_size
    base_model.train()
    for _ in range(args.ttt_epochs):
        for b in range(0, num_seqs, global_batch):
            mine = range(b + rank * args.ttt_batch_seqs, min(b + (rank + 1) * args.ttt_batch_seqs, num_seqs))
            optimizer.zero_grad(set_to_none=False)
            batch_total = min(global_batch, num_seqs - b)
            if len(mine) > 0:
                raw = chunk_start + mine[0] * seq_len
                local = val_tokens[raw : raw + len(mine) * seq_len + 1].to(device=device, dtype=torch.int64)
                x = local[:-1].reshape(-1, seq_len)
                y = local[1:].reshape(-1, seq_len)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = base_model(x, y)
                (loss * (len(mine) / batch_total)).backward()
            for p in ttt_params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if world_size > 1:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(ttt_params, args.ttt_grad_clip)
            optimizer.step()


def eval_val_sliding_ttt(
    args: Hyperparameters,
    base_model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    stride: int,
    batch_seqs: int = 32,
    log0=print,
) -> tuple[float, float]:
    """Legal score-first TTT: all windows of a chunk are scored with the weights that saw only earlier chunks,
    then the chunk is trained on. The last chunk is only scored."""
    seq_len = args.eval_seq_len
    ttt_chunk = args.ttt_chunk_tokens
    total_tokens = val_tokens.numel() - 1
    if ttt_chunk % stride or seq_len % stride or ttt_chunk < seq_len:
        raise ValueError("TTT_CHUNK_TOKENS and EVAL_SEQ_LEN must be multiples of EVAL_STRIDE, a chunk at least a window")
    window_starts = sliding_window_starts(total_tokens, seq_len, stride)
    chunk_windows = assign_windows_to_chunks(window_starts, total_tokens, ttt_chunk, seq_len, stride)
    num_chunks = len(chunk_windows)
    log0(
        f"ttt_sliding:start chunks={num_chunks} chunk_tokens={ttt_chunk} windows={len(window_starts)} stride={stride} "
        f"lr={args.ttt_lr} epochs={args.ttt_epochs} freeze_blocks={args.ttt_freeze_blocks}"
    )

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    ttt_params = ttt_parameters(base_model, args.ttt_freeze_blocks)
    optimizer = torch.optim.AdamW(ttt_params, lr=args.ttt_lr, betas=(0.9, 0.999), weight_decay=args.ttt_wd)
    t0 = time.perf_counter()

    for ci, windows in enumerate(chunk_windows):
        chunk_start = ci * ttt_chunk
        chunk_end = min(chunk_start + ttt_chunk, total_tokens)

        # --- Phase 1: score this chunk's windows, split over the ranks ---
        my_s = (len(windows) * rank) // world_size
        my_e = (len(windows) * (rank + 1)) // world_size
        my_windows = windows[my_s:my_e]
        base_model.eval()
        with torch.no_grad():
            for bi in range(0, len(my_windows), batch_seqs):
                batch_ws = my_windows[bi : bi + batch_seqs]
                x_batch, y_batch, wlens = make_window_batch(val_tokens, batch_ws, seq_len, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = base_model.forward_logits(x_batch)
                nll = F.cross_entropy(
                    logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none"
                ).reshape(len(batch_ws), seq_len)
                for i, ws in enumerate(batch_ws):
                    s = first_scored(ws, seq_len, stride)
                    scored_nll = nll[i, s : wlens[i]].to(torch.float64)
                    tgt, prev = y_batch[i, s : wlens[i]], x_batch[i, s : wlens[i]]
                    loss_sum += scored_nll.sum()
                    token_count += float(wlens[i] - s)
                    byte_count += count_token_bytes(prev, tgt, luts).sum()

        # --- Phase 2: train on this chunk, now that it is scored ---
        is_last_chunk = ci == num_chunks - 1
        if not is_last_chunk and args.ttt_epochs > 0:
            cos_lr = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for group in optimizer.param_groups:
                group["lr"] = cos_lr
            ttt_train_chunk(
                args, base_model, optimizer, ttt_params, val_tokens, chunk_start, chunk_end, rank, world_size, device
            )

        if rank == 0 and (ci % 100 == 0 or is_last_chunk):
            rl = loss_sum.item() / max(token_count.item(), 1.0)
            log0(f"  ttt_chunk [{ci + 1}/{num_chunks}] rank0_loss={rl:.6f} time={time.perf_counter() - t0:.1f}s")

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)
    for p in base_model.parameters():
        p.requires_grad_(True)
    base_model.eval()
    val_loss, val_bpb = bpb_from_sums(loss_sum, token_count, byte_count)
    log0(f"ttt_sliding:done tokens={int(token_count.item())} bytes={int(byte_count.item())}")
    return val_loss, val_bpb


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    global zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # -----------------------------
    # DISTRIBUTED + CUDA SETUP
    # -----------------------------

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size <= 0 or 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so grad_accum_steps stays integral")
    grad_accum_steps = 8 // world_size
    grad_scale = 1.0 / grad_accum_steps
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    master_process = rank == 0
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    logfile = None
    if master_process:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{args.run_id}.txt"
        print(logfile)

    def log0(msg: str, console: bool = True) -> None:
        if not master_process:
            return
        if console:
            print(msg)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(
        subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False).stdout,
        console=False,
    )

    # -----------------------------
    # TOKENIZER + VALIDATION METRIC SETUP
    # -----------------------------

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    num_train_files = len(glob.glob(args.train_files))
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{Path(args.data_path).name} train_shards:{num_train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )

    matrix_params: list[nn.Parameter] = []
    scalar_params: list[nn.Parameter] = []
    for name, p in base_model.named_parameters():
        if name in ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"):
            continue
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            matrix_params.append(p)
        else:
            scalar_params.append(p)
    embed_params = [base_model.tok_emb.weight, base_model.bigram.embed.weight, base_model.ve_shared.embed.weight]

    optimizer_tok = torch.optim.AdamW(
        [{"params": embed_params, "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizer_muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizer_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(f"xsa_last_n:{args.xsa_last_n} rope_dims:{args.rope_dims} ln_scale:{args.ln_scale} ve_layers:{args.ve_layers}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f}"
    )

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        if max_wallclock_ms is None:
            warmdown_start = max(args.iterations - args.warmdown_iters, 0)
            if warmdown_start <= step < args.iterations:
                return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(max_wallclock_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # Warmup primes the compiled paths (QAT off and on); then weights, optimizers and loader are put back.
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            set_late_qat(base_model, warmup_step >= args.warmup_steps // 2)
            zero_grad_all()
            for micro_step in range(grad_accum_steps):
                if distributed:
                    model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
                x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    warmup_loss = model(x, y)
                (warmup_loss * grad_scale).backward()
            for opt in optimizers:
                opt.step()
            zero_grad_all()
            if args.warmup_steps <= 20 or (warmup_step + 1) % 10 == 0:
                log0(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
        set_late_qat(base_model, False)
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        if distributed:
            model.require_backward_grad_sync = True
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    ema_state = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
    training_time_ms = 0.0
    stop_after_step: int | None = None
    qat_on = False
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        should_validate = last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0)
        if should_validate:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, model, rank, world_size, device, val_tokens, luts)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            if stop_after_step is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_mul(step, elapsed_ms)
        if not qat_on and args.late_qat_threshold > 0 and step > 0 and scale < args.late_qat_threshold:
            qat_on = True
            set_late_qat(base_model, True)
            log0(f"late_qat:enabled step:{step} scale:{scale:.4f}")
        zero_grad_all()
        train_loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss * grad_scale).backward()
        train_loss /= grad_accum_steps

        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        for group in optimizer_muon.param_groups:
            group["momentum"] = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        zero_grad_all()

        with torch.no_grad():
            for name, t in base_model.state_dict().items():
                ema_state[name].mul_(args.ema_decay).add_(t.detach().float(), alpha=1.0 - args.ema_decay)

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap.
        reached_cap = max_wallclock_ms is not None and approx_training_time_ms >= max_wallclock_ms
        if distributed and max_wallclock_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # EMA + SERIALIZATION
    # -----------------------------

    log0("ema:applying EMA weights")
    current_state = base_model.state_dict()
    avg_state = {name: t.to(dtype=current_state[name].dtype) for name, t in ema_state.items()}
    base_model.load_state_dict(avg_state, strict=True)

    sd_cpu = {name: t.detach().cpu() for name, t in base_model.state_dict().items()}
    quant_result, quant_meta = mixed_quantize_int6(sd_cpu, INT6_CATEGORIES)
    quant_buf = io.BytesIO()
    torch.save({"w": quant_result, "m": quant_meta}, quant_buf)
    quant_blob = zstandard.ZstdCompressor(level=args.zstd_level).compress(quant_buf.getvalue())
    code_bytes = len(code.encode("utf-8"))
    if master_process:
        with open("final_model.int6.ptz", "wb") as f:
            f.write(quant_blob)
        model_bytes = os.path.getsize("final_model.int6.ptz")
        log0(f"Serialized model int6+zstd: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size int6+zstd: {model_bytes + code_bytes} bytes")
        if model_bytes + code_bytes > 16_000_000:
            raise RuntimeError("submission exceeds 16,000,000 bytes")

    # -----------------------------
    # ROUNDTRIP + EVALUATION
    # -----------------------------

    if distributed:
        dist.barrier()
    with open("final_model.int6.ptz", "rb") as f:
        quant_blob_disk = f.read()
    quant_state = torch.load(
        io.BytesIO(zstandard.ZstdDecompressor().decompress(quant_blob_disk)), map_location="cpu", weights_only=True
    )
    deq_state = dequantize_mixed_int6(quant_state["w"], quant_state["m"], sd_cpu)
    eval_model = GPT(args).to(device).bfloat16()
    for module in eval_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(eval_model)
    eval_model.load_state_dict(deq_state, strict=True)

    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    compiled_eval = torch.compile(eval_model, dynamic=False, fullgraph=True)
    q_val_loss, q_val_bpb = eval_val(args, compiled_eval, rank, world_size, device, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )

    t_slide = time.perf_counter()
    sw_val_loss, sw_val_bpb = eval_val_sliding(
        args, eval_model, rank, world_size, device, val_tokens, luts, args.eval_stride, args.eval_batch_seqs
    )
    torch.cuda.synchronize()
    log0(
        f"final_int6_sliding_window val_loss:{sw_val_loss:.4f} val_bpb:{sw_val_bpb:.4f} "
        f"stride:{args.eval_stride} eval_time:{1000.0 * (time.perf_counter() - t_slide):.0f}ms"
    )
    log0(f"final_int6_sliding_window_exact val_loss:{sw_val_loss:.8f} val_bpb:{sw_val_bpb:.8f}")

    if args.ttt_enabled:
        t_ttt = time.perf_counter()
        ttt_loss, ttt_bpb = eval_val_sliding_ttt(
            args, eval_model, rank, world_size, device, val_tokens, luts, args.eval_stride, args.eval_batch_seqs, log0
        )
        torch.cuda.synchronize()
        log0(
            f"legal_ttt val_loss:{ttt_loss:.4f} val_bpb:{ttt_bpb:.4f} "
            f"eval_time:{1000.0 * (time.perf_counter() - t_ttt):.0f}ms"
        )
        log0(f"legal_ttt_exact val_loss:{ttt_loss:.8f} val_bpb:{ttt_bpb:.8f}")
    log0(f"total_eval_time:{time.perf_counter() - t_eval:.1f}s")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
