"""
Parameter Golf entry, forked from the modded-nanogpt speedrun and shrunk to 16 MB.

What is left of the speedrun: value embeddings, U-net skips, FlexAttention over packed documents, a sharded Muon,
logit softcap, batch-size and window schedules. What is new: int6 GPTQ, EMA weights, and at evaluation one LoRA per
document, trained on the chunks of that document which have already been scored, plus a small unigram cache per document.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

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
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# -----------------------------------------------------------------------------
# settings


def env(name: str, default):
    """A setting from the environment, of the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


class Settings:
    # data
    data_path = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = env("TRAIN_FILES", os.path.join(data_path, "fineweb_train_*.bin"))
    val_files = env("VAL_FILES", os.path.join(data_path, "fineweb_val_*.bin"))
    tokenizer_path = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    bos_id = env("BOS_ID", 1)

    # run
    run_id = env("RUN_ID", str(uuid.uuid4()))
    seed = env("SEED", 1337)
    iterations = env("ITERATIONS", 20000)
    warmup_steps = env("WARMUP_STEPS", 12)
    build_seconds = env("BUILD_SECONDS", 600.0)  # the whole cap: training, calibration and packing
    pack_reserve = env("PACK_RESERVE", 38.0)  # of which this is kept for GPTQ and the packing
    log_every = env("LOG_EVERY", 250)
    val_every = env("VAL_EVERY", 3000)

    # batch and window schedules: (share of the run at which the stage begins, value)
    batch_stages = [(0.0, 24 * 1024), (0.18, 40 * 1024), (0.42, 56 * 1024)]  # tokens per rank and step
    window_stages = [(0.0, 384), (0.30, 640), (0.62, 1024)]
    max_doc_len = env("MAX_DOC_LEN", 2048)

    # model
    vocab_size = env("VOCAB_SIZE", 1024)
    num_layers = env("NUM_LAYERS", 10)
    model_dim = env("MODEL_DIM", 512)
    num_heads = env("NUM_HEADS", 8)
    num_kv_heads = env("NUM_KV_HEADS", 4)
    mlp_mult = env("MLP_MULT", 3)
    rope_base = env("ROPE_BASE", 10000.0)
    logit_softcap = env("LOGIT_SOFTCAP", 30.0)
    smear_width = env("SMEAR_WIDTH", 12)

    # optimizers
    matrix_lr = env("MATRIX_LR", 0.025)
    embed_lr = env("EMBED_LR", 0.3)
    head_lr = env("HEAD_LR", 0.008)
    scalar_lr = env("SCALAR_LR", 0.04)
    muon_momentum = env("MUON_MOMENTUM", 0.95)
    muon_momentum_start = env("MUON_MOMENTUM_START", 0.85)
    muon_warmup = env("MUON_WARMUP", 400)
    muon_decay = env("MUON_DECAY", 0.02)
    adam_b1 = env("ADAM_B1", 0.8)
    adam_b2 = env("ADAM_B2", 0.95)
    cooldown = env("COOLDOWN", 0.45)
    final_lr = env("FINAL_LR", 0.03)
    ema_decay = env("EMA_DECAY", 0.997)
    ema_from = env("EMA_FROM", 0.55)

    # quantisation
    matrix_bits = env("MATRIX_BITS", 6)
    embed_bits = env("EMBED_BITS", 8)
    calib_batches = env("CALIB_BATCHES", 24)
    calib_tokens = env("CALIB_TOKENS", 16 * 1024)
    gptq_block = env("GPTQ_BLOCK", 128)
    gptq_damp = env("GPTQ_DAMP", 0.01)
    size_limit = env("SIZE_LIMIT", 16_000_000)
    out_file = env("OUT_FILE", "final_model.ptz")

    # evaluation
    eval_ctx = env("EVAL_CTX", 1024)
    eval_stride = env("EVAL_STRIDE", 64)
    eval_batch = env("EVAL_BATCH", 96)
    eval_seconds = env("EVAL_SECONDS", 600.0)
    slide_log = env("SLIDE_LOG", True)
    ttt_batch = env("TTT_BATCH", 48)
    ttt_chunk = env("TTT_CHUNK", 256)
    ttt_rank = env("TTT_RANK", 8)
    ttt_lr = env("TTT_LR", 0.008)
    ttt_b1 = env("TTT_B1", 0.9)
    ttt_b2 = env("TTT_B2", 0.95)
    ttt_steps = env("TTT_STEPS", 1)
    ttt_deadline = env("TTT_DEADLINE", 540.0)  # past this the LoRAs are scored with and no longer trained
    cache_weight = env("CACHE_WEIGHT", 0.06)
    cache_half = env("CACHE_HALF", 400.0)
    cache_on = env("CACHE_ON", True)


S = Settings

# -----------------------------------------------------------------------------
# process group and log


class World:
    """Who this process is."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        if not torch.cuda.is_available():
            raise RuntimeError("this script needs CUDA")
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        self.many = self.size > 1 or "RANK" in os.environ
        if self.many:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        torch.cuda.synchronize()
        if self.many:
            dist.barrier()

    def total(self, *values: Tensor) -> None:
        """Sums each tensor over the ranks, in place."""
        if self.many:
            for value in values:
                dist.all_reduce(value, op=dist.ReduceOp.SUM)

    def mean(self, value: Tensor) -> Tensor:
        if self.many:
            dist.all_reduce(value, op=dist.ReduceOp.AVG)
        return value

    def agree(self, number: float) -> float:
        """The chief's number, on every rank."""
        if not self.many:
            return number
        box = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box.item())

    def close(self) -> None:
        if self.many:
            dist.destroy_process_group()


