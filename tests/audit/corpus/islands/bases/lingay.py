"""Parameter Golf entry: U-Net GPT, Muon + Adam, int6 GPTQ, score-first adaptation at evaluation.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

The run is four phases, and a phase talks to the next one only through files in RUN_DIR:

    train     -> train.pt     averaged weights and the seconds already spent
    quantise  -> quant.pt     int6/int8 tensors with their scales
    pack      -> model.bin    what is submitted, besides this file
    evaluate  -> result.json  bits per byte over the whole validation split

Files are written to a temporary name and moved, so a phase that was killed leaves nothing behind. With RESUME=1 a phase
whose file carries the digest of this very script and of the settings is not run again.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import lzma
import math
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# ---------------------------------------------------------------------------------------------------------------------
# Registries
# ---------------------------------------------------------------------------------------------------------------------

_REGISTRY: dict[str, dict[str, Any]] = {}


def register(kind: str, name: str | None = None) -> Callable[[Any], Any]:
    """Class or function decorator: makes the thing available as build(kind, name, ...)."""

    def decorate(thing: Any) -> Any:
        table = _REGISTRY.setdefault(kind, {})
        key = name or thing.__name__.lower()
        if key in table:
            raise KeyError(f"{kind} {key!r} is registered twice")
        table[key] = thing
        return thing

    return decorate


def lookup(kind: str, name: str) -> Any:
    try:
        return _REGISTRY[kind][name]
    except KeyError:
        known = ", ".join(sorted(_REGISTRY.get(kind, {})))
        raise KeyError(f"no {kind} called {name!r} (known: {known})") from None


def build(kind: str, name: str, *args: Any, **kwargs: Any) -> Any:
    return lookup(kind, name)(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def env(name: str, default: Any) -> Any:
    """A field whose default is read from the environment and cast to the type of the given default."""

    def read() -> Any:
        raw = os.environ.get(name)
        if raw is None:
            return default
        if isinstance(default, bool):
            return raw not in ("0", "", "false", "False")
        return type(default)(raw)

    return field(default_factory=read)


@dataclass
class Settings:
    # files
    data_path: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = env("RUN_ID", "lingay")
    run_dir: str = env("RUN_DIR", "./runs")
    resume: bool = env("RESUME", False)
    seed: int = env("SEED", 1337)

    # model
    vocab_size: int = env("VOCAB_SIZE", 1024)
    num_layers: int = env("NUM_LAYERS", 11)
    model_dim: int = env("MODEL_DIM", 512)
    num_heads: int = env("NUM_HEADS", 8)
    num_kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_mult: int = env("MLP_MULT", 3)
    rope_base: float = env("ROPE_BASE", 10000.0)
    logit_softcap: float = env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init: float = env("QK_GAIN_INIT", 1.5)
    tied_init_std: float = env("TIED_INIT_STD", 0.005)

    # training
    train_batch_tokens: int = env("TRAIN_BATCH_TOKENS", 524288)
    seq_len: int = env("SEQ_LEN", 1024)
    iterations: int = env("ITERATIONS", 20000)
    warmup_steps: int = env("WARMUP_STEPS", 20)
    warmdown_iters: int = env("WARMDOWN_ITERS", 1800)
    max_wallclock_seconds: float = env("MAX_WALLCLOCK_SECONDS", 600.0)
    quantise_reserve_seconds: float = env("QUANTISE_RESERVE_SECONDS", 45.0)
    val_every: int = env("VAL_EVERY", 2000)
    log_every: int = env("LOG_EVERY", 200)

    # optimizers
    matrix_optimizer: str = env("MATRIX_OPTIMIZER", "muon")
    scalar_optimizer: str = env("SCALAR_OPTIMIZER", "adam")
    matrix_lr: float = env("MATRIX_LR", 0.025)
    scalar_lr: float = env("SCALAR_LR", 0.025)
    embed_lr: float = env("EMBED_LR", 0.035)
    muon_momentum: float = env("MUON_MOMENTUM", 0.98)
    muon_momentum_start: float = env("MUON_MOMENTUM_START", 0.90)
    muon_momentum_steps: int = env("MUON_MOMENTUM_STEPS", 1200)
    muon_weight_decay: float = env("MUON_WEIGHT_DECAY", 0.04)
    muon_backend_steps: int = env("MUON_BACKEND_STEPS", 5)
    grad_clip: float = env("GRAD_CLIP", 0.3)

    # averaging
    averager: str = env("AVERAGER", "ema")
    ema_decay: float = env("EMA_DECAY", 0.997)
    lawa_every: int = env("LAWA_EVERY", 60)
    lawa_keep: int = env("LAWA_KEEP", 10)

    # quantisation and packing
    quantiser: str = env("QUANTISER", "gptq")
    quant_bits: int = env("QUANT_BITS", 6)
    calib_sequences: int = env("CALIB_SEQUENCES", 256)
    gptq_block: int = env("GPTQ_BLOCK", 128)
    gptq_damp: float = env("GPTQ_DAMP", 0.01)
    codec: str = env("CODEC", "lzma")
    size_limit: int = env("SIZE_LIMIT", 16_000_000)

    # evaluation
    stride: int = env("EVAL_STRIDE", 64)
    eval_batch: int = env("EVAL_BATCH", 64)
    chunk_tokens: int = env("EVAL_CHUNK_TOKENS", 262144)
    eval_seconds: float = env("EVAL_SECONDS", 600.0)
    adapt_seconds: float = env("ADAPT_SECONDS", 470.0)
    logit_scale: float = env("LOGIT_SCALE", 1.0)
    adapt: bool = env("ADAPT", True)
    adapt_lr: float = env("ADAPT_LR", 2e-4)
    adapt_epochs: int = env("ADAPT_EPOCHS", 1)
    adapt_batch: int = env("ADAPT_BATCH", 8)
    adapt_params: str = env(
        "ADAPT_PARAMS", r"\.(attn_scale|mlp_scale|resid_mix|q_gain)$|^skip_weights$|^blocks\.(9|10)\.mlp\."
    )
    expert: str = env("EXPERT", "bigram")
    expert_weight: float = env("EXPERT_WEIGHT", 0.08)
    expert_prior: float = env("EXPERT_PRIOR", 400.0)

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    def digest(self) -> str:
        facts = {k: v for k, v in asdict(self).items() if k != "resume"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Ranks, log, phase files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    device: torch.device

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

    def agree(self, value: float) -> float:
        """Rank 0's value on every rank, so that all of them take the same branch."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, src=0)
        return float(box.item())


