"""
train_gpt.py: 11L x 512 GPT on sp1024, int6 GPTQ, EMA, and at evaluation a sliding window with score-first TTT plus an
online n-gram tilt.

The tilt in one line: a causal n-gram bank proposes one token h_t from x_<t, and the model's distribution becomes
    p'(a) = p(a) * exp(beta_t * [a == h_t]) / Z_t,    Z_t = 1 + p(h_t) * (exp(beta_t) - 1)
which sums to one over the vocabulary for whatever h_t and beta_t, as long as neither looks at x_t.

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
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
    import zstandard
except ImportError:
    zstandard = None

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

    # Validation cadence (logged only) and training length.
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    # One clock for everything that reads training data: steps until cap - reserve, GPTQ in the reserve.
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 30.0))

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
    bigram_vocab_size = int(os.environ.get("BIGRAM_VOCAB_SIZE", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

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

    # Averaging and quantisation.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    late_qat_threshold = float(os.environ.get("LATE_QAT_THRESHOLD", 0.15))
    gptq_calib_batches = int(os.environ.get("GPTQ_CALIB_BATCHES", 64))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    gptq_percdamp = float(os.environ.get("GPTQ_PERCDAMP", 0.01))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit = 16_000_000

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    max_eval_seconds = float(os.environ.get("MAX_EVAL_SECONDS", 600.0))
    logit_temperature = float(os.environ.get("LOGIT_TEMPERATURE", 1.0))

    # Score-first TTT.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 4))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))

    # Online n-gram tilt. Gain, bias and floor were fitted once on a held-back train shard.
    tilt_enabled = bool(int(os.environ.get("TILT_ENABLED", "1")))
    tilt_orders = tuple(int(n) for n in os.environ.get("TILT_ORDERS", "4,5,6,8,10,12,16").split(","))
    tilt_table_bits = int(os.environ.get("TILT_TABLE_BITS", 22))
    tilt_block = int(os.environ.get("TILT_BLOCK", 16384))
    tilt_gain = float(os.environ.get("TILT_GAIN", 0.65))
    tilt_bias = float(os.environ.get("TILT_BIAS", 0.2))
    tilt_floor = float(os.environ.get("TILT_FLOOR", 0.35))
    tilt_beta_max = float(os.environ.get("TILT_BETA_MAX", 3.5))


CONTROL_TENSOR_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "bigram.scale")

# -----------------------------
# MUON OPTIMIZER
# -----------------------------
#
# As borrowed from modded-nanogpt, https://kellerjordan.github.io/posts/muon/


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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay),
        )

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
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
                    g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["weight_decay"] > 0:
                    p.data.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                curr += p.numel()


# -----------------------------
# TOKENIZER BYTE TABLES
# -----------------------------
#
# BPB = (nats / ln 2) / bytes. A piece's bytes are those of its text without the word mark; the mark is one space byte
# and counts only if something that ends in text stands before it. Byte-fallback pieces are one byte each.


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


def token_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    nbytes = base_bytes_lut[tgt_ids].to(torch.float64)
    nbytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.float64)
    return nbytes


# -----------------------------
# DATA LOADING
# -----------------------------

SHARD_HEADER_INTS = 256
SHARD_MAGIC = 20240520


def load_data_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    header_bytes = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
    if file.stat().st_size != header_bytes + num_tokens * np.dtype("<u2").itemsize:
        raise ValueError(f"Shard size mismatch for {file}")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The whole fixed split: nothing is trimmed, the last window is simply shorter.
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


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
    # Each call takes one contiguous span for all ranks and slices this rank's disjoint part of it.
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
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    # Keep weights in fp32 for optimizer/state quality, cast at matmul time for bf16 compute.
    # From late in the warmdown on, the forward pass sees int6-rounded weights (straight-through).
    _qat_enabled: bool = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if CastedLinear._qat_enabled and self.training and w.ndim == 2:
            with torch.no_grad():
                w32 = w.float()
                scale = (w32.abs().amax(dim=1, keepdim=True) / 31.0).clamp_min(1.0 / 31.0e4)
                w_q = torch.clamp(torch.round(w32 / scale), -32, 31) * scale
            w = w + (w_q - w).detach()
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            control = any(pattern in name for pattern in CONTROL_TENSOR_NAMES)
            if (param.ndim < 2 or control) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Rotates the first rope_dims of every head, the rest carries no position.
    def __init__(self, rope_dims: int, base: float):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
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
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    rotated = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((rotated, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, use_xsa: bool):
        super().__init__()
        dim = args.model_dim
        if dim % args.num_heads != 0 or args.num_heads % args.num_kv_heads != 0:
            raise ValueError("model_dim, num_heads and num_kv_heads do not fit")
        self.num_heads = args.num_heads
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = dim // args.num_heads
        self.rope_dims = args.rope_dims
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), args.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(args.rope_dims, args.rope_base)

    def _remove_self_value(self, y: Tensor, v: Tensor) -> Tensor:
        # Exclusive self attention: take out of each head's output its part along the position's own value.
        bsz, heads, seqlen, hd = y.shape
        group = heads // v.size(1)
        y_g = y.reshape(bsz, v.size(1), group, seqlen, hd)
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        y_g = y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return y_g.reshape(bsz, heads, seqlen, hd)

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
            y = self._remove_self_value(y, v)
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


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


class BigramHashEmbedding(nn.Module):
    # A hashed embedding of (previous token, this token), added to the token embedding.
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
        out = torch.full_like(t, mod)
        out[..., 1:] = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % mod
        return out.long()

    def forward(self, token_ids: Tensor) -> Tensor:
        h = self.proj(self.embed(self.bigram_hash(token_ids)))
        return h * self.scale.to(dtype=h.dtype)


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(args, use_xsa=layer_idx >= args.num_layers - args.xsa_last_n)
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
        mlp_out = self.mlp(self.mlp_norm(x) * self.ln_scale)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramHashEmbedding(args.bigram_vocab_size, args.bigram_dim, args.model_dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        num_skip = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(num_skip, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights(args.tied_embed_init_std)

    def _init_weights(self, embed_std: float) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=embed_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
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
        logits = F.linear(self.hidden(input_ids), self.tok_emb.weight.to(torch.bfloat16))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1))


# -----------------------------
# QUANTISATION (GPTQ int6, int8 embeddings)
# -----------------------------


def is_gptq_matrix(name: str, tensor: Tensor) -> bool:
    return name.startswith("blocks.") and tensor.ndim == 2 and name.endswith(".weight")


def collect_hessians(
    model: nn.Module, loader: DistributedTokenLoader, args: Hyperparameters, device: torch.device
) -> dict[str, Tensor]:
    # H = X^T X of every block matrix's inputs, over training batches; the ranks' sums are added up.
    hessians: dict[str, Tensor] = {}
    hooks = []

    def make_hook(key: str):
        def hook(module, inputs, output):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            hessians[key].addmm_(x.t(), x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and name.startswith("blocks."):
            key = name + ".weight"
            hessians[key] = torch.zeros(module.in_features, module.in_features, device=device)
            hooks.append(module.register_forward_hook(make_hook(key)))
    was_training = model.training
    model.eval()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(max(1, args.gptq_calib_batches // world_size)):
            x, _ = loader.next_batch(world_size * 8 * args.train_seq_len, args.train_seq_len, 1)
            model.forward_logits(x)
    for h in hooks:
        h.remove()
    if dist.is_initialized():
        for key in sorted(hessians):
            dist.all_reduce(hessians[key], op=dist.ReduceOp.SUM)
    model.train(was_training)
    return hessians


def best_row_scales(w: Tensor, qmax: int) -> Tensor:
    # Per row: the clip percentile with the least squared rounding error.
    best_scale = torch.zeros(w.size(0), device=w.device)
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    for pct in (0.9990, 0.9995, 0.9999, 0.99999, 1.0):
        clip = w.abs().amax(dim=1) if pct == 1.0 else torch.quantile(w.abs(), pct, dim=1)
        scale = (clip / qmax).clamp_min(1e-8)
        q = torch.clamp(torch.round(w / scale[:, None]), -qmax - 1, qmax)
        err = (w - q * scale[:, None]).square().sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def gptq_quantize(weight: Tensor, hessian: Tensor, args: Hyperparameters, qmax: int = 31) -> tuple[Tensor, Tensor]:
    W = weight.detach().float().clone()
    rows, cols = W.shape
    H = hessian.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    H.diagonal().add_(args.gptq_percdamp * torch.diag(H).mean())
    perm = torch.argsort(torch.diag(H), descending=True)
    inv_perm = torch.argsort(perm)
    W = W[:, perm]
    H = H[perm][:, perm]
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    scale = best_row_scales(W, qmax).half().float().clamp_min(1e-7)
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W.device)
    for i1 in range(0, cols, args.gptq_block_size):
        i2 = min(i1 + args.gptq_block_size, cols)
        W1 = W[:, i1:i2].clone()
        Err1 = torch.zeros_like(W1)
        Hinv1 = Hinv[i1:i2, i1:i2]
        for i in range(i2 - i1):
            w = W1[:, i]
            q = torch.clamp(torch.round(w / scale), -qmax - 1, qmax)
            Q[:, i1 + i] = q.to(torch.int8)
            err = (w - q * scale) / Hinv1[i, i]
            W1[:, i:] -= err[:, None] * Hinv1[i, i:][None, :]
            Err1[:, i] = err
        if i2 < cols:
            W[:, i2:] -= Err1 @ Hinv[i1:i2, i2:]
    return Q[:, inv_perm].contiguous(), scale.half()


def quantize_rows_int8(t: Tensor) -> tuple[Tensor, Tensor]:
    t32 = t.detach().float()
    scale = (t32.abs().amax(dim=1) / 127.0).clamp_min(1e-8).half().float().clamp_min(1e-7)
    q = torch.clamp(torch.round(t32 / scale[:, None]), -127, 127).to(torch.int8)
    return q.contiguous(), scale.half()


def quantize_state_dict(state: dict[str, Tensor], hessians: dict[str, Tensor], args: Hyperparameters) -> dict:
    packed: dict[str, object] = {"q": {}, "s": {}, "raw": {}}
    for name, tensor in state.items():
        if is_gptq_matrix(name, tensor):
            q, s = gptq_quantize(tensor, hessians[name], args)
        elif tensor.ndim == 2 and tensor.numel() > 65536:
            q, s = quantize_rows_int8(tensor)
        else:
            control = any(pattern in name for pattern in CONTROL_TENSOR_NAMES)
            packed["raw"][name] = tensor.detach().cpu().float() if control else tensor.detach().cpu().half()
            continue
        packed["q"][name] = q.cpu()
        packed["s"][name] = s.cpu()
    return packed


def dequantize_state_dict(packed: dict) -> dict[str, Tensor]:
    state = {name: t.float() for name, t in packed["raw"].items()}
    for name, q in packed["q"].items():
        state[name] = q.float() * packed["s"][name].float()[:, None]
    return state


def compress_blob(raw: bytes) -> bytes:
    if zstandard is not None:
        return b"Z" + zstandard.ZstdCompressor(level=22).compress(raw)
    return b"L" + lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def decompress_blob(blob: bytes) -> bytes:
    if blob[:1] == b"Z":
        return zstandard.ZstdDecompressor().decompress(blob[1:])
    return lzma.decompress(blob[1:])


# -----------------------------
# ONLINE N-GRAM TILT
# -----------------------------
#
# A bank of hashed experts runs left to right over the validation stream, ahead of the scorer. For position t each expert
# looks up its context (tokens before t only) and may propose one token. All tables are read for a block of positions
# first and updated with the block's tokens afterwards, so the proposal for t rests on tokens < t, and mostly older ones.
# How far to tilt (beta) is decided by how often the same expert was right at the same count earlier in the stream.

HASH_P = 0x9E3779B97F4A7C15
LOOKBACK = 64
COUNT_MAX = 255
COUNT_BUCKETS = 8
U64 = (1 << 64) - 1


def hash_powers(n: int, base: int) -> np.ndarray:
    powers, value = [], 1
    for _ in range(n):
        powers.append(value)
        value = (value * base) & U64
    return np.array(powers, dtype=np.uint64)


def finish_hash(h: np.ndarray, salt: int) -> np.ndarray:
    h = h + np.uint64((salt * 0xD6E8FEB86659FD93) & U64)
    h = (h ^ (h >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


class ExpertTable:
    # One slot per hashed context: a 16-bit tag against collisions, a candidate token and a majority-vote count.
    def __init__(self, bits: int):
        size = 1 << bits
        self.mask = np.uint64(size - 1)
        self.tag = np.zeros(size, dtype=np.uint16)
        self.tok = np.zeros(size, dtype=np.uint16)
        self.cnt = np.zeros(size, dtype=np.int16)

    def locate(self, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (h & self.mask).astype(np.int64), (h >> np.uint64(48)).astype(np.uint16)

    def lookup(self, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slot, tag = self.locate(h)
        live = (self.tag[slot] == tag) & (self.cnt[slot] > 0)
        return np.where(live, self.tok[slot].astype(np.int32), -1), np.where(live, self.cnt[slot], 0)

    def update(self, h: np.ndarray, seen: np.ndarray) -> None:
        slot, tag = self.locate(h)
        agree = (self.tag[slot] == tag) & (self.tok[slot] == seen) & (self.cnt[slot] > 0)
        np.add.at(self.cnt, slot[agree], 1)
        np.subtract.at(self.cnt, slot[~agree], 1)
        dead = ~agree & (self.cnt[slot] <= 0)
        self.tag[slot[dead]] = tag[dead]
        self.tok[slot[dead]] = seen[dead]
        self.cnt[slot[dead]] = 1
        self.cnt[slot] = np.clip(self.cnt[slot], 0, COUNT_MAX)


class ConfidenceTable:
    # Per expert and count bucket: how often its proposal was right so far.
    def __init__(self, experts: int):
        self.hits = np.full((experts, COUNT_BUCKETS), 1.0)
        self.tries = np.full((experts, COUNT_BUCKETS), 4.0)

    @staticmethod
    def bucket(count: np.ndarray) -> np.ndarray:
        return np.minimum(np.log2(np.maximum(count, 1)).astype(np.int64), COUNT_BUCKETS - 1)

    def rate(self, expert: int, bucket: np.ndarray) -> np.ndarray:
        return (self.hits[expert] / self.tries[expert])[bucket]

    def update(self, expert: int, bucket: np.ndarray, hit: np.ndarray) -> None:
        np.add.at(self.hits[expert], bucket, hit.astype(np.float64))
        np.add.at(self.tries[expert], bucket, 1.0)


class HintBank:
    # The token experts of orders 4 to 16, one expert for the inside of words, one for the starts of words.
    def __init__(self, args: Hyperparameters, starts_word: np.ndarray):
        self.args = args
        self.orders = args.tilt_orders
        self.starts_word = starts_word
        self.within = len(self.orders)
        self.wstart = len(self.orders) + 1
        self.num_experts = len(self.orders) + 2
        self.tables = [ExpertTable(args.tilt_table_bits) for _ in range(self.num_experts)]
        self.conf = ConfidenceTable(self.num_experts)
        span = LOOKBACK + args.tilt_block + 1
        self.pow = hash_powers(span, HASH_P)
        self.inv = hash_powers(span, pow(HASH_P, -1, 1 << 64))

    def contexts(self, past: np.ndarray, count: int) -> list[np.ndarray]:
        # past: LOOKBACK tokens, then all but the last of the block's tokens. The context of the block's position i
        # ends at past[LOOKBACK - 1 + i].
        seg = past.astype(np.uint64) + np.uint64(1)
        out: list[np.ndarray] = []
        h = np.zeros(count, dtype=np.uint64)
        for k in range(1, max(self.orders) + 1):
            h = h + seg[LOOKBACK - k : LOOKBACK - k + count] * self.pow[k]
            if k in self.orders:
                out.append(finish_hash(h, k))
        # Words: hash of the pieces since the last word start, and of the whole word before.
        n = seg.size
        cum = np.zeros(n + 1, dtype=np.uint64)
        cum[1:] = np.cumsum(seg * self.pow[:n], dtype=np.uint64)
        idx = np.arange(n)
        start = np.maximum.accumulate(np.where(self.starts_word[past], idx, 0))
        last = np.arange(LOOKBACK - 1, LOOKBACK - 1 + count)
        a = start[last]
        word = (cum[last + 1] - cum[a]) * self.inv[a]
        b = start[np.maximum(a - 1, 0)]
        prev = (cum[a] - cum[b]) * self.inv[b]
        both = word * np.uint64(0xFF51AFD7ED558CCD) + finish_hash(prev, 77)
        out.append(finish_hash(both, 101))
        out.append(finish_hash(both, 102))
        return out

    def propose(self, ctx: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list]:
        count = ctx[0].size
        best_rate = np.zeros(count)
        hint = np.full(count, -1, dtype=np.int32)
        offers = []
        for e, table in enumerate(self.tables):
            tok, cnt = table.lookup(ctx[e])
            bucket = self.conf.bucket(cnt)
            rate = np.where(tok >= 0, self.conf.rate(e, bucket), 0.0)
            better = rate > best_rate
            hint = np.where(better, tok, hint)
            best_rate = np.where(better, rate, best_rate)
            offers.append((tok, bucket))
        use = best_rate >= self.args.tilt_floor
        odds = np.log(np.clip(best_rate, 1e-4, 0.9999)) - np.log1p(-np.clip(best_rate, 1e-4, 0.9999))
        beta = np.clip(self.args.tilt_gain * odds + self.args.tilt_bias, 0.0, self.args.tilt_beta_max)
        return np.where(use, hint, -1).astype(np.int32), np.where(use, beta, 0.0).astype(np.float32), offers

    def absorb(self, ctx: list[np.ndarray], offers: list, seen: np.ndarray) -> None:
        begins = self.starts_word[seen]
        for e, table in enumerate(self.tables):
            tok, bucket = offers[e]
            offered = tok >= 0
            self.conf.update(e, bucket[offered], tok[offered] == seen[offered])
            if e == self.within:
                keep = ~begins
            elif e == self.wstart:
                keep = begins
            else:
                keep = slice(None)
            table.update(ctx[e][keep], seen[keep])


def online_ngram_tilt(tokens: np.ndarray, starts_word: np.ndarray, args: Hyperparameters) -> tuple[np.ndarray, np.ndarray]:
    # hint[t] and beta[t] for every token index t of the stream, each from tokens[:t] alone. hint -1: no tilt.
    hint = np.full(tokens.size, -1, dtype=np.int32)
    beta = np.zeros(tokens.size, dtype=np.float32)
    bank = HintBank(args, starts_word)
    padded = np.concatenate((np.zeros(LOOKBACK, dtype=tokens.dtype), tokens))
    for lo in range(0, tokens.size, args.tilt_block):
        hi = min(lo + args.tilt_block, tokens.size)
        past = padded[lo : hi + LOOKBACK - 1]
        ctx = bank.contexts(past, hi - lo)
        hint[lo:hi], beta[lo:hi], offers = bank.propose(ctx)
        bank.absorb(ctx, offers, tokens[lo:hi])
    return hint, beta


def tilted_nll(logits: Tensor, targets: Tensor, hint: Tensor, beta: Tensor) -> Tensor:
    logp = F.log_softmax(logits.float(), dim=-1)
    active = hint >= 0
    h = hint.clamp_min(0)
    b = torch.where(active, beta, torch.zeros_like(beta))
    logp_target = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    p_hint = logp.gather(-1, h.unsqueeze(-1)).squeeze(-1).exp()
    log_z = torch.log1p(p_hint * torch.expm1(b))
    return -(logp_target + b * (targets == h).float() - log_z)


# -----------------------------
# EVALUATION
# -----------------------------


class ValStream:
    # The validation tokens with the tilt's two columns; hint and beta are indexed by the token they are for.
    def __init__(self, tokens: Tensor, luts: tuple[Tensor, Tensor, Tensor], device: torch.device):
        self.tokens = tokens.to(dtype=torch.int64)
        self.luts = luts
        self.device = device
        self.hint = torch.full((tokens.numel(),), -1, dtype=torch.int64)
        self.beta = torch.zeros(tokens.numel(), dtype=torch.float32)

    @property
    def num_targets(self) -> int:
        return self.tokens.numel() - 1

    def build_hints(self, args: Hyperparameters, rank: int, distributed: bool) -> None:
        # Rank 0 runs the bank, the others receive its columns.
        hint = torch.full((self.tokens.numel(),), -1, dtype=torch.int32, device=self.device)
        beta = torch.zeros(self.tokens.numel(), dtype=torch.float32, device=self.device)
        if rank == 0:
            starts = (self.luts[1] | self.luts[2]).cpu().numpy()
            hint_np, beta_np = online_ngram_tilt(self.tokens.numpy().astype(np.uint16), starts, args)
            hint.copy_(torch.from_numpy(hint_np))
            beta.copy_(torch.from_numpy(beta_np))
        if distributed:
            dist.broadcast(hint, src=0)
            dist.broadcast(beta, src=0)
        self.hint = hint.cpu().to(torch.int64)
        self.beta = beta.cpu()


def score_ranges(lo: int, hi: int, seq_len: int, stride: int) -> list[tuple[int, int]]:
    # Disjoint ranges of target positions that cover [lo, hi); only the stream's first range is a whole window.
    ranges = []
    while lo < hi:
        step = seq_len if lo == 0 else stride
        ranges.append((lo, min(lo + step, hi)))
        lo += step
    return ranges


@torch.no_grad()
def score_windows(
    logits_fn, data: ValStream, ranges: list[tuple[int, int]], args: Hyperparameters, sums: Tensor
) -> None:
    # Position p predicts token p + 1. Every window is seq_len long and counts only its range.
    seq_len = args.eval_seq_len
    for i in range(0, len(ranges), args.eval_batch_seqs):
        batch = ranges[i : i + args.eval_batch_seqs]
        begins = [max(0, hi - seq_len) for _, hi in batch]
        width = max(hi - begin for (_, hi), begin in zip(batch, begins))
        x = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, ((_, hi), begin) in enumerate(zip(batch, begins)):
            x[row, : hi - begin] = data.tokens[begin:hi]
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x.to(data.device, non_blocking=True))
        logits = logits.float() / args.logit_temperature
        for row, ((lo, hi), begin) in enumerate(zip(batch, begins)):
            prev = data.tokens[lo:hi].to(data.device)
            tgt = data.tokens[lo + 1 : hi + 1].to(data.device)
            hint = data.hint[lo + 1 : hi + 1].to(data.device)
            beta = data.beta[lo + 1 : hi + 1].to(data.device)
            nll = tilted_nll(logits[row, lo - begin : hi - begin], tgt, hint, beta)
            sums[0] += nll.to(torch.float64).sum()
            sums[1] += tgt.numel()
            sums[2] += token_bytes(prev, tgt, data.luts).sum()


def reduce_scores(sums: Tensor, distributed: bool) -> tuple[float, float, int]:
    total = sums.clone()
    if distributed:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    loss = (total[0] / total[1]).item()
    bpb = (total[0] / math.log(2.0) / total[2]).item()
    return loss, bpb, int(total[1].item())


def eval_val(
    args: Hyperparameters, model: nn.Module, data: ValStream, rank: int, world_size: int, distributed: bool, stride: int
) -> tuple[float, float]:
    was_training = model.training
    model.eval()
    ranges = score_ranges(0, data.num_targets, args.eval_seq_len, stride)
    sums = torch.zeros(3, dtype=torch.float64, device=data.device)
    score_windows(model.forward_logits, data, ranges[rank::world_size], args, sums)
    model.train(was_training)
    loss, bpb, _ = reduce_scores(sums, distributed)
    return loss, bpb


def adapt_on_chunk(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ValStream,
    lo: int,
    hi: int,
    args: Hyperparameters,
    rank: int,
    world_size: int,
    distributed: bool,
) -> None:
    # Plain next-token training on target positions [lo, hi), all of which have been scored.
    seq_len = args.eval_seq_len
    num_seqs = (hi - lo) // seq_len
    if num_seqs == 0:
        return
    per_rank = (num_seqs + world_size - 1) // world_size
    mine = list(range(rank * per_rank, min((rank + 1) * per_rank, num_seqs)))
    params = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for _ in range(args.ttt_epochs):
        for i in range(0, per_rank, args.ttt_batch_seqs):
            ids = mine[i : i + args.ttt_batch_seqs]
            optimizer.zero_grad(set_to_none=False)
            weight = torch.tensor(float(len(ids)), device=data.device)
            if ids:
                x = torch.stack([data.tokens[lo + s * seq_len : lo + (s + 1) * seq_len] for s in ids])
                y = torch.stack([data.tokens[lo + s * seq_len + 1 : lo + (s + 1) * seq_len + 1] for s in ids])
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x.to(data.device), y.to(data.device))
                (loss * len(ids)).backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            if distributed:
                dist.all_reduce(weight, op=dist.ReduceOp.SUM)
                for p in params:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            for p in params:
                p.grad.div_(weight)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()


def eval_sliding_ttt(
    args: Hyperparameters,
    model: nn.Module,
    data: ValStream,
    rank: int,
    world_size: int,
    distributed: bool,
    eval_start: float,
    log0,
) -> tuple[float, float]:
    # Chunk by chunk: all ranks score the chunk's windows with the weights as they are, then train on the chunk.
    if args.ttt_chunk_tokens % args.eval_stride or args.eval_seq_len % args.eval_stride:
        raise ValueError("TTT_CHUNK_TOKENS and EVAL_SEQ_LEN must be multiples of EVAL_STRIDE")
    total = data.num_targets
    num_chunks = (total + args.ttt_chunk_tokens - 1) // args.ttt_chunk_tokens
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    logits_fn = torch.compile(model.forward_logits, dynamic=False)
    sums = torch.zeros(3, dtype=torch.float64, device=data.device)
    adapting = args.ttt_enabled
    scoring_seconds = 0.0
    for c in range(num_chunks):
        lo = c * args.ttt_chunk_tokens
        hi = min(lo + args.ttt_chunk_tokens, total)
        ranges = score_ranges(lo, hi, args.eval_seq_len, args.eval_stride)
        per_rank = (len(ranges) + world_size - 1) // world_size
        model.eval()
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        score_windows(logits_fn, data, ranges[rank * per_rank : (rank + 1) * per_rank], args, sums)
        torch.cuda.synchronize()
        scoring_seconds += time.perf_counter() - t0
        if c + 1 < num_chunks and adapting:
            for group in optimizer.param_groups:
                group["lr"] = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * c / num_chunks))
            adapt_on_chunk(model, optimizer, data, lo, hi, args, rank, world_size, distributed)
        # Out of time: go on scoring, stop adapting. Rank 0's clock decides for all.
        if c % 32 == 0:
            spent = time.perf_counter() - eval_start
            needed = torch.tensor(spent + scoring_seconds / (c + 1) * (num_chunks - c - 1), device=data.device)
            if distributed:
                dist.broadcast(needed, src=0)
            if c > 0 and needed.item() > 0.95 * args.max_eval_seconds:
                adapting = False
            log0(f"ttt chunk:{c}/{num_chunks} loss:{(sums[0] / sums[1]).item():.4f} eval_time:{spent:.1f}s")
    loss, bpb, counted = reduce_scores(sums, distributed)
    if counted != total:
        raise RuntimeError(f"scored {counted} of {total} tokens")
    return loss, bpb


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: Hyperparameters, model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    named = list(model.blocks.named_parameters())
    matrix_params = [
        p for name, p in named if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAMES)
    ]
    scalar_params = [
        p for name, p in named if p.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAMES)
    ]
    scalar_params += [model.skip_weights, model.bigram.scale]
    matrix_params.append(model.bigram.proj.weight)
    embed = torch.optim.AdamW(
        [{"params": [model.tok_emb.weight, model.bigram.embed.weight], "base_lr": args.tied_embed_lr}],
        lr=args.tied_embed_lr,
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    for group in muon.param_groups:
        group["base_lr"] = args.matrix_lr
    scalar = torch.optim.AdamW(
        [{"params": scalar_params, "base_lr": args.scalar_lr}],
        lr=args.scalar_lr,
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    return [embed, muon, scalar], muon


class WeightAverage:
    # Exponential moving average of the whole state, in fp32.
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({name: t.to(dtype=current[name].dtype) for name, t in self.shadow.items()})


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, cap_ms: float | None) -> float:
    if args.warmdown_iters <= 0:
        return 1.0
    if cap_ms is None:
        start = max(args.iterations - args.warmdown_iters, 0)
        return max((args.iterations - step) / args.warmdown_iters, 0.0) if step >= start else 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(cap_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


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
            print(msg, flush=True)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)

    # -----------------------------
    # TOKENIZER + VALIDATION SETUP
    # -----------------------------

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    val_data = ValStream(load_validation_tokens(args.val_files), luts, device)
    log0(f"train_loader:shards:{len(glob.glob(args.train_files))} val_loader:tokens:{val_data.tokens.numel()}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False)
    model = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    optimizers, optimizer_muon = build_optimizers(args, base_model)
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params} world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    def accumulate(loader: DistributedTokenLoader) -> Tensor:
        total = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            total += loss.detach()
            (loss * grad_scale).backward()
        return total / grad_accum_steps

    # Warmup primes the compiled forward/backward/optimizer paths, then the initial state is restored.
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for _ in range(args.warmup_steps):
            zero_grad_all()
            accumulate(train_loader)
            for opt in optimizers:
                opt.step()
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    cap_ms = None
    if args.max_wallclock_seconds > 0:
        cap_ms = 1000.0 * (args.max_wallclock_seconds - args.gptq_reserve_seconds)
    average = WeightAverage(base_model, args.ema_decay)
    training_time_ms = 0.0
    stop_after_step: int | None = None
    step = 0
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)
        if args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0 and not last_step:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, base_model, val_data, rank, world_size, distributed, args.eval_seq_len)
            log0(f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after_step is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap step:{step}/{args.iterations}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, cap_ms)
        if scale < args.late_qat_threshold and not CastedLinear._qat_enabled:
            CastedLinear._qat_enabled = True
            log0(f"late_qat:enabled step:{step} scale:{scale:.4f}")
        zero_grad_all()
        train_loss = accumulate(train_loader)
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
        average.update(base_model)
        step += 1

        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )
        # The ranks agree on the last step.
        reached_cap = cap_ms is not None and approx_ms >= cap_ms
        if distributed and cap_ms is not None:
            flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    # -----------------------------
    # AVERAGE + GPTQ, still on the training clock
    # -----------------------------

    CastedLinear._qat_enabled = False
    average.copy_to(base_model)
    log0("ema: applying EMA weights")
    hessians = collect_hessians(base_model, train_loader, args, device)
    packed = quantize_state_dict(base_model.state_dict(), hessians, args) if master_process else None
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"train + gptq: {training_time_ms:.0f}ms")
    if args.max_wallclock_seconds > 0 and training_time_ms > 1000.0 * args.max_wallclock_seconds:
        raise RuntimeError("GPTQ ran past the training cap, raise GPTQ_RESERVE_SECONDS")
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # PACKING
    # -----------------------------

    if master_process:
        buf = io.BytesIO()
        torch.save(packed, buf)
        blob = compress_blob(buf.getvalue())
        with open(args.artifact_path, "wb") as f:
            f.write(blob)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = len(blob) + code_bytes
        log0(f"Serialized model int6: {len(blob)} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > args.size_limit:
            raise RuntimeError(f"submission is {total_bytes - args.size_limit} bytes too large")
    if distributed:
        dist.barrier()

    # -----------------------------
    # FINAL EVALUATION of the packed model
    # -----------------------------

    torch.cuda.synchronize()
    eval_start = time.perf_counter()
    with open(args.artifact_path, "rb") as f:
        packed = torch.load(io.BytesIO(decompress_blob(f.read())), map_location="cpu")
    eval_model = GPT(args).to(device).bfloat16()
    for module in eval_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(eval_model)
    current = eval_model.state_dict()
    restored = dequantize_state_dict(packed)
    eval_model.load_state_dict({name: restored[name].to(dtype=t.dtype) for name, t in current.items()}, strict=True)
    if args.tilt_enabled:
        val_data.build_hints(args, rank, distributed)
        log0(f"tilt: hints at {(val_data.hint >= 0).float().mean().item():.3f} of the tokens")
        log0(f"tilt: built in {time.perf_counter() - eval_start:.1f}s")
    val_loss, val_bpb = eval_sliding_ttt(
        args, eval_model, val_data, rank, world_size, distributed, eval_start, log0
    )
    torch.cuda.synchronize()
    eval_seconds = time.perf_counter() - eval_start
    log0(f"final_tilt_ttt val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{1000.0 * eval_seconds:.0f}ms")
    log0(f"final_tilt_ttt_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
