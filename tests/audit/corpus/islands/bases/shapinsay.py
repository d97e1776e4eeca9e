"""SP8192 with case operators: a vocabulary that does not pay twice for "The" and "the".

What is new here is the tokenizer, the rest is the known recipe (depth recurrence, parallel residuals, Muon, mixed
int5/int6 GPTQ, brotli over shuffled bytes, document-wise score-first LoRA at test time in phases).

The text is rewritten before sentencepiece sees it: ASCII capitals become small letters, and an operator of its own
(a user-defined symbol, hence always a token of its own) says what was lost:

    TITLE  the next letter was a capital            " The"  ->  TITLE + " the"
    SHOUT  the whole next run of letters was        " NASA" ->  SHOUT + " nasa"
    ESC    the next character is an escaped one     U+E000..U+E002 and U+2581, should a document hold them

The rewriting is undone by `restore_case`, and `prepare` refuses a document that does not come back byte by byte, so
nothing easier than the original is ever scored.

Accounting. val_bpb = nats / ln 2 / bytes of the ORIGINAL text. An operator is predicted like any token and its nats are
counted, but it stands for no byte. ASCII capitals and small letters are one byte each, an escaped character and its
stand-in three each, so the bytes of a piece (without operators) are those of the original text that it covers. `prepare`
also writes the original bytes of every validation token beside the shard (the sidecar, counted from the text and not from
the table); the two totals must agree or the run stops.

    python train_gpt.py prepare docs_selected.jsonl        # once, on any machine
    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import json
import math
import os
import random
import re
import struct
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# Settings. Each field can be set by the environment variable of the same name in capitals.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    # data
    data_dir: str = "./data/datasets/fineweb10B_sp8192_caseop"
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_caseop.model"
    artifact_path: str = "final_model.caseop.br"
    run_id: str = "caseop"
    seed: int = 1337

    # prepare only
    num_val_docs: int = 50_000
    shard_tokens: int = 100_000_000

    # model
    vocab_size: int = 8192
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: int = 4
    rope_dims: int = 16
    rope_base: float = 10_000.0
    logit_softcap: float = 30.0
    qk_gain_init: float = 5.0
    loop_first: int = 3
    loop_last: int = 5
    loop_times: int = 2
    loop_from_frac: float = 0.35
    parallel_from: int = 7
    embed_init_std: float = 0.005

    # training
    iterations: int = 20_000
    train_seq_len: int = 2048
    train_batch_tokens: int = 786_432
    warmup_steps: int = 20
    warmdown_frac: float = 0.72
    max_wallclock_seconds: float = 600.0
    gptq_reserve_seconds: float = 24.0
    val_loss_every: int = 0
    train_log_every: int = 500

    # optimizers
    matrix_lr: float = 0.022
    embed_lr: float = 0.03
    scalar_lr: float = 0.02
    muon_momentum: float = 0.97
    muon_momentum_start: float = 0.92
    muon_momentum_steps: int = 1500
    muon_ns_steps: int = 5
    muon_wd: float = 0.09
    embed_wd: float = 0.085
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.3
    ema_decay: float = 0.9965

    # quantisation
    calib_batches: int = 12
    calib_rows: int = 8
    attn_bits: int = 6
    mlp_bits: int = 5
    embed_bits: int = 8
    attn_clip_sd: float = 12.85
    mlp_clip_sd: float = 10.5
    embed_clip_sd: float = 20.0
    gptq_block: int = 128
    gptq_damp: float = 0.01
    brotli_quality: int = 11
    size_limit: int = 16_000_000

    # evaluation
    eval_seq_len: int = 2048
    eval_stride: int = 128
    eval_rows: int = 32
    eval_limit_seconds: float = 600.0

    # test-time training
    ttt_enabled: bool = True
    ttt_phase_ends: str = "600,2000"
    ttt_rank: int = 64
    ttt_lr: float = 1e-4
    ttt_beta2: float = 0.999
    ttt_wd: float = 0.5
    ttt_chunk: int = 48
    ttt_context: int = 2048
    ttt_batch_docs: int = 64
    ttt_epochs: int = 1
    global_lr: float = 1e-3
    global_momentum: float = 0.9
    global_rows: int = 4
    global_clip: float = 1.0

    @classmethod
    def from_env(cls) -> Settings:
        """Reads what the environment sets; a default's type is the field's type."""
        found: dict[str, object] = {}
        for f in fields(cls):
            raw = os.environ.get(f.name.upper())
            if raw is None:
                continue
            kind = type(f.default)
            found[f.name] = bool(int(raw)) if kind is bool else kind(raw)
        return cls(**found)

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_dir, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_dir, "fineweb_val_[0-9]*.bin")

    @property
    def val_byte_files(self) -> str:
        return os.path.join(self.data_dir, "fineweb_val_bytes_*.bin")

    def phase_ends(self, documents: int) -> list[int]:
        """After which documents a phase ends, counted in the order of the stream; the last phase ends with the last."""
        ends = [int(part) for part in self.ttt_phase_ends.split(",") if part.strip()]
        return [end for end in ends if end < documents] + [documents]


class Log:
    """Prints on rank 0 and keeps the same lines in a file."""

    def __init__(self, path: str, active: bool) -> None:
        self.path, self.active = path, active
        if active:
            Path(path).parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.active:
            return
        if console:
            print(text, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean(self, t: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)
        return t

    def any(self, flag: bool) -> bool:
        if self.world == 1:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


# ----------------------------------------------------------------------------------------------------------------------
# Case operators
# ----------------------------------------------------------------------------------------------------------------------

ESC, TITLE, SHOUT = "\ue000", "\ue001", "\ue002"
OPERATORS = (ESC, TITLE, SHOUT)
# Characters that would be mistaken for an operator or for sentencepiece's own mark. Both sides are three bytes long.
STAND_INS = {"\ue000": "\ue020", "\ue001": "\ue021", "\ue002": "\ue022", "\u2581": "\ue030"}
ORIGINALS = {v: k for k, v in STAND_INS.items()}
NEEDS_ESCAPE = re.compile("[" + "".join(STAND_INS) + "]")
LETTERS = re.compile(r" ?[A-Za-z]+")
CAPITAL = re.compile(r"[A-Z]")
OPERATED = re.compile(f"{ESC}(.)|{TITLE}( ?[a-z])|{SHOUT}( ?[a-z]+)", re.S)


def _mark_run(match: re.Match[str]) -> str:
    run = match.group(0)
    word = run.lstrip(" ")
    space = run[: len(run) - len(word)]
    if word.islower():
        return run
    if len(word) > 1 and word.isupper():
        return SHOUT + run.lower()
    if word[0].isupper():
        head, rest = TITLE + space + word[0].lower(), word[1:]
    else:
        head, rest = space + word[0], word[1:]
    return head + CAPITAL.sub(lambda m: TITLE + m.group(0).lower(), rest)


def mark_case(text: str) -> str:
    """The text as sentencepiece gets it. Undone by restore_case."""
    escaped = NEEDS_ESCAPE.sub(lambda m: ESC + STAND_INS[m.group(0)], text)
    return LETTERS.sub(_mark_run, escaped)


def restore_case(marked: str) -> str:
    def undo(match: re.Match[str]) -> str:
        if match.group(1) is not None:
            return ORIGINALS.get(match.group(1), match.group(1))
        return (match.group(2) or match.group(3)).upper()

    return OPERATED.sub(undo, marked)


# ----------------------------------------------------------------------------------------------------------------------
# Byte tables
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByteTables:
    """Original bytes per token id. A leading space is a byte only where a token stands before it that is text:
    sentencepiece puts a mark before the first word of a document though no space is there."""

    base: Tensor  # int16 [V], without the leading space
    space: Tensor  # bool [V], the piece begins with the mark
    boundary: Tensor  # bool [V], control tokens: no text
    operator: Tensor  # bool [V]

    def count(self, prev_ids: Tensor, target_ids: Tensor) -> Tensor:
        spaces = self.space[target_ids] & ~self.boundary[prev_ids]
        return self.base[target_ids].to(torch.int32) + spaces.to(torch.int32)


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device | str) -> ByteTables:
    size = max(int(sp.vocab_size()), vocab_size)
    base = np.zeros(size, dtype=np.int16)
    space = np.zeros(size, dtype=np.bool_)
    boundary = np.ones(size, dtype=np.bool_)
    operator = np.zeros(size, dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        if sp.is_byte(i):
            base[i] = 1  # <0x0A> is one byte whatever it decodes to on its own
            continue
        piece = sp.id_to_piece(i)
        if piece in OPERATORS:
            operator[i] = True  # stands for no byte of the original
            continue
        if piece.startswith("\u2581"):
            space[i] = True
            piece = piece[1:]
        base[i] = len(piece.replace("\u2581", " ").encode("utf-8"))
    return ByteTables(
        torch.from_numpy(base).to(device),
        torch.from_numpy(space).to(device),
        torch.from_numpy(boundary).to(device),
        torch.from_numpy(operator).to(device),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Shards: 256 int32 of header, then uint16 tokens
# ----------------------------------------------------------------------------------------------------------------------

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256


def write_shard(path: str, values: np.ndarray) -> None:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(values)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(values.astype("<u2").tobytes())


def read_shard(path: str | Path) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"not a shard: {path}")
    values = np.fromfile(path, dtype="<u2", count=int(header[2]), offset=HEADER_INTS * 4)
    if values.size != int(header[2]):
        raise ValueError(f"short shard: {path}")
    return torch.from_numpy(values.astype(np.uint16, copy=False))


def read_shards(pattern: str) -> Tensor:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no file matches {pattern}")
    return torch.cat([read_shard(f) for f in files]).contiguous()


def original_bytes(sp: spm.SentencePieceProcessor, text: str, ids: list[int]) -> list[int]:
    """Original bytes that each token covers, walked along the text itself. Used for the sidecar only."""
    raw = text.encode("utf-8")
    counts, at = [], 0
    for k, i in enumerate(ids):
        piece = sp.id_to_piece(i)
        if sp.is_byte(i):
            covered = 1
        elif piece in OPERATORS:
            covered = 0
        else:
            shown = piece.replace("\u2581", " ")
            if k == 0 and shown.startswith(" "):
                shown = shown[1:]
            covered = len(shown.encode("utf-8"))
        counts.append(covered)
        at += covered
    if at != len(raw):
        raise ValueError(f"the tokens cover {at} bytes of {len(raw)}")
    return counts


def prepare(s: Settings, source: str) -> None:
    """Writes shards from a file of documents, one JSON object a line. The first num_val_docs are the validation split."""
    sp = spm.SentencePieceProcessor(model_file=s.tokenizer_path)
    bos = sp.bos_id()
    out = Path(s.data_dir)
    out.mkdir(parents=True, exist_ok=True)
    val: list[int] = []
    val_bytes: list[int] = []
    train: list[int] = []
    shard = 0

    def flush() -> None:
        nonlocal shard, train
        write_shard(str(out / f"fineweb_train_{shard:06d}.bin"), np.array(train))
        shard, train = shard + 1, []

    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(file):
            text = json.loads(line)["text"]
            ids = sp.encode(mark_case(text))
            if number < s.num_val_docs:
                if restore_case(sp.decode(ids)) != text:
                    raise ValueError(f"document {number} does not come back")
                val += [bos, *ids]
                val_bytes += [0, *original_bytes(sp, text, ids)]
                continue
            train += [bos, *ids]
            if len(train) >= s.shard_tokens:
                flush()
    if train:
        flush()
    write_shard(str(out / "fineweb_val_000000.bin"), np.array(val))
    write_shard(str(out / "fineweb_val_bytes_000000.bin"), np.array(val_bytes))
    print(f"prepared {s.num_val_docs} validation documents, {len(val)} tokens, {sum(val_bytes)} bytes; {shard} train shards")


class TokenStream:
    """The training shards in order, over and over."""

    def __init__(self, pattern: str) -> None:
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(f"no file matches {pattern}")
        self.index, self.at = 0, 0
        self.tokens = read_shard(self.files[0])

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.at
            if left <= 0:
                self.index = (self.index + 1) % len(self.files)
                self.tokens, self.at = read_shard(self.files[self.index]), 0
                continue
            k = min(n, left)
            parts.append(self.tokens[self.at : self.at + k])
            self.at += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Every rank reads the same stream and keeps its own span of each global batch."""

    def __init__(self, pattern: str, ranks: Ranks) -> None:
        self.stream, self.ranks = TokenStream(pattern), ranks

    def next_batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.ranks.world * accum)
        local -= local % seq_len
        span = local + 1
        chunk = self.stream.take(span * self.ranks.world)
        mine = chunk[self.ranks.rank * span : (self.ranks.rank + 1) * span].to(torch.int64)
        x = mine[:-1].view(-1, seq_len)
        y = mine[1:].view(-1, seq_len)
        return x.to(self.ranks.device, non_blocking=True), y.to(self.ranks.device, non_blocking=True)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class CastLinear(nn.Linear):
    """Weights are kept in fp32 and used in the type of what comes in."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False) -> None:
        super().__init__(n_in, n_out, bias=False)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class BatchedLora(nn.Module):
    """One low-rank correction per row of the batch."""

    def __init__(self, rows: int, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rows, rank, n_in))
        self.b = nn.Parameter(torch.zeros(rows, n_out, rank))
        self.reset()

    def reset(self) -> None:
        with torch.no_grad():
            self.a.normal_(0.0, self.a.size(2) ** -0.5)
            self.b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        low = torch.bmm(x, self.a.to(x.dtype).transpose(1, 2))
        return torch.bmm(low, self.b.to(x.dtype).transpose(1, 2))


class DocumentLora(nn.Module):
    """The corrections for one batch of documents: queries and values of each block, and the head."""

    def __init__(self, s: Settings, rows: int) -> None:
        super().__init__()
        kv = s.model_dim // s.num_heads * s.num_kv_heads
        self.rows = rows
        self.q = nn.ModuleList(BatchedLora(rows, s.model_dim, s.model_dim, s.ttt_rank) for _ in range(s.num_layers))
        self.v = nn.ModuleList(BatchedLora(rows, s.model_dim, kv, s.ttt_rank) for _ in range(s.num_layers))
        self.head = BatchedLora(rows, s.model_dim, s.vocab_size, s.ttt_rank)

    def reset(self) -> None:
        for part in self.modules():
            if isinstance(part, BatchedLora):
                part.reset()


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", base ** (-torch.arange(0, dims, 2).float() / dims), persistent=False)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        t = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
        angles = torch.outer(t, self.inv_freq)
        return angles.cos()[None, None], angles.sin()[None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    turned, rest = x[..., :dims], x[..., dims:]
    a, b = turned.float().chunk(2, dim=-1)
    turned = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads, self.kv_heads = s.num_heads, s.num_kv_heads
        self.head_dim = s.model_dim // s.num_heads
        self.rope_dims = s.rope_dims
        kv = self.head_dim * s.num_kv_heads
        self.c_q = CastLinear(s.model_dim, s.model_dim)
        self.c_k = CastLinear(s.model_dim, kv)
        self.c_v = CastLinear(s.model_dim, kv)
        self.proj = CastLinear(s.model_dim, s.model_dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain_init))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lora_q: nn.Module | None, lora_v: nn.Module | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if lora_q is not None and lora_v is not None:
            q, v = q + lora_q(x), v + lora_v(x)
        q = q.view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = k.view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q = rotate(norm(q), cos, sin, self.rope_dims) * self.q_gain.to(q.dtype)[None, :, None, None]
        k = rotate(norm(k), cos, sin, self.rope_dims)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.fc = CastLinear(s.model_dim, s.mlp_mult * s.model_dim)
        self.proj = CastLinear(s.mlp_mult * s.model_dim, s.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, s: Settings, index: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(s), Mlp(s)
        self.parallel = index >= s.parallel_from
        self.attn_scale = nn.Parameter(torch.ones(s.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(s.model_dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(s.model_dim), torch.zeros(s.model_dim))))
        self.depth_factor = (index + 1) ** -0.5

    def forward(
        self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, lora_q: nn.Module | None, lora_v: nn.Module | None
    ) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        seen = norm(x) * self.depth_factor
        a = self.attn_scale.to(x.dtype) * self.attn(seen, cos, sin, lora_q, lora_v)
        if self.parallel:  # both read the same stream, and their sum is added once
            return x + a + self.mlp_scale.to(x.dtype) * self.mlp(seen)
        x = x + a
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x) * self.depth_factor)


class CaseOpGPT(nn.Module):
    def __init__(self, s: Settings, bos: int) -> None:
        super().__init__()
        self.softcap, self.bos = s.logit_softcap, bos
        self.embed = nn.Embedding(s.vocab_size, s.model_dim)
        nn.init.normal_(self.embed.weight, std=s.embed_init_std)
        self.rotary = Rotary(s.rope_dims, s.rope_base)
        self.blocks = nn.ModuleList(Block(s, i) for i in range(s.num_layers))
        self.smear = nn.Parameter(torch.full((s.model_dim,), -3.0))
        self.looping = False
        once = list(range(s.num_layers))
        span = list(range(s.loop_first, s.loop_last + 1))
        self.plain_order = once
        self.loop_order = once[: s.loop_first] + span * s.loop_times + once[s.loop_last + 1 :]
        self.skip = nn.Parameter(torch.ones(len(self.loop_order) // 2, s.model_dim))

    def hidden(self, ids: Tensor, lora: DocumentLora | None = None) -> Tensor:
        x = self.embed(ids).to(torch.bfloat16)
        # A little of the previous token, but never across the start of a document.
        inside = (ids[:, 1:] != self.bos).unsqueeze(-1).to(x.dtype)
        gate = torch.sigmoid(self.smear).to(x.dtype)
        x = torch.cat((x[:, :1], x[:, 1:] + gate * inside * x[:, :-1]), dim=1)
        x = x0 = norm(x)
        cos, sin = self.rotary(ids.size(1))
        order = self.loop_order if self.looping else self.plain_order
        half = len(order) // 2
        kept: list[Tensor] = []
        for place, i in enumerate(order):
            if place < half:
                kept.append(x)
            elif kept and place >= len(order) - half:
                x = x + self.skip[len(kept) - 1].to(x.dtype) * kept.pop()
            lora_q = lora.q[i] if lora is not None else None
            lora_v = lora.v[i] if lora is not None else None
            x = self.blocks[i](x, x0, cos, sin, lora_q, lora_v)
        return norm(x)

    def logits(self, ids: Tensor, lora: DocumentLora | None = None) -> Tensor:
        h = self.hidden(ids, lora)
        out = F.linear(h, self.embed.weight.to(h.dtype))
        if lora is not None:
            out = out + lora.head(h)
        return self.softcap * torch.tanh(out.float() / self.softcap)

    def token_nll(self, ids: Tensor, targets: Tensor, lora: DocumentLora | None = None) -> Tensor:
        """-ln p of each target, the softmax being over the whole vocabulary."""
        z = self.logits(ids, lora)
        return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.token_nll(ids, targets).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers
# ----------------------------------------------------------------------------------------------------------------------


@torch.compile
def newton_schulz(g: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Each rank orthogonalises every world-th matrix; the updates travel in one flat buffer."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, steps: int, wd: float, ranks: Ranks) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, wd=wd))
        self.steps, self.ranks = steps, ranks

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=self.ranks.device, dtype=torch.bfloat16)
            at = 0
            for k, p in enumerate(params):
                if k % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    buf = state["momentum"]
                    buf.lerp_(p.grad, 1 - group["momentum"])
                    update = newton_schulz(p.grad.lerp(buf, group["momentum"]), self.steps)
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.flatten()
                at += p.numel()
            self.ranks.sum(flat)
            at = 0
            for p in params:
                p.mul_(1 - group["lr"] * group["wd"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


def make_optimizers(s: Settings, model: CaseOpGPT, ranks: Ranks) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 2]
    chosen = {id(p) for p in matrices} | {id(model.embed.weight)}
    scalars = [p for p in model.parameters() if id(p) not in chosen]
    betas = (s.beta1, s.beta2)
    adam = dict(betas=betas, eps=s.adam_eps, fused=True)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, s.matrix_lr, s.muon_momentum_start, s.muon_ns_steps, s.muon_wd, ranks),
        torch.optim.AdamW([model.embed.weight], lr=s.embed_lr, weight_decay=s.embed_wd, **adam),
        torch.optim.AdamW(scalars, lr=s.scalar_lr, weight_decay=0.0, **adam),
    ]
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


class Average:
    """Exponential average of the weights, in fp32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.kept = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.kept[k].lerp_(v.detach().float(), 1 - self.decay)

    def apply(self, model: nn.Module) -> None:
        now = model.state_dict()
        model.load_state_dict({k: v.to(now[k].dtype) for k, v in self.kept.items()}, strict=True)


