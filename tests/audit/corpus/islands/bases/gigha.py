"""
train_gpt.py : 11L banked GPT, XSA on the tail, value embeddings, parallel Muon,
self-text GPTQ int6 + LZMA, sliding eval and score-first TTT with a token hint tilt.

Run from this folder:
    torchrun --standalone --nproc_per_node=8 train_gpt.py

Everything is in this one file. Settings live in Config and may be overridden by environment variables
of the same name in upper case (e.g. SEED=42, TTT_LR=0.003).
"""

from __future__ import annotations

import copy
import glob
import io
import json
import lzma
import math
import os
import random
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from flash_attn_interface import flash_attn_func as fa3

    HAVE_FA3 = True
except ImportError:  # dev box
    fa3 = None
    HAVE_FA3 = False


# =====================================================================================================
# configuration
# =====================================================================================================


@dataclass
class Config:
    # files
    data_dir: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    artifact: str = "final_model.int6.lzma"
    log_dir: str = "logs"
    run_id: str = ""
    seed: int = 1337

    # shape
    vocab_size: int = 1024
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0
    rope_base: float = 10000.0
    rope_dims: int = 16
    qk_gain_init: float = 4.0
    logit_softcap: float = 30.0
    leaky_slope: float = 0.5
    xsa_last_n: int = 4
    ve_dim: int = 128
    ve_layers: str = "9,10"
    bigram_buckets: int = 3072
    bigram_dim: int = 112
    ln_scale: bool = True
    tied_init_std: float = 0.005

    # training
    iterations: int = 20000
    train_batch_tokens: int = 786432
    train_seq_len: int = 2048
    warmup_steps: int = 20
    warmdown_iters: int = 3500
    max_wallclock_seconds: float = 600.0
    calib_reserve_seconds: float = 60.0
    val_loss_every: int = 4000
    train_log_every: int = 500

    # optimisers
    embed_lr: float = 0.035
    scalar_lr: float = 0.025
    matrix_lr: float = 0.025
    muon_momentum: float = 0.99
    muon_momentum_start: float = 0.92
    muon_momentum_steps: int = 1500
    muon_wd: float = 0.04
    adam_wd: float = 0.04
    muon_ns_steps: int = 5
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.3

    # averaging
    ema_decay: float = 0.997
    swa_every: int = 50
    swa_below: float = 0.2
    swa_weight: float = 0.5

    # calibration and artifact
    calib_seqs_per_rank: int = 16
    calib_seq_len: int = 1024
    calib_temperature: float = 0.8
    calib_stop_seconds: float = 25.0
    gptq_block: int = 128
    gptq_damp: float = 0.01
    clip_grid: str = "0.9990,0.9995,0.9999,0.99999,1.0"
    size_limit: int = 16_000_000
    lzma_preset: int = 9
    prune_rounds: int = 6

    # evaluation
    eval_seq_len: int = 2048
    eval_stride: int = 64
    eval_batch: int = 32
    ttt: bool = True
    ttt_chunk: int = 32768
    ttt_epochs: int = 3
    ttt_lr: float = 0.005
    ttt_momentum: float = 0.9
    ttt_batch_seqs: int = 8
    ttt_clip: float = 1.0
    tilt: bool = True
    tilt_beta: float = 0.6
    tilt_min_streak: int = 3
    tilt_orders: str = "10,6,4"
    tilt_bits: int = 22
    tilt_block: int = 4096

    @classmethod
    def from_env(cls) -> "Config":
        cfg = cls()
        for f in fields(cls):
            raw = os.environ.get(f.name.upper())
            if raw is None:
                continue
            old = getattr(cfg, f.name)
            if isinstance(old, bool):
                value = raw.strip().lower() in ("1", "true", "yes", "on")
            else:
                value = type(old)(raw)
            setattr(cfg, f.name, value)
        if not cfg.run_id:
            cfg.run_id = uuid.uuid4().hex[:12]
        return cfg

    @property
    def train_glob(self) -> str:
        return os.path.join(self.data_dir, "fineweb_train_*.bin")

    @property
    def val_glob(self) -> str:
        return os.path.join(self.data_dir, "fineweb_val_*.bin")

    @property
    def ve_layer_ids(self) -> list[int]:
        return [int(s) for s in self.ve_layers.split(",") if s.strip()]

    @property
    def tilt_order_ids(self) -> list[int]:
        return [int(s) for s in self.tilt_orders.split(",") if s.strip()]

    @property
    def clip_quantiles(self) -> list[float]:
        return [float(s) for s in self.clip_grid.split(",") if s.strip()]


# =====================================================================================================
# world + log
# =====================================================================================================


