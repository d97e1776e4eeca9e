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
# 9 blocks, width 512, 8 heads / 4 KV heads, 3x relu^2 MLP, vocab 1024, tied embeddings,
# int6 GPTQ + zlib, documents scored with LoRA test-time training.

class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 2000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 2400))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))

    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))

    embed_lr = float(os.environ.get("EMBED_LR", 0.6))
    head_lr = float(os.environ.get("HEAD_LR", 0.008))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.04))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.03))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.03))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.85))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 700))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.4))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    ema_every = int(os.environ.get("EMA_EVERY", 1))

    calib_batches = int(os.environ.get("CALIB_BATCHES", 32))
    calib_batch_seqs = int(os.environ.get("CALIB_BATCH_SEQS", 16))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    zlib_level = int(os.environ.get("ZLIB_LEVEL", 9))
    size_limit = int(os.environ.get("SIZE_LIMIT", 16_000_000))

    eval_seconds = float(os.environ.get("EVAL_SECONDS", 560.0))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 256))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 64))
    final_eval = os.environ.get("FINAL_EVAL", "ttt")

    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 8))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 0.01))
    ttt_chunk_size = int(os.environ.get("TTT_CHUNK_SIZE", 256))
    ttt_eval_seq_len = int(os.environ.get("TTT_EVAL_SEQ_LEN", 1024))
    ttt_batch_size = int(os.environ.get("TTT_BATCH_SIZE", 64))
    ttt_beta1 = float(os.environ.get("TTT_BETA1", 0.9))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.95))
    ttt_groups = int(os.environ.get("TTT_GROUPS", 4))
    global_lr = float(os.environ.get("GLOBAL_LR", 0.002))
    global_momentum = float(os.environ.get("GLOBAL_MOMENTUM", 0.9))
    global_batch_seqs = int(os.environ.get("GLOBAL_BATCH_SEQS", 32))
    global_clip = float(os.environ.get("GLOBAL_CLIP", 1.0))

    cache_lambda = float(os.environ.get("CACHE_LAMBDA", 0.06))
    cache_alpha = float(os.environ.get("CACHE_ALPHA", 8.0))
    cache_gate = float(os.environ.get("CACHE_GATE", 400.0))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------

def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, nesterov: bool = True, weight_decay: float = 0.0):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, nesterov=nesterov, weight_decay=weight_decay),
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
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------

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


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
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
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


def target_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    tok_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
    tok_bytes = tok_bytes + (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
    return tok_bytes.to(torch.float64)


def reduce_bpb(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)
    val_loss = float(loss_sum.item() / token_count.item())
    val_bpb = float(loss_sum.item() / math.log(2.0) / byte_count.item())
    return val_loss, val_bpb


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
            val_byte_count += target_bytes(x.reshape(-1), y.reshape(-1), luts).sum()
    out = reduce_bpb(val_loss_sum, val_token_count, val_byte_count)
    model.train()
    return out


def eval_val_sliding(
    args: Hyperparameters,
    base_model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    seq_len, stride = args.train_seq_len, args.eval_stride
    total = val_tokens.numel() - 1
    spans = [(0, min(seq_len, total), 0)]
    pos = spans[0][1]
    while pos < total:
        end = min(pos + stride, total)
        spans.append((end - seq_len, end, pos))
        pos = end
    mine = spans[(len(spans) * rank) // world_size : (len(spans) * (rank + 1)) // world_size]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    base_model.eval()
    for bi in range(0, len(mine), args.eval_batch_seqs):
        batch = mine[bi : bi + args.eval_batch_seqs]
        x = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=device)
        y = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=device)
        fresh = torch.zeros(len(batch), seq_len, dtype=torch.bool, device=device)
        for b, (start, end, first) in enumerate(batch):
            local = val_tokens[start : end + 1].to(device=device, dtype=torch.int64)
            x[b, : end - start] = local[:-1]
            y[b, : end - start] = local[1:]
            fresh[b, first - start : end - start] = True
        with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = base_model.logits(x)
        nll = F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").view_as(y)
        loss_sum += nll[fresh].to(torch.float64).sum()
        token_count += fresh.sum()
        byte_count += target_bytes(x[fresh], y[fresh], luts).sum()
    return reduce_bpb(loss_sum, token_count, byte_count)


# -----------------------------
# POST-TRAINING QUANTIZATION (int6 GPTQ + zlib)
# -----------------------------

CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights",
    ).split(",")
    if pattern
)
INT6_KEEP_FLOAT_MAX_NUMEL = 65_536
INT6_QMAX = 31
INT8_QMAX = 127
INT6_CLIP_GRID = (1.0, 0.95, 0.9, 0.85, 0.8)


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def row_scales(w: Tensor, qmax: int, diag: Tensor | None = None) -> Tensor:
    amax = w.abs().amax(dim=1).clamp_min(1e-8)
    best_err = torch.full_like(amax, float("inf"))
    best = amax / qmax
    weight = diag[None, :] if diag is not None else 1.0
    for ratio in INT6_CLIP_GRID:
        s = amax * ratio / qmax
        q = torch.clamp(torch.round(w / s[:, None]), -qmax, qmax)
        err = ((q * s[:, None] - w).square() * weight).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best = torch.where(better, s, best)
    return best.to(torch.float16).float().clamp_min(1e-7)


