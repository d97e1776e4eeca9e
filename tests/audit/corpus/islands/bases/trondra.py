"""
train_gpt.py -- 11L x 512d, SP1024, int6 + zstd, sliding window + online n-gram backoff mixture.

Descends from the modded-nanogpt style baseline of the repo. What is stacked on top of it:
  * 3x MLP with LeakyReLU(0.5)^2, XSA on the last layers, partial RoPE, depth-scaled norms
  * SmearGate and BigramHash (both stop at document starts), value embeddings in two late layers
  * U-Net skips between the first and the second half of the stack
  * Muon (weight decay) for matrices, AdamW for the rest
  * EMA through the run, tight SWA in the last part of the warmdown, the two blended at a fixed rate
  * late QAT (straight-through int6) once the lr multiplier falls under a threshold
  * int6 per-row quantisation with a clip search over percentiles, weights only, no data needed
  * evaluation: stride-64 windows; a count-based backoff model over the whole vocabulary, filled with
    tokens of finished chunks only, is mixed in with a weight that depends on the network's entropy

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
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
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    import zstandard
except ImportError:  # lzma is a little worse, but always there
    zstandard = None


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return os.environ.get(name, "1" if default else "0") not in ("0", "", "false", "False")


# -----------------------------------------------------------------------------
# HYPERPARAMETERS
# -----------------------------------------------------------------------------


class Hyperparameters:
    # Paths. The val split is always the whole fineweb_val set.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)
    out_dir = os.environ.get("OUT_DIR", ".")

    # Cadence.
    val_batch_seqs = env_int("VAL_BATCH_SEQS", 32)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)

    # Length of the run.
    iterations = env_int("ITERATIONS", 20000)
    warmdown_iters = env_int("WARMDOWN_ITERS", 3500)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    finish_margin_seconds = env_float("FINISH_MARGIN_SECONDS", 1.5)

    # Shape.
    vocab_size = env_int("VOCAB_SIZE", 1024)
    bos_id = env_int("BOS_ID", 1)
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 3.0)
    mlp_leak = env_float("MLP_LEAK", 0.5)
    rope_base = env_float("ROPE_BASE", 10000.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    xsa_last = env_int("XSA_LAST", 4)
    qk_gain_init = env_float("QK_GAIN_INIT", 1.5)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    tied_embed_init_std = env_float("TIED_EMBED_INIT_STD", 0.005)
    bigram_rows = env_int("BIGRAM_ROWS", 2048)
    bigram_dim = env_int("BIGRAM_DIM", 128)
    ve_dim = env_int("VE_DIM", 128)
    ve_layers = os.environ.get("VE_LAYERS", "9,10")

    # Optimisers.
    embed_lr = env_float("EMBED_LR", 0.035)
    matrix_lr = env_float("MATRIX_LR", 0.025)
    scalar_lr = env_float("SCALAR_LR", 0.025)
    muon_momentum = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_ns_steps = env_int("MUON_NS_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.04)
    adam_wd = env_float("ADAM_WD", 0.04)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    grad_clip_norm = env_float("GRAD_CLIP_NORM", 0.3)

    # Averages of the weights and QAT.
    ema_decay = env_float("EMA_DECAY", 0.997)
    swa_enabled = env_flag("SWA_ENABLED", True)
    swa_start_scale = env_float("SWA_START_SCALE", 0.2)
    swa_every = env_int("SWA_EVERY", 50)
    swa_blend = env_float("SWA_BLEND", 0.35)
    qat_threshold = env_float("QAT_THRESHOLD", 0.15)

    # Export.
    clip_grid = os.environ.get("CLIP_GRID", "0.9990,0.9995,0.9999,0.99999,1.0")
    zstd_level = env_int("ZSTD_LEVEL", 22)
    size_limit = 16_000_000

    # Evaluation.
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_batch_windows = env_int("EVAL_BATCH_WINDOWS", 64)
    ngram_enabled = env_flag("NGRAM_ENABLED", True)
    ngram_chunk_tokens = env_int("NGRAM_CHUNK_TOKENS", 131_072)
    ngram_max_order = env_int("NGRAM_MAX_ORDER", 6)
    ngram_rows_log2 = env_int("NGRAM_ROWS_LOG2", 19)
    ngram_unigram_add = env_float("NGRAM_UNIGRAM_ADD", 0.5)
    mix_floor = env_float("MIX_FLOOR", 0.02)
    mix_ceil = env_float("MIX_CEIL", 0.45)
    mix_entropy_mid = env_float("MIX_ENTROPY_MID", 2.6)
    mix_entropy_slope = env_float("MIX_ENTROPY_SLOPE", 1.6)
    mix_depth_gain = env_float("MIX_DEPTH_GAIN", 0.25)


# -----------------------------------------------------------------------------
# MUON
# -----------------------------------------------------------------------------


def newton_schulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Orthogonalises a matrix with the quintic iteration of Keller Jordan's Muon."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    tall = G.size(0) > G.size(1)
    if tall:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if tall else X


class Muon(torch.optim.Optimizer):
    """Each rank orthogonalises its share of the matrices; one all-reduce hands the updates round."""

    def __init__(self, params, lr: float, momentum: float, ns_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay),
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
            lr, momentum = group["lr"], group["momentum"]
            flat = torch.zeros(
                sum(p.numel() for p in params),
                device=params[0].device,
                dtype=torch.bfloat16,
            )
            at = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    g = g.add(buf, alpha=momentum)
                    g = newton_schulz5(g, steps=group["ns_steps"])
                    g *= max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()

            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)

            at = 0
            for p in params:
                update = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                if group["weight_decay"] > 0.0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr)
                at += p.numel()
        return loss


# -----------------------------------------------------------------------------
# BYTES PER TOKEN
# -----------------------------------------------------------------------------
# The score is bits per byte of the text, so every target token needs its length in UTF-8 bytes.
# A piece with the SentencePiece mark has one byte more for the blank before the word, unless
# the token before it is a boundary (control, unknown, unused), where the mark stands for nothing.


def build_byte_tables(
    sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    pieces = int(sp.vocab_size())
    size = max(pieces, vocab_size)
    plain_bytes = np.zeros((size,), dtype=np.int16)
    has_mark = np.zeros((size,), dtype=np.bool_)
    is_boundary = np.ones((size,), dtype=np.bool_)
    for token in range(pieces):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        is_boundary[token] = False
        if sp.is_byte(token):
            plain_bytes[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("\u2581"):
            has_mark[token] = True
            piece = piece[1:]
        plain_bytes[token] = len(piece.encode("utf-8"))
    return (
        torch.tensor(plain_bytes, dtype=torch.int16, device=device),
        torch.tensor(has_mark, dtype=torch.bool, device=device),
        torch.tensor(is_boundary, dtype=torch.bool, device=device),
    )


def bytes_of(prev: Tensor, target: Tensor, tables: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """UTF-8 bytes that each target adds to the text, given the token before it."""
    plain_bytes, has_mark, is_boundary = tables
    count = plain_bytes[target].to(torch.int64)
    count += (has_mark[target] & ~is_boundary[prev]).to(torch.int64)
    return count


# -----------------------------------------------------------------------------
# DATA
# -----------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {file}")
    num_tokens = int(header[2])
    header_bytes = HEADER_INTS * np.dtype("<i4").itemsize
    expected = header_bytes + num_tokens * np.dtype("<u2").itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"shard {file} has {file.stat().st_size} bytes, header says {expected}")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens.size != num_tokens:
        raise ValueError(f"short read on {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def read_val_stream(pattern: str) -> Tensor:
    """All validation shards, one after the other, in order of name."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"nothing matches {pattern}")
    stream = torch.cat([read_shard(file) for file in files]).contiguous()
    if stream.numel() < 2:
        raise ValueError("validation stream is empty")
    return stream


