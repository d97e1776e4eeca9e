"""
train_gpt.py: 11L banked GPT, Parallel Muon, EMA 0.997, late int6 QAT, GPTQ int6 (Hessians inside the 600 s), zstd-22,
sliding window 64, legal score-first TTT with a normalised trigram cache on top. Grown from the baseline; one file.

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

try:
    import zstandard

    _COMPRESSOR = "zstd"
except ImportError:
    _COMPRESSOR = "lzma"

try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func

    _HAS_FA3 = True
except ImportError:
    flash_attn_3_func = None
    _HAS_FA3 = False

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
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 14.0))
    max_eval_seconds = float(os.environ.get("MAX_EVAL_SECONDS", 600.0))
    size_limit_bytes = 16_000_000

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    bigram_vocab_size = int(os.environ.get("BIGRAM_VOCAB_SIZE", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))

    # optimizer
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
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
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    late_qat_threshold = float(os.environ.get("LATE_QAT_THRESHOLD", 0.15))

    # quantization
    calib_source = os.environ.get("CALIB_SOURCE", "train")  # "train" or "self" (autoregressive samples)
    calib_batches = int(os.environ.get("CALIB_BATCHES", 64))
    calib_batch_seqs = int(os.environ.get("CALIB_BATCH_SEQS", 8))
    calib_temperature = float(os.environ.get("CALIB_TEMPERATURE", 0.8))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    gptq_percdamp = float(os.environ.get("GPTQ_PERCDAMP", 0.01))

    # evaluation
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 16))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_time_reserve = float(os.environ.get("TTT_TIME_RESERVE", 90.0))
    cache_enabled = bool(int(os.environ.get("CACHE_ENABLED", "1")))
    cache_rows = int(os.environ.get("CACHE_ROWS", 65536))
    cache_prior = float(os.environ.get("CACHE_PRIOR", 24.0))


CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "bigram.scale")
BANK_NAMES = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")

# -----------------------------
# PARALLEL MUON
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Batched over the leading dimension of a bank."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    transposed = X.size(-2) > X.size(-1)
    if transposed:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X.mT if transposed else X


class Muon(torch.optim.Optimizer):
    """Parallel Muon: banks are sharded over ranks along the layer axis.

    launch_reduce_scatters() starts the async reduce-scatter of every bank gradient, biggest first; step() waits bank by
    bank, orthogonalises the local shard and overlaps the all-gather with the next bank's Newton-Schulz.
    """

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )
        self._built = False

    def _build(self) -> None:
        self._distributed = dist.is_available() and dist.is_initialized()
        self._world = dist.get_world_size() if self._distributed else 1
        self._meta = []
        for group in self.param_groups:
            for p in group["params"]:
                rows = p.shape[0]
                padded = -(-rows // self._world) * self._world
                shard = padded // self._world
                tail = p.shape[1:]
                self._meta.append(
                    dict(
                        p=p,
                        rows=rows,
                        padded_grad=torch.zeros(padded, *tail, device=p.device, dtype=torch.bfloat16),
                        shard=torch.zeros(shard, *tail, device=p.device, dtype=torch.bfloat16),
                        momentum=torch.zeros(shard, *tail, device=p.device, dtype=torch.bfloat16),
                        full=torch.zeros(padded, *tail, device=p.device, dtype=torch.bfloat16),
                        scale=max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5,
                    )
                )
        self._meta.sort(key=lambda m: -m["p"].numel())
        self._futures = None
        self._built = True

    def launch_reduce_scatters(self) -> None:
        if not self._built:
            self._build()
        if not self._distributed:
            return
        self._futures = []
        for m in self._meta:
            if m["p"].grad is None:
                self._futures.append(None)
                continue
            m["padded_grad"][: m["rows"]].copy_(m["p"].grad)
            fut = dist.reduce_scatter_tensor(m["shard"], m["padded_grad"], op=dist.ReduceOp.AVG, async_op=True)
            self._futures.append(fut)

    def reset_state(self) -> None:
        if self._built:
            for m in self._meta:
                m["momentum"].zero_()

    @torch.no_grad()
    def step(self, closure=None):
        if not self._built:
            self._build()
        group = self.param_groups[0]
        lr, mom, wd, steps = group["lr"], group["momentum"], group["weight_decay"], group["backend_steps"]
        pending = None
        for i, m in enumerate(self._meta):
            p = m["p"]
            if p.grad is None:
                continue
            if self._distributed:
                if self._futures is None or self._futures[i] is None:
                    continue
                self._futures[i].wait()
                g = m["shard"]
            else:
                g = p.grad.bfloat16()
            buf = m["momentum"]
            buf.mul_(mom).add_(g)
            update = zeropower_via_newtonschulz5(g.add(buf, alpha=mom), steps=steps)
            if pending is not None:
                self._apply(*pending, lr, wd)
            if self._distributed:
                handle = dist.all_gather_into_tensor(m["full"], update.contiguous(), async_op=True)
                pending = (handle, m, m["full"])
            else:
                pending = (None, m, update)
        if pending is not None:
            self._apply(*pending, lr, wd)
        self._futures = None

    @staticmethod
    def _apply(handle, m, update: Tensor, lr: float, wd: float) -> None:
        if handle is not None:
            handle.wait()
        p = m["p"]
        if wd > 0:
            p.data.mul_(1.0 - lr * wd)
        p.data.add_(update[: m["rows"]].to(p.dtype), alpha=-lr * m["scale"])


# -----------------------------
# TOKENIZER-AGNOSTIC BYTES
# -----------------------------


def build_sentencepiece_luts(
    sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of each piece without its leading-space mark, whether it has one, whether it is no text at all.

    The space of a marked piece is added when the target is counted, and only where text stands before it.
    """
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


