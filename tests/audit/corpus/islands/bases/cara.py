"""
11L GQA GPT, mixed int5 (MLP) / int6 (attention) GPTQ-lite, zstd-22, sliding window scoring with a backoff n-gram cache.

Derived from the baseline train_gpt.py. Run from this folder:

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

    # Validation cadence during training (the clock stands still meanwhile).
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 9000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 14.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Optimizer.
    embed_lr = float(os.environ.get("EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # Weight averaging.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "0")))
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    late_qat_threshold = float(os.environ.get("LATE_QAT_THRESHOLD", 0.15))

    # Quantization.
    mlp_bits = int(os.environ.get("MLP_BITS", 5))
    attn_bits = int(os.environ.get("ATTN_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 48))
    calib_seqs = int(os.environ.get("CALIB_SEQS", 8))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int56.ptz")
    size_limit_bytes = int(os.environ.get("SIZE_LIMIT_BYTES", 16_000_000))

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    eval_max_seconds = float(os.environ.get("EVAL_MAX_SECONDS", 600.0))
    sliding_enabled = bool(int(os.environ.get("SLIDING_ENABLED", "0")))
    final_eval = os.environ.get("FINAL_EVAL", "ngram")

    # Test-time training variant: each chunk is scored, then trained on.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 32))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))

    # N-gram cache.
    ngram_min_order = int(os.environ.get("NGRAM_MIN_ORDER", 2))
    ngram_max_order = int(os.environ.get("NGRAM_MAX_ORDER", 7))
    ngram_rows_log2 = int(os.environ.get("NGRAM_ROWS_LOG2", 17))
    ngram_min_count = int(os.environ.get("NGRAM_MIN_COUNT", 3))
    ngram_alpha_lo = float(os.environ.get("NGRAM_ALPHA_LO", 0.02))
    ngram_alpha_hi = float(os.environ.get("NGRAM_ALPHA_HI", 0.22))
    ngram_entropy_mid = float(os.environ.get("NGRAM_ENTROPY_MID", 3.0))
    ngram_entropy_gain = float(os.environ.get("NGRAM_ENTROPY_GAIN", 1.5))


CONTROL_TENSOR_NAME_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear", "bigram.scale")

# -----------------------------
# MUON OPTIMIZER
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    # Orthogonalize a 2D update matrix with a fast Newton-Schulz iteration.
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
            lr, momentum = group["lr"], group["momentum"]
            total = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cursor = 0
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
                    updates_flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()
            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            cursor = 0
            for p in params:
                upd = updates_flat[cursor : cursor + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(upd, alpha=-lr)
                cursor += p.numel()
        return None


# -----------------------------
# TOKENIZER BYTE TABLES
# -----------------------------


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
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


class BpbMeter:
    """Sums nats, tokens and bytes of scored positions; one per evaluation and rank."""

    def __init__(self, luts: tuple[Tensor, Tensor, Tensor], device: torch.device):
        self.base_bytes, self.has_leading_space, self.is_boundary = luts
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.token_count = torch.zeros((), device=device, dtype=torch.float64)
        self.byte_count = torch.zeros((), device=device, dtype=torch.float64)

    def bytes_of(self, prev: Tensor, tgt: Tensor) -> Tensor:
        nbytes = self.base_bytes[tgt].to(torch.float64)
        nbytes += (self.has_leading_space[tgt] & ~self.is_boundary[prev]).to(torch.float64)
        return nbytes

    def add(self, nll: Tensor, prev: Tensor, tgt: Tensor) -> None:
        self.loss_sum += nll.to(torch.float64).sum()
        self.token_count += float(tgt.numel())
        self.byte_count += self.bytes_of(prev, tgt).sum()

    def reduce(self) -> None:
        if dist.is_available() and dist.is_initialized():
            for part in (self.loss_sum, self.token_count, self.byte_count):
                dist.all_reduce(part, op=dist.ReduceOp.SUM)

    def result(self) -> tuple[float, float]:
        val_loss = (self.loss_sum / self.token_count).item()
        val_bpb = (self.loss_sum / math.log(2.0) / self.byte_count).item()
        return val_loss, val_bpb


# -----------------------------
# DATA LOADING
# -----------------------------


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
    # Each call consumes a contiguous span of the stream and gives every rank a disjoint slice of it.
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
    # Weights stay fp32, matmuls run in the activation dtype; late in training the weight is fake-quantized.
    qat_levels: int = 0

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.qat_levels and self.training:
            scale = w.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / self.qat_levels
            w_q = (w / scale).round().clamp(-self.qat_levels - 1, self.qat_levels) * scale
            w = w + (w_q - w).detach()
        return F.linear(x, w.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS)) and param.dtype != torch.float32:
                param.data = param.data.float()


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
            self._cos_cached = freqs.cos()[None, None, :, :]
            self._sin_cached = freqs.sin()[None, None, :, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    rotated = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((rotated, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, use_xsa: bool):
        super().__init__()
        dim, self.num_heads, self.num_kv_heads = args.model_dim, args.num_heads, args.num_kv_heads
        if dim % self.num_heads != 0 or self.num_heads % self.num_kv_heads != 0:
            raise ValueError("model_dim, num_heads and num_kv_heads do not fit")
        self.head_dim = dim // self.num_heads
        self.rope_dims = args.rope_dims
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), args.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, base=args.rope_base)
        self.use_xsa = use_xsa

    def _subtract_self_value(self, y: Tensor, v: Tensor) -> Tensor:
        # Exclusive self-attention: remove the component along the position's own value vector.
        groups = self.num_heads // self.num_kv_heads
        bsz, heads, seqlen, hd = y.shape
        y_g = y.reshape(bsz, self.num_kv_heads, groups, seqlen, hd)
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        y_g = y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return y_g.reshape(bsz, heads, seqlen, hd)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        if self.use_xsa:
            y = self._subtract_self_value(y, v)
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class SmearGate(nn.Module):
    """Mixes a little of the previous token's embedding into the present one, never into a document's first token."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -3.0, dtype=torch.float32))
        self.bos_id = bos_id

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(dtype=x.dtype)
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        keep = (input_ids != self.bos_id).to(dtype=x.dtype).unsqueeze(-1)
        return x + g * keep * (prev - x)


