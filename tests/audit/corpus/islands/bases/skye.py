"""
A fork of the challenge's baseline `train_gpt.py`. What differs from the baseline:

  * depth recurrence: three middle blocks are run twice, switched on after a third of the training
  * warm-down that follows the wall clock, an EMA of the weights, int6 fake quantisation late in training
  * int6 rows with a clip chosen by activation-weighted error (training tokens, inside the 600 s), brotli
  * evaluation: sliding window; after a chunk has been scored by all ranks, all ranks train on that chunk

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import glob
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import brotli
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
# Defaults are the settings of the submitted run. 8xH100, 600 s of training, 600 s of evaluation.


class Hyperparameters:
    # Data paths are shard globs produced by the challenge's own preprocessing.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation during training is for the log only. 0: only after the last step.
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 0))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.55))
    min_lr_scale = float(os.environ.get("MIN_LR_SCALE", 0.02))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    # Taken off the training loop: EMA, calibration, quantisation and compression happen in it.
    export_reserve_seconds = float(os.environ.get("EXPORT_RESERVE_SECONDS", 60.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 4.0))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

    # Depth recurrence: blocks first..last (inclusive) are run `recur_times` times.
    recur_first = int(os.environ.get("RECUR_FIRST", 3))
    recur_last = int(os.environ.get("RECUR_LAST", 5))
    recur_times = int(os.environ.get("RECUR_TIMES", 2))
    recur_start_frac = float(os.environ.get("RECUR_START_FRAC", 0.35))

    # Optimizer.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.90))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 800))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.06))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    adam_weight_decay = float(os.environ.get("ADAM_WEIGHT_DECAY", 0.02))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # Averaging and fake quantisation.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))
    qat_start_frac = float(os.environ.get("QAT_START_FRAC", 0.80))

    # Export.
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 8))
    calib_seqs = int(os.environ.get("CALIB_SEQS", 16))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit_bytes = int(os.environ.get("SIZE_LIMIT_BYTES", 16_000_000))

    # Evaluation.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 64))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 65_536))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_lr = float(os.environ.get("TTT_LR", 1e-4))
    ttt_beta1 = float(os.environ.get("TTT_BETA1", 0.9))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.99))
    ttt_weight_decay = float(os.environ.get("TTT_WEIGHT_DECAY", 0.0))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    eval_cap_seconds = float(os.environ.get("EVAL_CAP_SECONDS", 600.0))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------
# As in the baseline (from modded-nanogpt), with decoupled weight decay.


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    # Orthogonalize a 2D update matrix with a fast Newton-Schulz iteration.
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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float):
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
            lr = group["lr"]
            momentum = group["momentum"]
            total = sum(p.numel() for p in params)
            updates_flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)

            # Every rank orthogonalizes its share of the matrices; the sum puts the shares together.
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
                    # Scale correction from Muon reference implementations.
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
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

        return loss


# -----------------------------
# BYTES PER TOKEN
# -----------------------------
# The score is bits per byte of the original text, so every target token needs the number of UTF-8 bytes that it stands for.
# A normal piece is its own text without the leading mark; the mark is one byte (a space) unless the token before is a
# boundary (the decoder strips the space there). A byte-fallback piece is one byte, control pieces are none.

SPACE_MARK = "\u2581"


@dataclass
class ByteTables:
    base_bytes: Tensor  # int16 [vocab]: UTF-8 bytes of the piece without its leading mark
    has_leading_space: Tensor  # bool [vocab]
    is_boundary: Tensor  # bool [vocab]: control, unknown and unused ids


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTables:
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes_np = np.zeros((table_size,), dtype=np.int16)
    has_leading_space_np = np.zeros((table_size,), dtype=np.bool_)
    is_boundary_np = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary_np[token_id] = False
        if sp.is_byte(token_id):
            base_bytes_np[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith(SPACE_MARK):
            has_leading_space_np[token_id] = True
            piece = piece[len(SPACE_MARK) :]
        # A mark inside a piece is a space as well, and one byte.
        piece = piece.replace(SPACE_MARK, " ")
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return ByteTables(
        base_bytes=torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        has_leading_space=torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        is_boundary=torch.tensor(is_boundary_np, dtype=torch.bool, device=device),
    )


def token_bytes(tables: ByteTables, prev_ids: Tensor, target_ids: Tensor) -> Tensor:
    """The bytes of each target, given the token before it."""
    counts = tables.base_bytes[target_ids].to(torch.int32)
    counts += (tables.has_leading_space[target_ids] & ~tables.is_boundary[prev_ids]).to(torch.int32)
    return counts


def check_byte_tables(sp: spm.SentencePieceProcessor, tables: ByteTables, train_pattern: str, docs: int = 200) -> str:
    """Compares the tables with the decoder on documents of a training shard. Run once, before training."""
    path = Path(sorted(glob.glob(train_pattern))[0])
    tokens = load_data_shard(path)[:1_000_000].to(torch.int64)
    starts = (tokens == sp.bos_id()).nonzero().flatten().tolist()
    by_table = by_decoder = 0
    for begin, end in list(zip(starts, starts[1:]))[:docs]:
        doc = tokens[begin:end].to(tables.base_bytes.device)
        by_table += int(token_bytes(tables, doc[:-1], doc[1:]).sum().item())
        by_decoder += len(sp.decode(doc[1:].tolist()).encode("utf-8"))
    # Fallback bytes that are no UTF-8 decode to U+FFFD, so that the two may differ by a hair.
    return f"byte_tables:docs:{docs} table_bytes:{by_table} decoder_bytes:{by_decoder}"


# -----------------------------
# DATA LOADING
# -----------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256


def load_data_shard(file: Path) -> Tensor:
    header_bytes = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
    token_bytes_each = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    # SHARD HEADER: magic, version, number of tokens
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * token_bytes_each
    if file.stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    """The whole validation split, in order. Nothing is cut off; the scorer copes with a short tail."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is too short")
    return tokens.to(torch.int32)


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
    # Each call takes one contiguous span from the stream and gives every rank its own slice of it.
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

CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


def quant_limit(bits: int) -> int:
    return 2 ** (bits - 1) - 1


class FakeQuantRows(torch.autograd.Function):
    """Rounds every row to `bits` bits; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, w: Tensor, bits: int) -> Tensor:
        limit = quant_limit(bits)
        scale = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / limit
        return torch.round(w / scale).clamp(-limit, limit) * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class CastedLinear(nn.Linear):
    # Weights are kept in fp32 for the optimizer and cast at matmul time.
    def __init__(self, in_features: int, out_features: int, zero_init: bool = False):
        super().__init__(in_features, out_features, bias=False)
        self.fake_bits = 0
        if zero_init:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.fake_bits:
            w = FakeQuantRows.apply(w, self.fake_bits)
        return F.linear(x, w.to(x.dtype))


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    # Small and control parameters stay fp32 while the model body is bf16.
    with torch.no_grad():
        for name, param in module.named_parameters():
            if param.ndim < 2 or any(pattern in name for pattern in CONTROL_PATTERNS):
                param.data = param.data.float()


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float):
        super().__init__()
        self.dim = dim
        self.base = base

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        inv_freq = self.base ** (-exponents)
        t = torch.arange(seq_len, device=device, dtype=torch.float32)
        freqs = torch.outer(t, inv_freq)
        return freqs.cos()[None, None].to(dtype), freqs.sin()[None, None].to(dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, base=rope_base)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None,
            is_causal=True,
            enable_gqa=(self.num_kv_heads != self.num_heads),
        )
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    # leaky relu^2
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        hidden = mlp_mult * dim
        self.fc = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.fc(x), negative_slope=0.5)
        return self.proj(x.square())


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int, rope_base: float, qk_gain: float):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(self.attn_norm(x))
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        if not 0 <= args.recur_first <= args.recur_last < args.num_layers:
            raise ValueError("recurrent blocks must lie within the model")
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.blocks = nn.ModuleList(
            [
                Block(
                    args.model_dim,
                    args.num_heads,
                    args.num_kv_heads,
                    args.mlp_mult,
                    args.rope_base,
                    args.qk_gain_init,
                )
                for _ in range(args.num_layers)
            ]
        )
        self.final_norm = RMSNorm()
        plain = list(range(args.num_layers))
        middle = list(range(args.recur_first, args.recur_last + 1))
        self.plain_order = plain
        self.recur_order = plain[: args.recur_first] + middle * args.recur_times + plain[args.recur_last + 1 :]
        self.recurrent = False
        self.skip_weights = nn.Parameter(
            torch.ones(len(self.recur_order) // 2, args.model_dim, dtype=torch.float32)
        )
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        order = self.recur_order if self.recurrent else self.plain_order
        # First half stores skips; second half reuses them in reverse order.
        half = len(order) // 2
        skips: list[Tensor] = []
        for depth, index in enumerate(order):
            if depth < half:
                x = self.blocks[index](x, x0)
                skips.append(x)
            else:
                if skips:
                    gain = self.skip_weights[depth - half].to(dtype=x.dtype)
                    x = x + gain[None, None, :] * skips.pop()
                x = self.blocks[index](x, x0)
        return self.final_norm(x)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = self.hidden(input_ids)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits.float() / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), target_ids.reshape(-1), reduction="mean")


def set_fake_bits(model: nn.Module, bits: int) -> None:
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.fake_bits = bits


class EMA:
    """Exponential moving average of all parameters, in fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        # The average warms up, so that the initial weights are soon forgotten.
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach().float(), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name].to(p.dtype))


