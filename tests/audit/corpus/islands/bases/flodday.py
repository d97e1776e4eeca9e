"""flodday: gated linear recurrences with a few attention blocks, int6 rows, arithmetic-coded, adapted chunk by chunk.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

One run does everything: it trains until the clock says so, averages the last checkpoints, quantises with Hessians taken
from training batches (inside the 600 s), packs, reads the pack back and scores the whole validation split once. While it
scores, norm gains and biases are tuned on chunks whose loss is already booked.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import glob
import io
import json
import math
import os
import random
import struct
import sys
import time
import uuid
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Everything that can be turned, one environment variable (the upper-case name) each."""

    # data
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    vocab_size: int = 1024
    run_id: str = ""
    seed: int = 1337
    # the clock
    train_seconds: float = 600.0
    pack_reserve_seconds: float = 62.0
    eval_seconds: float = 600.0
    adapt_until_seconds: float = 430.0
    max_steps: int = 20000
    prime_steps: int = 8
    peek_every: int = 2000
    peek_tokens: int = 2097152
    log_every: int = 250
    # batches
    train_seq_len: int = 2048
    train_batch_tokens: int = 524288
    # model
    layers: int = 9
    dim: int = 512
    inner: int = 640
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 1408
    attention_at: str = "3,6,8"
    conv_width: int = 4
    rope_base: float = 10000.0
    logit_cap: float = 30.0
    # optimisers, with schedules by time
    matrix_lr: float = 0.028
    embed_lr: float = 0.035
    small_lr: float = 0.02
    momentum_from: float = 0.85
    momentum_to: float = 0.95
    momentum_until: float = 0.12
    weight_decay: float = 0.04
    ramp_until: float = 0.004
    decay_from: float = 0.55
    final_scale: float = 0.02
    clip_norm: float = 1.0
    # checkpoints that are averaged
    keep_from: float = 0.88
    keep_every: int = 40
    keep_last: int = 8
    # quantiser
    calib_batches: int = 24
    calib_seqs: int = 4
    hessian_damp: float = 0.01
    gptq_block: int = 128
    clip_sigmas: float = 3.6
    size_limit: int = 16000000
    artifact_path: str = "flodday.bin"
    # scoring
    eval_seq_len: int = 2048
    eval_stride: int = 128
    eval_windows: int = 32
    memory_weight: float = 0.03
    memory_prior: float = 8.0
    # adaptation
    adapt: bool = True
    chunk_tokens: int = 65536
    adapt_lr: float = 0.004
    adapt_momentum: float = 0.9
    adapt_epochs: int = 2
    adapt_clip: float = 1.0

    @classmethod
    def from_environment(cls) -> Settings:
        found: dict[str, Any] = {}
        for item in fields(cls):
            text = os.environ.get(item.name.upper())
            if text is None:
                continue
            kind = type(item.default)
            found[item.name] = text not in ("", "0", "false", "False") if kind is bool else kind(text)
        settings = cls(**found)
        settings.run_id = settings.run_id or uuid.uuid4().hex[:12]
        return settings

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    @property
    def step_seconds(self) -> float:
        """What the training loop may use of the cap; the rest belongs to averaging, calibration and packing."""
        return self.train_seconds - self.pack_reserve_seconds


# ------------------------------------------------------------------------------------------------------------------
# Ranks, clock, log
# ------------------------------------------------------------------------------------------------------------------


class Ranks:
    """The process group as a context manager; with one process every method is the identity."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local)

    def __enter__(self) -> Ranks:
        torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl", device_id=self.device, timeout=datetime.timedelta(minutes=15))
        return self

    def __exit__(self, *_: object) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def add(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def average(self, tensors: list[Tensor]) -> None:
        """One flat all-reduce per dtype instead of one per tensor."""
        if self.world == 1:
            return
        for dtype in {t.dtype for t in tensors}:
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat, op=dist.ReduceOp.AVG)
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def agree(self, value: float) -> float:
        """Rank 0's value on every rank, so that decisions made by the clock are the same everywhere."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box.item())

    def share(self, tensors: Iterable[Tensor]) -> None:
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def collect(self, thing: dict[str, Any]) -> dict[str, Any]:
        """The union of every rank's dictionary."""
        if self.world == 1:
            return thing
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, thing)
        return {key: value for part in parts for key, value in part.items()}


