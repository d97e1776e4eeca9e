import collections
import glob
import io
import math
import os
import random
import re
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
from flash_attn_interface import flash_attn_func as flash_attn_3_func
from torch import nn


# ---------------------------------------------------------------------------
# hyperparameters
# ---------------------------------------------------------------------------


def _int(name, default):
    return int(os.environ.get(name, default))


def _float(name, default):
    return float(os.environ.get(name, default))


def _flag(name, default):
    return bool(int(os.environ.get(name, default)))


class Hyperparameters:
    # data
    vocab_size = _int("VOCAB_SIZE", 8192)
    data_dir = os.environ.get("DATA_DIR", "./data/")
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    seed = _int("SEED", 1337)
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))

    # schedule
    iterations = _int("ITERATIONS", 20000)
    warmup_steps = _int("WARMUP_STEPS", 20)
    warmdown_frac = _float("WARMDOWN_FRAC", 0.72)
    min_lr = _float("MIN_LR", 0.0)
    train_batch_tokens = _int("TRAIN_BATCH_TOKENS", 2048 * 48 * 8)
    train_seq_len = _int("TRAIN_SEQ_LEN", 2048)
    train_log_every = _int("TRAIN_LOG_EVERY", 500)
    val_loss_every = _int("VAL_LOSS_EVERY", 4000)
    max_wallclock_seconds = _float("MAX_WALLCLOCK_SECONDS", 600.0)
    quant_reserve_seconds = _float("QUANT_RESERVE_SECONDS", 24.0)

    # model
    num_layers = _int("NUM_LAYERS", 11)
    model_dim = _int("MODEL_DIM", 512)
    num_heads = _int("NUM_HEADS", 8)
    num_kv_heads = _int("NUM_KV_HEADS", 4)
    mlp_mult = _float("MLP_MULT", 4.0)
    xsa_last_n = _int("XSA_LAST_N", 11)
    rope_base = _float("ROPE_BASE", 10000.0)
    rope_dims = _int("ROPE_DIMS", 16)
    logit_softcap = _float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = _float("QK_GAIN_INIT", 5.25)
    embed_init_std = _float("EMBED_INIT_STD", 0.005)
    ln_scale = _flag("LN_SCALE", 1)
    skip_gates = _flag("SKIP_GATES", 1)
    loop_start = _int("LOOP_START", 3)
    loop_end = _int("LOOP_END", 5)
    num_loops = _int("NUM_LOOPS", 2)
    enable_looping_at = _float("ENABLE_LOOPING_AT", 0.35)
    parallel_from = _int("PARALLEL_FROM", 7)
    hash_buckets = _int("HASH_BUCKETS", 6144)
    hash_dim = _int("HASH_DIM", 96)
    bos_id = _int("BOS_ID", 1)

    # optimiser
    embed_lr = _float("EMBED_LR", 0.6)
    tied_embed_lr = _float("TIED_EMBED_LR", 0.03)
    hash_lr = _float("HASH_LR", 0.03)
    matrix_lr = _float("MATRIX_LR", 0.022)
    scalar_lr = _float("SCALAR_LR", 0.02)
    muon_momentum = _float("MUON_MOMENTUM", 0.99)
    muon_momentum_start = _float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_warmup = _int("MUON_MOMENTUM_WARMUP", 1500)
    muon_backend_steps = _int("MUON_BACKEND_STEPS", 5)
    muon_row_normalize = _flag("MUON_ROW_NORMALIZE", 1)
    muon_wd = _float("MUON_WD", 0.095)
    embed_wd = _float("EMBED_WD", 0.085)
    adam_wd = _float("ADAM_WD", 0.02)
    beta1 = _float("BETA1", 0.9)
    beta2 = _float("BETA2", 0.95)
    adam_eps = _float("ADAM_EPS", 1e-8)
    grad_clip_norm = _float("GRAD_CLIP_NORM", 0.3)
    ema_decay = _float("EMA_DECAY", 0.9965)

    # quantisation
    matrix_bits = _int("MATRIX_BITS", 6)
    embed_bits = _int("EMBED_BITS", 8)
    matrix_clip_sigmas = _float("MATRIX_CLIP_SIGMAS", 12.85)
    embed_clip_sigmas = _float("EMBED_CLIP_SIGMAS", 20.0)
    calib_batches = _int("CALIB_BATCHES", 64)
    calib_rows = _int("CALIB_ROWS", 8)
    gptq_block = _int("GPTQ_BLOCK", 128)
    gptq_damp = _float("GPTQ_DAMP", 0.01)
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit = 16_000_000

    # evaluation
    eval_seq_len = _int("EVAL_SEQ_LEN", 2048)
    eval_stride = _int("EVAL_STRIDE", 64)
    eval_batch_windows = _int("EVAL_BATCH_WINDOWS", 32)
    eval_val_rows = _int("EVAL_VAL_ROWS", 32)
    eval_budget_seconds = _float("EVAL_BUDGET_SECONDS", 570.0)
    sliding_window_enabled = _flag("SLIDING_WINDOW_ENABLED", 1)
    ttt_enabled = _flag("TTT_ENABLED", 1)
    ttt_lr = _float("TTT_LR", 0.005)
    ttt_momentum = _float("TTT_MOMENTUM", 0.9)
    ttt_epochs = _int("TTT_EPOCHS", 3)
    ttt_chunk_tokens = _int("TTT_CHUNK_TOKENS", 32768)
    ttt_rows = _int("TTT_ROWS", 2)
    ttt_grad_clip = _float("TTT_GRAD_CLIP", 1.0)
    ttt_freeze_blocks = _int("TTT_FREEZE_BLOCKS", 0)

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = _int("RANK", 0)
    world_size = _int("WORLD_SIZE", 1)
    local_rank = _int("LOCAL_RANK", 0)
    grad_accum_steps = 8 // world_size
    logfile = f"logs/{run_id}.txt"


