"""
Fork of the baseline train_gpt.py.

What is different from the baseline:
  * 9 layers, 3x MLP, EMA of the weights
  * int6 for the big matrices, int8 for the embedding, clip ratios picked on train activations, zlib
  * evaluation: per-document LoRA test-time training. Documents are cut at BOS, sorted by length, 64 at a time; each
    chunk of 256 tokens is scored first and only then trained on; adapters start from zero at each document
  * a per-document bigram count model (dense over the vocabulary) mixed into the scores

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
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


class Hyperparameters:
    # Data paths are shard globs produced by the existing preprocessing pipeline.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation during training is a monitor only; the clock is stopped for it.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 2000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 2500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 14.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))

    # Optimizer hyperparameters.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.03))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.03))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.88))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1000))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # Quantisation.
    calib_batches = int(os.environ.get("CALIB_BATCHES", 16))

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 1024))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    sliding_eval = bool(int(os.environ.get("SLIDING_EVAL", "1")))
    sliding_batch = int(os.environ.get("SLIDING_BATCH", 64))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 8))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 0.01))
    ttt_chunk_size = int(os.environ.get("TTT_CHUNK_SIZE", 256))
    ttt_batch_size = int(os.environ.get("TTT_BATCH_SIZE", 64))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 1))
    eval_adapt_seconds = float(os.environ.get("EVAL_ADAPT_SECONDS", 520.0))
    cache_weight = float(os.environ.get("CACHE_WEIGHT", 0.08))
    cache_strength = float(os.environ.get("CACHE_STRENGTH", 4.0))


BOS_ID = 1
SIZE_LIMIT = 16_000_000

# -----------------------------
# MUON OPTIMIZER
# -----------------------------
#
# As borrowed from modded-nanogpt
# Background on Muon: https://kellerjordan.github.io/posts/muon/


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
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
            lr = group["lr"]
            momentum = group["momentum"]
            backend_steps = group["backend_steps"]

            # every rank orthogonalizes its share; the updates travel as one flat buffer
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
                if group["weight_decay"]:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                curr += p.numel()
        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------
#
# We score bits per byte of the original text, so every token needs its number of UTF-8 bytes. A leading space (the
# "▁" of sentencepiece) is one byte, and it is not there when the token follows a boundary token such as BOS.


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


def count_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
    return token_bytes.to(torch.float64)


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*.
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


def bits_per_byte(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    val_loss = float(loss_sum.item() / token_count.item())
    bits_per_token = val_loss / math.log(2.0)
    tokens_per_byte = token_count.item() / byte_count.item()
    return val_loss, float(bits_per_token * tokens_per_byte)


def eval_val(
    args: Hyperparameters,
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    grad_accum_steps: int,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Non-overlapping sequences, as in the baseline. For the monitor and the round-trip check."""
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    if local_batch_tokens < args.train_seq_len:
        raise ValueError(f"VAL_BATCH_SIZE={args.val_batch_size} is too small for TRAIN_SEQ_LEN={args.train_seq_len}")
    local_batch_seqs = local_batch_tokens // args.train_seq_len
    total_seqs = (val_tokens.numel() - 1) // args.train_seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    with torch.inference_mode():
        for batch_seq_start in range(seq_start, seq_end, local_batch_seqs):
            batch_seq_end = min(batch_seq_start + local_batch_seqs, seq_end)
            raw_start = batch_seq_start * args.train_seq_len
            raw_end = batch_seq_end * args.train_seq_len + 1
            local = val_tokens[raw_start:raw_end].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, args.train_seq_len)
            y = local[1:].reshape(-1, args.train_seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                batch_loss = model(x, y).detach()
            batch_token_count = float(y.numel())
            val_loss_sum += batch_loss.to(torch.float64) * batch_token_count
            val_token_count += batch_token_count
            val_byte_count += count_bytes(x.reshape(-1), y.reshape(-1), luts).sum()

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(val_loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_byte_count, op=dist.ReduceOp.SUM)
    model.train()
    return bits_per_byte(val_loss_sum, val_token_count, val_byte_count)


# -----------------------------
# POST-TRAINING QUANTIZATION
# -----------------------------
#
# Matrices of attention and MLP: int6 per row, the clip ratio of each row chosen so that the error, weighted by the
# mean square of the layer's inputs, is least. The embedding: int8 per row. Small and control tensors stay in float.

CONTROL_TENSOR_NAME_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")
KEEP_FLOAT_MAX_NUMEL = 65_536
INT6_MAX = 31
INT8_MAX = 127
CLIP_RATIOS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.81, 0.77, 0.72, 0.67)


