"""carna: a 10-layer recurrent-depth transformer, int6 GPTQ, and test-time training document by document.

One process per GPU:

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Training stops at WALL_CAP_S less RESERVE_S, so that the Hessians of the quantiser are collected inside the cap. The
evaluation cuts the validation stream into documents, gives each of them a LoRA of its own, and goes through it chunk by
chunk: a chunk is scored with what the earlier chunks of its document have taught the LoRA, and only then trained on.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import io
import json
import lzma
import math
import os
import random
import sys
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

try:
    import zstandard
except ImportError:
    zstandard = None

SIZE_LIMIT = 16_000_000
VAL_DOCS = 50_000
SHARD_MAGIC = 20240520
HEADER_INTS = 256

# ----------------------------------------------------------------------------------------------------------------------
# settings
# ----------------------------------------------------------------------------------------------------------------------


def _env(name: str, default):
    """A setting from the environment, in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


def setting(name: str, default):
    return field(default_factory=lambda: _env(name, default))


@dataclass
class Cfg:
    # where things lie
    data_dir: str = setting("DATA_DIR", "./data/datasets/fineweb10B_sp4096")
    tokenizer: str = setting("TOKENIZER_PATH", "./data/tokenizers/fineweb_4096_bpe.model")
    train_glob: str = setting("TRAIN_GLOB", "fineweb_train_*.bin")
    val_glob: str = setting("VAL_GLOB", "fineweb_val_*.bin")
    out_dir: str = setting("OUT_DIR", ".")
    run_name: str = setting("RUN_NAME", "")
    seed: int = setting("SEED", 1337)

    # shape of the model
    vocab: int = setting("VOCAB_SIZE", 4096)
    bos: int = setting("BOS_ID", 1)
    width: int = setting("MODEL_DIM", 512)
    layers: int = setting("NUM_LAYERS", 10)
    heads: int = setting("NUM_HEADS", 8)
    kv_heads: int = setting("NUM_KV_HEADS", 4)
    mlp_ratio: float = setting("MLP_MULT", 3.0)
    rope_base: float = setting("ROPE_BASE", 10000.0)
    rope_dims: int = setting("ROPE_DIMS", 32)
    softcap: float = setting("LOGIT_SOFTCAP", 30.0)
    qk_gain: float = setting("QK_GAIN_INIT", 4.0)
    recur_from: int = setting("RECUR_FROM", 4)
    recur_to: int = setting("RECUR_TO", 6)
    recur_times: int = setting("RECUR_TIMES", 2)
    recur_at: float = setting("RECUR_AT", 0.35)
    smear: bool = setting("SMEAR_GATE", True)

    # training
    seq_len: int = setting("TRAIN_SEQ_LEN", 2048)
    step_tokens: int = setting("TRAIN_BATCH_TOKENS", 786_432)
    max_steps: int = setting("ITERATIONS", 20_000)
    warm_steps: int = setting("WARMUP_STEPS", 20)
    wall_cap_s: float = setting("WALL_CAP_S", 600.0)
    reserve_s: float = setting("RESERVE_S", 26.0)
    cooldown: float = setting("COOLDOWN_FRAC", 0.62)
    muon_lr: float = setting("MUON_LR", 0.022)
    muon_momentum: float = setting("MUON_MOMENTUM", 0.97)
    muon_warm: int = setting("MUON_MOMENTUM_WARMUP", 1200)
    muon_wd: float = setting("MUON_WD", 0.085)
    embed_lr: float = setting("EMBED_LR", 0.03)
    scalar_lr: float = setting("SCALAR_LR", 0.02)
    adam_wd: float = setting("ADAM_WD", 0.02)
    clip: float = setting("GRAD_CLIP", 0.3)
    ema_decay: float = setting("EMA_DECAY", 0.9965)
    log_every: int = setting("LOG_EVERY", 250)

    # quantisation
    calib_rows: int = setting("CALIB_ROWS", 64)
    matrix_bits: int = setting("MATRIX_BITS", 6)
    embed_bits: int = setting("EMBED_BITS", 8)
    clip_sigmas: float = setting("CLIP_SIGMAS", 12.85)
    embed_sigmas: float = setting("EMBED_SIGMAS", 20.0)
    damp: float = setting("GPTQ_DAMP", 0.01)
    packer: str = setting("PACKER", "best")

    # evaluation
    eval_seq: int = setting("EVAL_SEQ_LEN", 2048)
    eval_rows: int = setting("EVAL_ROWS", 16)
    eval_budget_s: float = setting("EVAL_BUDGET_S", 555.0)
    ttt: bool = setting("TTT", True)
    ttt_chunk: int = setting("TTT_CHUNK", 48)
    ttt_batch: int = setting("TTT_BATCH", 64)
    ttt_min_len: int = setting("TTT_MIN_LEN", 256)
    ttt_window: int = setting("TTT_WINDOW", 1024)
    ttt_rank: int = setting("TTT_RANK", 48)
    ttt_lr: float = setting("TTT_LR", 1e-4)
    ttt_beta2: float = setting("TTT_BETA2", 0.999)
    ttt_wd: float = setting("TTT_WD", 0.3)
    ttt_steps: int = setting("TTT_STEPS", 1)
    recall_weight: float = setting("RECALL_WEIGHT", 0.025)
    recall_min: float = setting("RECALL_MIN", 24.0)

    def table(self) -> list[str]:
        return [f"{f.name}={getattr(self, f.name)}" for f in fields(self)]


# ----------------------------------------------------------------------------------------------------------------------
# ranks and the journal
# ----------------------------------------------------------------------------------------------------------------------


