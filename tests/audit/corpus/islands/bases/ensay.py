"""
ensay -- SP8192 CaseOps, 11L x 512, loop 3-5, smear gate, Muon + EMA, GPTQ int6 + LQER, phased per-document LoRA TTT

One file on purpose. Everything is switched by environment variables, the defaults are what we submit:

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Order of business: train (584 s), EMA, Hessians and GPTQ inside the rest of the 600 s, compress, read the artifact back,
one cheap diagnostic, then the adaptive evaluation that gives the number in submission.json.
"""

from __future__ import annotations

import copy
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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

# ---- hyperparameters ---------------------------------------------------------------------------


class Hyperparameters:
    # where things are
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp8192_caseops")
    train_files = os.environ.get("TRAIN_FILES", os.path.join(data_path, "fineweb_train_*.bin"))
    val_files = os.environ.get("VAL_FILES", os.path.join(data_path, "fineweb_val_[0-9]*.bin"))
    val_bytes_files = os.environ.get("VAL_BYTES_FILES", os.path.join(data_path, "fineweb_val_bytes_[0-9]*.bin"))
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_8192_caseops_bpe.model")
    caseops_enabled = bool(int(os.environ.get("CASEOPS_ENABLED", "1")))
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")

    # the clock
    iterations = int(os.environ.get("ITERATIONS", 20000))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 16.0))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 250))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 0))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    min_lr = float(os.environ.get("MIN_LR", 0.0))

    # batch
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_rows = int(os.environ.get("EVAL_BATCH_ROWS", 32))
    pack_tokens = int(os.environ.get("PACK_TOKENS", 32_768))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    bos_id = int(os.environ.get("BOS_ID", 1))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    embed_std = float(os.environ.get("EMBED_STD", 0.005))
    loop_first = int(os.environ.get("LOOP_FIRST", 3))
    loop_last = int(os.environ.get("LOOP_LAST", 5))
    loop_extra = int(os.environ.get("LOOP_EXTRA", 1))
    loop_from_frac = float(os.environ.get("LOOP_FROM_FRAC", 0.35))
    smear_enabled = bool(int(os.environ.get("SMEAR_ENABLED", "1")))
    smear_width = int(os.environ.get("SMEAR_WIDTH", 12))

    # optimisers
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.026))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_steps = int(os.environ.get("MUON_MOMENTUM_STEPS", 1500))
    muon_ns_steps = int(os.environ.get("MUON_NS_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    grad_clip = float(os.environ.get("GRAD_CLIP", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # quantisation
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 7))
    matrix_clip = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip = float(os.environ.get("EMBED_CLIP_SIGMAS", 15.0))
    calib_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 24))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    lqer_rank = int(os.environ.get("LQER_RANK", 4))
    lqer_top_k = int(os.environ.get("LQER_TOP_K", 3))
    size_limit = 16_000_000

    # test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_rank = int(os.environ.get("TTT_LORA_RANK", 80))
    ttt_alpha = float(os.environ.get("TTT_LORA_ALPHA", 144.0))
    ttt_lr = float(os.environ.get("TTT_LORA_LR", 1e-4))
    ttt_wd = float(os.environ.get("TTT_WEIGHT_DECAY", 0.5))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.99))
    ttt_chunk = int(os.environ.get("TTT_CHUNK_SIZE", 64))
    ttt_steps = int(os.environ.get("TTT_STEPS_PER_CHUNK", 1))
    ttt_rows = int(os.environ.get("TTT_BATCH_ROWS", 64))
    ttt_min_doc = int(os.environ.get("TTT_MIN_DOC_TOKENS", 384))
    ttt_soft_limit = float(os.environ.get("TTT_SOFT_LIMIT_SECONDS", 540.0))
    phase_prefix_docs = int(os.environ.get("PHASED_TTT_PREFIX_DOCS", 2000))
    phase_count = int(os.environ.get("PHASED_TTT_NUM_PHASES", 3))
    global_lr = float(os.environ.get("GLOBAL_TTT_LR", 1e-3))
    global_momentum = float(os.environ.get("GLOBAL_TTT_MOMENTUM", 0.9))
    global_epochs = int(os.environ.get("GLOBAL_TTT_EPOCHS", 1))
    global_clip = float(os.environ.get("GLOBAL_TTT_GRAD_CLIP", 1.0))

    # token-only copy hint (causal), see CopyHints
    hint_order = int(os.environ.get("HINT_ORDER", 4))
    hint_beta_once = float(os.environ.get("HINT_BETA_ONCE", 0.45))
    hint_beta_more = float(os.environ.get("HINT_BETA_MORE", 1.3))


