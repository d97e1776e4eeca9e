"""Parameter Golf, 10 min / 16 MB: SP8192, gated attention, GPTQ int6/int7 + LQER, phased test-time training.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Validation documents are taken in the order of the stream and cut into phases. Inside a phase every document is scored
chunk by chunk with a LoRA of its own, which learns a chunk only after that chunk's losses are in the ledger. When all ranks
are through with a phase, the base weights take SGD steps on the prefix of documents that have been scored by then.
"""

from __future__ import annotations

import glob
import io
import json
import math
import os
import random
import struct
import sys
import time
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def env(name, default):
    """A setting from the environment, in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw not in ("0", "", "false", "False")
    return type(default)(raw)


class Config:
    # data
    data_dir = env("DATA_DIR", "./data")
    vocab_size = env("VOCAB_SIZE", 8192)
    dataset = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(dataset, "fineweb_train_*.bin")
    val_files = os.path.join(dataset, "fineweb_val_*.bin")
    tokenizer = env("TOKENIZER_PATH", os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model"))
    bos_id = env("BOS_ID", 1)
    seed = env("SEED", 1337)
    run_id = env("RUN_ID", "uist")

    # shape
    num_layers = env("NUM_LAYERS", 11)
    dim = env("MODEL_DIM", 512)
    num_heads = env("NUM_HEADS", 8)
    num_kv_heads = env("NUM_KV_HEADS", 4)
    mlp_mult = env("MLP_MULT", 4.0)
    rope_dims = env("ROPE_DIMS", 16)
    rope_base = env("ROPE_BASE", 10000.0)
    leak = env("MLP_LEAK", 0.5)
    gate_width = env("GATE_WIDTH", 12)
    softcap = env("LOGIT_SOFTCAP", 30.0)
    qk_gain = env("QK_GAIN_INIT", 5.0)

    # training
    iterations = env("ITERATIONS", 20000)
    batch_tokens = env("TRAIN_BATCH_TOKENS", 786432)
    seq_len = env("TRAIN_SEQ_LEN", 2048)
    warmup_steps = env("WARMUP_STEPS", 20)
    warmdown_frac = env("WARMDOWN_FRAC", 0.72)
    cap_s = env("MAX_WALLCLOCK_SECONDS", 600.0)
    quant_reserve_s = env("QUANT_RESERVE_SECONDS", 22.0)
    val_every = env("VAL_LOSS_EVERY", 4000)
    log_every = env("TRAIN_LOG_EVERY", 500)
    ema_decay = env("EMA_DECAY", 0.9965)
    grad_clip = env("GRAD_CLIP_NORM", 0.3)
    embed_lr = env("TIED_EMBED_LR", 0.03)
    matrix_lr = env("MATRIX_LR", 0.022)
    scalar_lr = env("SCALAR_LR", 0.02)
    muon_momentum = env("MUON_MOMENTUM", 0.97)
    muon_steps = env("MUON_BACKEND_STEPS", 5)
    muon_wd = env("MUON_WD", 0.095)
    adam_wd = env("ADAM_WD", 0.02)
    beta1 = env("BETA1", 0.9)
    beta2 = env("BETA2", 0.95)

    # quantisation
    calib_batches = env("GPTQ_CALIBRATION_BATCHES", 16)
    matrix_bits = env("MATRIX_BITS", 6)
    embed_bits = env("EMBED_BITS", 7)
    matrix_clip = env("MATRIX_CLIP_SIGMAS", 12.85)
    embed_clip = env("EMBED_CLIP_SIGMAS", 15.0)
    gptq_damp = env("GPTQ_DAMP", 0.01)
    gptq_block = env("GPTQ_BLOCK", 128)
    lqer_rank = env("LQER_RANK", 4)
    lqer_top = env("LQER_TOP_K", 3)
    lqer_group = env("LQER_GROUP", 64)
    artifact = env("ARTIFACT", "final_model.int6.br")
    size_limit = 16_000_000

    # evaluation
    eval_seq_len = env("EVAL_SEQ_LEN", 2048)
    eval_stride = env("EVAL_STRIDE", 64)
    eval_batch_seqs = env("EVAL_BATCH_SEQS", 32)
    sliding_enabled = env("SLIDING_WINDOW_ENABLED", False)
    ttt_enabled = env("TTT_ENABLED", True)
    ttt_phases = env("TTT_PHASES", 4)
    ttt_chunk = env("TTT_CHUNK_SIZE", 256)
    ttt_batch = env("TTT_BATCH_DOCS", 48)
    ttt_rank = env("TTT_LORA_RANK", 80)
    ttt_lr = env("TTT_LORA_LR", 1e-4)
    ttt_beta1 = env("TTT_BETA1", 0.0)
    ttt_beta2 = env("TTT_BETA2", 0.999)
    ttt_wd = env("TTT_WEIGHT_DECAY", 0.5)
    global_lr = env("GLOBAL_TTT_LR", 0.001)
    global_momentum = env("GLOBAL_TTT_MOMENTUM", 0.9)
    global_epochs = env("GLOBAL_TTT_EPOCHS", 1)
    global_windows = env("GLOBAL_TTT_WINDOWS", 2048)
    global_batch = env("GLOBAL_TTT_BATCH_SEQS", 8)
    global_clip = env("GLOBAL_TTT_GRAD_CLIP", 1.0)
    eval_budget_s = env("EVAL_BUDGET_SECONDS", 560.0)


# ---- ranks and log


class World:
    """This process among the others."""

    def __init__(self):
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if 8 % self.size:
            raise ValueError(f"WORLD_SIZE={self.size} must divide 8")
        self.grad_accum = 8 // self.size
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)

    @property
    def main(self):
        return self.rank == 0

    def sum_(self, tensor):
        if self.distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def slowest(self, seconds):
        """The largest of all ranks' clocks, so that every rank takes the same decision."""
        if not self.distributed:
            return seconds
        clock = torch.tensor(seconds, device=self.device, dtype=torch.float64)
        dist.all_reduce(clock, op=dist.ReduceOp.MAX)
        return clock.item()

    def barrier(self):
        if self.distributed:
            dist.barrier()

    def share(self, thing):
        """Rank 0's object, on all ranks."""
        if not self.distributed:
            return thing
        box = [thing if self.main else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


LOG_FILE = None


def log(text, world=None, console=True):
    if world is not None and not world.main:
        return
    if console:
        print(text, flush=True)
    if LOG_FILE is not None:
        with open(LOG_FILE, "a", encoding="utf-8") as f:
            print(text, file=f)


# ---- shards

SHARD_MAGIC = 20240520
HEADER_INTS = 256


def read_shard(path):
    """The tokens of one shard: 256 int32 of header, then uint16 tokens."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: {tokens.size} tokens, the header says {count}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation(pattern):
    """The whole validation split, in order."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no validation shards match {pattern}")
    return torch.cat([read_shard(f) for f in files]).to(torch.int64)


