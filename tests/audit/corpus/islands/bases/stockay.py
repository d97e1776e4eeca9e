"""Parameter Golf: 9x512 transformer, int6 QAT, EMA, LZMA, score-first adaptation of norm gains and logit bias.

Run:  torchrun --standalone --nproc_per_node=8 train_gpt.py

Stages
  1. Trainer.fit        Muon + Adam on fineweb_train_*.bin until the wall clock (minus a reserve) is used up
  2. Trainer.save       EMA weights, activation statistics and temperature from training shards, int6 + LZMA, size check
  3. Evaluator.run      reads the packed file back, scores the validation split chunk by chunk; a chunk's tokens touch
                        the model (norm gains, logit bias) and the bigram cache only after they have been scored

Everything is configured through Config; each field may be overridden by an environment variable of the same name in
upper case. A summary is written to results_<run_id>.json.
"""

from __future__ import annotations

import copy
import dataclasses
import glob
import io
import json
import logging
import lzma
import math
import os
import random
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LOGGER = logging.getLogger("golf")
SIZE_LIMIT = 16_000_000
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
INT6_MAX = 31
INT8_MAX = 127


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """All settings. `Config.from_env()` overrides a field `foo_bar` by the variable FOO_BAR."""

    # run
    run_id: str = ""
    seed: int = 1337
    out_dir: str = "."
    # data
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    train_glob: str = "fineweb_train_*.bin"
    val_glob: str = "fineweb_val_*.bin"
    bos_id: int = 1
    # model
    vocab_size: int = 1024
    num_layers: int = 9
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0
    rope_base: float = 10000.0
    rope_dims: int = 32
    logit_softcap: float = 30.0
    qk_gain_init: float = 1.5
    # training
    seq_len: int = 1024
    train_batch_tokens: int = 524_288
    iterations: int = 20_000
    warmdown_frac: float = 0.35
    warmup_compile_steps: int = 6
    max_wallclock_s: float = 600.0
    reserve_s: float = 45.0
    val_every: int = 1000
    val_batch_tokens: int = 524_288
    log_every: int = 100
    # optimizer
    matrix_lr: float = 0.025
    scalar_lr: float = 0.02
    embed_lr: float = 0.035
    muon_momentum: float = 0.97
    muon_momentum_start: float = 0.88
    muon_momentum_steps: int = 700
    muon_ns_steps: int = 5
    muon_weight_decay: float = 0.04
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.6
    # averaging and quantisation
    ema_decay: float = 0.997
    ema_start_frac: float = 0.25
    qat_start_scale: float = 0.35
    calib_batches: int = 12
    temp_batches: int = 8
    lzma_preset: int = 9
    # evaluation
    eval_stride: int = 64
    eval_batch: int = 64
    chunk_tokens: int = 65_536
    adapt: int = 1
    adapt_lr: float = 0.002
    adapt_bias_lr: float = 0.01
    adapt_momentum: float = 0.9
    adapt_epochs: int = 2
    adapt_pull: float = 0.01
    adapt_deadline_s: float = 470.0
    cache: int = 1
    cache_conc: float = 220.0
    cache_max_weight: float = 0.12
    cache_decay: float = 0.998

    @classmethod
    def from_env(cls) -> Config:
        values = {}
        for item in dataclasses.fields(cls):
            raw = os.environ.get(item.name.upper())
            if raw is not None:
                values[item.name] = type(item.default)(raw)
        cfg = cls(**values)
        if not cfg.run_id:
            cfg.run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none").replace("none", "") or uuid.uuid4().hex[:8]
        cfg.check()
        return cfg

    def check(self) -> None:
        if self.model_dim % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("model_dim, num_heads and num_kv_heads do not divide")
        if self.chunk_tokens % self.eval_stride or self.chunk_tokens % self.seq_len:
            raise ValueError("chunk_tokens must be a multiple of eval_stride and of seq_len")
        if self.eval_stride > self.seq_len:
            raise ValueError("eval_stride is longer than seq_len")

    @property
    def train_pattern(self) -> str:
        return os.path.join(self.data_path, self.train_glob)

    @property
    def val_pattern(self) -> str:
        return os.path.join(self.data_path, self.val_glob)

    @property
    def artifact_path(self) -> Path:
        return Path(self.out_dir) / "final_model.int6.xz"


# ---------------------------------------------------------------------------------------------------------------------
# Helpers: seeds, ranks, logging
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum_(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value

    def max(self, number: float) -> float:
        """The largest of all ranks' numbers, so that they decide alike."""
        value = torch.tensor(number, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value.item())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def init_ranks() -> Ranks:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return Ranks(rank, world, device)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)


