"""
11L int6 GPTQ + XSA-4 + partial RoPE + EMA + late QAT + BigramHash + legal score-first TTT.

Derived from the challenge baseline `train_gpt.py`. Run with:
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
except ImportError:
    flash_attn_3_func = None

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
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    bigram_vocab_size = int(os.environ.get("BIGRAM_VOCAB_SIZE", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    bos_token_id = int(os.environ.get("BOS_TOKEN_ID", 1))

    # Optimizer hyperparameters.
    embed_lr = float(os.environ.get("EMBED_LR", 0.6))
    head_lr = float(os.environ.get("HEAD_LR", 0.008))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # EMA and late QAT.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    late_qat_threshold = float(os.environ.get("LATE_QAT_THRESHOLD", 0.15))

    # GPTQ: calibration on train shards, inside the training budget.
    gptq_calib_batches = int(os.environ.get("GPTQ_CALIB_BATCHES", 64))
    gptq_calib_seqs = int(os.environ.get("GPTQ_CALIB_SEQS", 8))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 16.0))
    lzma_preset = int(os.environ.get("LZMA_PRESET", 9))
    size_limit_bytes = int(os.environ.get("SIZE_LIMIT_BYTES", 16_000_000))

    # Legal score-first test-time training.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 32))
    ttt_train_seqs = int(os.environ.get("TTT_TRAIN_SEQS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_budget_seconds = float(os.environ.get("TTT_BUDGET_SECONDS", 360.0))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------


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
            wd = group["weight_decay"]

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
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if wd > 0.0:
                    p.data.mul_(1.0 - lr * wd)
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------
#
# BPB (bits-per-byte) needs the number of UTF-8 bytes each target token stands for. The leading
# space marker only counts as a byte when the previous token is not a control/boundary token.


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


def target_byte_counts(
    prev_ids: Tensor,
    tgt_ids: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
) -> Tensor:
    counts = base_bytes_lut[tgt_ids].to(torch.float64)
    counts += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.float64)
    return counts


def load_validation_tokens(pattern: str, seq_len: int) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    usable = ((tokens.numel() - 1) // seq_len) * seq_len
    if usable <= 0:
        raise ValueError(f"Validation split is too short for EVAL_SEQ_LEN={seq_len}")
    return tokens[: usable + 1]


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
    seq_len = args.eval_seq_len
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    if local_batch_tokens < seq_len:
        raise ValueError(f"VAL_BATCH_SIZE={args.val_batch_size} gives less than one sequence per rank")
    local_batch_seqs = local_batch_tokens // seq_len
    total_seqs = (val_tokens.numel() - 1) // seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    with torch.inference_mode():
        for batch_seq_start in range(seq_start, seq_end, local_batch_seqs):
            batch_seq_end = min(batch_seq_start + local_batch_seqs, seq_end)
            raw_start = batch_seq_start * seq_len
            raw_end = batch_seq_end * seq_len + 1
            local = val_tokens[raw_start:raw_end].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                batch_loss = model(x, y).detach()
            batch_token_count = float(y.numel())
            val_loss_sum += batch_loss.to(torch.float64) * batch_token_count
            val_token_count += batch_token_count
            val_byte_count += target_byte_counts(
                x.reshape(-1), y.reshape(-1), base_bytes_lut, has_leading_space_lut, is_boundary_token_lut
            ).sum()

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(val_loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_byte_count, op=dist.ReduceOp.SUM)

    val_loss = val_loss_sum / val_token_count
    bits_per_token = val_loss.item() / math.log(2.0)
    tokens_per_byte = val_token_count.item() / val_byte_count.item()
    model.train()
    return float(val_loss.item()), float(bits_per_token * tokens_per_byte)


def window_plan(total_tokens: int, seq_len: int, stride: int) -> list[int]:
    """Window starts such that every target is scored by exactly one window."""
    context = seq_len - stride
    return [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context < total_tokens]


def gather_windows(
    val_tokens: Tensor, starts: list[int], seq_len: int, total_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    x = torch.zeros(len(starts), seq_len, dtype=torch.int64, device=device)
    y = torch.zeros(len(starts), seq_len, dtype=torch.int64, device=device)
    lengths: list[int] = []
    for i, ws in enumerate(starts):
        end = min(ws + seq_len, total_tokens)
        piece = val_tokens[ws : end + 1].to(device=device, dtype=torch.int64)
        x[i, : end - ws] = piece[:-1]
        y[i, : end - ws] = piece[1:]
        lengths.append(end - ws)
    return x, y, lengths


def eval_val_sliding(
    args: Hyperparameters,
    base_model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
) -> tuple[float, float]:
    """Sliding window evaluation: each target gets at least seq_len - stride tokens of context."""
    seq_len, stride = args.eval_seq_len, args.eval_stride
    total_tokens = val_tokens.numel() - 1
    starts = window_plan(total_tokens, seq_len, stride)
    my_starts = starts[(len(starts) * rank) // world_size : (len(starts) * (rank + 1)) // world_size]

    nll_total = torch.zeros((), device=device, dtype=torch.float64)
    tok_total = torch.zeros((), device=device, dtype=torch.float64)
    byte_total = torch.zeros((), device=device, dtype=torch.float64)

    base_model.eval()
    compiled_logits = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    with torch.inference_mode():
        for bi in range(0, len(my_starts), args.eval_batch_seqs):
            group = my_starts[bi : bi + args.eval_batch_seqs]
            x, y, lengths = gather_windows(val_tokens, group, seq_len, total_tokens, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = compiled_logits(x)
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction="none")
            nll = nll.reshape(len(group), seq_len)
            for i, ws in enumerate(group):
                lo = 0 if ws == 0 else seq_len - stride
                hi = lengths[i]
                nll_total += nll[i, lo:hi].to(torch.float64).sum()
                tok_total += float(hi - lo)
                byte_total += target_byte_counts(
                    x[i, lo:hi], y[i, lo:hi], base_bytes_lut, has_leading_space_lut, is_boundary_token_lut
                ).sum()

    if dist.is_available() and dist.is_initialized():
        for t in (nll_total, tok_total, byte_total):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    mean_nll = (nll_total / tok_total).item()
    base_model.train()
    return mean_nll, mean_nll / math.log(2.0) * (tok_total.item() / byte_total.item())


# -----------------------------
# LEGAL SCORE-FIRST TEST-TIME TRAINING
# -----------------------------
#
# Chunk c is scored with weights that have only seen chunks < c; afterwards the model takes a few
# SGD epochs on chunk c. The last chunk is scored and never trained on.


def ttt_parameters(args: Hyperparameters, base_model: nn.Module) -> list[nn.Parameter]:
    chosen: list[nn.Parameter] = []
    for name, p in base_model.named_parameters():
        frozen = any(name.startswith(f"blocks.{i}.") for i in range(args.ttt_freeze_blocks))
        p.requires_grad_(not frozen)
        if not frozen:
            chosen.append(p)
    return chosen


def ttt_score_batch(args: Hyperparameters, base_model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        logits = base_model.forward_logits(x)
    flat = logits.reshape(-1, logits.size(-1)).float()
    return F.cross_entropy(flat, y.reshape(-1), reduction="none").reshape(x.shape)


def ttt_train_chunk(
    args: Hyperparameters,
    base_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    val_tokens: Tensor,
    chunk_start: int,
    chunk_end: int,
    lr: float,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    """A few SGD epochs on an already scored chunk; gradients are averaged over all ranks."""
    seq_len = args.eval_seq_len
    num_seqs = (chunk_end - chunk_start) // seq_len
    if num_seqs == 0:
        return
    lo = (num_seqs * rank) // world_size
    hi = (num_seqs * (rank + 1)) // world_size
    steps = -(-(-(-num_seqs // world_size)) // args.ttt_train_seqs)
    for group in optimizer.param_groups:
        group["lr"] = lr
    base_model.train()
    for _epoch in range(args.ttt_epochs):
        for step in range(steps):
            first = lo + step * args.ttt_train_seqs
            last = min(first + args.ttt_train_seqs, hi)
            optimizer.zero_grad(set_to_none=True)
            if last > first:
                raw_start = chunk_start + first * seq_len
                raw_end = chunk_start + last * seq_len + 1
                local = val_tokens[raw_start:raw_end].to(device=device, dtype=torch.int64)
                x = local[:-1].reshape(-1, seq_len)
                y = local[1:].reshape(-1, seq_len)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = base_model(x, y)
                loss.backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if world_size > 1:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()
    base_model.eval()


def eval_val_ttt(
    args: Hyperparameters,
    base_model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
    log0=print,
) -> tuple[float, float]:
    seq_len = args.eval_seq_len
    stride = args.eval_stride
    chunk_tokens = args.ttt_chunk_tokens
    total_tokens = val_tokens.numel() - 1
    num_chunks = (total_tokens + chunk_tokens - 1) // chunk_tokens

    # A window belongs to the chunk in which its first scored target lies. Chunk bounds are
    # multiples of the stride, so a window never scores targets of two chunks.
    assert chunk_tokens % stride == 0 and seq_len % stride == 0 and chunk_tokens >= seq_len
    chunk_windows: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in window_plan(total_tokens, seq_len, stride):
        first_scored = ws if ws == 0 else ws + seq_len - stride
        chunk_windows[first_scored // chunk_tokens].append(ws)

    log0(f"ttt:start chunks:{num_chunks} chunk_tokens:{chunk_tokens} lr:{args.ttt_lr} epochs:{args.ttt_epochs}")
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    params = ttt_parameters(args, base_model)
    optimizer = torch.optim.SGD(params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    base_model.eval()
    t0 = time.perf_counter()

    for ci in range(num_chunks):
        chunk_start = ci * chunk_tokens
        chunk_end = min(chunk_start + chunk_tokens, total_tokens)

        # Phase 1: score this chunk with the current weights.
        windows = chunk_windows[ci]
        mine = windows[(len(windows) * rank) // world_size : (len(windows) * (rank + 1)) // world_size]
        with torch.inference_mode():
            for bi in range(0, len(mine), args.ttt_batch_seqs):
                batch_ws = mine[bi : bi + args.ttt_batch_seqs]
                x_batch, y_batch, wlens = gather_windows(val_tokens, batch_ws, seq_len, total_tokens, device)
                nll = ttt_score_batch(args, base_model, x_batch, y_batch)
                for i, ws in enumerate(batch_ws):
                    wlen = wlens[i]
                    s = 0 if ws == 0 else seq_len - stride
                    loss_sum += nll[i, s:wlen].to(torch.float64).sum()
                    token_count += float(wlen - s)
                    byte_count += target_byte_counts(
                        x_batch[i, s:wlen],
                        y_batch[i, s:wlen],
                        base_bytes_lut,
                        has_leading_space_lut,
                        is_boundary_token_lut,
                    ).sum()

        # Phase 2: train on the chunk that has just been scored (never on the last one).
        if ci == num_chunks - 1:
            continue
        over = torch.tensor(float(time.perf_counter() - t0 > args.ttt_budget_seconds), device=device)
        if world_size > 1:
            dist.all_reduce(over, op=dist.ReduceOp.MAX)
        if over.item() == 0.0 and args.ttt_epochs > 0:
            lr = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            ttt_train_chunk(
                args,
                base_model,
                optimizer,
                params,
                val_tokens,
                chunk_start,
                chunk_end,
                lr,
                rank,
                world_size,
                device,
            )
        if rank == 0 and ci % 100 == 0:
            running = loss_sum.item() / max(token_count.item(), 1.0)
            log0(f"ttt:chunk {ci + 1}/{num_chunks} rank0_loss:{running:.5f} time:{time.perf_counter() - t0:.1f}s")

    if world_size > 1:
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)
    val_loss = (loss_sum / token_count).item()
    val_bpb = val_loss / math.log(2.0) * (token_count.item() / byte_count.item())
    log0(f"ttt:done tokens:{int(token_count.item())} bytes:{int(byte_count.item())}")
    for p in base_model.parameters():
        p.requires_grad_(True)
    return val_loss, val_bpb


# -----------------------------
# POST-TRAINING QUANTIZATION (GPTQ int6 + lzma)
# -----------------------------

CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights,smear_gate",
    ).split(",")
    if pattern
)
INT8_CLIP_Q = 99.99984 / 100.0
INT6_CLIP = 31


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def quantize_int8_rowwise(t: Tensor) -> tuple[Tensor, Tensor]:
    t32 = t.float()
    clip_abs = torch.quantile(t32.abs(), INT8_CLIP_Q, dim=1) if t32.numel() else torch.empty(t32.shape[0])
    scale = (clip_abs / 127.0).clamp_min(1.0 / 127.0)
    q = torch.clamp(torch.round(t32 / scale[:, None]), -127, 127).to(torch.int8)
    return q.contiguous(), scale.to(torch.float16).contiguous()


def int6_row_scales(w: Tensor) -> Tensor:
    """Per-row scale with the smallest squared error over a few clipping percentiles."""
    best_scale, best_err = None, None
    for pct in (0.9990, 0.9995, 0.9999, 0.99999, 1.0):
        amax = w.abs().amax(dim=1) if pct == 1.0 else torch.quantile(w.abs(), pct, dim=1)
        scale = (amax / INT6_CLIP).clamp_min(1e-8)
        q = torch.clamp(torch.round(w / scale[:, None]), -INT6_CLIP - 1, INT6_CLIP)
        err = (w - q * scale[:, None]).square().sum(dim=1)
        if best_err is None:
            best_scale, best_err = scale, err
        else:
            better = err < best_err
            best_scale = torch.where(better, scale, best_scale)
            best_err = torch.where(better, err, best_err)
    return best_scale


def quantize_int6_gptq(weight: Tensor, hessian: Tensor, block_size: int, damp: float) -> tuple[Tensor, Tensor]:
    W = weight.float().clone()
    H = hessian.float().to(W.device).clone()
    rows, cols = W.shape
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    perm = torch.argsort(torch.diag(H), descending=True)
    inv_perm = torch.argsort(perm)
    W = W[:, perm]
    H = H[perm][:, perm]
    idx = torch.arange(cols, device=W.device)
    H[idx, idx] += damp * torch.diag(H).mean()
    H_inv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    H_inv = torch.linalg.cholesky(H_inv, upper=True)
    scale = int6_row_scales(W).to(torch.float16).float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W.device)
    for b0 in range(0, cols, block_size):
        b1 = min(b0 + block_size, cols)
        block = W[:, b0:b1].clone()
        err_block = torch.zeros_like(block)
        hinv = H_inv[b0:b1, b0:b1]
        for j in range(b1 - b0):
            col = block[:, j]
            q = torch.clamp(torch.round(col / scale), -INT6_CLIP - 1, INT6_CLIP)
            Q[:, b0 + j] = q.to(torch.int8)
            err = (col - q * scale) / hinv[j, j]
            block[:, j:] -= err[:, None] * hinv[j, j:][None, :]
            err_block[:, j] = err
        W[:, b1:] -= err_block @ H_inv[b0:b1, b1:]
    return Q[:, inv_perm].contiguous(), scale.to(torch.float16).contiguous()


def collect_hessians(
    args: Hyperparameters, base_model: nn.Module, next_batch, device: torch.device, world_size: int
) -> dict[str, Tensor]:
    """Second moments of every CastedLinear's input, averaged over ranks."""
    hessians: dict[str, Tensor] = {}
    hooks = []

    def make_hook(key: str):
        def hook(_module, inputs, _output):
            a = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            if key not in hessians:
                hessians[key] = torch.zeros(a.shape[1], a.shape[1], device=device)
            hessians[key].addmm_(a.T, a)

        return hook

    for name, module in base_model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_hook(make_hook(f"{name}.weight")))
    base_model.eval()
    with torch.inference_mode():
        for _ in range(args.gptq_calib_batches):
            x, _y = next_batch()
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                base_model.forward_logits(x)
    for h in hooks:
        h.remove()
    for key in sorted(hessians):
        hessians[key] /= float(args.gptq_calib_batches)
        if world_size > 1:
            dist.all_reduce(hessians[key], op=dist.ReduceOp.AVG)
    base_model.train()
    return hessians


