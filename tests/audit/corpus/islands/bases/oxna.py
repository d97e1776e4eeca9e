"""
oxna: parameter-bank GPT for the 16 MB / 10 min track. One file; trains, averages, quantises (GPTQ int6), packs,
reads the pack back and scores it with score-first test-time training over sliding windows.

Fork of the modded-nanogpt style baseline. What differs from it:
  * the block matrices live in four 3-D banks, so that Muon runs batched and sharded (reduce-scatter / all-gather)
  * value embeddings on the last layers, bigram-hash embedding, U-net skips
  * EMA of the weights plus an SWA tail, late int6 QAT
  * hessians for GPTQ come from training batches, inside the 600 s
  * evaluation: stride-64 windows, a small causal n-gram cache, LoRA adapted on chunks that are already scored

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import math
import os
import random
import struct
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

try:
    import brotli
except ImportError:
    brotli = None
try:
    import zstandard
except ImportError:
    zstandard = None

SCRIPT_START = time.perf_counter()
SIZE_LIMIT = 16_000_000


# -----------------------------------------------------------------------------
# settings
# -----------------------------------------------------------------------------


def env(name: str, default):
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw not in ("0", "false", "False", "")
    return type(default)(raw)


class Hyperparameters:
    # data
    data_path = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = env("RUN_ID", str(uuid.uuid4()))
    seed = env("SEED", 1337)

    # training length
    iterations = env("ITERATIONS", 20000)
    warmdown_iters = env("WARMDOWN_ITERS", 3500)
    warmup_steps = env("WARMUP_STEPS", 20)
    train_batch_tokens = env("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds = env("MAX_WALLCLOCK_SECONDS", 600.0)
    quant_reserve_seconds = env("QUANT_RESERVE_SECONDS", 16.0)
    val_loss_every = env("VAL_LOSS_EVERY", 4000)
    train_log_every = env("TRAIN_LOG_EVERY", 500)

    # model
    vocab_size = env("VOCAB_SIZE", 1024)
    num_layers = env("NUM_LAYERS", 11)
    model_dim = env("MODEL_DIM", 512)
    num_heads = env("NUM_HEADS", 8)
    num_kv_heads = env("NUM_KV_HEADS", 4)
    mlp_mult = env("MLP_MULT", 3)
    rope_base = env("ROPE_BASE", 10000.0)
    rope_dims = env("ROPE_DIMS", 32)
    logit_softcap = env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env("QK_GAIN_INIT", 1.5)
    bigram_buckets = env("BIGRAM_BUCKETS", 2048)
    bigram_dim = env("BIGRAM_DIM", 96)
    ve_layers = env("VE_LAYERS", "9,10")
    ve_dim = env("VE_DIM", 128)

    # optimisers
    bank_lr = env("BANK_LR", 0.025)
    embed_lr = env("EMBED_LR", 0.035)
    scalar_lr = env("SCALAR_LR", 0.025)
    muon_momentum = env("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env("MUON_MOMENTUM_START", 0.92)
    muon_momentum_warmup = env("MUON_MOMENTUM_WARMUP", 1500)
    muon_ns_steps = env("MUON_NS_STEPS", 5)
    muon_wd = env("MUON_WD", 0.04)
    adam_wd = env("ADAM_WD", 0.04)
    beta1 = env("BETA1", 0.9)
    beta2 = env("BETA2", 0.95)
    adam_eps = env("ADAM_EPS", 1e-8)
    grad_clip = env("GRAD_CLIP", 0.3)

    # averages
    ema_decay = env("EMA_DECAY", 0.997)
    swa_start_scale = env("SWA_START_SCALE", 0.2)
    swa_every = env("SWA_EVERY", 50)
    average = env("AVERAGE", "blend")  # ema, swa, blend, none
    blend = env("AVERAGE_BLEND", 0.5)

    # quantisation
    qat_start_scale = env("QAT_START_SCALE", 0.15)
    gptq_batches = env("GPTQ_BATCHES", 64)
    gptq_block = env("GPTQ_BLOCK", 128)
    gptq_damp = env("GPTQ_DAMP", 0.01)
    bank_bits = env("BANK_BITS", 6)
    embed_bits = env("EMBED_BITS", 8)
    artifact = env("ARTIFACT", "final_model.oxna")

    # evaluation
    eval_seq_len = env("EVAL_SEQ_LEN", 2048)
    eval_stride = env("EVAL_STRIDE", 64)
    eval_batch = env("EVAL_BATCH", 32)
    eval_temperature = env("EVAL_TEMPERATURE", 1.0)
    eval_budget_seconds = env("EVAL_BUDGET_SECONDS", 560.0)
    cache_lambda = env("CACHE_LAMBDA", 0.06)
    cache_kappa = env("CACHE_KAPPA", 24.0)
    cache_alpha = env("CACHE_ALPHA", 4.0)
    cache_rows = env("CACHE_ROWS", 65536)
    ttt_mode = env("TTT_MODE", "lora")  # lora, full, off
    ttt_chunk_tokens = env("TTT_CHUNK_TOKENS", 32768)
    ttt_epochs = env("TTT_EPOCHS", 3)
    ttt_lr = env("TTT_LR", 0.002)
    ttt_momentum = env("TTT_MOMENTUM", 0.9)
    ttt_batch_seqs = env("TTT_BATCH_SEQS", 8)
    ttt_rank = env("TTT_RANK", 8)
    ttt_grad_clip = env("TTT_GRAD_CLIP", 1.0)


# -----------------------------------------------------------------------------
# ranks and logging
# -----------------------------------------------------------------------------


class World:
    def __init__(self):
        self.on = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if 8 % self.size:
            raise ValueError(f"WORLD_SIZE={self.size} must divide 8")
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.on:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum_(self, t: Tensor) -> Tensor:
        if self.on:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        if self.on:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)
        return t

    def agree(self, flag: bool) -> bool:
        """Rank 0's answer, on every rank."""
        if not self.on:
            return flag
        t = torch.tensor([int(flag)], device=self.device)
        dist.broadcast(t, 0)
        return bool(t.item())

    def barrier(self):
        if self.on:
            dist.barrier()