def count_bytes(luts: tuple[Tensor, Tensor, Tensor], prev_ids: Tensor, tgt_ids: Tensor) -> Tensor:
    base_bytes, has_leading_space, is_boundary = luts
    nbytes = base_bytes[tgt_ids].to(torch.int16)
    nbytes += (has_leading_space[tgt_ids] & ~is_boundary[prev_ids]).to(torch.int16)
    return nbytes.to(torch.float64)


# -----------------------------
# DATA LOADING
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
    """The whole split, in order; nothing is cut off at the end."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


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
    """Each rank takes its own disjoint span of one shared stream; the extra token allows the shift by one."""

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
# TRANSFORMER MODULES
# -----------------------------


class QATState:
    """Process-wide switch, read by bank_linear; turned on late in the warm-down."""

    enabled = False


def fake_quant_int6(w: Tensor) -> Tensor:
    with torch.no_grad():
        w32 = w.float()
        scale = (w32.abs().amax(dim=-1, keepdim=True) / 31.0).clamp_min(1.0 / 31.0)
        w_q = (torch.clamp(torch.round(w32 / scale), -32, 31) * scale).to(w.dtype)
    return w + (w_q - w).detach()


def bank_linear(x: Tensor, w: Tensor, key: str, sink: dict[str, Tensor] | None) -> Tensor:
    """A linear layer on one slice of a bank. sink: where the calibration gathers x^T x, by key of the slice."""
    if sink is not None:
        rows = x.detach().reshape(-1, x.size(-1)).float()
        if key not in sink:
            sink[key] = torch.zeros(rows.size(1), rows.size(1), device=rows.device, dtype=torch.float32)
        sink[key].addmm_(rows.T, rows)
    w = w.to(x.dtype)
    if QATState.enabled and torch.is_grad_enabled():
        w = fake_quant_int6(w)
    return F.linear(x, w)


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


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
            t = torch.arange(seq_len, device=device, dtype=torch.float32)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos_cached = freqs.cos()[None, :, None, :]
            self._sin_cached = freqs.sin()[None, :, None, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype), self._sin_cached.to(dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: type[Hyperparameters], use_xsa: bool):
        super().__init__()
        self.num_heads = args.num_heads
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = args.model_dim // args.num_heads
        self.rope_dims = args.rope_dims
        self.use_xsa = use_xsa
        self.q_gain = nn.Parameter(torch.full((args.num_heads,), args.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(args.rope_dims, base=args.rope_base)

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        """Takes from each head's output its part along the position's own value."""
        bsz, seqlen, heads, dim = y.shape
        groups = heads // self.num_kv_heads
        y_g = y.reshape(bsz, seqlen, self.num_kv_heads, groups, dim)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn).reshape(bsz, seqlen, heads, dim)

    def forward(self, x: Tensor, w: dict[str, Tensor], layer: int, sink: dict[str, Tensor] | None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = bank_linear(x, w["q"], f"qo_bank.{2 * layer}", sink)
        k = bank_linear(x, w["k"], f"kv_bank.{2 * layer}", sink)
        v = bank_linear(x, w["v"], f"kv_bank.{2 * layer + 1}", sink)
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = k.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        if _HAS_FA3:
            y = flash_attn_3_func(q, k, v, causal=True)
            y = y[0] if isinstance(y, tuple) else y
        else:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        if self.use_xsa:
            y = self._xsa(y, v)
        return bank_linear(y.reshape(bsz, seqlen, dim), w["o"], f"qo_bank.{2 * layer + 1}", sink)


class MLP(nn.Module):
    def forward(self, x: Tensor, w: dict[str, Tensor], layer: int, sink: dict[str, Tensor] | None) -> Tensor:
        h = bank_linear(x, w["up"], f"mlp_up_bank.{layer}", sink)
        h = F.leaky_relu(h, negative_slope=0.5).square()
        return bank_linear(h, w["down"], f"mlp_down_bank.{layer}", sink)


class Block(nn.Module):
    def __init__(self, args: type[Hyperparameters], layer: int):
        super().__init__()
        self.layer = layer
        self.norm = RMSNorm()
        self.attn = CausalSelfAttention(args, use_xsa=layer >= args.num_layers - args.xsa_last_n)
        self.mlp = MLP()
        dim = args.model_dim
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, w: dict[str, Tensor], sink: dict[str, Tensor] | None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.norm(x) * self.ln_scale, w, self.layer, sink)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        mlp_out = self.mlp(self.norm(x) * self.ln_scale, w, self.layer, sink)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class BigramHashEmbedding(nn.Module):
    """An embedding of the pair (previous, current) of input tokens; a document's first token has no previous one."""

    def __init__(self, buckets: int, dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.embed = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = nn.Linear(dim, model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.to(torch.int32)
        mod = self.buckets - 1
        pair = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % mod
        hashed = F.pad(pair, (1, 0), value=mod)
        hashed = torch.where(t == self.bos_id, torch.full_like(hashed, mod), hashed)
        h = self.embed(hashed.long())
        return F.linear(h, self.proj.weight.to(h.dtype)) * self.scale.to(h.dtype)


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters], bos_id: int):
        super().__init__()
        dim, layers = args.model_dim, args.num_layers
        kv_dim = args.num_kv_heads * (dim // args.num_heads)
        hidden = int(args.mlp_mult * dim)
        self.num_layers = layers
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.bigram = BigramHashEmbedding(args.bigram_vocab_size, args.bigram_dim, dim, bos_id)
        self.qo_bank = nn.Parameter(torch.empty(2 * layers, dim, dim))
        self.kv_bank = nn.Parameter(torch.empty(2 * layers, kv_dim, dim))
        self.mlp_up_bank = nn.Parameter(torch.empty(layers, hidden, dim))
        self.mlp_down_bank = nn.Parameter(torch.empty(layers, dim, hidden))
        self.num_encoder_layers = layers // 2
        self.num_decoder_layers = layers - self.num_encoder_layers
        self.num_skips = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(layers)])
        self.final_norm = RMSNorm()
        self.hessian_sink: dict[str, Tensor] | None = None
        self._init_weights(args.tied_embed_init_std)

    def _init_weights(self, embed_std: float) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=embed_std)
        with torch.no_grad():
            for i in range(self.num_layers):
                nn.init.orthogonal_(self.qo_bank[2 * i])
                nn.init.zeros_(self.qo_bank[2 * i + 1])
                nn.init.orthogonal_(self.kv_bank[2 * i])
                nn.init.orthogonal_(self.kv_bank[2 * i + 1])
                nn.init.orthogonal_(self.mlp_up_bank[i])
                nn.init.zeros_(self.mlp_down_bank[i])

    def _weights(self, i: int) -> dict[str, Tensor]:
        return {
            "q": self.qo_bank[2 * i],
            "o": self.qo_bank[2 * i + 1],
            "k": self.kv_bank[2 * i],
            "v": self.kv_bank[2 * i + 1],
            "up": self.mlp_up_bank[i],
            "down": self.mlp_down_bank[i],
        }

    def hidden(self, input_ids: Tensor) -> Tensor:
        sink = self.hessian_sink
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0, self._weights(i), sink)
            skips.append(x)
        for j in range(self.num_decoder_layers):
            i = self.num_encoder_layers + j
            if skips:
                x = x + self.skip_weights[j].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[i](x, x0, self._weights(i), sink)
        return self.final_norm(x)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        logits = F.linear(self.hidden(input_ids), self.tok_emb.weight)
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


