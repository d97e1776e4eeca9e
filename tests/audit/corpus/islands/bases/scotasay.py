"""
Gated-delta-net / attention hybrid, written functionally.

Everything that changes is a value: parameters are dictionaries that go through `torch.func.functional_call`, training
state and evaluation state are frozen dataclasses, and a step is a function from a state to the next one. The only
stateful things left are the process group, the clock and the log file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Evaluation is an adaptive compressor: a block of validation tokens is scored with what is known from earlier blocks,
its sums are final, and only then do the low-rank deltas and the bigram cache see it.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import json
import lzma
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Params = dict[str, Tensor]
Apply = Callable[[Params, Tensor], Tensor]


# ----------------------------------------------------------------------------------------------------------------------
# settings


def env(name: str, default):
    """A setting of the default's type from the environment."""

    def read():
        raw = os.environ.get(name)
        if raw is None:
            return default
        if isinstance(default, bool):
            return raw.strip().lower() in ("1", "true", "yes")
        return type(default)(raw)

    return field(default_factory=read)


@dataclass(frozen=True)
class Config:
    # files
    data_path: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    artifact: str = env("ARTIFACT", "final_model.lzma")
    run_id: str = env("RUN_ID", "scotasay")
    seed: int = env("SEED", 1337)

    # shape
    vocab: int = env("VOCAB_SIZE", 1024)
    layers: int = env("NUM_LAYERS", 9)
    dim: int = env("MODEL_DIM", 512)
    heads: int = env("NUM_HEADS", 8)
    kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_hidden: int = env("MLP_HIDDEN", 1280)
    attn_every: int = env("ATTN_EVERY", 3)
    gdn_chunk: int = env("GDN_CHUNK", 64)
    rope_base: float = env("ROPE_BASE", 10000.0)
    softcap: float = env("LOGIT_SOFTCAP", 30.0)
    bos_id: int = env("BOS_ID", 1)

    # training
    iterations: int = env("ITERATIONS", 20000)
    max_seconds: float = env("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve_seconds: float = env("GPTQ_RESERVE_SECONDS", 24.0)
    seq_len: int = env("TRAIN_SEQ_LEN", 2048)
    batch_tokens: int = env("TRAIN_BATCH_TOKENS", 524288)
    warmup_steps: int = env("WARMUP_STEPS", 10)
    warmdown: int = env("WARMDOWN_ITERS", 2600)
    matrix_lr: float = env("MATRIX_LR", 0.025)
    embed_lr: float = env("EMBED_LR", 0.035)
    scalar_lr: float = env("SCALAR_LR", 0.02)
    muon_momentum: float = env("MUON_MOMENTUM", 0.97)
    muon_start: float = env("MUON_MOMENTUM_START", 0.88)
    muon_ramp: int = env("MUON_MOMENTUM_RAMP", 900)
    muon_steps: int = env("MUON_NS_STEPS", 5)
    muon_decay: float = env("MUON_WEIGHT_DECAY", 0.04)
    beta1: float = env("BETA1", 0.9)
    beta2: float = env("BETA2", 0.95)
    clip: float = env("GRAD_CLIP", 0.3)
    ema_decay: float = env("EMA_DECAY", 0.997)
    qat_below: float = env("QAT_BELOW_LR", 0.15)
    log_every: int = env("LOG_EVERY", 200)
    val_every: int = env("VAL_LOSS_EVERY", 2000)

    # quantisation
    bits: int = env("QUANT_BITS", 6)
    embed_bits: int = env("EMBED_BITS", 8)
    calib_batches: int = env("CALIB_BATCHES", 24)
    calib_rows: int = env("CALIB_ROWS", 8)
    gptq_block: int = env("GPTQ_BLOCK", 128)
    gptq_damp: float = env("GPTQ_DAMP", 0.01)
    budget: int = env("BUDGET_BYTES", 16_000_000)

    # evaluation
    eval_seconds: float = env("EVAL_SECONDS", 600.0)
    adapt_until: float = env("ADAPT_UNTIL_SECONDS", 520.0)
    stride: int = env("EVAL_STRIDE", 128)
    block_tokens: int = env("EVAL_BLOCK_TOKENS", 65536)
    window_batch: int = env("EVAL_WINDOW_BATCH", 64)
    delta_rank: int = env("DELTA_RANK", 8)
    delta_lr: float = env("DELTA_LR", 0.0008)
    delta_decay: float = env("DELTA_DECAY", 0.02)
    delta_epochs: int = env("DELTA_EPOCHS", 2)
    delta_on: bool = env("DELTA_ENABLED", True)
    cache_on: bool = env("CACHE_ENABLED", True)
    cache_top: float = env("CACHE_TOP", 0.06)
    cache_half: float = env("CACHE_HALF", 400.0)
    cache_prior: float = env("CACHE_PRIOR", 32.0)

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


# ----------------------------------------------------------------------------------------------------------------------
# processes, clock, log


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def join_world() -> World:
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % size:
        raise ValueError(f"WORLD_SIZE={size} must divide 8")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl", device_id=device)
        dist.barrier()
    return World(rank, size, device)


def summed(x: Tensor, world: World) -> Tensor:
    if world.size > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def agreed(flag: bool, world: World) -> bool:
    """True on every rank when it is true on any of them."""
    if world.size == 1:
        return flag
    box = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box.item())


def barrier(world: World) -> None:
    torch.cuda.synchronize()
    if world.size > 1:
        dist.barrier()


@dataclass
class Clock:
    """A stopwatch that can be held while something that does not count is measured."""

    spent: float = 0.0
    since: float | None = None

    def go(self) -> Clock:
        torch.cuda.synchronize()
        self.since = time.perf_counter()
        return self

    def hold(self) -> Clock:
        torch.cuda.synchronize()
        self.spent += time.perf_counter() - self.since
        self.since = None
        return self

    def read(self) -> float:
        return self.spent + (time.perf_counter() - self.since if self.since is not None else 0.0)


