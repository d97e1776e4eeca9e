"""SP8192 + parallel residuals + depth recurrence + legal score-first TTT + causal n-gram mixture.

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
Everything is set by environment variables, see Hyperparameters. The order of events is: train (600 s, quantisation
included), pack, read the pack back, evaluate (plain, sliding, score-first TTT with the mixture). The last is the result.
"""
from __future__ import annotations

import collections
import contextlib
import copy
import glob
import hashlib
import io
import lzma
import math
import os
import random
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, fields
from pathlib import Path

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
try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func
except ImportError:
    flash_attn_3_func = None


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def env(name, default):
    """An environment variable, read as the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.lower() not in ("0", "false", "no", "")
    return type(default)(raw)


@dataclass
class Hyperparameters:
    # data
    data_dir: str = env("DATA_DIR", "./data/")
    seed: int = env("SEED", 1337)
    run_id: str = env("RUN_ID", uuid.uuid4().hex[:12])
    vocab_size: int = env("VOCAB_SIZE", 8192)
    # training length
    iterations: int = env("ITERATIONS", 20000)
    warmup_steps: int = env("WARMUP_STEPS", 20)
    warmdown_frac: float = env("WARMDOWN_FRAC", 0.72)
    max_wallclock_seconds: float = env("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds: float = env("GPTQ_RESERVE_SECONDS", 26.0)
    train_batch_tokens: int = env("TRAIN_BATCH_TOKENS", 2048 * 48 * 8)
    train_seq_len: int = env("TRAIN_SEQ_LEN", 2048)
    train_log_every: int = env("TRAIN_LOG_EVERY", 500)
    val_loss_every: int = env("VAL_LOSS_EVERY", 4000)
    # evaluation
    eval_seq_len: int = env("EVAL_SEQ_LEN", 2048)
    eval_stride: int = env("EVAL_STRIDE", 64)
    eval_batch_seqs: int = env("EVAL_BATCH_SEQS", 32)
    eval_budget_seconds: float = env("EVAL_BUDGET_SECONDS", 560.0)
    sliding_enabled: bool = env("SLIDING_ENABLED", True)
    # test-time training
    ttt_enabled: bool = env("TTT_ENABLED", True)
    ttt_lr: float = env("TTT_LR", 0.005)
    ttt_epochs: int = env("TTT_EPOCHS", 3)
    ttt_momentum: float = env("TTT_MOMENTUM", 0.9)
    ttt_chunk_tokens: int = env("TTT_CHUNK_TOKENS", 32768)
    ttt_grad_clip: float = env("TTT_GRAD_CLIP", 1.0)
    ttt_freeze_blocks: int = env("TTT_FREEZE_BLOCKS", 0)
    # n-gram mixture
    mix_enabled: bool = env("MIX_ENABLED", True)
    mix_bigram_max: float = env("MIX_BIGRAM_MAX", 0.02)
    mix_trigram_max: float = env("MIX_TRIGRAM_MAX", 0.08)
    mix_bigram_half: float = env("MIX_BIGRAM_HALF", 400.0)
    mix_trigram_half: float = env("MIX_TRIGRAM_HALF", 12.0)
    # model
    num_layers: int = env("NUM_LAYERS", 11)
    model_dim: int = env("MODEL_DIM", 512)
    num_heads: int = env("NUM_HEADS", 8)
    num_kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_mult: float = env("MLP_MULT", 4.0)
    xsa_last_n: int = env("XSA_LAST_N", 11)
    rope_base: float = env("ROPE_BASE", 10000.0)
    rope_dims: int = env("ROPE_DIMS", 16)
    rope_train_seq_len: int = env("ROPE_TRAIN_SEQ_LEN", 2048)
    logit_softcap: float = env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init: float = env("QK_GAIN_INIT", 5.25)
    ln_scale: bool = env("LN_SCALE", True)
    tied_embed_init_std: float = env("TIED_EMBED_INIT_STD", 0.005)
    skip_gates: bool = env("SKIP_GATES", True)
    num_loops: int = env("NUM_LOOPS", 2)
    loop_start: int = env("LOOP_START", 3)
    loop_end: int = env("LOOP_END", 5)
    enable_looping_at: float = env("ENABLE_LOOPING_AT", 0.35)
    parallel_start_layer: int = env("PARALLEL_START_LAYER", 7)
    # optimizer
    embed_lr: float = env("EMBED_LR", 0.03)
    matrix_lr: float = env("MATRIX_LR", 0.022)
    scalar_lr: float = env("SCALAR_LR", 0.02)
    min_lr: float = env("MIN_LR", 0.0)
    muon_momentum: float = env("MUON_MOMENTUM", 0.99)
    muon_momentum_start: float = env("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps: int = env("MUON_MOMENTUM_STEPS", 1500)
    muon_backend_steps: int = env("MUON_BACKEND_STEPS", 5)
    muon_wd: float = env("MUON_WD", 0.095)
    embed_wd: float = env("EMBED_WD", 0.085)
    adam_wd: float = env("ADAM_WD", 0.02)
    beta1: float = env("BETA1", 0.9)
    beta2: float = env("BETA2", 0.95)
    adam_eps: float = env("ADAM_EPS", 1e-8)
    grad_clip_norm: float = env("GRAD_CLIP_NORM", 0.3)
    ema_decay: float = env("EMA_DECAY", 0.9965)
    # quantisation
    matrix_bits: int = env("MATRIX_BITS", 6)
    embed_bits: int = env("EMBED_BITS", 8)
    matrix_clip_sigmas: float = env("MATRIX_CLIP_SIGMAS", 12.85)
    embed_clip_sigmas: float = env("EMBED_CLIP_SIGMAS", 20.0)
    gptq_batches: int = env("GPTQ_BATCHES", 64)
    gptq_block: int = env("GPTQ_BLOCK", 128)
    size_limit: int = env("SIZE_LIMIT", 16_000_000)

    def __post_init__(self):
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.is_main = self.rank == 0
        if 8 % self.world_size:
            raise ValueError(f"world size {self.world_size} does not divide 8")
        self.grad_accum_steps = 8 // self.world_size
        root = os.path.join(self.data_dir, "datasets", f"fineweb10B_sp{self.vocab_size}")
        self.train_files = os.path.join(root, "fineweb_train_*.bin")
        self.val_files = os.path.join(root, "fineweb_val_*.bin")
        self.tokenizer_path = os.path.join(self.data_dir, "tokenizers", f"fineweb_{self.vocab_size}_bpe.model")
        self.model_path = "final_model.pt"
        self.quantized_path = f"final_model.int{self.matrix_bits}.ptz"
        self.logfile = f"logs/{self.run_id}.txt"
        if self.ttt_chunk_tokens % self.eval_stride or self.eval_seq_len % self.eval_stride:
            raise ValueError("the stride must divide the chunk and the window")

    def describe(self):
        return {f.name: getattr(self, f.name) for f in fields(self)}


_log_path = None


def set_log_path(h):
    global _log_path
    if h.is_main:
        os.makedirs("logs", exist_ok=True)
        _log_path = h.logfile


def log(message, console=True):
    """Prints on the main rank and appends to the run's log. Other ranks have no path and stay silent."""
    if _log_path is None:
        return
    if console:
        print(message, flush=True)
    with open(_log_path, "a", encoding="utf-8") as f:
        print(message, file=f)