def restore_fp32(model: nn.Module) -> None:
    """Embeddings may live in bf16, the banks and the control tensors are kept in fp32."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if (param.ndim < 2 or name in BANK_NAMES or any(p in name for p in CONTROL_PATTERNS)) and (
                param.dtype != torch.float32
            ):
                param.data = param.data.float()


# -----------------------------
# GPTQ INT6
# -----------------------------


@torch.no_grad()
def generate_calibration(
    model: GPT, args: type[Hyperparameters], device: torch.device, bos_id: int, seed: int
) -> list[Tensor]:
    """Samples drawn from the model itself: no data is read. Short, since there is no kv cache."""
    gen = torch.Generator(device=device).manual_seed(seed)
    batches = []
    for _ in range(max(1, args.calib_batches // 32)):
        ids = torch.full((64, 1), bos_id, dtype=torch.int64, device=device)
        for _ in range(255):
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(ids)[:, -1].float()
            probs = torch.softmax(logits / args.calib_temperature, dim=-1)
            ids = torch.cat([ids, torch.multinomial(probs, 1, generator=gen)], dim=1)
        batches.append(ids)
    return batches


@torch.no_grad()
def collect_hessians(
    model: GPT, args: type[Hyperparameters], loader: DistributedTokenLoader, device: torch.device, bos_id: int
) -> dict[str, Tensor]:
    """x^T x at the input of every bank slice, averaged over ranks. Runs inside the training clock."""
    sink: dict[str, Tensor] = {}
    model.eval()
    if args.calib_source == "self":
        inputs = generate_calibration(model, args, device, bos_id, args.seed + loader.rank)
    else:
        tokens = args.calib_batch_seqs * args.train_seq_len * loader.world_size
        inputs = (loader.next_batch(tokens, args.train_seq_len, 1)[0] for _ in range(args.calib_batches))
    model.hessian_sink = sink
    rows = 0
    for x in inputs:
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.hidden(x)
        rows += x.numel()
    model.hessian_sink = None
    for key in sorted(sink):
        sink[key].div_(rows)
        if dist.is_initialized():
            dist.all_reduce(sink[key], op=dist.ReduceOp.AVG)
    model.train()
    return sink


def quantize_int6_percentile(w: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the clipping percentile with the least squared error."""
    best_q, best_s, best_err = None, None, None
    for pct in (0.9990, 0.9995, 0.9999, 0.99999, 1.0):
        clip = torch.quantile(w.abs(), pct, dim=1) if pct < 1.0 else w.abs().amax(dim=1)
        s = (clip / 31.0).clamp_min(1e-8).to(torch.float16)
        q = torch.clamp(torch.round(w / s.float()[:, None]), -32, 31)
        err = (w - q * s.float()[:, None]).pow(2).sum(dim=1)
        if best_err is None:
            best_q, best_s, best_err = q, s, err
        else:
            better = err < best_err
            best_q = torch.where(better[:, None], q, best_q)
            best_s = torch.where(better, s, best_s)
            best_err = torch.where(better, err, best_err)
    return best_q.to(torch.int8), best_s


