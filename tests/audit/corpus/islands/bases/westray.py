"""
Parameter golf record script: 10 layers, int5 MLP / int6 attention, BigramHash(10240), SWA over the last 40 %, two heads.

Run it from this folder with

    torchrun --standalone --nproc_per_node=8 train_gpt.py

The trunk and the first head are the average of the checkpoints of the last 40 % of training, the second head is the one
of the very last step. At evaluation both heads read the same trunk and their capped logits are mixed with a fixed weight.
Everything that reads training data (training, activation samples for the clip search, the temperature) happens before
MAX_WALLCLOCK_SECONDS is over; the artifact is complete when the evaluation starts.

In order:
  1. training on all train shards but the last, Muon with weight decay for matrices, AdamW for the rest;
  2. the sum of a checkpoint every SWA_EVERY steps once 60 % of the budget is used;
  3. inputs of all layers from train batches, the clip search of weights and inputs, int5 / int6 / int8 rows;
  4. the temperature, on the train shard that was held out;
  5. bit planes, zstd-22, the file, a check of its round trip;
  6. a fresh model from that file, sliding windows over the whole validation split, each target once.
"""

import glob
import io
import json
import math
import os
import random
import subprocess
import sys
import time
import uuid
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# SETTINGS
# -----------------------------
# All of them can be overridden from the environment; the defaults are the record's.

# data
DATA_PATH = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
TRAIN_FILES = os.path.join(DATA_PATH, "fineweb_train_*.bin")
VAL_FILES = os.path.join(DATA_PATH, "fineweb_val_*.bin")
TOKENIZER_PATH = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
HELDOUT_SHARDS = int(os.environ.get("HELDOUT_SHARDS", 1))  # the last train shards, never trained on
RUN_ID = os.environ.get("RUN_ID", str(uuid.uuid4()))
SEED = int(os.environ.get("SEED", 42))

# lengths and batches
SEQ_LEN = int(os.environ.get("SEQ_LEN", 2048))
TRAIN_BATCH_TOKENS = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
ITERATIONS = int(os.environ.get("ITERATIONS", 20_000))
WARMUP_ITERS = int(os.environ.get("WARMUP_ITERS", 20))
WARMDOWN_ITERS = int(os.environ.get("WARMDOWN_ITERS", 3_000))
VAL_EVERY = int(os.environ.get("VAL_EVERY", 4_000))
LOG_EVERY = int(os.environ.get("LOG_EVERY", 200))

# clocks
MAX_WALLCLOCK_SECONDS = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
RESERVE_SECONDS = float(os.environ.get("RESERVE_SECONDS", 48.0))  # clip search, temperature, zstd-22, writing
EVAL_SECONDS = float(os.environ.get("EVAL_SECONDS", 600.0))

# model
VOCAB_SIZE = int(os.environ.get("VOCAB_SIZE", 1024))
NUM_LAYERS = int(os.environ.get("NUM_LAYERS", 10))
MODEL_DIM = int(os.environ.get("MODEL_DIM", 512))
NUM_HEADS = int(os.environ.get("NUM_HEADS", 8))
NUM_KV_HEADS = int(os.environ.get("NUM_KV_HEADS", 4))
MLP_HIDDEN = int(os.environ.get("MLP_HIDDEN", 1536))
BIGRAM_BUCKETS = int(os.environ.get("BIGRAM_BUCKETS", 10_240))
BIGRAM_DIM = int(os.environ.get("BIGRAM_DIM", 128))
ROPE_BASE = float(os.environ.get("ROPE_BASE", 10_000.0))
SOFTCAP = float(os.environ.get("SOFTCAP", 30.0))
QK_GAIN_INIT = float(os.environ.get("QK_GAIN_INIT", 1.5))
BOS_ID = int(os.environ.get("BOS_ID", 1))

# optimisers
MATRIX_LR = float(os.environ.get("MATRIX_LR", 0.02))
EMBED_LR = float(os.environ.get("EMBED_LR", 0.03))
HEAD_LR = float(os.environ.get("HEAD_LR", 0.008))
SCALAR_LR = float(os.environ.get("SCALAR_LR", 0.02))
MUON_WD = float(os.environ.get("MUON_WD", 0.04))
ADAM_WD = float(os.environ.get("ADAM_WD", 0.01))
MUON_MOMENTUM = float(os.environ.get("MUON_MOMENTUM", 0.99))
MUON_MOMENTUM_START = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
MUON_MOMENTUM_STEPS = int(os.environ.get("MUON_MOMENTUM_STEPS", 1_500))
MUON_STEPS = int(os.environ.get("MUON_STEPS", 5))
BETA1 = float(os.environ.get("BETA1", 0.9))
BETA2 = float(os.environ.get("BETA2", 0.95))
ADAM_EPS = float(os.environ.get("ADAM_EPS", 1e-8))
GRAD_CLIP = float(os.environ.get("GRAD_CLIP", 0.3))

# averaging
SWA_FRACTION = float(os.environ.get("SWA_FRACTION", 0.4))
SWA_EVERY = int(os.environ.get("SWA_EVERY", 50))

# quantisation
MLP_BITS = int(os.environ.get("MLP_BITS", 5))
ATTN_BITS = int(os.environ.get("ATTN_BITS", 6))
TABLE_BITS = int(os.environ.get("TABLE_BITS", 6))
EMBED_BITS = int(os.environ.get("EMBED_BITS", 8))
PRUNE_FRACTION = float(os.environ.get("PRUNE_FRACTION", 0.03))
CLIP_BATCHES = int(os.environ.get("CLIP_BATCHES", 8))
CLIP_ROWS = int(os.environ.get("CLIP_ROWS", 2_048))
CLIP_GRID = [float(c) for c in os.environ.get("CLIP_GRID", "1.0,0.97,0.94,0.9,0.86,0.82,0.78,0.72,0.66").split(",")]
ACT_CLIP_GRID = [float(c) for c in os.environ.get("ACT_CLIP_GRID", "0,12,8,5").split(",")]  # 0: no clip
ZSTD_LEVEL = int(os.environ.get("ZSTD_LEVEL", 22))
SIZE_LIMIT = 16_000_000
ARTIFACT = os.environ.get("ARTIFACT", "final_model.int56.zst")

