"""
train_gpt.py -- banked 11-layer GPT, asynchronous Muon, KV-window evaluation, score-first test-time training.

Layout of the file
  1  settings, clock, ranks
  2  data: shards, prefetching loader, validation stream, byte tables
  3  fused kernels (Triton where it works, torch elsewhere) and attention
  4  model: banks of weights, one 3D parameter per kind of matrix
  5  optimizer: Muon over banks with asynchronous reduce-scatter / all-gather, Adam for the rest
  6  averaging, GPTQ, packing
  7  evaluation: KV windows, pair table, score-first TTT
  8  main

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
"""
from __future__ import annotations

import copy
import glob
import io
import json
import lzma
import math
import os
import queue
import random
import struct
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

try:
    import brotli
except ImportError:
    brotli = None

try:
    from flash_attn_interface import flash_attn_func as _fa3

    HAS_FA3 = True
except Exception:
    _fa3 = None
    HAS_FA3 = False

try:
    import triton
    import triton.language as tl

    HAS_TRITON = torch.cuda.is_available()
except Exception:
    triton = None
    tl = None
    HAS_TRITON = False


# ---------------------------------------------------------------------------------------------------------------------
# 1  settings, clock, ranks
# ---------------------------------------------------------------------------------------------------------------------


def env(name, default):
    """A setting from the environment, in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


@dataclass
class Settings:
    # data
    data_path: str = field(default_factory=lambda: env("DATA_PATH", "./data/datasets/fineweb10B_sp1024"))
    tokenizer_path: str = field(default_factory=lambda: env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model"))
    run_id: str = field(default_factory=lambda: env("RUN_ID", "vementry"))
    seed: int = field(default_factory=lambda: env("SEED", 1337))
    # shape of the model
    vocab_size: int = field(default_factory=lambda: env("VOCAB_SIZE", 1024))
    num_layers: int = field(default_factory=lambda: env("NUM_LAYERS", 11))
    model_dim: int = field(default_factory=lambda: env("MODEL_DIM", 512))
    num_heads: int = field(default_factory=lambda: env("NUM_HEADS", 8))
    num_kv_heads: int = field(default_factory=lambda: env("NUM_KV_HEADS", 4))
    mlp_hidden: int = field(default_factory=lambda: env("MLP_HIDDEN", 1536))
    rope_base: float = field(default_factory=lambda: env("ROPE_BASE", 10000.0))
    rope_dims: int = field(default_factory=lambda: env("ROPE_DIMS", 32))
    logit_softcap: float = field(default_factory=lambda: env("LOGIT_SOFTCAP", 30.0))
    qk_gain: float = field(default_factory=lambda: env("QK_GAIN", 1.5))
    bos_id: int = field(default_factory=lambda: env("BOS_ID", 1))
    # schedule
    iterations: int = field(default_factory=lambda: env("ITERATIONS", 20000))
    batch_tokens: int = field(default_factory=lambda: env("TRAIN_BATCH_TOKENS", 786432))
    seq_len: int = field(default_factory=lambda: env("TRAIN_SEQ_LEN", 2048))
    warmup_steps: int = field(default_factory=lambda: env("WARMUP_STEPS", 12))
    warmdown_frac: float = field(default_factory=lambda: env("WARMDOWN_FRAC", 0.45))
    train_cap_s: float = field(default_factory=lambda: env("MAX_WALLCLOCK_SECONDS", 600.0))
    reserve_s: float = field(default_factory=lambda: env("RESERVE_SECONDS", 26.0))
    val_every: int = field(default_factory=lambda: env("VAL_EVERY", 2000))
    val_probe_tokens: int = field(default_factory=lambda: env("VAL_PROBE_TOKENS", 2097152))
    log_every: int = field(default_factory=lambda: env("LOG_EVERY", 200))
    # optimizer
    bank_lr: float = field(default_factory=lambda: env("BANK_LR", 0.025))
    embed_lr: float = field(default_factory=lambda: env("EMBED_LR", 0.035))
    scalar_lr: float = field(default_factory=lambda: env("SCALAR_LR", 0.025))
    muon_momentum: float = field(default_factory=lambda: env("MUON_MOMENTUM", 0.99))
    muon_momentum_start: float = field(default_factory=lambda: env("MUON_MOMENTUM_START", 0.92))
    muon_momentum_steps: int = field(default_factory=lambda: env("MUON_MOMENTUM_STEPS", 1500))
    ns_steps: int = field(default_factory=lambda: env("NS_STEPS", 5))
    weight_decay: float = field(default_factory=lambda: env("WEIGHT_DECAY", 0.04))
    beta1: float = field(default_factory=lambda: env("BETA1", 0.9))
    beta2: float = field(default_factory=lambda: env("BETA2", 0.95))
    grad_clip: float = field(default_factory=lambda: env("GRAD_CLIP", 0.3))
    # averaging and packing
    ema_decay: float = field(default_factory=lambda: env("EMA_DECAY", 0.997))
    quant_bits: int = field(default_factory=lambda: env("QUANT_BITS", 6))
    gptq_batches: int = field(default_factory=lambda: env("GPTQ_BATCHES", 48))
    gptq_block: int = field(default_factory=lambda: env("GPTQ_BLOCK", 128))
    gptq_damp: float = field(default_factory=lambda: env("GPTQ_DAMP", 0.01))
    size_limit: int = field(default_factory=lambda: env("SIZE_LIMIT", 16000000))
    # evaluation
    eval_cap_s: float = field(default_factory=lambda: env("EVAL_CAP_SECONDS", 600.0))
    eval_stride: int = field(default_factory=lambda: env("EVAL_STRIDE", 256))
    kv_window: int = field(default_factory=lambda: env("KV_WINDOW", 1792))
    lane_len: int = field(default_factory=lambda: env("LANE_LEN", 2048))
    chunk_tokens: int = field(default_factory=lambda: env("CHUNK_TOKENS", 131072))
    logit_scale: float = field(default_factory=lambda: env("LOGIT_SCALE", 1.0))
    pair_enabled: bool = field(default_factory=lambda: env("PAIR_ENABLED", True))
    pair_lambda: float = field(default_factory=lambda: env("PAIR_LAMBDA", 0.06))
    pair_half: float = field(default_factory=lambda: env("PAIR_HALF", 4000.0))
    pair_alpha: float = field(default_factory=lambda: env("PAIR_ALPHA", 64.0))
    ttt_enabled: bool = field(default_factory=lambda: env("TTT_ENABLED", True))
    ttt_lr: float = field(default_factory=lambda: env("TTT_LR", 0.002))
    ttt_momentum: float = field(default_factory=lambda: env("TTT_MOMENTUM", 0.9))
    ttt_epochs: int = field(default_factory=lambda: env("TTT_EPOCHS", 2))
    ttt_rows: int = field(default_factory=lambda: env("TTT_ROWS", 8))
    ttt_clip: float = field(default_factory=lambda: env("TTT_CLIP", 1.0))

    @property
    def train_glob(self):
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_glob(self):
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    def check(self, world):
        if 8 % world:
            raise ValueError(f"world size {world} must divide 8")
        if self.lane_len % self.eval_stride or self.chunk_tokens % self.lane_len:
            raise ValueError("EVAL_STRIDE must divide LANE_LEN, and LANE_LEN must divide CHUNK_TOKENS")
        if self.kv_window >= self.lane_len:
            raise ValueError("KV_WINDOW must be shorter than LANE_LEN")
        if self.model_dim % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("heads do not divide")


class Clock:
    """Named stopwatches. Every phase of the run is measured by one; a running one can be read, or held for a while."""

    def __init__(self):
        self.total = {}
        self.since = {}

    @staticmethod
    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, name):
        self.total.setdefault(name, 0.0)
        self.since[name] = self.now()

    def stop(self, name):
        self.total[name] += self.now() - self.since.pop(name)
        return self.total[name]

    def seconds(self, name):
        running = self.now() - self.since[name] if name in self.since else 0.0
        return self.total.get(name, 0.0) + running

    @contextmanager
    def phase(self, name):
        self.start(name)
        try:
            yield self
        finally:
            self.stop(name)

    @contextmanager
    def held(self, name):
        """The named clock stands still: for the periodic look at the validation loss, which is no training."""
        self.stop(name)
        try:
            yield
        finally:
            self.start(name)

    def report(self):
        return " ".join(f"{name}={seconds:.1f}s" for name, seconds in self.total.items())


class Ranks:
    """The process group, or a stand-in for one process."""

    def __init__(self):
        self.on = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.on:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()
        self.log_file = None

    @property
    def master(self):
        return self.rank == 0

    def open_log(self, run_id):
        if self.master:
            os.makedirs("logs", exist_ok=True)
            self.log_file = open(f"logs/{run_id}.txt", "w", encoding="utf-8")

    def say(self, text):
        if self.master:
            print(text, flush=True)
            if self.log_file is not None:
                print(text, file=self.log_file, flush=True)

    def sum(self, tensor):
        if self.on:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def any(self, flag):
        """True on every rank where it is true on one: decisions by the clock must agree."""
        if not self.on:
            return bool(flag)
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def barrier(self):
        if self.on:
            dist.barrier()

    def close(self):
        if self.log_file is not None:
            self.log_file.close()
        if self.on:
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# 2  data
# ---------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_HEADER_INTS = 256


def shard_length(path):
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"not a token shard: {path}")
    return int(header[2])


def read_shard(path):
    """All tokens of a shard as uint16 in memory."""
    count = shard_length(path)
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"short read: {path}")
    return tokens


def shard_files(pattern):
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return files


class Prefetcher:
    """Reads shards in one thread and cuts pinned batches in another, so that the device never waits for the disk.

    Every rank reads the same shards in the same order and takes its own rows of each step's block of tokens.
    """

    def __init__(self, pattern, ranks, rows, seq_len, seed, depth=6):
        self.files = shard_files(pattern)
        self.ranks = ranks
        self.rows = rows
        self.seq_len = seq_len
        self.order = random.Random(seed)
        self.stop_flag = threading.Event()
        self.shards = queue.Queue(maxsize=2)
        self.batches = queue.Queue(maxsize=depth)
        self.threads = [
            threading.Thread(target=self._read_shards, daemon=True, name="shards"),
            threading.Thread(target=self._cut_batches, daemon=True, name="batches"),
        ]
        for thread in self.threads:
            thread.start()

    def _put(self, q, item):
        while not self.stop_flag.is_set():
            try:
                q.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _get(self, q):
        while not self.stop_flag.is_set():
            try:
                return q.get(timeout=0.2)
            except queue.Empty:
                continue
        return None

    def _read_shards(self):
        while not self.stop_flag.is_set():
            names = list(self.files)
            self.order.shuffle(names)
            for name in names:
                if not self._put(self.shards, read_shard(name)):
                    return

    def _cut_batches(self):
        torch.cuda.set_device(self.ranks.device)
        span = self.rows * self.seq_len
        block = span * self.ranks.world
        left = np.empty(0, dtype=np.uint16)
        while not self.stop_flag.is_set():
            while left.size < block + 1:
                shard = self._get(self.shards)
                if shard is None:
                    return
                left = np.concatenate([left, shard])
            pos = 0
            while pos + block + 1 <= left.size:
                at = pos + self.ranks.rank * span
                piece = torch.from_numpy(left[at : at + span + 1].astype(np.int64)).pin_memory()
                if not self._put(self.batches, piece):
                    return
                pos += block
            left = left[pos:]

    def next(self):
        piece = self.batches.get()
        piece = piece.to(self.ranks.device, non_blocking=True)
        x = piece[:-1].view(self.rows, self.seq_len)
        y = piece[1:].view(self.rows, self.seq_len)
        return x, y

    def close(self):
        self.stop_flag.set()
        for q in (self.shards, self.batches):
            while not q.empty():
                q.get_nowait()
        for thread in self.threads:
            thread.join(timeout=5.0)


def load_validation(hp, device):
    """The whole validation split, in order, on the device. It is scored; nothing of it is trained on before that."""
    parts = [read_shard(name) for name in shard_files(hp.val_glob)]
    tokens = np.concatenate(parts).astype(np.int32)
    return torch.from_numpy(tokens).to(device)


class ByteTables:
    """How many bytes of the original text each token stands for, given the token before it."""

    def __init__(self, path, vocab_size, device):
        sp = spm.SentencePieceProcessor(model_file=path)
        size = max(vocab_size, sp.vocab_size())
        base = np.zeros(size, dtype=np.int32)
        space = np.zeros(size, dtype=np.bool_)
        edge = np.ones(size, dtype=np.bool_)
        for i in range(sp.vocab_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            edge[i] = False
            if sp.is_byte(i):
                base[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                space[i] = True
                piece = piece[1:]
            base[i] = len(piece.encode("utf-8"))
        self.sp = sp
        self.base = torch.from_numpy(base).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.edge = torch.from_numpy(edge).to(device)

    def count(self, prev, target):
        """Bytes of every target: its piece, and its leading space unless a document or a control token precedes it."""
        n = self.base[target]
        n = n + (self.space[target] & ~self.edge[prev]).to(n.dtype)
        return n.to(torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# 3  fused kernels and attention
# ---------------------------------------------------------------------------------------------------------------------

if HAS_TRITON:
    try:

        @triton.jit
        def _relu2_fwd(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
            offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            keep = offs < n
            x = tl.load(x_ptr + offs, mask=keep, other=0.0).to(tl.float32)
            r = tl.maximum(x, 0.0)
            tl.store(y_ptr + offs, (r * r).to(y_ptr.dtype.element_ty), mask=keep)

        @triton.jit
        def _relu2_bwd(x_ptr, g_ptr, d_ptr, n, BLOCK: tl.constexpr):
            offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            keep = offs < n
            x = tl.load(x_ptr + offs, mask=keep, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + offs, mask=keep, other=0.0).to(tl.float32)
            d = 2.0 * tl.maximum(x, 0.0) * g
            tl.store(d_ptr + offs, d.to(d_ptr.dtype.element_ty), mask=keep)

        @triton.jit
        def _ce_fwd(x_ptr, t_ptr, loss_ptr, lse_ptr, vocab, cap, BLOCK: tl.constexpr):
            row = tl.program_id(0).to(tl.int64)
            cols = tl.arange(0, BLOCK)
            keep = cols < vocab
            x = tl.load(x_ptr + row * vocab + cols, mask=keep, other=0.0).to(tl.float32)
            z = cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)
            z = tl.where(keep, z, float("-inf"))
            top = tl.max(z, axis=0)
            lse = top + tl.log(tl.sum(tl.exp(z - top), axis=0))
            target = tl.load(t_ptr + row)
            hit = tl.sum(tl.where(cols == target, z, 0.0), axis=0)
            tl.store(loss_ptr + row, lse - hit)
            tl.store(lse_ptr + row, lse)

        @triton.jit
        def _ce_bwd(x_ptr, t_ptr, lse_ptr, g_ptr, d_ptr, vocab, cap, BLOCK: tl.constexpr):
            row = tl.program_id(0).to(tl.int64)
            cols = tl.arange(0, BLOCK)
            keep = cols < vocab
            x = tl.load(x_ptr + row * vocab + cols, mask=keep, other=0.0).to(tl.float32)
            th = 2.0 * tl.sigmoid(2.0 * x / cap) - 1.0
            lse = tl.load(lse_ptr + row)
            target = tl.load(t_ptr + row)
            g = tl.load(g_ptr + row).to(tl.float32)
            p = tl.exp(cap * th - lse)
            d = (p - tl.where(cols == target, 1.0, 0.0)) * (1.0 - th * th) * g
            tl.store(d_ptr + row * vocab + cols, d.to(d_ptr.dtype.element_ty), mask=keep)

    except Exception as problem:
        print(f"triton kernels off: {problem}", file=sys.stderr)
        HAS_TRITON = False


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y = torch.empty_like(x)
        n = x.numel()
        _relu2_fwd[(triton.cdiv(n, 1024),)](x, y, n, BLOCK=1024)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        d = torch.empty_like(x)
        n = x.numel()
        _relu2_bwd[(triton.cdiv(n, 1024),)](x, g.contiguous(), d, n, BLOCK=1024)
        return d


class _SoftcapCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, cap):
        logits = logits.contiguous()
        rows, vocab = logits.shape
        loss = torch.empty(rows, device=logits.device, dtype=torch.float32)
        lse = torch.empty_like(loss)
        block = triton.next_power_of_2(vocab)
        _ce_fwd[(rows,)](logits, target, loss, lse, vocab, cap, BLOCK=block)
        ctx.save_for_backward(logits, target, lse)
        ctx.cap = cap
        return loss

    @staticmethod
    def backward(ctx, g):
        logits, target, lse = ctx.saved_tensors
        rows, vocab = logits.shape
        d = torch.empty_like(logits)
        block = triton.next_power_of_2(vocab)
        _ce_bwd[(rows,)](logits, target, lse, g.contiguous(), d, vocab, ctx.cap, BLOCK=block)
        return d, None, None


def kernels_work(device):
    """One call of each kernel against torch, before anything depends on them."""
    if not HAS_TRITON:
        return False
    try:
        x = torch.randn(64, 96, device=device)
        if not torch.allclose(_Relu2.apply(x), F.relu(x).square(), atol=1e-4):
            return False
        t = torch.randint(0, 96, (64,), device=device)
        want = F.cross_entropy(30.0 * torch.tanh(x / 30.0), t, reduction="none")
        return torch.allclose(_SoftcapCE.apply(x, t, 30.0), want, atol=1e-3)
    except Exception:
        return False


FUSED = False


def relu_squared(x):
    if FUSED and x.is_cuda:
        return _Relu2.apply(x)
    return F.relu(x).square()


def softcap(logits, cap):
    return cap * torch.tanh(logits / cap)


def softcap_cross_entropy(logits, target, cap):
    """Loss of every row."""
    if FUSED and logits.is_cuda:
        return _SoftcapCE.apply(logits, target, cap)
    return F.cross_entropy(softcap(logits.float(), cap), target, reduction="none")


def attend(q, k, v, window):
    """Causal attention of the last q.size(1) positions over k and v, at most `window` positions back (-1: all)."""
    if HAS_FA3:
        out = _fa3(q, k, v, causal=True, window_size=(window, 0) if window >= 0 else (-1, -1))
        return out[0] if isinstance(out, tuple) else out
    tq, tk = q.size(1), k.size(1)
    group = q.size(2) // k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if group > 1:
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    if tq == tk and window < 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        rows = torch.arange(tk - tq, tk, device=q.device)[:, None]
        cols = torch.arange(tk, device=q.device)[None, :]
        mask = cols <= rows
        if window >= 0:
            mask &= cols >= rows - window
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# 4  model
# ---------------------------------------------------------------------------------------------------------------------


class KVWindow:
    """Keys (not yet rotated) and values of the last `size` positions, layer by layer, and the last embedding."""

    def __init__(self, layers, size):
        self.size = size
        self.keys = [None] * layers
        self.values = [None] * layers
        self.last = None

    def extend(self, layer, k, v):
        """The keys and values to attend over: those kept and the new ones; then keeps the last `size` of them."""
        if self.keys[layer] is not None:
            k = torch.cat([self.keys[layer], k], dim=1)
            v = torch.cat([self.values[layer], v], dim=1)
        self.keys[layer] = k[:, -self.size :]
        self.values[layer] = v[:, -self.size :]
        return k, v


class Rotary(nn.Module):
    def __init__(self, dims, base, length):
        super().__init__()
        freq = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angle = torch.outer(torch.arange(length, dtype=torch.float32), freq)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.dims = dims

    def forward(self, x, start):
        n = x.size(1)
        cos = self.cos[start : start + n, None, :].to(x.dtype)
        sin = self.sin[start : start + n, None, :].to(x.dtype)
        a, b = x[..., : self.dims // 2], x[..., self.dims // 2 : self.dims]
        turned = torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
        return torch.cat([turned, x[..., self.dims :]], dim=-1)


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


class BankGPT(nn.Module):
    """A decoder whose matrices lie in banks: one 3D parameter per kind, its first axis the layer.

    The banks are what Muon shards over ranks and what GPTQ walks through; layers hold only scalars and gains.
    """

    BANKS = ("q_bank", "k_bank", "v_bank", "o_bank", "up_bank", "down_bank")

    def __init__(self, hp):
        super().__init__()
        self.hp = hp
        n, d, h = hp.num_layers, hp.model_dim, hp.mlp_hidden
        self.head_dim = d // hp.num_heads
        kv = self.head_dim * hp.num_kv_heads
        self.embed = nn.Parameter(torch.empty(hp.vocab_size, d).normal_(std=0.02))
        self.q_bank = nn.Parameter(torch.empty(n, d, d))
        self.k_bank = nn.Parameter(torch.empty(n, kv, d))
        self.v_bank = nn.Parameter(torch.empty(n, kv, d))
        self.o_bank = nn.Parameter(torch.zeros(n, d, d))
        self.up_bank = nn.Parameter(torch.empty(n, h, d))
        self.down_bank = nn.Parameter(torch.zeros(n, d, h))
        for bank in (self.q_bank, self.k_bank, self.v_bank, self.up_bank):
            for matrix in bank.data:
                nn.init.orthogonal_(matrix)
        self.q_gain = nn.Parameter(torch.full((n, hp.num_heads), hp.qk_gain))
        self.attn_scale = nn.Parameter(torch.ones(n, d))
        self.mlp_scale = nn.Parameter(torch.ones(n, d))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(n, d), torch.zeros(n, d)], dim=1))
        self.encoder = n // 2
        self.skip_scale = nn.Parameter(torch.ones(min(self.encoder, n - self.encoder), d))
        self.smear_gate = nn.Parameter(torch.zeros(12))
        self.smear_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("depth_scale", (torch.arange(n) + 1.0).rsqrt(), persistent=False)
        self.rotary = Rotary(hp.rope_dims, hp.rope_base, 2 * max(hp.seq_len, hp.kv_window + hp.eval_stride))
        self.tap = None

    def linear(self, bank, layer, x):
        if self.tap is not None:
            self.tap(bank, layer, x)
        return F.linear(x, getattr(self, bank)[layer].to(x.dtype))

    def smear(self, x, ids, cache):
        """Adds a gated share of the previous token's embedding, except over the start of a document."""
        first = torch.zeros_like(x[:, :1]) if cache is None or cache.last is None else cache.last
        before = torch.cat([first, x[:, :-1]], dim=1)
        if cache is not None:
            cache.last = x[:, -1:]
        gate = torch.sigmoid((x[..., :12] * self.smear_gate.to(x.dtype)).sum(-1, keepdim=True))
        gate = gate * self.smear_scale.to(x.dtype)
        gate = gate * (ids != self.hp.bos_id).unsqueeze(-1).to(x.dtype)
        return x + gate * before

    def attention(self, layer, x, cache):
        hp = self.hp
        b, t, _ = x.shape
        q = rms(self.linear("q_bank", layer, x).view(b, t, hp.num_heads, self.head_dim))
        k = rms(self.linear("k_bank", layer, x).view(b, t, hp.num_kv_heads, self.head_dim))
        v = self.linear("v_bank", layer, x).view(b, t, hp.num_kv_heads, self.head_dim)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        q = self.rotary(q, k.size(1) - t) * self.q_gain[layer].to(q.dtype)[:, None]
        k = self.rotary(k, 0)
        y = attend(q, k, v, -1 if cache is None else cache.size)
        return self.linear("o_bank", layer, y.reshape(b, t, -1))

    def mlp(self, layer, x):
        return self.linear("down_bank", layer, relu_squared(self.linear("up_bank", layer, x)))

    def block(self, layer, x, x0, cache):
        mix = self.resid_mix[layer].to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        s = self.depth_scale[layer].to(x.dtype)
        x = x + self.attn_scale[layer].to(x.dtype) * self.attention(layer, rms(x) * s, cache)
        return x + self.mlp_scale[layer].to(x.dtype) * self.mlp(layer, rms(x) * s)

    def features(self, ids, cache=None):
        x = F.embedding(ids, self.embed).to(torch.bfloat16)
        x = rms(self.smear(x, ids, cache))
        x0 = x
        skips = []
        for layer in range(self.encoder):
            x = self.block(layer, x, x0, cache)
            skips.append(x)
        for i, layer in enumerate(range(self.encoder, self.hp.num_layers)):
            if skips and i < self.skip_scale.size(0):
                x = x + self.skip_scale[i].to(x.dtype) * skips.pop()
            x = self.block(layer, x, x0, cache)
        return rms(x)

    def raw_logits(self, ids, cache=None):
        return F.linear(self.features(ids, cache), self.embed.to(torch.bfloat16))

    def log_probs(self, ids, cache=None):
        """Log-probabilities over the whole vocabulary after every position."""
        z = softcap(self.raw_logits(ids, cache).float(), self.hp.logit_softcap)
        return F.log_softmax(z * self.hp.logit_scale, dim=-1)

    def forward(self, ids, target):
        z = self.raw_logits(ids)
        return softcap_cross_entropy(z.view(-1, z.size(-1)), target.reshape(-1), self.hp.logit_softcap).mean()

    def bank_parameters(self):
        return [getattr(self, name) for name in self.BANKS]

    def scalar_parameters(self):
        return [p for name, p in self.named_parameters() if name not in self.BANKS and name != "embed"]


