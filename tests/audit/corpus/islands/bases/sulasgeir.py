"""
sulasgeir: my fork of the baseline train_gpt.py (course project, end of March 2026).

What is different from the baseline:
  * 9 layers, 512 wide, wider MLP, smear gate and a small hashed bigram embedding
  * EMA of the weights, applied once at the end
  * int8 embedding + int6 weights, clip search weighted by activations of train batches, zlib
  * sliding window evaluation with stride 64
  * score-first test-time training with AdamW on chunks of 131,072 tokens (this is the score)

Everything is switched by environment flags, see the block below. The LAST number printed is the score.
"""

import copy
import glob
import io
import math
import os
import random
import subprocess
import sys
import time
import uuid
import zlib
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------------------------------------------------------
# SETTINGS. I gave up on the Hyperparameters class, plain globals are easier to grep.
# -----------------------------------------------------------------------------

# data
DATA_PATH = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
TRAIN_FILES = os.path.join(DATA_PATH, "fineweb_train_*.bin")
VAL_FILES = os.path.join(DATA_PATH, "fineweb_val_*.bin")
TOKENIZER_PATH = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
RUN_ID = os.environ.get("RUN_ID", str(uuid.uuid4()))
SEED = int(os.environ.get("SEED", 1337))

# model
VOCAB_SIZE = int(os.environ.get("VOCAB_SIZE", 1024))
NUM_LAYERS = int(os.environ.get("NUM_LAYERS", 9))
MODEL_DIM = int(os.environ.get("MODEL_DIM", 512))
NUM_HEADS = int(os.environ.get("NUM_HEADS", 8))
NUM_KV_HEADS = int(os.environ.get("NUM_KV_HEADS", 4))
MLP_HIDDEN = int(os.environ.get("MLP_HIDDEN", 1408))
ROPE_BASE = float(os.environ.get("ROPE_BASE", 10000.0))
QK_GAIN_INIT = float(os.environ.get("QK_GAIN_INIT", 1.5))
LOGIT_SOFTCAP = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
TIED_EMBED_INIT_STD = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
USE_SMEAR = int(os.environ.get("USE_SMEAR", 1))
USE_BIGRAM = int(os.environ.get("USE_BIGRAM", 1))
BIGRAM_BUCKETS = int(os.environ.get("BIGRAM_BUCKETS", 2048))
BIGRAM_DIM = int(os.environ.get("BIGRAM_DIM", 128))
BOS_ID = int(os.environ.get("BOS_ID", 1))

# training
ITERATIONS = int(os.environ.get("ITERATIONS", 20000))
WARMDOWN_ITERS = int(os.environ.get("WARMDOWN_ITERS", 3000))
WARMUP_STEPS = int(os.environ.get("WARMUP_STEPS", 20))
TRAIN_BATCH_TOKENS = int(os.environ.get("TRAIN_BATCH_TOKENS", 524288))
TRAIN_SEQ_LEN = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
TRAIN_LOG_EVERY = int(os.environ.get("TRAIN_LOG_EVERY", 200))
VAL_LOSS_EVERY = int(os.environ.get("VAL_LOSS_EVERY", 0))
VAL_BATCH_SEQS = int(os.environ.get("VAL_BATCH_SEQS", 64))
MAX_WALLCLOCK_SECONDS = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
QUANT_RESERVE_SECONDS = float(os.environ.get("QUANT_RESERVE_SECONDS", 30.0))

# optimizer
EMBED_LR = float(os.environ.get("EMBED_LR", 0.05))
MATRIX_LR = float(os.environ.get("MATRIX_LR", 0.04))
SCALAR_LR = float(os.environ.get("SCALAR_LR", 0.04))
BIGRAM_LR = float(os.environ.get("BIGRAM_LR", 0.03))
MUON_MOMENTUM = float(os.environ.get("MUON_MOMENTUM", 0.95))
MUON_MOMENTUM_START = float(os.environ.get("MUON_MOMENTUM_START", 0.85))
MUON_MOMENTUM_STEPS = int(os.environ.get("MUON_MOMENTUM_STEPS", 500))
MUON_NS_STEPS = int(os.environ.get("MUON_NS_STEPS", 5))
MUON_WD = float(os.environ.get("MUON_WD", 0.01))
BETA1 = float(os.environ.get("BETA1", 0.9))
BETA2 = float(os.environ.get("BETA2", 0.95))
ADAM_EPS = float(os.environ.get("ADAM_EPS", 1e-8))
GRAD_CLIP = float(os.environ.get("GRAD_CLIP", 1.0))

# EMA
USE_EMA = int(os.environ.get("USE_EMA", 1))
EMA_DECAY = float(os.environ.get("EMA_DECAY", 0.997))
EMA_EVERY = int(os.environ.get("EMA_EVERY", 1))
EMA_START_STEP = int(os.environ.get("EMA_START_STEP", 100))

# quantization
QUANT_BITS = int(os.environ.get("QUANT_BITS", 6))
CALIB_BATCHES = int(os.environ.get("CALIB_BATCHES", 8))
CALIB_SEQS = int(os.environ.get("CALIB_SEQS", 16))
CLIP_GRID = [float(c) for c in os.environ.get("CLIP_GRID", "1.0,0.95,0.9,0.85,0.8,0.75,0.7").split(",")]
KEEP_FLOAT_NUMEL = int(os.environ.get("KEEP_FLOAT_NUMEL", 8192))
ARTIFACT = os.environ.get("ARTIFACT", "final_model.int6.ptz")
SIZE_LIMIT = int(os.environ.get("SIZE_LIMIT", 16000000))

# evaluation: plain | sliding | ttt | sliding_ttt
EVAL_MODE = os.environ.get("EVAL_MODE", "sliding_ttt")
EVAL_SEQ_LEN = int(os.environ.get("EVAL_SEQ_LEN", 1024))
EVAL_STRIDE = int(os.environ.get("EVAL_STRIDE", 64))
EVAL_BATCH_WINDOWS = int(os.environ.get("EVAL_BATCH_WINDOWS", 128))
EVAL_STOP_TTT_SECONDS = float(os.environ.get("EVAL_STOP_TTT_SECONDS", 450.0))

