"""Parameter Golf, functional edition.

Everything that changes is a value: the parameters are a flat dict of tensors, an optimizer is a pair (init, update), a training step maps a
TrainState to the next TrainState and the validation pass is one `functools.reduce` over the chunks of the validation stream, whose carry
holds the weights, the momentum, the bigram table and the sums.  I come from JAX, so there is a `scan`, a `while_loop` and no `.backward()`.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Order of events
  1. compile warm-up on random tokens, thrown away
  2. clock starts: training, averaging, temperature, Hessians, GPTQ, packing, all inside TRAIN_SECONDS
  3. the packed file is read back, the validation shards are opened for the first time
  4. a static sliding window is logged, then the score-first adaptive pass gives the number on the last line
"""

from __future__ import annotations

import functools
import glob
import io
import json
import lzma
import math
import os
import random
import struct
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Params = dict[str, Tensor]

# ---------------------------------------------------------------------------------------------------------------------
# settings


def env(name: str, default: Any) -> Any:
    """A setting from the environment, with the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


class Config(NamedTuple):
    # data
    data_path: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    vocab_size: int = env("VOCAB_SIZE", 1024)
    bos_id: int = env("BOS_ID", 1)
    holdout_tokens: int = env("HOLDOUT_TOKENS", 1_048_576)
    # model
    layers: int = env("NUM_LAYERS", 10)
    dim: int = env("MODEL_DIM", 512)
    heads: int = env("NUM_HEADS", 8)
    kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_mult: float = env("MLP_MULT", 3.0)
    rope_base: float = env("ROPE_BASE", 10_000.0)
    rope_dims: int = env("ROPE_DIMS", 32)
    softcap: float = env("LOGIT_SOFTCAP", 30.0)
    bigram_rows: int = env("BIGRAM_ROWS", 3072)
    bigram_dim: int = env("BIGRAM_DIM", 112)
    # training
    seed: int = env("SEED", 1337)
    steps: int = env("ITERATIONS", 20_000)
    train_seconds: float = env("TRAIN_SECONDS", 600.0)
    finish_seconds: float = env("FINISH_SECONDS", 70.0)
    warmup_steps: int = env("WARMUP_STEPS", 8)
    batch_tokens: int = env("TRAIN_BATCH_TOKENS", 524_288)
    seq_len: int = env("TRAIN_SEQ_LEN", 1024)
    warmdown: float = env("WARMDOWN_FRACTION", 0.42)
    lr_matrix: float = env("MATRIX_LR", 0.024)
    lr_embed: float = env("EMBED_LR", 0.035)
    lr_scalar: float = env("SCALAR_LR", 0.022)
    muon_momentum: float = env("MUON_MOMENTUM", 0.97)
    muon_momentum_start: float = env("MUON_MOMENTUM_START", 0.90)
    muon_momentum_steps: int = env("MUON_MOMENTUM_STEPS", 1200)
    muon_iterations: int = env("MUON_ITERATIONS", 5)
    muon_decay: float = env("MUON_WD", 0.045)
    adam_b1: float = env("ADAM_B1", 0.9)
    adam_b2: float = env("ADAM_B2", 0.95)
    adam_decay: float = env("ADAM_WD", 0.02)
    clip_norm: float = env("GRAD_CLIP_NORM", 0.3)
    ema_fast: float = env("EMA_FAST", 0.993)
    ema_slow: float = env("EMA_SLOW", 0.9975)
    log_every: int = env("LOG_EVERY", 250)
    # quantisation
    bits: int = env("MATRIX_BITS", 6)
    calib_batches: int = env("CALIB_BATCHES", 48)
    gptq_block: int = env("GPTQ_BLOCK", 128)
    gptq_damp: float = env("GPTQ_DAMP", 0.01)
    model_file: str = env("MODEL_FILE", "final_model.ptz")
    size_limit: int = env("SIZE_LIMIT", 16_000_000)
    # evaluation
    eval_seconds: float = env("EVAL_SECONDS", 600.0)
    eval_reserve: float = env("EVAL_RESERVE", 60.0)
    eval_ctx: int = env("EVAL_CTX", 1024)
    eval_stride: int = env("EVAL_STRIDE", 64)
    static_stride: int = env("STATIC_STRIDE", 256)
    eval_batch: int = env("EVAL_BATCH", 64)
    chunk_tokens: int = env("CHUNK_TOKENS", 32_768)
    ttt: bool = env("TTT", True)
    ttt_epochs: int = env("TTT_EPOCHS", 3)
    ttt_lr: float = env("TTT_LR", 0.002)
    ttt_momentum: float = env("TTT_MOMENTUM", 0.9)
    ttt_clip: float = env("TTT_CLIP", 1.0)
    ttt_frozen: str = env("TTT_FROZEN", "embed,bigram")
    mix: bool = env("MIX", True)
    mix_max: float = env("MIX_MAX", 0.06)
    mix_half: float = env("MIX_HALF", 400.0)
    mix_alpha: float = env("MIX_ALPHA", 24.0)


# ---------------------------------------------------------------------------------------------------------------------
# control flow, the way I am used to it


def scan(f: Callable, carry: Any, xs: Iterable) -> tuple[Any, list]:
    """lax.scan without the tracing: f(carry, x) -> (carry, y)."""
    ys = []
    for x in xs:
        carry, y = f(carry, x)
        ys.append(y)
    return carry, ys


def while_loop(cond: Callable[[Any], bool], body: Callable[[Any], Any], state: Any) -> Any:
    while cond(state):
        state = body(state)
    return state


def compose(*fs: Callable) -> Callable:
    return functools.reduce(lambda f, g: lambda x: g(f(x)), fs)


def tree_zip(f: Callable, *trees: Any) -> Any:
    """jax.tree.map over several trees of one structure."""
    leaves, spec = tree_flatten(trees[0])
    rest = [tree_flatten(t)[0] for t in trees[1:]]
    return tree_unflatten([f(*xs) for xs in zip(leaves, *rest)], spec)


def tree_norm(tree: Any) -> Tensor:
    leaves, _ = tree_flatten(tree)
    return torch.stack([x.float().square().sum() for x in leaves]).sum().sqrt()


def clip_tree(tree: Any, limit: float) -> Any:
    if limit <= 0:
        return tree
    factor = (limit / (tree_norm(tree) + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * factor, tree)


def detach_tree(tree: Any) -> Any:
    return tree_map(lambda x: x.detach().clone(), tree)


# ---------------------------------------------------------------------------------------------------------------------
# ranks


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def join_world() -> World:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl", device_id=device)
        dist.barrier()
    return World(rank, size, device)


def sum_ranks(x: Tensor, world: World) -> Tensor:
    if world.size == 1:
        return x
    y = x.clone()
    dist.all_reduce(y, op=dist.ReduceOp.SUM)
    return y


def mean_tree(tree: Any, world: World) -> Any:
    """One all-reduce for a whole tree: ravel, reduce, unravel."""
    if world.size == 1:
        return tree
    leaves, spec = tree_flatten(tree)
    flat = torch.cat([x.reshape(-1).float() for x in leaves])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    parts = flat.split([x.numel() for x in leaves])
    return tree_unflatten([p.view_as(x).to(x.dtype) for p, x in zip(parts, leaves)], spec)


def slowest(seconds: float, world: World) -> float:
    """The largest of the ranks' clocks, so that all of them take the same branch."""
    t = torch.tensor(seconds, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return float(t)


class Clock(NamedTuple):
    start: float

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.start


def start_clock() -> Clock:
    torch.cuda.synchronize()
    return Clock(time.perf_counter())


def say(world: World, *words: Any) -> None:
    if world.main:
        print(*words, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# data

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256


@functools.lru_cache(maxsize=None)
def shard(path: str) -> np.ndarray:
    """The tokens of a shard, mapped, not read."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != MAGIC or int(header[1]) != VERSION:
        raise ValueError(f"{path} is no token shard")
    count = int(header[2])
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(count,))
    return tokens


@functools.lru_cache(maxsize=None)
def train_files(data_path: str) -> tuple[str, ...]:
    files = tuple(sorted(glob.glob(os.path.join(data_path, "fineweb_train_*.bin"))))
    if not files:
        raise FileNotFoundError(f"no training shards in {data_path}")
    return files


@functools.lru_cache(maxsize=None)
def usable(path: str, cfg: Config) -> int:
    """How many tokens of a shard the training may read: the end of the last shard is held out."""
    held = cfg.holdout_tokens if path == train_files(cfg.data_path)[-1] else 0
    return len(shard(path)) - held


class Cursor(NamedTuple):
    """Where the training stream stands."""

    file: int = 0
    offset: int = 0
    epoch: int = 0


def advance(cur: Cursor, need: int, cfg: Config) -> tuple[Cursor, np.ndarray]:
    """The next `need` tokens plus the one after them; a remainder at the end of a shard is dropped."""
    files = train_files(cfg.data_path)
    while cur.offset + need + 1 > usable(files[cur.file], cfg):
        nxt = cur.file + 1
        cur = Cursor(nxt % len(files), 0, cur.epoch + (nxt == len(files)))
    piece = shard(files[cur.file])[cur.offset : cur.offset + need + 1]
    return cur._replace(offset=cur.offset + need), piece


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


def to_batch(piece: np.ndarray, seq_len: int, device: torch.device) -> Batch:
    flat = torch.from_numpy(np.asarray(piece, dtype=np.int64)).pin_memory().to(device, non_blocking=True)
    return Batch(flat[:-1].view(-1, seq_len), flat[1:].view(-1, seq_len))


def rank_batch(cur: Cursor, cfg: Config, world: World) -> tuple[Cursor, Batch]:
    """One global batch off the stream; every rank keeps its own slice."""
    cur, piece = advance(cur, cfg.batch_tokens, cfg)
    share = cfg.batch_tokens // world.size
    return cur, to_batch(piece[world.rank * share : (world.rank + 1) * share + 1], cfg.seq_len, world.device)


@functools.lru_cache(maxsize=None)
def holdout_batches(cfg: Config, world: World, rows: int = 32) -> tuple[Batch, ...]:
    """This rank's part of the held-out end of the last training shard."""
    tail = shard(train_files(cfg.data_path)[-1])[-cfg.holdout_tokens :]
    span = rows * cfg.seq_len
    starts = range(world.rank * span, len(tail) - span, world.size * span)
    return tuple(to_batch(tail[s : s + span + 1], cfg.seq_len, world.device) for s in starts)


@functools.lru_cache(maxsize=None)
def validation_stream(data_path: str) -> Tensor:
    """All validation shards, in order, as one tensor on the host."""
    files = sorted(glob.glob(os.path.join(data_path, "fineweb_val_*.bin")))
    if not files:
        raise FileNotFoundError(f"no validation shards in {data_path}")
    return torch.from_numpy(np.concatenate([np.asarray(shard(f), dtype=np.int32) for f in files]))


# ---------------------------------------------------------------------------------------------------------------------
# bytes


class ByteTables(NamedTuple):
    size: Tensor  # bytes of the piece, without the mark of a leading space
    space: Tensor  # the piece opens with a space
    edge: Tensor  # control and unknown pieces: no bytes, and no space is written after them


def piece_bytes(sp: spm.SentencePieceProcessor, i: int) -> tuple[int, bool, bool]:
    if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
        return 0, False, True
    if sp.is_byte(i):
        return 1, False, False
    piece = sp.id_to_piece(i)
    marked = piece.startswith("\u2581")
    return len(piece[marked:].encode("utf-8")), marked, False


@functools.lru_cache(maxsize=None)
def byte_tables(tokenizer_path: str, vocab_size: int, device: torch.device) -> ByteTables:
    sp = spm.SentencePieceProcessor(model_file=tokenizer_path)
    if sp.vocab_size() > vocab_size:
        raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, the model {vocab_size}")
    rows = [piece_bytes(sp, i) for i in range(sp.vocab_size())] + [(0, False, True)] * (vocab_size - sp.vocab_size())
    size, space, edge = zip(*rows)
    return ByteTables(
        torch.tensor(size, dtype=torch.int64, device=device),
        torch.tensor(space, dtype=torch.bool, device=device),
        torch.tensor(edge, dtype=torch.bool, device=device),
    )


def count_bytes(tables: ByteTables, prev: Tensor, target: Tensor) -> Tensor:
    """UTF-8 bytes of each target; the space before a marked piece is text unless the piece opens a document."""
    return tables.size[target] + (tables.space[target] & ~tables.edge[prev]).long()


# ---------------------------------------------------------------------------------------------------------------------
# model: modules are skeletons on the meta device, the weights come from outside


@functools.lru_cache(maxsize=None)
def rope_table(length: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    inverse = base ** (-torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse)
    return angle.cos()[None, None], angle.sin()[None, None]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (t.to(x.dtype) for t in rope)
    dims = 2 * cos.size(-1)
    head, tail = x[..., :dims], x[..., dims:]
    a, b = head.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, tail), dim=-1)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Dense(nn.Linear):
    """Weights are kept in fp32 and used in the activations' type."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.heads, cfg.kv_heads, cfg.dim // cfg.heads
        self.q = Dense(cfg.dim, cfg.dim)
        self.k = Dense(cfg.dim, cfg.kv_heads * self.head_dim)
        self.v = Dense(cfg.dim, cfg.kv_heads * self.head_dim)
        self.o = Dense(cfg.dim, cfg.dim)
        self.q_gain = nn.Parameter(torch.empty(cfg.heads))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        b, t, d = x.shape
        split = lambda y, n: y.view(b, t, n, self.head_dim).transpose(1, 2)
        q, k, v = split(self.q(x), self.heads), split(self.k(x), self.kv_heads), split(self.v(x), self.kv_heads)
        q, k = rotate(rms(q), rope), rotate(rms(k), rope)
        q = q * self.q_gain.to(q.dtype).view(1, -1, 1, 1)
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.dim)
        self.up = Dense(cfg.dim, hidden)
        self.down = Dense(hidden, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.attn, self.mlp = Attention(cfg), MLP(cfg)
        self.attn_scale = nn.Parameter(torch.empty(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.empty(cfg.dim))
        self.blend = nn.Parameter(torch.empty(2, cfg.dim))

    def forward(self, x: Tensor, x0: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        keep, fresh = self.blend.to(x.dtype)
        x = keep * x + fresh * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x), rope)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x))


class GPT(nn.Module):
    """A U-net of blocks with tied embeddings and a hashed embedding of (previous, current) input pairs."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.bigram = nn.Embedding(cfg.bigram_rows, cfg.bigram_dim)
        self.bigram_up = Dense(cfg.bigram_dim, cfg.dim)
        self.bigram_gain = nn.Parameter(torch.empty(()))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.half = cfg.layers // 2
        self.skip = nn.Parameter(torch.empty(self.half, cfg.dim))

    def pair_rows(self, x: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (1, 0), value=0)
        rows = (before * 36313 ^ x * 27191) % (self.cfg.bigram_rows - 1) + 1
        return torch.where(x == self.cfg.bos_id, torch.zeros_like(rows), rows)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        h = F.embedding(x, self.embed.weight).bfloat16()
        pair = F.embedding(self.pair_rows(x), self.bigram.weight).bfloat16()
        h = h + self.bigram_gain.to(h.dtype) * self.bigram_up(pair)
        h = h0 = rms(h)
        held: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < self.half:
                h = block(h, h0, rope)
                held.append(h)
            else:
                if held:
                    h = h + self.skip[i - self.half].to(h.dtype) * held.pop()
                h = block(h, h0, rope)
        raw = F.linear(rms(h), self.embed.weight.to(h.dtype)).float()
        return self.cfg.softcap * torch.tanh(raw / self.cfg.softcap)


class Net(NamedTuple):
    """The pure functions of one model; `skeleton` owns no storage."""

    skeleton: nn.Module
    logits: Callable[[Params, Tensor], Tensor]
    loss: Callable[[Params, Tensor, Tensor], Tensor]


def make_net(cfg: Config, device: torch.device) -> Net:
    with torch.device("meta"):
        skeleton = GPT(cfg)

    def logits(params: Params, x: Tensor) -> Tensor:
        return functional_call(skeleton, params, (x, rope_table(x.size(1), cfg.rope_dims, cfg.rope_base, device)))

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits(params, x).flatten(0, 1), y.flatten())

    return Net(skeleton, logits, loss)


