"""
gometra -- 11L x 512d, GQA 8/4, SmearGate + BigramHash, XSA on the last layers, Muon, EMA+SWA blend,
int6 rows with an activation-weighted clip search ("GPTQ-lite"), zstd-22, sliding window evaluation (stride 64)
with score-first adaptation of the control tensors and a backoff n-gram cache, orders 2..7.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Everything is set through environment variables, see Hyperparameters. The defaults are the submission.
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
from dataclasses import dataclass
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
    # Data. Shards are flat uint16 token files; the validation pattern is the fixed first-50k-documents split.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation during training (plain, only for the log).
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Length of training.
    iterations = int(os.environ.get("ITERATIONS", 20_000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    # Seconds of the cap kept back for the averaging, the activation statistics and the clip search.
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 16.0))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 12))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    bos_id = int(os.environ.get("BOS_ID", 1))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10_000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    xsa_last = int(os.environ.get("XSA_LAST", 4))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    embed_init_std = float(os.environ.get("EMBED_INIT_STD", 0.005))

    # Optimisers.
    embed_lr = float(os.environ.get("EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_warmup = int(os.environ.get("MUON_MOMENTUM_WARMUP", 1500))
    muon_ns_steps = int(os.environ.get("MUON_NS_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip = float(os.environ.get("GRAD_CLIP", 0.3))

    # Weight averaging.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.2))
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    average = os.environ.get("AVERAGE", "blend")  # ema | swa | blend | raw

    # Artifact.
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    quant_min_numel = int(os.environ.get("QUANT_MIN_NUMEL", 65_536))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit = 16_000_000

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_chunk_tokens = int(os.environ.get("EVAL_CHUNK_TOKENS", 131_072))
    eval_batch_windows = int(os.environ.get("EVAL_BATCH_WINDOWS", 64))
    eval_limit_seconds = float(os.environ.get("EVAL_LIMIT_SECONDS", 600.0))

    # n-gram cache.
    ngram_enabled = bool(int(os.environ.get("NGRAM_ENABLED", "1")))
    ngram_min_order = int(os.environ.get("NGRAM_MIN_ORDER", 2))
    ngram_max_order = int(os.environ.get("NGRAM_MAX_ORDER", 7))
    ngram_buckets = int(os.environ.get("NGRAM_BUCKETS", 1 << 20))
    ngram_strength = float(os.environ.get("NGRAM_STRENGTH", 1.0))
    gate_bins = int(os.environ.get("GATE_BINS", 12))
    gate_lr = float(os.environ.get("GATE_LR", 0.15))

    # Score-first adaptation of the control tensors.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 2))
    ttt_clip = float(os.environ.get("TTT_CLIP", 1.0))


CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear", "bigram.scale")


def is_control(name: str) -> bool:
    return any(pattern in name for pattern in CONTROL_PATTERNS)


# -----------------------------
# MUON
# -----------------------------


@torch.compile
def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Orthogonalises a 2D update with a quintic Newton-Schulz iteration."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    """Each rank orthogonalises every world_size-th matrix, then the flat update is summed over the ranks."""

    def __init__(self, params, lr: float, momentum: float, ns_steps: int, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay))

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
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            offset = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["ns_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[offset : offset + p.numel()] = g.reshape(-1)
                offset += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            offset = 0
            for p in params:
                update = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
                if group["weight_decay"] > 0.0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr)
                offset += p.numel()


# -----------------------------
# TOKENIZER BYTES
# -----------------------------


class ByteTable:
    """UTF-8 bytes of the original text behind every token, given the token before it.

    A piece that begins with the mark U+2581 stands for a space plus the rest. The space is real text unless the token
    before is a boundary token (control, unknown, unused): there SentencePiece's dummy prefix has made it up.
    Byte-fallback pieces (<0x..>) are one byte of text each.
    """

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros((size,), dtype=np.int32)
        space = np.zeros((size,), dtype=np.bool_)
        boundary = np.ones((size,), dtype=np.bool_)
        for token_id in range(int(sp.vocab_size())):
            if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
                continue
            boundary[token_id] = False
            if sp.is_byte(token_id):
                base[token_id] = 1
                continue
            piece = sp.id_to_piece(token_id)
            if piece.startswith("\u2581"):
                space[token_id] = True
                piece = piece[1:]
            base[token_id] = len(piece.encode("utf-8"))
        self.base = torch.from_numpy(base).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.boundary = torch.from_numpy(boundary).to(device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target, as int64."""
        nbytes = self.base[target].to(torch.int64)
        nbytes += (self.space[target] & ~self.boundary[prev]).to(torch.int64)
        return nbytes


# -----------------------------
# DATA
# -----------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256