class TrainLoader:
    """Walks the training shards; every rank takes its own span of every global batch."""

    def __init__(self, pattern, world, seed):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(f"no training shards match {pattern}")
        random.Random(seed).shuffle(self.files)
        self.world = world
        self.next_file = 0
        self.tokens = torch.empty(0, dtype=torch.uint16)
        self.at = 0
        self._advance()

    def _advance(self):
        self.tokens = read_shard(self.files[self.next_file % len(self.files)])
        self.next_file += 1
        self.at = 0

    def _take(self, count):
        parts = []
        while count > 0:
            left = self.tokens.numel() - self.at
            if left <= 0:
                self._advance()
                continue
            n = min(left, count)
            parts.append(self.tokens[self.at : self.at + n])
            self.at += n
            count -= n
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def next_batch(self, global_tokens, seq_len, grad_accum):
        per_rank = global_tokens // (self.world.size * grad_accum)
        per_rank -= per_rank % seq_len
        span = self._take((per_rank + 1) * self.world.size)
        start = self.world.rank * (per_rank + 1)
        local = span[start : start + per_rank + 1].to(torch.int64).pin_memory()
        x = local[:-1].view(-1, seq_len).to(self.world.device, non_blocking=True)
        y = local[1:].view(-1, seq_len).to(self.world.device, non_blocking=True)
        return x, y


# ---- bytes


