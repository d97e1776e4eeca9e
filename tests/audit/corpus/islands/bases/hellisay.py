"""
Parameter Golf, 10 minutes on 8xH100, 16 MB.

11 layers x 512, GQA 8/4, partial RoPE, relu^2 MLP x3, SmearGate, hashed bigram embedding, exclusive self attention in the
last four layers, Muon + AdamW, EMA, GPTQ int6 (calibrated on the held-out tail of a train shard, inside the 600 s),
byte-shuffled LZMA. Scored by sliding windows whose softmax is mixed with an adaptive n-gram backoff (orders 2..7): counts are
kept for whole rows of the vocabulary, every row is a distribution, and the tables take a segment in after it was scored.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Tap = Callable[[str, Tensor], None]

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 256
BOS_ID = 1
SIZE_LIMIT = 16_000_000


# ---------------------------------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, int(default))))


@dataclass
class Settings:
    # data
    data_path: str = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed: int = env_int("SEED", 1337)

    # schedule
    iterations: int = env_int("ITERATIONS", 20_000)
    train_budget_s: float = env_float("TRAIN_BUDGET_S", 600.0)
    reserve_s: float = env_float("RESERVE_S", 45.0)
    warmup_steps: int = env_int("WARMUP_STEPS", 20)
    lr_warmup_steps: int = env_int("LR_WARMUP_STEPS", 30)
    warmdown_share: float = env_float("WARMDOWN_SHARE", 0.5)
    log_every: int = env_int("LOG_EVERY", 200)
    val_every: int = env_int("VAL_EVERY", 2000)
    val_log_tokens: int = env_int("VAL_LOG_TOKENS", 2_097_152)
    batch_tokens: int = env_int("BATCH_TOKENS", 786_432)
    seq_len: int = env_int("SEQ_LEN", 2048)

    # model
    vocab: int = env_int("VOCAB_SIZE", 1024)
    layers: int = env_int("NUM_LAYERS", 11)
    width: int = env_int("MODEL_DIM", 512)
    heads: int = env_int("NUM_HEADS", 8)
    kv_heads: int = env_int("NUM_KV_HEADS", 4)
    mlp_mult: int = env_int("MLP_MULT", 3)
    rope_base: float = env_float("ROPE_BASE", 10_000.0)
    rope_dims: int = env_int("ROPE_DIMS", 16)
    softcap: float = env_float("LOGIT_SOFTCAP", 30.0)
    xsa_last: int = env_int("XSA_LAST_N", 4)
    bigram_rows: int = env_int("BIGRAM_ROWS", 2048)
    bigram_dim: int = env_int("BIGRAM_DIM", 128)

    # optimisers
    matrix_lr: float = env_float("MATRIX_LR", 0.025)
    table_lr: float = env_float("TABLE_LR", 0.035)
    scalar_lr: float = env_float("SCALAR_LR", 0.025)
    momentum: float = env_float("MUON_MOMENTUM", 0.99)
    momentum_start: float = env_float("MUON_MOMENTUM_START", 0.92)
    momentum_ramp: int = env_int("MUON_MOMENTUM_RAMP", 1500)
    ns_steps: int = env_int("NS_STEPS", 5)
    decay: float = env_float("WEIGHT_DECAY", 0.04)
    beta1: float = env_float("BETA1", 0.9)
    beta2: float = env_float("BETA2", 0.95)
    clip: float = env_float("GRAD_CLIP", 0.3)
    ema_decay: float = env_float("EMA_DECAY", 0.997)

    # quantisation
    calib_windows: int = env_int("CALIB_WINDOWS", 64)
    calib_tail_tokens: int = env_int("CALIB_TAIL_TOKENS", 2_000_000)
    gptq_block: int = env_int("GPTQ_BLOCK", 128)
    gptq_damp: float = env_float("GPTQ_DAMP", 0.01)
    int6_clip: int = env_int("INT6_CLIP", 31)
    artifact_path: str = os.environ.get("ARTIFACT_PATH", "model.int6.xz")

    # scoring
    stride: int = env_int("EVAL_STRIDE", 128)
    window_batch: int = env_int("EVAL_WINDOW_BATCH", 64)
    segment_tokens: int = env_int("EVAL_SEGMENT_TOKENS", 65_536)
    gram_orders: str = os.environ.get("GRAM_ORDERS", "2,3,4,5,6,7")
    gram_bits: int = env_int("GRAM_BITS", 20)
    gram_discount: float = env_float("GRAM_DISCOUNT", 0.7)
    gram_floor: float = env_float("GRAM_FLOOR", 0.5)
    gate_max: float = env_float("GATE_MAX", 0.42)
    gate_pivot: float = env_float("GATE_PIVOT", 2.6)
    gate_width: float = env_float("GATE_WIDTH", 0.7)
    eval_budget_s: float = env_float("EVAL_BUDGET_S", 600.0)

    def orders(self) -> tuple[int, ...]:
        return tuple(int(word) for word in self.gram_orders.split(","))

    def train_pattern(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    def val_pattern(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")


@dataclass(frozen=True)
class Ranks:
    rank: int
    local: int
    world: int
    device: torch.device

    @property
    def chief(self) -> bool:
        return self.rank == 0

    @property
    def spread(self) -> bool:
        return self.world > 1


@dataclass
class Clock:
    began: float = 0.0

    def start(self) -> None:
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def spent(self) -> float:
        return time.perf_counter() - self.began


@dataclass
class Journal:
    path: Path | None
    chief: bool

    def say(self, text: str) -> None:
        if not self.chief:
            return
        print(text, flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


def open_ranks() -> Ranks:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        raise SystemExit("this script needs CUDA")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", device_id=device)
        dist.barrier()
    return Ranks(rank, local, world, device)


def open_journal(cfg: Settings, ctx: Ranks) -> Journal:
    path = None
    if ctx.chief:
        Path("logs").mkdir(exist_ok=True)
        path = Path("logs") / f"{cfg.run_id}.txt"
    return Journal(path, ctx.chief)


def sum_over_ranks(value: Tensor, ctx: Ranks) -> Tensor:
    if ctx.spread:
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value


def any_rank(flag: bool, ctx: Ranks) -> bool:
    if not ctx.spread:
        return flag
    word = torch.tensor(int(flag), device=ctx.device)
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    return bool(word.item())


def wait_for_all(ctx: Ranks) -> None:
    torch.cuda.synchronize()
    if ctx.spread:
        dist.barrier()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


# ---------------------------------------------------------------------------------------------------------------------
# shards
# ---------------------------------------------------------------------------------------------------------------------


def shard_length(path: Path) -> int:
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if header.size != SHARD_HEADER or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"{path}: no shard header")
    return int(header[2])


def read_shard(path: Path) -> Tensor:
    length = shard_length(path)
    body = np.fromfile(path, dtype="<u2", count=length, offset=SHARD_HEADER * 4)
    if body.size != length:
        raise ValueError(f"{path}: {body.size} tokens instead of {length}")
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[Path]:
    found = [Path(name) for name in sorted(glob.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"no shards match {pattern}")
    return found


def load_scored_stream(cfg: Settings) -> Tensor:
    return torch.cat([read_shard(path) for path in list_shards(cfg.val_pattern())]).contiguous()


@dataclass
class TrainFeed:
    """Tokens of the train shards in order, over and over; the last shard's tail is kept apart for calibration."""

    paths: list[Path]
    tail: int
    at: int = 0
    offset: int = 0
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint16))

    def open_current(self) -> None:
        tokens = read_shard(self.paths[self.at])
        if self.at == len(self.paths) - 1:
            tokens = tokens[: -self.tail]
        self.tokens = tokens
        self.offset = 0

    def take(self, count: int) -> Tensor:
        pieces: list[Tensor] = []
        while count > 0:
            left = self.tokens.numel() - self.offset
            if left <= 0:
                self.at = (self.at + 1) % len(self.paths)
                self.open_current()
                continue
            size = min(left, count)
            pieces.append(self.tokens[self.offset : self.offset + size])
            self.offset += size
            count -= size
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def open_feed(cfg: Settings) -> TrainFeed:
    feed = TrainFeed(list_shards(cfg.train_pattern()), cfg.calib_tail_tokens)
    feed.open_current()
    return feed


