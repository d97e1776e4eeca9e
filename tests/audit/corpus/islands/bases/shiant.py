"""
train_gpt.py -- "shiant", 10 min / 16 MB track.

The trunk is the usual one of these weeks: 10 layers x 512, GQA 8/4, leaky-relu^2 MLP 2.75x, U-Net skips, partial
RoPE, XSA on the last layers, a bigram hash, SmearGate, shared value embeddings, two recurrent layers, Muon + AdamW,
EMA, int6 GPTQ calibrated on text that the model writes itself, LZMA.

What is added here is the evaluation. Every window of the sliding evaluation gets two small vectors of its own, one
added to the last hidden state and one added to the logits. They start from zero, are fitted for a few AdamW steps on
the positions of that window that come *before* the block which the window scores, and are thrown away afterwards.
The weights are frozen and compiled; only the head runs inside the fit, so it is cheap.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

All settings come from the environment, see Settings.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import lzma
import math
import os
import platform
import random
import struct
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------------------
# settings
# --------------------------------------------------------------------------------------------------------------


def from_env(name: str, default):
    """The environment's word for it, in the type of the default."""
    raw = os.environ.get(name)
    if raw is None or raw == "":
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


def int_list(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace(" ", "").split(",") if part)


class Settings:
    # files
    data_path = from_env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = from_env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    artifact_path = from_env("ARTIFACT_PATH", "final_model.int6.xz")
    log_dir = from_env("LOG_DIR", "logs")
    run_id = from_env("RUN_ID", str(uuid.uuid4()))
    seed = from_env("SEED", 1337)

    # limits of the challenge
    build_seconds = from_env("MAX_WALLCLOCK_SECONDS", 600.0)
    eval_seconds = from_env("MAX_EVAL_SECONDS", 600.0)
    max_total_bytes = 16_000_000

    # how the build's seconds are shared out: training ends at build - reserve, writing text ends at build - pack
    reserve_seconds = from_env("RESERVE_SECONDS", 66.0)
    pack_seconds = from_env("PACK_SECONDS", 44.0)

    # training
    iterations = from_env("ITERATIONS", 20000)
    prime_steps = from_env("PRIME_STEPS", 12)
    train_batch_tokens = from_env("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = from_env("TRAIN_SEQ_LEN", 2048)
    warmdown_steps = from_env("WARMDOWN_STEPS", 3600)
    log_every = from_env("TRAIN_LOG_EVERY", 250)
    val_every = from_env("VAL_LOSS_EVERY", 4000)
    grad_clip = from_env("GRAD_CLIP_NORM", 0.3)

    # model
    vocab_size = from_env("VOCAB_SIZE", 1024)
    num_layers = from_env("NUM_LAYERS", 10)
    model_dim = from_env("MODEL_DIM", 512)
    num_heads = from_env("NUM_HEADS", 8)
    num_kv_heads = from_env("NUM_KV_HEADS", 4)
    mlp_mult = from_env("MLP_MULT", 2.75)
    rope_base = from_env("ROPE_BASE", 10000.0)
    rope_dims = from_env("ROPE_DIMS", 16)
    softcap = from_env("LOGIT_SOFTCAP", 30.0)
    qk_gain = from_env("QK_GAIN_INIT", 4.0)
    xsa_last = from_env("XSA_LAST_N", 4)
    recur_layers = int_list(from_env("RECUR_LAYERS", "4,5"))
    bigram_buckets = from_env("BIGRAM_BUCKETS", 2048)
    bigram_dim = from_env("BIGRAM_DIM", 128)
    ve_dim = from_env("VE_DIM", 128)
    ve_layers = int_list(from_env("VE_LAYERS", "8,9"))
    embed_std = from_env("EMBED_INIT_STD", 0.005)

    # optimisers
    embed_lr = from_env("EMBED_LR", 0.035)
    matrix_lr = from_env("MATRIX_LR", 0.025)
    scalar_lr = from_env("SCALAR_LR", 0.025)
    muon_momentum = from_env("MUON_MOMENTUM", 0.99)
    muon_momentum_start = from_env("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = from_env("MUON_MOMENTUM_STEPS", 1500)
    muon_ns_steps = from_env("MUON_NS_STEPS", 5)
    muon_wd = from_env("MUON_WD", 0.04)
    adam_wd = from_env("ADAM_WD", 0.04)
    beta1 = from_env("BETA1", 0.9)
    beta2 = from_env("BETA2", 0.95)
    adam_eps = from_env("ADAM_EPS", 1e-8)

    # averages of the weights
    weight_avg = from_env("WEIGHT_AVG", "ema")  # ema, swa, raw
    ema_decay = from_env("EMA_DECAY", 0.997)
    swa_every = from_env("SWA_EVERY", 50)
    swa_below = from_env("SWA_BELOW", 0.2)

    # quantisation
    matrix_levels = from_env("MATRIX_LEVELS", 31)  # int6: -31 .. 31
    table_levels = from_env("TABLE_LEVELS", 127)
    calib_seqs = from_env("CALIB_SEQS", 32)  # per rank
    calib_len = from_env("CALIB_LEN", 512)
    calib_temp = from_env("CALIB_TEMP", 0.8)
    gptq_block = from_env("GPTQ_BLOCK", 128)
    gptq_damp = from_env("GPTQ_DAMP", 0.01)

    # evaluation
    eval_seq_len = from_env("EVAL_SEQ_LEN", 2048)
    eval_stride = from_env("EVAL_STRIDE", 64)
    eval_batch = from_env("EVAL_BATCH", 32)
    slot_steps = from_env("SLOT_STEPS", 8)
    slot_lr = from_env("SLOT_LR", 0.008)
    slot_lr_end = from_env("SLOT_LR_END", 0.0008)
    slot_bias_lr = from_env("SLOT_BIAS_LR", 0.02)
    slot_wd = from_env("SLOT_WD", 0.01)
    slot_reach = from_env("SLOT_REACH", 1024)  # how far back of its block a window's vectors look
    slot_seconds = from_env("SLOT_SECONDS", 480.0)  # past this, the remaining windows are scored without vectors
    self_check = from_env("SELF_CHECK", False)

    def as_dict(self) -> dict:
        return {k: getattr(self, k) for k in dir(self) if not k.startswith("_") and k != "as_dict"}


BOS_ID = 1
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


# --------------------------------------------------------------------------------------------------------------
# ranks, log, clock
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def many(self) -> bool:
        return self.world > 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.many:
            dist.barrier()

    def total(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.many:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value

    def most(self, value: float) -> float:
        """The largest over ranks, so that all decide alike."""
        if not self.many:
            return value
        cell = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(cell, op=dist.ReduceOp.MAX)
        return float(cell.item())

    def any(self, flag: bool) -> bool:
        return self.most(float(flag)) > 0.0


def join_ranks() -> Ranks:
    if not torch.cuda.is_available():
        raise SystemExit("this script needs CUDA")
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if world < 1 or 8 % world != 0:
        raise ValueError(f"WORLD_SIZE={world} does not divide 8")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return Ranks(rank, world, device)


class Log:
    """Rank 0 prints and keeps a file; the others are silent."""

    def __init__(self, ranks: Ranks, folder: str, run_id: str):
        self.path = None
        if ranks.first:
            os.makedirs(folder, exist_ok=True)
            self.path = os.path.join(folder, f"{run_id}.txt")
            print(self.path, flush=True)

    def __call__(self, text: str, screen: bool = True) -> None:
        if self.path is None:
            return
        if screen:
            print(text, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(text, file=f)


class Clock:
    """Seconds of the build. It stands still only while a mid-run validation loss is computed for the log."""

    def __init__(self):
        self.kept = 0.0
        self.since: float | None = None

    def go(self) -> None:
        torch.cuda.synchronize()
        if self.since is None:
            self.since = time.perf_counter()

    def hold(self) -> None:
        torch.cuda.synchronize()
        if self.since is not None:
            self.kept += time.perf_counter() - self.since
            self.since = None

    def seconds(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.kept + running

    def ms(self) -> float:
        return 1000.0 * self.seconds()


def digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------------------


def read_shard(path: str | Path) -> np.ndarray:
    """The tokens of one .bin file: 256 little-endian int32 (magic, version, count, ...), then uint16."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    want = HEADER_INTS * 4 + count * 2
    if Path(path).stat().st_size != want:
        raise ValueError(f"{path}: {want} bytes expected for {count} tokens")
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: short read")
    return tokens


def list_shards(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return files


def load_split(pattern: str) -> Tensor:
    """A whole split as one int32 tensor on the CPU, shards in the order of their names."""
    parts = [read_shard(path).astype(np.int32) for path in list_shards(pattern)]
    return torch.from_numpy(np.concatenate(parts))


class TokenStream:
    """Endless reading of shards in order, wrapping around."""

    def __init__(self, pattern: str):
        self.files = list_shards(pattern)
        self.index = 0
        self.tokens = read_shard(self.files[0])
        self.at = 0

    def _advance(self) -> None:
        self.index = (self.index + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.index])
        self.at = 0

    def take(self, count: int) -> np.ndarray:
        pieces = []
        while count > 0:
            left = len(self.tokens) - self.at
            if left <= 0:
                self._advance()
                continue
            n = min(count, left)
            pieces.append(self.tokens[self.at : self.at + n])
            self.at += n
            count -= n
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class TrainBatches:
    """Each rank cuts its own span out of a common stretch of the stream, so no rank sees another's tokens."""

    def __init__(self, pattern: str, ranks: Ranks, seq_len: int):
        self.stream = TokenStream(pattern)
        self.ranks = ranks
        self.seq_len = seq_len

    def next(self, global_tokens: int, accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.ranks.world * accum)
        local = local // self.seq_len * self.seq_len
        span = local + 1
        stretch = self.stream.take(span * self.ranks.world)
        mine = stretch[self.ranks.rank * span : (self.ranks.rank + 1) * span].astype(np.int64)
        piece = torch.from_numpy(mine).pin_memory()
        x = piece[:-1].view(-1, self.seq_len)
        y = piece[1:].view(-1, self.seq_len)
        return x.to(self.ranks.device, non_blocking=True), y.to(self.ranks.device, non_blocking=True)


# --------------------------------------------------------------------------------------------------------------
# bytes of the original text
# --------------------------------------------------------------------------------------------------------------


class ByteTable:
    """How many bytes of text each target token stands for, given the token before it.

    A piece's mark for a leading space is one byte, unless the token before is a boundary (BOS and the like), where
    SentencePiece puts the mark although the text has no space there.
    """

    def __init__(self, model_path: str, vocab_size: int, device: torch.device):
        sp = spm.SentencePieceProcessor(model_file=model_path)
        if int(sp.vocab_size()) != vocab_size:
            raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, model {vocab_size}")
        size = vocab_size
        own = np.zeros(size, dtype=np.int64)
        spaced = np.zeros(size, dtype=np.bool_)
        boundary = np.ones(size, dtype=np.bool_)
        for i in range(size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            boundary[i] = False
            if sp.is_byte(i):
                own[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                spaced[i] = True
                piece = piece[1:]
            own[i] = len(piece.encode("utf-8"))
        self.sp = sp
        self.own = torch.from_numpy(own).to(device)
        self.spaced = torch.from_numpy(spaced).to(device)
        self.boundary = torch.from_numpy(boundary).to(device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        extra = self.spaced[target] & ~self.boundary[prev]
        return self.own[target] + extra.to(torch.int64)


# --------------------------------------------------------------------------------------------------------------
# model
# --------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """fp32 weights, used in the type of the activations. No bias anywhere."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rope(nn.Module):
    """Rotation of the first `dims` of every head."""

    def __init__(self, dims: int, base: float, max_len: int):
        super().__init__()
        freq = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), freq)
        self.dims = dims
        self.register_buffer("cos", angle.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", angle.sin()[None, :, None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = x.size(1)
        cos, sin = self.cos[:, :t].to(x.dtype), self.sin[:, :t].to(x.dtype)
        turn, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turn.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Settings, layer: int):
        super().__init__()
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv = self.kv_heads * self.head_dim
        self.q = Linear(cfg.model_dim, cfg.model_dim)
        self.k = Linear(cfg.model_dim, kv)
        self.v = Linear(cfg.model_dim, kv)
        self.out = Linear(cfg.model_dim, cfg.model_dim)
        self.gain = nn.Parameter(torch.full((self.heads,), cfg.qk_gain))
        self.xsa = layer >= cfg.num_layers - cfg.xsa_last

    def drop_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: takes out of every head's output what points along the position's own value."""
        b, t, _, d = y.shape
        grouped = y.reshape(b, t, self.kv_heads, self.heads // self.kv_heads, d)
        along = F.normalize(v, dim=-1).unsqueeze(3)
        grouped = grouped - (grouped * along).sum(-1, keepdim=True) * along
        return grouped.reshape(b, t, self.heads, d)

    def forward(self, x: Tensor, rope: Rope, extra_v: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.head_dim)
        k = self.k(x).view(b, t, self.kv_heads, self.head_dim)
        v = self.v(x)
        if extra_v is not None:
            v = v + extra_v
        v = v.view(b, t, self.kv_heads, self.head_dim)
        q = rope(rms(q)) * self.gain.to(q.dtype)[None, None, :, None]
        k = rope(rms(k))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        ).transpose(1, 2)
        if self.xsa:
            y = self.drop_self(y, v)
        return self.out(y.reshape(b, t, -1))


class Mlp(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        hidden = int(dim * mult)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), negative_slope=0.5).square())


class SmearGate(nn.Module):
    """Mixes the embedding of the token before into each token's, but never into the first token of a document."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        g = torch.sigmoid(self.gate).to(x.dtype)[None, None, :]
        g = g * (~starts).unsqueeze(-1).to(x.dtype)
        return (1 - g) * x + g * before


class BigramHash(nn.Module):
    """A hashed table over (token before, token). The last bucket is for tokens that have nobody before them."""

    def __init__(self, buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.table = nn.Embedding(buckets, dim)
        self.proj = Linear(dim, model_dim)
        self.scale = nn.Parameter(torch.tensor([0.05]))
        nn.init.normal_(self.table.weight, std=0.02)

    def keys(self, ids: Tensor, starts: Tensor) -> Tensor:
        before = F.pad(ids[:, :-1], (1, 0))
        key = torch.bitwise_xor(ids * 36313, before * 27191) % (self.buckets - 1)
        return torch.where(starts, torch.full_like(key, self.buckets - 1), key)

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        h = self.table(self.keys(ids, starts)).bfloat16()
        return self.proj(h) * self.scale.to(h.dtype)


class ValueEmbed(nn.Module):
    """One small table shared by a few layers, added to their values."""

    def __init__(self, cfg: Settings):
        super().__init__()
        kv = cfg.num_kv_heads * (cfg.model_dim // cfg.num_heads)
        self.table = nn.Embedding(cfg.vocab_size, cfg.ve_dim)
        self.proj = Linear(cfg.ve_dim, kv)
        self.scale = nn.Parameter(torch.full((len(cfg.ve_layers),), 0.1))
        nn.init.normal_(self.table.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.table(ids).bfloat16())


class Block(nn.Module):
    def __init__(self, cfg: Settings, layer: int):
        super().__init__()
        dim = cfg.model_dim
        self.attn = Attention(cfg, layer)
        self.mlp = Mlp(dim, cfg.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.damp = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, rope: Rope, extra_v: Tensor | None) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.damp, rope, extra_v)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.damp)


class GPT(nn.Module):
    def __init__(self, cfg: Settings):
        super().__init__()
        self.softcap = cfg.softcap
        self.ve_at = {layer: i for i, layer in enumerate(cfg.ve_layers)}
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram = BigramHash(cfg.bigram_buckets, cfg.bigram_dim, cfg.model_dim)
        self.smear = SmearGate(cfg.model_dim)
        self.values = ValueEmbed(cfg)
        self.rope = Rope(cfg.rope_dims, cfg.rope_base, max(cfg.train_seq_len, cfg.eval_seq_len))
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        self.path = self.unrolled(cfg)
        self.down_len = len(self.path) // 2
        self.up_len = len(self.path) - self.down_len
        self.skip = nn.Parameter(torch.ones(min(self.down_len, self.up_len), cfg.model_dim))
        self.start_weights(cfg)

    @staticmethod
    def unrolled(cfg: Settings) -> list[int]:
        """Order of the layers: the recurrent ones run twice, as a group."""
        order = list(range(cfg.num_layers))
        if cfg.recur_layers:
            last = max(cfg.recur_layers)
            order[last + 1 : last + 1] = list(cfg.recur_layers)
        return order

    def start_weights(self, cfg: Settings) -> None:
        nn.init.normal_(self.embed.weight, std=cfg.embed_std)
        for name, module in self.named_modules():
            if not isinstance(module, Linear):
                continue
            if name.endswith((".out", ".down")) or name == "bigram.proj":
                nn.init.zeros_(module.weight)
            elif min(module.weight.shape) >= 64:
                nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        """Normed last hidden states; position t has seen ids[: t + 1] and nothing else."""
        first = torch.arange(ids.size(1), device=ids.device)[None, :] == 0
        starts = (ids == BOS_ID) | first
        x = self.embed(ids).bfloat16()
        x = x + self.bigram(ids, starts)
        x = self.smear(rms(x), starts)
        x0 = x
        ve = self.values(ids)
        kept: list[Tensor] = []
        for step, layer in enumerate(self.path):
            if step >= self.down_len and kept:
                weight = self.skip[step - self.down_len].to(x.dtype)
                x = x + weight * kept.pop()
            extra = None
            if layer in self.ve_at:
                extra = ve * self.values.scale[self.ve_at[layer]].to(ve.dtype)
            x = self.blocks[layer](x, x0, self.rope, extra)
            if step < self.down_len:
                kept.append(x)
        return rms(x)

    def head(self, h: Tensor) -> Tensor:
        z = F.linear(h, self.embed.weight.to(h.dtype)).float()
        return self.softcap * torch.tanh(z / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# --------------------------------------------------------------------------------------------------------------
# optimisers
# --------------------------------------------------------------------------------------------------------------


@torch.compile
def orthogonalise(g: Tensor, steps: int) -> Tensor:
    """Newton-Schulz, quintic."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    wide = x.size(0) <= x.size(1)
    if not wide:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Every rank orthogonalises its share of the matrices; the updates travel in one flat buffer."""

    def __init__(self, params, ranks: Ranks, lr: float, momentum: float, wd: float, ns_steps: int):
        super().__init__(params, dict(lr=lr, momentum=momentum, wd=wd, ns_steps=ns_steps))
        self.ranks = ranks

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=self.ranks.device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p)
                    buf = state["buf"].mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = orthogonalise(g, group["ns_steps"])
                    g = g * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            self.ranks.total(flat)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["wd"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


@dataclass
class Optimisers:
    muon: Muon
    adams: list[torch.optim.AdamW]

    def all(self) -> list[torch.optim.Optimizer]:
        return [self.muon, *self.adams]

    def scale(self, factor: float) -> None:
        for opt in self.all():
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * factor

    def momentum(self, value: float) -> None:
        for group in self.muon.param_groups:
            group["momentum"] = value

    def step(self) -> None:
        for opt in self.all():
            opt.step()


def make_optimisers(model: GPT, cfg: Settings, ranks: Ranks) -> Optimisers:
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        if name.startswith("embed.") or ".table." in name:
            tables.append(p)
        elif p.ndim == 2 and name.startswith(("blocks.", "bigram.proj", "values.proj")) and not name.endswith(".mix"):
            matrices.append(p)
        else:
            vectors.append(p)
    betas = (cfg.beta1, cfg.beta2)
    common = dict(betas=betas, eps=cfg.adam_eps, fused=True)
    adams = [
        torch.optim.AdamW(tables, lr=cfg.embed_lr, weight_decay=cfg.adam_wd, **common),
        torch.optim.AdamW(vectors, lr=cfg.scalar_lr, weight_decay=0.0, **common),
    ]
    muon = Muon(matrices, ranks, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_wd, cfg.muon_ns_steps)
    result = Optimisers(muon, adams)
    for opt in result.all():
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return result


# --------------------------------------------------------------------------------------------------------------
# averages
# --------------------------------------------------------------------------------------------------------------


class Averages:
    """EMA over all steps and an equal-weight mean over the tail of the warmdown."""

    def __init__(self, model: nn.Module, cfg: Settings):
        self.cfg = cfg
        self.live = [p.detach() for p in model.parameters()]
        self.ema = [p.clone() for p in self.live]
        self.sum: list[Tensor] | None = None
        self.taken = 0

    @torch.no_grad()
    def update(self, step: int, factor: float) -> None:
        torch._foreach_lerp_(self.ema, self.live, 1.0 - self.cfg.ema_decay)
        if factor < self.cfg.swa_below and step % self.cfg.swa_every == 0:
            if self.sum is None:
                self.sum = [torch.zeros_like(p) for p in self.live]
            torch._foreach_add_(self.sum, self.live)
            self.taken += 1

    def weights(self, kind: str) -> list[Tensor]:
        if kind == "ema":
            return self.ema
        if kind == "swa" and self.sum is not None:
            return [s / self.taken for s in self.sum]
        return [p.clone() for p in self.live]

    @torch.no_grad()
    def put(self, kind: str) -> None:
        torch._foreach_copy_(self.live, self.weights(kind))


# --------------------------------------------------------------------------------------------------------------
# training
# --------------------------------------------------------------------------------------------------------------


def lr_factor(step: int, seconds: float, limit: float, cfg: Settings) -> float:
    """1, then linearly to 0 over what `warmdown_steps` take at the present pace, ending with the clock."""
    per_step = seconds / max(step, 1)
    span = cfg.warmdown_steps * per_step
    left = max(limit - seconds, 0.0)
    if step == 0 or left > span:
        return 1.0
    return left / max(span, 1e-9)


def muon_momentum_at(step: int, cfg: Settings) -> float:
    part = min(step / max(cfg.muon_momentum_steps, 1), 1.0)
    return (1.0 - part) * cfg.muon_momentum_start + part * cfg.muon_momentum


def reduce_grads(params: list[nn.Parameter], ranks: Ranks) -> None:
    if not ranks.many:
        return
    jobs = [dist.all_reduce(p.grad, op=dist.ReduceOp.AVG, async_op=True) for p in params if p.grad is not None]
    for job in jobs:
        job.wait()


def one_step(step_fn, model: GPT, opts: Optimisers, batches: TrainBatches, cfg: Settings, ranks: Ranks) -> Tensor:
    """Forward and backward over one global batch, then every optimiser. Returns this rank's mean loss."""
    accum = 8 // ranks.world
    total = torch.zeros((), device=ranks.device)
    params = list(model.parameters())
    for p in params:
        p.grad = None
    for _ in range(accum):
        x, y = batches.next(cfg.train_batch_tokens, accum)
        loss = step_fn(x, y) / accum
        loss.backward()
        total += loss.detach()
    reduce_grads(params, ranks)
    if cfg.grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip)
    opts.step()
    return total


def prime(step_fn, model: GPT, opts: Optimisers, cfg: Settings, ranks: Ranks, log: Log) -> None:
    """Compiles everything on a few training batches and then puts weights and optimisers back as they were."""
    weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    batches = TrainBatches(cfg.train_files, ranks, cfg.train_seq_len)
    opts.scale(0.0)
    for i in range(cfg.prime_steps):
        one_step(step_fn, model, opts, batches, cfg, ranks)
        if i + 1 == cfg.prime_steps or (i + 1) % 10 == 0:
            log(f"prime:{i + 1}/{cfg.prime_steps}")
    model.load_state_dict(weights, strict=True)
    for opt in opts.all():
        opt.state.clear()
    for p in model.parameters():
        p.grad = None
    opts.scale(1.0)
    torch.cuda.synchronize()


def train(model: GPT, cfg: Settings, ranks: Ranks, log: Log, clock: Clock, watch_loss) -> Averages:
    """Runs until the share of the clock that belongs to training is spent. watch_loss: for the log only."""
    limit = cfg.build_seconds - cfg.reserve_seconds
    step_fn = torch.compile(model, dynamic=False, fullgraph=True)
    opts = make_optimisers(model, cfg, ranks)
    prime(step_fn, model, opts, cfg, ranks, log)

    batches = TrainBatches(cfg.train_files, ranks, cfg.train_seq_len)
    averages = Averages(model, cfg)
    ranks.wait()
    clock.go()
    step = 0
    seconds = 0.0  # the slowest rank's, so that every rank has the same learning rate
    while step < cfg.iterations:
        if cfg.val_every > 0 and step > 0 and step % cfg.val_every == 0:
            clock.hold()
            seen = watch_loss()
            log(f"step:{step}/{cfg.iterations} val_loss:{seen.loss:.4f} val_bpb:{seen.bpb:.4f} "
                f"train_time:{clock.ms():.0f}ms step_avg:{clock.ms() / step:.2f}ms")
            ranks.wait()
            clock.go()
        factor = lr_factor(step, seconds, limit, cfg)
        opts.scale(factor)
        opts.momentum(muon_momentum_at(step, cfg))
        loss = one_step(step_fn, model, opts, batches, cfg, ranks)
        step += 1
        averages.update(step, factor)
        if step <= 10 or step % cfg.log_every == 0:
            log(f"step:{step}/{cfg.iterations} train_loss:{loss.item():.4f} lr_factor:{factor:.4f} "
                f"train_time:{clock.ms():.0f}ms step_avg:{clock.ms() / step:.2f}ms")
        seconds = ranks.most(clock.seconds())
        if seconds >= limit:
            log(f"training stops at the clock: step:{step}/{cfg.iterations} train_time:{clock.ms():.0f}ms")
            break
    torch.cuda.synchronize()
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    return averages


# --------------------------------------------------------------------------------------------------------------
# calibration text, written by the model itself
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_text(model: GPT, cfg: Settings, ranks: Ranks, clock: Clock) -> Tensor:
    """[calib_seqs, <= calib_len] tokens sampled from the model, from BOS on. Stops early if the clock asks for it.

    No KV cache: 512 forwards of a small batch are a few seconds and not worth the code.
    """
    until = cfg.build_seconds - cfg.pack_seconds
    dice = torch.Generator(device=ranks.device)
    dice.manual_seed(cfg.seed + 7919 * ranks.rank)
    text = torch.full((cfg.calib_seqs, 1), BOS_ID, dtype=torch.int64, device=ranks.device)
    while text.size(1) < cfg.calib_len:
        if text.size(1) % 16 == 0:
            torch.cuda.synchronize()
            if clock.seconds() > until:
                break
        last = model.hidden(text)[:, -1:]
        probs = torch.softmax(model.head(last)[:, 0] / cfg.calib_temp, dim=-1)
        text = torch.cat((text, torch.multinomial(probs, 1, generator=dice)), dim=1)
    return text


def block_linears(model: GPT) -> dict[str, Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


@torch.no_grad()
def collect_hessians(model: GPT, text: Tensor, ranks: Ranks, rows: int = 8) -> dict[str, Tensor]:
    """X^T X of the inputs of every matrix, summed over ranks."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in block_linears(model).items():
        width = module.weight.size(1)
        sums[name] = torch.zeros(width, width, device=ranks.device)

        def keep(_module, args, name=name):
            x = args[0].detach().reshape(-1, args[0].size(-1)).float()
            sums[name].addmm_(x.T, x)

        hooks.append(module.register_forward_pre_hook(keep))
    for lo in range(0, text.size(0), rows):
        model.hidden(text[lo : lo + rows])
    for hook in hooks:
        hook.remove()
    for h in sums.values():
        ranks.total(h)
    return sums


# --------------------------------------------------------------------------------------------------------------
# quantisation
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Quantised:
    codes: Tensor  # int8, [rows, columns]
    scale: Tensor  # fp16, [rows]

    def dense(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]


def row_scales(w: Tensor, clip: float, levels: int) -> Tensor:
    top = w.abs().amax(dim=1) if clip >= 1.0 else torch.quantile(w.abs(), clip, dim=1)
    scale = (top / levels).clamp_min(1e-6)
    return scale.half().float().clamp_min(6e-8)


def plain_rows(w: Tensor, levels: int) -> Quantised:
    """Round to nearest with the clip that has the least squared error, for the tables."""
    w = w.float()
    best: tuple[float, Quantised] | None = None
    for clip in (0.999, 0.9999, 1.0):
        scale = row_scales(w, clip, levels)
        codes = torch.clamp(torch.round(w / scale[:, None]), -levels, levels)
        err = (codes * scale[:, None] - w).square().sum().item()
        if best is None or err < best[0]:
            best = (err, Quantised(codes.to(torch.int8), scale.half()))
    return best[1]


def gptq_pass(w: Tensor, factor: Tensor, scale: Tensor, levels: int, block: int) -> Tensor:
    """Codes of w, column after column, each column's error pushed on to those that follow."""
    w = w.clone()
    rows, columns = w.shape
    codes = torch.zeros_like(w)
    for lo in range(0, columns, block):
        hi = min(lo + block, columns)
        part = w[:, lo:hi].clone()
        errors = torch.zeros_like(part)
        local = factor[lo:hi, lo:hi]
        for j in range(hi - lo):
            column = part[:, j]
            q = torch.clamp(torch.round(column / scale), -levels, levels)
            codes[:, lo + j] = q
            e = (column - q * scale) / local[j, j]
            part[:, j:] -= torch.outer(e, local[j, j:])
            errors[:, j] = e
        if hi < columns:
            w[:, hi:] -= errors @ factor[lo:hi, hi:]
    return codes


def gptq(w: Tensor, hessian: Tensor, cfg: Settings) -> Quantised:
    w = w.float()
    h = hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    order = torch.argsort(h.diagonal(), descending=True)
    back = torch.argsort(order)
    wp, hp = w[:, order], h[order][:, order]
    damp = cfg.gptq_damp * hp.diagonal().mean()
    hp.diagonal().add_(damp)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hp))
        factor = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:
        return plain_rows(w, cfg.matrix_levels)
    best: tuple[float, Quantised] | None = None
    for clip in (0.999, 0.9995, 0.9999, 1.0):
        scale = row_scales(w, clip, cfg.matrix_levels)
        codes = gptq_pass(wp, factor, scale, cfg.matrix_levels, cfg.gptq_block)
        miss = codes * scale[:, None] - wp
        err = ((miss @ hp) * miss).sum().item()
        if best is None or err < best[0]:
            best = (err, Quantised(codes[:, back].to(torch.int8), scale.half()))
    return best[1]


def quantise_matrices(model: GPT, hessians: dict[str, Tensor], cfg: Settings, ranks: Ranks) -> dict[str, Quantised]:
    """The matrices are dealt out to the ranks; everybody ends with all of them."""
    done: dict[str, Quantised] = {}
    for i, (name, module) in enumerate(sorted(block_linears(model).items())):
        owner = i % ranks.world
        rows, columns = module.weight.shape
        if owner == ranks.rank:
            done[name] = gptq(module.weight.detach(), hessians[name], cfg)
        else:
            done[name] = Quantised(
                torch.empty(rows, columns, dtype=torch.int8, device=ranks.device),
                torch.empty(rows, dtype=torch.float16, device=ranks.device),
            )
    if ranks.many:
        for i, name in enumerate(sorted(done)):
            dist.broadcast(done[name].codes, src=i % ranks.world)
            dist.broadcast(done[name].scale, src=i % ranks.world)
    return done


# --------------------------------------------------------------------------------------------------------------
# artifact
# --------------------------------------------------------------------------------------------------------------

XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 25, "pb": 0, "lc": 0, "lp": 0}]
TABLES = ("embed.weight", "bigram.table.weight", "values.table.weight")


def pack(parts: dict[str, Tensor]) -> bytes:
    """One xz stream: length of the index, index as JSON, then the tensors' bytes one after the other."""
    index, body = [], io.BytesIO()
    for name, tensor in parts.items():
        array = tensor.detach().cpu().contiguous().numpy()
        index.append([name, array.dtype.str, list(array.shape)])
        body.write(array.tobytes())
    head = json.dumps(index, separators=(",", ":")).encode()
    return lzma.compress(struct.pack("<I", len(head)) + head + body.getvalue(), format=lzma.FORMAT_XZ, filters=XZ_FILTERS)


def unpack(blob: bytes) -> dict[str, Tensor]:
    raw = lzma.decompress(blob)
    (size,) = struct.unpack_from("<I", raw, 0)
    index = json.loads(raw[4 : 4 + size])
    at = 4 + size
    parts = {}
    for name, dtype, shape in index:
        count = math.prod(shape)
        array = np.frombuffer(raw, dtype=np.dtype(dtype), count=count, offset=at).reshape(shape)
        parts[name] = torch.from_numpy(array.copy())
        at += array.nbytes
    if at != len(raw):
        raise ValueError(f"artifact: {len(raw) - at} bytes left over")
    return parts


def artifact_parts(model: GPT, matrices: dict[str, Quantised], cfg: Settings) -> dict[str, Tensor]:
    """Matrices by GPTQ, tables by rounding, everything else in fp16. Like is put beside like for LZMA's sake."""
    parts: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name in sorted(matrices, key=lambda n: (n.rsplit(".", 1)[-1], n)):
        parts[f"{name}.weight#q"] = matrices[name].codes
        rest[f"{name}.weight#s"] = matrices[name].scale
    for name, p in model.named_parameters():
        if name in TABLES:
            table = plain_rows(p.detach(), cfg.table_levels)
            parts[f"{name}#q"] = table.codes
            rest[f"{name}#s"] = table.scale
        elif f"{name}#q" not in parts:
            rest[name] = p.detach().half()
    return {**parts, **rest}


def model_from(parts: dict[str, Tensor], cfg: Settings, device: torch.device) -> GPT:
    """A model with nothing in it but what the artifact says."""
    weights = {}
    for name, tensor in parts.items():
        if name.endswith("#q"):
            stem = name[:-2]
            weights[stem] = Quantised(tensor, parts[f"{stem}#s"]).dense()
        elif not name.endswith("#s"):
            weights[name] = tensor.float()
    model = GPT(cfg)
    model.load_state_dict(weights, strict=True)
    return model.to(device)


def write_artifact(model: GPT, cfg: Settings, ranks: Ranks, log: Log, clock: Clock) -> None:
    """Calibration, GPTQ, packing and the file, all on the build's clock."""
    text = write_text(model, cfg, ranks, clock)
    log(f"calibration: {text.size(0) * ranks.world} texts of {text.size(1)} tokens, at {clock.ms():.0f}ms")
    hessians = collect_hessians(model, text, ranks)
    matrices = quantise_matrices(model, hessians, cfg, ranks)
    log(f"gptq: {len(matrices)} matrices, at {clock.ms():.0f}ms")
    if ranks.first:
        blob = pack(artifact_parts(model, matrices, cfg))
        Path(cfg.artifact_path).write_bytes(blob)
    ranks.wait()
    clock.hold()
    log(f"artifact written: build_time:{clock.ms():.0f}ms of {1000 * cfg.build_seconds:.0f}ms")
    if ranks.any(clock.seconds() > cfg.build_seconds):
        raise SystemExit("the build took longer than it may")


def check_size(cfg: Settings, log: Log) -> int:
    """Code and artifact, in bytes as they lie on the disk."""
    code = Path(__file__).read_bytes()
    blob = Path(cfg.artifact_path).read_bytes()
    total = len(code) + len(blob)
    log(f"code: {len(code)} bytes sha256:{digest(code)}")
    log(f"artifact: {len(blob)} bytes sha256:{digest(blob)}")
    log(f"Total submission size: {total} bytes of {cfg.max_total_bytes}")
    if total > cfg.max_total_bytes:
        raise SystemExit(f"too large by {total - cfg.max_total_bytes} bytes")
    return total


# --------------------------------------------------------------------------------------------------------------
# evaluation: which window scores what
# --------------------------------------------------------------------------------------------------------------
# Position p reads tokens[: p + 1] and predicts tokens[p + 1]. A split of n tokens has n - 1 positions. They are cut
# into blocks of `stride`; each block is scored by one window, which ends with the block and reaches back so far that
# it is eval_seq_len long (shorter at the very beginning). So the blocks, not the windows, tile the split.


def plan_windows(positions: int, seq_len: int, stride: int) -> np.ndarray:
    """[windows, 3]: first position seen, first position scored, one past the last position scored."""
    if not 0 < stride <= seq_len:
        raise ValueError(f"stride {stride} does not fit a window of {seq_len}")
    start = np.arange(0, positions, stride, dtype=np.int64)
    stop = np.minimum(start + stride, positions)
    left = np.maximum(stop - seq_len, 0)
    return np.stack((left, start, stop), axis=1)


def my_share(plan: np.ndarray, ranks: Ranks) -> np.ndarray:
    """A contiguous run of windows for every rank."""
    cuts = np.linspace(0, len(plan), ranks.world + 1).astype(np.int64)
    return plan[cuts[ranks.rank] : cuts[ranks.rank + 1]]


@dataclass
class Windows:
    """One batch, everything [windows, seq_len]. Rows are padded on the right, which a causal model cannot see."""

    x: Tensor
    y: Tensor
    pos: Tensor  # position in the split
    scored: Tensor  # bool: the block
    fit: Tensor  # fp32, 1 where the window's vectors may look: before the block

    @property
    def rows(self) -> int:
        return self.x.size(0)


def cut_windows(tokens: Tensor, plan: np.ndarray, cfg: Settings) -> Windows:
    """The batch of these windows; filled up with empty rows to eval_batch so that the shapes never change."""
    if len(plan) < cfg.eval_batch:
        empty = np.zeros((cfg.eval_batch - len(plan), 3), dtype=np.int64)
        plan = np.concatenate((plan, empty))
    edges = torch.from_numpy(plan).to(tokens.device)
    left, start, stop = edges[:, 0:1], edges[:, 1:2], edges[:, 2:3]
    pos = left + torch.arange(cfg.eval_seq_len, device=tokens.device)[None, :]
    inside = pos < stop
    at = torch.where(inside, pos, torch.zeros_like(pos))
    x = tokens[at].long()
    y = tokens[at + 1].long()
    scored = inside & (pos >= start)
    fit = inside & (pos < start) & (pos >= start - cfg.slot_reach)
    return Windows(x, y, at, scored, fit.float())


# --------------------------------------------------------------------------------------------------------------
# evaluation: what was scored
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    loss: float
    bpb: float
    tokens: int
    bytes: int


class Tally:
    """Sums over scored targets. Every position is written once; close() checks that none is missing or double."""

    def __init__(self, positions: int, device: torch.device):
        self.positions = positions
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.bytes = torch.zeros((), dtype=torch.int64, device=device)
        self.hits = torch.zeros(positions, dtype=torch.int32, device=device)

    def add(self, batch: Windows, nll: Tensor, table: ByteTable) -> None:
        here = batch.scored
        self.nll += nll[here].double().sum()
        self.tokens += here.sum()
        self.bytes += table.count(batch.x[here], batch.y[here]).sum()
        where = batch.pos[here]
        self.hits.index_add_(0, where, torch.ones_like(where, dtype=torch.int32))

    def close(self, ranks: Ranks) -> Score:
        for part in (self.nll, self.tokens, self.bytes, self.hits):
            ranks.total(part)
        if not bool((self.hits == 1).all()):
            odd = int((self.hits != 1).sum())
            raise RuntimeError(f"{odd} of {self.positions} positions were not scored exactly once")
        tokens, size = int(self.tokens), int(self.bytes)
        loss = float(self.nll) / tokens
        bpb = float(self.nll) / math.log(2.0) / size
        return Score(loss, bpb, tokens, size)


# --------------------------------------------------------------------------------------------------------------
# evaluation: the frozen model and the vectors of a batch
# --------------------------------------------------------------------------------------------------------------


class Vectors:
    """A shift of the last hidden state and a shift of the logits for each window of one batch, with their AdamW.

    AdamW works element by element and no gradient norm is taken over the batch, so rows never hear of each other.
    """

    def __init__(self, rows: int, cfg: Settings, device: torch.device):
        self.delta = torch.zeros(rows, 1, cfg.model_dim, device=device, requires_grad=True)
        self.bias = torch.zeros(rows, 1, cfg.vocab_size, device=device, requires_grad=True)
        self.opt = torch.optim.AdamW(
            [{"params": [self.delta], "lr": cfg.slot_lr}, {"params": [self.bias], "lr": cfg.slot_bias_lr}],
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=cfg.slot_wd,
        )
        self.tops = [cfg.slot_lr, cfg.slot_bias_lr]
        self.floor = cfg.slot_lr_end / cfg.slot_lr

    def anneal(self, step: int, steps: int) -> None:
        """Cosine from the top rates to their floor."""
        part = step / max(steps - 1, 1)
        factor = self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * part))
        for group, top in zip(self.opt.param_groups, self.tops):
            group["lr"] = top * factor

    def move(self) -> None:
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)