def setup_logging(cfg: Config, ranks: Ranks) -> None:
    LOGGER.setLevel(logging.INFO if ranks.main else logging.WARNING)
    formatter = logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if ranks.main:
        handlers.append(logging.FileHandler(Path(cfg.out_dir) / f"train_{cfg.run_id}.log"))
    for handler in handlers:
        handler.setFormatter(formatter)
        LOGGER.addHandler(handler)
    LOGGER.propagate = False


class Stopwatch:
    """A clock that can be held; `seconds` counts only the time during which it ran."""

    def __init__(self) -> None:
        self.total = 0.0
        self.since: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def hold(self) -> None:
        torch.cuda.synchronize()
        if self.since is not None:
            self.total += time.perf_counter() - self.since
        self.since = None

    @property
    def seconds(self) -> float:
        running = time.perf_counter() - self.since if self.since is not None else 0.0
        return self.total + running


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def list_shards(pattern: str) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return files


def read_shard(path: Path) -> Tensor:
    """The tokens of one shard as an uint16 tensor on the CPU."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path} is no token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path} is cut short: {tokens.size} of {count} tokens")
    return torch.from_numpy(tokens)


class TokenStream:
    """Endless stream over the shards in sorted order."""

    def __init__(self, pattern: str) -> None:
        self.files = list_shards(pattern)
        self.index = 0
        self.pos = 0
        self.tokens = read_shard(self.files[0])

    def take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        while count > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.index = (self.index + 1) % len(self.files)
                self.tokens = read_shard(self.files[self.index])
                self.pos = 0
                continue
            size = min(count, left)
            parts.append(self.tokens[self.pos : self.pos + size])
            self.pos += size
            count -= size
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Hands each rank its own span of every batch."""

    def __init__(self, pattern: str, ranks: Ranks, seq_len: int) -> None:
        self.stream = TokenStream(pattern)
        self.ranks = ranks
        self.seq_len = seq_len

    def next(self, batch_tokens: int) -> tuple[Tensor, Tensor]:
        local = batch_tokens // self.ranks.world
        span = local + 1
        chunk = self.stream.take(span * self.ranks.world)
        mine = chunk[self.ranks.rank * span : (self.ranks.rank + 1) * span].to(torch.int64)
        mine = mine.pin_memory().to(self.ranks.device, non_blocking=True)
        return mine[:-1].view(-1, self.seq_len), mine[1:].view(-1, self.seq_len)


