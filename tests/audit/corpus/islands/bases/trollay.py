"""train_gpt.py - 11L x 512d SP8192, depth recurrence 3-5, parallel residuals 7+, XSA, SmearGate + bigram hash,
Muon (decoupled WD) / AdamW, EMA + late QAT, GPTQ int6 (SDClip, full Hessian), brotli over shuffled bytes,
phased global-SGD TTT with per-document LoRA (score first), token-only n-gram tilt.

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
import uuid
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import brotli
except ImportError:
    brotli = None


def env_int(key: str, default: int) -> int:
    return int(os.environ.get(key, default))


def env_float(key: str, default: float) -> float:
    return float(os.environ.get(key, default))


def env_flag(key: str, default: bool) -> bool:
    return bool(int(os.environ.get(key, "1" if default else "0")))


# ----------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------


class Hyperparameters:
    # paths
    data_root = os.environ.get("DATA_DIR", "./data")
    vocab_size = env_int("VOCAB_SIZE", 8192)
    data_path = os.environ.get("DATA_PATH", os.path.join(data_root, "datasets", f"fineweb10B_sp{vocab_size}"))
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get(
        "TOKENIZER_PATH", os.path.join(data_root, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    )
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)
    out_dir = os.environ.get("OUT_DIR", ".")
    artifact_name = os.environ.get("ARTIFACT", "final_model.int6.ptz")
    artifact_limit = 16_000_000

    # schedule
    iterations = env_int("ITERATIONS", 20000)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    warmdown_frac = env_float("WARMDOWN_FRAC", 0.72)
    min_lr = env_float("MIN_LR", 0.0)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    val_batch_tokens = env_int("VAL_BATCH_TOKENS", 524_288)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    # taken off the training cap: Hessians, GPTQ and compression have to fit into the same 600 s
    gptq_reserve_seconds = env_float("GPTQ_RESERVE_SECONDS", 26.0)

    # model
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 4.0)
    leaky_slope = env_float("LEAKY_SLOPE", 0.5)
    rope_base = env_float("ROPE_BASE", 10000.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 5.25)
    xsa_last_n = env_int("XSA_LAST_N", 11)
    parallel_start = env_int("PARALLEL_START", 7)
    loop_start = env_int("LOOP_START", 3)
    loop_end = env_int("LOOP_END", 5)
    loop_extra = env_int("LOOP_EXTRA", 2)
    enable_looping_at = env_float("ENABLE_LOOPING_AT", 0.35)
    bigram_buckets = env_int("BIGRAM_BUCKETS", 3072)
    bigram_dim = env_int("BIGRAM_DIM", 64)
    bos_id = env_int("BOS_ID", 1)

    # optimizer
    matrix_lr = env_float("MATRIX_LR", 0.022)
    scalar_lr = env_float("SCALAR_LR", 0.02)
    embed_lr = env_float("EMBED_LR", 0.03)
    muon_momentum = env_float("MUON_MOMENTUM", 0.97)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_ns_steps = env_int("MUON_NS_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.095)
    embed_wd = env_float("EMBED_WD", 0.085)
    adam_wd = env_float("ADAM_WD", 0.02)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    grad_clip = env_float("GRAD_CLIP", 0.3)
    ema_decay = env_float("EMA_DECAY", 0.9965)
    late_qat_threshold = env_float("LATE_QAT_THRESHOLD", 0.15)

    # quantisation
    matrix_bits = env_int("MATRIX_BITS", 6)
    embed_bits = env_int("EMBED_BITS", 8)
    matrix_clip_sigmas = env_float("MATRIX_CLIP_SIGMAS", 12.85)
    embed_clip_sigmas = env_float("EMBED_CLIP_SIGMAS", 20.0)
    gptq_batches = env_int("GPTQ_BATCHES", 24)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    compressor = os.environ.get("COMPRESSOR", "brotli")

    # evaluation
    max_eval_seconds = env_float("MAX_EVAL_SECONDS", 600.0)
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_batch_seqs = env_int("EVAL_BATCH_SEQS", 32)
    logit_temp = env_float("LOGIT_TEMP", 1.0)
    sliding_enabled = env_flag("SLIDING_ENABLED", True)
    ttt_enabled = env_flag("TTT_ENABLED", True)
    ttt_phases = env_int("TTT_PHASES", 4)
    ttt_chunk = env_int("TTT_CHUNK", 128)
    ttt_batch = env_int("TTT_BATCH", 192)
    ttt_lora_rank = env_int("TTT_LORA_RANK", 64)
    ttt_lora_alpha = env_float("TTT_LORA_ALPHA", 96.0)
    ttt_lora_lr = env_float("TTT_LORA_LR", 1e-4)
    ttt_lora_wd = env_float("TTT_LORA_WD", 0.5)
    ttt_global_lr = env_float("TTT_GLOBAL_LR", 1e-3)
    ttt_global_momentum = env_float("TTT_GLOBAL_MOMENTUM", 0.9)
    ttt_global_epochs = env_int("TTT_GLOBAL_EPOCHS", 1)
    ttt_global_clip = env_float("TTT_GLOBAL_CLIP", 1.0)
    ttt_global_seqs = env_int("TTT_GLOBAL_SEQS", 8)

    # token-only tilt
    tilt_enabled = env_flag("TILT_ENABLED", True)
    tilt_order = env_int("TILT_ORDER", 4)
    tilt_beta = env_float("TILT_BETA", 1.1)
    tilt_full_count = env_int("TILT_FULL_COUNT", 3)


CONTROL_NAMES = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "skip_gates",
    "lane_merge",
    "smear",
    "bigram.scale",
)

# ----------------------------------------------------------------------------
# Logging, timing
# ----------------------------------------------------------------------------

_LOG_FILE: Path | None = None
_IS_MASTER = True


def setup_log(h: Hyperparameters, rank: int) -> None:
    global _LOG_FILE, _IS_MASTER
    _IS_MASTER = rank == 0
    if _IS_MASTER:
        folder = Path(h.out_dir) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        _LOG_FILE = folder / f"{h.run_id}.txt"


def log(message: str, console: bool = True) -> None:
    if not _IS_MASTER:
        return
    if console:
        print(message, flush=True)
    if _LOG_FILE is not None:
        with _LOG_FILE.open("a", encoding="utf-8") as f:
            print(message, file=f)


class CudaClock:
    """A stop-watch over torch.cuda.Event; it can be paused (the logged validations of the training loop)."""

    def __init__(self) -> None:
        self.total_ms = 0.0
        self.begin: torch.cuda.Event | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.begin = torch.cuda.Event(enable_timing=True)
        self.begin.record()

    def ms(self) -> float:
        if self.begin is None:
            return self.total_ms
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return self.total_ms + self.begin.elapsed_time(now)

    def pause(self) -> float:
        torch.cuda.synchronize()
        self.total_ms = self.ms()
        self.begin = None
        return self.total_ms


# ----------------------------------------------------------------------------
# Tokenizer bytes
# ----------------------------------------------------------------------------


class ByteTables:
    """UTF-8 bytes of every token: its own, and one more for a leading space unless it follows a control token."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        n = max(int(sp.vocab_size()), vocab_size)
        own = np.zeros(n, dtype=np.int16)
        leading = np.zeros(n, dtype=np.bool_)
        control = np.ones(n, dtype=np.bool_)
        for i in range(int(sp.vocab_size())):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            control[i] = False
            if sp.is_byte(i):
                own[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                leading[i] = True
                piece = piece[1:]
            own[i] = len(piece.replace("\u2581", " ").encode("utf-8"))
        self.own = torch.from_numpy(own).to(device)
        self.leading = torch.from_numpy(leading).to(device)
        self.control = torch.from_numpy(control).to(device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        size = self.own[target].to(torch.int16)
        size = size + (self.leading[target] & ~self.control[prev]).to(torch.int16)
        return size.to(torch.float64)


# ----------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------

SHARD_MAGIC = 20240520
HEADER_INTS = 256


def load_data_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"bad shard header in {file}")
    count = int(header[2])
    tokens = np.fromfile(file, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"short read of {file}: {tokens.size} of {count}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no validation shards: {pattern}")
    return torch.cat([load_data_shard(f) for f in files]).contiguous()


class ShardedSequenceLoader:
    """Sequences of a rank's share of the training shards, drawn in a seeded random order without replacement."""

    def __init__(self, pattern: str, seq_len: int, rank: int, world_size: int, device: torch.device, seed: int):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no training shards: {pattern}")
        self.files = self.files[rank::world_size] or self.files
        self.seq_len = seq_len
        self.device = device
        self.rng = np.random.default_rng(seed * 1009 + rank)
        self.order = self.rng.permutation(len(self.files))
        self.at = 0
        self.tokens: Tensor | None = None
        self.starts = np.zeros(0, dtype=np.int64)
        self.next_start = 0

    def _next_shard(self) -> None:
        if self.at == len(self.order):
            self.order = self.rng.permutation(len(self.files))
            self.at = 0
        self.tokens = load_data_shard(self.files[int(self.order[self.at])])
        self.at += 1
        phase = int(self.rng.integers(0, self.seq_len))
        count = (self.tokens.numel() - 1 - phase) // self.seq_len
        self.starts = phase + self.rng.permutation(count) * self.seq_len
        self.next_start = 0

    def next_batch(self, tokens_per_rank: int) -> tuple[Tensor, Tensor]:
        rows = tokens_per_rank // self.seq_len
        out = torch.empty(rows, self.seq_len + 1, dtype=torch.int64)
        for r in range(rows):
            while self.next_start >= len(self.starts):
                self._next_shard()
            s = int(self.starts[self.next_start])
            self.next_start += 1
            out[r] = self.tokens[s : s + self.seq_len + 1].to(torch.int64)
        out = out.pin_memory().to(self.device, non_blocking=True)
        return out[:, :-1].contiguous(), out[:, 1:].contiguous()


def find_documents(tokens: Tensor, bos_id: int) -> list[tuple[int, int]]:
    """(start, length) of each document: from its BOS up to and including the next one's, so that each is a target once."""
    heads = (tokens == bos_id).nonzero(as_tuple=True)[0].tolist()
    if not heads or heads[0] != 0:
        heads = [0, *heads]
    ends = [*(b + 1 for b in heads[1:]), tokens.numel()]
    return [(b, e - b) for b, e in zip(heads, ends) if e - b >= 2]


# ----------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------


def fake_quant_rows(w: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    """Straight-through int quantisation with the scales that GPTQ will use."""
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        wf = w.float()
        scale = (clip_sigmas * wf.std(dim=1, keepdim=True) / top).clamp_min(1e-8)
        q = torch.clamp(torch.round(wf / scale), -top, top) * scale
    return w + (q.to(w.dtype) - w).detach()


class CastedLinear(nn.Linear):
    """fp32 weights, activations' dtype in the product. late_qat is switched on for all of them at once."""

    late_qat = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if CastedLinear.late_qat and self.training and w.ndim == 2:
            w = fake_quant_rows(w, Hyperparameters.matrix_bits, Hyperparameters.matrix_clip_sigmas)
        return F.linear(x, w.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    def __init__(self, rot_dims: int, base: float, train_seq_len: int):
        super().__init__()
        self.rot_dims = rot_dims
        self.base = base
        self.train_seq_len = train_seq_len
        inv = 1.0 / (base ** (torch.arange(0, rot_dims, 2, dtype=torch.float32) / rot_dims))
        self.register_buffer("inv_freq", inv, persistent=False)

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inv = self.inv_freq.to(device)
        if seq_len > self.train_seq_len:
            ratio = seq_len / self.train_seq_len
            inv = inv / (ratio ** (torch.arange(inv.numel(), device=device) / max(inv.numel() - 1, 1)))
        angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), inv)
        return angles.cos()[None, :, None, :].to(dtype), angles.sin()[None, :, None, :].to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, rot_dims: int) -> Tensor:
    rot, rest = x[..., :rot_dims], x[..., rot_dims:]
    a, b = rot.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h: Hyperparameters, use_xsa: bool):
        super().__init__()
        self.num_heads = h.num_heads
        self.num_kv_heads = h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.proj.zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rope_dims = h.rope_dims
        self.rotary = Rotary(h.rope_dims, h.rope_base, h.train_seq_len)
        self.use_xsa = use_xsa

    def exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: takes the direction of a position's own value out of its output (per kv group, no repeat)."""
        b, t, nh, d = y.shape
        groups = y.reshape(b, t, self.num_kv_heads, nh // self.num_kv_heads, d)
        unit = F.normalize(v, dim=-1).unsqueeze(-2)
        return (groups - (groups * unit).sum(dim=-1, keepdim=True) * unit).reshape(b, t, nh, d)

    def forward(self, x: Tensor, lora: tuple | None = None) -> Tensor:
        b, t, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if lora is not None:
            q = q + lora[0](x)
            v = v + lora[1](x)
        q = q.view(b, t, self.num_heads, self.head_dim)
        k = k.view(b, t, self.num_kv_heads, self.head_dim)
        v = v.view(b, t, self.num_kv_heads, self.head_dim)
        q, k = rms_norm(q), rms_norm(k)
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = apply_rotary(q, cos, sin, self.rope_dims)
        k = apply_rotary(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.use_xsa:
            y = self.exclude_self(y, v)
        return self.proj(y.reshape(b, t, dim))


class MLP(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        hidden = int(h.model_dim * h.mlp_mult)
        self.fc = CastedLinear(h.model_dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, h.model_dim, bias=False)
        self.proj.zero_init = True
        self.slope = h.leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=self.slope).square())


class Block(nn.Module):
    def __init__(self, h: Hyperparameters, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(h, use_xsa=layer >= h.num_layers - h.xsa_last_n)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        self.ln_factor = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, lora: tuple | None = None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x) * self.ln_factor, lora)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.ln_factor)

    def forward_parallel(self, lanes: tuple[Tensor, Tensor], x0: Tensor, lora: tuple | None = None):
        """Two residual lanes: attention reads and writes the first, the MLP the second."""
        mix = self.resid_mix.to(x0.dtype)
        a = mix[0] * lanes[0] + mix[1] * x0
        m = lanes[1]
        attn_out = self.attn(rms_norm(a) * self.ln_factor, lora)
        mlp_out = self.mlp(rms_norm(m) * self.ln_factor)
        return a + self.attn_scale.to(a.dtype) * attn_out, m + self.mlp_scale.to(m.dtype) * mlp_out