# -----------------------------
# QUANTIZATION
# -----------------------------
# Matrices of the blocks: int6 rows; the tied embedding: int8 rows; everything else: fp16. A row's scale is its largest entry
# times a clip ratio. The ratio is chosen by the squared error, weighted with the mean square of the layer's inputs.

CLIP_RATIOS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 0.70)


class InputMoments:
    """Mean square of the inputs of every CastedLinear, taken by hooks."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.handles.append(module.register_forward_pre_hook(self._hook(f"{name}.weight")))

    def _hook(self, key: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            total = x.square().sum(dim=0)
            if key in self.sums:
                self.sums[key] += total
                self.counts[key] += x.size(0)
            else:
                self.sums[key] = total
                self.counts[key] = x.size(0)

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def means(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key in sorted(self.sums):
            mean = self.sums[key] / max(self.counts[key], 1)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(mean, op=dist.ReduceOp.SUM)
                mean = mean / dist.get_world_size()
            out[key] = mean
        return out


def collect_moments(args: type[Hyperparameters], model: GPT, loader: DistributedTokenLoader) -> dict[str, Tensor]:
    moments = InputMoments(model)
    model.eval()
    calib_tokens = args.calib_seqs * args.train_seq_len * loader.world_size
    with torch.no_grad():
        for _ in range(args.calib_batches):
            x, _ = loader.next_batch(calib_tokens, args.train_seq_len, 1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.forward_logits(x)
    moments.close()
    return moments.means()


@torch.no_grad()
def quantize_rows(w: Tensor, bits: int, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    limit = quant_limit(bits)
    w = w.detach().float()
    weight = torch.ones(w.size(1), device=w.device) if moment is None else moment.to(w.device).float()
    amax = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    best_err = torch.full((w.size(0), 1), float("inf"), device=w.device)
    best_scale = (amax / limit).half().float()
    for ratio in CLIP_RATIOS:
        # The scale is rounded to fp16 first: this is what the reader will multiply with.
        scale = (amax * ratio / limit).half().float().clamp_min(6e-8)
        q = torch.round(w / scale).clamp(-limit, limit)
        err = ((w - q * scale).square() * weight[None, :]).sum(dim=1, keepdim=True)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    q = torch.round(w / best_scale.clamp_min(6e-8)).clamp(-limit, limit)
    return q.to(torch.int8).cpu(), best_scale.squeeze(1).half().cpu()


# -----------------------------
# ARTIFACT
# -----------------------------
# brotli( magic | header length | JSON header | blobs in the order of the header ). One entry per tensor:
# name, kind ("rows" or "fp16"), bits, shape. int6 values are stored one to a byte: brotli's entropy coding does better on
# whole bytes than on a packed bit stream.

ARTIFACT_MAGIC = b"PGR6"
HEADER_LENGTH = struct.Struct("<I")


def entry_sizes(entry: dict) -> tuple[int, int]:
    """Bytes of an entry's values and of its scales."""
    numel = math.prod(entry["shape"])
    if entry["kind"] == "rows":
        return numel, 2 * entry["shape"][0]
    if entry["kind"] == "fp16":
        return 2 * numel, 0
    raise ValueError(f"unknown kind of tensor: {entry['kind']!r}")


