"""rousay: CaseOps-8192, 8 layers, XSA + gated attention + partial RoPE, GPTQ int5/int6 groups, phased score-first TTT.

Run:  torchrun --standalone --nproc_per_node=8 train_gpt.py
Any field of Config can be overridden from the environment (UPPER_CASE) or as --kebab-case on the command line.

What happens, in order:
  1. train for `train_cap_s - artifact_reserve_s` seconds (Muon + AdamW, EMA)
  2. inside the reserve: Hessians from training batches, GPTQ, bit packing, lzma/brotli, artifact on disk
  3. read the artifact back, evaluate what it holds: documents in order, in phases; every document is scored chunk by
     chunk with its own LoRA (score, then step); when a phase is complete the base weights get one epoch on it
"""

from __future__ import annotations

import argparse
import copy
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
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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


# --------------------------------------------------------------------------------------------------------------------
# configuration
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every knob of the run. Defaults are the submitted configuration."""

    # run
    run_id: str = ""
    seed: int = 1337
    out_dir: str = "."
    compile: bool = True

    # data
    data_root: str = "./data/datasets/fineweb10B_sp8192_caseops"
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_caseops.model"
    case_ops: bool = True
    vocab_size: int = 8192
    bos_id: int = 1

    # model
    num_layers: int = 8
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: int = 3
    rope_dims: int = 16
    rope_base: float = 10000.0
    xsa_last: int = 8
    gate_width: int = 12
    qk_gain: float = 4.0
    logit_softcap: float = 30.0
    leaky_slope: float = 0.5
    embed_std: float = 0.005

    # schedule
    train_cap_s: float = 600.0
    artifact_reserve_s: float = 90.0
    max_steps: int = 20000
    warmup_compile_steps: int = 8
    train_batch_tokens: int = 524288
    train_seq_len: int = 2048
    warmdown_frac: float = 0.66
    lr_floor: float = 0.05
    log_every: int = 200
    val_every: int = 0

    # optimiser
    matrix_lr: float = 0.026
    scalar_lr: float = 0.02
    embed_lr: float = 0.03
    muon_momentum: float = 0.97
    muon_momentum_start: float = 0.92
    muon_momentum_warmup: int = 1200
    muon_ns_steps: int = 5
    muon_wd: float = 0.09
    embed_wd: float = 0.08
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    grad_clip: float = 0.3
    ema_decay: float = 0.9965

    # quantisation
    attn_bits: int = 6
    mlp_bits: int = 5
    embed_bits: int = 5
    group_size: int = 128
    gptq_damp: float = 0.01
    calib_batches: int = 24
    calib_rows: int = 8
    size_limit: int = 16_000_000

    # evaluation
    eval_cap_s: float = 600.0
    eval_adapt_until_s: float = 540.0
    eval_seq_len: int = 2048
    eval_stride: int = 64
    eval_rows: int = 16
    ttt_enabled: bool = True
    diag_prequant: bool = False

    # per-document LoRA
    lora_rank: int = 64
    lora_alpha: float = 96.0
    lora_lr: float = 1e-4
    lora_beta2: float = 0.99
    lora_wd: float = 0.5
    lora_batch_docs: int = 64
    lora_chunk: int = 64

    # phases of the global TTT
    phase_fracs: tuple = (0.04, 0.12, 0.30, 1.0)
    global_lr: float = 0.001
    global_momentum: float = 0.9
    global_rows: int = 8
    global_clip: float = 1.0

    # copy hints
    hints_enabled: bool = True
    hint_betas: tuple = (0.35, 0.8, 1.4)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def train_glob(self) -> str:
        return os.path.join(self.data_root, "fineweb_train_*.bin")

    @property
    def val_glob(self) -> str:
        return os.path.join(self.data_root, "fineweb_val_*.bin")

    @property
    def val_bytes_glob(self) -> str:
        return os.path.join(self.data_root, "fineweb_val_bytes_*.bin")

    @property
    def artifact_path(self) -> Path:
        return Path(self.out_dir) / "final_model.ptz"

    def validate(self) -> None:
        assert self.model_dim % self.num_heads == 0
        assert self.num_heads % self.num_kv_heads == 0
        assert self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim
        assert self.model_dim % self.group_size == 0
        assert (self.model_dim * self.mlp_mult) % self.group_size == 0
        assert self.phase_fracs[-1] == 1.0
        assert list(self.phase_fracs) == sorted(self.phase_fracs)
        assert 0 < self.artifact_reserve_s < self.train_cap_s


def coerce(raw: str, like: object) -> object:
    """A string as a value of the same type as `like`."""
    if isinstance(like, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    if isinstance(like, int):
        return int(raw)
    if isinstance(like, float):
        return float(raw)
    if isinstance(like, tuple):
        return tuple(float(part) for part in raw.split(",") if part.strip())
    return raw


def load_config(argv: list[str] | None = None) -> Config:
    cfg = Config()
    for f in fields(Config):
        raw = os.environ.get(f.name.upper())
        if raw is not None:
            setattr(cfg, f.name, coerce(raw, getattr(cfg, f.name)))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Config):
        parser.add_argument("--" + f.name.replace("_", "-"), dest=f.name, default=None)
    given = parser.parse_args(argv)
    for f in fields(Config):
        raw = getattr(given, f.name)
        if raw is not None:
            setattr(cfg, f.name, coerce(raw, getattr(cfg, f.name)))
    cfg.validate()
    return cfg


# --------------------------------------------------------------------------------------------------------------------
# processes, clock, log
# --------------------------------------------------------------------------------------------------------------------


class World:
    """Rank, size, device, and the few collectives that the run needs. Works alone as well."""

    def __init__(self) -> None:
        self.on = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.on:
            dist.init_process_group("nccl", device_id=self.device)
            dist.barrier()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        torch.cuda.synchronize()
        if self.on:
            dist.barrier()

    def sum_(self, t: Tensor) -> Tensor:
        if self.on:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def any(self, flag: bool) -> bool:
        """True on every rank if the flag is set on one of them."""
        if not self.on:
            return flag
        t = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def gather(self, thing: object) -> list:
        if not self.on:
            return [thing]
        out: list = [None] * self.size
        dist.all_gather_object(out, thing)
        return out

    def broadcast_model(self, model: nn.Module) -> None:
        if self.on:
            for p in model.parameters():
                dist.broadcast(p.data, src=0)

    def close(self) -> None:
        if self.on:
            dist.destroy_process_group()


class Clock:
    """Seconds since start, with the device drained before each reading."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def __call__(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.t0

    def skip(self, seconds: float) -> None:
        self.t0 += seconds


