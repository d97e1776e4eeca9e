"""
train_gpt.py -- Parameter Golf, 10 min / 16 MB track.

11L x 512d, XSA on the last layers, value residual, U-net skips, bigram hash embedding, packed documents through
flash-attn varlen, Muon + AdamW, EMA + SWA, int6 GPTQ whose Hessians come from text that the model writes itself,
LZMA. The score is the sliding window with score-first TTT (AdamW, all blocks, chunks of 32k tokens).

Everything is a switch in the environment. The folder's train_gpt.py is what is counted, in the form in which it lies
there (we hand it in LZMA-wrapped when we are short of room; __file__ is the wrapper then, so its bytes are counted).
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from flash_attn_interface import flash_attn_varlen_func

    HAVE_FA = True
except ImportError:
    try:
        from flash_attn import flash_attn_varlen_func

        HAVE_FA = True
    except ImportError:
        flash_attn_varlen_func = None
        HAVE_FA = False

# -----------------------------
# SETTINGS
# -----------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, "1" if default else "0")))


class Hyperparameters:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)
    bos_id = env_int("BOS_ID", 1)

    # schedule and the clock
    iterations = env_int("ITERATIONS", 20000)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    warmdown_iters = env_int("WARMDOWN_ITERS", 3500)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env_float("GPTQ_RESERVE_SECONDS", 84.0)
    pack_seconds = env_float("PACK_SECONDS", 44.0)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    val_batch_tokens = env_int("VAL_BATCH_TOKENS", 524_288)
    train_log_every = env_int("TRAIN_LOG_EVERY", 200)

    # model
    vocab_size = env_int("VOCAB_SIZE", 1024)
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 3.0)
    rope_base = env_float("ROPE_BASE", 10000.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 1.5)
    xsa_last_n = env_int("XSA_LAST_N", 11)
    value_residual = env_flag("VALUE_RESIDUAL", True)
    unet_skips = env_flag("UNET_SKIPS", True)
    ln_scale = env_flag("LN_SCALE", True)
    bigram_buckets = env_int("BIGRAM_BUCKETS", 2048)
    bigram_dim = env_int("BIGRAM_DIM", 128)
    attn_backend = os.environ.get("ATTN_BACKEND", "varlen" if HAVE_FA else "sdpa")
    doc_mask = env_flag("DOC_MASK", True)
    compile_model = env_flag("COMPILE", True)

    # optimizer
    embed_lr = env_float("EMBED_LR", 0.035)
    matrix_lr = env_float("MATRIX_LR", 0.025)
    scalar_lr = env_float("SCALAR_LR", 0.025)
    tied_embed_init_std = env_float("TIED_EMBED_INIT_STD", 0.005)
    muon_momentum = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_backend_steps = env_int("MUON_BACKEND_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.04)
    adam_wd = env_float("ADAM_WD", 0.04)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    grad_clip_norm = env_float("GRAD_CLIP_NORM", 0.3)

    # averaging
    ema_enabled = env_flag("EMA_ENABLED", True)
    ema_decay = env_float("EMA_DECAY", 0.997)
    swa_enabled = env_flag("SWA_ENABLED", True)
    swa_every = env_int("SWA_EVERY", 50)
    swa_below_scale = env_float("SWA_BELOW_SCALE", 0.2)
    swa_share = env_float("SWA_SHARE", 0.5)

    # quantisation
    clip_range = env_int("CLIP_RANGE", 31)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    calib_seqs = env_int("CALIB_SEQS", 64)
    calib_len = env_int("CALIB_LEN", 768)
    calib_temp = env_float("CALIB_TEMP", 0.8)
    calib_seed = env_int("CALIB_SEED", 4242)
    size_limit = env_int("SIZE_LIMIT", 16_000_000)
    lzma_preset = env_int("LZMA_PRESET", 9)
    artifact = os.environ.get("ARTIFACT", "final_model.int6.ptz")

    # evaluation
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_batch_windows = env_int("EVAL_BATCH_WINDOWS", 32)
    plain_sliding = env_flag("PLAIN_SLIDING", True)
    ttt_enabled = env_flag("TTT_ENABLED", True)
    ttt_chunk_tokens = env_int("TTT_CHUNK_TOKENS", 32_768)
    ttt_epochs = env_int("TTT_EPOCHS", 3)
    ttt_lr = env_float("TTT_LR", 0.0004)
    ttt_min_lr_frac = env_float("TTT_MIN_LR_FRAC", 0.1)
    ttt_beta2 = env_float("TTT_BETA2", 0.99)
    ttt_wd = env_float("TTT_WD", 0.0)
    ttt_grad_clip = env_float("TTT_GRAD_CLIP", 1.0)
    ttt_batch_seqs = env_int("TTT_BATCH_SEQS", 2)
    ttt_freeze_blocks = env_int("TTT_FREEZE_BLOCKS", 0)
    ttt_layer_decay = env_float("TTT_LAYER_DECAY", 1.0)
    eval_budget_seconds = env_float("EVAL_BUDGET_SECONDS", 600.0)
    eval_slack_seconds = env_float("EVAL_SLACK_SECONDS", 90.0)
    logit_temp = env_float("LOGIT_TEMP", 1.0)


CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "v_mix", "bigram.scale")


# -----------------------------
# RANKS AND LOG
# -----------------------------


@dataclass
class World:
    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def master(self) -> bool:
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.size > 1

    def barrier(self) -> None:
        if self.many:
            dist.barrier()

    def sum(self, t: Tensor) -> Tensor:
        if self.many:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def agree(self, flag: bool) -> bool:
        """True on every rank as soon as one rank says so."""
        if not self.many:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())


def open_world() -> World:
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    rank = env_int("RANK", 0)
    size = env_int("WORLD_SIZE", 1)
    local_rank = env_int("LOCAL_RANK", 0)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    if 8 % size:
        raise ValueError(f"WORLD_SIZE={size} must divide 8 so that grad_accum_steps is whole")
    return World(rank, local_rank, size, device)


class Log:
    """log0: one line to the log file, and to the console too; nothing on other ranks."""

    def __init__(self, world: World, run_id: str):
        self.path = None
        if world.master:
            os.makedirs("logs", exist_ok=True)
            self.path = f"logs/{run_id}.txt"
            print(self.path)

    def __call__(self, msg: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(msg, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(msg, file=f)


# -----------------------------
# TOKENS AND BYTES
# -----------------------------


class ByteTable:
    """How many bytes of the original text each token stands for.

    A piece that begins with the mark of a leading space counts that space only where a token with text stands before it
    (sentencepiece drops the space at the beginning of a document).
    """

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        size = max(int(sp.vocab_size()), vocab_size)
        plain = np.zeros((size,), dtype=np.int16)
        space = np.zeros((size,), dtype=np.bool_)
        silent = np.ones((size,), dtype=np.bool_)
        for i in range(int(sp.vocab_size())):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            silent[i] = False
            if sp.is_byte(i):
                plain[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("▁"):
                space[i] = True
                piece = piece[1:]
            plain[i] = len(piece.encode("utf-8"))
        self.plain = torch.tensor(plain, dtype=torch.int16, device=device)
        self.space = torch.tensor(space, dtype=torch.bool, device=device)
        self.silent = torch.tensor(silent, dtype=torch.bool, device=device)

    def count(self, prev: Tensor, tgt: Tensor) -> Tensor:
        n = self.plain[tgt].to(torch.float64)
        n += (self.space[tgt] & ~self.silent[prev]).to(torch.float64)
        return n


def load_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected = 256 * 4 + num_tokens * 2
    if file.stat().st_size != expected:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected} bytes")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=256 * 4)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_shard(f) for f in files]).contiguous()


class TokenStream:
    """The training shards one after the other, for ever."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.at = 0
        self.tokens = load_shard(self.files[0])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        left = n
        while left > 0:
            here = self.tokens.numel() - self.pos
            if here <= 0:
                self.at = (self.at + 1) % len(self.files)
                self.tokens = load_shard(self.files[self.at])
                self.pos = 0
                continue
            k = min(left, here)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            left -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def pack_documents(x: Tensor, bos_id: int, split: bool) -> Tensor:
    """cu_seqlens of rows [B, L] for the varlen kernel: a sequence ends with its row and, if split, before every BOS.

    Padded with empty sequences to a multiple of 256, so that few shapes reach the compiler.
    """
    rows, length = x.shape
    starts = (x == bos_id) if split else torch.zeros_like(x, dtype=torch.bool)
    starts[:, 0] = True
    cu = torch.nonzero(starts.reshape(-1)).squeeze(1).to(torch.int32)
    want = (cu.numel() // 256 + 1) * 256
    out = torch.full((want + 1,), rows * length, dtype=torch.int32, device=x.device)
    out[: cu.numel()] = cu
    return out


class TrainLoader:
    """Every rank takes its own disjoint span out of the common stream; rows of seq_len, documents packed."""

    def __init__(self, pattern: str, world: World, bos_id: int, doc_mask: bool):
        self.world = world
        self.bos_id = bos_id
        self.doc_mask = doc_mask
        self.stream = TokenStream(pattern)

    def next(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor, Tensor]:
        local = global_tokens // (self.world.size * accum)
        local = local // seq_len * seq_len
        span = local + 1
        chunk = self.stream.take(span * self.world.size)
        mine = chunk[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        mine = mine.pin_memory().to(self.world.device, non_blocking=True)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        return x, y, pack_documents(x, self.bos_id, self.doc_mask)


# -----------------------------
# MODEL
# -----------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """fp32 weights, used in the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    """Rotates the first `dims` of every head, by the position in the row."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv, persistent=False)
        self.dims = dims
        self.cached = 0
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def forward(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.cos is None or self.cached < length or self.cos.device != device or self.cos.is_inference():
            t = torch.arange(length, device=device, dtype=torch.float32)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self.cos = freqs.cos()[None, :, None, :]
            self.sin = freqs.sin()[None, :, None, :]
            self.cached = length
        return self.cos[:, :length].to(dtype), self.sin[:, :length].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    turned, rest = x[..., :dims], x[..., dims:]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, backend: str) -> Tensor:
    """Causal attention inside the sequences that cu bounds. q, k, v: [B, L, heads, head_dim]."""
    rows, length, heads, head_dim = q.shape
    if backend == "varlen":
        flat = [t.reshape(rows * length, t.size(2), head_dim) for t in (q, k, v)]
        out = flash_attn_varlen_func(
            *flat, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=length, max_seqlen_k=length, causal=True
        )
        if isinstance(out, tuple):
            out = out[0]
        return out.view(rows, length, heads, head_dim)
    at = torch.arange(rows * length, device=q.device)
    doc = torch.searchsorted(cu.to(at.dtype), at, right=True).view(rows, 1, length)
    mask = (doc.transpose(1, 2) == doc).tril()[:, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, h: type[Hyperparameters], layer: int):
        super().__init__()
        self.heads, self.kv_heads = h.num_heads, h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        self.rope_dims = min(h.rope_dims, self.head_dim)
        self.backend = h.attn_backend
        self.xsa = layer >= h.num_layers - h.xsa_last_n
        kv = self.kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init))
        self.v_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if h.value_residual and layer > 0 else None
        self.rotary = Rotary(self.rope_dims, h.rope_base)

    def exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: takes the direction of the token's own value out of what it attended to."""
        rows, length, heads, d = y.shape
        grouped = y.reshape(rows, length, self.kv_heads, heads // self.kv_heads, d)
        unit = F.normalize(v, dim=-1).unsqueeze(-2)
        along = (grouped * unit).sum(-1, keepdim=True)
        return (grouped - along * unit).reshape(rows, length, heads, d)

    def forward(self, x: Tensor, cu: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, length, dim = x.shape
        q = self.c_q(x).view(rows, length, self.heads, self.head_dim)
        k = self.c_k(x).view(rows, length, self.kv_heads, self.head_dim)
        raw_v = self.c_v(x).view(rows, length, self.kv_heads, self.head_dim)
        v = raw_v
        if self.v_mix is not None and v0 is not None:
            mix = self.v_mix.to(v.dtype)
            v = mix[0] * v + mix[1] * v0
        cos, sin = self.rotary(length, x.device, q.dtype)
        q = rotate(rms(q), cos, sin, self.rope_dims) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = rotate(rms(k), cos, sin, self.rope_dims)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, cu, self.backend)
        if self.xsa:
            y = self.exclude_self(y, v)
        return self.proj(y.reshape(rows, length, dim)), raw_v


class MLP(nn.Module):
    def __init__(self, h: type[Hyperparameters]):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.fc = CastedLinear(h.model_dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, h.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, h: type[Hyperparameters], layer: int):
        super().__init__()
        self.attn = Attention(h, layer)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))))
        self.depth_scale = 1.0 / math.sqrt(layer + 1) if h.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, cu: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        a, v = self.attn(rms(x) * self.depth_scale, cu, v0)
        x = x + self.attn_scale.to(x.dtype) * a
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.depth_scale)
        return x, v