def quantize_int6_gptq(w: Tensor, hessian: Tensor | None, block_size: int, percdamp: float) -> tuple[Tensor, Tensor]:
    """Column-wise GPTQ with act-order; falls back to the percentile search where the Hessian is unusable."""
    w = w.float().clone()
    rows, cols = w.shape
    q_plain, scale = quantize_int6_percentile(w)
    if hessian is None:
        return q_plain, scale
    H = hessian.float().to(w.device).clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    w[:, dead] = 0.0
    H.diagonal().add_(percdamp * torch.diag(H).mean())
    perm = torch.argsort(torch.diag(H), descending=True)
    inv_perm = torch.argsort(perm)
    w, H = w[:, perm], H[perm][:, perm]
    try:
        Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    except torch.linalg.LinAlgError:
        return q_plain, scale
    s = scale.float()
    Q = torch.zeros_like(w)
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W1 = w[:, i1:i2].clone()
        E1 = torch.zeros_like(W1)
        H1 = Hinv[i1:i2, i1:i2]
        for i in range(i2 - i1):
            col = W1[:, i]
            q = torch.clamp(torch.round(col / s), -32, 31)
            Q[:, i1 + i] = q
            err = (col - q * s) / H1[i, i]
            W1[:, i:] -= err[:, None] * H1[i, i:][None, :]
            E1[:, i] = err
        w[:, i2:] -= E1 @ Hinv[i1:i2, i2:]
    return Q[:, inv_perm].to(torch.int8), scale


def quantize_int8_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    t32 = t.float()
    s = (t32.abs().amax(dim=-1, keepdim=True) / 127.0).clamp_min(1e-8).to(torch.float16)
    return torch.clamp(torch.round(t32 / s.float()), -127, 127).to(torch.int8), s


