"""Parameter Golf, run "shuna".

An 11 x 512 decoder on the SP8192 shards. Muon for matrices, AdamW for the rest, EMA weights, GPTQ int5 (calibrated on
training shards inside the 600 s), brotli, and a score-first test-time training over chunks of 32K tokens.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SCRIPT_PATH = Path(__file__).resolve()
SHARD_MAGIC = 20240520
SHARD_HEADER_INTS = 256
LN2 = math.log(2.0)


# ------------------------------------------------------------------------------------------------------------------
# configuration
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Everything that may be set from outside. A field `abc_def` is read from the variable ABC_DEF."""

    # run
    run_id: str = "shuna"
    seed: int = 1337
    out_dir: str = "./runs"
    data_dir: str = "./data/datasets/fineweb10B_sp8192"
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_bpe.model"
    size_limit: int = 16_000_000

    # model
    vocab_size: int = 8192
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0
    rope_dims: int = 32
    rope_base: float = 10000.0
    logit_softcap: float = 30.0
    qk_gain: float = 4.0
    skip_layers: int = 5
    bos_id: int = 1
    tie_embeddings: bool = True
    embed_init_std: float = 0.005

    # training
    train_budget_s: float = 600.0
    quant_reserve_s: float = 16.0
    iterations: int = 20_000
    warmup_steps: int = 20
    batch_tokens: int = 786_432
    train_seq_len: int = 2048
    warmdown_frac: float = 0.62
    matrix_lr: float = 0.022
    scalar_lr: float = 0.018
    embed_lr: float = 0.03
    muon_momentum: float = 0.97
    muon_momentum_start: float = 0.92
    muon_momentum_ramp: int = 1500
    muon_ns_steps: int = 5
    muon_wd: float = 0.09
    adam_wd: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 0.3
    ema_decay: float = 0.9965
    ema_start_step: int = 200
    log_every: int = 250

    # quantisation
    weight_bits: int = 5
    embed_bits: int = 7
    clip_sigmas: float = 4.4
    embed_clip_sigmas: float = 14.0
    gptq_block: int = 128
    gptq_damp: float = 0.01
    calib_batches: int = 24
    calib_seqs: int = 16
    brotli_quality: int = 11

    # evaluation
    eval_seq_len: int = 2048
    eval_stride: int = 64
    eval_batch_seqs: int = 32
    eval_budget_s: float = 575.0
    ttt_enabled: bool = True
    ttt_chunk_tokens: int = 32_768
    ttt_epochs: int = 3
    ttt_lr: float = 0.005
    ttt_momentum: float = 0.9
    ttt_batch_seqs: int = 16
    ttt_grad_clip: float = 1.0
    ttt_freeze_layers: int = 0
    cache_enabled: bool = True
    cache_weight: float = 0.04
    cache_kappa: float = 24.0

    @classmethod
    def from_env(cls) -> Config:
        picked: dict[str, Any] = {}
        for item in fields(cls):
            raw = os.environ.get(item.name.upper())
            if raw is None:
                continue
            kind = type(item.default)
            picked[item.name] = raw.strip().lower() in ("1", "true", "yes", "on") if kind is bool else kind(raw)
        return cls(**picked)

    def validate(self) -> None:
        if self.model_dim % self.num_heads:
            raise ValueError("MODEL_DIM must be a multiple of NUM_HEADS")
        if self.num_heads % self.num_kv_heads:
            raise ValueError("NUM_HEADS must be a multiple of NUM_KV_HEADS")
        if self.rope_dims % 2 or self.rope_dims > self.model_dim // self.num_heads:
            raise ValueError("ROPE_DIMS must be even and fit into a head")
        if self.eval_stride > self.eval_seq_len:
            raise ValueError("EVAL_STRIDE must not exceed EVAL_SEQ_LEN")
        if self.ttt_chunk_tokens % self.eval_stride:
            raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE")


# ------------------------------------------------------------------------------------------------------------------
# ranks, logging, clocks
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """The ranks of this run, and the few collectives that the script needs."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    log_path: Path | None = None

    @classmethod
    def start(cls) -> World:
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if not torch.cuda.is_available():
            raise RuntimeError("a CUDA device is needed")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group("nccl", device_id=device)
            dist.barrier()
        return cls(rank, local_rank, size, device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def log(self, text: str, console: bool = True) -> None:
        if not self.main:
            return
        if console:
            print(text, flush=True)
        if self.log_path is not None:
            with self.log_path.open("a", encoding="utf-8") as sink:
                print(text, file=sink)

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        return tensor

    def send(self, tensor: Tensor, owner: int) -> Tensor:
        if self.size > 1:
            dist.broadcast(tensor, src=owner)
        return tensor

    def agree(self, flag: bool) -> bool:
        """Rank 0 decides, so that all ranks leave a timed loop at the same turn."""
        verdict = torch.tensor(int(flag), device=self.device, dtype=torch.int32)
        return bool(self.send(verdict, 0).item())

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class Clock:
    """Wall-clock seconds since it was started, with all queued GPU work waited for."""

    def __init__(self, budget_s: float):
        self.budget_s = budget_s
        self._began: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self._began = time.perf_counter()

    def seconds(self, sync: bool = True) -> float:
        if self._began is None:
            return 0.0
        if sync:
            torch.cuda.synchronize()
        return time.perf_counter() - self._began

    def left(self, reserve_s: float = 0.0) -> float:
        return self.budget_s - reserve_s - self.seconds(sync=False)


@contextmanager
def half_precision() -> Iterator[None]:
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        yield


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


# ------------------------------------------------------------------------------------------------------------------
# data
# ------------------------------------------------------------------------------------------------------------------


def read_shard(path: Path) -> Tensor:
    """The tokens of one .bin file: 256 int32 of header, then uint16."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: the header promises {count} tokens, the file holds {tokens.size}")
    return torch.from_numpy(tokens.astype(np.int32))