class ByteTable:
    """How many bytes of the original text a token stands for.

    A piece's leading mark stands for one space, which SentencePiece adds in front of a text too: after a boundary token
    (BOS, other control tokens, unknown) that space is not in the text and is not counted. A byte token is one byte.
    """

    def __init__(self, path, vocab_size, device):
        sp = spm.SentencePieceProcessor(model_file=path)
        pieces = int(sp.vocab_size())
        if pieces > vocab_size:
            raise ValueError(f"{path} has {pieces} pieces, the model only {vocab_size}")
        plain = np.zeros(vocab_size, dtype=np.int16)
        spaced = np.zeros(vocab_size, dtype=np.bool_)
        boundary = np.ones(vocab_size, dtype=np.bool_)
        for i in range(pieces):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            boundary[i] = False
            if sp.is_byte(i):
                plain[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                spaced[i] = True
                piece = piece[1:]
            plain[i] = len(piece.encode("utf-8"))
        self.plain = torch.from_numpy(plain).to(device)
        self.spaced = torch.from_numpy(spaced).to(device)
        self.boundary = torch.from_numpy(boundary).to(device)

    def count(self, previous, token):
        """Bytes of each token, given the one before it."""
        size = self.plain[token].to(torch.int32)
        return size + (self.spaced[token] & ~self.boundary[previous]).to(torch.int32)


class Ledger:
    """Sums of losses and bytes over the targets of the stream; every target may be entered once."""

    def __init__(self, num_targets, world):
        self.world = world
        self.nll = torch.zeros((), device=world.device, dtype=torch.float64)
        self.bytes = torch.zeros((), device=world.device, dtype=torch.float64)
        self.entries = torch.zeros(num_targets, device=world.device, dtype=torch.uint8)

    def enter(self, where, nll, size):
        """where: index of each target in the stream (target i is token i + 1)."""
        self.entries[where] += 1
        self.nll += nll.detach().to(torch.float64).sum()
        self.bytes += size.to(torch.float64).sum()

    def close(self):
        """(loss per token, bits per byte) over all ranks, once every target has its one entry."""
        self.world.sum_(self.entries)
        self.world.sum_(self.nll)
        self.world.sum_(self.bytes)
        low, high = int(self.entries.min()), int(self.entries.max())
        if low != 1 or high != 1:
            raise RuntimeError(f"targets were scored {low} to {high} times")
        loss = self.nll.item() / self.entries.numel()
        return loss, self.nll.item() / math.log(2.0) / self.bytes.item()


# ---- loss


class SoftcapCrossEntropy(torch.autograd.Function):
    """-log softmax(cap * tanh(logits / cap)) at the target, row by row, without keeping the capped logits.

    Only the raw logits and one log-sum-exp per row are saved; the backward pass rebuilds the rest in slices.
    """

    SLICE = 8192

    @staticmethod
    def forward(ctx, logits, target, cap):
        rows = logits.size(0)
        loss = torch.empty(rows, device=logits.device, dtype=torch.float32)
        lse = torch.empty(rows, device=logits.device, dtype=torch.float32)
        for a in range(0, rows, SoftcapCrossEntropy.SLICE):
            b = min(a + SoftcapCrossEntropy.SLICE, rows)
            z = cap * torch.tanh(logits[a:b].float() / cap)
            lse[a:b] = torch.logsumexp(z, dim=-1)
            loss[a:b] = lse[a:b] - z.gather(1, target[a:b, None]).squeeze(1)
        ctx.save_for_backward(logits, target, lse)
        ctx.cap = cap
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        logits, target, lse = ctx.saved_tensors
        cap = ctx.cap
        grad = torch.empty_like(logits)
        for a in range(0, logits.size(0), SoftcapCrossEntropy.SLICE):
            b = min(a + SoftcapCrossEntropy.SLICE, logits.size(0))
            t = torch.tanh(logits[a:b].float() / cap)
            d = torch.exp(cap * t - lse[a:b, None])
            d.scatter_add_(1, target[a:b, None], d.new_full((b - a, 1), -1.0))
            grad[a:b] = (d * (1.0 - t * t) * grad_loss[a:b, None]).to(grad.dtype)
        return grad, None, None


def softcap_nll(logits, target, cap):
    """Loss of each target, in the target's shape."""
    flat = SoftcapCrossEntropy.apply(logits.reshape(-1, logits.size(-1)), target.reshape(-1), cap)
    return flat.view(target.shape)


# ---- model


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


class Dense(nn.Linear):
    """A linear map whose weight is kept in float32 and used in the type of its input."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Turns the first `dims` of each head by its position and leaves the rest as it is."""

    def __init__(self, dims, base):
        super().__init__()
        self.dims = dims
        self.register_buffer("freq", 1.0 / base ** (torch.arange(0, dims, 2).float() / dims), persistent=False)

    def tables(self, length, dtype):
        angle = torch.outer(torch.arange(length, device=self.freq.device).float(), self.freq)
        return angle.cos()[None, :, None, :].to(dtype), angle.sin()[None, :, None, :].to(dtype)

    def forward(self, x, cos, sin):
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class GatedAttention(nn.Module):
    """Causal grouped-query attention; each head's output passes a gate that reads the input's first few channels."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.dim // cfg.num_heads
        self.gate_width = cfg.gate_width
        self.q = Dense(cfg.dim, cfg.dim)
        self.k = Dense(cfg.dim, self.kv_heads * self.head_dim)
        self.v = Dense(cfg.dim, self.kv_heads * self.head_dim)
        self.out = Dense(cfg.dim, cfg.dim)
        self.gain = nn.Parameter(torch.full((self.heads,), cfg.qk_gain))
        self.gate = nn.Parameter(torch.zeros(self.heads, cfg.gate_width))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base)

    def forward(self, x, lora=None, layer=0):
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if lora is not None:
            q = q + lora.delta("q", layer, x)
            v = v + lora.delta("v", layer, x)
        q = rms(q.view(b, t, self.heads, self.head_dim))
        k = rms(k.view(b, t, self.kv_heads, self.head_dim))
        v = v.view(b, t, self.kv_heads, self.head_dim)
        cos, sin = self.rotary.tables(t, q.dtype)
        q, k = self.rotary(q, cos, sin), self.rotary(k, cos, sin)
        q = q * self.gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        gate = 2.0 * torch.sigmoid(F.linear(x[..., : self.gate_width], self.gate.to(x.dtype)))
        y = (y * gate[..., None]).reshape(b, t, -1)
        o = self.out(y)
        if lora is not None:
            o = o + lora.delta("o", layer, y)
        return o


class LeakySquareMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.leak = cfg.leak
        self.up = Dense(cfg.dim, int(cfg.mlp_mult * cfg.dim))
        self.down = Dense(int(cfg.mlp_mult * cfg.dim), cfg.dim)

    def forward(self, x, lora=None, layer=0):
        h = F.leaky_relu(self.up(x), negative_slope=self.leak).square()
        y = self.down(h)
        if lora is not None:
            y = y + lora.delta("m", layer, x)
        return y


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.layer = layer
        self.attn = GatedAttention(cfg)
        self.mlp = LeakySquareMLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim))))
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x, x0, lora=None):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        a = self.attn(rms(x) * self.depth_scale, lora, self.layer)
        x = x + self.attn_scale.to(x.dtype) * a
        m = self.mlp(rms(x) * self.depth_scale, lora, self.layer)
        return x + self.mlp_scale.to(x.dtype) * m


class GPT(nn.Module):
    """Decoder with skips from its first half to its second, tied embeddings and a soft cap on the logits."""

    def __init__(self, cfg):
        super().__init__()
        self.cap = cfg.softcap
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList([Block(cfg, i) for i in range(cfg.num_layers)])
        self.down_layers = cfg.num_layers // 2
        self.skip_weight = nn.Parameter(torch.ones(self.down_layers, cfg.dim))
        self.skip_gate = nn.Parameter(torch.zeros(self.down_layers, cfg.dim))
        self._init()

    def _init(self):
        nn.init.normal_(self.embed.weight, std=0.005)
        for name, module in self.named_modules():
            if isinstance(module, Dense):
                if name.endswith((".out", ".down")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def features(self, ids, lora=None):
        x = rms(F.embedding(ids, self.embed.weight.to(torch.bfloat16)))
        x0 = x
        skips = []
        for i, block in enumerate(self.blocks):
            if i < self.down_layers:
                x = block(x, x0, lora)
                skips.append(x)
                continue
            j = i - self.down_layers
            if skips:
                skip = self.skip_weight[j].to(x.dtype) * skips.pop()
                g = torch.sigmoid(self.skip_gate[j]).to(x.dtype)
                x = torch.lerp(skip, x, g)
            x = block(x, x0, lora)
        return rms(x)

    def logits(self, features, lora=None):
        """The raw logits; the cap is part of the loss."""
        z = F.linear(features, self.embed.weight.to(features.dtype))
        if lora is not None:
            z = z + lora.delta("head", 0, features)
        return z

    def forward(self, ids, target):
        return softcap_nll(self.logits(self.features(ids)), target, self.cap).mean()

    def token_nll(self, ids, target, lora=None, first=0):
        """The losses of positions `first` and later: target[i, t] given ids[i, : first + t + 1]."""
        f = self.features(ids, lora)[:, first : first + target.size(1)]
        return softcap_nll(self.logits(f, lora), target, self.cap)


# ---- adapters


class DocumentLoRA(nn.Module):
    """One low-rank adapter per document of a batch; row i of every tensor belongs to document i alone."""

    def __init__(self, cfg, docs, device):
        super().__init__()
        self.rank = cfg.ttt_rank
        self.rows = None
        kv = cfg.num_kv_heads * (cfg.dim // cfg.num_heads)
        outputs = {"q": cfg.dim, "v": kv, "o": cfg.dim, "m": cfg.dim}
        sites = [(f"{kind}{i}", n) for i in range(cfg.num_layers) for kind, n in outputs.items()]
        sites.append(("head0", cfg.vocab_size))
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        for name, n in sites:
            self.a[name] = nn.Parameter(torch.empty(docs, self.rank, cfg.dim, device=device))
            self.b[name] = nn.Parameter(torch.empty(docs, n, self.rank, device=device))
        self.reset()

    @torch.no_grad()
    def reset(self, number=0):
        """Back to no adaptation, for batch `number` of documents; what is drawn depends on that number alone."""
        draw = torch.Generator(device=self.b["head0"].device).manual_seed(7919 * number + 1)
        for a in self.a.values():
            a.uniform_(-1.0, 1.0, generator=draw).mul_(1.0 / math.sqrt(a.size(-1)))
        for b in self.b.values():
            b.zero_()

    def use(self, rows):
        self.rows = rows

    def delta(self, kind, layer, x):
        name = f"{kind}{layer}"
        a = self.a[name][self.rows].to(x.dtype)
        b = self.b[name][self.rows].to(x.dtype)
        return torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))


# ---- optimizers


def orthogonalise(g, steps):
    """Newton-Schulz iteration towards the nearest half-orthogonal matrix, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    flip = x.size(0) > x.size(1)
    if flip:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. The ranks share the matrices out and sum the updates."""

    def __init__(self, params, world, lr, momentum, steps, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))
        self.world = world

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p.grad)
                    buf = state["momentum"]
                    buf.lerp_(p.grad, 1.0 - group["momentum"])
                    update = orthogonalise(p.grad.lerp(buf, group["momentum"]), group["steps"])
                    update = update * math.sqrt(max(1.0, p.size(0) / p.size(1)))
                    flat[at : at + p.numel()] = update.reshape(-1)
                at += p.numel()
            self.world.sum_(flat)
            at = 0
            for p in params:
                if group["weight_decay"]:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for the embedding and for everything small."""

    def __init__(self, model, cfg, world):
        matrices, small = [], []
        for name, p in model.named_parameters():
            if name == "embed.weight":
                continue
            big = p.ndim == 2 and min(p.shape) >= 64
            (matrices if big else small).append(p)
        betas = (cfg.beta1, cfg.beta2)
        self.muon = Muon(matrices, world, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_steps, cfg.muon_wd)
        self.embed = torch.optim.AdamW(
            [model.embed.weight], lr=cfg.embed_lr, betas=betas, eps=1e-8, weight_decay=cfg.adam_wd, fused=True
        )
        self.small = torch.optim.AdamW(
            small, lr=cfg.scalar_lr, betas=betas, eps=1e-8, weight_decay=cfg.adam_wd, fused=True
        )
        self.all = [self.muon, self.embed, self.small]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def step(self, scale, momentum):
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
            opt.step()

    def state(self):
        return [opt.state_dict() for opt in self.all]

    def restore(self, states):
        for opt, state in zip(self.all, states, strict=True):
            opt.load_state_dict(state)


class Average:
    """Exponential moving average of the weights, with a fixed decay."""

    def __init__(self, model, decay):
        self.decay = decay
        self.weights = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for k, v in model.state_dict().items():
            self.weights[k].lerp_(v.detach().float(), 1.0 - self.decay)

    def apply(self, model):
        model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in self.weights.items()})


