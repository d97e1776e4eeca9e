"""gruinard: banked 11-layer transformer, parallel Muon, late int6 QAT, GPTQ + LZMA, per-document LoRA evaluation.

Run:  SEED=1337 torchrun --standalone --nproc_per_node=8 train_gpt.py

Everything that is counted lives in this file. Training, EMA and the GPTQ calibration share one 600 s clock; the evaluation
has a clock of its own. The reported number is `final_doc_lora`.
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
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: F401  (kept for single-bank ablations)

try:
    from flash_attn_interface import flash_attn_func as _fa3
except ImportError:
    _fa3 = None

# ---------------------------------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------------------------------


def knob(name: str, default):
    """A setting from the environment, in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.lower() in ("1", "true", "yes")
    return type(default)(raw)


def setting(name: str, default):
    return field(default_factory=lambda: knob(name, default))


@dataclass
class Settings:
    # data
    data_dir: str = setting("DATA_DIR", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = setting("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    vocab_size: int = setting("VOCAB_SIZE", 1024)
    bos_id: int = setting("BOS_ID", 1)
    seed: int = setting("SEED", 1337)
    run_id: str = setting("RUN_ID", "")
    out_path: str = setting("OUT_PATH", "final_model.int6.lzma")

    # schedule
    iterations: int = setting("ITERATIONS", 20000)
    warmdown_iters: int = setting("WARMDOWN_ITERS", 3500)
    compile_warmup_steps: int = setting("COMPILE_WARMUP_STEPS", 20)
    batch_tokens: int = setting("TRAIN_BATCH_TOKENS", 786432)
    train_seq_len: int = setting("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds: float = setting("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds: float = setting("GPTQ_RESERVE_SECONDS", 14.0)
    val_every: int = setting("VAL_EVERY", 4000)
    log_every: int = setting("LOG_EVERY", 500)

    # model
    num_layers: int = setting("NUM_LAYERS", 11)
    model_dim: int = setting("MODEL_DIM", 512)
    num_heads: int = setting("NUM_HEADS", 8)
    num_kv_heads: int = setting("NUM_KV_HEADS", 4)
    mlp_mult: float = setting("MLP_MULT", 3.0)
    rope_base: float = setting("ROPE_BASE", 10000.0)
    rope_dims: int = setting("ROPE_DIMS", 16)
    xsa_last: int = setting("XSA_LAST", 4)
    logit_softcap: float = setting("LOGIT_SOFTCAP", 30.0)
    qk_gain: float = setting("QK_GAIN_INIT", 1.5)
    bigram_buckets: int = setting("BIGRAM_BUCKETS", 3072)
    bigram_dim: int = setting("BIGRAM_DIM", 112)
    ve_dim: int = setting("VE_DIM", 128)
    ve_layers: str = setting("VE_LAYERS", "9,10")
    embed_std: float = setting("TIED_EMBED_INIT_STD", 0.005)

    # optimisation
    matrix_lr: float = setting("MATRIX_LR", 0.025)
    embed_lr: float = setting("TIED_EMBED_LR", 0.035)
    scalar_lr: float = setting("SCALAR_LR", 0.025)
    muon_momentum: float = setting("MUON_MOMENTUM", 0.99)
    muon_momentum_start: float = setting("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_steps: int = setting("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_ns_steps: int = setting("MUON_BACKEND_STEPS", 5)
    muon_wd: float = setting("MUON_WD", 0.04)
    adam_wd: float = setting("ADAM_WD", 0.04)
    beta1: float = setting("BETA1", 0.9)
    beta2: float = setting("BETA2", 0.95)
    grad_clip: float = setting("GRAD_CLIP_NORM", 0.3)
    ema_decay: float = setting("EMA_DECAY", 0.997)
    swa_every: int = setting("SWA_EVERY", 50)
    swa_from: float = setting("SWA_FROM_SCALE", 0.2)
    average: str = setting("AVERAGE", "ema")
    late_qat_scale: float = setting("LATE_QAT_THRESHOLD", 0.15)

    # quantisation
    calib_source: str = setting("CALIB_SOURCE", "train")
    calib_batches: int = setting("CALIB_BATCHES", 64)
    calib_rows: int = setting("CALIB_ROWS", 8)
    gptq_block: int = setting("GPTQ_BLOCK", 128)
    gptq_damp: float = setting("GPTQ_DAMP", 0.01)
    lzma_preset: int = setting("LZMA_PRESET", 9)
    size_limit: int = setting("SIZE_LIMIT", 16_000_000)

    # evaluation
    val_batch_rows: int = setting("VAL_BATCH_ROWS", 64)
    eval_seq_len: int = setting("EVAL_SEQ_LEN", 2048)
    slide_stride: int = setting("EVAL_STRIDE", 64)
    run_sliding: bool = setting("RUN_SLIDING", True)
    lora_rank: int = setting("TTT_LORA_RANK", 8)
    lora_lr: float = setting("TTT_LORA_LR", 0.01)
    lora_betas: str = setting("TTT_LORA_BETAS", "0.9,0.95")
    lora_docs: int = setting("TTT_BATCH_DOCS", 64)
    lora_chunk: int = setting("TTT_CHUNK", 256)
    lora_context: int = setting("TTT_CONTEXT", 1024)

    def train_glob(self) -> str:
        return os.path.join(self.data_dir, "fineweb_train_*.bin")

    def val_glob(self) -> str:
        return os.path.join(self.data_dir, "fineweb_val_*.bin")

    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim()

    def hidden(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    def ve_at(self) -> list[int]:
        return [int(i) for i in self.ve_layers.split(",") if i.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# ranks, logging
# ---------------------------------------------------------------------------------------------------------------------


class Crew:
    """The ranks: who this one is, and the few collectives that the script needs."""

    def __init__(self) -> None:
        self.active = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.active:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def sum_(self, t: Tensor) -> Tensor:
        if self.active:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        if self.active:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)
        return t

    def max_(self, t: Tensor) -> Tensor:
        if self.active:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return t

    def barrier(self) -> None:
        if self.active:
            dist.barrier()

    def close(self) -> None:
        if self.active:
            dist.destroy_process_group()


class Journal:
    def __init__(self, crew: Crew, run_id: str) -> None:
        self.on = crew.lead
        self.path = Path("logs") / f"{run_id}.txt"
        if self.on:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, message: str, console: bool = True) -> None:
        if not self.on:
            return
        if console:
            print(message, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            print(message, file=f)


class Clock:
    """Milliseconds of work; may be halted while something runs that is no part of it (periodic validation)."""

    def __init__(self) -> None:
        self.done = 0.0
        self.since: float | None = None

    def go(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def halt(self) -> None:
        torch.cuda.synchronize()
        if self.since is not None:
            self.done += 1000.0 * (time.perf_counter() - self.since)
        self.since = None

    def ms(self) -> float:
        running = 0.0 if self.since is None else 1000.0 * (time.perf_counter() - self.since)
        return self.done + running


# ---------------------------------------------------------------------------------------------------------------------
# shards
# ---------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520


def read_shard(path: str) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    body = np.fromfile(path, dtype="<u2", count=count, offset=256 * 4)
    if body.size != count:
        raise ValueError(f"{path}: {body.size} tokens, header says {count}")
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(pattern)
    return found


class TrainFeed:
    """Endless training batches. All ranks walk the same stream; each takes its own slice of every step's span."""

    def __init__(self, pattern: str, crew: Crew) -> None:
        self.paths = list_shards(pattern)
        self.crew = crew
        self.shard = 0
        self.at = 0
        self.tokens = read_shard(self.paths[0])

    def _advance(self) -> None:
        self.shard = (self.shard + 1) % len(self.paths)
        self.tokens = read_shard(self.paths[self.shard])
        self.at = 0

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.at
            if left <= 0:
                self._advance()
                continue
            k = min(n, left)
            parts.append(self.tokens[self.at : self.at + k])
            self.at += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batch(self, total_tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        mine = total_tokens // self.crew.world
        span = mine + 1
        chunk = self.take(span * self.crew.world)
        local = chunk[self.crew.rank * span : (self.crew.rank + 1) * span].to(torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.crew.device, non_blocking=True), y.to(self.crew.device, non_blocking=True)

    def rewind(self) -> None:
        self.shard, self.at = 0, 0
        self.tokens = read_shard(self.paths[0])


def load_val_stream(s: Settings) -> Tensor:
    """The whole validation split, in order, as one stream of uint16 tokens."""
    return torch.cat([read_shard(p) for p in list_shards(s.val_glob())]).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# bytes
# ---------------------------------------------------------------------------------------------------------------------


class ByteTable:
    """UTF-8 bytes of each token. A leading mark is one space, and none after a token that ends the text before it."""

    def __init__(self, path: str, vocab_size: int, device: torch.device) -> None:
        sp = spm.SentencePieceProcessor(model_file=path)
        size = max(int(sp.vocab_size()), vocab_size)
        plain = np.zeros(size, dtype=np.int32)
        spaced = np.zeros(size, dtype=np.bool_)
        edge = np.ones(size, dtype=np.bool_)
        for i in range(int(sp.vocab_size())):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            edge[i] = False
            if sp.is_byte(i):
                plain[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                spaced[i] = True
                piece = piece[1:]
            plain[i] = len(piece.encode("utf-8"))
        self.plain = torch.tensor(plain, device=device)
        self.spaced = torch.tensor(spaced, device=device)
        self.edge = torch.tensor(edge, device=device)

    def count(self, before: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target token, given the token before it."""
        return self.plain[target] + (self.spaced[target] & ~self.edge[before]).to(torch.int32)


class ScoreSheet:
    """Sums of one scoring: nats, tokens and bytes, each token posted once."""

    def __init__(self, table: ByteTable, device: torch.device) -> None:
        self.table = table
        self.nats = torch.zeros((), device=device, dtype=torch.float64)
        self.tokens = torch.zeros((), device=device, dtype=torch.float64)
        self.bytes = torch.zeros((), device=device, dtype=torch.float64)

    def post(self, nll: Tensor, before: Tensor, target: Tensor, keep: Tensor | None = None) -> None:
        width = self.table.count(before, target).to(torch.float64)
        nats = nll.to(torch.float64)
        if keep is not None:
            weight = keep.to(torch.float64)
            nats, width = nats * weight, width * weight
            self.tokens += weight.sum()
        else:
            self.tokens += float(target.numel())
        self.nats += nats.sum()
        self.bytes += width.sum()

    def settle(self, crew: Crew) -> tuple[float, float, int]:
        totals = crew.sum_(torch.stack([self.nats, self.tokens, self.bytes]))
        nats, tokens, width = totals.tolist()
        return nats / tokens, nats / math.log(2.0) / width, int(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# parallel Muon over banks
# ---------------------------------------------------------------------------------------------------------------------


def newton_schulz(G: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Orthogonalises every matrix of a stack [n, rows, cols]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16()
    flip = X.size(-2) > X.size(-1)
    if flip:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if flip else X


class BankMuon:
    """Muon on stacks of matrices. Each rank owns a share of every stack: the gradients are reduce-scattered as soon as the
    backward pass is done, the share is orthogonalised while the next stack is under way, and the updates are gathered."""

    def __init__(self, banks: list[nn.Parameter], lr: float, momentum: float, ns_steps: int, wd: float, crew: Crew) -> None:
        self.crew = crew
        self.lr, self.momentum, self.ns_steps, self.wd = lr, momentum, ns_steps, wd
        self.scale = 1.0
        self.slots = []
        for p in sorted(banks, key=lambda q: -q.numel()):
            n = p.size(0)
            share = -(-n // crew.world)
            tail = p.shape[1:]
            slot = {
                "p": p,
                "n": n,
                "share": share,
                "grad": torch.zeros(share * crew.world, *tail, device=p.device, dtype=torch.bfloat16),
                "mine": torch.zeros(share, *tail, device=p.device, dtype=torch.bfloat16),
                "full": torch.zeros(share * crew.world, *tail, device=p.device, dtype=torch.bfloat16),
                "velocity": torch.zeros(share, *tail, device=p.device, dtype=torch.float32),
                "aspect": max(1.0, p.size(-2) / p.size(-1)) ** 0.5,
            }
            self.slots.append(slot)
        self.pending: list = []

    def launch(self) -> None:
        """Starts the reduce-scatters, largest bank first."""
        self.pending = []
        for slot in self.slots:
            slot["grad"][: slot["n"]].copy_(slot["p"].grad)
            if self.crew.active:
                work = dist.reduce_scatter_tensor(slot["mine"], slot["grad"], op=dist.ReduceOp.AVG, async_op=True)
            else:
                slot["mine"].copy_(slot["grad"])
                work = None
            self.pending.append(work)

    @torch.no_grad()
    def step(self) -> None:
        gathers = []
        for slot, work in zip(self.slots, self.pending):
            if work is not None:
                work.wait()
            g = slot["mine"].float()
            v = slot["velocity"]
            v.mul_(self.momentum).add_(g)
            update = newton_schulz(g.add(v, alpha=self.momentum), self.ns_steps)
            if self.crew.active:
                gathers.append(dist.all_gather_into_tensor(slot["full"], update.contiguous(), async_op=True))
            else:
                slot["full"].copy_(update)
                gathers.append(None)
        lr = self.lr * self.scale
        for slot, work in zip(self.slots, gathers):
            if work is not None:
                work.wait()
            p = slot["p"]
            if self.wd > 0:
                p.mul_(1.0 - lr * self.wd)
            p.add_(slot["full"][: slot["n"]].to(p.dtype), alpha=-lr * slot["aspect"])
            p.grad = None

    def reset(self) -> None:
        for slot in self.slots:
            slot["velocity"].zero_()


class Optimisers:
    """Muon for the banks, AdamW for what is no matrix of a layer."""

    def __init__(self, model: "BankedGPT", s: Settings, crew: Crew) -> None:
        self.s, self.crew = s, crew
        banks = model.banks()
        bank_ids = {id(p) for p in banks}
        tables = [model.tok.weight, model.bigram.table.weight, model.ve.table.weight]
        table_ids = {id(p) for p in tables}
        rest = [p for p in model.parameters() if id(p) not in bank_ids and id(p) not in table_ids]
        self.replicated = tables + rest
        self.muon = BankMuon(banks, s.matrix_lr, s.muon_momentum, s.muon_ns_steps, s.muon_wd, crew)
        self.adam_tables = torch.optim.AdamW(
            [{"params": tables, "lr": s.embed_lr, "base": s.embed_lr}],
            betas=(s.beta1, s.beta2), eps=1e-8, weight_decay=s.adam_wd, fused=True,
        )
        self.adam_rest = torch.optim.AdamW(
            [{"params": rest, "lr": s.scalar_lr, "base": s.scalar_lr}],
            betas=(s.beta1, s.beta2), eps=1e-8, weight_decay=s.adam_wd, fused=True,
        )

    def schedule(self, step: int, scale: float) -> None:
        s = self.s
        frac = min(step / max(s.muon_momentum_steps, 1), 1.0)
        self.muon.momentum = (1.0 - frac) * s.muon_momentum_start + frac * s.muon_momentum
        self.muon.scale = scale
        for opt in (self.adam_tables, self.adam_rest):
            for group in opt.param_groups:
                group["lr"] = group["base"] * scale

    def step(self) -> None:
        self.muon.launch()
        for p in self.replicated:
            if p.grad is not None:
                self.crew.mean_(p.grad)
        if self.s.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.replicated, self.s.grad_clip)
        self.adam_tables.step()
        self.adam_rest.step()
        self.muon.step()
        for p in self.replicated:
            p.grad = None

    def state(self) -> list:
        return [copy.deepcopy(self.adam_tables.state_dict()), copy.deepcopy(self.adam_rest.state_dict())]

    def restore(self, saved: list) -> None:
        self.adam_tables.load_state_dict(saved[0])
        self.adam_rest.load_state_dict(saved[1])
        self.muon.reset()


# ---------------------------------------------------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def fake_int6(w: Tensor) -> Tensor:
    """Rounds a matrix to the grid of 63 levels per row; the gradient passes straight through."""
    with torch.no_grad():
        full = w.float()
        step = (full.abs().amax(dim=-1, keepdim=True) / 31.0).clamp_min(1e-8)
        snapped = (torch.clamp(torch.round(full / step), -31, 31) * step).to(w.dtype)
    return w + (snapped - w).detach()


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv", inv, persistent=False)

    def forward(self, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(n, device=self.inv.device, dtype=torch.float32)
        f = torch.outer(t, self.inv)
        return f.cos()[None, :, None, :].to(dtype), f.sin()[None, :, None, :].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    head, rest = x[..., :dims], x[..., dims:]
    a, b = head.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, [batch, time, heads, dim]."""
    if _fa3 is not None and q.dtype == torch.bfloat16:
        out = _fa3(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.size(2) != k.size(2)
    )
    return y.transpose(1, 2)


class BigramHash(nn.Module):
    """An embedding of the pair (token before, token), hashed into a few thousand rows."""

    def __init__(self, buckets: int, dim: int, model_dim: int, bos: int) -> None:
        super().__init__()
        self.buckets, self.bos = buckets, bos
        self.table = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.table.weight)
        self.up = nn.Linear(dim, model_dim, bias=False)
        nn.init.zeros_(self.up.weight)
        self.gain = nn.Parameter(torch.tensor(0.05))

    def slots(self, ids: Tensor) -> Tensor:
        t = ids.to(torch.int32)
        mixed = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % (self.buckets - 1)
        first = torch.full_like(t[:, :1], self.buckets - 1)
        out = torch.cat([first, mixed], dim=1)
        return out.masked_fill(t == self.bos, self.buckets - 1).long()

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.table(self.slots(ids))) * self.gain


class SmearGate(nn.Module):
    """Lets a little of the token before flow into each embedding; never across the start of a document."""

    def __init__(self, dim: int, bos: int) -> None:
        super().__init__()
        self.bos = bos
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate.to(x.dtype))
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos).to(x.dtype)[..., None]
        return x + g * (before - x) * inside


class ValueEmbedding(nn.Module):
    """Token identity fed again into the values of the last layers: one table, a scale for each layer."""

    def __init__(self, vocab: int, dim: int, kv_dim: int, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        self.table = nn.Embedding(vocab, dim)
        nn.init.normal_(self.table.weight, std=0.01)
        self.up = nn.Linear(dim, kv_dim, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scales = nn.Parameter(torch.full((max(len(layers), 1),), 0.1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.table(ids))


class Layer(nn.Module):
    """The scalars of one layer; its matrices lie in the model's banks."""

    def __init__(self, s: Settings, index: int) -> None:
        super().__init__()
        d = s.model_dim
        self.index = index
        self.heads, self.kv_heads, self.hd = s.num_heads, s.num_kv_heads, s.head_dim()
        self.rope_dims = s.rope_dims
        self.xsa = index >= s.num_layers - s.xsa_last
        self.depth_scale = 1.0 / math.sqrt(index + 1)
        self.q_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain))
        self.attn_scale = nn.Parameter(torch.ones(d))
        self.mlp_scale = nn.Parameter(torch.ones(d))
        self.mix = nn.Parameter(torch.stack([torch.ones(d), torch.zeros(d)]))

    def strip_self(self, y: Tensor, v: Tensor) -> Tensor:
        """Exclusive self-attention: takes out of each head's output what lies along its own value."""
        b, t, h, d = y.shape
        groups = h // v.size(2)
        grouped = y.reshape(b, t, v.size(2), groups, d)
        unit = F.normalize(v, dim=-1).unsqueeze(-2)
        return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).reshape(b, t, h, d)

    def forward(self, x, x0, wq, wk, wv, wo, wup, wdown, ve, rope, lora=None, tap=None):
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        h = rms(x) * self.depth_scale
        if tap is not None:
            tap(f"attn_in.{self.index}", h)
        b, t, _ = h.shape
        q, k, v = F.linear(h, wq), F.linear(h, wk), F.linear(h, wv)
        if lora is not None:
            q = q + lora.q[self.index](h)
            v = v + lora.v[self.index](h)
        if ve is not None:
            v = v + ve
        q = rms(q.view(b, t, self.heads, self.hd))
        k = rms(k.view(b, t, self.kv_heads, self.hd))
        v = v.view(b, t, self.kv_heads, self.hd)
        cos, sin = rope
        q = rotate(q, cos, sin, self.rope_dims) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = rotate(k, cos, sin, self.rope_dims)
        y = attend(q, k, v)
        if self.xsa:
            y = self.strip_self(y, v)
        y = y.reshape(b, t, -1)
        if tap is not None:
            tap(f"attn_out.{self.index}", y)
        x = x + self.attn_scale.to(x.dtype) * F.linear(y, wo)
        h = rms(x) * self.depth_scale
        if tap is not None:
            tap(f"mlp_in.{self.index}", h)
        u = F.leaky_relu(F.linear(h, wup), 0.5).square()
        if tap is not None:
            tap(f"mlp_mid.{self.index}", u)
        return x + self.mlp_scale.to(x.dtype) * F.linear(u, wdown)


class BankedGPT(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.s = s
        n, d, kv, hid = s.num_layers, s.model_dim, s.kv_dim(), s.hidden()
        self.softcap = s.logit_softcap
        self.tok = nn.Embedding(s.vocab_size, d)
        nn.init.normal_(self.tok.weight, std=s.embed_std)
        self.bigram = BigramHash(s.bigram_buckets, s.bigram_dim, d, s.bos_id)
        self.smear = SmearGate(d, s.bos_id)
        self.ve = ValueEmbedding(s.vocab_size, s.ve_dim, kv, s.ve_at())
        self.rotary = Rotary(s.rope_dims, s.rope_base)
        # banks: rows 0..n-1 hold Q (K, ...), rows n..2n-1 hold O (V)
        self.qo_bank = nn.Parameter(torch.empty(2 * n, d, d))
        self.kv_bank = nn.Parameter(torch.empty(2 * n, kv, d))
        self.up_bank = nn.Parameter(torch.empty(n, hid, d))
        self.down_bank = nn.Parameter(torch.empty(n, d, hid))
        self.layers = nn.ModuleList(Layer(s, i) for i in range(n))
        self.enc = n // 2
        self.skips = nn.Parameter(torch.ones(min(self.enc, n - self.enc), d))
        self.qat = False
        self._init_banks()

    def _init_banks(self) -> None:
        n = self.s.num_layers
        for i in range(n):
            nn.init.orthogonal_(self.qo_bank.data[i])
            nn.init.zeros_(self.qo_bank.data[n + i])
            nn.init.orthogonal_(self.kv_bank.data[i])
            nn.init.orthogonal_(self.kv_bank.data[n + i])
            nn.init.orthogonal_(self.up_bank.data[i])
            nn.init.zeros_(self.down_bank.data[i])

    def banks(self) -> list[nn.Parameter]:
        return [self.qo_bank, self.kv_bank, self.up_bank, self.down_bank]

    def matrices(self, i: int, dtype: torch.dtype) -> list[Tensor]:
        n = self.s.num_layers
        picked = [
            self.qo_bank[i], self.kv_bank[i], self.kv_bank[n + i], self.qo_bank[n + i], self.up_bank[i], self.down_bank[i],
        ]
        if self.qat and self.training:
            picked = [fake_int6(w) for w in picked]
        return [w.to(dtype) for w in picked]

    def hidden_states(self, ids: Tensor, lora=None, tap=None) -> Tensor:
        x = F.embedding(ids, self.tok.weight) + self.bigram(ids)
        x = rms(x).to(torch.bfloat16)
        x = self.smear(x, ids)
        x0 = x
        rope = self.rotary(ids.size(1), x.dtype)
        ve_all = self.ve(ids).to(x.dtype) if self.ve.layers else None
        saved: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if i >= self.enc and saved:
                x = x + self.skips[i - self.enc].to(x.dtype) * saved.pop()
            ve = None
            if ve_all is not None and i in self.ve.layers:
                ve = ve_all * self.ve.scales[self.ve.layers.index(i)].to(x.dtype)
            x = layer(x, x0, *self.matrices(i, x.dtype), ve, rope, lora, tap)
            if i < self.enc:
                saved.append(x)
        return rms(x)

    def logits(self, ids: Tensor, lora=None) -> Tensor:
        h = self.hidden_states(ids, lora)
        z = F.linear(h, self.tok.weight.to(h.dtype))
        if lora is not None:
            z = z + lora.head(h)
        return self.softcap * torch.tanh(z.float() / self.softcap)

    def forward(self, ids: Tensor, target: Tensor, lora=None) -> Tensor:
        """Mean loss while training, else the loss of every token, in the shape of target."""
        z = self.logits(ids, lora)
        if self.training:
            return F.cross_entropy(z.reshape(-1, z.size(-1)), target.reshape(-1))
        return F.cross_entropy(z.reshape(-1, z.size(-1)), target.reshape(-1), reduction="none").view_as(target)


# ---------------------------------------------------------------------------------------------------------------------
# averaging
# ---------------------------------------------------------------------------------------------------------------------


class Averages:
    """EMA of all weights after every step; a plain mean of late snapshots (SWA) beside it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = list(model.state_dict())
        self.ema = {k: v.detach().float().clone() for k, v in model.state_dict().items()}
        self.swa: dict[str, Tensor] | None = None
        self.swa_count = 0

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.ema[k].lerp_(v.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def snapshot(self, model: nn.Module) -> None:
        now = {k: v.detach().float() for k, v in model.state_dict().items()}
        if self.swa is None:
            self.swa = {k: v.clone() for k, v in now.items()}
        else:
            for k, v in now.items():
                self.swa[k].add_(v)
        self.swa_count += 1

    def weights(self, kind: str) -> dict[str, Tensor]:
        if kind == "swa" and self.swa is not None:
            return {k: v / self.swa_count for k, v in self.swa.items()}
        return self.ema


def install(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = model.state_dict()
    with torch.no_grad():
        for k, v in own.items():
            v.copy_(weights[k].to(v.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ int6, packing
# ---------------------------------------------------------------------------------------------------------------------

# bank name -> (tap of the first half of its rows, tap of the second half)
BANK_TAPS = {
    "qo_bank": ("attn_in", "attn_out"),
    "kv_bank": ("attn_in", "attn_in"),
    "up_bank": ("mlp_in", None),
    "down_bank": ("mlp_mid", None),
}


class HessianTap:
    """Sums x x^T of the inputs of every matrix while calibration batches pass through the model."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    def __call__(self, name: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.size(-1)).float()
        if name not in self.sums:
            self.sums[name] = torch.zeros(flat.size(1), flat.size(1), device=x.device)
        self.sums[name].addmm_(flat.T, flat)

    def reduce(self, crew: Crew) -> dict[str, Tensor]:
        for name in sorted(self.sums):
            crew.sum_(self.sums[name])
        return self.sums


@torch.no_grad()
def dream(model: BankedGPT, s: Settings, crew: Crew, rows: int, length: int = 512, heat: float = 0.8) -> Tensor:
    """Text that the model writes itself, from BOS on."""
    g = torch.Generator(device=crew.device)
    g.manual_seed(s.seed + 1000 + crew.rank)
    ids = torch.full((rows, 1), s.bos_id, device=crew.device, dtype=torch.int64)
    for _ in range(length - 1):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = model.logits(ids)[:, -1]
        p = torch.softmax(z.float() / heat, dim=-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=g)], dim=1)
    return ids


@torch.no_grad()
def collect_hessians(model: BankedGPT, feed: TrainFeed, s: Settings, crew: Crew) -> dict[str, Tensor]:
    """Input statistics for GPTQ, from training text or from the model's own."""
    tap = HessianTap()
    model.eval()
    for _ in range(s.calib_batches // crew.world):
        if s.calib_source == "self":
            x = dream(model, s, crew, s.calib_rows)
        else:
            x, _ = feed.batch(s.calib_rows * s.train_seq_len * crew.world, s.train_seq_len)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model.hidden_states(x, tap=tap)
    return tap.reduce(crew)


def row_scales(w: Tensor, top: int) -> Tensor:
    """Per row, the clipping that loses least, out of five."""
    best, best_err = None, None
    for q in (1.0, 0.9999, 0.9995, 0.999, 0.998):
        edge = torch.quantile(w.abs(), q, dim=1) if q < 1.0 else w.abs().amax(dim=1)
        sc = (edge / top).clamp_min(1e-8)
        err = (torch.clamp(torch.round(w / sc[:, None]), -top, top) * sc[:, None] - w).square().sum(1)
        if best is None:
            best, best_err = sc, err
        else:
            better = err < best_err
            best, best_err = torch.where(better, sc, best), torch.where(better, err, best_err)
    return best


def gptq(w: Tensor, hessian: Tensor, block: int, damp: float, top: int = 31) -> tuple[Tensor, Tensor]:
    """Rounds a matrix column by column, each column's error carried to those that follow."""
    W, H = w.float().clone(), hessian.float().clone()
    cols = W.size(1)
    dead = H.diagonal() == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    H.diagonal().add_(damp * H.diagonal().mean())
    order = torch.argsort(H.diagonal(), descending=True)
    back = torch.argsort(order)
    W, H = W[:, order], H[order][:, order]
    scale = row_scales(W, top)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.zeros_like(W)
    for i0 in range(0, cols, block):
        i1 = min(i0 + block, cols)
        part, err = W[:, i0:i1].clone(), torch.zeros(W.size(0), i1 - i0, device=W.device)
        for j in range(i1 - i0):
            d = U[i0 + j, i0 + j]
            q = torch.clamp(torch.round(part[:, j] / scale), -top, top)
            Q[:, i0 + j] = q
            e = (part[:, j] - q * scale) / d
            part[:, j:] -= e[:, None] * U[i0 + j, i0 + j : i1][None, :]
            err[:, j] = e
        W[:, i1:] -= err @ U[i0:i1, i1:]
    return Q[:, back].to(torch.int8), scale.to(torch.float16)


def quantise(model: BankedGPT, hessians: dict[str, Tensor], s: Settings) -> dict[str, Tensor]:
    """The model as small integers: banks in int6 by GPTQ, tables in int8, the rest in half precision."""
    packed: dict[str, Tensor] = {}
    n = s.num_layers
    for name, value in model.state_dict().items():
        value = value.detach()
        if name in BANK_TAPS:
            qs, scs = [], []
            for row in range(value.size(0)):
                half, layer = divmod(row, n)
                q, sc = gptq(value[row], hessians[f"{BANK_TAPS[name][half]}.{layer}"], s.gptq_block, s.gptq_damp)
                qs.append(q.cpu())
                scs.append(sc.cpu())
            packed[name + "|q"], packed[name + "|s"] = torch.stack(qs), torch.stack(scs)
        elif value.ndim == 2 and value.numel() > 65536:
            sc = row_scales(value.float(), 127)
            q = torch.clamp(torch.round(value.float() / sc[:, None]), -127, 127)
            packed[name + "|q"], packed[name + "|s"] = q.to(torch.int8).cpu(), sc.to(torch.float16).cpu()
        else:
            packed[name] = value.to(torch.float16).cpu()
    return packed


def dequantise(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, value in packed.items():
        if name.endswith("|s"):
            continue
        if name.endswith("|q"):
            stem = name[:-2]
            weights[stem] = value.float() * packed[stem + "|s"].float().unsqueeze(-1)
        else:
            weights[name] = value.float()
    return weights


def pack(packed: dict[str, Tensor], s: Settings) -> bytes:
    sink = io.BytesIO()
    torch.save(packed, sink)
    return lzma.compress(sink.getvalue(), preset=s.lzma_preset | lzma.PRESET_EXTREME)


def unpack(blob: bytes) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)


def report_sizes(blob: bytes, s: Settings, say: Journal) -> int:
    code_bytes = len(Path(__file__).read_bytes())
    total = len(blob) + code_bytes
    say(f"Serialized model int6+lzma: {len(blob)} bytes")
    say(f"Code size: {code_bytes} bytes")
    say(f"Total submission size: {total} bytes (limit {s.size_limit})")
    if total > s.size_limit:
        raise RuntimeError(f"over size: {total} > {s.size_limit}")
    return total


# ---------------------------------------------------------------------------------------------------------------------
# plain evaluation (periodic, round trip) and the sliding window: logged
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_blocks(net, stream: Tensor, table: ByteTable, s: Settings, crew: Crew) -> tuple[float, float, int]:
    """Blocks of eval_seq_len side by side; the tail that fills no block is scored as a shorter one."""
    L = s.eval_seq_len
    total = stream.numel() - 1
    starts = list(range(0, total, L))[crew.rank :: crew.world]
    sheet = ScoreSheet(table, crew.device)
    for i in range(0, len(starts), s.val_batch_rows):
        rows = starts[i : i + s.val_batch_rows]
        x = torch.full((len(rows), L), s.bos_id, dtype=torch.int64)
        y = torch.full((len(rows), L), s.bos_id, dtype=torch.int64)
        keep = torch.zeros(len(rows), L, dtype=torch.bool)
        for b, a in enumerate(rows):
            n = min(L, total - a)
            span = stream[a : a + n + 1].to(torch.int64)
            x[b, :n], y[b, :n], keep[b, :n] = span[:-1], span[1:], True
        x, y, keep = (t.to(crew.device, non_blocking=True) for t in (x, y, keep))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            nll = net(x, y)
        sheet.post(nll, x, y, keep)
    return sheet.settle(crew)


@torch.no_grad()
def score_sliding(net, stream: Tensor, table: ByteTable, s: Settings, crew: Crew) -> tuple[float, float, int]:
    """Windows of eval_seq_len that step by slide_stride; each scores only what no window before it has scored."""
    L, stride = s.eval_seq_len, s.slide_stride
    total = stream.numel() - 1
    ends = list(range(min(L, total), total, stride)) + [total]
    plan = []
    scored = 0
    for e in ends:
        plan.append((max(0, e - L), scored, e))
        scored = e
    sheet = ScoreSheet(table, crew.device)
    mine = plan[crew.rank :: crew.world]
    for i in range(0, len(mine), s.val_batch_rows):
        rows = mine[i : i + s.val_batch_rows]
        x = torch.full((len(rows), L), s.bos_id, dtype=torch.int64)
        y = torch.full((len(rows), L), s.bos_id, dtype=torch.int64)
        keep = torch.zeros(len(rows), L, dtype=torch.bool)
        for b, (lo, fresh, hi) in enumerate(rows):
            span = stream[lo : hi + 1].to(torch.int64)
            x[b, : hi - lo], y[b, : hi - lo] = span[:-1], span[1:]
            keep[b, fresh - lo : hi - lo] = True
        x, y, keep = (t.to(crew.device, non_blocking=True) for t in (x, y, keep))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            nll = net(x, y)
        sheet.post(nll, x, y, keep)
    return sheet.settle(crew)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation by documents: LoRA adapters, one set for each document of a batch
# ---------------------------------------------------------------------------------------------------------------------


class RowLora(nn.Module):
    """A low-rank delta for every row of a batch: row b sees x[b] @ down[b].T @ up[b].T only."""

    def __init__(self, rows: int, rank: int, d_in: int, d_out: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rows, rank, d_in, device=device))
        self.up = nn.Parameter(torch.empty(rows, d_out, rank, device=device))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        bound = 1.0 / math.sqrt(self.down.size(-1))
        self.down.uniform_(-bound, bound)
        self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        low = torch.bmm(x, self.down.to(x.dtype).mT)
        return torch.bmm(low, self.up.to(x.dtype).mT)


class AdapterSet(nn.Module):
    """Rank-8 deltas on Q and V of every layer and on the head."""

    def __init__(self, s: Settings, rows: int, device: torch.device) -> None:
        super().__init__()
        d, kv, r = s.model_dim, s.kv_dim(), s.lora_rank
        self.q = nn.ModuleList(RowLora(rows, r, d, d, device) for _ in range(s.num_layers))
        self.v = nn.ModuleList(RowLora(rows, r, d, kv, device) for _ in range(s.num_layers))
        self.head = RowLora(rows, r, d, s.vocab_size, device)

    def reset(self) -> None:
        for m in self.modules():
            if isinstance(m, RowLora):
                m.reset()


def adapter_optimiser(adapters: AdapterSet, s: Settings) -> torch.optim.Optimizer:
    b1, b2 = (float(v) for v in s.lora_betas.split(","))
    return torch.optim.Adam(adapters.parameters(), lr=s.lora_lr, betas=(b1, b2), eps=1e-10, fused=True)


def forget(opt: torch.optim.Optimizer) -> None:
    """Empties the moments in place, so that the next document starts from nothing."""
    for state in opt.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()


@dataclass(frozen=True)
class Doc:
    """A document of the stream: where its BOS lies, and how many tokens it predicts (its own and the BOS that ends it)."""

    start: int
    preds: int

    def chunks(self, size: int) -> int:
        return -(-self.preds // size)


def index_documents(stream: Tensor, bos: int) -> list[Doc]:
    at = (stream.to(torch.int32) == bos).nonzero().flatten().tolist()
    if not at or at[0] != 0:
        at.insert(0, 0)
    ends = at[1:] + [stream.numel() - 1]
    docs = [Doc(a, b - a) for a, b in zip(at, ends) if b > a]
    if sum(d.preds for d in docs) != stream.numel() - 1:
        raise RuntimeError("the documents do not cover the stream")
    return docs


def batch_documents(docs: list[Doc], rows: int) -> list[list[Doc]]:
    """Documents of like length side by side, the longest first so that no rank ends late."""
    ordered = sorted(docs, key=lambda d: (-d.preds, d.start))
    return [ordered[i : i + rows] for i in range(0, len(ordered), rows)]


@dataclass
class ChunkBatch:
    """Chunk c of every document of a batch, each with as much of the document before it as the context holds."""

    x: Tensor
    y: Tensor
    fresh: Tensor  # tokens of the chunk itself: scored once
    goes_on: Tensor  # rows whose document has a further chunk


def cut_chunk(stream: Tensor, group: list[Doc], c: int, s: Settings, device: torch.device) -> ChunkBatch:
    size, context = s.lora_chunk, s.lora_context
    T = min((c + 1) * size, context)
    x = torch.full((s.lora_docs, T), s.bos_id, dtype=torch.int64)
    y = torch.full((s.lora_docs, T), s.bos_id, dtype=torch.int64)
    fresh = torch.zeros(s.lora_docs, T, dtype=torch.bool)
    goes_on = torch.zeros(s.lora_docs, dtype=torch.bool)
    for b, doc in enumerate(group):
        if c >= doc.chunks(size):
            continue
        hi = min((c + 1) * size, doc.preds)
        lo = max(0, hi - T)
        span = stream[doc.start + lo : doc.start + hi + 1].to(torch.int64)
        n = hi - lo
        x[b, :n], y[b, :n] = span[:-1], span[1:]
        fresh[b, c * size - lo : n] = True
        goes_on[b] = c + 1 < doc.chunks(size)
    moved = (t.to(device, non_blocking=True) for t in (x, y, fresh, goes_on))
    return ChunkBatch(*moved)


def doc_loss(nll: Tensor, cb: ChunkBatch) -> Tensor:
    """Mean loss of each row's chunk, summed over the rows that go on; rows share no parameter."""
    weight = (cb.fresh & cb.goes_on[:, None]).to(nll.dtype)
    return ((nll * weight).sum(1) / weight.sum(1).clamp_min(1.0)).sum()


def score_documents(net, stream: Tensor, table: ByteTable, s: Settings, crew: Crew, say: Journal) -> tuple[float, float]:
    """Score first, then learn: a chunk's losses are posted as the adapters stood before they saw it."""
    docs = index_documents(stream, s.bos_id)
    batches = batch_documents(docs, s.lora_docs)
    adapters = AdapterSet(s, s.lora_docs, crew.device)
    opt = adapter_optimiser(adapters, s)
    sheet = ScoreSheet(table, crew.device)
    began = time.perf_counter()
    mine = batches[crew.rank :: crew.world]
    for number, group in enumerate(mine):
        adapters.reset()
        forget(opt)
        for c in range(group[0].chunks(s.lora_chunk)):
            cb = cut_chunk(stream, group, c, s, crew.device)
            learn = bool(cb.goes_on.any())
            with nullcontext() if learn else torch.no_grad():
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    nll = net(cb.x, cb.y, adapters)
            sheet.post(nll.detach(), cb.x, cb.y, cb.fresh)
            if learn:
                opt.zero_grad(set_to_none=True)
                doc_loss(nll, cb).backward()
                opt.step()
        if number % 20 == 0:
            say(f"doc_lora: batch {number}/{len(mine)} t:{time.perf_counter() - began:.1f}s", console=False)
    loss, bpb, tokens = sheet.settle(crew)
    if tokens != stream.numel() - 1:
        raise RuntimeError(f"scored {tokens} tokens of {stream.numel() - 1}")
    return loss, bpb


def warm_documents(net, s: Settings, crew: Crew) -> None:
    """Compiles the shapes of the document evaluation on noise, with adapters that are thrown away."""
    adapters = AdapterSet(s, s.lora_docs, crew.device)
    for T in range(s.lora_chunk, s.lora_context + 1, s.lora_chunk):
        ids = torch.randint(2, s.vocab_size, (s.lora_docs, T + 1), device=crew.device)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            net(ids[:, :-1], ids[:, 1:], adapters).mean().backward()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            net(ids[:, :-1], ids[:, 1:], adapters)
    del adapters
    torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """The training run: one clock from the first step to the last integer of GPTQ."""

    def __init__(self, s: Settings, crew: Crew, say: Journal) -> None:
        self.s, self.crew, self.say = s, crew, say
        self.feed = TrainFeed(s.train_glob(), crew)
        self.model = BankedGPT(s).to(crew.device)
        self.cast()
        self.net = torch.compile(self.model, dynamic=False, fullgraph=True)
        self.opts = Optimisers(self.model, s, crew)
        self.clock = Clock()
        self.averages = Averages(self.model, s.ema_decay)
        self.step = 0

    def cast(self) -> None:
        """Tables and small matrices in bfloat16 where it costs nothing; banks and scalars stay in float32."""
        for module in (self.model.bigram.up, self.model.ve.up):
            module.float()

    @property
    def train_ms_cap(self) -> float:
        return 1000.0 * (self.s.max_wallclock_seconds - self.s.gptq_reserve_seconds)

    def lr_scale(self, elapsed_ms: float) -> float:
        """1 until the warm-down, then linear to 0 at the cap; the warm-down is measured in time."""
        s = self.s
        if s.warmdown_iters <= 0:
            return 1.0
        if s.max_wallclock_seconds <= 0:
            start = max(s.iterations - s.warmdown_iters, 0)
            return max((s.iterations - self.step) / s.warmdown_iters, 0.0) if self.step >= start else 1.0
        per_step = elapsed_ms / max(self.step, 1)
        warmdown_ms = s.warmdown_iters * per_step
        left_ms = max(self.train_ms_cap - elapsed_ms, 0.0)
        return left_ms / max(warmdown_ms, 1e-9) if left_ms <= warmdown_ms else 1.0

    def one_step(self, scale: float) -> Tensor:
        s = self.s
        self.opts.schedule(self.step, scale)
        micro = 8 // self.crew.world if 8 % self.crew.world == 0 else 1
        total = torch.zeros((), device=self.crew.device)
        for _ in range(micro):
            x, y = self.feed.batch(s.batch_tokens // micro, s.train_seq_len)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.net(x, y)
            (loss / micro).backward()
            total += loss.detach() / micro
        self.opts.step()
        return total

    def compile_warmup(self) -> None:
        """A few steps so that everything is compiled, after which weights, moments and data start anew."""
        if self.s.compile_warmup_steps <= 0:
            return
        saved = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        moments = self.opts.state()
        self.model.train()
        for i in range(self.s.compile_warmup_steps):
            self.model.qat = i >= self.s.compile_warmup_steps - 2
            self.one_step(1.0)
        self.model.qat = False
        install(self.model, saved)
        self.opts.restore(moments)
        self.feed.rewind()
        self.say(f"compile warm-up: {self.s.compile_warmup_steps} steps, state restored")

    def peek(self, stream: Tensor, table: ByteTable) -> None:
        """Validation while training: logged, and off the clock."""
        self.clock.halt()
        self.model.eval()
        loss, bpb, _ = score_blocks(self.net, stream, table, self.s, self.crew)
        self.say(f"step:{self.step}/{self.s.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{self.clock.ms():.0f}ms")
        self.model.train()
        self.clock.go()

    def run(self, stream: Tensor, table: ByteTable) -> None:
        s, say = self.s, self.say
        self.model.train()
        self.clock.go()
        stop_at: int | None = None
        while True:
            last = self.step == s.iterations or (stop_at is not None and self.step >= stop_at)
            if last or (s.val_every > 0 and self.step % s.val_every == 0):
                self.peek(stream, table)
            if last:
                break
            scale = self.lr_scale(self.clock.ms())
            if not self.model.qat and scale < s.late_qat_scale:
                self.model.qat = True
                say(f"late_qat: on at step {self.step} scale {scale:.4f}")
            loss = self.one_step(scale)
            self.step += 1
            self.averages.follow(self.model)
            if scale < s.swa_from and self.step % s.swa_every == 0:
                self.averages.snapshot(self.model)
            if self.step <= 10 or self.step % s.log_every == 0:
                say(f"step:{self.step}/{s.iterations} train_loss:{loss.item():.4f} train_time:{self.clock.ms():.0f}ms")
            if s.max_wallclock_seconds > 0 and stop_at is None:
                spent = torch.tensor(self.clock.ms(), device=self.crew.device)
                if self.crew.max_(spent).item() >= self.train_ms_cap:
                    stop_at = self.step
        say(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    def finish(self) -> bytes:
        """Average, calibrate, round and pack; the clock runs until the integers stand."""
        s, say = self.s, self.say
        train_ms = self.clock.ms()
        install(self.model, self.averages.weights(s.average))
        hessians = collect_hessians(self.model, self.feed, s, self.crew)
        packed = quantise(self.model, hessians, s)
        self.clock.halt()
        say(f"train {train_ms:.0f}ms, train+gptq {self.clock.ms():.0f}ms of {1000 * s.max_wallclock_seconds:.0f}ms")
        return pack(packed, s) if self.crew.lead else b""


# ---------------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def reload(s: Settings, crew: Crew) -> BankedGPT:
    """The model as the artifact on disk gives it."""
    fresh = BankedGPT(s).to(crew.device)
    install(fresh, {k: v.to(crew.device) for k, v in dequantise(unpack(Path(s.out_path).read_bytes())).items()})
    fresh.eval()
    for p in fresh.parameters():
        p.requires_grad_(False)
    return fresh


def describe(s: Settings, crew: Crew, say: Journal) -> None:
    say(f"Python {sys.version.split()[0]} PyTorch {torch.__version__} world_size:{crew.world} fa3:{_fa3 is not None}")
    say(" ".join(f"{f.name}={getattr(s, f.name)}" for f in fields(s)), console=False)
    if crew.lead:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
        say(smi, console=False)
    say(Path(__file__).read_text(encoding="utf-8"), console=False)


def main() -> None:
    s = Settings()
    s.run_id = s.run_id or str(uuid.uuid4())
    crew = Crew()
    say = Journal(crew, s.run_id)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    seed_everything(s.seed)
    describe(s, crew, say)

    table = ByteTable(s.tokenizer_path, s.vocab_size, crew.device)
    stream = load_val_stream(s)
    say(f"val tokens: {stream.numel()} train shards: {len(list_shards(s.train_glob()))}")

    trainer = Trainer(s, crew, say)
    say(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    trainer.compile_warmup()
    trainer.run(stream, table)
    blob = trainer.finish()
    if crew.lead:
        Path(s.out_path).write_bytes(blob)
        report_sizes(blob, s, say)
    crew.barrier()
    del trainer
    torch.cuda.empty_cache()

    # ---- evaluation: from here on the artifact and the validation split are all there is
    began = time.perf_counter()
    model = reload(s, crew)
    torch._dynamo.reset()
    net = torch.compile(model, dynamic=False)

    mark = time.perf_counter()
    loss, bpb, _ = score_blocks(net, stream, table, s, crew)
    say(f"final_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * (time.perf_counter() - mark):.0f}ms")

    if s.run_sliding:
        mark = time.perf_counter()
        loss, bpb, _ = score_sliding(net, stream, table, s, crew)
        spent = 1000 * (time.perf_counter() - mark)
        say(f"sliding_window (logged) val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{s.slide_stride} eval_time:{spent:.0f}ms")

    torch._dynamo.reset()
    net = torch.compile(model, dynamic=False)
    warm_documents(net, s, crew)
    mark = time.perf_counter()
    loss, bpb = score_documents(net, stream, table, s, crew, say)
    say(f"final_doc_lora val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * (time.perf_counter() - mark):.0f}ms")
    say(f"final_doc_lora_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    say(f"evaluation took {time.perf_counter() - began:.1f}s in all")
    crew.close()


if __name__ == "__main__":
    main()