LOGFILE: str | None = None


def log0(world: World, text: str, console: bool = True):
    if not world.main:
        return
    if console:
        print(text, flush=True)
    if LOGFILE is not None:
        with open(LOGFILE, "a", encoding="utf-8") as f:
            print(text, file=f)


# -----------------------------------------------------------------------------
# shards
# -----------------------------------------------------------------------------

HEADER_INTS = 256
MAGIC = 20240520


def load_shard(path: Path) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != MAGIC or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header in {path}")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"short read of {path}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


class TokenStream:
    """All train shards, one after the other, for ever."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no shards match {pattern}")
        self.at = 0
        self.pos = 0
        self.tokens = load_shard(self.files[0])

    def _next_file(self):
        self.at = (self.at + 1) % len(self.files)
        self.tokens = load_shard(self.files[self.at])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self._next_file()
                continue
            k = min(left, n)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Each call: one contiguous global batch, of which this rank takes its span."""

    def __init__(self, pattern: str, world: World):
        self.world = world
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.world.size * accum)
        local = local // seq_len * seq_len
        span = local + 1
        chunk = self.stream.take(span * self.world.size)
        mine = chunk[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        return x.to(self.world.device, non_blocking=True), y.to(self.world.device, non_blocking=True)


def load_validation(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return torch.cat([load_shard(p) for p in files]).contiguous()


# -----------------------------------------------------------------------------
# bytes per token
# -----------------------------------------------------------------------------


class ByteTables:
    """How many bytes of text each token stands for, given the token before it.

    A leading space is the piece's mark; it is a byte of the text unless the token before is a control token
    (the text of a document does not begin with the mark's space).
    """

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros(size, dtype=np.int32)
        space = np.zeros(size, dtype=np.bool_)
        edge = np.ones(size, dtype=np.bool_)
        for i in range(int(sp.vocab_size())):
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
        self.base = torch.tensor(base, dtype=torch.int32, device=device)
        self.space = torch.tensor(space, dtype=torch.bool, device=device)
        self.edge = torch.tensor(edge, dtype=torch.bool, device=device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.base[target].to(torch.float64)
        n += (self.space[target] & ~self.edge[prev]).to(torch.float64)
        return n


# -----------------------------------------------------------------------------
# model
# -----------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def fake_quant(w: Tensor, bits: int) -> Tensor:
    """Row-wise symmetric rounding, straight through."""
    top = 2 ** (bits - 1) - 1
    scale = w.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / top
    q = (w.detach() / scale).round().clamp(-top - 1, top) * scale
    return w + (q - w).detach()


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float):
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv", inv, persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        # x: B T H D, only the first dims of D are turned
        t = torch.arange(x.size(1), device=x.device, dtype=torch.float32)
        angle = torch.outer(t, self.inv)[None, :, None, :]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class BigramHash(nn.Module):
    def __init__(self, buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.table = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.table.weight)
        self.proj = nn.Parameter(torch.randn(model_dim, dim) / math.sqrt(dim))
        self.gain = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0))
        bucket = torch.bitwise_xor(ids * 36313, prev * 27191) % (self.buckets - 1)
        bucket = torch.where(torch.arange(ids.size(1), device=ids.device) == 0, self.buckets - 1, bucket)
        e = self.table(bucket)
        return F.linear(e, self.proj.to(e.dtype)) * self.gain.to(e.dtype)


class ValueEmbedding(nn.Module):
    def __init__(self, vocab: int, dim: int, kv_dim: int, layers: list[int]):
        super().__init__()
        self.layers = layers
        self.table = nn.Embedding(vocab, dim)
        nn.init.normal_(self.table.weight, std=0.01)
        self.proj = nn.Parameter(torch.randn(kv_dim, dim) / math.sqrt(dim))
        self.gains = nn.Parameter(torch.full((len(layers),), 0.1))

    def forward(self, ids: Tensor) -> Tensor:
        e = self.table(ids)
        return F.linear(e, self.proj.to(e.dtype))


class BlockScalars(nn.Module):
    """What a layer has besides its slices of the banks."""

    def __init__(self, h: type[Hyperparameters], layer: int):
        super().__init__()
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))))
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init))
        self.depth_scale = 1.0 / math.sqrt(layer + 1)


