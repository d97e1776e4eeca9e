"""
train_gpt.py: the challenge's baseline, extended in small steps.

What was added, in the order in which it was added and measured:
  1. sliding window evaluation (stride 64), batched windows
  2. EMA of the weights, taken at the end of training
  3. int6 per-row quantisation of the big matrices, clip found per row by the weights' own MSE
  4. SmearGate and BigramHash embeddings (both stop at a document's start)
  5. score-first test-time training: SGD over chunks that are already graded, cosine over chunks

Everything else (Muon, the byte tables, the round trip at the end) is close to the baseline on purpose.
Hard limit: this file stays below 1500 lines.
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
# Default run:
# - 10 transformer blocks at width 512, 8 query heads on 4 KV heads, 3x MLP
# - vocab size 1024, sequence length 1024, tied embeddings
# - 524,288 train tokens per step, at most 20,000 steps, 600 s of wall clock


class Hyperparameters:
    # Data paths are shard globs produced by the published preprocessing.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation cadence and batch size. The end of training always evaluates the whole fineweb_val split.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 0))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20_000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 10))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 4096))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))

    # Optimizer.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    adam_weight_decay = float(os.environ.get("ADAM_WEIGHT_DECAY", 0.01))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # Weight averaging.
    ema_enabled = bool(int(os.environ.get("EMA_ENABLED", "1")))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # Evaluation.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 64))

    # Test-time training.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32_768))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 32))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))


# The published shards start every document with this token.
BOS_ID = 1

# README: code bytes plus compressed model bytes, decimal.
SIZE_LIMIT_BYTES = 16_000_000

# -----------------------------
# MUON OPTIMIZER
# -----------------------------
#
# As borrowed from modded-nanogpt.
# Background on Muon: https://kellerjordan.github.io/posts/muon/


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
    # Orthogonalize a 2D update matrix with a fast Newton-Schulz iteration.
    # Muon uses this to normalize matrix-shaped gradients before applying them.
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
    def __init__(
        self,
        params,
        lr: float,
        momentum: float,
        backend_steps: int,
        nesterov: bool = True,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                backend_steps=backend_steps,
                nesterov=nesterov,
                weight_decay=weight_decay,
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
            backend_steps = group["backend_steps"]
            nesterov = group["nesterov"]
            weight_decay = group["weight_decay"]

            # Every rank orthogonalizes its share of the matrices, then the flat buffer is summed.
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
                    if nesterov:
                        g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=backend_steps)
                    # Scale correction from Muon reference implementations.
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()

            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)

            curr = 0
            for p in params:
                if weight_decay > 0:
                    p.mul_(1.0 - lr * weight_decay)
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------
#
# The score is bits per byte of the original text. So we need, for each token, how many UTF-8 bytes of
# text it stands for. A piece that begins with the word mark (U+2581) stands for a space and the rest of
# the piece; the space is only there if the token before is not a document's start or another control.


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
        if piece.startswith("\u2581"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


def count_token_bytes(
    prev_ids: Tensor,
    tgt_ids: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
) -> Tensor:
    # UTF-8 bytes of every target token, given the token before it.
    token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.float64)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.float64)
    return token_bytes


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-document validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is empty")
    return tokens


def reduce_sums(*sums: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for s in sums:
            dist.all_reduce(s, op=dist.ReduceOp.SUM)


def to_loss_and_bpb(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    val_loss = (loss_sum / token_count).item()
    val_bpb = loss_sum.item() / math.log(2.0) / byte_count.item()
    return float(val_loss), float(val_bpb)


def eval_val(
    args: Hyperparameters,
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
) -> tuple[float, float]:
    # Validation computes two metrics:
    # - val_loss: token cross-entropy (natural log)
    # - val_bpb: tokenizer-agnostic compression metric used by the challenge
    # Plain form: the stream is cut in sequences that do not overlap. The rest after the last whole
    # sequence is a shorter sequence of its own, scored by the last rank.
    seq_len = args.train_seq_len
    local_batch_seqs = max(args.val_batch_size // (world_size * seq_len), 1)
    total_targets = val_tokens.numel() - 1
    total_seqs = total_targets // seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    pieces = [
        (a * seq_len, min(a + local_batch_seqs, seq_end) * seq_len, seq_len)
        for a in range(seq_start, seq_end, local_batch_seqs)
    ]
    if rank == world_size - 1 and total_targets > total_seqs * seq_len:
        pieces.append((total_seqs * seq_len, total_targets, total_targets - total_seqs * seq_len))

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    with torch.no_grad():
        for raw_start, raw_end, length in pieces:
            local = val_tokens[raw_start : raw_end + 1].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, length)
            y = local[1:].reshape(-1, length)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                batch_loss = model(x, y).detach()
            batch_token_count = float(y.numel())
            loss_sum += batch_loss.to(torch.float64) * batch_token_count
            token_count += batch_token_count
            byte_count += count_token_bytes(
                x.reshape(-1), y.reshape(-1), base_bytes_lut, has_leading_space_lut, is_boundary_token_lut
            ).sum()

    reduce_sums(loss_sum, token_count, byte_count)
    model.train()
    return to_loss_and_bpb(loss_sum, token_count, byte_count)


# -----------------------------
# POST-TRAINING QUANTISATION
# -----------------------------
#
# Big matrices of the blocks: int6, one scale per row. The clip of each row is searched over a few
# fractions of the row's maximum, the one with the smallest squared error of the weights is kept.
# Embeddings: int8, one scale per row. Small tensors: fp16, control tensors: fp32.
# The int6 values lie in int8 bytes; zlib finds the two idle bits.

CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear.gate",
    "bigram.scale",
)
INT6_NAME_PATTERNS = (".attn.", ".mlp.")
KEEP_FLOAT_MAX_NUMEL = 65_536
INT6_MAX = 31
INT8_MAX = 127
CLIP_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def quantize_rows(t: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    # Returns int8 values in [-qmax, qmax] and one fp16 scale per row.
    w = t.detach().float()
    row_max = w.abs().amax(dim=1).clamp_min(1e-8)
    best_err = torch.full_like(row_max, float("inf"))
    best_scale = (row_max / qmax).to(torch.float16).float()
    for fraction in CLIP_FRACTIONS:
        # The scale is rounded to fp16 first, so that the error is that of what is stored.
        scale = (row_max * fraction / qmax).to(torch.float16).float().clamp_min(1e-7)
        q = torch.clamp(torch.round(w / scale[:, None]), -qmax, qmax)
        err = (q * scale[:, None] - w).square().sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    best_scale = best_scale.clamp_min(1e-7)
    q = torch.clamp(torch.round(w / best_scale[:, None]), -qmax, qmax).to(torch.int8)
    return q.contiguous(), best_scale.to(torch.float16).contiguous()


def quantize_state_dict(state_dict: dict[str, Tensor]) -> tuple[dict[str, object], dict[str, int]]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    passthrough: dict[str, Tensor] = {}
    stats = dict.fromkeys(("param_count", "int6_params", "int8_params", "float_params", "payload_bytes"), 0)

    for name, tensor in state_dict.items():
        t = tensor.detach().to("cpu").contiguous()
        stats["param_count"] += int(t.numel())
        if any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            passthrough[name] = t.float()
            stats["float_params"] += int(t.numel())
            stats["payload_bytes"] += tensor_nbytes(passthrough[name])
            continue
        if t.ndim != 2 or t.numel() <= KEEP_FLOAT_MAX_NUMEL:
            passthrough[name] = t.to(torch.float16) if t.is_floating_point() else t
            stats["float_params"] += int(t.numel())
            stats["payload_bytes"] += tensor_nbytes(passthrough[name])
            continue
        is_int6 = any(pattern in name for pattern in INT6_NAME_PATTERNS)
        q, s = quantize_rows(t, INT6_MAX if is_int6 else INT8_MAX)
        quantized[name] = q
        scales[name] = s
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        stats["int6_params" if is_int6 else "int8_params"] += int(t.numel())
        stats["payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)

    obj: dict[str, object] = {
        "__quant_format__": "int6_int8_per_row_v1",
        "quantized": quantized,
        "scales": scales,
        "dtypes": dtypes,
        "passthrough": passthrough,
    }
    return obj, stats


def dequantize_state_dict(obj: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        s = obj["scales"][name].to(dtype=torch.float32)
        out[name] = (q.float() * s[:, None]).to(dtype=dtype).contiguous()
    for name, t in obj["passthrough"].items():
        out[name] = t.to(torch.float32).contiguous() if t.is_floating_point() else t.contiguous()
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
    # Reads shards sequentially and wraps around forever. There is no random access and no shuffling,
    # which keeps the training order the same in every run.
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
    # Each call consumes a contiguous chunk from the shared token stream, then slices out one disjoint
    # span per rank. The extra "+1" token lets us build (x, y) by shifting.
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
    # Keep weights in fp32 for optimizer/state quality, cast at matmul time for bf16 compute.
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def rotary_tables(seq_len: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    # cos/sin of shape [1, 1, seq_len, head_dim / 2], built in fp32 once per forward.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inv_freq = 1.0 / (base**exponents)
    t = torch.arange(seq_len, dtype=torch.float32, device=device)
    freqs = torch.outer(t, inv_freq)
    return freqs.cos()[None, None, :, :], freqs.sin()[None, None, :, :]


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, qk_gain_init: float):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        if self.head_dim % 2 != 0:
            raise ValueError("head_dim must be even for RoPE")
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
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
    # relu^2 MLP from the original modded-nanogpt setup
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        hidden = mlp_mult * dim
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        return self.proj(x.square())


class SmearGate(nn.Module):
    # Mixes a little of the previous token's embedding into each token's. A document's first token takes
    # nothing from the document before.
    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -3.0, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(dtype=x.dtype)[None, None, :]
        x_prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        x_prev = x_prev * (input_ids != BOS_ID).to(dtype=x.dtype)[..., None]
        return (1.0 - g) * x + g * x_prev


class BigramHash(nn.Module):
    # One embedding per hash of (previous token, this token), projected to the model's width. The last
    # bucket stands for "no previous token": the window's first position and every document start.
    def __init__(self, buckets: int, bigram_dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = nn.Embedding(buckets, bigram_dim)
        nn.init.normal_(self.embed.weight, mean=0.0, std=0.01)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
        self.proj._zero_init = True
        self.scale = nn.Parameter(torch.tensor(0.1, dtype=torch.float32))

    def bucket_ids(self, input_ids: Tensor) -> Tensor:
        ids = input_ids.to(torch.int64)
        prev = F.pad(ids[:, :-1], (1, 0), value=0)
        hashed = torch.bitwise_xor(36313 * ids, 27191 * prev) % (self.buckets - 1)
        hashed[:, 0] = self.buckets - 1
        return torch.where(ids == BOS_ID, torch.full_like(hashed, self.buckets - 1), hashed)

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        h = self.embed(self.bucket_ids(input_ids)).to(dtype)
        return self.proj(h) * self.scale.to(dtype)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int, qk_gain_init: float):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, qk_gain_init)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x), cos, sin)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        num_layers: int,
        model_dim: int,
        num_heads: int,
        num_kv_heads: int,
        mlp_mult: int,
        tied_embed_init_std: float,
        logit_softcap: float,
        rope_base: float,
        qk_gain_init: float,
        bigram_buckets: int,
        bigram_dim: int,
    ):
        super().__init__()
        if logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {logit_softcap}")
        self.tied_embed_init_std = tied_embed_init_std
        self.logit_softcap = logit_softcap
        self.rope_base = rope_base
        self.head_dim = model_dim // num_heads
        self.tok_emb = nn.Embedding(vocab_size, model_dim)
        self.bigram = BigramHash(bigram_buckets, bigram_dim, model_dim)
        self.smear = SmearGate(model_dim)
        self.num_encoder_layers = num_layers // 2
        self.num_decoder_layers = num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList(
            [Block(model_dim, num_heads, num_kv_heads, mlp_mult, qk_gain_init) for _ in range(num_layers)]
        )
        self.final_norm = RMSNorm()
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        # Logits of the next token at every position, [batch, seq, vocab].
        x = self.tok_emb(input_ids).bfloat16()
        x = x + self.bigram(input_ids, x.dtype)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, input_ids)
        x0 = x
        cos, sin = rotary_tables(input_ids.size(1), self.head_dim, self.rope_base, input_ids.device)

        # First half stores skips; second half reuses them in reverse order.
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0, cos, sin)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0, cos, sin)

        x = self.final_norm(x)
        logits_proj = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


def build_model(args: Hyperparameters, device: torch.device) -> GPT:
    return GPT(
        vocab_size=args.vocab_size,
        num_layers=args.num_layers,
        model_dim=args.model_dim,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        mlp_mult=args.mlp_mult,
        tied_embed_init_std=args.tied_embed_init_std,
        logit_softcap=args.logit_softcap,
        rope_base=args.rope_base,
        qk_gain_init=args.qk_gain_init,
        bigram_buckets=args.bigram_buckets,
        bigram_dim=args.bigram_dim,
    ).to(device)


# -----------------------------
# SLIDING WINDOW EVALUATION
# -----------------------------
#
# Windows of train_seq_len inputs, each stride further on than the last. The first window scores all its
# positions; every other window scores only what no window before it has scored. So every token of the
# stream is counted once, with between seq_len - stride and seq_len tokens of context.


def sliding_window_starts(total_targets: int, seq_len: int, stride: int) -> list[int]:
    # A later window is worth running only if it reaches past the end of the one before.
    return [ws for ws in range(0, total_targets, stride) if ws == 0 or ws + seq_len - stride < total_targets]


def first_scored(ws: int, seq_len: int, stride: int) -> int:
    # Position inside the window at which its own share begins.
    return 0 if ws == 0 else seq_len - stride


def make_window_batch(
    val_tokens: Tensor, batch_ws: list[int], seq_len: int, total_targets: int, device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    # Windows are padded on the right to seq_len, so that the compiled graph sees one shape only.
    x_batch = torch.zeros(len(batch_ws), seq_len, dtype=torch.int64, device=device)
    y_batch = torch.zeros(len(batch_ws), seq_len, dtype=torch.int64, device=device)
    wlens: list[int] = []
    for i, ws in enumerate(batch_ws):
        end = min(ws + seq_len, total_targets)
        wlen = end - ws
        wlens.append(wlen)
        chunk = val_tokens[ws : end + 1].to(dtype=torch.int64, device=device)
        x_batch[i, :wlen] = chunk[:-1]
        y_batch[i, :wlen] = chunk[1:]
    return x_batch, y_batch, wlens


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
    batch_seqs: int,
) -> tuple[float, float]:
    seq_len = args.train_seq_len
    total_targets = val_tokens.numel() - 1
    window_starts = sliding_window_starts(total_targets, seq_len, stride)
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
            x_batch, y_batch, wlens = make_window_batch(val_tokens, batch_ws, seq_len, total_targets, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = compiled_logits(x_batch)
            nll = F.cross_entropy(
                logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none"
            ).reshape(len(batch_ws), seq_len)
            for i, ws in enumerate(batch_ws):
                s, wlen = first_scored(ws, seq_len, stride), wlens[i]
                loss_sum += nll[i, s:wlen].to(torch.float64).sum()
                token_count += float(wlen - s)
                byte_count += count_token_bytes(
                    x_batch[i, s:wlen],
                    y_batch[i, s:wlen],
                    base_bytes_lut,
                    has_leading_space_lut,
                    is_boundary_token_lut,
                ).sum()

    reduce_sums(loss_sum, token_count, byte_count)
    base_model.train()
    return to_loss_and_bpb(loss_sum, token_count, byte_count)


# -----------------------------
# SCORE-FIRST TEST-TIME TRAINING
# -----------------------------
#
# The stream is cut in chunks. For every chunk, in order:
#   1. all its tokens are scored, by the sliding windows, with the weights as the chunks before left them;
#   2. only then the weights are trained on it, for a few epochs of SGD.
# A token's loss is final when it is first produced. The last chunk is scored and not trained on.


def assign_windows_to_chunks(
    total_targets: int, seq_len: int, stride: int, chunk_tokens: int
) -> tuple[list[list[int]], int]:
    # A window belongs to the chunk in which its scored positions lie. Strides divide chunks, so that
    # no window's share straddles two.
    if chunk_tokens % stride != 0 or seq_len % stride != 0 or chunk_tokens < seq_len:
        raise ValueError("TTT_CHUNK_TOKENS and TRAIN_SEQ_LEN must be multiples of EVAL_STRIDE")
    num_chunks = (total_targets + chunk_tokens - 1) // chunk_tokens
    chunk_windows: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in sliding_window_starts(total_targets, seq_len, stride):
        ci = (ws + first_scored(ws, seq_len, stride)) // chunk_tokens
        chunk_windows[ci].append(ws)
    return chunk_windows, num_chunks


def ttt_parameters(args: Hyperparameters, base_model: GPT) -> list[nn.Parameter]:
    # All parameters, except those of the first ttt_freeze_blocks blocks.
    frozen_prefixes = tuple(f"blocks.{i}." for i in range(args.ttt_freeze_blocks))
    ttt_params: list[nn.Parameter] = []
    for name, p in base_model.named_parameters():
        trainable = not (frozen_prefixes and name.startswith(frozen_prefixes))
        p.requires_grad_(trainable)
        if trainable:
            ttt_params.append(p)
    return ttt_params


def ttt_chunk_lr(base_lr: float, chunk_idx: int, num_chunks: int) -> float:
    # Cosine over the chunks: full rate at the first, zero at the last.
    return base_lr * 0.5 * (1.0 + math.cos(math.pi * chunk_idx / max(num_chunks - 1, 1)))


def ttt_train_chunk(
    args: Hyperparameters,
    base_model: GPT,
    ttt_params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    # SGD on one chunk's tokens. Its sequences are dealt out over the ranks, the gradients are averaged,
    # so all ranks keep the same weights. Every rank makes the same number of steps.
    seq_len = args.train_seq_len
    num_seqs = (tokens.numel() - 1) // seq_len
    if num_seqs == 0:
        return
    base_model.train()
    my_s = (num_seqs * rank) // world_size
    my_e = (num_seqs * (rank + 1)) // world_size
    most_seqs = (num_seqs + world_size - 1) // world_size
    for _epoch in range(args.ttt_epochs):
        for bs in range(0, most_seqs, args.ttt_batch_seqs):
            a, b = my_s + bs, min(my_s + bs + args.ttt_batch_seqs, my_e)
            optimizer.zero_grad(set_to_none=True)
            if b > a:
                local = tokens[a * seq_len : b * seq_len + 1].to(device=device, dtype=torch.int64)
                x = local[:-1].reshape(-1, seq_len)
                y = local[1:].reshape(-1, seq_len)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = base_model(x, y)
                loss.backward()
            for p in ttt_params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if world_size > 1:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(ttt_params, args.ttt_grad_clip)
            optimizer.step()


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
    batch_seqs: int,
    log0=print,
) -> tuple[float, float]:
    seq_len = args.train_seq_len
    total_targets = val_tokens.numel() - 1
    chunk_tokens = args.ttt_chunk_tokens
    chunk_windows, num_chunks = assign_windows_to_chunks(total_targets, seq_len, stride, chunk_tokens)
    log0(
        f"ttt:start chunks:{num_chunks} chunk_tokens:{chunk_tokens} lr:{args.ttt_lr} "
        f"epochs:{args.ttt_epochs} freeze_blocks:{args.ttt_freeze_blocks}"
    )

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    ttt_params = ttt_parameters(args, base_model)
    optimizer = torch.optim.SGD(ttt_params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    compiled_logits = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    t0 = time.perf_counter()

    for ci in range(num_chunks):
        chunk_start = ci * chunk_tokens
        chunk_end = min(chunk_start + chunk_tokens, total_targets)

        # --- Phase 1: score this chunk ---
        windows = chunk_windows[ci]
        my_s = (len(windows) * rank) // world_size
        my_e = (len(windows) * (rank + 1)) // world_size
        my_windows = windows[my_s:my_e]
        base_model.eval()
        with torch.no_grad():
            for bi in range(0, len(my_windows), batch_seqs):
                batch_ws = my_windows[bi : bi + batch_seqs]
                x_batch, y_batch, wlens = make_window_batch(val_tokens, batch_ws, seq_len, total_targets, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = compiled_logits(x_batch)
                nll = F.cross_entropy(
                    logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none"
                ).reshape(len(batch_ws), seq_len)
                for i, ws in enumerate(batch_ws):
                    s, wlen = first_scored(ws, seq_len, stride), wlens[i]
                    scored_nll = nll[i, s:wlen].to(torch.float64)
                    loss_sum += scored_nll.sum()
                    token_count += float(wlen - s)
                    byte_count += count_token_bytes(
                        x_batch[i, s:wlen],
                        y_batch[i, s:wlen],
                        base_bytes_lut,
                        has_leading_space_lut,
                        is_boundary_token_lut,
                    ).sum()

        # --- Phase 2: train on this chunk, which is graded by now ---
        if ci < num_chunks - 1 and args.ttt_epochs > 0:
            for group in optimizer.param_groups:
                group["lr"] = ttt_chunk_lr(args.ttt_lr, ci, num_chunks)
            graded = val_tokens[chunk_start : chunk_end + 1]
            ttt_train_chunk(args, base_model, ttt_params, optimizer, graded, rank, world_size, device)

        if rank == 0 and (ci % 100 == 0 or ci == num_chunks - 1):
            running = loss_sum.item() / math.log(2.0) / max(byte_count.item(), 1.0)
            log0(f"ttt:chunk {ci + 1}/{num_chunks} rank0_bpb:{running:.6f} time:{time.perf_counter() - t0:.1f}s")

    reduce_sums(loss_sum, token_count, byte_count)
    for p in base_model.parameters():
        p.requires_grad_(True)
    base_model.eval()
    val_loss, val_bpb = to_loss_and_bpb(loss_sum, token_count, byte_count)
    log0(f"ttt:done tokens:{int(token_count.item())} bytes:{int(byte_count.item())}")
    return val_loss, val_bpb


# -----------------------------
# TRAINING
# -----------------------------


class WeightEMA:
    # Exponential moving average of the state dict, in fp32 on the device.
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].lerp_(t.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            t.copy_(self.shadow[name].to(dtype=t.dtype))


def build_optimizers(args: Hyperparameters, base_model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    # Optimizer split:
    # - token and bigram embeddings use Adam
    # - matrix params in the transformer blocks and the bigram projection use Muon
    # - vectors and scalars use Adam
    matrix_params: list[nn.Parameter] = []
    scalar_params: list[nn.Parameter] = []
    embed_params: list[nn.Parameter] = []
    for name, p in base_model.named_parameters():
        if name in ("tok_emb.weight", "bigram.embed.weight"):
            embed_params.append(p)
        elif p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            matrix_params.append(p)
        else:
            scalar_params.append(p)

    optimizer_embed = torch.optim.AdamW(
        [{"params": embed_params, "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
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
    optimizer_scalar = torch.optim.Adam(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        fused=True,
    )
    return [optimizer_embed, optimizer_muon, optimizer_scalar], optimizer_muon


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float) -> float:
    # Constant, then a linear warmdown to zero. With a wall-clock cap the warmdown is laid out in time:
    # as many ms before the cap as warmdown_iters steps take at the pace so far.
    if args.warmdown_iters <= 0:
        return 1.0
    if args.max_wallclock_seconds <= 0:
        warmdown_start = max(args.iterations - args.warmdown_iters, 0)
        if step < warmdown_start:
            return 1.0
        return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(1000.0 * args.max_wallclock_seconds - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


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
    if world_size <= 0:
        raise ValueError(f"WORLD_SIZE must be positive, got {world_size}")
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

    # Fast math knobs
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    from torch.backends.cuda import enable_cudnn_sdp, enable_flash_sdp, enable_math_sdp, enable_mem_efficient_sdp

    enable_cudnn_sdp(False)
    enable_flash_sdp(True)
    enable_mem_efficient_sdp(False)
    enable_math_sdp(False)

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
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match the tokenizer's {int(sp.vocab_size())}")
    if int(sp.bos_id()) != BOS_ID:
        raise ValueError(f"the tokenizer's BOS is {int(sp.bos_id())}, the script expects {BOS_ID}")
    dataset_dir = Path(args.data_path).resolve()
    actual_train_files = len(list(dataset_dir.glob("fineweb_train_*.bin")))
    val_tokens = load_validation_tokens(args.val_files)
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = build_sentencepiece_luts(
        sp, args.vocab_size, device
    )
    luts = (base_bytes_lut, has_leading_space_lut, is_boundary_token_lut)
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{dataset_dir.name} train_shards:{actual_train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = build_model(args, device)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    optimizers, optimizer_muon = build_optimizers(args, base_model)

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
    log0(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads}")
    log0(f"embed_lr:{args.tied_embed_lr} matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f}"
    )
    log0(f"seed:{args.seed}")

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    def train_micro_steps() -> Tensor:
        # All micro-batches of one step, gradients summed in place. Returns the mean loss.
        step_loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            step_loss += loss.detach()
            (loss * grad_scale).backward()
        return step_loss / grad_accum_steps

    # Warmup primes the compiled forward/backward/optimizer paths, then we restore the initial
    # weights/optimizer state so measured training starts from the true init.
    if args.warmup_steps > 0:
        initial_model_state = {name: tensor.detach().cpu().clone() for name, tensor in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            zero_grad_all()
            train_micro_steps()
            for opt in optimizers:
                opt.step()
            if warmup_step + 1 == args.warmup_steps:
                log0(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
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

    ema = WeightEMA(base_model, args.ema_decay) if args.ema_enabled else None
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
            val_loss, val_bpb = eval_val(args, model, rank, world_size, device, val_tokens, *luts)
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
        scale = lr_scale(args, step, elapsed_ms)
        model.train()
        zero_grad_all()
        train_loss = train_micro_steps()

        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        muon_momentum = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for group in optimizer_muon.param_groups:
            group["momentum"] = muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        zero_grad_all()
        if ema is not None:
            ema.update(base_model)

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        should_log_train = args.train_log_every > 0 and (
            step <= 10 or step % args.train_log_every == 0 or stop_after_step is not None
        )
        if should_log_train:
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap. A second is left for the average.
        reached_cap = max_wallclock_ms is not None and approx_training_time_ms >= max_wallclock_ms - 1000.0
        if distributed and max_wallclock_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    if ema is not None:
        log0("ema:applying the averaged weights")
        ema.apply_to(base_model)
    log0(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # -----------------------------
    # SERIALIZATION + ROUNDTRIP VALIDATION
    # -----------------------------
    # The raw state is saved for debugging; what is submitted is the quantised, zlib-packed file, and
    # everything below is scored with what was read back from it.

    quant_obj, quant_stats = quantize_state_dict(base_model.state_dict())
    code_bytes = len(code.encode("utf-8"))
    if master_process:
        torch.save(base_model.state_dict(), "final_model.pt")
        quant_buf = io.BytesIO()
        torch.save(quant_obj, quant_buf)
        quant_blob = zlib.compress(quant_buf.getvalue(), level=9)
        with open("final_model.int8.ptz", "wb") as f:
            f.write(quant_blob)
        log0(
            f"quant:params:{quant_stats['param_count']} int6:{quant_stats['int6_params']} "
            f"int8:{quant_stats['int8_params']} float:{quant_stats['float_params']} "
            f"payload:{quant_stats['payload_bytes']}"
        )
    if distributed:
        dist.barrier()

    model_bytes = os.path.getsize("final_model.int8.ptz")
    total_bytes = code_bytes + model_bytes
    log0(f"Serialized model int8+zlib: {model_bytes} bytes")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size int8+zlib: {total_bytes} bytes")
    if total_bytes > SIZE_LIMIT_BYTES:
        raise RuntimeError(f"submission is {total_bytes} bytes, limit {SIZE_LIMIT_BYTES}")

    torch.cuda.synchronize()
    t_eval_start = time.perf_counter()
    quant_blob_disk = Path("final_model.int8.ptz").read_bytes()
    quant_state = torch.load(io.BytesIO(zlib.decompress(quant_blob_disk)), map_location="cpu")
    eval_model = build_model(args, device)
    eval_model.load_state_dict(dequantize_state_dict(quant_state), strict=True)

    t_qeval = time.perf_counter()
    q_val_loss, q_val_bpb = eval_val(args, eval_model, rank, world_size, device, val_tokens, *luts)
    torch.cuda.synchronize()
    log0(
        f"final_int8_zlib_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_qeval):.0f}ms"
    )
    log0(f"final_int8_zlib_roundtrip_exact val_loss:{q_val_loss:.8f} val_bpb:{q_val_bpb:.8f}")

    # The same weights under the sliding window: for comparison, and the score if TTT is off.
    t_slide = time.perf_counter()
    final_loss, final_bpb = eval_val_sliding(
        args, eval_model, rank, world_size, device, val_tokens, *luts, args.eval_stride, args.eval_batch_seqs
    )
    torch.cuda.synchronize()
    log0(
        f"final_int8_zlib_roundtrip_sliding val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} "
        f"stride:{args.eval_stride} eval_time:{1000.0 * (time.perf_counter() - t_slide):.0f}ms"
    )

    # The submitted score: score-first TTT, starting from the weights in the artifact.
    if args.ttt_enabled:
        t_ttt = time.perf_counter()
        final_loss, final_bpb = eval_val_sliding_ttt(
            args, eval_model, rank, world_size, device, val_tokens, *luts, args.eval_stride, args.eval_batch_seqs, log0
        )
        torch.cuda.synchronize()
        log0(
            f"final_int8_zlib_roundtrip_ttt val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} "
            f"eval_time:{1000.0 * (time.perf_counter() - t_ttt):.0f}ms"
        )
    log0(f"eval_total_time:{time.perf_counter() - t_eval_start:.1f}s")
    log0(f"final_score_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