# ---- training


def reduce_grads(model, world):
    """Averages the gradients over the ranks in one message per type."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if world.distributed and grads:
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        at = 0
        for g in grads:
            g.copy_(flat[at : at + g.numel()].view_as(g))
            at += g.numel()


def lr_scale(cfg, step, elapsed_s, train_s):
    """Constant, then linear to zero over the last part of the time (or of the steps, without a cap)."""
    if train_s is None:
        left = (cfg.iterations - step) / max(cfg.iterations, 1)
    else:
        left = max(train_s - elapsed_s, 0.0) / train_s
    return min(1.0, left / cfg.warmdown_frac) if cfg.warmdown_frac > 0 else 1.0


def train_step(model, compiled, opts, loader, cfg, world, scale, momentum):
    opts.zero_grad()
    loss_sum = torch.zeros((), device=world.device)
    for _ in range(world.grad_accum):
        x, y = loader.next_batch(cfg.batch_tokens, cfg.seq_len, world.grad_accum)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(x, y)
        loss_sum += loss.detach() / world.grad_accum
        (loss / world.grad_accum).backward()
    reduce_grads(model, world)
    if cfg.grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    opts.step(scale, momentum)
    return loss_sum


def warm_up(model, compiled, opts, cfg, world):
    """Compiles everything on training batches, then puts weights and optimizers back to where they were."""
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    states = opts.state()
    loader = TrainLoader(cfg.train_files, world, cfg.seed)
    for i in range(cfg.warmup_steps):
        train_step(model, compiled, opts, loader, cfg, world, 1.0, cfg.muon_momentum)
        if i + 1 == cfg.warmup_steps or i % 10 == 9:
            log(f"warmup_step:{i + 1}/{cfg.warmup_steps}", world)
    model.load_state_dict(weights)
    for opt in opts.all:
        opt.state.clear()
    opts.restore(states)
    opts.zero_grad()


def train(model, cfg, world, val_tokens, table):
    """Trains until the steps or the time are used up; returns the loader and the clock's start."""
    compiled = torch.compile(model, dynamic=False, fullgraph=False)
    opts = Optimizers(model, cfg, world)
    warm_up(model, compiled, opts, cfg, world)
    loader = TrainLoader(cfg.train_files, world, cfg.seed)
    average = Average(model, cfg.ema_decay)
    train_s = cfg.cap_s - cfg.quant_reserve_s if cfg.cap_s > 0 else None

    world.barrier()
    torch.cuda.synchronize()
    start = time.perf_counter()
    paused = 0.0
    step, last = 0, None
    while True:
        final = step == cfg.iterations or (last is not None and step >= last)
        if final or (cfg.val_every > 0 and step > 0 and step % cfg.val_every == 0):
            torch.cuda.synchronize()
            t = time.perf_counter()
            model.eval()
            loss, bpb = eval_blocks(model, cfg, world, val_tokens, table)
            model.train()
            log(
                f"step:{step}/{cfg.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} "
                f"train_time:{1000 * (t - start - paused):.0f}ms",
                world,
            )
            torch.cuda.synchronize()
            paused += time.perf_counter() - t
        if final:
            break
        elapsed = time.perf_counter() - start - paused
        scale = lr_scale(cfg, step, elapsed, train_s)
        momentum = cfg.muon_momentum - 0.1 * max(0.0, 1.0 - step / 1500)
        loss = train_step(model, compiled, opts, loader, cfg, world, scale, momentum)
        average.update(model)
        step += 1
        elapsed = time.perf_counter() - start - paused
        if step <= 5 or step % cfg.log_every == 0:
            log(
                f"step:{step}/{cfg.iterations} train_loss:{loss.item():.4f} "
                f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / step:.2f}ms",
                world,
            )
        if train_s is not None and last is None and step % 8 == 0 and world.slowest(elapsed) >= train_s:
            last = step
            log(f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{step}", world)
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB", world)
    average.apply(model)
    log(f"ema: applied the average of decay {cfg.ema_decay}", world)
    return loader, start + paused


# ---- quantisation


@torch.no_grad()
def collect_hessians(model, loader, cfg, world, deadline):
    """Second moments of every matrix's input over batches of the training stream, while the training time lasts."""
    hessians, hooks = {}, []

    def watch(name):
        def hook(module, inputs, output):
            x = inputs[0].reshape(-1, inputs[0].size(-1)).float()
            hessians[name].addmm_(x.T, x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Dense):
            n = module.weight.size(1)
            hessians[f"{name}.weight"] = torch.zeros(n, n, device=world.device)
            hooks.append(module.register_forward_hook(watch(f"{name}.weight")))
    hessians["embed.weight"] = torch.zeros(cfg.dim, cfg.dim, device=world.device)
    model.eval()
    used = 0
    for _ in range(cfg.calib_batches):
        if world.slowest(time.perf_counter()) >= deadline:
            break
        x, _ = loader.next_batch(cfg.batch_tokens // 4, cfg.seq_len, world.grad_accum)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            f = model.features(x)
        f = f.reshape(-1, f.size(-1)).float()
        hessians["embed.weight"].addmm_(f.T, f)
        used += 1
    for hook in hooks:
        hook.remove()
    for h in hessians.values():
        world.sum_(h)
    return hessians, used


def row_scales(w, bits, sigmas):
    top = 2 ** (bits - 1) - 1
    return (sigmas * w.std(dim=1) / top).clamp_min(1e-8).to(torch.float16)


def gptq(weight, hessian, bits, sigmas, damp, block):
    """GPTQ with columns in order of falling curvature; returns int8 codes and float16 scales of the rows."""
    w = weight.detach().float().clone()
    h = hessian.clone()
    top = 2 ** (bits - 1) - 1
    scale = row_scales(w, bits, sigmas)
    s = scale.float()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty_like(w)
    for a in range(0, w.size(1), block):
        b = min(a + block, w.size(1))
        errors = torch.empty_like(w[:, a:b])
        for i in range(a, b):
            q = torch.clamp(torch.round(w[:, i] / s), -top, top)
            codes[:, i] = q
            error = (w[:, i] - q * s) / inverse[i, i]
            w[:, i:b] -= error[:, None] * inverse[i, i:b][None, :]
            errors[:, i - a] = error
        w[:, b:] -= errors @ inverse[a:b, b:]
    return codes[:, torch.argsort(order)].to(torch.int8), scale


def group_codes(x, group, top=7):
    """Codes of a small factor in groups along its flat order, with a float16 scale per group."""
    flat = x.reshape(-1)
    flat = F.pad(flat, (0, -flat.numel() % group)).view(-1, group)
    scale = (flat.abs().amax(dim=1) / top).clamp_min(1e-8).to(torch.float16)
    return torch.clamp(torch.round(flat / scale.float()[:, None]), -top, top).to(torch.int8), scale


def from_group_codes(codes, scale, shape):
    flat = (codes.float() * scale.float()[:, None]).reshape(-1)
    return flat[: math.prod(shape)].view(shape)


@torch.no_grad()
def quantise(model, hessians, cfg):
    """The model as small arrays: int6 matrices, int7 embedding, LQER where most is lost, float16 for the rest."""
    packed, residuals = {}, []
    for name, w in model.state_dict().items():
        if name not in hessians:
            packed[f"{name}|f"] = w.to(torch.float16)
            continue
        embed = name == "embed.weight"
        bits, sigmas = (cfg.embed_bits, cfg.embed_clip) if embed else (cfg.matrix_bits, cfg.matrix_clip)
        codes, scale = gptq(w, hessians[name], bits, sigmas, cfg.gptq_damp, cfg.gptq_block)
        packed[f"{name}|q"], packed[f"{name}|s"] = codes, scale
        error = w.float() - codes.float() * scale.float()[:, None]
        weighted = error * hessians[name].diagonal().clamp_min(0).sqrt()[None, :]
        residuals.append((weighted.norm().item(), name, error))
    residuals.sort(key=lambda r: r[0], reverse=True)
    for _, name, error in residuals[: cfg.lqer_top]:
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        r = cfg.lqer_rank
        half = s[:r].sqrt()
        for key, factor in (("a", u[:, :r] * half), ("b", half[:, None] * v[:r])):
            packed[f"{name}|{key}q"], packed[f"{name}|{key}s"] = group_codes(factor, cfg.lqer_group)
    return packed


def dequantise(packed, shapes, cfg):
    state = {}
    for name, shape in shapes.items():
        if f"{name}|f" in packed:
            state[name] = packed[f"{name}|f"].float()
            continue
        w = packed[f"{name}|q"].float() * packed[f"{name}|s"].float()[:, None]
        if f"{name}|aq" in packed:
            a = from_group_codes(packed[f"{name}|aq"], packed[f"{name}|as"], (shape[0], cfg.lqer_rank))
            b = from_group_codes(packed[f"{name}|bq"], packed[f"{name}|bs"], (cfg.lqer_rank, shape[1]))
            w = w + a @ b
        state[name] = w
    return state


# ---- the artifact

DTYPES = {"int8": torch.int8, "float16": torch.float16}


def shuffle_bytes(raw, width):
    """All first bytes of the items, then all second bytes ..."""
    if width == 1:
        return raw
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, width).T.tobytes()


def unshuffle_bytes(raw, width):
    if width == 1:
        return raw
    return np.frombuffer(raw, dtype=np.uint8).reshape(width, -1).T.tobytes()


def write_artifact(packed, path):
    """Names and shapes as JSON, the arrays' shuffled bytes behind them, all through brotli; returns the size."""
    head, body = [], io.BytesIO()
    for name in sorted(packed, key=lambda n: (str(packed[n].dtype), n)):
        array = packed[name].cpu().contiguous().numpy()
        head.append([name, str(array.dtype), list(array.shape)])
        body.write(shuffle_bytes(array.tobytes(), array.itemsize))
    text = json.dumps(head, separators=(",", ":")).encode()
    blob = brotli.compress(struct.pack("<I", len(text)) + text + body.getvalue(), quality=11, lgwin=24)
    Path(path).write_bytes(blob)
    return len(blob)


def read_artifact(path, device):
    raw = brotli.decompress(Path(path).read_bytes())
    (length,) = struct.unpack_from("<I", raw)
    at = 4 + length
    packed = {}
    for name, kind, shape in json.loads(raw[4:at]):
        width = np.dtype(kind).itemsize
        size = math.prod(shape) * width
        data = unshuffle_bytes(raw[at : at + size], width)
        packed[name] = torch.frombuffer(bytearray(data), dtype=DTYPES[kind]).view(shape).to(device)
        at += size
    return packed


def report_sizes(cfg, world, model_bytes):
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + model_bytes
    log(f"Serialized model int6+brotli: {model_bytes} bytes", world)
    log(f"Code size: {code_bytes} bytes", world)
    log(f"Total submission size: {total} bytes", world)
    if total > cfg.size_limit:
        raise RuntimeError(f"{total} bytes are more than {cfg.size_limit}")


# ---- evaluation


@torch.no_grad()
def eval_windows(model, cfg, world, val_tokens, table, stride):
    """Every target once: window w scores targets w * stride ... with as much context as the length allows."""
    n, length = val_tokens.numel() - 1, cfg.eval_seq_len
    ledger = Ledger(n, world)
    mine = list(range(world.rank, math.ceil(n / stride), world.size))
    for at in range(0, len(mine), cfg.eval_batch_seqs):
        group = mine[at : at + cfg.eval_batch_seqs]
        x = torch.zeros(len(group), length, dtype=torch.int64)
        y = torch.zeros(len(group), length, dtype=torch.int64)
        scored = torch.zeros(len(group), length, dtype=torch.bool)
        where = torch.zeros(len(group), length, dtype=torch.int64)
        for i, w in enumerate(group):
            first, end = w * stride, min((w + 1) * stride, n)
            begin = max(0, end - length)
            size = end - begin
            x[i, :size] = val_tokens[begin:end]
            y[i, :size] = val_tokens[begin + 1 : end + 1]
            where[i, :size] = torch.arange(begin, end)
            scored[i, first - begin : size] = True
        x, y, scored, where = (t.to(world.device, non_blocking=True) for t in (x, y, scored, where))
        nll = model.token_nll(x, y)
        ledger.enter(where[scored], nll[scored], table.count(x, y)[scored])
    return ledger.close()


def eval_blocks(model, cfg, world, val_tokens, table):
    """The quick look: windows that do not overlap."""
    return eval_windows(model, cfg, world, val_tokens, table, cfg.eval_seq_len)


# ---- phased test-time training


def find_documents(val_tokens, bos_id):
    """(first, end) of each document's targets. A document starts at its BOS and predicts up to the next one's BOS."""
    n = val_tokens.numel() - 1
    starts = torch.nonzero(val_tokens[:-1] == bos_id).flatten().tolist()
    if not starts or starts[0] != 0:
        starts = [0, *starts]
    return list(zip(starts, [*starts[1:], n], strict=True))


def document_cost(first, end, cfg):
    """Tokens that pass through the model for one document."""
    cost = 0
    for a in range(0, end - first, cfg.ttt_chunk):
        b = min(a + cfg.ttt_chunk, end - first)
        cost += b - max(0, a + cfg.ttt_chunk - cfg.eval_seq_len)
    return cost


def make_plan(documents, cfg, world_size):
    """The deal: phases of consecutive documents, batches in the stream's order, each to the least loaded rank.

    Rank 0 makes it before anything is scored and sends it to the others. A batch's losses do not depend on its rank.
    """
    plan, number = [], 0
    per_phase = math.ceil(len(documents) / cfg.ttt_phases)
    for at in range(0, len(documents), per_phase):
        phase = documents[at : at + per_phase]
        load = [0] * world_size
        ranks = [[] for _ in range(world_size)]
        for i in range(0, len(phase), cfg.ttt_batch):
            batch = phase[i : i + cfg.ttt_batch]
            r = load.index(min(load))
            ranks[r].append((number, batch))
            load[r] += len(batch) * max(document_cost(a, b, cfg) for a, b in batch)
            number += 1
        plan.append({"end": phase[-1][1], "docs": len(phase), "ranks": ranks})
    return plan


def chunk_tensors(val_tokens, batch, rows, c, cfg, device):
    """Inputs, targets and places of chunk c of the documents `rows`; all windows begin at the same offset."""
    start = c * cfg.ttt_chunk
    begin = max(0, start + cfg.ttt_chunk - cfg.eval_seq_len)
    ends = [min(start + cfg.ttt_chunk, batch[i][1] - batch[i][0]) for i in rows]
    width = max(ends) - begin
    x = torch.zeros(len(rows), width, dtype=torch.int64)
    y = torch.zeros(len(rows), max(ends) - start, dtype=torch.int64)
    where = torch.zeros_like(y)
    valid = torch.zeros_like(y, dtype=torch.bool)
    for r, (i, end) in enumerate(zip(rows, ends, strict=True)):
        first = batch[i][0]
        x[r, : end - begin] = val_tokens[first + begin : first + end]
        y[r, : end - start] = val_tokens[first + start + 1 : first + end + 1]
        where[r, : end - start] = torch.arange(first + start, first + end)
        valid[r, : end - start] = True
    moved = (t.to(device, non_blocking=True) for t in (x, y, where, valid))
    return (*moved, start - begin)


def score_batch(model, lora, optimizer, val_tokens, batch, number, table, ledger, cfg, world, may_learn):
    """Scores a batch of documents chunk by chunk; a document's adapter learns a chunk after its losses are entered."""
    lora.reset(number)
    optimizer.state.clear()
    sizes = [end - first for first, end in batch]
    for c in range(math.ceil(max(sizes) / cfg.ttt_chunk)):
        rows = [i for i, size in enumerate(sizes) if size > c * cfg.ttt_chunk]
        x, y, where, valid, offset = chunk_tensors(val_tokens, batch, rows, c, cfg, world.device)
        lora.use(torch.tensor(rows, device=world.device))
        goes_on = torch.tensor([sizes[i] > (c + 1) * cfg.ttt_chunk for i in rows], device=world.device)
        learn = may_learn() and bool(goes_on.any())
        with torch.set_grad_enabled(learn):
            nll = model.token_nll(x, y, lora, offset)
        previous = x[:, offset : offset + y.size(1)]
        ledger.enter(where[valid], nll[valid], table.count(previous, y)[valid])
        if learn:
            per_document = (nll * valid).sum(1) / valid.sum(1)
            optimizer.zero_grad(set_to_none=True)
            (per_document * goes_on).sum().backward()
            optimizer.step()


def learn_prefix(model, optimizer, val_tokens, end, cfg, world):
    """SGD of the base weights on the last windows of the prefix whose targets [0, end) are all scored."""
    length = cfg.eval_seq_len
    per_step = world.size * cfg.global_batch
    windows = list(range(0, end - length + 1, length))[-cfg.global_windows :]
    steps = len(windows) // per_step
    windows = windows[len(windows) - steps * per_step :]
    total = steps * cfg.global_epochs
    for p in model.parameters():
        p.requires_grad_(True)
    for step in range(total):
        lr = cfg.global_lr * 0.5 * (1.0 + math.cos(math.pi * step / total))
        for group in optimizer.param_groups:
            group["lr"] = lr
        at = (step % steps) * per_step + world.rank * cfg.global_batch
        picked = windows[at : at + cfg.global_batch]
        x = torch.stack([val_tokens[w : w + length] for w in picked]).to(world.device)
        y = torch.stack([val_tokens[w + 1 : w + length + 1] for w in picked]).to(world.device)
        optimizer.zero_grad(set_to_none=True)
        loss = model.token_nll(x, y).mean()
        loss.backward()
        reduce_grads(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.global_clip)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for p in model.parameters():
        p.requires_grad_(False)
    return total


def eval_phased(model, cfg, world, val_tokens, table, eval_start):
    """Score-first test-time training over the whole split; (loss, bits per byte)."""
    plan = world.share(make_plan(find_documents(val_tokens, cfg.bos_id), cfg, world.size))
    ledger = Ledger(val_tokens.numel() - 1, world)
    for p in model.parameters():
        p.requires_grad_(False)
    lora = DocumentLoRA(cfg, cfg.ttt_batch, world.device)
    adapter_opt = torch.optim.AdamW(
        lora.parameters(),
        lr=cfg.ttt_lr,
        betas=(cfg.ttt_beta1, cfg.ttt_beta2),
        eps=1e-10,
        weight_decay=cfg.ttt_wd,
        fused=True,
    )
    base_opt = torch.optim.SGD(model.parameters(), lr=cfg.global_lr, momentum=cfg.global_momentum)

    def may_learn():
        return time.perf_counter() - eval_start < cfg.eval_budget_s

    for index, phase in enumerate(plan):
        for number, batch in phase["ranks"][world.rank]:
            score_batch(model, lora, adapter_opt, val_tokens, batch, number, table, ledger, cfg, world, may_learn)
        elapsed = world.slowest(time.perf_counter() - eval_start)
        steps = 0
        if index + 1 < len(plan) and elapsed < cfg.eval_budget_s:
            steps = learn_prefix(model, base_opt, val_tokens, phase["end"], cfg, world)
        log(
            f"phase:{index + 1}/{len(plan)} docs:{phase['docs']} scored_to:{phase['end']} "
            f"global_steps:{steps} time:{elapsed:.1f}s",
            world,
        )
    return ledger.close()


# ---- the run


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def build_model(cfg, world):
    model = GPT(cfg).to(world.device)
    if world.distributed:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)
    return model


