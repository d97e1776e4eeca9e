"""
SP8192 / 11L / parallel residuals / 3-layer depth recurrence / MuonEq-R / EMA / GPTQ int6 + brotli / score-first TTT

torchrun --standalone --nproc_per_node=8 train_gpt.py

One file, one run: train (<= 600 s, calibration included), quantise, write final_model.int6.ptz, read it back,
then evaluate what was read back.  The number we report is the last line, `final_exact`.
"""

import collections
import copy
import datetime
import glob
import io
import math
import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    from flash_attn_interface import flash_attn_func as fa3_func

    HAVE_FA3 = True
except ImportError:
    fa3_func = None
    HAVE_FA3 = False


# -----------------------------------------------------------------------------
# knobs
# -----------------------------------------------------------------------------


def _env_int(name, default):
    return int(os.environ.get(name, default))


def _env_float(name, default):
    return float(os.environ.get(name, default))


def _env_flag(name, default):
    return bool(int(os.environ.get(name, "1" if default else "0")))


class Hyper:
    # files
    data_dir = os.environ.get("DATA_DIR", "./data")
    vocab_size = _env_int("VOCAB_SIZE", 8192)
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = _env_int("SEED", 1337)
    model_path = "final_model.pt"
    artifact_path = "final_model.int6.ptz"
    size_limit = 16_000_000

    # length of the run
    iterations = _env_int("ITERATIONS", 20000)
    max_wallclock_seconds = _env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = _env_float("GPTQ_RESERVE_SECONDS", 14.0)
    warmup_steps = _env_int("WARMUP_STEPS", 20)
    warmdown_frac = _env_float("WARMDOWN_FRAC", 0.667)
    min_lr = _env_float("MIN_LR", 0.0)
    train_batch_tokens = _env_int("TRAIN_BATCH_TOKENS", 2048 * 48 * 8)
    train_seq_len = _env_int("TRAIN_SEQ_LEN", 2048)
    train_log_every = _env_int("TRAIN_LOG_EVERY", 500)
    val_loss_every = _env_int("VAL_LOSS_EVERY", 4000)
    val_batch_seqs = _env_int("VAL_BATCH_SEQS", 32)

    # model
    num_layers = _env_int("NUM_LAYERS", 11)
    model_dim = _env_int("MODEL_DIM", 512)
    num_heads = _env_int("NUM_HEADS", 8)
    num_kv_heads = _env_int("NUM_KV_HEADS", 4)
    mlp_mult = _env_float("MLP_MULT", 4.0)
    rope_base = _env_float("ROPE_BASE", 10000.0)
    rope_dims = _env_int("ROPE_DIMS", 16)
    logit_softcap = _env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = _env_float("QK_GAIN_INIT", 5.0)
    xsa_last_n = _env_int("XSA_LAST_N", 11)
    ln_scale = _env_flag("LN_SCALE", True)
    skip_gates = _env_flag("SKIP_GATES", True)
    smear_gate = _env_flag("SMEAR_GATE", True)
    smear_width = _env_int("SMEAR_WIDTH", 12)
    bos_id = _env_int("BOS_ID", 1)
    tied_embed_init_std = _env_float("TIED_EMBED_INIT_STD", 0.005)
    parallel_from = _env_int("PARALLEL_FROM", 7)

    # depth recurrence
    loop_start = _env_int("LOOP_START", 3)
    loop_end = _env_int("LOOP_END", 5)
    num_loops = _env_int("NUM_LOOPS", 2)
    enable_looping_at = _env_float("ENABLE_LOOPING_AT", 0.35)

    # optimisation
    matrix_lr = _env_float("MATRIX_LR", 0.022)
    scalar_lr = _env_float("SCALAR_LR", 0.02)
    tied_embed_lr = _env_float("TIED_EMBED_LR", 0.03)
    muon_momentum = _env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start = _env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = _env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_backend_steps = _env_int("MUON_BACKEND_STEPS", 5)
    muon_row_norm = _env_flag("MUON_ROW_NORM", True)
    muon_wd = _env_float("MUON_WD", 0.095)
    embed_wd = _env_float("EMBED_WD", 0.085)
    adam_wd = _env_float("ADAM_WD", 0.02)
    beta1 = _env_float("BETA1", 0.9)
    beta2 = _env_float("BETA2", 0.95)
    adam_eps = _env_float("ADAM_EPS", 1e-8)
    grad_clip_norm = _env_float("GRAD_CLIP_NORM", 0.3)
    ema_decay = _env_float("EMA_DECAY", 0.9965)

    # quantisation
    matrix_bits = _env_int("MATRIX_BITS", 6)
    matrix_clip_sigmas = _env_float("MATRIX_CLIP_SIGMAS", 12.85)
    embed_bits = _env_int("EMBED_BITS", 8)
    embed_clip_sigmas = _env_float("EMBED_CLIP_SIGMAS", 20.0)
    gptq_batches = _env_int("GPTQ_BATCHES", 64)
    gptq_damp = _env_float("GPTQ_DAMP", 0.01)
    gptq_block = _env_int("GPTQ_BLOCK", 128)

    # evaluation
    eval_seq_len = _env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = _env_int("EVAL_STRIDE", 64)
    eval_batch_seqs = _env_int("EVAL_BATCH_SEQS", 32)
    sliding_enabled = _env_flag("SLIDING_ENABLED", True)
    ttt_enabled = _env_flag("TTT_ENABLED", True)
    ttt_chunk_tokens = _env_int("TTT_CHUNK_TOKENS", 32768)
    ttt_epochs = _env_int("TTT_EPOCHS", 3)
    ttt_lr = _env_float("TTT_LR", 0.005)
    ttt_momentum = _env_float("TTT_MOMENTUM", 0.9)
    ttt_grad_clip = _env_float("TTT_GRAD_CLIP", 1.0)
    ttt_batch_seqs = _env_int("TTT_BATCH_SEQS", 2)
    ttt_hash_embed = _env_flag("TTT_HASH_EMBED", True)
    ttt_hash_buckets = _env_int("TTT_HASH_BUCKETS", 16384)
    ttt_hash_lr_mult = _env_float("TTT_HASH_LR_MULT", 10.0)

    # bigram cache over what has been scored (left off: +0.0004 at 8192 pieces, not worth the seconds)
    mix_enabled = _env_flag("MIX_ENABLED", False)
    mix_alpha = _env_float("MIX_ALPHA", 400.0)

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = _env_int("RANK", 0)
    world_size = _env_int("WORLD_SIZE", 1)
    local_rank = _env_int("LOCAL_RANK", 0)
    is_main = rank == 0
    grad_accum_steps = max(1, 8 // world_size)
    logfile = None


_logfile = None


def log(msg, console=True):
    if not Hyper.is_main:
        return
    if console:
        print(msg, flush=True)
    if _logfile is not None:
        with open(_logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)


def set_logfile(path):
    global _logfile
    _logfile = path


def log_settings(h):
    log("settings:", console=False)
    for name in sorted(vars(type(h) if not isinstance(h, type) else h)):
        if not name.startswith("_"):
            log(f"  {name}: {getattr(h, name)}", console=False)


def sync_max(value, device):
    """The largest of a number over the ranks, so that all of them take the same branch."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    t = torch.tensor(float(value), device=device, dtype=torch.float64)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


def sync_sum(*tensors):
    if dist.is_available() and dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)


class Clock:
    """Wall clock in ms that can be stopped while we print a validation loss."""

    def __init__(self):
        self.total = 0.0
        self.t0 = None

    def start(self):
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def stop(self):
        torch.cuda.synchronize()
        self.total += 1000.0 * (time.perf_counter() - self.t0)
        self.t0 = None

    def read(self):
        if self.t0 is None:
            return self.total
        return self.total + 1000.0 * (time.perf_counter() - self.t0)


# -----------------------------------------------------------------------------
# bytes per token
# -----------------------------------------------------------------------------


class ByteTables:
    """
    How many bytes of text a target token stands for.

    base[i]      utf-8 bytes of the piece without its leading space mark
    space[i]     the piece begins with the mark, i.e. with one space
    boundary[i]  control pieces (bos, unk, ...): no bytes, and a space after them is the dummy prefix, not text
    """

    def __init__(self, sp, vocab_size, device):
        n = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros((n,), dtype=np.int16)
        space = np.zeros((n,), dtype=np.bool_)
        boundary = np.ones((n,), dtype=np.bool_)
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
        self.base = torch.tensor(base, dtype=torch.int16, device=device)
        self.space = torch.tensor(space, dtype=torch.bool, device=device)
        self.boundary = torch.tensor(boundary, dtype=torch.bool, device=device)

    def count(self, prev, target):
        n = self.base[target].to(torch.int16)
        n = n + (self.space[target] & ~self.boundary[prev]).to(torch.int16)
        return n.to(torch.float64)


# -----------------------------------------------------------------------------
# shards
# -----------------------------------------------------------------------------

HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
SHARD_MAGIC = 20240520
SHARD_VERSION = 1


def shard_length(file):
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {file}")
    n = int(header[2])
    if Path(file).stat().st_size != HEADER_BYTES + 2 * n:
        raise ValueError(f"shard {file} has a wrong size")
    return n


def read_shard(file):
    n = shard_length(file)
    tokens = np.fromfile(file, dtype="<u2", count=n, offset=HEADER_BYTES)
    if tokens.size != n:
        raise ValueError(f"short read of {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


_memmaps = {}


def shard_memmap(file):
    mm = _memmaps.get(file)
    if mm is None:
        mm = np.memmap(file, mode="r", dtype="<u2", offset=HEADER_BYTES, shape=(shard_length(file),))
        _memmaps[file] = mm
    return mm


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no files for {pattern}")
    return torch.cat([read_shard(f) for f in files]).contiguous()


class ShuffledSequences:
    """
    Random training sequences.  Each rank owns every world_size-th shard, cuts each into sequences with a random
    phase, and draws without replacement, a shard with probability proportional to what is left in it.
    """

    def __init__(self, h, device):
        self.world_size = h.world_size
        self.seq_len = h.train_seq_len
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"no files for {h.train_files}")
        self.files = all_files[h.rank :: h.world_size] or all_files
        self.rng = np.random.Generator(np.random.PCG64([h.seed, h.rank]))
        self.lengths = [shard_length(f) for f in self.files]
        self.starts = [[] for _ in self.files]
        for i in range(len(self.files)):
            self._refill(i)

    def _refill(self, i):
        phase_max = min(self.seq_len - 1, max(0, self.lengths[i] - self.seq_len - 1))
        phase = int(self.rng.integers(phase_max + 1)) if phase_max > 0 else 0
        count = (self.lengths[i] - 1 - phase) // self.seq_len
        order = self.rng.permutation(count)
        self.starts[i] = (phase + order * self.seq_len).tolist()

    def next_batch(self, global_tokens, grad_accum_steps):
        seqs = global_tokens // (self.world_size * grad_accum_steps) // self.seq_len
        left = np.array([len(s) for s in self.starts], dtype=np.float64)
        x = torch.empty((seqs, self.seq_len), dtype=torch.int64)
        y = torch.empty((seqs, self.seq_len), dtype=torch.int64)
        for b in range(seqs):
            total = left.sum()
            if total <= 0:
                for i in range(len(self.files)):
                    self._refill(i)
                left = np.array([len(s) for s in self.starts], dtype=np.float64)
                total = left.sum()
            i = int(self.rng.choice(len(self.files), p=left / total))
            at = self.starts[i].pop()
            left[i] -= 1
            window = torch.from_numpy(np.array(shard_memmap(self.files[i])[at : at + self.seq_len + 1], dtype=np.int64))
            x[b] = window[:-1]
            y[b] = window[1:]
        x = x.pin_memory().to(self.device, non_blocking=True)
        y = y.pin_memory().to(self.device, non_blocking=True)
        return x, y


# -----------------------------------------------------------------------------
# model
# -----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    """fp32 master weight, computes in the dtype of its input."""

    def forward(self, x):
        w = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


class Rotary(nn.Module):
    """Tables are made once for the longest sequence, outside of any inference mode, so that TTT can use them too."""

    def __init__(self, rope_dims, base, max_len):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        t = torch.arange(max_len, dtype=torch.float32)
        freqs = torch.outer(t, inv_freq)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, seq_len, dtype):
        return self.cos[:, :seq_len].to(dtype), self.sin[:, :seq_len].to(dtype)


def apply_rotary(x, cos, sin, rope_dims):
    rot, keep = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    a, b = rot[..., :half], rot[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, keep), dim=-1)


class Attention(nn.Module):
    def __init__(self, h):
        super().__init__()
        dim = h.model_dim
        if dim % h.num_heads:
            raise ValueError("model_dim must be a multiple of num_heads")
        self.num_heads = h.num_heads
        self.num_kv_heads = h.num_kv_heads
        self.head_dim = dim // h.num_heads
        self.rope_dims = min(h.rope_dims, self.head_dim)
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj.zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, h.rope_base, max(h.train_seq_len, h.eval_seq_len))
        self.use_xsa = False

    def exclude_self(self, y, v):
        """XSA: remove from each head's output its component along the position's own value."""
        B, T, H, D = y.shape
        groups = H // v.size(-2)
        y_g = y.reshape(B, T, v.size(-2), groups, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        along = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - along).reshape(B, T, H, D)

    def forward(self, x):
        B, T, C = x.shape
        q = self.c_q(x).reshape(B, T, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(T, q.dtype)
        q = apply_rotary(q, cos, sin, self.rope_dims)
        k = apply_rotary(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        if HAVE_FA3:
            y = fa3_func(q, k, v, causal=True)
            if isinstance(y, tuple):
                y = y[0]
        else:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                is_causal=True,
                enable_gqa=self.num_kv_heads != self.num_heads,
            ).transpose(1, 2)
        if self.use_xsa:
            y = self.exclude_self(y, v)
        return self.proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, dim, mult):
        super().__init__()
        hidden = int(mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj.zero_init = True

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    """Sequential residual below `parallel_from`, from there on attention and MLP read the same input."""

    def __init__(self, h, index):
        super().__init__()
        dim = h.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = Attention(h)
        self.mlp = MLP(dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_factor = 1.0 / math.sqrt(index + 1) if h.ln_scale else 1.0
        self.parallel = index >= h.parallel_from

    def forward(self, x, x0):
        mix = self.resid_mix.to(x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        a = self.attn(self.attn_norm(x_in) * self.ln_factor)
        if self.parallel:
            m = self.mlp(self.mlp_norm(x_in) * self.ln_factor)
            return x_in + self.attn_scale.to(x.dtype) * a + self.mlp_scale.to(x.dtype) * m
        x = x_in + self.attn_scale.to(x.dtype)[None, None, :] * a
        m = self.mlp(self.mlp_norm(x) * self.ln_factor)
        return x + self.mlp_scale.to(x.dtype)[None, None, :] * m


class SmearGate(nn.Module):
    """x_t += gate(x_t) * x_{t-1}, not across the start of a document."""

    def __init__(self, width, bos_id):
        super().__init__()
        self.width = width
        self.bos_id = bos_id
        self.gate = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.scale = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x, ids):
        g = torch.sigmoid((x[:, 1:, : self.width] * self.gate.to(x.dtype)).sum(-1, keepdim=True))
        g = g * self.scale.to(x.dtype)
        inside = (ids[:, 1:] != self.bos_id).unsqueeze(-1).to(x.dtype)
        return torch.cat((x[:, :1], x[:, 1:] + inside * g * x[:, :-1]), dim=1)


class HashEmbed(nn.Module):
    """
    Bigram hash embedding, zero at the start of evaluation and learned only by test-time training.
    Looks at the current input token and the one before it, i.e. nothing that is still to be predicted.
    """

    def __init__(self, buckets, dim, bos_id):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.table = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.table.weight)

    def forward(self, ids):
        prev = F.pad(ids[:, :-1], (1, 0), value=self.bos_id)
        slot = (prev * 36313 + ids * 27191) % self.buckets
        return self.table(slot) * (ids != self.bos_id).unsqueeze(-1)


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.vocab_size = h.vocab_size
        self.logit_softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.smear_width, h.bos_id) if h.smear_gate else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        self.hash_embed = None
        for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
            self.blocks[i].attn.use_xsa = True

        # which block runs when, without and with recurrence
        plain = list(range(h.num_layers))
        looped = list(range(h.loop_start))
        for _ in range(h.num_loops + 1):
            looped += list(range(h.loop_start, h.loop_end + 1))
        looped += list(range(h.loop_end + 1, h.num_layers))
        self.order_plain = (plain[: len(plain) // 2], plain[len(plain) // 2 :])
        self.order_looped = (looped[: len(looped) // 2], looped[len(looped) // 2 :])
        self.looping = False
        n_skip = max(min(len(a), len(b)) for a, b in (self.order_plain, self.order_looped))
        self.skip_weights = nn.Parameter(torch.ones(n_skip, h.model_dim, dtype=torch.float32))
        self.skip_gate = nn.Parameter(torch.zeros(n_skip, h.model_dim, dtype=torch.float32)) if h.skip_gates else None
        self._init_weights(h)

    def _init_weights(self, h):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, ids):
        x = F.embedding(ids, self.tok_emb.weight.to(torch.bfloat16))
        if self.hash_embed is not None:
            x = x + self.hash_embed(ids).to(x.dtype)
        x = F.rms_norm(x, (x.size(-1),))
        if self.smear is not None:
            x = self.smear(x, ids)
        x0 = x
        first, second = self.order_looped if self.looping else self.order_plain
        skips = []
        for i in first:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for n, i in enumerate(second):
            if skips:
                s = self.skip_weights[n].to(x.dtype)[None, None, :] * skips.pop()
                if self.skip_gate is not None:
                    g = torch.sigmoid(self.skip_gate[n].to(x.dtype))[None, None, :]
                    x = torch.lerp(s, x, g)
                else:
                    x = x + s
            x = self.blocks[i](x, x0)
        return self.final_norm(x)

    def forward_logits(self, ids):
        logits = F.linear(self.hidden(ids), self.tok_emb.weight.to(torch.bfloat16))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, ids, targets):
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="mean")


# -----------------------------------------------------------------------------
# optimisers
# -----------------------------------------------------------------------------

CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gate", "smear")


@torch.compile
def newton_schulz5(G, steps=5, eps=1e-7):
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    tall = G.size(0) > G.size(1)
    if tall:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if tall else X


class Muon(torch.optim.Optimizer):
    """
    MuonEq-R: Nesterov momentum, every row brought to unit length, then Newton-Schulz.
    The matrices are dealt out to the ranks, each rank orthogonalises its own and the updates are summed.
    """

    def __init__(self, params, lr, momentum, backend_steps, row_norm=True, weight_decay=0.0):
        defaults = dict(
            lr=lr, momentum=momentum, backend_steps=backend_steps, row_norm=row_norm, weight_decay=weight_decay
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(g)
                    g = g.add(buf, alpha=group["momentum"])
                    if group["row_norm"]:
                        g = g / g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).to(g.dtype)
                    g = newton_schulz5(g, steps=group["backend_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                if group["weight_decay"] > 0.0:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


class OptimizerSet:
    """AdamW for the embedding and the small stuff, Muon for the matrices; one learning-rate factor for all."""

    def __init__(self, h, model):
        named = [(n, p) for n, p in model.named_parameters() if n != "tok_emb.weight"]
        matrix = [p for n, p in named if p.ndim == 2 and not any(c in n for c in CONTROL_NAMES)]
        scalar = [p for n, p in named if p.ndim != 2 or any(c in n for c in CONTROL_NAMES)]
        self.h = h
        self.embed = torch.optim.AdamW(
            [dict(params=[model.tok_emb.weight], lr=h.tied_embed_lr, base_lr=h.tied_embed_lr)],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            weight_decay=h.embed_wd,
            fused=True,
        )
        self.muon = Muon(
            matrix,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            row_norm=h.muon_row_norm,
            weight_decay=h.muon_wd,
        )
        for group in self.muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.scalar = torch.optim.AdamW(
            [dict(params=scalar, lr=h.scalar_lr, base_lr=h.scalar_lr)],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            weight_decay=h.adam_wd,
            fused=True,
        )
        self.all = [self.embed, self.muon, self.scalar]

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def step(self, lr_factor, step):
        frac = min(step / self.h.muon_momentum_steps, 1.0) if self.h.muon_momentum_steps > 0 else 1.0
        momentum = (1.0 - frac) * self.h.muon_momentum_start + frac * self.h.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_factor
            opt.step()
        self.zero_grad()


class WeightAverage:
    """Exponential moving average of everything in the state dict, in fp32."""

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for n, t in model.state_dict().items():
            self.shadow[n].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model):
        own = model.state_dict()
        model.load_state_dict({n: t.to(own[n].dtype) for n, t in self.shadow.items()}, strict=True)


# -----------------------------------------------------------------------------
# quantisation
# -----------------------------------------------------------------------------


def quantised_names(model):
    """name -> 'matrix' | 'embed'; whatever is not in here travels as fp16."""
    kinds = {}
    for n, t in model.state_dict().items():
        if n == "tok_emb.weight":
            kinds[n] = "embed"
        elif t.ndim == 2 and t.numel() > 65536 and n.startswith("blocks."):
            kinds[n] = "matrix"
    return kinds


@torch.no_grad()
def collect_hessians(h, model, loader, clock, device):
    """
    X^T X of the inputs of every quantised linear, on training batches.  Still on the training clock: whatever the
    reserve, it stops when the 600 s are up, on all ranks at once.
    """
    sums = {}
    hooks = []

    def make_hook(name):
        def hook(module, args, output):
            x = args[0].detach().reshape(-1, args[0].size(-1)).float()
            if name not in sums:
                sums[name] = torch.zeros(x.size(1), x.size(1), dtype=torch.float32, device=device)
            sums[name].addmm_(x.T, x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
            hooks.append(module.register_forward_hook(make_hook(name + ".weight")))
    model.eval()
    done = 0
    cap_ms = 1000.0 * h.max_wallclock_seconds - 1500.0
    while done < h.gptq_batches:
        if done > 0 and sync_max(clock.read(), device) >= cap_ms:
            break
        x, _ = loader.next_batch(h.world_size * 8 * h.train_seq_len, 1)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.forward_logits(x)
        done += 1
    for hook in hooks:
        hook.remove()
    for name in sorted(sums):
        sync_sum(sums[name])
        sums[name] /= done * h.world_size
    return sums, done


def row_scale(w, sigmas, qmax):
    """Clip at so many standard deviations of the row; one fp16 scale per row."""
    std = w.float().std(dim=1, keepdim=True)
    return (sigmas * std / qmax).clamp_min(1e-7).to(torch.float16)


def round_plain(w, bits, sigmas):
    qmax = 2 ** (bits - 1) - 1
    scale = row_scale(w, sigmas, qmax)
    q = torch.clamp(torch.round(w.float() / scale.float()), -qmax, qmax)
    return q.to(torch.int8), scale


def round_gptq(w, hessian, bits, sigmas, damp, block):
    """GPTQ with the columns in order of falling Hessian diagonal."""
    qmax = 2 ** (bits - 1) - 1
    W = w.float().clone()
    rows, cols = W.shape
    H = hessian.float().clone()
    diag = torch.diagonal(H)
    dead = diag == 0
    diag[dead] = 1.0
    W[:, dead] = 0.0
    diag += damp * diag.mean()
    order = torch.argsort(diag, descending=True)
    back = torch.argsort(order)
    W = W[:, order]
    H = H[order][:, order]
    inv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    inv = torch.linalg.cholesky(inv, upper=True)
    scale = row_scale(w, sigmas, qmax)
    s = scale.float().squeeze(1)
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W.device)
    for b0 in range(0, cols, block):
        b1 = min(b0 + block, cols)
        Wb = W[:, b0:b1].clone()
        Eb = torch.zeros_like(Wb)
        inv_b = inv[b0:b1, b0:b1]
        for j in range(b1 - b0):
            col = Wb[:, j]
            q = torch.clamp(torch.round(col / s), -qmax, qmax)
            Q[:, b0 + j] = q.to(torch.int8)
            err = (col - q * s) / inv_b[j, j]
            Eb[:, j] = err
            Wb[:, j:] -= err.unsqueeze(1) * inv_b[j, j:].unsqueeze(0)
        W[:, b1:] -= Eb @ inv[b0:b1, b1:]
    return Q[:, back].contiguous(), scale


def quantise_state(h, model, hessians):
    kinds = quantised_names(model)
    tensors, meta = {}, {}
    for name, t in model.state_dict().items():
        t = t.detach()
        kind = kinds.get(name)
        if kind is None:
            tensors[name] = t.to(torch.float16).cpu() if t.is_floating_point() else t.cpu()
            meta[name] = "fp16"
            continue
        if kind == "embed":
            q, scale = round_plain(t, h.embed_bits, h.embed_clip_sigmas)
            meta[name] = f"int{h.embed_bits}"
        elif name in hessians:
            q, scale = round_gptq(
                t, hessians[name], h.matrix_bits, h.matrix_clip_sigmas, h.gptq_damp, h.gptq_block
            )
            meta[name] = f"gptq int{h.matrix_bits}"
        else:
            q, scale = round_plain(t, h.matrix_bits, h.matrix_clip_sigmas)
            meta[name] = f"int{h.matrix_bits}"
        tensors[name + ".q"] = q.cpu()
        tensors[name + ".scale"] = scale.cpu()
    by_kind = collections.Counter(meta.values())
    log("quantised: " + ", ".join(f"{k} x{n}" for k, n in sorted(by_kind.items())))
    return dict(tensors=tensors, meta=meta)


def dequantise_state(packed, template):
    out = {}
    tensors, meta = packed["tensors"], packed["meta"]
    for name, like in template.items():
        if meta[name] == "fp16":
            out[name] = tensors[name].to(like.dtype)
        else:
            q, scale = tensors[name + ".q"], tensors[name + ".scale"]
            out[name] = (q.float() * scale.float()).to(like.dtype)
    return out


# -----------------------------------------------------------------------------
# compression
# -----------------------------------------------------------------------------

SHUFFLE_MAGIC = b"EDY1"


def byte_shuffle(raw, stride=2):
    a = np.frombuffer(raw, dtype=np.uint8)
    return b"".join(a[k::stride].tobytes() for k in range(stride))


def byte_unshuffle(raw, stride=2):
    a = np.frombuffer(raw, dtype=np.uint8)
    out = np.empty(a.size, dtype=np.uint8)
    at = 0
    for k in range(stride):
        n = (a.size - k + stride - 1) // stride
        out[k::stride] = a[at : at + n]
        at += n
    return out.tobytes()


def pack_artifact(packed):
    buf = io.BytesIO()
    torch.save(packed, buf)
    return SHUFFLE_MAGIC + brotli.compress(byte_shuffle(buf.getvalue()), quality=11, lgwin=24)


def unpack_artifact(blob):
    if blob[:4] != SHUFFLE_MAGIC:
        raise ValueError("not an artifact of ours")
    raw = byte_unshuffle(brotli.decompress(blob[4:]))
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def code_size():
    return len(Path(__file__).read_bytes())


def write_artifact(h, model, hessians):
    packed = quantise_state(h, model, hessians)
    model_bytes = 0
    if h.is_main:
        torch.save(model.state_dict(), h.model_path)
        log(f"Serialized model raw: {os.path.getsize(h.model_path)} bytes")
        blob = pack_artifact(packed)
        with open(h.artifact_path, "wb") as f:
            f.write(blob)
        model_bytes = len(blob)
        code_bytes = code_size()
        total = model_bytes + code_bytes
        log(f"Serialized model int6+brotli: {model_bytes} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size: {total} bytes")
        if total > h.size_limit:
            raise SystemExit(f"over the limit: {total} > {h.size_limit}")
    if h.distributed:
        dist.barrier()
    return model_bytes


def read_artifact(h, device):
    """A fresh model with nothing in it but what stands in the file."""
    model = GPT(h).to(device)
    with open(h.artifact_path, "rb") as f:
        packed = unpack_artifact(f.read())
    model.load_state_dict(dequantise_state(packed, model.state_dict()), strict=True)
    model.looping = h.num_loops > 0
    model.eval()
    return model


# -----------------------------------------------------------------------------
# evaluation
# -----------------------------------------------------------------------------


class ValData:
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"tokenizer has {self.sp.vocab_size()} pieces, VOCAB_SIZE={h.vocab_size}")
        self.tokens = load_validation_tokens(h.val_files).to(torch.int64)
        self.total = self.tokens.numel() - 1  # number of targets
        self.tables = ByteTables(self.sp, h.vocab_size, device)
        log(f"val tokens: {self.total} targets of {h.val_files}")


class Tally:
    """Loss, targets and bytes of what this rank scored; read() sums over the ranks."""

    def __init__(self, device):
        self.loss = torch.zeros((), device=device, dtype=torch.float64)
        self.count = torch.zeros((), device=device, dtype=torch.float64)
        self.bytes = torch.zeros((), device=device, dtype=torch.float64)

    def add(self, nll, prev, target, tables):
        self.loss += nll.to(torch.float64).sum()
        self.count += float(target.numel())
        self.bytes += tables.count(prev, target).sum()

    def read(self):
        loss, count, nbytes = self.loss.clone(), self.count.clone(), self.bytes.clone()
        sync_sum(loss, count, nbytes)
        val_loss = (loss / count).item()
        val_bpb = (loss / math.log(2.0) / nbytes).item()
        return val_loss, val_bpb, int(count.item())


@torch.no_grad()
def eval_plain(h, val, model, device):
    """Back to back sequences, no shared context: quick and pessimistic, for the log during training."""
    was_training = model.training
    model.eval()
    tally = Tally(device)
    seq = h.eval_seq_len
    n_seqs = (val.total + seq - 1) // seq
    first = n_seqs * h.rank // h.world_size
    last = n_seqs * (h.rank + 1) // h.world_size
    for s0 in range(first, last, h.val_batch_seqs):
        s1 = min(s0 + h.val_batch_seqs, last)
        a, b = s0 * seq, min(s1 * seq, val.total)
        chunk = val.tokens[a : b + 1].to(device, non_blocking=True)
        full = (b - a) // seq
        parts = []
        if full:
            parts.append((chunk[: full * seq].view(full, seq), chunk[1 : full * seq + 1].view(full, seq)))
        if full * seq < b - a:
            parts.append((chunk[full * seq : -1].unsqueeze(0), chunk[full * seq + 1 :].unsqueeze(0)))
        for x, y in parts:
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(x)
            nll = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none")
            tally.add(nll, x.flatten(), y.flatten(), val.tables)
    model.train(was_training)
    return tally.read()


def make_windows(total, seq, stride):
    """
    (start, end, first scored position) of every window.  The first scores all it sees, each later one only the
    targets that lie behind its seq - stride tokens of context, so that each target belongs to one window.
    """
    context = seq - stride
    windows = []
    for ws in range(0, total, stride):
        if ws > 0 and ws + context >= total:
            break
        windows.append((ws, min(ws + seq, total), 0 if ws == 0 else context))
    return windows


class CountMixer:
    """
    Dense bigram counts of what has already been scored, mixed with the network as a Dirichlet prior:
        p(a | prev) = (c[prev, a] + alpha * p_net(a)) / (sum_a c[prev, a] + alpha)
    for all a of the vocabulary, so it sums to one.
    """

    def __init__(self, vocab_size, alpha, device):
        self.alpha = alpha
        self.counts = torch.zeros(vocab_size, vocab_size, dtype=torch.int32, device=device)
        self.row_total = torch.zeros(vocab_size, dtype=torch.int64, device=device)

    def log_probs(self, logits, prev):
        p = torch.softmax(logits.float(), dim=-1)
        c = self.counts[prev].float()
        mixed = (c + self.alpha * p) / (self.row_total[prev].float().unsqueeze(-1) + self.alpha)
        return torch.log(mixed)

    def absorb(self, tokens):
        """tokens: a scored stretch with the one before it in front."""
        prev, nxt = tokens[:-1], tokens[1:]
        flat = self.counts.view(-1)
        flat.index_add_(0, prev * self.counts.size(1) + nxt, torch.ones_like(prev, dtype=torch.int32))
        self.row_total.index_add_(0, prev, torch.ones_like(prev))


@torch.no_grad()
def score_windows(h, val, logits_fn, windows, tally, device, mixer=None):
    """Scores this rank's windows with the weights as they are."""
    seq = h.eval_seq_len
    for b0 in range(0, len(windows), h.eval_batch_seqs):
        batch = windows[b0 : b0 + h.eval_batch_seqs]
        x = torch.zeros(h.eval_batch_seqs, seq, dtype=torch.int64)
        y = torch.zeros(h.eval_batch_seqs, seq, dtype=torch.int64)
        for i, (ws, we, _) in enumerate(batch):
            x[i, : we - ws] = val.tokens[ws:we]
            y[i, : we - ws] = val.tokens[ws + 1 : we + 1]
        x = x.to(device, non_blocking=True)
        y = y.to(device, non_blocking=True)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x)
        for i, (ws, we, s) in enumerate(batch):
            n = we - ws
            prev, target = x[i, s:n], y[i, s:n]
            row = logits[i, s:n].float()
            if mixer is not None:
                nll = F.nll_loss(mixer.log_probs(row, prev), target, reduction="none")
            else:
                nll = F.cross_entropy(row, target, reduction="none")
            tally.add(nll, prev, target, val.tables)