class Tape:
    """The log. Only the chief writes; `say` goes to the file and the terminal, `jot` to the file alone."""

    def __init__(self, world: World, run_id: str) -> None:
        self.on = world.chief
        self.path = Path("logs") / f"{run_id}.txt"
        if self.on:
            self.path.parent.mkdir(exist_ok=True)
            self.path.touch()

    def jot(self, text: str) -> None:
        if self.on:
            with self.path.open("a", encoding="utf-8") as f:
                f.write(text + "\n")

    def say(self, text: str) -> None:
        if self.on:
            print(text, flush=True)
            self.jot(text)

    def row(self, tag: str, **fields) -> None:
        """One line of `tag | key=value ...`, floats in five digits."""
        parts = [f"{k}={v:.5f}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()]
        self.say(f"{tag} | " + " ".join(parts))


class Clock:
    """Wall time in seconds, which can be halted (for validation in between, as the speedrun does)."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def start(self) -> "Clock":
        torch.cuda.synchronize()
        self.since = time.perf_counter()
        return self

    def halt(self) -> None:
        torch.cuda.synchronize()
        self.spent = self.read()
        self.since = None

    def read(self) -> float:
        return self.spent + (time.perf_counter() - self.since if self.since is not None else 0.0)


# -----------------------------------------------------------------------------
# data

MAGIC, VERSION, HEADER = 20240520, 1, 256


def read_shard(path: Path) -> Tensor:
    head = np.fromfile(path, dtype="<i4", count=HEADER)
    if head.size != HEADER or int(head[0]) != MAGIC or int(head[1]) != VERSION:
        raise ValueError(f"{path}: not a token shard")
    count = int(head[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: {tokens.size} tokens, the header says {count}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def shard_list(pattern: str) -> list[Path]:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return files


class Stream:
    """The shards one after the other, over and over."""

    def __init__(self, pattern: str) -> None:
        self.files = shard_list(pattern)
        self.rewind()

    def rewind(self) -> None:
        self.at = 0
        self.pos = 0
        self.tokens = read_shard(self.files[0])

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left == 0:
                self.at = (self.at + 1) % len(self.files)
                self.tokens = read_shard(self.files[self.at])
                self.pos = 0
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Each step takes one span of the stream and gives every rank its own slice of it."""

    def __init__(self, pattern: str, world: World) -> None:
        self.world = world
        self.stream = Stream(pattern)

    def rewind(self) -> None:
        self.stream.rewind()

    def batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank, flat, int64."""
        span = self.stream.take(self.world.size * (tokens + 1))
        begin = self.world.rank * (tokens + 1)
        local = span[begin : begin + tokens + 1].to(torch.int32)
        local = local.pin_memory().to(self.world.device, non_blocking=True).long()
        return local[:-1], local[1:]


def load_validation(pattern: str) -> Tensor:
    return torch.cat([read_shard(p) for p in shard_list(pattern)]).to(torch.int32)


def document_spans(tokens: Tensor, bos_id: int) -> list[tuple[int, int]]:
    """(start, end) of each document; `end` takes in the next document's BOS, which is this one's last target.

    So every token of the stream but the first is a target of exactly one document.
    """
    starts = (tokens == bos_id).nonzero(as_tuple=True)[0].tolist()
    if not starts or starts[0] != 0:
        starts = [0] + starts
    total = tokens.numel()
    spans = []
    for i, start in enumerate(starts):
        end = starts[i + 1] + 1 if i + 1 < len(starts) else total
        if end - start >= 2:
            spans.append((start, end))
    return spans


# -----------------------------------------------------------------------------
# bytes per token


class ByteTable:
    """How many bytes of the original text a token stands for, from the sentencepiece model.

    A leading space mark is one byte, and none where the token before is a boundary (BOS and other control tokens),
    as the decoder drops it there. A byte-fallback token is one byte. Control, unknown and unused tokens have none.
    """

    def __init__(self, path: str, vocab_size: int, device: torch.device) -> None:
        sp = spm.SentencePieceProcessor(model_file=path)
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros(size, dtype=np.int16)
        space = np.zeros(size, dtype=np.bool_)
        boundary = np.ones(size, dtype=np.bool_)
        for i in range(int(sp.vocab_size())):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            boundary[i] = False
            if sp.is_byte(i):
                base[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                space[i] = True
                piece = piece[1:]
            base[i] = len(piece.encode("utf-8"))
        self.pieces = int(sp.vocab_size())
        self.base = torch.from_numpy(base).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.boundary = torch.from_numpy(boundary).to(device)

    def count(self, before: Tensor, token: Tensor) -> Tensor:
        """Bytes of each token, given the token before it."""
        n = self.base[token].to(torch.int32)
        n = n + (self.space[token] & ~self.boundary[before]).to(torch.int32)
        return n

    def check(self, world: World) -> None:
        if self.pieces != S.vocab_size:
            raise ValueError(f"VOCAB_SIZE={S.vocab_size}, the tokenizer has {self.pieces} pieces")


class Score:
    """Sums of a scoring: nats, tokens and bytes, over this rank and then over all."""

    def __init__(self, device: torch.device) -> None:
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, nll: Tensor, before: Tensor, token: Tensor, table: ByteTable) -> None:
        self.nats += nll.to(torch.float64).sum()
        self.tokens += float(token.numel())
        self.bytes += table.count(before, token).to(torch.float64).sum()

    def finish(self, world: World, expected: int | None = None) -> tuple[float, float]:
        """(nats per token, bits per byte) over all ranks."""
        world.total(self.nats, self.tokens, self.bytes)
        if expected is not None and int(self.tokens.item()) != expected:
            raise RuntimeError(f"{int(self.tokens.item())} tokens were scored, {expected} expected")
        loss = (self.nats / self.tokens).item()
        return loss, (self.nats / math.log(2.0) / self.bytes).item()


# -----------------------------------------------------------------------------
# model


flex = torch.compile(flex_attention, dynamic=False)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Dense(nn.Linear):
    """A bias-free linear layer, held in fp32 and applied in the input's type."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False) -> None:
        super().__init__(n_in, n_out, bias=False)
        with torch.no_grad():
            if zero:
                self.weight.zero_()
            else:
                bound = 0.5 * math.sqrt(3.0) * n_in**-0.5
                self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Half-truncated rotary embedding: the slower half of the frequencies stands still."""

    def __init__(self, dim: int, base: float, length: int = 65536) -> None:
        super().__init__()
        freq = (1.0 / base) ** torch.linspace(0, 1, dim // 4, dtype=torch.float32)
        freq = torch.cat([freq, freq.new_zeros(dim // 4)])
        theta = torch.outer(torch.arange(length, dtype=torch.float32), freq)
        self.register_buffer("cos", theta.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", theta.sin()[None, :, None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[:, : x.size(1)].to(x.dtype), self.sin[:, : x.size(1)].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, has_ve: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = S.num_heads, S.num_kv_heads
        self.head_dim = S.model_dim // S.num_heads
        kv = self.kv_heads * self.head_dim
        self.q = Dense(S.model_dim, S.model_dim)
        self.k = Dense(S.model_dim, kv)
        self.v = Dense(S.model_dim, kv)
        self.o = Dense(S.model_dim, S.model_dim, zero=True)
        self.v_mix = nn.Parameter(torch.tensor([0.5, 0.5] if has_ve else [1.0, 0.0]))
        self.temper = nn.Parameter(torch.full((self.heads,), 1.2))

    def forward(self, x: Tensor, ve: Tensor | None, rotary: Rotary, mask: BlockMask, lora: "LayerLoRA | None") -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if lora is not None:
            q, v = q + lora.q(x), v + lora.v(x)
        q = rotary(rms(q.view(b, t, self.heads, self.head_dim)))
        k = rotary(rms(k.view(b, t, self.kv_heads, self.head_dim)))
        v = v.view(b, t, self.kv_heads, self.head_dim)
        mix = self.v_mix.to(v.dtype)
        v = mix[0] * v if ve is None else mix[0] * v + mix[1] * ve.view_as(v)
        q = q * self.temper.to(q.dtype)[None, None, :, None]
        y = flex(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class ReluSquared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Dense(S.model_dim, S.mlp_mult * S.model_dim)
        self.down = Dense(S.mlp_mult * S.model_dim, S.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, has_ve: bool) -> None:
        super().__init__()
        self.attn = Attention(has_ve)
        self.mlp = ReluSquared()
        self.stay = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, rotary: Rotary, mask: BlockMask, lora) -> Tensor:
        stay = self.stay.to(x.dtype)
        x = stay[0] * x + stay[1] * x0
        x = x + self.attn(rms(x), ve, rotary, mask, lora)
        return x + self.mlp(rms(x))


class Smear(nn.Module):
    """Adds a gated share of the previous token's embedding; a document's first token gets nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = Dense(width, 1, zero=True)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x[:, 1:, : self.gate.in_features])) * self.scale.to(x.dtype)
        gate = gate * (ids[:, 1:] != S.bos_id).unsqueeze(-1).to(x.dtype)
        return torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        n = S.num_layers
        kv = S.num_kv_heads * S.model_dim // S.num_heads
        self.embed = nn.Embedding(S.vocab_size, S.model_dim)
        self.value_embeds = nn.ModuleList([nn.Embedding(S.vocab_size, kv) for _ in range(2)])
        self.ve_at = {0: 0, 1: 1, n - 2: 0, n - 1: 1}
        self.smear = Smear(S.smear_width)
        self.blocks = nn.ModuleList([Block(i in self.ve_at) for i in range(n)])
        self.skips = nn.Parameter(torch.ones(n // 2))
        self.rotary = Rotary(S.model_dim // S.num_heads, S.rope_base)
        self.head = Dense(S.model_dim, S.vocab_size, zero=True)
        nn.init.normal_(self.embed.weight, std=0.02)
        for table in self.value_embeds:
            nn.init.normal_(table.weight, std=0.01)

    def logits(self, ids: Tensor, long: BlockMask, short: BlockMask, lora: "DocLoRA | None" = None) -> Tensor:
        """[B, T, V] in fp32: position i tells the token after ids[:, i]."""
        x = rms(self.embed(ids).to(torch.bfloat16))
        x = x0 = self.smear(x, ids)
        ve = [table(ids).to(x.dtype) for table in self.value_embeds]
        n, kept = len(self.blocks), []
        for i, block in enumerate(self.blocks):
            if i >= n - n // 2:
                x = x + self.skips[i - (n - n // 2)].to(x.dtype) * kept.pop()
            mask = long if i % 4 == 0 or i == n - 1 else short
            layer = lora.layers[i] if lora is not None else None
            x = block(x, x0, ve[self.ve_at[i]] if i in self.ve_at else None, self.rotary, mask, layer)
            if i < n // 2:
                kept.append(x)
        x = rms(x)
        out = self.head(x)
        if lora is not None:
            out = out + lora.head(x)
        return S.logit_softcap * torch.tanh(out.float() / S.logit_softcap)

    def forward(self, ids: Tensor, targets: Tensor, long: BlockMask, short: BlockMask) -> Tensor:
        out = self.logits(ids, long, short)
        return F.cross_entropy(out.view(-1, out.size(-1)), targets.reshape(-1))


# masks. The training mask is rebuilt for each batch, the evaluation's once per shape.


def packed_masks(ids: Tensor, window: int) -> tuple[BlockMask, BlockMask]:
    """Causal within the document, over at most `window` tokens; the short mask sees half as far."""
    docs = (ids == S.bos_id).cumsum(0)
    t = ids.numel()

    def build(span: int) -> BlockMask:
        def rule(b, h, q, k):
            return (q >= k) & (docs[q] == docs[k]) & (q - k < span)

        return create_block_mask(rule, None, None, t, t, device=ids.device, BLOCK_SIZE=128, _compile=True)

    return build(window), build(max(128, window // 2))


def row_masks(length: int, device: torch.device) -> tuple[BlockMask, BlockMask]:
    """For rows that each hold one document's text: causal, with the windows of the end of the training."""
    window = S.window_stages[-1][1]

    def build(span: int) -> BlockMask:
        def rule(b, h, q, k):
            return (q >= k) & (q - k < span)

        return create_block_mask(rule, None, None, length, length, device=device, BLOCK_SIZE=128)

    return build(window), build(max(128, window // 2))


# -----------------------------------------------------------------------------
# one LoRA per document


class BatchedLoRA(nn.Module):
    """A low-rank addition to a linear layer, another one for each row of the batch."""

    def __init__(self, rows: int, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rows, n_in, rank))
        self.b = nn.Parameter(torch.empty(rows, rank, n_out))
        self.bound = n_in**-0.5
        self.clear()

    @torch.no_grad()
    def clear(self, row: int | None = None) -> None:
        """Makes one row (or all) anew: the addition is nothing until it is trained."""
        at = slice(None) if row is None else slice(row, row + 1)
        self.a[at].uniform_(-self.bound, self.bound)
        self.b[at].zero_()

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class LayerLoRA(nn.Module):
    def __init__(self, rows: int, rank: int) -> None:
        super().__init__()
        kv = S.num_kv_heads * S.model_dim // S.num_heads
        self.q = BatchedLoRA(rows, S.model_dim, S.model_dim, rank)
        self.v = BatchedLoRA(rows, S.model_dim, kv, rank)


class DocLoRA(nn.Module):
    """The adapters of a batch of documents."""

    def __init__(self, rows: int, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LayerLoRA(rows, rank) for _ in range(S.num_layers)])
        self.head = BatchedLoRA(rows, S.model_dim, S.vocab_size, rank)

    def clear(self, row: int | None = None) -> None:
        for module in self.modules():
            if isinstance(module, BatchedLoRA):
                module.clear(row)


class RowAdam:
    """Adam for the adapters, in which every row has its own step count and can be begun anew."""

    def __init__(self, lora: DocLoRA, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        self.params = list(lora.parameters())
        self.lr, self.betas, self.eps = lr, betas, eps
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.steps = torch.zeros(self.params[0].size(0), 1, 1, device=self.params[0].device)

    def clear(self, row: int) -> None:
        for buf in self.m + self.v:
            buf[row].zero_()
        self.steps[row] = 0.0

    @torch.no_grad()
    def step(self, grads: list[Tensor], rows: Tensor) -> None:
        """rows: [B] bool, those that move."""
        on = rows.view(-1, 1, 1).to(self.steps.dtype)
        self.steps += on
        b1, b2 = self.betas
        count = self.steps.clamp_min(1.0)
        for p, g, m, v in zip(self.params, grads, self.m, self.v):
            m.lerp_(g, on * (1 - b1))
            v.lerp_(g.square(), on * (1 - b2))
            step = (m / (1 - b1**count)) / ((v / (1 - b2**count)).sqrt() + self.eps)
            p.sub_(self.lr * on * step)


# -----------------------------------------------------------------------------
# optimizers


@torch.compile
def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz on a stack of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        y = x @ x.mT
        x = a * x + (b * y + c * (y @ y)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon over ranks: gradients of one shape are stacked and reduce-scattered, each rank steps its share of the
    matrices, and the updates are gathered again."""

    def __init__(self, params: list[Tensor], world: World, lr: float, momentum: float, weight_decay: float) -> None:
        self.world = world
        shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for p in params:
            shapes[tuple(p.shape)].append(p)
        groups = []
        for shape in sorted(shapes):
            share = -(-len(shapes[shape]) // world.size)
            groups.append(dict(params=shapes[shape], share=share))
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        world, jobs = self.world, []
        for group in self.param_groups:
            params, share = group["params"], group["share"]
            stack = torch.zeros(share * world.size, *params[0].shape, device=world.device, dtype=torch.bfloat16)
            for i, p in enumerate(params):
                stack[i].copy_(p.grad)
            if world.many:
                mine = torch.empty_like(stack[:share])
                work = dist.reduce_scatter_tensor(mine, stack, op=dist.ReduceOp.AVG, async_op=True)
            else:
                mine, work = stack, None
            jobs.append((group, mine, work))
        gathers = []
        for group, mine, work in jobs:
            if work is not None:
                work.wait()
            state = self.state[group["params"][0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(mine, dtype=torch.float32)
            buf = state["momentum"]
            g = mine.float()
            buf.lerp_(g, 1 - group["momentum"])
            update = orthogonalise(g.lerp(buf, group["momentum"]))
            if world.many:
                whole = torch.empty(group["share"] * world.size, *mine.shape[1:], device=mine.device, dtype=update.dtype)
                work = dist.all_gather_into_tensor(whole, update.contiguous(), async_op=True)
            else:
                whole, work = update, None
            gathers.append((group, whole, work))
        for group, whole, work in gathers:
            if work is not None:
                work.wait()
            lr, decay = group["lr"], group["weight_decay"]
            for i, p in enumerate(group["params"]):
                p.mul_(1 - lr * decay)
                p.add_(whole[i].to(p.dtype), alpha=-lr * max(1.0, p.size(-2) / p.size(-1)) ** 0.5)


class ShardAdam(torch.optim.Optimizer):
    """Adam over ranks: tables are stepped by rows, each rank its own; what does not divide is stepped by everybody."""

    def __init__(self, groups: list[dict], world: World, betas: tuple[float, float], eps: float = 1e-10) -> None:
        self.world = world
        super().__init__(groups, dict(lr=1e-3, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self) -> None:
        world, jobs = self.world, []
        for group in self.param_groups:
            for p in group["params"]:
                split = world.many and p.ndim == 2 and p.size(0) % world.size == 0 and p.numel() >= 65536
                if split:
                    grad = torch.empty_like(p.grad[: p.size(0) // world.size])
                    work = dist.reduce_scatter_tensor(grad, p.grad, op=dist.ReduceOp.AVG, async_op=True)
                else:
                    grad = p.grad
                    work = dist.all_reduce(grad, op=dist.ReduceOp.AVG, async_op=True) if world.many else None
                jobs.append((group, p, grad, work, split))
        gathers = []
        for group, p, grad, work, split in jobs:
            if work is not None:
                work.wait()
            rows = p.size(0) // world.size if split else 0
            part = p[world.rank * rows : (world.rank + 1) * rows] if split else p
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["m"] = torch.zeros_like(part)
                state["v"] = torch.zeros_like(part)
            state["step"] += 1
            b1, b2 = group["betas"]
            state["m"].lerp_(grad, 1 - b1)
            state["v"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
            m = state["m"] / (1 - b1 ** state["step"])
            v = state["v"] / (1 - b2 ** state["step"])
            part.sub_(m / (v.sqrt() + group["eps"]), alpha=group["lr"])
            if split:
                gathers.append(dist.all_gather_into_tensor(p.data, part.clone(), async_op=True))
        for work in gathers:
            work.wait()


def make_optimizers(model: GPT, world: World) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    scalars = [p for p in model.blocks.parameters() if p.ndim < 2] + [model.skips, model.smear.scale]
    scalars.append(model.smear.gate.weight)
    tables = [model.embed.weight] + [t.weight for t in model.value_embeds]
    adam = ShardAdam(
        [
            dict(params=tables, lr=S.embed_lr),
            dict(params=[model.head.weight], lr=S.head_lr),
            dict(params=scalars, lr=S.scalar_lr),
        ],
        world,
        (S.adam_b1, S.adam_b2),
    )
    muon = Muon(matrices, world, S.matrix_lr, S.muon_momentum, S.muon_decay)
    for opt in (adam, muon):
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return [adam, muon]


class Average:
    """An exponential average of the weights, in fp32, begun late in the run."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.held: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, model: GPT) -> None:
        if self.held is None:
            self.held = {k: v.detach().clone() for k, v in model.named_parameters()}
            return
        for k, v in model.named_parameters():
            self.held[k].lerp_(v.detach(), 1 - self.decay)

    @torch.no_grad()
    def put_into(self, model: GPT) -> None:
        if self.held is not None:
            for k, v in model.named_parameters():
                v.copy_(self.held[k])


# -----------------------------------------------------------------------------
# quantisation: GPTQ for the matrices, rounding by rows for the tables, fp16 for the rest


def dense_layers(model: GPT) -> dict[str, Dense]:
    """What GPTQ takes: the matrices of the blocks and the head."""
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, Dense) and (n.startswith("blocks.") or n == "head")}


@torch.no_grad()
def gather_hessians(model: GPT, loader: TrainLoader, world: World, clock: Clock) -> dict[str, Tensor]:
    """X^T X of each layer's inputs over fresh batches of the training shards, summed over the ranks."""
    layers = dense_layers(model)
    sums = {n: torch.zeros(m.in_features, m.in_features, device=world.device) for n, m in layers.items()}

    def hook(name: str):
        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].size(-1)).float()
            sums[name].addmm_(x.t(), x)

        return take

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in layers.items()]
    model.eval()
    for i in range(S.calib_batches):
        if world.agree(clock.read()) > S.build_seconds - 0.6 * S.pack_reserve:
            break
        ids, _ = loader.batch(S.calib_tokens)
        model.logits(ids[None], *packed_masks(ids, S.window_stages[-1][1]))
    for handle in handles:
        handle.remove()
    for h in sums.values():
        world.total(h)
    return sums


def row_scales(w: Tensor, bits: int) -> Tensor:
    """Per row the scale, out of a few shares of the largest weight, that rounds with the least squared error."""
    top = 2 ** (bits - 1) - 1
    peak = w.abs().amax(dim=1).clamp_min(1e-8)
    best = peak / top
    best_err = torch.full_like(peak, float("inf"))
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64):
        scale = share * peak / top
        q = (w / scale[:, None]).round().clamp(-top, top)
        err = (q * scale[:, None] - w).square().sum(1)
        better = err < best_err
        best = torch.where(better, scale, best)
        best_err = torch.where(better, err, best_err)
    return best.half().float().clamp_min(1e-7)


def gptq(w: Tensor, h: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Column by column, the error carried over to the columns that are left."""
    w, h = w.float().clone(), h.float().clone()
    top = 2 ** (bits - 1) - 1
    cols = w.size(1)
    idle = h.diagonal() == 0
    h.diagonal()[idle] = 1.0
    w[:, idle] = 0.0
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(S.gptq_damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale = row_scales(w, bits)
    q = torch.zeros_like(w)
    for i in range(0, cols, S.gptq_block):
        j = min(i + S.gptq_block, cols)
        block, errors = w[:, i:j].clone(), torch.zeros(w.size(0), j - i, device=w.device)
        u = upper[i:j, i:j]
        for k in range(j - i):
            q[:, i + k] = (block[:, k] / scale).round().clamp(-top, top)
            err = (block[:, k] - q[:, i + k] * scale) / u[k, k]
            block[:, k:] -= err[:, None] * u[k, k:][None]
            errors[:, k] = err
        w[:, j:] -= errors @ upper[i:j, j:]
    return q[:, order.argsort()].to(torch.int8), scale.half()


def round_rows(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    scale = row_scales(w.float(), bits)
    return (w.float() / scale[:, None]).round().clamp(-top, top).to(torch.int8), scale.half()


@torch.no_grad()
def quantise(model: GPT, hessians: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The packed model's tensors, complete on the chief. The layers are shared out over the ranks."""
    done: dict[str, Tensor] = {}
    layers = dense_layers(model)
    for i, name in enumerate(sorted(layers)):
        if i % world.size == world.rank:
            q, scale = gptq(layers[name].weight, hessians[name], S.matrix_bits)
            done[f"{name}.weight.q"], done[f"{name}.weight.s"] = q.cpu(), scale.cpu()
    if world.many:
        parts = [None] * world.size if world.chief else None
        dist.gather_object(done, parts, dst=0)
        if world.chief:
            done = {k: v for part in parts for k, v in part.items()}
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") in layers:
            continue
        if p.ndim == 2 and p.numel() >= 65536:
            q, scale = round_rows(p, S.embed_bits)
            done[f"{name}.q"], done[f"{name}.s"] = q.cpu(), scale.cpu()
        else:
            done[f"{name}.f"] = p.detach().half().cpu()
    return done


def pack(tensors: dict[str, Tensor]) -> bytes:
    box = io.BytesIO()
    torch.save({k: tensors[k].contiguous() for k in sorted(tensors)}, box)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(box.getvalue(), format=lzma.FORMAT_XZ, filters=filters)


def unpack(blob: bytes) -> dict[str, Tensor]:
    """A state dict in fp32 out of the packed bytes."""
    tensors = torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)
    state = {}
    for key, value in tensors.items():
        name, kind = key.rsplit(".", 1)
        if kind == "q":
            state[name] = value.float() * tensors[f"{name}.s"].float()[:, None]
        elif kind == "f":
            state[name] = value.float()
    return state


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def write_packed(tensors: dict[str, Tensor], tape: Tape) -> None:
    """Chief only: writes the file and prints the counted size."""
    blob = pack(tensors)
    Path(S.out_file).write_bytes(blob)
    code = code_bytes()
    total = len(blob) + code
    tape.row("size", model_bytes=len(blob), code_bytes=code, total_bytes=total, limit=S.size_limit)
    if total > S.size_limit:
        raise RuntimeError(f"{total} bytes are over the limit of {S.size_limit}")


def read_packed(world: World) -> GPT:
    model = GPT().to(world.device)
    state = unpack(Path(S.out_file).read_bytes())
    missing, unknown = model.load_state_dict(state, strict=False)
    if missing or unknown:
        raise RuntimeError(f"packed model: missing {missing}, unknown {unknown}")
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    return model


# -----------------------------------------------------------------------------
# evaluation without adaptation


@torch.no_grad()
def quick_validation(model: GPT, val: Tensor, world: World, table: ByteTable) -> tuple[float, float]:
    """Long spans, documents apart from one another, every target once. For the log of the training."""
    score, span = Score(world.device), 32 * 1024
    total = val.numel() - 1
    model.eval()
    for i, begin in enumerate(range(0, total, span)):
        if i % world.size != world.rank:
            continue
        end = min(begin + span, total)
        local = val[begin : end + 1].to(world.device).long()
        ids, targets = local[:-1], local[1:]
        padded = F.pad(ids, (0, span - ids.numel()), value=S.bos_id)
        out = model.logits(padded[None], *packed_masks(padded, S.window_stages[-1][1]))[0, : ids.numel()]
        score.add(F.cross_entropy(out, targets, reduction="none"), ids, targets, table)
    model.train()
    return score.finish(world, total)


@torch.no_grad()
def sliding_validation(model: GPT, val: Tensor, world: World, table: ByteTable) -> tuple[float, float]:
    """Windows of `eval_ctx` in strides; each target is counted in the one window whose last stride holds it."""
    net = torch.compile(model.logits, dynamic=False)
    ctx, stride = S.eval_ctx, S.eval_stride
    long, short = row_masks(ctx, world.device)
    total = val.numel() - 1
    begins = list(range(0, total, stride))
    mine = begins[len(begins) * world.rank // world.size : len(begins) * (world.rank + 1) // world.size]
    score = Score(world.device)
    for at in range(0, len(mine), S.eval_batch):
        group = mine[at : at + S.eval_batch]
        ids = torch.full((S.eval_batch, ctx), S.bos_id, dtype=torch.int64)
        targets = torch.zeros_like(ids)
        counted = torch.zeros(S.eval_batch, ctx, dtype=torch.bool)
        for row, begin in enumerate(group):
            end = min(begin + stride, total)
            first = max(0, end - ctx)
            n = end - first
            ids[row, :n] = val[first:end]
            targets[row, :n] = val[first + 1 : end + 1]
            counted[row, begin - first : n] = True
        ids, targets, counted = (t.to(world.device, non_blocking=True) for t in (ids, targets, counted))
        logits = net(ids, long, short)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        score.add(nll[counted], ids[counted], targets[counted], table)
    return score.finish(world, total)


# -----------------------------------------------------------------------------
# evaluation with one LoRA per document: score a chunk, then train on it


class UnigramCache:
    """Per row the counts of the document's tokens so far, mixed into the model's distribution as a distribution.

    The weight grows with the number of tokens seen; it is nothing at a document's start.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.counts = torch.zeros(rows, S.vocab_size, device=device)

    def clear(self, row: int) -> None:
        self.counts[row].zero_()

    def mix(self, logp: Tensor) -> Tensor:
        """[B, L, V] log-probabilities to log-probabilities."""
        seen = self.counts.sum(-1, keepdim=True)
        share = self.counts / seen.clamp_min(1.0)
        weight = S.cache_weight * seen / (seen + S.cache_half)
        weight, share = weight[:, None, :], share[:, None, :]
        return torch.log((1.0 - weight) * logp.exp() + weight * share + 1e-30)

    def absorb(self, tokens: Tensor, valid: Tensor) -> None:
        self.counts.scatter_add_(1, tokens, valid.to(self.counts.dtype))


class Reader:
    """Where a row stands in its document."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.length = end - start - 1  # targets
        self.done = 0

    def window(self) -> tuple[int, int, int, int]:
        """(first, last, offset, count): the inputs are val[first:last], the chunk's part of them is the last `count`."""
        upto = min(self.done + S.ttt_chunk, self.length)
        first = max(0, upto - S.eval_ctx)
        return self.start + first, self.start + upto, self.done - first, upto - self.done

    def more_after(self) -> bool:
        return self.done + S.ttt_chunk < self.length


class DocumentScorer:
    """Scores this rank's documents, a row of the batch for each; a row that is through takes the next document.

    A row's state (adapter, moments, cache) is its document's alone and is begun anew with each. The chunk is scored
    with what was learned from the chunks before it; only then the adapter and the cache take it in.
    """

    def __init__(self, model: GPT, val: Tensor, world: World, table: ByteTable, clock: Clock) -> None:
        self.model, self.val, self.world, self.table, self.clock = model, val, world, table, clock
        self.lora = DocLoRA(S.ttt_batch, S.ttt_rank).to(world.device)
        self.adam = RowAdam(self.lora, S.ttt_lr, (S.ttt_b1, S.ttt_b2))
        self.cache = UnigramCache(S.ttt_batch, world.device)
        self.masks = row_masks(S.eval_ctx, world.device)
        self.net = torch.compile(model.logits, dynamic=False)
        self.rows: list[Reader | None] = [None] * S.ttt_batch
        self.score = Score(world.device)
        self.trained = 0

    def seat(self, queue: list[tuple[int, int]]) -> bool:
        """Gives the free rows their next documents. False when nothing is left to do."""
        for r, reader in enumerate(self.rows):
            if reader is None and queue:
                self.rows[r] = Reader(*queue.pop())
                self.lora.clear(r)
                self.adam.clear(r)
                self.cache.clear(r)
        return any(self.rows)

    def lay_out(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Inputs [B, ctx]; of the chunk [B, C]: positions, inputs, targets and which are real."""
        b, c = S.ttt_batch, S.ttt_chunk
        ids = torch.full((b, S.eval_ctx), S.bos_id, dtype=torch.int64)
        before = torch.zeros(b, c, dtype=torch.int64)
        target = torch.zeros(b, c, dtype=torch.int64)
        offset, count = torch.zeros(b, 1, dtype=torch.int64), torch.zeros(b, 1, dtype=torch.int64)
        for r, reader in enumerate(self.rows):
            if reader is None:
                continue
            first, last, offset[r], count[r] = reader.window()
            n = int(count[r])
            ids[r, : last - first] = self.val[first:last]
            before[r, :n] = self.val[last - n : last]
            target[r, :n] = self.val[last - n + 1 : last + 1]
        along = torch.arange(c)[None]
        where = (offset + along).clamp_max(S.eval_ctx - 1)
        return tuple(t.to(self.world.device) for t in (ids, where, before, target, along < count))

    def chunk_logits(self, ids: Tensor, where: Tensor) -> Tensor:
        logits = self.net(ids, *self.masks, self.lora)
        return logits.gather(1, where.unsqueeze(-1).expand(-1, -1, logits.size(-1)))

    @torch.no_grad()
    def grade(self, ids: Tensor, where: Tensor, before: Tensor, target: Tensor, real: Tensor) -> None:
        logp = F.log_softmax(self.chunk_logits(ids, where), dim=-1)
        if S.cache_on:
            logp = self.cache.mix(logp)
        nll = -logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        self.score.add(nll[real], before[real], target[real], self.table)

    def learn(self, ids: Tensor, where: Tensor, target: Tensor, real: Tensor) -> None:
        """Steps on the chunk that was just graded, for the documents that go on."""
        onward = torch.tensor([r is not None and r.more_after() for r in self.rows], device=self.world.device)
        if not bool(onward.any()):
            return
        part = real & onward[:, None]
        for _ in range(S.ttt_steps):
            logits = self.chunk_logits(ids, where)
            nll = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            loss = ((nll * part).sum(1) / part.sum(1).clamp_min(1)).sum()
            grads = torch.autograd.grad(loss, self.adam.params)
            self.adam.step(list(grads), onward)
        self.trained += int(onward.sum())

    def advance(self) -> None:
        for r, reader in enumerate(self.rows):
            if reader is not None:
                reader.done += reader.window()[3]
                if reader.done >= reader.length:
                    self.rows[r] = None

    def run(self, tape: Tape) -> tuple[float, float]:
        spans = document_spans(self.val, S.bos_id)
        queue = spans[self.world.rank :: self.world.size][::-1]
        whole, rounds = len(queue), 0
        while self.seat(queue):
            ids, where, before, target, real = self.lay_out()
            self.grade(ids, where, before, target, real)
            self.cache.absorb(target, real)
            if self.clock.read() < S.ttt_deadline:
                self.learn(ids, where, target, real)
            self.advance()
            rounds += 1
            if rounds % 400 == 0:
                bits = (self.score.nats / math.log(2.0) / self.score.bytes.clamp_min(1)).item()
                tape.row("ttt", round=rounds, docs_left=f"{len(queue)}/{whole}", bpb_here=bits, s=self.clock.read())
        return self.score.finish(self.world, self.val.numel() - 1)


# -----------------------------------------------------------------------------
# training


def at_stage(stages: list[tuple[float, int]], share: float) -> int:
    return [value for begin, value in stages if share >= begin][-1]


def lr_scale(share: float) -> float:
    """Flat, then a straight line down to `final_lr`."""
    left = (1.0 - share) / S.cooldown
    return 1.0 if left >= 1.0 else S.final_lr + (1.0 - S.final_lr) * max(left, 0.0)


def one_step(net, loader: TrainLoader, opts: list[torch.optim.Optimizer], tokens: int, window: int) -> Tensor:
    ids, targets = loader.batch(tokens)
    loss = net(ids[None], targets[None], *packed_masks(ids, window))
    loss.backward()
    for opt in opts:
        opt.step()
        opt.zero_grad(set_to_none=True)
    return loss.detach()


def warm_up(model: GPT, net, loader: TrainLoader, opts: list[torch.optim.Optimizer], tape: Tape) -> None:
    """Compiles every shape of the schedule, then puts weights, moments and loader back."""
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    moments = [copy.deepcopy(opt.state_dict()) for opt in opts]
    for i in range(S.warmup_steps):
        _, tokens = S.batch_stages[i % len(S.batch_stages)]
        _, window = S.window_stages[i % len(S.window_stages)]
        one_step(net, loader, opts, tokens, window)
    model.load_state_dict(weights)
    for opt, held in zip(opts, moments):
        opt.load_state_dict(held)
        opt.state.clear()
    loader.rewind()
    tape.row("warmup", steps=S.warmup_steps)


def train(model: GPT, loader: TrainLoader, val: Tensor, table: ByteTable, world: World, tape: Tape) -> Clock:
    """Trains until the clock says that only the reserve is left; the averaged weights are in the model then."""
    net = torch.compile(model, dynamic=False)
    opts = make_optimizers(model, world)
    warm_up(model, net, loader, opts, tape)
    average = Average(S.ema_decay)
    budget = S.build_seconds - S.pack_reserve
    world.wait()
    clock, step, seen = Clock().start(), 0, 0
    while True:
        share = world.agree(max(clock.read() / budget, step / S.iterations))
        last = share >= 1.0
        if last or (S.val_every > 0 and step % S.val_every == 0 and step > 0):
            clock.halt()
            loss, bpb = quick_validation(model, val, world, table)
            tape.row("val", step=step, loss=loss, bpb=bpb, s=clock.read())
            clock.start()
        if last:
            break
        tokens, window = at_stage(S.batch_stages, share), at_stage(S.window_stages, share)
        scale = lr_scale(share)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        warm = min(step / S.muon_warmup, 1.0)
        for group in opts[1].param_groups:
            group["momentum"] = (1 - warm) * S.muon_momentum_start + warm * S.muon_momentum
        loss = one_step(net, loader, opts, tokens, window)
        if share >= S.ema_from:
            average.update(model)
        step += 1
        seen += tokens * world.size
        if step % S.log_every == 0 or step <= 5:
            mean = world.mean(loss.clone()).item()
            tape.row("train", step=step, loss=mean, tokens=seen, window=window, s=clock.read(), share=share)
    average.put_into(model)
    tape.row("trained", steps=step, tokens=seen, s=clock.read())
    return clock


def build(val: Tensor, table: ByteTable, world: World, tape: Tape) -> None:
    """Training, calibration and packing, all on one clock."""
    model = GPT().to(world.device)
    if world.many:
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    tape.row("model", params=sum(p.numel() for p in model.parameters()), layers=S.num_layers, dim=S.model_dim)
    loader = TrainLoader(S.train_files, world)
    clock = train(model, loader, val, table, world, tape)
    hessians = gather_hessians(model, loader, world, clock)
    tape.row("calibrated", s=clock.read())
    tensors = quantise(model, hessians, world)
    if world.chief:
        tape.row("quantised", s=clock.read())
        write_packed(tensors, tape)
    world.wait()
    clock.halt()
    tape.row("built", s=clock.read(), cap=S.build_seconds)


def evaluate(val: Tensor, table: ByteTable, world: World, tape: Tape) -> None:
    """Reads the packed model back and scores the validation split; the last line is the result."""
    clock = Clock().start()
    model = read_packed(world)
    if S.slide_log:
        loss, bpb = sliding_validation(model, val, world, table)
        tape.row("slide", loss=loss, bpb=bpb, stride=S.eval_stride, s=clock.read())
    torch._dynamo.reset()
    scorer = DocumentScorer(model, val, world, table, clock)
    loss, bpb = scorer.run(tape)
    tape.row("ttt", chunks_trained=scorer.trained, s=clock.read(), cap=S.eval_seconds)
    tape.say(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main() -> None:
    world = World()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    tape = Tape(world, S.run_id)
    seed_all(S.seed)
    tape.jot(Path(__file__).read_text(encoding="utf-8"))
    tape.say(f"python {sys.version.split()[0]} torch {torch.__version__} ranks {world.size} seed {S.seed}")
    settings = {k: v for k, v in vars(Settings).items() if not k.startswith("_")}
    tape.jot(json.dumps(settings, default=str))
    table = ByteTable(S.tokenizer_path, S.vocab_size, world.device)
    table.check(world)
    val = load_validation(S.val_files)
    tape.row("data", train_shards=len(shard_list(S.train_files)), val_tokens=val.numel())
    build(val, table, world, tape)
    evaluate(val, table, world, tape)
    world.close()


if __name__ == "__main__":
    main()