def load_data_shard(file: Path) -> Tensor:
    header_bytes = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected = header_bytes + num_tokens * np.dtype("<u2").itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected} bytes")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str, device: torch.device) -> Tensor:
    """The whole validation stream, on the device, as int64 (62M tokens are half a gigabyte)."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    stream = np.concatenate([load_data_shard(file).numpy() for file in files])
    return torch.from_numpy(stream.astype(np.int64)).to(device)


class TokenStream:
    """Reads shards in order and wraps around at the end."""

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
    """Every call takes one contiguous span per rank from the shared stream; the extra token gives the shift by one."""

    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        span = local_tokens + 1
        chunk = self.stream.take(span * self.world_size)
        start = self.rank * span
        local = chunk[start : start + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights stay in fp32 for the optimiser and are cast at use."""

    def __init__(self, in_features: int, out_features: int, zero_init: bool = False):
        super().__init__(in_features, out_features, bias=False)
        if zero_init:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Tables for partial rotary embeddings: only the first `dims` channels of a head turn."""

    def __init__(self, dims: int, base: float, max_len: int):
        super().__init__()
        freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), freq)
        self.register_buffer("cos", angle.cos()[None, None], persistent=False)
        self.register_buffer("sin", angle.sin()[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        T = x.size(-2)
        half = self.cos.size(-1)
        cos = self.cos[:, :, :T].to(x.dtype)
        sin = self.sin[:, :, :T].to(x.dtype)
        x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, use_xsa: bool):
        super().__init__()
        dim, self.num_heads, self.num_kv_heads = args.model_dim, args.num_heads, args.num_kv_heads
        if dim % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("model_dim, num_heads and num_kv_heads do not fit")
        self.head_dim = dim // self.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), args.qk_gain_init, dtype=torch.float32))
        max_len = max(args.train_seq_len, args.eval_seq_len)
        self.rotary = Rotary(args.rope_dims, args.rope_base, max_len)
        self.use_xsa = use_xsa

    def _remove_self_value(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: takes out of each head's output the component along the position's own value vector."""
        B, T, H, D = y.shape
        own = F.normalize(v.transpose(1, 2), dim=-1).unsqueeze(3)  # B, T, KV, 1, D
        grouped = y.reshape(B, T, self.num_kv_heads, H // self.num_kv_heads, D)
        grouped = grouped - (grouped * own).sum(dim=-1, keepdim=True) * own
        return grouped.reshape(B, T, H, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).reshape(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        q = self.rotary(q) * self.q_gain.to(q.dtype)[None, :, None, None]
        k = self.rotary(k)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        y = y.transpose(1, 2)
        if self.use_xsa:
            y = self._remove_self_value(y, v)
        return self.proj(y.reshape(B, T, C))


class MLP(nn.Module):
    """LeakyReLU(0.5) squared."""

    def __init__(self, dim: int, mult: float):
        super().__init__()
        hidden = int(dim * mult)
        self.fc = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        dim = args.model_dim
        self.norm = RMSNorm()
        self.attn = CausalSelfAttention(args, use_xsa=layer >= args.num_layers - args.xsa_last)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.norm(x) * self.depth_scale)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(self.norm(x) * self.depth_scale)
        return x


class SmearGate(nn.Module):
    """Blends each embedding with the one before it. A document's first token keeps its own embedding."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -2.0, dtype=torch.float32))
        self.bos_id = bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(x.dtype)
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        has_prev = torch.ones_like(ids)
        has_prev[:, 0] = 0
        has_prev = has_prev * (ids != self.bos_id)
        return x + g * has_prev.unsqueeze(-1).to(x.dtype) * (prev - x)


class BigramHash(nn.Module):
    """A hashed embedding of (previous token, token), projected to the model's width. The last bucket means "no pair"."""

    def __init__(self, buckets: int, dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.embed = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(dim, model_dim)
        self.scale = nn.Parameter(torch.tensor([0.05], dtype=torch.float32))

    def hash(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0), value=self.bos_id)
        mixed = torch.bitwise_xor(36313 * ids, 27191 * prev) % (self.buckets - 1)
        mixed = torch.where(ids == self.bos_id, self.buckets - 1, mixed)
        first = torch.zeros_like(ids)
        first[:, 0] = 1
        return torch.where(first.bool(), self.buckets - 1, mixed)

    def forward(self, ids: Tensor) -> Tensor:
        e = self.embed(self.hash(ids)).to(torch.bfloat16)
        return self.proj(e) * self.scale.to(torch.bfloat16)


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.embed_init_std)
        self.bigram = BigramHash(args.bigram_buckets, args.bigram_dim, args.model_dim, args.bos_id)
        self.smear = SmearGate(args.model_dim, args.bos_id)
        self.num_encoder = args.num_layers // 2
        self.num_decoder = args.num_layers - self.num_encoder
        self.skip_weights = nn.Parameter(
            torch.ones(min(self.num_encoder, self.num_decoder), args.model_dim, dtype=torch.float32)
        )
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        # Output projections start at zero; the hidden ones are orthogonal, scaled down a little with depth.
        for i, block in enumerate(self.blocks):
            block.mlp.fc.weight.data.mul_(1.0 / math.sqrt(1.0 + 0.05 * i))

    def forward_hidden(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids).to(torch.bfloat16) + self.bigram(ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, ids)
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder):
            if skips:
                x = x + self.skip_weights[i].to(x.dtype) * skips.pop()
            x = self.blocks[self.num_encoder + i](x, x0)
        return self.final_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Tied output, soft-capped. Float32 logits over the whole vocabulary."""
        logits = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype)).float()
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.forward_hidden(ids))
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="mean")


# -----------------------------
# WEIGHT AVERAGING
# -----------------------------


class WeightAverager:
    """EMA after every step, plus a plain mean of snapshots taken late in the warmdown (SWA)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.ema = {name: t.detach().float().clone() for name, t in model.state_dict().items()}
        self.swa: dict[str, Tensor] | None = None
        self.swa_count = 0

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.ema[name].lerp_(t.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def snapshot(self, model: nn.Module) -> None:
        state = model.state_dict()
        if self.swa is None:
            self.swa = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in state.items()}
        self.swa_count += 1
        for name, t in state.items():
            self.swa[name].add_(t.detach().float())

    @torch.no_grad()
    def result(self, how: str, model: nn.Module) -> dict[str, Tensor]:
        """The weights to ship. `how` is settled before the run starts."""
        raw = {name: t.detach().float().clone() for name, t in model.state_dict().items()}
        if how == "raw":
            return raw
        if how == "ema" or self.swa is None or self.swa_count == 0:
            return {name: t.clone() for name, t in self.ema.items()}
        swa = {name: t / self.swa_count for name, t in self.swa.items()}
        if how == "swa":
            return swa
        if how == "blend":
            return {name: 0.5 * (self.ema[name] + swa[name]) for name in swa}
        raise ValueError(f"unknown AVERAGE={how}")