# ----------------------------------------------------------------------------------------------------------------------
# Quantisation: GPTQ, int6 attention, int5 MLP, int8 embedding; the rest fp16
# ----------------------------------------------------------------------------------------------------------------------


class Hessians:
    """Sums x x^T of what goes into each linear layer; the embedding's is that of the head's input."""

    def __init__(self, model: CaseOpGPT) -> None:
        self.sums: dict[str, Tensor] = {}
        self.hooks = []
        for name, part in model.named_modules():
            if isinstance(part, CastLinear):
                self.hooks.append(part.register_forward_hook(self._hook(name + ".weight")))

    def _hook(self, key: str):
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.add(key, inputs[0])

        return add

    def add(self, key: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.size(-1)).float()
        if key not in self.sums:
            self.sums[key] = torch.zeros(flat.size(1), flat.size(1), device=flat.device)
        self.sums[key].addmm_(flat.T, flat)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def collect_hessians(s: Settings, model: CaseOpGPT, loader: TrainLoader, ranks: Ranks) -> dict[str, Tensor]:
    """Training text only, inside the 600 s of training."""
    hessians = Hessians(model)
    model.eval()
    rows = s.calib_rows * ranks.world
    for _ in range(s.calib_batches):
        x, _ = loader.next_batch(rows * s.train_seq_len, s.train_seq_len, 1)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hessians.add("embed.weight", model.hidden(x))
    hessians.close()
    for key in sorted(hessians.sums):
        ranks.sum(hessians.sums[key])
        hessians.sums[key] /= s.calib_batches * rows * s.train_seq_len
    model.train()
    return hessians.sums


