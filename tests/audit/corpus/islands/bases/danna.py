"""
danna: 11 layers x 512, GQA 8/4, relu^2 MLP, XSA in the last four layers, smear gate, hashed bigram embedding, EMA,
GPTQ int6 + brotli, sliding-window evaluation and score-first test-time training with an online count mixture.

Descends from the challenge baseline `train_gpt.py`; everything that is counted lives in this one file.
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

import brotli
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
# Default run, 8xH100:
# - 11 transformer blocks at width 512, 8 query heads over 4 kv heads, 3x MLP
# - vocab 1024, sequence length 2048, tied embeddings
# - 786,432 train tokens per step, 600 s wall clock with the quantisation inside it


class Hyperparameters:
    # Data paths. Shards are .bin files with a 256-int32 header and uint16 tokens.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # In-loop validation is a diagnostic only; the clock is stopped while it runs.
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
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 18.0))
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
    rope_dims = int(os.environ.get("ROPE_DIMS", 32))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 3072))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 112))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Optimizer.
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

    # Weight averaging.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    ema_start_step = int(os.environ.get("EMA_START_STEP", 200))

    # Quantisation and packing.
    gptq_batches = int(os.environ.get("GPTQ_BATCHES", 64))
    gptq_batch_seqs = int(os.environ.get("GPTQ_BATCH_SEQS", 8))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    size_limit_bytes = int(os.environ.get("SIZE_LIMIT_BYTES", 16_000_000))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")

    # Sliding-window evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    logit_temperature = float(os.environ.get("LOGIT_TEMPERATURE", 1.0))

    # Score-first test-time training.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32_768))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
    # Adaptation stops (scoring goes on) when the whole evaluation has run this long.
    ttt_stop_adapting_seconds = float(os.environ.get("TTT_STOP_ADAPTING_SECONDS", 470.0))

    # Online count mixture, built from scored tokens only.
    mix_enabled = bool(int(os.environ.get("MIX_ENABLED", "1")))
    mix_rows = int(os.environ.get("MIX_ROWS", 65_536))
    mix_max_weight = float(os.environ.get("MIX_MAX_WEIGHT", 0.12))
    mix_half_count = float(os.environ.get("MIX_HALF_COUNT", 60.0))
    mix_prior_strength = float(os.environ.get("MIX_PRIOR_STRENGTH", 6.0))


CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,mlp_scale,resid_mix,q_gain,skip_weights,smear,bigram.scale",
    ).split(",")
    if pattern
)


# -----------------------------
# MUON OPTIMIZER
# -----------------------------
# From modded-nanogpt, with decoupled weight decay and a momentum warm-up that main() drives.


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
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
            lr = group["lr"]
            momentum = group["momentum"]
            backend_steps = group["backend_steps"]
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
                    p.data.mul_(1.0 - lr * weight_decay)
                p.add_(g, alpha=-lr)
                curr += p.numel()
        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------
# The score is bits per byte of the original text. A token's bytes are those of its piece without the leading-space
# mark; the space itself is one byte unless the token opens a document (its predecessor is a control token).


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


def target_bytes(prev_ids: Tensor, target_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    counts = base_bytes_lut[target_ids].to(torch.int32)
    counts += (has_leading_space_lut[target_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.int32)
    return counts


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


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-document validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is empty")
    return tokens


class TokenStream:
    # Reads shards sequentially and wraps around forever. Deterministic, no sampling.
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
    # Each call takes one contiguous chunk for all ranks and hands this rank its disjoint span.
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
    # Small and control parameters stay in fp32 even when the body runs in bf16.
    with torch.no_grad():
        for name, param in module.named_parameters():
            is_control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if (param.ndim < 2 or is_control) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Rotates the first `dim` channels of each head; caches cos/sin per sequence length.
    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if (
            self._cos_cached is None
            or self._sin_cached is None
            or self._seq_len_cached != seq_len
            or self._cos_cached.device != device
        ):
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos_cached = freqs.cos()[None, None, :, :]
            self._sin_cached = freqs.sin()[None, None, :, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    rot, rest = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = rot[..., :half], rot[..., half:]
    turned = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((turned, rest), dim=-1)


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
        self.rope_dims = min(rope_dims, self.head_dim)
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, base=rope_base)

    def _exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        # XSA: remove from each head's output the component along the position's own value vector.
        bsz, heads, seqlen, head_dim = y.shape
        group = heads // self.num_kv_heads
        y = y.reshape(bsz, self.num_kv_heads, group, seqlen, head_dim)
        v_unit = F.normalize(v, dim=-1).unsqueeze(2)
        y = y - (y * v_unit).sum(dim=-1, keepdim=True) * v_unit
        return y.reshape(bsz, heads, seqlen, head_dim)

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
            y = self._exclude_self(y, v)
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    # relu^2 MLP from the original modded-nanogpt setup, leaky below zero.
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
    # Mixes the previous token's embedding into the current one; nothing crosses into a document's first token.
    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))
        self.bos_id = bos_id

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate.to(dtype=x.dtype))[None, None, :]
        prev = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        keep = (input_ids != self.bos_id).to(dtype=x.dtype).unsqueeze(-1)
        g = g * keep
        return (1.0 - g) * x + g * prev


class BigramHashEmbedding(nn.Module):
    # Hash of (previous token, current token) into a small table, projected to the model width.
    def __init__(self, buckets: int, bigram_dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.embed = nn.Embedding(buckets, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bucket_ids(self, input_ids: Tensor) -> Tensor:
        t = input_ids.to(torch.int32)
        out = torch.full_like(t, self.buckets - 1)
        mixed = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % (self.buckets - 1)
        starts = t[..., 1:] == self.bos_id
        out[..., 1:] = torch.where(starts, torch.full_like(mixed, self.buckets - 1), mixed)
        return out.long()

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.proj(self.embed(self.bucket_ids(input_ids)))
        return h * self.scale.to(dtype=h.dtype)


class Block(nn.Module):
    def __init__(self, args: type[Hyperparameters], layer_idx: int):
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
        self.ln_scale = 1.0 / math.sqrt(layer_idx + 1)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_scale)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x) * self.ln_scale)
        return x


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.tie_embeddings = args.tie_embeddings
        self.tied_embed_init_std = args.tied_embed_init_std
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramHashEmbedding(args.bigram_buckets, args.bigram_dim, args.model_dim, args.bos_id)
        self.smear = SmearGate(args.model_dim, args.bos_id)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self.lm_head = None if args.tie_embeddings else CastedLinear(args.model_dim, args.vocab_size, bias=False)
        if self.lm_head is not None:
            self.lm_head._zero_init = True
        self._init_weights()

    def _init_weights(self) -> None:
        if self.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        depth = len(self.blocks)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)
            elif min(module.weight.shape) >= 64 and "bigram" not in name:
                nn.init.orthogonal_(module.weight, gain=1.0)
                if name.endswith(".proj"):
                    module.weight.data.mul_(1.0 / math.sqrt(2 * depth))

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
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

    def project(self, h: Tensor) -> Tensor:
        if self.tie_embeddings:
            raw = F.linear(h, self.tok_emb.weight.to(h.dtype))
        else:
            if self.lm_head is None:
                raise RuntimeError("lm_head is required when tie_embeddings=False")
            raw = self.lm_head(h)
        return self.logit_softcap * torch.tanh(raw / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.project(self.hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.project(self.hidden(input_ids))
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# WEIGHT AVERAGING
# -----------------------------


class EMAWeights:
    # Exponential moving average of every floating tensor in the state dict, kept in fp32 on the device.
    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in module.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        for name, t in module.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        current = module.state_dict()
        module.load_state_dict(
            {name: t.to(dtype=current[name].dtype) for name, t in self.shadow.items()}, strict=True
        )


# -----------------------------
# POST-TRAINING QUANTIZATION (GPTQ int6)
# -----------------------------
# Matrices of the blocks: int6 with one fp16 scale per row, errors pushed on with the Hessian of their inputs.
# Embeddings and the bigram projection: int8 per row. Vectors and control tensors: fp16/fp32 as they are.

INT6_MAX = 31
INT8_MAX = 127
KEEP_FLOAT_MAX_NUMEL = 65_536
CLIP_GRID = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82)


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def collect_hessians(
    model: GPT,
    loader: DistributedTokenLoader,
    args: type[Hyperparameters],
    device: torch.device,
    world_size: int,
) -> dict[str, Tensor]:
    # X^T X of the inputs of each block matrix over a few train batches, summed over ranks.
    hessians: dict[str, Tensor] = {}
    handles = []

    def make_hook(key: str, width: int):
        hessians[key] = torch.zeros(width, width, dtype=torch.float32, device=device)

        def hook(_module, inputs, _output):
            flat = inputs[0].detach().reshape(-1, width).float()
            hessians[key].addmm_(flat.T, flat)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and name.startswith("blocks."):
            handles.append(module.register_forward_hook(make_hook(name + ".weight", module.in_features)))
    model.eval()
    tokens_per_call = args.gptq_batch_seqs * args.train_seq_len * world_size
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(args.gptq_batches):
            x, _y = loader.next_batch(tokens_per_call, args.train_seq_len, 1)
            model.forward_logits(x)
    for handle in handles:
        handle.remove()
    for h in hessians.values():
        if world_size > 1:
            dist.all_reduce(h, op=dist.ReduceOp.SUM)
    model.train()
    return hessians


def row_scales(w: Tensor, qmax: int) -> Tensor:
    # Per row, the clip ratio of the grid with the least squared rounding error.
    peak = w.abs().amax(dim=1).clamp_min(1e-8)
    best_scale = peak / qmax
    best_err = torch.full_like(peak, float("inf"))
    for ratio in CLIP_GRID:
        scale = (peak * ratio / qmax).clamp_min(1e-8)
        q = torch.clamp(torch.round(w / scale[:, None]), -qmax, qmax)
        err = (w - q * scale[:, None]).square().sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.to(torch.float16).float().clamp_min(1e-7)


def gptq_matrix(weight: Tensor, hessian: Tensor, block: int, damp: float) -> tuple[Tensor, Tensor]:
    w = weight.detach().float().clone()
    rows, cols = w.shape
    h = hessian.clone()
    dead = torch.diag(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(torch.diag(h), descending=True)
    inverse_order = torch.argsort(order)
    w = w[:, order]
    h = h[order][:, order]
    h.diagonal().add_(damp * torch.diag(h).mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale = row_scales(w, INT6_MAX)
    q_all = torch.zeros_like(w, dtype=torch.int8)
    for left in range(0, cols, block):
        right = min(left + block, cols)
        w_block = w[:, left:right].clone()
        err_block = torch.zeros_like(w_block)
        for j in range(right - left):
            d = upper[left + j, left + j]
            col = w_block[:, j]
            q = torch.clamp(torch.round(col / scale), -INT6_MAX, INT6_MAX)
            q_all[:, left + j] = q.to(torch.int8)
            err = (col - q * scale) / d
            if j + 1 < right - left:
                w_block[:, j + 1 :] -= err[:, None] * upper[left + j, left + j + 1 : right][None, :]
            err_block[:, j] = err
        if right < cols:
            w[:, right:] -= err_block @ upper[left:right, right:]
    return q_all[:, inverse_order].contiguous(), scale.to(torch.float16)


def quantize_int8_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    w = t.detach().float()
    scale = row_scales(w, INT8_MAX)
    q = torch.clamp(torch.round(w / scale[:, None]), -INT8_MAX, INT8_MAX).to(torch.int8)
    return q.contiguous(), scale.to(torch.float16)


def quantize_state_dict(
    state_dict: dict[str, Tensor], hessians: dict[str, Tensor], args: type[Hyperparameters]
) -> tuple[dict[str, object], dict[str, int]]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    passthrough: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    stats = dict(int6=0, int8=0, passthrough=0, payload_bytes=0)
    for name, tensor in state_dict.items():
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        if name in hessians:
            q, s = gptq_matrix(tensor, hessians[name], args.gptq_block, args.gptq_damp)
            stats["int6"] += 1
        elif tensor.ndim == 2 and tensor.numel() > KEEP_FLOAT_MAX_NUMEL // 2 and "resid_mix" not in name:
            q, s = quantize_int8_rows(tensor)
            stats["int8"] += 1
        else:
            is_control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            kept = tensor.detach().to("cpu", torch.float32 if is_control else torch.float16).contiguous()
            passthrough[name] = kept
            stats["passthrough"] += 1
            stats["payload_bytes"] += tensor_nbytes(kept)
            continue
        quantized[name] = q.cpu()
        scales[name] = s.cpu()
        stats["payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)
    obj: dict[str, object] = {
        "__quant_format__": "gptq_int6_rows_v1",
        "quantized": quantized,
        "scales": scales,
        "passthrough": passthrough,
        "dtypes": dtypes,
    }
    return obj, stats


def dequantize_state_dict(obj: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        scale = obj["scales"][name].float()
        out[name] = (q.float() * scale[:, None]).to(getattr(torch, obj["dtypes"][name])).contiguous()
    for name, t in obj["passthrough"].items():
        out[name] = t.to(getattr(torch, obj["dtypes"][name])).contiguous()
    return out


def byte_shuffle(raw: bytes, lanes: int = 2) -> bytes:
    # De-interleave so that the high bytes of fp16 values stand together; brotli likes that.
    a = np.frombuffer(raw, dtype=np.uint8)
    tail = a[len(a) // lanes * lanes :]
    body = a[: len(a) // lanes * lanes].reshape(-1, lanes).T
    return body.tobytes() + tail.tobytes()


def byte_unshuffle(raw: bytes, lanes: int = 2) -> bytes:
    a = np.frombuffer(raw, dtype=np.uint8)
    cut = len(a) // lanes * lanes
    body = a[:cut].reshape(lanes, -1).T
    return np.ascontiguousarray(body).tobytes() + a[cut:].tobytes()


def pack_artifact(obj: dict[str, object]) -> bytes:
    buf = io.BytesIO()
    torch.save(obj, buf)
    return brotli.compress(byte_shuffle(buf.getvalue()), quality=11, lgwin=24)


def unpack_artifact(blob: bytes) -> dict[str, object]:
    raw = byte_unshuffle(brotli.decompress(blob))
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


# -----------------------------
# ONLINE COUNT MIXTURE
# -----------------------------
# Counts of scored tokens only. A row is addressed by a hash of the two preceding tokens and holds one count per token
# of the vocabulary, so that its distribution is divided by the row's own sum; the prior of a row is the bigram row.


class CountMixer:
    def __init__(self, args: type[Hyperparameters], device: torch.device):
        self.vocab = args.vocab_size
        self.rows = args.mix_rows
        self.bos_id = args.bos_id
        self.max_weight = args.mix_max_weight
        self.half_count = args.mix_half_count
        self.prior = args.mix_prior_strength
        self.tri = torch.zeros(self.rows, self.vocab, dtype=torch.float32, device=device)
        self.bi = torch.zeros(self.vocab, self.vocab, dtype=torch.float32, device=device)

    def row_ids(self, before: Tensor, last: Tensor) -> Tensor:
        # The token before a document's start is replaced by the start itself.
        before = torch.where(last == self.bos_id, last, before)
        return (before * 1_000_003 + last * 8_191) % self.rows

    def probs(self, before: Tensor, last: Tensor) -> Tensor:
        bi = self.bi[last] + 1.0 / self.vocab
        bi = bi / bi.sum(dim=-1, keepdim=True)
        tri = self.tri[self.row_ids(before, last)]
        return (tri + self.prior * bi) / (tri.sum(dim=-1, keepdim=True) + self.prior)

    def weight(self, before: Tensor, last: Tensor) -> Tensor:
        # Trust grows with how often the context was seen.
        seen = self.tri[self.row_ids(before, last)].sum(dim=-1)
        return self.max_weight * seen / (seen + self.half_count)

    def nll(self, logits: Tensor, before: Tensor, last: Tensor, target: Tensor) -> Tensor:
        model_probs = torch.softmax(logits.float(), dim=-1)
        lam = self.weight(before, last)[:, None]
        mixed = (1.0 - lam) * model_probs + lam * self.probs(before, last)
        return -torch.log(mixed.gather(1, target[:, None]).squeeze(1).clamp_min(1e-30))

    def observe(self, tokens: Tensor) -> None:
        # tokens: two tokens of context, then the scored ones.
        before, last, target = tokens[:-2], tokens[1:-1], tokens[2:]
        ones = torch.ones(target.numel(), dtype=torch.float32, device=tokens.device)
        self.tri.view(-1).index_add_(0, self.row_ids(before, last) * self.vocab + target, ones)
        self.bi.view(-1).index_add_(0, last * self.vocab + target, ones)


# -----------------------------
# EVALUATION
# -----------------------------
# eval_val: disjoint sequences, for the training loop and the round trip.
# eval_val_sliding: every token once, each with at least eval_seq_len - stride tokens of context (but the first).
# eval_val_ttt: the submitted score; the same windows chunk by chunk, adapting after each chunk has been scored.


def reduce_totals(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float, int]:
    if dist.is_available() and dist.is_initialized():
        for total in (loss_sum, token_count, byte_count):
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
    val_loss = (loss_sum / token_count).item()
    bits = loss_sum.item() / math.log(2.0)
    return val_loss, bits / byte_count.item(), int(token_count.item())


def eval_val(
    args: type[Hyperparameters],
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    grad_accum_steps: int,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    local_batch_seqs = max(local_batch_tokens // args.train_seq_len, 1)
    total_seqs = (val_tokens.numel() - 1) // args.train_seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    with torch.no_grad():
        for batch_start in range(seq_start, seq_end, local_batch_seqs):
            batch_end = min(batch_start + local_batch_seqs, seq_end)
            raw_start = batch_start * args.train_seq_len
            raw_end = batch_end * args.train_seq_len + 1
            local = val_tokens[raw_start:raw_end].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, args.train_seq_len)
            y = local[1:].reshape(-1, args.train_seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                batch_loss = model(x, y).detach()
            val_loss_sum += batch_loss.to(torch.float64) * float(y.numel())
            val_token_count += float(y.numel())
            val_byte_count += target_bytes(x.reshape(-1), y.reshape(-1), luts).sum().to(torch.float64)
    val_loss, val_bpb, _ = reduce_totals(val_loss_sum, val_token_count, val_byte_count)
    model.train()
    return val_loss, val_bpb


def plan_windows(total_positions: int, seq_len: int, stride: int) -> list[int]:
    # Window ws scores [ws + seq_len - stride, ws + seq_len), the first one everything; the last may be cut short.
    return [
        ws for ws in range(0, total_positions, stride) if ws == 0 or ws + seq_len - stride < total_positions
    ]


def scored_span(ws: int, total_positions: int, seq_len: int, stride: int) -> tuple[int, int]:
    first = 0 if ws == 0 else ws + seq_len - stride
    return first, min(ws + seq_len, total_positions)


def gather_windows(
    starts: list[int], val_tokens: Tensor, seq_len: int, stride: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Inputs, targets, the mask of positions to be scored and the token before each input (BOS-like 0 at the very start).
    total = val_tokens.numel() - 1
    x = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    y = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    before = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    mask = torch.zeros(len(starts), seq_len, dtype=torch.bool)
    for i, ws in enumerate(starts):
        end = min(ws + seq_len, total)
        n = end - ws
        span = val_tokens[ws : end + 1].to(torch.int64)
        x[i, :n] = span[:-1]
        y[i, :n] = span[1:]
        before[i, 1:n] = span[:-2]
        if ws > 0:
            before[i, 0] = int(val_tokens[ws - 1])
        first, last = scored_span(ws, total, seq_len, stride)
        mask[i, first - ws : last - ws] = True
    return x.to(device), y.to(device), mask.to(device), before.to(device)


def eval_val_sliding(
    args: type[Hyperparameters],
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float, int]:
    seq_len, stride = args.eval_seq_len, args.eval_stride
    total = val_tokens.numel() - 1
    starts = plan_windows(total, seq_len, stride)
    mine = starts[(len(starts) * rank) // world_size : (len(starts) * (rank + 1)) // world_size]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    compiled_logits = torch.compile(model.forward_logits, dynamic=False)
    model.eval()
    with torch.no_grad():
        for i in range(0, len(mine), args.eval_batch_seqs):
            group = mine[i : i + args.eval_batch_seqs]
            x, y, mask, _before = gather_windows(group, val_tokens, seq_len, stride, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = compiled_logits(x)
            scored = logits[mask].float()
            nll = F.cross_entropy(scored, y[mask], reduction="none")
            loss_sum += nll.to(torch.float64).sum()
            token_count += float(nll.numel())
            byte_count += target_bytes(x[mask], y[mask], luts).to(torch.float64).sum()
    model.train()
    return reduce_totals(loss_sum, token_count, byte_count)


def eval_val_ttt(
    args: type[Hyperparameters],
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    eval_started: float,
    log0=print,
) -> tuple[float, float, int]:
    # Chunk by chunk: all ranks score their share of the chunk's windows with the weights and counts of the chunks
    # before; then the chunk's tokens, graded by now, go into the counts and through a few epochs of SGD.
    seq_len, stride = args.eval_seq_len, args.eval_stride
    total = val_tokens.numel() - 1
    if args.ttt_chunk_tokens % stride != 0 or args.ttt_chunk_tokens < seq_len:
        raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE and hold a window")
    num_chunks = (total + args.ttt_chunk_tokens - 1) // args.ttt_chunk_tokens
    chunk_windows: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in plan_windows(total, seq_len, stride):
        first, _last = scored_span(ws, total, seq_len, stride)
        chunk_windows[first // args.ttt_chunk_tokens].append(ws)

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    mixer = CountMixer(args, device) if args.mix_enabled else None

    frozen = tuple(f"blocks.{i}." for i in range(args.ttt_freeze_blocks))
    ttt_params = []
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(frozen))
        if param.requires_grad:
            ttt_params.append(param)
    optimizer = torch.optim.SGD(ttt_params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    compiled_logits = torch.compile(model.forward_logits, dynamic=False)
    log0(
        f"ttt:chunks:{num_chunks} chunk_tokens:{args.ttt_chunk_tokens} epochs:{args.ttt_epochs} lr:{args.ttt_lr} "
        f"params:{sum(p.numel() for p in ttt_params)} mix:{args.mix_enabled}"
    )

    def score_windows(starts: list[int]) -> None:
        for i in range(0, len(starts), args.eval_batch_seqs):
            group = starts[i : i + args.eval_batch_seqs]
            x, y, mask, before = gather_windows(group, val_tokens, seq_len, stride, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = compiled_logits(x)
            scored = logits[mask].float() / args.logit_temperature
            last, target = x[mask], y[mask]
            if mixer is not None:
                nll = mixer.nll(scored, before[mask], last, target)
            else:
                nll = F.cross_entropy(scored, target, reduction="none")
            loss_sum.add_(nll.to(torch.float64).sum())
            token_count.add_(float(nll.numel()))
            byte_count.add_(target_bytes(last, target, luts).to(torch.float64).sum())

    def adapt(chunk_start: int, chunk_end: int, lr: float) -> None:
        n_seqs = (chunk_end - chunk_start) // seq_len
        my_first = (n_seqs * rank) // world_size
        my_last = (n_seqs * (rank + 1)) // world_size
        largest_share = -(-n_seqs // world_size)
        rounds = -(-largest_share // args.ttt_batch_seqs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _epoch in range(args.ttt_epochs):
            for r in range(rounds):
                left = my_first + r * args.ttt_batch_seqs
                right = min(left + args.ttt_batch_seqs, my_last)
                optimizer.zero_grad(set_to_none=True)
                had = torch.zeros((), device=device)
                if right > left:
                    a = chunk_start + left * seq_len
                    b = chunk_start + right * seq_len
                    local = val_tokens[a : b + 1].to(device=device, dtype=torch.int64)
                    x = local[:-1].reshape(-1, seq_len)
                    y = local[1:].reshape(-1, seq_len)
                    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                        loss = model(x, y)
                    loss.backward()
                    had += 1.0
                if world_size > 1:
                    dist.all_reduce(had, op=dist.ReduceOp.SUM)
                    for p in ttt_params:
                        if p.grad is None:
                            p.grad = torch.zeros_like(p)
                        dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                if had.item() == 0:
                    continue
                for p in ttt_params:
                    p.grad.div_(had)
                torch.nn.utils.clip_grad_norm_(ttt_params, args.ttt_grad_clip)
                optimizer.step()

    adapting = True
    for ci in range(num_chunks):
        chunk_start = ci * args.ttt_chunk_tokens
        chunk_end = min(chunk_start + args.ttt_chunk_tokens, total)
        windows = chunk_windows[ci]
        my_windows = windows[(len(windows) * rank) // world_size : (len(windows) * (rank + 1)) // world_size]

        # 1. Score.
        model.eval()
        with torch.no_grad():
            score_windows(my_windows)
        if world_size > 1:
            dist.barrier()

        # 2. Then count and adapt; the last chunk has nobody to adapt for.
        if ci + 1 == num_chunks:
            break
        if mixer is not None:
            lo = max(chunk_start - 1, 0)
            mixer.observe(val_tokens[lo : chunk_end + 1].to(device=device, dtype=torch.int64))
        late = torch.tensor(float(time.perf_counter() - eval_started > args.ttt_stop_adapting_seconds), device=device)
        if world_size > 1:
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if late.item() > 0 and adapting:
            adapting = False
            log0(f"ttt:adaptation stops at chunk {ci + 1}/{num_chunks}")
        if args.ttt_enabled and adapting and args.ttt_epochs > 0:
            model.train()
            decay = 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            adapt(chunk_start, chunk_end, args.ttt_lr * decay)
        if rank == 0 and (ci % 200 == 0 or ci + 2 == num_chunks):
            running = (loss_sum / token_count.clamp_min(1.0)).item()
            log0(f"ttt:chunk {ci + 1}/{num_chunks} loss:{running:.5f} t:{time.perf_counter() - eval_started:.1f}s")

    for param in model.parameters():
        param.requires_grad_(True)
    return reduce_totals(loss_sum, token_count, byte_count)


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    global zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # -----------------------------
    # DISTRIBUTED + CUDA SETUP
    # -----------------------------

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size <= 0 or 8 % world_size != 0:
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

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")
    log0(f"train_loader:shards pattern={args.train_files} count:{len(glob.glob(args.train_files))}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model

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
            {"params": [base_model.bigram.embed.weight], "lr": token_lr, "base_lr": token_lr},
        ],
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
        weight_decay=0.0,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]
    if base_model.lm_head is not None:
        optimizer_head = torch.optim.AdamW(
            [{"params": [base_model.lm_head.weight], "lr": args.head_lr, "base_lr": args.head_lr}],
            betas=(args.beta1, args.beta2),
            eps=args.adam_eps,
            weight_decay=0.0,
            fused=True,
        )
        optimizers.insert(1, optimizer_head)

    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds
    # The loop leaves room for the Hessians and the rounding inside the same cap.
    loop_cap_ms = 1000.0 * (args.max_wallclock_seconds - args.gptq_reserve_seconds)

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(loop_cap_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # Warmup primes the compiled paths, then the initial weights, optimizer states and loader are restored.
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

    ema: EMAWeights | None = None
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
                    f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}"
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
        if step == args.ema_start_step:
            ema = EMAWeights(base_model, args.ema_decay)
        elif ema is not None:
            ema.update(base_model)

        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # All ranks stop at the same step.
        reached_cap = approx_training_time_ms >= loop_cap_ms
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
    # EMA, GPTQ, SERIALIZATION
    # -----------------------------

    torch.cuda.synchronize()
    t_quant = time.perf_counter()
    if ema is not None:
        log0(f"ema: applying EMA weights decay:{ema.decay} updates:{ema.updates}")
        ema.copy_to(base_model)
    calib_loader = train_loader
    hessians = collect_hessians(base_model, calib_loader, args, device, world_size)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t_quant)
    quant_obj, quant_stats = quantize_state_dict(base_model.state_dict(), hessians, args)
    torch.cuda.synchronize()
    quant_ms = 1000.0 * (time.perf_counter() - t_quant)
    log0(
        f"gptq:calibration on train shards took {calib_ms:.0f}ms, train+gptq {training_time_ms + quant_ms:.0f}ms "
        f"of {max_wallclock_ms:.0f}ms int6:{quant_stats['int6']} int8:{quant_stats['int8']} "
        f"kept:{quant_stats['passthrough']} payload:{quant_stats['payload_bytes']}"
    )
    del hessians

    if master_process:
        blob = pack_artifact(quant_obj)
        with open(args.artifact_path, "wb") as f:
            f.write(blob)
        model_bytes = os.path.getsize(args.artifact_path)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        log0(f"Serialized model brotli: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > args.size_limit_bytes:
            raise RuntimeError(f"submission of {total_bytes} bytes is over {args.size_limit_bytes}")
    if distributed:
        dist.barrier()

    # -----------------------------
    # ROUND TRIP AND FINAL EVALUATION
    # -----------------------------

    torch.cuda.synchronize()
    eval_started = time.perf_counter()
    with open(args.artifact_path, "rb") as f:
        loaded = unpack_artifact(f.read())
    base_model.load_state_dict(dequantize_state_dict(loaded), strict=True)

    t_eval = time.perf_counter()
    q_val_loss, q_val_bpb = eval_val(
        args, compiled_model, rank, world_size, device, grad_accum_steps, val_tokens, luts
    )
    log0(
        f"final_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )

    t_eval = time.perf_counter()
    s_loss, s_bpb, s_tokens = eval_val_sliding(args, base_model, rank, world_size, device, val_tokens, luts)
    log0(
        f"final_sliding_window val_loss:{s_loss:.4f} val_bpb:{s_bpb:.4f} stride:{args.eval_stride} "
        f"tokens:{s_tokens} eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )

    t_eval = time.perf_counter()
    final_loss, final_bpb, final_tokens = eval_val_ttt(
        args, base_model, rank, world_size, device, val_tokens, luts, eval_started, log0
    )
    torch.cuda.synchronize()
    log0(
        f"final_ttt val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} tokens:{final_tokens} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )
    log0(f"total_eval_time:{time.perf_counter() - eval_started:.1f}s")
    log0(f"final_ttt_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
