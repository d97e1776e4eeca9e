"""
train_gpt.py -- 11L / 512d, XSA on every layer, U-Net skips, 3x LeakyReLU^2 MLP, EMA + tight SWA,
full-Hessian int6 GPTQ, LZMA, stride-64 sliding window, score-first TTT.

Grew out of the challenge baseline (Hyperparameters -> Muon -> tokenizer tables -> data -> model -> main).
Everything that is counted lives in this one file. Typical run:

    RUN_ID=s1337 SEED=1337 torchrun --standalone --nproc_per_node=8 train_gpt.py
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
from typing import Callable, NamedTuple

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    from flash_attn_interface import flash_attn_func as _fa3

    HAVE_FA3 = True
except ImportError:  # SDPA is ~8% slower per step but gives the same curve
    _fa3 = None
    HAVE_FA3 = False

# -----------------------------
# HYPERPARAMETERS
# -----------------------------


def _env(name: str, default, cast=None):
    """Environment override with the type of the default (bools are 0/1)."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if cast is None:
        cast = type(default)
    if cast is bool:
        return bool(int(raw))
    return cast(raw)


class Hyperparameters:
    # data
    data_path = _env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = _env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = _env("RUN_ID", str(uuid.uuid4()))
    seed = _env("SEED", 1337)
    bos_id = _env("BOS_ID", 1)

    # progress
    val_loss_every = _env("VAL_LOSS_EVERY", 4000)
    train_log_every = _env("TRAIN_LOG_EVERY", 500)

    # length of the run
    iterations = _env("ITERATIONS", 20000)
    warmup_steps = _env("WARMUP_STEPS", 20)
    warmdown_iters = _env("WARMDOWN_ITERS", 3500)
    train_batch_tokens = _env("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = _env("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds = _env("MAX_WALLCLOCK_SECONDS", 600.0)
    # Averages, Hessians and GPTQ happen on the training clock; the last optimiser step is this much earlier.
    finalize_reserve_seconds = _env("FINALIZE_RESERVE_SECONDS", 16.0)

    # model
    vocab_size = _env("VOCAB_SIZE", 1024)
    num_layers = _env("NUM_LAYERS", 11)
    model_dim = _env("MODEL_DIM", 512)
    num_heads = _env("NUM_HEADS", 8)
    num_kv_heads = _env("NUM_KV_HEADS", 4)
    mlp_mult = _env("MLP_MULT", 3.0)
    leaky_slope = _env("LEAKY_SLOPE", 0.5)
    rope_base = _env("ROPE_BASE", 10000.0)
    rope_dims = _env("ROPE_DIMS", 16)
    logit_softcap = _env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = _env("QK_GAIN_INIT", 1.5)
    xsa_last_n = _env("XSA_LAST_N", 11)
    ln_scale = _env("LN_SCALE", True)
    bigram_buckets = _env("BIGRAM_BUCKETS", 3072)
    bigram_dim = _env("BIGRAM_DIM", 112)
    ve_dim = _env("VE_DIM", 128)
    ve_layers = _env("VE_LAYERS", "9,10")
    tied_embed_init_std = _env("TIED_EMBED_INIT_STD", 0.005)

    # optimiser
    matrix_lr = _env("MATRIX_LR", 0.025)
    scalar_lr = _env("SCALAR_LR", 0.025)
    embed_lr = _env("EMBED_LR", 0.035)
    muon_momentum = _env("MUON_MOMENTUM", 0.99)
    muon_momentum_warmup_start = _env("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_warmup_steps = _env("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_backend_steps = _env("MUON_BACKEND_STEPS", 5)
    muon_wd = _env("MUON_WD", 0.04)
    adam_wd = _env("ADAM_WD", 0.04)
    beta1 = _env("BETA1", 0.9)
    beta2 = _env("BETA2", 0.95)
    adam_eps = _env("ADAM_EPS", 1e-8)
    grad_clip_norm = _env("GRAD_CLIP_NORM", 0.3)

    # weight averages and late QAT
    ema_decay = _env("EMA_DECAY", 0.997)
    swa_start_scale = _env("SWA_START_SCALE", 0.2)
    swa_every = _env("SWA_EVERY", 50)
    swa_mix = _env("SWA_MIX", 0.5)
    qat_start_scale = _env("QAT_START_SCALE", 0.15)

    # quantisation
    calib_source = _env("CALIB_SOURCE", "train")
    calib_seqs = _env("CALIB_SEQS", 256)
    calib_batch = _env("CALIB_BATCH", 8)
    selfgen_temperature = _env("SELFGEN_TEMPERATURE", 0.8)
    gptq_block = _env("GPTQ_BLOCK", 128)
    gptq_damp = _env("GPTQ_DAMP", 0.01)
    size_limit = _env("SIZE_LIMIT", 16_000_000)

    # evaluation
    eval_seq_len = _env("EVAL_SEQ_LEN", 2048)
    eval_stride = _env("EVAL_STRIDE", 64)
    eval_batch_seqs = _env("EVAL_BATCH_SEQS", 32)

    # test-time training
    ttt_enabled = _env("TTT_ENABLED", True)
    ttt_chunk_tokens = _env("TTT_CHUNK_TOKENS", 32768)
    ttt_lr = _env("TTT_LR", 0.002)
    ttt_momentum = _env("TTT_MOMENTUM", 0.9)
    ttt_epochs = _env("TTT_EPOCHS", 3)
    ttt_batch_seqs = _env("TTT_BATCH_SEQS", 16)
    ttt_grad_clip = _env("TTT_GRAD_CLIP", 1.0)
    ttt_freeze_blocks = _env("TTT_FREEZE_BLOCKS", 0)

    # count cache mixed into the TTT pass (off for the record run, it buys almost nothing on top of TTT)
    cache_weight = _env("CACHE_WEIGHT", 0.0)
    cache_buckets = _env("CACHE_BUCKETS", 32768)
    cache_half = _env("CACHE_HALF", 24.0)


CONTROL_NAMES = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear.gate",
    "bigram.scale",
    "ve_scales",
)

# -----------------------------
# MUON
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    # Quintic Newton-Schulz with the usual coefficients; good to about 1 +- 0.3 in every singular value.
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
    """Muon with decoupled weight decay. Every rank orthogonalises its share, the shares are summed."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
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
            lr, momentum, wd = group["lr"], group["momentum"], group["weight_decay"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
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
                    flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            cursor = 0
            for p in params:
                g = flat[cursor : cursor + p.numel()].view_as(p).to(dtype=p.dtype)
                if wd > 0:
                    p.mul_(1.0 - lr * wd)
                p.add_(g, alpha=-lr)
                cursor += p.numel()
        return loss


# -----------------------------
# TOKENIZER: BYTES PER TOKEN
# -----------------------------


class ByteTable:
    """UTF-8 bytes of the original text behind each token.

    A piece that starts with the mark U+2581 stands for one space plus the rest. That space exists in the text
    unless the token before is a control token (start of a document), where SentencePiece put it there itself.
    """

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        size = max(int(sp.vocab_size()), vocab_size)
        plain = np.zeros((size,), dtype=np.int16)
        spaced = np.zeros((size,), dtype=np.bool_)
        boundary = np.ones((size,), dtype=np.bool_)
        for tid in range(int(sp.vocab_size())):
            if sp.is_control(tid) or sp.is_unknown(tid) or sp.is_unused(tid):
                continue
            boundary[tid] = False
            if sp.is_byte(tid):
                plain[tid] = 1
                continue
            piece = sp.id_to_piece(tid)
            if piece.startswith("\u2581"):
                spaced[tid] = True
                piece = piece[1:]
            plain[tid] = len(piece.replace("\u2581", " ").encode("utf-8"))
        self.plain = torch.tensor(plain, dtype=torch.int16, device=device)
        self.spaced = torch.tensor(spaced, dtype=torch.bool, device=device)
        self.boundary = torch.tensor(boundary, dtype=torch.bool, device=device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        nbytes = self.plain[target].to(torch.int32)
        nbytes += (self.spaced[target] & ~self.boundary[prev]).to(torch.int32)
        return nbytes


def check_tokenizer(args: Hyperparameters, sp: spm.SentencePieceProcessor) -> None:
    if not args.tokenizer_path.endswith(".model"):
        raise ValueError(f"expected a SentencePiece .model file, got {args.tokenizer_path}")
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} but the tokenizer has {int(sp.vocab_size())} pieces")


# -----------------------------
# DATA
# -----------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def load_data_shard(file: Path) -> Tensor:
    header_bytes = HEADER_INTS * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected = header_bytes + num_tokens * np.dtype("<u2").itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected} bytes")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[Path]:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return files


def load_validation_tokens(pattern: str) -> Tensor:
    """The whole split, every token of it, as one int32 stream."""
    parts = [load_data_shard(file).to(torch.int32) for file in list_shards(pattern)]
    tokens = torch.cat(parts).contiguous()
    if tokens.numel() < 2:
        raise ValueError("validation split is empty")
    return tokens


class TokenStream:
    """Walks the shards in order, wraps around at the end."""

    def __init__(self, pattern: str):
        self.files = list_shards(pattern)
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
    """Each call cuts one contiguous span out of the shared stream and hands every rank its own slice of it."""

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
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


def fake_quant_rows(w: Tensor, levels: int = 31) -> Tensor:
    """Symmetric per-row rounding, as the exporter would do it without GPTQ."""
    scale = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / levels
    return torch.clamp(torch.round(w / scale), -levels, levels) * scale


class CastedLinear(nn.Linear):
    """fp32 master weight, cast at use. qat_gate (0 or 1) is a tensor so that switching it does not recompile."""

    def __init__(self, in_features: int, out_features: int, qat_gate: Tensor | None = None):
        super().__init__(in_features, out_features, bias=False)
        self.register_buffer("qat_gate", qat_gate, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.qat_gate is not None and self.training:
            w = w + self.qat_gate * (fake_quant_rows(w.detach()) - w.detach())
        return F.linear(x, w.to(x.dtype))


class Rotary(nn.Module):
    """Partial RoPE: only the first rope_dims of each head turn."""

    def __init__(self, rope_dims: int, base: float, max_len: int):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", angle.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", angle.sin()[None, :, None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = x.size(1)
        cos = self.cos[:, :t].to(x.dtype)
        sin = self.sin[:, :t].to(x.dtype)
        half = cos.size(-1)
        turn, keep = x[..., : 2 * half], x[..., 2 * half :]
        x1, x2 = turn[..., :half], turn[..., half:]
        turned = torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
        return torch.cat((turned, keep), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int, rotary: Rotary, qat_gate: Tensor):
        super().__init__()
        dim = args.model_dim
        if dim % args.num_heads or args.num_heads % args.num_kv_heads:
            raise ValueError("model_dim / num_heads / num_kv_heads do not divide")
        self.num_heads = args.num_heads
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = dim // args.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, qat_gate)
        self.c_k = CastedLinear(dim, kv_dim, qat_gate)
        self.c_v = CastedLinear(dim, kv_dim, qat_gate)
        self.proj = CastedLinear(dim, dim, qat_gate)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), args.qk_gain_init))
        self.rotary = [rotary]  # shared; a list keeps it out of this module's children
        self.use_xsa = layer >= args.num_layers - args.xsa_last_n

    def exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: take out of each head's output its component along the position's own value vector."""
        bsz, t, h, d = y.shape
        kv = v.size(2)
        grouped = y.reshape(bsz, t, kv, h // kv, d)
        unit = F.normalize(v, dim=-1).unsqueeze(3)
        grouped = grouped - (grouped * unit).sum(dim=-1, keepdim=True) * unit
        return grouped.reshape(bsz, t, h, d)

    def forward(self, x: Tensor, value_extra: Tensor | None = None) -> Tensor:
        bsz, t, dim = x.shape
        rotary = self.rotary[0]
        q = self.c_q(x).view(bsz, t, self.num_heads, self.head_dim)
        k = self.c_k(x).view(bsz, t, self.num_kv_heads, self.head_dim)
        v = self.c_v(x)
        if value_extra is not None:
            v = v + value_extra
        v = v.view(bsz, t, self.num_kv_heads, self.head_dim)
        q = rotary(F.rms_norm(q, (self.head_dim,)))
        k = rotary(F.rms_norm(k, (self.head_dim,)))
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast may have left the norms in fp32, FA3 wants one dtype
        if HAVE_FA3:
            y = _fa3(q, k, v, causal=True)
            if isinstance(y, tuple):
                y = y[0]
        else:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        if self.use_xsa:
            y = self.exclude_self(y, v)
        return self.proj(y.reshape(bsz, t, dim))


class MLP(nn.Module):
    """up -> leaky_relu(0.5)^2 -> down. The leak keeps a gradient on the negative side."""

    def __init__(self, args: Hyperparameters, qat_gate: Tensor):
        super().__init__()
        hidden = int(args.mlp_mult * args.model_dim)
        self.slope = args.leaky_slope
        self.fc = CastedLinear(args.model_dim, hidden, qat_gate)
        self.proj = CastedLinear(hidden, args.model_dim, qat_gate)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=self.slope).square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int, rotary: Rotary, qat_gate: Tensor):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(args, layer, rotary, qat_gate)
        self.mlp = MLP(args, qat_gate)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.depth_scale = 1.0 / math.sqrt(layer + 1) if args.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, value_extra: Tensor | None = None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0] * x + mix[1] * x0
        attn_out = self.attn(self.attn_norm(x) * self.depth_scale, value_extra)
        x = x + self.attn_scale.to(dtype=x.dtype) * attn_out
        mlp_out = self.mlp(self.mlp_norm(x) * self.depth_scale)
        return x + self.mlp_scale.to(dtype=x.dtype) * mlp_out


