"""
train_gpt.py -- 9x512 int6-QAT GPT with SmearGate, BigramHash and a warm-down SWA, scored by score-first LoRA TTT.

Forked from the Parameter Golf baseline. Everything that is needed to train, quantise, pack and score lives in this file.

    RUN_ID=int6_smear_swa_ttt torchrun --standalone --nproc_per_node=8 train_gpt.py

Differences to the baseline:
  * int6 per-row weights with straight-through QAT late in the warm-down, int8 container, zstd level 22
  * 3x relu^2 MLP, bought with the bytes that int6 saves
  * SmearGate (previous token's embedding, gated) and a hashed bigram embedding, both cut at document starts
  * stochastic weight averaging over the second half of the warm-down
  * clip search per row, weighted by input second moments on train tokens, inside the 600 s
  * evaluation: stride-64 sliding windows, each target in exactly one window; then the same windows chunk by chunk, where a
    LoRA (and a small bigram count cache) learns from a chunk only when all of its targets are in the books
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

    # Validation cadence and batch size. Validation always uses the full fineweb_val split.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 2000))
    val_token_limit = int(os.environ.get("VAL_TOKEN_LIMIT", 0))  # 0: the whole split
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20_000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 14.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10_000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    bos_id = int(os.environ.get("BOS_ID", 1))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 4096))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))

    # Optimizer.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.02))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.02))
    adam_weight_decay = float(os.environ.get("ADAM_WEIGHT_DECAY", 0.01))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # Averaging, fake quantisation and packing.
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.5))
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    qat_start_scale = float(os.environ.get("QAT_START_SCALE", 0.15))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 16))
    calib_batch_seqs = int(os.environ.get("CALIB_BATCH_SEQS", 32))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit = 16_000_000

    # Evaluation: sliding windows, then score-first test-time training.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_windows = int(os.environ.get("EVAL_BATCH_WINDOWS", 128))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 560.0))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 65_536))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 2))
    ttt_rank = int(os.environ.get("TTT_RANK", 8))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 4))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    cache_weight = float(os.environ.get("CACHE_WEIGHT", 0.05))
    cache_half = float(os.environ.get("CACHE_HALF", 400.0))
    cache_prior = float(os.environ.get("CACHE_PRIOR", 32.0))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------
#
# As borrowed from modded-nanogpt: https://kellerjordan.github.io/posts/muon/


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
            weight_decay = group["weight_decay"]

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
                    g = zeropower_via_newtonschulz5(g, steps=backend_steps)
                    # Scale correction from Muon reference implementations.
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()

            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)

            curr = 0
            for p in params:
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if weight_decay > 0:
                    p.mul_(1.0 - lr * weight_decay)
                p.add_(g, alpha=-lr)
                curr += p.numel()
        return loss


# -----------------------------
# TOKENIZER BYTE TABLES
# -----------------------------
#
# BPB is tokenizer-agnostic: every scored token is charged with the UTF-8 bytes of the text it stands for. A leading
# space belongs to a token only if the token before it is not a boundary (a control token), as in sentencepiece's decoder.


class ByteTables:
    """Bytes of every piece without its mark, whether the piece has the mark, and whether it is a boundary."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
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
            if piece.startswith("▁"):
                has_leading_space_np[token_id] = True
                piece = piece[1:]
            base_bytes_np[token_id] = len(piece.encode("utf-8"))
        self.base_bytes = torch.tensor(base_bytes_np, dtype=torch.int16, device=device)
        self.has_leading_space = torch.tensor(has_leading_space_np, dtype=torch.bool, device=device)
        self.is_boundary = torch.tensor(is_boundary_np, dtype=torch.bool, device=device)

    def count(self, prev_ids: Tensor, tgt_ids: Tensor) -> Tensor:
        """Bytes of each target, given the token before it."""
        token_bytes = self.base_bytes[tgt_ids].to(torch.int32)
        token_bytes += (self.has_leading_space[tgt_ids] & ~self.is_boundary[prev_ids]).to(torch.int32)
        return token_bytes


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