def all_reduce(tensor, op=None):
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM)
    return tensor


def barrier():
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def state_digest(model):
    """A short hash of the weights: the log shows with which state a score was made."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


def read_shard_header(file):
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"unexpected shard header: {file}")
    return int(header[2])


def load_data_shard(file):
    """All tokens of a shard as an uint16 tensor."""
    num_tokens = read_shard_header(file)
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=SHARD_HEADER_INTS * 4)
    if tokens.size != num_tokens:
        raise ValueError(f"short read: {file}")
    return torch.from_numpy(tokens)


def shard_memmap(file):
    return np.memmap(file, mode="r", dtype="<u2", offset=SHARD_HEADER_INTS * 4, shape=(read_shard_header(file),))


def list_shards(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return files


def load_validation_tokens(pattern):
    """The whole validation split, in order, with nothing cut off."""
    tokens = torch.cat([load_data_shard(file) for file in list_shards(pattern)])
    if tokens.numel() < 2:
        raise ValueError("validation split is empty")
    return tokens


def build_byte_tables(sp, vocab_size, device):
    """Per token: UTF-8 bytes of its text without the leading mark, whether it has the mark, whether it is a boundary.

    The mark stands for one space, which counts one byte unless the token before is a control token (nothing was there).
    """
    size = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros((size,), dtype=np.int16)
    leading = np.zeros((size,), dtype=np.bool_)
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
            leading[token_id] = True
            piece = piece[1:]
        base_bytes[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(leading, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


class ValidationData:
    """The validation tokens and what turns nats per token into bits per byte."""

    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {self.sp.vocab_size()}")
        self.val_tokens = load_validation_tokens(h.val_files)
        self.base_bytes, self.has_leading_space, self.is_boundary = build_byte_tables(self.sp, h.vocab_size, device)

    @property
    def num_targets(self):
        return self.val_tokens.numel() - 1

    def byte_counts(self, prev_ids, target_ids):
        """UTF-8 bytes that each target token stands for, given the token before it."""
        counts = self.base_bytes[target_ids].to(torch.float64)
        counts += (self.has_leading_space[target_ids] & ~self.is_boundary[prev_ids]).to(torch.float64)
        return counts

    def slice(self, start, end, device):
        return self.val_tokens[start:end].to(device=device, dtype=torch.int64)


class ShuffledSequenceLoader:
    """Sequences of the training shards in random order. Every rank owns every world_size-th shard and draws a shard in
    proportion to the sequences that are left in it; a new pass starts at another phase."""

    def __init__(self, h, device):
        self.world_size, self.rank = h.world_size, h.rank
        self.seq_len, self.device = h.train_seq_len, device
        shards = list_shards(h.train_files)
        self.files = shards[h.rank :: h.world_size] or shards
        self.rng = np.random.Generator(np.random.PCG64(h.seed * 1009 + h.rank))
        self.maps = [shard_memmap(file) for file in self.files]
        self.sizes = [m.shape[0] for m in self.maps]
        self.starts = [[] for _ in self.files]
        for i in range(len(self.files)):
            self._refill(i)

    def _refill(self, i):
        slack = min(self.seq_len - 1, max(0, self.sizes[i] - self.seq_len - 1))
        phase = int(self.rng.integers(slack + 1)) if slack else 0
        count = (self.sizes[i] - 1 - phase) // self.seq_len
        self.starts[i] = (phase + self.rng.permutation(count) * self.seq_len).tolist()

    def _draw(self):
        left = np.array([len(s) for s in self.starts], dtype=np.float64)
        if left.sum() == 0:
            for i in range(len(self.files)):
                self._refill(i)
            left = np.array([len(s) for s in self.starts], dtype=np.float64)
        i = int(self.rng.choice(len(left), p=left / left.sum()))
        start = self.starts[i].pop()
        return np.asarray(self.maps[i][start : start + self.seq_len + 1], dtype=np.int64)

    def next_batch(self, global_tokens, grad_accum_steps):
        rows = global_tokens // (self.world_size * grad_accum_steps * self.seq_len)
        batch = torch.from_numpy(np.stack([self._draw() for _ in range(rows)])).pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "skip_gate", "lane_post", "lane_merge")


class RMSNorm(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights kept in fp32, cast to the activations' type at use."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dim, base, train_seq_len):
        super().__init__()
        self.dim, self.base, self.train_seq_len = dim, base, train_seq_len
        self.register_buffer("inv_freq", self._frequencies(base), persistent=False)
        self._cache = (0, None, None)

    def _frequencies(self, base):
        return 1.0 / (base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))

    def forward(self, seq_len, device, dtype):
        cached_len, cos, sin = self._cache
        if cos is None or cached_len != seq_len or cos.device != device:
            inv_freq = self.inv_freq.to(device)
            if seq_len > self.train_seq_len:
                stretched = self.base * (seq_len / self.train_seq_len) ** (self.dim / (self.dim - 2))
                inv_freq = self._frequencies(stretched).to(device)
            freqs = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), inv_freq)
            cos, sin = freqs.cos()[None, :, None, :], freqs.sin()[None, :, None, :]
            self._cache = (seq_len, cos, sin)
        return cos.to(dtype), sin.to(dtype)


def apply_rotary(x, cos, sin, rope_dims):
    """Rotates the first rope_dims of each head and leaves the others."""
    rot, rest = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    a, b = rot[..., :half], rot[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def causal_attention(q, k, v):
    """q, k, v: batch, time, heads, dim. Grouped queries."""
    if flash_attn_3_func is not None:
        return flash_attn_3_func(q, k, v, causal=True)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class CausalSelfAttention(nn.Module):
    def __init__(self, h):
        super().__init__()
        if h.model_dim % h.num_heads or h.num_heads % h.num_kv_heads:
            raise ValueError("heads do not divide the model")
        self.num_heads, self.num_kv_heads = h.num_heads, h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rope_dims = h.rope_dims or self.head_dim
        self.rotary = Rotary(self.rope_dims, h.rope_base, h.rope_train_seq_len)
        self.use_xsa = False

    def _exclude_self(self, y, v):
        """XSA: takes away what the output has in common with the token's own value."""
        b, t, heads, dim = y.shape
        grouped = y.reshape(b, t, self.num_kv_heads, heads // self.num_kv_heads, dim)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (grouped - (grouped * vn).sum(dim=-1, keepdim=True) * vn).reshape(b, t, heads, dim)

    def forward(self, x):
        b, t, d = x.shape
        q = self.c_q(x).reshape(b, t, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = apply_rotary(q, cos, sin, self.rope_dims) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = apply_rotary(k, cos, sin, self.rope_dims)
        y = causal_attention(q, k, v)
        if self.use_xsa:
            y = self._exclude_self(y, v)
        return self.proj(y.reshape(b, t, d))


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
    """Attention and MLP. `forward` is the usual residual block, `forward_lanes` the one with two residual lanes:
    attention reads the first lane, the MLP the second, and both write to both."""

    def __init__(self, h, layer):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attn, self.mlp = CausalSelfAttention(h), MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        self.ln_factor = 1.0 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        self.has_lanes = layer >= h.parallel_start_layer
        if self.has_lanes:
            self.lane_post = nn.Parameter(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float32))

    def _mixed(self, x, x0):
        mix = self.resid_mix.to(x.dtype)
        return mix[0] * x + mix[1] * x0

    def _attn_out(self, x):
        return self.attn_scale.to(x.dtype) * self.attn(self.attn_norm(x) * self.ln_factor)

    def _mlp_out(self, x):
        return self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.ln_factor)

    def forward(self, x, x0):
        x = self._mixed(x, x0)
        x = x + self._attn_out(x)
        return x + self._mlp_out(x)

    def forward_lanes(self, lane0, lane1, x0):
        lane0 = self._mixed(lane0, x0)
        a, m = self._attn_out(lane0), self._mlp_out(lane1)
        post = self.lane_post.to(a.dtype)
        return lane0 + post[0, 0] * a + post[0, 1] * m, lane1 + post[1, 0] * a + post[1, 1] * m


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.softcap = h.logit_softcap
        self.num_layers = h.num_layers
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        for block in self.blocks[max(0, h.num_layers - h.xsa_last_n) :]:
            block.attn.use_xsa = True
        self.plain_plan = self._split(list(range(h.num_layers)))
        self.loop_plan = self._split(self._looped_order(h))
        if any(i >= h.parallel_start_layer for plan in (self.plain_plan, self.loop_plan) for i in plan[0]):
            raise ValueError("the lanes must start in the second half")
        self.looping_active = False
        n = max(min(len(p[0]), len(p[1])) for p in (self.plain_plan, self.loop_plan))
        self.skip_weights = nn.Parameter(torch.ones(n, h.model_dim, dtype=torch.float32))
        self.skip_gates = nn.Parameter(torch.zeros(n, h.model_dim, dtype=torch.float32)) if h.skip_gates else None
        self.lane_merge = nn.Parameter(torch.tensor(0.5, dtype=torch.float32))
        self._init_weights(h)

    @staticmethod
    def _looped_order(h):
        segment = list(range(h.loop_start, h.loop_end + 1))
        return list(range(h.loop_start)) + segment * (h.num_loops + 1) + list(range(h.loop_end + 1, h.num_layers))

    @staticmethod
    def _split(order):
        return order[: len(order) // 2], order[len(order) // 2 :]

    def _init_weights(self, h):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, CastedLinear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def _skip(self, x, skip, k):
        scaled = self.skip_weights[k].to(x.dtype) * skip
        if self.skip_gates is None:
            return x + scaled
        return torch.lerp(scaled, x, torch.sigmoid(self.skip_gates[k].to(x.dtype) + 2.0))

    def hidden(self, ids):
        """Final hidden states, normalised: what the tied head reads."""
        x = F.rms_norm(self.tok_emb(ids), (self.tok_emb.embedding_dim,))
        x0, skips = x, []
        first, second = self.loop_plan if self.looping_active else self.plain_plan
        for i in first:
            x = self.blocks[i](x, x0)
            skips.append(x)
        lanes = None
        for k, i in enumerate(second):
            skip = skips.pop() if skips else None
            if lanes is None and self.blocks[i].has_lanes:
                lanes = (x, x)
            if lanes is None:
                x = x if skip is None else self._skip(x, skip, k)
                x = self.blocks[i](x, x0)
            else:
                lane0 = lanes[0] if skip is None else self._skip(lanes[0], skip, k)
                lanes = self.blocks[i].forward_lanes(lane0, lanes[1], x0)
        if lanes is not None:
            merge = self.lane_merge.to(x.dtype)
            x = merge * lanes[0] + (1.0 - merge) * lanes[1]
        return self.final_norm(x)

    def head(self, hidden):
        logits = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward_logits(self, ids):
        return self.head(self.hidden(ids))

    def forward(self, ids, targets):
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="mean")