def eval_sliding(h, val, model, logits_fn, device):
    """Sliding window with frozen weights."""
    windows = make_windows(val.total, h.eval_seq_len, h.eval_stride)
    first = len(windows) * h.rank // h.world_size
    last = len(windows) * (h.rank + 1) // h.world_size
    tally = Tally(device)
    model.eval()
    score_windows(h, val, logits_fn, windows[first:last], tally, device)
    return tally.read()


def ttt_parameters(h, model):
    """All weights at the base rate, the hash table faster."""
    hash_params = list(model.hash_embed.parameters()) if model.hash_embed is not None else []
    ids = {id(p) for p in hash_params}
    base = [p for p in model.parameters() if id(p) not in ids]
    groups = [dict(params=base, lr=h.ttt_lr, mult=1.0)]
    if hash_params:
        groups.append(dict(params=hash_params, lr=h.ttt_lr * h.ttt_hash_lr_mult, mult=h.ttt_hash_lr_mult))
    return groups


def ttt_train_chunk(h, val, model, loss_fn, optimizer, params, start, end, lr, device):
    """
    `ttt_epochs` passes of SGD over targets start+1 .. end, in whole sequences; called when they have all been scored.
    Sequences go to the ranks in turn, gradients are averaged over the global batch.
    """
    seq = h.eval_seq_len
    n_seqs = (end - start) // seq
    if n_seqs == 0:
        return
    for group in optimizer.param_groups:
        group["lr"] = lr * group["mult"]
    model.train()
    per_step = h.ttt_batch_seqs * h.world_size
    for _ in range(h.ttt_epochs):
        for g0 in range(0, n_seqs, per_step):
            g1 = min(g0 + per_step, n_seqs)
            mine = list(range(g0 + h.rank, g1, h.world_size))
            optimizer.zero_grad(set_to_none=False)
            for k in mine:
                a = start + k * seq
                chunk = val.tokens[a : a + seq + 1].to(device, non_blocking=True)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = loss_fn(chunk[:-1].unsqueeze(0), chunk[1:].unsqueeze(0))
                (loss / (g1 - g0)).backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                sync_sum(p.grad)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            optimizer.step()
    model.eval()