class BigramHash(nn.Module):
    """An embedding of (previous token, token), hashed; nothing before a row's or a document's first token."""

    def __init__(self, h: type[Hyperparameters]):
        super().__init__()
        self.buckets, self.bos_id = h.bigram_buckets, h.bos_id
        self.embed = nn.Embedding(h.bigram_buckets, h.bigram_dim)
        self.lift = CastedLinear(h.bigram_dim, h.model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))
        nn.init.zeros_(self.embed.weight)

    def forward(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0), value=0)
        slot = torch.bitwise_xor(36313 * ids, 27191 * prev) % (self.buckets - 1)
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 0] = True
        slot = torch.where(first | (ids == self.bos_id), self.buckets - 1, slot)
        return self.lift(self.embed(slot)) * self.scale


class GPT(nn.Module):
    def __init__(self, h: type[Hyperparameters]):
        super().__init__()
        self.softcap = h.logit_softcap
        self.temp = h.logit_temp
        self.unet = h.unet_skips
        self.embed = nn.Embedding(h.vocab_size, h.model_dim)
        self.bigram = BigramHash(h) if h.bigram_buckets > 0 else None
        self.blocks = nn.ModuleList(Block(h, i) for i in range(h.num_layers))
        self.encoders = h.num_layers // 2
        self.decoders = h.num_layers - self.encoders
        self.skips = min(self.encoders, self.decoders) if h.unet_skips else 0
        self.skip_weight = nn.Parameter(torch.ones(max(self.skips, 1), h.model_dim))
        self.init_weights(h)

    def init_weights(self, h: type[Hyperparameters]) -> None:
        nn.init.normal_(self.embed.weight, std=h.tied_embed_init_std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("proj"):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor, cu: Tensor) -> Tensor:
        x = self.embed(ids).to(torch.bfloat16)
        if self.bigram is not None:
            x = x + self.bigram(ids).to(x.dtype)
        x = rms(x)
        x0, v0 = x, None
        stack: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            j = i - self.encoders
            if 0 <= j < self.skips and stack:
                x = x + self.skip_weight[j].to(x.dtype) * stack.pop()
            x, v = block(x, x0, cu, v0)
            if v0 is None:
                v0 = v
            if i < self.encoders and self.unet:
                stack.append(x)
        return rms(x)

    def head(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.embed.weight.to(x.dtype)).float()
        return self.softcap * torch.tanh(logits / self.softcap) / self.temp

    def logits(self, ids: Tensor, cu: Tensor) -> Tensor:
        return self.head(self.hidden(ids, cu))

    def forward(self, ids: Tensor, targets: Tensor, cu: Tensor) -> Tensor:
        logits = self.logits(ids, cu)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))