class Stopwatch:
    """Seconds of running time. Waits for the device whenever it is read, started or paused."""

    def __init__(self) -> None:
        self.gone = 0.0
        self.since: float | None = None

    def resume(self) -> Stopwatch:
        torch.cuda.synchronize()
        if self.since is None:
            self.since = time.perf_counter()
        return self

    def pause(self) -> Stopwatch:
        self.gone = self.seconds
        self.since = None
        return self

    @property
    def seconds(self) -> float:
        torch.cuda.synchronize()
        return self.gone + (time.perf_counter() - self.since if self.since is not None else 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def __enter__(self) -> Stopwatch:
        return self.resume()

    def __exit__(self, *_: object) -> None:
        self.pause()


class Journal:
    """What is printed, printed by rank 0 only and kept in logs/."""

    def __init__(self, ranks: Ranks, run_id: str) -> None:
        self.file: io.TextIOWrapper | None = None
        if ranks.first:
            Path("logs").mkdir(exist_ok=True)
            self.file = open(f"logs/{run_id}.txt", "w", encoding="utf-8")

    def __call__(self, text: str, screen: bool = True) -> None:
        if self.file is None:
            return
        if screen:
            print(text, flush=True)
        print(text, file=self.file, flush=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


# ------------------------------------------------------------------------------------------------------------------
# Tokens
# ------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_HEADER = 256


def open_shard(path: str) -> np.ndarray:
    """A shard's tokens as they lie on disk."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if header[0] != SHARD_MAGIC or header[1] != 1:
        raise ValueError(f"{path}: not a token shard")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER)
    if len(tokens) != int(header[2]):
        raise ValueError(f"{path}: header promises {header[2]} tokens, file holds {len(tokens)}")
    return tokens


class ShardReader:
    """An endless stream over the shards of a pattern, in the order of their names."""

    def __init__(self, pattern: str) -> None:
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            raise FileNotFoundError(f"no shards match {pattern}")
        self.index = 0
        self.position = 0
        self.tokens = open_shard(self.paths[0])

    def advance(self) -> None:
        self.index = (self.index + 1) % len(self.paths)
        self.position = 0
        self.tokens = open_shard(self.paths[self.index])

    def take(self, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            here = self.tokens[self.position : self.position + count]
            if len(here) == 0:
                self.advance()
                continue
            parts.append(np.asarray(here, dtype=np.int32))
            self.position += len(here)
            count -= len(here)
        return np.concatenate(parts)


class Batches:
    """Inputs and targets for this rank: all ranks read the same stream, each keeps its own slice of every step."""

    def __init__(self, reader: ShardReader, ranks: Ranks, seqs: int, seq_len: int) -> None:
        self.reader = reader
        self.ranks = ranks
        self.seqs = seqs
        self.seq_len = seq_len

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        share = self.seqs * self.seq_len
        block = self.reader.take(share * self.ranks.world + 1)
        mine = block[self.ranks.rank * share : (self.ranks.rank + 1) * share + 1]
        tokens = torch.from_numpy(mine.astype(np.int64)).pin_memory().to(self.ranks.device, non_blocking=True)
        return tokens[:-1].view(self.seqs, self.seq_len), tokens[1:].view(self.seqs, self.seq_len)


def validation_stream(pattern: str) -> Tensor:
    """The validation split, every shard and every token of it."""
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no shards match {pattern}")
    return torch.from_numpy(np.concatenate([np.asarray(open_shard(p), dtype=np.int64) for p in paths]))


# ------------------------------------------------------------------------------------------------------------------
# Bytes
# ------------------------------------------------------------------------------------------------------------------


class PieceTable:
    """How many bytes of the original text each piece stands for.

    A piece that begins with the mark stands for a space too, except after a control piece, where the tokenizer put the
    mark itself (its dummy prefix).
    """

    MARK = "\u2581"

    def __init__(self, path: str, vocab_size: int, device: torch.device) -> None:
        sp = spm.SentencePieceProcessor(model_file=path)
        if sp.vocab_size() > vocab_size:
            raise ValueError(f"{path} has {sp.vocab_size()} pieces, the model knows {vocab_size}")
        size = np.zeros(vocab_size, dtype=np.int64)
        space = np.zeros(vocab_size, dtype=bool)
        silent = np.ones(vocab_size, dtype=bool)
        for i in range(sp.vocab_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            silent[i] = False
            if sp.is_byte(i):
                size[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith(self.MARK):
                space[i] = True
                piece = piece[len(self.MARK) :]
            size[i] = len(piece.encode("utf-8"))
        self.size = torch.from_numpy(size).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.silent = torch.from_numpy(silent).to(device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes of every target, given the token before it."""
        return self.size[target] + (self.space[target] & ~self.silent[prev]).long()


class ByteMeter:
    """Sums of nats, tokens and bytes, in double precision; `gather` adds the ranks up."""

    def __init__(self, table: PieceTable, device: torch.device) -> None:
        self.table = table
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, prev: Tensor, target: Tensor, nats: Tensor) -> None:
        self.sums[0] += nats.double().sum()
        self.sums[1] += target.numel()
        self.sums[2] += self.table.count(prev, target).sum().double()

    def gather(self, ranks: Ranks) -> ByteMeter:
        ranks.add(self.sums)
        return self

    @property
    def tokens(self) -> int:
        return int(self.sums[1].item())

    @property
    def bytes(self) -> int:
        return int(self.sums[2].item())

    @property
    def loss(self) -> float:
        return float(self.sums[0] / self.sums[1])

    @property
    def bpb(self) -> float:
        return float(self.sums[0] / math.log(2.0) / self.sums[2])


# ------------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """The shape of the network; enough to build it again from the packed file."""

    vocab: int
    layers: int
    dim: int
    inner: int
    heads: int
    kv_heads: int
    hidden: int
    attention: tuple[int, ...]
    conv: int
    rope_base: float
    cap: float

    @classmethod
    def of(cls, s: Settings) -> ModelSpec:
        at = tuple(int(word) for word in s.attention_at.split(",") if word)
        return cls(
            vocab=s.vocab_size,
            layers=s.layers,
            dim=s.dim,
            inner=s.inner,
            heads=s.heads,
            kv_heads=s.kv_heads,
            hidden=s.hidden,
            attention=at,
            conv=s.conv_width,
            rope_base=s.rope_base,
            cap=s.logit_cap,
        )


class Norm(nn.Module):
    """RMS norm with a gain and a bias: these, and the other biases, are all that adaptation may touch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),)) * self.gain.to(x.dtype) + self.bias.to(x.dtype)


class Dense(nn.Linear):
    """A matrix kept in float32 and used in the activations' type."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def linear_scan(log_decay: Tensor, drive: Tensor, block: int = 32) -> Tensor:
    """h_t = exp(log_decay_t) h_{t-1} + drive_t along dim 1, from h = 0.

    Inside a block by cumulative sums (log_decay > -1/2, so exponents stay below 16), across blocks by doubling.
    """
    batch, length, width = drive.shape
    spare = -length % block
    if spare:
        log_decay = F.pad(log_decay, (0, 0, 0, spare))
        drive = F.pad(drive, (0, 0, 0, spare))
    blocks = (length + spare) // block
    total = log_decay.view(batch, blocks, block, width).cumsum(2)
    local = total.exp() * (drive.view(batch, blocks, block, width) * (-total).exp()).cumsum(2)
    factor = total[:, :, -1].exp()
    state = local[:, :, -1]
    shift = 1
    while shift < blocks:
        state = state + factor * F.pad(state, (0, 0, shift, 0))[:, :blocks]
        factor = factor * F.pad(factor, (0, 0, shift, 0), value=1.0)[:, :blocks]
        shift *= 2
    carried = F.pad(state, (0, 0, 1, 0))[:, :blocks]
    out = local + total.exp() * carried[:, :, None]
    return out.view(batch, blocks * block, width)[:, :length]


class GatedMix(nn.Module):
    """Mixes positions by a gated linear recurrence after a short causal convolution."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.width = spec.conv
        self.feed = Dense(spec.dim, 3 * spec.inner)
        self.out = Dense(spec.inner, spec.dim)
        kernel = torch.zeros(spec.inner, 1, spec.conv)
        kernel[:, :, -1] = 1.0
        self.kernel = nn.Parameter(kernel)
        self.decay_bias = nn.Parameter(torch.linspace(-5.0, 2.0, spec.inner))
        self.gate_bias = nn.Parameter(torch.ones(spec.inner))

    def forward(self, x: Tensor) -> Tensor:
        value, decay, gate = self.feed(x).chunk(3, dim=-1)
        past = F.pad(value.transpose(1, 2), (self.width - 1, 0))
        value = F.conv1d(past, self.kernel.to(x.dtype), groups=value.size(-1)).transpose(1, 2)
        log_decay = -0.5 * torch.sigmoid(decay.float() + self.decay_bias)
        drive = (1.0 - (2.0 * log_decay).exp()).clamp_min(1e-6).sqrt() * F.silu(value.float())
        state = linear_scan(log_decay, drive)
        return self.out(state.to(x.dtype) * torch.sigmoid(gate + self.gate_bias.to(x.dtype)))


class Rotary(nn.Module):
    """Cosines and sines, made once per length."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.register_buffer("rate", base ** (-torch.arange(0, head_dim, 2).float() / head_dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.size(-2), device=x.device).float()[:, None] * self.rate[None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped keys, for the few layers that must look far back exactly."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads = spec.heads, spec.kv_heads
        self.head_dim = spec.dim // spec.heads
        self.query = Dense(spec.dim, spec.dim)
        self.key_value = Dense(spec.dim, 2 * spec.kv_heads * self.head_dim)
        self.out = Dense(spec.dim, spec.dim)
        self.query_gain = nn.Parameter(torch.full((spec.heads,), 1.5))
        self.rotary = Rotary(self.head_dim, spec.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = self.query(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.key_value(x).view(batch, length, 2 * self.kv_heads, self.head_dim).transpose(1, 2).chunk(2, dim=1)
        q = self.rotary(F.rms_norm(q, (self.head_dim,))) * self.query_gain.to(x.dtype)[:, None, None]
        k = self.rotary(F.rms_norm(k, (self.head_dim,)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class Squared(nn.Module):
    """The feed-forward half: relu squared."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.up = Dense(spec.dim, spec.hidden)
        self.down = Dense(spec.hidden, spec.dim)
        self.up_bias = nn.Parameter(torch.zeros(spec.hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x) + self.up_bias.to(x.dtype)).square())


class Layer(nn.Module):
    """One mixer, one feed-forward, each behind its norm; the embedding is let in again by a gain."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.norm_mix = Norm(spec.dim)
        self.norm_feed = Norm(spec.dim)
        self.mixer = Attention(spec) if index in spec.attention else GatedMix(spec)
        self.feed_forward = Squared(spec)
        self.mix_gain = nn.Parameter(torch.ones(spec.dim))
        self.feed_gain = nn.Parameter(torch.ones(spec.dim))
        self.origin_gain = nn.Parameter(torch.zeros(spec.dim))
        self.damp = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, origin: Tensor) -> Tensor:
        x = x + self.origin_gain.to(x.dtype) * origin
        x = x + self.mix_gain.to(x.dtype) * self.mixer(self.norm_mix(x) * self.damp)
        return x + self.feed_gain.to(x.dtype) * self.feed_forward(self.norm_feed(x) * self.damp)


class Net(nn.Module):
    """Tied embedding, layers, a last norm and capped logits."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Parameter(torch.randn(spec.vocab, spec.dim) * 0.01)
        self.layers = nn.ModuleList(Layer(spec, i) for i in range(spec.layers))
        self.norm_last = Norm(spec.dim)
        self.logit_bias = nn.Parameter(torch.zeros(spec.vocab))
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(parameter)
            elif name.endswith(".weight"):
                nn.init.orthogonal_(parameter)

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            origin = F.rms_norm(F.embedding(tokens, self.embed).bfloat16(), (self.spec.dim,))
            x = origin
            for layer in self.layers:
                x = layer(x, origin)
            raw = F.linear(self.norm_last(x), self.embed.to(x.dtype))
        cap = self.spec.cap
        return cap * torch.tanh((raw.float() + self.logit_bias) / cap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


def is_small(name: str) -> bool:
    """Gains and biases."""
    return name.endswith(("gain", "bias"))


def is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2


# ------------------------------------------------------------------------------------------------------------------
# Optimisers and schedules
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimeSchedule:
    """Rates as functions of the share of the training time that is gone, never of the step."""

    ramp_until: float
    decay_from: float
    final_scale: float
    momentum_from: float
    momentum_to: float
    momentum_until: float

    @classmethod
    def of(cls, s: Settings) -> TimeSchedule:
        return cls(**{item.name: getattr(s, item.name) for item in fields(cls)})

    def rate(self, gone: float) -> float:
        if gone < self.ramp_until:
            return max(gone / self.ramp_until, 0.02)
        if gone < self.decay_from:
            return 1.0
        left = max(1.0 - gone, 0.0) / (1.0 - self.decay_from)
        return self.final_scale + (1.0 - self.final_scale) * left

    def momentum(self, gone: float) -> float:
        share = min(gone / self.momentum_until, 1.0)
        return (1.0 - share) * self.momentum_from + share * self.momentum_to


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum. Every rank works out its share of the matrices; a sum hands the updates round."""

    def __init__(self, params: list[nn.Parameter], lr: float, decay: float, ranks: Ranks) -> None:
        super().__init__(params, dict(lr=lr, momentum=0.95, decay=decay))
        self.ranks = ranks

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "velocity" not in state:
                        state["velocity"] = torch.zeros_like(p.grad)
                    velocity = state["velocity"]
                    velocity.mul_(momentum).add_(p.grad)
                    update = orthogonalised(p.grad.add(velocity, alpha=momentum))
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.reshape(-1)
                at += p.numel()
            self.ranks.add(flat)
            at = 0
            for p in params:
                p.mul_(1.0 - lr * group["decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).float(), alpha=-lr)
                at += p.numel()


class Optimisers:
    """Muon for matrices, Adam for the embedding and for everything small, turned together."""

    def __init__(self, net: Net, s: Settings, ranks: Ranks) -> None:
        named = dict(net.named_parameters())
        matrices = [p for n, p in named.items() if is_matrix(n, p)]
        small = [p for n, p in named.items() if not is_matrix(n, p) and n != "embed"]
        adam = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
        self.muon = Muon(matrices, s.matrix_lr, s.weight_decay, ranks)
        self.adams = [
            torch.optim.AdamW([net.embed], lr=s.embed_lr, **adam),
            torch.optim.AdamW(small, lr=s.small_lr, **adam),
        ]
        self.params = list(named.values())
        self.clip = s.clip_norm
        self.ranks = ranks
        for group in self.groups():
            group["base_lr"] = group["lr"]

    def all(self) -> list[torch.optim.Optimizer]:
        return [self.muon, *self.adams]

    def groups(self) -> Iterator[dict[str, Any]]:
        for optimiser in self.all():
            yield from optimiser.param_groups

    def step(self, rate: float, momentum: float) -> None:
        self.ranks.average([p.grad for p in self.params if p.grad is not None])
        if self.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        for group in self.groups():
            group["lr"] = group["base_lr"] * rate
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for optimiser in self.all():
            optimiser.step()
        self.clear()

    def clear(self) -> None:
        for optimiser in self.all():
            optimiser.zero_grad(set_to_none=True)

    def snapshot(self) -> list[dict[str, Any]]:
        return [copy.deepcopy(o.state_dict()) for o in self.all()]

    def restore(self, states: list[dict[str, Any]]) -> None:
        for optimiser, state in zip(self.all(), states, strict=True):
            optimiser.load_state_dict(state)


class Checkpoints:
    """The last few states of the network, and their plain mean."""

    def __init__(self, net: Net, keep: int) -> None:
        self.net = net
        self.kept: deque[dict[str, Tensor]] = deque(maxlen=keep)

    def __len__(self) -> int:
        return len(self.kept)

    @torch.no_grad()
    def keep(self) -> None:
        self.kept.append({k: v.detach().to("cpu", copy=True) for k, v in self.net.state_dict().items()})

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        if not self.kept:
            self.keep()
        return {k: torch.stack([c[k].float() for c in self.kept]).mean(0) for k in self.kept[0]}

    def apply(self) -> int:
        """Puts the mean into the network; returns of how many it is."""
        self.net.load_state_dict(self.mean())
        return len(self.kept)


# ------------------------------------------------------------------------------------------------------------------
# Quantiser
# ------------------------------------------------------------------------------------------------------------------


class Coded(NamedTuple):
    """Integer codes of a matrix and one scale per row; `peak` is the largest code (31: six bits, 127: eight)."""

    codes: Tensor
    scale: Tensor
    peak: int

    def value(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]


class HessianTap:
    """While it is open, sums X'X of the inputs of every Dense layer of a network."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.hessians: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def hook(self, name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            self.hessians[name] = self.hessians.get(name, 0) + x.T @ x

        return see

    def __enter__(self) -> HessianTap:
        for name, module in self.net.named_modules():
            if isinstance(module, Dense):
                self.handles.append(module.register_forward_pre_hook(self.hook(f"{name}.weight")))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class Quantiser:
    """GPTQ to six-bit rows for the matrices, plain rounding to eight-bit rows for the embedding."""

    MATRIX_PEAK = 31
    EMBED_PEAK = 127

    def __init__(self, net: Net, s: Settings, ranks: Ranks) -> None:
        self.net = net
        self.settings = s
        self.ranks = ranks
        self.hessians: dict[str, Tensor] = {}

    @torch.no_grad()
    def calibrate(self, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
        """Hessians from the next batches of the training stream; returns how many tokens they saw."""
        seen = 0
        with HessianTap(self.net) as tap:
            for _ in range(self.settings.calib_batches):
                tokens, _targets = next(batches)
                self.net.logits(tokens)
                seen += tokens.numel() * self.ranks.world
        for name in sorted(tap.hessians):
            self.ranks.add(tap.hessians[name])
        self.hessians = tap.hessians
        return seen

    @torch.no_grad()
    def matrix(self, name: str, weight: Tensor, sigmas: float) -> Coded:
        """GPTQ: rounds column by column and lets the columns to come make good the error."""
        w = weight.detach().float().clone()
        peak = self.MATRIX_PEAK
        reach = torch.minimum(w.abs().amax(1), sigmas * w.std(1)).clamp_min(1e-8)
        scale = (reach / peak).half()
        step = scale.float()
        h = self.hessians[name].float().clone()
        idle = h.diagonal() == 0
        h.diagonal()[idle] = 1.0
        w[:, idle] = 0.0
        h.diagonal().add_(self.settings.hessian_damp * h.diagonal().mean())
        order = torch.argsort(h.diagonal(), descending=True)
        back = torch.argsort(order)
        w, h = w[:, order], h[order][:, order]
        root = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        codes = torch.zeros_like(w)
        for lo in range(0, w.size(1), self.settings.gptq_block):
            hi = min(lo + self.settings.gptq_block, w.size(1))
            errors = torch.zeros_like(w[:, lo:hi])
            for j in range(lo, hi):
                q = (w[:, j] / step).round().clamp(-peak, peak)
                codes[:, j] = q
                error = (w[:, j] - q * step) / root[j, j]
                w[:, j:hi] -= error[:, None] * root[j, j:hi][None]
                errors[:, j - lo] = error
            w[:, hi:] -= errors @ root[lo:hi, hi:]
        return Coded(codes[:, back].to(torch.int8).cpu(), scale.cpu(), peak)

    @torch.no_grad()
    def rows(self, table: Tensor) -> Coded:
        t = table.detach().float()
        scale = (t.abs().amax(1).clamp_min(1e-8) / self.EMBED_PEAK).half()
        codes = (t / scale.float()[:, None]).round().clamp(-self.EMBED_PEAK, self.EMBED_PEAK)
        return Coded(codes.to(torch.int8).cpu(), scale.cpu(), self.EMBED_PEAK)

    def run(self, sigmas: float) -> Artifact:
        """Every rank rounds its share of the matrices, then all hold all of them."""
        named = dict(self.net.named_parameters())
        names = [n for n, p in named.items() if is_matrix(n, p)]
        mine = {n: self.matrix(n, named[n], sigmas) for n in names[self.ranks.rank :: self.ranks.world]}
        coded = {**self.ranks.collect(mine), "embed": self.rows(named["embed"])}
        plain = {n: p.detach().half().cpu() for n, p in named.items() if n not in coded}
        return Artifact(self.net.spec, coded, plain)


# ------------------------------------------------------------------------------------------------------------------
# Arithmetic coder
# ------------------------------------------------------------------------------------------------------------------


class LaneCoder:
    """A range coder in its last-in-first-out form (rANS), many lanes at a time so that numpy can drive it.

    Lane j codes the symbols j, j + lanes, j + 2 lanes ... The words of all lanes share one stream.
    """

    BITS = 14
    LOW = np.uint64(1 << 31)
    WORD = np.uint64(32)

    def __init__(self, frequencies: np.ndarray, lanes: int = 1024) -> None:
        self.lanes = lanes
        self.frequencies = frequencies.astype(np.uint64)
        self.starts = np.concatenate([[0], np.cumsum(self.frequencies)[:-1]]).astype(np.uint64)
        self.lookup = np.repeat(np.arange(len(frequencies)), frequencies.astype(np.int64)).astype(np.uint8)

    @classmethod
    def fit(cls, symbols: np.ndarray, size: int) -> np.ndarray:
        """Frequencies that sum to 2 ** BITS, none zero where a symbol occurs."""
        counts = np.bincount(symbols, minlength=size).astype(np.float64)
        whole = 1 << cls.BITS
        freq = np.where(counts > 0, np.maximum(np.floor(counts / counts.sum() * whole), 1), 0).astype(np.int64)
        freq[np.argmax(freq)] += whole - freq.sum()
        return freq

    def encode(self, symbols: np.ndarray) -> bytes:
        spare = -len(symbols) % self.lanes
        filler = np.full(spare, np.argmax(self.frequencies), dtype=symbols.dtype)
        table = np.concatenate([symbols, filler]).reshape(-1, self.lanes)
        state = np.full(self.lanes, self.LOW, dtype=np.uint64)
        words: list[np.ndarray] = []
        top = np.uint64(63 - self.BITS)
        bits = np.uint64(self.BITS)
        for row in table[::-1]:
            f, c = self.frequencies[row], self.starts[row]
            full = state >= (f << top)
            words.append((state[full] & np.uint64(0xFFFFFFFF)).astype("<u4"))
            state[full] >>= self.WORD
            state = ((state // f) << bits) + state % f + c
        body = np.concatenate(words[::-1]) if words else np.zeros(0, dtype="<u4")
        return state.astype("<u8").tobytes() + body.tobytes()

    def decode(self, data: bytes, count: int) -> np.ndarray:
        steps = -(-count // self.lanes)
        state = np.frombuffer(data, dtype="<u8", count=self.lanes).astype(np.uint64)
        words = np.frombuffer(data, dtype="<u4", offset=8 * self.lanes).astype(np.uint64)
        out = np.empty((steps, self.lanes), dtype=np.uint8)
        mask = np.uint64((1 << self.BITS) - 1)
        bits = np.uint64(self.BITS)
        at = 0
        for i in range(steps):
            slot = state & mask
            symbol = self.lookup[slot.astype(np.int64)]
            out[i] = symbol
            state = self.frequencies[symbol] * (state >> bits) + slot - self.starts[symbol]
            short = state < self.LOW
            need = int(short.sum())
            state[short] = (state[short] << self.WORD) | words[at : at + need]
            at += need
        return out.reshape(-1)[:count]


# ------------------------------------------------------------------------------------------------------------------
# Artifact
# ------------------------------------------------------------------------------------------------------------------


class Artifact:
    """The packed model: coded matrices, plain half-precision vectors, and the spec that says how to build it."""

    MAGIC = b"FLD1"

    def __init__(self, spec: ModelSpec, coded: dict[str, Coded], plain: dict[str, Tensor]) -> None:
        self.spec = spec
        self.coded = coded
        self.plain = plain

    @staticmethod
    def kind(name: str) -> str:
        """Matrices of one role share one table of frequencies."""
        parts = name.split(".")
        return parts[-2] if len(parts) > 2 else parts[0]

    def pack(self) -> bytes:
        groups: dict[str, list[str]] = {}
        for name in sorted(self.coded):
            groups.setdefault(self.kind(name), []).append(name)
        head: dict[str, Any] = {"spec": self.spec.__dict__, "groups": [], "plain": []}
        body = io.BytesIO()
        halves = io.BytesIO()
        for names in groups.values():
            peak = self.coded[names[0]].peak
            symbols = np.concatenate([self.coded[n].codes.numpy().reshape(-1) for n in names]).astype(np.int16) + peak
            freq = LaneCoder.fit(symbols, 2 * peak + 1)
            data = LaneCoder(freq).encode(symbols)
            shapes = [list(self.coded[n].codes.shape) for n in names]
            head["groups"].append(
                dict(names=names, shapes=shapes, peak=peak, freq=freq.tolist(), length=len(data))
            )
            body.write(data)
            for n in names:
                halves.write(self.coded[n].scale.numpy().astype("<f2").tobytes())
        for name in sorted(self.plain):
            head["plain"].append([name, list(self.plain[name].shape)])
            halves.write(self.plain[name].numpy().astype("<f2").tobytes())
        head_bytes = zlib.compress(json.dumps(head, separators=(",", ":")).encode(), 9)
        return self.MAGIC + struct.pack("<I", len(head_bytes)) + head_bytes + body.getvalue() + self.tail(halves)

    @staticmethod
    def tail(halves: io.BytesIO) -> bytes:
        """Half-precision numbers, high bytes before low bytes, deflated."""
        raw = np.frombuffer(halves.getvalue(), dtype=np.uint8).reshape(-1, 2)
        return zlib.compress(np.ascontiguousarray(raw.T).tobytes(), 9)

    @classmethod
    def unpack(cls, data: bytes) -> Artifact:
        if data[:4] != cls.MAGIC:
            raise ValueError("not a flodday artifact")
        (length,) = struct.unpack("<I", data[4:8])
        head = json.loads(zlib.decompress(data[8 : 8 + length]))
        at = 8 + length
        streams = []
        for group in head["groups"]:
            streams.append(data[at : at + group["length"]])
            at += group["length"]
        planes = np.frombuffer(zlib.decompress(data[at:]), dtype=np.uint8).reshape(2, -1)
        halves = np.ascontiguousarray(planes.T).reshape(-1).view("<f2")
        taken = 0

        def next_halves(count: int) -> Tensor:
            nonlocal taken
            part = halves[taken : taken + count].astype(np.float16)
            taken += count
            return torch.from_numpy(part)

        coded: dict[str, Coded] = {}
        for group, stream in zip(head["groups"], streams, strict=True):
            sizes = [math.prod(shape) for shape in group["shapes"]]
            symbols = LaneCoder(np.array(group["freq"])).decode(stream, sum(sizes)).astype(np.int16) - group["peak"]
            parts = np.split(symbols.astype(np.int8), np.cumsum(sizes)[:-1])
            for name, shape, part in zip(group["names"], group["shapes"], parts, strict=True):
                codes = torch.from_numpy(part.copy()).view(shape)
                coded[name] = Coded(codes, next_halves(shape[0]), group["peak"])
        plain = {name: next_halves(math.prod(shape)).view(shape) for name, shape in head["plain"]}
        spec = {**head["spec"], "attention": tuple(head["spec"]["attention"])}
        return cls(ModelSpec(**spec), coded, plain)

    def build(self, device: torch.device) -> Net:
        """The network that the packed numbers describe."""
        net = Net(self.spec)
        state = {name: c.value() for name, c in self.coded.items()}
        state.update({name: t.float() for name, t in self.plain.items()})
        net.load_state_dict(state)
        return net.to(device).eval()


class Packer:
    """Finds the finest rounding whose packed size, with this file, stays within the limit, and writes it."""

    WIDER = (1.0, 1.1, 1.22, 1.36, 1.55)

    def __init__(self, quantiser: Quantiser, s: Settings, ranks: Ranks, say: Journal) -> None:
        self.quantiser = quantiser
        self.settings = s
        self.ranks = ranks
        self.say = say

    @staticmethod
    def code_bytes() -> int:
        return len(Path(__file__).read_bytes())

    def write(self) -> int:
        code = self.code_bytes()
        for wider in self.WIDER:
            data = self.quantiser.run(self.settings.clip_sigmas * wider).pack()
            total = code + len(data)
            self.say(f"pack: clip x{wider:.2f} model {len(data)} bytes + code {code} bytes = {total} bytes")
            if total <= self.settings.size_limit:
                break
        else:
            raise RuntimeError(f"no rounding fits {self.settings.size_limit} bytes")
        if self.ranks.first:
            Path(self.settings.artifact_path).write_bytes(data)
        self.ranks.barrier()
        self.say(f"Serialized model int6+int8 arithmetic-coded: {len(data)} bytes")
        self.say(f"Code size: {code} bytes")
        self.say(f"Total submission size: {total} bytes")
        return total


# ------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------


class Trainer:
    """Steps until the clock says stop; holds what belongs together while it does."""

    MICRO_SEQS = 32

    def __init__(self, net: Net, s: Settings, ranks: Ranks, clock: Stopwatch, say: Journal) -> None:
        self.net = net
        self.settings = s
        self.ranks = ranks
        self.clock = clock
        self.say = say
        self.schedule = TimeSchedule.of(s)
        self.optimisers = Optimisers(net, s, ranks)
        self.checkpoints = Checkpoints(net, s.keep_last)
        self.loss = torch.compile(net, dynamic=False)
        seqs = s.train_batch_tokens // s.train_seq_len // ranks.world
        self.micro_seqs = min(seqs, self.MICRO_SEQS)
        self.micro_steps = max(seqs // self.micro_seqs, 1)
        self.reader = ShardReader(s.train_files)
        self.batches = Batches(self.reader, ranks, self.micro_seqs, s.train_seq_len)

    def prime(self) -> None:
        """Compiles on random tokens, then puts weights and optimisers back as they were."""
        weights = copy.deepcopy(self.net.state_dict())
        states = self.optimisers.snapshot()
        shape = (self.micro_seqs, self.settings.train_seq_len)
        for _ in range(self.settings.prime_steps):
            x = torch.randint(self.settings.vocab_size, shape, device=self.ranks.device)
            y = torch.randint(self.settings.vocab_size, shape, device=self.ranks.device)
            self.loss(x, y).backward()
            self.optimisers.step(rate=1.0, momentum=0.9)
        self.net.load_state_dict(weights)
        self.optimisers.restore(states)
        for group in self.optimisers.groups():
            group["lr"] = group["base_lr"]

    def one_step(self, gone: float) -> Tensor:
        total = torch.zeros((), device=self.ranks.device)
        for _ in range(self.micro_steps):
            x, y = next(self.batches)
            loss = self.loss(x, y) / self.micro_steps
            loss.backward()
            total += loss.detach()
        self.optimisers.step(self.schedule.rate(gone), self.schedule.momentum(gone))
        return total

    def run(self, peek: SlidingScorer | None, stream: Tensor) -> int:
        s = self.settings
        step = 0
        while step < s.max_steps:
            spent = self.ranks.agree(self.clock.seconds)
            gone = spent / s.step_seconds
            if gone >= 1.0:
                self.say(f"stopping: clock {spent:.1f}s step {step}")
                break
            if peek is not None and s.peek_every and step % s.peek_every == 0 and step:
                with self.clock.paused():
                    self.glance(peek, stream, step)
            loss = self.one_step(gone)
            step += 1
            if gone >= s.keep_from and step % s.keep_every == 0:
                self.checkpoints.keep()
            if step % s.log_every == 0 or step <= 5:
                each = 1000.0 * self.clock.seconds / step
                self.say(f"step {step} train_loss {loss.item():.4f} clock {spent:.1f}s {each:.1f}ms/step")
        return step

    def glance(self, peek: SlidingScorer, stream: Tensor, step: int) -> None:
        """A look at the validation loss for the journal; nothing depends on it."""
        head = stream[: self.settings.peek_tokens + 1]
        meter = peek.score_all(head, stride=self.settings.eval_seq_len)
        self.say(f"step {step} val_loss {meter.loss:.4f} val_bpb {meter.bpb:.4f} (first {meter.tokens} tokens)")


# ------------------------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """A window that starts at `start` and books the loss of positions lo .. hi-1 (position p predicts token p+1)."""

    start: int
    lo: int
    hi: int


def spans(positions: int, seq_len: int, stride: int) -> Iterator[Span]:
    """Windows that cover every position exactly once; all but the first have at least seq_len - stride of context."""
    yield Span(0, 0, min(seq_len, positions))
    for lo in range(seq_len, positions, stride):
        hi = min(lo + stride, positions)
        yield Span(hi - seq_len, lo, hi)


class PairMemory:
    """Counts of neighbouring tokens among those already booked, mixed into the model's distribution.

    p(a | context) = (1 - w) model(a) + w (count(prev, a) + prior * single(a)) / (count(prev) + prior),
    single(a) = (count(a) + 1) / (count + V). All three are distributions over the whole vocabulary; w is fixed.
    """

    def __init__(self, vocab: int, weight: float, prior: float, device: torch.device) -> None:
        self.vocab = vocab
        self.weight = weight
        self.prior = prior
        self.pairs = torch.zeros(vocab, vocab, device=device)
        self.singles = torch.zeros(vocab, device=device)

    def distribution(self, prev: Tensor) -> Tensor:
        single = (self.singles + 1.0) / (self.singles.sum() + self.vocab)
        rows = self.pairs[prev]
        return (rows + self.prior * single) / (rows.sum(-1, keepdim=True) + self.prior)

    def mix(self, logp: Tensor, prev: Tensor) -> Tensor:
        if self.weight <= 0.0:
            return logp
        other = self.distribution(prev).log()
        return torch.logaddexp(logp + math.log1p(-self.weight), other + math.log(self.weight))

    def observe(self, tokens: Tensor) -> None:
        """Takes in a run of tokens whose losses are booked."""
        index = tokens[:-1] * self.vocab + tokens[1:]
        self.pairs.view(-1).add_(torch.bincount(index, minlength=self.vocab**2).float())
        self.singles.add_(torch.bincount(tokens[1:], minlength=self.vocab).float())


class SlidingScorer:
    """Books the losses of spans, in batches of windows of one fixed shape."""

    def __init__(self, net: Net, table: PieceTable, s: Settings, ranks: Ranks) -> None:
        self.net = net
        self.table = table
        self.settings = s
        self.ranks = ranks
        self.logits = torch.compile(net.logits, dynamic=False)

    def meter(self) -> ByteMeter:
        return ByteMeter(self.table, self.ranks.device)

    def window(self, stream: Tensor, span: Span) -> Tensor:
        """seq_len + 1 tokens from the span's start, zero-filled where the stream ends sooner."""
        length = self.settings.eval_seq_len + 1
        piece = stream[max(span.start, 0) : span.hi + 1]
        return F.pad(piece, (0, length - len(piece)))

    @torch.no_grad()
    def score(self, stream: Tensor, mine: list[Span], meter: ByteMeter, memory: PairMemory | None = None) -> None:
        size = self.settings.eval_windows
        for at in range(0, len(mine), size):
            group = mine[at : at + size]
            rows = torch.stack([self.window(stream, span) for span in group])
            rows = F.pad(rows, (0, 0, 0, size - len(group))).to(self.ranks.device)
            logits = self.logits(rows[:, :-1])
            for i, span in enumerate(group):
                lo, hi = span.lo - max(span.start, 0), span.hi - max(span.start, 0)
                prev, target = rows[i, lo:hi], rows[i, lo + 1 : hi + 1]
                logp = F.log_softmax(logits[i, lo:hi].float(), dim=-1)
                if memory is not None:
                    logp = memory.mix(logp, prev)
                nats = -logp.gather(-1, target[:, None]).squeeze(-1)
                meter.add(prev, target, nats)

    def score_all(self, stream: Tensor, stride: int) -> ByteMeter:
        """The network as it is, no adaptation and no memory."""
        todo = list(spans(len(stream) - 1, self.settings.eval_seq_len, stride))
        meter = self.meter()
        self.score(stream, todo[self.ranks.rank :: self.ranks.world], meter)
        return meter.gather(self.ranks)


class Chunk(NamedTuple):
    """Consecutive spans that are scored with one state; positions lo .. hi-1."""

    lo: int
    hi: int
    spans: list[Span]


def chunks(todo: Iterable[Span], size: int) -> list[Chunk]:
    found: list[Chunk] = []
    for span in todo:
        if found and span.lo // size == found[-1].lo // size:
            last = found[-1]
            last.spans.append(span)
            found[-1] = last._replace(hi=span.hi)
        else:
            found.append(Chunk(span.lo, span.hi, [span]))
    return found


class ChunkAdapter:
    """Scores a chunk, and only then learns from it: gains and biases by SGD, the pair memory by counting.

    All ranks hold the same weights and the same memory at all times: a chunk's windows are shared out for scoring, its
    sequences for the gradient, and the gradient is averaged.
    """

    def __init__(self, scorer: SlidingScorer, s: Settings, ranks: Ranks, clock: Stopwatch, say: Journal) -> None:
        self.scorer = scorer
        self.net = scorer.net
        self.settings = s
        self.ranks = ranks
        self.clock = clock
        self.say = say
        self.memory = PairMemory(self.net.spec.vocab, s.memory_weight, s.memory_prior, ranks.device)
        self.small = []
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(is_small(name))
            if is_small(name):
                self.small.append(parameter)
        self.sgd = torch.optim.SGD(self.small, lr=s.adapt_lr, momentum=s.adapt_momentum)
        self.loss = torch.compile(self.net, dynamic=False)

    def run(self, stream: Tensor) -> ByteMeter:
        s = self.settings
        positions = len(stream) - 1
        todo = chunks(spans(positions, s.eval_seq_len, s.eval_stride), s.chunk_tokens)
        meter = self.scorer.meter()
        adapting = s.adapt
        for i, chunk in enumerate(todo):
            mine = chunk.spans[self.ranks.rank :: self.ranks.world]
            self.scorer.score(stream, mine, meter, self.memory)
            if i == len(todo) - 1:
                break
            self.memory.observe(stream[chunk.lo : chunk.hi + 1].to(self.ranks.device))
            if adapting and self.ranks.agree(self.clock.seconds) > s.adapt_until_seconds:
                self.say(f"adaptation stops at chunk {i} of {len(todo)}")
                adapting = False
            if adapting:
                self.learn(stream, chunk, i / len(todo))
            if i % 100 == 0:
                self.say(f"chunk {i}/{len(todo)} clock {self.clock.seconds:.1f}s")
        return meter.gather(self.ranks)

    def sequences(self, stream: Tensor, chunk: Chunk) -> Tensor:
        """The chunk as rows of seq_len + 1 tokens, of which this rank takes its share."""
        length = self.settings.eval_seq_len
        count = (chunk.hi - chunk.lo) // length
        rows = [stream[chunk.lo + k * length : chunk.lo + (k + 1) * length + 1] for k in range(count)]
        share = len(rows) // self.ranks.world
        if share == 0:
            return torch.empty(0, length + 1, dtype=torch.int64)
        return torch.stack(rows[self.ranks.rank * share : (self.ranks.rank + 1) * share])

    def learn(self, stream: Tensor, chunk: Chunk, progress: float) -> None:
        """A few steps on a chunk that has been scored."""
        rows = self.sequences(stream, chunk).to(self.ranks.device)
        if len(rows) == 0:
            return
        for group in self.sgd.param_groups:
            group["lr"] = self.settings.adapt_lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        for _ in range(self.settings.adapt_epochs):
            self.sgd.zero_grad(set_to_none=True)
            self.loss(rows[:, :-1], rows[:, 1:]).backward()
            self.ranks.average([p.grad for p in self.small if p.grad is not None])
            torch.nn.utils.clip_grad_norm_(self.small, self.settings.adapt_clip)
            self.sgd.step()
        self.sgd.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------------


def sow(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def tune_torch() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")


def train(s: Settings, ranks: Ranks, say: Journal, table: PieceTable, stream: Tensor) -> None:
    """From random weights to the packed file, all of it on one clock."""
    net = Net(ModelSpec.of(s)).to(ranks.device)
    ranks.share(net.state_dict().values())
    say(f"model_params:{sum(p.numel() for p in net.parameters())}")
    clock = Stopwatch()
    trainer = Trainer(net, s, ranks, clock, say)
    trainer.prime()
    peek = SlidingScorer(net, table, s, ranks)
    with clock:
        steps = trainer.run(peek, stream)
        averaged = trainer.checkpoints.apply()
        say(f"averaged {averaged} checkpoints after {steps} steps, clock {clock.seconds:.1f}s")
        quantiser = Quantiser(net, s, ranks)
        calibration = Batches(trainer.reader, ranks, s.calib_seqs, s.train_seq_len)
        seen = quantiser.calibrate(calibration)
        say(f"hessians from {seen} training tokens, clock {clock.seconds:.1f}s")
        Packer(quantiser, s, ranks, say).write()
    say(f"training, calibration and packing took {clock.seconds:.1f}s")
    say(f"peak memory {torch.cuda.max_memory_allocated() // 2**20} MiB")
    if ranks.agree(clock.seconds) > s.train_seconds:
        raise RuntimeError(f"over the training cap of {s.train_seconds:.0f}s")


def evaluate(s: Settings, ranks: Ranks, say: Journal, table: PieceTable, stream: Tensor) -> None:
    """From the packed file to the score."""
    with Stopwatch() as clock:
        net = Artifact.unpack(Path(s.artifact_path).read_bytes()).build(ranks.device)
        scorer = SlidingScorer(net, table, s, ranks)
        plain = scorer.score_all(stream, stride=s.eval_seq_len)
        say(f"roundtrip val_loss {plain.loss:.4f} val_bpb {plain.bpb:.4f} clock {clock.seconds:.1f}s")
        final = ChunkAdapter(scorer, s, ranks, clock, say).run(stream)
        took = ranks.agree(clock.seconds)
    say(f"scored {final.tokens} tokens of {len(stream) - 1}, {final.bytes} bytes, in {took:.1f}s")
    if took > s.eval_seconds:
        raise RuntimeError(f"over the evaluation cap of {s.eval_seconds:.0f}s")
    say(f"final val_loss:{final.loss:.8f} val_bpb:{final.bpb:.8f}")


def main() -> None:
    s = Settings.from_environment()
    tune_torch()
    with Ranks() as ranks, Journal(ranks, s.run_id) as say:
        say(Path(__file__).read_text(encoding="utf-8"), screen=False)
        say(f"python {sys.version.split()[0]} torch {torch.__version__} world {ranks.world}")
        say(json.dumps(s.__dict__))
        sow(s.seed)
        table = PieceTable(s.tokenizer_path, s.vocab_size, ranks.device)
        stream = validation_stream(s.val_files)
        say(f"validation: {len(stream) - 1} tokens from {s.val_files}")
        train(s, ranks, say, table, stream)
        torch._dynamo.reset()
        evaluate(s, ranks, say, table, stream)


if __name__ == "__main__":
    main()