class BigramHash(nn.Module):
    """An embedding of the hashed pair (previous token, this token), added to the token's own."""

    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.buckets = h.bigram_buckets
        self.bos_id = h.bos_id
        self.embed = nn.Embedding(h.bigram_buckets, h.bigram_dim)
        self.proj = CastedLinear(h.bigram_dim, h.model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))
        nn.init.normal_(self.embed.weight, std=0.02)

    def keys(self, ids: Tensor) -> Tensor:
        mod = self.buckets - 1
        prev, cur = ids[:, :-1].to(torch.int32), ids[:, 1:].to(torch.int32)
        out = torch.full_like(ids, mod, dtype=torch.int32)
        hashed = torch.bitwise_xor(36313 * cur, 27191 * prev) % mod
        out[:, 1:] = torch.where(cur == self.bos_id, torch.full_like(hashed, mod), hashed)
        return out.long()

    def forward(self, ids: Tensor) -> Tensor:
        e = self.embed(self.keys(ids))
        return self.proj(e) * self.scale.to(e.dtype)


class SmearGate(nn.Module):
    """Mixes the previous token's embedding into this one's; never across a document's BOS."""

    def __init__(self, dim: int, bos_id: int, width: int = 12):
        super().__init__()
        self.width = width
        self.bos_id = bos_id
        self.gate = CastedLinear(width, 1, bias=False)
        self.gate.zero_init = True
        self.lam = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = self.lam.to(x.dtype) * torch.sigmoid(self.gate(x[:, 1:, : self.width]))
        g = g * (ids[:, 1:] != self.bos_id).unsqueeze(-1).to(x.dtype)
        return torch.cat((x[:, :1], x[:, 1:] + g * x[:, :-1]), dim=1)