def restore_fp32_params(model):
    """Matrices and control parameters stay in fp32 when the rest of the model is cast to bf16."""
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        if (param.ndim < 2 or any(c in name for c in CONTROL_NAMES)) and param.dtype != torch.float32:
            param.data = param.data.float()


def new_model(h, device):
    model = GPT(h).to(device).bfloat16()
    restore_fp32_params(model)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------


@torch.compile
def zeropower_newton_schulz(g, steps):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Row-normalised Muon. Each rank orthogonalises every world_size-th matrix, one all-reduce shares the updates."""

    def __init__(self, params, lr, momentum, backend_steps, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"]).float()
                    g = g / g.norm(dim=-1, keepdim=True).clamp_min(1e-7)
                    g = zeropower_newton_schulz(g, group["backend_steps"])
                    flat[at : at + p.numel()] = (g * max(1, g.size(0) / g.size(1)) ** 0.5).reshape(-1)
                at += p.numel()
            all_reduce(flat)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


class Optimizers:
    """Muon for the matrices, AdamW for the embedding and for the control parameters, with one schedule for all."""

    def __init__(self, h, model):
        self.h = h
        named = list(model.blocks.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and not any(c in n for c in CONTROL_NAMES)]
        scalars = [p for n, p in named if p.ndim < 2 or any(c in n for c in CONTROL_NAMES)]
        scalars += [model.skip_weights, model.lane_merge] + ([] if model.skip_gates is None else [model.skip_gates])
        adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.embed = torch.optim.AdamW([model.tok_emb.weight], lr=h.embed_lr, weight_decay=h.embed_wd, **adam)
        self.scalar = torch.optim.AdamW(scalars, lr=h.scalar_lr, weight_decay=h.adam_wd, **adam)
        self.muon = Muon(matrices, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, h.muon_wd)
        self.all = [self.embed, self.scalar, self.muon]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]
        self.params = [p for opt in self.all for group in opt.param_groups for p in group["params"]]

    def reduce_gradients(self):
        """Averages the gradients of the ranks, in one flat tensor per type."""
        if not dist.is_initialized():
            return
        by_type = collections.defaultdict(list)
        for p in self.params:
            if p.grad is not None:
                by_type[p.grad.dtype].append(p.grad)
        for grads in by_type.values():
            flat = torch.cat([g.reshape(-1) for g in grads])
            dist.all_reduce(flat, op=dist.ReduceOp.AVG)
            at = 0
            for g in grads:
                g.copy_(flat[at : at + g.numel()].view_as(g))
                at += g.numel()

    def step(self, step, lr_scale):
        frac = min(step / max(self.h.muon_momentum_steps, 1), 1.0)
        momentum = (1 - frac) * self.h.muon_momentum_start + frac * self.h.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        if self.h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.params, self.h.grad_clip_norm)
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
            opt.step()
        self.zero_grad()

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def state_dict(self):
        return [copy.deepcopy(opt.state_dict()) for opt in self.all]

    def load_state_dict(self, states):
        for opt, state in zip(self.all, states, strict=True):
            opt.load_state_dict(state)


class WeightAverage:
    """Exponential moving average of the state, in fp32."""

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for name, value in model.state_dict().items():
            self.shadow[name].lerp_(value.detach().float(), 1.0 - self.decay)

    def copy_to(self, model):
        now = model.state_dict()
        model.load_state_dict({k: v.to(dtype=now[k].dtype) for k, v in self.shadow.items()}, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation and packing
# ---------------------------------------------------------------------------------------------------------------------


def collect_hessians(h, model, loader, device):
    """X^T X of the input of every linear layer, and of the tied head, over batches of training data."""
    hessians, hooks = {}, []

    def adder(name):
        def hook(module, inputs, output):
            x = (output if name == "tok_emb.weight" else inputs[0]).detach().float().reshape(-1, module_width(module))
            if name not in hessians:
                hessians[name] = torch.zeros(x.size(1), x.size(1), device=device, dtype=torch.float32)
            hessians[name].addmm_(x.T, x)

        return hook

    def module_width(module):
        return module.in_features if isinstance(module, CastedLinear) else h.model_dim

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_hook(adder(name + ".weight")))
    hooks.append(model.final_norm.register_forward_hook(adder("tok_emb.weight")))
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(max(1, h.gptq_batches // h.world_size)):
            x, _ = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            model.hidden(x[:16])
    for hook in hooks:
        hook.remove()
    for name in sorted(hessians):
        all_reduce(hessians[name])
    return hessians


def gptq_quantize(weight, hessian, bits, clip_sigmas, block):
    """Column by column with error feedback, in the order of falling activation energy. One scale per row, taken from
    the row's standard deviation. Returns int8 levels and fp16 scales."""
    w = weight.detach().float().clone()
    rows, cols = w.shape
    qmax = 2 ** (bits - 1) - 1
    scale = (clip_sigmas * w.std(dim=1) / qmax).clamp_min(1e-8).half()
    s = scale.float()
    hm = hessian.double().clone()
    dead = hm.diagonal() == 0
    hm.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    hm.diagonal().add_(0.01 * hm.diagonal().mean())
    order = torch.argsort(hm.diagonal(), descending=True)
    hm, w = hm[order][:, order], w[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hm))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    levels = torch.zeros_like(w, dtype=torch.int8)
    for begin in range(0, cols, block):
        end = min(begin + block, cols)
        part = w[:, begin:end].clone()
        errors = torch.zeros_like(part)
        u = upper[begin:end, begin:end]
        for j in range(end - begin):
            q = torch.clamp(torch.round(part[:, j] / s), -qmax, qmax)
            levels[:, begin + j] = q.to(torch.int8)
            err = (part[:, j] - q * s) / u[j, j]
            errors[:, j] = err
            part[:, j:] -= err[:, None] * u[j, j:][None, :]
        if end < cols:
            w[:, end:] -= errors @ upper[begin:end, end:]
    return levels[:, torch.argsort(order)].cpu(), scale.cpu()