# ---- ranks and log -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    local: int
    device: torch.device

    @property
    def master(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum_(self, t: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def max_(self, t: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return t


def join_ranks() -> Ranks:
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world:
        raise ValueError(f"WORLD_SIZE={world} must divide 8")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return Ranks(rank, world, local, device)


class Log:
    def __init__(self, ranks: Ranks, run_id: str):
        self.on = ranks.master
        self.path = Path("logs") / f"{run_id}.txt"
        if self.on:
            self.path.parent.mkdir(exist_ok=True)
            print(self.path)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.on:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            print(text, file=f)


# ---- shards ------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(path: str | Path) -> np.ndarray:
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: header says {count} tokens, file has {tokens.size}")
    return tokens


def read_shards(pattern: str) -> np.ndarray:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"nothing matches {pattern}")
    return np.concatenate([read_shard(f) for f in files])


class ShardStream:
    """All shards of a pattern, one after another, for ever."""

    def __init__(self, pattern: str):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(f"nothing matches {pattern}")
        self.index = 0
        self.at = 0
        self.tokens = read_shard(self.files[0])

    def take(self, n: int) -> np.ndarray:
        parts = []
        while n > 0:
            if self.at >= self.tokens.size:
                self.index = (self.index + 1) % len(self.files)
                self.tokens = read_shard(self.files[self.index])
                self.at = 0
            got = self.tokens[self.at : self.at + n]
            self.at += got.size
            n -= got.size
            parts.append(got)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


EDGE_BUCKET = 128


def padded_edges(edges: list[int], total: int) -> Tensor:
    """cu_seqlens, filled up with empty segments so that the compiled graph sees few shapes."""
    size = -(-len(edges) // EDGE_BUCKET) * EDGE_BUCKET
    return torch.tensor(edges + [total] * (size - len(edges)), dtype=torch.int32)


def document_edges(ids: np.ndarray, bos: int, limit: int) -> list[int]:
    """Cut before every BOS, and every `limit` tokens inside of long documents."""
    cuts = [0] + [int(i) for i in np.flatnonzero(ids == bos) if i > 0] + [int(ids.size)]
    edges = [0]
    for a, b in zip(cuts[:-1], cuts[1:]):
        edges.extend(range(a + limit, b, limit))
        edges.append(b)
    return edges


class TrainLoader:
    """Flat batches [1, T] with the document edges for varlen attention."""

    def __init__(self, pattern: str, h: type[Hyperparameters], ranks: Ranks, grad_accum: int):
        self.stream = ShardStream(pattern)
        self.per_rank = h.train_batch_tokens // (ranks.world * grad_accum)
        self.ranks = ranks
        self.bos = h.bos_id
        self.limit = h.train_seq_len

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        span = self.per_rank + 1
        block = self.stream.take(span * self.ranks.world)
        mine = block[self.ranks.rank * span : (self.ranks.rank + 1) * span].astype(np.int64)
        edges = padded_edges(document_edges(mine[:-1], self.bos, self.limit), self.per_rank)
        ids = torch.from_numpy(mine).pin_memory().to(self.ranks.device, non_blocking=True)
        return ids[None, :-1], ids[None, 1:], edges.to(self.ranks.device, non_blocking=True)


# ---- validation text: documents and bytes ------------------------------------------------------


def piece_tables(sp: spm.SentencePieceProcessor, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of each piece without its mark; does it begin with the mark; is it no text at all (control, unknown)."""
    size = max(int(sp.vocab_size()), vocab)
    base = np.zeros(size, dtype=np.int16)
    leading = np.zeros(size, dtype=bool)
    boundary = np.ones(size, dtype=bool)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        if sp.is_byte(i):
            base[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("▁"):
            leading[i] = True
            piece = piece[1:]
        base[i] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base, dtype=torch.int16, device=device),
        torch.tensor(leading, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


class ByteCounter:
    """UTF-8 bytes of the original text per target.

    CaseOps moves capitals into operator pieces, so the pieces' own lengths are those of the transformed text. The data
    script therefore writes a sidecar beside the tokens: for every token of the stream the bytes of the untouched text
    that it stands for (operators 0, BOS 0). Without CaseOps the usual piece tables are exact.
    """

    def __init__(self, h: type[Hyperparameters], tokens: np.ndarray, device: torch.device):
        sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
        self.base, self.leading, self.boundary = piece_tables(sp, h.vocab_size, device)
        self.sidecar: Tensor | None = None
        if h.caseops_enabled:
            side = read_shards(h.val_bytes_files)
            if side.size != tokens.size:
                raise ValueError(f"sidecar has {side.size} entries for {tokens.size} tokens")
            self.sidecar = torch.from_numpy(side.astype(np.int16)).to(device)

    def from_pieces(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.base[target].to(torch.int64)
        return n + (self.leading[target] & ~self.boundary[prev]).to(torch.int64)

    def __call__(self, prev: Tensor, target: Tensor, where: Tensor) -> Tensor:
        if self.sidecar is not None:
            return self.sidecar[where].to(torch.int64)
        return self.from_pieces(prev, target)


@dataclass(frozen=True)
class Doc:
    """tokens[start : start + length]; the last one is the next document's BOS (or the end), which is predicted, too."""

    index: int
    start: int
    length: int

    @property
    def preds(self) -> int:
        return self.length - 1


def split_documents(tokens: np.ndarray, bos: int) -> list[Doc]:
    starts = [int(i) for i in np.flatnonzero(tokens == bos)]
    if not starts or starts[0] != 0:
        starts.insert(0, 0)
    docs = []
    for i, a in enumerate(starts):
        end = starts[i + 1] + 1 if i + 1 < len(starts) else int(tokens.size)
        if end - a >= 2:
            docs.append(Doc(i, a, end - a))
    return docs


class Validation:
    def __init__(self, h: type[Hyperparameters], device: torch.device):
        self.tokens = read_shards(h.val_files)
        self.docs = split_documents(self.tokens, h.bos_id)
        self.count_bytes = ByteCounter(h, self.tokens, device)
        self.targets = int(self.tokens.size) - 1

    def text(self, doc: Doc) -> np.ndarray:
        return self.tokens[doc.start : doc.start + doc.length].astype(np.int64)


Figures = tuple[float, float, int, int]


class Tally:
    """Sums in double precision: nats, bytes, tokens."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, nbytes: Tensor, valid: Tensor) -> None:
        w = valid.to(torch.float64)
        self.sums[0] += (nll.to(torch.float64) * w).sum()
        self.sums[1] += (nbytes.to(torch.float64) * w).sum()
        self.sums[2] += w.sum()

    def figures(self, ranks: Ranks) -> Figures:
        """loss per token, bits per byte, tokens, bytes; over all ranks."""
        nats, nbytes, count = ranks.sum_(self.sums.clone()).tolist()
        return nats / count, nats / math.log(2.0) / nbytes, round(count), round(nbytes)


# ---- model -------------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """fp32 weight, cast at use."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rope_tables(length: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    inv = base ** -(torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inv)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial rotary: the first 2 * cos.size(-1) dimensions of each head turn, the others stay."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * c + b * s, b * c - a * s, rest), dim=-1)


@dataclass
class Packing:
    """Several documents in one flat row."""

    edges: Tensor
    longest: int


class Attention(nn.Module):
    def __init__(self, h: type[Hyperparameters]):
        super().__init__()
        self.heads, self.kv_heads = h.num_heads, h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        kv = self.kv_heads * self.head_dim
        self.q = CastedLinear(h.model_dim, h.model_dim)
        self.k = CastedLinear(h.model_dim, kv)
        self.v = CastedLinear(h.model_dim, kv)
        self.o = CastedLinear(h.model_dim, h.model_dim)
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing | None, lora: SlotLoRA | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if lora is not None:
            q, k, v = q + lora.q(x), k + lora.k(x), v + lora.v(x)
        q = q.view(b, t, self.heads, self.head_dim)
        k = k.view(b, t, self.kv_heads, self.head_dim)
        v = v.view(b, t, self.kv_heads, self.head_dim)
        q = rotate(rms_norm(q), cos, sin) * self.q_gain.to(x.dtype)[None, None, :, None]
        k = rotate(rms_norm(k), cos, sin)
        if packing is None:
            y = flash_attn_func(q, k, v, causal=True)
        else:
            e, m = packing.edges, packing.longest
            y = flash_attn_varlen_func(
                q[0], k[0], v[0], cu_seqlens_q=e, cu_seqlens_k=e, max_seqlen_q=m, max_seqlen_k=m, causal=True
            )
        y = y.reshape(b, t, d)
        out = self.o(y)
        return out if lora is None else out + lora.o(y)


class MLP(nn.Module):
    def __init__(self, h: type[Hyperparameters]):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.up = CastedLinear(h.model_dim, hidden)
        self.down = CastedLinear(hidden, h.model_dim)

    def forward(self, x: Tensor, lora: SlotLoRA | None) -> Tensor:
        y = self.down(F.leaky_relu(self.up(x), 0.5).square())
        return y if lora is None else y + lora.mlp(x)


class Block(nn.Module):
    def __init__(self, h: type[Hyperparameters], depth: int):
        super().__init__()
        self.attn = Attention(h)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))))
        self.norm_factor = 1.0 / math.sqrt(depth + 1)

    def forward(
        self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, packing: Packing | None, lora: SlotLoRA | None
    ) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        y = self.attn(rms_norm(x) * self.norm_factor, cos, sin, packing, lora)
        x = x + self.attn_scale.to(x.dtype) * y
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.norm_factor, lora)