class GPT(nn.Module):
    BANKS = ("qo", "kv", "up", "down")

    def __init__(self, h: type[Hyperparameters]):
        super().__init__()
        self.h = h
        n, d = h.num_layers, h.model_dim
        self.head_dim = d // h.num_heads
        kv_dim = h.num_kv_heads * self.head_dim
        hidden = h.mlp_mult * d
        self.tok_emb = nn.Embedding(h.vocab_size, d)
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        self.bigram = BigramHash(h.bigram_buckets, h.bigram_dim, d)
        self.ve = ValueEmbedding(h.vocab_size, h.ve_dim, kv_dim, [int(i) for i in h.ve_layers.split(",") if i])
        # banks: rows 0..n-1 the first kind, n..2n-1 the second
        self.qo = nn.Parameter(torch.empty(2 * n, d, d))
        self.kv = nn.Parameter(torch.empty(2 * n, kv_dim, d))
        self.up = nn.Parameter(torch.empty(n, hidden, d))
        self.down = nn.Parameter(torch.empty(n, d, hidden))
        for i in range(n):
            nn.init.orthogonal_(self.qo.data[i])
            nn.init.zeros_(self.qo.data[n + i])
            nn.init.orthogonal_(self.kv.data[i])
            nn.init.orthogonal_(self.kv.data[n + i])
            nn.init.orthogonal_(self.up.data[i])
            nn.init.zeros_(self.down.data[i])
        self.blocks = nn.ModuleList(BlockScalars(h, i) for i in range(n))
        self.encoders = n // 2
        self.skips = nn.Parameter(torch.ones(min(self.encoders, n - self.encoders), d))
        self.rotary = Rotary(h.rope_dims, h.rope_base)
        # 0 or 1; a tensor, so that switching QAT on does not recompile
        self.register_buffer("qat", torch.zeros(()), persistent=False)
        self.hessians: Hessians | None = None

    def matrix(self, bank: str, row: int, lora: BankLoRA | None) -> Tensor:
        w = getattr(self, bank)[row]
        if self.training:
            w = w + self.qat * (fake_quant(w, self.h.bank_bits) - w)
        if lora is not None:
            w = w + lora.delta(bank, row)
        return w

    def linear(self, x: Tensor, bank: str, row: int, lora: BankLoRA | None) -> Tensor:
        if self.hessians is not None:
            self.hessians.add(bank, row, x)
        return F.linear(x, self.matrix(bank, row, lora).to(x.dtype))

    def attention(self, x: Tensor, layer: int, v_extra: Tensor | None, lora: BankLoRA | None) -> Tensor:
        h, n = self.h, self.h.num_layers
        b, t, _ = x.shape
        q = self.linear(x, "qo", layer, lora).view(b, t, h.num_heads, self.head_dim)
        k = self.linear(x, "kv", layer, lora).view(b, t, h.num_kv_heads, self.head_dim)
        v = self.linear(x, "kv", n + layer, lora)
        if v_extra is not None:
            v = v + v_extra
        v = v.view(b, t, h.num_kv_heads, self.head_dim)
        q, k = self.rotary(rms(q)), self.rotary(rms(k))
        q = q * self.blocks[layer].q_gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        y = y.transpose(1, 2).reshape(b, t, -1)
        return self.linear(y, "qo", n + layer, lora)

    def block(self, x: Tensor, x0: Tensor, layer: int, v_extra: Tensor | None, lora: BankLoRA | None) -> Tensor:
        s = self.blocks[layer]
        mix = s.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + s.attn_scale.to(x.dtype) * self.attention(rms(x) * s.depth_scale, layer, v_extra, lora)
        hidden = self.linear(rms(x) * s.depth_scale, "up", layer, lora)
        hidden = F.leaky_relu(hidden, 0.5).square()
        return x + s.mlp_scale.to(x.dtype) * self.linear(hidden, "down", layer, lora)

    def logits(self, ids: Tensor, lora: BankLoRA | None = None) -> Tensor:
        x = self.tok_emb(ids) + self.bigram(ids)
        x = rms(x).bfloat16()
        x0 = x
        ve = self.ve(ids).bfloat16()
        stack: list[Tensor] = []
        for i in range(self.h.num_layers):
            if i < self.encoders:
                stack.append(x)
            elif stack:
                x = x + self.skips[i - self.encoders].to(x.dtype) * stack.pop()
            v_extra = None
            if i in self.ve.layers:
                v_extra = ve * self.ve.gains[self.ve.layers.index(i)].to(ve.dtype)
            x = self.block(x, x0, i, v_extra, lora)
        out = F.linear(rms(x), self.tok_emb.weight.to(x.dtype)).float()
        cap = self.h.logit_softcap
        return cap * torch.tanh(out / cap)

    def forward(self, ids: Tensor, targets: Tensor, lora: BankLoRA | None = None) -> Tensor:
        out = self.logits(ids, lora)
        return F.cross_entropy(out.flatten(0, 1), targets.flatten())


class BankLoRA(nn.Module):
    """Low-rank deltas for every matrix of every bank; zero at the start."""

    def __init__(self, model: GPT, rank: int):
        super().__init__()
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        for name in GPT.BANKS:
            n, rows, cols = getattr(model, name).shape
            gen = torch.Generator().manual_seed(len(name) + cols)
            a = torch.randn(n, rank, cols, generator=gen) / math.sqrt(cols)
            self.a[name] = nn.Parameter(a.to(model.qo.device))
            self.b[name] = nn.Parameter(torch.zeros(n, rows, rank, device=model.qo.device))

    def delta(self, bank: str, row: int) -> Tensor:
        return self.b[bank][row] @ self.a[bank][row]


# -----------------------------------------------------------------------------
# optimisers
# -----------------------------------------------------------------------------


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Batched quintic iteration towards the nearest orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        m = x @ x.mT
        x = a * x + (b * m + c * m @ m) @ x
    return x.mT if tall else x


