"""Oronsay: SP8192 with folded case, looped GQA transformer, GPTQ int6, phased global test-time training, hint tilt.

One file. It trains for at most TRAIN_SECONDS on eight H100s, spends the last seconds of that time on GPTQ, writes
one artifact, loads it again and scores the validation split document by document:

  * the documents fall into PHASES contiguous groups; within a group they are dealt over the ranks;
  * a document gets a fresh LoRA, is scored chunk by chunk, and the LoRA learns from a chunk once it is scored;
  * when all ranks have scored a group, the base weights take a few SGD steps on that group, the same on every rank;
  * a token-level n-gram (the document so far, and the groups before) names a hint, and the distribution is tilted
    towards it: p(a) * exp(beta * [a is the hint]) / (1 + p(hint) * (exp(beta) - 1)).

The tokens are those of a text whose ASCII capitals are folded: a capital is a mark and the small letter. Folding is
undone exactly by `unfold_case`. The marks are no text of the original, so a sidecar beside the validation shards says
for every token how many of its bytes are marks; these are taken off before bytes are summed.
"""

import glob
import io
import itertools
import json
import lzma
import math
import os
import random
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import brotli
except ImportError:
    brotli = None

# ----------------------------------------------------------------------------------------------------------------------
# settings: every one is an environment variable of the same name in capitals


def knob(name: str, default):
    """A dataclass field that reads the environment when the settings are made."""

    def read():
        raw = os.environ.get(name)
        if raw is None:
            return default
        if isinstance(default, bool):
            return raw.strip().lower() in ("1", "true", "yes", "on")
        return type(default)(raw)

    return field(default_factory=read)


@dataclass(frozen=True)
class Settings:
    # data
    data_dir: str = knob("DATA_DIR", "./data/datasets/fineweb10B_sp8192_folded")
    train_glob: str = knob("TRAIN_GLOB", "fineweb_train_*.bin")
    val_glob: str = knob("VAL_GLOB", "fineweb_val_[0-9]*.bin")
    surplus_glob: str = knob("SURPLUS_GLOB", "fineweb_val_surplus_*.bin")
    tokenizer: str = knob("TOKENIZER", "./data/tokenizers/fineweb_8192_folded.model")
    vocab: int = knob("VOCAB", 8192)
    bos_id: int = knob("BOS_ID", 1)
    val_docs: int = knob("VAL_DOCS", 50_000)
    holdout_tokens: int = knob("HOLDOUT_TOKENS", 4_194_304)

    # model
    depth: int = knob("DEPTH", 11)
    width: int = knob("WIDTH", 512)
    heads: int = knob("HEADS", 8)
    kv_heads: int = knob("KV_HEADS", 4)
    mlp_ratio: float = knob("MLP_RATIO", 4.0)
    rope_dims: int = knob("ROPE_DIMS", 16)
    rope_base: float = knob("ROPE_BASE", 10_000.0)
    loop_first: int = knob("LOOP_FIRST", 3)
    loop_last: int = knob("LOOP_LAST", 5)
    loop_from: float = knob("LOOP_FROM", 0.35)
    qk_gain: float = knob("QK_GAIN", 5.0)
    softcap: float = knob("SOFTCAP", 30.0)
    smear_dims: int = knob("SMEAR_DIMS", 12)
    parallel_from: int = knob("PARALLEL_FROM", 8)

    # training
    seed: int = knob("SEED", 1337)
    steps: int = knob("STEPS", 20_000)
    batch_tokens: int = knob("BATCH_TOKENS", 786_432)
    seq_len: int = knob("SEQ_LEN", 2048)
    train_seconds: float = knob("TRAIN_SECONDS", 598.0)
    quant_reserve: float = knob("QUANT_RESERVE", 14.0)
    warmup_steps: int = knob("WARMUP_STEPS", 20)
    cooldown: float = knob("COOLDOWN", 0.72)
    matrix_lr: float = knob("MATRIX_LR", 0.022)
    embed_lr: float = knob("EMBED_LR", 0.6)
    scalar_lr: float = knob("SCALAR_LR", 0.02)
    muon_momentum: float = knob("MUON_MOMENTUM", 0.97)
    muon_rounds: int = knob("MUON_ROUNDS", 5)
    muon_decay: float = knob("MUON_DECAY", 0.095)
    beta1: float = knob("BETA1", 0.9)
    beta2: float = knob("BETA2", 0.95)
    clip: float = knob("CLIP", 0.3)
    ema_decay: float = knob("EMA_DECAY", 0.9965)
    log_every: int = knob("LOG_EVERY", 250)

    # quantisation
    calib_batches: int = knob("CALIB_BATCHES", 64)
    calib_rows: int = knob("CALIB_ROWS", 16)
    matrix_bits: int = knob("MATRIX_BITS", 6)
    embed_bits: int = knob("EMBED_BITS", 7)
    matrix_sigmas: float = knob("MATRIX_SIGMAS", 12.85)
    embed_sigmas: float = knob("EMBED_SIGMAS", 15.0)
    gptq_block: int = knob("GPTQ_BLOCK", 128)
    gptq_damp: float = knob("GPTQ_DAMP", 0.01)
    artifact: str = knob("ARTIFACT", "oronsay.bin")
    size_limit: int = knob("SIZE_LIMIT", 16_000_000)

    # evaluation
    eval_seconds: float = knob("EVAL_SECONDS", 600.0)
    adapt_until: float = knob("ADAPT_UNTIL", 520.0)
    phases: int = knob("PHASES", 4)
    item_tokens: int = knob("ITEM_TOKENS", 65_536)
    item_docs: int = knob("ITEM_DOCS", 64)
    chunk: int = knob("CHUNK", 64)
    window: int = knob("WINDOW", 2048)
    lora_rank: int = knob("LORA_RANK", 96)
    lora_lr: float = knob("LORA_LR", 1e-4)
    lora_decay: float = knob("LORA_DECAY", 0.5)
    lora_seed: int = knob("LORA_SEED", 77)
    base_steps: int = knob("BASE_STEPS", 24)
    base_rows: int = knob("BASE_ROWS", 8)
    base_lr: float = knob("BASE_LR", 1e-3)
    base_momentum: float = knob("BASE_MOMENTUM", 0.9)
    hint_on: bool = knob("HINT_ON", True)
    hint_strong: float = knob("HINT_STRONG", 1.6)
    hint_weak: float = knob("HINT_WEAK", 0.55)
    hint_book: float = knob("HINT_BOOK", 0.8)
    hint_share: float = knob("HINT_SHARE", 0.5)
    hint_count: int = knob("HINT_COUNT", 3)

    def path(self, pattern: str) -> str:
        return os.path.join(self.data_dir, pattern)


