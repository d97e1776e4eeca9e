"""hasgeir: a 9-layer GPT, int6 weights, and a streaming evaluator.

The evaluation is one left-to-right stream that is pulled through generators:

    windows -> blocks -> batches (prefetched by a thread) -> scores -> mixer -> ledger

A block is 131,072 target tokens. Every token of a block is scored with the state that was built from the blocks before
it; the code that learns from a block stands behind the `yield` that hands its losses to the ledger, so it cannot run
earlier. What is learned: hashed context tables (orders 2-6, whole count vectors over the vocabulary), the weights of a
PAQ-like logistic mixer, and the 1-D parameters of the network (one SGD step per block).

torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import io
import json
import lzma
import math
import os
import queue
import random
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

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

SIZE_LIMIT = 16_000_000
TRAIN_LIMIT = 600.0
EVAL_LIMIT = 600.0

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


def env(name: str, default):
    """A setting from the environment, with the type of its default."""
    match os.environ.get(name), default:
        case None, _:
            return default
        case raw, bool():
            return raw.lower() in ("1", "true", "yes")
        case raw, tuple():
            return tuple(type(default[0])(part) for part in raw.split(","))
        case raw, _:
            return type(default)(raw)


def setting(name: str, default):
    return field(default_factory=lambda: env(name, default))


@dataclass(frozen=True)
class Settings:
    # files
    data: str = setting("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer: str = setting("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = setting("RUN_ID", str(uuid.uuid4())[:8])
    seed: int = setting("SEED", 1337)
    artifact: str = setting("ARTIFACT", "final_model.int6.bin")
    # network
    vocab: int = setting("VOCAB_SIZE", 1024)
    layers: int = setting("NUM_LAYERS", 9)
    dim: int = setting("MODEL_DIM", 512)
    heads: int = setting("NUM_HEADS", 8)
    kv_heads: int = setting("NUM_KV_HEADS", 4)
    mlp: float = setting("MLP_MULT", 3.0)
    rope_base: float = setting("ROPE_BASE", 10000.0)
    rope_dims: int = setting("ROPE_DIMS", 32)
    softcap: float = setting("LOGIT_SOFTCAP", 30.0)
    qk_gain: float = setting("QK_GAIN", 1.5)
    # training
    seq_len: int = setting("TRAIN_SEQ_LEN", 1024)
    batch_tokens: int = setting("TRAIN_BATCH_TOKENS", 524_288)
    iterations: int = setting("ITERATIONS", 20_000)
    warmup_steps: int = setting("WARMUP_STEPS", 20)
    warmdown: int = setting("WARMDOWN_ITERS", 2400)
    reserve_s: float = setting("QUANT_RESERVE_SECONDS", 32.0)
    log_every: int = setting("TRAIN_LOG_EVERY", 200)
    val_every: int = setting("VAL_LOSS_EVERY", 0)
    embed_lr: float = setting("EMBED_LR", 0.05)
    matrix_lr: float = setting("MATRIX_LR", 0.03)
    scalar_lr: float = setting("SCALAR_LR", 0.03)
    muon_momentum: float = setting("MUON_MOMENTUM", 0.97)
    muon_momentum_start: float = setting("MUON_MOMENTUM_START", 0.88)
    muon_momentum_steps: int = setting("MUON_MOMENTUM_STEPS", 800)
    muon_steps: int = setting("MUON_BACKEND_STEPS", 5)
    muon_wd: float = setting("MUON_WEIGHT_DECAY", 0.04)
    beta1: float = setting("BETA1", 0.9)
    beta2: float = setting("BETA2", 0.95)
    clip: float = setting("GRAD_CLIP_NORM", 0.3)
    ema: float = setting("EMA_DECAY", 0.997)
    # quantisation
    calib_batches: int = setting("CALIB_BATCHES", 24)
    calib_rows: int = setting("CALIB_ROWS", 16)
    gptq_damp: float = setting("GPTQ_DAMP", 0.01)
    gptq_block: int = setting("GPTQ_BLOCK", 128)
    # evaluation
    eval_len: int = setting("EVAL_SEQ_LEN", 1024)
    stride: int = setting("EVAL_STRIDE", 64)
    eval_batch: int = setting("EVAL_BATCH", 128)
    block: int = setting("EVAL_BLOCK_TOKENS", 131_072)
    prefetch: int = setting("EVAL_PREFETCH", 4)
    orders: tuple = setting("CACHE_ORDERS", (2, 3, 4, 5, 6))
    cache_bits: int = setting("CACHE_BITS", 19)
    cache_alpha: float = setting("CACHE_ALPHA", 1.5)
    mixer_lr: float = setting("MIXER_LR", 0.02)
    mixer_bins: int = setting("MIXER_BINS", 6)
    tune_lr: float = setting("TUNE_LR", 0.002)
    tune_momentum: float = setting("TUNE_MOMENTUM", 0.9)
    tune_rows: int = setting("TUNE_ROWS", 16)

    @property
    def train_glob(self) -> str:
        return "fineweb_train_*.bin"

    @property
    def val_glob(self) -> str:
        return "fineweb_val_*.bin"


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, log, clock
# ----------------------------------------------------------------------------------------------------------------------


class Ranks:
    """The process group; with a single process every call is a no-op."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(self.device)
        self.on = "RANK" in os.environ
        if self.on:
            dist.init_process_group("nccl", device_id=self.device)
            dist.barrier()

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def sum(self, *tensors: Tensor) -> None:
        if self.on:
            for t in tensors:
                dist.all_reduce(t, op=dist.ReduceOp.SUM)

    def mean(self, *tensors: Tensor) -> None:
        if self.on:
            for t in tensors:
                dist.all_reduce(t, op=dist.ReduceOp.AVG)

    def any(self, flag: bool) -> bool:
        t = torch.tensor(int(flag), device=self.device)
        if self.on:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def barrier(self) -> None:
        torch.cuda.synchronize()
        if self.on:
            dist.barrier()

    def close(self) -> None:
        if self.on:
            dist.destroy_process_group()


