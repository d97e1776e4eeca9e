"""Record attempt, April: 11 layers, GQA, int6 GPTQ, and a causal n-gram cache mixed over the whole vocabulary.

The script trains for ten minutes on 8xH100, quantises inside the same ten minutes, writes one artifact, reads it back and
scores the whole validation split with overlapping windows. Each rank goes over its own contiguous part of the text; its
cache is filled with what stands before that part, so every prediction is a function of the artifact and of earlier tokens.
"""

from __future__ import annotations

import glob
import io
import lzma
import math
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T", int, float, str, bool)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def env(name: str, default: T) -> T:
    """The environment's value for `name` in the type of the default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")  # type: ignore[return-value]
    return type(default)(raw)


@dataclass(frozen=True)
class DataConfig:
    """Where the shards and the tokenizer lie."""

    root: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    train_glob: str = env("TRAIN_GLOB", "fineweb_train_*.bin")
    val_glob: str = env("VAL_GLOB", "fineweb_val_*.bin")
    vocab: int = env("VOCAB_SIZE", 1024)
    bos: int = env("BOS_ID", 1)

    @property
    def train_pattern(self) -> str:
        return os.path.join(self.root, self.train_glob)

    @property
    def val_pattern(self) -> str:
        return os.path.join(self.root, self.val_glob)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network."""

    layers: int = env("NUM_LAYERS", 11)
    dim: int = env("MODEL_DIM", 512)
    heads: int = env("NUM_HEADS", 8)
    kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_mult: float = env("MLP_MULT", 3.0)
    rope_base: float = env("ROPE_BASE", 10000.0)
    rope_dims: int = env("ROPE_DIMS", 16)
    qk_gain: float = env("QK_GAIN_INIT", 1.5)
    softcap: float = env("LOGIT_SOFTCAP", 30.0)
    embed_std: float = env("TIED_EMBED_INIT_STD", 0.005)
    bigram_rows: int = env("BIGRAM_ROWS", 2048)
    bigram_dim: int = env("BIGRAM_DIM", 128)
    value_layers: int = env("XSA_LAST_N", 4)


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the matrices, AdamW for everything else."""

    matrix_lr: float = env("MATRIX_LR", 0.025)
    scalar_lr: float = env("SCALAR_LR", 0.025)
    embed_lr: float = env("TIED_EMBED_LR", 0.035)
    momentum: float = env("MUON_MOMENTUM", 0.99)
    momentum_start: float = env("MUON_MOMENTUM_START", 0.92)
    momentum_steps: int = env("MUON_MOMENTUM_STEPS", 1500)
    newton_steps: int = env("MUON_STEPS", 5)
    weight_decay: float = env("WEIGHT_DECAY", 0.04)
    beta1: float = env("BETA1", 0.9)
    beta2: float = env("BETA2", 0.95)
    eps: float = env("ADAM_EPS", 1e-8)
    clip: float = env("GRAD_CLIP", 0.3)


@dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of the training."""

    iterations: int = env("ITERATIONS", 20000)
    batch_tokens: int = env("TRAIN_BATCH_TOKENS", 786432)
    seq_len: int = env("TRAIN_SEQ_LEN", 2048)
    warmdown: int = env("WARMDOWN_ITERS", 3500)
    compile_steps: int = env("COMPILE_STEPS", 12)
    log_every: int = env("LOG_EVERY", 250)
    probe_every: int = env("VAL_EVERY", 0)
    ema_decay: float = env("EMA_DECAY", 0.997)
    ema_every: int = env("EMA_EVERY", 1)
    max_wallclock_s: float = env("MAX_WALLCLOCK_SECONDS", 600.0)


@dataclass(frozen=True)
class QuantConfig:
    """Bits of the matrices, the calibration, and the room the artifact may take."""

    bits: int = env("QUANT_BITS", 6)
    embed_bits: int = env("EMBED_BITS", 8)
    calib_batches: int = env("CALIB_BATCHES", 32)
    calib_rows: int = env("CALIB_ROWS", 8)
    damp: float = env("GPTQ_DAMP", 0.01)
    block: int = env("GPTQ_BLOCK", 128)
    reserve_s: float = env("QUANT_RESERVE_SECONDS", 36.0)
    size_cap: int = env("SIZE_CAP", 16_000_000)
    prune_step: float = env("PRUNE_STEP", 0.01)


@dataclass(frozen=True)
class CacheConfig:
    """The n-gram cache: hashed rows of counts for the orders `low` to `high`."""

    enabled: bool = env("CACHE", True)
    low: int = env("CACHE_LOW", 2)
    high: int = env("CACHE_HIGH", 7)
    bucket_bits: int = env("CACHE_BUCKET_BITS", 16)
    concentration: float = env("CACHE_CONCENTRATION", 4.0)
    unigram_prior: float = env("CACHE_UNIGRAM_PRIOR", 0.5)
    weight_low: float = env("CACHE_WEIGHT_LOW", 0.02)
    weight_high: float = env("CACHE_WEIGHT_HIGH", 0.30)
    entropy_centre: float = env("CACHE_ENTROPY_CENTRE", 3.0)
    entropy_slope: float = env("CACHE_ENTROPY_SLOPE", 1.4)
    stop_at_bos: bool = env("CACHE_STOP_AT_BOS", True)

    @property
    def orders(self) -> range:
        return range(self.low, self.high + 1)


