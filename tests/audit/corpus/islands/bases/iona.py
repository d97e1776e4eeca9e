"""
iona: a ternary / int4 quantisation-aware transformer for Parameter Golf.

One file does everything: train for the wall-clock budget, refine the quantiser's row scales on training activations,
fit one softmax temperature on training tokens, pack with lzma, read the packed file back and score the validation
split with a sliding window while the norm gains and biases are adapted on chunks that were scored already.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Layout:
    Config       every setting, each with an environment override
    World        the handful of torch.distributed calls that are used
    Shards       binary token shards -> batches
    ByteCounter  token ids -> UTF-8 bytes of the text they stand for
    GPT          the model (QuantLinear carries the straight-through quantisers)
    Trainer      the loop and the average of the weights
    Calibrator   activation statistics for the quantiser's row scales
    Packer       model -> bytes -> model
    Scorer       windows, losses and the score-first adaptation
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


# ----------------------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every setting of a run. A field `foo_bar` is overridden by the environment variable FOO_BAR."""

    # data
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    run_id: str = ""
    seed: int = 1337

    # shape
    vocab_size: int = 1024
    num_layers: int = 9
    model_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int = 6
    mlp_mult: int = 3
    rope_base: float = 10000.0
    rope_dims: int = 32
    logit_softcap: float = 30.0
    qk_gain_init: float = 1.5
    embed_init_std: float = 0.005

    # length of training
    iterations: int = 20000
    max_wallclock_seconds: float = 600.0
    reserve_seconds: float = 40.0
    warmup_steps: int = 20
    warmdown_seconds: float = 210.0
    train_batch_tokens: int = 524_288
    train_seq_len: int = 2048
    log_every: int = 200
    val_loss_every: int = 0
    val_batch_tokens: int = 524_288

    # optimisers
    embed_lr: float = 0.035
    scalar_lr: float = 0.02
    matrix_lr: float = 0.025
    matrix_weight_decay: float = 0.02
    muon_momentum: float = 0.97
    muon_momentum_start: float = 0.85
    muon_momentum_warmup_steps: int = 1000
    muon_backend_steps: int = 5
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.3

    # quantisation
    qat_ramp_start: float = 0.05
    qat_ramp_end: float = 0.20
    int4_clip: float = 0.92
    calibration_batches: int = 8
    calibration_seqs: int = 8
    scale_grid: int = 17
    scale_span: float = 0.16

    # average
    average_decay: float = 0.997
    average_start: float = 0.40

    # temperature, fitted on training tokens
    temperature_batches: int = 6
    temperature_low: float = 0.90
    temperature_high: float = 1.10
    temperature_points: int = 41

    # evaluation
    eval_seq_len: int = 2048
    eval_stride: int = 64
    eval_batch_windows: int = 64
    adapt: bool = True
    adapt_chunk_tokens: int = 131_072
    adapt_epochs: int = 2
    adapt_batch_seqs: int = 32
    adapt_lr: float = 6e-4
    adapt_lr_final: float = 1e-4
    adapt_betas: str = "0.9,0.99"
    adapt_weight_decay: float = 0.0
    adapt_clip_norm: float = 1.0
    adapt_until_seconds: float = 420.0

    # outputs
    artifact_path: str = "model.iona.xz"
    log_dir: str = "logs"

    @classmethod
    def from_env(cls) -> Config:
        values = {}
        for f in fields(cls):
            raw = os.environ.get(f.name.upper())
            if raw is None:
                continue
            default = f.default
            if isinstance(default, bool):
                values[f.name] = raw.strip().lower() in ("1", "true", "yes")
            elif isinstance(default, int):
                values[f.name] = int(raw)
            elif isinstance(default, float):
                values[f.name] = float(raw)
            else:
                values[f.name] = raw
        config = cls(**values)
        if not config.run_id:
            config.run_id = uuid.uuid4().hex[:12]
        config.check()
        return config

    def check(self) -> None:
        if self.model_dim % self.num_heads:
            raise ValueError("MODEL_DIM must be a multiple of NUM_HEADS")
        if self.num_heads % self.num_kv_heads:
            raise ValueError("NUM_HEADS must be a multiple of NUM_KV_HEADS")
        if self.adapt_chunk_tokens % self.eval_stride:
            raise ValueError("ADAPT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE")
        if self.eval_stride > self.eval_seq_len:
            raise ValueError("EVAL_STRIDE must not exceed EVAL_SEQ_LEN")

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    @property
    def train_budget(self) -> float:
        """Seconds for the loop itself; the rest of the wall clock belongs to calibration, temperature and packing."""
        return self.max_wallclock_seconds - self.reserve_seconds


# ----------------------------------------------------------------------------------------------------------------------
# World
# ----------------------------------------------------------------------------------------------------------------------


