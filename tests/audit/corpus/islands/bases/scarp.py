"""
Scarp: 11L GQA transformer, LeakyReLU^2 MLP, XSA tail layers, EMA, GPTQ-lite int6 + lzma,
sliding evaluation with a score-first hashed n-gram backoff cache (orders 2..9) and score-first TTT.

torchrun --standalone --nproc_per_node=8 train_gpt.py
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
from contextlib import nullcontext
from dataclasses import dataclass
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

    HAVE_FA3 = True
except ImportError:
    HAVE_FA3 = False

# -----------------------------
# HYPERPARAMETERS
# -----------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, "1" if default else "0")))


class Hyperparameters:
    # Data paths and run identity.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)
    bos_id = env_int("BOS_ID", 1)

    # Validation during training (logged only).
    val_batch_size = env_int("VAL_BATCH_SIZE", 524_288)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)

    # Training length.
    iterations = env_int("ITERATIONS", 20000)
    warmdown_iters = env_int("WARMDOWN_ITERS", 3500)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    quant_reserve_seconds = env_float("QUANT_RESERVE_SECONDS", 22.0)

    # Model shape.
    vocab_size = env_int("VOCAB_SIZE", 1024)
    num_layers = env_int("NUM_LAYERS", 11)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    model_dim = env_int("MODEL_DIM", 512)
    mlp_mult = env_float("MLP_MULT", 3.0)
    leaky_slope = env_float("LEAKY_SLOPE", 0.5)
    xsa_last_n = env_int("XSA_LAST_N", 4)
    rope_dims = env_int("ROPE_DIMS", 16)
    rope_base = env_float("ROPE_BASE", 10000.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 1.5)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    tied_embed_init_std = env_float("TIED_EMBED_INIT_STD", 0.005)

    # Optimizer.
    tied_embed_lr = env_float("TIED_EMBED_LR", 0.035)
    matrix_lr = env_float("MATRIX_LR", 0.025)
    scalar_lr = env_float("SCALAR_LR", 0.025)
    muon_momentum = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_warmup_start = env_float("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_warmup_steps = env_int("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_backend_steps = env_int("MUON_BACKEND_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.04)
    adam_wd = env_float("ADAM_WD", 0.04)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    grad_clip_norm = env_float("GRAD_CLIP_NORM", 0.3)

    # Weight averaging and late fake-quant.
    ema_decay = env_float("EMA_DECAY", 0.997)
    late_qat_threshold = env_float("LATE_QAT_THRESHOLD", 0.15)

    # GPTQ-lite.
    calib_batches = env_int("CALIB_BATCHES", 96)
    calib_seqs = env_int("CALIB_SEQS", 8)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    artifact_limit = env_int("ARTIFACT_LIMIT", 16_000_000)

    # Sliding evaluation.
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_batch_seqs = env_int("EVAL_BATCH_SEQS", 64)
    eval_budget_seconds = env_float("EVAL_BUDGET_SECONDS", 540.0)
    segment_tokens = env_int("SEGMENT_TOKENS", 1_048_576)

    # n-gram backoff cache.
    ngram_enabled = env_flag("NGRAM_ENABLED", True)
    ngram_min_order = env_int("NGRAM_MIN_ORDER", 2)
    ngram_max_order = env_int("NGRAM_MAX_ORDER", 9)
    ngram_bits = env_int("NGRAM_BITS", 22)
    ngram_min_count = env_int("NGRAM_MIN_COUNT", 2)
    ngram_prior = env_float("NGRAM_PRIOR", 0.02)
    ngram_alpha_lo = env_float("NGRAM_ALPHA_LO", 0.02)
    ngram_alpha_hi = env_float("NGRAM_ALPHA_HI", 0.35)
    ngram_entropy_mid = env_float("NGRAM_ENTROPY_MID", 3.4)
    ngram_entropy_slope = env_float("NGRAM_ENTROPY_SLOPE", 1.6)

    # Test-time training, always after a segment has been scored.
    ttt_enabled = env_flag("TTT_ENABLED", True)
    ttt_epochs = env_int("TTT_EPOCHS", 3)
    ttt_lr = env_float("TTT_LR", 0.002)
    ttt_momentum = env_float("TTT_MOMENTUM", 0.9)
    ttt_batch_seqs = env_int("TTT_BATCH_SEQS", 8)
    ttt_freeze_blocks = env_int("TTT_FREEZE_BLOCKS", 2)
    ttt_grad_clip = env_float("TTT_GRAD_CLIP", 1.0)


# -----------------------------
# MUON
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Orthogonalise a matrix with the quintic Newton-Schulz iteration."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X /= X.norm() + eps
    flipped = G.size(0) > G.size(1)
    if flipped:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if flipped else X


class Muon(torch.optim.Optimizer):
    """Momentum + orthogonalised update; ranks take turns and share the result by one all-reduce."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay),
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
            total = sum(int(p.numel()) for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cursor = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(g)
                    g = g.add(buf, alpha=group["momentum"])
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            cursor = 0
            for p in params:
                update = flat[cursor : cursor + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
                cursor += p.numel()
        return loss


# -----------------------------
# TOKENIZER BYTES
# -----------------------------


@dataclass
class PieceBytes:
    """UTF-8 bytes of every token: the piece without its mark, and one byte more for the mark where it becomes a space."""

    base: np.ndarray
    leading: np.ndarray
    boundary: np.ndarray

    @classmethod
    def from_sentencepiece(cls, sp: spm.SentencePieceProcessor, vocab_size: int) -> "PieceBytes":
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros(size, dtype=np.int64)
        leading = np.zeros(size, dtype=bool)
        boundary = np.ones(size, dtype=bool)
        for token_id in range(int(sp.vocab_size())):
            if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
                continue
            boundary[token_id] = False
            if sp.is_byte(token_id):
                base[token_id] = 1
                continue
            piece = sp.id_to_piece(token_id)
            if piece.startswith("\u2581"):
                leading[token_id] = True
                piece = piece[1:]
            base[token_id] = len(piece.encode("utf-8"))
        return cls(base, leading, boundary)

    def count(self, prev: np.ndarray, target: np.ndarray) -> int:
        spaces = self.leading[target] & ~self.boundary[prev]
        return int(self.base[target].sum() + spaces.sum())


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected = 256 * 4 + num_tokens * 2
    if file.stat().st_size != expected:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected} bytes")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=256 * 4)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(f) for f in files]).contiguous()


class ShardStream:
    """An endless stream of tokens through the training shards, in order."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.index = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def _next_file(self) -> None:
        self.index = (self.index + 1) % len(self.files)
        self.tokens = load_data_shard(self.files[self.index])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        remaining = n
        while remaining > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self._next_file()
                continue
            k = min(remaining, avail)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            remaining -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class DistributedLoader:
    """Every rank reads the same stream and keeps its own span of each global batch."""

    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = ShardStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        span = local_tokens + 1
        chunk = self.stream.take(span * self.world_size)
        start = self.rank * span
        local = chunk[start : start + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


class TrainClock:
    """Training wall clock: runs from the first step to the packed artifact, held only for logged validation."""

    def __init__(self, limit_seconds: float):
        self.limit_ms = 1000.0 * limit_seconds
        self.banked_ms = 0.0
        self.started: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.started = time.perf_counter()

    def hold(self) -> None:
        torch.cuda.synchronize()
        self.banked_ms = self.elapsed_ms()
        self.started = None

    def elapsed_ms(self) -> float:
        live = 0.0 if self.started is None else 1000.0 * (time.perf_counter() - self.started)
        return self.banked_ms + live

    def left_ms(self) -> float:
        return self.limit_ms - self.elapsed_ms()


# -----------------------------
# MODEL
# -----------------------------

CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear")


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights in fp32, cast where they are used; fakes int6 rows once late QAT is on."""

    qat: bool = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)
        if CastedLinear.qat and self.training and w.ndim == 2:
            with torch.no_grad():
                wf = self.weight.float()
                scale = (wf.abs().amax(dim=1, keepdim=True) / 31.0).clamp_min(1e-8)
                rounded = (torch.clamp(torch.round(wf / scale), -31, 31) * scale).to(x.dtype)
            w = w + (rounded - w).detach()
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or any(p in name for p in CONTROL_PATTERNS)) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(seq_len, device=device, dtype=torch.float32)
        freqs = torch.outer(t, self.inv_freq.to(device))
        return freqs.cos()[None, :, None, :].to(dtype), freqs.sin()[None, :, None, :].to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    rot, rest = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    a, b = rot[..., :half], rot[..., half:]
    rot = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
    return torch.cat((rot, rest), dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, rope_dims: int, rope_base: float, gain: float, xsa: bool):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = dim // heads
        self.rope_dims = rope_dims
        self.xsa = xsa
        kv_dim = kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.q_gain = nn.Parameter(torch.full((heads,), gain, dtype=torch.float32))
        self.rotary = Rotary(rope_dims, rope_base)

    def _exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: take the component along the token's own value out of every head's output."""
        B, T, H, D = y.shape
        grouped = y.reshape(B, T, self.kv_heads, H // self.kv_heads, D)
        unit = F.normalize(v, dim=-1).unsqueeze(-2)
        along = (grouped * unit).sum(dim=-1, keepdim=True) * unit
        return (grouped - along).reshape(B, T, H, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).reshape(B, T, self.heads, self.head_dim)
        k = self.c_k(x).reshape(B, T, self.kv_heads, self.head_dim)
        v = self.c_v(x).reshape(B, T, self.kv_heads, self.head_dim)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(T, x.device, q.dtype)
        q = apply_rotary(q, cos, sin, self.rope_dims)
        k = apply_rotary(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        if HAVE_FA3:
            y = flash_attn_3_func(q, k, v, causal=True)
        else:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        if self.xsa:
            y = self._exclude_self(y, v)
        return self.proj(y.reshape(B, T, C))


class LeakySquaredMLP(nn.Module):
    def __init__(self, dim: int, mult: float, slope: float):
        super().__init__()
        hidden = int(dim * mult)
        self.slope = slope
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=self.slope).square())


class Smear(nn.Module):
    """Blends every embedding with the one before it, except at the start of a document."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.smear_gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.smear_gate.to(x.dtype))[None, None, :]
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos_id).to(x.dtype).unsqueeze(-1)
        return x + gate * inside * (before - x)