def quantize_state_dict(
    args: Hyperparameters, state_dict: dict[str, Tensor], hessians: dict[str, Tensor]
) -> tuple[dict[str, object], dict[str, int]]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    passthrough: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    stats = dict.fromkeys(("param_count", "num_int6", "num_int8", "num_kept", "baseline_bytes", "payload_bytes"), 0)
    for name, tensor in state_dict.items():
        t = tensor.detach()
        stats["param_count"] += int(t.numel())
        stats["baseline_bytes"] += tensor_nbytes(t)
        control = any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS)
        if control or not t.is_floating_point() or t.ndim != 2 or t.numel() <= 8192:
            kept = t.float() if control else (t.to(torch.float16) if t.is_floating_point() else t)
            passthrough[name] = kept.cpu().contiguous()
            kinds[name] = "kept"
            stats["num_kept"] += 1
            stats["payload_bytes"] += tensor_nbytes(kept)
            continue
        if name in hessians:
            q, s = quantize_int6_gptq(t, hessians[name], args.gptq_block_size, args.gptq_damp)
            kinds[name] = "int6"
        else:
            q, s = quantize_int8_rowwise(t)
            kinds[name] = "int8"
        stats[f"num_{kinds[name]}"] += 1
        quantized[name] = q.cpu()
        scales[name] = s.cpu()
        stats["payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)
    obj: dict[str, object] = {
        "__quant_format__": "int6_gptq_lzma_v1",
        "quantized": quantized,
        "scales": scales,
        "passthrough": passthrough,
        "kinds": kinds,
    }
    return obj, stats


def dequantize_state_dict(obj: dict[str, object], template: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        s = obj["scales"][name].float()
        out[name] = (q.float() * s[:, None]).to(template[name].dtype).contiguous()
    for name, t in obj["passthrough"].items():
        out[name] = t.to(template[name].dtype).contiguous()
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
    # Each call consumes a contiguous chunk from the shared stream and slices out one span per rank.
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
    # With _qat_enabled the forward pass sees int6-rounded weights (straight-through gradient).
    _qat_enabled: bool = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)
        if CastedLinear._qat_enabled and self.training and w.ndim == 2:
            with torch.no_grad():
                w32 = self.weight.float()
                scale = (w32.abs().amax(dim=1) / INT6_CLIP).clamp_min(1.0 / 4096)
                w_q = torch.clamp(torch.round(w32 / scale[:, None]), -INT6_CLIP - 1, INT6_CLIP)
                w_q = (w_q * scale[:, None]).to(x.dtype)
            w = w + (w_q - w).detach()
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
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
            self._cos_cached = freqs.cos()[None, :, None, :].clone()
            self._sin_cached = freqs.sin()[None, :, None, :].clone()
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype).clone(), self._sin_cached.to(dtype=dtype).clone()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int = 0) -> Tensor:
    # Partial RoPE: only the first rope_dims of each head rotate, the rest is position-free.
    if 0 < rope_dims < x.size(-1):
        x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
        half = rope_dims // 2
        x1, x2 = x_rope[..., :half], x_rope[..., half:]
        rotated = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
        return torch.cat((rotated, x_pass), dim=-1)
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if flash_attn_3_func is not None:
        out = flash_attn_3_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=q.size(2) != k.size(2),
    )
    return out.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        rope_base: float,
        qk_gain_init: float,
        rope_dims: int,
    ):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rope_dims = rope_dims
        self.rotary = Rotary(rope_dims if rope_dims > 0 else self.head_dim, base=rope_base)
        self.use_xsa = False

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        # Exclusive self attention: remove each token's own value direction from the output.
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        y_g = y.reshape(B, T, Hkv, H // Hkv, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        proj = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - proj).reshape(B, T, H, D)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = causal_attention(q, k, v)
        if self.use_xsa:
            y = self._xsa(y, v)
        return self.proj(y.reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    # leaky relu^2 MLP
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.fc(x), negative_slope=0.5)
        return self.proj(x.square())


class SmearGate(nn.Module):
    """Blends each token embedding with the one before it; never across a document start."""

    def __init__(self, dim: int, bos_token_id: int):
        super().__init__()
        self.bos_token_id = bos_token_id
        self.smear_gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.smear_gate.to(dtype=x.dtype))[None, None, :]
        x_prev = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        keep = (input_ids != self.bos_token_id).unsqueeze(-1).to(x.dtype)
        return x + keep * g * (x_prev - x)