def gptq(w: Tensor, h: Tensor, bits: int, clip_sd: float, s: Settings) -> tuple[Tensor, Tensor]:
    """Rounds w column by column, each error being spread over the columns not yet rounded. int8 values, fp16 row scales."""
    top = 2 ** (bits - 1) - 1
    w = w.detach().float().clone()
    h = h.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(s.gptq_damp * h.diagonal().mean())
    scale = (clip_sd * w.std(dim=1) / top).clamp_min(1e-8).to(torch.float16)
    step = scale.float().unsqueeze(1)
    order = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, order], h[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for begin in range(0, w.size(1), s.gptq_block):
        end = min(begin + s.gptq_block, w.size(1))
        errors = torch.zeros_like(w[:, begin:end])
        for j in range(begin, end):
            column = w[:, j : j + 1]
            q[:, j : j + 1] = (column / step).round().clamp(-top, top)
            err = (column - q[:, j : j + 1] * step) / inverse[j, j]
            w[:, j:end] -= err @ inverse[j : j + 1, j:end]
            errors[:, j - begin : j - begin + 1] = err
        w[:, end:] -= errors @ inverse[begin:end, end:]
    return q[:, torch.argsort(order)].to(torch.int8), scale


def quantise(s: Settings, state: dict[str, Tensor], hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packed state: NAME.q and NAME.scale for matrices, NAME for what stays fp16."""
    packed: dict[str, Tensor] = {}
    for name, t in state.items():
        if name not in hessians:
            packed[name] = t.detach().to(torch.float16).cpu()
            continue
        if name.startswith("embed"):
            bits, clip = s.embed_bits, s.embed_clip_sd
        elif ".mlp." in name:
            bits, clip = s.mlp_bits, s.mlp_clip_sd
        else:
            bits, clip = s.attn_bits, s.attn_clip_sd
        q, scale = gptq(t, hessians[name], bits, clip, s)
        packed[name + ".q"], packed[name + ".scale"] = q.cpu(), scale.cpu()
    return packed


def dequantise(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, t in packed.items():
        if name.endswith(".q"):
            scale = packed[name[:-2] + ".scale"].float()
            state[name[:-2]] = t.float() * scale.unsqueeze(1)
        elif not name.endswith(".scale"):
            state[name] = t.float()
    return state


def shuffle_bytes(raw: bytes, width: int) -> bytes:
    """All first bytes of the values, then all second bytes: brotli likes them apart."""
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, width).T.tobytes()


def unshuffle_bytes(raw: bytes, width: int) -> bytes:
    return np.frombuffer(raw, dtype=np.uint8).reshape(width, -1).T.tobytes()


DTYPES = {"i1": (torch.int8, np.int8, 1), "f2": (torch.float16, np.float16, 2)}


def pack(packed: dict[str, Tensor], quality: int) -> bytes:
    """A JSON head (names, types, shapes), then the shuffled values, all under brotli."""
    head, body = [], io.BytesIO()
    for name, t in packed.items():
        kind = "i1" if t.dtype == torch.int8 else "f2"
        head.append([name, kind, list(t.shape)])
        body.write(shuffle_bytes(t.contiguous().numpy().tobytes(), DTYPES[kind][2]))
    text = json.dumps(head, separators=(",", ":")).encode()
    return brotli.compress(struct.pack("<I", len(text)) + text + body.getvalue(), quality=quality, lgwin=24)


def unpack(blob: bytes) -> dict[str, Tensor]:
    raw = brotli.decompress(blob)
    (length,) = struct.unpack_from("<I", raw)
    at = 4 + length
    packed: dict[str, Tensor] = {}
    for name, kind, shape in json.loads(raw[4:at]):
        _, np_type, width = DTYPES[kind]
        size = math.prod(shape) * width
        values = np.frombuffer(unshuffle_bytes(raw[at : at + size], width), dtype=np_type)
        packed[name] = torch.from_numpy(values.reshape(shape).copy())
        at += size
    return packed


# ----------------------------------------------------------------------------------------------------------------------
# Scoring
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    loss: float  # nats per token
    bpb: float  # bits per original byte
    tokens: int
    bytes: int

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f} tokens:{self.tokens} bytes:{self.bytes}"


class Ledger:
    """Sums nats, bytes and tokens of what was scored, in fp64 and over all ranks."""

    def __init__(self, tables: ByteTables, ranks: Ranks) -> None:
        self.tables, self.ranks = tables, ranks
        self.nats = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=ranks.device)

    def add(self, nll: Tensor, prev_ids: Tensor, target_ids: Tensor, scored: Tensor) -> None:
        self.nats += nll.detach().double()[scored].sum()
        self.bytes += self.tables.count(prev_ids, target_ids)[scored].sum()
        self.tokens += scored.sum()

    def result(self) -> Score:
        sums = self.ranks.sum(torch.stack((self.nats, self.bytes, self.tokens)))
        nats, n_bytes, tokens = sums.tolist()
        bpb = nats / math.log(2.0) / n_bytes
        return Score(nats / tokens, bpb, int(tokens), int(n_bytes))


def check_bytes(s: Settings, tables: ByteTables, tokens: Tensor, log: Log) -> None:
    """The table's total against the sidecar's, which was counted from the original text. Every token is a target once,
    except the very first, a BOS without a byte."""
    counted = 0
    for begin in range(0, tokens.numel() - 1, 1 << 22):
        part = tokens[begin : begin + (1 << 22) + 1]
        counted += int(tables.count(part[:-1], part[1:]).sum())
    side = int(read_shards(s.val_byte_files).to(torch.int64).sum())
    operators = int(tables.operator[tokens].sum())
    log(f"val_bytes table:{counted} sidecar:{side} tokens:{tokens.numel()} operators:{operators}")
    if counted != side:
        raise ValueError(f"the byte table counts {counted}, the sidecar {side}")


@torch.no_grad()
def evaluate_sliding(
    s: Settings, model: CaseOpGPT, tokens: Tensor, tables: ByteTables, ranks: Ranks, stride: int
) -> Score:
    """Every target once: the first window whole, then windows that each score the `stride` targets not yet scored."""
    seq, total = s.eval_seq_len, tokens.numel() - 1
    stride = min(stride, seq)
    segments = [(0, min(seq, total))]
    segments += [(a, min(a + stride, total)) for a in range(seq, total, stride)]
    mine = segments[ranks.rank :: ranks.world]
    ledger = Ledger(tables, ranks)
    was_training = model.training
    model.eval()
    nll_of = torch.compile(model.token_nll, dynamic=False)
    span = torch.arange(seq, device=ranks.device)
    for at in range(0, len(mine), s.eval_rows):
        rows = mine[at : at + s.eval_rows]
        rows_here = len(rows)
        rows = rows + [(0, 0)] * (s.eval_rows - rows_here)  # empty rows keep the shape, they score nothing
        first = torch.tensor([a for a, _ in rows], device=ranks.device).unsqueeze(1)
        last = torch.tensor([b for _, b in rows], device=ranks.device).unsqueeze(1)
        place = (last - seq).clamp_min(0) + span
        scored = (place >= first) & (place < last)
        place = place.clamp_max(total - 1)
        x, y = tokens[place], tokens[place + 1]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            nll = nll_of(x, y)
        ledger.add(nll, x, y, scored)
    model.train(was_training)
    return ledger.result()


# ----------------------------------------------------------------------------------------------------------------------
# Test-time training by documents: a LoRA per document, each chunk is scored and then learnt from. In phases: when all
# ranks have scored the documents of a phase, the shared weights take one pass over those documents, for the rest.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    start: int  # where its BOS stands in the stream
    targets: int  # the tokens after it, with the BOS of the next document


def find_documents(tokens: Tensor, bos: int) -> list[Document]:
    """All targets of the stream, each in exactly one document."""
    starts = (tokens == bos).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        raise ValueError("the validation stream does not begin with BOS")
    ends = starts[1:] + [tokens.numel() - 1]
    return [Document(a, b - a) for a, b in zip(starts, ends) if b > a]


class DocumentBatch:
    """Windows over some documents: chunk c of each, with what stands before it in the same document."""

    def __init__(self, s: Settings, tokens: Tensor, docs: list[Document], device: torch.device) -> None:
        self.s, self.tokens, self.device = s, tokens, device
        pad = s.ttt_batch_docs - len(docs)
        self.start = torch.tensor([d.start for d in docs] + [0] * pad, device=device).unsqueeze(1)
        self.n = torch.tensor([d.targets for d in docs] + [0] * pad, device=device).unsqueeze(1)
        self.longest = max(d.targets for d in docs)

    def chunks(self) -> int:
        return -(-self.longest // self.s.ttt_chunk)

    def window(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets, and which targets are of this chunk."""
        first = torch.minimum(torch.full_like(self.n, chunk * self.s.ttt_chunk), self.n)
        last = torch.minimum(first + self.s.ttt_chunk, self.n)
        begin = (last - self.s.ttt_context).clamp_min(0)
        length = min((chunk + 1) * self.s.ttt_chunk, self.s.ttt_context)
        place = begin + torch.arange(length, device=self.device)
        scored = (place >= first) & (place < last)
        at = self.start + torch.minimum(place, (self.n - 1).clamp_min(0))
        return self.tokens[at], self.tokens[at + 1], scored


def lora_optimizer(s: Settings, lora: DocumentLora) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        lora.parameters(), lr=s.ttt_lr, betas=(0.0, s.ttt_beta2), eps=1e-10, weight_decay=s.ttt_wd, fused=True
    )


def score_documents(s: Settings, nll_of, lora: DocumentLora, batch: DocumentBatch, ledger: Ledger) -> None:
    lora.reset()
    opt = lora_optimizer(s, lora)
    chunks = batch.chunks()
    for chunk in range(chunks):
        x, y, scored = batch.window(chunk)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            nll = nll_of(x, y, lora)
        ledger.add(nll, x, y, scored)
        if chunk == chunks - 1:
            break  # nothing is left that could profit
        for _ in range(s.ttt_epochs):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                nll = nll_of(x, y, lora)
            # A row's loss touches no other row's LoRA, so the sum trains each document by itself.
            per_doc = (nll * scored).sum(dim=1) / scored.sum(dim=1).clamp_min(1)
            opt.zero_grad(set_to_none=True)
            per_doc.sum().backward()
            opt.step()


def learn_from_scored(s: Settings, model: CaseOpGPT, tokens: Tensor, docs: list[Document], ranks: Ranks) -> float:
    """One pass of SGD on the shared weights over documents that all ranks have scored. Returns the last loss."""
    seq = s.eval_seq_len
    begin, end = docs[0].start, docs[-1].start + docs[-1].targets
    rows = torch.arange(begin, end - seq, seq, device=ranks.device)
    per_step = s.global_rows * ranks.world
    steps = rows.numel() // per_step
    params = list(model.parameters())
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=s.global_lr, momentum=s.global_momentum)
    span = torch.arange(seq, device=ranks.device)
    loss = torch.zeros((), device=ranks.device)
    for k in range(steps):
        for group in opt.param_groups:
            group["lr"] = s.global_lr * 0.5 * (1 + math.cos(math.pi * k / steps))
        mine = rows[k * per_step + ranks.rank * s.global_rows :][: s.global_rows].unsqueeze(1)
        x, y = tokens[mine + span], tokens[mine + span + 1]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        for p in params:
            if p.grad is not None:
                ranks.mean(p.grad)
        torch.nn.utils.clip_grad_norm_(params, s.global_clip)
        opt.step()
    for p in params:
        p.requires_grad_(False)
        p.grad = None
    return float(loss)