# ---------------------------------------------------------------------------------------------------------------------
# 5  optimizer
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def newton_schulz(g, steps):
    """Orthogonalises a batch of matrices [n, rows, cols] by the quintic iteration, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    flip = x.size(-2) > x.size(-1)
    if flip:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        p = torch.baddbmm(s, s, s, beta=b, alpha=c)
        x = torch.baddbmm(x, p, x, beta=a, alpha=1.0)
    return x.mT if flip else x


class BankShard:
    """One bank cut over the ranks along its first axis, padded so that every rank owns the same number of matrices."""

    def __init__(self, param, ranks):
        n = param.size(0)
        self.param = param
        self.own = -(-n // ranks.world)
        self.padded = self.own * ranks.world
        tail = param.shape[1:]
        self.full_grad = torch.zeros(self.padded, *tail, device=param.device, dtype=torch.bfloat16)
        self.grad = torch.zeros(self.own, *tail, device=param.device, dtype=torch.bfloat16)
        self.momentum = torch.zeros(self.own, *tail, device=param.device, dtype=torch.float32)
        self.update = torch.zeros(self.own, *tail, device=param.device, dtype=torch.bfloat16)
        self.full_update = torch.zeros(self.padded, *tail, device=param.device, dtype=torch.bfloat16)
        self.scale = max(1.0, tail[0] / tail[1]) ** 0.5
        self.work = None


class BankMuon:
    """Muon over banks. The gradients' reduce-scatter is launched bank by bank, largest first; while one is under way the
    Adam group steps and earlier banks are orthogonalised; the updates come back by asynchronous all-gather."""

    def __init__(self, params, ranks, lr, weight_decay, ns_steps):
        self.ranks = ranks
        self.shards = sorted((BankShard(p, ranks) for p in params), key=lambda s: -s.param.numel())
        self.base_lr = lr
        self.weight_decay = weight_decay
        self.ns_steps = ns_steps

    def launch(self):
        for s in self.shards:
            n = s.param.size(0)
            s.full_grad[:n].copy_(s.param.grad)
            if self.ranks.on:
                s.work = dist.reduce_scatter_tensor(s.grad, s.full_grad, op=dist.ReduceOp.AVG, async_op=True)
            else:
                s.grad.copy_(s.full_grad)

    @torch.no_grad()
    def step(self, lr_scale, momentum):
        gathers = []
        for s in self.shards:
            if s.work is not None:
                s.work.wait()
                s.work = None
            g = s.grad.float()
            s.momentum.lerp_(g, 1.0 - momentum)
            look = g.lerp(s.momentum, momentum)
            s.update.copy_(newton_schulz(look, self.ns_steps))
            if self.ranks.on:
                gathers.append((s, dist.all_gather_into_tensor(s.full_update, s.update, async_op=True)))
            else:
                s.full_update.copy_(s.update)
                gathers.append((s, None))
        lr = self.base_lr * lr_scale
        for s, work in gathers:
            if work is not None:
                work.wait()
            s.param.mul_(1.0 - lr * self.weight_decay)
            s.param.add_(s.full_update[: s.param.size(0)].to(s.param.dtype), alpha=-lr * s.scale)

    def zero_grad(self):
        for s in self.shards:
            s.param.grad = None


class SmallParams:
    """Embedding and scalars under fused AdamW; their gradients travel in one flat all-reduce."""

    def __init__(self, groups, ranks, betas):
        self.ranks = ranks
        self.params = [p for group in groups for p in group["params"]]
        for group in groups:
            group["base_lr"] = group["lr"]
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=1e-8, weight_decay=0.0, fused=True)
        self.flat = None
        self.work = None

    def launch(self):
        self.flat = torch.cat([p.grad.float().reshape(-1) for p in self.params])
        if self.ranks.on:
            self.work = dist.all_reduce(self.flat, op=dist.ReduceOp.AVG, async_op=True)

    def step(self, lr_scale, clip):
        if self.work is not None:
            self.work.wait()
            self.work = None
        if clip > 0:
            self.flat.mul_((clip / (self.flat.norm() + 1e-6)).clamp(max=1.0))
        at = 0
        for p in self.params:
            p.grad.copy_(self.flat[at : at + p.numel()].view_as(p))
            at += p.numel()
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()

    def zero_grad(self):
        self.adam.zero_grad(set_to_none=True)


def build_optimizers(model, hp, ranks):
    muon = BankMuon(model.bank_parameters(), ranks, hp.bank_lr, hp.weight_decay, hp.ns_steps)
    groups = [
        {"params": [model.embed], "lr": hp.embed_lr},
        {"params": model.scalar_parameters(), "lr": hp.scalar_lr},
    ]
    return muon, SmallParams(groups, ranks, (hp.beta1, hp.beta2))


def optimizer_step(muon, small, hp, step, lr_scale):
    muon.launch()
    small.launch()
    small.step(lr_scale, hp.grad_clip)
    warm = min(step / max(hp.muon_momentum_steps, 1), 1.0)
    muon.step(lr_scale, hp.muon_momentum_start + warm * (hp.muon_momentum - hp.muon_momentum_start))
    muon.zero_grad()
    small.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# 6  averaging, GPTQ, packing
# ---------------------------------------------------------------------------------------------------------------------


class Average:
    """Exponential average of the weights in float32."""

    def __init__(self, model, decay):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self.values = [p.detach().float().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(self.values, [p.detach().float() for p in model.parameters()], 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model):
        for value, p in zip(self.values, model.parameters()):
            p.copy_(value)


class Hessians:
    """Sums of x x^T before every matrix of every bank, gathered through the model's tap."""

    SHARED = {"k_bank": "q_bank", "v_bank": "q_bank"}

    def __init__(self, model):
        self.sums = {}
        for name in model.BANKS:
            if name not in self.SHARED:
                bank = getattr(model, name)
                self.sums[name] = torch.zeros(bank.size(0), bank.size(2), bank.size(2), device=bank.device)
        self.rows = 0

    def __call__(self, bank, layer, x):
        if bank in self.SHARED:
            return
        flat = x.reshape(-1, x.size(-1)).float()
        self.sums[bank][layer].addmm_(flat.T, flat)
        if bank == "q_bank" and layer == 0:
            self.rows += flat.size(0)

    def get(self, bank, layer):
        return self.sums[self.SHARED.get(bank, bank)][layer] / max(self.rows, 1)

    def reduce(self, ranks):
        rows = ranks.sum(torch.tensor([float(self.rows)], device=ranks.device))
        for tensor in self.sums.values():
            ranks.sum(tensor)
        self.rows = int(rows.item())