def make_log(cfg: Config, world: World) -> Callable[[str], None]:
    path = Path("logs") / f"{cfg.run_id}_{cfg.seed}.txt"
    if world.first:
        path.parent.mkdir(exist_ok=True)

    def log(text: str) -> None:
        if not world.first:
            return
        print(text, flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    return log


# ----------------------------------------------------------------------------------------------------------------------
# data

SHARD_MAGIC = 20240520
HEADER_INTS = 256


def read_shard(path: str) -> np.ndarray:
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != 1:
        raise ValueError(f"{path} is no token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path} holds {tokens.size} tokens, {count} were announced")
    return tokens


def shard_paths(pattern: str) -> list[str]:
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no shard matches {pattern}")
    return paths


def token_stream(pattern: str) -> Iterator[np.ndarray]:
    """The shards of a pattern in order, again and again."""
    paths = shard_paths(pattern)
    while True:
        for path in paths:
            yield read_shard(path)


def spans(pattern: str, length: int) -> Iterator[np.ndarray]:
    """Consecutive spans of `length` + 1 tokens; neighbours share the token between them."""
    stream = token_stream(pattern)
    held = np.zeros(0, dtype=np.uint16)
    while True:
        while held.size < length + 1:
            held = np.concatenate([held, next(stream)])
        yield held[: length + 1]
        held = held[length:]


def batches(pattern: str, rows: int, seq: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) of this rank: every rank reads the same span and keeps its own part of it."""
    part = rows * seq
    for span in spans(pattern, part * world.size):
        own = torch.from_numpy(span[world.rank * part : (world.rank + 1) * part + 1].astype(np.int64))
        own = own.pin_memory().to(world.device, non_blocking=True)
        yield own[:-1].view(rows, seq), own[1:].view(rows, seq)


def validation_tokens(cfg: Config, world: World) -> Tensor:
    tokens = np.concatenate([read_shard(path) for path in shard_paths(cfg.val_files)])
    return torch.from_numpy(tokens.astype(np.int32)).to(world.device)


# ----------------------------------------------------------------------------------------------------------------------
# bytes


@dataclass(frozen=True)
class ByteTable:
    """How many bytes of text a token stands for. A leading space is no byte of the text after a silent token."""

    base: Tensor
    spaced: Tensor
    silent: Tensor

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        return self.base[target] + (self.spaced[target] & ~self.silent[prev]).to(self.base.dtype)


def byte_table(cfg: Config, world: World) -> ByteTable:
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer)
    pieces = int(sp.vocab_size())
    if pieces != cfg.vocab:
        raise ValueError(f"the tokenizer has {pieces} pieces, the model {cfg.vocab}")
    base = np.zeros(pieces, dtype=np.int64)
    spaced = np.zeros(pieces, dtype=bool)
    silent = np.ones(pieces, dtype=bool)
    for i in range(pieces):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        silent[i] = False
        if sp.is_byte(i):
            base[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            spaced[i] = True
            piece = piece[1:]
        base[i] = len(piece.encode("utf-8"))
    on = [torch.from_numpy(a).to(world.device) for a in (base, spaced, silent)]
    return ByteTable(*on)


# ----------------------------------------------------------------------------------------------------------------------
# model: modules hold shapes and initial values only; the values in use are always passed in


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Proj(nn.Linear):
    """A linear map without bias, its float32 weight cast to the activations' type."""

    def __init__(self, fan_in: int, fan_out: int, zero: bool = False):
        super().__init__(fan_in, fan_out, bias=False)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotary(length: int, dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    freq = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), freq)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.heads, self.kv, self.hd, self.base = cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.rope_base
        self.q = Proj(cfg.dim, cfg.dim)
        self.k = Proj(cfg.dim, cfg.kv_heads * cfg.head_dim)
        self.v = Proj(cfg.dim, cfg.kv_heads * cfg.head_dim)
        self.o = Proj(cfg.dim, cfg.dim, zero=True)
        self.gain = nn.Parameter(torch.full((cfg.heads,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.q(x).view(b, t, self.heads, self.hd).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv, self.hd).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv, self.hd).transpose(1, 2)
        cos, sin = rotary(t, self.hd, self.base, x.device)
        q = rotate(rms(q), cos, sin) * self.gain.to(x.dtype)[None, :, None, None]
        k = rotate(rms(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != self.heads)
        return self.o(y.transpose(1, 2).reshape(b, t, d))


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, chunk: int) -> Tensor:
    """
    The gated delta rule S_t = a_t S_{t-1} (I - b_t k_t k_t') + b_t v_t k_t', o_t = S_t q_t, chunk by chunk.

    q, k, v: [batch, heads, time, width] in float32; beta: [batch, heads, time]; decay: log a_t, same shape.
    Inside a chunk the updates are folded into one triangular system, between chunks the state is carried.
    """
    b, h, t, w = q.shape
    pad = -t % chunk
    if pad:
        q, k, v = (F.pad(z, (0, 0, 0, pad)) for z in (q, k, v))
        beta, decay = (F.pad(z, (0, pad)) for z in (beta, decay))
    n = (t + pad) // chunk
    q, k, v = (z.reshape(b, h, n, chunk, w) for z in (q * w**-0.5, k, v))
    beta = beta.reshape(b, h, n, chunk, 1)
    run = decay.reshape(b, h, n, chunk).cumsum(-1)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    gap = (run[..., :, None] - run[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    eye = torch.eye(chunk, device=q.device, dtype=q.dtype)
    system = ((k * beta) @ k.mT * gap).tril(-1) + eye
    fresh = torch.linalg.solve_triangular(system, v * beta, upper=False, unitriangular=True)
    carry = torch.linalg.solve_triangular(system, k * beta * run.exp()[..., None], upper=False, unitriangular=True)
    inside = (q @ k.mT) * gap
    tail = (run[..., -1:] - run).exp()[..., None]
    state = q.new_zeros(b, h, w, w)
    out = []
    for i in range(n):
        new = fresh[:, :, i] - carry[:, :, i] @ state
        out.append((q[:, :, i] * run[:, :, i].exp()[..., None]) @ state + inside[:, :, i] @ new)
        state = state * run[:, :, i, -1].exp()[..., None, None] + (k[:, :, i] * tail[:, :, i]).mT @ new
    return torch.stack(out, dim=2).reshape(b, h, n * chunk, w)[:, :, :t]


class GatedDelta(nn.Module):
    """A gated delta net: linear memory with a learned decay and a learned write strength per head."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.heads, self.hd, self.chunk = cfg.heads, cfg.head_dim, cfg.gdn_chunk
        self.q = Proj(cfg.dim, cfg.dim)
        self.k = Proj(cfg.dim, cfg.dim)
        self.v = Proj(cfg.dim, cfg.dim)
        self.gate = Proj(cfg.dim, cfg.dim)
        self.rates = Proj(cfg.dim, 2 * cfg.heads)
        self.o = Proj(cfg.dim, cfg.dim, zero=True)
        self.log_a = nn.Parameter(torch.empty(cfg.heads).uniform_(1, 8).log())
        self.dt_bias = nn.Parameter(torch.full((cfg.heads,), -4.0))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        shape = (b, t, self.heads, self.hd)
        q, k, v = (F.silu(p(x)).view(shape).transpose(1, 2).float() for p in (self.q, self.k, self.v))
        write, step = self.rates(x).float().transpose(1, 2).chunk(2, dim=1)
        decay = -self.log_a.exp()[None, :, None] * F.softplus(step + self.dt_bias[None, :, None])
        with torch.autocast("cuda", enabled=False):
            y = delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, write.sigmoid(), decay, self.chunk)
        y = rms(y).to(x.dtype).transpose(1, 2).reshape(b, t, d)
        return self.o(y * F.silu(self.gate(x)))


class Mlp(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.up = Proj(cfg.dim, cfg.mlp_hidden)
        self.down = Proj(cfg.mlp_hidden, cfg.dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Layer(nn.Module):
    def __init__(self, cfg: Config, index: int):
        super().__init__()
        self.mixer = Attention(cfg) if index % cfg.attn_every == cfg.attn_every - 1 else GatedDelta(cfg)
        self.mlp = Mlp(cfg)
        self.mix_scale = nn.Parameter(torch.ones(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.dim))
        self.blend = nn.Parameter(torch.stack([torch.ones(cfg.dim), torch.zeros(cfg.dim)]))
        self.shrink = (index + 1) ** -0.5

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        blend = self.blend.to(x.dtype)
        x = blend[0] * x + blend[1] * x0
        x = x + self.mix_scale.to(x.dtype) * self.mixer(rms(x) * self.shrink)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.shrink)


class Smear(nn.Module):
    """Adds some of the previous token's embedding, except to the first token of a document."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.bos = cfg.bos_id
        self.weight = nn.Parameter(torch.zeros(cfg.dim))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        inner = (tokens != self.bos).to(x.dtype)[..., None]
        return x + self.weight.sigmoid().to(x.dtype) * 0.2 * inner * before


class HybridLM(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cap = cfg.softcap
        self.embed = nn.Embedding(cfg.vocab, cfg.dim)
        nn.init.normal_(self.embed.weight, std=0.005)
        self.smear = Smear(cfg)
        self.layers = nn.ModuleList(Layer(cfg, i) for i in range(cfg.layers))
        half = cfg.layers // 2
        self.skips = nn.Parameter(torch.ones(half, cfg.dim))

    def forward(self, tokens: Tensor) -> Tensor:
        x = rms(F.embedding(tokens, self.embed.weight).bfloat16())
        x = x0 = self.smear(x, tokens)
        kept, half = [], self.skips.size(0)
        for i, layer in enumerate(self.layers):
            if i < half:
                kept.append(x)
            elif i >= len(self.layers) - half:
                x = x + self.skips[len(self.layers) - 1 - i].to(x.dtype) * kept.pop()
            x = layer(x, x0)
        logits = F.linear(rms(x), self.embed.weight.to(x.dtype))
        return self.cap * torch.tanh(logits / self.cap)


def initial_params(model: nn.Module, world: World) -> Params:
    """The module's values as a dictionary, the same on every rank."""
    params = {name: p.detach().clone().float().to(world.device) for name, p in model.named_parameters()}
    if world.size > 1:
        for p in params.values():
            dist.broadcast(p, 0)
    return params


def make_apply(model: nn.Module, compiled: bool = True) -> Apply:
    """tokens -> logits as a pure function of the parameters."""

    def apply(params: Params, tokens: Tensor) -> Tensor:
        return functional_call(model, params, (tokens,))

    return torch.compile(apply, dynamic=False) if compiled else apply


def mean_loss(apply: Apply, params: Params, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = apply(params, x)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def is_matrix(name: str, p: Tensor) -> bool:
    return p.ndim == 2 and name.startswith("layers.") and name.endswith(".weight")


# ----------------------------------------------------------------------------------------------------------------------
# optimisation: (state, gradients) -> state


@dataclass(frozen=True)
class TrainState:
    step: int
    params: Params
    momentum: Params
    first: Params
    second: Params
    ema: Params


def initial_state(params: Params) -> TrainState:
    matrices = {n: p for n, p in params.items() if is_matrix(n, p)}
    others = {n: p for n, p in params.items() if n not in matrices}
    return TrainState(
        step=0,
        params={n: p.clone() for n, p in params.items()},
        momentum={n: torch.zeros_like(p) for n, p in matrices.items()},
        first={n: torch.zeros_like(p) for n, p in others.items()},
        second={n: torch.zeros_like(p) for n, p in others.items()},
        ema={n: p.clone() for n, p in params.items()},
    )


@torch.compile
def orthogonal(g: Tensor, steps: int) -> Tensor:
    """The nearest semi-orthogonal matrix by Newton-Schulz iteration in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon(cfg: Config, state: TrainState, grads: Params, lr: float, world: World) -> tuple[Params, Params]:
    """New matrices and new momenta. The iterations are shared out over the ranks, the results summed up."""
    names = list(state.momentum)
    ramp = min(state.step / max(cfg.muon_ramp, 1), 1.0)
    beta = (1 - ramp) * cfg.muon_start + ramp * cfg.muon_momentum
    momentum = {n: state.momentum[n].lerp(grads[n], 1 - beta) for n in names}
    sizes = [state.params[n].numel() for n in names]
    flat = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=world.device)
    for i, (n, part) in enumerate(zip(names, flat.split(sizes), strict=True)):
        if i % world.size == world.rank:
            g = grads[n].lerp(momentum[n], beta)
            part.copy_((orthogonal(g, cfg.muon_steps) * max(1.0, g.size(0) / g.size(1)) ** 0.5).flatten())
    flat = summed(flat, world)
    fresh = {}
    for n, part in zip(names, flat.split(sizes), strict=True):
        p = state.params[n]
        fresh[n] = p * (1 - lr * cfg.muon_decay) - lr * part.view_as(p).float()
    return fresh, momentum


def adam(cfg: Config, state: TrainState, grads: Params, scale: float) -> tuple[Params, Params, Params]:
    t = state.step + 1
    fresh, first, second = {}, {}, {}
    for n in state.first:
        lr = scale * (cfg.embed_lr if n == "embed.weight" else cfg.scalar_lr)
        first[n] = state.first[n].lerp(grads[n], 1 - cfg.beta1)
        second[n] = state.second[n].lerp(grads[n].square(), 1 - cfg.beta2)
        up = (first[n] / (1 - cfg.beta1**t)) / ((second[n] / (1 - cfg.beta2**t)).sqrt() + 1e-8)
        fresh[n] = state.params[n] - lr * up
    return fresh, first, second


def averaged(grads: Params, world: World) -> Params:
    if world.size == 1:
        return grads
    flat = summed(torch.cat([g.flatten() for g in grads.values()]), world) / world.size
    parts = flat.split([g.numel() for g in grads.values()])
    return {n: part.view_as(g) for (n, g), part in zip(grads.items(), parts, strict=True)}


def clipped(grads: Params, limit: float) -> Params:
    if limit <= 0:
        return grads
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return {n: g * factor for n, g in grads.items()}


def fake_quant(params: Params, bits: int) -> Params:
    """The matrices rounded row by row, with gradients straight through."""
    top = 2 ** (bits - 1) - 1
    out = dict(params)
    for n, p in params.items():
        if is_matrix(n, p):
            scale = p.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / top
            out[n] = p + ((p.detach() / scale).round() * scale - p.detach())
    return out


def gradients(cfg: Config, apply: Apply, params: Params, data, world: World, qat: bool) -> tuple[Tensor, Params]:
    micro = 8 // world.size
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    loss = torch.zeros((), device=world.device)
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for _ in range(micro):
        x, y = next(data)
        part = mean_loss(apply, fake_quant(leaves, cfg.bits) if qat else leaves, x, y) / micro
        for n, g in zip(leaves, torch.autograd.grad(part, list(leaves.values())), strict=True):
            total[n] += g
        loss += part.detach()
    return loss, averaged(total, world)


@torch.no_grad()
def advanced(cfg: Config, state: TrainState, grads: Params, scale: float, world: World) -> TrainState:
    grads = clipped(grads, cfg.clip)
    matrices, momentum = muon(cfg, state, grads, cfg.matrix_lr * scale, world)
    others, first, second = adam(cfg, state, grads, scale)
    params = {n: matrices[n] if n in matrices else others[n] for n in state.params}
    ema = {n: state.ema[n].lerp(params[n], 1 - cfg.ema_decay) for n in params}
    return TrainState(state.step + 1, params, momentum, first, second, ema)


def lr_scale(cfg: Config, step: int, seconds: float) -> float:
    """1, then linearly down to 0 over the last `warmdown` steps, counted in time where the clock ends the training."""
    if cfg.warmdown <= 0:
        return 1.0
    if cfg.max_seconds <= 0:
        return min(1.0, max(cfg.iterations - step, 0) / cfg.warmdown)
    per_step = seconds / max(step, 1)
    left = max(train_limit(cfg) - seconds, 0.0)
    return min(1.0, left / max(cfg.warmdown * per_step, 1e-9))


def train_limit(cfg: Config) -> float:
    """The second at which the last step must be over, so that calibration still fits in."""
    return cfg.max_seconds - cfg.reserve_seconds


def warm_up(cfg: Config, apply: Apply, params: Params, world: World) -> None:
    """Compiles everything on random tokens; what is computed is thrown away."""
    rows = cfg.batch_tokens // (8 * cfg.seq_len)
    maker = torch.Generator(device=world.device).manual_seed(cfg.seed)

    def noise() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randint(cfg.vocab, (rows, cfg.seq_len + 1), generator=maker, device=world.device)
            yield x[:, :-1].contiguous(), x[:, 1:].contiguous()

    state, data = initial_state(params), noise()
    for i in range(cfg.warmup_steps):
        _, grads = gradients(cfg, apply, state.params, data, world, qat=i % 2 == 1)
        state = advanced(cfg, state, grads, 1.0, world)


def train(cfg: Config, apply: Apply, params: Params, val: Tensor, table: ByteTable, world: World, log) -> tuple:
    """Trains until the clock or the steps run out. Returns the last state and the running clock."""
    rows = cfg.batch_tokens // (8 * cfg.seq_len)
    data = batches(cfg.train_files, rows, cfg.seq_len, world)
    state = initial_state(params)
    clock = Clock().go()
    while True:
        over = state.step >= cfg.iterations or (cfg.max_seconds > 0 and clock.read() >= train_limit(cfg))
        if agreed(over, world):
            break
        if cfg.val_every > 0 and state.step % cfg.val_every == 0:
            clock.hold()
            loss, bpb = plain_bpb(cfg, apply, state.params, val, table, world)
            log(f"step:{state.step} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{clock.read() * 1000:.0f}ms")
            clock.go()
        scale = lr_scale(cfg, state.step, clock.read())
        loss, grads = gradients(cfg, apply, state.params, data, world, qat=scale < cfg.qat_below)
        state = advanced(cfg, state, grads, scale, world)
        if state.step <= 10 or state.step % cfg.log_every == 0:
            now = clock.read() * 1000
            log(
                f"step:{state.step}/{cfg.iterations} train_loss:{loss.item():.4f} "
                f"train_time:{now:.0f}ms step_avg:{now / state.step:.2f}ms"
            )
    log(f"stopped at step:{state.step} train_time:{clock.read() * 1000:.0f}ms")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024**2} MiB")
    return state, clock


# ----------------------------------------------------------------------------------------------------------------------
# calibration and quantisation


def taps(model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps whose inputs matter, by the name of their weight."""
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Proj)}


@torch.no_grad()
def hessians(cfg: Config, model: nn.Module, params: Params, data, world: World) -> Params:
    """Second moments of every linear map's inputs over batches of training data, summed over the ranks."""
    sums: Params = {}

    def watch(name: str):
        def hook(_module, inputs):
            x = inputs[0].detach().flatten(0, 1).float()
            sums[name] = sums[name] + x.mT @ x if name in sums else x.mT @ x

        return hook

    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in taps(model).items()]
    seen = 0
    for _ in range(cfg.calib_batches):
        x, _ = next(data)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            functional_call(model, params, (x,))
        seen += x.numel()
    for hook in hooks:
        hook.remove()
    return {n: summed(h, world) / (seen * world.size) for n, h in sums.items()}


@dataclass(frozen=True)
class Coded:
    """A matrix as whole numbers and a scale for each row."""

    codes: Tensor
    scale: Tensor

    def value(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]


def row_scales(w: Tensor, bits: int) -> Tensor:
    """The clipping of each row that rounds it best, out of a few."""
    top = 2 ** (bits - 1) - 1
    peak = w.abs().amax(dim=1).clamp_min(1e-8)
    best, error = peak / top, torch.full_like(peak, float("inf"))
    for ratio in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        scale = peak * ratio / top
        off = ((w / scale[:, None]).round().clamp(-top - 1, top) * scale[:, None] - w).square().sum(dim=1)
        best, error = torch.where(off < error, scale, best), torch.minimum(off, error)
    return best.half().float().clamp_min(1e-7)


def rounded(w: Tensor, bits: int) -> Coded:
    top = 2 ** (bits - 1) - 1
    scale = row_scales(w, bits)
    codes = (w / scale[:, None]).round().clamp(-top - 1, top)
    return Coded(codes.to(torch.int8), scale.half())


def gptq(cfg: Config, w: Tensor, hessian: Tensor) -> Coded:
    """Rounds column by column and moves each column's error on to those that follow."""
    top = 2 ** (cfg.bits - 1) - 1
    w, h = w.clone().float(), hessian.clone().float()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(cfg.gptq_damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale = row_scales(w, cfg.bits)
    codes = torch.zeros_like(w)
    for a in range(0, w.size(1), cfg.gptq_block):
        b = min(a + cfg.gptq_block, w.size(1))
        errors = torch.zeros_like(w[:, a:b])
        for j in range(a, b):
            codes[:, j] = (w[:, j] / scale).round().clamp(-top - 1, top)
            off = (w[:, j] - codes[:, j] * scale) / upper[j, j]
            w[:, j:b] -= off[:, None] * upper[j, j:b][None]
            errors[:, j - a] = off
        w[:, b:] -= errors @ upper[a:b, b:]
    return Coded(codes[:, order.argsort()].to(torch.int8), scale.half())


@dataclass(frozen=True)
class Packed:
    """What the artifact holds: coded matrices, small tensors in half precision and one temperature."""

    coded: dict[str, Coded]
    small: Params
    temperature: float


@torch.no_grad()
def quantised(cfg: Config, params: Params, moments: Params, temperature: float, world: World) -> Packed:
    """Codes the matrices; the work is shared out over the ranks and every rank ends up with all of it."""
    names = [n for n, p in params.items() if is_matrix(n, p)]
    coded: dict[str, Coded] = {}
    for i, n in enumerate(names):
        w = params[n]
        if i % world.size == world.rank:
            coded[n] = gptq(cfg, w, moments[n])
        else:
            coded[n] = Coded(
                torch.zeros(w.shape, dtype=torch.int8, device=w.device),
                torch.zeros(w.size(0), dtype=torch.float16, device=w.device),
            )
    if world.size > 1:
        for i, n in enumerate(names):
            dist.broadcast(coded[n].codes, i % world.size)
            dist.broadcast(coded[n].scale, i % world.size)
    coded["embed.weight"] = rounded(params["embed.weight"], cfg.embed_bits)
    small = {n: p.half() for n, p in params.items() if n not in coded}
    return Packed(coded, small, temperature)


@torch.no_grad()
def fitted_temperature(cfg: Config, apply: Apply, params: Params, data, world: World) -> float:
    """The scale of the logits that suits some batches of training data best."""
    grid = [0.94 + 0.01 * i for i in range(13)]
    sums = torch.zeros(len(grid), dtype=torch.float64, device=world.device)
    for _ in range(4):
        x, y = next(data)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = apply(params, x).float().flatten(0, 1)
        for i, t in enumerate(grid):
            sums[i] += F.cross_entropy(logits / t, y.flatten()).double()
    return grid[int(summed(sums, world).argmin())]


# ----------------------------------------------------------------------------------------------------------------------
# the artifact


def shuffled(raw: bytes, width: int) -> bytes:
    """Bytes of equal significance next to each other, which is easier to compress."""
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, width).T.tobytes()


def unshuffled(raw: bytes, width: int) -> bytes:
    return np.frombuffer(raw, dtype=np.uint8).reshape(width, -1).T.tobytes()


def serialised(packed: Packed) -> bytes:
    """A JSON index, its length before it, and the tensors' bytes after it, all of it compressed."""
    index, body = [], io.BytesIO()

    def put(kind: str, name: str, t: Tensor) -> None:
        t = t.detach().cpu().contiguous()
        raw = t.numpy().tobytes()
        body.write(shuffled(raw, t.element_size()))
        index.append([kind, name, list(t.shape), str(t.dtype).removeprefix("torch.")])

    for name in sorted(packed.coded):
        put("codes", name, packed.coded[name].codes)
    for name in sorted(packed.coded):
        put("scale", name, packed.coded[name].scale)
    for name in sorted(packed.small):
        put("small", name, packed.small[name])
    head = json.dumps({"temperature": packed.temperature, "tensors": index}, separators=(",", ":")).encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    plain = len(head).to_bytes(4, "little") + head + body.getvalue()
    return lzma.compress(plain, format=lzma.FORMAT_XZ, filters=filters)


def deserialised(blob: bytes, device: torch.device) -> Packed:
    plain = lzma.decompress(blob)
    size = int.from_bytes(plain[:4], "little")
    head = json.loads(plain[4 : 4 + size])
    at, found = 4 + size, {"codes": {}, "scale": {}, "small": {}}
    for kind, name, shape, dtype in head["tensors"]:
        kind_of = np.dtype(dtype)
        count = math.prod(shape) * kind_of.itemsize
        raw = unshuffled(plain[at : at + count], kind_of.itemsize)
        array = np.frombuffer(raw, dtype=kind_of).reshape(shape).copy()
        found[kind][name] = torch.from_numpy(array).to(device)
        at += count
    coded = {n: Coded(c, found["scale"][n]) for n, c in found["codes"].items()}
    return Packed(coded, found["small"], float(head["temperature"]))


def unpacked(packed: Packed) -> Params:
    values = {n: c.value() for n, c in packed.coded.items()}
    return values | {n: p.float() for n, p in packed.small.items()}


def pruned(packed: Packed, share: float) -> Packed:
    """Sets a share of the codes of size one to zero, those with the smallest scales first."""
    ones = [(c.codes.abs() == 1, c.scale.float()[:, None].expand(c.codes.shape)) for c in packed.coded.values()]
    costs = torch.cat([scale[on] for on, scale in ones])
    if share <= 0 or costs.numel() == 0:
        return packed
    limit = costs.sort().values[min(int(share * costs.numel()), costs.numel() - 1)]
    coded = {}
    for n, c in packed.coded.items():
        off = (c.codes.abs() == 1) & (c.scale.float()[:, None] < limit)
        coded[n] = replace(c, codes=c.codes.masked_fill(off, 0))
    return replace(packed, coded=coded)


def write_artifact(cfg: Config, packed: Packed, world: World, log) -> None:
    """Rank 0 writes the artifact, pruned as far as it must be to leave room for this file."""
    if world.first:
        code = len(Path(__file__).read_bytes())
        for share in (0.0, 0.1, 0.2, 0.35, 0.5, 0.75):
            blob = serialised(pruned(packed, share))
            log(f"pruned share:{share} model:{len(blob)} bytes")
            if len(blob) + code <= cfg.budget:
                break
        total = len(blob) + code
        Path(cfg.artifact).write_bytes(blob)
        log(f"Serialized model: {len(blob)} bytes")
        log(f"Code size: {code} bytes")
        log(f"Total submission size: {total} bytes")
        if total > cfg.budget:
            raise SystemExit(f"{total} bytes are more than {cfg.budget}")
    barrier(world)


# ----------------------------------------------------------------------------------------------------------------------
# evaluation: blocks, windows, sums


@dataclass(frozen=True)
class Block:
    """Positions first..last-1 of the stream; position i is the prediction of token i + 1 from tokens 0..i."""

    index: int
    first: int
    last: int


@dataclass(frozen=True)
class Window:
    """One forward pass: tokens low..last-1 are read, the positions first..last-1 are scored."""

    low: int
    first: int
    last: int


def blocks_of(positions: int, size: int) -> Iterator[Block]:
    for index, first in enumerate(range(0, positions, size)):
        yield Block(index, first, min(first + size, positions))


def windows_of(block: Block, stride: int, seq: int) -> list[Window]:
    found = []
    for first in range(block.first, block.last, stride):
        last = min(first + stride, block.last)
        found.append(Window(max(0, last - seq), first, last))
    return found


@dataclass(frozen=True)
class View:
    """Windows as tensors of one shape. Rows of `take` beyond a window's positions are off in `on`."""

    inputs: Tensor
    take: Tensor
    on: Tensor
    prev: Tensor
    target: Tensor


def view_of(windows: list[Window], tokens: Tensor, rows: int, stride: int, seq: int) -> View:
    device = tokens.device
    padded = windows + [Window(0, 0, 0)] * (rows - len(windows))
    low, first, last = (torch.tensor([getattr(w, k) for w in padded], device=device) for k in ("low", "first", "last"))
    at = low[:, None] + torch.arange(seq, device=device)
    inputs = torch.where(at < last[:, None], tokens[at.clamp(max=tokens.numel() - 1)].long(), 0)
    here = first[:, None] + torch.arange(stride, device=device)
    on = here < last[:, None]
    here = torch.where(on, here, 0)
    take = torch.where(on, here - low[:, None], 0)
    return View(inputs, take, on, tokens[here].long(), tokens[here + 1].long())


@dataclass(frozen=True)
class Scored:
    """What one rank found for its windows of a block: sums in float64 that nothing changes any more."""

    block: Block
    nats: Tensor
    tokens: Tensor
    bytes: Tensor


@dataclass(frozen=True)
class Total:
    loss: float
    bpb: float
    tokens: int
    bytes: int


class Reducer:
    """Adds up scored blocks in their order and, at the end, over the ranks."""

    def __init__(self, world: World):
        self.world = world

    def zero(self) -> tuple[Tensor, int]:
        return torch.zeros(3, dtype=torch.float64, device=self.world.device), 0

    def add(self, sums: tuple[Tensor, int], scored: Scored) -> tuple[Tensor, int]:
        vector, cursor = sums
        if scored.block.first != cursor:
            raise RuntimeError(f"position {scored.block.first} was scored where {cursor} was due")
        part = torch.stack([scored.nats, scored.tokens.double(), scored.bytes.double()])
        return vector + part, scored.block.last

    def finish(self, sums: tuple[Tensor, int], positions: int) -> Total:
        vector, cursor = sums
        nats, count, size = summed(vector.clone(), self.world).tolist()
        if cursor != positions or int(count) != positions:
            raise RuntimeError(f"{int(count)} positions were scored, {positions} were due")
        return Total(nats / count, nats / math.log(2) / size, int(count), int(size))


@torch.no_grad()
def plain_bpb(cfg, apply: Apply, params: Params, val: Tensor, table: ByteTable, world: World) -> tuple[float, float]:
    """Neighbouring windows without overlap, nothing adapted: for the log."""
    seq, rows = cfg.seq_len, cfg.window_batch // 2
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    starts = range(world.rank * seq, val.numel() - 1, world.size * seq)
    windows = [Window(a, a, min(a + seq, val.numel() - 1)) for a in starts]
    for i in range(0, len(windows), rows):
        view = view_of(windows[i : i + rows], val, rows, seq, seq)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = apply(params, view.inputs)
        nll = F.cross_entropy(logits.float().flatten(0, 1), view.target.flatten(), reduction="none").view_as(view.on)
        sums[0] += nll[view.on].double().sum()
        sums[1] += view.on.sum()
        sums[2] += table.count(view.prev, view.target)[view.on].sum()
    nats, count, size = summed(sums, world).tolist()
    return nats / count, nats / math.log(2) / size


# ----------------------------------------------------------------------------------------------------------------------
# evaluation: the bigram cache


@dataclass(frozen=True)
class Cache:
    """Counts of the tokens, and of the pairs of tokens, in the blocks that are scored already."""

    single: Tensor
    pair: Tensor


def empty_cache(cfg: Config, world: World) -> Cache:
    return Cache(
        torch.zeros(cfg.vocab, device=world.device),
        torch.zeros(cfg.vocab, cfg.vocab, device=world.device),
    )


def with_block(cache: Cache, tokens: Tensor, block: Block) -> Cache:
    prev, target = tokens[block.first : block.last].long(), tokens[block.first + 1 : block.last + 1].long()
    vocab = cache.single.numel()
    pair = torch.bincount(prev * vocab + target, minlength=vocab * vocab).view(vocab, vocab)
    return Cache(cache.single + torch.bincount(target, minlength=vocab), cache.pair + pair)


def cache_distribution(cfg: Config, cache: Cache, prev: Tensor) -> tuple[Tensor, Tensor]:
    """For each context a distribution over the vocabulary, and how much it is trusted. Neither knows the target."""
    prior = (cache.single + 1) / (cache.single + 1).sum()
    row = cache.pair[prev]
    seen = row.sum(dim=-1, keepdim=True)
    probs = (row + cfg.cache_prior * prior) / (seen + cfg.cache_prior)
    trust = cfg.cache_top * seen / (seen + cfg.cache_half)
    return probs, trust


def log_mixture(cfg: Config, logits: Tensor, prev: Tensor, cache: Cache | None) -> Tensor:
    """Logarithms of the mixed distribution over the whole vocabulary."""
    log_p = F.log_softmax(logits, dim=-1)
    if cache is None:
        return log_p
    probs, trust = cache_distribution(cfg, cache, prev)
    return torch.log((1 - trust) * log_p.exp() + trust * probs)


# ----------------------------------------------------------------------------------------------------------------------
# evaluation: low-rank deltas


@dataclass(frozen=True)
class Deltas:
    """Low-rank additions to some matrices, with Adam's moments. `down` is random, `up` starts at zero."""

    step: int
    values: Params
    first: Params
    second: Params


def delta_targets(params: Params) -> list[str]:
    ends = ("mixer.q.weight", "mixer.v.weight", "mixer.o.weight", "mlp.down.weight")
    return [n for n in params if n.startswith("layers.") and n.endswith(ends)]


def fresh_deltas(cfg: Config, params: Params) -> Deltas:
    maker = torch.Generator(device="cpu").manual_seed(cfg.seed)
    values: Params = {}
    for n in delta_targets(params):
        out, width = params[n].shape
        down = torch.randn(cfg.delta_rank, width, generator=maker) * width**-0.5
        values[f"{n}:down"] = down.to(params[n].device)
        values[f"{n}:up"] = torch.zeros(out, cfg.delta_rank, device=params[n].device)
    return Deltas(
        step=0,
        values=values,
        first={n: torch.zeros_like(v) for n, v in values.items()},
        second={n: torch.zeros_like(v) for n, v in values.items()},
    )


def merged(params: Params, values: Params) -> Params:
    out = dict(params)
    for n in {key.partition(":")[0] for key in values}:
        out[n] = params[n] + values[f"{n}:up"] @ values[f"{n}:down"]
    return out


@dataclass(frozen=True)
class EvalState:
    """Everything that may differ from one block to the next."""

    deltas: Deltas
    cache: Cache | None
    adapting: bool = True


class Scorer(Protocol):
    def score(self, state: EvalState, block: Block) -> Scored: ...


@dataclass(frozen=True)
class WindowScorer:
    """Scores a block's windows, this rank's share of them, with the state as it is."""

    cfg: Config
    apply: Apply
    params: Params
    tokens: Tensor
    table: ByteTable
    temperature: float
    world: World

    @torch.no_grad()
    def score(self, state: EvalState, block: Block) -> Scored:
        cfg, rows = self.cfg, self.cfg.window_batch
        params = merged(self.params, state.deltas.values)
        own = windows_of(block, cfg.stride, cfg.seq_len)[self.world.rank :: self.world.size]
        nats = torch.zeros((), dtype=torch.float64, device=self.world.device)
        count, size = torch.zeros_like(nats), torch.zeros_like(nats)
        for i in range(0, len(own), rows):
            view = view_of(own[i : i + rows], self.tokens, rows, cfg.stride, cfg.seq_len)
            log_p = self.log_probs(params, view, state.cache)
            nll = -log_p.gather(-1, view.target[..., None]).squeeze(-1)
            nats += nll[view.on].double().sum()
            count += view.on.sum()
            size += self.table.count(view.prev, view.target)[view.on].sum()
        return Scored(block, nats, count, size)

    def log_probs(self, params: Params, view: View, cache: Cache | None) -> Tensor:
        """[windows, stride, vocabulary]: for every scored position the whole distribution."""
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = self.apply(params, view.inputs)
        picked = logits.gather(1, view.take[..., None].expand(-1, -1, logits.size(-1))).float()
        return log_mixture(self.cfg, picked / self.temperature, view.prev, cache)


@dataclass(frozen=True)
class Adapter:
    """Trains the deltas on a block. To be called with blocks whose scores are final."""

    cfg: Config
    apply: Apply
    params: Params
    tokens: Tensor
    world: World

    def rows(self, block: Block) -> tuple[Tensor, Tensor]:
        """This rank's sequences of the block: inputs and targets, all of them scored positions."""
        seq = self.cfg.seq_len
        whole = (block.last - block.first) // seq
        span = self.tokens[block.first : block.first + whole * seq + 1].long()
        x, y = span[:-1].view(whole, seq), span[1:].view(whole, seq)
        return x[self.world.rank :: self.world.size], y[self.world.rank :: self.world.size]

    def rate(self, block: Block) -> float:
        """Falls along the stream, from the first block to the last, by a cosine."""
        share = block.first / max(self.tokens.numel() - 1, 1)
        return self.cfg.delta_lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))

    def update(self, deltas: Deltas, block: Block) -> Deltas:
        x, y = self.rows(block)
        for _ in range(self.cfg.delta_epochs):
            leaves = {n: v.detach().requires_grad_() for n, v in deltas.values.items()}
            if x.numel():
                loss = mean_loss(self.apply, merged(self.params, leaves), x, y)
                found = torch.autograd.grad(loss, list(leaves.values()))
            else:
                found = [torch.zeros_like(v) for v in leaves.values()]
            grads = averaged(dict(zip(leaves, found, strict=True)), self.world)
            deltas = self.stepped(deltas, clipped(grads, 1.0), self.rate(block))
        return deltas

    @torch.no_grad()
    def stepped(self, deltas: Deltas, grads: Params, lr: float) -> Deltas:
        t, cfg = deltas.step + 1, self.cfg
        first = {n: m.lerp(grads[n], 0.1) for n, m in deltas.first.items()}
        second = {n: m.lerp(grads[n].square(), 0.01) for n, m in deltas.second.items()}
        values = {}
        for n, v in deltas.values.items():
            up = (first[n] / (1 - 0.9**t)) / ((second[n] / (1 - 0.99**t)).sqrt() + 1e-8)
            values[n] = v * (1 - lr * cfg.delta_decay) - lr * up
        return Deltas(t, values, first, second)