def warm_up_ttt(s: Settings, nll_of, lora: DocumentLora, ranks: Ranks) -> None:
    """Compiles both passes on random tokens; the LoRA is reset before it is used."""
    for length in (s.ttt_chunk, 2 * s.ttt_chunk):
        x = torch.randint(0, s.vocab_size, (lora.rows, length), device=ranks.device)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            with torch.no_grad():
                nll_of(x, x, lora)
            nll_of(x, x, lora).sum().backward()
    lora.zero_grad(set_to_none=True)


def evaluate_phased(
    s: Settings, model: CaseOpGPT, tokens: Tensor, tables: ByteTables, ranks: Ranks, log: Log
) -> Score:
    docs = find_documents(tokens, model.bos)
    ledger = Ledger(tables, ranks)
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    lora = DocumentLora(s, s.ttt_batch_docs).to(ranks.device)
    nll_of = torch.compile(model.token_nll, dynamic=True)
    warm_up_ttt(s, nll_of, lora, ranks)
    ends = s.phase_ends(len(docs))
    begin = 0
    for phase, end in enumerate(ends):
        # Within a phase the documents do not see each other, so they may go by length, which wastes least padding.
        members = sorted(range(begin, end), key=lambda i: (docs[i].targets, i))
        batches = [members[i : i + s.ttt_batch_docs] for i in range(0, len(members), s.ttt_batch_docs)]
        for batch in batches[ranks.rank :: ranks.world]:
            windows = DocumentBatch(s, tokens, [docs[i] for i in batch], ranks.device)
            score_documents(s, nll_of, lora, windows, ledger)
        ranks.barrier()
        if end < len(docs):
            last = learn_from_scored(s, model, tokens, docs[begin:end], ranks)
            log(f"ttt_phase:{phase + 1}/{len(ends)} documents:{end} global_loss:{last:.4f}")
        begin = end
    return ledger.result()


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def lr_factor(s: Settings, frac: float) -> float:
    """frac: the part of the training time that has passed."""
    if frac < 1 - s.warmdown_frac:
        return 1.0
    return max((1 - frac) / s.warmdown_frac, 0.0)