class BigramHash(nn.Module):
    """Embedding of the hashed pair (previous token, token)."""

    def __init__(self, buckets: int, dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.embed = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(dim, model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def rows(self, input_ids: Tensor) -> Tensor:
        prev = F.pad(input_ids[:, :-1], (1, 0), value=self.bos_id)
        mixed = torch.bitwise_xor(36313 * input_ids, 27191 * prev) % (self.buckets - 1)
        return torch.where(input_ids == self.bos_id, torch.full_like(mixed, self.buckets - 1), mixed)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.proj(self.embed(self.rows(input_ids))) * self.scale


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(args, use_xsa=layer >= args.num_layers - args.xsa_last_n)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_factor = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_factor)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        mlp_out = self.mlp(self.mlp_norm(x) * self.ln_factor)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramHash(args.bigram_buckets, args.bigram_dim, args.model_dim, args.bos_id)
        self.smear = SmearGate(args.model_dim, args.bos_id)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights(args.tied_embed_init_std, args.num_layers)

    def _init_weights(self, embed_std: float, num_layers: int) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=embed_std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, input_ids)
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0)
        return self.final_norm(x)

    def head(self, h: Tensor) -> Tensor:
        logits = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.head(self.hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


def make_model(args: Hyperparameters, device: torch.device) -> GPT:
    model = GPT(args).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(model)
    return model


# -----------------------------
# WEIGHT AVERAGES
# -----------------------------


class Ema:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(value.detach().float(), alpha=1.0 - self.decay)

    def load_into(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({k: v.to(current[k].dtype) for k, v in self.shadow.items()}, strict=True)


class Swa:
    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def collect(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            if name in self.total:
                self.total[name] += value.detach().float()
            else:
                self.total[name] = value.detach().float().clone()
        self.count += 1

    def load_into(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({k: (v / self.count).to(current[k].dtype) for k, v in self.total.items()}, strict=True)


# -----------------------------
# GPTQ-LITE: CLIP SEARCH WEIGHTED BY INPUT ENERGY
# -----------------------------

CLIP_PERCENTILES = (0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999, 1.0)


def collect_input_energy(
    model: GPT, loader: DistributedTokenLoader, args: Hyperparameters, device: torch.device, deadline: float
) -> dict[str, Tensor]:
    """Mean square of every linear layer's inputs, over training batches, until the deadline (perf_counter)."""
    energy: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def make_hook(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            energy[name] = energy.get(name, torch.zeros(x.size(1), device=device)) + x.square().sum(dim=0)
            counts[name] = counts.get(name, 0) + x.size(0)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            handles.append(module.register_forward_hook(make_hook(name + ".weight")))
    model.eval()
    world_size = loader.world_size
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(args.calib_batches):
            late = torch.tensor(float(time.perf_counter() > deadline), device=device)
            if dist.is_initialized():
                dist.all_reduce(late, op=dist.ReduceOp.MAX)
            if late.item() > 0:
                break
            x, y = loader.next_batch(args.calib_seqs * args.train_seq_len * world_size, args.train_seq_len, 1)
            model(x, y)
    for handle in handles:
        handle.remove()
    for name in sorted(energy):
        total = torch.tensor(float(counts[name]), device=device, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(energy[name], op=dist.ReduceOp.SUM)
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
        energy[name] /= total.item()
    return energy


def quantize_rows(weight: Tensor, bits: int, energy: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per row: the clip of CLIP_PERCENTILES that has the least error weighted by the inputs' energy."""
    w = weight.detach().float()
    qmax = 2 ** (bits - 1) - 1
    importance = torch.ones(w.size(1), device=w.device) if energy is None else energy.to(w.device).clamp_min(1e-8)
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best_q = torch.zeros_like(w, dtype=torch.int8)
    best_scale = torch.ones(w.size(0), device=w.device, dtype=torch.float16)
    for pct in CLIP_PERCENTILES:
        clip = torch.quantile(w.abs(), pct, dim=1) if pct < 1.0 else w.abs().amax(dim=1)
        scale = (clip / qmax).clamp_min(1e-7).to(torch.float16)
        s = scale.float().clamp_min(1e-7)[:, None]
        q = torch.clamp(torch.round(w / s), -qmax - 1, qmax)
        err = ((w - q * s).square() * importance[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_q[better] = q[better].to(torch.int8)
        best_scale[better] = scale[better]
    return best_q, best_scale


def bits_for(name: str, args: Hyperparameters) -> int:
    if ".mlp." in name:
        return args.mlp_bits
    if ".attn." in name or name.startswith("bigram.proj"):
        return args.attn_bits
    return args.embed_bits


def quantize_state_dict(
    state_dict: dict[str, Tensor], energy: dict[str, Tensor], args: Hyperparameters
) -> dict[str, dict[str, Tensor]]:
    packed: dict[str, dict[str, Tensor]] = {"q": {}, "scale": {}, "plain": {}}
    for name, tensor in state_dict.items():
        if tensor.ndim != 2 or any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS):
            packed["plain"][name] = tensor.detach().to(torch.float16).cpu().contiguous()
            continue
        q, scale = quantize_rows(tensor, bits_for(name, args), energy.get(name))
        packed["q"][name] = q.cpu().contiguous()
        packed["scale"][name] = scale.cpu().contiguous()
    return packed


def dequantize_state_dict(packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    out = {name: tensor.float() for name, tensor in packed["plain"].items()}
    for name, q in packed["q"].items():
        out[name] = q.float() * packed["scale"][name].float()[:, None]
    return out


def pack_artifact(packed: dict[str, dict[str, Tensor]], level: int) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    return zstandard.ZstdCompressor(level=level).compress(buf.getvalue())


def load_artifact(args: Hyperparameters, device: torch.device) -> GPT:
    """A model out of the artifact's bytes and of nothing else."""
    raw = zstandard.ZstdDecompressor().decompress(Path(args.artifact_path).read_bytes())
    packed = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    model = make_model(args, device)
    state = dequantize_state_dict(packed)
    current = model.state_dict()
    model.load_state_dict({k: state[k].to(current[k].dtype) for k in current}, strict=True)
    model.eval()
    return model


# -----------------------------
# EVALUATION
# -----------------------------


def eval_val(
    args: Hyperparameters,
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Non-overlapping sequences; the cheap figure that is logged while training."""
    seq_len = args.train_seq_len
    total_seqs = (val_tokens.numel() - 1) // seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    batch_seqs = max(1, args.val_batch_size // (world_size * seq_len))
    meter = BpbMeter(luts, device)
    model.eval()
    with torch.inference_mode():
        for first in range(seq_start, seq_end, batch_seqs):
            last = min(first + batch_seqs, seq_end)
            local = val_tokens[first * seq_len : last * seq_len + 1].to(device=device, dtype=torch.int64)
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                batch_loss = model(x, y).detach()
            meter.add(batch_loss.expand(y.numel()), x.reshape(-1), y.reshape(-1))
    meter.reduce()
    model.train()
    return meter.result()


class Windows:
    """The sliding windows over positions 0..n-1 (position p reads token p, predicts token p + 1).

    Window w reads [start, stop) and scores [stop - fresh, stop); the fresh parts tile all positions once.
    """

    def __init__(self, total: int, seq_len: int, stride: int):
        self.total, self.seq_len, self.stride = total, seq_len, stride
        self.context = seq_len - stride
        self.starts = [ws for ws in range(0, total, stride) if ws == 0 or ws + self.context < total]

    def __len__(self) -> int:
        return len(self.starts)

    def span(self, w: int) -> tuple[int, int, int]:
        """start, stop, and the first scored offset inside the window"""
        start = self.starts[w]
        stop = min(start + self.seq_len, self.total)
        return start, stop, 0 if start == 0 else self.context

    def share(self, rank: int, world_size: int) -> tuple[int, int]:
        return (len(self) * rank) // world_size, (len(self) * (rank + 1)) // world_size

    def batch(self, first: int, last: int, val_tokens: Tensor, device: torch.device):
        """Inputs and targets of windows [first, last), padded to seq_len, and their spans."""
        spans = [self.span(w) for w in range(first, last)]
        x = torch.zeros(len(spans), self.seq_len, dtype=torch.int64)
        y = torch.zeros(len(spans), self.seq_len, dtype=torch.int64)
        for i, (start, stop, _) in enumerate(spans):
            chunk = val_tokens[start : stop + 1].to(dtype=torch.int64)
            x[i, : stop - start] = chunk[:-1]
            y[i, : stop - start] = chunk[1:]
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True), spans


def eval_val_sliding(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Plain sliding windows: every position scored once with at least seq_len - stride tokens of context."""
    windows = Windows(val_tokens.numel() - 1, args.eval_seq_len, args.eval_stride)
    lo, hi = windows.share(rank, world_size)
    meter = BpbMeter(luts, device)
    model.eval()
    forward = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    with torch.inference_mode():
        for first in range(lo, hi, args.eval_batch_seqs):
            x, y, spans = windows.batch(first, min(first + args.eval_batch_seqs, hi), val_tokens, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = forward(x)
            for i, (start, stop, s) in enumerate(spans):
                n = stop - start
                nll = F.cross_entropy(logits[i, s:n].float(), y[i, s:n], reduction="none")
                meter.add(nll, x[i, s:n], y[i, s:n])
    meter.reduce()
    return meter.result()


def eval_val_sliding_ttt(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    eval_deadline: float,
    log0,
) -> tuple[float, float]:
    """Score-first test-time training: a chunk's windows are scored by all ranks, then the chunk is trained on."""
    seq_len, chunk_tokens = args.eval_seq_len, args.ttt_chunk_tokens
    windows = Windows(val_tokens.numel() - 1, seq_len, args.eval_stride)
    num_chunks = (windows.total + chunk_tokens - 1) // chunk_tokens
    by_chunk: list[list[int]] = [[] for _ in range(num_chunks)]
    for w in range(len(windows)):
        start, _, s = windows.span(w)
        by_chunk[(start + s) // chunk_tokens].append(w)
    for i, block in enumerate(model.blocks):
        for p in block.parameters():
            p.requires_grad_(i >= args.ttt_freeze_blocks)
    ttt_params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(ttt_params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    meter = BpbMeter(luts, device)
    log0(f"ttt:start chunks:{num_chunks} windows:{len(windows)} lr:{args.ttt_lr} epochs:{args.ttt_epochs}")
    adapting = True
    for ci, members in enumerate(by_chunk):
        # Score this chunk with the weights that earlier chunks left.
        lo, hi = (len(members) * rank) // world_size, (len(members) * (rank + 1)) // world_size
        model.eval()
        with torch.no_grad():
            for first in range(lo, hi, args.eval_batch_seqs):
                w0, w1 = members[first], members[min(first + args.eval_batch_seqs, hi) - 1] + 1
                x, y, spans = windows.batch(w0, w1, val_tokens, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = model.forward_logits(x)
                for i, (start, stop, s) in enumerate(spans):
                    n = stop - start
                    nll = F.cross_entropy(logits[i, s:n].float(), y[i, s:n], reduction="none")
                    meter.add(nll, x[i, s:n], y[i, s:n])
        if dist.is_initialized():
            dist.barrier()
        if ci == num_chunks - 1:
            break
        # Train on it; all of its positions have been scored above.
        late = torch.tensor(float(time.perf_counter() > eval_deadline), device=device)
        if dist.is_initialized():
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        adapting = adapting and late.item() == 0
        if not adapting:
            continue
        c0, c1 = ci * chunk_tokens, min((ci + 1) * chunk_tokens, windows.total)
        num_seqs = (c1 - c0) // seq_len
        lr = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(1, num_chunks - 1)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        seq_lo, seq_hi = (num_seqs * rank) // world_size, (num_seqs * (rank + 1)) // world_size
        for _ in range(args.ttt_epochs):
            span = val_tokens[c0 + seq_lo * seq_len : c0 + seq_hi * seq_len + 1].to(device=device, dtype=torch.int64)
            optimizer.zero_grad(set_to_none=True)
            if seq_hi > seq_lo:
                x, y = span[:-1].reshape(-1, seq_len), span[1:].reshape(-1, seq_len)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x, y)
                (loss * (seq_hi - seq_lo) / max(1, num_seqs)).backward()
            for p in ttt_params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if dist.is_initialized():
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(ttt_params, args.ttt_grad_clip)
            optimizer.step()
        if ci % 200 == 0:
            log0(f"ttt:chunk {ci}/{num_chunks} lr:{lr:.6f} running_loss:{(meter.loss_sum / meter.token_count).item():.5f}")
    meter.reduce()
    return meter.result()


# -----------------------------
# N-GRAM BACKOFF CACHE
# -----------------------------

HASH_PRIMES = np.array(
    [36313, 27191, 51647, 81929, 131071, 175447, 209173, 262147], dtype=np.uint64
)


class NgramBackoffCache:
    """Counts of next tokens for hashed contexts, one table [rows, vocab] per order.

    A row is a histogram over the whole vocabulary, so that row / row.sum() is a distribution whatever collides in it.
    An order's context may not reach over the start of the document that the position stands in.
    """

    def __init__(self, args: Hyperparameters, tokens_np: np.ndarray):
        self.orders = list(range(args.ngram_max_order, args.ngram_min_order - 1, -1))
        self.num_rows = 1 << args.ngram_rows_log2
        self.vocab = args.vocab_size
        self.min_count = args.ngram_min_count
        self.bos_id = args.bos_id
        self.tokens = tokens_np
        self.tables = {n: np.zeros((self.num_rows, self.vocab), dtype=np.uint32) for n in self.orders}
        self.totals = {n: np.zeros(self.num_rows, dtype=np.int64) for n in self.orders}

    def context_rows(self, positions: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
        """The table row of each position's last order - 1 tokens, and whether they lie in one document."""
        key = np.full(positions.shape, 1469598103, dtype=np.uint64)
        whole = positions - (order - 2) >= 0
        for back in range(order - 1):
            at = np.maximum(positions - back, 0)
            token = self.tokens[at].astype(np.uint64)
            key = (key ^ (token + np.uint64(1)) * HASH_PRIMES[back]) * np.uint64(1099511628211)
            if back < order - 2:
                whole &= self.tokens[at] != self.bos_id
        key ^= key >> np.uint64(29)
        return (key & np.uint64(self.num_rows - 1)).astype(np.int64), whole

    def lookup(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Histograms [n, vocab] of the longest context seen often enough, and its order (0: none)."""
        hist = np.zeros((positions.size, self.vocab), dtype=np.float32)
        used = np.zeros(positions.size, dtype=np.int64)
        for n in self.orders:
            rows, whole = self.context_rows(positions, n)
            hit = whole & (used == 0) & (self.totals[n][rows] >= self.min_count)
            if hit.any():
                hist[hit] = self.tables[n][rows[hit]]
                used[hit] = n
        return hist, used

    def update(self, positions: np.ndarray) -> None:
        """Counts the tokens that follow these positions. To be called when they have been scored."""
        targets = self.tokens[positions + 1].astype(np.int64)
        for n in self.orders:
            rows, whole = self.context_rows(positions, n)
            np.add.at(self.tables[n], (rows[whole], targets[whole]), 1)
            np.add.at(self.totals[n], rows[whole], 1)


def mixing_weight(args: Hyperparameters, log_probs: Tensor, used: Tensor) -> Tensor:
    """The cache's share at each position: more where the model is unsure, none where no context matched."""
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    gate = torch.sigmoid(args.ngram_entropy_gain * (entropy - args.ngram_entropy_mid))
    alpha = args.ngram_alpha_lo + (args.ngram_alpha_hi - args.ngram_alpha_lo) * gate
    alpha = alpha * (0.7 + 0.3 * (used.to(alpha.dtype) / args.ngram_max_order))
    return torch.where(used > 0, alpha, torch.zeros_like(alpha))


def mix_distributions(log_probs: Tensor, hist: Tensor, alpha: Tensor) -> Tensor:
    """(1 - alpha) model + alpha cache, over the whole vocabulary."""
    cache_probs = hist / hist.sum(dim=-1, keepdim=True).clamp_min(1.0)
    return (1.0 - alpha)[:, None] * log_probs.exp() + alpha[:, None] * cache_probs


def eval_val_ngram(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    log0,
) -> tuple[float, float]:
    """Sliding windows, contiguous ranges of them per rank; each rank's cache learns from what that rank has scored."""
    windows = Windows(val_tokens.numel() - 1, args.eval_seq_len, args.eval_stride)
    lo, hi = windows.share(rank, world_size)
    cache = NgramBackoffCache(args, val_tokens.numpy())
    meter = BpbMeter(luts, device)
    order_hits = np.zeros(args.ngram_max_order + 1, dtype=np.int64)
    model.eval()
    forward = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    with torch.inference_mode():
        for first in range(lo, hi, args.eval_batch_seqs):
            x, y, spans = windows.batch(first, min(first + args.eval_batch_seqs, hi), val_tokens, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = forward(x)
            scored_logits = torch.cat([logits[i, s : stop - start] for i, (start, stop, s) in enumerate(spans)])
            prev = torch.cat([x[i, s : stop - start] for i, (start, stop, s) in enumerate(spans)])
            tgt = torch.cat([y[i, s : stop - start] for i, (start, stop, s) in enumerate(spans)])
            positions = np.concatenate([np.arange(start + s, stop) for start, stop, s in spans])
            log_probs = F.log_softmax(scored_logits.float(), dim=-1)
            hist_np, used_np = cache.lookup(positions)
            hist = torch.from_numpy(hist_np).to(device)
            used = torch.from_numpy(used_np).to(device)
            alpha = mixing_weight(args, log_probs, used)
            probs = mix_distributions(log_probs, hist, alpha)
            nll = -probs.gather(1, tgt[:, None]).squeeze(1).clamp_min(1e-12).log()
            meter.add(nll, prev, tgt)
            cache.update(positions)
            order_hits += np.bincount(used_np, minlength=args.ngram_max_order + 1)
            if rank == 0 and ((first - lo) // args.eval_batch_seqs) % 500 == 0:
                running = (meter.loss_sum / meter.token_count).item()
                log0(f"ngram:window {first - lo}/{hi - lo} running_loss:{running:.5f} orders:{order_hits.tolist()}")
    meter.reduce()
    log0(f"ngram:tokens_scored {int(meter.token_count.item())} bytes_scored {int(meter.byte_count.item())}")
    return meter.result()


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: Hyperparameters, model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    matrix_params: list[Tensor] = []
    scalar_params: list[Tensor] = [model.skip_weights, model.smear.gate, model.bigram.scale]
    for name, p in model.blocks.named_parameters():
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            matrix_params.append(p)
        else:
            scalar_params.append(p)
    matrix_params.append(model.bigram.proj.weight)
    embed = torch.optim.AdamW(
        [{"params": [model.tok_emb.weight, model.bigram.embed.weight], "lr": args.embed_lr, "base_lr": args.embed_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    for group in muon.param_groups:
        group["base_lr"] = args.matrix_lr
    scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    return [embed, muon, scalar], muon


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, stop_ms: float) -> float:
    """1 until the warm-down, then linear to 0 at the end of the wall clock."""
    if args.warmdown_iters <= 0:
        return 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(stop_ms - elapsed_ms, 0.0)
    by_clock = remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0
    return min(by_clock, max((args.iterations - step) / args.warmdown_iters, 0.0), 1.0)


def switch_on_qat(model: GPT, args: Hyperparameters) -> None:
    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            module.qat_levels = 2 ** (bits_for(name + ".weight", args) - 1) - 1


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()

    # DISTRIBUTED + CUDA SETUP
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
    grad_accum_steps = 8 // world_size
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

    def log0(msg: str, console: bool = True) -> None:
        if not master_process:
            return
        if console:
            print(msg, flush=True)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    # TOKENIZER, DATA
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match the tokenizer's {int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")
    log0(f"train_loader:shards {len(train_loader.stream.files)}")

    # MODEL, OPTIMIZERS
    base_model = make_model(args, device)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )
    optimizers, optimizer_muon = build_optimizers(args, base_model)
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params} layers:{args.num_layers} dim:{args.model_dim}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")

    stop_ms = 1000.0 * (args.max_wallclock_seconds - args.gptq_reserve_seconds)

    def train_micro_steps() -> Tensor:
        total = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            total += loss.detach()
            (loss / grad_accum_steps).backward()
        return total / grad_accum_steps

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # WARM-UP: primes the compiled paths, then puts weights, optimizer states and the loader back.
    if args.warmup_steps > 0:
        initial_state = {k: v.detach().cpu().clone() for k, v in base_model.state_dict().items()}
        initial_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            zero_grad_all()
            train_micro_steps()
            for opt in optimizers:
                opt.step()
            zero_grad_all()
        log0(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")
        base_model.load_state_dict(initial_state, strict=True)
        for opt, state in zip(optimizers, initial_opts, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        if distributed:
            model.require_backward_grad_sync = True
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # MAIN TRAINING LOOP
    ema = Ema(base_model, args.ema_decay)
    swa = Swa()
    training_time_ms = 0.0
    stop_after_step: int | None = None
    qat_on = False
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
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
        scale = lr_scale(args, step, elapsed_ms, stop_ms)
        if not qat_on and step > 1000 and scale < args.late_qat_threshold:
            switch_on_qat(base_model, args)
            qat_on = True
            log0(f"late_qat:on step:{step} scale:{scale:.4f}")
        zero_grad_all()
        train_loss = train_micro_steps()
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
        ema.update(base_model)
        if args.swa_enabled and scale < 0.2 and step % args.swa_every == 0:
            swa.collect(base_model)

        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if step <= 10 or step % args.train_log_every == 0:
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )
        reached_cap = approx_ms >= stop_ms
        if distributed:
            cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # AVERAGED WEIGHTS, CALIBRATION AND QUANTIZATION (all inside the wall clock)
    t_quant = time.perf_counter()
    if args.swa_enabled and swa.count > 0:
        log0(f"swa:applying the mean of {swa.count} snapshots")
        swa.load_into(base_model)
    else:
        log0("ema:applying EMA weights")
        ema.load_into(base_model)
    calib_deadline = t_quant + args.max_wallclock_seconds - training_time_ms / 1000.0 - 6.0
    energy = collect_input_energy(base_model, train_loader, args, device, calib_deadline)
    packed = quantize_state_dict(base_model.state_dict(), energy, args)
    torch.cuda.synchronize()
    quant_ms = 1000.0 * (time.perf_counter() - t_quant)
    log0(f"gptq_lite:calibrated on train shards and quantized in {quant_ms:.0f}ms, train+gptq {training_time_ms + quant_ms:.0f}ms")

    # ARTIFACT
    if master_process:
        blob = pack_artifact(packed, args.zstd_level)
        Path(args.artifact_path).write_bytes(blob)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = len(blob) + code_bytes
        log0(f"Serialized model int5/int6+zstd{args.zstd_level}: {len(blob)} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > args.size_limit_bytes:
            raise RuntimeError(f"{total_bytes} bytes are more than {args.size_limit_bytes}")
    if distributed:
        dist.barrier()
    del model, compiled_model, optimizers, optimizer_muon, ema, swa, packed, energy
    torch.cuda.empty_cache()
    torch._dynamo.reset()

    # EVALUATION: every variant starts from the artifact.
    torch.cuda.synchronize()
    eval_t0 = time.perf_counter()
    results: dict[str, tuple[float, float]] = {}

    def report(key: str, label: str, score) -> None:
        torch.cuda.synchronize()
        started = time.perf_counter()
        results[key] = score()
        torch.cuda.synchronize()
        spent_ms = 1000.0 * (time.perf_counter() - started)
        val_loss, val_bpb = results[key]
        log0(f"{label} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{spent_ms:.0f}ms")
        log0(f"{label}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")

    common = (rank, world_size, device, val_tokens, luts)
    round_model = load_artifact(args, device)
    report("roundtrip", "final_roundtrip", lambda: eval_val(args, round_model, *common))
    if args.sliding_enabled or args.final_eval == "sliding":
        slide_model = load_artifact(args, device)
        report("sliding", "final_sliding_window", lambda: eval_val_sliding(args, slide_model, *common))
    if args.ttt_enabled or args.final_eval == "ttt":
        ttt_model = load_artifact(args, device)
        ttt_deadline = eval_t0 + 0.55 * args.eval_max_seconds
        report("ttt", "legal_ttt", lambda: eval_val_sliding_ttt(args, ttt_model, *common, ttt_deadline, log0))
    if args.final_eval == "ngram":
        ngram_model = load_artifact(args, device)
        report("ngram", "final_ngram", lambda: eval_val_ngram(args, ngram_model, *common, log0))

    eval_seconds = time.perf_counter() - eval_t0
    log0(f"total_eval_time:{1000.0 * eval_seconds:.0f}ms limit:{1000.0 * args.eval_max_seconds:.0f}ms")
    if eval_seconds > args.eval_max_seconds:
        raise RuntimeError(f"evaluation took {eval_seconds:.0f}s")
    final_loss, final_bpb = results[args.final_eval]
    log0(f"final:{args.final_eval} val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