class SmearGate(nn.Module):
    """x_t += lambda * sigmoid(w . x_t[:12]) * x_{t-1}, but never into the first token of a document."""

    def __init__(self, width: int, bos: int):
        super().__init__()
        self.width, self.bos = width, bos
        self.gate = CastedLinear(width, 1)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = self.strength.to(x.dtype) * torch.sigmoid(self.gate(x[:, 1:, : self.width]))
        inside = (ids[:, 1:] != self.bos).to(x.dtype)[..., None]
        return torch.cat((x[:, :1], x[:, 1:] + g * inside * x[:, :-1]), dim=1)


class GPT(nn.Module):
    def __init__(self, h: type[Hyperparameters]):
        super().__init__()
        self.softcap = h.logit_softcap
        self.rope_dims, self.rope_base = h.rope_dims, h.rope_base
        self.wte = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.smear_width, h.bos_id) if h.smear_enabled else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        plain = list(range(h.num_layers))
        again = list(range(h.loop_first, h.loop_last + 1)) * h.loop_extra
        self.plans = {False: plain, True: plain[: h.loop_last + 1] + again + plain[h.loop_last + 1 :]}
        self.looping = False
        self.skip = nn.Parameter(torch.ones(len(self.plans[True]) // 2, h.model_dim))
        self._rope: tuple[Tensor, Tensor] | None = None
        self.reset(h.embed_std)

    def reset(self, embed_std: float) -> None:
        nn.init.normal_(self.wte.weight, std=embed_std)
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                if name.endswith((".o", ".down")) or name == "smear.gate":
                    nn.init.zeros_(m.weight)
                else:
                    nn.init.orthogonal_(m.weight, gain=1.0)

    @property
    def slots(self) -> int:
        return len(self.plans[self.looping])

    def prepare_rope(self, length: int) -> None:
        """Called outside of compiled code, before any forward of that length."""
        if self._rope is None or self._rope[0].size(1) < length:
            self._rope = rope_tables(length, self.rope_dims, self.rope_base, self.wte.weight.device)

    def trunk(self, ids: Tensor, packing: Packing | None = None, lora: RowAdapters | None = None) -> Tensor:
        assert self._rope is not None
        n = ids.size(1)
        cos, sin = self._rope[0][:, :n], self._rope[1][:, :n]
        x = rms_norm(F.embedding(ids, self.wte.weight).to(torch.bfloat16))
        if self.smear is not None:
            x = self.smear(x, ids)
        x0 = x
        plan = self.plans[self.looping]
        half = len(plan) // 2
        saved: list[Tensor] = []
        for slot, which in enumerate(plan):
            if slot >= len(plan) - half:
                x = x + self.skip[len(saved) - 1].to(x.dtype) * saved.pop()
            x = self.blocks[which](x, x0, cos, sin, packing, None if lora is None else lora.slots[slot])
            if slot < half:
                saved.append(x)
        return rms_norm(x)

    def head(self, x: Tensor, lora: RowAdapters | None = None) -> Tensor:
        z = F.linear(x, self.wte.weight.to(x.dtype))
        if lora is not None:
            z = z + lora.head(x)
        return self.softcap * torch.tanh(z.float() / self.softcap)

    def logits(self, ids: Tensor, packing: Packing | None = None) -> Tensor:
        return self.head(self.trunk(ids, packing))

    def picked_logits(self, ids: Tensor, pick: Tensor, lora: RowAdapters) -> Tensor:
        """Logits at the positions `pick` [rows, n] of each row only; that is all a chunk needs."""
        x = self.trunk(ids, None, lora)
        x = x.gather(1, pick[..., None].expand(-1, -1, x.size(-1)))
        return self.head(x, lora)

    def forward(self, ids: Tensor, targets: Tensor, edges: Tensor, longest: int) -> Tensor:
        z = self.logits(ids, Packing(edges, longest))
        return F.cross_entropy(z.flatten(0, 1), targets.flatten())


class RowLoRA(nn.Module):
    """One low-rank pair per row of the batch, so that documents do not see each other's updates."""

    def __init__(self, rows: int, d_in: int, d_out: int, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rows, rank, d_in))
        self.up = nn.Parameter(torch.zeros(rows, d_out, rank))

    def reset(self, gen: torch.Generator) -> None:
        bound = 1.0 / math.sqrt(self.down.size(-1))
        with torch.no_grad():
            self.down.uniform_(-bound, bound, generator=gen)
            self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.bmm(x, self.down.to(x.dtype).transpose(1, 2))
        return torch.bmm(inner, self.up.to(x.dtype).transpose(1, 2)) * self.scale


class SlotLoRA(nn.Module):
    def __init__(self, rows: int, h: type[Hyperparameters]):
        super().__init__()
        d, kv = h.model_dim, h.num_kv_heads * (h.model_dim // h.num_heads)
        for name, out in (("q", d), ("k", kv), ("v", kv), ("o", d), ("mlp", d)):
            setattr(self, name, RowLoRA(rows, d, out, h.ttt_rank, h.ttt_alpha))


class RowAdapters(nn.Module):
    def __init__(self, rows: int, slots: int, h: type[Hyperparameters]):
        super().__init__()
        self.rows = rows
        self.slots = nn.ModuleList([SlotLoRA(rows, h) for _ in range(slots)])
        self.head = RowLoRA(rows, h.model_dim, h.vocab_size, h.ttt_rank, h.ttt_alpha)

    def reset(self, seed: int) -> None:
        gen = torch.Generator(device=self.head.up.device).manual_seed(seed)
        for m in self.modules():
            if isinstance(m, RowLoRA):
                m.reset(gen)


# ---- optimisers --------------------------------------------------------------------------------


@torch.compile
def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Quintic iteration towards the orthogonal factor of g, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Each rank orthogonalises its share of the matrices, the updates are summed over the ranks."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, steps: int, wd: float, ranks: Ranks):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, wd=wd))
        self.ranks = ranks

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), dtype=torch.bfloat16, device=params[0].device)
            at = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(p.grad)
                    buf = state["buffer"]
                    buf.lerp_(p.grad, 1.0 - group["momentum"])
                    g = p.grad.lerp(buf, group["momentum"])
                    u = newton_schulz(g, group["steps"]) * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = u.flatten()
                at += p.numel()
            self.ranks.sum_(flat)
            at = 0
            for p in params:
                u = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["wd"]).add_(u, alpha=-group["lr"])
                at += p.numel()