def shard_paths(folder: str, split: str) -> list[Path]:
    found = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
    if not found:
        raise FileNotFoundError(f"no {split} shards in {folder}")
    return found


class ShardCursor:
    """Reads on and on through a list of shards; after the last comes the first."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.index = 0
        self.offset = 0
        self.tokens = read_shard(self.paths[0])

    def _advance(self) -> None:
        self.index = (self.index + 1) % len(self.paths)
        self.offset = 0
        self.tokens = read_shard(self.paths[self.index])

    def take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        missing = count
        while missing > 0:
            room = self.tokens.numel() - self.offset
            if room <= 0:
                self._advance()
                continue
            step = min(room, missing)
            parts.append(self.tokens[self.offset : self.offset + step])
            self.offset += step
            missing -= step
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainFeed:
    """Training batches: every rank reads the same stream and keeps its own part of each slice."""

    def __init__(self, cfg: Config, world: World):
        self.cfg = cfg
        self.world = world
        self.cursor = ShardCursor(shard_paths(cfg.data_dir, "train"))

    def next(self, n_seqs: int) -> tuple[Tensor, Tensor]:
        """n_seqs: sequences for this rank."""
        length = self.cfg.train_seq_len
        span = n_seqs * length + 1
        block = self.cursor.take(span * self.world.size)
        mine = block[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        mine = mine.pin_memory().to(self.world.device, non_blocking=True)
        return mine[:-1].view(n_seqs, length), mine[1:].view(n_seqs, length)


class ValidationSplit:
    """The fixed validation stream. Position p has the input tokens[p] and the target tokens[p + 1]."""

    def __init__(self, tokens: Tensor):
        if tokens.numel() < 2:
            raise ValueError("the validation split is empty")
        self.tokens = tokens

    @classmethod
    def load(cls, cfg: Config, world: World) -> ValidationSplit:
        stream = torch.cat([read_shard(path) for path in shard_paths(cfg.data_dir, "val")])
        return cls(stream.to(world.device))

    @property
    def positions(self) -> int:
        return self.tokens.numel() - 1

    def pair(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the positions lo .. hi - 1."""
        part = self.tokens[lo : hi + 1].to(torch.int64)
        return part[:-1], part[1:]


class ByteTable:
    """UTF-8 bytes of each token's text. A leading space is a byte only where the token before has text."""

    def __init__(self, length: Tensor, spaced: Tensor, textless: Tensor):
        self.length = length
        self.spaced = spaced
        self.textless = textless

    @classmethod
    def from_tokenizer(cls, cfg: Config, world: World) -> ByteTable:
        sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
        if int(sp.vocab_size()) > cfg.vocab_size:
            raise ValueError(f"the tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {cfg.vocab_size}")
        length = np.zeros(cfg.vocab_size, dtype=np.int32)
        spaced = np.zeros(cfg.vocab_size, dtype=np.bool_)
        textless = np.ones(cfg.vocab_size, dtype=np.bool_)
        for token in range(int(sp.vocab_size())):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            textless[token] = False
            if sp.is_byte(token):
                length[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith("\u2581"):
                spaced[token] = True
                piece = piece[1:]
            length[token] = len(piece.encode("utf-8"))
        to = world.device
        return cls(
            torch.from_numpy(length).to(to),
            torch.from_numpy(spaced).to(to),
            torch.from_numpy(textless).to(to),
        )

    def count(self, before: Tensor, target: Tensor) -> Tensor:
        space = self.spaced[target] & ~self.textless[before]
        return self.length[target] + space.to(torch.int32)


# ------------------------------------------------------------------------------------------------------------------
# model
# ------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """A bias-free linear layer whose weight stays in fp32 and is cast at use."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False):
        super().__init__(n_in, n_out, bias=False)
        with torch.no_grad():
            if zero:
                self.weight.zero_()
            else:
                nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Rotates the first rope_dims of every head; the others carry no position."""

    def __init__(self, dims: int, base: float, max_len: int):
        super().__init__()
        freq = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), freq)
        self.dims = dims
        self.register_buffer("cos", angle.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", angle.sin()[None, :, None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        cos = self.cos[:, :length].to(x.dtype)
        sin = self.sin[:, :length].to(x.dtype)
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Config, rotary: Rotary):
        super().__init__()
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.q = Linear(cfg.model_dim, cfg.model_dim)
        self.k = Linear(cfg.model_dim, kv_dim)
        self.v = Linear(cfg.model_dim, kv_dim)
        self.out = Linear(cfg.model_dim, cfg.model_dim, zero=True)
        self.gain = nn.Parameter(torch.full((self.heads,), cfg.qk_gain))
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.q(x).view(b, t, self.heads, self.head_dim)
        k = self.k(x).view(b, t, self.kv_heads, self.head_dim)
        v = self.v(x).view(b, t, self.kv_heads, self.head_dim)
        q = self.rotary(rms(q)) * self.gain.to(q.dtype)[None, None, :, None]
        k = self.rotary(rms(k))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        )
        y = self.exclude_self(y.transpose(1, 2), v)
        return self.out(y.reshape(b, t, d))

    def exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        """Takes out of each head's output what lies along the token's own value."""
        b, t, h, c = y.shape
        group = h // self.kv_heads
        folded = y.reshape(b, t, self.kv_heads, group, c)
        own = F.normalize(v, dim=-1)[:, :, :, None, :]
        along = (folded * own).sum(dim=-1, keepdim=True)
        return (folded - along * own).reshape(b, t, h, c)


class FeedForward(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.up = Linear(cfg.model_dim, hidden)
        self.down = Linear(hidden, cfg.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: Config, rotary: Rotary, layer: int):
        super().__init__()
        self.attn = Attention(cfg, rotary)
        self.mlp = FeedForward(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.blend = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        blend = self.blend.to(x.dtype)
        x = blend[0] * x + blend[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.depth_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.depth_scale)


class Smear(nn.Module):
    """Adds a gated share of the token before. The first token of a document takes nothing from the one before it."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.bos_id = cfg.bos_id
        self.gate = nn.Parameter(torch.full((cfg.model_dim,), -3.0))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos_id).to(x.dtype)[..., None]
        return x + torch.sigmoid(self.gate).to(x.dtype) * before * inside