class Ring:
    """The group of processes: who we are, and the few collectives that are needed."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.on = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.on:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()
        self._counters: dict[str, int] = {}

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.on and self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        if self.on and self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        return tensor

    def spread(self, tensor: Tensor, source: int = 0) -> Tensor:
        if self.on and self.size > 1:
            dist.broadcast(tensor, src=source)
        return tensor

    def wait(self) -> None:
        if self.on and self.size > 1:
            dist.barrier()

    def ticket(self, queue: str) -> int:
        """The next number of a queue that all ranks draw from: each number is given once."""
        if self.on and self.size > 1:
            store = dist.distributed_c10d._get_default_store()
            return int(store.add(f"carna/{queue}", 1)) - 1
        number = self._counters.get(queue, 0)
        self._counters[queue] = number + 1
        return number

    def close(self) -> None:
        if self.on:
            dist.destroy_process_group()


class Journal:
    """A small logger: one file, one clock, and phases that say when they begin and end."""

    def __init__(self, ring: Ring, cfg: Cfg) -> None:
        self.ring = ring
        self.born = time.perf_counter()
        self.spent: OrderedDict[str, float] = OrderedDict()
        self.path = None
        if ring.chief:
            folder = Path(cfg.out_dir) / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / f"{cfg.run_name or uuid.uuid4()}.txt"

    def say(self, text: str, quiet: bool = False) -> None:
        if not self.ring.chief:
            return
        if not quiet:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(text + "\n")

    @contextlib.contextmanager
    def phase(self, name: str):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        self.say(f"[{begun - self.born:8.1f}s] phase {name}: begins")
        try:
            yield
        finally:
            torch.cuda.synchronize()
            took = time.perf_counter() - begun
            self.spent[name] = self.spent.get(name, 0.0) + took
            self.say(f"[{time.perf_counter() - self.born:8.1f}s] phase {name}: took {took:.1f}s")

    def sheet(self) -> None:
        for name, took in self.spent.items():
            self.say(f"phase_total {name}: {took:.1f}s")


class Stopwatch:
    """Wall-clock seconds since it was started."""

    def __init__(self) -> None:
        self.zero = 0.0

    def start(self) -> None:
        torch.cuda.synchronize()
        self.zero = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.zero


# ----------------------------------------------------------------------------------------------------------------------
# shards of tokens
# ----------------------------------------------------------------------------------------------------------------------


def open_shard(path: Path) -> np.ndarray:
    """The tokens of one shard: a header of 256 int32, then uint16 tokens."""
    head = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if head.size != HEADER_INTS or int(head[0]) != SHARD_MAGIC or int(head[1]) != 1:
        raise ValueError(f"{path}: not a shard of tokens")
    count = int(head[2])
    if path.stat().st_size != HEADER_INTS * 4 + count * 2:
        raise ValueError(f"{path}: holds other than {count} tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_INTS * 4, shape=(count,))


def shard_paths(folder: str, pattern: str) -> list[Path]:
    paths = [Path(p) for p in sorted(glob.glob(os.path.join(folder, pattern)))]
    if not paths:
        raise FileNotFoundError(f"no shards {pattern} in {folder}")
    return paths


class TokenRiver:
    """Endless training tokens, shard after shard. Every rank reads its own slice of each draught."""

    def __init__(self, paths: list[Path], ring: Ring) -> None:
        self.paths = paths
        self.ring = ring
        self.restart()

    def restart(self) -> None:
        self.shard_no = 0
        self.place = 0
        self.tokens = open_shard(self.paths[0])

    def _pull(self, count: int) -> np.ndarray:
        pieces = []
        while count > 0:
            left = self.tokens.size - self.place
            if left <= 0:
                self.shard_no = (self.shard_no + 1) % len(self.paths)
                self.tokens = open_shard(self.paths[self.shard_no])
                self.place = 0
                continue
            take = min(count, left)
            pieces.append(np.asarray(self.tokens[self.place : self.place + take]))
            self.place += take
            count -= take
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def draught(self, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of `rows` rows for this rank; all ranks together take size * rows of them."""
        span = rows * seq + 1
        whole = self._pull(span * self.ring.size)
        mine = whole[self.ring.rank * span : (self.ring.rank + 1) * span].astype(np.int64)
        flat = torch.from_numpy(mine).pin_memory().to(self.ring.device, non_blocking=True)
        return flat[:-1].view(rows, seq), flat[1:].view(rows, seq)


def read_validation(cfg: Cfg) -> Tensor:
    """The whole validation split as one stream, on the host."""
    parts = [np.asarray(open_shard(path)) for path in shard_paths(cfg.data_dir, cfg.val_glob)]
    stream = torch.from_numpy(np.concatenate(parts).astype(np.int32))
    return stream


# ----------------------------------------------------------------------------------------------------------------------
# bytes of tokens
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ByteLedger:
    """How many bytes of text a token stands for, given the token before it."""

    own: Tensor  # bytes of the piece without the mark of a leading space
    spaced: Tensor  # whether the piece begins with that mark
    silent: Tensor  # control, unknown and unused tokens: they have no text, and no space follows from them

    def of(self, before: Tensor, token: Tensor) -> Tensor:
        extra = self.spaced[token] & ~self.silent[before]
        return self.own[token] + extra.to(self.own.dtype)