def keep_small_in_fp32(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 or any(s in name for s in CONTROL_PATTERNS):
                p.data = p.data.float()


def build_model(h: type[Hyperparameters], device: torch.device) -> GPT:
    model = GPT(h).to(device)
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    keep_small_in_fp32(model)
    return model


# -----------------------------
# OPTIMIZERS
# -----------------------------


@torch.compile
def newton_schulz(g: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = g.size(0) > g.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Matrices are dealt out to the ranks, each orthogonalises its own, the updates are summed."""

    def __init__(self, params, lr: float, momentum: float, steps: int, wd: float, world: World):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, wd=wd))
        self.world = world

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = newton_schulz(g, group["steps"])
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            self.world.sum(flat)
            at = 0
            for p in params:
                update = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                if group["wd"]:
                    p.mul_(1 - group["lr"] * group["wd"])
                p.add_(update, alpha=-group["lr"])
                at += p.numel()


def build_optimizers(model: GPT, h: type[Hyperparameters], world: World) -> list[torch.optim.Optimizer]:
    tables, matrices, scalars = [], [], []
    for name, p in model.named_parameters():
        if name.endswith("embed.weight"):
            tables.append(p)
        elif p.ndim == 2 and not any(s in name for s in CONTROL_PATTERNS):
            matrices.append(p)
        else:
            scalars.append(p)
    muon = Muon(matrices, h.matrix_lr, h.muon_momentum_start, h.muon_backend_steps, h.muon_wd, world)
    adam = torch.optim.AdamW(
        [
            {"params": tables, "lr": h.embed_lr, "weight_decay": h.adam_wd},
            {"params": scalars, "lr": h.scalar_lr, "weight_decay": 0.0},
        ],
        betas=(h.beta1, h.beta2),
        eps=h.adam_eps,
        fused=True,
    )
    for opt in (muon, adam):
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]


def average_grads(params: list[nn.Parameter], world: World) -> None:
    """One all-reduce over all gradients; parameters without one stand in with zeros."""
    if not world.many:
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
    flat = torch.cat([g.reshape(-1).float() for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    at = 0
    for p, g in zip(params, grads):
        p.grad = flat[at : at + g.numel()].view_as(g).to(p.dtype)
        at += g.numel()


# -----------------------------
# AVERAGING
# -----------------------------


class Averager:
    """EMA at every step, SWA every so often once the rate is low; the model gets a fixed blend of both at the end."""

    def __init__(self, model: GPT, h: type[Hyperparameters]):
        self.h = h
        self.ema = {k: v.detach().float().clone() for k, v in model.state_dict().items()} if h.ema_enabled else None
        self.swa: dict[str, Tensor] | None = None
        self.swa_count = 0

    @torch.no_grad()
    def update(self, model: GPT, step: int, scale: float) -> None:
        state = model.state_dict()
        if self.ema is not None:
            for k, v in state.items():
                self.ema[k].lerp_(v.float(), 1.0 - self.h.ema_decay)
        if self.h.swa_enabled and scale < self.h.swa_below_scale and step % self.h.swa_every == 0:
            if self.swa is None:
                self.swa = {k: torch.zeros_like(v, dtype=torch.float32) for k, v in state.items()}
            for k, v in state.items():
                self.swa[k] += v.float()
            self.swa_count += 1

    @torch.no_grad()
    def result(self, model: GPT) -> dict[str, Tensor]:
        state = model.state_dict()
        swa = {k: v / self.swa_count for k, v in self.swa.items()} if self.swa is not None else None
        if self.ema is None and swa is None:
            return state
        if swa is None or self.ema is None:
            blend = self.ema if swa is None else swa
        else:
            blend = {k: torch.lerp(self.ema[k], swa[k], self.h.swa_share) for k in state}
        return {k: blend[k].to(v.dtype) for k, v in state.items()}


# -----------------------------
# QUANTISATION (int6 GPTQ on text of the model's own)
# -----------------------------


@torch.no_grad()
def write_calibration_text(model: GPT, h: type[Hyperparameters], world: World, deadline: float) -> Tensor:
    """Sequences sampled from the model, from BOS on. No file is read for it. Stops growing at the deadline."""
    model.eval()
    mine = max(1, h.calib_seqs // world.size)
    gen = torch.Generator(device=world.device)
    gen.manual_seed(h.calib_seed + world.rank)
    ids = torch.full((mine, h.calib_len), h.bos_id, dtype=torch.int64, device=world.device)
    length = 1
    while length < h.calib_len:
        if length % 32 == 0 and world.agree(time.perf_counter() > deadline):
            break
        shown = min((length + 127) // 128 * 128, h.calib_len)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model.logits(ids[:, :shown], pack_documents(ids[:, :shown], h.bos_id, False))
        probs = torch.softmax(logits[:, length - 1] / h.calib_temp, dim=-1)
        ids[:, length] = torch.multinomial(probs, 1, generator=gen).squeeze(1)
        length += 1
    return ids[:, :length]


class HessianTap:
    """Sums X^T X of every linear layer inside the blocks while text runs through the model."""

    def __init__(self, model: GPT):
        self.sums: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear) and name.startswith("blocks."):
                self.hooks.append(module.register_forward_pre_hook(self.tap(name + ".weight")))

    def tap(self, name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
                self.seen[name] = 0
            self.sums[name].addmm_(x.T, x)
            self.seen[name] += x.size(0)

        return hook

    def finish(self, world: World) -> dict[str, Tensor]:
        for hook in self.hooks:
            hook.remove()
        out = {}
        for name in sorted(self.sums):
            world.sum(self.sums[name])
            out[name] = self.sums[name] / (self.seen[name] * world.size)
        return out


@torch.no_grad()
def collect_hessians(model: GPT, text: Tensor, h: type[Hyperparameters], world: World) -> dict[str, Tensor]:
    tap = HessianTap(model)
    for i in range(0, text.size(0), 4):
        rows = text[i : i + 4]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model.logits(rows, pack_documents(rows, h.bos_id, h.doc_mask))
    return tap.finish(world)


def row_scales(w: Tensor, clip: int, pct: float) -> Tensor:
    top = torch.quantile(w.abs(), pct, dim=1) if pct < 1.0 else w.abs().amax(dim=1)
    return (top / clip).clamp_min(1e-8).to(torch.float16)


@torch.no_grad()
def gptq_matrix(w: Tensor, hess: Tensor, h: type[Hyperparameters]) -> tuple[Tensor, Tensor]:
    """int6 codes and a scale per row; columns in the order of the Hessian's diagonal, the error carried to the right."""
    rows, cols = w.shape
    w = w.float()
    hess = hess.clone()
    dead = torch.diag(hess) == 0
    hess[dead, dead] = 1.0
    damp = h.gptq_damp * torch.diag(hess).mean()
    hess.diagonal().add_(damp)
    perm = torch.argsort(torch.diag(hess), descending=True)
    back = torch.argsort(perm)
    hess = hess[perm][:, perm]
    inv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hess)), upper=True)
    best: tuple[float, Tensor, Tensor] | None = None
    for pct in (1.0, 0.9999, 0.9995, 0.999, 0.998):
        scale = row_scales(w, h.clip_range, pct)
        s = scale.float()
        work = w[:, perm].clone()
        work[:, dead[perm]] = 0.0
        codes = torch.zeros_like(work, dtype=torch.int8)
        for a in range(0, cols, h.gptq_block):
            b = min(a + h.gptq_block, cols)
            part = work[:, a:b].clone()
            err = torch.zeros_like(part)
            tri = inv[a:b, a:b]
            for j in range(b - a):
                col = part[:, j]
                code = torch.clamp(torch.round(col / s), -h.clip_range, h.clip_range)
                codes[:, a + j] = code.to(torch.int8)
                e = (col - code * s) / tri[j, j]
                part[:, j:] -= torch.outer(e, tri[j, j:])
                err[:, j] = e
            work[:, b:] -= err @ inv[a:b, b:]
        delta = codes.float() * s[:, None] - w[:, perm]
        loss = float(((delta @ hess) * delta).sum())
        if best is None or loss < best[0]:
            best = (loss, codes[:, back].contiguous(), scale)
    return best[1], best[2]


