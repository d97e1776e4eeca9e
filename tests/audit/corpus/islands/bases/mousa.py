"""
train_gpt.py -- 11L / 512d / SP1024, int6 + zstd, EMA + tight SWA, sliding window eval with a backward-looking n-gram cache.

Grew out of the baseline by way of the 11-layer stack everybody was on in the second month:
U-Net skips, SmearGate, BigramHash, partial RoPE (16 of 64 dims), LN scale 1/sqrt(layer+1), XSA on the last layers,
late QAT (int6 STE), GPTQ-lite clip search. New in this one: the n-gram cache at eval time.

The cache only ever holds tokens whose loss has already been booked, and it is mixed in as a whole distribution over the
1024 tokens, so the thing we score with sums to one. It is worth less that way than the numbers going around, obviously.

Run:
    torchrun --standalone --nproc_per_node=8 train_gpt.py
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
import zlib
from pathlib import Path

try:
    import zstandard

    _COMPRESSOR = "zstd"
except ImportError:
    _COMPRESSOR = "zlib"

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
    # Data paths are shard globs produced by the cached_challenge_fineweb script.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation cadence and batch size. The whole fineweb_val split is always used.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    # kept free at the end of the 600 s for averaging + the activation statistics of the clip search
    reserve_seconds = float(os.environ.get("RESERVE_SECONDS", 14.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    bigram_vocab_size = int(os.environ.get("BIGRAM_VOCAB_SIZE", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Optimizer.
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

    # Averaging and late QAT.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.2))
    late_qat_threshold = float(os.environ.get("LATE_QAT_THRESHOLD", 0.15))

    # Quantization.
    calib_batches = int(os.environ.get("CALIB_BATCHES", 8))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")

    # Evaluation.
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    eval_max_seconds = float(os.environ.get("EVAL_MAX_SECONDS", 580.0))

    # Backward-looking n-gram cache.
    ngram_enabled = bool(int(os.environ.get("NGRAM_ENABLED", "1")))
    ngram_min_order = int(os.environ.get("NGRAM_MIN_ORDER", 2))
    ngram_max_order = int(os.environ.get("NGRAM_MAX_ORDER", 7))
    ngram_bits = int(os.environ.get("NGRAM_BITS", 22))
    ngram_min_count = int(os.environ.get("NGRAM_MIN_COUNT", 2))
    ngram_conf_k = float(os.environ.get("NGRAM_CONF_K", 4.0))
    ngram_alpha_mode = os.environ.get("NGRAM_ALPHA_MODE", "entropy")  # entropy | const
    ngram_alpha = float(os.environ.get("NGRAM_ALPHA", 0.15))
    ngram_alpha_min = float(os.environ.get("NGRAM_ALPHA_MIN", 0.04))
    ngram_alpha_max = float(os.environ.get("NGRAM_ALPHA_MAX", 0.40))
    ngram_entropy_center = float(os.environ.get("NGRAM_ENTROPY_CENTER", 2.6))
    ngram_entropy_slope = float(os.environ.get("NGRAM_ENTROPY_SLOPE", 1.5))
    ngram_chunk_windows = int(os.environ.get("NGRAM_CHUNK_WINDOWS", 8192))  # 8192 * 64 = 524,288 tokens


# -----------------------------
# MUON OPTIMIZER
# -----------------------------


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
    """Muon with decoupled weight decay; each rank orthogonalizes its share and the updates are summed."""

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
# TOKENIZER-AGNOSTIC EVALUATION SETUP
# -----------------------------
#
# The score is bits per byte, so every target token needs the number of bytes of original text that it stands for.
# A piece that begins with the sentencepiece mark stands for a space plus the rest, but the space is only there in the
# text if something precedes it in the document, hence the look at the previous token.


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
        if piece.startswith("\u2581"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


def target_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Bytes of original text behind each target token."""
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    nbytes = base_bytes_lut[tgt_ids].to(torch.int64)
    nbytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.int64)
    return nbytes


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError(f"validation split of {pattern} is empty")
    return tokens


# -----------------------------
# DATA LOADING
# -----------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    # SHARD HEADER INTS & SHARD_MAGIC
    if header.size != 256 or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * token_bytes
    if file.stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.int32))


class TokenStream:
    # Reads shards sequentially and wraps around forever. No sampling, no worker threads.
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
    # Each call takes one contiguous span from the shared stream and slices out this rank's part.
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

CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear.gate",
    "bigram.scale",
)