# evaluation
EVAL_STRIDE = int(os.environ.get("EVAL_STRIDE", 64))
EVAL_BATCH = int(os.environ.get("EVAL_BATCH", 32))
HEAD_MIX = float(os.environ.get("HEAD_MIX", 0.7))  # weight of the averaged head; the last step's head has the rest
TEMPERATURES = [0.90 + 0.01 * i for i in range(21)]
TEMPERATURE_TOKENS = int(os.environ.get("TEMPERATURE_TOKENS", 2_097_152))

SCALAR_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear_gate", "bigram_scale")

# -----------------------------
# PROCESS GROUP AND LOG
# -----------------------------

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
DISTRIBUTED = "RANK" in os.environ and "WORLD_SIZE" in os.environ
MASTER = RANK == 0
DEVICE = torch.device("cuda", LOCAL_RANK)
LOG_FILE = f"logs/{RUN_ID}.txt"


def say(message: str, console: bool = True) -> None:
    """Writes a line to the log of the run, from rank 0 only."""
    if not MASTER:
        return
    if console:
        print(message, flush=True)
    with open(LOG_FILE, "a", encoding="utf-8") as f:
        print(message, file=f)


def start_processes() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("this script needs CUDA")
    if 8 % WORLD:
        raise ValueError(f"WORLD_SIZE={WORLD} must divide 8")
    torch.cuda.set_device(DEVICE)
    if DISTRIBUTED:
        dist.init_process_group(backend="nccl", device_id=DEVICE)
        dist.barrier()
    if MASTER:
        os.makedirs("logs", exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    from torch.backends.cuda import enable_cudnn_sdp, enable_flash_sdp, enable_math_sdp, enable_mem_efficient_sdp

    enable_cudnn_sdp(False)
    enable_flash_sdp(True)
    enable_mem_efficient_sdp(False)
    enable_math_sdp(False)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def wait_for_all() -> None:
    torch.cuda.synchronize()
    if DISTRIBUTED:
        dist.barrier()


def sum_over_ranks(t: Tensor) -> Tensor:
    if DISTRIBUTED:
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return t


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one: all of them must leave the training loop at the same step."""
    if not DISTRIBUTED:
        return flag
    t = torch.tensor(int(flag), device=DEVICE)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return bool(t.item())


# -----------------------------
# TOKEN SHARDS
# -----------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256


def read_shard(path: str) -> Tensor:
    """The tokens of one .bin shard: 256 little-endian int32 of header, then uint16 tokens."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"{path} is not a token shard")
    count = int(header[2])
    expected = SHARD_HEADER_INTS * 4 + count * 2
    if os.path.getsize(path) != expected:
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes, expected {expected}")
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER_INTS * 4)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return files


def split_train_shards() -> tuple[list[str], list[str]]:
    """Train shards for training, and the last HELDOUT_SHARDS of them, which only the temperature sees."""
    files = list_shards(TRAIN_FILES)
    if HELDOUT_SHARDS <= 0 or len(files) <= HELDOUT_SHARDS:
        return files, files[-1:]
    return files[:-HELDOUT_SHARDS], files[-HELDOUT_SHARDS:]


def load_val_tokens() -> Tensor:
    """The whole validation split, in its order."""
    tokens = torch.cat([read_shard(f) for f in list_shards(VAL_FILES)]).contiguous()
    if tokens.numel() <= SEQ_LEN:
        raise ValueError(f"the validation split is too short for SEQ_LEN={SEQ_LEN}")
    return tokens


def token_stream(files: list[str]):
    """A generator that is sent a number of tokens and yields so many, shard after shard, around and around."""
    shard, pos, which = read_shard(files[0]), 0, 0
    want = yield None
    while True:
        parts = []
        while want > 0:
            if pos >= shard.numel():
                which = (which + 1) % len(files)
                shard, pos = read_shard(files[which]), 0
            piece = shard[pos : pos + want]
            parts.append(piece)
            pos += piece.numel()
            want -= piece.numel()
        want = yield (parts[0] if len(parts) == 1 else torch.cat(parts))


def train_batches(files: list[str], seq_len: int, batch_tokens: int, accum: int):
    """Endless (x, y) micro batches of this rank. Every rank reads the same stream and takes its own span of it."""
    stream = token_stream(files)
    next(stream)
    local = batch_tokens // (WORLD * accum)
    if local % seq_len:
        raise ValueError(f"batch of {local} tokens a rank is not a multiple of {seq_len}")
    span = local + 1
    while True:
        chunk = stream.send(span * WORLD)
        mine = chunk[RANK * span : (RANK + 1) * span].to(torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        yield x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)


def common_batches(files: list[str], seq_len: int, rows: int, count: int):
    """`count` batches that are the same on every rank, evenly spread over the first of the files."""
    tokens = read_shard(files[0])
    step = (tokens.numel() - rows * seq_len - 1) // max(count, 1)
    for i in range(count):
        part = tokens[i * step : i * step + rows * seq_len + 1].to(torch.int64)
        yield part[:-1].reshape(rows, seq_len).to(DEVICE), part[1:].reshape(rows, seq_len).to(DEVICE)


# -----------------------------
# BYTES OF TOKENS
# -----------------------------
# val_bpb counts the UTF-8 bytes of the original text. A piece that starts with the sentencepiece mark stands for a space
# and the rest; the space is a byte of the text unless the token before it is a control token (no text before it).