# ----------------------------------------------------------------------------------------------------------------------
# ranks, clocks, the log


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        torch.cuda.synchronize()
        if self.size > 1:
            dist.barrier()

    def total(self, thing: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(thing, op=dist.ReduceOp.SUM)
        return thing

    def mean(self, thing: Tensor) -> Tensor:
        return self.total(thing).div_(self.size)

    def largest(self, number: float) -> float:
        """The largest of the ranks' numbers: all ranks take the same decision by it."""
        cell = torch.tensor([number], device=self.device, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(cell, op=dist.ReduceOp.MAX)
        return float(cell.item())


def open_world() -> World:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl", device_id=device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return World(rank, size, device)


class Stopwatch:
    """Wall-clock seconds since it was made, the GPU's queue drained."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def __call__(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.began


def make_log(world: World, run_id: str) -> Callable[[str], None]:
    """A closure that prints on the chief and keeps the lines in a file."""
    target = Path("logs") / f"{run_id}.txt"
    if world.chief:
        target.parent.mkdir(exist_ok=True)

    def log(line: str) -> None:
        if not world.chief:
            return
        print(line, flush=True)
        with target.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log


# ----------------------------------------------------------------------------------------------------------------------
# shards

HEADER_INTS = 256
MAGIC = 20240520


def shard_tokens(path: str) -> np.ndarray:
    """The uint16 values of a shard, mapped rather than read."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != 1:
        raise ValueError(f"{path}: not a shard")
    count = int(header[2])
    body = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_INTS * 4)
    if len(body) != count:
        raise ValueError(f"{path}: {len(body)} values where the header says {count}")
    return body


def shard_paths(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(pattern)
    return found


def endless_spans(h: Settings, world: World, rows: int) -> Iterator[np.ndarray]:
    """Spans of rows * seq_len + 1 training tokens for this rank, shard after shard, for ever.

    The last holdout_tokens of the last shard are left out: they are kept for calibration.
    """
    need = rows * h.seq_len + 1
    paths = shard_paths(h.path(h.train_glob))
    for lap in itertools.count():
        order = list(paths)
        random.Random(h.seed + lap).shuffle(order)
        for path in order:
            body = shard_tokens(path)
            usable = len(body) - (h.holdout_tokens if path == paths[-1] else 0)
            shift = random.Random(f"{h.seed}-{lap}-{path}").randrange(h.seq_len)
            stride = world.size * rows * h.seq_len
            for base in range(shift, usable - stride - 1, stride):
                start = base + world.rank * rows * h.seq_len
                yield np.asarray(body[start : start + need])


def held_back_rows(h: Settings, world: World) -> Iterator[np.ndarray]:
    """Rows of seq_len tokens out of the held-back end of the last training shard, this rank's share."""
    body = shard_tokens(shard_paths(h.path(h.train_glob))[-1])
    tail = body[max(len(body) - h.holdout_tokens, 0) :]
    for index in range(world.rank, len(tail) // h.seq_len, world.size):
        yield np.asarray(tail[index * h.seq_len : (index + 1) * h.seq_len])


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).pin_memory().to(device, non_blocking=True)


def training_batches(h: Settings, world: World, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    for span in endless_spans(h, world, rows):
        ids = to_device(span, world.device)
        yield ids[:-1].view(rows, h.seq_len), ids[1:].view(rows, h.seq_len)


def ahead(items: Iterator, depth: int = 2) -> Iterator:
    """The same items, `depth` of them asked for before they are wanted, so that copies overlap with work."""
    ready: deque = deque(itertools.islice(items, depth))
    while ready:
        yield ready.popleft()
        ready.extend(itertools.islice(items, 1))


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer: folded case, bytes of a token

SPACE_MARK = "\u2581"
CAPITAL_MARK = "\ue001"
CAPITALS_MARK = "\ue002"
SHOUT_END = "\ue003"


def fold_case(text: str) -> str:
    """ASCII capitals as marks: one before a capital, a pair of marks round a run of two capitals or more."""
    out: list[str] = []
    for is_capital, run in itertools.groupby(text, lambda c: "A" <= c <= "Z"):
        letters = "".join(run)
        if not is_capital:
            out.append(letters)
        elif len(letters) == 1:
            out.append(CAPITAL_MARK + letters.lower())
        else:
            out.append(CAPITALS_MARK + letters.lower() + SHOUT_END)
    return "".join(out)


def unfold_case(text: str) -> str:
    """What fold_case was given. The marks are private code points that no document holds."""
    out: list[str] = []
    shouting = next_up = False
    for c in text:
        if c == CAPITAL_MARK:
            next_up = True
        elif c == CAPITALS_MARK:
            shouting = True
        elif c == SHOUT_END:
            shouting = False
        else:
            out.append(c.upper() if shouting or next_up else c)
            next_up = False
    return "".join(out)


class ByteTables(NamedTuple):
    """By token: its bytes without a leading space, whether it has one, and whether it is a control token."""

    plain: np.ndarray
    spaced: np.ndarray
    control: np.ndarray


def byte_tables(sp: spm.SentencePieceProcessor, vocab: int) -> ByteTables:
    size = max(vocab, sp.vocab_size())
    plain = np.zeros(size, dtype=np.int16)
    spaced = np.zeros(size, dtype=np.bool_)
    control = np.ones(size, dtype=np.bool_)
    for token in range(sp.vocab_size()):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        control[token] = False
        if sp.is_byte(token):
            plain[token] = 1
            continue
        piece = sp.id_to_piece(token)
        spaced[token] = piece.startswith(SPACE_MARK)
        plain[token] = len(piece.removeprefix(SPACE_MARK).replace(SPACE_MARK, " ").encode("utf-8"))
    return ByteTables(plain, spaced, control)


def folded_bytes(tokens: np.ndarray, tables: ByteTables) -> np.ndarray:
    """The bytes of each token in the folded text. A space at the very start of a document was never there."""
    counts = tables.plain[tokens].astype(np.int32)
    counts[1:] += tables.spaced[tokens[1:]] & ~tables.control[tokens[:-1]]
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# the validation split


@dataclass(frozen=True)
class Split:
    """Tokens, the bytes of the original text behind each, and where documents begin (with the end of the last)."""

    tokens: np.ndarray
    origin_bytes: np.ndarray
    edges: np.ndarray

    def __len__(self) -> int:
        return len(self.edges) - 1

    def length(self, doc: int) -> int:
        return int(self.edges[doc + 1] - self.edges[doc])

    def ids(self, doc: int) -> np.ndarray:
        return self.tokens[self.edges[doc] : self.edges[doc + 1]]

    @property
    def predicted(self) -> int:
        """All tokens but the one that opens a document, which stands for no byte."""
        return len(self.tokens) - len(self)


def load_split(h: Settings, tables: ByteTables) -> Split:
    tokens = np.concatenate([shard_tokens(path) for path in shard_paths(h.path(h.val_glob))])
    surplus = np.concatenate([shard_tokens(path) for path in shard_paths(h.path(h.surplus_glob))])
    if len(tokens) != len(surplus):
        raise ValueError(f"the sidecar has {len(surplus)} values for {len(tokens)} tokens")
    starts = np.flatnonzero(tokens == h.bos_id)
    if len(starts) != h.val_docs or starts[0] != 0:
        raise ValueError(f"{len(starts)} documents, {h.val_docs} expected")
    origin = folded_bytes(tokens, tables) - surplus.astype(np.int32)
    if origin.min() < 0:
        raise ValueError("the sidecar takes more bytes off a token than it has")
    return Split(tokens, origin, np.append(starts, len(tokens)))


def audit_bytes(split: Split, sp: spm.SentencePieceProcessor, sample: int = 200) -> None:
    """Decodes some documents, undoes the folding and compares the bytes with those that will be summed."""
    for doc in range(0, len(split), max(len(split) // sample, 1)):
        text = unfold_case(sp.decode(split.ids(doc)[1:].tolist()))
        counted = int(split.origin_bytes[split.edges[doc] : split.edges[doc + 1]].sum())
        if counted != len(text.encode("utf-8")):
            raise ValueError(f"document {doc}: {counted} bytes counted, {len(text.encode('utf-8'))} in its text")


# ----------------------------------------------------------------------------------------------------------------------
# the model


class Lin(nn.Linear):
    """A linear map without bias whose float32 weight is cast to what it meets."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.zero = zero

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Rotates the first `dims` of each head; the angles are made once per length and device."""

    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        self.register_buffer("inv", base ** -(torch.arange(0, dims, 2).float() / dims), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.size(1), device=x.device).float(), self.inv)
        cos, sin = (f(angles)[None, :, None, :].to(x.dtype) for f in (torch.cos, torch.sin))
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, h: Settings) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = h.heads, h.kv_heads, h.width // h.heads
        self.q = Lin(h.width, h.width)
        self.k = Lin(h.width, h.kv_heads * self.head)
        self.v = Lin(h.width, h.kv_heads * self.head)
        self.out = Lin(h.width, h.width, zero=True)
        self.gain = nn.Parameter(torch.full((h.heads,), h.qk_gain))
        self.rotary = Rotary(h.rope_dims, h.rope_base)

    def forward(self, x: Tensor, lora: "LayerLora | None") -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if lora is not None:
            q, v = q + lora.q(x), v + lora.v(x)
        q = self.rotary(rms(q.view(b, t, self.heads, self.head)))
        k = self.rotary(rms(k.view(b, t, self.kv_heads, self.head)))
        v = v.view(b, t, self.kv_heads, self.head)
        q = q * self.gain.to(q.dtype)[None, None, :, None] / math.sqrt(self.head)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=1.0, enable_gqa=True
        ).transpose(1, 2)
        # what the heads say along their own value is taken out again
        groups = y.reshape(b, t, self.kv_heads, self.heads // self.kv_heads, self.head)
        along = F.normalize(v, dim=-1)[:, :, :, None, :]
        y = groups - (groups * along).sum(-1, keepdim=True) * along
        y = y.reshape(b, t, -1)
        return self.out(y) + (lora.out(y) if lora is not None else 0)


class Mlp(nn.Module):
    def __init__(self, h: Settings) -> None:
        super().__init__()
        inner = int(h.mlp_ratio * h.width)
        self.up, self.down = Lin(h.width, inner), Lin(inner, h.width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Layer(nn.Module):
    def __init__(self, h: Settings, index: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(h), Mlp(h)
        self.attention_scale = nn.Parameter(torch.ones(h.width))
        self.mlp_scale = nn.Parameter(torch.ones(h.width))
        self.blend = nn.Parameter(torch.stack((torch.ones(h.width), torch.zeros(h.width))))
        self.shrink = 1.0 / math.sqrt(index + 1)
        self.parallel = index >= h.parallel_from

    def forward(self, x: Tensor, x0: Tensor, lora: "LayerLora | None") -> Tensor:
        mix = self.blend.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        heard = self.attention_scale.to(x.dtype) * self.attention(rms(x) * self.shrink, lora)
        if self.parallel:
            return x + heard + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.shrink)
        x = x + heard
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.shrink)


class Smear(nn.Module):
    """Adds a gated part of the token before; nothing flows over the start of a document."""

    def __init__(self, h: Settings) -> None:
        super().__init__()
        self.dims, self.bos = h.smear_dims, h.bos_id
        self.gate = Lin(h.smear_dims, 1, zero=True)
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        opening = (ids[:, 1:] == self.bos).unsqueeze(-1)
        weight = self.strength.to(x.dtype) * torch.sigmoid(self.gate(x[:, 1:, : self.dims]))
        carried = weight * x[:, :-1]
        carried = carried.masked_fill(opening, 0.0)
        return torch.cat((x[:, :1], x[:, 1:] + carried), dim=1)


class Oronsay(nn.Module):
    """U-shaped transformer; layers loop_first..loop_last run twice once looping is on."""

    def __init__(self, h: Settings) -> None:
        super().__init__()
        self.h = h
        self.embed = nn.Embedding(h.vocab, h.width)
        self.smear = Smear(h)
        self.layers = nn.ModuleList(Layer(h, i) for i in range(h.depth))
        self.looping = False
        loop = list(range(h.loop_first, h.loop_last + 1))
        plain = list(range(h.depth))
        looped = plain[: h.loop_first] + loop + loop + plain[h.loop_last + 1 :]
        self.routes = {False: self.split(plain), True: self.split(looped)}
        self.skip = nn.Parameter(torch.ones(len(looped) // 2, h.width))
        self.skip_gate = nn.Parameter(torch.zeros(len(looped) // 2, h.width))
        self.reset()

    @staticmethod
    def split(route: list[int]) -> tuple[list[int], list[int]]:
        return route[: len(route) // 2], route[len(route) // 2 :]

    def reset(self) -> None:
        nn.init.normal_(self.embed.weight, std=0.005)
        for module in self.modules():
            if isinstance(module, Lin):
                if module.zero:
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)

    def forward(self, ids: Tensor, lora: "DocLora | None" = None) -> Tensor:
        """Logits for every position, soft-capped."""
        x = x0 = self.smear(rms(self.embed(ids).to(torch.bfloat16)), ids)
        first, second = self.routes[self.looping]
        kept: list[Tensor] = []
        for index in first:
            x = self.layers[index](x, x0, lora.layer(index) if lora is not None else None)
            kept.append(x)
        for place, index in enumerate(second):
            if kept:
                gate = torch.sigmoid(self.skip_gate[place].to(x.dtype))
                x = torch.lerp(self.skip[place].to(x.dtype) * kept.pop(), x, gate)
            x = self.layers[index](x, x0, lora.layer(index) if lora is not None else None)
        x = rms(x)
        raw = F.linear(x, self.embed.weight.to(x.dtype))
        if lora is not None:
            raw = raw + lora.head(x)
        return self.h.softcap * torch.tanh(raw.float() / self.h.softcap)


def mean_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    logits = model(ids)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# LoRA, one set of matrices per document of a batch


class Pair(nn.Module):
    """x -> (x A^T) B^T with its own A and B for each row of the batch; B starts at zero."""

    def __init__(self, rows: int, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rows, rank, n_in))
        self.b = nn.Parameter(torch.zeros(rows, n_out, rank))

    def renew(self, generator: torch.Generator) -> None:
        """The same start for every document, whatever was scored before."""
        with torch.no_grad():
            one = torch.empty(self.a.shape[1:], device=self.a.device)
            self.a.copy_(one.uniform_(-1.0, 1.0, generator=generator).div_(math.sqrt(self.a.size(-1))))
            self.b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.to(x.dtype).transpose(1, 2) @ self.b.to(x.dtype).transpose(1, 2)


class LayerLora(nn.Module):
    def __init__(self, rows: int, h: Settings) -> None:
        super().__init__()
        make = partial(Pair, rows, h.width, rank=h.lora_rank)
        self.q, self.v, self.out = make(h.width), make(h.width * h.kv_heads // h.heads), make(h.width)


class DocLora(nn.Module):
    def __init__(self, rows: int, h: Settings) -> None:
        super().__init__()
        self.seed = h.lora_seed
        self.by_layer = nn.ModuleList(LayerLora(rows, h) for _ in range(h.depth))
        self.head = Pair(rows, h.width, h.vocab, h.lora_rank)

    def layer(self, index: int) -> LayerLora:
        return self.by_layer[index]

    def renew(self) -> None:
        device = self.head.a.device
        generator = torch.Generator(device=device).manual_seed(self.seed)
        for module in self.modules():
            if isinstance(module, Pair):
                module.renew(generator)


# ----------------------------------------------------------------------------------------------------------------------
# optimisers


def orthogonal(g: Tensor, rounds: int) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix, in bfloat16."""
    x = g.bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for a, b, c in itertools.islice(itertools.repeat((3.4445, -4.7750, 2.0315)), rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Row-normalised Muon. Matrices are dealt over the ranks; each rank turns its own and hands them round."""

    def __init__(self, params: list[Tensor], h: Settings, world: World) -> None:
        super().__init__(params, dict(lr=h.matrix_lr, momentum=h.muon_momentum))
        self.world, self.rounds, self.decay = world, h.muon_rounds, h.muon_decay
        heavy_first = sorted(range(len(params)), key=lambda i: -params[i].numel())
        self.owner = {i: place % world.size for place, i in enumerate(heavy_first)}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            pending: deque = deque()
            for i, p in enumerate(group["params"]):
                update = torch.zeros_like(p, dtype=torch.bfloat16)
                if self.owner[i] == self.world.rank and p.grad is not None:
                    memory = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    memory.lerp_(p.grad, 1 - group["momentum"])
                    g = p.grad.lerp(memory, group["momentum"])
                    g = g / (g.norm(dim=1, keepdim=True) + 1e-7)
                    update.copy_(orthogonal(g, self.rounds) * max(1.0, p.size(0) / p.size(1)) ** 0.5)
                work = dist.broadcast(update, self.owner[i], async_op=True) if self.world.size > 1 else None
                pending.append((p, update, work))
            while pending:
                p, update, work = pending.popleft()
                if work is not None:
                    work.wait()
                p.mul_(1 - group["lr"] * self.decay).add_(update.to(p.dtype), alpha=-group["lr"])


def make_optimisers(model: Oronsay, h: Settings, world: World) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.layers.parameters() if p.ndim == 2 and min(p.shape) >= 64]
    taken = {id(p) for p in matrices} | {id(model.embed.weight)}
    rest = [p for p in model.parameters() if id(p) not in taken]
    adam = partial(torch.optim.AdamW, betas=(h.beta1, h.beta2), eps=1e-8, weight_decay=0.02, fused=True)
    made = [Muon(matrices, h, world), adam([model.embed.weight], lr=h.embed_lr * 0.05), adam(rest, lr=h.scalar_lr)]
    for group in itertools.chain.from_iterable(o.param_groups for o in made):
        group["peak"] = group["lr"]
    return made


def spread_gradients(model: nn.Module, world: World) -> None:
    """The mean over the ranks of every gradient, in one flat message."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = world.mean(torch.cat([g.flatten() for g in grads]))
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


class Ema:
    """An exponential average of the weights, kept in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.mean = {name: p.detach().float().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        for name, p in model.state_dict().items():
            self.mean[name].lerp_(p.float(), 1 - self.decay)

    def give(self, model: nn.Module) -> None:
        model.load_state_dict(self.mean)


# ----------------------------------------------------------------------------------------------------------------------
# training


def pace(h: Settings, spent: float, step: int) -> tuple[float, float]:
    """How far training is, by the clock or by the steps, and the factor of the learning rate there."""
    done = min(max(spent / (h.train_seconds - h.quant_reserve), step / h.steps), 1.0)
    return done, min(1.0, (1.0 - done) / h.cooldown)


def rehearse(model: Oronsay, fast: Callable, h: Settings, world: World) -> None:
    """Compiles both routes on random tokens; weights and their order of chance are put back after it."""
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    rows = h.batch_tokens // h.seq_len // world.size
    generator = torch.Generator(device=world.device).manual_seed(h.seed)
    draw = partial(torch.randint, h.vocab, (rows, h.seq_len), generator=generator, device=world.device)
    for turn in range(h.warmup_steps):
        model.looping = turn >= h.warmup_steps // 2
        mean_loss(fast, draw(), draw()).backward()
        model.zero_grad(set_to_none=True)
    model.looping = False
    model.load_state_dict(before)


def train(
    model: Oronsay, fast: Callable, h: Settings, world: World, clock: Stopwatch, log: Callable[[str], None]
) -> None:
    """Steps until the clock leaves only the time that quantisation needs; ends with the averaged weights."""
    optimisers = make_optimisers(model, h, world)
    ema = Ema(model, h.ema_decay)
    rows = h.batch_tokens // h.seq_len // world.size
    batches = ahead(training_batches(h, world, rows))
    spent, step = clock(), 0
    while step < h.steps:
        done, factor = pace(h, spent, step)
        if done >= 1.0:
            break
        model.looping = done >= h.loop_from
        for group in itertools.chain.from_iterable(o.param_groups for o in optimisers):
            group["lr"] = group["peak"] * factor
        ids, targets = next(batches)
        loss = mean_loss(fast, ids, targets)
        loss.backward()
        spread_gradients(model, world)
        nn.utils.clip_grad_norm_(model.parameters(), h.clip)
        for optimiser in optimisers:
            optimiser.step()
        model.zero_grad(set_to_none=True)
        ema.take(model)
        step += 1
        spent = world.largest(clock())
        if step % h.log_every == 0 or step <= 5:
            log(f"step:{step} train_loss:{loss.item():.4f} seconds:{spent:.1f} step_ms:{1000 * spent / step:.2f}")
    log(f"trained: steps:{step} seconds:{spent:.1f} looping:{model.looping}")
    ema.give(model)


# ----------------------------------------------------------------------------------------------------------------------
# quantisation: GPTQ for the matrices, whole numbers with a scale per row for the embedding


class Quantised(NamedTuple):
    codes: np.ndarray
    scales: np.ndarray
    bits: int


def calibration_rows(h: Settings, world: World) -> Iterator[Tensor]:
    """Batches of training tokens that no step has seen."""
    source = held_back_rows(h, world)
    for _ in range(h.calib_batches):
        rows = list(itertools.islice(source, h.calib_rows))
        if not rows:
            return
        yield to_device(np.stack(rows), world.device)


@contextmanager
def listening(model: Oronsay, sums: dict[str, Tensor]) -> Iterator[None]:
    """While open, every linear map of a layer adds the outer products of its inputs to `sums`."""

    def hook(name: str, module: nn.Module, given: tuple[Tensor, ...], _out: Tensor) -> None:
        x = given[0].detach().reshape(-1, given[0].size(-1)).float()
        if name in sums:
            sums[name].addmm_(x.T, x)
        else:
            sums[name] = x.T @ x

    handles = [
        module.register_forward_hook(partial(hook, name))
        for name, module in model.named_modules()
        if isinstance(module, Lin) and min(module.weight.shape) >= 64
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def second_moments(model: Oronsay, batches: Iterator[Tensor], world: World) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    with listening(model, sums):
        for ids in batches:
            model(ids)
    for name in sorted(sums):
        world.mean(sums[name])
    return sums


def row_scales(weight: Tensor, bits: int, sigmas: float) -> Tensor:
    top = 2 ** (bits - 1) - 1
    reach = torch.minimum(weight.abs().amax(dim=1), sigmas * weight.std(dim=1) / 2)
    return (reach / top).clamp_min(1e-8).half().float()


def round_plain(weight: Tensor, bits: int, sigmas: float) -> Quantised:
    top = 2 ** (bits - 1) - 1
    scales = row_scales(weight, bits, sigmas)
    codes = (weight / scales[:, None]).round().clamp(-top, top)
    return Quantised(codes.to(torch.int8).cpu().numpy(), scales.half().cpu().numpy(), bits)


def round_gptq(weight: Tensor, moment: Tensor, h: Settings) -> Quantised:
    """Column after column; what rounding one column loses is made up for in those that follow."""
    bits, top = h.matrix_bits, 2 ** (h.matrix_bits - 1) - 1
    w, n = weight.float().clone(), weight.size(1)
    scales = row_scales(w, bits, h.matrix_sigmas)
    moment = moment.clone()
    dead = moment.diagonal() == 0
    moment.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    moment.diagonal().add_(h.gptq_damp * moment.diagonal().mean())
    order = moment.diagonal().argsort(descending=True)
    w, moment = w[:, order], moment[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.zeros_like(w)
    for left in range(0, n, h.gptq_block):
        right = min(left + h.gptq_block, n)
        errors = torch.zeros(w.size(0), right - left, device=w.device)
        for j in range(left, right):
            codes[:, j] = (w[:, j] / scales).round().clamp(-top, top)
            errors[:, j - left] = (w[:, j] - codes[:, j] * scales) / upper[j, j]
            w[:, j:right] -= errors[:, j - left, None] * upper[j, j:right]
        w[:, right:] -= errors @ upper[left:right, right:]
    codes = codes[:, order.argsort()]
    return Quantised(codes.to(torch.int8).cpu().numpy(), scales.half().cpu().numpy(), bits)


def quantise(model: Oronsay, moments: dict[str, Tensor], h: Settings) -> dict[str, Quantised | np.ndarray]:
    out: dict[str, Quantised | np.ndarray] = {}
    for name, p in model.state_dict().items():
        owner = name.removesuffix(".weight")
        if owner in moments:
            out[name] = round_gptq(p, moments[owner], h)
        elif name == "embed.weight":
            out[name] = round_plain(p.float(), h.embed_bits, h.embed_sigmas)
        else:
            out[name] = p.half().cpu().numpy()
    return out


# ----------------------------------------------------------------------------------------------------------------------
# the artifact: a table of contents, then the arrays, all compressed


def squeeze(raw: bytes) -> bytes:
    if brotli is not None:
        return b"B" + brotli.compress(raw, quality=11, lgwin=24)
    return b"X" + lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def expand(packed: bytes) -> bytes:
    opener = {b"B": getattr(brotli, "decompress", None), b"X": lzma.decompress}[packed[:1]]
    return opener(packed[1:])


def pack(parts: dict[str, Quantised | np.ndarray]) -> bytes:
    """Arrays one after the other, those of whole numbers column by column, which compresses better."""
    contents, body = [], io.BytesIO()
    for name, part in parts.items():
        if isinstance(part, Quantised):
            contents.append([name, "q", list(part.codes.shape), part.bits])
            body.write(np.ascontiguousarray(part.codes.T).tobytes())
            body.write(part.scales.tobytes())
        else:
            contents.append([name, "f", list(part.shape), 16])
            body.write(part.astype("<f2").tobytes())
    head = json.dumps(contents, separators=(",", ":")).encode()
    return squeeze(struct.pack("<I", len(head)) + head + body.getvalue())


def unpack(packed: bytes) -> dict[str, Tensor]:
    raw = expand(packed)
    (head_size,) = struct.unpack_from("<I", raw)
    contents = json.loads(raw[4 : 4 + head_size])
    cursor = 4 + head_size

    def read(dtype: str, shape: list[int]) -> np.ndarray:
        nonlocal cursor
        count = math.prod(shape)
        values = np.frombuffer(raw, dtype=dtype, count=count, offset=cursor)
        cursor += values.nbytes
        return values.reshape(shape)

    out: dict[str, Tensor] = {}
    for name, kind, shape, _bits in contents:
        if kind == "q":
            codes = read("<i1", shape[::-1]).T.astype(np.float32)
            scales = read("<f2", shape[:1]).astype(np.float32)
            out[name] = torch.from_numpy(codes * scales[:, None])
        else:
            out[name] = torch.from_numpy(read("<f2", shape).astype(np.float32))
    return out


@lru_cache(maxsize=1)
def code_bytes() -> int:
    """All the code there is: this file."""
    return len(Path(__file__).read_bytes())


def write_artifact(parts: dict[str, Quantised | np.ndarray], h: Settings, world: World, log: Callable) -> None:
    if world.chief:
        Path(h.artifact).write_bytes(pack(parts))
    world.barrier()
    model_bytes = Path(h.artifact).stat().st_size
    total = model_bytes + code_bytes()
    log(f"artifact: {model_bytes} bytes, code: {code_bytes()} bytes, total: {total} bytes, limit: {h.size_limit}")
    if total > h.size_limit:
        raise SystemExit(f"too large by {total - h.size_limit} bytes")


def read_artifact(h: Settings, world: World) -> Oronsay:
    model = Oronsay(h).to(world.device)
    model.load_state_dict(unpack(Path(h.artifact).read_bytes()), strict=True)
    model.looping = True
    return model


# ----------------------------------------------------------------------------------------------------------------------
# hints: the token that followed when the last three tokens stood there before

TOKEN_BITS = 13


def context_keys(ids: np.ndarray) -> np.ndarray:
    """For each place, itself and the two tokens before it in one number, without collisions; -1 where there are none."""
    wide = ids.astype(np.int64)
    keys = np.full(len(wide), -1, dtype=np.int64)
    if len(wide) > 2:
        keys[2:] = (wide[:-2] << 2 * TOKEN_BITS) | (wide[1:-1] << TOKEN_BITS) | wide[2:]
    return keys


class Hints(NamedTuple):
    """By place: the token that is hinted at to follow (0 where none) and beta (0.0 where none)."""

    token: np.ndarray
    beta: np.ndarray


class HintBook:
    """Counts over the groups of documents that all ranks have scored, and what a document says about itself."""

    def __init__(self, h: Settings) -> None:
        self.h = h
        self.keys = np.empty(0, dtype=np.int64)
        self.token = np.empty(0, dtype=np.int64)
        self.count = np.empty(0, dtype=np.int64)
        self.total = np.empty(0, dtype=np.int64)
        self.pairs = np.empty(0, dtype=np.int64)
        self.times = np.empty(0, dtype=np.int64)

    def absorb(self, documents: Iterator[np.ndarray]) -> None:
        """Adds documents; the book then knows for each context its commonest successor."""
        fresh = []
        for ids in documents:
            keys = context_keys(ids[:-1])
            fresh.append((keys[2:] << TOKEN_BITS) | ids[3:].astype(np.int64))
        new, times = np.unique(np.concatenate(fresh), return_counts=True)
        every = np.concatenate((self.pairs, new))
        weights = np.concatenate((self.times, times))
        self.pairs, place = np.unique(every, return_inverse=True)
        self.times = np.bincount(place, weights=weights, minlength=len(self.pairs)).astype(np.int64)
        contexts = self.pairs >> TOKEN_BITS
        self.keys, first = np.unique(contexts, return_index=True)
        self.total = np.add.reduceat(self.times, first)
        best = np.lexsort((-self.times, contexts))[first]
        self.token = self.pairs[best] & ((1 << TOKEN_BITS) - 1)
        self.count = self.times[best]

    def hints(self, ids: np.ndarray) -> Hints:
        """What is hinted at after each of ids[:-1], out of nothing but the tokens up to there and the book."""
        keys = context_keys(ids[:-1])
        token = np.zeros(len(keys), dtype=np.int64)
        beta = np.zeros(len(keys), dtype=np.float32)
        if not self.h.hint_on:
            return Hints(token, beta)
        if len(self.keys):
            place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            sure = (self.count[place] >= self.h.hint_share * self.total[place]) & (
                self.count[place] >= self.h.hint_count
            )
            known = (self.keys[place] == keys) & sure
            token[known] = self.token[place[known]]
            beta[known] = self.h.hint_book
        # the document itself has the last word: where the context last stood in it, and whether it was so before, too
        order = np.argsort(keys, kind="stable")
        again = np.flatnonzero((keys[order[1:]] == keys[order[:-1]]) & (keys[order[1:]] >= 0)) + 1
        last = np.full(len(keys), -1, dtype=np.int64)
        last[order[again]] = order[again - 1]
        seen = last >= 0
        own = np.where(seen, ids[np.maximum(last, 0) + 1].astype(np.int64), -1)
        before = np.where(seen, own[np.maximum(last, 0)], -1)
        token[seen] = own[seen]
        beta[seen] = np.where(own[seen] == before[seen], self.h.hint_strong, self.h.hint_weak)
        return Hints(token, beta)


def tilt(nats: np.ndarray, hint_logp: np.ndarray, hit: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """-log of p(a) exp(beta [a is the hint]) / (1 + p(hint) (exp(beta) - 1)) at the token that came."""
    return nats - beta * hit + np.log1p(np.exp(hint_logp) * np.expm1(beta))


# ----------------------------------------------------------------------------------------------------------------------
# the evaluation


class Ledger:
    """One loss per token, written once by the rank that scored it."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.nats = np.zeros(len(split.tokens), dtype=np.float64)
        self.done = np.zeros(len(split.tokens), dtype=np.bool_)

    def enter(self, doc: int, nats: np.ndarray) -> None:
        place = slice(int(self.split.edges[doc]) + 1, int(self.split.edges[doc + 1]))
        if self.done[place].any():
            raise RuntimeError(f"document {doc} is scored already")
        self.nats[place] = nats
        self.done[place] = True

    def close(self, world: World) -> tuple[float, float, int]:
        """(nats per token, bits per byte, tokens), over all ranks."""
        sums = [self.nats[self.done].sum(), self.split.origin_bytes[self.done].sum(), self.done.sum()]
        nats, count, tokens = world.total(torch.tensor(sums, dtype=torch.float64, device=world.device)).tolist()
        if int(tokens) != self.split.predicted:
            raise RuntimeError(f"{int(tokens)} tokens scored, {self.split.predicted} expected")
        return nats / tokens, nats / math.log(2.0) / count, int(tokens)


class WorkItem(NamedTuple):
    """Documents of like length that are scored side by side."""

    docs: tuple[int, ...]
    longest: int


class Span(NamedTuple):
    """Places [left, right) are read, of which those from `fresh` on are scored."""

    left: int
    fresh: int
    right: int


def phase_groups(split: Split, h: Settings) -> Iterator[range]:
    """The documents in as many contiguous groups as there are phases."""
    edges = np.linspace(0, len(split), h.phases + 1).astype(int)
    yield from (range(a, b) for a, b in itertools.pairwise(edges))


def deal(group: range, split: Split, h: Settings, world: World) -> deque[WorkItem]:
    """A group's documents by length, in items of about item_tokens; item i goes to rank i modulo their number."""
    items: list[WorkItem] = []
    waiting: deque[int] = deque(sorted(group, key=lambda doc: (-split.length(doc), doc)))
    while waiting:
        longest = split.length(waiting[0])
        room = max(1, min(h.item_docs, h.item_tokens // longest))
        items.append(WorkItem(tuple(waiting.popleft() for _ in range(min(room, len(waiting)))), longest))
    return deque(items[world.rank :: world.size])


def spans(places: int, h: Settings) -> Iterator[Span]:
    """Chunk after chunk; each is read with as much before it as the window holds."""
    for fresh in range(0, places, h.chunk):
        right = min(fresh + h.chunk, places)
        yield Span(max(0, right - h.window), fresh, right)


def side_by_side(split: Split, item: WorkItem) -> tuple[np.ndarray, np.ndarray]:
    """The item's documents as rows, filled up with zeros, and how many predictions each row has."""
    rows = np.zeros((len(item.docs), item.longest), dtype=np.int64)
    counts = np.zeros(len(item.docs), dtype=np.int64)
    for row, doc in enumerate(item.docs):
        ids = split.ids(doc)
        rows[row, : len(ids)] = ids
        counts[row] = len(ids) - 1
    return rows, counts


def score_item(
    model: Oronsay, book: HintBook, split: Split, h: Settings, world: World, item: WorkItem
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each document of an item with its losses. A chunk is scored, and only then do the LoRAs learn from it."""
    rows, counts = side_by_side(split, item)
    ids, ends = to_device(rows, world.device), to_device(counts, world.device)
    hinted, betas = np.zeros_like(rows[:, 1:]), np.zeros(rows[:, 1:].shape, dtype=np.float32)
    for row, n in enumerate(counts):
        hinted[row, :n], betas[row, :n] = book.hints(rows[row, : n + 1])
    hint_ids = to_device(hinted, world.device)
    nats = np.zeros(hinted.shape, dtype=np.float64)
    hint_logp = np.zeros(hinted.shape, dtype=np.float64)

    lora = DocLora(len(item.docs), h).to(world.device)
    lora.renew()
    learner = torch.optim.AdamW(lora.parameters(), lr=h.lora_lr, betas=(0.0, 0.999), weight_decay=h.lora_decay)
    places = torch.arange(ids.size(1), device=world.device)
    for span in spans(hinted.shape[1], h):
        logits = model(ids[:, span.left : span.right], lora)[:, span.fresh - span.left :]
        targets = ids[:, span.fresh + 1 : span.right + 1]
        logp = F.log_softmax(logits, dim=-1)
        loss = -logp.gather(2, targets[..., None]).squeeze(2)
        where = np.s_[:, span.fresh : span.right]
        nats[where] = loss.detach().double().cpu().numpy()
        hint_logp[where] = logp.detach().gather(2, hint_ids[where][..., None]).squeeze(2).double().cpu().numpy()
        if span.right == hinted.shape[1]:
            break
        live = (places[span.fresh : span.right] < ends[:, None]).float()
        (loss * live).sum(1).div(live.sum(1).clamp_min(1.0)).sum().backward()
        learner.step()
        learner.zero_grad(set_to_none=True)

    nats = tilt(nats, hint_logp, hinted == rows[:, 1:], betas)
    for row, doc in enumerate(item.docs):
        yield doc, nats[row, : counts[row]]


def rows_of(group: range, split: Split, h: Settings, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches out of a group's documents, laid end to end; spread evenly over the whole group."""
    stream = split.tokens[split.edges[group.start] : split.edges[group.stop]]
    available = (len(stream) - 1) // h.seq_len
    wanted = min(h.base_steps * h.base_rows * world.size, available // world.size * world.size)
    chosen = np.linspace(0, available - 1, wanted).astype(np.int64)[world.rank :: world.size]
    for first in range(0, len(chosen), h.base_rows):
        starts = chosen[first : first + h.base_rows] * h.seq_len
        block = to_device(np.stack([stream[s : s + h.seq_len + 1] for s in starts]), world.device)
        yield block[:, :-1], block[:, 1:]


def fit_base(model: Oronsay, group: range, split: Split, h: Settings, world: World) -> float:
    """A few SGD steps of the base weights on documents that are scored; the same on every rank. The mean loss."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(params, lr=h.base_lr, momentum=h.base_momentum)
    losses = []
    for turn, (ids, targets) in enumerate(rows_of(group, split, h, world)):
        for param_group in optimiser.param_groups:
            param_group["lr"] = h.base_lr * 0.5 * (1.0 + math.cos(math.pi * turn / h.base_steps))
        loss = mean_loss(model, ids, targets)
        loss.backward()
        spread_gradients(model, world)
        nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return float(world.mean(torch.stack(losses).mean()).item())


@contextmanager
def only_lora(model: Oronsay) -> Iterator[None]:
    """Gradients stop at the base weights while documents are scored."""
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in model.parameters():
            p.requires_grad_(True)


def phased(
    model: Oronsay, split: Split, h: Settings, world: World, clock: Stopwatch, log: Callable[[str], None]
) -> tuple[float, float, int]:
    """Phase after phase: score a group on all ranks, then fit the base to it and enter it into the book."""
    ledger, book = Ledger(split), HintBook(h)
    groups = deque(phase_groups(split, h))
    while groups:
        group = groups.popleft()
        queue = deal(group, split, h, world)
        score = partial(score_item, model, book, split, h, world)
        with only_lora(model):
            while queue:
                for doc, nats in score(queue.popleft()):
                    ledger.enter(doc, nats)
        world.barrier()
        took = world.largest(clock())
        if groups and took < h.adapt_until:
            fitted = fit_base(model, group, split, h, world)
            book.absorb(map(split.ids, group))
            log(f"phase: docs {group.start}..{group.stop} scored, base fitted at loss {fitted:.4f}, {took:.1f} s")
    return ledger.close(world)


@torch.no_grad()
def plain_bpb(model: Oronsay, split: Split, h: Settings, world: World, docs: range) -> float:
    """Bits per byte of some documents under fixed weights, cut at the window. For the log, never for the score."""
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for doc in docs[world.rank :: world.size]:
        ids = to_device(split.ids(doc)[: h.window + 1], world.device)[None]
        if ids.size(1) < 2:
            continue
        sums[0] += mean_loss(model, ids[:, :-1], ids[:, 1:]).double() * (ids.size(1) - 1)
        start = int(split.edges[doc])
        sums[1] += int(split.origin_bytes[start + 1 : start + ids.size(1)].sum())
    nats, count = world.total(sums).tolist()
    return nats / math.log(2.0) / count


# ----------------------------------------------------------------------------------------------------------------------
# the run


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def build(h: Settings, world: World, log: Callable[[str], None]) -> None:
    """Everything up to the artifact. No validation file is opened here."""
    model = Oronsay(h).to(world.device)
    if world.size > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    log(f"parameters: {sum(p.numel() for p in model.parameters())}")
    fast = torch.compile(model, dynamic=False)
    rehearse(model, fast, h, world)
    world.barrier()
    clock = Stopwatch()
    train(model, fast, h, world, clock, log)
    model.looping = True
    moments = second_moments(model, calibration_rows(h, world), world)
    parts = quantise(model, moments, h)
    log(f"train+quantise: {world.largest(clock()):.1f} s")
    write_artifact(parts, h, world, log)


def evaluate(h: Settings, world: World, log: Callable[[str], None]) -> None:
    """Everything from the artifact to the score, on one clock."""
    clock = Stopwatch()
    sp = spm.SentencePieceProcessor(model_file=h.tokenizer)
    if sp.vocab_size() > h.vocab:
        raise ValueError(f"{sp.vocab_size()} pieces, vocabulary {h.vocab}")
    split = load_split(h, byte_tables(sp, h.vocab))
    audit_bytes(split, sp)
    log(f"validation: docs:{len(split)} tokens:{len(split.tokens)} bytes:{int(split.origin_bytes.sum())}")
    model = read_artifact(h, world)
    before = plain_bpb(model, split, h, world, range(0, len(split), 50))
    log(f"diagnostic: every 50th document, weights as packed: bpb {before:.4f}")
    loss, bpb, tokens = phased(model, split, h, world, clock, log)
    took = world.largest(clock())
    log(f"scored {tokens} tokens in {took:.1f} s of {h.eval_seconds:.0f} s")
    if took > h.eval_seconds:
        raise SystemExit("evaluation took too long")
    log(f"final_phased_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main() -> None:
    world = open_world()
    h = Settings()
    log = make_log(world, os.environ.get("RUN_ID", f"oronsay-{h.seed}"))
    log(f"python {sys.version.split()[0]} torch {torch.__version__} ranks {world.size}")
    for entry in fields(h):
        log(f"  {entry.name} = {getattr(h, entry.name)}")
    seed_all(h.seed)
    try:
        with nullcontext() if world.size > 1 else torch.cuda.device(world.device):
            build(h, world, log)
            torch.cuda.empty_cache()
            evaluate(h, world, log)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
