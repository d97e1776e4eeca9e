"""Parameter Golf submission "fuglo": an 11-layer GPT, Muon + AdamW, EMA, GPTQ int6, score-first test-time training.

The script is organised as a small framework: components (schedulers, averagers, quantizers, codecs, caches, evaluators)
are registered under a kind, `Runner` builds them from one configuration dictionary and executes the phases in order:

    warm-up -> training (wall clock) -> averaging -> calibration + GPTQ -> packing -> reading back -> evaluation

Every leaf of the configuration can be overridden through the environment as SECTION_KEY, e.g. TRAIN_SEQ_LEN=2048.
Launch with: torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import abc
import copy
import io
import json
import logging
import lzma
import math
import os
import random
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

LOG = logging.getLogger("fuglo")
SIZE_LIMIT = 16_000_000

CONFIG_JSON = """
{
  "run": {"name": "fuglo", "seed": 1337, "output_dir": "./runs", "log_level": "INFO"},
  "data": {
    "root": "./data/datasets/fineweb10B_sp1024",
    "train_glob": "fineweb_train_*.bin",
    "val_glob": "fineweb_val_*.bin",
    "tokenizer": "./data/tokenizers/fineweb_1024_bpe.model",
    "vocab_size": 1024
  },
  "model": {
    "layers": 11, "dim": 512, "heads": 8, "kv_heads": 4, "mlp_mult": 3, "rope_base": 10000.0, "rope_dims": 32,
    "softcap": 30.0, "qk_gain": 1.5, "pair_buckets": 2048, "pair_dim": 128, "embed_std": 0.005
  },
  "optimizer": {
    "matrix_lr": 0.025, "embed_lr": 0.035, "scalar_lr": 0.025, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
    "momentum": 0.99, "momentum_start": 0.92, "momentum_warmup_steps": 1500, "newton_schulz_steps": 5,
    "matrix_decay": 0.04, "embed_decay": 0.04, "grad_clip": 0.3
  },
  "schedule": {
    "kind": "wallclock_trapezoid", "iterations": 20000, "warmdown_frac": 0.48, "final_scale": 0.0,
    "max_wallclock_s": 600.0, "reserve_s": 45.0
  },
  "train": {
    "batch_tokens": 786432, "seq_len": 1024, "compile_warmup_steps": 12, "log_every": 250, "monitor_every": 4000
  },
  "average": {"kind": "ema", "decay": 0.997, "start_step": 200},
  "quantizer": {
    "kind": "gptq", "bits": 6, "embed_bits": 8, "calib_batches": 24, "calib_sequences": 16, "block": 128,
    "damp": 0.01, "min_numel": 65536
  },
  "codec": {"kind": "lzma", "preset": 9},
  "cache": {"kind": "online_bigram", "weight": 0.06, "prior": 48.0, "floor": 0.5},
  "monitor": {"kind": "plain", "seq_len": 1024, "batch_windows": 64, "chunk_tokens": 1048576, "budget_s": 600.0},
  "evaluator": {
    "kind": "score_first_ttt", "seq_len": 1024, "stride": 64, "batch_windows": 64, "chunk_tokens": 131072,
    "budget_s": 600.0, "adapt_until_s": 500.0, "adapt_epochs": 3, "adapt_lr": 0.002, "adapt_momentum": 0.9,
    "adapt_sequences": 4, "adapt_clip": 1.0, "frozen_blocks": 2
  }
}
"""

Config = dict[str, Any]


# --------------------------------------------------------------------------------------------------------------------
# Configuration, registry, logging
# --------------------------------------------------------------------------------------------------------------------


def load_config(environment: Mapping[str, str]) -> Config:
    """The built-in configuration with every leaf that the environment names replaced."""
    config: Config = json.loads(CONFIG_JSON)
    for section, values in config.items():
        for key, default in values.items():
            raw = environment.get(f"{section}_{key}".upper())
            if raw is not None:
                values[key] = type(default)(float(raw)) if isinstance(default, (int, float)) else raw
    return config


class Registry:
    """Maps (role, kind) to a class; `register` is the decorator, `build` the factory."""

    def __init__(self) -> None:
        self._classes: dict[tuple[str, str], type] = {}

    def register(self, role: str, kind: str) -> Callable[[type], type]:
        def decorate(cls: type) -> type:
            if (role, kind) in self._classes:
                raise KeyError(f"{role} {kind!r} is registered twice")
            self._classes[role, kind] = cls
            return cls

        return decorate

    def build(self, role: str, settings: Config, **dependencies: Any) -> Any:
        try:
            cls = self._classes[role, settings["kind"]]
        except KeyError:
            known = sorted(kind for r, kind in self._classes if r == role)
            raise KeyError(f"no {role} of kind {settings['kind']!r}; known: {known}") from None
        return cls(settings, **dependencies)


REGISTRY = Registry()


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> World:
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group("nccl", device_id=device)
        return cls(rank, local_rank, size, device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every rank as soon as it is true on one."""
        if self.size == 1:
            return flag
        shared = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared.item())

    def latest(self, seconds: float) -> float:
        """The largest reading of all ranks' clocks, so that all of them schedule alike."""
        if self.size == 1:
            return seconds
        shared = torch.tensor(seconds, device=self.device, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return float(shared.item())

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def configure_logging(world: World, folder: Path, level: str) -> None:
    """Rank 0 logs to stderr and to a file; the others log warnings only."""
    formatter = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / "train.log", mode="w"))
    for handler in handlers:
        handler.setFormatter(formatter)
        LOG.addHandler(handler)
    LOG.setLevel(level if world.main else "WARNING")