def absorbed(state: EvalState, block: Block, adapter: Adapter, clock: Clock, world: World) -> EvalState:
    """The state after a scored block. Adaptation ends when its time is up; the cache goes on."""
    cfg = adapter.cfg
    adapting = state.adapting and not agreed(clock.read() > cfg.adapt_until, world)
    deltas = adapter.update(state.deltas, block) if adapting and cfg.delta_on else state.deltas
    cache = None if state.cache is None else with_block(state.cache, adapter.tokens, block)
    return EvalState(deltas, cache, adapting)


def scored_blocks(
    state: EvalState, blocks: Iterator[Block], scorer: Scorer, adapter: Adapter, clock: Clock, world: World
) -> Iterator[tuple[Scored, EvalState]]:
    """Yields each block's score with the state that it was made with, and only then moves on to the next state."""
    for block in blocks:
        scored = scorer.score(state, block)
        yield scored, state
        state = absorbed(state, block, adapter, clock, world)


def fingerprint(state: EvalState) -> float:
    """One number for the deltas, to compare runs by."""
    return float(sum(v.double().abs().sum() for v in state.deltas.values.values()))


@torch.no_grad()
def largest_gap(scorer: WindowScorer, state: EvalState, block: Block) -> float:
    """How far the distributions of a block's first windows are from a sum of one."""
    cfg = scorer.cfg
    some = windows_of(block, cfg.stride, cfg.seq_len)[: cfg.window_batch]
    view = view_of(some, scorer.tokens, cfg.window_batch, cfg.stride, cfg.seq_len)
    log_p = scorer.log_probs(merged(scorer.params, state.deltas.values), view, state.cache)
    return float((log_p.double().exp().sum(dim=-1) - 1)[view.on].abs().max())