# -----------------------------
# QUANTISATION
# -----------------------------


class MomentCollector:
    """Mean square of every linear layer's input channels: the diagonal of the GPTQ Hessian, which is all we use."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.handles.append(module.register_forward_pre_hook(self._hook(name + ".weight")))

    def _hook(self, key: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            square = flat.square().sum(dim=0)
            self.sums[key] = self.sums[key] + square if key in self.sums else square
            self.counts[key] = self.counts.get(key, 0) + flat.size(0)

        return hook

    def close(self) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        moments = {}
        for key in sorted(self.sums):
            mean = self.sums[key] / max(self.counts[key], 1)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(mean, op=dist.ReduceOp.AVG)
            moments[key] = mean
        return moments


@torch.no_grad()
def collect_moments(model: nn.Module, loader: DistributedTokenLoader, args: Hyperparameters) -> dict[str, Tensor]:
    """Runs a few training batches through the averaged weights, inside the training clock."""
    collector = MomentCollector(model)
    model.eval()
    for _ in range(args.calib_batches):
        x, _ = loader.next_batch(args.train_batch_tokens // 4, args.train_seq_len, 1)
        for part in x.split(16):
            model.forward_hidden(part)
    return collector.close()


CLIP_QUANTILES = (1.0, 0.9999, 0.9995, 0.999, 0.998, 0.996, 0.99)


@torch.no_grad()
def quantize_rows(w: Tensor, bits: int, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Symmetric per-row quantisation; each row takes the clip with the least weighted squared error."""
    qmax = 2 ** (bits - 1) - 1
    weight = torch.ones(w.size(1), device=w.device) if moment is None else moment.to(w.device) + 1e-6
    magnitude = w.abs()
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best_q = torch.zeros_like(w, dtype=torch.int8)
    best_s = torch.ones(w.size(0), device=w.device)
    for quantile in CLIP_QUANTILES:
        clip = magnitude.amax(dim=1) if quantile >= 1.0 else torch.quantile(magnitude, quantile, dim=1)
        scale = (clip / qmax).clamp_min(1e-6).half().float()
        q = torch.round(w / scale[:, None]).clamp(-qmax, qmax)
        err = ((q * scale[:, None] - w).square() * weight).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_s = torch.where(better, scale, best_s)
        best_q[better] = q[better].to(torch.int8)
    return best_q, best_s


def pack_state(state: dict[str, Tensor], moments: dict[str, Tensor], args: Hyperparameters) -> dict[str, dict]:
    packed: dict[str, dict] = {"q": {}, "s": {}, "raw": {}}
    for name, t in state.items():
        t = t.detach().float()
        if t.ndim == 2 and t.numel() > args.quant_min_numel and not is_control(name):
            bits = args.embed_bits if ("tok_emb" in name or "embed" in name) else args.matrix_bits
            q, s = quantize_rows(t, bits, moments.get(name))
            packed["q"][name] = q.cpu()
            packed["s"][name] = s.half().cpu()
        elif is_control(name):
            packed["raw"][name] = t.cpu()
        else:
            packed["raw"][name] = t.half().cpu()
    return packed


def unpack_state(packed: dict[str, dict]) -> dict[str, Tensor]:
    state = {name: t.float() for name, t in packed["raw"].items()}
    for name, q in packed["q"].items():
        state[name] = q.float() * packed["s"][name].float()[:, None]
    return state


def write_artifact(path: str, packed: dict[str, dict], level: int) -> int:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    blob = zstandard.ZstdCompressor(level=level).compress(buffer.getvalue())
    Path(path).write_bytes(blob)
    return len(blob)


def read_artifact(path: str) -> dict[str, dict]:
    raw = zstandard.ZstdDecompressor().decompress(Path(path).read_bytes())
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


# -----------------------------
# PLAIN EVALUATION (for the log)
# -----------------------------


def reduce_sum(*values: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for value in values:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)