class Block(nn.Module):
    def __init__(self, h: type[Hyperparameters], layer: int):
        super().__init__()
        dim = h.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = SelfAttention(
            dim,
            h.num_heads,
            h.num_kv_heads,
            h.rope_dims,
            h.rope_base,
            h.qk_gain_init,
            xsa=layer >= h.num_layers - h.xsa_last_n,
        )
        self.mlp = LeakySquaredMLP(dim, h.mlp_mult, h.leaky_slope)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn = self.attn(self.attn_norm(x) * self.depth_scale)
        x = x + self.attn_scale.to(x.dtype)[None, None, :] * attn
        mlp = self.mlp(self.mlp_norm(x) * self.depth_scale)
        return x + self.mlp_scale.to(x.dtype)[None, None, :] * mlp


class GPT(nn.Module):
    def __init__(self, h: type[Hyperparameters]):
        super().__init__()
        self.softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = Smear(h.model_dim, h.bos_id)
        self.num_encoder = h.num_layers // 2
        self.num_decoder = h.num_layers - self.num_encoder
        self.num_skips = min(self.num_encoder, self.num_decoder)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, h.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights(h.tied_embed_init_std)

    def _init_weights(self, std: float) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=std)
        for name, module in self.named_modules():
            if isinstance(module, CastedLinear) and not name.endswith(".proj"):
                nn.init.orthogonal_(module.weight, gain=1.0)

    def features(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, ids)
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder):
            if skips:
                x = x + self.skip_weights[i].to(x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder + i](x, x0)
        return self.final_norm(x)

    def head(self, feats: Tensor) -> Tensor:
        raw = F.linear(feats, self.tok_emb.weight.to(feats.dtype))
        return self.softcap * torch.tanh(raw / self.softcap)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        out = self.logits(ids)
        return F.cross_entropy(out.reshape(-1, out.size(-1)).float(), targets.reshape(-1), reduction="mean")