def pack_model(args: type[Hyperparameters], model: GPT, moments: dict[str, Tensor]) -> bytes:
    entries: list[dict] = []
    body = io.BytesIO()
    for name, tensor in model.state_dict().items():
        shape = list(tensor.shape)
        if tensor.ndim == 2 and not any(pattern in name for pattern in CONTROL_PATTERNS):
            bits = args.embed_bits if name == "tok_emb.weight" else args.matrix_bits
            q, scale = quantize_rows(tensor, bits, moments.get(name))
            entries.append(dict(name=name, kind="rows", bits=bits, shape=shape))
            body.write(q.contiguous().numpy().tobytes())
            body.write(scale.contiguous().numpy().astype("<f2").tobytes())
        else:
            entries.append(dict(name=name, kind="fp16", bits=16, shape=shape))
            body.write(tensor.detach().cpu().half().contiguous().numpy().astype("<f2").tobytes())
    header = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    raw = ARTIFACT_MAGIC + HEADER_LENGTH.pack(len(header)) + header + body.getvalue()
    return brotli.compress(raw, quality=11, lgwin=24)


def unpack_model(blob: bytes) -> dict[str, Tensor]:
    """The state dict in an artifact. Raises ValueError where it is not exactly what pack_model writes."""
    raw = brotli.decompress(blob)
    if raw[: len(ARTIFACT_MAGIC)] != ARTIFACT_MAGIC:
        raise ValueError("not an artifact of this script")
    pos = len(ARTIFACT_MAGIC)
    (header_length,) = HEADER_LENGTH.unpack_from(raw, pos)
    pos += HEADER_LENGTH.size
    entries = json.loads(raw[pos : pos + header_length].decode("utf-8"))
    pos += header_length

    state: dict[str, Tensor] = {}
    for entry in entries:
        name, shape = entry["name"], tuple(entry["shape"])
        value_bytes, scale_bytes = entry_sizes(entry)
        if pos + value_bytes + scale_bytes > len(raw):
            raise ValueError(f"artifact ends within {name}")
        if name in state:
            raise ValueError(f"{name} stands twice in the artifact")
        if entry["kind"] == "rows":
            q = np.frombuffer(raw, dtype=np.int8, count=value_bytes, offset=pos).reshape(shape)
            pos += value_bytes
            scale = np.frombuffer(raw, dtype="<f2", count=shape[0], offset=pos).astype(np.float32)
            pos += scale_bytes
            limit = quant_limit(entry["bits"])
            if q.size and (int(q.max()) > limit or int(q.min()) < -limit):
                raise ValueError(f"{name} holds values beyond {entry['bits']} bits")
            state[name] = torch.from_numpy(q.astype(np.float32) * scale[:, None])
        else:
            values = np.frombuffer(raw, dtype="<f2", count=math.prod(shape), offset=pos)
            pos += value_bytes
            state[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    if pos != len(raw):
        raise ValueError(f"{len(raw) - pos} bytes are left over in the artifact")
    return state


def load_artifact(path: Path, model: GPT, log) -> None:
    """Replaces all weights by those of the artifact. Names and shapes must agree exactly."""
    state = unpack_model(path.read_bytes())
    own = model.state_dict()
    if missing := sorted(set(own) - set(state)):
        raise ValueError(f"artifact lacks {missing}")
    if foreign := sorted(set(state) - set(own)):
        raise ValueError(f"artifact has unknown tensors {foreign}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name}: artifact {tuple(tensor.shape)}, model {tuple(own[name].shape)}")
    model.load_state_dict(state, strict=True)
    log(f"artifact:read tensors:{len(state)} params:{sum(t.numel() for t in state.values())}")


def submission_size(artifact_bytes: int) -> tuple[int, int]:
    """Bytes of this file, and of this file together with the artifact."""
    code_bytes = len(Path(__file__).resolve().read_bytes())
    return code_bytes, code_bytes + artifact_bytes


# -----------------------------
# EVALUATION
# -----------------------------
# Position i predicts tokens[i + 1] from tokens[.. i]; the positions of a stream of n tokens are 0 .. n - 2. Every position is
# scored exactly once, in the window that ends its block of `stride` positions.


@dataclass(frozen=True)
class Window:
    context: int  # first input position
    begin: int  # first scored position
    end: int  # one past the last scored position


def windows_between(lo: int, hi: int, stride: int, seq_len: int) -> list[Window]:
    """Windows that score the positions lo .. hi - 1 once each."""
    out: list[Window] = []
    for begin in range(lo, hi, stride):
        end = min(begin + stride, hi)
        out.append(Window(max(0, end - seq_len), begin, end))
    return out


class Ledger:
    """Sums of the scored positions of this rank, in double precision."""

    def __init__(self, device: torch.device):
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, nll: Tensor, counts: Tensor, scored: Tensor) -> None:
        self.nll += nll.double()[scored].sum()
        self.tokens += scored.sum()
        self.bytes += counts.double()[scored].sum()

    def result(self, expected_tokens: int) -> tuple[float, float]:
        """Loss in nats per token and bits per byte over all ranks."""
        totals = torch.stack((self.nll, self.tokens, self.bytes))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals, op=dist.ReduceOp.SUM)
        nll, tokens, byte_count = (float(v) for v in totals.tolist())
        if round(tokens) != expected_tokens:
            raise RuntimeError(f"scored {tokens:.0f} tokens of {expected_tokens}")
        return nll / tokens, nll / math.log(2.0) / byte_count