@torch.no_grad()
def eval_plain(
    args: Hyperparameters,
    model: nn.Module,
    hidden_fn,
    tokens: Tensor,
    table: ByteTable,
    rank: int,
    world_size: int,
) -> tuple[float, float]:
    """Disjoint sequences, each target once, the last one shorter. Returns (nats per token, bits per byte)."""
    seq_len = args.train_seq_len
    total = tokens.numel() - 1
    num_seqs = (total + seq_len - 1) // seq_len
    first = num_seqs * rank // world_size
    last = num_seqs * (rank + 1) // world_size
    batch = max(1, args.val_batch_size // (world_size * seq_len))
    loss_sum = torch.zeros((), device=tokens.device, dtype=torch.float64)
    byte_sum = torch.zeros((), device=tokens.device, dtype=torch.float64)
    token_sum = torch.zeros((), device=tokens.device, dtype=torch.float64)
    model.eval()
    for s in range(first, last, batch):
        e = min(s + batch, last)
        lo, hi = s * seq_len, min(e * seq_len, total)
        prev, target = tokens[lo:hi], tokens[lo + 1 : hi + 1]
        x = F.pad(prev, (0, batch * seq_len - prev.numel())).reshape(batch, seq_len)
        logits = model.head(hidden_fn(x)).reshape(-1, args.vocab_size)[: prev.numel()]
        loss_sum += F.cross_entropy(logits, target, reduction="none").double().sum()
        byte_sum += table.count(prev, target).sum()
        token_sum += target.numel()
    reduce_sum(loss_sum, byte_sum, token_sum)
    model.train()
    nats = (loss_sum / token_sum).item()
    return nats, (loss_sum / math.log(2.0) / byte_sum).item()


# -----------------------------
# SLIDING WINDOWS
# -----------------------------


class WindowPlan:
    """Cuts the targets 0..N-1 into runs of `stride`; run w is scored at the end of one window of at most seq_len inputs.

    Position p is the input token p, its target is token p+1. The runs are disjoint and cover everything, the last one
    may be short; windows near the start of the stream have less context.
    """

    def __init__(self, num_targets: int, seq_len: int, stride: int):
        if not 0 < stride <= seq_len:
            raise ValueError("stride must lie in 1..seq_len")
        self.num_targets = num_targets
        self.seq_len = seq_len
        self.stride = stride
        self.num_windows = (num_targets + stride - 1) // stride

    def bounds(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(first input, first scored position, end) of each window."""
        lo = w * self.stride
        hi = (lo + self.stride).clamp(max=self.num_targets)
        start = (hi - self.seq_len).clamp(min=0)
        return start, lo, hi

    def inputs(self, tokens: Tensor, w: Tensor) -> Tensor:
        start, _, hi = self.bounds(w)
        idx = start[:, None] + torch.arange(self.seq_len, device=tokens.device)
        inside = idx < hi[:, None]
        return torch.where(inside, tokens[idx.clamp(max=self.num_targets)], 0)

    def scored(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(window row, column in the window, position in the stream) of every scored position, flat."""
        start, lo, hi = self.bounds(w)
        pos = lo[:, None] + torch.arange(self.stride, device=w.device)
        ok = pos < hi[:, None]
        row = torch.arange(w.numel(), device=w.device)[:, None].expand_as(pos)
        col = pos - start[:, None]
        return row[ok], col[ok], pos[ok]


# -----------------------------
# N-GRAM CACHE
# -----------------------------

HASH_MULT = 2_654_435_761
HASH_MASK = (1 << 31) - 1


class BackoffNgramCache:
    """Counts of what followed each (hashed) context, orders min..max, one dense row over the vocabulary per context.

    The context of order n is the n-1 tokens up to and including the input position; it does not reach over the start
    of the document. Two contexts may share a row, which only blurs the counts: the row is always divided by its own
    sum, so what comes out is a distribution whatever the hash does.
    """

    def __init__(self, tokens: Tensor, args: Hyperparameters):
        device = tokens.device
        self.vocab = args.vocab_size
        self.buckets = args.ngram_buckets
        self.strength = args.ngram_strength
        self.orders = list(range(args.ngram_min_order, args.ngram_max_order + 1))
        self.unigram = torch.zeros(self.vocab, dtype=torch.int64, device=device)
        self.tables = {
            n: torch.zeros((self.vocab if n == 2 else self.buckets, self.vocab), dtype=torch.int32, device=device)
            for n in self.orders
        }
        index = torch.arange(tokens.numel(), device=device)
        marks = torch.where(tokens == args.bos_id, index, torch.zeros_like(index))
        self.doc_start = torch.cummax(marks, dim=0).values
        self.filled = 0

    def rows(self, tokens: Tensor, pos: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The row of each position's context, and whether the document has that much context."""
        ok = pos - (n - 2) >= self.doc_start[pos]
        if n == 2:
            return tokens[pos], ok
        h = torch.full_like(pos, n)
        for back in range(n - 2, -1, -1):
            h = (h * HASH_MULT + tokens[(pos - back).clamp(min=0)] + 1) & HASH_MASK
        h = h ^ (h >> 15)
        return h % self.buckets, ok

    def distribution(self, tokens: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """[n, V] probabilities and the highest order that has seen the context (1: only the unigram).

        Witten-Bell: the mass of a row's distinct continuations goes to the next lower order.
        """
        p = (self.unigram.float() + 0.5) / (self.unigram.sum() + 0.5 * self.vocab)
        p = p[None].expand(pos.numel(), -1)
        top = torch.ones_like(pos)
        for n in self.orders:
            row, ok = self.rows(tokens, pos, n)
            counts = self.tables[n][row].float() * ok[:, None]
            total = counts.sum(dim=-1, keepdim=True)
            lam = self.strength * (counts > 0).sum(dim=-1, keepdim=True).float()
            blended = (counts + lam * p) / (total + lam).clamp_min(1e-9)
            seen = total > 0
            p = torch.where(seen, blended, p)
            top = torch.where(seen.squeeze(-1), torch.full_like(top, n), top)
        return p, top

    def update(self, tokens: Tensor, lo: int, hi: int) -> None:
        """Takes in the targets of positions lo..hi-1. Chunks come in order and each exactly once."""
        if lo != self.filled:
            raise RuntimeError(f"cache update out of order: {lo} after {self.filled}")
        pos = torch.arange(lo, hi, device=tokens.device)
        target = tokens[pos + 1]
        self.unigram += torch.bincount(target, minlength=self.vocab)
        for n in self.orders:
            row, ok = self.rows(tokens, pos, n)
            flat = (row * self.vocab + target)[ok]
            ones = torch.ones(flat.numel(), dtype=torch.int32, device=tokens.device)
            self.tables[n].view(-1).index_add_(0, flat, ones)
        self.filled = hi

    def bytes_held(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tables.values())


class MixGate:
    """Weight of the cache, one number for each (highest order seen, bin of the model's entropy).

    It is learned on line: after a chunk is scored, one Adagrad step on the mixture's log loss of that chunk.
    """

    def __init__(self, args: Hyperparameters, device: torch.device):
        self.bins = args.gate_bins
        self.max_entropy = math.log(args.vocab_size)
        self.lr = args.gate_lr
        self.num_orders = args.ngram_max_order + 1
        prior = torch.full((self.num_orders, self.bins), -4.0, dtype=torch.float64, device=device)
        for n in range(args.ngram_min_order, self.num_orders):
            prior[n] = -3.5 + 0.45 * (n - args.ngram_min_order)
        self.logit = prior.reshape(-1)
        self.square = torch.full_like(self.logit, 1e-4)
        self.grad = torch.zeros_like(self.logit)
        self.count = torch.zeros_like(self.logit)

    def cell(self, top: Tensor, entropy: Tensor) -> Tensor:
        b = (entropy / self.max_entropy * self.bins).long().clamp(0, self.bins - 1)
        return top * self.bins + b

    def weight(self, cell: Tensor) -> Tensor:
        return torch.sigmoid(self.logit)[cell].float()

    def observe(self, cell: Tensor, p_model: Tensor, p_cache: Tensor) -> None:
        """Gradient of -log((1-w) p_model + w p_cache) at scored targets, summed by cell."""
        w = torch.sigmoid(self.logit)[cell]
        p_model, p_cache = p_model.double(), p_cache.double()
        mixed = ((1.0 - w) * p_model + w * p_cache).clamp_min(1e-12)
        g = -(p_cache - p_model) / mixed * w * (1.0 - w)
        self.grad.index_add_(0, cell, g)
        self.count.index_add_(0, cell, torch.ones_like(g))

    def step(self) -> None:
        reduce_sum(self.grad, self.count)
        mean = self.grad / self.count.clamp_min(1.0)
        self.square += mean.square()
        self.logit -= self.lr * mean / self.square.sqrt()
        self.grad.zero_()
        self.count.zero_()


# -----------------------------
# SCORE-FIRST ADAPTATION
# -----------------------------


class ControlAdapter:
    """SGD on the control tensors (scales, gates, gains) with tokens that have been scored already."""

    def __init__(self, model: GPT, args: Hyperparameters, rank: int, world_size: int):
        self.model = model
        self.args = args
        self.rank = rank
        self.world_size = world_size
        self.params = []
        for name, p in model.named_parameters():
            p.requires_grad_(is_control(name))
            if is_control(name):
                self.params.append(p)
        self.opt = torch.optim.SGD(self.params, lr=args.ttt_lr, momentum=args.ttt_momentum)

    @torch.enable_grad()
    def learn(self, tokens: Tensor, lo: int, hi: int, progress: float) -> None:
        """Positions lo..hi-1 in whole sequences, shared among the ranks; gradients are summed."""
        seq_len = self.args.eval_seq_len
        num_seqs = (hi - lo) // seq_len
        if num_seqs == 0:
            return
        for group in self.opt.param_groups:
            group["lr"] = self.args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        mine = torch.arange(self.rank, num_seqs, self.world_size, device=tokens.device)
        idx = lo + mine[:, None] * seq_len + torch.arange(seq_len, device=tokens.device)
        for _ in range(self.args.ttt_epochs):
            self.opt.zero_grad(set_to_none=False)
            for part in idx.split(4):
                if part.size(0) == 0:
                    continue
                loss = self.model(tokens[part], tokens[part + 1]) * (part.size(0) / num_seqs)
                loss.backward()
            for p in self.params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                reduce_sum(p.grad)
            torch.nn.utils.clip_grad_norm_(self.params, self.args.ttt_clip)
            self.opt.step()


# -----------------------------
# FINAL EVALUATION
# -----------------------------


@dataclass
class EvalResult:
    val_loss: float
    val_bpb: float
    model_only_bpb: float
    tokens: int
    nbytes: int
    seconds: float


class Ledger:
    """Sums over the scored targets: the mixture (reported), the model alone (for the log), bytes and counts."""

    def __init__(self, device: torch.device):
        self.device = device
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.model_nats = torch.zeros((), dtype=torch.float64, device=device)
        self.nbytes = torch.zeros((), dtype=torch.int64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, nll: Tensor, model_nll: Tensor, nbytes: Tensor) -> None:
        self.nats += nll.double().sum()
        self.model_nats += model_nll.double().sum()
        self.nbytes += nbytes.sum()
        self.tokens += nll.numel()

    def running_bpb(self) -> float:
        """Of this rank so far."""
        return (self.nats / math.log(2.0) / self.nbytes.clamp_min(1)).item()

    def close(self, expected: int, seconds: float) -> EvalResult:
        reduce_sum(self.nats, self.model_nats, self.nbytes, self.tokens)
        tokens, nbytes = int(self.tokens.item()), int(self.nbytes.item())
        if tokens != expected:
            raise RuntimeError(f"scored {tokens} targets, the stream has {expected}")
        bits = math.log(2.0) * nbytes
        return EvalResult(
            val_loss=self.nats.item() / tokens,
            val_bpb=self.nats.item() / bits,
            model_only_bpb=self.model_nats.item() / bits,
            tokens=tokens,
            nbytes=nbytes,
            seconds=seconds,
        )


class ChunkScorer:
    """Model plus cache for a batch of windows: full distributions first, targets only afterwards."""

    def __init__(self, args: Hyperparameters, model: GPT, hidden_fn, tokens: Tensor, table: ByteTable):
        self.args = args
        self.model = model
        self.hidden_fn = hidden_fn
        self.tokens = tokens
        self.table = table
        self.plan = WindowPlan(tokens.numel() - 1, args.eval_seq_len, args.eval_stride)
        self.cache = BackoffNgramCache(tokens, args) if args.ngram_enabled else None
        self.gate = MixGate(args, tokens.device)

    def predict(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """(stream positions, log-probabilities of the model over the vocabulary) for the scored positions."""
        x = self.plan.inputs(self.tokens, windows)
        short = self.args.eval_batch_windows - windows.numel()
        if short > 0:
            x = F.pad(x, (0, 0, 0, short))
        hidden = self.hidden_fn(x)
        row, col, pos = self.plan.scored(windows)
        return pos, F.log_softmax(self.model.head(hidden[row, col]), dim=-1)

    def mix(self, pos: Tensor, logp: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(log-probabilities of the mixture, the cache's probabilities, gate cells)."""
        if self.cache is None:
            return logp, None, None
        p_cache, top = self.cache.distribution(self.tokens, pos)
        p_model = logp.exp()
        entropy = -(p_model * logp).sum(dim=-1)
        cell = self.gate.cell(top, entropy)
        w = self.gate.weight(cell)[:, None]
        return torch.log((1.0 - w) * p_model + w * p_cache), p_cache, cell

    def score(self, windows: Tensor, ledger: Ledger) -> None:
        pos, logp = self.predict(windows)
        mixed, p_cache, cell = self.mix(pos, logp)
        target = self.tokens[pos + 1]
        nll = -mixed.gather(-1, target[:, None]).squeeze(-1)
        model_nll = -logp.gather(-1, target[:, None]).squeeze(-1)
        nbytes = self.table.count(self.tokens[pos], target)
        ledger.add(nll, model_nll, nbytes)
        if cell is not None:
            self.gate.observe(cell, (-model_nll).exp(), p_cache.gather(-1, target[:, None]).squeeze(-1))


@torch.no_grad()
def eval_sliding(
    args: Hyperparameters,
    model: GPT,
    hidden_fn,
    tokens: Tensor,
    table: ByteTable,
    rank: int,
    world_size: int,
    log,
) -> EvalResult:
    """The reported score: one pass, chunk by chunk. A chunk is scored, then cache, gate and control tensors take it in."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    model.eval()
    num_targets = tokens.numel() - 1
    scorer = ChunkScorer(args, model, hidden_fn, tokens, table)
    adapter = ControlAdapter(model, args, rank, world_size) if args.ttt_enabled else None
    ledger = Ledger(tokens.device)
    per_chunk = max(1, args.eval_chunk_tokens // args.eval_stride)
    num_windows = scorer.plan.num_windows
    num_chunks = (num_windows + per_chunk - 1) // per_chunk
    if scorer.cache is not None:
        log(f"ngram_cache: orders {scorer.cache.orders} table_bytes:{scorer.cache.bytes_held()}")
    for c in range(num_chunks):
        w_lo, w_hi = c * per_chunk, min((c + 1) * per_chunk, num_windows)
        lo, hi = w_lo * args.eval_stride, min(w_hi * args.eval_stride, num_targets)
        first = w_lo + (w_hi - w_lo) * rank // world_size
        last = w_lo + (w_hi - w_lo) * (rank + 1) // world_size
        for b in range(first, last, args.eval_batch_windows):
            windows = torch.arange(b, min(b + args.eval_batch_windows, last), device=tokens.device)
            scorer.score(windows, ledger)
        if c + 1 < num_chunks:
            scorer.gate.step()
            if scorer.cache is not None:
                scorer.cache.update(tokens, lo, hi)
            if adapter is not None:
                adapter.learn(tokens, lo, hi, c / num_chunks)
        if c % 50 == 0 or c + 1 == num_chunks:
            seconds = time.perf_counter() - started
            log(f"eval_chunk:{c + 1}/{num_chunks} rank0_running_bpb:{ledger.running_bpb():.4f} time:{seconds:.1f}s")
    torch.cuda.synchronize()
    return ledger.close(num_targets, time.perf_counter() - started)


# -----------------------------
# RUN
# -----------------------------


class RunLog:
    """Console and logs/<run_id>.txt, from rank 0 only."""

    def __init__(self, run_id: str, master: bool):
        self.master = master
        self.path: Path | None = None
        if master:
            Path("logs").mkdir(exist_ok=True)
            self.path = Path("logs") / f"{run_id}.txt"

    def __call__(self, message: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(message, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            print(message, file=f)


@dataclass
class Ranks:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    grad_accum_steps: int

    @property
    def master(self) -> bool:
        return self.rank == 0


def start_ranks() -> Ranks:
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so that the accumulation steps are whole")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return Ranks(rank, world_size, local_rank, device, 8 // world_size)


def wait_for_all() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def set_backends() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(False)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def build_optimizers(model: GPT, args: Hyperparameters) -> tuple[list[torch.optim.Optimizer], Muon]:
    """Embeddings and scalars go to AdamW, the matrices to Muon. Every parameter belongs to exactly one group."""
    embeds = [model.tok_emb.weight, model.bigram.embed.weight]
    matrices, scalars = [model.bigram.proj.weight], []
    for name, p in model.named_parameters():
        if name in ("tok_emb.weight", "bigram.embed.weight", "bigram.proj.weight"):
            continue
        if p.ndim == 2 and not is_control(name):
            matrices.append(p)
        else:
            scalars.append(p)
    if len(embeds) + len(matrices) + len(scalars) != len(list(model.parameters())):
        raise RuntimeError("a parameter is in no optimiser")
    betas = (args.beta1, args.beta2)
    adam_embed = torch.optim.AdamW(
        embeds, lr=args.embed_lr, betas=betas, eps=args.adam_eps, weight_decay=args.adam_wd, fused=True
    )
    adam_scalar = torch.optim.AdamW(
        scalars, lr=args.scalar_lr, betas=betas, eps=args.adam_eps, weight_decay=0.0, fused=True
    )
    muon = Muon(
        matrices,
        lr=args.matrix_lr,
        momentum=args.muon_momentum_start,
        ns_steps=args.muon_ns_steps,
        weight_decay=args.muon_wd,
    )
    optimizers: list[torch.optim.Optimizer] = [adam_embed, adam_scalar, muon]
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers, muon


class TrainClock:
    """Milliseconds of training. Paused around the validation that is only for the log."""

    def __init__(self):
        self.total_ms = 0.0
        self.started = 0.0

    def resume(self) -> None:
        torch.cuda.synchronize()
        self.started = time.perf_counter()

    def pause(self) -> float:
        torch.cuda.synchronize()
        self.total_ms += 1000.0 * (time.perf_counter() - self.started)
        return self.total_ms

    def now(self) -> float:
        return self.total_ms + 1000.0 * (time.perf_counter() - self.started)


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, budget_ms: float) -> float:
    """1 until the warmdown, then linear to 0 at the end of the budget; the warmdown's length is in steps."""
    if args.warmdown_iters <= 0:
        return 1.0
    if budget_ms <= 0:
        start = max(args.iterations - args.warmdown_iters, 0)
        return max((args.iterations - step) / args.warmdown_iters, 0.0) if step >= start else 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(budget_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


class Trainer:
    """Owns what changes during training: model wrapper, loader, optimisers, averages and the clock."""

    def __init__(self, args: Hyperparameters, ranks: Ranks, base_model: GPT, log: RunLog):
        self.args = args
        self.ranks = ranks
        self.base_model = base_model
        self.log = log
        compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
        self.model: nn.Module = compiled
        if ranks.world_size > 1:
            self.model = DDP(compiled, device_ids=[ranks.local_rank], broadcast_buffers=False)
        self.optimizers, self.muon = build_optimizers(base_model, args)
        self.loader = self.new_loader()
        self.clock = TrainClock()
        self.budget_ms = 0.0
        if args.max_wallclock_seconds > 0:
            self.budget_ms = 1000.0 * (args.max_wallclock_seconds - args.calib_reserve_seconds)

    def new_loader(self) -> DistributedTokenLoader:
        return DistributedTokenLoader(
            self.args.train_files, self.ranks.rank, self.ranks.world_size, self.ranks.device
        )

    def zero_grad(self) -> None:
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)

    def forward_backward(self) -> Tensor:
        """One optimiser step's worth of gradients. Returns this rank's mean loss."""
        accum = self.ranks.grad_accum_steps
        total = torch.zeros((), device=self.ranks.device)
        for micro in range(accum):
            if isinstance(self.model, DDP):
                self.model.require_backward_grad_sync = micro == accum - 1
            x, y = self.loader.next_batch(self.args.train_batch_tokens, self.args.train_seq_len, accum)
            loss = self.model(x, y)
            total += loss.detach()
            (loss / accum).backward()
        return total / accum

    def apply_gradients(self, step: int, scale: float) -> None:
        frac = min(step / max(self.args.muon_momentum_warmup, 1), 1.0)
        momentum = (1.0 - frac) * self.args.muon_momentum_start + frac * self.args.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if self.args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.base_model.parameters(), self.args.grad_clip)
        for opt in self.optimizers:
            opt.step()
        self.zero_grad()

    def warm_up(self) -> None:
        """Compiles everything on training batches, then puts weights, optimisers and loader back."""
        if self.args.warmup_steps <= 0:
            return
        weights = {name: t.detach().cpu().clone() for name, t in self.base_model.state_dict().items()}
        opt_states = [copy.deepcopy(opt.state_dict()) for opt in self.optimizers]
        self.model.train()
        for i in range(self.args.warmup_steps):
            self.zero_grad()
            self.forward_backward()
            for opt in self.optimizers:
                opt.step()
            if (i + 1) % 10 == 0 or i + 1 == self.args.warmup_steps:
                self.log(f"warmup_step:{i + 1}/{self.args.warmup_steps}")
        self.base_model.load_state_dict(weights, strict=True)
        for opt, state in zip(self.optimizers, opt_states, strict=True):
            opt.load_state_dict(state)
        self.zero_grad()
        if isinstance(self.model, DDP):
            self.model.require_backward_grad_sync = True
        self.loader = self.new_loader()

    def out_of_time(self) -> bool:
        """The slowest rank decides, so that all stop at the same step."""
        if self.budget_ms <= 0:
            return False
        late = torch.tensor(int(self.clock.now() >= self.budget_ms), device=self.ranks.device)
        if self.ranks.world_size > 1:
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        return bool(late.item())

    def run(self, validate) -> dict[str, dict]:
        """Trains, averages, collects the activation moments and quantises. Returns what the artifact holds."""
        args, log = self.args, self.log
        averager = WeightAverager(self.base_model, args.ema_decay)
        stopped = False
        step = 0
        self.clock.resume()
        while True:
            last = step >= args.iterations or stopped
            if args.val_loss_every > 0 and (last or step % args.val_loss_every == 0):
                ms = self.clock.pause()
                val_loss, val_bpb = validate()
                log(
                    f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                    f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
                )
                self.clock.resume()
            if last:
                break
            scale = lr_scale(args, step, self.clock.now(), self.budget_ms)
            self.model.train()
            train_loss = self.forward_backward()
            self.apply_gradients(step, scale)
            step += 1
            averager.after_step(self.base_model)
            if scale < args.swa_start_scale and step % args.swa_every == 0:
                averager.snapshot(self.base_model)
            if step <= 10 or step % args.train_log_every == 0:
                now = self.clock.now()
                log(
                    f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                    f"train_time:{now:.0f}ms step_avg:{now / step:.2f}ms lr_scale:{scale:.3f}"
                )
            if self.out_of_time():
                stopped = True
                log(f"stopping_early: wallclock_cap train_time:{self.clock.now():.0f}ms step:{step}/{args.iterations}")
        before_ms = self.clock.now()
        weights = averager.result(args.average, self.base_model)
        self.base_model.load_state_dict(weights, strict=True)
        moments = collect_moments(self.base_model, self.loader, args)
        packed = pack_state(weights, moments, args)
        ms = self.clock.pause()
        log(f"average:{args.average} swa_snapshots:{averager.swa_count}")
        log(f"calibration on {args.calib_batches} train batches and clip search took {ms - before_ms:.0f}ms, train+calib {ms:.0f}ms")
        if args.max_wallclock_seconds > 0 and ms > 1000.0 * args.max_wallclock_seconds:
            raise RuntimeError("training and calibration went over the wall-clock cap")
        return packed


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    ranks = start_ranks()
    log = RunLog(args.run_id, ranks.master)
    set_backends()
    seed_everything(args.seed)

    log(code, console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    if ranks.master:
        smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        log(smi.stdout, console=False)

    # ----- tokenizer and validation stream -----

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match the tokenizer ({int(sp.vocab_size())})")
    if int(sp.bos_id()) != args.bos_id:
        raise ValueError(f"BOS_ID={args.bos_id} does not match the tokenizer ({int(sp.bos_id())})")
    table = ByteTable(sp, args.vocab_size, ranks.device)
    val_tokens = load_validation_tokens(args.val_files, ranks.device)
    log(f"train_shards:{len(glob.glob(args.train_files))} pattern:{args.train_files}")
    log(f"val_tokens:{val_tokens.numel()} pattern:{args.val_files}")

    # ----- model -----

    base_model = GPT(args).to(ranks.device)
    hidden_fn = torch.compile(base_model.forward_hidden, dynamic=False, fullgraph=True)
    trainer = Trainer(args, ranks, base_model, log)
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log(f"world_size:{ranks.world_size} grad_accum_steps:{ranks.grad_accum_steps} seed:{args.seed}")
    log(
        f"layers:{args.num_layers} dim:{args.model_dim} heads:{args.num_heads}/{args.num_kv_heads} "
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.1f} reserve:{args.calib_reserve_seconds:.1f}"
    )

    def validate() -> tuple[float, float]:
        return eval_plain(args, base_model, hidden_fn, val_tokens, table, ranks.rank, ranks.world_size)

    # ----- training -----

    trainer.warm_up()
    packed = trainer.run(validate)
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ----- artifact -----

    if ranks.master:
        model_bytes = write_artifact(args.artifact_path, packed, args.zstd_level)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = code_bytes + model_bytes
        log(f"Serialized model int{args.matrix_bits}+zstd: {model_bytes} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size: {total_bytes} bytes")
        if total_bytes > args.size_limit:
            log(f"WARNING: over the limit of {args.size_limit} bytes")
    wait_for_all()
    del packed, trainer
    torch.cuda.empty_cache()

    # ----- evaluation: from here on only the artifact and the validation stream -----

    eval_started = time.perf_counter()
    base_model.load_state_dict(unpack_state(read_artifact(args.artifact_path)), strict=True)
    plain_loss, plain_bpb = validate()
    log(f"final_roundtrip_plain val_loss:{plain_loss:.4f} val_bpb:{plain_bpb:.4f}")
    result = eval_sliding(
        args, base_model, hidden_fn, val_tokens, table, ranks.rank, ranks.world_size, log
    )
    eval_seconds = time.perf_counter() - eval_started
    log(
        f"final_sliding_ngram val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f} "
        f"stride:{args.eval_stride} seq_len:{args.eval_seq_len} time:{result.seconds:.1f}s"
    )
    log(f"model_only (same pass, not reported) val_bpb:{result.model_only_bpb:.4f}")
    log(f"scored_tokens:{result.tokens} scored_bytes:{result.nbytes} eval_time:{eval_seconds:.1f}s")
    log(f"final_sliding_ngram_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}")
    if eval_seconds > args.eval_limit_seconds:
        log(f"WARNING: evaluation took {eval_seconds:.1f}s, limit {args.eval_limit_seconds:.0f}s")
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