class Log:
    def __init__(self, world: World, run_id: str, out_dir: str) -> None:
        self.active = world.main
        self.path = Path(out_dir) / "logs" / f"{run_id}.txt"
        if self.active:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.active:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(text + "\n")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


# --------------------------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(path: str | Path) -> np.ndarray:
    """The uint16 payload of one shard. The header is 256 int32: magic, version, number of tokens, zeros."""
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER_INTS * 4), dtype="<i4")
        if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
            raise ValueError(f"{path}: not a shard (magic {header[0]}, version {header[1]})")
        count = int(header[2])
        data = np.frombuffer(f.read(count * 2), dtype="<u2")
    if len(data) != count:
        raise ValueError(f"{path}: header says {count} tokens, file holds {len(data)}")
    return data


def shard_files(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(pattern)
    return found


class TrainStream:
    """Endless training tokens; each call hands every rank its own slice of the next global span."""

    def __init__(self, cfg: Config, world: World) -> None:
        self.files = shard_files(cfg.train_glob)
        self.world = world
        self.index = -1
        self._next_file()

    def _next_file(self) -> None:
        self.index = (self.index + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.index])
        self.pos = 0

    def _take(self, n: int) -> np.ndarray:
        parts = []
        while n > 0:
            left = len(self.tokens) - self.pos
            if left == 0:
                self._next_file()
                continue
            k = min(left, n)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def batch(self, rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
        span = rows * seq_len + 1
        chunk = self._take(span * self.world.size)
        mine = chunk[self.world.rank * span : (self.world.rank + 1) * span].astype(np.int64)
        t = torch.from_numpy(mine)
        x = t[:-1].view(rows, seq_len)
        y = t[1:].view(rows, seq_len)
        dev = self.world.device
        return x.to(dev, non_blocking=True), y.to(dev, non_blocking=True)


class ByteTable:
    """UTF-8 bytes of a token by piece: base bytes, leading space, and whether the piece is a boundary (control)."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int) -> None:
        size = max(sp.vocab_size(), vocab_size)
        self.base = np.zeros(size, dtype=np.int32)
        self.space = np.zeros(size, dtype=bool)
        self.boundary = np.ones(size, dtype=bool)
        for i in range(sp.vocab_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            self.boundary[i] = False
            if sp.is_byte(i):
                self.base[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                self.space[i] = True
                piece = piece[1:]
            self.base[i] = len(piece.encode("utf-8"))

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of every token of a stream; a leading space counts unless a boundary token stands before it."""
        out = np.zeros(len(tokens), dtype=np.int32)
        prev, cur = tokens[:-1], tokens[1:]
        out[1:] = self.base[cur]
        out[1:] += (self.space[cur] & ~self.boundary[prev]).astype(np.int32)
        return out


@dataclass
class Document:
    """A span of the validation stream: BOS, text, and the next document's BOS as its last target."""

    index: int
    start: int
    length: int

    @property
    def targets(self) -> int:
        return self.length - 1


class ValSet:
    """Validation tokens and, for each, how many bytes of the original text it stands for."""

    def __init__(self, cfg: Config) -> None:
        sidecar = set(glob.glob(cfg.val_bytes_glob))
        files = [f for f in shard_files(cfg.val_glob) if f not in sidecar]
        self.tokens_np = np.concatenate([read_shard(f) for f in files])
        if cfg.case_ops:
            # the stream is case-normalised: pieces do not tell the original length, the data script's sidecar does
            self.bytes_np = np.concatenate([read_shard(f) for f in sorted(sidecar)]).astype(np.int32)
        else:
            sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
            self.bytes_np = ByteTable(sp, cfg.vocab_size).count(self.tokens_np)
        if len(self.bytes_np) != len(self.tokens_np):
            raise ValueError(f"byte sidecar has {len(self.bytes_np)} entries for {len(self.tokens_np)} tokens")
        self.tokens = torch.from_numpy(self.tokens_np.astype(np.int64))
        self.nbytes = torch.from_numpy(self.bytes_np.astype(np.int64))
        self.bos_id = cfg.bos_id

    @property
    def num_targets(self) -> int:
        return len(self.tokens_np) - 1

    @property
    def total_bytes(self) -> int:
        return int(self.bytes_np[1:].sum())

    def documents(self) -> list[Document]:
        starts = np.flatnonzero(self.tokens_np == self.bos_id)
        if len(starts) == 0 or starts[0] != 0:
            raise ValueError("the validation stream must begin with BOS")
        ends = np.append(starts[1:] + 1, len(self.tokens_np))
        docs = [Document(i, int(s), int(e - s)) for i, (s, e) in enumerate(zip(starts, ends))]
        docs = [d for d in docs if d.targets > 0]
        assert sum(d.targets for d in docs) == self.num_targets
        return docs


class Tally:
    """Running sums of the score: nats, bytes, tokens."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, nbytes: Tensor, mask: Tensor) -> None:
        """nll, nbytes, mask of one shape; counts the places where the mask is set."""
        m = mask.to(torch.float64)
        self.sums[0] += (nll.to(torch.float64) * m).sum()
        self.sums[1] += (nbytes.to(torch.float64) * m).sum()
        self.sums[2] += m.sum()

    def reduce(self, world: World) -> "Score":
        total = world.sum_(self.sums.clone())
        nats, nbytes, tokens = (float(v) for v in total.tolist())
        return Score(nats / max(tokens, 1.0), nats / math.log(2.0) / max(nbytes, 1.0), int(tokens), int(nbytes))


@dataclass
class Score:
    loss: float
    bpb: float
    tokens: int
    nbytes: int


# --------------------------------------------------------------------------------------------------------------------
# model
# --------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Module):
    """Bias-free linear layer: fp32 weight, cast to the activation's type at use."""

    def __init__(self, d_in: int, d_out: int, zero: bool = False) -> None:
        super().__init__()
        w = torch.zeros(d_out, d_in)
        if not zero:
            nn.init.orthogonal_(w)
        self.weight = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class PartialRope(nn.Module):
    """Rotates the first `dims` channels of each head; the others carry no position."""

    def __init__(self, dims: int, base: float, max_len: int) -> None:
        super().__init__()
        self.dims = dims
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), inv)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = x.size(1)
        cos = self.cos[None, :t, None, :].to(x.dtype)
        sin = self.sin[None, :t, None, :].to(x.dtype)
        turn, keep = x[..., : self.dims], x[..., self.dims :]
        a, b = turn.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, keep), dim=-1)