@dataclass(frozen=True)
class EvalConfig:
    """Windows of the evaluation and its clock."""

    seq_len: int = env("EVAL_SEQ_LEN", 2048)
    stride: int = env("EVAL_STRIDE", 64)
    batch: int = env("EVAL_BATCH", 32)
    temperature: float = env("EVAL_TEMPERATURE", 1.0)
    mix_until_s: float = env("EVAL_MIX_UNTIL_SECONDS", 470.0)
    budget_s: float = env("EVAL_BUDGET_SECONDS", 600.0)
    log_every: int = env("EVAL_LOG_EVERY", 400)
    probe_tokens: int = env("PROBE_TOKENS", 1 << 20)


@dataclass(frozen=True)
class RunConfig:
    """Everything together."""

    run_id: str = env("RUN_ID", uuid.uuid4().hex[:12])
    seed: int = env("SEED", 1337)
    artifact: str = env("ARTIFACT", "final_model.int6.ptz")
    log_dir: str = env("LOG_DIR", "logs")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and log
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    local: int

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local)

    @classmethod
    def start(cls) -> Ranks:
        ranks = cls(
            rank=int(os.environ.get("RANK", "0")),
            world=int(os.environ.get("WORLD_SIZE", "1")),
            local=int(os.environ.get("LOCAL_RANK", "0")),
        )
        torch.cuda.set_device(ranks.device)
        if ranks.world > 1:
            dist.init_process_group("nccl", device_id=ranks.device)
        return ranks

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value

    def stop(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


class RunLog:
    """Writes the main rank's lines to a file and to the console."""

    def __init__(self, cfg: RunConfig, ranks: Ranks) -> None:
        self.main = ranks.main
        self.path = Path(cfg.log_dir) / f"{cfg.run_id}.txt"
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.main:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def config(self, cfg: RunConfig) -> None:
        for section, values in asdict(cfg).items():
            self(f"config {section}: {values}", console=False)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_HEADER = 256


def read_shard(path: str | Path) -> np.ndarray:
    """The tokens of one shard: 256 int32 of header, then uint16 tokens."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if header.size != SHARD_HEADER or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"{path}: not a shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: {tokens.size} tokens, the header says {count}")
    return tokens


def shard_paths(pattern: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no shard matches {pattern}")
    return paths


def read_validation(cfg: DataConfig) -> np.ndarray:
    """The whole validation split in the order of its shards."""
    return np.concatenate([read_shard(path) for path in shard_paths(cfg.val_pattern)])


class TokenStream:
    """Goes over the training shards in order, again and again."""

    def __init__(self, pattern: str) -> None:
        self.paths = shard_paths(pattern)
        self.at = 0
        self.offset = 0
        self.tokens = read_shard(self.paths[0])

    def next_shard(self) -> None:
        self.at = (self.at + 1) % len(self.paths)
        self.offset = 0
        self.tokens = read_shard(self.paths[self.at])

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens, over the ends of shards if need be."""
        pieces: list[np.ndarray] = []
        while count > 0:
            left = self.tokens.size - self.offset
            if left <= 0:
                self.next_shard()
                continue
            size = min(count, left)
            pieces.append(self.tokens[self.offset : self.offset + size])
            self.offset += size
            count -= size
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class BatchFeed:
    """Training batches: each rank takes its own span out of a common stretch of the stream."""

    def __init__(self, cfg: RunConfig, ranks: Ranks) -> None:
        self.stream = TokenStream(cfg.data.train_pattern)
        self.ranks = ranks
        self.seq_len = cfg.train.seq_len
        self.rows = cfg.train.batch_tokens // (cfg.train.seq_len * ranks.world)

    def rows_of(self, rows: int) -> tuple[Tensor, Tensor]:
        span = rows * self.seq_len + 1
        stretch = self.stream.take(span * self.ranks.world)
        mine = stretch[self.ranks.rank * span : (self.ranks.rank + 1) * span]
        ids = torch.from_numpy(mine.astype(np.int64)).pin_memory().to(self.ranks.device, non_blocking=True)
        return ids[:-1].view(rows, self.seq_len), ids[1:].view(rows, self.seq_len)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.rows_of(self.rows)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------

SPACE_MARK = "\u2581"


@dataclass(frozen=True)
class ByteTable:
    """How many bytes of text a token stands for, given the token before it."""

    width: Tensor
    opens_with_space: Tensor
    silent: Tensor

    @classmethod
    def from_tokenizer(cls, path: str, vocab: int, device: torch.device) -> ByteTable:
        sp = spm.SentencePieceProcessor(model_file=path)
        if sp.vocab_size() > vocab:
            raise ValueError(f"{path}: {sp.vocab_size()} pieces, the model knows {vocab}")
        width = np.zeros(vocab, dtype=np.int64)
        opens = np.zeros(vocab, dtype=bool)
        silent = np.ones(vocab, dtype=bool)
        for token in range(sp.vocab_size()):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            silent[token] = False
            if sp.is_byte(token):
                width[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith(SPACE_MARK):
                opens[token] = True
                piece = piece[len(SPACE_MARK) :]
            width[token] = len(piece.encode("utf-8"))
        as_tensor = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        return cls(as_tensor(width), as_tensor(opens), as_tensor(silent))

    def count(self, before: Tensor, tokens: Tensor) -> Tensor:
        """Bytes of each of `tokens`; a leading space is text unless a control token stands before it."""
        return self.width[tokens] + (self.opens_with_space[tokens] & ~self.silent[before]).long()


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastLinear(nn.Linear):
    """A linear map without bias, kept in fp32 and used in the type of its input."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Rotates the first `dims` components of every head."""

    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        inverse = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        place = torch.arange(length, device=self.inverse.device, dtype=torch.float32)
        angle = torch.outer(place, self.inverse)
        return angle.cos().to(dtype)[None, :, None, :], angle.sin().to(dtype)[None, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    turned, rest = x[..., :dims], x[..., dims:]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention; in the last layers a head's output loses its part along its own value."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads
        self.head_dim = cfg.dim // cfg.heads
        self.rope_dims = cfg.rope_dims
        kv_dim = self.kv_heads * self.head_dim
        self.q = CastLinear(cfg.dim, cfg.dim)
        self.k = CastLinear(cfg.dim, kv_dim)
        self.v = CastLinear(cfg.dim, kv_dim)
        self.out = CastLinear(cfg.dim, cfg.dim)
        nn.init.zeros_(self.out.weight)
        self.gain = nn.Parameter(torch.full((cfg.heads,), cfg.qk_gain))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base)
        self.exclusive = layer >= cfg.layers - cfg.value_layers

    def without_own_value(self, y: Tensor, v: Tensor) -> Tensor:
        group = self.heads // self.kv_heads
        grouped = y.unflatten(2, (self.kv_heads, group))
        unit = F.normalize(v, dim=-1).unsqueeze(3)
        return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = rms(self.q(x).view(batch, length, self.heads, self.head_dim))
        k = rms(self.k(x).view(batch, length, self.kv_heads, self.head_dim))
        v = self.v(x).view(batch, length, self.kv_heads, self.head_dim)
        cos, sin = self.rotary(length, x.dtype)
        q = rotate(q, cos, sin, self.rope_dims) * self.gain.to(x.dtype)[None, None, :, None]
        k = rotate(k, cos, sin, self.rope_dims)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.exclusive:
            y = self.without_own_value(y, v)
        return self.out(y.reshape(batch, length, dim))


class Mlp(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        inner = int(cfg.dim * cfg.mlp_mult)
        self.up = CastLinear(cfg.dim, inner)
        self.down = CastLinear(inner, cfg.dim)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Layer(nn.Module):
    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(cfg, index)
        self.mlp = Mlp(cfg)
        self.attention_scale = nn.Parameter(torch.ones(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.dim))
        self.blend = nn.Parameter(torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim))))
        self.damp = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        blend = self.blend.to(x.dtype)
        x = blend[0] * x + blend[1] * first
        x = x + self.attention_scale.to(x.dtype) * self.attention(rms(x) * self.damp)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.damp)