def load_validation(pattern: str) -> Tensor:
    """The whole validation split, all shards joined, on the CPU."""
    return torch.cat([read_shard(path) for path in list_shards(pattern)]).to(torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes per token
# ---------------------------------------------------------------------------------------------------------------------


class ByteTable:
    """How many bytes of the original text a token stands for, from the sentencepiece model.

    A piece's leading mark stands for one space, which is counted when the previous token is not a boundary token
    (sentencepiece adds such a mark at the start of a document, where the text has no space)."""

    def __init__(self, tokenizer_path: str, vocab_size: int, device: torch.device) -> None:
        sp = spm.SentencePieceProcessor(model_file=tokenizer_path)
        size = max(sp.vocab_size(), vocab_size)
        body = np.zeros(size, dtype=np.int16)
        space = np.zeros(size, dtype=np.bool_)
        boundary = np.ones(size, dtype=np.bool_)
        for token in range(sp.vocab_size()):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            boundary[token] = False
            if sp.is_byte(token):
                body[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith("\u2581"):
                space[token] = True
                piece = piece[1:]
            body[token] = len(piece.encode("utf-8"))
        self.body = torch.from_numpy(body).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.boundary = torch.from_numpy(boundary).to(device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target, given the token before it."""
        size = self.body[target].to(torch.int32)
        size += (self.space[target] & ~self.boundary[prev]).to(torch.int32)
        return size


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def row_scale(weight: Tensor, limit: int) -> Tensor:
    return weight.abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / limit


class FakeInt6(torch.autograd.Function):
    """Rounds to int6 per row going forward, lets the gradient through going backward."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        scale = row_scale(weight, INT6_MAX)
        return (weight / scale).round().clamp_(-INT6_MAX, INT6_MAX) * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class QLinear(nn.Linear):
    """Bias-free linear layer, fp32 master weight, bf16 compute, int6 fake quantisation while `qat` is on."""

    qat: bool = False

    def __init__(self, fan_in: int, fan_out: int, zero: bool = False) -> None:
        super().__init__(fan_in, fan_out, bias=False)
        with torch.no_grad():
            if zero:
                self.weight.zero_()
            else:
                self.weight.uniform_(-math.sqrt(3 / fan_in), math.sqrt(3 / fan_in)).mul_(0.7)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if QLinear.qat and self.training:
            weight = FakeInt6.apply(weight)
        return F.linear(x, weight.to(x.dtype))


class LayerNorm(nn.Module):
    """Layer norm with a gain and no bias. The gains are what the evaluation adapts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.size(-1),), self.gain.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float, max_len: int) -> None:
        super().__init__()
        inv = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), inv)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """x: batch, head, time, head dim. Only the first `dims` of the head are turned."""
        length = x.size(-2)
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        part, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = part.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.q = QLinear(cfg.model_dim, cfg.model_dim)
        self.k = QLinear(cfg.model_dim, kv_dim)
        self.v = QLinear(cfg.model_dim, kv_dim)
        self.out = QLinear(cfg.model_dim, cfg.model_dim, zero=True)
        self.q_scale = nn.Parameter(torch.full((self.heads,), cfg.qk_gain_init))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base, cfg.seq_len)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = self.q(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q = self.rotary(F.rms_norm(q, (self.head_dim,))) * self.q_scale.to(q.dtype)[None, :, None, None]
        k = self.rotary(F.rms_norm(k, (self.head_dim,)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        hidden = int(cfg.model_dim * cfg.mlp_mult)
        self.up = QLinear(cfg.model_dim, hidden)
        self.down = QLinear(hidden, cfg.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: Config, index: int) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(cfg.model_dim)
        self.mlp_norm = LayerNorm(cfg.model_dim)
        self.attn = Attention(cfg)
        self.mlp = Mlp(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.depth_scale = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.attn_norm(x) * self.depth_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.depth_scale)


class Smear(nn.Module):
    """Adds a gated share of the previous token's embedding; nothing crosses the start of a document."""

    def __init__(self, dim: int, bos_id: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -3.0))
        self.bos_id = bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + torch.sigmoid(self.gate).to(x.dtype) * before * inside


class GPT(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.softcap = cfg.logit_softcap
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        nn.init.normal_(self.embed.weight, std=0.006)
        self.smear = Smear(cfg.model_dim, cfg.bos_id)
        self.embed_norm = LayerNorm(cfg.model_dim)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        self.half = cfg.num_layers // 2
        self.skip = nn.Parameter(torch.ones(self.half, cfg.model_dim))
        self.final_norm = LayerNorm(cfg.model_dim)
        self.logit_bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (fp32) of the next token at every position."""
        x = self.embed(ids).to(torch.bfloat16)
        x = self.embed_norm(self.smear(x, ids))
        x0 = x
        stack: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < self.half:
                x = block(x, x0)
                stack.append(x)
                continue
            if stack:
                x = x + self.skip[len(stack) - 1].to(x.dtype) * stack.pop()
            x = block(x, x0)
        logits = F.linear(self.final_norm(x), self.embed.weight.to(x.dtype)).float()
        return self.softcap * torch.tanh(logits / self.softcap) + self.logit_bias


class LossModel(nn.Module):
    """The model with its loss on top, so that both are compiled as one."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(ids)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------


def newton_schulz(grad: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrix, by the quintic iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + 1e-7)
    flipped = x.size(0) > x.size(1)
    if flipped:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flipped else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz; each rank does its share of the matrices."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, ns_steps: int, decay: float, ranks: Ranks):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, decay=decay))
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(p.grad)
                    buffer = state["buffer"]
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    update = newton_schulz(p.grad.add(buffer, alpha=group["momentum"]), group["ns_steps"])
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.flatten()
                at += p.numel()
            self.ranks.sum_(flat)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


def is_matrix(name: str, value: Tensor) -> bool:
    """The weights of the blocks' linear layers: what Muon updates and what becomes int6."""
    return value.ndim == 2 and (".attn." in name or ".mlp." in name)


def build_optimizers(model: GPT, cfg: Config, ranks: Ranks) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if is_matrix(name, p)]
    taken = {id(p) for p in matrices} | {id(model.embed.weight)}
    scalars = [p for p in model.parameters() if id(p) not in taken]
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Adam([model.embed.weight], lr=cfg.embed_lr, betas=betas, eps=cfg.adam_eps, fused=True),
        torch.optim.Adam(scalars, lr=cfg.scalar_lr, betas=betas, eps=cfg.adam_eps, fused=True),
        Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_ns_steps, cfg.muon_weight_decay, ranks),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


class Ema:
    """Exponential moving average of all parameters, kept in fp32 on the GPU."""

    def __init__(self, model: GPT, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def restart(self, model: GPT) -> None:
        for name, p in model.named_parameters():
            self.shadow[name].copy_(p)

    @torch.no_grad()
    def update(self, model: GPT) -> None:
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: GPT) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation and packing
# ---------------------------------------------------------------------------------------------------------------------


class ActivationStats:
    """Mean square of every input channel of every QLinear, gathered by forward hooks."""

    def __init__(self, model: GPT) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, QLinear):
                device = module.weight.device
                self.sums[name + ".weight"] = torch.zeros(module.in_features, device=device)
                self.rows[name + ".weight"] = torch.zeros((), device=device)
                self.hooks.append(module.register_forward_pre_hook(self._hook(name + ".weight")))

    def _hook(self, key: str):
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            self.sums[key] += x.square().sum(0)
            self.rows[key] += x.size(0)

        return record

    def finish(self, ranks: Ranks) -> dict[str, Tensor]:
        for hook in self.hooks:
            hook.remove()
        return {key: ranks.sum_(total) / ranks.sum_(self.rows[key]) for key, total in self.sums.items()}