@torch.no_grad()
def round_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = row_scales(w.float(), 127, 0.99999)
    codes = torch.clamp(torch.round(w.float() / scale.float()[:, None]), -127, 127).to(torch.int8)
    return codes, scale


def quantise(state: dict[str, Tensor], hessians: dict[str, Tensor], h: type[Hyperparameters], world: World, log0: Log):
    """Every rank works on its share of the matrices; the codes are summed together."""
    packed: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    matrices = [k for k in sorted(state) if k in hessians]
    for i, name in enumerate(matrices):
        w = state[name]
        codes = torch.zeros(w.shape, dtype=torch.int32, device=w.device)
        scale = torch.zeros(w.size(0), dtype=torch.float32, device=w.device)
        if i % world.size == world.rank:
            c, s = gptq_matrix(w, hessians[name], h)
            codes.copy_(c)
            scale.copy_(s)
        world.sum(codes)
        world.sum(scale)
        packed[name + ".q"] = codes.to(torch.int8).cpu()
        packed[name + ".s"] = scale.to(torch.float16).cpu()
        kinds[name] = "int6"
    for name, t in state.items():
        if name in kinds:
            continue
        if t.ndim == 2 and t.numel() > 16_384:
            codes, scale = round_int8(t)
            packed[name + ".q"], packed[name + ".s"] = codes.cpu(), scale.cpu()
            kinds[name] = "int8"
        else:
            packed[name] = t.to(torch.float16).cpu() if t.numel() > 2048 else t.float().cpu()
            kinds[name] = "plain"
    for kind in ("int6", "int8", "plain"):
        names = [k for k, v in kinds.items() if v == kind]
        log0(f"quant:{kind} tensors:{len(names)} params:{sum(state[k].numel() for k in names)}")
    return packed, kinds


