"""
train_gpt.py  --  11L GPT (XSA + value embeddings) / Muon+AdamW / int6 / zstd, adaptive evaluation.

The evaluation walks the validation stream once, in chunks of 32k tokens:

    1. score the chunk (sliding blocks, stride 64, context 2048) with the weights and the tables as they are
    2. add the chunk's tokens to the n-gram tables
    3. train on the chunk for a few steps

The n-gram part is an interpolated backoff model over *exact* contexts of 1..5 tokens (vocabulary 1024 -> 10 bits a
token, so a context of five and its follower fit one int64; no hashing, no collisions). For the positions at hand it
builds dense rows [n, 1024] per order, so what gets mixed is always an honest distribution over the whole vocabulary.
The mixing weight looks at the entropy of the transformer and at nothing else.

Run:  torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import datetime
import glob
import hashlib
import io
import json
import math
import os
import platform
import random
import sys
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import zstandard
from torch import Tensor

PROCESS_START = time.perf_counter()
SIZE_LIMIT = 16_000_000
CODE = Path(__file__).read_text(encoding="utf-8")


# -----------------------------------------------------------------------------
# settings: every field can be overridden by an environment variable of its upper-case name
# -----------------------------------------------------------------------------


def env(name: str, default):
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() not in ("", "0", "false", "no")
    return type(default)(raw)


@dataclass
class Settings:
    # data
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    train_glob: str = "fineweb_train_*.bin"
    val_glob: str = "fineweb_val_*.bin"
    run_id: str = ""
    seed: int = 1337
    out_dir: str = "."

    # training length
    iterations: int = 20_000
    max_wallclock_s: float = 600.0
    calib_reserve_s: float = 9.0
    warmup_steps: int = 20
    warmdown_iters: int = 3500
    train_batch_tokens: int = 786_432
    train_seq_len: int = 2048
    val_loss_every: int = 4000
    val_batch_tokens: int = 524_288
    train_log_every: int = 200

    # model
    vocab_size: int = 1024
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0
    rope_base: float = 10_000.0
    rope_dims: int = 16
    logit_softcap: float = 30.0
    qk_gain_init: float = 1.5
    xsa_last_n: int = 4
    ve_dim: int = 128
    ve_layers: str = "8,9,10"
    bigram_buckets: int = 2048
    bigram_dim: int = 128
    smear: bool = True
    bos_id: int = 1
    tied_embed_init_std: float = 0.005

    # optimisers
    matrix_lr: float = 0.025
    scalar_lr: float = 0.025
    embed_lr: float = 0.035
    muon_momentum: float = 0.99
    muon_momentum_start: float = 0.92
    muon_momentum_ramp: int = 1500
    muon_ns_steps: int = 5
    muon_wd: float = 0.04
    adam_wd: float = 0.04
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.3

    # averaging
    average: str = "ema"
    ema_decay: float = 0.997
    swa_every: int = 50
    swa_from_scale: float = 0.2

    # quantisation
    qat_below_scale: float = 0.15
    calib_batches: int = 24
    calib_batch_seqs: int = 16
    zstd_level: int = 22

    # evaluation
    eval_seq_len: int = 2048
    eval_stride: int = 64
    eval_batch_windows: int = 64
    eval_budget_s: float = 570.0
    chunk_tokens: int = 32_768

    # test-time training
    ttt: bool = True
    ttt_epochs: int = 3
    ttt_lr: float = 2e-4
    ttt_wd: float = 0.0
    ttt_beta1: float = 0.9
    ttt_beta2: float = 0.99
    ttt_grad_clip: float = 1.0
    ttt_freeze_blocks: int = 2
    ttt_ramp_chunks: int = 20

    # n-gram
    ngram: bool = True
    ng_order: int = 5
    ng_discount: float = 0.75
    ng_uni_alpha: float = 0.5
    ng_min_tokens: int = 65_536
    ng_fold_pairs: int = 4_000_000
    mix_max: float = 0.30
    mix_mid: float = 2.6
    mix_slope: float = 1.4

    def __post_init__(self) -> None:
        for f in fields(self):
            setattr(self, f.name, env(f.name.upper(), getattr(self, f.name)))
        if not self.run_id:
            self.run_id = uuid.uuid4().hex[:12]

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, self.train_glob)

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, self.val_glob)

    @property
    def ve_layer_ids(self) -> list[int]:
        return [int(s) for s in self.ve_layers.split(",") if s.strip()]


# -----------------------------------------------------------------------------
# processes and logs
# -----------------------------------------------------------------------------


@dataclass
class Team:
    """The processes of this run. World size 1 works without torchrun."""

    rank: int = 0
    world: int = 1
    local: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))

    @classmethod
    def join(cls) -> "Team":
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is needed")
        rank = int(os.environ.get("RANK", "0"))
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if world <= 0 or 8 % world != 0:
            raise ValueError(f"WORLD_SIZE={world} must divide 8")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend="nccl", device_id=device, timeout=datetime.timedelta(minutes=20))
            dist.barrier()
        return cls(rank, world, local, device)

    @property
    def many(self) -> bool:
        return dist.is_available() and dist.is_initialized() and self.world > 1

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.many:
            dist.barrier()

    def total(self, t: Tensor) -> Tensor:
        if self.many:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean(self, t: Tensor) -> Tensor:
        if self.many:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)
        return t

    def agree(self, flag: bool) -> bool:
        """True as soon as one rank says so; every rank gets the same answer."""
        if not self.many:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def from_lead(self, value: float) -> float:
        """Rank 0's number, so that clocks that differ by a hair do not pull the ranks apart."""
        if not self.many:
            return value
        t = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(t, src=0)
        return float(t.item())

    def leave(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


class Log:
    def __init__(self, path: str | None):
        self.path = path

    def __call__(self, text: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(text, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(text, file=f)


def log_environment(log: Log, args: Settings, team: Team) -> None:
    log(CODE, console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version.split()[0]} on {platform.platform()}", console=False)
    log(f"Running PyTorch {torch.__version__} CUDA {torch.version.cuda}", console=False)
    log(f"gpu:{torch.cuda.get_device_name(team.device)} world_size:{team.world}")
    log(f"code_sha256:{hashlib.sha256(CODE.encode('utf-8')).hexdigest()} code_bytes:{len(CODE.encode('utf-8'))}")
    log("settings:" + json.dumps({f.name: getattr(args, f.name) for f in fields(args)}, sort_keys=True))


# -----------------------------------------------------------------------------
# shards
# -----------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(path: str | Path) -> Tensor:
    """One .bin file: 256 little-endian int32 of header, then uint16 tokens."""
    path = Path(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS:
        raise ValueError(f"{path}: header is cut off")
    if int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard (magic {header[0]}, version {header[1]})")
    count = int(header[2])
    want = HEADER_INTS * 4 + count * 2
    if path.stat().st_size != want:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, header says {want}")
    body = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if body.size != count:
        raise ValueError(f"{path}: {body.size} tokens, header says {count}")
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def shard_paths(pattern: str) -> list[str]:
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no shards match {pattern}")
    return paths


def load_validation(pattern: str) -> Tensor:
    """The whole validation stream, all shards in order. Position i predicts token i + 1."""
    stream = torch.cat([read_shard(p) for p in shard_paths(pattern)]).contiguous()
    if stream.numel() < 2:
        raise ValueError("validation stream is empty")
    return stream


class ShardStream:
    """Endless walk over the training shards."""

    def __init__(self, pattern: str, start: int = 0):
        self.paths = shard_paths(pattern)
        self.index = start % len(self.paths)
        self.tokens = read_shard(self.paths[self.index])
        self.at = 0

    def _next_shard(self) -> None:
        self.index = (self.index + 1) % len(self.paths)
        self.tokens = read_shard(self.paths[self.index])
        self.at = 0

    def take(self, n: int) -> Tensor:
        parts = []
        need = n
        while need > 0:
            room = self.tokens.numel() - self.at
            if room <= 0:
                self._next_shard()
                continue
            k = min(room, need)
            parts.append(self.tokens[self.at : self.at + k])
            self.at += k
            need -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Every rank reads the same stream and keeps its own slice of each global batch."""

    def __init__(self, pattern: str, team: Team, start: int = 0):
        self.stream = ShardStream(pattern, start)
        self.team = team

    def batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.team.world * accum)
        span = local + 1
        block = self.stream.take(span * self.team.world)
        mine = block[self.team.rank * span : (self.team.rank + 1) * span].to(torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        dev = self.team.device
        return x.to(dev, non_blocking=True), y.to(dev, non_blocking=True)


# -----------------------------------------------------------------------------
# bytes of tokens
# -----------------------------------------------------------------------------


class ByteTable:
    """How many bytes of the original text a token stands for.

    A piece's leading mark is one space, except right after a boundary token (control, unknown, unused), where
    SentencePiece puts a dummy mark that is not in the text.
    """

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        size = max(int(sp.vocab_size()), vocab_size)
        own = np.zeros(size, dtype=np.int16)
        spaced = np.zeros(size, dtype=np.bool_)
        boundary = np.ones(size, dtype=np.bool_)
        for i in range(int(sp.vocab_size())):
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
        self.own = torch.tensor(own, dtype=torch.int16, device=device)
        self.spaced = torch.tensor(spaced, dtype=torch.bool, device=device)
        self.boundary = torch.tensor(boundary, dtype=torch.bool, device=device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.own[target].to(torch.int32)
        n = n + (self.spaced[target] & ~self.boundary[prev]).to(torch.int32)
        return n


class Tally:
    """Sums of losses, tokens and bytes, in float64."""

    def __init__(self, table: ByteTable, device: torch.device):
        self.table = table
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, nll: Tensor, prev: Tensor, target: Tensor) -> None:
        self.nats += nll.to(torch.float64).sum()
        self.tokens += float(target.numel())
        self.bytes += self.table.count(prev, target).to(torch.float64).sum()

    def finish(self, team: Team) -> "Score":
        packed = team.total(torch.stack([self.nats, self.tokens, self.bytes]))
        nats, tokens, count = (float(v) for v in packed.tolist())
        return Score(nats, int(round(tokens)), int(round(count)))

    def so_far(self) -> float:
        return (self.nats / math.log(2.0) / self.bytes.clamp_min(1.0)).item()


@dataclass(frozen=True)
class Score:
    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2.0) / self.bytes


# -----------------------------------------------------------------------------
# Muon
# -----------------------------------------------------------------------------


@torch.compile
def orthogonalise(g: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz quintic, bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + eps)
    tall = g.size(0) > g.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        m = x @ x.T
        n = b * m + c * m @ m
        x = a * x + n @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices are dealt to the ranks round-robin and the updates summed."""

    def __init__(self, params, lr: float, momentum: float, ns_steps: int, weight_decay: float, team: Team):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay))
        self.team = team

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.team.world == self.team.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = orthogonalise(g, group["ns_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            self.team.total(flat)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()
        return None


# -----------------------------------------------------------------------------
# model
# -----------------------------------------------------------------------------


class CastedLinear(nn.Linear):
    """fp32 weights, used in the activations' dtype. `fake_bits` switches straight-through rounding on late in training."""

    fake_bits: int = 0

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if CastedLinear.fake_bits and self.training and w.ndim == 2:
            top = 2 ** (CastedLinear.fake_bits - 1) - 1
            with torch.no_grad():
                scale = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / top
                rounded = (w / scale).round().clamp(-top, top) * scale
            w = w + (rounded - w).detach()
        return F.linear(x, w.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float, max_len: int):
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), inv)
        self.register_buffer("cos", angle.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", angle.sin()[None, :, None, :], persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        t = x.size(1)
        cos = self.cos[:, :t].to(x.dtype)
        sin = self.sin[:, :t].to(x.dtype)
        turn, keep = x[..., : self.dims], x[..., self.dims :]
        a, b = turn.chunk(2, dim=-1)
        turned = torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
        return torch.cat([turned, keep], dim=-1)


class Attention(nn.Module):
    def __init__(self, args: Settings, xsa: bool):
        super().__init__()
        self.heads = args.num_heads
        self.kv_heads = args.num_kv_heads
        self.head_dim = args.model_dim // args.num_heads
        self.xsa = xsa
        kv = self.kv_heads * self.head_dim
        self.c_q = CastedLinear(args.model_dim, args.model_dim, bias=False)
        self.c_k = CastedLinear(args.model_dim, kv, bias=False)
        self.c_v = CastedLinear(args.model_dim, kv, bias=False)
        self.proj = CastedLinear(args.model_dim, args.model_dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((self.heads,), args.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(args.rope_dims, args.rope_base, max(args.train_seq_len, args.eval_seq_len))

    def without_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: take the component along the position's own value out of what attention returned."""
        b, t, h, d = y.shape
        own = F.normalize(v, dim=-1).unsqueeze(3)
        grouped = y.reshape(b, t, self.kv_heads, h // self.kv_heads, d)
        grouped = grouped - (grouped * own).sum(dim=-1, keepdim=True) * own
        return grouped.reshape(b, t, h, d)

    def forward(self, x: Tensor, ve: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        q = self.c_q(x).reshape(b, t, self.heads, self.head_dim)
        k = self.c_k(x).reshape(b, t, self.kv_heads, self.head_dim)
        v = self.c_v(x)
        if ve is not None:
            v = v + ve
        v = v.reshape(b, t, self.kv_heads, self.head_dim)
        q = self.rotary(rms(q)) * self.q_gain.to(x.dtype)[None, None, :, None]
        k = self.rotary(rms(k))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        ).transpose(1, 2)
        if self.xsa:
            y = self.without_self(y, v)
        return self.proj(y.reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        hidden = int(dim * mult)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, args: Settings, index: int):
        super().__init__()
        self.attn = Attention(args, xsa=index >= args.num_layers - args.xsa_last_n)
        self.mlp = MLP(args.model_dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(args.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(args.model_dim))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(args.model_dim), torch.zeros(args.model_dim)]))
        self.depth_scale = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.depth_scale, ve)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.depth_scale)
        return x


class SmearGate(nn.Module):
    """Adds a gated share of the previous token's embedding; not at a document's first token."""

    WIDTH = 12

    def __init__(self, bos_id: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(self.WIDTH))
        self.strength = nn.Parameter(torch.zeros(()))
        self.bos_id = bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid((x[:, 1:, : self.WIDTH] * self.gate.to(x.dtype)).sum(-1, keepdim=True))
        g = g * self.strength.to(x.dtype)
        g = g * (ids[:, 1:] != self.bos_id).unsqueeze(-1).to(x.dtype)
        return torch.cat([x[:, :1], x[:, 1:] + g * x[:, :-1]], dim=1)


class BigramEmbedding(nn.Module):
    """A hashed embedding of (previous token, token), another input feature of the transformer."""

    def __init__(self, buckets: int, dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.embed = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(dim, model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def slots(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0), value=self.bos_id)
        prev = torch.where(ids == self.bos_id, torch.full_like(prev, self.bos_id), prev)
        return torch.bitwise_xor(36313 * ids, 27191 * prev) % self.buckets

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(self.slots(ids)).to(dtype)) * self.scale.to(dtype)


class ValueEmbedding(nn.Module):
    """One table of token values, shared by a few late layers, each with its own scale."""

    def __init__(self, args: Settings):
        super().__init__()
        kv = args.num_kv_heads * (args.model_dim // args.num_heads)
        self.embed = nn.Embedding(args.vocab_size, args.ve_dim)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.proj = CastedLinear(args.ve_dim, kv, bias=False)
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(0.1)) for _ in args.ve_layer_ids])

    def base(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(ids).to(dtype))