class World:
    """torchrun's ranks, or a single process when started without it."""

    def __init__(self) -> None:
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available():
            raise RuntimeError("a CUDA device is needed")
        if 8 % self.size != 0:
            raise ValueError(f"world size {self.size} must divide 8")
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def accum(self) -> int:
        return 8 // self.size

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def sum_(self, t: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)
        return t

    def latest(self, value: float) -> float:
        if not self.distributed:
            return value
        t = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return float(t.item())

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class Logger:
    def __init__(self, cfg: Config, world: World) -> None:
        self.main = world.main
        self.path = Path(cfg.log_dir) / f"{cfg.run_id}.txt"
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, msg: str, console: bool = True) -> None:
        if not self.main:
            return
        if console:
            print(msg, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(msg, file=f)


class Stopwatch:
    """A clock that can be paused; synchronises the device at every reading."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def pause(self) -> None:
        torch.cuda.synchronize()
        self.spent += time.perf_counter() - self.since
        self.since = None

    def seconds(self) -> float:
        if self.since is None:
            return self.spent
        return self.spent + (time.perf_counter() - self.since)


# =====================================================================================================
# data
# =====================================================================================================

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(path: str | Path) -> Tensor:
    path = Path(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    want = HEADER_INTS * 4 + count * 2
    if path.stat().st_size != want:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, header says {want}")
    body = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if body.size != count:
        raise ValueError(f"{path}: short read")
    return torch.from_numpy(body)


def list_shards(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"nothing matches {pattern}")
    return files


def load_validation(cfg: Config) -> Tensor:
    """All validation shards, one after the other, as they are on disk."""
    parts = [read_shard(p) for p in list_shards(cfg.val_glob)]
    tokens = torch.cat(parts).contiguous()
    if tokens.numel() < 2:
        raise ValueError("validation split is empty")
    return tokens


class TokenFeed:
    """Endless stream over the training shards. Each call hands every rank its own consecutive slice."""

    def __init__(self, pattern: str, world: World, seed: int) -> None:
        self.files = list_shards(pattern)
        order = np.random.default_rng(seed).permutation(len(self.files))
        self.files = [self.files[i] for i in order]
        self.world = world
        self.at = 0
        self.pos = 0
        self.buf = read_shard(self.files[0])

    def _next_file(self) -> None:
        self.at = (self.at + 1) % len(self.files)
        self.buf = read_shard(self.files[self.at])
        self.pos = 0

    def _take(self, n: int) -> Tensor:
        got: list[Tensor] = []
        while n > 0:
            left = self.buf.numel() - self.pos
            if left <= 0:
                self._next_file()
                continue
            k = min(left, n)
            got.append(self.buf[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return got[0] if len(got) == 1 else torch.cat(got)

    def batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        mine = global_tokens // (self.world.size * accum)
        if mine % seq_len:
            raise ValueError(f"{mine} tokens a rank do not divide into sequences of {seq_len}")
        span = mine + 1
        block = self._take(span * self.world.size)
        cut = block[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        x = cut[:-1].view(-1, seq_len)
        y = cut[1:].view(-1, seq_len)
        dev = self.world.device
        return x.pin_memory().to(dev, non_blocking=True), y.pin_memory().to(dev, non_blocking=True)


# =====================================================================================================
# bytes
# =====================================================================================================


class ByteTable:
    """How many bytes of the text a token stands for, given the token before it."""

    def __init__(self, model_path: str, vocab_size: int, device: torch.device) -> None:
        sp = spm.SentencePieceProcessor(model_file=model_path)
        if int(sp.vocab_size()) != vocab_size:
            raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, config says {vocab_size}")
        self.bos = int(sp.bos_id())
        size = np.zeros(vocab_size, dtype=np.int16)
        space = np.zeros(vocab_size, dtype=bool)
        edge = np.ones(vocab_size, dtype=bool)
        for i in range(vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            edge[i] = False
            if sp.is_byte(i):
                size[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                space[i] = True
                piece = piece[1:]
            size[i] = len(piece.encode("utf-8"))
        self.size = torch.from_numpy(size).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.edge = torch.from_numpy(edge).to(device)

    def count(self, prev: Tensor, tgt: Tensor) -> Tensor:
        """Bytes per target; a leading space is text unless the token before is a boundary."""
        n = self.size[tgt].to(torch.float64)
        n += (self.space[tgt] & ~self.edge[prev]).to(torch.float64)
        return n


@dataclass
class Tally:
    """Sums over scored targets: nats, tokens, bytes. Lives on the device, reduced once at the end."""

    device: torch.device
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def add(self, nll: Tensor, nbytes: Tensor) -> None:
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += float(nll.numel())
        self.sums[2] += nbytes.sum()

    def result(self, world: World) -> tuple[float, float, int]:
        total = world.sum_(self.sums.clone())
        nats, tokens, nbytes = (float(v) for v in total.tolist())
        return nats / tokens, nats / math.log(2.0) / nbytes, int(tokens)


# =====================================================================================================
# windows
# =====================================================================================================


@dataclass(frozen=True)
class Window:
    """Input positions [lo, hi); of these [begin, hi) are scored (the target of position p is token p+1)."""

    lo: int
    begin: int
    hi: int


class WindowPlan:
    """Cuts n positions into runs of `stride`; each run is scored at the end of a window of up to seq_len."""

    def __init__(self, n: int, seq_len: int, stride: int) -> None:
        if not 0 < stride <= seq_len:
            raise ValueError(f"stride {stride} must lie in 1..{seq_len}")
        self.n, self.seq_len, self.stride = n, seq_len, stride

    def __len__(self) -> int:
        return -(-self.n // self.stride)

    def __getitem__(self, i: int) -> Window:
        begin = i * self.stride
        hi = min(begin + self.stride, self.n)
        return Window(max(0, hi - self.seq_len), begin, hi)

    def between(self, start: int, stop: int) -> range:
        """Numbers of the windows whose scored run begins inside [start, stop)."""
        return range(-(-start // self.stride), min(-(-stop // self.stride), len(self)))

    def gather(self, tokens: Tensor, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """x, y, mask of shape (len(ids), seq_len); short windows are filled up behind, mask is true where scored."""
        x = torch.zeros(len(ids), self.seq_len, dtype=torch.int64)
        y = torch.zeros(len(ids), self.seq_len, dtype=torch.int64)
        mask = torch.zeros(len(ids), self.seq_len, dtype=torch.bool)
        for row, i in enumerate(ids):
            w = self[i]
            k = w.hi - w.lo
            cut = tokens[w.lo : w.hi + 1].to(torch.int64)
            x[row, :k] = cut[:-1]
            y[row, :k] = cut[1:]
            mask[row, w.begin - w.lo : k] = True
        return x, y, mask


# =====================================================================================================
# model
# =====================================================================================================


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Partial rotary embedding: the first `dims` of each head turn, the rest stay."""

    def __init__(self, dims: int, base: float, max_len: int) -> None:
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), inv)
        self.dims = dims
        self.register_buffer("cos", angle.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", angle.sin()[None, :, None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = x.size(1)
        cos, sin = self.cos[:, :t].to(x.dtype), self.sin[:, :t].to(x.dtype)
        turn, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turn.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, H, D) in and out."""
    if HAVE_FA3:
        return fa3(q, k, v, causal=True)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2)


def drop_self_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: takes out of each head's result what points along the position's own value."""
    b, t, h, d = y.shape
    kv = v.size(2)
    grouped = y.reshape(b, t, kv, h // kv, d)
    unit = F.normalize(v, dim=-1).unsqueeze(3)
    along = (grouped * unit).sum(dim=-1, keepdim=True)
    return (grouped - along * unit).reshape(b, t, h, d)


class Tap:
    """Collects X^T X of the inputs of each banked matrix (only in the eager calibration passes)."""

    def __init__(self) -> None:
        self.gram: dict[str, Tensor] = {}
        self.rows = 0

    def add(self, key: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.size(-1)).float()
        if key not in self.gram:
            self.gram[key] = torch.zeros(flat.size(1), flat.size(1), device=flat.device)
        self.gram[key].addmm_(flat.T, flat)


class Attention(nn.Module):
    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.xsa = layer >= cfg.num_layers - cfg.xsa_last_n
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        rope: Rotary,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        wo: Tensor,
        extra_v: Tensor | None,
        tap: Tap | None,
    ) -> Tensor:
        b, t, d = x.shape
        if tap is not None:
            tap.add(f"{self.layer}.qkv", x)
        q = F.linear(x, wq.to(x.dtype)).view(b, t, self.heads, self.head_dim)
        k = F.linear(x, wk.to(x.dtype)).view(b, t, self.kv_heads, self.head_dim)
        v = F.linear(x, wv.to(x.dtype))
        if extra_v is not None:
            v = v + extra_v
        v = v.view(b, t, self.kv_heads, self.head_dim)
        q, k = rope(rms(q)), rope(rms(k))
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = causal_attention(q, k, v)
        if self.xsa:
            y = drop_self_value(y, v)
        y = y.reshape(b, t, d)
        if tap is not None:
            tap.add(f"{self.layer}.o", y)
        return F.linear(y, wo.to(y.dtype))


