"""
taransay: 11L x 512d, sp1024, XSA everywhere, value embeddings, EMA + late SWA, self-calibrated GPTQ int6 + lzma.

The reported number is the sliding-window score (stride 64) with score-first TTT over 32K-token chunks, where the
network is interpolated with a causal hashed n-gram expert (orders 2..5, full vocabulary rows).

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


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, "1" if default else "0")))


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
    seed = env_int("SEED", 1337)

    # length of the run
    iterations = env_int("ITERATIONS", 20000)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env_float("GPTQ_RESERVE_SECONDS", 80.0)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    warmdown_iters = env_int("WARMDOWN_ITERS", 3500)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)

    # model
    vocab_size = env_int("VOCAB_SIZE", 1024)
    bos_id = env_int("BOS_ID", 1)
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 3.0)
    rope_base = env_float("ROPE_BASE", 10000.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 1.5)
    tied_embed_init_std = env_float("TIED_EMBED_INIT_STD", 0.005)
    xsa_last_n = env_int("XSA_LAST_N", 11)
    ve_dim = env_int("VE_DIM", 128)
    ve_layers = os.environ.get("VE_LAYERS", "9,10")
    bigram_buckets = env_int("BIGRAM_BUCKETS", 3072)
    bigram_dim = env_int("BIGRAM_DIM", 112)

    # optimiser
    embed_lr = env_float("EMBED_LR", 0.035)
    matrix_lr = env_float("MATRIX_LR", 0.025)
    scalar_lr = env_float("SCALAR_LR", 0.025)
    muon_momentum = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_warmup = env_int("MUON_MOMENTUM_WARMUP", 1500)
    muon_steps = env_int("MUON_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.04)
    adam_wd = env_float("ADAM_WD", 0.04)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    grad_clip = env_float("GRAD_CLIP", 0.3)

    # averaging, qat
    ema_decay = env_float("EMA_DECAY", 0.997)
    swa_every = env_int("SWA_EVERY", 50)
    swa_below = env_float("SWA_BELOW", 0.2)
    swa_share = env_float("SWA_SHARE", 0.5)
    qat_below = env_float("QAT_BELOW", 0.15)

    # export
    artifact = os.environ.get("ARTIFACT", "final_model.int6.ptz")
    size_limit = env_int("SIZE_LIMIT", 16_000_000)
    calib_seqs_per_rank = env_int("CALIB_SEQS_PER_RANK", 8)
    calib_len = env_int("CALIB_LEN", 1024)
    calib_temp = env_float("CALIB_TEMP", 0.8)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    lzma_preset = env_int("LZMA_PRESET", 6)

    # evaluation
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_batch_seqs = env_int("EVAL_BATCH_SEQS", 32)
    eval_temperature = env_float("EVAL_TEMPERATURE", 1.0)
    eval_budget_seconds = env_float("EVAL_BUDGET_SECONDS", 600.0)
    ttt_enabled = env_flag("TTT_ENABLED", True)
    ttt_chunk = env_int("TTT_CHUNK", 32768)
    ttt_lr = env_float("TTT_LR", 0.002)
    ttt_momentum = env_float("TTT_MOMENTUM", 0.9)
    ttt_epochs = env_int("TTT_EPOCHS", 3)
    ttt_batch_seqs = env_int("TTT_BATCH_SEQS", 2)
    ttt_freeze_blocks = env_int("TTT_FREEZE_BLOCKS", 2)
    ttt_grad_clip = env_float("TTT_GRAD_CLIP", 1.0)
    ngram_enabled = env_flag("NGRAM_ENABLED", True)
    ngram_max_order = env_int("NGRAM_MAX_ORDER", 5)
    ngram_buckets = env_int("NGRAM_BUCKETS", 131072)
    ngram_alpha = env_float("NGRAM_ALPHA", 4.0)
    mix_prior = env_float("MIX_PRIOR", 200.0)


CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "smear", "ve_scale", "bigram_scale")


# -----------------------------
# MUON
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    flip = G.size(0) > G.size(1)
    if flip:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if flip else X


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum; matrices are dealt round-robin to the ranks and the updates summed back."""

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
            lr, momentum = group["lr"], group["momentum"]
            total = sum(int(p.numel()) for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cursor = 0
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
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            cursor = 0
            for p in params:
                g = flat[cursor : cursor + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                cursor += p.numel()
        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC BYTE COUNTS
# -----------------------------


def build_sentencepiece_luts(
    sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token id: bytes of its own text, whether it begins with the space mark, whether it is a boundary token."""
    table_size = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros((table_size,), dtype=np.int16)
    leading_space = np.zeros((table_size,), dtype=np.bool_)
    boundary = np.ones((table_size,), dtype=np.bool_)
    for tid in range(int(sp.vocab_size())):
        if sp.is_control(tid) or sp.is_unknown(tid) or sp.is_unused(tid):
            continue
        boundary[tid] = False
        if sp.is_byte(tid):
            base_bytes[tid] = 1
            continue
        piece = sp.id_to_piece(tid)
        if piece.startswith("\u2581"):
            leading_space[tid] = True
            piece = piece[1:]
        base_bytes[tid] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(leading_space, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


class ByteCounter:
    """Bytes of the original text that a batch of targets stands for."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        self.base, self.space, self.boundary = build_sentencepiece_luts(sp, vocab_size, device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.base[target].to(torch.int64)
        # the space in front of a word is text only if something stands before it in the document
        n = n + (self.space[target] & ~self.boundary[prev]).to(torch.int64)
        return n.sum()


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected = header_bytes + num_tokens * np.dtype("<u2").itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected} bytes")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # the split is kept whole: the last, shorter window is scored too
    return torch.cat([load_data_shard(f) for f in files]).contiguous()


class TokenStream:
    """Walks the shards in name order and begins again at the end."""

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
        parts: list[Tensor] = []
        left = n
        while left > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self._advance_file()
                continue
            k = min(left, avail)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            left -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class DistributedTokenLoader:
    """One contiguous slab per call, cut into disjoint spans for the ranks (each with one token of overhang)."""

    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        span = local_tokens + 1
        slab = self.stream.take(span * self.world_size)
        start = self.rank * span
        local = slab[start : start + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


def fake_quant_int6(w: Tensor) -> Tensor:
    scale = (w.abs().amax(dim=1, keepdim=True) / 31.0).clamp_min(1e-8)
    return torch.clamp(torch.round(w / scale), -31, 31) * scale


class CastedLinear(nn.Linear):
    """fp32 master weight, cast to the activation's dtype. qat_mix is a tensor, so switching it does not recompile."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.register_buffer("qat_mix", torch.zeros(()), persistent=False)
        self.zero_init = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.training:
            w = w + self.qat_mix * (fake_quant_int6(w) - w).detach()
        return F.linear(x, w.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float, max_len: int):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        t = torch.arange(max_len, dtype=torch.float32)
        freqs = torch.outer(t, inv_freq)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.cos[:, :n].to(dtype), self.sin[:, :n].to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    rot, rest = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    a, b = rot[..., :half], rot[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: type[Hyperparameters], use_xsa: bool):
        super().__init__()
        dim = args.model_dim
        self.num_heads = args.num_heads
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = dim // args.num_heads
        self.rope_dims = args.rope_dims
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim)
        self.proj.zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), args.qk_gain_init))
        self.rotary = Rotary(args.rope_dims, args.rope_base, max(args.train_seq_len, args.eval_seq_len))

    def _exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        # y: (B, T, H, D), v: (B, T, Hkv, D). Takes away the part of each head's output along its own value vector.
        B, T, H, D = y.shape
        g = y.reshape(B, T, self.num_kv_heads, H // self.num_kv_heads, D)
        vn = F.normalize(v, dim=-1).unsqueeze(3)
        g = g - (g * vn).sum(dim=-1, keepdim=True) * vn
        return g.reshape(B, T, H, D)

    def forward(self, x: Tensor, v_embed: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).reshape(B, T, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        v = self.c_v(x)
        if v_embed is not None:
            v = v + v_embed
        v = v.reshape(B, T, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(T, q.dtype)
        q = apply_rotary(q, cos, sin, self.rope_dims)
        k = apply_rotary(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.use_xsa:
            y = self._exclude_self(y, v)
        return self.proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        hidden = int(dim * mult)
        self.fc = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim)
        self.proj.zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class SmearGate(nn.Module):
    """Adds a little of the previous position's embedding. Stops at a document's first token."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.smear = nn.Parameter(torch.full((dim,), 3.0))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        keep = torch.sigmoid(self.smear).to(x.dtype)
        back = torch.cat((x[:, :1], x[:, :-1]), dim=1)
        starts = (ids == self.bos_id).unsqueeze(-1)
        back = torch.where(starts, x, back)
        return keep * x + (1.0 - keep) * back


class BigramHash(nn.Module):
    """Embedding of the hashed pair (previous token, token); bucket 0 is kept for a document's first token."""

    def __init__(self, buckets: int, dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.table = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.table.weight)
        self.up = CastedLinear(dim, model_dim)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        prev = torch.cat((torch.full_like(ids[:, :1], self.bos_id), ids[:, :-1]), dim=1)
        slot = (prev * 36313 + ids * 27191) % (self.buckets - 1) + 1
        slot = torch.where(ids == self.bos_id, torch.zeros_like(slot), slot)
        return self.up(self.table(slot).to(dtype)) * self.bigram_scale.to(dtype)


class ValueEmbedding(nn.Module):
    def __init__(self, vocab_size: int, ve_dim: int, kv_dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, ve_dim)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.up = CastedLinear(ve_dim, kv_dim)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.up(self.embed(ids).to(dtype))


class Block(nn.Module):
    def __init__(self, args: type[Hyperparameters], layer: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(args, use_xsa=layer >= args.num_layers - args.xsa_last_n)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, v_embed: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        h = self.attn_norm(x) * self.depth_scale
        x = x + self.attn_scale.to(x.dtype) * self.attn(h, v_embed)
        h = self.mlp_norm(x) * self.depth_scale
        return x + self.mlp_scale.to(x.dtype) * self.mlp(h)


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        self.softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        nn.init.normal_(self.tok_emb.weight, std=args.tied_embed_init_std)
        self.bigram = BigramHash(args.bigram_buckets, args.bigram_dim, args.model_dim, args.bos_id)
        self.smear_gate = SmearGate(args.model_dim, args.bos_id)
        kv_dim = args.num_kv_heads * (args.model_dim // args.num_heads)
        self.ve_layers = [int(s) for s in args.ve_layers.split(",") if s]
        self.value_embed = ValueEmbedding(args.vocab_size, args.ve_dim, kv_dim)
        self.ve_scale = nn.Parameter(torch.full((len(self.ve_layers),), 0.1))
        self.n_enc = args.num_layers // 2
        self.n_dec = args.num_layers - self.n_enc
        self.n_skip = min(self.n_enc, self.n_dec)
        self.skip_weights = nn.Parameter(torch.ones(self.n_skip, args.model_dim))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights()

    def _init_weights(self) -> None:
        for m in self.modules():
            if isinstance(m, CastedLinear):
                if m.zero_init:
                    nn.init.zeros_(m.weight)
                else:
                    nn.init.orthogonal_(m.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids).to(torch.bfloat16)
        x = x + self.bigram(ids, x.dtype)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear_gate(x, ids)
        x0 = x
        ve = self.value_embed(ids, x.dtype)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.n_enc and skips:
                j = i - self.n_enc
                x = x + self.skip_weights[j].to(x.dtype) * skips.pop()
            v_embed = None
            if i in self.ve_layers:
                v_embed = ve * self.ve_scale[self.ve_layers.index(i)].to(ve.dtype)
            x = block(x, x0, v_embed)
            if i < self.n_skip:
                skips.append(x)
        return self.final_norm(x)

    def head(self, h: Tensor) -> Tensor:
        logits = F.linear(h, self.tok_emb.weight.to(h.dtype)).float()
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward_logits(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="mean")


def set_qat(model: nn.Module, on: bool) -> None:
    for m in model.modules():
        if isinstance(m, CastedLinear):
            m.qat_mix.fill_(1.0 if on else 0.0)


# -----------------------------
# WEIGHT AVERAGES
# -----------------------------


class WeightAverages:
    """An EMA from the first step and a plain mean of late snapshots; both in fp32 on the device."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.ema = {n: p.detach().float().clone() for n, p in model.named_parameters()}
        self.swa = {n: torch.zeros_like(t) for n, t in self.ema.items()}
        self.swa_count = 0

    @torch.no_grad()
    def after_step(self) -> None:
        live = [p.detach() for _, p in self.model.named_parameters()]
        torch._foreach_lerp_(list(self.ema.values()), live, 1.0 - self.decay)

    @torch.no_grad()
    def snapshot(self) -> None:
        self.swa_count += 1
        for n, p in self.model.named_parameters():
            self.swa[n].add_((p.detach() - self.swa[n]) / self.swa_count)

    @torch.no_grad()
    def blended(self, share: float) -> dict[str, Tensor]:
        """(1 - share) * EMA + share * SWA; the EMA alone if no snapshot was taken."""
        if self.swa_count == 0:
            share = 0.0
        return {n: torch.lerp(self.ema[n], self.swa[n], share) for n in self.ema}

    @torch.no_grad()
    def install(self, weights: dict[str, Tensor]) -> None:
        for n, p in self.model.named_parameters():
            p.copy_(weights[n])


# -----------------------------
# SELF-GENERATED CALIBRATION TEXT
# -----------------------------


@torch.no_grad()
def generate_calibration(model: GPT, args: type[Hyperparameters], rank: int, device: torch.device) -> Tensor:
    """Sequences drawn from the model itself, begun with BOS. No data is read."""
    gen = torch.Generator(device=device)
    gen.manual_seed(args.seed * 1000 + rank)
    n, length = args.calib_seqs_per_rank, args.calib_len
    ids = torch.full((n, length), args.bos_id, dtype=torch.int64, device=device)
    for t in range(1, length):
        # a window of 256 tokens is enough to keep the text plausible, and keeps this cheap without a KV cache
        lo = max(0, t - 256)
        h = model.hidden(ids[:, lo:t])
        probs = torch.softmax(model.head(h[:, -1]) / args.calib_temp, dim=-1)
        ids[:, t] = torch.multinomial(probs, 1, generator=gen).squeeze(1)
    return ids


@torch.no_grad()
def collect_hessians(model: GPT, batches: list[Tensor], distributed: bool) -> dict[str, Tensor]:
    """Sum of x x^T at the input of every linear layer, over the calibration batches of all ranks."""
    hessians: dict[str, Tensor] = {}
    handles = []
    for name, m in model.named_modules():
        if not isinstance(m, CastedLinear):
            continue
        hessians[name] = torch.zeros(m.in_features, m.in_features, device=m.weight.device)

        def hook(_m, inputs, _out, name=name):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            hessians[name].addmm_(x.T, x)

        handles.append(m.register_forward_hook(hook))
    for ids in batches:
        model.hidden(ids)
    for h in handles:
        h.remove()
    if distributed:
        for name in sorted(hessians):
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
    return hessians


# -----------------------------
# GPTQ INT6
# -----------------------------

CLIP_PERCENTILES = (0.995, 0.999, 0.9995, 0.9999, 1.0)


def choose_row_scales(w: Tensor, qmax: int) -> Tensor:
    """Per row, the clip whose plain rounding loses least (on the weights alone)."""
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best = torch.ones(w.size(0), device=w.device)
    a = w.abs()
    for pct in CLIP_PERCENTILES:
        top = torch.quantile(a, pct, dim=1) if pct < 1.0 else a.amax(dim=1)
        scale = (top / qmax).clamp_min(1e-8)
        q = torch.clamp(torch.round(w / scale[:, None]), -qmax, qmax)
        err = (w - q * scale[:, None]).square().sum(dim=1)
        better = err < best_err
        best = torch.where(better, scale, best)
        best_err = torch.where(better, err, best_err)
    return best.half().float().clamp_min(1e-7)


@torch.no_grad()
def gptq_quantize(w: Tensor, hessian: Tensor, block: int, damp: float, qmax: int = 31) -> tuple[Tensor, Tensor]:
    W = w.detach().float().clone()
    H = hessian.clone()
    rows, cols = W.shape
    scale = choose_row_scales(W, qmax)
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    perm = torch.argsort(H.diagonal(), descending=True)
    W, H = W[:, perm], H[perm][:, perm]
    H.diagonal().add_(damp * H.diagonal().mean())
    try:
        Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
        U = torch.linalg.cholesky(Hinv, upper=True)
    except torch.linalg.LinAlgError:
        U = torch.eye(cols, device=W.device)
    Q = torch.zeros_like(W)
    for i0 in range(0, cols, block):
        i1 = min(i0 + block, cols)
        Wb = W[:, i0:i1].clone()
        Eb = torch.zeros_like(Wb)
        Ub = U[i0:i1, i0:i1]
        for j in range(i1 - i0):
            col = Wb[:, j]
            q = torch.clamp(torch.round(col / scale), -qmax, qmax)
            Q[:, i0 + j] = q
            e = (col - q * scale) / Ub[j, j]
            Wb[:, j:] -= e[:, None] * Ub[j, j:][None, :]
            Eb[:, j] = e
        W[:, i1:] -= Eb @ U[i0:i1, i1:]
    Q = Q[:, torch.argsort(perm)]
    return Q.to(torch.int8).cpu(), scale.half().cpu()


def quantize_rows_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = (w.abs().amax(dim=1) / 127.0).clamp_min(1e-7).half().float()
    q = torch.clamp(torch.round(w / scale[:, None]), -127, 127)
    return q.to(torch.int8).cpu(), scale.half().cpu()


def quantize_model(
    model: GPT, hessians: dict[str, Tensor], args: type[Hyperparameters], rank: int, world_size: int
) -> dict[str, dict[str, Tensor]]:
    """int6 for the linear layers (dealt to the ranks), int8 rows for the embeddings, fp16 for what is small."""
    linear = {f"{n}.weight": n for n, m in model.named_modules() if isinstance(m, CastedLinear)}
    params = {n: p.detach() for n, p in model.named_parameters()}
    mine: dict[str, tuple[Tensor, Tensor]] = {}
    for i, name in enumerate(sorted(linear)):
        if i % world_size == rank:
            mine[name] = gptq_quantize(params[name], hessians[linear[name]], args.gptq_block, args.gptq_damp)
    if world_size > 1:
        gathered: list[dict | None] = [None] * world_size
        dist.all_gather_object(gathered, mine)
        merged = {k: v for part in gathered for k, v in part.items()}
    else:
        merged = mine
    out: dict[str, dict[str, Tensor]] = {"q6": {}, "q8": {}, "scale": {}, "plain": {}}
    for name, p in params.items():
        if name in merged:
            out["q6"][name], out["scale"][name] = merged[name]
        elif p.ndim == 2 and p.numel() > 65536 and not any(s in name for s in CONTROL_PATTERNS):
            out["q8"][name], out["scale"][name] = quantize_rows_int8(p.float())
        else:
            out["plain"][name] = p.half().cpu()
    return out


def dequantize_model(obj: dict[str, dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for part in ("q6", "q8"):
        for name, q in obj[part].items():
            weights[name] = q.to(device).float() * obj["scale"][name].to(device).float()[:, None]
    for name, t in obj["plain"].items():
        weights[name] = t.to(device).float()
    return weights


# -----------------------------
# SELECTIVE PRUNING AND PACKING
# -----------------------------

PRUNE_LADDER = (0.0, 0.01, 0.02, 0.04, 0.06, 0.09, 0.13, 0.18)


def prune_ones(obj: dict[str, dict[str, Tensor]], fraction: float) -> dict[str, dict[str, Tensor]]:
    """Sets to zero the given share of the +-1 entries, those of the rows with the smallest scales first."""
    if fraction <= 0.0:
        return obj
    row_scale = torch.cat([obj["scale"][n].float() for n in sorted(obj["q6"])])
    row_ones = torch.cat([(obj["q6"][n].abs() == 1).sum(dim=1) for n in sorted(obj["q6"])])
    order = torch.argsort(row_scale)
    cum = torch.cumsum(row_ones[order], dim=0)
    k = int((cum <= fraction * int(row_ones.sum())).sum())
    cut = torch.zeros_like(row_scale, dtype=torch.bool)
    cut[order[:k]] = True
    out = dict(obj)
    out["q6"] = {}
    at = 0
    for n in sorted(obj["q6"]):
        q = obj["q6"][n].clone()
        rows = cut[at : at + q.size(0)]
        at += q.size(0)
        q[rows[:, None] & (q.abs() == 1)] = 0
        out["q6"][n] = q
    return out


def pack(obj: dict[str, dict[str, Tensor]], preset: int) -> bytes:
    buf = io.BytesIO()
    torch.save(obj, buf)
    return lzma.compress(buf.getvalue(), preset=preset)


def pack_to_fit(
    obj: dict[str, dict[str, Tensor]], room: int, args: type[Hyperparameters], rank: int, world_size: int
) -> tuple[bytes, float]:
    """Every rank packs its rungs of the ladder; the least pruned blob that fits is taken by all."""
    mine: dict[float, bytes] = {}
    for i, fraction in enumerate(PRUNE_LADDER):
        if i % world_size == rank:
            mine[fraction] = pack(prune_ones(obj, fraction), args.lzma_preset)
    sizes = {fraction: len(blob) for fraction, blob in mine.items()}
    if world_size > 1:
        parts: list[dict | None] = [None] * world_size
        dist.all_gather_object(parts, sizes)
        sizes = {k: v for part in parts for k, v in part.items()}
    fitting = [fraction for fraction in PRUNE_LADDER if sizes[fraction] <= room]
    if not fitting:
        raise RuntimeError(f"no rung of the ladder fits into {room} bytes: {sizes}")
    chosen = fitting[0]
    owner = PRUNE_LADDER.index(chosen) % world_size
    holder = [mine.get(chosen)]
    if world_size > 1:
        dist.broadcast_object_list(holder, src=owner)
    return holder[0], chosen


# -----------------------------
# CAUSAL N-GRAM EXPERT
# -----------------------------

HASH_PRIMES = (1, 1000003, 998244353, 754974721, 167772161)


class NgramExpert:
    """Counts of what followed each hashed context of 1..max_order-1 tokens. The key holds the context only; a row has
    a cell for every token of the vocabulary, so a collision mixes contexts but a row is still a distribution."""

    def __init__(self, vocab_size: int, max_order: int, buckets: int, alpha: float, device: torch.device):
        self.vocab_size = vocab_size
        self.orders = list(range(2, max_order + 1))
        self.buckets = buckets
        self.alpha = alpha
        self.device = device
        self.unigram = torch.ones(vocab_size, device=device)
        self.rows = {n: torch.zeros(buckets, vocab_size, device=device) for n in self.orders}

    def keys(self, tokens: Tensor, pos: Tensor, order: int) -> Tensor:
        """Bucket of the order-1 tokens that end at pos (the token to predict is at pos + 1)."""
        h = torch.full_like(pos, order)
        for j in range(order - 1):
            idx = pos - j
            tok = torch.where(idx >= 0, tokens[idx.clamp_min(0)], torch.zeros_like(idx))
            h = (h * 31 + (tok + 1) * HASH_PRIMES[j]) % 2147483647
        return h % self.buckets

    def distributions(self, tokens: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """(N, orders, V) probabilities and (N,) how many orders have seen their context often enough."""
        lower = (self.unigram / self.unigram.sum()).expand(pos.numel(), -1)
        probs, seen = [], torch.zeros_like(pos)
        for n in self.orders:
            row = self.rows[n][self.keys(tokens, pos, n)]
            total = row.sum(dim=1, keepdim=True)
            lower = (row + self.alpha * lower) / (total + self.alpha)
            probs.append(lower)
            seen = seen + (total.squeeze(1) >= 4.0).to(seen.dtype)
        return torch.stack(probs, dim=1), seen

    def absorb(self, tokens: Tensor, lo: int, hi: int) -> None:
        """Counts the targets of positions lo..hi-1, i.e. the tokens lo+1..hi."""
        pos = torch.arange(lo, hi, device=self.device)
        target = tokens[lo + 1 : hi + 1]
        self.unigram.scatter_add_(0, target, torch.ones_like(target, dtype=torch.float32))
        for n in self.orders:
            cell = self.keys(tokens, pos, n) * self.vocab_size + target
            self.rows[n].view(-1).scatter_add_(0, cell, torch.ones_like(cell, dtype=torch.float32))


class OnlineInterpolation:
    """One weight vector over (network, order 2, ..., order n) per bin. Bins come from the context alone: how many orders
    know it, and how sure the network is. The weights follow the responsibilities of tokens that were scored before."""

    ENTROPY_EDGES = (0.7, 1.8, 3.2)

    def __init__(self, num_experts: int, num_orders: int, prior: float, device: torch.device):
        self.num_bins = (num_orders + 1) * (len(self.ENTROPY_EDGES) + 1)
        start = torch.full((num_experts,), 0.08 / max(num_experts - 1, 1), device=device)
        start[0] = 0.92
        self.mass = (prior * start).repeat(self.num_bins, 1)
        self.fresh = torch.zeros_like(self.mass)
        self.edges = torch.tensor(self.ENTROPY_EDGES, device=device)

    def bins(self, p_net: Tensor, seen: Tensor) -> Tensor:
        entropy = -(p_net * p_net.clamp_min(1e-12).log()).sum(dim=1)
        return seen * (self.edges.numel() + 1) + torch.bucketize(entropy, self.edges)

    def weights(self, bins: Tensor) -> Tensor:
        w = self.mass / self.mass.sum(dim=1, keepdim=True)
        return w[bins]

    def observe(self, bins: Tensor, w: Tensor, p_at_target: Tensor) -> None:
        """Kept aside; nothing is used before commit()."""
        joint = w * p_at_target
        self.fresh.index_add_(0, bins, joint / joint.sum(dim=1, keepdim=True).clamp_min(1e-30))

    def commit(self, distributed: bool) -> None:
        if distributed:
            dist.all_reduce(self.fresh, op=dist.ReduceOp.SUM)
        self.mass += self.fresh
        self.fresh.zero_()


class MixedPredictor:
    """Turns network logits into the probabilities that are scored."""

    def __init__(self, args: type[Hyperparameters], device: torch.device):
        self.expert = NgramExpert(args.vocab_size, args.ngram_max_order, args.ngram_buckets, args.ngram_alpha, device)
        orders = len(self.expert.orders)
        self.interp = OnlineInterpolation(1 + orders, orders, args.mix_prior, device)

    def nll(self, logits: Tensor, tokens: Tensor, pos: Tensor, target: Tensor) -> Tensor:
        p_net = torch.softmax(logits, dim=-1)
        p_ngram, seen = self.expert.distributions(tokens, pos)
        stack = torch.cat((p_net.unsqueeze(1), p_ngram), dim=1)
        bins = self.interp.bins(p_net, seen)
        w = self.interp.weights(bins)
        mixed = (w.unsqueeze(2) * stack).sum(dim=1)  # not einsum: tf32 would round the weights
        nll = -mixed.gather(1, target[:, None]).squeeze(1).clamp_min(1e-30).log()
        at_target = stack.gather(2, target[:, None, None].expand(-1, stack.size(1), 1)).squeeze(2)
        self.interp.observe(bins, w, at_target)
        return nll

    def after_chunk(self, tokens: Tensor, lo: int, hi: int, distributed: bool) -> None:
        self.expert.absorb(tokens, lo, hi)
        self.interp.commit(distributed)


# -----------------------------
# EVALUATION
# -----------------------------
# Position p has input tokens[p] and target tokens[p + 1]; there are T = len(tokens) - 1 of them. A scored span (lo, hi)
# stands for positions lo..hi-1; its window ends at hi and is always full, so the last span just has more context.


def plan_spans(total: int, seq_len: int, stride: int) -> list[tuple[int, int]]:
    """Disjoint spans that cover 0..total: the first window whole, then `stride` at a time, the rest at the end."""
    if total < seq_len:
        raise ValueError(f"validation text of {total} positions is shorter than one window")
    spans = [(0, seq_len)]
    lo = seq_len
    while lo < total:
        hi = min(lo + stride, total)
        spans.append((lo, hi))
        lo = hi
    return spans


def my_share(items: list, rank: int, world_size: int) -> list:
    per = (len(items) + world_size - 1) // world_size
    return items[rank * per : (rank + 1) * per]


class Ledger:
    """Sums of one evaluation on this rank."""

    def __init__(self, counter: ByteCounter, device: torch.device):
        self.counter = counter
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.token_count = torch.zeros((), dtype=torch.float64, device=device)
        self.byte_count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, nll: Tensor, prev: Tensor, target: Tensor) -> None:
        self.loss_sum += nll.to(torch.float64).sum()
        self.token_count += float(target.numel())
        self.byte_count += self.counter.count(prev, target).to(torch.float64)

    def totals(self, distributed: bool) -> tuple[float, float, int]:
        """val_loss (nats per token), val_bpb, number of tokens scored over all ranks."""
        sums = torch.stack((self.loss_sum, self.token_count, self.byte_count))
        if distributed:
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        loss_sum, token_count, byte_count = (float(v) for v in sums)
        val_loss = loss_sum / token_count
        bits_per_token = val_loss / math.log(2.0)
        return val_loss, bits_per_token * token_count / byte_count, int(token_count)


def window_batch(tokens: Tensor, spans: list[tuple[int, int]], seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L) inputs, the mask of the scored positions, and the scored positions themselves in the mask's order."""
    ends = torch.tensor([hi for _, hi in spans], device=tokens.device)
    sizes = torch.tensor([hi - lo for lo, hi in spans], device=tokens.device)
    offsets = torch.arange(seq_len, device=tokens.device)
    pos = ends[:, None] - seq_len + offsets[None, :]
    mask = offsets[None, :] >= (seq_len - sizes)[:, None]
    return tokens[pos], mask, pos[mask]


def pad_batch(x: Tensor, rows: int) -> Tensor:
    """Repeats the last row up to `rows`, so that the compiled graph sees one shape. The extra rows are never read."""
    if x.size(0) == rows:
        return x
    return torch.cat((x, x[-1:].expand(rows - x.size(0), -1)))


@torch.no_grad()
def score_spans(
    logits_fn,
    tokens: Tensor,
    spans: list[tuple[int, int]],
    seq_len: int,
    batch_seqs: int,
    temperature: float,
    ledger: Ledger,
    mixer: MixedPredictor | None,
) -> None:
    for i in range(0, len(spans), batch_seqs):
        batch = spans[i : i + batch_seqs]
        x, mask, pos = window_batch(tokens, batch, seq_len)
        logits = logits_fn(pad_batch(x, batch_seqs))[: len(batch)][mask].float()
        logits = logits / temperature
        target = tokens[pos + 1]
        if mixer is None:
            nll = F.cross_entropy(logits, target, reduction="none")
        else:
            nll = mixer.nll(logits, tokens, pos, target)
        ledger.add(nll, tokens[pos], target)


def eval_windows(
    args: type[Hyperparameters],
    model: GPT,
    logits_fn,
    tokens: Tensor,
    counter: ByteCounter,
    stride: int,
    rank: int,
    world_size: int,
) -> tuple[float, float, int]:
    """Plain evaluation with fixed weights. stride = window length gives the usual chunked validation."""
    model.eval()
    spans = plan_spans(tokens.numel() - 1, args.eval_seq_len, stride)
    ledger = Ledger(counter, tokens.device)
    score_spans(
        logits_fn,
        tokens,
        my_share(spans, rank, world_size),
        args.eval_seq_len,
        args.eval_batch_seqs,
        args.eval_temperature,
        ledger,
        None,
    )
    model.train()
    return ledger.totals(world_size > 1)


# -----------------------------
# TEST-TIME TRAINING (score first)
# -----------------------------


class ChunkAdapter:
    """SGD on a chunk that has been scored. Embeddings and the first blocks stay as they are."""

    def __init__(self, args: type[Hyperparameters], model: GPT, num_chunks: int, rank: int, world_size: int):
        self.args = args
        self.model = model
        self.rank = rank
        self.world_size = world_size
        self.num_chunks = num_chunks
        frozen = set()
        for i in range(min(args.ttt_freeze_blocks, len(model.blocks))):
            frozen |= {id(p) for p in model.blocks[i].parameters()}
        frozen |= {id(p) for m in (model.tok_emb, model.bigram, model.value_embed) for p in m.parameters()}
        for p in model.parameters():
            p.requires_grad_(id(p) not in frozen)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.opt = torch.optim.SGD(self.params, lr=args.ttt_lr, momentum=args.ttt_momentum)

    def learning_rate(self, chunk: int) -> float:
        return self.args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * chunk / max(self.num_chunks - 1, 1)))

    def _sync_grads(self) -> None:
        if self.world_size == 1:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in self.params])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        flat /= self.world_size
        at = 0
        for p in self.params:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()

    def adapt(self, tokens: Tensor, lo: int, hi: int, chunk: int) -> float:
        """Trains on positions lo..hi-1. Returns the mean training loss of this rank, for the log."""
        seq_len = self.args.eval_seq_len
        num_seqs = (hi - lo) // seq_len
        per_rank = num_seqs // self.world_size
        if per_rank == 0:
            return 0.0
        for group in self.opt.param_groups:
            group["lr"] = self.learning_rate(chunk)
        first = lo + self.rank * per_rank * seq_len
        local = tokens[first : first + per_rank * seq_len + 1]
        x_all = local[:-1].view(per_rank, seq_len)
        y_all = local[1:].view(per_rank, seq_len)
        self.model.train()
        seen, total = 0, 0.0
        for _epoch in range(self.args.ttt_epochs):
            for i in range(0, per_rank, self.args.ttt_batch_seqs):
                x = x_all[i : i + self.args.ttt_batch_seqs]
                y = y_all[i : i + self.args.ttt_batch_seqs]
                self.opt.zero_grad(set_to_none=False)
                loss = self.model(x, y)
                loss.backward()
                self._sync_grads()
                torch.nn.utils.clip_grad_norm_(self.params, self.args.ttt_grad_clip)
                self.opt.step()
                total += float(loss.detach())
                seen += 1
        self.model.eval()
        return total / max(seen, 1)


def past_deadline(started: float, budget: float, device: torch.device, distributed: bool) -> bool:
    """The same answer on all ranks: the slowest clock decides."""
    spent = torch.tensor(time.perf_counter() - started, device=device)
    if distributed:
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent) > budget


