"""
train_gpt.py for the 10-minute / 16 MB track. Grown out of the stock baseline, patch after patch:

  v02  11 layers, 3x relu^2 MLP, seq 2048
  v05  BigramHash embedding + SmearGate (masked at document starts)
  v08  partial rotary (16 of 64 dims), LN scale 1/sqrt(layer+1)
  v11  XSA on the last 4 layers, value embeddings on layers 9,10
  v13  SWA over the warmdown
  v16  GPTQ-lite: per-row clip search, error weighted by activation energy of train batches (inside the 600 s)
  v19  score ledger: one slot per validation target, filled once, reduced, then summed
  v22  causal unigram/bigram bias cache in logit space, one softmax over the whole vocabulary
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
    # Data paths are shard globs produced by the stock preprocessing.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation cadence while training (log only).
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20_000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    quant_reserve_seconds = float(os.environ.get("QUANT_RESERVE_SECONDS", 9.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    ve_layers = os.environ.get("VE_LAYERS", "9,10")
    ve_dim = int(os.environ.get("VE_DIM", 128))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Optimizer.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
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

    # Stochastic weight averaging over the end of the warmdown.
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    swa_start_frac = float(os.environ.get("SWA_START_FRAC", 0.2))
    swa_every = int(os.environ.get("SWA_EVERY", 50))

    # Quantisation and packing.
    quant_bits = int(os.environ.get("QUANT_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 24))
    calib_batch_tokens = int(os.environ.get("CALIB_BATCH_TOKENS", 32_768))
    size_limit = int(os.environ.get("SIZE_LIMIT", 16_000_000))

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_windows = int(os.environ.get("EVAL_BATCH_WINDOWS", 32))
    eval_chunk_tokens = int(os.environ.get("EVAL_CHUNK_TOKENS", 131_072))
    eval_temperature = float(os.environ.get("EVAL_TEMPERATURE", 1.0))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 600.0))

    # Bias cache.
    cache_enabled = bool(int(os.environ.get("CACHE_ENABLED", "1")))
    cache_uni_gain = float(os.environ.get("CACHE_UNI_GAIN", 0.15))
    cache_bi_gain = float(os.environ.get("CACHE_BI_GAIN", 0.20))
    cache_uni_prior = float(os.environ.get("CACHE_UNI_PRIOR", 20_000.0))
    cache_bi_prior = float(os.environ.get("CACHE_BI_PRIOR", 24.0))
    cache_trust = float(os.environ.get("CACHE_TRUST", 400.0))


# -----------------------------
# MUON
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
    # Orthogonalise a matrix update with a quintic Newton-Schulz iteration.
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
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
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
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()

            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)

            cursor = 0
            for p in params:
                g = flat[cursor : cursor + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["weight_decay"] > 0:
                    p.data.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                cursor += p.numel()

        return loss


# -----------------------------
# TOKENIZER BYTES
# -----------------------------


def build_sentencepiece_luts(
    sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of each piece without its mark, whether it begins with a space, whether it is a control piece."""
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
        if piece.startswith("\u2581"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


def target_bytes(luts: tuple[Tensor, Tensor, Tensor], prev_ids: Tensor, tgt_ids: Tensor) -> Tensor:
    """UTF-8 bytes that each target stands for; the space of a piece counts unless a document starts there."""
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    nbytes = base_bytes_lut[tgt_ids].to(torch.int32)
    nbytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.int32)
    return nbytes


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * np.dtype("<u2").itemsize
    if file.stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    """The whole validation stream, no truncation: every token but the first is a target."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation stream is too short")
    return tokens


class TokenStream:
    # Reads shards in order and wraps around forever.
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
    # Every call takes one contiguous span from the stream and slices a disjoint part per rank.
    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        local_tokens = max(local_tokens // seq_len, 1) * seq_len
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * self.world_size)
        start = self.rank * per_rank_span
        local = chunk[start : start + per_rank_span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# MODEL
# -----------------------------

CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear",
    "ve_scale",
    "bigram.scale",
)


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    # Weights stay fp32 for the optimizer, the matmul runs in the activation dtype.
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            small = param.ndim < 2 or any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS)
            if small and param.dtype != torch.float32:
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
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    # Partial rotary: only the first rope_dims dimensions of a head turn, the rest carry content.
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    x_rope = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((x_rope, x_pass), dim=-1)


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
        if dim % num_heads != 0 or num_heads % num_kv_heads != 0:
            raise ValueError("model_dim must divide by num_heads and num_heads by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = rope_dims
        self.use_xsa = use_xsa
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(rope_dims, base=rope_base)

    def _exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        # XSA: take away the part of the output that lies along the position's own value.
        B, H, T, D = y.shape
        groups = H // self.num_kv_heads
        yg = y.reshape(B, self.num_kv_heads, groups, T, D)
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        return (yg - (yg * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, H, T, D)

    def forward(self, x: Tensor, v_embed: Tensor | None = None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x)
        if v_embed is not None:
            v = v + v_embed
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
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
            y = self._exclude_self(y, v)
        return self.proj(y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class SmearGate(nn.Module):
    # Mixes a little of the previous position's embedding into each position, never across a document start.
    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate.to(dtype=x.dtype))[None, None, :]
        shifted = F.pad(x[:, :-1], (0, 0, 1, 0))
        keep = (input_ids != self.bos_id).to(x.dtype).unsqueeze(-1)
        return x + g * keep * (shifted - x)


class BigramHashEmbedding(nn.Module):
    # Hash of (previous id, id) into a small table: input features only, the target is never part of it.
    def __init__(self, buckets: int, bigram_dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = nn.Embedding(buckets, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bigram_hash(self, ids: Tensor) -> Tensor:
        mod = self.buckets - 1
        prev = F.pad(ids[:, :-1], (1, 0), value=0)
        hashed = torch.bitwise_xor(36313 * ids, 27191 * prev) % mod
        hashed[:, 0] = mod
        return hashed

    def forward(self, ids: Tensor) -> Tensor:
        h = self.proj(self.embed(self.bigram_hash(ids)))
        return h * self.scale.to(dtype=h.dtype)


class ValueEmbedding(nn.Module):
    # One small table of token values, shared by the layers that use it, each with a scale of its own.
    def __init__(self, vocab_size: int, ve_dim: int, kv_dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, ve_dim)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.proj = CastedLinear(ve_dim, kv_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.embed(ids))


class Block(nn.Module):
    def __init__(self, args: type[Hyperparameters], layer: int):
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
            use_xsa=layer >= args.num_layers - args.xsa_last_n,
        )
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale = 1.0 / math.sqrt(layer + 1) if args.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, v_embed: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_scale, v_embed)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        mlp_out = self.mlp(self.mlp_norm(x) * self.ln_scale)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        self.bigram = BigramHashEmbedding(args.bigram_buckets, args.bigram_dim, args.model_dim)
        self.smear = SmearGate(args.model_dim, args.bos_id)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.ve_layers = [int(s) for s in args.ve_layers.split(",") if s.strip()]
        kv_dim = args.num_kv_heads * (args.model_dim // args.num_heads)
        self.value_embed = ValueEmbedding(args.vocab_size, args.ve_dim, kv_dim) if self.ve_layers else None
        self.ve_scales = nn.ParameterList(
            [nn.Parameter(torch.full((1,), 0.1, dtype=torch.float32)) for _ in self.ve_layers]
        )
        self.final_norm = RMSNorm()
        # Unigram log frequencies of the training tokens; travels with the artifact, read by the bias cache.
        self.register_buffer("log_prior", torch.full((args.vocab_size,), -math.log(args.vocab_size)))
        self._init_weights()

    def _init_weights(self) -> None:
        depth = len(self.blocks)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)
            elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                nn.init.orthogonal_(module.weight, gain=1.0)
                if ".proj" in name:
                    with torch.no_grad():
                        module.weight.mul_(1.0 / math.sqrt(2 * depth))

    def _value_for(self, layer: int, ve: Tensor | None) -> Tensor | None:
        if ve is None or layer not in self.ve_layers:
            return None
        scale = self.ve_scales[self.ve_layers.index(layer)]
        return ve * scale.to(dtype=ve.dtype)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, input_ids)
        x0 = x
        ve = self.value_embed(input_ids) if self.value_embed is not None else None
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0, self._value_for(i, ve))
            skips.append(x)
        for i in range(self.num_decoder_layers):
            layer = self.num_encoder_layers + i
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[layer](x, x0, self._value_for(layer, ve))
        return self.final_norm(x)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        logits = F.linear(self.hidden(input_ids), self.tok_emb.weight)
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# QUANTISATION (GPTQ-lite)
# -----------------------------

CLIP_FRACTIONS = (0.9985, 0.9993, 0.9997, 0.9999, 1.0)
KEEP_FLOAT_MAX_NUMEL = 8192


@torch.no_grad()
def collect_activation_energy(
    args: type[Hyperparameters], model: GPT, pattern: str, rank: int, world_size: int, device: torch.device
) -> dict[str, Tensor]:
    """Mean square of every input feature of every linear layer (the diagonal of GPTQ's Hessian), over `pattern`."""
    energy: dict[str, Tensor] = {}
    handles = []

    def hook_for(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            total = x.square().sum(dim=0)
            energy[name] = energy[name] + total if name in energy else total

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            handles.append(module.register_forward_hook(hook_for(name + ".weight")))
    loader = DistributedTokenLoader(pattern, rank, world_size, device)
    model.eval()
    for _ in range(args.calib_batches):
        x, _ = loader.next_batch(args.calib_batch_tokens * world_size, args.train_seq_len, 1)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.forward_logits(x)
    for handle in handles:
        handle.remove()
    for name in sorted(energy):
        if world_size > 1:
            dist.all_reduce(energy[name], op=dist.ReduceOp.SUM)
        energy[name] = energy[name] / energy[name].mean().clamp_min(1e-12)
    model.train()
    return energy


def quantize_rows(weight: Tensor, bits: int, energy: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each row takes the clip, of a handful, that leaves the least (activation-weighted) squared error."""
    w = weight.detach().float()
    qmax = 2 ** (bits - 1) - 1
    importance = torch.ones(w.size(1), device=w.device) if energy is None else energy.to(w.device)
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best_q = torch.zeros_like(w, dtype=torch.int8)
    best_s = torch.ones(w.size(0), device=w.device, dtype=torch.float16)
    for fraction in CLIP_FRACTIONS:
        clip = torch.quantile(w.abs(), fraction, dim=1) if fraction < 1.0 else w.abs().amax(dim=1)
        scale = (clip / qmax).clamp_min(1e-7).to(torch.float16)
        s = scale.float().clamp_min(1e-7)[:, None]
        q = torch.clamp(torch.round(w / s), -qmax, qmax)
        err = ((q * s - w).square() * importance[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_q = torch.where(better[:, None], q.to(torch.int8), best_q)
        best_s = torch.where(better, scale, best_s)
    return best_q.contiguous(), best_s.contiguous()


def quantize_state_dict(
    args: type[Hyperparameters], state_dict: dict[str, Tensor], energy: dict[str, Tensor]
) -> dict[str, object]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    passthrough: dict[str, Tensor] = {}
    for name, t in state_dict.items():
        t = t.detach()
        if not t.is_floating_point():
            passthrough[name] = t.cpu().contiguous()
            continue
        if t.ndim != 2 or t.numel() <= KEEP_FLOAT_MAX_NUMEL or any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS):
            if not torch.isfinite(t).all():
                raise ValueError(f"{name} is not finite")
            passthrough[name] = t.to(torch.float16).cpu().contiguous()
            continue
        bits = args.embed_bits if "emb" in name else args.quant_bits
        q, s = quantize_rows(t, bits, energy.get(name))
        quantized[name] = q.cpu()
        scales[name] = s.cpu()
    return {"format": "int_per_row_v3", "quantized": quantized, "scales": scales, "passthrough": passthrough}


def dequantize_state_dict(obj: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        out[name] = q.float() * obj["scales"][name].float()[:, None]
    for name, t in obj["passthrough"].items():
        out[name] = t.float() if t.is_floating_point() else t
    return out


def pack_artifact(obj: dict[str, object], path: str) -> int:
    buf = io.BytesIO()
    torch.save(obj, buf)
    blob = lzma.compress(buf.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    with open(path, "wb") as f:
        f.write(blob)
    return os.path.getsize(path)


def unpack_artifact(path: str) -> dict[str, Tensor]:
    with open(path, "rb") as f:
        raw = lzma.decompress(f.read())
    obj = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return dequantize_state_dict(obj)


# -----------------------------
# AVERAGING
# -----------------------------


class WeightAverage:
    # Plain running mean of the weights, in fp32, over snapshots of the warmdown.
    def __init__(self) -> None:
        self.sum: dict[str, Tensor] | None = None
        self.count = 0

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        state = model.state_dict()
        if self.sum is None:
            self.sum = {name: t.detach().float().clone() for name, t in state.items()}
        else:
            for name, t in state.items():
                self.sum[name].add_(t.detach().float())
        self.count += 1

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        if self.sum is None:
            return
        state = model.state_dict()
        model.load_state_dict({name: (t / self.count).to(state[name].dtype) for name, t in self.sum.items()})


# -----------------------------
# BIAS CACHE
# -----------------------------


class BiasCache:
    """Unigram and bigram log-odds of the text scored so far, added to the logits before the softmax.

    The counts hold whole chunks that every rank has finished scoring or will finish with the same state; within a
    chunk nothing moves. The sum over the vocabulary stays one because log_softmax runs after the bias.
    """

    def __init__(self, args: type[Hyperparameters], log_prior: Tensor, device: torch.device):
        self.args = args
        self.V = args.vocab_size
        self.log_prior = log_prior.to(device).float()
        self.uni = torch.zeros(self.V, device=device, dtype=torch.float32)
        self.big = torch.zeros(self.V, self.V, device=device, dtype=torch.float32)
        self.rebuild()

    def rebuild(self) -> None:
        k_uni, k_bi = self.args.cache_uni_prior, self.args.cache_bi_prior
        uni_p = (self.uni + k_uni * self.log_prior.softmax(dim=0)) / (self.uni.sum() + k_uni)
        rows = self.big.sum(dim=1)
        big_p = (self.big + k_bi * uni_p[None, :]) / (rows[:, None] + k_bi)
        self.uni_bias = uni_p.log() - self.log_prior.log_softmax(dim=0)
        self.big_bias = big_p.log() - uni_p.log()[None, :]
        self.trust = rows / (rows + self.args.cache_trust)

    def bias(self, prev_ids: Tensor) -> Tensor:
        out = self.args.cache_uni_gain * self.uni_bias[None, :]
        weight = self.args.cache_bi_gain * self.trust[prev_ids]
        return out + weight[:, None] * self.big_bias[prev_ids]

    def log_probs(self, logits: Tensor, prev_ids: Tensor) -> Tensor:
        logits = logits.float() / self.args.eval_temperature
        if self.args.cache_enabled:
            logits = logits + self.bias(prev_ids)
        return F.log_softmax(logits, dim=-1)

    def absorb(self, prev_ids: Tensor, tgt_ids: Tensor) -> None:
        self.uni += torch.bincount(tgt_ids, minlength=self.V).float()
        pairs = torch.bincount(prev_ids * self.V + tgt_ids, minlength=self.V * self.V)
        self.big += pairs.reshape(self.V, self.V).float()
        self.rebuild()


# -----------------------------
# SCORE LEDGER
# -----------------------------


class ScoreLedger:
    """One loss per validation target. A target is entered once, by one rank; anything else is an error."""

    def __init__(self, num_targets: int, device: torch.device):
        self.nll = torch.zeros(num_targets, device=device, dtype=torch.float32)
        self.hits = torch.zeros(num_targets, device=device, dtype=torch.uint8)

    def enter(self, where: Tensor, nll: Tensor) -> None:
        if bool((self.hits[where] != 0).any()):
            raise RuntimeError("score ledger: a target was scored before")
        self.nll[where] = nll.to(torch.float32)
        self.hits[where] += 1

    def close(self, world_size: int) -> None:
        if world_size > 1:
            dist.all_reduce(self.nll, op=dist.ReduceOp.SUM)
            dist.all_reduce(self.hits, op=dist.ReduceOp.SUM)
        if int(self.hits.min()) != 1 or int(self.hits.max()) != 1:
            raise RuntimeError("score ledger: not every target has exactly one entry")

    def totals(self, nbytes: Tensor) -> tuple[float, float]:
        """Mean loss in nats per token, and bits per byte."""
        nats = self.nll.to(torch.float64).sum()
        byte_count = nbytes.to(torch.float64).sum()
        val_loss = nats / self.hits.to(torch.float64).sum()
        val_bpb = nats / math.log(2.0) / byte_count
        return float(val_loss.item()), float(val_bpb.item())


# -----------------------------
# EVALUATION
# -----------------------------


def count_stream_bytes(luts: tuple[Tensor, Tensor, Tensor], val_tokens: Tensor) -> Tensor:
    """Bytes of every target of the stream, in pieces to keep the index tensors small."""
    parts = []
    total = val_tokens.numel() - 1
    for lo in range(0, total, 1 << 22):
        hi = min(lo + (1 << 22), total)
        span = val_tokens[lo : hi + 1].to(torch.int64)
        parts.append(target_bytes(luts, span[:-1], span[1:]).to(torch.int16))
    return torch.cat(parts)


def check_bytes_against_text(
    sp: spm.SentencePieceProcessor, args: type[Hyperparameters], val_tokens: Tensor, nbytes: Tensor, docs: int = 64
) -> int:
    """Largest gap, over the first documents, between the tables' bytes and the decoded text's (0 is expected)."""
    head = val_tokens[: 1 << 18].tolist()
    starts = [i for i, t in enumerate(head) if t == args.bos_id]
    worst = 0
    for a, b in zip(starts[:docs], starts[1 : docs + 1]):
        text = sp.decode(head[a + 1 : b])
        counted = int(nbytes[a : b - 1].to(torch.int64).sum())
        worst = max(worst, abs(len(text.encode("utf-8")) - counted))
    return worst


def eval_val(
    args: type[Hyperparameters],
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    nbytes: Tensor,
) -> tuple[float, float]:
    """Quick look with disjoint sequences and no cache, for the log only. Drops the incomplete last sequence."""
    seq_len = args.train_seq_len
    num_seqs = (val_tokens.numel() - 1) // seq_len
    batch_seqs = max(args.val_batch_size // (world_size * seq_len), 1)
    seq_lo = num_seqs * rank // world_size
    seq_hi = num_seqs * (rank + 1) // world_size
    stats = torch.zeros(3, device=device, dtype=torch.float64)
    model.eval()
    with torch.inference_mode():
        for i in range(seq_lo, seq_hi, batch_seqs):
            j = min(i + batch_seqs, seq_hi)
            span = val_tokens[i * seq_len : j * seq_len + 1].to(torch.int64)
            x = span[:-1].reshape(-1, seq_len)
            y = span[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            stats[0] += loss.to(torch.float64) * y.numel()
            stats[1] += y.numel()
            stats[2] += nbytes[i * seq_len : j * seq_len].to(torch.float64).sum()
    if world_size > 1:
        dist.all_reduce(stats, op=dist.ReduceOp.SUM)
    model.train()
    return float(stats[0] / stats[1]), float(stats[0] / math.log(2.0) / stats[2])


def plan_windows(lo: int, hi: int, stride: int, seq_len: int) -> list[tuple[int, int, int]]:
    """Windows (begin, first scored, end) over targets [lo, hi): disjoint scored spans, up to seq_len of context."""
    plan = []
    for first in range(lo, hi, stride):
        end = min(first + stride, hi)
        plan.append((max(0, end - seq_len), first, end))
    return plan


def gather_windows(
    windows: list[tuple[int, int, int]], val_tokens: Tensor, seq_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (right-padded), the flat rows of the logits to read, and the targets' places in the stream."""
    device = val_tokens.device
    x = torch.zeros(len(windows), seq_len, dtype=torch.int64, device=device)
    rows, where = [], []
    for b, (begin, first, end) in enumerate(windows):
        x[b, : end - begin] = val_tokens[begin:end].to(torch.int64)
        rows.append(torch.arange(first - begin, end - begin, device=device) + b * seq_len)
        where.append(torch.arange(first, end, device=device))
    return x, torch.cat(rows), torch.cat(where)


def eval_sliding(
    args: type[Hyperparameters],
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    ledger: ScoreLedger,
    cache: BiasCache,
    log,
) -> None:
    """Sliding window, chunk by chunk. The cache takes a chunk in only when its losses stand in the ledger."""
    seq_len, stride = args.eval_seq_len, args.eval_stride
    total = val_tokens.numel() - 1
    model.eval()
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    with torch.inference_mode():
        for c, lo in enumerate(range(0, total, args.eval_chunk_tokens)):
            hi = min(lo + args.eval_chunk_tokens, total)
            mine = plan_windows(lo, hi, stride, seq_len)[rank::world_size]
            for i in range(0, len(mine), args.eval_batch_windows):
                batch = mine[i : i + args.eval_batch_windows]
                x, rows, where = gather_windows(batch, val_tokens, seq_len)
                if x.size(0) < args.eval_batch_windows:
                    x = F.pad(x, (0, 0, 0, args.eval_batch_windows - x.size(0)))
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = logits_fn(x)
                picked = logits.reshape(-1, logits.size(-1))[rows]
                prev_ids = val_tokens[where].to(torch.int64)
                tgt_ids = val_tokens[where + 1].to(torch.int64)
                logp = cache.log_probs(picked, prev_ids)
                nll = -logp.gather(1, tgt_ids[:, None]).squeeze(1)
                ledger.enter(where, nll)
            if args.cache_enabled:
                chunk = val_tokens[lo : hi + 1].to(torch.int64)
                cache.absorb(chunk[:-1], chunk[1:])
            if c % 100 == 0:
                log(f"eval chunk:{c} targets:{hi}/{total}")


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: type[Hyperparameters], model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    matrix_params: list[nn.Parameter] = []
    scalar_params: list[nn.Parameter] = []
    for name, p in model.blocks.named_parameters():
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            matrix_params.append(p)
        else:
            scalar_params.append(p)
    scalar_params.append(model.skip_weights)
    scalar_params.append(model.smear.gate)
    scalar_params.append(model.bigram.scale)
    scalar_params.extend(model.ve_scales)
    embed_params: list[nn.Parameter] = [model.tok_emb.weight, model.bigram.embed.weight]
    matrix_params.append(model.bigram.proj.weight)
    if model.value_embed is not None:
        embed_params.append(model.value_embed.embed.weight)
        matrix_params.append(model.value_embed.proj.weight)

    optimizer_embed = torch.optim.AdamW(
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
    return [optimizer_embed, optimizer_muon, optimizer_scalar], optimizer_muon


def lr_scale(args: type[Hyperparameters], step: int, elapsed_ms: float, cap_ms: float | None) -> float:
    """1, then linearly to 0 over the warmdown, which is measured in time where there is a cap."""
    if args.warmdown_iters <= 0:
        return 1.0
    if cap_ms is None:
        start = max(args.iterations - args.warmdown_iters, 0)
        if start <= step < args.iterations:
            return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
        return 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(cap_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters

    # -----------------------------
    # DISTRIBUTED + CUDA SETUP
    # -----------------------------

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so that grad_accum_steps stays integral")
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

    def log0(msg: str, console: bool = True) -> None:
        if not master_process:
            return
        if console:
            print(msg)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0(f"Running Python {sys.version}")
    log0(f"Running PyTorch {torch.__version__}")
    log0(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout, console=False)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    # -----------------------------
    # TOKENIZER + VALIDATION STREAM
    # -----------------------------

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer {int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(args.val_files).to(torch.int32).to(device)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    nbytes = count_stream_bytes(luts, val_tokens)
    byte_gap = check_bytes_against_text(sp, args, val_tokens, nbytes)
    log0(f"val_loader:pattern={args.val_files} tokens:{val_tokens.numel()} bytes:{int(nbytes.to(torch.int64).sum())}")
    log0(f"byte_check: largest gap to the decoded text {byte_gap}")

    # -----------------------------
    # MODEL + OPTIMIZERS
    # -----------------------------

    base_model = GPT(args).to(device)
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )
    optimizers, optimizer_muon = build_optimizers(args, base_model)
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params} world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    token_counts = torch.zeros(args.vocab_size, device=device, dtype=torch.float64)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None
    # Training stops early enough for the calibration to fall inside the 600 s.
    train_cap_ms = max_wallclock_ms - 1000.0 * args.quant_reserve_seconds if max_wallclock_ms is not None else None

    def train_step(lr_mul: float, step: int) -> Tensor:
        zero_grad_all()
        train_loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            token_counts.add_(torch.bincount(y.reshape(-1), minlength=args.vocab_size))
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss * grad_scale).backward()
        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        for group in optimizer_muon.param_groups:
            group["momentum"] = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_mul
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        zero_grad_all()
        return train_loss / grad_accum_steps

    # Warm-up primes the compiled kernels; weights, optimizer states and the data position are put back after it.
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            train_step(1.0, 0)
        log0(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        token_counts.zero_()
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    swa = WeightAverage()
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        if not last_step and args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, compiled_model, rank, world_size, device, val_tokens, nbytes)
            log0(f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            if stop_after_step is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, train_cap_ms)
        train_loss = train_step(scale, step)
        step += 1

        if args.swa_enabled and scale < args.swa_start_frac and step % args.swa_every == 0:
            swa.add(base_model)

        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} train_time:{approx_ms:.0f}ms")

        # All ranks must agree on the step at which the cap is reached.
        reached_cap = train_cap_ms is not None and approx_ms >= train_cap_ms
        if distributed and train_cap_ms is not None:
            flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    if swa.count > 0:
        swa.apply(base_model)
        log0(f"swa:averaged {swa.count} snapshots")
    if distributed:
        dist.all_reduce(token_counts, op=dist.ReduceOp.SUM)
    smoothed = token_counts + 0.5
    base_model.log_prior.copy_((smoothed / smoothed.sum()).log().float())

    # Calibration reads train shards and belongs to the training time.
    energy = collect_activation_energy(args, base_model, args.train_files, rank, world_size, device)
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"train+calibration time:{training_time_ms:.0f}ms")
    if max_wallclock_ms is not None and training_time_ms > max_wallclock_ms:
        raise RuntimeError("training and calibration took longer than the wall-clock cap")
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # PACK + SIZE
    # -----------------------------

    artifact_path = "final_model.int6.ptz"
    if master_process:
        quant_obj = quantize_state_dict(args, base_model.state_dict(), energy)
        model_bytes = pack_artifact(quant_obj, artifact_path)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        log0(f"Serialized model int6+lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > args.size_limit:
            raise RuntimeError(f"submission is {total_bytes - args.size_limit} bytes over the limit")
    if distributed:
        dist.barrier()

    # -----------------------------
    # READ BACK + EVALUATE
    # -----------------------------

    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    base_model.load_state_dict(unpack_artifact(artifact_path), strict=True)

    q_loss, q_bpb = eval_val(args, compiled_model, rank, world_size, device, val_tokens, nbytes)
    log0(f"final_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} (disjoint sequences, no cache; log only)")

    ledger = ScoreLedger(val_tokens.numel() - 1, device)
    cache = BiasCache(args, base_model.log_prior, device)
    eval_sliding(args, base_model, rank, world_size, device, val_tokens, ledger, cache, log0)
    ledger.close(world_size)
    val_loss, val_bpb = ledger.totals(nbytes)
    torch.cuda.synchronize()
    eval_seconds = time.perf_counter() - t_eval
    if eval_seconds > args.eval_budget_seconds:
        raise RuntimeError(f"evaluation took {eval_seconds:.1f} s")
    log0(f"final_sliding_cache val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{1000 * eval_seconds:.0f}ms")
    log0(f"final_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} stride:{args.eval_stride}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