class BigramHashEmbedding(nn.Module):
    """Hashed embedding of (previous token, current token)."""

    def __init__(self, bigram_vocab_size: int, bigram_dim: int, model_dim: int, bos_token_id: int):
        super().__init__()
        self.bigram_vocab_size = bigram_vocab_size
        self.bos_token_id = bos_token_id
        self.embed = nn.Embedding(bigram_vocab_size, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bigram_hash(self, tokens: Tensor) -> Tensor:
        t = tokens.to(torch.int32)
        mod = self.bigram_vocab_size - 1
        out = torch.full_like(t, mod)
        out[..., 1:] = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % mod
        # A document's first token has no predecessor.
        out = torch.where(t == self.bos_token_id, torch.full_like(out, mod), out)
        return out.long()

    def forward(self, token_ids: Tensor) -> Tensor:
        h = self.proj(self.embed(self.bigram_hash(token_ids)))
        return h * self.scale.to(dtype=h.dtype)


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        mlp_mult: float,
        rope_base: float,
        qk_gain_init: float,
        rope_dims: int,
        layer_idx: int,
        ln_scale: bool,
    ):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init, rope_dims)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_scale_factor)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        mlp_out = self.mlp(self.mlp_norm(x) * self.ln_scale_factor)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.tie_embeddings = args.tie_embeddings
        self.tied_embed_init_std = args.tied_embed_init_std
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = (
            BigramHashEmbedding(args.bigram_vocab_size, args.bigram_dim, args.model_dim, args.bos_token_id)
            if args.bigram_vocab_size > 0
            else None
        )
        self.smear = SmearGate(args.model_dim, args.bos_token_id)
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
                    args.rope_dims,
                    layer_idx,
                    args.ln_scale,
                )
                for layer_idx in range(args.num_layers)
            ]
        )
        for layer_idx in range(max(0, args.num_layers - args.xsa_last_n), args.num_layers):
            self.blocks[layer_idx].attn.use_xsa = True
        self.final_norm = RMSNorm()
        self.lm_head = None if args.tie_embeddings else CastedLinear(args.model_dim, args.vocab_size, bias=False)
        if self.lm_head is not None:
            self.lm_head._zero_init = True
        self._init_weights()

    def _init_weights(self) -> None:
        if self.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        num_layers = len(self.blocks)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64 and "bigram" not in name:
                    nn.init.orthogonal_(module.weight, gain=1.0)
                    if name.endswith(".proj"):
                        with torch.no_grad():
                            module.weight.mul_(1.0 / math.sqrt(2 * num_layers))

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
        if self.bigram is not None:
            x = x + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, input_ids)
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

    def project_logits(self, hidden: Tensor) -> Tensor:
        if self.tie_embeddings:
            logits_proj = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        else:
            logits_proj = self.lm_head(hidden)
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.project_logits(self.hidden_states(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean"
        )


# -----------------------------
# TRAINING
# -----------------------------


class WeightEMA:
    """Exponential moving average of all float tensors of the model, kept in fp32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for name, t in module.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        current = module.state_dict()
        module.load_state_dict({name: t.to(current[name].dtype) for name, t in self.shadow.items()}, strict=True)


def build_optimizers(args: Hyperparameters, base_model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
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
    scalar_params.append(base_model.smear.smear_gate)
    token_lr = args.tied_embed_lr if args.tie_embeddings else args.embed_lr
    tok_params = [{"params": [base_model.tok_emb.weight], "lr": token_lr, "base_lr": token_lr}]
    if base_model.bigram is not None:
        tok_params.append({"params": [base_model.bigram.embed.weight], "lr": token_lr, "base_lr": token_lr})
        matrix_params.append(base_model.bigram.proj.weight)
        scalar_params.append(base_model.bigram.scale)
    optimizer_tok = torch.optim.AdamW(
        tok_params, betas=(args.beta1, args.beta2), eps=args.adam_eps, weight_decay=args.adam_wd, fused=True
    )
    optimizer_muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizer_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]
    if base_model.lm_head is not None:
        optimizers.append(
            torch.optim.Adam(
                [{"params": [base_model.lm_head.weight], "lr": args.head_lr, "base_lr": args.head_lr}],
                betas=(args.beta1, args.beta2),
                eps=args.adam_eps,
                fused=True,
            )
        )
    return optimizers, optimizer_muon


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
    val_tokens = load_validation_tokens(args.val_files, args.eval_seq_len)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{Path(args.data_path).name}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    CastedLinear._qat_enabled = False
    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )
    optimizers, optimizer_muon = build_optimizers(args, base_model)
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
    log0(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads} xsa_last_n:{args.xsa_last_n}")
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

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # The training budget covers the loop and the GPTQ calibration that follows it.
    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None
    loop_cap_ms = None if max_wallclock_ms is None else max_wallclock_ms - 1000.0 * args.gptq_reserve_seconds

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        if loop_cap_ms is None:
            warmdown_start = max(args.iterations - args.warmdown_iters, 0)
            if warmdown_start <= step < args.iterations:
                return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(loop_cap_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # Warmup primes the compiled forward/backward/optimizer paths, then the initial state is restored.
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
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
            if args.warmup_steps <= 20 or (warmup_step + 1) % 10 == 0:
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

    ema = WeightEMA(base_model, args.ema_decay)
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
                args, model, rank, world_size, device, grad_accum_steps, val_tokens, *luts
            )
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
        scale = lr_mul(step, elapsed_ms)
        if not CastedLinear._qat_enabled and step > 0 and scale < args.late_qat_threshold:
            CastedLinear._qat_enabled = True
            log0(f"late_qat:enabled step:{step} scale:{scale:.4f}")
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
        ema.update(base_model)

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap.
        reached_cap = loop_cap_ms is not None and approx_training_time_ms >= loop_cap_ms
        if distributed and loop_cap_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # EMA + GPTQ CALIBRATION (still inside the training budget)
    # -----------------------------

    log0("ema:applying EMA weights")
    ema.copy_to(base_model)
    CastedLinear._qat_enabled = False

    calib_tokens = args.gptq_calib_seqs * args.train_seq_len * world_size

    def next_calib_batch() -> tuple[Tensor, Tensor]:
        return train_loader.next_batch(calib_tokens, args.train_seq_len, 1)

    hessians = collect_hessians(args, base_model, next_calib_batch, device, world_size)
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"gptq:calibrated layers:{len(hessians)} train_plus_calibration_time:{training_time_ms:.0f}ms")
    if max_wallclock_ms is not None and training_time_ms > max_wallclock_ms:
        log0(f"WARNING: training budget exceeded by {training_time_ms - max_wallclock_ms:.0f}ms")

    # -----------------------------
    # SERIALIZATION + ROUNDTRIP VALIDATION
    # -----------------------------

    template = {name: t.detach().cpu() for name, t in base_model.state_dict().items()}
    code_bytes = len(code.encode("utf-8"))
    if master_process:
        quant_obj, quant_stats = quantize_state_dict(args, base_model.state_dict(), hessians)
        quant_buf = io.BytesIO()
        torch.save(quant_obj, quant_buf)
        quant_raw = quant_buf.getvalue()
        quant_blob = lzma.compress(quant_raw, preset=args.lzma_preset | lzma.PRESET_EXTREME)
        with open("final_model.int6.ptz", "wb") as f:
            f.write(quant_blob)
        model_bytes = os.path.getsize("final_model.int6.ptz")
        total_bytes = model_bytes + code_bytes
        ratio = quant_stats["baseline_bytes"] / max(quant_stats["payload_bytes"], 1)
        log0(f"Serialized model int6+lzma: {model_bytes} bytes (payload_ratio:{ratio:.2f}x)")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size int6+lzma: {total_bytes} bytes")
        if total_bytes > args.size_limit_bytes:
            raise RuntimeError(f"submission is {total_bytes} bytes, the limit is {args.size_limit_bytes}")
    if distributed:
        dist.barrier()

    # Everything below only uses what is on disk: artifact, code, tokenizer and validation tokens.
    with open("final_model.int6.ptz", "rb") as f:
        packed = f.read()
    quant_state = torch.load(io.BytesIO(lzma.decompress(packed)), map_location="cpu", weights_only=False)
    eval_model = GPT(args).to(device).bfloat16()
    for module in eval_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(eval_model)
    eval_model.load_state_dict(dequantize_state_dict(quant_state, template), strict=True)

    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    q_val_loss, q_val_bpb = eval_val(
        args, eval_model, rank, world_size, device, grad_accum_steps, val_tokens, *luts
    )
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )

    t_slide = time.perf_counter()
    sw_val_loss, sw_val_bpb = eval_val_sliding(args, eval_model, rank, world_size, device, val_tokens, *luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_sliding_window val_loss:{sw_val_loss:.4f} val_bpb:{sw_val_bpb:.4f} "
        f"stride:{args.eval_stride} eval_time:{1000.0 * (time.perf_counter() - t_slide):.0f}ms"
    )

    if args.ttt_enabled:
        t_ttt = time.perf_counter()
        ttt_loss, ttt_bpb = eval_val_ttt(
            args, eval_model, rank, world_size, device, val_tokens, *luts, log0=log0
        )
        torch.cuda.synchronize()
        log0(
            f"final_int6_ttt val_loss:{ttt_loss:.8f} val_bpb:{ttt_bpb:.8f} "
            f"eval_time:{1000.0 * (time.perf_counter() - t_ttt):.0f}ms"
        )
    log0(f"total_eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