def mixed_quantize(
    state_dict: dict[str, Tensor], hessians: dict[str, Tensor], args: type[Hyperparameters]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Banks: int6 by GPTQ. Embeddings: int8 rows. The rest: fp16, control tensors fp32."""
    out: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for name, tensor in state_dict.items():
        t = tensor.detach()
        if name in BANK_NAMES:
            qs, ss = [], []
            for i in range(t.shape[0]):
                q, s = quantize_int6_gptq(t[i], hessians.get(f"{name}.{i}"), args.gptq_block_size, args.gptq_percdamp)
                qs.append(q.cpu())
                ss.append(s.cpu())
            out[name + ".q"], out[name + ".s"] = torch.stack(qs), torch.stack(ss)
            meta[name] = "int6"
        elif any(p in name for p in CONTROL_PATTERNS) or t.numel() <= 4096:
            out[name] = t.float().cpu()
            meta[name] = "passthrough"
        else:
            q, s = quantize_int8_rows(t)
            out[name + ".q"], out[name + ".s"] = q.cpu(), s.cpu()
            meta[name] = "int8"
    return out, meta


def dequantize_mixed(
    packed: dict[str, Tensor], meta: dict[str, str], template: dict[str, Tensor]
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, like in template.items():
        kind = meta[name]
        if kind == "passthrough":
            out[name] = packed[name].to(like.dtype)
        elif kind == "int6":
            out[name] = (packed[name + ".q"].float() * packed[name + ".s"].float()[..., None]).to(like.dtype)
        else:
            out[name] = (packed[name + ".q"].float() * packed[name + ".s"].float()).to(like.dtype)
    return out


def pack_blob(packed: dict[str, Tensor], meta: dict[str, str]) -> bytes:
    buf = io.BytesIO()
    torch.save({"w": packed, "m": meta}, buf)
    raw = buf.getvalue()
    if _COMPRESSOR == "zstd":
        return zstandard.ZstdCompressor(level=22).compress(raw)
    return lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def unpack_blob(blob: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    raw = zstandard.ZstdDecompressor().decompress(blob) if _COMPRESSOR == "zstd" else lzma.decompress(blob)
    state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return state["w"], state["m"]


# -----------------------------
# EVALUATION
# -----------------------------


def reduce_sums(sums: Tensor) -> tuple[float, float, float]:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    loss_sum, token_count, byte_count = (float(v) for v in sums.tolist())
    return loss_sum, token_count, byte_count


def to_bpb(loss_sum: float, token_count: float, byte_count: float) -> tuple[float, float]:
    return loss_sum / token_count, loss_sum / math.log(2.0) / byte_count


def eval_val(
    args: type[Hyperparameters],
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """The quick figure of the log: disjoint sequences, the odd tail left out as in the baseline. Never the score."""
    seq_len = args.train_seq_len
    batch_seqs = max(1, args.val_batch_size // (world_size * seq_len))
    total_seqs = (val_tokens.numel() - 1) // seq_len
    seq_start = total_seqs * rank // world_size
    seq_end = total_seqs * (rank + 1) // world_size
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for s in range(seq_start, seq_end, batch_seqs):
            e = min(s + batch_seqs, seq_end)
            local = val_tokens[s * seq_len : e * seq_len + 1].to(device=device, dtype=torch.int64)
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y).detach()
            sums[0] += loss.to(torch.float64) * y.numel()
            sums[1] += y.numel()
            sums[2] += count_bytes(luts, x.reshape(-1), y.reshape(-1)).sum()
    model.train()
    return to_bpb(*reduce_sums(sums))


def plan_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, score_from, end) over the targets 0..total-1; the scored spans [score_from, end) tile them, none twice.

    The first window scores all of itself, each later one its last `stride` targets (the very last: what is left).
    """
    first = min(seq_len, total)
    windows = [(0, 0, first)]
    scored = first
    while scored < total:
        end = min(scored + stride, total)
        windows.append((end - first, scored, end))
        scored = end
    assert sum(end - score_from for _, score_from, end in windows) == total
    return windows


class TrigramCache:
    """Counts of what followed a pair of tokens, among the tokens already scored.

    A row is a bucket of contexts and holds a count for every token of the vocabulary, so the predictive distribution
    (counts + prior * p_model) / (row total + prior) sums to one over the vocabulary whatever shares the bucket.
    """

    def __init__(self, rows: int, vocab_size: int, prior: float, device: torch.device):
        self.rows = rows
        self.vocab_size = vocab_size
        self.prior = prior
        self.counts = torch.zeros(rows, vocab_size, device=device, dtype=torch.float32)

    def row_of(self, prev2: Tensor, prev: Tensor) -> Tensor:
        return (prev2 * 1_000_003 + prev * 8191) % self.rows

    def mix(self, logp: Tensor, prev2: Tensor, prev: Tensor) -> Tensor:
        counts = self.counts[self.row_of(prev2, prev)]
        total = counts.sum(dim=-1, keepdim=True)
        return ((counts + self.prior * logp.exp()) / (total + self.prior)).log()

    def update(self, prev2: Tensor, prev: Tensor, tgt: Tensor) -> None:
        flat = self.row_of(prev2, prev) * self.vocab_size + tgt
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))