def gptq_quantize(w: Tensor, hessian: Tensor, qmax: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    W = w.float().clone()
    H = hessian.float().clone()
    cols = W.size(1)
    diag = torch.diagonal(H)
    dead = diag == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    order = torch.argsort(torch.diagonal(H), descending=True)
    scale = row_scales(W, qmax, torch.diagonal(H))
    W = W[:, order]
    H = H[order][:, order]
    H.diagonal().add_(damp * torch.diagonal(H).mean())
    L = torch.linalg.cholesky(H)
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
    Q = torch.zeros_like(W)
    for i0 in range(0, cols, block):
        i1 = min(i0 + block, cols)
        Wb = W[:, i0:i1].clone()
        Eb = torch.zeros_like(Wb)
        Hb = Hinv[i0:i1, i0:i1]
        for j in range(i1 - i0):
            col = Wb[:, j]
            q = torch.clamp(torch.round(col / scale), -qmax, qmax)
            Q[:, i0 + j] = q
            e = (col - q * scale) / Hb[j, j]
            Wb[:, j:] -= e[:, None] * Hb[j, j:][None, :]
            Eb[:, j] = e
        W[:, i1:] -= Eb @ Hinv[i0:i1, i1:]
    inverse = torch.argsort(order)
    return Q[:, inverse].to(torch.int8).cpu(), scale.to(torch.float16).cpu()


def collect_hessians(
    args: Hyperparameters,
    base_model: nn.Module,
    loader: "DistributedTokenLoader",
    world_size: int,
    elapsed,
) -> dict[str, Tensor]:
    hessians: dict[str, Tensor] = {}
    hooks = []

    def make_hook(name: str):
        def hook(module, inputs):
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            if name not in hessians:
                hessians[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
            hessians[name].addmm_(x.T, x)
        return hook

    for name, module in base_model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_pre_hook(make_hook(name + ".weight")))
    was_training = base_model.training
    base_model.eval()
    done = 0
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        while done < args.calib_batches and elapsed() < args.max_wallclock_seconds - 3.0:
            x, _ = loader.next_batch(args.calib_batch_seqs * args.train_seq_len * world_size, args.train_seq_len, 1)
            base_model.logits(x)
            torch.cuda.synchronize()
            done += 1
    for h in hooks:
        h.remove()
    base_model.train(was_training)
    if dist.is_available() and dist.is_initialized():
        for name in sorted(hessians):
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
    return hessians


def quantize_state_dict_int6(state_dict: dict[str, Tensor], hessians: dict[str, Tensor], args: Hyperparameters):
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    passthrough: dict[str, Tensor] = {}
    stats = dict.fromkeys(("param_count", "gptq_tensors", "plain_tensors", "payload_bytes"), 0)
    for name, tensor in state_dict.items():
        t = tensor.detach()
        stats["param_count"] += int(t.numel())
        if not t.is_floating_point():
            passthrough[name] = t.cpu().contiguous()
            stats["payload_bytes"] += tensor_nbytes(t)
            continue
        if t.ndim != 2 or t.numel() <= INT6_KEEP_FLOAT_MAX_NUMEL:
            keep = t.float() if any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS) else t.to(torch.float16)
            passthrough[name] = keep.cpu().contiguous()
            stats["payload_bytes"] += tensor_nbytes(keep)
            continue
        if name in hessians:
            q, s = gptq_quantize(t, hessians[name], INT6_QMAX, args.gptq_block, args.gptq_damp)
            stats["gptq_tensors"] += 1
        else:
            qmax = INT8_QMAX if "tok_emb" in name or "lm_head" in name else INT6_QMAX
            s32 = row_scales(t.float(), qmax)
            q = torch.clamp(torch.round(t.float() / s32[:, None]), -qmax, qmax).to(torch.int8).cpu()
            s = s32.to(torch.float16).cpu()
            stats["plain_tensors"] += 1
        quantized[name] = q.contiguous()
        scales[name] = s.contiguous()
        dtypes[name] = str(t.dtype).removeprefix("torch.")
        stats["payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)
    obj: dict[str, object] = {
        "__quant_format__": "int6_gptq_per_row_v1",
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
        s = obj["scales"][name].to(dtype=torch.float32)
        out[name] = (q.float() * s.view(q.shape[0], 1)).to(dtype=dtype).contiguous()
    for name, t in obj["passthrough"].items():
        out[name] = t.to(torch.float32) if t.is_floating_point() else t
    return out


# -----------------------------
# DATA LOADING
# -----------------------------

class TokenStream:
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
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS)) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
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
        return self._cos_cached.to(dtype=dtype).clone(), self._sin_cached.to(dtype=dtype).clone()


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

    def forward(self, x: Tensor, q_delta=None, v_delta=None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x)
        if q_delta is not None:
            q = q + q_delta
        k = self.c_k(x)
        v = self.c_v(x)
        if v_delta is not None:
            v = v + v_delta
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
            q, k, v.to(q.dtype), attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
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
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int, rope_base: float, qk_gain_init: float):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor, q_delta_fn=None, v_delta_fn=None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        n = self.attn_norm(x)
        qd = q_delta_fn(n) if q_delta_fn is not None else None
        vd = v_delta_fn(n) if v_delta_fn is not None else None
        attn_out = self.attn(n, qd, vd)
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
            [Block(model_dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init) for _ in range(num_layers)]
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

    def hidden(self, input_ids: Tensor, lora=None) -> Tensor:
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            qd = lora.q_loras[i] if lora is not None else None
            vd = lora.v_loras[i] if lora is not None else None
            x = self.blocks[i](x, x0, qd, vd)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            bi = self.num_encoder_layers + i
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            qd = lora.q_loras[bi] if lora is not None else None
            vd = lora.v_loras[bi] if lora is not None else None
            x = self.blocks[bi](x, x0, qd, vd)
        return self.final_norm(x)

    def head(self, h: Tensor, lora=None) -> Tensor:
        logits = F.linear(h, self.tok_emb.weight.to(h.dtype)) if self.tie_embeddings else self.lm_head(h)
        if lora is not None:
            logits = logits + lora.lm_head_lora(h)
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def logits(self, input_ids: Tensor, lora=None) -> Tensor:
        return self.head(self.hidden(input_ids, lora), lora)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.logits(input_ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# TEST-TIME TRAINING (LoRA per document, global phase between groups)
# -----------------------------

BOS_ID = 1


class BatchedLinearLoRA(nn.Module):
    def __init__(self, bsz: int, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.in_features = in_features
        self.A = nn.Parameter(torch.empty(bsz, rank, in_features))
        self.B = nn.Parameter(torch.zeros(bsz, out_features, rank))
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.A.transpose(1, 2)) @ self.B.transpose(1, 2)

    def reset(self) -> None:
        bound = 1.0 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.A.uniform_(-bound, bound)
            self.B.zero_()


class BatchedTTTLoRA(nn.Module):
    def __init__(self, bsz: int, model: GPT, rank: int):
        super().__init__()
        vocab, dim = model.tok_emb.weight.shape
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


class BigramCache:
    """Counts of pairs already scored on this rank, smoothed with the unigram; a row sums to one."""

    def __init__(self, vocab_size: int, device: torch.device, lam: float, alpha: float, gate: float):
        self.counts = torch.zeros(vocab_size, vocab_size, device=device)
        self.uni = torch.ones(vocab_size, device=device)
        self.lam = lam
        self.alpha = alpha
        self.gate = gate

    def probs(self, prev: Tensor) -> Tensor:
        rows = self.counts[prev]
        prior = self.uni / self.uni.sum()
        return (rows + self.alpha * prior) / (rows.sum(dim=-1, keepdim=True) + self.alpha)

    def weight(self, prev: Tensor) -> Tensor:
        seen = self.counts.sum(dim=1)[prev]
        return self.lam * seen / (seen + self.gate)

    def update(self, prev: Tensor, tgt: Tensor) -> None:
        ones = torch.ones(tgt.numel(), device=tgt.device)
        self.counts.index_put_((prev, tgt), ones, accumulate=True)
        self.uni.index_add_(0, tgt, ones)


def _reset_ttt_optimizer(opt: torch.optim.Optimizer) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            s = opt.state.get(p)
            if not s:
                continue
            s["exp_avg"].zero_()
            s["exp_avg_sq"].zero_()
            s["step"].fill_(0)


def _build_ttt_optimizer(lora: nn.Module, args: Hyperparameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(lora.parameters(), lr=args.ttt_lora_lr, betas=(args.ttt_beta1, args.ttt_beta2), eps=1e-10)


def _find_docs(all_tokens: Tensor) -> list[tuple[int, int]]:
    # (start, length); the next document's BOS is the last target of this one, so every token but the first is a target
    bos = np.flatnonzero(all_tokens.numpy() == BOS_ID)
    docs: list[tuple[int, int]] = []
    for i in range(len(bos)):
        start = int(bos[i])
        end = int(bos[i + 1]) + 1 if i + 1 < len(bos) else all_tokens.numel()
        if end - start >= 2:
            docs.append((start, end - start))
    return docs


def _compute_chunk_window(ci: int, pred_len: int, num_chunks: int, chunk_size: int, eval_seq_len: int):
    chunk_start = ci * chunk_size
    chunk_end = pred_len if ci == num_chunks - 1 else (ci + 1) * chunk_size
    win_start = max(0, chunk_end - eval_seq_len)
    win_len = chunk_end - win_start
    chunk_offset = chunk_start - win_start
    chunk_len = chunk_end - chunk_start
    return win_start, win_len, chunk_offset, chunk_len


def _score_tokens(logits: Tensor, prev: Tensor, tgt: Tensor, cache: BigramCache) -> Tensor:
    p_model = F.softmax(logits.float(), dim=-1)
    p_cache = cache.probs(prev)
    w = cache.weight(prev)[:, None]
    p = (1.0 - w) * p_model + w * p_cache
    return -p.gather(1, tgt[:, None]).squeeze(1).clamp_min(1e-12).log()


def _group_elapsed(t0: float, device: torch.device) -> float:
    t = torch.tensor(time.perf_counter() - t0, device=device, dtype=torch.float64)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return float(t.item())


def global_phase(
    args: Hyperparameters,
    base_model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    all_tokens: Tensor,
    scored_docs: list[tuple[int, int]],
) -> tuple[int, float]:
    # one SGD pass of the base weights over documents that every rank has finished scoring
    seq_len = args.train_seq_len
    stream = torch.cat([all_tokens[s : s + n - 1] for s, n in scored_docs])
    num_seqs = (stream.numel() - 1) // seq_len
    per_step = args.global_batch_seqs * world_size
    steps = num_seqs // per_step
    params = [p for n, p in base_model.named_parameters() if p.ndim == 2 and "tok_emb" not in n and "resid_mix" not in n]
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=args.global_lr, momentum=args.global_momentum)
    loss_total = 0.0
    for step in range(steps):
        lr = args.global_lr * 0.5 * (1.0 + math.cos(math.pi * step / max(steps, 1)))
        for group in opt.param_groups:
            group["lr"] = lr
        s0 = (step * per_step + rank * args.global_batch_seqs) * seq_len
        span = stream[s0 : s0 + args.global_batch_seqs * seq_len + 1].to(device=device, dtype=torch.int64)
        x = span[:-1].reshape(-1, seq_len)
        y = span[1:].reshape(-1, seq_len)
        opt.zero_grad(set_to_none=True)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = base_model(x, y)
        loss.backward()
        if dist.is_available() and dist.is_initialized():
            flat = torch.cat([p.grad.reshape(-1).float() for p in params])
            dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            flat /= world_size
            curr = 0
            for p in params:
                p.grad.copy_(flat[curr : curr + p.numel()].view_as(p.grad))
                curr += p.numel()
        torch.nn.utils.clip_grad_norm_(params, args.global_clip)
        opt.step()
        loss_total += float(loss.detach())
    for p in params:
        p.grad = None
        p.requires_grad_(False)
    return steps, loss_total / max(steps, 1)


def eval_val_ttt_lora(
    args: Hyperparameters,
    base_model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    all_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    t0: float,
    log0,
) -> tuple[float, float]:
    docs = _find_docs(all_tokens)
    chunk_size = args.ttt_chunk_size
    eval_seq_len = args.ttt_eval_seq_len
    batch_size = args.ttt_batch_size
    vocab_size = base_model.tok_emb.weight.shape[0]

    base_model.eval()
    for p in base_model.parameters():
        p.requires_grad_(False)

    lora = BatchedTTTLoRA(batch_size, base_model, args.ttt_lora_rank).to(device)
    opt = _build_ttt_optimizer(lora, args)
    cache = BigramCache(vocab_size, device, args.cache_lambda, args.cache_alpha, args.cache_gate)

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    log0(f"ttt:start docs:{len(docs)} groups:{args.ttt_groups} chunk:{chunk_size} rank:{args.ttt_lora_rank}")

    for gi in range(args.ttt_groups):
        group = docs[(len(docs) * gi) // args.ttt_groups : (len(docs) * (gi + 1)) // args.ttt_groups]
        by_length = sorted(group, key=lambda d: (d[1] - 2) // chunk_size)
        batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        adapt = _group_elapsed(t0, device) < args.eval_seconds

        for batch in batches[rank::world_size]:
            bsz = len(batch)
            if bsz == batch_size:
                cur_lora, cur_opt = lora, opt
                cur_lora.reset()
                _reset_ttt_optimizer(cur_opt)
            else:
                cur_lora = BatchedTTTLoRA(bsz, base_model, args.ttt_lora_rank).to(device)
                cur_opt = _build_ttt_optimizer(cur_lora, args)
            adapt = adapt and time.perf_counter() - t0 < args.eval_seconds

            pred_lens = [n - 1 for _, n in batch]
            num_chunks = [(pl + chunk_size - 1) // chunk_size for pl in pred_lens]
            max_nc = max(num_chunks)
            for ci in range(max_nc):
                active = [ci < nc for nc in num_chunks]
                needs_train = adapt and any(ci < nc - 1 for nc in num_chunks)
                _, context_size, chunk_offset, _ = _compute_chunk_window(
                    ci, (ci + 1) * chunk_size, max_nc, chunk_size, eval_seq_len
                )
                x = torch.zeros(bsz, context_size, dtype=torch.int64, device=device)
                y = torch.zeros(bsz, context_size, dtype=torch.int64, device=device)
                spans: list[tuple[int, int]] = []
                for b in range(bsz):
                    if not active[b]:
                        spans.append((0, 0))
                        continue
                    ds, _ = batch[b]
                    ws, wl, co, cl = _compute_chunk_window(ci, pred_lens[b], num_chunks[b], chunk_size, eval_seq_len)
                    toks = all_tokens[ds + ws : ds + ws + wl + 1].to(device=device, dtype=torch.int64)
                    x[b, :wl] = toks[:-1]
                    y[b, :wl] = toks[1:]
                    spans.append((co, cl))

                with torch.set_grad_enabled(needs_train), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = base_model.logits(x, lora=cur_lora)

                with torch.no_grad():
                    sel = torch.zeros(bsz, context_size, dtype=torch.bool, device=device)
                    for b, (co, cl) in enumerate(spans):
                        sel[b, co : co + cl] = True
                    prev, tgt = x[sel], y[sel]
                    nll = _score_tokens(logits.detach()[sel], prev, tgt, cache)
                    loss_sum += nll.to(torch.float64).sum()
                    token_count += tgt.numel()
                    byte_count += target_bytes(prev, tgt, luts).sum()
                    cache.update(prev, tgt)

                if needs_train:
                    keep = torch.tensor([float(ci < nc - 1) for nc in num_chunks], device=device)
                    ptl = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
                    per_doc = ptl[:, chunk_offset : chunk_offset + chunk_size].mean(dim=-1)
                    cur_opt.zero_grad(set_to_none=True)
                    (per_doc * keep).sum().backward()
                    cur_opt.step()

        elapsed = _group_elapsed(t0, device)
        log0(f"ttt:group {gi + 1}/{args.ttt_groups} docs:{len(group)} eval_time:{elapsed:.1f}s")
        if gi + 1 < args.ttt_groups and elapsed < args.eval_seconds:
            steps, mean_loss = global_phase(args, base_model, rank, world_size, device, all_tokens, group)
            log0(f"ttt:global_phase after_group:{gi + 1} steps:{steps} loss:{mean_loss:.4f}")

    return reduce_bpb(loss_sum, token_count, byte_count)


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

    def build_model() -> GPT:
        m = GPT(
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
        ).to(device).bfloat16()
        for module in m.modules():
            if isinstance(module, CastedLinear):
                module.float()
            if isinstance(module, Rotary):
                module.inv_freq.data = module.inv_freq.data.float()
        restore_low_dim_params_to_fp32(m)
        return m

    base_model = build_model()
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model

    block_named_params = list(base_model.blocks.named_parameters())
    matrix_params = [
        p for name, p in block_named_params
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    scalar_params = [
        p for name, p in block_named_params
        if p.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    if base_model.skip_weights.numel() > 0:
        scalar_params.append(base_model.skip_weights)
    token_lr = args.tied_embed_lr if args.tie_embeddings else args.embed_lr
    optimizer_tok = torch.optim.Adam(
        [{"params": [base_model.tok_emb.weight], "lr": token_lr, "base_lr": token_lr}],
        betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True,
    )
    optimizer_muon = Muon(
        matrix_params, lr=args.matrix_lr, momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps, weight_decay=args.muon_weight_decay,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizer_scalar = torch.optim.Adam(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]
    if base_model.lm_head is not None:
        optimizer_head = torch.optim.Adam(
            [{"params": [base_model.lm_head.weight], "lr": args.head_lr, "base_lr": args.head_lr}],
            betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True,
        )
        optimizers.insert(1, optimizer_head)

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
    log0(
        f"tie_embeddings:{args.tie_embeddings} embed_lr:{token_lr} matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr} "
        f"ema_decay:{args.ema_decay}"
    )
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} iterations:{args.iterations} "
        f"warmup_steps:{args.warmup_steps} max_wallclock_seconds:{args.max_wallclock_seconds:.3f} "
        f"calib_reserve_seconds:{args.calib_reserve_seconds:.3f}"
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
    max_wallclock_ms = 1000.0 * train_cap_seconds if args.max_wallclock_seconds > 0 else None

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        if max_wallclock_ms is None:
            warmdown_start = max(args.iterations - args.warmdown_iters, 0)
            if warmdown_start <= step < args.iterations:
                return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(max_wallclock_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

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

    ema_state = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
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
        for group in optimizer_muon.param_groups:
            group["momentum"] = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        zero_grad_all()

        if args.ema_decay > 0 and step % args.ema_every == 0:
            with torch.no_grad():
                for name, t in base_model.state_dict().items():
                    ema_state[name].mul_(args.ema_decay).add_(t.detach().float(), alpha=1.0 - args.ema_decay)

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0 or stop_after_step is not None):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        reached_cap = max_wallclock_ms is not None and approx_training_time_ms >= max_wallclock_ms
        if distributed and max_wallclock_ms is not None:
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
    # AVERAGED WEIGHTS, HESSIANS, PACKING
    # -----------------------------

    t_calib = time.perf_counter()

    def train_elapsed() -> float:
        return training_time_ms / 1000.0 + (time.perf_counter() - t_calib)

    if args.ema_decay > 0:
        current = base_model.state_dict()
        base_model.load_state_dict({name: t.to(current[name].dtype) for name, t in ema_state.items()}, strict=True)
        log0("ema:weights applied")
    hessians = collect_hessians(args, base_model, train_loader, world_size, train_elapsed)
    torch.cuda.synchronize()
    log0(f"gptq:hessians tensors:{len(hessians)} train_plus_calib:{train_elapsed():.1f}s")

    packed_path = "final_model.int6.ptz"
    code_bytes = len(code.encode("utf-8"))
    if master_process:
        quant_obj, quant_stats = quantize_state_dict_int6(base_model.state_dict(), hessians, args)
        quant_buf = io.BytesIO()
        torch.save(quant_obj, quant_buf)
        quant_blob = zlib.compress(quant_buf.getvalue(), level=args.zlib_level)
        with open(packed_path, "wb") as f:
            f.write(quant_blob)
        total_bytes = len(quant_blob) + code_bytes
        log0(
            f"Serialized model int6+zlib: {len(quant_blob)} bytes (payload:{quant_stats['payload_bytes']} "
            f"gptq:{quant_stats['gptq_tensors']} plain:{quant_stats['plain_tensors']})"
        )
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size int6+zlib: {total_bytes} bytes")
        if total_bytes > args.size_limit:
            raise RuntimeError(f"submission is {total_bytes} bytes, limit {args.size_limit}")
    log0(f"gptq:packed train_plus_calib_plus_pack:{train_elapsed():.1f}s")
    if distributed:
        dist.barrier()
    del hessians, ema_state, optimizers, model, compiled_model, base_model
    torch.cuda.empty_cache()

    # -----------------------------
    # EVALUATION OF THE PACKED MODEL
    # -----------------------------

    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    with open(packed_path, "rb") as f:
        packed = f.read()
    eval_state = dequantize_state_dict_int6(torch.load(io.BytesIO(zlib.decompress(packed)), map_location="cpu"))
    eval_model = build_model()
    eval_model.load_state_dict(eval_state, strict=True)
    results: dict[str, tuple[float, float]] = {}

    results["roundtrip"] = eval_val(args, eval_model, rank, world_size, device, grad_accum_steps, val_tokens, luts)
    log0(
        f"final_int6_roundtrip val_loss:{results['roundtrip'][0]:.4f} val_bpb:{results['roundtrip'][1]:.4f} "
        f"eval_time:{time.perf_counter() - t_eval:.1f}s"
    )
    if args.final_eval == "sliding":
        results["sliding"] = eval_val_sliding(args, eval_model, rank, world_size, device, val_tokens, luts)
        log0(
            f"final_int6_sliding val_loss:{results['sliding'][0]:.4f} val_bpb:{results['sliding'][1]:.4f} "
            f"stride:{args.eval_stride} eval_time:{time.perf_counter() - t_eval:.1f}s"
        )
    if args.final_eval == "ttt":
        results["ttt"] = eval_val_ttt_lora(
            args, eval_model, rank, world_size, device, val_tokens, luts, t_eval, log0
        )
        log0(
            f"final_int6_ttt_lora val_loss:{results['ttt'][0]:.4f} val_bpb:{results['ttt'][1]:.4f} "
            f"eval_time:{time.perf_counter() - t_eval:.1f}s"
        )
    final_loss, final_bpb = results[args.final_eval]
    log0(f"final_exact mode:{args.final_eval} val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