def next_batch(feed: TrainFeed, cfg: Settings, ctx: Ranks, accum: int) -> tuple[Tensor, Tensor]:
    per_rank = cfg.batch_tokens // (ctx.world * accum)
    chunk = feed.take((per_rank + 1) * ctx.world)
    mine = chunk[ctx.rank * (per_rank + 1) : (ctx.rank + 1) * (per_rank + 1)].to(torch.int64)
    x = mine[:-1].reshape(-1, cfg.seq_len)
    y = mine[1:].reshape(-1, cfg.seq_len)
    return x.to(ctx.device, non_blocking=True), y.to(ctx.device, non_blocking=True)


def held_out_tail(cfg: Settings) -> Tensor:
    return read_shard(list_shards(cfg.train_pattern())[-1])[-cfg.calib_tail_tokens :]


def calibration_batches(tokens: Tensor, cfg: Settings, ctx: Ranks) -> Iterator[Tensor]:
    span = cfg.seq_len
    count = min(cfg.calib_windows, tokens.numel() // span)
    step = tokens.numel() // count
    for number in range(ctx.rank, count, ctx.world):
        piece = tokens[number * step : number * step + span].to(torch.int64)
        yield piece.to(ctx.device)[None]


# ---------------------------------------------------------------------------------------------------------------------
# bytes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ByteTable:
    own: Tensor
    spaced: Tensor
    silent: Tensor


def build_byte_table(cfg: Settings, ctx: Ranks) -> ByteTable:
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    size = max(int(sp.vocab_size()), cfg.vocab)
    own = np.zeros(size, dtype=np.int64)
    spaced = np.zeros(size, dtype=np.bool_)
    silent = np.ones(size, dtype=np.bool_)
    for token in range(int(sp.vocab_size())):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        silent[token] = False
        if sp.is_byte(token):
            own[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("\u2581"):
            spaced[token] = True
            piece = piece[1:]
        own[token] = len(piece.encode("utf-8"))
    return ByteTable(*(torch.from_numpy(column).to(ctx.device) for column in (own, spaced, silent)))


def count_bytes(table: ByteTable, before: Tensor, target: Tensor) -> Tensor:
    space = table.spaced[target] & ~table.silent[before]
    return table.own[target] + space.to(torch.int64)


# ---------------------------------------------------------------------------------------------------------------------
# weights
# ---------------------------------------------------------------------------------------------------------------------


def new_weights(cfg: Settings, ctx: Ranks) -> Weights:
    w: Weights = {}
    head = cfg.width // cfg.heads
    kv = head * cfg.kv_heads
    hidden = cfg.width * cfg.mlp_mult

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        made = torch.empty(rows, columns, device=ctx.device)
        torch.nn.init.orthogonal_(made, gain=gain)
        w[name] = made

    w["embed"] = torch.randn(cfg.vocab, cfg.width, device=ctx.device) * 0.005
    w["bigram.table"] = torch.zeros(cfg.bigram_rows, cfg.bigram_dim, device=ctx.device)
    matrix("bigram.up", cfg.width, cfg.bigram_dim, 0.5)
    w["bigram.scale"] = torch.full((1,), 0.05, device=ctx.device)
    w["smear"] = torch.zeros(cfg.width, device=ctx.device)
    half = cfg.layers // 2
    w["skips"] = torch.ones(half, cfg.width, device=ctx.device)
    for layer in range(cfg.layers):
        name = f"L{layer}"
        matrix(f"{name}.q", cfg.width, cfg.width)
        matrix(f"{name}.k", kv, cfg.width)
        matrix(f"{name}.v", kv, cfg.width)
        matrix(f"{name}.o", cfg.width, cfg.width, 1.0 / math.sqrt(2 * cfg.layers))
        matrix(f"{name}.up", hidden, cfg.width)
        matrix(f"{name}.down", cfg.width, hidden, 1.0 / math.sqrt(2 * cfg.layers))
        w[f"{name}.q_gain"] = torch.full((cfg.heads,), 1.5, device=ctx.device)
        w[f"{name}.attn_scale"] = torch.ones(cfg.width, device=ctx.device)
        w[f"{name}.mlp_scale"] = torch.ones(cfg.width, device=ctx.device)
        w[f"{name}.blend"] = torch.stack([torch.ones(cfg.width), torch.zeros(cfg.width)]).to(ctx.device)
    if ctx.spread:
        for value in w.values():
            dist.broadcast(value, src=0)
    return w


def is_matrix(name: str) -> bool:
    return name.startswith("L") and name.rsplit(".", 1)[-1] in ("q", "k", "v", "o", "up", "down")


def is_table(name: str) -> bool:
    return name in ("embed", "bigram.table", "bigram.up")


def copy_weights(w: Weights) -> Weights:
    return {name: value.detach().clone() for name, value in w.items()}


def put_weights(target: Weights, source: Weights) -> None:
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name].to(value.device, value.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def apply_linear(w: Weights, name: str, x: Tensor, tap: Tap | None) -> Tensor:
    if tap is not None:
        tap(name, x)
    return F.linear(x, w[name].to(x.dtype))


def rotary_pair(cfg: Settings, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rate = cfg.rope_base ** (-torch.arange(0, cfg.rope_dims, 2, device=device, dtype=torch.float32) / cfg.rope_dims)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), rate)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    turned, kept = x[..., :dims], x[..., dims:]
    a, b = turned.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, kept], dim=-1)