def eval_ttt_ngram(
    args: type[Hyperparameters],
    model: GPT,
    logits_fn,
    tokens: Tensor,
    counter: ByteCounter,
    rank: int,
    world_size: int,
    eval_started: float,
    log,
) -> tuple[float, float, int]:
    """Sliding windows, chunk by chunk: score a chunk with what was learned from the chunks before it, then let the
    network and the n-gram tables learn from it."""
    device = tokens.device
    distributed = world_size > 1
    total = tokens.numel() - 1
    seq_len, stride, chunk_len = args.eval_seq_len, args.eval_stride, args.ttt_chunk
    if seq_len % stride or chunk_len % stride or chunk_len < seq_len:
        raise ValueError("windows, chunks and strides must nest")
    num_chunks = (total + chunk_len - 1) // chunk_len
    spans_of: list[list[tuple[int, int]]] = [[] for _ in range(num_chunks)]
    for lo, hi in plan_spans(total, seq_len, stride):
        spans_of[lo // chunk_len].append((lo, hi))

    ledger = Ledger(counter, device)
    mixer = MixedPredictor(args, device) if args.ngram_enabled else None
    adapter = ChunkAdapter(args, model, num_chunks, rank, world_size) if args.ttt_enabled else None
    # learning stops (scoring does not) when three quarters of the budget are gone
    stop_learning_at = 0.75 * args.eval_budget_seconds
    learning = True
    model.eval()
    for c in range(num_chunks):
        lo, hi = c * chunk_len, min((c + 1) * chunk_len, total)
        score_spans(
            logits_fn,
            tokens,
            my_share(spans_of[c], rank, world_size),
            seq_len,
            args.eval_batch_seqs,
            args.eval_temperature,
            ledger,
            mixer,
        )
        if c + 1 == num_chunks:
            break
        if mixer is not None:
            mixer.after_chunk(tokens, lo, hi, distributed)
        if learning and c % 16 == 0 and past_deadline(eval_started, stop_learning_at, device, distributed):
            learning = False
            log(f"ttt: learning stopped at chunk {c}/{num_chunks} for time")
        if adapter is not None and learning:
            train_loss = adapter.adapt(tokens, lo, hi, c)
            if c % 200 == 0:
                log(f"ttt: chunk {c}/{num_chunks} train_loss:{train_loss:.4f} lr:{adapter.learning_rate(c):.6f}")
    return ledger.totals(distributed)


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: type[Hyperparameters], model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    matrix, scalar, embed = [], [], []
    for name, p in model.named_parameters():
        if name.endswith(("tok_emb.weight", "table.weight", "embed.weight")):
            embed.append(p)
        elif p.ndim == 2 and not any(s in name for s in CONTROL_PATTERNS):
            matrix.append(p)
        else:
            scalar.append(p)
    betas = (args.beta1, args.beta2)
    adam_embed = torch.optim.AdamW(
        [{"params": embed, "lr": args.embed_lr, "base_lr": args.embed_lr}],
        betas=betas,
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    adam_scalar = torch.optim.AdamW(
        [{"params": scalar, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=betas,
        eps=args.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    muon = Muon(
        matrix,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_steps,
        weight_decay=args.muon_wd,
    )
    for group in muon.param_groups:
        group["base_lr"] = args.matrix_lr
    return [adam_embed, muon, adam_scalar], muon


def lr_scale(args: type[Hyperparameters], step: int, elapsed_ms: float, train_cap_ms: float) -> float:
    """Flat, then linear to zero over the time that warmdown_iters steps are expected to take."""
    if args.warmdown_iters <= 0:
        return 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(train_cap_ms - elapsed_ms, 0.0)
    by_time = remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0
    left = args.iterations - step
    by_steps = left / args.warmdown_iters if left <= args.warmdown_iters else 1.0
    return min(by_time, by_steps)


class Clock:
    """Wall clock of training in ms; validation is taken out of it."""

    def __init__(self) -> None:
        self.banked = 0.0
        self.t0 = 0.0

    def start(self) -> None:
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def read(self) -> float:
        return self.banked + 1000.0 * (time.perf_counter() - self.t0)

    def pause(self) -> float:
        torch.cuda.synchronize()
        self.banked = self.read()
        self.t0 = time.perf_counter()
        return self.banked


def train_model(
    args: type[Hyperparameters],
    base_model: GPT,
    model: nn.Module,
    logits_fn,
    val_tokens: Tensor,
    counter: ByteCounter,
    rank: int,
    world_size: int,
    device: torch.device,
    clock: Clock,
    log,
) -> WeightAverages:
    distributed = world_size > 1
    grad_accum_steps = max(8 // world_size, 1)
    grad_scale = 1.0 / grad_accum_steps
    optimizers, muon = build_optimizers(args, base_model)
    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def forward_backward() -> Tensor:
        train_loss = torch.zeros((), device=device)
        for micro in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro == grad_accum_steps - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            loss = model(x, y)
            train_loss += loss.detach()
            (loss * grad_scale).backward()
        return train_loss / grad_accum_steps

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # Warm-up: compiles the kernels on training batches, then everything is put back as it was.
    if args.warmup_steps > 0:
        initial = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
        initial_opt = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for w in range(args.warmup_steps):
            zero_grad_all()
            forward_backward()
            for opt in optimizers:
                opt.step()
        log(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")
        base_model.load_state_dict(initial, strict=True)
        for opt, state in zip(optimizers, initial_opt):
            opt.load_state_dict(state)
        zero_grad_all()
        if distributed:
            model.require_backward_grad_sync = True
        loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    averages = WeightAverages(base_model, args.ema_decay)
    train_cap_ms = 1000.0 * (args.max_wallclock_seconds - args.gptq_reserve_seconds)
    stop_after: int | None = None
    qat_on = False
    step = 0
    if distributed:
        dist.barrier()
    clock.start()
    while True:
        last = step == args.iterations or (stop_after is not None and step >= stop_after)
        if not last and args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0:
            spent = clock.pause()
            val_loss, val_bpb, _ = eval_windows(
                args, base_model, logits_fn, val_tokens, counter, args.eval_seq_len, rank, world_size
            )
            log(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{spent:.0f}ms step_avg:{spent / max(step, 1):.2f}ms"
            )
            clock.start()
        if last:
            break

        elapsed = clock.read()
        scale = lr_scale(args, step, elapsed, train_cap_ms)
        if not qat_on and step > 0 and scale < args.qat_below:
            set_qat(base_model, True)
            qat_on = True
            log(f"qat: on at step {step} (lr scale {scale:.3f})")
        zero_grad_all()
        train_loss = forward_backward()
        frac = min(step / args.muon_momentum_warmup, 1.0) if args.muon_momentum_warmup > 0 else 1.0
        for group in muon.param_groups:
            group["momentum"] = (1.0 - frac) * args.muon_momentum_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip)
        for opt in optimizers:
            opt.step()
        averages.after_step()
        if scale < args.swa_below and step % args.swa_every == 0:
            averages.snapshot()
        step += 1

        approx = clock.read()
        if step % args.train_log_every == 0 or step <= 5:
            log(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx:.0f}ms step_avg:{approx / step:.2f}ms"
            )
        reached = torch.tensor(int(approx >= train_cap_ms), device=device)
        if distributed:
            dist.all_reduce(reached, op=dist.ReduceOp.MAX)
        if stop_after is None and int(reached):
            stop_after = step
    set_qat(base_model, False)
    torch.cuda.synchronize()
    log(f"stopping: train_time:{clock.read():.0f}ms step:{step}/{args.iterations} swa_snapshots:{averages.swa_count}")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    return averages


def export_artifact(
    args: type[Hyperparameters],
    base_model: GPT,
    code: str,
    rank: int,
    world_size: int,
    device: torch.device,
    clock: Clock,
    log,
) -> None:
    """Self-generated calibration, GPTQ, pruning, lzma. Runs on training time: the clock is still ticking."""
    distributed = world_size > 1
    base_model.eval()
    began = clock.read()
    calib = generate_calibration(base_model, args, rank, device)
    hessians = collect_hessians(base_model, list(calib.split(4)), distributed)
    log(f"gptq: {world_size * calib.numel()} self-generated tokens, {clock.read() - began:.0f}ms")
    obj = quantize_model(base_model, hessians, args, rank, world_size)
    del hessians
    code_bytes = len(code.encode("utf-8"))
    blob, pruned = pack_to_fit(obj, args.size_limit - code_bytes, args, rank, world_size)
    if rank == 0:
        with open(args.artifact, "wb") as f:
            f.write(blob)
    if distributed:
        dist.barrier()
    spent = clock.read()
    log(f"prune: {100 * pruned:.1f}% of the +-1 entries")
    log(f"train+export time:{spent:.0f}ms")
    if spent > 1000.0 * args.max_wallclock_seconds:
        raise RuntimeError(f"export ended at {spent:.0f}ms: raise GPTQ_RESERVE_SECONDS")
    model_bytes = os.path.getsize(args.artifact)
    log(f"Serialized model int6+lzma: {model_bytes} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size: {model_bytes + code_bytes} bytes")
    if model_bytes + code_bytes > args.size_limit:
        raise RuntimeError("submission is too large")


def load_artifact(args: type[Hyperparameters], device: torch.device) -> GPT:
    with open(args.artifact, "rb") as f:
        obj = torch.load(io.BytesIO(lzma.decompress(f.read())), map_location="cpu", weights_only=True)
    model = GPT(args).to(device)
    weights = dequantize_model(obj, device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model


# -----------------------------
# MAIN
# -----------------------------


def make_logger(args: type[Hyperparameters], master: bool):
    path = Path("logs") / f"{args.run_id}.txt"
    if master:
        path.parent.mkdir(exist_ok=True)

    def log(message: str, console: bool = True) -> None:
        if not master:
            return
        if console:
            print(message, flush=True)
        with open(path, "a", encoding="utf-8") as f:
            print(message, file=f)

    return log


def log_environment(args: type[Hyperparameters], code: str, log) -> None:
    log(code, console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    log(smi, console=False)
    for key in sorted(k for k in vars(args) if not k.startswith("_")):
        log(f"{key}={getattr(args, key)}", console=False)
    log("=" * 100, console=False)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def evaluate_artifact(
    args: type[Hyperparameters],
    tokens: Tensor,
    counter: ByteCounter,
    rank: int,
    world_size: int,
    device: torch.device,
    log,
) -> None:
    """Everything here runs on the weights as they come out of the file, on the evaluation clock."""
    eval_started = time.perf_counter()
    model = load_artifact(args, device)
    logits_fn = torch.compile(model.forward_logits, dynamic=False)

    t = time.perf_counter()
    val_loss, val_bpb, _ = eval_windows(
        args, model, logits_fn, tokens, counter, args.eval_seq_len, rank, world_size
    )
    log(f"final_int6_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{1000 * (time.perf_counter() - t):.0f}ms")

    t = time.perf_counter()
    val_loss, val_bpb, _ = eval_windows(
        args, model, logits_fn, tokens, counter, args.eval_stride, rank, world_size
    )
    log(
        f"final_sliding_window val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} stride:{args.eval_stride} "
        f"eval_time:{1000 * (time.perf_counter() - t):.0f}ms"
    )

    t = time.perf_counter()
    val_loss, val_bpb, scored = eval_ttt_ngram(
        args, model, logits_fn, tokens, counter, rank, world_size, eval_started, log
    )
    torch.cuda.synchronize()
    log(
        f"legal_ttt_ngram val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} tokens:{scored} "
        f"eval_time:{1000 * (time.perf_counter() - t):.0f}ms"
    )
    log(f"legal_ttt_ngram_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    log(f"total eval time:{1000 * (time.perf_counter() - eval_started):.0f}ms")


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size <= 0 or 8 % world_size:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
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

    log = make_logger(args, master)
    log_environment(args, code, log)
    seed_everything(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match the tokenizer ({int(sp.vocab_size())})")
    counter = ByteCounter(sp, args.vocab_size, device)
    val_tokens = load_validation_tokens(args.val_files).to(device=device, dtype=torch.int64)
    log(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")
    log(f"train_loader:shards:{len(glob.glob(args.train_files))} pattern={args.train_files}")

    base_model = GPT(args).to(device)
    compiled = torch.compile(base_model, dynamic=False)
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False)
    model = DDP(compiled, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log(f"world_size:{world_size} grad_accum_steps:{max(8 // world_size, 1)} seed:{args.seed}")

    clock = Clock()
    averages = train_model(
        args, base_model, model, logits_fn, val_tokens, counter, rank, world_size, device, clock, log
    )
    averages.install(averages.blended(args.swa_share))
    log(f"averages: {1.0 - args.swa_share:.2f} EMA + {args.swa_share:.2f} SWA of {averages.swa_count} snapshots")
    export_artifact(args, base_model, code, rank, world_size, device, clock, log)

    # what is evaluated is the file, nothing of the trained model is left
    del averages, model, compiled, logits_fn, base_model
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    evaluate_artifact(args, val_tokens, counter, rank, world_size, device, log)
    if distributed:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
