"""
Parameter golf: a small transformer scored together with an online back-off n-gram mixer.

 * 10 layers, 512 wide, grouped-query attention, relu^2 MLP, U-net skips, tied embedding
 * Muon for matrices, Adam for the rest, EMA of the weights
 * GPTQ to 6 bits with Hessians from training shards, inside the ten minutes
 * evaluation: stride-64 sliding window; n-gram tables of orders 2..9 that grow with the tokens already scored,
   an entropy gate and Hedge weights between the experts

Every n-gram row is dense over the vocabulary (a context is hashed, a successor never is), so that each expert is a
proper distribution and the mixture is one too.
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import glob
import io
import logging
import lzma
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger("golf")

SIZE_LIMIT = 16_000_000
TRAIN_LIMIT_S = 600.0
EVAL_LIMIT_S = 600.0
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256


# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------


def env(name: str, default: str) -> str:
    return os.environ.get(name, default)


@dataclass
class Config:
    """All settings. The environment gives the defaults, the command line may override them."""

    # data
    data_dir: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    artifact: str = env("ARTIFACT", "final_model.golf")
    run_id: str = env("RUN_ID", "ngram-mixture")
    seed: int = int(env("SEED", "1337"))

    # model
    vocab_size: int = int(env("VOCAB_SIZE", "1024"))
    layers: int = int(env("NUM_LAYERS", "10"))
    dim: int = int(env("MODEL_DIM", "512"))
    heads: int = int(env("NUM_HEADS", "8"))
    kv_heads: int = int(env("NUM_KV_HEADS", "4"))
    mlp_mult: int = int(env("MLP_MULT", "3"))
    rope_base: float = float(env("ROPE_BASE", "10000"))
    softcap: float = float(env("LOGIT_SOFTCAP", "30"))
    qk_gain: float = float(env("QK_GAIN", "1.5"))
    embed_std: float = float(env("EMBED_STD", "0.005"))

    # training
    iterations: int = int(env("ITERATIONS", "20000"))
    seq_len: int = int(env("SEQ_LEN", "2048"))
    batch_tokens: int = int(env("BATCH_TOKENS", "786432"))
    warmup_steps: int = int(env("WARMUP_STEPS", "20"))
    warmdown_iters: int = int(env("WARMDOWN_ITERS", "3000"))
    max_seconds: float = float(env("MAX_SECONDS", "540"))
    val_every: int = int(env("VAL_EVERY", "2000"))
    log_every: int = int(env("LOG_EVERY", "200"))
    matrix_lr: float = float(env("MATRIX_LR", "0.025"))
    scalar_lr: float = float(env("SCALAR_LR", "0.025"))
    embed_lr: float = float(env("EMBED_LR", "0.035"))
    muon_momentum: float = float(env("MUON_MOMENTUM", "0.99"))
    muon_momentum_start: float = float(env("MUON_MOMENTUM_START", "0.92"))
    muon_momentum_steps: int = int(env("MUON_MOMENTUM_STEPS", "1500"))
    muon_steps: int = int(env("MUON_STEPS", "5"))
    muon_decay: float = float(env("MUON_DECAY", "0.04"))
    beta1: float = float(env("BETA1", "0.9"))
    beta2: float = float(env("BETA2", "0.95"))
    adam_eps: float = float(env("ADAM_EPS", "1e-8"))
    grad_clip: float = float(env("GRAD_CLIP", "0.3"))
    ema_decay: float = float(env("EMA_DECAY", "0.997"))
    ema_start: int = int(env("EMA_START", "500"))

    # quantisation
    bits: int = int(env("QUANT_BITS", "6"))
    embed_bits: int = int(env("EMBED_BITS", "8"))
    calib_batches: int = int(env("CALIB_BATCHES", "16"))
    calib_seqs: int = int(env("CALIB_SEQS", "8"))
    gptq_damp: float = float(env("GPTQ_DAMP", "0.01"))
    gptq_block: int = int(env("GPTQ_BLOCK", "128"))

    # evaluation
    stride: int = int(env("EVAL_STRIDE", "64"))
    eval_batch: int = int(env("EVAL_BATCH", "32"))
    chunk_tokens: int = int(env("CHUNK_TOKENS", "262144"))
    val_batch_tokens: int = int(env("VAL_BATCH_TOKENS", "524288"))

    # n-gram mixture
    min_order: int = int(env("NGRAM_MIN", "2"))
    max_order: int = int(env("NGRAM_MAX", "9"))
    slot_bits: int = int(env("NGRAM_SLOT_BITS", "16"))
    backoff_mass: float = float(env("NGRAM_BACKOFF", "2.5"))
    expert_orders: str = env("NGRAM_EXPERTS", "3,5,7,9")
    gate_centre: float = float(env("GATE_CENTRE", "3.0"))
    gate_slope: float = float(env("GATE_SLOPE", "1.1"))
    gate_max: float = float(env("GATE_MAX", "0.6"))
    entropy_bins: int = int(env("ENTROPY_BINS", "8"))
    hedge_rate: float = float(env("HEDGE_RATE", "0.5"))
    hedge_floor: float = float(env("HEDGE_FLOOR", "0.01"))
    hedge_prior: float = float(env("HEDGE_PRIOR", "0.5"))

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_dir, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_dir, "fineweb_val_*.bin")

    @property
    def orders(self) -> list[int]:
        return list(range(self.min_order, self.max_order + 1))

    @property
    def experts(self) -> list[int]:
        return [int(word) for word in self.expert_orders.split(",")]


def parse_config(argv: list[str] | None = None) -> Config:
    """Config with the command line over the environment's defaults."""
    parser = argparse.ArgumentParser(description="n-gram mixture parameter golf")
    for item in dataclasses.fields(Config):
        kind = type(item.default)
        parser.add_argument("--" + item.name.replace("_", "-"), dest=item.name, type=kind, default=item.default)
    return Config(**vars(parser.parse_args(argv)))