class GPT(nn.Module):
    def __init__(self, args: Settings):
        super().__init__()
        self.args = args
        self.softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramEmbedding(args.bigram_buckets, args.bigram_dim, args.model_dim, args.bos_id)
        self.smear = SmearGate(args.bos_id) if args.smear else None
        self.value = ValueEmbedding(args) if args.ve_layer_ids else None
        self.ve_at = {layer: n for n, layer in enumerate(args.ve_layer_ids)}
        self.n_enc = args.num_layers // 2
        self.n_dec = args.num_layers - self.n_enc
        self.skip_weights = nn.Parameter(torch.ones(min(self.n_enc, self.n_dec), args.model_dim))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.reset()

    def reset(self) -> None:
        nn.init.normal_(self.tok_emb.weight, std=self.args.tied_embed_init_std)
        for name, mod in self.named_modules():
            if isinstance(mod, CastedLinear):
                if name.endswith("proj") and name.startswith("blocks."):
                    nn.init.zeros_(mod.weight)
                elif min(mod.weight.shape) >= 64:
                    nn.init.orthogonal_(mod.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids).to(torch.bfloat16)
        x = x + self.bigram(ids, x.dtype)
        x = rms(x)
        if self.smear is not None:
            x = self.smear(x, ids)
        x0 = x
        values = self.value.base(ids, x.dtype) if self.value is not None else None
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.n_enc and skips:
                x = x + self.skip_weights[i - self.n_enc].to(x.dtype) * skips.pop()
            ve = None
            if values is not None and i in self.ve_at:
                ve = values * self.value.scales[self.ve_at[i]].to(x.dtype)
            x = block(x, x0, ve)
            if i < self.n_enc:
                skips.append(x)
        return rms(x)

    def head(self, h: Tensor) -> Tensor:
        raw = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward_logits(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="mean")