def init_leaf(name: str, shape: torch.Size, cfg: Config, gen: torch.Generator, device: torch.device) -> Tensor:
    leaf = name.rsplit(".", 1)[-1]
    draw = lambda std: torch.randn(shape, generator=gen, device=device) * std
    if name == "embed.weight":
        return draw(0.005)
    if name == "bigram.weight" or name.endswith((".o.weight", ".down.weight")):
        return torch.zeros(shape, device=device)
    if leaf == "q_gain":
        return torch.full(shape, 4.0, device=device)
    if leaf == "bigram_gain":
        return torch.full(shape, 0.05, device=device)
    if leaf == "blend":
        return torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim))).to(device)
    if leaf in ("attn_scale", "mlp_scale", "skip"):
        return torch.ones(shape, device=device)
    return draw(shape[-1] ** -0.5)


def init_params(net: Net, cfg: Config, device: torch.device) -> Params:
    gen = torch.Generator(device=device).manual_seed(cfg.seed)
    return {name: init_leaf(name, p.shape, cfg, gen, device) for name, p in net.skeleton.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# optimizers: pairs (init, update), as in optax


class Transform(NamedTuple):
    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any]]  # (grads, state, params, lr_scale, step) -> (params, state)


class AdamState(NamedTuple):
    m: Params
    v: Params