class Decoder(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        nn.init.normal_(self.embed.weight, std=cfg.embed_init_std)
        rotary = Rotary(cfg.rope_dims, cfg.rope_base, max(cfg.train_seq_len, cfg.eval_seq_len))
        self.smear = Smear(cfg)
        self.blocks = nn.ModuleList(Block(cfg, rotary, layer) for layer in range(cfg.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(cfg.skip_layers, cfg.model_dim))
        self.head_weight = None if cfg.tie_embeddings else Linear(cfg.model_dim, cfg.vocab_size, zero=True)

    def hidden(self, ids: Tensor) -> Tensor:
        x = rms(self.embed(ids).to(torch.bfloat16))
        x = self.smear(x, ids)
        x0 = x
        kept: list[Tensor] = []
        first_late = self.cfg.num_layers - self.cfg.skip_layers
        for layer, block in enumerate(self.blocks):
            if layer >= first_late and kept:
                x = x + self.skip_weights[layer - first_late].to(x.dtype) * kept.pop()
            x = block(x, x0)
            if layer < self.cfg.skip_layers:
                kept.append(x)
        return rms(x)

    def head(self, hidden: Tensor) -> Tensor:
        weight = self.embed.weight if self.head_weight is None else self.head_weight.weight
        raw = F.linear(hidden, weight.to(hidden.dtype)).float()
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(raw / cap)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), reduction=reduction)


def parameter_count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# ------------------------------------------------------------------------------------------------------------------
# optimisers
# ------------------------------------------------------------------------------------------------------------------


