"""luing - a functional take on the 16 MB language model (late March 2026).

There is no module tree here. A model is a flat dict of weight tensors and a handful of pure functions over it:

    p = init_weights(c)                  dict[str, Tensor]
    logits = forward(p, tokens, c)       pure
    nll = token_nll(p, x, y, c)          pure
    grads = torch.autograd.grad(...)     never .backward(), nothing hangs on the tensors

Optimisers are loops over the dict, quantisation maps the dict to bytes and back, and the evaluation threads a dict of
adapted weights through the validation stream chunk by chunk: every chunk is scored with what was learned on the chunks
before it and only then trained on.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Budget: 600 s for training including the GPTQ calibration, 600 s for the evaluation, 16,000,000 bytes for both files.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

try:
    import brotli
except ImportError:  # the stock image has only lzma
    brotli = None

Weights = dict[str, Tensor]
BYTE_LIMIT = 16_000_000


# ----------------------------------------------------------------------------------------------------------------------
# configuration
# ----------------------------------------------------------------------------------------------------------------------


def env(name: str, default):
    """The environment's value in the type of the default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


@dataclass(frozen=True)
class Cfg:
    """Every setting of a run. Frozen: the functions below are closed over one of these and nothing else."""

    # data
    data_dir: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = env("RUN_ID", "luing")
    seed: int = env("SEED", 1337)

    # shape
    vocab: int = env("VOCAB_SIZE", 1024)
    bos: int = env("BOS_ID", 1)
    layers: int = env("NUM_LAYERS", 11)
    dim: int = env("MODEL_DIM", 512)
    heads: int = env("NUM_HEADS", 8)
    kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_mult: float = env("MLP_MULT", 3.0)
    rope_dims: int = env("ROPE_DIMS", 16)
    rope_base: float = env("ROPE_BASE", 10000.0)
    softcap: float = env("LOGIT_SOFTCAP", 30.0)
    xsa_last: int = env("XSA_LAST_N", 4)
    pair_slots: int = env("BIGRAM_SLOTS", 2048)
    pair_dim: int = env("BIGRAM_DIM", 128)
    qk_gain: float = env("QK_GAIN_INIT", 1.5)

    # training
    steps: int = env("ITERATIONS", 20000)
    batch_tokens: int = env("TRAIN_BATCH_TOKENS", 786_432)
    seq: int = env("TRAIN_SEQ_LEN", 2048)
    warmup_steps: int = env("WARMUP_STEPS", 20)
    warmdown: int = env("WARMDOWN_ITERS", 3500)
    train_seconds: float = env("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve_seconds: float = env("GPTQ_RESERVE_SECONDS", 20.0)
    log_every: int = env("TRAIN_LOG_EVERY", 500)
    val_every: int = env("VAL_LOSS_EVERY", 4000)
    ema_decay: float = env("EMA_DECAY", 0.997)
    qat_below: float = env("LATE_QAT_THRESHOLD", 0.15)

    # optimisers
    matrix_lr: float = env("MATRIX_LR", 0.025)
    matrix_momentum: float = env("MUON_MOMENTUM", 0.99)
    matrix_momentum_start: float = env("MUON_MOMENTUM_WARMUP_START", 0.92)
    matrix_momentum_steps: int = env("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    matrix_decay: float = env("MUON_WD", 0.04)
    ns_steps: int = env("MUON_BACKEND_STEPS", 5)
    embed_lr: float = env("TIED_EMBED_LR", 0.035)
    vector_lr: float = env("SCALAR_LR", 0.025)
    adam_decay: float = env("ADAM_WD", 0.04)
    beta1: float = env("BETA1", 0.9)
    beta2: float = env("BETA2", 0.95)
    adam_eps: float = env("ADAM_EPS", 1e-8)
    clip_norm: float = env("GRAD_CLIP_NORM", 0.3)

    # quantisation
    matrix_bits: int = env("MATRIX_BITS", 6)
    embed_bits: int = env("EMBED_BITS", 8)
    calib_batches: int = env("GPTQ_CALIB_BATCHES", 16)
    calib_seqs: int = env("GPTQ_CALIB_SEQS", 8)
    gptq_block: int = env("GPTQ_BLOCK", 128)
    gptq_damp: float = env("GPTQ_DAMP", 0.01)

    # evaluation
    eval_seq: int = env("EVAL_SEQ_LEN", 2048)
    eval_stride: int = env("EVAL_STRIDE", 64)
    eval_batch: int = env("EVAL_BATCH_SEQS", 32)
    eval_seconds: float = env("EVAL_SECONDS", 600.0)
    eval_margin: float = env("EVAL_MARGIN_SECONDS", 40.0)
    log_sliding: bool = env("LOG_SLIDING", True)
    ttt: bool = env("TTT_ENABLED", True)
    ttt_chunk: int = env("TTT_CHUNK_TOKENS", 32768)
    ttt_epochs: int = env("TTT_EPOCHS", 3)
    ttt_lr: float = env("TTT_LR", 0.002)
    ttt_momentum: float = env("TTT_MOMENTUM", 0.9)
    ttt_clip: float = env("TTT_GRAD_CLIP", 1.0)
    ttt_batch: int = env("TTT_BATCH_SEQS", 2)
    ttt_freeze: int = env("TTT_FREEZE_BLOCKS", 2)

    # files
    artifact: str = env("ARTIFACT_PATH", "final_model.luing")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def hidden(self) -> int:
        return int(self.dim * self.mlp_mult)

    @property
    def train_glob(self) -> str:
        return os.path.join(self.data_dir, "fineweb_train_*.bin")

    @property
    def val_glob(self) -> str:
        return os.path.join(self.data_dir, "fineweb_val_*.bin")


def check_cfg(c: Cfg) -> None:
    if c.dim % c.heads:
        raise ValueError(f"MODEL_DIM {c.dim} is no multiple of NUM_HEADS {c.heads}")
    if c.heads % c.kv_heads:
        raise ValueError(f"NUM_HEADS {c.heads} is no multiple of NUM_KV_HEADS {c.kv_heads}")
    if c.rope_dims % 2 or c.rope_dims > c.head_dim:
        raise ValueError(f"ROPE_DIMS {c.rope_dims} does not fit a head of {c.head_dim}")
    if not 0 < c.eval_stride <= c.eval_seq:
        raise ValueError(f"EVAL_STRIDE {c.eval_stride} must lie in 1..{c.eval_seq}")
    if c.ttt_chunk % c.eval_stride:
        raise ValueError(f"TTT_CHUNK_TOKENS {c.ttt_chunk} is no multiple of EVAL_STRIDE {c.eval_stride}")


# ----------------------------------------------------------------------------------------------------------------------
# ranks
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comm:
    """Where this process stands among the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, t: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def agree(self, flag: bool) -> bool:
        """True on every rank as soon as it is true on one."""
        if self.world == 1:
            return flag
        t = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item() > 0)

    def share(self, items: list) -> list:
        """This rank's contiguous part of a list: the parts are disjoint and together they are the list."""
        n = len(items)
        return items[n * self.rank // self.world : n * (self.rank + 1) // self.world]

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def join_ranks() -> Comm:
    if not torch.cuda.is_available():
        raise RuntimeError("this script needs CUDA")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", rank=rank, world_size=world, device_id=device)
        dist.barrier()
    return Comm(rank, world, device)


def make_logger(c: Cfg, comm: Comm) -> Callable[..., None]:
    """say(text) prints on rank 0 and appends to the run's log; say(text, echo=False) only appends."""
    if not comm.first:
        return lambda text, echo=True: None
    os.makedirs("logs", exist_ok=True)
    path = Path("logs") / f"{c.run_id}.txt"

    def say(text: str, echo: bool = True) -> None:
        if echo:
            print(text, flush=True)
        with path.open("a", encoding="utf-8") as file:
            print(text, file=file)

    return say


def now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------------------------------
# data
# ----------------------------------------------------------------------------------------------------------------------

HEADER_INTS = 256
SHARD_MAGIC = 20240520
SHARD_VERSION = 1


def shard_length(path: str) -> int:
    head = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if head.size != HEADER_INTS or int(head[0]) != SHARD_MAGIC or int(head[1]) != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    return int(head[2])


def read_shard(path: str) -> Tensor:
    """The tokens of one shard, as uint16 on the host."""
    count = shard_length(path)
    body = np.fromfile(path, dtype="<u2", count=count, offset=4 * HEADER_INTS)
    if body.size != count:
        raise ValueError(f"{path}: {body.size} tokens where the header says {count}")
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def shard_paths(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no shards match {pattern}")
    return found


def token_source(paths: list[str]) -> Callable[[int], Tensor]:
    """take(n): the next n tokens of the shards, in order, over and over."""
    at = {"file": 0, "pos": 0, "shard": read_shard(paths[0])}

    def take(n: int) -> Tensor:
        parts: list[Tensor] = []
        while n > 0:
            left = at["shard"].numel() - at["pos"]
            if left <= 0:
                at["file"] = (at["file"] + 1) % len(paths)
                at["shard"] = read_shard(paths[at["file"]])
                at["pos"] = 0
                continue
            k = min(n, left)
            parts.append(at["shard"][at["pos"] : at["pos"] + k])
            at["pos"] += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return take


def batch_source(paths: list[str], tokens: int, seq: int, comm: Comm) -> Callable[[], tuple[Tensor, Tensor]]:
    """draw(): this rank's inputs and targets of the next global batch of so many tokens."""
    mine = tokens // comm.world
    if mine % seq:
        raise ValueError(f"{tokens} tokens over {comm.world} ranks are no whole sequences of {seq}")
    take = token_source(paths)

    def draw() -> tuple[Tensor, Tensor]:
        span = mine + 1
        block = take(span * comm.world)[comm.rank * span : (comm.rank + 1) * span]
        block = block.to(torch.int32).pin_memory().to(comm.device, non_blocking=True).long()
        return block[:-1].view(-1, seq), block[1:].view(-1, seq)

    return draw


def load_validation(c: Cfg, comm: Comm) -> Tensor:
    """All validation tokens, every shard, as one int32 stream on the device."""
    parts = [read_shard(path).to(torch.int32) for path in shard_paths(c.val_glob)]
    return torch.cat(parts).to(comm.device)


# ----------------------------------------------------------------------------------------------------------------------
# bytes of tokens
# ----------------------------------------------------------------------------------------------------------------------


def byte_tables(sp: spm.SentencePieceProcessor, vocab: int, device: torch.device) -> Weights:
    """How many bytes of text a token stands for.

    own:   bytes of the piece itself, without the mark of a leading space
    gap:   the piece begins with that mark: one byte more, unless it opens a text
    edge:  control tokens, after which a leading space is not text
    """
    n = max(vocab, sp.vocab_size())
    own = np.zeros(n, dtype=np.int32)
    gap = np.zeros(n, dtype=np.bool_)
    edge = np.ones(n, dtype=np.bool_)
    for t in range(sp.vocab_size()):
        if sp.is_control(t) or sp.is_unknown(t) or sp.is_unused(t):
            continue
        edge[t] = False
        if sp.is_byte(t):
            own[t] = 1
            continue
        piece = sp.id_to_piece(t)
        if piece.startswith("\u2581"):
            gap[t] = True
            piece = piece[1:]
        own[t] = len(piece.encode("utf-8"))
    return {
        "own": torch.from_numpy(own).to(device),
        "gap": torch.from_numpy(gap).to(device),
        "edge": torch.from_numpy(edge).to(device),
    }


def target_bytes(tables: Weights, x: Tensor, y: Tensor) -> Tensor:
    """Bytes of each target y, given the token x before it."""
    space = tables["gap"][y] & ~tables["edge"][x]
    return tables["own"][y] + space.to(torch.int32)


# ----------------------------------------------------------------------------------------------------------------------
# the model: functions over a dict of weights
# ----------------------------------------------------------------------------------------------------------------------


def init_weights(c: Cfg, device: torch.device) -> Weights:
    """Fresh weights; the same on every rank, since they are drawn on the host from the seed."""
    gen = torch.Generator().manual_seed(c.seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=gen) * std

    def orthogonal(rows: int, cols: int, gain: float = 1.0) -> Tensor:
        a = torch.randn(max(rows, cols), min(rows, cols), generator=gen)
        q, r = torch.linalg.qr(a)
        q = q * torch.sign(torch.diagonal(r))
        return gain * (q if rows >= cols else q.T).contiguous()

    p: Weights = {}
    p["embed"] = normal(c.vocab, c.dim, std=0.005)
    p["pair.table"] = torch.zeros(c.pair_slots, c.pair_dim)
    p["pair.up"] = normal(c.dim, c.pair_dim, std=0.02)
    p["pair.gain"] = torch.full((1,), 0.05)
    p["smear"] = torch.zeros(c.dim)
    out_gain = 1.0 / math.sqrt(2 * c.layers)
    for i in range(c.layers):
        p[f"{i}.q"] = orthogonal(c.dim, c.dim)
        p[f"{i}.k"] = orthogonal(c.kv_dim, c.dim)
        p[f"{i}.v"] = orthogonal(c.kv_dim, c.dim)
        p[f"{i}.o"] = orthogonal(c.dim, c.dim, out_gain)
        p[f"{i}.up"] = orthogonal(c.hidden, c.dim)
        p[f"{i}.down"] = orthogonal(c.dim, c.hidden, out_gain)
        p[f"{i}.gain"] = torch.full((c.heads,), c.qk_gain)
        p[f"{i}.attn"] = torch.ones(c.dim)
        p[f"{i}.mlp"] = torch.ones(c.dim)
        p[f"{i}.mix"] = torch.stack([torch.ones(c.dim), torch.zeros(c.dim)])
    for j in range(c.layers // 2):
        p[f"skip.{j}"] = torch.ones(c.dim)
    return {name: w.to(device=device, dtype=torch.float32) for name, w in p.items()}


def is_matrix(name: str) -> bool:
    """Weights of the blocks that Muon steps and GPTQ quantises."""
    return name.split(".")[-1] in ("q", "k", "v", "o", "up", "down") and name.split(".")[0].isdigit()


def is_table(name: str) -> bool:
    """Embedding-like weights: Adam, eight bits."""
    return name in ("embed", "pair.table", "pair.up")


def block_of(name: str) -> int | None:
    head = name.split(".")[0]
    return int(head) if head.isdigit() else None


def as_leaves(p: Weights) -> Weights:
    """The same numbers as fresh leaves that gradients can be taken for."""
    return {name: w.detach().clone().requires_grad_(True) for name, w in p.items()}


def frozen_copy(p: Weights) -> Weights:
    return {name: w.detach().clone() for name, w in p.items()}


@torch.no_grad()
def overwrite(p: Weights, source: Weights) -> None:
    for name, w in p.items():
        w.copy_(source[name])


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def lin(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w.to(x.dtype))


def rope_tables(n: int, c: Cfg, device: torch.device) -> tuple[Tensor, Tensor]:
    inv = c.rope_base ** (-torch.arange(0, c.rope_dims, 2, device=device, dtype=torch.float32) / c.rope_dims)
    angle = torch.outer(torch.arange(n, device=device, dtype=torch.float32), inv)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial rotary embedding of [batch, time, head, head_dim]: the first rope_dims turn, the rest pass."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def pair_slot(tokens: Tensor, c: Cfg) -> Tensor:
    """Hashed slot of (previous token, token); what has no token before it in its document has a slot of its own."""
    t = tokens.to(torch.int32)
    alone = c.pair_slots - 1
    slot = torch.full_like(t, alone)
    slot[:, 1:] = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % alone
    return slot.masked_fill(t == c.bos, alone).long()


def embed_tokens(p: Weights, tokens: Tensor, c: Cfg) -> Tensor:
    h = F.embedding(tokens, p["embed"]).to(torch.bfloat16)
    pairs = F.embedding(pair_slot(tokens, c), p["pair.table"]).to(torch.bfloat16)
    h = h + p["pair.gain"].to(h.dtype) * lin(pairs, p["pair.up"])
    h = rms(h)
    gate = torch.sigmoid(p["smear"]).to(h.dtype) * 0.5 * (tokens != c.bos).unsqueeze(-1).to(h.dtype)
    before = torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), dim=1)
    return (1.0 - gate) * h + gate * before


def without_self(y: Tensor, v: Tensor) -> Tensor:
    """Takes the direction of each position's own value out of what its heads gathered."""
    b, t, h, d = y.shape
    kv = v.size(2)
    y = y.view(b, t, kv, h // kv, d)
    unit = F.normalize(v, dim=-1).unsqueeze(3)
    y = y - (y * unit).sum(-1, keepdim=True) * unit
    return y.reshape(b, t, h, d)


def attention(p: Weights, i: int, x: Tensor, rope: tuple[Tensor, Tensor], c: Cfg, tap) -> Tensor:
    b, t, _ = x.shape
    if tap is not None:
        for part in ("q", "k", "v"):
            tap(f"{i}.{part}", x)
    q = lin(x, p[f"{i}.q"]).view(b, t, c.heads, c.head_dim)
    k = lin(x, p[f"{i}.k"]).view(b, t, c.kv_heads, c.head_dim)
    v = lin(x, p[f"{i}.v"]).view(b, t, c.kv_heads, c.head_dim)
    q = rotate(rms(q), *rope) * p[f"{i}.gain"].to(q.dtype)[None, None, :, None]
    k = rotate(rms(k), *rope)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=c.heads != c.kv_heads
    ).transpose(1, 2)
    if i >= c.layers - c.xsa_last:
        y = without_self(y, v)
    y = y.reshape(b, t, c.dim)
    if tap is not None:
        tap(f"{i}.o", y)
    return lin(y, p[f"{i}.o"])


def feed_forward(p: Weights, i: int, x: Tensor, tap) -> Tensor:
    if tap is not None:
        tap(f"{i}.up", x)
    h = F.leaky_relu(lin(x, p[f"{i}.up"]), 0.5).square()
    if tap is not None:
        tap(f"{i}.down", h)
    return lin(h, p[f"{i}.down"])


def layer(p: Weights, i: int, h: Tensor, h0: Tensor, rope: tuple[Tensor, Tensor], c: Cfg, tap) -> Tensor:
    mix = p[f"{i}.mix"].to(h.dtype)
    h = mix[0] * h + mix[1] * h0
    depth = 1.0 / math.sqrt(i + 1)
    h = h + p[f"{i}.attn"].to(h.dtype) * attention(p, i, rms(h) * depth, rope, c, tap)
    return h + p[f"{i}.mlp"].to(h.dtype) * feed_forward(p, i, rms(h) * depth, tap)


def forward(p: Weights, tokens: Tensor, c: Cfg, tap=None) -> Tensor:
    """Logits of [batch, time, vocab] in float32. tap(name, input) is shown what each matrix is fed."""
    h = h0 = embed_tokens(p, tokens, c)
    rope = rope_tables(tokens.size(1), c, tokens.device)
    half = c.layers // 2
    skips: list[Tensor] = []
    for i in range(c.layers):
        if i >= c.layers - half:
            h = h + p[f"skip.{c.layers - 1 - i}"].to(h.dtype) * skips.pop()
        h = layer(p, i, h, h0, rope, c, tap)
        if i < half:
            skips.append(h)
    logits = lin(rms(h), p["embed"]).float()
    return c.softcap * torch.tanh(logits / c.softcap)


def token_nll(p: Weights, x: Tensor, y: Tensor, c: Cfg) -> Tensor:
    """-ln p(y) at each position, [batch, time]."""
    logits = forward(p, x, c)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)


def mean_nll(p: Weights, x: Tensor, y: Tensor, c: Cfg) -> Tensor:
    logits = forward(p, x, c)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def fake_quantised(p: Weights, bits: int) -> Weights:
    """The weights as they will be after rounding, with a straight-through gradient."""
    top = 2 ** (bits - 1) - 1
    out = dict(p)
    for name, w in p.items():
        if is_matrix(name):
            scale = w.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / top
            rounded = (w.detach() / scale).round().clamp(-top, top) * scale
            out[name] = w + (rounded - w).detach()
    return out


def rounded_mean_nll(p: Weights, x: Tensor, y: Tensor, c: Cfg) -> Tensor:
    return mean_nll(fake_quantised(p, c.matrix_bits), x, y, c)


def count_weights(p: Weights) -> int:
    return sum(w.numel() for w in p.values())


# ----------------------------------------------------------------------------------------------------------------------
# optimisers: loops over the dict
# ----------------------------------------------------------------------------------------------------------------------


def loss_and_grads(fn: Callable, p: Weights, names: list[str], x: Tensor, y: Tensor) -> tuple[Tensor, Weights]:
    """Loss of a batch and the gradients of the named weights."""
    loss = fn(p, x, y)
    grads = torch.autograd.grad(loss, [p[name] for name in names])
    return loss.detach(), dict(zip(names, grads))


def sum_grads(grads: Weights, comm: Comm, divide: float) -> Weights:
    """Gradients summed over ranks as one flat buffer, then divided."""
    flat = torch.cat([g.reshape(-1) for g in grads.values()]).float()
    comm.total(flat).div_(divide)
    out, at = {}, 0
    for name, g in grads.items():
        out[name] = flat[at : at + g.numel()].view_as(g)
        at += g.numel()
    return out


@torch.no_grad()
def clip_grads(grads: Weights, limit: float) -> Tensor:
    norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
    if limit > 0:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for g in grads.values():
            g.mul_(factor)
    return norm


def orthogonalised(g: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix."""
    a, b, d = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16)
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + d * (s @ s)) @ x
    return x.T if tall else x


def muon_state(p: Weights) -> Weights:
    return {name: torch.zeros_like(w) for name, w in p.items() if is_matrix(name)}


@torch.no_grad()
def muon_step(p: Weights, grads: Weights, momenta: Weights, lr: float, beta: float, c: Cfg, comm: Comm) -> None:
    """One Muon step. Each rank orthogonalises every world-th matrix; the updates are then summed."""
    sizes = [p[name].numel() for name in momenta]
    updates = torch.zeros(sum(sizes), device=comm.device, dtype=torch.bfloat16)
    at = 0
    for number, (name, m) in enumerate(momenta.items()):
        g = grads[name]
        m.mul_(beta).add_(g)
        if number % comm.world == comm.rank:
            u = orthogonalised(g.add(m, alpha=beta), c.ns_steps)
            u = u * max(1.0, u.size(0) / u.size(1)) ** 0.5
            updates[at : at + sizes[number]] = u.reshape(-1)
        at += sizes[number]
    comm.total(updates)
    at = 0
    for number, name in enumerate(momenta):
        w = p[name]
        w.mul_(1.0 - lr * c.matrix_decay)
        w.add_(updates[at : at + sizes[number]].view_as(w).float(), alpha=-lr)
        at += sizes[number]


def adam_state(p: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in p.items() if not is_matrix(name)}


@torch.no_grad()
def adam_step(p: Weights, grads: Weights, moments: dict, t: int, scale: float, c: Cfg) -> None:
    fix1, fix2 = 1.0 - c.beta1**t, 1.0 - c.beta2**t
    for name, (m, v) in moments.items():
        g, w = grads[name], p[name]
        m.lerp_(g, 1.0 - c.beta1)
        v.lerp_(g.square(), 1.0 - c.beta2)
        lr = scale * (c.embed_lr if is_table(name) else c.vector_lr)
        if is_table(name):
            w.mul_(1.0 - lr * c.adam_decay)
        w.addcdiv_(m / fix1, (v / fix2).sqrt().add_(c.adam_eps), value=-lr)


@torch.no_grad()
def sgd_step(p: Weights, grads: Weights, velocity: Weights, lr: float, beta: float) -> None:
    for name, g in grads.items():
        velocity[name].mul_(beta).add_(g)
        p[name].add_(velocity[name], alpha=-lr)


@torch.no_grad()
def ema_step(shadow: Weights, p: Weights, decay: float) -> None:
    for name, w in p.items():
        shadow[name].lerp_(w, 1.0 - decay)


def lr_scale(step: int, elapsed: float, budget: float, c: Cfg) -> float:
    """1 until the last `warmdown` steps that the clock allows, then linear to 0."""
    if step == 0 or elapsed <= 0:
        return 1.0
    per_step = elapsed / step
    left = max(budget - elapsed, 0.0)
    span = c.warmdown * per_step
    return min(1.0, left / span) if span > 0 else 1.0


def momentum_at(step: int, c: Cfg) -> float:
    f = min(step / max(c.matrix_momentum_steps, 1), 1.0)
    return (1.0 - f) * c.matrix_momentum_start + f * c.matrix_momentum


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Stopwatch:
    """Seconds since it was started, less what was spent between pause() and resume()."""

    begun: float = 0.0
    off: float = 0.0
    stopped_at: float | None = None

    @classmethod
    def started(cls) -> Stopwatch:
        return cls(begun=now())

    def read(self) -> float:
        t = self.stopped_at if self.stopped_at is not None else now()
        return t - self.begun - self.off

    def pause(self) -> None:
        self.stopped_at = now()

    def resume(self) -> None:
        self.off += now() - self.stopped_at
        self.stopped_at = None


@dataclass
class Nets:
    """The compiled functions, closed over the configuration."""

    train: Callable[[Weights, Tensor, Tensor], Tensor]
    train_rounded: Callable[[Weights, Tensor, Tensor], Tensor]
    nll: Callable[[Weights, Tensor, Tensor], Tensor]


def build_nets(c: Cfg) -> Nets:
    return Nets(
        train=torch.compile(lambda p, x, y: mean_nll(p, x, y, c), dynamic=False, fullgraph=True),
        train_rounded=torch.compile(lambda p, x, y: rounded_mean_nll(p, x, y, c), dynamic=False, fullgraph=True),
        nll=torch.compile(lambda p, x, y: token_nll(p, x, y, c), dynamic=False, fullgraph=True),
    )


def warm_up(p: Weights, nets: Nets, c: Cfg, comm: Comm, say) -> None:
    """Compiles what training needs. Works on a copy of the weights, with batches drawn from a source of its own."""
    if c.warmup_steps <= 0:
        return
    scratch = as_leaves(p)
    names = list(scratch)
    draw = batch_source(shard_paths(c.train_glob), c.batch_tokens, c.seq, comm)
    momenta, moments = muon_state(scratch), adam_state(scratch)
    for k in range(c.warmup_steps):
        x, y = draw()
        fn = nets.train_rounded if k >= c.warmup_steps - 3 else nets.train
        _, grads = loss_and_grads(fn, scratch, names, x, y)
        grads = sum_grads(grads, comm, comm.world)
        muon_step(scratch, grads, momenta, c.matrix_lr, c.matrix_momentum_start, c, comm)
        adam_step(scratch, grads, moments, k + 1, 1.0, c)
    say(f"warm_up: {c.warmup_steps} steps on a copy")


def train(p: Weights, nets: Nets, val: Tensor, tables: Weights, c: Cfg, comm: Comm, say) -> tuple[Weights, Stopwatch]:
    """Trains p in place until the clock says stop; returns the averaged weights and the running clock."""
    draw = batch_source(shard_paths(c.train_glob), c.batch_tokens, c.seq, comm)
    names = list(p)
    momenta, moments = muon_state(p), adam_state(p)
    shadow = frozen_copy(p)
    budget = c.train_seconds - c.reserve_seconds
    comm.wait()
    clock = Stopwatch.started()
    rounding = False
    step = 0
    while True:
        last = step >= c.steps or comm.agree(clock.read() >= budget)
        if c.val_every > 0 and (last or step % c.val_every == 0):
            clock.pause()
            loss, bpb = score(evaluate_plain(p, nets, val, tables, c, comm))
            say(f"step:{step}/{c.steps} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1000 * clock.read():.0f}ms")
            clock.resume()
        if last:
            break
        scale = lr_scale(step, clock.read(), budget, c)
        if not rounding and scale < c.qat_below:
            rounding = True
            say(f"late_qat: on at step {step} scale:{scale:.4f}")
        x, y = draw()
        loss, grads = loss_and_grads(nets.train_rounded if rounding else nets.train, p, names, x, y)
        grads = sum_grads(grads, comm, comm.world)
        clip_grads(grads, c.clip_norm)
        muon_step(p, grads, momenta, c.matrix_lr * scale, momentum_at(step, c), c, comm)
        adam_step(p, grads, moments, step + 1, scale, c)
        ema_step(shadow, p, c.ema_decay)
        step += 1
        if c.log_every > 0 and (step <= 5 or step % c.log_every == 0):
            t = clock.read()
            say(f"step:{step}/{c.steps} train_loss:{loss.item():.4f} train_time:{1000 * t:.0f}ms "
                f"step_avg:{1000 * t / step:.2f}ms")
    say(f"training stopped: step:{step} train_time:{1000 * clock.read():.0f}ms")
    say(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    return shadow, clock


# ----------------------------------------------------------------------------------------------------------------------
# quantisation
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def input_moments(p: Weights, draw: Callable, clock: Stopwatch, c: Cfg, comm: Comm, say) -> Weights:
    """Second moments of what each matrix is fed, over a few training batches; the clock ends it early if it must."""
    sums: Weights = {}
    rows = torch.zeros(1, device=comm.device)

    def tap(name: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.size(-1)).float()
        if name not in sums:
            sums[name] = torch.zeros(flat.size(1), flat.size(1), device=flat.device)
        sums[name].addmm_(flat.T, flat)

    used = 0
    for _ in range(c.calib_batches):
        x, _ = draw()
        forward(p, x, c, tap)
        rows += x.numel()
        used += 1
        if comm.agree(clock.read() > c.train_seconds - 0.6 * c.reserve_seconds):
            break
    comm.total(rows)
    for h in sums.values():
        comm.total(h).div_(rows)
    say(f"gptq: {used} train batches, clock {clock.read():.1f}s")
    return sums


def best_scales(w: Tensor, bits: int) -> Tensor:
    """Scale per row: the clipping point among a few that gives the least squared error."""
    top = 2 ** (bits - 1) - 1
    peak = w.abs().amax(dim=1).clamp_min(1e-8)
    best, least = peak / top, torch.full_like(peak, float("inf"))
    for share in (1.0, 0.97, 0.94, 0.9, 0.85, 0.8):
        s = peak * share / top
        q = (w / s[:, None]).round().clamp(-top, top)
        err = (q * s[:, None] - w).square().sum(1)
        better = err < least
        best, least = torch.where(better, s, best), torch.where(better, err, least)
    return best.to(torch.float16).float().clamp_min(6e-8)


def gptq(w: Tensor, h: Tensor, c: Cfg) -> tuple[Tensor, Tensor]:
    """Codes and row scales of a matrix, the rounding error of each column pushed into the columns still to come."""
    top = 2 ** (c.matrix_bits - 1) - 1
    w, h = w.clone().float(), h.clone().float()
    n = w.size(1)
    dead = torch.diagonal(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(torch.diagonal(h), descending=True)
    w, h = w[:, order], h[order][:, order]
    h += c.gptq_damp * torch.diagonal(h).mean() * torch.eye(n, device=h.device)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale = best_scales(w, c.matrix_bits)
    codes = torch.zeros_like(w)
    for a in range(0, n, c.gptq_block):
        b = min(a + c.gptq_block, n)
        block, errors = w[:, a:b].clone(), torch.zeros(w.size(0), b - a, device=w.device)
        for j in range(b - a):
            col, d = block[:, j], upper[a + j, a + j]
            q = (col / scale).round().clamp(-top, top)
            codes[:, a + j] = q
            err = (col - q * scale) / d
            block[:, j:] -= err[:, None] * upper[a + j, a + j : b][None, :]
            errors[:, j] = err
        w[:, b:] -= errors @ upper[a:b, b:]
    back = torch.argsort(order)
    return codes[:, back].to(torch.int8), scale.to(torch.float16)


def rounded_rows(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    w = w.float()
    scale = best_scales(w, bits)
    return (w / scale[:, None]).round().clamp(-top, top).to(torch.int8), scale.to(torch.float16)


@torch.no_grad()
def quantise(p: Weights, moments: Weights, c: Cfg) -> Weights:
    """The artifact's tensors: NAME:q and NAME:s for what is rounded, NAME in half precision for the rest."""
    out: Weights = {}
    for name, w in p.items():
        if is_matrix(name):
            out[name + ":q"], out[name + ":s"] = gptq(w, moments[name], c)
        elif is_table(name):
            out[name + ":q"], out[name + ":s"] = rounded_rows(w, c.embed_bits)
        else:
            out[name] = w.to(torch.float16)
    return {name: t.cpu().contiguous() for name, t in out.items()}


def restored(q: Weights, device: torch.device) -> Weights:
    p: Weights = {}
    for name, t in q.items():
        if name.endswith(":q"):
            stem = name[:-2]
            p[stem] = (t.float() * q[stem + ":s"].float()[:, None]).to(device)
        elif not name.endswith(":s"):
            p[name] = t.float().to(device)
    return p


# ----------------------------------------------------------------------------------------------------------------------
# the artifact: a table of contents and one compressed stream per type
# ----------------------------------------------------------------------------------------------------------------------

MAGIC = b"LUNG"
DTYPES = {"int8": torch.int8, "float16": torch.float16}


def squeeze(raw: bytes) -> bytes:
    """The shortest of the compressors at hand, told apart by the first byte."""
    lz = lzma.compress(raw, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    options = [b"x" + lz]
    if brotli is not None:
        options.append(b"b" + brotli.compress(raw, quality=11, lgwin=24))
    return min(options, key=len)


def unsqueeze(blob: bytes) -> bytes:
    if blob[:1] == b"x":
        return lzma.decompress(blob[1:])
    if brotli is None:
        raise RuntimeError("the artifact was packed with brotli, which is not installed")
    return brotli.decompress(blob[1:])


def pack(q: Weights) -> bytes:
    """Streams ordered by type and then name; halves are split into high and low bytes."""
    toc = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(q.items())]
    head = json.dumps(toc, separators=(",", ":")).encode()
    whole = b"".join(q[name].numpy().tobytes() for name, kind, _ in toc if kind == "int8")
    halves = np.concatenate([q[name].numpy().reshape(-1) for name, kind, _ in toc if kind == "float16"])
    split = halves.view(np.uint8).reshape(-1, 2).T.copy().tobytes()
    parts = [squeeze(head), squeeze(whole), squeeze(split)]
    out = io.BytesIO()
    out.write(MAGIC)
    for part in parts:
        out.write(struct.pack("<I", len(part)))
        out.write(part)
    return out.getvalue()


def unpack(blob: bytes) -> Weights:
    if blob[:4] != MAGIC:
        raise ValueError("not an artifact of this script")
    parts, at = [], 4
    for _ in range(3):
        (n,) = struct.unpack_from("<I", blob, at)
        parts.append(unsqueeze(blob[at + 4 : at + 4 + n]))
        at += 4 + n
    toc = json.loads(parts[0])
    whole = np.frombuffer(parts[1], dtype=np.int8)
    halves = np.frombuffer(parts[2], dtype=np.uint8).reshape(2, -1).T.copy().view(np.float16).reshape(-1)
    streams, ends = {"int8": whole, "float16": halves}, {"int8": 0, "float16": 0}
    q: Weights = {}
    for name, kind, shape in toc:
        n = math.prod(shape)
        piece = streams[kind][ends[kind] : ends[kind] + n]
        q[name] = torch.from_numpy(piece.copy()).view(*shape).to(DTYPES[kind])
        ends[kind] += n
    return q


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def save_artifact(q: Weights, c: Cfg, say) -> int:
    """Writes the artifact and says what it all weighs."""
    blob = pack(q)
    Path(c.artifact).write_bytes(blob)
    code = code_bytes()
    total = len(blob) + code
    say(f"Serialized model: {len(blob)} bytes")
    say(f"Code size: {code} bytes")
    say(f"Total submission size: {total} bytes (limit {BYTE_LIMIT})")
    if total > BYTE_LIMIT:
        raise RuntimeError(f"{total} bytes are too many")
    return total


# ----------------------------------------------------------------------------------------------------------------------
# scoring
# ----------------------------------------------------------------------------------------------------------------------

Window = tuple[int, int, int]  # where its inputs start; the first and one past the last target that it counts


def new_tally(device: torch.device) -> Tensor:
    """[sum of -ln p, bytes, tokens], in double precision."""
    return torch.zeros(3, dtype=torch.float64, device=device)


def score(tally: Tensor) -> tuple[float, float]:
    """Loss per token in nats and bits per byte of a tally that is already summed over ranks."""
    nll, size, count = tally.tolist()
    return nll / count, nll / math.log(2.0) / size


def window_plan(targets: int, seq: int, stride: int) -> list[Window]:
    """Overlapping windows over targets 0..targets-1, each of which is counted by exactly one of them.

    Target i is token i+1 of the stream. The first window counts all that it holds, each further one the `stride`
    targets (at the end of the stream: fewer) that no window before it reached.
    """
    plan: list[Window] = []
    done = 0
    while done < targets:
        end = min(max(seq, done + stride), targets)
        plan.append((max(end - seq, 0), done, end))
        done = end
    return plan


def chunk_plan(plan: list[Window], size: int) -> list[list[Window]]:
    """The windows in runs that together count about `size` targets each, in the order of the stream."""
    chunks: list[list[Window]] = []
    room = 0
    for window in plan:
        if room <= 0:
            chunks.append([])
            room = size
        chunks[-1].append(window)
        room -= window[2] - window[1]
    return chunks


def gather(stream: Tensor, group: list[Window], seq: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the mask of counted targets of some windows."""
    spec = torch.tensor(group, device=stream.device)
    at = spec[:, :1] + torch.arange(seq, device=stream.device)[None, :]
    counted = (at >= spec[:, 1:2]) & (at < spec[:, 2:3])
    return stream[at].long(), stream[at + 1].long(), counted


def batches_of(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Groups of exactly `size` windows; the last one is filled up with windows that count nothing."""
    for a in range(0, len(windows), size):
        group = windows[a : a + size]
        start, _, end = group[-1]
        yield group + [(start, end, end)] * (size - len(group))


@torch.no_grad()
def score_windows(p: Weights, nets: Nets, stream: Tensor, windows: list[Window], tables: Weights, c: Cfg,
                  tally: Tensor) -> None:
    """Adds the counted targets of the windows to the tally."""
    seq = min(c.eval_seq, stream.numel() - 1)
    for group in batches_of(windows, c.eval_batch):
        x, y, counted = gather(stream, group, seq)
        nll = nets.nll(p, x, y)
        tally[0] += nll[counted].double().sum()
        tally[1] += target_bytes(tables, x, y)[counted].double().sum()
        tally[2] += counted.sum()


def evaluate_plain(p: Weights, nets: Nets, val: Tensor, tables: Weights, c: Cfg, comm: Comm) -> Tensor:
    """Windows side by side, without overlap: quick, for the log."""
    plan = window_plan(val.numel() - 1, c.eval_seq, c.eval_seq)
    tally = new_tally(comm.device)
    score_windows(p, nets, val, comm.share(plan), tables, c, tally)
    return comm.total(tally)


def evaluate_sliding(p: Weights, nets: Nets, val: Tensor, tables: Weights, c: Cfg, comm: Comm) -> Tensor:
    """Overlapping windows, frozen weights."""
    plan = window_plan(val.numel() - 1, c.eval_seq, c.eval_stride)
    tally = new_tally(comm.device)
    score_windows(p, nets, val, comm.share(plan), tables, c, tally)
    return comm.total(tally)


# ----------------------------------------------------------------------------------------------------------------------
# test-time training: a chunk is scored first and learned from afterwards
# ----------------------------------------------------------------------------------------------------------------------


def adaptable(p: Weights, c: Cfg) -> list[str]:
    """The weights that learn from scored chunks: all but the lowest blocks and what lies below them."""
    names = []
    for name in p:
        block = block_of(name)
        if block is not None and block >= c.ttt_freeze or name.startswith("skip."):
            names.append(name)
    return names


def ttt_lr(chunk: int, chunks: int, c: Cfg) -> float:
    return c.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * chunk / max(chunks - 1, 1)))


def adapt(p: Weights, names: list[str], velocity: Weights, nets: Nets, stream: Tensor, first: int, stop: int,
          lr: float, c: Cfg, comm: Comm) -> None:
    """A few epochs of SGD on targets first..stop-1 of the stream; p changes in place, the same on every rank."""
    seqs = (stop - first) // c.seq
    if seqs == 0:
        return
    per_step = c.ttt_batch * comm.world
    for _ in range(c.ttt_epochs):
        for base in range(0, seqs, per_step):
            lo = min(base + comm.rank * c.ttt_batch, seqs)
            hi = min(lo + c.ttt_batch, seqs)
            if hi > lo:
                at = first + torch.arange(lo * c.seq, hi * c.seq, device=stream.device)
                x, y = stream[at].long().view(-1, c.seq), stream[at + 1].long().view(-1, c.seq)
                _, grads = loss_and_grads(nets.train, p, names, x, y)
                for g in grads.values():
                    g.mul_(hi - lo)
            else:
                grads = {name: torch.zeros_like(p[name]) for name in names}
            grads = sum_grads(grads, comm, min(per_step, seqs - base))
            clip_grads(grads, c.ttt_clip)
            sgd_step(p, grads, velocity, lr, c.ttt_momentum)


def evaluate_ttt(p: Weights, nets: Nets, val: Tensor, tables: Weights, c: Cfg, comm: Comm, begun: float,
                 say) -> Tensor:
    """Sliding windows chunk by chunk with weights that learn. Returns the tally summed over ranks.

    begun: when the evaluation as a whole began. Learning ends early if the chunks left could not be scored otherwise.
    """
    p = as_leaves(p)
    names = adaptable(p, c)
    velocity = {name: torch.zeros_like(p[name]) for name in names}
    chunks = chunk_plan(window_plan(val.numel() - 1, c.eval_seq, c.eval_stride), c.ttt_chunk)
    tally = new_tally(comm.device)
    learning = True
    scoring_seconds = 0.0
    say(f"ttt: {len(chunks)} chunks of {c.ttt_chunk} targets, {len(names)} tensors, lr {c.ttt_lr}, "
        f"{c.ttt_epochs} epochs")
    for k, windows in enumerate(chunks):
        t = now()
        score_windows(p, nets, val, comm.share(windows), tables, c, tally)
        scoring_seconds += now() - t
        if learning and k + 1 < len(chunks):
            adapt(p, names, velocity, nets, val, windows[0][1], windows[-1][2], ttt_lr(k, len(chunks), c), c, comm)
            to_come = scoring_seconds / (k + 1) * (len(chunks) - k - 1)
            if comm.agree(now() - begun + to_come > c.eval_seconds - c.eval_margin):
                learning = False
                say(f"ttt: out of time, no learning after chunk {k}")
        if k % 200 == 0 or k + 1 == len(chunks):
            so_far = comm.total(tally.clone())
            say(f"ttt: chunk {k + 1}/{len(chunks)} bpb {score(so_far)[1]:.6f} t {now() - begun:.1f}s")
    return comm.total(tally)


# ----------------------------------------------------------------------------------------------------------------------
# the run
# ----------------------------------------------------------------------------------------------------------------------


def set_up_torch(c: Cfg) -> None:
    random.seed(c.seed)
    np.random.seed(c.seed)
    torch.manual_seed(c.seed)
    torch.cuda.manual_seed_all(c.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 32


def report(label: str, tally: Tensor, seconds: float, say) -> None:
    loss, bpb = score(tally)
    say(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} tokens:{int(tally[2].item())} "
        f"bytes:{int(tally[1].item())} eval_time:{1000 * seconds:.0f}ms")
    say(f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def fit(c: Cfg, comm: Comm, nets: Nets, val: Tensor, tables: Weights, say) -> None:
    """From nothing to the artifact on disk."""
    p = as_leaves(init_weights(c, comm.device))
    say(f"model_params:{count_weights(p)}")
    warm_up(p, nets, c, comm, say)
    averaged, clock = train(p, nets, val, tables, c, comm, say)
    calib = batch_source(shard_paths(c.train_glob)[::-1], c.calib_seqs * c.seq * comm.world, c.seq, comm)
    moments = input_moments(averaged, calib, clock, c, comm, say)
    q = quantise(averaged, moments, c)
    say(f"train+gptq: {1000 * clock.read():.0f}ms of {1000 * c.train_seconds:.0f}ms")
    if comm.first:
        save_artifact(q, c, say)
    comm.wait()


def judge(c: Cfg, comm: Comm, nets: Nets, val: Tensor, tables: Weights, say) -> None:
    """From the artifact on disk to the score."""
    begun = now()
    p = restored(unpack(Path(c.artifact).read_bytes()), comm.device)
    t = now()
    report("final_roundtrip", evaluate_plain(p, nets, val, tables, c, comm), now() - t, say)
    if c.log_sliding or not c.ttt:
        t = now()
        report("final_sliding", evaluate_sliding(p, nets, val, tables, c, comm), now() - t, say)
    if c.ttt:
        t = now()
        tally = evaluate_ttt(p, nets, val, tables, c, comm, begun, say)
        if int(tally[2].item()) != val.numel() - 1:
            raise RuntimeError(f"{int(tally[2].item())} targets were counted where {val.numel() - 1} exist")
        report("final_ttt", tally, now() - t, say)
    say(f"evaluation took {now() - begun:.1f}s of {c.eval_seconds:.0f}s")


def main() -> None:
    c = Cfg()
    check_cfg(c)
    comm = join_ranks()
    say = make_logger(c, comm)
    set_up_torch(c)
    say(Path(__file__).read_text(encoding="utf-8"), echo=False)
    say(f"python {sys.version.split()[0]} torch {torch.__version__} world {comm.world}")
    for key, value in asdict(c).items():
        say(f"  {key}: {value}", echo=False)

    sp = spm.SentencePieceProcessor(model_file=c.tokenizer)
    if sp.vocab_size() != c.vocab or sp.bos_id() != c.bos:
        raise ValueError(f"the tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {c.vocab}, bos {sp.bos_id()}")
    tables = byte_tables(sp, c.vocab, comm.device)
    val = load_validation(c, comm)
    say(f"train shards: {len(shard_paths(c.train_glob))}, validation tokens: {val.numel()}")

    nets = build_nets(c)
    fit(c, comm, nets, val, tables, say)
    judge(c, comm, nets, val, tables, say)
    comm.wait()
    if comm.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