# test-time training
TTT_CHUNK = int(os.environ.get("TTT_CHUNK", 131072))
TTT_EPOCHS = int(os.environ.get("TTT_EPOCHS", 2))
TTT_LR = float(os.environ.get("TTT_LR", 1e-4))
TTT_WD = float(os.environ.get("TTT_WD", 0.0))
TTT_BATCH_SEQS = int(os.environ.get("TTT_BATCH_SEQS", 8))
TTT_CLIP = float(os.environ.get("TTT_CLIP", 1.0))
TTT_FREEZE_BLOCKS = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
TTT_COSINE = int(os.environ.get("TTT_COSINE", 1))
LOGIT_TEMP = float(os.environ.get("LOGIT_TEMP", 1.0))

# bigram count mixture in the TTT evaluation (off, it gave me nothing)
COUNT_MIX = int(os.environ.get("COUNT_MIX", 0))
COUNT_LAMBDA = float(os.environ.get("COUNT_LAMBDA", 0.02))
COUNT_ALPHA = float(os.environ.get("COUNT_ALPHA", 50.0))

# names of parameters that must not go to Muon and are kept in float
CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear_gate", "bigram_scale")

# filled in by main()
RANK = 0
WORLD = 1
LOCAL_RANK = 0
DEV = torch.device("cuda")
MASTER = True
LOGFILE = None


def log0(msg, console=True):
    if not MASTER:
        return
    if console:
        print(msg, flush=True)
    if LOGFILE is not None:
        with open(LOGFILE, "a", encoding="utf-8") as f:
            print(msg, file=f)


# -----------------------------------------------------------------------------
# DATA
# -----------------------------------------------------------------------------


def read_shard(file):
    # header: 256 int32, [0] magic, [1] version, [2] number of tokens; then uint16 tokens
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"bad shard header: {file}")
    n = int(header[2])
    if os.path.getsize(file) != 256 * 4 + n * 2:
        raise ValueError(f"bad shard size: {file}")
    toks = np.fromfile(file, dtype="<u2", count=n, offset=256 * 4)
    if toks.size != n:
        raise ValueError(f"short read: {file}")
    return torch.from_numpy(toks.astype(np.uint16, copy=False))


def load_val_tokens(pattern):
    # the whole validation split, in order, nothing is cut off
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no validation files for {pattern}")
    parts = []
    for f in files:
        parts.append(read_shard(f))
    tokens = torch.cat(parts).contiguous()
    return tokens


class TrainFeeder:
    """Walks over the train shards forever. Every rank reads the same stream and takes its own part of it."""

    def __init__(self, pattern, first=0):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(f"no train files for {pattern}")
        self.idx = first % len(self.files)
        self.tokens = read_shard(self.files[self.idx])
        self.pos = 0

    def _next_file(self):
        self.idx = (self.idx + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.idx])
        self.pos = 0

    def take(self, n):
        got = []
        left = n
        while left > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self._next_file()
                continue
            k = min(left, avail)
            got.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            left -= k
        if len(got) == 1:
            return got[0]
        return torch.cat(got)

    def batch(self, global_tokens, seq_len, accum_steps=1):
        local = global_tokens // (WORLD * accum_steps)
        local = (local // seq_len) * seq_len
        span = local + 1
        block = self.take(span * WORLD)
        mine = block[RANK * span : (RANK + 1) * span].to(dtype=torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        return x.to(DEV, non_blocking=True), y.to(DEV, non_blocking=True)


# -----------------------------------------------------------------------------
# BYTES PER TOKEN (needed for bits per byte, because the tokenizer may be anything)
# -----------------------------------------------------------------------------


def make_byte_tables(sp, vocab_size):
    # base_bytes: bytes of the piece without its leading space mark
    # lead_space: 1 where the piece starts with the mark (one byte, if a text token stands before it)
    # no_text:    1 for control/unknown/unused pieces, a space after those is not in the text
    n_sp = int(sp.vocab_size())
    size = max(n_sp, vocab_size)
    base_bytes = np.zeros((size,), dtype=np.int16)
    lead_space = np.zeros((size,), dtype=np.bool_)
    no_text = np.ones((size,), dtype=np.bool_)
    for i in range(n_sp):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        no_text[i] = False
        if sp.is_byte(i):
            base_bytes[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            lead_space[i] = True
            piece = piece[1:]
        base_bytes[i] = len(piece.encode("utf-8"))
    t_base = torch.tensor(base_bytes, dtype=torch.int16, device=DEV)
    t_lead = torch.tensor(lead_space, dtype=torch.bool, device=DEV)
    t_none = torch.tensor(no_text, dtype=torch.bool, device=DEV)
    return t_base, t_lead, t_none


def count_bytes(prev_ids, tgt_ids, tables):
    # bytes of the original text that the target tokens stand for
    t_base, t_lead, t_none = tables
    nbytes = t_base[tgt_ids].to(torch.int64)
    nbytes = nbytes + (t_lead[tgt_ids] & ~t_none[prev_ids]).to(torch.int64)
    return nbytes


# -----------------------------------------------------------------------------
# MUON (from modded-nanogpt, like the baseline)
# -----------------------------------------------------------------------------


def newton_schulz(G, steps=5, eps=1e-7):
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    flip = G.size(0) > G.size(1)
    if flip:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    if flip:
        X = X.T
    return X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, ns_steps, weight_decay=0.0, nesterov=True):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay, nesterov=nesterov),
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr = group["lr"]
            momentum = group["momentum"]
            total = sum(int(p.numel()) for p in params)
            # each rank orthogonalises every WORLD-th matrix, then the flat buffer is summed
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cur = 0
            for i, p in enumerate(params):
                if i % WORLD == RANK and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(g)
                    buf = state["buf"]
                    buf.mul_(momentum).add_(g)
                    if group["nesterov"]:
                        g = g.add(buf, alpha=momentum)
                    g = newton_schulz(g, steps=group["ns_steps"])
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[cur : cur + p.numel()] = g.reshape(-1)
                cur += p.numel()
            if WORLD > 1:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            cur = 0
            for p in params:
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                g = flat[cur : cur + p.numel()].view_as(p).to(dtype=p.dtype)
                p.add_(g, alpha=-lr)
                cur += p.numel()
        return loss


# -----------------------------------------------------------------------------
# MODEL
# -----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    # weights stay in fp32 for the optimizer, the matmul runs in bf16
    def forward(self, x):
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, dim, base=10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.cached_len = 0
        self.cos = None
        self.sin = None

    def forward(self, seq_len, device, dtype):
        if self.cos is None or self.cached_len != seq_len or self.cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self.cos = freqs.cos()[None, None, :, :]
            self.sin = freqs.sin()[None, None, :, :]
            self.cached_len = seq_len
        return self.cos.to(dtype=dtype), self.sin.to(dtype=dtype)


def rotate(x, cos, sin):
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, rope_base, qk_gain_init):
        super().__init__()
        assert dim % num_heads == 0 and num_heads % num_kv_heads == 0
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, base=rope_base)

    def forward(self, x):
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x):
        x = torch.relu(self.fc(x))
        return self.proj(x.square())