def context_ids(tokens: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token before the previous, previous, target) of the targets lo..hi-1; tokens[t + 1] is target t."""
    pos = torch.arange(lo, hi, device=tokens.device)
    return tokens[(pos - 1).clamp_min(0)], tokens[pos], tokens[pos + 1]


def score_windows(
    logits_fn,
    tokens: Tensor,
    windows: list[tuple[int, int, int]],
    batch_seqs: int,
    luts: tuple[Tensor, Tensor, Tensor],
    sums: Tensor,
    cache: TrigramCache | None = None,
) -> None:
    """Adds loss, tokens and bytes of the windows' scored spans to sums. Batches are padded to one shape."""
    seq_len = windows[0][2] - windows[0][0] if windows else 0
    with torch.no_grad():
        for bi in range(0, len(windows), batch_seqs):
            batch = windows[bi : bi + batch_seqs]
            x = torch.zeros(batch_seqs, seq_len, dtype=torch.int64, device=tokens.device)
            for i, (begin, _, end) in enumerate(batch):
                x[i] = tokens[begin:end]
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            rows = torch.cat([logits[i, s - b : e - b] for i, (b, s, e) in enumerate(batch)]).float()
            ids = [context_ids(tokens, s, e) for _, s, e in batch]
            prev2, prev, tgt = (torch.cat(part) for part in zip(*ids))
            logp = F.log_softmax(rows, dim=-1)
            if cache is not None:
                logp = cache.mix(logp, prev2, prev)
            nll = -logp.gather(1, tgt[:, None]).squeeze(1)
            sums[0] += nll.to(torch.float64).sum()
            sums[1] += tgt.numel()
            sums[2] += count_bytes(luts, prev, tgt).sum()


