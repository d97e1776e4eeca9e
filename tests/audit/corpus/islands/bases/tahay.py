"""
Ternary gated-scan hybrid (non-record track).

A weekend experiment on top of the official train_gpt.py: what happens when most attention layers become a gated linear
recurrence (one scalar decay per head, in the manner of Mamba-2) and every matrix is ternary, BitNet style, with a
straight-through estimator?  At log2(3) bits a weight, 16 MB hold about 60M weights, which is what this trains.

    layers       10, of them 2 with attention and 8 with a gated scan; U-Net skips between the halves
    embedding    factored and tied, 8192 x 256 x 768
    optimiser    NeoMuon for matrices, Adam for the rest
    average      EMA of the latent weights
    packing      base 3 (five trits a byte), group scales in fp16, int8 embedding, LZMA
    evaluation   sliding windows with stride 16, one temperature fitted on training tokens

Run it as the baseline is run:

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import lzma
import math
import os
import random
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

SIZE_LIMIT = 16_000_000
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
BOS_ID = 1
TRITS_PER_BYTE = 5

# ----------------------------------------------------------------------------------------------------------------------
# settings
# ----------------------------------------------------------------------------------------------------------------------


def cast_setting(kind: type, raw: str):
    """Turns the text of an environment variable into the type of the setting's default."""
    if kind is bool:
        return raw.strip().lower() not in ("", "0", "false", "no")
    if kind is tuple:
        return tuple(int(part) for part in raw.split(",") if part.strip())
    return kind(raw)


@dataclass
class Config:
    """All settings. Every one can be overridden by an environment variable of the same name in capitals."""

    # data
    data_path: str = "./data/datasets/fineweb10B_sp8192"
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_bpe.model"
    train_glob: str = "fineweb_train_*.bin"
    val_glob: str = "fineweb_val_*.bin"
    run_id: str = ""
    seed: int = 1337

    # shape
    vocab_size: int = 8192
    embed_dim: int = 256
    model_dim: int = 768
    num_layers: int = 10
    attention_layers: tuple = (3, 7)
    attention_heads: int = 8
    attention_kv_heads: int = 4
    scan_heads: int = 8
    scan_key_dim: int = 48
    scan_chunk: int = 64
    conv_taps: int = 4
    mlp_mult: int = 3
    rope_base: float = 10_000.0
    logit_softcap: float = 30.0
    qk_gain_init: float = 1.5
    ternary_group: int = 128

    # length of the run
    iterations: int = 20_000
    warmup_steps: int = 20
    warmdown_iters: int = 2_000
    train_batch_tokens: int = 524_288
    train_seq_len: int = 1024
    max_wallclock_seconds: float = 600.0
    reserve_seconds: float = 30.0
    train_log_every: int = 200
    val_loss_every: int = 2_000

    # optimisers
    embed_lr: float = 0.05
    scalar_lr: float = 0.03
    matrix_lr: float = 0.035
    muon_momentum: float = 0.95
    muon_momentum_start: float = 0.85
    muon_momentum_steps: int = 500
    muon_newton_steps: int = 3
    muon_weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0

    # average
    ema_enable: bool = True
    ema_decay: float = 0.997
    ema_start_step: int = 500

    # after training, still within the cap
    calibration_batches: int = 16
    temperature_windows: int = 256
    temperature_low: float = 0.90
    temperature_high: float = 1.10
    temperature_points: int = 41

    # evaluation
    eval_seq_len: int = 1024
    eval_stride: int = 16
    eval_batch: int = 64

    # off unless asked for
    selftest: bool = False

    @classmethod
    def from_env(cls) -> "Config":
        values = {}
        for item in fields(cls):
            raw = os.environ.get(item.name.upper())
            if raw is not None:
                values[item.name] = cast_setting(type(item.default), raw)
        cfg = cls(**values)
        if not cfg.run_id:
            cfg.run_id = str(uuid.uuid4())
        return cfg

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, self.train_glob)

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, self.val_glob)

    def check(self) -> None:
        if self.model_dim % self.scan_heads or self.model_dim % self.attention_heads:
            raise ValueError("model_dim must be divisible by the number of heads")
        if self.model_dim % self.ternary_group or (self.mlp_mult * self.model_dim) % self.ternary_group:
            raise ValueError("matrix widths must be divisible by ternary_group")
        if any(not 0 <= layer < self.num_layers for layer in self.attention_layers):
            raise ValueError("attention_layers names a layer that does not exist")
        if self.reserve_seconds >= self.max_wallclock_seconds > 0:
            raise ValueError("reserve_seconds eats the whole run")
        if not 0 < self.eval_stride <= self.eval_seq_len:
            raise ValueError("eval_stride must lie between 1 and eval_seq_len")

    def lines(self) -> list[str]:
        return [f"{item.name}={getattr(self, item.name)}" for item in fields(self)]


# ----------------------------------------------------------------------------------------------------------------------
# ranks and the log
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Which process this is, of how many, on which device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def chief(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.size > 1


def open_world() -> World:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % size:
        raise ValueError(f"WORLD_SIZE={size} must divide 8 so that the batch stays the same")
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA device is needed")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return World(rank, local_rank, size, device)


def close_world() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(*values: Tensor) -> None:
    """In-place sum of every tensor over the ranks."""
    if dist.is_available() and dist.is_initialized():
        for value in values:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)


_LOG_FILE: Path | None = None
_LOG_RANK = 0


def open_log(cfg: Config, world: World) -> None:
    global _LOG_FILE, _LOG_RANK
    _LOG_RANK = world.rank
    if world.chief:
        os.makedirs("logs", exist_ok=True)
        _LOG_FILE = Path("logs") / f"{cfg.run_id}.txt"
        print(_LOG_FILE)