class InputMoments:
    """Mean squares of the inputs of every CastedLinear, collected with forward hooks."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str):
        def record(module, inputs, output):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            sq = x.square().sum(dim=0)
            self.sums[name] = self.sums[name] + sq if name in self.sums else sq
            self.rows[name] = self.rows.get(name, 0) + x.size(0)

        return record

    def finish(self) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        out = {}
        for name in sorted(self.sums):
            total = self.sums[name] / self.rows[name]
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(total, op=dist.ReduceOp.AVG)
            out[f"{name}.weight"] = total.cpu()
        return out


def collect_input_moments(
    args: Hyperparameters, model: nn.Module, loader: DistributedTokenLoader, grad_accum_steps: int
) -> dict[str, Tensor]:
    moments = InputMoments(model)
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(args.calib_batches):
            x, _ = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            model.forward_logits(x[:16])
    model.train()
    return moments.finish()


def quantize_rows(t: Tensor, qmax: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    t32 = t.float()
    absmax = t32.abs().amax(dim=1).clamp_min(1e-8)
    w = torch.ones(t32.size(1)) if weight is None else weight / weight.mean().clamp_min(1e-12)
    best_err = torch.full_like(absmax, float("inf"))
    best_scale = absmax / qmax
    for ratio in CLIP_RATIOS:
        scale = (absmax * ratio / qmax).to(torch.float16).float().clamp_min(1e-7)
        q = torch.clamp(torch.round(t32 / scale[:, None]), -qmax, qmax)
        err = ((q * scale[:, None] - t32).square() * w[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    q = torch.clamp(torch.round(t32 / best_scale[:, None]), -qmax, qmax).to(torch.int8).contiguous()
    return q, best_scale.to(torch.float16).contiguous()


def keep_float(name: str, t: Tensor) -> bool:
    if not t.is_floating_point() or t.ndim != 2:
        return True
    return t.numel() <= KEEP_FLOAT_MAX_NUMEL or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)


def quantize_state_dict_mixed(state_dict: dict[str, Tensor], moments: dict[str, Tensor]) -> tuple[dict, dict]:
    obj: dict[str, dict] = {"quantized": {}, "scales": {}, "dtypes": {}, "passthrough": {}}
    stats = {"param_count": 0, "int6": 0, "int8": 0, "float": 0}
    for name, tensor in state_dict.items():
        t = tensor.detach().to("cpu").contiguous()
        stats["param_count"] += t.numel()
        if keep_float(name, t):
            control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            obj["passthrough"][name] = t if control or not t.is_floating_point() else t.to(torch.float16)
            obj["dtypes"][name] = str(t.dtype).removeprefix("torch.")
            stats["float"] += t.numel()
            continue
        small = "tok_emb" not in name
        q, s = quantize_rows(t, INT6_MAX if small else INT8_MAX, moments.get(name))
        obj["quantized"][name] = q
        obj["scales"][name] = s
        obj["dtypes"][name] = str(t.dtype).removeprefix("torch.")
        stats["int6" if small else "int8"] += t.numel()
    return obj, stats


def dequantize_state_dict_mixed(obj: dict) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        out[name] = (q.float() * obj["scales"][name].float()[:, None]).to(dtype=dtype).contiguous()
    for name, t in obj["passthrough"].items():
        out[name] = t.to(dtype=getattr(torch, obj["dtypes"][name])).contiguous()
    return out


def pack_artifact(obj: dict) -> bytes:
    buf = io.BytesIO()
    torch.save(obj, buf)
    return zlib.compress(buf.getvalue(), level=9)


def unpack_artifact(blob: bytes) -> dict:
    return torch.load(io.BytesIO(zlib.decompress(blob)), map_location="cpu")


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
    # Reads shards sequentially and wraps around forever. Deterministic, no sampling.
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
    # Each call consumes a contiguous chunk from the shared token stream, then slices out one disjoint span per rank.
    # The extra "+1" token lets us build (x, y) by shifting.
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


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    # Keep small/control parameters in fp32 even when the model body runs in bf16.
    with torch.no_grad():
        for name, param in module.named_parameters():
            control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if (param.ndim < 2 or control) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Caches cos/sin tables per sequence length on the current device.
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
        q = self.c_q(x)
        v = self.c_v(x)
        if q_delta is not None:
            q = q + q_delta
        if v_delta is not None:
            v = v + v_delta
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
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


class Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int, rope_base: float, qk_gain_init: float
    ):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor, q_lora=None, v_lora=None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        n = self.attn_norm(x)
        q_delta = q_lora(n) if q_lora is not None else None
        v_delta = v_lora(n) if v_lora is not None else None
        attn_out = self.attn(n, q_delta, v_delta)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.vocab_size = args.vocab_size
        self.tied_embed_init_std = args.tied_embed_init_std
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
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
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)

    def _hidden(self, input_ids: Tensor, lora: BatchedTTTLoRA | None = None) -> Tensor:
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []

        # First half stores skips; second half reuses them in reverse order.
        for i in range(self.num_encoder_layers):
            q_lora, v_lora = (lora.q_loras[i], lora.v_loras[i]) if lora is not None else (None, None)
            x = self.blocks[i](x, x0, q_lora, v_lora)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            bi = self.num_encoder_layers + i
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            q_lora, v_lora = (lora.q_loras[bi], lora.v_loras[bi]) if lora is not None else (None, None)
            x = self.blocks[bi](x, x0, q_lora, v_lora)
        return self.final_norm(x)

    def forward_logits(self, input_ids: Tensor, lora: BatchedTTTLoRA | None = None) -> Tensor:
        x = self._hidden(input_ids, lora)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        if lora is not None:
            logits = logits + lora.lm_head_lora(x)
        return self.logit_softcap * torch.tanh(logits.float() / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# TEST-TIME TRAINING (LoRA)
# -----------------------------
#
# At evaluation each validation document gets low-rank adapters of its own. Documents are independent of each other;
# 64 of them are adapted at once by giving every weight of the adapters a batch dimension.


class BatchedLinearLoRA(nn.Module):
    """LoRA for a linear layer, with independent weights per batch element."""

    def __init__(self, bsz: int, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.in_features = in_features
        self.A = nn.Parameter(torch.empty(bsz, rank, in_features))  # down-projection
        self.B = nn.Parameter(torch.zeros(bsz, out_features, rank))  # up-projection
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.A.to(x.dtype).transpose(1, 2)) @ self.B.to(x.dtype).transpose(1, 2)

    def reset(self) -> None:
        bound = 1.0 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.A.uniform_(-bound, bound)  # kaiming-uniform
            self.B.zero_()


class BatchedTTTLoRA(nn.Module):
    """All LoRA adapters for one batch: LM head and Q/V per block."""

    def __init__(self, bsz: int, model: GPT, rank: int):
        super().__init__()
        dim = model.tok_emb.embedding_dim
        self.lm_head_lora = BatchedLinearLoRA(bsz, dim, model.vocab_size, rank)
        self.q_loras = nn.ModuleList()
        self.v_loras = nn.ModuleList()
        for block in model.blocks:
            self.q_loras.append(BatchedLinearLoRA(bsz, dim, block.attn.c_q.weight.shape[0], rank))
            self.v_loras.append(BatchedLinearLoRA(bsz, dim, block.attn.c_v.weight.shape[0], rank))

    def reset(self) -> None:
        for module in self.modules():
            if isinstance(module, BatchedLinearLoRA):
                module.reset()


def build_ttt_optimizer(lora: BatchedTTTLoRA, args: Hyperparameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(lora.parameters(), lr=args.ttt_lora_lr, betas=(args.beta1, args.beta2), eps=1e-10)


def reset_ttt_optimizer(opt: torch.optim.Optimizer) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            state = opt.state.get(p)
            if not state:
                continue
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
            state["step"].fill_(0)


class DocBigramCache:
    """Bigram counts of each document of the batch, over its chunks scored so far.

    The mixture is over whole distributions: the row of the previous token divided by its own sum. Its weight depends
    only on how often that previous token was seen.
    """

    def __init__(self, bsz: int, vocab_size: int, device: torch.device, weight: float, strength: float):
        self.counts = torch.zeros(bsz, vocab_size, vocab_size, device=device)
        self.doc = torch.arange(bsz, device=device)[:, None]
        self.weight = weight
        self.strength = strength

    def reset(self) -> None:
        self.counts.zero_()

    def mix(self, log_probs: Tensor, prev: Tensor) -> Tensor:
        rows = self.counts[self.doc, prev]
        seen = rows.sum(dim=-1, keepdim=True)
        lam = self.weight * seen / (seen + self.strength)
        cached = rows / seen.clamp_min(1.0)
        return torch.logaddexp(log_probs + torch.log1p(-lam), torch.log(lam * cached))

    def update(self, prev: Tensor, target: Tensor, valid: Tensor) -> None:
        vocab = self.counts.size(-1)
        flat = (self.doc * vocab + prev) * vocab + target
        self.counts.view(-1).index_add_(0, flat.reshape(-1), valid.reshape(-1).to(self.counts.dtype))


def find_docs(all_tokens: Tensor) -> list[tuple[int, int]]:
    """(start, length) of each document; a document reaches up to and includes the next BOS, so that every token is
    the target of exactly one document."""
    bos_positions = (all_tokens == BOS_ID).nonzero(as_tuple=True)[0].tolist()
    if not bos_positions or bos_positions[0] != 0:
        raise ValueError("validation tokens do not start with BOS")
    docs = []
    for i, start in enumerate(bos_positions):
        end = bos_positions[i + 1] + 1 if i + 1 < len(bos_positions) else all_tokens.numel()
        if end - start >= 2:
            docs.append((start, end - start))
    return docs


def compute_chunk_window(
    ci: int, pred_len: int, num_chunks: int, chunk_size: int, eval_seq_len: int
) -> tuple[int, int, int, int]:
    """(window start, window length, offset of the chunk in the window, chunk length) of a document's chunk."""
    chunk_start = ci * chunk_size
    chunk_end = pred_len if ci == num_chunks - 1 else (ci + 1) * chunk_size
    win_start = max(0, chunk_end - eval_seq_len)
    win_len = chunk_end - win_start
    chunk_offset = chunk_start - win_start
    chunk_len = chunk_end - chunk_start
    return win_start, win_len, chunk_offset, chunk_len