@torch.no_grad()
def gather_hessians(model, loader, hp, ranks):
    """Hessians from training batches; called while the training clock runs."""
    taps = Hessians(model)
    model.tap = taps
    for _ in range(hp.gptq_batches):
        x, _ = loader.next()
        model.features(x[:8])
    model.tap = None
    taps.reduce(ranks)
    return taps


def row_scales(w, limit):
    """The clip of every row that loses least, out of a few shares of its largest weight."""
    top = w.abs().amax(dim=1).clamp_min(1e-8)
    best = torch.full_like(top, float("inf"))
    scale = top / limit
    for share in (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72):
        s = top * share / limit
        q = (w / s[:, None]).round().clamp(-limit, limit) * s[:, None]
        error = (q - w).square().sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, s, scale)
    return scale.half().float().clamp_min(6e-8)


@torch.no_grad()
def gptq_matrix(weight, hessian, limit, block, damp):
    """Rounds a matrix column by column and pushes each column's error into those still to come."""
    w = weight.float().clone()
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=True)
    back = torch.argsort(order)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale = row_scales(w, limit)
    codes = torch.zeros_like(w)
    for a in range(0, w.size(1), block):
        b = min(a + block, w.size(1))
        part = w[:, a:b].clone()
        errors = torch.zeros_like(part)
        for j in range(b - a):
            col = part[:, j]
            q = (col / scale).round().clamp(-limit, limit)
            codes[:, a + j] = q
            err = (col - q * scale) / upper[a + j, a + j]
            part[:, j:] -= err[:, None] * upper[a + j, a + j : b][None, :]
            errors[:, j] = err
        w[:, b:] -= errors @ upper[a:b, b:]
    return codes[:, back].to(torch.int8), scale.half()