class Mlp(nn.Module):
    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.slope = cfg.leaky_slope
        self.layer = layer

    def forward(self, x: Tensor, up: Tensor, down: Tensor, tap: Tap | None) -> Tensor:
        if tap is not None:
            tap.add(f"{self.layer}.up", x)
        h = F.leaky_relu(F.linear(x, up.to(x.dtype)), self.slope).square()
        if tap is not None:
            tap.add(f"{self.layer}.down", h)
        return F.linear(h, down.to(h.dtype))


class Block(nn.Module):
    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.attn = Attention(cfg, layer)
        self.mlp = Mlp(cfg, layer)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.damp = 1.0 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0

    def forward(
        self, x: Tensor, x0: Tensor, rope: Rotary, w: tuple[Tensor, ...], extra_v: Tensor | None, tap: Tap | None
    ) -> Tensor:
        wq, wk, wv, wo, up, down = w
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        a = self.attn(rms(x) * self.damp, rope, wq, wk, wv, wo, extra_v, tap)
        x = x + self.attn_scale.to(x.dtype) * a
        m = self.mlp(rms(x) * self.damp, up, down, tap)
        return x + self.mlp_scale.to(x.dtype) * m


class Smear(nn.Module):
    """Blends the previous token's embedding into the present one; a document's first token stays alone."""

    def __init__(self, cfg: Config, bos: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(cfg.model_dim))
        self.bos = bos

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        g = torch.sigmoid(self.gate).to(x.dtype) * (ids != self.bos).to(x.dtype).unsqueeze(-1)
        return (1 - g) * x + g * before


class BigramHash(nn.Module):
    def __init__(self, cfg: Config, bos: int) -> None:
        super().__init__()
        self.buckets = cfg.bigram_buckets
        self.bos = bos
        self.table = nn.Embedding(cfg.bigram_buckets, cfg.bigram_dim)
        nn.init.zeros_(self.table.weight)
        self.proj = nn.Parameter(torch.empty(cfg.model_dim, cfg.bigram_dim))
        nn.init.normal_(self.proj, std=0.02)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def keys(self, ids: Tensor) -> Tensor:
        last = self.buckets - 1
        before = F.pad(ids[:, :-1], (1, 0))
        mixed = torch.bitwise_xor(36313 * ids, 27191 * before) % last
        first = ids == self.bos
        first[:, 0] = True
        return torch.where(first, torch.full_like(mixed, last), mixed)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        e = F.linear(self.table(self.keys(ids)).to(dtype), self.proj.to(dtype))
        return e * self.scale.to(dtype)


class ValueEmbedding(nn.Module):
    """One shared token table added to the values of a few layers."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        kv_dim = cfg.num_kv_heads * (cfg.model_dim // cfg.num_heads)
        self.table = nn.Embedding(cfg.vocab_size, cfg.ve_dim)
        nn.init.normal_(self.table.weight, std=0.01)
        self.proj = nn.Parameter(torch.empty(kv_dim, cfg.ve_dim))
        nn.init.normal_(self.proj, std=0.02)
        self.layer_scale = nn.Parameter(torch.full((max(1, len(cfg.ve_layer_ids)),), 0.1))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(self.table(ids).to(dtype), self.proj.to(dtype))


class GPT(nn.Module):
    def __init__(self, cfg: Config, bos: int) -> None:
        super().__init__()
        n, d = cfg.num_layers, cfg.model_dim
        kv_dim = cfg.num_kv_heads * (d // cfg.num_heads)
        hidden = int(cfg.mlp_mult * d)
        self.n, self.softcap = n, cfg.logit_softcap
        self.ve_at = {layer: i for i, layer in enumerate(cfg.ve_layer_ids)}

        self.tok = nn.Embedding(cfg.vocab_size, d)
        self.bigram = BigramHash(cfg, bos)
        self.smear = Smear(cfg, bos)
        self.ve = ValueEmbedding(cfg)
        self.rope = Rotary(cfg.rope_dims, cfg.rope_base, max(cfg.train_seq_len, cfg.eval_seq_len))

        # banks: first half / second half along dim 0
        self.qo_bank = nn.Parameter(torch.empty(2 * n, d, d))
        self.kv_bank = nn.Parameter(torch.empty(2 * n, kv_dim, d))
        self.mlp_up_bank = nn.Parameter(torch.empty(n, hidden, d))
        self.mlp_down_bank = nn.Parameter(torch.empty(n, d, hidden))

        self.blocks = nn.ModuleList([Block(cfg, i) for i in range(n)])
        self.n_enc = n // 2
        self.n_skip = min(self.n_enc, n - self.n_enc)
        self.skip = nn.Parameter(torch.ones(self.n_skip, d))
        self._init_weights(cfg)

    def _init_weights(self, cfg: Config) -> None:
        nn.init.normal_(self.tok.weight, std=cfg.tied_init_std)
        n = self.n
        shrink = 1.0 / math.sqrt(2 * n)
        with torch.no_grad():
            for i in range(n):
                nn.init.orthogonal_(self.qo_bank[i])
                nn.init.zeros_(self.qo_bank[n + i])
                nn.init.orthogonal_(self.kv_bank[i])
                nn.init.orthogonal_(self.kv_bank[n + i])
                nn.init.orthogonal_(self.mlp_up_bank[i])
                nn.init.zeros_(self.mlp_down_bank[i])
            self.mlp_down_bank.mul_(shrink)

    def bank_slices(self, layer: int) -> tuple[Tensor, ...]:
        n = self.n
        return (
            self.qo_bank[layer],
            self.kv_bank[layer],
            self.kv_bank[n + layer],
            self.qo_bank[n + layer],
            self.mlp_up_bank[layer],
            self.mlp_down_bank[layer],
        )

    def trunk(self, ids: Tensor, tap: Tap | None = None) -> Tensor:
        x = self.tok(ids).to(torch.bfloat16)
        x = x + self.bigram(ids, x.dtype)
        x = self.smear(ids, rms(x))
        x0 = x
        extra = self.ve(ids, x.dtype) if self.ve_at else None
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            j = i - self.n_enc
            if 0 <= j < self.n_skip:
                x = x + self.skip[j].to(x.dtype) * skips.pop()
            ev = None
            if i in self.ve_at:
                ev = extra * self.ve.layer_scale[self.ve_at[i]].to(x.dtype)
            x = block(x, x0, self.rope, self.bank_slices(i), ev, tap)
            if i < self.n_enc:
                skips.append(x)
        return rms(x)

    def logits(self, ids: Tensor, tap: Tap | None = None) -> Tensor:
        z = F.linear(self.trunk(ids, tap), self.tok.weight.to(torch.bfloat16)).float()
        return self.softcap * torch.tanh(z / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        z = self.logits(ids)
        return F.cross_entropy(z.view(-1, z.size(-1)), targets.reshape(-1))


BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


def tap_key(bank: str, index: int, layers: int) -> str:
    """Which input Gram matrix belongs to slice `index` of a bank."""
    if bank == "qo_bank":
        return f"{index}.qkv" if index < layers else f"{index - layers}.o"
    if bank == "kv_bank":
        return f"{index % layers}.qkv"
    return f"{index}.up" if bank == "mlp_up_bank" else f"{index}.down"


def build_model(cfg: Config, bos: int, device: torch.device) -> GPT:
    model = GPT(cfg, bos).to(device)
    for p in model.parameters():
        p.data = p.data.float()
    return model


# =====================================================================================================
# optimisers
# =====================================================================================================


def orthogonalise(g: Tensor, steps: int) -> Tensor:
    """Quintic Newton-Schulz over a stack of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    flip = x.size(-2) > x.size(-1)
    if flip:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if flip else x