def load_validation_tokens(pattern: str, limit: int = 0) -> Tensor:
    """The validation split as one stream. The shards keep the order of the export pipeline."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if limit > 0:
        tokens = tokens[: limit + 1]
    return tokens


class TokenStream:
    # Reads shards sequentially and wraps around forever. The training loop therefore
    # has deterministic, simple streaming behavior with no sampling or workers.
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
    # Each call consumes a contiguous chunk from the shared token stream, then slices out
    # one disjoint span per rank. The extra "+1" token lets us build (x, y) by shifting.
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
# INT6 QUANTISATION
# -----------------------------
#
# Matrices become int6 with one fp16 scale per row, kept in an int8 container (zstd finds the two idle bits). The token
# embedding stays fp16 since it is the output head too; small and control tensors are passed through.

INT6_MAX = 31
CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear.gate",
    "bigram.scale",
)
FP16_TENSOR_NAMES = ("tok_emb.weight",)
PASSTHROUGH_MAX_NUMEL = 16_384
CLIP_CANDIDATES = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78)


def is_control_tensor(name: str) -> bool:
    return any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)


def fake_quant_int6(w: Tensor) -> Tensor:
    """Straight-through int6 per-row rounding for QAT."""
    scale = w.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / INT6_MAX
    rounded = torch.clamp(torch.round(w / scale), -INT6_MAX, INT6_MAX) * scale
    return w + (rounded - w).detach()


def quantize_rows_int6(w: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Int6 codes and fp16 scales; the clip of each row is the one with the least (moment-weighted) squared error."""
    w32 = w.float()
    row_max = w32.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    weight = torch.ones_like(w32[:1]) if moment is None else moment.to(w32.device).float()[None, :] + 1e-8
    best_err = torch.full_like(row_max, float("inf"))
    best_q = torch.zeros_like(w32, dtype=torch.int8)
    best_scale = (row_max / INT6_MAX).to(torch.float16)
    for clip in CLIP_CANDIDATES:
        scale = (row_max * clip / INT6_MAX).to(torch.float16).clamp_min(1e-7)
        q = torch.clamp(torch.round(w32 / scale.float()), -INT6_MAX, INT6_MAX)
        err = ((q * scale.float() - w32).square() * weight).sum(dim=1, keepdim=True)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_q = torch.where(better, q.to(torch.int8), best_q)
        best_scale = torch.where(better, scale, best_scale)
    return best_q.contiguous(), best_scale.squeeze(1).contiguous()


def quantize_state_dict_int6(state_dict: dict[str, Tensor], moments: dict[str, Tensor]) -> tuple[dict, dict]:
    packed: dict[str, dict] = {"codes": {}, "scales": {}, "plain": {}, "dtypes": {}}
    stats = {"params": 0, "int6_params": 0, "plain_bytes": 0}
    for name, tensor in state_dict.items():
        t = tensor.detach()
        stats["params"] += int(t.numel())
        packed["dtypes"][name] = str(t.dtype).removeprefix("torch.")
        if name in FP16_TENSOR_NAMES or t.ndim != 2 or is_control_tensor(name) or t.numel() <= PASSTHROUGH_MAX_NUMEL:
            kept = t.float() if is_control_tensor(name) else t.to(torch.float16)
            packed["plain"][name] = kept.cpu().contiguous()
            stats["plain_bytes"] += kept.numel() * kept.element_size()
            continue
        q, s = quantize_rows_int6(t, moments.get(name.removesuffix(".weight")))
        packed["codes"][name] = q.cpu()
        packed["scales"][name] = s.cpu()
        stats["int6_params"] += int(t.numel())
    return packed, stats


def dequantize_state_dict_int6(packed: dict) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in packed["codes"].items():
        dtype = getattr(torch, packed["dtypes"][name])
        out[name] = (q.float() * packed["scales"][name].float()[:, None]).to(dtype)
    for name, t in packed["plain"].items():
        out[name] = t.to(getattr(torch, packed["dtypes"][name]))
    return out


def write_artifact(path: str, packed: dict, level: int) -> int:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    blob = zstandard.ZstdCompressor(level=level).compress(buffer.getvalue())
    Path(path).write_bytes(blob)
    return len(blob)