class Optimizers:
    """Muon for the blocks' matrices, AdamW for the embedding and for everything small."""

    def __init__(self, h: type[Hyperparameters], model: GPT, ranks: Ranks):
        matrices, scalars = [], []
        for name, p in model.named_parameters():
            if name == "wte.weight":
                continue
            big = p.ndim == 2 and name.startswith("blocks.") and not name.endswith(".mix")
            (matrices if big else scalars).append(p)
        self.h = h
        self.muon = Muon(matrices, h.matrix_lr, h.muon_momentum, h.muon_ns_steps, h.muon_wd, ranks)
        betas = (h.beta1, h.beta2)
        embed = [{"params": [model.wte.weight], "lr": h.embed_lr}]
        small = [{"params": scalars, "lr": h.scalar_lr}]
        self.embed = torch.optim.AdamW(embed, betas=betas, eps=1e-10, weight_decay=h.embed_wd, fused=True)
        self.small = torch.optim.AdamW(small, betas=betas, eps=1e-10, weight_decay=h.adam_wd, fused=True)
        self.all: list[torch.optim.Optimizer] = [self.muon, self.embed, self.small]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def schedule(self, step: int, scale: float) -> None:
        warm = min(step / max(self.h.muon_momentum_steps, 1), 1.0)
        for group in self.muon.param_groups:
            group["momentum"] = (1 - warm) * self.h.muon_momentum_start + warm * self.h.muon_momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self) -> None:
        for opt in self.all:
            opt.step()

    def zero(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)


def mean_grads(params: list[nn.Parameter], ranks: Ranks) -> None:
    grads = [p.grad for p in params if p.grad is not None]
    if ranks.world == 1 or not grads:
        return
    flat = _flatten_dense_tensors(grads)
    ranks.sum_(flat).div_(ranks.world)
    for g, f in zip(grads, _unflatten_dense_tensors(flat, grads)):
        g.copy_(f)


class EMA:
    def __init__(self, model: GPT, decay: float):
        self.decay = decay
        self.params = [p.detach() for p in model.parameters()]
        self.shadow = [p.clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, self.params, 1.0 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        torch._foreach_copy_(self.params, self.shadow)


# ---- copy hints: which token followed the last time that this document said these words --------


class CopyHints:
    """For every target of a document at most one hinted token, out of the tokens before it.

    The key is the last `order` tokens, the hint what stood after the key's latest earlier occurrence in the same
    document. The strength depends on how often the key has been followed by it in a row. The probabilities are
    p(a) exp(beta [a = hint]) / (1 + p(hint) (exp(beta) - 1)), which sums to one over the vocabulary.
    """

    def __init__(self, h: type[Hyperparameters]):
        self.order = h.hint_order
        self.vocab = h.vocab_size
        self.betas = (h.hint_beta_once, h.hint_beta_more)

    def for_document(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """hints[i], betas[i] go with the target text[i + 1] and are made of text[: i + 1]."""
        toks = text.tolist()
        n = len(toks) - 1
        hints = np.zeros(n, dtype=np.int64)
        betas = np.zeros(n, dtype=np.float32)
        modulus = self.vocab**self.order
        latest: dict[int, tuple[int, int]] = {}
        key = 0
        for i in range(n):
            key = (key * self.vocab + toks[i]) % modulus
            if i + 1 < self.order:
                continue
            found = latest.get(key)
            if found is not None:
                hints[i] = found[0]
                betas[i] = self.betas[1] if found[1] > 1 else self.betas[0]
            after = toks[i + 1]
            run = found[1] + 1 if found is not None and found[0] == after else 1
            latest[key] = (after, run)
        return hints, betas


def tilted_nll(logits: Tensor, targets: Tensor, hints: Tensor, betas: Tensor) -> Tensor:
    """-ln of the tilted probability of each target. beta = 0: the plain one."""
    logp = F.log_softmax(logits.float(), dim=-1)
    gold = logp.gather(-1, targets[..., None]).squeeze(-1)
    at_hint = logp.gather(-1, hints[..., None]).squeeze(-1).exp()
    log_z = torch.log1p(at_hint * torch.expm1(betas))
    return log_z - gold - betas * (hints == targets)


# ---- packed scoring: many documents in one flat row, fixed weights -----------------------------


@dataclass
class Pack:
    ids: Tensor  # [1, N]
    targets: Tensor
    where: Tensor  # position of the target in the validation stream
    hints: Tensor
    betas: Tensor
    valid: Tensor
    edges: Tensor


class Packer:
    """Fills flat rows of `capacity` tokens with documents, long ones in pieces of `limit` tokens."""

    def __init__(self, h: type[Hyperparameters], val: Validation, device: torch.device, hints: CopyHints | None):
        self.val, self.device, self.hints = val, device, hints
        self.capacity, self.limit, self.bos = h.pack_tokens, h.eval_seq_len, h.bos_id

    def plan(self, docs: list[Doc]) -> list[list[tuple[Doc, int, int]]]:
        """Rows of pieces (document, first, last): piece predicts text[first + 1 .. last] of its document."""
        rows: list[list[tuple[Doc, int, int]]] = []
        free = 0
        for doc in docs:
            for a in range(0, doc.preds, self.limit):
                b = min(a + self.limit, doc.preds)
                if b - a > free:
                    rows.append([])
                    free = self.capacity
                rows[-1].append((doc, a, b))
                free -= b - a
        return rows

    def fill(self, row: list[tuple[Doc, int, int]]) -> Pack:
        n = self.capacity
        ids = np.full(n, self.bos, dtype=np.int64)
        targets, where = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        hints, betas = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.float32)
        valid = np.zeros(n, dtype=bool)
        edges, at = [0], 0
        for doc, a, b in row:
            text = self.val.text(doc)
            to = at + b - a
            ids[at:to] = text[a:b]
            targets[at:to] = text[a + 1 : b + 1]
            where[at:to] = np.arange(doc.start + a + 1, doc.start + b + 1)
            if self.hints is not None:
                doc_hints, doc_betas = self.hints.for_document(text)
                hints[at:to], betas[at:to] = doc_hints[a:b], doc_betas[a:b]
            valid[at:to] = True
            edges.append(to)
            at = to
        edges.extend(range(at + self.limit, n, self.limit))
        if edges[-1] != n:
            edges.append(n)
        flat = (ids, targets, where, hints, betas, valid)
        tensors = [torch.from_numpy(t)[None].to(self.device, non_blocking=True) for t in flat]
        return Pack(*tensors, edges=padded_edges(edges, n).to(self.device))


class PackedForward(nn.Module):
    """What gets compiled for packs."""

    def __init__(self, model: GPT, longest: int):
        super().__init__()
        self.model, self.longest = model, longest

    def forward(self, ids: Tensor, edges: Tensor) -> Tensor:
        return self.model.logits(ids, Packing(edges, self.longest))


@torch.no_grad()
def score_packed(
    h: type[Hyperparameters], ranks: Ranks, forward: nn.Module, val: Validation, docs: list[Doc],
    tally: Tally, hints: CopyHints | None = None,
) -> None:
    """Adds this rank's share of the documents to the tally. The weights stay as they are."""
    packer = Packer(h, val, ranks.device, hints)
    for row in packer.plan(docs)[ranks.rank :: ranks.world]:
        pack = packer.fill(row)
        logits = forward(pack.ids, pack.edges)
        nll = tilted_nll(logits, pack.targets, pack.hints, pack.betas)
        tally.add(nll, val.count_bytes(pack.ids, pack.targets, pack.where), pack.valid)


def packed_bpb(h: type[Hyperparameters], ranks: Ranks, forward: nn.Module, val: Validation) -> Figures:
    """The plain figure of a model: documents in pieces, nothing adapted, no hints."""
    tally = Tally(ranks.device)
    score_packed(h, ranks, forward, val, val.docs, tally)
    return tally.figures(ranks)


@torch.no_grad()
def sliding_bpb(h: type[Hyperparameters], ranks: Ranks, model: GPT, val: Validation) -> Figures:
    """Stream windows for TTT_ENABLED=0. A window scores the targets that no earlier one has scored."""
    length, stride = h.eval_seq_len, h.eval_stride
    tally = Tally(ranks.device)
    windows = []
    done = 0
    while done < val.targets:
        end = min(max(length, done + stride), val.targets)
        windows.append((max(0, end - length), done, end))
        done = end
    stream = torch.from_numpy(val.tokens.astype(np.int32))
    mine = windows[ranks.rank :: ranks.world]
    forward = torch.compile(model.logits, dynamic=False)
    for i in range(0, len(mine), h.eval_batch_rows):
        part = mine[i : i + h.eval_batch_rows]
        ids = torch.full((h.eval_batch_rows, length), h.bos_id, dtype=torch.int64)
        targets = torch.zeros_like(ids)
        where = torch.zeros_like(ids)
        valid = torch.zeros_like(ids, dtype=torch.bool)
        for r, (begin, fresh, end) in enumerate(part):
            n = end - begin
            ids[r, :n] = stream[begin:end]
            targets[r, :n] = stream[begin + 1 : end + 1]
            where[r, :n] = torch.arange(begin + 1, end + 1)
            valid[r, fresh - begin : n] = True
        ids, targets, where, valid = (t.to(ranks.device) for t in (ids, targets, where, valid))
        logits = forward(ids)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        tally.add(nll, val.count_bytes(ids, targets, where), valid)
    return tally.figures(ranks)


# ---- quantisation ------------------------------------------------------------------------------


class HessianCollector:
    """Sums of x x^T over the inputs of every matrix, from forward passes over training batches."""

    def __init__(self, model: GPT):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles = []
        for name, m in model.named_modules():
            if isinstance(m, CastedLinear) and name.startswith("blocks."):
                self.handles.append(m.register_forward_pre_hook(self.hook(name + ".weight")))

    def hook(self, name: str):
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, 1).float()
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
                self.counts[name] = 0
            self.sums[name].addmm_(x.T, x)
            self.counts[name] += x.size(0)

        return see

    def close(self, ranks: Ranks) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        out = {}
        for name in sorted(self.sums):
            count = torch.tensor(float(self.counts[name]), device=ranks.device)
            out[name] = ranks.sum_(self.sums[name]) / ranks.sum_(count)
        return out