def warm_up_training(s: Settings, model: CaseOpGPT, step_loss, optimizers, ranks: Ranks, rows: int) -> None:
    """Compiles what training will run, on random tokens, and puts everything back as it was."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    opt_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    for k in range(s.warmup_steps):
        model.looping = k >= s.warmup_steps // 2
        x = torch.randint(0, s.vocab_size, (rows, s.train_seq_len), device=ranks.device)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = step_loss(x, x)
        loss.backward()
        for opt in optimizers:
            opt.step()
        model.zero_grad(set_to_none=True)
    model.looping = False
    model.load_state_dict(state, strict=True)
    for opt, saved in zip(optimizers, opt_states):
        opt.load_state_dict(saved)


def train(
    s: Settings, model: CaseOpGPT, val_tokens: Tensor, tables: ByteTables, ranks: Ranks, log: Log
) -> tuple[TrainLoader, float]:
    """Trains until the clock or the steps run out and leaves the average in the model. Returns the loader and the start
    of the clock."""
    accum = max(8 // ranks.world, 1)
    local_rows = s.train_batch_tokens // (ranks.world * accum * s.train_seq_len)
    optimizers = make_optimizers(s, model, ranks)
    step_loss = torch.compile(model, dynamic=False)
    warm_up_training(s, model, step_loss, optimizers, ranks, local_rows)
    loader = TrainLoader(s.train_files, ranks)
    average = Average(model, s.ema_decay)
    budget = s.max_wallclock_seconds - s.gptq_reserve_seconds
    torch.cuda.synchronize()
    ranks.barrier()
    started = time.perf_counter()
    step, stop = 0, False
    while not stop and step < s.iterations:
        elapsed = time.perf_counter() - started
        frac = max(elapsed / budget, step / s.iterations)
        if not model.looping and ranks.any(frac >= s.loop_from_frac):
            model.looping = True
            log(f"depth_recurrence:on step:{step} order:{model.loop_order}")
        factor = lr_factor(s, frac)
        warm = min(step / max(s.muon_momentum_steps, 1), 1.0)
        for group in optimizers[0].param_groups:
            group["momentum"] = s.muon_momentum_start + warm * (s.muon_momentum - s.muon_momentum_start)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * factor
        train_loss = torch.zeros((), device=ranks.device)
        for _ in range(accum):
            x, y = loader.next_batch(s.train_batch_tokens, s.train_seq_len, accum)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = step_loss(x, y)
            train_loss += loss.detach() / accum
            (loss / accum).backward()
        for p in model.parameters():
            if p.grad is not None:
                ranks.mean(p.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        for opt in optimizers:
            opt.step()
        model.zero_grad(set_to_none=True)
        average.update(model)
        step += 1
        elapsed = time.perf_counter() - started
        if step % s.train_log_every == 0 or step <= 5:
            log(f"step:{step}/{s.iterations} train_loss:{train_loss.item():.4f} train_time:{1000 * elapsed:.0f}ms")
        if s.val_loss_every > 0 and step % s.val_loss_every == 0:
            # For the log only. The clock goes on: what is spent here is lost to training.
            log(f"step:{step} {evaluate_sliding(s, model, val_tokens, tables, ranks, s.eval_seq_len)}")
        stop = ranks.any(elapsed >= budget)
    torch.cuda.synchronize()
    log(f"stopped step:{step} train_time:{1000 * (time.perf_counter() - started):.0f}ms")
    average.apply(model)
    return loader, started


def compress_model(s: Settings, model: CaseOpGPT, loader: TrainLoader, started: float, ranks: Ranks, log: Log) -> None:
    """Calibrates and rounds inside the training time; what follows the clock is brotli alone."""
    began = time.perf_counter()
    hessians = collect_hessians(s, model, loader, ranks)
    torch.cuda.synchronize()
    log(f"gptq:calibrated on training text in {time.perf_counter() - began:.1f}s")
    packed = quantise(s, model.state_dict(), hessians)
    spent = time.perf_counter() - started
    log(f"gptq:rounded train_time_with_gptq:{1000 * spent:.0f}ms")
    if spent > s.max_wallclock_seconds:
        raise RuntimeError(f"training with quantisation took {spent:.1f}s")
    if ranks.main:
        blob = pack(packed, s.brotli_quality)
        Path(s.artifact_path).write_bytes(blob)
        report_size(s, len(blob), log)
    ranks.barrier()


def report_size(s: Settings, model_bytes: int, log: Log) -> None:
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + model_bytes
    log(f"size model:{model_bytes} code:{code_bytes} total:{total} limit:{s.size_limit}")
    if total > s.size_limit:
        raise RuntimeError(f"{total - s.size_limit} bytes too many")


def load_model(s: Settings, bos: int, ranks: Ranks) -> CaseOpGPT:
    """The model as the artifact holds it, and nothing else of the training."""
    model = CaseOpGPT(s, bos).to(ranks.device)
    state = dequantise(unpack(Path(s.artifact_path).read_bytes()))
    model.load_state_dict({k: v.to(ranks.device) for k, v in state.items()}, strict=True)
    model.looping = True
    return model


def final_evaluation(s: Settings, bos: int, tokens: Tensor, tables: ByteTables, ranks: Ranks, log: Log) -> Score:
    """Reads the artifact back and scores the whole split. The score is the phased one; the sliding window before it, of
    the model as packed, is what it is compared with."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    model = load_model(s, bos, ranks)
    sliding = evaluate_sliding(s, model, tokens, tables, ranks, s.eval_stride)
    log(f"sliding_window stride:{s.eval_stride} {sliding} eval_time:{time.perf_counter() - began:.1f}s")
    final = sliding
    if s.ttt_enabled:
        final = evaluate_phased(s, model, tokens, tables, ranks, log)
        log(f"phased_ttt {final} eval_time:{time.perf_counter() - began:.1f}s")
    torch.cuda.synchronize()
    spent = time.perf_counter() - began
    log(f"eval_total_time:{spent:.1f}s scored:{final.tokens}/{tokens.numel() - 1}")
    if spent > s.eval_limit_seconds:
        raise RuntimeError(f"evaluation took {spent:.1f}s")
    return final