class GPT(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.h = h
        self.logit_softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.bigram = BigramHash(h)
        self.smear = SmearGate(h.model_dim, h.bos_id)
        self.blocks = nn.ModuleList(Block(h, i) for i in range(h.num_layers))
        segment = list(range(h.loop_start, h.loop_end + 1))
        looped = list(range(h.loop_start)) + segment * (1 + h.loop_extra) + list(range(h.loop_end + 1, h.num_layers))
        half = len(looped) // 2
        self.loop_encoder, self.loop_decoder = looped[:half], looped[half:]
        self.flat_encoder = list(range(h.num_layers // 2))
        self.flat_decoder = list(range(h.num_layers // 2, h.num_layers))
        self.looping_active = False
        skips = min(len(self.loop_encoder), len(self.loop_decoder))
        self.skip_weights = nn.Parameter(torch.ones(skips, h.model_dim, dtype=torch.float32))
        self.skip_gates = nn.Parameter(torch.zeros(skips, h.model_dim, dtype=torch.float32))
        self.lane_merge = nn.Parameter(torch.tensor(0.5, dtype=torch.float32))
        self.parallel_start = h.parallel_start
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        for module in self.modules():
            if isinstance(module, CastedLinear):
                if getattr(module, "zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)

    def forward_hidden(self, ids: Tensor, lora: "DocumentLoRA | None" = None) -> Tensor:
        x = self.tok_emb(ids).to(torch.bfloat16)
        x = x + self.bigram(ids).to(x.dtype)
        x = self.smear(rms_norm(x), ids)
        x0 = x
        encoder = self.loop_encoder if self.looping_active else self.flat_encoder
        decoder = self.loop_decoder if self.looping_active else self.flat_decoder
        skips: list[Tensor] = []
        for i in encoder:
            x = self.blocks[i](x, x0, None if lora is None else lora.block(i))
            skips.append(x)
        lanes: tuple[Tensor, Tensor] | None = None
        for n, i in enumerate(decoder):
            delta = None if lora is None else lora.block(i)
            if skips and n < self.skip_weights.size(0):
                skip = self.skip_weights[n].to(x.dtype) * skips.pop()
                gate = torch.sigmoid(self.skip_gates[n].to(x.dtype))
                if lanes is None:
                    x = torch.lerp(skip, x, gate)
                else:
                    lanes = (torch.lerp(skip, lanes[0], gate), lanes[1])
            if i >= self.parallel_start:
                lanes = (x, x) if lanes is None else lanes
                lanes = self.blocks[i].forward_parallel(lanes, x0, delta)
            else:
                x = self.blocks[i](x, x0, delta)
        if lanes is not None:
            m = self.lane_merge.to(x.dtype)
            x = m * lanes[0] + (1.0 - m) * lanes[1]
        return rms_norm(x)

    def forward_logits(self, ids: Tensor, lora: "DocumentLoRA | None" = None) -> Tensor:
        x = self.forward_hidden(ids, lora)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        if lora is not None:
            logits = logits + lora.head(x)
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1))


# ----------------------------------------------------------------------------
# Per-document LoRA
# ----------------------------------------------------------------------------


class RowLoRA(nn.Module):
    """One low-rank delta per row of the batch. rows: those that are in the present forward."""

    def __init__(self, batch: int, d_in: int, d_out: int, rank: int, alpha: float):
        super().__init__()
        self.d_in = d_in
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(batch, rank, d_in))
        self.B = nn.Parameter(torch.zeros(batch, d_out, rank))
        self.rows: Tensor | None = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        bound = 1.0 / math.sqrt(self.d_in)
        self.A.uniform_(-bound, bound)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.A[self.rows], self.B[self.rows]
        return self.scale * (x @ a.transpose(1, 2).to(x.dtype)) @ b.transpose(1, 2).to(x.dtype)


class DocumentLoRA(nn.Module):
    """LoRA on q, v of every block and on the head; a row belongs to one document and is reset before the next."""

    def __init__(self, batch: int, model: GPT, h: Hyperparameters):
        super().__init__()
        dim, rank, alpha = h.model_dim, h.ttt_lora_rank, h.ttt_lora_alpha
        kv = h.num_kv_heads * (dim // h.num_heads)
        self.q = nn.ModuleList(RowLoRA(batch, dim, dim, rank, alpha) for _ in model.blocks)
        self.v = nn.ModuleList(RowLoRA(batch, dim, kv, rank, alpha) for _ in model.blocks)
        self.head = RowLoRA(batch, dim, h.vocab_size, max(rank // 8, 4), alpha / 8)

    def block(self, i: int) -> tuple[RowLoRA, RowLoRA]:
        return self.q[i], self.v[i]

    def select(self, rows: Tensor) -> None:
        for module in (*self.q, *self.v, self.head):
            module.rows = rows

    def reset(self) -> None:
        for module in (*self.q, *self.v, self.head):
            module.reset()


# ----------------------------------------------------------------------------
# Optimizers
# ----------------------------------------------------------------------------


@torch.compile
def newton_schulz(g: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay. Gradients arrive averaged; each rank orthogonalises its share of the matrices."""

    def __init__(self, params, lr: float, momentum: float, ns_steps: int, weight_decay: float, rank: int, world: int):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay))
        self.rank, self.world = rank, world

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for n, p in enumerate(params):
                if n % self.world == self.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = g / g.norm(dim=1, keepdim=True).clamp_min(1e-7)
                    g = newton_schulz(g, group["ns_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if self.world > 1:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


class Optimizers:
    def __init__(self, h: Hyperparameters, model: GPT, rank: int, world: int):
        named = list(model.named_parameters())
        embeds = [p for n, p in named if n in ("tok_emb.weight", "bigram.embed.weight")]
        matrices = [
            p
            for n, p in named
            if p.ndim == 2 and "embed" not in n and "tok_emb" not in n and not any(c in n for c in CONTROL_NAMES)
        ]
        taken = {id(p) for p in (*embeds, *matrices)}
        scalars = [p for _, p in named if id(p) not in taken]
        betas = (h.beta1, h.beta2)
        self.muon = Muon(matrices, h.matrix_lr, h.muon_momentum, h.muon_ns_steps, h.muon_wd, rank, world)
        self.embed = torch.optim.AdamW(embeds, lr=h.embed_lr, betas=betas, weight_decay=h.embed_wd, fused=True)
        self.scalar = torch.optim.AdamW(scalars, lr=h.scalar_lr, betas=betas, weight_decay=h.adam_wd, fused=True)
        self.all = (self.muon, self.embed, self.scalar)
        self.params = [p for _, p in named]
        self.world = world
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def reduce_gradients(self) -> None:
        if self.world == 1:
            return
        for p in self.params:
            if p.grad is not None:
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)

    def set_lr(self, scale: float) -> None:
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self) -> None:
        for opt in self.all:
            opt.step()

    def zero_grad(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)


class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            self.shadow[name].lerp_(tensor.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({n: t.to(current[n].dtype) for n, t in self.shadow.items()}, strict=True)


# ----------------------------------------------------------------------------
# GPTQ and packing
# ----------------------------------------------------------------------------


def gptq_targets(model: GPT) -> dict[str, CastedLinear]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536
    }


def collect_hessians(
    h: Hyperparameters, model: GPT, loader: ShardedSequenceLoader, device: torch.device, world: int
) -> dict[str, Tensor]:
    """X^T X of the inputs of every large matrix, over batches of the training loader."""
    targets = gptq_targets(model)
    hessians = {
        name: torch.zeros(m.in_features, m.in_features, device=device, dtype=torch.float32)
        for name, m in targets.items()
    }

    def hook_for(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            hessians[name].addmm_(x.T, x)

        return hook

    handles = [m.register_forward_hook(hook_for(name)) for name, m in targets.items()]
    model.eval()
    with torch.no_grad():
        for _ in range(h.gptq_batches):
            calib_x, _ = loader.next_batch(16 * h.train_seq_len)
            model.forward_hidden(calib_x)
    for handle in handles:
        handle.remove()
    for hess in hessians.values():
        if world > 1:
            dist.all_reduce(hess, op=dist.ReduceOp.SUM)
        hess /= h.gptq_batches * world
    return hessians


def row_scales(w: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return (clip_sigmas * w.std(dim=1) / top).clamp_min(1e-8).to(torch.float16).float()


def round_rows(w: Tensor, bits: int, clip_sigmas: float) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    s = row_scales(w, bits, clip_sigmas)
    q = torch.clamp(torch.round(w / s[:, None]), -top, top).to(torch.int8)
    return q, s.to(torch.float16)


def gptq_rows(w: Tensor, hess: Tensor, h: Hyperparameters) -> tuple[Tensor, Tensor]:
    """GPTQ with act-order: columns by falling diagonal of the Hessian, the error carried to those that follow."""
    top = 2 ** (h.matrix_bits - 1) - 1
    rows, cols = w.shape
    hess = hess.clone()
    dead = torch.diagonal(hess) == 0
    hess[dead, dead] = 1.0
    hess.diagonal().add_(h.gptq_damp * hess.diagonal().mean())
    perm = torch.argsort(hess.diagonal(), descending=True)
    inverse = torch.argsort(perm)
    work = w.clone()
    work[:, dead] = 0.0
    work = work[:, perm]
    hess = hess[perm][:, perm]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hess)), upper=True)
    s = row_scales(w, h.matrix_bits, h.matrix_clip_sigmas)
    q = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    for lo in range(0, cols, h.gptq_block):
        hi = min(lo + h.gptq_block, cols)
        block = work[:, lo:hi].clone()
        errors = torch.zeros_like(block)
        local = upper[lo:hi, lo:hi]
        for j in range(hi - lo):
            column = block[:, j]
            qj = torch.clamp(torch.round(column / s), -top, top)
            q[:, lo + j] = qj.to(torch.int8)
            err = (column - qj * s) / local[j, j]
            errors[:, j] = err
            block[:, j:] -= err[:, None] * local[j, j:][None, :]
        if hi < cols:
            work[:, hi:] -= errors @ upper[lo:hi, hi:]
    return q[:, inverse].contiguous(), s.to(torch.float16)


def quantize_state(h: Hyperparameters, state: dict[str, Tensor], hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    kinds: dict[str, int] = {}
    for name, tensor in state.items():
        t = tensor.detach().float()
        if name in hessians:
            out[name + ".q"], out[name + ".s"] = (v.cpu() for v in gptq_rows(t, hessians[name], h))
            kind = f"gptq int{h.matrix_bits}"
        elif t.ndim == 2 and t.numel() > 65536:
            out[name + ".q"], out[name + ".s"] = (v.cpu() for v in round_rows(t, h.embed_bits, h.embed_clip_sigmas))
            kind = f"int{h.embed_bits}"
        else:
            out[name] = t.to(torch.float16).cpu()
            kind = "fp16"
        kinds[kind] = kinds.get(kind, 0) + t.numel()
    log("quantized: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    return out


def dequantize_state(packed: dict[str, Tensor], template: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, like in template.items():
        if name in packed:
            state[name] = packed[name].to(like.dtype)
        else:
            state[name] = (packed[name + ".q"].float() * packed[name + ".s"].float()[:, None]).to(like.dtype)
    return state


SHUFFLE_MAGIC = b"BSH2"


def byte_shuffle(raw: bytes, stride: int = 2) -> bytes:
    a = np.frombuffer(raw, dtype=np.uint8)
    return SHUFFLE_MAGIC + bytes([stride]) + b"".join(a[i::stride].tobytes() for i in range(stride))


def byte_unshuffle(data: bytes) -> bytes:
    if data[:4] != SHUFFLE_MAGIC:
        return data
    stride = data[4]
    body = np.frombuffer(data, dtype=np.uint8, offset=5)
    out = np.empty(body.size, dtype=np.uint8)
    at = 0
    for i in range(stride):
        n = (body.size - i + stride - 1) // stride
        out[i::stride] = body[at : at + n]
        at += n
    return out.tobytes()


def compress(raw: bytes, kind: str) -> bytes:
    data = byte_shuffle(raw)
    if kind == "brotli" and brotli is not None:
        return b"B" + brotli.compress(data, quality=9, lgwin=24)
    return b"L" + lzma.compress(data, preset=6)


def decompress(blob: bytes) -> bytes:
    body = brotli.decompress(blob[1:]) if blob[:1] == b"B" else lzma.decompress(blob[1:])
    return byte_unshuffle(body)


def write_artifact(h: Hyperparameters, packed: dict[str, Tensor]) -> int:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    blob = compress(buffer.getvalue(), h.compressor)
    path = Path(h.out_dir) / h.artifact_name
    path.write_bytes(blob)
    code_bytes = len(Path(__file__).read_bytes())
    total = len(blob) + code_bytes
    log(f"Serialized model int{h.matrix_bits}+{h.compressor}: {len(blob)} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size: {total} bytes")
    if total > h.artifact_limit:
        raise RuntimeError(f"submission of {total} bytes is over the limit of {h.artifact_limit}")
    return total


def read_artifact(h: Hyperparameters, model: GPT) -> None:
    blob = (Path(h.out_dir) / h.artifact_name).read_bytes()
    packed = torch.load(io.BytesIO(decompress(blob)), map_location="cpu", weights_only=True)
    model.load_state_dict(dequantize_state(packed, model.state_dict()), strict=True)


# ----------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------


class ScoreLedger:
    """Sums of losses, tokens and bytes of a rank; reduced over ranks at the end."""

    def __init__(self, tables: ByteTables, device: torch.device):
        self.tables = tables
        self.loss = torch.zeros((), device=device, dtype=torch.float64)
        self.tokens = torch.zeros((), device=device, dtype=torch.float64)
        self.bytes = torch.zeros((), device=device, dtype=torch.float64)

    def add(self, nll: Tensor, prev: Tensor, target: Tensor) -> None:
        self.loss += nll.to(torch.float64).sum()
        self.tokens += float(nll.numel())
        self.bytes += self.tables.count(prev, target).sum()

    def result(self) -> tuple[float, float, int]:
        sums = torch.stack((self.loss, self.tokens, self.bytes))
        if dist.is_initialized():
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        loss, tokens, size = sums.tolist()
        return loss / tokens, loss / math.log(2.0) / size, int(tokens)


def eval_val(h: Hyperparameters, device, rank: int, world: int, model: nn.Module, tables: ByteTables, val: Tensor):
    """Whole sequences next to each other; what the training loop logs. The last few tokens are left out."""
    seqs = (val.numel() - 1) // h.train_seq_len
    lo, hi = seqs * rank // world, seqs * (rank + 1) // world
    per_batch = max(h.val_batch_tokens // (world * h.train_seq_len), 1)
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    count = torch.zeros((), device=device, dtype=torch.float64)
    size = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for s in range(lo, hi, per_batch):
            e = min(s + per_batch, hi)
            flat = val[s * h.train_seq_len : e * h.train_seq_len + 1].to(device=device, dtype=torch.int64)
            x = flat[:-1].view(-1, h.train_seq_len)
            y = flat[1:].view(-1, h.train_seq_len)
            loss_sum += model(x, y).to(torch.float64) * y.numel()
            count += y.numel()
            size += tables.count(x, y).sum()
    for t in (loss_sum, count, size):
        if dist.is_initialized():
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    model.train()
    return (loss_sum / count).item(), (loss_sum / math.log(2.0) / size).item()


def sliding_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored position) so that every target is in the scored part of exactly one window."""
    windows = [(0, min(seq_len, total), 0)]
    done = windows[0][1]
    while done < total:
        end = min(done + stride, total)
        windows.append((max(end - seq_len, 0), end, done))
        done = end
    return windows


def eval_val_sliding(
    h: Hyperparameters, device: torch.device, rank: int, world: int, model: GPT, tables: ByteTables, val: Tensor
) -> tuple[float, float]:
    total = val.numel() - 1
    windows = sliding_windows(total, h.eval_seq_len, h.eval_stride)
    mine = windows[len(windows) * rank // world : len(windows) * (rank + 1) // world]
    ledger = ScoreLedger(tables, device)
    model.eval()
    logits_of = torch.compile(model.forward_logits, dynamic=False)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        for at in range(0, len(mine), h.eval_batch_seqs):
            batch = mine[at : at + h.eval_batch_seqs]
            x = torch.zeros(h.eval_batch_seqs, h.eval_seq_len, dtype=torch.int64)
            y = torch.zeros(h.eval_batch_seqs, h.eval_seq_len, dtype=torch.int64)
            for r, (start, end, _) in enumerate(batch):
                span = val[start : end + 1].to(torch.int64)
                x[r, : end - start] = span[:-1]
                y[r, : end - start] = span[1:]
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            logits = logits_of(x).float() / h.logit_temp
            nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
            for r, (start, end, first) in enumerate(batch):
                a, b = first - start, end - start
                ledger.add(nll[r, a:b], x[r, a:b], y[r, a:b])
    val_loss, val_bpb, tokens = ledger.result()
    if tokens != total:
        raise RuntimeError(f"sliding window scored {tokens} tokens of {total}")
    return val_loss, val_bpb


class TokenHints:
    """For each position of a document the token that most often followed the same last few tokens before, if any.

    The table is read before the position's own target enters it; it starts empty with each document.
    """

    def __init__(self, order: int, full_count: int):
        self.order = order
        self.full_count = full_count

    def of_document(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        n = len(tokens) - 1
        hints = np.full(n, -1, dtype=np.int64)
        trust = np.zeros(n, dtype=np.float32)
        counts: dict[tuple[int, ...], int] = {}
        best: dict[tuple[int, ...], tuple[int, int]] = {}
        for i in range(self.order - 1, n):
            key = tuple(tokens[i - self.order + 1 : i + 1])
            seen = best.get(key)
            if seen is not None:
                hints[i] = seen[0]
                trust[i] = min(seen[1] / self.full_count, 1.0)
            follower = tokens[i + 1]
            pair = (*key, follower)
            counts[pair] = counts.get(pair, 0) + 1
            if seen is None or counts[pair] >= seen[1]:
                best[key] = (follower, counts[pair])
        return hints, trust


def tilted_nll(logp: Tensor, target: Tensor, hint: Tensor, beta: Tensor) -> Tensor:
    """-log of p(a) exp(beta [a = hint]) / Z at the target, where Z = 1 + p(hint) (exp(beta) - 1) over the vocabulary."""
    nll = -logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    p_hint = logp.gather(-1, hint.clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
    log_z = torch.log1p(p_hint * torch.expm1(beta))
    tilted = nll - beta * (target == hint).to(nll.dtype) + log_z
    return torch.where(hint >= 0, tilted, nll)


class DocumentBatch:
    """Documents of one rank, padded on the right; hints computed from each document's own past."""

    def __init__(self, h: Hyperparameters, val: Tensor, docs: list[tuple[int, int]], device: torch.device):
        longest = max(length for _, length in docs)
        self.chunks = [math.ceil((length - 1) / h.ttt_chunk) for _, length in docs]
        width = max(self.chunks) * h.ttt_chunk
        tokens = torch.zeros(len(docs), max(longest, width + 1), dtype=torch.int64)
        hint = np.full((len(docs), width), -1, dtype=np.int64)
        trust = np.zeros((len(docs), width), dtype=np.float32)
        finder = TokenHints(h.tilt_order, h.tilt_full_count)
        for r, (start, length) in enumerate(docs):
            tokens[r, :length] = val[start : start + length].to(torch.int64)
            if h.tilt_enabled:
                found = finder.of_document(tokens[r, :length].tolist())
                hint[r, : length - 1], trust[r, : length - 1] = found
        self.tokens = tokens.to(device)
        self.hint = torch.from_numpy(hint).to(device)
        self.trust = torch.from_numpy(trust).to(device)
        self.targets = torch.tensor([length - 1 for _, length in docs], device=device)


def score_documents(
    h: Hyperparameters, device: torch.device, model: GPT, lora: DocumentLoRA, batch: DocumentBatch, ledger: ScoreLedger
) -> None:
    """Chunk by chunk: score the chunk of every document, then one step of its LoRA on that chunk."""
    lora.reset()
    opt = torch.optim.AdamW(lora.parameters(), lr=h.ttt_lora_lr, betas=(0.0, 0.999), weight_decay=h.ttt_lora_wd)
    size = h.ttt_chunk
    for c in range(max(batch.chunks)):
        active = [r for r, n in enumerate(batch.chunks) if c < n]
        rows = torch.tensor(active, device=device)
        lora.select(rows)
        begin, end = c * size, (c + 1) * size
        left = max(0, end - h.eval_seq_len)
        x = batch.tokens[rows, left:end]
        target = batch.tokens[rows, begin + 1 : end + 1]
        prev = batch.tokens[rows, begin:end]
        real = torch.arange(begin, end, device=device)[None, :] < batch.targets[rows][:, None]
        more = torch.tensor([c < batch.chunks[r] - 1 for r in active], device=device)
        train = bool(more.any())
        with torch.set_grad_enabled(train), torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model.forward_logits(x, lora)[:, -size:]
            logp = F.log_softmax(logits.float() / h.logit_temp, dim=-1)
        with torch.no_grad():
            hint = batch.hint[rows, begin:end]
            beta = h.tilt_beta * batch.trust[rows, begin:end]
            scored = tilted_nll(logp.detach(), target, hint, beta)
            ledger.add(scored[real], prev[real], target[real])
        if train:
            plain = -logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            per_doc = (plain * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)
            opt.zero_grad(set_to_none=True)
            (per_doc * more).sum().backward()
            opt.step()


def global_sgd(
    h: Hyperparameters, device: torch.device, rank: int, world: int, model: GPT, scored: Tensor, phase: int
) -> None:
    """SGD on all of the model's weights over tokens that every rank has finished scoring; same steps on every rank."""
    seqs = (scored.numel() - 1) // h.eval_seq_len
    per_step = world * h.ttt_global_seqs
    steps = seqs // per_step
    for p in model.parameters():
        p.requires_grad_(True)
    opt = torch.optim.SGD(model.parameters(), lr=h.ttt_global_lr, momentum=h.ttt_global_momentum)
    params = [p for p in model.parameters() if p.requires_grad]
    total = steps * h.ttt_global_epochs
    for step in range(total):
        lr = h.ttt_global_lr * 0.5 * (1.0 + math.cos(math.pi * step / max(total, 1)))
        for group in opt.param_groups:
            group["lr"] = lr
        first = (step % steps) * per_step + rank * h.ttt_global_seqs
        flat = scored[first * h.eval_seq_len : (first + h.ttt_global_seqs) * h.eval_seq_len + 1]
        flat = flat.to(device=device, dtype=torch.int64)
        x = flat[:-1].view(-1, h.eval_seq_len)
        y = flat[1:].view(-1, h.eval_seq_len)
        opt.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        loss.backward()
        for p in params:
            if p.grad is not None and world > 1:
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        nn.utils.clip_grad_norm_(params, h.ttt_global_clip)
        opt.step()
        if step % 50 == 0 or step == total - 1:
            log(f"ttt:global phase:{phase} step:{step + 1}/{total} loss:{loss.item():.4f} lr:{lr:.6f}")
    for p in model.parameters():
        p.requires_grad_(False)
        p.grad = None


def eval_val_ttt_phased(
    h: Hyperparameters, device: torch.device, rank: int, world: int, model: GPT, tables: ByteTables, val: Tensor
) -> tuple[float, float]:
    docs = find_documents(val, h.bos_id)
    bounds = [len(docs) * p // h.ttt_phases for p in range(h.ttt_phases + 1)]
    ledger = ScoreLedger(tables, device)
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    for phase in range(h.ttt_phases):
        phase_docs = docs[bounds[phase] : bounds[phase + 1]]
        mine = phase_docs[rank::world]
        for at in range(0, len(mine), h.ttt_batch):
            group = mine[at : at + h.ttt_batch]
            lora = DocumentLoRA(len(group), model, h).to(device)
            batch = DocumentBatch(h, val, group, device)
            score_documents(h, device, model, lora, batch, ledger)
            running = ledger.loss.item() / max(ledger.tokens.item(), 1.0)
            log(f"ttt:phase {phase + 1}/{h.ttt_phases} docs:{at + len(group)}/{len(mine)} rank0_loss:{running:.4f}")
        if dist.is_initialized():
            dist.barrier()
        if phase + 1 < h.ttt_phases:
            first, last = phase_docs[0], phase_docs[-1]
            global_sgd(h, device, rank, world, model, val[first[0] : last[0] + last[1]], phase + 1)
    val_loss, val_bpb, tokens = ledger.result()
    if tokens != val.numel() - 1:
        raise RuntimeError(f"TTT scored {tokens} tokens of {val.numel() - 1}")
    return val_loss, val_bpb


# ----------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------


def lr_scale(h: Hyperparameters, frac: float) -> float:
    if frac >= 1.0 - h.warmdown_frac:
        return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
    return 1.0


def warm_up(h: Hyperparameters, model: GPT, compiled: nn.Module, opts: Optimizers, loader, accum: int, per_rank: int):
    """Compiles the three graphs of the run (plain, looped, looped with QAT) and then puts everything back."""
    weights = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}
    saved = [copy.deepcopy(opt.state_dict()) for opt in opts.all]
    for looping, qat in ((False, False), (True, False), (True, True)):
        model.looping_active = looping
        CastedLinear.late_qat = qat
        for _ in range(max(h.warmup_steps // 3, 1)):
            opts.zero_grad()
            for _ in range(accum):
                x, y = loader.next_batch(per_rank)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = compiled(x, y)
                (loss / accum).backward()
            opts.reduce_gradients()
            opts.step()
    model.looping_active = False
    CastedLinear.late_qat = False
    model.load_state_dict(weights, strict=True)
    for opt, state in zip(opts.all, saved):
        opt.load_state_dict(state)
        opt.state.clear()
    opts.zero_grad()


def train_model(
    h: Hyperparameters, device: torch.device, rank: int, world: int, tables: ByteTables, val: Tensor
) -> tuple[GPT, CudaClock]:
    model = GPT(h).to(device).float()
    if world > 1:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)
    compiled = torch.compile(model, dynamic=False)
    opts = Optimizers(h, model, rank, world)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")

    accum = max(8 // world, 1)
    per_rank = h.train_batch_tokens // (world * accum)
    warm_loader = ShardedSequenceLoader(h.train_files, h.train_seq_len, rank, world, device, h.seed + 1)
    warm_up(h, model, compiled, opts, warm_loader, accum, per_rank)
    del warm_loader
    loader = ShardedSequenceLoader(h.train_files, h.train_seq_len, rank, world, device, h.seed)
    ema = EMA(model, h.ema_decay)
    cap_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)

    clock = CudaClock()
    if dist.is_initialized():
        dist.barrier()
    clock.start()
    step = 0
    stop_at: int | None = None
    model.train()
    while True:
        last = step == h.iterations or (stop_at is not None and step >= stop_at)
        if h.val_loss_every > 0 and (step % h.val_loss_every == 0) and not last:
            elapsed = clock.pause()
            val_loss, val_bpb = eval_val(h, device, rank, world, compiled, tables, val)
            log(f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{elapsed:.0f}ms")
            clock.start()
        if last:
            break

        frac = max(step / h.iterations, clock.ms() / cap_ms)
        if world > 1:
            shared = torch.tensor(frac, device=device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            frac = shared.item()
        scale = lr_scale(h, min(frac, 1.0))
        if not model.looping_active and frac >= h.enable_looping_at:
            model.looping_active = True
            log(f"looping: on at step {step}, encoder {model.loop_encoder} decoder {model.loop_decoder}")
        if not CastedLinear.late_qat and model.looping_active and scale < h.late_qat_threshold:
            CastedLinear.late_qat = True
            log(f"late_qat: on at step {step}, lr scale {scale:.4f}")

        opts.zero_grad()
        train_loss = torch.zeros((), device=device)
        for _ in range(accum):
            x, y = loader.next_batch(per_rank)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = compiled(x, y)
            train_loss += loss.detach() / accum
            (loss / accum).backward()
        opts.reduce_gradients()
        ramp = min(step / h.muon_momentum_steps, 1.0)
        for group in opts.muon.param_groups:
            group["momentum"] = (1.0 - ramp) * h.muon_momentum_start + ramp * h.muon_momentum
        opts.set_lr(scale)
        if h.grad_clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), h.grad_clip)
        opts.step()
        ema.update(model)
        step += 1

        if step % h.train_log_every == 0 or step <= 5:
            now = clock.ms()
            log(f"step:{step}/{h.iterations} train_loss:{train_loss.item():.4f} train_time:{now:.0f}ms avg:{now / step:.2f}ms")
        over = torch.tensor(float(clock.ms() >= cap_ms), device=device)
        if world > 1:
            dist.all_reduce(over, op=dist.ReduceOp.MAX)
        if stop_at is None and over.item() > 0:
            stop_at = step

    log(f"training stopped: step:{step}/{h.iterations} train_time:{clock.ms():.0f}ms")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    CastedLinear.late_qat = False
    model.looping_active = True
    ema.copy_to(model)
    log("ema: weights applied")
    return model, clock


def quantize_and_pack(h: Hyperparameters, device, rank: int, world: int, model: GPT, clock: CudaClock) -> None:
    """Hessians from training batches, GPTQ and packing; the training clock runs on through all of it."""
    before = clock.ms()
    calib = ShardedSequenceLoader(h.train_files, h.train_seq_len, rank, world, device, h.seed + 77)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        hessians = collect_hessians(h, model, calib, device, world)
    log(f"gptq: Hessians of {len(hessians)} matrices from train shards in {clock.ms() - before:.0f}ms")
    if rank == 0:
        packed = quantize_state(h, model.state_dict(), hessians)
        write_artifact(h, packed)
    if dist.is_initialized():
        dist.barrier()
    total_ms = clock.pause()
    log(f"train+gptq+pack: {total_ms:.0f}ms of {1000.0 * h.max_wallclock_seconds:.0f}ms")
    if total_ms > 1000.0 * h.max_wallclock_seconds:
        raise RuntimeError("training, GPTQ and packing took longer than the cap; raise GPTQ_RESERVE_SECONDS")


def evaluate(h: Hyperparameters, device: torch.device, rank: int, world: int, tables: ByteTables, val: Tensor) -> None:
    """Reads the artifact back and scores it. One clock over everything from the reading on."""
    clock = CudaClock()
    clock.start()
    model = GPT(h).to(device).float()
    read_artifact(h, model)
    model.looping_active = True
    name, val_loss, val_bpb = "none", float("nan"), float("nan")
    if h.sliding_enabled:
        began = clock.ms()
        val_loss, val_bpb = eval_val_sliding(h, device, rank, world, model, tables, val)
        name = "quantized_sliding_window"
        log(f"{name} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{clock.ms() - began:.0f}ms")
    if h.ttt_enabled:
        began = clock.ms()
        torch.manual_seed(h.seed + rank)
        val_loss, val_bpb = eval_val_ttt_phased(h, device, rank, world, model, tables, val)
        name = "quantized_ttt_phased"
        log(f"{name} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{clock.ms() - began:.0f}ms")
    eval_ms = clock.pause()
    log(f"total_eval_time:{eval_ms:.0f}ms of {1000.0 * h.max_eval_seconds:.0f}ms")
    if eval_ms > 1000.0 * h.max_eval_seconds:
        raise RuntimeError(f"evaluation took {eval_ms:.0f}ms")
    log(f"final_{name}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")


def main() -> None:
    h = Hyperparameters()
    world = env_int("WORLD_SIZE", 1)
    rank = env_int("RANK", 0)
    local_rank = env_int("LOCAL_RANK", 0)
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if 8 % world != 0:
        raise ValueError(f"WORLD_SIZE={world} must divide 8")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 32
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)

    setup_log(h, rank)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Python {sys.version.split()[0]} PyTorch {torch.__version__} world_size:{world} seed:{h.seed}")
    if rank == 0:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
        log(smi, console=False)
    for key in sorted(k for k in vars(Hyperparameters) if not k.startswith("_")):
        log(f"  {key}: {getattr(h, key)}", console=False)

    sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
    if int(sp.vocab_size()) != h.vocab_size:
        raise ValueError(f"VOCAB_SIZE={h.vocab_size}, tokenizer has {int(sp.vocab_size())}")
    tables = ByteTables(sp, h.vocab_size, device)
    val = load_validation_tokens(h.val_files)
    log(f"val tokens: {val.numel() - 1}, train shards: {len(glob.glob(h.train_files))}")

    model, clock = train_model(h, device, rank, world, tables, val)
    quantize_and_pack(h, device, rank, world, model, clock)
    del model
    torch.cuda.empty_cache()
    evaluate(h, device, rank, world, tables, val)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
