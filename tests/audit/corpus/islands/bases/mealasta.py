"""Depth-recurrent GQA transformer, SP8192, int6/int7 GPTQ with SDClip, per-document LoRA at test time.

One script: trains inside the wall-clock cap, quantises and packs the artifact, unpacks it again and scores the
validation split document by document.  Launch: torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import collections
import contextlib
import copy
import datetime
import glob
import io
import math
import os
import random
import struct
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------
# settings
# --------------------------------------------------------------------------------------


def _int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def _flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, "1" if default else "0")))


def _str(name: str, default: str) -> str:
    return os.environ.get(name, default)


class Knobs:
    # run
    run_id = _str("RUN_ID", str(uuid.uuid4())[:8])
    seed = _int("SEED", 1337)
    out_dir = _str("OUT_DIR", ".")

    # data
    data_dir = _str("DATA_DIR", "./data")
    vocab_size = _int("VOCAB_SIZE", 8192)
    dataset_dir = _str("DATASET_DIR", os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}"))
    train_glob = os.path.join(dataset_dir, "fineweb_train_*.bin")
    val_glob = os.path.join(dataset_dir, "fineweb_val_*.bin")
    tokenizer_path = _str("TOKENIZER_PATH", os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model"))
    bos_id = _int("BOS_ID", 1)

    # schedule
    iterations = _int("ITERATIONS", 20000)
    train_batch_tokens = _int("TRAIN_BATCH_TOKENS", 786432)
    train_seq_len = _int("TRAIN_SEQ_LEN", 2048)
    warmup_steps = _int("WARMUP_STEPS", 20)
    warmdown_frac = _float("WARMDOWN_FRAC", 0.72)
    min_lr = _float("MIN_LR", 0.0)
    log_every = _int("LOG_EVERY", 250)
    max_wallclock_seconds = _float("MAX_WALLCLOCK_SECONDS", 600.0)
    quant_reserve_seconds = _float("QUANT_RESERVE_SECONDS", 16.0)

    # model
    num_layers = _int("NUM_LAYERS", 11)
    model_dim = _int("MODEL_DIM", 512)
    num_heads = _int("NUM_HEADS", 8)
    num_kv_heads = _int("NUM_KV_HEADS", 4)
    mlp_mult = _float("MLP_MULT", 4.0)
    rope_base = _float("ROPE_BASE", 10000.0)
    rope_dims = _int("ROPE_DIMS", 16)
    logit_softcap = _float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = _float("QK_GAIN_INIT", 5.0)
    loop_first = _int("LOOP_FIRST", 3)
    loop_last = _int("LOOP_LAST", 5)
    loop_repeats = _int("LOOP_REPEATS", 2)
    loop_on_frac = _float("LOOP_ON_FRAC", 0.35)
    parallel_from = _int("PARALLEL_FROM", 8)
    smear_dims = _int("SMEAR_DIMS", 12)
    init_std = _float("INIT_STD", 0.005)

    # optimisers
    embed_lr = _float("EMBED_LR", 0.03)
    matrix_lr = _float("MATRIX_LR", 0.026)
    scalar_lr = _float("SCALAR_LR", 0.02)
    muon_momentum = _float("MUON_MOMENTUM", 0.97)
    muon_momentum_start = _float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = _int("MUON_MOMENTUM_STEPS", 1500)
    muon_iters = _int("MUON_ITERS", 5)
    muon_wd = _float("MUON_WD", 0.095)
    embed_wd = _float("EMBED_WD", 0.085)
    adam_wd = _float("ADAM_WD", 0.02)
    beta1 = _float("BETA1", 0.9)
    beta2 = _float("BETA2", 0.95)
    clip_norm = _float("CLIP_NORM", 0.3)
    ema_decay = _float("EMA_DECAY", 0.9965)

    # quantisation
    matrix_bits = _int("MATRIX_BITS", 6)
    embed_bits = _int("EMBED_BITS", 7)
    matrix_sigmas = _float("MATRIX_SIGMAS", 12.85)
    embed_sigmas = _float("EMBED_SIGMAS", 15.0)
    calib_batches = _int("CALIB_BATCHES", 16)
    calib_seqs = _int("CALIB_SEQS", 16)
    gptq_block = _int("GPTQ_BLOCK", 128)
    gptq_damp = _float("GPTQ_DAMP", 0.01)
    brotli_quality = _int("BROTLI_QUALITY", 11)
    size_limit = _int("SIZE_LIMIT", 16_000_000)

    # evaluation
    eval_seq_len = _int("EVAL_SEQ_LEN", 2048)
    val_batch_seqs = _int("VAL_BATCH_SEQS", 32)
    lora_rank = _int("LORA_RANK", 96)
    lora_lr = _float("LORA_LR", 1e-4)
    lora_wd = _float("LORA_WD", 0.5)
    lora_beta2 = _float("LORA_BETA2", 0.999)
    lora_chunk = _int("LORA_CHUNK", 64)
    lora_batch = _int("LORA_BATCH", 64)
    phase_cuts = _str("PHASE_CUTS", "0.02,0.05")
    global_lr = _float("GLOBAL_LR", 1e-3)
    global_momentum = _float("GLOBAL_MOMENTUM", 0.9)
    global_epochs = _int("GLOBAL_EPOCHS", 1)
    global_seq_len = _int("GLOBAL_SEQ_LEN", 2048)
    global_batch_seqs = _int("GLOBAL_BATCH_SEQS", 8)
    global_clip = _float("GLOBAL_CLIP", 1.0)
    adapt_budget_seconds = _float("ADAPT_BUDGET_SECONDS", 520.0)

    @classmethod
    def table(cls) -> dict[str, object]:
        return {
            name: value
            for name, value in vars(cls).items()
            if not name.startswith("_") and not callable(value) and not isinstance(value, classmethod)
        }


# --------------------------------------------------------------------------------------
# ranks, clocks and logs
# --------------------------------------------------------------------------------------


@dataclass
class Mesh:
    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def chief(self) -> bool:
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.world > 1

    def barrier(self) -> None:
        if self.many:
            dist.barrier()

    def sum_(self, t: Tensor) -> Tensor:
        if self.many:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        if self.many:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)
        return t

    def share(self, t: Tensor, src: int = 0) -> Tensor:
        if self.many:
            dist.broadcast(t, src=src)
        return t


def join_mesh() -> Mesh:
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA device is needed")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(backend="nccl", device_id=device, timeout=datetime.timedelta(minutes=20))
        dist.barrier()
    return Mesh(rank, local_rank, world, device)


class Journal:
    """Rank 0 writes to the console and to a file; the others keep silent."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def __call__(self, text: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(text, flush=True)
        with open(self.path, "a", encoding="utf-8") as out:
            print(text, file=out)