class World:
    """Rank, device and the collectives. With one process every collective is the identity."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        if 8 % self.size:
            raise ValueError("WORLD_SIZE must divide 8, so that the global batch stays the same")
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def grad_accum_steps(self) -> int:
        return 8 // self.size

    def sum_(self, t: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)
        return t

    def any(self, flag: bool) -> bool:
        t = torch.tensor(int(flag), device=self.device)
        if self.size > 1:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def mean_grads(self, params: list[nn.Parameter]) -> None:
        """Averages the gradients over the ranks, in one flat transfer per dtype."""
        if self.size == 1:
            return
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        offset = 0
        for g in grads:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class Log:
    """Prints on rank 0 and keeps a copy in a file."""

    def __init__(self, config: Config, world: World) -> None:
        self.main = world.main
        self.path = Path(config.log_dir) / f"{config.run_id}.txt"
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.main:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(text + "\n")


class Stopwatch:
    """A wall clock that can be halted, for the validation in between."""

    def __init__(self) -> None:
        self.total = 0.0
        self.since: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def halt(self) -> None:
        torch.cuda.synchronize()
        if self.since is not None:
            self.total += time.perf_counter() - self.since
            self.since = None

    def seconds(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.total + running


# ----------------------------------------------------------------------------------------------------------------------
# Shards
# ----------------------------------------------------------------------------------------------------------------------


def read_shard(path: Path) -> Tensor:
    """The tokens of one shard as uint16, after a check of its header."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: {tokens.size} tokens, the header promises {count}")
    return torch.from_numpy(tokens)


def shard_paths(pattern: str) -> list[Path]:
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no files match {pattern}")
    return paths


