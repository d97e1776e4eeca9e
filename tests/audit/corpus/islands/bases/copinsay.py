"""copinsay: banked transformer, parallel Muon over ranks, int6 GPTQ, score-first chunk adaptation.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Stages: warm-up of the compiled graphs -> training under the clock -> moving average -> Hessians from
train batches and int6 GPTQ (still under the clock) -> lzma -> round trip -> evaluation by chunks.
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

# ----------------------------------------------------------------------------------------------
# settings
# ----------------------------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_str(name: str, default: str) -> str:
    return os.environ.get(name, default)


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, "1" if default else "0")))


@dataclass
class Settings:
    """Every knob of a run, each overridable by an environment variable of the same name in capitals."""

    # data
    data_path: str = env_str("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = env_str("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = env_str("RUN_ID", "")
    seed: int = env_int("SEED", 1337)

    # schedule
    iterations: int = env_int("ITERATIONS", 9000)
    warmdown_iters: int = env_int("WARMDOWN_ITERS", 3500)
    warmup_steps: int = env_int("WARMUP_STEPS", 20)
    train_batch_tokens: int = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len: int = env_int("TRAIN_SEQ_LEN", 2048)
    max_wallclock_s: float = env_float("MAX_WALLCLOCK_S", 600.0)
    calib_reserve_s: float = env_float("CALIB_RESERVE_S", 18.0)
    log_every: int = env_int("LOG_EVERY", 500)

    # monitoring during the training
    val_every: int = env_int("VAL_EVERY", 4000)
    val_batch_tokens: int = env_int("VAL_BATCH_TOKENS", 524_288)

    # model
    vocab_size: int = env_int("VOCAB_SIZE", 1024)
    num_layers: int = env_int("NUM_LAYERS", 11)
    model_dim: int = env_int("MODEL_DIM", 512)
    num_heads: int = env_int("NUM_HEADS", 8)
    num_kv_heads: int = env_int("NUM_KV_HEADS", 4)
    mlp_mult: int = env_int("MLP_MULT", 3)
    leaky_slope: float = env_float("LEAKY_SLOPE", 0.5)
    rope_base: float = env_float("ROPE_BASE", 10000.0)
    rope_dims: int = env_int("ROPE_DIMS", 16)
    logit_softcap: float = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init: float = env_float("QK_GAIN_INIT", 1.5)
    bigram_buckets: int = env_int("BIGRAM_BUCKETS", 2048)
    bigram_dim: int = env_int("BIGRAM_DIM", 128)
    ve_layers: str = env_str("VE_LAYERS", "8,9,10")
    ve_dim: int = env_int("VE_DIM", 128)
    embed_init_std: float = env_float("EMBED_INIT_STD", 0.005)
    bos_id: int = env_int("BOS_ID", 1)

    # optimisers
    bank_lr: float = env_float("BANK_LR", 0.025)
    bank_wd: float = env_float("BANK_WD", 0.04)
    muon_momentum: float = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start: float = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps: int = env_int("MUON_MOMENTUM_STEPS", 1500)
    ns_steps: int = env_int("NS_STEPS", 5)
    embed_lr: float = env_float("EMBED_LR", 0.035)
    scalar_lr: float = env_float("SCALAR_LR", 0.025)
    adam_wd: float = env_float("ADAM_WD", 0.04)
    beta1: float = env_float("BETA1", 0.9)
    beta2: float = env_float("BETA2", 0.95)
    grad_clip: float = env_float("GRAD_CLIP", 0.3)
    ema_decay: float = env_float("EMA_DECAY", 0.997)

    # quantisation
    calib_batches: int = env_int("CALIB_BATCHES", 24)
    calib_seqs: int = env_int("CALIB_SEQS", 8)
    gptq_block: int = env_int("GPTQ_BLOCK", 128)
    gptq_damp: float = env_float("GPTQ_DAMP", 0.01)
    quant_bits: int = env_int("QUANT_BITS", 6)
    lzma_preset: int = env_int("LZMA_PRESET", 9)

    # evaluation
    eval_stride: int = env_int("EVAL_STRIDE", 64)
    eval_batch_windows: int = env_int("EVAL_BATCH_WINDOWS", 32)
    adapt: bool = env_flag("ADAPT", True)
    adapt_chunk: int = env_int("ADAPT_CHUNK", 32_768)
    adapt_epochs: int = env_int("ADAPT_EPOCHS", 3)
    adapt_lr: float = env_float("ADAPT_LR", 0.002)
    adapt_momentum: float = env_float("ADAPT_MOMENTUM", 0.9)
    adapt_batch_seqs: int = env_int("ADAPT_BATCH_SEQS", 2)
    adapt_clip: float = env_float("ADAPT_CLIP", 1.0)
    eval_budget_s: float = env_float("EVAL_BUDGET_S", 570.0)

    @property
    def train_glob(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_glob(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    @property
    def ve_layer_list(self) -> list[int]:
        return [int(word) for word in self.ve_layers.split(",") if word.strip()]

    @property
    def mlp_dim(self) -> int:
        return self.mlp_mult * self.model_dim

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * (self.model_dim // self.num_heads)


SIZE_LIMIT = 16_000_000
ARTIFACT = "final_model.int6.ptz"

# ----------------------------------------------------------------------------------------------
# ranks and the log
# ----------------------------------------------------------------------------------------------


@dataclass
class Crew:
    """The ranks of this run."""

    rank: int
    world: int
    local: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        return tensor

    def agree(self, flag: bool) -> bool:
        """True on every rank as soon as it is true on one."""
        if self.world == 1:
            return flag
        vote = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote.item())


def join_crew() -> Crew:
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA device is needed")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    if 8 % world:
        raise ValueError(f"the world size {world} must divide 8")
    return Crew(rank, world, local, device)


class Journal:
    """Prints on rank 0 and keeps a copy under logs/."""

    def __init__(self, crew: Crew, run_id: str):
        self.on = crew.leads
        self.path = Path("logs") / f"{run_id or uuid.uuid4()}.txt"
        if self.on:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, text: str, quiet: bool = False) -> None:
        if not self.on:
            return
        if not quiet:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            print(text, file=file)


class Stopwatch:
    """Wall clock that can be held while something is done that isn't training."""

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

    def seconds(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.total + running


# ----------------------------------------------------------------------------------------------
# shards
# ----------------------------------------------------------------------------------------------

HEADER_INTS = 256
SHARD_MAGIC = 20240520


def read_shard(path: Path) -> Tensor:
    """The tokens of one .bin file: 256 int32 of header, then uint16 tokens."""
    head = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if head.size != HEADER_INTS or int(head[0]) != SHARD_MAGIC or int(head[1]) != 1:
        raise ValueError(f"unexpected header in {path}")
    count = int(head[2])
    want = HEADER_INTS * 4 + count * 2
    if path.stat().st_size != want:
        raise ValueError(f"{path} holds {path.stat().st_size} bytes instead of {want}")
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"short read of {path}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def shard_paths(pattern: str) -> list[Path]:
    found = [Path(name) for name in sorted(glob.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"no shards match {pattern}")
    return found


class ShardRing:
    """Reads the shards one after another, for ever."""

    def __init__(self, pattern: str):
        self.paths = shard_paths(pattern)
        self.at = 0
        self.tokens = read_shard(self.paths[0])
        self.pos = 0

    def advance(self) -> None:
        self.at = (self.at + 1) % len(self.paths)
        self.tokens = read_shard(self.paths[self.at])
        self.pos = 0

    def take(self, count: int) -> Tensor:
        pieces = []
        while count > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.advance()
                continue
            size = min(left, count)
            pieces.append(self.tokens[self.pos : self.pos + size])
            self.pos += size
            count -= size
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class TrainFeed:
    """Batches of the train stream; each rank takes its own slice of every global batch."""

    def __init__(self, pattern: str, crew: Crew):
        self.ring = ShardRing(pattern)
        self.crew = crew

    def batch(self, global_tokens: int, seq_len: int, micro: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.crew.world * micro)
        local = local // seq_len * seq_len
        span = local + 1
        block = self.ring.take(span * self.crew.world)
        begin = self.crew.rank * span
        mine = block[begin : begin + span].to(torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        device = self.crew.device
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def load_val_stream(pattern: str) -> Tensor:
    """All tokens of the validation split, in order."""
    return torch.cat([read_shard(path) for path in shard_paths(pattern)]).contiguous()


# ----------------------------------------------------------------------------------------------
# bytes of a token
# ----------------------------------------------------------------------------------------------


@dataclass
class ByteBook:
    """Bytes of each token, by the tokenizer's own pieces."""

    plain: Tensor  # bytes without a leading space
    space: Tensor  # the piece begins with the mark of a space
    edge: Tensor  # control pieces: nothing stands before the next one

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        size = self.plain[target].to(torch.float64)
        spaced = self.space[target] & ~self.edge[previous]
        return size + spaced.to(torch.float64)


def build_byte_book(path: str, vocab_size: int, device: torch.device) -> ByteBook:
    sp = spm.SentencePieceProcessor(model_file=path)
    size = max(int(sp.vocab_size()), vocab_size)
    plain = np.zeros(size, dtype=np.int16)
    space = np.zeros(size, dtype=np.bool_)
    edge = np.ones(size, dtype=np.bool_)
    for token in range(int(sp.vocab_size())):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        edge[token] = False
        if sp.is_byte(token):
            plain[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("\u2581"):
            space[token] = True
            piece = piece[1:]
        plain[token] = len(piece.encode("utf-8"))
    return ByteBook(
        torch.from_numpy(plain).to(device),
        torch.from_numpy(space).to(device),
        torch.from_numpy(edge).to(device),
    )


# ----------------------------------------------------------------------------------------------
# model
# ----------------------------------------------------------------------------------------------


class HessianTap:
    """Sums of outer products of what enters each matrix of the banks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def note(self, key: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.size(-1)).float()
        outer = flat.t() @ flat
        if key in self.sums:
            self.sums[key] += outer
            self.rows[key] += flat.size(0)
        else:
            self.sums[key] = outer
            self.rows[key] = flat.size(0)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rope_tables(cfg: Settings, length: int) -> tuple[Tensor, Tensor]:
    dims = cfg.rope_dims
    freq = 1.0 / cfg.rope_base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), freq)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first dims of a head; the rest passes."""
    dims = 2 * cos.size(-1)
    turned, rest = x[..., :dims], x[..., dims:]
    a, b = turned.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class BigramTable(nn.Module):
    """Embedding of the hashed pair (previous token, token) inside a document, an input feature."""

    def __init__(self, cfg: Settings):
        super().__init__()
        self.buckets = cfg.bigram_buckets
        self.bos_id = cfg.bos_id
        self.table = nn.Embedding(cfg.bigram_buckets, cfg.bigram_dim)
        self.lift = nn.Parameter(torch.zeros(cfg.model_dim, cfg.bigram_dim))
        self.scale = nn.Parameter(torch.tensor(0.05))
        nn.init.zeros_(self.table.weight)
        nn.init.orthogonal_(self.lift, gain=0.5)

    def keys(self, ids: Tensor) -> Tensor:
        last = self.buckets - 1
        mixed = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % last
        mixed = torch.where(ids[:, 1:] == self.bos_id, last, mixed)
        return F.pad(mixed, (1, 0), value=last)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(self.keys(ids))
        return F.linear(rows, self.lift.to(rows.dtype)) * self.scale.to(rows.dtype)


class ValueTable(nn.Module):
    """One small token table, lifted to the width of the values and scaled for each layer that uses it."""

    def __init__(self, cfg: Settings):
        super().__init__()
        self.table = nn.Embedding(cfg.vocab_size, cfg.ve_dim)
        self.lift = nn.Parameter(torch.zeros(cfg.kv_dim, cfg.ve_dim))
        self.scales = nn.Parameter(torch.full((len(cfg.ve_layer_list),), 0.1))
        nn.init.normal_(self.table.weight, std=0.01)
        nn.init.orthogonal_(self.lift, gain=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return F.linear(rows, self.lift.to(rows.dtype))


class Smear(nn.Module):
    """Mixes the token before into each position, except at the start of a document."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -2.0))
        self.bos_id = bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        g = torch.sigmoid(self.gate).to(x.dtype) * inside
        return (1.0 - g) * x + g * before


class BankedGPT(nn.Module):
    """The matrices of all layers stand in four banks, one per kind, so that Muon works on stacks.

    qo: per layer the query matrix, then per layer the output matrix
    kv: per layer the key matrix, then per layer the value matrix
    up, down: the two matrices of the MLP
    """

    def __init__(self, cfg: Settings):
        super().__init__()
        self.cfg = cfg
        layers, dim, kv, hid = cfg.num_layers, cfg.model_dim, cfg.kv_dim, cfg.mlp_dim
        self.layers = layers
        self.head_dim = dim // cfg.num_heads
        self.embed = nn.Embedding(cfg.vocab_size, dim)
        self.bigram = BigramTable(cfg)
        self.values = ValueTable(cfg)
        self.smear = Smear(dim, cfg.bos_id)
        self.qo_bank = nn.Parameter(torch.empty(2 * layers, dim, dim))
        self.kv_bank = nn.Parameter(torch.empty(2 * layers, kv, dim))
        self.up_bank = nn.Parameter(torch.empty(layers, hid, dim))
        self.down_bank = nn.Parameter(torch.empty(layers, dim, hid))
        self.qk_gain = nn.Parameter(torch.full((layers, cfg.num_heads), cfg.qk_gain_init))
        self.attn_scale = nn.Parameter(torch.ones(layers, dim))
        self.mlp_scale = nn.Parameter(torch.ones(layers, dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(layers, dim), torch.zeros(layers, dim))))
        self.half = layers // 2
        self.skip_scale = nn.Parameter(torch.ones(self.half, dim))
        cos, sin = rope_tables(cfg, max(cfg.train_seq_len, 4096))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        nn.init.normal_(self.embed.weight, std=self.cfg.embed_init_std)
        depth = 1.0 / math.sqrt(2 * self.layers)
        for i in range(self.layers):
            nn.init.orthogonal_(self.qo_bank[i])
            nn.init.zeros_(self.qo_bank[self.layers + i])
            nn.init.orthogonal_(self.kv_bank[i])
            nn.init.orthogonal_(self.kv_bank[self.layers + i])
            nn.init.orthogonal_(self.up_bank[i], gain=depth * 4.0)
            nn.init.zeros_(self.down_bank[i])

    def attend(self, i: int, x: Tensor, ve: Tensor | None, tap: HessianTap | None) -> Tensor:
        bsz, length, dim = x.shape
        heads, kv_heads = self.cfg.num_heads, self.cfg.num_kv_heads
        if tap is not None:
            tap.note(f"attn_in.{i}", x)
        q = F.linear(x, self.qo_bank[i].to(x.dtype)).view(bsz, length, heads, self.head_dim)
        k = F.linear(x, self.kv_bank[i].to(x.dtype)).view(bsz, length, kv_heads, self.head_dim)
        v = F.linear(x, self.kv_bank[self.layers + i].to(x.dtype))
        if ve is not None:
            v = v + ve
        v = v.view(bsz, length, kv_heads, self.head_dim)
        cos, sin = self.cos[:, :length], self.sin[:, :length]
        q = rotate(rms(q), cos, sin) * self.qk_gain[i].to(x.dtype)[None, None, :, None]
        k = rotate(rms(k), cos, sin)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=kv_heads != heads,
        )
        out = out.transpose(1, 2).reshape(bsz, length, dim)
        if tap is not None:
            tap.note(f"attn_out.{i}", out)
        return F.linear(out, self.qo_bank[self.layers + i].to(x.dtype))

    def expand(self, i: int, x: Tensor, tap: HessianTap | None) -> Tensor:
        if tap is not None:
            tap.note(f"mlp_in.{i}", x)
        h = F.leaky_relu(F.linear(x, self.up_bank[i].to(x.dtype)), self.cfg.leaky_slope).square()
        if tap is not None:
            tap.note(f"mlp_out.{i}", h)
        return F.linear(h, self.down_bank[i].to(x.dtype))

    def block(self, i: int, x: Tensor, x0: Tensor, ve: Tensor | None, tap: HessianTap | None) -> Tensor:
        mix = self.resid_mix[:, i].to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        damp = 1.0 / math.sqrt(i + 1)
        x = x + self.attn_scale[i].to(x.dtype) * self.attend(i, rms(x) * damp, ve, tap)
        return x + self.mlp_scale[i].to(x.dtype) * self.expand(i, rms(x) * damp, tap)

    def hidden(self, ids: Tensor, tap: HessianTap | None = None) -> Tensor:
        x = self.embed(ids) + self.bigram(ids)
        x = self.smear(rms(x), ids)
        x0 = x
        ve_all = self.values(ids)
        ve_at = {layer: n for n, layer in enumerate(self.cfg.ve_layer_list)}
        saved: list[Tensor] = []
        for i in range(self.layers):
            if i >= self.layers - self.half:
                j = i - (self.layers - self.half)
                x = x + self.skip_scale[j].to(x.dtype) * saved.pop()
            ve = ve_all * self.values.scales[ve_at[i]].to(x.dtype) if i in ve_at else None
            x = self.block(i, x, x0, ve, tap)
            if i < self.half:
                saved.append(x)
        return rms(x)

    def logits(self, ids: Tensor, tap: HessianTap | None = None) -> Tensor:
        raw = F.linear(self.hidden(ids, tap), self.embed.weight.to(torch.bfloat16))
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(raw.float() / cap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        out = self.logits(ids)
        return F.cross_entropy(out.reshape(-1, out.size(-1)), targets.reshape(-1))


BANKS = ("qo_bank", "kv_bank", "up_bank", "down_bank")


def bf16_context() -> torch.autocast:
    return torch.autocast(device_type="cuda", dtype=torch.bfloat16)


def make_model(cfg: Settings, device: torch.device) -> BankedGPT:
    model = BankedGPT(cfg).to(device)
    model.bigram.table.bfloat16()
    model.values.table.bfloat16()
    model.embed.bfloat16()
    return model


# ----------------------------------------------------------------------------------------------
# optimisers
# ----------------------------------------------------------------------------------------------


def newton_schulz(stack: Tensor, steps: int) -> Tensor:
    """Orthogonalises a stack of matrices at once."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = stack.bfloat16()
    flip = x.size(-2) > x.size(-1)
    if flip:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = b * gram + c * (gram @ gram)
        x = a * x + poly @ x
    return x.mT if flip else x


class BankSlot:
    """What one rank keeps for one bank: its share of the stack, padded so that all shares are alike."""

    def __init__(self, bank: nn.Parameter, crew: Crew):
        self.bank = bank
        count, rows, cols = bank.shape
        self.share = -(-count // crew.world)
        padded = self.share * crew.world
        self.count = count
        self.begin = crew.rank * self.share
        kwargs = dict(device=bank.device, dtype=torch.bfloat16)
        self.full = torch.zeros(padded, rows, cols, **kwargs)
        self.mine = torch.zeros(self.share, rows, cols, **kwargs)
        self.velocity = torch.zeros(self.share, rows, cols, device=bank.device, dtype=torch.float32)
        self.stretch = max(1.0, rows / cols) ** 0.5
        self.work = None


class ParallelMuon:
    """Muon on the banks: gradients are scattered, each rank turns its share, the updates are gathered."""

    def __init__(self, banks: list[nn.Parameter], cfg: Settings, crew: Crew):
        self.crew = crew
        self.steps = cfg.ns_steps
        self.wd = cfg.bank_wd
        self.lr = cfg.bank_lr
        self.momentum = cfg.muon_momentum_start
        self.slots = [BankSlot(bank, crew) for bank in banks]
        self.slots.sort(key=lambda slot: -slot.bank.numel())

    def scatter(self) -> None:
        """Starts the exchange of gradients; `apply` waits for it."""
        for slot in self.slots:
            slot.full[: slot.count].copy_(slot.bank.grad)
            if self.crew.world > 1:
                slot.work = dist.reduce_scatter_tensor(
                    slot.mine,
                    slot.full,
                    op=dist.ReduceOp.AVG,
                    async_op=True,
                )
            else:
                slot.mine.copy_(slot.full)

    @torch.no_grad()
    def apply(self, lr_scale: float) -> None:
        gathers = []
        for slot in self.slots:
            if slot.work is not None:
                slot.work.wait()
                slot.work = None
            grad = slot.mine.float()
            slot.velocity.mul_(self.momentum).add_(grad)
            ahead = grad.add(slot.velocity, alpha=self.momentum)
            slot.mine.copy_(newton_schulz(ahead, self.steps))
            if self.crew.world > 1:
                gathers.append(dist.all_gather_into_tensor(slot.full, slot.mine, async_op=True))
            else:
                slot.full.copy_(slot.mine)
        for slot, work in zip(self.slots, gathers or [None] * len(self.slots)):
            if work is not None:
                work.wait()
            lr = self.lr * lr_scale
            slot.bank.mul_(1.0 - lr * self.wd)
            slot.bank.add_(slot.full[: slot.count].to(slot.bank.dtype), alpha=-lr * slot.stretch)

    def state(self) -> list[Tensor]:
        return [slot.velocity for slot in self.slots]


class Optimisers:
    """Muon for the banks, AdamW for tables and for the small vectors."""

    def __init__(self, model: BankedGPT, cfg: Settings, crew: Crew):
        self.cfg, self.crew = cfg, crew
        self.banks = [getattr(model, name) for name in BANKS]
        tables = [model.embed.weight, model.bigram.table.weight, model.values.table.weight]
        held = {id(p) for p in self.banks + tables}
        small = [p for p in model.parameters() if id(p) not in held]
        self.replicated = tables + small
        self.muon = ParallelMuon(self.banks, cfg, crew)
        betas = (cfg.beta1, cfg.beta2)
        self.adam = torch.optim.AdamW(
            [
                {"params": tables, "lr": cfg.embed_lr, "base": cfg.embed_lr, "weight_decay": cfg.adam_wd},
                {"params": small, "lr": cfg.scalar_lr, "base": cfg.scalar_lr, "weight_decay": 0.0},
            ],
            betas=betas,
            eps=1e-8,
            fused=True,
        )

    def step(self, number: int, lr_scale: float) -> None:
        cfg = self.cfg
        part = min(number / max(cfg.muon_momentum_steps, 1), 1.0)
        self.muon.momentum = (1 - part) * cfg.muon_momentum_start + part * cfg.muon_momentum
        self.muon.scatter()
        for p in self.replicated:
            if p.grad is not None:
                self.crew.mean_(p.grad)
        if cfg.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.replicated, cfg.grad_clip)
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * lr_scale
        self.adam.step()
        self.muon.apply(lr_scale)
        self.clear()

    def clear(self) -> None:
        for p in self.banks + self.replicated:
            p.grad = None


class MovingAverage:
    """Exponential average of all parameters, in float32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self.live = [p for _, p in model.named_parameters()]
        self.mean = [p.detach().float().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.mean, [p.detach().float() for p in self.live], 1.0 - self.decay)

    @torch.no_grad()
    def load(self) -> None:
        for p, mean in zip(self.live, self.mean):
            p.copy_(mean.to(p.dtype))


# ----------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------


def monitor(model: nn.Module, cfg: Settings, crew: Crew, stream: Tensor, book: ByteBook) -> tuple[float, float]:
    """Loss and bpb on the split in separate sequences: a figure for the log."""
    seq = cfg.train_seq_len
    seqs = (stream.numel() - 1) // seq
    first = seqs * crew.rank // crew.world
    last = seqs * (crew.rank + 1) // crew.world
    per = max(1, cfg.val_batch_tokens // (crew.world * seq))
    sums = torch.zeros(3, dtype=torch.float64, device=crew.device)
    model.eval()
    with torch.inference_mode():
        for begin in range(first, last, per):
            end = min(begin + per, last)
            piece = stream[begin * seq : end * seq + 1].to(crew.device, torch.int64)
            x, y = piece[:-1].view(-1, seq), piece[1:].view(-1, seq)
            with bf16_context():
                loss = model(x, y)
            sums[0] += loss.double() * y.numel()
            sums[1] += y.numel()
            sums[2] += book.count(x, y).sum()
    crew.sum_(sums)
    model.train()
    loss = (sums[0] / sums[1]).item()
    return loss, loss / math.log(2.0) * (sums[1] / sums[2]).item()


def lr_scale_at(cfg: Settings, step: int, elapsed: float, cap: float) -> float:
    """1, then down to 0 over the last `warmdown_iters` steps, as far as the clock allows them."""
    if cfg.warmdown_iters <= 0:
        return 1.0
    per_step = elapsed / max(step, 1)
    down_s = cfg.warmdown_iters * per_step
    left_s = max(cap - elapsed, 0.0)
    by_clock = left_s / max(down_s, 1e-9)
    by_steps = (cfg.iterations - step) / cfg.warmdown_iters
    return max(0.0, min(1.0, by_clock, by_steps))


def gradient_pass(compiled: nn.Module, cfg: Settings, feed: TrainFeed, micro: int) -> Tensor:
    total = torch.zeros((), device=feed.crew.device)
    for _ in range(micro):
        x, y = feed.batch(cfg.train_batch_tokens, cfg.train_seq_len, micro)
        with bf16_context():
            loss = compiled(x, y)
        (loss / micro).backward()
        total += loss.detach() / micro
    return total


def warm_up(model: BankedGPT, compiled: nn.Module, opt: Optimisers, cfg: Settings, crew: Crew, micro: int) -> None:
    """Compiles and primes every kernel, then puts the state back as it was."""
    if cfg.warmup_steps <= 0:
        return
    kept = {name: t.detach().clone() for name, t in model.state_dict().items()}
    kept_adam = copy.deepcopy(opt.adam.state_dict())
    feed = TrainFeed(cfg.train_glob, crew)
    model.train()
    for step in range(cfg.warmup_steps):
        gradient_pass(compiled, cfg, feed, micro)
        opt.step(step, 1.0)
    model.load_state_dict(kept)
    opt.adam.load_state_dict(kept_adam)
    for velocity in opt.muon.state():
        velocity.zero_()
    opt.clear()


def train(
    model: BankedGPT,
    cfg: Settings,
    crew: Crew,
    log: Journal,
    stream: Tensor,
    book: ByteBook,
    clock: Stopwatch,
) -> None:
    """Trains until the clock leaves no more than the reserve of the calibration."""
    micro = 8 // crew.world
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    opt = Optimisers(model, cfg, crew)
    warm_up(model, compiled, opt, cfg, crew, micro)
    log(f"warm-up: {cfg.warmup_steps} steps done, state restored")
    average = MovingAverage(model, cfg.ema_decay)
    feed = TrainFeed(cfg.train_glob, crew)
    cap = cfg.max_wallclock_s - cfg.calib_reserve_s
    step = 0
    stop = False
    crew.barrier()
    clock.start()
    while True:
        done = stop or step >= cfg.iterations
        if cfg.val_every > 0 and (done or (step and step % cfg.val_every == 0)):
            clock.hold()
            loss, bpb = monitor(compiled, cfg, crew, stream, book)
            log(f"step:{step}/{cfg.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_s:{clock.seconds():.1f}")
            crew.barrier()
            clock.start()
        if done:
            break
        scale = lr_scale_at(cfg, step, clock.seconds(), cap)
        train_loss = gradient_pass(compiled, cfg, feed, micro)
        opt.step(step, scale)
        average.update()
        step += 1
        if step <= 5 or step % cfg.log_every == 0:
            seconds = clock.seconds()
            log(
                f"step:{step}/{cfg.iterations} train_loss:{train_loss.item():.4f} "
                f"train_s:{seconds:.1f} ms/step:{1000 * seconds / step:.2f}"
            )
        stop = crew.agree(clock.seconds() >= cap)
    log(f"training stopped at step {step}, train_s:{clock.seconds():.1f}")
    log(f"peak memory {torch.cuda.max_memory_allocated() // 2**20} MiB")
    average.load()
    log("moving average loaded")


# ----------------------------------------------------------------------------------------------
# quantisation
# ----------------------------------------------------------------------------------------------


def bank_plan(cfg: Settings) -> list[tuple[str, int, str]]:
    """For each matrix of the banks: bank, place in the stack, key of its Hessian."""
    plan = []
    for i in range(cfg.num_layers):
        plan.append(("qo_bank", i, f"attn_in.{i}"))
        plan.append(("qo_bank", cfg.num_layers + i, f"attn_out.{i}"))
        plan.append(("kv_bank", i, f"attn_in.{i}"))
        plan.append(("kv_bank", cfg.num_layers + i, f"attn_in.{i}"))
        plan.append(("up_bank", i, f"mlp_in.{i}"))
        plan.append(("down_bank", i, f"mlp_out.{i}"))
    return plan


def gather_hessians(model: BankedGPT, cfg: Settings, crew: Crew, feed: TrainFeed) -> dict[str, Tensor]:
    """Hessians over train batches, summed over the ranks."""
    tap = HessianTap()
    global_tokens = cfg.calib_seqs * cfg.train_seq_len * crew.world
    model.eval()
    with torch.no_grad(), bf16_context():
        for _ in range(cfg.calib_batches):
            x, _ = feed.batch(global_tokens, cfg.train_seq_len, 1)
            model.logits(x, tap)
    model.train()
    hessians = {}
    for key in sorted(tap.sums):
        rows = tap.rows[key] * crew.world
        hessians[key] = crew.sum_(tap.sums[key]) / rows
    return hessians


def row_scale(weight: Tensor, top: int) -> Tensor:
    """Of some clips the one whose rounding error is least, row by row."""
    best_scale = weight.abs().amax(dim=1).clamp_min(1e-8) / top
    best_error = torch.full_like(best_scale, float("inf"))
    for quantile in (0.999, 0.9995, 0.9999, 1.0):
        scale = torch.quantile(weight.abs(), quantile, dim=1).clamp_min(1e-8) / top
        q = torch.clamp(torch.round(weight / scale[:, None]), -top, top)
        error = (weight - q * scale[:, None]).square().sum(dim=1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale.to(torch.float16).float().clamp_min(6e-8)


def gptq(weight: Tensor, hessian: Tensor, cfg: Settings) -> tuple[Tensor, Tensor]:
    """Column after column, the error of each pushed on to the later ones."""
    top = 2 ** (cfg.quant_bits - 1) - 1
    w = weight.float().clone()
    h = hessian.float().clone()
    cols = w.size(1)
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(cfg.gptq_damp * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    scale = row_scale(w, top)
    q = torch.zeros_like(w, dtype=torch.int8)
    for begin in range(0, cols, cfg.gptq_block):
        end = min(begin + cfg.gptq_block, cols)
        part = w[:, begin:end].clone()
        errors = torch.zeros_like(part)
        corner = upper[begin:end, begin:end]
        for j in range(end - begin):
            column = part[:, j]
            level = torch.clamp(torch.round(column / scale), -top, top)
            q[:, begin + j] = level.to(torch.int8)
            error = (column - level * scale) / corner[j, j]
            part[:, j:] -= error[:, None] * corner[j, j:][None, :]
            errors[:, j] = error
        w[:, end:] -= errors @ upper[begin:end, end:]
    back = torch.argsort(order)
    return q[:, back].contiguous(), scale.to(torch.float16)


def round_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    w = weight.float()
    scale = row_scale(w, top)
    q = torch.clamp(torch.round(w / scale[:, None]), -top, top).to(torch.int8)
    return q, scale.to(torch.float16)


def quantise(
    model: BankedGPT,
    hessians: dict[str, Tensor],
    cfg: Settings,
    crew: Crew,
) -> dict[str, dict[str, Tensor]]:
    """int6 for the banks (each rank does its share of the matrices), int8 for the tables, fp16 for the rest."""
    packed: dict[str, dict[str, Tensor]] = {"q": {}, "s": {}, "raw": {}}
    state = dict(model.state_dict())
    for name in BANKS:
        bank = state.pop(name)
        packed["q"][name] = torch.zeros(bank.shape, dtype=torch.int8, device=bank.device)
        packed["s"][name] = torch.zeros(bank.shape[:2], dtype=torch.float16, device=bank.device)
    for n, (name, at, key) in enumerate(bank_plan(cfg)):
        if n % crew.world == crew.rank:
            q, s = gptq(getattr(model, name)[at].detach(), hessians[key], cfg)
            packed["q"][name][at] = q
            packed["s"][name][at] = s
    for name in BANKS:
        # every matrix is zero on all ranks but one
        levels = crew.sum_(packed["q"][name].to(torch.int32))
        packed["q"][name] = levels.to(torch.int8).cpu()
        packed["s"][name] = crew.sum_(packed["s"][name].float()).half().cpu()
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.endswith("table.weight") or name == "embed.weight":
            q, s = round_rows(tensor, 8)
            packed["q"][name] = q.cpu()
            packed["s"][name] = s.cpu()
        else:
            packed["raw"][name] = tensor.detach().to(torch.float16).cpu()
    return packed


def restore(packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    state = {name: tensor.float() for name, tensor in packed["raw"].items()}
    for name, q in packed["q"].items():
        state[name] = q.float() * packed["s"][name].float().unsqueeze(-1)
    return state


def squeeze(packed: dict[str, dict[str, Tensor]], preset: int) -> bytes:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    return lzma.compress(buffer.getvalue(), format=lzma.FORMAT_XZ, filters=filters)


def unsqueeze_file(path: str) -> dict[str, dict[str, Tensor]]:
    raw = lzma.decompress(Path(path).read_bytes())
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def make_artifact(model: BankedGPT, cfg: Settings, crew: Crew, log: Journal, clock: Stopwatch) -> None:
    """Calibrates and quantises under the clock, then packs and writes the artifact."""
    feed = TrainFeed(cfg.train_glob, crew)
    hessians = gather_hessians(model, cfg, crew, feed)
    log(f"hessians: {len(hessians)} from {cfg.calib_batches} train batches, train_s:{clock.seconds():.1f}")
    packed = quantise(model, hessians, cfg, crew)
    clock.hold()
    log(f"gptq done, train_s:{clock.seconds():.1f} of {cfg.max_wallclock_s:.0f}")
    del hessians
    if crew.leads:
        blob = squeeze(packed, cfg.lzma_preset)
        Path(ARTIFACT).write_bytes(blob)
        code = len(Path(__file__).read_bytes())
        total = code + len(blob)
        log(f"model bytes (int6+lzma): {len(blob)}")
        log(f"code bytes: {code}")
        log(f"total bytes: {total} of {SIZE_LIMIT}")
        if total > SIZE_LIMIT:
            log("WARNING: over the size limit")
    crew.barrier()


def load_artifact(cfg: Settings, crew: Crew) -> BankedGPT:
    """The model as anyone gets it who only has the artifact."""
    model = make_model(cfg, crew.device)
    model.load_state_dict(restore(unsqueeze_file(ARTIFACT)))
    return model


# ----------------------------------------------------------------------------------------------
# evaluation
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """One forward of the scorer: inputs begin at `start`; the targets at positions lo..hi-1 are scored.

    Position t is the prediction of token t + 1 of the stream.
    """

    start: int
    lo: int
    hi: int


def lay_windows(positions: int, seq: int, stride: int) -> list[Window]:
    """Windows that score every position once: a whole one at first, then `stride` positions each."""
    windows = [Window(0, 0, min(seq, positions))]
    lo = windows[0].hi
    while lo < positions:
        hi = min(lo + stride, positions)
        windows.append(Window(max(0, hi - seq), lo, hi))
        lo = hi
    return windows


def windows_by_chunk(windows: list[Window], chunk: int, chunks: int) -> list[list[Window]]:
    """The windows of each chunk: those that begin to score in it."""
    groups: list[list[Window]] = [[] for _ in range(chunks)]
    for window in windows:
        groups[window.lo // chunk].append(window)
    return groups


class Ledger:
    """What the score is made of: losses, positions and bytes, each position once."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, size: Tensor) -> None:
        self.sums[0] += nll.double().sum()
        self.sums[1] += nll.numel()
        self.sums[2] += size.double().sum()

    def total(self, crew: Crew) -> Tensor:
        return crew.sum_(self.sums.clone())

    def figures(self, crew: Crew) -> tuple[float, float, int, int]:
        loss_sum, count, size = (float(v) for v in self.total(crew))
        loss = loss_sum / count
        return loss, loss_sum / math.log(2.0) / size, int(count), int(size)


class Scorer:
    """Scores windows with the model as it stands."""

    def __init__(self, model: BankedGPT, cfg: Settings, crew: Crew, stream: Tensor, book: ByteBook):
        self.model, self.cfg, self.crew = model, cfg, crew
        self.stream, self.book = stream, book
        self.forward_logits = torch.compile(model.logits, dynamic=False, fullgraph=True)

    def pad_batch(self, windows: list[Window]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some windows, one shape for all batches."""
        seq = self.cfg.train_seq_len
        x = torch.zeros(self.cfg.eval_batch_windows, seq, dtype=torch.int64)
        y = torch.zeros(self.cfg.eval_batch_windows, seq, dtype=torch.int64)
        for row, w in enumerate(windows):
            piece = self.stream[w.start : w.hi + 1].to(torch.int64)
            x[row, : piece.numel() - 1] = piece[:-1]
            y[row, : piece.numel() - 1] = piece[1:]
        return x.to(self.crew.device, non_blocking=True), y.to(self.crew.device, non_blocking=True)

    def token_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """-ln p of every target of the batch."""
        with bf16_context():
            logits = self.forward_logits(x)
        logits = logits.float()
        flat = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none")
        return flat.view_as(y)

    def score(self, windows: list[Window], ledger: Ledger) -> None:
        """Adds this rank's share of the windows to the ledger."""
        mine = windows[self.crew.rank :: self.crew.world]
        per = self.cfg.eval_batch_windows
        self.model.eval()
        with torch.inference_mode():
            for begin in range(0, len(mine), per):
                batch = mine[begin : begin + per]
                x, y = self.pad_batch(batch)
                nll = self.token_nll(x, y)
                sizes = self.book.count(x, y)
                for row, w in enumerate(batch):
                    part = slice(w.lo - w.start, w.hi - w.start)
                    ledger.add(nll[row, part], sizes[row, part])


class ChunkTutor:
    """Trains all weights on a chunk that has been scored: SGD with momentum, the rate a cosine over chunks."""

    def __init__(self, model: BankedGPT, cfg: Settings, crew: Crew, stream: Tensor, chunks: int):
        self.model, self.cfg, self.crew = model, cfg, crew
        self.stream = stream
        self.chunks = chunks
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.sgd = torch.optim.SGD(self.params, lr=cfg.adapt_lr, momentum=cfg.adapt_momentum)
        self.compiled = torch.compile(model, dynamic=False, fullgraph=True)

    def rate(self, number: int) -> float:
        return self.cfg.adapt_lr * 0.5 * (1.0 + math.cos(math.pi * number / max(self.chunks - 1, 1)))

    def lessons(self, number: int) -> tuple[Tensor, Tensor]:
        """The chunk's whole sequences that fall to this rank."""
        seq = self.cfg.train_seq_len
        begin = number * self.cfg.adapt_chunk
        seqs = self.cfg.adapt_chunk // seq
        piece = self.stream[begin : begin + seqs * seq + 1].to(self.crew.device, torch.int64)
        x, y = piece[:-1].view(seqs, seq), piece[1:].view(seqs, seq)
        return x[self.crew.rank :: self.crew.world], y[self.crew.rank :: self.crew.world]

    def exchange(self) -> None:
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.crew.mean_(p.grad)

    def study(self, number: int) -> None:
        """All epochs on one chunk."""
        for group in self.sgd.param_groups:
            group["lr"] = self.rate(number)
        x, y = self.lessons(number)
        per = self.cfg.adapt_batch_seqs
        self.model.train()
        for _ in range(self.cfg.adapt_epochs):
            for begin in range(0, x.size(0), per):
                self.sgd.zero_grad(set_to_none=True)
                with bf16_context():
                    loss = self.compiled(x[begin : begin + per], y[begin : begin + per])
                loss.backward()
                self.exchange()
                torch.nn.utils.clip_grad_norm_(self.params, self.cfg.adapt_clip)
                self.sgd.step()
        self.sgd.zero_grad(set_to_none=True)


def score_first(
    model: BankedGPT,
    cfg: Settings,
    crew: Crew,
    log: Journal,
    stream: Tensor,
    book: ByteBook,
    began: float,
) -> tuple[float, float]:
    """Chunk by chunk: scores every window of the chunk, and only then trains on it."""
    positions = stream.numel() - 1
    chunks = -(-positions // cfg.adapt_chunk)
    windows = lay_windows(positions, cfg.train_seq_len, cfg.eval_stride)
    groups = windows_by_chunk(windows, cfg.adapt_chunk, chunks)
    ledger = Ledger(crew.device)
    scorer = Scorer(model, cfg, crew, stream, book)
    tutor = ChunkTutor(model, cfg, crew, stream, chunks)
    adapting = cfg.adapt
    log(f"score-first: {positions} positions, {len(windows)} windows, {chunks} chunks")
    for number, group in enumerate(groups):
        scorer.score(group, ledger)
        if number == chunks - 1:
            break
        if adapting and crew.agree(time.perf_counter() - began > cfg.eval_budget_s * 0.93):
            log(f"score-first: no time for more adaptation after chunk {number}")
            adapting = False
        if adapting:
            tutor.study(number)
        if number % 200 == 0:
            loss, bpb, count, _ = ledger.figures(crew)
            spent = time.perf_counter() - began
            log(f"  chunk {number}/{chunks} val_loss:{loss:.5f} val_bpb:{bpb:.5f} tokens:{count} eval_s:{spent:.1f}")
    loss, bpb, count, size = ledger.figures(crew)
    if count != positions:
        raise RuntimeError(f"{count} positions were scored instead of {positions}")
    log(f"score-first: {count} tokens, {size} bytes")
    return loss, bpb


def evaluate(cfg: Settings, crew: Crew, log: Journal, stream: Tensor, book: ByteBook) -> tuple[float, float]:
    """Everything between the artifact and the score."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    model = load_artifact(cfg, crew)
    crew.barrier()
    log(f"artifact loaded, eval_s:{time.perf_counter() - began:.1f}")
    loss, bpb = score_first(model, cfg, crew, log, stream, book, began)
    torch.cuda.synchronize()
    log(f"evaluation took {time.perf_counter() - began:.1f} s")
    return loss, bpb


# ----------------------------------------------------------------------------------------------
# the run
# ----------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def describe(cfg: Settings, crew: Crew, log: Journal, model: BankedGPT) -> None:
    log(f"python {sys.version.split()[0]}, torch {torch.__version__}, {crew.world} ranks")
    for item in fields(cfg):
        log(f"  {item.name} = {getattr(cfg, item.name)}", quiet=True)
    count = sum(p.numel() for p in model.parameters())
    banked = sum(getattr(model, name).numel() for name in BANKS)
    log(f"parameters: {count}, of them {banked} in banks")
    if crew.leads:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        log(smi.stdout, quiet=True)


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    cfg = Settings()
    crew = join_crew()
    log = Journal(crew, cfg.run_id)
    seed_all(cfg.seed)

    stream = load_val_stream(cfg.val_glob)
    book = build_byte_book(cfg.tokenizer_path, cfg.vocab_size, crew.device)
    log(f"validation: {stream.numel()} tokens, train shards: {len(shard_paths(cfg.train_glob))}")

    model = make_model(cfg, crew.device)
    describe(cfg, crew, log, model)
    clock = Stopwatch()
    train(model, cfg, crew, log, stream, book, clock)
    make_artifact(model, cfg, crew, log, clock)
    del model
    torch.cuda.empty_cache()

    val_loss, val_bpb = evaluate(cfg, crew, log, stream, book)
    log(f"final val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
    log(f"final_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if crew.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