class ParallelMuon:
    """Muon over banks: each rank owns a part of dim 0, gets its mean gradient by reduce-scatter, and gives
    back its part of the update by all-gather. `launch` may run while the small parameters are being stepped."""

    def __init__(self, banks: list[nn.Parameter], cfg: Config, world: World) -> None:
        self.world = world
        self.steps, self.wd = cfg.muon_ns_steps, cfg.muon_wd
        self.lr, self.momentum = cfg.matrix_lr, cfg.muon_momentum_start
        self.slots = []
        for p in banks:
            pad = -(-p.size(0) // world.size) * world.size
            part = pad // world.size
            tail = p.shape[1:]
            self.slots.append(
                {
                    "p": p,
                    "pad": torch.zeros(pad, *tail, device=p.device, dtype=torch.bfloat16),
                    "grad": torch.zeros(part, *tail, device=p.device, dtype=torch.bfloat16),
                    "mom": torch.zeros(part, *tail, device=p.device),
                    "full": torch.zeros(pad, *tail, device=p.device, dtype=torch.bfloat16),
                    "scale": max(1.0, p.size(-2) / p.size(-1)) ** 0.5,
                }
            )
        self.flying: list = []

    def launch(self) -> None:
        self.flying = []
        for s in self.slots:
            g = s["p"].grad
            s["pad"][: g.size(0)].copy_(g)
            if self.world.distributed:
                work = dist.reduce_scatter_tensor(s["grad"], s["pad"], op=dist.ReduceOp.AVG, async_op=True)
                self.flying.append(work)
            else:
                s["grad"].copy_(s["pad"])

    @torch.no_grad()
    def step(self) -> None:
        for w in self.flying:
            w.wait()
        gathers = []
        for s in self.slots:
            g = s["grad"].float()
            s["mom"].lerp_(g, 1 - self.momentum)
            nesterov = g.lerp(s["mom"], self.momentum)
            update = orthogonalise(nesterov, self.steps)
            if self.world.distributed:
                gathers.append(dist.all_gather_into_tensor(s["full"], update.contiguous(), async_op=True))
            else:
                s["full"].copy_(update)
                gathers.append(None)
        for s, work in zip(self.slots, gathers):
            if work is not None:
                work.wait()
            p = s["p"]
            p.mul_(1 - self.lr * self.wd)
            p.add_(s["full"][: p.size(0)].to(p.dtype), alpha=-self.lr * s["scale"])


class Optimisers:
    def __init__(self, model: GPT, cfg: Config, world: World) -> None:
        self.cfg, self.world = cfg, world
        named = dict(model.named_parameters())
        banks = [named[n] for n in BANKS]
        tables = [p for n, p in named.items() if n.endswith("tok.weight") or ".table." in n]
        seen = {id(p) for p in banks + tables}
        rest = [p for p in named.values() if id(p) not in seen]
        self.banks = banks
        self.small = tables + rest
        betas = (cfg.beta1, cfg.beta2)
        groups = [
            dict(params=tables, lr=cfg.embed_lr, base=cfg.embed_lr, weight_decay=cfg.adam_wd),
            dict(params=[p for p in rest if p.ndim >= 2], lr=cfg.scalar_lr, base=cfg.scalar_lr, weight_decay=cfg.adam_wd),
            dict(params=[p for p in rest if p.ndim < 2], lr=cfg.scalar_lr, base=cfg.scalar_lr, weight_decay=0.0),
        ]
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=cfg.adam_eps, fused=True)
        self.muon = ParallelMuon(banks, cfg, world)

    def schedule(self, step: int, scale: float) -> None:
        for g in self.adam.param_groups:
            g["lr"] = g["base"] * scale
        self.muon.lr = self.cfg.matrix_lr * scale
        f = min(1.0, step / max(1, self.cfg.muon_momentum_steps))
        self.muon.momentum = (1 - f) * self.cfg.muon_momentum_start + f * self.cfg.muon_momentum

    def step(self) -> None:
        self.muon.launch()
        if self.world.distributed:
            flat = torch.cat([p.grad.reshape(-1) for p in self.small])
            self.world.mean_(flat)
            at = 0
            for p in self.small:
                p.grad.copy_(flat[at : at + p.numel()].view_as(p))
                at += p.numel()
        if self.cfg.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.small, self.cfg.grad_clip)
        self.adam.step()
        self.muon.step()

    def zero(self) -> None:
        for p in self.small + self.banks:
            p.grad = None