class Log:
    def __init__(self, ranks: Ranks, run_id: str):
        self.file = None
        if ranks.chief:
            (folder := Path("logs")).mkdir(exist_ok=True)
            self.file = (folder / f"{run_id}.txt").open("a", encoding="utf-8")

    def __call__(self, text: str, show: bool = True) -> None:
        if self.file:
            print(text, file=self.file, flush=True)
            if show:
                print(text, flush=True)


class Clock:
    """Wall clock over CUDA work. `paused()` takes out what is not training, that is, validation that is only logged."""

    def __init__(self):
        torch.cuda.synchronize()
        self.t0, self.away = time.perf_counter(), 0.0

    def __call__(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.t0 - self.away

    def peek(self) -> float:
        """Without waiting for the GPU; good enough between steps."""
        return time.perf_counter() - self.t0 - self.away

    @contextmanager
    def paused(self):
        torch.cuda.synchronize()
        t = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.away += time.perf_counter() - t


# ----------------------------------------------------------------------------------------------------------------------
# Shards and bytes
# ----------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION = 20240520, 1


def read_shard(path: Path) -> np.ndarray:
    """The tokens of one shard: 256 little-endian int32 of header, then uint16."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if header.size != 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    tokens = np.fromfile(path, dtype="<u2", count=(n := int(header[2])), offset=1024)
    if tokens.size != n:
        raise ValueError(f"{path}: short read, {tokens.size} of {n} tokens")
    return tokens


def shards(folder: str, pattern: str) -> list[Path]:
    if not (found := sorted(Path(folder).glob(pattern))):
        raise FileNotFoundError(f"no {pattern} in {folder}")
    return found


class TrainFeed:
    """Endless training batches. All ranks walk the same stream of shards, each takes its own slice of every batch."""

    def __init__(self, s: Settings, ranks: Ranks):
        self.files, self.ranks = shards(s.data, s.train_glob), ranks
        self.next_file, self.at, self.tokens = 0, 0, np.empty(0, np.uint16)

    def take(self, n: int) -> np.ndarray:
        parts = []
        while n:
            if self.at >= self.tokens.size:
                self.tokens = read_shard(self.files[self.next_file % len(self.files)])
                self.next_file, self.at = self.next_file + 1, 0
            parts.append(piece := self.tokens[self.at : self.at + n])
            self.at += piece.size
            n -= piece.size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def batch(self, tokens: int, seq: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of this rank: `tokens` tokens over all ranks, in rows of `seq`."""
        own = tokens // self.ranks.world
        span = own + 1
        chunk = self.take(span * self.ranks.world)
        mine = torch.from_numpy(chunk[self.ranks.rank * span : (self.ranks.rank + 1) * span].astype(np.int64))
        mine = mine.pin_memory().to(self.ranks.device, non_blocking=True)
        return mine[:-1].view(-1, seq), mine[1:].view(-1, seq)


class ByteTables(NamedTuple):
    """Bytes of a piece without its mark; whether it has the mark; whether it stands for no text (control, unknown)."""

    own: Tensor
    mark: Tensor
    edge: Tensor

    def count(self, target: Tensor, before: Tensor) -> Tensor:
        """UTF-8 bytes of each target: the mark is one space, except directly after a document's edge."""
        return self.own[target] + (self.mark[target] & ~self.edge[before]).to(self.own.dtype)


def byte_tables(sp: spm.SentencePieceProcessor, vocab: int, device: torch.device) -> ByteTables:
    size = max(sp.vocab_size(), vocab)
    own, mark, edge = np.zeros(size, np.int64), np.zeros(size, bool), np.ones(size, bool)
    for i in range(sp.vocab_size()):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        edge[i] = False
        if sp.is_byte(i):
            own[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            mark[i] = True
            piece = piece[1:]
        own[i] = len(piece.encode("utf-8"))
    return ByteTables(*(torch.from_numpy(a).to(device) for a in (own, mark, edge)))


def validation_stream(s: Settings, device: torch.device) -> Tensor:
    """All validation tokens, in order, on the device."""
    parts = [read_shard(p) for p in shards(s.data, s.val_glob)]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """fp32 master weights, computed in the type of the input."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False):
        super().__init__(n_in, n_out, bias=False)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float):
        super().__init__()
        self.register_buffer("freq", base ** (-torch.arange(0, dims, 2).float() / dims), persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """x: batch, heads, time, head_dim; the first `dims` of the head are turned, the rest is left alone."""
        t = torch.arange(x.size(-2), device=x.device, dtype=torch.float32)
        angle = torch.outer(t, self.freq)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned, still = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, still), dim=-1)


class Attention(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.heads, s.kv_heads, s.dim // s.heads
        kv = self.kv_heads * self.head_dim
        self.q, self.k, self.v = Linear(s.dim, s.dim), Linear(s.dim, kv), Linear(s.dim, kv)
        self.out = Linear(s.dim, s.dim, zero=True)
        self.gain = nn.Parameter(torch.full((s.heads,), s.qk_gain))
        self.v_mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.rotary = Rotary(s.rope_dims, s.rope_base)

    def forward(self, x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        b, t, d = x.shape
        q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv_heads, -1).transpose(1, 2)
        v_first = v if v_first is None else v_first
        mix = self.v_mix.to(v.dtype)
        v = mix[0] * v + mix[1] * v_first
        q, k = self.rotary(rms(q)), self.rotary(rms(k))
        q = q * self.gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(b, t, d)), v_first


class MLP(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        hidden = int(s.dim * s.mlp)
        self.up, self.down = Linear(s.dim, hidden), Linear(hidden, s.dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, s: Settings, depth: int):
        super().__init__()
        self.attn, self.mlp = Attention(s), MLP(s)
        self.attn_scale = nn.Parameter(torch.ones(s.dim))
        self.mlp_scale = nn.Parameter(torch.ones(s.dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(s.dim), torch.zeros(s.dim))))
        self.damp = 1.0 / math.sqrt(depth + 1)

    def forward(self, x: Tensor, x0: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        y, v_first = self.attn(rms(x) * self.damp, v_first)
        x = x + self.attn_scale.to(x.dtype) * y
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.damp)
        return x, v_first


class GPT(nn.Module):
    """U-shaped stack: the first half leaves its states for the second, tied embedding, capped logits."""

    def __init__(self, s: Settings):
        super().__init__()
        self.softcap = s.softcap
        self.embed = nn.Embedding(s.vocab, s.dim)
        nn.init.normal_(self.embed.weight, std=0.005)
        self.blocks = nn.ModuleList(Block(s, i) for i in range(s.layers))
        self.down, self.up = s.layers // 2, s.layers - s.layers // 2
        self.skips = nn.Parameter(torch.ones(min(self.down, self.up), s.dim))

    def hidden(self, ids: Tensor) -> Tensor:
        x = x0 = rms(self.embed(ids).to(torch.bfloat16))
        v_first, left = None, []
        for i in range(self.down):
            x, v_first = self.blocks[i](x, x0, v_first)
            left.append(x)
        for i in range(self.up):
            if left:
                x = x + self.skips[i].to(x.dtype) * left.pop()
            x, v_first = self.blocks[self.down + i](x, x0, v_first)
        return rms(x)

    def logits(self, h: Tensor) -> Tensor:
        z = F.linear(h, self.embed.weight.to(h.dtype)).float()
        return self.softcap * torch.tanh(z / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        z = self.logits(self.hidden(ids))
        return F.cross_entropy(z.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# Optimisers
# ----------------------------------------------------------------------------------------------------------------------


@torch.compile
def newton_schulz(g: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """The nearest half-orthogonal matrix, roughly."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    if flip := x.size(0) > x.size(1):
        x = x.T
    x = x / (x.norm() + eps)
    for _ in range(steps):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. The matrices are dealt out to the ranks; the updates come back in one all_reduce."""

    def __init__(self, params, ranks: Ranks, lr: float, momentum: float, steps: int, wd: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, wd=wd))
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params, lr, mu = group["params"], group["lr"], group["momentum"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    (buf := state["buf"]).mul_(mu).add_(p.grad)
                    g = newton_schulz(p.grad.add(buf, alpha=mu), group["steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.flatten()
                at += p.numel()
            self.ranks.sum(flat)
            at = 0
            for p in params:
                p.mul_(1 - lr * group["wd"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-lr)
                at += p.numel()


def optimisers(model: GPT, s: Settings, ranks: Ranks) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.endswith("weight") and "embed" not in n]
    taken = {id(p) for p in matrices} | {id(model.embed.weight)}
    scalars = [p for p in model.parameters() if id(p) not in taken]
    adam = dict(betas=(s.beta1, s.beta2), eps=1e-8, fused=True, weight_decay=0.0)
    found = [
        torch.optim.AdamW([dict(params=[model.embed.weight], lr=s.embed_lr)], **adam),
        torch.optim.AdamW([dict(params=scalars, lr=s.scalar_lr)], **adam),
        Muon(matrices, ranks, s.matrix_lr, s.muon_momentum, s.muon_steps, s.muon_wd),
    ]
    for opt in found:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class Ema:
    """A running average of the weights; always used, never compared."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.mean = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for n, t in model.state_dict().items():
            self.mean[n].lerp_(t.detach().float(), 1 - self.decay)

    def load_into(self, model: nn.Module) -> None:
        own = model.state_dict()
        model.load_state_dict({n: t.to(own[n].dtype) for n, t in self.mean.items()})


def lr_scale(step: int, elapsed: float, s: Settings) -> float:
    """Flat, then linear to zero over the last `warmdown` steps, as many as the wall clock still allows."""
    if s.warmdown <= 0:
        return 1.0
    per_step = elapsed / max(step, 1)
    left = max(TRAIN_LIMIT - s.reserve_s - elapsed, 0.0)
    steps_left = min(s.iterations - step, left / max(per_step, 1e-9)) if step else s.iterations
    return min(1.0, steps_left / s.warmdown)


def grad_step(model, raw: GPT, feed: TrainFeed, opts: list, s: Settings, ranks: Ranks) -> Tensor:
    """One optimiser step; returns the mean training loss of this rank."""
    accum = max(1, 8 // ranks.world)
    total = torch.zeros((), device=ranks.device)
    for _ in range(accum):
        x, y = feed.batch(s.batch_tokens // accum, s.seq_len)
        loss = model(x, y)
        (loss / accum).backward()
        total += loss.detach() / accum
    grads = [p.grad for p in raw.parameters() if p.grad is not None]
    ranks.mean(*grads)
    if s.clip > 0:
        nn.utils.clip_grad_norm_(raw.parameters(), s.clip)
    for opt in opts:
        opt.step()
        opt.zero_grad(set_to_none=True)
    return total


def warm_up(model, raw: GPT, s: Settings, ranks: Ranks) -> None:
    """Compiles the kernels on training batches; weights, optimisers and the feed start afresh afterwards."""
    kept = copy.deepcopy(raw.state_dict())
    opts, feed = optimisers(raw, s, ranks), TrainFeed(s, ranks)
    for _ in range(s.warmup_steps):
        grad_step(model, raw, feed, opts, s, ranks)
    raw.load_state_dict(kept)


def train(model, raw: GPT, s: Settings, ranks: Ranks, log: Log, clock: Clock, feed: TrainFeed, peek: Callable) -> int:
    """Trains until the steps or the seconds run out; leaves the averaged weights in the model."""
    opts, ema = optimisers(raw, s, ranks), Ema(raw, s.ema)
    budget = TRAIN_LIMIT - s.reserve_s
    step, stop = 0, False
    while step < s.iterations and not stop:
        if s.val_every and step and step % s.val_every == 0:
            with clock.paused():
                loss, bpb = peek()
            log(f"step:{step}/{s.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f}")
        scale = lr_scale(step, clock.peek(), s)
        warm = min(step / max(s.muon_momentum_steps, 1), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
                if "momentum" in group:
                    group["momentum"] = (1 - warm) * s.muon_momentum_start + warm * s.muon_momentum
        loss = grad_step(model, raw, feed, opts, s, ranks)
        ema.update(raw)
        step += 1
        if step <= 5 or step % s.log_every == 0:
            ms = 1000 * clock()
            log(f"step:{step}/{s.iterations} train_loss:{loss.item():.4f} train_time:{ms:.0f}ms avg:{ms / step:.2f}ms")
        if step % 4 == 0:
            stop = ranks.any(clock() >= budget)
    log(f"stopped step:{step} train_time:{1000 * clock():.0f}ms budget:{1000 * budget:.0f}ms")
    ema.load_into(raw)
    return step


# ----------------------------------------------------------------------------------------------------------------------
# Quantisation: GPTQ to 6 bits, the embedding to 8
# ----------------------------------------------------------------------------------------------------------------------

INT6_MAX, INT8_MAX = 31, 127


def hessians(model: GPT, feed: TrainFeed, s: Settings, ranks: Ranks) -> dict[str, Tensor]:
    """X^T X of the input of every Linear, from training batches (the feed goes on where training stopped)."""
    found: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str):
        def hook(module, args, output):
            x = args[0].detach().flatten(0, -2).float()
            if name not in found:
                found[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
            found[name].addmm_(x.T, x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            hooks.append(module.register_forward_hook(watch(name)))
    with torch.no_grad():
        for _ in range(s.calib_batches):
            x, _ = feed.batch(s.calib_rows * s.seq_len * ranks.world, s.seq_len)
            model.hidden(x)
    for hook in hooks:
        hook.remove()
    ranks.sum(*found.values())
    return found


def row_scales(w: Tensor, top: int) -> Tensor:
    """Per row: the clipping point with the least squared error, of a few."""
    best = torch.full((w.size(0),), float("inf"), device=w.device)
    scale = torch.ones(w.size(0), device=w.device)
    peak = w.abs().amax(dim=1).clamp_min(1e-8)
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65):
        step = peak * share / top
        error = (w - (w / step[:, None]).round().clamp(-top, top) * step[:, None]).square().sum(dim=1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, step, scale)
    return scale.half().float()


def gptq(w: Tensor, h: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """(int8 codes in [-31, 31], fp16 scale per row)."""
    w, h = w.detach().float().clone(), h.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(s.gptq_damp * h.diagonal().mean())
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    scale = row_scales(w, INT6_MAX)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.zeros_like(w)
    for lo in range(0, w.size(1), s.gptq_block):
        hi = min(lo + s.gptq_block, w.size(1))
        errors = torch.zeros_like(w[:, lo:hi])
        for j in range(lo, hi):
            d = inverse[j, j]
            codes[:, j] = (w[:, j] / scale).round().clamp(-INT6_MAX, INT6_MAX)
            errors[:, j - lo] = (w[:, j] - codes[:, j] * scale) / d
            w[:, j:hi] -= errors[:, j - lo, None] * inverse[None, j, j:hi]
        w[:, hi:] -= errors @ inverse[lo:hi, hi:]
    return codes[:, order.argsort()].to(torch.int8), scale.half()


def quantise(model: GPT, hess: dict[str, Tensor], s: Settings) -> dict[str, tuple[str, tuple[Tensor, ...]]]:
    """name -> (kind, tensors): int6 by GPTQ, int8 for the embedding, fp16 for the rest."""
    packed = {}
    for name, t in model.state_dict().items():
        match name.removesuffix(".weight"), t.ndim:
            case layer, 2 if layer in hess:
                packed[name] = ("int6", gptq(t, hess[layer], s))
            case "embed", 2:
                scale = row_scales(t.float(), INT8_MAX)
                codes = (t.float() / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
                packed[name] = ("int8", (codes, scale.half()))
            case _:
                packed[name] = ("fp16", (t.detach().half(),))
    return packed


# ----------------------------------------------------------------------------------------------------------------------
# Packing
# ----------------------------------------------------------------------------------------------------------------------

MAGIC = b"HSG6"
DTYPES = {"b": torch.int8, "h": torch.float16}


def six_bits(codes: np.ndarray) -> bytes:
    """int8 codes in [-31, 31] as bit planes, each packed to bits: the compressor likes planes better than triples."""
    u = (codes.astype(np.int16) + 32).astype(np.uint8).ravel()
    return b"".join(np.packbits((u >> bit) & 1).tobytes() for bit in range(6))


def from_six_bits(raw: bytes, n: int) -> np.ndarray:
    plane = (n + 7) // 8
    u = np.zeros(n, np.uint8)
    for bit in range(6):
        bits = np.unpackbits(np.frombuffer(raw, np.uint8, plane, bit * plane), count=n)
        u |= bits << bit
    return (u.astype(np.int16) - 32).astype(np.int8)


def squeeze(raw: bytes) -> bytes:
    """The smaller of brotli and lzma, with a byte in front that says which."""
    filters = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, dict_size=1 << 25, lc=0, lp=0, pb=0)]
    options = [b"L" + lzma.compress(raw, format=lzma.FORMAT_RAW, filters=filters)]
    if brotli is not None:
        options.append(b"B" + brotli.compress(raw, quality=11, lgwin=24))
    return min(options, key=len)


def unsqueeze(blob: bytes) -> bytes:
    match blob[:1]:
        case b"B":
            return brotli.decompress(blob[1:])
        case b"L":
            filters = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, dict_size=1 << 25, lc=0, lp=0, pb=0)]
            return lzma.decompress(blob[1:], format=lzma.FORMAT_RAW, filters=filters)
        case other:
            raise ValueError(f"unknown compressor {other!r}")


def pack(packed: dict[str, tuple[str, tuple[Tensor, ...]]]) -> bytes:
    """Head (JSON: names, kinds, shapes), then the bodies: codes of all layers first, scales and vectors behind them."""
    head, codes, rest = [], [], []
    for name, (kind, tensors) in packed.items():
        head.append((name, kind, list(tensors[0].shape)))
        arrays = [t.cpu().numpy() for t in tensors]
        match kind:
            case "int6":
                codes.append(six_bits(arrays[0]))
                rest.append(arrays[1].tobytes())
            case "int8":
                codes.append(arrays[0].tobytes())
                rest.append(arrays[1].tobytes())
            case "fp16":
                rest.append(arrays[0].tobytes())
    meta = json.dumps(head, separators=(",", ":")).encode()
    body = struct.pack("<I", len(meta)) + meta + b"".join(codes) + b"".join(rest)
    return MAGIC + squeeze(body)


def unpack(blob: bytes) -> dict[str, Tensor]:
    """The state dict, dequantised, from the packed bytes alone."""
    if blob[:4] != MAGIC:
        raise ValueError("not a hasgeir model")
    stream = io.BytesIO(unsqueeze(blob[4:]))
    (n,) = struct.unpack("<I", stream.read(4))
    head = json.loads(stream.read(n))
    codes: dict[str, np.ndarray] = {}
    for name, kind, shape in head:
        size = math.prod(shape)
        match kind:
            case "int6":
                codes[name] = from_six_bits(stream.read(6 * ((size + 7) // 8)), size)
            case "int8":
                codes[name] = np.frombuffer(stream.read(size), np.int8)
    state = {}
    for name, kind, shape in head:
        if kind == "fp16":
            raw = stream.read(2 * math.prod(shape))
            state[name] = torch.from_numpy(np.frombuffer(raw, np.float16).reshape(shape).copy()).float()
        else:
            scale = torch.from_numpy(np.frombuffer(stream.read(2 * shape[0]), np.float16).copy()).float()
            state[name] = torch.from_numpy(codes[name].reshape(shape).copy()).float() * scale[:, None]
    return state


def write_artifact(packed: dict, s: Settings, ranks: Ranks, log: Log) -> None:
    """Rank 0 writes the model; the counted size is this file of code plus that file, and it must fit."""
    if ranks.chief:
        blob = pack(packed)
        Path(s.artifact).write_bytes(blob)
        code = Path(__file__).stat().st_size
        total = code + len(blob)
        log(f"Serialized model int6+{'brotli' if blob[4:5] == b'B' else 'lzma'}: {len(blob)} bytes")
        log(f"Code size: {code} bytes")
        log(f"Total submission size: {total} bytes (limit {SIZE_LIMIT})")
        if total > SIZE_LIMIT:
            raise SystemExit(f"too large by {total - SIZE_LIMIT} bytes")
    ranks.barrier()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation, stage 1 to 3: windows -> blocks -> batches
#
# A position is the index of a target in the stream: 1 .. T-1. The target at t is x[t], what may be known is x[:t].
# ----------------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Inputs x[start : start+len]; of its targets only the positions lo .. hi-1 are scored."""

    start: int
    lo: int
    hi: int


class Batch(NamedTuple):
    ids: Tensor  # rows of inputs
    keep: Tensor  # which of their outputs are scored
    where: Tensor  # the positions of those, in the order of `keep`
    block: int
    last: bool  # the last batch of this rank in its block


class Span(NamedTuple):
    index: int
    lo: int
    hi: int
    windows: list[Window]


def windows(total: int, length: int, stride: int) -> Iterator[Window]:
    """Every position 1 .. total-1 in exactly one window, each window full. The last one is shifted to fit."""
    if total - 1 < length:
        raise ValueError(f"a stream of {total} tokens is shorter than a window of {length}")
    yield Window(0, 1, length + 1)
    hi = length + 1
    while hi < total:
        lo, hi = hi, min(hi + stride, total)
        yield Window(hi - 1 - length, lo, hi)


def blocks(source: Iterable[Window], size: int) -> Iterator[Span]:
    """Windows in order, gathered until they score `size` positions."""
    held: list[Window] = []
    index = 0
    for window in source:
        held.append(window)
        if window.hi - held[0].lo >= size:
            yield Span(index, held[0].lo, window.hi, held)
            held, index = [], index + 1
    if held:
        yield Span(index, held[0].lo, held[-1].hi, held)


def share(n: int, ranks: Ranks) -> slice:
    """This rank's contiguous part of n things; no part differs from another by more than one."""
    cut = [n * r // ranks.world for r in range(ranks.world + 1)]
    lo, hi = list(pairwise(cut))[ranks.rank]
    return slice(lo, hi)


def batches(source: Iterable[Span], tokens: np.ndarray, s: Settings, ranks: Ranks) -> Iterator[Batch]:
    """This rank's windows of every block, in rows of pinned memory. A rank without a window still gets a last batch."""
    torch.cuda.set_device(ranks.device)  # the current device is a thread's own, and pinning asks for it
    cols = np.arange(s.eval_len)
    for span in source:
        own = iter(span.windows[share(len(span.windows), ranks)])
        groups = []
        while group := list(islice(own, s.eval_batch)):
            groups.append(group)
        for i, group in enumerate(groups or [[]]):
            start = np.array([w.start for w in group], np.int64).reshape(-1, 1)
            at = start + cols
            lo = np.array([w.lo for w in group], np.int64).reshape(-1, 1)
            hi = np.array([w.hi for w in group], np.int64).reshape(-1, 1)
            keep = (at + 1 >= lo) & (at + 1 < hi)
            yield Batch(
                torch.from_numpy(tokens[at].astype(np.int64)).pin_memory(),
                torch.from_numpy(keep).pin_memory(),
                torch.from_numpy(at[keep] + 1).pin_memory(),
                span.index,
                i + 1 >= len(groups),
            )


class Prefetch:
    """Runs an iterator in a thread, `depth` items ahead. It only cuts rows out of the stream; it knows no model."""

    END = object()

    def __init__(self, source: Iterable, depth: int):
        self.queue: queue.Queue = queue.Queue(maxsize=max(depth, 1))
        self.source = source
        self.thread = threading.Thread(target=self.fill, name="prefetch", daemon=True)
        self.thread.start()

    def fill(self) -> None:
        try:
            for item in self.source:
                self.queue.put(item)
            self.queue.put(self.END)
        except BaseException as error:
            self.queue.put(error)

    def __iter__(self) -> Iterator:
        while (item := self.queue.get()) is not self.END:
            if isinstance(item, BaseException):
                raise item
            yield item
        self.thread.join()


# ----------------------------------------------------------------------------------------------------------------------
# Stage 4: scores
# ----------------------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    logp: Tensor  # rows x vocabulary, the network's log-probabilities
    where: Tensor
    block: int
    last: bool


def scores(model: GPT, hidden: Callable, source: Iterable[Batch], device: torch.device) -> Iterator[Scored]:
    for batch in source:
        ids, keep, where = (t.to(device, non_blocking=True) for t in batch[:3])
        if not where.numel():
            logp = torch.empty(0, model.embed.num_embeddings, device=device)
        else:
            with torch.no_grad():
                logp = F.log_softmax(model.logits(hidden(ids)[keep]), dim=-1)
        yield Scored(logp, where, batch.block, batch.last)


# ----------------------------------------------------------------------------------------------------------------------
# Stage 5: the cache, the mixer, the tuner
# ----------------------------------------------------------------------------------------------------------------------


class ContextTables:
    """Per order one table of count vectors: bucket x vocabulary. A bucket is a hash of the last `order` tokens.

    Contexts that collide share a bucket, and so a vector; what is read is always a whole vector, which is divided by
    its own sum. The tables are the same on all ranks: each adds all tokens of a block, when the block is scored.
    """

    PRIMES = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0x2545F491)

    def __init__(self, stream: Tensor, s: Settings):
        self.stream, self.orders, self.vocab = stream, s.orders, s.vocab
        self.mask = (1 << s.cache_bits) - 1
        self.alpha = s.cache_alpha
        shape = (1 << s.cache_bits, s.vocab)
        self.counts = {k: torch.zeros(shape, dtype=torch.float32, device=stream.device) for k in self.orders}
        self.upto = 1  # positions below this are in the tables

    def bucket(self, where: Tensor, order: int) -> Tensor:
        """Hash of x[t-order] .. x[t-1] for the positions t. Before the stream's start stands a zero."""
        h = torch.full_like(where, order)
        for back in range(1, order + 1):
            at = where - back
            token = torch.where(at >= 0, self.stream[at.clamp_min(0)] + 1, 0)
            h = ((h ^ token) * self.PRIMES[back - 1]) & 0x7FFFFFFF
            h = h ^ (h >> 13)
        return h & self.mask

    def read(self, where: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities: order x row x vocabulary, totals: order x row). base: what an empty bucket falls back to."""
        probs, totals = [], []
        for k in self.orders:
            c = self.counts[k][self.bucket(where, k)]
            n = c.sum(dim=1)
            probs.append((c + self.alpha * base) / (n + self.alpha)[:, None])
            totals.append(n)
        return torch.stack(probs), torch.stack(totals)

    def add(self, lo: int, hi: int) -> None:
        """Adds the tokens at positions lo .. hi-1, which must be the next ones."""
        if lo != self.upto:
            raise RuntimeError(f"tables hold positions below {self.upto}, got {lo}")
        where = torch.arange(lo, hi, device=self.stream.device)
        token = self.stream[where]
        one = torch.ones(where.numel(), device=where.device)
        for k in self.orders:
            self.counts[k].view(-1).index_add_(0, self.bucket(where, k) * self.vocab + token, one)
        self.upto = hi


def stretch(p: Tensor) -> Tensor:
    p = p.clamp(1e-7, 1 - 1e-7)
    return p.log() - (-p).log1p()


class Mixer:
    """Logistic mixing over the whole vocabulary, with weights from a set that the context selects.

        z(a) = ln p(a) + sum_k w[set, k] * (stretch(p_k(a)) - stretch(p(a))),    mixed = softmax(z)

    The gradient of the log-loss is E_mixed[f_k] - f_k(target); it is summed over a block and applied after it.
    """

    def __init__(self, s: Settings, ranks: Ranks):
        self.ranks, self.lr, self.bins, self.n = ranks, s.mixer_lr, s.mixer_bins, len(s.orders)
        sets = (self.n + 1) * self.bins
        self.w = torch.zeros(sets, self.n, device=ranks.device)
        self.second = torch.full_like(self.w, 1e-4)
        self.pending = torch.zeros_like(self.w)
        self.hits = torch.zeros(sets, 1, device=ranks.device)

    def choose(self, logp: Tensor, totals: Tensor) -> Tensor:
        """The set: how many orders have seen the context, and how sure the network is. Nothing of the target."""
        seen = (totals > 0).sum(dim=0)
        entropy = -(logp.exp() * logp).sum(dim=1)
        level = (entropy * self.bins / math.log(logp.size(1))).long().clamp(0, self.bins - 1)
        return seen * self.bins + level

    def mix(self, logp: Tensor, probs: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(mixed log-probabilities, features). features: order x row x vocabulary."""
        f = stretch(probs) - stretch(logp.exp())[None]
        z = logp + torch.einsum("kra,rk->ra", f, self.w[chosen])
        return F.log_softmax(z, dim=-1), f

    def note(self, mixed: Tensor, f: Tensor, chosen: Tensor, target: Tensor) -> None:
        """Adds the gradient of rows that are scored; the weights stay as they are."""
        expected = torch.einsum("ra,kra->rk", mixed.exp(), f)
        actual = f.gather(2, target[None, :, None].expand(self.n, -1, 1)).squeeze(2).T
        self.pending.index_add_(0, chosen, expected - actual)
        self.hits.index_add_(0, chosen, torch.ones(len(chosen), 1, device=chosen.device))

    def commit(self) -> None:
        """One step with the gradient of the whole block, of all ranks."""
        self.ranks.sum(self.pending, self.hits)
        g = self.pending / self.hits.clamp_min(1)
        live = self.hits > 0
        self.second = torch.where(live, 0.95 * self.second + 0.05 * g.square(), self.second)
        self.w -= torch.where(live, self.lr * g / self.second.sqrt(), 0.0)
        self.w.clamp_(-0.5, 1.5)
        self.pending.zero_()
        self.hits.zero_()


class Tuner:
    """SGD on the 1-D parameters of the network, on blocks that are scored. Every rank takes its rows of the block."""

    def __init__(self, model: GPT, stream: Tensor, s: Settings, ranks: Ranks):
        self.model, self.stream, self.s, self.ranks = model, stream, s, ranks
        self.params = [p for p in model.parameters() if p.ndim < 2]
        for p in model.parameters():
            p.requires_grad_(p.ndim < 2)
        self.opt = torch.optim.SGD(self.params, lr=s.tune_lr, momentum=s.tune_momentum)

    def learn(self, lo: int, hi: int) -> None:
        length = self.s.eval_len
        if (rows := (hi - lo) // length) < self.ranks.world:
            return
        part = share(rows, self.ranks)
        ids = self.stream[lo - 1 : lo - 1 + rows * length].view(rows, length)[part]
        targets = self.stream[lo : lo + rows * length].view(rows, length)[part]
        self.opt.zero_grad(set_to_none=True)
        for x, y in zip(ids.split(self.s.tune_rows), targets.split(self.s.tune_rows)):
            (self.model(x, y) * len(x) / len(ids)).backward()
        self.ranks.mean(*(p.grad for p in self.params))
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.step()


class Losses(NamedTuple):
    where: Tensor
    nll: Tensor


def mixer_stage(
    source: Iterable[Scored], spans: Iterable[Span], stream: Tensor, tables: ContextTables, mixer: Mixer, tuner: Tuner
) -> Iterator[Losses]:
    """Scores with the state of the blocks before, hands the losses on, and only when asked for more learns."""
    spans = iter(spans)
    for item in source:
        target = stream[item.where]
        probs, totals = tables.read(item.where, item.logp.exp())
        chosen = mixer.choose(item.logp, totals)
        mixed, features = mixer.mix(item.logp, probs, chosen)
        yield Losses(item.where, -mixed.gather(1, target[:, None]).squeeze(1))
        mixer.note(mixed, features, chosen, target)
        if item.last:
            span = next(spans)
            assert span.index == item.block
            mixer.commit()
            tables.add(span.lo, span.hi)
            tuner.learn(span.lo, span.hi)


# ----------------------------------------------------------------------------------------------------------------------
# Stage 6: the ledger
# ----------------------------------------------------------------------------------------------------------------------


class Ledger:
    """One loss per position, written once."""

    def __init__(self, stream: Tensor, tables: ByteTables):
        self.stream, self.tables = stream, tables
        self.loss = torch.full((stream.numel(),), float("nan"), dtype=torch.float64, device=stream.device)

    def bank(self, entry: Losses) -> None:
        if not bool(self.loss[entry.where].isnan().all()):
            raise RuntimeError("a position was scored twice")
        if not bool(entry.nll.isfinite().all()):
            raise RuntimeError("a loss is not finite")
        self.loss[entry.where] = entry.nll.double()

    def close(self, ranks: Ranks) -> tuple[float, float, int, int]:
        """(nats per token, bits per byte, tokens, bytes) over all ranks; every position 1 .. T-1 must be there."""
        where = (~self.loss.isnan()).nonzero().squeeze(1)
        sizes = self.tables.count(self.stream[where], self.stream[where - 1])
        sums = torch.stack((self.loss[where].sum(), sizes.sum().double(), torch.tensor(where.numel()).to(sizes).double()))
        ranks.sum(sums)
        nats, size, n = sums.tolist()
        if int(n) != self.stream.numel() - 1:
            raise RuntimeError(f"{int(n)} positions scored of {self.stream.numel() - 1}")
        return nats / n, nats / math.log(2) / size, int(n), int(size)


def evaluate(model: GPT, hidden: Callable, stream: Tensor, sizes: ByteTables, s: Settings, ranks: Ranks, log: Log):
    """The whole stream, once, through the pipeline; (nats per token, bits per byte)."""
    host = stream.to(torch.int32).cpu().numpy()
    total = stream.numel()

    def plan() -> Iterator[Span]:
        return blocks(windows(total, s.eval_len, s.stride), s.block)

    tables, mixer = ContextTables(stream, s), Mixer(s, ranks)
    tuner, ledger = Tuner(model, stream, s, ranks), Ledger(stream, sizes)
    t0, beat = time.perf_counter(), 0
    feed = Prefetch(batches(plan(), host, s, ranks), s.prefetch)
    line = mixer_stage(scores(model, hidden, feed, ranks.device), plan(), stream, tables, mixer, tuner)
    for entry in line:
        ledger.bank(entry)
        beat += 1
        if beat % 400 == 0:
            done = tables.upto / total
            log(f"eval {done:6.1%} {time.perf_counter() - t0:.0f}s mean_w:{mixer.w.mean().item():.4f}")
    loss, bpb, n, size = ledger.close(ranks)
    log(f"ledger tokens:{n} bytes:{size} bytes_per_token:{size / n:.4f}")
    return loss, bpb


# ----------------------------------------------------------------------------------------------------------------------
# A plain loss, for the log only
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_loss(model, stream: Tensor, sizes: ByteTables, s: Settings, ranks: Ranks) -> tuple[float, float]:
    """Rows that do not overlap, no cache, no mixer. Quick; not the score."""
    rows = (stream.numel() - 1) // s.seq_len
    part = share(rows, ranks)
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    for lo in range(part.start, part.stop, 64):
        hi = min(lo + 64, part.stop)
        x = stream[lo * s.seq_len : hi * s.seq_len].view(-1, s.seq_len)
        y = stream[lo * s.seq_len + 1 : hi * s.seq_len + 1].view(-1, s.seq_len)
        loss = model(x, y).double()
        sums += torch.stack((loss * y.numel(), sizes.count(y, x).sum().double(), torch.full_like(loss, y.numel())))
    ranks.sum(sums)
    nats, size, n = sums.tolist()
    return nats / n, nats / math.log(2) / size


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def set_up(s: Settings, ranks: Ranks) -> None:
    random.seed(s.seed)
    np.random.seed(s.seed)
    torch.manual_seed(s.seed)
    torch.cuda.manual_seed_all(s.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if 8 % ranks.world:
        raise ValueError(f"world size {ranks.world} does not divide 8")


def describe(s: Settings, log: Log) -> None:
    log(Path(__file__).read_text(encoding="utf-8"), show=False)
    log(f"python {sys.version.split()[0]} torch {torch.__version__}")
    for f in fields(s):
        log(f"  {f.name} = {getattr(s, f.name)!r}", show=False)


def load_tokenizer(s: Settings) -> spm.SentencePieceProcessor:
    sp = spm.SentencePieceProcessor(model_file=s.tokenizer)
    if sp.vocab_size() != s.vocab:
        raise ValueError(f"the tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {s.vocab}")
    return sp


def build_model(s: Settings, ranks: Ranks) -> GPT:
    model = GPT(s).to(ranks.device)
    if ranks.on:
        for t in model.state_dict().values():
            dist.broadcast(t, 0)
    return model


def train_and_quantise(s: Settings, ranks: Ranks, log: Log, stream: Tensor, sizes: ByteTables) -> None:
    """Everything that is inside the 600 s of training: steps, averaging, Hessians, GPTQ."""
    raw = build_model(s, ranks)
    log(f"model_params:{sum(p.numel() for p in raw.parameters())} world_size:{ranks.world} seed:{s.seed}")
    model = torch.compile(raw, dynamic=False, fullgraph=True)
    warm_up(model, raw, s, ranks)
    feed = TrainFeed(s, ranks)
    ranks.barrier()
    clock = Clock()
    train(model, raw, s, ranks, log, clock, feed, lambda: plain_loss(raw, stream, sizes, s, ranks))
    hess = hessians(raw, feed, s, ranks)
    packed = quantise(raw, hess, s)
    spent = clock()
    log(f"train+quantise:{spent:.1f}s of {TRAIN_LIMIT:.0f}s peak:{torch.cuda.max_memory_allocated() >> 20}MiB")
    if spent > TRAIN_LIMIT:
        log("warning: the training budget is exceeded")
    write_artifact(packed, s, ranks, log)


def score_artifact(s: Settings, ranks: Ranks, log: Log, stream: Tensor, sizes: ByteTables) -> None:
    """The model comes from the file; nothing of the training is left."""
    model = GPT(s).to(ranks.device)
    model.load_state_dict(unpack(Path(s.artifact).read_bytes()))
    model.eval()
    clock = Clock()
    loss, bpb = plain_loss(model, stream, sizes, s, ranks)
    log(f"plain_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} time:{clock():.1f}s")
    hidden = torch.compile(model.hidden, dynamic=True)
    loss, bpb = evaluate(model, hidden, stream, sizes, s, ranks, log)
    spent = clock()
    log(f"eval_time:{spent:.1f}s of {EVAL_LIMIT:.0f}s")
    if spent > EVAL_LIMIT:
        log("warning: the evaluation budget is exceeded")
    log(f"final_stream val_loss:{loss:.4f} val_bpb:{bpb:.4f}")
    log(f"final_stream_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main() -> None:
    s, ranks = Settings(), Ranks()
    log = Log(ranks, s.run_id)
    set_up(s, ranks)
    describe(s, log)
    sp = load_tokenizer(s)
    sizes = byte_tables(sp, s.vocab, ranks.device)
    stream = validation_stream(s, ranks.device)
    log(f"validation tokens:{stream.numel()} train shards:{len(shards(s.data, s.train_glob))}")
    train_and_quantise(s, ranks, log, stream, sizes)
    torch.cuda.empty_cache()
    score_artifact(s, ranks, log, stream, sizes)
    ranks.close()


if __name__ == "__main__":
    main()
