"""gigha: 12x512 transformer, Hadamard-rotated int5/int4 GPTQ, causal n-gram backoff mixed in at evaluation.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

The run has three legs, each with its own clock:

  1. Trainer      Muon + Adam until `train_cap_s - reserve_s`, then Hessians and the mixing gate, from training shards only
  2. Packer       Codec (rotate, GPTQ, int5/int4/int8), lzma, size check, read back into a fresh model
  3. Evaluator    one left-to-right pass over the validation shards in chunks: score the chunk, and only then count it
                  into the n-gram tables and take one SGD step of the gain vectors on it

Token ids are used as they are everywhere. No folding of case, no merging of ids, no cleaning: the n-gram contexts and the
byte counts see exactly the ids that the transformer sees.
"""

from __future__ import annotations

import copy
import glob
import io
import lzma
import math
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SIZE_LIMIT = 16_000_000
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings; each may be overridden by the environment variable of its upper-cased name."""

    # data
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    train_pattern: str = "fineweb_train_*.bin"
    val_pattern: str = "fineweb_val_*.bin"
    run_id: str = ""
    seed: int = 1337

    # model
    vocab_size: int = 1024
    num_layers: int = 12
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_hidden: int = 1536
    rope_base: float = 10000.0
    rope_dims: int = 32
    logit_softcap: float = 30.0
    qk_gain_init: float = 1.5
    embed_init_std: float = 0.005

    # training
    iterations: int = 20000
    train_batch_tokens: int = 786_432
    train_seq_len: int = 2048
    warmup_steps: int = 20
    warmdown_iters: int = 3500
    train_cap_s: float = 600.0
    reserve_s: float = 34.0
    val_every: int = 4000
    log_every: int = 200
    ema_decay: float = 0.997
    ema_start: int = 500

    # optimizers
    matrix_lr: float = 0.025
    embed_lr: float = 0.035
    scalar_lr: float = 0.025
    muon_momentum: float = 0.99
    muon_momentum_start: float = 0.92
    muon_momentum_steps: int = 1500
    muon_ns_steps: int = 5
    muon_weight_decay: float = 0.04
    adam_weight_decay: float = 0.04
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.3

    # quantisation
    attn_bits: int = 5
    mlp_bits: int = 4
    embed_bits: int = 8
    group_size: int = 128
    gptq_block: int = 128
    gptq_damp: float = 0.01
    calib_batches: int = 12
    calib_seqs: int = 8
    clip_grid: int = 6
    artifact: str = "final_model.ptz"

    # n-gram tables
    ngram_max_order: int = 5
    ngram_bucket_bits: int = 17
    ngram_discount: float = 0.75
    ngram_alpha: float = 0.5

    # mixing gate (its three coefficients are fitted on training text)
    gate_tokens: int = 524_288
    gate_steps: int = 60
    gate_lr: float = 0.1

    # evaluation
    eval_seq_len: int = 2048
    eval_stride: int = 64
    eval_batch: int = 64
    eval_chunk: int = 131_072
    eval_cap_s: float = 600.0
    eval_guard_s: float = 560.0
    adapt: bool = True
    adapt_lr: float = 0.002
    adapt_momentum: float = 0.9
    adapt_seqs: int = 8

    @classmethod
    def from_env(cls) -> Config:
        chosen: dict[str, object] = {}
        for item in fields(cls):
            raw = os.environ.get(item.name.upper())
            if raw is None:
                continue
            kind = type(item.default)
            chosen[item.name] = bool(int(raw)) if kind is bool else kind(raw)
        return cls(**chosen)  # type: ignore[arg-type]

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, self.train_pattern)

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, self.val_pattern)

    def check(self) -> None:
        if self.model_dim % self.num_heads:
            raise ValueError("model_dim must be divisible by num_heads")
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        if self.eval_chunk % self.eval_stride:
            raise ValueError("eval_chunk must be a multiple of eval_stride")
        if self.ngram_max_order < 2:
            raise ValueError("ngram_max_order must be at least 2")


@dataclass
class Runtime:
    """Where this process stands among its peers, and its log."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    log_path: Path | None = None

    @classmethod
    def start(cls, cfg: Config) -> Runtime:
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        world = int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if "RANK" in os.environ:
            dist.init_process_group(backend="nccl", device_id=device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        runtime = cls(rank, local_rank, world, device)
        if rank == 0:
            os.makedirs("logs", exist_ok=True)
            runtime.log_path = Path("logs") / f"{cfg.run_id or uuid.uuid4()}.txt"
        return runtime

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def grouped(self) -> bool:
        return dist.is_available() and dist.is_initialized()

    def say(self, text: str, console: bool = True) -> None:
        if not self.main:
            return
        if console:
            print(text, flush=True)
        if self.log_path is not None:
            with self.log_path.open("a", encoding="utf-8") as file:
                print(text, file=file)

    def barrier(self) -> None:
        if self.grouped:
            dist.barrier()

    def total(self, tensor: Tensor) -> Tensor:
        if self.grouped:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        if self.grouped:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        return tensor

    def from_main(self, tensor: Tensor) -> Tensor:
        if self.grouped:
            dist.broadcast(tensor, src=0)
        return tensor

    def close(self) -> None:
        if self.grouped:
            dist.destroy_process_group()


@dataclass
class Clock:
    """Seconds on the wall, with pauses. The device is synchronised at each reading, so that queued work counts."""

    spent: float = 0.0
    since: float | None = None

    def start(self) -> Clock:
        torch.cuda.synchronize()
        self.since = time.perf_counter()
        return self

    def pause(self) -> None:
        self.spent = self.read()
        self.since = None

    def read(self) -> float:
        if self.since is None:
            return self.spent
        torch.cuda.synchronize()
        return self.spent + time.perf_counter() - self.since

    def glance(self) -> float:
        """Without the synchronisation, for the inner loop."""
        return self.spent + (time.perf_counter() - self.since if self.since is not None else 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def read_shard(path: Path) -> Tensor:
    """The tokens of one shard: 256 little-endian int32 of header, then uint16 ids."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {path}")
    count = int(header[2])
    offset = SHARD_HEADER_INTS * 4
    if path.stat().st_size != offset + 2 * count:
        raise ValueError(f"shard size mismatch in {path}")
    ids = np.fromfile(path, dtype="<u2", count=count, offset=offset)
    return torch.from_numpy(ids.astype(np.uint16, copy=False))


def shard_paths(pattern: str) -> list[Path]:
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no files match {pattern}")
    return paths


def load_validation(pattern: str) -> Tensor:
    """Every token of every validation shard, in order."""
    return torch.cat([read_shard(path) for path in shard_paths(pattern)]).contiguous()


class ShardStream:
    """An endless stream over the training shards, in file order. All ranks read the same bytes and keep their slice."""

    def __init__(self, pattern: str, runtime: Runtime) -> None:
        self.paths = shard_paths(pattern)
        self.runtime = runtime
        self.index = 0
        self.tokens = read_shard(self.paths[0])
        self.cursor = 0

    def _advance(self) -> None:
        self.index = (self.index + 1) % len(self.paths)
        self.tokens = read_shard(self.paths[self.index])
        self.cursor = 0

    def take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        while count > 0:
            left = self.tokens.numel() - self.cursor
            if left <= 0:
                self._advance()
                continue
            step = min(count, left)
            parts.append(self.tokens[self.cursor : self.cursor + step])
            self.cursor += step
            count -= step
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        share = global_tokens // (self.runtime.world * accum)
        span = share + 1
        block = self.take(span * self.runtime.world)
        local = block[self.runtime.rank * span : (self.runtime.rank + 1) * span].to(torch.int64)
        x = local[:-1].view(-1, seq_len)
        y = local[1:].view(-1, seq_len)
        return x.to(self.runtime.device, non_blocking=True), y.to(self.runtime.device, non_blocking=True)


@dataclass
class ByteTable:
    """UTF-8 bytes of each piece. The space of a leading mark counts only where the token before is no control token."""

    base: Tensor
    leading: Tensor
    control: Tensor

    @classmethod
    def from_tokenizer(cls, path: str, vocab_size: int, device: torch.device) -> ByteTable:
        sp = spm.SentencePieceProcessor(model_file=path)
        if int(sp.vocab_size()) != vocab_size:
            raise ValueError(f"vocab_size={vocab_size} but the tokenizer has {int(sp.vocab_size())} pieces")
        base = np.zeros(vocab_size, dtype=np.int16)
        leading = np.zeros(vocab_size, dtype=np.bool_)
        control = np.ones(vocab_size, dtype=np.bool_)
        for i in range(vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            control[i] = False
            if sp.is_byte(i):
                base[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("▁"):
                leading[i] = True
                piece = piece[1:]
            base[i] = len(piece.encode("utf-8"))
        as_tensor = torch.from_numpy
        return cls(as_tensor(base).to(device), as_tensor(leading).to(device), as_tensor(control).to(device))

    def count(self, before: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target token, given the token before it."""
        size = self.base[target].to(torch.int32)
        size = size + (self.leading[target] & ~self.control[before]).to(torch.int32)
        return size


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

GAIN_NAMES = ("q_gain", "attn_gain", "mlp_gain", "resid_mix", "skip_gain")


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Kept in fp32, used in the dtype of its input. No bias."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)
        self.watch: HessianTap | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch.add(x)
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv", inv, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: batch, time, heads, head_dim. Only the first `dims` channels turn."""
        angle = torch.outer(torch.arange(x.size(1), device=x.device, dtype=torch.float32), self.inv)
        cos = angle.cos()[None, :, None, :].to(x.dtype)
        sin = angle.sin()[None, :, None, :].to(x.dtype)
        turn, keep = x[..., : self.dims], x[..., self.dims :]
        a, b = turn.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, keep), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.q = Linear(cfg.model_dim, cfg.model_dim)
        self.k = Linear(cfg.model_dim, kv_dim)
        self.v = Linear(cfg.model_dim, kv_dim)
        self.o = Linear(cfg.model_dim, cfg.model_dim)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.rotary(rms(self.q(x).view(b, t, self.heads, self.head_dim)))
        k = self.rotary(rms(self.k(x).view(b, t, self.kv_heads, self.head_dim)))
        v = self.v(x).view(b, t, self.kv_heads, self.head_dim)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.o(out.transpose(1, 2).reshape(b, t, d))


class FeedForward(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.up = Linear(cfg.model_dim, cfg.mlp_hidden)
        self.down = Linear(cfg.mlp_hidden, cfg.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: Config, index: int) -> None:
        super().__init__()
        self.attn = Attention(cfg)
        self.mlp = FeedForward(cfg)
        self.attn_gain = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_gain = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.depth_scale = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_gain.to(x.dtype) * self.attn(rms(x) * self.depth_scale)
        return x + self.mlp_gain.to(x.dtype) * self.mlp(rms(x) * self.depth_scale)


class GPT(nn.Module):
    """U-shaped stack: the first half hands its outputs to the second. Input and output embeddings are tied."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        self.half = cfg.num_layers // 2
        self.skip_gain = nn.Parameter(torch.ones(self.half, cfg.model_dim))
        self._init(cfg)

    def _init(self, cfg: Config) -> None:
        nn.init.normal_(self.embed.weight, std=cfg.embed_init_std)
        for name, module in self.named_modules():
            if not isinstance(module, Linear):
                continue
            if name.endswith((".o", ".down")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = rms(self.embed(ids).to(torch.bfloat16))
        x0 = x
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.cfg.num_layers - self.half:
                lane = i - (self.cfg.num_layers - self.half)
                x = x + self.skip_gain[lane].to(x.dtype) * kept.pop()
            x = block(x, x0)
            if i < self.half:
                kept.append(x)
        return rms(x)

    def head(self, x: Tensor) -> Tensor:
        raw = F.linear(x, self.embed.weight.to(x.dtype)).float()
        return self.cfg.logit_softcap * torch.tanh(raw / self.cfg.logit_softcap)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def matrices(model: GPT) -> dict[str, Linear]:
    """The weights that Muon moves and GPTQ rounds, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


def gains(model: GPT) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in GAIN_NAMES]


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and averaging
# ---------------------------------------------------------------------------------------------------------------------


@torch.compile
def orthogonalise(grad: Tensor, steps: int) -> Tensor:
    """Newton-Schulz, quintic, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix. Matrices are dealt out to ranks and the updates summed."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, ns_steps: int, weight_decay: float) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if grouped else 1
        rank = dist.get_rank() if grouped else 0
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    update = orthogonalise(p.grad.add(buf, alpha=group["momentum"]), group["ns_steps"])
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.flatten()
                at += p.numel()
            if grouped:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


@dataclass
class OptimizerSet:
    """Muon for matrices, Adam for the embedding and the gains."""

    muon: Muon
    embed: torch.optim.Optimizer
    scalar: torch.optim.Optimizer
    base_lr: list[float] = field(default_factory=list)

    @classmethod
    def build(cls, model: GPT, cfg: Config) -> OptimizerSet:
        mats = [m.weight for m in matrices(model).values()]
        muon = Muon(mats, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_ns_steps, cfg.muon_weight_decay)
        adam = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        embed = torch.optim.AdamW(
            [model.embed.weight], lr=cfg.embed_lr, weight_decay=cfg.adam_weight_decay, **adam
        )
        scalar = torch.optim.AdamW(gains(model), lr=cfg.scalar_lr, weight_decay=0.0, **adam)
        made = cls(muon, embed, scalar)
        made.base_lr = [g["lr"] for o in made.all for g in o.param_groups]
        return made

    @property
    def all(self) -> list[torch.optim.Optimizer]:
        return [self.muon, self.embed, self.scalar]

    def set_scale(self, scale: float, momentum: float) -> None:
        groups = [g for o in self.all for g in o.param_groups]
        for group, lr in zip(groups, self.base_lr):
            group["lr"] = lr * scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


class Ema:
    """Exponential average of all parameters, in fp32, on the device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        live = dict(model.named_parameters())
        names = list(self.shadow)
        torch._foreach_lerp_([self.shadow[n] for n in names], [live[n].detach() for n in names], 1.0 - self.decay)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.shadow[name].copy_(p)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_bpb(model: nn.Module, tokens: Tensor, table: ByteTable, cfg: Config, runtime: Runtime) -> tuple[float, float]:
    """Loss and bits per byte over disjoint sequences, without overlap or mixture. For the log only."""
    seqs = (tokens.numel() - 1) // cfg.train_seq_len
    first, last = seqs * runtime.rank // runtime.world, seqs * (runtime.rank + 1) // runtime.world
    sums = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    model.eval()
    for s in range(first, last, 64):
        e = min(s + 64, last)
        block = tokens[s * cfg.train_seq_len : e * cfg.train_seq_len + 1].to(runtime.device, torch.int64)
        x, y = block[:-1].view(-1, cfg.train_seq_len), block[1:].view(-1, cfg.train_seq_len)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        sums[0] += loss.double() * y.numel()
        sums[1] += table.count(x.flatten(), y.flatten()).sum().double()
        sums[2] += y.numel()
    runtime.total(sums)
    model.train()
    mean = float(sums[0] / sums[2])
    return mean, float(sums[0] / math.log(2.0) / sums[1])


class Trainer:
    """The training leg: from the initial weights to averaged weights, within train_cap_s less the reserve."""

    def __init__(self, model: GPT, cfg: Config, runtime: Runtime, val: Tensor, table: ByteTable) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.model = model
        self.val, self.table = val, table
        self.compiled = torch.compile(model, dynamic=False, fullgraph=True)
        self.optimizers = OptimizerSet.build(model, cfg)
        self.accum = max(1, 8 // runtime.world)
        self.clock = Clock()
        self.ema = Ema(model, cfg.ema_decay)

    # -- schedule

    def lr_scale(self, step: int, elapsed: float) -> float:
        """Flat, then linear to zero over what warmdown_iters steps would take, by the clock."""
        if step == 0:
            return 1.0
        per_step = elapsed / step
        warmdown = self.cfg.warmdown_iters * per_step
        left = max(self.cfg.train_cap_s - self.cfg.reserve_s - elapsed, 0.0)
        return min(1.0, left / max(warmdown, 1e-9))

    def momentum(self, step: int) -> float:
        part = min(step / self.cfg.muon_momentum_steps, 1.0)
        return (1.0 - part) * self.cfg.muon_momentum_start + part * self.cfg.muon_momentum

    # -- one step

    def forward_backward(self, stream: ShardStream) -> Tensor:
        loss_sum = torch.zeros((), device=self.runtime.device)
        for _ in range(self.accum):
            x, y = stream.batch(self.cfg.train_batch_tokens, self.cfg.train_seq_len, self.accum)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.compiled(x, y)
            (loss / self.accum).backward()
            loss_sum += loss.detach() / self.accum
        for p in self.model.parameters():
            if p.grad is not None:
                self.runtime.mean(p.grad)
        return loss_sum

    def step(self, stream: ShardStream) -> Tensor:
        self.optimizers.zero()
        loss = self.forward_backward(stream)
        if self.cfg.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        self.optimizers.step()
        return loss

    def warm_up(self) -> None:
        """A few steps so that everything is compiled; weights and optimizer states are put back afterwards."""
        if self.cfg.warmup_steps <= 0:
            return
        weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        states = [copy.deepcopy(o.state_dict()) for o in self.optimizers.all]
        stream = ShardStream(self.cfg.train_files, self.runtime)
        for _ in range(self.cfg.warmup_steps):
            self.step(stream)
        self.model.load_state_dict(weights)
        for optimizer, state in zip(self.optimizers.all, states):
            optimizer.load_state_dict(state)
        self.optimizers.zero()
        self.ema.restart(self.model)
        self.runtime.say(f"warmup_steps:{self.cfg.warmup_steps} done, weights restored")

    # -- the loop

    def out_of_time(self) -> bool:
        late = self.clock.glance() >= self.cfg.train_cap_s - self.cfg.reserve_s
        flag = torch.tensor(int(late), device=self.runtime.device)
        return bool(self.runtime.from_main(flag).item())

    def report(self, step: int) -> None:
        self.clock.pause()
        loss, bpb = plain_bpb(self.compiled, self.val, self.table, self.cfg, self.runtime)
        self.runtime.say(f"step:{step} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{self.clock.read():.1f}s")
        self.clock.start()

    def fit(self) -> ShardStream:
        """Trains, applies the average, and returns the stream where it stands (calibration goes on from there)."""
        cfg, say = self.cfg, self.runtime.say
        stream = ShardStream(cfg.train_files, self.runtime)
        self.model.train()
        self.runtime.barrier()
        self.clock.start()
        step = 0
        while step < cfg.iterations and not self.out_of_time():
            elapsed = self.clock.glance()
            self.optimizers.set_scale(self.lr_scale(step, elapsed), self.momentum(step))
            loss = self.step(stream)
            step += 1
            if step == cfg.ema_start:
                self.ema.restart(self.model)
            elif step > cfg.ema_start:
                self.ema.update(self.model)
            if cfg.val_every and step % cfg.val_every == 0:
                self.report(step)
            if step <= 10 or step % cfg.log_every == 0:
                spent = self.clock.glance()
                say(f"step:{step}/{cfg.iterations} train_loss:{loss.item():.4f} step_avg:{1000 * spent / step:.2f}ms")
        say(f"training stopped at step:{step} train_time:{self.clock.read():.1f}s")
        if step > cfg.ema_start:
            self.ema.apply(self.model)
            say("weights: exponential average applied")
        say(f"peak memory: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
        return stream


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation: rotate, collect curvature, round
# ---------------------------------------------------------------------------------------------------------------------


class HessianTap:
    """Sum of x x^T over the inputs that reach one Linear."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.size(-1)).float()
        self.total.addmm_(flat.T, flat)
        self.rows += flat.size(0)


@torch.no_grad()
def collect_hessians(model: GPT, stream: ShardStream, cfg: Config, runtime: Runtime) -> dict[str, Tensor]:
    """Second moments of each Linear's inputs, over the next batches of the training stream, on all ranks."""
    taps: dict[str, HessianTap] = {}
    for name, module in matrices(model).items():
        taps[name] = module.watch = HessianTap(module.in_features, runtime.device)
    model.eval()
    for _ in range(cfg.calib_batches):
        x, _ = stream.batch(cfg.calib_seqs * cfg.train_seq_len * runtime.world, cfg.train_seq_len, 1)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model.hidden(x)
    for module in matrices(model).values():
        module.watch = None
    return {name: runtime.mean(tap.total / max(tap.rows, 1)) for name, tap in taps.items()}


class Rotation:
    """Random signs, then a block Hadamard, over the input channels. Spreads outliers before rounding."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.block = width & -width
        rng = np.random.default_rng(width)
        self.signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=width).astype(np.float32)).to(device)
        h = torch.ones(1, 1, device=device)
        while h.size(0) < self.block:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
        self.h = h / math.sqrt(self.block)

    def turn(self, w: Tensor) -> Tensor:
        return ((w * self.signs).view(w.size(0), -1, self.block) @ self.h).flatten(1)

    def undo(self, w: Tensor) -> Tensor:
        return (w.view(w.size(0), -1, self.block) @ self.h.T).flatten(1) * self.signs

    def turn_curvature(self, hess: Tensor) -> Tensor:
        return self.turn(self.turn(hess).T.contiguous()).T.contiguous()


@dataclass
class Packed:
    """One rounded matrix: signed codes, a scale for each row and group of columns."""

    codes: Tensor
    scales: Tensor
    bits: int
    rotated: bool


class Codec:
    """Float matrices to codes and back."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.rotations: dict[int, Rotation] = {}

    def rotation(self, width: int) -> Rotation:
        if width not in self.rotations:
            self.rotations[width] = Rotation(width, self.device)
        return self.rotations[width]

    def bits_for(self, name: str) -> int:
        return self.cfg.mlp_bits if ".mlp." in name else self.cfg.attn_bits

    def best_scale(self, group: Tensor, bits: int) -> Tensor:
        """For each row, the clip that rounds this group with the least squared error."""
        top = 2 ** (bits - 1) - 1
        peak = group.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
        best, chosen = torch.full_like(peak, float("inf")), peak / top
        for i in range(self.cfg.clip_grid):
            scale = peak * (1.0 - 0.06 * i) / top
            error = (group - scale * (group / scale).round().clamp(-top - 1, top)).square().sum(dim=1, keepdim=True)
            chosen = torch.where(error < best, scale, chosen)
            best = torch.minimum(error, best)
        return chosen.half().float()

    def encode(self, weight: Tensor, hess: Tensor, bits: int) -> Packed:
        """GPTQ in the rotated basis: columns left to right, the error of each pushed onto the ones after it."""
        turn = self.rotation(weight.size(1))
        w = turn.turn(weight.float())
        curve = turn.turn_curvature(hess)
        diag = torch.arange(w.size(1), device=w.device)
        curve[diag, diag] += self.cfg.gptq_damp * curve.diagonal().mean() + 1e-6
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(curve)), upper=True)
        top = 2 ** (bits - 1) - 1
        codes = torch.zeros_like(w, dtype=torch.int8)
        scales: list[Tensor] = []
        for b0 in range(0, w.size(1), self.cfg.gptq_block):
            b1 = min(b0 + self.cfg.gptq_block, w.size(1))
            part, local = w[:, b0:b1].clone(), factor[b0:b1, b0:b1]
            errors = torch.zeros_like(part)
            for j in range(b1 - b0):
                if j % self.cfg.group_size == 0:
                    scales.append(self.best_scale(part[:, j : j + self.cfg.group_size], bits))
                scale = scales[-1][:, 0]
                q = (part[:, j] / scale).round().clamp(-top - 1, top)
                codes[:, b0 + j] = q.to(torch.int8)
                err = (part[:, j] - q * scale) / local[j, j]
                part[:, j:] -= err[:, None] * local[j, j:][None, :]
                errors[:, j] = err
            w[:, b1:] -= errors @ factor[b0:b1, b1:]
        return Packed(codes, torch.cat(scales, dim=1).half(), bits, True)

    def encode_plain(self, weight: Tensor, bits: int) -> Packed:
        """Rounding to nearest with one scale for each row, unrotated; for the embedding."""
        top = 2 ** (bits - 1) - 1
        scale = (weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / top).half()
        codes = (weight.float() / scale.float()).round().clamp(-top - 1, top).to(torch.int8)
        return Packed(codes, scale, bits, False)

    def decode(self, packed: Packed) -> Tensor:
        codes = packed.codes.to(self.device).float()
        scales = packed.scales.to(self.device).float()
        w = codes * scales.repeat_interleave(codes.size(1) // scales.size(1), dim=1)
        return self.rotation(w.size(1)).undo(w) if packed.rotated else w


@torch.no_grad()
def quantise(model: GPT, hessians: dict[str, Tensor], codec: Codec, cfg: Config, runtime: Runtime) -> dict[str, Packed]:
    """Every rank rounds its share of the matrices; the shares are then exchanged."""
    mine: dict[str, Packed] = {}
    for i, (name, module) in enumerate(matrices(model).items()):
        if i % runtime.world == runtime.rank:
            packed = codec.encode(module.weight, hessians[name], codec.bits_for(name))
            mine[name] = Packed(packed.codes.cpu(), packed.scales.cpu(), packed.bits, packed.rotated)
    shares: list[dict[str, Packed] | None] = [None] * runtime.world
    if runtime.grouped:
        dist.all_gather_object(shares, mine)
    else:
        shares = [mine]
    merged = {name: packed for share in shares if share for name, packed in share.items()}
    embed = codec.encode_plain(model.embed.weight, cfg.embed_bits)
    merged["embed"] = Packed(embed.codes.cpu(), embed.scales.cpu(), embed.bits, embed.rotated)
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


class Packer:
    """The artifact: codes, scales, gains and the gate in one lzma stream."""

    def __init__(self, cfg: Config, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.path = Path(cfg.artifact)

    def write(self, model: GPT, packed: dict[str, Packed], gate: Gate) -> None:
        """Rank 0 writes, prints the size and refuses what is too large."""
        if self.runtime.main:
            plain = {
                name: p.detach().half().cpu()
                for name, p in model.named_parameters()
                if name.rsplit(".", 1)[-1] in GAIN_NAMES
            }
            payload = {
                "codes": {name: (p.codes, p.scales, p.bits, p.rotated) for name, p in packed.items()},
                "gains": plain,
                "gate": asdict(gate),
            }
            buffer = io.BytesIO()
            torch.save(payload, buffer)
            raw = buffer.getvalue()
            filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 26}]
            blob = lzma.compress(raw, format=lzma.FORMAT_XZ, filters=filters)
            self.path.write_bytes(blob)
            code_bytes = len(Path(__file__).read_bytes())
            total = code_bytes + len(blob)
            self.runtime.say(f"payload raw: {len(raw)} bytes, lzma: {len(blob)} bytes")
            self.runtime.say(f"code: {code_bytes} bytes")
            self.runtime.say(f"total submission size: {total} bytes (limit {SIZE_LIMIT})")
            if total > SIZE_LIMIT:
                raise RuntimeError(f"submission of {total} bytes exceeds {SIZE_LIMIT}")
        self.runtime.barrier()

    def read(self, codec: Codec) -> tuple[GPT, Gate]:
        """A fresh model from the file alone."""
        payload = torch.load(io.BytesIO(lzma.decompress(self.path.read_bytes())), map_location="cpu", weights_only=True)
        model = GPT(self.cfg).to(self.runtime.device)
        layers = matrices(model)
        with torch.no_grad():
            for name, parts in payload["codes"].items():
                weight = codec.decode(Packed(*parts))
                target = model.embed.weight if name == "embed" else layers[name].weight
                target.copy_(weight)
            named = dict(model.named_parameters())
            for name, value in payload["gains"].items():
                named[name].copy_(value.to(named[name].dtype))
        return model, Gate(**payload["gate"])


# ---------------------------------------------------------------------------------------------------------------------
# N-gram backoff
# ---------------------------------------------------------------------------------------------------------------------


class BackoffBank:
    """Counts of next tokens after hashed contexts, orders 1 to ngram_max_order.

    A context is hashed to a row; a row holds one count for every token of the vocabulary. Two contexts that share a row
    share a distribution, which is a worse one but still a distribution: every order is discounted by its own row, and what
    the discount sets free goes to the order below, down to a Dirichlet-smoothed unigram. Each sums to one over the ids.
    """

    MULTIPLIER = 0x9E3779B1

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.vocab = cfg.vocab_size
        self.orders = list(range(2, cfg.ngram_max_order + 1))
        self.rows = {k: self.vocab if k == 2 else 1 << cfg.ngram_bucket_bits for k in self.orders}
        self.counts = {k: torch.zeros(self.rows[k], self.vocab, dtype=torch.int32, device=device) for k in self.orders}
        self.unigram = torch.zeros(self.vocab, dtype=torch.float32, device=device)

    def row_ids(self, tokens: Tensor, at: Tensor, order: int) -> Tensor:
        """The row of the context tokens[at-order+2 .. at], which precedes the target tokens[at+1]."""
        if order == 2:
            return tokens[at].long()
        key = torch.zeros_like(at)
        for back in range(order - 2, -1, -1):
            spot = at - back
            ids = torch.where(spot >= 0, tokens[spot.clamp_min(0)].long(), torch.zeros_like(at))
            key = (key * self.MULTIPLIER + ids + 1) & 0xFFFFFFFF
        key = key ^ (key >> 15)
        return (key * 0x85EBCA6B & 0xFFFFFFFF) >> (32 - self.cfg.ngram_bucket_bits)

    def predict(self, tokens: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """For each position: probabilities of all ids for the token after it, and the evidence of the longest orders."""
        alpha, d = self.cfg.ngram_alpha, self.cfg.ngram_discount
        base = (self.unigram + alpha) / (self.unigram.sum() + alpha * self.vocab)
        p = base.expand(at.numel(), self.vocab)
        evidence = torch.zeros(at.numel(), device=self.device)
        for order in self.orders:
            row = self.counts[order][self.row_ids(tokens, at, order)].float()
            total = row.sum(dim=1, keepdim=True)
            kinds = (row > 0).sum(dim=1, keepdim=True).float()
            kept = (row - d).clamp_min(0.0)
            mixed = (kept + d * kinds * p) / total.clamp_min(1.0)
            p = torch.where(total > 0, mixed, p)
            if order >= 4:
                evidence = evidence + torch.log1p(total[:, 0])
        return p, evidence

    def absorb(self, tokens: Tensor, first: int, last: int) -> None:
        """Counts the targets tokens[first+1 .. last], each after its context."""
        at = torch.arange(first, last, device=self.device)
        target = tokens[at + 1].long()
        one = torch.ones(at.numel(), dtype=torch.int32, device=self.device)
        for order in self.orders:
            flat = self.row_ids(tokens, at, order) * self.vocab + target
            self.counts[order].view(-1).index_add_(0, flat, one)
        self.unigram.index_add_(0, target, one.float())


# ---------------------------------------------------------------------------------------------------------------------
# Mixing gate
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Gate:
    """Weight of the n-gram side, from the transformer's entropy and the evidence in the tables; never from the target."""

    bias: float = -3.0
    entropy: float = 0.3
    evidence: float = 0.15

    def weight(self, entropy: Tensor, evidence: Tensor) -> Tensor:
        return torch.sigmoid(self.bias + self.entropy * entropy + self.evidence * evidence)

    def mix(self, logits: Tensor, ngram: Tensor, evidence: Tensor) -> Tensor:
        """Log-probabilities of all ids under the mixture."""
        logp = F.log_softmax(logits.float(), dim=-1)
        p = logp.exp()
        entropy = -(p * logp).sum(dim=-1)
        lam = self.weight(entropy, evidence)[:, None]
        return torch.log((1.0 - lam) * p + lam * ngram)


class GateFitter:
    """Fits the gate on a stretch of training text, read causally with tables of its own that start empty."""

    def __init__(self, model: GPT, cfg: Config, runtime: Runtime) -> None:
        self.model, self.cfg, self.runtime = model, cfg, runtime

    @torch.no_grad()
    def features(self, stream: ShardStream) -> list[Tensor]:
        cfg, device = self.cfg, self.runtime.device
        text = stream.take(cfg.gate_tokens + 1).to(device, torch.int32)
        bank = BackoffBank(cfg, device)
        found: list[list[Tensor]] = [[], [], [], []]
        span = 8 * cfg.train_seq_len
        for s in range(0, cfg.gate_tokens - span + 1, span):
            x = text[s : s + span].long().view(8, cfg.train_seq_len)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = self.model.head(self.model.hidden(x)).flatten(0, 1)
            logp = F.log_softmax(logits, dim=-1)
            at = torch.arange(s, s + span, device=device)
            target = text[at + 1].long()[:, None]
            ngram, evidence = bank.predict(text, at)
            found[0].append(logp.gather(1, target)[:, 0].exp())
            found[1].append(ngram.gather(1, target)[:, 0])
            found[2].append(-(logp.exp() * logp).sum(dim=-1))
            found[3].append(evidence)
            bank.absorb(text, s, s + span)
        return [torch.cat(part) for part in found]

    def fit(self, stream: ShardStream) -> Gate:
        p_nn, p_ng, entropy, evidence = self.features(stream)
        start = Gate()
        theta = torch.tensor([start.bias, start.entropy, start.evidence], device=self.runtime.device, requires_grad=True)
        optimizer = torch.optim.Adam([theta], lr=self.cfg.gate_lr)
        for _ in range(self.cfg.gate_steps):
            lam = torch.sigmoid(theta[0] + theta[1] * entropy + theta[2] * evidence)
            loss = -torch.log((1.0 - lam) * p_nn + lam * p_ng).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.runtime.from_main(theta.data)
        gate = Gate(*(float(v) for v in theta.detach()))
        self.runtime.say(f"gate fitted on {p_nn.numel()} training tokens: {gate} loss:{loss.item():.4f}")
        return gate


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


class Ledger:
    """Sums of what was scored. Every target of the split must have come in exactly once."""

    def __init__(self, expected: int, runtime: Runtime) -> None:
        self.expected, self.runtime = expected, runtime
        self.sums = torch.zeros(3, dtype=torch.float64, device=runtime.device)

    def enter(self, nll: Tensor, size: Tensor) -> None:
        self.sums[0] += nll.double().sum()
        self.sums[1] += size.double().sum()
        self.sums[2] += nll.numel()

    def close(self) -> tuple[float, float, int]:
        nats, size, count = self.runtime.total(self.sums.clone()).tolist()
        if round(count) != self.expected:
            raise RuntimeError(f"{round(count)} tokens were scored, {self.expected} expected")
        return nats / count, nats / math.log(2.0) / size, round(count)


class Adapter:
    """SGD on the gain vectors, over text that has been scored already."""

    def __init__(self, model: GPT, tokens: Tensor, cfg: Config, runtime: Runtime) -> None:
        self.model, self.tokens, self.cfg, self.runtime = model, tokens, cfg, runtime
        for p in model.parameters():
            p.requires_grad_(False)
        self.params = gains(model)
        for p in self.params:
            p.requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.params, lr=cfg.adapt_lr, momentum=cfg.adapt_momentum)

    def learn(self, first: int, last: int) -> None:
        """One step over the targets tokens[first+1 .. last], dealt out to the ranks."""
        width = self.cfg.eval_seq_len
        starts = list(range(first, last - width + 1, width))[self.runtime.rank :: self.runtime.world]
        self.optimizer.zero_grad(set_to_none=False)
        for i in range(0, len(starts), self.cfg.adapt_seqs):
            group = starts[i : i + self.cfg.adapt_seqs]
            block = torch.stack([self.tokens[s : s + width + 1] for s in group]).long()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.model(block[:, :-1], block[:, 1:])
            (loss * len(group) / max(len(starts), 1)).backward()
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.runtime.mean(p.grad)
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()


class Evaluator:
    """Walks the validation tokens once, chunk by chunk. Positions count targets: position i predicts tokens[i+1]."""

    def __init__(
        self, model: GPT, gate: Gate, tokens: Tensor, table: ByteTable, cfg: Config, runtime: Runtime, clock: Clock
    ) -> None:
        self.cfg, self.runtime, self.clock = cfg, runtime, clock
        self.model, self.gate, self.table = model, gate, table
        self.tokens = tokens.to(runtime.device, torch.int32)
        self.positions = self.tokens.numel() - 1
        self.bank = BackoffBank(cfg, runtime.device)
        self.adapter = Adapter(model, self.tokens, cfg, runtime)
        self.trunk = torch.compile(model.hidden, dynamic=False)
        self.offsets = torch.arange(cfg.eval_stride, device=runtime.device)
        self.span = torch.arange(cfg.eval_seq_len, device=runtime.device)

    def chunks(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.positions, self.cfg.eval_chunk):
            yield first, min(first + self.cfg.eval_chunk, self.positions)

    def my_windows(self, first: int, last: int) -> list[int]:
        """First scored position of each of this rank's windows inside a chunk."""
        starts = list(range(first, last, self.cfg.eval_stride))
        lo = len(starts) * self.runtime.rank // self.runtime.world
        hi = len(starts) * (self.runtime.rank + 1) // self.runtime.world
        return starts[lo:hi]

    def window_logits(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Scored positions and their logits; each window sees up to eval_seq_len tokens, the last being its last position."""
        end = starts + self.cfg.eval_stride
        left = (end - self.cfg.eval_seq_len).clamp_min(0)
        spot = left[:, None] + self.span[None, :]
        inside = (spot < end[:, None]) & (spot < self.positions)
        ids = torch.where(inside, self.tokens[spot.clamp_max(self.positions - 1)].long(), torch.zeros_like(spot))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = self.trunk(ids)
        at = starts[:, None] + self.offsets[None, :]
        picked = hidden.gather(1, (at - left[:, None])[..., None].expand(-1, -1, hidden.size(-1)))
        return at.flatten(), self.model.head(picked).flatten(0, 1)

    @torch.no_grad()
    def score(self, first: int, last: int, ledger: Ledger) -> None:
        """Enters the losses of this rank's share of a chunk. Reads weights and tables, changes neither."""
        mine = self.my_windows(first, last)
        for i in range(0, len(mine), self.cfg.eval_batch):
            starts = torch.tensor(mine[i : i + self.cfg.eval_batch], device=self.runtime.device)
            at, logits = self.window_logits(starts)
            real = at < last
            at, logits = at[real], logits[real]
            ngram, evidence = self.bank.predict(self.tokens, at)
            logp = self.gate.mix(logits, ngram, evidence)
            target = self.tokens[at + 1].long()
            nll = -logp.gather(1, target[:, None])[:, 0]
            ledger.enter(nll, self.table.count(self.tokens[at].long(), target))

    def may_adapt(self) -> bool:
        ok = torch.tensor(int(self.clock.read() < self.cfg.eval_guard_s), device=self.runtime.device)
        return self.cfg.adapt and bool(self.runtime.from_main(ok).item())

    def run(self) -> tuple[float, float, int]:
        self.model.eval()
        ledger = Ledger(self.positions, self.runtime)
        for number, (first, last) in enumerate(self.chunks()):
            self.score(first, last, ledger)
            # the chunk is scored by every rank; from here on its tokens are the past
            self.runtime.barrier()
            self.bank.absorb(self.tokens, first, last)
            if last < self.positions and self.may_adapt():
                self.adapter.learn(first, last)
            if number % 50 == 0:
                self.runtime.say(f"eval chunk {number}: {last}/{self.positions} at {self.clock.read():.1f}s")
        return ledger.close()


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def train_leg(cfg: Config, runtime: Runtime, table: ByteTable, codec: Codec, packer: Packer) -> None:
    """Everything up to the artifact on disk."""
    val = load_validation(cfg.val_files)
    runtime.say(f"validation tokens: {val.numel()} (read for the log during training)")
    model = GPT(cfg).to(runtime.device)
    for p in model.parameters():
        runtime.from_main(p.data)
    runtime.say(f"parameters: {sum(p.numel() for p in model.parameters())}")
    trainer = Trainer(model, cfg, runtime, val, table)
    trainer.warm_up()
    stream = trainer.fit()
    hessians = collect_hessians(model, stream, cfg, runtime)
    gate = GateFitter(model, cfg, runtime).fit(stream)
    packed = quantise(model, hessians, codec, cfg, runtime)
    spent = trainer.clock.read()
    runtime.say(f"train + calibration + gate + rounding: {spent:.1f}s of {cfg.train_cap_s:.0f}s")
    if spent > cfg.train_cap_s:
        raise RuntimeError("the training leg ran over its cap")
    packer.write(model, packed, gate)


def eval_leg(cfg: Config, runtime: Runtime, table: ByteTable, codec: Codec, packer: Packer) -> None:
    """From the artifact and the validation shards to the figure that is reported."""
    clock = Clock().start()
    model, gate = packer.read(codec)
    tokens = load_validation(cfg.val_files)
    evaluator = Evaluator(model, gate, tokens, table, cfg, runtime, clock)
    loss, bpb, count = evaluator.run()
    spent = clock.read()
    runtime.say(f"evaluation: {count} tokens in {spent:.1f}s of {cfg.eval_cap_s:.0f}s")
    if spent > cfg.eval_cap_s:
        raise RuntimeError("the evaluation ran over its cap")
    runtime.say(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main() -> None:
    cfg = Config.from_env()
    cfg.check()
    runtime = Runtime.start(cfg)
    runtime.say(f"python {sys.version.split()[0]} torch {torch.__version__} world {runtime.world}", console=False)
    for name, value in asdict(cfg).items():
        runtime.say(f"{name}: {value}", console=False)
    seed_everything(cfg.seed)
    table = ByteTable.from_tokenizer(cfg.tokenizer_path, cfg.vocab_size, runtime.device)
    codec = Codec(cfg, runtime.device)
    packer = Packer(cfg, runtime)
    train_leg(cfg, runtime, table, codec, packer)
    torch.cuda.empty_cache()
    eval_leg(cfg, runtime, table, codec, packer)
    runtime.close()


if __name__ == "__main__":
    main()