def quantize_state(h, model, hessians):
    """Matrices by GPTQ, what is small as fp16."""
    packed, kinds = {}, {}
    for name, tensor in model.state_dict().items():
        if name in hessians and tensor.ndim == 2:
            is_embed = name == "tok_emb.weight"
            bits = h.embed_bits if is_embed else h.matrix_bits
            sigmas = h.embed_clip_sigmas if is_embed else h.matrix_clip_sigmas
            levels, scale = gptq_quantize(tensor, hessians[name], bits, sigmas, h.gptq_block)
            packed[name + ".q"], packed[name + ".scale"] = levels, scale
            kinds[name] = f"gptq{bits}"
        else:
            packed[name] = tensor.detach().half().cpu() if tensor.is_floating_point() else tensor.detach().cpu()
            kinds[name] = "fp16"
    return packed, kinds


def dequantize_state(packed, kinds, template):
    state = {}
    for name, kind in kinds.items():
        target = template[name]
        if kind.startswith("gptq"):
            value = packed[name + ".q"].float() * packed[name + ".scale"].float()[:, None]
        else:
            value = packed[name]
        state[name] = value.to(dtype=target.dtype).reshape(target.shape)
    return state


SHUFFLE_MARK = b"BSH1"


def shuffle_bytes(data, width=2):
    """Puts the bytes of equal place in a word together: fp16 and zip headers compress better."""
    raw = np.frombuffer(data, dtype=np.uint8)
    return SHUFFLE_MARK + bytes([width]) + b"".join(raw[k::width].tobytes() for k in range(width))