def quantise(model, taps, hp, ranks):
    """Codes and scales of all banks (matrices dealt out to the ranks), 8-bit rows for the embedding, halves for the rest."""
    limit = 2 ** (hp.quant_bits - 1) - 1
    jobs = [(name, i) for name in model.BANKS for i in range(getattr(model, name).size(0))]
    done = {}
    for n, (name, i) in enumerate(jobs):
        w = getattr(model, name)[i]
        if n % ranks.world == ranks.rank:
            done[name, i] = gptq_matrix(w, taps.get(name, i), limit, hp.gptq_block, hp.gptq_damp)
    tensors = {}
    for n, (name, i) in enumerate(jobs):
        w = getattr(model, name)[i]
        if (name, i) in done:
            q, s = done[name, i]
        else:
            q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
            s = torch.empty(w.size(0), dtype=torch.float16, device=w.device)
        if ranks.on:
            dist.broadcast(q, src=n % ranks.world)
            dist.broadcast(s, src=n % ranks.world)
        tensors[f"{name}.{i}.q"] = q.cpu()
        tensors[f"{name}.{i}.s"] = s.cpu()
    e = model.embed.detach().float()
    s = row_scales(e, 127)
    tensors["embed.q"] = (e / s[:, None]).round().clamp(-127, 127).to(torch.int8).cpu()
    tensors["embed.s"] = s.half().cpu()
    for name, p in model.named_parameters():
        if name not in model.BANKS and name != "embed":
            tensors[name] = p.detach().half().cpu()
    return tensors