def take_chunk(t: Tensor, idx: Tensor) -> Tensor:
    """The chunk's positions of (batch, window) or (batch, window, vocab)."""
    if t.ndim == 3:
        return t.gather(1, idx[:, :, None].expand(-1, -1, t.size(-1)))
    return t.gather(1, idx)


def train_on_chunk(
    args: Hyperparameters,
    base_model: GPT,
    lora: BatchedTTTLoRA,
    opt: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    idx: Tensor,
    weight: Tensor,
) -> None:
    """Adam steps of the adapters on the mean loss of each document's chunk. weight: 0 where there is no next chunk."""
    for _ in range(args.ttt_epochs):
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = take_chunk(base_model.forward_logits(x, lora), idx)
        targets = take_chunk(y, idx)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        loss = ((nll * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)).sum()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()


def eval_val_ttt_lora(
    args: Hyperparameters,
    base_model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    eval_start: float,
) -> tuple[float, float, int]:
    """Score first, then train: chunk ci of a document is scored with adapters trained on its chunks < ci."""
    # Longest documents last; every rank takes each world_size-th, so that the ranks have equal work.
    docs = sorted(find_docs(val_tokens), key=lambda d: (d[1], d[0]))
    rank_docs = docs[rank::world_size]
    chunk_size = args.ttt_chunk_size
    vocab = base_model.vocab_size

    base_model.eval()
    for p in base_model.parameters():
        p.requires_grad_(False)
    for module in base_model.modules():
        if isinstance(module, Rotary):
            module._seq_len_cached = 0  # tables made in inference mode cannot be saved for backward

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    lora, opt, cache = None, None, None

    for start in range(0, len(rank_docs), args.ttt_batch_size):
        batch = rank_docs[start : start + args.ttt_batch_size]
        bsz = len(batch)
        if lora is None or lora.lm_head_lora.A.size(0) != bsz:
            lora = BatchedTTTLoRA(bsz, base_model, args.ttt_lora_rank).to(device)
            opt = build_ttt_optimizer(lora, args)
            cache = DocBigramCache(bsz, vocab, device, args.cache_weight, args.cache_strength)
        else:
            lora.reset()
            reset_ttt_optimizer(opt)
            cache.reset()

        pred_lens = [length - 1 for _, length in batch]
        num_chunks = [(pl + chunk_size - 1) // chunk_size for pl in pred_lens]
        for ci in range(max(num_chunks)):
            x = torch.zeros(bsz, args.eval_seq_len, dtype=torch.int64)
            y = torch.zeros(bsz, args.eval_seq_len, dtype=torch.int64)
            offsets, lengths, goes_on = [], [], []
            for b, (doc_start, _) in enumerate(batch):
                if ci >= num_chunks[b]:
                    offsets.append(0)
                    lengths.append(0)
                    goes_on.append(False)
                    continue
                ws, wl, offset, length = compute_chunk_window(
                    ci, pred_lens[b], num_chunks[b], chunk_size, args.eval_seq_len
                )
                window = val_tokens[doc_start + ws : doc_start + ws + wl + 1].to(dtype=torch.int64)
                x[b, :wl] = window[:-1]
                y[b, :wl] = window[1:]
                offsets.append(offset)
                lengths.append(length)
                goes_on.append(ci < num_chunks[b] - 1)
            x = x.to(device, non_blocking=True)
            y = y.to(device, non_blocking=True)
            steps = torch.arange(chunk_size, device=device)[None, :]
            idx = (torch.tensor(offsets, device=device)[:, None] + steps).clamp_max(args.eval_seq_len - 1)
            valid = steps < torch.tensor(lengths, device=device)[:, None]
            prev, target = take_chunk(x, idx), take_chunk(y, idx)

            # 1. score the chunk
            with torch.no_grad():
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = base_model.forward_logits(x, lora)
                log_probs = F.log_softmax(take_chunk(logits, idx).float(), dim=-1)
                log_probs = cache.mix(log_probs, prev)
                nll = -log_probs.gather(-1, target[..., None]).squeeze(-1)
                loss_sum += nll[valid].to(torch.float64).sum()
                token_count += valid.sum()
                byte_count += count_bytes(prev[valid], target[valid], luts).sum()
                cache.update(prev, target, valid)

            # 2. train on it, if the document goes on
            in_time = time.perf_counter() - eval_start < args.eval_adapt_seconds
            if any(goes_on) and in_time:
                weight = valid.float() * torch.tensor(goes_on, device=device)[:, None]
                train_on_chunk(args, base_model, lora, opt, x, y, idx, weight)

    if dist.is_available() and dist.is_initialized():
        for total in (loss_sum, token_count, byte_count):
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return *bits_per_byte(loss_sum, token_count, byte_count), int(token_count.item())


# -----------------------------
# SLIDING WINDOW (for the log, and the score if TTT is off)
# -----------------------------


def sliding_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored position) of windows over total predictions; each position is scored once."""
    windows = []
    done = 0
    while done < total:
        end = min(done + (seq_len if done == 0 else stride), total)
        windows.append((max(0, end - seq_len), end, done))
        done = end
    return windows


def eval_val_sliding(
    args: Hyperparameters,
    base_model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float, int]:
    seq_len = args.eval_seq_len
    windows = sliding_windows(val_tokens.numel() - 1, seq_len, args.eval_stride)
    mine = windows[(len(windows) * rank) // world_size : (len(windows) * (rank + 1)) // world_size]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    base_model.eval()
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False)
    with torch.inference_mode():
        for i in range(0, len(mine), args.sliding_batch):
            part = mine[i : i + args.sliding_batch]
            x = torch.zeros(args.sliding_batch, seq_len, dtype=torch.int64)
            y = torch.zeros(args.sliding_batch, seq_len, dtype=torch.int64)
            scored = torch.zeros(args.sliding_batch, seq_len, dtype=torch.bool)
            for b, (ws, we, first) in enumerate(part):
                window = val_tokens[ws : we + 1].to(dtype=torch.int64)
                x[b, : we - ws] = window[:-1]
                y[b, : we - ws] = window[1:]
                scored[b, first - ws : we - ws] = True
            x, y, scored = x.to(device), y.to(device), scored.to(device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none").view_as(y)
            loss_sum += nll[scored].to(torch.float64).sum()
            token_count += scored.sum()
            byte_count += count_bytes(x[scored], y[scored], luts).sum()

    if dist.is_available() and dist.is_initialized():
        for total in (loss_sum, token_count, byte_count):
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return *bits_per_byte(loss_sum, token_count, byte_count), int(token_count.item())


# -----------------------------
# WEIGHT AVERAGING
# -----------------------------


class EMA:
    """Exponential moving average of the parameters, in fp32, on the device."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.steps = 0
        self.shadow = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1.0 + self.steps) / (10.0 + self.steps))
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach().float(), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name].to(p.dtype))


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: Hyperparameters, base_model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    """Embedding and scalars: Adam. Matrices of the blocks: Muon."""
    matrix_params, scalar_params = [], [base_model.skip_weights]
    for name, p in base_model.blocks.named_parameters():
        control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
        (matrix_params if p.ndim == 2 and not control else scalar_params).append(p)
    optimizer_tok = torch.optim.Adam(
        [{"params": [base_model.tok_emb.weight], "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
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
    return [optimizer_tok, optimizer_muon, optimizer_scalar], optimizer_muon


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

    def log0(msg: str, console: bool = True) -> None:
        if not master_process:
            return
        if console:
            print(msg, flush=True)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)

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
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")
    log0(f"train_loader:shards pattern={args.train_files}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------
    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled_model, device_ids=[local_rank]) if distributed else compiled_model
    optimizers, optimizer_muon = build_optimizers(args, base_model)
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params} world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------
    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds
    train_budget_ms = max_wallclock_ms - 1000.0 * args.calib_reserve_seconds

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(train_budget_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

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

    # Warmup primes the compiled forward/backward/optimizer paths, then we restore the initial weights and the
    # optimizer state, and start the data over.
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for _ in range(args.warmup_steps):
            zero_grad_all()
            forward_backward()
            for opt in optimizers:
                opt.step()
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
        log0(f"warmup_steps:{args.warmup_steps} done")

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------
    ema = EMA(base_model, args.ema_decay)
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)
        if args.val_loss_every > 0 and step % args.val_loss_every == 0 and not last_step:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, model, rank, world_size, device, grad_accum_steps, val_tokens, luts)
            log0(f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_mul(step, elapsed_ms)
        zero_grad_all()
        train_loss = forward_backward()

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
        ema.update(base_model)

        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap.
        reached_cap = approx_ms >= train_budget_ms
        if distributed:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    ema.copy_to(base_model)

    # Calibration reads training data, so it runs on the training clock, in the seconds reserved for it.
    moments = collect_input_moments(args, base_model, train_loader, grad_accum_steps)
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"training and calibration took {training_time_ms:.0f}ms of {max_wallclock_ms:.0f}ms, {step} steps")
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # SERIALIZATION
    # -----------------------------
    quant_obj, quant_stats = quantize_state_dict_mixed(base_model.state_dict(), moments)
    if master_process:
        blob = pack_artifact(quant_obj)
        with open("final_model.mixed.ptz", "wb") as f:
            f.write(blob)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = len(blob) + code_bytes
        log0(f"Serialized model int6/int8+zlib: {len(blob)} bytes ({quant_stats})")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > SIZE_LIMIT:
            raise ValueError(f"submission is {total_bytes - SIZE_LIMIT} bytes over the limit")
    if distributed:
        dist.barrier()

    # -----------------------------
    # EVALUATION, from the packed file only
    # -----------------------------
    torch.cuda.synchronize()
    eval_start = time.perf_counter()
    with open("final_model.mixed.ptz", "rb") as f:
        quant_obj = unpack_artifact(f.read())
    base_model.load_state_dict(dequantize_state_dict_mixed(quant_obj), strict=True)

    q_loss, q_bpb = eval_val(args, model, rank, world_size, device, grad_accum_steps, val_tokens, luts)
    log0(f"roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f}")

    if args.sliding_eval or not args.ttt_enabled:
        t_slide = time.perf_counter()
        final_loss, final_bpb, scored = eval_val_sliding(args, base_model, rank, world_size, device, val_tokens, luts)
        log0(
            f"sliding_window stride:{args.eval_stride} val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} "
            f"tokens:{scored} eval_time:{1000.0 * (time.perf_counter() - t_slide):.0f}ms"
        )

    if args.ttt_enabled:
        t_ttt = time.perf_counter()
        final_loss, final_bpb, scored = eval_val_ttt_lora(
            args, base_model, rank, world_size, device, val_tokens, luts, eval_start
        )
        log0(
            f"ttt_lora rank:{args.ttt_lora_rank} chunk:{args.ttt_chunk_size} val_loss:{final_loss:.4f} "
            f"val_bpb:{final_bpb:.4f} tokens:{scored} eval_time:{1000.0 * (time.perf_counter() - t_ttt):.0f}ms"
        )

    torch.cuda.synchronize()
    log0(f"total evaluation time: {time.perf_counter() - eval_start:.1f}s")
    log0(f"final_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
