"""
train_gpt.py -- 11L, int6 QAT, EMA/SWA, zstd-22, causal SLOT at evaluation.

Grown from the challenge's baseline; names are kept so that a diff against it stays readable.
The submitted number is `final_slot_exact`. Everything else that is printed is for comparison only.
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
# 11 transformer blocks, width 512, 8 heads with 4 KV heads, 3x MLP (relu^2), vocab 1024, tied embeddings,
# bigram hash embedding, U-net skips, XSA on the last blocks, sequence length 2048, ~27M parameters.


class Hyperparameters:
    # Data paths are shard globs produced by the existing preprocessing pipeline.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation cadence and batch size. Validation during training is logged and nothing else.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 10.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    bigram_vocab_size = int(os.environ.get("BIGRAM_VOCAB_SIZE", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))

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

    # Averages. Which of them is packed follows from the schedule alone (see final_average).
    ema_enabled = bool(int(os.environ.get("EMA_ENABLED", "1")))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.2))
    swa_min_count = int(os.environ.get("SWA_MIN_COUNT", 8))

    # Quantisation.
    late_qat_scale = float(os.environ.get("LATE_QAT_SCALE", 0.5))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 16))
    calib_seqs = int(os.environ.get("CALIB_SEQS", 16))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    size_limit = 16_000_000

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 96))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 64))
    compare_sliding = bool(int(os.environ.get("COMPARE_SLIDING", "1")))
    compare_stride = int(os.environ.get("COMPARE_STRIDE", 256))
    slot_enabled = bool(int(os.environ.get("SLOT_ENABLED", "1")))
    slot_steps = int(os.environ.get("SLOT_STEPS", 10))
    slot_lr = float(os.environ.get("SLOT_LR", 0.008))
    slot_lr_min = float(os.environ.get("SLOT_LR_MIN", 0.0008))
    slot_bias_lr_mult = float(os.environ.get("SLOT_BIAS_LR_MULT", 1.0))
    slot_wd = float(os.environ.get("SLOT_WD", 0.01))
    slot_use_bias = bool(int(os.environ.get("SLOT_USE_BIAS", "1")))
    slot_half_life = float(os.environ.get("SLOT_HALF_LIFE", 0.0))  # 0: every context position weighs the same
    slot_temp = float(os.environ.get("SLOT_TEMP", 1.0))

    # Tried and left off: score-first SGD on whole chunks. No gain on top of SLOT, and slow.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "0")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 65536))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 2))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------
# As borrowed from modded-nanogpt by the baseline. https://kellerjordan.github.io/posts/muon/


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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, nesterov: bool = True, wd: float = 0.0):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, nesterov=nesterov, wd=wd),
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
            wd = group["wd"]

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
                if wd > 0:
                    p.mul_(1.0 - lr * wd)
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION
# -----------------------------
# BPB instead of loss per token: every token's bytes are taken from the sentencepiece model's pieces.


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


def load_validation_tokens(pattern: str, seq_len: int) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-document validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() <= seq_len:
        raise ValueError(f"Validation split is too short for seq_len={seq_len}")
    return tokens


def count_bytes(
    prev_ids: Tensor,
    tgt_ids: Tensor,
    base_bytes_lut: Tensor,
    has_leading_space_lut: Tensor,
    is_boundary_token_lut: Tensor,
) -> Tensor:
    token_bytes = base_bytes_lut[tgt_ids].to(torch.float64)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.float64)
    return token_bytes


def reduce_to_bpb(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    if dist.is_available() and dist.is_initialized():
        for t in (loss_sum, token_count, byte_count):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    val_loss = float((loss_sum / token_count).item())
    bpb = float((loss_sum / math.log(2.0) / byte_count).item())
    return val_loss, bpb


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
    # The baseline's quick validation: disjoint sequences, the last partial one dropped. For the log during training.
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    local_batch_seqs = max(local_batch_tokens // args.train_seq_len, 1)
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
            val_byte_count += count_bytes(
                x.reshape(-1), y.reshape(-1), base_bytes_lut, has_leading_space_lut, is_boundary_token_lut
            ).sum()
    model.train()
    return reduce_to_bpb(val_loss_sum, val_token_count, val_byte_count)


def plan_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int]]:
    """(start, first) of each window of seq_len inputs: positions first.. are new, those before were scored earlier.

    The first window is new from its start; every later one ends at most `stride` targets further on, and the last one
    ends at the last target, so that each of the `total` targets is new in exactly one window.
    """
    windows = [(0, 0)]
    end = seq_len
    while end < total:
        new_end = min(end + stride, total)
        start = new_end - seq_len
        windows.append((start, end - start))
        end = new_end
    return windows


def window_batch(
    val_tokens: Tensor, windows: list[tuple[int, int]], seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.stack([val_tokens[s : s + seq_len + 1] for s, _ in windows]).to(device=device, dtype=torch.int64)
    first = torch.tensor([f for _, f in windows], device=device)
    fresh = torch.arange(seq_len, device=device)[None, :] >= first[:, None]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), fresh


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
    stride: int,
) -> tuple[float, float]:
    # The same sliding window without any adaptation: what SLOT is compared with.
    seq_len = args.eval_seq_len
    windows = plan_windows(val_tokens.numel() - 1, seq_len, stride)
    mine = windows[(len(windows) * rank) // world_size : (len(windows) * (rank + 1)) // world_size]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    base_model.eval()
    with torch.no_grad():
        for i in range(0, len(mine), args.eval_batch_seqs):
            x, y, fresh = window_batch(val_tokens, mine[i : i + args.eval_batch_seqs], seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = base_model.forward_logits(x)
            nll = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none").to(torch.float64)
            loss_sum += nll[fresh].sum()
            token_count += fresh.sum()
            byte_count += count_bytes(
                x[fresh], y[fresh], base_bytes_lut, has_leading_space_lut, is_boundary_token_lut
            ).sum()
    return reduce_to_bpb(loss_sum, token_count, byte_count)


def eval_val_slot(
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
    """Causal SLOT. For each window a vector on the last hidden state and a bias on the logits are fitted to the
    positions scored before (the window's context), then applied to the window's new positions, then thrown away.

    Rows of a batch are different windows and have a vector and a bias of their own. The losses are summed over rows
    and AdamW works element by element, so no row's step reads another row's tokens.
    """
    seq_len = args.eval_seq_len
    windows = plan_windows(val_tokens.numel() - 1, seq_len, args.eval_stride)
    mine = windows[(len(windows) * rank) // world_size : (len(windows) * (rank + 1)) // world_size]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    base_model.eval()
    for p in base_model.parameters():
        p.requires_grad_(False)
    hidden_fn = torch.compile(base_model.forward_hidden, dynamic=False, fullgraph=True)
    t_start = time.perf_counter()

    for i in range(0, len(mine), args.eval_batch_seqs):
        batch = mine[i : i + args.eval_batch_seqs]
        x, y, fresh = window_batch(val_tokens, batch, seq_len, device)
        with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            hidden = hidden_fn(x).detach()
        bsz = x.size(0)

        # Weights of the fit: the context, and nothing of the new stride.
        weight = (~fresh).float()
        if args.slot_half_life > 0:
            age = torch.arange(seq_len, device=device, dtype=torch.float32) - (seq_len - 1)
            weight = weight * torch.exp2(age / args.slot_half_life)[None, :]
        weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-6)

        delta = torch.zeros(bsz, 1, hidden.size(-1), device=device, dtype=torch.float32, requires_grad=True)
        bias = torch.zeros(bsz, 1, args.vocab_size, device=device, dtype=torch.float32, requires_grad=True)
        groups = [{"params": [delta], "lr": args.slot_lr, "base_lr": args.slot_lr}]
        if args.slot_use_bias:
            bias_lr = args.slot_lr * args.slot_bias_lr_mult
            groups.append({"params": [bias], "lr": bias_lr, "base_lr": bias_lr})
        slot_opt = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=args.slot_wd)

        for step in range(args.slot_steps):
            frac = 0.5 * (1.0 + math.cos(math.pi * step / max(args.slot_steps, 1)))
            for group in slot_opt.param_groups:
                floor = args.slot_lr_min / args.slot_lr
                group["lr"] = group["base_lr"] * (floor + (1.0 - floor) * frac)
            slot_opt.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = base_model.project(hidden + delta.to(hidden.dtype))
            logits = logits.float() + bias
            ctx_nll = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
            slot_loss = (ctx_nll * weight).sum()
            slot_loss.backward()
            slot_opt.step()

        with torch.no_grad():
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = base_model.project(hidden + delta.detach().to(hidden.dtype))
            logits = (logits.float() + bias.detach()) / args.slot_temp
            nll = F.cross_entropy(logits.transpose(1, 2), y, reduction="none").to(torch.float64)
            loss_sum += nll[fresh].sum()
            token_count += fresh.sum()
            byte_count += count_bytes(
                x[fresh], y[fresh], base_bytes_lut, has_leading_space_lut, is_boundary_token_lut
            ).sum()

        if rank == 0 and (i // args.eval_batch_seqs) % 200 == 0:
            running = float((loss_sum / math.log(2.0) / byte_count.clamp_min(1)).item())
            log0(f"slot:{i + bsz}/{len(mine)} running_bpb:{running:.5f} time:{time.perf_counter() - t_start:.1f}s")

    return reduce_to_bpb(loss_sum, token_count, byte_count)


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
) -> tuple[float, float]:
    # Off by default (TTT_ENABLED=0). Chunk by chunk: all new positions of a chunk are scored, then it is trained on.
    seq_len = args.eval_seq_len
    windows = plan_windows(val_tokens.numel() - 1, seq_len, args.eval_stride)
    chunks: dict[int, list[tuple[int, int]]] = {}
    for start, first in windows:
        chunks.setdefault((start + seq_len - 1) // args.ttt_chunk_tokens, []).append((start, first))
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    params = [p for p in base_model.parameters()]
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=args.ttt_lr, momentum=0.9)
    for chunk_id in sorted(chunks):
        base_model.eval()
        mine = chunks[chunk_id][rank::world_size]
        with torch.no_grad():
            for i in range(0, len(mine), args.eval_batch_seqs):
                x, y, fresh = window_batch(val_tokens, mine[i : i + args.eval_batch_seqs], seq_len, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = base_model.forward_logits(x)
                nll = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none").to(torch.float64)
                loss_sum += nll[fresh].sum()
                token_count += fresh.sum()
                byte_count += count_bytes(
                    x[fresh], y[fresh], base_bytes_lut, has_leading_space_lut, is_boundary_token_lut
                ).sum()
        # What this chunk's windows scored, as disjoint sequences that end at the last scored target.
        chunk_end = chunks[chunk_id][-1][0] + seq_len
        chunk_start = chunks[chunk_id][0][0] + chunks[chunk_id][0][1]
        n_seqs = (chunk_end - chunk_start) // seq_len
        base_model.train()
        for _ in range(args.ttt_epochs):
            for s in range(0, n_seqs - n_seqs % world_size, world_size):
                a = chunk_start + (s + rank) * seq_len
                local = val_tokens[a : a + seq_len + 1].to(device=device, dtype=torch.int64)
                opt.zero_grad(set_to_none=True)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = base_model(local[None, :-1], local[None, 1:])
                loss.backward()
                for p in params:
                    if p.grad is not None and world_size > 1:
                        dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                opt.step()
    return reduce_to_bpb(loss_sum, token_count, byte_count)


# -----------------------------
# POST-TRAINING QUANTIZATION
# -----------------------------
# Block matrices: int6 per row (values -31..31 in int8 containers, which zstd squeezes); embeddings: int8 per row;
# small and control tensors: fp16 or fp32. The clip of each int6 row is searched with the inputs' second moments as
# weights; these are measured on training shards, within the training time.

CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,mlp_scale,resid_mix,q_gain,skip_weight,bigram.scale",
    ).split(",")
    if pattern
)
INT8_KEEP_FLOAT_MAX_NUMEL = 65_536
INT6_MAX = 31
INT6_CLIP_GRID = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78)
INT8_CLIP_Q = 99.99984 / 100.0


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def keep_float_tensor(name: str, t: Tensor, passthrough_orig_dtypes: dict[str, str]) -> Tensor:
    if any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
        return t.float().contiguous()
    if t.dtype in {torch.float32, torch.bfloat16}:
        passthrough_orig_dtypes[name] = str(t.dtype).removeprefix("torch.")
        return t.to(dtype=torch.float16).contiguous()
    return t


def quantize_float_tensor(t: Tensor) -> tuple[Tensor, Tensor]:
    # int8 per row with a percentile clip: the embeddings.
    t32 = t.float()
    clip_abs = torch.quantile(t32.abs(), INT8_CLIP_Q, dim=1)
    clipped = torch.maximum(torch.minimum(t32, clip_abs[:, None]), -clip_abs[:, None])
    scale = (clip_abs / 127.0).clamp_min(1.0 / 127.0)
    q = torch.clamp(torch.round(clipped / scale[:, None]), -127, 127).to(torch.int8).contiguous()
    return q, scale.to(dtype=torch.float16).contiguous()


def quantize_int6_tensor(t: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    t32 = t.float()
    weight = torch.ones(t32.size(1)) if moment is None else moment.float().cpu().clamp_min(1e-8)
    amax = t32.abs().amax(dim=1).clamp_min(1e-8)
    best_err = torch.full((t32.size(0),), float("inf"))
    best_scale = (amax / INT6_MAX).to(torch.float16)
    for ratio in INT6_CLIP_GRID:
        scale = (amax * ratio / INT6_MAX).to(torch.float16)
        s32 = scale.float().clamp_min(1e-7)[:, None]
        q = torch.clamp(torch.round(t32 / s32), -INT6_MAX, INT6_MAX)
        err = ((q * s32 - t32).square() * weight[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    s32 = best_scale.float().clamp_min(1e-7)[:, None]
    q = torch.clamp(torch.round(t32 / s32), -INT6_MAX, INT6_MAX).to(torch.int8).contiguous()
    return q, best_scale.contiguous()


def collect_input_moments(
    args: Hyperparameters, base_model: nn.Module, loader: DistributedTokenLoader, world_size: int, grad_accum_steps: int
) -> dict[str, Tensor]:
    # Mean square of every block matrix's inputs, from training tokens.
    moments: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def hook_for(name: str):
        def hook(module, inputs):
            flat = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            moments[name] = moments.get(name, 0) + flat.square().sum(dim=0)
            counts[name] = counts.get(name, 0) + flat.size(0)

        return hook

    for name, module in base_model.named_modules():
        if isinstance(module, CastedLinear) and name.startswith("blocks."):
            handles.append(module.register_forward_pre_hook(hook_for(name)))
    base_model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(args.calib_batches):
            tokens = args.calib_seqs * args.train_seq_len * world_size * grad_accum_steps
            x, y = loader.next_batch(tokens, args.train_seq_len, grad_accum_steps)
            base_model(x, y)
    for handle in handles:
        handle.remove()
    out = {}
    for name in sorted(moments):
        m = moments[name] / counts[name]
        if world_size > 1:
            dist.all_reduce(m, op=dist.ReduceOp.AVG)
        out[name + ".weight"] = m.cpu()
    return out


def quantize_state_dict(state_dict: dict[str, Tensor], moments: dict[str, Tensor]):
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    passthrough: dict[str, Tensor] = {}
    passthrough_orig_dtypes: dict[str, str] = {}
    stats = dict.fromkeys(("param_count", "num_tensors", "raw_bytes", "payload_bytes"), 0)

    for name, tensor in state_dict.items():
        t = tensor.detach().to("cpu").contiguous()
        stats["param_count"] += int(t.numel())
        stats["num_tensors"] += 1
        stats["raw_bytes"] += tensor_nbytes(t)

        is_block_matrix = name.startswith("blocks.") and t.ndim == 2 and t.numel() > INT8_KEEP_FLOAT_MAX_NUMEL
        if is_block_matrix:
            q, s = quantize_int6_tensor(t, moments.get(name))
        elif t.is_floating_point() and t.ndim == 2 and t.numel() > INT8_KEEP_FLOAT_MAX_NUMEL:
            q, s = quantize_float_tensor(t)
        else:
            kept = keep_float_tensor(name, t, passthrough_orig_dtypes) if t.is_floating_point() else t
            passthrough[name] = kept
            stats["payload_bytes"] += tensor_nbytes(kept)
            continue
        quantized[name] = q
        scales[name] = s
        dtypes[name] = str(t.dtype).removeprefix("torch.")
        stats["payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)

    obj: dict[str, object] = {
        "__quant_format__": "int6_int8_per_row_v2",
        "quantized": quantized,
        "scales": scales,
        "dtypes": dtypes,
        "passthrough": passthrough,
        "passthrough_orig_dtypes": passthrough_orig_dtypes,
    }
    return obj, stats


def dequantize_state_dict(obj: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        s = obj["scales"][name].to(dtype=torch.float32)
        out[name] = (q.float() * s.clamp_min(1e-7)[:, None]).to(dtype=dtype).contiguous()
    for name, t in obj["passthrough"].items():
        out_t = t.detach().to("cpu").contiguous()
        orig_dtype = obj["passthrough_orig_dtypes"].get(name)
        if isinstance(orig_dtype, str):
            out_t = out_t.to(dtype=getattr(torch, orig_dtype)).contiguous()
        out[name] = out_t
    return out


# -----------------------------
# DATA LOADING
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    # SHARD HEADER INTS: magic, version, number of tokens
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
    # Each call consumes one contiguous chunk of the shared stream; every rank slices a disjoint span of it.
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
    # Weights stay fp32 for the optimizer and are cast for the matmul. With qat_mix at 1 the forward pass sees the
    # int6 grid (straight-through gradient). A tensor, so that switching it does not recompile.
    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("qat_mix", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.training:
            with torch.no_grad():
                w32 = w.float()
                scale = (w32.abs().amax(dim=1, keepdim=True) / INT6_MAX).clamp_min(1e-7)
                w_q = torch.clamp(torch.round(w32 / scale), -INT6_MAX, INT6_MAX) * scale
                shift = self.qat_mix * (w_q - w32)
            w = w + shift
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w.to(x.dtype), bias)


def set_qat(model: nn.Module, on: bool) -> None:
    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and name.startswith("blocks."):
            module.qat_mix.fill_(1.0 if on else 0.0)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    # Keep small/control parameters in fp32 even when the model body runs in bf16.
    with torch.no_grad():
        for name, param in module.named_parameters():
            small = param.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if small and param.dtype != torch.float32:
                param.data = param.data.float()
        for submodule in module.modules():
            if isinstance(submodule, Rotary):
                submodule.inv_freq = submodule.make_inv_freq().to(submodule.inv_freq.device)


class Rotary(nn.Module):
    # Caches cos/sin tables per sequence length on the current device.
    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        self.dim, self.base = dim, base
        self.register_buffer("inv_freq", self.make_inv_freq(), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def make_inv_freq(self) -> Tensor:
        return 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos_cached is None or self._seq_len_cached != seq_len or self._cos_cached.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos_cached = freqs.cos()[None, None, :, :]
            self._sin_cached = freqs.sin()[None, None, :, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    rotated = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((rotated, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        rope_base: float,
        rope_dims: int,
        qk_gain_init: float,
        use_xsa: bool,
    ):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = rope_dims if rope_dims > 0 else self.head_dim
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, base=rope_base)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        if self.use_xsa:
            # Exclusive self-attention: drop what of the output lies along the position's own value.
            group = self.num_heads // self.num_kv_heads
            vn = F.normalize(v, dim=-1).repeat_interleave(group, dim=1)
            y = y - (y * vn).sum(dim=-1, keepdim=True) * vn
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    # relu^2 MLP from the original modded-nanogpt setup
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        hidden = mlp_mult * dim
        self.fc = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        return self.proj(x.square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(
            dim,
            args.num_heads,
            args.num_kv_heads,
            args.rope_base,
            args.rope_dims,
            args.qk_gain_init,
            use_xsa=layer_idx >= args.num_layers - args.xsa_last_n,
        )
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale = 1.0 / math.sqrt(layer_idx + 1) if args.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_scale)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        mlp_out = self.mlp(self.mlp_norm(x) * self.ln_scale)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class BigramHashEmbedding(nn.Module):
    # A learned table of hashed (previous, current) input tokens, added to the token embedding. Only inputs are read.
    def __init__(self, bigram_vocab_size: int, bigram_dim: int, model_dim: int):
        super().__init__()
        self.bigram_vocab_size = bigram_vocab_size
        self.embed = nn.Embedding(bigram_vocab_size, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bigram_hash(self, tokens: Tensor) -> Tensor:
        t = tokens.to(torch.int32)
        mod = self.bigram_vocab_size - 1
        out = torch.empty_like(t)
        out[..., 0] = mod
        out[..., 1:] = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % mod
        return out.long()

    def forward(self, token_ids: Tensor) -> Tensor:
        h = self.proj(self.embed(self.bigram_hash(token_ids)))
        return h * self.scale.to(dtype=h.dtype)


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.tie_embeddings = args.tie_embeddings
        self.tied_embed_init_std = args.tied_embed_init_std
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = None
        if args.bigram_vocab_size > 0:
            self.bigram = BigramHashEmbedding(args.bigram_vocab_size, args.bigram_dim, args.model_dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self.lm_head = None if args.tie_embeddings else CastedLinear(args.model_dim, args.vocab_size)
        if self.lm_head is not None:
            self.lm_head._zero_init = True
        self._init_weights()

    def _init_weights(self) -> None:
        if self.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        depth = len(self.blocks)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)
                    if name.endswith(".c_v"):
                        with torch.no_grad():
                            module.weight.mul_(1.0 / math.sqrt(2 * depth))

    def forward_hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
        if self.bigram is not None:
            x = x + self.bigram(input_ids)
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

    def project(self, hidden: Tensor) -> Tensor:
        if self.tie_embeddings:
            logits_proj = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        else:
            logits_proj = self.lm_head(hidden)
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.project(self.forward_hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# AVERAGES
# -----------------------------


class WeightAverages:
    """An EMA of every step and an SWA of every swa_every-th step late in the warmdown."""

    def __init__(self, args: Hyperparameters, base_model: nn.Module):
        self.args = args
        self.ema = {k: v.detach().float().clone() for k, v in base_model.state_dict().items()}
        self.swa: dict[str, Tensor] | None = None
        self.swa_count = 0

    @torch.no_grad()
    def update(self, base_model: nn.Module, step: int, scale: float) -> None:
        state = base_model.state_dict()
        if self.args.ema_enabled:
            decay = self.args.ema_decay
            for k, v in state.items():
                self.ema[k].mul_(decay).add_(v.detach().float(), alpha=1.0 - decay)
        if self.args.swa_enabled and scale < self.args.swa_start_scale and step % self.args.swa_every == 0:
            if self.swa is None:
                self.swa = {k: v.detach().float().clone() for k, v in state.items()}
            else:
                for k, v in state.items():
                    self.swa[k].add_(v.detach().float())
            self.swa_count += 1

    def final_average(self, base_model: nn.Module) -> tuple[str, dict[str, Tensor]]:
        # By the schedule alone: SWA once it holds enough snapshots, otherwise EMA, otherwise the last weights.
        state = base_model.state_dict()
        if self.args.swa_enabled and self.swa is not None and self.swa_count >= self.args.swa_min_count:
            picked = {k: v / self.swa_count for k, v in self.swa.items()}
            kind = f"swa:{self.swa_count}"
            if self.args.ema_enabled:
                picked = {k: 0.5 * (v + self.ema[k]) for k, v in picked.items()}
                kind += "+ema"
        elif self.args.ema_enabled:
            kind, picked = "ema", self.ema
        else:
            return "last", {k: v.detach().clone() for k, v in state.items()}
        return kind, {k: v.to(dtype=state[k].dtype) for k, v in picked.items()}


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    global zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # DISTRIBUTED + CUDA SETUP
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

    # TOKENIZER + VALIDATION METRIC SETUP
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    if not args.tokenizer_path.endswith(".model"):
        raise ValueError(f"Script only setup for SentencePiece .model file: {args.tokenizer_path}")
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    actual_train_files = len(list(Path(args.data_path).resolve().glob("fineweb_train_*.bin")))
    val_tokens = load_validation_tokens(args.val_files, args.train_seq_len)
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = build_sentencepiece_luts(
        sp, args.vocab_size, device
    )
    luts = (base_bytes_lut, has_leading_space_lut, is_boundary_token_lut)
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{Path(args.data_path).name} train_shards:{actual_train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # MODEL + OPTIMIZER SETUP
    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )

    # Token embedding and bigram table (Adam), untied head (Adam), matrices of the blocks (Muon), the rest (Adam).
    block_named_params = list(base_model.blocks.named_parameters())

    def is_control(name: str) -> bool:
        return any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)

    matrix_params = [p for name, p in block_named_params if p.ndim == 2 and not is_control(name)]
    scalar_params = [p for name, p in block_named_params if p.ndim < 2 or is_control(name)]
    scalar_params.append(base_model.skip_weights)
    token_lr = args.tied_embed_lr if args.tie_embeddings else args.embed_lr
    tok_groups = [{"params": [base_model.tok_emb.weight], "lr": token_lr, "base_lr": token_lr}]
    if base_model.bigram is not None:
        tok_groups.append({"params": [base_model.bigram.embed.weight], "lr": token_lr, "base_lr": token_lr})
        matrix_params.append(base_model.bigram.proj.weight)
        scalar_params.append(base_model.bigram.scale)
    adam_kwargs = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, weight_decay=args.adam_wd, fused=True)
    optimizer_tok = torch.optim.AdamW(tok_groups, **adam_kwargs)
    optimizer_muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        wd=args.muon_wd,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizer_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}], **adam_kwargs
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]
    if base_model.lm_head is not None:
        optimizers.append(
            torch.optim.AdamW(
                [{"params": [base_model.lm_head.weight], "lr": args.head_lr, "base_lr": args.head_lr}], **adam_kwargs
            )
        )

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
    log0(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads} xsa_last:{args.xsa_last_n}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f}"
    )
    log0(f"seed:{args.seed}")

    # DATA LOADER & MODEL WARMUP
    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # Training has to end early enough for the calibration to fall into the same ten minutes.
    train_budget_ms = None
    if args.max_wallclock_seconds > 0:
        train_budget_ms = 1000.0 * (args.max_wallclock_seconds - args.calib_reserve_seconds)

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

    # Warmup primes the compiled forward/backward/optimizer paths, then restores the initial weights and optimizers.
    if args.warmup_steps > 0:
        initial_model_state = {k: v.detach().cpu().clone() for k, v in base_model.state_dict().items()}
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
            if warmup_step + 1 == args.warmup_steps:
                log0(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        if distributed:
            model.require_backward_grad_sync = True
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # MAIN TRAINING LOOP
    averages = WeightAverages(args, base_model)
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
        if not qat_on and scale < args.late_qat_scale:
            set_qat(base_model, True)
            qat_on = True
            log0(f"late_qat:on step:{step} scale:{scale:.4f}")
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
        averages.update(base_model, step, scale)

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0 or stop_after_step is not None):
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

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # AVERAGE + CALIBRATION, on training shards and on training's clock
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    average_kind, average_state = averages.final_average(base_model)
    base_model.load_state_dict(average_state, strict=True)
    log0(f"average:{average_kind}")
    moments = collect_input_moments(args, base_model, train_loader, world_size, grad_accum_steps)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t0)
    training_time_ms += calib_ms
    log0(f"calibration on train shards took {calib_ms:.0f}ms, train+calibration {training_time_ms:.0f}ms")
    if args.max_wallclock_seconds > 0 and training_time_ms > 1000.0 * args.max_wallclock_seconds:
        raise RuntimeError(f"training took {training_time_ms:.0f}ms; raise CALIB_RESERVE_SECONDS")

    # SERIALIZATION + ROUNDTRIP VALIDATION
    quant_obj, quant_stats = quantize_state_dict(base_model.state_dict(), moments)
    if master_process:
        quant_buf = io.BytesIO()
        torch.save(quant_obj, quant_buf)
        quant_blob = zstandard.ZstdCompressor(level=args.zstd_level).compress(quant_buf.getvalue())
        with open("final_model.int6.ptz", "wb") as f:
            f.write(quant_blob)
        model_bytes = os.path.getsize("final_model.int6.ptz")
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        log0(f"Serialized model int6+zstd{args.zstd_level}: {model_bytes} bytes (payload {quant_stats['payload_bytes']})")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > args.size_limit:
            raise RuntimeError(f"submission is {total_bytes - args.size_limit} bytes over the limit")
    if distributed:
        dist.barrier()

    with open("final_model.int6.ptz", "rb") as f:
        packed = f.read()
    unpacked = torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(packed)), map_location="cpu")
    eval_model = GPT(args).to(device).bfloat16()
    for module in eval_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(eval_model)
    eval_model.load_state_dict(dequantize_state_dict(unpacked), strict=True)
    eval_model.eval()

    # EVALUATION. The plain sliding window is a comparison; the submitted number is the last line.
    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    if args.compare_sliding:
        t_part = time.perf_counter()
        s_loss, s_bpb = eval_val_sliding(
            args, eval_model, rank, world_size, device, val_tokens, *luts, stride=args.compare_stride
        )
        torch.cuda.synchronize()
        log0(
            f"compare_sliding val_loss:{s_loss:.4f} val_bpb:{s_bpb:.4f} stride:{args.compare_stride} "
            f"eval_time:{1000.0 * (time.perf_counter() - t_part):.0f}ms"
        )
    if args.ttt_enabled:
        ttt_model = copy.deepcopy(eval_model)
        ttt_loss, ttt_bpb = eval_val_ttt(args, ttt_model, rank, world_size, device, val_tokens, *luts)
        log0(f"compare_ttt val_loss:{ttt_loss:.4f} val_bpb:{ttt_bpb:.4f}")
        del ttt_model

    t_part = time.perf_counter()
    if args.slot_enabled:
        q_val_loss, q_val_bpb = eval_val_slot(
            args, eval_model, rank, world_size, device, val_tokens, *luts, log0=log0
        )
    else:
        q_val_loss, q_val_bpb = eval_val_sliding(
            args, eval_model, rank, world_size, device, val_tokens, *luts, stride=args.eval_stride
        )
    torch.cuda.synchronize()
    log0(
        f"final_slot val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} stride:{args.eval_stride} "
        f"steps:{args.slot_steps} eval_time:{1000.0 * (time.perf_counter() - t_part):.0f}ms "
        f"eval_total:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )
    log0(f"final_slot_exact val_loss:{q_val_loss:.8f} val_bpb:{q_val_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