CONTROL_NAMES = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "skip_gates",
    "hash_gain",
)


# ---------------------------------------------------------------------------
# rank-0 logger
# ---------------------------------------------------------------------------


class RankZeroLogger:
    """Prints and appends to the log file, on rank 0 only."""

    def __init__(self):
        self.path = None
        self.active = True

    def open(self, h):
        self.active = h.rank == 0
        if self.active:
            os.makedirs(os.path.dirname(h.logfile), exist_ok=True)
            self.path = h.logfile

    def __call__(self, msg, console=True):
        if not self.active:
            return
        if console:
            print(msg, flush=True)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as f:
                print(msg, file=f)


log = RankZeroLogger()


# ---------------------------------------------------------------------------
# shards
# ---------------------------------------------------------------------------

HEADER_INTS = 256
SHARD_MAGIC = 20240520


def shard_length(path):
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header in {path}")
    return int(header[2])


def load_data_shard(path):
    count = shard_length(path)
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"short read for {path}")
    return torch.from_numpy(tokens.astype(np.int32, copy=False))


def map_shard(path):
    count = shard_length(path)
    return np.memmap(path, mode="r", dtype="<u2", offset=HEADER_INTS * 4, shape=(count,))


def list_shards(pattern):
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no files match {pattern}")
    return files


# ---------------------------------------------------------------------------
# validation data and byte tables
# ---------------------------------------------------------------------------


def build_byte_luts(sp, vocab_size, device):
    """Bytes of each piece without its leading space, whether it has one, and whether it is no text at all."""
    size = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros((size,), dtype=np.int16)
    leading_space = np.zeros((size,), dtype=np.bool_)
    boundary = np.ones((size,), dtype=np.bool_)
    for token_id in range(int(sp.vocab_size())):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        boundary[token_id] = False
        if sp.is_byte(token_id):
            base_bytes[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("\u2581"):
            leading_space[token_id] = True
            piece = piece[1:]
        base_bytes[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(leading_space, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


class ValidationData:
    """The validation stream and what is needed to count its bytes."""

    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"tokenizer has {int(self.sp.vocab_size())} pieces, VOCAB_SIZE={h.vocab_size}")
        self.files = list_shards(h.val_files)
        self.tokens = torch.cat([load_data_shard(path) for path in self.files]).to(device)
        self.base_bytes, self.leading_space, self.boundary = build_byte_luts(self.sp, h.vocab_size, device)

    @property
    def num_targets(self):
        return self.tokens.numel() - 1

    def span(self, start, stop):
        """Inputs and targets of positions start..stop-1."""
        piece = self.tokens[start : stop + 1].to(torch.int64)
        return piece[:-1], piece[1:]

    def byte_count(self, prev_ids, target_ids):
        n = self.base_bytes[target_ids].to(torch.int32)
        n = n + (self.leading_space[target_ids] & ~self.boundary[prev_ids]).to(torch.int32)
        return n.to(torch.float64).sum()


class Tally:
    """Nats, tokens and bytes of the scored positions; reduced over the ranks once."""

    def __init__(self, val, device):
        self.val = val
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll, prev_ids, target_ids):
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += float(target_ids.numel())
        self.sums[2] += self.val.byte_count(prev_ids, target_ids)

    def reduce(self):
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums, op=dist.ReduceOp.SUM)
        return self

    @property
    def tokens(self):
        return int(self.sums[1].item())

    def result(self):
        nats, tokens, num_bytes = (float(v) for v in self.sums.tolist())
        val_loss = nats / tokens
        val_bpb = nats / math.log(2.0) / num_bytes
        return val_loss, val_bpb


# ---------------------------------------------------------------------------
# training batches
# ---------------------------------------------------------------------------