def eval_ttt(h, val, model, logits_fn, loss_fn, device):
    """
    Score-first test-time training.  The stream is cut into chunks of ttt_chunk_tokens; a window belongs to the chunk
    of its first scored target.  Chunk by chunk: score its windows, add them to the tally for good, then train on it.
    """
    if h.ttt_chunk_tokens % h.eval_stride or h.eval_seq_len % h.eval_stride or h.ttt_chunk_tokens < h.eval_seq_len:
        raise ValueError("ttt_chunk_tokens and eval_seq_len must be multiples of eval_stride, a chunk at least a sequence")
    windows = make_windows(val.total, h.eval_seq_len, h.eval_stride)
    n_chunks = (val.total + h.ttt_chunk_tokens - 1) // h.ttt_chunk_tokens
    by_chunk = [[] for _ in range(n_chunks)]
    for w in windows:
        by_chunk[(w[0] + w[2]) // h.ttt_chunk_tokens].append(w)

    groups = ttt_parameters(h, model)
    params = [p for g in groups for p in g["params"]]
    for p in params:
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(groups, lr=h.ttt_lr, momentum=h.ttt_momentum)
    mixer = CountMixer(h.vocab_size, h.mix_alpha, device) if h.mix_enabled else None
    tally = Tally(device)
    model.eval()
    t0 = time.perf_counter()
    for ci in range(n_chunks):
        start = ci * h.ttt_chunk_tokens
        end = min(start + h.ttt_chunk_tokens, val.total)
        mine = by_chunk[ci]
        first = len(mine) * h.rank // h.world_size
        last = len(mine) * (h.rank + 1) // h.world_size
        score_windows(h, val, logits_fn, mine[first:last], tally, device, mixer)
        if mixer is not None:
            mixer.absorb(val.tokens[start : end + 1].to(device))
        if ci < n_chunks - 1:
            lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(1, n_chunks - 1)))
            ttt_train_chunk(h, val, model, loss_fn, optimizer, params, start, end, lr, device)
        if h.is_main and (ci % 100 == 0 or ci == n_chunks - 1):
            so_far = (tally.loss / tally.count.clamp_min(1)).item()
            log(f"  ttt chunk {ci + 1}/{n_chunks} loss(rank 0):{so_far:.5f} {time.perf_counter() - t0:.1f}s")
    return tally.read()