class PairEmbedding(nn.Module):
    """A small embedding of the hashed pair (token before, token)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.rows = cfg.bigram_rows
        self.table = nn.Embedding(cfg.bigram_rows, cfg.bigram_dim)
        self.lift = CastLinear(cfg.bigram_dim, cfg.dim)
        self.scale = nn.Parameter(torch.tensor(0.05))
        nn.init.zeros_(self.table.weight)

    def forward(self, ids: Tensor) -> Tensor:
        before = F.pad(ids[:, :-1], (1, 0))
        key = torch.bitwise_xor(ids * 36313, before * 27191) % (self.rows - 1) + 1
        key = torch.cat((torch.zeros_like(key[:, :1]), key[:, 1:]), dim=1)
        return self.lift(self.table(key)) * self.scale


class Net(nn.Module):
    """The language model: first half of the layers feeds the second half through skips, embeddings are tied."""

    def __init__(self, cfg: ModelConfig, vocab: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(vocab, cfg.dim)
        nn.init.normal_(self.embed.weight, std=cfg.embed_std)
        self.pairs = PairEmbedding(cfg)
        self.layers = nn.ModuleList(Layer(cfg, index) for index in range(cfg.layers))
        self.encoder = cfg.layers // 2
        self.skips = nn.Parameter(torch.ones(self.encoder, cfg.dim))

    def hidden(self, ids: Tensor) -> Tensor:
        """The last layer's normalised states."""
        x = rms(self.embed(ids) + self.pairs(ids))
        first = x
        kept: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if index < self.encoder:
                x = layer(x, first)
                kept.append(x)
                continue
            if kept:
                x = x + self.skips[len(kept) - 1].to(x.dtype) * kept.pop()
            x = layer(x, first)
        return rms(x)

    def logits(self, hidden: Tensor) -> Tensor:
        raw = F.linear(hidden, self.embed.weight.to(hidden.dtype))
        return self.cfg.softcap * torch.tanh(raw.float() / self.cfg.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        scores = self.logits(self.hidden(ids))
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def build_net(cfg: RunConfig, device: torch.device) -> Net:
    return Net(cfg.model, cfg.data.vocab).to(device).float()


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers
# ---------------------------------------------------------------------------------------------------------------------


@torch.compile
def orthogonal(grad: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix."""
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
    """Momentum, orthogonalised; each rank works out its share of the matrices and the shares are summed."""

    def __init__(self, params: Sequence[nn.Parameter], ranks: Ranks, cfg: OptimConfig) -> None:
        super().__init__(list(params), dict(lr=cfg.matrix_lr, momentum=cfg.momentum, decay=cfg.weight_decay))
        self.ranks = ranks
        self.newton_steps = cfg.newton_steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params: list[nn.Parameter] = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for index, p in enumerate(params):
                if index % self.ranks.world == self.ranks.rank and p.grad is not None:
                    buffer = self.state[p].setdefault("buffer", torch.zeros_like(p.grad))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    ahead = p.grad.lerp(buffer, group["momentum"])
                    update = orthogonal(ahead, self.newton_steps) * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.flatten()
                at += p.numel()
            self.ranks.total(flat)
            at = 0
            for p in params:
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


def is_matrix(name: str, p: Tensor) -> bool:
    return p.ndim == 2 and name.startswith("layers.") and not name.endswith("blend")


def make_optimisers(net: Net, ranks: Ranks, cfg: OptimConfig) -> list[torch.optim.Optimizer]:
    matrices, tables, rest = [], [], []
    for name, p in net.named_parameters():
        if is_matrix(name, p):
            matrices.append(p)
        elif name.endswith(("embed.weight", "table.weight")):
            tables.append(p)
        else:
            rest.append(p)
    adam = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, ranks, cfg),
        torch.optim.AdamW(tables, lr=cfg.embed_lr, weight_decay=cfg.weight_decay, **adam),
        torch.optim.AdamW(rest, lr=cfg.scalar_lr, weight_decay=0.0, **adam),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return optimisers


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Average:
    """Exponential moving average of the weights."""

    def __init__(self, net: Net, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: Net) -> None:
        for name, value in net.state_dict().items():
            self.shadow[name].lerp_(value.detach(), 1 - self.decay)

    def copy_into(self, net: Net) -> None:
        net.load_state_dict(self.shadow)


class Trainer:
    """Runs the optimisation under a wall-clock cap that leaves room for the quantisation."""

    def __init__(self, cfg: RunConfig, ranks: Ranks, log: RunLog) -> None:
        self.cfg, self.ranks, self.log = cfg, ranks, log
        self.net = build_net(cfg, ranks.device)
        compiled = torch.compile(self.net, dynamic=False, fullgraph=True)
        self.model = (
            DistributedDataParallel(compiled, device_ids=[ranks.local], broadcast_buffers=False)
            if ranks.world > 1
            else compiled
        )
        self.optimisers = make_optimisers(self.net, ranks, cfg.optim)
        self.feed = BatchFeed(cfg, ranks)
        self.average = Average(self.net, cfg.train.ema_decay)
        self.started = 0.0
        self.step_s = 0.0

    # -- schedule

    def elapsed(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.started

    def time_left(self) -> float:
        """Seconds until the training has to make way for the quantisation."""
        return self.cfg.train.max_wallclock_s - self.cfg.quant.reserve_s - self.elapsed()

    def lr_scale(self, step: int) -> float:
        train = self.cfg.train
        remaining = self.time_left()
        by_time = remaining / max(self.step_s * train.warmdown, 1e-9) if step > 0 else 1.0
        by_steps = (train.iterations - step) / max(train.warmdown, 1)
        return max(0.0, min(1.0, by_time, by_steps))

    def set_rates(self, step: int, scale: float) -> None:
        optim = self.cfg.optim
        progress = min(1.0, step / max(optim.momentum_steps, 1))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * scale
                if "momentum" in group:
                    group["momentum"] = optim.momentum_start + progress * (optim.momentum - optim.momentum_start)

    # -- steps

    def take_step(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.cfg.optim.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def random_batch(self) -> tuple[Tensor, Tensor]:
        shape = (self.feed.rows, self.feed.seq_len + 1)
        ids = torch.randint(0, self.cfg.data.vocab, shape, device=self.ranks.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def compile_kernels(self) -> None:
        """A few steps on random tokens so that everything is compiled; weights and optimisers are put back."""
        weights = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        for number in range(self.cfg.train.compile_steps):
            self.take_step(*self.random_batch())
            self.log(f"compile_step:{number + 1}/{self.cfg.train.compile_steps}", console=False)
        self.net.load_state_dict(weights)
        self.optimisers = make_optimisers(self.net, self.ranks, self.cfg.optim)
        seed_everything(self.cfg.seed)

    def out_of_time(self) -> bool:
        """All ranks stop at the same step: the latest clock decides."""
        over = torch.tensor(float(self.time_left() <= 0.0), device=self.ranks.device)
        return bool(self.ranks.total(over).item() > 0)

    def run(self, probe: Evaluator) -> Net:
        train = self.cfg.train
        self.compile_kernels()
        self.ranks.barrier()
        self.started = time.perf_counter()
        loss = torch.zeros((), device=self.ranks.device)
        step = 0
        while step < train.iterations:
            if train.probe_every and step % train.probe_every == 0:
                before = time.perf_counter()
                self.log(f"step:{step} probe_loss:{probe.quick_loss(self.net):.4f}")
                self.started += time.perf_counter() - before
            self.set_rates(step, self.lr_scale(step))
            ids, targets = self.feed.batch()
            loss = self.take_step(ids, targets)
            step += 1
            if step % train.ema_every == 0:
                self.average.update(self.net)
            self.step_s = self.elapsed() / step
            if step % train.log_every == 0 or step <= 5:
                self.log(f"step:{step}/{train.iterations} train_loss:{loss.item():.4f} step_avg:{1e3 * self.step_s:.2f}ms")
            if step % 4 == 0 and self.out_of_time():
                break
        self.log(f"training stopped: step:{step} train_time:{1e3 * self.elapsed():.0f}ms train_loss:{loss.item():.4f}")
        self.average.copy_into(self.net)
        self.log(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB")
        return self.net


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class PackedMatrix:
    """Integer levels of a matrix and one scale per row."""

    levels: Tensor
    scale: Tensor

    def restore(self) -> Tensor:
        return self.levels.float() * self.scale.float()[:, None]


class HessianCollector:
    """Gathers X^T X of the inputs of every linear layer that will be quantised."""

    def __init__(self, net: Net) -> None:
        self.sums: dict[str, Tensor] = {}
        self.handles = []
        for name, module in net.named_modules():
            if isinstance(module, CastLinear) and name.startswith("layers."):
                size = module.in_features
                self.sums[f"{name}.weight"] = torch.zeros(size, size, device=module.weight.device)
                self.handles.append(module.register_forward_hook(self.hook_for(f"{name}.weight")))

    def hook_for(self, key: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            self.sums[key].addmm_(x.T, x)

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def calibration_batches(cfg: RunConfig, feed: BatchFeed) -> Iterator[Tensor]:
    """Further batches of the training stream."""
    for _ in range(cfg.quant.calib_batches):
        ids, _ = feed.rows_of(cfg.quant.calib_rows)
        yield ids


@torch.no_grad()
def collect_hessians(net: Net, cfg: RunConfig, feed: BatchFeed, ranks: Ranks) -> dict[str, Tensor]:
    collector = HessianCollector(net)
    net.eval()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for ids in calibration_batches(cfg, feed):
            net.hidden(ids)
    collector.close()
    for value in collector.sums.values():
        ranks.total(value)
        value /= cfg.quant.calib_batches * ranks.world
    return collector.sums


def row_scales(weight: Tensor, top: int) -> Tensor:
    """Per row the clipping quantile with the least squared error."""
    best = torch.full((weight.size(0),), float("inf"), device=weight.device)
    chosen = torch.ones(weight.size(0), device=weight.device)
    for quantile in (0.9990, 0.9995, 0.9999, 0.99999, 1.0):
        limit = torch.quantile(weight.abs(), quantile, dim=1).clamp_min(1e-8)
        scale = limit / top
        error = (weight - (weight / scale[:, None]).round().clamp(-top, top) * scale[:, None]).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
    return chosen


def plain_quantise(weight: Tensor, bits: int) -> PackedMatrix:
    top = 2 ** (bits - 1) - 1
    scale = row_scales(weight.float(), top).half().float()
    levels = (weight.float() / scale[:, None]).round().clamp(-top, top)
    return PackedMatrix(levels.to(torch.int8).cpu(), scale.half().cpu())


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, cfg: QuantConfig) -> PackedMatrix:
    """GPTQ, columns in order of the Hessian's diagonal, the error handed on to the columns still to come."""
    top = 2 ** (cfg.bits - 1) - 1
    w = weight.float().clone()
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(cfg.damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale = row_scales(w, top).half().float()
    levels = torch.zeros_like(w)
    columns = w.size(1)
    for lo in range(0, columns, cfg.block):
        hi = min(lo + cfg.block, columns)
        errors = torch.zeros_like(w[:, lo:hi])
        for column in range(lo, hi):
            level = (w[:, column] / scale).round().clamp(-top, top)
            levels[:, column] = level
            error = (w[:, column] - level * scale) / inverse[column, column]
            w[:, column:hi] -= error[:, None] * inverse[column, column:hi][None, :]
            errors[:, column - lo] = error
        w[:, hi:] -= errors @ inverse[lo:hi, hi:]
    return PackedMatrix(levels[:, order.argsort()].to(torch.int8).cpu(), scale.half().cpu())


def quantise(net: Net, hessians: dict[str, Tensor], cfg: QuantConfig) -> tuple[dict[str, PackedMatrix], dict[str, Tensor]]:
    packed: dict[str, PackedMatrix] = {}
    plain: dict[str, Tensor] = {}
    for name, value in net.state_dict().items():
        if name in hessians:
            packed[name] = gptq(value, hessians[name], cfg)
        elif name.endswith(("embed.weight", "table.weight", "lift.weight")):
            packed[name] = plain_quantise(value, cfg.embed_bits)
        else:
            plain[name] = value.detach().half().cpu()
    return packed, plain


def prune_small(packed: dict[str, PackedMatrix], share: float) -> None:
    """Sets that share of the levels +-1 to zero, those of the rows with the smallest scales."""
    for matrix in packed.values():
        rows = matrix.scale.float().argsort()[: int(share * matrix.scale.numel())]
        part = matrix.levels[rows]
        matrix.levels[rows] = torch.where(part.abs() == 1, torch.zeros_like(part), part)


# ---------------------------------------------------------------------------------------------------------------------
# Artifact
# ---------------------------------------------------------------------------------------------------------------------


def code_size() -> int:
    return len(Path(__file__).read_bytes())


def compress(raw: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    return lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


def serialise(packed: dict[str, PackedMatrix], plain: dict[str, Tensor]) -> bytes:
    payload = {
        "levels": {name: matrix.levels for name, matrix in packed.items()},
        "scales": {name: matrix.scale for name, matrix in packed.items()},
        "plain": plain,
    }
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return compress(buffer.getvalue())


def write_artifact(cfg: RunConfig, packed: dict[str, PackedMatrix], plain: dict[str, Tensor], log: RunLog) -> None:
    """Writes the artifact; prunes a little at a time while code and artifact together are too large."""
    share = 0.0
    code = code_size()
    blob = serialise(packed, plain)
    while len(blob) + code > cfg.quant.size_cap and share < 0.5:
        share += cfg.quant.prune_step
        prune_small(packed, share)
        blob = serialise(packed, plain)
    Path(cfg.artifact).write_bytes(blob)
    total = len(blob) + code
    log(f"Serialized model int{cfg.quant.bits}+lzma: {len(blob)} bytes (pruned rows {share:.2f})")
    log(f"Code size: {code} bytes")
    log(f"Total submission size: {total} bytes")
    if total > cfg.quant.size_cap:
        raise RuntimeError(f"submission too large: {total} bytes")


def read_artifact(cfg: RunConfig, device: torch.device) -> Net:
    """A fresh network with the weights of the artifact."""
    raw = lzma.decompress(Path(cfg.artifact).read_bytes())
    payload = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    state = {name: value.float() for name, value in payload["plain"].items()}
    for name, levels in payload["levels"].items():
        state[name] = PackedMatrix(levels, payload["scales"][name]).restore()
    net = build_net(cfg, device)
    net.load_state_dict(state)
    return net.eval()


# ---------------------------------------------------------------------------------------------------------------------
# N-gram cache
# ---------------------------------------------------------------------------------------------------------------------

HASH_PRIMES = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5], dtype=np.uint64)


class BackoffCache:
    """Counts of what followed the last n-1 tokens, one table of hashed rows per order.

    Position t stands for the prediction of token t+1. A row holds a count for every token of the vocabulary, contexts
    that collide share it. `rows` starts from the unigram distribution and blends in order after order by Dirichlet
    smoothing, each row being divided by its own sum, so that the outcome adds up to one over the vocabulary.
    """

    def __init__(self, cfg: CacheConfig, tokens: np.ndarray, vocab: int, bos: int) -> None:
        self.cfg, self.vocab = cfg, vocab
        self.tokens = tokens.astype(np.int64)
        self.mask = np.uint64((1 << cfg.bucket_bits) - 1)
        self.tables = {order: np.zeros((1 << cfg.bucket_bits, vocab), dtype=np.uint32) for order in cfg.orders}
        self.unigram = np.zeros(vocab, dtype=np.int64)
        self.reach = self.context_reach(bos)

    def context_reach(self, bos: int) -> np.ndarray:
        """For each position how many tokens of its own document it may look back on."""
        place = np.arange(self.tokens.size, dtype=np.int64)
        if not self.cfg.stop_at_bos:
            return place + 1
        opening = np.maximum.accumulate(np.where(self.tokens == bos, place, 0))
        return place - opening + 1

    def buckets(self, order: int, positions: np.ndarray) -> np.ndarray:
        """The row of each position's last order-1 tokens."""
        key = np.full(positions.size, order, dtype=np.uint64)
        for back in range(order - 1):
            token = self.tokens[positions - back].astype(np.uint64)
            key = (key ^ (token + np.uint64(1))) * HASH_PRIMES[back]
            key ^= key >> np.uint64(29)
        return (key & self.mask).astype(np.int64)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The cache's distribution over the whole vocabulary at each position."""
        prior = self.unigram + self.cfg.unigram_prior
        blended = np.repeat((prior / prior.sum()).astype(np.float32)[None, :], positions.size, axis=0)
        for order in self.cfg.orders:
            usable = np.flatnonzero(self.reach[positions] >= order - 1)
            if usable.size == 0:
                continue
            counts = self.tables[order][self.buckets(order, positions[usable])].astype(np.float32)
            total = counts.sum(axis=1, keepdims=True)
            strength = self.cfg.concentration
            blended[usable] = (counts + strength * blended[usable]) / (total + strength)
        return blended

    def ingest(self, lo: int, hi: int, piece: int = 1 << 20) -> None:
        """Counts the tokens that the positions lo to hi predict."""
        for start in range(lo, hi, piece):
            positions = np.arange(start, min(start + piece, hi), dtype=np.int64)
            followers = self.tokens[positions + 1]
            self.unigram += np.bincount(followers, minlength=self.vocab)
            for order in self.cfg.orders:
                usable = self.reach[positions] >= order - 1
                where = self.buckets(order, positions[usable]) * self.vocab + followers[usable]
                np.add.at(self.tables[order].reshape(-1), where, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Positions start to stop are scored inside the window that begins at `window`."""

    window: int
    start: int
    stop: int


@dataclass
class Tally:
    """Sums over the tokens scored so far."""

    mixed: Tensor
    neural: Tensor
    tokens: Tensor
    text_bytes: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> Tally:
        zero = lambda: torch.zeros((), dtype=torch.float64, device=device)  # noqa: E731
        return cls(zero(), zero(), zero(), zero())

    def add(self, mixed: Tensor, neural: Tensor, text_bytes: Tensor) -> None:
        self.mixed += mixed.double().sum()
        self.neural += neural.double().sum()
        self.tokens += mixed.numel()
        self.text_bytes += text_bytes.double().sum()

    def shared(self, ranks: Ranks) -> Tally:
        for value in (self.mixed, self.neural, self.tokens, self.text_bytes):
            ranks.total(value)
        return self


@dataclass(frozen=True)
class Score:
    """What a pass over the text comes to."""

    loss: float
    bpb: float
    neural_bpb: float
    tokens: int
    text_bytes: int
    seconds: float

    @classmethod
    def of(cls, tally: Tally, seconds: float) -> Score:
        tokens, text_bytes = tally.tokens.item(), tally.text_bytes.item()
        per_byte = 1.0 / (math.log(2.0) * text_bytes)
        return cls(
            loss=tally.mixed.item() / tokens,
            bpb=tally.mixed.item() * per_byte,
            neural_bpb=tally.neural.item() * per_byte,
            tokens=int(tokens),
            text_bytes=int(text_bytes),
            seconds=seconds,
        )


class Evaluator:
    """Scores the validation split once, from left to right inside each rank's part."""

    def __init__(self, cfg: RunConfig, ranks: Ranks, log: RunLog) -> None:
        self.cfg, self.ranks, self.log = cfg, ranks, log
        self.device = ranks.device
        self.array = read_validation(cfg.data)
        self.tokens = torch.from_numpy(self.array.astype(np.int64)).to(self.device)
        self.table = ByteTable.from_tokenizer(cfg.data.tokenizer, cfg.data.vocab, self.device)
        self.positions = self.tokens.numel() - 1
        self.started = 0.0

    # -- plan

    def blocks(self, lo: int, hi: int) -> list[Block]:
        """Blocks of `stride` positions, none of them twice, each with as much context as a window holds."""
        settings = self.cfg.eval
        plan = []
        for start in range(lo, hi, settings.stride):
            stop = min(start + settings.stride, hi)
            plan.append(Block(max(0, stop - settings.seq_len), start, stop))
        return plan

    def own_part(self) -> tuple[int, int]:
        """The contiguous positions of this rank; the parts of all ranks cover every position once."""
        stride = self.cfg.eval.stride
        strides = (self.positions + stride - 1) // stride
        share = (strides + self.ranks.world - 1) // self.ranks.world
        lo = min(self.ranks.rank * share * stride, self.positions)
        return lo, min(lo + share * stride, self.positions)

    def batches(self, plan: list[Block]) -> Iterator[list[Block]]:
        size = self.cfg.eval.batch
        for at in range(0, len(plan), size):
            yield plan[at : at + size]

    def windows(self, group: list[Block]) -> Tensor:
        """The windows of a batch, filled up on the right, where nothing is scored."""
        settings = self.cfg.eval
        ids = torch.zeros((settings.batch, settings.seq_len), dtype=torch.long, device=self.device)
        for row, block in enumerate(group):
            ids[row, : block.stop - block.window] = self.tokens[block.window : block.stop]
        return ids

    def scored_places(self, group: list[Block]) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column in the batch, and the position in the text, of each scored prediction."""
        rows, columns, positions = [], [], []
        for row, block in enumerate(group):
            places = torch.arange(block.start, block.stop, device=self.device)
            rows.append(torch.full_like(places, row))
            columns.append(places - block.window)
            positions.append(places)
        return torch.cat(rows), torch.cat(columns), torch.cat(positions)

    # -- predictions

    @torch.no_grad()
    def neural_logp(self, net: Net, group: list[Block]) -> tuple[Tensor, Tensor]:
        """The network's log-probabilities of the whole vocabulary at the scored positions, and these positions."""
        rows, columns, positions = self.scored_places(group)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            states = net.hidden(self.windows(group))
            scores = net.logits(states[rows, columns])
        return F.log_softmax(scores.float() / self.cfg.eval.temperature, dim=-1), positions

    def cache_weight(self, logp: Tensor) -> Tensor:
        """The cache's share grows with the entropy of the network's own distribution."""
        settings = self.cfg.cache
        entropy = -(logp.exp() * logp).sum(dim=-1, keepdim=True)
        rise = torch.sigmoid(settings.entropy_slope * (entropy - settings.entropy_centre))
        return settings.weight_low + (settings.weight_high - settings.weight_low) * rise

    @torch.no_grad()
    def mixed_logp(self, logp: Tensor, positions: Tensor, cache: BackoffCache) -> Tensor:
        """Network and cache mixed token by token over the whole vocabulary."""
        rows = torch.from_numpy(cache.rows(positions.cpu().numpy())).to(self.device)
        weight = self.cache_weight(logp)
        return torch.logaddexp(logp + torch.log1p(-weight), rows.clamp_min(1e-30).log() + weight.log())

    # -- passes

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.started

    def mixing(self, cache: BackoffCache | None) -> bool:
        return cache is not None and self.seconds() < self.cfg.eval.mix_until_s

    def fresh_cache(self, lo: int) -> BackoffCache | None:
        """A cache that knows the tokens before position `lo` and nothing after them."""
        if not self.cfg.cache.enabled:
            return None
        cache = BackoffCache(self.cfg.cache, self.array, self.cfg.data.vocab, self.cfg.data.bos)
        cache.ingest(0, lo)
        self.log(f"cache filled with {lo} tokens on rank {self.ranks.rank} after {self.seconds():.1f}s")
        return cache

    def score_group(self, net: Net, group: list[Block], cache: BackoffCache | None, tally: Tally) -> None:
        """Scores a batch of blocks, then lets the cache count their tokens."""
        logp, positions = self.neural_logp(net, group)
        targets = self.tokens[positions + 1]
        neural = -logp.gather(1, targets[:, None])[:, 0]
        mixed = neural
        if cache is not None and self.mixing(cache):
            mixed = -self.mixed_logp(logp, positions, cache).gather(1, targets[:, None])[:, 0]
        tally.add(mixed, neural, self.table.count(self.tokens[positions], targets))
        if cache is not None:
            cache.ingest(group[0].start, group[-1].stop)

    def run(self, net: Net) -> Score:
        """The one pass whose result is reported."""
        self.ranks.barrier()
        self.started = time.perf_counter()
        lo, hi = self.own_part()
        net.hidden = torch.compile(net.hidden, dynamic=False)  # type: ignore[method-assign]
        cache = self.fresh_cache(lo)
        tally = Tally.empty(self.device)
        for number, group in enumerate(self.batches(self.blocks(lo, hi))):
            self.score_group(net, group, cache, tally)
            if number % self.cfg.eval.log_every == 0:
                share = (group[-1].stop - lo) / max(hi - lo, 1)
                running = tally.mixed.item() / max(tally.tokens.item(), 1.0)
                self.log(f"eval {100 * share:5.1f}% loss:{running:.4f} {self.seconds():.0f}s")
        tally.shared(self.ranks)
        return Score.of(tally, self.seconds())

    @torch.no_grad()
    def quick_loss(self, net: Net) -> float:
        """Loss on disjoint windows of the split's beginning, for the log during training."""
        settings = self.cfg.eval
        count = min(settings.probe_tokens, self.positions) // settings.seq_len
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index in range(self.ranks.rank, count, self.ranks.world):
            lo = index * settings.seq_len
            ids = self.tokens[lo : lo + settings.seq_len][None]
            targets = self.tokens[lo + 1 : lo + settings.seq_len + 1]
            with torch.autocast("cuda", dtype=torch.bfloat16):
                scores = net.logits(net.hidden(ids))[0]
            sums[0] += F.cross_entropy(scores.float(), targets, reduction="sum").double()
            sums[1] += targets.numel()
        self.ranks.total(sums)
        return (sums[0] / sums[1]).item()

    def report(self, score: Score) -> None:
        self.log(f"scored tokens:{score.tokens} of {self.positions} bytes:{score.text_bytes}")
        self.log(f"neural part of the same pass val_bpb:{score.neural_bpb:.6f}")
        self.log(f"final_mixture val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} eval_time:{1e3 * score.seconds:.0f}ms")
        self.log(f"final_mixture_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
        if score.seconds > self.cfg.eval.budget_s:
            self.log(f"WARNING: evaluation took {score.seconds:.0f}s, allowed are {self.cfg.eval.budget_s:.0f}s")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def quantise_and_write(cfg: RunConfig, trainer: Trainer, net: Net, ranks: Ranks, log: RunLog) -> None:
    """Calibrates on training batches and writes the artifact, on the training's clock."""
    hessians = collect_hessians(net, cfg, trainer.feed, ranks)
    log(f"calibration done: train_time:{1e3 * trainer.elapsed():.0f}ms")
    if ranks.main:
        packed, plain = quantise(net, hessians, cfg.quant)
        log(f"quantisation done: train_time:{1e3 * trainer.elapsed():.0f}ms")
        write_artifact(cfg, packed, plain, log)
    ranks.barrier()


def set_backends() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def main() -> None:
    cfg = RunConfig()
    ranks = Ranks.start()
    log = RunLog(cfg, ranks)
    log.config(cfg)
    log(f"python {sys.version.split()[0]} torch {torch.__version__} world_size:{ranks.world} seed:{cfg.seed}")
    set_backends()
    seed_everything(cfg.seed)

    evaluator = Evaluator(cfg, ranks, log)
    log(f"validation tokens:{evaluator.positions + 1}")
    trainer = Trainer(cfg, ranks, log)
    log(f"parameters:{sum(p.numel() for p in trainer.net.parameters())}")

    net = trainer.run(evaluator)
    quantise_and_write(cfg, trainer, net, ranks, log)

    restored = read_artifact(cfg, ranks.device)
    score = evaluator.run(restored)
    evaluator.report(score)
    ranks.stop()


if __name__ == "__main__":
    main()
