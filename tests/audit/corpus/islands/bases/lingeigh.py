"""
The challenge's baseline `train_gpt.py` with a handful of changes, kept in the baseline's order so that a diff is readable:

- 10 layers and a 3x MLP, paid for by int6 rows (int8 for the embedding) under LZMA instead of int8 under zlib;
- the clip of each row is picked by an error weighted with input moments taken from training batches, inside the ten minutes;
- a mean over the last checkpoints (SWA) while the learning rate warms down;
- `eval_val_sliding`: a sliding window that scores every token once;
- `eval_val_ttt`: score-first test-time training by chunks, with an n-gram tilt whose normaliser runs over the vocabulary.
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
# Simple run defaults, every one of them overridable from the environment:
# - 10 transformer blocks at width 512
# - 8 attention heads with 4 KV heads (GQA) and 3x MLP expansion
# - vocab size 1024, sequence length 1024, tied embeddings
# - 524,288 train tokens per step for 20,000 iterations with a ~10 minute cap


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

    # Training length. The loop stops early enough to leave room for the moments that the quantiser wants.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 2400))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 30.0))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 16))

    # Mean of the last checkpoints.
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.35))
    swa_every = int(os.environ.get("SWA_EVERY", 50))

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
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))

    # Optimizer hyperparameters.
    embed_lr = float(os.environ.get("EMBED_LR", 0.6))
    head_lr = float(os.environ.get("HEAD_LR", 0.008))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.04))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.03))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.03))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.88))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 900))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.03))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.5))

    # Sliding-window evaluation.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_windows = int(os.environ.get("EVAL_BATCH_WINDOWS", 64))

    # Test-time training: a chunk is scored, then trained on. Adapting ends when its share of the ten minutes is used up.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32_768))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 2))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 4))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_adapt_seconds = float(os.environ.get("TTT_ADAPT_SECONDS", 300.0))

    # N-gram tilt: the boosts (in nats, by how often the hint came true before) were set on training shards.
    ngram_enabled = bool(int(os.environ.get("NGRAM_ENABLED", "1")))
    ngram_order = int(os.environ.get("NGRAM_ORDER", 5))
    ngram_bits = int(os.environ.get("NGRAM_BITS", 22))
    ngram_boosts = tuple(float(b) for b in os.environ.get("NGRAM_BOOSTS", "0.0,0.5,0.9,1.4,1.9").split(","))

    # Code and compressed model together, decimal.
    size_limit = int(os.environ.get("SIZE_LIMIT", 16_000_000))


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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float, nesterov: bool = True):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay, nesterov=nesterov),
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
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------
#
# Submissions are scored in bits per byte of the original text, so the bytes of every target token have to be counted
# from the tokenizer: the piece without its mark, one byte for a byte-fallback token, and the byte of a leading space
# where the token before is not a boundary.


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
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*; all of it is kept.
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


def count_target_bytes(luts: tuple[Tensor, Tensor, Tensor], prev_ids: Tensor, tgt_ids: Tensor) -> Tensor:
    """Bytes of the original text behind each target token."""
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
    return token_bytes.to(torch.float64)


def loss_and_bpb(sums: Tensor) -> tuple[float, float]:
    """Mean loss in nats per token and bits per byte, from summed (loss, tokens, bytes)."""
    loss_sum, token_count, byte_count = (float(v) for v in sums.tolist())
    return loss_sum / token_count, loss_sum / math.log(2.0) / byte_count


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
    # Plain validation by blocks, as the baseline does it (whole sequences only): it is logged and decides nothing.
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    if local_batch_tokens < args.train_seq_len:
        raise ValueError(
            f"VAL_BATCH_SIZE={args.val_batch_size} gives less than one sequence of {args.train_seq_len} per rank"
        )
    local_batch_seqs = local_batch_tokens // args.train_seq_len
    total_seqs = (val_tokens.numel() - 1) // args.train_seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    sums = torch.zeros(3, device=device, dtype=torch.float64)

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
            sums[0] += batch_loss.to(torch.float64) * float(y.numel())
            sums[1] += float(y.numel())
            sums[2] += count_target_bytes(luts, x.reshape(-1), y.reshape(-1)).sum()

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    model.train()
    return loss_and_bpb(sums)


# -----------------------------
# SLIDING-WINDOW EVALUATION
# -----------------------------
#
# Windows of `train_seq_len` tokens start every `stride` tokens. The first one is scored as a whole, every other one in
# its last `stride` places. A window exists only where it still has such places, so each target is scored exactly once.


def window_starts(total_targets: int, seq_len: int, stride: int) -> list[int]:
    starts = range(0, total_targets, stride)
    return [ws for ws in starts if ws == 0 or ws + seq_len - stride < total_targets]


def scored_span(ws: int, total_targets: int, seq_len: int, stride: int) -> tuple[int, int]:
    """The places of the stream [first, end) that the window starting at `ws` scores."""
    first = 0 if ws == 0 else ws + seq_len - stride
    return first, min(ws + seq_len, total_targets)


def load_windows(
    val_tokens: Tensor, starts: list[int], total_targets: int, seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch of windows; a short last window is padded at its end, which no place before sees."""
    x = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    y = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    for i, ws in enumerate(starts):
        end = min(ws + seq_len, total_targets)
        local = val_tokens[ws : end + 1].to(dtype=torch.int64)
        x[i, : end - ws] = local[:-1]
        y[i, : end - ws] = local[1:]
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def eval_val_sliding(
    args: Hyperparameters,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Bits per byte of the fixed model over all of the validation tokens."""
    seq_len, stride = args.train_seq_len, args.eval_stride
    total_targets = val_tokens.numel() - 1
    starts = window_starts(total_targets, seq_len, stride)
    mine = starts[(len(starts) * rank) // world_size : (len(starts) * (rank + 1)) // world_size]
    sums = torch.zeros(3, device=device, dtype=torch.float64)

    with torch.no_grad():
        for bi in range(0, len(mine), args.eval_batch_windows):
            batch = mine[bi : bi + args.eval_batch_windows]
            x, y = load_windows(val_tokens, batch, total_targets, seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)
            for i, ws in enumerate(batch):
                first, end = scored_span(ws, total_targets, seq_len, stride)
                a, b = first - ws, end - ws
                sums[0] += nll[i, a:b].to(torch.float64).sum()
                sums[1] += float(b - a)
                sums[2] += count_target_bytes(luts, x[i, a:b], y[i, a:b]).sum()

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    if int(sums[1].item()) != total_targets:
        raise RuntimeError(f"sliding window scored {int(sums[1].item())} of {total_targets} tokens")
    return loss_and_bpb(sums)


# -----------------------------
# N-GRAM TILT
# -----------------------------
#
# A table remembers, for each hashed context of `order` tokens, the token that followed it last and how often in a row
# it did. It is filled with scored chunks only. The token it proposes gets its logit raised; the softmax is then taken
# again over the vocabulary, so that what is scored is a distribution whatever the hash may confuse.


class NgramHints:
    def __init__(self, order: int, bits: int, boosts: tuple[float, ...]):
        self.order = order
        self.mask = np.uint64((1 << bits) - 1)
        self.boosts = np.asarray(boosts, dtype=np.float32)
        self.next_token = np.full(1 << bits, -1, dtype=np.int64)
        self.streak = np.zeros(1 << bits, dtype=np.int64)

    def slots(self, tokens: np.ndarray, first: int, end: int) -> np.ndarray:
        """The slot of the context that ends at each place of [first, end): tokens up to and with the place's input."""
        hashed = np.zeros(end - first, dtype=np.uint64)
        for back in range(self.order - 1, -1, -1):
            places = np.maximum(np.arange(first - back, end - back), 0)
            hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + tokens[places].astype(np.uint64) + np.uint64(1)
        return ((hashed ^ (hashed >> np.uint64(31))) & self.mask).astype(np.int64)

    def propose(self, tokens: np.ndarray, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Hint (-1: none) and boost for the places of [first, end), from their contexts and the table."""
        slots = self.slots(tokens, first, end)
        hints = self.next_token[slots]
        boosts = self.boosts[np.minimum(self.streak[slots], len(self.boosts) - 1)]
        return hints, np.where(hints >= 0, boosts, np.float32(0.0))

    def update(self, tokens: np.ndarray, first: int, end: int) -> None:
        """Takes in the targets of [first, end). Called after they are scored."""
        slots = self.slots(tokens, first, end)
        targets = tokens[first + 1 : end + 1].astype(np.int64)
        self.streak[slots] = np.where(self.next_token[slots] == targets, self.streak[slots] + 1, 0)
        self.next_token[slots] = targets


def tilted_nll(logits: Tensor, hints: Tensor, boosts: Tensor, targets: Tensor) -> Tensor:
    """-log p of the targets where p is the softmax of the logits after the hints' logits are raised."""
    tilted = logits.float().scatter_add(-1, hints.clamp_min(0).unsqueeze(-1), boosts.unsqueeze(-1))
    log_z = torch.logsumexp(tilted, dim=-1)
    return log_z - tilted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# -----------------------------
# TEST-TIME TRAINING (SCORE FIRST)
# -----------------------------


def ttt_parameters(args: Hyperparameters, base_model: nn.Module) -> list[nn.Parameter]:
    """What is adapted: all but the embedding and the first blocks."""
    frozen = tuple(f"blocks.{i}." for i in range(args.ttt_freeze_blocks)) + ("tok_emb.",)
    params = []
    for name, p in base_model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
        if p.requires_grad:
            params.append(p)
    return params


def ttt_train_chunk(
    args: Hyperparameters,
    base_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    chunk: Tensor,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    """A few epochs of SGD over one chunk (its inputs and targets: one token more than the chunk has places)."""
    seq_len = args.train_seq_len
    num_seqs = (chunk.numel() - 1) // seq_len
    per_rank = num_seqs // world_size
    local = chunk[rank * per_rank * seq_len : (rank + 1) * per_rank * seq_len + 1].to(device=device, dtype=torch.int64)
    x = local[:-1].reshape(-1, seq_len)
    y = local[1:].reshape(-1, seq_len)
    base_model.train()
    for _ in range(args.ttt_epochs):
        for bs in range(0, per_rank, args.ttt_batch_seqs):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = base_model(x[bs : bs + args.ttt_batch_seqs], y[bs : bs + args.ttt_batch_seqs])
            loss.backward()
            if world_size > 1:
                for p in params:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()
    base_model.eval()


def eval_val_ttt(
    args: Hyperparameters,
    base_model: nn.Module,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    log0,
) -> tuple[float, float]:
    """
    Bits per byte of the adapting model, one pass from left to right. Chunk by chunk: all of its places are scored by
    the weights and the table that earlier chunks have made; then the chunk enters both.
    """
    seq_len, stride, chunk_tokens = args.train_seq_len, args.eval_stride, args.ttt_chunk_tokens
    if chunk_tokens % (seq_len * world_size) or chunk_tokens % stride or seq_len % stride:
        raise ValueError("TTT_CHUNK_TOKENS must hold whole sequences for every rank, and whole strides")
    total_targets = val_tokens.numel() - 1
    num_chunks = (total_targets + chunk_tokens - 1) // chunk_tokens
    tokens_np = val_tokens.numpy()
    windows: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in window_starts(total_targets, seq_len, stride):
        windows[scored_span(ws, total_targets, seq_len, stride)[0] // chunk_tokens].append(ws)

    params = ttt_parameters(args, base_model)
    optimizer = torch.optim.SGD(params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    table = NgramHints(args.ngram_order, args.ngram_bits, args.ngram_boosts)
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    adapting = True
    t_start = time.perf_counter()
    base_model.eval()

    for ci in range(num_chunks):
        chunk_first = ci * chunk_tokens
        chunk_end = min(chunk_first + chunk_tokens, total_targets)

        # 1. Hints for the chunk's places, from the table as earlier chunks left it.
        if args.ngram_enabled:
            hints_np, boosts_np = table.propose(tokens_np, chunk_first, chunk_end)
        else:
            hints_np = np.full(chunk_end - chunk_first, -1, dtype=np.int64)
            boosts_np = np.zeros(chunk_end - chunk_first, dtype=np.float32)
        hints = torch.from_numpy(hints_np).to(device)
        boosts = torch.from_numpy(boosts_np).to(device)

        # 2. Score it.
        todo = windows[ci]
        mine = todo[(len(todo) * rank) // world_size : (len(todo) * (rank + 1)) // world_size]
        with torch.no_grad():
            for bi in range(0, len(mine), args.eval_batch_windows):
                batch = mine[bi : bi + args.eval_batch_windows]
                x, y = load_windows(val_tokens, batch, total_targets, seq_len, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = logits_fn(x)
                for i, ws in enumerate(batch):
                    first, end = scored_span(ws, total_targets, seq_len, stride)
                    a, b = first - ws, end - ws
                    here = slice(first - chunk_first, end - chunk_first)
                    nll = tilted_nll(logits[i, a:b], hints[here], boosts[here], y[i, a:b])
                    sums[0] += nll.to(torch.float64).sum()
                    sums[1] += float(b - a)
                    sums[2] += count_target_bytes(luts, x[i, a:b], y[i, a:b]).sum()

        # 3. Only now does the chunk enter the table and the weights. Nothing follows the last one.
        if ci == num_chunks - 1:
            break
        table.update(tokens_np, chunk_first, chunk_end)
        if adapting:
            for group in optimizer.param_groups:
                group["lr"] = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            chunk = val_tokens[chunk_first : chunk_end + 1]
            ttt_train_chunk(args, base_model, optimizer, params, chunk, rank, world_size, device)
            # The clock of rank 0 tells all ranks when to go on without adapting.
            late = torch.tensor(int(time.perf_counter() - t_start > args.ttt_adapt_seconds), device=device)
            if world_size > 1:
                dist.broadcast(late, src=0)
            adapting = not bool(late.item())
            if not adapting:
                log0(f"ttt:adapting ends after chunk {ci + 1}/{num_chunks}")
        if ci % 200 == 0:
            log0(f"ttt:chunk {ci + 1}/{num_chunks} elapsed:{time.perf_counter() - t_start:.1f}s")

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    if int(sums[1].item()) != total_targets:
        raise RuntimeError(f"ttt scored {int(sums[1].item())} of {total_targets} tokens")
    return loss_and_bpb(sums)


# -----------------------------
# POST-TRAINING QUANTIZATION
# -----------------------------
#
# As the baseline's int8 export, with 6 bits for the matrices of the blocks. Small and control tensors stay in floating
# point. The clip of each row is the one of a few quantiles whose error, weighted with the mean squares of the layer's
# inputs, is least; these moments come from training batches and are taken before the ten minutes are over.

CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights",
    ).split(",")
    if pattern
)
INT6_KEEP_FLOAT_FP32_NAME_PATTERNS = CONTROL_TENSOR_NAME_PATTERNS
INT6_KEEP_FLOAT_MAX_NUMEL = 65_536
INT6_KEEP_FLOAT_STORE_DTYPE = torch.float16
INT6_PER_ROW_SCALE_DTYPE = torch.float16
INT6_CLIP_QUANTILES = (1.0, 0.9999, 0.9995, 0.999, 0.995)
INT6_QMAX = 31
INT8_QMAX = 127
INT8_NAME_PATTERNS = ("tok_emb", "lm_head")


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def collect_input_moments(
    args: Hyperparameters, base_model: nn.Module, train_loader: DistributedTokenLoader, world_size: int
) -> dict[str, Tensor]:
    """Mean square of every input column of every linear layer, over a few more batches of the training stream."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def hook_for(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            flat = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            sums[name] = sums.get(name, 0) + flat.square().sum(dim=0)
            counts[name] = counts.get(name, 0) + flat.size(0)

        return hook

    for name, module in base_model.named_modules():
        if isinstance(module, CastedLinear):
            handles.append(module.register_forward_hook(hook_for(name + ".weight")))
    base_model.eval()
    with torch.no_grad():
        for _ in range(args.calib_batches):
            x, y = train_loader.next_batch(world_size * 16 * args.train_seq_len, args.train_seq_len, 1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                base_model(x, y)
    for handle in handles:
        handle.remove()
    base_model.train()
    moments = {name: total / counts[name] for name, total in sums.items()}
    if world_size > 1:
        for name in sorted(moments):
            dist.all_reduce(moments[name], op=dist.ReduceOp.AVG)
    return moments


def keep_float_tensor(name: str, t: Tensor, passthrough_orig_dtypes: dict[str, str]) -> Tensor:
    if any(pattern in name for pattern in INT6_KEEP_FLOAT_FP32_NAME_PATTERNS):
        return t.float().contiguous()
    if t.dtype in {torch.float32, torch.bfloat16}:
        passthrough_orig_dtypes[name] = str(t.dtype).removeprefix("torch.")
        return t.to(dtype=INT6_KEEP_FLOAT_STORE_DTYPE).contiguous()
    return t


def quantize_float_tensor(t: Tensor, qmax: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    t32 = t.float()
    if t32.ndim != 2:
        # Vectors / scalars use a simpler per-tensor scale.
        scale = (t32.abs().max() / qmax).clamp_min(1e-8)
        return torch.clamp(torch.round(t32 / scale), -qmax, qmax).to(torch.int8).contiguous(), scale
    # Matrices get one scale per row, which usually tracks output-channel ranges much better than a tensor-wide scale.
    weight = torch.ones_like(t32[0]) if weight is None else weight.to(t32.device)
    best_err = torch.full((t32.size(0),), float("inf"), device=t32.device)
    best_q = torch.zeros_like(t32, dtype=torch.int8)
    best_scale = torch.ones(t32.size(0), device=t32.device, dtype=INT6_PER_ROW_SCALE_DTYPE)
    for quantile in INT6_CLIP_QUANTILES:
        clip_abs = torch.quantile(t32.abs(), quantile, dim=1)
        scale = (clip_abs / qmax).clamp_min(1e-6).to(INT6_PER_ROW_SCALE_DTYPE)
        q = torch.clamp(torch.round(t32 / scale.float()[:, None]), -qmax, qmax)
        err = ((q * scale.float()[:, None] - t32).square() * weight).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_q[better] = q[better].to(torch.int8)
        best_scale[better] = scale[better]
    return best_q.contiguous(), best_scale.contiguous()


def quantize_state_dict_int6(state_dict: dict[str, Tensor], moments: dict[str, Tensor]):
    # Single supported clean-script export format:
    # - per-row int6 for 2D float tensors (int8 for the embedding), held in int8 and left to LZMA
    # - per-tensor int6 for other float tensors
    # - exact passthrough for non-floats
    # - passthrough for small float tensors, stored as fp16 to save bytes
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    passthrough: dict[str, Tensor] = {}
    passthrough_orig_dtypes: dict[str, str] = {}
    stats = dict.fromkeys(("param_count", "num_float_tensors", "num_nonfloat_tensors", "baseline_bytes", "payload_bytes"), 0)

    for name, tensor in state_dict.items():
        t = tensor.detach()
        stats["param_count"] += int(t.numel())
        stats["baseline_bytes"] += tensor_nbytes(t)
        if not t.is_floating_point():
            stats["num_nonfloat_tensors"] += 1
            passthrough[name] = t.cpu().contiguous()
            stats["payload_bytes"] += tensor_nbytes(t)
            continue
        # Small float tensors are cheap enough to keep directly.
        if t.numel() <= INT6_KEEP_FLOAT_MAX_NUMEL:
            kept = keep_float_tensor(name, t, passthrough_orig_dtypes).cpu()
            passthrough[name] = kept
            stats["payload_bytes"] += tensor_nbytes(kept)
            continue
        stats["num_float_tensors"] += 1
        qmax = INT8_QMAX if any(pattern in name for pattern in INT8_NAME_PATTERNS) else INT6_QMAX
        q, s = quantize_float_tensor(t, qmax, moments.get(name))
        quantized[name] = q.cpu()
        scales[name] = s.cpu()
        dtypes[name] = str(t.dtype).removeprefix("torch.")
        stats["payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)

    obj: dict[str, object] = {
        "__quant_format__": "int6_clean_per_row_v1",
        "quantized": quantized,
        "scales": scales,
        "dtypes": dtypes,
        "passthrough": passthrough,
        "passthrough_orig_dtypes": passthrough_orig_dtypes,
    }
    return obj, stats


def dequantize_state_dict_int6(obj: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        s = obj["scales"][name].to(dtype=torch.float32)
        if s.ndim > 0:
            # Broadcast the saved row scale back across trailing dimensions.
            out[name] = (q.float() * s.view(q.shape[0], *([1] * (q.ndim - 1)))).to(dtype=dtype).contiguous()
        else:
            out[name] = (q.float() * float(s.item())).to(dtype=dtype).contiguous()
    for name, t in obj["passthrough"].items():
        # Restore small tensors, undoing the temporary fp16 storage cast if needed.
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
    # Keep weights in fp32 for optimizer/state quality, cast at matmul time for bf16 compute.
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    # Keep small/control parameters in fp32 even when the model body runs in bf16.
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (
                param.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            ) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Tables are made where they are used; nothing is kept between scoring (no_grad) and training at test time.
    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        self.dim = dim
        self.base = base

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        freqs = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), self.base**-exponents)
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
    def __init__(
        self,
        vocab_size: int,
        num_layers: int,
        model_dim: int,
        num_heads: int,
        num_kv_heads: int,
        mlp_mult: int,
        tie_embeddings: bool,
        tied_embed_init_std: float,
        logit_softcap: float,
        rope_base: float,
        qk_gain_init: float,
    ):
        super().__init__()
        if logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {logit_softcap}")
        self.tie_embeddings = tie_embeddings
        self.tied_embed_init_std = tied_embed_init_std
        self.logit_softcap = logit_softcap
        self.tok_emb = nn.Embedding(vocab_size, model_dim)
        self.num_encoder_layers = num_layers // 2
        self.num_decoder_layers = num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList(
            [
                Block(model_dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init)
                for i in range(num_layers)
            ]
        )
        self.final_norm = RMSNorm()
        self.lm_head = None if tie_embeddings else CastedLinear(model_dim, vocab_size, bias=False)
        if self.lm_head is not None:
            self.lm_head._zero_init = True
        self._init_weights()

    def _init_weights(self) -> None:
        if self.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)

    def forward_hidden(self, input_ids: Tensor) -> Tensor:
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

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = self.forward_hidden(input_ids)
        if self.tie_embeddings:
            logits_proj = F.linear(x, self.tok_emb.weight.to(x.dtype))
        else:
            if self.lm_head is None:
                raise RuntimeError("lm_head is required when tie_embeddings=False")
            logits_proj = self.lm_head(x)
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.float().flatten(0, 1), target_ids.flatten(), reduction="mean")


# -----------------------------
# MEAN OF THE LAST CHECKPOINTS
# -----------------------------


class CheckpointMean:
    """Running mean of the weights at the steps it is shown."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    def add(self, model: nn.Module) -> None:
        self.count += 1
        for name, t in model.state_dict().items():
            t32 = t.detach().float()
            if name in self.mean:
                self.mean[name].lerp_(t32, 1.0 / self.count)
            else:
                self.mean[name] = t32.clone()

    def load_into(self, model: nn.Module) -> None:
        own = model.state_dict()
        model.load_state_dict({name: t.to(own[name].dtype) for name, t in self.mean.items()}, strict=True)


# -----------------------------
# TRAINING
# -----------------------------


def build_model(args: Hyperparameters, device: torch.device) -> GPT:
    model = GPT(
        vocab_size=args.vocab_size,
        num_layers=args.num_layers,
        model_dim=args.model_dim,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        mlp_mult=args.mlp_mult,
        tie_embeddings=args.tie_embeddings,
        tied_embed_init_std=args.tied_embed_init_std,
        logit_softcap=args.logit_softcap,
        rope_base=args.rope_base,
        qk_gain_init=args.qk_gain_init,
    )
    model = model.to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(model)
    return model


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
    dataset_dir = Path(args.data_path).resolve()
    actual_train_files = len(list(dataset_dir.glob("fineweb_train_*.bin")))
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{dataset_dir.name} train_shards:{actual_train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = build_model(args, device)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model

    # Optimizer split:
    # - token embedding (Adam) uses EMBED_LR
    # - untied lm_head (Adam) uses HEAD_LR
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
    if base_model.skip_weights.numel() > 0:
        scalar_params.append(base_model.skip_weights)
    token_lr = args.tied_embed_lr if args.tie_embeddings else args.embed_lr
    adam_kwargs = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    optimizer_tok = torch.optim.Adam(
        [{"params": [base_model.tok_emb.weight], "lr": token_lr, "base_lr": token_lr}], **adam_kwargs
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
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}], **adam_kwargs
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]
    if base_model.lm_head is not None:
        optimizer_head = torch.optim.Adam(
            [{"params": [base_model.lm_head.weight], "lr": args.head_lr, "base_lr": args.head_lr}], **adam_kwargs
        )
        optimizers.insert(1, optimizer_head)

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
    log0("sdp_backends:cudnn=False flash=True mem_efficient=False math=False")
    log0(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads}")
    log0(
        f"tie_embeddings:{args.tie_embeddings} embed_lr:{token_lr} "
        f"head_lr:{args.head_lr if base_model.lm_head is not None else 0.0} "
        f"matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr}"
    )
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f} calib_reserve:{args.calib_reserve_seconds:.1f}"
    )
    log0(f"seed:{args.seed}")

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    train_cap_seconds = args.max_wallclock_seconds - args.calib_reserve_seconds
    max_wallclock_ms = 1000.0 * train_cap_seconds if train_cap_seconds > 0 else None

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        if max_wallclock_ms is None:
            warmdown_start = max(args.iterations - args.warmdown_iters, 0)
            in_warmdown = warmdown_start <= step < args.iterations
            return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0) if in_warmdown else 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(max_wallclock_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # Warmup primes the compiled forward/backward/optimizer paths, then we restore the initial weights/optimizer state
    # so measured training starts from the true init.
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

    swa = CheckpointMean()
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
        if args.swa_enabled and scale < args.swa_start_scale and step % args.swa_every == 0:
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
        reached_cap = max_wallclock_ms is not None and approx_training_time_ms >= max_wallclock_ms
        if distributed and max_wallclock_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    # The clock still runs: mean of the checkpoints, then the moments for the quantiser, from the training stream.
    if swa.count > 1:
        log0(f"swa:mean of {swa.count} checkpoints")
        swa.load_into(base_model)
    moments = collect_input_moments(args, base_model, train_loader, world_size)
    quant_obj, quant_stats = quantize_state_dict_int6(base_model.state_dict(), moments)
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"train+calibration:{training_time_ms:.0f}ms of {1000.0 * args.max_wallclock_seconds:.0f}ms")
    log0(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # -----------------------------
    # SERIALIZATION + ROUNDTRIP VALIDATION
    # -----------------------------
    # Write the compressed int6 artifact, count it together with this file, and read it back: what is evaluated below is
    # the artifact, in a fresh model.

    if master_process:
        quant_buf = io.BytesIO()
        torch.save(quant_obj, quant_buf)
        quant_raw = quant_buf.getvalue()
        quant_blob = lzma.compress(quant_raw, preset=6)
        with open("final_model.int6.ptz", "wb") as f:
            f.write(quant_blob)
        model_bytes = os.path.getsize("final_model.int6.ptz")
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        ratio = quant_stats["baseline_bytes"] / max(quant_stats["payload_bytes"], 1)
        log0(
            f"Serialized model int6+lzma: {model_bytes} bytes "
            f"(payload:{quant_stats['payload_bytes']} raw_torch:{len(quant_raw)} payload_ratio:{ratio:.2f}x)"
        )
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size int6+lzma: {total_bytes} bytes")
        if total_bytes > args.size_limit:
            raise RuntimeError(f"submission of {total_bytes} bytes is over the limit of {args.size_limit}")
    if distributed:
        dist.barrier()

    t_eval = time.perf_counter()
    with open("final_model.int6.ptz", "rb") as f:
        quant_blob_disk = f.read()
    quant_state = torch.load(io.BytesIO(lzma.decompress(quant_blob_disk)), map_location="cpu")
    del model, compiled_model, base_model, swa, optimizers
    eval_model = build_model(args, device)
    eval_model.load_state_dict(dequantize_state_dict_int6(quant_state), strict=True)
    eval_model.eval()
    logits_fn = torch.compile(eval_model.forward_logits, dynamic=False, fullgraph=True)

    torch.cuda.synchronize()
    t_slide = time.perf_counter()
    s_loss, s_bpb = eval_val_sliding(args, logits_fn, rank, world_size, device, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_sliding val_loss:{s_loss:.4f} val_bpb:{s_bpb:.4f} stride:{args.eval_stride} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_slide):.0f}ms"
    )
    log0(f"final_int6_sliding_exact val_loss:{s_loss:.8f} val_bpb:{s_bpb:.8f}")

    final_loss, final_bpb = s_loss, s_bpb
    if args.ttt_enabled:
        t_ttt = time.perf_counter()
        final_loss, final_bpb = eval_val_ttt(
            args, eval_model, logits_fn, rank, world_size, device, val_tokens, luts, log0
        )
        torch.cuda.synchronize()
        log0(
            f"final_int6_ttt val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} "
            f"eval_time:{1000.0 * (time.perf_counter() - t_ttt):.0f}ms"
        )
    log0(f"total_eval_time:{time.perf_counter() - t_eval:.1f}s")
    log0(f"final_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