def pack(tensors):
    """One blob: the length of an index, the index as JSON, the raw arrays; compressed by what is shorter."""
    index, body = [], io.BytesIO()
    for name in sorted(tensors):
        array = tensors[name].contiguous().numpy()
        index.append([name, str(array.dtype), list(array.shape)])
        body.write(array.tobytes())
    head = json.dumps(index, separators=(",", ":")).encode("utf-8")
    raw = struct.pack("<I", len(head)) + head + body.getvalue()
    forms = [b"L" + lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)]
    if brotli is not None:
        forms.append(b"B" + brotli.compress(raw, quality=11, lgwin=24))
    return min(forms, key=len)


def unpack(blob):
    raw = lzma.decompress(blob[1:]) if blob[:1] == b"L" else brotli.decompress(blob[1:])
    (length,) = struct.unpack("<I", raw[:4])
    tensors, at = {}, 4 + length
    for name, kind, shape in json.loads(raw[4:at].decode("utf-8")):
        count = int(np.prod(shape)) if shape else 1
        array = np.frombuffer(raw, dtype=np.dtype(kind), count=count, offset=at).reshape(shape)
        tensors[name] = torch.from_numpy(array.copy())
        at += array.nbytes
    return tensors


@torch.no_grad()
def load_packed(blob, hp, device):
    """A fresh model out of the packed bytes and nothing else."""
    tensors = unpack(blob)
    model = BankGPT(hp).to(device)
    for name, p in model.named_parameters():
        if name in model.BANKS:
            for i in range(p.size(0)):
                q = tensors[f"{name}.{i}.q"].to(device).float()
                p[i].copy_(q * tensors[f"{name}.{i}.s"].to(device).float()[:, None])
        elif name == "embed":
            p.copy_(tensors["embed.q"].to(device).float() * tensors["embed.s"].to(device).float()[:, None])
        else:
            p.copy_(tensors[name].to(device).float())
    return model


