"""
Eleven layers at width 512 with a hashed table of pairs and attention that leaves a position's own value out.

Ten minutes on eight cards: train, average, measure second moments on training text, round. Then, from the file alone:
a pass over blocks, a pass over overlapping windows, and a pass that learns from each chunk once the chunk is paid.

Who does what:

    Config         the numbers of a run, from the environment
    Place, Diary   which process this is; what it writes down
    ByteTable      bytes of text behind a token
    TrainingText   batches out of the training shards
    Tower          the network (Storey, Attend, Expand, PairTable, Smear)
    Muon           updates of matrices
    Trainer        the ten minutes
    Rounder        moments, codes, and back
    Scorer         the three passes; Pupil is what learns in the third
    main           all of them in a row
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
from collections.abc import Iterator
from dataclasses import dataclass
from os import getenv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

try:
    import zstandard
except ImportError:  # the other packer takes some 2 % more
    zstandard = None

try:
    from flash_attn_interface import flash_attn_func as hopper_attention
except ImportError:  # no Hopper card, or no kernel for it
    hopper_attention = None


# ============================================================================
# Config
# ============================================================================


@dataclass
class Config:
    """A run in numbers. Whoever starts it may set each under its name in capitals."""

    # files
    folder: str = getenv("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_glob: str = folder + "/fineweb_train_*.bin"
    held_glob: str = folder + "/fineweb_val_*.bin"
    speller: str = getenv("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run: str = getenv("RUN_ID", str(uuid.uuid4()))
    seed: int = int(getenv("SEED", 1337))

    # time and amount
    clock_seconds: float = float(getenv("MAX_WALLCLOCK_SECONDS", 600.0))
    reserve_seconds: float = float(getenv("GPTQ_RESERVE_SECONDS", 14.0))
    max_steps: int = int(getenv("ITERATIONS", 20000))
    cooldown_steps: int = int(getenv("WARMDOWN_ITERS", 3500))
    dry_steps: int = int(getenv("WARMUP_STEPS", 20))
    step_tokens: int = int(getenv("TRAIN_BATCH_TOKENS", 786_432))
    train_len: int = int(getenv("TRAIN_SEQ_LEN", 2048))

    # how often it looks up
    look_every: int = int(getenv("VAL_LOSS_EVERY", 4000))
    look_tokens: int = int(getenv("VAL_BATCH_SIZE", 524_288))
    tell_every: int = int(getenv("TRAIN_LOG_EVERY", 500))

    # network
    vocab: int = int(getenv("VOCAB_SIZE", 1024))
    storeys: int = int(getenv("NUM_LAYERS", 11))
    dim: int = int(getenv("MODEL_DIM", 512))
    heads: int = int(getenv("NUM_HEADS", 8))
    value_heads: int = int(getenv("NUM_KV_HEADS", 4))
    mlp_ratio: float = float(getenv("MLP_MULT", 3.0))
    tied: bool = bool(int(getenv("TIE_EMBEDDINGS", "1")))
    rope_base: float = float(getenv("ROPE_BASE", 10000.0))
    rope_part: int = int(getenv("ROPE_DIMS", 16))
    softcap: float = float(getenv("LOGIT_SOFTCAP", 30.0))
    first_gain: float = float(getenv("QK_GAIN_INIT", 1.5))
    selfless: int = int(getenv("XSA_LAST_N", 4))
    pair_rows: int = int(getenv("BIGRAM_VOCAB_SIZE", 2048))
    pair_dim: int = int(getenv("BIGRAM_DIM", 128))
    damped: bool = bool(int(getenv("LN_SCALE", "1")))

    # updates
    table_lr: float = float(getenv("TIED_EMBED_LR", 0.035))
    matrix_lr: float = float(getenv("MATRIX_LR", 0.025))
    vector_lr: float = float(getenv("SCALAR_LR", 0.025))
    momentum: float = float(getenv("MUON_MOMENTUM", 0.99))
    momentum_from: float = float(getenv("MUON_MOMENTUM_WARMUP_START", 0.92))
    momentum_steps: int = int(getenv("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    ns_rounds: int = int(getenv("MUON_BACKEND_STEPS", 5))
    matrix_decay: float = float(getenv("MUON_WD", 0.04))
    other_decay: float = float(getenv("ADAM_WD", 0.04))
    beta_one: float = float(getenv("BETA1", 0.9))
    beta_two: float = float(getenv("BETA2", 0.95))
    adam_eps: float = float(getenv("ADAM_EPS", 1e-8))
    grad_limit: float = float(getenv("GRAD_CLIP_NORM", 0.3))

    # averages
    ema_keep: float = float(getenv("EMA_DECAY", 0.997))
    swa_on: bool = bool(int(getenv("SWA_ENABLED", "0")))
    swa_every: int = int(getenv("SWA_EVERY", 50))

    # rounding
    calib_batches: int = int(getenv("GPTQ_CALIB_BATCHES", 64))
    gptq_block: int = int(getenv("GPTQ_BLOCK_SIZE", 128))
    gptq_damp: float = float(getenv("GPTQ_DAMP", 0.01))
    bits: int = int(getenv("QUANT_BITS", 6))

    # scoring
    eval_len: int = int(getenv("EVAL_SEQ_LEN", 2048))
    stride: int = int(getenv("EVAL_STRIDE", 64))
    eval_rows: int = int(getenv("EVAL_BATCH_SEQS", 32))
    temperature: float = float(getenv("EVAL_TEMPERATURE", 1.0))

    # learning while scoring
    adapt: bool = bool(int(getenv("TTT_ENABLED", "1")))
    adapt_lr: float = float(getenv("TTT_LR", 0.002))
    adapt_epochs: int = int(getenv("TTT_EPOCHS", 3))
    adapt_chunk: int = int(getenv("TTT_CHUNK_TOKENS", 32768))
    adapt_frozen: int = int(getenv("TTT_FREEZE_BLOCKS", 2))
    adapt_momentum: float = float(getenv("TTT_MOMENTUM", 0.9))
    adapt_rows: int = int(getenv("TTT_BATCH_SEQS", 32))
    adapt_limit: float = float(getenv("TTT_GRAD_CLIP", 1.0))

    def check(self, world: int) -> None:
        """Complains about what would only be noticed after minutes."""
        complaints = {
            f"a step's eight parts cannot be dealt to {world} processes": 8 % world,
            f"{self.heads} heads do not fit a width of {self.dim}": self.dim % self.heads,
            f"{self.heads} heads cannot share {self.value_heads} values": self.heads % self.value_heads,
            f"TRAIN_BATCH_TOKENS is not eight parts of rows of {self.train_len}": self.step_tokens % (8 * self.train_len),
            f"rows of {self.eval_len} are not whole strides of {self.stride}": self.eval_len % max(self.stride, 1),
            "a chunk must be whole rows": self.adapt_chunk % self.eval_len,
            "ROPE_DIMS must be even": self.rope_part % 2,
        }
        found = [text for text, wrong in complaints.items() if wrong]
        if found:
            raise ValueError("; ".join(found))


# ============================================================================
# Place and Diary
# ============================================================================


class Place(NamedTuple):
    """Which process this is, of how many, and its card."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def take() -> Place:
        """Joins the group that torchrun has announced; without torchrun there is only this process."""
        card = int(getenv("LOCAL_RANK", 0))
        place = Place(int(getenv("RANK", 0)), int(getenv("WORLD_SIZE", 1)), torch.device("cuda", card))
        torch.cuda.set_device(card)
        if "MASTER_PORT" in os.environ or place.world > 1:
            dist.init_process_group("nccl", device_id=place.device)
        return place

    @property
    def parts(self) -> int:
        """How many parts of a step's batch this process works off one after the other."""
        return 8 // self.world

    def share(self, things: list) -> list:
        """This process's run of the things."""
        return things[len(things) * self.rank // self.world : len(things) * (self.rank + 1) // self.world]

    def add(self, *sums: Tensor) -> None:
        """Sums over all processes, in place."""
        if dist.is_initialized():
            for each in sums:
                dist.all_reduce(each, dist.ReduceOp.SUM)

    def wait(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class Diary:
    """Lines of the first process, kept under logs/ and shown; the others stay silent."""

    def __init__(self, run: str, place: Place) -> None:
        self.path = Path("logs") / f"{run}.txt"
        self.mute = place.rank != 0
        if not self.mute:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, line: str) -> None:
        """To the file only."""
        if not self.mute:
            with self.path.open("a", encoding="utf-8") as page:
                page.write(f"{line}\n")

    def __call__(self, line: str) -> None:
        if not self.mute:
            print(line, flush=True)
            self.keep(line)


def half() -> torch.autocast:
    return torch.autocast("cuda", dtype=torch.bfloat16)


def stamp() -> float:
    """Milliseconds by the wall, when the card has nothing left to do."""
    torch.cuda.synchronize()
    return 1000 * time.perf_counter()


# ============================================================================
# Bytes and tokens
# ============================================================================


class ByteTable:
    """What a token weighs: the bytes of its piece, and one more where its space is written.

    The mark of a piece is a space in the text, save after a token that is no text itself (the begin of a document).
    """

    def __init__(self, sp: spm.SentencePieceProcessor, vocab: int, device: torch.device) -> None:
        if sp.vocab_size() != vocab:
            raise ValueError(f"the speller knows {sp.vocab_size()} pieces, VOCAB_SIZE says {vocab}")
        size = np.zeros(vocab, dtype=np.int16)
        opens, edge = np.zeros(vocab, dtype=bool), np.zeros(vocab, dtype=bool)
        for i in range(vocab):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                edge[i] = True
                continue
            if sp.is_byte(i):
                size[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                opens[i] = True
                piece = piece[1:]
            size[i] = len(piece.encode("utf-8"))
        self.size, self.opens, self.edge = (torch.as_tensor(column, device=device) for column in (size, opens, edge))

    def __call__(self, before: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target (float64), with the token that stands before it."""
        weight = self.size[target].double()
        weight += self.opens[target] & ~self.edge[before]
        return weight


def shards(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{pattern}: nothing there")
    return found


def open_shard(path: str) -> Tensor:
    """256 integers of heading (20240520, 1, how many tokens), then the tokens in two bytes each."""
    with open(path, "rb") as file:
        heading = np.frombuffer(file.read(1024), dtype="<i4")
        body = file.read()
    if len(heading) != 256 or heading[0] != 20240520 or heading[1] != 1:
        raise ValueError(f"{path}: not the heading of a shard")
    if len(body) != 2 * heading[2]:
        raise ValueError(f"{path}: {heading[2]} tokens by the heading, {len(body)} bytes behind it")
    return torch.from_numpy(np.frombuffer(body, dtype="<u2").astype(np.int32))


def held_out(pattern: str, length: int) -> Tensor:
    """The held-out tokens in their order: whole rows of `length`, and the one token that only ends the last."""
    tokens = torch.cat([open_shard(path) for path in shards(pattern)])
    rows = (len(tokens) - 1) // length
    if rows < 1:
        raise ValueError(f"{pattern}: fewer tokens than one row of {length}")
    return tokens[: rows * length + 1]


class TrainingText:
    """The training shards one after the other, for ever. All processes turn the same pages and keep a row each."""

    def __init__(self, pattern: str, place: Place) -> None:
        self.place = place
        self.files = shards(pattern)
        self.number, self.used = 0, 0
        self.page = open_shard(self.files[0])

    def turn(self) -> None:
        self.number = (self.number + 1) % len(self.files)
        self.page, self.used = open_shard(self.files[self.number]), 0

    def row(self, n: int) -> Tensor:
        """The next n tokens, over the ends of pages."""
        parts = []
        while n > 0:
            part = self.page[self.used : self.used + n]
            self.used += len(part)
            n -= len(part)
            parts.append(part)
            if n > 0:
                self.turn()
        return torch.cat(parts)

    def batch(self, tokens: int, length: int, parts: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this process, rows of `length`: one of `parts` parts of a step of so many tokens."""
        each = tokens // (self.place.world * parts)
        rows = [self.row(each + 1) for _ in range(self.place.world)]
        own = rows[self.place.rank].pin_memory().to(self.place.device, torch.int64, non_blocking=True)
        return own[:-1].view(-1, length), own[1:].view(-1, length)


# ============================================================================
# Network
# ============================================================================


class Proj(nn.Linear):
    """Weights in fp32, sums in whatever type arrives."""

    def __init__(self, from_dim: int, to_dim: int, silent: bool = False) -> None:
        super().__init__(from_dim, to_dim, bias=False)
        self.silent = silent  # starts at zero, so that its storey begins as the identity

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x))


def even(x: Tensor) -> Tensor:
    """Root mean square of one along the last axis."""
    return F.rms_norm(x, [x.size(-1)])


class Compass(nn.Module):
    """Rotary positions in the first `part` channels of a head. Rows longer than in training stretch the base."""

    def __init__(self, part: int, base: float, known: int) -> None:
        super().__init__()
        self.part, self.base, self.known = part, base, known

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Not kept: a table made under inference_mode could not be learnt through later."""
        stretch = max(1.0, length / self.known) ** (self.part / (self.part - 2))
        speeds = (self.base * stretch) ** -torch.linspace(0, 1, self.part // 2 + 1, device=device)[:-1]
        angles = torch.arange(length, device=device)[:, None, None] * speeds
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        """x: batch, position, head, channel."""
        cos, sin = self.table(x.size(1), x.device)
        left, right, rest = x.split([self.part // 2, self.part // 2, x.size(-1) - self.part], dim=-1)
        return torch.cat((left * cos + right * sin, right * cos - left * sin, rest), dim=-1).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal; batch, position, head, channel in and out."""
    if hopper_attention is not None:
        return hopper_attention(q, k, v, causal=True)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class Attend(nn.Module):
    def __init__(self, cfg: Config, selfless: bool) -> None:
        super().__init__()
        self.heads, self.value_heads, self.selfless = cfg.heads, cfg.value_heads, selfless
        narrow = cfg.dim * cfg.value_heads // cfg.heads
        self.ask, self.key, self.value = Proj(cfg.dim, cfg.dim), Proj(cfg.dim, narrow), Proj(cfg.dim, narrow)
        self.answer = Proj(cfg.dim, cfg.dim, silent=True)
        self.gain = nn.Parameter(torch.full([cfg.heads], cfg.first_gain))
        self.compass = Compass(cfg.rope_part, cfg.rope_base, cfg.train_len)

    def forward(self, x: Tensor) -> Tensor:
        q = even(self.ask(x).unflatten(-1, (self.heads, -1)))
        k = even(self.key(x).unflatten(-1, (self.value_heads, -1)))
        v = self.value(x).unflatten(-1, (self.value_heads, -1))
        y = attention(self.compass(q) * self.gain.to(q)[:, None], self.compass(k), v)
        if self.selfless:
            y = self.without_own(y, v)
        return self.answer(y.flatten(2))

    def without_own(self, y: Tensor, v: Tensor) -> Tensor:
        """Takes out of a head's answer what points the way of the position's own value."""
        own = F.normalize(v, dim=-1)[:, :, :, None]
        grouped = y.unflatten(2, (self.value_heads, -1))
        return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(2, 3)


class Expand(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.widen, self.narrow = Proj(dim, inner), Proj(inner, dim, silent=True)

    def forward(self, x: Tensor) -> Tensor:
        bent = F.leaky_relu(self.widen(x), 0.5)
        return self.narrow(bent * bent)


class Smear(nn.Module):
    """Each embedding takes in some of the one before; the row's first has none before it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return torch.lerp(x, before, self.gate.sigmoid().to(x))


class PairTable(nn.Module):
    """A vector for a token and the one before it, found by a hash; the last row stands for "none before"."""

    def __init__(self, size: int, dim: int, to_dim: int) -> None:
        super().__init__()
        self.size = size
        self.vectors = nn.Embedding(size, dim)
        self.out = Proj(dim, to_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def slots(self, ids: Tensor) -> Tensor:
        now, before = ids[:, 1:].int(), ids[:, :-1].int()
        mixed = ((40009 * now) ^ (25447 * before)) % (self.size - 1)
        return F.pad(mixed, (1, 0), value=self.size - 1).long()

    def forward(self, ids: Tensor) -> Tensor:
        found = self.out(self.vectors(self.slots(ids)))
        return self.scale.to(found) * found


class Storey(nn.Module):
    def __init__(self, cfg: Config, number: int) -> None:
        super().__init__()
        self.attend = Attend(cfg, selfless=number + cfg.selfless >= cfg.storeys)
        self.expand = Expand(cfg.dim, int(cfg.mlp_ratio * cfg.dim))
        self.attend_scale = nn.Parameter(torch.ones(cfg.dim))
        self.expand_scale = nn.Parameter(torch.ones(cfg.dim))
        self.blend = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, cfg.dim))
        self.damp = (number + 1) ** -0.5 if cfg.damped else 1.0

    def forward(self, x: Tensor, ground: Tensor) -> Tensor:
        keep, fresh = self.blend.to(x)
        x = keep * x + fresh * ground
        x = x + self.attend_scale.to(x) * self.attend(self.damp * even(x))
        return x + self.expand_scale.to(x) * self.expand(self.damp * even(x))


class Tower(nn.Module):
    """Storeys up to the middle leave their output behind; those above take it up again, the last first."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.softcap, self.middle = cfg.softcap, cfg.storeys // 2
        self.lookup = nn.Embedding(cfg.vocab, cfg.dim)
        self.pairs = PairTable(cfg.pair_rows, cfg.pair_dim, cfg.dim) if cfg.pair_rows > 0 else None
        self.smear = Smear(cfg.dim)
        self.storeys = nn.ModuleList(Storey(cfg, number) for number in range(cfg.storeys))
        self.stairs = nn.Parameter(torch.ones(self.middle, cfg.dim))
        self.exit = None if cfg.tied else Proj(cfg.dim, cfg.vocab)
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        self.lookup.weight.normal_(std=0.005)
        if self.pairs is not None:
            self.pairs.vectors.weight.zero_()
        for part in self.modules():
            if isinstance(part, Proj):
                nn.init.zeros_(part.weight) if part.silent else nn.init.orthogonal_(part.weight)

    def trunk(self, ids: Tensor) -> Tensor:
        """The last storey's output, evened: batch, position, channel."""
        ground = self.lookup(ids) if self.pairs is None else self.lookup(ids) + self.pairs(ids)
        ground = self.smear(even(ground))
        x, left = ground, []
        for number, storey in enumerate(self.storeys):
            if number >= self.middle and left:
                x = x + self.stairs[number - self.middle].to(x) * left.pop()
            x = storey(x, ground)
            if number < self.middle:
                left.append(x)
        return even(x)

    def scores(self, ids: Tensor) -> Tensor:
        """Scores over the vocabulary at each position, softly capped."""
        x = self.trunk(ids)
        raw = self.exit(x) if self.exit is not None else x @ self.lookup.weight.to(x).T
        return self.softcap * (raw / self.softcap).tanh()

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return token_losses(self.scores(ids), targets).mean()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, in the targets' shape."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def new_tower(cfg: Config, device: torch.device) -> Tower:
    """On its card: tables in bf16, the rest in fp32."""
    tower = Tower(cfg).to(device)
    for part in tower.modules():
        if isinstance(part, nn.Embedding):
            part.bfloat16()
    return tower


# ============================================================================
# Muon
# ============================================================================


def levelled(grad: Tensor, rounds: int) -> Tensor:
    """The matrix with its singular values pushed towards one, in bf16: x <- 3.4445 x + (-4.7750 s + 2.0315 s s) x, s = x xT."""
    lying = grad.size(0) <= grad.size(1)
    x = (grad if lying else grad.mT).to(torch.bfloat16)
    x = x.div(torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(rounds):
        s = x.matmul(x.mT)
        s = s.mul(-4.7750) + s.matmul(s).mul(2.0315)
        x = x.mul(3.4445) + s.matmul(x)
    return x if lying else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, levelled. Equal shapes are handled in one go by one process and handed to the others."""

    def __init__(self, matrices: list[nn.Parameter], place: Place, lr: float, momentum: float, rounds: int, decay: float):
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": same} for same in by_shape.values()], {"lr": lr, "momentum": momentum, "decay": decay})
        self.place, self.rounds = place, rounds

    def wanted(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        run = self.state[matrix].setdefault("run", torch.zeros_like(matrix))
        run.lerp_(matrix.grad, 1 - momentum)
        return levelled(torch.lerp(matrix.grad, run, momentum), self.rounds)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            same = group["params"]
            stretch = max(1.0, same[0].size(0) / same[0].size(1)) ** 0.5
            made = torch.zeros(len(same), *same[0].shape, dtype=torch.bfloat16, device=same[0].device)
            for number in range(self.place.rank, len(same), self.place.world):
                if same[number].grad is not None:
                    made[number] = self.wanted(same[number], group["momentum"])
            self.place.add(made)
            for matrix, update in zip(same, made, strict=True):
                matrix.mul_(1 - group["lr"] * group["decay"])
                matrix.add_(update, alpha=-group["lr"] * stretch)


# ============================================================================
# Scorer
# ============================================================================


def window_plan(n_targets: int, width: int, stride: int) -> list[int]:
    """Starts of the windows. One at w pays for the targets from w + width - stride on, the first for all of its own."""
    later = range(stride, n_targets - width + stride, stride)
    return [0, *later]


def packs(things: list, size: int) -> Iterator[list]:
    for at in range(0, len(things), size):
        yield things[at : at + size]


class Score(NamedTuple):
    """Nats a token, bits a byte."""

    loss: float
    bpb: float


def per_byte(nats: Tensor, priced: Tensor, nbytes: Tensor) -> Score:
    loss = (nats / priced).item()
    return Score(loss, loss / math.log(2.0) * (priced / nbytes).item())


class Pupil:
    """A tower that learns from text it is given, by SGD; its lowest storeys are left alone."""

    def __init__(self, cfg: Config, net: Tower, place: Place) -> None:
        self.cfg, self.net, self.place = cfg, net, place
        fixed = {id(p) for storey in net.storeys[: cfg.adapt_frozen] for p in storey.parameters()}
        self.learnt = [p for p in net.parameters() if id(p) not in fixed]
        for p in net.parameters():
            p.requires_grad_(id(p) not in fixed)
        self.optimizer = torch.optim.SGD(self.learnt, lr=cfg.adapt_lr, momentum=cfg.adapt_momentum)

    def learn(self, ids: Tensor, done: float) -> None:
        """Some epochs over the rows of `ids` (tokens, one more than the rows take); done: how far through, 0 to 1."""
        cfg, length = self.cfg, self.cfg.eval_len
        rank, world, device = self.place
        rows = (len(ids) - 1) // length
        first, last = rows * rank // world, rows * (rank + 1) // world
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.adapt_lr * (0.5 + 0.5 * math.cos(math.pi * done))
        self.net.train()
        for _ in range(cfg.adapt_epochs):
            for row in range(first, last, cfg.adapt_rows):
                upto = min(row + cfg.adapt_rows, last)
                part = ids[row * length : upto * length + 1].to(device, torch.int64)
                self.optimizer.zero_grad()
                with half():
                    loss = self.net(part[:-1].view(-1, length), part[1:].view(-1, length))
                loss.backward()
                for p in self.learnt:
                    if p.grad is not None:
                        p.grad /= world
                        self.place.add(p.grad)
                nn.utils.clip_grad_norm_(self.learnt, cfg.adapt_limit)
                self.optimizer.step()


class Scorer:
    """The passes over the held-out tokens."""

    def __init__(self, cfg: Config, place: Place, split: Tensor, table: ByteTable, log: Diary) -> None:
        self.cfg, self.place, self.split, self.table, self.log = cfg, place, split, table, log
        self.n_targets = len(split) - 1

    def nothing(self) -> list[Tensor]:
        """Nats, targets and bytes so far."""
        return [torch.zeros([], dtype=torch.float64, device=self.place.device) for _ in range(3)]

    def cut(self, batch: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Inputs and targets of the windows that start there, and the length of each (the last may be shorter)."""
        width = self.cfg.eval_len
        x = torch.zeros(len(batch), width, dtype=torch.int64)
        y = torch.zeros(len(batch), width, dtype=torch.int64)
        lengths = [min(width, self.n_targets - start) for start in batch]
        for i, start in enumerate(batch):
            x[i, : lengths[i]] = self.split[start : start + lengths[i]]
            y[i, : lengths[i]] = self.split[start + 1 : start + lengths[i] + 1]
        return x.to(self.place.device), y.to(self.place.device), lengths

    def by_blocks(self, model: nn.Module) -> Score:
        """Rows side by side, each without a past. For the curve, and to see what rounding costs."""
        length = self.cfg.train_len
        starts = list(range(0, self.n_targets - length + 1, length))
        nats, priced, nbytes = self.nothing()
        model.eval()
        with torch.inference_mode():
            for batch in packs(self.place.share(starts), max(1, self.cfg.look_tokens // (self.place.world * length))):
                rows = self.split[batch[0] : batch[-1] + length + 1].to(self.place.device, torch.int64)
                x, y = rows[:-1].view(-1, length), rows[1:].view(-1, length)
                with half():
                    mean = model(x, y)
                nats += mean.double() * y.numel()
                priced += y.numel()
                nbytes += self.table(x, y).sum()
        self.place.add(nats, priced, nbytes)
        model.train()
        return per_byte(nats, priced, nbytes)

    def by_windows(self, net: Tower) -> Score:
        """Windows that overlap, with fixed weights: every target is paid once, most of them late in a window."""
        cfg = self.cfg
        width, stride = cfg.eval_len, cfg.stride
        windows = window_plan(self.n_targets, width, stride)
        nats, priced, nbytes = self.nothing()
        net.eval()
        predict = torch.compile(net.scores, dynamic=False, fullgraph=True)
        with torch.inference_mode():
            for batch in packs(self.place.share(windows), cfg.eval_rows):
                x, y, lengths = self.cut(batch)
                with half():
                    logits = predict(x)
                nll = token_losses(logits.float() / cfg.temperature, y)
                for i, start in enumerate(batch):
                    since, upto = 0 if start == 0 else width - stride, lengths[i]
                    paid = nll[i, since:upto].double()
                    nats += paid.sum()
                    priced += upto - since
                    nbytes += self.table(x[i, since:upto], y[i, since:upto]).sum()
        self.place.add(nats, priced, nbytes)
        net.train()
        return per_byte(nats, priced, nbytes)

    def chunks_of_windows(self) -> list[list[int]]:
        """The windows by the chunk in which the first target lies that they pay for."""
        width, stride, chunk = self.cfg.eval_len, self.cfg.stride, self.cfg.adapt_chunk
        chunks: list[list[int]] = [[] for _ in range(-(-self.n_targets // chunk))]
        for start in window_plan(self.n_targets, width, stride):
            pays_from = start + width - stride if start else 0
            chunks[pays_from // chunk].append(start)
        return chunks

    def score_first(self, net: Tower) -> Score:
        """Chunk by chunk: pay for all of its windows, and only then let the weights learn from it.

        So a chunk is paid by weights that know the chunks before it and nothing else. Nobody learns from the last.
        """
        cfg = self.cfg
        width, stride, chunk = cfg.eval_len, cfg.stride, cfg.adapt_chunk
        chunks = self.chunks_of_windows()
        nats, priced, nbytes = self.nothing()
        pupil = Pupil(cfg, net, self.place)
        begun = stamp()
        self.log(f"score first: {len(chunks)} chunks of {chunk}, {cfg.adapt_epochs} epochs at {cfg.adapt_lr}")

        for c in range(len(chunks)):
            # the price
            due = chunks[c]
            net.eval()
            with torch.inference_mode():
                for batch in packs(self.place.share(due), cfg.eval_rows):
                    x, y, lengths = self.cut(batch)
                    with half():
                        logits = net.scores(x)
                    nll = token_losses(logits, y)
                    for i, start in enumerate(batch):
                        since, upto = 0 if start == 0 else width - stride, lengths[i]
                        nats += nll[i, since:upto].double().sum()
                        priced += upto - since
                        nbytes += self.table(x[i, since:upto], y[i, since:upto]).sum()

            # the lesson: what has just been paid
            is_last = c == len(chunks) - 1
            if not is_last and cfg.adapt_epochs > 0:
                lesson = self.split[c * chunk : (c + 1) * chunk + 1]
                pupil.learn(lesson, c / max(len(chunks) - 1, 1))
            if c % 100 == 0 or is_last:
                so_far = (nats / priced.clamp_min(1)).item()
                self.log(f"  chunk {c + 1} of {len(chunks)}: {so_far:.5f} nats a token here, {stamp() - begun:.0f}ms")

        self.place.add(nats, priced, nbytes)
        net.requires_grad_(True)
        net.eval()
        return per_byte(nats, priced, nbytes)


# ============================================================================
# Trainer
# ============================================================================


class Trainer:
    """A tower and its ten minutes, less what rounding needs of them."""

    def __init__(self, cfg: Config, place: Place, scorer: Scorer, log: Diary) -> None:
        self.cfg, self.place, self.scorer, self.log = cfg, place, scorer, log
        self.net = new_tower(cfg, place.device)
        self.model = torch.compile(self.net, dynamic=False, fullgraph=True)
        if dist.is_initialized():
            self.model = DistributedDataParallel(self.model, device_ids=[place.device.index], broadcast_buffers=False)
        self.step, self.spent = 0, 0.0
        # moments and rounding read training text too, so their seconds are kept out of the loop's
        self.cap = 1000.0 * (cfg.clock_seconds - cfg.reserve_seconds)
        self.choose_optimizers()
        self.text = TrainingText(cfg.train_glob, place)

    def choose_optimizers(self) -> None:
        """Matrices of the storeys (and the pairs' way in) to Muon, the tables and all vectors to AdamW."""
        cfg, tables, matrices, vectors = self.cfg, [], [], []
        for name, weight in self.net.named_parameters():
            if name in ("lookup.weight", "pairs.vectors.weight"):
                tables.append(weight)
            elif name.endswith(".weight"):
                matrices.append(weight)
            else:
                vectors.append(weight)
        shared = {"betas": (cfg.beta_one, cfg.beta_two), "eps": cfg.adam_eps, "weight_decay": cfg.other_decay}
        self.muon = Muon(matrices, self.place, cfg.matrix_lr, cfg.momentum, cfg.ns_rounds, cfg.matrix_decay)
        self.optimizers = [
            torch.optim.AdamW(tables, lr=cfg.table_lr, fused=True, **shared),
            torch.optim.AdamW(vectors, lr=cfg.vector_lr, fused=True, **shared),
            self.muon,
        ]
        self.full_lr = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def gradients(self) -> Tensor:
        """Adds up the gradients of the next step; its mean loss on this process."""
        cfg, parts = self.cfg, self.place.parts
        train_loss = torch.zeros([], device=self.place.device)
        self.net.zero_grad(set_to_none=True)
        for part in range(parts):
            x, y = self.text.batch(cfg.step_tokens, cfg.train_len, parts)
            if isinstance(self.model, DistributedDataParallel):
                self.model.require_backward_grad_sync = part == parts - 1
            with half():
                loss = self.model(x, y)
            train_loss += loss.detach() / parts
            loss.div(parts).backward()
        return train_loss

    def update(self, scale: float) -> None:
        """One step of all optimisers, at `scale` of their rates."""
        cfg = self.cfg
        warm = min(1.0, self.step / cfg.momentum_steps) if cfg.momentum_steps else 1.0
        for group in self.muon.param_groups:
            group["momentum"] = cfg.momentum_from * (1 - warm) + cfg.momentum * warm
        if cfg.grad_limit > 0:
            nn.utils.clip_grad_norm_(self.net.parameters(), cfg.grad_limit)
        for optimizer, rates in zip(self.optimizers, self.full_lr, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimizer.step()

    def dry_run(self) -> None:
        """Steps that count for nothing: they make the kernels. Weights, optimisers and text begin anew after them."""
        if self.cfg.dry_steps <= 0:
            return
        weights = copy.deepcopy(self.net.state_dict())
        for _ in range(self.cfg.dry_steps):
            self.gradients()
            self.update(1.0)
        self.net.load_state_dict(weights)
        self.choose_optimizers()
        self.text = TrainingText(self.cfg.train_glob, self.place)
        self.log(f"warmup_step:{self.cfg.dry_steps}/{self.cfg.dry_steps}")

    def scale(self, ms: float) -> float:
        """1 until cooldown_steps are left by the clock, then down to 0 with it."""
        if self.step == 0 or self.cfg.cooldown_steps <= 0:
            return 1.0
        steps_left = max(self.cap - ms, 0.0) / (ms / self.step)
        return min(1.0, steps_left / self.cfg.cooldown_steps)

    def pace(self, ms: float) -> str:
        return f"train_time:{ms:.0f}ms step_avg:{ms / max(self.step, 1):.2f}ms"

    def run(self) -> None:
        """Until steps or time are used up. self.spent is the time it took, in milliseconds."""
        cfg, net, log = self.cfg, self.net, self.log
        self.ema = {name: value.clone().float() for name, value in net.state_dict().items()}
        self.swa: dict[str, Tensor] | None = None
        self.swa_count = 0
        stop_at = cfg.max_steps
        self.step = 0
        since = stamp()
        while True:
            last = self.step >= stop_at
            if last or (cfg.look_every > 0 and self.step % cfg.look_every == 0):
                self.spent += stamp() - since
                seen = self.scorer.by_blocks(self.model)
                log(f"step:{self.step}/{cfg.max_steps} val_loss:{seen.loss:.4f} val_bpb:{seen.bpb:.4f} {self.pace(self.spent)}")
                since = stamp()
            if last:
                break
            scale = self.scale(self.spent + 1000 * time.perf_counter() - since)
            train_loss = self.gradients()
            self.update(scale)
            self.average(scale)
            self.step += 1
            ms = self.spent + 1000 * time.perf_counter() - since
            if cfg.tell_every > 0 and (self.step <= 10 or self.step % cfg.tell_every == 0):
                log(f"step:{self.step}/{cfg.max_steps} train_loss:{train_loss.item():.4f} {self.pace(ms)}")
            if self.anyone(ms >= self.cap):
                stop_at = min(stop_at, self.step)
        if self.step < cfg.max_steps:
            log(f"stopping_early: wallclock_cap train_time:{self.spent:.0f}ms step:{self.step}/{cfg.max_steps}")
        log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")

    def anyone(self, yes: bool) -> bool:
        """Whether it is so on any process; the same answer on all of them, or some would wait for ever."""
        votes = torch.tensor(float(yes), device=self.place.device)
        self.place.add(votes)
        return votes.item() > 0

    @torch.no_grad()
    def average(self, scale: float) -> None:
        """EMA at each step; late snapshots for SWA if wanted."""
        cfg = self.cfg
        now = {name: value.float() for name, value in self.net.state_dict().items()}
        for name, value in now.items():
            self.ema[name].lerp_(value, 1.0 - cfg.ema_keep)
        if cfg.swa_on and scale < 0.2 and self.step % cfg.swa_every == 0:
            self.swa_count += 1
            self.swa = {name: value.cpu() + (0 if self.swa is None else self.swa[name]) for name, value in now.items()}

    def settle(self) -> None:
        """The average takes the place of the last weights; a setting says which, nothing is measured."""
        cfg, net, log = self.cfg, self.net, self.log
        if cfg.swa_on and self.swa is not None:
            log(f"swa: applying average of {self.swa_count} snapshots")
            averaged = {name: total / self.swa_count for name, total in self.swa.items()}
        else:
            log("ema: applying EMA weights")
            averaged = self.ema
        own = net.state_dict()
        net.load_state_dict({name: averaged[name].to(own[name]) for name in own})


# ============================================================================
# Rounder
# ============================================================================


class Rounder:
    """Weights to codes and back. Large matrices are rounded so that errors are made good where inputs move together."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.moments: dict[str, Tensor] = {}

    def watch(self, net: Tower, text: TrainingText, place: Place) -> None:
        """Second moments of what enters each large matrix, over batches of the text."""
        cfg = self.cfg
        seen: dict[str, int] = {}

        def listen(name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            seen[name] = seen.get(name, 0) + len(rows)
            self.moments[name] = self.moments.get(name, 0) + rows.T @ rows

        ears = []
        for name, part in net.named_modules():
            if isinstance(part, Proj) and part.weight.numel() > SMALL:
                ears.append(part.register_forward_pre_hook(lambda m, i, name=name: listen(f"{name}.weight", m, i)))
        net.eval()
        with torch.inference_mode(), half():
            for _ in range(cfg.calib_batches):
                x, _y = text.batch(cfg.step_tokens, cfg.train_len, place.parts)
                net.scores(x)
        for ear in ears:
            ear.remove()
        self.moments = {name: total / seen[name] for name, total in self.moments.items()}

    def by_moments(self, weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (int8) and a step for each row. Columns in order of their input's power, the strongest first."""
        cfg, top = self.cfg, 2 ** (self.cfg.bits - 1) - 1
        power = moment.diagonal()
        order = power.argsort(descending=True)
        dead = (power == 0)[order]
        rest = weight.detach().float()[:, order]
        rest[:, dead] = 0
        steps = (rest.std(dim=1) * 12.85 / top).clamp_min(1e-10).half()
        room = moment.float()[order][:, order] + torch.diag(cfg.gptq_damp * power.mean() + dead.float())
        spread = torch.linalg.cholesky(torch.linalg.inv(room), upper=True)
        codes = torch.empty_like(rest)
        for left in range(0, rest.size(1), cfg.gptq_block):
            block = range(left, min(left + cfg.gptq_block, rest.size(1)))
            missed = []
            for j in block:
                codes[:, j] = (rest[:, j] / steps).round().clamp(-top, top)
                missed.append((rest[:, j] - codes[:, j] * steps) / spread[j, j])
                rest[:, j:block.stop] -= torch.outer(missed[-1], spread[j, j : block.stop])
            rest[:, block.stop :] -= torch.stack(missed, dim=1) @ spread[left : block.stop, block.stop :]
        return codes[:, order.argsort()].to(torch.int8), steps

    def by_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Eight bits, each row as far as nearly all of its values reach; for tables, which have no inputs."""
        reach = torch.quantile(weight.float().abs(), 0.9999970, dim=1)
        steps = (reach.clamp_min(1e-8) / 127).half()
        codes = (weight.float() / steps.float()[:, None]).round().clamp(-127, 127)
        return codes.to(torch.int8), steps

    def encode(self, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """Name to (values) for what is small, to (codes, steps) for what is large."""
        packed: dict[str, tuple[Tensor, ...]] = {}
        for name, weight in weights.items():
            if weight.numel() <= SMALL:
                packed[name] = (weight.half().cpu(),)
            elif name in self.moments:
                packed[name] = tuple(part.cpu() for part in self.by_moments(weight, self.moments[name]))
            else:
                packed[name] = tuple(part.cpu() for part in self.by_rows(weight))
        return packed

    def decode(self, packed: dict[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
        weights = {}
        for name, parts in packed.items():
            weights[name] = parts[0].float() if len(parts) == 1 else parts[0].float() * parts[1].float()[:, None]
        return weights


SMALL = 65_536  # up to so many values, a tensor is kept in fp16
PACKER = "lzma" if zstandard is None else "zstd"


def squeeze(raw: bytes) -> bytes:
    return lzma.compress(raw, preset=9) if zstandard is None else zstandard.compress(raw, 22)


def unsqueeze(blob: bytes) -> bytes:
    return lzma.decompress(blob) if zstandard is None else zstandard.decompress(blob)


# ============================================================================
# The run
# ============================================================================


def surroundings() -> str:
    """Cards and driver as nvidia-smi tells them."""
    try:
        told = subprocess.run(["nvidia-smi"], capture_output=True, text=True)
    except OSError as error:
        return f"nvidia-smi: {error}"
    return told.stdout


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    cfg = Config()
    place = Place.take()
    cfg.check(place.world)
    log = Diary(cfg.run, place)
    log.keep(code)
    log.keep(surroundings())
    log.keep(f"Running Python {sys.version}")
    log.keep(f"Running PyTorch {torch.__version__}")
    torch.set_float32_matmul_precision("high")
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)

    # what is read
    sp = spm.SentencePieceProcessor(model_file=cfg.speller)
    table = ByteTable(sp, cfg.vocab, place.device)
    split = held_out(cfg.held_glob, max(cfg.train_len, cfg.eval_len))
    log(f"val_loader:shards pattern={cfg.held_glob} tokens:{len(split) - 1}")
    scorer = Scorer(cfg, place, split, table, log)

    # training
    trainer = Trainer(cfg, place, scorer, log)
    net = trainer.net
    log(f"model_params:{sum(p.numel() for p in net.parameters())}")
    log(f"world_size:{place.world} grad_accum_steps:{place.parts} seed:{cfg.seed}")
    trainer.dry_run()
    trainer.run()
    trainer.settle()

    # rounding, while the ten minutes last
    calib_begun = stamp()
    calib_text = TrainingText(cfg.train_glob, place)
    rounder = Rounder(cfg)
    rounder.watch(net, calib_text, place)
    calib_ms = stamp() - calib_begun
    log(f"gptq:calibration on train shards took {calib_ms:.0f}ms, train+gptq {trainer.spent + calib_ms:.0f}ms")
    assert trainer.spent + calib_ms < 1000.0 * cfg.clock_seconds, "the moments were measured after the ten minutes"

    packed = rounder.encode(net.state_dict())
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    blob = squeeze(buffer.getvalue())
    code_bytes = len(code.encode("utf-8"))
    if place.rank == 0:
        Path("final_model.ptz").write_bytes(blob)
        log(f"Serialized model {PACKER}: {len(blob)} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size: {len(blob) + code_bytes} bytes")
        if len(blob) + code_bytes > 16_000_000:
            raise SystemExit(f"{len(blob) + code_bytes - 16_000_000} bytes too many")
    place.wait()

    # from here on everything comes out of the file
    opened = torch.load(io.BytesIO(unsqueeze(Path("final_model.ptz").read_bytes())), map_location="cpu")
    frozen = new_tower(cfg, place.device)
    frozen.load_state_dict(rounder.decode(opened))

    blocks_begun = stamp()
    blocks = scorer.by_blocks(frozen)
    took = stamp() - blocks_begun
    log(f"final_roundtrip val_loss:{blocks.loss:.4f} val_bpb:{blocks.bpb:.4f} eval_time:{took:.0f}ms")

    if cfg.stride > 0:
        slide_begun = stamp()
        slide = scorer.by_windows(frozen)
        took = stamp() - slide_begun
        log(
            f"final_sliding_window val_loss:{slide.loss:.4f} val_bpb:{slide.bpb:.4f} "
            f"stride:{cfg.stride} eval_time:{took:.0f}ms"
        )
        log(f"final_sliding_window_exact val_loss:{slide.loss:.8f} val_bpb:{slide.bpb:.8f}")

    if cfg.adapt:
        adapt_begun = stamp()
        adapted = scorer.score_first(frozen)
        took = stamp() - adapt_begun
        log(f"legal_ttt val_loss:{adapted.loss:.4f} val_bpb:{adapted.bpb:.4f} eval_time:{took:.0f}ms")
        log(f"legal_ttt_exact val_loss:{adapted.loss:.8f} val_bpb:{adapted.bpb:.8f}")

    place.leave()


if __name__ == "__main__":
    main()
