"""
hyskeir: a small transformer as one expert among several in an online mixing coder.

The view taken here is that of a lossless compressor.  The artifact is a decoder's static model: a transformer
whose matrices are Lloyd-Max coded in four bits (a few in eight) and entropy coded with an interleaved range coder.
At evaluation the stream is "coded": a Predictor is asked for log-probabilities over the whole vocabulary, the
symbols are charged with them, and only then is the Predictor told what they were.  It holds

    NeuralExpert    the transformer over a sliding window, with small score-first SGD steps between blocks
    CountTable      orders 1..4, rows of counts over the vocabulary, contexts hashed to rows
    MatchModel      the longest repeat of the recent context, one predicted symbol
    Mixer           geometric mixing with gated weights and an adaptive bias, learned online

Every rank codes its own contiguous span of the validation stream with tables that start empty.
"""

from __future__ import annotations

import copy
import glob
import io
import json
import math
import os
import random
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP


# ------------------------------------------------------------------------------------------------
# settings
# ------------------------------------------------------------------------------------------------


def env(name, default):
    """A setting from the environment, of the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw not in ("0", "", "false", "False")
    return type(default)(raw)


class Args:
    # data
    data_path = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = env("RUN_ID", "hyskeir")
    seed = env("SEED", 1337)

    # the run
    iterations = env("ITERATIONS", 20000)
    warmup_steps = env("WARMUP_STEPS", 20)
    warmdown_iters = env("WARMDOWN_ITERS", 3000)
    batch_tokens = env("TRAIN_BATCH_TOKENS", 524288)
    seq_len = env("TRAIN_SEQ_LEN", 1024)
    max_wallclock = env("MAX_WALLCLOCK_SECONDS", 600.0)
    calib_reserve = env("CALIB_RESERVE_SECONDS", 36.0)
    probe_every = env("VAL_LOSS_EVERY", 2000)
    probe_tokens = env("VAL_PROBE_TOKENS", 1048576)
    log_every = env("TRAIN_LOG_EVERY", 200)

    # the model
    vocab_size = env("VOCAB_SIZE", 1024)
    num_layers = env("NUM_LAYERS", 10)
    dim = env("MODEL_DIM", 512)
    num_heads = env("NUM_HEADS", 8)
    num_kv_heads = env("NUM_KV_HEADS", 4)
    mlp_mult = env("MLP_MULT", 3)
    rope_base = env("ROPE_BASE", 10000.0)
    softcap = env("LOGIT_SOFTCAP", 30.0)
    qk_gain = env("QK_GAIN_INIT", 1.5)
    embed_std = env("TIED_EMBED_INIT_STD", 0.005)

    # optimizers
    embed_lr = env("EMBED_LR", 0.04)
    matrix_lr = env("MATRIX_LR", 0.025)
    scalar_lr = env("SCALAR_LR", 0.03)
    muon_momentum = env("MUON_MOMENTUM", 0.97)
    muon_momentum_start = env("MUON_MOMENTUM_WARMUP_START", 0.88)
    muon_momentum_steps = env("MUON_MOMENTUM_WARMUP_STEPS", 700)
    muon_steps = env("MUON_BACKEND_STEPS", 5)
    muon_wd = env("MUON_WD", 0.03)
    beta1 = env("BETA1", 0.9)
    beta2 = env("BETA2", 0.95)
    adam_eps = env("ADAM_EPS", 1e-8)
    grad_clip = env("GRAD_CLIP_NORM", 0.4)
    ema_decay = env("EMA_DECAY", 0.997)

    # the artifact
    calib_batches = env("CALIB_BATCHES", 24)
    gptq_damp = env("GPTQ_DAMP", 0.01)
    lloyd_iters = env("LLOYD_ITERS", 30)
    artifact_path = env("ARTIFACT_PATH", "hyskeir.model.rc")
    size_limit = 16_000_000

    # the coder
    eval_seq = env("EVAL_SEQ_LEN", 1024)
    eval_stride = env("EVAL_STRIDE", 256)
    eval_block = env("EVAL_BLOCK", 16384)
    eval_step = env("EVAL_STEP", 2048)
    eval_seconds = env("EVAL_SECONDS", 600.0)
    table_bits = env("TABLE_BITS", 16)
    count_prior = env("COUNT_PRIOR", 12.0)
    count_limit = env("COUNT_LIMIT", 4096)
    match_min = env("MATCH_MIN", 6)
    match_max = env("MATCH_MAX", 32)
    match_bits = env("MATCH_BITS", 22)
    mixer_lr = env("MIXER_LR", 0.02)
    bias_lr = env("BIAS_LR", 0.05)
    nn_temperature = env("NN_TEMPERATURE", 1.0)
    ttt = env("TTT_ENABLED", True)
    ttt_lr = env("TTT_LR", 0.0008)
    ttt_momentum = env("TTT_MOMENTUM", 0.9)
    ttt_seqs = env("TTT_SEQS_PER_STEP", 8)
    ttt_guard = env("TTT_STOP_AFTER_SECONDS", 520.0)


@dataclass
class Ranks:
    """Where this process stands among the others."""

    rank: int
    world: int
    local: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def total(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value


class Log:
    def __init__(self, args, ranks):
        self.main = ranks.main
        self.path = Path("logs") / f"{args.run_id}_{args.seed}.txt"
        if self.main:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, text):
        if not self.main:
            return
        print(text, flush=True)
        with self.path.open("a") as f:
            f.write(text + "\n")


# ------------------------------------------------------------------------------------------------
# data
# ------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
BOS = 1


def load_shard(path) -> np.ndarray:
    header = np.fromfile(path, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    ids = np.fromfile(path, dtype="<u2", count=count, offset=256 * 4)
    if ids.size != count:
        raise ValueError(f"{path}: {ids.size} tokens instead of {count}")
    return ids


class TrainStream:
    """The training shards, end to end, around and around."""

    def __init__(self, pattern):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(pattern)
        self.index = -1
        self.next_shard()

    def next_shard(self):
        self.index = (self.index + 1) % len(self.files)
        self.ids = load_shard(self.files[self.index])
        self.at = 0

    def take(self, count) -> np.ndarray:
        parts = []
        while count > 0:
            if self.at >= self.ids.size:
                self.next_shard()
            part = self.ids[self.at : self.at + count]
            parts.append(part)
            self.at += part.size
            count -= part.size
        return np.concatenate(parts)


class TrainLoader:
    """Every rank reads the same stream and cuts its own part out of it."""

    def __init__(self, args, ranks):
        self.stream = TrainStream(args.train_files)
        self.ranks = ranks

    def batch(self, tokens, seq_len):
        own = tokens // self.ranks.world
        span = own + 1
        ids = self.stream.take(span * self.ranks.world)
        mine = ids[self.ranks.rank * span : (self.ranks.rank + 1) * span].astype(np.int64)
        local = torch.from_numpy(mine).to(self.ranks.device, non_blocking=True)
        return local[:-1].view(-1, seq_len), local[1:].view(-1, seq_len)


def load_stream(pattern) -> np.ndarray:
    """The validation stream, all of it."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(pattern)
    return np.concatenate([load_shard(f) for f in files]).astype(np.int32)