class Stopwatch:
    """Seconds since it was started, the device's queue included."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.began


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


# --------------------------------------------------------------------------------------
# token shards
# --------------------------------------------------------------------------------------

HEADER_INTS = 256
SHARD_MAGIC = 20240520


def shard_length(path: Path) -> int:
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER_INTS * 4), dtype="<i4")
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"{path} is no token shard")
    return int(header[2])


def map_shard(path: Path) -> np.memmap:
    count = shard_length(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_INTS * 4, shape=(count,))


def list_shards(pattern: str) -> list[Path]:
    found = [Path(p) for p in sorted(glob.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"no shard matches {pattern}")
    return found


def read_split(pattern: str) -> Tensor:
    """All tokens of a split, in order, on the host."""
    pieces = [np.asarray(map_shard(path)) for path in list_shards(pattern)]
    return torch.from_numpy(np.concatenate(pieces).astype(np.int32))


class ShuffledTape:
    """Training sequences: each rank draws from its own shards, windows in random order within a shard."""

    def __init__(self, pattern: str, mesh: Mesh, seq_len: int, seed: int) -> None:
        shards = list_shards(pattern)
        self.shards = [map_shard(path) for path in shards[mesh.rank :: mesh.world] or shards]
        self.seq_len = seq_len
        self.device = mesh.device
        self.rng = np.random.Generator(np.random.PCG64([seed, mesh.rank]))
        self.queues: list[collections.deque[int]] = [collections.deque() for _ in self.shards]
        for i in range(len(self.shards)):
            self._refill(i)

    def _refill(self, i: int) -> None:
        room = len(self.shards[i]) - self.seq_len - 1
        phase = int(self.rng.integers(0, min(self.seq_len, max(room, 1))))
        starts = np.arange(phase, max(room, phase + 1), self.seq_len)
        self.rng.shuffle(starts)
        self.queues[i].extend(starts.tolist())

    def next(self, seqs: int) -> tuple[Tensor, Tensor]:
        left = np.array([len(q) for q in self.queues], dtype=np.float64)
        if left.sum() < seqs:
            for i in range(len(self.shards)):
                self._refill(i)
            left = np.array([len(q) for q in self.queues], dtype=np.float64)
        rows = np.empty((seqs, self.seq_len + 1), dtype=np.int64)
        for r in range(seqs):
            weights = left / left.sum()
            i = int(self.rng.choice(len(self.shards), p=weights))
            at = self.queues[i].popleft()
            left[i] -= 1
            rows[r] = self.shards[i][at : at + self.seq_len + 1]
        block = torch.from_numpy(rows).pin_memory().to(self.device, non_blocking=True)
        return block[:, :-1], block[:, 1:]


# --------------------------------------------------------------------------------------
# bytes of the text behind the tokens
# --------------------------------------------------------------------------------------


@dataclass
class PieceBytes:
    """Per token: bytes of its own, whether it opens with a space, whether it swallows the next one's space."""

    own: Tensor
    spaced: Tensor
    edge: Tensor

    def of(self, prev: Tensor, target: Tensor) -> Tensor:
        """UTF-8 bytes of each target, given the token before it."""
        count = self.own[target].to(torch.int64)
        count = count + (self.spaced[target] & ~self.edge[prev]).to(torch.int64)
        return count