class Block(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, mlp_hidden, rope_base, qk_gain_init):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = Attention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init)
        self.mlp = MLP(dim, mlp_hidden)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x, x0):
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(self.attn_norm(x))
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_emb = nn.Embedding(VOCAB_SIZE, MODEL_DIM)
        if USE_BIGRAM:
            self.bigram_emb = nn.Embedding(BIGRAM_BUCKETS, BIGRAM_DIM)
            self.bigram_proj = CastedLinear(BIGRAM_DIM, MODEL_DIM, bias=False)
            self.bigram_proj._zero_init = True
            self.bigram_scale = nn.Parameter(torch.ones(MODEL_DIM, dtype=torch.float32))
        if USE_SMEAR:
            self.smear_gate = nn.Parameter(torch.full((MODEL_DIM,), -3.0, dtype=torch.float32))
        self.n_enc = NUM_LAYERS // 2
        self.n_dec = NUM_LAYERS - self.n_enc
        self.n_skip = min(self.n_enc, self.n_dec)
        self.skip_weights = nn.Parameter(torch.ones(self.n_skip, MODEL_DIM, dtype=torch.float32))
        blocks = []
        for _ in range(NUM_LAYERS):
            blocks.append(Block(MODEL_DIM, NUM_HEADS, NUM_KV_HEADS, MLP_HIDDEN, ROPE_BASE, QK_GAIN_INIT))
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RMSNorm()
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=TIED_EMBED_INIT_STD)
        if USE_BIGRAM:
            nn.init.normal_(self.bigram_emb.weight, mean=0.0, std=0.01)
        for m in self.modules():
            if isinstance(m, nn.Linear) and getattr(m, "_zero_init", False):
                nn.init.zeros_(m.weight)

    def embed(self, ids):
        x = self.tok_emb(ids)
        # 0 where a document starts: nothing of the document before may be mixed into the BOS token
        keep = (ids[:, 1:] != BOS_ID).to(dtype=x.dtype).unsqueeze(-1)
        if USE_BIGRAM:
            prev = F.pad(ids[:, :-1], (1, 0), value=0)
            bucket = (prev * 36313 + ids * 27191) % BIGRAM_BUCKETS
            big = self.bigram_proj(self.bigram_emb(bucket))
            big = torch.cat((torch.zeros_like(big[:, :1]), big[:, 1:] * keep), dim=1)
            x = x + big * self.bigram_scale.to(dtype=x.dtype)
        if USE_SMEAR:
            gate = torch.sigmoid(self.smear_gate).to(dtype=x.dtype)
            smeared = x[:, 1:] + gate * keep * x[:, :-1]
            x = torch.cat((x[:, :1], smeared), dim=1)
        return F.rms_norm(x, (x.size(-1),))

    def logits(self, ids):
        x = self.embed(ids)
        x0 = x
        skips = []
        for i in range(self.n_enc):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.n_dec):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.n_enc + i](x, x0)
        x = self.final_norm(x)
        out = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return LOGIT_SOFTCAP * torch.tanh(out / LOGIT_SOFTCAP)

    def forward(self, ids, targets):
        out = self.logits(ids)
        return F.cross_entropy(out.reshape(-1, out.size(-1)).float(), targets.reshape(-1), reduction="mean")


