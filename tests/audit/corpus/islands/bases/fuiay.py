"""
11L int6 + BigramHash + SmearGate + EMA/SWA + context-only SLOT.

Grown out of the challenge's baseline train_gpt.py. Everything that is counted lives in this file.
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

    # Validation cadence. The in-training validations are only logged.
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
    quant_reserve_seconds = float(os.environ.get("QUANT_RESERVE_SECONDS", 32.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    bigram_vocab_size = int(os.environ.get("BIGRAM_VOCAB_SIZE", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Optimizer hyperparameters.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # Averaging.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.2))
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    swa_weight = float(os.environ.get("SWA_WEIGHT", 0.5))

    # Quantization.
    calib_batches = int(os.environ.get("CALIB_BATCHES", 16))
    calib_seqs = int(os.environ.get("CALIB_SEQS", 8))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    size_limit = 16_000_000

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 560.0))
    slot_steps = int(os.environ.get("SLOT_STEPS", 8))
    slot_lr = float(os.environ.get("SLOT_LR", 0.008))
    slot_lr_min = float(os.environ.get("SLOT_LR_MIN", 0.0008))
    slot_batch_seqs = int(os.environ.get("SLOT_BATCH_SEQS", 32))


args = Hyperparameters()
rank = int(os.environ.get("RANK", "0"))
world_size = int(os.environ.get("WORLD_SIZE", "1"))
local_rank = int(os.environ.get("LOCAL_RANK", "0"))
distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
master_process = rank == 0
device = torch.device("cuda", local_rank)
logfile: str | None = None


def log0(msg: str, console: bool = True) -> None:
    if not master_process:
        return
    if console:
        print(msg)
    if logfile is not None:
        with open(logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)


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
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr = group["lr"]
            momentum = group["momentum"]
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
                    if group["nesterov"]:
                        g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    # Scale correction from Muon reference implementations.
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()

            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)

            curr = 0
            for p in params:
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["wd"] > 0:
                    p.mul_(1.0 - lr * group["wd"])
                p.add_(g, alpha=-lr)
                curr += p.numel()
        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION
# -----------------------------
#
# The score is bits per byte, so every token needs the number of bytes that it stands for. A piece that begins
# with the sentencepiece mark carries one space byte, unless the token before it is a control token.


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
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


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() <= args.eval_seq_len:
        raise ValueError(f"Validation split is too short for EVAL_SEQ_LEN={args.eval_seq_len}")
    return tokens


def token_byte_counts(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
    return token_bytes.to(torch.float64)


def eval_val(model: nn.Module, grad_accum_steps: int, val_tokens: Tensor, luts: tuple[Tensor, Tensor, Tensor]):
    # Non-overlapping sequences of the whole split. The tail shorter than one sequence is left to the sliding eval.
    seq_len = args.train_seq_len
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    if local_batch_tokens < seq_len:
        raise ValueError("VAL_BATCH_SIZE must provide at least one sequence per rank")
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
            val_byte_count += token_byte_counts(x.reshape(-1), y.reshape(-1), luts).sum()

    if distributed:
        dist.all_reduce(val_loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_byte_count, op=dist.ReduceOp.SUM)

    val_loss = val_loss_sum / val_token_count
    bits_per_token = val_loss.item() / math.log(2.0)
    tokens_per_byte = val_token_count.item() / val_byte_count.item()
    model.train()
    return float(val_loss.item()), float(bits_per_token * tokens_per_byte)


def build_windows(total_targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    # (first input position, first scored target, end) of each window. The first window scores all of its targets,
    # every later one only those that come after the end of the window before it, so that each target is scored once.
    windows = []
    scored_to = 0
    end = min(seq_len, total_targets)
    while True:
        windows.append((max(end - seq_len, 0), scored_to, end))
        if end >= total_targets:
            return windows
        scored_to = end
        end = min(end + stride, total_targets)


def gather_windows(val_tokens: Tensor, batch: list[tuple[int, int, int]], seq_len: int):
    bsz = len(batch)
    x_batch = torch.zeros(bsz, seq_len, dtype=torch.int64)
    y_batch = torch.zeros(bsz, seq_len, dtype=torch.int64)
    ctx_mask = torch.zeros(bsz, seq_len, dtype=torch.bool)
    score_mask = torch.zeros(bsz, seq_len, dtype=torch.bool)
    for i, (ws, s, e) in enumerate(batch):
        chunk = val_tokens[ws : e + 1].to(torch.int64)
        wlen = e - ws
        x_batch[i, :wlen] = chunk[:-1]
        y_batch[i, :wlen] = chunk[1:]
        ctx_mask[i, : s - ws] = True
        score_mask[i, s - ws : wlen] = True
    return tuple(t.to(device, non_blocking=True) for t in (x_batch, y_batch, ctx_mask, score_mask))


def eval_val_sliding(hidden_fn, model: GPT, val_tokens: Tensor, luts: tuple[Tensor, Tensor, Tensor]):
    # Sliding window: each token is scored once, with up to seq_len - stride tokens of context before it.
    seq_len = args.eval_seq_len
    windows = build_windows(val_tokens.numel() - 1, seq_len, args.eval_stride)
    my_s = (len(windows) * rank) // world_size
    my_e = (len(windows) * (rank + 1)) // world_size
    my_windows = windows[my_s:my_e]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    with torch.inference_mode():
        for bi in range(0, len(my_windows), args.eval_batch_seqs):
            batch = my_windows[bi : bi + args.eval_batch_seqs]
            x, y, _, score_mask = gather_windows(val_tokens, batch, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.compute_logits(hidden_fn(x))
            nll = F.cross_entropy(
                logits.float().reshape(-1, args.vocab_size), y.reshape(-1), reduction="none"
            ).reshape(len(batch), seq_len)
            loss_sum += nll[score_mask].to(torch.float64).sum()
            token_count += float(score_mask.sum().item())
            byte_count += token_byte_counts(x[score_mask], y[score_mask], luts).sum()

    if distributed:
        for t in (loss_sum, token_count, byte_count):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    val_loss = (loss_sum / token_count).item()
    val_bpb = val_loss / math.log(2.0) * (token_count.item() / byte_count.item())
    return val_loss, val_bpb


# -----------------------------
# POST-TRAINING QUANTIZATION
# -----------------------------
#
# Attention and MLP matrices become int6 with one fp16 scale per row, embeddings int8. The clip of each row is the
# percentile with the least squared error, weighted by the second moment of the inputs that the column meets.

CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear",
    "bigram.scale",
)
INT6_CLIP_PERCENTILES = (0.9990, 0.9995, 0.9999, 0.99999, 1.0)
INT6_MAX = 31
INT8_MAX = 127
KEEP_FLOAT_MAX_NUMEL = 65_536


def classify_param(name: str, t: Tensor) -> str:
    if not t.is_floating_point():
        return "raw"
    if any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
        return "fp32"
    if t.ndim != 2 or t.numel() <= KEEP_FLOAT_MAX_NUMEL:
        return "fp16"
    if "tok_emb" in name or "bigram.embed" in name:
        return "int8"
    return "int6"


def quantize_rows(w: Tensor, clip: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    scale = (clip / qmax).clamp_min(1.0 / 65504.0).to(torch.float16)
    q = torch.round(w / scale.float()[:, None]).clamp_(-qmax, qmax).to(torch.int8)
    return q, scale


def quantize_matrix(w: Tensor, qmax: int, act_sq: Tensor | None) -> tuple[Tensor, Tensor]:
    w = w.float()
    weight = torch.ones(w.size(1), device=w.device) if act_sq is None else act_sq.to(w.device).float()
    weight = weight / weight.mean().clamp_min(1e-12)
    abs_w = w.abs()
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best_q = torch.zeros_like(w, dtype=torch.int8)
    best_scale = torch.zeros(w.size(0), device=w.device, dtype=torch.float16)
    for pct in INT6_CLIP_PERCENTILES:
        clip = abs_w.amax(dim=1) if pct >= 1.0 else torch.quantile(abs_w, pct, dim=1)
        q, scale = quantize_rows(w, clip, qmax)
        err = ((w - q.float() * scale.float()[:, None]).square() * weight).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_q[better] = q[better]
        best_scale[better] = scale[better]
    return best_q, best_scale


def quantize_state_dict(state_dict: dict[str, Tensor], act_sq: dict[str, Tensor]):
    tensors: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for name, t in state_dict.items():
        t = t.detach()
        kind = classify_param(name, t)
        meta[name] = kind
        if kind == "raw":
            tensors[name] = t.cpu().contiguous()
        elif kind == "fp32":
            tensors[name] = t.float().cpu().contiguous()
        elif kind == "fp16":
            tensors[name] = t.to(torch.float16).cpu().contiguous()
        else:
            qmax = INT6_MAX if kind == "int6" else INT8_MAX
            q, scale = quantize_matrix(t, qmax, act_sq.get(name))
            tensors[name + ".q"] = q.cpu().contiguous()
            tensors[name + ".scale"] = scale.cpu().contiguous()
    return {"w": tensors, "m": meta}


def dequantize_state_dict(obj: dict[str, dict]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, kind in obj["m"].items():
        if kind in ("int6", "int8"):
            out[name] = obj["w"][name + ".q"].float() * obj["w"][name + ".scale"].float()[:, None]
        elif kind == "raw":
            out[name] = obj["w"][name]
        else:
            out[name] = obj["w"][name].float()
    return out


def collect_input_moments(model: GPT, loader: DistributedTokenLoader) -> dict[str, Tensor]:
    # Second moment of every quantized matrix's input channels, over a few batches of the training stream.
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    handles = []

    def make_hook(key: str):
        def hook(module, inputs, output):
            flat = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            sums[key] = sums.get(key, 0) + flat.square().sum(dim=0)
            counts[key] = counts.get(key, 0.0) + flat.size(0)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            handles.append(module.register_forward_hook(make_hook(name + ".weight")))
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(args.calib_batches):
            x, _ = loader.next_batch(world_size * args.calib_seqs * args.train_seq_len, args.train_seq_len, 1)
            model.forward_hidden(x)
    for handle in handles:
        handle.remove()
    for key in sorted(sums):
        if distributed:
            dist.all_reduce(sums[key], op=dist.ReduceOp.SUM)
        sums[key] /= counts[key] * world_size
    model.train()
    return sums


# -----------------------------
# DATA LOADING
# -----------------------------


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
    # Each call consumes a contiguous chunk from the shared token stream, then slices out one disjoint span per rank.
    # The extra "+1" token lets us build (x, y) by shifting.
    def __init__(self, pattern: str):
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (world_size * grad_accum_steps)
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * world_size)
        start = rank * per_rank_span
        local = chunk[start : start + per_rank_span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


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
        return F.linear(x, self.weight.to(x.dtype))


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            low = param.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if low and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float):
        super().__init__()
        self.dim = dim
        self.base = base
        self.reset(torch.device("cpu"))

    def reset(self, dev: torch.device) -> None:
        # Frequencies stay fp32; called again after the model was cast to bf16.
        steps = torch.arange(0, self.dim, 2, dtype=torch.float32, device=dev)
        self.register_buffer("inv_freq", 1.0 / (self.base ** (steps / self.dim)), persistent=False)

    def forward(self, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Not cached: the compiler folds this into the attention's prologue.
        t = torch.arange(seq_len, device=self.inv_freq.device, dtype=torch.float32)
        freqs = torch.outer(t, self.inv_freq.float())
        return freqs.cos()[None, None, :, :].to(dtype=dtype), freqs.sin()[None, None, :, :].to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    # Partial RoPE: only the first rope_dims dimensions of a head are rotated.
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    x_rope = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((x_rope, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = args.rope_dims
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
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
        cos, sin = self.rotary(seqlen, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
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
    # Mixes the embedding of the token before into each embedding, but never across the start of a document.
    def __init__(self, dim: int):
        super().__init__()
        self.smear = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.smear.to(dtype=x.dtype))[None, None, :]
        x_prev = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        inside = (input_ids != args.bos_id)[..., None].to(dtype=x.dtype)
        return x + g * inside * (x_prev - x)


class BigramHashEmbedding(nn.Module):
    # A small table of embeddings for (token before, token), looked up by a hash of the two input tokens.
    def __init__(self, bigram_vocab_size: int, bigram_dim: int, model_dim: int):
        super().__init__()
        self.bigram_vocab_size = bigram_vocab_size
        self.embed = nn.Embedding(bigram_vocab_size, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
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


class Block(nn.Module):
    def __init__(self, layer_idx: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, args.num_heads, args.num_kv_heads, args.rope_base, args.qk_gain_init)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale = 1.0 / math.sqrt(layer_idx + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_scale)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x) * self.ln_scale)
        return x


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        dim = args.model_dim
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.bigram = BigramHashEmbedding(args.bigram_vocab_size, args.bigram_dim, dim)
        self.smear_gate = SmearGate(dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def forward_hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear_gate(x, input_ids)
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

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.compute_logits(self.forward_hidden(input_ids))
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    global zeropower_via_newtonschulz5, logfile

    code = Path(__file__).read_text(encoding="utf-8")
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # -----------------------------
    # DISTRIBUTED + CUDA SETUP
    # -----------------------------

    if world_size <= 0:
        raise ValueError(f"WORLD_SIZE must be positive, got {world_size}")
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so grad_accum_steps stays integral")
    grad_accum_steps = 8 // world_size
    grad_scale = 1.0 / grad_accum_steps
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()

    # Fast math knobs
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    from torch.backends.cuda import enable_cudnn_sdp, enable_flash_sdp, enable_math_sdp, enable_mem_efficient_sdp

    enable_cudnn_sdp(False)
    enable_flash_sdp(True)
    enable_mem_efficient_sdp(False)
    enable_math_sdp(False)

    if master_process:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{args.run_id}.txt"
        print(logfile)

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
    luts = build_sentencepiece_luts(sp, args.vocab_size)
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={args.tokenizer_path}")
    log0(f"train_loader:dataset:{dataset_dir.name} train_shards:{actual_train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = GPT().to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
        if isinstance(module, Rotary):
            module.reset(device)
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )

    # Optimizer split:
    # - token and bigram embeddings use Adam via TIED_EMBED_LR
    # - matrix params in the transformer blocks and the bigram projection use MATRIX_LR via Muon
    # - vectors and scalars use SCALAR_LR via Adam
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
    scalar_params += [base_model.skip_weights, base_model.smear_gate.smear, base_model.bigram.scale]
    embed_params = [base_model.tok_emb.weight, base_model.bigram.embed.weight]
    optimizer_tok = torch.optim.AdamW(
        [{"params": embed_params, "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
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
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
    log0(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads}")
    log0(f"embed_lr:{args.tied_embed_lr} matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f} reserve:{args.quant_reserve_seconds:.1f}"
    )
    log0(f"seed:{args.seed}")

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # The wall clock of training covers steps, averaging, calibration and quantization: the loop stops early enough.
    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds
    train_cap_ms = max_wallclock_ms - 1000.0 * args.quant_reserve_seconds

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(train_cap_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # Warmup primes the compiled forward/backward/optimizer paths, then we restore the initial weights/optimizer state.
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
        log0(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        if distributed:
            model.require_backward_grad_sync = True
        train_loader = DistributedTokenLoader(args.train_files)

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    ema_state = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
    swa_state: dict[str, Tensor] | None = None
    swa_count = 0

    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        should_validate = not last_step and args.val_loss_every > 0 and step % args.val_loss_every == 0
        if should_validate:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(model, grad_accum_steps, val_tokens, luts)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            t0 = time.perf_counter()
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
        # EMA over every step; SWA over snapshots of the last part of the warmdown.
        with torch.no_grad():
            for name, t in base_model.state_dict().items():
                ema_state[name].lerp_(t.detach().float(), 1.0 - args.ema_decay)
            if scale < args.swa_start_scale and step % args.swa_every == 0:
                if swa_state is None:
                    swa_state = {name: torch.zeros_like(t) for name, t in ema_state.items()}
                for name, t in base_model.state_dict().items():
                    swa_state[name] += t.detach().float()
                swa_count += 1

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
        reached_cap = approx_training_time_ms >= train_cap_ms
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
    # AVERAGING, CALIBRATION, QUANTIZATION (on the training clock, in the time that the loop left for them)
    # -----------------------------

    if swa_state is not None and swa_count > 0:
        log0(f"averaging: ema:{1.0 - args.swa_weight:.2f} swa:{args.swa_weight:.2f} swa_count:{swa_count}")
        final_state = {
            name: (1.0 - args.swa_weight) * ema_state[name] + args.swa_weight * swa_state[name] / swa_count
            for name in ema_state
        }
    else:
        log0("averaging: ema only")
        final_state = ema_state
    base_model.load_state_dict(
        {name: final_state[name].to(dtype=t.dtype) for name, t in base_model.state_dict().items()}, strict=True
    )

    act_sq = collect_input_moments(base_model, train_loader)
    quant_obj = quantize_state_dict(final_state, act_sq)
    torch.cuda.synchronize()

    # -----------------------------
    # SERIALIZATION
    # -----------------------------

    quant_buf = io.BytesIO()
    torch.save(quant_obj, quant_buf)
    quant_raw = quant_buf.getvalue()
    quant_blob = zstandard.ZstdCompressor(level=args.zstd_level).compress(quant_raw)
    code_bytes = len(code.encode("utf-8"))
    if master_process:
        with open("final_model.int6.ptz", "wb") as f:
            f.write(quant_blob)
    total_train_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
    log0(f"artifact written: training, calibration and packing took {total_train_ms:.0f}ms of {max_wallclock_ms:.0f}ms")
    model_bytes = len(quant_blob)
    log0(f"Serialized model int6+zstd: {model_bytes} bytes (payload raw {len(quant_raw)} bytes)")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size int6+zstd: {model_bytes + code_bytes} bytes")
    if model_bytes + code_bytes > args.size_limit:
        raise RuntimeError(f"submission is {model_bytes + code_bytes - args.size_limit} bytes over the limit")
    if distributed:
        dist.barrier()
    del ema_state, swa_state, final_state, act_sq, quant_obj

    # -----------------------------
    # ROUNDTRIP: everything below is scored with what was read back from the file
    # -----------------------------

    torch.cuda.synchronize()
    t_eval_start = time.perf_counter()
    with open("final_model.int6.ptz", "rb") as f:
        quant_blob_disk = f.read()
    quant_state = torch.load(
        io.BytesIO(zstandard.ZstdDecompressor().decompress(quant_blob_disk)), map_location="cpu", weights_only=True
    )
    restored = dequantize_state_dict(quant_state)
    eval_model = GPT().to(device).bfloat16()
    for module in eval_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
        if isinstance(module, Rotary):
            module.reset(device)
    restore_low_dim_params_to_fp32(eval_model)
    eval_model.load_state_dict(
        {name: restored[name].to(dtype=t.dtype) for name, t in eval_model.state_dict().items()}, strict=True
    )
    eval_model.eval()
    for p in eval_model.parameters():
        p.requires_grad_(False)
    compiled_eval = torch.compile(eval_model, dynamic=False, fullgraph=True)
    hidden_fn = torch.compile(eval_model.forward_hidden, dynamic=False, fullgraph=True)

    torch.cuda.synchronize()
    t_qeval = time.perf_counter()
    q_val_loss, q_val_bpb = eval_val(compiled_eval, grad_accum_steps, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_qeval):.0f}ms"
    )

    torch.cuda.synchronize()
    t_slide = time.perf_counter()
    sw_val_loss, sw_val_bpb = eval_val_sliding(hidden_fn, eval_model, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_sliding_window val_loss:{sw_val_loss:.4f} val_bpb:{sw_val_bpb:.4f} "
        f"stride:{args.eval_stride} eval_time:{1000.0 * (time.perf_counter() - t_slide):.0f}ms"
    )

    # -----------------------------
    # CONTEXT-ONLY SLOT
    # -----------------------------
    #
    # Every window has a vector of its own, added to its final hidden states. It is fitted to the losses of the
    # window's context alone, that is, to targets that earlier windows have scored already, and thrown away after it.
    # The first window has no context and keeps a zero vector. Rows of a batch do not meet: the loss is a sum over
    # rows and AdamW works element by element.

    torch.cuda.synchronize()
    t_slot = time.perf_counter()
    seq_len = args.eval_seq_len
    slot_windows = build_windows(val_tokens.numel() - 1, seq_len, args.eval_stride)
    my_s = (len(slot_windows) * rank) // world_size
    my_e = (len(slot_windows) * (rank + 1)) // world_size
    my_windows = slot_windows[my_s:my_e]
    slot_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    slot_token_count = torch.zeros((), device=device, dtype=torch.float64)
    slot_byte_count = torch.zeros((), device=device, dtype=torch.float64)
    slot_lrs = [
        args.slot_lr_min + 0.5 * (args.slot_lr - args.slot_lr_min) * (1.0 + math.cos(math.pi * k / args.slot_steps))
        for k in range(args.slot_steps)
    ]
    eval_model.eval()
    batches_without_slot = 0

    for bi in range(0, len(my_windows), args.slot_batch_seqs):
        batch = my_windows[bi : bi + args.slot_batch_seqs]
        bsz = len(batch)
        x, y, ctx_mask, score_mask = gather_windows(val_tokens, batch, seq_len)
        with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            hidden = hidden_fn(x)
        hidden = hidden.detach().float()

        # Out of budget: the remaining windows are scored without a vector.
        n_slot_steps = args.slot_steps
        if time.perf_counter() - t_eval_start > args.eval_budget_seconds:
            n_slot_steps = 0
            batches_without_slot += 1

        delta = torch.zeros(bsz, 1, args.model_dim, device=device, dtype=torch.float32, requires_grad=True)
        slot_opt = torch.optim.AdamW([delta], lr=args.slot_lr, betas=(0.9, 0.95), weight_decay=1e-8, eps=1e-5)
        ctx_weight = ctx_mask.float()
        ctx_count = ctx_weight.sum(dim=1).clamp_min(1.0)
        for k in range(n_slot_steps):
            for group in slot_opt.param_groups:
                group["lr"] = slot_lrs[k]
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = eval_model.compute_logits(hidden + delta)
            nll = F.cross_entropy(
                logits.float().reshape(-1, args.vocab_size), y.reshape(-1), reduction="none"
            ).reshape(bsz, seq_len)
            slot_loss = ((nll * ctx_weight).sum(dim=1) / ctx_count).sum()
            slot_opt.zero_grad(set_to_none=True)
            slot_loss.backward()
            slot_opt.step()

        with torch.no_grad():
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = eval_model.compute_logits(hidden + delta.detach())
            nll = F.cross_entropy(
                logits.float().reshape(-1, args.vocab_size), y.reshape(-1), reduction="none"
            ).reshape(bsz, seq_len)
            slot_loss_sum += nll[score_mask].to(torch.float64).sum()
            slot_token_count += float(score_mask.sum().item())
            slot_byte_count += token_byte_counts(x[score_mask], y[score_mask], luts).sum()

        if master_process and (bi // args.slot_batch_seqs) % 500 == 0:
            running = slot_loss_sum.item() / max(slot_token_count.item(), 1.0)
            running_bpb = running / math.log(2.0) * slot_token_count.item() / max(slot_byte_count.item(), 1.0)
            log0(
                f"slot:{bi + bsz}/{len(my_windows)} windows running_bpb:{running_bpb:.4f} "
                f"elapsed:{time.perf_counter() - t_slot:.1f}s"
            )

    if distributed:
        for t in (slot_loss_sum, slot_token_count, slot_byte_count):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    if int(slot_token_count.item()) != val_tokens.numel() - 1:
        raise RuntimeError(f"scored {int(slot_token_count.item())} of {val_tokens.numel() - 1} tokens")
    slot_val_loss = (slot_loss_sum / slot_token_count).item()
    slot_val_bpb = slot_val_loss / math.log(2.0) * (slot_token_count.item() / slot_byte_count.item())
    torch.cuda.synchronize()
    slot_ms = 1000.0 * (time.perf_counter() - t_slot)
    eval_ms = 1000.0 * (time.perf_counter() - t_eval_start)
    log0(f"slot: rank 0 batches without slot:{batches_without_slot}")
    log0(f"tokens:{int(slot_token_count.item())} bytes:{int(slot_byte_count.item())} total_eval_time:{eval_ms:.0f}ms")
    log0(f"final_int6_slot val_loss:{slot_val_loss:.4f} val_bpb:{slot_val_bpb:.4f} eval_time:{slot_ms:.0f}ms")
    log0(f"final_int6_slot_exact val_loss:{slot_val_loss:.8f} val_bpb:{slot_val_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
