"""mingulay: selective-scan / banded-attention hybrid with ternary and int6 weights.

Nine of the twelve mixers are selective scans (a scalar decay per head, SSD form), three are grouped-query attention over a
band of 1,024 tokens. MLPs and scan inputs are trained to ternary weights, the other matrices to six bits. At evaluation every
rank walks one contiguous stretch of the validation stream block by block: the scan states and the keys and values of the band
are carried from block to block, so each token is predicted once with its whole past. After a block is scored, gains and
biases (one flat vector) take an Adam step on it, and a bigram memo takes its counts.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import lzma
import math
import operator
import os
import platform
import random
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------ settings


def env(name: str, default: Any) -> Any:
    raw = os.environ.get(name)
    if raw is None:
        return default
    match default:
        case bool():
            return raw.strip().lower() not in ("", "0", "false", "no")
        case int():
            return int(raw)
        case float():
            return float(raw)
        case Path():
            return Path(raw)
        case tuple():
            return tuple(type(default[0])(part) for part in raw.split(",") if part)
        case _:
            return raw


class Conf:
    # run
    run_id = env("RUN_ID", "mingulay")
    seed = env("SEED", 1337)
    out_dir = env("OUT_DIR", Path("."))
    log_dir = env("LOG_DIR", Path("logs"))
    artefact = env("ARTEFACT", "mingulay.tern.xz")
    size_limit = env("SIZE_LIMIT", 16_000_000)

    # data
    data_dir = env("DATA_PATH", Path("./data/datasets/fineweb10B_sp1024"))
    spm_path = env("TOKENIZER_PATH", Path("./data/tokenizers/fineweb_1024_bpe.model"))
    vocab = env("VOCAB_SIZE", 1024)
    bos = env("BOS_ID", 1)

    # model
    layers = env("NUM_LAYERS", 12)
    band_layers = env("BAND_LAYERS", (3, 7, 11))
    dim = env("MODEL_DIM", 512)
    heads = env("NUM_HEADS", 8)
    kv_heads = env("NUM_KV_HEADS", 4)
    band = env("BAND", 1024)
    rope_base = env("ROPE_BASE", 10000.0)
    rope_dims = env("ROPE_DIMS", 32)
    scan_heads = env("SCAN_HEADS", 16)
    scan_expand = env("SCAN_EXPAND", 2)
    scan_state = env("SCAN_STATE", 64)
    scan_conv = env("SCAN_CONV", 4)
    scan_chunk = env("SCAN_CHUNK", 128)
    mlp_mult = env("MLP_MULT", 4)
    softcap = env("LOGIT_SOFTCAP", 30.0)
    embed_std = env("EMBED_STD", 0.006)

    # training
    steps = env("ITERATIONS", 20000)
    cap_s = env("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve_s = env("RESERVE_SECONDS", 22.0)
    solve_s = env("SOLVE_SECONDS", 9.0)
    batch_tokens = env("TRAIN_BATCH_TOKENS", 524288)
    seq = env("TRAIN_SEQ_LEN", 2048)
    micro_rows = env("MICRO_ROWS", 32)
    warm_steps = env("WARM_STEPS", 6)
    lr_matrix = env("MATRIX_LR", 0.022)
    lr_embed = env("EMBED_LR", 0.035)
    lr_small = env("SMALL_LR", 0.02)
    muon_momentum = env("MUON_MOMENTUM", 0.96)
    muon_start = env("MUON_MOMENTUM_START", 0.88)
    muon_ramp = env("MUON_RAMP_STEPS", 900)
    muon_rounds = env("MUON_ROUNDS", 5)
    decay_matrix = env("MATRIX_WD", 0.05)
    beta1 = env("BETA1", 0.9)
    beta2 = env("BETA2", 0.95)
    clip = env("GRAD_CLIP", 0.4)
    cool_from = env("COOL_FROM", 0.42)
    qat_from = env("QAT_FROM", 0.30)
    ema_decays = env("EMA_DECAYS", (0.9965, 0.9985))
    ema_every = env("EMA_EVERY", 2)
    log_every = env("LOG_EVERY", 250)
    peek_every = env("PEEK_EVERY", 0)

    # weights to bits
    group = env("TERNARY_GROUP", 128)
    calib_rows = env("CALIB_ROWS", 8)
    calib_batches = env("CALIB_BATCHES", 10)
    damp = env("GPTQ_DAMP", 0.01)
    gptq_block = env("GPTQ_BLOCK", 128)

    # evaluation
    block = env("EVAL_BLOCK", 4096)
    lead = env("EVAL_LEAD", 4096)
    eval_limit_s = env("EVAL_LIMIT_S", 560.0)
    adapt = env("ADAPT", True)
    adapt_lr = env("ADAPT_LR", 0.0012)
    adapt_rounds = env("ADAPT_ROUNDS", 1)
    adapt_beta1 = env("ADAPT_BETA1", 0.9)
    adapt_beta2 = env("ADAPT_BETA2", 0.98)
    adapt_pull = env("ADAPT_PULL", 0.002)
    memo = env("MEMO", True)
    memo_weight = env("MEMO_WEIGHT", 0.06)
    memo_half = env("MEMO_HALF", 40.0)
    memo_alpha = env("MEMO_ALPHA", 0.02)


# ------------------------------------------------------------------ stages, ranks, log


STAGES: dict[str, Callable[[Run], None]] = {}
PLAN = ("seed", "tables", "data", "build", "warm", "train", "average", "calibrate", "pack", "reload", "fixed", "carried")


def stage(name: str) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    def enrol(fn: Callable[[Run], None]) -> Callable[[Run], None]:
        if name in STAGES:
            raise KeyError(f"stage {name} stands twice")
        STAGES[name] = fn
        return fn

    return enrol


class Ranks(NamedTuple):
    rank: int
    local: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> Ranks:
        rank, local, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        if world > 1 or "RANK" in os.environ:
            dist.init_process_group("nccl", device_id=device)
        return cls(rank, local, world, device)

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def total(self, t: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def any(self, flag: bool) -> bool:
        t = torch.tensor([int(flag)], device=self.device)
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def wait(self) -> None:
        torch.cuda.synchronize()
        if self.world > 1:
            dist.barrier()

    def share(self, n: int) -> range:
        """This rank's contiguous part of 0..n-1; the parts of all ranks tile it."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)