class ShardReader:
    """Walks over the training shards without end; wraps round after the last."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"nothing matches {pattern}")
        self.which = 0
        self.tokens = read_shard(self.files[0])
        self.at = 0

    def _next_file(self) -> None:
        self.which = (self.which + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.which])
        self.at = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        missing = n
        while missing > 0:
            left = self.tokens.numel() - self.at
            if left <= 0:
                self._next_file()
                continue
            k = min(missing, left)
            parts.append(self.tokens[self.at : self.at + k])
            self.at += k
            missing -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Every rank reads the same span and cuts out its own piece (plus one token for the shift)."""

    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.reader = ShardReader(pattern)
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def next_batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * accum)
        if local_tokens % seq_len:
            raise ValueError(f"{local_tokens} tokens per rank are no multiple of {seq_len}")
        span = local_tokens + 1
        chunk = self.reader.take(span * self.world_size)
        mine = chunk[self.rank * span : (self.rank + 1) * span].to(torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------------------------------------------------------
# MODEL
# -----------------------------------------------------------------------------

QMAX6 = 31  # int6, symmetric: -32..31 clipped to -31..31 on the scale, -32 left free
QMAX8 = 127


def fake_int6(w: Tensor) -> Tensor:
    """The weight as int6 rows would give it back; used straight-through in late QAT."""
    amax = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    scale = amax / QMAX6
    return (w / scale).round().clamp(-QMAX6, QMAX6) * scale


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """fp32 master weight, compute in the dtype of the input.

    qat_on is a buffer and not a Python bool on purpose: a bool is folded away by torch.compile
    and the switch then does nothing (or costs a recompile in the middle of the warmdown).
    """

    def __init__(self, dim_in: int, dim_out: int, zero_init: bool = False):
        super().__init__(dim_in, dim_out, bias=False)
        self.zero_init = zero_init
        self.register_buffer("qat_on", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.training:
            w = w + self.qat_on * (fake_int6(w) - w).detach()
        return F.linear(x, w.to(x.dtype))


class PartialRotary(nn.Module):
    """RoPE on the first rope_dims of each head, the rest is left without position."""

    def __init__(self, rope_dims: int, base: float, max_len: int):
        super().__init__()
        self.rope_dims = rope_dims
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", angles.cos()[None, None], persistent=False)
        self.register_buffer("sin", angles.sin()[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(-2)
        cos = self.cos[:, :, :n].to(x.dtype)
        sin = self.sin[:, :, :n].to(x.dtype)
        turned, rest = x[..., : self.rope_dims], x[..., self.rope_dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: type[Hyperparameters], rotary: PartialRotary, use_xsa: bool):
        super().__init__()
        dim = args.model_dim
        if dim % args.num_heads or args.num_heads % args.num_kv_heads:
            raise ValueError("heads do not divide")
        self.num_heads = args.num_heads
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = dim // args.num_heads
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((args.num_heads,), args.qk_gain_init))
        self.rotary = rotary

    def _remove_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: takes out of each head's output what lies along the position's own value."""
        B, H, T, D = y.shape
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        yg = y.reshape(B, self.num_kv_heads, H // self.num_kv_heads, T, D)
        yg = yg - (yg * vn).sum(dim=-1, keepdim=True) * vn
        return yg.reshape(B, H, T, D)

    def forward(self, x: Tensor, extra_v: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).reshape(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x)
        if extra_v is not None:
            v = v + extra_v
        v = v.reshape(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = self.rotary(F.rms_norm(q, (self.head_dim,)))
        k = self.rotary(F.rms_norm(k, (self.head_dim,)))
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads
        )
        if self.use_xsa:
            y = self._remove_self(y, v)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class LeakySquareMLP(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        hidden = int(args.mlp_mult * args.model_dim)
        self.leak = args.mlp_leak
        self.fc = CastedLinear(args.model_dim, hidden)
        self.proj = CastedLinear(hidden, args.model_dim, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=self.leak).square())


class SmearGate(nn.Module):
    """Blends each embedding with the one before it. Shut at BOS: a document starts with itself."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -2.0))
        self.bos_id = bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(x.dtype)
        open_here = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        return x + open_here * g * (before - x)


class BigramHashEmbedding(nn.Module):
    """A learned vector for hash(previous token, token). The last row means "no previous token"."""

    def __init__(self, rows: int, dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.rows = rows
        self.bos_id = bos_id
        self.table = nn.Embedding(rows, dim)
        self.proj = CastedLinear(dim, model_dim, zero_init=True)
        self.scale = nn.Parameter(torch.tensor(0.05))
        nn.init.zeros_(self.table.weight)

    def bucket(self, ids: Tensor) -> Tensor:
        last = self.rows - 1
        before = F.pad(ids[:, :-1], (1, 0))
        h = torch.bitwise_xor(36313 * ids, 27191 * before) % last
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 0] = True
        return torch.where(first | (ids == self.bos_id), last, h)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        e = self.table(self.bucket(ids)).to(dtype)
        return self.proj(e) * self.scale.to(dtype)


class ValueEmbedding(nn.Module):
    """One small table of token vectors, projected once; the layers that use it have their own scale."""

    def __init__(self, vocab_size: int, dim: int, kv_dim: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, dim)
        self.proj = CastedLinear(dim, kv_dim)
        self.scale = nn.Parameter(torch.tensor(0.1))
        nn.init.normal_(self.table.weight, std=0.01)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.table(ids).to(dtype)) * self.scale.to(dtype)


class Block(nn.Module):
    def __init__(self, args: type[Hyperparameters], rotary: PartialRotary, depth: int, use_xsa: bool):
        super().__init__()
        dim = args.model_dim
        self.norm_attn = RMSNorm()
        self.norm_mlp = RMSNorm()
        self.attn = CausalSelfAttention(args, rotary, use_xsa)
        self.mlp = LeakySquareMLP(args)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.ln_scale = 1.0 / math.sqrt(depth + 1)

    def forward(self, x: Tensor, x0: Tensor, extra_v: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.norm_attn(x) * self.ln_scale, extra_v)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(self.norm_mlp(x) * self.ln_scale)
        return x


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        self.softcap = args.logit_softcap
        self.num_layers = args.num_layers
        dim = args.model_dim
        kv_dim = args.num_kv_heads * (dim // args.num_heads)
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.bigram = BigramHashEmbedding(args.bigram_rows, args.bigram_dim, dim, args.bos_id)
        self.smear = SmearGate(dim, args.bos_id)
        rotary = PartialRotary(args.rope_dims, args.rope_base, max(args.train_seq_len, args.eval_seq_len))
        self.blocks = nn.ModuleList(
            Block(args, rotary, i, use_xsa=i >= args.num_layers - args.xsa_last) for i in range(args.num_layers)
        )
        self.num_down = args.num_layers // 2
        self.num_skips = min(self.num_down, args.num_layers - self.num_down)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, dim))
        self.ve_layers = [int(s) for s in args.ve_layers.split(",") if s.strip()]
        self.value_emb = ValueEmbedding(args.vocab_size, args.ve_dim, kv_dim)
        self.ve_scales = nn.Parameter(torch.ones(max(1, len(self.ve_layers))))
        self.final_norm = RMSNorm()
        self._init(args)

    def _init(self, args: type[Hyperparameters]) -> None:
        nn.init.normal_(self.tok_emb.weight, std=args.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, CastedLinear):
                if module.zero_init:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        """The normed output of the stack, before the head."""
        dtype = torch.bfloat16
        x = self.tok_emb(ids).to(dtype) + self.bigram(ids, dtype)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, ids)
        x0 = x
        ve = self.value_emb(ids, dtype)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.num_down and skips:
                j = i - self.num_down
                x = x + self.skip_weights[j].to(dtype) * skips.pop()
            extra_v = None
            if i in self.ve_layers:
                extra_v = ve * self.ve_scales[self.ve_layers.index(i)].to(dtype)
            x = block(x, x0, extra_v)
            if i < self.num_down:
                skips.append(x)
        return self.final_norm(x)

    def head(self, h: Tensor) -> Tensor:
        """Logits in fp32, softcapped; the head is the embedding."""
        raw = F.linear(h, self.tok_emb.weight.to(h.dtype)).float()
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))

    def set_qat(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, CastedLinear):
                module.qat_on.fill_(1.0 if on else 0.0)