def print0(text: str, console: bool = True) -> None:
    """Prints on the first rank and writes to the log."""
    if _LOG_RANK != 0:
        return
    if console:
        print(text, flush=True)
    if _LOG_FILE is not None:
        with _LOG_FILE.open("a", encoding="utf-8") as file:
            print(text, file=file)


class Stopwatch:
    """Milliseconds of training, paused while the model is only being looked at."""

    def __init__(self) -> None:
        self.spent_ms = 0.0
        self.since: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def pause(self) -> float:
        torch.cuda.synchronize()
        if self.since is not None:
            self.spent_ms += 1000.0 * (time.perf_counter() - self.since)
            self.since = None
        return self.spent_ms

    def now_ms(self) -> float:
        running = 0.0 if self.since is None else 1000.0 * (time.perf_counter() - self.since)
        return self.spent_ms + running


# ----------------------------------------------------------------------------------------------------------------------
# optimiser: NeoMuon
# ----------------------------------------------------------------------------------------------------------------------


def newton_schulz(grad: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Orthogonalises a matrix by the quintic iteration, in bfloat16, as the baseline does."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + eps)
    flipped = grad.size(0) > grad.size(1)
    if flipped:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flipped else x


class NeoMuon(torch.optim.Optimizer):
    """
    Muon with fewer Newton-Schulz steps, made up for by equalising the rows' norms afterwards.

    Each rank orthogonalises its share of the matrices; the updates are then summed, so all ranks apply the same ones.
    """

    def __init__(self, params, lr: float, momentum: float, newton_steps: int, weight_decay: float):
        defaults = dict(lr=lr, momentum=momentum, newton_steps=newton_steps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @staticmethod
    def equal_rows(update: Tensor) -> Tensor:
        norms = update.norm(dim=1, keepdim=True)
        target = norms.square().mean().sqrt()
        return update * (target / norms.clamp_min(1e-6))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            offset = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p.grad)
                    buffer = state["momentum"]
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    update = p.grad.add(buffer, alpha=group["momentum"])
                    update = newton_schulz(update, group["newton_steps"])
                    update = self.equal_rows(update)
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[offset : offset + p.numel()] = update.reshape(-1)
                offset += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            offset = 0
            for p in params:
                update = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
                if group["weight_decay"]:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
                offset += p.numel()
        return loss


# ----------------------------------------------------------------------------------------------------------------------
# data
# ----------------------------------------------------------------------------------------------------------------------


def load_shard(path: Path) -> Tensor:
    """One shard's tokens. The header is 256 little-endian int32: magic, version, number of tokens."""
    header_bytes = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {path}")
    count = int(header[2])
    if path.stat().st_size != header_bytes + 2 * count:
        raise ValueError(f"shard {path} is not as long as its header says")
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=header_bytes)
    if tokens.size != count:
        raise ValueError(f"short read of {path}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def find_shards(pattern: str) -> list[Path]:
    found = [Path(name) for name in sorted(glob.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"no shards match {pattern}")
    return found


class TokenStream:
    """Reads the shards one after the other, for ever."""

    def __init__(self, pattern: str) -> None:
        self.files = find_shards(pattern)
        self.index = 0
        self.tokens = load_shard(self.files[0])
        self.position = 0

    def next_file(self) -> None:
        self.index = (self.index + 1) % len(self.files)
        self.tokens = load_shard(self.files[self.index])
        self.position = 0

    def take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        missing = count
        while missing > 0:
            left = self.tokens.numel() - self.position
            if left <= 0:
                self.next_file()
                continue
            size = min(missing, left)
            parts.append(self.tokens[self.position : self.position + size])
            self.position += size
            missing -= size
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class RankLoader:
    """Cuts one span a step out of the stream and gives each rank its part of it, shifted by one for the targets."""

    def __init__(self, pattern: str, world: World) -> None:
        self.world = world
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, accum_steps: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.world.size * accum_steps)
        span = local + 1
        chunk = self.stream.take(span * self.world.size)
        start = self.world.rank * span
        mine = chunk[start : start + span].to(torch.int64)
        inputs = mine[:-1].view(-1, seq_len)
        targets = mine[1:].view(-1, seq_len)
        return inputs.to(self.world.device, non_blocking=True), targets.to(self.world.device, non_blocking=True)


def load_validation(pattern: str) -> Tensor:
    """The whole validation split, in the order of its shards."""
    return torch.cat([load_shard(path) for path in find_shards(pattern)]).contiguous()


def training_tail(cfg: Config, count: int) -> Tensor:
    """The last tokens of the last training shard; a ten-minute run never gets that far."""
    last = find_shards(cfg.train_files)[-1]
    return load_shard(last)[-count:].contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# bytes of a token
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ByteTables:
    """What is needed to count the bytes of the original text that a token stands for."""

    length: Tensor  # bytes of the piece, without its mark of a leading space
    spaced: Tensor  # does the piece begin with a space?
    silent: Tensor  # a control token, of no bytes; also the start of a text for the token after it

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target. A leading space is not there when the token stands at a text's start."""
        size = self.length[target].to(torch.int64)
        return size + (self.spaced[target] & ~self.silent[previous]).to(torch.int64)


def make_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTables:
    size = max(int(sp.vocab_size()), vocab_size)
    length = np.zeros((size,), dtype=np.int16)
    spaced = np.zeros((size,), dtype=np.bool_)
    silent = np.ones((size,), dtype=np.bool_)
    for token in range(int(sp.vocab_size())):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        silent[token] = False
        if sp.is_byte(token):
            length[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("▁"):
            spaced[token] = True
            piece = piece[1:]
        length[token] = len(piece.encode("utf-8"))
    return ByteTables(
        torch.from_numpy(length).to(device),
        torch.from_numpy(spaced).to(device),
        torch.from_numpy(silent).to(device),
    )


def describe_validation(tokens: Tensor, tables: ByteTables, device: torch.device) -> None:
    """Logs how much there is to be scored: documents, tokens, bytes."""
    documents = int((tokens.to(torch.int32) == BOS_ID).sum())
    total_bytes = 0
    step = 1 << 22
    for start in range(0, tokens.numel() - 1, step):
        part = tokens[start : start + step + 1].to(device=device, dtype=torch.int64)
        total_bytes += int(tables.count(part[:-1], part[1:]).sum())
    targets = tokens.numel() - 1
    print0(f"validation: documents:{documents} targets:{targets} bytes:{total_bytes}")
    print0(f"validation: bytes_per_token:{total_bytes / targets:.4f}")


# ----------------------------------------------------------------------------------------------------------------------
# ternary matrices
# ----------------------------------------------------------------------------------------------------------------------


def ternarise(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes in {-1, 0, 1} and one scale (the mean magnitude) for each group of consecutive inputs."""
    grouped = weight.float().reshape(-1, group)
    scale = grouped.abs().mean(dim=1, keepdim=True).clamp_min(1e-6)
    codes = (grouped / scale).round().clamp(-1.0, 1.0)
    return codes, scale


class TernaryLinear(nn.Module):
    """
    A matrix without bias whose forward pass uses ternary weights, its backward pass the latent ones.

    Once the packed model has been read back, the weights are ternary times scale already and `frozen` is set: they are
    then used as they are.
    """

    def __init__(self, n_in: int, n_out: int, group: int, zero: bool = False) -> None:
        super().__init__()
        self.group = group
        self.frozen = False
        self.weight = nn.Parameter(torch.zeros(n_out, n_in))
        if not zero:
            nn.init.normal_(self.weight, std=n_in**-0.5)

    def effective(self) -> Tensor:
        if self.frozen:
            return self.weight
        codes, scale = ternarise(self.weight, self.group)
        hard = (codes * scale).view_as(self.weight)
        return self.weight + (hard - self.weight).detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective().to(x.dtype))


def ternary_layers(model: nn.Module) -> dict[str, TernaryLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}


@torch.no_grad()
def ternary_census(model: nn.Module) -> str:
    """Share of zeros among the codes, for the log."""
    zeros = total = 0
    for layer in ternary_layers(model).values():
        codes, _ = ternarise(layer.weight, layer.group)
        zeros += int((codes == 0).sum())
        total += codes.numel()
    return f"ternary weights:{total} zeros:{100.0 * zeros / max(total, 1):.2f}%"


# ----------------------------------------------------------------------------------------------------------------------
# layers
# ----------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def document_ids(tokens: Tensor) -> Tensor:
    """For every position how many documents have begun, itself included."""
    return (tokens == BOS_ID).to(torch.int32).cumsum(dim=1)


def gated_scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int) -> Tensor:
    """
    The recurrence S_t = exp(log_decay_t) S_{t-1} + k_t v_t', y_t = q_t S_t, computed chunk by chunk.

    q, k: batch, heads, time, key; v: batch, heads, time, value; log_decay: batch, heads, time, not above zero.
    Within a chunk it is a masked product, between chunks the state is handed on.
    """
    batch, heads, time_len, key_dim = q.shape
    value_dim = v.size(-1)
    pad = -time_len % chunk
    if pad:
        q, k, v = (F.pad(part, (0, 0, 0, pad)) for part in (q, k, v))
        log_decay = F.pad(log_decay, (0, pad))
    count = (time_len + pad) // chunk
    q = q.reshape(batch, heads, count, chunk, key_dim)
    k = k.reshape(batch, heads, count, chunk, key_dim)
    v = v.reshape(batch, heads, count, chunk, value_dim)
    total = log_decay.float().reshape(batch, heads, count, chunk).cumsum(dim=-1)

    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~causal, float("-inf"))
    inner = ((q @ k.transpose(-1, -2)) * between.exp().to(q.dtype)) @ v

    until_end = (total[..., -1:] - total).exp().to(q.dtype)
    written = ((k * until_end.unsqueeze(-1)).transpose(-1, -2) @ v).float()
    kept = total[..., -1].exp()
    state = torch.zeros(batch, heads, key_dim, value_dim, device=q.device, dtype=torch.float32)
    before = []
    for c in range(count):
        before.append(state)
        state = state * kept[:, :, c, None, None] + written[:, :, c]
    carried = torch.stack(before, dim=2).to(q.dtype)
    outer = (q * total.exp().to(q.dtype).unsqueeze(-1)) @ carried
    return (inner + outer).reshape(batch, heads, time_len + pad, value_dim)[:, :, :time_len]


class ShortConv(nn.Module):
    """A causal depthwise convolution over a few tokens that never reaches into the document before."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        weight = torch.zeros(taps, channels)
        weight[0] = 1.0
        self.taps = taps
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        y = x * weight[0]
        for lag in range(1, self.taps):
            earlier = F.pad(x, (0, 0, lag, 0))[:, :-lag]
            same = F.pad(documents, (lag, 0), value=-1)[:, :-lag] == documents
            y = y + earlier * same.unsqueeze(-1).to(x.dtype) * weight[lag]
        return F.silu(y)


class ScanMixer(nn.Module):
    """Gated linear recurrence: short convolutions, a scalar decay per head and token, an output gate."""

    RESET = -30.0  # log decay at a document's start

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        dim, group = cfg.model_dim, cfg.ternary_group
        self.heads = cfg.scan_heads
        self.key_dim = cfg.scan_key_dim
        self.value_dim = dim // cfg.scan_heads
        self.chunk = cfg.scan_chunk
        self.to_q = TernaryLinear(dim, self.heads * self.key_dim, group)
        self.to_k = TernaryLinear(dim, self.heads * self.key_dim, group)
        self.to_v = TernaryLinear(dim, dim, group)
        self.to_gate = TernaryLinear(dim, dim, group)
        self.out = TernaryLinear(dim, dim, group, zero=True)
        self.conv_q = ShortConv(self.heads * self.key_dim, cfg.conv_taps)
        self.conv_k = ShortConv(self.heads * self.key_dim, cfg.conv_taps)
        self.conv_v = ShortConv(dim, cfg.conv_taps)
        self.decay_weight = nn.Parameter(torch.zeros(self.heads, dim))
        self.decay_bias = nn.Parameter(torch.linspace(-4.5, -1.0, self.heads))
        self.write_weight = nn.Parameter(torch.zeros(self.heads, dim))
        self.head_gain = nn.Parameter(torch.ones(self.heads, self.value_dim))

    def split(self, x: Tensor, width: int) -> Tensor:
        batch, time_len, _ = x.shape
        return x.view(batch, time_len, self.heads, width).transpose(1, 2)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        batch, time_len, dim = x.shape
        q = self.split(self.conv_q(self.to_q(x), documents), self.key_dim)
        k = self.split(self.conv_k(self.to_k(x), documents), self.key_dim)
        v = self.split(self.conv_v(self.to_v(x), documents), self.value_dim)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)

        rate = F.softplus(F.linear(x, self.decay_weight.to(x.dtype)).float() + self.decay_bias.float())
        log_decay = -rate.transpose(1, 2)
        begins = F.pad(documents, (1, 0))[:, :-1] != documents
        log_decay = torch.where(begins[:, None, :], torch.full_like(log_decay, self.RESET), log_decay)
        write = 2.0 * torch.sigmoid(F.linear(x, self.write_weight.to(x.dtype))).transpose(1, 2).unsqueeze(-1)

        y = gated_scan(q, k * write.to(k.dtype), v, log_decay, self.chunk)
        y = rms(y) * self.head_gain.to(y.dtype)[None, :, None, :]
        y = y.transpose(1, 2).reshape(batch, time_len, dim)
        return self.out(y * F.silu(self.to_gate(x)))


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        frequency = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, time_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(time_len, device=self.frequency.device, dtype=torch.float32)
        angle = torch.outer(t, self.frequency)
        return angle.cos()[None, None].to(dtype), angle.sin()[None, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


class AttentionMixer(nn.Module):
    """The baseline's attention: grouped keys and values, normalised queries and keys, rotary positions."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        dim, group = cfg.model_dim, cfg.ternary_group
        self.heads = cfg.attention_heads
        self.kv_heads = cfg.attention_kv_heads
        self.head_dim = dim // self.heads
        kv_dim = self.kv_heads * self.head_dim
        self.to_q = TernaryLinear(dim, dim, group)
        self.to_k = TernaryLinear(dim, kv_dim, group)
        self.to_v = TernaryLinear(dim, kv_dim, group)
        self.out = TernaryLinear(dim, dim, group, zero=True)
        self.q_gain = nn.Parameter(torch.full((self.heads,), cfg.qk_gain_init))
        self.rotary = Rotary(self.head_dim, cfg.rope_base)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        batch, time_len, dim = x.shape
        q = self.to_q(x).view(batch, time_len, self.heads, self.head_dim).transpose(1, 2)
        k = self.to_k(x).view(batch, time_len, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.to_v(x).view(batch, time_len, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = self.rotary(time_len, q.dtype)
        q, k = rotate(rms(q), cos, sin), rotate(rms(k), cos, sin)
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.out(y.transpose(1, 2).reshape(batch, time_len, dim))


class SquaredMlp(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        hidden = cfg.mlp_mult * cfg.model_dim
        self.up = TernaryLinear(cfg.model_dim, hidden, cfg.ternary_group)
        self.down = TernaryLinear(hidden, cfg.model_dim, cfg.ternary_group, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, cfg: Config, index: int) -> None:
        super().__init__()
        self.mixer = AttentionMixer(cfg) if index in cfg.attention_layers else ScanMixer(cfg)
        self.mlp = SquaredMlp(cfg)
        self.mixer_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))

    def forward(self, x: Tensor, x0: Tensor, documents: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.mixer_scale.to(x.dtype) * self.mixer(rms(x), documents)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x))


class FactoredEmbedding(nn.Module):
    """vocab x embed_dim times embed_dim x model_dim, used at both ends."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(cfg.vocab_size, cfg.embed_dim) * 0.02)
        self.lift = nn.Parameter(torch.randn(cfg.embed_dim, cfg.model_dim) * cfg.embed_dim**-0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        rows = F.embedding(tokens, self.table)
        return rows @ self.lift.to(rows.dtype)

    def project(self, x: Tensor) -> Tensor:
        return (x @ self.lift.to(x.dtype).T) @ self.table.to(x.dtype).T


class HybridLM(nn.Module):
    """The whole model: embedding, the first half storing skips, the second half using them, logits."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.softcap = cfg.logit_softcap
        self.embedding = FactoredEmbedding(cfg)
        self.blocks = nn.ModuleList([Block(cfg, i) for i in range(cfg.num_layers)])
        self.encoder_layers = cfg.num_layers // 2
        self.decoder_layers = cfg.num_layers - self.encoder_layers
        self.skip_count = min(self.encoder_layers, self.decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.skip_count, cfg.model_dim))
        self.register_buffer("temperature", torch.ones((), dtype=torch.float32))

    def hidden(self, tokens: Tensor) -> Tensor:
        documents = document_ids(tokens)
        x = rms(self.embedding.embed(tokens))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.encoder_layers):
            x = self.blocks[i](x, x0, documents)
            skips.append(x)
        for i in range(self.decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(x.dtype) * skips.pop()
            x = self.blocks[self.encoder_layers + i](x, x0, documents)
        return rms(x)

    def logits(self, hidden: Tensor) -> Tensor:
        raw = self.embedding.project(hidden)
        return self.softcap * torch.tanh(raw.float() / self.softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(self.hidden(tokens))
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))


# ----------------------------------------------------------------------------------------------------------------------
# average of the weights
# ----------------------------------------------------------------------------------------------------------------------


class WeightAverage:
    """Exponential moving average of the latent weights, begun after some steps."""

    def __init__(self, model: nn.Module, decay: float, start_step: int) -> None:
        self.decay = decay
        self.start_step = start_step
        self.names = [name for name, _ in model.named_parameters()]
        self.shadow: list[Tensor] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        if step < self.start_step:
            return
        values = [p.detach() for p in model.parameters()]
        if self.shadow is None:
            self.shadow = [value.clone() for value in values]
            return
        torch._foreach_lerp_(self.shadow, values, 1.0 - self.decay)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> bool:
        if self.shadow is None:
            return False
        for p, value in zip(model.parameters(), self.shadow):
            p.copy_(value)
        return True


# ----------------------------------------------------------------------------------------------------------------------
# after training: scales and temperature, both from training tokens and both within the cap
# ----------------------------------------------------------------------------------------------------------------------


class InputPower:
    """Mean square of every input of every ternary matrix, gathered by hooks while batches pass."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = ternary_layers(model)
        self.sums = {name: torch.zeros(layer.weight.size(1), device=layer.weight.device) for name, layer in self.layers.items()}
        self.handles = [layer.register_forward_pre_hook(self.hook(name)) for name, layer in self.layers.items()]

    def hook(self, name: str):
        def gather(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().float()
            self.sums[name] += x.reshape(-1, x.size(-1)).square().mean(dim=0)

        return gather

    def close(self) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        sum_over_ranks(*self.sums.values())
        return self.sums


@torch.no_grad()
def calibrate_scales(model: HybridLM, loader: RankLoader, cfg: Config, accum_steps: int) -> dict[str, Tensor]:
    """
    Refits the scale of each group, the codes held fixed: the scale that least changes the layer's output when every
    input has the power it has on training text (a GPTQ with a diagonal Hessian and nothing left to round).
    """
    model.eval()
    power = InputPower(model)
    for _ in range(cfg.calibration_batches):
        inputs, _ = loader.next_batch(cfg.train_batch_tokens, cfg.train_seq_len, accum_steps)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.hidden(inputs[:32])
    gathered = power.close()
    scales = {}
    for name, layer in ternary_layers(model).items():
        codes, plain = ternarise(layer.weight, layer.group)
        weight = layer.weight.float().reshape(-1, layer.group)
        importance = gathered[name].reshape(1, -1).expand(layer.weight.size(0), -1).reshape(-1, layer.group)
        above = (importance * weight * codes).sum(dim=1, keepdim=True)
        below = (importance * codes * codes).sum(dim=1, keepdim=True)
        fitted = torch.where(below > 0, above / below.clamp_min(1e-12), plain)
        # The network was trained with the plain scales: go half of the way.
        scales[name] = (0.5 * (fitted + plain)).to(torch.float16)
    return scales


@torch.no_grad()
def fit_temperature(model: HybridLM, tokens: Tensor, cfg: Config, world: World) -> float:
    """The temperature, out of a grid, with which the model has the lowest loss on these training tokens."""
    grid = torch.linspace(cfg.temperature_low, cfg.temperature_high, cfg.temperature_points, device=world.device)
    losses = torch.zeros_like(grid, dtype=torch.float64)
    seq_len = cfg.eval_seq_len
    windows = (tokens.numel() - 1) // seq_len
    for index in range(world.rank, windows, world.size):
        part = tokens[index * seq_len : (index + 1) * seq_len + 1].to(device=world.device, dtype=torch.int64)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            hidden = model.hidden(part[None, :-1])
        logits = model.logits(hidden[0, seq_len // 2 :]).float()
        for i, t in enumerate(grid):
            losses[i] += F.cross_entropy(logits / t, part[1 + seq_len // 2 :], reduction="sum").double()
    sum_over_ranks(losses)
    best = int(losses.argmin())
    return float(grid[best])


# ----------------------------------------------------------------------------------------------------------------------
# packing
# ----------------------------------------------------------------------------------------------------------------------


def pack_trits(codes: Tensor) -> tuple[np.ndarray, int]:
    """Five codes of {-1, 0, 1} to a byte, in base 3."""
    digits = (codes.reshape(-1).to(torch.int16) + 1).cpu().numpy()
    count = digits.size
    digits = np.pad(digits, (0, -count % TRITS_PER_BYTE), constant_values=1).reshape(-1, TRITS_PER_BYTE)
    powers = 3 ** np.arange(TRITS_PER_BYTE, dtype=np.int16)
    return (digits * powers).sum(axis=1).astype(np.uint8), count


def unpack_trits(packed: np.ndarray, count: int) -> Tensor:
    rest = packed.astype(np.int16)
    digits = np.empty((packed.size, TRITS_PER_BYTE), dtype=np.int8)
    for i in range(TRITS_PER_BYTE):
        digits[:, i] = rest % 3
        rest = rest // 3
    return torch.from_numpy(digits.reshape(-1)[:count].astype(np.float32) - 1.0)


def int8_rows(value: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a row, the largest magnitude."""
    value = value.float()
    scale = (value.abs().amax(dim=1) / 127.0).clamp_min(1e-8)
    codes = (value / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes, scale.to(torch.float16)


def model_record(model: HybridLM, scales: dict[str, Tensor]) -> dict[str, object]:
    """Everything the evaluation needs, in the form in which it is stored."""
    layers = ternary_layers(model)
    record: dict[str, object] = {"trits": {}, "int8": {}, "plain": {}}
    for name, layer in layers.items():
        codes, _ = ternarise(layer.weight, layer.group)
        packed, count = pack_trits(codes)
        record["trits"][name] = (packed, count, scales[name].reshape(-1).cpu().numpy())
    for key, value in model.state_dict().items():
        if key.removesuffix(".weight") in layers:
            continue
        value = value.detach().cpu()
        if value.ndim == 2 and value.numel() > 65_536:
            codes, scale = int8_rows(value)
            record["int8"][key] = (codes.numpy(), scale.numpy())
        else:
            record["plain"][key] = value.to(torch.float16).numpy()
    return record


LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24, "lc": 0, "lp": 0, "pb": 0}]


def compress_record(record: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    torch.save(record, buffer)
    return lzma.compress(buffer.getvalue(), format=lzma.FORMAT_XZ, filters=LZMA_FILTERS)


def expand_record(blob: bytes) -> dict[str, object]:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=False)


@torch.no_grad()
def restore_model(blob: bytes, cfg: Config, device: torch.device) -> HybridLM:
    """A model made of nothing but the packed bytes."""
    record = expand_record(blob)
    model = HybridLM(cfg)
    state = model.state_dict()
    for name, (packed, count, scale) in record["trits"].items():
        codes = unpack_trits(packed, count).reshape(-1, cfg.ternary_group)
        weight = codes * torch.from_numpy(scale.astype(np.float32))[:, None]
        state[name + ".weight"].copy_(weight.view_as(state[name + ".weight"]))
    for key, (codes, scale) in record["int8"].items():
        state[key].copy_(torch.from_numpy(codes.astype(np.float32)) * torch.from_numpy(scale.astype(np.float32))[:, None])
    for key, value in record["plain"].items():
        state[key].copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))
    model.load_state_dict(state)
    for layer in ternary_layers(model).values():
        layer.frozen = True
    return model.to(device).eval()


def save_submission(record: dict[str, object], path: Path) -> int:
    """Writes the packed model, prints the sizes that count, and refuses what is too big."""
    blob = compress_record(record)
    path.write_bytes(blob)
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + len(blob)
    print0(f"Serialized model ternary+lzma: {len(blob)} bytes")
    print0(f"Code size: {code_bytes} bytes")
    print0(f"Total submission size: {total} bytes")
    if total > SIZE_LIMIT:
        raise RuntimeError(f"{total} bytes are more than {SIZE_LIMIT}")
    return total


# ----------------------------------------------------------------------------------------------------------------------
# evaluation
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """A stretch of tokens to read, and how many targets at its end are scored."""

    start: int
    end: int
    scored: int


def window_plan(targets: int, seq_len: int, stride: int) -> list[Window]:
    """Windows that together score each target exactly once, the first window all of its own."""
    plan = []
    done = 0
    while done < targets:
        end = min(done + (stride if done else seq_len), targets)
        plan.append(Window(max(0, end - seq_len), end, end - done))
        done = end
    return plan


def share_of(plan: list[Window], world: World) -> list[Window]:
    """This rank's part of the plan."""
    first = len(plan) * world.rank // world.size
    last = len(plan) * (world.rank + 1) // world.size
    return plan[first:last]


class Tally:
    """Sum of the losses, number of tokens and number of bytes."""

    def __init__(self, device: torch.device) -> None:
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.bytes = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, nll: Tensor, size: Tensor) -> None:
        self.nll += nll.double().sum()
        self.tokens += nll.numel()
        self.bytes += size.sum()

    def finish(self) -> tuple[float, float]:
        """Mean loss and bits per byte, over all ranks."""
        sum_over_ranks(self.nll, self.tokens, self.bytes)
        loss = float(self.nll / self.tokens)
        return loss, float(self.nll) / math.log(2.0) / float(self.bytes)


def read_windows(tokens: Tensor, batch: list[Window], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch of windows, filled up on the right where they differ in length."""
    longest = max(window.end - window.start for window in batch)
    inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, window in enumerate(batch):
        part = tokens[window.start : window.end + 1].to(torch.int64)
        inputs[row, : part.numel() - 1] = part[:-1]
        targets[row, : part.numel() - 1] = part[1:]
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


@torch.inference_mode()
def score_windows(
    model: HybridLM, hidden_of, tokens: Tensor, plan: list[Window], tables: ByteTables, cfg: Config, world: World
) -> tuple[float, float]:
    """Scores every window's last targets. hidden_of: the model's `hidden`, perhaps compiled."""
    tally = Tally(world.device)
    mine = share_of(plan, world)
    for first in range(0, len(mine), cfg.eval_batch):
        batch = mine[first : first + cfg.eval_batch]
        inputs, targets = read_windows(tokens, batch, world.device)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            hidden = hidden_of(inputs)
        for row, window in enumerate(batch):
            length = window.end - window.start
            begin = length - window.scored
            goal = targets[row, begin:length]
            logits = model.logits(hidden[row, begin:length]) / model.temperature
            nll = F.cross_entropy(logits, goal, reduction="none")
            tally.add(nll, tables.count(inputs[row, begin:length], goal))
    return tally.finish()


def quick_score(model: HybridLM, hidden_of, tokens: Tensor, tables: ByteTables, cfg: Config, world: World) -> tuple[float, float]:
    """Windows side by side: for the log during training and for the check of the packed model."""
    model.eval()
    plan = window_plan(tokens.numel() - 1, cfg.eval_seq_len, cfg.eval_seq_len)
    result = score_windows(model, hidden_of, tokens, plan, tables, cfg, world)
    model.train()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def make_optimizers(model: HybridLM, cfg: Config) -> list[torch.optim.Optimizer]:
    """NeoMuon for the ternary matrices, Adam for the embedding and for all that is small."""
    matrices = [layer.weight for layer in ternary_layers(model).values()]
    embedding = [model.embedding.table, model.embedding.lift]
    taken = {id(p) for p in matrices + embedding}
    small = [p for p in model.parameters() if id(p) not in taken]
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    muon = NeoMuon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_newton_steps, cfg.muon_weight_decay)
    adam_embedding = torch.optim.Adam(embedding, lr=cfg.embed_lr, betas=betas, eps=cfg.adam_eps, fused=True)
    adam_small = torch.optim.Adam(small, lr=cfg.scalar_lr, betas=betas, eps=cfg.adam_eps, fused=True)
    optimizers = [muon, adam_embedding, adam_small]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    print0(
        f"matrices:{sum(p.numel() for p in matrices)} embedding:{sum(p.numel() for p in embedding)} "
        f"small:{sum(p.numel() for p in small)}"
    )
    return optimizers


def lr_factor(step: int, elapsed_ms: float, budget_ms: float | None, cfg: Config) -> float:
    """Constant, then linear to zero over the last `warmdown_iters` steps that the clock leaves room for."""
    if cfg.warmdown_iters <= 0:
        return 1.0
    if budget_ms is None:
        start = max(cfg.iterations - cfg.warmdown_iters, 0)
        if step < start:
            return 1.0
        return max((cfg.iterations - step) / max(cfg.warmdown_iters, 1), 0.0)
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = cfg.warmdown_iters * step_ms
    left_ms = max(budget_ms - elapsed_ms, 0.0)
    return left_ms / max(warmdown_ms, 1e-9) if left_ms <= warmdown_ms else 1.0


class Trainer:
    """The model in training with all that belongs to it."""

    def __init__(self, cfg: Config, world: World) -> None:
        self.cfg = cfg
        self.world = world
        self.accum_steps = 8 // world.size
        self.model = HybridLM(cfg).to(world.device)
        compiled = torch.compile(self.model, dynamic=False)
        self.network = DDP(compiled, device_ids=[world.local_rank], broadcast_buffers=False) if world.distributed else compiled
        self.optimizers = make_optimizers(self.model, cfg)
        self.loader = RankLoader(cfg.train_files, world)
        self.average = WeightAverage(self.model, cfg.ema_decay, cfg.ema_start_step)
        self.watch = Stopwatch()
        self.budget_ms = None
        if cfg.max_wallclock_seconds > 0:
            self.budget_ms = 1000.0 * (cfg.max_wallclock_seconds - cfg.reserve_seconds)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> Tensor:
        """Forward and backward over one global batch; returns the mean loss of this rank."""
        cfg = self.cfg
        total = torch.zeros((), device=self.world.device)
        for micro in range(self.accum_steps):
            if self.world.distributed:
                self.network.require_backward_grad_sync = micro == self.accum_steps - 1
            inputs, targets = self.loader.next_batch(cfg.train_batch_tokens, cfg.train_seq_len, self.accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = self.network(inputs, targets)
            total += loss.detach() / self.accum_steps
            (loss / self.accum_steps).backward()
        return total

    def step(self, step: int, factor: float) -> Tensor:
        cfg = self.cfg
        self.zero_grad()
        loss = self.gradients()
        grown = min(step / max(cfg.muon_momentum_steps, 1), 1.0)
        for group in self.optimizers[0].param_groups:
            group["momentum"] = (1.0 - grown) * cfg.muon_momentum_start + grown * cfg.muon_momentum
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        if cfg.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if cfg.ema_enable:
            self.average.update(self.model, step)
        return loss

    def warm_up(self) -> None:
        """Compiles everything by a few steps on training batches, then puts weights, optimisers and data back."""
        cfg = self.cfg
        if cfg.warmup_steps <= 0:
            return
        weights = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]
        self.model.train()
        for i in range(cfg.warmup_steps):
            self.zero_grad()
            self.gradients()
            for optimizer in self.optimizers:
                optimizer.step()
            if (i + 1) % 10 == 0 or i + 1 == cfg.warmup_steps:
                print0(f"warmup_step:{i + 1}/{cfg.warmup_steps}")
        self.model.load_state_dict(weights)
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)
        self.zero_grad()
        if self.world.distributed:
            self.network.require_backward_grad_sync = True
        self.loader = RankLoader(cfg.train_files, self.world)

    def out_of_time(self) -> bool:
        """Whether any rank has used up the budget; all ranks get the same answer."""
        if self.budget_ms is None:
            return False
        reached = torch.tensor(int(self.watch.now_ms() >= self.budget_ms), device=self.world.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(reached, op=dist.ReduceOp.MAX)
        return bool(reached.item())

    def run(self, val_tokens: Tensor, tables: ByteTables) -> int:
        """Trains until the steps or the time are used up; returns the number of steps. The watch is left running."""
        cfg = self.cfg
        step = 0
        stopping = False
        self.model.train()
        self.watch.start()
        while True:
            last = stopping or step == cfg.iterations
            if cfg.val_loss_every > 0 and (step % cfg.val_loss_every == 0 or last):
                spent = self.watch.pause()
                loss, bpb = quick_score(self.model, self.model.hidden, val_tokens, tables, cfg, self.world)
                print0(
                    f"step:{step}/{cfg.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} "
                    f"train_time:{spent:.0f}ms step_avg:{spent / max(step, 1):.2f}ms"
                )
                self.watch.start()
            if last:
                break
            factor = lr_factor(step, self.watch.now_ms(), self.budget_ms, cfg)
            loss = self.step(step, factor)
            step += 1
            if step <= 5 or (cfg.train_log_every > 0 and step % cfg.train_log_every == 0):
                spent = self.watch.now_ms()
                print0(
                    f"step:{step}/{cfg.iterations} train_loss:{loss.item():.4f} lr_factor:{factor:.3f} "
                    f"train_time:{spent:.0f}ms step_avg:{spent / step:.2f}ms"
                )
            stopping = self.out_of_time()
        print0(f"stopped: step:{step}/{cfg.iterations} train_time:{self.watch.now_ms():.0f}ms")
        print0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
        return step

    def finish(self) -> dict[str, object]:
        """Average, scales, temperature: all of it on the same clock. Returns what is to be packed."""
        cfg = self.cfg
        if cfg.ema_enable and self.average.apply(self.model):
            print0("ema: averaged weights applied")
        print0(ternary_census(self.model))
        scales = calibrate_scales(self.model, self.loader, cfg, self.accum_steps)
        record = model_record(self.model, scales)
        rounded = restore_model(compress_quickly(record), cfg, self.world.device)
        held = training_tail(cfg, cfg.temperature_windows * cfg.eval_seq_len + 1)
        best = fit_temperature(rounded, held, cfg, self.world)
        record["plain"]["temperature"] = np.asarray(best, dtype=np.float32)
        spent = self.watch.pause()
        print0(f"temperature:{best:.4f} from {held.numel()} training tokens")
        print0(f"training, calibration and temperature took {spent:.0f}ms")
        if self.budget_ms is not None and spent > 1000.0 * cfg.max_wallclock_seconds:
            raise RuntimeError("over time: raise RESERVE_SECONDS")
        return record


def compress_quickly(record: dict[str, object]) -> bytes:
    """The same container as the final one at LZMA's fastest level, to look at the rounded model while on the clock."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    return lzma.compress(buffer.getvalue(), preset=0)


# ----------------------------------------------------------------------------------------------------------------------
# self-test, off by default
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_selftest(cfg: Config, world: World) -> None:
    """Three quick checks: packing is lossless, the plan scores each target once, no logit sees its future."""
    codes = torch.randint(-1, 2, (1003,)).float()
    packed, count = pack_trits(codes)
    assert torch.equal(unpack_trits(packed, count), codes), "base 3 does not come back"

    for targets in (1, 15, 1024, 1025, 5000):
        seen = np.zeros(targets, dtype=np.int64)
        for window in window_plan(targets, 1024, 16):
            seen[window.end - window.scored : window.end] += 1
        assert (seen == 1).all(), f"{targets} targets are not scored once each"

    model = HybridLM(cfg).to(world.device).eval()
    tokens = torch.randint(3, cfg.vocab_size, (1, 200), device=world.device)
    other = tokens.clone()
    other[:, 150:] = torch.randint(3, cfg.vocab_size, (1, 50), device=world.device)
    gap = (model.hidden(tokens)[:, :150] - model.hidden(other)[:, :150]).abs().max()
    assert float(gap) < 1e-4, f"the future is seen: {float(gap)}"
    print0("selftest: passed")


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------


def describe_machine() -> None:
    print0(f"Running Python {sys.version}", console=False)
    print0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    print0(smi, console=False)


def evaluate_packed(path: Path, val_tokens: Tensor, tables: ByteTables, cfg: Config, world: World) -> tuple[float, float]:
    """Reads the packed model back and scores the validation tokens with it. Its whole time is printed."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    model = restore_model(path.read_bytes(), cfg, world.device)
    hidden_of = torch.compile(model.hidden, dynamic=False)

    loss, bpb = quick_score(model, hidden_of, val_tokens, tables, cfg, world)
    print0(f"final_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * (time.perf_counter() - began):.0f}ms")

    model.eval()
    plan = window_plan(val_tokens.numel() - 1, cfg.eval_seq_len, cfg.eval_stride)
    loss, bpb = score_windows(model, hidden_of, val_tokens, plan, tables, cfg, world)
    torch.cuda.synchronize()
    # About 430 s on eight H100, of the 600 s there are.
    print0(
        f"final_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{cfg.eval_stride} "
        f"temperature:{float(model.temperature):.4f} eval_time:{1000 * (time.perf_counter() - began):.0f}ms"
    )
    return loss, bpb


def main() -> None:
    cfg = Config.from_env()
    cfg.check()
    world = open_world()
    open_log(cfg, world)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    describe_machine()
    for line in cfg.lines():
        print0(line, console=False)
    seed_everything(cfg.seed)
    if cfg.selftest:
        run_selftest(cfg, world)

    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    if int(sp.vocab_size()) != cfg.vocab_size:
        raise ValueError(f"VOCAB_SIZE={cfg.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    tables = make_byte_tables(sp, cfg.vocab_size, world.device)
    val_tokens = load_validation(cfg.val_files)
    print0(f"train_loader: pattern={cfg.train_files} shards:{len(find_shards(cfg.train_files))}")
    print0(f"val_loader: pattern={cfg.val_files} tokens:{val_tokens.numel() - 1}")
    describe_validation(val_tokens, tables, world.device)

    trainer = Trainer(cfg, world)
    print0(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    print0(f"world_size:{world.size} grad_accum_steps:{trainer.accum_steps} seed:{cfg.seed}")
    trainer.warm_up()
    trainer.run(val_tokens, tables)
    record = trainer.finish()

    path = Path("final_model.ternary.xz")
    if world.chief:
        save_submission(record, path)
    if world.distributed:
        dist.barrier()
    del trainer, record
    torch.cuda.empty_cache()

    loss, bpb = evaluate_packed(path, val_tokens, tables, cfg, world)
    print0(f"final_sliding_window_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    close_world()


if __name__ == "__main__":
    main()