class Attention(nn.Module):
    """GQA with QK-norm, partial RoPE, exclusive self attention (XSA) and a per-head output gate."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.h, self.kv, self.hd = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.gate_width = cfg.gate_width
        self.use_xsa = layer >= cfg.num_layers - cfg.xsa_last
        self.q = Linear(cfg.model_dim, self.h * self.hd)
        self.k = Linear(cfg.model_dim, self.kv * self.hd)
        self.v = Linear(cfg.model_dim, self.kv * self.hd)
        self.proj = Linear(self.h * self.hd, cfg.model_dim, zero=True)
        self.gate = Linear(cfg.gate_width, self.h, zero=True)
        self.q_gain = nn.Parameter(torch.full((self.h,), cfg.qk_gain))
        self.rope = PartialRope(cfg.rope_dims, cfg.rope_base, max(cfg.train_seq_len, cfg.eval_seq_len))

    def exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        """Takes out of each head's output the part along the token's own value vector."""
        b, t, _, d = y.shape
        grouped = y.view(b, t, self.kv, self.h // self.kv, d)
        axis = F.normalize(v, dim=-1)[:, :, :, None, :]
        grouped = grouped - (grouped * axis).sum(-1, keepdim=True) * axis
        return grouped.reshape(b, t, self.h, d)

    def forward(self, x: Tensor, adapters: "AdapterBank | None") -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if adapters is not None:
            q = q + adapters.q[self.layer](x)
            v = v + adapters.v[self.layer](x)
        q = rms(q.view(b, t, self.h, self.hd))
        k = rms(k.view(b, t, self.kv, self.hd))
        v = v.view(b, t, self.kv, self.hd)
        q = self.rope(q) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = self.rope(k)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.use_xsa:
            y = self.exclude_self(y, v)
        gate = 2.0 * torch.sigmoid(self.gate(x[..., : self.gate_width]))
        y = y * gate[..., None]
        return self.proj(y.reshape(b, t, self.h * self.hd))


class MLP(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.slope = cfg.leaky_slope
        self.up = Linear(cfg.model_dim, cfg.mlp_mult * cfg.model_dim)
        self.down = Linear(cfg.mlp_mult * cfg.model_dim, cfg.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), self.slope).square())


class Block(nn.Module):
    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.attn = Attention(cfg, layer)
        self.mlp = MLP(cfg)
        self.mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.ln_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, adapters: "AdapterBank | None") -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.ln_scale, adapters)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.ln_scale)
        return x


class SmearGate(nn.Module):
    """Adds a gated share of the previous token's embedding. A document's first token gets nothing from before it."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.width = cfg.gate_width
        self.bos_id = cfg.bos_id
        self.gate = Linear(cfg.gate_width, 1, zero=True)
        self.amount = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        g = self.amount.to(x.dtype) * torch.sigmoid(self.gate(x[..., : self.width]))
        inside = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + g * inside * prev