class Averager:
    """EMA over every step, SWA over late snapshots; the result is a fixed blend of the two."""

    def __init__(self, model: nn.Module, cfg: Config) -> None:
        self.cfg = cfg
        self.ema = {k: v.detach().clone().float() for k, v in model.state_dict().items()}
        self.swa: dict[str, Tensor] = {}
        self.snaps = 0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, scale: float) -> None:
        now = model.state_dict()
        mine = list(self.ema.values())
        torch._foreach_lerp_(mine, [now[k].float() for k in self.ema], 1 - self.cfg.ema_decay)
        if scale < self.cfg.swa_below and step % self.cfg.swa_every == 0:
            self.snaps += 1
            if not self.swa:
                self.swa = {k: v.detach().clone().float() for k, v in now.items()}
            else:
                for k, v in now.items():
                    self.swa[k].add_((v.float() - self.swa[k]) / self.snaps)

    def blended(self) -> dict[str, Tensor]:
        if not self.swa:
            return {k: v.clone() for k, v in self.ema.items()}
        w = self.cfg.swa_weight
        return {k: (1 - w) * self.ema[k] + w * self.swa[k] for k in self.ema}


# =====================================================================================================
# calibration on the model's own text
# =====================================================================================================


class SelfText:
    """Samples sequences from the trained model. No file is read: the only input is the start token."""

    def __init__(self, model: GPT, cfg: Config, world: World, bos: int) -> None:
        self.model, self.cfg, self.world, self.bos = model, cfg, world, bos

    @torch.no_grad()
    def sample(self, clock: Stopwatch, stop_at: float) -> Tensor:
        cfg = self.cfg
        gen = torch.Generator(device=self.world.device)
        gen.manual_seed(cfg.seed * 1000 + self.world.rank)
        ids = torch.full((cfg.calib_seqs_per_rank, 1), self.bos, dtype=torch.int64, device=self.world.device)
        while ids.size(1) < cfg.calib_seq_len:
            if ids.size(1) % 32 == 0:
                torch.cuda.synchronize()
                if clock.seconds() >= stop_at:
                    break
            z = self.model.logits(ids)[:, -1] / cfg.calib_temperature
            nxt = torch.multinomial(torch.softmax(z, dim=-1), 1, generator=gen)
            ids = torch.cat((ids, nxt), dim=1)
        return ids

    @torch.no_grad()
    def grams(self, ids: Tensor) -> Tap:
        tap = Tap()
        for part in ids.split(4):
            self.model.logits(part, tap)
            tap.rows += part.numel()
        rows = torch.tensor([float(tap.rows)], device=self.world.device)
        tap.rows = int(self.world.sum_(rows).item())
        for key in sorted(tap.gram):
            self.world.sum_(tap.gram[key])
            tap.gram[key] /= tap.rows
        return tap


# =====================================================================================================
# quantisation
# =====================================================================================================