def build_model(h: type[Hyperparameters], device: torch.device) -> GPT:
    model = GPT(h).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(model)
    return model


# -----------------------------
# SCORE KEEPING
# -----------------------------


class Tally:
    """Sums of one rank: nats, tokens and bytes, in float64; reduced once at the end."""

    def __init__(self, device: torch.device):
        self.device = device
        self.nats = 0.0
        self.tokens = 0
        self.bytes = 0

    def add(self, nats: float, tokens: int, nbytes: int) -> None:
        self.nats += float(nats)
        self.tokens += int(tokens)
        self.bytes += int(nbytes)

    def reduced(self) -> tuple[float, float, int]:
        sums = torch.tensor([self.nats, self.tokens, self.bytes], dtype=torch.float64, device=self.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        nats, tokens, nbytes = (float(v) for v in sums.tolist())
        loss = nats / tokens
        bpb = nats / math.log(2.0) / nbytes
        return loss, bpb, int(tokens)


def eval_val(
    h: type[Hyperparameters],
    model: nn.Module,
    val_tokens: Tensor,
    pieces: PieceBytes,
    rank: int,
    world_size: int,
    device: torch.device,
    seq_len: int,
) -> tuple[float, float]:
    """Plain validation in disjoint sequences, the last one shorter. For the log while training runs."""
    tally = Tally(device)
    positions = val_tokens.numel() - 1
    full = positions // seq_len
    per_step = max(1, h.val_batch_size // (seq_len * world_size))
    mine = range(full * rank // world_size, full * (rank + 1) // world_size)
    groups = [(s * seq_len, min(s + per_step, mine.stop) * seq_len, seq_len) for s in mine[::per_step]]
    tail = positions - full * seq_len
    if tail and rank == world_size - 1:
        groups.append((full * seq_len, positions, tail))
    model.eval()
    with torch.no_grad():
        for start, stop, length in groups:
            span = val_tokens[start : stop + 1].to(device=device, dtype=torch.int64)
            x = span[:-1].reshape(-1, length)
            y = span[1:].reshape(-1, length)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            host = span.cpu().numpy()
            tally.add(float(loss) * y.numel(), y.numel(), pieces.count(host[:-1], host[1:]))
    model.train()
    loss, bpb, _ = tally.reduced()
    return loss, bpb


# -----------------------------
# GPTQ-LITE INT6 + LZMA
# -----------------------------

QMAX = 31
CLIP_GRID = (1.0, 0.9995, 0.999, 0.997, 0.99)


class HessianTap:
    """Sums x^T x of the inputs of every linear layer while calibration batches run through."""

    def __init__(self, model: GPT):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.handles.append(module.register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str):
        def tap(_module, inputs):
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            gram = x.t() @ x
            if name in self.sums:
                self.sums[name] += gram
                self.counts[name] += x.shape[0]
            else:
                self.sums[name] = gram
                self.counts[name] = x.shape[0]

        return tap

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def finish(self) -> dict[str, Tensor]:
        self.close()
        out = {}
        for name, gram in self.sums.items():
            n = torch.tensor([float(self.counts[name])], device=gram.device)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(gram, op=dist.ReduceOp.SUM)
                dist.all_reduce(n, op=dist.ReduceOp.SUM)
            out[name] = gram / n
        return out


def collect_hessians(
    h: type[Hyperparameters], model: GPT, loader: DistributedLoader, clock: TrainClock, log0
) -> dict[str, Tensor]:
    """Runs training batches through the model, as many as the training clock still allows."""
    tap = HessianTap(model)
    tokens = h.calib_seqs * h.train_seq_len * loader.world_size
    used = 0
    model.eval()
    with torch.no_grad():
        for _ in range(h.calib_batches):
            low = torch.tensor([clock.left_ms()], device=loader.device)
            if loader.world_size > 1:
                dist.all_reduce(low, op=dist.ReduceOp.MIN)
            if float(low) < 500.0 * h.quant_reserve_seconds:
                break
            x, _y = loader.next_batch(tokens, h.train_seq_len, 1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.features(x)
            used += 1
    hessians = tap.finish()
    log0(f"gptq:calibration batches:{used} train_time:{clock.elapsed_ms():.0f}ms")
    return hessians


def best_row_scale(w: Tensor) -> Tensor:
    """Per row, the clip of the grid with the least squared rounding error."""
    top = w.abs().amax(dim=1).clamp_min(1e-8)
    best = top / QMAX
    best_err = torch.full_like(top, float("inf"))
    for q in CLIP_GRID:
        clip = top if q >= 1.0 else torch.quantile(w.abs(), q, dim=1).clamp_min(1e-8)
        scale = (clip / QMAX).clamp_min(1e-8)
        grid = torch.clamp(torch.round(w / scale[:, None]), -QMAX, QMAX) * scale[:, None]
        err = (grid - w).square().sum(dim=1)
        better = err < best_err
        best = torch.where(better, scale, best)
        best_err = torch.where(better, err, best_err)
    return best


def gptq_int6(weight: Tensor, hessian: Tensor, block: int, damp: float) -> tuple[Tensor, Tensor]:
    w = weight.detach().float().clone()
    cols = w.shape[1]
    H = hessian.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(torch.diag(H), descending=True)
    undo = torch.argsort(order)
    scale = best_row_scale(w).half().float().clamp_min(1e-7)
    w = w[:, order]
    H = H[order][:, order]
    H += damp * torch.diag(H).mean() * torch.eye(cols, device=H.device)
    inv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    q = torch.zeros_like(w)
    for a in range(0, cols, block):
        b = min(a + block, cols)
        errors = torch.zeros(w.shape[0], b - a, device=w.device)
        for j in range(a, b):
            q[:, j] = torch.clamp(torch.round(w[:, j] / scale), -QMAX, QMAX)
            e = (w[:, j] - q[:, j] * scale) / inv[j, j]
            w[:, j:b] -= e[:, None] * inv[j, j:b][None, :]
            errors[:, j - a] = e
        w[:, b:] -= errors @ inv[a:b, b:]
    return q[:, undo].to(torch.int8), scale.half()


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    w = weight.detach().float()
    scale = (w.abs().amax(dim=1) / 127.0).clamp_min(1e-7).half()
    q = torch.clamp(torch.round(w / scale.float()[:, None]), -127, 127).to(torch.int8)
    return q, scale


def quantize_state(h: type[Hyperparameters], model: GPT, hessians: dict[str, Tensor]) -> dict[str, object]:
    packed: dict[str, object] = {"int": {}, "scale": {}, "plain": {}}
    for name, tensor in model.state_dict().items():
        owner = name.rsplit(".", 1)[0]
        if owner in hessians:
            q, s = gptq_int6(tensor, hessians[owner], h.gptq_block, h.gptq_damp)
        elif name == "tok_emb.weight":
            q, s = int8_rows(tensor)
        else:
            packed["plain"][name] = tensor.detach().half().cpu().contiguous()
            continue
        packed["int"][name] = q.cpu().contiguous()
        packed["scale"][name] = s.cpu().contiguous()
    return packed


def dequantize_state(packed: dict[str, object]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, q in packed["int"].items():
        state[name] = q.float() * packed["scale"][name].float()[:, None]
    for name, tensor in packed["plain"].items():
        state[name] = tensor.float()
    return state


def pack_artifact(packed: dict[str, object]) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    return lzma.compress(buf.getvalue(), preset=6)


def unpack_artifact(blob: bytes) -> dict[str, object]:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)


# -----------------------------
# HASHED N-GRAM BACKOFF CACHE
# -----------------------------

CONTEXT_PRIMES = np.array(
    [36313, 27191, 51647, 81929, 131071, 174763, 233017, 283721, 347237, 411527],
    dtype=np.uint64,
)
PIECE_PRIME = np.uint64(0x9E3779B97F4A7C15)


def document_age(tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """For every position, how many tokens of its own document stand before it."""
    index = np.arange(tokens.size, dtype=np.int64)
    starts = np.where(tokens == bos_id, index, 0)
    return index - np.maximum.accumulate(starts)


class BackoffCache:
    """Counts of contexts and of (context, next token) for orders lo..hi, in hashed tables.

    Position t stands for the prediction of tokens[t + 1]; the context of order n is tokens[t - n + 2 .. t].
    """

    def __init__(self, h: type[Hyperparameters], tokens: np.ndarray):
        self.tokens = tokens
        self.age = document_age(tokens, h.bos_id)
        self.orders = list(range(h.ngram_min_order, h.ngram_max_order + 1))
        self.vocab_size = h.vocab_size
        self.min_count = h.ngram_min_count
        self.prior = np.float32(h.ngram_prior)
        self.mask = np.uint64((1 << h.ngram_bits) - 1)
        self.ctx_tables = {n: np.zeros(1 << h.ngram_bits, dtype=np.uint32) for n in self.orders}
        self.full_tables = {n: np.zeros(1 << h.ngram_bits, dtype=np.uint32) for n in self.orders}
        with np.errstate(over="ignore"):
            salted = (np.arange(self.vocab_size, dtype=np.uint64) + np.uint64(1)) * PIECE_PRIME
        self.piece_salt = salted >> np.uint64(20)
        self.seen = 0

    def context_hash(self, pos: np.ndarray, order: int) -> np.ndarray:
        key = np.full(pos.size, order, dtype=np.uint64) * CONTEXT_PRIMES[9]
        for back in range(order - 1):
            piece = self.tokens[np.maximum(pos - back, 0)].astype(np.uint64) + np.uint64(1)
            key ^= piece * CONTEXT_PRIMES[back]
            key ^= key << np.uint64(7)
        return key ^ (key >> np.uint64(23))

    def fits(self, pos: np.ndarray, order: int) -> np.ndarray:
        """Whether the whole context lies inside the position's document."""
        return self.age[pos] >= order - 2

    def update(self, first: int, last: int, step: int = 262_144) -> None:
        """Adds the predictions of positions first..last-1, whose targets must have been scored."""
        for a in range(first, last, step):
            pos = np.arange(a, min(a + step, last), dtype=np.int64)
            for n in self.orders:
                keep = pos[self.fits(pos, n)]
                key = self.context_hash(keep, n)
                cell = (key & self.mask).astype(np.int64)
                pair = ((key ^ self.piece_salt[self.tokens[keep + 1]]) & self.mask).astype(np.int64)
                np.add.at(self.ctx_tables[n], cell, 1)
                np.add.at(self.full_tables[n], pair, 1)
        self.seen += last - first

    def longest_match(self, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The highest order whose context was seen often enough: its order (0: none), hash and count."""
        order_of = np.zeros(pos.size, dtype=np.int64)
        key_of = np.zeros(pos.size, dtype=np.uint64)
        count_of = np.zeros(pos.size, dtype=np.int64)
        for n in reversed(self.orders):
            key = self.context_hash(pos, n)
            count = self.ctx_tables[n][(key & self.mask).astype(np.int64)]
            hit = (order_of == 0) & self.fits(pos, n) & (count >= self.min_count)
            order_of[hit] = n
            key_of[hit] = key[hit]
            count_of[hit] = count[hit]
        return order_of, key_of, count_of

    def distribution(self, n: int, key: np.ndarray) -> np.ndarray:
        """Rows of probabilities over the whole vocabulary for contexts of order n."""
        cells = ((key[:, None] ^ self.piece_salt[None, :]) & self.mask).astype(np.int64)
        counts = self.full_tables[n][cells].astype(np.float32) + self.prior
        return counts / counts.sum(axis=1, keepdims=True)

    def target_probs(self, pos: np.ndarray, block: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        """Every target's probability under its row of `distribution`, and the order used."""
        order_of, key_of, _ = self.longest_match(pos)
        target = self.tokens[pos + 1]
        probs = np.zeros(pos.size, dtype=np.float64)
        for n in self.orders:
            rows = np.nonzero(order_of == n)[0]
            for a in range(0, rows.size, block):
                part = rows[a : a + block]
                dense = self.distribution(n, key_of[part])
                probs[part] = dense[np.arange(part.size), target[part]]
        return probs, order_of


def blend_alpha(h: type[Hyperparameters], entropy: np.ndarray, order_of: np.ndarray) -> np.ndarray:
    """Weight of the cache: grows with the model's entropy and with the matched order, zero without a match."""
    gate = 1.0 / (1.0 + np.exp(-h.ngram_entropy_slope * (entropy - h.ngram_entropy_mid)))
    reach = (order_of - h.ngram_min_order) / max(1, h.ngram_max_order - h.ngram_min_order)
    alpha = h.ngram_alpha_lo + (h.ngram_alpha_hi - h.ngram_alpha_lo) * gate * (0.4 + 0.6 * reach)
    return np.where(order_of > 0, alpha, 0.0)


# -----------------------------
# SLIDING EVALUATION
# -----------------------------


@dataclass(frozen=True)
class Window:
    """Tokens begin..hi-1 are the input; the predictions made at lo..hi-1 are scored."""

    begin: int
    lo: int
    hi: int


def plan_windows(first: int, last: int, stride: int, seq_len: int) -> list[Window]:
    windows = []
    for lo in range(first, last, stride):
        hi = min(lo + stride, last)
        windows.append(Window(max(0, hi - seq_len), lo, hi))
    return windows


class SlidingScorer:
    """Scores windows of the validation stream with the model and, where given, the n-gram cache."""

    def __init__(
        self,
        h: type[Hyperparameters],
        model: GPT,
        val_tokens: Tensor,
        pieces: PieceBytes,
        device: torch.device,
    ):
        self.h = h
        self.model = model
        self.forward_logits = torch.compile(model.logits, dynamic=False, fullgraph=True)
        self.pieces = pieces
        self.device = device
        self.stream = val_tokens.to(device=device, dtype=torch.int64)
        self.host = val_tokens.numpy().astype(np.int64)

    def load(self, batch: list[Window]) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """Inputs padded on the right to one shape, with rows, columns and positions of what is scored."""
        ids = torch.zeros(self.h.eval_batch_seqs, self.h.eval_seq_len, dtype=torch.int64, device=self.device)
        rows, cols, positions = [], [], []
        for i, w in enumerate(batch):
            ids[i, : w.hi - w.begin] = self.stream[w.begin : w.hi]
            rows.append(np.full(w.hi - w.lo, i, dtype=np.int64))
            cols.append(np.arange(w.lo - w.begin, w.hi - w.begin, dtype=np.int64))
            positions.append(np.arange(w.lo, w.hi, dtype=np.int64))
        row = torch.from_numpy(np.concatenate(rows)).to(self.device)
        col = torch.from_numpy(np.concatenate(cols)).to(self.device)
        return ids, row, col, np.concatenate(positions)

    def neural(self, batch: list[Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, log-probability of their targets and entropy of the model there."""
        ids, row, col, pos = self.load(batch)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = self.forward_logits(ids)
        logp = F.log_softmax(logits[row, col].float(), dim=-1)
        target = self.stream[torch.from_numpy(pos + 1).to(self.device)]
        gold = logp.gather(1, target[:, None]).squeeze(1)
        entropy = -(logp.exp() * logp).sum(dim=-1)
        return pos, gold.double().cpu().numpy(), entropy.double().cpu().numpy()

    def blend(self, pos: np.ndarray, gold: np.ndarray, entropy: np.ndarray, cache: BackoffCache | None) -> np.ndarray:
        """Log-probability of every target under the mixture of model and cache."""
        if cache is None or cache.seen == 0:
            return gold
        cached, order_of = cache.target_probs(pos)
        alpha = blend_alpha(self.h, entropy, order_of)
        return np.log((1.0 - alpha) * np.exp(gold) + alpha * cached + 1e-300)

    def score(self, windows: list[Window], tally: Tally, cache: BackoffCache | None) -> None:
        self.model.eval()
        with torch.no_grad():
            for i in range(0, len(windows), self.h.eval_batch_seqs):
                pos, gold, entropy = self.neural(windows[i : i + self.h.eval_batch_seqs])
                logp = self.blend(pos, gold, entropy, cache)
                tally.add(-logp.sum(), pos.size, self.pieces.count(self.host[pos], self.host[pos + 1]))


class SegmentTrainer:
    """Test-time training on one segment at a time, data-parallel over the ranks."""

    def __init__(self, h: type[Hyperparameters], model: GPT, rank: int, world_size: int, total_segments: int):
        self.h = h
        self.model = model
        self.rank = rank
        self.world_size = world_size
        self.total = max(1, total_segments)
        frozen = {id(p) for block in model.blocks[: h.ttt_freeze_blocks] for p in block.parameters()}
        frozen.add(id(model.tok_emb.weight))
        self.params = [p for p in model.parameters() if id(p) not in frozen]
        self.optimizer = torch.optim.SGD(self.params, lr=h.ttt_lr, momentum=h.ttt_momentum)

    def _sync_grads(self) -> None:
        if self.world_size == 1:
            return
        for p in self.params:
            if p.grad is not None:
                dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                p.grad.div_(self.world_size)

    def step(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = self.model(x, y)
        loss.backward()
        self._sync_grads()
        torch.nn.utils.clip_grad_norm_(self.params, self.h.ttt_grad_clip)
        self.optimizer.step()
        return float(loss.detach())

    def adapt(self, stream: Tensor, first: int, last: int, index: int) -> None:
        """Epochs over the sequences inside first..last; every rank takes its turn in each global batch."""
        length = self.h.train_seq_len
        starts = list(range(first, last - length + 1, length))
        group = self.h.ttt_batch_seqs * self.world_size
        lr = self.h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * index / self.total))
        for pg in self.optimizer.param_groups:
            pg["lr"] = lr
        self.model.train()
        for _ in range(self.h.ttt_epochs):
            for a in range(0, len(starts) - group + 1, group):
                own = starts[a + self.rank : a + group : self.world_size]
                x = torch.stack([stream[s : s + length] for s in own])
                y = torch.stack([stream[s + 1 : s + length + 1] for s in own])
                self.step(x, y)
        self.optimizer.zero_grad(set_to_none=True)


def segment_bounds(positions: int, segment: int) -> list[tuple[int, int]]:
    return [(a, min(a + segment, positions)) for a in range(0, positions, segment)]


def within_budget(started: float, budget: float, device: torch.device) -> bool:
    """One answer for all ranks, by the slowest."""
    spent = torch.tensor([time.perf_counter() - started], dtype=torch.float64, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent) < budget


def eval_val_sliding(
    h: type[Hyperparameters],
    model: GPT,
    val_tokens: Tensor,
    pieces: PieceBytes,
    rank: int,
    world_size: int,
    device: torch.device,
    started: float,
    log0,
) -> tuple[float, float, int]:
    """Segment by segment: score with what earlier segments left behind, then update the cache and the model."""
    scorer = SlidingScorer(h, model, val_tokens, pieces, device)
    positions = val_tokens.numel() - 1
    bounds = segment_bounds(positions, h.segment_tokens)
    cache = BackoffCache(h, scorer.host) if h.ngram_enabled else None
    trainer = SegmentTrainer(h, model, rank, world_size, len(bounds)) if h.ttt_enabled else None
    tally = Tally(device)
    for index, (first, last) in enumerate(bounds):
        windows = plan_windows(first, last, h.eval_stride, h.eval_seq_len)
        share = windows[len(windows) * rank // world_size : len(windows) * (rank + 1) // world_size]
        scorer.score(share, tally, cache)
        if index + 1 == len(bounds):
            break
        if cache is not None:
            cache.update(first, last)
        if trainer is not None and within_budget(started, 0.8 * h.eval_budget_seconds, device):
            trainer.adapt(scorer.stream, first, last, index)
        if index % 10 == 0:
            log0(f"segment:{index + 1}/{len(bounds)} time:{time.perf_counter() - started:.1f}s")
    return tally.reduced()


# -----------------------------
# TRAINING
# -----------------------------


class WeightAverage:
    """Exponential moving average of all floating weights, in fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(value.detach().float(), alpha=1.0 - self.decay)

    def load_into(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({k: v.to(dtype=current[k].dtype) for k, v in self.shadow.items()}, strict=True)


def make_optimizers(h: type[Hyperparameters], model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    named = list(model.blocks.named_parameters())
    matrix = [p for n, p in named if p.ndim == 2 and not any(c in n for c in CONTROL_PATTERNS)]
    scalar = [p for n, p in named if p.ndim < 2 or any(c in n for c in CONTROL_PATTERNS)]
    scalar += [model.skip_weights, model.smear.smear_gate]
    adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, weight_decay=h.adam_wd, fused=True)
    tok = torch.optim.AdamW([{"params": [model.tok_emb.weight], "lr": h.tied_embed_lr}], **adam)
    muon = Muon(
        matrix,
        lr=h.matrix_lr,
        momentum=h.muon_momentum,
        backend_steps=h.muon_backend_steps,
        weight_decay=h.muon_wd,
    )
    small = torch.optim.AdamW([{"params": scalar, "lr": h.scalar_lr}], **adam)
    optimizers: list[torch.optim.Optimizer] = [tok, muon, small]
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group.get("lr", h.matrix_lr)
    return optimizers, muon


def lr_scale(h: type[Hyperparameters], step: int, clock: TrainClock, loop_ms: float) -> float:
    """Linear warmdown, by steps or by what is left of the clock, whichever is nearer."""
    if h.warmdown_iters <= 0:
        return 1.0
    elapsed = clock.elapsed_ms()
    step_ms = elapsed / max(step, 1)
    warmdown_ms = h.warmdown_iters * step_ms
    left = max(loop_ms - elapsed, 0.0)
    by_time = left / max(warmdown_ms, 1e-9) if left <= warmdown_ms else 1.0
    by_step = max((h.iterations - step) / h.warmdown_iters, 0.0)
    return min(by_time, by_step, 1.0)


def muon_momentum_at(h: type[Hyperparameters], step: int) -> float:
    frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
    return (1 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum


def warm_up(
    h: type[Hyperparameters],
    base: GPT,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    rank: int,
    world_size: int,
    grad_accum_steps: int,
    device: torch.device,
    log0,
) -> None:
    """Compiles and primes kernels on training batches, then puts weights and optimizers back."""
    saved = {k: v.detach().cpu().clone() for k, v in base.state_dict().items()}
    saved_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    loader = DistributedLoader(h.train_files, rank, world_size, device)
    model.train()
    for step in range(h.warmup_steps):
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        for _ in range(grad_accum_steps):
            x, y = loader.next_batch(h.train_batch_tokens, h.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            (loss / grad_accum_steps).backward()
        for opt in optimizers:
            opt.step()
        if step + 1 == h.warmup_steps:
            log0(f"warmup_step:{step + 1}/{h.warmup_steps}")
    base.load_state_dict(saved, strict=True)
    for opt, state in zip(optimizers, saved_opts, strict=True):
        opt.load_state_dict(state)
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)


def train(
    h: type[Hyperparameters],
    base: GPT,
    val_tokens: Tensor,
    pieces: PieceBytes,
    clock: TrainClock,
    rank: int,
    world_size: int,
    local_rank: int,
    device: torch.device,
    log0,
) -> DistributedLoader:
    """Trains until the clock leaves only the reserve for quantisation; the EMA weights end up in `base`."""
    grad_accum_steps = max(1, 8 // world_size)
    compiled = torch.compile(base, dynamic=False, fullgraph=True)
    model: nn.Module = compiled
    if world_size > 1:
        model = DDP(compiled, device_ids=[local_rank], broadcast_buffers=False)
    optimizers, muon = make_optimizers(h, base)
    if h.warmup_steps > 0:
        warm_up(h, base, model, optimizers, rank, world_size, grad_accum_steps, device, log0)

    loader = DistributedLoader(h.train_files, rank, world_size, device)
    average = WeightAverage(base, h.ema_decay)
    loop_ms = clock.limit_ms - 1000.0 * h.quant_reserve_seconds
    stop_after: int | None = None
    smoothed = 0.0
    step = 0
    clock.start()
    while True:
        last_step = step == h.iterations or (stop_after is not None and step >= stop_after)
        if last_step or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
            clock.hold()
            loss, bpb = eval_val(h, compiled, val_tokens, pieces, rank, world_size, device, h.train_seq_len)
            log0(f"step:{step}/{h.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{clock.banked_ms:.0f}ms")
            clock.start()
        if last_step:
            if stop_after is not None and step < h.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{clock.elapsed_ms():.0f}ms step:{step}")
            break

        scale = lr_scale(h, step, clock, loop_ms)
        if not CastedLinear.qat and 0.0 < scale < h.late_qat_threshold and step > 100:
            CastedLinear.qat = True
            log0(f"late_qat:on step:{step} scale:{scale:.4f}")
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        train_loss = torch.zeros((), device=device)
        for micro in range(grad_accum_steps):
            final_micro = micro == grad_accum_steps - 1
            guard = model.no_sync() if isinstance(model, DDP) and not final_micro else nullcontext()
            with guard:
                x, y = loader.next_batch(h.train_batch_tokens, h.train_seq_len, grad_accum_steps)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x, y)
                train_loss += loss.detach() / grad_accum_steps
                (loss / grad_accum_steps).backward()
        for group in muon.param_groups:
            group["momentum"] = muon_momentum_at(h, step)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base.parameters(), h.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        average.update(base)
        step += 1

        elapsed = clock.elapsed_ms()
        if step <= 10 or step % h.train_log_every == 0:
            smoothed = float(train_loss) if smoothed == 0.0 else 0.9 * smoothed + 0.1 * float(train_loss)
            log0(
                f"step:{step}/{h.iterations} train_loss:{float(train_loss):.4f} smooth:{smoothed:.4f} "
                f"train_time:{elapsed:.0f}ms step_avg:{elapsed / step:.2f}ms"
            )
        reached = torch.tensor(int(elapsed >= loop_ms), device=device)
        if world_size > 1:
            dist.all_reduce(reached, op=dist.ReduceOp.MAX)
        if stop_after is None and bool(reached.item()):
            stop_after = step

    CastedLinear.qat = False
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    average.load_into(base)
    log0(f"ema: applied decay:{h.ema_decay}")
    return loader


def make_artifact(
    h: type[Hyperparameters], base: GPT, loader: DistributedLoader, clock: TrainClock, rank: int, code: str, log0
) -> Path:
    """Calibrates, quantises and writes the artifact; the training clock runs on until it is packed."""
    hessians = collect_hessians(h, base, loader, clock, log0)
    packed = quantize_state(h, base, hessians)
    path = Path("final_model.int6.ptz")
    if rank == 0:
        blob = pack_artifact(packed)
        path.write_bytes(blob)
        model_bytes = len(blob)
        code_bytes = len(code.encode("utf-8"))
        total = model_bytes + code_bytes
        log0(f"Serialized model int6+lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total} bytes")
        if total > h.artifact_limit:
            raise RuntimeError(f"over the size limit: {total} > {h.artifact_limit}")
    log0(f"train+gptq+pack train_time:{clock.elapsed_ms():.0f}ms limit:{clock.limit_ms:.0f}ms")
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    return path


def load_artifact(h: type[Hyperparameters], path: Path, device: torch.device) -> GPT:
    packed = unpack_artifact(path.read_bytes())
    model = build_model(h, device)
    current = model.state_dict()
    state = dequantize_state(packed)
    model.load_state_dict({k: v.to(dtype=current[k].dtype) for k, v in state.items()}, strict=True)
    return model


# -----------------------------
# MAIN
# -----------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    h = Hyperparameters

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    master = rank == 0

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    logfile = None
    if master:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{h.run_id}.txt"
        print(logfile)

    def log0(msg: str, console: bool = True) -> None:
        if not master:
            return
        if console:
            print(msg)
        with open(logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)

    log0(code, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)

    seed_everything(h.seed)
    sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
    if int(sp.vocab_size()) != h.vocab_size:
        raise ValueError(f"VOCAB_SIZE={h.vocab_size} does not match the tokenizer's {int(sp.vocab_size())}")
    pieces = PieceBytes.from_sentencepiece(sp, h.vocab_size)
    val_tokens = load_validation_tokens(h.val_files)
    log0(f"val_loader:shards pattern={h.val_files} tokens:{val_tokens.numel() - 1}")
    log0(f"train_loader:shards pattern={h.train_files} count:{len(glob.glob(h.train_files))}")

    base = build_model(h, device)
    log0(f"model_params:{sum(p.numel() for p in base.parameters())} fa3:{HAVE_FA3}")
    log0(f"world_size:{world_size} seed:{h.seed} seq_len:{h.train_seq_len} batch:{h.train_batch_tokens}")

    clock = TrainClock(h.max_wallclock_seconds)
    loader = train(h, base, val_tokens, pieces, clock, rank, world_size, local_rank, device, log0)
    path = make_artifact(h, base, loader, clock, rank, code, log0)
    del loader, base
    torch.cuda.empty_cache()

    started = time.perf_counter()
    model = load_artifact(h, path, device)
    rt_loss, rt_bpb = eval_val(h, model, val_tokens, pieces, rank, world_size, device, h.eval_seq_len)
    log0(f"final_int6_roundtrip val_loss:{rt_loss:.4f} val_bpb:{rt_bpb:.4f}")
    loss, bpb, counted = eval_val_sliding(
        h, model, val_tokens, pieces, rank, world_size, device, started, log0
    )
    torch.cuda.synchronize()
    spent = time.perf_counter() - started
    log0(f"final_ngram_ttt val_loss:{loss:.4f} val_bpb:{bpb:.4f} tokens:{counted} eval_time:{1000.0 * spent:.0f}ms")
    log0(f"final_ngram_ttt_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