def squeeze(packed: dict[str, Tensor], kinds: dict[str, str], preset: int) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": packed, "k": kinds}, buffer)
    return lzma.compress(buffer.getvalue(), preset=preset | lzma.PRESET_EXTREME)


def drop_smallest(packed: dict[str, Tensor], kinds: dict[str, str], share: float) -> dict[str, Tensor]:
    """Sets the given share of the codes +-1 to zero, those of the smallest scales first."""
    out = dict(packed)
    found = []
    for name in (k for k, v in kinds.items() if v == "int6"):
        q, s = packed[name + ".q"], packed[name + ".s"].float()
        found.append((s[:, None].expand_as(q)[q.abs() == 1]))
    sizes = torch.cat(found)
    if share <= 0.0 or sizes.numel() == 0:
        return out
    limit = sizes.kthvalue(max(1, int(share * sizes.numel()))).values
    for name in (k for k, v in kinds.items() if v == "int6"):
        q, s = packed[name + ".q"].clone(), packed[name + ".s"].float()
        q[(q.abs() == 1) & (s[:, None] <= limit)] = 0
        out[name + ".q"] = q
    return out


def submitted_code_bytes() -> int:
    """The bytes of train_gpt.py as it lies in the folder: the wrapper, where we hand it in wrapped."""
    return len(Path(__file__).read_bytes())


def write_artifact(packed: dict[str, Tensor], kinds: dict[str, str], h: type[Hyperparameters], log0: Log) -> None:
    code_bytes = submitted_code_bytes()
    blob = squeeze(packed, kinds, h.lzma_preset)
    for share in (0.05, 0.1, 0.2, 0.35, 0.5):
        if len(blob) + code_bytes <= h.size_limit:
            break
        log0(f"pack:{len(blob) + code_bytes} bytes is over {h.size_limit}, dropping {share:.0%} of the +-1 codes")
        blob = squeeze(drop_smallest(packed, kinds, share), kinds, h.lzma_preset)
    with open(h.artifact, "wb") as f:
        f.write(blob)
    total = len(blob) + code_bytes
    log0(f"Serialized model int6+lzma: {len(blob)} bytes")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size: {total} bytes (limit {h.size_limit})")
    if total > h.size_limit:
        raise RuntimeError(f"submission is {total} bytes, limit {h.size_limit}")


def read_artifact(h: type[Hyperparameters], device: torch.device) -> GPT:
    with open(h.artifact, "rb") as f:
        blob = f.read()
    held = torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)
    packed, kinds = held["w"], held["k"]
    state = {}
    for name, kind in kinds.items():
        if kind == "plain":
            state[name] = packed[name].float()
        else:
            state[name] = packed[name + ".q"].float() * packed[name + ".s"].float()[:, None]
    model = build_model(h, device)
    model.load_state_dict(state, strict=True)
    return model


# -----------------------------
# EVALUATION
# -----------------------------