# -----------------------------------------------------------------------------
# optimisers and schedule
# -----------------------------------------------------------------------------


class Optimisers:
    """Muon for the blocks' matrices, AdamW for embeddings and for everything small."""

    def __init__(self, model: GPT, args: Settings, team: Team):
        matrices: list[nn.Parameter] = []
        scalars: list[nn.Parameter] = []
        tables: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            if name.endswith("tok_emb.weight") or name.endswith("embed.weight"):
                tables.append(p)
            elif p.ndim == 2 and name.endswith(".weight"):
                matrices.append(p)
            else:
                scalars.append(p)
        self.muon = Muon(matrices, args.matrix_lr, args.muon_momentum_start, args.muon_ns_steps, args.muon_wd, team)
        adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
        self.tables = torch.optim.AdamW(tables, lr=args.embed_lr, weight_decay=args.adam_wd, **adam)
        self.scalars = torch.optim.AdamW(scalars, lr=args.scalar_lr, weight_decay=0.0, **adam)
        self.all = [self.muon, self.tables, self.scalars]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]
        self.args = args

    def zero(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def step(self, n: int, scale: float) -> None:
        ramp = min(n / max(self.args.muon_momentum_ramp, 1), 1.0)
        momentum = (1.0 - ramp) * self.args.muon_momentum_start + ramp * self.args.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
            opt.step()


def lr_scale(args: Settings, step: int, elapsed_s: float, limit_s: float) -> float:
    """Flat, then linear to zero; the end is foreseen from the pace so far."""
    if args.warmdown_iters <= 0:
        return 1.0
    pace = elapsed_s / max(step, 1)
    down = args.warmdown_iters * pace
    left = max(limit_s - elapsed_s, 0.0)
    by_time = left / max(down, 1e-9) if left <= down else 1.0
    by_step = max(args.iterations - step, 0) / args.warmdown_iters
    return min(by_time, by_step, 1.0)


def reduce_grads(params: list[nn.Parameter], team: Team) -> None:
    if not team.many:
        return
    with_grad = [p for p in params if p.grad is not None]
    flat = torch.cat([p.grad.reshape(-1) for p in with_grad])
    team.mean(flat)
    at = 0
    for p in with_grad:
        p.grad.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()


class Averages:
    """EMA over all steps and SWA over the end of the warm-down; both in fp32 on the GPU."""

    def __init__(self, model: nn.Module, args: Settings):
        self.args = args
        self.ema = {n: p.detach().float().clone() for n, p in model.state_dict().items()}
        self.swa = {n: torch.zeros_like(p) for n, p in self.ema.items()}
        self.swa_count = 0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, scale: float) -> None:
        state = model.state_dict()
        names = list(self.ema)
        torch._foreach_lerp_([self.ema[n] for n in names], [state[n].float() for n in names], 1 - self.args.ema_decay)
        if scale < self.args.swa_from_scale and step % self.args.swa_every == 0:
            torch._foreach_add_([self.swa[n] for n in names], [state[n].float() for n in names])
            self.swa_count += 1

    def swa_state(self) -> dict[str, Tensor]:
        return {n: t / max(self.swa_count, 1) for n, t in self.swa.items()}

    def chosen(self, model: nn.Module, log: Log) -> dict[str, Tensor]:
        if self.args.average == "swa" and self.swa_count > 0:
            log(f"average:swa of {self.swa_count}")
            return self.swa_state()
        if self.args.average == "ema":
            log(f"average:ema decay {self.args.ema_decay}")
            return self.ema
        log("average:none, last weights")
        return {n: p.detach().float().clone() for n, p in model.state_dict().items()}