class Shards:
    """An endless stream over the shards of one pattern. All ranks walk it in step and each cuts out its own part."""

    def __init__(self, pattern: str, world: World) -> None:
        self.paths = shard_paths(pattern)
        self.world = world
        self.index = 0
        self.tokens = read_shard(self.paths[0])
        self.pos = 0

    def advance(self) -> None:
        self.index = (self.index + 1) % len(self.paths)
        self.tokens = read_shard(self.paths[self.index])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.advance()
                continue
            k = min(left, n)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def next_batch(self, global_tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets out of the next `global_tokens` tokens (over all ranks)."""
        local = global_tokens // self.world.size
        local -= local % seq_len
        span = local + 1
        block = self.take(span * self.world.size)
        mine = block[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        x = mine[:-1].reshape(-1, seq_len).to(self.world.device, non_blocking=True)
        y = mine[1:].reshape(-1, seq_len).to(self.world.device, non_blocking=True)
        return x, y


def load_validation(pattern: str) -> Tensor:
    """The whole validation stream. Nothing is cut off its end."""
    return torch.cat([read_shard(p) for p in shard_paths(pattern)]).contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# ByteCounter
# ----------------------------------------------------------------------------------------------------------------------


class ByteCounter:
    """How many UTF-8 bytes of the original text each token stands for.

    A piece that begins with the mark U+2581 carries a space, unless the token before it is a control piece: then the
    tokenizer put the mark there itself. Byte-fallback pieces are one byte, control pieces none.
    """

    MARK = "\u2581"

    def __init__(self, model_path: str, vocab_size: int, device: torch.device) -> None:
        sp = spm.SentencePieceProcessor(model_file=model_path)
        if sp.vocab_size() != vocab_size:
            raise ValueError(f"the tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {vocab_size}")
        size = max(sp.vocab_size(), vocab_size)
        own = np.zeros(size, dtype=np.int16)
        spaced = np.zeros(size, dtype=np.bool_)
        edge = np.ones(size, dtype=np.bool_)
        for i in range(sp.vocab_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            edge[i] = False
            if sp.is_byte(i):
                own[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith(self.MARK):
                spaced[i] = True
                piece = piece[1:]
            own[i] = len(piece.replace(self.MARK, " ").encode("utf-8"))
        self.own = torch.from_numpy(own).to(device)
        self.spaced = torch.from_numpy(spaced).to(device)
        self.edge = torch.from_numpy(edge).to(device)

    def __call__(self, previous: Tensor, target: Tensor) -> Tensor:
        count = self.own[target].to(torch.int64)
        count += (self.spaced[target] & ~self.edge[previous]).to(torch.int64)
        return count


# ----------------------------------------------------------------------------------------------------------------------
# Quantisers
# ----------------------------------------------------------------------------------------------------------------------


def ternary_scale(w: Tensor) -> Tensor:
    """One step size per row: the mean magnitude (b1.58)."""
    return w.abs().mean(dim=1, keepdim=True).clamp_min(1e-6)


def int4_scale(w: Tensor, clip: float) -> Tensor:
    """One step size per row: the clipped maximum over seven levels."""
    return (clip * w.abs().amax(dim=1, keepdim=True) / 7.0).clamp_min(1e-6)


def levels(w: Tensor, scale: Tensor, bound: int) -> Tensor:
    return torch.round(w / scale).clamp_(-bound, bound)


class QuantLinear(nn.Module):
    """A linear map without bias whose weight is seen through a quantiser.

    While training, w + blend * (Q(w) - w) is used and the gradient goes straight through to w. `blend` is ramped from
    0 to 1. `stretch` multiplies the row scales; it is 1 until the Calibrator sets it.
    """

    def __init__(self, d_in: int, d_out: int, kind: str, clip: float, zero: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.clip = clip
        self.bound = 1 if kind == "ternary" else 7
        self.weight = nn.Parameter(torch.zeros(d_out, d_in))
        self.register_buffer("blend", torch.zeros(()), persistent=False)
        self.register_buffer("stretch", torch.ones(d_out, 1), persistent=False)
        self.frozen = False
        if not zero:
            bound = math.sqrt(3.0) * 0.5 * d_in**-0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def scale(self, w: Tensor) -> Tensor:
        base = ternary_scale(w) if self.kind == "ternary" else int4_scale(w, self.clip)
        return base * self.stretch

    def quantised(self) -> tuple[Tensor, Tensor]:
        """Integer levels and row scales, as they are packed."""
        w = self.weight.detach().float()
        scale = self.scale(w).half().float()
        return levels(w, scale, self.bound).to(torch.int8), scale.half()

    def effective(self) -> Tensor:
        if self.frozen:
            return self.weight
        with torch.no_grad():
            scale = self.scale(self.weight)
            delta = (levels(self.weight, scale, self.bound) * scale - self.weight) * self.blend
        return self.weight + delta

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective().to(x.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """RMS norm with a gain and a bias; these two are what the evaluation may adapt."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, (x.size(-1),))
        return y * self.gain.to(x.dtype) + self.bias.to(x.dtype)


class Rotary(nn.Module):
    """Rotary positions on the first `dims` channels of a head."""

    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        self.register_buffer("freq", base ** (-torch.arange(0, dims, 2).float() / dims), persistent=False)

    def forward(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(length, device=device).float(), self.freq)
        return angle.cos()[None, :, None, :].to(dtype), angle.sin()[None, :, None, :].to(dtype)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        head, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = head.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.kv_heads = config.num_kv_heads
        self.head_dim = config.model_dim // config.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.q = QuantLinear(config.model_dim, config.model_dim, "int4", config.int4_clip)
        self.k = QuantLinear(config.model_dim, kv_dim, "int4", config.int4_clip)
        self.v = QuantLinear(config.model_dim, kv_dim, "int4", config.int4_clip)
        self.o = QuantLinear(config.model_dim, config.model_dim, "int4", config.int4_clip, zero=True)
        self.q_gain = nn.Parameter(torch.full((self.heads,), config.qk_gain_init))
        self.rotary = Rotary(config.rope_dims, config.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.q(x).view(b, t, self.heads, self.head_dim)
        k = self.k(x).view(b, t, self.kv_heads, self.head_dim)
        v = self.v(x).view(b, t, self.kv_heads, self.head_dim)
        cos, sin = self.rotary(t, x.device, x.dtype)
        q = self.rotary.turn(F.rms_norm(q, (self.head_dim,)), cos, sin)
        k = self.rotary.turn(F.rms_norm(k, (self.head_dim,)), cos, sin)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.o(y.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config.mlp_mult * config.model_dim
        self.up = QuantLinear(config.model_dim, hidden, "ternary", 1.0)
        self.down = QuantLinear(hidden, config.model_dim, "ternary", 1.0, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.25).square())


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn_norm = Norm(config.model_dim)
        self.mlp_norm = Norm(config.model_dim)
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.attn_norm(x))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Pre-norm blocks with U-shaped skips, tied embedding, soft-capped logits and one scalar temperature."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.softcap = config.logit_softcap
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        nn.init.normal_(self.embed.weight, std=config.embed_init_std)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.half = config.num_layers // 2
        self.skip_gain = nn.Parameter(torch.ones(self.half, config.model_dim))
        self.out_norm = Norm(config.model_dim)
        self.register_buffer("temperature", torch.ones(()))

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).to(torch.bfloat16)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < self.half:
                skips.append(x)
            elif skips and i >= len(self.blocks) - self.half:
                gain = self.skip_gain[len(self.blocks) - 1 - i].to(x.dtype)
                x = x + gain * skips.pop()
            x = block(x, x0)
        return self.out_norm(x)

    def logits(self, ids: Tensor) -> Tensor:
        z = F.linear(self.hidden(ids), self.embed.weight.to(torch.bfloat16))
        return self.softcap * torch.tanh(z.float() / self.softcap)

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log probabilities over the whole vocabulary, for every position."""
        return F.log_softmax(self.logits(ids) / self.temperature, dim=-1)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        z = self.logits(ids)
        return F.cross_entropy(z.reshape(-1, z.size(-1)), targets.reshape(-1))


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Gains and biases of all norms, in the order of the modules."""
    return [p for m in model.modules() if isinstance(m, Norm) for p in (m.gain, m.bias)]


# ----------------------------------------------------------------------------------------------------------------------
# Optimisers
# ----------------------------------------------------------------------------------------------------------------------