class BankMuon:
    """Muon over the banks. Every rank owns a run of each bank's rows: gradients come by reduce-scatter,
    started right after backward, and the updates go back by all-gather while the next bank is worked on."""

    def __init__(self, banks: list[nn.Parameter], h: type[Hyperparameters], world: World):
        self.h, self.world = h, world
        self.lr = h.bank_lr
        self.momentum = h.muon_momentum_start
        self.items = []
        for p in sorted(banks, key=lambda p: -p.numel()):
            per = -(-p.shape[0] // world.size)
            shape = (per, *p.shape[1:])
            self.items.append(
                dict(
                    p=p,
                    per=per,
                    buf=torch.zeros(shape, device=p.device),
                    shard=torch.zeros(shape, device=p.device, dtype=torch.bfloat16),
                    full=torch.zeros((per * world.size, *p.shape[1:]), device=p.device, dtype=torch.bfloat16),
                    work=None,
                )
            )

    def launch(self):
        for it in self.items:
            p = it["p"]
            it["full"][: p.shape[0]].copy_(p.grad)
            if self.world.on:
                it["work"] = dist.reduce_scatter_tensor(
                    it["shard"], it["full"], op=dist.ReduceOp.AVG, async_op=True
                )
            else:
                it["shard"].copy_(it["full"])

    @torch.no_grad()
    def step(self):
        pending = []
        for it in self.items:
            if it["work"] is not None:
                it["work"].wait()
            g = it["shard"].float()
            it["buf"].lerp_(g, 1 - self.momentum)
            g = g.lerp(it["buf"], self.momentum)
            u = newton_schulz(g, self.h.muon_ns_steps)
            u = u * max(1.0, u.size(-2) / u.size(-1)) ** 0.5
            if self.world.on:
                work = dist.all_gather_into_tensor(it["full"], u.contiguous(), async_op=True)
                pending.append((it, work))
            else:
                it["full"].copy_(u)
                pending.append((it, None))
        for it, work in pending:
            if work is not None:
                work.wait()
            p = it["p"]
            p.mul_(1 - self.lr * self.h.muon_wd)
            p.add_(it["full"][: p.shape[0]].to(p.dtype), alpha=-self.lr)
            p.grad = None


class Optimisers:
    """BankMuon and two Adams, one schedule."""

    def __init__(self, model: GPT, h: type[Hyperparameters], world: World):
        self.h, self.world, self.model = h, world, model
        banks = [getattr(model, name) for name in GPT.BANKS]
        held = {id(p) for p in banks}
        embeds = [model.tok_emb.weight, model.bigram.table.weight, model.ve.table.weight]
        held |= {id(p) for p in embeds}
        self.small = embeds + [p for p in model.parameters() if id(p) not in held]
        scalars = self.small[len(embeds) :]
        self.muon = BankMuon(banks, h, world)
        kw = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.adams = [
            torch.optim.AdamW(embeds, lr=h.embed_lr, weight_decay=h.adam_wd, **kw),
            torch.optim.AdamW(scalars, lr=h.scalar_lr, weight_decay=h.adam_wd, **kw),
        ]
        self.base_lr = [h.embed_lr, h.scalar_lr]

    def set_scale(self, scale: float, step: int):
        frac = min(step / max(self.h.muon_momentum_warmup, 1), 1.0)
        self.muon.momentum = (1 - frac) * self.h.muon_momentum_start + frac * self.h.muon_momentum
        self.muon.lr = self.h.bank_lr * scale
        for opt, lr in zip(self.adams, self.base_lr):
            for group in opt.param_groups:
                group["lr"] = lr * scale

    def step(self):
        self.muon.launch()
        for p in self.small:
            if p.grad is not None:
                self.world.mean_(p.grad)
        nn.utils.clip_grad_norm_(self.small, self.h.grad_clip)
        for opt in self.adams:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.muon.step()


# -----------------------------------------------------------------------------
# averages of the weights
# -----------------------------------------------------------------------------


class Averages:
    def __init__(self, model: GPT, h: type[Hyperparameters]):
        self.h = h
        self.ema = {k: v.detach().float().clone() for k, v in model.state_dict().items()}
        self.swa = {k: torch.zeros_like(v) for k, v in self.ema.items()}
        self.swa_count = 0

    @torch.no_grad()
    def update(self, model: GPT, step: int, scale: float):
        live = model.state_dict()
        for k, e in self.ema.items():
            e.lerp_(live[k].float(), 1 - self.h.ema_decay)
        if scale < self.h.swa_start_scale and step % self.h.swa_every == 0:
            for k, s in self.swa.items():
                s.add_(live[k].float())
            self.swa_count += 1

    def final(self, model: GPT) -> dict[str, Tensor]:
        live = {k: v.detach().float() for k, v in model.state_dict().items()}
        if self.h.average == "none":
            return live
        if self.h.average == "ema" or self.swa_count == 0:
            return self.ema
        swa = {k: s / self.swa_count for k, s in self.swa.items()}
        if self.h.average == "swa":
            return swa
        return {k: self.ema[k].lerp(swa[k], self.h.blend) for k in swa}


# -----------------------------------------------------------------------------
# GPTQ
# -----------------------------------------------------------------------------


class Hessians:
    """Sums of x x^T for the input of every bank matrix."""

    def __init__(self):
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.rows: dict[tuple[str, int], int] = {}

    @torch.no_grad()
    def add(self, bank: str, row: int, x: Tensor):
        flat = x.detach().reshape(-1, x.size(-1)).float()
        key = (bank, row)
        if key not in self.sums:
            self.sums[key] = torch.zeros(flat.size(1), flat.size(1), device=x.device)
            self.rows[key] = 0
        self.sums[key].addmm_(flat.T, flat)
        self.rows[key] += flat.size(0)

    def reduce(self, world: World):
        for key in sorted(self.sums):
            self.sums[key] /= max(self.rows[key], 1)
            world.mean_(self.sums[key])


@torch.no_grad()
def collect_hessians(model: GPT, loader: TrainLoader, h: type[Hyperparameters], world: World) -> Hessians:
    """Runs training batches through the averaged model."""
    found = Hessians()
    model.eval()
    model.hessians = found
    tokens = world.size * 4 * h.train_seq_len
    for _ in range(h.gptq_batches):
        x, _ = loader.next_batch(tokens, h.train_seq_len, 1)
        model.logits(x)
    model.hessians = None
    found.reduce(world)
    return found


def row_scales(w: Tensor, bits: int, weight: Tensor | None = None) -> Tensor:
    """Per row the clip, of a few shares of the row's maximum, with the smallest (weighted) squared error."""
    top = 2 ** (bits - 1) - 1
    peak = w.abs().amax(dim=1).clamp_min(1e-8)
    best = torch.full_like(peak, float("inf"))
    scales = peak / top
    for share in (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78):
        s = peak * share / top
        q = (w / s[:, None]).round().clamp(-top - 1, top) * s[:, None]
        err = (q - w).square()
        err = (err * weight if weight is not None else err).sum(dim=1)
        better = err < best
        best = torch.where(better, err, best)
        scales = torch.where(better, s, scales)
    return scales.half().float()


@torch.no_grad()
def gptq(w: Tensor, hess: Tensor, h: type[Hyperparameters]) -> tuple[Tensor, Tensor]:
    """Column-wise rounding with the error pushed on to the columns not yet rounded."""
    bits, block = h.bank_bits, h.gptq_block
    top = 2 ** (bits - 1) - 1
    w = w.float().clone()
    cols = w.size(1)
    hess = hess.float().clone()
    diag = torch.diagonal(hess)
    dead = diag <= 0
    diag[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(torch.diagonal(hess), descending=True)
    w, hess = w[:, order], hess[order][:, order]
    scale = row_scales(w, bits, torch.diagonal(hess))
    damp = h.gptq_damp * torch.diagonal(hess).mean()
    for _ in range(6):
        reg = hess + damp * torch.eye(cols, device=w.device)
        chol, bad = torch.linalg.cholesky_ex(reg)
        if not int(bad):
            break
        damp = damp * 10
    inv = torch.cholesky_inverse(chol)
    upper = torch.linalg.cholesky(inv, upper=True)
    q = torch.zeros_like(w, dtype=torch.int8)
    for lo in range(0, cols, block):
        hi = min(lo + block, cols)
        wb, ub = w[:, lo:hi].clone(), upper[lo:hi, lo:hi]
        errs = torch.zeros_like(wb)
        for j in range(hi - lo):
            col = wb[:, j]
            r = (col / scale).round().clamp(-top - 1, top)
            q[:, lo + j] = r.to(torch.int8)
            e = (col - r * scale) / ub[j, j]
            wb[:, j:] -= e[:, None] * ub[j, j:][None]
            errs[:, j] = e
        w[:, hi:] -= errs @ upper[lo:hi, hi:]
    back = torch.argsort(order)
    return q[:, back].contiguous(), scale


@torch.no_grad()
def quantise(model: GPT, found: Hessians, h: type[Hyperparameters], world: World) -> dict[str, Tensor]:
    """Banks to int6 (GPTQ, the rows shared out over the ranks), embeddings to int8, the rest to half."""
    out: dict[str, Tensor] = {}
    jobs = [(name, row) for name in GPT.BANKS for row in range(getattr(model, name).shape[0])]
    for name in GPT.BANKS:
        bank = getattr(model, name)
        out[f"{name}.q"] = torch.zeros(bank.shape, dtype=torch.int8, device=bank.device)
        out[f"{name}.s"] = torch.zeros(bank.shape[:2], dtype=torch.float32, device=bank.device)
    for name, row in jobs[world.rank :: world.size]:
        q, s = gptq(getattr(model, name).data[row], found.sums[(name, row)], h)
        out[f"{name}.q"][row], out[f"{name}.s"][row] = q, s
    for name in GPT.BANKS:
        # every row was filled on one rank and is zero on the others
        wide = world.sum_(out[f"{name}.q"].to(torch.int32))
        out[f"{name}.q"] = wide.to(torch.int8)
        out[f"{name}.s"] = world.sum_(out[f"{name}.s"]).half()
    for key, value in model.state_dict().items():
        if key in GPT.BANKS:
            continue
        if value.ndim == 2 and value.numel() > 65536:
            s = row_scales(value.float(), h.embed_bits)
            top = 2 ** (h.embed_bits - 1) - 1
            q = (value.float() / s[:, None]).round().clamp(-top - 1, top)
            out[f"{key}.q"], out[f"{key}.s"] = q.to(torch.int8), s.half()
        else:
            out[f"{key}.f"] = value.half()
    return {k: v.cpu() for k, v in out.items()}


def dequantise(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for key, value in packed.items():
        name, kind = key.rsplit(".", 1)
        if kind == "f":
            state[name] = value.float()
        elif kind == "q":
            state[name] = value.float() * packed[f"{name}.s"].float()[..., None]
    return state


# -----------------------------------------------------------------------------
# packing
# -----------------------------------------------------------------------------

DTYPES = {0: torch.int8, 1: torch.float16}
CODES = {v: k for k, v in DTYPES.items()}


def serialise(packed: dict[str, Tensor]) -> bytes:
    """Name, dtype, shape and data of each tensor; halves are split into their two byte planes."""
    buf = io.BytesIO()
    buf.write(struct.pack("<I", len(packed)))
    for name in sorted(packed):
        t = packed[name].contiguous()
        raw_name = name.encode()
        buf.write(struct.pack("<BBB", len(raw_name), CODES[t.dtype], t.ndim))
        buf.write(raw_name)
        buf.write(struct.pack(f"<{t.ndim}I", *t.shape))
        data = t.numpy().tobytes()
        if t.dtype == torch.float16:
            pairs = np.frombuffer(data, dtype=np.uint8).reshape(-1, 2)
            data = pairs.T.tobytes()
        buf.write(data)
    return buf.getvalue()


def deserialise(raw: bytes) -> dict[str, Tensor]:
    (count,) = struct.unpack_from("<I", raw, 0)
    at = 4
    packed = {}
    for _ in range(count):
        name_len, code, ndim = struct.unpack_from("<BBB", raw, at)
        at += 3
        name = raw[at : at + name_len].decode()
        at += name_len
        shape = struct.unpack_from(f"<{ndim}I", raw, at)
        at += 4 * ndim
        dtype = DTYPES[code]
        numel = math.prod(shape)
        size = numel * (2 if dtype == torch.float16 else 1)
        data = raw[at : at + size]
        at += size
        if dtype == torch.float16:
            data = np.frombuffer(data, dtype=np.uint8).reshape(2, -1).T.tobytes()
            array = np.frombuffer(data, dtype=np.float16)
        else:
            array = np.frombuffer(data, dtype=np.int8)
        packed[name] = torch.from_numpy(array.copy()).reshape(shape)
    return packed


def squeeze(raw: bytes) -> bytes:
    """The smallest of what is installed; the first byte says which."""
    tries = [b"z" + zlib.compress(raw, 9)]
    if brotli is not None:
        tries.append(b"b" + brotli.compress(raw, quality=11, lgwin=24))
    if zstandard is not None:
        tries.append(b"s" + zstandard.ZstdCompressor(level=22).compress(raw))
    return min(tries, key=len)


def unsqueeze(blob: bytes) -> bytes:
    kind, body = blob[:1], blob[1:]
    if kind == b"b":
        return brotli.decompress(body)
    if kind == b"s":
        return zstandard.ZstdDecompressor().decompress(body)
    return zlib.decompress(body)


def write_artifact(packed: dict[str, Tensor], h: type[Hyperparameters], world: World):
    blob = squeeze(serialise(packed))
    if world.main:
        Path(h.artifact).write_bytes(blob)
    code_bytes = len(Path(__file__).read_bytes())
    model_bytes = len(blob)
    total = code_bytes + model_bytes
    log0(world, f"Serialized model int6: {model_bytes} bytes (kind {blob[:1].decode()})")
    log0(world, f"Code size: {code_bytes} bytes")
    log0(world, f"Total submission size: {total} bytes (limit {SIZE_LIMIT})")
    if total > SIZE_LIMIT:
        raise RuntimeError(f"over the size limit by {total - SIZE_LIMIT} bytes")
    world.barrier()


def read_artifact(h: type[Hyperparameters], world: World) -> GPT:
    packed = deserialise(unsqueeze(Path(h.artifact).read_bytes()))
    model = GPT(h).to(world.device)
    model.load_state_dict(dequantise(packed), strict=True)
    model.eval()
    return model


# -----------------------------------------------------------------------------
# scoring
# -----------------------------------------------------------------------------


class Stream:
    """The validation tokens; target t is tokens[t + 1], its context tokens[: t + 1]."""

    def __init__(self, tokens: Tensor, tables: ByteTables, h: type[Hyperparameters], device: torch.device):
        self.tokens = tokens.to(device=device, dtype=torch.int64)
        self.total = self.tokens.numel() - 1
        self.tables = tables
        # for each target the row of the cache that the two tokens before it fall into
        cur = self.tokens[:-1]
        before = F.pad(self.tokens[:-2], (1, 0))
        self.rows = (cur * 1_000_003 + before * 8_191 + 77) % h.cache_rows

    def bytes_of(self, t: Tensor) -> Tensor:
        return self.tables.count(self.tokens[t], self.tokens[t + 1])


class Score:
    """Sums over the targets that this rank has scored."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, n_bytes: Tensor):
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += nll.numel()
        self.sums[2] += n_bytes.sum()

    def result(self, world: World) -> tuple[float, float, int]:
        total = world.sum_(self.sums.clone())
        nll, tokens, n_bytes = (float(v) for v in total.tolist())
        return nll / tokens, nll / math.log(2.0) / n_bytes, int(tokens)


Window = tuple[int, int, int]


def plan_windows(total: int, seq_len: int, stride: int) -> list[Window]:
    """(start, first, end): the model reads start..end, the targets first..end are scored. Every target once."""
    plan = []
    first = 0
    while first < total:
        end = min(first + (seq_len if first == 0 else stride), total)
        plan.append((max(0, end - seq_len), first, end))
        first = end
    return plan


class NgramCache:
    """Counts of what followed each (hashed) pair of tokens in the text scored so far, for the whole vocabulary."""

    def __init__(self, h: type[Hyperparameters], device: torch.device):
        self.h = h
        self.counts = torch.zeros(h.cache_rows, h.vocab_size, device=device)
        self.unigram = torch.ones(h.vocab_size, device=device)

    def lookup(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A distribution over the vocabulary for each row, and how often the row was seen."""
        c = self.counts[rows]
        seen = c.sum(dim=-1)
        prior = self.unigram / self.unigram.sum()
        q = (c + self.h.cache_alpha * prior) / (seen + self.h.cache_alpha)[:, None]
        return q, seen

    def update(self, rows: Tensor, targets: Tensor):
        ones = torch.ones_like(targets, dtype=self.counts.dtype)
        self.counts.view(-1).index_add_(0, rows * self.h.vocab_size + targets, ones)
        self.unigram.index_add_(0, targets, ones)


def target_nll(logits: Tensor, rows: Tensor, targets: Tensor, cache: NgramCache | None, h) -> Tensor:
    logp = F.log_softmax(logits.float() / h.eval_temperature, dim=-1)
    if cache is not None:
        q, seen = cache.lookup(rows)
        lam = (h.cache_lambda * seen / (seen + h.cache_kappa))[:, None]
        logp = torch.logaddexp(logp + torch.log1p(-lam), q.log() + lam.log())
    return -logp.gather(-1, targets[:, None]).squeeze(-1)


@torch.no_grad()
def score_windows(
    forward,
    windows: list[Window],
    stream: Stream,
    score: Score,
    h: type[Hyperparameters],
    cache: NgramCache | None = None,
    lora: BankLoRA | None = None,
):
    device = stream.tokens.device
    for at in range(0, len(windows), h.eval_batch):
        group = windows[at : at + h.eval_batch]
        x = torch.zeros(h.eval_batch, h.eval_seq_len, dtype=torch.int64, device=device)
        for i, (start, _, end) in enumerate(group):
            x[i, : end - start] = stream.tokens[start:end]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = forward(x, lora)
        picked = torch.cat([logits[i, first - start : end - start] for i, (start, first, end) in enumerate(group)])
        t = torch.cat([torch.arange(first, end, device=device) for _, first, end in group])
        nll = target_nll(picked, stream.rows[t], stream.tokens[t + 1], cache, h)
        score.add(nll, stream.bytes_of(t))


def plain_score(forward, stream: Stream, h: type[Hyperparameters], world: World) -> tuple[float, float]:
    """Blocks side by side, no state: what the training loop and the round trip print."""
    windows = plan_windows(stream.total, h.eval_seq_len, h.eval_seq_len)
    score = Score(world.device)
    score_windows(forward, windows[world.rank :: world.size], stream, score, h)
    loss, bpb, _ = score.result(world)
    return loss, bpb


# -----------------------------------------------------------------------------
# test-time training: a chunk is scored, then learnt from
# -----------------------------------------------------------------------------


class Adapter:
    """What is trained during evaluation: LoRA deltas of the banks, or (mode full) the banks themselves."""

    def __init__(self, model: GPT, forward, h: type[Hyperparameters], world: World):
        self.h, self.world, self.forward = h, world, forward
        for p in model.parameters():
            p.requires_grad_(False)
        self.lora: BankLoRA | None = None
        if h.ttt_mode == "lora":
            self.lora = BankLoRA(model, h.ttt_rank)
            self.params = list(self.lora.parameters())
            self.opt = torch.optim.AdamW(self.params, lr=h.ttt_lr, betas=(0.9, 0.99), weight_decay=0.0)
        else:
            self.params = [getattr(model, name).requires_grad_(True) for name in GPT.BANKS]
            self.opt = torch.optim.SGD(self.params, lr=h.ttt_lr, momentum=h.ttt_momentum)

    def set_progress(self, done: float):
        for group in self.opt.param_groups:
            group["lr"] = self.h.ttt_lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def learn(self, stream: Stream, first: int, end: int):
        """Some epochs over the targets first..end, all of which have been scored."""
        h, world = self.h, self.world
        n = (end - first) // h.eval_seq_len
        if n == 0:
            return
        span = stream.tokens[first : first + n * h.eval_seq_len + 1]
        xs = span[:-1].view(n, h.eval_seq_len)
        ys = span[1:].view(n, h.eval_seq_len)
        for epoch in range(h.ttt_epochs):
            gen = torch.Generator().manual_seed(h.seed + first + epoch)
            order = torch.randperm(n, generator=gen)
            for lo in range(0, n, h.ttt_batch_seqs):
                batch = order[lo : lo + h.ttt_batch_seqs]
                mine = batch[world.rank :: world.size].to(xs.device)
                self.opt.zero_grad(set_to_none=False)
                if mine.numel():
                    with torch.autocast("cuda", dtype=torch.bfloat16):
                        out = self.forward(xs[mine], self.lora)
                        loss = F.cross_entropy(out.flatten(0, 1), ys[mine].flatten(), reduction="sum")
                    (loss / (batch.numel() * h.eval_seq_len)).backward()
                for p in self.params:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    world.sum_(p.grad)
                nn.utils.clip_grad_norm_(self.params, h.ttt_grad_clip)
                self.opt.step()


def chunks_of(windows: list[Window], chunk_tokens: int) -> list[list[Window]]:
    """Consecutive windows, gathered until they score chunk_tokens targets."""
    chunks: list[list[Window]] = []
    current: list[Window] = []
    size = 0
    for w in windows:
        current.append(w)
        size += w[2] - w[1]
        if size >= chunk_tokens:
            chunks.append(current)
            current, size = [], 0
    if current:
        chunks.append(current)
    return chunks


def adaptive_score(
    model: GPT, forward, stream: Stream, h: type[Hyperparameters], world: World, started: float
) -> tuple[float, float, int]:
    """One pass from left to right. The state that scores a chunk was made from the chunks before it."""
    windows = plan_windows(stream.total, h.eval_seq_len, h.eval_stride)
    chunks = chunks_of(windows, h.ttt_chunk_tokens)
    score = Score(world.device)
    cache = NgramCache(h, world.device) if h.cache_lambda > 0 else None
    adapter = Adapter(model, forward, h, world) if h.ttt_mode != "off" else None
    learning = adapter is not None
    log0(world, f"ttt:mode {h.ttt_mode} chunks:{len(chunks)} windows:{len(windows)} epochs:{h.ttt_epochs}")
    for c, chunk in enumerate(chunks):
        lora = adapter.lora if adapter is not None else None
        score_windows(forward, chunk[world.rank :: world.size], stream, score, h, cache, lora)
        first, end = chunk[0][1], chunk[-1][2]
        if cache is not None:
            cache.update(stream.rows[first:end], stream.tokens[first + 1 : end + 1])
        if learning and c + 1 < len(chunks):
            # the rest is scored with the adapter as it stands once the budget is nearly used
            learning = world.agree(time.perf_counter() - started < 0.8 * h.eval_budget_seconds)
            if learning:
                adapter.set_progress(c / len(chunks))
                adapter.learn(stream, first, end)
        if c % 200 == 0:
            log0(world, f"ttt:chunk {c}/{len(chunks)} time:{time.perf_counter() - started:.1f}s")
    return score.result(world)


def evaluate(h: type[Hyperparameters], world: World, tables: ByteTables, val_tokens: Tensor) -> float:
    """Reads the pack back and scores the whole validation split with it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    model = read_artifact(h, world)
    forward = torch.compile(model.logits, dynamic=False)
    stream = Stream(val_tokens, tables, h, world.device)

    loss, bpb = plain_score(forward, stream, h, world)
    log0(world, f"final_int6_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f}")
    log0(world, f"final_int6_roundtrip time:{time.perf_counter() - started:.1f}s")

    loss, bpb, tokens = adaptive_score(model, forward, stream, h, world, started)
    if tokens != stream.total:
        raise RuntimeError(f"{tokens} tokens scored of {stream.total}")
    torch.cuda.synchronize()
    spent = time.perf_counter() - started
    log0(world, f"final_eval tokens:{tokens} stride:{h.eval_stride} eval_time:{1000 * spent:.0f}ms")
    log0(world, f"final_int6_sliding_ttt_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    return bpb


# -----------------------------------------------------------------------------
# training
# -----------------------------------------------------------------------------


class Clock:
    """Training time in ms. Only the scoring of the validation split, which trains nothing, stops it."""

    def __init__(self):
        self.total = 0.0
        self.begun = 0.0

    def start(self):
        torch.cuda.synchronize()
        self.begun = time.perf_counter()

    def stop(self):
        torch.cuda.synchronize()
        self.total += 1000.0 * (time.perf_counter() - self.begun)

    def now(self) -> float:
        return self.total + 1000.0 * (time.perf_counter() - self.begun)


def lr_scale(step: int, elapsed_ms: float, budget_ms: float, h: type[Hyperparameters]) -> float:
    """Flat, then linear to nought; the end is the clock's when it comes before the last iteration."""
    if h.warmdown_iters <= 0:
        return 1.0
    per_step = elapsed_ms / max(step, 1)
    warmdown_ms = h.warmdown_iters * per_step
    left_ms = max(budget_ms - elapsed_ms, 0.0)
    by_clock = left_ms / max(warmdown_ms, 1e-9)
    by_steps = (h.iterations - step) / h.warmdown_iters
    return max(min(1.0, by_clock, by_steps), 0.0)


def warm_up(model: GPT, forward, opts: Optimisers, h: type[Hyperparameters], world: World, accum: int):
    """Compiles every path with a few steps; weights and optimisers are put back afterwards."""
    saved = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    saved_adams = [copy.deepcopy(o.state_dict()) for o in opts.adams]
    loader = TrainLoader(h.train_files, world)
    for i in range(h.warmup_steps):
        for _ in range(accum):
            x, y = loader.next_batch(h.train_batch_tokens, h.train_seq_len, accum)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = forward(x, y)
            (loss / accum).backward()
        opts.step()
        if i + 1 == h.warmup_steps:
            log0(world, f"warmup_step:{i + 1}/{h.warmup_steps}")
    model.load_state_dict(saved, strict=True)
    for o, s in zip(opts.adams, saved_adams):
        o.load_state_dict(s)
    for it in opts.muon.items:
        it["buf"].zero_()
    model.zero_grad(set_to_none=True)


def train(
    h: type[Hyperparameters], world: World, model: GPT, tables: ByteTables, val_tokens: Tensor
) -> Hessians:
    """Trains within the cap, puts the averaged weights into the model and gathers the hessians, all on one clock."""
    accum = 8 // world.size
    forward = torch.compile(model, dynamic=False, fullgraph=True)
    logits = torch.compile(model.logits, dynamic=False)
    opts = Optimisers(model, h, world)
    model.train()
    if h.warmup_steps > 0:
        warm_up(model, forward, opts, h, world, accum)
    averages = Averages(model, h)
    loader = TrainLoader(h.train_files, world)
    stream = Stream(val_tokens, tables, h, world.device)
    budget_ms = 1000.0 * (h.max_wallclock_seconds - h.quant_reserve_seconds)
    clock = Clock()
    world.barrier()
    clock.start()

    step, stop_at = 0, None
    while True:
        last = step == h.iterations or (stop_at is not None and step >= stop_at)
        if last or (h.val_loss_every > 0 and step % h.val_loss_every == 0):
            clock.stop()
            model.eval()
            loss, bpb = plain_score(logits, stream, h, world)
            model.train()
            log0(
                world,
                f"step:{step}/{h.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} "
                f"train_time:{clock.total:.0f}ms step_avg:{clock.total / max(step, 1):.2f}ms",
            )
            clock.start()
        if last:
            break

        elapsed = clock.now()
        scale = lr_scale(step, elapsed, budget_ms, h)
        opts.set_scale(scale, step)
        if scale < h.qat_start_scale and not bool(model.qat):
            model.qat.fill_(1.0)
            log0(world, f"late_qat:on step:{step} scale:{scale:.4f}")
        shown = torch.zeros((), device=world.device)
        for _ in range(accum):
            x, y = loader.next_batch(h.train_batch_tokens, h.train_seq_len, accum)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = forward(x, y)
            shown += loss.detach() / accum
            (loss / accum).backward()
        opts.step()
        averages.update(model, step, scale)

        step += 1
        elapsed = clock.now()
        if step <= 10 or step % h.train_log_every == 0:
            log0(
                world,
                f"step:{step}/{h.iterations} train_loss:{shown.item():.4f} "
                f"train_time:{elapsed:.0f}ms step_avg:{elapsed / step:.2f}ms",
            )
        if stop_at is None and world.agree(elapsed >= budget_ms):
            stop_at = step

    log0(world, f"stopped step:{step} train_time:{clock.now():.0f}ms swa_count:{averages.swa_count}")
    model.load_state_dict({k: v.to(model.qo.dtype) for k, v in averages.final(model).items()}, strict=True)
    found = collect_hessians(model, loader, h, world)
    clock.stop()
    log0(world, f"train+hessians time:{clock.total:.0f}ms of {1000 * h.max_wallclock_seconds:.0f}ms")
    log0(world, f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    return found


# -----------------------------------------------------------------------------
# main
# -----------------------------------------------------------------------------


def main():
    global LOGFILE
    h = Hyperparameters
    world = World()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if world.main:
        os.makedirs("logs", exist_ok=True)
        LOGFILE = f"logs/{h.run_id}.txt"
    log0(world, Path(__file__).read_text(encoding="utf-8"), console=False)
    log0(world, f"Running Python {sys.version.split()[0]} PyTorch {torch.__version__}")

    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)

    sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
    if int(sp.vocab_size()) != h.vocab_size:
        raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    tables = ByteTables(sp, h.vocab_size, world.device)
    val_tokens = load_validation(h.val_files)
    log0(world, f"val_tokens:{val_tokens.numel()} train_shards:{len(glob.glob(h.train_files))}")

    model = GPT(h).to(world.device)
    log0(world, f"model_params:{sum(p.numel() for p in model.parameters())}")
    log0(world, f"world_size:{world.size} grad_accum_steps:{8 // world.size} seed:{h.seed}")

    found = train(h, world, model, tables, val_tokens)
    packed = quantise(model, found, h, world)
    write_artifact(packed, h, world)
    del model, found, packed
    torch.cuda.empty_cache()

    evaluate(h, world, tables, val_tokens)
    log0(world, f"wall time since start: {time.perf_counter() - SCRIPT_START:.0f}s")
    if world.on:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