class ShuffledSequenceLoader:
    """Sequences of the train shards in random order; every rank has its own shards."""

    def __init__(self, h, device, seed_offset=0):
        self.h = h
        self.device = device
        self.seq_len = h.train_seq_len
        self.files = list_shards(h.train_files)
        self.maps = {}
        self.rng = np.random.Generator(np.random.PCG64([h.seed + seed_offset, h.rank]))
        self.slots = collections.deque()
        self.epoch = 0

    def _open(self, index):
        if index not in self.maps:
            self.maps[index] = map_shard(self.files[index])
        return self.maps[index]

    def _refill(self):
        own = list(range(self.h.rank, len(self.files), self.h.world_size))
        if not own:
            own = [self.h.rank % len(self.files)]
        order = self.rng.permutation(len(own))
        take = [own[int(k)] for k in order]
        pool = []
        for index in take:
            tokens = self._open(index)
            phase = int(self.rng.integers(0, self.seq_len))
            count = (len(tokens) - 1 - phase) // self.seq_len
            pool.extend((index, phase + k * self.seq_len) for k in range(count))
        for k in self.rng.permutation(len(pool)):
            self.slots.append(pool[int(k)])
        self.epoch += 1

    def next_rows(self, rows):
        x = torch.empty((rows, self.seq_len), dtype=torch.int64)
        y = torch.empty((rows, self.seq_len), dtype=torch.int64)
        for row in range(rows):
            if not self.slots:
                self._refill()
            index, start = self.slots.popleft()
            window = self._open(index)[start : start + self.seq_len + 1].astype(np.int64)
            window = torch.from_numpy(window)
            x[row] = window[:-1]
            y[row] = window[1:]
        return (
            x.pin_memory().to(self.device, non_blocking=True),
            y.pin_memory().to(self.device, non_blocking=True),
        )

    def next_batch(self):
        h = self.h
        rows = h.train_batch_tokens // (h.world_size * h.grad_accum_steps * h.train_seq_len)
        return self.next_rows(rows)


# ---------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None)


class Rotary(nn.Module):
    """Partial rotary embedding; the tables are kept for one length and rebuilt when it changes."""

    def __init__(self, rope_dims, base):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.cached_len = 0
        self.cos = None
        self.sin = None

    def forward(self, seq_len, device, dtype):
        if self.cos is None or self.cached_len != seq_len or self.cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=torch.float32)
            angles = torch.outer(t, self.inv_freq.to(device))
            self.cos = angles.cos()[None, :, None, :]
            self.sin = angles.sin()[None, :, None, :]
            self.cached_len = seq_len
        return self.cos.to(dtype), self.sin.to(dtype)


def rotate(x, cos, sin, dims):
    x_rope, x_pass = x[..., :dims], x[..., dims:]
    half = dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h, use_xsa):
        super().__init__()
        if h.model_dim % h.num_heads or h.num_heads % h.num_kv_heads:
            raise ValueError("model_dim, num_heads and num_kv_heads do not divide")
        self.num_heads = h.num_heads
        self.num_kv_heads = h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rope_dims = h.rope_dims
        self.rotary = Rotary(h.rope_dims, h.rope_base)
        self.use_xsa = use_xsa

    def _drop_self(self, y, v):
        """Removes from each head's output its part along the own value vector."""
        b, t, heads, d = y.shape
        group = heads // v.size(2)
        grouped = y.reshape(b, t, v.size(2), group, d)
        unit = F.normalize(v, dim=-1).unsqueeze(3)
        along = (grouped * unit).sum(dim=-1, keepdim=True) * unit
        return (grouped - along).reshape(b, t, heads, d)

    def forward(self, x):
        b, t, dim = x.shape
        q = self.c_q(x).reshape(b, t, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = rotate(q, cos, sin, self.rope_dims)
        k = rotate(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = flash_attn_3_func(q, k, v, causal=True)
        if self.use_xsa:
            y = self._drop_self(y, v)
        return self.proj(y.reshape(b, t, dim))


class MLP(nn.Module):
    def __init__(self, h):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.fc = CastedLinear(h.model_dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, h.model_dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, h, layer):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(h, use_xsa=layer >= h.num_layers - h.xsa_last_n)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        mix = torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim)))
        self.resid_mix = nn.Parameter(mix.float())
        self.norm_factor = 1.0 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        self.parallel = layer >= h.parallel_from

    def forward(self, x, x0):
        mix = self.resid_mix.to(x.dtype)
        x_in = mix[0] * x + mix[1] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.norm_factor)
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.norm_factor)
            return x_in + self.attn_scale.to(x.dtype) * attn_out + self.mlp_scale.to(x.dtype) * mlp_out
        x = x_in + self.attn_scale.to(x.dtype) * attn_out
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.norm_factor)