CLIP_GRID = (1.0, 0.975, 0.95, 0.925, 0.9, 0.86, 0.82, 0.78)


def quantise_rows(weight: Tensor, limit: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Integers and per-row fp16 scales. Each row's clip is the one of the grid with the least weighted squared error."""
    weight = weight.float()
    factor = importance if importance is not None else torch.ones(weight.size(1), device=weight.device)
    best_error = torch.full((weight.size(0), 1), float("inf"), device=weight.device)
    best_scale = row_scale(weight, limit)
    for clip in CLIP_GRID:
        scale = (row_scale(weight, limit) * clip).half().float().clamp_min(6e-8)
        back = (weight / scale).round().clamp_(-limit, limit) * scale
        error = ((back - weight).square() * factor).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    ints = (weight / best_scale).round().clamp_(-limit, limit).to(torch.int8)
    return ints, best_scale.half()


def pack_state(state: dict[str, Tensor], stats: dict[str, Tensor], meta: dict[str, float], preset: int) -> bytes:
    """The whole model as one LZMA stream: int6 matrices, int8 embedding, fp16 for what is left."""
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_matrix(name, value):
            packed[name + "#q"], packed[name + "#s"] = (t.cpu() for t in quantise_rows(value, INT6_MAX, stats.get(name)))
        elif value.ndim == 2 and name.startswith("embed."):
            packed[name + "#q"], packed[name + "#s"] = (t.cpu() for t in quantise_rows(value, INT8_MAX, None))
        else:
            packed[name] = value.detach().half().cpu()
    buffer = io.BytesIO()
    torch.save({"tensors": packed, "meta": meta}, buffer)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(buffer.getvalue(), format=lzma.FORMAT_XZ, filters=filters)


def unpack_state(raw: bytes) -> tuple[dict[str, Tensor], dict[str, float]]:
    content = torch.load(io.BytesIO(lzma.decompress(raw)), map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = {}
    for name, value in content["tensors"].items():
        if name.endswith("#s"):
            continue
        if name.endswith("#q"):
            key = name[:-2]
            state[key] = value.float() * content["tensors"][key + "#s"].float()
        else:
            state[name] = value.float()
    return state, content["meta"]


@dataclass(frozen=True)
class SizeReport:
    code: int
    model: int

    @property
    def total(self) -> int:
        return self.code + self.model

    def check(self) -> None:
        if self.total > SIZE_LIMIT:
            raise RuntimeError(f"{self.total} bytes are more than {SIZE_LIMIT}")


def measure_size(artifact: Path) -> SizeReport:
    """Bytes of this file and of the packed model; nothing else is needed to evaluate."""
    return SizeReport(code=Path(__file__).stat().st_size, model=artifact.stat().st_size)


# ---------------------------------------------------------------------------------------------------------------------
# Trainer
# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """fit: the training loop; validate: a quick loss for the log; save: average, quantise, pack."""

    def __init__(self, cfg: Config, ranks: Ranks, table: ByteTable) -> None:
        self.cfg = cfg
        self.ranks = ranks
        self.table = table
        self.model = GPT(cfg).to(ranks.device)
        for p in self.model.parameters():
            if ranks.world > 1:
                dist.broadcast(p.data, src=0)
        self.loss_model = torch.compile(LossModel(self.model), dynamic=False, fullgraph=True)
        self.optimizers = build_optimizers(self.model, cfg, ranks)
        self.ema = Ema(self.model, cfg.ema_decay)
        self.loader = TrainLoader(cfg.train_pattern, ranks, cfg.seq_len)
        self.val_tokens = load_validation(cfg.val_pattern)
        self.clock = Stopwatch()
        self.history: list[dict[str, float]] = []
        self.step = 0
        self.spent = 0.0  # training seconds up to the last step, the same on all ranks
        self.accum = max(1, 8 // ranks.world)

    # -- schedule

    @property
    def budget(self) -> float:
        """Seconds of the 600 that the loop itself may use; the rest is for `save`."""
        return self.cfg.max_wallclock_s - self.cfg.reserve_s

    def progress(self) -> float:
        return max(self.spent / self.budget, self.step / self.cfg.iterations)

    def lr_scale(self, progress: float) -> float:
        if progress < 1.0 - self.cfg.warmdown_frac:
            return 1.0
        return max(0.0, (1.0 - progress) / self.cfg.warmdown_frac)

    def set_schedule(self, scale: float) -> None:
        frac = min(self.step / self.cfg.muon_momentum_steps, 1.0)
        momentum = (1 - frac) * self.cfg.muon_momentum_start + frac * self.cfg.muon_momentum
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if "momentum" in group:
                    group["momentum"] = momentum

    # -- steps

    def warm_up(self) -> None:
        """Compiles the step, with and without fake quantisation, on random tokens; all state is put back afterwards."""
        saved = copy.deepcopy(self.model.state_dict())
        local = self.cfg.train_batch_tokens // (self.ranks.world * self.accum)
        shape = (local // self.cfg.seq_len, self.cfg.seq_len)
        generator = torch.Generator(device=self.ranks.device).manual_seed(self.cfg.seed)
        for i in range(self.cfg.warmup_compile_steps):
            QLinear.qat = i >= self.cfg.warmup_compile_steps // 2
            noise = torch.randint(self.cfg.vocab_size, shape, device=self.ranks.device, generator=generator)
            loss = self.loss_model(noise, noise.roll(-1, dims=1))
            loss.backward()
            self.model.zero_grad(set_to_none=True)
        QLinear.qat = False
        self.model.load_state_dict(saved)
        LOGGER.info("compiled in %d random steps", self.cfg.warmup_compile_steps)

    def train_step(self, scale: float) -> Tensor:
        self.set_schedule(scale)
        total = torch.zeros((), device=self.ranks.device)
        for _ in range(self.accum):
            ids, targets = self.loader.next(self.cfg.train_batch_tokens // self.accum)
            loss = self.loss_model(ids, targets)
            (loss / self.accum).backward()
            total += loss.detach() / self.accum
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.ranks.world > 1:
            for grad in grads:
                dist.all_reduce(grad, op=dist.ReduceOp.AVG)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return total

    def fit(self) -> None:
        cfg = self.cfg
        self.warm_up()
        self.model.train()
        averaging = False
        self.clock.start()
        while self.step < cfg.iterations:
            if cfg.val_every and self.step % cfg.val_every == 0:
                self.clock.hold()
                self.validate()
                self.clock.start()
            scale = self.lr_scale(self.progress())
            if not QLinear.qat and scale < cfg.qat_start_scale and self.step > 0:
                QLinear.qat = True
                LOGGER.info("step:%d int6 fake quantisation on", self.step)
            loss = self.train_step(scale)
            self.step += 1
            if self.progress() >= cfg.ema_start_frac:
                if not averaging:
                    self.ema.restart(self.model)
                    averaging = True
                self.ema.update(self.model)
            torch.cuda.synchronize()
            self.spent = self.ranks.max(self.clock.seconds)
            if self.step % cfg.log_every == 0:
                LOGGER.info(
                    "step:%d train_loss:%.4f train_time:%.1fs step_avg:%.2fms",
                    *(self.step, loss.item(), self.spent, 1000 * self.spent / self.step),
                )
            if self.spent >= self.budget:
                LOGGER.info("step:%d stop, %.1fs of %.1fs used", self.step, self.spent, cfg.max_wallclock_s)
                break
        if not averaging:
            self.ema.restart(self.model)

    @torch.no_grad()
    def validate(self) -> float:
        """Bits per byte on non-overlapping windows, for the log."""
        cfg, ranks = self.cfg, self.ranks
        self.model.eval()
        rows = (self.val_tokens.numel() - 1) // cfg.seq_len
        per_batch = max(1, cfg.val_batch_tokens // (cfg.seq_len * ranks.world))
        mine = range(rows * ranks.rank // ranks.world, rows * (ranks.rank + 1) // ranks.world)
        sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        for first in range(mine.start, mine.stop, per_batch):
            last = min(first + per_batch, mine.stop)
            span = self.val_tokens[first * cfg.seq_len : last * cfg.seq_len + 1].to(ranks.device, torch.int64)
            ids, targets = span[:-1].view(-1, cfg.seq_len), span[1:].view(-1, cfg.seq_len)
            loss = F.cross_entropy(self.model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
            sums += torch.stack((loss.double(), sums.new_tensor(targets.numel()), self.table.count(ids, targets).sum().double()))
        ranks.sum_(sums)
        bpb = (sums[0] / math.log(2) / sums[2]).item()
        self.history.append({"step": self.step, "val_loss": (sums[0] / sums[1]).item(), "val_bpb": bpb})
        LOGGER.info("step:%d val_loss:%.4f val_bpb:%.4f", self.step, (sums[0] / sums[1]).item(), bpb)
        self.model.train()
        return bpb

    # -- after the loop, still on the training clock

    @torch.no_grad()
    def activation_stats(self) -> dict[str, Tensor]:
        """Second moments of the layers' inputs on the next batches of the training stream."""
        stats = ActivationStats(self.model)
        for _ in range(self.cfg.calib_batches):
            ids, _ = self.loader.next(self.cfg.train_batch_tokens // 4)
            self.model(ids)
        return stats.finish(self.ranks)

    @torch.no_grad()
    def fit_temperature(self) -> float:
        """The temperature that suits the rounded model best, on training batches it has not seen."""
        probe = copy.deepcopy(self.model)
        for name, p in probe.named_parameters():
            if is_matrix(name, p):
                scale = row_scale(p, INT6_MAX)
                p.copy_((p / scale).round().clamp(-INT6_MAX, INT6_MAX) * scale)
        grid = [0.94 + 0.01 * i for i in range(13)]
        sums = torch.zeros(len(grid), dtype=torch.float64, device=self.ranks.device)
        for _ in range(self.cfg.temp_batches):
            ids, targets = self.loader.next(self.cfg.train_batch_tokens // 8)
            logits = probe(ids).flatten(0, 1)
            for i, temperature in enumerate(grid):
                sums[i] += F.cross_entropy(logits / temperature, targets.flatten(), reduction="sum").double()
        self.ranks.sum_(sums)
        return grid[int(sums.argmin().item())]

    def save(self) -> SizeReport:
        """Averages, calibrates, quantises and writes the artifact. Returns its size."""
        cfg = self.cfg
        self.ema.copy_to(self.model)
        QLinear.qat = False
        self.model.eval()
        stats = self.activation_stats()
        meta = {"temperature": self.fit_temperature()}
        if self.ranks.main:
            raw = pack_state(self.model.state_dict(), stats, meta, cfg.lzma_preset)
            cfg.artifact_path.write_bytes(raw)
        self.ranks.barrier()
        self.clock.hold()
        report = measure_size(cfg.artifact_path)
        LOGGER.info("training and packing took %.1fs, temperature %.2f", self.clock.seconds, meta["temperature"])
        LOGGER.info("code %d bytes, model %d bytes, total %d bytes", report.code, report.model, report.total)
        if self.clock.seconds > cfg.max_wallclock_s:
            raise RuntimeError(f"training took {self.clock.seconds:.1f}s, more than {cfg.max_wallclock_s:.0f}s")
        report.check()
        return report


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over scored targets; on every rank its own, until `reduced`."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def add(self, nats: Tensor, sizes: Tensor) -> None:
        self.nats += nats.double().sum().item()
        self.tokens += nats.numel()
        self.bytes += int(sizes.sum().item())

    def merge(self, other: Tally) -> None:
        self.nats += other.nats
        self.tokens += other.tokens
        self.bytes += other.bytes

    def reduced(self, ranks: Ranks) -> Tally:
        sums = torch.tensor([self.nats, self.tokens, self.bytes], dtype=torch.float64, device=ranks.device)
        nats, tokens, size = ranks.sum_(sums).tolist()
        return Tally(nats, int(tokens), int(size))

    @property
    def loss(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2.0) / max(self.bytes, 1)


class BigramCache:
    """Decayed bigram counts of the tokens scored so far, mixed into the model's distribution.

    The mixing weight depends on how often the context token was seen, never on the target."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.size = cfg.vocab_size
        self.conc = cfg.cache_conc
        self.max_weight = cfg.cache_max_weight
        self.decay = cfg.cache_decay
        self.counts = torch.zeros(self.size, self.size, device=device)

    def update(self, tokens: Tensor) -> None:
        """Adds all pairs of a run of consecutive tokens."""
        pairs = tokens[:-1] * self.size + tokens[1:]
        fresh = torch.bincount(pairs, minlength=self.size * self.size).view(self.size, self.size)
        self.counts.mul_(self.decay).add_(fresh)

    def mix(self, probs: Tensor, context: Tensor) -> Tensor:
        """probs: positions x vocabulary, context: the token before each position's target."""
        rows = self.counts[context]
        seen = rows.sum(dim=-1, keepdim=True)
        weight = self.max_weight * seen / (seen + self.conc)
        return (1.0 - weight) * probs + weight * rows / seen.clamp_min(1e-6)


@dataclass(frozen=True)
class Windows:
    """A batch of windows: which of their positions are scored is told by `mask`."""

    ids: Tensor
    targets: Tensor
    mask: Tensor


class Evaluator:
    """Scores the validation tokens once, left to right in chunks, and adapts to each chunk after it was scored."""

    def __init__(self, cfg: Config, ranks: Ranks, model: GPT, temperature: float, table: ByteTable) -> None:
        self.cfg = cfg
        self.ranks = ranks
        self.model = model.eval()
        self.temperature = temperature
        self.table = table
        self.forward = torch.compile(model, dynamic=False)
        self.cache = BigramCache(cfg, ranks.device)
        self.clock = Stopwatch()
        self.chunks_adapted = 0
        gains = [p for name, p in model.named_parameters() if name.endswith(".gain")]
        for p in model.parameters():
            p.requires_grad_(False)
        self.adapted = [p.requires_grad_(True) for p in gains + [model.logit_bias]]
        self.anchor = [p.detach().clone() for p in self.adapted]
        groups = [dict(params=gains, lr=cfg.adapt_lr), dict(params=[model.logit_bias], lr=cfg.adapt_bias_lr)]
        self.optimizer = torch.optim.SGD(groups, momentum=cfg.adapt_momentum)

    # -- windows

    def blocks(self, first: int, last: int) -> list[tuple[int, int]]:
        """This rank's share of the stretches [first, last) is cut into, one window each."""
        stride = self.cfg.eval_stride
        cuts = [(begin, min(begin + stride, last)) for begin in range(first, last, stride)]
        return cuts[self.ranks.rank :: self.ranks.world]

    def gather(self, tokens: Tensor, blocks: list[tuple[int, int]]) -> Windows:
        """Windows that end with their block. Short ones and short batches are padded, padding is never scored."""
        cfg = self.cfg
        shape = (cfg.eval_batch, cfg.seq_len)
        ids = torch.zeros(shape, dtype=torch.int64)
        targets = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        for row, (begin, end) in enumerate(blocks):
            start = max(0, end - cfg.seq_len)
            ids[row, : end - start] = tokens[start:end]
            targets[row, : end - start] = tokens[start + 1 : end + 1]
            mask[row, begin - start : end - start] = True
        device = self.ranks.device
        return Windows(ids.to(device), targets.to(device), mask.to(device))

    def warm_up(self) -> None:
        shape = (self.cfg.eval_batch, self.cfg.seq_len)
        with torch.no_grad():
            for _ in range(2):
                self.forward(torch.randint(self.cfg.vocab_size, shape, device=self.ranks.device))

    # -- score, then adapt

    @torch.no_grad()
    def score(self, tokens: Tensor, first: int, last: int) -> Tally:
        """Losses of the targets of positions [first, last) under the present state; changes nothing."""
        tally = Tally()
        blocks = self.blocks(first, last)
        for i in range(0, len(blocks), self.cfg.eval_batch):
            batch = self.gather(tokens, blocks[i : i + self.cfg.eval_batch])
            logits = self.forward(batch.ids)[batch.mask]
            context, target = batch.ids[batch.mask], batch.targets[batch.mask]
            probs = torch.softmax(logits / self.temperature, dim=-1)
            if self.cfg.cache:
                probs = self.cache.mix(probs, context)
            nats = -probs.gather(1, target[:, None]).squeeze(1).clamp_min(1e-30).log()
            tally.add(nats, self.table.count(context, target))
        return tally

    def adapt(self, tokens: Tensor, first: int, last: int) -> None:
        """Some SGD on the gains and the bias with the chunk [first, last), all of whose targets have been scored."""
        length = self.cfg.seq_len
        rows = (last - first) // length
        if not rows:
            return
        span = tokens[first : first + rows * length + 1].to(self.ranks.device, torch.int64)
        ids, targets = span[:-1].view(rows, length), span[1:].view(rows, length)
        mine = slice(self.ranks.rank, None, self.ranks.world)
        for _ in range(self.cfg.adapt_epochs):
            self.optimizer.zero_grad(set_to_none=False)
            if ids[mine].numel():
                logits = self.model(ids[mine]).flatten(0, 1)
                loss = F.cross_entropy(logits, targets[mine].flatten(), reduction="sum") / targets.numel()
                loss.backward()
            for p, anchor in zip(self.adapted, self.anchor):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self.ranks.sum_(p.grad)
                p.grad.add_(p.detach() - anchor, alpha=self.cfg.adapt_pull)
            torch.nn.utils.clip_grad_norm_(self.adapted, 1.0)
            self.optimizer.step()
        self.chunks_adapted += 1

    def learn_counts(self, tokens: Tensor, first: int, last: int) -> None:
        self.cache.update(tokens[first : last + 1].to(self.ranks.device, torch.int64))

    def run(self, tokens: Tensor) -> Tally:
        """The score of all tokens but the first, over all ranks."""
        cfg = self.cfg
        self.warm_up()
        self.clock.start()
        total = Tally()
        count = tokens.numel() - 1
        chunks = range(0, count, cfg.chunk_tokens)
        adapting = bool(cfg.adapt)
        for number, first in enumerate(chunks):
            last = min(first + cfg.chunk_tokens, count)
            total.merge(self.score(tokens, first, last))
            if last == count:
                break
            if adapting and self.ranks.max(self.clock.seconds) > cfg.adapt_deadline_s:
                adapting = False
                LOGGER.info("chunk %d: out of time for adaptation, scoring only", number)
            if adapting:
                self.adapt(tokens, first, last)
            if cfg.cache:
                self.learn_counts(tokens, first, last)
            if number % 100 == 0:
                LOGGER.info("chunk %d/%d bpb %.4f (rank 0), %.0fs", number, len(chunks), total.bpb, self.clock.seconds)
        self.clock.hold()
        total = total.reduced(self.ranks)
        if total.tokens != count:
            raise RuntimeError(f"{total.tokens} tokens were scored, not {count}")
        return total


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def load_packed(cfg: Config, ranks: Ranks) -> tuple[GPT, float]:
    """The model as it is in the artifact, and its temperature."""
    state, meta = unpack_state(cfg.artifact_path.read_bytes())
    model = GPT(cfg).to(ranks.device)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"artifact does not fit: missing {missing}, unexpected {unexpected}")
    return model, float(meta["temperature"])


def write_results(cfg: Config, trainer: Trainer, size: SizeReport, evaluator: Evaluator, result: Tally) -> None:
    content = {
        "run_id": cfg.run_id,
        "seed": cfg.seed,
        "steps": trainer.step,
        "train_seconds": round(trainer.clock.seconds, 2),
        "history": trainer.history,
        "code_bytes": size.code,
        "model_bytes": size.model,
        "total_bytes": size.total,
        "temperature": evaluator.temperature,
        "chunks_adapted": evaluator.chunks_adapted,
        "eval_seconds": round(evaluator.clock.seconds, 2),
        "val_tokens": result.tokens,
        "val_bytes": result.bytes,
        "val_loss": result.loss,
        "val_bpb": result.bpb,
        "config": dataclasses.asdict(cfg),
    }
    path = Path(cfg.out_dir) / f"results_{cfg.run_id}.json"
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    LOGGER.info("results in %s", path)


def main() -> None:
    cfg = Config.from_env()
    ranks = init_ranks()
    setup_logging(cfg, ranks)
    seed_everything(cfg.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    LOGGER.info("python %s, torch %s, %d ranks", sys.version.split()[0], torch.__version__, ranks.world)
    LOGGER.info("config %s", json.dumps(dataclasses.asdict(cfg)))

    table = ByteTable(cfg.tokenizer_path, cfg.vocab_size, ranks.device)
    trainer = Trainer(cfg, ranks, table)
    LOGGER.info("%d parameters", sum(p.numel() for p in trainer.model.parameters()))
    trainer.fit()
    size = trainer.save()

    model, temperature = load_packed(cfg, ranks)
    val_tokens = load_validation(cfg.val_pattern)
    evaluator = Evaluator(cfg, ranks, model, temperature, table)
    result = evaluator.run(val_tokens)
    LOGGER.info("evaluation took %.1fs, %d chunks adapted to", evaluator.clock.seconds, evaluator.chunks_adapted)
    LOGGER.info("tokens %d, bytes %d", result.tokens, result.bytes)
    if ranks.main:
        write_results(cfg, trainer, size, evaluator, result)
    LOGGER.info("final val_loss:%.8f val_bpb:%.8f", result.loss, result.bpb)
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