class ByteTable:
    """UTF-8 bytes of every token, as the tokenizer's pieces tell."""

    def __init__(self, path, vocab_size):
        sp = spm.SentencePieceProcessor(model_file=path)
        size = max(sp.vocab_size(), vocab_size)
        self.own = np.zeros(size, np.int64)
        self.space = np.zeros(size, bool)
        self.edge = np.ones(size, bool)
        for i in range(sp.vocab_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            self.edge[i] = False
            if sp.is_byte(i):
                self.own[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                self.space[i] = True
                piece = piece[1:]
            self.own[i] = len(piece.encode("utf-8"))

    def count(self, before: np.ndarray, tokens: np.ndarray) -> int:
        """Bytes of `tokens`; a leading space is text only where something stands before it."""
        lead = self.space[tokens] & ~self.edge[before]
        return int(self.own[tokens].sum() + lead.sum())


# ------------------------------------------------------------------------------------------------
# the transformer
# ------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """Kept in fp32, multiplied in the activations' type."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


class Rope(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.register_buffer("freq", freq, persistent=False)

    def forward(self, x):
        pos = torch.arange(x.size(2), device=x.device, dtype=torch.float32)
        angle = torch.outer(pos, self.freq.to(x.device))
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads, self.kv = args.num_heads, args.num_kv_heads
        self.head_dim = args.dim // args.num_heads
        self.q = Linear(args.dim, args.dim)
        self.k = Linear(args.dim, self.kv * self.head_dim)
        self.v = Linear(args.dim, self.kv * self.head_dim)
        self.out = Linear(args.dim, args.dim)
        self.out.weight.data.zero_()
        self.gain = nn.Parameter(torch.full((self.heads,), args.qk_gain))
        self.rope = Rope(self.head_dim, args.rope_base)

    def forward(self, x):
        b, t, d = x.shape
        q = self.q(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv, self.head_dim).transpose(1, 2)
        q, k = self.rope(rms(q)), self.rope(rms(k))
        q = q * self.gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != self.heads)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.up = Linear(args.dim, args.mlp_mult * args.dim)
        self.down = Linear(args.mlp_mult * args.dim, args.dim)
        self.down.weight.data.zero_()

    def forward(self, x):
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, args, depth):
        super().__init__()
        self.attn = Attention(args)
        self.mlp = Mlp(args)
        self.attn_scale = nn.Parameter(torch.ones(args.dim))
        self.mlp_scale = nn.Parameter(torch.ones(args.dim))
        self.resid = nn.Parameter(torch.stack((torch.ones(args.dim), torch.zeros(args.dim))))
        self.norm = 1.0 / math.sqrt(depth + 1)

    def forward(self, x, x0):
        mix = self.resid.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.norm)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.norm)


class GPT(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.softcap = args.softcap
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        nn.init.normal_(self.embed.weight, std=args.embed_std)
        self.blocks = nn.ModuleList(Block(args, i) for i in range(args.num_layers))
        half = args.num_layers // 2
        self.skips = nn.Parameter(torch.ones(half, args.dim))

    def logits(self, ids):
        x = rms(self.embed(ids).to(torch.bfloat16))
        x0, kept = x, []
        half = self.skips.size(0)
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) - half and kept:
                j = i - (len(self.blocks) - half)
                x = x + self.skips[j].to(x.dtype) * kept.pop()
            x = block(x, x0)
            if i < half:
                kept.append(x)
        raw = F.linear(rms(x), self.embed.weight.to(x.dtype)).float()
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward(self, ids, targets):
        out = self.logits(ids)
        return F.cross_entropy(out.view(-1, out.size(-1)), targets.reshape(-1))