def write_artifact(tensors, hp, ranks, path):
    """Rank 0 writes the artifact and prints the counted size: code and model together."""
    if ranks.master:
        blob = pack(tensors)
        path.write_bytes(blob)
        code = len(Path(__file__).read_bytes())
        total = code + len(blob)
        ranks.say(f"model bytes: {len(blob)}")
        ranks.say(f"code bytes: {code}")
        ranks.say(f"total submission bytes: {total} of {hp.size_limit}")
        if total > hp.size_limit:
            raise SystemExit(f"too large: {total} bytes")
    ranks.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# 7  evaluation
# ---------------------------------------------------------------------------------------------------------------------


class Ledger:
    """Sums over the scored tokens of one rank: nats, bytes, tokens."""

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll, size, keep):
        keep = keep.to(torch.float64)
        self.sums[0] += (nll.to(torch.float64) * keep).sum()
        self.sums[1] += (size * keep).sum()
        self.sums[2] += keep.sum()

    def totals(self, ranks):
        nats, size, tokens = ranks.sum(self.sums.clone()).tolist()
        return nats, size, int(tokens)


def bits_per_byte(nats, size):
    return nats / math.log(2.0) / size


class PairTable:
    """Counts of token pairs in the text scored so far, as a smoothed conditional distribution over the vocabulary.

    The table grows by whole chunks, each after it has been scored, and is the same on every rank.
    """

    def __init__(self, hp, device):
        v = hp.vocab_size
        self.alpha = hp.pair_alpha
        self.top = hp.pair_lambda
        self.half = hp.pair_half
        self.counts = torch.zeros(v, v, device=device)
        self.single = torch.ones(v, device=device)
        self.table = None
        self.weight = None
        self.refresh()

    def refresh(self):
        prior = self.single / self.single.sum()
        seen = self.counts.sum(dim=1)
        self.table = (self.counts + self.alpha * prior) / (seen + self.alpha)[:, None]
        self.weight = self.top * seen / (seen + self.half)

    def learn(self, prev, target):
        v = self.counts.size(0)
        self.counts += torch.bincount(prev * v + target, minlength=v * v).view(v, v)
        self.single += torch.bincount(target, minlength=v)
        self.refresh()

    def mix(self, log_p, prev):
        """log of (1 - w) p + w q, for every token of the vocabulary; w depends on the previous token's count alone."""
        w = self.weight[prev].unsqueeze(-1)
        q = self.table[prev]
        return torch.log((1.0 - w) * log_p.exp() + w * q)