class Rounder:
    """GPTQ for one matrix: symmetric per-row scale, levels -qmax..qmax, error pushed to later columns."""

    def __init__(self, cfg: Config, qmax: int = 31) -> None:
        self.qmax = qmax
        self.block, self.damp = cfg.gptq_block, cfg.gptq_damp
        self.quantiles = cfg.clip_quantiles

    def row_scale(self, w: Tensor, importance: Tensor) -> Tensor:
        """Of a few clipping points per row, the one with the least weighted rounding error."""
        best_err = torch.full((w.size(0),), float("inf"), device=w.device)
        best = torch.ones(w.size(0), device=w.device)
        mag = w.abs()
        for q in self.quantiles:
            top = mag.amax(dim=1) if q >= 1.0 else torch.quantile(mag, q, dim=1)
            s = (top / self.qmax).clamp_min(1e-8).half().float().clamp_min(6e-8)
            r = torch.clamp(torch.round(w / s[:, None]), -self.qmax, self.qmax) * s[:, None]
            err = ((w - r).square() * importance[None, :]).sum(dim=1)
            better = err < best_err
            best_err = torch.where(better, err, best_err)
            best = torch.where(better, s, best)
        return best

    @torch.no_grad()
    def __call__(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        w = weight.detach().float().clone()
        h = gram.float().clone()
        diag = torch.diagonal(h)
        dead = diag <= 0
        diag[dead] = 1.0
        w[:, dead] = 0.0
        scale = self.row_scale(w, diag.clone())
        diag += self.damp * diag.mean()
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        q = torch.zeros_like(w, dtype=torch.int8)
        cols = w.size(1)
        for a in range(0, cols, self.block):
            b = min(a + self.block, cols)
            errs = torch.zeros(w.size(0), b - a, device=w.device)
            for j in range(a, b):
                level = torch.clamp(torch.round(w[:, j] / scale), -self.qmax, self.qmax)
                q[:, j] = level.to(torch.int8)
                e = (w[:, j] - level * scale) / upper[j, j]
                w[:, j:b] -= e[:, None] * upper[j, j:b][None, :]
                errs[:, j - a] = e
            w[:, b:] -= errs @ upper[a:b, b:]
        return q, scale.half()


def round_rows(w: Tensor, qmax: int = 127) -> tuple[Tensor, Tensor]:
    """Plain per-row rounding for tables."""
    w = w.detach().float()
    s = (w.abs().amax(dim=1) / qmax).clamp_min(1e-7).half()
    q = torch.clamp(torch.round(w / s.float()[:, None]), -qmax, qmax).to(torch.int8)
    return q, s


class Artifact:
    """The packed model: name -> tensor; banks as int6 levels per slice, tables as int8, the rest as fp16."""

    TABLE_MIN = 32768

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.items: dict[str, Tensor] = {}

    def pack(self, state: dict[str, Tensor], grams: dict[str, Tensor]) -> None:
        rounder = Rounder(self.cfg)
        for name, t in state.items():
            if name in BANKS:
                for i in range(t.size(0)):
                    q, s = rounder(t[i], grams[tap_key(name, i, self.cfg.num_layers)])
                    self.items[f"{name}.{i}.q"] = q.cpu()
                    self.items[f"{name}.{i}.s"] = s.cpu()
            elif t.ndim == 2 and t.numel() >= self.TABLE_MIN:
                q, s = round_rows(t)
                self.items[f"{name}.q"] = q.cpu()
                self.items[f"{name}.s"] = s.cpu()
            else:
                self.items[name] = t.detach().half().cpu()

    def squeeze(self, items: dict[str, Tensor]) -> bytes:
        raw = io.BytesIO()
        torch.save(items, raw)
        return lzma.compress(raw.getvalue(), preset=self.cfg.lzma_preset)

    def pruned(self, count: int, order: list[tuple[float, str, Tensor]]) -> dict[str, Tensor]:
        """A copy in which the `count` cheapest levels of +-1 are zero. order: by row scale, cheapest first."""
        items = dict(self.items)
        fresh: set[str] = set()
        for _, key, where in order:
            if count <= 0:
                break
            if key not in fresh:
                items[key] = items[key].clone()
                fresh.add(key)
            row, cols = int(where[0]), where[1:][:count]
            items[key][row, cols] = 0
            count -= cols.numel()
        return items

    def unit_levels(self) -> list[tuple[float, str, Tensor]]:
        found = []
        for key, q in self.items.items():
            if not key.endswith(".q") or key.split(".")[0] not in BANKS:
                continue
            scales = self.items[key[:-2] + ".s"].float()
            for row in range(q.size(0)):
                cols = (q[row].abs() == 1).nonzero().flatten()
                if cols.numel():
                    found.append((float(scales[row]), key, torch.cat((torch.tensor([row]), cols))))
        found.sort(key=lambda f: (f[0], f[1], int(f[2][0])))
        return found

    def fit(self, code_bytes: int, log: Logger) -> bytes:
        """The compressed artifact, pruned just as far as the size limit asks."""
        room = self.cfg.size_limit - code_bytes
        blob = self.squeeze(self.items)
        log(f"artifact:unpruned {len(blob)} bytes, room {room}")
        if len(blob) <= room:
            return blob
        order = self.unit_levels()
        lo, hi = 0, sum(where.numel() - 1 for _, _, where in order)
        best = None
        for _ in range(self.cfg.prune_rounds):
            mid = (lo + hi) // 2
            blob = self.squeeze(self.pruned(mid, order))
            log(f"artifact:pruned {mid} levels -> {len(blob)} bytes")
            if len(blob) <= room:
                best, hi = blob, mid
            else:
                lo = mid
        if best is None:
            raise RuntimeError("artifact does not fit, even pruned")
        return best

    @staticmethod
    def load(path: str, device: torch.device) -> dict[str, Tensor]:
        """Reads the file back and returns a state dict in float32."""
        raw = lzma.decompress(Path(path).read_bytes())
        items = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        state: dict[str, Tensor] = {}
        banks: dict[str, dict[int, Tensor]] = {name: {} for name in BANKS}
        for key, t in items.items():
            if key.endswith(".s"):
                continue
            if not key.endswith(".q"):
                state[key] = t.float().to(device)
                continue
            stem = key[:-2]
            w = (t.float() * items[stem + ".s"].float()[:, None]).to(device)
            head, _, index = stem.rpartition(".")
            if head in BANKS:
                banks[head][int(index)] = w
            else:
                state[stem] = w
        for name, slices in banks.items():
            state[name] = torch.stack([slices[i] for i in range(len(slices))])
        return state


# =====================================================================================================
# token hints
# =====================================================================================================


class TokenHints:
    """For each position at most one hinted next token, from contexts met earlier in the stream.

    Tables hold, per hashed context of the last k tokens, the token that followed it last time and how often
    in a row it did. Positions are looked up block by block; a block's own pairs enter the tables after it.
    """

    def __init__(self, tokens: Tensor, cfg: Config) -> None:
        self.tokens = tokens.to(torch.int32).numpy()
        self.n = len(self.tokens) - 1
        self.orders = sorted(cfg.tilt_order_ids, reverse=True)
        self.block, self.min_streak = cfg.tilt_block, cfg.tilt_min_streak
        self.mask = np.uint64((1 << cfg.tilt_bits) - 1)
        slots = 1 << cfg.tilt_bits
        self.follow = {k: np.full(slots, -1, dtype=np.int32) for k in self.orders}
        self.streak = {k: np.zeros(slots, dtype=np.int32) for k in self.orders}
        self.hint = np.full(self.n, -1, dtype=np.int16)
        self.done = 0

    def _slots(self, k: int, a: int, b: int) -> np.ndarray:
        """Table slots of the contexts that end at positions a..b-1 (a >= k - 1)."""
        rows = np.lib.stride_tricks.sliding_window_view(self.tokens[a - k + 1 : b], k).astype(np.uint64)
        h = np.full(rows.shape[0], 1469598103934665603 + k, dtype=np.uint64)
        for j in range(k):
            h = (h ^ (rows[:, j] + np.uint64(1))) * np.uint64(1099511628211)
        return ((h >> np.uint64(20)) & self.mask).astype(np.int64)

    def advance(self, to: int) -> None:
        """Fills in the hints of all positions below `to`."""
        while self.done < to:
            a, b = self.done, min(self.done + self.block, to)
            slots = {}
            for k in self.orders:
                first = max(a, k - 1)
                if first >= b:
                    continue
                at = self._slots(k, first, b)
                slots[k] = (first, at)
                strong = self.streak[k][at] >= self.min_streak
                view = self.hint[first:b]
                fill = strong & (view < 0)
                view[fill] = self.follow[k][at][fill]
            for k, (first, at) in slots.items():
                came = self.tokens[first + 1 : b + 1]
                same = self.follow[k][at] == came
                self.streak[k][at] = np.where(same, self.streak[k][at] + 1, 1)
                self.follow[k][at] = came
            self.done = b

    def get(self, lo: int, hi: int) -> np.ndarray:
        if hi > self.done:
            raise IndexError(f"hints are known up to {self.done}, asked for {hi}")
        return self.hint[lo:hi]


def tilted_nll(logp: Tensor, targets: Tensor, hint: Tensor, beta: float) -> Tensor:
    """-log of q(a) = p(a) exp(beta [a = hint]) / (1 + p(hint) (exp(beta) - 1)); hint < 0: q = p."""
    has = hint >= 0
    at = hint.clamp_min(0)
    base = logp.gather(1, targets[:, None]).squeeze(1)
    p_hint = logp.gather(1, at[:, None]).squeeze(1).exp()
    log_z = torch.log1p(p_hint * math.expm1(beta))
    bonus = beta * (at == targets).to(base.dtype)
    return -(base + torch.where(has, bonus - log_z, torch.zeros_like(base)))


# =====================================================================================================
# scoring
# =====================================================================================================


class Scorer:
    """Scores windows of the validation stream with the model as it stands."""

    def __init__(self, model: GPT, tokens: Tensor, table: ByteTable, cfg: Config, world: World) -> None:
        self.model, self.tokens, self.table = model, tokens, table
        self.cfg, self.world = cfg, world
        self.n = tokens.numel() - 1
        self.logits = torch.compile(model.logits, dynamic=False)

    @torch.no_grad()
    def score(self, plan: WindowPlan, ids: list[int], tally: Tally, hints: TokenHints | None = None) -> None:
        dev = self.world.device
        x, y, mask = (t.to(dev) for t in plan.gather(self.tokens, ids))
        z = self.logits(x)
        picked, tgt, prev = z[mask], y[mask], x[mask]
        logp = torch.log_softmax(picked.float(), dim=-1)
        if hints is None:
            nll = -logp.gather(1, tgt[:, None]).squeeze(1)
        else:
            runs = [plan[i] for i in ids]
            hint = np.concatenate([hints.get(w.begin, w.hi) for w in runs]).astype(np.int64)
            nll = tilted_nll(logp, tgt, torch.from_numpy(hint).to(dev), self.cfg.tilt_beta)
        tally.add(nll, self.table.count(prev, tgt))

    def frozen(self, stride: int) -> tuple[float, float, int]:
        """The whole stream with fixed weights, the windows dealt out to the ranks in turn."""
        plan = WindowPlan(self.n, self.cfg.eval_seq_len, stride)
        tally = Tally(self.world.device)
        mine = list(range(self.world.rank, len(plan), self.world.size))
        was = self.model.training
        self.model.eval()
        for at in range(0, len(mine), self.cfg.eval_batch):
            self.score(plan, mine[at : at + self.cfg.eval_batch], tally)
        self.model.train(was)
        return tally.result(self.world)


class ScoreFirstTTT:
    """Chunk after chunk: score all of the chunk's positions, then a few epochs of SGD on them."""

    def __init__(self, scorer: Scorer, cfg: Config, world: World, log: Logger) -> None:
        self.scorer, self.cfg, self.world, self.log = scorer, cfg, world, log
        self.model = scorer.model
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = torch.optim.SGD(self.params, lr=cfg.ttt_lr, momentum=cfg.ttt_momentum)
        self.loss_fn = torch.compile(self.model, dynamic=False)

    def chunk_lr(self, c: int, chunks: int) -> float:
        return 0.5 * self.cfg.ttt_lr * (1.0 + math.cos(math.pi * c / max(1, chunks - 1)))

    def _sync(self) -> None:
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        if self.world.distributed:
            flat = torch.cat([g.reshape(-1) for g in grads])
            self.world.sum_(flat)
            at = 0
            for i, g in enumerate(grads):
                grads[i] = flat[at : at + g.numel()].view_as(g)
                at += g.numel()
        for p, g in zip(self.params, grads):
            p.grad = g

    def adapt(self, start: int, stop: int, lr: float) -> None:
        """SGD on the positions [start, stop), whose targets are tokens start + 1 .. stop."""
        cfg = self.cfg
        length = cfg.eval_seq_len
        rows = (stop - start) // length
        if rows == 0:
            return
        cut = self.scorer.tokens[start : start + rows * length + 1].to(torch.int64).to(self.world.device)
        x, y = cut[:-1].view(rows, length), cut[1:].view(rows, length)
        for group in self.opt.param_groups:
            group["lr"] = lr
        self.model.train()
        for _ in range(cfg.ttt_epochs):
            for at in range(0, rows, cfg.ttt_batch_seqs):
                batch = list(range(at, min(at + cfg.ttt_batch_seqs, rows)))
                mine = batch[self.world.rank :: self.world.size]
                self.opt.zero_grad(set_to_none=True)
                if mine:
                    loss = self.loss_fn(x[mine], y[mine]) * (len(mine) / len(batch))
                    loss.backward()
                self._sync()
                torch.nn.utils.clip_grad_norm_(self.params, cfg.ttt_clip)
                self.opt.step()

    def run(self) -> tuple[float, float, int]:
        cfg, world = self.cfg, self.world
        n = self.scorer.n
        plan = WindowPlan(n, cfg.eval_seq_len, cfg.eval_stride)
        hints = TokenHints(self.scorer.tokens, cfg) if cfg.tilt else None
        tally = Tally(world.device)
        chunks = -(-n // cfg.ttt_chunk)
        t0 = time.perf_counter()
        for c in range(chunks):
            start, stop = c * cfg.ttt_chunk, min((c + 1) * cfg.ttt_chunk, n)
            ids = list(plan.between(start, stop))
            if hints is not None and ids:
                hints.advance(plan[ids[-1]].hi)
            self.model.eval()
            mine = ids[world.rank :: world.size]
            for at in range(0, len(mine), cfg.eval_batch):
                self.scorer.score(plan, mine[at : at + cfg.eval_batch], tally, hints)
            if c < chunks - 1:
                self.adapt(start, stop, self.chunk_lr(c, chunks))
            if c % 200 == 0 or c == chunks - 1:
                nats, _, tokens = self._peek(tally)
                spent = time.perf_counter() - t0
                self.log(f"ttt chunk:{c + 1}/{chunks} rank0_loss:{nats:.5f} rank0_tokens:{tokens} t:{spent:.1f}s")
        return tally.result(world)

    @staticmethod
    def _peek(tally: Tally) -> tuple[float, float, int]:
        nats, tokens, nbytes = (float(v) for v in tally.sums.tolist())
        return nats / max(1.0, tokens), nats / math.log(2.0) / max(1.0, nbytes), int(tokens)


# =====================================================================================================
# the run
# =====================================================================================================


class Run:
    def __init__(self) -> None:
        self.cfg = Config.from_env()
        self.world = World()
        self.log = Logger(self.cfg, self.world)
        self.source = Path(__file__).read_text(encoding="utf-8")
        self.clock = Stopwatch()
        self.reading = (0.0, 0)  # the slowest rank's training seconds and the step they were read at
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        self.seed_all()
        self.header()
        self.table = ByteTable(self.cfg.tokenizer_path, self.cfg.vocab_size, self.world.device)
        self.val = load_validation(self.cfg)
        self.log(f"val:tokens {self.val.numel()} from {self.cfg.val_glob}")

    def seed_all(self) -> None:
        random.seed(self.cfg.seed)
        np.random.seed(self.cfg.seed)
        torch.manual_seed(self.cfg.seed)
        torch.cuda.manual_seed_all(self.cfg.seed)

    def header(self) -> None:
        self.log(self.source, console=False)
        self.log(f"python {sys.version.split()[0]} torch {torch.__version__} fa3 {HAVE_FA3}")
        self.log(f"world_size:{self.world.size} accum:{self.world.accum} seed:{self.cfg.seed}")
        self.log("config " + json.dumps(asdict(self.cfg), sort_keys=True))
        if self.world.main:
            smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
            self.log(smi.stdout, console=False)

    # ---- training

    def lr_scale(self, step: int) -> float:
        """Flat, then linear to zero over the warmdown; the end is guessed from the time used so far."""
        cfg = self.cfg
        budget = cfg.max_wallclock_seconds - cfg.calib_reserve_seconds
        spent, at = self.reading
        if at == 0:
            return 1.0
        per_step = spent / at
        spent += per_step * (step - at)
        warmdown = cfg.warmdown_iters * per_step
        left = min(budget - spent, (cfg.iterations - step) * per_step)
        return max(0.0, min(1.0, left / max(1e-9, warmdown)))

    def one_step(self, compiled: nn.Module, feed: TokenFeed) -> Tensor:
        cfg, accum = self.cfg, self.world.accum
        total = torch.zeros((), device=self.world.device)
        for _ in range(accum):
            x, y = feed.batch(cfg.train_batch_tokens, cfg.train_seq_len, accum)
            loss = compiled(x, y)
            total += loss.detach() / accum
            (loss / accum).backward()
        return total

    def warm_up(self, model: GPT, compiled: nn.Module) -> None:
        """Compiles on training batches, then everything is put back as it was."""
        cfg = self.cfg
        if cfg.warmup_steps <= 0:
            return
        keep = copy.deepcopy(model.state_dict())
        opts = Optimisers(model, cfg, self.world)
        feed = TokenFeed(cfg.train_glob, self.world, cfg.seed)
        for _ in range(cfg.warmup_steps):
            self.one_step(compiled, feed)
            opts.step()
            opts.zero()
        model.load_state_dict(keep)
        self.log(f"warm-up: {cfg.warmup_steps} steps, weights restored")

    def train(self) -> tuple[GPT, dict[str, Tensor]]:
        cfg, world = self.cfg, self.world
        model = build_model(cfg, self.table.bos, world.device)
        if world.distributed:
            for p in model.parameters():
                dist.broadcast(p.data, src=0)
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
        self.log(f"model_params:{sum(p.numel() for p in model.parameters())}")
        self.warm_up(model, compiled)

        opts = Optimisers(model, cfg, world)
        avg = Averager(model, cfg)
        feed = TokenFeed(cfg.train_glob, world, cfg.seed)
        scorer = Scorer(model, self.val, self.table, cfg, world)
        budget = cfg.max_wallclock_seconds - cfg.calib_reserve_seconds
        world.barrier()
        self.clock.start()
        step, stop = 0, False
        while True:
            last = step == cfg.iterations or stop
            if last or (cfg.val_loss_every > 0 and step % cfg.val_loss_every == 0 and step > 0):
                self.clock.pause()
                nats, bpb, _ = scorer.frozen(cfg.eval_seq_len)
                self.log(f"step:{step} val_loss:{nats:.4f} val_bpb:{bpb:.4f} train_time:{self.clock.seconds():.1f}s")
                self.clock.start()
            if last:
                break
            scale = self.lr_scale(step)
            opts.schedule(step, scale)
            loss = self.one_step(compiled, feed)
            opts.step()
            opts.zero()
            step += 1
            avg.update(model, step, scale)
            if step <= 5 or step % cfg.train_log_every == 0:
                self.log(f"step:{step} train_loss:{loss.item():.4f} lr:{scale:.3f} t:{self.clock.seconds():.1f}s")
            if step % 4 == 0:
                torch.cuda.synchronize()
                self.reading = (world.latest(self.clock.seconds()), step)
                stop = self.reading[0] >= budget
        self.log(f"training stopped at step {step}, {self.clock.seconds():.1f}s, swa snapshots {avg.snaps}")
        return model, avg.blended()

    # ---- artifact

    def make_artifact(self, model: GPT, state: dict[str, Tensor]) -> Artifact:
        """Self-text, Gram matrices and rounding, all on the training clock."""
        cfg = self.cfg
        model.load_state_dict(state)
        if self.world.distributed:
            for p in model.parameters():
                dist.broadcast(p.data, src=0)
        model.eval()
        maker = SelfText(model, cfg, self.world, self.table.bos)
        ids = maker.sample(self.clock, cfg.max_wallclock_seconds - cfg.calib_stop_seconds)
        self.log(f"calibration:self-text {tuple(ids.shape)} a rank, t:{self.clock.seconds():.1f}s")
        tap = maker.grams(ids)
        art = Artifact(cfg)
        art.pack(model.state_dict(), tap.gram)
        self.clock.pause()
        self.log(f"train+calibration+rounding {self.clock.seconds():.1f}s of {cfg.max_wallclock_seconds:.0f}s")
        return art

    def save(self, art: Artifact) -> int:
        code_bytes = len(self.source.encode("utf-8"))
        if self.world.main:
            blob = art.fit(code_bytes, self.log)
            Path(self.cfg.artifact).write_bytes(blob)
        self.world.barrier()
        model_bytes = Path(self.cfg.artifact).stat().st_size
        total = code_bytes + model_bytes
        self.log(f"Code size: {code_bytes} bytes")
        self.log(f"Serialized model int6+lzma: {model_bytes} bytes")
        self.log(f"Total submission size: {total} bytes")
        if total > self.cfg.size_limit:
            raise RuntimeError(f"{total} bytes are more than {self.cfg.size_limit}")
        return total

    def reload(self) -> GPT:
        model = build_model(self.cfg, self.table.bos, self.world.device)
        model.load_state_dict(Artifact.load(self.cfg.artifact, self.world.device))
        return model

    # ---- evaluation

    def evaluate(self) -> dict[str, float]:
        cfg = self.cfg
        timer = Stopwatch()
        timer.start()
        model = self.reload()
        scorer = Scorer(model, self.val, self.table, cfg, self.world)
        nats, bpb, tokens = scorer.frozen(cfg.eval_stride)
        self.log(f"int6_sliding val_loss:{nats:.6f} val_bpb:{bpb:.6f} tokens:{tokens} t:{timer.seconds():.1f}s")
        if cfg.ttt:
            ttt = ScoreFirstTTT(scorer, cfg, self.world, self.log)
            nats, bpb, tokens = ttt.run()
            self.log(f"score_first_ttt val_loss:{nats:.6f} val_bpb:{bpb:.6f} tokens:{tokens}")
        if tokens != scorer.n:
            raise RuntimeError(f"{tokens} targets scored, {scorer.n} expected")
        timer.pause()
        self.log(f"eval wall {timer.seconds():.1f}s")
        return {"val_loss": nats, "val_bpb": bpb, "tokens": tokens, "eval_seconds": timer.seconds()}

    def go(self) -> None:
        model, state = self.train()
        art = self.make_artifact(model, state)
        total = self.save(art)
        del model, state, art
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        self.world.barrier()
        figures = self.evaluate()
        figures["bytes_total"] = total
        figures["seed"] = self.cfg.seed
        self.log(f"peak memory {torch.cuda.max_memory_allocated() // 2**20} MiB")
        self.log(f"final_exact val_loss:{figures['val_loss']:.8f} val_bpb:{figures['val_bpb']:.8f}")
        self.log("RESULT " + json.dumps(figures, sort_keys=True))


def main() -> None:
    run = Run()
    try:
        run.go()
    finally:
        run.world.close()


if __name__ == "__main__":
    main()