class Tally:
    """Nats, tokens and bytes of what this rank has scored."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, nbytes: Tensor) -> None:
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += float(nll.numel())
        self.sums[2] += nbytes.sum()

    def result(self, world: World) -> tuple[float, float, int, int]:
        total = world.sum(self.sums.clone())
        nats, tokens, nbytes = (float(v) for v in total)
        return nats / tokens, nats / math.log(2.0) / nbytes, int(tokens), int(nbytes)


@dataclass(frozen=True)
class Window:
    """Row [start, start + seq) of the validation stream; only positions [lo, hi) of the stream are scored in it."""

    start: int
    lo: int
    hi: int


def plan_windows(count: int, seq: int, stride: int) -> list[Window]:
    """Windows that score each of `count` positions once: the first one whole, each later one its last `stride`."""
    plan = []
    done = 0
    while done < count:
        hi = min(count, seq if done == 0 else done + stride)
        plan.append(Window(max(0, hi - seq), done, hi))
        done = hi
    return plan


def share_of(items: list, world: World) -> list:
    """This rank's contiguous share."""
    n = len(items)
    return items[n * world.rank // world.size : n * (world.rank + 1) // world.size]


def rows_of(val: Tensor, batch: list[Window], seq: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.stack([val[w.start : w.start + seq] for w in batch])
    y = torch.stack([val[w.start + 1 : w.start + seq + 1] for w in batch])
    return x.to(device=device, dtype=torch.int64), y.to(device=device, dtype=torch.int64)


class Scorer:
    """Scores batches of windows with a model's present weights. It changes nothing but the tally."""

    def __init__(self, model: GPT, val: Tensor, table: ByteTable, h: type[Hyperparameters], world: World):
        self.model, self.val, self.table, self.h, self.world = model, val, table, h, world
        self.tally = Tally(world.device)
        self.logits = torch.compile(model.logits) if h.compile_model else model.logits

    @torch.inference_mode()
    def score(self, windows: list[Window]) -> None:
        self.model.eval()
        step = self.h.eval_batch_windows
        for i in range(0, len(windows), step):
            batch = windows[i : i + step]
            x, y = rows_of(self.val, batch, self.h.eval_seq_len, self.world.device)
            cu = pack_documents(x, self.h.bos_id, self.h.doc_mask)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = self.logits(x, cu)
            logits = logits.float()
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").view_as(y)
            for row, w in enumerate(batch):
                a, b = w.lo - w.start, w.hi - w.start
                nbytes = self.table.count(x[row, a:b], y[row, a:b])
                self.tally.add(nll[row, a:b], nbytes)


def eval_rows(model: GPT, val: Tensor, table: ByteTable, h: type[Hyperparameters], world: World):
    """Validation in rows that do not overlap: what the log shows during training, and of the packed model."""
    seq = h.train_seq_len
    rows = (val.numel() - 1) // seq
    per_batch = max(1, h.val_batch_tokens // (seq * world.size))
    first, last = rows * world.rank // world.size, rows * (world.rank + 1) // world.size
    tally = Tally(world.device)
    model.eval()
    with torch.inference_mode():
        for r in range(first, last, per_batch):
            n = min(per_batch, last - r)
            span = val[r * seq : (r + n) * seq + 1].to(device=world.device, dtype=torch.int64)
            x, y = span[:-1].view(n, seq), span[1:].view(n, seq)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = model.logits(x, pack_documents(x, h.bos_id, h.doc_mask))
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction="none")
            tally.add(nll, table.count(x.reshape(-1), y.reshape(-1)))
    model.train()
    loss, bpb, _, _ = tally.result(world)
    return loss, bpb


def eval_sliding(model: GPT, val: Tensor, table: ByteTable, h: type[Hyperparameters], world: World, log0: Log):
    """The sliding window with the weights as they are."""
    plan = plan_windows(val.numel() - 1, h.eval_seq_len, h.eval_stride)
    scorer = Scorer(model, val, table, h, world)
    mine = share_of(plan, world)
    log0(f"sliding:windows:{len(plan)} per_rank:{len(mine)} seq:{h.eval_seq_len} stride:{h.eval_stride}")
    scorer.score(mine)
    loss, bpb, tokens, nbytes = scorer.tally.result(world)
    log0(f"sliding:scored tokens:{tokens} bytes:{nbytes}")
    return loss, bpb


# -----------------------------
# TEST-TIME TRAINING, SCORE FIRST
# -----------------------------


def ttt_groups(model: GPT, h: type[Hyperparameters]) -> list[dict]:
    """Parameters of the blocks that adapt, one group to a block; the rest of the model stands still."""
    for p in model.parameters():
        p.requires_grad_(False)
    groups = []
    n = len(model.blocks)
    for i, block in enumerate(model.blocks):
        if i < h.ttt_freeze_blocks:
            continue
        params = list(block.parameters())
        for p in params:
            p.requires_grad_(True)
        groups.append({"params": params, "scale": h.ttt_layer_decay ** (n - 1 - i)})
    return groups


class Adapter:
    """AdamW over the blocks, on the tokens of a chunk that has been scored. All ranks take the same steps."""

    def __init__(self, model: GPT, val: Tensor, h: type[Hyperparameters], world: World):
        self.model, self.val, self.h, self.world = model, val, h, world
        self.groups = ttt_groups(model, h)
        self.params = [p for g in self.groups for p in g["params"]]
        self.opt = torch.optim.AdamW(
            self.groups, lr=h.ttt_lr, betas=(0.9, h.ttt_beta2), weight_decay=h.ttt_wd, fused=True
        )

    def rate(self, chunk: int, chunks: int) -> float:
        cosine = 0.5 * (1.0 + math.cos(math.pi * chunk / max(1, chunks - 1)))
        return self.h.ttt_lr * (self.h.ttt_min_lr_frac + (1.0 - self.h.ttt_min_lr_frac) * cosine)

    def learn(self, lo: int, hi: int, lr: float) -> float:
        """Trains on stream positions [lo, hi): inputs val[lo:hi], targets val[lo+1:hi+1]."""
        seq = self.h.eval_seq_len
        rows = (hi - lo) // seq
        if rows == 0:
            return 0.0
        span = self.val[lo : lo + rows * seq + 1].to(device=self.world.device, dtype=torch.int64)
        x, y = span[:-1].view(rows, seq), span[1:].view(rows, seq)
        per_step = self.h.ttt_batch_seqs * self.world.size
        for group in self.opt.param_groups:
            group["lr"] = lr * group["scale"]
        self.model.train()
        last = torch.zeros((), device=self.world.device)
        for _ in range(self.h.ttt_epochs):
            for r in range(0, rows, per_step):
                ids = list(range(r, min(r + per_step, rows)))[self.world.rank :: self.world.size]
                self.opt.zero_grad(set_to_none=True)
                if ids:
                    part, goal = x[ids], y[ids]
                    with torch.autocast("cuda", dtype=torch.bfloat16):
                        loss = self.model(part, goal, pack_documents(part, self.h.bos_id, self.h.doc_mask))
                    loss.backward()
                    last = loss.detach()
                average_grads(self.params, self.world)
                torch.nn.utils.clip_grad_norm_(self.params, self.h.ttt_grad_clip)
                self.opt.step()
        return float(last)


def eval_ttt(
    model: GPT, val: Tensor, table: ByteTable, h: type[Hyperparameters], world: World, started: float, log0: Log
):
    """Chunk by chunk: all ranks score the chunk's windows, and only then all ranks train on the chunk."""
    if h.ttt_chunk_tokens % h.eval_stride or h.ttt_chunk_tokens < h.eval_seq_len:
        raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE and hold a whole row")
    count = val.numel() - 1
    chunks = (count + h.ttt_chunk_tokens - 1) // h.ttt_chunk_tokens
    by_chunk: list[list[Window]] = [[] for _ in range(chunks)]
    for w in plan_windows(count, h.eval_seq_len, h.eval_stride):
        by_chunk[w.lo // h.ttt_chunk_tokens].append(w)
    scorer = Scorer(model, val, table, h, world)
    adapter = Adapter(model, val, h, world)
    log0(f"ttt:chunks:{chunks} chunk_tokens:{h.ttt_chunk_tokens} epochs:{h.ttt_epochs} lr:{h.ttt_lr}")
    log0(f"ttt:params:{sum(p.numel() for p in adapter.params)} freeze_blocks:{h.ttt_freeze_blocks}")
    learning = True
    for c in range(chunks):
        scorer.score(share_of(by_chunk[c], world))
        if c == chunks - 1:
            break
        if learning and c % 16 == 0:
            spent = time.perf_counter() - started
            if world.agree(spent > h.eval_budget_seconds - h.eval_slack_seconds):
                learning = False
                log0(f"ttt:chunk {c + 1}/{chunks} no more training, {spent:.0f}s spent")
        trained = 0.0
        if learning:
            lo = c * h.ttt_chunk_tokens
            trained = adapter.learn(lo, lo + h.ttt_chunk_tokens, adapter.rate(c, chunks))
        if c % 200 == 0:
            loss, bpb, tokens, _ = scorer.tally.result(world)
            log0(f"ttt:chunk {c + 1}/{chunks} tokens:{tokens} running_bpb:{bpb:.6f} train_loss:{trained:.4f}")
    loss, bpb, tokens, nbytes = scorer.tally.result(world)
    log0(f"ttt:scored tokens:{tokens} bytes:{nbytes}")
    return loss, bpb


# -----------------------------
# TRAINING
# -----------------------------


class Clock:
    """The training clock: runs from the first step on, stands still during validation."""

    def __init__(self) -> None:
        self.used = 0.0
        self.since = 0.0

    def start(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def stop(self) -> None:
        torch.cuda.synchronize()
        self.used += time.perf_counter() - self.since

    def seconds(self) -> float:
        return self.used + time.perf_counter() - self.since


def rate_scale(h: type[Hyperparameters], step: int, spent: float, budget: float) -> float:
    """1, then linearly to 0 over the last warmdown_iters steps, reckoned in time."""
    if h.warmdown_iters <= 0:
        return 1.0
    if budget <= 0:
        left = h.iterations - step
        return min(1.0, left / h.warmdown_iters)
    per_step = spent / max(step, 1)
    need = h.warmdown_iters * per_step
    left = max(budget - spent, 0.0)
    return left / max(need, 1e-9) if left <= need else 1.0


def warm_up(model: GPT, step_model, opts, loader: TrainLoader, h: type[Hyperparameters], world: World, log0: Log):
    """Compiles everything on a few steps of training data, then puts weights and optimizers back as they were."""
    accum = 8 // world.size
    weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    moments = [copy.deepcopy(opt.state_dict()) for opt in opts]
    model.train()
    for i in range(h.warmup_steps):
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        for _ in range(accum):
            x, y, cu = loader.next(h.train_batch_tokens, h.train_seq_len, accum)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = step_model(x, y, cu)
            (loss / accum).backward()
        average_grads(list(model.parameters()), world)
        for opt in opts:
            opt.step()
        if (i + 1) % 10 == 0 or i + 1 == h.warmup_steps:
            log0(f"warmup_step:{i + 1}/{h.warmup_steps}")
    model.load_state_dict(weights, strict=True)
    for opt, state in zip(opts, moments):
        opt.load_state_dict(state)
        opt.zero_grad(set_to_none=True)


def train(
    model: GPT, val: Tensor, table: ByteTable, h: type[Hyperparameters], world: World, log0: Log
) -> tuple[dict[str, Tensor], Clock]:
    """Trains until the clock says stop; returns the averaged weights and the clock, which keeps running."""
    accum = 8 // world.size
    step_model = torch.compile(model, dynamic=False) if h.compile_model else model
    opts = build_optimizers(model, h, world)
    muon = opts[0]
    loader = TrainLoader(h.train_files, world, h.bos_id, h.doc_mask)
    if h.warmup_steps > 0:
        warm_up(model, step_model, opts, loader, h, world, log0)
        loader = TrainLoader(h.train_files, world, h.bos_id, h.doc_mask)
    averager = Averager(model, h)
    params = list(model.parameters())
    budget = h.max_wallclock_seconds - h.gptq_reserve_seconds if h.max_wallclock_seconds > 0 else 0.0
    log0(f"clock:cap:{h.max_wallclock_seconds:.0f}s reserve_for_gptq:{h.gptq_reserve_seconds:.0f}s train:{budget:.0f}s")

    clock = Clock()
    clock.start()
    stop_at: int | None = None
    step = 0
    while True:
        last = step == h.iterations or (stop_at is not None and step >= stop_at)
        if last or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
            clock.stop()
            val_loss, val_bpb = eval_rows(model, val, table, h, world)
            log0(
                f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{1000 * clock.used:.0f}ms step_avg:{1000 * clock.used / max(step, 1):.2f}ms"
            )
            clock.start()
        if last:
            if stop_at is not None and step < h.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{1000 * clock.seconds():.0f}ms step:{step}")
            break

        scale = rate_scale(h, step, clock.seconds(), budget)
        model.train()
        train_loss = torch.zeros((), device=world.device)
        for _ in range(accum):
            x, y, cu = loader.next(h.train_batch_tokens, h.train_seq_len, accum)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = step_model(x, y, cu)
            train_loss += loss.detach() / accum
            (loss / accum).backward()
        average_grads(params, world)

        frac = min(step / h.muon_momentum_steps, 1.0) if h.muon_momentum_steps > 0 else 1.0
        for group in muon.param_groups:
            group["momentum"] = (1 - frac) * h.muon_momentum_start + frac * h.muon_momentum
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(params, h.grad_clip_norm)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        averager.update(model, step, scale)

        spent = clock.seconds()
        if step <= 10 or step % h.train_log_every == 0:
            log0(
                f"step:{step}/{h.iterations} train_loss:{train_loss.item():.4f} lr_scale:{scale:.4f} "
                f"train_time:{1000 * spent:.0f}ms step_avg:{1000 * spent / step:.2f}ms"
            )
        if stop_at is None and budget > 0 and world.agree(spent >= budget):
            stop_at = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    log0(f"avg:ema:{int(h.ema_enabled)} swa_snapshots:{averager.swa_count} swa_share:{h.swa_share}")
    return averager.result(model), clock


def compress_model(model: GPT, clock: Clock, h: type[Hyperparameters], world: World, log0: Log) -> None:
    """From averaged weights to the file, still on the training clock."""
    deadline = clock.since + max(h.max_wallclock_seconds - h.pack_seconds - clock.used, 1.0)
    begun = clock.seconds()
    text = write_calibration_text(model, h, world, deadline)
    log0(f"gptq:wrote {text.size(0) * world.size} sequences of {text.size(1)} in {clock.seconds() - begun:.1f}s")
    hessians = collect_hessians(model, text, h, world)
    log0(f"gptq:hessians:{len(hessians)} at {clock.seconds():.1f}s")
    packed, kinds = quantise(model.state_dict(), hessians, h, world, log0)
    if world.master:
        write_artifact(packed, kinds, h, log0)
    world.barrier()
    clock.stop()
    log0(f"clock:artifact written, train+gptq+pack:{clock.used:.1f}s of {h.max_wallclock_seconds:.0f}s")


# -----------------------------
# MAIN
# -----------------------------


def log_settings(h: type[Hyperparameters], world: World, log0: Log) -> None:
    log0(Path(__file__).read_text(encoding="utf-8"), console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)
    for name in sorted(k for k in vars(h) if not k.startswith("_")):
        log0(f"setting:{name}:{getattr(h, name)}", console=False)
    log0(f"world_size:{world.size} grad_accum_steps:{8 // world.size} seed:{h.seed}")
    log0(f"attention:{h.attn_backend} doc_mask:{int(h.doc_mask)} xsa_last_n:{h.xsa_last_n}")
    log0(f"value_residual:{int(h.value_residual)} unet_skips:{int(h.unet_skips)} ln_scale:{int(h.ln_scale)}")
    log0(f"bigram:buckets:{h.bigram_buckets} dim:{h.bigram_dim}")


def evaluate(val: Tensor, table: ByteTable, h: type[Hyperparameters], world: World, log0: Log) -> tuple[float, float]:
    """Everything from the packed file on; one clock over all of it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    model = read_artifact(h, world.device)
    log0(f"eval:artifact read in {time.perf_counter() - started:.1f}s")
    if h.plain_sliding or not h.ttt_enabled:
        t0 = time.perf_counter()
        loss, bpb = eval_sliding(model, val, table, h, world, log0)
        torch.cuda.synchronize()
        log0(
            f"final_sliding_window val_loss:{loss:.6f} val_bpb:{bpb:.6f} "
            f"eval_time:{1000 * (time.perf_counter() - t0):.0f}ms"
        )
    if h.ttt_enabled:
        t0 = time.perf_counter()
        loss, bpb = eval_ttt(model, val, table, h, world, started, log0)
        torch.cuda.synchronize()
        log0(
            f"final_sliding_ttt val_loss:{loss:.6f} val_bpb:{bpb:.6f} "
            f"eval_time:{1000 * (time.perf_counter() - t0):.0f}ms"
        )
    log0(f"eval:total {time.perf_counter() - started:.1f}s of {h.eval_budget_seconds:.0f}s")
    return loss, bpb


def main() -> None:
    h = Hyperparameters
    world = open_world()
    log0 = Log(world, h.run_id)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    log_settings(h, world, log0)

    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)

    sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
    if int(sp.vocab_size()) != h.vocab_size:
        raise ValueError(f"VOCAB_SIZE={h.vocab_size} is not the tokenizer's {int(sp.vocab_size())}")
    table = ByteTable(sp, h.vocab_size, world.device)
    val = load_validation(h.val_files)
    log0(f"train_loader:shards:{len(glob.glob(h.train_files))} pattern:{h.train_files}")
    log0(f"val_loader:shards:{len(glob.glob(h.val_files))} tokens:{val.numel() - 1} pattern:{h.val_files}")

    model = build_model(h, world.device)
    log0(f"model_params:{sum(p.numel() for p in model.parameters())}")
    log0(f"lr:embed:{h.embed_lr} matrix:{h.matrix_lr} scalar:{h.scalar_lr} warmdown:{h.warmdown_iters}")
    log0(f"muon:momentum:{h.muon_momentum} wd:{h.muon_wd} adam_wd:{h.adam_wd} clip:{h.grad_clip_norm}")

    averaged, clock = train(model, val, table, h, world, log0)
    model.load_state_dict(averaged, strict=True)
    compress_model(model, clock, h, world, log0)
    del model, averaged
    torch.cuda.empty_cache()

    loss, bpb = evaluate(val, table, h, world, log0)
    log0(f"final_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if world.many:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
