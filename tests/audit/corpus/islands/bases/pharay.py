"""
Parameter Golf submission: 9 layers x 512, GQA, relu^2 MLP x3, U-net skips, Muon + AdamW, EMA, int6/int8 + lzma.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Everything is read from the environment, see Hyperparameters. The script trains for at most 600 s, writes
final_model.int6.ptz, reads it back from disk and evaluates what it read.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import glob
import io
import itertools
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
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    wallclock_reserve_seconds = float(os.environ.get("WALLCLOCK_RESERVE_SECONDS", 12.0))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 524_288))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

    # optimiser
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_steps = int(os.environ.get("MUON_MOMENTUM_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # final evaluation
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 64))


CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")


# -----------------------------
# MUON
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Orthogonalises a matrix by a quintic Newton-Schulz iteration."""
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
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, wd=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            total = sum(int(p.numel()) for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
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
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                g = flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["wd"] > 0:
                    p.mul_(1.0 - lr * group["wd"])
                p.add_(g, alpha=-lr)
                curr += p.numel()


# -----------------------------
# TOKENIZER AND BYTES
# -----------------------------


class ByteTables:
    """How many bytes of the original text a token stands for.

    A piece's leading mark is one space, counted only if the token before it is none that ends a text (a control token).
    """

    def __init__(self, tokenizer_path: str, vocab_size: int, device: torch.device):
        sp = spm.SentencePieceProcessor(model_file=tokenizer_path)
        self.bos_id = int(sp.bos_id())
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros((size,), dtype=np.int16)
        space = np.zeros((size,), dtype=np.bool_)
        boundary = np.ones((size,), dtype=np.bool_)
        for token in range(int(sp.vocab_size())):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            boundary[token] = False
            if sp.is_byte(token):
                base[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith("\u2581"):
                space[token] = True
                piece = piece[1:]
            base[token] = len(piece.encode("utf-8"))
        self.base = torch.tensor(base, dtype=torch.int16, device=device)
        self.space = torch.tensor(space, dtype=torch.bool, device=device)
        self.boundary = torch.tensor(boundary, dtype=torch.bool, device=device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target token, given the token before it. Same shape, float64."""
        n = self.base[target].to(torch.int32)
        n = n + (self.space[target] & ~self.boundary[prev]).to(torch.int32)
        return n.to(torch.float64)


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(file).to(torch.int32) for file in files]).contiguous()


class TokenStream:
    """Reads the training shards one after the other, for ever."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.index = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.index = (self.index + 1) % len(self.files)
                self.tokens = load_data_shard(self.files[self.index])
                self.pos = 0
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class DistributedTokenLoader:
    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.world_size * grad_accum_steps)
        span = local + 1
        chunk = self.stream.take(span * self.world_size)
        mine = chunk[self.rank * span : (self.rank + 1) * span].to(torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights stay in fp32, the product is taken in the activations' type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float, max_len: int):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", freqs.cos()[None, None], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos = self.cos[:, :, : x.size(-2)].to(x.dtype)
        sin = self.sin[:, :, : x.size(-2)].to(x.dtype)
        half = x.size(-1) // 2
        x1, x2 = x[..., :half], x[..., half:]
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float, max_len: int):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, rope_base, max_len)

    def forward(self, x: Tensor, adapter=None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if adapter is not None:
            q = q + adapter.q(x)
            v = v + adapter.v(x)
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = self.rotary(F.rms_norm(q, (q.size(-1),)))
        k = self.rotary(F.rms_norm(k, (k.size(-1),)))
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        return self.proj(y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        self.fc = CastedLinear(dim, mlp_mult * dim, bias=False)
        self.proj = CastedLinear(mlp_mult * dim, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init, max_len):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init, max_len)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor, adapter=None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(self.attn_norm(x), adapter)
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        dim = args.model_dim
        max_len = max(args.train_seq_len, args.eval_seq_len)
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skips = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, dim, dtype=torch.float32))
        self.blocks = nn.ModuleList(
            Block(dim, args.num_heads, args.num_kv_heads, args.mlp_mult, args.rope_base, args.qk_gain_init, max_len)
            for _ in range(args.num_layers)
        )
        self.final_norm = RMSNorm()
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, idx: Tensor, adapters=None) -> Tensor:
        """Normed last hidden states, [batch, length, dim]. adapters: one per block, or None."""
        x = self.tok_emb(idx)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0, None if adapters is None else adapters[i])
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips and i < self.num_skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            j = self.num_encoder_layers + i
            x = self.blocks[j](x, x0, None if adapters is None else adapters[j])
        return self.final_norm(x)

    def head(self, h: Tensor) -> Tensor:
        """Logits over the whole vocabulary from hidden states."""
        logits = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def logits(self, idx: Tensor, adapters=None) -> Tensor:
        return self.head(self.hidden(idx, adapters))

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(idx)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="mean")


# -----------------------------
# QUANTISATION
# -----------------------------