@contextmanager
def distributed_world() -> Iterator[World]:
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if 8 % size:
        raise ValueError(f"WORLD_SIZE={size} does not divide 8")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(backend="nccl", device_id=device)
    try:
        yield World(rank, local, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


class JsonLog:
    """One JSON object per line, in a file and on stdout. Other ranks than the first say nothing."""

    def __init__(self, path: Path, world: World) -> None:
        self.world = world
        self.start = time.perf_counter()
        self.file = path.open("a", encoding="utf-8") if world.main else None
        self.context: dict[str, Any] = {}

    def event(self, what: str, **fields: Any) -> None:
        if self.file is None:
            return
        record = {"event": what, "t": round(time.perf_counter() - self.start, 3), **self.context, **fields}
        line = json.dumps(record, ensure_ascii=False)
        print(line, file=self.file, flush=True)
        print(line, flush=True)

    @contextmanager
    def bound(self, **context: Any) -> Iterator[None]:
        old = self.context
        self.context = {**old, **context}
        try:
            yield
        finally:
            self.context = old

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class PhaseStore:
    """The files between the phases. A file counts only if it was written by this code with these settings."""

    def __init__(self, cfg: Settings, world: World) -> None:
        self.root = Path(cfg.run_dir) / cfg.run_id
        self.world = world
        self.resume = cfg.resume
        self.stamp = f"{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}-{cfg.digest()}"
        if world.main:
            self.root.mkdir(parents=True, exist_ok=True)
        world.barrier()

    def path(self, name: str) -> Path:
        return self.root / name

    def write_bytes(self, name: str, raw: bytes) -> None:
        if self.world.main:
            target = self.path(name)
            draft = target.with_name(target.name + ".tmp")
            with draft.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
            self.path(name + ".stamp").write_text(self.stamp, encoding="utf-8")
        self.world.barrier()

    def write(self, name: str, thing: Any) -> None:
        buffer = io.BytesIO()
        if self.world.main:
            torch.save(thing, buffer)
        self.write_bytes(name, buffer.getvalue())

    def read_bytes(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def read(self, name: str) -> Any:
        return torch.load(io.BytesIO(self.read_bytes(name)), map_location="cpu", weights_only=True)

    def have(self, name: str) -> bool:
        stamp = self.path(name + ".stamp")
        fresh = self.resume and self.path(name).is_file() and stamp.is_file() and stamp.read_text() == self.stamp
        return bool(self.world.agree(float(fresh)))


class Clock:
    """Seconds that count against the training cap. Carried from phase to phase by `spent`."""

    def __init__(self, limit: float, spent: float = 0.0) -> None:
        self.limit = limit
        self.spent = spent
        self.since: float | None = None

    def go(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def pause(self) -> None:
        torch.cuda.synchronize()
        if self.since is not None:
            self.spent += time.perf_counter() - self.since
        self.since = None

    def seconds(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.spent + running

    def left(self) -> float:
        return self.limit - self.seconds()


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
HEADER_INTS = 256


def read_shard(path: str | Path) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: {count} tokens promised, {tokens.size} found")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def shard_paths(pattern: str) -> list[Path]:
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no shard matches {pattern}")
    return paths


class TokenStream:
    """Endless tokens of the shards of a pattern, in order of their names."""

    def __init__(self, pattern: str) -> None:
        self.paths = shard_paths(pattern)
        self.index = 0
        self.tokens = read_shard(self.paths[0])
        self.offset = 0

    def take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        while count > 0:
            if self.offset >= self.tokens.numel():
                self.index = (self.index + 1) % len(self.paths)
                self.tokens = read_shard(self.paths[self.index])
                self.offset = 0
            part = self.tokens[self.offset : self.offset + count]
            parts.append(part)
            self.offset += part.numel()
            count -= part.numel()
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


class TrainLoader:
    """Every rank reads the same stream and keeps its own share of each global batch."""

    def __init__(self, pattern: str, world: World) -> None:
        self.stream = TokenStream(pattern)
        self.world = world

    def next_batch(self, global_tokens: int, seq_len: int, accum: int) -> Batch:
        local = global_tokens // (self.world.size * accum)
        span = local + 1
        block = self.stream.take(span * self.world.size)
        mine = block[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        inputs = mine[:-1].view(-1, seq_len).to(self.world.device, non_blocking=True)
        targets = mine[1:].view(-1, seq_len).to(self.world.device, non_blocking=True)
        return Batch(inputs, targets)


def load_validation(cfg: Settings) -> Tensor:
    """The whole validation split, as one row of tokens."""
    return torch.cat([read_shard(path).to(torch.int32) for path in shard_paths(cfg.val_files)]).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Bytes of tokens
# ---------------------------------------------------------------------------------------------------------------------


class ByteTable(NamedTuple):
    """Bytes of a token; whether it begins with a space; whether the token before makes that space vanish."""

    size: Tensor
    leading: Tensor
    boundary: Tensor

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        spaces = self.leading[target] & ~self.boundary[previous]
        return self.size[target].to(torch.float64) + spaces.to(torch.float64)


def byte_table(cfg: Settings, device: torch.device) -> ByteTable:
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    if sp.vocab_size() != cfg.vocab_size:
        raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE={cfg.vocab_size}")
    size = np.zeros(cfg.vocab_size, dtype=np.int32)
    leading = np.zeros(cfg.vocab_size, dtype=np.bool_)
    boundary = np.ones(cfg.vocab_size, dtype=np.bool_)
    for token in range(cfg.vocab_size):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        boundary[token] = False
        if sp.is_byte(token):
            size[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("\u2581"):
            leading[token] = True
            piece = piece[1:]
        size[token] = len(piece.encode("utf-8"))
    return ByteTable(*(torch.from_numpy(a).to(device) for a in (size, leading, boundary)))


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

CONTROL_PATTERN = re.compile(r"(attn_scale|mlp_scale|resid_mix|q_gain|skip_weights)")


class CastedLinear(nn.Linear):
    """Weights in fp32, product in the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    def __init__(self, head_dim: int, base: float, max_len: int) -> None:
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", angle.cos()[None, None], persistent=False)
        self.register_buffer("sin", angle.sin()[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos = self.cos[:, :, : x.size(-2)].to(x.dtype)
        sin = self.sin[:, :, : x.size(-2)].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Settings) -> None:
        super().__init__()
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.c_q = CastedLinear(cfg.model_dim, cfg.model_dim, bias=False)
        self.c_k = CastedLinear(cfg.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(cfg.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(cfg.model_dim, cfg.model_dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.rotary = Rotary(self.head_dim, cfg.rope_base, cfg.seq_len)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, dim = x.shape
        q = self.c_q(x).view(rows, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q = self.rotary(rms_norm(q)) * self.q_gain.to(x.dtype)[None, :, None, None]
        k = self.rotary(rms_norm(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.proj(y.transpose(1, 2).reshape(rows, length, dim))


class MLP(nn.Module):
    def __init__(self, cfg: Settings) -> None:
        super().__init__()
        self.fc = CastedLinear(cfg.model_dim, cfg.mlp_mult * cfg.model_dim, bias=False)
        self.proj = CastedLinear(cfg.mlp_mult * cfg.model_dim, cfg.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: Settings) -> None:
        super().__init__()
        self.attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))


class GPT(nn.Module):
    """Decoder with tied embeddings; the second half of the blocks gets the first half's activations back."""

    def __init__(self, cfg: Settings) -> None:
        super().__init__()
        self.softcap = cfg.logit_softcap
        self.encoder_layers = cfg.num_layers // 2
        self.decoder_layers = cfg.num_layers - self.encoder_layers
        skips = min(self.encoder_layers, self.decoder_layers)
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(skips, cfg.model_dim))
        nn.init.normal_(self.tok_emb.weight, std=cfg.tied_init_std)
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.proj.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = rms_norm(self.tok_emb(ids).to(torch.bfloat16))
        x0 = x
        kept: list[Tensor] = []
        for i in range(self.encoder_layers):
            x = self.blocks[i](x, x0)
            kept.append(x)
        for i in range(self.decoder_layers):
            if kept:
                x = x + self.skip_weights[i].to(x.dtype) * kept.pop()
            x = self.blocks[self.encoder_layers + i](x, x0)
        return rms_norm(x)

    def logits(self, ids: Tensor) -> Tensor:
        raw = F.linear(self.hidden(ids), self.tok_emb.weight.to(torch.bfloat16))
        return self.softcap * torch.tanh(raw.float() / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(ids)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def new_model(cfg: Settings, device: torch.device) -> GPT:
    return GPT(cfg).to(device).float()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------


class OptimizerLike(Protocol):
    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


@torch.compile
def orthogonalise(grad: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iteration of the fifth order, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + eps)
    flip = x.size(0) > x.size(1)
    if flip:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


@register("optimizer", "muon")
class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices are dealt to the ranks and the updates summed."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, steps: int, weight_decay: float, world: World):
        super().__init__(list(params), dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))
        self.world = world

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            flat = torch.zeros(sum(p.numel() for p in params), device=self.world.device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p.grad)
                    state["momentum"].mul_(group["momentum"]).add_(p.grad)
                    update = p.grad.add(state["momentum"], alpha=group["momentum"])
                    update = orthogonalise(update, group["steps"])
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.reshape(-1)
                at += p.numel()
            self.world.sum_(flat)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


@register("optimizer", "adam")
def adam(params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": list(params), "lr": lr}], betas=betas, eps=1e-8, fused=True)


def make_optimizers(cfg: Settings, model: GPT, world: World) -> list[OptimizerLike]:
    matrices = [p for n, p in model.blocks.named_parameters() if p.ndim == 2 and not CONTROL_PATTERN.search(n)]
    scalars = [p for n, p in model.blocks.named_parameters() if p.ndim < 2 or CONTROL_PATTERN.search(n)]
    scalars.append(model.skip_weights)
    optimizers: list[OptimizerLike] = [
        build(
            "optimizer",
            cfg.matrix_optimizer,
            matrices,
            lr=cfg.matrix_lr,
            momentum=cfg.muon_momentum,
            steps=cfg.muon_backend_steps,
            weight_decay=cfg.muon_weight_decay,
            world=world,
        ),
        build("optimizer", cfg.scalar_optimizer, scalars, lr=cfg.scalar_lr),
        build("optimizer", cfg.scalar_optimizer, [model.tok_emb.weight], lr=cfg.embed_lr),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------------------------------------------------------------
# Averages of the weights
# ---------------------------------------------------------------------------------------------------------------------


class Averager(Protocol):
    def update(self, model: nn.Module, step: int) -> None: ...

    def state(self) -> dict[str, Tensor]: ...


@register("averager", "ema")
class EmaAverager:
    def __init__(self, cfg: Settings, model: nn.Module) -> None:
        self.decay = cfg.ema_decay
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names, live = zip(*((n, p.detach()) for n, p in model.named_parameters()))
        torch._foreach_lerp_([self.shadow[n] for n in names], list(live), 1.0 - decay)

    def state(self) -> dict[str, Tensor]:
        return dict(self.shadow)


@register("averager", "lawa")
class LawaAverager:
    """The mean of the last few snapshots."""

    def __init__(self, cfg: Settings, model: nn.Module) -> None:
        self.every, self.keep = cfg.lawa_every, cfg.lawa_keep
        self.snapshots: list[dict[str, Tensor]] = [{n: p.detach().cpu() for n, p in model.named_parameters()}]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        if step % self.every == 0:
            self.snapshots.append({n: p.detach().cpu().clone() for n, p in model.named_parameters()})
            self.snapshots = self.snapshots[-self.keep :]

    def state(self) -> dict[str, Tensor]:
        return {n: sum(s[n] for s in self.snapshots) / len(self.snapshots) for n in self.snapshots[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Phase 1: train
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quick_validation(cfg: Settings, world: World, model: nn.Module, tokens: Tensor, table: ByteTable) -> tuple[float, float]:
    """Loss and bits per byte in disjoint rows. For the log of the training only."""
    rows = (tokens.numel() - 1) // cfg.seq_len
    first, last = rows * world.rank // world.size, rows * (world.rank + 1) // world.size
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    per_batch = 64
    model.eval()
    for row in range(first, last, per_batch):
        end = min(row + per_batch, last)
        part = tokens[row * cfg.seq_len : end * cfg.seq_len + 1].to(world.device, torch.int64)
        x, y = part[:-1].view(-1, cfg.seq_len), part[1:].view(-1, cfg.seq_len)
        loss = model(x, y)
        sums[0] += loss.double() * y.numel()
        sums[1] += y.numel()
        sums[2] += table.count(x.reshape(-1), y.reshape(-1)).sum()
    model.train()
    world.sum_(sums)
    nll, count, size = sums.tolist()
    return nll / count, nll / math.log(2.0) / size


def lr_scale(cfg: Settings, step: int, clock: Clock) -> float:
    """One, then down to nothing over the time that `warmdown_iters` steps take at the present pace."""
    if cfg.warmdown_iters <= 0:
        return 1.0
    per_step = clock.seconds() / max(step, 1)
    warmdown = cfg.warmdown_iters * per_step
    left = max(clock.left(), 0.0)
    return min(left / max(warmdown, 1e-9), 1.0) if step > 10 else 1.0


def prime_kernels(cfg: Settings, model: nn.Module, optimizers: list[OptimizerLike], loader: TrainLoader, accum: int) -> None:
    """Compiles forward, backward and step on training batches; the caller puts weights and states back."""
    for _ in range(cfg.warmup_steps):
        for _ in range(accum):
            batch = loader.next_batch(cfg.train_batch_tokens, cfg.seq_len, accum)
            (model(batch.inputs, batch.targets) / accum).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def phase_train(cfg: Settings, world: World, store: PhaseStore, log: JsonLog) -> None:
    accum = 8 // world.size
    base = new_model(cfg, world.device)
    compiled = torch.compile(base, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[world.local_rank], broadcast_buffers=False) if world.size > 1 else compiled
    log.event("model", params=sum(p.numel() for p in base.parameters()), world=world.size, accum=accum)

    val_tokens = load_validation(cfg)
    table = byte_table(cfg, world.device)

    start_state = {n: t.detach().clone() for n, t in base.state_dict().items()}
    prime_kernels(cfg, model, make_optimizers(cfg, base, world), TrainLoader(cfg.train_files, world), accum)
    base.load_state_dict(start_state)
    base.zero_grad(set_to_none=True)
    log.event("primed", steps=cfg.warmup_steps)

    optimizers = make_optimizers(cfg, base, world)
    loader = TrainLoader(cfg.train_files, world)
    averager: Averager = build("averager", cfg.averager, cfg, base)
    clock = Clock(cfg.max_wallclock_seconds - cfg.quantise_reserve_seconds)
    step = 0
    clock.go()
    while step < cfg.iterations:
        scale = lr_scale(cfg, step, clock)
        warm = min(step / max(cfg.muon_momentum_steps, 1), 1.0)
        momentum = (1 - warm) * cfg.muon_momentum_start + warm * cfg.muon_momentum
        train_loss = torch.zeros((), device=world.device)
        for micro in range(accum):
            if world.size > 1:
                model.require_backward_grad_sync = micro == accum - 1
            batch = loader.next_batch(cfg.train_batch_tokens, cfg.seq_len, accum)
            loss = model(batch.inputs, batch.targets)
            train_loss += loss.detach() / accum
            (loss / accum).backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if "momentum" in group:
                    group["momentum"] = momentum
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        averager.update(base, step)

        if step % cfg.log_every == 0 or step <= 5:
            log.event("step", step=step, loss=round(float(train_loss), 4), seconds=round(clock.seconds(), 2), lr=round(scale, 4))
        if cfg.val_every and step % cfg.val_every == 0:
            clock.pause()
            loss, bpb = quick_validation(cfg, world, compiled, val_tokens, table)
            log.event("val", step=step, val_loss=round(loss, 4), val_bpb=round(bpb, 4))
            clock.go()
        if world.agree(clock.left()) <= 0:
            log.event("wallclock", step=step, seconds=round(clock.seconds(), 2))
            break
    clock.pause()

    weights = {n: t.to("cpu") for n, t in averager.state().items()}
    store.write("train.pt", {"weights": weights, "seconds": world.agree(clock.seconds()), "steps": step})
    log.event("trained", steps=step, seconds=round(clock.seconds(), 2), peak_mib=torch.cuda.max_memory_allocated() >> 20)


# ---------------------------------------------------------------------------------------------------------------------
# Phase 2: quantise
# ---------------------------------------------------------------------------------------------------------------------


class QuantTensor(NamedTuple):
    """Whole numbers and one scale per row."""

    q: Tensor
    scale: Tensor

    def restore(self) -> Tensor:
        return self.q.float() * self.scale.float()[:, None]


def row_scales(w: Tensor, bits: int, clip: float = 0.9995) -> Tensor:
    top = float(2 ** (bits - 1) - 1)
    reach = torch.quantile(w.abs(), clip, dim=1)
    return (reach / top).clamp_min(1e-8).half().float()


class QuantiserFn(Protocol):
    def __call__(self, w: Tensor, hessian: Tensor | None, cfg: Settings, bits: int) -> QuantTensor: ...


@register("quantiser", "rtn")
def quantise_nearest(w: Tensor, hessian: Tensor | None, cfg: Settings, bits: int) -> QuantTensor:
    top = 2 ** (bits - 1) - 1
    scale = row_scales(w, bits)
    q = torch.clamp(torch.round(w / scale[:, None]), -top, top)
    return QuantTensor(q.to(torch.int8).cpu(), scale.half().cpu())


@register("quantiser", "gptq")
def quantise_gptq(w: Tensor, hessian: Tensor | None, cfg: Settings, bits: int) -> QuantTensor:
    """Column after column, the error of each pushed into those still to come (Frantar et al.)."""
    if hessian is None:
        return quantise_nearest(w, None, cfg, bits)
    top = 2 ** (bits - 1) - 1
    w = w.float().clone()
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(cfg.gptq_damp * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    scale = row_scales(w, bits)
    q = torch.zeros_like(w)
    columns = w.size(1)
    for first in range(0, columns, cfg.gptq_block):
        last = min(first + cfg.gptq_block, columns)
        errors = torch.zeros(w.size(0), last - first, device=w.device)
        for j in range(first, last):
            column = w[:, j]
            q[:, j] = torch.clamp(torch.round(column / scale), -top, top)
            error = (column - q[:, j] * scale) / upper[j, j]
            w[:, j:last] -= error[:, None] * upper[j, j:last][None, :]
            errors[:, j - first] = error
        if last < columns:
            w[:, last:] -= errors @ upper[first:last, last:]
    back = torch.argsort(order)
    return QuantTensor(q[:, back].to(torch.int8).cpu(), scale.half().cpu())


class HessianBook:
    """Sums x x^T of the inputs of every CastedLinear while it is open."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: m for name, m in model.named_modules() if isinstance(m, CastedLinear)}
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    def _hook(self, name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
            self.sums[name].addmm_(x.T, x)

        return add

    @contextmanager
    def open(self) -> Iterator[HessianBook]:
        with ExitStack() as stack:
            for name, module in self.modules.items():
                handle = module.register_forward_hook(self._hook(name))
                stack.callback(handle.remove)
            yield self

    def hessians(self, world: World) -> dict[str, Tensor]:
        rows = torch.tensor([float(self.rows)], device=world.device)
        world.sum_(rows)
        return {f"{name}.weight": world.sum_(h) / rows.clamp_min(1.0) for name, h in sorted(self.sums.items())}


def collect_hessians(cfg: Settings, world: World, model: GPT, clock: Clock, log: JsonLog) -> dict[str, Tensor]:
    """Hessians from training rows, inside the training cap: stops when half of what is left of it is gone."""
    book = HessianBook(model)
    loader = TrainLoader(cfg.train_files, world)
    per_rank = 4
    halt = world.agree(clock.left()) / 2
    seen = 0
    with book.open(), torch.no_grad():
        while seen < cfg.calib_sequences and world.agree(clock.left()) > halt:
            batch = loader.next_batch(per_rank * cfg.seq_len * world.size, cfg.seq_len, 1)
            model.hidden(batch.inputs)
            book.rows += batch.inputs.numel()
            seen += per_rank * world.size
    log.event("calibrated", sequences=seen, seconds=round(clock.seconds(), 2))
    return book.hessians(world)


def quantise_state(cfg: Settings, weights: dict[str, Tensor], hessians: dict[str, Tensor], world: World) -> dict[str, Any]:
    """Matrices in `quant_bits`, the embedding in eight, the small rest in half precision."""
    quantiser: QuantiserFn = lookup("quantiser", cfg.quantiser)
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if tensor.ndim == 2 and not CONTROL_PATTERN.search(name):
            bits = 8 if name.startswith("tok_emb") else cfg.quant_bits
            done = quantiser(tensor.to(world.device), hessians.get(name), cfg, bits)
            matrices[name] = (done.q, done.scale)
        else:
            plain[name] = tensor.half()
    return {"matrices": matrices, "plain": plain}


def phase_quantise(cfg: Settings, world: World, store: PhaseStore, log: JsonLog) -> None:
    record = store.read("train.pt")
    clock = Clock(cfg.max_wallclock_seconds, spent=float(record["seconds"]))
    model = new_model(cfg, world.device)
    model.load_state_dict(record["weights"])
    clock.go()
    hessians = collect_hessians(cfg, world, model, clock, log) if cfg.quantiser == "gptq" else {}
    state: dict[str, Any] = {}
    if world.main:
        state = quantise_state(cfg, record["weights"], hessians, world)
    world.barrier()
    clock.pause()
    seconds = world.agree(clock.seconds())
    if seconds > cfg.max_wallclock_seconds:
        raise RuntimeError(f"training and quantisation took {seconds:.1f} s of {cfg.max_wallclock_seconds:.0f} s")
    store.write("quant.pt", state)
    log.event("quantised", how=cfg.quantiser, seconds=round(seconds, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Phase 3: pack
# ---------------------------------------------------------------------------------------------------------------------


class Codec(Protocol):
    def squeeze(self, raw: bytes) -> bytes: ...

    def expand(self, raw: bytes) -> bytes: ...


@register("codec", "lzma")
class LzmaCodec:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26, "lc": 0, "pb": 0}]

    def squeeze(self, raw: bytes) -> bytes:
        return lzma.compress(raw, format=lzma.FORMAT_XZ, filters=self.filters)

    def expand(self, raw: bytes) -> bytes:
        return lzma.decompress(raw)


@register("codec", "zlib")
class ZlibCodec:
    def squeeze(self, raw: bytes) -> bytes:
        return zlib.compress(raw, 9)

    def expand(self, raw: bytes) -> bytes:
        return zlib.decompress(raw)


def pack_tensors(state: dict[str, Any]) -> bytes:
    """A JSON head with names and shapes, then the raw tensors: all whole numbers first, then all halves."""
    head: list[list[Any]] = []
    whole: list[bytes] = []
    halves: list[bytes] = []
    for name in sorted(state["matrices"]):
        q, scale = state["matrices"][name]
        head.append([name, "q", list(q.shape)])
        whole.append(q.contiguous().numpy().tobytes())
        halves.append(scale.contiguous().numpy().tobytes())
    for name in sorted(state["plain"]):
        tensor = state["plain"][name]
        head.append([name, "h", list(tensor.shape)])
        halves.append(tensor.contiguous().numpy().tobytes())
    front = json.dumps(head, separators=(",", ":")).encode()
    return len(front).to_bytes(4, "little") + front + b"".join(whole) + b"".join(halves)


def unpack_tensors(raw: bytes) -> dict[str, Tensor]:
    """The state dict of the model, in fp32, from what pack_tensors made."""
    length = int.from_bytes(raw[:4], "little")
    head = json.loads(raw[4 : 4 + length])
    body = memoryview(raw)[4 + length :]
    at = sum(math.prod(shape) for _, kind, shape in head if kind == "q")
    start = 0
    state: dict[str, Tensor] = {}

    def half(count: int) -> Tensor:
        nonlocal at
        values = np.frombuffer(body[at : at + 2 * count], dtype=np.float16).astype(np.float32)
        at += 2 * count
        return torch.from_numpy(values)

    for name, kind, shape in head:
        count = math.prod(shape)
        if kind == "q":
            q = np.frombuffer(body[start : start + count], dtype=np.int8).astype(np.float32)
            start += count
            state[name] = QuantTensor(torch.from_numpy(q).view(shape), half(shape[0])).restore()
        else:
            state[name] = half(count).view(shape)
    return state


def phase_pack(cfg: Settings, world: World, store: PhaseStore, log: JsonLog) -> None:
    raw = b""
    if world.main:
        codec: Codec = build("codec", cfg.codec)
        packed = pack_tensors(store.read("quant.pt"))
        raw = codec.squeeze(packed)
        if codec.expand(raw) != packed:
            raise RuntimeError("the packed model cannot be read back")
    store.write_bytes("model.bin", raw)
    code_bytes = Path(__file__).stat().st_size
    model_bytes = store.path("model.bin").stat().st_size
    total = code_bytes + model_bytes
    log.event("packed", codec=cfg.codec, code_bytes=code_bytes, model_bytes=model_bytes, total_bytes=total)
    if total > cfg.size_limit:
        raise RuntimeError(f"{total} bytes of code and model, {cfg.size_limit} allowed")


# ---------------------------------------------------------------------------------------------------------------------
# Phase 4: evaluate
#
# Position p (0 <= p < T) is the prediction of tokens[p + 1] from tokens[.. p]. Positions are cut into chunks; a chunk is
# scored by all ranks with the weights and the table that the chunks before it left behind, and only then learned from.
# ---------------------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    index: int
    first: int
    last: int
    final: bool


class Window(NamedTuple):
    """Reads inputs [start, end); the positions [score_from, end) are this window's to score."""

    start: int
    score_from: int
    end: int


class WindowBatch(NamedTuple):
    inputs: Tensor
    mask: Tensor
    previous: Tensor
    target: Tensor
    where: Tensor


class BatchScore(NamedTuple):
    chunk: int
    nll: Tensor
    size: Tensor
    where: Tensor


class EvalResult(NamedTuple):
    loss: float
    bpb: float
    tokens: int
    size: float
    seconds: float


class Hook(Protocol):
    """What takes part in an evaluation. All of it is called on every rank in the same order, except on_batch_scored."""

    def on_start(self, harness: EvalHarness) -> None: ...

    def on_batch_scored(self, harness: EvalHarness, score: BatchScore) -> None: ...

    def on_chunk_end(self, harness: EvalHarness, chunk: Chunk) -> None: ...

    def on_end(self, harness: EvalHarness) -> None: ...


class BaseHook:
    def on_start(self, harness: EvalHarness) -> None:
        pass

    def on_batch_scored(self, harness: EvalHarness, score: BatchScore) -> None:
        pass

    def on_chunk_end(self, harness: EvalHarness, chunk: Chunk) -> None:
        pass

    def on_end(self, harness: EvalHarness) -> None:
        pass


def plan_chunks(total: int, size: int) -> list[Chunk]:
    count = math.ceil(total / size)
    return [Chunk(i, i * size, min((i + 1) * size, total), i == count - 1) for i in range(count)]


def plan_windows(chunk: Chunk, seq_len: int, stride: int) -> list[Window]:
    """Stretches of `stride` positions, each read with as much context before it as fits."""
    windows = []
    for score_from in range(chunk.first, chunk.last, stride):
        end = min(score_from + stride, chunk.last)
        windows.append(Window(max(0, end - seq_len), score_from, end))
    return windows


def load_windows(tokens: Tensor, windows: list[Window], seq_len: int, device: torch.device) -> WindowBatch:
    """Rows of inputs, padded on the right where the stream has just begun, and the mask of what is scored."""
    inputs = torch.zeros(len(windows), seq_len, dtype=torch.int64)
    mask = torch.zeros(len(windows), seq_len, dtype=torch.bool)
    where: list[Tensor] = []
    for row, window in enumerate(windows):
        length = window.end - window.start
        inputs[row, :length] = tokens[window.start : window.end].to(torch.int64)
        mask[row, window.score_from - window.start : length] = True
        where.append(torch.arange(window.score_from, window.end))
    spots = torch.cat(where)
    previous = tokens[spots].to(torch.int64)
    target = tokens[spots + 1].to(torch.int64)
    return WindowBatch(*(t.to(device, non_blocking=True) for t in (inputs, mask, previous, target, spots)))


class Expert(Protocol):
    """A second predictor: log-probabilities of the mixture over the whole vocabulary, for every row."""

    def blend(self, log_probs: Tensor, previous: Tensor) -> Tensor: ...

    def absorb(self, previous: Tensor, target: Tensor) -> None: ...


@register("expert", "none")
class NoExpert:
    def __init__(self, cfg: Settings, device: torch.device) -> None:
        pass

    def blend(self, log_probs: Tensor, previous: Tensor) -> Tensor:
        return log_probs

    def absorb(self, previous: Tensor, target: Tensor) -> None:
        pass


@register("expert", "bigram")
class BigramExpert:
    """Counts of pairs among the tokens scored so far: one full row over the vocabulary for each previous token."""

    def __init__(self, cfg: Settings, device: torch.device) -> None:
        self.weight = cfg.expert_weight
        self.prior = cfg.expert_prior
        self.counts = torch.zeros(cfg.vocab_size, cfg.vocab_size, device=device)

    def blend(self, log_probs: Tensor, previous: Tensor) -> Tensor:
        rows = self.counts[previous]
        total = rows.sum(dim=-1, keepdim=True)
        share = self.weight * total / (total + self.prior)
        mixed = (1.0 - share) * log_probs.exp() + share * rows / total.clamp_min(1.0)
        return mixed.clamp_min(1e-12).log()

    def absorb(self, previous: Tensor, target: Tensor) -> None:
        ones = torch.ones(previous.numel(), device=self.counts.device)
        self.counts.index_put_((previous, target), ones, accumulate=True)


class ExpertHook(BaseHook):
    """Feeds the expert a chunk that has been scored."""

    def on_chunk_end(self, harness: EvalHarness, chunk: Chunk) -> None:
        span = harness.tokens[chunk.first : chunk.last + 1].to(harness.world.device, torch.int64)
        harness.expert.absorb(span[:-1], span[1:])


class AdaptHook(BaseHook):
    """Score first: after a chunk is scored, Adam on some of the parameters with the tokens of that very chunk."""

    def __init__(self, cfg: Settings, model: GPT) -> None:
        pattern = re.compile(cfg.adapt_params)
        self.cfg = cfg
        self.names = [n for n, _ in model.named_parameters() if pattern.search(n)]
        self.params = [p for n, p in model.named_parameters() if pattern.search(n)]
        if not self.params:
            raise ValueError(f"ADAPT_PARAMS={cfg.adapt_params!r} names no parameter")
        self.optimizer: OptimizerLike = build("optimizer", "adam", self.params, lr=cfg.adapt_lr, betas=(0.9, 0.99))
        self.steps = 0
        self.active = True

    def on_start(self, harness: EvalHarness) -> None:
        for p in harness.model.parameters():
            p.requires_grad_(False)
        harness.log.event("adapter", tensors=len(self.names), params=sum(p.numel() for p in self.params))

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Gradients on for the chosen parameters only, and off again whatever happens."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for p in self.params:
                p.requires_grad_(True)
                stack.callback(p.requires_grad_, False)
            yield

    def lr_at(self, harness: EvalHarness, chunk: Chunk) -> float:
        done = chunk.index / max(len(harness.chunks), 1)
        return self.cfg.adapt_lr * 0.5 * (1.0 + math.cos(math.pi * done))

    def on_chunk_end(self, harness: EvalHarness, chunk: Chunk) -> None:
        if chunk.final:
            return
        if self.active and harness.world.agree(harness.seconds()) > self.cfg.adapt_seconds:
            self.active = False
            harness.log.event("adapt_stop", chunk=chunk.index, seconds=round(harness.seconds(), 2))
        if not self.active:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(harness, chunk)
        with self.learning():
            for _ in range(self.cfg.adapt_epochs):
                for inputs, targets in self.rows(harness, chunk):
                    self.step(harness, inputs, targets)

    def rows(self, harness: EvalHarness, chunk: Chunk) -> Iterator[Batch]:
        """The chunk in disjoint rows; each rank takes its share, all take equally many batches."""
        world, seq_len = harness.world, self.cfg.seq_len
        per_step = self.cfg.adapt_batch * world.size
        count = (chunk.last - chunk.first) // seq_len
        for first in range(0, count - per_step + 1, per_step):
            row = first + world.rank * self.cfg.adapt_batch
            at = chunk.first + row * seq_len
            part = harness.tokens[at : at + self.cfg.adapt_batch * seq_len + 1].to(world.device, torch.int64)
            yield Batch(part[:-1].view(-1, seq_len), part[1:].view(-1, seq_len))

    def step(self, harness: EvalHarness, inputs: Tensor, targets: Tensor) -> None:
        loss = harness.learner(inputs, targets)
        loss.backward()
        for p in self.params:
            harness.world.sum_(p.grad)
            p.grad /= harness.world.size
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def on_end(self, harness: EvalHarness) -> None:
        harness.log.event("adapted", steps=self.steps, active=self.active)


class ProgressHook(BaseHook):
    """A line of the log every few chunks, with this rank's running loss."""

    def __init__(self, every: int = 16) -> None:
        self.every = every
        self.nll = 0.0
        self.count = 0

    def on_batch_scored(self, harness: EvalHarness, score: BatchScore) -> None:
        if score.chunk % self.every == 0:
            self.nll += float(score.nll.sum())
            self.count += score.nll.numel()

    def on_chunk_end(self, harness: EvalHarness, chunk: Chunk) -> None:
        if chunk.index % self.every == 0:
            mean = self.nll / max(self.count, 1)
            harness.log.event("chunk", index=chunk.index, loss=round(mean, 4), seconds=round(harness.seconds(), 2))
            self.nll, self.count = 0.0, 0


class Meter:
    """Sums of the score, and a ledger in which every position may be entered once."""

    def __init__(self, total: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.ledger = torch.zeros(total, dtype=torch.int32, device=device)

    def add(self, score: BatchScore) -> None:
        self.sums[0] += score.nll.double().sum()
        self.sums[1] += score.nll.numel()
        self.sums[2] += score.size.sum()
        self.ledger[score.where] += 1

    def result(self, world: World, seconds: float) -> EvalResult:
        world.sum_(self.sums)
        world.sum_(self.ledger)
        if not bool((self.ledger == 1).all()):
            raise RuntimeError("a position of the validation split was not scored exactly once")
        nll, count, size = self.sums.tolist()
        return EvalResult(nll / count, nll / math.log(2.0) / size, int(count), size, seconds)


class EvalHarness:
    """Owns the tokens, the meter and the order of things; the hooks hang on it."""

    def __init__(
        self, cfg: Settings, world: World, log: JsonLog, model: GPT, tokens: Tensor, table: ByteTable, hooks: list[Hook]
    ) -> None:
        self.cfg = cfg
        self.world = world
        self.log = log
        self.model = model
        self.tokens = tokens
        self.table = table
        self.hooks = hooks
        self.total = tokens.numel() - 1
        self.chunks = plan_chunks(self.total, cfg.chunk_tokens)
        self.expert: Expert = build("expert", cfg.expert, cfg, world.device)
        self.meter = Meter(self.total, world.device)
        self.predict = torch.compile(model.logits, dynamic=False, fullgraph=True)
        self.learner = torch.compile(model, dynamic=False, fullgraph=True)
        self.began = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def batches(self, chunk: Chunk) -> Iterator[WindowBatch]:
        """This rank's windows of a chunk, `eval_batch` at a time."""
        mine = plan_windows(chunk, self.cfg.seq_len, self.cfg.stride)[self.world.rank :: self.world.size]
        for first in range(0, len(mine), self.cfg.eval_batch):
            yield load_windows(self.tokens, mine[first : first + self.cfg.eval_batch], self.cfg.seq_len, self.world.device)

    def score(self, chunk: Chunk, batch: WindowBatch) -> BatchScore:
        """Negative log-likelihood at the masked positions, from a distribution over the whole vocabulary."""
        logits = self.predict(batch.inputs)[batch.mask] * self.cfg.logit_scale
        log_probs = F.log_softmax(logits.float(), dim=-1)
        log_probs = self.expert.blend(log_probs, batch.previous)
        nll = -log_probs.gather(1, batch.target[:, None]).squeeze(1)
        return BatchScore(chunk.index, nll, self.table.count(batch.previous, batch.target), batch.where)

    def run(self) -> EvalResult:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.log.bound(phase="evaluate"))
            self.model.eval()
            stack.callback(self.model.train)
            for hook in self.hooks:
                hook.on_start(self)
                stack.callback(hook.on_end, self)
            for chunk in self.chunks:
                for batch in self.batches(chunk):
                    score = self.score(chunk, batch)
                    self.meter.add(score)
                    for hook in self.hooks:
                        hook.on_batch_scored(self, score)
                self.world.barrier()
                for hook in self.hooks:
                    hook.on_chunk_end(self, chunk)
            torch.cuda.synchronize()
        return self.meter.result(self.world, self.seconds())


def restore_model(cfg: Settings, world: World, store: PhaseStore) -> GPT:
    """The model as it is submitted: from model.bin and nothing else."""
    codec: Codec = build("codec", cfg.codec)
    model = new_model(cfg, world.device)
    model.load_state_dict(unpack_tensors(codec.expand(store.read_bytes("model.bin"))))
    return model


def phase_evaluate(cfg: Settings, world: World, store: PhaseStore, log: JsonLog) -> None:
    began = time.perf_counter()
    model = restore_model(cfg, world, store)
    tokens = load_validation(cfg)
    hooks: list[Hook] = [ProgressHook(), ExpertHook()]
    if cfg.adapt:
        hooks.append(AdaptHook(cfg, model))
    harness = EvalHarness(cfg, world, log, model, tokens, byte_table(cfg, world.device), hooks)
    harness.began = began
    result = harness.run()
    if result.tokens != tokens.numel() - 1:
        raise RuntimeError(f"{result.tokens} positions scored, {tokens.numel() - 1} to score")
    if result.seconds > cfg.eval_seconds:
        log.event("eval_overrun", seconds=round(result.seconds, 2), limit=cfg.eval_seconds)
    log.event("evaluated", **result._asdict())
    store.write_bytes("result.json", json.dumps(result._asdict()).encode())


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    name: str
    output: str
    run: Callable[[Settings, World, PhaseStore, JsonLog], None]


PHASES = (
    Phase("train", "train.pt", phase_train),
    Phase("quantise", "quant.pt", phase_quantise),
    Phase("pack", "model.bin", phase_pack),
    Phase("evaluate", "result.json", phase_evaluate),
)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def set_backends() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def main() -> None:
    cfg = Settings()
    set_backends()
    with ExitStack() as stack:
        world = stack.enter_context(distributed_world())
        seed_everything(cfg.seed)
        store = PhaseStore(cfg, world)
        log = JsonLog(store.path("log.jsonl"), world)
        stack.callback(log.close)
        log.event("settings", **asdict(cfg))
        log.event("stamp", stamp=store.stamp, python=sys.version.split()[0], torch=torch.__version__)
        for phase in PHASES:
            if store.have(phase.output):
                log.event("phase_kept", phase=phase.name, file=phase.output)
                continue
            log.event("phase_start", phase=phase.name)
            began = time.perf_counter()
            phase.run(cfg, world, store, log)
            torch.cuda.empty_cache()
            log.event("phase_end", phase=phase.name, seconds=round(time.perf_counter() - began, 2))
        result = json.loads(store.read_bytes("result.json"))
        if world.main:
            print(f"final val_loss:{result['loss']:.8f} val_bpb:{result['bpb']:.8f} tokens:{result['tokens']}", flush=True)


if __name__ == "__main__":
    main()
