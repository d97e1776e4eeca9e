"""
Fork of the challenge baseline `train_gpt.py`. Diff against it:
  * 10 layers, MLP 3x, int6 rows + lzma instead of int8 + zlib
  * one MTP head while training (dropped before packing)
  * late QAT, EMA of the weights
  * sliding-window evaluation (stride 64) and the same with score-first TTT
Everything counted lives in this file.
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
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 2600))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    # Part of the cap kept back for the activation statistics that the quantiser reads.
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 12.0))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 16))
    calib_batch_seqs = int(os.environ.get("CALIB_BATCH_SEQS", 32))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 10))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))

    # Multi-token prediction, training only.
    mtp_num_heads = int(os.environ.get("MTP_NUM_HEADS", 1))
    mtp_loss_weight = float(os.environ.get("MTP_LOSS_WEIGHT", 0.15))

    # Optimizer.
    embed_lr = float(os.environ.get("EMBED_LR", 0.6))
    head_lr = float(os.environ.get("HEAD_LR", 0.008))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.88))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 900))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.03))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # EMA and QAT.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    qat_lr_scale = float(os.environ.get("QAT_LR_SCALE", 0.12))
    quant_levels = int(os.environ.get("QUANT_LEVELS", 31))

    # Evaluation.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 4))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    # After so many seconds of evaluation TTT stops adapting and only scores.
    eval_adapt_seconds = float(os.environ.get("EVAL_ADAPT_SECONDS", 520.0))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------
#
# As borrowed by the baseline from modded-nanogpt, plus decoupled weight decay.
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
                p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------
#
# BPB (bits per byte) needs the UTF-8 bytes that each token stands for. A piece's leading mark is one space,
# which is only there when the token before is not a boundary (control, unknown) token.


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


def count_token_bytes(luts: tuple[Tensor, Tensor, Tensor], prev_ids: Tensor, tgt_ids: Tensor) -> Tensor:
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
    return token_bytes.to(torch.float64)


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*.
    return torch.cat([load_data_shard(file) for file in files]).to(torch.int32).contiguous()


def reduce_to_bpb(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    # Sums over ranks -> (nats per token, bits per byte).
    if dist.is_available() and dist.is_initialized():
        for total in (loss_sum, token_count, byte_count):
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
    val_loss = loss_sum.item() / token_count.item()
    bits_per_token = val_loss / math.log(2.0)
    tokens_per_byte = token_count.item() / byte_count.item()
    return val_loss, bits_per_token * tokens_per_byte


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
    # Plain validation in disjoint sequences: the figure of the training log.
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
            val_byte_count += count_token_bytes(luts, x.reshape(-1), y.reshape(-1)).sum()

    result = reduce_to_bpb(val_loss_sum, val_token_count, val_byte_count)
    model.train()
    return result


# -----------------------------
# SLIDING-WINDOW EVALUATION
# -----------------------------


def sliding_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    # (start, first scored position, end) over the `total` positions that have a target. The first window
    # scores all of itself, each later one only what the window before it did not reach.
    windows = [(0, 0, min(seq_len, total))]
    while windows[-1][2] < total:
        scored_to = windows[-1][2]
        end = min(scored_to + stride, total)
        windows.append((max(end - seq_len, 0), scored_to, end))
    return windows


def gather_windows(
    val_tokens: Tensor, batch: list[tuple[int, int, int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    x = torch.stack([val_tokens[ws:we] for ws, _, we in batch])
    y = torch.stack([val_tokens[ws + 1 : we + 1] for ws, _, we in batch])
    return (
        x.to(device=device, dtype=torch.int64, non_blocking=True),
        y.to(device=device, dtype=torch.int64, non_blocking=True),
    )


def eval_val_sliding(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    seq_len = args.train_seq_len
    total = val_tokens.numel() - 1
    windows = sliding_windows(total, seq_len, args.eval_stride)
    mine = windows[(len(windows) * rank) // world_size : (len(windows) * (rank + 1)) // world_size]
    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    compiled_logits = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    with torch.no_grad():
        for bi in range(0, len(mine), args.eval_batch_seqs):
            batch = mine[bi : bi + args.eval_batch_seqs]
            x, y = gather_windows(val_tokens, batch, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = compiled_logits(x)
            nll = F.cross_entropy(
                logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction="none"
            ).reshape(y.shape)
            for i, (ws, first, we) in enumerate(batch):
                span = slice(first - ws, we - ws)
                val_loss_sum += nll[i, span].to(torch.float64).sum()
                val_token_count += float(we - first)
                val_byte_count += count_token_bytes(luts, x[i, span], y[i, span]).sum()

    result = reduce_to_bpb(val_loss_sum, val_token_count, val_byte_count)
    if int(val_token_count.item()) != total:
        raise RuntimeError(f"sliding eval scored {int(val_token_count.item())} of {total} tokens")
    return result


def eval_val_sliding_ttt(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    eval_t0: float,
    log0=print,
) -> tuple[float, float]:
    # Score-first TTT: all windows of a chunk are scored with the weights as the chunks before it left them; only
    # then is the chunk trained on. The losses are summed when first computed and never touched again.
    seq_len = args.train_seq_len
    total = val_tokens.numel() - 1
    chunk_tokens = args.ttt_chunk_tokens
    num_chunks = (total + chunk_tokens - 1) // chunk_tokens
    chunk_windows: list[list[tuple[int, int, int]]] = [[] for _ in range(num_chunks)]
    for window in sliding_windows(total, seq_len, args.eval_stride):
        chunk_windows[window[1] // chunk_tokens].append(window)

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    frozen = tuple(f"blocks.{i}." for i in range(args.ttt_freeze_blocks))
    ttt_params = []
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen) if frozen else True)
        if p.requires_grad:
            ttt_params.append(p)
    optimizer = torch.optim.SGD(ttt_params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    log0(f"ttt:chunks:{num_chunks} params:{sum(p.numel() for p in ttt_params)} lr:{args.ttt_lr}")

    compiled_logits = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    adapting = True
    for ci in range(num_chunks):
        windows = chunk_windows[ci]
        mine = windows[(len(windows) * rank) // world_size : (len(windows) * (rank + 1)) // world_size]

        # 1. Score.
        model.eval()
        with torch.no_grad():
            for bi in range(0, len(mine), args.eval_batch_seqs):
                batch = mine[bi : bi + args.eval_batch_seqs]
                x, y = gather_windows(val_tokens, batch, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = compiled_logits(x)
                flat_logits = logits.reshape(-1, logits.size(-1)).float()
                nll = F.cross_entropy(flat_logits, y.reshape(-1), reduction="none").reshape(y.shape)
                for i, (ws, first, we) in enumerate(batch):
                    span = slice(first - ws, we - ws)
                    tgt, prev = y[i, span], x[i, span]
                    loss_sum += nll[i, span].to(torch.float64).sum()
                    token_count += float(we - first)
                    byte_count += count_token_bytes(luts, prev, tgt).sum()

        # 2. Train on the chunk just scored. Nothing is left to score after the last one.
        over = torch.tensor(float(time.perf_counter() - eval_t0 > args.eval_adapt_seconds), device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(over, op=dist.ReduceOp.MAX)
        if adapting and over.item() > 0:
            adapting = False
            log0(f"ttt:adaptation stops at chunk:{ci + 1}/{num_chunks}, time is up")
        if ci == num_chunks - 1 or not adapting:
            continue
        chunk_lr = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
        for group in optimizer.param_groups:
            group["lr"] = chunk_lr
        ttt_train_chunk(args, model, optimizer, ttt_params, rank, world_size, device, val_tokens, ci)
        if ci % 200 == 0:
            log0(f"ttt:chunk:{ci + 1}/{num_chunks} lr:{chunk_lr:.6f} time:{time.perf_counter() - eval_t0:.1f}s")

    result = reduce_to_bpb(loss_sum, token_count, byte_count)
    if int(token_count.item()) != total:
        raise RuntimeError(f"ttt eval scored {int(token_count.item())} of {total} tokens")
    return result


def ttt_train_chunk(
    args: Hyperparameters,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    ttt_params: list[Tensor],
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    ci: int,
) -> None:
    # SGD over the whole sequences of chunk ci, split over the ranks, gradients averaged.
    seq_len = args.train_seq_len
    chunk_start = ci * args.ttt_chunk_tokens
    chunk_end = chunk_start + args.ttt_chunk_tokens
    num_seqs = (chunk_end - chunk_start) // seq_len
    group_seqs = args.ttt_batch_seqs * world_size
    model.train()
    for _ in range(args.ttt_epochs):
        for seq0 in range(0, num_seqs, group_seqs):
            count = min(group_seqs, num_seqs - seq0)
            seq_a = seq0 + (count * rank) // world_size
            seq_b = seq0 + (count * (rank + 1)) // world_size
            optimizer.zero_grad(set_to_none=False)
            if seq_b > seq_a:
                a = chunk_start + seq_a * seq_len
                b = chunk_start + seq_b * seq_len
                local = val_tokens[a : b + 1].to(device=device, dtype=torch.int64)
                x = local[:-1].reshape(-1, seq_len)
                y = local[1:].reshape(-1, seq_len)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x, y)
                (loss * (seq_b - seq_a) / count).backward()
            for p in ttt_params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(ttt_params, args.ttt_grad_clip)
            optimizer.step()


# -----------------------------
# POST-TRAINING QUANTIZATION (int6 rows + lzma)
# -----------------------------
#
# Matrices are stored as int8 holding 6-bit values (-31..31) with one fp16 scale per row; lzma squeezes out the unused
# bits. Each row's clip is the one of a few percentiles with the least error, inputs weighted by their mean square on
# training text. Small and control tensors stay in fp16 / fp32.

CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights",
    ).split(",")
    if pattern
)
INT6_KEEP_FLOAT_MAX_NUMEL = 65_536
INT6_KEEP_FLOAT_STORE_DTYPE = torch.float16
INT6_PER_ROW_SCALE_DTYPE = torch.float16
INT6_CLIP_QUANTILES = (0.995, 0.998, 0.999, 0.9995, 1.0)
EMBED_LEVELS = 127  # the tied embedding stays int8


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def keep_float_tensor(name: str, t: Tensor) -> Tensor:
    if any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
        return t.float().contiguous()
    return t.to(dtype=INT6_KEEP_FLOAT_STORE_DTYPE).contiguous()


def quantize_rows(t: Tensor, levels: int, input_sq: Tensor | None) -> tuple[Tensor, Tensor]:
    t32 = t.float()
    weight = torch.ones(t32.size(1), device=t32.device) if input_sq is None else input_sq.to(t32.device)
    best_err = torch.full((t32.size(0),), float("inf"), device=t32.device)
    best_q = torch.zeros_like(t32, dtype=torch.int8)
    best_scale = torch.ones(t32.size(0), device=t32.device)
    magnitude = t32.abs()
    for quantile in INT6_CLIP_QUANTILES:
        clip_abs = torch.quantile(magnitude, quantile, dim=1)
        scale = (clip_abs / levels).clamp_min(1e-7).to(INT6_PER_ROW_SCALE_DTYPE).float().clamp_min(1e-7)
        q = torch.clamp(torch.round(t32 / scale[:, None]), -levels, levels)
        err = ((t32 - q * scale[:, None]).square() * weight[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_q = torch.where(better[:, None], q.to(torch.int8), best_q)
        best_scale = torch.where(better, scale, best_scale)
    return best_q.contiguous(), best_scale.to(INT6_PER_ROW_SCALE_DTYPE).contiguous()


def quantize_state_dict_int6(
    state_dict: dict[str, Tensor], input_stats: dict[str, Tensor], levels: int
) -> tuple[dict[str, object], dict[str, int]]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    passthrough: dict[str, Tensor] = {}
    stats = dict.fromkeys(("param_count", "num_tensors", "baseline_tensor_bytes", "int6_payload_bytes"), 0)

    for name, tensor in state_dict.items():
        t = tensor.detach()
        stats["param_count"] += int(t.numel())
        stats["num_tensors"] += 1
        stats["baseline_tensor_bytes"] += tensor_nbytes(t)
        if not t.is_floating_point() or t.ndim != 2 or t.numel() <= INT6_KEEP_FLOAT_MAX_NUMEL:
            kept = keep_float_tensor(name, t) if t.is_floating_point() else t
            passthrough[name] = kept.cpu()
            stats["int6_payload_bytes"] += tensor_nbytes(kept)
            continue
        row_levels = EMBED_LEVELS if name.startswith("tok_emb") else levels
        q, s = quantize_rows(t, row_levels, input_stats.get(name))
        quantized[name] = q.cpu()
        scales[name] = s.cpu()
        dtypes[name] = str(t.dtype).removeprefix("torch.")
        stats["int6_payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)

    obj: dict[str, object] = {
        "__quant_format__": "int6_clean_per_row_v1",
        "quantized": quantized,
        "scales": scales,
        "dtypes": dtypes,
        "passthrough": passthrough,
    }
    return obj, stats


def dequantize_state_dict_int6(obj: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        out[name] = (q.float() * obj["scales"][name].float()[:, None]).to(dtype=dtype).contiguous()
    for name, t in obj["passthrough"].items():
        out[name] = t.detach().cpu().contiguous()
    return out


def collect_input_stats(
    args: Hyperparameters, model: GPT, loader: DistributedTokenLoader, world_size: int
) -> dict[str, Tensor]:
    # Mean square of every linear layer's inputs over a few batches of training text.
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and not name.startswith("mtp_heads"):
            key = f"{name}.weight"

            def hook(_module, inputs, _output, key=key):
                sq = inputs[0].detach().float().square().reshape(-1, inputs[0].size(-1)).mean(dim=0)
                sums[key] = sums[key] + sq if key in sums else sq

            hooks.append(module.register_forward_hook(hook))
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(args.calib_batches):
            x, _ = loader.next_batch(args.calib_batch_seqs * args.train_seq_len * world_size, args.train_seq_len, 1)
            model.forward_logits(x)
    for handle in hooks:
        handle.remove()
    model.train(was_training)
    for key in sorted(sums):
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums[key], op=dist.ReduceOp.AVG)
        sums[key] = (sums[key] / sums[key].mean().clamp_min(1e-12)).clamp_min(1e-3)
    return sums


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
    # Reads shards sequentially and wraps around forever. The training loop therefore has deterministic, simple
    # streaming behavior with no sampling or workers.
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
    # Keep weights in fp32 for optimizer/state quality, cast at matmul time for bf16 compute. With `qat_levels` set,
    # the forward pass sees rows rounded as the packed model will have them; gradients go straight through.
    qat_levels: int = 0

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.qat_levels > 0 and self.training:
            scale = (w.detach().abs().amax(dim=1, keepdim=True) / self.qat_levels).clamp_min(1e-7)
            w = w + (torch.round(w / scale) * scale - w).detach()
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w.to(x.dtype), bias)


def set_qat(model: nn.Module, levels: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and "mtp_heads" not in name:
            module.qat_levels = levels


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    # Keep small/control parameters in fp32 even when the model body runs in bf16.
    with torch.no_grad():
        for name, param in module.named_parameters():
            is_control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if (param.ndim < 2 or is_control) and param.dtype != torch.float32:
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

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x))
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters, mtp_num_heads: int):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.tie_embeddings = args.tie_embeddings
        self.tied_embed_init_std = args.tied_embed_init_std
        self.logit_softcap = args.logit_softcap
        self.mtp_loss_weight = args.mtp_loss_weight
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
        self.lm_head = None if args.tie_embeddings else CastedLinear(args.model_dim, args.vocab_size, bias=False)
        if self.lm_head is not None:
            self.lm_head._zero_init = True
        # Head k predicts the token k+2 ahead. Training only: never packed, and absent from the evaluated model.
        self.mtp_heads = nn.ModuleList(
            [CastedLinear(args.model_dim, args.vocab_size, bias=False) for _ in range(mtp_num_heads)]
        )
        for head in self.mtp_heads:
            head._zero_init = True
        self._init_weights()

    def _init_weights(self) -> None:
        if self.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        # First half stores skips; second half reuses them in reverse order.
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0)
        return self.final_norm(x)

    def project(self, x: Tensor) -> Tensor:
        logits_proj = F.linear(x, self.tok_emb.weight.to(x.dtype)) if self.tie_embeddings else self.lm_head(x)
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.project(self.hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        x = self.hidden(input_ids)
        logits = self.project(x)
        loss = F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1), reduction="mean")
        if self.training and len(self.mtp_heads) > 0 and self.mtp_loss_weight > 0:
            mtp_loss = x.new_zeros((), dtype=torch.float32)
            for k, head in enumerate(self.mtp_heads):
                ahead = head(x[:, : -(k + 1)])
                mtp_loss = mtp_loss + F.cross_entropy(
                    ahead.float().reshape(-1, ahead.size(-1)), target_ids[:, k + 1 :].reshape(-1), reduction="mean"
                )
            loss = loss + self.mtp_loss_weight * mtp_loss / len(self.mtp_heads)
        return loss


# -----------------------------
# EMA
# -----------------------------


class EMA:
    # fp32 average of the trainable weights, updated after each step.
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self.source = [p for _, p in model.named_parameters()]
        self.shadow = [p.detach().float().clone() for p in self.source]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach().float() for p in self.source], 1.0 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for p, avg in zip(self.source, self.shadow, strict=True):
            p.copy_(avg.to(dtype=p.dtype))


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
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{Path(args.data_path).name} pattern:{args.train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = GPT(args, args.mtp_num_heads).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
        if isinstance(module, Rotary):
            module.inv_freq.data = module.inv_freq.data.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )

    # Optimizer split:
    # - token embedding (Adam) uses EMBED_LR
    # - untied lm_head and MTP heads (Adam) use HEAD_LR
    # - matrix params in transformer blocks use MATRIX_LR via Muon
    # - vectors/scalars use SCALAR_LR via Adam
    block_named_params = list(base_model.blocks.named_parameters())
    matrix_params = [
        p
        for name, p in block_named_params
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    scalar_params = [
        p
        for name, p in block_named_params
        if p.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    scalar_params.append(base_model.skip_weights)
    head_params = list(base_model.mtp_heads.parameters())
    if base_model.lm_head is not None:
        head_params.append(base_model.lm_head.weight)
    token_lr = args.tied_embed_lr if args.tie_embeddings else args.embed_lr
    adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    optimizer_tok = torch.optim.Adam(
        [{"params": [base_model.tok_emb.weight], "lr": token_lr, "base_lr": token_lr}], **adam
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
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}], **adam
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]
    if head_params:
        optimizers.insert(
            1, torch.optim.Adam([{"params": head_params, "lr": args.head_lr, "base_lr": args.head_lr}], **adam)
        )

    n_params = sum(p.numel() for p in base_model.parameters())
    n_mtp = sum(p.numel() for p in base_model.mtp_heads.parameters())
    log0(f"model_params:{n_params} of which mtp:{n_mtp}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
    log0(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f} calib_reserve:{args.calib_reserve_seconds:.3f}"
    )
    log0(f"seed:{args.seed}")

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    cap_ms = 1000.0 * args.max_wallclock_seconds
    max_wallclock_ms = 1000.0 * (args.max_wallclock_seconds - args.calib_reserve_seconds)

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(max_wallclock_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # Warmup primes the compiled forward/backward/optimizer paths (the last steps those of QAT too), then restores the
    # initial weights/optimizer state so measured training starts from the true init.
    if args.warmup_steps > 0:
        initial_model_state = {name: tensor.detach().cpu().clone() for name, tensor in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            if warmup_step == args.warmup_steps - 3:
                set_qat(base_model, args.quant_levels)
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
            if warmup_step + 1 == args.warmup_steps:
                log0(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
        set_qat(base_model, 0)
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

    ema = EMA(base_model, args.ema_decay)
    qat_on = False
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
            val_loss, val_bpb = eval_val(args, model, rank, world_size, device, grad_accum_steps, val_tokens, luts)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            if stop_after_step is not None and step < args.iterations:
                log0(
                    f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}"
                )
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_mul(step, elapsed_ms)
        if not qat_on and step > 0 and scale < args.qat_lr_scale:
            qat_on = True
            set_qat(base_model, args.quant_levels)
            log0(f"late_qat:on step:{step} lr_scale:{scale:.4f}")
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
        ema.update(step)

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        should_log_train = args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0)
        if should_log_train:
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap.
        reached_cap = approx_training_time_ms >= max_wallclock_ms
        if distributed:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # EMA + CALIBRATION (still on the training clock)
    # -----------------------------

    set_qat(base_model, 0)
    ema.copy_to_model()
    log0("ema:applied")
    input_stats = collect_input_stats(args, base_model, train_loader, world_size)
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"calibration:{len(input_stats)} layers on training shards, train+calibration {training_time_ms:.0f}ms")
    if training_time_ms > cap_ms:
        raise RuntimeError(f"training took {training_time_ms:.0f}ms, more than the cap of {cap_ms:.0f}ms")

    # -----------------------------
    # SERIALIZATION
    # -----------------------------

    export_state = {name: t for name, t in base_model.state_dict().items() if not name.startswith("mtp_heads")}
    quant_obj, quant_stats = quantize_state_dict_int6(export_state, input_stats, args.quant_levels)
    log0(f"quant:{quant_stats}")
    if master_process:
        quant_buf = io.BytesIO()
        torch.save(quant_obj, quant_buf)
        quant_blob = lzma.compress(quant_buf.getvalue(), preset=9 | lzma.PRESET_EXTREME)
        with open("final_model.int6.ptz", "wb") as f:
            f.write(quant_blob)
        model_bytes = os.path.getsize("final_model.int6.ptz")
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        log0(f"Serialized model int6+lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size int6+lzma: {total_bytes} bytes")
        if total_bytes > 16_000_000:
            raise RuntimeError(f"submission of {total_bytes} bytes is over 16,000,000")
    if distributed:
        dist.barrier()

    # -----------------------------
    # EVALUATION of the packed model, read back
    # -----------------------------

    torch.cuda.synchronize()
    eval_t0 = time.perf_counter()
    with open("final_model.int6.ptz", "rb") as f:
        quant_blob_disk = f.read()
    quant_state = torch.load(io.BytesIO(lzma.decompress(quant_blob_disk)), map_location="cpu")
    eval_model = GPT(args, mtp_num_heads=0).to(device)
    eval_model.load_state_dict(dequantize_state_dict_int6(quant_state), strict=True)

    torch._dynamo.reset()
    t_eval = time.perf_counter()
    q_loss, q_bpb = eval_val(args, eval_model, rank, world_size, device, grad_accum_steps, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )

    t_eval = time.perf_counter()
    final_tag = "final_int6_sliding"
    final_loss, final_bpb = eval_val_sliding(args, eval_model, rank, world_size, device, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"{final_tag} val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} stride:{args.eval_stride} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )

    if args.ttt_enabled:
        torch._dynamo.reset()
        t_eval = time.perf_counter()
        final_tag = "final_int6_ttt"
        final_loss, final_bpb = eval_val_sliding_ttt(
            args, eval_model, rank, world_size, device, val_tokens, luts, eval_t0, log0
        )
        torch.cuda.synchronize()
        log0(
            f"{final_tag} val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} stride:{args.eval_stride} "
            f"chunk:{args.ttt_chunk_tokens} eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
        )

    log0(f"total_eval_time:{time.perf_counter() - eval_t0:.1f}s")
    log0(f"{final_tag}_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