class Scorer:
    """The model as the evaluation uses it: hidden states once, then only the head."""

    def __init__(self, model: GPT, cfg: Settings):
        self.model = model
        self.cfg = cfg
        self._hidden = torch.compile(model.hidden, dynamic=False, fullgraph=True)
        self._objective = torch.compile(self._fit_loss, dynamic=False)
        self._losses = torch.compile(self._token_losses, dynamic=False)

    def logits(self, h: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
        return self.model.head(h + delta.to(h.dtype)) + bias

    def _fit_loss(self, h: Tensor, y: Tensor, weight: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
        """Each window's mean over its own weighted positions; summed, so that no window scales another's gradient."""
        logits = self.logits(h, delta, bias)
        nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        per_window = (nll * weight).sum(1) / weight.sum(1).clamp_min(1.0)
        return per_window.sum()

    def _token_losses(self, h: Tensor, y: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
        logits = self.logits(h, delta, bias)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)

    @torch.no_grad()
    def hidden(self, batch: Windows) -> Tensor:
        return self._hidden(batch.x)

    def fit(self, h: Tensor, batch: Windows, steps: int) -> Vectors:
        """Fresh vectors for this batch, fitted on batch.fit."""
        vectors = Vectors(batch.rows, self.cfg, h.device)
        for step in range(steps):
            vectors.anneal(step, steps)
            loss = self._objective(h, batch.y, batch.fit, vectors.delta, vectors.bias)
            loss.backward()
            vectors.move()
        return vectors

    @torch.no_grad()
    def losses(self, h: Tensor, batch: Windows, vectors: Vectors) -> Tensor:
        return self._losses(h, batch.y, vectors.delta, vectors.bias)


# --------------------------------------------------------------------------------------------------------------
# evaluation: a whole split
# --------------------------------------------------------------------------------------------------------------


def batches_of(plan: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for lo in range(0, len(plan), size):
        yield plan[lo : lo + size]


def score_split(
    scorer: Scorer,
    tokens: Tensor,
    table: ByteTable,
    cfg: Settings,
    ranks: Ranks,
    stride: int,
    steps: int,
    log: Log | None = None,
) -> Score:
    """One pass over all positions of a split, left to right on every rank."""
    positions = tokens.numel() - 1
    plan = my_share(plan_windows(positions, cfg.eval_seq_len, stride), ranks)
    tally = Tally(positions, tokens.device)
    began = time.perf_counter()
    late = 0
    for number, rows in enumerate(batches_of(plan, cfg.eval_batch)):
        batch = cut_windows(tokens, rows, cfg)
        in_time = time.perf_counter() - began < cfg.slot_seconds
        late += 0 if in_time else 1
        h = scorer.hidden(batch)
        vectors = scorer.fit(h, batch, steps if in_time else 0)
        nll = scorer.losses(h, batch, vectors)
        tally.add(batch, nll, table)
        if log is not None and number % 500 == 0:
            log(f"eval:{number * cfg.eval_batch}/{len(plan)} windows of rank 0, {time.perf_counter() - began:.1f}s")
    if log is not None and late:
        log(f"eval: {late} batches of rank 0 came after {cfg.slot_seconds:.0f}s and had no vectors")
    return tally.close(ranks)


def check_isolation(scorer: Scorer, cfg: Settings, ranks: Ranks, log: Log) -> None:
    """SELF_CHECK=1. On random tokens: does a window's vectors depend on its own block, or on its neighbours?

    Changes the targets of the scored block of row 3 and looks whether any vector of the batch moves.
    """
    dice = torch.Generator(device=ranks.device)
    dice.manual_seed(5)
    fake = torch.randint(3, cfg.vocab_size, (8 * cfg.eval_seq_len,), generator=dice, device=ranks.device)
    plan = plan_windows(fake.numel() - 1, cfg.eval_seq_len, cfg.eval_stride)
    far = cfg.eval_seq_len // cfg.eval_stride + 5
    stride = max(len(plan) // cfg.eval_batch, 1)
    batch = cut_windows(fake, plan[far::stride][: cfg.eval_batch], cfg)
    h = scorer.hidden(batch)
    before = scorer.fit(h, batch, cfg.slot_steps)
    other = batch.y.clone()
    other[3] = torch.where(batch.scored[3], (other[3] + 1) % cfg.vocab_size, other[3])
    twin = Windows(batch.x, other, batch.pos, batch.scored, batch.fit)
    after = scorer.fit(h, twin, cfg.slot_steps)
    moved = max(
        (before.delta - after.delta).abs().max().item(),
        (before.bias - after.bias).abs().max().item(),
    )
    log(f"self_check: largest move of a vector {moved:.3e}")


# --------------------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def fast_math() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 32


def greet(log: Log, cfg: Settings, ranks: Ranks) -> None:
    log(Path(__file__).read_text(encoding="utf-8"), screen=False)
    log("=" * 100, screen=False)
    log(f"Python {sys.version.split()[0]} on {platform.node()}, PyTorch {torch.__version__}", screen=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, screen=False)
    log(f"world_size:{ranks.world} accum:{8 // ranks.world} seed:{cfg.seed}")
    for key, value in sorted(cfg.as_dict().items()):
        log(f"  {key} = {value}", screen=False)


def describe(model: GPT, log: Log) -> None:
    sizes: dict[str, int] = {}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + p.numel()
    log(f"model_params:{sum(sizes.values())} layers in order:{model.path}")
    log("  " + " ".join(f"{part}:{count}" for part, count in sorted(sizes.items())))


def build(cfg: Settings, ranks: Ranks, log: Log, tokens: Tensor, table: ByteTable) -> None:
    """From nothing to the artifact's file. tokens: the validation split, for the lines val_loss of the log."""
    clock = Clock()
    model = GPT(cfg).to(ranks.device)
    describe(model, log)
    if ranks.many:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)
    watcher = Scorer(model, cfg)

    def watch_loss() -> Score:
        return score_split(watcher, tokens, table, cfg, ranks, cfg.eval_seq_len, 0)

    averages = train(model, cfg, ranks, log, clock, watch_loss)
    averages.put(cfg.weight_avg)
    log(f"weights: {cfg.weight_avg}, tail mean has {averages.taken}")
    write_artifact(model, cfg, ranks, log, clock)


def evaluate(cfg: Settings, ranks: Ranks, log: Log, tokens: Tensor, table: ByteTable) -> Score:
    """Reads the artifact back and scores the validation split with it, once."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    parts = unpack(Path(cfg.artifact_path).read_bytes())
    model = model_from(parts, cfg, ranks.device)
    model.requires_grad_(False)
    scorer = Scorer(model, cfg)
    score = score_split(scorer, tokens, table, cfg, ranks, cfg.eval_stride, cfg.slot_steps, log)
    torch.cuda.synchronize()
    spent = time.perf_counter() - began
    log(f"final_slot val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} stride:{cfg.eval_stride} "
        f"eval_time:{1000 * spent:.0f}ms of {1000 * cfg.eval_seconds:.0f}ms")
    log(f"final_slot_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    log(f"scored tokens:{score.tokens} bytes:{score.bytes} bytes_per_token:{score.bytes / score.tokens:.4f}")
    if cfg.self_check:
        check_isolation(scorer, cfg, ranks, log)
    if spent > cfg.eval_seconds:
        log("the evaluation took longer than it may")
    return score


def main() -> None:
    cfg = Settings()
    ranks = join_ranks()
    seed_all(cfg.seed)
    fast_math()
    log = Log(ranks, cfg.log_dir, cfg.run_id)
    greet(log, cfg, ranks)

    table = ByteTable(cfg.tokenizer_path, cfg.vocab_size, ranks.device)
    tokens = load_split(cfg.val_files).to(ranks.device)
    documents = int((tokens == BOS_ID).sum())
    log(f"val: {cfg.val_files} tokens:{tokens.numel()} documents:{documents}")
    log(f"train: {cfg.train_files} shards:{len(list_shards(cfg.train_files))}")

    build(cfg, ranks, log, tokens, table)
    torch.cuda.empty_cache()
    check_size(cfg, log)
    evaluate(cfg, ranks, log, tokens, table)
    ranks.wait()
    if ranks.many:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