class SmearGate(nn.Module):
    """Blends the previous position's embedding into this one, never across the start of a document."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate.to(dtype=x.dtype))[None, None, :]
        prev = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        g = g * (~starts).to(x.dtype)[..., None]
        return (1 - g) * x + g * prev


class BigramHash(nn.Module):
    """Hashed embedding of (previous token, token). Document starts use one bucket of their own."""

    def __init__(self, buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = nn.Embedding(buckets, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.proj = CastedLinear(dim, model_dim)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        prev = torch.cat((torch.zeros_like(ids[:, :1]), ids[:, :-1]), dim=1)
        bucket = torch.bitwise_xor(36313 * ids, 27191 * prev) % (self.buckets - 1)
        bucket = torch.where(starts, torch.full_like(bucket, self.buckets - 1), bucket)
        h = self.embed(bucket).to(torch.bfloat16)
        return self.proj(h) * self.scale.to(h.dtype)


class ValueEmbedding(nn.Module):
    """A second token embedding that goes straight into the values of the last layers."""

    def __init__(self, vocab_size: int, dim: int, kv_dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.proj = CastedLinear(dim, kv_dim)
        nn.init.zeros_(self.proj.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.embed(ids).to(torch.bfloat16))


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.bos_id = args.bos_id
        self.softcap = args.logit_softcap
        self.register_buffer("qat_gate", torch.zeros(()), persistent=False)
        head_dim = args.model_dim // args.num_heads
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.smear = SmearGate(args.model_dim)
        self.bigram = BigramHash(args.bigram_buckets, args.bigram_dim, args.model_dim)
        self.ve_layers = [int(s) for s in args.ve_layers.split(",") if s.strip()]
        self.ve = ValueEmbedding(args.vocab_size, args.ve_dim, args.num_kv_heads * head_dim)
        self.ve_scales = nn.Parameter(torch.ones(max(1, len(self.ve_layers))))
        self.rotary = Rotary(args.rope_dims, args.rope_base, max(args.train_seq_len, args.eval_seq_len))
        self.blocks = nn.ModuleList(
            Block(args, layer, self.rotary, self.qat_gate) for layer in range(args.num_layers)
        )
        self.num_encoder = args.num_layers // 2
        self.num_decoder = args.num_layers - self.num_encoder
        self.skip_weights = nn.Parameter(torch.ones(min(self.num_encoder, self.num_decoder), args.model_dim))
        self.final_norm = RMSNorm()
        self._init_weights(args)

    def _init_weights(self, args: Hyperparameters) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        for name, module in self.blocks.named_modules():
            if isinstance(module, CastedLinear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def place(self, device: torch.device) -> "GPT":
        """Moves to the device and ties the QAT switch of all linears to one tensor again (.to() makes copies)."""
        self.to(device)
        gate = self.qat_gate
        for module in self.modules():
            if isinstance(module, CastedLinear) and module.qat_gate is not None:
                module.qat_gate = gate
        return self

    def hidden(self, ids: Tensor) -> Tensor:
        starts = ids == self.bos_id
        starts = torch.cat((torch.ones_like(starts[:, :1]), starts[:, 1:]), dim=1)
        x = self.tok_emb(ids).to(torch.bfloat16)
        x = x + self.bigram(ids, starts)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, starts)
        x0 = x
        value_extra = self.ve(ids) if self.ve_layers else None
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.num_encoder and skips:
                x = x + self.skip_weights[i - self.num_encoder].to(dtype=x.dtype) * skips.pop()
            extra = None
            if i in self.ve_layers:
                extra = value_extra * self.ve_scales[self.ve_layers.index(i)].to(dtype=x.dtype)
            x = block(x, x0, extra)
            if i < self.num_encoder:
                skips.append(x)
        return self.final_norm(x)

    def forward_logits(self, ids: Tensor) -> Tensor:
        h = self.hidden(ids)
        logits = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="mean")


# -----------------------------
# SCORING
# -----------------------------
#
# Position p of the stream is the one that predicts tokens[p + 1]; a split of n tokens has n - 1 of them. A plan is an
# int64 array with one row (start, end, first) per window: the model reads positions start..end-1 and the window
# answers for first..end-1. The [first, end) ranges of a plan tile 0..n-2, so nothing is left out or counted again.


class Score(NamedTuple):
    loss: float
    bpb: float
    tokens: int
    nbytes: int


class Tally:
    """Sums of one evaluation, kept on the device in fp64 and added up over ranks at the end."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, nbytes: Tensor, live: Tensor) -> None:
        self.sums[0] += torch.where(live, nll, torch.zeros_like(nll)).to(torch.float64).sum()
        self.sums[1] += live.sum().to(torch.float64)
        self.sums[2] += torch.where(live, nbytes, torch.zeros_like(nbytes)).sum().to(torch.float64)

    def result(self) -> Score:
        sums = self.sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        nll, count, nbytes = sums.tolist()
        return Score(nll / count, nll / (math.log(2.0) * nbytes), int(count), int(nbytes))