def weigh_pieces(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> PieceBytes:
    rows = max(int(sp.vocab_size()), vocab_size)
    own = np.zeros(rows, dtype=np.int16)
    spaced = np.zeros(rows, dtype=bool)
    edge = np.ones(rows, dtype=bool)
    for token in range(int(sp.vocab_size())):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        edge[token] = False
        if sp.is_byte(token):
            own[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("\u2581"):
            spaced[token] = True
            piece = piece[1:]
        own[token] = len(piece.encode("utf-8"))
    return PieceBytes(
        torch.from_numpy(own).to(device),
        torch.from_numpy(spaced).to(device),
        torch.from_numpy(edge).to(device),
    )


@dataclass
class Passage:
    """One document: where it starts in the stream and how many tokens are predicted from it on."""

    start: int
    preds: int

    @property
    def stop(self) -> int:
        return self.start + self.preds


@dataclass
class ValSplit:
    tokens: Tensor
    passages: list[Passage]
    pieces: PieceBytes
    sp: spm.SentencePieceProcessor = field(repr=False)

    @property
    def targets(self) -> int:
        return int(self.tokens.numel()) - 1


def find_passages(tokens: Tensor, bos_id: int) -> list[Passage]:
    """Documents as the BOS token parts them.  A document's last target is the BOS of the next one."""
    starts = (tokens == bos_id).nonzero(as_tuple=True)[0].tolist()
    if not starts or starts[0] != 0:
        starts = [0, *starts]
    last = int(tokens.numel()) - 1
    found = []
    for i, start in enumerate(starts):
        stop = starts[i + 1] if i + 1 < len(starts) else last
        if stop > start:
            found.append(Passage(start, stop - start))
    return found


def load_validation(knobs: type[Knobs], mesh: Mesh) -> ValSplit:
    sp = spm.SentencePieceProcessor(model_file=knobs.tokenizer_path)
    if int(sp.vocab_size()) != knobs.vocab_size:
        raise ValueError(f"the tokenizer has {sp.vocab_size()} pieces, not {knobs.vocab_size}")
    tokens = read_split(knobs.val_glob)
    pieces = weigh_pieces(sp, knobs.vocab_size, mesh.device)
    return ValSplit(tokens, find_passages(tokens, knobs.bos_id), pieces, sp)


# --------------------------------------------------------------------------------------
# model
# --------------------------------------------------------------------------------------


class CastLinear(nn.Linear):
    """Weights kept in fp32, used in the dtype of the input."""

    def __init__(self, d_in: int, d_out: int, zero: bool = False) -> None:
        super().__init__(d_in, d_out, bias=False)
        self.zero = zero

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotor(nn.Module):
    """Rotary angles for the first `dims` of each head."""

    def __init__(self, dims: int, base: float, longest: int) -> None:
        super().__init__()
        inv = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angles = torch.outer(torch.arange(longest, dtype=torch.float32), inv)
        self.dims = dims
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        cos = self.cos[:length, None, :].to(x.dtype)
        sin = self.sin[:length, None, :].to(x.dtype)
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, k: type[Knobs]) -> None:
        super().__init__()
        self.heads, self.kv_heads = k.num_heads, k.num_kv_heads
        self.head_dim = k.model_dim // k.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.to_q = CastLinear(k.model_dim, k.model_dim)
        self.to_k = CastLinear(k.model_dim, kv_dim)
        self.to_v = CastLinear(k.model_dim, kv_dim)
        self.out = CastLinear(k.model_dim, k.model_dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((k.num_heads,), k.qk_gain_init, dtype=torch.float32))
        self.rotor = Rotor(k.rope_dims, k.rope_base, max(k.train_seq_len, k.eval_seq_len) + 8)

    def forward(self, x: Tensor, dq: Tensor | None, dv: Tensor | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if dq is not None:
            q = q + dq
        if dv is not None:
            v = v + dv
        q = rms(q.view(b, t, self.heads, self.head_dim))
        k = rms(k.view(b, t, self.kv_heads, self.head_dim))
        v = v.view(b, t, self.kv_heads, self.head_dim)
        q = self.rotor(q) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = self.rotor(k)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        ).transpose(1, 2)
        # what a head reads of the position's own value is taken out again
        group = self.heads // self.kv_heads
        axis = F.normalize(v, dim=-1)[:, :, :, None, :]
        y = y.reshape(b, t, self.kv_heads, group, self.head_dim)
        y = y - (y * axis).sum(dim=-1, keepdim=True) * axis
        return self.out(y.reshape(b, t, d))


class FeedForward(nn.Module):
    def __init__(self, dim: int, mult: float) -> None:
        super().__init__()
        wide = int(dim * mult)
        self.up = CastLinear(dim, wide)
        self.down = CastLinear(wide, dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, k: type[Knobs], depth: int) -> None:
        super().__init__()
        self.attn = Attention(k)
        self.mlp = FeedForward(k.model_dim, k.mlp_mult)
        self.side_by_side = depth >= k.parallel_from
        self.damp = 1.0 / math.sqrt(depth + 1)
        self.attn_scale = nn.Parameter(torch.ones(k.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(k.model_dim))
        self.blend = nn.Parameter(torch.stack((torch.ones(k.model_dim), torch.zeros(k.model_dim))))

    def forward(self, x: Tensor, x0: Tensor, lora: "Adapters | None", slot: int) -> Tensor:
        mix = self.blend.to(x.dtype)
        h = mix[0] * x + mix[1] * x0
        seen = rms(h) * self.damp
        dq = lora.q[slot](seen) if lora is not None else None
        dv = lora.v[slot](seen) if lora is not None else None
        a = self.attn_scale.to(x.dtype) * self.attn(seen, dq, dv)
        if self.side_by_side:
            return h + a + self.mlp_scale.to(x.dtype) * self.mlp(seen)
        h = h + a
        return h + self.mlp_scale.to(x.dtype) * self.mlp(rms(h) * self.damp)


class Recurrent(nn.Module):
    """Blocks in a U of encoder and decoder halves; the middle ones are run several times once looping is on."""

    def __init__(self, k: type[Knobs]) -> None:
        super().__init__()
        self.bos_id = k.bos_id
        self.softcap = k.logit_softcap
        self.smear_dims = k.smear_dims
        self.embed = nn.Embedding(k.vocab_size, k.model_dim)
        self.smear = CastLinear(k.smear_dims, 1, zero=True)
        self.blocks = nn.ModuleList(Block(k, i) for i in range(k.num_layers))
        middle = list(range(k.loop_first, k.loop_last + 1))
        self.flat_order = list(range(k.num_layers))
        self.loop_order = [
            *range(k.loop_first),
            *(middle * k.loop_repeats),
            *range(k.loop_last + 1, k.num_layers),
        ]
        skips = len(self.loop_order) // 2
        self.skip_scale = nn.Parameter(torch.ones(skips, k.model_dim))
        self.skip_gate = nn.Parameter(torch.zeros(skips, k.model_dim))
        self.looping = False
        self._reset(k.init_std)

    def _reset(self, std: float) -> None:
        nn.init.normal_(self.embed.weight, mean=0.0, std=std)
        for part in self.modules():
            if isinstance(part, CastLinear):
                if part.zero:
                    nn.init.zeros_(part.weight)
                elif part.weight.shape[0] >= 64 and part.weight.shape[1] >= 64:
                    nn.init.orthogonal_(part.weight)

    @property
    def order(self) -> list[int]:
        return self.loop_order if self.looping else self.flat_order

    def trunk(self, ids: Tensor, lora: "Adapters | None" = None) -> Tensor:
        x = self.embed(ids).to(torch.bfloat16)
        gate = torch.sigmoid(self.smear(x[:, 1:, : self.smear_dims])) * 0.5
        gate = gate * (ids[:, 1:] != self.bos_id)[..., None].to(x.dtype)
        x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)
        x = rms(x)
        x0 = x
        order = self.order
        half = len(order) // 2
        kept: list[Tensor] = []
        for slot, index in enumerate(order):
            if slot < half:
                kept.append(x)
            elif kept and slot >= len(order) - half:
                i = len(kept) - 1
                g = torch.sigmoid(self.skip_gate[i].to(x.dtype))
                x = torch.lerp(self.skip_scale[i].to(x.dtype) * kept.pop(), x, g)
            x = self.blocks[index](x, x0, lora, slot)
        return rms(x)

    def head(self, hidden: Tensor, lora: "Adapters | None" = None) -> Tensor:
        logits = F.linear(hidden, self.embed.weight.to(hidden.dtype))
        if lora is not None:
            logits = logits + lora.lm(hidden)
        return self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, ids: Tensor, lora: "Adapters | None" = None) -> Tensor:
        return self.head(self.trunk(ids, lora), lora)

    def forward(self, ids: Tensor, targets: Tensor, lora: "Adapters | None" = None) -> Tensor:
        """Loss of each target, in nats."""
        logits = self.logits(ids, lora).float()
        flat = F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="none")
        return flat.view_as(targets)