@torch.no_grad()
def collect_hessians(
    h: type[Hyperparameters], ranks: Ranks, model: GPT, loader: TrainLoader, seconds: float
) -> tuple[dict[str, Tensor], int]:
    """At least one batch, then more of them as long as the training time lasts (ranks may differ by a batch)."""
    started = time.perf_counter()
    collector = HessianCollector(model)
    used = 0
    while used < h.calib_batches:
        if used and time.perf_counter() - started > seconds:
            break
        ids, _, edges = loader.next()
        model.trunk(ids, Packing(edges, h.train_seq_len))
        torch.cuda.synchronize()
        used += 1
    return collector.close(ranks), used


Packed = tuple[dict[str, Tensor], list[str]]


def row_scales(w: Tensor, bits: int, sigmas: float) -> Tensor:
    top = 2 ** (bits - 1) - 1
    s = (sigmas * w.std(dim=1) / top).clamp_min(1e-6)
    return s.half().float()


def round_rows(w: Tensor, bits: int, sigmas: float) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    s = row_scales(w.float(), bits, sigmas)
    return (w.float() / s[:, None]).round().clamp(-top, top).to(torch.int8), s.half()


def gptq(w: Tensor, hessian: Tensor, bits: int, sigmas: float, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """Rounds column after column, most active input first, and lets the later columns make up for the error."""
    top = 2 ** (bits - 1) - 1
    w = w.float().clone()
    hess = hessian.float().clone()
    s = row_scales(w, bits, sigmas)
    diag = hess.diagonal()
    dead = diag == 0
    diag[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(diag, descending=True)
    w = w[:, order].contiguous()
    hess = hess[order][:, order].contiguous()
    hess.diagonal().add_(damp * hess.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hess))
    u = torch.linalg.cholesky(inverse, upper=True)
    cols = w.size(1)
    q = torch.zeros_like(w, dtype=torch.int8)
    for a in range(0, cols, block):
        b = min(a + block, cols)
        part = w[:, a:b].clone()
        errs = torch.zeros_like(part)
        for j in range(b - a):
            col = part[:, j]
            r = (col / s).round().clamp(-top, top)
            q[:, a + j] = r.to(torch.int8)
            err = (col - r * s) / u[a + j, a + j]
            part[:, j:] -= err[:, None] * u[a + j, a + j : b][None, :]
            errs[:, j] = err
        w[:, b:] -= errs @ u[a:b, b:]
    return q[:, torch.argsort(order)].contiguous(), s.half()


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    s = (x.abs().amax(dim=1) / 127.0).clamp_min(1e-8).half()
    return (x / s.float()[:, None]).round().clamp(-127, 127).to(torch.int8), s


def add_lqer(h: type[Hyperparameters], state: dict[str, Tensor], packed: dict[str, Tensor]) -> list[str]:
    """Low-rank correction of the rounding error for the matrices that lost most."""
    lost: dict[str, Tensor] = {}
    for key in packed:
        if key.startswith("q:"):
            name = key[2:]
            lost[name] = state[name].float() - packed[key].float() * packed["s:" + name].float()[:, None]
    worst = sorted(lost, key=lambda n: -float(lost[n].norm()))[: h.lqer_top_k]
    for name in worst:
        u, sv, vh = torch.linalg.svd(lost[name], full_matrices=False)
        root = sv[: h.lqer_rank].sqrt()
        left, right = u[:, : h.lqer_rank] * root, root[:, None] * vh[: h.lqer_rank]
        packed["la:" + name], packed["las:" + name] = int8_rows(left.T.contiguous())
        packed["lb:" + name], packed["lbs:" + name] = int8_rows(right.contiguous())
    return worst


def quantise(h: type[Hyperparameters], state: dict[str, Tensor], hessians: dict[str, Tensor]) -> Packed:
    packed: dict[str, Tensor] = {}
    for name, t in state.items():
        if name in hessians:
            q, s = gptq(t, hessians[name], h.matrix_bits, h.matrix_clip, h.gptq_block, h.gptq_damp)
            packed["q:" + name], packed["s:" + name] = q, s
        elif name == "wte.weight":
            packed["q:" + name], packed["s:" + name] = round_rows(t, h.embed_bits, h.embed_clip)
        else:
            packed["p:" + name] = t.half() if t.numel() > 64 else t.float()
    worst = add_lqer(h, state, packed)
    return packed, worst


def dequantise(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, t in packed.items():
        kind, name = key.split(":", 1)
        if kind == "p":
            state[name] = t.float()
        elif kind == "q":
            w = t.float() * packed["s:" + name].float()[:, None]
            if "la:" + name in packed:
                left = packed["la:" + name].float() * packed["las:" + name].float()[:, None]
                right = packed["lb:" + name].float() * packed["lbs:" + name].float()[:, None]
                w = w + left.T @ right
            state[name] = w
    return state


# ---- artifact ----------------------------------------------------------------------------------


def to_bytes(packed: dict[str, Tensor]) -> bytes:
    buf = io.BytesIO()
    torch.save({k: v.cpu() for k, v in packed.items()}, buf)
    return brotli.compress(buf.getvalue(), quality=11, lgwin=24)


def from_bytes(blob: bytes, device: torch.device) -> dict[str, Tensor]:
    loaded = torch.load(io.BytesIO(brotli.decompress(blob)), map_location="cpu", weights_only=True)
    return {k: v.to(device) for k, v in loaded.items()}


def write_artifact(h: type[Hyperparameters], packed: dict[str, Tensor], code: str, log: Log) -> None:
    blob = to_bytes(packed)
    Path(h.artifact_path).write_bytes(blob)
    code_bytes = len(code.encode("utf-8"))
    total = len(blob) + code_bytes
    log(f"Serialized model int{h.matrix_bits}+brotli: {len(blob)} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size: {total} bytes (limit {h.size_limit}, margin {h.size_limit - total})")
    if total > h.size_limit:
        log("WARNING: over the size limit")


def read_artifact(h: type[Hyperparameters], ranks: Ranks) -> GPT:
    model = GPT(h).to(ranks.device)
    model.load_state_dict(dequantise(from_bytes(Path(h.artifact_path).read_bytes(), ranks.device)), strict=True)
    model.looping = True
    model.prepare_rope(max(h.pack_tokens, h.eval_seq_len))
    model.eval()
    return model


# ---- test-time training, document by document --------------------------------------------------


@dataclass
class Row:
    """A document as the adapters see it."""

    doc: Doc
    text: np.ndarray
    hints: np.ndarray
    betas: np.ndarray


@dataclass
class ChunkPart:
    """Chunk number `index` of every row of a batch."""

    ids: Tensor  # [R, L] window that ends with the chunk
    pick: Tensor  # [R, C] where the chunk's predictions stand in the window
    targets: Tensor  # [R, C]
    where: Tensor  # [R, C] positions in the stream
    hints: Tensor
    betas: Tensor
    valid: Tensor
    follows: Tensor  # [R] is there a next chunk that could profit


class DocBatch:
    """Up to TTT_BATCH_ROWS documents of similar length, scored and adapted side by side, each with its own adapters."""

    def __init__(self, h: type[Hyperparameters], rows: list[Row], device: torch.device):
        self.rows, self.device = rows, device
        self.size, self.chunk, self.window = h.ttt_rows, h.ttt_chunk, h.eval_seq_len
        self.bos = h.bos_id
        self.chunks = max(self.chunks_of(r) for r in rows)

    def chunks_of(self, row: Row) -> int:
        return -(-row.doc.preds // self.chunk)

    def geometry(self, row: Row, index: int) -> tuple[int, int, int]:
        """(left, begin, end): the window's first input, the chunk's first prediction, the end of both."""
        begin = index * self.chunk
        end = min(begin + self.chunk, row.doc.preds)
        return max(0, end - self.window), begin, end

    def part(self, index: int) -> ChunkPart:
        live = [(r, row) for r, row in enumerate(self.rows) if index < self.chunks_of(row)]
        spans = {r: self.geometry(row, index) for r, row in live}
        longest = max(end - left for left, _, end in spans.values())
        longest = -(-longest // 128) * 128
        shape = (self.size, self.chunk)
        ids = np.full((self.size, longest), self.bos, dtype=np.int64)
        pick, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        where, hints = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        betas, valid = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
        follows = np.zeros(self.size, dtype=bool)
        for r, row in live:
            left, begin, end = spans[r]
            n = end - begin
            ids[r, : end - left] = row.text[left:end]
            pick[r, :n] = np.arange(begin - left, end - left)
            targets[r, :n] = row.text[begin + 1 : end + 1]
            where[r, :n] = np.arange(row.doc.start + begin + 1, row.doc.start + end + 1)
            hints[r, :n], betas[r, :n] = row.hints[begin:end], row.betas[begin:end]
            valid[r, :n] = True
            follows[r] = index + 1 < self.chunks_of(row)
        arrays = (ids, pick, targets, where, hints, betas, valid, follows)
        return ChunkPart(*(torch.from_numpy(a).to(self.device, non_blocking=True) for a in arrays))


class Adapter:
    """The row adapters, their optimiser and the compiled forward through both."""

    def __init__(self, h: type[Hyperparameters], ranks: Ranks, model: GPT):
        self.h, self.ranks, self.model = h, ranks, model
        self.lora = RowAdapters(h.ttt_rows, model.slots, h).to(ranks.device)
        self.lora.reset(h.seed)
        self.forward = torch.compile(model.picked_logits, dynamic=True)
        self.opt = self.fresh_optimizer()

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        h, betas = self.h, (0.0, self.h.ttt_beta2)
        return torch.optim.AdamW(
            self.lora.parameters(), lr=h.ttt_lr, betas=betas, eps=1e-10, weight_decay=h.ttt_wd, fused=True
        )

    def begin(self, seed: int) -> None:
        """Nothing goes from one batch of documents to the next."""
        self.lora.reset(seed)
        self.opt = self.fresh_optimizer()

    @torch.no_grad()
    def score(self, part: ChunkPart) -> Tensor:
        logits = self.forward(part.ids, part.pick, self.lora)
        return tilted_nll(logits, part.targets, part.hints, part.betas)

    def learn(self, part: ChunkPart) -> None:
        """One step per row on the chunk, every row's loss is its own mean."""
        weight = (part.valid & part.follows[:, None]).float()
        weight = weight / part.valid.sum(dim=1, keepdim=True).clamp_min(1)
        self.opt.zero_grad(set_to_none=True)
        logits = self.forward(part.ids, part.pick, self.lora)
        nll = F.cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="none").view_as(weight)
        (nll * weight).sum().backward()
        self.opt.step()


def warm_adapter(h: type[Hyperparameters], adapter: Adapter) -> None:
    """Compile both directions on made-up token ids."""
    gen = np.random.default_rng(0)
    for length in (2 * h.ttt_chunk, h.eval_seq_len):
        fake = gen.integers(2, h.vocab_size, size=length + 1)
        zeros = np.zeros(length, dtype=np.int64)
        rows = [Row(Doc(0, 0, length + 1), fake, zeros, zeros.astype(np.float32)) for _ in range(h.ttt_rows)]
        batch = DocBatch(h, rows, adapter.ranks.device)
        part = batch.part(batch.chunks - 2)
        adapter.score(part)
        adapter.learn(part)
    adapter.begin(h.seed)


def adapt_and_score(
    h: type[Hyperparameters], val: Validation, adapter: Adapter, batch: DocBatch, tally: Tally, adapting: bool
) -> None:
    """Chunk by chunk: score all rows with what their earlier chunks taught, then one step on what was scored."""
    for index in range(batch.chunks):
        part = batch.part(index)
        nll = adapter.score(part)
        prev = part.ids.gather(1, part.pick)
        tally.add(nll, val.count_bytes(prev, part.targets, part.where), part.valid)
        if adapting and index + 1 < batch.chunks:
            for _ in range(h.ttt_steps):
                adapter.learn(part)


def phase_edges(h: type[Hyperparameters], documents: int) -> list[int]:
    """Document counts after which the weights move, and the end."""
    prefix = min(h.phase_prefix_docs, documents)
    edges = sorted({prefix * (i + 1) // h.phase_count for i in range(h.phase_count)} - {0})
    return [e for e in edges if e < documents] + [documents]


def global_sgd(h: type[Hyperparameters], ranks: Ranks, model: GPT, val: Validation, docs: list[Doc], log: Log) -> None:
    """SGD of the whole model on documents that all ranks have scored. Ranks step together on averaged gradients."""
    packer = Packer(h, val, ranks.device, None)
    rows = packer.plan(docs)
    rounds = -(-len(rows) // ranks.world)
    params = [p for p in model.parameters()]
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=h.global_lr, momentum=h.global_momentum)
    steps = rounds * h.global_epochs
    done = 0
    for _ in range(h.global_epochs):
        for i in range(rounds):
            at = i * ranks.world + ranks.rank
            pack = packer.fill(rows[at % len(rows)])
            weight = pack.valid.float() * (1.0 if at < len(rows) else 0.0)
            logits = model.logits(pack.ids, Packing(pack.edges, h.eval_seq_len))
            nll = F.cross_entropy(logits.flatten(0, 1), pack.targets.flatten(), reduction="none").view_as(weight)
            total = ranks.sum_(weight.sum().detach().clone())
            loss = (nll * weight).sum() * ranks.world / total.clamp_min(1.0)
            for group in opt.param_groups:
                group["lr"] = h.global_lr * 0.5 * (1.0 + math.cos(math.pi * done / max(steps, 1)))
            opt.zero_grad(set_to_none=True)
            loss.backward()
            mean_grads(params, ranks)
            nn.utils.clip_grad_norm_(params, h.global_clip)
            opt.step()
            done += 1
    opt.zero_grad(set_to_none=True)
    for p in params:
        p.requires_grad_(False)
    log(f"global_sgd docs:{len(docs)} packs:{len(rows)} steps:{steps}")


class PhasedEvaluation:
    """Scores the documents phase by phase; between the phases the weights learn from the documents already scored.

    Inside a phase: documents below TTT_MIN_DOC_TOKENS go through in packs without adapters (they end before an
    adapter has learned anything worth it), the others sorted by length into batches, dealt to the ranks in turn.
    """

    def __init__(self, h: type[Hyperparameters], ranks: Ranks, model: GPT, val: Validation, log: Log):
        self.h, self.ranks, self.model, self.val, self.log = h, ranks, model, val, log
        for p in model.parameters():
            p.requires_grad_(False)
        self.hints = CopyHints(h)
        self.adapter = Adapter(h, ranks, model)
        self.packed = torch.compile(PackedForward(model, h.eval_seq_len), dynamic=False)
        self.tally = Tally(ranks.device)
        self.started = 0.0
        self.batches_done = 0
        self.batches_plain = 0

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def row(self, doc: Doc) -> Row:
        text = self.val.text(doc)
        hints, betas = self.hints.for_document(text)
        return Row(doc, text, hints, betas)

    def batches(self, docs: list[Doc]) -> list[list[Doc]]:
        ordered = sorted(docs, key=lambda d: (-d.length, d.index))
        return [ordered[i : i + self.h.ttt_rows] for i in range(0, len(ordered), self.h.ttt_rows)]

    def score_documents(self, docs: list[Doc]) -> None:
        short = [d for d in docs if d.length < self.h.ttt_min_doc]
        longer = [d for d in docs if d.length >= self.h.ttt_min_doc]
        score_packed(self.h, self.ranks, self.packed, self.val, short, self.tally, self.hints)
        for group in self.batches(longer)[self.ranks.rank :: self.ranks.world]:
            adapting = self.elapsed() < self.h.ttt_soft_limit
            self.adapter.begin(self.h.seed + group[0].index)
            batch = DocBatch(self.h, [self.row(d) for d in group], self.ranks.device)
            adapt_and_score(self.h, self.val, self.adapter, batch, self.tally, adapting)
            self.batches_done += 1
            self.batches_plain += int(not adapting)

    def run(self) -> Figures:
        docs = self.val.docs
        edges = phase_edges(self.h, len(docs))
        self.log(f"phased_ttt docs:{len(docs)} edges:{edges} chunk:{self.h.ttt_chunk} rank:{self.h.ttt_rank}")
        self.started = time.perf_counter()
        first = 0
        for phase, last in enumerate(edges):
            self.score_documents(docs[first:last])
            self.ranks.barrier()
            loss, bpb, count, _ = self.tally.figures(self.ranks)
            self.log(
                f"phase:{phase} docs:{last} tokens:{count} running_loss:{loss:.5f} running_bpb:{bpb:.5f} "
                f"elapsed:{self.elapsed():.1f}s"
            )
            if last < len(docs):
                global_sgd(self.h, self.ranks, self.model, self.val, docs[first:last], self.log)
            first = last
        return self.tally.figures(self.ranks)


# ---- training ----------------------------------------------------------------------------------


def lr_scale(h: type[Hyperparameters], frac: float) -> float:
    if frac < 1.0 - h.warmdown_frac:
        return 1.0
    left = max(1.0 - frac, 0.0) / max(h.warmdown_frac, 1e-9)
    return h.min_lr + (1.0 - h.min_lr) * left


class Trainer:
    def __init__(self, h: type[Hyperparameters], ranks: Ranks, model: GPT, val: Validation, log: Log):
        self.h, self.ranks, self.model, self.val, self.log = h, ranks, model, val, log
        self.grad_accum = 8 // ranks.world
        self.compiled = torch.compile(model, dynamic=False, fullgraph=True)
        self.opts = Optimizers(h, model, ranks)
        self.params = list(model.parameters())
        self.loader = TrainLoader(h.train_files, h, ranks, self.grad_accum)
        self.ema = EMA(model, h.ema_decay)
        self.budget = h.max_wallclock_seconds - h.gptq_reserve_seconds
        model.prepare_rope(max(self.loader.per_rank, h.pack_tokens))

    def one_step(self, step: int, scale: float) -> Tensor:
        self.opts.zero()
        total = torch.zeros((), device=self.ranks.device)
        for _ in range(self.grad_accum):
            ids, targets, edges = self.loader.next()
            loss = self.compiled(ids, targets, edges, self.h.train_seq_len)
            (loss / self.grad_accum).backward()
            total += loss.detach() / self.grad_accum
        mean_grads(self.params, self.ranks)
        nn.utils.clip_grad_norm_(self.params, self.h.grad_clip)
        self.opts.schedule(step, scale)
        self.opts.step()
        return total

    def warm_up(self) -> None:
        """Compiles both depths, then puts everything back: weights, optimisers, data."""
        if self.h.warmup_steps <= 0:
            return
        weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        states = [copy.deepcopy(opt.state_dict()) for opt in self.opts.all]
        for looping in (False, True):
            self.model.looping = looping
            for _ in range(self.h.warmup_steps // 2):
                self.one_step(0, 1.0)
        self.model.looping = False
        self.model.load_state_dict(weights)
        for opt, state in zip(self.opts.all, states):
            opt.load_state_dict(state)
        self.opts.zero()
        self.loader = TrainLoader(self.h.train_files, self.h, self.ranks, self.grad_accum)
        self.ema = EMA(self.model, self.h.ema_decay)
        self.log(f"warmup_steps:{self.h.warmup_steps} both depths compiled, state restored")

    def validate(self, step: int, seconds: float) -> None:
        """Only for looking at, VAL_LOSS_EVERY=0 in the record runs."""
        self.model.eval()
        loss, bpb, _, _ = packed_bpb(self.h, self.ranks, PackedForward(self.model, self.h.eval_seq_len), self.val)
        self.model.train()
        self.log(f"step:{step} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1000 * seconds:.0f}ms")

    def train(self) -> float:
        """Returns the seconds of training used so far; the weights are the EMA's afterwards."""
        h = self.h
        torch.cuda.synchronize()
        self.ranks.barrier()
        spent = 0.0
        shared = 0.0  # the slowest rank's clock, so that all ranks follow one schedule
        tick = time.perf_counter()
        step = 0
        while step < h.iterations:
            frac = max(shared / max(self.budget, 1e-9), step / h.iterations)
            if not self.model.looping and frac >= h.loop_from_frac:
                self.model.looping = True
                self.log(f"looping on at step:{step} frac:{frac:.3f}")
            loss = self.one_step(step, lr_scale(h, frac))
            self.ema.update()
            step += 1
            if step % h.train_log_every == 0 or step <= 5:
                torch.cuda.synchronize()
                now = spent + time.perf_counter() - tick
                self.log(
                    f"step:{step}/{h.iterations} train_loss:{loss.item():.4f} train_time:{1000 * now:.0f}ms "
                    f"step_avg:{1000 * now / step:.2f}ms"
                )
            if h.val_loss_every > 0 and step % h.val_loss_every == 0:
                torch.cuda.synchronize()
                spent += time.perf_counter() - tick
                self.validate(step, spent)
                torch.cuda.synchronize()
                tick = time.perf_counter()
            if step % 4 == 0:
                torch.cuda.synchronize()
                clock = torch.tensor(spent + time.perf_counter() - tick, device=self.ranks.device)
                shared = float(self.ranks.max_(clock))
                if shared >= self.budget:
                    break
        torch.cuda.synchronize()
        spent += time.perf_counter() - tick
        self.log(f"stopping train_time:{1000 * spent:.0f}ms step:{step}/{h.iterations}")
        self.model.looping = True
        self.ema.apply()
        return spent


# ---- main --------------------------------------------------------------------------------------


def set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def describe(h: type[Hyperparameters]) -> str:
    items = {k: v for k, v in vars(h).items() if not k.startswith("_") and not callable(v)}
    return json.dumps(items, indent=1, sort_keys=True)


def log_environment(h: type[Hyperparameters], ranks: Ranks, code: str, log: Log) -> None:
    log(code, console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    if ranks.master:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
        log(smi, console=False)
    log(f"hyperparameters {describe(h)}")


def report(log: Log, name: str, figures: Figures, seconds: float) -> None:
    loss, bpb, count, nbytes = figures
    log(f"{name} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * seconds:.0f}ms")
    log(f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f} tokens:{count} bytes:{nbytes}")


def build_artifact(h: type[Hyperparameters], ranks: Ranks, trainer: Trainer, spent: float, code: str, log: Log) -> None:
    """Hessians and rounding in what is left of the training time; compression and writing need no data."""
    tick = time.perf_counter()
    left = h.max_wallclock_seconds - spent
    model = trainer.model
    model.eval()
    hessians, used = collect_hessians(h, ranks, model, trainer.loader, seconds=0.5 * left)
    log(f"gptq: hessians of {len(hessians)} matrices from {used} training batches per rank")
    state = {k: v.detach() for k, v in model.state_dict().items()}
    packed, worst = quantise(h, state, hessians) if ranks.master else ({}, [])
    torch.cuda.synchronize()
    gptq_seconds = time.perf_counter() - tick
    log(f"gptq: done in {1000 * gptq_seconds:.0f}ms, train+gptq {1000 * (spent + gptq_seconds):.0f}ms")
    if ranks.master:
        log(f"lqer rank:{h.lqer_rank} on {worst}")
        write_artifact(h, packed, code, log)
    ranks.barrier()


def evaluate_artifact(h: type[Hyperparameters], ranks: Ranks, val: Validation, log: Log) -> None:
    model = read_artifact(h, ranks)

    torch.cuda.synchronize()
    tick = time.perf_counter()
    figures = packed_bpb(h, ranks, PackedForward(model, h.eval_seq_len), val)
    torch.cuda.synchronize()
    report(log, "quantized_packed", figures, time.perf_counter() - tick)

    if not h.ttt_enabled:
        tick = time.perf_counter()
        figures = sliding_bpb(h, ranks, model, val)
        torch.cuda.synchronize()
        report(log, "quantized_sliding", figures, time.perf_counter() - tick)
        return

    evaluation = PhasedEvaluation(h, ranks, model, val, log)
    tick = time.perf_counter()
    warm_adapter(h, evaluation.adapter)
    torch.cuda.synchronize()
    log(f"ttt compile warm-up on random ids: {time.perf_counter() - tick:.1f}s")
    ranks.barrier()

    tick = time.perf_counter()
    figures = evaluation.run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - tick
    log(f"scored tokens:{figures[2]} expected:{val.targets} batches without adaptation:{evaluation.batches_plain}")
    report(log, "phased_ttt", figures, seconds)


def main() -> None:
    h = Hyperparameters
    code = Path(__file__).read_text(encoding="utf-8")
    ranks = join_ranks()
    log = Log(ranks, h.run_id)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    log_environment(h, ranks, code, log)
    set_seeds(h.seed)

    val = Validation(h, ranks.device)
    log(f"val docs:{len(val.docs)} targets:{val.targets} caseops:{h.caseops_enabled}")

    model = GPT(h).to(ranks.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    trainer = Trainer(h, ranks, model, val, log)
    log(f"train shards:{len(trainer.loader.stream.files)} grad_accum:{trainer.grad_accum} world:{ranks.world}")

    trainer.warm_up()
    spent = trainer.train()
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    build_artifact(h, ranks, trainer, spent, code, log)
    del trainer, model
    torch.cuda.empty_cache()

    evaluate_artifact(h, ranks, val, log)

    ranks.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