def timed_eval(label, fn, *args):
    """Runs one evaluation, prints it, returns (loss, bpb, seconds)."""
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb, count = fn(*args)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - t0
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} targets:{count} eval_time:{1000 * seconds:.0f}ms")
    return val_loss, val_bpb, seconds


# -----------------------------------------------------------------------------
# training
# -----------------------------------------------------------------------------


class Schedule:
    """Everything is a function of the fraction of the wall clock that is used up."""

    def __init__(self, h):
        self.h = h
        self.budget_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)

    def frac(self, step, elapsed_ms):
        return max(step / max(self.h.iterations, 1), elapsed_ms / max(self.budget_ms, 1e-9))

    def lr(self, frac):
        if self.h.warmdown_frac <= 0:
            return 1.0
        if frac < 1.0 - self.h.warmdown_frac:
            return 1.0
        return max((1.0 - frac) / self.h.warmdown_frac, self.h.min_lr)


def train_step(h, model, optimizers, loader, lr_factor, step):
    device = loader.device
    total = torch.zeros((), device=device)
    for micro in range(h.grad_accum_steps):
        if h.distributed:
            model.require_backward_grad_sync = micro == h.grad_accum_steps - 1
        x, y = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        total += loss.detach()
        (loss / h.grad_accum_steps).backward()
    if h.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), h.grad_clip_norm)
    optimizers.step(lr_factor, step)
    return total / h.grad_accum_steps


