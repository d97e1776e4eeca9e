"""
11L banked U-Net GPT: XSA on every layer, LeakyReLU^2, BigramHash, EMA + tight SWA,
full-Hessian GPTQ int6 (train calibration, inside the cap), lzma-9, score-first TTT.

Forked from the baseline train_gpt.py.
"""

from __future__ import annotations

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

    # Validation cadence during training (logging only).
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
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    leaky_slope = float(os.environ.get("LEAKY_SLOPE", 0.5))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 3072))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 112))
    ve_enabled = bool(int(os.environ.get("VE_ENABLED", "1")))
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

    # Weight averaging.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    swa_threshold = float(os.environ.get("SWA_THRESHOLD", 0.2))
    swa_mix = float(os.environ.get("SWA_MIX", 0.5))
    late_qat_threshold = float(os.environ.get("LATE_QAT_THRESHOLD", 0.15))

    # Export.
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 48.0))
    gptq_calib_batches = int(os.environ.get("GPTQ_CALIB_BATCHES", 32))
    gptq_calib_batch_tokens = int(os.environ.get("GPTQ_CALIB_BATCH_TOKENS", 262_144))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    size_limit_bytes = int(os.environ.get("SIZE_LIMIT_BYTES", 16_000_000))
    size_margin_bytes = int(os.environ.get("SIZE_MARGIN_BYTES", 8_000))

    # Evaluation.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_optimizer = os.environ.get("TTT_OPTIMIZER", "sgd")
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_wd = float(os.environ.get("TTT_WD", 0.0))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_freeze_embed = bool(int(os.environ.get("TTT_FREEZE_EMBED", "0")))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 32))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))


CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear",
    "bigram.scale",
    "ve_layer_scales",
    "ve_shared.scale",
)
BANK_NAMES = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


# -----------------------------
# PARALLEL MUON OVER PARAMETER BANKS
# -----------------------------
# A bank is a stack [B, M, N] of equally shaped matrices. Gradients are reduce-scattered along B, every rank
# orthogonalises its own slices in one batched Newton-Schulz call, and the updates are gathered back.


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    squeeze = G.ndim == 2
    if squeeze:
        G = G.unsqueeze(0)
    X = G.bfloat16()
    transposed = X.size(-2) > X.size(-1)
    if transposed:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    if transposed:
        X = X.mT
    if squeeze:
        X = X.squeeze(0)
    return X


