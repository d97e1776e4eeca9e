"""
Baseline GPT + one throw-away LoRA per validation document.

The model is (almost) the stock 9x512 baseline: GQA, tied embeddings, U-Net skips, relu^2 MLP, logit softcap. I only added a
tiny smear gate and an average of the last checkpoints. What moves the number is the evaluation:

  * the validation stream is cut at BOS, so no document ever sees another one,
  * every document owns a rank-8 LoRA (q, v and the output head) that starts from zero,
  * inside a document we walk over chunks of 256 tokens: score the chunk, then one Adam step on it, then the next chunk,
  * documents of about the same length share a batch, so the GPUs do not spend their time on padding.

Everything that is counted lives in this file. Run with

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
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# HYPERPARAMETERS
# -----------------------------
# Everything can be overridden from the environment. The defaults are the submission.


def _env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def _env_flag(name: str, default: str) -> bool:
    return bool(int(os.environ.get(name, default)))


class Hyperparameters:
    # Data: shards written by the official download script.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = _env_int("SEED", 1337)

    # Validation cadence. The periodic validation is for the eye only.
    val_batch_size = _env_int("VAL_BATCH_SIZE", 524_288)
    val_loss_every = _env_int("VAL_LOSS_EVERY", 1000)
    train_log_every = _env_int("TRAIN_LOG_EVERY", 200)

    # Training length.
    iterations = _env_int("ITERATIONS", 20_000)
    warmdown_iters = _env_int("WARMDOWN_ITERS", 1800)
    warmup_steps = _env_int("WARMUP_STEPS", 20)
    train_batch_tokens = _env_int("TRAIN_BATCH_TOKENS", 524_288)
    train_seq_len = _env_int("TRAIN_SEQ_LEN", 1024)
    max_wallclock_seconds = _env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    # Taken off the 600 s before the loop starts: the activation statistics for the quantiser come out of this.
    calib_reserve_seconds = _env_float("CALIB_RESERVE_SECONDS", 12.0)
    calib_batches = _env_int("CALIB_BATCHES", 4)

    # Model shape.
    vocab_size = _env_int("VOCAB_SIZE", 1024)
    num_layers = _env_int("NUM_LAYERS", 9)
    num_heads = _env_int("NUM_HEADS", 8)
    num_kv_heads = _env_int("NUM_KV_HEADS", 4)
    model_dim = _env_int("MODEL_DIM", 512)
    mlp_mult = _env_int("MLP_MULT", 2)
    rope_base = _env_float("ROPE_BASE", 10000.0)
    qk_gain_init = _env_float("QK_GAIN_INIT", 1.5)
    logit_softcap = _env_float("LOGIT_SOFTCAP", 30.0)
    smear_init = _env_float("SMEAR_INIT", -3.0)
    bos_id = _env_int("BOS_ID", 1)

    # Optimisers.
    embed_lr = _env_float("TIED_EMBED_LR", 0.05)
    embed_init_std = _env_float("TIED_EMBED_INIT_STD", 0.005)
    matrix_lr = _env_float("MATRIX_LR", 0.04)
    scalar_lr = _env_float("SCALAR_LR", 0.04)
    muon_momentum = _env_float("MUON_MOMENTUM", 0.95)
    muon_backend_steps = _env_int("MUON_BACKEND_STEPS", 5)
    muon_momentum_warmup_start = _env_float("MUON_MOMENTUM_WARMUP_START", 0.85)
    muon_momentum_warmup_steps = _env_int("MUON_MOMENTUM_WARMUP_STEPS", 500)
    muon_weight_decay = _env_float("MUON_WD", 0.01)
    beta1 = _env_float("BETA1", 0.9)
    beta2 = _env_float("BETA2", 0.95)
    adam_eps = _env_float("ADAM_EPS", 1e-8)
    grad_clip_norm = _env_float("GRAD_CLIP_NORM", 0.0)

    # Average of the checkpoints of the warmdown.
    swa_enabled = _env_flag("SWA_ENABLED", "1")
    swa_below = _env_float("SWA_BELOW", 0.4)
    swa_every = _env_int("SWA_EVERY", 50)

    # Evaluation: document LoRA.
    ttt_lora_rank = _env_int("TTT_LORA_RANK", 8)
    ttt_lora_lr = _env_float("TTT_LORA_LR", 0.01)
    ttt_beta1 = _env_float("TTT_BETA1", 0.9)
    ttt_beta2 = _env_float("TTT_BETA2", 0.95)
    ttt_chunk_size = _env_int("TTT_CHUNK_SIZE", 256)
    ttt_context = _env_int("TTT_CONTEXT", 1024)
    ttt_batch_docs = _env_int("TTT_BATCH_DOCS", 64)
    ttt_steps = _env_int("TTT_STEPS", 1)
    ttt_max_docs = _env_int("TTT_MAX_DOCS", 0)  # smoke tests on my 3090; 0 = every document

    # Optional second opinion, off in the submission.
    run_sliding = _env_flag("RUN_SLIDING", "0")
    sliding_stride = _env_int("SLIDING_STRIDE", 64)


IGNORE = -100
CODE_LIMIT = 16_000_000

# -----------------------------
# MUON
# -----------------------------
# As in modded-nanogpt / the baseline: SGD momentum, then five Newton-Schulz iterations, matrices dealt round-robin to ranks.


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
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
    def __init__(
        self,
        params,
        lr: float,
        momentum: float,
        backend_steps: int,
        weight_decay: float = 0.0,
        nesterov: bool = True,
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            backend_steps=backend_steps,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
        super().__init__(params, defaults)

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
            backend_steps = group["backend_steps"]
            nesterov = group["nesterov"]
            decay = group["weight_decay"]

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
                    if nesterov:
                        g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=backend_steps)
                    # Scale correction from Muon reference implementations.
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()

            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)

            cursor = 0
            for p in params:
                g = updates_flat[cursor : cursor + p.numel()].view_as(p).to(dtype=p.dtype)
                if decay > 0:
                    p.mul_(1.0 - lr * decay)
                p.add_(g, alpha=-lr)
                cursor += p.numel()

        return loss


# -----------------------------
# DATA
# -----------------------------
# A shard is 256 little-endian int32 (magic, version, token count, padding) and then uint16 tokens.

HEADER_INTS = 256
SHARD_MAGIC = 20240520
SHARD_VERSION = 1


def load_data_shard(file: Path) -> Tensor:
    header_bytes = HEADER_INTS * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
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
    """Reads the train shards in order, round and round, without ever looking back."""

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
    """Every rank reads the same stream and keeps its own slice of it. The extra token makes the shift by one."""

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


def load_validation_tokens(pattern: str) -> Tensor:
    """The whole validation split, untrimmed: the last document counts to its last token."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    tokens = torch.cat([load_data_shard(file).to(torch.int32) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is too short")
    return tokens