def unshuffle_bytes(data):
    if data[:4] != SHUFFLE_MARK:
        raise ValueError("not a shuffled block")
    width, raw = data[4], np.frombuffer(data, dtype=np.uint8, offset=5)
    out, at = np.empty(raw.size, dtype=np.uint8), 0
    for k in range(width):
        size = len(range(k, raw.size, width))
        out[k::width] = raw[at : at + size]
        at += size
    return out.tobytes()


def compress(data):
    shuffled = shuffle_bytes(data)
    if brotli is not None:
        return b"B" + brotli.compress(shuffled, quality=9, lgwin=24)
    return b"L" + lzma.compress(shuffled, preset=4)


def decompress(data):
    body = brotli.decompress(data[1:]) if data[:1] == b"B" else lzma.decompress(data[1:])
    return unshuffle_bytes(body)


def serialize(h, model, hessians, code):
    """Quantises and packs the model, writes it and prints the size that counts: this file and the packed model."""
    code_bytes = len(code.encode("utf-8"))
    packed, kinds = quantize_state(h, model, hessians)
    buffer = io.BytesIO()
    torch.save({"packed": packed, "kinds": kinds}, buffer)
    blob = compress(buffer.getvalue())
    if h.is_main:
        Path(h.quantized_path).write_bytes(blob)
    barrier()
    model_bytes = os.path.getsize(h.quantized_path)
    total_bytes = model_bytes + code_bytes
    log(f"serialized_model:{model_bytes} bytes raw_payload:{buffer.getbuffer().nbytes} bytes")
    log(f"code_size:{code_bytes} bytes")
    log(f"total_submission_size:{total_bytes} bytes limit:{h.size_limit} margin:{h.size_limit - total_bytes}")
    if total_bytes > h.size_limit:
        raise RuntimeError(f"submission of {total_bytes} bytes is over the limit")
    return total_bytes


def deserialize(h, device):
    """The model as the packed file gives it. Nothing of the training survives but that file."""
    payload = torch.load(io.BytesIO(decompress(Path(h.quantized_path).read_bytes())), map_location="cpu")
    model = new_model(h, device)
    state = dequantize_state(payload["packed"], payload["kinds"], model.state_dict())
    model.load_state_dict(state, strict=True)
    model.looping_active = h.num_loops > 0
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Causal n-gram mixture
# ---------------------------------------------------------------------------------------------------------------------