class GPT(nn.Module):
    """U-net shaped decoder with tied embeddings and capped logits."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        nn.init.normal_(self.embed.weight, std=cfg.embed_std)
        self.smear = SmearGate(cfg)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        self.half = cfg.num_layers // 2
        self.skip_weight = nn.Parameter(torch.ones(cfg.num_layers - self.half, cfg.model_dim))
        self.softcap = cfg.logit_softcap

    def hidden(self, ids: Tensor, adapters: "AdapterBank | None" = None) -> Tensor:
        x = F.embedding(ids, self.embed.weight).to(torch.bfloat16)
        x = rms(self.smear(rms(x), ids))
        x0 = x
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.half and skips:
                x = x + self.skip_weight[i - self.half].to(x.dtype) * skips.pop()
            x = block(x, x0, adapters)
            if i < self.half:
                skips.append(x)
        return rms(x)

    def head(self, h: Tensor, adapters: "AdapterBank | None" = None) -> Tensor:
        logits = F.linear(h, self.embed.weight.to(h.dtype))
        if adapters is not None:
            logits = logits + adapters.head(h)
        return self.softcap * torch.tanh(logits.float() / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def token_nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


# --------------------------------------------------------------------------------------------------------------------
# per-document adapters
# --------------------------------------------------------------------------------------------------------------------


class RowLoRA(nn.Module):
    """One low-rank update per row of the batch: row i sees only its own A_i, B_i."""

    def __init__(self, rows: int, d_in: int, d_out: int, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(seed)
        bound = 1.0 / math.sqrt(d_in)
        start = (torch.rand(rank, d_in, generator=gen) * 2 - 1) * bound
        self.register_buffer("start", start, persistent=False)
        self.scale = alpha / rank
        self.a = nn.Parameter(start.expand(rows, rank, d_in).clone())
        self.b = nn.Parameter(torch.zeros(rows, d_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        a = self.a[:n].to(x.dtype)
        b = self.b[:n].to(x.dtype)
        return torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2)) * self.scale

    @torch.no_grad()
    def reset(self) -> None:
        self.a.copy_(self.start.expand_as(self.a))
        self.b.zero_()


class AdapterBank(nn.Module):
    """LoRA on q and v of every layer and on the head, with its own optimiser; `reset` before every batch of documents."""

    def __init__(self, cfg: Config, rows: int) -> None:
        super().__init__()
        d, kvd = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        r, al = cfg.lora_rank, cfg.lora_alpha
        self.q = nn.ModuleList(RowLoRA(rows, d, d, r, al, 3 * i) for i in range(cfg.num_layers))
        self.v = nn.ModuleList(RowLoRA(rows, d, kvd, r, al, 3 * i + 1) for i in range(cfg.num_layers))
        self.head = RowLoRA(rows, d, cfg.vocab_size, r, al, 7919)
        self.cfg = cfg
        self.optimizer: torch.optim.Optimizer | None = None

    def reset(self) -> None:
        for module in self.modules():
            if isinstance(module, RowLoRA):
                module.reset()
        self.optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.cfg.lora_lr,
            betas=(0.0, self.cfg.lora_beta2),
            weight_decay=self.cfg.lora_wd,
            fused=True,
        )

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


# --------------------------------------------------------------------------------------------------------------------
# optimisers
# --------------------------------------------------------------------------------------------------------------------


@torch.compile(dynamic=False)
def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """Newton-Schulz, quintic; the usual coefficients."""
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
    """Matrices are dealt out to the ranks; each orthogonalises its share and the updates are summed."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, ns_steps: int, wd: float, world: World):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, wd=wd))
        self.world = world

    @torch.no_grad()
    def step(self, closure=None):  # noqa: ANN001, ANN201
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, dtype=torch.bfloat16, device=params[0].device)
            at = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.lerp_(p.grad, 1 - group["momentum"])
                    g = p.grad.lerp(buf, group["momentum"])
                    u = orthogonalize(g, group["ns_steps"])
                    u = u * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = u.flatten()
                at += p.numel()
            self.world.sum_(flat)
            at = 0
            for p in params:
                p.mul_(1 - group["lr"] * group["wd"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


class Optimizers:
    """Muon for block matrices, AdamW for the embedding, Adam for gates and scales; one schedule for all."""

    def __init__(self, cfg: Config, model: GPT, world: World) -> None:
        matrices, small = [], []
        for name, p in model.named_parameters():
            if name == "embed.weight":
                continue
            big = p.ndim == 2 and name.startswith("blocks.") and min(p.shape) >= 64
            (matrices if big else small).append(p)
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        self.cfg = cfg
        self.muon = Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_ns_steps, cfg.muon_wd, world)
        self.embed = torch.optim.AdamW(
            [model.embed.weight], lr=cfg.embed_lr, betas=betas, weight_decay=cfg.embed_wd, fused=True
        )
        self.small = torch.optim.AdamW(small, lr=cfg.scalar_lr, betas=betas, weight_decay=0.0, fused=True)
        self.all = [self.muon, self.embed, self.small]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def set(self, step: int, lr_scale: float) -> None:
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
        warm = min(step / max(self.cfg.muon_momentum_warmup, 1), 1.0)
        lo, hi = self.cfg.muon_momentum_start, self.cfg.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = lo + (hi - lo) * warm

    def step(self) -> None:
        for opt in self.all:
            opt.step()

    def zero_grad(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def state(self) -> list[dict]:
        return [copy.deepcopy(opt.state_dict()) for opt in self.all]

    def restore(self, saved: list[dict]) -> None:
        for opt, state in zip(self.all, saved):
            opt.load_state_dict(state)


class EMA:
    """Exponential average of all weights, in fp32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone().float() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.shadow[k].lerp_(v.detach().float(), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            v.copy_(self.shadow[k].to(v.dtype))


# --------------------------------------------------------------------------------------------------------------------
# quantisation
# --------------------------------------------------------------------------------------------------------------------


def quantised_layers(model: GPT) -> dict[str, Linear]:
    """The matrices that GPTQ handles, by parameter name."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.startswith("blocks.") and min(module.weight.shape) >= 64:
            out[name + ".weight"] = module
    return out


def bits_for(name: str, cfg: Config) -> int:
    return cfg.mlp_bits if ".mlp." in name else cfg.attn_bits


@torch.no_grad()
def collect_hessians(cfg: Config, world: World, model: GPT, stream: TrainStream) -> dict[str, Tensor]:
    """Sum of x x^T at the input of each quantised matrix, over a few batches of the training stream."""
    layers = quantised_layers(model)
    hessians = {
        name: torch.zeros(m.weight.size(1), m.weight.size(1), device=world.device) for name, m in layers.items()
    }
    handles = []
    for name, module in layers.items():

        def hook(_module, inputs, _output, name=name):  # noqa: ANN001, ANN202
            x = inputs[0].detach().flatten(0, 1).float()
            hessians[name].addmm_(x.T, x)

        handles.append(module.register_forward_hook(hook))
    model.eval()
    for _ in range(cfg.calib_batches):
        x, _ = stream.batch(cfg.calib_rows, cfg.train_seq_len)
        model.hidden(x)
    for handle in handles:
        handle.remove()
    rows = cfg.calib_batches * cfg.calib_rows * cfg.train_seq_len * world.size
    for h in hessians.values():
        world.sum_(h)
        h.div_(rows)
    return hessians


def search_scale(w: Tensor, qmax: int) -> Tensor:
    """Per row of a group: the scale with the least squared rounding error over a few clipping ratios."""
    peak = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    best = peak / qmax
    best_err = torch.full_like(peak, float("inf"))
    for ratio in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        scale = (ratio * peak / qmax).half().float().clamp_min(1e-7)
        err = (w - (w / scale).round().clamp(-qmax, qmax) * scale).square().sum(dim=1, keepdim=True)
        better = err < best_err
        best = torch.where(better, scale, best)
        best_err = torch.where(better, err, best_err)
    return best


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, bits: int, group: int, damp: float) -> tuple[Tensor, Tensor]:
    """GPTQ with one symmetric scale per row and group of columns; returns int8 codes and fp16 scales."""
    w = weight.detach().float().clone()
    h = hessian.float().clone()
    rows, cols = w.shape
    qmax = 2 ** (bits - 1) - 1
    dead = torch.diagonal(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(damp * torch.diagonal(h).mean())
    inv = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inv, upper=True)
    codes = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    scales = torch.zeros(rows, cols // group, device=w.device)
    for g0 in range(0, cols, group):
        g1 = g0 + group
        scale = search_scale(w[:, g0:g1], qmax)
        scales[:, g0 // group] = scale[:, 0]
        errors = torch.zeros(rows, group, device=w.device)
        for j in range(g0, g1):
            q = (w[:, j : j + 1] / scale).round().clamp(-qmax, qmax)
            codes[:, j] = q[:, 0].to(torch.int8)
            err = (w[:, j : j + 1] - q * scale) / upper[j, j]
            w[:, j + 1 : g1] -= err * upper[j : j + 1, j + 1 : g1]
            errors[:, j - g0 : j - g0 + 1] = err
        w[:, g1:] -= errors @ upper[g0:g1, g1:]
    return codes, scales.half()


@torch.no_grad()
def round_to_nearest(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Group-wise rounding on the weights alone (the embedding)."""
    w = weight.detach().float()
    rows, cols = w.shape
    qmax = 2 ** (bits - 1) - 1
    parts = w.view(rows * (cols // group), group)
    scale = search_scale(parts, qmax)
    codes = (parts / scale).round().clamp(-qmax, qmax).to(torch.int8)
    return codes.view(rows, cols), scale.view(rows, cols // group).half()


def pack_bits(codes: np.ndarray, bits: int) -> bytes:
    """Signed codes as an unbroken string of `bits`-bit fields."""
    u = (codes.reshape(-1).astype(np.int16) + 2 ** (bits - 1) - 1).astype(np.uint8)
    fields_ = (u[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(fields_.reshape(-1)).tobytes()


def unpack_bits(raw: bytes, bits: int, count: int) -> np.ndarray:
    flat = np.unpackbits(np.frombuffer(raw, dtype=np.uint8))[: count * bits].reshape(count, bits)
    u = (flat.astype(np.int16) << np.arange(bits, dtype=np.int16)).sum(axis=1)
    return (u - (2 ** (bits - 1) - 1)).astype(np.int8)


def quantise_model(cfg: Config, world: World, model: GPT, hessians: dict[str, Tensor]) -> dict[str, dict]:
    """All tensors in stored form. Ranks share the GPTQ work and exchange the results."""
    layers = quantised_layers(model)
    mine: dict[str, dict] = {}
    for i, (name, module) in enumerate(layers.items()):
        if i % world.size != world.rank:
            continue
        bits = bits_for(name, cfg)
        codes, scales = gptq(module.weight, hessians[name], bits, cfg.group_size, cfg.gptq_damp)
        mine[name] = dict(bits=bits, codes=codes.cpu().numpy(), scales=scales.cpu().numpy())
    stored: dict[str, dict] = {}
    for part in world.gather(mine):
        stored.update(part)
    codes, scales = round_to_nearest(model.embed.weight, cfg.embed_bits, cfg.group_size)
    stored["embed.weight"] = dict(bits=cfg.embed_bits, codes=codes.cpu().numpy(), scales=scales.cpu().numpy())
    for name, p in model.state_dict().items():
        if name not in stored:
            stored[name] = dict(bits=16, raw=p.detach().half().cpu().numpy())
    return stored


# --------------------------------------------------------------------------------------------------------------------
# artifact
# --------------------------------------------------------------------------------------------------------------------


def serialise(stored: dict[str, dict]) -> bytes:
    """Header (json) and payload; scales and codes are kept apart so that the compressor sees like beside like."""
    entries, small, large = [], io.BytesIO(), io.BytesIO()
    for name in sorted(stored):
        item = stored[name]
        if item["bits"] == 16:
            entries.append(dict(name=name, bits=16, shape=list(item["raw"].shape)))
            small.write(item["raw"].tobytes())
        else:
            packed = pack_bits(item["codes"], item["bits"])
            entries.append(
                dict(
                    name=name,
                    bits=item["bits"],
                    shape=list(item["codes"].shape),
                    scales=list(item["scales"].shape),
                    packed=len(packed),
                )
            )
            small.write(item["scales"].tobytes())
            large.write(packed)
    header = json.dumps(entries, separators=(",", ":")).encode()
    return struct.pack("<II", len(header), small.tell()) + header + small.getvalue() + large.getvalue()


def compress(raw: bytes) -> bytes:
    """The smaller of lzma and brotli; the first byte says which."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24, "lc": 0, "pb": 0}]
    best = b"L" + lzma.compress(raw, format=lzma.FORMAT_XZ, filters=filters)
    if brotli is not None:
        other = b"B" + brotli.compress(raw, quality=11, lgwin=24)
        best = min(best, other, key=len)
    return best


def decompress(blob: bytes) -> bytes:
    if blob[:1] == b"L":
        return lzma.decompress(blob[1:])
    if blob[:1] == b"B":
        return brotli.decompress(blob[1:])
    raise ValueError("unknown codec")


def deserialise(raw: bytes) -> dict[str, Tensor]:
    header_len, small_len = struct.unpack_from("<II", raw)
    at = 8
    entries = json.loads(raw[at : at + header_len])
    at += header_len
    small, large = at, at + small_len
    state: dict[str, Tensor] = {}
    for e in entries:
        count = int(np.prod(e["shape"])) if e["shape"] else 1
        if e["bits"] == 16:
            values = np.frombuffer(raw, dtype=np.float16, count=count, offset=small)
            small += count * 2
            state[e["name"]] = torch.from_numpy(values.astype(np.float32)).view(e["shape"])
            continue
        rows, cols = e["shape"]
        groups = e["scales"][1]
        scales = np.frombuffer(raw, dtype=np.float16, count=rows * groups, offset=small).astype(np.float32)
        small += rows * groups * 2
        codes = unpack_bits(raw[large : large + e["packed"]], e["bits"], count).astype(np.float32)
        large += e["packed"]
        w = codes.reshape(rows, groups, cols // groups) * scales.reshape(rows, groups, 1)
        state[e["name"]] = torch.from_numpy(w.reshape(rows, cols))
    return state


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def write_artifact(cfg: Config, log: Log, stored: dict[str, dict]) -> int:
    """Writes the compressed model; returns code plus artifact in bytes."""
    raw = serialise(stored)
    blob = compress(raw)
    cfg.artifact_path.write_bytes(blob)
    artifact = cfg.artifact_path.stat().st_size
    code = code_bytes()
    total = artifact + code
    log(f"artifact: raw {len(raw)} bytes, compressed ({blob[:1].decode()}) {artifact} bytes")
    log(f"Code size: {code} bytes")
    log(f"Total submission size: {total} bytes (limit {cfg.size_limit})")
    if total > cfg.size_limit:
        raise RuntimeError(f"submission too large: {total}")
    return total


def read_artifact(cfg: Config, world: World) -> GPT:
    """A fresh model that holds exactly what the file holds."""
    state = deserialise(decompress(cfg.artifact_path.read_bytes()))
    model = GPT(cfg)
    model.load_state_dict(state, strict=True)
    return model.to(world.device)


# --------------------------------------------------------------------------------------------------------------------
# evaluation without adaptation
# --------------------------------------------------------------------------------------------------------------------


def gather_rows(source: Tensor, starts: list[int], lengths: list[int], width: int) -> Tensor:
    """Rows source[s : s + n], right-padded with zeros to the given width."""
    out = torch.zeros(len(starts), width, dtype=source.dtype)
    for i, (s, n) in enumerate(zip(starts, lengths)):
        out[i, :n] = source[s : s + n]
    return out


@torch.no_grad()
def eval_blocks(cfg: Config, world: World, model: GPT, val: ValSet) -> Score:
    """Consecutive blocks of eval_seq_len targets; the last may be shorter. A quick look, never the reported number."""
    model.eval()
    tally = Tally(world.device)
    length = cfg.eval_seq_len
    starts = list(range(0, val.num_targets, length))[world.rank :: world.size]
    for i in range(0, len(starts), cfg.eval_rows):
        at = starts[i : i + cfg.eval_rows]
        sizes = [min(length, val.num_targets - s) for s in at]
        x = gather_rows(val.tokens, at, sizes, length).to(world.device)
        y = gather_rows(val.tokens, [s + 1 for s in at], sizes, length).to(world.device)
        nbytes = gather_rows(val.nbytes, [s + 1 for s in at], sizes, length).to(world.device)
        mask = torch.arange(length)[None, :] < torch.tensor(sizes)[:, None]
        tally.add(model.token_nll(x, y), nbytes, mask.to(world.device))
    return tally.reduce(world)


def sliding_spans(total: int, seq_len: int, stride: int) -> list[tuple[int, int]]:
    """(first, end) of the targets that each window scores: seq_len at first, then stride by stride; no overlap."""
    spans = [(0, min(seq_len, total))]
    while spans[-1][1] < total:
        first = spans[-1][1]
        spans.append((first, min(first + stride, total)))
    return spans


@torch.no_grad()
def eval_sliding(cfg: Config, world: World, model: GPT, val: ValSet) -> Score:
    """Every target once, with up to eval_seq_len tokens of context. Reported when the TTT is switched off."""
    model.eval()
    tally = Tally(world.device)
    length = cfg.eval_seq_len
    spans = sliding_spans(val.num_targets, length, cfg.eval_stride)[world.rank :: world.size]
    for i in range(0, len(spans), cfg.eval_rows):
        part = spans[i : i + cfg.eval_rows]
        begin = [max(0, end - length) for _, end in part]
        sizes = [end - b for (_, end), b in zip(part, begin)]
        x = gather_rows(val.tokens, begin, sizes, length).to(world.device)
        y = gather_rows(val.tokens, [b + 1 for b in begin], sizes, length).to(world.device)
        nbytes = gather_rows(val.nbytes, [b + 1 for b in begin], sizes, length).to(world.device)
        place = torch.arange(length)[None, :]
        fresh = torch.tensor([first - b for (first, _), b in zip(part, begin)])[:, None]
        mask = (place >= fresh) & (place < torch.tensor(sizes)[:, None])
        tally.add(model.token_nll(x, y), nbytes, mask.to(world.device))
    return tally.reduce(world)


# --------------------------------------------------------------------------------------------------------------------
# copy hints
# --------------------------------------------------------------------------------------------------------------------


class CopyHints:
    """What followed the same two tokens the last time in this document; more trust the more often it held."""

    def __init__(self, cfg: Config) -> None:
        self.enabled = cfg.hints_enabled
        self.betas = cfg.hint_betas

    def for_document(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hint and strength for each target tokens[1:], from the tokens before it."""
        n = len(tokens) - 1
        hint = np.zeros(n, dtype=np.int64)
        beta = np.zeros(n, dtype=np.float32)
        if not self.enabled:
            return hint, beta
        table: dict[tuple[int, int], tuple[int, int]] = {}
        ids = tokens.tolist()
        for i in range(2, n + 1):
            key = (ids[i - 2], ids[i - 1])
            guess = table.get(key)
            if guess is not None:
                hint[i - 1] = guess[0]
                beta[i - 1] = self.betas[min(guess[1], len(self.betas)) - 1]
            actual = ids[i]
            if guess is not None and guess[0] == actual:
                table[key] = (actual, guess[1] + 1)
            else:
                table[key] = (actual, 1)
        return hint, beta


def tilted_nll(logits: Tensor, targets: Tensor, hint: Tensor, beta: Tensor) -> Tensor:
    """-log of p(a) e^(beta [a = hint]) / Z at the target; Z = 1 + p(hint) (e^beta - 1) sums over the vocabulary."""
    logp = F.log_softmax(logits.float(), dim=-1)
    own = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    p_hint = logp.gather(-1, hint.unsqueeze(-1)).squeeze(-1).exp()
    log_z = torch.log1p(p_hint * torch.expm1(beta))
    return log_z - own - beta * (hint == targets).to(own.dtype)


# --------------------------------------------------------------------------------------------------------------------
# phased test-time training
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """The tensors of one chunk of a batch of documents; row i belongs to document i of the live ones."""

    x: Tensor  # tokens of the window, right-padded
    index: Tensor  # positions of the chunk inside the window
    y: Tensor  # targets of the chunk
    nbytes: Tensor
    hint: Tensor
    beta: Tensor
    mask: Tensor  # which of the chunk's places exist
    more: Tensor  # rows whose document goes on after this chunk


class PhasedTTT:
    """Documents in stream order, in phases. Score with per-document LoRA; at the end of a phase train the base on it."""

    def __init__(self, cfg: Config, world: World, log: Log, model: GPT, val: ValSet, clock: Clock) -> None:
        self.cfg, self.world, self.log, self.val, self.clock = cfg, world, log, val, clock
        self.model = model
        self.hidden = torch.compile(model.hidden, dynamic=True) if cfg.compile else model.hidden
        self.loss = torch.compile(model.token_nll, dynamic=True) if cfg.compile else model.token_nll
        self.adapters = AdapterBank(cfg, cfg.lora_batch_docs).to(world.device)
        self.hints = CopyHints(cfg)
        self.tally = Tally(world.device)
        self.sgd = torch.optim.SGD(model.parameters(), lr=cfg.global_lr, momentum=cfg.global_momentum)

    # ---- the plan

    def phases(self, docs: list[Document]) -> list[list[Document]]:
        cuts = [0] + [round(f * len(docs)) for f in self.cfg.phase_fracs]
        return [docs[a:b] for a, b in zip(cuts[:-1], cuts[1:]) if b > a]

    def my_batches(self, docs: list[Document]) -> list[list[Document]]:
        size = self.cfg.lora_batch_docs
        batches = [docs[i : i + size] for i in range(0, len(docs), size)]
        return batches[self.world.rank :: self.world.size]

    def run(self) -> Score:
        docs = self.val.documents()
        groups = self.phases(docs)
        self.log(f"ttt: {len(docs)} documents, {self.val.num_targets} targets, phases {[len(g) for g in groups]}")
        self.warm_up()
        for number, group in enumerate(groups):
            self.score_phase(group)
            self.world.barrier()
            last = number == len(groups) - 1
            self.log(f"ttt: phase {number + 1}/{len(groups)} scored at {self.clock():.1f}s")
            if not last:
                self.train_base(group)
                self.log(f"ttt: base weights trained on phase {number + 1}, {self.clock():.1f}s")
        return self.tally.reduce(self.world)

    def warm_up(self) -> None:
        """Compiles forward and backward on random tokens; the adapters are reset before the first document."""
        cfg = self.cfg
        self.model.requires_grad_(False)
        for rows, width in ((cfg.lora_batch_docs, 64), (cfg.lora_batch_docs // 2, 512), (8, cfg.eval_seq_len)):
            self.adapters.reset()
            x = torch.randint(0, cfg.vocab_size, (rows, width), device=self.world.device)
            h = self.hidden(x, self.adapters)[:, -cfg.lora_chunk :]
            logits = self.model.head(h, self.adapters)
            y = torch.randint(0, cfg.vocab_size, h.shape[:2], device=self.world.device)
            self.adapters.step(F.cross_entropy(logits.flatten(0, 1), y.flatten()))
        self.adapters.reset()
        self.log(f"ttt: compiled at {self.clock():.1f}s")

    # ---- scoring with per-document LoRA

    def score_phase(self, docs: list[Document]) -> None:
        self.model.requires_grad_(False)
        self.model.eval()
        for batch in self.my_batches(docs):
            self.adapters.reset()
            self.score_batch(batch)

    def score_batch(self, batch: list[Document]) -> None:
        # rows by length, so that finished documents fall off the end; rows do not see one another
        docs = sorted(batch, key=lambda d: -d.targets)
        hints = [self.hints.for_document(self.val.tokens_np[d.start : d.start + d.length]) for d in docs]
        chunk = self.cfg.lora_chunk
        for ci in range(math.ceil(docs[0].targets / chunk)):
            live = sum(1 for d in docs if d.targets > ci * chunk)
            win = self.window(docs[:live], hints[:live], ci)
            adapt = bool(win.more.any()) and self.clock() < self.cfg.eval_adapt_until_s
            with torch.set_grad_enabled(adapt):
                logits = self.chunk_logits(win)
                nll = F.cross_entropy(logits.flatten(0, 1), win.y.flatten(), reduction="none").view_as(win.y)
            with torch.no_grad():
                scored = tilted_nll(logits.detach(), win.y, win.hint, win.beta)
                self.tally.add(scored, win.nbytes, win.mask)
            if adapt:
                self.adapters.step(self.row_loss(nll, win))

    def chunk_logits(self, win: Window) -> Tensor:
        h = self.hidden(win.x, self.adapters)
        h = h.gather(1, win.index.unsqueeze(-1).expand(-1, -1, h.size(-1)))
        return self.model.head(h, self.adapters)

    @staticmethod
    def row_loss(nll: Tensor, win: Window) -> Tensor:
        """Mean over each row's chunk, summed over rows: a row's gradient does not depend on its neighbours."""
        weight = win.mask.to(nll.dtype)
        per_row = (nll * weight).sum(1) / weight.sum(1).clamp_min(1.0)
        return (per_row * win.more.to(nll.dtype)).sum()

    def window(self, docs: list[Document], hints: list[tuple[np.ndarray, np.ndarray]], ci: int) -> Window:
        chunk, length = self.cfg.lora_chunk, self.cfg.eval_seq_len
        first = ci * chunk
        n = len(docs)
        ends = [min(d.targets, first + chunk) for d in docs]
        begins = [max(0, end - length) for end in ends]
        sizes = [end - begin for begin, end in zip(begins, ends)]
        counts = [end - first for end in ends]
        x = gather_rows(self.val.tokens, [d.start + b for d, b in zip(docs, begins)], sizes, max(sizes))
        at = [d.start + first + 1 for d in docs]
        y = gather_rows(self.val.tokens, at, counts, chunk)
        nbytes = gather_rows(self.val.nbytes, at, counts, chunk)
        hint = torch.zeros(n, chunk, dtype=torch.int64)
        beta = torch.zeros(n, chunk)
        for i, (h, b) in enumerate(hints):
            hint[i, : counts[i]] = torch.from_numpy(h[first : ends[i]])
            beta[i, : counts[i]] = torch.from_numpy(b[first : ends[i]])
        place = torch.arange(chunk)[None, :]
        offset = torch.tensor([first - b for b in begins])[:, None]
        index = (place + offset).clamp_max(max(sizes) - 1)
        mask = place < torch.tensor(counts)[:, None]
        more = torch.tensor([d.targets > first + chunk for d in docs])
        parts = (x, index, y, nbytes, hint, beta, mask, more)
        return Window(*(t.to(self.world.device, non_blocking=True) for t in parts))

    # ---- training of the base weights between phases

    def train_base(self, docs: list[Document]) -> None:
        """One epoch of SGD over the span of the documents just scored, in blocks, gradients summed over the ranks."""
        cfg, world = self.cfg, self.world
        self.model.requires_grad_(True)
        self.model.train()
        begin = docs[0].start
        targets = sum(d.targets for d in docs)
        length = cfg.eval_seq_len
        starts = list(range(0, targets, length))
        mine = starts[world.rank :: world.size]
        steps = math.ceil(len(starts) / (world.size * cfg.global_rows))
        for step in range(steps):
            if world.any(self.clock() > cfg.eval_adapt_until_s):
                break
            scale = 0.5 * (1.0 + math.cos(math.pi * step / steps))
            for group in self.sgd.param_groups:
                group["lr"] = cfg.global_lr * scale
            self.sgd.zero_grad(set_to_none=False)
            at = mine[step * cfg.global_rows : (step + 1) * cfg.global_rows]
            count = self.accumulate(begin, at, targets) if at else 0.0
            self.apply(count)
        self.sgd.zero_grad(set_to_none=True)
        self.model.requires_grad_(False)
        self.model.eval()

    def accumulate(self, begin: int, starts: list[int], targets: int) -> float:
        length, dev = self.cfg.eval_seq_len, self.world.device
        sizes = [min(length, targets - s) for s in starts]
        x = gather_rows(self.val.tokens, [begin + s for s in starts], sizes, length).to(dev)
        y = gather_rows(self.val.tokens, [begin + s + 1 for s in starts], sizes, length).to(dev)
        mask = (torch.arange(length)[None, :] < torch.tensor(sizes)[:, None]).to(dev)
        (self.loss(x, y) * mask).sum().backward()
        return float(sum(sizes))

    def apply(self, count: float) -> None:
        """Means over all ranks' targets, clips, steps."""
        params = list(self.model.parameters())
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.world.sum_(p.grad)
        total = self.world.sum_(torch.tensor([count], dtype=torch.float64, device=self.world.device))
        inv = 1.0 / max(float(total.item()), 1.0)
        for p in params:
            p.grad.mul_(inv)
        torch.nn.utils.clip_grad_norm_(params, self.cfg.global_clip)
        self.sgd.step()


# --------------------------------------------------------------------------------------------------------------------
# training
# --------------------------------------------------------------------------------------------------------------------


def lr_scale(cfg: Config, elapsed: float, budget: float) -> float:
    progress = min(elapsed / budget, 1.0)
    if progress < 1.0 - cfg.warmdown_frac:
        return 1.0
    return max(cfg.lr_floor, (1.0 - progress) / cfg.warmdown_frac)


def prime_compiler(cfg: Config, world: World, model: GPT, step_fn, optimizers: Optimizers) -> None:  # noqa: ANN001
    """A few steps on random tokens so that compilation is not on the clock; everything is put back afterwards."""
    weights = copy.deepcopy(model.state_dict())
    states = optimizers.state()
    rows = cfg.train_batch_tokens // (cfg.train_seq_len * 8)
    for _ in range(cfg.warmup_compile_steps):
        ids = torch.randint(0, cfg.vocab_size, (rows, cfg.train_seq_len + 1), device=world.device)
        step_fn(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        for p in model.parameters():
            if p.grad is not None:
                world.sum_(p.grad)
        optimizers.step()
        optimizers.zero_grad()
    model.load_state_dict(weights)
    optimizers.restore(states)


def train(cfg: Config, world: World, log: Log, model: GPT, stream: TrainStream, val: ValSet) -> tuple[EMA, Clock]:
    """Trains until cap minus reserve. Returns the average and the running clock, which the artifact still has to meet."""
    optimizers = Optimizers(cfg, model, world)
    step_fn = torch.compile(model, dynamic=False) if cfg.compile else model
    model.train()
    prime_compiler(cfg, world, model, step_fn, optimizers)
    accum = max(1, 8 // world.size)
    rows = cfg.train_batch_tokens // (cfg.train_seq_len * world.size * accum)
    budget = cfg.train_cap_s - cfg.artifact_reserve_s
    ema = EMA(model, cfg.ema_decay)
    world.barrier()
    clock = Clock()
    step = 0
    while step < cfg.max_steps:
        elapsed = clock()
        if world.any(elapsed >= budget):
            log(f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{step}/{cfg.max_steps}")
            break
        if cfg.val_every and step and step % cfg.val_every == 0:
            t0 = time.perf_counter()
            score = eval_blocks(cfg, world, model, val)
            log(f"step:{step}/{cfg.max_steps} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}")
            model.train()
            clock.skip(time.perf_counter() - t0)
        optimizers.set(step, lr_scale(cfg, elapsed, budget))
        loss_sum = torch.zeros((), device=world.device)
        for _ in range(accum):
            x, y = stream.batch(rows, cfg.train_seq_len)
            loss = step_fn(x, y)
            (loss / (accum * world.size)).backward()
            loss_sum += loss.detach() / accum
        for p in model.parameters():
            if p.grad is not None:
                world.sum_(p.grad)
        if cfg.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizers.step()
        optimizers.zero_grad()
        ema.update(model)
        step += 1
        if step % cfg.log_every == 0 or step <= 5:
            mean = world.sum_(loss_sum) / world.size
            now = clock()
            log(f"step:{step}/{cfg.max_steps} train_loss:{mean.item():.4f} train_time:{now:.1f}s avg:{1000 * now / step:.2f}ms")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    return ema, clock


def build_artifact(
    cfg: Config, world: World, log: Log, model: GPT, ema: EMA, stream: TrainStream, clock: Clock
) -> None:
    """EMA weights, Hessians from the training stream, GPTQ, file. All of it on the training clock."""
    ema.copy_to(model)
    hessians = collect_hessians(cfg, world, model, stream)
    log(f"gptq: {len(hessians)} Hessians from training batches at {clock():.1f}s")
    stored = quantise_model(cfg, world, model, hessians)
    log(f"gptq: quantised at {clock():.1f}s")
    if world.main:
        write_artifact(cfg, log, stored)
    world.barrier()
    finished = clock()
    log(f"train+gptq+artifact: {finished:.1f}s of {cfg.train_cap_s:.0f}s")
    if finished > cfg.train_cap_s:
        raise RuntimeError("the artifact was not ready within the training cap")


# --------------------------------------------------------------------------------------------------------------------
# evaluation of the artifact
# --------------------------------------------------------------------------------------------------------------------


def report(log: Log, name: str, score: Score, val: ValSet, seconds: float) -> None:
    log(f"{name} val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} eval_time:{1000 * seconds:.0f}ms")
    log(f"{name} tokens:{score.tokens}/{val.num_targets} bytes:{score.nbytes}/{val.total_bytes}")


def evaluate(cfg: Config, world: World, log: Log, val: ValSet) -> Score:
    """Scores what the artifact holds. The clock runs from reading the file to the number."""
    clock = Clock()
    model = read_artifact(cfg, world)
    world.broadcast_model(model)
    quick = eval_blocks(cfg, world, model, val)
    report(log, "quantized_blocks", quick, val, clock())
    if cfg.ttt_enabled:
        name = "quantized_ttt_phased"
        score = PhasedTTT(cfg, world, log, model, val, clock).run()
    else:
        name = "quantized_sliding"
        score = eval_sliding(cfg, world, model, val)
    seconds = clock()
    report(log, name, score, val, seconds)
    log(f"eval total: {seconds:.1f}s of {cfg.eval_cap_s:.0f}s")
    return score


def main() -> None:
    cfg = load_config()
    world = World()
    cfg.run_id = cfg.run_id or f"rousay_{cfg.seed}_{uuid.uuid4().hex[:8]}"
    log = Log(world, cfg.run_id, cfg.out_dir)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version.split()[0]}, PyTorch {torch.__version__}, world_size:{world.size}")
    log(json.dumps(asdict(cfg)), console=False)
    seed_everything(cfg.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_float32_matmul_precision("high")

    val = ValSet(cfg)
    log(f"val: {val.num_targets} targets, {val.total_bytes} bytes of original text")
    stream = TrainStream(cfg, world)
    log(f"train: {len(stream.files)} shards")

    model = GPT(cfg).to(world.device)
    world.broadcast_model(model)
    log(f"model_params:{sum(p.numel() for p in model.parameters())} seed:{cfg.seed}")

    ema, clock = train(cfg, world, log, model, stream, val)
    build_artifact(cfg, world, log, model, ema, stream, clock)
    if cfg.diag_prequant:
        log(f"diagnostic pre-quantisation ema val_bpb:{eval_blocks(cfg, world, model, val).bpb:.6f}")
    del model, ema
    torch.cuda.empty_cache()

    score = evaluate(cfg, world, log, val)
    log(f"final val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} seed:{cfg.seed}")
    world.close()


if __name__ == "__main__":
    main()