# ------------------------------------------------------------------------------------------------
# optimizers
# ------------------------------------------------------------------------------------------------


def orthogonal(g, steps):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    flip = x.size(0) > x.size(1)
    if flip:
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the matrices are dealt to the ranks and the results summed."""

    def __init__(self, params, lr, momentum, steps, wd, ranks):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, wd=wd))
        self.ranks = ranks

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = orthogonal(p.grad + group["momentum"] * buf, group["steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            self.ranks.total(flat)
            at = 0
            for p in params:
                g = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1 - group["lr"] * group["wd"]).add_(g, alpha=-group["lr"])
                at += p.numel()


def make_optimizers(model, args, ranks):
    matrices = [p for n, p in model.blocks.named_parameters() if p.ndim == 2 and n.endswith("weight")]
    small = [p for n, p in model.blocks.named_parameters() if not (p.ndim == 2 and n.endswith("weight"))]
    small.append(model.skips)
    betas = (args.beta1, args.beta2)
    adam = [
        dict(params=[model.embed.weight], lr=args.embed_lr, base=args.embed_lr),
        dict(params=small, lr=args.scalar_lr, base=args.scalar_lr),
    ]
    opts = [
        torch.optim.Adam(adam, betas=betas, eps=args.adam_eps, fused=True),
        Muon(matrices, args.matrix_lr, args.muon_momentum, args.muon_steps, args.muon_wd, ranks),
    ]
    opts[1].param_groups[0]["base"] = args.matrix_lr
    return opts


class Ema:
    """A running average of the weights."""

    def __init__(self, model, decay):
        self.decay = decay
        self.state = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model):
        for n, p in model.named_parameters():
            self.state[n].lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def apply(self, model):
        for n, p in model.named_parameters():
            p.copy_(self.state[n])


# ------------------------------------------------------------------------------------------------
# quantisation: Lloyd-Max codebooks, errors fed forward along the columns
# ------------------------------------------------------------------------------------------------


def is_matrix(name, p):
    return p.ndim == 2 and name.endswith("weight")


def levels_of(name, args):
    """256 levels where an error is dear: the embedding, the first and the last block's outputs; 16 elsewhere."""
    last = f"blocks.{args.num_layers - 1}."
    if name.startswith("embed"):
        return 256
    if name.startswith(("blocks.0.", last)) and (".attn.out" in name or ".attn.v" in name):
        return 256
    return 16


class Calibration:
    """X^T X at the input of every Linear, over batches of the training stream."""

    def __init__(self, model):
        self.sums = {}
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                self.hooks.append(module.register_forward_pre_hook(self.watch(name + ".weight")))

    def watch(self, name):
        def hook(module, inputs):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            xx = x.T @ x
            self.sums[name] = self.sums[name] + xx if name in self.sums else xx

        return hook

    def close(self):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def calibrate(model, loader, args, ranks):
    model.eval()
    watch = Calibration(model)
    for _ in range(args.calib_batches):
        x, _ = loader.batch(65536 * ranks.world, args.seq_len)
        model.logits(x)
    watch.close()
    model.train()
    for name in sorted(watch.sums):
        ranks.total(watch.sums[name])
    return watch.sums