def plan_windows(total: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows of full length; the first one answers for all it reads, each later one for its last `stride` positions.

    The last window is shifted left so that it ends with the stream, and answers only for what is still open.
    """
    head = min(seq_len, total)
    rows = [(0, head, 0)]
    for first in range(head, total, stride):
        end = min(first + stride, total)
        rows.append((end - seq_len, end, first))
    return np.asarray(rows, dtype=np.int64)


def share(plan: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    return np.array_split(plan, world_size)[rank]


@torch.no_grad()
def score_plan(
    logits_fn: Callable[[Tensor], Tensor],
    tokens: Tensor,
    plan: np.ndarray,
    table: ByteTable,
    batch_seqs: int,
    tally: Tally,
    cache: "CountCache | None" = None,
) -> None:
    """Scores the windows of one rank. Short batches are filled up with dead rows so that compiled shapes repeat."""
    if len(plan) == 0:
        return
    device = tokens.device
    span = int(plan[0, 1] - plan[0, 0])
    offsets = torch.arange(span + 1, device=device)
    for lo in range(0, len(plan), batch_seqs):
        rows = plan[lo : lo + batch_seqs]
        real = len(rows)
        if real < batch_seqs:
            rows = np.concatenate((rows, np.repeat(rows[-1:], batch_seqs - real, axis=0)))
        rows_t = torch.from_numpy(rows).to(device)
        ids = tokens[rows_t[:, :1] + offsets].to(torch.int64)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x)
        logits = logits.float()
        live = (rows_t[:, :1] + offsets[:-1]) >= rows_t[:, 2:]
        live[real:] = False
        if cache is None:
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").view_as(y)
        else:
            nll = cache.nll(logits, x, y)
        tally.add(nll, table.count(x, y), live)


def eval_windows(
    args: Hyperparameters,
    logits_fn: Callable[[Tensor], Tensor],
    tokens: Tensor,
    table: ByteTable,
    stride: int,
    rank: int,
    world_size: int,
) -> Score:
    """Fixed weights over the whole split. stride == eval_seq_len is the plain, non-overlapping evaluation."""
    plan = plan_windows(tokens.numel() - 1, args.eval_seq_len, stride)
    tally = Tally(tokens.device)
    score_plan(logits_fn, tokens, share(plan, rank, world_size), table, args.eval_batch_seqs, tally)
    return tally.result()


class CountCache:
    """Counts of what followed each pair of tokens so far, as whole rows over the vocabulary.

    The pair is hashed to a bucket, the bucket holds a count for every token, and a row is divided by its own sum, so
    collisions blur the estimate but it stays a distribution. The weight of a row grows with its mass alone.
    """

    def __init__(self, args: Hyperparameters, device: torch.device):
        self.weight = args.cache_weight
        self.half = args.cache_half
        self.buckets = args.cache_buckets
        self.vocab = args.vocab_size
        self.counts = torch.zeros(self.buckets, self.vocab, dtype=torch.float32, device=device)
        self.seen = 0

    def bucket(self, before: Tensor, last: Tensor) -> Tensor:
        return torch.bitwise_xor(before * 73856093, last * 19349663) % self.buckets

    def context(self, x: Tensor) -> Tensor:
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        return self.bucket(before, x)

    def mix(self, logits: Tensor, x: Tensor) -> Tensor:
        """[B, T, V] probabilities: model and counts, both normalised over the vocabulary."""
        model_p = torch.softmax(logits, dim=-1)
        rows = self.counts[self.context(x)]
        mass = rows.sum(dim=-1, keepdim=True)
        count_p = (rows + 1.0 / self.vocab) / (mass + 1.0)
        w = self.weight * mass / (mass + self.half)
        return (1.0 - w) * model_p + w * count_p

    def nll(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        p = self.mix(logits, x).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return -torch.log(p.clamp_min(1e-30))

    def update(self, tokens: Tensor, start: int, end: int) -> None:
        """Takes in the answers of positions start..end-1. All ranks call it with the same range."""
        start = max(start, 1)
        before = tokens[start - 1 : end - 1].to(torch.int64)
        last = tokens[start:end].to(torch.int64)
        nxt = tokens[start + 1 : end + 1].to(torch.int64)
        flat = self.bucket(before, last) * self.vocab + nxt
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
        self.seen += end - start


# -----------------------------
# TEST-TIME TRAINING (score first)
# -----------------------------


def ttt_parameters(args: Hyperparameters, model: GPT) -> list[nn.Parameter]:
    """Everything but the first ttt_freeze_blocks blocks."""
    frozen = {id(p) for block in model.blocks[: args.ttt_freeze_blocks] for p in block.parameters()}
    params = []
    for p in model.parameters():
        p.requires_grad_(id(p) not in frozen)
        if p.requires_grad:
            params.append(p)
    return params


def mean_gradients(params: list[nn.Parameter], world_size: int) -> None:
    """One flat all_reduce instead of ninety small ones."""
    if world_size == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    cursor = 0
    for g in grads:
        g.copy_(flat[cursor : cursor + g.numel()].view_as(g))
        cursor += g.numel()


def fit_chunk(
    args: Hyperparameters,
    model: GPT,
    optimizer: torch.optim.SGD,
    params: list[nn.Parameter],
    tokens: Tensor,
    start: int,
    end: int,
    rank: int,
    world_size: int,
) -> float:
    """SGD over positions start..end-1. Every rank takes its sequences; the gradients are averaged over ranks."""
    seq_len = args.eval_seq_len
    num_seqs = (end - start) // seq_len
    per_step = max(1, args.ttt_batch_seqs // world_size)
    ids = tokens[start : start + num_seqs * seq_len + 1].to(torch.int64)
    x_all = ids[:-1].view(num_seqs, seq_len)
    y_all = ids[1:].view(num_seqs, seq_len)
    last_loss = 0.0
    for epoch in range(args.ttt_epochs):
        order = np.random.default_rng((args.seed, start, epoch)).permutation(num_seqs)[rank::world_size]
        for lo in range(0, len(order), per_step):
            pick = torch.from_numpy(order[lo : lo + per_step]).to(tokens.device)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x_all[pick], y_all[pick])
            loss.backward()
            mean_gradients(params, world_size)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()
            last_loss = float(loss.detach())
    return last_loss


def eval_ttt(
    args: Hyperparameters,
    model: GPT,
    logits_fn: Callable[[Tensor], Tensor],
    tokens: Tensor,
    table: ByteTable,
    rank: int,
    world_size: int,
    log0: Callable[..., None],
) -> Score:
    """Chunk by chunk: score it with the weights as they are, then train on it, then go on to the next."""
    total = tokens.numel() - 1
    chunk = args.ttt_chunk_tokens
    if chunk % (args.eval_seq_len * world_size) or args.eval_seq_len % args.eval_stride:
        raise ValueError("TTT_CHUNK_TOKENS must hold whole sequences for each rank and whole strides")
    plan = plan_windows(total, args.eval_seq_len, args.eval_stride)
    num_chunks = (total + chunk - 1) // chunk
    # Windows go to the chunk of the first position they answer for; strides divide chunks, so none straddles two.
    edges = np.searchsorted(plan[:, 2], np.arange(num_chunks + 1) * chunk)
    params = ttt_parameters(args, model)
    optimizer = torch.optim.SGD(params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    cache = CountCache(args, tokens.device) if args.cache_weight > 0 else None
    tally = Tally(tokens.device)
    t0 = time.perf_counter()
    log0(
        f"ttt:start chunks:{num_chunks} chunk_tokens:{chunk} windows:{len(plan)} epochs:{args.ttt_epochs} "
        f"lr:{args.ttt_lr} params:{sum(p.numel() for p in params)}"
    )
    for ci in range(num_chunks):
        start, end = ci * chunk, min((ci + 1) * chunk, total)
        mine = share(plan[edges[ci] : edges[ci + 1]], rank, world_size)
        model.eval()
        score_plan(logits_fn, tokens, mine, table, args.eval_batch_seqs, tally, cache)
        if ci == num_chunks - 1:
            break
        if cache is not None:
            cache.update(tokens, start, end)
        lr = 0.5 * args.ttt_lr * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        fit_loss = fit_chunk(args, model, optimizer, params, tokens, start, end, rank, world_size)
        if rank == 0 and (ci % 100 == 0 or ci == num_chunks - 2):
            nll, count, nbytes = tally.sums.tolist()
            running = nll / (math.log(2.0) * nbytes)
            log0(
                f"  ttt chunk {ci + 1}/{num_chunks} rank0_bpb:{running:.5f} lr:{lr:.6f} fit_loss:{fit_loss:.4f} "
                f"time:{time.perf_counter() - t0:.1f}s"
            )
    score = tally.result()
    log0(f"ttt:done scored:{score.tokens}/{total} bytes:{score.nbytes} time:{time.perf_counter() - t0:.1f}s")
    return score


# -----------------------------
# WEIGHT AVERAGES
# -----------------------------


class WeightAverages:
    """EMA over every step, plus a tight SWA over the last part of the warmdown."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self.live = [p.detach() for _, p in model.named_parameters()]
        self.ema = [p.detach().float().clone() for p in self.live]
        self.swa: list[Tensor] | None = None
        self.swa_count = 0

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_lerp_(self.ema, self.live, 1.0 - self.decay)

    @torch.no_grad()
    def snapshot(self) -> None:
        if self.swa is None:
            self.swa = [p.float().clone() for p in self.live]
        else:
            torch._foreach_add_(self.swa, self.live)
        self.swa_count += 1

    def candidates(self) -> dict[str, list[Tensor]]:
        out = {"ema": self.ema}
        if self.swa is not None:
            out["swa"] = [p / self.swa_count for p in self.swa]
        return out

    def merged(self, swa_mix: float) -> list[Tensor]:
        """(1 - swa_mix) * EMA + swa_mix * SWA; the EMA alone if the run was too short for a snapshot."""
        found = self.candidates()
        if "swa" not in found:
            return found["ema"]
        return [torch.lerp(e, s, swa_mix) for e, s in zip(found["ema"], found["swa"])]

    @torch.no_grad()
    def load_into(self, weights: list[Tensor]) -> None:
        for p, w in zip(self.live, weights):
            p.copy_(w)


# -----------------------------
# GPTQ
# -----------------------------


def int6_targets(model: GPT) -> dict[str, CastedLinear]:
    """The matrices of the blocks: all of them go to six bits."""
    return {
        f"blocks.{name}.weight": module
        for name, module in model.blocks.named_modules()
        if isinstance(module, CastedLinear)
    }


@torch.no_grad()
def generate_sequences(model: GPT, args: Hyperparameters, count: int, length: int, device: torch.device) -> Tensor:
    """Lets the model write its own calibration text: start token, then sampling. No data is read.

    No KV cache, so this is slow (the window is cut to 512 positions to bear it); see CALIB_SOURCE.
    """
    gen = torch.Generator(device=device).manual_seed(args.seed + 17)
    ids = torch.full((count, 1), args.bos_id, dtype=torch.int64, device=device)
    for _ in range(length):
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = model.forward_logits(ids[:, -512:])[:, -1].float()
        p = torch.softmax(logits / args.selfgen_temperature, dim=-1)
        ids = torch.cat((ids, torch.multinomial(p, 1, generator=gen)), dim=1)
    return ids[:, :length]


def calibration_batches(
    args: Hyperparameters,
    model: GPT,
    loader: DistributedTokenLoader,
    rank: int,
    world_size: int,
    device: torch.device,
) -> list[Tensor]:
    """This rank's share of the calibration text."""
    per_rank = max(args.calib_batch, args.calib_seqs // world_size)
    rounds = max(1, per_rank // args.calib_batch)
    if args.calib_source == "train":
        batches = []
        for _ in range(rounds):
            x, _ = loader.next_batch(args.calib_batch * world_size * args.train_seq_len, args.train_seq_len, 1)
            batches.append(x)
        return batches
    if args.calib_source == "selfgen":
        own = copy.copy(args)
        own.seed = args.seed + 1000 * rank
        text = generate_sequences(model, own, 16, args.train_seq_len, device)
        return list(text.split(args.calib_batch))
    raise ValueError(f"CALIB_SOURCE={args.calib_source}: train or selfgen")


@torch.no_grad()
def collect_hessians(model: GPT, batches: list[Tensor], world_size: int) -> dict[str, Tensor]:
    """Sum of x x^T over everything each matrix saw, over all ranks."""
    hessians: dict[str, Tensor] = {}
    handles = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].size(-1)).float()
            if name not in hessians:
                hessians[name] = torch.zeros(x.size(1), x.size(1), dtype=torch.float32, device=x.device)
            hessians[name].addmm_(x.T, x)

        return hook

    for name, module in int6_targets(model).items():
        handles.append(module.register_forward_pre_hook(watch(name)))
    model.eval()
    for x in batches:
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.forward_logits(x)
    for handle in handles:
        handle.remove()
    if world_size > 1:
        for name in sorted(hessians):
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
    return hessians


def row_scales(W: Tensor, levels: int) -> Tensor:
    """Per-row step: the clipping quantile with the least squared error, already rounded to fp16."""
    best_scale = best_err = None
    for q in (0.9990, 0.9995, 0.9999, 1.0):
        top = torch.quantile(W.abs(), q, dim=1) if q < 1.0 else W.abs().amax(dim=1)
        scale = (top / levels).clamp_min(1e-7).half().float().clamp_min(6e-8)
        rounded = torch.clamp(torch.round(W / scale[:, None]), -levels, levels) * scale[:, None]
        err = (W - rounded).square().sum(dim=1)
        if best_err is None:
            best_scale, best_err = scale, err
        else:
            better = err < best_err
            best_scale = torch.where(better, scale, best_scale)
            best_err = torch.where(better, err, best_err)
    return best_scale


@torch.no_grad()
def gptq_rows(
    weight: Tensor, hessian: Tensor, levels: int, block: int, damp: float
) -> tuple[Tensor, Tensor]:
    """GPTQ with the full Hessian and activation order. Returns int8 codes and fp16 row scales."""
    W = weight.detach().float().clone()
    H = hessian.float().clone()
    rows, cols = W.shape
    diag = torch.diagonal(H)
    dead = diag == 0
    diag[dead] = 1.0
    W[:, dead] = 0.0
    diag.add_(damp * diag.mean())
    perm = torch.argsort(diag, descending=True)
    W = W[:, perm]
    H = H[perm][:, perm]
    scale = row_scales(W, levels)
    inv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inv, upper=True)
    codes = torch.zeros_like(W)
    for lo in range(0, cols, block):
        hi = min(lo + block, cols)
        part = W[:, lo:hi].clone()
        errors = torch.zeros_like(part)
        corner = U[lo:hi, lo:hi]
        for j in range(hi - lo):
            w = part[:, j]
            q = torch.clamp(torch.round(w / scale), -levels, levels)
            codes[:, lo + j] = q
            e = (w - q * scale) / corner[j, j]
            part[:, j:] -= e[:, None] * corner[j, j:][None, :]
            errors[:, j] = e
        W[:, hi:] -= errors @ U[lo:hi, hi:]
    undo = torch.argsort(perm)
    return codes[:, undo].to(torch.int8), scale.half()


