"""Foula: 10 layers, int5 MLP / int6 attention, EMA, and a causal n-gram backoff cache at evaluation.

One file: trains on fineweb_train shards for at most ten minutes (the GPTQ calibration on training data is inside that
time), packs the averaged weights with zstd, reads the packed file back and scores the whole validation stream once.

Evaluation in short.  The stream is cut into chunks of `cache_chunk` targets.  Within a chunk every target is scored by a
sliding window of `eval_seq_len` tokens; the network's distribution over the vocabulary is mixed with the distribution of
a backoff n-gram model (orders 2..7) whose counts come from earlier chunks only.  After a chunk has been scored its tokens
are added to the counts.  The weights of the network never change during evaluation.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import math
import os
import random
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def env(name: str, default):
    """A dataclass field whose value is read from the environment when the config is made."""

    def read():
        raw = os.environ.get(name)
        if raw is None:
            return default
        if isinstance(default, bool):
            return raw.strip().lower() in ("1", "true", "yes", "on")
        return type(default)(raw)

    return field(default_factory=read)


@dataclass
class Config:
    # data
    data_dir: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = env("RUN_ID", str(uuid.uuid4()))
    seed: int = env("SEED", 1337)
    vocab_size: int = env("VOCAB_SIZE", 1024)
    bos_id: int = env("BOS_ID", 1)

    # training length
    iterations: int = env("ITERATIONS", 20000)
    max_train_seconds: float = env("MAX_WALLCLOCK_SECONDS", 600.0)
    calib_reserve_seconds: float = env("CALIB_RESERVE_SECONDS", 16.0)
    warmup_steps: int = env("WARMUP_STEPS", 20)
    warmdown_iters: int = env("WARMDOWN_ITERS", 3000)
    train_batch_tokens: int = env("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len: int = env("TRAIN_SEQ_LEN", 2048)
    train_log_every: int = env("TRAIN_LOG_EVERY", 200)
    val_loss_every: int = env("VAL_LOSS_EVERY", 4000)
    val_batch_tokens: int = env("VAL_BATCH_TOKENS", 524_288)

    # model
    num_layers: int = env("NUM_LAYERS", 10)
    model_dim: int = env("MODEL_DIM", 512)
    num_heads: int = env("NUM_HEADS", 8)
    num_kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_mult: float = env("MLP_MULT", 3.0)
    rope_dims: int = env("ROPE_DIMS", 16)
    rope_base: float = env("ROPE_BASE", 10000.0)
    logit_softcap: float = env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init: float = env("QK_GAIN_INIT", 1.5)
    xsa_last_n: int = env("XSA_LAST_N", 4)
    bigram_buckets: int = env("BIGRAM_BUCKETS", 4096)
    bigram_dim: int = env("BIGRAM_DIM", 128)
    leaky_slope: float = env("LEAKY_SLOPE", 0.5)

    # optimisation
    embed_lr: float = env("TIED_EMBED_LR", 0.035)
    embed_init_std: float = env("TIED_EMBED_INIT_STD", 0.005)
    matrix_lr: float = env("MATRIX_LR", 0.025)
    scalar_lr: float = env("SCALAR_LR", 0.025)
    muon_momentum: float = env("MUON_MOMENTUM", 0.99)
    muon_momentum_start: float = env("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_steps: int = env("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_backend_steps: int = env("MUON_BACKEND_STEPS", 5)
    muon_wd: float = env("MUON_WD", 0.04)
    adam_wd: float = env("ADAM_WD", 0.04)
    beta1: float = env("BETA1", 0.9)
    beta2: float = env("BETA2", 0.95)
    adam_eps: float = env("ADAM_EPS", 1e-8)
    grad_clip: float = env("GRAD_CLIP_NORM", 0.3)
    ema_decay: float = env("EMA_DECAY", 0.997)

    # quantisation
    mlp_bits: int = env("MLP_BITS", 5)
    attn_bits: int = env("ATTN_BITS", 6)
    embed_bits: int = env("EMBED_BITS", 8)
    calib_sequences: int = env("CALIB_SEQUENCES", 128)
    gptq_block: int = env("GPTQ_BLOCK", 128)
    gptq_damp: float = env("GPTQ_DAMP", 0.01)
    zstd_level: int = env("ZSTD_LEVEL", 22)
    artifact_path: str = env("ARTIFACT_PATH", "final_model.foula.ptz")
    size_limit: int = env("SIZE_LIMIT", 16_000_000)

    # evaluation
    eval_seq_len: int = env("EVAL_SEQ_LEN", 2048)
    eval_stride: int = env("EVAL_STRIDE", 64)
    eval_batch_windows: int = env("EVAL_BATCH_WINDOWS", 64)
    eval_seconds_cap: float = env("EVAL_SECONDS_CAP", 600.0)
    eval_temperature: float = env("EVAL_TEMPERATURE", 1.0)

    # n-gram cache
    cache_enabled: bool = env("NGRAM_CACHE", True)
    cache_chunk: int = env("NGRAM_CHUNK", 65_536)
    cache_min_order: int = env("NGRAM_MIN_ORDER", 2)
    cache_max_order: int = env("NGRAM_MAX_ORDER", 7)
    cache_bits: int = env("NGRAM_BUCKET_BITS", 19)
    cache_discount: float = env("NGRAM_DISCOUNT", 0.75)
    mix_max: float = env("NGRAM_MIX_MAX", 0.40)
    mix_centre: float = env("NGRAM_MIX_CENTRE", 3.0)
    mix_slope: float = env("NGRAM_MIX_SLOPE", 1.2)
    mix_order_power: float = env("NGRAM_MIX_ORDER_POWER", 1.0)

    @property
    def train_pattern(self) -> str:
        return os.path.join(self.data_dir, "fineweb_train_*.bin")

    @property
    def val_pattern(self) -> str:
        return os.path.join(self.data_dir, "fineweb_val_*.bin")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    def check(self) -> None:
        assert self.model_dim % self.num_heads == 0
        assert self.num_heads % self.num_kv_heads == 0
        assert self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim
        assert self.cache_chunk % self.eval_stride == 0
        assert self.eval_stride <= self.eval_seq_len
        assert 2 <= self.cache_min_order <= self.cache_max_order
        assert 0.0 < self.cache_discount < 1.0
        assert 0.0 <= self.mix_max < 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Processes and logging
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """What this process is among its fellows."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    @property
    def grad_accum(self) -> int:
        return 8 // self.size

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor


def join_world() -> World:
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if 8 % size != 0:
        raise ValueError(f"WORLD_SIZE={size} must divide 8 so that the batch stays the same")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return World(rank, local_rank, size, device)


class Log:
    """Prints on the master and keeps the same lines in logs/RUN_ID.txt."""

    def __init__(self, cfg: Config, world: World):
        self.on = world.is_master
        self.path = Path("logs") / f"{cfg.run_id}.txt"
        if self.on:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.on:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            print(text, file=file)


class Stopwatch:
    """Wall-clock seconds, device synchronised; can be held while something that is not training runs."""

    def __init__(self):
        self.total = 0.0
        self.since = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def hold(self) -> float:
        torch.cuda.synchronize()
        self.total += time.perf_counter() - self.since
        self.since = None
        return self.total

    def read(self) -> float:
        running = time.perf_counter() - self.since if self.since is not None else 0.0
        return self.total + running


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_WORDS = 256


def read_shard(path: Path) -> Tensor:
    """The tokens of one shard: a header of 256 int32, then uint16 tokens."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_WORDS)
    if header.size != HEADER_WORDS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {path}")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_WORDS * 4)
    if tokens.size != count:
        raise ValueError(f"short read of {path}: {tokens.size} of {count} tokens")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def shard_paths(pattern: str) -> list[Path]:
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no shard matches {pattern}")
    return paths


class TokenStream:
    """The training shards, one after another, for ever."""

    def __init__(self, pattern: str):
        self.paths = shard_paths(pattern)
        self.index = 0
        self.tokens = read_shard(self.paths[0])
        self.at = 0

    def _next_shard(self) -> None:
        self.index = (self.index + 1) % len(self.paths)
        self.tokens = read_shard(self.paths[self.index])
        self.at = 0

    def take(self, n: int) -> Tensor:
        pieces = []
        while n > 0:
            left = self.tokens.numel() - self.at
            if left <= 0:
                self._next_shard()
                continue
            k = min(n, left)
            pieces.append(self.tokens[self.at : self.at + k])
            self.at += k
            n -= k
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class TrainLoader:
    """Every rank reads the same stream and keeps its own slice of each batch."""

    def __init__(self, cfg: Config, world: World):
        self.world = world
        self.stream = TokenStream(cfg.train_pattern)

    def batch(self, global_tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.world.size * self.world.grad_accum)
        span = local + 1
        block = self.stream.take(span * self.world.size)
        mine = block[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        return x.to(self.world.device, non_blocking=True), y.to(self.world.device, non_blocking=True)


def load_validation(cfg: Config) -> Tensor:
    """The whole validation stream, in order."""
    shards = [read_shard(path) for path in shard_paths(cfg.val_pattern)]
    return torch.cat(shards).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Bytes of the original text
# ---------------------------------------------------------------------------------------------------------------------

SPACE_MARK = "\u2581"


class ByteTable:
    """How many UTF-8 bytes of the text a token stands for.

    A piece that begins with the mark stands for a space and its letters; the space is not counted where the token before is a
    control token, since sentencepiece puts that one in itself.
    """

    def __init__(self, cfg: Config, device: torch.device):
        sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
        if sp.vocab_size() != cfg.vocab_size:
            raise ValueError(f"VOCAB_SIZE={cfg.vocab_size} but the tokenizer has {sp.vocab_size()}")
        letters = np.zeros(cfg.vocab_size, dtype=np.int32)
        spaced = np.zeros(cfg.vocab_size, dtype=bool)
        control = np.ones(cfg.vocab_size, dtype=bool)
        for token in range(sp.vocab_size()):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            control[token] = False
            if sp.is_byte(token):
                letters[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith(SPACE_MARK):
                spaced[token] = True
                piece = piece[len(SPACE_MARK) :]
            letters[token] = len(piece.encode("utf-8"))
        self.letters = torch.from_numpy(letters).to(device)
        self.spaced = torch.from_numpy(spaced).to(device)
        self.control = torch.from_numpy(control).to(device)

    def count(self, targets: Tensor, before: Tensor) -> Tensor:
        """Bytes of each target, given the token before it."""
        space = self.spaced[targets] & ~self.control[before]
        return self.letters[targets] + space.to(torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Muon
# ---------------------------------------------------------------------------------------------------------------------


def orthogonalise(grad: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iteration (quintic) towards the nearest semi-orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + eps)
    flipped = x.size(0) > x.size(1)
    if flipped:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        poly = b * gram + c * gram @ gram
        x = a * x + poly @ x
    return x.T if flipped else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose updates are orthogonalised; the matrices are shared out among the ranks."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float, world: World):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay))
        self.world = world

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank and p.grad is not None:
                    grad = p.grad
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(grad)
                    buf = state["momentum"]
                    buf.mul_(group["momentum"]).add_(grad)
                    update = orthogonalise(grad.add(buf, alpha=group["momentum"]), group["backend_steps"])
                    update = update * max(1, update.size(0) / update.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.reshape(-1)
                at += p.numel()
            self.world.sum_(flat)
            at = 0
            for p in params:
                update = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
                at += p.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class Dense(nn.Linear):
    """Linear without bias: float32 master weights, computed in the dtype of the input."""

    def __init__(self, n_in: int, n_out: int, zero_init: bool = False):
        super().__init__(n_in, n_out, bias=False)
        self.zero_init = zero_init

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Rotary embedding of the first `dims` dimensions of each head."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        self.dims = dims
        inverse = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        angle = torch.outer(torch.arange(length, device=x.device, dtype=torch.float32), self.inverse)
        cos = angle.cos()[None, :, None, :].to(x.dtype)
        sin = angle.sin()[None, :, None, :].to(x.dtype)
        turned, kept = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, kept), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Config, exclude_self: bool):
        super().__init__()
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        self.exclude_self = exclude_self
        kv_dim = self.kv_heads * self.head_dim
        self.q = Dense(cfg.model_dim, cfg.model_dim)
        self.k = Dense(cfg.model_dim, kv_dim)
        self.v = Dense(cfg.model_dim, kv_dim)
        self.out = Dense(cfg.model_dim, cfg.model_dim, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((self.heads,), cfg.qk_gain_init))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base)

    def _without_self(self, y: Tensor, v: Tensor) -> Tensor:
        """Takes the direction of the token's own value out of what attention brought (XSA)."""
        bsz, length, heads, dim = y.shape
        grouped = y.reshape(bsz, length, self.kv_heads, heads // self.kv_heads, dim)
        unit = F.normalize(v, dim=-1).unsqueeze(-2)
        grouped = grouped - (grouped * unit).sum(dim=-1, keepdim=True) * unit
        return grouped.reshape(bsz, length, heads, dim)

    def forward(self, x: Tensor) -> Tensor:
        bsz, length, dim = x.shape
        q = self.q(x).view(bsz, length, self.heads, self.head_dim)
        k = self.k(x).view(bsz, length, self.kv_heads, self.head_dim)
        v = self.v(x).view(bsz, length, self.kv_heads, self.head_dim)
        q = self.rotary(rms_norm(q)) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = self.rotary(rms_norm(k))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.exclude_self:
            y = self._without_self(y, v)
        return self.out(y.reshape(bsz, length, dim))


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.slope = cfg.leaky_slope
        self.up = Dense(cfg.model_dim, hidden)
        self.down = Dense(hidden, cfg.model_dim, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), self.slope).square())