class MuonState(NamedTuple):
    momentum: Params


class SGDState(NamedTuple):
    momentum: Params


def adam(lr: float, b1: float, b2: float, decay: float, eps: float = 1e-8) -> Transform:
    def init(params: Params) -> AdamState:
        return AdamState(tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params))

    def update(grads: Params, state: AdamState, params: Params, lr_scale: float, step: int):
        m = tree_zip(lambda a, g: a.lerp(g, 1 - b1), state.m, grads)
        v = tree_zip(lambda a, g: a.lerp(g.square(), 1 - b2), state.v, grads)
        c1, c2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
        rate = lr * lr_scale
        move = lambda p, a, s: p * (1 - rate * decay) - rate * (a / c1) / ((s / c2).sqrt() + eps)
        return tree_zip(move, params, m, v), AdamState(m, v)

    return Transform(init, update)


def newton_schulz(g: Tensor, iterations: int) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly; one matrix, `vmap` makes the stack of them."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


def by_shape(params: Params) -> dict[tuple[int, ...], list[str]]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(params):
        groups.setdefault(tuple(params[name].shape), []).append(name)
    return groups


def muon(lr: float, momentum: Callable[[int], float], iterations: int, decay: float, world: World) -> Transform:
    orthogonal = torch.compile(vmap(functools.partial(newton_schulz, iterations=iterations)))

    def init(params: Params) -> MuonState:
        return MuonState(tree_map(torch.zeros_like, params))

    def directions(stack: Tensor) -> Tensor:
        """Each rank takes its share of the stack."""
        share = -(-stack.size(0) // world.size)
        padded = F.pad(stack, (0, 0, 0, 0, 0, share * world.size - stack.size(0)))
        mine = orthogonal(padded[world.rank * share : (world.rank + 1) * share]).contiguous()
        if world.size == 1:
            return mine
        out = torch.empty((share * world.size, *mine.shape[1:]), dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(out, mine)
        return out[: stack.size(0)]

    def update(grads: Params, state: MuonState, params: Params, lr_scale: float, step: int):
        mu, rate = momentum(step), lr * lr_scale
        buf = tree_zip(lambda m, g: m * mu + g, state.momentum, grads)
        ahead = tree_zip(lambda m, g: g + mu * m, buf, grads)
        new: Params = {}
        for shape, names in by_shape(params).items():
            d = directions(torch.stack([ahead[n] for n in names])).float()
            gain = max(1.0, shape[0] / shape[1]) ** 0.5
            for n, move in zip(names, d):
                new[n] = params[n] * (1 - rate * decay) - rate * gain * move
        return {n: new[n] for n in params}, MuonState(buf)

    return Transform(init, update)


def sgd(lr: float, momentum: float) -> Transform:
    def init(params: Params) -> SGDState:
        return SGDState(tree_map(torch.zeros_like, params))

    def update(grads: Params, state: SGDState, params: Params, lr_scale: float, step: int):
        buf = tree_zip(lambda m, g: m * momentum + g, state.momentum, grads)
        return tree_zip(lambda p, m: p - lr * lr_scale * m, params, buf), SGDState(buf)

    return Transform(init, update)


def partitioned(label: Callable[[str, Tensor], str], parts: dict[str, Transform]) -> Transform:
    """One transform out of several, each with the parameters that `label` gives it."""

    def pick(tree: Params, params: Params, key: str) -> Params:
        return {n: tree[n] for n in params if label(n, params[n]) == key}

    def init(params: Params) -> dict[str, Any]:
        return {key: t.init(pick(params, params, key)) for key, t in parts.items()}

    def update(grads: Params, state: dict[str, Any], params: Params, lr_scale: float, step: int):
        done = {
            key: t.update(pick(grads, params, key), state[key], pick(params, params, key), lr_scale, step)
            for key, t in parts.items()
        }
        merged = {n: p for new, _ in done.values() for n, p in new.items()}
        return {n: merged[n] for n in params}, {key: s for key, (_, s) in done.items()}

    return Transform(init, update)


def label(name: str, p: Tensor) -> str:
    if name in ("embed.weight", "bigram.weight"):
        return "embed"
    return "matrix" if p.ndim == 2 and name.endswith(".weight") else "scalar"


def make_optimizer(cfg: Config, world: World) -> Transform:
    def momentum(step: int) -> float:
        t = min(step / max(cfg.muon_momentum_steps, 1), 1.0)
        return (1 - t) * cfg.muon_momentum_start + t * cfg.muon_momentum

    return partitioned(
        label,
        {
            "matrix": muon(cfg.lr_matrix, momentum, cfg.muon_iterations, cfg.muon_decay, world),
            "embed": adam(cfg.lr_embed, cfg.adam_b1, cfg.adam_b2, cfg.adam_decay),
            "scalar": adam(cfg.lr_scalar, cfg.adam_b1, cfg.adam_b2, 0.0),
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# training


class TrainState(NamedTuple):
    step: int
    params: Params
    opt: Any
    fast: Params  # exponential averages of the parameters
    slow: Params
    cursor: Cursor
    seconds: float
    loss: Tensor


def fresh_state(params: Params, opt: Transform, device: torch.device) -> TrainState:
    zero = torch.zeros((), device=device)
    return TrainState(0, params, opt.init(params), detach_tree(params), detach_tree(params), Cursor(), 0.0, zero)


def lr_scale(state: TrainState, cfg: Config) -> float:
    """Flat, then linear to zero; progress is the larger of the steps' and the clock's."""
    budget = cfg.train_seconds - cfg.finish_seconds
    done = max(state.step / cfg.steps, state.seconds / budget)
    return min(1.0, max(0.0, (1.0 - done) / cfg.warmdown))


def follow(mean: Params, params: Params, decay: float) -> Params:
    return tree_zip(lambda a, p: torch.lerp(p, a, decay), mean, params)


class Trainer(NamedTuple):
    grads: Callable[[Params, Batch], tuple[Params, Tensor]]
    step: Callable[[TrainState, Batch], TrainState]


def make_trainer(net: Net, opt: Transform, cfg: Config, world: World) -> Trainer:
    value_and_grad = torch.compile(grad_and_value(net.loss), dynamic=False)
    micro = max(1, 8 // world.size)

    def grads(params: Params, batch: Batch) -> tuple[Params, Tensor]:
        def add(carry: tuple, xy: tuple[Tensor, Tensor]):
            g, value = value_and_grad(params, *xy)
            return tree_zip(lambda a, b: a + b / micro, carry[0], g), carry[1] + value / micro

        zero = (tree_map(torch.zeros_like, params), torch.zeros((), device=world.device))
        total, value = functools.reduce(add, zip(batch.x.chunk(micro), batch.y.chunk(micro)), zero)
        return mean_tree(total, world), value

    def step(state: TrainState, batch: Batch) -> TrainState:
        g, value = grads(state.params, batch)
        with torch.no_grad():
            params, memory = opt.update(
                clip_tree(g, cfg.clip_norm), state.opt, state.params, lr_scale(state, cfg), state.step
            )
            fast = follow(state.fast, params, cfg.ema_fast)
            slow = follow(state.slow, params, cfg.ema_slow)
        return state._replace(step=state.step + 1, params=params, opt=memory, fast=fast, slow=slow, loss=value.detach())

    return Trainer(grads, step)


def warm_up(trainer: Trainer, state: TrainState, cfg: Config, world: World) -> None:
    """Compiles everything on random tokens. States are values: what comes out is simply not kept."""
    gen = torch.Generator(device=world.device).manual_seed(7 + world.rank)
    rows = cfg.batch_tokens // world.size // cfg.seq_len

    def noise(_: int) -> Batch:
        draw = torch.randint(0, cfg.vocab_size, (rows, cfg.seq_len + 1), generator=gen, device=world.device)
        return Batch(draw[:, :-1].contiguous(), draw[:, 1:].contiguous())

    functools.reduce(trainer.step, map(noise, range(cfg.warmup_steps)), state)
    torch.cuda.synchronize()


def train(trainer: Trainer, state: TrainState, clock: Clock, cfg: Config, world: World) -> TrainState:
    budget = cfg.train_seconds - cfg.finish_seconds

    def going(s: TrainState) -> bool:
        return s.step < cfg.steps and s.seconds < budget

    def body(s: TrainState) -> TrainState:
        cursor, batch = rank_batch(s.cursor, cfg, world)
        new = trainer.step(s._replace(cursor=cursor), batch)
        new = new._replace(seconds=slowest(clock.seconds(), world))
        if new.step % cfg.log_every == 0 or new.step <= 5:
            say(
                world,
                f"step:{new.step}/{cfg.steps} train_loss:{float(new.loss):.4f} train_time:{1000 * new.seconds:.0f}ms "
                f"step_avg:{1000 * new.seconds / new.step:.2f}ms",
            )
        return new

    return while_loop(going, body, state)


def holdout_loss(net: Net, params: Params, temperature: float, cfg: Config, world: World) -> float:
    """Mean loss on the held-out end of the training shards, over all ranks."""

    def add(carry: Tensor, batch: Batch) -> Tensor:
        logits = net.logits(params, batch.x) / temperature
        nll = F.cross_entropy(logits.flatten(0, 1), batch.y.flatten(), reduction="sum").double()
        return carry + torch.stack((nll, torch.tensor(float(batch.y.numel()), device=nll.device, dtype=nll.dtype)))

    with torch.no_grad():
        zero = torch.zeros(2, dtype=torch.float64, device=world.device)
        total = sum_ranks(functools.reduce(add, holdout_batches(cfg, world), zero), world)
    return float(total[0] / total[1])


def pick_average(net: Net, state: TrainState, cfg: Config, world: World) -> Params:
    """The last weights or one of their averages, whichever does best on held-out training text."""
    candidates = {"last": state.params, "fast": state.fast, "slow": state.slow}
    losses = {name: holdout_loss(net, p, 1.0, cfg, world) for name, p in candidates.items()}
    best = min(losses, key=losses.__getitem__)
    say(world, "average:" + " ".join(f"{n}={v:.5f}" for n, v in losses.items()), f"-> {best}")
    return candidates[best]


def fit_temperature(net: Net, params: Params, cfg: Config, world: World) -> float:
    """A scale of the logits for the quantised weights, fitted on held-out training text and stored with them."""
    grid = [0.94 + 0.01 * i for i in range(13)]
    losses = [holdout_loss(net, params, t, cfg, world) for t in grid]
    return grid[losses.index(min(losses))]


# ---------------------------------------------------------------------------------------------------------------------
# quantisation


def collect_hessians(net: Net, params: Params, batches: Iterable[Batch], world: World) -> dict[str, Tensor]:
    """X^T X of the inputs of every Dense, summed over batches and ranks."""
    modules = {name: m for name, m in net.skeleton.named_modules() if isinstance(m, Dense)}
    sums = {n: torch.zeros(m.in_features, m.in_features, device=world.device) for n, m in modules.items()}

    def tap(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2).float()
            sums[name] = sums[name] + x.T @ x

        return hook

    handles = [m.register_forward_pre_hook(tap(name)) for name, m in modules.items()]
    with torch.no_grad():
        for batch in batches:
            net.logits(params, batch.x)
    for h in handles:
        h.remove()
    return {n + ".weight": sum_ranks(s, world) for n, s in sums.items()}


def calibration_batches(cursor: Cursor, cfg: Config, world: World) -> Iterable[Batch]:
    """The training stream, from where training left it."""

    def take(cur: Cursor, _: int) -> tuple[Cursor, Batch]:
        return rank_batch(cur, cfg, world)

    for _ in range(cfg.calib_batches):
        cursor, batch = take(cursor, 0)
        yield Batch(batch.x[:16], batch.y[:16])


def row_scale(w: Tensor, top: int) -> Tensor:
    """Per row, the clip with the least squared error among a few."""
    clips = torch.linspace(0.70, 1.0, 13, device=w.device)

    def error(clip: Tensor) -> tuple[Tensor, Tensor]:
        s = (w.abs().amax(dim=1, keepdim=True) * clip / top).clamp(min=1e-8)
        q = (w / s).round().clamp(-top, top)
        return (q * s - w).square().sum(dim=1), s.squeeze(1)

    errors, scales = vmap(error)(clips)
    return scales.gather(0, errors.argmin(dim=0, keepdim=True)).squeeze(0)


class Coded(NamedTuple):
    q: Tensor  # int8
    scale: Tensor  # fp16, by row


def round_rows(w: Tensor, bits: int) -> Coded:
    top = 2 ** (bits - 1) - 1
    scale = row_scale(w.float(), top).half()
    return Coded((w / scale.float()[:, None]).round().clamp(-top, top).to(torch.int8), scale)


def gptq(w: Tensor, hessian: Tensor, bits: int, block: int, damp: float) -> Coded:
    """Column by column, the rounding error of each goes to those that follow."""
    top = 2 ** (bits - 1) - 1
    w = w.float().clone()
    scale = row_scale(w, top).half()
    s = scale.float()
    h = hessian.double()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    h = h + torch.eye(h.size(0), device=h.device, dtype=h.dtype) * damp * h.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    q = torch.zeros_like(w)
    for a in range(0, w.size(1), block):
        b = min(a + block, w.size(1))
        errors = torch.zeros_like(w[:, a:b])
        for j in range(a, b):
            q[:, j] = (w[:, j] / s).round().clamp(-top, top)
            e = (w[:, j] - q[:, j] * s) / upper[j, j]
            w[:, j:b] -= e[:, None] * upper[j, j:b][None]
            errors[:, j - a] = e
        w[:, b:] -= errors @ upper[a:b, b:]
    return Coded(q[:, order.argsort()].to(torch.int8), scale)


def quantise(params: Params, hessians: dict[str, Tensor], cfg: Config, world: World) -> dict[str, Coded | Tensor]:
    """Matrices by GPTQ, each on one rank; embeddings to eight bits; the rest stays fp16."""
    names = sorted(n for n, p in params.items() if label(n, p) == "matrix")
    mine = {
        n: Coded(*(t.cpu() for t in gptq(params[n], hessians[n], cfg.bits, cfg.gptq_block, cfg.gptq_damp)))
        for n in names[world.rank :: world.size]
    }
    shares: list[Any] = [mine]
    if world.size > 1:
        shares = [None] * world.size
        dist.all_gather_object(shares, mine)
    matrices = functools.reduce(lambda a, b: {**a, **b}, shares, {})
    embeds = {n: round_rows(p, 8) for n, p in params.items() if label(n, p) == "embed"}
    rest = {n: p.half() for n, p in params.items() if label(n, p) == "scalar"}
    return {n: {**matrices, **embeds, **rest}[n] for n in params}


def dequantise(coded: dict[str, Coded | Tensor], device: torch.device) -> Params:
    def leaf(c: Coded | Tensor) -> Tensor:
        if isinstance(c, Coded):
            return c.q.to(device).float() * c.scale.to(device).float()[:, None]
        return c.to(device).float()

    return {n: leaf(c) for n, c in coded.items()}


# ---------------------------------------------------------------------------------------------------------------------
# the file


def raw_bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().numpy().tobytes()


def planes(t: Tensor) -> bytes:
    """fp16 as its low bytes, then its high bytes: they compress better apart."""
    pairs = np.frombuffer(raw_bytes(t), dtype=np.uint8).reshape(-1, 2)
    return pairs.T.tobytes()


def unplanes(blob: bytes) -> np.ndarray:
    return np.ascontiguousarray(np.frombuffer(blob, dtype=np.uint8).reshape(2, -1).T).view(np.float16).reshape(-1)


def pack(coded: dict[str, Coded | Tensor], temperature: float) -> bytes:
    """A JSON header, then the sections of the tensors in its order; all of it through LZMA."""
    body = io.BytesIO()
    rows = []
    for name, c in coded.items():
        if isinstance(c, Coded):
            rows.append([name, "q", list(c.q.shape)])
            body.write(raw_bytes(c.q.T) + planes(c.scale))
        else:
            rows.append([name, "h", list(c.shape)])
            body.write(planes(c))
    head = json.dumps({"temperature": temperature, "rows": rows}).encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(struct.pack("<I", len(head)) + head + body.getvalue(), lzma.FORMAT_XZ, filters=filters)


class Unpacked(NamedTuple):
    coded: dict[str, Coded | Tensor]
    temperature: float


def unpack(blob: bytes) -> Unpacked:
    data = lzma.decompress(blob)
    (n,) = struct.unpack_from("<I", data)
    head = json.loads(data[4 : 4 + n])

    def read(at: int, row: list) -> tuple[int, tuple[str, Coded | Tensor]]:
        name, kind, shape = row
        count = math.prod(shape)
        if kind == "h":
            flat = torch.from_numpy(unplanes(data[at : at + 2 * count]).copy())
            return at + 2 * count, (name, flat.view(shape))
        q = np.frombuffer(data, dtype=np.int8, count=count, offset=at).reshape(shape[1], shape[0])
        end = at + count + 2 * shape[0]
        scale = torch.from_numpy(unplanes(data[at + count : end]).copy())
        return end, (name, Coded(torch.from_numpy(np.ascontiguousarray(q.T)), scale))

    _, leaves = scan(read, 4 + n, head["rows"])
    return Unpacked(dict(leaves), float(head["temperature"]))


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def write_model(blob: bytes, cfg: Config, world: World) -> int:
    """Writes the artifact; returns the bytes of the whole submission."""
    total = len(blob) + code_bytes()
    if world.main:
        Path(cfg.model_file).write_bytes(blob)
        print(f"Serialized model int{cfg.bits}+lzma: {len(blob)} bytes")
        print(f"Code size: {code_bytes()} bytes")
        print(f"Total submission size: {total} bytes", flush=True)
    if total > cfg.size_limit:
        raise SystemExit(f"submission of {total} bytes is over {cfg.size_limit}")
    if world.size > 1:
        dist.barrier()
    return total


def read_model(cfg: Config, world: World) -> tuple[Params, float]:
    coded, temperature = unpack(Path(cfg.model_file).read_bytes())
    return dequantise(coded, world.device), temperature


# ---------------------------------------------------------------------------------------------------------------------
# evaluation. Position t of the stream is the prediction of token t + 1 from the tokens up to t.


class Window(NamedTuple):
    begin: int  # first input
    score: int  # first position that counts
    end: int


class Chunk(NamedTuple):
    index: int
    lo: int
    hi: int


class Scored(NamedTuple):
    """A padded batch of windows, on the device."""

    x: Tensor
    y: Tensor
    counts: Tensor  # True where the position is this window's to score


class Sums(NamedTuple):
    nll: Tensor
    size: Tensor
    count: Tensor


class Table(NamedTuple):
    """How often each token followed each other one, among the tokens scored so far."""

    pairs: Tensor
    singles: Tensor


class EvalState(NamedTuple):
    params: Params
    momentum: SGDState
    table: Table
    sums: Sums
    score_seconds: float
    adapted: int


def cut_windows(lo: int, hi: int, stride: int, ctx: int) -> list[Window]:
    """Windows whose scored parts tile [lo, hi): each position is counted in exactly one."""
    ends = [(s, min(s + stride, hi)) for s in range(lo, hi, stride)]
    return [Window(max(0, e - ctx), s, e) for s, e in ends]


def cut_chunks(total: int, size: int) -> list[Chunk]:
    return [Chunk(i, lo, min(lo + size, total)) for i, lo in enumerate(range(0, total, size))]


def batches_of(items: Sequence, size: int) -> Iterable[Sequence]:
    return (items[i : i + size] for i in range(0, len(items), size))


def fill(stream: Tensor, windows: Sequence[Window], ctx: int, device: torch.device) -> Scored:
    x = torch.zeros(len(windows), ctx, dtype=torch.int64)
    y = torch.zeros_like(x)
    counts = torch.zeros_like(x, dtype=torch.bool)
    for i, w in enumerate(windows):
        n = w.end - w.begin
        piece = stream[w.begin : w.end + 1].long()
        x[i, :n], y[i, :n] = piece[:-1], piece[1:]
        counts[i, w.score - w.begin : n] = True
    return Scored(*(t.pin_memory().to(device, non_blocking=True) for t in (x, y, counts)))


def no_sums(device: torch.device) -> Sums:
    return Sums(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(3)))


def add_sums(a: Sums, b: Sums) -> Sums:
    return Sums(*(x + y for x, y in zip(a, b)))


def share_sums(s: Sums, world: World) -> Sums:
    return Sums(*sum_ranks(torch.stack(s), world).unbind())


def bits_per_byte(s: Sums) -> float:
    return float(s.nll) / math.log(2.0) / float(s.size)


def mean_nll(s: Sums) -> float:
    return float(s.nll / s.count)


# the table of pairs


def empty_table(cfg: Config, device: torch.device) -> Table:
    return Table(
        torch.zeros(cfg.vocab_size, cfg.vocab_size, device=device), torch.zeros(cfg.vocab_size, device=device)
    )


def count_pairs(table: Table, tokens: Tensor) -> Table:
    """The table with the pairs of a stretch of scored tokens added."""
    prev, nxt = tokens[:-1], tokens[1:]
    one = torch.ones(nxt.numel(), device=table.singles.device)
    return Table(
        table.pairs.index_put((prev, nxt), one, accumulate=True), table.singles.index_put((nxt,), one, accumulate=True)
    )


def table_probs(table: Table, prev: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """For each context the probabilities of all tokens, and how often the context was seen."""
    unigram = (table.singles + 1.0) / (table.singles.sum() + cfg.vocab_size)
    rows = table.pairs[prev]
    seen = rows.sum(dim=-1, keepdim=True)
    return (rows + cfg.mix_alpha * unigram) / (seen + cfg.mix_alpha), seen


def blend(logp: Tensor, table: Table, prev: Tensor, cfg: Config) -> Tensor:
    """(1 - w) model + w table over the whole vocabulary; w follows from the count of the context."""
    probs, seen = table_probs(table, prev, cfg)
    w = (cfg.mix_max * seen / (seen + cfg.mix_half)).clamp(min=1e-6)
    return torch.logaddexp(logp + torch.log1p(-w), probs.log() + w.log())


Predict = Callable[[Params, Table, Scored], Tensor]


def make_predict(net: Net, temperature: float, cfg: Config, mix: bool) -> Predict:
    """Log-probabilities over the vocabulary at the counted positions of a batch."""
    forward = torch.compile(net.logits, dynamic=False)

    def predict(params: Params, table: Table, batch: Scored) -> Tensor:
        logits = forward(params, batch.x)[batch.counts] / temperature
        logp = F.log_softmax(logits.float(), dim=-1)
        return blend(logp, table, batch.x[batch.counts], cfg) if mix else logp

    return predict


def score_batch(predict: Predict, params: Params, table: Table, tables: ByteTables, batch: Scored) -> Sums:
    logp = predict(params, table, batch)
    prev, target = batch.x[batch.counts], batch.y[batch.counts]
    nll = -logp.gather(1, target[:, None]).squeeze(1)
    return Sums(
        nll.double().sum(),
        count_bytes(tables, prev, target).double().sum(),
        torch.tensor(float(target.numel()), dtype=torch.float64, device=target.device),
    )


class Scorer(NamedTuple):
    """What all scoring has in common."""

    predict: Predict
    stream: Tensor
    tables: ByteTables
    cfg: Config
    world: World

    def windows(self, params: Params, table: Table, windows: Sequence[Window]) -> Sums:
        """The sums of these windows over all ranks; each rank scores every size-th batch of them."""
        cfg, world = self.cfg, self.world

        def add(carry: Sums, part: Sequence[Window]) -> Sums:
            batch = fill(self.stream, part, cfg.eval_ctx, world.device)
            return add_sums(carry, score_batch(self.predict, params, table, self.tables, batch))

        share = windows[world.rank :: world.size]
        with torch.no_grad():
            mine = functools.reduce(add, batches_of(share, cfg.eval_batch), no_sums(world.device))
        return share_sums(mine, world)


def static_pass(scorer: Scorer, params: Params) -> Sums:
    """The fixed model with a long stride, for the log."""
    cfg = scorer.cfg
    total = scorer.stream.numel() - 1
    return scorer.windows(params, empty_table(cfg, scorer.world.device), cut_windows(0, total, cfg.static_stride, cfg.eval_ctx))


# adaptation


def split_params(params: Params, cfg: Config) -> tuple[Params, Params]:
    """(free, fixed): what the adaptation may move, and the rest."""
    frozen = tuple(w for w in cfg.ttt_frozen.split(",") if w)
    free = {n: p for n, p in params.items() if not n.startswith(frozen)} if frozen else dict(params)
    return free, {n: p for n, p in params.items() if n not in free}


class Adapter(NamedTuple):
    init: Callable[[Params], SGDState]
    epoch: Callable[[tuple[Params, SGDState], tuple[Batch, float]], tuple[Params, SGDState]]


def make_adapter(net: Net, cfg: Config, world: World) -> Adapter:
    opt = sgd(cfg.ttt_lr, cfg.ttt_momentum)

    def loss(free: Params, fixed: Params, x: Tensor, y: Tensor) -> Tensor:
        return net.loss({**fixed, **free}, x, y)

    value_and_grad = torch.compile(grad_and_value(loss), dynamic=False)

    def init(params: Params) -> SGDState:
        return opt.init(split_params(params, cfg)[0])

    def epoch(carry: tuple[Params, SGDState], todo: tuple[Batch, float]) -> tuple[Params, SGDState]:
        params, momentum = carry
        batch, scale = todo
        free, fixed = split_params(params, cfg)
        grads, _ = value_and_grad(free, fixed, batch.x, batch.y)
        with torch.no_grad():
            grads = clip_tree(mean_tree(grads, world), cfg.ttt_clip)
            free, momentum = opt.update(grads, momentum, free, scale, 0)
        return {n: free.get(n, fixed.get(n)) for n in params}, momentum

    return Adapter(init, epoch)


def chunk_batch(stream: Tensor, chunk: Chunk, cfg: Config, world: World) -> Batch:
    """This rank's rows of a chunk, as training sequences."""
    rows = (chunk.hi - chunk.lo) // cfg.eval_ctx
    share = rows // world.size
    start = chunk.lo + world.rank * share * cfg.eval_ctx
    piece = stream[start : start + share * cfg.eval_ctx + 1].numpy()
    return to_batch(piece, cfg.eval_ctx, world.device)


def adaptive_pass(scorer: Scorer, adapter: Adapter, params: Params, clock: Clock) -> EvalState:
    """Score-first: a chunk is scored with the state of the chunks before it, then the state takes the chunk in."""
    cfg, world, stream = scorer.cfg, scorer.world, scorer.stream
    total = stream.numel() - 1
    chunks = cut_chunks(total, cfg.chunk_tokens)

    def score(state: EvalState, chunk: Chunk) -> EvalState:
        before = clock.seconds()
        windows = cut_windows(chunk.lo, chunk.hi, cfg.eval_stride, cfg.eval_ctx)
        sums = scorer.windows(state.params, state.table, windows)
        return state._replace(
            sums=add_sums(state.sums, sums), score_seconds=state.score_seconds + clock.seconds() - before
        )

    def affordable(state: EvalState, chunk: Chunk) -> bool:
        """Is there time to adapt and still score what is left?"""
        rest = (len(chunks) - chunk.index - 1) * state.score_seconds / (chunk.index + 1)
        return slowest(clock.seconds() + rest, world) < cfg.eval_seconds - cfg.eval_reserve

    def learn(state: EvalState, chunk: Chunk) -> EvalState:
        tokens = stream[chunk.lo : chunk.hi + 1].long().to(world.device)
        state = state._replace(table=count_pairs(state.table, tokens))
        if not cfg.ttt or chunk.hi == total or not affordable(state, chunk):
            return state
        scale = 0.5 * (1.0 + math.cos(math.pi * chunk.index / len(chunks)))
        batch = chunk_batch(stream, chunk, cfg, world)
        todo = [(batch, scale)] * cfg.ttt_epochs
        new, momentum = functools.reduce(adapter.epoch, todo, (state.params, state.momentum))
        return state._replace(params=new, momentum=momentum, adapted=state.adapted + 1)

    def visit(state: EvalState, chunk: Chunk) -> EvalState:
        state = score(state, chunk)
        if chunk.index % 200 == 0:
            say(
                world,
                f"ttt_chunk:{chunk.index}/{len(chunks)} val_bpb:{bits_per_byte(state.sums):.6f} "
                f"adapted:{state.adapted} eval_time:{clock.seconds():.1f}s",
            )
        return learn(state, chunk)

    start = EvalState(
        params, adapter.init(params), empty_table(cfg, world.device), no_sums(world.device), 0.0, 0
    )
    return functools.reduce(visit, chunks, start)


def evaluate(net: Net, cfg: Config, world: World) -> Sums:
    """Reads the artifact back and scores the whole validation stream with it."""
    clock = start_clock()
    params, temperature = read_model(cfg, world)
    stream = validation_stream(cfg.data_path)
    tables = byte_tables(cfg.tokenizer_path, cfg.vocab_size, world.device)
    total = stream.numel() - 1
    say(world, f"val_loader: tokens:{stream.numel()} temperature:{temperature:.2f}")

    fixed = static_pass(Scorer(make_predict(net, temperature, cfg, mix=False), stream, tables, cfg, world), params)
    say(
        world,
        f"static_sliding val_loss:{mean_nll(fixed):.6f} val_bpb:{bits_per_byte(fixed):.6f} stride:{cfg.static_stride} "
        f"eval_time:{clock.seconds():.1f}s",
    )

    scorer = Scorer(make_predict(net, temperature, cfg, mix=cfg.mix), stream, tables, cfg, world)
    done = adaptive_pass(scorer, make_adapter(net, cfg, world), params, clock)
    if int(done.sums.count) != total:
        raise SystemExit(f"{int(done.sums.count)} positions were scored, the stream has {total}")
    seconds = slowest(clock.seconds(), world)
    say(world, f"eval_tokens:{int(done.sums.count)} eval_bytes:{int(done.sums.size)} eval_time:{1000 * seconds:.0f}ms")
    if seconds > cfg.eval_seconds:
        raise SystemExit(f"evaluation took {seconds:.1f} s, {cfg.eval_seconds:.0f} s are allowed")
    return done.sums


# ---------------------------------------------------------------------------------------------------------------------
# all of it


def build(net: Net, trainer: Trainer, start: TrainState, cfg: Config, world: World) -> None:
    """From fresh weights to the file on disk, on one clock."""
    clock = start_clock()
    state = train(trainer, start, clock, cfg, world)
    say(world, f"training stopped: step:{state.step} train_time:{1000 * state.seconds:.0f}ms")
    params = pick_average(net, state, cfg, world)

    hessians = collect_hessians(net, params, calibration_batches(state.cursor, cfg, world), world)
    say(world, f"hessians:{len(hessians)} from train shards, at {clock.seconds():.1f}s")
    coded = quantise(params, hessians, cfg, world)
    temperature = fit_temperature(net, dequantise(coded, world.device), cfg, world)
    say(world, f"gptq int{cfg.bits} and temperature {temperature:.2f}, at {clock.seconds():.1f}s")
    write_model(pack(coded, temperature), cfg, world)

    seconds = slowest(clock.seconds(), world)
    say(world, f"artifact written at {seconds:.1f}s of {cfg.train_seconds:.0f}s")
    if seconds > cfg.train_seconds:
        raise SystemExit("the artifact came too late, raise FINISH_SECONDS")


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def main() -> None:
    cfg = Config()
    world = join_world()
    if 8 % world.size:
        raise ValueError(f"{world.size} ranks do not divide 8")
    seed_all(cfg.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64

    say(world, f"python {sys.version.split()[0]} torch {torch.__version__} ranks {world.size}")
    say(world, " ".join(f"{k}={v}" for k, v in cfg._asdict().items()))
    net = make_net(cfg, world.device)
    params = init_params(net, cfg, world.device)
    say(world, f"model_params:{sum(p.numel() for p in params.values())} seed:{cfg.seed}")
    say(world, f"train shards:{len(train_files(cfg.data_path))} in {cfg.data_path}")

    opt = make_optimizer(cfg, world)
    trainer = make_trainer(net, opt, cfg, world)
    start = fresh_state(params, opt, world.device)
    warm_up(trainer, start, cfg, world)

    build(net, trainer, start, cfg, world)
    say(world, f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")

    sums = evaluate(net, cfg, world)
    say(world, f"final_ttt val_loss:{mean_nll(sums):.8f} val_bpb:{bits_per_byte(sums):.8f}")
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