class HashEmbedding(nn.Module):
    """An embedding of the hashed pair (previous token, current token), added to the input."""

    def __init__(self, h):
        super().__init__()
        self.buckets = h.hash_buckets
        self.bos_id = h.bos_id
        self.table = nn.Embedding(h.hash_buckets, h.hash_dim)
        self.up = CastedLinear(h.hash_dim, h.model_dim, bias=False)
        self.hash_gain = nn.Parameter(torch.full((1,), 0.05, dtype=torch.float32))
        nn.init.zeros_(self.table.weight)

    def pair_ids(self, ids):
        shifted = F.pad(ids[:, :-1], (1, 0), value=0)
        shifted = torch.where(ids == self.bos_id, torch.zeros_like(shifted), shifted)
        return ((ids * 36313) ^ (shifted * 27191)) % self.buckets

    def forward(self, ids, dtype):
        rows = self.table(self.pair_ids(ids)).to(dtype)
        return self.up(rows) * self.hash_gain.to(dtype)


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.softcap = h.logit_softcap
        self.model_dim = h.model_dim
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.hash_emb = HashEmbedding(h) if h.hash_buckets > 0 else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        self.looping = False
        plain = list(range(h.num_layers))
        looped = plain[: h.loop_start]
        for _ in range(h.num_loops + 1):
            looped += list(range(h.loop_start, h.loop_end + 1))
        looped += plain[h.loop_end + 1 :]
        self.plain_halves = self._halves(plain)
        self.looped_halves = self._halves(looped if h.num_loops > 0 else plain)
        num_skips = min(len(self.looped_halves[0]), len(self.looped_halves[1]))
        self.skip_weights = nn.Parameter(torch.ones(num_skips, h.model_dim, dtype=torch.float32))
        gates = torch.zeros(num_skips, h.model_dim, dtype=torch.float32)
        self.skip_gates = nn.Parameter(gates) if h.skip_gates else None
        self._init_weights(h)

    @staticmethod
    def _halves(order):
        cut = len(order) // 2
        return order[:cut], order[cut:]

    def _init_weights(self, h):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.embed_init_std)
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                continue
            if getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)
            elif min(module.weight.shape) >= 64:
                nn.init.orthogonal_(module.weight, gain=1.0)

    def embed(self, ids):
        x = self.tok_emb(ids)
        if self.hash_emb is not None:
            x = x + self.hash_emb(ids, x.dtype)
        return F.rms_norm(x, (self.model_dim,))

    def hidden(self, ids):
        x = self.embed(ids)
        x0 = x
        encoder, decoder = self.looped_halves if self.looping else self.plain_halves
        skips = []
        for layer in encoder:
            x = self.blocks[layer](x, x0)
            skips.append(x)
        for k, layer in enumerate(decoder):
            if k < self.skip_weights.size(0) and skips:
                skip = self.skip_weights[k].to(x.dtype) * skips.pop()
                if self.skip_gates is not None:
                    x = torch.lerp(skip, x, torch.sigmoid(self.skip_gates[k].to(x.dtype)))
                else:
                    x = x + skip
            x = self.blocks[layer](x, x0)
        return self.final_norm(x)

    def forward_logits(self, ids):
        logits = F.linear(self.hidden(ids), self.tok_emb.weight.to(torch.bfloat16))
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, ids, targets):
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="mean")


# ---------------------------------------------------------------------------
# optimisers
# ---------------------------------------------------------------------------


@torch.compile
def newton_schulz(g, steps=5, eps=1e-7):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + eps)
    tall = g.size(0) > g.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        poly = b * gram + c * gram @ gram
        x = a * x + poly @ x
    return x.T if tall else x


