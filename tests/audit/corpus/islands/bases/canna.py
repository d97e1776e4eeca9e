"""
train_gpt.py: the original baseline, grown step by step.

What was added on top of the starting point, in the order in which it went in:
  * 11 layers, 3x MLP, seq len 2048
  * SmearGate in front of the blocks, BigramHash embedding
  * Muon weight decay, SWA over the warmdown
  * int6 for the block matrices, int8 for the embeddings, zstd-22 on top
  * sliding window evaluation, stride 64
  * score-first TTT over chunks with AdamW (as in #549)

Hard stop: keep this file below 1600 lines so that it stays readable.
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
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    # Taken off the cap, so that calibration + quantization still lie inside the 600 s.
    finish_reserve_seconds = float(os.environ.get("FINISH_RESERVE_SECONDS", 16.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 4096))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    bos_id = int(os.environ.get("BOS_ID", 1))

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
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.04))
    adam_weight_decay = float(os.environ.get("ADAM_WEIGHT_DECAY", 0.01))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # SWA: plain mean of snapshots taken while the learning rate is below this fraction of its peak.
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    swa_start_frac = float(os.environ.get("SWA_START_FRAC", 0.4))
    swa_every = int(os.environ.get("SWA_EVERY", 50))

    # Quantization.
    calib_batches = int(os.environ.get("CALIB_BATCHES", 8))
    calib_batch_tokens = int(os.environ.get("CALIB_BATCH_TOKENS", 131_072))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")

    # Evaluation.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))

    # Score-first test-time training.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_lr = float(os.environ.get("TTT_LR", 1e-4))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 2))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_weight_decay = float(os.environ.get("TTT_WEIGHT_DECAY", 0.0))
    # No more weight updates once evaluation as a whole has run this long; scoring goes on.
    ttt_update_deadline_seconds = float(os.environ.get("TTT_UPDATE_DEADLINE_SECONDS", 440.0))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------
#
# As borrowed from modded-nanogpt
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
                if weight_decay > 0.0:
                    p.mul_(1.0 - lr * weight_decay)
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------
#
# It's common for small models have a large fraction of their parameters be embeddings, since the 2 * d_model * d_vocab
# vectors can be gigantic. Instead of locking the tokenizer, we let you bring your own and calculate our validation
# metrics on the average compression of the validation set. We calculate BPB (bits-per-byte) instead of validation
# loss, so we need methods to count the number of bits per token in the tokenizer.


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


def count_target_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    # Bytes of the original text behind each target. The space in front of a word exists only if something
    # other than a document start came before it.
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
    return token_bytes.to(torch.float64)


def load_validation_tokens(pattern: str, seq_len: int) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).to(torch.int32).contiguous()
    if tokens.numel() <= seq_len:
        raise ValueError(f"Validation split is too short for TRAIN_SEQ_LEN={seq_len}")
    return tokens


def reduce_score(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    # Sums over ranks -> (nats per token, bits per byte).
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)
    val_loss = (loss_sum / token_count).item()
    bits_per_token = val_loss / math.log(2.0)
    tokens_per_byte = token_count.item() / byte_count.item()
    return float(val_loss), float(bits_per_token * tokens_per_byte)


def eval_val(
    args: Hyperparameters,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    # Validation computes two metrics:
    # - val_loss: token cross-entropy (natural log)
    # - val_bpb: tokenizer-agnostic compression metric used by the challenge
    # Non-overlapping sequences; the last one is padded to keep a single compiled shape.
    seq_len = args.train_seq_len
    total_targets = val_tokens.numel() - 1
    total_seqs = (total_targets + seq_len - 1) // seq_len
    local_batch_seqs = max(1, args.val_batch_size // (world_size * seq_len))
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)

    with torch.no_grad():
        for batch_seq_start in range(seq_start, seq_end, local_batch_seqs):
            batch_seq_end = min(batch_seq_start + local_batch_seqs, seq_end)
            raw_start = batch_seq_start * seq_len
            raw_end = min(batch_seq_end * seq_len, total_targets)
            n = raw_end - raw_start
            local = val_tokens[raw_start : raw_end + 1].to(device=device, dtype=torch.int64)
            x = torch.zeros(local_batch_seqs * seq_len, device=device, dtype=torch.int64)
            x[:n] = local[:-1]
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                logits = logits_fn(x.view(local_batch_seqs, seq_len))
            logits = logits.reshape(-1, logits.size(-1))[:n].float()
            nll = F.cross_entropy(logits, local[1:], reduction="none")
            val_loss_sum += nll.to(torch.float64).sum()
            val_token_count += float(n)
            val_byte_count += count_target_bytes(local[:-1], local[1:], luts).sum()

    return reduce_score(val_loss_sum, val_token_count, val_byte_count)


# -----------------------------
# SLIDING WINDOW EVALUATION
# -----------------------------


def build_windows(total_targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    # (window start, first scored target, end of scored targets). Target i is token i + 1.
    # The first window scores all it holds, each later one only what the one before did not reach.
    # The last window is pulled to the left so that it is full as well.
    first_end = min(seq_len, total_targets)
    windows = [(0, 0, first_end)]
    scored_to = first_end
    while scored_to < total_targets:
        end = min(scored_to + stride, total_targets)
        windows.append((end - seq_len, scored_to, end))
        scored_to = end
    return windows


def gather_window_batch(
    tokens: Tensor, batch: list[tuple[int, int, int]], rows: int, seq_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    # Inputs, targets and the mask of targets that count. Filler rows (to keep the shape) have an empty mask.
    device = tokens.device
    padded = batch + [(0, 0, 0)] * (rows - len(batch))
    spans = torch.tensor(padded, dtype=torch.int64, device=device)
    pos = spans[:, :1] + torch.arange(seq_len, device=device)
    x = tokens[pos].to(torch.int64)
    y = tokens[pos + 1].to(torch.int64)
    mask = (pos >= spans[:, 1:2]) & (pos < spans[:, 2:3])
    return x, y, mask


def eval_val_sliding(
    args: Hyperparameters,
    logits_fn,
    rank: int,
    world_size: int,
    val_tokens_dev: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    # Every target once, each (but for the first window) with at least seq_len - stride tokens of context.
    device = val_tokens_dev.device
    seq_len = args.train_seq_len
    rows = args.eval_batch_seqs
    windows = build_windows(val_tokens_dev.numel() - 1, seq_len, args.eval_stride)
    my_windows = windows[len(windows) * rank // world_size : len(windows) * (rank + 1) // world_size]

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    with torch.no_grad():
        for i in range(0, len(my_windows), rows):
            x, y, mask = gather_window_batch(val_tokens_dev, my_windows[i : i + rows], rows, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                logits = logits_fn(x)
            nll = F.cross_entropy(
                logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction="none"
            ).view_as(y)
            loss_sum += nll[mask].to(torch.float64).sum()
            token_count += mask.sum().to(torch.float64)
            byte_count += count_target_bytes(x[mask], y[mask], luts).sum()

    return reduce_score(loss_sum, token_count, byte_count)


# -----------------------------
# SCORE-FIRST TEST-TIME TRAINING
# -----------------------------
#
# The validation stream is cut into chunks. All targets of a chunk are scored with the weights as they came out of
# the chunks before it; only then is the chunk trained on. The last chunk is never trained on, nothing comes after it.


def ttt_parameters(base_model: nn.Module, freeze_blocks: int) -> list[nn.Parameter]:
    # The embedding tables and the lowest blocks stay as they are, everything else adapts.
    frozen = {"tok_emb.weight", "bigram.table.weight"}
    chosen: list[nn.Parameter] = []
    for name, p in base_model.named_parameters():
        low_block = name.startswith("blocks.") and int(name.split(".")[1]) < freeze_blocks
        p.requires_grad_(name not in frozen and not low_block)
        if p.requires_grad:
            chosen.append(p)
    return chosen


def ttt_train_chunk(
    args: Hyperparameters,
    base_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    rank: int,
    world_size: int,
    val_tokens_dev: Tensor,
    chunk_lo: int,
    chunk_hi: int,
) -> float:
    # Several epochs over the targets chunk_lo <= i < chunk_hi. Sequences are dealt out to the ranks, gradients are
    # summed, so that all ranks keep the same weights.
    seq_len = args.train_seq_len
    n_seqs = (chunk_hi - chunk_lo) // seq_len
    per_rank = (n_seqs + world_size - 1) // world_size
    steps = (per_rank + args.ttt_batch_seqs - 1) // args.ttt_batch_seqs
    last_loss = 0.0
    base_model.train()
    for _ in range(args.ttt_epochs):
        for s in range(steps):
            sl = slice(s * args.ttt_batch_seqs, (s + 1) * args.ttt_batch_seqs)
            step_rows = sum(len(range(r, n_seqs, world_size)[sl]) for r in range(world_size))
            mine = list(range(rank, n_seqs, world_size)[sl])
            optimizer.zero_grad(set_to_none=True)
            if mine:
                starts = torch.tensor([chunk_lo + j * seq_len for j in mine], device=val_tokens_dev.device)
                pos = starts[:, None] + torch.arange(seq_len, device=val_tokens_dev.device)
                x = val_tokens_dev[pos].to(torch.int64)
                y = val_tokens_dev[pos + 1].to(torch.int64)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    loss = base_model(x, y)
                (loss * (len(mine) / step_rows)).backward()
                last_loss = float(loss.detach())
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if world_size > 1:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            if args.ttt_grad_clip > 0:
                torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    base_model.eval()
    return last_loss


def eval_val_ttt(
    args: Hyperparameters,
    base_model: nn.Module,
    logits_fn,
    rank: int,
    world_size: int,
    val_tokens_dev: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    eval_started: float,
    log0,
) -> tuple[float, float]:
    device = val_tokens_dev.device
    seq_len = args.train_seq_len
    stride = args.eval_stride
    chunk = args.ttt_chunk_tokens
    rows = args.eval_batch_seqs
    if chunk % stride != 0 or seq_len % stride != 0 or chunk < seq_len:
        raise ValueError("TTT_CHUNK_TOKENS and TRAIN_SEQ_LEN must be multiples of EVAL_STRIDE")
    total_targets = val_tokens_dev.numel() - 1
    n_chunks = (total_targets + chunk - 1) // chunk

    # A window belongs to the chunk in which its scored targets lie; because of the multiples above none straddles.
    chunk_windows: list[list[tuple[int, int, int]]] = [[] for _ in range(n_chunks)]
    for window in build_windows(total_targets, seq_len, stride):
        chunk_windows[window[1] // chunk].append(window)

    params = ttt_parameters(base_model, args.ttt_freeze_blocks)
    optimizer = torch.optim.AdamW(
        params, lr=args.ttt_lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=args.ttt_weight_decay
    )
    log0(f"ttt:chunks={n_chunks} chunk_tokens={chunk} params={sum(p.numel() for p in params)} epochs={args.ttt_epochs}")

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    updates_stopped = False

    base_model.eval()
    for ci in range(n_chunks):
        # 1) score
        windows = chunk_windows[ci]
        my_windows = windows[len(windows) * rank // world_size : len(windows) * (rank + 1) // world_size]
        with torch.no_grad():
            for i in range(0, len(my_windows), rows):
                x, y, mask = gather_window_batch(val_tokens_dev, my_windows[i : i + rows], rows, seq_len)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    logits = logits_fn(x)
                logits = logits.float()
                nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").view_as(y)
                loss_sum += nll[mask].to(torch.float64).sum()
                token_count += mask.sum().to(torch.float64)
                byte_count += count_target_bytes(x[mask], y[mask], luts).sum()
        if world_size > 1:
            dist.barrier()

        # 2) train on what has just been scored
        chunk_lo = ci * chunk
        chunk_hi = min(chunk_lo + chunk, total_targets)
        if not updates_stopped:
            late = torch.tensor(float(time.perf_counter() - eval_started > args.ttt_update_deadline_seconds), device=device)
            if world_size > 1:
                dist.all_reduce(late, op=dist.ReduceOp.MAX)
            if late.item() > 0:
                updates_stopped = True
                log0(f"ttt:updates stopped at chunk {ci}/{n_chunks}")
        if ci < n_chunks - 1 and not updates_stopped:
            lr = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(n_chunks - 1, 1)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            ttt_train_chunk(
                args, base_model, optimizer, params, rank, world_size, val_tokens_dev, chunk_lo, chunk_hi
            )

        if ci % 200 == 0 and token_count.item() > 0:
            # rank 0's part only, to watch the trend
            running = (loss_sum / math.log(2.0) / byte_count).item()
            log0(f"ttt_chunk:{ci}/{n_chunks} running_bpb_rank0:{running:.5f}")

    for p in base_model.parameters():
        p.requires_grad_(True)
    return reduce_score(loss_sum, token_count, byte_count)


# -----------------------------
# POST-TRAINING QUANTIZATION
# -----------------------------
#
# Block matrices go to int6 (one scale per row, clip chosen by weighted squared error), embeddings to int8, the small
# control tensors stay in float. The bytes are then compressed with zstd; a 6-bit value in an int8 container costs
# about 4.7 bits after that.

CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights,smear,bigram.scale",
    ).split(",")
    if pattern
)
INT8_NAME_PATTERNS = ("tok_emb", "bigram.table", "lm_head")
KEEP_FLOAT_MAX_NUMEL = 65_536
CLIP_RATIOS = (1.0, 0.98, 0.95, 0.92, 0.88, 0.84, 0.80)


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def keep_float_tensor(name: str, t: Tensor, passthrough_orig_dtypes: dict[str, str]) -> Tensor:
    if any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
        return t.float().contiguous()
    if t.dtype in {torch.float32, torch.bfloat16}:
        passthrough_orig_dtypes[name] = str(t.dtype).removeprefix("torch.")
        return t.to(dtype=torch.float16).contiguous()
    return t


def quantize_rows(t: Tensor, bits: int, column_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    # Symmetric, one scale per row. The clip ratio is searched per row.
    qmax = (1 << (bits - 1)) - 1
    t32 = t.float()
    weight = torch.ones(t32.shape[1], device=t32.device) if column_weight is None else column_weight.to(t32.device)
    weight = weight / weight.mean().clamp_min(1e-12)
    row_max = t32.abs().amax(dim=1).clamp_min(1e-8)
    best_err = torch.full_like(row_max, float("inf"))
    best_q = torch.zeros_like(t32, dtype=torch.int8)
    best_scale = torch.ones_like(row_max)
    for ratio in CLIP_RATIOS:
        scale = (row_max * ratio / qmax).to(torch.float16).float().clamp_min(1e-7)
        q = torch.clamp(torch.round(t32 / scale[:, None]), -qmax, qmax)
        err = ((q * scale[:, None] - t32).square() * weight).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
        best_q = torch.where(better[:, None], q.to(torch.int8), best_q)
    return best_q.contiguous(), best_scale.to(torch.float16).contiguous()


def collect_column_stats(
    args: Hyperparameters,
    base_model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    world_size: int,
) -> dict[str, Tensor]:
    # Mean squared input per column of every linear layer, over a few batches.
    stats: dict[str, Tensor] = {}
    hooks = []

    def make_hook(key: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            stats[key] = stats.get(key, 0.0) + x.square().mean(dim=0)

        return hook

    for name, module in base_model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_hook(make_hook(name + ".weight")))
    base_model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
        for x, y in batches:
            base_model(x, y)
    for h in hooks:
        h.remove()
    base_model.train()
    for key in sorted(stats):
        stats[key] /= len(batches)
        if world_size > 1:
            dist.all_reduce(stats[key], op=dist.ReduceOp.AVG)
    return stats


def quantize_state_dict_mixed(
    state_dict: dict[str, Tensor], column_stats: dict[str, Tensor]
) -> tuple[dict[str, object], dict[str, int]]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    passthrough: dict[str, Tensor] = {}
    passthrough_orig_dtypes: dict[str, str] = {}
    stats = dict.fromkeys(
        ("param_count", "num_tensors", "num_int6", "num_int8", "num_float", "baseline_tensor_bytes", "payload_bytes"), 0
    )

    for name, tensor in state_dict.items():
        t = tensor.detach()
        stats["param_count"] += int(t.numel())
        stats["num_tensors"] += 1
        stats["baseline_tensor_bytes"] += tensor_nbytes(t)
        is_table = any(pattern in name for pattern in INT8_NAME_PATTERNS)
        is_control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
        if t.ndim != 2 or is_control or not t.is_floating_point() or t.numel() <= KEEP_FLOAT_MAX_NUMEL:
            kept = keep_float_tensor(name, t.cpu(), passthrough_orig_dtypes)
            passthrough[name] = kept
            stats["num_float"] += 1
            stats["payload_bytes"] += tensor_nbytes(kept)
            continue
        q, s = quantize_rows(t, 8 if is_table else 6, column_stats.get(name))
        quantized[name] = q.cpu()
        scales[name] = s.cpu()
        dtypes[name] = str(t.dtype).removeprefix("torch.")
        stats["num_int8" if is_table else "num_int6"] += 1
        stats["payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)

    obj: dict[str, object] = {
        "__quant_format__": "int6_int8_per_row_v1",
        "quantized": quantized,
        "scales": scales,
        "dtypes": dtypes,
        "passthrough": passthrough,
    }
    if passthrough_orig_dtypes:
        obj["passthrough_orig_dtypes"] = passthrough_orig_dtypes
    return obj, stats


def dequantize_state_dict_mixed(obj: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    passthrough_orig_dtypes = obj.get("passthrough_orig_dtypes", {})
    for name, q in obj["quantized"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        out[name] = (q.float() * obj["scales"][name].float()[:, None]).to(dtype).contiguous()
    for name, t in obj["passthrough"].items():
        # Restore small tensors, undoing the temporary fp16 storage cast if needed.
        out_t = t.detach().cpu().contiguous()
        orig_dtype = passthrough_orig_dtypes.get(name)
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
        local_tokens -= local_tokens % seq_len
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
            is_control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if (param.ndim < 2 or is_control) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # cos/sin are computed on the fly: caching them breaks as soon as a no-grad pass fills the cache before TTT.
    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(seq_len, device=device, dtype=torch.float32)
        freqs = torch.outer(t, self.inv_freq.to(device=device, dtype=torch.float32))
        return freqs.cos()[None, None, :, :].to(dtype=dtype), freqs.sin()[None, None, :, :].to(dtype=dtype)


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
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            attn_mask=None,
            is_causal=True,
            enable_gqa=(self.num_kv_heads != self.num_heads),
        )
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    # relu^2 MLP from the original modded-nanogpt setup
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        return self.proj(x.square())


class SmearGate(nn.Module):
    # Mixes a little of the previous token's embedding into each token. A document's first token (BOS) takes nothing.
    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.gate = nn.Parameter(torch.full((dim,), -3.0, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(dtype=x.dtype)[None, None, :]
        inner = (ids != self.bos_id).to(dtype=x.dtype).unsqueeze(-1)
        prev = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        return x + g * inner * (prev - x)


class BigramHash(nn.Module):
    # Hashed (previous token, token) pair -> small table -> model dim. Learned, part of the artifact.
    def __init__(self, buckets: int, dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.table = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.table.weight)
        self.proj = CastedLinear(dim, model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bucket_ids(self, ids: Tensor) -> Tensor:
        # The last bucket stands for "no previous token": window start and document start.
        out = torch.full_like(ids, self.buckets - 1)
        mixed = torch.bitwise_xor(ids[:, 1:] * 36313, ids[:, :-1] * 27191) % (self.buckets - 1)
        out[:, 1:] = torch.where(ids[:, 1:] == self.bos_id, out[:, 1:], mixed)
        return out

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        h = self.table(self.bucket_ids(ids)).to(dtype)
        return self.proj(h) * self.scale.to(dtype)


class Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: float, rope_base: float, qk_gain_init: float
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
    def __init__(self, args: Hyperparameters):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.tie_embeddings = args.tie_embeddings
        self.tied_embed_init_std = args.tied_embed_init_std
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramHash(args.bigram_buckets, args.bigram_dim, args.model_dim, args.bos_id)
        self.smear = SmearGate(args.model_dim, args.bos_id)
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
        self._init_weights()

    def _init_weights(self) -> None:
        if self.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
        x = x + self.bigram(input_ids, x.dtype)
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

    def project(self, h: Tensor) -> Tensor:
        if self.tie_embeddings:
            logits_proj = F.linear(h, self.tok_emb.weight.to(h.dtype))
        else:
            logits_proj = self.lm_head(h)
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.project(self.hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# STOCHASTIC WEIGHT AVERAGING
# -----------------------------


class SWAverager:
    # Running fp32 sum of snapshots of the weights, on the device.
    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        for name, t in module.state_dict().items():
            if name in self.sums:
                self.sums[name].add_(t.float())
            else:
                self.sums[name] = t.detach().float().clone()
        self.count += 1

    @torch.no_grad()
    def mean(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (total / self.count).to(like[name].dtype) for name, total in self.sums.items()}


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
    if sp.bos_id() >= 0 and sp.bos_id() != args.bos_id:
        raise ValueError(f"BOS_ID={args.bos_id} does not match tokenizer bos_id={sp.bos_id()}")
    dataset_dir = Path(args.data_path).resolve()
    actual_train_files = len(list(dataset_dir.glob("fineweb_train_*.bin")))
    val_tokens = load_validation_tokens(args.val_files, args.train_seq_len)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{dataset_dir.name} train_shards:{actual_train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
        if isinstance(module, Rotary):
            module.inv_freq.data = (
                1.0
                / (args.rope_base ** (torch.arange(0, module.inv_freq.numel() * 2, 2).float() / (module.inv_freq.numel() * 2)))
            ).to(device)
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model

    # Optimizer split:
    # - token embedding + bigram table (Adam)
    # - untied lm_head (Adam) uses HEAD_LR
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
    scalar_params += [base_model.skip_weights, base_model.smear.gate, base_model.bigram.scale]
    token_lr = args.tied_embed_lr if args.tie_embeddings else args.embed_lr
    optimizer_tok = torch.optim.AdamW(
        [
            {"params": [base_model.tok_emb.weight], "lr": token_lr, "base_lr": token_lr},
            {"params": [base_model.bigram.table.weight], "lr": token_lr, "base_lr": token_lr},
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
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]
    if base_model.lm_head is not None:
        optimizer_head = torch.optim.AdamW(
            [{"params": [base_model.lm_head.weight], "lr": args.head_lr, "base_lr": args.head_lr}],
            betas=(args.beta1, args.beta2),
            eps=args.adam_eps,
            weight_decay=args.adam_weight_decay,
            fused=True,
        )
        optimizers.insert(1, optimizer_head)

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads}")
    log0(
        f"tie_embeddings:{args.tie_embeddings} embed_lr:{token_lr} "
        f"matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr} muon_wd:{args.muon_weight_decay}"
    )
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f} reserve:{args.finish_reserve_seconds:.3f}"
    )

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # The step loop ends early by the reserve, calibration and quantization use what is left of the cap.
    stop_ms = 1000.0 * (args.max_wallclock_seconds - args.finish_reserve_seconds)

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(stop_ms - elapsed_ms, 0.0)
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

    swa = SWAverager()
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
            base_model.eval()
            val_loss, val_bpb = eval_val(args, logits_fn, rank, world_size, device, val_tokens, luts)
            base_model.train()
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
        if args.swa_enabled and scale < args.swa_start_frac and step % args.swa_every == 0:
            swa.add(base_model)

        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        should_log_train = args.train_log_every > 0 and (
            step <= 10 or step % args.train_log_every == 0 or stop_after_step is not None
        )
        if should_log_train:
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap.
        reached_cap = approx_training_time_ms >= stop_ms
        if distributed:
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
    # AVERAGING, CALIBRATION, SERIALIZATION
    # -----------------------------
    #
    # Still on the training clock. Statistics come from the train stream, right where training left it.

    torch.cuda.synchronize()
    finish_t0 = time.perf_counter()
    if swa.count > 0:
        base_model.load_state_dict(swa.mean(base_model.state_dict()), strict=True)
        log0(f"swa: applied mean of {swa.count} snapshots")
    calib_data = [
        train_loader.next_batch(args.calib_batch_tokens * world_size, args.train_seq_len, 1)
        for _ in range(args.calib_batches)
    ]
    column_stats = collect_column_stats(args, base_model, calib_data, world_size)
    del calib_data

    if master_process:
        quant_obj, quant_stats = quantize_state_dict_mixed(base_model.state_dict(), column_stats)
        quant_buf = io.BytesIO()
        torch.save(quant_obj, quant_buf)
        quant_raw = quant_buf.getvalue()
    torch.cuda.synchronize()
    finish_ms = 1000.0 * (time.perf_counter() - finish_t0)
    log0(
        f"finish:swa+calibration+quantization took {finish_ms:.0f}ms, "
        f"train+finish {training_time_ms + finish_ms:.0f}ms"
    )

    if master_process:
        quant_blob = zstandard.ZstdCompressor(level=args.zstd_level).compress(quant_raw)
        with open(args.artifact_path, "wb") as f:
            f.write(quant_blob)
        quant_file_bytes = os.path.getsize(args.artifact_path)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = quant_file_bytes + code_bytes
        ratio = quant_stats["baseline_tensor_bytes"] / max(quant_stats["payload_bytes"], 1)
        log0(
            f"quantized tensors int6:{quant_stats['num_int6']} int8:{quant_stats['num_int8']} "
            f"float:{quant_stats['num_float']} payload:{quant_stats['payload_bytes']} payload_ratio:{ratio:.2f}x"
        )
        log0(f"Serialized model zstd: {quant_file_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > 16_000_000:
            raise RuntimeError(f"submission of {total_bytes} bytes is too large")
    if distributed:
        dist.barrier()

    # -----------------------------
    # EVALUATION
    # -----------------------------
    #
    # Everything from here on works with the weights read back from the artifact.

    torch.cuda.synchronize()
    eval_started = time.perf_counter()
    with open(args.artifact_path, "rb") as f:
        quant_blob_disk = f.read()
    quant_state = torch.load(
        io.BytesIO(zstandard.ZstdDecompressor().decompress(quant_blob_disk)), map_location="cpu", weights_only=True
    )
    base_model.load_state_dict(dequantize_state_dict_mixed(quant_state), strict=True)
    base_model.eval()

    t_eval = time.perf_counter()
    q_val_loss, q_val_bpb = eval_val(args, logits_fn, rank, world_size, device, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"final_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )

    val_tokens_dev = val_tokens.to(device)
    t_eval = time.perf_counter()
    sw_val_loss, sw_val_bpb = eval_val_sliding(args, logits_fn, rank, world_size, val_tokens_dev, luts)
    torch.cuda.synchronize()
    log0(
        f"final_sliding_window val_loss:{sw_val_loss:.4f} val_bpb:{sw_val_bpb:.4f} "
        f"stride:{args.eval_stride} eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )
    log0(f"final_sliding_window_exact val_loss:{sw_val_loss:.8f} val_bpb:{sw_val_bpb:.8f}")

    if args.ttt_enabled:
        t_eval = time.perf_counter()
        ttt_val_loss, ttt_val_bpb = eval_val_ttt(
            args, base_model, logits_fn, rank, world_size, val_tokens_dev, luts, eval_started, log0
        )
        torch.cuda.synchronize()
        log0(
            f"legal_ttt val_loss:{ttt_val_loss:.4f} val_bpb:{ttt_val_bpb:.4f} "
            f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
        )
        log0(f"legal_ttt_exact val_loss:{ttt_val_loss:.8f} val_bpb:{ttt_val_bpb:.8f}")

    log0(f"eval_total:{time.perf_counter() - eval_started:.1f}s")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