def warm_up(h, base_model, model, optimizers, loader):
    """Compile both depths before the clock starts, on training batches, then put every weight and state back."""
    weights = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
    states = [copy.deepcopy(opt.state_dict()) for opt in optimizers.all]
    model.train()
    for looping in (False, True) if h.num_loops > 0 else (False,):
        base_model.looping = looping
        for step in range(h.warmup_steps):
            train_step(h, model, optimizers, loader, 1.0, step)
    base_model.looping = False
    base_model.load_state_dict(weights, strict=True)
    for opt, state in zip(optimizers.all, states, strict=True):
        opt.load_state_dict(state)
    optimizers.zero_grad()
    log(f"warm-up: {h.warmup_steps} steps at each depth, weights restored")


def train(h, val, device):
    """Returns the averaged model and its Hessians, everything within max_wallclock_seconds."""
    base_model = GPT(h).to(device).float()
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[h.local_rank], broadcast_buffers=False) if h.distributed else compiled
    log(f"model_params: {sum(p.numel() for p in base_model.parameters())}")
    optimizers = OptimizerSet(h, base_model)
    schedule = Schedule(h)
    if h.warmup_steps > 0:
        warm_up(h, base_model, model, optimizers, ShuffledSequences(h, device))
    loader = ShuffledSequences(h, device)
    ema = WeightAverage(base_model, h.ema_decay)
    model.train()

    clock = Clock()
    clock.start()
    step = 0
    while True:
        stop = step >= h.iterations or sync_max(clock.read(), device) >= schedule.budget_ms
        if stop or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
            clock.stop()
            val_loss, val_bpb, _ = eval_plain(h, val, base_model, device)
            log(f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{clock.total:.0f}ms")
            clock.start()
        if stop:
            break
        frac = schedule.frac(step, sync_max(clock.read(), device))
        if h.num_loops > 0 and not base_model.looping and frac >= h.enable_looping_at:
            base_model.looping = True
            log(f"recurrence on at step {step}, order {base_model.order_looped}")
        loss = train_step(h, model, optimizers, loader, schedule.lr(frac), step)
        ema.update(base_model)
        step += 1
        if step <= 5 or step % h.train_log_every == 0:
            ms = clock.read()
            log(f"step:{step}/{h.iterations} train_loss:{loss.item():.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")
    log(f"peak memory: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    ema.copy_to(base_model)
    before = clock.read()
    hessians, batches = collect_hessians(h, base_model, loader, clock, device)
    clock.stop()
    log(f"gptq: {batches} training batches in {clock.total - before:.0f}ms, train+calibration {clock.total:.0f}ms")
    return base_model, hessians


# -----------------------------------------------------------------------------
# main
# -----------------------------------------------------------------------------


def set_seeds(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def warm_up_eval(h, model, logits_fn, loss_fn, device):
    """Compiles the evaluation graphs on random ids; leaves no gradient behind."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, h.vocab_size, (h.eval_batch_seqs, h.eval_seq_len), generator=g).to(device)
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        logits_fn(ids)
    if h.ttt_enabled:
        model.train()
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss_fn(ids[:1], ids[:1].roll(-1, 1)).backward()
        model.zero_grad(set_to_none=True)
        model.eval()


def evaluate(h, val, device):
    """Everything that is reported comes from the artifact as read back from disk."""
    t_start = time.perf_counter()
    model = read_artifact(h, device)
    if h.ttt_enabled and h.ttt_hash_embed:
        model.hash_embed = HashEmbed(h.ttt_hash_buckets, h.model_dim, h.bos_id).to(device)
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    loss_fn = torch.compile(model.forward, dynamic=False, fullgraph=True)
    warm_up_eval(h, model, logits_fn, loss_fn, device)

    final = timed_eval("roundtrip", eval_plain, h, val, model, device)
    if h.sliding_enabled:
        final = timed_eval("sliding", eval_sliding, h, val, model, logits_fn, device)
    if h.ttt_enabled:
        final = timed_eval("score_first_ttt", eval_ttt, h, val, model, logits_fn, loss_fn, device)
    val_loss, val_bpb, _ = final
    log(f"evaluation took {time.perf_counter() - t_start:.1f}s")
    log(f"final_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    return val_loss, val_bpb


def setup(h):
    if not torch.cuda.is_available():
        raise RuntimeError("needs CUDA")
    if 8 % h.world_size:
        raise ValueError("world size must divide 8")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device, timeout=datetime.timedelta(minutes=20))
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 32
    return device


def main():
    h = Hyper
    device = setup(h)
    if h.is_main:
        os.makedirs("logs", exist_ok=True)
        set_logfile(f"logs/{h.run_id}.txt")
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"python {sys.version.split()[0]} torch {torch.__version__} fa3 {HAVE_FA3} world_size {h.world_size}")
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    log(smi, console=False)
    log_settings(h)
    set_seeds(h.seed)
    val = ValData(h, device)

    model, hessians = train(h, val, device)
    write_artifact(h, model, hessians)
    del model, hessians
    torch.cuda.empty_cache()
    torch._dynamo.reset()

    evaluate(h, val, device)
    if h.distributed:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