# -----------------------------
# TOKENIZER-AGNOSTIC BYTES
# -----------------------------
# bits per byte need the bytes of the text behind each target. A SentencePiece piece with a leading mark stands for
# a space plus its letters; the space only exists in the text when the token before is an ordinary one (not BOS & co).


@dataclass
class ByteTables:
    base: Tensor  # bytes of the piece without its leading mark
    space: Tensor  # the piece starts with the mark
    boundary: Tensor  # control / unknown / unused ids

    def count(self, prev_ids: Tensor, target_ids: Tensor) -> Tensor:
        n = self.base[target_ids].to(torch.int32)
        n = n + (self.space[target_ids] & ~self.boundary[prev_ids]).to(torch.int32)
        return n


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTables:
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
    base = np.zeros((table_size,), dtype=np.int16)
    space = np.zeros((table_size,), dtype=np.bool_)
    boundary = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        boundary[token_id] = False
        if sp.is_byte(token_id):
            base[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("\u2581"):
            space[token_id] = True
            piece = piece[1:]
        base[token_id] = len(piece.encode("utf-8"))
    return ByteTables(
        base=torch.tensor(base, dtype=torch.int16, device=device),
        space=torch.tensor(space, dtype=torch.bool, device=device),
        boundary=torch.tensor(boundary, dtype=torch.bool, device=device),
    )


# -----------------------------
# BOOKKEEPING OF A SCORE
# -----------------------------


class ScoreBook:
    """Sums of nats, bytes and targets, in float64, on one rank until `reduce` is called."""

    def __init__(self, tables: ByteTables, device: torch.device):
        self.tables = tables
        self.nats = torch.zeros((), device=device, dtype=torch.float64)
        self.bytes = torch.zeros((), device=device, dtype=torch.float64)
        self.targets = torch.zeros((), device=device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, nll: Tensor, x: Tensor, y: Tensor) -> None:
        live = y != IGNORE
        y_safe = y.clamp_min(0)
        self.nats += torch.where(live, nll, torch.zeros_like(nll)).to(torch.float64).sum()
        self.bytes += (self.tables.count(x, y_safe) * live).to(torch.float64).sum()
        self.targets += live.to(torch.float64).sum()

    def reduce(self) -> None:
        if dist.is_available() and dist.is_initialized():
            for total in (self.nats, self.bytes, self.targets):
                dist.all_reduce(total, op=dist.ReduceOp.SUM)

    @property
    def loss(self) -> float:
        return float(self.nats / self.targets.clamp_min(1.0))

    @property
    def bpb(self) -> float:
        return float(self.nats / math.log(2.0) / self.bytes.clamp_min(1.0))


def token_nll(logits: Tensor, y: Tensor) -> Tensor:
    """-log p of each target, shape of y, 0 where the target is IGNORE."""
    flat = F.cross_entropy(
        logits.reshape(-1, logits.size(-1)).float(),
        y.reshape(-1),
        ignore_index=IGNORE,
        reduction="none",
    )
    return flat.view_as(y)


def gather_windows(tokens: Tensor, start: Tensor, limit: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """
    Rows of inputs and targets. Row b reads the inputs start[b] .. start[b]+width-1 of the stream, but none at or beyond
    limit[b]; there the input is BOS-filled (it could not reach an earlier position anyway) and the target IGNORE.
    """
    last = tokens.numel() - 1
    pos = start[:, None] + torch.arange(width, device=tokens.device)[None, :]
    inside = pos < limit[:, None].clamp(max=last)
    safe = pos.clamp(max=last - 1)
    x = tokens[safe].long().masked_fill(~inside, Hyperparameters.bos_id)
    y = tokens[safe + 1].long().masked_fill(~inside, IGNORE)
    return x, y


# -----------------------------
# PLAIN VALIDATION (fixed weights)
# -----------------------------


def eval_val(
    args: Hyperparameters,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    tokens: Tensor,
    tables: ByteTables,
) -> tuple[float, float]:
    """Back-to-back windows of train_seq_len over the stream. Fast, no tricks; the curve in the log comes from here."""
    seq_len = args.train_seq_len
    total = tokens.numel() - 1
    n_seqs = (total + seq_len - 1) // seq_len
    lo = (n_seqs * rank) // world_size
    hi = (n_seqs * (rank + 1)) // world_size
    rows = max(1, args.val_batch_size // (world_size * seq_len))
    book = ScoreBook(tables, device)
    with torch.inference_mode():
        for first in range(lo, hi, rows):
            index = torch.arange(first, first + rows, device=device)
            limit = torch.where(index < hi, (index + 1) * seq_len, torch.zeros_like(index))
            x, y = gather_windows(tokens, index * seq_len, limit, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                logits = logits_fn(x)
            book.add(token_nll(logits, y), x, y)
    book.reduce()
    return book.loss, book.bpb


def eval_val_sliding(
    args: Hyperparameters,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    tokens: Tensor,
    tables: ByteTables,
) -> tuple[float, float]:
    """Strided windows over the stream; span k is scored by the one window that ends with it."""
    seq_len, stride = args.train_seq_len, args.sliding_stride
    total = tokens.numel() - 1
    n_spans = (total + stride - 1) // stride
    rows = max(1, args.val_batch_size // (world_size * seq_len))
    mine = range(rank * rows, n_spans, world_size * rows)
    book = ScoreBook(tables, device)
    offsets = torch.arange(seq_len, device=device)[None, :]
    with torch.inference_mode():
        for first in mine:
            span = torch.arange(first, first + rows, device=device)
            span_lo, span_hi = span * stride, ((span + 1) * stride).clamp(max=total)
            start = ((span + 1) * stride - seq_len).clamp(min=0)
            x, y = gather_windows(tokens, start, torch.where(span < n_spans, span_hi, start), seq_len)
            y = y.masked_fill(start[:, None] + offsets < span_lo[:, None], IGNORE)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                logits = logits_fn(x)
            book.add(token_nll(logits, y), x, y)
    book.reduce()
    return book.loss, book.bpb


# -----------------------------
# MODEL
# -----------------------------

CONTROL_TENSOR_NAME_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear.gate")


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    # fp32 master weights, cast at matmul time.
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """cos/sin tables for the longest sequence we will ever see, made once (no lazily cached tensors to trip over)."""

    def __init__(self, dim: int, max_len: int, base: float = 10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", angles.cos()[None, None], persistent=False)
        self.register_buffer("sin", angles.sin()[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(-2)
        cos = self.cos[:, :, :length].to(x.dtype)
        sin = self.sin[:, :, :length].to(x.dtype)
        half = x.size(-1) // 2
        x1, x2 = x[..., :half], x[..., half:]
        return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


class SmearGate(nn.Module):
    """
    Lets a position borrow a little of the embedding before it. A document's first token has no predecessor, so at BOS
    (and at the left edge of a window) nothing is borrowed.
    """

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), init, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor, bos_id: int) -> Tensor:
        before = torch.cat((x[:, :1], x[:, :-1]), dim=1)
        keep = (ids != bos_id).to(x.dtype).unsqueeze(-1)
        return x + torch.sigmoid(self.gate).to(x.dtype) * keep * (before - x)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, max_len: int):
        super().__init__()
        dim = args.model_dim
        if dim % args.num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if args.num_heads % args.num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = args.num_heads
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = dim // args.num_heads
        if self.head_dim % 2 != 0:
            raise ValueError("head_dim must be even for RoPE")
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), args.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, max_len, args.rope_base)

    def forward(self, x: Tensor, q_delta: Tensor | None = None, v_delta: Tensor | None = None) -> Tensor:
        bsz, length, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if q_delta is not None:
            q = q + q_delta
        if v_delta is not None:
            v = v + v_delta
        q = q.reshape(bsz, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.reshape(bsz, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(bsz, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = self.rotary(F.rms_norm(q, (q.size(-1),)))
        k = self.rotary(F.rms_norm(k, (k.size(-1),)))
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None,
            is_causal=True,
            enable_gqa=(self.num_kv_heads != self.num_heads),
        )
        y = y.transpose(1, 2).contiguous().reshape(bsz, length, dim)
        return self.proj(y)


class MLP(nn.Module):
    # relu^2 MLP from the original modded-nanogpt setup
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        self.fc = CastedLinear(dim, mlp_mult * dim, bias=False)
        self.proj = CastedLinear(mlp_mult * dim, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, max_len: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(args, max_len)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor, q_lora=None, v_lora=None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        n = self.attn_norm(x)
        q_delta = q_lora(n) if q_lora is not None else None
        v_delta = v_lora(n) if v_lora is not None else None
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(n, q_delta, v_delta)
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        max_len = max(args.train_seq_len, args.ttt_context)
        self.bos_id = args.bos_id
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.smear = SmearGate(args.model_dim, args.smear_init)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, max_len) for _ in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights(args.embed_init_std)

    def _init_weights(self, embed_init_std: float) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)

    def trunk(self, ids: Tensor, adapter: "DocAdapter | None" = None) -> Tensor:
        x = self.tok_emb(ids).to(torch.bfloat16)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, ids, self.bos_id)
        x0 = x
        skips: list[Tensor] = []
        # First half stores skips; second half reuses them in reverse order.
        for i in range(self.num_encoder_layers):
            x = self._run_block(i, x, x0, adapter)
            skips.append(x)
        for j in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[j].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self._run_block(self.num_encoder_layers + j, x, x0, adapter)
        return self.final_norm(x)

    def _run_block(self, i: int, x: Tensor, x0: Tensor, adapter: "DocAdapter | None") -> Tensor:
        if adapter is None:
            return self.blocks[i](x, x0)
        return self.blocks[i](x, x0, adapter.q[i], adapter.v[i])

    def forward_logits(self, ids: Tensor, adapter: "DocAdapter | None" = None) -> Tensor:
        h = self.trunk(ids, adapter)
        logits = F.linear(h, self.tok_emb.weight.to(h.dtype))
        if adapter is not None:
            logits = logits + adapter.head(h)
        return self.logit_softcap * torch.tanh(logits.float() / self.logit_softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="mean")


# -----------------------------
# DOCUMENT LORA
# -----------------------------


class BatchedLowRank(nn.Module):
    """One low-rank map per row of the batch: x[b] -> x[b] @ down[b].T @ up[b].T, zero at reset."""

    def __init__(self, bsz: int, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.bound = 1.0 / math.sqrt(d_in)
        self.down = nn.Parameter(torch.empty(bsz, rank, d_in))
        self.up = nn.Parameter(torch.zeros(bsz, d_out, rank))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.down.uniform_(-self.bound, self.bound)
        self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        low = torch.bmm(x, self.down.to(x.dtype).transpose(1, 2))
        return torch.bmm(low, self.up.to(x.dtype).transpose(1, 2))


class DocAdapter(nn.Module):
    """The whole state that a document may change: LoRAs on q and v of each block and on the output head."""

    def __init__(self, args: Hyperparameters, bsz: int):
        super().__init__()
        dim, rank = args.model_dim, args.ttt_lora_rank
        kv_dim = args.num_kv_heads * (dim // args.num_heads)
        self.q = nn.ModuleList([BatchedLowRank(bsz, dim, dim, rank) for _ in range(args.num_layers)])
        self.v = nn.ModuleList([BatchedLowRank(bsz, dim, kv_dim, rank) for _ in range(args.num_layers)])
        self.head = BatchedLowRank(bsz, dim, args.vocab_size, rank)

    def reset(self) -> None:
        for module in self.modules():
            if isinstance(module, BatchedLowRank):
                module.reset()


def build_adapter_optimizer(args: Hyperparameters, adapter: DocAdapter) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        adapter.parameters(),
        lr=args.ttt_lora_lr,
        betas=(args.ttt_beta1, args.ttt_beta2),
        eps=1e-10,
        fused=True,
    )


@torch.no_grad()
def reset_adapter_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Forget the moments as well, or the next document would inherit a direction."""
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()


# -----------------------------
# QUANTISATION (int8 rows + zlib)
# -----------------------------
# Big matrices: one int8 per weight, one fp16 scale per row. Small things stay in fp16, control tensors in fp32.
# The clip of a row is picked by the error it makes on the output, with the squared inputs as weights.

INT8_KEEP_FLOAT_MAX_NUMEL = 65_536
INT8_CLIP_RATIOS = (1.0, 0.985, 0.97)


def collect_input_moments(
    base_model: GPT,
    loader: DistributedTokenLoader,
    args: Hyperparameters,
    grad_accum_steps: int,
) -> dict[str, Tensor]:
    """E[x_j^2] of every linear's input over a few train batches, averaged over the ranks."""
    sums: dict[str, Tensor] = {}
    handles = []

    def make_hook(name: str):
        def hook(_module, inputs) -> None:
            x = inputs[0].detach().float()
            moment = x.square().mean(dim=tuple(range(x.ndim - 1)))
            sums[name] = sums[name] + moment if name in sums else moment

        return hook

    for name, module in base_model.named_modules():
        if isinstance(module, CastedLinear):
            handles.append(module.register_forward_pre_hook(make_hook(name + ".weight")))
    base_model.eval()
    with torch.no_grad():
        for _ in range(args.calib_batches):
            x, _ = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                base_model.trunk(x)
    for handle in handles:
        handle.remove()
    for name in sorted(sums):
        sums[name] /= args.calib_batches
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums[name], op=dist.ReduceOp.AVG)
    return sums


def quantize_rows(w: Tensor, input_moment: Tensor | None) -> tuple[Tensor, Tensor]:
    w = w.float()
    weight = torch.ones(w.size(1), device=w.device) if input_moment is None else input_moment.to(w.device)
    absmax = w.abs().amax(dim=1)
    best_q = torch.zeros_like(w, dtype=torch.int8)
    best_scale = torch.zeros(w.size(0), device=w.device, dtype=torch.float16)
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    for ratio in INT8_CLIP_RATIOS:
        scale = (absmax * ratio / 127.0).clamp_min(1e-6).to(torch.float16)
        step = scale.float()[:, None]
        q = torch.clamp(torch.round(w / step), -127, 127)
        err = ((q * step - w).square() * weight[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
        best_q = torch.where(better[:, None], q.to(torch.int8), best_q)
    return best_q, best_scale


def quantize_state_dict(state: dict[str, Tensor], moments: dict[str, Tensor]) -> tuple[dict, dict[str, int]]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    passthrough: dict[str, Tensor] = {}
    stats = {"int8_tensors": 0, "float_tensors": 0, "payload_bytes": 0, "raw_bytes": 0}
    for name, t in state.items():
        t = t.detach()
        stats["raw_bytes"] += t.numel() * t.element_size()
        control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
        if control or t.ndim != 2 or t.numel() <= INT8_KEEP_FLOAT_MAX_NUMEL:
            kept = t.float() if control else t.to(torch.float16)
            passthrough[name] = kept.cpu().contiguous()
            stats["float_tensors"] += 1
            stats["payload_bytes"] += kept.numel() * kept.element_size()
            continue
        q, s = quantize_rows(t, moments.get(name))
        quantized[name] = q.cpu().contiguous()
        scales[name] = s.cpu().contiguous()
        stats["int8_tensors"] += 1
        stats["payload_bytes"] += q.numel() + 2 * s.numel()
    return {"format": "int8_rows_v1", "q": quantized, "s": scales, "f": passthrough}, stats


def dequantize_state_dict(obj: dict) -> dict[str, Tensor]:
    if obj.get("format") != "int8_rows_v1":
        raise ValueError("not an artifact of this script")
    out: dict[str, Tensor] = {}
    for name, q in obj["q"].items():
        out[name] = q.float() * obj["s"][name].float()[:, None]
    for name, t in obj["f"].items():
        out[name] = t.float()
    return out


def pack_artifact(obj: dict) -> bytes:
    buf = io.BytesIO()
    torch.save(obj, buf)
    return zlib.compress(buf.getvalue(), level=9)


def unpack_artifact(blob: bytes) -> dict:
    return torch.load(io.BytesIO(zlib.decompress(blob)), map_location="cpu")


# -----------------------------
# DOCUMENT-WISE EVALUATION
# -----------------------------


@dataclass(frozen=True)
class Document:
    """Inputs start .. start+length-1 of the stream; the targets are the same shifted by one."""

    start: int
    length: int

    def chunks(self, chunk_size: int) -> int:
        return (self.length + chunk_size - 1) // chunk_size


def find_documents(tokens: Tensor, bos_id: int) -> list[Document]:
    """
    Cuts the stream at BOS. The last target of a document is the BOS of the next one (it is a token of the stream and has
    to be paid for, it just stands for no bytes), so the lengths add up to len(tokens) - 1.
    """
    starts = (tokens == bos_id).nonzero(as_tuple=False).flatten().tolist()
    if not starts or starts[0] != 0:
        starts.insert(0, 0)
    ends = starts[1:] + [tokens.numel() - 1]
    return [Document(s, e - s) for s, e in zip(starts, ends) if e > s]


def allot_documents(docs: list[Document], args: Hyperparameters, rank: int, world_size: int) -> list[Document]:
    """Sorts by length and deals the documents out like cards: every rank gets the same mix of short and long ones."""
    ordered = sorted(docs, key=lambda d: (d.chunks(args.ttt_chunk_size), d.start))
    return ordered[rank::world_size]


def chunk_window(ci: int, chunk_size: int, context: int) -> tuple[int, int, int]:
    """For chunk ci of any document: where its window begins, how wide it is, and where in it the chunk begins."""
    chunk_lo = ci * chunk_size
    chunk_hi = chunk_lo + chunk_size
    begin = max(0, chunk_hi - context)
    return begin, chunk_hi - begin, chunk_lo - begin


def length_report(docs: list[Document], args: Hyperparameters) -> str:
    n_chunks = sorted(d.chunks(args.ttt_chunk_size) for d in docs)
    single = sum(1 for n in n_chunks if n == 1)
    return (
        f"documents:{len(docs)} targets:{sum(d.length for d in docs)} one_chunk:{single} "
        f"median_chunks:{n_chunks[len(n_chunks) // 2]} max_chunks:{n_chunks[-1]}"
    )


class ChunkProfile:
    """Loss by how deep in its document a chunk lies. Tells whether the LoRA learns anything; nothing reads it back."""

    EDGES = (0, 1, 2, 4, 8, 16)

    def __init__(self, device: torch.device):
        self.nats = torch.zeros(len(self.EDGES), device=device, dtype=torch.float64)
        self.targets = torch.zeros(len(self.EDGES), device=device, dtype=torch.float64)

    def bucket(self, ci: int) -> int:
        return max(i for i, edge in enumerate(self.EDGES) if ci >= edge)

    @torch.no_grad()
    def add(self, ci: int, nll: Tensor, y: Tensor) -> None:
        i = self.bucket(ci)
        live = y != IGNORE
        self.nats[i] += (nll * live).to(torch.float64).sum()
        self.targets[i] += live.to(torch.float64).sum()

    def reduce(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.nats, op=dist.ReduceOp.SUM)
            dist.all_reduce(self.targets, op=dist.ReduceOp.SUM)

    def __str__(self) -> str:
        parts = []
        for edge, nats, targets in zip(self.EDGES, self.nats.tolist(), self.targets.tolist()):
            if targets > 0:
                parts.append(f"chunk>={edge}:{nats / targets:.4f}")
        return " ".join(parts)


def warm_up_adapter(
    args: Hyperparameters,
    logits_fn,
    adapter: DocAdapter,
    device: torch.device,
) -> None:
    """Compiles the forward and backward of every window width on random ids, so that no graph is built in the loop."""
    widths = sorted({chunk_window(ci, args.ttt_chunk_size, args.ttt_context)[1] for ci in range(64)})
    for width in widths:
        ids = torch.randint(0, args.vocab_size, (args.ttt_batch_docs, width + 1), device=device)
        for learn in (False, True):
            with torch.set_grad_enabled(learn):
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    logits = logits_fn(ids[:, :-1].contiguous(), adapter)
                nll = token_nll(logits, ids[:, 1:].contiguous())
            if learn:
                nll.mean().backward()
    for p in adapter.parameters():
        p.grad = None
    adapter.reset()


def adapt_on_chunk(
    optimizer: torch.optim.Optimizer,
    nll: Tensor,
    more: Tensor,
) -> None:
    """One Adam step; row b only moves its own LoRA, and only if its document goes on (`more`)."""
    per_doc = nll.mean(dim=1)
    loss = (per_doc * more).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def eval_val_ttt_lora(
    args: Hyperparameters,
    base_model: GPT,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    tokens: Tensor,
    tables: ByteTables,
    log,
) -> tuple[float, float]:
    """
    Document-wise test-time training. All documents of a batch advance together, chunk by chunk:

        1. score chunk ci of every document with the LoRA built from its chunks 0 .. ci-1,
        2. book the losses,
        3. one step on chunk ci for the documents that have a chunk ci+1.

    The weights of the model itself never change here.
    """
    docs = find_documents(tokens, args.bos_id)
    log(length_report(docs, args))
    if args.ttt_max_docs > 0:
        docs = docs[: args.ttt_max_docs]
    mine = allot_documents(docs, args, rank, world_size)

    base_model.eval()
    for p in base_model.parameters():
        p.requires_grad_(False)

    bsz = args.ttt_batch_docs
    chunk = args.ttt_chunk_size
    adapter = DocAdapter(args, bsz).to(device)
    optimizer = build_adapter_optimizer(args, adapter)
    warm_up_adapter(args, logits_fn, adapter, device)

    book = ScoreBook(tables, device)
    profile = ChunkProfile(device)
    for first in range(0, len(mine), bsz):
        batch = mine[first : first + bsz]
        adapter.reset()
        reset_adapter_optimizer(optimizer)

        # Rows past the end of the list are empty documents; every shape stays the same.
        start = torch.zeros(bsz, device=device, dtype=torch.int64)
        limit = torch.zeros(bsz, device=device, dtype=torch.int64)
        start[: len(batch)] = torch.tensor([d.start for d in batch], device=device)
        limit[: len(batch)] = torch.tensor([d.start + d.length for d in batch], device=device)
        n_chunks = [d.chunks(chunk) for d in batch] + [0] * (bsz - len(batch))

        for ci in range(max(n_chunks)):
            begin, width, offset = chunk_window(ci, chunk, args.ttt_context)
            x, y = gather_windows(tokens, start + begin, limit, width)
            more = torch.tensor([float(ci + 1 < n) for n in n_chunks], device=device)
            learn = any(ci + 1 < n for n in n_chunks)

            with torch.set_grad_enabled(learn):
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    logits = logits_fn(x, adapter)
                nll = token_nll(logits[:, offset:], y[:, offset:])

            book.add(nll.detach(), x[:, offset:], y[:, offset:])
            profile.add(ci, nll.detach(), y[:, offset:])

            if learn:
                adapt_on_chunk(optimizer, nll, more)
                # further steps on the same, already booked chunk (TTT_STEPS=1 is as good and cheaper)
                for _ in range(args.ttt_steps - 1):
                    with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                        logits = logits_fn(x, adapter)
                    adapt_on_chunk(optimizer, token_nll(logits[:, offset:], y[:, offset:]), more)

        if first // bsz % 20 == 0:
            log(f"ttt_lora docs:{min(first + bsz, len(mine))}/{len(mine)} running_loss:{book.loss:.4f}")

    book.reduce()
    profile.reduce()
    log(f"ttt_lora targets:{int(book.targets)} expected:{tokens.numel() - 1} bytes:{int(book.bytes)}")
    log(f"ttt_lora profile {profile}")
    return book.loss, book.bpb


# -----------------------------
# TRAINING HELPERS
# -----------------------------


@dataclass
class Runtime:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    distributed: bool

    @property
    def master(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()


def set_up_runtime() -> Runtime:
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size <= 0:
        raise ValueError(f"WORLD_SIZE must be positive, got {world_size}")
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so grad_accum_steps stays integral")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return Runtime(rank, local_rank, world_size, device, distributed)


class Logger:
    """stdout and logs/RUN_ID.txt, master only."""

    def __init__(self, run: Runtime, run_id: str):
        self.path: Path | None = None
        if run.master:
            os.makedirs("logs", exist_ok=True)
            self.path = Path("logs") / f"{run_id}.txt"
            print(self.path)

    def __call__(self, msg: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(msg, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(msg, file=f)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


class Schedule:
    """Flat, then linear to zero over what the last `warmdown_iters` steps will take at the current pace."""

    def __init__(self, args: Hyperparameters):
        self.iterations = args.iterations
        self.warmdown_iters = args.warmdown_iters
        self.momentum_from = args.muon_momentum_warmup_start
        self.momentum_to = args.muon_momentum
        self.momentum_steps = args.muon_momentum_warmup_steps
        # What is left of the wall clock for optimiser steps.
        self.budget_ms: float | None = None
        if args.max_wallclock_seconds > 0:
            self.budget_ms = 1000.0 * (args.max_wallclock_seconds - args.calib_reserve_seconds)

    def lr(self, step: int, elapsed_ms: float) -> float:
        if self.warmdown_iters <= 0:
            return 1.0
        if self.budget_ms is None:
            begin = max(self.iterations - self.warmdown_iters, 0)
            if step < begin:
                return 1.0
            return max((self.iterations - step) / self.warmdown_iters, 0.0)
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = self.warmdown_iters * step_ms
        remaining_ms = max(self.budget_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    def momentum(self, step: int) -> float:
        frac = min(step / self.momentum_steps, 1.0) if self.momentum_steps > 0 else 1.0
        return (1.0 - frac) * self.momentum_from + frac * self.momentum_to

    def out_of_time(self, elapsed_ms: float, run: Runtime) -> bool:
        """The slowest rank decides for everybody."""
        if self.budget_ms is None:
            return False
        reached = torch.tensor(int(elapsed_ms >= self.budget_ms), device=run.device)
        if run.distributed:
            dist.all_reduce(reached, op=dist.ReduceOp.MAX)
        return bool(reached.item())


class WeightAverage:
    """Plain mean of snapshots (SWA). Which snapshots is fixed beforehand: every `swa_every` steps late in the warmdown."""

    def __init__(self):
        self.total: dict[str, Tensor] | None = None
        self.count = 0

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        state = model.state_dict()
        if self.total is None:
            self.total = {name: t.detach().float().clone() for name, t in state.items()}
        else:
            for name, t in state.items():
                self.total[name] += t.detach().float()
        self.count += 1

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        if self.total is None or self.count == 0:
            return
        state = model.state_dict()
        for name, t in state.items():
            t.copy_((self.total[name] / self.count).to(t.dtype))


def build_optimizers(args: Hyperparameters, model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    named = list(model.blocks.named_parameters())
    matrices = [
        p for name, p in named if p.ndim == 2 and not any(pat in name for pat in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    scalars = [p for name, p in named if p.ndim < 2 or any(pat in name for pat in CONTROL_TENSOR_NAME_PATTERNS)]
    scalars += [model.skip_weights, model.smear.gate]
    adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    embed_opt = torch.optim.Adam(
        [{"params": [model.tok_emb.weight], "lr": args.embed_lr, "base_lr": args.embed_lr}], **adam
    )
    scalar_opt = torch.optim.Adam([{"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr}], **adam)
    muon = Muon(
        matrices,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_weight_decay,
    )
    for group in muon.param_groups:
        group["base_lr"] = args.matrix_lr
    return [embed_opt, muon, scalar_opt], muon


def prime_compiled_step(
    args: Hyperparameters,
    run: Runtime,
    base_model: GPT,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loader: DistributedTokenLoader,
    grad_accum_steps: int,
    log,
) -> None:
    """
    A few full optimiser steps so that compilation is not billed to the training clock. Afterwards weights and optimiser
    states are put back; nothing is learnt here.
    """
    weights = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
    states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    model.train()
    for step in range(args.warmup_steps):
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        for micro in range(grad_accum_steps):
            if run.distributed:
                model.require_backward_grad_sync = micro == grad_accum_steps - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            (loss / grad_accum_steps).backward()
        for opt in optimizers:
            opt.step()
        if step + 1 == args.warmup_steps or (step + 1) % 10 == 0:
            log(f"warmup_step:{step + 1}/{args.warmup_steps}")
    base_model.load_state_dict(weights, strict=True)
    for opt, state in zip(optimizers, states):
        opt.load_state_dict(state)
        opt.zero_grad(set_to_none=True)
    if run.distributed:
        model.require_backward_grad_sync = True


def describe_machine(log) -> None:
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)
    log("=" * 100, console=False)


def gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


# -----------------------------
# MAIN
# -----------------------------


def train(
    args: Hyperparameters,
    run: Runtime,
    base_model: GPT,
    model: nn.Module,
    eval_logits,
    val_tokens: Tensor,
    tables: ByteTables,
    grad_accum_steps: int,
    log,
) -> dict[str, Tensor]:
    """Optimiser steps up to the cap, then the activation statistics for the quantiser. Returns the statistics."""
    optimizers, muon = build_optimizers(args, base_model)
    loader = DistributedTokenLoader(args.train_files, run.rank, run.world_size, run.device)
    if args.warmup_steps > 0:
        prime_compiled_step(args, run, base_model, model, optimizers, loader, grad_accum_steps, log)
        loader = DistributedTokenLoader(args.train_files, run.rank, run.world_size, run.device)

    schedule = Schedule(args)
    average = WeightAverage()
    training_time_ms = 0.0
    stop_after_step: int | None = None
    run.barrier()
    t0 = gpu_clock()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        # Periodic look at the validation loss. The clock stands still meanwhile, as in the baseline.
        if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            training_time_ms += 1000.0 * (gpu_clock() - t0)
            base_model.eval()
            val_loss, val_bpb = eval_val(args, eval_logits, run.rank, run.world_size, run.device, val_tokens, tables)
            log(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            base_model.train()
            t0 = gpu_clock()

        if last_step:
            if stop_after_step is not None and step < args.iterations:
                log(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = schedule.lr(step, elapsed_ms)

        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        train_loss = torch.zeros((), device=run.device)
        for micro in range(grad_accum_steps):
            if run.distributed:
                model.require_backward_grad_sync = micro == grad_accum_steps - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss / grad_accum_steps).backward()
        train_loss /= grad_accum_steps

        for group in muon.param_groups:
            group["momentum"] = schedule.momentum(step)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()

        step += 1
        if args.swa_enabled and scale < args.swa_below and step % args.swa_every == 0:
            average.add(base_model)

        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )
        if stop_after_step is None and schedule.out_of_time(approx_ms, run):
            stop_after_step = step

    # Still on the clock: the reserve pays for this.
    if args.swa_enabled:
        average.apply(base_model)
        log(f"swa: mean of {average.count} snapshots")
    moments = collect_input_moments(base_model, loader, args, grad_accum_steps)
    calib_ms = 1000.0 * (gpu_clock() - t0)
    log(f"calibration: {len(moments)} inputs in {calib_ms:.0f}ms, train+calibration {training_time_ms + calib_ms:.0f}ms")
    log(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )
    return moments


def write_artifact(
    base_model: GPT,
    moments: dict[str, Tensor],
    code: str,
    run: Runtime,
    path: Path,
    log,
) -> None:
    obj, stats = quantize_state_dict(base_model.state_dict(), moments)
    blob = pack_artifact(obj)
    code_bytes = len(code.encode("utf-8"))
    if run.master:
        path.write_bytes(blob)
        model_bytes = path.stat().st_size
        total = model_bytes + code_bytes
        ratio = stats["raw_bytes"] / max(stats["payload_bytes"], 1)
        log(f"quantised: int8:{stats['int8_tensors']} float:{stats['float_tensors']} payload_ratio:{ratio:.2f}x")
        log(f"Serialized model int8+zlib: {model_bytes} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size int8+zlib: {total} bytes")
        if total > CODE_LIMIT:
            raise RuntimeError(f"submission is {total - CODE_LIMIT} bytes too large")
    run.barrier()


def read_artifact(base_model: GPT, path: Path) -> None:
    """From here on the model is what the file says, not what was trained."""
    state = dequantize_state_dict(unpack_artifact(path.read_bytes()))
    base_model.load_state_dict(state, strict=True)


def evaluate(
    args: Hyperparameters,
    run: Runtime,
    base_model: GPT,
    eval_logits,
    val_tokens: Tensor,
    tables: ByteTables,
    log,
) -> None:
    shared = (run.rank, run.world_size, run.device, val_tokens, tables)
    base_model.eval()
    t_eval = gpu_clock()

    t0 = gpu_clock()
    val_loss, val_bpb = eval_val(args, eval_logits, *shared)
    log(
        f"final_int8_zlib_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
        f"eval_time:{1000.0 * (gpu_clock() - t0):.0f}ms"
    )

    if args.run_sliding:
        t0 = gpu_clock()
        val_loss, val_bpb = eval_val_sliding(args, eval_logits, *shared)
        log(
            f"final_int8_sliding val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
            f"stride:{args.sliding_stride} eval_time:{1000.0 * (gpu_clock() - t0):.0f}ms"
        )

    t0 = gpu_clock()
    val_loss, val_bpb = eval_val_ttt_lora(args, base_model, eval_logits, *shared, log)
    log(
        f"final_int8_ttt_lora val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
        f"eval_time:{1000.0 * (gpu_clock() - t0):.0f}ms"
    )
    log(f"final_int8_ttt_lora_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    log(f"eval_total:{1000.0 * (gpu_clock() - t_eval):.0f}ms")


def main() -> None:
    global zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    run = set_up_runtime()
    grad_accum_steps = 8 // run.world_size
    log = Logger(run, args.run_id)
    log(code, console=False)
    describe_machine(log)
    seed_everything(args.seed)

    # Tokenizer and validation tokens.
    if not args.tokenizer_path.endswith(".model"):
        raise ValueError(f"Script only setup for SentencePiece .model file: {args.tokenizer_path}")
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    if sp.bos_id() >= 0 and sp.bos_id() != args.bos_id:
        raise ValueError(f"BOS_ID={args.bos_id} does not match the tokenizer's {sp.bos_id()}")
    val_tokens = load_validation_tokens(args.val_files).to(run.device)
    tables = build_byte_tables(sp, args.vocab_size, run.device)
    train_shards = len(glob.glob(args.train_files))
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log(f"train_loader:dataset:{Path(args.data_path).name} train_shards:{train_shards}")
    log(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # Model. One compiled function for training, one for everything that only wants logits.
    torch._dynamo.config.cache_size_limit = 64
    base_model = GPT(args).to(run.device)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[run.local_rank], broadcast_buffers=False) if run.distributed else compiled_model
    )
    eval_logits = torch.compile(base_model.forward_logits, dynamic=False)

    n_params = sum(p.numel() for p in base_model.parameters())
    log(f"model_params:{n_params}")
    log(f"world_size:{run.world_size} grad_accum_steps:{grad_accum_steps}")
    log(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads}")
    log(
        f"tie_embeddings:True embed_lr:{args.embed_lr} matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr} "
        f"muon_wd:{args.muon_weight_decay}"
    )
    log(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f} calib_reserve_seconds:{args.calib_reserve_seconds:.1f}"
    )
    log(
        f"ttt_lora rank:{args.ttt_lora_rank} lr:{args.ttt_lora_lr} chunk:{args.ttt_chunk_size} "
        f"context:{args.ttt_context} batch:{args.ttt_batch_docs} steps:{args.ttt_steps}"
    )
    log(f"seed:{args.seed}")

    moments = train(args, run, base_model, model, eval_logits, val_tokens, tables, grad_accum_steps, log)

    artifact = Path("final_model.int8.ptz")
    write_artifact(base_model, moments, code, run, artifact, log)
    read_artifact(base_model, artifact)
    evaluate(args, run, base_model, eval_logits, val_tokens, tables, log)

    if run.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