class CausalNgramMixture:
    """Bigram and trigram counts of the chunks that are already scored, mixed with the model's softmax.

    The tables are exact (no hashing): a dense V x V matrix of bigram counts, and sorted trigram keys with their counts,
    of which the rows of the contexts at hand are unfolded to V columns. For every context

        p = (1 - w2 - w3) * softmax + w2 * C2[b] / n2[b] + w3 * C3[ab] / n3[ab],   w = max * n / (n + half)

    where n is the sum of the row that is divided by it and w is zero where the row is empty, so p sums to one over the
    vocabulary for whatever the context is. The weights know the context's counts and nothing of the target. The
    tables are frozen while a chunk is scored; `absorb` is called when it is.
    """

    def __init__(self, h, device):
        self.h, self.device, self.vocab = h, device, h.vocab_size
        self.bigram = torch.zeros(self.vocab, self.vocab, device=device, dtype=torch.float32)
        self.bigram_total = torch.zeros(self.vocab, device=device, dtype=torch.float32)
        self.trigram_keys = torch.empty(0, device=device, dtype=torch.int64)
        self.trigram_counts = torch.empty(0, device=device, dtype=torch.float32)
        self.absorbed = 0

    @torch.no_grad()
    def absorb(self, tokens, start, end):
        """Counts the targets start + 1 .. end, which belong to a chunk whose losses are booked."""
        if start != self.absorbed:
            raise RuntimeError(f"chunks must come in order: {start} after {self.absorbed}")
        self.absorbed = end
        ids = tokens[max(start - 1, 0) : end + 1].to(device=self.device, dtype=torch.int64)
        last, first = ids[1:], ids[:-1]
        if start > 0:
            last, first = last[1:], first[1:]
        one = torch.ones_like(last, dtype=torch.float32)
        self.bigram.index_put_((first, last), one, accumulate=True)
        self.bigram_total.index_add_(0, first, one)
        keys = (ids[:-2] * self.vocab + ids[1:-1]) * self.vocab + ids[2:]
        keys, inverse = torch.unique(torch.cat((self.trigram_keys, keys)), return_inverse=True)
        counts = torch.cat((self.trigram_counts, torch.ones(ids.numel() - 2, device=self.device)))
        self.trigram_counts = torch.zeros(keys.numel(), device=self.device).index_add_(0, inverse, counts)
        self.trigram_keys = keys

    def _trigram_rows(self, prev2, prev1):
        """The count rows of the contexts, over the whole vocabulary."""
        context = prev2 * self.vocab + prev1
        lo = torch.searchsorted(self.trigram_keys, context * self.vocab)
        hi = torch.searchsorted(self.trigram_keys, (context + 1) * self.vocab)
        length = hi - lo
        row = torch.repeat_interleave(torch.arange(context.numel(), device=self.device), length)
        offset = torch.arange(row.numel(), device=self.device) - (length.cumsum(0) - length)[row]
        at = lo[row] + offset
        rows = torch.zeros(context.numel(), self.vocab, device=self.device, dtype=torch.float32)
        rows[row, self.trigram_keys[at] % self.vocab] = self.trigram_counts[at]
        return rows

    @torch.no_grad()
    def log_probs(self, logits, prev1, prev2, has_prev2):
        """Log of the mixed distribution, N x V, for the logits of N positions and the two tokens before each target."""
        h = self.h
        probs = F.softmax(logits.float(), dim=-1)
        n2 = self.bigram_total[prev1]
        w2 = h.mix_bigram_max * n2 / (n2 + h.mix_bigram_half)
        p2 = self.bigram[prev1] / n2.clamp_min(1.0)[:, None]
        rows = self._trigram_rows(prev2, prev1) * has_prev2[:, None]
        n3 = rows.sum(dim=-1)
        w3 = h.mix_trigram_max * n3 / (n3 + h.mix_trigram_half)
        p3 = rows / n3.clamp_min(1.0)[:, None]
        mixed = (1.0 - w2 - w3)[:, None] * probs + w2[:, None] * p2 + w3[:, None] * p3
        return mixed.log()

    def describe(self):
        return f"trigrams:{self.trigram_keys.numel()} bigrams:{int((self.bigram > 0).sum())} absorbed:{self.absorbed}"


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


class ScoreBook:
    """Sums of losses, tokens and bytes of one scoring, in fp64 and on this rank until `result` adds up the ranks."""

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll, byte_counts):
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += float(nll.numel())
        self.sums[2] += byte_counts.sum()

    def running(self):
        """Loss and bits per byte of this rank so far, for the log."""
        loss, tokens, num_bytes = self.sums.tolist()
        if not tokens:
            return float("nan"), float("nan")
        return loss / tokens, loss / math.log(2.0) / num_bytes

    def result(self):
        loss, tokens, num_bytes = all_reduce(self.sums.clone()).tolist()
        return loss / tokens, loss / math.log(2.0) / num_bytes, int(tokens), int(num_bytes)


def plan_windows(total, seq_len, stride):
    """Starts of the windows. Every window scores its last `stride` positions or what is left of them, the first scores
    all of its own; a window whose scored part would be empty isn't planned. So each position is scored once."""
    context = seq_len - stride
    return [start for start in range(0, total, stride) if start == 0 or start + context < total]


def first_scored(start, seq_len, stride):
    return 0 if start == 0 else start + seq_len - stride


def share(items, rank, world_size):
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def window_batch(val_data, starts, h, stride, device):
    """Inputs, targets, the token before each input, and which positions are scored. Short windows are padded at the
    end, where nothing is scored and nothing scored can see."""
    seq_len, total = h.eval_seq_len, val_data.num_targets
    rows = h.eval_batch_seqs
    ids = torch.zeros(rows, seq_len, dtype=torch.int64)
    targets, before = torch.zeros_like(ids), torch.zeros_like(ids)
    keep = torch.zeros(rows, seq_len, dtype=torch.bool)
    has_before = torch.ones(rows, seq_len, dtype=torch.bool)
    for r, start in enumerate(starts):
        end = min(start + seq_len, total)
        n = end - start
        window = val_data.val_tokens[start : end + 1].to(torch.int64)
        ids[r, :n], targets[r, :n] = window[:-1], window[1:]
        before[r, 1:n] = window[: n - 1]
        if start > 0:
            before[r, 0] = int(val_data.val_tokens[start - 1])
        else:
            has_before[r, 0] = False
        keep[r, first_scored(start, seq_len, stride) - start : n] = True
    return tuple(t.to(device, non_blocking=True) for t in (ids, targets, before, has_before, keep))


def score_windows(forward, val_data, h, starts, stride, book, device, mixture=None):
    """Scores windows, batch by batch, into the book. forward: ids to logits."""
    for at in range(0, len(starts), h.eval_batch_seqs):
        batch = starts[at : at + h.eval_batch_seqs]
        ids, targets, before, has_before, keep = window_batch(val_data, batch, h, stride, device)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            logits = forward(ids)
        rows, prev, gold = logits[keep].float(), ids[keep], targets[keep]
        if mixture is None:
            logp = F.log_softmax(rows, dim=-1)
        else:
            logp = mixture.log_probs(rows, prev, before[keep], has_before[keep])
        nll = -logp.gather(1, gold[:, None]).squeeze(1)
        book.add(nll, val_data.byte_counts(prev, gold))


def finish(label, book, val_data):
    loss, bpb, tokens, num_bytes = book.result()
    note = "" if tokens == val_data.num_targets else f" EXPECTED:{val_data.num_targets}"
    log(f"{label} scored_tokens:{tokens} bytes:{num_bytes}{note}")
    return loss, bpb