class Clock:
    """Seconds since it was started, all work on the device included."""

    def __init__(self, limit: float):
        self.limit = limit
        self.t0 = time.perf_counter()

    def start(self) -> Clock:
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()
        return self

    def spent(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.t0

    def left(self) -> float:
        return self.limit - self.spent()

    def fraction(self, reserve: float = 0.0) -> float:
        return self.spent() / max(self.limit - reserve, 1e-6)


# ------------------------------------------------------------------ metrics


class Tally(NamedTuple):
    """Sums over scored tokens; tallies add up."""

    nats: float = 0.0
    octets: float = 0.0
    tokens: int = 0

    def __add__(self, other: Tally) -> Tally:  # type: ignore[override]
        return Tally(*map(operator.add, tuple(self), tuple(other)))

    @classmethod
    def of(cls, nll: Tensor, octets: Tensor) -> Tally:
        return cls(nll.double().sum().item(), octets.double().sum().item(), nll.numel())

    @classmethod
    def gather(cls, parts: Iterable[Tally], ranks: Ranks) -> Tally:
        own = functools.reduce(operator.add, parts, cls())
        t = ranks.total(torch.tensor([own.nats, own.octets, float(own.tokens)], dtype=torch.float64, device=ranks.device))
        nats, octets, tokens = t.tolist()
        return cls(nats, octets, int(round(tokens)))

    @property
    def loss(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2.0) / max(self.octets, 1.0)


class Sizes(NamedTuple):
    code: int
    model: int

    @property
    def total(self) -> int:
        return self.code + self.model


# ------------------------------------------------------------------ tokenizer tables


class Sheet(NamedTuple):
    """Per token: its bytes without a leading space, whether it opens with one, whether it is no text at all."""

    width: Tensor
    spaced: Tensor
    mute: Tensor

    def octets(self, before: Tensor, token: Tensor) -> Tensor:
        """UTF-8 bytes of each token in the original text; a leading space is no byte after a control token."""
        return self.width[token] + (self.spaced[token] & ~self.mute[before]).to(self.width.dtype)

    def to(self, device: torch.device) -> Sheet:
        return Sheet(*(t.to(device) for t in self))


MARK = "\u2581"


def piece_row(sp: spm.SentencePieceProcessor, i: int) -> tuple[int, bool, bool]:
    match (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i), sp.is_byte(i)):
        case (True, _):
            return 0, False, True
        case (False, True):
            return 1, False, False
        case _:
            piece = sp.id_to_piece(i)
            spaced = piece.startswith(MARK)
            return len(piece.removeprefix(MARK).encode("utf-8")), spaced, False


def make_sheet(path: Path, vocab: int) -> Sheet:
    sp = spm.SentencePieceProcessor(model_file=str(path))
    size = int(sp.vocab_size())
    rows = [piece_row(sp, i) for i in range(size)] + [(0, False, True)] * max(vocab - size, 0)
    width, spaced, mute = zip(*rows)
    return Sheet(torch.tensor(width, dtype=torch.int32), torch.tensor(spaced), torch.tensor(mute))


# ------------------------------------------------------------------ shards


MAGIC, VERSION, HEAD_INTS = 20240520, 1, 256


def read_shard(path: Path) -> Tensor:
    head = np.fromfile(path, dtype="<i4", count=HEAD_INTS)
    if head.size != HEAD_INTS or head[0] != MAGIC or head[1] != VERSION:
        raise ValueError(f"{path} is no token shard")
    body = np.fromfile(path, dtype="<u2", count=int(head[2]), offset=4 * HEAD_INTS)
    if body.size != int(head[2]):
        raise ValueError(f"{path} is cut short")
    return torch.from_numpy(body.astype(np.int32))


def shard_paths(folder: Path, split: str) -> list[Path]:
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise FileNotFoundError(f"no {split} shards in {folder}")
    return paths