def make_artifact(model, loader, cfg, world, train_start):
    """Hessians and quantisation inside the training time, then the packed file; its size in bytes."""
    deadline = train_start + cfg.cap_s if cfg.cap_s > 0 else float("inf")
    began = time.perf_counter()
    hessians, used = collect_hessians(model, loader, cfg, world, deadline - 0.5 * cfg.quant_reserve_s)
    packed = quantise(model, hessians, cfg)
    torch.cuda.synchronize()
    now = time.perf_counter()
    log(
        f"gptq: {used} calibration batches of training data, {now - began:.1f}s; "
        f"train+quantise {now - train_start:.1f}s of {cfg.cap_s:.0f}s",
        world,
    )
    size = write_artifact(packed, cfg.artifact) if world.main else 0
    return world.share(size)


def load_model(cfg, world):
    """A fresh model with the weights of the artifact and nothing else."""
    model = GPT(cfg).to(world.device)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict(dequantise(read_artifact(cfg.artifact, world.device), shapes, cfg))
    return model.eval()


def main():
    global LOG_FILE
    cfg = Config()
    world = World()
    if world.main:
        os.makedirs("logs", exist_ok=True)
        LOG_FILE = f"logs/{cfg.run_id}.txt"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    seed_everything(cfg.seed)
    log(Path(__file__).read_text(encoding="utf-8"), world, console=False)
    log(f"Running Python {sys.version.split()[0]}, PyTorch {torch.__version__}", world)

    table = ByteTable(cfg.tokenizer, cfg.vocab_size, world.device)
    val_tokens = load_validation(cfg.val_files)
    log(f"val_loader: {cfg.val_files} tokens:{val_tokens.numel()}", world)
    log(f"train_loader: {cfg.train_files} shards:{len(glob.glob(cfg.train_files))}", world)

    model = build_model(cfg, world)
    log(f"model_params:{sum(p.numel() for p in model.parameters())} world_size:{world.size} seed:{cfg.seed}", world)
    loader, train_start = train(model, cfg, world, val_tokens, table)
    size = make_artifact(model, loader, cfg, world, train_start)
    report_sizes(cfg, world, size)
    del model, loader
    torch.cuda.empty_cache()
    world.barrier()

    eval_start = time.perf_counter()
    model = load_model(cfg, world)
    loss, bpb = eval_blocks(model, cfg, world, val_tokens, table)
    log(f"quantised val_loss:{loss:.6f} val_bpb:{bpb:.6f} time:{time.perf_counter() - eval_start:.1f}s", world)
    name = "blocks"
    if cfg.sliding_enabled or not cfg.ttt_enabled:
        loss, bpb = eval_windows(model, cfg, world, val_tokens, table, cfg.eval_stride)
        name = "sliding_window"
        log(f"{name} val_loss:{loss:.6f} val_bpb:{bpb:.6f} stride:{cfg.eval_stride}", world)
    if cfg.ttt_enabled:
        loss, bpb = eval_phased(model, cfg, world, val_tokens, table, eval_start)
        name = "phased_ttt"
    torch.cuda.synchronize()
    log(f"{name} eval_time:{1000 * (time.perf_counter() - eval_start):.0f}ms", world)
    log(f"final_{name} val_loss:{loss:.8f} val_bpb:{bpb:.8f}", world)
    if world.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