def eval_val(h, model, val_data, device):
    """The whole split in windows that do not overlap."""
    was_training = model.training
    model.eval()
    forward = torch.compile(model.forward_logits, dynamic=False)
    book = ScoreBook(device)
    starts = plan_windows(val_data.num_targets, h.eval_seq_len, h.eval_seq_len)
    mine = share(starts, h.rank, h.world_size)
    score_windows(forward, val_data, h, mine, h.eval_seq_len, book, device)
    model.train(was_training)
    return finish("eval_val", book, val_data)


def eval_val_sliding(h, model, val_data, device):
    """The whole split in windows that overlap by all but `stride` tokens: the model does not change."""
    model.eval()
    forward = torch.compile(model.forward_logits, dynamic=False)
    book = ScoreBook(device)
    starts = plan_windows(val_data.num_targets, h.eval_seq_len, h.eval_stride)
    mine = share(starts, h.rank, h.world_size)
    score_windows(forward, val_data, h, mine, h.eval_stride, book, device)
    return finish("eval_val_sliding", book, val_data)


def chunk_windows(val_data, h):
    """The windows by the chunk that holds their scored tokens."""
    total, chunk = val_data.num_targets, h.ttt_chunk_tokens
    by_chunk = [[] for _ in range(-(-total // chunk))]
    for start in plan_windows(total, h.eval_seq_len, h.eval_stride):
        by_chunk[first_scored(start, h.eval_seq_len, h.eval_stride) // chunk].append(start)
    return by_chunk


def adaptable_params(h, model):
    """What test-time training may change: all but the first blocks, if some are frozen."""
    frozen = tuple(f"blocks.{i}." for i in range(h.ttt_freeze_blocks))
    params = []
    for name, param in model.named_parameters():
        param.requires_grad_(not (frozen and name.startswith(frozen)))
        if param.requires_grad:
            params.append(param)
    return params


def average_gradients(params):
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.reshape(-1).float() for p in params])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    at = 0
    for p in params:
        p.grad.copy_(flat[at : at + p.numel()].view_as(p.grad))
        at += p.numel()


def adapt_on_chunk(h, train_step, model, params, optimizer, val_data, start, end, lr, device):
    """SGD on a chunk whose tokens are scored. The chunk's sequences are shared out, the gradients averaged, so all
    ranks keep the same weights."""
    seq_len = h.eval_seq_len
    sequences = share(list(range(start, end - seq_len + 1, seq_len)), h.rank, h.world_size)
    if not sequences:
        raise RuntimeError("a chunk must hold a sequence for every rank")
    tokens = val_data.slice(start, end + 1, device)
    ids = torch.stack([tokens[s - start : s - start + seq_len] for s in sequences])
    targets = torch.stack([tokens[s - start + 1 : s - start + seq_len + 1] for s in sequences])
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    for _ in range(h.ttt_epochs):
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = train_step(ids, targets)
        loss.backward()
        average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
        optimizer.step()
    model.eval()
    return float(loss.detach())


def within_budget(h, started, device):
    """Whether there is time for more adaptation. The main rank's clock decides for all."""
    ok = torch.tensor([1.0 if time.perf_counter() - started < h.eval_budget_seconds else 0.0], device=device)
    if dist.is_initialized():
        dist.broadcast(ok, src=0)
    return bool(ok.item())


def eval_val_ttt(h, model, val_data, device, started):
    """Score first, then train: chunk c is scored with weights and counts that know the chunks before c, and only then
    do its tokens go into the counts and into SGD. One pass, left to right. started: when the evaluation began."""
    total, chunk = val_data.num_targets, h.ttt_chunk_tokens
    by_chunk = chunk_windows(val_data, h)
    log(f"ttt: chunks:{len(by_chunk)} windows:{sum(map(len, by_chunk))} lr:{h.ttt_lr} epochs:{h.ttt_epochs}")
    params = adaptable_params(h, model)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    mixture = CausalNgramMixture(h, device) if h.mix_enabled else None
    forward = torch.compile(model.forward_logits, dynamic=False)
    train_step = torch.compile(model, dynamic=False, fullgraph=True)
    book = ScoreBook(device)
    model.eval()
    adapting, train_loss = True, float("nan")
    for c, windows in enumerate(by_chunk):
        start, end = c * chunk, min((c + 1) * chunk, total)
        mine = share(windows, h.rank, h.world_size)
        score_windows(forward, val_data, h, mine, h.eval_stride, book, device, mixture)
        if c == len(by_chunk) - 1:
            break
        if mixture is not None:
            mixture.absorb(val_data.val_tokens, start, end)
        if adapting and c % 16 == 0 and not within_budget(h, started, device):
            adapting = False
            log(f"ttt: no time left for adaptation after chunk {c}, scoring on")
        if adapting:
            lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * c / max(len(by_chunk) - 1, 1)))
            train_loss = adapt_on_chunk(
                h, train_step, model, params, optimizer, val_data, start, end, lr, device
            )
        if c % 100 == 0:
            loss, bpb = book.running()
            log(
                f"ttt: chunk {c + 1}/{len(by_chunk)} rank_loss:{loss:.5f} rank_bpb:{bpb:.5f} "
                f"train_loss:{train_loss:.4f} time:{time.perf_counter() - started:.1f}s"
            )
    if mixture is not None:
        log(f"mixture: {mixture.describe()}")
    return finish("eval_val_ttt", book, val_data)


def timed_eval(label, fn, *args):
    """Runs one evaluation and logs its figures and its time."""
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    took = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{took:.0f}ms")
    return val_loss, val_bpb


