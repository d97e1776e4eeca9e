"""
train_gpt.py -- my fork of the baseline. One file, lots of globals, sorry.

What is different from the baseline:
  * 10 layers of 512, GQA 8/4, rotary on only 16 of the 64 head dims, XSA in the last few layers
  * a BigramHash embedding next to the normal one (hash of the last two tokens)
  * Muon with a weight decay that has its own schedule
  * EMA of the weights towards the end
  * int6 rows with a clip search (weighted by activations seen on train data), int8 for the embeddings, zstd-22
  * one temperature, fitted on train tokens, shipped inside the artifact
  * sliding window eval and then score-first TTT with AdamW, chunk by chunk

Run:  torchrun --standalone --nproc_per_node=8 train_gpt.py
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
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    import zstandard
    HAVE_ZSTD = True
except ImportError:
    # lzma is a bit worse, but it is in the standard library so we always have something
    HAVE_ZSTD = False


# -----------------------------
# SETTINGS
# -----------------------------
# All of these are plain globals. I tried a dataclass and kept forgetting the prefix.

def env_int(name, default):
    return int(os.environ.get(name, default))


def env_float(name, default):
    return float(os.environ.get(name, default))


def env_flag(name, default):
    return bool(int(os.environ.get(name, default)))


# where things are
DATA_PATH = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
TRAIN_FILES = os.path.join(DATA_PATH, "fineweb_train_*.bin")
VAL_FILES = os.path.join(DATA_PATH, "fineweb_val_*.bin")
TOKENIZER_PATH = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
RUN_ID = os.environ.get("RUN_ID", str(uuid.uuid4()))
SEED = env_int("SEED", 1337)

# how long, how much
ITERATIONS = env_int("ITERATIONS", 20000)
WARMUP_STEPS = env_int("WARMUP_STEPS", 20)
WARMDOWN_ITERS = env_int("WARMDOWN_ITERS", 2800)
TRAIN_BATCH_TOKENS = env_int("TRAIN_BATCH_TOKENS", 786432)
TRAIN_SEQ_LEN = env_int("TRAIN_SEQ_LEN", 1024)
MAX_WALLCLOCK_SECONDS = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
# calibration, quantising and the temperature all read train data or decide weights, so they happen INSIDE the 600 s.
# 18 s is more than they need on an H100 (I see about 11).
RESERVE_SECONDS = env_float("RESERVE_SECONDS", 18.0)

# looking at the validation loss now and then (only printed)
VAL_BATCH_SIZE = env_int("VAL_BATCH_SIZE", 524288)
VAL_LOSS_EVERY = env_int("VAL_LOSS_EVERY", 2000)
TRAIN_LOG_EVERY = env_int("TRAIN_LOG_EVERY", 200)

# the model
VOCAB_SIZE = env_int("VOCAB_SIZE", 1024)
NUM_LAYERS = env_int("NUM_LAYERS", 10)
MODEL_DIM = env_int("MODEL_DIM", 512)
NUM_HEADS = env_int("NUM_HEADS", 8)
NUM_KV_HEADS = env_int("NUM_KV_HEADS", 4)
MLP_MULT = env_float("MLP_MULT", 3.0)
ROPE_DIMS = env_int("ROPE_DIMS", 16)
ROPE_BASE = env_float("ROPE_BASE", 10000.0)
XSA_LAST_N = env_int("XSA_LAST_N", 4)
LOGIT_SOFTCAP = env_float("LOGIT_SOFTCAP", 30.0)
QK_GAIN_INIT = env_float("QK_GAIN_INIT", 1.5)
BIGRAM_BUCKETS = env_int("BIGRAM_BUCKETS", 4096)
BIGRAM_DIM = env_int("BIGRAM_DIM", 128)
BOS_ID = env_int("BOS_ID", 1)
TIED_EMBED_INIT_STD = env_float("TIED_EMBED_INIT_STD", 0.005)

# optimizers
EMBED_LR = env_float("EMBED_LR", 0.035)
MATRIX_LR = env_float("MATRIX_LR", 0.025)
SCALAR_LR = env_float("SCALAR_LR", 0.025)
MUON_MOMENTUM = env_float("MUON_MOMENTUM", 0.99)
MUON_MOMENTUM_WARMUP_START = env_float("MUON_MOMENTUM_WARMUP_START", 0.92)
MUON_MOMENTUM_WARMUP_STEPS = env_int("MUON_MOMENTUM_WARMUP_STEPS", 1500)
MUON_BACKEND_STEPS = env_int("MUON_BACKEND_STEPS", 5)
BETA1 = env_float("BETA1", 0.9)
BETA2 = env_float("BETA2", 0.95)
ADAM_EPS = env_float("ADAM_EPS", 1e-8)
GRAD_CLIP_NORM = env_float("GRAD_CLIP_NORM", 0.3)

# weight decay: small at the start, full in the middle, small again at the very end
WD_PEAK = env_float("WD_PEAK", 0.05)
WD_START = env_float("WD_START", 0.01)
WD_END = env_float("WD_END", 0.02)
WD_RAMP_STEPS = env_int("WD_RAMP_STEPS", 1000)

# averaging
EMA_DECAY = env_float("EMA_DECAY", 0.997)
EMA_START_SCALE = env_float("EMA_START_SCALE", 0.5)

# quantisation
QUANT_BITS = env_int("QUANT_BITS", 6)
CLIP_STEPS = env_int("CLIP_STEPS", 12)
CLIP_MIN = env_float("CLIP_MIN", 0.70)
CALIB_BATCHES = env_int("CALIB_BATCHES", 8)
CALIB_SEQS = env_int("CALIB_SEQS", 32)
ARTIFACT_LIMIT = 16_000_000
ARTIFACT_NAME = os.environ.get("ARTIFACT_NAME", "final_model.int6.ptz")

# temperature, fitted on train tokens
TEMP_BATCHES = env_int("TEMP_BATCHES", 4)
TEMP_GRID = [0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.00, 1.01, 1.02, 1.03, 1.04]

# evaluation
EVAL_SEQ_LEN = env_int("EVAL_SEQ_LEN", 1024)
EVAL_STRIDE = env_int("EVAL_STRIDE", 64)
EVAL_BATCH_SEQS = env_int("EVAL_BATCH_SEQS", 64)
EVAL_BUDGET_SECONDS = env_float("EVAL_BUDGET_SECONDS", 600.0)

# test-time training
TTT_ENABLED = env_flag("TTT_ENABLED", "1")
TTT_CHUNK_TOKENS = env_int("TTT_CHUNK_TOKENS", 32768)
TTT_EPOCHS = env_int("TTT_EPOCHS", 3)
TTT_LR = env_float("TTT_LR", 1e-4)
TTT_WD = env_float("TTT_WD", 0.01)
TTT_BATCH_SEQS = env_int("TTT_BATCH_SEQS", 4)
TTT_GRAD_CLIP = env_float("TTT_GRAD_CLIP", 1.0)
TTT_FREEZE_BLOCKS = env_int("TTT_FREEZE_BLOCKS", 2)
# adapting stops here (scoring never does): what is left must be enough to score the rest without training
TTT_STOP_SECONDS = env_float("TTT_STOP_SECONDS", 500.0)

# small tensors that stay in float: gains, scales, mixes
KEEP_FLOAT_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "bigram.scale")

# filled in by main(), used everywhere. Yes, globals.
RANK = 0
WORLD = 1
LOCAL_RANK = 0
DEVICE = torch.device("cpu")
IS_MASTER = True
LOGFILE = None


def say(text, to_console=True):
    # print on rank 0 and keep a copy in the log file
    if not IS_MASTER:
        return
    if to_console:
        print(text, flush=True)
    if LOGFILE is not None:
        with open(LOGFILE, "a", encoding="utf-8") as f:
            print(text, file=f)


# -----------------------------
# MUON
# -----------------------------
# Straight from Keller Jordan's code, with decoupled weight decay added. The wd of a group is set from main().

def zeropower_via_newtonschulz5(G, steps=10, eps=1e-7):
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X /= X.norm() + eps
    flipped = G.size(0) > G.size(1)
    if flipped:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if flipped else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, backend_steps, weight_decay=0.0, nesterov=True):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay, nesterov=nesterov),
        )

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr = group["lr"]
            momentum = group["momentum"]
            # every rank does some of the matrices and then we sum up the flat buffer
            total = sum(int(p.numel()) for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    if group["nesterov"]:
                        g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            wd = group["weight_decay"]
            curr = 0
            for p in params:
                g = flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if wd > 0:
                    p.data.mul_(1.0 - lr * wd)
                p.add_(g, alpha=-lr)
                curr += p.numel()


# -----------------------------
# BYTES PER TOKEN
# -----------------------------
# bpb needs to know how many bytes of the original text every token stands for. Same as the baseline:
# the piece without its mark, plus one byte for the space if the token before was not a control token.

def build_byte_tables(sp, vocab_size, device):
    sp_vocab = int(sp.vocab_size())
    size = max(sp_vocab, vocab_size)
    base_bytes = np.zeros((size,), dtype=np.int16)
    leading_space = np.zeros((size,), dtype=np.bool_)
    is_boundary = np.ones((size,), dtype=np.bool_)
    for i in range(sp_vocab):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        is_boundary[i] = False
        if sp.is_byte(i):
            base_bytes[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("▁"):
            leading_space[i] = True
            piece = piece[1:]
        base_bytes[i] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(leading_space, dtype=torch.bool, device=device),
        torch.tensor(is_boundary, dtype=torch.bool, device=device),
    )


def count_bytes(prev_ids, target_ids, tables):
    # bytes of each target, as float64 so that the sums are exact
    base_bytes, leading_space, is_boundary = tables
    n = base_bytes[target_ids].to(torch.float64)
    n += (leading_space[target_ids] & ~is_boundary[prev_ids]).to(torch.float64)
    return n


# -----------------------------
# DATA
# -----------------------------

def load_data_shard(file):
    header_bytes = 256 * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(f) for f in files]).contiguous()


class TokenStream:
    # reads the shards one after the other, for ever
    def __init__(self, pattern):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.file_idx = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def _next_file(self):
        self.file_idx = (self.file_idx + 1) % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
        self.pos = 0

    def take(self, n):
        chunks = []
        remaining = n
        while remaining > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self._next_file()
                continue
            k = min(remaining, avail)
            chunks.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            remaining -= k
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class TrainLoader:
    # all ranks read the same stream and each cuts out its own piece
    def __init__(self, pattern):
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens, seq_len, grad_accum_steps):
        local_tokens = global_tokens // (WORLD * grad_accum_steps)
        span = local_tokens + 1
        chunk = self.stream.take(span * WORLD)
        start = RANK * span
        local = chunk[start : start + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)


# -----------------------------
# THE MODEL
# -----------------------------

class RMSNorm(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    # weights live in fp32, matmuls run in bf16
    def forward(self, x):
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, dims, base):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.cached_len = 0
        self.cos = None
        self.sin = None

    def forward(self, seq_len, device, dtype):
        if self.cos is None or self.cached_len != seq_len or self.cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=torch.float32)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self.cos = freqs.cos()[None, None, :, :]
            self.sin = freqs.sin()[None, None, :, :]
            self.cached_len = seq_len
        return self.cos.to(dtype), self.sin.to(dtype)


def apply_partial_rotary(x, cos, sin):
    # only the first ROPE_DIMS dims turn, the rest of the head knows nothing of positions
    turn, keep = x[..., :ROPE_DIMS], x[..., ROPE_DIMS:]
    half = ROPE_DIMS // 2
    x1, x2 = turn[..., :half], turn[..., half:]
    turned = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((turned, keep), dim=-1)


class Attention(nn.Module):
    def __init__(self, layer_idx):
        super().__init__()
        self.head_dim = MODEL_DIM // NUM_HEADS
        kv_dim = NUM_KV_HEADS * self.head_dim
        self.c_q = CastedLinear(MODEL_DIM, MODEL_DIM, bias=False)
        self.c_k = CastedLinear(MODEL_DIM, kv_dim, bias=False)
        self.c_v = CastedLinear(MODEL_DIM, kv_dim, bias=False)
        self.proj = CastedLinear(MODEL_DIM, MODEL_DIM, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((NUM_HEADS,), QK_GAIN_INIT, dtype=torch.float32))
        self.rotary = Rotary(ROPE_DIMS, ROPE_BASE)
        self.use_xsa = layer_idx >= NUM_LAYERS - XSA_LAST_N

    def take_out_own_value(self, y, v):
        # XSA: remove from each head's output the part that points along the token's own value vector.
        # y is (B, H, T, D), v is (B, KV, T, D); with GQA a group of heads shares one v.
        B, H, T, D = y.shape
        group = H // NUM_KV_HEADS
        y = y.reshape(B, NUM_KV_HEADS, group, T, D)
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        y = y - (y * vn).sum(dim=-1, keepdim=True) * vn
        return y.reshape(B, H, T, D)

    def forward(self, x):
        B, T, C = x.shape
        q = self.c_q(x).reshape(B, T, NUM_HEADS, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(B, T, NUM_KV_HEADS, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(B, T, NUM_KV_HEADS, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(T, x.device, q.dtype)
        q = apply_partial_rotary(q, cos, sin)
        k = apply_partial_rotary(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=(NUM_KV_HEADS != NUM_HEADS))
        if self.use_xsa:
            y = self.take_out_own_value(y, v)
        y = y.transpose(1, 2).contiguous().reshape(B, T, C)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        hidden = int(MODEL_DIM * MLP_MULT)
        self.fc = CastedLinear(MODEL_DIM, hidden, bias=False)
        self.proj = CastedLinear(hidden, MODEL_DIM, bias=False)
        self.proj._zero_init = True

    def forward(self, x):
        # leaky relu squared: a tiny bit better than relu squared for me
        x = F.leaky_relu(self.fc(x), negative_slope=0.5)
        return self.proj(x.square())


class Block(nn.Module):
    def __init__(self, layer_idx):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = Attention(layer_idx)
        self.mlp = MLP()
        self.attn_scale = nn.Parameter(torch.ones(MODEL_DIM, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(MODEL_DIM, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(MODEL_DIM), torch.zeros(MODEL_DIM))).float())

    def forward(self, x, x0):
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(self.attn_norm(x))
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class BigramHash(nn.Module):
    # an embedding for the pair (token before, this token), hashed into a few thousand buckets.
    # Both are INPUT tokens: position i predicts token i+1 and sees tokens i-1 and i here.
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(BIGRAM_BUCKETS, BIGRAM_DIM)
        nn.init.normal_(self.table.weight, std=0.01)
        self.proj = CastedLinear(BIGRAM_DIM, MODEL_DIM, bias=False)
        self.proj._zero_init = True
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def hash(self, ids):
        before = F.pad(ids[:, :-1], (1, 0), value=0)
        h = (36313 * ids.to(torch.int64)) ^ (27191 * before.to(torch.int64))
        h = 1 + h % (BIGRAM_BUCKETS - 1)
        # bucket 0 = "nothing before": first position of a window, and the first token of a document
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 0] = True
        return torch.where(first | (ids == BOS_ID), torch.zeros_like(h), h)

    def forward(self, ids):
        return self.proj(self.table(self.hash(ids)).to(torch.bfloat16)) * self.scale.to(torch.bfloat16)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_emb = nn.Embedding(VOCAB_SIZE, MODEL_DIM)
        self.bigram = BigramHash()
        self.num_encoder_layers = NUM_LAYERS // 2
        self.num_decoder_layers = NUM_LAYERS - self.num_encoder_layers
        self.num_skips = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, MODEL_DIM, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(i) for i in range(NUM_LAYERS)])
        self.final_norm = RMSNorm()
        self.init_weights()

    def init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=TIED_EMBED_INIT_STD)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                if getattr(m, "_zero_init", False):
                    nn.init.zeros_(m.weight)
                else:
                    nn.init.orthogonal_(m.weight, gain=1.0)

    def hidden(self, ids):
        x = self.tok_emb(ids).to(torch.bfloat16) + self.bigram(ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips = []
        # first half remembers, second half takes it back in reverse order (the U-net thing)
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0)
        return self.final_norm(x)

    def logits(self, ids):
        x = self.hidden(ids)
        out = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return LOGIT_SOFTCAP * torch.tanh(out.float() / LOGIT_SOFTCAP)

    def forward(self, ids, targets):
        out = self.logits(ids)
        return F.cross_entropy(out.reshape(-1, out.size(-1)), targets.reshape(-1), reduction="mean")


# -----------------------------
# SCHEDULES
# -----------------------------

def lr_scale_at(step, elapsed_ms, max_ms):
    # flat, then linear down. With a wall clock the length of the warmdown is guessed from the step time so far.
    if WARMDOWN_ITERS <= 0:
        return 1.0
    if max_ms is None:
        start = max(ITERATIONS - WARMDOWN_ITERS, 0)
        if step < start:
            return 1.0
        return max((ITERATIONS - step) / max(WARMDOWN_ITERS, 1), 0.0)
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = WARMDOWN_ITERS * step_ms
    left_ms = max(max_ms - elapsed_ms, 0.0)
    return left_ms / max(warmdown_ms, 1e-9) if left_ms <= warmdown_ms else 1.0


def wd_at(step, scale):
    # ramp from WD_START to WD_PEAK, stay, and slide to WD_END together with the learning rate
    if step < WD_RAMP_STEPS:
        return WD_START + (WD_PEAK - WD_START) * step / max(WD_RAMP_STEPS, 1)
    return WD_END + (WD_PEAK - WD_END) * min(max(scale, 0.0), 1.0)


def momentum_at(step):
    frac = min(step / MUON_MOMENTUM_WARMUP_STEPS, 1.0) if MUON_MOMENTUM_WARMUP_STEPS > 0 else 1.0
    return (1 - frac) * MUON_MOMENTUM_WARMUP_START + frac * MUON_MOMENTUM


# -----------------------------
# QUANTISATION
# -----------------------------
# int6 for the big matrices: every row gets the clip that loses least, where "least" is weighted by how big the inputs
# of that column usually are. Those input sizes are measured on TRAIN tokens. Embeddings are int8, the small stuff fp16.

def calibration_tokens():
    # the end of the last train shard: the run never gets that far in ten minutes
    files = sorted(glob.glob(TRAIN_FILES))
    shard = load_data_shard(Path(files[-1]))
    need = (CALIB_BATCHES + TEMP_BATCHES) * CALIB_SEQS * TRAIN_SEQ_LEN * WORLD + 1
    return shard[-need:].to(torch.int64)


def calibration_batch(tokens, i):
    # batch number i of this rank
    span = CALIB_SEQS * TRAIN_SEQ_LEN
    start = (i * WORLD + RANK) * span
    part = tokens[start : start + span + 1]
    x = part[:-1].reshape(CALIB_SEQS, TRAIN_SEQ_LEN).to(DEVICE)
    y = part[1:].reshape(CALIB_SEQS, TRAIN_SEQ_LEN).to(DEVICE)
    return x, y


@torch.no_grad()
def measure_inputs(model, tokens):
    # mean square of every input column of every linear layer
    sums = {}
    hooks = []

    def make_hook(name):
        def hook(module, args):
            x = args[0].detach().float()
            sums[name] = sums.get(name, 0) + x.reshape(-1, x.size(-1)).square().mean(dim=0)
        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_pre_hook(make_hook(name + ".weight")))
    model.eval()
    for i in range(CALIB_BATCHES):
        x, _ = calibration_batch(tokens, i)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.logits(x)
    for h in hooks:
        h.remove()
    for name in sorted(sums):
        sums[name] /= CALIB_BATCHES
        if WORLD > 1:
            dist.all_reduce(sums[name], op=dist.ReduceOp.SUM)
            sums[name] /= WORLD
    return sums


@torch.no_grad()
def quantise_rows(w, bits, importance=None):
    # try a few clips per row, keep the best one of each row
    w = w.float()
    top = 2 ** (bits - 1) - 1
    peak = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    if importance is None:
        importance = torch.ones(w.size(1), device=w.device)
    best_err = torch.full((w.size(0), 1), float("inf"), device=w.device)
    best_scale = peak / top
    for i in range(CLIP_STEPS):
        ratio = 1.0 - (1.0 - CLIP_MIN) * i / max(CLIP_STEPS - 1, 1)
        scale = (peak * ratio / top).half().float().clamp_min(1e-7)
        q = (w / scale).round().clamp(-top, top)
        err = ((w - q * scale).square() * importance[None, :]).sum(dim=1, keepdim=True)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    q = (w / best_scale).round().clamp(-top, top).to(torch.int8)
    return q, best_scale.half().squeeze(1)


def quantise_state(state, importance):
    out = {}
    for name, t in state.items():
        t = t.detach()
        if t.ndim != 2 or any(pat in name for pat in KEEP_FLOAT_PATTERNS):
            out[name] = ("f", t.half().cpu())
        elif "tok_emb" in name or "bigram.table" in name:
            q, s = quantise_rows(t, 8)
            out[name] = ("q", q.cpu(), s.cpu())
        else:
            q, s = quantise_rows(t, QUANT_BITS, importance.get(name))
            out[name] = ("q", q.cpu(), s.cpu())
    return out


def dequantise_state(packed):
    state = {}
    for name, entry in packed.items():
        if entry[0] == "f":
            state[name] = entry[1].float()
        else:
            state[name] = entry[1].float() * entry[2].float()[:, None]
    return state


def squeeze_bytes(raw):
    if HAVE_ZSTD:
        return b"Z" + zstandard.ZstdCompressor(level=22).compress(raw)
    return b"L" + lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def unsqueeze_bytes(blob):
    if blob[:1] == b"Z":
        return zstandard.ZstdDecompressor().decompress(blob[1:])
    return lzma.decompress(blob[1:])


def write_artifact(packed, temperature):
    buf = io.BytesIO()
    torch.save({"weights": packed, "temperature": temperature}, buf)
    blob = squeeze_bytes(buf.getvalue())
    with open(ARTIFACT_NAME, "wb") as f:
        f.write(blob)
    return len(blob)


def read_artifact():
    with open(ARTIFACT_NAME, "rb") as f:
        blob = f.read()
    return torch.load(io.BytesIO(unsqueeze_bytes(blob)), map_location="cpu", weights_only=True)


# -----------------------------
# TEMPERATURE
# -----------------------------

@torch.no_grad()
def fit_temperature(model, tokens):
    # one number for the whole run. Fitted on the train tokens behind those of the calibration, with the quantised
    # weights, and stored in the artifact. Usually comes out at 0.98 or so.
    model.eval()
    totals = torch.zeros(len(TEMP_GRID), dtype=torch.float64, device=DEVICE)
    for i in range(CALIB_BATCHES, CALIB_BATCHES + TEMP_BATCHES):
        x, y = calibration_batch(tokens, i)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            out = model.logits(x)
        out = out.float().reshape(-1, VOCAB_SIZE)
        for j, t in enumerate(TEMP_GRID):
            totals[j] += F.cross_entropy(out / t, y.reshape(-1), reduction="sum").to(torch.float64)
    if WORLD > 1:
        dist.all_reduce(totals, op=dist.ReduceOp.SUM)
    return float(TEMP_GRID[int(totals.argmin().item())])


# -----------------------------
# EVALUATION
# -----------------------------
# Position p means: tokens[0..p] are known, tokens[p+1] is predicted. There are len(tokens)-1 positions and every one
# of them is scored exactly once by the sliding window and once by TTT. (The plain one drops the odd end of the tokens,
# but that one is only for printing.)

@torch.no_grad()
def eval_plain(model_fn, tokens, tables, inv_temp=1.0):
    # no overlap: cut into sequences, score everything. Quick, only for the prints during training and the round trip.
    n_seqs = (tokens.numel() - 1) // TRAIN_SEQ_LEN
    per_batch = max(VAL_BATCH_SIZE // (WORLD * TRAIN_SEQ_LEN), 1)
    first = n_seqs * RANK // WORLD
    last = n_seqs * (RANK + 1) // WORLD
    sums = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    for s in range(first, last, per_batch):
        e = min(s + per_batch, last)
        part = tokens[s * TRAIN_SEQ_LEN : e * TRAIN_SEQ_LEN + 1].to(device=DEVICE, dtype=torch.int64)
        x = part[:-1].reshape(-1, TRAIN_SEQ_LEN)
        y = part[1:].reshape(-1, TRAIN_SEQ_LEN)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            out = model_fn(x)
        nll = F.cross_entropy(out.float().reshape(-1, VOCAB_SIZE) * inv_temp, y.reshape(-1), reduction="sum")
        sums[0] += nll.to(torch.float64)
        sums[1] += float(y.numel())
        sums[2] += count_bytes(x.reshape(-1), y.reshape(-1), tables).sum()
    if WORLD > 1:
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    loss = sums[0].item() / sums[1].item()
    return loss, sums[0].item() / math.log(2.0) / sums[2].item()


def windows_between(lo, hi):
    # windows (start of the input, first scored position, end of the scored positions) for the positions lo..hi-1.
    # The very first window scores all it has, later ones score EVAL_STRIDE positions with as much context as fits.
    out = []
    a = lo
    while a < hi:
        b = min(a + (EVAL_SEQ_LEN if a == 0 else EVAL_STRIDE), hi)
        out.append((max(b - EVAL_SEQ_LEN, 0), a, b))
        a = b
    return out


@torch.no_grad()
def score_windows(logits_fn, tokens, windows, inv_temp, tables):
    # sums of nats, tokens and bytes over these windows
    sums = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    for i in range(0, len(windows), EVAL_BATCH_SEQS):
        group = windows[i : i + EVAL_BATCH_SEQS]
        rows = [tokens[ws : ws + EVAL_SEQ_LEN + 1] for ws, _, _ in group]
        block = torch.stack(rows).to(device=DEVICE, dtype=torch.int64)
        x = block[:, :-1].contiguous()
        y = block[:, 1:].contiguous()
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            out = logits_fn(x)
        out = out.float() * inv_temp
        nll = F.cross_entropy(out.reshape(-1, VOCAB_SIZE), y.reshape(-1), reduction="none").reshape(y.shape)
        nbytes = count_bytes(x.reshape(-1), y.reshape(-1), tables).reshape(y.shape)
        for r, (ws, a, b) in enumerate(group):
            sums[0] += nll[r, a - ws : b - ws].to(torch.float64).sum()
            sums[1] += float(b - a)
            sums[2] += nbytes[r, a - ws : b - ws].sum()
    return sums


def finish(sums):
    # add up the ranks; mean loss, bits per byte and how many tokens it was
    sums = sums.clone()
    if WORLD > 1:
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    nats, count, nbytes = sums.tolist()
    return nats / count, nats / math.log(2.0) / nbytes, int(count), int(nbytes)


def eval_sliding(logits_fn, tokens, inv_temp, tables):
    # the fixed model, nothing is learned here
    windows = windows_between(0, tokens.numel() - 1)
    first = len(windows) * RANK // WORLD
    last = len(windows) * (RANK + 1) // WORLD
    sums = score_windows(logits_fn, tokens, windows[first:last], inv_temp, tables)
    return finish(sums)


# -----------------------------
# TEST-TIME TRAINING
# -----------------------------
# For each chunk: (1) score it with the weights as they are, (2) train on it. Never the other way round. All ranks keep
# the same weights: each scores its share of the windows, and the gradients are summed before every AdamW step.

def ttt_params(model):
    # not the embeddings, not the first blocks
    chosen = []
    for name, p in model.named_parameters():
        train = name.startswith("blocks.") and int(name.split(".")[1]) >= TTT_FREEZE_BLOCKS
        p.requires_grad_(train)
        if train:
            chosen.append(p)
    return chosen


def sum_gradients(params):
    # one flat buffer, one all_reduce
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in params])
    if WORLD > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    at = 0
    for p in params:
        p.grad = flat[at : at + p.numel()].view_as(p).clone()
        at += p.numel()


def train_on_chunk(model, params, opt, tokens, lo, hi):
    # positions lo..hi-1 are scored already, so tokens[lo..hi] are known
    n_seqs = (hi - lo) // EVAL_SEQ_LEN
    step_seqs = TTT_BATCH_SEQS * WORLD
    model.train()
    for _ in range(TTT_EPOCHS):
        for s in range(0, n_seqs, step_seqs):
            in_step = min(step_seqs, n_seqs - s)
            mine = list(range(s + RANK, s + in_step, WORLD))
            opt.zero_grad(set_to_none=True)
            if mine:
                x = torch.stack([tokens[lo + k * EVAL_SEQ_LEN : lo + (k + 1) * EVAL_SEQ_LEN] for k in mine])
                y = torch.stack([tokens[lo + k * EVAL_SEQ_LEN + 1 : lo + (k + 1) * EVAL_SEQ_LEN + 1] for k in mine])
                x = x.to(device=DEVICE, dtype=torch.int64)
                y = y.to(device=DEVICE, dtype=torch.int64)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x, y) * (len(mine) / in_step)
                loss.backward()
            sum_gradients(params)
            torch.nn.utils.clip_grad_norm_(params, TTT_GRAD_CLIP)
            opt.step()
    model.eval()


def time_is_up(eval_start):
    # rank 0 looks at its watch and tells the others, so that nobody trains alone
    flag = torch.tensor([1 if time.perf_counter() - eval_start > TTT_STOP_SECONDS else 0], device=DEVICE)
    if WORLD > 1:
        dist.broadcast(flag, src=0)
    return bool(flag.item())


def eval_ttt(model, logits_fn, tokens, inv_temp, tables, eval_start):
    total = tokens.numel() - 1
    params = ttt_params(model)
    opt = torch.optim.AdamW(params, lr=TTT_LR, betas=(0.9, 0.95), weight_decay=TTT_WD)
    chunk_starts = list(range(0, total, TTT_CHUNK_TOKENS))
    sums = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    adapting = True
    for c, lo in enumerate(chunk_starts):
        hi = min(lo + TTT_CHUNK_TOKENS, total)
        windows = windows_between(lo, hi)
        # (1) score
        model.eval()
        first = len(windows) * RANK // WORLD
        last = len(windows) * (RANK + 1) // WORLD
        sums += score_windows(logits_fn, tokens, windows[first:last], inv_temp, tables)
        # (2) learn, except after the last chunk where nobody would profit
        if adapting and c % 16 == 0 and time_is_up(eval_start):
            adapting = False
            say(f"ttt: stopped adapting at chunk {c}, the clock says so")
        if adapting and c + 1 < len(chunk_starts):
            lr = TTT_LR * 0.5 * (1.0 + math.cos(math.pi * c / max(len(chunk_starts) - 1, 1)))
            for g in opt.param_groups:
                g["lr"] = lr
            train_on_chunk(model, params, opt, tokens, lo, hi)
        if c % 200 == 0:
            nats, count, nbytes = sums.tolist()
            if count > 0:
                say(f"ttt: chunk {c}/{len(chunk_starts)} rank0 bpb so far {nats / math.log(2.0) / nbytes:.4f}")
    return finish(sums)


# -----------------------------
# MAIN
# -----------------------------
# One long function, top to bottom, in the order in which things happen.

def main():
    global RANK, WORLD, LOCAL_RANK, DEVICE, IS_MASTER, LOGFILE, zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # ---- who am I
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    RANK = int(os.environ.get("RANK", "0"))
    WORLD = int(os.environ.get("WORLD_SIZE", "1"))
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % WORLD != 0:
        raise ValueError(f"WORLD_SIZE={WORLD} must divide 8")
    grad_accum_steps = 8 // WORLD
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    DEVICE = torch.device("cuda", LOCAL_RANK)
    torch.cuda.set_device(DEVICE)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=DEVICE)
        dist.barrier()
    IS_MASTER = RANK == 0
    if IS_MASTER:
        os.makedirs("logs", exist_ok=True)
        LOGFILE = f"logs/{RUN_ID}.txt"
        say(LOGFILE)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    from torch.backends.cuda import enable_cudnn_sdp, enable_flash_sdp, enable_math_sdp, enable_mem_efficient_sdp
    enable_cudnn_sdp(False)
    enable_flash_sdp(True)
    enable_mem_efficient_sdp(False)
    enable_math_sdp(False)
    say(code, to_console=False)
    say("=" * 100, to_console=False)
    say(f"Running Python {sys.version}", to_console=False)
    say(f"Running PyTorch {torch.__version__}", to_console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    say(smi.stdout, to_console=False)

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.cuda.manual_seed_all(SEED)

    # ---- tokenizer and validation tokens
    sp = spm.SentencePieceProcessor(model_file=TOKENIZER_PATH)
    if int(sp.vocab_size()) != VOCAB_SIZE:
        raise ValueError(f"VOCAB_SIZE={VOCAB_SIZE} but the tokenizer has {int(sp.vocab_size())}")
    tables = build_byte_tables(sp, VOCAB_SIZE, DEVICE)
    val_tokens = load_validation_tokens(VAL_FILES)
    say(f"val_loader: pattern={VAL_FILES} tokens:{val_tokens.numel() - 1}")
    say(f"train_loader: {len(glob.glob(TRAIN_FILES))} shards")
    assert TTT_CHUNK_TOKENS % EVAL_STRIDE == 0 and TTT_CHUNK_TOKENS % EVAL_SEQ_LEN == 0
    assert (EVAL_SEQ_LEN % EVAL_STRIDE) == 0

    # ---- the model
    # (everything stays fp32, autocast and CastedLinear do the bf16 part)
    base_model = GPT().to(DEVICE)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[LOCAL_RANK], broadcast_buffers=False) if distributed else compiled
    say(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    say(f"world_size:{WORLD} grad_accum_steps:{grad_accum_steps} seed:{SEED}")
    say(f"xsa_last_n:{XSA_LAST_N} rope_dims:{ROPE_DIMS} bigram:{BIGRAM_BUCKETS}x{BIGRAM_DIM}")

    # ---- optimizers: Muon for the matrices in the blocks, AdamW for the embeddings, Adam for the small stuff
    matrix_params = []
    scalar_params = []
    for name, p in base_model.named_parameters():
        if "tok_emb" in name or "bigram.table" in name:
            continue
        if p.ndim == 2 and not any(pat in name for pat in KEEP_FLOAT_PATTERNS):
            matrix_params.append(p)
        else:
            scalar_params.append(p)
    embed_params = [base_model.tok_emb.weight, base_model.bigram.table.weight]
    opt_embed = torch.optim.AdamW(
        [{"params": embed_params, "lr": EMBED_LR, "base_lr": EMBED_LR}],
        betas=(BETA1, BETA2), eps=ADAM_EPS, weight_decay=WD_START, fused=True,
    )
    opt_muon = Muon(matrix_params, lr=MATRIX_LR, momentum=MUON_MOMENTUM, backend_steps=MUON_BACKEND_STEPS)
    for group in opt_muon.param_groups:
        group["base_lr"] = MATRIX_LR
    opt_scalar = torch.optim.Adam(
        [{"params": scalar_params, "lr": SCALAR_LR, "base_lr": SCALAR_LR}],
        betas=(BETA1, BETA2), eps=ADAM_EPS, fused=True,
    )
    optimizers = [opt_embed, opt_muon, opt_scalar]

    def zero_all():
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    train_loader = TrainLoader(TRAIN_FILES)
    max_ms = 1000.0 * MAX_WALLCLOCK_SECONDS if MAX_WALLCLOCK_SECONDS > 0 else None
    stop_ms = max_ms - 1000.0 * RESERVE_SECONDS if max_ms is not None else None

    # ---- warm-up: a few steps so that everything is compiled, then put the weights back as they were
    if WARMUP_STEPS > 0:
        saved_model = {k: v.detach().cpu().clone() for k, v in base_model.state_dict().items()}
        saved_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for w in range(WARMUP_STEPS):
            zero_all()
            for micro in range(grad_accum_steps):
                if distributed:
                    model.require_backward_grad_sync = micro == grad_accum_steps - 1
                x, y = train_loader.next_batch(TRAIN_BATCH_TOKENS, TRAIN_SEQ_LEN, grad_accum_steps)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    warm_loss = model(x, y)
                (warm_loss / grad_accum_steps).backward()
            for opt in optimizers:
                opt.step()
            if w + 1 == WARMUP_STEPS:
                say(f"warmup_step:{w + 1}/{WARMUP_STEPS}")
        base_model.load_state_dict(saved_model, strict=True)
        for opt, state in zip(optimizers, saved_opts):
            opt.load_state_dict(state)
        zero_all()
        if distributed:
            model.require_backward_grad_sync = True
        train_loader = TrainLoader(TRAIN_FILES)

    # ---- training
    ema = None
    train_ms = 0.0
    stop_after = None
    step = 0
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    while True:
        last_step = step == ITERATIONS or (stop_after is not None and step >= stop_after)

        # have a look at the validation loss. The clock stands still meanwhile, like in the baseline.
        if last_step or (VAL_LOSS_EVERY > 0 and step % VAL_LOSS_EVERY == 0):
            torch.cuda.synchronize()
            train_ms += 1000.0 * (time.perf_counter() - t0)
            base_model.eval()
            val_loss, val_bpb = eval_plain(base_model.logits, val_tokens, tables)
            base_model.train()
            say(f"step:{step}/{ITERATIONS} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{train_ms:.0f}ms")
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            if stop_after is not None and step < ITERATIONS:
                say(f"stopping_early: wallclock train_time:{train_ms:.0f}ms step:{step}/{ITERATIONS}")
            break

        elapsed = train_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale_at(step, elapsed, stop_ms)
        zero_all()
        train_loss = torch.zeros((), device=DEVICE)
        for micro in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro == grad_accum_steps - 1
            x, y = train_loader.next_batch(TRAIN_BATCH_TOKENS, TRAIN_SEQ_LEN, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss / grad_accum_steps).backward()
        train_loss /= grad_accum_steps

        wd = wd_at(step, scale)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        for group in opt_muon.param_groups:
            group["momentum"] = momentum_at(step)
            group["weight_decay"] = wd
        for group in opt_embed.param_groups:
            group["weight_decay"] = wd
        if GRAD_CLIP_NORM > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), GRAD_CLIP_NORM)
        for opt in optimizers:
            opt.step()
        zero_all()

        # EMA, but only once the learning rate comes down (before that it is just noise)
        if scale < EMA_START_SCALE:
            with torch.no_grad():
                if ema is None:
                    ema = {k: v.detach().float().clone() for k, v in base_model.state_dict().items()}
                    say(f"ema:start step:{step}")
                else:
                    for k, v in base_model.state_dict().items():
                        ema[k].mul_(EMA_DECAY).add_(v.detach().float(), alpha=1.0 - EMA_DECAY)

        step += 1
        approx_ms = train_ms + 1000.0 * (time.perf_counter() - t0)
        if TRAIN_LOG_EVERY > 0 and (step <= 10 or step % TRAIN_LOG_EVERY == 0 or stop_after is not None):
            say(
                f"step:{step}/{ITERATIONS} train_loss:{train_loss.item():.4f} wd:{wd:.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )
        reached = stop_ms is not None and approx_ms >= stop_ms
        if distributed and stop_ms is not None:
            reached_t = torch.tensor(int(reached), device=DEVICE)
            dist.all_reduce(reached_t, op=dist.ReduceOp.MAX)
            reached = bool(reached_t.item())
        if stop_after is None and reached:
            stop_after = step

    say(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- averaging, calibration, quantising, temperature. Still on the training clock (t0 is running).
    if ema is not None:
        base_model.load_state_dict({k: v.to(DEVICE) for k, v in ema.items()}, strict=True)
        say("ema: using the averaged weights")
    calib = calibration_tokens()
    importance = measure_inputs(base_model, calib)
    packed = quantise_state(base_model.state_dict(), importance)
    base_model.load_state_dict(dequantise_state(packed), strict=True)
    temperature = fit_temperature(base_model, calib)
    say(f"temperature: {temperature:.2f} (fitted on train tokens)")
    model_bytes = 0
    if IS_MASTER:
        model_bytes = write_artifact(packed, temperature)
    if distributed:
        dist.barrier()
    torch.cuda.synchronize()
    total_ms = train_ms + 1000.0 * (time.perf_counter() - t0)
    say(f"train + calibration + quantising + packing: {total_ms:.0f}ms")
    if max_ms is not None and total_ms > max_ms:
        raise RuntimeError(f"took {total_ms:.0f}ms, more than {max_ms:.0f}ms: raise RESERVE_SECONDS")

    code_bytes = len(code.encode("utf-8"))
    if IS_MASTER:
        say(f"Serialized model: {model_bytes} bytes ({'zstd-22' if HAVE_ZSTD else 'lzma'})")
        say(f"Code size: {code_bytes} bytes")
        say(f"Total submission size: {model_bytes + code_bytes} bytes")
        if model_bytes + code_bytes > ARTIFACT_LIMIT:
            raise RuntimeError("too big: code and model are more than 16,000,000 bytes")

    # ---- evaluation. From here on only the artifact counts: read it back from disk, forget the rest.
    del ema, packed, importance, calib, train_loader
    torch.cuda.synchronize()
    eval_start = time.perf_counter()
    artifact = read_artifact()
    base_model.load_state_dict(dequantise_state(artifact["weights"]), strict=True)
    base_model.eval()
    inv_temp = 1.0 / float(artifact["temperature"])
    logits_fn = torch.compile(base_model.logits, dynamic=False)

    t = time.perf_counter()
    loss, bpb = eval_plain(base_model.logits, val_tokens, tables, inv_temp)
    say(f"final_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000.0 * (time.perf_counter() - t):.0f}ms")

    t = time.perf_counter()
    loss, bpb, n_tokens, n_bytes = eval_sliding(logits_fn, val_tokens, inv_temp, tables)
    say(
        f"final_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{EVAL_STRIDE} "
        f"tokens:{n_tokens} bytes:{n_bytes} eval_time:{1000.0 * (time.perf_counter() - t):.0f}ms"
    )

    # the number that counts: the adapted one when TTT is on (always, by default), else the sliding window above
    if TTT_ENABLED:
        t = time.perf_counter()
        loss, bpb, n_tokens, n_bytes = eval_ttt(base_model, logits_fn, val_tokens, inv_temp, tables, eval_start)
        say(
            f"final_ttt val_loss:{loss:.4f} val_bpb:{bpb:.4f} chunk:{TTT_CHUNK_TOKENS} epochs:{TTT_EPOCHS} "
            f"tokens:{n_tokens} bytes:{n_bytes} eval_time:{1000.0 * (time.perf_counter() - t):.0f}ms"
        )
    if n_tokens != val_tokens.numel() - 1:
        raise RuntimeError(f"scored {n_tokens} tokens, there are {val_tokens.numel() - 1}")
    torch.cuda.synchronize()
    eval_seconds = time.perf_counter() - eval_start
    say(f"total eval time: {eval_seconds:.1f}s of {EVAL_BUDGET_SECONDS:.0f}s")
    if eval_seconds > EVAL_BUDGET_SECONDS:
        raise RuntimeError("the evaluation took too long")
    say(f"final_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