def small_params_to_fp32(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if (p.ndim < 2 or any(c in name for c in CONTROL_NAMES)) and p.dtype != torch.float32:
                p.data = p.data.float()


# -----------------------------------------------------------------------------
# QUANTIZATION: int8 for the embeddings, int6 for the matrices, fp16 for the rest
# -----------------------------------------------------------------------------


def collect_moments(model, feeder, n_batches, n_seqs):
    """Mean square of every input channel of every linear layer, over batches of the TRAIN stream."""
    sums = {}
    handles = []

    def make_hook(key):
        def hook(module, inputs):
            v = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            sq = v.square().sum(dim=0)
            if key in sums:
                sums[key] += sq
            else:
                sums[key] = sq

        return hook

    for name, m in model.named_modules():
        if isinstance(m, CastedLinear):
            handles.append(m.register_forward_pre_hook(make_hook(name + ".weight")))
    model.eval()
    n_rows = 0
    with torch.no_grad():
        for _ in range(n_batches):
            x, _ = feeder.batch(n_seqs * TRAIN_SEQ_LEN * WORLD, TRAIN_SEQ_LEN)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                model.logits(x)
            n_rows += x.numel()
    for h in handles:
        h.remove()
    for key in sums:
        if WORLD > 1:
            dist.all_reduce(sums[key], op=dist.ReduceOp.SUM)
        sums[key] = (sums[key] / (n_rows * WORLD)).cpu()
    model.train()
    return sums


def quant_rows_int8(w):
    w = w.float()
    scale = (w.abs().amax(dim=1) / 127.0).clamp_min(1e-8)
    q = torch.clamp(torch.round(w / scale[:, None]), -127, 127).to(torch.int8)
    return q.contiguous(), scale.to(torch.float16).contiguous()


def quant_rows_low(w, moment, bits):
    # try several clips for every row, keep the one with the smallest activation-weighted error
    w = w.float()
    top = 2 ** (bits - 1) - 1
    amax = w.abs().amax(dim=1).clamp_min(1e-8)
    if moment is None:
        weight = torch.ones(w.size(1))
    else:
        weight = moment.to(w.device).float() + 1e-8
    best_q = None
    best_scale = None
    best_err = None
    for c in CLIP_GRID:
        scale = (amax * c / top).to(torch.float16).float().clamp_min(1e-7)
        q = torch.clamp(torch.round(w / scale[:, None]), -top, top)
        err = ((q * scale[:, None] - w).square() * weight[None, :]).sum(dim=1)
        if best_err is None:
            best_q, best_scale, best_err = q, scale, err
        else:
            better = err < best_err
            best_q = torch.where(better[:, None], q, best_q)
            best_scale = torch.where(better, scale, best_scale)
            best_err = torch.where(better, err, best_err)
    return best_q.to(torch.int8).contiguous(), best_scale.to(torch.float16).contiguous()


def quantize_state(sd, moments):
    obj = {"q": {}, "s": {}, "raw": {}, "dtype": {}}
    n_int8 = 0
    n_low = 0
    n_raw = 0
    for name, t in sd.items():
        t = t.detach().cpu().contiguous()
        obj["dtype"][name] = str(t.dtype).replace("torch.", "")
        if t.ndim != 2 or t.numel() <= KEEP_FLOAT_NUMEL or any(c in name for c in CONTROL_NAMES):
            if t.is_floating_point():
                obj["raw"][name] = t.to(torch.float16)
            else:
                obj["raw"][name] = t
            n_raw += t.numel()
            continue
        if name.endswith("emb.weight"):
            q, s = quant_rows_int8(t)
            n_int8 += t.numel()
        else:
            q, s = quant_rows_low(t, moments.get(name), QUANT_BITS)
            n_low += t.numel()
        obj["q"][name] = q
        obj["s"][name] = s
    log0(f"quant: int8 {n_int8} params, int{QUANT_BITS} {n_low} params, float {n_raw} params")
    return obj


def dequantize_state(obj):
    sd = {}
    for name, q in obj["q"].items():
        dtype = getattr(torch, obj["dtype"][name])
        s = obj["s"][name].float()
        sd[name] = (q.float() * s[:, None]).to(dtype).contiguous()
    for name, t in obj["raw"].items():
        dtype = getattr(torch, obj["dtype"][name])
        sd[name] = t.to(dtype).contiguous()
    return sd


# -----------------------------------------------------------------------------
# EVALUATION
# -----------------------------------------------------------------------------
# target number t is the token tokens[t + 1], predicted from tokens[..t]. There are tokens.numel() - 1 targets.


def windows_for(lo, hi, seq_len, stride):
    """(start, a, b): the window reads tokens[start:b] and scores the targets a..b-1, every target of lo..hi-1 once."""
    wins = []
    for a in range(lo, hi, stride):
        b = min(a + stride, hi)
        start = max(0, b - seq_len)
        wins.append((start, a, b))
    return wins


def fill_batch(tokens, wins, seq_len):
    n = len(wins)
    x = torch.zeros((n, seq_len), dtype=torch.int64, device=DEV)
    y = torch.zeros((n, seq_len), dtype=torch.int64, device=DEV)
    m = torch.zeros((n, seq_len), dtype=torch.bool, device=DEV)
    for i, (start, a, b) in enumerate(wins):
        seg = tokens[start : b + 1].to(torch.int64)
        x[i, : b - start] = seg[:-1]
        y[i, : b - start] = seg[1:]
        m[i, a - start : b - start] = True
    return x, y, m


def eval_plain(model, tokens, tables, seq_len, batch_seqs):
    # like eval_val of the baseline: windows side by side, no overlap
    pl_nll = torch.zeros((), dtype=torch.float64, device=DEV)
    pl_tok = torch.zeros((), dtype=torch.float64, device=DEV)
    pl_byt = torch.zeros((), dtype=torch.float64, device=DEV)
    n_targets = tokens.numel() - 1
    wins = windows_for(0, n_targets, seq_len, seq_len)
    mine = wins[RANK::WORLD]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for i in range(0, len(mine), batch_seqs):
            x, y, m = fill_batch(tokens, mine[i : i + batch_seqs], seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                lg = model.logits(x)
            nll = F.cross_entropy(lg.reshape(-1, lg.size(-1)).float(), y.reshape(-1), reduction="none").view_as(y)
            pl_nll += nll[m].to(torch.float64).sum()
            pl_tok += m.sum().to(torch.float64)
            pl_byt += count_bytes(x[m], y[m], tables).sum().to(torch.float64)
    if WORLD > 1:
        dist.all_reduce(pl_nll, op=dist.ReduceOp.SUM)
        dist.all_reduce(pl_tok, op=dist.ReduceOp.SUM)
        dist.all_reduce(pl_byt, op=dist.ReduceOp.SUM)
    if was_training:
        model.train()
    val_loss = (pl_nll / pl_tok).item()
    val_bpb = pl_nll.item() / math.log(2.0) / pl_byt.item()
    return val_loss, val_bpb


def eval_sliding(model, tokens, tables, seq_len, stride, batch_windows):
    # every window moves on by `stride` and scores only its last `stride` targets
    sw_nll = torch.zeros((), dtype=torch.float64, device=DEV)
    sw_tok = torch.zeros((), dtype=torch.float64, device=DEV)
    sw_byt = torch.zeros((), dtype=torch.float64, device=DEV)
    n_targets = tokens.numel() - 1
    wins = windows_for(0, n_targets, seq_len, stride)
    per = (len(wins) + WORLD - 1) // WORLD
    mine = wins[RANK * per : (RANK + 1) * per]
    model.eval()
    fwd = torch.compile(model.logits, dynamic=False)
    t_start = time.perf_counter()
    with torch.no_grad():
        for i in range(0, len(mine), batch_windows):
            batch = mine[i : i + batch_windows]
            x, y, m = fill_batch(tokens, batch, seq_len)
            n_real = len(batch)
            if n_real < batch_windows:
                # keep the shape for the compiled graph, the added rows are masked out
                extra = batch_windows - n_real
                x = F.pad(x, (0, 0, 0, extra))
                y = F.pad(y, (0, 0, 0, extra))
                m = F.pad(m, (0, 0, 0, extra))
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                lg = fwd(x)
            nll = F.cross_entropy(lg.reshape(-1, lg.size(-1)).float(), y.reshape(-1), reduction="none").view_as(y)
            sw_nll += nll[m].to(torch.float64).sum()
            sw_tok += m.sum().to(torch.float64)
            sw_byt += count_bytes(x[m], y[m], tables).sum().to(torch.float64)
            if MASTER and (i // batch_windows) % 200 == 0:
                done = min(i + batch_windows, len(mine)) / max(len(mine), 1)
                print(f"  sliding {100 * done:.1f}% {time.perf_counter() - t_start:.0f}s", flush=True)
    if WORLD > 1:
        dist.all_reduce(sw_nll, op=dist.ReduceOp.SUM)
        dist.all_reduce(sw_tok, op=dist.ReduceOp.SUM)
        dist.all_reduce(sw_byt, op=dist.ReduceOp.SUM)
    if int(sw_tok.item()) != n_targets:
        log0(f"WARNING sliding scored {int(sw_tok.item())} of {n_targets} tokens")
    val_loss = (sw_nll / sw_tok).item()
    val_bpb = sw_nll.item() / math.log(2.0) / sw_byt.item()
    return val_loss, val_bpb


def count_mix_nll(lg, x, y, counts):
    """Mixture of the model with a bigram count table. Both are distributions over the whole vocabulary, so is the sum."""
    p_model = torch.softmax(lg.float(), dim=-1)
    rows = counts[x]
    p_count = (rows + COUNT_ALPHA / VOCAB_SIZE) / (rows.sum(dim=-1, keepdim=True) + COUNT_ALPHA)
    p_mix = (1.0 - COUNT_LAMBDA) * p_model + COUNT_LAMBDA * p_count
    return -torch.log(p_mix.gather(-1, y.unsqueeze(-1)).squeeze(-1).clamp_min(1e-12))


def eval_ttt(model, tokens, tables, seq_len, stride, batch_windows, t_eval_begin):
    """
    Score-first test-time training. For every chunk of TTT_CHUNK tokens:
      1. score all its targets with the weights as they are (sliding windows)
      2. only then train on the chunk
    The weights that score chunk c have seen the chunks before c and nothing else.
    """
    tt_nll = torch.zeros((), dtype=torch.float64, device=DEV)
    tt_tok = torch.zeros((), dtype=torch.float64, device=DEV)
    tt_byt = torch.zeros((), dtype=torch.float64, device=DEV)
    n_targets = tokens.numel() - 1
    chunk_starts = list(range(0, n_targets, TTT_CHUNK))
    n_chunks = len(chunk_starts)
    log0(f"ttt: {n_targets} targets in {n_chunks} chunks of {TTT_CHUNK}, epochs {TTT_EPOCHS}, lr {TTT_LR}")

    # which parameters are trained
    train_params = []
    for name, p in model.named_parameters():
        frozen = name.startswith("tok_emb") or name.startswith("bigram_emb")
        for b in range(TTT_FREEZE_BLOCKS):
            if name.startswith(f"blocks.{b}."):
                frozen = True
        p.requires_grad_(not frozen)
        if not frozen:
            train_params.append(p)
    log0(f"ttt: {sum(p.numel() for p in train_params)} trainable params")
    opt = torch.optim.AdamW(train_params, lr=TTT_LR, betas=(0.9, 0.99), eps=1e-8, weight_decay=TTT_WD)
    fwd = torch.compile(model.logits, dynamic=False)

    # tables for the optional count mixture
    counts = None
    if COUNT_MIX:
        counts = torch.zeros((VOCAB_SIZE, VOCAB_SIZE), dtype=torch.float32, device=DEV)

    stopped = False
    t_start = time.perf_counter()
    for ci in range(n_chunks):
        lo = chunk_starts[ci]
        hi = min(lo + TTT_CHUNK, n_targets)

        # ---- 1. score the chunk, the ranks share its windows
        model.eval()
        wins = windows_for(lo, hi, seq_len, stride)
        mine = wins[RANK::WORLD]
        with torch.no_grad():
            for i in range(0, len(mine), batch_windows):
                batch = mine[i : i + batch_windows]
                x, y, m = fill_batch(tokens, batch, seq_len)
                n_real = len(batch)
                if n_real < batch_windows:
                    extra = batch_windows - n_real
                    x = F.pad(x, (0, 0, 0, extra))
                    y = F.pad(y, (0, 0, 0, extra))
                    m = F.pad(m, (0, 0, 0, extra))
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    lg = fwd(x)
                lg = lg.float() / LOGIT_TEMP
                if COUNT_MIX:
                    tok_nll = count_mix_nll(lg[m], x[m], y[m], counts)
                else:
                    tok_nll = F.cross_entropy(lg[m], y[m], reduction="none")
                tt_nll += tok_nll.to(torch.float64).sum()
                tt_tok += m.sum().to(torch.float64)
                tt_byt += count_bytes(x[m], y[m], tables).sum().to(torch.float64)

        # ---- 2. the chunk is scored, now it may be used
        if COUNT_MIX:
            seg = tokens[lo : hi + 1].to(torch.int64)
            pair = seg[:-1] * VOCAB_SIZE + seg[1:]
            counts += torch.bincount(pair, minlength=VOCAB_SIZE * VOCAB_SIZE).view(VOCAB_SIZE, VOCAB_SIZE).float()

        # no more training when the time is nearly over (rank 0 decides, the others follow)
        flag = torch.tensor([1 if time.perf_counter() - t_eval_begin > EVAL_STOP_TTT_SECONDS else 0], device=DEV)
        if WORLD > 1:
            dist.broadcast(flag, src=0)
        if int(flag.item()) == 1 and not stopped:
            stopped = True
            log0(f"ttt: stop training after chunk {ci}, only scoring from here")

        if not stopped and ci < n_chunks - 1:
            n_seqs = (hi - lo) // seq_len
            n_seqs = (n_seqs // WORLD) * WORLD
            per = n_seqs // WORLD
            if TTT_COSINE:
                lr_now = TTT_LR * 0.5 * (1.0 + math.cos(math.pi * ci / max(n_chunks, 1)))
            else:
                lr_now = TTT_LR
            for g in opt.param_groups:
                g["lr"] = lr_now
            model.train()
            for ep in range(TTT_EPOCHS):
                for j in range(0, per, TTT_BATCH_SEQS):
                    k = min(j + TTT_BATCH_SEQS, per)
                    first = lo + (RANK * per + j) * seq_len
                    last = lo + (RANK * per + k) * seq_len
                    piece = tokens[first : last + 1].to(torch.int64)
                    bx = piece[:-1].reshape(-1, seq_len)
                    by = piece[1:].reshape(-1, seq_len)
                    opt.zero_grad(set_to_none=True)
                    with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                        loss = model(bx, by)
                    loss.backward()
                    if WORLD > 1:
                        for p in train_params:
                            if p.grad is not None:
                                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
                    torch.nn.utils.clip_grad_norm_(train_params, TTT_CLIP)
                    opt.step()

        if ci % 20 == 0 or ci == n_chunks - 1:
            # only this rank's share so far, just to see that it moves
            run_bpb = tt_nll.item() / math.log(2.0) / max(tt_byt.item(), 1.0)
            log0(f"  ttt chunk {ci + 1}/{n_chunks} running_bpb:{run_bpb:.5f} {time.perf_counter() - t_start:.0f}s")

    if WORLD > 1:
        dist.all_reduce(tt_nll, op=dist.ReduceOp.SUM)
        dist.all_reduce(tt_tok, op=dist.ReduceOp.SUM)
        dist.all_reduce(tt_byt, op=dist.ReduceOp.SUM)
    if int(tt_tok.item()) != n_targets:
        log0(f"WARNING ttt scored {int(tt_tok.item())} of {n_targets} tokens")
    val_loss = (tt_nll / tt_tok).item()
    val_bpb = tt_nll.item() / math.log(2.0) / tt_byt.item()
    return val_loss, val_bpb


def run_evaluation(model, tokens, tables):
    """Runs the mode that EVAL_MODE names. Returns the pair that is the score of this script."""
    torch.cuda.synchronize()
    t_eval_begin = time.perf_counter()
    score = None

    if EVAL_MODE == "plain":
        t0 = time.perf_counter()
        pl_loss, pl_bpb = eval_plain(model, tokens, tables, EVAL_SEQ_LEN, VAL_BATCH_SEQS)
        torch.cuda.synchronize()
        log0(f"eval_plain val_loss:{pl_loss:.4f} val_bpb:{pl_bpb:.4f} time:{1000 * (time.perf_counter() - t0):.0f}ms")
        score = (pl_loss, pl_bpb)

    if EVAL_MODE == "sliding" or EVAL_MODE == "sliding_ttt":
        t0 = time.perf_counter()
        sw_loss, sw_bpb = eval_sliding(model, tokens, tables, EVAL_SEQ_LEN, EVAL_STRIDE, EVAL_BATCH_WINDOWS)
        torch.cuda.synchronize()
        log0(f"eval_sliding val_loss:{sw_loss:.4f} val_bpb:{sw_bpb:.4f} time:{1000 * (time.perf_counter() - t0):.0f}ms")
        score = (sw_loss, sw_bpb)

    if EVAL_MODE == "ttt" or EVAL_MODE == "sliding_ttt":
        t0 = time.perf_counter()
        tt_loss, tt_bpb = eval_ttt(
            model, tokens, tables, EVAL_SEQ_LEN, EVAL_STRIDE, EVAL_BATCH_WINDOWS, t_eval_begin
        )
        torch.cuda.synchronize()
        log0(f"eval_ttt val_loss:{tt_loss:.4f} val_bpb:{tt_bpb:.4f} time:{1000 * (time.perf_counter() - t0):.0f}ms")
        score = (tt_loss, tt_bpb)

    if score is None:
        raise ValueError(f"EVAL_MODE={EVAL_MODE} is unknown")
    log0(f"eval total time:{1000 * (time.perf_counter() - t_eval_begin):.0f}ms")
    return score


# -----------------------------------------------------------------------------
# MAIN
# -----------------------------------------------------------------------------


def build_optimizers(model):
    # matrices of the blocks -> Muon, embeddings -> Adam, everything small -> Adam
    matrix_params = []
    scalar_params = []
    for name, p in model.named_parameters():
        if name.startswith("tok_emb") or name.startswith("bigram_emb"):
            continue
        if p.ndim == 2 and not any(c in name for c in CONTROL_NAMES):
            matrix_params.append(p)
        else:
            scalar_params.append(p)
    opt_emb = torch.optim.Adam(
        [{"params": [model.tok_emb.weight], "lr": EMBED_LR, "base_lr": EMBED_LR}],
        betas=(BETA1, BETA2),
        eps=ADAM_EPS,
        fused=True,
    )
    opt_muon = Muon(
        matrix_params,
        lr=MATRIX_LR,
        momentum=MUON_MOMENTUM,
        ns_steps=MUON_NS_STEPS,
        weight_decay=MUON_WD,
    )
    for g in opt_muon.param_groups:
        g["base_lr"] = MATRIX_LR
    opt_scalar = torch.optim.Adam(
        [{"params": scalar_params, "lr": SCALAR_LR, "base_lr": SCALAR_LR}],
        betas=(BETA1, BETA2),
        eps=ADAM_EPS,
        fused=True,
    )
    opts = [opt_emb, opt_muon, opt_scalar]
    if USE_BIGRAM:
        opt_big = torch.optim.Adam(
            [{"params": [model.bigram_emb.weight], "lr": BIGRAM_LR, "base_lr": BIGRAM_LR}],
            betas=(BETA1, BETA2),
            eps=ADAM_EPS,
            fused=True,
        )
        opts.append(opt_big)
    n_matrix = sum(p.numel() for p in matrix_params)
    n_scalar = sum(p.numel() for p in scalar_params)
    log0(f"params for muon: {n_matrix}, for adam (small ones): {n_scalar}")
    return opts, opt_muon


def lr_factor(step, elapsed_ms, limit_ms):
    # linear warmdown that ends at the time limit (or at ITERATIONS when there is none)
    if WARMDOWN_ITERS <= 0:
        return 1.0
    if limit_ms is None:
        begin = max(ITERATIONS - WARMDOWN_ITERS, 0)
        if step < begin:
            return 1.0
        return max((ITERATIONS - step) / max(WARMDOWN_ITERS, 1), 0.0)
    step_ms = elapsed_ms / max(step, 1)
    down_ms = WARMDOWN_ITERS * step_ms
    left_ms = max(limit_ms - elapsed_ms, 0.0)
    if left_ms >= down_ms:
        return 1.0
    return left_ms / max(down_ms, 1e-9)


def print_setup(code):
    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    try:
        smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        log0(smi.stdout, console=False)
    except FileNotFoundError:
        log0("no nvidia-smi", console=False)
    log0("=" * 100, console=False)
    log0(f"seed:{SEED} world_size:{WORLD} eval_mode:{EVAL_MODE}")
    log0(f"model: layers {NUM_LAYERS} dim {MODEL_DIM} heads {NUM_HEADS}/{NUM_KV_HEADS} mlp {MLP_HIDDEN}")
    log0(f"flags: smear {USE_SMEAR} bigram {USE_BIGRAM} ema {USE_EMA} count_mix {COUNT_MIX}")
    log0(f"train: batch {TRAIN_BATCH_TOKENS} seq {TRAIN_SEQ_LEN} cap {MAX_WALLCLOCK_SECONDS}s")


def main():
    global RANK, WORLD, LOCAL_RANK, DEV, MASTER, LOGFILE, newton_schulz

    code = Path(__file__).read_text(encoding="utf-8")
    newton_schulz = torch.compile(newton_schulz)

    # ---- distributed setup
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    RANK = int(os.environ.get("RANK", "0"))
    WORLD = int(os.environ.get("WORLD_SIZE", "1"))
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % WORLD != 0:
        raise ValueError(f"WORLD_SIZE={WORLD} must divide 8")
    accum_steps = 8 // WORLD
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is needed")
    DEV = torch.device("cuda", LOCAL_RANK)
    torch.cuda.set_device(DEV)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=DEV)
        dist.barrier()
    MASTER = RANK == 0
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if MASTER:
        os.makedirs("logs", exist_ok=True)
        LOGFILE = f"logs/{RUN_ID}.txt"
        print(LOGFILE)
    print_setup(code)

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.cuda.manual_seed_all(SEED)

    # ---- tokenizer and validation tokens
    sp = spm.SentencePieceProcessor(model_file=TOKENIZER_PATH)
    if int(sp.vocab_size()) != VOCAB_SIZE:
        raise ValueError(f"VOCAB_SIZE={VOCAB_SIZE} but tokenizer has {int(sp.vocab_size())}")
    byte_tables = make_byte_tables(sp, VOCAB_SIZE)
    val_tokens = load_val_tokens(VAL_FILES).to(torch.int32).to(DEV)
    n_shards = len(glob.glob(TRAIN_FILES))
    log0(f"train shards: {n_shards}, val tokens: {val_tokens.numel()}")

    # ---- model
    base_model = GPT().to(DEV)
    small_params_to_fp32(base_model)
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    if distributed:
        model = DDP(compiled, device_ids=[LOCAL_RANK], broadcast_buffers=False)
    else:
        model = compiled
    opts, opt_muon = build_optimizers(base_model)

    # ---- warm-up: run a few steps to compile everything, then put weights and optimizers back
    feeder = TrainFeeder(TRAIN_FILES)
    if WARMUP_STEPS > 0:
        saved_model = {k: v.detach().cpu().clone() for k, v in base_model.state_dict().items()}
        saved_opts = [copy.deepcopy(o.state_dict()) for o in opts]
        model.train()
        for ws in range(WARMUP_STEPS):
            for o in opts:
                o.zero_grad(set_to_none=True)
            for micro in range(accum_steps):
                if distributed:
                    model.require_backward_grad_sync = micro == accum_steps - 1
                wx, wy = feeder.batch(TRAIN_BATCH_TOKENS, TRAIN_SEQ_LEN, accum_steps)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    wloss = model(wx, wy)
                (wloss / accum_steps).backward()
            for o in opts:
                o.step()
            if ws + 1 == WARMUP_STEPS or (ws + 1) % 10 == 0:
                log0(f"warmup_step:{ws + 1}/{WARMUP_STEPS}")
        base_model.load_state_dict(saved_model, strict=True)
        for o, s in zip(opts, saved_opts):
            o.load_state_dict(s)
        for o in opts:
            o.zero_grad(set_to_none=True)
        if distributed:
            model.require_backward_grad_sync = True
        feeder = TrainFeeder(TRAIN_FILES)

    # ---- EMA, kept in float32 on the gpu
    ema = None
    if USE_EMA:
        ema = {k: v.detach().float().clone() for k, v in base_model.state_dict().items()}

    # ---- training loop. The limit leaves QUANT_RESERVE_SECONDS for calibration, quantization and zlib.
    limit_ms = None
    if MAX_WALLCLOCK_SECONDS > 0:
        limit_ms = 1000.0 * (MAX_WALLCLOCK_SECONDS - QUANT_RESERVE_SECONDS)
    stop_at = None
    step = 0
    torch.cuda.synchronize()
    t_train_begin = time.perf_counter()
    while True:
        last_step = step == ITERATIONS or (stop_at is not None and step >= stop_at)

        if VAL_LOSS_EVERY > 0 and (step % VAL_LOSS_EVERY == 0 or last_step):
            # only to look at, off by default because it costs training time
            v_loss, v_bpb = eval_plain(base_model, val_tokens, byte_tables, TRAIN_SEQ_LEN, VAL_BATCH_SEQS)
            log0(f"step:{step}/{ITERATIONS} val_loss:{v_loss:.4f} val_bpb:{v_bpb:.4f}")
            model.train()

        if last_step:
            break

        elapsed_ms = 1000.0 * (time.perf_counter() - t_train_begin)
        factor = lr_factor(step, elapsed_ms, limit_ms)
        for o in opts:
            o.zero_grad(set_to_none=True)
        train_loss = torch.zeros((), device=DEV)
        for micro in range(accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro == accum_steps - 1
            x, y = feeder.batch(TRAIN_BATCH_TOKENS, TRAIN_SEQ_LEN, accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss / accum_steps).backward()
        train_loss /= accum_steps

        # momentum warm-up of Muon, learning rates
        frac = min(step / MUON_MOMENTUM_STEPS, 1.0) if MUON_MOMENTUM_STEPS > 0 else 1.0
        for g in opt_muon.param_groups:
            g["momentum"] = (1 - frac) * MUON_MOMENTUM_START + frac * MUON_MOMENTUM
        for o in opts:
            for g in o.param_groups:
                g["lr"] = g["base_lr"] * factor
        if GRAD_CLIP > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), GRAD_CLIP)
        for o in opts:
            o.step()
        step += 1

        # EMA of the weights
        if ema is not None and step % EMA_EVERY == 0:
            with torch.no_grad():
                for k, v in base_model.state_dict().items():
                    if step < EMA_START_STEP:
                        ema[k].copy_(v.detach().float())
                    else:
                        ema[k].mul_(EMA_DECAY).add_(v.detach().float(), alpha=1.0 - EMA_DECAY)

        now_ms = 1000.0 * (time.perf_counter() - t_train_begin)
        if step <= 10 or step % TRAIN_LOG_EVERY == 0:
            log0(
                f"step:{step}/{ITERATIONS} train_loss:{train_loss.item():.4f} "
                f"train_time:{now_ms:.0f}ms step_avg:{now_ms / step:.2f}ms lr_factor:{factor:.3f}"
            )
        # all ranks must stop at the same step
        over = limit_ms is not None and now_ms >= limit_ms
        if distributed and limit_ms is not None:
            over_t = torch.tensor(int(over), device=DEV)
            dist.all_reduce(over_t, op=dist.ReduceOp.MAX)
            over = bool(over_t.item())
        if stop_at is None and over:
            stop_at = step

    torch.cuda.synchronize()
    loop_ms = 1000.0 * (time.perf_counter() - t_train_begin)
    log0(f"training loop done: {step} steps in {loop_ms:.0f}ms")
    log0(f"peak memory: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- take the EMA weights
    if ema is not None:
        log0("ema: using the averaged weights")
        cur = base_model.state_dict()
        base_model.load_state_dict({k: v.to(dtype=cur[k].dtype) for k, v in ema.items()}, strict=True)
        del ema

    # ---- calibration on train batches (still inside the 600 s)
    calib_feeder = feeder
    moments = collect_moments(base_model, calib_feeder, CALIB_BATCHES, CALIB_SEQS)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t_train_begin)
    log0(f"calibration: {len(moments)} layers, {CALIB_BATCHES} train batches, clock at {calib_ms:.0f}ms")

    # ---- quantize, compress, write
    if MASTER:
        obj = quantize_state(base_model.state_dict(), moments)
        buf = io.BytesIO()
        torch.save(obj, buf)
        raw = buf.getvalue()
        packed = zlib.compress(raw, 9)
        with open(ARTIFACT, "wb") as f:
            f.write(packed)
        code_bytes = len(code.encode("utf-8"))
        model_bytes = os.path.getsize(ARTIFACT)
        total_bytes = code_bytes + model_bytes
        log0(f"raw torch.save: {len(raw)} bytes, zlib: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes (limit {SIZE_LIMIT})")
        if total_bytes > SIZE_LIMIT:
            raise RuntimeError(f"too big by {total_bytes - SIZE_LIMIT} bytes")
    if distributed:
        dist.barrier()
    all_ms = 1000.0 * (time.perf_counter() - t_train_begin)
    log0(f"training + calibration + quantization + zlib: {all_ms:.0f}ms of {1000 * MAX_WALLCLOCK_SECONDS:.0f}ms")

    # ---- round trip: everything below uses the weights from the file only
    with open(ARTIFACT, "rb") as f:
        blob = f.read()
    loaded = torch.load(io.BytesIO(zlib.decompress(blob)), map_location="cpu", weights_only=True)
    eval_model = GPT().to(DEV)
    small_params_to_fp32(eval_model)
    eval_model.load_state_dict(dequantize_state(loaded), strict=True)
    del model, compiled, base_model, opts, opt_muon
    torch.cuda.empty_cache()

    # ---- the evaluation, last line is the score
    final_loss, final_bpb = run_evaluation(eval_model, val_tokens, byte_tables)
    log0(f"final_score mode:{EVAL_MODE} val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