def evaluate(cfg: Config, apply: Apply, packed: Packed, val: Tensor, table: ByteTable, clock: Clock, world: World, log):
    """One pass over the validation tokens from left to right."""
    params = unpacked(packed)
    positions = val.numel() - 1
    scorer = WindowScorer(cfg, apply, params, val, table, packed.temperature, world)
    adapter = Adapter(cfg, apply, params, val, world)
    reducer = Reducer(world)
    state = EvalState(fresh_deltas(cfg, params), empty_cache(cfg, world) if cfg.cache_on else None)
    sums = reducer.zero()
    blocks = blocks_of(positions, cfg.block_tokens)
    for scored, used in scored_blocks(state, blocks, scorer, adapter, clock, world):
        sums = reducer.add(sums, scored)
        if scored.block.index % 50 == 0:
            nats, _, size = sums[0].tolist()
            log(
                f"block:{scored.block.index} rank0_bpb:{nats / math.log(2) / max(size, 1):.4f} "
                f"deltas:{fingerprint(used):.3f} gap:{largest_gap(scorer, used, scored.block):.1e} "
                f"time:{clock.read():.1f}s"
            )
    return reducer.finish(sums, positions)


# ----------------------------------------------------------------------------------------------------------------------
# the run


def set_up(cfg: Config, world: World) -> None:
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    torch.cuda.manual_seed_all(cfg.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64


def train_and_pack(cfg: Config, model: nn.Module, val: Tensor, table: ByteTable, world: World, log) -> None:
    """Everything that may see training data: training, averaging, calibration, quantisation. Writes the artifact."""
    apply = make_apply(model)
    params = initial_params(model, world)
    log(f"model_params:{sum(p.numel() for p in params.values())} world_size:{world.size} seed:{cfg.seed}")
    warm_up(cfg, apply, params, world)
    state, clock = train(cfg, apply, params, val, table, world, log)

    final = state.ema
    data = batches(cfg.train_files, cfg.calib_rows, cfg.seq_len, world)
    moments = hessians(cfg, model, final, data, world)
    rough = quantised(cfg, final, moments, 1.0, world)
    temperature = fitted_temperature(cfg, make_apply(model, False), unpacked(rough), data, world)
    packed = replace(rough, temperature=temperature)
    clock.hold()
    log(f"training with calibration took {clock.read():.1f}s, temperature:{temperature:.2f}")
    if cfg.max_seconds > 0 and clock.read() > cfg.max_seconds:
        raise SystemExit(f"training took {clock.read():.1f}s, {cfg.max_seconds:.1f}s are allowed")
    write_artifact(cfg, packed, world, log)


def read_and_evaluate(cfg: Config, model: nn.Module, val: Tensor, table: ByteTable, world: World, log) -> Total:
    """Everything after the artifact: reads it back and scores the validation tokens with it."""
    clock = Clock().go()
    packed = deserialised(Path(cfg.artifact).read_bytes(), world.device)
    apply = make_apply(model)
    loss, bpb = plain_bpb(cfg, apply, unpacked(packed), val, table, world)
    log(f"roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} time:{clock.read():.1f}s")
    total = evaluate(cfg, apply, packed, val, table, clock, world, log)
    barrier(world)
    clock.hold()
    log(f"eval_tokens:{total.tokens} eval_bytes:{total.bytes} eval_time:{clock.read():.1f}s")
    if clock.read() > cfg.eval_seconds:
        raise SystemExit(f"evaluation took {clock.read():.1f}s, {cfg.eval_seconds:.1f}s are allowed")
    return total


def main() -> None:
    cfg = Config()
    world = join_world()
    set_up(cfg, world)
    log = make_log(cfg, world)
    log(f"python {sys.version.split()[0]} torch {torch.__version__}")
    log(json.dumps(dataclasses.asdict(cfg)))

    table = byte_table(cfg, world)
    val = validation_tokens(cfg, world)
    log(f"train shards:{len(shard_paths(cfg.train_files))} validation tokens:{val.numel()}")

    model = HybridLM(cfg).to(world.device)
    train_and_pack(cfg, model, val, table, world, log)
    total = read_and_evaluate(cfg, model, val, table, world, log)
    log(f"final val_loss:{total.loss:.8f} val_bpb:{total.bpb:.8f}")
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