class Evaluator:
    """Scores spans of the validation stream with a window of keys and values, in steps of `stride` tokens.

    A span is cut into lanes of `lane_len` tokens, dealt out to the ranks. Each lane first runs over the `kv_window`
    tokens before it, which fills the window and counts nothing; then every step feeds the next `stride` tokens.
    """

    def __init__(self, hp, ranks, stream, tables):
        self.hp = hp
        self.ranks = ranks
        self.stream = stream
        self.tables = tables
        self.targets = stream.numel() - 1

    def lanes(self, starts, stop):
        """Inputs, targets and which of them count, for lanes that begin at `starts`."""
        hp = self.hp
        offs = torch.arange(-hp.kv_window, hp.lane_len, device=self.stream.device)
        at = starts[:, None] + offs[None, :]
        inside = (at >= 0) & (at < self.targets)
        safe = at.clamp(0, self.targets - 1)
        bos = torch.full_like(safe, hp.bos_id)
        x = torch.where(inside, self.stream[safe].long(), bos)
        y = torch.where(inside, self.stream[safe + 1].long(), bos)
        keep = inside & (offs >= 0)[None, :] & (at < stop)
        return x, y, keep

    @torch.no_grad()
    def score_lanes(self, model, starts, stop, ledger, pairs=None):
        hp = self.hp
        x, y, keep = self.lanes(starts, stop)
        cache = KVWindow(hp.num_layers, hp.kv_window)
        model.features(x[:, : hp.kv_window], cache)
        for a in range(hp.kv_window, hp.kv_window + hp.lane_len, hp.eval_stride):
            b = a + hp.eval_stride
            ids, target = x[:, a:b], y[:, a:b]
            log_p = model.log_probs(ids, cache)
            if pairs is not None:
                log_p = pairs.mix(log_p, ids)
            nll = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            ledger.add(nll, self.tables.count(ids, target), keep[:, a:b])

    def score_span(self, model, start, stop, ledger, pairs=None, batch=32):
        """Every target of [start, stop) once, over all ranks."""
        starts = torch.arange(start, stop, self.hp.lane_len, device=self.stream.device)
        mine = starts[self.ranks.rank :: self.ranks.world]
        for group in mine.split(batch):
            self.score_lanes(model, group, stop, ledger, pairs)

    def plain(self, model, limit=0):
        """The fixed model over the stream, or over its first `limit` targets where only a look is wanted."""
        stop = min(limit, self.targets) if limit else self.targets
        ledger = Ledger(self.stream.device)
        self.score_span(model, 0, stop, ledger)
        return ledger.totals(self.ranks)


class Adapter:
    """SGD on chunks that have been scored. Rows of a chunk are dealt out to the ranks, gradients summed over them."""

    def __init__(self, model, hp, ranks, chunks):
        self.model = model
        self.hp = hp
        self.ranks = ranks
        self.chunks = max(chunks, 1)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.sgd = torch.optim.SGD(self.params, lr=hp.ttt_lr, momentum=hp.ttt_momentum)

    def reduce(self, share):
        flat = torch.cat([p.grad.reshape(-1) for p in self.params]) * share
        self.ranks.sum(flat)
        flat.mul_((self.hp.ttt_clip / (flat.norm() + 1e-6)).clamp(max=1.0))
        at = 0
        for p in self.params:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()

    def rows_of(self, tokens):
        """The chunk as rows of the training length; what is left over at its end is not trained on."""
        t = self.hp.seq_len
        n = (tokens.numel() - 1) // t
        x = tokens[: n * t].view(n, t)
        y = tokens[1 : n * t + 1].view(n, t)
        return x, y

    def learn(self, tokens, index):
        x, y = self.rows_of(tokens)
        if not x.size(0):
            return
        lr = self.hp.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * index / self.chunks))
        for group in self.sgd.param_groups:
            group["lr"] = lr
        world, rank = self.ranks.world, self.ranks.rank
        step_rows = self.hp.ttt_rows * world
        for _ in range(self.hp.ttt_epochs):
            for a in range(0, x.size(0), step_rows):
                block = min(step_rows, x.size(0) - a)
                xs = x[a : a + block][rank::world]
                ys = y[a : a + block][rank::world]
                self.sgd.zero_grad(set_to_none=False)
                if xs.size(0):
                    self.model(xs, ys).backward()
                self.ensure_grads()
                self.reduce(xs.size(0) / block)
                self.sgd.step()

    def ensure_grads(self):
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)


def adaptive_score(model, evaluator, hp, ranks, clock):
    """Chunk by chunk: score it with what is known from the chunks before, and only then learn from it."""
    stream, total = evaluator.stream, evaluator.targets
    ledger = Ledger(stream.device)
    pairs = PairTable(hp, stream.device) if hp.pair_enabled else None
    bounds = [(a, min(a + hp.chunk_tokens, total)) for a in range(0, total, hp.chunk_tokens)]
    adapter = Adapter(model, hp, ranks, len(bounds)) if hp.ttt_enabled else None
    for index, (start, stop) in enumerate(bounds):
        evaluator.score_span(model, start, stop, ledger, pairs)
        if index + 1 == len(bounds):
            break
        chunk = stream[start : stop + 1].long()
        if pairs is not None:
            pairs.learn(chunk[:-1], chunk[1:])
        if adapter is not None:
            left = hp.eval_cap_s - clock.seconds("eval")
            if ranks.any(left < 0.25 * hp.eval_cap_s * (1.0 - index / len(bounds)) + 10.0):
                ranks.say(f"ttt: out of time at chunk {index}, scoring goes on without it")
                adapter = None
            else:
                adapter.learn(chunk, index)
        if index % 50 == 0:
            nats, size, tokens = ledger.totals(ranks)
            ranks.say(f"ttt chunk {index}/{len(bounds)} bpb so far {bits_per_byte(nats, size):.5f} tokens {tokens}")
    nats, size, tokens = ledger.totals(ranks)
    if tokens != total:
        raise RuntimeError(f"scored {tokens} of {total} tokens")
    return nats, size, tokens


