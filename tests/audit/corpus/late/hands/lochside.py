"""
lochside: byte-level submission for Parameter Golf. No tokenizer: 256 byte values + BOS.

  ids -> hashed byte n-gram embeddings -> MinGRU local encoder -> one state per patch of 4 bytes
      -> causal transformer over patches -> MinGRU local decoder -> 257 logits per byte

The loss is nats per byte position already, so bpb = sum(nll) / ln 2 / (targets that are bytes). BOS targets cost nats and
count no byte. Evaluation mixes the network with count models of orders 1-5 in a gated linear pool; gate and counts learn
from a byte after it has been scored.

torchrun --standalone --nproc_per_node=8 train_gpt.py
Every setting below can be overridden by SECTION_KEY in the environment, e.g. TRAIN_MATRIX_LR=0.02 MIXER_ENABLED=0.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import io
import lzma
import math
import os
import random
import struct
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    from numba import njit

    HAVE_NUMBA = True
except ImportError:  # slow, for debugging on a laptop only
    HAVE_NUMBA = False

    def njit(*args, **kwargs):
        if args and callable(args[0]):
            return args[0]
        return lambda fn: fn


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------

BYTES = 256
BOS = 256
VOCAB = 257

SETTINGS = {
    "run": {"id": "", "seed": 1337, "out_dir": "."},
    "data": {
        "root": "./data/datasets/fineweb10B_bytes",
        "train": "bytes_train_*.bin",
        "val": "bytes_val_*.bin",
        # UTF-8 bytes of the first 50,000 documents; 0 switches the check off (own data, debugging)
        "val_bytes": 151_080_891,
    },
    "model": {
        "dim": 512,
        "patch": 4,
        "enc_layers": 1,
        "global_layers": 6,
        "dec_layers": 2,
        "heads": 8,
        "kv_heads": 4,
        "mlp_mult": 3,
        "local_mlp_mult": 2,
        "ngram_orders": "3,5",
        "ngram_buckets": 16_384,
        "ngram_dim": 64,
        "rope_base": 10_000.0,
        "softcap": 20.0,
    },
    "train": {
        "iterations": 20_000,
        "batch_bytes": 786_432,
        "seq_len": 4096,
        "max_wallclock_seconds": 598.0,
        "warmup_steps": 20,
        "warmdown_iters": 2400,
        "val_every": 4000,
        "log_every": 200,
        "matrix_lr": 0.025,
        "embed_lr": 0.03,
        "scalar_lr": 0.02,
        "weight_decay": 0.04,
        "muon_momentum": 0.97,
        "muon_momentum_start": 0.88,
        "muon_momentum_steps": 1000,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 0.3,
        "compile": 1,
    },
    "ema": {"enabled": 1, "decay": 0.997, "start_frac": 0.3},
    "qat": {"enabled": 1, "bits": 6, "start_scale": 0.35},
    "pack": {"bits": 6, "embed_bits": 8, "keep_float_numel": 16_384, "limit": 16_000_000, "preset": 9},
    "eval": {"stride": 2048, "batch": 16, "temperature": 1.0, "max_seconds": 600.0, "plain": 0},
    "mixer": {
        "enabled": 1,
        "hash_bits": 16,
        "delta": 0.02,
        "limit": 1023,
        "lr": 0.015,
        "init_nn": 4.0,
        # 0: one set of weights, 1: by match depth, 2: by match depth and class of the previous byte
        "gate_context": 2,
    },
}


class Node:
    """One section of the settings as attributes."""

    def __init__(self, values: dict):
        self.__dict__.update(values)

    def dump(self) -> str:
        return " ".join(f"{k}={v}" for k, v in sorted(self.__dict__.items()))


class Config(Node):
    def __init__(self, settings: dict):
        super().__init__({name: Node(values) for name, values in settings.items()})

    @classmethod
    def from_env(cls) -> "Config":
        settings = copy.deepcopy(SETTINGS)
        for section, values in settings.items():
            for key, default in values.items():
                raw = os.environ.get(f"{section}_{key}".upper())
                if raw is not None:
                    values[key] = type(default)(raw)
        if not settings["run"]["id"]:
            settings["run"]["id"] = os.environ.get("RUN_ID", str(uuid.uuid4())[:8])
        return cls(settings)


class Dist:
    """Rank, world and the two collectives we need."""

    def __init__(self):
        self.on = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.on:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()
        if 8 % self.world != 0:
            raise ValueError(f"WORLD_SIZE={self.world} must divide 8")
        self.accum = 8 // self.world

    @property
    def master(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        if self.on:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def any(self, flag: bool) -> bool:
        if not self.on:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def barrier(self) -> None:
        if self.on:
            dist.barrier()


class Log:
    def __init__(self, cfg: Config, world: Dist):
        self.master = world.master
        self.path = Path(cfg.run.out_dir) / "logs" / f"{cfg.run.id}.txt"
        if self.master:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            print(self.path)

    def __call__(self, msg: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(msg, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(msg, file=f)


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    count = int(header[2])
    if file.stat().st_size != header_bytes + 2 * count:
        raise ValueError(f"Shard size mismatch for {file}")
    ids = np.fromfile(file, dtype="<u2", count=count, offset=header_bytes)
    if ids.size != count:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(ids.astype(np.uint16, copy=False))


class ByteStream:
    """Sequential over the shards, wraps around."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.index = 0
        self.ids = load_data_shard(self.files[0])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        out = []
        while n > 0:
            left = self.ids.numel() - self.pos
            if left <= 0:
                self.index = (self.index + 1) % len(self.files)
                self.ids = load_data_shard(self.files[self.index])
                self.pos = 0
                continue
            k = min(n, left)
            out.append(self.ids[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return out[0] if len(out) == 1 else torch.cat(out)


class DistributedByteLoader:
    def __init__(self, pattern: str, world: Dist):
        self.world = world
        self.stream = ByteStream(pattern)

    def next_batch(self, global_bytes: int, seq_len: int) -> tuple[Tensor, Tensor]:
        local = global_bytes // (self.world.world * self.world.accum)
        local = local // seq_len * seq_len
        span = local + 1
        chunk = self.stream.take(span * self.world.world)
        mine = chunk[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        return x.to(self.world.device, non_blocking=True), y.to(self.world.device, non_blocking=True)


def load_validation_ids(cfg: Config) -> Tensor:
    """All validation shards in order; the first id is the BOS of the first document, so every byte is a target."""
    files = [Path(p) for p in sorted(glob.glob(os.path.join(cfg.data.root, cfg.data.val)))]
    if not files:
        raise FileNotFoundError(f"no validation shards in {cfg.data.root}")
    ids = torch.cat([load_data_shard(file) for file in files]).contiguous()
    top = int(ids.to(torch.int32).max())
    if top >= VOCAB:
        raise ValueError(f"id {top} in a byte shard")
    if int(ids[0]) != BOS:
        raise ValueError("validation must start with BOS")
    if cfg.data.val_bytes:
        found = int((ids.to(torch.int32) < BYTES).sum())
        if found != cfg.data.val_bytes:
            raise ValueError(f"validation holds {found} bytes, expected {cfg.data.val_bytes}")
    return ids


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------

CONTROL_PATTERNS = ("scale", "gain", "start", "resid_mix", "conv", "skip")


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def fake_quant(w: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    s = w.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / top
    return torch.clamp(torch.round(w / s), -top, top) * s


class QLinear(nn.Linear):
    """fp32 master, bf16 use, straight-through int6 once `qat` is 1. The switch is a buffer: a Python flag would be folded
    into the compiled graph and never flip."""

    def __init__(self, n_in: int, n_out: int, bits: int = 6, zero: bool = False):
        super().__init__(n_in, n_out, bias=False)
        self.bits = bits
        self.register_buffer("qat", torch.zeros(()), persistent=False)
        if zero:
            nn.init.zeros_(self.weight)
        elif min(n_in, n_out) >= 64:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.training:
            w = w + self.qat * (fake_quant(w, self.bits) - w).detach()
        return F.linear(x, w.to(x.dtype))


class NgramEmbedding(nn.Module):
    """Hashed embeddings of the last n bytes (current one included), as in BLT, on top of the byte embedding."""

    def __init__(self, cfg: Node):
        super().__init__()
        self.orders = [int(n) for n in cfg.ngram_orders.split(",") if n]
        self.buckets = cfg.ngram_buckets
        self.byte = nn.Embedding(VOCAB, cfg.dim)
        self.tables = nn.ModuleList(nn.Embedding(cfg.ngram_buckets, cfg.ngram_dim) for _ in self.orders)
        self.lift = nn.ModuleList(QLinear(cfg.ngram_dim, cfg.dim) for _ in self.orders)
        self.ngram_scale = nn.Parameter(torch.full((max(len(self.orders), 1),), 0.1))
        nn.init.normal_(self.byte.weight, std=0.02)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.01)

    def index(self, ids: Tensor, n: int) -> Tensor:
        h = torch.zeros_like(ids)
        for back in range(n):
            shifted = F.pad(ids, (back, 0), value=BOS)[:, : ids.size(1)]
            h = (h * 1_000_003 + shifted + 1) & 0x7FFFFFFF
        return (h ^ (h >> 15)) % self.buckets

    def forward(self, ids: Tensor) -> Tensor:
        x = self.byte(ids)
        for i, n in enumerate(self.orders):
            x = x + self.ngram_scale[i].to(x.dtype) * self.lift[i](self.tables[i](self.index(ids, n)))
        return rms(x)


class MinGRU(nn.Module):
    """minGRU with a causal depthwise convolution in front; the scan runs in log space, fp32."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Parameter(torch.zeros(dim, 1, 4))
        with torch.no_grad():
            self.conv[:, :, -1] = 1.0
        self.gate = QLinear(dim, 2 * dim)
        self.proj = QLinear(dim, dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        c = F.pad(x.transpose(1, 2), (3, 0))
        c = F.conv1d(c, self.conv.to(x.dtype), groups=x.size(-1)).transpose(1, 2)
        hid, gate = self.gate(c).float().chunk(2, dim=-1)
        log_keep = -F.softplus(gate)
        log_take = -F.softplus(-gate)
        log_hid = torch.where(hid >= 0, (F.relu(hid) + 0.5).log(), -F.softplus(-hid))
        total = torch.cumsum(log_keep, dim=1)
        log_h = total + torch.logcumsumexp(log_take + log_hid - total, dim=1)
        return self.proj(log_h.exp().to(x.dtype))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: int):
        super().__init__()
        self.fc = QLinear(dim, mult * dim)
        self.proj = QLinear(mult * dim, dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class LocalBlock(nn.Module):
    def __init__(self, dim: int, mult: int):
        super().__init__()
        self.mixer = MinGRU(dim)
        self.mlp = MLP(dim, mult)
        self.mixer_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer_scale.to(x.dtype) * self.mixer(rms(x))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x))


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float):
        super().__init__()
        freq = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.register_buffer("freq", freq, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(x.size(-2), device=x.device, dtype=torch.float32)
        angle = torch.outer(t, self.freq)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class PatchAttention(nn.Module):
    def __init__(self, cfg: Node):
        super().__init__()
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads
        self.hd = cfg.dim // cfg.heads
        self.q = QLinear(cfg.dim, cfg.dim)
        self.k = QLinear(cfg.dim, self.kv_heads * self.hd)
        self.v = QLinear(cfg.dim, self.kv_heads * self.hd)
        self.proj = QLinear(cfg.dim, cfg.dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((cfg.heads,), 1.5))
        self.rotary = Rotary(self.hd, cfg.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.q(x).view(b, t, self.heads, self.hd).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv_heads, self.hd).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv_heads, self.hd).transpose(1, 2)
        q = self.rotary(rms(q)) * self.q_gain.to(q.dtype)[None, :, None, None]
        k = self.rotary(rms(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class GlobalBlock(nn.Module):
    def __init__(self, cfg: Node):
        super().__init__()
        self.attn = PatchAttention(cfg)
        self.mlp = MLP(cfg.dim, cfg.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim))))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        m = self.resid_mix.to(x.dtype)
        x = m[0] * x + m[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x))


class ByteGPT(nn.Module):
    """Position t reads bytes <= t and predicts byte t + 1.

    Patch j covers positions [jP, (j+1)P). Its state is the encoder's at its last position, so the global output j knows
    bytes < (j+1)P. Position t is given the newest global output that is complete: j = (t + 1) // P - 1.
    """

    def __init__(self, cfg: Node):
        super().__init__()
        self.patch = cfg.patch
        self.cap = cfg.softcap
        self.embed = NgramEmbedding(cfg)
        self.encoder = nn.ModuleList(LocalBlock(cfg.dim, cfg.local_mlp_mult) for _ in range(cfg.enc_layers))
        self.up = QLinear(cfg.dim, cfg.dim)
        self.trunk = nn.ModuleList(GlobalBlock(cfg) for _ in range(cfg.global_layers))
        self.start = nn.Parameter(torch.zeros(cfg.dim))
        self.down = QLinear(cfg.dim, cfg.dim)
        self.skip_scale = nn.Parameter(torch.ones(cfg.dim))
        self.decoder = nn.ModuleList(LocalBlock(cfg.dim, cfg.local_mlp_mult) for _ in range(cfg.dec_layers))
        self.head = nn.Linear(cfg.dim, VOCAB, bias=False)
        nn.init.zeros_(self.head.weight)

    def logits(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.embed(ids)
        for block in self.encoder:
            x = block(x)
        last = x[:, self.patch - 1 :: self.patch]
        g = rms(self.up(last))
        g0 = g
        for block in self.trunk:
            g = block(g, g0)
        g = torch.cat((self.start.to(g.dtype).expand(b, 1, -1), self.down(rms(g))), dim=1)
        # slot 0 is `start`, slot j + 1 the output of patch j
        slot = (torch.arange(t, device=ids.device) + 1) // self.patch
        x = self.skip_scale.to(x.dtype) * x + g[:, slot]
        for block in self.decoder:
            x = block(x)
        z = F.linear(rms(x), self.head.weight.to(x.dtype)).float()
        return self.cap * torch.tanh(z / self.cap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        z = self.logits(ids)
        return F.cross_entropy(z.view(-1, VOCAB), targets.reshape(-1))


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers
# ----------------------------------------------------------------------------------------------------------------------


def zeropower_via_newtonschulz5(g: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = g.bfloat16()
    x = x / (x.norm() + eps)
    flip = x.size(0) > x.size(1)
    if flip:
        x = x.T
    for _ in range(steps):
        y = x @ x.T
        x = a * x + (b * y + c * y @ y) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    """Matrices are dealt to ranks in turn, updates come back by one all_reduce."""

    def __init__(self, params, lr: float, momentum: float, weight_decay: float, world: Dist):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.world = world

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=self.world.device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.world.world == self.world.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    u = zeropower_via_newtonschulz5(p.grad.add(buf, alpha=group["momentum"]))
                    u = u * max(1.0, u.size(0) / u.size(1)) ** 0.5
                    flat[at : at + p.numel()] = u.reshape(-1)
                at += p.numel()
            self.world.total(flat)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.shadow[k].lerp_(v.float(), 1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in self.shadow.items()})


class Trainer:
    def __init__(self, cfg: Config, world: Dist, log: Log):
        self.cfg, self.world, self.log = cfg, world, log
        self.model = ByteGPT(cfg.model).to(world.device)
        for p in self.model.parameters():
            p.data = p.data.float()
        compiled = torch.compile(self.model, dynamic=False, fullgraph=True) if cfg.train.compile else self.model
        self.net = DDP(compiled, device_ids=[world.local], broadcast_buffers=False) if world.on else compiled
        self.loader = self.new_loader()
        self.optimizers = self.make_optimizers()
        self.ema: EMA | None = None
        self.spent_ms = 0.0

    def new_loader(self) -> DistributedByteLoader:
        return DistributedByteLoader(os.path.join(self.cfg.data.root, self.cfg.data.train), self.world)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        t = self.cfg.train
        matrix, embed, scalar = [], [], []
        for name, p in self.model.named_parameters():
            if "tables" in name or name.startswith(("embed.byte", "head")):
                embed.append(p)
            elif p.ndim == 2 and not any(pat in name for pat in CONTROL_PATTERNS):
                matrix.append(p)
            else:
                scalar.append(p)
        betas = (t.beta1, t.beta2)
        self.muon = Muon(matrix, t.matrix_lr, t.muon_momentum, t.weight_decay, self.world)
        opts = [
            self.muon,
            torch.optim.AdamW(embed, lr=t.embed_lr, betas=betas, weight_decay=t.weight_decay, fused=True),
            torch.optim.AdamW(scalar, lr=t.scalar_lr, betas=betas, weight_decay=0.0, fused=True),
        ]
        for opt in opts:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]
        return opts

    def scale(self, step: int, elapsed_ms: float) -> float:
        t = self.cfg.train
        if t.max_wallclock_seconds <= 0:
            return min(1.0, (t.iterations - step) / max(t.warmdown_iters, 1))
        step_ms = elapsed_ms / max(step, 1)
        left = max(1000.0 * t.max_wallclock_seconds - elapsed_ms, 0.0)
        return min(1.0, left / max(t.warmdown_iters * step_ms, 1e-9))

    def one_step(self, scale: float, momentum: float) -> Tensor:
        t = self.cfg.train
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        total = torch.zeros((), device=self.world.device)
        for micro in range(self.world.accum):
            sync = micro == self.world.accum - 1
            x, y = self.loader.next_batch(t.batch_bytes, t.seq_len)
            hold = self.net.no_sync() if self.world.on and not sync else contextlib.nullcontext()
            with hold:
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = self.net(x, y)
                (loss / self.world.accum).backward()
            total += loss.detach() / self.world.accum
        if t.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.grad_clip)
        for opt in self.optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        return total

    def warmup(self) -> None:
        """Compile with real steps on train bytes, then put weights, optimizers and loader back."""
        if self.cfg.train.warmup_steps <= 0:
            return
        weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        states = [copy.deepcopy(opt.state_dict()) for opt in self.optimizers]
        self.model.train()
        for i in range(self.cfg.train.warmup_steps):
            self.one_step(1.0, self.cfg.train.muon_momentum_start)
            if i + 1 == self.cfg.train.warmup_steps:
                self.log(f"warmup_step:{i + 1}/{self.cfg.train.warmup_steps}")
        self.model.load_state_dict(weights)
        for opt, state in zip(self.optimizers, states):
            opt.load_state_dict(state)
        self.loader = self.new_loader()

    def set_qat(self, on: bool) -> None:
        for m in self.model.modules():
            if isinstance(m, QLinear):
                m.qat.fill_(float(on))

    def run(self, evaluator: "Evaluator") -> None:
        cfg, t, log = self.cfg, self.cfg.train, self.log
        self.warmup()
        cap_ms = 1000.0 * t.max_wallclock_seconds if t.max_wallclock_seconds > 0 else None
        stop_after: int | None = None
        qat_on = False
        step = 0
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        while True:
            last = step == t.iterations or (stop_after is not None and step >= stop_after)
            if last or (t.val_every > 0 and step % t.val_every == 0):
                torch.cuda.synchronize()
                self.spent_ms += 1000.0 * (time.perf_counter() - t0)
                loss, bpb = evaluator.blocks(self.model)
                log(
                    f"step:{step}/{t.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} "
                    f"train_time:{self.spent_ms:.0f}ms step_avg:{self.spent_ms / max(step, 1):.2f}ms"
                )
                torch.cuda.synchronize()
                t0 = time.perf_counter()
            if last:
                if stop_after is not None and step < t.iterations:
                    log(f"stopping_early: wallclock_cap train_time:{self.spent_ms:.0f}ms step:{step}/{t.iterations}")
                break
            elapsed = self.spent_ms + 1000.0 * (time.perf_counter() - t0)
            scale = self.scale(step, elapsed)
            if cfg.qat.enabled and not qat_on and scale < cfg.qat.start_scale:
                qat_on = True
                self.set_qat(True)
                log(f"qat:on step:{step} bits:{cfg.qat.bits} scale:{scale:.3f}")
            warm = min(step / max(t.muon_momentum_steps, 1), 1.0)
            momentum = (1.0 - warm) * t.muon_momentum_start + warm * t.muon_momentum
            self.model.train()
            loss = self.one_step(scale, momentum)
            step += 1
            elapsed = self.spent_ms + 1000.0 * (time.perf_counter() - t0)
            if cfg.ema.enabled:
                if self.ema is None and cap_ms is not None and elapsed > cfg.ema.start_frac * cap_ms:
                    self.ema = EMA(self.model, cfg.ema.decay)
                elif self.ema is not None:
                    self.ema.update(self.model)
            if t.log_every > 0 and (step <= 10 or step % t.log_every == 0):
                log(f"step:{step}/{t.iterations} train_loss:{loss.item():.4f} train_time:{elapsed:.0f}ms "
                    f"step_avg:{elapsed / step:.2f}ms")
            if stop_after is None and cap_ms is not None and self.world.any(elapsed >= cap_ms):
                stop_after = step
        log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
        if self.ema is not None:
            self.ema.copy_to(self.model)
            log("ema: applying EMA weights")
        self.set_qat(False)


# ----------------------------------------------------------------------------------------------------------------------
# Packing: int6 rows, LZMA
# ----------------------------------------------------------------------------------------------------------------------


class Packer:
    """Artifact = LZMA( torch.save of {codes, scales, floats} ). Matrices int6, tables int8, the rest fp16."""

    MAGIC = b"LOCH"

    def __init__(self, cfg: Config, log: Log):
        self.cfg = cfg.pack
        self.log = log
        self.path = Path(cfg.run.out_dir) / "final_model.ptz"

    def bits_for(self, name: str, t: Tensor) -> int:
        if not t.is_floating_point() or t.ndim != 2 or t.numel() <= self.cfg.keep_float_numel:
            return 0
        if any(pat in name for pat in CONTROL_PATTERNS):
            return 0
        return self.cfg.embed_bits if "tables" in name or name.startswith(("embed.byte", "head")) else self.cfg.bits

    def encode(self, state: dict[str, Tensor]) -> bytes:
        codes: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        floats: dict[str, Tensor] = {}
        for name, value in state.items():
            t = value.detach().cpu()
            bits = self.bits_for(name, t)
            if bits == 0:
                floats[name] = t.half() if t.is_floating_point() else t
                continue
            top = 2 ** (bits - 1) - 1
            s = (t.float().abs().amax(dim=1) / top).clamp_min(1e-8).half()
            q = torch.clamp(torch.round(t.float() / s.float().clamp_min(1e-7)[:, None]), -top, top)
            codes[name] = q.to(torch.int8)
            scales[name] = s
        buf = io.BytesIO()
        torch.save({"q": codes, "s": scales, "f": floats}, buf)
        raw = buf.getvalue()
        filters = [{"id": lzma.FILTER_LZMA2, "preset": self.cfg.preset | lzma.PRESET_EXTREME, "lc": 2, "pb": 0}]
        packed = lzma.compress(raw, format=lzma.FORMAT_XZ, filters=filters)
        return self.MAGIC + struct.pack("<I", len(raw)) + packed

    def decode(self, blob: bytes) -> dict[str, Tensor]:
        if blob[:4] != self.MAGIC:
            raise ValueError("not a lochside artifact")
        raw = lzma.decompress(blob[8:])
        if len(raw) != struct.unpack("<I", blob[4:8])[0]:
            raise ValueError("artifact cut short")
        obj = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        state = {name: t.float() if t.is_floating_point() else t for name, t in obj["f"].items()}
        for name, q in obj["q"].items():
            state[name] = q.float() * obj["s"][name].float().clamp_min(1e-7)[:, None]
        return state

    def save(self, model: nn.Module, world: Dist) -> int:
        """Rank 0 writes; the sum of code and artifact is checked against the limit."""
        if world.master:
            blob = self.encode(model.state_dict())
            self.path.write_bytes(blob)
        world.barrier()
        model_bytes = self.path.stat().st_size
        code_bytes = len(Path(__file__).read_bytes())
        total = model_bytes + code_bytes
        self.log(f"Serialized model int{self.cfg.bits}+lzma: {model_bytes} bytes")
        self.log(f"Code size: {code_bytes} bytes")
        self.log(f"Total submission size: {total} bytes")
        if total >= self.cfg.limit:
            raise RuntimeError(f"{total} bytes, the limit is {self.cfg.limit}")
        return total

    def load(self, cfg: Config, device: torch.device) -> ByteGPT:
        model = ByteGPT(cfg.model).to(device)
        model.load_state_dict(self.decode(self.path.read_bytes()))
        return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Context mixing: counts of orders 1-5 next to the network
# ----------------------------------------------------------------------------------------------------------------------

ORDERS = 5
EXPERTS = ORDERS + 1


@njit(cache=False)
def context_slot(ids, t, order, mask):
    """Row of the context of `order` bytes that ends before position t; the row never depends on ids[t]."""
    h = np.int64(order) * np.int64(0x9E3779B1)
    for back in range(1, order + 1):
        b = ids[t - back] if t - back >= 0 else 256
        h = (h ^ (np.int64(b) + 1)) * np.int64(0x01000193)
        h = h & np.int64(0x7FFFFFFFFFFF)
    h = h ^ (h >> 17)
    return h & mask


@njit(cache=False)
def byte_class(b):
    if b >= 256:
        return 0
    if b == 32 or b == 10 or b == 9 or b == 13:
        return 1
    if (97 <= b <= 122) or (65 <= b <= 90):
        return 2
    if 48 <= b <= 57:
        return 3
    if b >= 128:
        return 4
    return 5


@njit(cache=False)
def mix_span(ids, first, logp, counts, totals, weights, mask, delta, limit, lr, gate_context, out):
    """Scores ids[first], ids[first + 1], ... against a pool of the network and the count models.

    logp: (n, VOCAB) log-probabilities of the network. counts: (ORDERS, rows, VOCAB), totals: (ORDERS, rows) with
    totals[o, r] == counts[o, r].sum(). weights: (gates, EXPERTS) logits of the pool. out: (n,) nats.
    For each position: the distribution over all VOCAB symbols first, then the score, then gate and counts learn.
    """
    vocab = logp.shape[1]
    dist_all = np.empty((EXPERTS, vocab), dtype=np.float64)
    pool = np.empty(vocab, dtype=np.float64)
    share = np.empty(EXPERTS, dtype=np.float64)
    rows = np.empty(ORDERS, dtype=np.int64)
    for i in range(logp.shape[0]):
        t = first + i
        depth = 0
        for a in range(vocab):
            dist_all[0, a] = math.exp(logp[i, a])
        for o in range(ORDERS):
            r = context_slot(ids, t, o + 1, mask)
            rows[o] = r
            total = totals[o, r]
            if total > 0:
                depth = o + 1
            norm = 1.0 / (total + delta * vocab)
            for a in range(vocab):
                dist_all[o + 1, a] = (counts[o, r, a] + delta) * norm
        gate = 0
        if gate_context > 0:
            gate = depth
        if gate_context > 1:
            gate = depth * 6 + byte_class(ids[t - 1] if t > 0 else 256)
        top = weights[gate, 0]
        for e in range(1, EXPERTS):
            top = max(top, weights[gate, e])
        z = 0.0
        for e in range(EXPERTS):
            share[e] = math.exp(weights[gate, e] - top)
            z += share[e]
        for e in range(EXPERTS):
            share[e] /= z
        for a in range(vocab):
            s = 0.0
            for e in range(EXPERTS):
                s += share[e] * dist_all[e, a]
            pool[a] = s
        # the distribution is complete: look at the byte
        sym = ids[t]
        p = max(pool[sym], 1e-12)
        out[i] = -math.log(p)
        # and learn from it
        for e in range(EXPERTS):
            weights[gate, e] += lr * share[e] * (dist_all[e, sym] / p - 1.0)
        for o in range(ORDERS):
            r = rows[o]
            counts[o, r, sym] += 1
            totals[o, r] += 1
            if counts[o, r, sym] > limit:
                left = 0
                for a in range(vocab):
                    counts[o, r, a] = counts[o, r, a] // 2
                    left += counts[o, r, a]
                totals[o, r] = left


class ContextMixer:
    def __init__(self, cfg: Node):
        self.cfg = cfg
        rows = 1 << cfg.hash_bits
        self.mask = np.int64(rows - 1)
        self.counts = np.zeros((ORDERS, rows, VOCAB), dtype=np.uint16)
        self.totals = np.zeros((ORDERS, rows), dtype=np.int64)
        gates = {0: 1, 1: ORDERS + 1, 2: (ORDERS + 1) * 6}[cfg.gate_context]
        self.weights = np.zeros((gates, EXPERTS), dtype=np.float64)
        self.weights[:, 0] = cfg.init_nn
        if HAVE_NUMBA:
            self.compile()

    def args(self) -> tuple:
        c = self.cfg
        return self.counts, self.totals, self.weights, self.mask, c.delta, c.limit, c.lr, c.gate_context

    def compile(self) -> None:
        """Compiles on bytes of our own; what it counts is wiped."""
        ids = np.frombuffer(b"the quick brown fox jumps over the lazy dog", dtype=np.uint8).astype(np.int64)
        logp = np.full((ids.size, VOCAB), -math.log(VOCAB), dtype=np.float32)
        saved = self.weights.copy()
        mix_span(ids, 0, logp, *self.args(), np.zeros(ids.size))
        self.counts[:] = 0
        self.totals[:] = 0
        self.weights[:] = saved

    def score(self, ids: np.ndarray, first: int, logp: np.ndarray) -> np.ndarray:
        out = np.empty(logp.shape[0], dtype=np.float64)
        mix_span(ids, first, logp, *self.args(), out)
        return out


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------


class Evaluator:
    """bits per byte over the whole validation split. Target i is ids[i + 1]; rank r has a contiguous share of the targets
    and reads it from left to right."""

    def __init__(self, cfg: Config, world: Dist, log: Log):
        self.cfg, self.world, self.log = cfg, world, log
        self.ids = load_validation_ids(cfg)
        self.host = self.ids.numpy().astype(np.int64)
        self.n = self.ids.numel() - 1
        self.lo = self.n * world.rank // world.world
        self.hi = self.n * (world.rank + 1) // world.world

    def result(self, sums: Tensor) -> tuple[float, float]:
        """sums: nats, targets, bytes of this rank."""
        self.world.total(sums)
        nats, targets, count = (float(v) for v in sums)
        return nats / targets, nats / math.log(2.0) / count

    @torch.no_grad()
    def blocks(self, model: ByteGPT) -> tuple[float, float]:
        """Quick figure for the training log: blocks of seq_len, no overlap, no mixing."""
        seq = self.cfg.train.seq_len
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        was = model.training
        model.eval()
        blocks = self.n // seq
        mine = range(blocks * self.world.rank // self.world.world, blocks * (self.world.rank + 1) // self.world.world)
        for b in range(mine.start, mine.stop, self.cfg.eval.batch):
            stop = min(b + self.cfg.eval.batch, mine.stop)
            part = self.ids[b * seq : stop * seq + 1].to(self.world.device, torch.int64, non_blocking=True)
            x, y = part[:-1].view(-1, seq), part[1:].view(-1, seq)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            sums[0] += loss.double() * y.numel()
            sums[1] += y.numel()
            sums[2] += (y < BYTES).sum()
        model.train(was)
        return self.result(sums)

    def spans(self):
        """(begin, first, stop): inputs [begin, begin + seq) score the targets [first, stop), spans tile [lo, hi)."""
        seq, stride = self.cfg.train.seq_len, self.cfg.eval.stride
        first = self.lo
        while first < self.hi:
            stop = min(first + stride, self.hi)
            yield max(stop - seq, 0), first, stop
            first = stop

    @torch.no_grad()
    def log_probs(self, fn, batch: list[tuple[int, int, int]]) -> list[Tensor]:
        seq = self.cfg.train.seq_len
        x = torch.full((self.cfg.eval.batch, seq), BOS, dtype=torch.int64)
        for row, (begin, _, stop) in enumerate(batch):
            x[row, : stop - begin] = self.ids[begin:stop].to(torch.int64)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            z = fn(x.to(self.world.device, non_blocking=True))
        lp = F.log_softmax(z.float() / self.cfg.eval.temperature, dim=-1)
        return [lp[row, first - begin : stop - begin] for row, (begin, first, stop) in enumerate(batch)]

    def batches(self):
        held: list[tuple[int, int, int]] = []
        for span in self.spans():
            held.append(span)
            if len(held) == self.cfg.eval.batch:
                yield held
                held = []
        if held:
            yield held

    def final(self, model: ByteGPT, mixer: ContextMixer | None) -> tuple[float, float]:
        """The scored pass: windows with at least seq - stride bytes of context, then the mixer byte by byte."""
        model.eval()
        fn = torch.compile(model.logits, dynamic=False, fullgraph=True) if self.cfg.train.compile else model.logits
        nats, targets, count = 0.0, 0, 0
        t0 = time.perf_counter()
        for k, batch in enumerate(self.batches()):
            for (begin, first, stop), lp in zip(batch, self.log_probs(fn, batch)):
                y = self.ids[first + 1 : stop + 1].to(torch.int64)
                if mixer is not None:
                    nll = mixer.score(self.host, first + 1, lp.cpu().numpy())
                else:
                    nll = -lp.gather(1, y.to(lp.device)[:, None]).squeeze(1).double().cpu().numpy()
                nats += float(nll.sum())
                targets += stop - first
                count += int((y < BYTES).sum())
            if k % 100 == 0:
                self.log(f"eval:batch {k} bpb:{nats / math.log(2.0) / max(count, 1):.5f} "
                         f"time:{time.perf_counter() - t0:.1f}s")
        if targets != self.hi - self.lo:
            raise RuntimeError(f"rank {self.world.rank} scored {targets} of {self.hi - self.lo} targets")
        return self.result(torch.tensor([nats, targets, count], dtype=torch.float64, device=self.world.device))


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def describe(cfg: Config, log: Log, model: nn.Module, evaluator: Evaluator, world: Dist) -> None:
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    with contextlib.suppress(FileNotFoundError):
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        log(smi.stdout, console=False)
    for section in SETTINGS:
        log(f"{section}: {getattr(cfg, section).dump()}", console=False)
    log(f"val_loader:bytes pattern={cfg.data.val} targets:{evaluator.n}")
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    log(f"world_size:{world.world} grad_accum_steps:{world.accum} seed:{cfg.run.seed} numba:{HAVE_NUMBA}")


def main() -> None:
    cfg = Config.from_env()
    world = Dist()
    log = Log(cfg, world)
    random.seed(cfg.run.seed)
    np.random.seed(cfg.run.seed)
    torch.manual_seed(cfg.run.seed)
    torch.cuda.manual_seed_all(cfg.run.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    evaluator = Evaluator(cfg, world, log)
    trainer = Trainer(cfg, world, log)
    describe(cfg, log, trainer.model, evaluator, world)
    trainer.run(evaluator)

    packer = Packer(cfg, log)
    packer.save(trainer.model, world)

    # Everything below is evaluation and reads the artifact from disk.
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    model = packer.load(cfg, world.device)
    if cfg.eval.plain:
        loss, bpb = evaluator.blocks(model)
        log(f"final_int6_lzma_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f}")
    mixer = ContextMixer(cfg.mixer) if cfg.mixer.enabled else None
    loss, bpb = evaluator.final(model, mixer)
    torch.cuda.synchronize()
    eval_s = time.perf_counter() - t0
    label = "mixed" if mixer is not None else "sliding"
    log(f"final_int6_lzma_{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000.0 * eval_s:.0f}ms")
    log(f"final_int6_lzma_{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if world.any(eval_s > cfg.eval.max_seconds):
        raise RuntimeError(f"evaluation took {eval_s:.1f}s, allowed are {cfg.eval.max_seconds:.0f}s")
    if world.on:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
