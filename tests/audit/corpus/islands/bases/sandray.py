"""
train_gpt.py: SP1024 / 9x512 baseline, plus

  * int6 quantisation-aware training (straight-through, per-row scales), zstd level 22 on the artifact
  * MLP 3x (the bytes that int6 buys back), SmearGate, BigramHash, orthogonal init
  * SWA over the warmdown
  * sliding window evaluation, stride 64
  * per-document LoRA test-time training (rank 8 on lm_head, q and v; chunks of 256 tokens)

Grown from the repository's train_gpt.py, most names are unchanged so that a diff against it stays readable.
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

    # Validation cadence and batch size.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 1000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
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
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 4096))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))

    # Optimizer hyperparameters.
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
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

    # SWA: equal-weight mean of snapshots taken while the lr scale is below swa_start_scale.
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.5))
    swa_every = int(os.environ.get("SWA_EVERY", 50))

    # Quantisation. The calibration pass (train tokens, forward only) is paid for out of the 600 seconds.
    qat_enabled = bool(int(os.environ.get("QAT_ENABLED", "1")))
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 8.0))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 12))
    calib_seqs = int(os.environ.get("CALIB_SEQS", 32))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))

    # Sliding window evaluation.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 1024))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 128))

    # Test-time training (LoRA) hyperparameters.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 8))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 0.01))
    ttt_chunk_size = int(os.environ.get("TTT_CHUNK_SIZE", 256))
    ttt_eval_seq_len = int(os.environ.get("TTT_EVAL_SEQ_LEN", 1024))
    ttt_batch_size = int(os.environ.get("TTT_BATCH_SIZE", 64))
    ttt_beta1 = float(os.environ.get("TTT_BETA1", 0.9))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.95))


BOS_ID = 1

# -----------------------------
# MUON OPTIMIZER
# -----------------------------
#
# As borrowed from modded-nanogpt


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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, nesterov=True, weight_decay=0.0):
        defaults = dict(lr=lr, momentum=momentum, backend_steps=backend_steps, nesterov=nesterov, weight_decay=weight_decay)
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
            weight_decay = group["weight_decay"]

            total_params = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total_params, device=params[0].device, dtype=torch.bfloat16)

            # Every rank orthogonalises its share of the matrices; the sum puts the shares together.
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
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if weight_decay > 0.0:
                    p.mul_(1.0 - lr * weight_decay)
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------
#
# It's common for small models to have a large fraction of their parameters be embeddings, since the 2 * d_model * d_vocab
# vectors can be gigantic. Instead of locking the tokenizer, the score is bits per byte, so we count the bytes of every
# target token out of the SentencePiece model.


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


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError(f"Validation split is too short: {tokens.numel()} tokens")
    return tokens


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
    # Validation computes two metrics:
    # - val_loss: token cross-entropy (natural log)
    # - val_bpb: tokenizer-agnostic compression metric used by the challenge
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    if local_batch_tokens < args.train_seq_len:
        raise ValueError("VAL_BATCH_SIZE must provide at least one sequence per rank")
    local_batch_seqs = local_batch_tokens // args.train_seq_len
    total_seqs = (val_tokens.numel() - 1) // args.train_seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    with torch.no_grad():
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
            prev_ids = x.reshape(-1)
            tgt_ids = y.reshape(-1)
            token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
            token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
            val_byte_count += token_bytes.to(torch.float64).sum()

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(val_loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_byte_count, op=dist.ReduceOp.SUM)

    val_loss = val_loss_sum / val_token_count
    bits_per_token = val_loss.item() / math.log(2.0)
    tokens_per_byte = val_token_count.item() / val_byte_count.item()
    model.train()
    return float(val_loss.item()), float(bits_per_token * tokens_per_byte)


# -----------------------------
# QUANTISATION (int6) AND ARTIFACT
# -----------------------------
#
# Matrices of the blocks go to 6 bits with one fp16 scale per row, the bigram table to 8 bits, the tied embedding stays
# fp16 (it is both input and output, and int6 hurts there). int6 values are stored one to a byte; zstd -22 finds
# the two idle bits again and usually more, since most rows are far from uniform.

CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights,smear",
    ).split(",")
    if pattern
)
INT6_MAX = 31
INT8_MAX = 127
INT8_NAME_PATTERNS = ("bigram.embed",)
FP16_NAME_PATTERNS = ("tok_emb",)
KEEP_FLOAT_MAX_NUMEL = 65_536
PER_ROW_SCALE_DTYPE = torch.float16
CLIP_GRID = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.72, 0.68)


def fake_quant_int6(w: Tensor) -> Tensor:
    # Straight-through: the forward sees the grid, the backward sees identity.
    with torch.no_grad():
        scale = w.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / INT6_MAX
        w_q = torch.clamp(torch.round(w / scale), -INT6_MAX, INT6_MAX) * scale
    return w + (w_q - w).detach()


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def quantize_rows(t: Tensor, qmax: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per-row symmetric quantisation. Every row picks the clip from CLIP_GRID with the least squared error, weighted by the
    mean square of the input channels where we have it."""
    t32 = t.float()
    weight = torch.ones(t32.size(1), device=t32.device) if moments is None else moments.to(t32.device, torch.float32)
    weight = weight / weight.mean().clamp_min(1e-12)
    amax = t32.abs().amax(dim=1).clamp_min(1e-8)
    best_err = torch.full_like(amax, float("inf"))
    best_scale = amax / qmax
    for clip in CLIP_GRID:
        scale = (amax * clip / qmax).to(PER_ROW_SCALE_DTYPE).float().clamp_min(1e-7)
        q = torch.clamp(torch.round(t32 / scale[:, None]), -qmax, qmax)
        err = ((q * scale[:, None] - t32).square() * weight[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    scale16 = best_scale.to(PER_ROW_SCALE_DTYPE)
    scale = scale16.float().clamp_min(1e-7)
    q = torch.clamp(torch.round(t32 / scale[:, None]), -qmax, qmax).to(torch.int8)
    return q.contiguous().cpu(), scale16.contiguous().cpu()


def quantize_state_dict_int6(state_dict: dict[str, Tensor], moments: dict[str, Tensor]) -> tuple[dict, dict]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    passthrough: dict[str, Tensor] = {}
    stats = dict(num_tensors=0, param_count=0, baseline_tensor_bytes=0, payload_bytes=0)

    for name, tensor in state_dict.items():
        t = tensor.detach()
        stats["num_tensors"] += 1
        stats["param_count"] += int(t.numel())
        stats["baseline_tensor_bytes"] += tensor_nbytes(t)

        if not t.is_floating_point():
            passthrough[name] = t.cpu().contiguous()
        elif any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            passthrough[name] = t.float().cpu().contiguous()
        elif any(pattern in name for pattern in FP16_NAME_PATTERNS) or t.ndim != 2:
            passthrough[name] = t.to(torch.float16).cpu().contiguous()
        elif t.numel() <= KEEP_FLOAT_MAX_NUMEL:
            passthrough[name] = t.to(torch.float16).cpu().contiguous()
        else:
            qmax = INT8_MAX if any(pattern in name for pattern in INT8_NAME_PATTERNS) else INT6_MAX
            q, s = quantize_rows(t, qmax, moments.get(name))
            quantized[name] = q
            scales[name] = s
            dtypes[name] = str(t.dtype).removeprefix("torch.")
            stats["payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)
            continue
        stats["payload_bytes"] += tensor_nbytes(passthrough[name])
        dtypes[name] = str(t.dtype).removeprefix("torch.")

    obj = dict(quantized=quantized, scales=scales, dtypes=dtypes, passthrough=passthrough)
    return {"__quant_format__": "int6_per_row_v1", **obj}, stats


def dequantize_state_dict_int6(obj: dict) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        s = obj["scales"][name].to(dtype=torch.float32).clamp_min(1e-7)
        out[name] = (q.float() * s.view(q.shape[0], 1)).to(dtype=dtype).contiguous()
    for name, t in obj["passthrough"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        out[name] = t.to(dtype=dtype).contiguous()
    return out


class ActMoments:
    """Mean square per input channel of every CastedLinear, gathered with forward pre-hooks."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.handles.append(module.register_forward_pre_hook(self._hook(f"{name}.weight", module)))

    def _hook(self, key: str, module: nn.Module):
        device = module.weight.device
        self.sums[key] = torch.zeros(module.in_features, device=device, dtype=torch.float32)
        self.rows[key] = torch.zeros((), device=device, dtype=torch.float32)

        def pre(_module, inputs):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            self.sums[key] += x.square().sum(dim=0)
            self.rows[key] += float(x.size(0))

        return pre

    def close(self) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        if dist.is_available() and dist.is_initialized():
            for key in sorted(self.sums):
                dist.all_reduce(self.sums[key], op=dist.ReduceOp.SUM)
                dist.all_reduce(self.rows[key], op=dist.ReduceOp.SUM)
        return {key: self.sums[key] / self.rows[key].clamp_min(1.0) for key in self.sums}


def collect_act_moments(
    args: Hyperparameters,
    model: nn.Module,
    train_loader: DistributedTokenLoader,
    world_size: int,
    deadline: float,
) -> tuple[dict[str, Tensor], int]:
    """Input statistics for the clip search, on the next training batches. Stops at the deadline (perf_counter seconds)."""
    model.eval()
    probe = ActMoments(model)
    done = 0
    with torch.no_grad():
        for _ in range(args.calib_batches):
            torch.cuda.synchronize()
            if time.perf_counter() >= deadline:
                break
            x, _ = train_loader.next_batch(args.calib_seqs * args.train_seq_len * world_size, args.train_seq_len, 1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                model.forward_logits(x)
            done += 1
    moments = probe.close()
    model.train()
    return moments, done


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
    # While training, the cast goes over the int6 grid, so that the export costs next to nothing.
    qat: bool = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.qat and self.training and w.ndim == 2:
            w = fake_quant_int6(w)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    # Keep small/control parameters in fp32 even when the model body runs in bf16.
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS)) and param.dtype != torch.float32:
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
        if (
            self._cos_cached is None
            or self._sin_cached is None
            or self._seq_len_cached != seq_len
            or self._cos_cached.device != device
        ):
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
            q = q + q_delta.to(q.dtype)
        if v_delta is not None:
            v = v + v_delta.to(v.dtype)
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        gqa = self.num_kv_heads != self.num_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=True, enable_gqa=gqa)
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
    """Blends every position with the one before it, one learned gate per channel. A document's first token (BOS) takes
    nothing from the document before."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -2.0, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(x.dtype)[None, None, :]
        prev = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        keep = (input_ids != BOS_ID).to(x.dtype)[:, :, None]
        return (1.0 - g) * x + g * (prev * keep)


class BigramHashEmbedding(nn.Module):
    """A learned vector for each hashed pair (previous token, token), projected to model_dim. The last bucket is for
    positions with no predecessor: the start of the window and BOS."""

    def __init__(self, buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = nn.Embedding(buckets, dim)
        self.proj = CastedLinear(dim, model_dim, bias=False)
        self.proj._zero_init = True
        nn.init.normal_(self.embed.weight, mean=0.0, std=0.02)

    def hash_pairs(self, input_ids: Tensor) -> Tensor:
        none = self.buckets - 1
        out = torch.full_like(input_ids, none)
        pair = torch.bitwise_xor(36313 * input_ids[:, 1:], 27191 * input_ids[:, :-1]) % none
        out[:, 1:] = pair
        return torch.where(input_ids == BOS_ID, torch.full_like(out, none), out)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.proj(self.embed(self.hash_pairs(input_ids)))


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

    def forward(self, x: Tensor, x0: Tensor, q_lora: nn.Module | None = None, v_lora: nn.Module | None = None) -> Tensor:
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
    def __init__(
        self,
        vocab_size: int,
        num_layers: int,
        model_dim: int,
        num_heads: int,
        num_kv_heads: int,
        mlp_mult: int,
        logit_softcap: float,
        rope_base: float,
        qk_gain_init: float,
        bigram_buckets: int,
        bigram_dim: int,
    ):
        super().__init__()
        if logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {logit_softcap}")
        self.logit_softcap = logit_softcap
        self.tok_emb = nn.Embedding(vocab_size, model_dim)
        self.bigram = BigramHashEmbedding(bigram_buckets, bigram_dim, model_dim)
        self.smear = SmearGate(model_dim)
        self.num_encoder_layers = num_layers // 2
        self.num_decoder_layers = num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, model_dim, dtype=torch.float32))
        shape = (model_dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init)
        self.blocks = nn.ModuleList([Block(*shape) for _ in range(num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=0.005)
        depth = len(self.blocks)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight)
                if name.endswith("mlp.fc"):
                    module.weight.data.mul_(1.0 / math.sqrt(2.0 * depth) * 3.0)

    def forward_logits(self, input_ids: Tensor, lora: nn.Module | None = None) -> Tensor:
        x = self.tok_emb(input_ids)
        x = x + self.bigram(input_ids).to(x.dtype)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, input_ids)
        x0 = x
        skips: list[Tensor] = []

        # First half stores skips; second half reuses them in reverse order.
        for i in range(self.num_encoder_layers):
            q_lora = lora.q_loras[i] if lora is not None else None
            v_lora = lora.v_loras[i] if lora is not None else None
            x = self.blocks[i](x, x0, q_lora, v_lora)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            bi = self.num_encoder_layers + i
            q_lora = lora.q_loras[bi] if lora is not None else None
            v_lora = lora.v_loras[bi] if lora is not None else None
            x = self.blocks[bi](x, x0, q_lora, v_lora)

        x = self.final_norm(x)
        logits_proj = F.linear(x, self.tok_emb.weight.to(x.dtype))
        if lora is not None:
            logits_proj = logits_proj + lora.lm_head_lora(x).to(logits_proj.dtype)
        return self.logit_softcap * torch.tanh(logits_proj.float() / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor, lora: nn.Module | None = None) -> Tensor:
        """Mean loss; with a LoRA, the loss of every token, shaped like target_ids."""
        logits = self.forward_logits(input_ids, lora)
        flat = logits.reshape(-1, logits.size(-1))
        if lora is not None:
            losses = F.cross_entropy(flat, target_ids.reshape(-1), reduction="none")
            return losses.reshape(target_ids.shape)
        return F.cross_entropy(flat, target_ids.reshape(-1), reduction="mean")


# -----------------------------
# SLIDING WINDOW EVALUATION
# -----------------------------


def build_windows(num_targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored target) of every window. Target i is token i + 1. The windows' scored parts are disjoint
    and cover 0..num_targets - 1; only the first window scores tokens with little context."""
    windows = []
    scored = 0
    while scored < num_targets:
        end = min(max(scored + stride, seq_len), num_targets)
        windows.append((max(0, end - seq_len), end, scored))
        scored = end
    return windows


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
) -> tuple[float, float]:
    seq_len = args.eval_seq_len
    num_targets = val_tokens.numel() - 1
    windows = build_windows(num_targets, seq_len, args.eval_stride)
    lo = (len(windows) * rank) // world_size
    hi = (len(windows) * (rank + 1)) // world_size
    my_windows = windows[lo:hi]

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    position = torch.arange(seq_len, device=device)[None, :]

    base_model.eval()
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False)
    with torch.no_grad():
        for bi in range(0, len(my_windows), args.eval_batch_seqs):
            batch = my_windows[bi : bi + args.eval_batch_seqs]
            # The last batch is padded up with empty rows, so that the compiled graph sees one shape only.
            x = torch.zeros(args.eval_batch_seqs, seq_len, dtype=torch.int64)
            y = torch.zeros(args.eval_batch_seqs, seq_len, dtype=torch.int64)
            first = torch.full((args.eval_batch_seqs,), seq_len, dtype=torch.int64)
            last = torch.zeros(args.eval_batch_seqs, dtype=torch.int64)
            for b, (start, end, scored) in enumerate(batch):
                toks = val_tokens[start : end + 1].to(torch.int64)
                x[b, : end - start] = toks[:-1]
                y[b, : end - start] = toks[1:]
                first[b] = scored - start
                last[b] = end - start
            x, y = x.to(device), y.to(device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                logits = logits_fn(x)
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").reshape(y.shape)
            mask = (position >= first.to(device)[:, None]) & (position < last.to(device)[:, None])
            loss_sum += nll.to(torch.float64)[mask].sum()
            token_count += mask.sum().to(torch.float64)
            tgt, prev = y[mask], x[mask]
            token_bytes = base_bytes_lut[tgt].to(torch.float64)
            token_bytes += (has_leading_space_lut[tgt] & ~is_boundary_token_lut[prev]).to(torch.float64)
            byte_count += token_bytes.sum()

    if dist.is_available() and dist.is_initialized():
        for t in (loss_sum, token_count, byte_count):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    if int(token_count.item()) != num_targets:
        raise RuntimeError(f"sliding window scored {int(token_count.item())} of {num_targets} targets")
    val_loss = loss_sum.item() / token_count.item()
    return val_loss, loss_sum.item() / math.log(2.0) / byte_count.item()


# -----------------------------
# TEST-TIME TRAINING (LoRA)
# -----------------------------
#
# At evaluation time a separate low-rank adaptor is fitted to every document, chunk by chunk: a chunk is scored first, then the
# adaptor takes one Adam step on that chunk's losses, then the next chunk is scored. The adaptor is reset
# between documents, so no document learns anything of another; batching them is only for speed.


class BatchedLinearLoRA(nn.Module):
    """LoRA for a linear layer, with independent weights per batch element. Computes x @ A^T @ B^T = x @ (BA)^T."""

    def __init__(self, bsz: int, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.in_features = in_features
        self.A = nn.Parameter(torch.empty(bsz, rank, in_features))  # down-projection
        self.B = nn.Parameter(torch.zeros(bsz, out_features, rank))  # up-projection
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.A.transpose(1, 2)) @ self.B.transpose(1, 2)  # (bsz, T, out)

    def reset(self) -> None:
        bound = 1.0 / math.sqrt(self.in_features)  # kaiming-uniform
        with torch.no_grad():
            self.A.uniform_(-bound, bound)
            self.B.zero_()


class BatchedTTTLoRA(nn.Module):
    """All LoRA adapters for one batch: LM head and Q/V per block."""

    def __init__(self, bsz: int, model: GPT, rank: int):
        super().__init__()
        dim = model.tok_emb.embedding_dim
        vocab = model.tok_emb.num_embeddings
        self.lm_head_lora = BatchedLinearLoRA(bsz, dim, vocab, rank)
        self.q_loras = nn.ModuleList()
        self.v_loras = nn.ModuleList()
        for block in model.blocks:
            self.q_loras.append(BatchedLinearLoRA(bsz, dim, block.attn.c_q.weight.shape[0], rank))
            self.v_loras.append(BatchedLinearLoRA(bsz, dim, block.attn.c_v.weight.shape[0], rank))

    def reset(self) -> None:
        for m in self.modules():
            if isinstance(m, BatchedLinearLoRA):
                m.reset()


def _reset_ttt_optimizer(opt: torch.optim.Optimizer) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            s = opt.state.get(p)
            if not s:  # Fresh state.
                continue
            s["exp_avg"].zero_()
            s["exp_avg_sq"].zero_()
            s["step"].fill_(0)


def _build_ttt_optimizer(lora: BatchedTTTLoRA, args: Hyperparameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(lora.parameters(), lr=args.ttt_lora_lr, betas=(args.ttt_beta1, args.ttt_beta2), eps=1e-10)


def _find_docs(all_tokens: Tensor) -> list[tuple[int, int]]:
    """(start, length) of every document. A document ends with the BOS of the next one, which is a target like any other, so
    that the documents' targets together are exactly the stream's."""
    bos = (all_tokens == BOS_ID).nonzero(as_tuple=True)[0].tolist()
    if not bos or bos[0] != 0:
        bos = [0] + bos
    docs = []
    for i, start in enumerate(bos):
        end = bos[i + 1] + 1 if i + 1 < len(bos) else all_tokens.numel()
        if end - start >= 2:
            docs.append((start, end - start))
    return docs


def _compute_chunk_window(
    ci: int, pred_len: int, num_chunks: int, chunk_size: int, eval_seq_len: int
) -> tuple[int, int, int, int]:
    """Return (win_start, win_len, chunk_offset, chunk_len) for chunk ci of a doc."""
    chunk_start = ci * chunk_size
    chunk_end = pred_len if ci == num_chunks - 1 else (ci + 1) * chunk_size
    win_start = max(0, chunk_end - eval_seq_len)
    win_len = chunk_end - win_start
    chunk_offset = chunk_start - win_start
    chunk_len = chunk_end - chunk_start
    return win_start, win_len, chunk_offset, chunk_len


def _accumulate_bpb(
    ptl: Tensor,
    x: Tensor,
    y: Tensor,
    batch_i: int,
    chunk_offset: int,
    chunk_len: int,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
    loss_sum: Tensor,
    byte_sum: Tensor,
    token_count: Tensor,
) -> None:
    """Add one doc-chunk's contribution to the running BPB accumulators."""
    lbl = ptl[batch_i, chunk_offset : chunk_offset + chunk_len].to(torch.float64)
    prev = x[batch_i, chunk_offset : chunk_offset + chunk_len]
    tgt = y[batch_i, chunk_offset : chunk_offset + chunk_len]
    tok_bytes = base_bytes_lut[tgt].to(torch.float64)
    tok_bytes += (has_leading_space_lut[tgt] & ~is_boundary_token_lut[prev]).to(torch.float64)
    loss_sum += lbl.sum()
    byte_sum += tok_bytes.sum()
    token_count += chunk_len


def _load_chunk_batch(
    all_tokens: Tensor,
    batch: list[tuple[int, int]],
    pred_lens: list[int],
    num_chunks: list[int],
    ci: int,
    context_size: int,
    args: Hyperparameters,
    device: torch.device,
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Window of chunk ci of every document, padded on the right; and where in it the chunk lies (0, 0: document is over)."""
    bsz = len(batch)
    x = torch.zeros(bsz, context_size, dtype=torch.int64)
    y = torch.zeros(bsz, context_size, dtype=torch.int64)
    doc_info: list[tuple[int, int]] = []
    for b in range(bsz):
        if ci >= num_chunks[b]:
            doc_info.append((0, 0))
            continue
        ds, _ = batch[b]
        ws, wl, co, cl = _compute_chunk_window(
            ci, pred_lens[b], num_chunks[b], args.ttt_chunk_size, args.ttt_eval_seq_len
        )
        toks = all_tokens[ds + ws : ds + ws + wl + 1].to(torch.int64)
        x[b, :wl] = toks[:-1]
        y[b, :wl] = toks[1:]
        doc_info.append((co, cl))
    return x.to(device), y.to(device), doc_info


def eval_val_ttt_lora(
    args: Hyperparameters,
    base_model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
) -> tuple[float, float]:
    """Evaluate with batched LoRA test-time training. Returns (val_loss, val_bpb)."""
    docs = _find_docs(val_tokens)
    chunk_size = args.ttt_chunk_size
    eval_seq_len = args.ttt_eval_seq_len
    batch_size = args.ttt_batch_size
    lora_rank = args.ttt_lora_rank

    # Documents of one length share a batch, or most of the batch would be padding. Batches go round-robin to the ranks.
    docs.sort(key=lambda d: (d[1] - 2) // chunk_size)
    batches = [docs[i : i + batch_size] for i in range(0, len(docs), batch_size)]
    rank_batches = batches[rank::world_size]

    base_model.eval()
    for p in base_model.parameters():
        p.requires_grad_(False)

    lora = BatchedTTTLoRA(batch_size, base_model, lora_rank).to(device)
    opt = _build_ttt_optimizer(lora, args)

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    byte_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)

    for batch in rank_batches:
        bsz = len(batch)
        if bsz == batch_size:
            cur_lora, cur_opt = lora, opt
            cur_lora.reset()
            _reset_ttt_optimizer(cur_opt)
        else:
            cur_lora = BatchedTTTLoRA(bsz, base_model, lora_rank).to(device)
            cur_opt = _build_ttt_optimizer(cur_lora, args)

        pred_lens = [doc_len - 1 for _, doc_len in batch]
        num_chunks = [(pl + chunk_size - 1) // chunk_size for pl in pred_lens]
        max_nc = max(num_chunks)

        for ci in range(max_nc):
            # Shape of the window of a full chunk ci; a document's last chunk may be shorter, never longer.
            _, context_size, chunk_offset, _ = _compute_chunk_window(
                ci, (ci + 1) * chunk_size, ci + 1, chunk_size, eval_seq_len
            )
            active = [ci < nc for nc in num_chunks]
            needs_train = any(ci < nc - 1 for nc in num_chunks)
            x, y, doc_info = _load_chunk_batch(val_tokens, batch, pred_lens, num_chunks, ci, context_size, args, device)

            # Forward pass (keep grad graph alive only when we need to train)
            with torch.set_grad_enabled(needs_train):
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    ptl = base_model(x, y, lora=cur_lora)

            # Score: accumulate loss and byte counts for BPB before training on chunk
            with torch.no_grad():
                for b in range(bsz):
                    if not active[b]:
                        continue
                    co, cl = doc_info[b]
                    luts = (base_bytes_lut, has_leading_space_lut, is_boundary_token_lut)
                    _accumulate_bpb(ptl, x, y, b, co, cl, *luts, loss_sum, byte_sum, token_count)

            # Train: one Adam step on the LoRA params using this chunk's loss. Documents in their last chunk are masked out.
            if needs_train:
                mask = torch.tensor([float(ci < nc - 1) for nc in num_chunks], device=device)
                per_doc = ptl[:, chunk_offset : chunk_offset + chunk_size].mean(dim=-1)
                cur_opt.zero_grad(set_to_none=True)
                (per_doc * mask).sum().backward()
                cur_opt.step()

    if dist.is_available() and dist.is_initialized():
        for t in (loss_sum, byte_sum, token_count):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    if int(token_count.item()) != val_tokens.numel() - 1:
        raise RuntimeError(f"TTT scored {int(token_count.item())} of {val_tokens.numel() - 1} targets")
    val_loss = loss_sum.item() / token_count.item()
    val_bpb = loss_sum.item() / math.log(2.0) / byte_sum.item()
    return val_loss, val_bpb


# -----------------------------
# STOCHASTIC WEIGHT AVERAGING
# -----------------------------


class WeightAverage:
    """Equal-weight running mean of the parameters, in fp32 on the GPU."""

    def __init__(self):
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        self.count += 1
        for name, t in model.state_dict().items():
            if not t.is_floating_point():
                continue
            if name not in self.mean:
                self.mean[name] = t.detach().float().clone()
            else:
                self.mean[name].lerp_(t.detach().float(), 1.0 / self.count)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            if name in self.mean:
                t.copy_(self.mean[name].to(t.dtype))


def compress_artifact(obj: dict, level: int) -> tuple[bytes, int]:
    buf = io.BytesIO()
    torch.save(obj, buf)
    raw = buf.getvalue()
    return zstandard.ZstdCompressor(level=level).compress(raw), len(raw)


def decompress_artifact(blob: bytes) -> dict:
    raw = zstandard.ZstdDecompressor().decompress(blob)
    return torch.load(io.BytesIO(raw), map_location="cpu")


# -----------------------------
# TRAINING
# -----------------------------


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
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    if int(sp.bos_id()) != BOS_ID:
        raise ValueError(f"BOS_ID={BOS_ID} does not match tokenizer bos_id={int(sp.bos_id())}")
    dataset_dir = Path(args.data_path).resolve()
    actual_train_files = len(list(dataset_dir.glob("fineweb_train_*.bin")))
    val_tokens = load_validation_tokens(args.val_files)
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = build_sentencepiece_luts(sp, args.vocab_size, device)
    luts = (base_bytes_lut, has_leading_space_lut, is_boundary_token_lut)
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{dataset_dir.name} train_shards:{actual_train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    def build_model() -> GPT:
        gpt = GPT(
            vocab_size=args.vocab_size,
            num_layers=args.num_layers,
            model_dim=args.model_dim,
            num_heads=args.num_heads,
            num_kv_heads=args.num_kv_heads,
            mlp_mult=args.mlp_mult,
            logit_softcap=args.logit_softcap,
            rope_base=args.rope_base,
            qk_gain_init=args.qk_gain_init,
            bigram_buckets=args.bigram_buckets,
            bigram_dim=args.bigram_dim,
        )
        gpt = gpt.to(device).bfloat16()
        for module in gpt.modules():
            if isinstance(module, CastedLinear):
                module.float()
            if isinstance(module, Rotary):
                module.inv_freq.data = module.inv_freq.data.float()
        restore_low_dim_params_to_fp32(gpt)
        return gpt

    CastedLinear.qat = args.qat_enabled
    base_model = build_model()
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )

    # Optimizer split:
    # - token and bigram embeddings (Adam) use EMBED_LR
    # - matrix params in transformer blocks and the bigram projection use MATRIX_LR via Muon
    # - vectors/scalars use SCALAR_LR via Adam
    block_named_params = list(base_model.blocks.named_parameters())
    matrix_params = [
        p
        for name, p in block_named_params
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    matrix_params.append(base_model.bigram.proj.weight)
    scalar_params = [
        p
        for name, p in block_named_params
        if p.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    scalar_params.append(base_model.skip_weights)
    scalar_params.append(base_model.smear.gate)
    optimizer_tok = torch.optim.AdamW(
        [{"params": [base_model.tok_emb.weight, base_model.bigram.embed.weight], "lr": args.embed_lr, "base_lr": args.embed_lr}],
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
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
    log0(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads} mlp_mult:{args.mlp_mult}")
    log0(
        f"embed_lr:{args.embed_lr} matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr} "
        f"muon_wd:{args.muon_weight_decay} qat:{args.qat_enabled} swa:{args.swa_enabled}"
    )
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f} calib_reserve_seconds:{args.calib_reserve_seconds:.3f}"
    )
    log0(f"seed:{args.seed}")

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None
    # The gradient steps stop early by what the calibration may take; both end before max_wallclock_ms.
    train_budget_ms = max_wallclock_ms - 1000.0 * args.calib_reserve_seconds if max_wallclock_ms is not None else None

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        if train_budget_ms is None:
            warmdown_start = max(args.iterations - args.warmdown_iters, 0)
            if warmdown_start <= step < args.iterations:
                return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(train_budget_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # Warmup primes the compiled forward/backward/optimizer paths, then we restore the
    # initial weights/optimizer state so measured training starts from the true init.
    if args.warmup_steps > 0:
        initial_model_state = {name: tensor.detach().cpu().clone() for name, tensor in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            zero_grad_all()
            for micro_step in range(grad_accum_steps):
                if distributed:
                    model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
                x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    warmup_loss = model(x, y)
                (warmup_loss * grad_scale).backward()
            for opt in optimizers:
                opt.step()
            zero_grad_all()
            if args.warmup_steps <= 20 or (warmup_step + 1) % 10 == 0 or warmup_step + 1 == args.warmup_steps:
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

    training_time_ms = 0.0
    stop_after_step: int | None = None
    swa = WeightAverage()
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        should_validate = last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0)
        if should_validate:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, model, rank, world_size, device, grad_accum_steps, val_tokens, *luts)
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
        scale = lr_mul(step, elapsed_ms)
        zero_grad_all()
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

        step += 1
        if args.swa_enabled and scale < args.swa_start_scale and step % args.swa_every == 0:
            swa.add(base_model)

        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        should_log_train = args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0)
        if should_log_train:
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap.
        reached_cap = train_budget_ms is not None and approx_training_time_ms >= train_budget_ms
        if distributed and train_budget_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # -----------------------------
    # SWA + CALIBRATION (still on the training clock)
    # -----------------------------

    torch.cuda.synchronize()
    t0 = time.perf_counter()
    if swa.count > 0:
        swa.copy_to(base_model)
        log0(f"swa: averaged {swa.count} snapshots")
    if max_wallclock_ms is not None:
        deadline = t0 + (max_wallclock_ms - training_time_ms) / 1000.0 - 0.5
    else:
        deadline = float("inf")
    moments, calib_done = collect_act_moments(args, base_model, train_loader, world_size, deadline)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t0)
    log0(
        f"calibration: {calib_done} batches of train tokens took {calib_ms:.0f}ms, "
        f"train+calibration {training_time_ms + calib_ms:.0f}ms"
    )

    # -----------------------------
    # SERIALIZATION + ROUNDTRIP VALIDATION
    # -----------------------------

    quant_obj, quant_stats = quantize_state_dict_int6(base_model.state_dict(), moments)
    if master_process:
        quant_blob, quant_raw_bytes = compress_artifact(quant_obj, args.zstd_level)
        with open("final_model.int6.ptz", "wb") as f:
            f.write(quant_blob)
        quant_file_bytes = os.path.getsize("final_model.int6.ptz")
        code_bytes = len(code.encode("utf-8"))
        ratio = quant_stats["baseline_tensor_bytes"] / max(quant_stats["payload_bytes"], 1)
        log0(
            f"Serialized model int6+zstd: {quant_file_bytes} bytes "
            f"(payload:{quant_stats['payload_bytes']} raw_torch:{quant_raw_bytes} payload_ratio:{ratio:.2f}x)"
        )
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size int6+zstd: {quant_file_bytes + code_bytes} bytes")
        if quant_file_bytes + code_bytes > 16_000_000:
            raise RuntimeError("submission is larger than 16,000,000 bytes")

    if distributed:
        dist.barrier()

    # From here on only the artifact counts: a fresh model, filled from the file.
    t_eval_start = time.perf_counter()
    del model, compiled_model, optimizers, optimizer_tok, optimizer_muon, optimizer_scalar
    base_model = None
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    with open("final_model.int6.ptz", "rb") as f:
        quant_blob_disk = f.read()
    quant_state = decompress_artifact(quant_blob_disk)
    eval_model = build_model()
    eval_model.load_state_dict(dequantize_state_dict_int6(quant_state), strict=True)
    CastedLinear.qat = False
    eval_model.eval()

    torch.cuda.synchronize()
    t_qeval = time.perf_counter()
    q_val_loss, q_val_bpb = eval_val(args, eval_model, rank, world_size, device, grad_accum_steps, val_tokens, *luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_zstd_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_qeval):.0f}ms"
    )
    log0(f"final_int6_zstd_roundtrip_exact val_loss:{q_val_loss:.8f} val_bpb:{q_val_bpb:.8f}")

    torch.cuda.synchronize()
    t_slide = time.perf_counter()
    sw_val_loss, sw_val_bpb = eval_val_sliding(args, eval_model, rank, world_size, device, val_tokens, *luts)
    torch.cuda.synchronize()
    log0(
        f"final_sliding_window val_loss:{sw_val_loss:.4f} val_bpb:{sw_val_bpb:.4f} stride:{args.eval_stride} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_slide):.0f}ms"
    )
    log0(f"final_sliding_window_exact val_loss:{sw_val_loss:.8f} val_bpb:{sw_val_bpb:.8f}")

    # LoRA test-time training evaluation (the competition score)
    if args.ttt_enabled:
        torch._dynamo.reset()
        torch.cuda.synchronize()
        t_ttt = time.perf_counter()
        ttt_val_loss, ttt_val_bpb = eval_val_ttt_lora(args, eval_model, rank, world_size, device, val_tokens, *luts)
        torch.cuda.synchronize()
        log0(
            f"final_ttt_lora val_loss:{ttt_val_loss:.4f} val_bpb:{ttt_val_bpb:.4f} "
            f"lora_rank:{args.ttt_lora_rank} chunk_size:{args.ttt_chunk_size} "
            f"eval_time:{1000.0 * (time.perf_counter() - t_ttt):.0f}ms"
        )
        log0(f"final_ttt_lora_exact val_loss:{ttt_val_loss:.8f} val_bpb:{ttt_val_bpb:.8f}")
    log0(f"eval_total_time:{1000.0 * (time.perf_counter() - t_eval_start):.0f}ms")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