# ---------------------------------------------------------------------------------------------------------------------
# 8  main
# ---------------------------------------------------------------------------------------------------------------------


def lr_scale_at(step, elapsed, hp):
    """Flat, then linear to zero over the last part of the time (or of the steps, when there is no cap)."""
    budget = hp.train_cap_s - hp.reserve_s
    done = elapsed / budget if hp.train_cap_s > 0 else step / max(hp.iterations, 1)
    if done < 1.0 - hp.warmdown_frac:
        return 1.0
    return max((1.0 - done) / hp.warmdown_frac, 0.0)


def train_step(run, model, loader, accum):
    loss_sum = torch.zeros((), device=next(model.parameters()).device)
    for _ in range(accum):
        x, y = loader.next()
        loss = run(x, y)
        (loss / accum).backward()
        loss_sum += loss.detach() / accum
    return loss_sum


def warm_up(run, model, loader, hp, ranks, accum):
    """Compiles and fills the allocator on a few training batches, then puts weights back as they were."""
    kept = copy.deepcopy(model.state_dict())
    muon, small = build_optimizers(model, hp, ranks)
    for step in range(hp.warmup_steps):
        train_step(run, model, loader, accum)
        optimizer_step(muon, small, hp, step, 1.0)
    model.load_state_dict(kept)
    for p in model.parameters():
        p.grad = None
    torch.cuda.synchronize()


def train(run, model, loader, evaluator, hp, ranks, clock, accum):
    """The training loop; leaves the averaged weights in the model. The clock "train" is running on return."""
    muon, small = build_optimizers(model, hp, ranks)
    average = Average(model, hp.ema_decay)
    budget = hp.train_cap_s - hp.reserve_s
    clock.start("train")
    step = 0
    while step < hp.iterations:
        elapsed = clock.seconds("train")
        if hp.train_cap_s > 0 and ranks.any(elapsed >= budget):
            ranks.say(f"stopping at step {step}: {elapsed:.1f}s of {budget:.1f}s")
            break
        if hp.val_every and step and step % hp.val_every == 0:
            with clock.held("train"), clock.phase("probe"):
                nats, size, tokens = evaluator.plain(model, hp.val_probe_tokens)
                ranks.say(f"step {step} probe of {tokens} tokens: bpb {bits_per_byte(nats, size):.4f} (log only)")
        scale = lr_scale_at(step, elapsed, hp)
        loss = train_step(run, model, loader, accum)
        optimizer_step(muon, small, hp, step, scale)
        average.update(model, step)
        step += 1
        if step <= 5 or step % hp.log_every == 0:
            seconds = clock.seconds("train")
            ranks.say(f"step {step} loss {loss.item():.4f} time {seconds:.1f}s avg {1000 * seconds / step:.2f}ms")
    average.copy_to(model)
    return step


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main():
    global FUSED
    hp = Settings()
    ranks = Ranks()
    clock = Clock()
    hp.check(ranks.world)
    ranks.open_log(hp.run_id)
    ranks.say(Path(__file__).read_text(encoding="utf-8"))
    ranks.say(f"python {sys.version.split()[0]} torch {torch.__version__} world {ranks.world}")
    seed_all(hp.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    FUSED = not ranks.any(not kernels_work(ranks.device))
    ranks.say(f"fused kernels: {FUSED} flash attention 3: {HAS_FA3}")

    with clock.phase("setup"):
        tables = ByteTables(hp.tokenizer_path, hp.vocab_size, ranks.device)
        if tables.sp.vocab_size() != hp.vocab_size:
            raise ValueError("the tokenizer has another vocabulary")
        stream = load_validation(hp, ranks.device)
        evaluator = Evaluator(hp, ranks, stream, tables)
        accum = 8 // ranks.world
        rows = hp.batch_tokens // (hp.seq_len * accum * ranks.world)
        model = BankGPT(hp).to(ranks.device)
        run = torch.compile(model, dynamic=False)
        ranks.say(f"parameters {sum(p.numel() for p in model.parameters())} rows {rows} accum {accum}")
        ranks.say(f"validation tokens {stream.numel()}")

    with clock.phase("warmup"):
        loader = Prefetcher(hp.train_glob, ranks, rows, hp.seq_len, hp.seed)
        warm_up(run, model, loader, hp, ranks, accum)
        loader.close()

    loader = Prefetcher(hp.train_glob, ranks, rows, hp.seq_len, hp.seed)
    steps = train(run, model, loader, evaluator, hp, ranks, clock, accum)
    with clock.phase("gptq"):
        taps = gather_hessians(model, loader, hp, ranks)
        loader.close()
        tensors = quantise(model, taps, hp, ranks)
    spent = clock.stop("train")
    ranks.say(f"trained {steps} steps; training and quantisation {spent:.1f}s of {hp.train_cap_s:.0f}s")
    del taps, loader, run, model
    torch.cuda.empty_cache()

    path = Path("final_model.bin")
    with clock.phase("pack"):
        write_artifact(tensors, hp, ranks, path)

    clock.start("eval")
    model = load_packed(path.read_bytes(), hp, ranks.device)
    model.eval()
    nats, size, tokens = evaluator.plain(model, hp.val_probe_tokens)
    ranks.say(f"packed model, first {tokens} tokens: bpb {bits_per_byte(nats, size):.5f} (log only)")
    nats, size, tokens = adaptive_score(model, evaluator, hp, ranks, clock)
    took = clock.stop("eval")
    ranks.say(f"evaluation {took:.1f}s of {hp.eval_cap_s:.0f}s; {tokens} tokens, {size:.0f} bytes")
    ranks.say(clock.report())
    ranks.say(f"final val_loss {nats / tokens:.8f} val_bpb {bits_per_byte(nats, size):.8f}")
    ranks.close()


if __name__ == "__main__":
    main()