def smear(w: Weights, tokens: Tensor, x: Tensor) -> Tensor:
    before = F.pad(x[:, :-1], (0, 0, 1, 0))
    inside = (tokens != BOS_ID)[..., None].to(x.dtype)
    return x + torch.tanh(w["smear"]).to(x.dtype) * before * inside


def bigram_rows(cfg: Settings, tokens: Tensor) -> Tensor:
    before = F.pad(tokens[:, :-1], (1, 0))
    mixed = torch.bitwise_xor(tokens * 36313, before * 27191) % (cfg.bigram_rows - 1)
    return torch.where(tokens == BOS_ID, cfg.bigram_rows - 1, mixed)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    batch, length, heads, width = y.shape
    grouped = y.reshape(batch, length, v.size(2), heads // v.size(2), width)
    unit = F.normalize(v, dim=-1)[:, :, :, None, :]
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).reshape(y.shape)


def attention(cfg: Settings, w: Weights, layer: int, x: Tensor, pair: tuple[Tensor, Tensor], tap: Tap | None) -> Tensor:
    name = f"L{layer}"
    batch, length, width = x.shape
    head = width // cfg.heads
    q = apply_linear(w, f"{name}.q", x, tap).view(batch, length, cfg.heads, head)
    k = apply_linear(w, f"{name}.k", x, None).view(batch, length, cfg.kv_heads, head)
    v = apply_linear(w, f"{name}.v", x, None).view(batch, length, cfg.kv_heads, head)
    q, k = rotate(rms(q), *pair, cfg.rope_dims), rotate(rms(k), *pair, cfg.rope_dims)
    q = q * w[f"{name}.q_gain"].to(q.dtype)[None, None, :, None]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=cfg.heads != cfg.kv_heads
    ).transpose(1, 2)
    if layer >= cfg.layers - cfg.xsa_last:
        y = exclude_self(y, v)
    return apply_linear(w, f"{name}.o", y.reshape(batch, length, width), tap)


def feed_forward(w: Weights, layer: int, x: Tensor, tap: Tap | None) -> Tensor:
    hidden = F.relu(apply_linear(w, f"L{layer}.up", x, tap)).square()
    return apply_linear(w, f"L{layer}.down", hidden, tap)


def block(
    cfg: Settings, w: Weights, layer: int, x: Tensor, x0: Tensor, pair: tuple[Tensor, Tensor], tap: Tap | None
) -> Tensor:
    name = f"L{layer}"
    blend = w[f"{name}.blend"].to(x.dtype)
    x = blend[0] * x + blend[1] * x0
    damp = 1.0 / math.sqrt(layer + 1)
    x = x + w[f"{name}.attn_scale"].to(x.dtype) * attention(cfg, w, layer, rms(x) * damp, pair, tap)
    return x + w[f"{name}.mlp_scale"].to(x.dtype) * feed_forward(w, layer, rms(x) * damp, tap)


def logits_of(cfg: Settings, w: Weights, tokens: Tensor, tap: Tap | None = None) -> Tensor:
    pair = rotary_pair(cfg, tokens.size(1), tokens.device)
    x = F.embedding(tokens, w["embed"]).bfloat16()
    hashed = F.embedding(bigram_rows(cfg, tokens), w["bigram.table"]).bfloat16()
    x = x + w["bigram.scale"].to(x.dtype) * F.linear(hashed, w["bigram.up"].to(x.dtype))
    x = smear(w, tokens, rms(x))
    x0 = x
    half = cfg.layers // 2
    kept: list[Tensor] = []
    for layer in range(cfg.layers):
        if layer < half:
            x = block(cfg, w, layer, x, x0, pair, tap)
            kept.append(x)
        else:
            if kept:
                x = x + w["skips"][layer - half].to(x.dtype) * kept.pop()
            x = block(cfg, w, layer, x, x0, pair, tap)
    raw = F.linear(rms(x), w["embed"].to(x.dtype)).float()
    return cfg.softcap * torch.tanh(raw / cfg.softcap)


def loss_of(cfg: Settings, w: Weights, x: Tensor, y: Tensor) -> Tensor:
    logits = logits_of(cfg, w, x)
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1))