class Stopwatch:
    """Wall clock in seconds that can be paused; synchronises the device so that queued work is counted."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since: float | None = None

    def start(self) -> Stopwatch:
        torch.cuda.synchronize()
        self._since = time.perf_counter()
        return self

    def pause(self) -> float:
        torch.cuda.synchronize()
        if self._since is not None:
            self._spent += time.perf_counter() - self._since
            self._since = None
        return self._spent

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._spent + running


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


class TokenShard:
    """One .bin file: 256 int32 of header (magic, version, number of tokens), then uint16 tokens."""

    MAGIC = 20240520
    VERSION = 1
    HEADER_INTS = 256

    def __init__(self, path: Path) -> None:
        header = np.fromfile(path, dtype="<i4", count=self.HEADER_INTS)
        if header.size != self.HEADER_INTS or header[0] != self.MAGIC or header[1] != self.VERSION:
            raise ValueError(f"{path} is no token shard")
        self.path = path
        self.length = int(header[2])

    def read(self) -> Tensor:
        offset = self.HEADER_INTS * np.dtype("<i4").itemsize
        tokens = np.fromfile(self.path, dtype="<u2", count=self.length, offset=offset)
        if tokens.size != self.length:
            raise ValueError(f"{self.path} holds {tokens.size} tokens, its header says {self.length}")
        return torch.from_numpy(tokens)


def list_shards(root: Path, pattern: str) -> list[TokenShard]:
    paths = sorted(root.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no files {pattern} under {root}")
    return [TokenShard(path) for path in paths]


class TrainStream:
    """An endless stream over the training shards; each rank takes its own slice of every global batch."""

    def __init__(self, shards: list[TokenShard], world: World) -> None:
        self._shards = shards
        self._world = world
        self.rewind()

    def rewind(self) -> None:
        self._index = 0
        self._offset = 0
        self._tokens = self._shards[0].read()

    def _take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        while count > 0:
            available = self._tokens.numel() - self._offset
            if available <= 0:
                self._index = (self._index + 1) % len(self._shards)
                self._tokens = self._shards[self._index].read()
                self._offset = 0
                continue
            part = self._tokens[self._offset : self._offset + min(count, available)]
            self._offset += part.numel()
            count -= part.numel()
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def next_batch(self, sequences: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """`sequences` rows for this rank: inputs and the targets one token later."""
        span = sequences * seq_len + 1
        pooled = self._take(span * self._world.size)
        local = pooled[self._world.rank * span : (self._world.rank + 1) * span].to(torch.int64)
        inputs = local[:-1].view(sequences, seq_len).to(self._world.device, non_blocking=True)
        targets = local[1:].view(sequences, seq_len).to(self._world.device, non_blocking=True)
        return inputs, targets


class ByteTable:
    """How many bytes of the original UTF-8 text each token stands for, given the token before it."""

    MARK = "\u2581"

    def __init__(self, tokenizer: Path, vocab_size: int) -> None:
        pieces = spm.SentencePieceProcessor(model_file=str(tokenizer))
        if pieces.vocab_size() != vocab_size:
            raise ValueError(f"the tokenizer has {pieces.vocab_size()} pieces, the model {vocab_size}")
        self.base = np.zeros(vocab_size, dtype=np.int64)
        self.spaced = np.zeros(vocab_size, dtype=bool)
        self.silent = np.ones(vocab_size, dtype=bool)
        for token in range(vocab_size):
            if pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_unused(token):
                continue
            self.silent[token] = False
            if pieces.is_byte(token):
                self.base[token] = 1
                continue
            piece = pieces.id_to_piece(token)
            if piece.startswith(self.MARK):
                self.spaced[token] = True
                piece = piece[len(self.MARK) :]
            self.base[token] = len(piece.encode("utf-8"))

    def count(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """A leading space is a byte of text except where nothing stands before it."""
        return self.base[target] + (self.spaced[target] & ~self.silent[previous])


@dataclass
class ValidationText:
    """The whole validation split in order; position i is the prediction of tokens[i + 1] from tokens[: i + 1]."""

    tokens: np.ndarray
    table: ByteTable

    @classmethod
    def load(cls, root: Path, pattern: str, table: ByteTable) -> ValidationText:
        parts = [shard.read().numpy() for shard in list_shards(root, pattern)]
        return cls(np.concatenate(parts).astype(np.int64), table)

    @property
    def positions(self) -> int:
        return int(self.tokens.size) - 1

    def byte_counts(self, positions: np.ndarray) -> np.ndarray:
        return self.table.count(self.tokens[positions], self.tokens[positions + 1])


# --------------------------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights stay in float32, the product is computed in the activation's type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Rotary embedding on the first `dims` channels of each head."""

    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(-2)
        angles = torch.outer(torch.arange(length, device=x.device, dtype=torch.float32), self.frequencies)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        turned, kept = x[..., : self.dims], x[..., self.dims :]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat((first * cos + second * sin, second * cos - first * sin, kept), dim=-1)