# -----------------------------------------------------------------------------
# plain validation (no adaptation), for the training log and the check of the round trip
# -----------------------------------------------------------------------------


@torch.no_grad()
def validate(args: Settings, model: GPT, logits_fn, val: Tensor, table: ByteTable, team: Team) -> Score:
    """Non-overlapping sequences; the short rest at the end is scored too, by the last rank."""
    model.eval()
    seq = args.train_seq_len
    total = val.numel() - 1
    full = total // seq
    rows = max(args.val_batch_tokens // seq // team.world, 1)
    tally = Tally(table, team.device)
    first = full * team.rank // team.world
    last = full * (team.rank + 1) // team.world
    spans = [(a * seq, min(a + rows, last) * seq) for a in range(first, last, rows)]
    for lo, hi in spans:
        block = val[lo : hi + 1].to(team.device, dtype=torch.int64)
        x, y = block[:-1].reshape(-1, seq), block[1:].reshape(-1, seq)
        logits = logits_fn(x).float()
        nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none")
        tally.add(nll, x.reshape(-1), y.reshape(-1))
    if team.rank == team.world - 1 and full * seq < total:
        block = val[full * seq : total + 1].to(team.device, dtype=torch.int64)
        logits = model.forward_logits(block[None, :-1]).float()
        nll = F.cross_entropy(logits[0], block[1:], reduction="none")
        tally.add(nll, block[:-1], block[1:])
    model.train()
    return tally.finish(team)


# -----------------------------------------------------------------------------
# training
# -----------------------------------------------------------------------------


@dataclass
class Trained:
    state: dict[str, Tensor]
    second_moments: dict[str, Tensor]
    steps: int
    train_s: float


class Stopwatch:
    """Counts training time; stands still during validation."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.since: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def stop(self) -> None:
        torch.cuda.synchronize()
        if self.since is not None:
            self.sum += time.perf_counter() - self.since
        self.since = None

    @property
    def seconds(self) -> float:
        running = time.perf_counter() - self.since if self.since is not None else 0.0
        return self.sum + running


def compile_warmup(args: Settings, model: GPT, compiled, opts: Optimisers, team: Team, accum: int) -> None:
    """A few steps on random tokens to have every kernel compiled; weights and optimiser states are put back."""
    if args.warmup_steps <= 0:
        return
    weights = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}
    states = [copy.deepcopy(o.state_dict()) for o in opts.all]
    rows = args.train_batch_tokens // (team.world * accum) // args.train_seq_len
    gen = torch.Generator(device=team.device).manual_seed(args.seed + team.rank)
    for _ in range(args.warmup_steps):
        opts.zero()
        shape = (rows, args.train_seq_len + 1)
        fake = torch.randint(0, args.vocab_size, shape, generator=gen, device=team.device)
        compiled(fake[:, :-1].contiguous(), fake[:, 1:].contiguous()).backward()
        reduce_grads(list(model.parameters()), team)
        opts.step(0, 1.0)
    opts.zero()
    model.load_state_dict(weights, strict=True)
    for o, s in zip(opts.all, states, strict=True):
        o.load_state_dict(s)


@torch.no_grad()
def input_moments(args: Settings, model: GPT, batches) -> dict[str, Tensor]:
    """Mean square of each linear layer's inputs: the weights of the clip search below."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    hooks = []

    def watch(name: str):
        def hook(_mod, inputs, _out):
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            sums[name] = sums.get(name, 0) + x.square().sum(dim=0)
            rows[name] = rows.get(name, 0) + x.size(0)

        return hook

    for name, mod in model.named_modules():
        if isinstance(mod, CastedLinear):
            hooks.append(mod.register_forward_hook(watch(name + ".weight")))
    model.eval()
    for x in batches:
        model.forward_logits(x)
    for h in hooks:
        h.remove()
    model.train()
    return {n: s / rows[n] for n, s in sums.items()}


def calibration_batches(args: Settings, loader: TrainLoader):
    """Fresh training batches, one after the other."""
    tokens = args.calib_batch_seqs * args.train_seq_len * loader.team.world
    for _ in range(args.calib_batches):
        x, _ = loader.batch(tokens, args.train_seq_len, 1)
        yield x


def train(args: Settings, team: Team, log: Log, val: Tensor, table: ByteTable) -> Trained:
    accum = 8 // team.world
    model = GPT(args).to(team.device)
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    logits_fn = torch.compile(model.forward_logits, dynamic=False)
    opts = Optimisers(model, args, team)
    params = list(model.parameters())
    log(f"model_params:{sum(p.numel() for p in params)} grad_accum_steps:{accum}")
    log(f"xsa:last {args.xsa_last_n} value_embeddings:{args.ve_layer_ids} smear:{args.smear}")

    compile_warmup(args, model, compiled, opts, team, accum)
    loader = TrainLoader(args.train_files, team)
    averages = Averages(model, args)
    limit = args.max_wallclock_s - args.calib_reserve_s
    watch = Stopwatch()
    team.wait()
    watch.start()
    step = 0
    stop_at: int | None = None
    while True:
        last = step == args.iterations or (stop_at is not None and step >= stop_at)
        if last or (args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0):
            watch.stop()
            s = validate(args, model, logits_fn, val, table, team)
            log(
                f"step:{step}/{args.iterations} val_loss:{s.loss:.4f} val_bpb:{s.bpb:.4f} "
                f"train_time:{1000 * watch.seconds:.0f}ms step_avg:{1000 * watch.seconds / max(step, 1):.2f}ms"
            )
            watch.start()
        if last:
            break

        scale = team.from_lead(lr_scale(args, step, watch.seconds, limit))
        if args.qat_below_scale > 0 and scale < args.qat_below_scale and not CastedLinear.fake_bits:
            CastedLinear.fake_bits = 6
            log(f"qat:on at step {step} scale {scale:.4f}")
            torch._dynamo.reset()
            compiled = torch.compile(model, dynamic=False, fullgraph=True)
            logits_fn = torch.compile(model.forward_logits, dynamic=False)
        opts.zero()
        loss_sum = torch.zeros((), device=team.device)
        for _ in range(accum):
            x, y = loader.batch(args.train_batch_tokens, args.train_seq_len, accum)
            loss = compiled(x, y)
            loss_sum += loss.detach()
            (loss / accum).backward()
        reduce_grads(params, team)
        if args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(params, args.grad_clip)
        opts.step(step, scale)
        step += 1
        averages.update(model, step, scale)

        if step <= 5 or step % args.train_log_every == 0:
            log(
                f"step:{step}/{args.iterations} train_loss:{(loss_sum / accum).item():.4f} "
                f"train_time:{1000 * watch.seconds:.0f}ms"
            )
        if stop_at is None and step % 5 == 0:
            torch.cuda.synchronize()
            if team.agree(watch.seconds >= limit):
                stop_at = step

    log(f"training stopped at step {step}, train_time:{1000 * watch.seconds:.0f}ms")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    CastedLinear.fake_bits = 0
    state = averages.chosen(model, log)
    model.load_state_dict(state, strict=True)

    # the clock is still running: calibration is part of the 600 s
    moments = input_moments(args, model, calibration_batches(args, loader))
    for name in sorted(moments):
        team.mean(moments[name])
    watch.stop()
    log(f"calibration on training batches done, train+calibration {watch.seconds:.2f}s of {args.max_wallclock_s:.0f}s")
    return Trained({n: t.detach().cpu() for n, t in state.items()}, moments, step, watch.seconds)


# -----------------------------------------------------------------------------
# int6, GPTQ-lite: per-row scales, the clip of each row searched under the inputs' second moments
# -----------------------------------------------------------------------------

CLIP_QUANTILES = (1.0, 0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99)
INT6_TOP = 31
INT8_TOP = 127


def quantise_rows(w: Tensor, top: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Integers and per-row fp16 scales of a matrix; of several clips each row keeps the one with the least error."""
    w = w.float()
    size = w.abs()
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best_q = torch.zeros_like(w, dtype=torch.int8)
    best_s = torch.zeros(w.size(0), dtype=torch.float16, device=w.device)
    for quantile in CLIP_QUANTILES:
        clip = size.amax(dim=1) if quantile >= 1.0 else torch.quantile(size, quantile, dim=1)
        scale = (clip / top).clamp_min(1e-7).to(torch.float16).float().clamp_min(6e-8)
        q = torch.clamp(torch.round(w / scale[:, None]), -top, top)
        gap = (q * scale[:, None] - w).square()
        if weight is not None:
            gap = gap * weight[None, :].to(gap.device)
        err = gap.sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_q[better] = q[better].to(torch.int8)
        best_s[better] = scale[better].to(torch.float16)
    return best_q, best_s


def kind_of(name: str, t: Tensor) -> str:
    if t.ndim != 2 or t.numel() < 8192:
        return "plain"
    if name == "tok_emb.weight" or name.endswith("embed.weight"):
        return "int8"
    return "int6"


def quantise_state(state: dict[str, Tensor], moments: dict[str, Tensor], device: torch.device) -> dict[str, object]:
    """The artifact's content: integers, scales, and the small tensors in fp16/fp32."""
    ints: "OrderedDict[str, Tensor]" = OrderedDict()
    scales: "OrderedDict[str, Tensor]" = OrderedDict()
    plain: "OrderedDict[str, Tensor]" = OrderedDict()
    for name, t in state.items():
        kind = kind_of(name, t)
        if kind == "plain":
            plain[name] = t.to(torch.float16) if t.ndim == 2 else t.float()
            continue
        top = INT6_TOP if kind == "int6" else INT8_TOP
        weight = moments.get(name)
        q, s = quantise_rows(t.to(device), top, weight.to(device) if weight is not None else None)
        ints[name] = q.cpu().contiguous()
        scales[name] = s.cpu().contiguous()
    return {"ints": ints, "scales": scales, "plain": plain}


def dequantise_state(packed: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in packed["ints"].items():
        out[name] = q.float() * packed["scales"][name].float()[:, None]
    for name, t in packed["plain"].items():
        out[name] = t.float()
    return out


def write_artifact(path: str, packed: dict[str, object], level: int) -> int:
    """zstd of a torch file. Returns the bytes on disk."""
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    raw = buffer.getvalue()
    blob = zstandard.ZstdCompressor(level=level).compress(raw)
    with open(path, "wb") as f:
        f.write(blob)
    return os.path.getsize(path)


def read_artifact(path: str) -> dict[str, object]:
    with open(path, "rb") as f:
        raw = zstandard.ZstdDecompressor().decompress(f.read(), max_output_size=1 << 30)
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def submission_size(artifact: str, log: Log) -> int:
    """Code and artifact, in decimal bytes."""
    code = len(CODE.encode("utf-8"))
    model = os.path.getsize(artifact)
    total = code + model
    log(f"Serialized model int6+zstd: {model} bytes")
    log(f"Code size: {code} bytes")
    log(f"Total submission size: {total} bytes (limit {SIZE_LIMIT})")
    if total > SIZE_LIMIT:
        raise RuntimeError(f"submission is {total - SIZE_LIMIT} bytes too large")
    return total


# -----------------------------------------------------------------------------
# backoff n-gram over exact contexts
# -----------------------------------------------------------------------------

BITS = 10
LOW = (1 << BITS) - 1


class PairCounts:
    """Counts of (context, follower), packed as context << 10 | follower, in sorted order on the GPU.

    Two levels: a large one and a fresh one which is folded into the large one now and then, so that adding a chunk does not
    sort everything again.
    """

    def __init__(self, device: torch.device, fold_at: int):
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self.counts = torch.empty(0, dtype=torch.int32, device=device)
        self.new_keys = torch.empty(0, dtype=torch.int64, device=device)
        self.new_counts = torch.empty(0, dtype=torch.int32, device=device)
        self.fold_at = fold_at

    @staticmethod
    def merged(ka: Tensor, ca: Tensor, kb: Tensor, cb: Tensor) -> tuple[Tensor, Tensor]:
        keys, where = torch.unique(torch.cat([ka, kb]), sorted=True, return_inverse=True)
        counts = torch.zeros(keys.numel(), dtype=torch.int32, device=keys.device)
        counts.index_add_(0, where, torch.cat([ca, cb]))
        return keys, counts

    def add(self, keys: Tensor) -> None:
        if keys.numel() == 0:
            return
        once, n = torch.unique(keys, sorted=True, return_counts=True)
        self.new_keys, self.new_counts = self.merged(self.new_keys, self.new_counts, once, n.to(torch.int32))
        if self.new_keys.numel() >= self.fold_at:
            self.keys, self.counts = self.merged(self.keys, self.counts, self.new_keys, self.new_counts)
            self.new_keys = self.new_keys[:0]
            self.new_counts = self.new_counts[:0]

    @staticmethod
    def _into(rows: Tensor, context: Tensor, keys: Tensor, counts: Tensor) -> None:
        if keys.numel() == 0:
            return
        lo = torch.searchsorted(keys, context << BITS)
        hi = torch.searchsorted(keys, (context + 1) << BITS)
        span = hi - lo
        many = int(span.sum())
        if many == 0:
            return
        row = torch.repeat_interleave(torch.arange(context.numel(), device=keys.device), span)
        begin = torch.cumsum(span, dim=0) - span
        at = lo[row] + torch.arange(many, device=keys.device) - begin[row]
        rows.index_put_((row, keys[at] & LOW), counts[at].to(rows.dtype), accumulate=True)

    def rows(self, context: Tensor, vocab: int) -> Tensor:
        """Dense counts [n, vocab] of all followers of each context; context -1 has none."""
        out = torch.zeros(context.numel(), vocab, dtype=torch.float32, device=context.device)
        self._into(out, context, self.keys, self.counts)
        self._into(out, context, self.new_keys, self.new_counts)
        return out

    def __len__(self) -> int:
        return self.keys.numel() + self.new_keys.numel()


class BackoffNgram:
    """Interpolated absolute discounting, orders 0 (unigram) to `order` tokens of context."""

    def __init__(self, args: Settings, device: torch.device):
        if (args.ng_order + 1) * BITS > 62 or args.vocab_size > 1 << BITS:
            raise ValueError("contexts do not fit into an int64")
        self.args = args
        self.vocab = args.vocab_size
        self.order = args.ng_order
        self.bos = args.bos_id
        self.unigram = torch.zeros(args.vocab_size, dtype=torch.float32, device=device)
        self.tables = [PairCounts(device, args.ng_fold_pairs) for _ in range(args.ng_order)]
        self.seen = 0

    def contexts(self, stream: Tensor, pos: Tensor, k: int) -> Tensor:
        """The last k tokens up to and including `pos`, packed; -1 where they would reach over a document's start."""
        key = torch.zeros_like(pos)
        inside = pos >= k - 1
        for j in range(k):
            tok = stream[(pos - j).clamp_min(0)]
            key = key | (tok << (BITS * j))
            if j < k - 1:
                inside = inside & (tok != self.bos)
        return torch.where(inside, key, torch.full_like(key, -1))

    @torch.no_grad()
    def learn(self, stream: Tensor, lo: int, hi: int) -> None:
        """Adds the targets of positions lo..hi-1 under all their contexts."""
        pos = torch.arange(lo, hi, device=stream.device)
        follower = stream[pos + 1]
        self.unigram += torch.bincount(follower, minlength=self.vocab).to(torch.float32)
        for k in range(1, self.order + 1):
            ctx = self.contexts(stream, pos, k)
            ok = ctx >= 0
            self.tables[k - 1].add((ctx[ok] << BITS) | follower[ok])
        self.seen += hi - lo

    @torch.no_grad()
    def distribution(self, stream: Tensor, pos: Tensor) -> Tensor:
        """[n, vocab] probabilities of what follows each position, from the counts learned so far."""
        a = self.args.ng_uni_alpha
        base = (self.unigram + a) / (self.unigram.sum() + a * self.vocab)
        p = base[None, :].expand(pos.numel(), self.vocab)
        d = self.args.ng_discount
        for k in range(1, self.order + 1):
            counts = self.tables[k - 1].rows(self.contexts(stream, pos, k), self.vocab)
            total = counts.sum(dim=-1, keepdim=True)
            kinds = (counts > 0).sum(dim=-1, keepdim=True).to(counts.dtype)
            safe = total.clamp_min(1.0)
            higher = (counts - d).clamp_min(0.0) / safe + d * kinds / safe * p
            p = torch.where(total > 0, higher, p)
        return p / p.sum(dim=-1, keepdim=True)

    def describe(self) -> str:
        sizes = ",".join(str(len(t)) for t in self.tables)
        return f"seen:{self.seen} pairs:{sizes}"


class Mixer:
    """Turns logits into the log probabilities that are scored."""

    def __init__(self, args: Settings, ngram: BackoffNgram | None, stream: Tensor):
        self.args = args
        self.ngram = ngram
        self.stream = stream
        self.worst_sum = 0.0
        self.calls = 0

    def weight(self, logp: Tensor) -> Tensor:
        """Share of the n-gram: the unsurer the transformer, the more. Entropy in nats."""
        entropy = -(logp.exp() * logp).sum(dim=-1, keepdim=True)
        return self.args.mix_max * torch.sigmoid(self.args.mix_slope * (entropy - self.args.mix_mid))

    def log_probs(self, logits: Tensor, pos: Tensor) -> Tensor:
        logp = F.log_softmax(logits.float(), dim=-1)
        if self.ngram is None or self.ngram.seen < self.args.ng_min_tokens:
            return logp
        lam = self.weight(logp)
        q = self.ngram.distribution(self.stream, pos)
        mixed = (1.0 - lam) * logp.exp() + lam * q
        if self.calls % 512 == 0:
            gap = (mixed.sum(dim=-1) - 1.0).abs().max().item()
            self.worst_sum = max(self.worst_sum, gap)
        self.calls += 1
        return mixed.clamp_min(1e-30).log()


# -----------------------------------------------------------------------------
# chunks: score, learn, adapt
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Positions lo..hi-1 of the stream; position i is scored on token i + 1."""

    index: int
    lo: int
    hi: int


def cut_into_chunks(total: int, size: int) -> list[Chunk]:
    return [Chunk(n, lo, min(lo + size, total)) for n, lo in enumerate(range(0, total, size))]


def blocks_of(chunk: Chunk, stride: int) -> list[tuple[int, int]]:
    """The chunk in strides; each is scored once, at the end of its own window."""
    return [(b, min(b + stride, chunk.hi)) for b in range(chunk.lo, chunk.hi, stride)]


@dataclass
class WindowBatch:
    ids: Tensor  # [rows, seq], padded on the right
    row: Tensor  # [n] which row ...
    col: Tensor  # [n] ... and column gives the logits of
    pos: Tensor  # [n] this position of the stream


def window_batch(stream: Tensor, group: list[tuple[int, int]], seq: int, rows: int) -> WindowBatch:
    """One window per block, ending where the block ends."""
    ids = torch.zeros(rows, seq, dtype=torch.int64, device=stream.device)
    row, col, pos = [], [], []
    for r, (b, e) in enumerate(group):
        start = max(0, e - seq)
        ids[r, : e - start] = stream[start:e]
        n = e - b
        row.append(torch.full((n,), r, device=stream.device))
        col.append(torch.arange(b - start, e - start, device=stream.device))
        pos.append(torch.arange(b, e, device=stream.device))
    return WindowBatch(ids, torch.cat(row), torch.cat(col), torch.cat(pos))


class Evaluator:
    """One walk over the stream."""

    def __init__(self, args: Settings, model: GPT, val: Tensor, table: ByteTable, team: Team, log: Log):
        self.args = args
        self.model = model
        self.team = team
        self.log = log
        self.stream = val.to(team.device, dtype=torch.int64)
        self.total = self.stream.numel() - 1
        self.table = table
        self.tally = Tally(table, team.device)
        self.logits_fn = torch.compile(model.forward_logits, dynamic=False)
        self.loss_fn = torch.compile(model, dynamic=False)
        self.ngram = BackoffNgram(args, team.device) if args.ngram else None
        self.mixer = Mixer(args, self.ngram, self.stream)
        self.chunks = cut_into_chunks(self.total, args.chunk_tokens)
        self.trainable = self._trainable()
        self.opt = torch.optim.AdamW(
            self.trainable,
            lr=args.ttt_lr,
            betas=(args.ttt_beta1, args.ttt_beta2),
            weight_decay=args.ttt_wd,
        )
        self.adapt_steps = 0

    def _trainable(self) -> list[nn.Parameter]:
        """Everything but the embeddings and the first blocks."""
        frozen = tuple(f"blocks.{i}." for i in range(self.args.ttt_freeze_blocks))
        out = []
        for name, p in self.model.named_parameters():
            train = not name.startswith(frozen) and not name.endswith(("tok_emb.weight", "embed.weight"))
            p.requires_grad_(train)
            if train:
                out.append(p)
        return out

    # ---- 1

    @torch.no_grad()
    def score(self, chunk: Chunk) -> None:
        self.model.eval()
        blocks = blocks_of(chunk, self.args.eval_stride)
        mine = blocks[self.team.rank :: self.team.world]
        size = self.args.eval_batch_windows
        for i in range(0, len(mine), size):
            batch = window_batch(self.stream, mine[i : i + size], self.args.eval_seq_len, size)
            logits = self.logits_fn(batch.ids)[batch.row, batch.col]
            logp = self.mixer.log_probs(logits, batch.pos)
            target = self.stream[batch.pos + 1]
            prev = self.stream[batch.pos]
            nll = -logp.gather(1, target[:, None]).squeeze(1)
            self.tally.add(nll, prev, target)

    # ---- 2

    def learn(self, chunk: Chunk) -> None:
        if self.ngram is not None:
            self.ngram.learn(self.stream, chunk.lo, chunk.hi)

    # ---- 3

    def ttt_lr(self, chunk: Chunk) -> float:
        ramp = min((chunk.index + 1) / max(self.args.ttt_ramp_chunks, 1), 1.0)
        part = chunk.index / max(len(self.chunks) - 1, 1)
        return self.args.ttt_lr * ramp * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * part)))

    def chunk_sequences(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The chunk's own inputs and targets, whole sequences only, this rank's share."""
        seq = self.args.eval_seq_len
        n = (chunk.hi - chunk.lo) // seq
        own = range(self.team.rank, n, self.team.world)
        x = [self.stream[chunk.lo + i * seq : chunk.lo + (i + 1) * seq] for i in own]
        y = [self.stream[chunk.lo + i * seq + 1 : chunk.lo + (i + 1) * seq + 1] for i in own]
        if not x:
            empty = torch.zeros(0, seq, dtype=torch.int64, device=self.stream.device)
            return empty, empty
        return torch.stack(x), torch.stack(y)

    def adapt(self, chunk: Chunk) -> None:
        x, y = self.chunk_sequences(chunk)
        self.model.train()
        for group in self.opt.param_groups:
            group["lr"] = self.ttt_lr(chunk)
        for _ in range(self.args.ttt_epochs):
            self.opt.zero_grad(set_to_none=True)
            if x.size(0) > 0:
                self.loss_fn(x, y).backward()
            for p in self.trainable:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            reduce_grads(self.trainable, self.team)
            torch.nn.utils.clip_grad_norm_(self.trainable, self.args.ttt_grad_clip)
            self.opt.step()
            self.adapt_steps += 1

    # ---- all

    def run(self, started: float) -> Score:
        adapting = self.args.ttt
        for chunk in self.chunks:
            self.score(chunk)
            self.learn(chunk)
            if adapting and chunk.index + 1 < len(self.chunks):
                self.adapt(chunk)
            if chunk.index % 50 == 0 or chunk.index + 1 == len(self.chunks):
                spent = time.perf_counter() - started
                self.log(
                    f"chunk {chunk.index + 1}/{len(self.chunks)} rank0_bpb:{self.tally.so_far():.5f} "
                    f"steps:{self.adapt_steps} t:{spent:.1f}s"
                )
                if adapting and self.team.agree(self.behind(chunk, spent)):
                    adapting = False
                    self.log(f"no more adaptation after chunk {chunk.index + 1}: {spent:.1f}s spent")
        score = self.tally.finish(self.team)
        if score.tokens != self.total:
            raise RuntimeError(f"{score.tokens} tokens scored, {self.total} expected")
        return score

    def behind(self, chunk: Chunk, spent: float) -> bool:
        """Would the rest without adaptation (a bit over half the pace) not fit into the budget any more?"""
        rest = len(self.chunks) - chunk.index - 1
        pace = spent / (chunk.index + 1)
        return chunk.index >= 50 and spent + rest * pace * 0.6 > self.args.eval_budget_s


# -----------------------------------------------------------------------------
# checks that cost little
# -----------------------------------------------------------------------------


def check_ngram(args: Settings, device: torch.device, log: Log) -> None:
    """Random text: rows are distributions, documents do not mix, counts come back."""
    gen = torch.Generator(device=device).manual_seed(5)
    text = torch.randint(2, 40, (4096,), generator=gen, device=device)
    text[::257] = args.bos_id
    model = BackoffNgram(args, device)
    model.learn(text, 0, 2048)
    pos = torch.arange(2048, 2560, device=device)
    p = model.distribution(text, pos)
    gap = (p.double().sum(dim=-1) - 1.0).abs().max().item()
    if gap > 1e-4 or p.min().item() < 0.0:
        raise RuntimeError(f"n-gram rows do not sum to one: {gap}")
    pairs = model.tables[0].rows(torch.arange(args.vocab_size, device=device), args.vocab_size)
    if int(pairs.sum().item()) != 2048:
        raise RuntimeError("pair counts are lost")
    at_bos = (text == args.bos_id).nonzero().squeeze(1)
    if (model.contexts(text, at_bos[1:], 2) >= 0).any().item():
        raise RuntimeError("contexts reach over a document's start")
    log(f"ngram check: rows sum to one within {gap:.2e}")


def check_blocks(args: Settings) -> None:
    """Chunks and blocks tile the positions."""
    total = 3 * args.chunk_tokens + 1234
    at = 0
    for chunk in cut_into_chunks(total, args.chunk_tokens):
        for b, e in blocks_of(chunk, args.eval_stride):
            if b != at or e <= b:
                raise RuntimeError(f"block {b}..{e} does not follow {at}")
            at = e
    if at != total:
        raise RuntimeError(f"blocks end at {at}, not at {total}")


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def reload(args: Settings, path: str, team: Team) -> GPT:
    """A fresh model out of the artifact alone."""
    model = GPT(args).to(team.device)
    model.load_state_dict(dequantise_state(read_artifact(path)), strict=True)
    return model


def write_result(args: Settings, score: Score, trained: Trained, size: int, eval_s: float) -> None:
    result = {
        "run_id": args.run_id,
        "seed": args.seed,
        "val_loss": score.loss,
        "val_bpb": score.bpb,
        "scored_tokens": score.tokens,
        "scored_bytes": score.bytes,
        "bytes_total": size,
        "train_steps": trained.steps,
        "train_s": round(trained.train_s, 2),
        "eval_s": round(eval_s, 2),
    }
    with open(os.path.join(args.out_dir, f"result_{args.run_id}.json"), "w", encoding="utf-8") as f:
        json.dump(result, f, indent=2)


# -----------------------------------------------------------------------------
# main
# -----------------------------------------------------------------------------


def main() -> None:
    args = Settings()
    team = Team.join()
    os.makedirs(os.path.join(args.out_dir, "logs"), exist_ok=True)
    log = Log(os.path.join(args.out_dir, "logs", f"{args.run_id}.txt") if team.lead else None)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    seed_all(args.seed)
    log_environment(log, args, team)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {args.vocab_size}")
    table = ByteTable(sp, args.vocab_size, team.device)
    val = load_validation(args.val_files)
    log(f"val_loader:shards pattern={args.val_files} tokens:{val.numel() - 1}")
    log(f"train_loader:shards {len(shard_paths(args.train_files))}")
    check_blocks(args)
    check_ngram(args, team.device, log)

    trained = train(args, team, log, val, table)

    artifact = os.path.join(args.out_dir, "final_model.int6.ptz")
    if team.lead:
        t0 = time.perf_counter()
        packed = quantise_state(trained.state, trained.second_moments, team.device)
        write_artifact(artifact, packed, args.zstd_level)
        log(f"quantised and packed in {time.perf_counter() - t0:.1f}s")
    team.wait()
    size = submission_size(artifact, log)
    torch._dynamo.reset()
    torch.cuda.empty_cache()

    # everything from here on is evaluation time
    team.wait()
    torch.cuda.synchronize()
    started = time.perf_counter()
    model = reload(args, artifact, team)
    plain = validate(args, model, model.forward_logits, val, table, team)
    log(f"final_int6_roundtrip val_loss:{plain.loss:.4f} val_bpb:{plain.bpb:.4f} t:{time.perf_counter() - started:.1f}s")

    evaluator = Evaluator(args, model, val, table, team, log)
    score = evaluator.run(started)
    torch.cuda.synchronize()
    eval_s = time.perf_counter() - started
    if evaluator.ngram is not None:
        log(f"ngram {evaluator.ngram.describe()} worst_sum_gap:{evaluator.mixer.worst_sum:.2e}")
    log(f"final_ttt_ngram val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} eval_time:{1000 * eval_s:.0f}ms")
    log(f"final_ttt_ngram_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    log(f"scored tokens:{score.tokens} bytes:{score.bytes} process_time:{time.perf_counter() - PROCESS_START:.0f}s")
    if team.lead:
        write_result(args, score, trained, size, eval_s)
    team.leave()


if __name__ == "__main__":
    main()