def read_artifact(path: str) -> dict:
    raw = zstandard.ZstdDecompressor().decompress(Path(path).read_bytes())
    return torch.load(io.BytesIO(raw), map_location="cpu")


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
    qat_enabled = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if CastedLinear.qat_enabled and self.training and w.numel() > PASSTHROUGH_MAX_NUMEL:
            w = fake_quant_int6(w)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    # Keep small/control parameters in fp32 even when the model body runs in bf16.
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or is_control_tensor(name)) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Caches cos/sin tables per sequence length on the current device.
    def __init__(self, dim: int, base: float = 10_000.0):
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


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


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
        if self.head_dim % 2 != 0:
            raise ValueError("head_dim must be even for RoPE")
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, base=rope_base)

    def forward(self, x: Tensor, q_delta: Tensor | None = None, v_delta: Tensor | None = None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x) if q_delta is None else self.c_q(x) + q_delta
        k = self.c_k(x)
        v = self.c_v(x) if v_delta is None else self.c_v(x) + v_delta
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v.to(q.dtype),
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
    """Mixes the embedding of the token before into each position, by a learnt gate per channel; never over a BOS."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -3.0, dtype=torch.float32))
        self.bos_id = bos_id

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (input_ids != self.bos_id).to(x.dtype)[..., None]
        g = torch.sigmoid(self.gate).to(x.dtype)
        return x + g * prev * inside


class BigramHash(nn.Module):
    """A small embedding of (token before, token), hashed; bucket 0 for the first position and for a document's start."""

    def __init__(self, buckets: int, width: int, dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.table = nn.Embedding(buckets, width)
        self.proj = CastedLinear(width, dim, bias=False)
        self.proj._zero_init = True
        self.scale = nn.Parameter(torch.tensor(0.1, dtype=torch.float32))
        nn.init.normal_(self.table.weight, std=0.02)

    def bucket_ids(self, input_ids: Tensor) -> Tensor:
        prev = F.pad(input_ids[:, :-1], (1, 0))
        hashed = torch.bitwise_xor(prev * 36_313, input_ids * 27_191) % (self.buckets - 1) + 1
        hashed = torch.where(input_ids == self.bos_id, torch.zeros_like(hashed), hashed)
        hashed[:, 0] = 0
        return hashed

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = self.table(self.bucket_ids(input_ids))
        return self.scale * self.proj(rows)


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

    def forward(self, x: Tensor, x0: Tensor, q_fn=None, v_fn=None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        n = self.attn_norm(x)
        q_delta = q_fn(n) if q_fn is not None else None
        v_delta = v_fn(n) if v_fn is not None else None
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(n, q_delta, v_delta)
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.smear = SmearGate(args.model_dim, args.bos_id)
        self.bigram = BigramHash(args.bigram_buckets, args.bigram_dim, args.model_dim, args.bos_id)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
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
        self._init_weights(args.tied_embed_init_std)

    def _init_weights(self, embed_std: float) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=embed_std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.numel() > PASSTHROUGH_MAX_NUMEL:
                    nn.init.orthogonal_(module.weight)

    def forward_hidden(self, input_ids: Tensor, adapter: LoRAAdapter | None = None) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, input_ids)
        x0 = x
        skips: list[Tensor] = []
        # First half stores skips; second half reuses them in reverse order.
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0, *lora_hooks(adapter, i))
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            bi = self.num_encoder_layers + i
            x = self.blocks[bi](x, x0, *lora_hooks(adapter, bi))
        return self.final_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        logits_proj = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor, adapter: LoRAAdapter | None = None) -> Tensor:
        return self.head(self.forward_hidden(input_ids, adapter))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# LORA FOR TEST-TIME TRAINING
# -----------------------------