# ---------------------------------------------------------------------------------------------------------------------
# optimisers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class MuonState:
    names: list[str]
    pushes: Weights = field(default_factory=dict)


@dataclass
class Optimisers:
    muon: MuonState
    tables: torch.optim.AdamW
    scalars: torch.optim.AdamW


@torch.compile
def newton_schulz(g: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    turned = x.size(0) > x.size(1)
    if turned:
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.T if turned else x


def open_optimisers(cfg: Settings, w: Weights) -> Optimisers:
    for value in w.values():
        value.requires_grad_(True)
    matrices = [name for name in w if is_matrix(name)]
    tables = [w[name] for name in w if is_table(name)]
    scalars = [w[name] for name in w if not is_matrix(name) and not is_table(name)]
    betas = (cfg.beta1, cfg.beta2)
    return Optimisers(
        MuonState(matrices, {name: torch.zeros_like(w[name]) for name in matrices}),
        torch.optim.AdamW(tables, lr=cfg.table_lr, betas=betas, eps=1e-8, weight_decay=0.01, fused=True),
        torch.optim.AdamW(scalars, lr=cfg.scalar_lr, betas=betas, eps=1e-8, weight_decay=0.0, fused=True),
    )


def optimiser_state(opt: Optimisers) -> tuple[Weights, dict, dict]:
    return (
        copy_weights(opt.muon.pushes),
        copy.deepcopy(opt.tables.state_dict()),
        copy.deepcopy(opt.scalars.state_dict()),
    )


def restore_optimisers(opt: Optimisers, state: tuple[Weights, dict, dict]) -> None:
    put_weights(opt.muon.pushes, state[0])
    opt.tables.load_state_dict(state[1])
    opt.scalars.load_state_dict(state[2])


def muon_update(cfg: Settings, ctx: Ranks, w: Weights, state: MuonState, lr: float, momentum: float) -> None:
    updates: Weights = {}
    for number, name in enumerate(state.names):
        updates[name] = torch.zeros_like(w[name], dtype=torch.bfloat16)
        if number % ctx.world != ctx.rank:
            continue
        grad = w[name].grad
        assert grad is not None
        push = state.pushes[name]
        push.lerp_(grad, 1.0 - momentum)
        updates[name] = newton_schulz(grad.lerp(push, momentum), cfg.ns_steps)
    if ctx.spread:
        flat = torch.cat([updates[name].reshape(-1) for name in state.names])
        dist.all_reduce(flat)
        at = 0
        for name in state.names:
            size = w[name].numel()
            updates[name] = flat[at : at + size].view_as(w[name])
            at += size
    with torch.no_grad():
        for name in state.names:
            rows, columns = w[name].shape
            w[name].mul_(1.0 - lr * cfg.decay)
            w[name].add_(updates[name].to(w[name].dtype), alpha=-lr * max(1.0, rows / columns) ** 0.5)


def share_gradients(w: Weights, ctx: Ranks) -> None:
    if not ctx.spread:
        return
    grads = [value.grad for value in w.values() if value.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    at = 0
    for grad in grads:
        grad.copy_(flat[at : at + grad.numel()].view_as(grad))
        at += grad.numel()


def clip_gradients(w: Weights, limit: float) -> None:
    if limit > 0:
        torch.nn.utils.clip_grad_norm_([value for value in w.values() if value.grad is not None], limit)


def optimiser_step(cfg: Settings, ctx: Ranks, w: Weights, opt: Optimisers, scale: float, step: int) -> None:
    ramp = min(step / max(cfg.momentum_ramp, 1), 1.0)
    momentum = (1 - ramp) * cfg.momentum_start + ramp * cfg.momentum
    opt.tables.param_groups[0]["lr"] = cfg.table_lr * scale
    opt.scalars.param_groups[0]["lr"] = cfg.scalar_lr * scale
    muon_update(cfg, ctx, w, opt.muon, cfg.matrix_lr * scale, momentum)
    opt.tables.step()
    opt.scalars.step()
    for value in w.values():
        value.grad = None


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    weights: Weights
    steps: int
    seconds: float


def rate_scale(cfg: Settings, step: int, spent: float, limit: float) -> float:
    if step < cfg.lr_warmup_steps:
        return (step + 1) / cfg.lr_warmup_steps
    left = max(limit - spent, 0.0) / max(cfg.warmdown_share * limit, 1e-9)
    return min(1.0, left)


def warm_up(cfg: Settings, ctx: Ranks, w: Weights, opt: Optimisers, step_loss: Callable[..., Tensor], accum: int) -> None:
    """Compiles everything on random tokens, then puts weights and optimisers back as they were."""
    weights, states = copy_weights(w), optimiser_state(opt)
    rows = cfg.batch_tokens // (ctx.world * accum * cfg.seq_len)
    for step in range(cfg.warmup_steps):
        tokens = torch.randint(0, cfg.vocab, (rows, cfg.seq_len + 1), device=ctx.device)
        step_loss(cfg, w, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        share_gradients(w, ctx)
        optimiser_step(cfg, ctx, w, opt, 1.0, step)
    put_weights(w, weights)
    restore_optimisers(opt, states)
    for value in w.values():
        value.grad = None


@torch.no_grad()
def quick_loss(cfg: Settings, ctx: Ranks, w: Weights, stream: Tensor, limit: int) -> float:
    """Plain cross entropy on the stream's first tokens, for the log."""
    rows = min(limit, stream.numel() - 1) // cfg.seq_len
    total = torch.zeros(2, device=ctx.device, dtype=torch.float64)
    for row in range(ctx.rank, rows, ctx.world):
        piece = stream[row * cfg.seq_len : (row + 1) * cfg.seq_len + 1].to(ctx.device, torch.int64)
        loss = loss_of(cfg, w, piece[None, :-1], piece[None, 1:])
        total += torch.stack([loss.double() * cfg.seq_len, torch.full_like(loss, cfg.seq_len).double()])
    sum_over_ranks(total, ctx)
    return float(total[0] / total[1])


def average_into(slow: Weights, w: Weights, decay: float) -> None:
    with torch.no_grad():
        for name, value in slow.items():
            value.lerp_(w[name], 1.0 - decay)


def train_model(cfg: Settings, ctx: Ranks, journal: Journal, clock: Clock, scored: Tensor) -> Trained:
    accum = max(8 // ctx.world, 1)
    w = new_weights(cfg, ctx)
    opt = open_optimisers(cfg, w)
    feed = open_feed(cfg)
    step_loss = torch.compile(loss_of, dynamic=False)
    warm_up(cfg, ctx, w, opt, step_loss, accum)
    slow = copy_weights(w)
    limit = cfg.train_budget_s - cfg.reserve_s
    journal.say(f"params:{sum(value.numel() for value in w.values())} world:{ctx.world} accum:{accum} seed:{cfg.seed}")

    wait_for_all(ctx)
    clock.start()
    step = 0
    while step < cfg.iterations:
        if any_rank(clock.spent() >= limit, ctx):
            break
        if cfg.val_every > 0 and step > 0 and step % cfg.val_every == 0:
            seen = quick_loss(cfg, ctx, w, scored, cfg.val_log_tokens)
            journal.say(f"step:{step} val_loss(first tokens):{seen:.4f} train_time:{clock.spent():.1f}s")
        scale = rate_scale(cfg, step, clock.spent(), limit)
        running = torch.zeros((), device=ctx.device)
        for _ in range(accum):
            x, y = next_batch(feed, cfg, ctx, accum)
            loss = step_loss(cfg, w, x, y) / accum
            loss.backward()
            running += loss.detach()
        share_gradients(w, ctx)
        clip_gradients(w, cfg.clip)
        optimiser_step(cfg, ctx, w, opt, scale, step)
        average_into(slow, w, min(cfg.ema_decay, (step + 1) / (step + 10)))
        step += 1
        if step % cfg.log_every == 0 or step <= 5:
            journal.say(f"step:{step} train_loss:{running.item():.4f} train_time:{clock.spent():.1f}s scale:{scale:.3f}")
    torch.cuda.synchronize()
    journal.say(f"training stopped at step {step}, {clock.spent():.1f}s of {cfg.train_budget_s:.0f}s")
    return Trained({name: value.detach() for name, value in slow.items()}, step, clock.spent())


# ---------------------------------------------------------------------------------------------------------------------
# quantisation
# ---------------------------------------------------------------------------------------------------------------------


def input_of(name: str) -> str:
    """The matrix whose input is this one's as well: k and v read what q reads."""
    stem, kind = name.rsplit(".", 1)
    return f"{stem}.q" if kind in ("k", "v") else name


@torch.no_grad()
def collect_hessians(
    cfg: Settings, ctx: Ranks, w: Weights, tokens: Tensor, clock: Clock, journal: Journal
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    seen = torch.zeros((), device=ctx.device)

    def tap(name: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.size(-1)).float()
        if name not in sums:
            sums[name] = torch.zeros(flat.size(1), flat.size(1), device=ctx.device)
        sums[name].addmm_(flat.T, flat)

    for batch in calibration_batches(tokens, cfg, ctx):
        if clock.spent() > cfg.train_budget_s - 0.6 * cfg.reserve_s and float(seen) > 0:
            break
        logits_of(cfg, w, batch, tap)
        seen += batch.numel()
    sum_over_ranks(seen, ctx)
    for value in sums.values():
        sum_over_ranks(value, ctx)
        value.div_(seen)
    journal.say(f"calibration: {int(seen)} tokens, at {clock.spent():.1f}s of {cfg.train_budget_s:.0f}s")
    return sums


def row_scales(matrix: Tensor, clip: int) -> Tensor:
    """Per row, the scale of a few candidates that loses least."""
    top = matrix.abs().amax(dim=1).clamp_min(1e-8)
    best, chosen = torch.full_like(top, float("inf")), top / clip
    for share in (1.0, 0.97, 0.94, 0.90, 0.86):
        scale = (top * share / clip).clamp_min(1e-8)
        rounded = (matrix / scale[:, None]).round().clamp(-clip - 1, clip)
        lost = (matrix - rounded * scale[:, None]).square().sum(dim=1)
        better = lost < best
        best, chosen = torch.where(better, lost, best), torch.where(better, scale, chosen)
    return chosen.half().float()


def gptq(cfg: Settings, matrix: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    work = matrix.float().clone()
    rows, columns = work.shape
    scale = row_scales(work, cfg.int6_clip)
    h = hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    work[:, dead] = 0.0
    h.diagonal().add_(cfg.gptq_damp * h.diagonal().mean())
    order = torch.argsort(h.diagonal(), descending=True)
    work, h = work[:, order], h[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.zeros(rows, columns, dtype=torch.int8, device=work.device)
    for left in range(0, columns, cfg.gptq_block):
        right = min(left + cfg.gptq_block, columns)
        errors = torch.zeros(rows, right - left, device=work.device)
        for column in range(left, right):
            value = work[:, column]
            code = (value / scale).round().clamp(-cfg.int6_clip - 1, cfg.int6_clip)
            codes[:, column] = code.to(torch.int8)
            error = (value - code * scale) / inverse[column, column]
            work[:, column:right] -= error[:, None] * inverse[column, column:right][None]
            errors[:, column - left] = error
        work[:, right:] -= errors @ inverse[left:right, right:]
    return codes[:, torch.argsort(order)], scale.half()


def round_int8(table: Tensor) -> tuple[Tensor, Tensor]:
    scale = (table.float().abs().amax(dim=1).clamp_min(1e-8) / 127.0).half()
    codes = (table.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes, scale


def quantise(cfg: Settings, ctx: Ranks, w: Weights, hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every rank quantises its share of the matrices; the codes are summed over ranks (others hold zeros)."""
    packed: dict[str, Tensor] = {}
    matrices = [name for name in w if is_matrix(name)]
    for number, name in enumerate(matrices):
        if number % ctx.world == ctx.rank:
            codes, scale = gptq(cfg, w[name], hessians[input_of(name)])
        else:
            codes = torch.zeros(w[name].shape, dtype=torch.int8, device=ctx.device)
            scale = torch.zeros(w[name].size(0), dtype=torch.float16, device=ctx.device)
        packed[f"{name}|code"], packed[f"{name}|scale"] = codes, scale
    for value in packed.values():
        sum_over_ranks(value, ctx)
    for name, value in w.items():
        if name in matrices:
            continue
        if is_table(name):
            packed[f"{name}|code"], packed[f"{name}|scale"] = round_int8(value)
        else:
            packed[f"{name}|raw"] = value.half()
    return {name: value.cpu() for name, value in packed.items()}


def unquantise(packed: dict[str, Tensor], device: torch.device) -> Weights:
    w: Weights = {}
    for key, value in packed.items():
        name, kind = key.split("|")
        if kind == "raw":
            w[name] = value.to(device, torch.float32)
        elif kind == "code":
            scale = packed[f"{name}|scale"].to(device, torch.float32)
            w[name] = value.to(device, torch.float32) * scale[:, None]
    return w


@torch.no_grad()
def fit_logit_scale(cfg: Settings, ctx: Ranks, w: Weights, tokens: Tensor, clock: Clock, journal: Journal) -> float:
    """One number for the logits of the rounded model, by the loss on windows of a train shard's unused tail."""
    scales = torch.linspace(0.94, 1.06, 13, device=ctx.device)
    losses = torch.zeros(scales.numel(), device=ctx.device, dtype=torch.float64)
    for batch in calibration_batches(tokens, cfg, ctx):
        if clock.spent() > cfg.train_budget_s - 0.35 * cfg.reserve_s:
            break
        logits = logits_of(cfg, w, batch)[0, :-1]
        target = batch[0, 1:]
        for number, scale in enumerate(scales):
            losses[number] += F.cross_entropy(logits * scale, target, reduction="sum").double()
    sum_over_ranks(losses, ctx)
    chosen = float(scales[int(losses.argmin())]) if float(losses.sum()) > 0 else 1.0
    journal.say(f"logit scale {chosen:.3f}, at {clock.spent():.1f}s of {cfg.train_budget_s:.0f}s")
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# the artifact
# ---------------------------------------------------------------------------------------------------------------------


def split_planes(value: Tensor) -> bytes:
    """Half floats as all low bytes and then all high ones: LZMA likes that better."""
    raw = value.contiguous().numpy()
    if raw.dtype == np.float16:
        return raw.view(np.uint8).reshape(-1, 2).T.tobytes()
    return raw.tobytes()


def join_planes(raw: bytes, kind: str, shape: list[int]) -> Tensor:
    if kind == "float16":
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(2, -1)
        flat = np.ascontiguousarray(planes.T).view(np.float16)
    else:
        flat = np.frombuffer(raw, dtype=np.int8)
    return torch.from_numpy(flat.reshape(shape).copy())


def pack_artifact(packed: dict[str, Tensor], logit_scale: float) -> bytes:
    lines = [f"scale\t{logit_scale!r}"]
    bodies = io.BytesIO()
    for key, value in packed.items():
        kind = "float16" if value.dtype == torch.float16 else "int8"
        body = split_planes(value)
        lines.append(f"{key}\t{kind}\t{','.join(str(size) for size in value.shape)}\t{len(body)}")
        bodies.write(body)
    head = "\n".join(lines).encode("utf-8")
    plain = len(head).to_bytes(4, "little") + head + bodies.getvalue()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 25, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(plain, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


def unpack_artifact(blob: bytes) -> tuple[dict[str, Tensor], float]:
    plain = lzma.decompress(blob)
    size = int.from_bytes(plain[:4], "little")
    first, *lines = plain[4 : 4 + size].decode("utf-8").split("\n")
    at = 4 + size
    packed: dict[str, Tensor] = {}
    for line in lines:
        key, kind, shape, length = line.split("\t")
        body = plain[at : at + int(length)]
        packed[key] = join_planes(body, kind, [int(part) for part in shape.split(",")])
        at += int(length)
    return packed, float(first.split("\t")[1])


def write_artifact(cfg: Settings, packed: dict[str, Tensor], logit_scale: float, journal: Journal) -> None:
    blob = pack_artifact(packed, logit_scale)
    again, scale = unpack_artifact(blob)
    for key, value in packed.items():
        if not torch.equal(again[key], value):
            raise RuntimeError(f"{key} does not survive the round trip")
    if scale != logit_scale:
        raise RuntimeError("the logit scale does not survive the round trip")
    Path(cfg.artifact_path).write_bytes(blob)
    report_sizes(len(blob), journal)


def report_sizes(artifact_bytes: int, journal: Journal) -> None:
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + artifact_bytes
    journal.say(f"artifact: {artifact_bytes} bytes")
    journal.say(f"code: {code_bytes} bytes")
    journal.say(f"total submission size: {total} bytes (limit {SIZE_LIMIT})")
    if total > SIZE_LIMIT:
        raise SystemExit(f"{total} bytes are too many")


def load_artifact(cfg: Settings, ctx: Ranks) -> tuple[Weights, float]:
    packed, logit_scale = unpack_artifact(Path(cfg.artifact_path).read_bytes())
    return unquantise(packed, ctx.device), logit_scale


# ---------------------------------------------------------------------------------------------------------------------
# n-grams
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Grams:
    """Counts of whole rows: for every hashed context of an order, how often each token of the vocabulary followed it."""

    orders: tuple[int, ...]
    bits: int
    single: Tensor
    follow: list[Tensor]


def open_grams(cfg: Settings, device: torch.device) -> Grams:
    orders = cfg.orders()
    follow = [torch.zeros(1 << cfg.gram_bits, cfg.vocab, dtype=torch.int32, device=device) for _ in orders]
    return Grams(orders, cfg.gram_bits, torch.zeros(cfg.vocab, dtype=torch.int64, device=device), follow)


def document_starts(tokens: Tensor) -> Tensor:
    """For every position, where the document that holds it began."""
    places = torch.arange(tokens.numel(), device=tokens.device)
    return torch.where(tokens == BOS_ID, places, torch.zeros_like(places)).cummax(0).values


def context_rows(tokens: Tensor, starts: Tensor, at: Tensor, order: int, bits: int) -> Tensor:
    """The hashed row of the order-1 tokens before each position; tokens of an earlier document count as none."""
    first = starts[at - 1]
    mixed = torch.full_like(at, 0x51ED27 * order)
    for back in range(1, order):
        place = at - back
        token = torch.where(place >= first, tokens[place.clamp_min(0)] + 1, torch.zeros_like(place))
        mixed = (mixed ^ token) * 0x2545F491 & 0x3FFFFFFF
        mixed = mixed ^ (mixed >> 13)
    return mixed & ((1 << bits) - 1)


def gram_distribution(cfg: Settings, grams: Grams, tokens: Tensor, starts: Tensor, at: Tensor) -> Tensor:
    """Absolute discounting, from single tokens up: [positions, vocabulary], every row sums to one."""
    single = grams.single.float() + cfg.gram_floor
    p = (single / single.sum()).expand(at.numel(), -1)
    for order, follow in zip(grams.orders, grams.follow):
        counts = follow[context_rows(tokens, starts, at, order, grams.bits)].float()
        total = counts.sum(dim=1, keepdim=True)
        kinds = (counts > 0).sum(dim=1, keepdim=True)
        kept = (counts - cfg.gram_discount).clamp_min(0.0)
        higher = (kept + cfg.gram_discount * kinds * p) / total.clamp_min(1.0)
        p = torch.where(total > 0, higher, p)
    return p


def learn_grams(cfg: Settings, grams: Grams, tokens: Tensor, starts: Tensor, left: int, right: int) -> None:
    at = torch.arange(left, right, device=tokens.device)
    target = tokens[at]
    ones = torch.ones_like(target, dtype=torch.int32)
    grams.single += torch.bincount(target, minlength=cfg.vocab)
    for order, follow in zip(grams.orders, grams.follow):
        place = context_rows(tokens, starts, at, order, grams.bits) * cfg.vocab + target
        follow.view(-1).scatter_add_(0, place, ones)


# ---------------------------------------------------------------------------------------------------------------------
# scoring
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums in double precision: nats of the mixture, nats of the model alone, tokens, bytes."""

    sums: Tensor

    def add(self, mixed: Tensor, plain: Tensor, octets: Tensor) -> None:
        count = torch.full((), mixed.numel(), device=mixed.device, dtype=torch.float64)
        self.sums += torch.stack([mixed.double().sum(), plain.double().sum(), count, octets.double().sum()])

    def nats(self) -> float:
        return float(self.sums[0])

    def plain_nats(self) -> float:
        return float(self.sums[1])

    def tokens(self) -> int:
        return int(self.sums[2])

    def octets(self) -> int:
        return int(self.sums[3])


@dataclass
class Group:
    """Some windows: their inputs, and for each scored position its row, its column and its place in the stream."""

    inputs: Tensor
    row: Tensor
    column: Tensor
    at: Tensor


def my_part(count: int, ctx: Ranks) -> tuple[int, int]:
    """The targets of this rank: a contiguous part of 1 .. count-1."""
    targets = count - 1
    return 1 + targets * ctx.rank // ctx.world, 1 + targets * (ctx.rank + 1) // ctx.world


def cut_segments(left: int, right: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(left, right, size):
        yield at, min(at + size, right)


def cut_windows(cfg: Settings, tokens: Tensor, left: int, right: int) -> Iterator[Group]:
    """Windows that end with `stride` targets each; every target of the segment stands in exactly one of them."""
    blocks = [(at, min(at + cfg.stride, right)) for at in range(left, right, cfg.stride)]
    for first in range(0, len(blocks), cfg.window_batch):
        batch = blocks[first : first + cfg.window_batch]
        inputs = torch.zeros(cfg.window_batch, cfg.seq_len, dtype=torch.int64, device=tokens.device)
        rows, columns, places = [], [], []
        for row, (begin, end) in enumerate(batch):
            start = max(0, end - 1 - cfg.seq_len)
            inputs[row, : end - 1 - start] = tokens[start : end - 1]
            at = np.arange(begin, end)
            rows.append(np.full(end - begin, row))
            columns.append(at - 1 - start)
            places.append(at)
        picked = (torch.from_numpy(np.concatenate(part)).to(tokens.device) for part in (rows, columns, places))
        yield Group(inputs, *picked)


def gate_of(cfg: Settings, logp: Tensor) -> Tensor:
    """How much the n-grams weigh: more where the model is unsure."""
    entropy = -(logp.exp() * logp).sum(dim=1, keepdim=True)
    return cfg.gate_max * torch.sigmoid((entropy - cfg.gate_pivot) / cfg.gate_width)


def mix(cfg: Settings, logp: Tensor, counted: Tensor) -> Tensor:
    weight = gate_of(cfg, logp)
    return (1.0 - weight) * logp.exp() + weight * counted


def check_sums(mixed: Tensor, journal: Journal) -> None:
    off = float((mixed.double().sum(dim=1) - 1.0).abs().max())
    journal.say(f"mixture: the rows of the first batch sum to one within {off:.2e}")
    if off > 1e-3:
        raise RuntimeError("the mixture is no distribution")


@torch.no_grad()
def score_stream(
    cfg: Settings, ctx: Ranks, journal: Journal, w: Weights, logit_scale: float, stream: Tensor, table: ByteTable
) -> Tally:
    tokens = stream.to(ctx.device, torch.int64)
    starts = document_starts(tokens)
    predict = torch.compile(logits_of, dynamic=False)
    grams = open_grams(cfg, ctx.device)
    tally = Tally(torch.zeros(4, device=ctx.device, dtype=torch.float64))
    left, right = my_part(tokens.numel(), ctx)
    began, checked = time.perf_counter(), False
    for number, (begin, end) in enumerate(cut_segments(left, right, cfg.segment_tokens)):
        for group in cut_windows(cfg, tokens, begin, end):
            logits = predict(cfg, w, group.inputs)[group.row, group.column]
            logp = F.log_softmax(logits * logit_scale, dim=1)
            counted = gram_distribution(cfg, grams, tokens, starts, group.at)
            mixed = mix(cfg, logp, counted)
            if not checked and number > 0:
                check_sums(mixed, journal)
                checked = True
            target = tokens[group.at]
            nats = -mixed.gather(1, target[:, None]).squeeze(1).double().log()
            plain = -logp.gather(1, target[:, None]).squeeze(1)
            tally.add(nats, plain, count_bytes(table, tokens[group.at - 1], target))
        learn_grams(cfg, grams, tokens, starts, begin, end)
        if number % 20 == 0:
            so_far = tally.nats() / max(tally.octets(), 1) / math.log(2.0)
            journal.say(f"segment {number}: {end - left}/{right - left} bpb:{so_far:.4f} {time.perf_counter() - began:.1f}s")
    sum_over_ranks(tally.sums, ctx)
    if tally.tokens() != tokens.numel() - 1:
        raise RuntimeError(f"{tally.tokens()} targets were scored instead of {tokens.numel() - 1}")
    return tally


def bits_per_byte(nats: float, octets: int) -> float:
    return nats / math.log(2.0) / octets


def report_score(tally: Tally, seconds: float, cfg: Settings, journal: Journal) -> None:
    plain = bits_per_byte(tally.plain_nats(), tally.octets())
    final = bits_per_byte(tally.nats(), tally.octets())
    journal.say(f"scored {tally.tokens()} tokens, {tally.octets()} bytes, eval_time:{seconds:.1f}s of {cfg.eval_budget_s:.0f}s")
    journal.say(f"model alone (same pass) val_loss:{tally.plain_nats() / tally.tokens():.6f} val_bpb:{plain:.6f}")
    journal.say(f"final val_loss:{tally.nats() / tally.tokens():.8f} val_bpb:{final:.8f}")
    if seconds > cfg.eval_budget_s:
        journal.say("the evaluation took too long")


# ---------------------------------------------------------------------------------------------------------------------
# all of it
# ---------------------------------------------------------------------------------------------------------------------


def describe(cfg: Settings, ctx: Ranks, journal: Journal) -> None:
    journal.say(f"python {sys.version.split()[0]} torch {torch.__version__} numpy {np.__version__}")
    journal.say(f"world {ctx.world} device {torch.cuda.get_device_name(ctx.device)}")
    for name, value in vars(cfg).items():
        journal.say(f"  {name} = {value}")
    if ctx.chief:
        shown = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True, check=False).stdout
        journal.say(shown.strip())


def check_settings(cfg: Settings, ctx: Ranks) -> None:
    if cfg.width % cfg.heads or cfg.heads % cfg.kv_heads:
        raise ValueError("the heads do not divide the width")
    if cfg.batch_tokens % (ctx.world * max(8 // ctx.world, 1) * cfg.seq_len):
        raise ValueError("the batch does not divide into windows")
    if not 0 < cfg.stride <= cfg.seq_len:
        raise ValueError("the stride must be a part of the window")
    if not 0.0 < cfg.gram_discount < 1.0 or not 0.0 <= cfg.gate_max < 1.0:
        raise ValueError("discount and gate must lie between nought and one")
    if any(order < 2 for order in cfg.orders()):
        raise ValueError("the orders begin with two")


def build_model(cfg: Settings, ctx: Ranks, journal: Journal, scored: Tensor) -> None:
    """Everything within the 600 s: trains, calibrates, quantises, writes the artifact."""
    clock = Clock()
    trained = train_model(cfg, ctx, journal, clock, scored)
    tail = held_out_tail(cfg)
    hessians = collect_hessians(cfg, ctx, trained.weights, tail, clock, journal)
    packed = quantise(cfg, ctx, trained.weights, hessians)
    journal.say(f"quantised at {clock.spent():.1f}s of {cfg.train_budget_s:.0f}s")
    rounded = unquantise(packed, ctx.device)
    logit_scale = fit_logit_scale(cfg, ctx, rounded, tail, clock, journal)
    if ctx.chief:
        write_artifact(cfg, packed, logit_scale, journal)
    wait_for_all(ctx)
    journal.say(f"artifact written at {clock.spent():.1f}s of {cfg.train_budget_s:.0f}s after {trained.steps} steps")
    if clock.spent() > cfg.train_budget_s:
        raise SystemExit("training and packing took too long")


def evaluate_model(cfg: Settings, ctx: Ranks, journal: Journal, scored: Tensor, table: ByteTable) -> None:
    """Everything within the other 600 s: reads the artifact, scores the stream once, reports."""
    timer = Clock()
    timer.start()
    w, logit_scale = load_artifact(cfg, ctx)
    tally = score_stream(cfg, ctx, journal, w, logit_scale, scored, table)
    torch.cuda.synchronize()
    report_score(tally, timer.spent(), cfg, journal)


def main() -> None:
    cfg = Settings()
    ctx = open_ranks()
    journal = open_journal(cfg, ctx)
    check_settings(cfg, ctx)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    seed_everything(cfg.seed)
    describe(cfg, ctx, journal)
    scored = load_scored_stream(cfg)
    table = build_byte_table(cfg, ctx)
    journal.say(f"stream to score: {scored.numel()} tokens")
    build_model(cfg, ctx, journal, scored)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    evaluate_model(cfg, ctx, journal, scored, table)
    if ctx.spread:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