def byte_ledger(sp: spm.SentencePieceProcessor, cfg: Cfg, device: torch.device) -> ByteLedger:
    known = int(sp.vocab_size())
    size = max(known, cfg.vocab)
    own = np.zeros(size, dtype=np.int32)
    spaced = np.zeros(size, dtype=bool)
    silent = np.ones(size, dtype=bool)
    for token in range(known):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        silent[token] = False
        if sp.is_byte(token):
            own[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("\u2581"):
            spaced[token] = True
            piece = piece[1:]
        own[token] = len(piece.encode("utf-8"))
    return ByteLedger(
        own=torch.from_numpy(own).to(device),
        spaced=torch.from_numpy(spaced).to(device),
        silent=torch.from_numpy(silent).to(device),
    )


# ----------------------------------------------------------------------------------------------------------------------
# documents of the validation stream
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doc:
    """A document: its tokens are stream[start:stop], the first of them BOS (or the first token of the stream)."""

    index: int
    start: int
    stop: int

    @property
    def steps(self) -> int:
        """How many tokens are predicted in it."""
        return self.stop - self.start - 1


def cut_documents(stream: Tensor, bos: int) -> list[Doc]:
    """Documents in the order of the stream. The BOS of the next one ends a document too: it is predicted there, so that
    every token but the first of the stream is predicted once."""
    heads = (stream == bos).nonzero().flatten().tolist()
    if not heads or heads[0] != 0:
        heads = [0, *heads]
    docs = []
    for index, start in enumerate(heads):
        last = index + 1 == len(heads)
        stop = stream.numel() if last else heads[index + 1] + 1
        if stop - start >= 2:
            docs.append(Doc(index, start, stop))
    return docs


def length_batches(docs: list[Doc], rows: int) -> list[list[Doc]]:
    """Batches of documents of like length, the longest first: then no rank is left alone with them at the end."""
    ordered = sorted(docs, key=lambda doc: (-doc.steps, doc.index))
    return [ordered[i : i + rows] for i in range(0, len(ordered), rows)]


def pack_rows(docs: list[Doc], seq: int) -> list[list[tuple[Doc, int, int]]]:
    """Puts documents side by side into rows of `seq` positions: (document, from, to) in steps of the document. One that
    is longer than a row goes on in a row of its own."""
    rows: list[list[tuple[Doc, int, int]]] = []
    row: list[tuple[Doc, int, int]] = []
    room = seq
    for doc in docs:
        at = 0
        while at < doc.steps:
            if room == 0 or (row and doc.steps - at > room and doc.steps - at <= seq):
                rows.append(row)
                row, room = [], seq
            take = min(room, doc.steps - at)
            row.append((doc, at, at + take))
            at += take
            room -= take
    if row:
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# the model
# ----------------------------------------------------------------------------------------------------------------------

flex = torch.compile(flex_attention, dynamic=False)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Lin(nn.Linear):
    """A matrix kept in fp32 and used in the type of its input."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Rotary embedding of the first `dims` channels of a head."""

    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        pace = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("pace", pace, persistent=False)

    def forward(self, place: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle = place.float()[..., None] * self.pace
        return angle.cos().to(dtype), angle.sin().to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, seq, heads, channels]; cos, sin: [batch or 1, seq, dims / 2]."""
    dims = 2 * cos.size(-1)
    head, rest = x[..., :dims], x[..., dims:]
    a, b = head.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Cfg) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.kv_heads = cfg.kv_heads
        self.head_dim = cfg.width // cfg.heads
        self.q = Lin(cfg.width, cfg.width)
        self.k = Lin(cfg.width, self.kv_heads * self.head_dim)
        self.v = Lin(cfg.width, self.kv_heads * self.head_dim)
        self.out = Lin(cfg.width, cfg.width)
        self.gain = nn.Parameter(torch.full((cfg.heads,), cfg.qk_gain))
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask, lora) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if lora is not None:
            q = q + lora["q"](x)
            k = k + lora["k"](x)
            v = v + lora["v"](x)
        q = rms(q.view(batch, seq, self.heads, self.head_dim))
        k = rms(k.view(batch, seq, self.kv_heads, self.head_dim))
        v = v.view(batch, seq, self.kv_heads, self.head_dim)
        q = turn(q, *rope) * self.gain.to(x.dtype)[None, None, :, None]
        k = turn(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        else:
            y = flex(q, k, v, block_mask=mask, enable_gqa=self.heads != self.kv_heads)
        y = y.transpose(1, 2).reshape(batch, seq, width)
        z = self.out(y)
        if lora is not None:
            z = z + lora["o"](y)
        return z


class Feed(nn.Module):
    def __init__(self, cfg: Cfg) -> None:
        super().__init__()
        inner = int(cfg.mlp_ratio * cfg.width)
        self.up = Lin(cfg.width, inner)
        self.down = Lin(inner, cfg.width)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, lora) -> Tensor:
        h = F.leaky_relu(self.up(x), 0.5).square()
        y = self.down(h)
        if lora is not None:
            y = y + lora["m"](x)
        return y


class Layer(nn.Module):
    def __init__(self, cfg: Cfg, number: int) -> None:
        super().__init__()
        self.attn = Attention(cfg)
        self.feed = Feed(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.width))
        self.feed_scale = nn.Parameter(torch.ones(cfg.width))
        self.blend = nn.Parameter(torch.stack((torch.ones(cfg.width), torch.zeros(cfg.width))))
        self.damp = 1.0 / math.sqrt(number + 1)

    def forward(self, x: Tensor, first: Tensor, rope: tuple[Tensor, Tensor], mask, lora) -> Tensor:
        blend = self.blend.to(x.dtype)
        x = blend[0] * x + blend[1] * first
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.damp, rope, mask, lora)
        x = x + self.feed_scale.to(x.dtype) * self.feed(rms(x) * self.damp, lora)
        return x


class Smear(nn.Module):
    """Adds a part of the token before to each token, but nothing to the first of a document."""

    def __init__(self, cfg: Cfg) -> None:
        super().__init__()
        self.bos = cfg.bos
        self.gate = nn.Parameter(torch.full((cfg.width,), -3.0))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos).to(x.dtype)[..., None]
        return x + torch.sigmoid(self.gate).to(x.dtype) * before * inside


class Carna(nn.Module):
    """Layers with U-shaped skips; after `deepen()` the middle ones run `recur_times` times."""

    def __init__(self, cfg: Cfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab, cfg.width)
        self.smear = Smear(cfg) if cfg.smear else None
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base)
        self.layers = nn.ModuleList(Layer(cfg, n) for n in range(cfg.layers))
        self.skips = nn.Parameter(torch.ones(cfg.layers, cfg.width))
        self.deep = False
        nn.init.normal_(self.embed.weight, std=0.005)
        for module in self.modules():
            if isinstance(module, Lin) and module.weight.count_nonzero() > 0:
                nn.init.orthogonal_(module.weight)

    def deepen(self, on: bool = True) -> None:
        self.deep = on

    def route(self) -> list[int]:
        """The numbers of the layers in the order in which they run."""
        cfg = self.cfg
        plain = list(range(cfg.layers))
        if not self.deep or cfg.recur_times < 2:
            return plain
        middle = list(range(cfg.recur_from, cfg.recur_to + 1))
        return plain[: cfg.recur_from] + middle * cfg.recur_times + plain[cfg.recur_to + 1 :]

    def body(self, ids: Tensor, place: Tensor, mask=None, lora=None) -> Tensor:
        x = rms(self.embed(ids).to(torch.bfloat16))
        if self.smear is not None:
            x = self.smear(x, ids)
        first = x
        rope = self.rotary(place, x.dtype)
        route = self.route()
        half = len(route) // 2
        kept: list[Tensor] = []
        for turn_no, number in enumerate(route):
            if turn_no >= len(route) - half and kept:
                x = x + self.skips[number].to(x.dtype) * kept.pop()
            x = self.layers[number](x, first, rope, mask, lora.at(number) if lora is not None else None)
            if turn_no < half:
                kept.append(x)
        return rms(x)

    def head(self, x: Tensor, lora=None) -> Tensor:
        raw = F.linear(x, self.embed.weight.to(x.dtype))
        if lora is not None:
            raw = raw + lora.head(x)
        return self.cfg.softcap * torch.tanh(raw.float() / self.cfg.softcap)

    def forward(self, ids: Tensor, place: Tensor, mask=None, lora=None) -> Tensor:
        """Logits of the next token at every position."""
        return self.head(self.body(ids, place, mask, lora), lora)

    def loss(self, ids: Tensor, targets: Tensor, place: Tensor, mask=None) -> Tensor:
        logits = self.forward(ids, place, mask)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def flat_places(rows: int, seq: int, device: torch.device) -> Tensor:
    return torch.arange(seq, device=device).expand(rows, seq)


def document_mask(group: Tensor):
    """A block mask under which a position sees the earlier ones of its own document. group: [rows, seq]."""
    rows, seq = group.shape

    def allowed(b, h, q, k):
        return (q >= k) & (group[b, q] == group[b, k])

    return create_block_mask(allowed, rows, None, seq, seq, device=group.device, _compile=True)


def training_groups(ids: Tensor, bos: int) -> Tensor:
    return (ids == bos).cumsum(dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# adapters, one to a document
# ----------------------------------------------------------------------------------------------------------------------


class RowLoRA(nn.Module):
    """A low-rank update for every row of a batch: x[b] @ down[b]^T @ up[b]^T."""

    def __init__(self, rows: int, ins: int, outs: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rows, rank, ins, device=device))
        self.up = nn.Parameter(torch.zeros(rows, outs, rank, device=device))
        self.reset()

    def reset(self) -> None:
        with torch.no_grad():
            self.down.normal_(std=1.0 / math.sqrt(self.down.size(-1)))
            self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        low = torch.bmm(x, self.down.to(x.dtype).transpose(1, 2))
        return torch.bmm(low, self.up.to(x.dtype).transpose(1, 2))


class AdapterBank(nn.Module):
    """The adapters of a batch of documents: one row for each of them, in every layer and in the head."""

    def __init__(self, cfg: Cfg, rows: int, device: torch.device) -> None:
        super().__init__()
        self.rows = rows
        width, rank = cfg.width, cfg.ttt_rank
        kv = cfg.kv_heads * (cfg.width // cfg.heads)
        shapes = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width), "m": (width, width)}
        self.parts = nn.ModuleList(
            nn.ModuleDict({name: RowLoRA(rows, i, o, rank, device) for name, (i, o) in shapes.items()})
            for _ in range(cfg.layers)
        )
        self.last = RowLoRA(rows, width, cfg.vocab, rank, device)

    def at(self, number: int) -> nn.ModuleDict:
        return self.parts[number]

    def head(self, x: Tensor) -> Tensor:
        return self.last(x)

    def reset(self) -> None:
        for module in self.modules():
            if isinstance(module, RowLoRA):
                module.reset()


class BankOptimiser:
    """AdamW over a bank. Its moments are of the shape of the parameters, so the rows stay apart."""

    def __init__(self, bank: AdapterBank, cfg: Cfg) -> None:
        self.inner = torch.optim.AdamW(
            bank.parameters(),
            lr=cfg.ttt_lr,
            betas=(0.9, cfg.ttt_beta2),
            eps=1e-10,
            weight_decay=cfg.ttt_wd,
            fused=True,
        )

    def forget(self) -> None:
        for state in self.inner.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def step(self) -> None:
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)


# ----------------------------------------------------------------------------------------------------------------------
# optimisers of the training
# ----------------------------------------------------------------------------------------------------------------------


@torch.compile
def orthogonalise(g: Tensor, rounds: int = 5) -> Tensor:
    """Newton-Schulz: the nearest (half-)orthogonal matrix to g, roughly."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. The matrices are dealt out to the ranks; each sends its updates to the others."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, decay: float, ring: Ring) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))
        self.ring = ring

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            lengths = [p.numel() for p in params]
            sheet = torch.zeros(sum(lengths), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for number, p in enumerate(params):
                if number % self.ring.size == self.ring.rank and p.grad is not None:
                    state = self.state[p]
                    if "pull" not in state:
                        state["pull"] = torch.zeros_like(p.grad)
                    pull = state["pull"]
                    pull.lerp_(p.grad, 1.0 - group["momentum"])
                    update = orthogonalise(p.grad.lerp(pull, group["momentum"]))
                    update = update * max(1.0, p.size(-2) / p.size(-1)) ** 0.5
                    sheet[at : at + p.numel()] = update.reshape(-1)
                at += p.numel()
            self.ring.total(sheet)
            at = 0
            for p in params:
                update = sheet[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"])
                at += p.numel()


class Workshop:
    """The optimisers of the training, and their schedule."""

    def __init__(self, model: Carna, cfg: Cfg, ring: Ring) -> None:
        self.cfg = cfg
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".weight" in name and "embed" not in name]
        held = {id(p) for p in matrices} | {id(model.embed.weight)}
        small = [p for p in model.parameters() if id(p) not in held]
        self.muon = Muon(matrices, cfg.muon_lr, cfg.muon_momentum, cfg.muon_wd, ring)
        self.adam = torch.optim.AdamW(
            [
                dict(params=[model.embed.weight], lr=cfg.embed_lr, weight_decay=cfg.adam_wd),
                dict(params=small, lr=cfg.scalar_lr, weight_decay=0.0),
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=True,
        )
        self.all = [self.muon, self.adam]
        self.base_lr = [[group["lr"] for group in opt.param_groups] for opt in self.all]

    def tune(self, step: int, share: float) -> None:
        """share: the part of the wall clock that is gone, 0 to 1."""
        begin = 1.0 - self.cfg.cooldown
        scale = 1.0 if share < begin else max((1.0 - share) / max(self.cfg.cooldown, 1e-6), 0.0)
        for opt, rates in zip(self.all, self.base_lr):
            for group, rate in zip(opt.param_groups, rates):
                group["lr"] = rate * scale
        warm = min(step / max(self.cfg.muon_warm, 1), 1.0)
        for group in self.muon.param_groups:
            group["momentum"] = (1.0 - warm) * 0.9 + warm * self.cfg.muon_momentum

    def step(self) -> None:
        for opt in self.all:
            opt.step()
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def state(self) -> list[dict]:
        return [copy.deepcopy(opt.state_dict()) for opt in self.all]

    def restore(self, states: list[dict]) -> None:
        for opt, state in zip(self.all, states):
            opt.load_state_dict(state)


class Shadow:
    """An exponential moving average of the weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().float().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value.detach().float(), 1.0 - self.decay)

    def lay_on(self, model: nn.Module) -> None:
        own = model.state_dict()
        model.load_state_dict({name: value.to(own[name].dtype) for name, value in self.weights.items()})


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """What the training hands on."""

    steps: int
    train_ms: float
    last_loss: float


class Trainer:
    """Runs steps until the wall clock says stop, and leaves the average of the weights in the model."""

    def __init__(self, model: Carna, river: TokenRiver, cfg: Cfg, ring: Ring, journal: Journal) -> None:
        self.model = model
        self.river = river
        self.cfg = cfg
        self.ring = ring
        self.journal = journal
        self.workshop = Workshop(model, cfg, ring)
        self.rows = cfg.step_tokens // (cfg.seq_len * ring.size)
        self.micro = max(1, self.rows // 48)
        self.loss_fn = torch.compile(model.loss, dynamic=False)

    def lesson(self) -> Tensor:
        """One batch forward and backward; the gradients are left in the parameters, averaged over the ranks."""
        rows = self.rows // self.micro
        total = torch.zeros((), device=self.ring.device)
        for _ in range(self.micro):
            ids, targets = self.river.draught(rows, self.cfg.seq_len)
            mask = document_mask(training_groups(ids, self.cfg.bos))
            place = flat_places(rows, self.cfg.seq_len, ids.device)
            loss = self.loss_fn(ids, targets, place, mask)
            (loss / self.micro).backward()
            total += loss.detach() / self.micro
        for p in self.model.parameters():
            if p.grad is not None:
                self.ring.mean(p.grad)
        if self.cfg.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        return total

    def warm(self) -> None:
        """Compiles both depths on a few steps, then puts back weights, optimisers and the place in the data."""
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        states = self.workshop.state()
        for deep in (False, True):
            self.model.deepen(deep)
            for _ in range(max(self.cfg.warm_steps // 2, 1)):
                self.lesson()
                self.workshop.step()
        self.model.deepen(False)
        self.model.load_state_dict(weights)
        self.workshop.restore(states)
        self.river.restart()

    def run(self, clock: Stopwatch) -> Trained:
        cfg, journal = self.cfg, self.journal
        limit = cfg.wall_cap_s - cfg.reserve_s
        shadow = Shadow(self.model, cfg.ema_decay)
        step, loss_value = 0, float("nan")
        stop = torch.zeros((), device=self.ring.device)
        while step < cfg.max_steps:
            share = min(clock.seconds() / max(limit, 1e-9), 1.0)
            if not self.model.deep and share >= cfg.recur_at:
                self.model.deepen(True)
                journal.say(f"step:{step} recurrence on, route {self.model.route()}")
            self.workshop.tune(step, share)
            loss = self.lesson()
            self.workshop.step()
            shadow.follow(self.model)
            step += 1
            if step % cfg.log_every == 0 or step <= 5:
                loss_value = float(self.ring.mean(loss.clone()))
                spent = clock.seconds()
                journal.say(
                    f"step:{step}/{cfg.max_steps} train_loss:{loss_value:.4f} "
                    f"train_time:{1e3 * spent:.0f}ms step_avg:{1e3 * spent / step:.2f}ms"
                )
            if step % 8 == 0:
                stop.fill_(float(clock.seconds() >= limit))
                self.ring.spread(stop)
                if bool(stop.item()):
                    journal.say(f"stopping_early: wallclock_cap train_time:{1e3 * clock.seconds():.0f}ms step:{step}")
                    break
        torch.cuda.synchronize()
        self.model.deepen(True)
        shadow.lay_on(self.model)
        journal.say(f"ema: weights of decay {cfg.ema_decay} laid on")
        return Trained(step, 1e3 * clock.seconds(), loss_value)


# ----------------------------------------------------------------------------------------------------------------------
# quantisation
# ----------------------------------------------------------------------------------------------------------------------


class HessianTap:
    """Collects x^T x at the input of every matrix of the layers."""

    def __init__(self, model: Carna) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, Lin):
                self.handles.append(module.register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str):
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.size(-1), x.size(-1), device=x.device)
                self.counts[name] = 0
            self.sums[name].addmm_(x.t(), x)
            self.counts[name] += x.size(0)

        return look

    def close(self, ring: Ring) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        for name in sorted(self.sums):
            ring.total(self.sums[name])
            self.sums[name] /= max(self.counts[name] * ring.size, 1)
        return self.sums


@torch.no_grad()
def collect_hessians(model: Carna, river: TokenRiver, cfg: Cfg, ring: Ring) -> dict[str, Tensor]:
    """Second moments of the inputs of each matrix, over fresh rows of the training shards."""
    tap = HessianTap(model)
    rows = max(cfg.calib_rows // ring.size, 1)
    for _ in range(rows):
        ids, _ = river.draught(1, cfg.seq_len)
        model.body(ids, flat_places(1, cfg.seq_len, ids.device))
    return tap.close(ring)


def row_scales(w: Tensor, bits: int, sigmas: float) -> Tensor:
    top = 2 ** (bits - 1) - 1
    reach = torch.minimum(w.abs().amax(dim=1), sigmas * w.std(dim=1))
    return (reach / top).clamp_min(1e-8).half().float()


def round_rows(w: Tensor, bits: int, sigmas: float) -> tuple[Tensor, Tensor]:
    """Plain rounding with one scale to a row."""
    top = 2 ** (bits - 1) - 1
    scale = row_scales(w, bits, sigmas)
    q = torch.clamp(torch.round(w / scale[:, None]), -top, top)
    return q.to(torch.int8), scale.half()


def gptq_rows(w: Tensor, hessian: Tensor, bits: int, cfg: Cfg, block: int = 128) -> tuple[Tensor, Tensor]:
    """GPTQ with one scale to a row, columns in the order of falling activation."""
    w = w.detach().float().clone()
    top = 2 ** (bits - 1) - 1
    scale = row_scales(w, bits, cfg.clip_sigmas)
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=True)
    back = torch.argsort(order)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(cfg.damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    columns = w.size(1)
    for left in range(0, columns, block):
        right = min(left + block, columns)
        part = w[:, left:right].clone()
        miss = torch.zeros_like(part)
        corner = upper[left:right, left:right]
        for j in range(right - left):
            column = part[:, j]
            code = torch.clamp(torch.round(column / scale), -top, top)
            q[:, left + j] = code
            gap = (column - code * scale) / corner[j, j]
            part[:, j:] -= gap[:, None] * corner[j, j:][None]
            miss[:, j] = gap
        w[:, right:] -= miss @ upper[left:right, right:]
    return q[:, back].to(torch.int8), scale.half()


def quantise(model: Carna, hessians: dict[str, Tensor], cfg: Cfg) -> OrderedDict[str, Tensor]:
    """The state of the model in few bits: NAME.q and NAME.s for what has rows, NAME for the rest."""
    out: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in model.state_dict().items():
        value = value.detach().float()
        if name == "embed.weight":
            q, s = round_rows(value, cfg.embed_bits, cfg.embed_sigmas)
        elif name.endswith(".weight") and value.ndim == 2:
            hessian = hessians.get(name.removesuffix(".weight"))
            if hessian is None:
                q, s = round_rows(value, cfg.matrix_bits, cfg.clip_sigmas)
            else:
                q, s = gptq_rows(value, hessian, cfg.matrix_bits, cfg)
        else:
            out[name] = value.half().cpu()
            continue
        out[f"{name}.q"], out[f"{name}.s"] = q.cpu(), s.cpu()
    return out


def restore(parts: dict[str, Tensor], model: Carna) -> None:
    own = model.state_dict()
    state = {}
    for name, value in own.items():
        if f"{name}.q" in parts:
            wide = parts[f"{name}.q"].float() * parts[f"{name}.s"].float()[:, None]
        else:
            wide = parts[name].float()
        state[name] = wide.to(value.device, value.dtype)
    model.load_state_dict(state)


# ----------------------------------------------------------------------------------------------------------------------
# the artifact
# ----------------------------------------------------------------------------------------------------------------------


def squeeze(raw: bytes, how: str) -> bytes:
    """Compresses with zstd or lzma, or with whichever makes less of it; the first byte says which it was."""
    tried = []
    if how in ("zstd", "best") and zstandard is not None:
        tried.append(b"z" + zstandard.ZstdCompressor(level=22).compress(raw))
    if how in ("lzma", "best") or not tried:
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26, "lc": 1, "pb": 0}]
        tried.append(b"l" + lzma.compress(raw, format=lzma.FORMAT_XZ, filters=filters))
    return min(tried, key=len)


def unsqueeze_bytes(packed: bytes) -> bytes:
    if packed[:1] == b"z":
        return zstandard.ZstdDecompressor().decompress(packed[1:])
    return lzma.decompress(packed[1:])


def pack(parts: dict[str, Tensor], how: str) -> bytes:
    """One blob: a line of JSON with names, types and shapes, then the arrays; those of int8 lie together."""
    names = sorted(parts, key=lambda name: (str(parts[name].dtype), name))
    index = [[name, str(parts[name].dtype).removeprefix("torch."), list(parts[name].shape)] for name in names]
    body = io.BytesIO()
    body.write(json.dumps(index, separators=(",", ":")).encode() + b"\n")
    for name in names:
        array = parts[name].contiguous().numpy()
        if array.dtype == np.float16:
            flat = array.view(np.uint8).reshape(-1, 2)
            body.write(flat[:, 0].tobytes() + flat[:, 1].tobytes())
        else:
            body.write(array.tobytes())
    return squeeze(body.getvalue(), how)


def unpack(blob: bytes) -> dict[str, Tensor]:
    raw = unsqueeze_bytes(blob)
    line = raw.index(b"\n")
    at = line + 1
    parts = {}
    for name, kind, shape in json.loads(raw[:line]):
        dtype = np.dtype(kind)
        count = int(np.prod(shape)) if shape else 1
        chunk = np.frombuffer(raw, dtype=np.uint8, count=count * dtype.itemsize, offset=at)
        at += count * dtype.itemsize
        if dtype == np.float16:
            chunk = np.stack((chunk[:count], chunk[count:]), axis=1).reshape(-1)
        parts[name] = torch.from_numpy(chunk.copy().view(dtype).reshape(shape))
    return parts


@dataclass(frozen=True)
class Sizes:
    code: int
    model: int

    @property
    def total(self) -> int:
        return self.code + self.model


def write_artifact(blob: bytes, cfg: Cfg, ring: Ring, journal: Journal) -> Path:
    path = Path(cfg.out_dir) / "final_model.carna"
    if ring.chief:
        path.write_bytes(blob)
        sizes = Sizes(code=Path(__file__).stat().st_size, model=path.stat().st_size)
        journal.say(f"Serialized model int{cfg.matrix_bits}: {sizes.model} bytes")
        journal.say(f"Code size: {sizes.code} bytes")
        journal.say(f"Total submission size: {sizes.total} bytes")
        if sizes.total > SIZE_LIMIT:
            journal.say(f"WARNING: {sizes.total - SIZE_LIMIT} bytes over the limit of {SIZE_LIMIT}")
    ring.wait()
    return path


def load_artifact(path: Path, cfg: Cfg, ring: Ring) -> Carna:
    model = Carna(cfg).to(ring.device)
    restore(unpack(path.read_bytes()), model)
    model.deepen(True)
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# counting
# ----------------------------------------------------------------------------------------------------------------------


class Tally:
    """Nats, tokens and bytes of what was scored, in fp64."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, sizes: Tensor, counted: Tensor) -> None:
        keep = counted.to(torch.float64)
        self.sums[0] += (nll.to(torch.float64) * keep).sum()
        self.sums[1] += keep.sum()
        self.sums[2] += (sizes.to(torch.float64) * keep).sum()

    def merge(self, other: Tally) -> None:
        self.sums += other.sums

    def settle(self, ring: Ring) -> Score:
        sums = ring.total(self.sums.clone()).tolist()
        return Score(nats=sums[0], tokens=int(sums[1]), size=int(sums[2]))


@dataclass(frozen=True)
class Score:
    nats: float
    tokens: int
    size: int

    @property
    def loss(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2.0) / max(self.size, 1)

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f} tokens:{self.tokens} bytes:{self.size}"


# ----------------------------------------------------------------------------------------------------------------------
# scoring without adaptation
# ----------------------------------------------------------------------------------------------------------------------


class PackedScorer:
    """Scores documents as they are, several side by side in a row, under a mask that keeps them apart."""

    def __init__(self, model: Carna, stream: Tensor, ledger: ByteLedger, cfg: Cfg, ring: Ring) -> None:
        self.model = model
        self.stream = stream
        self.ledger = ledger
        self.cfg = cfg
        self.ring = ring
        self.logits = torch.compile(model.forward, dynamic=False)

    def lay(self, rows: list[list[tuple[Doc, int, int]]]) -> tuple[Tensor, ...]:
        """ids, targets, places, groups and which positions count; rows that are missing are filled up with nothing."""
        shape = (self.cfg.eval_rows, self.cfg.eval_seq)
        ids = torch.full(shape, self.cfg.bos, dtype=torch.int64)
        targets = torch.zeros(shape, dtype=torch.int64)
        place = torch.zeros(shape, dtype=torch.int64)
        group = torch.full(shape, -1, dtype=torch.int64)
        counted = torch.zeros(shape, dtype=torch.bool)
        for r, row in enumerate(rows):
            at = 0
            for number, (doc, begin, end) in enumerate(row):
                span = slice(at, at + end - begin)
                piece = self.stream[doc.start + begin : doc.start + end + 1].long()
                ids[r, span], targets[r, span] = piece[:-1], piece[1:]
                place[r, span] = torch.arange(end - begin)
                group[r, span] = number
                counted[r, span] = True
                at += end - begin
        return tuple(t.to(self.ring.device, non_blocking=True) for t in (ids, targets, place, group, counted))

    @torch.no_grad()
    def score(self, docs: list[Doc], tally: Tally) -> None:
        rows = pack_rows(docs, self.cfg.eval_seq)
        for at in range(0, len(rows), self.cfg.eval_rows):
            ids, targets, place, group, counted = self.lay(rows[at : at + self.cfg.eval_rows])
            logits = self.logits(ids, place, document_mask(group))
            nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            tally.add(nll, self.ledger.of(ids, targets), counted)


# ----------------------------------------------------------------------------------------------------------------------
# recall: what a document has said already
# ----------------------------------------------------------------------------------------------------------------------


class Recall:
    """Counts of the tokens of the earlier chunks of each document, as a distribution over the vocabulary."""

    def __init__(self, rows: int, cfg: Cfg, device: torch.device) -> None:
        self.cfg = cfg
        self.counts = torch.zeros(rows, cfg.vocab, device=device)

    def reset(self) -> None:
        self.counts.zero_()

    def learn(self, targets: Tensor, counted: Tensor) -> None:
        self.counts.scatter_add_(1, targets, counted.float())

    def blend(self, logp: Tensor) -> Tensor:
        """Log probabilities of the mixture, for every token of the vocabulary. logp: [rows, seq, vocab]."""
        seen = self.counts.sum(dim=1, keepdim=True)
        share = self.cfg.recall_weight * (seen >= self.cfg.recall_min).float()
        cache = self.counts / seen.clamp_min(1.0)
        return torch.log((1.0 - share)[:, None] * logp.exp() + (share * cache)[:, None] + 1e-38)


# ----------------------------------------------------------------------------------------------------------------------
# test-time training, document by document
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Slate:
    """One chunk of every document of a batch. The fresh positions are the last ones of the window."""

    ids: Tensor  # [rows, window]
    place: Tensor  # [rows, window]
    targets: Tensor  # [rows, chunk]
    before: Tensor  # [rows, chunk]: the token before each target
    counted: Tensor  # [rows, chunk]: positions that the document has


class DocumentTrainer:
    """Gives each document of a batch an adapter of its own, and goes through the batch chunk by chunk."""

    def __init__(self, model: Carna, stream: Tensor, ledger: ByteLedger, cfg: Cfg, ring: Ring) -> None:
        self.model = model
        self.stream = stream
        self.ledger = ledger
        self.cfg = cfg
        self.ring = ring
        self.bank = AdapterBank(cfg, cfg.ttt_batch, ring.device)
        self.optimiser = BankOptimiser(self.bank, cfg)
        self.recall = Recall(cfg.ttt_batch, cfg, ring.device)
        self.hidden = torch.compile(model.body, dynamic=True)

    # -- laying out

    def load(self, docs: list[Doc]) -> Tensor:
        """The tokens of the batch, one document to a row, on the device."""
        longest = max(doc.stop - doc.start for doc in docs)
        width = self.cfg.ttt_chunk * math.ceil((longest - 1) / self.cfg.ttt_chunk) + 1
        sheet = torch.full((self.cfg.ttt_batch, width), self.cfg.bos, dtype=torch.int64)
        for row, doc in enumerate(docs):
            sheet[row, : doc.stop - doc.start] = self.stream[doc.start : doc.stop].long()
        return sheet.to(self.ring.device)

    def slate(self, sheet: Tensor, steps: Tensor, chunk: int) -> Slate:
        size = self.cfg.ttt_chunk
        begin, end = chunk * size, (chunk + 1) * size
        left = max(0, end - self.cfg.ttt_window)
        place = torch.arange(left, end, device=sheet.device)
        fresh = torch.arange(begin, end, device=sheet.device)
        return Slate(
            ids=sheet[:, left:end],
            place=(place - left).expand(sheet.size(0), -1),
            targets=sheet[:, begin + 1 : end + 1],
            before=sheet[:, begin:end],
            counted=fresh[None] < steps[:, None],
        )

    # -- the two things done with a chunk

    def logits(self, slate: Slate) -> Tensor:
        x = self.hidden(slate.ids, slate.place, None, self.bank)
        fresh = x[:, -slate.targets.size(1) :]
        return self.model.head(fresh, self.bank)

    @torch.no_grad()
    def grade(self, slate: Slate) -> Tensor:
        """Nats of each fresh target, with the adapters as the earlier chunks have left them."""
        logp = F.log_softmax(self.logits(slate), dim=-1)
        mixed = self.recall.blend(logp)
        return -mixed.gather(-1, slate.targets[..., None]).squeeze(-1)

    def study(self, slate: Slate) -> None:
        """Trains the adapters on the chunk. The loss is a sum over the documents, so each one sees its own only."""
        weight = slate.counted.float()
        weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1.0)
        for _ in range(self.cfg.ttt_steps):
            logits = self.logits(slate)
            nll = F.cross_entropy(logits.flatten(0, 1), slate.targets.flatten(), reduction="none").view_as(weight)
            (nll * weight).sum().backward()
            self.optimiser.step()

    # -- a batch

    def begin(self) -> None:
        self.bank.reset()
        self.optimiser.forget()
        self.recall.reset()

    def batch(self, docs: list[Doc], tally: Tally) -> None:
        self.begin()
        sheet = self.load(docs)
        steps = torch.zeros(self.cfg.ttt_batch, dtype=torch.int64)
        steps[: len(docs)] = torch.tensor([doc.steps for doc in docs])
        steps = steps.to(self.ring.device)
        chunks = math.ceil(max(doc.steps for doc in docs) / self.cfg.ttt_chunk)
        for chunk in range(chunks):
            slate = self.slate(sheet, steps, chunk)
            nll = self.grade(slate)
            tally.add(nll, self.ledger.of(slate.before, slate.targets), slate.counted)
            if chunk + 1 < chunks:
                self.study(slate)
                self.recall.learn(slate.targets, slate.counted)