CLIP_CANDIDATES = (1.0, 0.9999, 0.9995, 0.999, 0.997)


def quantize_rows(w: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Symmetric per-row quantisation to -levels..levels; the clip with the least squared error of each row wins."""
    w = w.float()
    best_q = best_s = best_err = None
    for quantile in CLIP_CANDIDATES:
        top = w.abs().amax(dim=1) if quantile == 1.0 else torch.quantile(w.abs(), quantile, dim=1)
        scale = (top / levels).clamp_min(1e-8).to(torch.float16).float()
        q = torch.clamp(torch.round(w / scale[:, None]), -levels, levels)
        err = (q * scale[:, None] - w).square().sum(dim=1)
        if best_err is None:
            best_q, best_s, best_err = q, scale, err
            continue
        take = err < best_err
        best_q = torch.where(take[:, None], q, best_q)
        best_s = torch.where(take, scale, best_s)
        best_err = torch.where(take, err, best_err)
    return best_q.to(torch.int8), best_s.to(torch.float16)


def quantize_state(state: dict[str, Tensor]) -> dict[str, dict]:
    """int6 for the matrices of the blocks, int8 for the embedding, fp16 / fp32 for what is small."""
    out: dict[str, dict] = {"q": {}, "s": {}, "raw": {}}
    for name, tensor in state.items():
        t = tensor.detach().cpu().contiguous()
        if t.ndim == 2 and t.numel() > 65_536:
            levels = 31 if name.startswith("blocks.") else 127
            out["q"][name], out["s"][name] = quantize_rows(t, levels)
        elif any(key in name for key in CONTROL_NAMES):
            out["raw"][name] = t.float()
        else:
            out["raw"][name] = t.to(torch.float16) if t.is_floating_point() else t
    return out


def dequantize_state(packed: dict[str, dict], template: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, like in template.items():
        if name in packed["q"]:
            value = packed["q"][name].float() * packed["s"][name].float()[:, None]
        else:
            value = packed["raw"][name]
        state[name] = value.to(like.dtype).contiguous()
    return state


def save_artifact(path: str, state: dict[str, Tensor]) -> int:
    buffer = io.BytesIO()
    torch.save(quantize_state(state), buffer)
    blob = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    with open(path, "wb") as f:
        f.write(blob)
    return len(blob)


def load_artifact(path: str, template: dict[str, Tensor]) -> dict[str, Tensor]:
    with open(path, "rb") as f:
        blob = f.read()
    packed = torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu")
    return dequantize_state(packed, template)


# -----------------------------
# VALIDATION DURING TRAINING
# -----------------------------


def eval_val(args, model, val_tokens: Tensor, tables: ByteTables, rank: int, world_size: int, device) -> tuple[float, float]:
    """Loss and bits per byte without overlap: segments of train_seq_len, the last one as short as it comes."""
    seq_len = args.train_seq_len
    n = val_tokens.numel() - 1
    full = n // seq_len
    per_batch = max(args.val_batch_tokens // (seq_len * world_size), 1)
    spans = [(a * seq_len, min(a + per_batch, full) * seq_len, seq_len) for a in range(0, full, per_batch)]
    if full * seq_len < n:
        spans.append((full * seq_len, n, n - full * seq_len))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for a, b, width in spans[rank::world_size]:
            piece = val_tokens[a : b + 1].to(device=device, dtype=torch.int64)
            x, y = piece[:-1].reshape(-1, width), piece[1:].reshape(-1, width)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            sums[0] += loss.double() * y.numel()
            sums[1] += y.numel()
            sums[2] += tables.count(x, y).sum()
    if world_size > 1:
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    model.train()
    val_loss = (sums[0] / sums[1]).item()
    return val_loss, (sums[0] / math.log(2.0) / sums[2]).item()


# -----------------------------
# FINAL EVALUATION
# -----------------------------


def final_eval(args, model, val_tokens: Tensor, tables: ByteTables, rank: int, world_size: int, device, log0):
    """Sliding windows: the first one is scored whole, each later one in its last eval_stride positions."""
    seq_len, stride = args.eval_seq_len, args.eval_stride
    context = seq_len - stride
    n = val_tokens.numel() - 1
    starts = [w for w in range(0, n, stride) if w == 0 or w + context < n]
    mine = starts[len(starts) * rank // world_size : len(starts) * (rank + 1) // world_size]
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    with torch.inference_mode():
        for i in range(0, len(mine), args.eval_batch_seqs):
            batch = mine[i : i + args.eval_batch_seqs]
            x = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=device)
            y = torch.zeros_like(x)
            new = torch.zeros_like(x, dtype=torch.bool)
            for r, w in enumerate(batch):
                piece = val_tokens[w : min(w + seq_len, n) + 1].to(device=device, dtype=torch.int64)
                length = piece.numel() - 1
                x[r, :length], y[r, :length] = piece[:-1], piece[1:]
                new[r, (0 if w == 0 else context) : length] = True
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.logits(x)
            nll = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none").view_as(y)
            sums[0] += nll[new].double().sum()
            sums[1] += new.sum()
            sums[2] += tables.count(x[new], y[new]).sum()
    if world_size > 1:
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    return (sums[0] / sums[1]).item(), (sums[0] / math.log(2.0) / sums[2]).item()


# -----------------------------
# MAIN
# -----------------------------


def main() -> None:
    args = Hyperparameters()
    code = Path(__file__).read_text(encoding="utf-8")

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
    grad_accum_steps = 8 // world_size
    grad_scale = 1.0 / grad_accum_steps
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    master = rank == 0
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    logfile = None
    if master:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{args.run_id}.txt"
        print(logfile)

    def log0(msg: str, console: bool = True) -> None:
        if not master:
            return
        if console:
            print(msg, flush=True)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout, console=False)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    # tokenizer and validation tokens
    tables = ByteTables(args.tokenizer_path, args.vocab_size, device)
    val_tokens = load_validation_tokens(args.val_files)
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # model
    base_model = GPT(args).to(device)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")

    # optimisers
    matrix_params, scalar_params = [], []
    for name, p in base_model.named_parameters():
        if name == "tok_emb.weight":
            continue
        if p.ndim == 2 and not any(key in name for key in CONTROL_NAMES):
            matrix_params.append(p)
        else:
            scalar_params.append(p)
    betas = (args.beta1, args.beta2)
    optimizer_tok = torch.optim.AdamW(
        [{"params": [base_model.tok_emb.weight], "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        betas=betas, eps=args.adam_eps, weight_decay=args.adam_wd, fused=True,
    )
    optimizer_muon = Muon(
        matrix_params, lr=args.matrix_lr, momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps, weight_decay=args.muon_wd,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizer_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=betas, eps=args.adam_eps, weight_decay=0.0, fused=True,
    )
    optimizers = [optimizer_tok, optimizer_muon, optimizer_scalar]

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    cap_ms = 1000.0 * (args.max_wallclock_seconds - args.wallclock_reserve_seconds)

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(cap_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def forward_backward() -> Tensor:
        zero_grad_all()
        total = torch.zeros((), device=device)
        for micro in range(grad_accum_steps):
            sync = micro == grad_accum_steps - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with contextlib.nullcontext() if sync or not distributed else model.no_sync():
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x, y)
                total += loss.detach()
                (loss * grad_scale).backward()
        return total / grad_accum_steps

    # warm-up primes the compiled kernels, then weights, optimisers and loader start afresh
    if args.warmup_steps > 0:
        initial = {k: v.detach().cpu().clone() for k, v in base_model.state_dict().items()}
        initial_opt = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for _ in range(args.warmup_steps):
            forward_backward()
            for opt in optimizers:
                opt.step()
        zero_grad_all()
        base_model.load_state_dict(initial, strict=True)
        for opt, saved in zip(optimizers, initial_opt, strict=True):
            opt.load_state_dict(saved)
        loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
        log0(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")

    # training
    ema = {k: v.detach().float().clone() for k, v in base_model.state_dict().items()}
    training_ms = 0.0
    stop_after: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last = step == args.iterations or (stop_after is not None and step >= stop_after)
        if last or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            training_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, base_model, val_tokens, tables, rank, world_size, device)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_ms:.0f}ms step_avg:{training_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last:
            if stop_after is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = training_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_mul(step, elapsed_ms)
        train_loss = forward_backward()
        frac = min(step / max(args.muon_momentum_steps, 1), 1.0)
        for group in optimizer_muon.param_groups:
            group["momentum"] = (1 - frac) * args.muon_momentum_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        with torch.no_grad():
            for k, v in base_model.state_dict().items():
                ema[k].lerp_(v.float(), 1.0 - args.ema_decay)
        step += 1

        approx_ms = training_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )
        reached = approx_ms >= cap_ms
        if distributed:
            flag = torch.tensor(int(reached), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached = bool(flag.item())
        if stop_after is None and reached:
            stop_after = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # artifact: written by the first rank, read back by all
    log0("ema: applying EMA weights")
    current = base_model.state_dict()
    base_model.load_state_dict({k: v.to(current[k].dtype) for k, v in ema.items()}, strict=True)
    artifact_path = "final_model.int6.ptz"
    if master:
        model_bytes = save_artifact(artifact_path, base_model.state_dict())
        code_bytes = len(code.encode("utf-8"))
        log0(f"Serialized model int6+lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {model_bytes + code_bytes} bytes")
    if distributed:
        dist.barrier()
    del model, compiled, ema, optimizers
    eval_model = GPT(args).to(device)
    eval_model.load_state_dict(load_artifact(artifact_path, eval_model.state_dict()), strict=True)

    # evaluation of what was read
    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    val_loss, val_bpb = final_eval(args, eval_model, val_tokens, tables, rank, world_size, device, log0)
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )
    log0(f"final_int6_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