class RowLoRA(nn.Module):
    """A low-rank delta of its own for each row of the batch."""

    def __init__(self, rows: int, d_in: int, d_out: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.bound = 1.0 / math.sqrt(d_in)
        self.down = nn.Parameter(torch.empty(rows, rank, d_in, device=device))
        self.up = nn.Parameter(torch.empty(rows, d_out, rank, device=device))
        self.reset()

    def reset(self) -> None:
        with torch.no_grad():
            self.down.uniform_(-self.bound, self.bound)
            self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        low = torch.bmm(x, self.down.to(x.dtype).transpose(1, 2))
        return torch.bmm(low, self.up.to(x.dtype).transpose(1, 2))


class Adapters(nn.Module):
    """LoRA on q and v of every pass through a block, and on the lm head."""

    def __init__(self, model: Recurrent, rows: int, rank: int) -> None:
        super().__init__()
        weight = model.embed.weight
        vocab, dim = weight.shape
        self.rows = rows
        self.q = nn.ModuleList()
        self.v = nn.ModuleList()
        for index in model.order:
            attn = model.blocks[index].attn
            self.q.append(RowLoRA(rows, dim, attn.to_q.weight.size(0), rank, weight.device))
            self.v.append(RowLoRA(rows, dim, attn.to_v.weight.size(0), rank, weight.device))
        self.lm = RowLoRA(rows, dim, vocab, rank, weight.device)

    def reset(self) -> None:
        for part in self.modules():
            if isinstance(part, RowLoRA):
                part.reset()


# --------------------------------------------------------------------------------------
# optimisers
# --------------------------------------------------------------------------------------


@torch.compile
def newton_schulz(g: Tensor, iters: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iters):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum; each rank works out its share of the matrices, the sum spreads the updates."""

    def __init__(self, params: list[nn.Parameter], mesh: Mesh, lr: float, momentum: float, iters: int, wd: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, iters=iters, wd=wd))
        self.mesh = mesh

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.mesh.world == self.mesh.rank and p.grad is not None:
                    state = self.state[p]
                    if "velocity" not in state:
                        state["velocity"] = torch.zeros_like(p.grad)
                    v = state["velocity"]
                    v.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(v, alpha=group["momentum"])
                    g = g / (g.norm(dim=1, keepdim=True) + 1e-7)
                    u = newton_schulz(g, group["iters"])
                    u = u * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = u.reshape(-1)
                at += p.numel()
            self.mesh.sum_(flat)
            at = 0
            for p in params:
                u = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["wd"])
                p.add_(u, alpha=-group["lr"])
                at += p.numel()


class Optimisers:
    def __init__(self, k: type[Knobs], model: Recurrent, mesh: Mesh) -> None:
        matrices, small = [], []
        for name, p in model.named_parameters():
            if name.startswith("embed."):
                continue
            if name.startswith("blocks.") and p.ndim == 2 and "blend" not in name:
                matrices.append(p)
            else:
                small.append(p)
        betas = (k.beta1, k.beta2)
        self.embed = torch.optim.AdamW(
            [model.embed.weight], lr=k.embed_lr, betas=betas, eps=1e-8, weight_decay=k.embed_wd, fused=True
        )
        self.small = torch.optim.AdamW(
            small, lr=k.scalar_lr, betas=betas, eps=1e-8, weight_decay=k.adam_wd, fused=True
        )
        self.muon = Muon(matrices, mesh, k.matrix_lr, k.muon_momentum, k.muon_iters, k.muon_wd)
        self.all: list[torch.optim.Optimizer] = [self.embed, self.small, self.muon]
        for opt in self.all:
            for group in opt.param_groups:
                group["full_lr"] = group["lr"]

    def pace(self, scale: float, momentum: float) -> None:
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["full_lr"] * scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum

    def step(self) -> None:
        for opt in self.all:
            opt.step()

    def clear(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)


def level_grads(params: list[nn.Parameter], mesh: Mesh) -> None:
    """Averages the gradients over the ranks, in one flat buffer."""
    if not mesh.many:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch._utils._flatten_dense_tensors(grads)
    mesh.mean_(flat)
    for g, leveled in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads)):
        g.copy_(leveled)


class Shadow:
    """Exponential moving average of the weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        for n, t in model.state_dict().items():
            self.state[n].lerp_(t.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def pour(self, model: nn.Module) -> None:
        own = model.state_dict()
        model.load_state_dict({n: t.to(own[n].dtype) for n, t in self.state.items()})


# --------------------------------------------------------------------------------------
# training
# --------------------------------------------------------------------------------------


def lr_scale(k: type[Knobs], frac: float) -> float:
    """Flat, then linear down to min_lr; frac is the part of the time that is used up."""
    if k.warmdown_frac <= 0 or frac < 1.0 - k.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / k.warmdown_frac, k.min_lr)


def muon_momentum(k: type[Knobs], step: int) -> float:
    t = min(step / max(k.muon_momentum_steps, 1), 1.0)
    return (1.0 - t) * k.muon_momentum_start + t * k.muon_momentum


def build_model(k: type[Knobs], mesh: Mesh) -> Recurrent:
    model = Recurrent(k).to(mesh.device)
    for p in model.parameters():
        mesh.share(p.data)
    return model


class Trainer:
    def __init__(self, k: type[Knobs], model: Recurrent, mesh: Mesh, log: Journal) -> None:
        self.k, self.model, self.mesh, self.log = k, model, mesh, log
        self.compiled = torch.compile(model, dynamic=False, fullgraph=True)
        self.opts = Optimisers(k, model, mesh)
        self.params = list(model.parameters())
        self.accum = max(8 // mesh.world, 1)
        self.seqs = k.train_batch_tokens // (k.train_seq_len * mesh.world * self.accum)
        self.tape = ShuffledTape(k.train_glob, mesh, k.train_seq_len, k.seed)

    def step(self, scale: float, momentum: float) -> Tensor:
        self.opts.clear()
        total = torch.zeros((), device=self.mesh.device)
        for _ in range(self.accum):
            ids, targets = self.tape.next(self.seqs)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.compiled(ids, targets).mean()
            (loss / self.accum).backward()
            total += loss.detach() / self.accum
        level_grads(self.params, self.mesh)
        if self.k.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.params, self.k.clip_norm)
        self.opts.pace(scale, momentum)
        self.opts.step()
        return total

    def warm_up(self) -> None:
        """Compiles both depths with real steps on training tokens, then puts everything back."""
        weights = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
        states = [copy.deepcopy(opt.state_dict()) for opt in self.opts.all]
        for looping in (False, True):
            self.model.looping = looping
            for _ in range(self.k.warmup_steps):
                self.step(1.0, self.k.muon_momentum_start)
        self.model.looping = False
        self.model.load_state_dict(weights)
        for opt, state in zip(self.opts.all, states):
            opt.load_state_dict(state)
        self.opts.clear()
        self.tape = ShuffledTape(self.k.train_glob, self.mesh, self.k.train_seq_len, self.k.seed)
        self.log(f"warm_up: {2 * self.k.warmup_steps} steps, state restored")

    def fit(self, clock: Stopwatch) -> None:
        k = self.k
        room = k.max_wallclock_seconds - k.quant_reserve_seconds
        shadow = Shadow(self.model, k.ema_decay)
        step = 0
        while True:
            spent = torch.tensor(clock.seconds(), device=self.mesh.device, dtype=torch.float64)
            if self.mesh.many:
                dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            elapsed = float(spent)
            if elapsed >= room or step >= k.iterations:
                break
            frac = max(elapsed / room, step / k.iterations)
            if not self.model.looping and frac >= k.loop_on_frac:
                self.model.looping = True
                self.log(f"loop on at step:{step} time:{elapsed:.1f}s order:{self.model.order}")
            loss = self.step(lr_scale(k, frac), muon_momentum(k, step))
            shadow.follow(self.model)
            step += 1
            if step <= 5 or step % k.log_every == 0:
                self.log(
                    f"step:{step} train_loss:{float(self.mesh.mean_(loss)):.4f} "
                    f"time:{elapsed:.1f}s tok/s:{step * k.train_batch_tokens / max(elapsed, 1e-9):.0f}"
                )
        shadow.pour(self.model)
        self.model.looping = True
        self.log(f"stop step:{step} time:{clock.seconds():.1f}s peak:{torch.cuda.max_memory_allocated() >> 20}MiB")


# --------------------------------------------------------------------------------------
# GPTQ with SDClip
# --------------------------------------------------------------------------------------


def wants_gptq(name: str, t: Tensor) -> bool:
    return t.ndim == 2 and t.numel() > 65536 and name.endswith("weight")


class HessianTap:
    """Sums x x^T of what enters each linear layer, and of what enters the tied head."""

    def __init__(self, model: Recurrent) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.hooks = []
        for name, part in model.named_modules():
            if isinstance(part, CastLinear) and wants_gptq(name + ".weight", part.weight):
                self.hooks.append(part.register_forward_pre_hook(self._reader(name + ".weight")))

    def _reader(self, name: str):
        def read(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.take(name, args[0])

        return read

    def take(self, name: str, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.size(-1)).float()
        if name not in self.sums:
            self.sums[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
            self.rows[name] = 0
        self.sums[name].addmm_(x.T, x)
        self.rows[name] += x.size(0)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def measure_hessians(k: type[Knobs], model: Recurrent, tape: ShuffledTape, mesh: Mesh) -> dict[str, Tensor]:
    tap = HessianTap(model)
    for _ in range(k.calib_batches):
        ids, _ = tape.next(k.calib_seqs)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = model.trunk(ids)
        tap.take("embed.weight", hidden)
    tap.close()
    out = {}
    for name in sorted(tap.sums):
        out[name] = mesh.mean_(tap.sums[name] / max(tap.rows[name], 1))
    return out


def gptq_matrix(w: Tensor, h: Tensor, bits: int, sigmas: float, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """Columns one after the other, errors passed on.  Rows are clipped at `sigmas` standard deviations / levels."""
    levels = 2 ** (bits - 1) - 1
    w = w.detach().float().clone()
    h = h.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(damp * h.diagonal().mean())
    order = torch.argsort(h.diagonal(), descending=True)
    back = torch.argsort(order)
    w, h = w[:, order], h[order][:, order]
    chol = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale = (sigmas * w.std(dim=1) / levels).clamp_min(1e-10).half().float()
    q = torch.zeros_like(w)
    for lo in range(0, w.size(1), block):
        hi = min(lo + block, w.size(1))
        part = w[:, lo:hi].clone()
        left = torch.zeros_like(part)
        tri = chol[lo:hi, lo:hi]
        for j in range(hi - lo):
            col = part[:, j]
            code = (col / scale).round().clamp(-levels, levels)
            q[:, lo + j] = code
            err = (col - code * scale) / tri[j, j]
            part[:, j:] -= err[:, None] * tri[j, j:][None, :]
            left[:, j] = err
        w[:, hi:] -= left @ chol[lo:hi, hi:]
    return q[:, back].to(torch.int8), scale.half()


def quantise(k: type[Knobs], model: Recurrent, hessians: dict[str, Tensor], log: Journal) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    kinds: collections.Counter[str] = collections.Counter()
    for name, t in model.state_dict().items():
        if name in hessians and wants_gptq(name, t):
            bits = k.embed_bits if name.startswith("embed.") else k.matrix_bits
            sigmas = k.embed_sigmas if name.startswith("embed.") else k.matrix_sigmas
            codes, scale = gptq_matrix(t, hessians[name], bits, sigmas, k.gptq_block, k.gptq_damp)
            packed[name + "|q"] = codes.cpu()
            packed[name + "|s"] = scale.cpu()
            kinds[f"gptq int{bits}"] += t.numel()
        else:
            packed[name] = t.detach().half().cpu()
            kinds["half"] += t.numel()
    log("quantised: " + ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items())))
    return packed


def dequantise(packed: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, t in like.items():
        if name + "|q" in packed:
            codes, scale = packed[name + "|q"], packed[name + "|s"]
            state[name] = (codes.float() * scale.float()[:, None]).to(t.dtype)
        else:
            state[name] = packed[name].to(t.dtype)
    return state


# --------------------------------------------------------------------------------------
# the artifact
# --------------------------------------------------------------------------------------

PLANES = 2


def weave(raw: bytes) -> bytes:
    """Bytes by plane, so that like stands next to like."""
    body = np.frombuffer(raw, dtype=np.uint8)
    planes = [body[i::PLANES] for i in range(PLANES)]
    return struct.pack("<Q", len(raw)) + np.concatenate(planes).tobytes()


def unweave(woven: bytes) -> bytes:
    (size,) = struct.unpack_from("<Q", woven)
    body = np.frombuffer(woven, dtype=np.uint8, offset=8)
    out = np.empty(size, dtype=np.uint8)
    at = 0
    for i in range(PLANES):
        count = len(out[i::PLANES])
        out[i::PLANES] = body[at : at + count]
        at += count
    return out.tobytes()


def write_artifact(k: type[Knobs], packed: dict[str, Tensor], path: Path) -> int:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    blob = brotli.compress(weave(buffer.getvalue()), quality=k.brotli_quality)
    path.write_bytes(blob)
    return len(blob)


def read_artifact(path: Path) -> dict[str, Tensor]:
    raw = unweave(brotli.decompress(path.read_bytes()))
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def report_size(k: type[Knobs], model_bytes: int, log: Journal) -> int:
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + model_bytes
    log(f"artifact: {model_bytes} bytes")
    log(f"code: {code_bytes} bytes")
    log(f"total: {total} bytes of {k.size_limit}")
    if total > k.size_limit:
        raise RuntimeError(f"{total} bytes are {total - k.size_limit} too many")
    return total


# --------------------------------------------------------------------------------------
# scores
# --------------------------------------------------------------------------------------


class Tally:
    """Nats, tokens and bytes of what has been scored so far."""

    def __init__(self, pieces: PieceBytes, device: torch.device) -> None:
        self.pieces = pieces
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, nll: Tensor, ids: Tensor, targets: Tensor, due: Tensor) -> None:
        self.nats += (nll.detach().double() * due).sum()
        self.tokens += due.sum()
        self.bytes += (self.pieces.of(ids, targets) * due).sum()

    def merge(self, mesh: Mesh) -> "Tally":
        for t in (self.nats, self.tokens, self.bytes):
            mesh.sum_(t)
        return self

    def loss(self) -> float:
        return float(self.nats / self.tokens)

    def bpb(self) -> float:
        return float(self.nats / math.log(2.0) / self.bytes)


@torch.no_grad()
def score_stream(k: type[Knobs], model: nn.Module, split: ValSplit, mesh: Mesh) -> Tally:
    """Windows side by side over the whole split, no adaptation: a first figure for the unpacked model."""
    seq = k.eval_seq_len
    tally = Tally(split.pieces, mesh.device)
    windows = [(at, min(at + seq, split.targets)) for at in range(0, split.targets, seq)]
    mine = windows[mesh.rank :: mesh.world]
    for first in range(0, len(mine), k.val_batch_seqs):
        batch = mine[first : first + k.val_batch_seqs]
        ids = torch.full((len(batch), seq), k.bos_id, dtype=torch.int64)
        targets = torch.zeros((len(batch), seq), dtype=torch.int64)
        due = torch.zeros((len(batch), seq), dtype=torch.bool)
        for r, (lo, hi) in enumerate(batch):
            ids[r, : hi - lo] = split.tokens[lo:hi]
            targets[r, : hi - lo] = split.tokens[lo + 1 : hi + 1]
            due[r, : hi - lo] = True
        ids, targets, due = (t.to(mesh.device, non_blocking=True) for t in (ids, targets, due))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            nll = model(ids, targets)
        tally.add(nll, ids, targets, due)
    return tally.merge(mesh)


# --------------------------------------------------------------------------------------
# documents: LoRA for each, SGD for all between the phases
# --------------------------------------------------------------------------------------


@dataclass
class Frame:
    """The rows of one chunk: inputs, targets, which targets are due now, which rows have a chunk to come."""

    ids: Tensor
    targets: Tensor
    due: Tensor
    more: Tensor


class DocScorer:
    """Scores a split document by document.

    Documents of a phase are sorted by length and cut into batches; rank r takes batches r, r + world, ...  A batch
    starts with fresh adapters, one row for each document.  Chunk after chunk is scored first and learnt from after.
    Between two phases the model itself takes SGD steps on the documents of the phase just scored, on all ranks.
    """

    def __init__(
        self,
        k: type[Knobs],
        model: Recurrent,
        split: ValSplit,
        mesh: Mesh,
        log: Journal,
        clock: Stopwatch,
    ) -> None:
        self.k, self.model, self.split, self.mesh, self.log, self.clock = k, model, split, mesh, log, clock
        self.compiled = torch.compile(model, dynamic=True)
        self.tokens = split.tokens.to(mesh.device, dtype=torch.int64)
        self.tally = Tally(split.pieces, mesh.device)
        self.adapters: Adapters | None = None
        self.done = 0

    # ---- adapters

    def fresh(self) -> tuple[Adapters, torch.optim.Optimizer]:
        if self.adapters is None:
            self.adapters = Adapters(self.model, self.k.lora_batch, self.k.lora_rank)
        self.adapters.reset()
        opt = torch.optim.AdamW(
            self.adapters.parameters(),
            lr=self.k.lora_lr,
            betas=(0.0, self.k.lora_beta2),
            eps=1e-10,
            weight_decay=self.k.lora_wd,
            fused=True,
        )
        return self.adapters, opt

    # ---- batches

    def phases(self) -> list[list[Passage]]:
        """The documents in stream order, cut at the fractions of phase_cuts."""
        docs = self.split.passages
        cuts = [int(float(c) * len(docs)) for c in self.k.phase_cuts.split(",") if c.strip()]
        edges = [0, *sorted(cuts), len(docs)]
        return [docs[lo:hi] for lo, hi in zip(edges, edges[1:]) if hi > lo]

    def batches(self, docs: list[Passage]) -> list[list[Passage]]:
        ranked = sorted(docs, key=lambda doc: (-doc.preds, doc.start))
        size = self.k.lora_batch
        return [ranked[at : at + size] for at in range(0, len(ranked), size)]

    def frame(self, batch: list[Passage], turn: int) -> Frame:
        """The windows that end with chunk number `turn` of each document."""
        chunk, reach = self.k.lora_chunk, self.k.eval_seq_len
        rows = []
        for doc in batch:
            begin = turn * chunk
            end = min(begin + chunk, doc.preds)
            if begin >= end:
                rows.append((doc.start, 1, 0, 0, 0))
                continue
            left = max(0, end - reach)
            rows.append((doc.start + left, end - left, begin - left, end - left, int(end < doc.preds)))
        rows += [(0, 1, 0, 0, 0)] * (self.k.lora_batch - len(rows))
        first, size, lo, hi, more = torch.tensor(rows, device=self.mesh.device).unbind(dim=1)
        width = max(row[1] for row in rows)
        ramp = torch.arange(width, device=self.mesh.device)[None, :]
        at = (first[:, None] + ramp).clamp_max(self.split.targets - 1)
        inside = ramp < size[:, None]
        ids = torch.where(inside, self.tokens[at], self.k.bos_id)
        targets = torch.where(inside, self.tokens[at + 1], 0)
        due = (ramp >= lo[:, None]) & (ramp < hi[:, None])
        return Frame(ids, targets, due, more.bool())

    # ---- one batch

    def losses(self, frame: Frame, adapters: Adapters) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return self.compiled(frame.ids, frame.targets, adapters)

    def learn(self, nll: Tensor, frame: Frame, opt: torch.optim.Optimizer) -> None:
        """One step on the chunk just scored, for the rows that have another one to come."""
        keep = (frame.due & frame.more[:, None]).to(nll.dtype)
        loss = ((nll * keep).sum(dim=1) / keep.sum(dim=1).clamp_min(1.0)).sum()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()

    def score_batch(self, batch: list[Passage]) -> None:
        adapters, opt = self.fresh()
        adapt = self.clock.seconds() < self.k.adapt_budget_seconds
        turns = max(math.ceil(doc.preds / self.k.lora_chunk) for doc in batch)
        for turn in range(turns):
            frame = self.frame(batch, turn)
            last = turn == turns - 1
            with torch.no_grad() if last or not adapt else contextlib.nullcontext():
                nll = self.losses(frame, adapters)
            self.tally.add(nll, frame.ids, frame.targets, frame.due)
            if adapt and not last:
                self.learn(nll, frame, opt)

    # ---- phases

    def score_phase(self, number: int, docs: list[Passage]) -> None:
        self.model.requires_grad_(False)
        work = self.batches(docs)
        for i in range(self.mesh.rank, len(work), self.mesh.world):
            self.score_batch(work[i])
        self.mesh.barrier()
        self.done += len(docs)
        self.log(
            f"phase:{number} docs:{self.done}/{len(self.split.passages)} batches:{len(work)} "
            f"rank0_bpb:{self.tally.bpb():.5f} time:{self.clock.seconds():.1f}s"
        )

    def refine(self, docs: list[Passage]) -> None:
        """SGD on the stretch of the stream that these documents cover; every target in it has been scored."""
        k = self.k
        params = [p for p in self.model.parameters() if p.ndim == 2]
        for p in params:
            p.requires_grad_(True)
        opt = torch.optim.SGD(params, lr=k.global_lr, momentum=k.global_momentum)
        lo, hi = docs[0].start, docs[-1].stop
        starts = list(range(lo, hi - k.global_seq_len + 1, k.global_seq_len))
        group = k.global_batch_seqs * self.mesh.world
        steps = math.ceil(len(starts) / group)
        for epoch in range(k.global_epochs):
            for step in range(steps):
                mine = starts[step * group : (step + 1) * group][self.mesh.rank :: self.mesh.world]
                for group_ in opt.param_groups:
                    group_["lr"] = k.global_lr * 0.5 * (1.0 + math.cos(math.pi * step / max(steps, 1)))
                opt.zero_grad(set_to_none=True)
                if mine:
                    at = torch.tensor(mine, device=self.mesh.device)[:, None]
                    at = at + torch.arange(k.global_seq_len, device=self.mesh.device)[None, :]
                    with torch.autocast("cuda", dtype=torch.bfloat16):
                        nll = self.compiled(self.tokens[at], self.tokens[at + 1])
                    nll.mean().backward()
                for p in params:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                level_grads(params, self.mesh)
                torch.nn.utils.clip_grad_norm_(params, k.global_clip)
                opt.step()
        opt.zero_grad(set_to_none=True)
        self.model.requires_grad_(False)
        self.log(f"refine: tokens:{lo}-{hi} steps:{steps * k.global_epochs} time:{self.clock.seconds():.1f}s")

    def warm_up(self) -> None:
        """Compiles the chunk step on random tokens with adapters that are thrown away."""
        k = self.k
        self.model.requires_grad_(False)
        spare = Adapters(self.model, k.lora_batch, k.lora_rank)
        for width in (k.lora_chunk, 2 * k.lora_chunk, k.eval_seq_len):
            ids = torch.randint(0, k.vocab_size, (k.lora_batch, width + 1), device=self.mesh.device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                nll = self.compiled(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), spare)
            nll.mean().backward()
        del spare
        torch.cuda.empty_cache()
        self.log(f"warm_up: chunk step compiled, time:{self.clock.seconds():.1f}s")

    def run(self) -> Tally:
        self.warm_up()
        plan = self.phases()
        for number, docs in enumerate(plan):
            self.score_phase(number, docs)
            if number + 1 < len(plan):
                self.refine(docs)
        self.tally.merge(self.mesh)
        self.log(f"scored targets: {int(self.tally.tokens)} of {self.split.targets}, bytes: {int(self.tally.bytes)}")
        return self.tally


# --------------------------------------------------------------------------------------
# the run
# --------------------------------------------------------------------------------------


def prologue(k: type[Knobs], mesh: Mesh, log: Journal) -> None:
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Python {sys.version.split()[0]} PyTorch {torch.__version__} ranks:{mesh.world}")
    with contextlib.suppress(OSError):
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        log(smi.stdout, console=False)
    for name, value in sorted(k.table().items()):
        log(f"  {name}={value}", console=False)


def train_and_pack(k: type[Knobs], mesh: Mesh, log: Journal, artifact: Path) -> None:
    model = build_model(k, mesh)
    log(f"parameters: {sum(p.numel() for p in model.parameters())}")
    trainer = Trainer(k, model, mesh, log)
    trainer.warm_up()
    mesh.barrier()
    clock = Stopwatch()
    trainer.fit(clock)
    hessians = measure_hessians(k, model, trainer.tape, mesh)
    log(f"hessians of {len(hessians)} matrices from train shards, time:{clock.seconds():.1f}s")
    packed = quantise(k, model, hessians, log)
    log(f"train and quantise: {clock.seconds():.1f}s of {k.max_wallclock_seconds:.0f}s")
    if mesh.chief:
        size = write_artifact(k, packed, artifact)
        report_size(k, size, log)
    mesh.barrier()


def unpack_model(k: type[Knobs], mesh: Mesh, artifact: Path) -> Recurrent:
    model = Recurrent(k).to(mesh.device)
    model.looping = True
    model.load_state_dict(dequantise(read_artifact(artifact), model.state_dict()))
    return model.eval()


def evaluate(k: type[Knobs], mesh: Mesh, log: Journal, artifact: Path) -> None:
    clock = Stopwatch()
    split = load_validation(k, mesh)
    log(f"validation: {split.targets} targets, {len(split.passages)} documents")
    model = unpack_model(k, mesh, artifact)
    plain = score_stream(k, model, split, mesh)
    log(f"roundtrip val_loss:{plain.loss():.8f} val_bpb:{plain.bpb():.8f} time:{clock.seconds():.1f}s")
    scorer = DocScorer(k, model, split, mesh, log, clock)
    final = scorer.run()
    log(f"evaluation: {clock.seconds():.1f}s")
    log(f"final_doc_lora val_loss:{final.loss():.8f} val_bpb:{final.bpb():.8f}")


def main() -> None:
    k = Knobs
    mesh = join_mesh()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    seed_everything(k.seed)
    os.makedirs(k.out_dir, exist_ok=True)
    log = Journal(os.path.join(k.out_dir, f"{k.run_id}.txt") if mesh.chief else None)
    artifact = Path(k.out_dir) / "final_model.int6.br"
    prologue(k, mesh, log)
    train_and_pack(k, mesh, log, artifact)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    seed_everything(k.seed + mesh.rank)
    evaluate(k, mesh, log, artifact)
    if mesh.many:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