# ----------------------------------------------------------------------------------------------------------------------
# the evaluation
# ----------------------------------------------------------------------------------------------------------------------


class Evaluation:
    """The phases of the evaluation, under one clock."""

    def __init__(self, model: Carna, cfg: Cfg, ring: Ring, journal: Journal) -> None:
        self.cfg = cfg
        self.ring = ring
        self.journal = journal
        self.model = model
        self.clock = Stopwatch()
        self.clock.start()
        sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer)
        self.ledger = byte_ledger(sp, cfg, ring.device)
        self.stream = read_validation(cfg)
        self.docs = cut_documents(self.stream, cfg.bos)
        self.packed = PackedScorer(model, self.stream, self.ledger, cfg, ring)
        journal.say(f"validation: {self.stream.numel()} tokens in {len(self.docs)} documents")
        if len(self.docs) != VAL_DOCS:
            journal.say(f"WARNING: the validation split has {VAL_DOCS} documents")

    def mine(self, docs: list[Doc]) -> list[Doc]:
        """Every size-th document, from our rank on."""
        return docs[self.ring.rank :: self.ring.size]

    def roundtrip(self) -> Score:
        """The model as it comes out of the artifact, without adaptation."""
        tally = Tally(self.ring.device)
        self.packed.score(self.mine(self.docs), tally)
        return tally.settle(self.ring)

    def short_documents(self, docs: list[Doc]) -> Tally:
        """Documents too short to learn from: scored as they are, shared by striding."""
        tally = Tally(self.ring.device)
        self.packed.score(self.mine(docs), tally)
        return tally

    def long_documents(self, docs: list[Doc]) -> Tally:
        """Batches of documents of like length, drawn from a counter that the ranks share."""
        tally = Tally(self.ring.device)
        trainer = DocumentTrainer(self.model, self.stream, self.ledger, self.cfg, self.ring)
        batches = length_batches(docs, self.cfg.ttt_batch)
        done = plain = 0
        while (number := self.ring.ticket("documents")) < len(batches):
            batch = batches[number]
            if self.clock.seconds() < self.cfg.eval_budget_s:
                trainer.batch(batch, tally)
                done += 1
            else:
                self.packed.score(batch, tally)
                plain += 1
            if number % 50 == 0:
                spent = self.clock.seconds()
                print(f"  rank {self.ring.rank}: batch {number}/{len(batches)} at {spent:.1f}s", flush=True)
        counts = self.ring.total(torch.tensor([done, plain], device=self.ring.device)).tolist()
        self.journal.say(f"batches: {counts[0]} adapted, {counts[1]} plain")
        return tally

    def documents(self) -> Score:
        """The score: every token of the split once."""
        short = [doc for doc in self.docs if doc.steps < self.cfg.ttt_min_len]
        long = [doc for doc in self.docs if doc.steps >= self.cfg.ttt_min_len]
        self.journal.say(f"documents: {len(short)} short, {len(long)} long")
        tally = self.short_documents(short)
        tally.merge(self.long_documents(long))
        return tally.settle(self.ring)

    def check(self, score: Score) -> None:
        """Whether every token but the first was scored, and each of them once."""
        expected = self.stream.numel() - 1
        if score.tokens != expected:
            self.journal.say(f"WARNING: {score.tokens} tokens scored, {expected} expected")

    def run(self) -> Score:
        journal = self.journal
        with journal.phase("roundtrip"):
            plain = self.roundtrip()
        journal.say(f"final_roundtrip {plain}")
        if not self.cfg.ttt:
            return plain
        with journal.phase("document_ttt"):
            score = self.documents()
        self.check(score)
        journal.say(f"document_ttt {score}")
        return score


