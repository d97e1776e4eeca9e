"""
train_gpt.py -- Parameter Golf, 11L x 512, int6 GPTQ + zstd, EMA, sliding window, score-first TTT.

Grown out of the baseline by many small merges. One file, everything is set from the environment:
    torchrun --standalone --nproc_per_node=8 train_gpt.py
The final number is the line `final_ttt_exact`.
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

    # Validation cadence. In-training validation is printed and used for nothing.
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
    # Seconds of the training cap that are kept back for calibration, GPTQ and packing.
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 40.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    bos_id = int(os.environ.get("BOS_ID", 1))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))

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
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # Quantisation.
    calib_batches = int(os.environ.get("CALIB_BATCHES", 48))
    calib_batch_seqs = int(os.environ.get("CALIB_BATCH_SEQS", 8))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    compressor = os.environ.get("COMPRESSOR", "zstd")
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))

    # Test-time training: score a chunk, then learn from it.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32_768))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 2))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    # Past this many seconds the TTT stops learning and only scores.
    ttt_learn_seconds = float(os.environ.get("TTT_LEARN_SECONDS", 420.0))

    # Bigram cache over already scored chunks, mixed with the model over the whole vocabulary.
    cache_enabled = bool(int(os.environ.get("CACHE_ENABLED", "1")))
    cache_alpha = float(os.environ.get("CACHE_ALPHA", 24.0))
    cache_decay = float(os.environ.get("CACHE_DECAY", 0.998))
    cache_weight = float(os.environ.get("CACHE_WEIGHT", 0.06))
    cache_entropy_mid = float(os.environ.get("CACHE_ENTROPY_MID", 3.0))


SIZE_LIMIT = 16_000_000

CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear",
    "bigram.scale",
)

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
                if wd > 0:
                    p.data.mul_(1.0 - lr * wd)
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC EVALUATION: BYTES PER TOKEN
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


def token_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    # Bytes of the original text that each target token stands for. The space that a piece
    # carries in front counts once, and not at all after a document boundary.
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    out = base_bytes_lut[tgt_ids].to(torch.int32)
    out += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.int32)
    return out.to(torch.float64)


# -----------------------------
# DATA LOADING
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes_ = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    # SHARD HEADER INTS & SHARD_MAGIC
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * token_bytes_
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
    # Each call consumes a contiguous chunk from the shared token stream, then slices out
    # one disjoint span per rank. The extra "+1" token lets us build (x, y) by shifting.
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
            control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if (param.ndim < 2 or control) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Tables are made once for the longest sequence, so that no cache is built inside a forward.
    def __init__(self, dim: int, base: float, max_seq_len: int):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        freqs = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", freqs.cos()[None, None, :, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, None, :, :], persistent=False)

    def forward(self, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.cos[:, :, :seq_len].to(dtype), self.sin[:, :, :seq_len].to(dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    x_rope = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((x_rope, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, use_xsa: bool):
        super().__init__()
        dim, num_heads, num_kv_heads = args.model_dim, args.num_heads, args.num_kv_heads
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = args.rope_dims
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), args.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(args.rope_dims, args.rope_base, max(args.train_seq_len, args.eval_seq_len))

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        # Exclusive self attention: remove the component along the token's own value.
        B, H, T, D = y.shape
        groups = H // self.num_kv_heads
        y_g = y.reshape(B, self.num_kv_heads, groups, T, D)
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        return (y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, H, T, D)

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
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        if self.use_xsa:
            y = self._xsa(y, v)
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    # leaky-relu^2 MLP, the negative half keeps a little gradient
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
    # Mixes the previous token's embedding in; a document's first token (BOS) takes nothing.
    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.gate = nn.Parameter(torch.full((dim,), 3.0, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(dtype=x.dtype)
        x_prev = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        inside = (input_ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        inside = torch.cat((torch.zeros_like(inside[:, :1]), inside[:, 1:]), dim=1)
        return x + inside * (1.0 - g) * (x_prev - x)


class BigramHashEmbedding(nn.Module):
    # A hash of (previous token, token) picks a row of a small table that is added to the embedding.
    def __init__(self, buckets: int, bigram_dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.embed = nn.Embedding(buckets, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bigram_hash(self, input_ids: Tensor) -> Tensor:
        t = input_ids.to(torch.int64)
        mod = self.buckets - 1
        prev = torch.cat((torch.zeros_like(t[:, :1]), t[:, :-1]), dim=1)
        h = torch.bitwise_xor(36313 * t, 27191 * prev) % mod
        first = t == self.bos_id
        first[:, 0] = True
        return torch.where(first, torch.full_like(h, mod), h)

    def forward(self, input_ids: Tensor) -> Tensor:
        e = self.proj(self.embed(self.bigram_hash(input_ids)))
        return e * self.scale.to(dtype=e.dtype)


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
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
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
        self._init_weights(args.num_layers)

    def _init_weights(self, num_layers: int) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
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

    def head(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.head(self.hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.float().flatten(0, 1), target_ids.reshape(-1), reduction="mean")


class EMA:
    # Exponential moving average of all parameters, kept in fp32 on the device.
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {n: p.detach().float().clone() for n, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for n, p in model.state_dict().items():
            self.shadow[n].mul_(self.decay).add_(p.detach().float(), alpha=1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({n: t.to(dtype=current[n].dtype) for n, t in self.shadow.items()}, strict=True)


# -----------------------------
# QUANTISATION: GPTQ INT6 + ZSTD / LZMA
# -----------------------------


def collect_hessians(
    args: Hyperparameters, model: GPT, loader: DistributedTokenLoader, world_size: int, device: torch.device
) -> dict[str, Tensor]:
    # H = sum of x x^T at the input of every block matrix, over batches of training text.
    hessians: dict[str, Tensor] = {}
    handles = []

    def make_hook(key: str):
        def hook(module, inputs, output):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            hessians[key].addmm_(x.T, x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and name.startswith("blocks."):
            cols = module.weight.size(1)
            hessians[name + ".weight"] = torch.zeros(cols, cols, device=device, dtype=torch.float32)
            handles.append(module.register_forward_hook(make_hook(name + ".weight")))
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(max(1, args.calib_batches // world_size)):
            x, _ = loader.next_batch(args.calib_batch_seqs * args.train_seq_len * world_size, args.train_seq_len, 1)
            model.hidden(x)
    for handle in handles:
        handle.remove()
    model.train(was_training)
    if dist.is_available() and dist.is_initialized():
        for h in hessians.values():
            dist.all_reduce(h, op=dist.ReduceOp.SUM)
    return hessians


def row_scales(w: Tensor, qmax: int) -> Tensor:
    # One scale per row: the clip quantile with the smallest squared error of plain rounding.
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best_scale = torch.ones(w.size(0), device=w.device)
    for quantile in (1.0, 0.9999, 0.9995, 0.999, 0.998):
        clip = torch.quantile(w.abs(), quantile, dim=1).clamp_min(1e-8)
        scale = clip / qmax
        q = torch.clamp(torch.round(w / scale[:, None]), -qmax, qmax)
        err = (q * scale[:, None] - w).square().sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.to(torch.float16).float()


def gptq_quantize(w: Tensor, hessian: Tensor, bits: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    # Column by column with error feedback through the Cholesky factor of the inverse Hessian.
    qmax = 2 ** (bits - 1) - 1
    w = w.float().clone()
    rows, cols = w.shape
    scale = row_scales(w, qmax)
    h = hessian.clone()
    dead = torch.diag(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(torch.diag(h), descending=True)
    inverse_order = torch.argsort(order)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(damp * torch.diag(h).mean())
    try:
        hinv = torch.cholesky_inverse(torch.linalg.cholesky(h))
        hinv = torch.linalg.cholesky(hinv, upper=True)
    except torch.linalg.LinAlgError:
        q = torch.clamp(torch.round(w / scale[:, None]), -qmax, qmax)
        return q[:, inverse_order].to(torch.int8), scale.to(torch.float16)
    q_all = torch.zeros_like(w)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        w_block = w[:, start:end].clone()
        err_block = torch.zeros_like(w_block)
        hinv_block = hinv[start:end, start:end]
        for j in range(end - start):
            column = w_block[:, j]
            q = torch.clamp(torch.round(column / scale), -qmax, qmax)
            q_all[:, start + j] = q
            err = (column - q * scale) / hinv_block[j, j]
            w_block[:, j:] -= err[:, None] * hinv_block[j, j:][None, :]
            err_block[:, j] = err
        w[:, end:] -= err_block @ hinv[start:end, end:]
    return q_all[:, inverse_order].to(torch.int8), scale.to(torch.float16)


def quantize_state_dict(args: Hyperparameters, state: dict[str, Tensor], hessians: dict[str, Tensor]) -> dict:
    # Block matrices: GPTQ at matrix_bits. Embeddings: int8 per row. The small rest: fp16.
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    passthrough: dict[str, Tensor] = {}
    for name, tensor in state.items():
        t = tensor.detach()
        control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
        if name in hessians:
            q, s = gptq_quantize(t, hessians[name], args.matrix_bits, args.gptq_block, args.gptq_damp)
        elif t.ndim == 2 and not control:
            s = row_scales(t.float(), 127)
            q = torch.clamp(torch.round(t.float() / s[:, None]), -127, 127).to(torch.int8)
            s = s.to(torch.float16)
        else:
            passthrough[name] = t.to(torch.float16).cpu().contiguous()
            continue
        quantized[name] = q.cpu().contiguous()
        scales[name] = s.cpu().contiguous()
    return {"format": "int6_gptq_v3", "quantized": quantized, "scales": scales, "passthrough": passthrough}


def dequantize_state_dict(packed: dict) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in packed["quantized"].items():
        out[name] = q.float() * packed["scales"][name].float()[:, None]
    for name, t in packed["passthrough"].items():
        out[name] = t.float()
    return out


def compress_blob(raw: bytes, compressor: str) -> bytes:
    if compressor == "zstd" and zstandard is not None:
        return b"Z" + zstandard.ZstdCompressor(level=22).compress(raw)
    return b"X" + lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def decompress_blob(blob: bytes) -> bytes:
    if blob[:1] == b"Z":
        return zstandard.ZstdDecompressor().decompress(blob[1:])
    return lzma.decompress(blob[1:])


def write_artifact(args: Hyperparameters, packed: dict, code: str, log0) -> int:
    buf = io.BytesIO()
    torch.save(packed, buf)
    blob = compress_blob(buf.getvalue(), args.compressor)
    Path(args.artifact_path).write_bytes(blob)
    model_bytes = os.path.getsize(args.artifact_path)
    code_bytes = len(code.encode("utf-8"))
    total_bytes = model_bytes + code_bytes
    log0(f"Serialized model int6+{args.compressor}: {model_bytes} bytes (raw {buf.tell()})")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size: {total_bytes} bytes")
    if total_bytes > SIZE_LIMIT:
        raise RuntimeError(f"submission of {total_bytes} bytes is over the limit of {SIZE_LIMIT}")
    return total_bytes


def read_artifact(args: Hyperparameters, device: torch.device) -> GPT:
    packed = torch.load(io.BytesIO(decompress_blob(Path(args.artifact_path).read_bytes())), map_location="cpu")
    model = GPT(args).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(model)
    state = dequantize_state_dict(packed)
    current = model.state_dict()
    model.load_state_dict({n: t.to(dtype=current[n].dtype) for n, t in state.items()}, strict=True)
    return model


# -----------------------------
# EVALUATION
# -----------------------------


def plan_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    # (start, first scored target, end) so that every target 0..total-1 is scored in exactly one window.
    windows = [(0, 0, min(seq_len, total))]
    done = windows[0][2]
    while done < total:
        end = min(done + stride, total)
        windows.append((max(0, end - seq_len), done, end))
        done = end
    return windows


def rank_share(items: list, rank: int, world_size: int) -> list:
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def make_window_batch(
    val_tokens: Tensor, windows: list[tuple[int, int, int]], seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    # Short windows are padded on the right, where causal attention cannot see it.
    x = torch.zeros(len(windows), seq_len, dtype=torch.int64)
    y = torch.zeros(len(windows), seq_len, dtype=torch.int64)
    mask = torch.zeros(len(windows), seq_len, dtype=torch.bool)
    for i, (start, first, end) in enumerate(windows):
        span = val_tokens[start : end + 1].to(torch.int64)
        x[i, : end - start] = span[:-1]
        y[i, : end - start] = span[1:]
        mask[i, first - start : end - start] = True
    return x.to(device), y.to(device), mask.to(device)


class Score:
    # Sums of nats, tokens and bytes on this rank; `result` reduces them over all ranks.
    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)

    def add(self, nll: Tensor, n_bytes: Tensor) -> None:
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += nll.numel()
        self.sums[2] += n_bytes.sum()

    def result(self, expected_tokens: int) -> tuple[float, float]:
        sums = self.sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        loss_sum, token_count, byte_count = (float(v) for v in sums.tolist())
        if int(token_count) != expected_tokens:
            raise RuntimeError(f"scored {int(token_count)} tokens, expected {expected_tokens}")
        return loss_sum / token_count, loss_sum / math.log(2.0) / byte_count


def eval_val_sliding(
    args: Hyperparameters,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    stride: int,
) -> tuple[float, float]:
    # Fixed predictor: no state is built from what is scored. stride == eval_seq_len: plain blocks.
    total = val_tokens.numel() - 1
    mine = rank_share(plan_windows(total, args.eval_seq_len, stride), rank, world_size)
    score = Score(device)
    with torch.no_grad():
        for i in range(0, len(mine), args.eval_batch_seqs):
            x, y, mask = make_window_batch(val_tokens, mine[i : i + args.eval_batch_seqs], args.eval_seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = F.cross_entropy(logits[mask].float(), y[mask], reduction="none")
            score.add(nll, token_bytes(x[mask], y[mask], luts))
    return score.result(total)


class BigramCache:
    # Counts of (token, next token) over chunks that are already scored, exact, one row per token.
    # A row is smoothed with the unigram counts and divided by its own sum: a distribution over V.
    def __init__(self, args: Hyperparameters, device: torch.device):
        self.alpha = args.cache_alpha
        self.decay = args.cache_decay
        self.weight = args.cache_weight
        self.entropy_mid = args.cache_entropy_mid
        self.vocab_size = args.vocab_size
        self.counts = torch.zeros(args.vocab_size, args.vocab_size, device=device, dtype=torch.float32)
        self.seen_tokens = 0

    def update(self, tokens: Tensor) -> None:
        pair = tokens[:-1] * self.vocab_size + tokens[1:]
        new = torch.bincount(pair, minlength=self.vocab_size**2).to(torch.float32)
        self.counts.mul_(self.decay).add_(new.view(self.vocab_size, self.vocab_size))
        self.seen_tokens += int(pair.numel())

    def probs(self, prev_ids: Tensor) -> Tensor:
        unigram = self.counts.sum(dim=0) + 1.0
        unigram = unigram / unigram.sum()
        rows = self.counts[prev_ids] + self.alpha * unigram[None, :]
        return rows / rows.sum(dim=-1, keepdim=True)

    def mix_nll(self, logits: Tensor, prev_ids: Tensor, targets: Tensor) -> Tensor:
        # The weight is a function of the model's entropy, known before the target is.
        log_p = F.log_softmax(logits.float(), dim=-1)
        if self.seen_tokens == 0:
            return -log_p.gather(-1, targets[:, None]).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        weight = self.weight * torch.sigmoid(entropy - self.entropy_mid)
        mixed = (1.0 - weight)[:, None] * log_p.exp() + weight[:, None] * self.probs(prev_ids)
        return -mixed.gather(-1, targets[:, None]).squeeze(-1).log()


def ttt_parameters(args: Hyperparameters, model: GPT) -> list[nn.Parameter]:
    frozen = tuple(f"blocks.{i}." for i in range(args.ttt_freeze_blocks))
    params = []
    for name, p in model.named_parameters():
        trainable = name.startswith("blocks.") and not name.startswith(frozen)
        p.requires_grad_(trainable)
        if trainable:
            params.append(p)
    return params


def ttt_learn_chunk(
    args: Hyperparameters,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    chunk: Tensor,
    lr: float,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    # SGD over the sequences of one chunk, all of whose tokens have been scored before.
    seq_len = args.eval_seq_len
    n_seqs = (chunk.numel() - 1) // seq_len
    if n_seqs == 0:
        return
    x_all = chunk[: n_seqs * seq_len].view(n_seqs, seq_len)
    y_all = chunk[1 : n_seqs * seq_len + 1].view(n_seqs, seq_len)
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    step_seqs = args.ttt_batch_seqs * world_size
    for _ in range(args.ttt_epochs):
        for start in range(0, n_seqs, step_seqs):
            share = rank_share(list(range(start, min(start + step_seqs, n_seqs))), rank, world_size)
            optimizer.zero_grad(set_to_none=True)
            weight = len(share) / min(step_seqs, n_seqs - start)
            if share:
                x = x_all[share[0] : share[-1] + 1].to(device)
                y = y_all[share[0] : share[-1] + 1].to(device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x, y)
                (loss * weight).backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if world_size > 1:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()
    model.eval()


def eval_val_ttt(
    args: Hyperparameters,
    model: GPT,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    log0,
) -> tuple[float, float]:
    # Score-first TTT. A window belongs to the chunk of its first scored target. All windows of a
    # chunk are scored with the state left by earlier chunks; then the model and the cache learn it.
    t_start = time.perf_counter()
    total = val_tokens.numel() - 1
    chunk_size = args.ttt_chunk_tokens
    if chunk_size % args.eval_seq_len or args.eval_seq_len % args.eval_stride:
        raise ValueError("ttt_chunk_tokens must be a multiple of eval_seq_len, and that of eval_stride")
    n_chunks = (total + chunk_size - 1) // chunk_size
    by_chunk: list[list[tuple[int, int, int]]] = [[] for _ in range(n_chunks)]
    for window in plan_windows(total, args.eval_seq_len, args.eval_stride):
        by_chunk[window[1] // chunk_size].append(window)

    params = ttt_parameters(args, model)
    optimizer = torch.optim.SGD(params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    cache = BigramCache(args, device) if args.cache_enabled else None
    score = Score(device)
    learning = True
    model.eval()
    for ci in range(n_chunks):
        mine = rank_share(by_chunk[ci], rank, world_size)
        with torch.no_grad():
            for i in range(0, len(mine), args.eval_batch_seqs):
                batch = mine[i : i + args.eval_batch_seqs]
                x, y, mask = make_window_batch(val_tokens, batch, args.eval_seq_len, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = logits_fn(x)
                prev_ids, targets = x[mask], y[mask]
                if cache is not None:
                    nll = cache.mix_nll(logits[mask], prev_ids, targets)
                else:
                    nll = F.cross_entropy(logits[mask].float(), targets, reduction="none")
                score.add(nll, token_bytes(prev_ids, targets, luts))

        if ci == n_chunks - 1:
            break
        chunk = val_tokens[ci * chunk_size : (ci + 1) * chunk_size + 1].to(torch.int64)
        if cache is not None:
            cache.update(chunk.to(device))
        # Rank 0's clock decides for all ranks whether there is time left to learn.
        go_on = torch.tensor(int(time.perf_counter() - t_start < args.ttt_learn_seconds), device=device)
        if world_size > 1:
            dist.broadcast(go_on, src=0)
        if learning and not bool(go_on.item()):
            log0(f"ttt: learning stops at chunk {ci}/{n_chunks}, the rest is scored only")
            learning = False
        if learning:
            lr = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(1, n_chunks - 1)))
            ttt_learn_chunk(args, model, optimizer, params, chunk, lr, rank, world_size, device)
        if ci % 200 == 0:
            loss_sum, tokens_so_far = float(score.sums[0].item()), float(score.sums[1].item())
            log0(f"ttt: chunk {ci}/{n_chunks} rank0 running loss {loss_sum / max(tokens_so_far, 1.0):.4f}")
    return score.result(total)


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()

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
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"train_loader:files:{len(glob.glob(args.train_files))} pattern:{args.train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

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

    # Optimizer split: embeddings (Adam), matrices in the blocks (Muon), vectors and scalars (Adam).
    matrix_params = []
    scalar_params = []
    for name, p in base_model.named_parameters():
        if name.startswith(("tok_emb.", "bigram.embed.")):
            continue
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            matrix_params.append(p)
        else:
            scalar_params.append(p)
    optimizer_tok = torch.optim.AdamW(
        [{"params": [base_model.tok_emb.weight, base_model.bigram.embed.weight], "base_lr": args.tied_embed_lr}],
        lr=args.tied_embed_lr,
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
        [{"params": scalar_params, "base_lr": args.scalar_lr}],
        lr=args.scalar_lr,
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} max_wallclock_seconds:{args.max_wallclock_seconds:.1f} "
        f"gptq_reserve_seconds:{args.gptq_reserve_seconds:.1f}"
    )

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # The training loop's own share of the cap; the rest belongs to calibration and packing.
    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None
    loop_budget_ms = max_wallclock_ms - 1000.0 * args.gptq_reserve_seconds if max_wallclock_ms is not None else None

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        if loop_budget_ms is None:
            warmdown_start = max(args.iterations - args.warmdown_iters, 0)
            if step < warmdown_start:
                return 1.0
            return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(loop_budget_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # Warmup primes the compiled forward/backward/optimizer paths, then everything is put back.
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

    ema = EMA(base_model, args.ema_decay)
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        should_validate = args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0 and not last_step
        if should_validate:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            base_model.eval()
            val_loss, val_bpb = eval_val_sliding(
                args, base_model.forward_logits, rank, world_size, device, val_tokens, luts, args.eval_seq_len
            )
            base_model.train()
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            log0(f"stopping: train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}")
            t0 = time.perf_counter()
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
        ema.update(base_model)

        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # Needed to sync whether we've reached the wallclock cap.
        reached_cap = loop_budget_ms is not None and approx_training_time_ms >= loop_budget_ms
        if distributed and loop_budget_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # AVERAGE, CALIBRATE, PACK (inside the training cap)
    # -----------------------------

    ema.copy_to(base_model)
    log0(f"ema: applied, decay {args.ema_decay}")
    hessians = collect_hessians(args, base_model, train_loader, world_size, device)
    log0(f"gptq: {len(hessians)} Hessians from training shards")
    if master_process:
        packed = quantize_state_dict(args, base_model.state_dict(), hessians)
        write_artifact(args, packed, code, log0)
    if distributed:
        dist.barrier()
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"artifact written: train+calibration+packing {training_time_ms:.0f}ms of {args.max_wallclock_seconds:.0f}s")
    if max_wallclock_ms is not None and training_time_ms > max_wallclock_ms:
        log0("WARNING: over the training cap, raise GPTQ_RESERVE_SECONDS")

    del model, compiled_model, base_model, optimizers, optimizer_tok, optimizer_muon, optimizer_scalar, ema, hessians
    del train_loader
    torch.cuda.empty_cache()

    # -----------------------------
    # EVALUATION OF THE ARTIFACT
    # -----------------------------

    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    eval_model = read_artifact(args, device)
    eval_model.eval()
    logits_fn = torch.compile(eval_model.forward_logits, dynamic=False)

    t_part = time.perf_counter()
    q_loss, q_bpb = eval_val_sliding(
        args, logits_fn, rank, world_size, device, val_tokens, luts, args.eval_seq_len
    )
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_part):.0f}ms"
    )

    t_part = time.perf_counter()
    if args.ttt_enabled:
        final_loss, final_bpb = eval_val_ttt(
            args, eval_model, logits_fn, rank, world_size, device, val_tokens, luts, log0
        )
    else:
        final_loss, final_bpb = eval_val_sliding(
            args, logits_fn, rank, world_size, device, val_tokens, luts, args.eval_stride
        )
    torch.cuda.synchronize()
    label = "final_ttt" if args.ttt_enabled else "final_sliding_window"
    log0(
        f"{label} val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} stride:{args.eval_stride} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_part):.0f}ms"
    )
    log0(f"total evaluation time: {time.perf_counter() - t_eval:.1f}s")
    log0(f"{label}_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