class Block(nn.Module):
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn = Attention(cfg, exclude_self=layer >= cfg.num_layers - cfg.xsa_last_n)
        self.mlp = MLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x) * self.depth_scale)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.depth_scale)
        return x


class BigramEmbedding(nn.Module):
    """A hashed embedding of (token before, token). The first token of a document has no token before it."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.buckets = cfg.bigram_buckets
        self.bos_id = cfg.bos_id
        self.table = nn.Embedding(cfg.bigram_buckets, cfg.bigram_dim)
        self.proj = Dense(cfg.bigram_dim, cfg.model_dim, zero_init=True)
        self.scale = nn.Parameter(torch.tensor(0.05))
        nn.init.zeros_(self.table.weight)

    def forward(self, ids: Tensor) -> Tensor:
        before = F.pad(ids[:, :-1], (1, 0), value=self.bos_id)
        before = torch.where(ids == self.bos_id, ids, before)
        slot = (before * 36313 + ids * 27191) % (self.buckets - 1)
        return self.proj(self.table(slot)) * self.scale


class GPT(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.softcap = cfg.logit_softcap
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram = BigramEmbedding(cfg)
        self.encoder_layers = cfg.num_layers // 2
        self.decoder_layers = cfg.num_layers - self.encoder_layers
        skips = min(self.encoder_layers, self.decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(skips, cfg.model_dim))
        self.blocks = nn.ModuleList([Block(cfg, i) for i in range(cfg.num_layers)])
        self._init(cfg)

    def _init(self, cfg: Config) -> None:
        nn.init.normal_(self.embed.weight, std=cfg.embed_init_std)
        for name, module in self.named_modules():
            if not isinstance(module, Dense):
                continue
            if module.zero_init:
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.bigram(ids)
        x = rms_norm(x)
        x0 = x
        kept = []
        for i in range(self.encoder_layers):
            x = self.blocks[i](x, x0)
            kept.append(x)
        for i in range(self.decoder_layers):
            if kept:
                x = x + self.skip_weights[i].to(x.dtype) * kept.pop()
            x = self.blocks[self.encoder_layers + i](x, x0)
        return rms_norm(x)

    def head(self, x: Tensor) -> Tensor:
        raw = F.linear(x, self.embed.weight.to(x.dtype))
        return self.softcap * torch.tanh(raw / self.softcap)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.hidden(ids)
        logits = self.head(x.reshape(-1, x.size(-1)))
        return F.cross_entropy(logits.float(), targets.reshape(-1), reduction="mean")


CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "bigram.scale")


def is_control(name: str) -> bool:
    return any(part in name for part in CONTROL_NAMES)


def build_model(cfg: Config, device: torch.device) -> GPT:
    return GPT(cfg).to(device).float()


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers and averaging
# ---------------------------------------------------------------------------------------------------------------------


class Optimizers:
    """Muon for the matrices of the blocks, Adam for the embeddings and for everything small."""

    def __init__(self, cfg: Config, model: GPT, world: World):
        self.cfg = cfg
        named = list(model.blocks.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and not is_control(name)]
        small = [p for name, p in named if p.ndim < 2 or is_control(name)]
        small += [model.skip_weights, model.bigram.scale]
        matrices.append(model.bigram.proj.weight)
        tables = [model.embed.weight, model.bigram.table.weight]
        adam = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.muon = Muon(
            matrices,
            lr=cfg.matrix_lr,
            momentum=cfg.muon_momentum,
            backend_steps=cfg.muon_backend_steps,
            weight_decay=cfg.muon_wd,
            world=world,
        )
        self.all = [
            torch.optim.AdamW(tables, lr=cfg.embed_lr, weight_decay=cfg.adam_wd, **adam),
            self.muon,
            torch.optim.AdamW(small, lr=cfg.scalar_lr, weight_decay=0.0, **adam),
        ]
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    def set_rates(self, step: int, scale: float) -> None:
        share = min(step / max(1, self.cfg.muon_momentum_steps), 1.0)
        momentum = (1 - share) * self.cfg.muon_momentum_start + share * self.cfg.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def snapshot(self) -> list[dict]:
        return [copy.deepcopy(optimizer.state_dict()) for optimizer in self.all]

    def restore(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


class Average:
    """Exponential moving average of the weights, in float32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            self.shadow[name].lerp_(tensor.detach().float(), 1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        state = model.state_dict()
        model.load_state_dict({name: t.to(state[name].dtype) for name, t in self.shadow.items()}, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation: GPTQ with Hessians from training data, int5 for the MLP, int6 for attention, int8 for the embeddings
# ---------------------------------------------------------------------------------------------------------------------


def weight_bits(cfg: Config, name: str, tensor: Tensor) -> int:
    """Bits for a tensor of the state dict; 0 = kept in float16."""
    if tensor.ndim != 2 or is_control(name) or tensor.numel() < 16_384:
        return 0
    if ".mlp." in name:
        return cfg.mlp_bits
    if ".attn." in name or name == "bigram.proj.weight":
        return cfg.attn_bits
    return cfg.embed_bits


class HessianHooks:
    """Collects X^T X of the inputs of every Dense while the model is run on calibration text."""

    def __init__(self, model: GPT):
        self.sums: dict[str, Tensor] = {}
        self.rows = 0
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, Dense):
                self.handles.append(module.register_forward_pre_hook(self._hook(f"{name}.weight")))

    def _hook(self, key: str):
        def collect(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().reshape(-1, args[0].size(-1)).float()
            if key not in self.sums:
                self.sums[key] = torch.zeros(x.size(1), x.size(1), device=x.device)
            self.sums[key].addmm_(x.T, x)

        return collect

    def close(self) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        return self.sums


@torch.no_grad()
def collect_hessians(cfg: Config, world: World, model: GPT, loader: TrainLoader) -> dict[str, Tensor]:
    """Hessians over `calib_sequences` training sequences, shared out among the ranks."""
    hooks = HessianHooks(model)
    model.eval()
    per_step = 4 * world.size
    for _ in range(max(1, cfg.calib_sequences // per_step)):
        tokens = per_step * cfg.train_seq_len * world.grad_accum
        x, _ = loader.batch(tokens, cfg.train_seq_len)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model.logits(x)
    sums = hooks.close()
    for key in sorted(sums):
        world.sum_(sums[key])
    model.train()
    return sums


def row_scales(weight: Tensor, bits: int) -> Tensor:
    """A scale per row: the clipping that loses least among a few percentiles of the row's magnitude."""
    top = 2 ** (bits - 1) - 1
    best_scale = None
    best_error = None
    for share in (1.0, 0.9995, 0.999, 0.995, 0.99):
        reach = torch.quantile(weight.abs(), share, dim=1) if share < 1.0 else weight.abs().amax(dim=1)
        scale = (reach / top).clamp_min(1e-8)
        rounded = (weight / scale[:, None]).round().clamp(-top - 1, top)
        error = (rounded * scale[:, None] - weight).square().sum(dim=1)
        if best_error is None:
            best_scale, best_error = scale, error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale.half().float()


def round_to_nearest(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    scale = row_scales(weight, bits)
    q = (weight / scale[:, None]).round().clamp(-top - 1, top).to(torch.int8)
    return q, scale.half()


def gptq(weight: Tensor, hessian: Tensor, bits: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """GPTQ: columns rounded one after another, the error of each spread over those still to come."""
    top = 2 ** (bits - 1) - 1
    w = weight.detach().float().clone()
    columns = w.size(1)
    h = hessian.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=True)
    h = h[order][:, order]
    w = w[:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale = row_scales(weight.float(), bits)
    q = torch.zeros_like(w, dtype=torch.int8)
    for lo in range(0, columns, block):
        hi = min(lo + block, columns)
        part = w[:, lo:hi].clone()
        errors = torch.zeros_like(part)
        inner = inverse[lo:hi, lo:hi]
        for j in range(hi - lo):
            level = (part[:, j] / scale).round().clamp(-top - 1, top)
            q[:, lo + j] = level.to(torch.int8)
            error = (part[:, j] - level * scale) / inner[j, j]
            part[:, j:] -= error[:, None] * inner[j, j:][None, :]
            errors[:, j] = error
        w[:, hi:] -= errors @ inverse[lo:hi, hi:]
    back = torch.argsort(order)
    return q[:, back].contiguous(), scale.half()


@torch.no_grad()
def quantise(cfg: Config, model: GPT, hessians: dict[str, Tensor]) -> dict:
    """The model as it is stored: {"q": int8 levels, "s": scales, "f": float16 tensors}."""
    stored: dict[str, dict[str, Tensor]] = {"q": {}, "s": {}, "f": {}}
    for name, tensor in model.state_dict().items():
        bits = weight_bits(cfg, name, tensor)
        if bits == 0:
            stored["f"][name] = tensor.detach().half().cpu()
            continue
        if name in hessians:
            q, scale = gptq(tensor, hessians[name], bits, cfg.gptq_block, cfg.gptq_damp)
        else:
            q, scale = round_to_nearest(tensor.detach().float(), bits)
        stored["q"][name] = q.cpu()
        stored["s"][name] = scale.cpu()
    return stored


def pack(cfg: Config, stored: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    return zstandard.ZstdCompressor(level=cfg.zstd_level).compress(buffer.getvalue())


def unpack(blob: bytes) -> dict[str, Tensor]:
    """The state dict of a packed model."""
    stored = torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(blob)), map_location="cpu", weights_only=True)
    state = {name: t.float() for name, t in stored["f"].items()}
    for name, q in stored["q"].items():
        state[name] = q.float() * stored["s"][name].float()[:, None]
    return state


def write_artifact(cfg: Config, log: Log, blob: bytes) -> None:
    """Writes the packed model and prints the counted size: this file and the model."""
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + len(blob)
    Path(cfg.artifact_path).write_bytes(blob)
    log(f"Serialized model zstd-{cfg.zstd_level}: {len(blob)} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size: {total} bytes (limit {cfg.size_limit})")
    if total > cfg.size_limit:
        raise RuntimeError(f"submission is {total - cfg.size_limit} bytes too large")


def read_artifact(cfg: Config, device: torch.device) -> GPT:
    model = build_model(cfg, device)
    model.load_state_dict(unpack(Path(cfg.artifact_path).read_bytes()), strict=True)
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# N-gram backoff cache
# ---------------------------------------------------------------------------------------------------------------------

HASH_STEP = 6364136223846793005
HASH_SALT = 1442695040888963407


class BackoffCache:
    """Counts of what followed each context of one to six tokens, and the distribution that they give.

    A context is hashed to a row; a row holds a count for every token of the vocabulary. Two contexts that fall on one row share
    their counts, which blurs the prediction but leaves it a distribution, for the row is divided by its own sum. Orders are
    combined by interpolated absolute discounting, from the unigram up:

        p_n(a) = (max(c(a) - D, 0) + D * kinds * p_{n-1}(a)) / total        (rows never seen: p_n = p_{n-1})
    """

    def __init__(self, cfg: Config, device: torch.device):
        self.device = device
        self.vocab = cfg.vocab_size
        self.orders = list(range(cfg.cache_min_order, cfg.cache_max_order + 1))
        self.reach = cfg.cache_max_order - 1
        self.discount = cfg.cache_discount
        self.buckets = 1 << cfg.cache_bits
        self.unigram = torch.zeros(self.vocab, dtype=torch.int64, device=device)
        self.rows = {
            order: torch.zeros(self.buckets, self.vocab, dtype=torch.int32, device=device) for order in self.orders
        }

    def contexts(self, stream: Tensor, positions: Tensor) -> Tensor:
        """For each position the `reach` tokens before it, nearest first. The stream's start is filled with token 0."""
        offsets = torch.arange(1, self.reach + 1, device=positions.device)
        at = positions[:, None] - offsets[None, :]
        return torch.where(at >= 0, stream[at.clamp_min(0)], 0)

    def slots(self, context: Tensor, order: int) -> Tensor:
        """The row of a context, for an order: a hash of its order - 1 nearest tokens."""
        key = torch.full((context.size(0),), HASH_SALT + order, dtype=torch.int64, device=context.device)
        for j in range(order - 1):
            key = (key ^ (context[:, j] + 1)) * HASH_STEP
            key = key ^ ((key >> 31) & 0xFFFFFFFF)
        return torch.remainder(key, self.buckets)

    def distribution(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """For each context a distribution over the vocabulary, and the longest order of which anything had been seen."""
        base = self.unigram.float() + 1.0
        p = (base / base.sum()).expand(context.size(0), -1)
        longest = torch.ones(context.size(0), device=context.device)
        for order in self.orders:
            counts = self.rows[order][self.slots(context, order)].float()
            total = counts.sum(dim=-1, keepdim=True)
            kinds = (counts > 0).sum(dim=-1, keepdim=True).float()
            kept = (counts - self.discount).clamp_min(0.0)
            spread = self.discount * kinds * p
            seen = total > 0
            p = torch.where(seen, (kept + spread) / total.clamp_min(1.0), p)
            longest = torch.where(seen.squeeze(-1), float(order), longest)
        return p, longest

    def update(self, stream: Tensor, start: int, stop: int) -> None:
        """Adds the tokens stream[start:stop], each with its context. Called once they have all been scored."""
        positions = torch.arange(start, stop, device=self.device)
        context = self.contexts(stream, positions)
        tokens = stream[start:stop]
        self.unigram += torch.bincount(tokens, minlength=self.vocab)
        one = torch.ones(1, dtype=torch.int32, device=self.device).expand(tokens.numel())
        for order in self.orders:
            self.rows[order].index_put_((self.slots(context, order), tokens), one, accumulate=True)


class Mixer:
    """Mixes the network and the cache. The weight of the cache grows with the network's entropy and with the order found."""

    def __init__(self, cfg: Config):
        self.top = cfg.mix_max
        self.centre = cfg.mix_centre
        self.slope = cfg.mix_slope
        self.power = cfg.mix_order_power
        self.max_order = cfg.cache_max_order

    def weight(self, log_model: Tensor, longest: Tensor) -> Tensor:
        entropy = -(log_model.exp() * log_model).sum(dim=-1)
        surprise = torch.sigmoid(self.slope * (entropy - self.centre))
        depth = ((longest - 1.0) / (self.max_order - 1.0)).clamp(0.0, 1.0) ** self.power
        return (self.top * surprise * depth).clamp(0.0, 0.95)

    def __call__(self, log_model: Tensor, p_cache: Tensor, longest: Tensor) -> Tensor:
        """Log of the mixed distribution over the whole vocabulary."""
        share = self.weight(log_model, longest)[:, None]
        return torch.log((1.0 - share) * log_model.exp() + share * p_cache)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over the scored targets: nats, targets and bytes."""

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> Tally:
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, nats: Tensor, byte_counts: Tensor) -> None:
        self.nats += nats.double().sum()
        self.tokens += nats.numel()
        self.bytes += byte_counts.double().sum()

    def reduced(self, world: World) -> Tally:
        stacked = world.sum_(torch.stack((self.nats, self.tokens, self.bytes)))
        return Tally(stacked[0], stacked[1], stacked[2])

    @property
    def loss(self) -> float:
        return (self.nats / self.tokens).item()

    @property
    def bits_per_byte(self) -> float:
        return (self.nats / math.log(2.0) / self.bytes).item()


@torch.no_grad()
def evaluate_blocks(cfg: Config, world: World, model, stream: Tensor, table: ByteTable) -> Tally:
    """Loss over the validation stream in blocks of the training length that do not overlap: for the log during training."""
    seq = cfg.train_seq_len
    blocks = (stream.numel() - 1) // seq
    first = blocks * world.rank // world.size
    last = blocks * (world.rank + 1) // world.size
    per_batch = max(1, cfg.val_batch_tokens // (world.size * seq))
    tally = Tally.empty(world.device)
    for lo in range(first, last, per_batch):
        hi = min(lo + per_batch, last)
        piece = stream[lo * seq : hi * seq + 1].to(world.device, torch.int64)
        x = piece[:-1].reshape(-1, seq)
        y = piece[1:].reshape(-1, seq)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model.logits(x)
        nats = F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none")
        tally.add(nats, table.count(y.reshape(-1), x.reshape(-1)))
    return tally.reduced(world)


@dataclass
class Windows:
    """A batch of windows. Row i holds the inputs that lead to the targets `first[i] .. stop[i] - 1` of the stream."""

    inputs: Tensor  # [rows, eval_seq_len], filled up on the right
    positions: Tensor  # [n] the stream position of every target that is scored
    row: Tensor  # [n] its row
    column: Tensor  # [n] the column of the input just before it


def cut_windows(cfg: Config, stream: Tensor, starts: list[int]) -> Windows:
    """The windows that score the targets start .. start + stride - 1, for each start; every target is in one of them."""
    seq = cfg.eval_seq_len
    device = stream.device
    inputs = torch.zeros(len(starts), seq, dtype=torch.int64, device=device)
    positions, rows, columns = [], [], []
    for i, start in enumerate(starts):
        stop = min(start + cfg.eval_stride, stream.numel())
        left = max(0, stop - 1 - seq)
        inputs[i, : stop - 1 - left] = stream[left : stop - 1]
        where = torch.arange(start, stop, device=device)
        positions.append(where)
        columns.append(where - 1 - left)
        rows.append(torch.full_like(where, i))
    return Windows(inputs, torch.cat(positions), torch.cat(rows), torch.cat(columns))


class Evaluator:
    """Scores the stream from left to right, chunk after chunk; each target once."""

    def __init__(self, cfg: Config, world: World, model: GPT, stream: Tensor, table: ByteTable, log: Log):
        self.cfg = cfg
        self.world = world
        self.log = log
        self.table = table
        self.stream = stream.to(world.device, torch.int64)
        self.forward = torch.compile(model.logits, dynamic=False)
        self.cache = BackoffCache(cfg, world.device) if cfg.cache_enabled else None
        self.mixer = Mixer(cfg)
        self.worst_sum = 0.0

    def network(self, windows: Windows) -> Tensor:
        """Log-probabilities of the network for the scored targets' positions, [n, vocab]."""
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = self.forward(windows.inputs)
        picked = logits[windows.row, windows.column].float() / self.cfg.eval_temperature
        return F.log_softmax(picked, dim=-1)

    def predict(self, windows: Windows) -> Tensor:
        """Log of the distribution over the vocabulary at every scored position."""
        log_p = self.network(windows)
        if self.cache is not None:
            context = self.cache.contexts(self.stream, windows.positions)
            p_cache, longest = self.cache.distribution(context)
            log_p = self.mixer(log_p, p_cache, longest)
        return log_p

    def audit(self, log_p: Tensor) -> None:
        """Keeps the largest departure from one of a sum over the vocabulary."""
        self.worst_sum = max(self.worst_sum, (log_p.double().exp().sum(dim=-1) - 1.0).abs().max().item())

    def score(self, starts: list[int], tally: Tally) -> None:
        windows = cut_windows(self.cfg, self.stream, starts)
        missing = self.cfg.eval_batch_windows - windows.inputs.size(0)
        if missing:
            windows.inputs = F.pad(windows.inputs, (0, 0, 0, missing))
        log_p = self.predict(windows)
        self.audit(log_p)
        targets = self.stream[windows.positions]
        nats = -log_p.gather(1, targets[:, None]).squeeze(1)
        before = self.stream[windows.positions - 1]
        tally.add(nats, self.table.count(targets, before))

    def mine(self, start: int, stop: int) -> list[int]:
        """This rank's share of a chunk: the starts of its windows."""
        starts = list(range(start, stop, self.cfg.eval_stride))
        first = len(starts) * self.world.rank // self.world.size
        last = len(starts) * (self.world.rank + 1) // self.world.size
        return starts[first:last]

    @torch.inference_mode()
    def run(self) -> Tally:
        cfg = self.cfg
        total = self.stream.numel()
        tally = Tally.empty(self.world.device)
        began = time.perf_counter()
        for number, start in enumerate(range(1, total, cfg.cache_chunk)):
            stop = min(start + cfg.cache_chunk, total)
            share = self.mine(start, stop)
            for lo in range(0, len(share), cfg.eval_batch_windows):
                self.score(share[lo : lo + cfg.eval_batch_windows], tally)
            if self.cache is not None:
                self.cache.update(self.stream, start, stop)
            if number % 50 == 0:
                spent = time.perf_counter() - began
                self.log(f"eval chunk:{number} targets:{stop - 1}/{total - 1} rank0_bpb:{tally.bits_per_byte:.4f} {spent:.0f}s")
        return tally.reduced(self.world)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def rate_scale(cfg: Config, step: int, seconds: float, budget: float) -> float:
    """1 until the last `warmdown_iters` steps that the time still allows, then straight down to 0."""
    if cfg.warmdown_iters <= 0:
        return 1.0
    if step == 0:
        return 1.0
    step_seconds = seconds / step
    warmdown = cfg.warmdown_iters * step_seconds
    left = max(budget - seconds, 0.0)
    return left / max(warmdown, 1e-9) if left <= warmdown else 1.0


class Trainer:
    """The model in training, with its data, optimisers, average and clock."""

    def __init__(self, cfg: Config, world: World, log: Log, stream: Tensor, table: ByteTable):
        self.cfg = cfg
        self.world = world
        self.log = log
        self.val_stream = stream
        self.table = table
        self.model = build_model(cfg, world.device)
        self.optimizers = Optimizers(cfg, self.model, world)
        compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
        self.wrapped = DDP(compiled, device_ids=[world.local_rank], broadcast_buffers=False) if world.size > 1 else compiled
        self.loader = TrainLoader(cfg, world)
        self.clock = Stopwatch()
        self.average = None
        self.step = 0

    @property
    def budget(self) -> float:
        """Seconds for the optimiser steps: what the calibration needs is kept back."""
        return self.cfg.max_train_seconds - self.cfg.calib_reserve_seconds

    def accumulate(self) -> Tensor:
        """Gradients of one batch; returns its mean loss."""
        cfg = self.cfg
        micro_steps = self.world.grad_accum
        total = torch.zeros((), device=self.world.device)
        for micro in range(micro_steps):
            if self.world.size > 1:
                self.wrapped.require_backward_grad_sync = micro == micro_steps - 1
            x, y = self.loader.batch(cfg.train_batch_tokens, cfg.train_seq_len)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.wrapped(x, y)
            total += loss.detach() / micro_steps
            (loss / micro_steps).backward()
        return total

    def warm_up(self) -> None:
        """Compiles everything on a few training batches, then puts weights, optimisers and data back to their start."""
        if self.cfg.warmup_steps <= 0:
            return
        weights = copy.deepcopy(self.model.state_dict())
        states = self.optimizers.snapshot()
        for i in range(self.cfg.warmup_steps):
            self.optimizers.zero_grad()
            self.accumulate()
            self.optimizers.step()
            if i + 1 == self.cfg.warmup_steps or (i + 1) % 10 == 0:
                self.log(f"warmup_step:{i + 1}/{self.cfg.warmup_steps}")
        self.model.load_state_dict(weights, strict=True)
        self.optimizers.restore(states)
        self.optimizers.zero_grad()
        self.loader = TrainLoader(self.cfg, self.world)

    def validate(self) -> None:
        """Prints the validation loss, with the training clock held."""
        seconds = self.clock.hold()
        self.model.eval()
        tally = evaluate_blocks(self.cfg, self.world, self.model, self.val_stream, self.table)
        self.model.train()
        self.log(
            f"step:{self.step}/{self.cfg.iterations} val_loss:{tally.loss:.4f} val_bpb:{tally.bits_per_byte:.4f} "
            f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(self.step, 1):.2f}ms"
        )
        self.clock.start()

    def time_is_up(self) -> bool:
        """Whether the slowest rank has spent its budget: the same answer on all ranks."""
        flag = torch.tensor(float(self.clock.read() >= self.budget), device=self.world.device)
        if self.world.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def train(self) -> None:
        cfg = self.cfg
        self.average = Average(self.model, cfg.ema_decay)
        self.clock.start()
        while self.step < cfg.iterations:
            if cfg.val_loss_every > 0 and self.step > 0 and self.step % cfg.val_loss_every == 0:
                self.validate()
            self.optimizers.set_rates(self.step, rate_scale(cfg, self.step, self.clock.read(), self.budget))
            self.optimizers.zero_grad()
            loss = self.accumulate()
            if cfg.grad_clip > 0:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
            self.optimizers.step()
            self.average.update(self.model)
            self.step += 1
            if self.step <= 5 or self.step % cfg.train_log_every == 0:
                spent = 1000 * self.clock.read()
                self.log(
                    f"step:{self.step}/{cfg.iterations} train_loss:{loss.item():.4f} "
                    f"train_time:{spent:.0f}ms step_avg:{spent / self.step:.2f}ms"
                )
            if self.time_is_up():
                self.log(f"stopping_early: wallclock_cap train_time:{1000 * self.clock.read():.0f}ms step:{self.step}")
                break

    def finish(self) -> None:
        """Averaged weights, calibration on training data and the artifact, still on the training clock."""
        cfg = self.cfg
        self.average.copy_to(self.model)
        self.log("ema: averaged weights applied")
        before = self.clock.read()
        hessians = collect_hessians(cfg, self.world, self.model, self.loader)
        torch.cuda.synchronize()
        calibrated = self.clock.read()
        stored = quantise(cfg, self.model, hessians)
        seconds = self.clock.hold()
        self.log(
            f"gptq: hessians {calibrated - before:.1f}s quantise {seconds - calibrated:.1f}s "
            f"training with calibration {seconds:.1f}s of {cfg.max_train_seconds:.0f}s"
        )
        if seconds > cfg.max_train_seconds:
            raise RuntimeError("training and calibration ran past the cap; raise CALIB_RESERVE_SECONDS")
        if self.world.is_master:
            write_artifact(cfg, self.log, pack(cfg, stored))
        self.world.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def configure_torch() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def describe(cfg: Config, world: World, log: Log) -> None:
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    log(smi.stdout, console=False)
    log(" ".join(f"{key}={value}" for key, value in asdict(cfg).items()), console=False)
    log(f"world_size:{world.size} grad_accum_steps:{world.grad_accum} seed:{cfg.seed}")


def evaluate_artifact(cfg: Config, world: World, log: Log, stream: Tensor, table: ByteTable) -> Tally:
    """Reads the packed model back and scores the validation stream, on the evaluation clock."""
    clock = Stopwatch()
    clock.start()
    model = read_artifact(cfg, world.device)
    evaluator = Evaluator(cfg, world, model, stream, table, log)
    tally = evaluator.run()
    seconds = clock.hold()
    if int(tally.tokens.item()) != stream.numel() - 1:
        raise RuntimeError(f"scored {int(tally.tokens.item())} targets of {stream.numel() - 1}")
    log(f"audit: largest |sum over vocabulary - 1| = {evaluator.worst_sum:.2e}")
    log(
        f"final_sliding_ngram val_loss:{tally.loss:.4f} val_bpb:{tally.bits_per_byte:.4f} "
        f"stride:{cfg.eval_stride} targets:{int(tally.tokens.item())} bytes:{int(tally.bytes.item())} "
        f"eval_time:{1000 * seconds:.0f}ms"
    )
    if seconds > cfg.eval_seconds_cap:
        raise RuntimeError(f"evaluation took {seconds:.0f}s, more than {cfg.eval_seconds_cap:.0f}s")
    return tally


def main() -> None:
    cfg = Config()
    cfg.check()
    world = join_world()
    configure_torch()
    seed_everything(cfg.seed)
    log = Log(cfg, world)
    describe(cfg, world, log)

    table = ByteTable(cfg, world.device)
    stream = load_validation(cfg)
    log(f"val_loader: pattern={cfg.val_pattern} tokens:{stream.numel() - 1}")
    log(f"train_loader: pattern={cfg.train_pattern} shards:{len(shard_paths(cfg.train_pattern))}")

    trainer = Trainer(cfg, world, log, stream, table)
    log(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    trainer.warm_up()
    trainer.train()
    trainer.finish()
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")

    del trainer
    torch.cuda.empty_cache()
    tally = evaluate_artifact(cfg, world, log, stream, table)
    log(f"final_exact val_loss:{tally.loss:.8f} val_bpb:{tally.bits_per_byte:.8f}")
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