def eval_val_sliding(
    args: type[Hyperparameters],
    model: GPT,
    logits_fn,
    rank: int,
    world_size: int,
    tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    windows = plan_windows(tokens.numel() - 1, args.eval_seq_len, args.eval_stride)
    mine = windows[len(windows) * rank // world_size : len(windows) * (rank + 1) // world_size]
    sums = torch.zeros(3, device=tokens.device, dtype=torch.float64)
    model.eval()
    score_windows(logits_fn, tokens, mine, args.eval_batch_seqs, luts, sums)
    return to_bpb(*reduce_sums(sums))


def adapt_on_chunk(
    args: type[Hyperparameters],
    model: GPT,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    start: int,
    end: int,
    rank: int,
    world_size: int,
) -> None:
    """SGD on the targets start..end-1, all of them scored before the call; gradients are averaged over ranks."""
    seq_len = args.eval_seq_len
    per_rank = (end - start) // seq_len // world_size
    if per_rank == 0:
        return
    first = start + rank * per_rank * seq_len
    params = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    for _ in range(args.ttt_epochs):
        for s in range(0, per_rank, args.ttt_batch_seqs):
            n = min(args.ttt_batch_seqs, per_rank - s)
            lo = first + s * seq_len
            local = tokens[lo : lo + n * seq_len + 1]
            x = local[:-1].reshape(n, seq_len)
            y = local[1:].reshape(n, seq_len)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            loss.backward()
            if world_size > 1:
                for p in params:
                    if p.grad is not None:
                        dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def out_of_time(deadline: float, device: torch.device) -> bool:
    """Whether any rank is past the deadline; all ranks get the same answer."""
    late = torch.tensor(int(time.perf_counter() > deadline), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
    return bool(late.item())


def eval_val_sliding_ttt(
    args: type[Hyperparameters],
    model: GPT,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    eval_start: float,
    log0,
) -> tuple[float, float]:
    """Legal score-first TTT: a chunk is scored by all ranks, then trained on by all ranks, then left behind.

    Past the deadline the rest is scored without further training, so that the whole split is always scored in time.
    """
    total = tokens.numel() - 1
    chunk = args.ttt_chunk_tokens
    num_chunks = -(-total // chunk)
    by_chunk: list[list[tuple[int, int, int]]] = [[] for _ in range(num_chunks)]
    for window in plan_windows(total, args.eval_seq_len, args.eval_stride):
        by_chunk[window[1] // chunk].append(window)

    for p in model.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.ttt_lr, momentum=args.ttt_momentum)
    cache = TrigramCache(args.cache_rows, args.vocab_size, args.cache_prior, device) if args.cache_enabled else None
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    deadline = eval_start + args.max_eval_seconds - args.ttt_time_reserve
    adapting = True
    log0(f"ttt:start chunks:{num_chunks} lr:{args.ttt_lr} epochs:{args.ttt_epochs} cache:{int(args.cache_enabled)}")

    for ci, windows in enumerate(by_chunk):
        # 1. score
        model.eval()
        mine = windows[len(windows) * rank // world_size : len(windows) * (rank + 1) // world_size]
        score_windows(logits_fn, tokens, mine, args.eval_batch_seqs, luts, sums, cache)
        # 2. learn from what has just been scored
        start, end = ci * chunk, min((ci + 1) * chunk, total)
        if cache is not None and windows:
            cache.update(*context_ids(tokens, windows[0][1], windows[-1][2]))
        if adapting and ci < num_chunks - 1:
            if out_of_time(deadline, device):
                adapting = False
                log0(f"ttt:deadline at chunk {ci}, scoring on without training")
            else:
                for group in optimizer.param_groups:
                    group["lr"] = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
                adapt_on_chunk(args, model, optimizer, tokens, start, end, rank, world_size)
        if ci % 200 == 0:
            running = to_bpb(*(float(v) for v in sums.tolist()))[1] if sums[2] > 0 else float("nan")
            log0(f"ttt:chunk {ci + 1}/{num_chunks} rank0_bpb:{running:.5f} t:{time.perf_counter() - eval_start:.1f}s")
    return to_bpb(*reduce_sums(sums))


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters

    # ---- distributed + CUDA setup

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
    log0(f"Running PyTorch {torch.__version__} fa3:{_HAS_FA3} compressor:{_COMPRESSOR}")
    log0(
        subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False).stdout,
        console=False,
    )

    # ---- tokenizer, validation split, byte tables

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    bos_id = int(sp.bos_id())
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"train_loader:shards:{len(glob.glob(args.train_files))} pattern:{args.train_files}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # ---- model

    base_model = GPT(args, bos_id).to(device)
    restore_fp32(base_model)
    QATState.enabled = False
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")

    # ---- optimizers: banks by Parallel Muon, the rest by AdamW

    bank_params = [p for name, p in base_model.named_parameters() if name in BANK_NAMES]
    embed_params = [base_model.tok_emb.weight, base_model.bigram.embed.weight]
    embed_ids = {id(p) for p in embed_params} | {id(p) for p in bank_params}
    scalar_params = [p for p in base_model.parameters() if id(p) not in embed_ids]
    optimizer_muon = Muon(
        bank_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    optimizer_embed = torch.optim.AdamW(
        [{"params": embed_params, "lr": args.tied_embed_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizer_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    adam_optimizers = [optimizer_embed, optimizer_scalar]
    optimizers = [optimizer_muon, *adam_optimizers]
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    replicated_params = embed_params + scalar_params

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    def step_all() -> None:
        """Reduce-scatter of the banks first, Adam's all-reduce and step while it runs, then Muon."""
        optimizer_muon.launch_reduce_scatters()
        if distributed:
            for p in replicated_params:
                if p.grad is not None:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(replicated_params, args.grad_clip_norm)
        for opt in adam_optimizers:
            opt.step()
        optimizer_muon.step()
        zero_grad_all()

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # ---- clocks and schedules; what is reserved for the calibration is taken from the training's 600 s

    train_budget_ms = 1000.0 * (args.max_wallclock_seconds - args.gptq_reserve_seconds)

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(train_budget_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    # ---- warm-up primes the compiled paths, then weights, optimizers and loader start afresh

    if args.warmup_steps > 0:
        initial_model = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
        initial_adam = [copy.deepcopy(opt.state_dict()) for opt in adam_optimizers]
        compiled_model.train()
        for warmup_step in range(args.warmup_steps):
            QATState.enabled = warmup_step == args.warmup_steps - 1
            zero_grad_all()
            for _ in range(grad_accum_steps):
                x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    warmup_loss = compiled_model(x, y)
                (warmup_loss * grad_scale).backward()
            step_all()
            if (warmup_step + 1) % 10 == 0 or warmup_step + 1 == args.warmup_steps:
                log0(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
        QATState.enabled = False
        base_model.load_state_dict(initial_model, strict=True)
        for opt, state in zip(adam_optimizers, initial_adam, strict=True):
            opt.load_state_dict(state)
        optimizer_muon.reset_state()
        zero_grad_all()
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # ---- main training loop

    ema_state = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, compiled_model, rank, world_size, device, val_tokens, luts)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after_step is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_mul(step, elapsed_ms)
        if not QATState.enabled and scale < args.late_qat_threshold and step > 100:
            QATState.enabled = True
            log0(f"late_qat:enabled step:{step} scale:{scale:.4f}")
        zero_grad_all()
        train_loss = torch.zeros((), device=device)
        for _ in range(grad_accum_steps):
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = compiled_model(x, y)
            train_loss += loss.detach()
            (loss * grad_scale).backward()
        train_loss /= grad_accum_steps

        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        for group in optimizer_muon.param_groups:
            group["momentum"] = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        step_all()

        with torch.no_grad():
            for name, t in base_model.state_dict().items():
                ema_state[name].mul_(args.ema_decay).add_(t.detach().float(), alpha=1.0 - args.ema_decay)

        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )
        reached_cap = approx_ms >= train_budget_ms
        if distributed:
            cap_flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(cap_flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(cap_flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- EMA weights, Hessians: still on the training's clock

    t_calib = time.perf_counter()
    QATState.enabled = False
    log0("ema: applying EMA weights")
    current = base_model.state_dict()
    base_model.load_state_dict({n: ema_state[n].to(dtype=current[n].dtype) for n in current}, strict=True)
    hessians = collect_hessians(base_model, args, train_loader, device, bos_id)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t_calib)
    log0(
        f"gptq: {len(hessians)} hessians from source:{args.calib_source} in {calib_ms:.0f}ms, "
        f"train+calibration {training_time_ms + calib_ms:.0f}ms"
    )
    if training_time_ms + calib_ms > 1000.0 * args.max_wallclock_seconds:
        raise RuntimeError("training and calibration took longer than MAX_WALLCLOCK_SECONDS: raise GPTQ_RESERVE_SECONDS")
    del train_loader

    # ---- quantize, pack, count

    packed, meta = mixed_quantize(base_model.state_dict(), hessians, args)
    model_file = "final_model.int6.ptz"
    if master_process:
        blob = pack_blob(packed, meta)
        with open(model_file, "wb") as f:
            f.write(blob)
        model_bytes = len(blob)
        code_bytes = len(code.encode("utf-8"))
        log0(f"Serialized model int6+{_COMPRESSOR}: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {model_bytes + code_bytes} bytes")
        if model_bytes + code_bytes > args.size_limit_bytes:
            raise RuntimeError(f"over the limit of {args.size_limit_bytes} bytes")
    if distributed:
        dist.barrier()

    # ---- evaluation of what lies in the file

    eval_start = time.perf_counter()
    with open(model_file, "rb") as f:
        packed_back, meta_back = unpack_blob(f.read())
    eval_model = GPT(args, bos_id).to(device)
    restore_fp32(eval_model)
    eval_model.load_state_dict(dequantize_mixed(packed_back, meta_back, eval_model.state_dict()), strict=True)
    compiled_eval = torch.compile(eval_model, dynamic=False, fullgraph=True)
    logits_fn = torch.compile(eval_model.forward_logits, dynamic=False, fullgraph=True)
    stream = val_tokens.to(device=device, dtype=torch.int64)

    t_part = time.perf_counter()
    q_loss, q_bpb = eval_val(args, compiled_eval, rank, world_size, device, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_part):.0f}ms"
    )

    t_part = time.perf_counter()
    if args.ttt_enabled:
        final_loss, final_bpb = eval_val_sliding_ttt(
            args, eval_model, logits_fn, rank, world_size, device, stream, luts, eval_start, log0
        )
        label = "legal_ttt"
    else:
        final_loss, final_bpb = eval_val_sliding(args, eval_model, logits_fn, rank, world_size, stream, luts)
        label = "final_sliding_window"
    torch.cuda.synchronize()
    log0(
        f"{label} val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} stride:{args.eval_stride} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_part):.0f}ms"
    )
    log0(f"total_eval_time:{time.perf_counter() - eval_start:.1f}s limit:{args.max_eval_seconds:.0f}s")
    log0(f"{label}_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