class MuonEqR(torch.optim.Optimizer):
    """Muon whose update is brought to equal row norms before it is orthogonalised; the ranks share the matrices."""

    def __init__(self, params, lr, momentum, backend_steps, weight_decay=0.0, row_normalize=True):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                backend_steps=backend_steps,
                weight_decay=weight_decay,
                row_normalize=row_normalize,
            ),
        )

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cursor = 0
            for k, p in enumerate(params):
                if k % world == rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    if group["row_normalize"]:
                        rows = g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7)
                        g = g / rows.to(g.dtype)
                    g = newton_schulz(g, steps=group["backend_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            cursor = 0
            for p in params:
                if group["weight_decay"] > 0.0:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                update = flat[cursor : cursor + p.numel()].view_as(p)
                p.add_(update.to(p.dtype), alpha=-group["lr"])
                cursor += p.numel()


class OptimizerSet:
    """The three optimisers, their base rates and the reduction of the gradients."""

    def __init__(self, h, model):
        matrices, scalars = [], []
        for name, p in model.blocks.named_parameters():
            if p.ndim == 2 and not any(key in name for key in CONTROL_NAMES):
                matrices.append(p)
            else:
                scalars.append(p)
        scalars.append(model.skip_weights)
        if model.skip_gates is not None:
            scalars.append(model.skip_gates)
        embed_groups = [{"params": [model.tok_emb.weight], "lr": h.tied_embed_lr, "base_lr": h.tied_embed_lr}]
        if model.hash_emb is not None:
            embed_groups.append({"params": [model.hash_emb.table.weight], "lr": h.hash_lr, "base_lr": h.hash_lr})
            matrices.append(model.hash_emb.up.weight)
            scalars.append(model.hash_emb.hash_gain)
        adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.embed = torch.optim.AdamW(embed_groups, weight_decay=h.embed_wd, **adam)
        self.muon = MuonEqR(
            matrices,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        self.scalar = torch.optim.AdamW(
            [{"params": scalars, "lr": h.scalar_lr, "base_lr": h.scalar_lr}], weight_decay=h.adam_wd, **adam
        )
        for group in self.muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.all = (self.embed, self.muon, self.scalar)
        self.params = [p for opt in self.all for group in opt.param_groups for p in group["params"]]

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def scale(self, factor, momentum):
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * factor
        for group in self.muon.param_groups:
            group["momentum"] = momentum

    def step(self, h):
        average_grads(h, self.params)
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.params, h.grad_clip_norm)
        for opt in self.all:
            opt.step()
        self.zero_grad()


def average_grads(h, params):
    if not h.distributed:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1).float() for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    flat /= h.world_size
    cursor = 0
    for g in grads:
        g.copy_(flat[cursor : cursor + g.numel()].view_as(g))
        cursor += g.numel()


class WeightEMA:
    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def copy_to(self, model):
        current = model.state_dict()
        model.load_state_dict({name: t.to(current[name].dtype) for name, t in self.shadow.items()}, strict=True)


def keep_fp32(model):
    """Everything in bf16 but the matrices that are cast in the forward pass and the small vectors."""
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 or any(key in name for key in CONTROL_NAMES):
                p.data = p.data.float()


def build_model(h, device):
    model = GPT(h).to(device).bfloat16()
    keep_fp32(model)
    return model


# ---------------------------------------------------------------------------
# quantisation: GPTQ with SDClip
# ---------------------------------------------------------------------------


def collect_hessians(h, model, stream, device):
    """X^T X of the inputs of every linear layer over batches of the given stream, averaged over the ranks."""
    hessians, hooks = {}, []

    def watch(key):
        def hook(module, inputs, output):
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            if key not in hessians:
                hessians[key] = torch.zeros(x.size(1), x.size(1), dtype=torch.float32, device=device)
            hessians[key].addmm_(x.T, x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_hook(watch(name + ".weight")))
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(h.calib_batches // h.world_size):
            x, _ = stream.next_rows(h.calib_rows)
            model.forward_logits(x)
    for hook in hooks:
        hook.remove()
    for key in sorted(hessians):
        if h.distributed:
            dist.all_reduce(hessians[key], op=dist.ReduceOp.SUM)
        hessians[key] /= max(h.calib_batches, 1)
    return hessians


def sdclip_scale(w, sigmas, qmax):
    """One scale per row: the clip stands at `sigmas` standard deviations of the row."""
    spread = w.float().std(dim=1, unbiased=False)
    return (sigmas * spread / qmax).clamp_min(1e-8).half()


def round_rows(w, sigmas, bits):
    qmax = 2 ** (bits - 1) - 1
    scale = sdclip_scale(w, sigmas, qmax)
    q = torch.round(w.float() / scale.float()[:, None]).clamp_(-qmax, qmax)
    return q.to(torch.int8), scale


def gptq_rows(h, w, hessian, sigmas, bits):
    qmax = 2 ** (bits - 1) - 1
    work = w.detach().float().clone()
    scale = sdclip_scale(work, sigmas, qmax)
    s = scale.float()
    hess = hessian.float().clone()
    diag = torch.diagonal(hess)
    dead = diag == 0
    diag[dead] = 1.0
    work[:, dead] = 0.0
    diag += h.gptq_damp * diag.mean()
    order = torch.argsort(torch.diagonal(hess), descending=True)
    undo = torch.argsort(order)
    work = work[:, order]
    hess = hess[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hess))
    upper = torch.linalg.cholesky(inverse, upper=True)
    cols = work.size(1)
    q = torch.zeros_like(work)
    for lo in range(0, cols, h.gptq_block):
        hi = min(lo + h.gptq_block, cols)
        block = work[:, lo:hi].clone()
        errors = torch.zeros_like(block)
        for j in range(hi - lo):
            d = upper[lo + j, lo + j]
            col = torch.round(block[:, j] / s).clamp_(-qmax, qmax)
            q[:, lo + j] = col
            err = (block[:, j] - col * s) / d
            block[:, j:] -= err[:, None] * upper[lo + j, lo + j : hi][None, :]
            errors[:, j] = err
        work[:, hi:] -= errors @ upper[lo:hi, hi:]
    return q[:, undo].to(torch.int8), scale


def quantize_state(h, state, hessians):
    packed, counts = {}, collections.Counter()
    for name in sorted(state):
        t = state[name].detach()
        if t.ndim != 2 or t.numel() < 8192 or any(key in name for key in CONTROL_NAMES):
            packed[name] = ("raw", t.half().cpu())
            counts["raw"] += t.numel()
            continue
        if name in hessians:
            q, scale = gptq_rows(h, t, hessians[name], h.matrix_clip_sigmas, h.matrix_bits)
            counts["gptq"] += t.numel()
        else:
            q, scale = round_rows(t, h.embed_clip_sigmas, h.embed_bits)
            counts["rtn"] += t.numel()
        packed[name] = ("rows", q.cpu(), scale.cpu())
    log("quantize: " + " ".join(f"{kind}:{n}" for kind, n in sorted(counts.items())))
    return packed


def dequantize_state(packed, like):
    out = {}
    for name, entry in packed.items():
        if entry[0] == "raw":
            out[name] = entry[1].to(like[name].dtype)
        else:
            out[name] = (entry[1].float() * entry[2].float()[:, None]).to(like[name].dtype)
    return out


# ---------------------------------------------------------------------------
# artifact: byte-shuffled and brotli-compressed
# ---------------------------------------------------------------------------

SHUFFLE_MAGIC = b"HBS1"


def byte_shuffle(raw, stride=2):
    arr = np.frombuffer(raw, dtype=np.uint8)
    lanes = [arr[k::stride].tobytes() for k in range(stride)]
    return SHUFFLE_MAGIC + bytes([stride]) + b"".join(lanes)


def byte_unshuffle(data):
    if data[:4] != SHUFFLE_MAGIC:
        return data
    stride = data[4]
    arr = np.frombuffer(data, dtype=np.uint8, offset=5)
    out = np.empty(arr.size, dtype=np.uint8)
    cursor = 0
    for k in range(stride):
        n = len(range(k, arr.size, stride))
        out[k::stride] = arr[cursor : cursor + n]
        cursor += n
    return out.tobytes()


def write_artifact(h, packed):
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    blob = brotli.compress(byte_shuffle(buffer.getvalue()), quality=11, lgwin=24)
    with open(h.artifact_path, "wb") as f:
        f.write(blob)
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + len(blob)
    log(f"Code size: {code_bytes} bytes")
    log(f"Serialized model int{h.matrix_bits}+brotli: {len(blob)} bytes")
    log(f"Total submission size: {total} bytes (limit {h.size_limit})")
    if total > h.size_limit:
        raise RuntimeError(f"submission is {total - h.size_limit} bytes too large")
    return total


def read_artifact(h, device):
    with open(h.artifact_path, "rb") as f:
        raw = byte_unshuffle(brotli.decompress(f.read()))
    packed = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    model = build_model(h, device)
    model.load_state_dict(dequantize_state(packed, model.state_dict()), strict=True)
    model.looping = h.num_loops > 0
    return model


# ---------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------


class EvalClock:
    """Seconds since the evaluation began; the ranks agree on whether the budget is spent."""

    def __init__(self, h, device):
        self.h = h
        self.flag = torch.zeros(1, device=device)
        self.start = time.perf_counter()

    def seconds(self):
        return time.perf_counter() - self.start

    def spent(self):
        self.flag.fill_(float(self.seconds() > self.h.eval_budget_seconds))
        if self.h.distributed:
            dist.all_reduce(self.flag, op=dist.ReduceOp.MAX)
        return bool(self.flag.item())


def rank_slice(h, items):
    lo = len(items) * h.rank // h.world_size
    hi = len(items) * (h.rank + 1) // h.world_size
    return items[lo:hi]


def eval_val(h, device, val, logits_fn):
    """Rows side by side, no overlap: a quick figure for the log."""
    seq = h.eval_seq_len
    tally = Tally(val, device)
    starts = rank_slice(h, list(range(0, val.num_targets, seq)))
    for i in range(0, len(starts), h.eval_val_rows):
        group = starts[i : i + h.eval_val_rows]
        x = torch.zeros(h.eval_val_rows, seq, dtype=torch.int64, device=device)
        y = torch.zeros_like(x)
        lengths = []
        for row, start in enumerate(group):
            stop = min(start + seq, val.num_targets)
            x[row, : stop - start], y[row, : stop - start] = val.span(start, stop)
            lengths.append(stop - start)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            logits = logits_fn(x)
        nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        for row, n in enumerate(lengths):
            tally.add(nll[row, :n], x[row, :n], y[row, :n])
    return tally.reduce().result()


def window_starts(h, val):
    """Starts of the sliding windows: each scores the positions that none before it has reached."""
    context = h.eval_seq_len - h.eval_stride
    return [ws for ws in range(0, val.num_targets, h.eval_stride) if ws == 0 or ws + context < val.num_targets]


def first_scored(h, ws):
    return 0 if ws == 0 else ws + h.eval_seq_len - h.eval_stride


def score_windows(h, device, val, starts, logits_fn, tally):
    """Adds the scored positions of the windows to the tally; the batch shape never changes."""
    seq = h.eval_seq_len
    for i in range(0, len(starts), h.eval_batch_windows):
        group = starts[i : i + h.eval_batch_windows]
        x = torch.zeros(h.eval_batch_windows, seq, dtype=torch.int64, device=device)
        y = torch.zeros_like(x)
        spans = []
        for row, ws in enumerate(group):
            stop = min(ws + seq, val.num_targets)
            n = stop - ws
            x[row, :n], y[row, :n] = val.span(ws, stop)
            spans.append((first_scored(h, ws) - ws, n))
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            logits = logits_fn(x).float()
        nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        for row, (lo, hi) in enumerate(spans):
            tally.add(nll[row, lo:hi], x[row, lo:hi], y[row, lo:hi])


def eval_val_sliding(h, device, val, logits_fn):
    tally = Tally(val, device)
    starts = rank_slice(h, window_starts(h, val))
    score_windows(h, device, val, starts, logits_fn, tally)
    tally.reduce()
    log(f"sliding: scored {tally.tokens} of {val.num_targets} tokens", console=False)
    return tally.result()


def ttt_parameters(h, model):
    frozen = set()
    for block in list(model.blocks)[: h.ttt_freeze_blocks]:
        frozen.update(id(p) for p in block.parameters())
    params = []
    for p in model.parameters():
        p.requires_grad_(id(p) not in frozen)
        if p.requires_grad:
            params.append(p)
    return params


def adapt_on_chunk(h, device, val, lo, hi, loss_fn, optimizer, params):
    """SGD over the sequences of one chunk that has been scored; every rank takes its part of each step."""
    seq = h.train_seq_len
    rows = list(range(lo, hi - seq + 1, seq))
    per_step = h.ttt_rows * h.world_size
    for _ in range(h.ttt_epochs):
        for i in range(0, len(rows) - per_step + 1, per_step):
            mine = rows[i + h.rank * h.ttt_rows : i + (h.rank + 1) * h.ttt_rows]
            pairs = [val.span(start, start + seq) for start in mine]
            x = torch.stack([p[0] for p in pairs])
            y = torch.stack([p[1] for p in pairs])
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = loss_fn(x, y)
            loss.backward()
            average_grads(h, params)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            optimizer.step()


def eval_val_ttt(h, device, val, model, logits_fn, loss_fn, clock):
    """Score-first test-time training: a chunk is scored by the weights of the chunks before it, then trained on."""
    tally = Tally(val, device)
    num_chunks = (val.num_targets + h.ttt_chunk_tokens - 1) // h.ttt_chunk_tokens
    by_chunk = [[] for _ in range(num_chunks)]
    for ws in window_starts(h, val):
        by_chunk[first_scored(h, ws) // h.ttt_chunk_tokens].append(ws)
    params = ttt_parameters(h, model)
    optimizer = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    adapting = True
    for ci in range(num_chunks):
        lo = ci * h.ttt_chunk_tokens
        hi = min(lo + h.ttt_chunk_tokens, val.num_targets)
        model.eval()
        score_windows(h, device, val, rank_slice(h, by_chunk[ci]), logits_fn, tally)
        if adapting and clock.spent():
            adapting = False
            log(f"ttt: budget spent at chunk {ci}, scoring on without adaptation")
        if adapting and ci < num_chunks - 1:
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            adapt_on_chunk(h, device, val, lo, hi, loss_fn, optimizer, params)
        if ci % 100 == 0:
            log(f"ttt: chunk {ci}/{num_chunks} at {clock.seconds():.1f}s", console=False)
    tally.reduce()
    log(f"ttt: scored {tally.tokens} of {val.num_targets} tokens")
    return tally.result()


def timed_eval(label, fn, *args):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{ms:.0f}ms")
    return val_loss, val_bpb


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


class TrainClock:
    """Milliseconds of training; stands still during the validation passes."""

    def __init__(self):
        self.spent_ms = 0.0
        self.t0 = None

    def resume(self):
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def pause(self):
        torch.cuda.synchronize()
        self.spent_ms += 1000.0 * (time.perf_counter() - self.t0)
        self.t0 = None

    def now(self):
        running = 0.0 if self.t0 is None else 1000.0 * (time.perf_counter() - self.t0)
        return self.spent_ms + running


def lr_factor(h, frac):
    if h.warmdown_frac <= 0 or frac < 1.0 - h.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / h.warmdown_frac, h.min_lr)


def muon_momentum_at(h, step):
    frac = min(step / h.muon_momentum_warmup, 1.0) if h.muon_momentum_warmup > 0 else 1.0
    return (1.0 - frac) * h.muon_momentum_start + frac * h.muon_momentum


def train_step(h, stream, loss_fn, optimizers, factor, momentum, device):
    total = torch.zeros((), device=device)
    for _ in range(h.grad_accum_steps):
        x, y = stream.next_batch()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_fn(x, y)
        total += loss.detach()
        (loss / h.grad_accum_steps).backward()
    optimizers.scale(factor, momentum)
    optimizers.step(h)
    return total / h.grad_accum_steps


def compile_warmup(h, model, loss_fn, optimizers, device):
    """Compiles both depths on train batches of another stream, then puts weights and optimisers back."""
    if h.warmup_steps <= 0:
        return
    weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    stream = ShuffledSequenceLoader(h, device, seed_offset=9973)
    model.train()
    for looping in ([False, True] if h.num_loops > 0 else [False]):
        model.looping = looping
        for step in range(h.warmup_steps):
            train_step(h, stream, loss_fn, optimizers, 1.0, h.muon_momentum_start, device)
        log(f"warmup_step:{h.warmup_steps}/{h.warmup_steps} looping:{int(looping)}")
    model.looping = False
    model.load_state_dict(weights, strict=True)
    for opt in optimizers.all:
        opt.state.clear()
    optimizers.zero_grad()


def train_model(h, device, val, clock):
    model = build_model(h, device)
    loss_fn = torch.compile(model, dynamic=False, fullgraph=True)
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    optimizers = OptimizerSet(h, model)
    compile_warmup(h, model, loss_fn, optimizers, device)
    stream = ShuffledSequenceLoader(h, device)
    ema = WeightEMA(model, h.ema_decay)
    budget_ms = 1000.0 * (h.max_wallclock_seconds - h.quant_reserve_seconds)
    stop_step = None
    if h.distributed:
        dist.barrier()
    clock.resume()
    step = 0
    while True:
        last = step == h.iterations or (stop_step is not None and step >= stop_step)
        if not last and step > 0 and h.val_loss_every > 0 and step % h.val_loss_every == 0:
            clock.pause()
            model.eval()
            val_loss, val_bpb = eval_val(h, device, val, logits_fn)
            log(f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{clock.now():.0f}ms")
            model.train()
            clock.resume()
        if last:
            break
        frac = max(clock.now() / budget_ms, step / h.iterations)
        if h.num_loops > 0 and not model.looping and frac >= h.enable_looping_at:
            model.looping = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f}")
        model.train()
        loss = train_step(h, stream, loss_fn, optimizers, lr_factor(h, frac), muon_momentum_at(h, step), device)
        ema.update(model)
        step += 1
        if step <= 5 or step % h.train_log_every == 0:
            ms = clock.now()
            log(f"step:{step}/{h.iterations} train_loss:{loss.item():.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")
        if stop_step is None and step % 8 == 0:
            over = torch.tensor(float(clock.now() >= budget_ms), device=device)
            if h.distributed:
                dist.all_reduce(over, op=dist.ReduceOp.MAX)
            if over.item() > 0:
                stop_step = step
    log(f"stopping: step:{step} train_time:{clock.now():.0f}ms")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    ema.copy_to(model)
    log("ema: averaged weights loaded")
    return model, stream


def finish_training(h, device, model, stream, clock):
    """Calibration and quantisation, still on the training clock; the artifact is written by rank 0."""
    model.looping = h.num_loops > 0
    t0 = clock.now()
    hessians = collect_hessians(h, model, stream, device)
    if h.rank == 0:
        packed = quantize_state(h, model.state_dict(), hessians)
    clock.pause()
    log(f"gptq: train calibration and quantisation {clock.now() - t0:.0f}ms, training with gptq {clock.now():.0f}ms")
    if h.rank == 0:
        write_artifact(h, packed)
    if h.distributed:
        dist.barrier()


# ---------------------------------------------------------------------------
# the run
# ---------------------------------------------------------------------------


def evaluate_artifact(h, device, val):
    """Reads the artifact back and scores it; the last figure printed is the submission's."""
    clock = EvalClock(h, device)
    model = read_artifact(h, device)
    model.eval()
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    loss_fn = torch.compile(model, dynamic=False, fullgraph=True)
    val_loss, val_bpb = timed_eval("quantized", eval_val, h, device, val, logits_fn)
    if h.sliding_window_enabled:
        val_loss, val_bpb = timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val, logits_fn)
    if h.ttt_enabled:
        val_loss, val_bpb = timed_eval("quantized_ttt", eval_val_ttt, h, device, val, model, logits_fn, loss_fn, clock)
    log(f"total_eval_time:{clock.seconds():.1f}s")
    log(f"final_val_loss:{val_loss:.8f} final_val_bpb:{val_bpb:.8f}")
    return val_loss, val_bpb


def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    val = ValidationData(h, device)
    log(f"train_shards:{len(list_shards(h.train_files))} val_tokens:{val.num_targets}")
    clock = TrainClock()
    model, stream = train_model(h, device, val, clock)
    finish_training(h, device, model, stream, clock)
    del model, stream
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return evaluate_artifact(h, device, val)


def describe(h):
    log(f"Running Python {sys.version.split()[0]} PyTorch {torch.__version__}", console=False)
    for key in sorted(vars(type(h))):
        if not re.match(r"__", key):
            log(f"  {key}: {getattr(h, key)}", console=False)


def main():
    h = Hyperparameters()
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if 8 % h.world_size:
        raise ValueError("WORLD_SIZE must divide 8")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 32
    log.open(h)
    describe(h)
    log(f"world_size:{h.world_size} grad_accum_steps:{h.grad_accum_steps} seed:{h.seed}")
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