def lloyd_max(values, levels, iters, weight=None):
    """The codebook of least squared error for these values."""
    flat = values.reshape(-1).float()
    if flat.numel() > 400_000:
        flat = flat[:: flat.numel() // 400_000]
    flat, _ = flat.sort()
    centre = torch.linspace(0.5 / levels, 1 - 0.5 / levels, levels, device=flat.device)
    book = flat[(centre * (flat.numel() - 1)).long()].clone()
    if levels > 16:
        book = torch.linspace(float(flat[0]), float(flat[-1]), levels, device=flat.device)
    for _ in range(iters if levels <= 16 else 4):
        which = torch.bucketize(flat, (book[1:] + book[:-1]) / 2)
        total = torch.zeros_like(book).index_add_(0, which, flat)
        count = torch.zeros_like(book).index_add_(0, which, torch.ones_like(flat))
        book = torch.where(count > 0, total / count.clamp_min(1), book)
        book, _ = book.sort()
    return book.half().float()


def nearest(x, book):
    return torch.bucketize(x.contiguous(), (book[1:] + book[:-1]) / 2)


@torch.no_grad()
def code_matrix(w, hessian, levels, args):
    """Indices, codebook and row scales of one matrix. hessian: None for plain rounding."""
    w = w.float().clone()
    scale = w.pow(2).mean(1).sqrt().clamp_min(1e-6).half().float()
    book = lloyd_max(w / scale[:, None], levels, args.lloyd_iters)
    if hessian is None:
        return nearest(w / scale[:, None], book).to(torch.uint8), book, scale
    h = hessian.double()
    dead = h.diagonal() <= 0
    h[dead, dead] = 1.0
    w[:, dead] = 0
    order = torch.argsort(h.diagonal(), descending=True)
    h = h[order][:, order]
    h.diagonal().add_(args.gptq_damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    w = w[:, order]
    index = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    width = 128
    for a in range(0, w.size(1), width):
        b = min(a + width, w.size(1))
        part, errors = w[:, a:b].clone(), torch.zeros(w.size(0), b - a, device=w.device)
        for j in range(b - a):
            column = part[:, j]
            i = nearest(column / scale, book)
            index[:, a + j] = i.to(torch.uint8)
            error = (column - book[i] * scale) / upper[a + j, a + j]
            part[:, j:] -= error[:, None] * upper[a + j, a + j : b][None]
            errors[:, j] = error
        w[:, b:] -= errors @ upper[a:b, b:]
    return index[:, torch.argsort(order)], book, scale


# ------------------------------------------------------------------------------------------------
# the range coder: interleaved lanes, 32-bit states, words of 16 bits
# ------------------------------------------------------------------------------------------------

PROB_BITS = 14
LANES = 2048
LOW = 1 << 16


def quantised_freqs(symbols, alphabet):
    """Frequencies that sum to 2**PROB_BITS, none of a symbol that occurs being zero."""
    count = np.bincount(symbols, minlength=alphabet).astype(np.float64)
    total = 1 << PROB_BITS
    freq = np.floor(count / count.sum() * total).astype(np.int64)
    freq[(count > 0) & (freq == 0)] = 1
    freq[int(freq.argmax())] += total - int(freq.sum())
    return freq


def range_encode(symbols, freq):
    """Bytes: the lanes' final states, then the words in the order in which the decoder asks for them."""
    pad = -symbols.size % LANES
    filled = np.concatenate((symbols, np.full(pad, int(freq.argmax())))).astype(np.int64).reshape(-1, LANES)
    start = np.concatenate(([0], np.cumsum(freq)[:-1]))
    state = np.full(LANES, LOW, np.int64)
    words = []
    for row in filled[::-1]:
        f, c = freq[row], start[row]
        full = state >= (f << (32 - PROB_BITS))
        words.append((state[full] & 0xFFFF).astype("<u2"))
        state[full] >>= 16
        state = ((state // f) << PROB_BITS) + state % f + c
    body = np.concatenate(words[::-1]) if words else np.zeros(0, "<u2")
    return state.astype("<u4").tobytes() + body.tobytes()


def range_decode(data, count, freq):
    rows = -(-count // LANES)
    start = np.concatenate(([0], np.cumsum(freq)[:-1]))
    symbol_of = np.repeat(np.arange(freq.size), freq)
    state = np.frombuffer(data, "<u4", LANES).astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=4 * LANES).astype(np.int64)
    out, at = np.zeros((rows, LANES), np.uint8), 0
    for row in range(rows):
        slot = state & ((1 << PROB_BITS) - 1)
        s = symbol_of[slot]
        out[row] = s
        state = freq[s] * (state >> PROB_BITS) + slot - start[s]
        low = np.flatnonzero(state < LOW)
        state[low] = (state[low] << 16) | words[at : at + low.size]
        at += low.size
    return out.reshape(-1)[:count]


# ------------------------------------------------------------------------------------------------
# the artifact
# ------------------------------------------------------------------------------------------------


def pack(model, hessians, args):
    """The bytes of the artifact: a header of entries and, entry by entry, their bodies."""
    entries, bodies = [], []
    for name, p in model.named_parameters():
        if not is_matrix(name, p):
            body = p.detach().cpu().half().numpy().tobytes()
            entries.append(dict(n=name, k="half", s=list(p.shape), b=len(body)))
            bodies.append(body)
            continue
        levels = levels_of(name, args)
        index, book, scale = code_matrix(p.detach(), hessians.get(name), levels, args)
        symbols = index.reshape(-1).cpu().numpy()
        freq = quantised_freqs(symbols, levels)
        side = scale.cpu().half().numpy().tobytes() + book.cpu().half().numpy().tobytes()
        body = side + freq.astype("<u2").tobytes() + range_encode(symbols, freq)
        entries.append(dict(n=name, k="book", s=list(p.shape), l=levels, b=len(body)))
        bodies.append(body)
    head = zlib.compress(json.dumps(entries, separators=(",", ":")).encode(), 9)
    out = io.BytesIO()
    out.write(struct.pack("<I", len(head)))
    out.write(head)
    for body in bodies:
        out.write(body)
    return out.getvalue()


def unpack(blob):
    """name -> tensor, the inverse of pack up to the quantisation."""
    (size,) = struct.unpack_from("<I", blob)
    entries = json.loads(zlib.decompress(blob[4 : 4 + size]))
    at, state = 4 + size, {}
    for entry in entries:
        body = blob[at : at + entry["b"]]
        at += entry["b"]
        shape = entry["s"]
        if entry["k"] == "half":
            state[entry["n"]] = torch.from_numpy(np.frombuffer(body, "<f2").astype(np.float32).reshape(shape))
            continue
        rows, levels = shape[0], entry["l"]
        scale = np.frombuffer(body, "<f2", rows).astype(np.float32)
        book = np.frombuffer(body, "<f2", levels, offset=2 * rows).astype(np.float32)
        freq = np.frombuffer(body, "<u2", levels, offset=2 * (rows + levels)).astype(np.int64)
        symbols = range_decode(body[2 * (rows + 2 * levels) :], shape[0] * shape[1], freq)
        state[entry["n"]] = torch.from_numpy(book[symbols].reshape(shape) * scale[:, None])
    return state


def write_artifact(model, hessians, args, log):
    """Packs, writes, and says how large the submission is."""
    blob = pack(model, hessians, args)
    Path(args.artifact_path).write_bytes(blob)
    code = len(Path(__file__).read_bytes())
    total = code + len(blob)
    log(f"artifact: {len(blob)} bytes, code: {code} bytes")
    log(f"Total submission size: {total} bytes (limit {args.size_limit})")
    if total > args.size_limit:
        raise SystemExit(f"too large by {total - args.size_limit} bytes")


def read_artifact(args, ranks):
    """The model as the artifact holds it: what is evaluated."""
    state = unpack(Path(args.artifact_path).read_bytes())
    model = GPT(args).to(ranks.device)
    model.load_state_dict(state)
    return model


# ------------------------------------------------------------------------------------------------
# training
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def probe(model, ids, table, args, ranks):
    """The plain model's loss on the head of the validation stream: for the log, nothing hangs on it."""
    model.eval()
    seqs = min(args.probe_tokens, ids.size - 1) // args.seq_len
    nll = torch.zeros((), dtype=torch.float64, device=ranks.device)
    bytes_ = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for s in range(ranks.rank * 32, seqs, ranks.world * 32):
        e = min(s + 32, seqs)
        part = ids[s * args.seq_len : e * args.seq_len + 1]
        local = torch.from_numpy(part.astype(np.int64)).to(ranks.device)
        x, y = local[:-1].view(-1, args.seq_len), local[1:].view(-1, args.seq_len)
        nll += model(x, y).double() * y.numel()
        bytes_ += table.count(part[:-1], part[1:])
    ranks.total(nll)
    ranks.total(bytes_)
    model.train()
    return float(nll / math.log(2) / bytes_)


def rate(step, elapsed, args):
    """The learning rate's multiplier: flat, then down to zero over what the clock leaves for warmdown_iters steps."""
    limit = args.max_wallclock - args.calib_reserve
    per_step = elapsed / max(step, 1)
    warmdown = max(args.warmdown_iters * per_step, 1e-9)
    left = max(limit - elapsed, 0.0)
    return min(1.0, left / warmdown) if step > 10 else 1.0


def warm_up(compiled, model, opts, loader, args, ranks):
    """Steps that only compile; weights and optimizers are put back."""
    kept = {k: v.detach().clone() for k, v in model.state_dict().items()}
    kept_opts = [copy.deepcopy(o.state_dict()) for o in opts]
    for _ in range(args.warmup_steps):
        x, y = loader.batch(args.batch_tokens, args.seq_len)
        compiled(x, y).backward()
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
    model.load_state_dict(kept)
    for o, state in zip(opts, kept_opts):
        o.load_state_dict(state)


def train(args, ranks, log, val_ids, table):
    """Trains, averages, calibrates and writes the artifact, all within the wall clock."""
    model = GPT(args).to(ranks.device)
    for module in model.modules():
        if isinstance(module, Rope):
            module.float()
    log(f"parameters: {sum(p.numel() for p in model.parameters())}")
    opts = make_optimizers(model, args, ranks)
    compiled = torch.compile(model, dynamic=False)
    wrapped = DDP(compiled, device_ids=[ranks.local], broadcast_buffers=False) if ranks.world > 1 else compiled
    warm_up(wrapped, model, opts, TrainLoader(args, ranks), args, ranks)
    loader = TrainLoader(args, ranks)
    ema = Ema(model, args.ema_decay)

    torch.cuda.synchronize()
    spent, mark, step = 0.0, time.perf_counter(), 0
    limit = args.max_wallclock - args.calib_reserve
    stop_at = None
    while True:
        last = step == args.iterations or (stop_at is not None and step >= stop_at)
        if args.probe_every and (last or step % args.probe_every == 0):
            torch.cuda.synchronize()
            spent += time.perf_counter() - mark
            log(f"step:{step} probe_bpb:{probe(model, val_ids, table, args, ranks):.4f} train_time:{spent:.1f}s")
            torch.cuda.synchronize()
            mark = time.perf_counter()
        if last:
            break
        elapsed = spent + time.perf_counter() - mark
        k = rate(step, elapsed, args)
        for o in opts:
            for group in o.param_groups:
                group["lr"] = group["base"] * k
        frac = min(step / args.muon_momentum_steps, 1.0)
        opts[1].param_groups[0]["momentum"] = (1 - frac) * args.muon_momentum_start + frac * args.muon_momentum

        x, y = loader.batch(args.batch_tokens, args.seq_len)
        loss = wrapped(x, y)
        loss.backward()
        if args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        ema.update(model)
        step += 1
        if step % args.log_every == 0:
            log(f"step:{step} train_loss:{float(loss):.4f} train_time:{spent + time.perf_counter() - mark:.1f}s")
        if stop_at is None:
            over = torch.tensor(float(spent + time.perf_counter() - mark >= limit), device=ranks.device)
            if ranks.world > 1:
                dist.all_reduce(over, op=dist.ReduceOp.MAX)
            if float(over) > 0:
                stop_at = step

    ema.apply(model)
    hessians = calibrate(model, loader, args, ranks)
    if ranks.main:
        write_artifact(model, hessians, args, log)
    ranks.barrier()
    torch.cuda.synchronize()
    spent += time.perf_counter() - mark
    log(f"training, calibration and packing: {step} steps, {spent:.1f}s of {args.max_wallclock:.0f}s")


# ------------------------------------------------------------------------------------------------
# the coder's models.  Each answers for a run of n symbols from `past`, which ends before the last of them, and
# learns them when they are known.
# ------------------------------------------------------------------------------------------------


def left_of(ids, end, length):
    """The `length` tokens before position `end`, filled up with BOS where the stream has not so many."""
    begin = end - length
    if begin >= 0:
        return ids[begin:end]
    return np.concatenate((np.full(-begin, BOS, ids.dtype), ids[:end]))


class NeuralExpert:
    """The transformer over windows that end with each stride; adapted by SGD on blocks that have been coded."""

    def __init__(self, model, args, ranks):
        self.model, self.args, self.device = model.eval(), args, ranks.device
        params = [p for n, p in model.named_parameters() if not n.startswith("embed")]
        for p in model.parameters():
            p.requires_grad_(False)
        for p in params:
            p.requires_grad_(args.ttt)
        self.params = params
        self.opt = torch.optim.SGD(params, lr=args.ttt_lr, momentum=args.ttt_momentum)

    @torch.no_grad()
    def predict(self, past, n):
        """Log-probabilities [n, V] with the weights as they stand."""
        a, lead = self.args, past.size - n
        windows, kept = [], []
        for s in range(0, n, a.eval_stride):
            e = min(s + a.eval_stride, n)
            windows.append(past[lead + e - a.eval_seq : lead + e])
            kept.append(e - s)
        rows = torch.from_numpy(np.stack(windows).astype(np.int64)).to(self.device)
        out = []
        for i in range(0, rows.size(0), 32):
            logits = self.model.logits(rows[i : i + 32]) / a.nn_temperature
            out += [logits[j, -k:] for j, k in enumerate(kept[i : i + 32])]
        return F.log_softmax(torch.cat(out), dim=-1)

    def update(self, past, tokens):
        """One epoch over the block just coded. past: what stands before the tokens, the last of them included."""
        seq = self.args.eval_seq
        n = tokens.size // seq * seq
        if n == 0:
            return
        inputs = np.concatenate((past[-1:], tokens[: n - 1]))
        x = torch.from_numpy(inputs.astype(np.int64)).to(self.device).view(-1, seq)
        y = torch.from_numpy(tokens[:n].astype(np.int64)).to(self.device).view(-1, seq)
        for i in range(0, x.size(0), self.args.ttt_seqs):
            loss = self.model(x[i : i + self.args.ttt_seqs], y[i : i + self.args.ttt_seqs])
            self.opt.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.opt.step()


class CountTable:
    """Rows of counts over the vocabulary. The context of `order` tokens is hashed to a row, never the symbol."""

    def __init__(self, order, args):
        self.order, self.limit = order, args.count_limit
        self.bits = args.table_bits
        rows = args.vocab_size if order == 1 else 1 << self.bits
        self.counts = np.zeros((rows, args.vocab_size), np.int16)
        self.totals = np.zeros(rows, np.int32)

    def rows(self, past, n):
        """The row of each of the n contexts that end at past[-n], ..., past[-1]."""
        last = np.arange(past.size - n, past.size)
        if self.order == 1:
            return past[last].astype(np.int64)
        h = np.full(n, self.order, np.uint64)
        for back in range(self.order):
            h = (h ^ past[last - back].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
        return (h >> np.uint64(64 - self.bits)).astype(np.int64)

    def predict(self, rows, lower, prior):
        """Counts blended with the lower order's distribution: [n, V], every row sums to one."""
        c = torch.from_numpy(self.counts[rows]).to(lower.device, non_blocking=True).float()
        total = c.sum(1, keepdim=True)
        return (c + prior * lower) / (total + prior), total[:, 0]

    def update(self, rows, tokens):
        np.add.at(self.counts, (rows, tokens), 1)
        np.add.at(self.totals, rows, 1)
        full = np.unique(rows[self.totals[rows] > self.limit])
        if full.size:
            self.counts[full] >>= 1
            self.totals[full] = self.counts[full].sum(1)


class MatchModel:
    """Where the last `match_min` tokens occurred before, and what followed there."""

    BUCKETS = 4

    def __init__(self, args):
        self.args = args
        self.head = np.full(1 << args.match_bits, -1, np.int64)
        self.history = np.zeros(1 << 20, np.int32)
        self.size = 0
        self.hits = np.full(self.BUCKETS, 1.0)
        self.tries = np.full(self.BUCKETS, 3.0)

    def keys(self, past, n):
        h = np.zeros(n, np.uint64)
        last = np.arange(past.size - n, past.size)
        for back in range(self.args.match_min):
            h = (h + past[last - back].astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
            h ^= h >> np.uint64(32)
        return (h >> np.uint64(64 - self.args.match_bits)).astype(np.int64)

    def predict(self, past, n, vocab, device):
        """[n, V] log-probabilities and each position's bucket of match length (0: none)."""
        found = self.head[self.keys(past, n)]
        last = np.arange(past.size - n, past.size)
        length = np.zeros(n, np.int64)
        alive = found >= 0
        for back in range(self.args.match_max):
            there = found - 1 - back
            alive = alive & (there >= 0)
            alive &= self.history[np.maximum(there, 0)] == past[last - back]
            length += alive
        self.bucket = np.where(length < self.args.match_min, 0, np.where(length < 12, 1, np.where(length < 24, 2, 3)))
        self.guess = np.where(self.bucket > 0, self.history[np.maximum(found, 0)], -1)
        sure = np.where(self.bucket > 0, self.hits[self.bucket] / self.tries[self.bucket], 1.0 / vocab)
        rest = (1.0 - sure) / (vocab - 1)
        p = torch.from_numpy(rest.astype(np.float32)).to(device)[:, None].repeat(1, vocab)
        hit = torch.from_numpy(np.maximum(self.guess, 0)).long().to(device)[:, None]
        p.scatter_(1, hit, torch.from_numpy(sure.astype(np.float32)).to(device)[:, None])
        return p.clamp_min(1e-9).log(), self.bucket

    def update(self, past, tokens):
        """past: what stood before the tokens, the contexts of their predictions."""
        for b in range(1, self.BUCKETS):
            at = self.bucket == b
            self.tries[b] += at.sum()
            self.hits[b] += (self.guess[at] == tokens[at]).sum()
        keys = self.keys(past, tokens.size)
        while self.size + tokens.size > self.history.size:
            self.history = np.concatenate((self.history, np.zeros_like(self.history)))
        self.history[self.size : self.size + tokens.size] = tokens
        self.head[keys] = self.size + np.arange(tokens.size)
        self.size += tokens.size


class Mixer:
    """p proportional to exp(sum_k w[gate, k] log p_k + bias): one set of weights per gate, one bias per symbol."""

    GATES = 64

    def __init__(self, experts, args, device):
        self.args = args
        self.weights = torch.zeros(self.GATES, experts, device=device)
        self.weights[:, 0] = 0.95
        self.weights[:, 1:] = 0.02
        self.square = torch.full((self.GATES, experts), 1e-3, device=device)
        self.bias = torch.zeros(args.vocab_size, device=device)

    def gate(self, match, total, neural):
        """Out of the context alone: match length, how often its order-3 row was seen, how sure the network is."""
        seen = (total > 0).long() + (total > 8).long() + (total > 128).long()
        top = neural.max(1).values.exp()
        sure = (top > 0.2).long() + (top > 0.5).long() + (top > 0.85).long()
        return (match * 4 + seen) * 4 + sure

    def predict(self, stacked, gate):
        """stacked: [n, experts, V] log-probabilities."""
        mixed = torch.einsum("nk,nkv->nv", self.weights[gate], stacked) + self.bias
        return F.log_softmax(mixed, dim=-1)

    def update(self, stacked, gate, logp, tokens):
        """The gradient of the log loss that was just paid, gate by gate."""
        error = -logp.exp()
        error[torch.arange(tokens.numel(), device=tokens.device), tokens] += 1.0
        slope = torch.einsum("nv,nkv->nk", error, stacked)
        sums = torch.zeros_like(self.weights).index_add_(0, gate, slope)
        seen = torch.zeros(self.GATES, 1, device=tokens.device).index_add_(0, gate, torch.ones_like(slope[:, :1]))
        mean = sums / seen.clamp_min(1)
        self.square = torch.where(seen > 0, 0.99 * self.square + 0.01 * mean**2, self.square)
        self.weights += self.args.mixer_lr * mean / (self.square.sqrt() + 1e-3) * (seen / (seen + 16))
        self.bias += self.args.bias_lr * error.mean(0)


class Predictor:
    """The coder's model of the stream: predict(), then update() with what came, for ever."""

    ORDERS = (1, 2, 3, 4)

    def __init__(self, model, args, ranks):
        self.args, self.device = args, ranks.device
        self.vocab = args.vocab_size
        self.neural = NeuralExpert(model, args, ranks)
        self.tables = [CountTable(order, args) for order in self.ORDERS]
        self.match = MatchModel(args)
        self.mixer = Mixer(2 + len(self.tables), args, ranks.device)
        self.unigram = torch.ones(self.vocab, device=ranks.device)

    @property
    def reach(self):
        """How many tokens of context the models want before the first symbol's own."""
        return max(self.args.eval_seq, self.args.match_max + 1)

    def look_ahead(self, past, n):
        """The network's answers for a block of n symbols, which the weights of before the block give."""
        self.block = self.neural.predict(past, n)
        self.used = 0

    @torch.no_grad()
    def predict(self, past, n):
        """Log-probabilities [n, V] of the next n symbols; past ends before the last of them."""
        neural = self.block[self.used : self.used + n]
        self.used += n
        p = (self.unigram / self.unigram.sum()).expand(n, -1)
        stack, self.rows = [neural], []
        for table in self.tables:
            rows = table.rows(past, n)
            p, total = table.predict(rows, p, self.args.count_prior)
            stack.append(p.log())
            self.rows.append(rows)
            if table.order == 3:
                seen = total
        match, bucket = self.match.predict(past, n, self.vocab, self.device)
        stack.append(match)
        self.stacked = torch.stack(stack, dim=1)
        self.gates = self.mixer.gate(torch.from_numpy(bucket).to(self.device), seen, neural)
        self.past = past
        self.logp = self.mixer.predict(self.stacked, self.gates)
        return self.logp

    @torch.no_grad()
    def update(self, tokens):
        """tokens: what the last predict() was about."""
        device_tokens = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        self.mixer.update(self.stacked, self.gates, self.logp, device_tokens)
        for table, rows in zip(self.tables, self.rows):
            table.update(rows, tokens)
        self.match.update(self.past, tokens)
        self.unigram += torch.bincount(device_tokens, minlength=self.vocab)

    def end_block(self, past, tokens):
        """The network's own learning, when a block is done."""
        self.neural.update(past, tokens)


class Ledger:
    """What was charged: every symbol once."""

    def __init__(self, table, device):
        self.table = table
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.plain = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0
        self.bytes = 0

    def charge(self, logp, neural, before, tokens):
        y = torch.from_numpy(tokens.astype(np.int64)).to(logp.device)[:, None]
        self.nll -= logp.gather(1, y).double().sum()
        self.plain -= neural.gather(1, y).double().sum()
        self.tokens += tokens.size
        self.bytes += self.table.count(before, tokens)

    def sums(self, ranks):
        counts = torch.tensor([self.tokens, self.bytes], dtype=torch.float64, device=self.nll.device)
        all_ = torch.cat((self.nll[None], self.plain[None], counts))
        return ranks.total(all_).tolist()


def code_stream(ids, first, last, predictor, ledger, args, log, clock):
    """Codes the symbols ids[first:last]: predict, charge, update; between blocks the network learns."""
    reach = predictor.reach
    for a in range(first, last, args.eval_block):
        b = min(a + args.eval_block, last)
        predictor.look_ahead(left_of(ids, b - 1, reach + b - a), b - a)
        for s in range(a, b, args.eval_step):
            e = min(s + args.eval_step, b)
            logp = predictor.predict(left_of(ids, e - 1, reach + e - s), e - s)
            tokens = ids[s:e]
            ledger.charge(logp, predictor.stacked[:, 0], ids[s - 1 : e - 1], tokens)
            predictor.update(tokens)
        if args.ttt and clock() < args.ttt_guard:
            predictor.end_block(ids[:a], ids[a:b])
        if (a - first) // args.eval_block % 50 == 0:
            so_far = float(ledger.nll) / math.log(2) / max(ledger.bytes, 1)
            log(f"coded {b - first}/{last - first} rank0_bpb:{so_far:.4f} time:{clock():.1f}s")


def evaluate(args, ranks, log, ids, table):
    """The score: the whole stream, once, a contiguous span to each rank."""
    ranks.barrier()
    start = time.perf_counter()

    def clock():
        return time.perf_counter() - start

    model = read_artifact(args, ranks)
    log(f"artifact read: {clock():.1f}s")
    count = ids.size - 1
    first = 1 + count * ranks.rank // ranks.world
    last = 1 + count * (ranks.rank + 1) // ranks.world
    predictor = Predictor(model, args, ranks)
    ledger = Ledger(table, ranks.device)
    code_stream(ids, first, last, predictor, ledger, args, log, clock)
    nll, plain, tokens, bytes_ = ledger.sums(ranks)
    if int(tokens) != count:
        raise SystemExit(f"{int(tokens)} symbols were charged, not {count}")
    torch.cuda.synchronize()
    seconds = clock()
    log(f"neural expert alone: val_bpb:{plain / math.log(2) / bytes_:.6f}")
    log(f"symbols:{int(tokens)} bytes:{int(bytes_)} eval_time:{seconds:.1f}s")
    if seconds > args.eval_seconds:
        raise SystemExit(f"evaluation took longer than {args.eval_seconds:.0f}s")
    log(f"final_coder val_loss:{nll / tokens:.8f} val_bpb:{nll / math.log(2) / bytes_:.8f}")
    return nll / math.log(2) / bytes_


# ------------------------------------------------------------------------------------------------
# the program
# ------------------------------------------------------------------------------------------------


def start_ranks():
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", device_id=device)
    return Ranks(rank, world, local, device)


def set_seed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main():
    args = Args()
    ranks = start_ranks()
    log = Log(args, ranks)
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if args.batch_tokens % (ranks.world * args.seq_len):
        raise ValueError("TRAIN_BATCH_TOKENS must be a multiple of ranks times TRAIN_SEQ_LEN")

    log(f"python {sys.version.split()[0]} torch {torch.__version__} ranks {ranks.world} seed {args.seed}")
    table = ByteTable(args.tokenizer_path, args.vocab_size)
    val_ids = load_stream(args.val_files)
    log(f"validation: {val_ids.size} tokens, training: {len(glob.glob(args.train_files))} shards")

    train(args, ranks, log, val_ids, table)
    log(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    evaluate(args, ranks, log, val_ids, table)
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