def orthogonalise(g: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration with the quintic coefficients of Muon, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. The matrices are dealt out to the ranks and the updates summed."""

    def __init__(self, params, lr: float, momentum: float, steps: int, weight_decay: float, world: World) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))
        self.world = world

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            offset = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p.grad)
                    buf = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    update = orthogonalise(p.grad.lerp(buf, group["momentum"]), group["steps"])
                    update *= max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[offset : offset + p.numel()] = update.reshape(-1)
                offset += p.numel()
            self.world.sum_(flat)
            offset = 0
            for p in params:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(flat[offset : offset + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                offset += p.numel()


class Average:
    """Exponential moving average of the parameters, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        shadows, live = [], []
        for n, p in model.named_parameters():
            shadows.append(self.shadow[n])
            live.append(p.detach())
        torch._foreach_lerp_(shadows, live, 1 - self.decay)

    @torch.no_grad()
    def store(self, model: nn.Module) -> None:
        for n, p in model.named_parameters():
            p.copy_(self.shadow[n])


# ----------------------------------------------------------------------------------------------------------------------
# Trainer
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Optimisers:
    adam: torch.optim.Optimizer
    muon: Muon
    base_lrs: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base_lrs = [[g["lr"] for g in opt.param_groups] for opt in self.all()]

    def all(self) -> list[torch.optim.Optimizer]:
        return [self.adam, self.muon]

    def scale_lr(self, factor: float) -> None:
        for opt, lrs in zip(self.all(), self.base_lrs):
            for group, lr in zip(opt.param_groups, lrs):
                group["lr"] = lr * factor

    def step(self) -> None:
        for opt in self.all():
            opt.step()

    def zero(self) -> None:
        for opt in self.all():
            opt.zero_grad(set_to_none=True)


class Trainer:
    """Trains `model` until the budget of the wall clock or the number of iterations is used up."""

    def __init__(self, config: Config, world: World, log: Log, model: GPT) -> None:
        self.config = config
        self.world = world
        self.log = log
        self.model = model
        self.compiled = torch.compile(model, dynamic=False, fullgraph=True)
        self.params = list(model.parameters())
        self.opts = self.build_optimisers()
        self.shards = Shards(config.train_files, world)
        self.clock = Stopwatch()
        self.average: Average | None = None

    def build_optimisers(self) -> Optimisers:
        c = self.config
        matrices = [m.weight for m in quant_layers(self.model).values()]
        taken = {id(p) for p in matrices} | {id(self.model.embed.weight)}
        scalars = [p for p in self.params if id(p) not in taken]
        adam = torch.optim.Adam(
            [dict(params=[self.model.embed.weight], lr=c.embed_lr), dict(params=scalars, lr=c.scalar_lr)],
            betas=(c.beta1, c.beta2),
            eps=c.adam_eps,
            fused=True,
        )
        muon = Muon(
            matrices, c.matrix_lr, c.muon_momentum, c.muon_backend_steps, c.matrix_weight_decay, self.world
        )
        return Optimisers(adam, muon)

    # schedules, all functions of the share of the budget that is used

    def lr_factor(self, step: int, used: float) -> float:
        """1, then a linear fall to 0 over the last `warmdown_seconds` of the budget."""
        budget = self.config.train_budget
        left = max(budget - used, 0.0)
        by_clock = min(left / max(self.config.warmdown_seconds, 1e-9), 1.0)
        by_steps = min((self.config.iterations - step) / max(0.35 * self.config.iterations, 1.0), 1.0)
        return min(by_clock, by_steps)

    def blend_at(self, share: float) -> float:
        lo, hi = self.config.qat_ramp_start, self.config.qat_ramp_end
        return min(max((share - lo) / max(hi - lo, 1e-9), 0.0), 1.0)

    def set_blend(self, value: float) -> None:
        for layer in quant_layers(self.model).values():
            layer.blend.fill_(value)

    def momentum_at(self, step: int) -> float:
        c = self.config
        share = min(step / max(c.muon_momentum_warmup_steps, 1), 1.0)
        return (1 - share) * c.muon_momentum_start + share * c.muon_momentum

    # one step

    def accumulate(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros((), device=self.world.device)
        n = self.world.grad_accum_steps
        for x, y in batches:
            loss = self.compiled(x, y)
            (loss / n).backward()
            total += loss.detach() / n
        return total

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = self.world.grad_accum_steps
        for _ in range(n):
            yield self.shards.next_batch(self.config.train_batch_tokens // n, self.config.train_seq_len)

    def update(self) -> None:
        self.world.mean_grads(self.params)
        if self.config.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.params, self.config.grad_clip_norm)
        self.opts.step()
        self.opts.zero()

    def warm_up(self) -> None:
        """Compiles and warms the kernels on random tokens, then puts weights and optimisers back as they were."""
        c = self.config
        weights = copy.deepcopy(self.model.state_dict())
        states = [copy.deepcopy(opt.state_dict()) for opt in self.opts.all()]
        rows = c.train_batch_tokens // self.world.size // self.world.grad_accum_steps // c.train_seq_len
        for _ in range(c.warmup_steps):
            noise = torch.randint(0, c.vocab_size, (rows, c.train_seq_len + 1), device=self.world.device)
            self.accumulate((noise[:, :-1].contiguous(), noise[:, 1:].contiguous()) for _ in range(1))
            self.update()
        self.model.load_state_dict(weights)
        for opt, state in zip(self.opts.all(), states):
            opt.load_state_dict(state)
        self.opts.zero()

    def run(self, validate=None) -> int:
        c = self.config
        if c.warmup_steps > 0:
            self.warm_up()
        self.model.train()
        self.world.barrier()
        self.clock.start()
        step = 0
        while step < c.iterations:
            used = self.clock.seconds()
            if self.world.any(used >= c.train_budget):
                self.log(f"wallclock: budget of {c.train_budget:.0f}s used at step {step}")
                break
            share = max(used / c.train_budget, step / c.iterations)
            self.set_blend(self.blend_at(share))
            self.opts.scale_lr(self.lr_factor(step, used))
            for group in self.opts.muon.param_groups:
                group["momentum"] = self.momentum_at(step)
            loss = self.accumulate(self.micro_batches())
            self.update()
            step += 1
            if share >= c.average_start:
                if self.average is None:
                    self.average = Average(self.model, c.average_decay)
                else:
                    self.average.update(self.model)
            if c.log_every and (step <= 5 or step % c.log_every == 0):
                spent = self.clock.seconds()
                self.log(
                    f"step:{step}/{c.iterations} train_loss:{self.world.mean_(loss).item():.4f} "
                    f"train_time:{1000 * spent:.0f}ms step_avg:{1000 * spent / step:.2f}ms"
                )
            if validate is not None and c.val_loss_every and step % c.val_loss_every == 0:
                self.clock.halt()
                validate(step)
                self.clock.start()
        if self.average is not None:
            self.average.store(self.model)
            self.log(f"average: weights replaced by their moving average (decay {c.average_decay})")
        self.set_blend(1.0)
        return step


# ----------------------------------------------------------------------------------------------------------------------
# Calibrator
# ----------------------------------------------------------------------------------------------------------------------


class Calibrator:
    """Diagonal Hessians E[x^2] of every quantised layer's input, and the row scales that fit them best.

    It runs on the training stream, inside the wall clock of the training.
    """

    def __init__(self, config: Config, world: World, log: Log, model: GPT, shards: Shards) -> None:
        self.config = config
        self.world = world
        self.log = log
        self.model = model
        self.shards = shards
        self.moments: dict[str, Tensor] = {}

    def hook(self, name: str):
        def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().float()
            self.moments[name] += x.reshape(-1, x.size(-1)).square().mean(dim=0)

        return observe

    @torch.no_grad()
    def collect(self) -> None:
        c = self.config
        layers = quant_layers(self.model)
        self.moments = {n: torch.zeros(m.weight.size(1), device=self.world.device) for n, m in layers.items()}
        handles = [m.register_forward_hook(self.hook(n)) for n, m in layers.items()]
        self.model.eval()
        for _ in range(c.calibration_batches):
            span = c.calibration_seqs * c.train_seq_len * self.world.size
            x, _ = self.shards.next_batch(span, c.train_seq_len)
            self.model.logits(x)
        for h in handles:
            h.remove()
        for m in self.moments.values():
            self.world.mean_(m)

    @torch.no_grad()
    def refine(self) -> None:
        """For each row, the stretch of its scale with the least weighted squared error."""
        c = self.config
        gain_sum, count = 0.0, 0
        grid = torch.linspace(1 - c.scale_span, 1 + c.scale_span, c.scale_grid).tolist()
        for name, layer in quant_layers(self.model).items():
            w = layer.weight.detach().float()
            h = self.moments[name][None, :]
            layer.stretch.fill_(1.0)
            base = layer.scale(w)
            best = torch.full_like(base, float("inf"))
            first = ((levels(w, base, layer.bound) * base - w).square() * h).sum(dim=1, keepdim=True)
            chosen = torch.ones_like(base)
            for s in grid:
                scale = base * s
                error = ((levels(w, scale, layer.bound) * scale - w).square() * h).sum(dim=1, keepdim=True)
                better = error < best
                best = torch.where(better, error, best)
                chosen = torch.where(better, torch.full_like(chosen, s), chosen)
            layer.stretch.copy_(chosen)
            gain_sum += (best.sum() / first.sum().clamp_min(1e-12)).item()
            count += 1
        self.log(f"calibration: weighted error x{gain_sum / max(count, 1):.4f} after the row scales were refined")


@torch.no_grad()
def fit_temperature(config: Config, world: World, model: GPT, shards: Shards) -> float:
    """The softmax temperature with the least loss on tokens of the training stream that were not trained on."""
    grid = torch.linspace(config.temperature_low, config.temperature_high, config.temperature_points)
    sums = torch.zeros(grid.numel(), device=world.device, dtype=torch.float64)
    model.eval()
    for _ in range(config.temperature_batches):
        span = 4 * config.train_seq_len * world.size
        x, y = shards.next_batch(span, config.train_seq_len)
        z = model.logits(x)
        z = z.reshape(-1, z.size(-1))
        for i, t in enumerate(grid.tolist()):
            sums[i] += F.cross_entropy(z / t, y.reshape(-1)).double()
    world.sum_(sums)
    return float(grid[int(sums.argmin())])


# ----------------------------------------------------------------------------------------------------------------------
# Packer
# ----------------------------------------------------------------------------------------------------------------------


def pack_trits(q: np.ndarray) -> np.ndarray:
    """Values -1, 0, 1 -> five to a byte."""
    flat = (q.reshape(-1) + 1).astype(np.uint8)
    flat = np.concatenate([flat, np.zeros(-flat.size % 5, dtype=np.uint8)]).reshape(-1, 5)
    return (flat * np.array([1, 3, 9, 27, 81], dtype=np.uint8)).sum(axis=1).astype(np.uint8)


def unpack_trits(data: np.ndarray, count: int) -> np.ndarray:
    digits = data[:, None] // np.array([1, 3, 9, 27, 81], dtype=np.uint8) % 3
    return digits.reshape(-1)[:count].astype(np.int8) - 1


def pack_nibbles(q: np.ndarray) -> np.ndarray:
    """Values -7 .. 7 -> two to a byte."""
    flat = (q.reshape(-1) + 8).astype(np.uint8)
    flat = np.concatenate([flat, np.zeros(flat.size % 2, dtype=np.uint8)]).reshape(-1, 2)
    return (flat[:, 0] | (flat[:, 1] << 4)).astype(np.uint8)


def unpack_nibbles(data: np.ndarray, count: int) -> np.ndarray:
    pairs = np.stack([data & 15, data >> 4], axis=1)
    return pairs.reshape(-1)[:count].astype(np.int8) - 8


@dataclass
class Packed:
    """What the artifact holds: integer levels and scales of the matrices, int8 embedding, half-precision rest."""

    matrices: dict[str, dict[str, object]]
    rest: dict[str, Tensor]
    temperature: float


class Packer:
    """Model -> lzma file -> model."""

    def __init__(self, config: Config, log: Log) -> None:
        self.config = config
        self.log = log
        self.path = Path(config.artifact_path)

    def collect(self, model: GPT) -> Packed:
        matrices: dict[str, dict[str, object]] = {}
        layers = quant_layers(model)
        for name, layer in layers.items():
            q, scale = layer.quantised()
            flat = q.cpu().numpy()
            data = pack_trits(flat) if layer.kind == "ternary" else pack_nibbles(flat)
            matrices[f"{name}.weight"] = {
                "kind": layer.kind,
                "shape": tuple(flat.shape),
                "data": torch.from_numpy(data),
                "scale": scale.cpu(),
            }
        w = model.embed.weight.detach().float()
        scale = (w.abs().amax(dim=1, keepdim=True) / 127.0).clamp_min(1e-8).half()
        matrices["embed.weight"] = {
            "kind": "int8",
            "shape": tuple(w.shape),
            "data": torch.round(w / scale.float()).clamp_(-127, 127).to(torch.int8).cpu(),
            "scale": scale.cpu(),
        }
        rest = {n: p.detach().half().cpu() for n, p in model.named_parameters() if n not in matrices}
        return Packed(matrices, rest, float(model.temperature))

    def write(self, model: GPT) -> int:
        packed = self.collect(model)
        buffer = io.BytesIO()
        torch.save(asdict(packed), buffer)
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
        blob = lzma.compress(buffer.getvalue(), format=lzma.FORMAT_XZ, filters=filters)
        self.path.write_bytes(blob)
        return len(blob)

    def report(self, model_bytes: int) -> int:
        code_bytes = len(Path(__file__).read_bytes())
        total = code_bytes + model_bytes
        self.log(f"Serialized model lzma: {model_bytes} bytes")
        self.log(f"Code size: {code_bytes} bytes")
        self.log(f"Total submission size: {total} bytes (limit {SIZE_LIMIT})")
        if total > SIZE_LIMIT:
            raise SystemExit(f"the submission is {total - SIZE_LIMIT} bytes too large")
        return total

    def read(self, device: torch.device) -> GPT:
        """A new model with the values of the file; its matrices are plain dense weights."""
        raw = torch.load(io.BytesIO(lzma.decompress(self.path.read_bytes())), map_location="cpu", weights_only=True)
        packed = Packed(**raw)
        state = {n: t.float() for n, t in packed.rest.items()}
        for name, entry in packed.matrices.items():
            shape = tuple(entry["shape"])
            data = entry["data"].numpy()
            count = int(np.prod(shape))
            if entry["kind"] == "ternary":
                q = unpack_trits(data, count)
            elif entry["kind"] == "int4":
                q = unpack_nibbles(data, count)
            else:
                q = data
            state[name] = torch.from_numpy(q.reshape(shape).copy()).float() * entry["scale"].float()
        state["temperature"] = torch.tensor(packed.temperature)
        model = GPT(self.config)
        model.load_state_dict(state, strict=True)
        for layer in quant_layers(model).values():
            layer.frozen = True
        return model.to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Scorer
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Tokens [begin, last) are shown; of these the targets [first, last) are scored."""

    begin: int
    first: int
    last: int


@dataclass
class Totals:
    """Sums over the scored targets of one rank, and over all ranks after `reduce`."""

    nll: Tensor
    tokens: Tensor
    bytes: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> Totals:
        return cls(*(torch.zeros((), device=device, dtype=torch.float64) for _ in range(3)))

    def add(self, nll: Tensor, count: Tensor) -> None:
        self.nll += nll.double().sum()
        self.tokens += nll.numel()
        self.bytes += count.double().sum()

    def reduce(self, world: World) -> tuple[float, float]:
        """Mean loss in nats per token and bits per byte."""
        flat = world.sum_(torch.stack([self.nll, self.tokens, self.bytes]))
        nll, tokens, count = flat.tolist()
        return nll / tokens, nll / math.log(2.0) / count


class Scorer:
    """Walks the validation stream once, in chunks. A chunk is scored by the model as the earlier chunks left it."""

    def __init__(
        self, config: Config, world: World, log: Log, model: GPT, counter: ByteCounter, tokens: Tensor
    ) -> None:
        self.config = config
        self.world = world
        self.log = log
        self.model = model
        self.counter = counter
        self.tokens = tokens.to(world.device, torch.int64)
        self.log_probs = torch.compile(model.log_probs, dynamic=False, fullgraph=True)

    # the walk

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of targets. Token 0 has nothing before it and is no target."""
        end = self.tokens.numel()
        step = self.config.adapt_chunk_tokens
        for lo in range(1, end, step):
            yield lo, min(lo + step, end)

    def windows(self, lo: int, hi: int) -> Iterator[Window]:
        """The targets lo .. hi-1 in strides, each with as much context as the model takes."""
        for first in range(lo, hi, self.config.eval_stride):
            last = min(first + self.config.eval_stride, hi)
            begin = max(last - 1 - self.config.eval_seq_len, 0)
            yield Window(begin, first, last)

    def batches(self, lo: int, hi: int) -> Iterator[list[Window]]:
        """This rank's windows of a chunk, some at a time."""
        batch: list[Window] = []
        for i, window in enumerate(self.windows(lo, hi)):
            if i % self.world.size != self.world.rank:
                continue
            batch.append(window)
            if len(batch) == self.config.eval_batch_windows:
                yield batch
                batch = []
        if batch:
            yield batch

    # the score

    def inputs(self, batch: list[Window]) -> Tensor:
        """Inputs of fixed shape; what stands right of a window's end is filler and sees no loss."""
        shape = (self.config.eval_batch_windows, self.config.eval_seq_len)
        x = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
        for row, w in enumerate(batch):
            x[row, : w.last - 1 - w.begin] = self.tokens[w.begin : w.last - 1]
        return x

    @torch.no_grad()
    def score_batch(self, batch: list[Window], totals: Totals) -> None:
        log_p = self.log_probs(self.inputs(batch))
        for row, w in enumerate(batch):
            target = self.tokens[w.first : w.last]
            previous = self.tokens[w.first - 1 : w.last - 1]
            rows = log_p[row, w.first - 1 - w.begin : w.last - 1 - w.begin]
            nll = -rows.gather(1, target[:, None]).squeeze(1)
            totals.add(nll, self.counter(previous, target))

    def score_chunk(self, lo: int, hi: int, totals: Totals) -> None:
        self.model.eval()
        for batch in self.batches(lo, hi):
            self.score_batch(batch, totals)

    def plain(self) -> tuple[float, float]:
        """The fixed predictor: no adaptation."""
        totals = Totals.zero(self.world.device)
        for lo, hi in self.chunks():
            self.score_chunk(lo, hi, totals)
        return totals.reduce(self.world)

    # the adaptation

    def sequences(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """Stretches of the chunk [lo, hi) as (begin, end): inputs begin .. end-2, targets begin+1 .. end-1."""
        n = self.config.eval_seq_len
        return [(a - 1, a + n) for a in range(lo, hi - n + 1, n)]

    def adapt_chunk(self, lo: int, hi: int, optimiser: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        """Some epochs on a chunk whose targets were scored, the same step on every rank."""
        c = self.config
        stretches = self.sequences(lo, hi)
        order = random.Random(c.seed + lo)
        for _ in range(c.adapt_epochs):
            order.shuffle(stretches)
            for at in range(0, len(stretches), c.adapt_batch_seqs):
                group = stretches[at : at + c.adapt_batch_seqs]
                mine = group[self.world.rank :: self.world.size]
                optimiser.zero_grad(set_to_none=False)
                if mine:
                    seqs = torch.stack([self.tokens[a:b] for a, b in mine])
                    log_p = self.model.log_probs(seqs[:, :-1])
                    loss = -log_p.gather(2, seqs[:, 1:, None]).sum() / (len(group) * c.eval_seq_len)
                    loss.backward()
                for p in params:
                    self.world.sum_(p.grad)
                torch.nn.utils.clip_grad_norm_(params, c.adapt_clip_norm)
                optimiser.step()

    def adapted(self) -> tuple[float, float]:
        """Score-first adaptation of the norms: chunk c is scored, then learned from, then chunk c+1 is scored."""
        c = self.config
        self.model.requires_grad_(False)
        params = norm_parameters(self.model)
        for p in params:
            p.requires_grad_(True)
            p.grad = torch.zeros_like(p)
        b1, b2 = (float(b) for b in c.adapt_betas.split(","))
        optimiser = torch.optim.AdamW(params, lr=c.adapt_lr, betas=(b1, b2), weight_decay=c.adapt_weight_decay)
        totals = Totals.zero(self.world.device)
        spans = list(self.chunks())
        learning = True
        begun = time.perf_counter()
        for number, (lo, hi) in enumerate(spans):
            self.score_chunk(lo, hi, totals)
            if number + 1 == len(spans):
                break
            if learning and self.world.any(time.perf_counter() - begun > c.adapt_until_seconds):
                learning = False
                self.log(f"adapt: stopped at chunk {number}/{len(spans)}, the rest is scored as it is")
            if learning:
                share = number / len(spans)
                lr = c.adapt_lr_final + 0.5 * (c.adapt_lr - c.adapt_lr_final) * (1 + math.cos(math.pi * share))
                for group in optimiser.param_groups:
                    group["lr"] = lr
                self.adapt_chunk(lo, hi, optimiser, params)
            if number % 50 == 0:
                self.progress(number, len(spans), totals, begun)
        return totals.reduce(self.world)

    def progress(self, number: int, total: int, totals: Totals, begun: float) -> None:
        """A line about this far, from rank 0's own part."""
        if self.world.main:
            bpb = (totals.nll / math.log(2.0) / totals.bytes.clamp_min(1)).item()
            self.log(f"adapt: chunk {number}/{total} running_bpb:{bpb:.4f} t:{time.perf_counter() - begun:.1f}s")


@torch.no_grad()
def quick_loss(
    config: Config, world: World, model: GPT, counter: ByteCounter, tokens: Tensor, rows: int = 32
) -> tuple[float, float]:
    """Loss over windows that do not overlap, for the log."""
    n = config.train_seq_len
    count = (tokens.numel() - 1) // n
    totals = Totals.zero(world.device)
    was = model.training
    model.eval()
    mine = range(count * world.rank // world.size, count * (world.rank + 1) // world.size)
    for at in range(mine.start, mine.stop, rows):
        k = min(rows, mine.stop - at)
        span = tokens[at * n : (at + k) * n + 1].to(world.device, torch.int64)
        x, y = span[:-1].view(k, n), span[1:].view(k, n)
        nll = -model.log_probs(x).gather(2, y[:, :, None]).squeeze(2)
        totals.add(nll, counter(x, y))
    model.train(was)
    return totals.reduce(world)


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def build(config: Config, world: World, log: Log) -> None:
    """Everything up to the artifact, on the training shards and inside the wall clock of the training."""
    model = GPT(config).to(world.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    trainer = Trainer(config, world, log, model)
    log(f"train shards: {len(trainer.shards.paths)} budget:{config.train_budget:.0f}s world:{world.size}")

    validate = None
    if config.val_loss_every:
        counter = ByteCounter(config.tokenizer_path, config.vocab_size, world.device)
        held = load_validation(config.val_files)

        def validate(step: int) -> None:
            loss, bpb = quick_loss(config, world, model, counter, held)
            log(f"step:{step} val_loss:{loss:.4f} val_bpb:{bpb:.4f}")

    steps = trainer.run(validate)
    log(f"training: {steps} steps, {trainer.clock.seconds():.1f}s")

    calibrator = Calibrator(config, world, log, model, trainer.shards)
    calibrator.collect()
    calibrator.refine()
    temperature = fit_temperature(config, world, model, trainer.shards)
    model.temperature.fill_(temperature)
    log(f"temperature: {temperature:.4f} (fitted on training tokens)")

    packer = Packer(config, log)
    if world.main:
        model_bytes = packer.write(model)
        trainer.clock.halt()
        packer.report(model_bytes)
    spent = trainer.clock.seconds()
    log(f"training, calibration and packing: {spent:.1f}s of {config.max_wallclock_seconds:.0f}s")
    if world.main and spent > config.max_wallclock_seconds:
        raise SystemExit("over the wall clock, raise RESERVE_SECONDS")
    log(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    world.barrier()


def evaluate(config: Config, world: World, log: Log) -> None:
    """Reads the artifact back and scores the validation split; nothing else of the training is left here."""
    watch = Stopwatch()
    watch.start()
    model = Packer(config, log).read(world.device)
    counter = ByteCounter(config.tokenizer_path, config.vocab_size, world.device)
    tokens = load_validation(config.val_files)
    log(f"validation: {tokens.numel()} tokens, stride {config.eval_stride}, context {config.eval_seq_len}")
    loss, bpb = quick_loss(config, world, model, counter, tokens)
    log(f"roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * watch.seconds():.0f}ms")
    scorer = Scorer(config, world, log, model, counter, tokens)
    loss, bpb = scorer.adapted() if config.adapt else scorer.plain()
    watch.halt()
    log(f"evaluation: {watch.seconds():.1f}s")
    log(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main() -> None:
    config = Config.from_env()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    world = World()
    log = Log(config, world)
    set_seed(config.seed)
    log(f"python {sys.version.split()[0]} torch {torch.__version__}", console=False)
    for f in fields(config):
        log(f"config {f.name}={getattr(config, f.name)}", console=False)
    build(config, world, log)
    torch.cuda.empty_cache()
    evaluate(config, world, log)
    world.close()


if __name__ == "__main__":
    main()