def byte_tables(sp: spm.SentencePieceProcessor) -> tuple[Tensor, Tensor, Tensor]:
    """By token: bytes without the leading space; whether there is a leading space; whether it is a boundary."""
    size = max(int(sp.vocab_size()), VOCAB_SIZE)
    plain = np.zeros(size, dtype=np.int16)
    space = np.zeros(size, dtype=np.bool_)
    boundary = np.ones(size, dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        if sp.is_byte(i):
            plain[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            space[i] = True
            piece = piece[1:]
        plain[i] = len(piece.encode("utf-8"))
    return (
        torch.tensor(plain, dtype=torch.int16, device=DEVICE),
        torch.tensor(space, dtype=torch.bool, device=DEVICE),
        torch.tensor(boundary, dtype=torch.bool, device=DEVICE),
    )


def count_bytes(tables: tuple[Tensor, Tensor, Tensor], before: Tensor, target: Tensor) -> Tensor:
    """Bytes of each target token, given the token before it."""
    plain, space, boundary = tables
    extra = space[target] & ~boundary[before]
    return plain[target].to(torch.int32) + extra.to(torch.int32)


def check_tokenizer(sp: spm.SentencePieceProcessor) -> None:
    if int(sp.vocab_size()) != VOCAB_SIZE:
        raise ValueError(f"VOCAB_SIZE={VOCAB_SIZE}, the tokenizer has {int(sp.vocab_size())}")
    if sp.bos_id() != BOS_ID:
        raise ValueError(f"BOS_ID={BOS_ID}, the tokenizer has {sp.bos_id()}")


# -----------------------------
# MUON
# -----------------------------


def orthogonalise(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iteration of fifth order: the nearest orthogonal matrix, roughly, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    flip = X.size(0) > X.size(1)
    if flip:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if flip else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with decoupled weight decay. Ranks share the matrices among them."""

    def __init__(self, params, lr: float, momentum: float, steps: int, weight_decay: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % WORLD == RANK and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(g)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(g)
                    g = g.add(buf, alpha=group["momentum"])
                    g = orthogonalise(g, steps=group["steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            sum_over_ranks(flat)
            at = 0
            for p in params:
                g = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(g, alpha=-group["lr"])
                at += p.numel()


# -----------------------------
# MODEL
# -----------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Weights in fp32 for the optimiser, cast to the input's type for the product."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float):
        super().__init__()
        self.register_buffer("inv_freq", base ** (-torch.arange(0, dim, 2).float() / dim), persistent=False)
        self.cached: tuple[int, Tensor, Tensor] | None = None

    def forward(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.cached is None or self.cached[0] != length or self.cached[1].device != self.inv_freq.device:
            angle = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq)
            self.cached = (length, angle.cos()[None, None], angle.sin()[None, None])
        return self.cached[1].to(dtype), self.cached[2].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim = MODEL_DIM // NUM_HEADS
        kv = NUM_KV_HEADS * self.head_dim
        self.q = Linear(MODEL_DIM, MODEL_DIM)
        self.k = Linear(MODEL_DIM, kv)
        self.v = Linear(MODEL_DIM, kv)
        self.o = Linear(MODEL_DIM, MODEL_DIM)
        self.q_gain = nn.Parameter(torch.full((NUM_HEADS,), QK_GAIN_INIT))
        self.rotary = Rotary(self.head_dim, ROPE_BASE)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q = self.q(x).view(B, T, NUM_HEADS, self.head_dim).transpose(1, 2)
        k = self.k(x).view(B, T, NUM_KV_HEADS, self.head_dim).transpose(1, 2)
        v = self.v(x).view(B, T, NUM_KV_HEADS, self.head_dim).transpose(1, 2)
        cos, sin = self.rotary(T, q.dtype)
        q = rotate(rms(q), cos, sin) * self.q_gain.to(q.dtype)[None, :, None, None]
        k = rotate(rms(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=NUM_KV_HEADS != NUM_HEADS)
        return self.o(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Linear(MODEL_DIM, MLP_HIDDEN)
        self.down = Linear(MLP_HIDDEN, MODEL_DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.attn = Attention()
        self.mlp = MLP()
        self.attn_scale = nn.Parameter(torch.ones(MODEL_DIM))
        self.mlp_scale = nn.Parameter(torch.ones(MODEL_DIM))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(MODEL_DIM), torch.zeros(MODEL_DIM))))
        self.damp = 1.0 / math.sqrt(depth + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.damp)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.damp)


class BigramHash(nn.Module):
    """An embedding of the pair (token before, token), hashed into a table; a document's first token has no pair."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(BIGRAM_BUCKETS, BIGRAM_DIM)
        self.proj = Linear(BIGRAM_DIM, MODEL_DIM)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05))

    def bucket(self, ids: Tensor) -> Tensor:
        before = F.pad(ids[:, :-1], (1, 0), value=BOS_ID).to(torch.int32)
        now = ids.to(torch.int32)
        mod = BIGRAM_BUCKETS - 1
        hashed = torch.bitwise_xor(36313 * now, 27191 * before) % mod
        return torch.where(ids == BOS_ID, torch.full_like(hashed, mod), hashed).to(torch.int64)

    def forward(self, ids: Tensor) -> Tensor:
        e = self.table(self.bucket(ids))
        return self.proj(e) * self.bigram_scale.to(e.dtype)


class Smear(nn.Module):
    """Mixes a little of the embedding before into each one, but nothing over the start of a document."""

    def __init__(self):
        super().__init__()
        self.smear_gate = nn.Parameter(torch.full((MODEL_DIM,), -2.0))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.smear_gate).to(x.dtype)
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != BOS_ID)[..., None].to(x.dtype)
        return x + inside * g * (before - x)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, MODEL_DIM)
        self.bigram = BigramHash()
        self.smear = Smear()
        self.blocks = nn.ModuleList(Block(i) for i in range(NUM_LAYERS))
        self.half = NUM_LAYERS // 2
        self.skip_weights = nn.Parameter(torch.ones(self.half, MODEL_DIM))
        self.head = Linear(MODEL_DIM, VOCAB_SIZE)  # trained; in the artifact the averaged one
        self.head_last = Linear(MODEL_DIM, VOCAB_SIZE)  # of the last step; never trained itself
        self.head_last.weight.requires_grad_(False)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.normal_(self.embed.weight, std=0.005)
        nn.init.normal_(self.bigram.table.weight, std=0.02)
        nn.init.zeros_(self.bigram.proj.weight)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head_last.weight)
        for block in self.blocks:
            for lin in (block.attn.q, block.attn.k, block.attn.v, block.mlp.up):
                nn.init.orthogonal_(lin.weight)
            nn.init.zeros_(block.attn.o.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def trunk(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.bigram(ids)
        x = self.smear(rms(x), ids)
        x0 = x
        kept: list[Tensor] = []
        for i in range(self.half):
            x = self.blocks[i](x, x0)
            kept.append(x)
        for i in range(self.half, NUM_LAYERS):
            if kept:
                x = x + self.skip_weights[i - self.half].to(x.dtype) * kept.pop()
            x = self.blocks[i](x, x0)
        return rms(x)

    def cap(self, z: Tensor) -> Tensor:
        return SOFTCAP * torch.tanh(z.float() / SOFTCAP)

    def mixed_logits(self, h: Tensor) -> Tensor:
        """Capped logits of both heads, mixed with the fixed weight: (..., VOCAB_SIZE) in fp32."""
        return HEAD_MIX * self.cap(self.head(h)) + (1.0 - HEAD_MIX) * self.cap(self.head_last(h))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The training loss, by the trained head alone."""
        z = self.cap(self.head(self.trunk(ids)))
        return F.cross_entropy(z.reshape(-1, VOCAB_SIZE), targets.reshape(-1))


def build_model() -> GPT:
    model = GPT().to(DEVICE).bfloat16()
    for m in model.modules():
        if isinstance(m, Linear):
            m.float()
    for name, p in model.named_parameters():
        if p.ndim < 2 or any(s in name for s in SCALAR_NAMES):
            p.data = p.data.float()
    for m in model.modules():
        if isinstance(m, Rotary):
            m.inv_freq.data = m.inv_freq.data.float()
    return model


def build_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.blocks.named_parameters() if p.ndim == 2 and not any(s in n for s in SCALAR_NAMES)]
    matrices.append(model.bigram.proj.weight)
    scalars = [p for n, p in model.named_parameters() if p.ndim < 2 or any(s in n for s in SCALAR_NAMES)]
    tables = [model.embed.weight, model.bigram.table.weight]
    muon = Muon(matrices, lr=MATRIX_LR, momentum=MUON_MOMENTUM, steps=MUON_STEPS, weight_decay=MUON_WD)
    common = dict(betas=(BETA1, BETA2), eps=ADAM_EPS, fused=True)
    adam_tables = torch.optim.AdamW([dict(params=tables, lr=EMBED_LR)], weight_decay=ADAM_WD, **common)
    adam_head = torch.optim.AdamW([dict(params=[model.head.weight], lr=HEAD_LR)], weight_decay=ADAM_WD, **common)
    adam_scalars = torch.optim.AdamW([dict(params=scalars, lr=SCALAR_LR)], weight_decay=0.0, **common)
    optimizers = [muon, adam_tables, adam_head, adam_scalars]
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def lr_scale(step: int, elapsed: float, budget: float) -> float:
    """Linear warm-up by steps, linear warm-down by what is left of the clock (or of the iterations)."""
    up = min((step + 1) / max(WARMUP_ITERS, 1), 1.0)
    if WARMDOWN_ITERS <= 0:
        return up
    if budget <= 0:
        return min(up, max((ITERATIONS - step) / WARMDOWN_ITERS, 0.0))
    per_step = elapsed / max(step, 1)
    warmdown = WARMDOWN_ITERS * per_step
    left = max(budget - elapsed, 0.0)
    return min(up, left / max(warmdown, 1e-9)) if left <= warmdown else up


# -----------------------------
# AVERAGE OF CHECKPOINTS
# -----------------------------


def swa_new(model: GPT) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.state_dict().items()}


@torch.no_grad()
def swa_add(total: dict[str, Tensor], model: GPT) -> None:
    for n, p in model.state_dict().items():
        total[n].add_(p.float())


@torch.no_grad()
def swa_apply(total: dict[str, Tensor], count: int, model: GPT) -> None:
    """Puts the average into the model. The head of the last step goes to head_last first."""
    model.head_last.weight.copy_(model.head.weight)
    if not count:
        return
    state = model.state_dict()
    for n, t in total.items():
        if n != "head_last.weight":
            state[n].copy_((t / count).to(state[n].dtype))


# -----------------------------
# CLIP SEARCH
# -----------------------------
# For each matrix the rows' scales are clip * max|w| / levels, with the clip of CLIP_GRID that gives the least error of the
# layer's output. The inputs of the layer come from train batches: their second moments weigh the columns. A few inputs
# are far out and would rule the moments, so the inputs are clamped first, at the bound of ACT_CLIP_GRID (in standard
# deviations) whose scales do best on rows of inputs that the moments have not seen.


class InputRows:
    """Keeps up to CLIP_ROWS rows of the inputs of every Linear while its hooks are on."""

    def __init__(self, model: GPT):
        self.rows: dict[str, list[Tensor]] = {}
        self.handles = []
        for name, m in model.named_modules():
            if isinstance(m, Linear) and not name.startswith("head_last"):
                self.rows[name] = []
                self.handles.append(m.register_forward_pre_hook(self.hook(name)))

    def hook(self, name: str):
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].size(-1))
            share = max(CLIP_ROWS // max(CLIP_BATCHES, 1), 1)
            step = max(x.size(0) // share, 1)
            self.rows[name].append(x[::step][:share].float())

        return keep

    def close(self) -> dict[str, Tensor]:
        for h in self.handles:
            h.remove()
        return {name: torch.cat(parts) for name, parts in self.rows.items() if parts}


@torch.no_grad()
def collect_inputs(model: GPT, files: list[str]) -> dict[str, Tensor]:
    """Rows of inputs of every Linear, from train batches which are the same on every rank."""
    model.eval()
    keeper = InputRows(model)
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for x, _ in common_batches(files, SEQ_LEN, 4, CLIP_BATCHES):
            model.head(model.trunk(x))
    rows = keeper.close()
    model.train()
    return rows


def levels(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def round_rows(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = levels(bits)
    return torch.clamp(torch.round(w / scale[:, None]), -top - 1, top)


def row_scales(w: Tensor, bits: int, clip: float) -> Tensor:
    return (w.abs().amax(dim=1) * clip / levels(bits)).clamp_min(1e-6).half().float()


def best_clips(w: Tensor, bits: int, weight: Tensor) -> Tensor:
    """By row the scale with the least weighted squared error. weight: by column."""
    best_scale = row_scales(w, bits, CLIP_GRID[0])
    best_error = torch.full((w.size(0),), float("inf"), device=w.device)
    for clip in CLIP_GRID:
        scale = row_scales(w, bits, clip)
        error = ((w - round_rows(w, scale, bits) * scale[:, None]).square() * weight[None, :]).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def search_scales(w: Tensor, bits: int, rows: Tensor | None) -> tuple[Tensor, float]:
    """Scales of the rows of w, and the bound of the inputs that was chosen (0: none)."""
    if rows is None or rows.size(0) < 8:
        return best_clips(w, bits, torch.ones(w.size(1), device=w.device)), 0.0
    fit, check = rows[0::2], rows[1::2]
    sd = fit.std().clamp_min(1e-6)
    found: tuple[float, Tensor, float] | None = None
    for bound in ACT_CLIP_GRID:
        x = fit if bound <= 0 else fit.clamp(-bound * sd, bound * sd)
        scale = best_clips(w, bits, x.square().mean(dim=0) + 1e-8)
        delta = w - round_rows(w, scale, bits) * scale[:, None]
        error = float((check @ delta.T).square().mean())
        if found is None or error < found[0]:
            found = (error, scale, bound)
    return found[1], found[2]


# -----------------------------
# QUANTISATION AND PACKING
# -----------------------------


def bits_of(name: str, t: Tensor) -> int:
    """Bits of a tensor of the state; 0: kept as fp16."""
    if t.ndim != 2 or any(s in name for s in SCALAR_NAMES):
        return 0
    if ".mlp." in name:
        return MLP_BITS
    if ".attn." in name:
        return ATTN_BITS
    if name == "bigram.table.weight" or name == "bigram.proj.weight":
        return TABLE_BITS
    return EMBED_BITS


def pack_bits(q: Tensor, bits: int) -> bytes:
    """Two's complement of `bits` bits. The bits are laid plane by plane: the high planes are nearly constant for zstd."""
    u = (q.to(torch.int16).cpu().numpy().reshape(-1) + (1 << (bits - 1))).astype(np.uint8)
    return b"".join(np.packbits((u >> b) & 1).tobytes() for b in range(bits))


def unpack_bits(raw: bytes, bits: int, count: int) -> Tensor:
    plane = (count + 7) // 8
    u = np.zeros(count, dtype=np.int16)
    for b in range(bits):
        part = np.frombuffer(raw, dtype=np.uint8, count=plane, offset=b * plane)
        u |= np.unpackbits(part, count=count).astype(np.int16) << b
    return torch.from_numpy(u - (1 << (bits - 1)))


@torch.no_grad()
def prune_small(w: Tensor, fraction: float) -> Tensor:
    """The smallest weights become zero; zeros are cheap."""
    if fraction <= 0:
        return w
    k = max(int(w.numel() * fraction), 1)
    edge = w.abs().flatten().kthvalue(k).values
    return torch.where(w.abs() <= edge, torch.zeros_like(w), w)


@torch.no_grad()
def quantise(model: GPT, rows: dict[str, Tensor]) -> dict[str, dict]:
    """The state as records: {bits, shape, q, scale} or {bits: 0, shape, value}."""
    records: dict[str, dict] = {}
    bounds: dict[float, int] = {}
    for name, t in model.state_dict().items():
        bits = bits_of(name, t)
        if not bits:
            records[name] = dict(bits=0, shape=list(t.shape), value=t.detach().half())
            continue
        w = t.detach().float()
        if bits in (MLP_BITS, ATTN_BITS):
            w = prune_small(w, PRUNE_FRACTION)
        source = "head" if name.startswith("head_last") else name.removesuffix(".weight")
        scale, bound = search_scales(w, bits, rows.get(source))
        bounds[bound] = bounds.get(bound, 0) + 1
        records[name] = dict(bits=bits, shape=list(t.shape), q=round_rows(w, scale, bits).to(torch.int8), scale=scale.half())
    say("clip_search: input bounds " + " ".join(f"{b:g}sd:{n}" for b, n in sorted(bounds.items())))
    return records


@torch.no_grad()
def restore(records: dict[str, dict], model: GPT) -> None:
    """Writes the records' values into the model."""
    state = model.state_dict()
    if set(state) != set(records):
        raise ValueError(f"records and model differ: {sorted(set(state) ^ set(records))}")
    for name, r in records.items():
        if r["bits"]:
            value = r["q"].to(DEVICE).float() * r["scale"].to(DEVICE).float()[:, None]
        else:
            value = r["value"].to(DEVICE).float()
        state[name].copy_(value.view(r["shape"]).to(state[name].dtype))


def pack(records: dict[str, dict], extra: dict) -> bytes:
    """All of the artifact: a JSON head and the raw tensors, compressed with zstd."""
    body = io.BytesIO()
    head: dict = dict(extra=extra, tensors=[])
    for name in sorted(records, key=lambda n: (records[n]["bits"], n)):
        r = records[name]
        start = body.tell()
        if r["bits"]:
            body.write(r["scale"].cpu().numpy().astype("<f2").tobytes())
            body.write(pack_bits(r["q"], r["bits"]))
        else:
            body.write(r["value"].cpu().numpy().astype("<f2").tobytes())
        head["tensors"].append([name, r["bits"], r["shape"], start, body.tell() - start])
    text = json.dumps(head, separators=(",", ":")).encode("utf-8")
    raw = len(text).to_bytes(4, "little") + text + body.getvalue()
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(raw)


def unpack(blob: bytes) -> tuple[dict[str, dict], dict]:
    raw = zstandard.ZstdDecompressor().decompress(blob)
    size = int.from_bytes(raw[:4], "little")
    head = json.loads(raw[4 : 4 + size].decode("utf-8"))
    body = memoryview(raw)[4 + size :]
    records: dict[str, dict] = {}
    for name, bits, shape, start, length in head["tensors"]:
        part = bytes(body[start : start + length])
        if not bits:
            value = torch.from_numpy(np.frombuffer(part, dtype="<f2").astype(np.float16).copy()).view(shape)
            records[name] = dict(bits=0, shape=shape, value=value)
            continue
        scale = torch.from_numpy(np.frombuffer(part, dtype="<f2", count=shape[0]).astype(np.float16).copy())
        q = unpack_bits(part[2 * shape[0] :], bits, shape[0] * shape[1]).to(torch.int8).view(shape)
        records[name] = dict(bits=bits, shape=shape, q=q, scale=scale)
    return records, head["extra"]


def report_records(records: dict[str, dict], model: GPT) -> None:
    """For the log: by width the tensors, the values, the share of zeros and the relative error of the values."""
    state = model.state_dict()
    table: dict[int, list[float]] = {}
    for name, r in records.items():
        row = table.setdefault(r["bits"], [0.0, 0.0, 0.0, 0.0, 0.0])
        exact = state[name].detach().float()
        row[0] += 1
        row[1] += exact.numel()
        if r["bits"]:
            approx = r["q"].to(DEVICE).float() * r["scale"].to(DEVICE).float()[:, None]
            row[2] += float((r["q"] == 0).sum())
        else:
            approx = r["value"].to(DEVICE).float()
        row[3] += float((exact - approx.view_as(exact)).square().sum())
        row[4] += float(exact.square().sum())
    for bits, (tensors, values, zeros, error, power) in sorted(table.items()):
        kind = f"int{bits}" if bits else "fp16"
        relative = math.sqrt(error / max(power, 1e-12))
        say(f"{kind}: {int(tensors)} tensors {int(values)} values zeros:{zeros / max(values, 1):.3f} error:{relative:.4f}")


def check_round_trip(records: dict[str, dict], blob: bytes) -> None:
    """What is read back from the artifact must be what went into it."""
    back, _ = unpack(blob)
    if set(back) != set(records):
        raise RuntimeError("the artifact has other tensors than the records")
    for name, r in records.items():
        keys = ("q", "scale") if r["bits"] else ("value",)
        for key in keys:
            if not torch.equal(back[name][key].cpu(), r[key].cpu()):
                raise RuntimeError(f"{name}: {key} changed on its way through the artifact")


def file_sizes(path: str) -> tuple[int, int, int]:
    """Bytes of the artifact, of this script, and of both."""
    model_bytes = os.path.getsize(path)
    code_bytes = len(Path(__file__).read_bytes())
    return model_bytes, code_bytes, model_bytes + code_bytes


# -----------------------------
# TEMPERATURE
# -----------------------------


@torch.no_grad()
def choose_temperature(model: GPT, tokens: Tensor) -> float:
    """The temperature of TEMPERATURES with the least loss on `tokens`, which ranks share among them."""
    model.eval()
    usable = min(tokens.numel() - 1, TEMPERATURE_TOKENS) // SEQ_LEN
    sums = torch.zeros(len(TEMPERATURES), device=DEVICE, dtype=torch.float64)
    mine = list(range(RANK, usable, WORLD))
    for i in range(0, len(mine), 16):
        starts = [k * SEQ_LEN for k in mine[i : i + 16]]
        rows = torch.stack([tokens[s : s + SEQ_LEN + 1].to(torch.int64) for s in starts]).to(DEVICE)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            h = model.trunk(rows[:, :-1])
        z = model.mixed_logits(h).reshape(-1, VOCAB_SIZE)
        y = rows[:, 1:].reshape(-1)
        for k, t in enumerate(TEMPERATURES):
            sums[k] += F.cross_entropy(z / t, y, reduction="sum").double()
    sum_over_ranks(sums)
    best = int(sums.argmin())
    say(f"temperature: {TEMPERATURES[best]:.2f} of {usable * SEQ_LEN} held-out train tokens")
    return TEMPERATURES[best]


# -----------------------------
# EVALUATION
# -----------------------------


@torch.no_grad()
def loss_in_blocks(model: nn.Module, tokens: Tensor, tables: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Loss and bpb in blocks side by side, by the trained head: quick, for the log of the training only."""
    model.eval()
    blocks = (tokens.numel() - 1) // SEQ_LEN
    acc = torch.zeros(3, device=DEVICE, dtype=torch.float64)
    first, last = blocks * RANK // WORLD, blocks * (RANK + 1) // WORLD
    for b in range(first, last, 32):
        n = min(32, last - b)
        part = tokens[b * SEQ_LEN : (b + n) * SEQ_LEN + 1].to(DEVICE).to(torch.int64)
        x, y = part[:-1].view(n, SEQ_LEN), part[1:].view(n, SEQ_LEN)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        acc[0] += loss.double() * y.numel()
        acc[1] += y.numel()
        acc[2] += count_bytes(tables, x.reshape(-1), y.reshape(-1)).sum().double()
    sum_over_ranks(acc)
    model.train()
    mean = float(acc[0] / acc[1])
    return mean, mean / math.log(2.0) * float(acc[1] / acc[2])


def sliding_windows(targets: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first scored, end): the window reads inputs start..end-1 and scores the targets of first..end-1.

    The first window scores all of its targets, each later one those that no window before it has scored.
    """
    end = min(length, targets)
    windows = [(0, 0, end)]
    while end < targets:
        done, end = end, min(end + stride, targets)
        windows.append((end - length, done, end))
    return windows


def check_windows(targets: int, length: int, stride: int) -> None:
    """A dry run on a small split: each target in exactly one window, none before its window's start."""
    seen = np.zeros(targets, dtype=np.int32)
    for start, first, end in sliding_windows(targets, length, stride):
        if not 0 <= start <= first < end <= targets or end - start != min(length, targets):
            raise RuntimeError(f"window {start}, {first}, {end} of {targets} targets")
        seen[first:end] += 1
    if not (seen == 1).all():
        raise RuntimeError("sliding windows do not score each target once")


def gather_windows(tokens: Tensor, windows: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and a mask of the scored positions, of windows of the same length."""
    length = windows[0][2] - windows[0][0]
    starts = torch.tensor([w[0] for w in windows])
    first = torch.tensor([w[1] - w[0] for w in windows])
    place = torch.arange(length)
    rows = tokens[starts[:, None] + torch.arange(length + 1)[None, :]].to(torch.int64)
    scored = place[None, :] >= first[:, None]
    return rows[:, :-1].to(DEVICE), rows[:, 1:].to(DEVICE), scored.to(DEVICE)


def token_losses(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-ln p(target) of each position under the softmax over the whole vocabulary."""
    logp = F.log_softmax(logits.float() / temperature, dim=-1)
    return -logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def score_sliding(model: GPT, tokens: Tensor, tables: tuple[Tensor, Tensor, Tensor], temperature: float):
    """Loss and bpb over all of `tokens`: each target once, with SEQ_LEN - EVAL_STRIDE tokens before it where there are."""
    model.eval()
    tokens = tokens.to(torch.int32)
    targets = tokens.numel() - 1
    windows = sliding_windows(targets, SEQ_LEN, EVAL_STRIDE)
    mine = windows[len(windows) * RANK // WORLD : len(windows) * (RANK + 1) // WORLD]
    trunk = torch.compile(model.trunk, dynamic=False)
    nll = torch.zeros((), device=DEVICE, dtype=torch.float64)
    count = torch.zeros((), device=DEVICE, dtype=torch.float64)
    size = torch.zeros((), device=DEVICE, dtype=torch.float64)
    began = time.perf_counter()
    for i in range(0, len(mine), EVAL_BATCH):
        batch = mine[i : i + EVAL_BATCH]
        x, y, scored = gather_windows(tokens, batch)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            h = trunk(x) if len(batch) == EVAL_BATCH else model.trunk(x)
        logits = model.mixed_logits(h[scored])
        target, before = y[scored], x[scored]
        loss = token_losses(logits, target, temperature)
        nll += loss.double().sum()
        count += target.numel()
        size += count_bytes(tables, before, target).double().sum()
        if MASTER and (i // EVAL_BATCH) % 500 == 0:
            say(f"  sliding {i}/{len(mine)} bits_per_token:{float(nll / count) / math.log(2.0):.4f}", console=False)
    for t in (nll, count, size):
        sum_over_ranks(t)
    if int(count) != targets:
        raise RuntimeError(f"scored {int(count)} tokens of {targets}")
    seconds = time.perf_counter() - began
    mean = float(nll / count)
    bpb = float(nll) / math.log(2.0) / float(size)
    say(f"sliding: {int(count)} tokens {int(size)} bytes {seconds:.1f}s")
    return mean, bpb


# -----------------------------
# TRAINING
# -----------------------------


def muon_momentum(step: int) -> float:
    frac = min(step / max(MUON_MOMENTUM_STEPS, 1), 1.0)
    return (1.0 - frac) * MUON_MOMENTUM_START + frac * MUON_MOMENTUM


def set_rates(optimizers: list[torch.optim.Optimizer], scale: float, momentum: float) -> None:
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * scale
            if "momentum" in group:
                group["momentum"] = momentum


def train(model: GPT, train_files: list[str], val_tokens: Tensor, tables: tuple[Tensor, Tensor, Tensor], t0: float):
    """Trains until the clock, less the reserve, is used up. Returns the sum of the averaged states and their number."""
    accum = 8 // WORLD
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    runner: nn.Module = DDP(compiled, device_ids=[LOCAL_RANK], broadcast_buffers=False) if DISTRIBUTED else compiled
    optimizers = build_optimizers(model)
    batches = train_batches(train_files, SEQ_LEN, TRAIN_BATCH_TOKENS, accum)
    budget = MAX_WALLCLOCK_SECONDS - RESERVE_SECONDS if MAX_WALLCLOCK_SECONDS > 0 else 0.0
    paused = 0.0  # seconds of validation for the log, which are no training
    total = swa_new(model)
    averaged = 0
    smooth = 0.0
    model.train()
    step = 0
    while True:
        elapsed = time.perf_counter() - t0 - paused
        last = step >= ITERATIONS or (budget > 0 and any_rank(elapsed >= budget))
        if VAL_EVERY > 0 and step > 0 and step % VAL_EVERY == 0 and not last:
            wait_for_all()
            tick = time.perf_counter()
            val_loss, val_bpb = loss_in_blocks(compiled, val_tokens, tables)
            say(f"step:{step}/{ITERATIONS} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{elapsed:.1f}s")
            wait_for_all()
            paused += time.perf_counter() - tick
        if last:
            break
        scale = lr_scale(step, elapsed, budget)
        set_rates(optimizers, scale, muon_momentum(step))
        step_loss = torch.zeros((), device=DEVICE)
        for micro in range(accum):
            x, y = next(batches)
            last_micro = micro == accum - 1
            sync = nullcontext() if last_micro or not DISTRIBUTED else runner.no_sync()
            with sync, torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = runner(x, y)
                (loss / accum).backward()
            step_loss += loss.detach() / accum
        if GRAD_CLIP > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        progress = elapsed / budget if budget > 0 else step / ITERATIONS
        if progress >= 1.0 - SWA_FRACTION and step % SWA_EVERY == 0:
            swa_add(total, model)
            averaged += 1
        if step <= 10 or step % LOG_EVERY == 0:
            smooth = float(step_loss)
            spent = time.perf_counter() - t0 - paused
            say(f"step:{step}/{ITERATIONS} train_loss:{smooth:.4f} train_time:{spent:.1f}s step_avg:{1000 * spent / step:.2f}ms")
    wait_for_all()
    spent = time.perf_counter() - t0 - paused
    say(f"stopping: step:{step}/{ITERATIONS} train_time:{spent:.1f}s of {budget:.1f}s averaged:{averaged}")
    say(f"peak memory: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    return total, averaged, paused


def build_artifact(model: GPT, train_files: list[str], heldout_files: list[str]) -> dict:
    """Clip search, quantisation, temperature, file. All of it is work on train shards and belongs to the training."""
    rows = collect_inputs(model, train_files)
    records = quantise(model, rows)
    del rows
    report_records(records, model)
    restore(records, model)
    heldout = torch.cat([read_shard(f) for f in heldout_files])
    temperature = choose_temperature(model, heldout)
    extra = dict(temperature=temperature, layers=NUM_LAYERS, dim=MODEL_DIM)
    if MASTER:
        blob = pack(records, extra)
        check_round_trip(records, blob)
        with open(ARTIFACT, "wb") as f:
            f.write(blob)
    wait_for_all()
    return extra


def report_sizes() -> None:
    model_bytes, code_bytes, total_bytes = file_sizes(ARTIFACT)
    say(f"artifact int5/int6+zstd{ZSTD_LEVEL}: {model_bytes} bytes")
    say(f"code: {code_bytes} bytes")
    say(f"total submission size: {total_bytes} bytes (limit {SIZE_LIMIT})")
    if total_bytes > SIZE_LIMIT:
        raise RuntimeError(f"submission of {total_bytes} bytes is over {SIZE_LIMIT}")


def load_artifact() -> tuple[GPT, dict]:
    """A fresh model with the artifact's weights, and the artifact's settings."""
    records, extra = unpack(Path(ARTIFACT).read_bytes())
    model = build_model()
    restore(records, model)
    for p in model.parameters():
        p.requires_grad_(False)
    return model, extra


def report_speed(seconds: float, targets: int) -> None:
    """For the log: how far the evaluation was from its limit."""
    windows = max((targets - SEQ_LEN) / EVAL_STRIDE, 0) + 1
    say(f"evaluation: {windows / max(seconds, 1e-9):.0f} windows/s, {seconds:.1f}s of {EVAL_SECONDS:.0f}s")


def log_environment() -> None:
    say(Path(__file__).read_text(encoding="utf-8"), console=False)
    say(f"python {sys.version.split()[0]} torch {torch.__version__} zstandard {zstandard.__version__}")
    if MASTER:
        smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        say(smi.stdout, console=False)


def log_settings(model: GPT, train_files: list[str], heldout_files: list[str], val_tokens: Tensor) -> None:
    say(f"train: {len(train_files)} shards, held out of it: {[Path(f).name for f in heldout_files]}")
    say(f"val: {val_tokens.numel() - 1} targets of {VAL_FILES}")
    say(f"model: {sum(p.numel() for p in model.parameters())} parameters, {NUM_LAYERS} layers of {MODEL_DIM}")
    say(f"attention: {NUM_HEADS} heads, {NUM_KV_HEADS} kv heads; mlp {MLP_HIDDEN}; bigram {BIGRAM_BUCKETS}x{BIGRAM_DIM}")
    say(f"bits: mlp {MLP_BITS} attention {ATTN_BITS} tables {TABLE_BITS} embeddings and heads {EMBED_BITS}")
    say(f"swa: last {SWA_FRACTION:.2f} every {SWA_EVERY}; head mix {HEAD_MIX:.2f}; seed {SEED}; world {WORLD}")
    say(f"clock: {MAX_WALLCLOCK_SECONDS:.0f}s of which {RESERVE_SECONDS:.0f}s for the artifact")


# -----------------------------
# MAIN
# -----------------------------


def main() -> None:
    start_processes()
    log_environment()
    seed_everything(SEED)

    sp = spm.SentencePieceProcessor(model_file=TOKENIZER_PATH)
    check_tokenizer(sp)
    check_windows(7 * EVAL_STRIDE + SEQ_LEN + 5, SEQ_LEN, EVAL_STRIDE)
    tables = byte_tables(sp)
    train_files, heldout_files = split_train_shards()
    val_tokens = load_val_tokens()
    model = build_model()
    log_settings(model, train_files, heldout_files, val_tokens)

    # training and everything else that reads train shards, by one clock
    wait_for_all()
    t0 = time.perf_counter()
    total, averaged, paused = train(model, train_files, val_tokens, tables, t0)
    swa_apply(total, averaged, model)
    del total
    build_artifact(model, train_files, heldout_files)
    built = time.perf_counter() - t0 - paused
    say(f"artifact complete after {built:.1f}s of {MAX_WALLCLOCK_SECONDS:.1f}s")
    if MAX_WALLCLOCK_SECONDS > 0 and built > MAX_WALLCLOCK_SECONDS:
        raise RuntimeError(f"training and artifact took {built:.1f}s")
    report_sizes()
    del model
    torch.cuda.empty_cache()

    # evaluation: from the file alone
    wait_for_all()
    t1 = time.perf_counter()
    scorer, extra = load_artifact()
    val_loss, val_bpb = score_sliding(scorer, val_tokens, tables, extra["temperature"])
    wait_for_all()
    eval_seconds = time.perf_counter() - t1
    if eval_seconds > EVAL_SECONDS:
        raise RuntimeError(f"evaluation took {eval_seconds:.1f}s")
    report_speed(eval_seconds, val_tokens.numel() - 1)
    say(f"final_sliding val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} stride:{EVAL_STRIDE} eval_time:{eval_seconds:.1f}s")
    say(f"final_sliding_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if DISTRIBUTED:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