def start_ranks() -> Ranks:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", device_id=device)
    return Ranks(rank, world, device)


def main() -> None:
    s = Settings.from_env()
    if sys.argv[1:2] == ["prepare"]:
        prepare(s, sys.argv[2])
        return
    ranks = start_ranks()
    log = Log(f"logs/{s.run_id}_{s.seed}.txt", ranks.main)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    random.seed(s.seed)
    np.random.seed(s.seed)
    torch.manual_seed(s.seed)
    torch.cuda.manual_seed_all(s.seed)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"python {sys.version.split()[0]} torch {torch.__version__} world:{ranks.world} seed:{s.seed}")
    log(" ".join(f"{f.name}={getattr(s, f.name)}" for f in fields(s)), console=False)

    sp = spm.SentencePieceProcessor(model_file=s.tokenizer_path)
    if int(sp.vocab_size()) != s.vocab_size:
        raise ValueError(f"the tokenizer has {sp.vocab_size()} pieces, not {s.vocab_size}")
    bos = sp.bos_id()
    tables = build_byte_tables(sp, s.vocab_size, ranks.device)
    val_tokens = read_shards(s.val_files).to(torch.int64).to(ranks.device)
    check_bytes(s, tables, val_tokens, log)

    model = CaseOpGPT(s, bos).to(ranks.device)
    for p in model.parameters():  # orthogonal init is drawn alike on all ranks; this makes sure of it
        if ranks.world > 1:
            dist.broadcast(p.data, 0)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    loader, started = train(s, model, val_tokens, tables, ranks, log)
    compress_model(s, model, loader, started, ranks, log)
    del model, loader
    torch.cuda.empty_cache()

    final = final_evaluation(s, bos, val_tokens, tables, ranks, log)
    log(f"final val_loss:{final.loss:.8f} val_bpb:{final.bpb:.8f}")
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