@torch.compile(dynamic=False)
def orthogonalise(g: Tensor, steps: int) -> Tensor:
    """Quintic Newton-Schulz iteration in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Each rank works on every size-th matrix; the updates are summed over the ranks."""

    def __init__(self, params: Iterable[nn.Parameter], world: World, lr: float, momentum: float, steps: int, wd: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, wd=wd))
        self.world = world

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            total = sum(p.numel() for p in members)
            flat = torch.zeros(total, device=self.world.device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(members):
                if i % self.world.size == self.world.rank:
                    state = self.state[p]
                    if "velocity" not in state:
                        state["velocity"] = torch.zeros_like(p.grad)
                    velocity = state["velocity"]
                    velocity.lerp_(p.grad, 1.0 - group["momentum"])
                    push = p.grad.lerp(velocity, group["momentum"])
                    push = orthogonalise(push, group["steps"]) * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = push.reshape(-1)
                at += p.numel()
            self.world.sum_(flat)
            at = 0
            for p in members:
                p.mul_(1.0 - group["lr"] * group["wd"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


class OptimiserSet:
    """Muon and AdamW as one: learning rates scale together."""

    def __init__(self, cfg: Config, world: World, net: Decoder):
        matrices = [p for p in net.blocks.parameters() if p.ndim == 2 and min(p.shape) > 2]
        taken = {id(p) for p in matrices} | {id(net.embed.weight)}
        scalars = [p for p in net.parameters() if id(p) not in taken]
        self.cfg = cfg
        self.muon = Muon(matrices, world, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_ns_steps, cfg.muon_wd)
        self.adam = torch.optim.AdamW(
            [
                dict(params=[net.embed.weight], lr=cfg.embed_lr, weight_decay=cfg.adam_wd),
                dict(params=scalars, lr=cfg.scalar_lr, weight_decay=0.0),
            ],
            betas=(cfg.beta1, cfg.beta2),
            eps=1e-8,
            fused=True,
        )
        for group in (*self.muon.param_groups, *self.adam.param_groups):
            group["full_lr"] = group["lr"]

    def step(self, step: int, scale: float) -> None:
        ramp = min(step / max(self.cfg.muon_momentum_ramp, 1), 1.0)
        low, high = self.cfg.muon_momentum_start, self.cfg.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = low + ramp * (high - low)
        for group in (*self.muon.param_groups, *self.adam.param_groups):
            group["lr"] = group["full_lr"] * scale
        self.muon.step()
        self.adam.step()

    def clear(self) -> None:
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return copy.deepcopy(self.muon.state_dict()), copy.deepcopy(self.adam.state_dict())

    def restore(self, saved: tuple[dict[str, Any], dict[str, Any]]) -> None:
        self.muon.load_state_dict(saved[0])
        self.adam.load_state_dict(saved[1])


class WeightAverage:
    """An exponential moving average of all parameters, in fp32."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in net.named_parameters()]
        self.live = [p for _, p in net.named_parameters()]
        self.shadow = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def reset(self) -> None:
        torch._foreach_copy_(self.shadow, self.live)

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, self.live, 1.0 - self.decay)

    @torch.no_grad()
    def write_back(self) -> None:
        torch._foreach_copy_(self.live, self.shadow)


# ------------------------------------------------------------------------------------------------------------------
# training
# ------------------------------------------------------------------------------------------------------------------


class Trainer:
    """The timed part: steps until the budget less the reserve for quantisation is used up."""

    def __init__(self, cfg: Config, world: World, net: Decoder, feed: TrainFeed, clock: Clock):
        self.cfg = cfg
        self.world = world
        self.net = net
        self.feed = feed
        self.clock = clock
        self.compiled = torch.compile(net, dynamic=False, fullgraph=True)
        self.optim = OptimiserSet(cfg, world, net)
        self.average = WeightAverage(net, cfg.ema_decay)
        self.accum = max(8 // world.size, 1)
        self.seqs = cfg.batch_tokens // (cfg.train_seq_len * world.size * self.accum)
        self.history: list[tuple[int, float]] = []

    def lr_scale(self, step: int, elapsed_s: float) -> float:
        """Constant, then linear to zero; the point in the run is taken from the clock."""
        usable = self.cfg.train_budget_s - self.cfg.quant_reserve_s
        done = max(elapsed_s / usable, step / self.cfg.iterations)
        if done < 1.0 - self.cfg.warmdown_frac:
            return 1.0
        return max((1.0 - done) / self.cfg.warmdown_frac, 0.0)

    def share_gradients(self) -> None:
        if self.world.size == 1:
            return
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        self.world.mean_(flat)
        at = 0
        for g in grads:
            g.copy_(flat[at : at + g.numel()].view_as(g))
            at += g.numel()

    def one_step(self, step: int, scale: float) -> Tensor:
        self.optim.clear()
        total = torch.zeros((), device=self.world.device)
        for _ in range(self.accum):
            x, y = self.feed.next(self.seqs)
            with half_precision():
                loss = self.compiled(x, y)
            (loss / self.accum).backward()
            total += loss.detach() / self.accum
        self.share_gradients()
        if self.cfg.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.cfg.grad_clip)
        self.optim.step(step, scale)
        return total

    def warm_up(self) -> None:
        """Compiles all kernels before the clock starts; weights, optimisers and the data stream are put back."""
        if self.cfg.warmup_steps <= 0:
            return
        weights = {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}
        optim = self.optim.snapshot()
        self.net.train()
        for step in range(self.cfg.warmup_steps):
            self.one_step(step, 1.0)
        self.net.load_state_dict(weights)
        self.optim.restore(optim)
        self.optim.clear()
        self.feed = TrainFeed(self.cfg, self.world)
        self.world.log(f"trainer: {self.cfg.warmup_steps} warm-up steps done and undone")

    def run(self) -> None:
        self.net.train()
        self.world.barrier()
        self.clock.start()
        step = 0
        while step < self.cfg.iterations:
            elapsed = self.clock.seconds(sync=step % 8 == 0)
            if step % 8 == 0 and not self.world.agree(self.clock.left(self.cfg.quant_reserve_s) > 0.0):
                self.world.log(f"trainer: budget reached step:{step} train_time:{1000 * elapsed:.0f}ms")
                break
            loss = self.one_step(step, self.lr_scale(step, elapsed))
            step += 1
            if step == self.cfg.ema_start_step:
                self.average.reset()
            elif step > self.cfg.ema_start_step:
                self.average.update()
            if step <= 5 or step % self.cfg.log_every == 0:
                value = self.world.mean_(loss.clone()).item()
                self.history.append((step, value))
                spent = self.clock.seconds()
                self.world.log(
                    f"step:{step}/{self.cfg.iterations} train_loss:{value:.4f} "
                    f"train_time:{1000 * spent:.0f}ms step_avg:{1000 * spent / step:.2f}ms"
                )
        self.finish(step)

    def finish(self, step: int) -> None:
        if step >= self.cfg.ema_start_step:
            self.average.write_back()
            self.world.log(f"trainer: EMA weights taken, decay {self.cfg.ema_decay}")
        self.optim.clear()
        peak = torch.cuda.max_memory_allocated() // 2**20
        self.world.log(f"trainer: done step:{step} train_time:{1000 * self.clock.seconds():.0f}ms peak:{peak} MiB")


# ------------------------------------------------------------------------------------------------------------------
# quantisation
# ------------------------------------------------------------------------------------------------------------------


class HessianTap:
    """Sums x x^T of the inputs of every linear layer in the blocks while it is open."""

    def __init__(self, net: Decoder, world: World):
        self.world = world
        self.layers = {name: m for name, m in net.named_modules() if isinstance(m, Linear) and name.startswith("blocks.")}
        self.sums: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> HessianTap:
        for name, layer in self.layers.items():
            width = layer.in_features
            self.sums[name] = torch.zeros(width, width, device=self.world.device, dtype=torch.float32)
            self.seen[name] = 0
            self._handles.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat = args[0].detach().reshape(-1, args[0].size(-1)).float()
            self.sums[name].addmm_(flat.T, flat)
            self.seen[name] += flat.size(0)

        return add

    def merged(self) -> dict[str, Tensor]:
        """The mean over all ranks' tokens."""
        out: dict[str, Tensor] = {}
        for name, total in self.sums.items():
            count = torch.tensor(float(self.seen[name]), device=self.world.device)
            self.world.sum_(total)
            self.world.sum_(count)
            out[name] = total / count.clamp_min(1.0)
        return out


@dataclass(frozen=True)
class QuantTensor:
    """Integers of `bits` bits and one scale per row."""

    codes: Tensor
    scale: Tensor
    bits: int

    def dense(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]


def int_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def row_scale(weight: Tensor, bits: int, sigmas: float) -> Tensor:
    _, high = int_range(bits)
    spread = torch.minimum(sigmas * weight.std(dim=1), weight.abs().amax(dim=1))
    return (spread / high).clamp_min(1e-6).half()


def quantise_nearest(weight: Tensor, bits: int, sigmas: float) -> QuantTensor:
    low, high = int_range(bits)
    scale = row_scale(weight, bits, sigmas)
    codes = torch.round(weight / scale.float()[:, None]).clamp(low, high)
    return QuantTensor(codes.to(torch.int8), scale, bits)


def quantise_gptq(weight: Tensor, hessian: Tensor, cfg: Config) -> QuantTensor:
    """GPTQ with columns in order of falling activation energy."""
    low, high = int_range(cfg.weight_bits)
    w = weight.detach().float().clone()
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    scale = row_scale(w, cfg.weight_bits, cfg.clip_sigmas)
    step = scale.float()
    order = torch.argsort(h.diagonal(), descending=True)
    w = w[:, order]
    h = h[order][:, order]
    h.diagonal().add_(cfg.gptq_damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.zeros_like(w)
    columns = w.size(1)
    for begin in range(0, columns, cfg.gptq_block):
        end = min(begin + cfg.gptq_block, columns)
        part = w[:, begin:end].clone()
        residue = torch.zeros_like(part)
        corner = upper[begin:end, begin:end]
        for j in range(end - begin):
            code = torch.round(part[:, j] / step).clamp(low, high)
            codes[:, begin + j] = code
            miss = (part[:, j] - code * step) / corner[j, j]
            part[:, j:] -= miss[:, None] * corner[j, j:][None, :]
            residue[:, j] = miss
        if end < columns:
            w[:, end:] -= residue @ upper[begin:end, end:]
    return QuantTensor(codes[:, torch.argsort(order)].to(torch.int8).contiguous(), scale, cfg.weight_bits)


class Quantiser:
    """Calibrates on fresh training batches while the training clock still runs, then quantises layer by layer."""

    def __init__(self, cfg: Config, world: World, net: Decoder, feed: TrainFeed, clock: Clock):
        self.cfg = cfg
        self.world = world
        self.net = net
        self.feed = feed
        self.clock = clock

    @torch.no_grad()
    def calibrate(self) -> dict[str, Tensor]:
        self.net.eval()
        done = 0
        with HessianTap(self.net, self.world) as tap, half_precision():
            for _ in range(self.cfg.calib_batches):
                if not self.world.agree(self.clock.left(reserve_s=9.0) > 0.0):
                    break
                x, _ = self.feed.next(self.cfg.calib_seqs)
                self.net.hidden(x)
                torch.cuda.synchronize()
                done += 1
        hessians = tap.merged()
        self.world.log(f"gptq: {done} training batches read, train clock {self.clock.seconds():.1f}s")
        return hessians

    @torch.no_grad()
    def quantise(self, hessians: dict[str, Tensor]) -> tuple[dict[str, QuantTensor], dict[str, Tensor]]:
        """Each rank quantises its share of the matrices and sends the codes round."""
        coded: dict[str, QuantTensor] = {}
        plain: dict[str, Tensor] = {}
        turn = 0
        for name, value in self.net.state_dict().items():
            layer = name.removesuffix(".weight")
            if layer in hessians:
                owner = turn % self.world.size
                turn += 1
                if owner == self.world.rank:
                    mine = quantise_gptq(value, hessians[layer], self.cfg)
                else:
                    mine = QuantTensor(
                        torch.empty(value.shape, dtype=torch.int8, device=self.world.device),
                        torch.empty(value.size(0), dtype=torch.float16, device=self.world.device),
                        self.cfg.weight_bits,
                    )
                coded[name] = mine
            elif value.ndim == 2 and value.size(0) == self.cfg.vocab_size:
                coded[name] = quantise_nearest(value.float(), self.cfg.embed_bits, self.cfg.embed_clip_sigmas)
            else:
                plain[name] = value.detach().half()
        turn = 0
        for name in coded:
            if name.removesuffix(".weight") in hessians:
                self.world.send(coded[name].codes, turn % self.world.size)
                self.world.send(coded[name].scale, turn % self.world.size)
                turn += 1
        self.world.log(f"gptq: {turn} matrices to int{self.cfg.weight_bits}, train clock {self.clock.seconds():.1f}s")
        return coded, plain


# ------------------------------------------------------------------------------------------------------------------
# artifact
# ------------------------------------------------------------------------------------------------------------------


class Artifact:
    """One file: brotli over (length of the table, table as JSON, all arrays one after the other)."""

    MAGIC = b"SHN1"

    def __init__(self, path: Path):
        self.path = path

    @staticmethod
    def _raw(tensor: Tensor) -> bytes:
        return tensor.detach().cpu().contiguous().numpy().tobytes()

    def write(self, coded: dict[str, QuantTensor], plain: dict[str, Tensor], quality: int) -> int:
        table: list[dict[str, Any]] = []
        payload: list[bytes] = []
        for name, q in coded.items():
            table.append(dict(name=name, kind="codes", bits=q.bits, shape=list(q.codes.shape)))
            shifted = q.codes.to(torch.int16) - int_range(q.bits)[0]
            payload.append(self._raw(shifted.to(torch.uint8)))
        for name, q in coded.items():
            table.append(dict(name=name, kind="scale", shape=list(q.scale.shape)))
            payload.append(self._planes(self._raw(q.scale)))
        for name, value in plain.items():
            table.append(dict(name=name, kind="half", shape=list(value.shape)))
            payload.append(self._planes(self._raw(value)))
        head = json.dumps(table, separators=(",", ":")).encode()
        blob = self.MAGIC + struct.pack("<I", len(head)) + head + b"".join(payload)
        packed = brotli.compress(blob, quality=quality, lgwin=24)
        self.path.write_bytes(packed)
        return len(packed)

    @staticmethod
    def _planes(raw: bytes) -> bytes:
        """All low bytes, then all high bytes: fp16 compresses better so."""
        return np.frombuffer(raw, dtype=np.uint8).reshape(-1, 2).T.tobytes()

    @staticmethod
    def _unplanes(raw: bytes) -> np.ndarray:
        pairs = np.ascontiguousarray(np.frombuffer(raw, dtype=np.uint8).reshape(2, -1).T)
        return pairs.reshape(-1).view(np.float16)

    def read(self) -> dict[str, Tensor]:
        blob = brotli.decompress(self.path.read_bytes())
        if blob[:4] != self.MAGIC:
            raise ValueError(f"{self.path}: not an artifact of this script")
        (size,) = struct.unpack("<I", blob[4:8])
        table = json.loads(blob[8 : 8 + size])
        at = 8 + size
        codes: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for row in table:
            count = math.prod(row["shape"])
            if row["kind"] == "codes":
                raw = np.frombuffer(blob, dtype=np.uint8, count=count, offset=at)
                at += count
                low = int_range(int(row["bits"]))[0]
                codes[row["name"]] = torch.from_numpy(raw.astype(np.int16) + low).view(*row["shape"])
                continue
            values = torch.from_numpy(self._unplanes(blob[at : at + 2 * count]).astype(np.float32)).view(*row["shape"])
            at += 2 * count
            if row["kind"] == "scale":
                state[row["name"]] = codes[row["name"]].float() * values[:, None]
            else:
                state[row["name"]] = values
        if at != len(blob):
            raise ValueError(f"{self.path}: {len(blob) - at} bytes are left over")
        return state


@dataclass(frozen=True)
class SizeReport:
    """What counts against the limit: this script and the artifact."""

    model_bytes: int
    code_bytes: int
    limit: int

    @property
    def total(self) -> int:
        return self.model_bytes + self.code_bytes

    def lines(self) -> list[str]:
        return [
            f"size: model {self.model_bytes} bytes",
            f"size: code {self.code_bytes} bytes",
            f"size: total {self.total} bytes of {self.limit}",
        ]

    def check(self) -> None:
        if self.total > self.limit:
            raise RuntimeError(f"the submission has {self.total} bytes, {self.total - self.limit} too many")


# ------------------------------------------------------------------------------------------------------------------
# evaluation
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    nats: float
    n_bytes: float
    tokens: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        return self.nats / LN2 / self.n_bytes


class Ledger:
    """Nats, bytes and tokens of this rank; they meet those of the other ranks once, when the ledger is closed."""

    def __init__(self, world: World, expected: int):
        self.world = world
        self.expected = expected
        self.nats = torch.zeros((), device=world.device, dtype=torch.float64)
        self.n_bytes = torch.zeros((), device=world.device, dtype=torch.float64)
        self.tokens = torch.zeros((), device=world.device, dtype=torch.float64)

    def post(self, nll: Tensor, n_bytes: Tensor) -> None:
        self.nats += nll.to(torch.float64).sum()
        self.n_bytes += n_bytes.to(torch.float64).sum()
        self.tokens += nll.numel()

    def close(self) -> Score:
        totals = self.world.sum_(torch.stack((self.nats, self.n_bytes, self.tokens)))
        nats, n_bytes, tokens = totals.tolist()
        if int(tokens) != self.expected:
            raise RuntimeError(f"{int(tokens)} tokens were scored, {self.expected} were to be")
        return Score(nats, n_bytes, int(tokens))


@dataclass(frozen=True)
class Span:
    """Positions start .. stop - 1 are scored; the context begins at lo."""

    lo: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    index: int
    start: int
    stop: int


class PairCache:
    """Exact counts of (token, next token) over what has been scored so far.

    A row of counts over its sum is a distribution over the whole vocabulary, and so is its mixture with the network's;
    the weight of the row depends on how often its context was seen, and on nothing else.
    """

    def __init__(self, cfg: Config, world: World):
        self.weight = cfg.cache_weight if cfg.cache_enabled else 0.0
        self.kappa = cfg.cache_kappa
        self.vocab = cfg.vocab_size
        side = cfg.vocab_size if self.weight > 0 else 1
        self.counts = torch.zeros(side, side, device=world.device, dtype=torch.float32)
        self.row_sum = torch.zeros(side, device=world.device, dtype=torch.float32)

    def absorb(self, context: Tensor, target: Tensor) -> None:
        if self.weight <= 0:
            return
        ones = torch.ones(context.numel(), device=context.device)
        self.counts.view(-1).index_add_(0, context * self.vocab + target, ones)
        self.row_sum.index_add_(0, context, ones)

    def blend(self, log_p: Tensor, context: Tensor) -> Tensor:
        """log of the mixture, for every token of the vocabulary."""
        if self.weight <= 0:
            return log_p
        seen = self.row_sum[context][:, None]
        share = self.weight * seen / (seen + self.kappa)
        row = self.counts[context] / seen.clamp_min(1.0)
        return torch.log((1.0 - share) * log_p.exp() + share * row + 1e-30)


class ChunkAdapter:
    """SGD with momentum on chunks that have been scored; the learning rate falls as a cosine over the chunks."""

    def __init__(self, cfg: Config, world: World, split: ValidationSplit, net: Decoder, n_chunks: int):
        self.cfg = cfg
        self.world = world
        self.split = split
        self.net = net
        self.n_chunks = n_chunks
        frozen = tuple(f"blocks.{layer}." for layer in range(cfg.ttt_freeze_layers))
        self.params = [p for name, p in net.named_parameters() if not name.startswith(frozen or ("-",))]
        for p in net.parameters():
            p.requires_grad_(False)
        for p in self.params:
            p.requires_grad_(True)
        self.optim = torch.optim.SGD(self.params, lr=cfg.ttt_lr, momentum=cfg.ttt_momentum)
        self.loss_fn = torch.compile(net, dynamic=False)

    def lr_at(self, index: int) -> float:
        return self.cfg.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * index / max(self.n_chunks - 1, 1)))

    def sequences(self, chunk: Chunk) -> list[tuple[int, int]]:
        length = self.cfg.train_seq_len
        return [(lo, lo + length) for lo in range(chunk.start, chunk.stop - length + 1, length)]

    def share(self, weight: float) -> None:
        """Sums the gradients over the ranks; weight: one over the tokens of all of them."""
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.reshape(-1) for p in self.params])
        self.world.sum_(flat).mul_(weight)
        at = 0
        for p in self.params:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()

    def learn(self, chunk: Chunk) -> None:
        sequences = self.sequences(chunk)
        if not sequences:
            return
        lr = self.lr_at(chunk.index)
        for group in self.optim.param_groups:
            group["lr"] = lr
        self.net.train()
        for _ in range(self.cfg.ttt_epochs):
            for begin in range(0, len(sequences), self.cfg.ttt_batch_seqs):
                self.step(sequences[begin : begin + self.cfg.ttt_batch_seqs])
        self.net.eval()

    def step(self, batch: Sequence[tuple[int, int]]) -> None:
        self.optim.zero_grad(set_to_none=True)
        for lo, hi in batch[self.world.rank :: self.world.size]:
            x, y = self.split.pair(lo, hi)
            with half_precision():
                loss = self.loss_fn(x[None], y[None], reduction="sum")
            loss.backward()
        self.share(1.0 / sum(hi - lo for lo, hi in batch))
        torch.nn.utils.clip_grad_norm_(self.params, self.cfg.ttt_grad_clip)
        self.optim.step()