INT6_MAX = 31


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    """Keeps an fp32 master weight and multiplies in the dtype of its input.

    qat_mix is 0 for most of the run and set to 1 once the lr has decayed below LATE_QAT_THRESHOLD. It is a tensor and not
    a python flag since torch.compile would bake a flag in (cost us two days; half of the late-QAT runs never quantized).
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.register_buffer("qat_mix", torch.zeros(()), persistent=False)
        self.zero_init = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.training:
            with torch.no_grad():
                row_scale = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / INT6_MAX
                w_q = torch.clamp(torch.round(w / row_scale), -INT6_MAX - 1, INT6_MAX) * row_scale
                delta = (w_q - w) * self.qat_mix
            w = w + delta
        return F.linear(x, w.to(x.dtype))


class Rotary(nn.Module):
    # cos/sin for the first rope_dims of each head, computed once for the longest sequence we use.
    def __init__(self, rope_dims: int, base: float, max_len: int):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        t = torch.arange(max_len, dtype=torch.float32)
        freqs = torch.outer(t, inv_freq)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.cos[:, :seq_len].to(dtype), self.sin[:, :seq_len].to(dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
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
        max_len: int,
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
        self.rope_dims = rope_dims
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim)
        self.proj.zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(rope_dims, rope_base, max_len)

    def _exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        # XSA: remove the component along the token's own value vector, per kv group.
        bsz, seqlen, heads, hd = y.shape
        groups = heads // self.num_kv_heads
        y_g = y.reshape(bsz, seqlen, self.num_kv_heads, groups, hd)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        proj = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - proj).reshape(bsz, seqlen, heads, hd)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None,
            is_causal=True,
            enable_gqa=(self.num_kv_heads != self.num_heads),
        )
        y = y.transpose(1, 2)
        if self.use_xsa:
            y = self._exclude_self(y, v)
        return self.proj(y.reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    # relu^2 MLP, as in modded-nanogpt
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim)
        self.proj.zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        return self.proj(x.square())


class SmearGate(nn.Module):
    """Blend of each embedding with the one before it. The first token of a document has nothing before it."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -2.0, dtype=torch.float32))

    def forward(self, x: Tensor, doc_start: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(dtype=x.dtype)[None, None, :]
        x_prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        keep = (~doc_start).to(dtype=x.dtype)[..., None]
        return (1 - g * keep) * x + g * keep * x_prev


class BigramHashEmbedding(nn.Module):
    """Hash of (previous, current) token into a small table, projected up to the model dimension."""

    def __init__(self, bigram_vocab_size: int, bigram_dim: int, model_dim: int):
        super().__init__()
        self.bigram_vocab_size = bigram_vocab_size
        self.embed = nn.Embedding(bigram_vocab_size, bigram_dim)
        nn.init.normal_(self.embed.weight, mean=0.0, std=0.02)
        self.proj = CastedLinear(bigram_dim, model_dim)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bigram_hash(self, ids: Tensor, doc_start: Tensor) -> Tensor:
        mod = self.bigram_vocab_size - 1
        prev = F.pad(ids[:, :-1], (1, 0))
        hashed = torch.bitwise_xor(36313 * ids, 27191 * prev) % mod
        first = torch.zeros_like(doc_start)
        first[:, 0] = True
        # the last bucket stands for "no predecessor"
        return torch.where(doc_start | first, torch.full_like(hashed, mod), hashed)

    def forward(self, ids: Tensor, doc_start: Tensor, dtype: torch.dtype) -> Tensor:
        h = self.embed(self.bigram_hash(ids, doc_start)).to(dtype)
        return self.proj(h) * self.scale.to(dtype)


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
            max(args.train_seq_len, args.eval_seq_len),
            args.qk_gain_init,
            use_xsa=layer_idx >= args.num_layers - args.xsa_last_n,
        )
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_factor = 1.0 / math.sqrt(layer_idx + 1) if args.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_factor)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        mlp_out = self.mlp(self.mlp_norm(x) * self.ln_factor)
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out
        return x


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.bos_id = args.bos_id
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.smear = SmearGate(args.model_dim)
        self.bigram = BigramHashEmbedding(args.bigram_vocab_size, args.bigram_dim, args.model_dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights(args)

    def _init_weights(self, args: type[Hyperparameters]) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        for name, module in self.named_modules():
            if not isinstance(module, CastedLinear) or name.startswith("bigram"):
                continue
            if module.zero_init:
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight, gain=1.0)

    def set_qat(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, CastedLinear):
                module.qat_mix.fill_(1.0 if on else 0.0)

    def forward_hidden(self, input_ids: Tensor) -> Tensor:
        doc_start = input_ids == self.bos_id
        x = self.tok_emb(input_ids).to(torch.bfloat16)
        x = x + self.bigram(input_ids, doc_start, x.dtype)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, doc_start)
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

    def head(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        return self.logit_softcap * torch.tanh(logits.float() / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.head(self.forward_hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# QUANTIZATION (int6 rows for matrices, int8 rows for embeddings)
# -----------------------------
#
# "GPTQ-lite": no Hessian inverse, only a search over clip quantiles per row, but the squared error of each column is
# weighted by the mean square of the activation it meets. The statistics come from a handful of train batches and are
# collected inside the 600 s, see RESERVE_SECONDS.

CLIP_QUANTILES = (1.0, 0.99999, 0.9999, 0.9995, 0.999, 0.995)
INT8_NAMES = ("tok_emb.weight", "bigram.embed.weight")
KEEP_FLOAT_MAX_NUMEL = 8192


def collect_input_moments(
    model: GPT, loader: DistributedTokenLoader, args: type[Hyperparameters], n_batches: int, grad_accum_steps: int
) -> dict[str, Tensor]:
    """Mean square of every input column of every linear layer."""
    sums: dict[str, Tensor] = {}
    handles = []

    def make_hook(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            m = x.square().reshape(-1, x.size(-1)).mean(dim=0)
            sums[name] = sums[name] + m if name in sums else m

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            handles.append(module.register_forward_pre_hook(make_hook(name + ".weight")))
    model.eval()
    with torch.no_grad():
        for _ in range(n_batches):
            x, _ = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            for part in x.split(16):
                model.forward_hidden(part)
    for handle in handles:
        handle.remove()
    if dist.is_available() and dist.is_initialized():
        for name in sorted(sums):
            dist.all_reduce(sums[name], op=dist.ReduceOp.SUM)
    for name, m in sums.items():
        sums[name] = m / m.mean().clamp_min(1e-12)
    return sums


def quantize_rows(w: Tensor, qmax: int, col_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    w = w.float()
    weight = torch.ones(w.size(1), device=w.device) if col_weight is None else col_weight.to(w.device)
    best_q = best_scale = best_err = None
    mag = w.abs()
    for quantile in CLIP_QUANTILES:
        clip = mag.amax(dim=1) if quantile >= 1.0 else torch.quantile(mag, quantile, dim=1)
        scale = (clip / qmax).clamp_min(1e-6).to(torch.float16)
        s = scale.float()[:, None]
        q = torch.clamp(torch.round(w / s), -qmax - 1, qmax)
        err = ((q * s - w).square() * weight[None, :]).sum(dim=1)
        if best_err is None:
            best_q, best_scale, best_err = q, scale, err
            continue
        better = err < best_err
        best_q = torch.where(better[:, None], q, best_q)
        best_scale = torch.where(better, scale, best_scale)
        best_err = torch.where(better, err, best_err)
    return best_q.to(torch.int8).contiguous(), best_scale.contiguous()


def quantize_state_dict(state: dict[str, Tensor], moments: dict[str, Tensor]) -> tuple[dict, dict[str, int]]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    passthrough: dict[str, Tensor] = {}
    stats = {"int6": 0, "int8": 0, "float": 0}
    for name, tensor in state.items():
        t = tensor.detach()
        is_control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
        if t.ndim != 2 or is_control or t.numel() <= KEEP_FLOAT_MAX_NUMEL:
            passthrough[name] = t.to(torch.float32 if is_control else torch.float16).cpu().contiguous()
            stats["float"] += t.numel()
            continue
        if name in INT8_NAMES:
            q, s = quantize_rows(t, 127, None)
            stats["int8"] += t.numel()
        else:
            q, s = quantize_rows(t, INT6_MAX, moments.get(name))
            stats["int6"] += t.numel()
        quantized[name] = q.cpu()
        scales[name] = s.cpu()
    obj = {"format": "int6_rows_v2", "quantized": quantized, "scales": scales, "passthrough": passthrough}
    return obj, stats


def dequantize_state_dict(obj: dict) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        out[name] = q.float() * obj["scales"][name].float()[:, None]
    for name, t in obj["passthrough"].items():
        out[name] = t.float()
    return out


def compress_blob(raw: bytes, level: int) -> bytes:
    if _COMPRESSOR == "zstd":
        return zstandard.ZstdCompressor(level=level).compress(raw)
    return zlib.compress(raw, 9)


def decompress_blob(blob: bytes) -> bytes:
    if _COMPRESSOR == "zstd":
        return zstandard.ZstdDecompressor().decompress(blob)
    return zlib.decompress(blob)


# -----------------------------
# BACKWARD-LOOKING N-GRAM CACHE
# -----------------------------


class NgramCache:
    """Hashed counts of the orders min_order..max_order, filled from tokens that have been scored.

    Two tables per order: how often a context was seen, and how often it was seen with a given next token. A query never
    takes the next token; it returns the counts of all vocab_size candidates from the longest context that is known well
    enough, together with how often that context was seen. What to do with them is up to `blend`.

    Memory: 6 orders * 2 tables * 4 M buckets * 4 bytes = 192 MiB of host memory per rank.
    """

    SALT = 0x9E3779B97F4A7C15
    MULT = np.uint64(0x100000001B3)
    BLOCK = 256  # 256 x 1024 uint32 keys stay in L2

    def __init__(self, vocab_size: int, min_order: int, max_order: int, bits: int, min_count: int):
        if not 2 <= min_order <= max_order:
            raise ValueError(f"bad n-gram orders {min_order}..{max_order}")
        self.vocab_size = vocab_size
        self.orders = list(range(max_order, min_order - 1, -1))
        self.size = 1 << bits
        self.mask = np.uint64(self.size - 1)
        self.min_count = min_count
        self.ctx_counts = {n: np.zeros(self.size, dtype=np.uint32) for n in self.orders}
        self.pair_counts = {n: np.zeros(self.size, dtype=np.uint32) for n in self.orders}
        # multiplication by an odd number is a bijection modulo a power of two: no two tokens share a key
        keys = (np.arange(vocab_size, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B1)
        self.vocab_keys = (keys & self.mask).astype(np.uint32)
        self.tokens_seen = 0

    def context_hash(self, toks: np.ndarray, pos: np.ndarray, n: int) -> np.ndarray:
        """Bucket of the n-1 tokens before each position. toks[pos] itself is not read."""
        h = np.full(pos.shape, (self.SALT * n) & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
        for back in range(1, n):
            h = (h ^ toks[pos - back].astype(np.uint64)) * self.MULT
        h ^= h >> np.uint64(29)
        return (h & self.mask).astype(np.uint32)

    def lookup(self, toks: np.ndarray, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Candidate counts (len(pos), vocab), times the context was seen, order used (0: none)."""
        counts = np.zeros((pos.size, self.vocab_size), dtype=np.float32)
        seen = np.zeros(pos.size, dtype=np.float32)
        order = np.zeros(pos.size, dtype=np.int64)
        todo = np.arange(pos.size)
        for n in self.orders:
            ok = todo[pos[todo] >= n - 1]
            if ok.size == 0:
                continue
            h = self.context_hash(toks, pos[ok], n)
            c = self.ctx_counts[n][h]
            hit = c >= self.min_count
            if not hit.any():
                continue
            rows, hh, cc = ok[hit], h[hit], c[hit]
            table = self.pair_counts[n]
            for i in range(0, rows.size, self.BLOCK):
                block = slice(i, i + self.BLOCK)
                keys = hh[block, None] ^ self.vocab_keys[None, :]
                # a candidate cannot have followed more often than the context occurred; the rest is collisions
                counts[rows[block]] = np.minimum(table[keys], cc[block, None])
            seen[rows] = cc
            order[rows] = n
            todo = np.setdiff1d(todo, rows, assume_unique=True)
            if todo.size == 0:
                break
        return counts, seen, order

    def update(self, toks: np.ndarray, lo: int, hi: int) -> None:
        """Adds the tokens toks[lo:hi]. Call it only once they are scored."""
        pos = np.arange(lo, hi)
        for n in self.orders:
            p = pos[pos >= n - 1]
            if p.size == 0:
                continue
            h = self.context_hash(toks, p, n)
            pair = h ^ self.vocab_keys[toks[p]]
            self.ctx_counts[n] += np.bincount(h, minlength=self.size).astype(np.uint32)
            self.pair_counts[n] += np.bincount(pair, minlength=self.size).astype(np.uint32)
        self.tokens_seen += hi - lo


def blend(args: type[Hyperparameters], logits: Tensor, counts: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mixture of the model and the cache over the whole vocabulary; also the weight of the cache.

    The weight depends on how often the context was seen and on how unsure the model is, both known before the target.
    """
    logp = F.log_softmax(logits.float(), dim=-1)
    p = logp.exp()
    entropy = -(p * logp).sum(dim=-1)
    if args.ngram_alpha_mode == "entropy":
        ramp = torch.sigmoid(args.ngram_entropy_slope * (entropy - args.ngram_entropy_center))
        alpha = args.ngram_alpha_min + (args.ngram_alpha_max - args.ngram_alpha_min) * ramp
    else:
        alpha = torch.full_like(entropy, args.ngram_alpha)
    lam = alpha * seen / (seen + args.ngram_conf_k)
    total = counts.sum(dim=-1, keepdim=True)
    p_ng = counts / total.clamp_min(1.0)
    mixed = (1.0 - lam)[:, None] * p + lam[:, None] * p_ng
    return mixed, lam


# -----------------------------
# EVALUATION
# -----------------------------


def bits_per_byte(nll_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    val_loss = (nll_sum / token_count).item()
    bits_per_token = val_loss / math.log(2.0)
    tokens_per_byte = token_count.item() / byte_count.item()
    return val_loss, bits_per_token * tokens_per_byte


def reduce_sums(*sums: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for s in sums:
            dist.all_reduce(s, op=dist.ReduceOp.SUM)


def eval_val(
    args: type[Hyperparameters],
    model: GPT,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    grad_accum_steps: int,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Plain evaluation: the split cut into rows of eval_seq_len, every row from an empty context.

    The last row is padded on the right (the model is causal, so that changes nothing) and its padding is not counted.
    """
    seq_len = args.eval_seq_len
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    if local_batch_tokens < seq_len:
        raise ValueError("VAL_BATCH_SIZE must provide at least one sequence per rank")
    local_batch_seqs = local_batch_tokens // seq_len
    total = val_tokens.numel() - 1
    total_seqs = (total + seq_len - 1) // seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    nll_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    for batch_start in range(seq_start, seq_end, local_batch_seqs):
        batch_end = min(batch_start + local_batch_seqs, seq_end)
        raw_start = batch_start * seq_len
        raw_end = min(batch_end * seq_len, total)
        n = raw_end - raw_start
        local = val_tokens[raw_start : raw_end + 1].to(device=device, dtype=torch.int64)
        x = torch.zeros(local_batch_seqs * seq_len, dtype=torch.int64, device=device)
        x[:n] = local[:-1]
        with torch.inference_mode():
            logits = logits_fn(x.reshape(local_batch_seqs, seq_len))
        flat = logits.reshape(-1, logits.size(-1))[:n]
        losses = F.cross_entropy(flat.float(), local[1:], reduction="none")
        nll_sum += losses.to(torch.float64).sum()
        token_count += n
        byte_count += target_bytes(local[:-1], local[1:], luts).sum()

    reduce_sums(nll_sum, token_count, byte_count)
    model.train()
    return bits_per_byte(nll_sum, token_count, byte_count)


def plan_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (start, first scored offset, length). The scored parts tile range(total): no gap, no overlap."""
    windows: list[tuple[int, int, int]] = []
    for ws in range(0, total, stride):
        if ws > 0 and ws + seq_len - stride >= total:
            break
        wlen = min(ws + seq_len, total) - ws
        s = 0 if ws == 0 else seq_len - stride
        windows.append((ws, s, wlen))
    return windows


def same_on_all_ranks(flag: bool, device: torch.device) -> bool:
    # rank 0 decides, so that one slow rank cannot end up with other tables than the rest
    t = torch.tensor([1 if flag else 0], device=device, dtype=torch.int32)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(t, src=0)
    return bool(t.item())


def make_window_batch(
    batch: list[tuple[int, int, int]], n_rows: int, seq_len: int, val_tokens: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, mask of the scored positions and index of each target in the stream, all (n_rows, seq_len)."""
    x = torch.zeros(n_rows, seq_len, dtype=torch.int64)
    y = torch.zeros(n_rows, seq_len, dtype=torch.int64)
    scored = torch.zeros(n_rows, seq_len, dtype=torch.bool)
    where = torch.zeros(n_rows, seq_len, dtype=torch.int64)
    for i, (ws, s, wlen) in enumerate(batch):
        span = val_tokens[ws : ws + wlen + 1].to(torch.int64)
        x[i, :wlen] = span[:-1]
        y[i, :wlen] = span[1:]
        scored[i, s:wlen] = True
        where[i, :wlen] = torch.arange(ws + 1, ws + wlen + 1)
    return x.to(device), y.to(device), scored.to(device), where


def eval_val_sliding(
    args: type[Hyperparameters],
    model: GPT,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    stride: int,
    cache: NgramCache | None = None,
    deadline: float = float("inf"),
    log0=print,
) -> dict[str, float]:
    """Sliding window evaluation, every token once with at least seq_len - stride tokens of context (after the start).

    With a cache: the windows are taken in chunks of ngram_chunk_windows. Within a chunk the ranks share the windows and
    query the cache as the earlier chunks left it; when all have booked their losses, every rank adds the whole chunk, so
    that the tables are the same everywhere. The loss of the model alone falls out on the way and is reported beside it.
    """
    seq_len = args.eval_seq_len
    total = val_tokens.numel() - 1
    windows = plan_windows(total, seq_len, stride)
    toks_np = val_tokens.numpy().astype(np.int64)
    batch_seqs = args.eval_batch_seqs

    nll_sum = torch.zeros((), device=device, dtype=torch.float64)
    lm_nll_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    lam_sum = torch.zeros((), device=device, dtype=torch.float64)
    hit_count = torch.zeros((), device=device, dtype=torch.float64)
    order_hist = np.zeros(args.ngram_max_order + 1, dtype=np.int64)

    model.eval()
    chunk_windows = args.ngram_chunk_windows
    n_chunks = (len(windows) + chunk_windows - 1) // chunk_windows
    t_start = time.perf_counter()
    for ci in range(n_chunks):
        group = windows[ci * chunk_windows : (ci + 1) * chunk_windows]
        mine = group[len(group) * rank // world_size : len(group) * (rank + 1) // world_size]
        # running late: the rest goes without the cache
        use_cache = cache is not None and same_on_all_ranks(time.perf_counter() < deadline, device)

        for b in range(0, len(mine), batch_seqs):
            batch = mine[b : b + batch_seqs]
            x, y, scored, where = make_window_batch(batch, batch_seqs, seq_len, val_tokens, device)
            with torch.inference_mode():
                logits = logits_fn(x)
            z = logits[scored].float()
            tgt = y[scored]
            prev = x[scored]
            lm_nll = F.cross_entropy(z, tgt, reduction="none").to(torch.float64)
            nll = lm_nll
            if use_cache and cache.tokens_seen > 0:
                pos = where[scored.cpu()].numpy()
                counts_np, seen_np, order_np = cache.lookup(toks_np, pos)
                counts = torch.from_numpy(counts_np).to(device, non_blocking=True)
                seen = torch.from_numpy(seen_np).to(device, non_blocking=True)
                mixed, lam = blend(args, z, counts, seen)
                p_tgt = mixed.gather(1, tgt[:, None]).squeeze(1)
                nll = -torch.log(p_tgt.to(torch.float64))
                lam_sum += lam.to(torch.float64).sum()
                hit_count += (seen > 0).sum()
                order_hist += np.bincount(order_np, minlength=order_hist.size)
            nll_sum += nll.sum()
            lm_nll_sum += lm_nll.sum()
            token_count += tgt.numel()
            byte_count += target_bytes(prev, tgt, luts).sum()

        if cache is not None:
            if dist.is_available() and dist.is_initialized():
                dist.barrier()
            lo = group[0][0] + group[0][1] + 1
            hi = group[-1][0] + group[-1][2] + 1
            cache.update(toks_np, lo, hi)

        if rank == 0 and (ci % 16 == 0 or ci == n_chunks - 1):
            running = nll_sum.item() / max(token_count.item(), 1.0) / math.log(2.0)
            running *= token_count.item() / max(byte_count.item(), 1.0)
            log0(
                f"  sliding chunk:{ci + 1}/{n_chunks} rank0_bpb:{running:.5f} "
                f"time:{time.perf_counter() - t_start:.1f}s"
            )

    reduce_sums(nll_sum, lm_nll_sum, token_count, byte_count, lam_sum, hit_count)
    val_loss, val_bpb = bits_per_byte(nll_sum, token_count, byte_count)
    lm_loss, lm_bpb = bits_per_byte(lm_nll_sum, token_count, byte_count)
    if token_count.item() != total:
        raise RuntimeError(f"scored {token_count.item():.0f} tokens of {total}")
    model.train()
    return {
        "val_loss": val_loss,
        "val_bpb": val_bpb,
        "lm_loss": lm_loss,
        "lm_bpb": lm_bpb,
        "tokens": token_count.item(),
        "bytes": byte_count.item(),
        "hit_rate": (hit_count / token_count).item(),
        "mean_lam": (lam_sum / token_count).item(),
        "order_hist": order_hist.tolist(),
    }


# -----------------------------
# WEIGHT AVERAGING
# -----------------------------


class WeightAverager:
    """EMA over all steps, and an average of EMA snapshots over the last stretch of the warmdown ("tight SWA")."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.ema = {name: p.detach().float().clone() for name, p in model.state_dict().items()}
        self.swa: dict[str, Tensor] | None = None
        self.swa_count = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        state = model.state_dict()
        names = list(self.ema)
        torch._foreach_lerp_([self.ema[n] for n in names], [state[n].float() for n in names], 1.0 - self.decay)

    @torch.no_grad()
    def snapshot(self) -> None:
        if self.swa is None:
            self.swa = {name: t.clone() for name, t in self.ema.items()}
        else:
            for name, t in self.ema.items():
                self.swa[name].add_(t)
        self.swa_count += 1

    def ema_state(self) -> dict[str, Tensor]:
        return dict(self.ema)

    def swa_state(self) -> dict[str, Tensor]:
        assert self.swa is not None
        return {name: t / self.swa_count for name, t in self.swa.items()}


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: type[Hyperparameters], base_model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    # - token and bigram embeddings: AdamW
    # - 2D matrices of the blocks (and the bigram projection): Muon
    # - vectors, gains, skip weights: AdamW at scalar lr
    embed_params = [base_model.tok_emb.weight, base_model.bigram.embed.weight]
    matrix_params: list[Tensor] = [base_model.bigram.proj.weight]
    scalar_params: list[Tensor] = [base_model.skip_weights, base_model.smear.gate, base_model.bigram.scale]
    for name, p in base_model.blocks.named_parameters():
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            matrix_params.append(p)
        else:
            scalar_params.append(p)
    n_assigned = sum(p.numel() for p in embed_params + matrix_params + scalar_params)
    n_total = sum(p.numel() for p in base_model.parameters())
    if n_assigned != n_total:
        raise RuntimeError(f"{n_total - n_assigned} parameters have no optimizer")

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
        wd=args.muon_wd,
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
    return [optimizer_embed, optimizer_muon, optimizer_scalar], optimizer_muon


def lr_scale(args: type[Hyperparameters], step: int, elapsed_ms: float, max_wallclock_ms: float | None) -> float:
    """Flat, then linear to zero over the last warmdown_iters steps, as far as the clock lets us foresee them."""
    if args.warmdown_iters <= 0:
        return 1.0
    if max_wallclock_ms is None:
        warmdown_start = max(args.iterations - args.warmdown_iters, 0)
        if step < warmdown_start:
            return 1.0
        return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(max_wallclock_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


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
    if int(sp.bos_id()) != args.bos_id:
        raise ValueError(f"BOS_ID={args.bos_id} does not match tokenizer bos_id={int(sp.bos_id())}")
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

    base_model = GPT(args).to(device)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )
    optimizers, optimizer_muon = build_optimizers(args, base_model)

    n_params = sum(p.numel() for p in base_model.parameters())
    xsa_layers = [i for i, block in enumerate(base_model.blocks) if block.attn.use_xsa]
    log0(f"model_params:{n_params}")
    log0(f"XSA:last_{args.xsa_last_n} active_layers:{xsa_layers}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
    log0("sdp_backends:cudnn=False flash=True mem_efficient=False math=False")
    log0(f"attention_mode:gqa num_heads:{args.num_heads} num_kv_heads:{args.num_kv_heads} rope_dims:{args.rope_dims}")
    log0(
        f"tie_embeddings:True embed_lr:{args.tied_embed_lr} matrix_lr:{args.matrix_lr} scalar_lr:{args.scalar_lr} "
        f"muon_wd:{args.muon_wd} adam_wd:{args.adam_wd}"
    )
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f} reserve_seconds:{args.reserve_seconds:.1f}"
    )
    log0(f"seed:{args.seed}")

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # The loop stops early by reserve_seconds, so that what follows it is still within the cap.
    max_wallclock_ms = (
        1000.0 * (args.max_wallclock_seconds - args.reserve_seconds) if args.max_wallclock_seconds > 0 else None
    )

    # Warmup primes the compiled forward/backward/optimizer paths, then we restore the initial weights and optimizer
    # state so measured training starts from the true init.
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

    averager = WeightAverager(base_model, args.ema_decay)
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
            val_loss, val_bpb = eval_val(
                args, base_model, logits_fn, rank, world_size, device, grad_accum_steps, val_tokens, luts
            )
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
        scale = lr_scale(args, step, elapsed_ms, max_wallclock_ms)
        if args.late_qat_threshold > 0 and not qat_on and step > 0 and scale < args.late_qat_threshold:
            qat_on = True
            base_model.set_qat(True)
            log0(f"late_qat:enabled step:{step} scale:{scale:.4f}")

        zero_grad_all()
        train_loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
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

        averager.update(base_model)
        if args.swa_enabled and scale < args.swa_start_scale and step > 0 and step % args.swa_every == 0:
            if averager.swa_count == 0:
                log0(f"swa:start step:{step}")
            averager.snapshot()

        step += 1
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

    log0(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # -----------------------------
    # AVERAGE + ACTIVATION STATISTICS (still on the training clock)
    # -----------------------------

    torch.cuda.synchronize()
    t_tail = time.perf_counter()
    if averager.swa_count > 0:
        log0(f"swa:applying average of {averager.swa_count} EMA snapshots")
        final_state = averager.swa_state()
    else:
        log0("ema:applying EMA weights")
        final_state = averager.ema_state()
    base_model.set_qat(False)
    base_model.load_state_dict(final_state, strict=True)
    moments = collect_input_moments(base_model, train_loader, args, args.calib_batches, grad_accum_steps)
    torch.cuda.synchronize()
    tail_ms = 1000.0 * (time.perf_counter() - t_tail)
    log0(f"calib:{args.calib_batches} train batches took {tail_ms:.0f}ms, train+calib {training_time_ms + tail_ms:.0f}ms")
    if args.max_wallclock_seconds > 0 and training_time_ms + tail_ms > 1000.0 * args.max_wallclock_seconds:
        raise RuntimeError("over the training cap, raise RESERVE_SECONDS")

    # -----------------------------
    # SERIALIZATION
    # -----------------------------

    code_bytes = len(code.encode("utf-8"))
    if master_process:
        quant_obj, quant_stats = quantize_state_dict(base_model.state_dict(), moments)
        quant_buf = io.BytesIO()
        torch.save(quant_obj, quant_buf)
        quant_raw = quant_buf.getvalue()
        quant_blob = compress_blob(quant_raw, args.zstd_level)
        with open(args.artifact_path, "wb") as f:
            f.write(quant_blob)
        model_bytes = os.path.getsize(args.artifact_path)
        total_bytes = model_bytes + code_bytes
        log0(f"quant_stats:{quant_stats} raw_torch:{len(quant_raw)}")
        log0(f"Serialized model int6+{_COMPRESSOR}: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size int6+{_COMPRESSOR}: {total_bytes} bytes")
        if total_bytes > 16_000_000:
            log0(f"WARNING: {total_bytes - 16_000_000} bytes over the limit")
    if distributed:
        dist.barrier()

    # -----------------------------
    # ROUNDTRIP + FINAL EVALUATION (from the file, on the evaluation clock)
    # -----------------------------

    t_eval = time.perf_counter()
    with open(args.artifact_path, "rb") as f:
        blob_disk = f.read()
    loaded = torch.load(io.BytesIO(decompress_blob(blob_disk)), map_location="cpu", weights_only=True)
    eval_model = GPT(args).to(device)
    eval_model.load_state_dict(dequantize_state_dict(loaded), strict=True)
    eval_model.eval()
    eval_logits_fn = torch.compile(eval_model.forward_logits, dynamic=False, fullgraph=True)

    torch.cuda.synchronize()
    t_q = time.perf_counter()
    q_val_loss, q_val_bpb = eval_val(
        args, eval_model, eval_logits_fn, rank, world_size, device, grad_accum_steps, val_tokens, luts
    )
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_q):.0f}ms"
    )
    log0(f"final_int6_roundtrip_exact val_loss:{q_val_loss:.8f} val_bpb:{q_val_bpb:.8f}")

    cache = None
    if args.ngram_enabled:
        cache = NgramCache(
            args.vocab_size, args.ngram_min_order, args.ngram_max_order, args.ngram_bits, args.ngram_min_count
        )
        log0(
            f"ngram_cache:orders {args.ngram_min_order}-{args.ngram_max_order} buckets:{cache.size} "
            f"alpha:{args.ngram_alpha_mode} chunk_windows:{args.ngram_chunk_windows}"
        )
    torch.cuda.synchronize()
    t_slide = time.perf_counter()
    result = eval_val_sliding(
        args,
        eval_model,
        eval_logits_fn,
        rank,
        world_size,
        device,
        val_tokens,
        luts,
        stride=args.eval_stride,
        cache=cache,
        deadline=t_eval + args.eval_max_seconds - 100.0,
        log0=log0,
    )
    torch.cuda.synchronize()
    slide_ms = 1000.0 * (time.perf_counter() - t_slide)
    log0(
        f"final_int6_sliding_window val_loss:{result['lm_loss']:.4f} val_bpb:{result['lm_bpb']:.4f} "
        f"stride:{args.eval_stride} eval_time:{slide_ms:.0f}ms"
    )
    log0(f"final_int6_sliding_window_exact val_loss:{result['lm_loss']:.8f} val_bpb:{result['lm_bpb']:.8f}")
    if cache is not None:
        log0(
            f"ngram_stats:hit_rate:{result['hit_rate']:.4f} mean_lambda:{result['mean_lam']:.4f} "
            f"orders:{result['order_hist']} tokens_in_cache:{cache.tokens_seen}"
        )
        log0(
            f"final_int6_sliding_ngram val_loss:{result['val_loss']:.4f} val_bpb:{result['val_bpb']:.4f} "
            f"stride:{args.eval_stride} eval_time:{slide_ms:.0f}ms"
        )
        log0(f"final_int6_sliding_ngram_exact val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}")
    log0(f"scored tokens:{result['tokens']:.0f} bytes:{result['bytes']:.0f}")
    log0(f"total eval time: {time.perf_counter() - t_eval:.1f}s")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
