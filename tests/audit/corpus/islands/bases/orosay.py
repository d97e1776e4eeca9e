"""Hybrid state-space / attention model for Parameter Golf, with an event-driven evaluation.

One file does everything: train under the wall clock, average, quantise with GPTQ, pack, read the packed model back and
score FineWeb's validation split in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

How the evaluation is put together: an `EvalSession` walks over the validation stream chunk by chunk, scores each chunk
once and then tells whoever listens (`on_chunk_scored`). Adaptation and the count cache are listeners, so neither can
see a chunk before its losses stand in the meter. Strategies (`fixed`, `score_first`) differ only in who listens.
"""

from __future__ import annotations

import contextlib
import glob
import io
import lzma
import math
import os
import random
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, chain, count, cycle, groupby, islice, pairwise
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

try:
    from itertools import batched
except ImportError:  # Python 3.11

    def batched(items: Iterable, n: int) -> Iterator[tuple]:
        it = iter(items)
        while group := tuple(islice(it, n)):
            yield group


try:
    import zstandard
except ImportError:
    zstandard = None


# ---------------------------------------------------------------------------------------------------------------------
# settings


def env(name: str, default):
    """A dataclass field that the environment may override; its type is the default's."""
    kind = type(default)

    def read():
        raw = os.environ.get(name)
        if raw is None:
            return default
        return bool(int(raw)) if kind is bool else kind(raw)

    return field(default_factory=read)


@dataclass(frozen=True)
class DataSettings:
    root: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    vocab_size: int = env("VOCAB_SIZE", 1024)

    @property
    def train_pattern(self) -> str:
        return os.path.join(self.root, "fineweb_train_*.bin")

    @property
    def val_pattern(self) -> str:
        return os.path.join(self.root, "fineweb_val_*.bin")


@dataclass(frozen=True)
class ModelSettings:
    dim: int = env("MODEL_DIM", 512)
    pattern: str = env("HYBRID_PATTERN", "MMAMMAMMAMA")  # M: state-space mixer, A: attention
    heads: int = env("NUM_HEADS", 8)
    kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_mult: float = env("MLP_MULT", 2.0)
    ssm_inner: int = env("SSM_INNER", 768)
    ssm_state: int = env("SSM_STATE", 64)
    ssm_head_dim: int = env("SSM_HEAD_DIM", 64)
    ssm_chunk: int = env("SSM_CHUNK", 64)
    conv_width: int = env("SSM_CONV", 4)
    rope_base: float = env("ROPE_BASE", 10000.0)
    rope_dims: int = env("ROPE_DIMS", 32)
    softcap: float = env("LOGIT_SOFTCAP", 30.0)
    qk_gain: float = env("QK_GAIN_INIT", 2.5)


@dataclass(frozen=True)
class TrainSettings:
    seed: int = env("SEED", 1337)
    iterations: int = env("ITERATIONS", 20000)
    warmup_steps: int = env("WARMUP_STEPS", 20)
    batch_tokens: int = env("TRAIN_BATCH_TOKENS", 786432)
    seq_len: int = env("TRAIN_SEQ_LEN", 2048)
    max_wallclock: float = env("MAX_WALLCLOCK_SECONDS", 600.0)
    pack_reserve: float = env("PACK_RESERVE_SECONDS", 50.0)  # Hessians, GPTQ and packing happen inside the cap
    warmdown: float = env("WARMDOWN_FRACTION", 0.55)
    val_every: int = env("VAL_LOSS_EVERY", 4000)
    log_every: int = env("TRAIN_LOG_EVERY", 500)
    matrix_lr: float = env("MATRIX_LR", 0.022)
    scalar_lr: float = env("SCALAR_LR", 0.02)
    embed_lr: float = env("TIED_EMBED_LR", 0.03)
    muon_momentum: float = env("MUON_MOMENTUM", 0.97)
    muon_wd: float = env("MUON_WD", 0.06)
    adam_wd: float = env("ADAM_WD", 0.02)
    grad_clip: float = env("GRAD_CLIP_NORM", 0.3)
    ema_decay: float = env("EMA_DECAY", 0.997)
    ema_start: float = env("EMA_START_FRACTION", 0.2)


@dataclass(frozen=True)
class PackSettings:
    path: str = env("ARTIFACT_PATH", "final_model.ptz")
    limit: int = env("SIZE_LIMIT", 16_000_000)
    attn_bits: int = env("ATTN_BITS", 6)
    ssm_bits: int = env("SSM_BITS", 6)
    mlp_bits: int = env("MLP_BITS", 6)
    embed_bits: int = env("EMBED_BITS", 8)
    clip_sigmas: float = env("CLIP_SIGMAS", 12.0)
    calib_batches: int = env("CALIB_BATCHES", 32)
    calib_seqs: int = env("CALIB_SEQS", 8)
    damp: float = env("GPTQ_DAMP", 0.01)
    block: int = env("GPTQ_BLOCK", 128)


@dataclass(frozen=True)
class EvalSettings:
    strategy: str = env("EVAL_STRATEGY", "score_first")
    seq_len: int = env("EVAL_SEQ_LEN", 2048)
    stride: int = env("EVAL_STRIDE", 64)
    batch: int = env("EVAL_BATCH_SEQS", 32)
    chunk_tokens: int = env("CHUNK_TOKENS", 32768)
    temperature: float = env("EVAL_TEMPERATURE", 1.0)
    budget: float = env("EVAL_BUDGET_SECONDS", 600.0)
    adapt_margin: float = env("ADAPT_MARGIN_SECONDS", 60.0)
    adapt_lr: float = env("ADAPT_LR", 0.004)
    adapt_epochs: int = env("ADAPT_EPOCHS", 3)
    adapt_momentum: float = env("ADAPT_MOMENTUM", 0.9)
    adapt_clip: float = env("ADAPT_CLIP", 1.0)
    adapt_seqs: int = env("ADAPT_BATCH_SEQS", 2)
    freeze_first: int = env("ADAPT_FREEZE_BLOCKS", 2)
    cache_on: bool = env("CACHE", True)
    cache_rows: int = env("CACHE_ROWS", 65536)
    cache_weight: float = env("CACHE_WEIGHT", 0.12)
    cache_prior: float = env("CACHE_PRIOR", 4.0)
    log_every: int = env("EVAL_LOG_EVERY", 200)