# -----------------------------------------------------------------------------
# AVERAGES OF THE WEIGHTS
# -----------------------------------------------------------------------------


class WeightAverages:
    """EMA over every step, and a plain mean ("tight SWA") over snapshots of the late warmdown."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self.live = [p for _, p in model.named_parameters()]
        self.ema = [p.detach().clone() for p in self.live]
        self.swa: list[Tensor] | None = None
        self.swa_count = 0

    @torch.no_grad()
    def after_step(self) -> None:
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.live], 1.0 - self.decay)

    @torch.no_grad()
    def snapshot(self) -> None:
        if self.swa is None:
            self.swa = [p.detach().clone() for p in self.live]
        else:
            torch._foreach_add_(self.swa, [p.detach() for p in self.live])
        self.swa_count += 1

    @torch.no_grad()
    def blended(self, swa_share: float) -> dict[str, Tensor]:
        out = {}
        for i, name in enumerate(self.names):
            w = self.ema[i]
            if self.swa is not None and self.swa_count > 0:
                w = torch.lerp(w, self.swa[i] / self.swa_count, swa_share)
            out[name] = w.clone()
        return out


# -----------------------------------------------------------------------------
# QUANTISATION
# -----------------------------------------------------------------------------
# Matrices: int6 per row. Embedding tables: int8 per row. What is small stays fp16/fp32.
# The clip of each row is the percentile of |w| with the least squared error of the row, which is the
# cheap half of GPTQ and looks at nothing but the weights.

CONTROL_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "ve_scales",
    "smear.gate",
    "bigram.scale",
    "value_emb.scale",
)
TABLE_NAMES = ("tok_emb.weight", "bigram.table.weight", "value_emb.table.weight")
SMALL_NUMEL = 8192


def is_control(name: str) -> bool:
    return any(pattern in name for pattern in CONTROL_PATTERNS)


def clip_search_rows(w: Tensor, qmax: int, grid: list[float]) -> tuple[Tensor, Tensor]:
    """Per-row symmetric quantisation; returns int8 codes and fp16 scales."""
    w = w.float()
    mags = w.abs()
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best_codes = torch.zeros_like(w)
    best_scale = torch.zeros(w.size(0), device=w.device)
    for pct in grid:
        cut = mags.amax(dim=1) if pct >= 1.0 else torch.quantile(mags, pct, dim=1)
        scale = (cut / qmax).clamp_min(1e-6).to(torch.float16).float()
        codes = (w / scale[:, None]).round().clamp(-qmax, qmax)
        err = (codes * scale[:, None] - w).square().mean(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better[:, None], codes, best_codes)
    return best_codes.to(torch.int8), best_scale.to(torch.float16)


def quantise_state(state: dict[str, Tensor], grid: list[float]) -> tuple[dict[str, Tensor], dict[str, float]]:
    packed: dict[str, Tensor] = {}
    stats = {"int6": 0, "int8": 0, "kept": 0, "sq_err": 0.0}
    for name, tensor in state.items():
        t = tensor.detach()
        if t.ndim == 2 and t.numel() > SMALL_NUMEL and not is_control(name):
            table = name in TABLE_NAMES
            codes, scale = clip_search_rows(t, QMAX8 if table else QMAX6, grid)
            stats["int8" if table else "int6"] += t.numel()
            stats["sq_err"] += float((codes.float() * scale.float()[:, None] - t.float()).square().sum())
            packed[name + "|q"] = codes.cpu()
            packed[name + "|s"] = scale.cpu()
        else:
            stats["kept"] += t.numel()
            packed[name] = (t.float() if is_control(name) else t.to(torch.float16)).cpu()
    return packed, stats


def restore_state(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, tensor in packed.items():
        if key.endswith("|s"):
            continue
        if key.endswith("|q"):
            name = key[:-2]
            state[name] = tensor.float() * packed[name + "|s"].float()[:, None]
        else:
            state[key] = tensor.float()
    return state


def shrink(raw: bytes, zstd_level: int) -> bytes:
    """The smaller of zstd and lzma, with one byte in front that says which."""
    options = [b"L" + lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)]
    if zstandard is not None:
        options.append(b"Z" + zstandard.ZstdCompressor(level=zstd_level).compress(raw))
    return min(options, key=len)


def expand(blob: bytes) -> bytes:
    if blob[:1] == b"L":
        return lzma.decompress(blob[1:])
    if zstandard is None:
        raise RuntimeError("this artifact needs the zstandard package")
    return zstandard.ZstdDecompressor().decompress(blob[1:])


def write_artifact(packed: dict[str, Tensor], path: Path, zstd_level: int) -> int:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    blob = shrink(buffer.getvalue(), zstd_level)
    path.write_bytes(blob)
    return len(blob)


def read_artifact(path: Path) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(expand(path.read_bytes())), map_location="cpu", weights_only=True)


# -----------------------------------------------------------------------------
# ONLINE N-GRAM BACKOFF
# -----------------------------------------------------------------------------


class BackoffCounts:
    """Counts of next tokens after contexts of 1 .. max_order-1 tokens, dense over the vocabulary.

    tables[k] has one row of V counts per bucket. Context length 1 has a row per token; longer contexts
    are hashed to 2**rows_log2 rows. Two contexts in one bucket just share a row: it is still a
    distribution over V. Orders are joined by Witten-Bell smoothing from the unigram upwards, so
    what comes out sums to one whatever the counts are.
    A context never reaches over the BOS of its document.
    """

    MULT = 0x2545F4914F6CDD1D

    def __init__(self, args: type[Hyperparameters], stream: Tensor):
        self.vocab = args.vocab_size
        self.stream = stream
        self.unigram_add = args.ngram_unigram_add
        self.mask = (1 << args.ngram_rows_log2) - 1
        device = stream.device
        self.context_lens = list(range(1, args.ngram_max_order))
        self.unigram = torch.zeros(self.vocab, dtype=torch.float64, device=device)
        self.tables = {
            k: torch.zeros(
                (self.vocab if k == 1 else self.mask + 1, self.vocab),
                dtype=torch.int32,
                device=device,
            )
            for k in self.context_lens
        }
        index = torch.arange(stream.numel(), device=device)
        starts = torch.where(stream == args.bos_id, index, torch.zeros_like(index))
        self.doc_age = index - torch.cummax(starts, dim=0).values
        self.tokens_in = 0

    def bucket(self, pos: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The row for the k tokens that end at pos (pos included), and whether they lie in one document."""
        inside = self.doc_age[pos] >= k - 1
        if k == 1:
            return self.stream[pos], inside
        h = torch.full_like(pos, k)
        for j in range(k):
            h = (h ^ (self.stream[(pos - j).clamp_min(0)] + 1)) * self.MULT
            h = h ^ ((h >> 29) & 0x7FFFFFFFF)
        return h & self.mask, inside

    def predict(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """For each position: p(next token) over V, and the longest context length that has been seen."""
        base = self.unigram + self.unigram_add
        p = (base / base.sum()).float().expand(*pos.shape, self.vocab)
        depth = torch.zeros(pos.shape, dtype=torch.int64, device=pos.device)
        for k in self.context_lens:
            slot, inside = self.bucket(pos, k)
            row = self.tables[k][slot].float()
            total = row.sum(dim=-1, keepdim=True)
            kinds = (row > 0).sum(dim=-1, keepdim=True).float()
            seen = (total > 0) & inside.unsqueeze(-1)
            p = torch.where(seen, (row + kinds * p) / (total + kinds).clamp_min(1.0), p)
            depth = torch.where(seen.squeeze(-1), k, depth)
        return p, depth

    @torch.no_grad()
    def absorb(self, lo: int, hi: int) -> None:
        """Adds the transitions pos -> pos + 1 for lo <= pos < hi. Call it when all of them are scored."""
        pos = torch.arange(lo, hi, device=self.stream.device)
        nxt = self.stream[pos + 1]
        self.unigram += torch.bincount(nxt, minlength=self.vocab).double()
        for k in self.context_lens:
            slot, inside = self.bucket(pos, k)
            flat = (slot * self.vocab + nxt)[inside]
            self.tables[k].view(-1).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        self.tokens_in += hi - lo


def mix_weight(args: type[Hyperparameters], entropy: Tensor, depth: Tensor) -> Tensor:
    """Share of the n-gram model: grows with the network's entropy and with the length of the context seen."""
    gate = torch.sigmoid(args.mix_entropy_slope * (entropy - args.mix_entropy_mid))
    reach = (args.mix_depth_gain * depth.float()).clamp(max=1.0)
    return (args.mix_floor + (args.mix_ceil - args.mix_floor) * gate) * reach


# -----------------------------------------------------------------------------
# EVALUATION
# -----------------------------------------------------------------------------


class Tally:
    """Sums of loss, bytes and targets in fp64, added up over the ranks at the end."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, nbytes: Tensor, live: Tensor) -> None:
        keep = live.to(torch.float64)
        self.sums[0] += (nll.to(torch.float64) * keep).sum()
        self.sums[1] += (nbytes.to(torch.float64) * keep).sum()
        self.sums[2] += keep.sum()

    def result(self) -> tuple[float, float, int, int]:
        """val_loss in nats per token, bits per byte, targets, bytes."""
        sums = self.sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        nll, nbytes, count = (float(v) for v in sums)
        return nll / count, nll / math.log(2.0) / nbytes, int(count), int(nbytes)


def padded(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """ids filled up to a fixed length (so that nothing is compiled twice), and which of them are real."""
    real = torch.arange(size, device=ids.device) < ids.numel()
    if ids.numel() < size:
        ids = torch.cat((ids, ids[-1:].expand(size - ids.numel())))
    return ids, real


@torch.no_grad()
def eval_plain(
    args: type[Hyperparameters],
    model: GPT,
    hidden_fn,
    stream: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    rank: int,
    world_size: int,
) -> tuple[float, float]:
    """Disjoint windows, no mixture: cheap, for the training log and for the round trip."""
    device = stream.device
    seq = args.eval_seq_len
    num_targets = stream.numel() - 1
    rows = math.ceil(num_targets / seq)
    tally = Tally(device)
    was_training = model.training
    model.eval()
    offsets = torch.arange(seq, device=device)
    for ids in torch.arange(rank, rows, world_size, device=device).split(args.val_batch_seqs):
        ids, real = padded(ids, args.val_batch_seqs)
        pos = ids[:, None] * seq + offsets
        live = (pos < num_targets) & real[:, None]
        pos = pos.clamp(max=num_targets - 1)
        x, y = stream[pos], stream[pos + 1]
        logits = model.head(hidden_fn(x))
        nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none")
        tally.add(nll.view_as(y), bytes_of(x, y, tables), live)
    if was_training:
        model.train()
    val_loss, val_bpb, _, _ = tally.result()
    return val_loss, val_bpb


@torch.no_grad()
def score_windows(
    args: type[Hyperparameters],
    model: GPT,
    hidden_fn,
    stream: Tensor,
    block_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities over V for the `stride` positions of each block, from one window per block.

    Block b owns the positions b*stride .. (b+1)*stride - 1, and its window ends with the last of them, so
    every position belongs to exactly one block and sees up to eval_seq_len tokens.
    Returns positions (clamped into the stream), which of them exist, and the log-probabilities.
    """
    seq, stride = args.eval_seq_len, args.eval_stride
    num_targets = stream.numel() - 1
    first = block_ids * stride
    end = (first + stride).clamp(max=num_targets)
    window = (end - seq).clamp(min=0)
    grid = (window[:, None] + torch.arange(seq, device=stream.device)).clamp(max=num_targets - 1)
    h = hidden_fn(stream[grid])
    pos = first[:, None] + torch.arange(stride, device=stream.device)
    exists = pos < num_targets
    pos = pos.clamp(max=num_targets - 1)
    at = (pos - window[:, None]).unsqueeze(-1).expand(-1, -1, h.size(-1))
    logp = F.log_softmax(model.head(h.gather(1, at)), dim=-1)
    return pos, exists, logp


@torch.no_grad()
def eval_stream(
    args: type[Hyperparameters],
    model: GPT,
    hidden_fn,
    stream: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    rank: int,
    world_size: int,
    log0,
) -> dict[str, float]:
    """The reported evaluation: sliding windows, mixed with the counts of all chunks before this one.

    Chunk by chunk: the ranks share the windows of the chunk, everything in it is scored with the counts as they
    stand, and only then does each rank add the chunk's tokens to its own (identical) copy of the counts.
    """
    device = stream.device
    stride = args.eval_stride
    num_targets = stream.numel() - 1
    num_blocks = math.ceil(num_targets / stride)
    blocks_per_chunk = max(1, args.ngram_chunk_tokens // stride)
    num_chunks = math.ceil(num_blocks / blocks_per_chunk)
    counts = BackoffCounts(args, stream) if args.ngram_enabled else None
    mixed, neural = Tally(device), Tally(device)
    model.eval()
    t0 = time.perf_counter()

    for chunk in range(num_chunks):
        lo = chunk * blocks_per_chunk
        hi = min(lo + blocks_per_chunk, num_blocks)
        mine = torch.arange(min(lo + rank, hi), hi, world_size, device=device)
        for block_ids in mine.split(args.eval_batch_windows) if mine.numel() else ():
            block_ids, real = padded(block_ids, args.eval_batch_windows)
            pos, exists, logp = score_windows(args, model, hidden_fn, stream, block_ids)
            live = exists & real[:, None]
            prev, target = stream[pos], stream[pos + 1]
            nbytes = bytes_of(prev, target, tables)
            nll_nn = -logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            neural.add(nll_nn, nbytes, live)

            if counts is None:
                mixed.add(nll_nn, nbytes, live)
                continue
            p_nn = logp.exp()
            entropy = -(p_nn * logp).sum(dim=-1)
            p_ng, depth = counts.predict(pos)
            share = mix_weight(args, entropy, depth).unsqueeze(-1)
            p_mix = (1.0 - share) * p_nn + share * p_ng
            p_target = p_mix.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            nll = -p_target.clamp_min(1e-30).log()
            mixed.add(nll, nbytes, live)

        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if counts is not None:
            counts.absorb(lo * stride, min(hi * stride, num_targets))
        if chunk % 50 == 0 or chunk == num_chunks - 1:
            so_far = float(mixed.sums[0] / max(float(mixed.sums[1]), 1.0)) / math.log(2.0)
            log0(
                f"  chunk {chunk + 1}/{num_chunks} rank0_bpb:{so_far:.4f} "
                f"elapsed:{time.perf_counter() - t0:.1f}s"
            )

    val_loss, val_bpb, count, total_bytes = mixed.result()
    nn_loss, nn_bpb, _, _ = neural.result()
    if count != num_targets:
        raise RuntimeError(f"scored {count} targets, the stream has {num_targets}")
    return {
        "val_loss": val_loss,
        "val_bpb": val_bpb,
        "nn_loss": nn_loss,
        "nn_bpb": nn_bpb,
        "targets": count,
        "bytes": total_bytes,
    }


# -----------------------------------------------------------------------------
# OPTIMISERS AND SCHEDULE
# -----------------------------------------------------------------------------


def build_optimisers(args: type[Hyperparameters], model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    tables, matrices, scalars = [], [], []
    for name, p in model.named_parameters():
        if name in TABLE_NAMES:
            tables.append(p)
        elif p.ndim == 2 and not is_control(name):
            matrices.append(p)
        else:
            scalars.append(p)
    common = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    opt_tables = torch.optim.AdamW(
        [{"params": tables, "lr": args.embed_lr, "base_lr": args.embed_lr}],
        weight_decay=args.adam_wd,
        **common,
    )
    opt_scalars = torch.optim.AdamW(
        [{"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        weight_decay=0.0,
        **common,
    )
    opt_muon = Muon(
        matrices,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        ns_steps=args.muon_ns_steps,
        weight_decay=args.muon_wd,
    )
    for group in opt_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    return [opt_tables, opt_muon, opt_scalars], opt_muon


def lr_scale(args: type[Hyperparameters], step: int, elapsed_ms: float, cap_ms: float | None) -> float:
    """1, then linear to 0 over the last warmdown_iters steps (as judged by the clock, if there is a cap)."""
    if args.warmdown_iters <= 0:
        return 1.0
    if cap_ms is None:
        left = args.iterations - step
        return min(1.0, max(left, 0) / args.warmdown_iters)
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    left_ms = max(cap_ms - elapsed_ms, 0.0)
    return left_ms / max(warmdown_ms, 1e-9) if left_ms <= warmdown_ms else 1.0


def muon_momentum_at(args: type[Hyperparameters], step: int) -> float:
    if args.muon_momentum_steps <= 0:
        return args.muon_momentum
    t = min(step / args.muon_momentum_steps, 1.0)
    return (1.0 - t) * args.muon_momentum_start + t * args.muon_momentum


# -----------------------------------------------------------------------------
# MAIN
# -----------------------------------------------------------------------------


def main() -> None:
    args = Hyperparameters
    code = Path(__file__).read_text(encoding="utf-8")
    code_bytes = len(Path(__file__).read_bytes())

    # ---- distributed -------------------------------------------------------

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = env_int("RANK", 0)
    world_size = env_int("WORLD_SIZE", 1)
    local_rank = env_int("LOCAL_RANK", 0)
    if world_size <= 0 or 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
    accum = 8 // world_size
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
    from torch.backends.cuda import (
        enable_cudnn_sdp,
        enable_flash_sdp,
        enable_math_sdp,
        enable_mem_efficient_sdp,
    )

    enable_cudnn_sdp(False)
    enable_flash_sdp(True)
    enable_mem_efficient_sdp(False)
    enable_math_sdp(False)

    # ---- log ---------------------------------------------------------------

    out_dir = Path(args.out_dir)
    logfile: Path | None = None
    if master:
        (out_dir / "logs").mkdir(parents=True, exist_ok=True)
        logfile = out_dir / "logs" / f"{args.run_id}.txt"
        print(logfile)

    def log0(msg: str, console: bool = True) -> None:
        if not master:
            return
        if console:
            print(msg, flush=True)
        if logfile is not None:
            with logfile.open("a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(
        subprocess.run(
            ["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False
        ).stdout,
        console=False,
    )
    log0("=" * 100, console=False)

    # ---- seeds, tokenizer, validation stream -------------------------------

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size}, tokenizer has {int(sp.vocab_size())}")
    if int(sp.bos_id()) != args.bos_id:
        raise ValueError(f"BOS_ID={args.bos_id}, tokenizer has {int(sp.bos_id())}")
    tables = build_byte_tables(sp, args.vocab_size, device)
    val_stream = read_val_stream(args.val_files).to(device=device, dtype=torch.int64)
    log0(f"val_stream: {args.val_files} tokens:{val_stream.numel()}")
    log0(f"train_shards: {len(glob.glob(args.train_files))} in {args.data_path}")

    # ---- model -------------------------------------------------------------

    base_model = GPT(args).to(device)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    monitor_hidden = torch.compile(base_model.hidden, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )
    optimisers, opt_muon = build_optimisers(args, base_model)
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{accum} seed:{args.seed}")
    log0(
        f"layers:{args.num_layers} dim:{args.model_dim} heads:{args.num_heads}/{args.num_kv_heads} "
        f"mlp:{args.mlp_mult}x leak:{args.mlp_leak} xsa_last:{args.xsa_last} rope_dims:{args.rope_dims} "
        f"bigram:{args.bigram_rows}x{args.bigram_dim} ve:{args.ve_dim}@{args.ve_layers}"
    )
    log0(
        f"embed_lr:{args.embed_lr} matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr} "
        f"muon_wd:{args.muon_wd} adam_wd:{args.adam_wd} momentum:{args.muon_momentum} "
        f"warmdown:{args.warmdown_iters} ema:{args.ema_decay} swa:{args.swa_start_scale}/{args.swa_every}"
    )
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} max_wallclock_seconds:{args.max_wallclock_seconds:.1f}"
    )

    def zero_grad() -> None:
        for opt in optimisers:
            opt.zero_grad(set_to_none=True)

    # The cap is a little short of the official one: the step that runs over it must still end inside.
    cap_ms: float | None = None
    if args.max_wallclock_seconds > 0:
        cap_ms = 1000.0 * (args.max_wallclock_seconds - args.finish_margin_seconds)

    # ---- compile warm-up: a few steps on training data, then everything is put back ------------

    loader = TrainLoader(args.train_files, rank, world_size, device)
    if args.warmup_steps > 0:
        start_model = {k: v.detach().cpu().clone() for k, v in base_model.state_dict().items()}
        start_opts = [copy.deepcopy(opt.state_dict()) for opt in optimisers]
        model.train()
        for i in range(args.warmup_steps):
            zero_grad()
            for micro in range(accum):
                if distributed:
                    model.require_backward_grad_sync = micro == accum - 1
                x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, accum)
                (model(x, y) / accum).backward()
            for opt in optimisers:
                opt.step()
            zero_grad()
            if i + 1 == args.warmup_steps or (i + 1) % 10 == 0:
                log0(f"warmup_step:{i + 1}/{args.warmup_steps}")
        base_model.load_state_dict(start_model, strict=True)
        for opt, state in zip(optimisers, start_opts, strict=True):
            opt.load_state_dict(state)
        zero_grad()
        loader = TrainLoader(args.train_files, rank, world_size, device)

    # ---- training ----------------------------------------------------------

    averages = WeightAverages(base_model, args.ema_decay)
    qat_active = False
    stop_after: int | None = None
    training_ms = 0.0
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after is not None and step >= stop_after)

        if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            training_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_plain(args, base_model, monitor_hidden, val_stream, tables, rank, world_size)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_ms:.0f}ms step_avg:{training_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            if stop_after is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = training_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, cap_ms)
        if not qat_active and scale < args.qat_threshold:
            qat_active = True
            base_model.set_qat(True)
            log0(f"late_qat: on at step:{step} scale:{scale:.4f}")

        model.train()
        zero_grad()
        train_loss = torch.zeros((), device=device)
        for micro in range(accum):
            if distributed:
                model.require_backward_grad_sync = micro == accum - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, accum)
            loss = model(x, y)
            train_loss += loss.detach()
            (loss / accum).backward()
        train_loss /= accum

        momentum = muon_momentum_at(args, step)
        for group in opt_muon.param_groups:
            group["momentum"] = momentum
        for opt in optimisers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimisers:
            opt.step()
        zero_grad()

        averages.after_step()
        if args.swa_enabled and scale < args.swa_start_scale and step % args.swa_every == 0:
            averages.snapshot()

        step += 1
        now_ms = training_ms + 1000.0 * (time.perf_counter() - t0)
        if step <= 10 or step % args.train_log_every == 0:
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{now_ms:.0f}ms step_avg:{now_ms / step:.2f}ms"
            )

        # All ranks must leave the loop at the same step.
        over = cap_ms is not None and now_ms >= cap_ms
        if distributed and cap_ms is not None:
            flag = torch.tensor(int(over), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            over = bool(flag.item())
        if stop_after is None and over:
            stop_after = step

    log0(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # ---- weights to keep: EMA with a fixed share of SWA ------------------------------------------

    log0(f"averages: ema decay {args.ema_decay}, {averages.swa_count} swa snapshots, blend {args.swa_blend}")
    final_state = averages.blended(args.swa_blend)
    base_model.load_state_dict(final_state, strict=True)
    base_model.set_qat(False)

    # ---- artifact ----------------------------------------------------------

    artifact = out_dir / "final_model.int6.ptz"
    grid = [float(p) for p in args.clip_grid.split(",")]
    if master:
        packed, stats = quantise_state(base_model.state_dict(), grid)
        model_bytes = write_artifact(packed, artifact, args.zstd_level)
        log0(
            f"quantised: int6 {stats['int6']} int8 {stats['int8']} kept {stats['kept']} "
            f"mean_sq_err {stats['sq_err'] / max(stats['int6'] + stats['int8'], 1):.3e}"
        )
        total_bytes = model_bytes + code_bytes
        log0(f"Serialized model int6+zstd/lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes (limit {args.size_limit})")
        if total_bytes > args.size_limit:
            log0(f"WARNING: {total_bytes - args.size_limit} bytes over the limit")
    if distributed:
        dist.barrier()
    del model, compiled_model, averages, final_state
    torch.cuda.empty_cache()

    # ---- evaluation of what was written ----------------------------------------------------------

    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    eval_model = GPT(args).to(device)
    eval_model.load_state_dict(restore_state(read_artifact(artifact)), strict=True)
    eval_model.eval()
    eval_hidden = torch.compile(eval_model.hidden, dynamic=False, fullgraph=True)

    rt_loss, rt_bpb = eval_plain(args, eval_model, eval_hidden, val_stream, tables, rank, world_size)
    torch.cuda.synchronize()
    log0(
        f"final_roundtrip val_loss:{rt_loss:.4f} val_bpb:{rt_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )

    t_stream = time.perf_counter()
    log0(
        f"stream eval: seq {args.eval_seq_len} stride {args.eval_stride} ngram {int(args.ngram_enabled)} "
        f"order {args.ngram_max_order} rows 2^{args.ngram_rows_log2} chunk {args.ngram_chunk_tokens} "
        f"mix {args.mix_floor}..{args.mix_ceil}"
    )
    result = eval_stream(args, eval_model, eval_hidden, val_stream, tables, rank, world_size, log0)
    torch.cuda.synchronize()
    stream_ms = 1000.0 * (time.perf_counter() - t_stream)
    log0(f"scored targets:{result['targets']} bytes:{result['bytes']}")
    log0(
        f"final_sliding_neural val_loss:{result['nn_loss']:.4f} val_bpb:{result['nn_bpb']:.4f} "
        f"stride:{args.eval_stride}"
    )
    log0(
        f"final_stream_mix val_loss:{result['val_loss']:.4f} val_bpb:{result['val_bpb']:.4f} "
        f"stride:{args.eval_stride} eval_time:{stream_ms:.0f}ms"
    )
    log0(f"final_stream_mix_exact val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}")
    log0(f"total_eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