@torch.no_grad()
def score_windows(
    args: type[Hyperparameters],
    logits_fn,
    tokens: Tensor,
    windows: list[Window],
    tables: ByteTables,
    ledger: Ledger,
    device: torch.device,
) -> None:
    """Scores the windows with the weights as they are."""
    seq_len, batch = args.train_seq_len, args.eval_batch_seqs
    for at in range(0, len(windows), batch):
        group = windows[at : at + batch]
        # Short windows and short groups are padded on the right, where a causal model does not look.
        x = torch.zeros(batch, seq_len, dtype=torch.int64)
        y = torch.zeros(batch, seq_len, dtype=torch.int64)
        scored = torch.zeros(batch, seq_len, dtype=torch.bool)
        for row, w in enumerate(group):
            length = w.end - w.context
            x[row, :length] = tokens[w.context : w.end]
            y[row, :length] = tokens[w.context + 1 : w.end + 1]
            scored[row, w.begin - w.context : length] = True
        x, y, scored = x.to(device), y.to(device), scored.to(device)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x)
        nll = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
        ledger.add(nll, token_bytes(tables, x, y), scored)


def eval_fixed(
    args: type[Hyperparameters],
    model: GPT,
    tokens: Tensor,
    tables: ByteTables,
    stride: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> tuple[float, float]:
    """Loss and bits per byte with fixed weights."""
    was_training = model.training
    model.eval()
    logits_fn = torch.compile(model.forward_logits, dynamic=False)
    positions = tokens.numel() - 1
    ledger = Ledger(device)
    mine = windows_between(0, positions, stride, args.train_seq_len)[rank::world_size]
    score_windows(args, logits_fn, tokens, mine, tables, ledger, device)
    model.train(was_training)
    return ledger.result(positions)


def average_gradients(params: list[nn.Parameter], world_size: int) -> None:
    """Replaces the gradients by their mean over the ranks, in one message."""
    if world_size == 1:
        return
    flat = torch.cat([p.grad.float().reshape(-1) for p in params])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    flat /= world_size
    curr = 0
    for p in params:
        p.grad.copy_(flat[curr : curr + p.numel()].view_as(p))
        curr += p.numel()


def adapt_to_chunk(
    args: type[Hyperparameters],
    model: GPT,
    loss_fn,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    lo: int,
    hi: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> float:
    """A few epochs of AdamW on the positions lo .. hi - 1. Each rank takes its share of the sequences."""
    seq_len = args.train_seq_len
    starts = list(range(lo, hi, seq_len))[rank::world_size]
    x = torch.stack([tokens[s : s + seq_len] for s in starts]).to(device=device, dtype=torch.int64)
    y = torch.stack([tokens[s + 1 : s + seq_len + 1] for s in starts]).to(device=device, dtype=torch.int64)
    params = [p for p in model.parameters() if p.requires_grad]
    model.train()
    last_loss = 0.0
    for _ in range(args.ttt_epochs):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = loss_fn(x, y)
        loss.backward()
        average_gradients(params, world_size)
        torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
        optimizer.step()
        last_loss = float(loss.item())
    model.eval()
    return last_loss


def eval_adaptive(
    args: type[Hyperparameters],
    model: GPT,
    tokens: Tensor,
    tables: ByteTables,
    rank: int,
    world_size: int,
    device: torch.device,
    log,
) -> tuple[float, float]:
    """Score first, then train: the weights that score a chunk have seen only the chunks before it."""
    if args.ttt_chunk_tokens % (args.train_seq_len * world_size) != 0:
        raise ValueError("TTT_CHUNK_TOKENS must be a multiple of sequence length times ranks")
    # All weights are adapted, in bf16: they were rounded to int6 before, nothing is lost that matters.
    model.bfloat16()
    for p in model.parameters():
        p.requires_grad_(True)
    model.eval()
    logits_fn = torch.compile(model.forward_logits, dynamic=False)
    loss_fn = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.ttt_lr,
        betas=(args.ttt_beta1, args.ttt_beta2),
        eps=1e-8,
        weight_decay=args.ttt_weight_decay,
        fused=True,
    )
    positions = tokens.numel() - 1
    chunk_starts = list(range(0, positions, args.ttt_chunk_tokens))
    ledger = Ledger(device)
    started = time.perf_counter()
    for index, lo in enumerate(chunk_starts):
        hi = min(lo + args.ttt_chunk_tokens, positions)

        # 1. Every rank scores its own windows of this chunk.
        mine = windows_between(lo, hi, args.eval_stride, args.train_seq_len)[rank::world_size]
        score_windows(args, logits_fn, tokens, mine, tables, ledger, device)
        if world_size > 1:
            dist.barrier()

        # 2. All ranks train on this chunk. Nothing comes after the last one, so it is not trained on.
        if index == len(chunk_starts) - 1:
            break
        scale = 0.5 * (1.0 + math.cos(math.pi * index / len(chunk_starts)))
        for group in optimizer.param_groups:
            group["lr"] = args.ttt_lr * scale
        loss = adapt_to_chunk(args, model, loss_fn, optimizer, tokens, lo, hi, rank, world_size, device)

        if index % 100 == 0:
            running = float((ledger.nll / ledger.tokens).item())
            log(
                f"ttt chunk:{index}/{len(chunk_starts)} running_nll:{running:.4f} train_loss:{loss:.4f} "
                f"elapsed:{time.perf_counter() - started:.1f}s"
            )
    return ledger.result(positions)


# -----------------------------
# TRAINING
# -----------------------------


def lr_scale(args: type[Hyperparameters], progress: float) -> float:
    """Constant, then a linear warm-down over the last part of the training time."""
    if progress < 1.0 - args.warmdown_frac:
        return 1.0
    left = max(1.0 - progress, 0.0) / max(args.warmdown_frac, 1e-9)
    return max(left, args.min_lr_scale)


def build_optimizers(args: type[Hyperparameters], model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    # - token embedding (tied with the head): Adam, its own rate
    # - matrices of the blocks: Muon
    # - vectors, scalars and control parameters: Adam
    block_named_params = list(model.blocks.named_parameters())
    matrix_params = [
        p
        for name, p in block_named_params
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_PATTERNS)
    ]
    scalar_params = [
        p for name, p in block_named_params if p.ndim < 2 or any(pattern in name for pattern in CONTROL_PATTERNS)
    ]
    scalar_params.append(model.skip_weights)
    optimizer_tok = torch.optim.AdamW(
        [{"params": [model.tok_emb.weight], "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    optimizer_muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_weight_decay,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizer_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    return [optimizer_tok, optimizer_muon, optimizer_scalar], optimizer_muon


def main() -> None:
    global zeropower_via_newtonschulz5
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # -----------------------------
    # DISTRIBUTED + CUDA SETUP
    # -----------------------------

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world_size != 0:
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
    log0("=" * 100, console=False)

    # -----------------------------
    # TOKENIZER + DATA SETUP
    # -----------------------------

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    tables = build_byte_tables(sp, args.vocab_size, device)
    if master_process:
        log0(check_byte_tables(sp, tables, args.train_files))
    log0(f"tokenizer:{args.tokenizer_path} vocab_size:{args.vocab_size}")
    log0(f"train_loader:shards:{len(glob.glob(args.train_files))} pattern:{args.train_files}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    base_model.tok_emb.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )
    optimizers, optimizer_muon = build_optimizers(args, base_model)

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params} depth:{len(base_model.plain_order)}->{len(base_model.recur_order)}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} max_wallclock_seconds:{args.max_wallclock_seconds:.1f} "
        f"export_reserve_seconds:{args.export_reserve_seconds:.1f}"
    )

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def forward_backward() -> Tensor:
        total = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            total += loss.detach()
            (loss * grad_scale).backward()
        return total / grad_accum_steps

    # -----------------------------
    # COMPILE WARM-UP
    # -----------------------------
    # Primes the compiled paths (without and with recurrence, with fake quantisation), then restores weights and optimizer
    # state, so that the measured training starts from the true initialisation.

    if args.warmup_steps > 0:
        initial_state = {name: tensor.detach().cpu().clone() for name, tensor in base_model.state_dict().items()}
        modes = [(False, 0), (True, 0), (True, args.matrix_bits)]
        model.train()
        for warmup_step in range(args.warmup_steps):
            recurrent, bits = modes[min(warmup_step * len(modes) // args.warmup_steps, len(modes) - 1)]
            base_model.recurrent = recurrent
            set_fake_bits(base_model, bits)
            zero_grad_all()
            forward_backward()
            for opt in optimizers:
                opt.step()
        log0(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")
        base_model.load_state_dict(initial_state, strict=True)
        base_model.recurrent = False
        set_fake_bits(base_model, 0)
        optimizers, optimizer_muon = build_optimizers(args, base_model)
        zero_grad_all()
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    ema = EMA(base_model, args.ema_decay)
    cap_ms = 1000.0 * args.max_wallclock_seconds
    loop_ms = cap_ms - 1000.0 * args.export_reserve_seconds
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        if args.val_loss_every > 0 and step % args.val_loss_every == 0:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_tokens = load_validation_tokens(args.val_files)
            val_loss, val_bpb = eval_fixed(
                args, base_model, val_tokens, tables, args.train_seq_len, rank, world_size, device
            )
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        progress = max(elapsed_ms / loop_ms, step / args.iterations)
        if not base_model.recurrent and progress >= args.recur_start_frac:
            base_model.recurrent = True
            log0(f"recurrence:on step:{step}")
        if progress >= args.qat_start_frac:
            set_fake_bits(base_model, args.matrix_bits)

        scale = lr_scale(args, progress)
        model.train()
        zero_grad_all()
        train_loss = forward_backward()

        warm = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        muon_momentum = (1 - warm) * args.muon_momentum_warmup_start + warm * args.muon_momentum
        for group in optimizer_muon.param_groups:
            group["momentum"] = muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        ema.update(base_model, step)

        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )

        # All ranks stop at the same step.
        reached_cap = approx_ms >= loop_ms
        if distributed:
            reached_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # EXPORT: still on the training clock
    # -----------------------------

    base_model.recurrent = True
    set_fake_bits(base_model, 0)
    ema.copy_to(base_model)
    calib_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    moments = collect_moments(args, base_model, calib_loader)
    artifact_path = Path(args.artifact_path)
    if master_process:
        artifact_path.write_bytes(pack_model(args, base_model, moments))
    if distributed:
        dist.barrier()
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"training_and_export:{training_time_ms:.0f}ms cap:{cap_ms:.0f}ms steps:{step}")
    if training_time_ms > cap_ms:
        raise RuntimeError("training and export took longer than the cap; raise EXPORT_RESERVE_SECONDS")

    artifact_bytes = artifact_path.stat().st_size
    code_bytes, total_bytes = submission_size(artifact_bytes)
    log0(f"Serialized model int6+brotli: {artifact_bytes} bytes")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size: {total_bytes} bytes")
    if total_bytes > args.size_limit_bytes:
        raise RuntimeError(f"submission has {total_bytes} bytes, allowed are {args.size_limit_bytes}")

    # -----------------------------
    # EVALUATION: from the artifact alone
    # -----------------------------

    del ema, moments, optimizers, optimizer_muon, train_loader, calib_loader
    torch._dynamo.reset()
    torch.cuda.synchronize()
    eval_start = time.perf_counter()
    eval_model = GPT(args).to(device).float()
    eval_model.recurrent = True
    load_artifact(artifact_path, eval_model, log0)
    val_tokens = load_validation_tokens(args.val_files)
    log0(f"val_loader:tokens:{val_tokens.numel() - 1} pattern:{args.val_files}")

    # For the log: what the rounding costs, without overlap and without adaptation.
    round_loss, round_bpb = eval_fixed(
        args, eval_model, val_tokens, tables, args.train_seq_len, rank, world_size, device
    )
    log0(f"final_int6_roundtrip val_loss:{round_loss:.4f} val_bpb:{round_bpb:.4f}")

    if args.ttt_enabled:
        label = "final_score_first_ttt"
        val_loss, val_bpb = eval_adaptive(args, eval_model, val_tokens, tables, rank, world_size, device, log0)
    else:
        label = "final_sliding_window"
        val_loss, val_bpb = eval_fixed(
            args, eval_model, val_tokens, tables, args.eval_stride, rank, world_size, device
        )
    torch.cuda.synchronize()
    eval_seconds = time.perf_counter() - eval_start
    log0(f"{label} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{1000.0 * eval_seconds:.0f}ms")
    if eval_seconds > args.eval_cap_seconds:
        raise RuntimeError(f"evaluation took {eval_seconds:.1f} s, allowed are {args.eval_cap_seconds:.0f}")
    log0(f"{label}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