class LoRAPair(nn.Module):
    """x -> B(Ax), zero at the start."""

    def __init__(self, width_in: int, width_out: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, width_in) / math.sqrt(width_in))
        self.up = nn.Parameter(torch.zeros(width_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class LoRAAdapter(nn.Module):
    """Low-rank corrections of every block's queries and values. The weights of the artifact are never touched."""

    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        kv_dim = args.model_dim // args.num_heads * args.num_kv_heads
        self.q_pairs = nn.ModuleList(
            LoRAPair(args.model_dim, args.model_dim, args.ttt_rank) for _ in range(args.num_layers)
        )
        self.v_pairs = nn.ModuleList(LoRAPair(args.model_dim, kv_dim, args.ttt_rank) for _ in range(args.num_layers))


def lora_hooks(adapter: LoRAAdapter | None, layer: int) -> tuple:
    if adapter is None:
        return (None, None)
    return (adapter.q_pairs[layer], adapter.v_pairs[layer])


# -----------------------------
# AVERAGING AND CALIBRATION
# -----------------------------


class WeightAverage:
    """Equal-weight average of the states along the warm-down (SWA)."""

    def __init__(self):
        self.total: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            if name in self.total:
                self.total[name].add_(tensor.detach().float())
            else:
                self.total[name] = tensor.detach().float().clone()
        self.count += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        if self.count == 0:
            return
        current = model.state_dict()
        averaged = {name: (t / self.count).to(current[name].dtype) for name, t in self.total.items()}
        model.load_state_dict(averaged, strict=True)


class MomentProbe:
    """Mean square of every input feature of the large linear layers, gathered by forward hooks."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear) and module.weight.numel() > PASSTHROUGH_MAX_NUMEL:
                self.handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str):
        def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            flat = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            square = flat.square().sum(dim=0)
            self.sums[name] = square if name not in self.sums else self.sums[name] + square
            self.rows[name] = self.rows.get(name, 0) + flat.size(0)

        return record

    def close(self) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        moments = {}
        for name, total in self.sums.items():
            count = torch.tensor(float(self.rows[name]), device=total.device)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(total, op=dist.ReduceOp.SUM)
                dist.all_reduce(count, op=dist.ReduceOp.SUM)
            moments[name] = total / count
        return moments


@torch.no_grad()
def collect_moments(
    args: type[Hyperparameters],
    model: GPT,
    loader: DistributedTokenLoader,
    seconds_left: float,
    device: torch.device,
) -> tuple[dict[str, Tensor], int]:
    """Input moments on fresh train batches. Stops at the deadline; every rank does the same number of batches."""
    started = time.perf_counter()
    probe = MomentProbe(model)
    model.eval()
    done = 0
    for _ in range(args.calib_batches):
        late = torch.tensor(int(time.perf_counter() - started > seconds_left), device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if done > 0 and bool(late.item()):
            break
        tokens = args.calib_batch_seqs * args.train_seq_len * loader.world_size
        x, _ = loader.next_batch(tokens, args.train_seq_len, 1)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.forward_logits(x)
        done += 1
    model.train()
    return probe.close(), done


# -----------------------------
# EVALUATION
# -----------------------------
#
# A "position" i of the validation stream is the prediction of token i + 1 from the tokens up to i. There are
# tokens.numel() - 1 of them. Every evaluation below scores each position once and divides by the bytes of its target.


class Tally:
    """Sums of a rank's scored positions: nats, tokens, bytes. In float64, since there are some sixty million."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, token_bytes: Tensor) -> None:
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += float(nll.numel())
        self.sums[2] += token_bytes.to(torch.float64).sum()

    def reduce(self) -> tuple[float, float, int]:
        """val_loss, val_bpb and the count of scored tokens, over all ranks."""
        total = self.sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
        nats, tokens, num_bytes = (float(v) for v in total.tolist())
        val_loss = nats / tokens
        val_bpb = nats / math.log(2.0) / num_bytes
        return val_loss, val_bpb, int(tokens)


def eval_val(
    args: type[Hyperparameters],
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    grad_accum_steps: int,
    val_tokens: Tensor,
    tables: ByteTables,
) -> tuple[float, float]:
    """Validation on disjoint sequences, cheap enough to be run during training. For the log only."""
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    local_batch_seqs = max(1, local_batch_tokens // args.train_seq_len)
    total_seqs = (val_tokens.numel() - 1) // args.train_seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    tally = Tally(device)
    model.eval()
    with torch.no_grad():
        for batch_start in range(seq_start, seq_end, local_batch_seqs):
            batch_end = min(batch_start + local_batch_seqs, seq_end)
            raw_start = batch_start * args.train_seq_len
            raw_end = batch_end * args.train_seq_len + 1
            local = val_tokens[raw_start:raw_end].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, args.train_seq_len)
            y = local[1:].reshape(-1, args.train_seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                batch_loss = model(x, y).detach()
            token_bytes = tables.count(x.reshape(-1), y.reshape(-1))
            tally.add(batch_loss.float().expand(y.numel()), token_bytes)
    model.train()
    val_loss, val_bpb, _ = tally.reduce()
    return val_loss, val_bpb


class Span:
    """A window of the validation stream: it reads positions start..end-1 and scores the positions first..end-1."""

    __slots__ = ("start", "first", "end")

    def __init__(self, start: int, first: int, end: int):
        self.start = start
        self.first = first
        self.end = end


def make_spans(total: int, seq_len: int, stride: int) -> list[Span]:
    """Windows of seq_len positions. The first scores all of its positions, the others only those not scored before."""
    seq_len = min(seq_len, total)
    spans = [Span(0, 0, seq_len)]
    while spans[-1].end < total:
        first = spans[-1].end
        end = min(first + stride, total)
        spans.append(Span(end - seq_len, first, end))
    return spans


def group_spans(spans: list[Span], chunk_tokens: int) -> list[list[Span]]:
    """Consecutive spans, about chunk_tokens scored positions to a group."""
    groups: list[list[Span]] = [[]]
    for span in spans:
        if groups[-1] and span.end - groups[-1][0].first > chunk_tokens:
            groups.append([])
        groups[-1].append(span)
    return groups


def batches_of(spans: list[Span], size: int) -> list[list[Span]]:
    return [spans[i : i + size] for i in range(0, len(spans), size)]


def window_batch(val_tokens: Tensor, spans: list[Span], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets of a batch of spans, and the mask of the positions they score."""
    length = spans[0].end - spans[0].start
    x = torch.stack([val_tokens[s.start : s.end] for s in spans]).to(device=device, dtype=torch.int64)
    y = torch.stack([val_tokens[s.start + 1 : s.end + 1] for s in spans]).to(device=device, dtype=torch.int64)
    column = torch.arange(length, device=device)[None, :]
    first = torch.tensor([s.first - s.start for s in spans], device=device)[:, None]
    return x, y, column >= first


def eval_val_sliding(
    args: type[Hyperparameters],
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    tables: ByteTables,
    adapter: LoRAAdapter | None = None,
) -> tuple[float, float, int]:
    """Fixed weights, stride-64 windows, the spans dealt out to the ranks in contiguous runs."""
    spans = make_spans(val_tokens.numel() - 1, args.train_seq_len, args.eval_stride)
    lo = len(spans) * rank // world_size
    hi = len(spans) * (rank + 1) // world_size
    score_logits = torch.compile(model.forward_logits, dynamic=False)
    tally = Tally(device)
    model.eval()
    with torch.no_grad():
        for batch in batches_of(spans[lo:hi], args.eval_batch_windows):
            x, y, scored = window_batch(val_tokens, batch, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = score_logits(x, adapter)
            nll = F.cross_entropy(logits[scored].float(), y[scored], reduction="none")
            tally.add(nll, tables.count(x[scored], y[scored]))
    model.train()
    return tally.reduce()


# -----------------------------
# BIGRAM COUNT CACHE
# -----------------------------


class BigramCache:
    """Counts of (token, next token) over positions that are scored already, as a distribution over the vocabulary.

    A row is smoothed by the unigram counts, themselves smoothed by one: every row sums to one over all tokens.
    """

    def __init__(self, vocab_size: int, prior: float, device: torch.device):
        self.vocab_size = vocab_size
        self.prior = prior
        self.pairs = torch.zeros(vocab_size, vocab_size, dtype=torch.float32, device=device)
        self.singles = torch.zeros(vocab_size, dtype=torch.float32, device=device)

    def update(self, prev_ids: Tensor, next_ids: Tensor) -> None:
        flat = prev_ids * self.vocab_size + next_ids
        self.pairs.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
        self.singles.index_add_(0, next_ids, torch.ones_like(next_ids, dtype=torch.float32))

    def seen(self, prev_ids: Tensor) -> Tensor:
        """How often each of the tokens has been a context."""
        return self.pairs.sum(dim=1)[prev_ids]

    def dist(self, prev_ids: Tensor) -> Tensor:
        """p(. | prev) for each row of prev_ids: [rows, vocab]."""
        unigram = (self.singles + 1.0) / (self.singles.sum() + self.vocab_size)
        rows = self.pairs[prev_ids]
        return (rows + self.prior * unigram) / (rows.sum(dim=1, keepdim=True) + self.prior)


def mixed_nll(
    args: type[Hyperparameters], logits: Tensor, cache: BigramCache, prev_ids: Tensor, tgt_ids: Tensor
) -> Tensor:
    """-ln of the mixture of the model's and the cache's distributions, at the targets. The weight knows prev only."""
    model_probs = torch.softmax(logits.float(), dim=-1)
    cache_probs = cache.dist(prev_ids)
    seen = cache.seen(prev_ids)
    lam = args.cache_weight * seen / (seen + args.cache_half)
    mixture = (1.0 - lam[:, None]) * model_probs + lam[:, None] * cache_probs
    picked = mixture.gather(1, tgt_ids[:, None]).squeeze(1)
    return -torch.log(picked.clamp_min(1e-12))


# -----------------------------
# SCORE-FIRST TEST-TIME TRAINING
# -----------------------------


class ChunkTrainer:
    """Trains the adapter on a stretch of the stream. All ranks take part; their gradients are summed."""

    def __init__(self, args: type[Hyperparameters], model: GPT, adapter: LoRAAdapter, rank: int, world_size: int):
        self.args = args
        self.model = model
        self.adapter = adapter
        self.rank = rank
        self.world_size = world_size
        self.params = list(adapter.parameters())
        self.optimizer = torch.optim.AdamW(self.params, lr=args.ttt_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    def _segments(self, lo: int, hi: int) -> list[tuple[int, int]]:
        step = self.args.train_seq_len
        return [(s, min(s + step, hi)) for s in range(lo, hi, step)]

    def learn(self, tokens: Tensor, lo: int, hi: int, epochs: int) -> None:
        """epochs passes over the positions lo..hi-1 of tokens."""
        device = self.params[0].device
        segments = self._segments(lo, hi)
        per_step = self.args.ttt_batch_seqs * self.world_size
        for _ in range(epochs):
            for at in range(0, len(segments), per_step):
                group = segments[at : at + per_step]
                self.optimizer.zero_grad(set_to_none=False)
                for s, e in group[self.rank :: self.world_size]:
                    x = tokens[s:e].to(device=device, dtype=torch.int64)[None]
                    y = tokens[s + 1 : e + 1].to(device=device, dtype=torch.int64)
                    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                        logits = self.model.forward_logits(x, self.adapter)
                    F.cross_entropy(logits[0].float(), y, reduction="sum").backward()
                self._step(sum(e - s for s, e in group))

    def _step(self, positions: int) -> None:
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            p.grad.div_(max(positions, 1))
        torch.nn.utils.clip_grad_norm_(self.params, self.args.ttt_grad_clip)
        self.optimizer.step()


def all_ranks_agree(flag: bool, device: torch.device) -> bool:
    """True when every rank says so."""
    t = torch.tensor(int(flag), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.MIN)
    return bool(t.item())


def freeze(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


def new_adapter(args: type[Hyperparameters], device: torch.device) -> LoRAAdapter:
    """An adapter that is the same on all ranks."""
    torch.manual_seed(args.seed + 17)
    adapter = LoRAAdapter(args).to(device)
    if dist.is_available() and dist.is_initialized():
        for p in adapter.parameters():
            dist.broadcast(p.data, src=0)
    return adapter


def eval_val_ttt(
    args: type[Hyperparameters],
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    tables: ByteTables,
    eval_started: float,
    log0,
) -> tuple[float, float, int]:
    """Chunk after chunk: all ranks score the chunk's spans, then the cache and the adapter learn from it.

    The state that scores chunk c was built from the chunks before c. If the evaluation's clock runs short, the adapter
    stands still for the rest of the stream; scoring goes on.
    """
    spans = make_spans(val_tokens.numel() - 1, args.train_seq_len, args.eval_stride)
    chunks = group_spans(spans, args.ttt_chunk_tokens)
    freeze(model)
    adapter = new_adapter(args, device)
    trainer = ChunkTrainer(args, model, adapter, rank, world_size)
    cache = BigramCache(args.vocab_size, args.cache_prior, device)
    score_logits = torch.compile(model.forward_logits, dynamic=False)
    tally = Tally(device)
    learning = True
    model.eval()

    for index, chunk in enumerate(chunks):
        with torch.no_grad():
            for batch in batches_of(chunk[rank::world_size], args.eval_batch_windows):
                x, y, scored = window_batch(val_tokens, batch, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = score_logits(x, adapter)
                prev_ids, tgt_ids = x[scored], y[scored]
                nll = mixed_nll(args, logits[scored], cache, prev_ids, tgt_ids)
                tally.add(nll, tables.count(prev_ids, tgt_ids))

        if index + 1 == len(chunks):
            break
        lo, hi = chunk[0].first, chunk[-1].end
        window = val_tokens[lo : hi + 1].to(device=device, dtype=torch.int64)
        cache.update(window[:-1], window[1:])
        learning = learning and all_ranks_agree(time.perf_counter() - eval_started < args.eval_budget_seconds, device)
        if learning:
            trainer.learn(val_tokens, lo, hi, args.ttt_epochs)
        if index % 50 == 0:
            log0(
                f"ttt_chunk:{index + 1}/{len(chunks)} positions:{lo}-{hi} learning:{int(learning)} "
                f"eval_time:{1000.0 * (time.perf_counter() - eval_started):.0f}ms"
            )

    return tally.reduce()


# -----------------------------
# TRAINING HELPERS
# -----------------------------


def build_optimizers(args: type[Hyperparameters], model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    """Adam for the embeddings and the vectors, Muon for the matrices of the blocks."""
    block_named_params = list(model.blocks.named_parameters())
    matrix_params = [p for name, p in block_named_params if p.ndim == 2 and not is_control_tensor(name)]
    scalar_params = [p for name, p in block_named_params if p.ndim < 2 or is_control_tensor(name)]
    scalar_params += [model.skip_weights, model.smear.gate, model.bigram.scale]
    matrix_params.append(model.bigram.proj.weight)
    optimizer_tok = torch.optim.AdamW(
        [
            {
                "params": [model.tok_emb.weight, model.bigram.table.weight],
                "lr": args.tied_embed_lr,
                "base_lr": args.tied_embed_lr,
            }
        ],
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


def lr_mul(args: type[Hyperparameters], step: int, elapsed_ms: float, train_cap_ms: float | None) -> float:
    """The learning rates' common factor: one, then linear to zero by the steps or by the clock."""
    if args.warmdown_iters <= 0:
        return 1.0
    if train_cap_ms is None:
        warmdown_start = max(args.iterations - args.warmdown_iters, 0)
        if step < warmdown_start:
            return 1.0
        return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(train_cap_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


def set_lr_and_momentum(
    args: type[Hyperparameters],
    optimizers: list[torch.optim.Optimizer],
    optimizer_muon: Muon,
    step: int,
    scale: float,
) -> None:
    frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
    momentum = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
    for group in optimizer_muon.param_groups:
        group["momentum"] = momentum
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * scale


def run_warmup(
    args: type[Hyperparameters],
    base_model: GPT,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    rank: int,
    world_size: int,
    device: torch.device,
    grad_accum_steps: int,
    log0,
) -> None:
    """Primes the compiled forward/backward/optimizer paths on train batches, then restores weights and states."""
    initial_model_state = {name: tensor.detach().cpu().clone() for name, tensor in base_model.state_dict().items()}
    initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    warm_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    model.train()
    for warmup_step in range(args.warmup_steps):
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        for _ in range(grad_accum_steps):
            x, y = warm_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                warmup_loss = model(x, y)
            (warmup_loss / grad_accum_steps).backward()
        for opt in optimizers:
            opt.step()
        if (warmup_step + 1) % 10 == 0 or warmup_step + 1 == args.warmup_steps:
            log0(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
    base_model.load_state_dict(initial_model_state, strict=True)
    for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
        opt.load_state_dict(state)
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)


def make_logger(args: type[Hyperparameters], master_process: bool):
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

    return log0


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters

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

    # Fast math knobs
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    from torch.backends.cuda import enable_cudnn_sdp, enable_flash_sdp, enable_math_sdp, enable_mem_efficient_sdp

    enable_cudnn_sdp(False)
    enable_flash_sdp(True)
    enable_mem_efficient_sdp(False)
    enable_math_sdp(False)

    log0 = make_logger(args, master_process)
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
    tables = ByteTables(sp, args.vocab_size, device)
    val_tokens = load_validation_tokens(args.val_files, args.val_token_limit)
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")
    log0(f"train_loader:shards pattern={args.train_files} count:{len(glob.glob(args.train_files))}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    optimizers, optimizer_muon = build_optimizers(args, base_model)

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} max_wallclock_seconds:{args.max_wallclock_seconds:.1f} "
        f"calib_reserve_seconds:{args.calib_reserve_seconds:.1f}"
    )

    if args.warmup_steps > 0:
        run_warmup(args, base_model, model, optimizers, rank, world_size, device, grad_accum_steps, log0)
    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None
    train_cap_ms = max_wallclock_ms - 1000.0 * args.calib_reserve_seconds if max_wallclock_ms is not None else None
    swa = WeightAverage()
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
                args, base_model, rank, world_size, device, grad_accum_steps, val_tokens, tables
            )
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
        scale = lr_mul(args, step, elapsed_ms, train_cap_ms)
        if scale < args.qat_start_scale and not CastedLinear.qat_enabled:
            CastedLinear.qat_enabled = True
            log0(f"qat:on step:{step} lr_scale:{scale:.4f}")
        set_lr_and_momentum(args, optimizers, optimizer_muon, step, scale)

        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
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
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if scale < args.swa_start_scale and step % args.swa_every == 0:
            swa.add(base_model)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap.
        reached_cap = train_cap_ms is not None and approx_training_time_ms >= train_cap_ms
        if distributed and train_cap_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # AVERAGE, CALIBRATE, PACK (still on the training clock)
    # -----------------------------

    t0 = time.perf_counter()
    swa.copy_to(base_model)
    log0(f"swa: averaged {swa.count} states")
    CastedLinear.qat_enabled = False
    # Half of what is left of the clock goes to the moments at most; packing takes about five seconds.
    seconds_left = args.calib_reserve_seconds / 2
    if max_wallclock_ms is not None:
        seconds_left = (max_wallclock_ms - training_time_ms) / 2000.0
    moments, calib_done = collect_moments(args, base_model, train_loader, seconds_left, device)
    packed, stats = quantize_state_dict_int6(base_model.state_dict(), moments)
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"calib: {calib_done} train batches, train+swa+calib+quant time:{training_time_ms:.0f}ms")

    code_bytes = len(code.encode("utf-8"))
    if master_process:
        model_bytes = write_artifact(args.artifact_path, packed, args.zstd_level)
        total_bytes = model_bytes + code_bytes
        log0(f"int6_params:{stats['int6_params']} of {stats['params']} fp16/fp32 bytes:{stats['plain_bytes']}")
        log0(f"Serialized model int6+zstd: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size int6+zstd: {total_bytes} bytes")
        if total_bytes > args.size_limit:
            log0(f"WARNING: {total_bytes - args.size_limit} bytes over the limit of {args.size_limit}")

    if distributed:
        dist.barrier()

    # -----------------------------
    # ROUND TRIP + FINAL EVALUATION
    # -----------------------------

    eval_started = time.perf_counter()
    restored = read_artifact(args.artifact_path)
    base_model.load_state_dict(dequantize_state_dict_int6(restored), strict=True)

    q_val_loss, q_val_bpb = eval_val(
        args, base_model, rank, world_size, device, grad_accum_steps, val_tokens, tables
    )
    torch.cuda.synchronize()
    log0(
        f"final_int6_zstd_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - eval_started):.0f}ms"
    )

    sw_loss, sw_bpb, sw_tokens = eval_val_sliding(
        args, base_model, rank, world_size, device, val_tokens, tables
    )
    torch.cuda.synchronize()
    log0(
        f"sliding_window val_loss:{sw_loss:.4f} val_bpb:{sw_bpb:.4f} stride:{args.eval_stride} tokens:{sw_tokens} "
        f"eval_time:{1000.0 * (time.perf_counter() - eval_started):.0f}ms"
    )

    ttt_loss, ttt_bpb, ttt_tokens = eval_val_ttt(
        args, base_model, rank, world_size, device, val_tokens, tables, eval_started, log0
    )
    torch.cuda.synchronize()
    log0(
        f"final_ttt_lora val_loss:{ttt_loss:.4f} val_bpb:{ttt_bpb:.4f} tokens:{ttt_tokens} "
        f"eval_time:{1000.0 * (time.perf_counter() - eval_started):.0f}ms"
    )
    log0(f"final_ttt_lora_exact val_loss:{ttt_loss:.8f} val_bpb:{ttt_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