class Attention(nn.Module):
    def __init__(self, settings: Config) -> None:
        super().__init__()
        dim, self.heads, self.kv_heads = settings["dim"], settings["heads"], settings["kv_heads"]
        self.head_dim = dim // self.heads
        self.query = CastedLinear(dim, dim, bias=False)
        self.key = CastedLinear(dim, self.kv_heads * self.head_dim, bias=False)
        self.value = CastedLinear(dim, self.kv_heads * self.head_dim, bias=False)
        self.out = CastedLinear(dim, dim, bias=False)
        self.out.zero_init = True
        self.gain = nn.Parameter(torch.full((self.heads,), float(settings["qk_gain"])))
        self.rotary = Rotary(settings["rope_dims"], settings["rope_base"])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = self.query(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.key(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.value(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = self.rotary(rms_norm(q)), self.rotary(rms_norm(k))
        q = q * self.gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class FeedForward(nn.Module):
    def __init__(self, settings: Config) -> None:
        super().__init__()
        dim, hidden = settings["dim"], settings["dim"] * settings["mlp_mult"]
        self.up = CastedLinear(dim, hidden, bias=False)
        self.down = CastedLinear(hidden, dim, bias=False)
        self.down.zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, settings: Config, index: int) -> None:
        super().__init__()
        dim = settings["dim"]
        self.attention = Attention(settings)
        self.feed_forward = FeedForward(settings)
        self.attention_scale = nn.Parameter(torch.ones(dim))
        self.feed_forward_scale = nn.Parameter(torch.ones(dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.depth_scale = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attention_scale.to(x.dtype) * self.attention(rms_norm(x) * self.depth_scale)
        return x + self.feed_forward_scale.to(x.dtype) * self.feed_forward(rms_norm(x) * self.depth_scale)


class PairEmbedding(nn.Module):
    """A hashed embedding of (previous input token, input token), projected to the model's width."""

    def __init__(self, settings: Config) -> None:
        super().__init__()
        self.buckets = settings["pair_buckets"]
        self.table = nn.Embedding(self.buckets, settings["pair_dim"])
        self.project = CastedLinear(settings["pair_dim"], settings["dim"], bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        previous = F.pad(tokens[:, :-1], (1, 0), value=0)
        bucket = torch.bitwise_xor(tokens * 36313, previous * 27191) % self.buckets
        return self.project(self.table(bucket).to(dtype)) * self.scale.to(dtype)


class LanguageModel(nn.Module):
    """A U-shaped stack of blocks with tied embeddings and soft-capped logits."""

    def __init__(self, settings: Config, vocab_size: int) -> None:
        super().__init__()
        self.softcap = settings["softcap"]
        layers = settings["layers"]
        self.embedding = nn.Embedding(vocab_size, settings["dim"])
        self.pairs = PairEmbedding(settings)
        self.blocks = nn.ModuleList(Block(settings, index) for index in range(layers))
        self.encoder_layers = layers // 2
        self.skip_weights = nn.Parameter(torch.ones(min(self.encoder_layers, layers - self.encoder_layers), settings["dim"]))
        self.reset_parameters(settings["embed_std"])

    def reset_parameters(self, embed_std: float) -> None:
        nn.init.normal_(self.embedding.weight, std=embed_std)
        nn.init.zeros_(self.pairs.table.weight)
        for module in self.modules():
            if isinstance(module, CastedLinear):
                if getattr(module, "zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).to(torch.bfloat16)
        x = rms_norm(x + self.pairs(tokens, x.dtype))
        x0, skips = x, []
        for index, block in enumerate(self.blocks):
            if index < self.encoder_layers:
                x = block(x, x0)
                skips.append(x)
            else:
                if skips:
                    x = x + self.skip_weights[index - self.encoder_layers].to(x.dtype) * skips.pop()
                x = block(x, x0)
        raw = F.linear(rms_norm(x), self.embedding.weight.to(x.dtype))
        return self.softcap * torch.tanh(raw.float() / self.softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# --------------------------------------------------------------------------------------------------------------------
# Optimisation
# --------------------------------------------------------------------------------------------------------------------


@torch.compile
def orthogonalise(gradient: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised; each rank computes a share of the matrices and all are summed."""

    def __init__(self, params: Iterable[nn.Parameter], settings: Config, world: World) -> None:
        defaults = dict(lr=settings["matrix_lr"], momentum=settings["momentum"], decay=settings["matrix_decay"])
        super().__init__(list(params), defaults)
        self._world = world
        self._steps = settings["newton_schulz_steps"]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params: list[nn.Parameter] = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=self._world.device, dtype=torch.bfloat16)
            offset = 0
            for index, param in enumerate(params):
                if index % self._world.size == self._world.rank and param.grad is not None:
                    state = self.state[param]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(param)
                    state["momentum"].mul_(group["momentum"]).add_(param.grad)
                    nesterov = param.grad.add(state["momentum"], alpha=group["momentum"])
                    update = orthogonalise(nesterov, self._steps)
                    update = update * max(1.0, param.size(0) / param.size(1)) ** 0.5
                    flat[offset : offset + param.numel()] = update.reshape(-1)
                offset += param.numel()
            self._world.sum_(flat)
            offset = 0
            for param in params:
                update = flat[offset : offset + param.numel()].view_as(param)
                param.mul_(1.0 - group["lr"] * group["decay"])
                param.add_(update.to(param.dtype), alpha=-group["lr"])
                offset += param.numel()


class OptimizerSuite:
    """Muon for the blocks' matrices, AdamW for embeddings and for everything that is small."""

    def __init__(self, model: LanguageModel, settings: Config, world: World) -> None:
        self._settings = settings
        matrices, embeddings, scalars = [], [], []
        for name, param in model.named_parameters():
            if name.startswith(("embedding.", "pairs.table.")):
                embeddings.append(param)
            elif param.ndim == 2 and min(param.shape) >= 64:
                matrices.append(param)
            else:
                scalars.append(param)
        betas = (settings["beta1"], settings["beta2"])
        self.muon = Muon(matrices, settings, world)
        self.adam = torch.optim.AdamW(
            [
                {"params": embeddings, "lr": settings["embed_lr"], "weight_decay": settings["embed_decay"]},
                {"params": scalars, "lr": settings["scalar_lr"], "weight_decay": 0.0},
            ],
            betas=betas,
            eps=settings["eps"],
            fused=True,
        )
        self._groups = self.muon.param_groups + self.adam.param_groups
        self._base_rates = [group["lr"] for group in self._groups]
        self._params = matrices + embeddings + scalars

    def step(self, step: int, scale: float) -> None:
        ramp = min(1.0, step / max(1, self._settings["momentum_warmup_steps"]))
        momentum = (1.0 - ramp) * self._settings["momentum_start"] + ramp * self._settings["momentum"]
        for group, rate in zip(self._groups, self._base_rates, strict=True):
            group["lr"] = rate * scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        if self._settings["grad_clip"] > 0:
            nn.utils.clip_grad_norm_(self._params, self._settings["grad_clip"])
        self.muon.step()
        self.adam.step()
        for param in self._params:
            param.grad = None

    def snapshot(self) -> list[dict[str, Any]]:
        return [copy.deepcopy(optimizer.state_dict()) for optimizer in (self.muon, self.adam)]

    def restore(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip((self.muon, self.adam), states, strict=True):
            optimizer.load_state_dict(state)
        self._groups = self.muon.param_groups + self.adam.param_groups


class Scheduler(abc.ABC):
    """Says how large the learning rate is and when training is over."""

    def __init__(self, settings: Config) -> None:
        self.iterations = int(settings["iterations"])
        self.train_seconds = settings["max_wallclock_s"] - settings["reserve_s"]
        self.limit_seconds = settings["max_wallclock_s"]
        self.settings = settings

    @abc.abstractmethod
    def scale(self, step: int, seconds: float) -> float: ...

    def finished(self, step: int, seconds: float) -> bool:
        return step >= self.iterations or seconds >= self.train_seconds


@REGISTRY.register("scheduler", "wallclock_trapezoid")
class WallclockTrapezoid(Scheduler):
    """Constant, then linear down over the last part of the wall clock (or of the iterations, whichever is nearer)."""

    def scale(self, step: int, seconds: float) -> float:
        progress = max(seconds / self.train_seconds, step / self.iterations)
        fraction = self.settings["warmdown_frac"]
        if progress < 1.0 - fraction:
            return 1.0
        return max(self.settings["final_scale"], (1.0 - progress) / fraction)


class Averager(abc.ABC):
    """Watches the weights during training and provides those that are handed in."""

    @abc.abstractmethod
    def update(self, model: nn.Module, step: int) -> None: ...

    @abc.abstractmethod
    def apply(self, model: nn.Module) -> None: ...


@REGISTRY.register("averager", "ema")
class ExponentialAverage(Averager):
    def __init__(self, settings: Config) -> None:
        self._decay = settings["decay"]
        self._start = settings["start_step"]
        self._shadow: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        if step < self._start:
            return
        params = dict(model.named_parameters())
        if not self._shadow:
            self._shadow = {name: param.detach().clone() for name, param in params.items()}
            return
        shadow = [self._shadow[name] for name in params]
        torch._foreach_lerp_(shadow, [param.detach() for param in params.values()], 1.0 - self._decay)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        for name, param in model.named_parameters():
            if name in self._shadow:
                param.copy_(self._shadow[name])


# --------------------------------------------------------------------------------------------------------------------
# Quantisation and packing
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class PackedTensor:
    """Integer codes with one scale per row, or plain half-precision values (scale is None)."""

    values: np.ndarray
    scale: np.ndarray | None = None

    def unpack(self) -> Tensor:
        values = torch.from_numpy(self.values.copy()).float()
        if self.scale is None:
            return values
        return values * torch.from_numpy(self.scale.copy()).float()[:, None]


class Quantizer(abc.ABC):
    """Turns the trained weights into packed tensors."""

    def __init__(self, settings: Config, world: World) -> None:
        self.settings = settings
        self.world = world

    def observe(self, model: LanguageModel, stream: TrainStream, seq_len: int) -> None:
        """Collects whatever the quantizer needs to know about activations; nothing by default."""

    @abc.abstractmethod
    def quantize(self, model: LanguageModel) -> dict[str, PackedTensor]: ...

    def bits_of(self, name: str) -> int:
        embedded = name.startswith(("embedding.", "pairs.table."))
        return self.settings["embed_bits"] if embedded else self.settings["bits"]

    @staticmethod
    def row_scales(weight: Tensor, bits: int) -> Tensor:
        """The scale of each row whose clipping gives the smallest squared error among a few candidates."""
        top = 2 ** (bits - 1) - 1
        peak = weight.abs().amax(dim=1).clamp_min(1e-8)
        best_scale = peak / top
        best_error = torch.full_like(peak, float("inf"))
        for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64):
            scale = (peak * shrink / top).half().float().clamp_min(1e-7)
            codes = (weight / scale[:, None]).round().clamp(-top - 1, top)
            error = (codes * scale[:, None] - weight).square().sum(dim=1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
        return best_scale

    def round_to_nearest(self, weight: Tensor, bits: int) -> PackedTensor:
        top = 2 ** (bits - 1) - 1
        scale = self.row_scales(weight, bits)
        codes = (weight / scale[:, None]).round().clamp(-top - 1, top)
        return PackedTensor(codes.to(torch.int8).cpu().numpy(), scale.half().cpu().numpy())


@REGISTRY.register("quantizer", "gptq")
class GptqQuantizer(Quantizer):
    """Second-order rounding; the Hessians come from forward passes over training batches."""

    def __init__(self, settings: Config, world: World) -> None:
        super().__init__(settings, world)
        self._hessians: dict[str, Tensor] = {}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def collect(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            self._hessians[name].addmm_(rows.T, rows)

        return collect

    @torch.no_grad()
    def observe(self, model: LanguageModel, stream: TrainStream, seq_len: int) -> None:
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                width = module.in_features
                self._hessians[f"{name}.weight"] = torch.zeros(width, width, device=self.world.device)
                handles.append(module.register_forward_hook(self._hook(f"{name}.weight")))
        for _ in range(self.settings["calib_batches"]):
            inputs, _ = stream.next_batch(self.settings["calib_sequences"], seq_len)
            model.logits(inputs)
        for handle in handles:
            handle.remove()
        for hessian in self._hessians.values():
            self.world.sum_(hessian)

    def _solve(self, weight: Tensor, hessian: Tensor, bits: int) -> PackedTensor:
        top = 2 ** (bits - 1) - 1
        weight, hessian = weight.clone(), hessian.clone()
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1.0
        weight[:, dead] = 0.0
        diagonal += self.settings["damp"] * diagonal.mean()
        order = torch.argsort(diagonal, descending=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        scale = self.row_scales(weight, bits)
        codes = torch.zeros_like(weight)
        columns, block = weight.size(1), self.settings["block"]
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            part = weight[:, start:stop].clone()
            errors = torch.zeros_like(part)
            factor = inverse[start:stop, start:stop]
            for j in range(stop - start):
                code = (part[:, j] / scale).round().clamp(-top - 1, top)
                codes[:, start + j] = code
                error = (part[:, j] - code * scale) / factor[j, j]
                part[:, j:] -= error[:, None] * factor[j, j:][None, :]
                errors[:, j] = error
            weight[:, stop:] -= errors @ inverse[start:stop, stop:]
        codes = codes[:, torch.argsort(order)]
        return PackedTensor(codes.to(torch.int8).cpu().numpy(), scale.half().cpu().numpy())

    @torch.no_grad()
    def quantize(self, model: LanguageModel) -> dict[str, PackedTensor]:
        packed: dict[str, PackedTensor] = {}
        for name, param in model.state_dict().items():
            weight = param.detach().float()
            if weight.ndim != 2 or weight.numel() < self.settings["min_numel"]:
                packed[name] = PackedTensor(weight.half().cpu().numpy())
            elif name in self._hessians:
                packed[name] = self._solve(weight, self._hessians[name], self.bits_of(name))
            else:
                packed[name] = self.round_to_nearest(weight, self.bits_of(name))
        self._hessians.clear()
        return packed


class Codec(Protocol):
    """Compresses a byte string without loss."""

    def compress(self, raw: bytes) -> bytes: ...

    def decompress(self, blob: bytes) -> bytes: ...


@REGISTRY.register("codec", "lzma")
class LzmaCodec:
    def __init__(self, settings: Config) -> None:
        preset = int(settings["preset"]) | lzma.PRESET_EXTREME
        self._filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 26}]

    def compress(self, raw: bytes) -> bytes:
        return lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=self._filters)

    def decompress(self, blob: bytes) -> bytes:
        return lzma.decompress(blob, format=lzma.FORMAT_XZ)


class ArtifactFile:
    """The packed model on disk: a JSON directory of arrays followed by their bytes, compressed as a whole."""

    def __init__(self, path: Path, codec: Codec) -> None:
        self.path = path
        self._codec = codec

    def write(self, tensors: Mapping[str, PackedTensor]) -> int:
        directory: list[dict[str, Any]] = []
        body = io.BytesIO()
        for name, tensor in tensors.items():
            for part, array in (("values", tensor.values), ("scale", tensor.scale)):
                if array is not None:
                    directory.append({"n": name, "p": part, "d": array.dtype.str, "s": list(array.shape)})
                    body.write(np.ascontiguousarray(array).tobytes())
        head = json.dumps(directory, separators=(",", ":")).encode()
        blob = self._codec.compress(struct.pack("<I", len(head)) + head + body.getvalue())
        self.path.write_bytes(blob)
        return len(blob)

    def read(self) -> dict[str, Tensor]:
        raw = self._codec.decompress(self.path.read_bytes())
        (head_size,) = struct.unpack_from("<I", raw)
        directory = json.loads(raw[4 : 4 + head_size])
        offset = 4 + head_size
        tensors: dict[str, PackedTensor] = {}
        for entry in directory:
            dtype, shape = np.dtype(entry["d"]), tuple(entry["s"])
            count = math.prod(shape)
            array = np.frombuffer(raw, dtype=dtype, count=count, offset=offset).reshape(shape)
            offset += count * dtype.itemsize
            if entry["p"] == "values":
                tensors[entry["n"]] = PackedTensor(array)
            else:
                tensors[entry["n"]].scale = array
        return {name: tensor.unpack() for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------------------------
# Evaluation: windows, batches, ledgers
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Input tokens [start, stop) of which the positions [first, stop) are scored."""

    start: int
    first: int
    stop: int


def plan_windows(first: int, stop: int, seq_len: int, stride: int) -> list[Window]:
    """Covers the positions [first, stop); each of them is scored in exactly one window."""
    windows = []
    for begin in range(first, stop, stride):
        end = min(begin + stride, stop)
        windows.append(Window(max(0, end - seq_len), begin, end))
    return windows


class WindowDataset(Dataset):
    """The windows of one rank, as arrays of inputs, targets and scored positions."""

    def __init__(self, text: ValidationText, windows: list[Window]) -> None:
        self._text = text
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        window = self._windows[index]
        tokens = self._text.tokens[window.start : window.stop + 1]
        positions = np.arange(window.start, window.stop)
        positions[: window.first - window.start] = -1
        return tokens[:-1], tokens[1:], positions


@dataclass
class Batch:
    """Padded windows; `scored` marks the entries that count, `positions` says which positions of the text they are."""

    inputs: Tensor
    targets: Tensor
    scored: Tensor
    positions: np.ndarray

    def to(self, device: torch.device) -> Batch:
        moved = (part.to(device, non_blocking=True) for part in (self.inputs, self.targets, self.scored))
        return Batch(*moved, self.positions)


@dataclass(frozen=True)
class WindowCollate:
    """Pads every window on the right to the same length, so that compiled shapes stay fixed."""

    seq_len: int

    def __call__(self, rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
        inputs = np.zeros((len(rows), self.seq_len), dtype=np.int64)
        targets = np.zeros_like(inputs)
        positions = np.full_like(inputs, -1)
        for i, (row_inputs, row_targets, row_positions) in enumerate(rows):
            inputs[i, : row_inputs.size] = row_inputs
            targets[i, : row_targets.size] = row_targets
            positions[i, : row_positions.size] = row_positions
        scored = positions >= 0
        return Batch(*map(torch.from_numpy, (inputs, targets, scored)), positions[scored])


class RankLedger:
    """What one rank scored: positions and their losses, written as one file of the shared folder."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank{rank:03d}.npz"
        self._positions: list[np.ndarray] = []
        self._losses: list[Tensor] = []

    def add(self, positions: np.ndarray, losses: Tensor) -> None:
        self._positions.append(positions)
        self._losses.append(losses)

    def save(self) -> None:
        positions = np.concatenate(self._positions) if self._positions else np.zeros(0, dtype=np.int64)
        losses = torch.cat(self._losses).cpu().numpy() if self._losses else np.zeros(0, dtype=np.float32)
        np.savez(self.path, positions=positions, losses=losses)


@dataclass(frozen=True)
class Score:
    """The merged result over the whole validation split."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    seconds: float = 0.0


def merge_ledgers(folder: Path, text: ValidationText, ranks: int) -> Score:
    """Merges the ranks' files; refuses unless every position was scored exactly once."""
    total = text.positions
    paths = sorted(folder.glob("rank*.npz"))
    if len(paths) != ranks:
        raise RuntimeError(f"{len(paths)} result files of {ranks} ranks")
    times_scored = np.zeros(total, dtype=np.int64)
    loss_sum = 0.0
    for path in paths:
        with np.load(path) as shard:
            times_scored += np.bincount(shard["positions"], minlength=total)
            loss_sum += float(shard["losses"].sum(dtype=np.float64))
    if not (times_scored == 1).all():
        raise RuntimeError(f"{int((times_scored != 1).sum())} positions were not scored exactly once")
    byte_sum = int(text.byte_counts(np.arange(total)).sum())
    return Score(loss_sum / total, loss_sum / math.log(2.0) / byte_sum, total, byte_sum)


# --------------------------------------------------------------------------------------------------------------------
# Caches
# --------------------------------------------------------------------------------------------------------------------


class Cache(Protocol):
    """State built from scored tokens that changes the predicted distribution."""

    def mix(self, log_probs: Tensor, context: Tensor) -> Tensor:
        """Normalised log-probabilities over the vocabulary, given the model's and the last input token of each row."""

    def update(self, tokens: Tensor) -> None:
        """Takes in tokens whose losses are already in the ledger."""


@REGISTRY.register("cache", "none")
class NoCache:
    def __init__(self, settings: Config, *, vocab_size: int, device: torch.device) -> None:
        pass

    def mix(self, log_probs: Tensor, context: Tensor) -> Tensor:
        return log_probs

    def update(self, tokens: Tensor) -> None:
        pass


@REGISTRY.register("cache", "online_bigram")
class OnlineBigramCache:
    """Exact, slowly forgotten bigram counts of the scored text; a full row of the table is mixed in for each context."""

    FORGET = 0.97

    def __init__(self, settings: Config, *, vocab_size: int, device: torch.device) -> None:
        self._settings = settings
        self._counts = torch.zeros(vocab_size, vocab_size, device=device)

    def mix(self, log_probs: Tensor, context: Tensor) -> Tensor:
        rows = self._counts[context]
        seen = rows.sum(dim=-1, keepdim=True)
        smoothed = rows + self._settings["floor"]
        cached = smoothed / smoothed.sum(dim=-1, keepdim=True)
        gate = self._settings["weight"] * seen / (seen + self._settings["prior"])
        mixed = torch.logaddexp(log_probs + torch.log1p(-gate), (cached * gate).clamp_min(1e-30).log())
        return mixed

    def update(self, tokens: Tensor) -> None:
        size = self._counts.size(0)
        pairs = tokens[:-1] * size + tokens[1:]
        fresh = torch.bincount(pairs, minlength=size * size).view(size, size)
        self._counts.mul_(self.FORGET).add_(fresh)


# --------------------------------------------------------------------------------------------------------------------
# Evaluators
# --------------------------------------------------------------------------------------------------------------------


class Evaluator(abc.ABC):
    """Scores the validation text chunk by chunk.

    Subclasses override the hooks: `begin` before the first chunk, `distribution` between the model and the loss,
    `chunk_scored` once all ranks have scored a chunk, `end` after the last one.
    """

    def __init__(
        self, settings: Config, *, model: LanguageModel, text: ValidationText, world: World, cache: Cache
    ) -> None:
        self.settings = settings
        self.model = model
        self.text = text
        self.world = world
        self.cache = cache
        self.seq_len = int(settings["seq_len"])
        self.watch = Stopwatch()
        self._collate = WindowCollate(self.seq_len)
        self._logits = torch.compile(model.logits, dynamic=False)

    @property
    @abc.abstractmethod
    def stride(self) -> int: ...

    # ---- hooks

    def begin(self) -> None:
        self.model.eval()

    def distribution(self, log_probs: Tensor, context: Tensor) -> Tensor:
        return log_probs

    def chunk_scored(self, first: int, stop: int) -> None:
        pass

    def end(self) -> None:
        pass

    # ---- the pass

    def run(self, folder: Path) -> Score:
        """One pass from left to right; the score is known to every rank."""
        self.watch.start()
        ledger = RankLedger(folder, self.world.rank)
        self.begin()
        total, chunk = self.text.positions, int(self.settings["chunk_tokens"])
        for first in range(0, total, chunk):
            stop = min(first + chunk, total)
            windows = plan_windows(first, stop, self.seq_len, self.stride)
            self.score_windows(windows[self.world.rank :: self.world.size], ledger)
            self.chunk_scored(first, stop)
        self.end()
        ledger.save()
        self.world.barrier()
        score = merge_ledgers(folder, self.text, self.world.size) if self.world.main else None
        score = self.world.share(score)
        seconds = self.watch.pause()
        return Score(score.loss, score.bits_per_byte, score.tokens, score.bytes, seconds)

    @torch.no_grad()
    def score_windows(self, windows: list[Window], ledger: RankLedger) -> None:
        if not windows:
            return
        loader = DataLoader(
            WindowDataset(self.text, windows),
            batch_size=int(self.settings["batch_windows"]),
            shuffle=False,
            collate_fn=self._collate,
        )
        for batch in loader:
            ledger.add(batch.positions, self.score_batch(batch.to(self.world.device)))

    def score_batch(self, batch: Batch) -> Tensor:
        """The losses of the batch's scored entries, in the order of its positions."""
        logits = self._logits(batch.inputs)[batch.scored]
        log_probs = self.distribution(F.log_softmax(logits.float(), dim=-1), batch.inputs[batch.scored])
        return -log_probs.gather(1, batch.targets[batch.scored][:, None]).squeeze(1)

    def span(self, first: int, stop: int) -> Tensor:
        """The tokens of the positions [first, stop): the first one's input up to the last one's target."""
        return torch.from_numpy(self.text.tokens[first : stop + 1]).to(self.world.device)


@REGISTRY.register("evaluator", "plain")
class PlainEvaluator(Evaluator):
    """Windows side by side, without overlap: fast, and a little pessimistic."""

    @property
    def stride(self) -> int:
        return self.seq_len


@REGISTRY.register("evaluator", "sliding")
class SlidingEvaluator(Evaluator):
    """Overlapping windows with the cache mixed in."""

    @property
    def stride(self) -> int:
        return int(self.settings["stride"])

    def distribution(self, log_probs: Tensor, context: Tensor) -> Tensor:
        return self.cache.mix(log_probs, context)

    def chunk_scored(self, first: int, stop: int) -> None:
        self.cache.update(self.span(first, stop))


@REGISTRY.register("evaluator", "score_first_ttt")
class ScoreFirstEvaluator(SlidingEvaluator):
    """After a chunk's losses are in the ledger, the model is trained on that chunk; only later chunks profit."""

    def begin(self) -> None:
        super().begin()
        frozen = tuple(f"blocks.{index}." for index in range(int(self.settings["frozen_blocks"])))
        self._tuned: list[nn.Parameter] = []
        for name, param in self.model.named_parameters():
            trainable = not name.startswith(frozen) if frozen else True
            param.requires_grad_(trainable)
            if trainable:
                self._tuned.append(param)
        self._optimizer = torch.optim.SGD(
            self._tuned, lr=self.settings["adapt_lr"], momentum=self.settings["adapt_momentum"]
        )
        self._loss = torch.compile(self.model, dynamic=False)
        self._steps = 0

    def chunk_scored(self, first: int, stop: int) -> None:
        super().chunk_scored(first, stop)
        last_chunk = stop >= self.text.positions
        late = self.world.any(self.watch.seconds > self.settings["adapt_until_s"])
        if last_chunk or late:
            return
        self.adapt(first, stop)

    def adapt(self, first: int, stop: int) -> None:
        """Some epochs of SGD on the positions [first, stop), the sequences spread over the ranks."""
        starts = list(range(first, stop - self.seq_len + 1, self.seq_len))
        rate = self.settings["adapt_lr"] * 0.5 * (1.0 + math.cos(math.pi * first / self.text.positions))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        pooled = self.world.size * int(self.settings["adapt_sequences"])
        for _ in range(int(self.settings["adapt_epochs"])):
            for offset in range(0, len(starts), pooled):
                self.adapt_step(starts[offset : offset + pooled])

    def adapt_step(self, starts: list[int]) -> None:
        mine = starts[self.world.rank :: self.world.size]
        self._optimizer.zero_grad(set_to_none=True)
        if mine:
            rows = torch.stack([self.span(start, start + self.seq_len) for start in mine])
            loss = self._loss(rows[:, :-1], rows[:, 1:])
            (loss * (len(mine) / len(starts))).backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self._tuned, self.settings["adapt_clip"])
        self._optimizer.step()
        self._steps += 1

    def _share_gradients(self) -> None:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self._tuned])
        self.world.sum_(flat)
        offset = 0
        for param in self._tuned:
            param.grad = flat[offset : offset + param.numel()].view_as(param).clone()
            offset += param.numel()

    def end(self) -> None:
        LOG.info("test-time training: %d steps in %.1f s", self._steps, self.watch.seconds)


# --------------------------------------------------------------------------------------------------------------------
# Runner
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Sizes:
    """The counted bytes of the submission."""

    code: int
    model: int

    @property
    def total(self) -> int:
        return self.code + self.model


@dataclass
class Components:
    """What the Runner wires together for the training phase."""

    stream: TrainStream
    optimizers: OptimizerSuite
    scheduler: Scheduler
    averager: Averager
    quantizer: Quantizer
    artifact: ArtifactFile
    history: list[tuple[int, float]] = field(default_factory=list)


class ScratchFolder:
    """A folder that all ranks see and that rank 0 removes at the end."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.path = Path()

    def __enter__(self) -> Path:
        made = tempfile.mkdtemp(prefix="fuglo_") if self._world.main else None
        self.path = Path(self._world.share(made))
        return self.path

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self._world.barrier()
        if self._world.main:
            shutil.rmtree(self.path, ignore_errors=True)


class Runner:
    """Builds the components from the configuration and runs the phases."""

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.world = world
        self.folder = Path(config["run"]["output_dir"]) / config["run"]["name"]
        self.data_root = Path(config["data"]["root"])
        self.vocab_size = int(config["data"]["vocab_size"])
        self.seq_len = int(config["train"]["seq_len"])
        rows = int(config["train"]["batch_tokens"]) // self.seq_len
        self.accumulation = max(1, 8 // world.size)
        self.rows_per_step = rows // (world.size * self.accumulation)
        self.train_watch = Stopwatch()
        self.sizes = Sizes(code=len(Path(__file__).read_bytes()), model=0)
        self._text: ValidationText | None = None

    # ---- wiring

    def seed_everything(self) -> None:
        seed = int(self.config["run"]["seed"])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True

    def new_model(self) -> LanguageModel:
        return LanguageModel(self.config["model"], self.vocab_size).to(self.world.device)

    def wire(self, model: LanguageModel) -> Components:
        config = self.config
        shards = list_shards(self.data_root, config["data"]["train_glob"])
        LOG.info("training shards: %d, %d tokens", len(shards), sum(shard.length for shard in shards))
        codec = REGISTRY.build("codec", config["codec"])
        return Components(
            stream=TrainStream(shards, self.world),
            optimizers=OptimizerSuite(model, config["optimizer"], self.world),
            scheduler=REGISTRY.build("scheduler", config["schedule"]),
            averager=REGISTRY.build("averager", config["average"]),
            quantizer=REGISTRY.build("quantizer", config["quantizer"], world=self.world),
            artifact=ArtifactFile(self.folder / "model.bin", codec),
        )

    def validation(self) -> ValidationText:
        """Read when a score is first asked for."""
        if self._text is None:
            data = self.config["data"]
            table = ByteTable(Path(data["tokenizer"]), self.vocab_size)
            self._text = ValidationText.load(self.data_root, data["val_glob"], table)
            LOG.info("validation positions: %d", self._text.positions)
        return self._text

    def evaluator(self, role: str, model: LanguageModel, cache: Config) -> Evaluator:
        built = REGISTRY.build("cache", cache, vocab_size=self.vocab_size, device=self.world.device)
        return REGISTRY.build(
            "evaluator", self.config[role], model=model, text=self.validation(), world=self.world, cache=built
        )

    # ---- phases

    def compile_warmup(self, model: LanguageModel, parallel: nn.Module, parts: Components) -> None:
        """Compiles all kernels on a few training batches, then puts everything back as it was."""
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        states = parts.optimizers.snapshot()
        for step in range(int(self.config["train"]["compile_warmup_steps"])):
            self.train_step(parallel, parts, step, 1.0)
        model.load_state_dict(weights)
        parts.optimizers.restore(states)
        parts.stream.rewind()

    def train_step(self, parallel: nn.Module, parts: Components, step: int, scale: float) -> Tensor:
        loss_sum = torch.zeros((), device=self.world.device)
        for micro in range(self.accumulation):
            if isinstance(parallel, DistributedDataParallel):
                parallel.require_backward_grad_sync = micro == self.accumulation - 1
            inputs, targets = parts.stream.next_batch(self.rows_per_step, self.seq_len)
            loss = parallel(inputs, targets) / self.accumulation
            loss.backward()
            loss_sum += loss.detach()
        parts.optimizers.step(step, scale)
        return loss_sum

    def monitor(self, model: LanguageModel, step: int, scratch: Path) -> None:
        """A look at the validation loss, for the log; the training clock is paused meanwhile."""
        seconds = self.train_watch.pause()
        folder = scratch / f"monitor_{step}"
        if self.world.main:
            folder.mkdir()
        self.world.barrier()
        score = self.evaluator("monitor", model, {"kind": "none"}).run(folder)
        LOG.info("step %d: val_loss:%.4f val_bpb:%.4f train_time:%.1fs", step, score.loss, score.bits_per_byte, seconds)
        model.train()
        self.train_watch.start()

    def train(self, model: LanguageModel, parts: Components, scratch: Path) -> int:
        settings = self.config["train"]
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
        parallel: nn.Module = compiled
        if self.world.size > 1:
            parallel = DistributedDataParallel(compiled, device_ids=[self.world.local_rank], broadcast_buffers=False)
        model.train()
        self.compile_warmup(model, parallel, parts)
        self.world.barrier()
        self.train_watch.start()
        step = 0
        while not parts.scheduler.finished(step, seconds := self.world.latest(self.train_watch.seconds)):
            scale = parts.scheduler.scale(step, seconds)
            loss = self.train_step(parallel, parts, step, scale)
            step += 1
            parts.averager.update(model, step)
            if step % int(settings["log_every"]) == 0:
                parts.history.append((step, loss.item()))
                LOG.info("step %d: train_loss:%.4f scale:%.3f %.1fs", step, loss.item(), scale, self.train_watch.seconds)
            if step % int(settings["monitor_every"]) == 0:
                self.monitor(model, step, scratch)
        LOG.info("training stopped at step %d after %.1f s", step, self.train_watch.seconds)
        return step

    def pack(self, model: LanguageModel, parts: Components) -> None:
        """Averaging, calibration on training batches, rounding and writing: all on the training clock."""
        parts.averager.apply(model)
        model.eval()
        parts.quantizer.observe(model, parts.stream, self.seq_len)
        if self.world.main:
            self.sizes.model = parts.artifact.write(parts.quantizer.quantize(model))
        self.world.barrier()
        seconds = self.train_watch.pause()
        LOG.info("artifact written at %.1f s of the training clock", seconds)
        if self.world.main:
            LOG.info("model bytes: %d, code bytes: %d, total: %d", self.sizes.model, self.sizes.code, self.sizes.total)
            if self.sizes.total > SIZE_LIMIT:
                raise RuntimeError(f"the submission has {self.sizes.total} bytes, {SIZE_LIMIT} are allowed")
            if seconds > parts.scheduler.limit_seconds:
                raise RuntimeError(f"training took {seconds:.1f} s")

    def evaluate(self, artifact: ArtifactFile, scratch: Path) -> Score:
        """Scores the model as it was packed: everything is read back from the artifact."""
        model = self.new_model()
        model.load_state_dict(artifact.read(), strict=True)
        folder = scratch / "final"
        if self.world.main:
            folder.mkdir()
        self.world.barrier()
        score = self.evaluator("evaluator", model, self.config["cache"]).run(folder)
        LOG.info("evaluation: %d tokens, %d bytes, %.1f s", score.tokens, score.bytes, score.seconds)
        if score.seconds > self.config["evaluator"]["budget_s"]:
            raise RuntimeError(f"evaluation took {score.seconds:.1f} s")
        return score

    def run(self) -> Score:
        self.seed_everything()
        model = self.new_model()
        LOG.info("parameters: %d, ranks: %d", sum(p.numel() for p in model.parameters()), self.world.size)
        parts = self.wire(model)
        with ScratchFolder(self.world) as scratch:
            self.train(model, parts, scratch)
            self.pack(model, parts)
            artifact = parts.artifact
            del model, parts
            torch.cuda.empty_cache()
            score = self.evaluate(artifact, scratch)
        LOG.info("final val_loss:%.8f val_bpb:%.8f", score.loss, score.bits_per_byte)
        return score


def main() -> None:
    config = load_config(os.environ)
    world = World.from_environment()
    configure_logging(world, Path(config["run"]["output_dir"]) / config["run"]["name"], config["run"]["log_level"])
    LOG.info("configuration: %s", json.dumps(config, sort_keys=True))
    try:
        Runner(config, world).run()
    finally:
        world.close()


if __name__ == "__main__":
    main()