class ParallelMuon(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )
        self._meta: list[dict] = []
        self._built = False

    def _build(self) -> None:
        self._distributed = dist.is_available() and dist.is_initialized()
        self._world_size = dist.get_world_size() if self._distributed else 1
        self._rank = dist.get_rank() if self._distributed else 0
        ws = self._world_size
        for group in self.param_groups:
            for p in group["params"]:
                B = p.shape[0]
                padded = ((B + ws - 1) // ws) * ws
                shard = padded // ws
                tail = p.shape[1:]
                dev = p.device
                self._meta.append(
                    dict(
                        p=p,
                        B=B,
                        padded_grad=torch.zeros(padded, *tail, device=dev, dtype=torch.bfloat16),
                        shard=torch.zeros(shard, *tail, device=dev, dtype=torch.bfloat16),
                        shard_mom=torch.zeros(shard, *tail, device=dev, dtype=torch.bfloat16),
                        full_update=torch.zeros(padded, *tail, device=dev, dtype=torch.bfloat16),
                        scale=max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5,
                    )
                )
        # Largest banks first: their reduce-scatter hides behind the small-parameter work.
        self._meta.sort(key=lambda m: -m["p"].numel())
        self._built = True

    def reset_momentum(self) -> None:
        for m in self._meta:
            m["shard_mom"].zero_()

    def launch_reduce_scatters(self) -> None:
        if not self._built:
            self._build()
        if not self._distributed:
            return
        self._rs_futures = []
        for m in self._meta:
            p = m["p"]
            if p.grad is None:
                self._rs_futures.append(None)
                continue
            pg = m["padded_grad"]
            pg[: m["B"]].copy_(p.grad.bfloat16())
            if pg.shape[0] > m["B"]:
                pg[m["B"] :].zero_()
            self._rs_futures.append(dist.reduce_scatter_tensor(m["shard"], pg, op=dist.ReduceOp.AVG, async_op=True))

    @torch.no_grad()
    def step(self, closure=None):
        if not self._built:
            self._build()
        group = self.param_groups[0]
        lr, momentum, wd = group["lr"], group["momentum"], group["weight_decay"]
        pending = None
        for i, m in enumerate(self._meta):
            p = m["p"]
            if p.grad is None:
                continue
            if self._distributed:
                self._rs_futures[i].wait()
                g = m["shard"]
            else:
                g = p.grad.bfloat16()
            buf = m["shard_mom"][: g.shape[0]]
            buf.mul_(momentum).add_(g)
            update = zeropower_via_newtonschulz5(g.add(buf, alpha=momentum), steps=group["backend_steps"])
            if pending is not None:
                self._finish(*pending, lr, wd)
            if self._distributed:
                handle = dist.all_gather_into_tensor(m["full_update"], update.contiguous(), async_op=True)
                pending = (m, handle, None)
            else:
                pending = (m, None, update)
        if pending is not None:
            self._finish(*pending, lr, wd)

    def _finish(self, m: dict, handle, update, lr: float, wd: float) -> None:
        if handle is not None:
            handle.wait()
            update = m["full_update"][: m["B"]]
        if wd > 0.0:
            m["p"].data.mul_(1.0 - lr * wd)
        m["p"].data.add_(update.to(dtype=m["p"].dtype), alpha=-lr * m["scale"])


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION SETUP
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


def load_data_shard(file: Path) -> Tensor:
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
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-document validation set to fineweb_val_*.
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


def eval_val(
    args: Hyperparameters,
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    grad_accum_steps: int,
    val_tokens: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
) -> tuple[float, float]:
    # Flat, non-overlapping validation. Used for the curve in the log and for the round-trip check.
    seq_len = args.train_seq_len
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    local_batch_seqs = max(1, local_batch_tokens // seq_len)
    total_seqs = (val_tokens.numel() - 1) // seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    with torch.inference_mode():
        for batch_seq_start in range(seq_start, seq_end, local_batch_seqs):
            batch_seq_end = min(batch_seq_start + local_batch_seqs, seq_end)
            raw_start = batch_seq_start * seq_len
            raw_end = batch_seq_end * seq_len + 1
            local = val_tokens[raw_start:raw_end].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                batch_loss = model(x, y).detach()
            n = float(y.numel())
            val_loss_sum += batch_loss.to(torch.float64) * n
            val_token_count += n
            prev_ids = x.reshape(-1)
            tgt_ids = y.reshape(-1)
            token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
            token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
            val_byte_count += token_bytes.to(torch.float64).sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(val_loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_byte_count, op=dist.ReduceOp.SUM)
    mean_loss = val_loss_sum / val_token_count
    nats_to_bits = mean_loss.item() / math.log(2.0)
    model.train()
    return float(mean_loss.item()), float(nats_to_bits * val_token_count.item() / val_byte_count.item())


# -----------------------------
# DATA LOADING
# -----------------------------


class TokenStream:
    # Reads shards in order and wraps around. Deterministic, no workers.
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
    # Every call takes a contiguous chunk from the shared stream; each rank slices its own disjoint span.
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

BOS_ID = 1


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class Int6STE:
    # Straight-through fake quantisation of the banks, switched on for the tail of the warmdown.
    enabled = False

    @staticmethod
    def apply(w: Tensor) -> Tensor:
        if not Int6STE.enabled:
            return w
        with torch.no_grad():
            w32 = w.float()
            scale = (w32.abs().amax(dim=-1, keepdim=True) / 31.0).clamp_min(1e-8)
            wq = (torch.round(w32 / scale).clamp(-31, 31) * scale).to(w.dtype)
        return w + (wq - w).detach()


class CastedLinear(nn.Linear):
    # Keep weights in fp32 for optimizer/state quality, cast at matmul time for bf16 compute.
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
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
        return self._cos_cached.to(dtype=dtype, copy=True), self._sin_cached.to(dtype=dtype, copy=True)


def apply_partial_rotary(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    rotated = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((rotated, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, rope_dims: int, qk_gain: float):
        super().__init__()
        if dim % num_heads != 0 or num_heads % num_kv_heads != 0:
            raise ValueError("model_dim, num_heads and num_kv_heads do not divide")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = rope_dims if rope_dims > 0 else self.head_dim
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, base=rope_base)
        self.use_xsa = False

    def _exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        # XSA: remove from each head's output what points along the token's own value vector.
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        y_g = y.reshape(B, T, Hkv, H // Hkv, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        proj = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - proj).reshape(B, T, H, D)

    def forward(self, x: Tensor, q_w: Tensor, k_w: Tensor, v_w: Tensor, o_w: Tensor, v_embed, tap=None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = F.linear(x, q_w.to(x.dtype)).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = F.linear(x, k_w.to(x.dtype)).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = F.linear(x, v_w.to(x.dtype))
        if v_embed is not None:
            v = v + v_embed
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_partial_rotary(q, cos, sin, self.rope_dims)
        k = apply_partial_rotary(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        if flash_attn_3_func is not None:
            y = flash_attn_3_func(q, k, v, causal=True)
        else:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        if self.use_xsa:
            y = self._exclude_self(y, v)
        y = y.reshape(bsz, seqlen, dim)
        if tap is not None:
            tap("o", y)
        return F.linear(y, o_w.to(x.dtype))


class SmearGate(nn.Module):
    # Mixes the previous token's embedding into the current one; never across a document start.
    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate.to(dtype=x.dtype))[None, None, :]
        x_prev = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        inside = (ids != BOS_ID).unsqueeze(-1).to(x.dtype)
        return x + inside * g * (x_prev - x)


class BigramHashEmbedding(nn.Module):
    def __init__(self, buckets: int, bigram_dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = nn.Embedding(buckets, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bigram_hash(self, ids: Tensor) -> Tensor:
        t = ids.to(torch.int32)
        mod = self.buckets - 1
        out = torch.full_like(t, mod)
        mixed = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % mod
        out[..., 1:] = torch.where(t[..., 1:] == BOS_ID, mod, mixed)
        return out.long()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.proj(self.embed(self.bigram_hash(ids)))
        return h * self.scale.to(dtype=h.dtype)


class ValueEmbedding(nn.Module):
    def __init__(self, vocab_size: int, ve_dim: int, kv_dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, ve_dim)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.proj = CastedLinear(ve_dim, kv_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.1, dtype=torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.proj(self.embed(ids))
        return h * self.scale.to(dtype=h.dtype)


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(
            dim, args.num_heads, args.num_kv_heads, args.rope_base, args.rope_dims, args.qk_gain_init
        )
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if args.ln_scale else 1.0
        self.leaky_slope = args.leaky_slope

    def forward(self, x: Tensor, x0: Tensor, w: tuple[Tensor, ...], v_embed=None, tap=None) -> Tensor:
        q_w, k_w, v_w, o_w, up_w, down_w = w
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        h = self.attn_norm(x) * self.ln_scale_factor
        if tap is not None:
            tap("qkv", h)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(h, q_w, k_w, v_w, o_w, v_embed, tap)
        h = self.mlp_norm(x) * self.ln_scale_factor
        if tap is not None:
            tap("up", h)
        h = F.leaky_relu(F.linear(h, up_w.to(h.dtype)), negative_slope=self.leaky_slope).square()
        if tap is not None:
            tap("down", h)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * F.linear(h, down_w.to(h.dtype))


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.tie_embeddings = args.tie_embeddings
        self.logit_softcap = args.logit_softcap
        self.num_layers = args.num_layers
        dim = args.model_dim
        n = args.num_layers
        kv_dim = args.num_kv_heads * (dim // args.num_heads)
        mlp_dim = int(args.mlp_mult * dim)
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.smear = SmearGate(dim)
        self.bigram = BigramHashEmbedding(args.bigram_buckets, args.bigram_dim, dim)
        self.num_encoder_layers = n // 2
        self.num_decoder_layers = n - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, dim, dtype=torch.float32))
        # Banks: rows [0, n) of qo_bank are Q, rows [n, 2n) are O; the same for K and V in kv_bank.
        self.qo_bank = nn.Parameter(torch.empty(2 * n, dim, dim))
        self.kv_bank = nn.Parameter(torch.empty(2 * n, kv_dim, dim))
        self.mlp_up_bank = nn.Parameter(torch.empty(n, mlp_dim, dim))
        self.mlp_down_bank = nn.Parameter(torch.empty(n, dim, mlp_dim))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(n)])
        for i in range(max(0, n - args.xsa_last_n), n):
            self.blocks[i].attn.use_xsa = True
        self.ve_layer_indices = [int(s) for s in args.ve_layers.split(",") if s.strip()] if args.ve_enabled else []
        if self.ve_layer_indices:
            self.ve_shared = ValueEmbedding(args.vocab_size, args.ve_dim, kv_dim)
            self.ve_layer_scales = nn.Parameter(torch.ones(len(self.ve_layer_indices), dtype=torch.float32))
        self.final_norm = RMSNorm()
        self.lm_head = None if args.tie_embeddings else CastedLinear(dim, args.vocab_size, bias=False)
        self.tap = None
        self._init_weights(args)

    def _init_weights(self, args: Hyperparameters) -> None:
        n = self.num_layers
        if self.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        proj_scale = 1.0 / math.sqrt(2 * n)
        with torch.no_grad():
            for i in range(n):
                nn.init.orthogonal_(self.qo_bank[i])
                nn.init.zeros_(self.qo_bank[n + i])
                nn.init.orthogonal_(self.kv_bank[i])
                nn.init.orthogonal_(self.kv_bank[n + i])
                nn.init.orthogonal_(self.mlp_up_bank[i])
                nn.init.zeros_(self.mlp_down_bank[i])
            self.mlp_up_bank.mul_(1.0 + proj_scale)

    def _layer_weights(self, i: int) -> tuple[Tensor, ...]:
        n = self.num_layers
        return (
            Int6STE.apply(self.qo_bank[i]),
            Int6STE.apply(self.kv_bank[i]),
            Int6STE.apply(self.kv_bank[n + i]),
            Int6STE.apply(self.qo_bank[n + i]),
            Int6STE.apply(self.mlp_up_bank[i]),
            Int6STE.apply(self.mlp_down_bank[i]),
        )

    def _run_block(self, i: int, x: Tensor, x0: Tensor, ve: Tensor | None) -> Tensor:
        v_embed = None
        if ve is not None and i in self.ve_layer_indices:
            v_embed = ve * self.ve_layer_scales[self.ve_layer_indices.index(i)].to(dtype=ve.dtype)
        tap = None if self.tap is None else (lambda kind, t: self.tap(i, kind, t))
        return self.blocks[i](x, x0, self._layer_weights(i), v_embed, tap)

    def forward_hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, input_ids)
        x0 = x
        ve = self.ve_shared(input_ids) if self.ve_layer_indices else None
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self._run_block(i, x, x0, ve)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self._run_block(self.num_encoder_layers + i, x, x0, ve)
        return self.final_norm(x)

    def project(self, h: Tensor) -> Tensor:
        if self.tie_embeddings:
            logits = F.linear(h, self.tok_emb.weight.to(h.dtype))
        else:
            logits = self.lm_head(h)
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.project(self.forward_hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean"
        )


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            small = param.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if (small or name in BANK_NAMES) and param.dtype != torch.float32:
                param.data = param.data.float()


# -----------------------------
# FULL-HESSIAN GPTQ (int6 banks, int8 embeddings)
# -----------------------------


def collect_hessians(model: GPT, batches, world_size: int) -> dict[str, Tensor]:
    # X^T X per bank slice. q, k and v read the same input and share one matrix.
    n = model.num_layers
    hessians: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def tap(layer: int, kind: str, t: Tensor) -> None:
        key = f"{kind}.{layer}"
        flat = t.detach().reshape(-1, t.size(-1)).float()
        if key not in hessians:
            hessians[key] = torch.zeros(flat.size(1), flat.size(1), device=flat.device)
            rows[key] = 0
        hessians[key].addmm_(flat.T, flat)
        rows[key] += flat.size(0)

    model.eval()
    model.tap = tap
    with torch.no_grad():
        for x in batches:
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.forward_hidden(x)
    model.tap = None
    for key, h in hessians.items():
        if world_size > 1:
            dist.all_reduce(h, op=dist.ReduceOp.SUM)
        h.div_(max(rows[key] * world_size, 1))
    out: dict[str, Tensor] = {}
    for i in range(n):
        out[f"qo_bank.{i}"] = out[f"kv_bank.{i}"] = out[f"kv_bank.{n + i}"] = hessians[f"qkv.{i}"]
        out[f"qo_bank.{n + i}"] = hessians[f"o.{i}"]
        out[f"mlp_up_bank.{i}"] = hessians[f"up.{i}"]
        out[f"mlp_down_bank.{i}"] = hessians[f"down.{i}"]
    return out


def clip_candidates(W: Tensor, levels: int):
    for pct in (0.9990, 0.9995, 0.9999, 0.99999, 1.0):
        top = torch.quantile(W.abs(), pct, dim=1) if pct < 1.0 else W.abs().amax(dim=1)
        yield (top / levels).clamp_min(1.0 / 4096).half().float()


def gptq_quantize(W: Tensor, H: Tensor, block: int, damp: float, levels: int = 31) -> tuple[Tensor, Tensor]:
    W = W.float().clone()
    H = H.float().clone()
    cols = W.size(1)
    dead = torch.diagonal(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    order = torch.argsort(torch.diagonal(H), descending=True)
    inverse = torch.argsort(order)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(damp * torch.diagonal(H).mean())
    L = torch.linalg.cholesky(H)
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
    best: tuple[float, Tensor, Tensor] | None = None
    for scale in clip_candidates(W, levels):
        work = W.clone()
        Q = torch.zeros_like(W)
        for lo in range(0, cols, block):
            hi = min(lo + block, cols)
            Wb = work[:, lo:hi].clone()
            Err = torch.zeros_like(Wb)
            Hb = Hinv[lo:hi, lo:hi]
            for j in range(hi - lo):
                q = torch.round(Wb[:, j] / scale).clamp(-levels, levels)
                Q[:, lo + j] = q
                e = (Wb[:, j] - q * scale) / Hb[j, j]
                Wb[:, j:] -= e[:, None] * Hb[j, j:][None, :]
                Err[:, j] = e
            if hi < cols:
                work[:, hi:] -= Err @ Hinv[lo:hi, hi:]
        D = W - Q * scale[:, None]
        loss = float(((D @ H) * D).sum())
        if best is None or loss < best[0]:
            best = (loss, Q, scale)
    assert best is not None
    return best[1][:, inverse].to(torch.int8), best[2].half()


def quantize_rows_int8(W: Tensor) -> tuple[Tensor, Tensor]:
    scale = (W.float().abs().amax(dim=1) / 127.0).clamp_min(1.0 / 65504)
    return torch.round(W.float() / scale[:, None]).clamp(-127, 127).to(torch.int8), scale.half()


def quantize_state(model: GPT, hessians: dict[str, Tensor], args: Hyperparameters, rank: int, world_size: int) -> dict:
    # Every rank quantises its share of the bank slices; the results are gathered on all of them.
    state = {k: v.detach() for k, v in model.state_dict().items()}
    jobs = [(name, i) for name in BANK_NAMES for i in range(state[name].shape[0])]
    jobs.sort(key=lambda job: -state[job[0]][job[1]].numel())
    done: dict[str, tuple[Tensor, Tensor]] = {}
    for name, i in jobs[rank::world_size]:
        key = f"{name}.{i}"
        q, s = gptq_quantize(state[name][i], hessians[key], args.gptq_block_size, args.gptq_damp)
        done[key] = (q.cpu(), s.cpu())
    if world_size > 1:
        shares: list[dict | None] = [None] * world_size
        dist.all_gather_object(shares, done)
        done = {k: v for share in shares for k, v in share.items()}
    packed: dict[str, dict] = {"int6": {}, "int8": {}, "raw": {}}
    for name, i in sorted(jobs):
        packed["int6"][f"{name}.{i}"] = done[f"{name}.{i}"]
    for name, t in state.items():
        if name in BANK_NAMES:
            continue
        if t.ndim == 2 and t.numel() > 65_536:
            q, s = quantize_rows_int8(t)
            packed["int8"][name] = (q.cpu(), s.cpu())
        else:
            packed["raw"][name] = t.half().cpu() if t.is_floating_point() else t.cpu()
    return packed


def dequantize_state(packed: dict, template: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name in BANK_NAMES:
        rows = []
        for i in range(template[name].shape[0]):
            q, s = packed["int6"][f"{name}.{i}"]
            rows.append(q.float() * s.float()[:, None])
        out[name] = torch.stack(rows).to(template[name].dtype)
    for name, (q, s) in packed["int8"].items():
        out[name] = (q.float() * s.float()[:, None]).to(template[name].dtype)
    for name, t in packed["raw"].items():
        out[name] = t.to(template[name].dtype)
    return out


def serialize(packed: dict) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    return lzma.compress(buf.getvalue(), preset=9)


def prune_to_fit(packed: dict, code_bytes: int, limit: int, log) -> tuple[dict, bytes]:
    # Zero the cheapest +-1 entries (by the square of their row scale) until code + model fit.
    blob = serialize(packed)
    log(f"prune: unpruned model {len(blob)} bytes, code {code_bytes} bytes, limit {limit}")
    if len(blob) + code_bytes <= limit:
        return packed, blob
    costs = []
    for key, (q, s) in packed["int6"].items():
        ones = (q.abs() == 1).sum(dim=1)
        costs.append(torch.repeat_interleave(s.float().square(), ones))
    ranked = torch.sort(torch.cat(costs)).values

    def pruned(count: int) -> dict:
        bound = ranked[min(count, ranked.numel() - 1)]
        new = {k: dict(v) for k, v in packed.items()}
        for key, (q, s) in packed["int6"].items():
            hit = (q.abs() == 1) & (s.float().square() <= bound)[:, None]
            new["int6"][key] = (torch.where(hit, torch.zeros_like(q), q), s)
        return new

    lo, hi = 0, ranked.numel() - 1
    for _ in range(6):
        mid = (lo + hi) // 2
        if len(serialize(pruned(mid))) + code_bytes <= limit:
            hi = mid
        else:
            lo = mid
    packed = pruned(hi)
    blob = serialize(packed)
    log(f"prune: zeroed up to {hi} of {ranked.numel()} unit entries, model {len(blob)} bytes")
    return packed, blob


# -----------------------------
# SLIDING WINDOW EVALUATION
# -----------------------------


def eval_val_sliding(
    args: Hyperparameters,
    base_model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
    stride: int,
    batch_seqs: int = 32,
) -> tuple[float, float]:
    # Window w scores only its last `stride` targets (the first one scores all of them), so each target counts once.
    seq_len = args.eval_seq_len
    total = val_tokens.numel() - 1
    starts = [w for w in range(0, total, stride) if w + seq_len - stride < total]
    lo = (len(starts) * rank) // world_size
    hi = (len(starts) * (rank + 1)) // world_size
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    base_model.eval()
    compiled_logits = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    with torch.inference_mode():
        for b in range(lo, hi, batch_seqs):
            group = starts[b : min(b + batch_seqs, hi)]
            xb = torch.zeros(batch_seqs, seq_len, dtype=torch.int64, device=device)
            yb = torch.zeros(batch_seqs, seq_len, dtype=torch.int64, device=device)
            spans: list[tuple[int, int]] = []
            for i, w in enumerate(group):
                end = min(w + seq_len, total)
                piece = val_tokens[w : end + 1].to(dtype=torch.int64, device=device)
                xb[i, : end - w] = piece[:-1]
                yb[i, : end - w] = piece[1:]
                spans.append((0 if w == 0 else seq_len - stride, end - w))
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                out = compiled_logits(xb)
            losses = F.cross_entropy(out.reshape(-1, out.size(-1)).float(), yb.reshape(-1), reduction="none")
            losses = losses.reshape(batch_seqs, seq_len)
            for i, (a, z) in enumerate(spans):
                t, p = yb[i, a:z], xb[i, a:z]
                nbytes = base_bytes_lut[t].to(torch.float64)
                nbytes += (has_leading_space_lut[t] & ~is_boundary_token_lut[p]).to(torch.float64)
                sums[0] += losses[i, a:z].to(torch.float64).sum()
                sums[1] += z - a
                sums[2] += nbytes.sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    sliding_loss = (sums[0] / sums[1]).item()
    sliding_bpb = (sums[0] / math.log(2.0) / sums[2]).item()
    base_model.train()
    return sliding_loss, sliding_bpb


# -----------------------------
# SCORE-FIRST TEST-TIME TRAINING
# -----------------------------


def eval_val_sliding_ttt(
    args: Hyperparameters,
    base_model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
    stride: int,
    batch_seqs: int = 32,
    log0=print,
) -> tuple[float, float]:
    # Legal TTT: every chunk is scored by sliding windows under inference_mode with the weights as they stand after
    # the chunks before it, and only then trained on. The last chunk is scored and never trained on.
    seq_len = args.eval_seq_len
    total_tokens = val_tokens.numel() - 1
    ttt_chunk = args.ttt_chunk_tokens
    if ttt_chunk % stride != 0 or ttt_chunk < seq_len:
        raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE and at least EVAL_SEQ_LEN")

    window_starts = [ws for ws in range(0, total_tokens, stride) if ws + seq_len - stride < total_tokens]
    num_chunks = (total_tokens + ttt_chunk - 1) // ttt_chunk
    chunk_windows: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in window_starts:
        first_scored = ws if ws == 0 else ws + seq_len - stride
        chunk_windows[first_scored // ttt_chunk].append(ws)
    log0(
        f"ttt_sliding:start chunks={num_chunks} chunk_tokens={ttt_chunk} total_windows={len(window_starts)} "
        f"stride={stride} opt={args.ttt_optimizer} lr={args.ttt_lr} epochs={args.ttt_epochs}"
    )

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    ttt_params: list[nn.Parameter] = []
    for name, p in base_model.named_parameters():
        frozen = args.ttt_freeze_embed and ("tok_emb" in name or "embed.weight" in name)
        p.requires_grad_(not frozen)
        if not frozen:
            ttt_params.append(p)
    log0(f"ttt_sliding:params unfrozen={sum(p.numel() for p in ttt_params)}")
    if args.ttt_optimizer == "adamw":
        optimizer = torch.optim.AdamW(ttt_params, lr=args.ttt_lr, betas=(0.9, 0.95), weight_decay=args.ttt_wd)
    else:
        optimizer = torch.optim.SGD(ttt_params, lr=args.ttt_lr, momentum=args.ttt_momentum, weight_decay=args.ttt_wd)

    t0 = time.perf_counter()
    for ci in range(num_chunks):
        windows = chunk_windows[ci]
        if not windows:
            continue
        chunk_start = ci * ttt_chunk
        chunk_end = min((ci + 1) * ttt_chunk, total_tokens)

        # --- Phase 1: SCORE this chunk's windows, shared out over the ranks ---
        my_s = (len(windows) * rank) // world_size
        my_e = (len(windows) * (rank + 1)) // world_size
        my_windows = windows[my_s:my_e]
        base_model.eval()
        with torch.inference_mode():
            for bi in range(0, len(my_windows), batch_seqs):
                batch_ws = my_windows[bi : bi + batch_seqs]
                bsz = len(batch_ws)
                x_batch = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
                y_batch = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
                wlens: list[int] = []
                for i, ws in enumerate(batch_ws):
                    end = min(ws + seq_len, total_tokens)
                    wlen = end - ws
                    wlens.append(wlen)
                    chunk_tok = val_tokens[ws : end + 1].to(dtype=torch.int64, device=device)
                    x_batch[i, :wlen] = chunk_tok[:-1]
                    y_batch[i, :wlen] = chunk_tok[1:]
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = base_model.forward_logits(x_batch)
                nll = F.cross_entropy(
                    logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none"
                ).reshape(bsz, seq_len)
                for i, ws in enumerate(batch_ws):
                    wlen = wlens[i]
                    s = 0 if ws == 0 else seq_len - stride
                    scored_nll = nll[i, s:wlen].to(torch.float64)
                    loss_sum += scored_nll.sum()
                    token_count += float(wlen - s)
                    tgt, prev = y_batch[i, s:wlen], x_batch[i, s:wlen]
                    tb = base_bytes_lut[tgt].to(torch.float64)
                    tb += (has_leading_space_lut[tgt] & ~is_boundary_token_lut[prev]).to(torch.float64)
                    byte_count += tb.sum()

        # --- Phase 2: TRAIN on this chunk, whose every token has been scored ---
        is_last_chunk = ci == num_chunks - 1
        if not is_last_chunk and args.ttt_epochs > 0:
            base_model.train()
            chunk_seqs = (chunk_end - chunk_start) // seq_len
            cos_lr = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for pg in optimizer.param_groups:
                pg["lr"] = cos_lr
            seq_lo = (chunk_seqs * rank) // world_size
            seq_hi = (chunk_seqs * (rank + 1)) // world_size
            for _ep in range(args.ttt_epochs):
                for bs in range(0, max(seq_hi - seq_lo, 1), args.ttt_batch_seqs):
                    n_here = min(args.ttt_batch_seqs, seq_hi - seq_lo - bs)
                    optimizer.zero_grad(set_to_none=True)
                    if n_here > 0:
                        start_tok = chunk_start + (seq_lo + bs) * seq_len
                        end_tok = start_tok + n_here * seq_len + 1
                        local = val_tokens[start_tok:end_tok].to(device=device, dtype=torch.int64)
                        x = local[:-1].reshape(-1, seq_len)
                        y = local[1:].reshape(-1, seq_len)
                        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                            loss = base_model(x, y)
                        loss.backward()
                    if world_size > 1:
                        for p in ttt_params:
                            if p.grad is None:
                                p.grad = torch.zeros_like(p)
                            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
                    torch.nn.utils.clip_grad_norm_(ttt_params, args.ttt_grad_clip)
                    optimizer.step()

        if rank == 0 and (ci % 100 == 0 or is_last_chunk):
            elapsed = time.perf_counter() - t0
            rl = loss_sum.item() / max(token_count.item(), 1)
            rbpb = rl / math.log(2.0) * (token_count.item() / max(byte_count.item(), 1))
            log0(f"  ttt_chunk [{ci + 1}/{num_chunks}] bpb={rbpb:.6f} time={elapsed:.1f}s")

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)
    val_loss = (loss_sum / token_count).item()
    val_bpb = val_loss / math.log(2.0) * (token_count.item() / byte_count.item())
    for p in base_model.parameters():
        p.requires_grad_(True)
    base_model.eval()
    log0(
        f"ttt_sliding:done val_loss={val_loss:.6f} val_bpb={val_bpb:.6f} tokens={int(token_count.item())} "
        f"bytes={int(byte_count.item())} elapsed={time.perf_counter() - t0:.1f}s"
    )
    return val_loss, val_bpb


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()

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
    log0("=" * 100, console=False)

    # -----------------------------
    # TOKENIZER + VALIDATION METRIC SETUP
    # -----------------------------

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    if not args.tokenizer_path.endswith(".model"):
        raise ValueError(f"Script only setup for SentencePiece .model file: {args.tokenizer_path}")
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(args.val_files)
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = build_sentencepiece_luts(
        sp, args.vocab_size, device
    )
    luts = (base_bytes_lut, has_leading_space_lut, is_boundary_token_lut)
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{Path(args.data_path).name} shards:{len(glob.glob(args.train_files))}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    Int6STE.enabled = False
    base_model = GPT(args).to(device).bfloat16()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = compiled_model

    banks = [getattr(base_model, name) for name in BANK_NAMES]
    embed_params = [base_model.tok_emb.weight, base_model.bigram.embed.weight]
    if base_model.ve_layer_indices:
        embed_params.append(base_model.ve_shared.embed.weight)
    taken = {id(p) for p in banks + embed_params}
    scalar_params = [p for p in base_model.parameters() if id(p) not in taken]
    replicated_params = embed_params + scalar_params

    optimizer_tok = torch.optim.AdamW(
        [{"params": embed_params, "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizer_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizer_muon = ParallelMuon(
        banks,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_scalar, optimizer_muon]

    n_params = sum(p.numel() for p in base_model.parameters())
    xsa_layers = [i for i, b in enumerate(base_model.blocks) if b.attn.use_xsa]
    log0(f"model_params:{n_params}")
    log0(f"XSA:{xsa_layers} ve_layers:{base_model.ve_layer_indices} bigram:{args.bigram_buckets}x{args.bigram_dim}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} max_wallclock_seconds:{args.max_wallclock_seconds:.3f} "
        f"gptq_reserve_seconds:{args.gptq_reserve_seconds:.1f}"
    )

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    def train_step(loader: DistributedTokenLoader) -> Tensor:
        zero_grad_all()
        step_loss = torch.zeros((), device=device)
        for _ in range(grad_accum_steps):
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            step_loss += loss.detach()
            (loss * grad_scale).backward()
        return step_loss / grad_accum_steps

    def apply_gradients() -> None:
        # Bank reductions start first and overlap the small parameters' all-reduces and AdamW steps.
        optimizer_muon.launch_reduce_scatters()
        if distributed:
            for p in replicated_params:
                if p.grad is not None:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(replicated_params, args.grad_clip_norm)
        optimizer_tok.step()
        optimizer_scalar.step()
        optimizer_muon.step()
        zero_grad_all()

    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None
    train_budget_ms = None
    if max_wallclock_ms is not None:
        # Averaging, calibration and GPTQ run on the same clock; the steps stop early enough for them.
        train_budget_ms = max_wallclock_ms - 1000.0 * args.gptq_reserve_seconds

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        if train_budget_ms is None:
            warmdown_start = max(args.iterations - args.warmdown_iters, 0)
            return max((args.iterations - step) / args.warmdown_iters, 0.0) if step >= warmdown_start else 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(train_budget_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # Warmup primes the compiled forward/backward/optimizer paths, then everything is put back.
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_opt_states = [copy.deepcopy(opt.state_dict()) for opt in (optimizer_tok, optimizer_scalar)]
        for warmup_step in range(args.warmup_steps):
            train_step(train_loader)
            apply_gradients()
            if warmup_step + 1 == args.warmup_steps or (warmup_step + 1) % 10 == 0:
                log0(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip((optimizer_tok, optimizer_scalar), initial_opt_states, strict=True):
            opt.load_state_dict(state)
        optimizer_muon.reset_momentum()
        zero_grad_all()
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    ema_state = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
    swa_state: dict[str, Tensor] | None = None
    swa_count = 0
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        should_validate = last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0)
        if should_validate:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(
                args, model, rank, world_size, device, grad_accum_steps, val_tokens, *luts
            )
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            if stop_after_step is not None and step < args.iterations:
                log0(
                    f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms "
                    f"step:{step}/{args.iterations}"
                )
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_mul(step, elapsed_ms)
        if not Int6STE.enabled and scale < args.late_qat_threshold:
            Int6STE.enabled = True
            log0(f"late_qat:enabled step:{step} scale:{scale:.4f}")
        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        for group in optimizer_muon.param_groups:
            group["momentum"] = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

        train_loss = train_step(train_loader)
        apply_gradients()

        with torch.no_grad():
            for name, t in base_model.state_dict().items():
                ema_state[name].mul_(args.ema_decay).add_(t.detach().float(), alpha=1.0 - args.ema_decay)

        step += 1
        if args.swa_enabled and scale < args.swa_threshold and step % args.swa_every == 0:
            if swa_state is None:
                swa_state = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
                swa_count = 1
                log0(f"swa:start step:{step}")
            else:
                for name, t in base_model.state_dict().items():
                    swa_state[name] += t.detach().float()
                swa_count += 1

        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap.
        reached_cap = train_budget_ms is not None and approx_ms >= train_budget_ms
        if distributed and train_budget_ms is not None:
            flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # -----------------------------
    # WEIGHT AVERAGING
    # -----------------------------

    current_state = base_model.state_dict()
    avg_state = {name: t.clone() for name, t in ema_state.items()}
    if swa_state is not None and swa_count > 1:
        for name, t in avg_state.items():
            t.lerp_(swa_state[name] / swa_count, args.swa_mix)
    log0(f"averaging: ema_decay={args.ema_decay} swa_snapshots={swa_count} swa_mix={args.swa_mix}")
    base_model.load_state_dict({name: t.to(current_state[name].dtype) for name, t in avg_state.items()}, strict=True)
    Int6STE.enabled = False

    # -----------------------------
    # GPTQ, PRUNING, SERIALIZATION
    # -----------------------------

    calib_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def calibration_batches():
        for _ in range(args.gptq_calib_batches):
            cx, _ = calib_loader.next_batch(args.gptq_calib_batch_tokens, args.train_seq_len, 1)
            yield cx

    t_gptq = time.perf_counter()
    hessians = collect_hessians(base_model, calibration_batches(), world_size)
    log0(f"gptq:collected {len(hessians)} hessians in {time.perf_counter() - t_gptq:.1f}s")
    packed = quantize_state(base_model, hessians, args, rank, world_size)
    del hessians
    torch.cuda.synchronize()
    export_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
    log0(f"gptq:done in {time.perf_counter() - t_gptq:.1f}s, train+gptq {export_ms:.0f}ms")
    if max_wallclock_ms is not None and export_ms > max_wallclock_ms:
        raise RuntimeError("training, calibration and quantisation did not fit the wall clock")

    code_bytes = len(code.encode("utf-8"))
    if master_process:
        packed, model_blob = prune_to_fit(packed, code_bytes, args.size_limit_bytes - args.size_margin_bytes, log0)
        with open("final_model.int6.ptz", "wb") as f:
            f.write(model_blob)
        quant_file_bytes = os.path.getsize("final_model.int6.ptz")
        total_bytes = quant_file_bytes + code_bytes
        log0(f"Serialized model int6+lzma: {quant_file_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size int6+lzma: {total_bytes} bytes")
        if total_bytes > args.size_limit_bytes:
            raise RuntimeError(f"submission is {total_bytes} bytes, limit {args.size_limit_bytes}")
    if distributed:
        dist.barrier()

    # -----------------------------
    # ROUND TRIP + EVALUATION
    # -----------------------------

    torch.cuda.synchronize()
    t_eval_all = time.perf_counter()
    with open("final_model.int6.ptz", "rb") as f:
        quant_blob_disk = f.read()
    quant_state = torch.load(io.BytesIO(lzma.decompress(quant_blob_disk)), map_location="cpu")
    template = {name: t.detach().cpu() for name, t in base_model.state_dict().items()}
    eval_model = GPT(args).to(device).bfloat16()
    restore_low_dim_params_to_fp32(eval_model)
    eval_model.load_state_dict(dequantize_state(quant_state, template), strict=True)
    torch._dynamo.reset()

    t_qeval = time.perf_counter()
    q_val_loss, q_val_bpb = eval_val(
        args, eval_model, rank, world_size, device, grad_accum_steps, val_tokens, *luts
    )
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_qeval):.0f}ms"
    )

    t_slide = time.perf_counter()
    sw_val_loss, sw_val_bpb = eval_val_sliding(
        args, eval_model, rank, world_size, device, val_tokens, *luts,
        stride=args.eval_stride, batch_seqs=args.eval_batch_seqs,
    )
    torch.cuda.synchronize()
    log0(
        f"final_int6_sliding_window val_loss:{sw_val_loss:.4f} val_bpb:{sw_val_bpb:.4f} "
        f"stride:{args.eval_stride} eval_time:{1000.0 * (time.perf_counter() - t_slide):.0f}ms"
    )
    log0(f"final_int6_sliding_window_exact val_loss:{sw_val_loss:.8f} val_bpb:{sw_val_bpb:.8f}")

    final_loss, final_bpb = sw_val_loss, sw_val_bpb
    if args.ttt_enabled:
        torch.cuda.synchronize()
        t_ttt = time.perf_counter()
        ttt_loss, ttt_bpb = eval_val_sliding_ttt(
            args, eval_model, rank, world_size, device, val_tokens, *luts,
            stride=args.eval_stride, batch_seqs=args.eval_batch_seqs, log0=log0,
        )
        torch.cuda.synchronize()
        log0(
            f"legal_ttt val_loss:{ttt_loss:.4f} val_bpb:{ttt_bpb:.4f} "
            f"eval_time:{1000.0 * (time.perf_counter() - t_ttt):.0f}ms"
        )
        log0(f"legal_ttt_exact val_loss:{ttt_loss:.8f} val_bpb:{ttt_bpb:.8f}")
        final_loss, final_bpb = ttt_loss, ttt_bpb
    log0(f"final val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")
    log0(f"total_eval_time:{time.perf_counter() - t_eval_all:.1f}s")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