class Feed:
    """An endless walk over shards; every rank reads its own part of each step's tokens."""

    def __init__(self, paths: list[Path], ranks: Ranks, seed: int = 0):
        order = list(paths)
        random.Random(seed).shuffle(order)
        self.source: Iterator[Path] = itertools.cycle(order)
        self.ranks = ranks
        self.tokens = torch.empty(0, dtype=torch.int32)
        self.at = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        while n > 0:
            if self.at >= self.tokens.numel():
                self.tokens, self.at = read_shard(next(self.source)), 0
            part = self.tokens[self.at : self.at + n]
            parts.append(part)
            self.at += part.numel()
            n -= part.numel()
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def rows(self, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of this rank, each rows x seq."""
        span = rows * seq + 1
        world = self.take(span * self.ranks.world)
        own = world[span * self.ranks.rank : span * (self.ranks.rank + 1)].long().pin_memory()
        own = own.to(self.ranks.device, non_blocking=True)
        return own[:-1].view(rows, seq), own[1:].view(rows, seq)


def read_all(paths: list[Path]) -> Tensor:
    return torch.cat([read_shard(p) for p in paths])


def doc_ids(ids: Tensor, bos: int) -> Tensor:
    """The number of the document that each token belongs to, counted along the last axis."""
    return (ids == bos).to(torch.int32).cumsum(-1, dtype=torch.int32)


# ------------------------------------------------------------------ grids of weights


TERNARY, SIX, EIGHT, RAW = "ternary", "six", "eight", "raw"


def grade_of(name: str, t: Tensor) -> str:
    """How many bits a tensor of the model gets."""
    match (t.ndim, name.split(".")):
        case (2, ["embed", *_]):
            return EIGHT
        case (2, [*_, "mlp", ("up" | "down"), "weight"]):
            return TERNARY
        case (2, [*_, "mix", "inp", "weight"]):
            return TERNARY
        case (2, [*_, "weight"]):
            return SIX
        case _:
            return RAW


def ternary_grid(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(levels in -1, 0, 1; one scale for each group of a row)."""
    parts = w.float().unflatten(-1, (-1, group))
    scale = parts.abs().mean(-1, keepdim=True).clamp_min(1e-8)
    return (parts / scale).round().clamp(-1, 1).flatten(-2), scale.squeeze(-1)


def row_grid(w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(whole levels in -top..top; one scale for each row)."""
    scale = w.float().abs().amax(-1, keepdim=True).clamp_min(1e-8) / top
    return (w.float() / scale).round().clamp(-top, top), scale.squeeze(-1)


def on_grid(w: Tensor, grade: str, group: int) -> Tensor:
    match grade:
        case "ternary":
            levels, scale = ternary_grid(w, group)
            return (levels.unflatten(-1, (-1, group)) * scale.unsqueeze(-1)).flatten(-2)
        case "six" | "eight":
            levels, scale = row_grid(w, 31 if grade == SIX else 127)
            return levels * scale.unsqueeze(-1)
        case _:
            return w


class Mode:
    qat = False


class GridLinear(nn.Linear):
    """A linear layer that sees its weights on their grid while Mode.qat is set (straight-through gradients)."""

    def __init__(self, n_in: int, n_out: int, bias: bool, grade: str, group: int):
        super().__init__(n_in, n_out, bias=bias)
        self.grade, self.group = grade, group

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if Mode.qat:
            w = w + (on_grid(w, self.grade, self.group) - w).detach()
        return F.linear(x, w.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


# ------------------------------------------------------------------ model


class ScanState(NamedTuple):
    tail: Tensor  # the last inputs of the convolution
    tail_doc: Tensor
    h: Tensor

    def cut(self) -> ScanState:
        return ScanState(*(t.detach() for t in self))


class BandState(NamedTuple):
    k: Tensor
    v: Tensor
    doc: Tensor

    def cut(self) -> BandState:
        return BandState(*(t.detach() for t in self))


Carry = tuple[ScanState | BandState, ...]


class Gain(nn.Module):
    """RMS norm with a gain, and a bias that starts at nought."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),)) * self.weight.to(x.dtype) + self.bias.to(x.dtype)


def ssd(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, h: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Selective scan in chunks. x: B T H P (times its step), log_a: B T H, b and c: B T N, h: B H P N before the first token.

    h_t = exp(log_a_t) h_{t-1} + x_t b_t^T and y_t = h_t c_t. Returns (y, h after the last token).
    """
    length = x.size(1)
    if pad := -length % chunk:
        x, log_a = F.pad(x, (0, 0, 0, 0, 0, pad)), F.pad(log_a, (0, 0, 0, pad))
        b, c = F.pad(b, (0, 0, 0, pad)), F.pad(c, (0, 0, 0, pad))
    x, log_a, b, c = (t.unflatten(1, (-1, chunk)) for t in (x, log_a, b, c))
    cum = log_a.float().cumsum(2)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    out = []
    for i in range(x.size(1)):
        xi, bi, ci, ai = x[:, i], b[:, i], c[:, i], cum[:, i]
        gap = (ai.unsqueeze(2) - ai.unsqueeze(1)).masked_fill(~lower[None, :, :, None], float("-inf"))
        mixed = torch.einsum("bin,bjn->bij", ci, bi).unsqueeze(-1) * gap.exp().to(x.dtype)
        inside = torch.einsum("bijh,bjhp->bihp", mixed, xi)
        before = torch.einsum("bin,bhpn->bihp", ci, h.to(x.dtype)) * ai.exp().unsqueeze(-1).to(x.dtype)
        out.append(inside + before)
        rest = (ai[:, -1:] - ai).exp()
        fresh = torch.einsum("bjhp,bjn->bhpn", xi.float() * rest.unsqueeze(-1), bi.float())
        h = h * ai[:, -1].exp()[..., None, None] + fresh
    return torch.cat(out, 1)[:, :length], h


class ScanMixer(nn.Module):
    """Convolution over four tokens, then a selective scan with a gate. Neither reaches over the start of a document."""

    RESET = -30.0

    def __init__(self, c: type[Conf]):
        super().__init__()
        self.inner = c.dim * c.scan_expand
        self.heads, self.state, self.taps, self.chunk = c.scan_heads, c.scan_state, c.scan_conv, c.scan_chunk
        self.width = self.inner + 2 * self.state
        self.inp = GridLinear(c.dim, self.inner + self.width + self.heads, True, TERNARY, c.group)
        self.out = GridLinear(self.inner, c.dim, True, SIX, c.group)
        self.taps_w = nn.Parameter(torch.randn(self.taps, self.width) / self.taps)
        self.taps_bias = nn.Parameter(torch.zeros(self.width))
        self.log_rate = nn.Parameter(torch.linspace(math.log(0.5), math.log(16.0), self.heads))
        self.step_bias = nn.Parameter(torch.full((self.heads,), math.log(math.expm1(0.02))))
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = Gain(self.inner)

    def fresh(self, x: Tensor, docs: Tensor) -> ScanState:
        rows = x.size(0)
        tail = x.new_zeros(rows, self.taps - 1, self.width)
        h = torch.zeros(rows, self.heads, self.inner // self.heads, self.state, device=x.device)
        return ScanState(tail, docs[:, :1].expand(rows, self.taps - 1), h)

    def forward(self, x: Tensor, docs: Tensor, state: ScanState | None) -> tuple[Tensor, ScanState]:
        state = state or self.fresh(x, docs)
        gate, mixed, step = self.inp(x).split([self.inner, self.width, self.heads], -1)
        long = torch.cat([state.tail.to(mixed.dtype), mixed], 1)
        long_doc = torch.cat([state.tail_doc, docs], 1)
        length, back = x.size(1), self.taps - 1
        parts = []
        for k in range(self.taps):
            tap = long[:, back - k : back - k + length]
            same = long_doc[:, back - k : back - k + length] == docs
            parts.append(tap * same.unsqueeze(-1) * self.taps_w[k].to(tap.dtype))
        conv = F.silu(functools.reduce(operator.add, parts) + self.taps_bias.to(mixed.dtype))
        u, b, c = conv.split([self.inner, self.state, self.state], -1)
        u = u.unflatten(-1, (self.heads, -1))
        step = F.softplus(step.float() + self.step_bias)
        log_a = -step * self.log_rate.exp()
        opens = docs != long_doc[:, back - 1 : back - 1 + length]
        log_a = log_a.masked_fill(opens.unsqueeze(-1), self.RESET)
        y, h = ssd(u * step.unsqueeze(-1).to(u.dtype), log_a, b, c, state.h, self.chunk)
        y = y + u * self.skip.to(u.dtype)[:, None]
        y = self.norm(y.flatten(-2) * F.silu(gate))
        return self.out(y), ScanState(long[:, -back:], long_doc[:, -back:], h)


def rotate(x: Tensor, at: Tensor, dims: int, base: float) -> Tensor:
    freq = base ** (-torch.arange(0, dims, 2, device=x.device, dtype=torch.float32) / dims)
    angle = at.float()[:, None] * freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class BandMixer(nn.Module):
    """Grouped-query attention over the last `band` tokens of the same document."""

    def __init__(self, c: type[Conf]):
        super().__init__()
        self.heads, self.kv, self.size = c.heads, c.kv_heads, c.dim // c.heads
        self.band, self.rope_dims, self.rope_base = c.band, c.rope_dims, c.rope_base
        self.q = GridLinear(c.dim, self.heads * self.size, True, SIX, c.group)
        self.kvs = GridLinear(c.dim, 2 * self.kv * self.size, True, SIX, c.group)
        self.out = GridLinear(self.heads * self.size, c.dim, True, SIX, c.group)
        self.heat = nn.Parameter(torch.full((self.heads,), 1.5))

    def forward(self, x: Tensor, docs: Tensor, state: BandState | None) -> tuple[Tensor, BandState]:
        length = x.size(1)
        q = F.rms_norm(self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), (self.size,))
        k, v = self.kvs(x).unflatten(-1, (2 * self.kv, -1)).transpose(1, 2).chunk(2, 1)
        k, key_doc = F.rms_norm(k, (self.size,)), docs
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], 2), torch.cat([state.v.to(v.dtype), v], 2)
            key_doc = torch.cat([state.doc, docs], 1)
        old = k.size(2) - length
        at = torch.arange(k.size(2), device=x.device)
        gap = at[old:, None] - at[None, :]
        seen = ((gap >= 0) & (gap < self.band)) & (docs[:, :, None] == key_doc[:, None, :])
        q_rot = rotate(q, at[old:], self.rope_dims, self.rope_base) * self.heat.to(q.dtype)[:, None, None]
        k_rot = rotate(k, at, self.rope_dims, self.rope_base)
        y = F.scaled_dot_product_attention(q_rot, k_rot, v, attn_mask=seen.unsqueeze(1), enable_gqa=True)
        keep = max(k.size(2) - self.band, 0)
        return self.out(y.transpose(1, 2).flatten(-2)), BandState(k[:, :, keep:], v[:, :, keep:], key_doc[:, keep:])


class Mlp(nn.Module):
    def __init__(self, c: type[Conf]):
        super().__init__()
        self.up = GridLinear(c.dim, c.dim * c.mlp_mult, True, TERNARY, c.group)
        self.down = GridLinear(c.dim * c.mlp_mult, c.dim, True, TERNARY, c.group)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Layer(nn.Module):
    def __init__(self, c: type[Conf], index: int):
        super().__init__()
        self.norm_mix, self.norm_mlp = Gain(c.dim), Gain(c.dim)
        self.mix = BandMixer(c) if index in c.band_layers else ScanMixer(c)
        self.mlp = Mlp(c)
        self.scale_mix = nn.Parameter(torch.full((c.dim,), 1.0 / math.sqrt(2 * index + 2)))
        self.scale_mlp = nn.Parameter(torch.full((c.dim,), 1.0 / math.sqrt(2 * index + 2)))

    def forward(self, x: Tensor, docs: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mix(self.norm_mix(x), docs, state)
        x = x + self.scale_mix.to(x.dtype) * y
        return x + self.scale_mlp.to(x.dtype) * self.mlp(self.norm_mlp(x)), state


class Hybrid(nn.Module):
    def __init__(self, c: type[Conf]):
        super().__init__()
        self.softcap = c.softcap
        self.embed = nn.Embedding(c.vocab, c.dim)
        self.stack = nn.ModuleList(Layer(c, i) for i in range(c.layers))
        self.norm_in, self.norm_out = Gain(c.dim), Gain(c.dim)
        self.logit_bias = nn.Parameter(torch.zeros(c.vocab))
        nn.init.normal_(self.embed.weight, std=c.embed_std)
        for name, p in self.named_parameters():
            match (p.ndim, name.split(".")):
                case (2, [*_, ("out" | "down"), "weight"]):
                    nn.init.zeros_(p)
                case (2, [*_, ("inp" | "up" | "q" | "kvs"), "weight"]):
                    nn.init.orthogonal_(p)
                case (1, [*_, "bias"]):
                    nn.init.zeros_(p)

    def forward(self, ids: Tensor, docs: Tensor, carry: Carry | None = None) -> tuple[Tensor, Carry]:
        table = self.embed.weight
        if Mode.qat:
            table = table + (on_grid(table, EIGHT, 0) - table).detach()
        x = self.norm_in(F.embedding(ids, table).bfloat16())
        after = []
        for layer, state in zip(self.stack, carry or itertools.repeat(None)):
            x, state = layer(x, docs, state)
            after.append(state)
        logits = F.linear(self.norm_out(x), table.bfloat16()).float() + self.logit_bias
        return self.softcap * torch.tanh(logits / self.softcap), tuple(after)

    def loss(self, ids: Tensor, docs: Tensor, targets: Tensor) -> Tensor:
        logits, _ = self(ids, docs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ------------------------------------------------------------------ optimisers


def orthogonal(g: Tensor, rounds: int) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    flip = x.size(-2) > x.size(-1)
    x = x.mT if flip else x
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        y = x @ x.mT
        x = a * x + (b * y + c * y @ y) @ x
    return x.mT if flip else x


class Muon:
    """Momentum, then orthogonalised steps; the matrices are dealt out to the ranks, the steps summed up again."""

    def __init__(self, params: list[nn.Parameter], lr: float, decay: float, rounds: int, ranks: Ranks):
        self.params, self.lr, self.decay, self.rounds, self.ranks = params, lr, decay, rounds, ranks
        self.velocity = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, scale: float, momentum: float) -> None:
        steps = torch.zeros(sum(p.numel() for p in self.params), dtype=torch.bfloat16, device=self.ranks.device)
        views = steps.split([p.numel() for p in self.params])
        for i, (p, v, view) in enumerate(zip(self.params, self.velocity, views)):
            if p.grad is None or i % self.ranks.world != self.ranks.rank:
                continue
            v.mul_(momentum).add_(p.grad)
            view.copy_(orthogonal(p.grad.add(v, alpha=momentum), self.rounds).flatten())
        self.ranks.total(steps)
        lr = self.lr * scale
        for p, view in zip(self.params, views):
            shape = max(1.0, p.size(0) / p.size(1)) ** 0.5
            p.mul_(1.0 - lr * self.decay).add_(view.view_as(p).to(p.dtype), alpha=-lr * shape)


class Trainer:
    """The three optimisers of the model and their common schedule."""

    def __init__(self, model: Hybrid, c: type[Conf], ranks: Ranks):
        self.c, self.ranks, self.model = c, ranks, model
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and grade_of(n, p) in (TERNARY, SIX) and min(p.shape) > 8]
        chosen = {id(p) for p in matrices} | {id(model.embed.weight)}
        small = [p for _, p in named if id(p) not in chosen]
        self.muon = Muon(matrices, c.lr_matrix, c.decay_matrix, c.muon_rounds, ranks)
        betas = (c.beta1, c.beta2)
        self.adam = torch.optim.AdamW(
            [dict(params=[model.embed.weight], lr=c.lr_embed), dict(params=small, lr=c.lr_small)],
            betas=betas, eps=1e-9, weight_decay=0.0, fused=True,
        )  # fmt: skip
        self.base = [g["lr"] for g in self.adam.param_groups]

    def sync(self, micro: int) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        self.ranks.total(flat).div_(self.ranks.world * micro)
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))

    def step(self, number: int, scale: float) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.c.clip)
        ramp = min(number / max(self.c.muon_ramp, 1), 1.0)
        momentum = (1 - ramp) * self.c.muon_start + ramp * self.c.muon_momentum
        for group, lr in zip(self.adam.param_groups, self.base):
            group["lr"] = lr * scale
        self.adam.step()
        self.muon.step(scale, momentum)
        self.model.zero_grad(set_to_none=True)


class Average:
    """An exponential average of the weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {n: p.detach().float().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        live = [p.detach().float() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1.0 - self.decay)

    @torch.no_grad()
    def put(self, model: nn.Module) -> None:
        for n, p in model.named_parameters():
            p.copy_(self.shadow[n].to(p.dtype))


# ------------------------------------------------------------------ the run


@dataclass
class Run:
    """What the stages hand on to each other."""

    c: type[Conf]
    ranks: Ranks
    clock: Clock
    log_path: Path
    model: Any = None
    trainer: Any = None
    loss_of: Any = None
    sheet: Any = None
    feed: Any = None
    probe: Any = None
    valid: Any = None
    averages: list[Average] = field(default_factory=list)
    solved: dict[str, tuple[str, Tensor, Tensor]] = field(default_factory=dict)
    results: dict[str, Tally] = field(default_factory=dict)
    eval_clock: Any = None

    def say(self, text: str) -> None:
        if self.ranks.chief:
            print(text, flush=True)
            with self.log_path.open("a", encoding="utf-8") as file:
                print(text, file=file)


@stage("seed")
def seed_all(run: Run) -> None:
    for seeder in (random.seed, np.random.seed, torch.manual_seed, torch.cuda.manual_seed_all):
        seeder(run.c.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    run.say(f"python:{platform.python_version()} torch:{torch.__version__} world_size:{run.ranks.world} seed:{run.c.seed}")
    settings = {k: v for k, v in vars(run.c).items() if not k.startswith("_")}
    run.say("settings:" + json.dumps(settings, default=str))


@stage("tables")
def load_tables(run: Run) -> None:
    run.sheet = make_sheet(run.c.spm_path, run.c.vocab).to(run.ranks.device)


@stage("data")
def open_data(run: Run) -> None:
    """The last train shard is kept from training: averages are chosen and grids are calibrated on it."""
    paths = shard_paths(run.c.data_dir, "train")
    if len(paths) < 2:
        raise ValueError("two train shards are needed: one of them is held out")
    run.feed = Feed(paths[:-1], run.ranks, run.c.seed)
    run.probe = Feed(paths[-1:], run.ranks)
    run.say(f"train_shards:{len(paths) - 1} held_out:{paths[-1].name}")


@stage("build")
def build_model(run: Run) -> None:
    run.model = Hybrid(run.c).to(run.ranks.device)
    run.trainer = Trainer(run.model, run.c, run.ranks)
    run.say(f"model_params:{sum(p.numel() for p in run.model.parameters())}")


def micro_steps(run: Run) -> int:
    return max(run.c.batch_tokens // (run.c.micro_rows * run.c.seq * run.ranks.world), 1)


def backward_batch(run: Run, loss_of: Callable[..., Tensor], feed: Any, micro: int) -> Tensor:
    """Gradients of one batch, summed over the ranks; returns this rank's mean loss."""
    losses = []
    for _ in range(micro):
        ids, targets = feed.rows(run.c.micro_rows, run.c.seq)
        loss = loss_of(ids, doc_ids(ids, run.c.bos), targets)
        loss.backward()
        losses.append(loss.detach())
    run.trainer.sync(micro)
    return torch.stack(losses).mean()


class Noise:
    """Random tokens in the shape of a batch, to compile with."""

    def __init__(self, c: type[Conf], device: torch.device):
        self.c, self.device = c, device

    def rows(self, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(2, self.c.vocab, (rows, seq + 1), device=self.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@stage("warm")
def warm_up(run: Run) -> None:
    """Compiles both modes on random tokens, then puts everything back as it was."""
    run.loss_of = torch.compile(run.model.loss, dynamic=False)
    weights = copy.deepcopy(run.model.state_dict())
    noise = Noise(run.c, run.ranks.device)
    for i in range(run.c.warm_steps):
        Mode.qat = i % 2 == 1
        backward_batch(run, run.loss_of, noise, 1)
        run.trainer.step(i, 0.0)
    Mode.qat = False
    run.model.load_state_dict(weights)
    run.trainer = Trainer(run.model, run.c, run.ranks)
    run.averages = [Average(run.model, d) for d in run.c.ema_decays]
    run.ranks.wait()


def lr_scale(done: float, c: type[Conf]) -> float:
    """1 until `cool_from` of the time, then linearly to 2 percent."""
    return 1.0 if done < c.cool_from else 0.02 + 0.98 * max(1.0 - done, 0.0) / (1.0 - c.cool_from)


def time_is_up(run: Run, number: int) -> bool:
    """Whether training must end so that averaging and calibration still fit under the cap; the same on all ranks."""
    return number % 4 == 0 and run.ranks.any(run.clock.left() < run.c.reserve_s)


@stage("train")
def train(run: Run) -> None:
    c, micro = run.c, micro_steps(run)
    run.clock.start()
    done = 0.0
    for number in itertools.count():
        if number >= c.steps or time_is_up(run, number):
            break
        done = min(run.clock.fraction(c.reserve_s), 1.0) if number % 4 == 0 else done
        Mode.qat = run.ranks.any(done >= c.qat_from) if number % 4 == 0 else Mode.qat
        loss = backward_batch(run, run.loss_of, run.feed, micro)
        run.trainer.step(number, lr_scale(done, c))
        if number % c.ema_every == 0:
            for average in run.averages:
                average.update(run.model)
        if number % c.log_every == 0:
            run.say(f"step:{number} train_loss:{loss.item():.4f} qat:{int(Mode.qat)} train_time:{run.clock.spent():.1f}s")
        if c.peek_every and number % c.peek_every == 0:
            run.say(f"step:{number} held_out_loss:{probe_loss(run, 2):.4f}")
    run.say(f"stopped step:{number} train_time:{run.clock.spent():.1f}s")
    run.say(f"peak_memory:{torch.cuda.max_memory_allocated() >> 20} MiB")


@torch.no_grad()
def probe_loss(run: Run, batches: int) -> float:
    """Mean loss on the held-out train shard."""
    total = torch.zeros((), device=run.ranks.device)
    for _ in range(batches):
        ids, targets = run.probe.rows(run.c.micro_rows, run.c.seq)
        total += run.model.loss(ids, doc_ids(ids, run.c.bos), targets)
    return (run.ranks.total(total) / (batches * run.ranks.world)).item()


@stage("average")
def pick_average(run: Run) -> None:
    """Of the averages, the one with the least loss on the held-out train shard."""
    trials = []
    for average in run.averages:
        average.put(run.model)
        run.probe = Feed(shard_paths(run.c.data_dir, "train")[-1:], run.ranks)
        trials.append((probe_loss(run, 3), average.decay, average))
    best = min(trials, key=operator.itemgetter(0))
    best[2].put(run.model)
    run.averages.clear()
    run.say("averages:" + " ".join(f"{d}:{loss:.4f}" for loss, d, _ in trials) + f" taken:{best[1]}")


# ------------------------------------------------------------------ calibration


class Listener:
    """Sums x x^T of the inputs of every grid layer while it is open."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Tensor] = {}
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, GridLinear)}
        self.handles: list[Any] = []

    def __enter__(self) -> Listener:
        for name, layer in self.layers.items():
            self.handles.append(layer.register_forward_pre_hook(functools.partial(self.hear, name)))
        return self

    def __exit__(self, *_: object) -> None:
        while self.handles:
            self.handles.pop().remove()

    def hear(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        self.sums[name] = x.T @ x + self.sums.get(name, 0.0)


def gptq(w: Tensor, hessian: Tensor, grade: str, c: type[Conf]) -> tuple[Tensor, Tensor]:
    """Levels and scales of one matrix; each column's rounding error is passed on to the columns after it."""
    w, h = w.float().clone(), hessian.clone()
    match grade:
        case "ternary":
            _, scale = ternary_grid(w, c.group)
            top, wide = 1, scale.repeat_interleave(c.group, -1)
        case _:
            _, scale = row_grid(w, 31)
            top, wide = 31, scale.unsqueeze(-1).expand_as(w)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    h.diagonal().add_(c.damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    levels = torch.zeros_like(w)
    for lo in range(0, w.size(1), c.gptq_block):
        hi = min(lo + c.gptq_block, w.size(1))
        errors = torch.zeros_like(w[:, lo:hi])
        for j in range(lo, hi):
            levels[:, j] = (w[:, j] / wide[:, j]).round().clamp(-top, top)
            errors[:, j - lo] = (w[:, j] - levels[:, j] * wide[:, j]) / inverse[j, j]
            w[:, j:hi] -= errors[:, j - lo, None] * inverse[None, j, j:hi]
        w[:, hi:] -= errors @ inverse[lo:hi, hi:]
    return levels.to(torch.int8), scale


@stage("calibrate")
@torch.no_grad()
def calibrate(run: Run) -> None:
    """GPTQ on held-out train tokens, inside the cap: no batch is read that would leave too little time to solve."""
    c, calib = run.c, Feed(shard_paths(run.c.data_dir, "train")[-1:], run.ranks)
    Mode.qat, heard = False, 0
    with Listener(run.model) as listener:
        for _ in range(c.calib_batches):
            if run.ranks.any(run.clock.left() < c.solve_s):
                break
            ids, _ = calib.rows(c.calib_rows, c.seq)
            run.model(ids, doc_ids(ids, c.bos))
            heard += 1
    for i, (name, layer) in enumerate(listener.layers.items()):
        key = f"{name}.weight"
        total = run.ranks.total(listener.sums.pop(name)) if heard else torch.eye(layer.in_features, device=run.ranks.device)
        run.solved[key] = (layer.grade, *gptq(layer.weight, total, layer.grade, c))
    run.say(f"gptq:{heard} held-out train batches, train+gptq {run.clock.spent():.1f}s of {c.cap_s:.0f}s")


# ------------------------------------------------------------------ packing


HEAD = struct.Struct("<4sII")


def trits_to_bytes(levels: Tensor) -> bytes:
    """Five trits to a byte."""
    flat = (levels.flatten().to(torch.int16) + 1).cpu().numpy()
    flat = np.pad(flat, (0, -flat.size % 5)).reshape(-1, 5)
    return (flat * np.array([1, 3, 9, 27, 81], dtype=np.int16)).sum(1).astype(np.uint8).tobytes()


def bytes_to_trits(raw: bytes, count: int) -> Tensor:
    packed = np.frombuffer(raw, dtype=np.uint8).astype(np.int16)
    flat = (packed[:, None] // np.array([1, 3, 9, 27, 81], dtype=np.int16)) % 3
    return torch.from_numpy(flat.reshape(-1)[:count].astype(np.int8) - 1)


def half_bytes(t: Tensor) -> bytes:
    return t.detach().half().cpu().numpy().tobytes()


class Entry(NamedTuple):
    name: str
    grade: str
    shape: list[int]
    scales: int
    size: int


def encode(name: str, p: Tensor, run: Run) -> tuple[Entry, bytes]:
    """One tensor as bytes: its scales, then its levels."""
    grade = grade_of(name, p)
    match grade:
        case "ternary" | "six":
            _, levels, scale = run.solved[name]
        case "eight":
            levels, scale = row_grid(p, 127)
        case _:
            raw = half_bytes(p)
            return Entry(name, RAW, list(p.shape), 0, len(raw)), raw
    body = trits_to_bytes(levels) if grade == TERNARY else levels.to(torch.int8).cpu().numpy().tobytes()
    raw = half_bytes(scale) + body
    return Entry(name, grade, list(p.shape), scale.numel(), len(raw)), raw


def decode(entry: Entry, raw: bytes, group: int) -> Tensor:
    count = math.prod(entry.shape)
    scale = torch.from_numpy(np.frombuffer(raw, dtype=np.float16, count=entry.scales).astype(np.float32))
    body = raw[2 * entry.scales :]
    match entry.grade:
        case "ternary":
            levels = bytes_to_trits(body, count).float().view(-1, group)
            return (levels * scale[:, None]).view(entry.shape)
        case "six" | "eight":
            levels = torch.from_numpy(np.frombuffer(body, dtype=np.int8).astype(np.float32)).view(entry.shape)
            return levels * scale[:, None]
        case _:
            return torch.from_numpy(np.frombuffer(raw, dtype=np.float16).astype(np.float32)).view(entry.shape)


def squeeze(raw: bytes) -> bytes:
    filters = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, lc=0, lp=0, pb=0, dict_size=1 << 26)]
    return lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def artefact_path(c: type[Conf]) -> Path:
    return c.out_dir / c.artefact


@stage("pack")
def pack(run: Run) -> None:
    path = artefact_path(run.c)
    if run.ranks.chief:
        coded = [encode(n, p.detach(), run) for n, p in sorted(run.model.named_parameters())]
        index = json.dumps([entry for entry, _ in coded], separators=(",", ":")).encode()
        body = io.BytesIO()
        body.write(HEAD.pack(b"MGLY", len(index), len(coded)))
        body.write(index)
        for _, raw in coded:
            body.write(raw)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(squeeze(body.getvalue()))
    run.ranks.wait()
    sizes = Sizes(code_bytes(), path.stat().st_size)
    run.say(f"model_bytes:{sizes.model} code_bytes:{sizes.code} total_bytes:{sizes.total} limit:{run.c.size_limit}")
    if sizes.total > run.c.size_limit:
        raise SystemExit(f"{sizes.total} bytes are more than {run.c.size_limit}")


def unpack(path: Path, group: int) -> dict[str, Tensor]:
    raw = lzma.decompress(path.read_bytes())
    magic, length, count = HEAD.unpack_from(raw)
    if magic != b"MGLY":
        raise ValueError(f"{path} is no artefact")
    index = [Entry(*row) for row in json.loads(raw[HEAD.size : HEAD.size + length])]
    ends = itertools.accumulate((e.size for e in index), initial=HEAD.size + length)
    return {e.name: decode(e, raw[lo:hi], group) for e, (lo, hi) in zip(index[:count], itertools.pairwise(ends))}


@stage("reload")
def reload(run: Run) -> None:
    """From here on there is only what the artefact holds; the clock of the evaluation starts."""
    run.trainer = run.feed = run.probe = run.loss_of = None
    run.solved.clear()
    torch.cuda.empty_cache()
    run.eval_clock = Clock(run.c.eval_limit_s).start()
    Mode.qat = False
    run.model = Hybrid(run.c).to(run.ranks.device)
    run.model.load_state_dict(unpack(artefact_path(run.c), run.c.group))
    run.model.eval()
    run.valid = read_all(shard_paths(run.c.data_dir, "val"))
    run.say(f"val_tokens:{run.valid.numel() - 1} blocks_of:{run.c.block} lead:{run.c.lead}")


# ------------------------------------------------------------------ evaluation


class Memo:
    """Bigram counts of the tokens that this rank has scored: a distribution over the whole vocabulary for each context."""

    def __init__(self, c: type[Conf], device: torch.device):
        self.c = c
        self.counts = torch.zeros(c.vocab, c.vocab, device=device)

    def probs(self, context: Tensor) -> Tensor:
        seen = self.counts[context] + self.c.memo_alpha
        return seen / seen.sum(-1, keepdim=True)

    def weight(self, context: Tensor) -> Tensor:
        n = self.counts[context].sum(-1)
        return self.c.memo_weight * n / (n + self.c.memo_half)

    def learn(self, context: Tensor, token: Tensor) -> None:
        ones = torch.ones_like(token, dtype=self.counts.dtype)
        self.counts.view(-1).index_add_(0, context * self.c.vocab + token, ones)


class Tuner:
    """Adam over gains and biases as one flat vector; the model's parameters are views of it."""

    def __init__(self, model: Hybrid, c: type[Conf]):
        self.c = c
        self.params = [p for n, p in model.named_parameters() if self.takes(n, p)]
        self.flat = torch.cat([p.detach().flatten() for p in self.params])
        self.home = self.flat.clone()
        self.m, self.v, self.count = torch.zeros_like(self.flat), torch.zeros_like(self.flat), 0
        for p, part in zip(self.params, self.flat.split([p.numel() for p in self.params])):
            p.data = part.view_as(p)
        for p in model.parameters():
            p.requires_grad_(False)
        for p in self.params:
            p.requires_grad_(True)

    @staticmethod
    def takes(name: str, p: Tensor) -> bool:
        match (p.ndim, name.rsplit(".", 1)[-1].split("_")[-1]):
            case (1, "bias"):
                return True
            case (1, "weight"):
                return "norm" in name
            case _:
                return False

    @torch.no_grad()
    def apply(self, loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, self.params)
        g = torch.cat([t.flatten() for t in grads]).float()
        g *= (1.0 / (g.norm() + 1e-6)).clamp(max=1.0)
        self.count += 1
        self.m.lerp_(g, 1 - self.c.adapt_beta1)
        self.v.lerp_(g.square(), 1 - self.c.adapt_beta2)
        m = self.m / (1 - self.c.adapt_beta1**self.count)
        v = self.v / (1 - self.c.adapt_beta2**self.count)
        self.flat.sub_(self.c.adapt_lr * m / (v.sqrt() + 1e-8))
        self.flat.lerp_(self.home, self.c.adapt_pull)


def cut(carry: Carry) -> Carry:
    return tuple(state.cut() for state in carry)


class Piece(NamedTuple):
    """A block of the stream: inputs, the documents they belong to, targets; each 1 x length."""

    ids: Tensor
    docs: Tensor
    targets: Tensor


class Strip:
    """One rank's contiguous stretch of the stream, with a lead-in of the tokens before it."""

    def __init__(self, tokens: Tensor, c: type[Conf], ranks: Ranks):
        self.c, own = c, ranks.share(tokens.numel() - 1)
        first = max(own.start - c.lead, 0)
        self.tokens = tokens[first : own.stop + 1].to(ranks.device).long()
        self.docs = doc_ids(self.tokens, c.bos)
        self.begin, self.end = own.start - first, own.stop - first

    def piece(self, lo: int, hi: int) -> Piece:
        return Piece(*(t[None] for t in (self.tokens[lo:hi], self.docs[lo:hi], self.tokens[lo + 1 : hi + 1])))

    def spans(self, lo: int, hi: int) -> Iterator[Piece]:
        for at in range(lo, hi, self.c.block):
            yield self.piece(at, min(at + self.c.block, hi))

    def before(self) -> Iterator[Piece]:
        return self.spans(0, self.begin)

    def pieces(self) -> Iterator[Piece]:
        return self.spans(self.begin, self.end)


@torch.no_grad()
def predict(model: Hybrid, piece: Piece, carry: Carry | None, memo: Memo | None) -> tuple[Tensor, Carry]:
    """-ln p of each target of the piece, and the state after it."""
    logits, after = model(piece.ids, piece.docs, carry)
    context, token = piece.ids[0], piece.targets[0]
    if memo is None:
        return F.cross_entropy(logits[0], token, reduction="none"), after
    share = memo.weight(context)[:, None]
    mixed = (1 - share) * logits[0].softmax(-1) + share * memo.probs(context)
    return -mixed.log().gather(-1, token[:, None]).squeeze(-1), after


def adapt_on(model: Hybrid, tuner: Tuner, piece: Piece, carry: Carry | None, rounds: int) -> None:
    """Steps of the tuner on a piece that has been scored, from the state before it."""
    for _ in range(rounds):
        logits, _ = model(piece.ids, piece.docs, carry)
        tuner.apply(F.cross_entropy(logits[0], piece.targets[0]))


def walk(run: Run, tokens: Tensor, tuner: Tuner | None, memo: Memo | None) -> Iterator[Tally]:
    """Left to right over this rank's strip: score a piece, then learn from it."""
    strip, carry = Strip(tokens, run.c, run.ranks), None
    for piece in strip.before():
        _, carry = predict(run.model, piece, carry, None)
    for piece in strip.pieces():
        nll, after = predict(run.model, piece, carry, memo)
        yield Tally.of(nll, run.sheet.octets(piece.ids[0], piece.targets[0]))
        if tuner is not None and run.eval_clock.left() > 0:
            adapt_on(run.model, tuner, piece, carry, run.c.adapt_rounds)
        if memo is not None:
            memo.learn(piece.ids[0], piece.targets[0])
        carry = cut(after)


def settle(run: Run, name: str, parts: Iterable[Tally]) -> Tally:
    """Adds up all ranks' tallies, checks that every token is in them once, and notes the result."""
    began = run.eval_clock.spent()
    tally = Tally.gather(parts, run.ranks)
    if tally.tokens != run.valid.numel() - 1:
        raise RuntimeError(f"{name}: {tally.tokens} tokens scored of {run.valid.numel() - 1}")
    run.results[name] = tally
    run.say(
        f"{name} val_loss:{tally.loss:.4f} val_bpb:{tally.bpb:.4f} tokens:{tally.tokens} "
        f"bytes:{tally.octets:.0f} eval_time:{run.eval_clock.spent() - began:.1f}s"
    )
    return tally


@stage("fixed")
def score_fixed(run: Run) -> None:
    """The artefact as it is, without adaptation and memo: the round trip's figure."""
    settle(run, "roundtrip", walk(run, run.valid, None, None))


@stage("carried")
def score_carried(run: Run) -> None:
    """The score: carried states, adaptation after scoring, memo."""
    c = run.c
    tuner = Tuner(run.model, c) if c.adapt else None
    memo = Memo(c, run.ranks.device) if c.memo else None
    tally = settle(run, "carried", walk(run, run.valid, tuner, memo))
    run.say(f"final_carried_exact val_loss:{tally.loss:.8f} val_bpb:{tally.bpb:.8f}")
    run.say(f"evaluation took {run.eval_clock.spent():.1f}s")


# ------------------------------------------------------------------ main


def main() -> None:
    c = Conf
    ranks = Ranks.join()
    c.log_dir.mkdir(parents=True, exist_ok=True)
    run = Run(c, ranks, Clock(c.cap_s), c.log_dir / f"{c.run_id}.txt")
    if ranks.chief:
        run.log_path.write_text(Path(__file__).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    try:
        for name in PLAN:
            STAGES[name](run)
            ranks.wait()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