class Evaluator:
    """Scores the validation split: plainly (one pass, no state) or chunk by chunk, learning from what was scored."""

    def __init__(self, cfg: Config, world: World, split: ValidationSplit, table: ByteTable):
        self.cfg = cfg
        self.world = world
        self.split = split
        self.table = table
        self.clock = Clock(cfg.eval_budget_s)
        self.hidden: Callable[[Tensor], Tensor] | None = None

    def attach(self, net: Decoder) -> None:
        net.eval()
        self.hidden = torch.compile(net.hidden, dynamic=False)

    # -- geometry

    def chunks(self) -> list[Chunk]:
        size, end = self.cfg.ttt_chunk_tokens, self.split.positions
        return [Chunk(i, lo, min(lo + size, end)) for i, lo in enumerate(range(0, end, size))]

    def spans(self, start: int, stop: int, stride: int) -> list[Span]:
        """Tiles start .. stop - 1; every span sees as much context as a window holds."""
        out: list[Span] = []
        for begin in range(start, stop, stride):
            end = min(begin + stride, stop)
            out.append(Span(max(0, end - self.cfg.eval_seq_len), begin, end))
        return out

    def gather(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs [B, L], targets [B, L] and the places (row, column) that are to be scored."""
        length, rows = self.cfg.eval_seq_len, self.cfg.eval_batch_seqs
        x = torch.zeros(rows, length, device=self.world.device, dtype=torch.int64)
        y = torch.zeros(rows, length, device=self.world.device, dtype=torch.int64)
        keep = torch.zeros(rows, length, device=self.world.device, dtype=torch.bool)
        for row, span in enumerate(spans):
            inputs, targets = self.split.pair(span.lo, span.stop)
            x[row, : inputs.numel()] = inputs
            y[row, : targets.numel()] = targets
            keep[row, span.start - span.lo : span.stop - span.lo] = True
        row_at, col_at = keep.nonzero(as_tuple=True)
        return x, y, row_at, col_at

    # -- scoring

    @torch.no_grad()
    def log_probs(self, net: Decoder, hidden: Tensor, context: Tensor, cache: PairCache | None) -> Tensor:
        """log p over the vocabulary at each place."""
        with half_precision():
            logits = net.head(hidden)
        log_p = F.log_softmax(logits.float(), dim=-1)
        return log_p if cache is None else cache.blend(log_p, context)

    @torch.no_grad()
    def score(self, net: Decoder, spans: Sequence[Span], ledger: Ledger, cache: PairCache | None = None) -> None:
        """Posts the losses of this rank's share of the spans."""
        assert self.hidden is not None
        mine = spans[self.world.rank :: self.world.size]
        for begin in range(0, len(mine), self.cfg.eval_batch_seqs):
            x, y, row_at, col_at = self.gather(mine[begin : begin + self.cfg.eval_batch_seqs])
            with half_precision():
                states = self.hidden(x)
            for part in torch.arange(row_at.numel(), device=self.world.device).split(8192):
                r, c = row_at[part], col_at[part]
                context, target = x[r, c], y[r, c]
                log_p = self.log_probs(net, states[r, c], context, cache)
                nll = -log_p.gather(1, target[:, None]).squeeze(1)
                ledger.post(nll, self.table.count(context, target))

    def warm_up(self, net: Decoder) -> None:
        """Compiles the scoring kernels on random tokens."""
        assert self.hidden is not None
        shape = (self.cfg.eval_batch_seqs, self.cfg.eval_seq_len)
        noise = torch.randint(0, self.cfg.vocab_size, shape, device=self.world.device)
        with torch.no_grad(), half_precision():
            self.hidden(noise)

    def plain(self, net: Decoder, stride: int | None = None) -> Score:
        """One pass without any state: a diagnosis of what the quantised weights are worth."""
        ledger = Ledger(self.world, self.split.positions)
        spans = self.spans(0, self.split.positions, stride or self.cfg.eval_seq_len)
        self.score(net, spans, ledger)
        return ledger.close()

    def adaptive(self, net: Decoder) -> Score:
        """The reported score: each chunk is scored with what was learnt from the chunks before it, then learnt."""
        ledger = Ledger(self.world, self.split.positions)
        cache = PairCache(self.cfg, self.world)
        chunks = self.chunks()
        adapter = ChunkAdapter(self.cfg, self.world, self.split, net, len(chunks)) if self.cfg.ttt_enabled else None
        for chunk in chunks:
            self.score(net, self.spans(chunk.start, chunk.stop, self.cfg.eval_stride), ledger, cache)
            if chunk.index + 1 == len(chunks):
                break
            cache.absorb(*self.split.pair(chunk.start, chunk.stop))
            in_time = self.world.agree(self.clock.left(reserve_s=120.0 * (1.0 - chunk.index / len(chunks))) > 0.0)
            if adapter is not None and in_time:
                adapter.learn(chunk)
            if chunk.index % 100 == 0:
                self.progress(chunk, len(chunks), ledger)
        return ledger.close()

    def progress(self, chunk: Chunk, total: int, ledger: Ledger) -> None:
        bpb = (ledger.nats / LN2 / ledger.n_bytes.clamp_min(1.0)).item()
        self.world.log(f"ttt: chunk {chunk.index + 1}/{total} rank0_bpb:{bpb:.4f} eval_time:{self.clock.seconds():.1f}s")


# ------------------------------------------------------------------------------------------------------------------
# pipeline
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the stages hand to each other."""

    cfg: Config
    world: World
    clock: Clock
    feed: TrainFeed | None = None
    net: Decoder | None = None
    artifact: Artifact | None = None
    split: ValidationSplit | None = None
    table: ByteTable | None = None
    final: Score | None = None
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    name: str
    action: Callable[[Run], None]


class Pipeline:
    """Named stages in order, each with its wall-clock time in the log."""

    def __init__(self, stages: Sequence[Stage]):
        self.stages = tuple(stages)

    def __call__(self, run: Run) -> Run:
        for stage in self.stages:
            began = time.perf_counter()
            stage.action(run)
            torch.cuda.synchronize()
            spent = time.perf_counter() - began
            run.notes[stage.name] = spent
            run.world.log(f"stage:{stage.name} took {spent:.1f}s")
        return run


def stage_prepare(run: Run) -> None:
    seed_everything(run.cfg.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    run.net = Decoder(run.cfg).to(run.world.device)
    run.feed = TrainFeed(run.cfg, run.world)
    for p in run.net.parameters():
        run.world.send(p.data, 0)
    shards = len(run.feed.cursor.paths)
    run.world.log(f"prepare: {parameter_count(run.net)} parameters, {shards} training shards, {run.world.size} ranks")


def stage_train(run: Run) -> None:
    assert run.net is not None and run.feed is not None
    trainer = Trainer(run.cfg, run.world, run.net, run.feed, run.clock)
    trainer.warm_up()
    trainer.run()
    run.feed = trainer.feed


def stage_quantise(run: Run) -> None:
    """Calibration ends inside the training budget; packing reads no data."""
    assert run.net is not None and run.feed is not None
    quantiser = Quantiser(run.cfg, run.world, run.net, run.feed, run.clock)
    hessians = quantiser.calibrate()
    coded, plain = quantiser.quantise(hessians)
    spent = run.clock.seconds()
    run.world.log(f"quantise: training and GPTQ took {spent:.1f}s of {run.cfg.train_budget_s:.0f}s")
    run.artifact = Artifact(Path(run.cfg.out_dir) / f"{run.cfg.run_id}_seed{run.cfg.seed}.bin")
    if run.world.main:
        model_bytes = run.artifact.write(coded, plain, run.cfg.brotli_quality)
        report = SizeReport(model_bytes, SCRIPT_PATH.stat().st_size, run.cfg.size_limit)
        for line in report.lines():
            run.world.log(line)
        report.check()
    run.world.barrier()


def stage_reload(run: Run) -> None:
    """From here on only the artifact speaks for the training."""
    assert run.artifact is not None
    state = run.artifact.read()
    run.net = Decoder(run.cfg).to(run.world.device)
    missing, unexpected = run.net.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"the artifact lacks {missing} and has {unexpected} too many")
    run.feed = None
    torch.cuda.empty_cache()


def stage_evaluate(run: Run) -> None:
    assert run.net is not None
    cfg, world = run.cfg, run.world
    run.split = ValidationSplit.load(cfg, world)
    run.table = ByteTable.from_tokenizer(cfg, world)
    judge = Evaluator(cfg, world, run.split, run.table)
    judge.clock.start()
    judge.attach(run.net)
    judge.warm_up(run.net)
    before = judge.plain(run.net)
    world.log(f"roundtrip val_loss:{before.loss:.4f} val_bpb:{before.bpb:.4f} eval_time:{judge.clock.seconds():.1f}s")
    run.final = judge.adaptive(run.net)
    world.log(f"evaluate: {run.final.tokens} tokens, {run.final.n_bytes:.0f} bytes in {judge.clock.seconds():.1f}s")


def stage_report(run: Run) -> None:
    assert run.final is not None
    run.world.log(f"final val_loss:{run.final.loss:.8f} val_bpb:{run.final.bpb:.8f}")
    if run.world.main:
        summary = dict(
            run_id=run.cfg.run_id,
            seed=run.cfg.seed,
            val_loss=run.final.loss,
            val_bpb=run.final.bpb,
            tokens=run.final.tokens,
            stages=run.notes,
        )
        target = Path(run.cfg.out_dir) / f"{run.cfg.run_id}_seed{run.cfg.seed}.json"
        target.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


STAGES: tuple[Stage, ...] = (
    Stage("prepare", stage_prepare),
    Stage("train", stage_train),
    Stage("quantise", stage_quantise),
    Stage("reload", stage_reload),
    Stage("evaluate", stage_evaluate),
    Stage("report", stage_report),
)


def main() -> None:
    cfg = Config.from_env()
    cfg.validate()
    world = World.start()
    out = Path(cfg.out_dir)
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
        world.log_path = out / f"{cfg.run_id}_seed{cfg.seed}.log"
        world.log_path.write_text("", encoding="utf-8")
    world.barrier()
    world.log(f"python {sys.version.split()[0]} torch {torch.__version__}")
    world.log(json.dumps(asdict(cfg)), console=False)
    try:
        Pipeline(STAGES)(Run(cfg, world, Clock(cfg.train_budget_s)))
    finally:
        world.stop()


if __name__ == "__main__":
    main()