def round_rows(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Plain round-to-nearest, for embeddings and the odd small matrix (levels = 127)."""
    W = weight.detach().float()
    scale = (W.abs().amax(dim=1) / levels).clamp_min(1e-7).half().float().clamp_min(6e-8)
    codes = torch.clamp(torch.round(W / scale[:, None]), -levels, levels)
    return codes.to(torch.int8), scale.half()


def quantize_model(
    args: Hyperparameters, model: GPT, hessians: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """State dict -> flat dict of CPU tensors (NAME.q, NAME.s or NAME), and how many tensors went which way."""
    payload: dict[str, Tensor] = {}
    stats = {"int6": 0, "int8": 0, "kept": 0}
    for name, tensor in model.state_dict().items():
        if name in hessians:
            codes, scale = gptq_rows(tensor, hessians[name], 31, args.gptq_block, args.gptq_damp)
            stats["int6"] += 1
        elif tensor.ndim == 2 and tensor.numel() > 65536 and not any(c in name for c in CONTROL_NAMES):
            codes, scale = round_rows(tensor, 127)
            stats["int8"] += 1
        else:
            control = any(c in name for c in CONTROL_NAMES)
            payload[name] = tensor.detach().to("cpu", torch.float32 if control else torch.float16).contiguous()
            stats["kept"] += 1
            continue
        payload[name + ".q"] = codes.cpu().contiguous()
        payload[name + ".s"] = scale.cpu().contiguous()
    return payload, stats


def dequantize(payload: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in payload.items():
        if name.endswith(".q"):
            scale = payload[name[:-2] + ".s"].float()
            state[name[:-2]] = tensor.float() * scale[:, None]
        elif not name.endswith(".s"):
            state[name] = tensor.float()
    return state


# -----------------------------
# ARTIFACT
# -----------------------------

LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 25, "lc": 3, "lp": 0, "pb": 0}]


def pack(payload: dict[str, Tensor]) -> bytes:
    buf = io.BytesIO()
    torch.save(payload, buf)
    return lzma.compress(buf.getvalue(), format=lzma.FORMAT_XZ, filters=LZMA_FILTERS)


def unpack(blob: bytes) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)


def drop_small_codes(payload: dict[str, Tensor], hessian_names: list[str], count: int) -> dict[str, Tensor]:
    """Sets the `count` cheapest codes of size one to zero: a longer run of zeros for LZMA, a small error each."""
    if count <= 0:
        return payload
    out = dict(payload)
    costs, owners, places = [], [], []
    for k, name in enumerate(hessian_names):
        codes, scale = payload[name + ".q"], payload[name + ".s"].float()
        at = (codes.abs() == 1).nonzero()
        costs.append(scale[at[:, 0]].square())
        owners.append(torch.full((at.size(0),), k, dtype=torch.int32))
        places.append(at[:, 0] * codes.size(1) + at[:, 1])
    cost, owner, place = torch.cat(costs), torch.cat(owners), torch.cat(places)
    chosen = torch.argsort(cost)[:count]
    for k, name in enumerate(hessian_names):
        mine = place[chosen[owner[chosen] == k]]
        codes = payload[name + ".q"].clone()
        codes.view(-1)[mine] = 0
        out[name + ".q"] = codes
    return out


def pack_within(
    payload: dict[str, Tensor], hessian_names: list[str], budget: int, log0: Callable[..., None]
) -> bytes:
    """Packs; if that is too large, bisects the number of codes to drop. Works on the weights alone."""
    blob = pack(payload)
    if len(blob) <= budget:
        return blob
    ones = sum(int((payload[name + ".q"].abs() == 1).sum()) for name in hessian_names)
    low, high = 0, ones // 2
    best = pack(drop_small_codes(payload, hessian_names, high))
    if len(best) > budget:
        raise RuntimeError(f"artifact does not fit: {len(best)} bytes after dropping {high} codes, budget {budget}")
    for _ in range(5):
        mid = (low + high) // 2
        trial = pack(drop_small_codes(payload, hessian_names, mid))
        log0(f"pack: dropped {mid}/{ones} codes -> {len(trial)} bytes")
        if len(trial) <= budget:
            high, best = mid, trial
        else:
            low = mid
    return best


# -----------------------------
# TRAINING
# -----------------------------


class Runtime(NamedTuple):
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    distributed: bool

    @property
    def master(self) -> bool:
        return self.rank == 0


def start_runtime() -> Runtime:
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size <= 0 or 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so that grad_accum_steps stays integral")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return Runtime(rank, world_size, local_rank, device, distributed)


def make_logger(args: Hyperparameters, run: Runtime) -> Callable[..., None]:
    logfile = None
    if run.master:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{args.run_id}.txt"
        print(logfile)

    def log0(msg: str, console: bool = True) -> None:
        if logfile is None:
            return
        if console:
            print(msg, flush=True)
        with open(logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)

    return log0


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def build_optimizers(args: Hyperparameters, model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    embeds, matrices, scalars = [], [], []
    for name, p in model.named_parameters():
        if name in ("tok_emb.weight", "bigram.embed.weight", "ve.embed.weight"):
            embeds.append(p)
        elif p.ndim == 2 and not any(c in name for c in CONTROL_NAMES):
            matrices.append(p)
        else:
            scalars.append(p)
    adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    opt_embed = torch.optim.AdamW(
        [{"params": embeds, "lr": args.embed_lr, "base_lr": args.embed_lr}], weight_decay=args.adam_wd, **adam
    )
    opt_scalar = torch.optim.AdamW(
        [{"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr}], weight_decay=0.0, **adam
    )
    opt_muon = Muon(
        matrices,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    for group in opt_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    return [opt_embed, opt_scalar, opt_muon], opt_muon


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, budget_ms: float | None) -> float:
    """1 until the warmdown, then linear to 0; by time if there is a cap, by steps if not."""
    if args.warmdown_iters <= 0:
        return 1.0
    if budget_ms is None:
        start = max(args.iterations - args.warmdown_iters, 0)
        if step < start:
            return 1.0
        return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(budget_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


def warm_kernels(
    args: Hyperparameters,
    run: Runtime,
    model: nn.Module,
    base_model: GPT,
    optimizers: list[torch.optim.Optimizer],
    grad_accum_steps: int,
    log0: Callable[..., None],
) -> None:
    """Compiles everything with a few throw-away steps on training text, then puts weights and optimisers back."""
    if args.warmup_steps <= 0:
        return
    weights = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
    states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    loader = DistributedTokenLoader(args.train_files, run.rank, run.world_size, run.device)
    base_model.train()
    for i in range(args.warmup_steps):
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        for micro in range(grad_accum_steps):
            if run.distributed:
                model.require_backward_grad_sync = micro == grad_accum_steps - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            (loss / grad_accum_steps).backward()
        for opt in optimizers:
            opt.step()
        if (i + 1) % 10 == 0 or i + 1 == args.warmup_steps:
            log0(f"warmup_step:{i + 1}/{args.warmup_steps}")
    base_model.load_state_dict(weights, strict=True)
    for opt, state in zip(optimizers, states):
        opt.load_state_dict(state)
        opt.zero_grad(set_to_none=True)
    if run.distributed:
        model.require_backward_grad_sync = True


def train(
    args: Hyperparameters,
    run: Runtime,
    base_model: GPT,
    val_tokens: Tensor,
    table: ByteTable,
    log0: Callable[..., None],
) -> tuple[WeightAverages, DistributedTokenLoader, float]:
    """The training loop. Returns the averages, the loader where it stands, and the milliseconds on the clock."""
    grad_accum_steps = 8 // run.world_size
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = compiled
    if run.distributed:
        model = DDP(compiled, device_ids=[run.local_rank], broadcast_buffers=False)
    val_logits = torch.compile(base_model.forward_logits, dynamic=False)
    optimizers, opt_muon = build_optimizers(args, base_model)
    log0(f"world_size:{run.world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed} fa3:{HAVE_FA3}")
    warm_kernels(args, run, model, base_model, optimizers, grad_accum_steps, log0)

    budget_ms = None
    if args.max_wallclock_seconds > 0:
        budget_ms = 1000.0 * (args.max_wallclock_seconds - args.finalize_reserve_seconds)
    loader = DistributedTokenLoader(args.train_files, run.rank, run.world_size, run.device)
    averages = WeightAverages(base_model, args.ema_decay)
    clock_ms = 0.0
    stop_after: int | None = None
    qat_on = False
    step = 0
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    while True:
        last_step = step == args.iterations or (stop_after is not None and step >= stop_after)
        if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            clock_ms += 1000.0 * (time.perf_counter() - t0)
            base_model.eval()
            score = eval_windows(args, val_logits, val_tokens, table, args.eval_seq_len, run.rank, run.world_size)
            base_model.train()
            log0(
                f"step:{step}/{args.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
                f"train_time:{clock_ms:.0f}ms step_avg:{clock_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{clock_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = clock_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, budget_ms)
        if not qat_on and scale < args.qat_start_scale:
            base_model.qat_gate.fill_(1.0)
            qat_on = True
            log0(f"qat:on step:{step} scale:{scale:.3f}")

        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        train_loss = torch.zeros((), device=run.device)
        for micro in range(grad_accum_steps):
            if run.distributed:
                model.require_backward_grad_sync = micro == grad_accum_steps - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            train_loss += loss.detach() / grad_accum_steps
            (loss / grad_accum_steps).backward()

        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        for group in opt_muon.param_groups:
            group["momentum"] = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        averages.step()
        step += 1
        if scale < args.swa_start_scale and step % args.swa_every == 0:
            averages.snapshot()

        elapsed_ms = clock_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / step:.2f}ms"
            )

        reached = budget_ms is not None and elapsed_ms >= budget_ms
        if run.distributed and budget_ms is not None:
            flag = torch.tensor(int(reached), device=run.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached = bool(flag.item())
        if stop_after is None and reached:
            stop_after = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    return averages, loader, clock_ms


def finalize(
    args: Hyperparameters,
    run: Runtime,
    base_model: GPT,
    averages: WeightAverages,
    loader: DistributedTokenLoader,
    clock_ms: float,
    log0: Callable[..., None],
) -> dict[str, Tensor]:
    """Averages, Hessians, GPTQ: all of it on the training clock, inside the reserve."""
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    averages.load_into(averages.merged(args.swa_mix))
    log0(f"averages: ema decay:{args.ema_decay} swa snapshots:{averages.swa_count} mix:{args.swa_mix}")
    base_model.eval()
    batches = calibration_batches(args, base_model, loader, run.rank, run.world_size, run.device)
    hessians = collect_hessians(base_model, batches, run.world_size)
    payload, stats = quantize_model(args, base_model, hessians)
    torch.cuda.synchronize()
    spent_ms = 1000.0 * (time.perf_counter() - t0)
    log0(f"gptq:int6 {stats['int6']} int8 {stats['int8']} kept {stats['kept']}")
    log0(f"gptq:calibration on {args.calib_source} text took {spent_ms:.0f}ms, train+gptq {clock_ms + spent_ms:.0f}ms")
    if args.max_wallclock_seconds > 0 and clock_ms + spent_ms > 1000.0 * args.max_wallclock_seconds:
        log0("gptq:WARNING over the cap, raise FINALIZE_RESERVE_SECONDS")
    return payload


# -----------------------------
# MAIN
# -----------------------------

ARTIFACT = "final_model.int6.ptz"


def write_artifact(
    args: Hyperparameters,
    run: Runtime,
    payload: dict[str, Tensor],
    hessian_names: list[str],
    code_bytes: int,
    log0: Callable[..., None],
) -> None:
    if run.master:
        blob = pack_within(payload, hessian_names, args.size_limit - code_bytes, log0)
        with open(ARTIFACT, "wb") as f:
            f.write(blob)
        model_bytes = os.path.getsize(ARTIFACT)
        log0(f"Serialized model int6+lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {model_bytes + code_bytes} bytes (limit {args.size_limit})")
    if run.distributed:
        dist.barrier()


def read_artifact(args: Hyperparameters, run: Runtime) -> GPT:
    """A fresh model with nothing in it but what the file holds."""
    blob = Path(ARTIFACT).read_bytes()
    scorer = GPT(args).place(run.device)
    scorer.load_state_dict(dequantize(unpack(blob)), strict=True)
    scorer.eval()
    return scorer


def final_evaluation(
    args: Hyperparameters,
    run: Runtime,
    val_tokens: Tensor,
    table: ByteTable,
    log0: Callable[..., None],
) -> None:
    """Everything from here on is on the evaluation clock (600 s). The last line it writes is the submitted score."""
    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    scorer = read_artifact(args, run)
    torch._dynamo.reset()
    logits_fn = torch.compile(scorer.forward_logits, dynamic=False)

    def timed(label: str, fn: Callable[[], Score], note: str = "") -> Score:
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        score = fn()
        torch.cuda.synchronize()
        ms = 1000.0 * (time.perf_counter() - t0)
        log0(f"{label} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}{note} eval_time:{ms:.0f}ms")
        log0(f"{label}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
        return score

    timed(
        "final_roundtrip",
        lambda: eval_windows(
            args, logits_fn, val_tokens, table, args.eval_seq_len, run.rank, run.world_size
        ),
    )
    final = timed(
        "final_sliding_window",
        lambda: eval_windows(
            args, logits_fn, val_tokens, table, args.eval_stride, run.rank, run.world_size
        ),
        note=f" stride:{args.eval_stride}",
    )
    if args.ttt_enabled:
        final = timed(
            "legal_ttt",
            lambda: eval_ttt(
                args, scorer, logits_fn, val_tokens, table, run.rank, run.world_size, log0
            ),
        )
    torch.cuda.synchronize()
    log0(f"eval_total_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms tokens:{final.tokens} bytes:{final.nbytes}")
    log0(f"submission val_loss:{final.loss:.8f} val_bpb:{final.bpb:.8f}")


def main() -> None:
    global zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    code_bytes = len(code.encode("utf-8"))
    args = Hyperparameters()
    run = start_runtime()
    log0 = make_logger(args, run)
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)
    log0("=" * 100, console=False)
    seed_everything(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    check_tokenizer(args, sp)
    table = ByteTable(sp, args.vocab_size, run.device)
    val_tokens = load_validation_tokens(args.val_files).to(run.device)
    log0(f"train_loader:shards pattern={args.train_files} files:{len(list_shards(args.train_files))}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    base_model = GPT(args).place(run.device)
    base_model.train()
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(
        f"layers:{args.num_layers} dim:{args.model_dim} heads:{args.num_heads}/{args.num_kv_heads} "
        f"xsa_last:{args.xsa_last_n} mlp:{args.mlp_mult} bigram:{args.bigram_buckets}x{args.bigram_dim} "
        f"ve:{args.ve_layers} rope_dims:{args.rope_dims}"
    )
    averages, loader, clock_ms = train(args, run, base_model, val_tokens, table, log0)
    payload = finalize(args, run, base_model, averages, loader, clock_ms, log0)
    hessian_names = list(int6_targets(base_model))
    write_artifact(args, run, payload, hessian_names, code_bytes, log0)

    del base_model, averages, loader, payload
    torch.cuda.empty_cache()
    final_evaluation(args, run, val_tokens, table, log0)
    if run.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