@dataclass(frozen=True)
class Settings:
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    pack: PackSettings = field(default_factory=PackSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    run_id: str = env("RUN_ID", "")


# ---------------------------------------------------------------------------------------------------------------------
# ranks, logging, clocks


@dataclass
class Ranks:
    """This process among the others. Every collective goes through here, so one process needs no group."""

    rank: int = 0
    world: int = 1
    local: int = 0
    log_path: Path | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local)

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        return self.sum_(tensor).div_(self.world)

    def latest(self, seconds: float) -> float:
        """The slowest rank's figure: every rank takes the same decision from it."""
        if self.world == 1:
            return seconds
        box = torch.tensor(seconds, device=self.device, dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return float(box)

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def mine(self, items: list) -> list:
        return items[self.rank :: self.world]

    def say(self, text: str) -> None:
        if not self.chief:
            return
        print(text, flush=True)
        if self.log_path is not None:
            with self.log_path.open("a", encoding="utf-8") as f:
                print(text, file=f)


@contextlib.contextmanager
def joined(settings: Settings) -> Iterator[Ranks]:
    """Joins the process group, if there is one, and leaves it again."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA device is needed")
    torch.cuda.set_device(local)
    ranks = Ranks(rank, world, local)
    grouped = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if grouped:
        dist.init_process_group("nccl", device_id=ranks.device)
    if ranks.chief:
        Path("logs").mkdir(exist_ok=True)
        ranks.log_path = Path("logs") / f"{settings.run_id or uuid.uuid4()}.txt"
    try:
        yield ranks
    finally:
        if grouped:
            dist.destroy_process_group()


class Clock:
    """Wall time that can be paused. Reading it waits for the device."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def start(self) -> Clock:
        torch.cuda.synchronize()
        self.since = time.perf_counter()
        return self

    def stop(self) -> float:
        self.spent = self.seconds
        self.since = None
        return self.spent

    @property
    def seconds(self) -> float:
        if self.since is None:
            return self.spent
        torch.cuda.synchronize()
        return self.spent + time.perf_counter() - self.since

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()


@contextlib.contextmanager
def timed(ranks: Ranks, label: str) -> Iterator[Clock]:
    clock = Clock().start()
    try:
        yield clock
    finally:
        ranks.say(f"{label}: {clock.stop():.2f}s")


# ---------------------------------------------------------------------------------------------------------------------
# data

HEADER_INTS = 256
SHARD_MAGIC = 20240520


def read_shard(path: str | Path) -> Tensor:
    """The tokens of one shard: a header of 256 int32, then uint16."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != 1:
        raise ValueError(f"{path} is not a token shard")
    tokens = np.fromfile(path, dtype="<u2", count=int(header[2]), offset=4 * HEADER_INTS)
    if tokens.size != int(header[2]):
        raise ValueError(f"{path} is cut short")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def shard_paths(pattern: str) -> list[Path]:
    paths = sorted(Path(p) for p in glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no shards match {pattern}")
    return paths


def read_validation(pattern: str) -> Tensor:
    """The whole validation split, in order."""
    return torch.cat([read_shard(p) for p in shard_paths(pattern)]).contiguous()


class TrainStream:
    """An endless run through the training shards; each rank takes its own span of every global batch."""

    def __init__(self, pattern: str, ranks: Ranks) -> None:
        self.paths = shard_paths(pattern)
        self.ranks = ranks
        self.rewind()

    def rewind(self) -> None:
        self.shards = map(read_shard, cycle(self.paths))
        self.current = next(self.shards)
        self.at = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        while n > 0:
            left = self.current.numel() - self.at
            if left <= 0:
                self.current, self.at = next(self.shards), 0
                continue
            k = min(n, left)
            parts.append(self.current[self.at : self.at + k])
            self.at += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batch(self, global_tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        share = global_tokens // self.ranks.world
        span = share + 1
        block = self.take(span * self.ranks.world)
        local = block[self.ranks.rank * span : (self.ranks.rank + 1) * span].to(torch.int64)
        local = local.pin_memory().to(self.ranks.device, non_blocking=True)
        return local[:-1].view(-1, seq_len), local[1:].view(-1, seq_len)


# ---------------------------------------------------------------------------------------------------------------------
# bytes of tokens


@dataclass(frozen=True)
class ByteTables:
    """What a token adds to the text: its own bytes, and a space if it leads with one and something stands before it."""

    own: Tensor
    leads: Tensor
    mute: Tensor  # control tokens: no text of their own, and no space after them

    @classmethod
    def load(cls, path: str, vocab_size: int, device: torch.device) -> ByteTables:
        sp = spm.SentencePieceProcessor(model_file=path)
        if sp.vocab_size() > vocab_size:
            raise ValueError(f"the tokenizer has {sp.vocab_size()} pieces, the model {vocab_size}")
        own = np.zeros(vocab_size, dtype=np.int16)
        leads = np.zeros(vocab_size, dtype=np.bool_)
        mute = np.ones(vocab_size, dtype=np.bool_)
        for i in range(sp.vocab_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            mute[i] = False
            if sp.is_byte(i):
                own[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                leads[i] = True
                piece = piece[1:]
            own[i] = len(piece.encode("utf-8"))
        return cls(*(torch.from_numpy(t).to(device) for t in (own, leads, mute)))

    def count(self, before: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target, given the token before it."""
        spaces = self.leads[target] & ~self.mute[before]
        return self.own[target].to(torch.int64) + spaces.to(torch.int64)


# ---------------------------------------------------------------------------------------------------------------------
# model


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Weights are kept in fp32 and used in the activations' type."""

    def __init__(self, fan_in: int, fan_out: int, zero: bool = False) -> None:
        super().__init__(fan_in, fan_out, bias=False)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        inv = base ** -(torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        self.register_buffer("inv_freq", inv, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: batch, heads, time, head_dim; only the first `dims` channels turn."""
        t = torch.arange(x.size(-2), device=x.device, dtype=torch.float32)
        angle = torch.outer(t, self.inv_freq)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: ModelSettings) -> None:
        super().__init__()
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads
        self.head_dim = cfg.dim // cfg.heads
        kv = self.kv_heads * self.head_dim
        self.q = Linear(cfg.dim, cfg.dim)
        self.k = Linear(cfg.dim, kv)
        self.v = Linear(cfg.dim, kv)
        self.out = Linear(cfg.dim, cfg.dim, zero=True)
        self.gain = nn.Parameter(torch.full((cfg.heads,), cfg.qk_gain))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.q(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q = self.rotary(rms(q)) * self.gain.to(q.dtype)[None, :, None, None]
        k = self.rotary(rms(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


def lower_decay(upto: Tensor, since: Tensor, strict: bool = False) -> Tensor:
    """exp(upto_i - since_j) for j <= i (j < i when strict), else 0: running sums of log decays, ..., time."""
    gap = upto[..., :, None] - since[..., None, :]
    n = upto.size(-1)
    keep = torch.ones(n, n, dtype=torch.bool, device=upto.device).tril(-1 if strict else 0)
    return gap.masked_fill(~keep, float("-inf")).exp()


def scan_chunks(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, size: int) -> Tensor:
    """y_i = c_i . sum over j <= i of decay(j, i) b_j x_j, in chunks: dense inside, a small recurrence between them.

    x: batch, time, heads, width; log_decay: batch, time, heads; b, c: batch, time, state.
    """
    batch, time_, heads, width = x.shape
    n = time_ // size
    x = x.view(batch, n, size, heads, width)
    b, c = (t.view(batch, n, size, -1) for t in (b, c))
    a = log_decay.view(batch, n, size, heads).permute(0, 3, 1, 2).float()  # batch, heads, n, size
    total = a.cumsum(-1)
    within = lower_decay(total, total).to(x.dtype)
    scores = torch.einsum("bnis,bnjs->bnij", c, b)
    y = torch.einsum("bnij,bhnij,bnjhw->bnihw", scores, within, x)
    to_end = (total[..., -1:] - total).exp().to(x.dtype)
    ends = torch.einsum("bnjs,bhnj,bnjhw->bnhsw", b, to_end, x)
    # The state on entering chunk m: what earlier chunks n < m left, decayed by the chunks in between.
    passed = total[..., -1].cumsum(-1)
    between = lower_decay(passed - total[..., -1], passed, strict=True).to(x.dtype)
    entering = torch.einsum("bhmn,bnhsw->bmhsw", between, ends)
    y = y + torch.einsum("bnis,bhni,bnhsw->bnihw", c, total.exp().to(x.dtype), entering)
    return y.reshape(batch, time_, heads, width)


class StateSpace(nn.Module):
    """A selective state-space mixer: one scalar decay a head, input and output maps shared by all heads."""

    def __init__(self, cfg: ModelSettings) -> None:
        super().__init__()
        self.inner, self.state, self.width = cfg.ssm_inner, cfg.ssm_state, cfg.ssm_head_dim
        self.heads, self.chunk, self.conv = self.inner // self.width, cfg.ssm_chunk, cfg.conv_width
        mixed = self.inner + 2 * self.state
        self.gate = Linear(cfg.dim, self.inner)
        self.inp = Linear(cfg.dim, mixed)
        self.step = Linear(cfg.dim, self.heads)
        self.out = Linear(self.inner, cfg.dim, zero=True)
        self.taps = nn.Parameter(torch.randn(mixed, self.conv) / math.sqrt(self.conv))
        self.step_bias = nn.Parameter(torch.linspace(0.001, 0.1, self.heads).expm1().log())
        self.log_rate = nn.Parameter(torch.linspace(1.0, 16.0, self.heads).log())
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.Parameter(torch.ones(self.inner))

    def convolve(self, u: Tensor) -> Tensor:
        u = F.pad(u.transpose(1, 2), (self.conv - 1, 0))
        u = F.conv1d(u, self.taps[:, None].to(u.dtype), groups=u.size(1))
        return F.silu(u.transpose(1, 2))

    def forward(self, h: Tensor) -> Tensor:
        batch, time_, _ = h.shape
        x, b, c = self.convolve(self.inp(h)).split((self.inner, self.state, self.state), dim=-1)
        x = x.reshape(batch, time_, self.heads, self.width)
        dt = F.softplus(self.step(h).float() + self.step_bias)
        decay = -dt * self.log_rate.exp()
        y = scan_chunks(x * dt[..., None].to(x.dtype), decay, rms(b), rms(c), self.chunk)
        y = y + x * self.skip.to(x.dtype)[:, None]
        y = rms(y.reshape(batch, time_, self.inner) * F.silu(self.gate(h))) * self.norm.to(h.dtype)
        return self.out(y)


class Mlp(nn.Module):
    def __init__(self, cfg: ModelSettings) -> None:
        super().__init__()
        hidden = int(cfg.dim * cfg.mlp_mult)
        self.up = Linear(cfg.dim, hidden)
        self.down = Linear(hidden, cfg.dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


MIXERS: dict[str, type[nn.Module]] = {"A": Attention, "M": StateSpace}


class Block(nn.Module):
    def __init__(self, kind: str, cfg: ModelSettings, depth: int) -> None:
        super().__init__()
        self.mixer = MIXERS[kind](cfg)
        self.mlp = Mlp(cfg)
        self.mix_scale = nn.Parameter(torch.ones(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.dim))
        self.origin = nn.Parameter(torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim))))
        self.damp = 1.0 / math.sqrt(depth + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        keep, back = self.origin.to(x.dtype)
        x = keep * x + back * x0
        x = x + self.mix_scale.to(x.dtype) * self.mixer(rms(x) * self.damp)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.damp)


class Hybrid(nn.Module):
    def __init__(self, cfg: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.softcap = cfg.softcap
        self.embed = nn.Embedding(vocab_size, cfg.dim)
        nn.init.normal_(self.embed.weight, std=0.005)
        self.blocks = nn.ModuleList(Block(kind, cfg, depth) for depth, kind in enumerate(cfg.pattern))

    def hidden(self, tokens: Tensor) -> Tensor:
        x = x0 = rms(self.embed(tokens).to(torch.bfloat16))
        for block in self.blocks:
            x = block(x, x0)
        return rms(x)

    def project(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.embed.weight.to(hidden.dtype)).float()
        return self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.project(self.hidden(tokens))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


def build_model(settings: Settings, device: torch.device) -> Hybrid:
    return Hybrid(settings.model, settings.data.vocab_size).to(device)


def is_matrix(name: str, tensor: Tensor) -> bool:
    """What Muon trains and GPTQ quantises; the embedding and the taps are not among them."""
    return tensor.ndim == 2 and name.startswith("blocks.") and min(tensor.shape) >= 64


# ---------------------------------------------------------------------------------------------------------------------
# optimisers


@torch.compile
def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix, in bf16. g: ..., rows, columns."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonal step. The matrices are shared out over the ranks and the steps summed."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, wd: float, ranks: Ranks) -> None:
        super().__init__(list(params), dict(lr=lr, momentum=momentum, wd=wd))
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            ends = list(accumulate((p.numel() for p in params), initial=0))
            flat = torch.zeros(ends[-1], device=self.ranks.device, dtype=torch.bfloat16)
            for i, (p, (lo, hi)) in enumerate(zip(params, pairwise(ends))):
                if i % self.ranks.world != self.ranks.rank:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                step = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                flat[lo:hi] = (step * max(1, p.size(-2) / p.size(-1)) ** 0.5).flatten()
            self.ranks.sum_(flat)
            for p, (lo, hi) in zip(params, pairwise(ends)):
                p.mul_(1 - group["lr"] * group["wd"])
                p.add_(flat[lo:hi].view_as(p).to(p.dtype), alpha=-group["lr"])


def make_optimisers(model: Hybrid, cfg: TrainSettings, ranks: Ranks) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for n, p in named if is_matrix(n, p)]
    embeds = [p for n, p in named if n.startswith("embed.")]
    rest = [p for n, p in named if not is_matrix(n, p) and not n.startswith("embed.")]
    adam = partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-8, fused=True)
    optimisers = [
        Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_wd, ranks),
        adam([{"params": embeds, "lr": cfg.embed_lr}], weight_decay=cfg.adam_wd),
        adam([{"params": rest, "lr": cfg.scalar_lr}], weight_decay=0.0),
    ]
    for group in chain.from_iterable(o.param_groups for o in optimisers):
        group["base_lr"] = group["lr"]
    return optimisers


class Average:
    """An exponential moving average of the weights, begun once training has settled."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.shadow: list[Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        live = [p.detach() for p in self.model.parameters()]
        if self.shadow is None:
            self.shadow = [p.clone() for p in live]
        else:
            torch._foreach_lerp_(self.shadow, live, 1 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        if self.shadow is not None:
            torch._foreach_copy_(list(self.model.parameters()), self.shadow)


# ---------------------------------------------------------------------------------------------------------------------
# training


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; its former mode afterwards."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was)


class Trainer:
    """Trains until the steps or the time are spent. The clock covers everything up to the packed model."""

    def __init__(self, settings: Settings, ranks: Ranks, tables: ByteTables, val_tokens: Tensor) -> None:
        self.settings, self.cfg, self.ranks = settings, settings.train, ranks
        self.tables, self.val_tokens = tables, val_tokens
        self.model = build_model(settings, ranks.device)
        ranks.broadcast_(p.data for p in self.model.parameters())
        self.compiled = torch.compile(self.model, dynamic=False)
        self.stream = TrainStream(settings.data.train_pattern, ranks)
        self.optimisers = make_optimisers(self.model, self.cfg, ranks)
        self.average = Average(self.model, self.cfg.ema_decay)
        self.accumulation = max(1, 8 // ranks.world)
        self.limit = self.cfg.max_wallclock - self.cfg.pack_reserve
        self.clock = Clock()

    def progress(self, step: int) -> float:
        return max(step / self.cfg.iterations, self.ranks.latest(self.clock.seconds) / self.limit)

    def lr_scale(self, progress: float) -> float:
        return min(1.0, max(0.0, 1.0 - progress) / self.cfg.warmdown)

    def gradients(self) -> Tensor:
        loss_sum = torch.zeros((), device=self.ranks.device)
        for _ in range(self.accumulation):
            x, y = self.stream.batch(self.cfg.batch_tokens // self.accumulation, self.cfg.seq_len)
            loss = self.compiled(x, y) / self.accumulation
            loss.backward()
            loss_sum += loss.detach()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        for g in grads:
            self.ranks.mean_(g)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        return loss_sum

    def update(self, scale: float) -> None:
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def warm_up(self) -> None:
        """Compiles everything before the clock starts; weights, optimisers and stream are put back afterwards."""
        kept = [p.detach().clone() for p in self.model.parameters()]
        for _ in range(self.cfg.warmup_steps):
            self.gradients()
            self.update(1e-3)
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), kept)
        self.optimisers = make_optimisers(self.model, self.cfg, self.ranks)
        self.stream.rewind()

    def log_validation(self, step: int) -> None:
        with self.clock.paused():
            meter = evaluate_blocks(self.model, self.val_tokens, self.tables, self.settings, self.ranks)
            self.ranks.say(f"step:{step} val_loss:{meter.loss:.4f} val_bpb:{meter.bpb:.4f}")

    def run(self) -> Hybrid:
        self.warm_up()
        self.ranks.barrier()
        self.clock.start()
        for step in count():
            progress = self.progress(step)
            done = progress >= 1.0
            if done or (self.cfg.val_every and step and step % self.cfg.val_every == 0):
                self.log_validation(step)
            if done:
                break
            loss = self.gradients()
            self.update(self.lr_scale(progress))
            if progress >= self.cfg.ema_start:
                self.average.update()
            if self.cfg.log_every and step % self.cfg.log_every == 0:
                self.ranks.say(f"step:{step} train_loss:{float(loss):.4f} train_time:{self.clock.seconds:.1f}s")
        self.ranks.say(f"training stopped at step {step} after {self.clock.seconds:.1f}s")
        self.average.apply()
        return self.model


# ---------------------------------------------------------------------------------------------------------------------
# quantising


class HessianBook:
    """Sums of x x^T of what goes into every quantised matrix."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    def note(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        if name not in self.sums:
            self.sums[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
        self.sums[name].addmm_(x.T, x)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        hooks = [
            module.register_forward_pre_hook(partial(self.note, f"{name}.weight"))
            for name, module in self.model.named_modules()
            if isinstance(module, Linear) and is_matrix(f"{name}.weight", module.weight)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def gather(self, batches: Iterable[Tensor], ranks: Ranks) -> dict[str, Tensor]:
        with self.listening(), scoring(self.model) as model:
            for tokens in batches:
                model.logits(tokens)
                self.rows += tokens.numel()
        for name in sorted(self.sums):
            ranks.mean_(self.sums[name]).div_(self.rows)
        return self.sums


def calibration_batches(stream: TrainStream, settings: Settings) -> Iterator[Tensor]:
    """Fresh training sequences, the same number for every rank."""
    seq_len = settings.train.seq_len
    for _ in range(settings.pack.calib_batches):
        tokens, _ = stream.batch(settings.pack.calib_seqs * seq_len * stream.ranks.world, seq_len)
        yield tokens


def row_scales(w: Tensor, bits: int, sigmas: float) -> Tensor:
    top = 2 ** (bits - 1) - 1
    reach = torch.minimum(w.abs().amax(dim=1), sigmas * w.std(dim=1))
    return (reach / top).clamp_min(1e-8).half().float()


def round_to(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return (w / scale).round().clamp(-top, top)


def gptq(w: Tensor, hessian: Tensor, bits: int, cfg: PackSettings) -> tuple[Tensor, Tensor]:
    """Rounds column by column, the most active first; each column's error is spread over those that follow."""
    w, h = w.detach().float().clone(), hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    scale = row_scales(w, bits, cfg.clip_sigmas)
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(cfg.damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.empty_like(w)
    columns = w.size(1)
    for lo in range(0, columns, cfg.block):
        hi = min(lo + cfg.block, columns)
        errors = torch.empty(w.size(0), hi - lo, device=w.device)
        for j in range(lo, hi):
            q[:, j] = round_to(w[:, j], scale, bits)
            error = (w[:, j] - q[:, j] * scale) / inverse[j, j]
            w[:, j:hi].addr_(error, inverse[j, j:hi], alpha=-1)
            errors[:, j - lo] = error
        w[:, hi:].addmm_(errors, inverse[lo:hi, hi:], alpha=-1)
    return q[:, order.argsort()].to(torch.int8), scale.half()


def plain_round(w: Tensor, bits: int, cfg: PackSettings) -> tuple[Tensor, Tensor]:
    w = w.detach().float()
    scale = row_scales(w, bits, cfg.clip_sigmas)
    return round_to(w, scale[:, None], bits).to(torch.int8), scale.half()


def bits_for(name: str, kinds: str, cfg: PackSettings) -> int:
    if name.startswith("embed."):
        return cfg.embed_bits
    if ".mlp." in name:
        return cfg.mlp_bits
    return cfg.attn_bits if kinds[int(name.split(".")[1])] == "A" else cfg.ssm_bits


@dataclass
class Packed:
    """What the artifact holds: whole numbers with a scale a row, and small tensors in fp16."""

    numbers: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        dense = {n: q.float() * self.scales[n].float()[:, None] for n, q in self.numbers.items()}
        return dense | {n: t.float() for n, t in self.floats.items()}

    def to_bytes(self) -> bytes:
        box = io.BytesIO()
        torch.save({"numbers": self.numbers, "scales": self.scales, "floats": self.floats}, box)
        return box.getvalue()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Packed:
        return cls(**torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True))


def quantise(model: Hybrid, hessians: dict[str, Tensor], settings: Settings) -> Packed:
    packed = Packed()
    for name, tensor in model.state_dict().items():
        bits = bits_for(name, settings.model.pattern, settings.pack) if tensor.ndim == 2 else 0
        if name in hessians:
            q, scale = gptq(tensor, hessians[name], bits, settings.pack)
        elif name.startswith("embed."):
            q, scale = plain_round(tensor, bits, settings.pack)
        else:
            packed.floats[name] = tensor.detach().half().cpu()
            continue
        packed.numbers[name], packed.scales[name] = q.cpu(), scale.cpu()
    return packed


def squeeze(raw: bytes) -> bytes:
    """The shorter of lzma and zstd, with a letter that says which."""
    forms = [b"L" + lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)]
    if zstandard is not None:
        forms.append(b"Z" + zstandard.ZstdCompressor(level=22).compress(raw))
    return min(forms, key=len)


def unsqueeze(blob: bytes) -> bytes:
    kind, body = blob[:1], blob[1:]
    return lzma.decompress(body) if kind == b"L" else zstandard.ZstdDecompressor().decompress(body)


def write_artifact(packed: Packed, settings: Settings, ranks: Ranks) -> None:
    """Writes the packed model and prints what counts: this file's bytes and the artifact's."""
    blob = squeeze(packed.to_bytes())
    Path(settings.pack.path).write_bytes(blob)
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + len(blob)
    ranks.say(f"Serialized model: {len(blob)} bytes")
    ranks.say(f"Code size: {code_bytes} bytes")
    ranks.say(f"Total submission size: {total} bytes")
    if total > settings.pack.limit:
        raise SystemExit(f"the submission is {total - settings.pack.limit} bytes too large")


def read_artifact(settings: Settings, ranks: Ranks) -> Hybrid:
    """A fresh model with the weights that lie in the artifact and nothing else."""
    packed = Packed.from_bytes(unsqueeze(Path(settings.pack.path).read_bytes()))
    model = build_model(settings, ranks.device)
    model.load_state_dict(packed.tensors())
    return model


def pack(trainer: Trainer) -> None:
    """From trained weights to the artifact, on the training clock."""
    settings, ranks = trainer.settings, trainer.ranks
    with timed(ranks, "hessians"):
        batches = calibration_batches(trainer.stream, settings)
        hessians = HessianBook(trainer.model).gather(batches, ranks)
    spent = ranks.latest(trainer.clock.seconds)
    ranks.say(f"training and calibration took {spent:.1f}s of {settings.train.max_wallclock:.0f}s")
    if ranks.chief:
        with timed(ranks, "gptq"):
            packed = quantise(trainer.model, hessians, settings)
        with timed(ranks, "packing"):
            write_artifact(packed, settings, ranks)
    ranks.barrier()
    ranks.say(f"artifact written after {trainer.clock.stop():.1f}s")


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: what is counted


class Meter:
    """Bits, bytes and tokens of what was scored. Every rank fills its own; `merged` is the sum over the ranks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nats: Tensor, byte_counts: Tensor) -> None:
        self.sums[0] += nats.double().sum() / math.log(2.0)
        self.sums[1] += byte_counts.sum()
        self.sums[2] += nats.numel()

    def merged(self, ranks: Ranks) -> Meter:
        out = Meter(self.sums.device)
        out.sums.copy_(ranks.sum_(self.sums.clone()))
        return out

    @property
    def bits(self) -> float:
        return float(self.sums[0])

    @property
    def byte_count(self) -> int:
        return int(self.sums[1])

    @property
    def tokens(self) -> int:
        return int(self.sums[2])

    @property
    def loss(self) -> float:
        return self.bits * math.log(2.0) / max(1, self.tokens)

    @property
    def bpb(self) -> float:
        return self.bits / max(1, self.byte_count)


def evaluate_blocks(
    model: Hybrid, tokens: Tensor, tables: ByteTables, settings: Settings, ranks: Ranks, batch: int = 64
) -> Meter:
    """A quick look for the log: blocks side by side, none seen twice; what is left over at the end is skipped."""
    seq_len = settings.train.seq_len
    meter = Meter(ranks.device)
    starts = range(0, tokens.numel() - seq_len, seq_len)
    with scoring(model):
        for group in batched(ranks.mine(list(starts)), batch):
            rows = torch.stack([tokens[s : s + seq_len + 1] for s in group]).to(ranks.device, torch.int64)
            x, y = rows[:, :-1], rows[:, 1:]
            nats = F.cross_entropy(model.logits(x).flatten(0, 1), y.flatten(), reduction="none")
            meter.add(nats, tables.count(x, y))
    return meter.merged(ranks)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: the plan


@dataclass(frozen=True)
class Window:
    """Inputs are tokens[begin:hi]; the targets tokens[lo + 1 : hi + 1] are scored in it."""

    begin: int
    lo: int
    hi: int

    @property
    def fresh(self) -> int:
        return self.hi - self.lo


@dataclass(frozen=True)
class Chunk:
    index: int
    windows: tuple[Window, ...]
    last: bool

    @property
    def lo(self) -> int:
        return self.windows[0].lo

    @property
    def hi(self) -> int:
        return self.windows[-1].hi


def plan_windows(targets: int, seq_len: int, stride: int) -> Iterator[Window]:
    """Full windows whose fresh parts lie end to end: seq_len at first, then stride, then what is left."""
    for lo, hi in pairwise((0, *range(seq_len, targets, stride), targets)):
        yield Window(max(0, hi - seq_len), lo, hi)


def plan_chunks(targets: int, cfg: EvalSettings) -> list[Chunk]:
    windows = plan_windows(targets, cfg.seq_len, cfg.stride)
    groups = [tuple(group) for _, group in groupby(windows, key=lambda w: w.lo // cfg.chunk_tokens)]
    return [Chunk(i, group, last=i == len(groups) - 1) for i, group in enumerate(groups)]


@dataclass
class Scored:
    """One batch at the moment of its scoring; rows are the fresh positions in order."""

    log_probs: Tensor  # rows, vocabulary
    earlier: Tensor  # the token two before the target
    before: Tensor  # the token before the target
    target: Tensor


Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def as_is(log_probs: Tensor, earlier: Tensor, before: Tensor) -> Tensor:
    return log_probs


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: the session


class EvalSession:
    """One pass over the validation stream. A chunk is scored, then announced, and never scored again."""

    def __init__(self, model: Hybrid, tokens: Tensor, tables: ByteTables, settings: Settings, ranks: Ranks) -> None:
        self.model, self.tables, self.ranks = model, tables, ranks
        self.settings, self.cfg = settings, settings.eval
        self.tokens = tokens.to(ranks.device, torch.int64)
        self.chunks = plan_chunks(tokens.numel() - 1, self.cfg)
        self.meter = Meter(ranks.device)
        self.mix: Mix = as_is
        self.on_chunk_scored: list[Callable[[EvalSession, Chunk], None]] = []
        self.on_chunk_trained: list[Callable[[EvalSession, Chunk], None]] = []
        self.seconds_by: dict[str, float] = defaultdict(float)
        self.clock = Clock()

    @property
    def targets(self) -> int:
        return self.tokens.numel() - 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            torch.cuda.synchronize()
            self.seconds_by[name] += time.perf_counter() - began

    def announce(self, listeners: list[Callable[[EvalSession, Chunk], None]], chunk: Chunk) -> None:
        for listener in listeners:
            listener(self, chunk)

    def forward(self, windows: tuple[Window, ...]) -> Scored:
        """The model's log probabilities at the fresh positions of some windows."""
        x = torch.stack([self.tokens[w.begin : w.hi] for w in windows])
        y = torch.stack([self.tokens[w.begin + 1 : w.hi + 1] for w in windows])
        first = torch.tensor([w.lo - w.begin for w in windows], device=x.device)
        fresh = torch.arange(x.size(1), device=x.device)[None, :] >= first[:, None]
        logits = self.model.project(self.model.hidden(x)[fresh])
        log_probs = F.log_softmax(logits / self.cfg.temperature, dim=-1)
        earlier = F.pad(x, (1, 0))[:, :-1]
        return Scored(log_probs, earlier[fresh], x[fresh], y[fresh])

    def score(self, chunk: Chunk) -> None:
        with self.phase("score"), scoring(self.model):
            for windows in batched(self.ranks.mine(list(chunk.windows)), self.cfg.batch):
                batch = self.forward(windows)
                log_probs = self.mix(batch.log_probs, batch.earlier, batch.before)
                nats = -log_probs.gather(1, batch.target[:, None]).squeeze(1)
                self.meter.add(nats, self.tables.count(batch.before, batch.target))

    def run(self) -> Meter:
        self.clock.start()
        for chunk in self.chunks:
            self.score(chunk)
            self.announce(self.on_chunk_scored, chunk)
        total = self.meter.merged(self.ranks)
        self.clock.stop()
        if total.tokens != self.targets:
            raise RuntimeError(f"{total.tokens} of {self.targets} tokens were scored")
        return total


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: listeners


class CountCache:
    """Counts of what followed two tokens, by a hash of the two. A row holds the whole vocabulary.

    p = (1 - w) p_model + w row / sum(row), with w from the row's sum alone: a distribution whatever the target is.
    """

    def __init__(self, vocab_size: int, cfg: EvalSettings, device: torch.device) -> None:
        self.cfg = cfg
        self.counts = torch.zeros(cfg.cache_rows, vocab_size, device=device)

    def row(self, earlier: Tensor, before: Tensor) -> Tensor:
        return (earlier * 1_000_003 + before * 8_191) % self.cfg.cache_rows

    def mix(self, log_probs: Tensor, earlier: Tensor, before: Tensor) -> Tensor:
        rows = self.counts[self.row(earlier, before)]
        total = rows.sum(dim=1, keepdim=True)
        weight = self.cfg.cache_weight * total / (total + self.cfg.cache_prior)
        seen = rows / total.clamp_min(1.0)
        return ((1.0 - weight) * log_probs.exp() + weight * seen).clamp_min(1e-12).log()

    @torch.no_grad()
    def absorb(self, session: EvalSession, chunk: Chunk) -> None:
        """Counts a chunk that has been scored; every rank counts all of it."""
        with session.phase("cache"):
            span = F.pad(session.tokens, (1, 0))[chunk.lo : chunk.hi + 2]
            earlier, before, target = span[:-2], span[1:-1], span[2:]
            ones = torch.ones_like(target, dtype=self.counts.dtype)
            self.counts.index_put_((self.row(earlier, before), target), ones, accumulate=True)


class Adapter:
    """SGD on the chunk that has just been scored, for the sake of those that follow."""

    def __init__(self, session: EvalSession) -> None:
        cfg = session.cfg
        frozen = tuple(f"blocks.{i}." for i in range(cfg.freeze_first))
        self.params = [p for n, p in session.model.named_parameters() if not n.startswith(frozen)]
        for p in session.model.parameters():
            p.requires_grad_(False)
        for p in self.params:
            p.requires_grad_(True)
        self.optimiser = torch.optim.SGD(self.params, lr=cfg.adapt_lr, momentum=cfg.adapt_momentum)
        self.adapted = 0

    def sequences(self, session: EvalSession, chunk: Chunk) -> Tensor:
        """Rows of seq_len + 1 tokens out of the chunk, as many as are full."""
        seq_len = session.cfg.seq_len
        starts = range(chunk.lo, chunk.hi - seq_len + 1, seq_len)
        return torch.stack([session.tokens[s : s + seq_len + 1] for s in starts])

    def has_time(self, session: EvalSession, chunk: Chunk) -> bool:
        """Whether what is left can still be scored in time."""
        left = session.seconds_by["score"] / (chunk.index + 1) * (len(session.chunks) - chunk.index - 1)
        return session.ranks.latest(session.clock.seconds + left) < session.cfg.budget - session.cfg.adapt_margin

    def lr(self, session: EvalSession, chunk: Chunk) -> float:
        return session.cfg.adapt_lr * 0.5 * (1.0 + math.cos(math.pi * chunk.index / len(session.chunks)))

    def __call__(self, session: EvalSession, chunk: Chunk) -> None:
        if chunk.last or chunk.hi - chunk.lo < session.cfg.seq_len or not self.has_time(session, chunk):
            return
        with session.phase("adapt"), torch.enable_grad():
            self.train(session, chunk)
        self.adapted += 1
        session.announce(session.on_chunk_trained, chunk)

    def train(self, session: EvalSession, chunk: Chunk) -> None:
        cfg, ranks = session.cfg, session.ranks
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr(session, chunk)
        rows = self.sequences(session, chunk)
        for _ in range(cfg.adapt_epochs):
            for index in batched(range(rows.size(0)), cfg.adapt_seqs * ranks.world):
                self.optimiser.zero_grad(set_to_none=False)
                mine = rows[list(ranks.mine(list(index)))]
                if mine.size(0):
                    loss = session.model(mine[:, :-1], mine[:, 1:])
                    (loss * mine.size(0) / len(index)).backward()
                for p in self.params:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    ranks.sum_(p.grad)
                nn.utils.clip_grad_norm_(self.params, cfg.adapt_clip)
                self.optimiser.step()


def report(session: EvalSession, chunk: Chunk, event: str) -> None:
    """A line in the log now and then; reads this rank's meter only."""
    if chunk.index % session.cfg.log_every == 0:
        spent = " ".join(f"{name}:{seconds:.1f}s" for name, seconds in session.seconds_by.items())
        session.ranks.say(f"{event} chunk:{chunk.index}/{len(session.chunks)} bpb:{session.meter.bpb:.5f} {spent}")


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: strategies

Strategy = Callable[[EvalSession], None]
STRATEGIES: dict[str, Strategy] = {}


def strategy(name: str) -> Callable[[Strategy], Strategy]:
    def enter(subscribe: Strategy) -> Strategy:
        STRATEGIES[name] = subscribe
        return subscribe

    return enter


@strategy("fixed")
def fixed(session: EvalSession) -> None:
    """The packed model as it is."""
    session.on_chunk_scored.append(partial(report, event="scored"))


@strategy("cache_only")
def cache_only(session: EvalSession) -> None:
    """The packed model and counts of what was scored."""
    fixed(session)
    cache = CountCache(session.settings.data.vocab_size, session.cfg, session.ranks.device)
    session.mix = cache.mix
    session.on_chunk_scored.append(cache.absorb)


@strategy("score_first")
def score_first(session: EvalSession) -> None:
    """Counts, and SGD on every chunk after its scoring."""
    (cache_only if session.cfg.cache_on else fixed)(session)
    session.on_chunk_scored.append(Adapter(session))
    session.on_chunk_trained.append(partial(report, event="trained"))


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """Lends the model to a session and puts its weights back afterwards."""
    kept = [p.detach().clone() for p in model.parameters()]
    try:
        yield model
    finally:
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in model.parameters()], kept)


def evaluate(settings: Settings, ranks: Ranks, tables: ByteTables, val_tokens: Tensor) -> None:
    """Everything after the artifact is written, on one clock."""
    with timed(ranks, "evaluation") as clock:
        model = read_artifact(settings, ranks)
        quick = evaluate_blocks(model, val_tokens, tables, settings, ranks)
        ranks.say(f"final_roundtrip val_loss:{quick.loss:.4f} val_bpb:{quick.bpb:.4f}")
        with borrowed(model):
            session = EvalSession(model, val_tokens, tables, settings, ranks)
            STRATEGIES[settings.eval.strategy](session)
            meter = session.run()
        seconds = ranks.latest(clock.seconds)
    ranks.say(f"tokens:{meter.tokens} bytes:{meter.byte_count} chunks:{len(session.chunks)} eval_time:{seconds:.1f}s")
    if seconds > settings.eval.budget:
        ranks.say(f"warning: the evaluation took more than {settings.eval.budget:.0f}s")
    ranks.say(f"final_{settings.eval.strategy} val_loss:{meter.loss:.4f} val_bpb:{meter.bpb:.4f}")
    ranks.say(f"final_{settings.eval.strategy}_exact val_loss:{meter.loss:.8f} val_bpb:{meter.bpb:.8f}")


# ---------------------------------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main() -> None:
    settings = Settings()
    with joined(settings) as ranks:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        seed_all(settings.train.seed)
        ranks.say(Path(__file__).read_text(encoding="utf-8"))
        ranks.say(f"python {sys.version.split()[0]} torch {torch.__version__} world_size {ranks.world}")
        for group, values in asdict(settings).items():
            ranks.say(f"{group}: {values}")
        tables = ByteTables.load(settings.data.tokenizer, settings.data.vocab_size, ranks.device)
        val_tokens = read_validation(settings.data.val_pattern)
        ranks.say(f"validation tokens: {val_tokens.numel()}")
        trainer = Trainer(settings, ranks, tables, val_tokens)
        ranks.say(f"model parameters: {sum(p.numel() for p in trainer.model.parameters())}")
        trainer.run()
        pack(trainer)
        del trainer
        torch.cuda.empty_cache()
        evaluate(settings, ranks, tables, val_tokens)


if __name__ == "__main__":
    main()