# ----------------------------------------------------------------------------------------------------------------------
# the run
# ----------------------------------------------------------------------------------------------------------------------


def sow(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def build_model(cfg: Cfg, ring: Ring) -> Carna:
    model = Carna(cfg).to(ring.device)
    for value in model.state_dict().values():
        ring.spread(value)
    return model


def make_artifact(cfg: Cfg, ring: Ring, journal: Journal) -> Path:
    """Trains, quantises and writes: all that reads training data happens in here, and inside the cap."""
    model = build_model(cfg, ring)
    journal.say(f"model_params:{sum(p.numel() for p in model.parameters())}")
    river = TokenRiver(shard_paths(cfg.data_dir, cfg.train_glob), ring)
    trainer = Trainer(model, river, cfg, ring, journal)
    with journal.phase("warm_up"):
        trainer.warm()
    clock = Stopwatch()
    ring.wait()
    clock.start()
    with journal.phase("training"):
        trained = trainer.run(clock)
    with journal.phase("calibration"):
        hessians = collect_hessians(model, river, cfg, ring)
        parts = quantise(model, hessians, cfg)
    journal.say(f"training and quantisation: {trained.steps} steps, {clock.seconds():.1f}s of {cfg.wall_cap_s:.0f}s")
    journal.say(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    with journal.phase("packing"):
        blob = pack(parts, cfg.packer)
        path = write_artifact(blob, cfg, ring, journal)
    return path


def main() -> None:
    cfg = Cfg()
    ring = Ring()
    journal = Journal(ring, cfg)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    journal.say(Path(__file__).read_text(encoding="utf-8"), quiet=True)
    journal.say(f"Running Python {sys.version.split()[0]}, PyTorch {torch.__version__}, world_size:{ring.size}")
    for line in cfg.table():
        journal.say(f"  {line}", quiet=True)
    sow(cfg.seed)
    path = make_artifact(cfg, ring, journal)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    sow(cfg.seed + ring.rank)
    model = load_artifact(path, cfg, ring)
    evaluation = Evaluation(model, cfg, ring, journal)
    score = evaluation.run()
    journal.say(f"evaluation took {evaluation.clock.seconds():.1f}s")
    journal.sheet()
    journal.say(f"final_val_exact {score}")
    ring.close()


if __name__ == "__main__":
    main()