# --------------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def grad_accum(self) -> int:
        return max(1, 8 // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world() -> World:
    rank = int(env("RANK", "0"))
    size = int(env("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(env("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(backend="nccl", device_id=device)
    return World(rank, size, device)


def setup_logging(config: Config, world: World) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if world.main:
        Path("logs").mkdir(exist_ok=True)
        handlers.append(logging.FileHandler(f"logs/{config.run_id}_seed{config.seed}.txt"))
    level = logging.INFO if world.main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=handlers, force=True)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def setup_backends() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def read_shard(path: str) -> np.ndarray:
    """The tokens of a shard, as uint16."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=4 * SHARD_HEADER_INTS)
    if tokens.size != count:
        raise ValueError(f"{path}: {tokens.size} tokens, the header says {count}")
    return tokens


def find_shards(pattern: str) -> list[str]:
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no shards match {pattern}")
    return paths


def load_validation(config: Config) -> np.ndarray:
    """The whole validation split in its order."""
    return np.concatenate([read_shard(path) for path in find_shards(config.val_files)])


class TokenStream:
    """Training tokens one after another, over all shards, round and round."""

    def __init__(self, pattern: str) -> None:
        self.paths = find_shards(pattern)
        self.rewind()

    def rewind(self) -> None:
        self.index = 0
        self.position = 0
        self.tokens = read_shard(self.paths[0])

    def next_shard(self) -> None:
        self.index = (self.index + 1) % len(self.paths)
        self.position = 0
        self.tokens = read_shard(self.paths[self.index])

    def take(self, count: int) -> np.ndarray:
        parts: list[np.ndarray] = []
        missing = count
        while missing > 0:
            available = self.tokens.size - self.position
            if available == 0:
                self.next_shard()
                continue
            step = min(available, missing)
            parts.append(self.tokens[self.position : self.position + step])
            self.position += step
            missing -= step
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class TrainLoader:
    """Batches of training sequences; each rank takes its own part of a common span."""

    def __init__(self, pattern: str, world: World) -> None:
        self.world = world
        self.stream = TokenStream(pattern)

    def rewind(self) -> None:
        self.stream.rewind()

    def batch(self, tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """tokens: of all ranks and one micro step together."""
        local = tokens // self.world.size // seq_len * seq_len
        span = self.stream.take((local + 1) * self.world.size)
        own = span[self.world.rank * (local + 1) : (self.world.rank + 1) * (local + 1)]
        return to_pair(own, seq_len, self.world.device)


def to_pair(tokens: np.ndarray, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    block = torch.from_numpy(tokens.astype(np.int64)).to(device, non_blocking=True)
    return block[:-1].view(-1, seq_len), block[1:].view(-1, seq_len)


# --------------------------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class ByteTable:
    """How many bytes of text a token stands for, given the token before it."""

    own: Tensor  # bytes of the piece without its leading mark
    space: Tensor  # whether the piece begins with the mark of a space
    boundary: Tensor  # whether the piece is no text: control, unknown, unused

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        spaces = self.space[target] & ~self.boundary[previous]
        return self.own[target].to(torch.float64) + spaces.to(torch.float64)


def piece_bytes(tokenizer: spm.SentencePieceProcessor, token: int) -> tuple[int, bool, bool]:
    """(bytes without the mark, leading space, boundary) of one token."""
    if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
        return 0, False, True
    if tokenizer.is_byte(token):
        return 1, False, False
    piece = tokenizer.id_to_piece(token)
    leading = piece.startswith("\u2581")
    text = piece[1:] if leading else piece
    return len(text.encode("utf-8")), leading, False


def build_byte_table(config: Config, device: torch.device) -> ByteTable:
    tokenizer = spm.SentencePieceProcessor(model_file=config.tokenizer)
    size = int(tokenizer.vocab_size())
    if size != config.vocab_size:
        raise ValueError(f"the tokenizer has {size} pieces, the model {config.vocab_size}")
    rows = [piece_bytes(tokenizer, token) for token in range(size)]
    return ByteTable(
        own=torch.tensor([row[0] for row in rows], dtype=torch.int16, device=device),
        space=torch.tensor([row[1] for row in rows], dtype=torch.bool, device=device),
        boundary=torch.tensor([row[2] for row in rows], dtype=torch.bool, device=device),
    )


# --------------------------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights in fp32, used in the type of the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        inverse = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length, device=self.inverse.device, dtype=torch.float32), self.inverse)
        return angles.cos()[None, None].to(dtype), angles.sin()[None, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.dim // config.heads
        self.q = CastedLinear(config.dim, config.dim)
        self.k = CastedLinear(config.dim, self.kv_heads * self.head_dim)
        self.v = CastedLinear(config.dim, self.kv_heads * self.head_dim)
        self.out = CastedLinear(config.dim, config.dim)
        self.gain = nn.Parameter(torch.full((config.heads,), config.qk_gain))
        self.rotary = Rotary(self.head_dim, config.rope_base)

    def split(self, x: Tensor, heads: int) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = rms_norm(self.split(self.q(x), self.heads))
        k = rms_norm(self.split(self.k(x), self.kv_heads))
        v = self.split(self.v(x), self.kv_heads)
        cos, sin = self.rotary(length, x.dtype)
        q = rotate(q, cos, sin) * self.gain.to(x.dtype)[None, :, None, None]
        k = rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = CastedLinear(config.dim, config.mlp_mult * config.dim)
        self.down = CastedLinear(config.mlp_mult * config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = Mlp(config)
        self.attention_scale = nn.Parameter(torch.ones(config.dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.dim))
        self.residual_mix = nn.Parameter(torch.stack((torch.ones(config.dim), torch.zeros(config.dim))))
        self.depth_scale = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.residual_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attention_scale.to(x.dtype) * self.attention(rms_norm(x) * self.depth_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.depth_scale)


class Transformer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.softcap = config.softcap
        self.encoders = config.layers // 2
        self.decoders = config.layers - self.encoders
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.skips = nn.Parameter(torch.ones(min(self.encoders, self.decoders), config.dim))
        self.initialise(config)

    def initialise(self, config: Config) -> None:
        nn.init.normal_(self.embedding.weight, std=config.embed_std)
        for name, module in self.named_modules():
            if isinstance(module, CastedLinear):
                if name.endswith(("out", "down")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The last layer's normalised states."""
        x = rms_norm(self.embedding(tokens).to(torch.bfloat16))
        x0 = x
        stack: list[Tensor] = []
        for block in self.blocks[: self.encoders]:
            x = block(x, x0)
            stack.append(x)
        for index, block in enumerate(self.blocks[self.encoders :]):
            if stack and index < self.skips.size(0):
                x = x + self.skips[index].to(x.dtype) * stack.pop()
            x = block(x, x0)
        return rms_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary, in fp32."""
        logits = F.linear(hidden, self.embedding.weight.to(hidden.dtype)).float()
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(tokens))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


# --------------------------------------------------------------------------------------------------------------------
# Optimisers
# --------------------------------------------------------------------------------------------------------------------


@torch.compile
def orthogonalise(grad: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; the ranks share the matrices among them."""

    def __init__(self, params: list[nn.Parameter], config: Config, world: World) -> None:
        defaults = dict(lr=config.matrix_lr, momentum=config.muon_momentum, decay=config.muon_decay)
        super().__init__(params, defaults)
        self.steps = config.muon_steps
        self.world = world

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            self.step_group(group)

    def step_group(self, group: dict) -> None:
        params: list[nn.Parameter] = group["params"]
        flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
        offset = 0
        for index, p in enumerate(params):
            if index % self.world.size == self.world.rank and p.grad is not None:
                flat[offset : offset + p.numel()] = self.direction(p, group["momentum"]).reshape(-1)
            offset += p.numel()
        self.world.sum(flat)
        offset = 0
        for p in params:
            update = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
            p.mul_(1.0 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"])
            offset += p.numel()

    def direction(self, p: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[p]
        if "buffer" not in state:
            state["buffer"] = torch.zeros_like(p.grad)
        buffer = state["buffer"]
        buffer.mul_(momentum).add_(p.grad)
        update = orthogonalise(p.grad.add(buffer, alpha=momentum), self.steps)
        return update * max(1.0, p.size(0) / p.size(1)) ** 0.5


@dataclass
class Optimisers:
    muon: Muon
    adam: torch.optim.Adam
    initial: list[float] = field(default_factory=list)

    @property
    def all(self) -> list[torch.optim.Optimizer]:
        return [self.muon, self.adam]

    def scale(self, factor: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    def momentum(self, value: float) -> None:
        for group in self.muon.param_groups:
            group["momentum"] = value

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def build_optimisers(model: Transformer, config: Config, world: World) -> Optimisers:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 2]
    chosen = {id(p) for p in matrices} | {id(model.embedding.weight)}
    scalars = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        dict(params=[model.embedding.weight], lr=config.embed_lr),
        dict(params=scalars, lr=config.scalar_lr),
    ]
    adam = torch.optim.Adam(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
    result = Optimisers(Muon(matrices, config, world), adam)
    for optimizer in result.all:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return result


def lr_factor(config: Config, step: int, elapsed_s: float) -> float:
    """Constant, then linear to zero; the warm-down ends when the time does."""
    step_s = elapsed_s / max(step, 1)
    warmdown_s = config.warmdown_iters * step_s
    left_s = max(config.max_seconds - elapsed_s, 0.0)
    if step == 0 or left_s >= warmdown_s:
        return 1.0
    return left_s / max(warmdown_s, 1e-9)


def momentum_at(config: Config, step: int) -> float:
    share = min(step / max(config.muon_momentum_steps, 1), 1.0)
    return (1.0 - share) * config.muon_momentum_start + share * config.muon_momentum


# --------------------------------------------------------------------------------------------------------------------
# Averaging
# --------------------------------------------------------------------------------------------------------------------


class Average:
    """Exponential moving average of all weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.weights[name].lerp_(p.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.weights[name].to(p.dtype))


# --------------------------------------------------------------------------------------------------------------------
# Plain validation, for the log during training
# --------------------------------------------------------------------------------------------------------------------


def validation_spans(config: Config, world: World, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """This rank's sequences of the validation split, in batches."""
    sequences = (tokens.size - 1) // config.seq_len
    first = sequences * world.rank // world.size
    last = sequences * (world.rank + 1) // world.size
    step = max(1, config.val_batch_tokens // config.seq_len // world.size)
    for start in range(first, last, step):
        stop = min(start + step, last)
        yield tokens[start * config.seq_len : stop * config.seq_len + 1]


@torch.no_grad()
def quick_validation(
    model: nn.Module, config: Config, world: World, tokens: np.ndarray, table: ByteTable
) -> tuple[float, float]:
    """Loss and bits per byte of unconnected sequences. Logged only, nothing depends on it."""
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    model.eval()
    for span in validation_spans(config, world, tokens):
        x, y = to_pair(span, config.seq_len, world.device)
        loss = model(x, y).to(torch.float64)
        totals[0] += loss * y.numel()
        totals[1] += y.numel()
        totals[2] += table.count(x.reshape(-1), y.reshape(-1)).sum()
    model.train()
    nats, count, size = world.sum(totals).tolist()
    return nats / count, nats / math.log(2.0) / size


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of training; it stands still while the log's validation runs."""

    def __init__(self) -> None:
        self.total = 0.0
        self.began: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def pause(self) -> None:
        torch.cuda.synchronize()
        self.total = self.now()
        self.began = None

    def now(self) -> float:
        return self.total + (time.perf_counter() - self.began if self.began is not None else 0.0)


def average_gradients(model: nn.Module, world: World) -> None:
    if world.size == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    offset = 0
    for grad in grads:
        grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
        offset += grad.numel()


def backward_step(compiled: nn.Module, model: nn.Module, loader: TrainLoader, config: Config, world: World) -> Tensor:
    """Gradients of one whole batch; returns its mean loss."""
    total = torch.zeros((), device=world.device)
    for _ in range(world.grad_accum):
        x, y = loader.batch(config.batch_tokens // world.grad_accum, config.seq_len)
        loss = compiled(x, y) / world.grad_accum
        loss.backward()
        total += loss.detach()
    average_gradients(model, world)
    return total


def warm_up(
    compiled: nn.Module, model: Transformer, optimisers: Optimisers, loader: TrainLoader, config: Config, world: World
) -> None:
    """Compiles everything on training batches, then puts weights, optimisers and loader back."""
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimisers.all]
    for _ in range(config.warmup_steps):
        backward_step(compiled, model, loader, config, world)
        optimisers.step()
    model.load_state_dict(weights)
    for optimizer, state in zip(optimisers.all, states, strict=True):
        optimizer.load_state_dict(state)
    loader.rewind()


def out_of_time(clock: Clock, config: Config, world: World) -> bool:
    """Whether any rank has used its time up."""
    flag = torch.tensor(float(clock.now() >= config.max_seconds), device=world.device)
    if world.size > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def log_validation(
    step: int, compiled: nn.Module, config: Config, world: World, tokens: np.ndarray, table: ByteTable, clock: Clock
) -> None:
    clock.pause()
    loss, bpb = quick_validation(compiled, config, world, tokens, table)
    log.info("step:%d val_loss:%.4f val_bpb:%.4f train_time:%.0fms", step, loss, bpb, 1000 * clock.total)
    clock.start()


def train(
    model: Transformer, config: Config, world: World, tokens: np.ndarray, table: ByteTable, loader: TrainLoader
) -> Clock:
    """Trains within the time and leaves the average in the model. tokens: of validation, for the log."""
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    optimisers = build_optimisers(model, config, world)
    warm_up(compiled, model, optimisers, loader, config, world)
    average = Average(model, config.ema_decay)
    clock = Clock()
    clock.start()
    for step in range(config.iterations):
        if config.val_every and step and step % config.val_every == 0:
            log_validation(step, compiled, config, world, tokens, table, clock)
        optimisers.scale(lr_factor(config, step, clock.now()))
        optimisers.momentum(momentum_at(config, step))
        loss = backward_step(compiled, model, loader, config, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimisers.step()
        if step >= config.ema_start:
            average.update(model)
        else:
            average.weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        if step % config.log_every == 0:
            log.info("step:%d train_loss:%.4f train_time:%.0fms", step, loss.item(), 1000 * clock.now())
        if out_of_time(clock, config, world):
            log.info("stopping: step:%d train_time:%.0fms", step + 1, 1000 * clock.now())
            break
    average.apply(model)
    return clock


# --------------------------------------------------------------------------------------------------------------------
# Quantisation
# --------------------------------------------------------------------------------------------------------------------


def linears(model: nn.Module) -> dict[str, CastedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CastedLinear)}


class HessianCollector:
    """Sums x^T x of the inputs of all linear layers while it is open."""

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows = 0
        self.handles = [layer.register_forward_pre_hook(self.hook(name)) for name, layer in linears(model).items()]

    def hook(self, name: str):
        def collect(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            gram = x.T @ x
            self.sums[name] = self.sums[name] + gram if name in self.sums else gram

        return collect

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def collect_hessians(model: Transformer, loader: TrainLoader, config: Config, world: World) -> dict[str, Tensor]:
    """Hessians over some batches of the training stream, summed over the ranks."""
    collector = HessianCollector(model)
    tokens = config.calib_seqs * config.seq_len * world.size
    for _ in range(config.calib_batches):
        x, _ = loader.batch(tokens, config.seq_len)
        model.hidden(x)
    collector.close()
    return {name: world.sum(total) for name, total in collector.sums.items()}


def row_scales(weight: Tensor, top: int) -> Tensor:
    """Per row the step with the least squared error among some clippings."""
    peak = weight.abs().amax(dim=1).clamp_min(1e-8)
    best = peak / top
    error = torch.full_like(peak, float("inf"))
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        scale = peak * share / top
        rounded = (weight / scale[:, None]).round().clamp(-top, top) * scale[:, None]
        squared = (weight - rounded).square().sum(dim=1)
        better = squared < error
        best = torch.where(better, scale, best)
        error = torch.where(better, squared, error)
    return best.half().float().clamp_min(1e-7)


def round_to_nearest(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    scale = row_scales(weight, top)
    return (weight / scale[:, None]).round().clamp(-top, top).to(torch.int8), scale


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian."""
    hessian = hessian.clone()
    diagonal = torch.diagonal(hessian)
    diagonal[diagonal == 0] = 1.0
    diagonal.add_(damp * diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def gptq(weight: Tensor, hessian: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Quantises column by column; each column's error is spread over the columns to come."""
    top = 2 ** (config.bits - 1) - 1
    work = weight.clone().float()
    scale = row_scales(work, top)
    factor = inverse_factor(hessian, config.gptq_damp)
    codes = torch.zeros_like(work)
    columns = work.size(1)
    for start in range(0, columns, config.gptq_block):
        stop = min(start + config.gptq_block, columns)
        errors = torch.zeros(work.size(0), stop - start, device=work.device)
        for column in range(start, stop):
            code = (work[:, column] / scale).round().clamp(-top, top)
            codes[:, column] = code
            error = (work[:, column] - code * scale) / factor[column, column]
            work[:, column:stop] -= error[:, None] * factor[column, column:stop][None]
            errors[:, column - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes.to(torch.int8), scale


@torch.no_grad()
def quantise(model: Transformer, hessians: dict[str, Tensor], config: Config) -> dict[str, dict[str, Tensor]]:
    """Linear layers by GPTQ, the embedding by rounding, small tensors in half precision."""
    packed: dict[str, dict[str, Tensor]] = {}
    layers = {name + ".weight": name for name in linears(model)}
    for name, tensor in model.state_dict().items():
        if name in layers:
            codes, scale = gptq(tensor, hessians[layers[name]], config)
        elif name == "embedding.weight":
            codes, scale = round_to_nearest(tensor.float(), config.embed_bits)
        else:
            packed[name] = {"raw": tensor.half().cpu()}
            continue
        packed[name] = {"codes": codes.cpu(), "scale": scale.half().cpu()}
    return packed


def write_artifact(packed: dict[str, dict[str, Tensor]], config: Config) -> int:
    """Writes the compressed weights; returns their bytes."""
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    blob = lzma.compress(buffer.getvalue(), preset=6)
    Path(config.artifact).write_bytes(blob)
    return len(blob)


def report_size(model_bytes: int) -> None:
    code_bytes = len(Path(__file__).read_bytes())
    total = model_bytes + code_bytes
    log.info("Serialized model lzma: %d bytes", model_bytes)
    log.info("Code size: %d bytes", code_bytes)
    log.info("Total submission size: %d bytes", total)
    if total > SIZE_LIMIT:
        raise RuntimeError(f"{total} bytes are more than {SIZE_LIMIT}")


def read_artifact(config: Config, device: torch.device) -> Transformer:
    """The model as the artifact holds it."""
    raw = lzma.decompress(Path(config.artifact).read_bytes())
    packed = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = {}
    for name, parts in packed.items():
        if "raw" in parts:
            state[name] = parts["raw"].float()
        else:
            state[name] = parts["codes"].float() * parts["scale"].float()[:, None]
    model = Transformer(config)
    model.load_state_dict(state)
    return model.to(device).eval()


def make_artifact(model: Transformer, loader: TrainLoader, config: Config, world: World, clock: Clock) -> None:
    """Calibrates, quantises and writes, on the clock of the training."""
    hessians = collect_hessians(model, loader, config, world)
    if world.main:
        report_size(write_artifact(quantise(model, hessians, config), config))
    world.barrier()
    clock.pause()
    log.info("training, calibration and packing: %.1fs", clock.total)
    if clock.total > TRAIN_LIMIT_S:
        raise RuntimeError("the artifact was finished too late")


# --------------------------------------------------------------------------------------------------------------------
# n-gram tables
# --------------------------------------------------------------------------------------------------------------------


HASH_SEED = np.uint64(0x9E3779B97F4A7C15)
HASH_PRIME = np.uint64(0xD6E8FEB86659FD93)
HASH_SHIFT = np.uint64(32)


def hash_contexts(tokens: np.ndarray, last: np.ndarray, length: int) -> np.ndarray:
    """Hashes of the `length` tokens that end at `last`, as uint64. Before the first token stands a zero."""
    value = np.full(last.shape, HASH_SEED, dtype=np.uint64)
    for lag in range(length):
        index = last - lag
        token = np.where(index >= 0, tokens[np.maximum(index, 0)].astype(np.uint64) + np.uint64(1), np.uint64(0))
        value = (value ^ token) * HASH_PRIME
        value ^= value >> HASH_SHIFT
    return value


class CountTable:
    """Counts of one order: a row over the whole vocabulary for each slot of hashed contexts."""

    def __init__(self, order: int, vocab_size: int, slot_bits: int) -> None:
        self.order = order
        self.mask = np.uint64((1 << slot_bits) - 1)
        self.counts = np.zeros((1 << slot_bits, vocab_size), dtype=np.float32)

    def slots(self, tokens: np.ndarray, last: np.ndarray) -> np.ndarray:
        return (hash_contexts(tokens, last, self.order - 1) & self.mask).astype(np.int64)

    def rows(self, tokens: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Counts of all successors of the contexts that end at `last`."""
        return self.counts[self.slots(tokens, last)]

    def add(self, tokens: np.ndarray, last: np.ndarray) -> None:
        """Counts the tokens that follow `last`."""
        successors = tokens[last + 1].astype(np.int64)
        flat = self.slots(tokens, last) * self.counts.shape[1] + successors
        np.add.at(self.counts.reshape(-1), flat, np.float32(1.0))


class BackoffMixer:
    """Interpolated back-off over the count tables, from the lowest order to the highest."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.vocab_size = config.vocab_size
        self.mass = config.backoff_mass
        self.experts = config.experts
        self.device = device
        self.tables = [CountTable(order, config.vocab_size, config.slot_bits) for order in config.orders]

    def distributions(self, tokens: np.ndarray, last: np.ndarray) -> Tensor:
        """(experts, positions, vocabulary): what each expert says of the token after `last`."""
        current = torch.full((last.size, self.vocab_size), 1.0 / self.vocab_size, device=self.device)
        kept: list[Tensor] = []
        for table in self.tables:
            counts = torch.from_numpy(table.rows(tokens, last)).to(self.device, non_blocking=True)
            current = self.interpolate(counts, current)
            if table.order in self.experts:
                kept.append(current)
        return torch.stack(kept)

    def interpolate(self, counts: Tensor, lower: Tensor) -> Tensor:
        """Counts with `mass` pseudo-counts spread like the lower order, normalised over the vocabulary."""
        mixed = counts + self.mass * lower
        return mixed / mixed.sum(dim=-1, keepdim=True)

    def learn(self, tokens: np.ndarray, first: int, stop: int) -> None:
        """Takes in targets first+1 .. stop, all of which have been scored."""
        last = np.arange(first, stop, dtype=np.int64)
        for table in self.tables:
            table.add(tokens, last)


# --------------------------------------------------------------------------------------------------------------------
# Gate and expert weights
# --------------------------------------------------------------------------------------------------------------------


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropy in nats of each row."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)


class EntropyGate:
    """The share given to the experts: the less sure the model is, the larger."""

    def __init__(self, config: Config) -> None:
        self.centre = config.gate_centre
        self.slope = config.gate_slope
        self.top = config.gate_max
        self.bins = config.entropy_bins
        self.width = math.log(config.vocab_size) / config.entropy_bins

    def share(self, entropy: Tensor) -> Tensor:
        return self.top * torch.sigmoid(self.slope * (entropy - self.centre))

    def bin(self, entropy: Tensor) -> Tensor:
        return (entropy / self.width).long().clamp(0, self.bins - 1)


class Hedge:
    """Weights of the experts, one set per entropy bin, multiplied down by the losses of the past."""

    def __init__(self, config: Config, device: torch.device) -> None:
        count = 1 + len(config.experts)
        self.rate = config.hedge_rate
        self.floor = config.hedge_floor
        prior = torch.full((count,), (1.0 - config.hedge_prior) / (count - 1), dtype=torch.float64, device=device)
        prior[0] = config.hedge_prior
        self.weights = prior.repeat(config.entropy_bins, 1)

    def update(self, losses: Tensor, counts: Tensor) -> None:
        """losses: (bins, experts), summed over the chunk just scored; counts: (bins, 1)."""
        mean = losses / counts.clamp_min(1.0)
        scaled = self.weights * torch.exp(-self.rate * (mean - mean.amin(dim=1, keepdim=True)))
        scaled = scaled / scaled.sum(dim=1, keepdim=True)
        self.weights = (1.0 - self.floor) * scaled + self.floor / scaled.size(1)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Inputs begin at `start`; the targets after first .. stop - 1 are scored here, and nowhere else."""

    start: int
    first: int
    stop: int


def chunk_windows(first: int, stop: int, config: Config) -> list[Window]:
    """Windows that score the positions of a chunk, each position once."""
    windows: list[Window] = []
    for position in range(first, stop, config.stride):
        end = min(position + config.stride, stop)
        windows.append(Window(max(0, end - config.seq_len), position, end))
    return windows


def window_inputs(windows: list[Window], tokens: np.ndarray, config: Config, device: torch.device) -> Tensor:
    """Inputs of some windows, filled up on the right, where a causal model does not look."""
    block = np.zeros((config.eval_batch, config.seq_len), dtype=np.int64)
    for row, window in enumerate(windows):
        block[row, : window.stop - window.start] = tokens[window.start : window.stop]
    return torch.from_numpy(block).to(device, non_blocking=True)


def scored_positions(windows: list[Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, position in the split) of all that the windows score."""
    rows = [np.full(w.stop - w.first, row, dtype=np.int64) for row, w in enumerate(windows)]
    columns = [np.arange(w.first - w.start, w.stop - w.start, dtype=np.int64) for w in windows]
    positions = [np.arange(w.first, w.stop, dtype=np.int64) for w in windows]
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(positions)


@dataclass
class Totals:
    """Sums over the scored tokens of this rank, in float64."""

    mixed: Tensor
    model: Tensor
    tokens: Tensor
    bytes: Tensor

    @staticmethod
    def zero(device: torch.device) -> Totals:
        return Totals(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(4)))

    def add(self, mixed: Tensor, model: Tensor, sizes: Tensor) -> None:
        self.mixed += mixed.sum()
        self.model += model.sum()
        self.tokens += mixed.numel()
        self.bytes += sizes.sum()

    def gathered(self, world: World) -> tuple[float, float, float, float]:
        joint = world.sum(torch.stack((self.mixed, self.model, self.tokens, self.bytes)))
        mixed, model, tokens, size = joint.tolist()
        return mixed, model, tokens, size


@dataclass
class ChunkLosses:
    """Losses of each expert by entropy bin, over one chunk."""

    losses: Tensor
    counts: Tensor

    @staticmethod
    def zero(config: Config, device: torch.device) -> ChunkLosses:
        shape = (config.entropy_bins, 1 + len(config.experts))
        losses = torch.zeros(shape, dtype=torch.float64, device=device)
        counts = torch.zeros((config.entropy_bins, 1), dtype=torch.float64, device=device)
        return ChunkLosses(losses, counts)

    def add(self, bins: Tensor, losses: Tensor) -> None:
        """losses: (experts, positions)."""
        self.losses.index_add_(0, bins, losses.T.contiguous())
        self.counts.index_add_(0, bins, torch.ones(bins.numel(), 1, dtype=torch.float64, device=bins.device))


def mixture(model_probs: Tensor, expert_probs: Tensor, share: Tensor, weights: Tensor) -> Tensor:
    """(positions, vocabulary): the model, and beside it the weighted experts, of which the model is the first.

    expert_probs: (experts, positions, vocabulary); weights: (positions, experts), each row sums to one.
    """
    joint = torch.einsum("pe,epv->pv", weights, expert_probs)
    return (1.0 - share)[:, None] * model_probs + share[:, None] * joint


def at_targets(probs: Tensor, targets: Tensor) -> Tensor:
    """-log of the targets' probabilities; probs: (..., positions, vocabulary)."""
    index = targets.expand(probs.shape[:-1])[..., None]
    return -probs.gather(-1, index)[..., 0].clamp_min(1e-30).log()


class MixtureEvaluator:
    """Scores the validation split from left to right, chunk after chunk."""

    def __init__(self, model: Transformer, config: Config, world: World, tokens: np.ndarray, table: ByteTable) -> None:
        self.model = model
        self.config = config
        self.world = world
        self.tokens = tokens
        self.table = table
        self.hidden = torch.compile(model.hidden, dynamic=False)
        self.mixer = BackoffMixer(config, world.device)
        self.gate = EntropyGate(config)
        self.hedge = Hedge(config, world.device)
        self.totals = Totals.zero(world.device)

    def log_probs(self, windows: list[Window], rows: Tensor, columns: Tensor) -> Tensor:
        """The model's log-probabilities at the scored positions, over the vocabulary."""
        hidden = self.hidden(window_inputs(windows, self.tokens, self.config, self.world.device))
        return F.log_softmax(self.model.head(hidden[rows, columns]), dim=-1).double()

    def score(self, windows: list[Window], chunk: ChunkLosses) -> None:
        """Scores the windows' targets with tables and weights as they stood before the chunk."""
        device = self.world.device
        rows, columns, last = scored_positions(windows)
        log_probs = self.log_probs(windows, torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device))
        entropy = entropy_of(log_probs)
        bins = self.gate.bin(entropy)
        model_probs = log_probs.exp()
        ngrams = self.mixer.distributions(self.tokens, last).double()
        experts = torch.cat((model_probs[None], ngrams))
        mixed = mixture(model_probs, experts, self.gate.share(entropy), self.hedge.weights[bins])

        previous = torch.from_numpy(self.tokens[last].astype(np.int64)).to(device)
        targets = torch.from_numpy(self.tokens[last + 1].astype(np.int64)).to(device)
        expert_losses = at_targets(experts, targets)
        self.totals.add(at_targets(mixed, targets), expert_losses[0], self.table.count(previous, targets))
        chunk.add(bins, expert_losses)

    def score_chunk(self, first: int, stop: int) -> ChunkLosses:
        """Scores this rank's share of a chunk; returns the experts' losses over all ranks."""
        chunk = ChunkLosses.zero(self.config, self.world.device)
        windows = chunk_windows(first, stop, self.config)[self.world.rank :: self.world.size]
        for start in range(0, len(windows), self.config.eval_batch):
            self.score(windows[start : start + self.config.eval_batch], chunk)
        self.world.sum(chunk.losses)
        self.world.sum(chunk.counts)
        return chunk

    def learn_chunk(self, first: int, stop: int, chunk: ChunkLosses) -> None:
        """Takes a chunk in that all ranks have scored."""
        self.hedge.update(chunk.losses, chunk.counts)
        self.mixer.learn(self.tokens, first, stop)

    @torch.no_grad()
    def run(self) -> None:
        count = self.tokens.size - 1
        began = time.perf_counter()
        for first in range(0, count, self.config.chunk_tokens):
            stop = min(first + self.config.chunk_tokens, count)
            chunk = self.score_chunk(first, stop)
            self.learn_chunk(first, stop, chunk)
            if (first // self.config.chunk_tokens) % 20 == 0:
                log.info("eval: %d of %d tokens, %.1fs", stop, count, time.perf_counter() - began)


def check_count(tokens: float, expected: int) -> None:
    if int(tokens) != expected:
        raise RuntimeError(f"{int(tokens)} tokens were scored, the split has {expected}")


def log_weights(hedge: Hedge) -> None:
    for index, row in enumerate(hedge.weights.tolist()):
        log.info("hedge bin:%d %s", index, " ".join(f"{weight:.3f}" for weight in row))


def evaluate(config: Config, world: World, tokens: np.ndarray, table: ByteTable) -> float:
    """Bits per byte of the artifact's model together with the mixer."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    model = read_artifact(config, world.device)
    evaluator = MixtureEvaluator(model, config, world, tokens, table)
    evaluator.run()
    mixed, alone, count, size = evaluator.totals.gathered(world)
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - began
    check_count(count, tokens.size - 1)
    log_weights(evaluator.hedge)
    bpb = mixed / math.log(2.0) / size
    log.info("model_alone val_loss:%.8f val_bpb:%.8f", alone / count, alone / math.log(2.0) / size)
    log.info("eval_time:%.0fms tokens:%d bytes:%d", 1000 * elapsed, int(count), int(size))
    if elapsed > EVAL_LIMIT_S:
        raise RuntimeError("the evaluation took too long")
    log.info("final_mixture_exact val_loss:%.8f val_bpb:%.8f", mixed / count, bpb)
    return bpb


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


def log_setup(config: Config, world: World, model: nn.Module, tokens: np.ndarray) -> None:
    log.info("Python %s, PyTorch %s, numpy %s", sys.version.split()[0], torch.__version__, np.__version__)
    log.info("config: %s", dataclasses.asdict(config))
    log.info("world_size:%d grad_accum:%d", world.size, world.grad_accum)
    log.info("train shards: %d", len(find_shards(config.train_files)))
    log.info("validation tokens: %d", tokens.size - 1)
    log.info("parameters: %d", sum(p.numel() for p in model.parameters()))


def main() -> None:
    config = parse_config()
    world = join_world()
    setup_logging(config, world)
    seed_everything(config.seed)
    setup_backends()
    table = build_byte_table(config, world.device)
    tokens = load_validation(config)
    model = Transformer(config).to(world.device)
    log_setup(config, world, model, tokens)
    loader = TrainLoader(config.train_files, world)
    clock = train(model, config, world, tokens, table, loader)
    make_artifact(model, loader, config, world, clock)
    del model, loader
    torch.cuda.empty_cache()
    evaluate(config, world, tokens, table)
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