def run_evals(h, val_data, device):
    """All evaluations of the packed model, each on a fresh copy of it. The last one is the submission's result."""
    started = time.perf_counter()
    model = deserialize(h, device)
    log(f"packed model read back, state:{state_digest(model)}")
    loss, bpb = timed_eval("quantized", eval_val, h, model, val_data, device)
    if h.sliding_enabled:
        loss, bpb = timed_eval("quantized_sliding_window", eval_val_sliding, h, model, val_data, device)
    if h.ttt_enabled:
        del model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        model = deserialize(h, device)
        log(f"fresh model for ttt, state:{state_digest(model)}")
        loss, bpb = timed_eval("quantized_ttt", eval_val_ttt, h, model, val_data, device, started)
    log(f"evaluation took {time.perf_counter() - started:.1f}s in all")
    return loss, bpb


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class TrainClock:
    """The wall clock of the training. It runs from the first step to the packed file, and only stands still for the
    validation figures that are logged on the way."""

    def __init__(self, h):
        self.limit_ms = 1000.0 * h.max_wallclock_seconds
        self.stop_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
        self.banked_ms, self.since = 0.0, None

    def start(self):
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def pause(self):
        torch.cuda.synchronize()
        self.banked_ms, self.since = self.elapsed_ms(), None

    def elapsed_ms(self):
        running = 0.0 if self.since is None else 1000.0 * (time.perf_counter() - self.since)
        return self.banked_ms + running

    def fraction(self):
        return self.elapsed_ms() / self.stop_ms

    def is_over(self, device):
        """Whether the steps must end, so that calibration and packing still fit. All ranks agree."""
        over = torch.tensor(int(self.elapsed_ms() >= self.stop_ms), device=device)
        if dist.is_initialized():
            dist.all_reduce(over, op=dist.ReduceOp.MAX)
        return bool(over.item())


def lr_scale(h, step, clock):
    """Flat, then down to min_lr over the last part of the time (or of the steps, if there is no time limit)."""
    frac = clock.fraction() if clock.stop_ms > 0 else step / max(h.iterations, 1)
    if h.warmdown_frac <= 0:
        return 1.0
    return max(min((1.0 - frac) / h.warmdown_frac, 1.0), h.min_lr)


def training_step(h, compiled, optimizers, loader, step, scale):
    loss_sum = torch.zeros((), device=loader.device)
    for _ in range(h.grad_accum_steps):
        x, y = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(x, y)
        loss_sum += loss.detach()
        (loss / h.grad_accum_steps).backward()
    optimizers.reduce_gradients()
    optimizers.step(step, scale)
    return loss_sum / h.grad_accum_steps


def warm_up(h, model, compiled, optimizers, device):
    """Compiles both graphs on batches of training data; weights and optimizer states are put back afterwards."""
    if h.warmup_steps <= 0:
        return
    weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    states = optimizers.state_dict()
    loader = ShuffledSequenceLoader(h, device)
    for looping in (False, True) if h.num_loops > 0 else (False,):
        model.looping_active = looping
        for step in range(h.warmup_steps):
            training_step(h, compiled, optimizers, loader, step, 1.0)
        log(f"warm_up looping:{looping} steps:{h.warmup_steps}")
    model.looping_active = False
    model.load_state_dict(weights, strict=True)
    optimizers.load_state_dict(states)
    optimizers.zero_grad()


def train_model(h, val_data, device):
    """Trains within the time that is left for the steps. Returns the averaged model and the running clock."""
    model = new_model(h, device)
    for param in model.parameters():
        if dist.is_initialized():
            dist.broadcast(param.data, src=0)
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    optimizers = Optimizers(h, model)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    warm_up(h, model, compiled, optimizers, device)
    loader = ShuffledSequenceLoader(h, device)
    average = WeightAverage(model, h.ema_decay)
    clock = TrainClock(h)
    clock.start()
    step, over = 0, False
    while True:
        last = step == h.iterations or over
        if last or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
            clock.pause()
            val_loss, val_bpb = eval_val(h, model, val_data, device)
            log(
                f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{clock.elapsed_ms():.0f}ms"
            )
            clock.start()
        if last:
            break
        if h.num_loops > 0 and not model.looping_active and clock.fraction() >= h.enable_looping_at:
            model.looping_active = True
            log(f"looping from step {step}: {model.loop_plan}")
        train_loss = training_step(h, compiled, optimizers, loader, step, lr_scale(h, step, clock))
        average.update(model)
        step += 1
        if step <= 5 or step % h.train_log_every == 0:
            ms = clock.elapsed_ms()
            log(
                f"step:{step}/{h.iterations} train_loss:{float(train_loss):.4f} "
                f"train_time:{ms / 60000:.2f}m tok/s:{step * h.train_batch_tokens / (ms / 1000):.0f}"
            )
        over = clock.is_over(device)
    log(f"training stopped at step {step}, train_time:{clock.elapsed_ms():.0f}ms")
    log(f"peak memory: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    average.copy_to(model)
    model.looping_active = h.num_loops > 0
    return model, clock


def train_and_eval(h, device):
    for seeder in (random.seed, np.random.seed, torch.manual_seed, torch.cuda.manual_seed_all):
        seeder(h.seed)
    val_data = ValidationData(h, device)
    log(f"train_shards:{len(list_shards(h.train_files))} val_tokens:{val_data.val_tokens.numel()}")
    code = Path(__file__).read_text(encoding="utf-8")
    log(f"code_sha256:{hashlib.sha256(code.encode()).hexdigest()}")
    model, clock = train_model(h, val_data, device)
    hessians = collect_hessians(h, model, ShuffledSequenceLoader(h, device), device)
    log(f"hessians of {len(hessians)} matrices, train_time:{clock.elapsed_ms():.0f}ms")
    serialize(h, model, hessians, code)
    clock.pause()
    log(f"training and packing took {clock.elapsed_ms():.0f}ms limit:{clock.limit_ms:.0f}ms")
    del model, hessians
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    loss, bpb = run_evals(h, val_data, device)
    log(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main():
    h = Hyperparameters()
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 64
    set_log_path(h)
    for name, value in h.describe().items():
        log(f"  {name}: {value}", console=False)
    log(f"world_size:{h.world_size} grad_accum_steps:{h.grad_accum_steps} seed:{h.seed}")
    log(f"Python {sys.version.split()[0]} PyTorch {torch.__version__}")
    with contextlib.suppress(OSError):
        smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        log(smi.stdout, console=False)
    barrier()
    train_and_eval(h, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
