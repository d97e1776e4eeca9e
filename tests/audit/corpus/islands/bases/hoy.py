"""
11L x 512d, GQA 8/4, XSA on the last four layers, partial RoPE, value embeddings, LeakyReLU(0.5)^2 MLP, EMA,
int6 GPTQ (Hessians from train shards, inside the ten minutes), lzma. Evaluation: phased, score-first test-time
training by document. See README.md.
"""

from __future__ import annotations

import copy
import fcntl
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP


# =====================================================================================================================
# settings
# =====================================================================================================================


class Hyperparameters:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 13.0))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    leaky_slope = float(os.environ.get("LEAKY_SLOPE", 0.5))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    ve_dim = int(os.environ.get("VE_DIM", 128))
    ve_layers = os.environ.get("VE_LAYERS", "9,10")
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

    # optimisers
    embed_lr = float(os.environ.get("EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # quantisation
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    gptq_batches = int(os.environ.get("GPTQ_BATCHES", 48))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")

    # plain evaluation
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    sliding_enabled = bool(int(os.environ.get("SLIDING_ENABLED", 0)))

    # phased test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", 1)))
    ttt_phases = int(os.environ.get("TTT_PHASES", 3))
    ttt_chunk = int(os.environ.get("TTT_CHUNK", 64))
    ttt_window = int(os.environ.get("TTT_WINDOW", 1024))
    ttt_batch_docs = int(os.environ.get("TTT_BATCH_DOCS", 64))
    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 8))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 1e-3))
    ttt_lora_steps = int(os.environ.get("TTT_LORA_STEPS", 1))
    ttt_lora_wd = float(os.environ.get("TTT_LORA_WD", 0.1))
    ttt_base_lr = float(os.environ.get("TTT_BASE_LR", 4e-4))
    ttt_base_momentum = float(os.environ.get("TTT_BASE_MOMENTUM", 0.9))
    ttt_base_docs = int(os.environ.get("TTT_BASE_DOCS", 6000))
    ttt_base_seqs = int(os.environ.get("TTT_BASE_SEQS", 8))
    ttt_base_clip = float(os.environ.get("TTT_BASE_CLIP", 1.0))
    ttt_budget_seconds = float(os.environ.get("TTT_BUDGET_SECONDS", 540.0))


CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "ve_scales")

_LOGFILE = None


def open_log(args: Hyperparameters, is_master: bool) -> None:
    global _LOGFILE
    if is_master:
        os.makedirs("logs", exist_ok=True)
        _LOGFILE = f"logs/{args.run_id}.txt"
        print(_LOGFILE)


def log0(msg: str, console: bool = True) -> None:
    if _LOGFILE is None:
        return
    if console:
        print(msg, flush=True)
    with open(_LOGFILE, "a", encoding="utf-8") as f:
        print(msg, file=f)


# =====================================================================================================================
# the group of processes
# =====================================================================================================================


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def master(self) -> bool:
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.world > 1 and dist.is_available() and dist.is_initialized()

    def sum_(self, t: Tensor) -> Tensor:
        if self.many:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def any(self, flag: bool) -> bool:
        t = torch.tensor(int(flag), device=self.device)
        if self.many:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def barrier(self) -> None:
        if self.many:
            dist.barrier()


def join_ranks() -> Ranks:
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return Ranks(rank, world, device)


# =====================================================================================================================
# bytes of tokens
# =====================================================================================================================


@dataclass
class ByteTable:
    """Bytes of each piece without its leading space, which pieces lead with a space, and which are no text."""

    base: Tensor
    spaced: Tensor
    boundary: Tensor

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.base[target].to(torch.int32)
        n = n + (self.spaced[target] & ~self.boundary[prev]).to(torch.int32)
        return n.to(torch.float64)


def build_byte_table(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTable:
    n_pieces = int(sp.vocab_size())
    size = max(n_pieces, vocab_size)
    base = np.zeros((size,), dtype=np.int16)
    spaced = np.zeros((size,), dtype=np.bool_)
    boundary = np.ones((size,), dtype=np.bool_)
    for tid in range(n_pieces):
        if sp.is_control(tid) or sp.is_unknown(tid) or sp.is_unused(tid):
            continue
        boundary[tid] = False
        if sp.is_byte(tid):
            base[tid] = 1
            continue
        piece = sp.id_to_piece(tid)
        if piece.startswith("\u2581"):
            spaced[tid] = True
            piece = piece[1:]
        base[tid] = len(piece.encode("utf-8"))
    return ByteTable(
        torch.tensor(base, dtype=torch.int16, device=device),
        torch.tensor(spaced, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


# =====================================================================================================================
# shards
# =====================================================================================================================

SHARD_MAGIC = 20240520
HEADER_INTS = 256


def read_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header: {file}")
    n = int(header[2])
    offset = HEADER_INTS * np.dtype("<i4").itemsize
    if file.stat().st_size != offset + n * 2:
        raise ValueError(f"shard size mismatch: {file}")
    toks = np.fromfile(file, dtype="<u2", count=n, offset=offset)
    return torch.from_numpy(toks.astype(np.uint16, copy=False))


def load_val_stream(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no validation shards: {pattern}")
    return torch.cat([read_shard(f) for f in files]).contiguous()


class ShardStream:
    """Takes runs of tokens from the shards of a pattern, in order, round and round."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no files: {pattern}")
        self.at = 0
        self.tokens = read_shard(self.files[0])
        self.pos = 0

    def _advance(self) -> None:
        self.at = (self.at + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.at])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        left = n
        while left > 0:
            room = self.tokens.numel() - self.pos
            if room <= 0:
                self._advance()
                continue
            k = min(left, room)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            left -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Each rank's own contiguous part of each global batch."""

    def __init__(self, pattern: str, ranks: Ranks):
        self.ranks = ranks
        self.stream = ShardStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.ranks.world * accum)
        span = local + 1
        block = self.stream.take(span * self.ranks.world)
        lo = self.ranks.rank * span
        mine = block[lo : lo + span].to(dtype=torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        return x.to(self.ranks.device, non_blocking=True), y.to(self.ranks.device, non_blocking=True)


# =====================================================================================================================
# Muon
# =====================================================================================================================


def newton_schulz(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X /= X.norm() + eps
    flip = G.size(0) > G.size(1)
    if flip:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if flip else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )

    @torch.no_grad()
    def step(self, closure=None):
        many = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if many else 1
        rank = dist.get_rank() if many else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            total = sum(int(p.numel()) for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cur = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(g)
                    buf = state["buf"]
                    buf.mul_(momentum).add_(g)
                    g = newton_schulz(g.add(buf, alpha=momentum), steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[cur : cur + p.numel()] = g.reshape(-1)
                cur += p.numel()
            if many:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            cur = 0
            for p in params:
                g = flat[cur : cur + p.numel()].view_as(p).to(p.dtype)
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                cur += p.numel()


# =====================================================================================================================
# model
# =====================================================================================================================


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float):
        super().__init__()
        self.dims, self.base = dims, base

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(seq_len, device=device, dtype=torch.float32)
        inv = self.base ** (-torch.arange(0, self.dims, 2, device=device, dtype=torch.float32) / self.dims)
        freqs = torch.outer(t, inv)
        return freqs.cos()[None, :, None, :].to(dtype), freqs.sin()[None, :, None, :].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    head, tail = x[..., :dims], x[..., dims:]
    half = dims // 2
    x1, x2 = head[..., :half], head[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, tail), dim=-1)


class Attention(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        dim = args.model_dim
        self.heads = args.num_heads
        self.kv_heads = args.num_kv_heads
        self.head_dim = dim // args.num_heads
        self.rope_dims = args.rope_dims
        kv_dim = self.kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.heads,), args.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(args.rope_dims, args.rope_base)
        self.xsa = layer >= args.num_layers - args.xsa_last_n

    def remove_self(self, y: Tensor, v: Tensor) -> Tensor:
        B, T, H, D = y.shape
        grouped = y.reshape(B, T, v.size(2), H // v.size(2), D)
        unit = F.normalize(v, dim=-1).unsqueeze(3)
        return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).reshape(B, T, H, D)

    def forward(self, x: Tensor, ve: Tensor | None, adapter: "LayerAdapter | None") -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if adapter is not None:
            q = q + adapter.q(x)
            v = v + adapter.v(x)
        if ve is not None:
            v = v + ve
        q = q.view(B, T, self.heads, self.head_dim)
        k = k.view(B, T, self.kv_heads, self.head_dim)
        v = v.view(B, T, self.kv_heads, self.head_dim)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(T, x.device, q.dtype)
        q = rotate(q, cos, sin, self.rope_dims) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = rotate(k, cos, sin, self.rope_dims)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.xsa:
            y = self.remove_self(y, v)
        return self.proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        hidden = int(args.mlp_mult * args.model_dim)
        self.slope = args.leaky_slope
        self.fc = CastedLinear(args.model_dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, args.model_dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=self.slope).square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        dim = args.model_dim
        self.norm1 = RMSNorm()
        self.norm2 = RMSNorm()
        self.attn = Attention(args, layer)
        self.mlp = MLP(args)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, adapter: "LayerAdapter | None") -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        a = self.attn(self.norm1(x) * self.depth_scale, ve, adapter)
        x = x + self.attn_scale.to(x.dtype) * a
        m = self.mlp(self.norm2(x) * self.depth_scale)
        return x + self.mlp_scale.to(x.dtype) * m


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.softcap = args.logit_softcap
        self.embed_std = args.tied_embed_init_std
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.n_enc = args.num_layers // 2
        self.n_dec = args.num_layers - self.n_enc
        n_skip = min(self.n_enc, self.n_dec)
        self.skip_weights = nn.Parameter(torch.ones(n_skip, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.ve_layers = [int(s) for s in args.ve_layers.split(",") if s.strip()]
        kv_dim = args.num_kv_heads * (args.model_dim // args.num_heads)
        self.ve_emb = nn.Embedding(args.vocab_size, args.ve_dim)
        self.ve_proj = CastedLinear(args.ve_dim, kv_dim, bias=False)
        self.ve_scales = nn.Parameter(torch.full((len(self.ve_layers),), 0.1, dtype=torch.float32))
        self.final_norm = RMSNorm()
        self.reset_weights()

    @torch.no_grad()
    def reset_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.embed_std)
        nn.init.normal_(self.ve_emb.weight, mean=0.0, std=0.01)
        deep = 1.0 / math.sqrt(2 * len(self.blocks))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                if getattr(m, "_zero_init", False):
                    nn.init.zeros_(m.weight)
                else:
                    nn.init.orthogonal_(m.weight, gain=1.0)
                    if m.weight.shape[0] == m.weight.shape[1]:
                        m.weight.mul_(1.0 - 0.1 * deep)

    def hidden(self, ids: Tensor, lora: "DocAdapter | None" = None) -> Tensor:
        x = self.tok_emb(ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        ve_all = self.ve_proj(self.ve_emb(ids).to(x.dtype))
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.n_enc and skips:
                w = self.skip_weights[i - self.n_enc].to(x.dtype)
                x = x + w * skips.pop()
            ve = None
            if i in self.ve_layers:
                ve = ve_all * self.ve_scales[self.ve_layers.index(i)].to(x.dtype)
            x = block(x, x0, ve, None if lora is None else lora.layers[i])
            if i < self.n_enc:
                skips.append(x)
        return self.final_norm(x)

    def head(self, h: Tensor, lora: "DocAdapter | None" = None) -> Tensor:
        z = F.linear(h, self.tok_emb.weight.to(h.dtype))
        if lora is not None:
            z = z + lora.out(h)
        return self.softcap * torch.tanh(z.float() / self.softcap)

    def logits(self, ids: Tensor, lora: "DocAdapter | None" = None) -> Tensor:
        return self.head(self.hidden(ids, lora), lora)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        z = self.logits(ids)
        return F.cross_entropy(z.reshape(-1, z.size(-1)), targets.reshape(-1), reduction="mean")


# =====================================================================================================================
# adapters: one low-rank correction for each document of a batch
# =====================================================================================================================


class BatchLoRA(nn.Module):
    def __init__(self, docs: int, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.empty(docs, rank, d_in))
        self.B = nn.Parameter(torch.zeros(docs, d_out, rank))
        self.bound = 1.0 / math.sqrt(d_in)
        self.fresh()

    @torch.no_grad()
    def fresh(self) -> None:
        self.A.uniform_(-self.bound, self.bound)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        down = torch.bmm(x, self.A.to(x.dtype).transpose(1, 2))
        return torch.bmm(down, self.B.to(x.dtype).transpose(1, 2))


class LayerAdapter(nn.Module):
    def __init__(self, docs: int, dim: int, kv_dim: int, rank: int):
        super().__init__()
        self.q = BatchLoRA(docs, dim, dim, rank)
        self.v = BatchLoRA(docs, dim, kv_dim, rank)


class DocAdapter(nn.Module):
    def __init__(self, docs: int, model: GPT, rank: int):
        super().__init__()
        dim = model.tok_emb.embedding_dim
        kv_dim = model.ve_proj.out_features
        self.layers = nn.ModuleList([LayerAdapter(docs, dim, kv_dim, rank) for _ in model.blocks])
        self.out = BatchLoRA(docs, dim, model.tok_emb.num_embeddings, rank)

    def fresh(self) -> None:
        for m in self.modules():
            if isinstance(m, BatchLoRA):
                m.fresh()


def adapter_optimizer(args: Hyperparameters, lora: DocAdapter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        lora.parameters(), lr=args.ttt_lora_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=args.ttt_lora_wd
    )


# =====================================================================================================================
# int6 GPTQ
# =====================================================================================================================


def quantized_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, CastedLinear) and m.weight.numel() > 65_536]


def collect_hessians(
    model: GPT, loader: TrainLoader, args: Hyperparameters, ranks: Ranks, accum: int
) -> dict[str, Tensor]:
    """Sums of x^T x at the input of each quantised matrix, over training batches, averaged over ranks."""
    hess: dict[str, Tensor] = {}
    hooks = []
    wanted = set(quantized_names(model))
    for name, module in model.named_modules():
        if name not in wanted:
            continue
        hess[name] = torch.zeros(module.in_features, module.in_features, device=ranks.device, dtype=torch.float32)

        def hook(mod, inputs, out, key=name):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            hess[key].addmm_(x.T, x)

        hooks.append(module.register_forward_hook(hook))
    model.eval()
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(args.gptq_batches // max(1, ranks.world // 2)):
            x, _y = loader.next_batch(args.train_batch_tokens // 4, args.train_seq_len, accum)
            model.hidden(x)
    for h in hooks:
        h.remove()
    for key in sorted(hess):
        ranks.sum_(hess[key])
        hess[key] /= ranks.world
    model.train()
    return hess


def gptq_matrix(W: Tensor, H: Tensor, bits: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """Rounds W (out, in) to signed integers of `bits` with one scale per row; the error of each column goes into the next."""
    W = W.float().clone()
    rows, cols = W.shape
    top = 2 ** (bits - 1) - 1
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    order = torch.argsort(torch.diag(H), descending=True)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(damp * torch.diag(H).mean())
    inv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inv, upper=True)
    best_err = torch.full((rows,), float("inf"), device=W.device)
    scale = torch.ones(rows, device=W.device)
    for q in (0.9990, 0.9995, 0.9999, 1.0):
        s = (torch.quantile(W.abs(), q, dim=1) / top).clamp_min(1e-8)
        e = (W - (W / s[:, None]).round().clamp(-top, top) * s[:, None]).square().sum(1)
        better = e < best_err
        scale = torch.where(better, s, scale)
        best_err = torch.where(better, e, best_err)
    scale = scale.half().float()
    Q = torch.zeros_like(W)
    for lo in range(0, cols, block):
        hi = min(lo + block, cols)
        err = torch.zeros(rows, hi - lo, device=W.device)
        for j in range(lo, hi):
            w = W[:, j]
            q = (w / scale).round().clamp(-top, top)
            Q[:, j] = q
            e = (w - q * scale) / U[j, j]
            W[:, j:hi] -= e[:, None] * U[j, j:hi][None, :]
            err[:, j - lo] = e
        if hi < cols:
            W[:, hi:] -= err @ U[lo:hi, hi:]
    back = torch.argsort(order)
    return Q[:, back].to(torch.int8), scale.half()


def round_rows(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    scale = (W.float().abs().amax(dim=1) / top).clamp_min(1e-8).half()
    q = (W.float() / scale.float()[:, None]).round().clamp(-top, top)
    return q.to(torch.int8), scale


def quantize_state(model: GPT, hess: dict[str, Tensor], args: Hyperparameters) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name, t in model.state_dict().items():
        key = name.removesuffix(".weight")
        if key in hess:
            q, s = gptq_matrix(t, hess[key], args.matrix_bits, args.gptq_block, args.gptq_damp)
            packed[name + ".q"], packed[name + ".s"] = q.cpu(), s.cpu()
        elif t.ndim == 2 and t.numel() > 65_536:
            q, s = round_rows(t, args.embed_bits)
            packed[name + ".q"], packed[name + ".s"] = q.cpu(), s.cpu()
        else:
            packed[name] = t.half().cpu() if t.ndim == 2 else t.float().cpu()
    return packed


def dequantize_state(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, t in packed.items():
        if name.endswith(".q"):
            stem = name[:-2]
            state[stem] = t.float() * packed[stem + ".s"].float()[:, None]
        elif not name.endswith(".s"):
            state[name] = t.float()
    return state


def pack_artifact(packed: dict[str, Tensor]) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    return lzma.compress(buf.getvalue(), format=lzma.FORMAT_XZ, filters=filters)


def unpack_artifact(blob: bytes) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)


# =====================================================================================================================
# evaluation: what is counted
# =====================================================================================================================


@dataclass
class Tally:
    """Sums of the loss, the bytes and the tokens; each rank its own part until `reduced`."""

    sums: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> "Tally":
        return cls(torch.zeros(3, dtype=torch.float64, device=device))

    def add(self, nll: Tensor, n_bytes: Tensor) -> None:
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += n_bytes.sum()
        self.sums[2] += float(nll.numel())

    def reduced(self, ranks: Ranks) -> "Tally":
        return Tally(ranks.sum_(self.sums.clone()))

    @property
    def tokens(self) -> int:
        return int(self.sums[2].item())

    @property
    def loss(self) -> float:
        return (self.sums[0] / self.sums[2]).item()

    @property
    def bpb(self) -> float:
        return (self.sums[0] / math.log(2.0) / self.sums[1]).item()


def eval_val(args: Hyperparameters, model: nn.Module, ranks: Ranks, stream: Tensor, table: ByteTable) -> Tally:
    """Plain windows side by side: for the curve of the training and for the round trip."""
    seq = args.train_seq_len
    per = max(1, args.val_batch_size // (ranks.world * seq))
    n_seqs = (stream.numel() - 1) // seq
    lo, hi = n_seqs * ranks.rank // ranks.world, n_seqs * (ranks.rank + 1) // ranks.world
    tally = Tally.empty(ranks.device)
    model.eval()
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        for at in range(lo, hi, per):
            end = min(at + per, hi)
            block = stream[at * seq : end * seq + 1].to(ranks.device, dtype=torch.int64)
            x, y = block[:-1].view(-1, seq), block[1:].view(-1, seq)
            z = model.logits(x)
            nll = F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1), reduction="none")
            tally.add(nll, table.count(x.reshape(-1), y.reshape(-1)))
    model.train()
    return tally.reduced(ranks)


def sliding_windows(total: int, seq: int, stride: int) -> list[tuple[int, int, int]]:
    """(first input, end, first scored): each target belongs to exactly one window."""
    windows = [(0, min(seq, total), 0)]
    at = min(seq, total)
    while at < total:
        end = min(at + stride, total)
        windows.append((end - seq, end, at))
        at = end
    return windows


@torch.no_grad()
def eval_sliding(
    args: Hyperparameters, model: GPT, ranks: Ranks, stream: Tensor, table: ByteTable, batch: int = 32
) -> Tally:
    windows = sliding_windows(stream.numel() - 1, args.eval_seq_len, args.eval_stride)
    mine = windows[len(windows) * ranks.rank // ranks.world : len(windows) * (ranks.rank + 1) // ranks.world]
    tally = Tally.empty(ranks.device)
    model.eval()
    for at in range(0, len(mine), batch):
        part = mine[at : at + batch]
        width = max(end - lo for lo, end, _ in part)
        x = torch.zeros(len(part), width, dtype=torch.int64, device=ranks.device)
        y = torch.zeros_like(x)
        for r, (lo, end, _) in enumerate(part):
            run = stream[lo : end + 1].to(ranks.device, dtype=torch.int64)
            x[r, : end - lo], y[r, : end - lo] = run[:-1], run[1:]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            h = model.hidden(x)
            z = model.head(h)
        nll = F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1), reduction="none").view_as(y)
        for r, (lo, end, first) in enumerate(part):
            cut = slice(first - lo, end - lo)
            tally.add(nll[r, cut], table.count(x[r, cut], y[r, cut]))
    return tally.reduced(ranks)


# =====================================================================================================================
# evaluation: documents in phases
# =====================================================================================================================


@dataclass(frozen=True)
class Doc:
    start: int  # where its first token stands in the stream
    n: int  # its targets: the tokens start + 1 .. start + n


def split_documents(stream: Tensor, bos_id: int) -> list[Doc]:
    """Cuts the stream before each BOS. A document's last target is the next one's BOS, so that no token is left out."""
    flat = stream.numpy()
    starts = np.flatnonzero(flat == bos_id).tolist()
    if not starts or starts[0] != 0:
        starts = [0] + starts
    docs: list[Doc] = []
    for lo, hi in zip(starts, starts[1:] + [len(flat)]):
        n = min(hi, len(flat) - 1) - lo
        if n > 0:
            docs.append(Doc(lo, n))
    return docs


def plan_phases(docs: list[Doc], n_phases: int) -> list[list[Doc]]:
    """By length, longest first, dealt out in turn: every phase holds documents of all lengths."""
    ordered = sorted(docs, key=lambda d: (-d.n, d.start))
    return [ordered[p::n_phases] for p in range(n_phases)]


def cut_batches(phase: list[Doc], size: int) -> list[list[Doc]]:
    return [phase[lo : lo + size] for lo in range(0, len(phase), size)]


class BatchQueue:
    """Hands out the batches of a phase to whichever rank is free: a counter in a locked file."""

    def __init__(self, ranks: Ranks, run_id: str):
        self.ranks = ranks
        self.path = f"/tmp/ttt_queue_{run_id}"

    def restart(self) -> None:
        self.ranks.barrier()
        if self.ranks.master:
            with open(self.path, "w") as f:
                f.write("0")
        self.ranks.barrier()

    def claim(self) -> int:
        with open(self.path, "r+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            k = int(f.read().strip() or "0")
            f.seek(0)
            f.truncate()
            f.write(str(k + 1))
            f.flush()
            fcntl.flock(f, fcntl.LOCK_UN)
        return k


def chunk_rows(
    stream: Tensor, batch: list[Doc], c: int, args: Hyperparameters, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the mask of the targets of chunk c, one row for each document, with what stands before it."""
    end = (c + 1) * args.ttt_chunk
    lo = max(0, end - args.ttt_window)
    width = end - lo
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    targets = torch.zeros_like(ids)
    mask = torch.zeros(len(batch), width, dtype=torch.bool)
    for r, doc in enumerate(batch):
        have = min(end, doc.n) - lo
        if have <= 0:
            continue
        run = stream[doc.start + lo : doc.start + lo + have + 1].to(torch.int64)
        ids[r, :have], targets[r, :have] = run[:-1], run[1:]
        mask[r, max(0, c * args.ttt_chunk - lo) : have] = True
    return ids.to(device), targets.to(device), mask.to(device)


def token_losses(model: GPT, lora: DocAdapter | None, ids: Tensor, targets: Tensor) -> Tensor:
    z = model.logits(ids, lora)
    return F.cross_entropy(z.reshape(-1, z.size(-1)), targets.reshape(-1), reduction="none").view_as(targets)


class PhasedEvaluator:
    """Scores every document once, chunk by chunk; between two phases the base learns from what has been scored."""

    def __init__(
        self, args: Hyperparameters, model: GPT, ranks: Ranks, stream: Tensor, table: ByteTable, began: float
    ):
        self.args, self.model, self.ranks = args, model, ranks
        self.stream, self.table, self.began = stream, table, began
        self.queue = BatchQueue(ranks, args.run_id)
        self.tally = Tally.empty(ranks.device)
        self.losses = torch.compile(token_losses, dynamic=True)
        self.base_params = [p for p in model.parameters()]

    def late(self) -> bool:
        return time.perf_counter() - self.began > self.args.ttt_budget_seconds

    def score_chunk(self, lora: DocAdapter, ids: Tensor, targets: Tensor, mask: Tensor) -> None:
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            nll = self.losses(self.model, lora, ids, targets)
        self.tally.add(nll[mask], self.table.count(ids[mask], targets[mask]))

    def train_adapter(
        self, lora: DocAdapter, opt: torch.optim.Optimizer, ids: Tensor, targets: Tensor, mask: Tensor
    ) -> None:
        weight = mask.float()
        for _ in range(self.args.ttt_lora_steps):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                nll = self.losses(self.model, lora, ids, targets)
            per_doc = (nll * weight).sum(1) / weight.sum(1).clamp_min(1.0)
            opt.zero_grad(set_to_none=True)
            per_doc.sum().backward()
            opt.step()

    def run_batch(self, batch: list[Doc]) -> None:
        args = self.args
        torch.manual_seed(args.seed + batch[0].start)
        lora = DocAdapter(len(batch), self.model, args.ttt_lora_rank).to(self.ranks.device)
        opt = adapter_optimizer(args, lora)
        n_chunks = -(-max(doc.n for doc in batch) // args.ttt_chunk)
        for c in range(n_chunks):
            ids, targets, mask = chunk_rows(self.stream, batch, c, args, self.ranks.device)
            self.score_chunk(lora, ids, targets, mask)
            if c + 1 < n_chunks and not self.late():
                self.train_adapter(lora, opt, ids, targets, mask)

    def score_phase(self, phase: list[Doc]) -> None:
        batches = cut_batches(phase, self.args.ttt_batch_docs)
        for p in self.base_params:
            p.requires_grad_(False)
        self.queue.restart()
        while (k := self.queue.claim()) < len(batches):
            self.run_batch(batches[k])
        self.ranks.barrier()

    def adapt_base(self, scored: list[Doc]) -> int:
        """One pass of SGD over documents of the phase just scored, in the stream's order, shared by all ranks."""
        args, ranks = self.args, self.ranks
        every = max(1, len(scored) // args.ttt_base_docs)
        chosen = sorted(scored[::every], key=lambda d: d.start)
        text = torch.cat([self.stream[d.start : d.start + d.n].to(torch.int64) for d in chosen])
        seq = args.train_seq_len
        n_seqs = (text.numel() - 1) // seq
        per_step = args.ttt_base_seqs * ranks.world
        n_steps = -(-n_seqs // per_step)
        for p in self.base_params:
            p.requires_grad_(True)
        opt = torch.optim.SGD(self.base_params, lr=args.ttt_base_lr, momentum=args.ttt_base_momentum)
        done = 0
        for step in range(n_steps):
            if ranks.any(self.late()):
                break
            lo = min(n_seqs, step * per_step + ranks.rank * args.ttt_base_seqs)
            hi = min(n_seqs, lo + args.ttt_base_seqs)
            opt.zero_grad(set_to_none=False)
            total = torch.zeros((), device=ranks.device)
            if hi > lo:
                block = text[lo * seq : hi * seq + 1].to(ranks.device)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = self.losses(self.model, None, block[:-1].view(-1, seq), block[1:].view(-1, seq)).sum()
                loss.backward()
                total += float((hi - lo) * seq)
            ranks.sum_(total)
            for p in self.base_params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                ranks.sum_(p.grad)
                p.grad.div_(total.clamp_min(1.0))
            nn.utils.clip_grad_norm_(self.base_params, args.ttt_base_clip)
            for group in opt.param_groups:
                group["lr"] = args.ttt_base_lr * 0.5 * (1.0 + math.cos(math.pi * step / n_steps))
            opt.step()
            done += 1
        return done

    def run(self, docs: list[Doc]) -> Tally:
        phases = plan_phases(docs, self.args.ttt_phases)
        for number, phase in enumerate(phases):
            self.score_phase(phase)
            so_far = self.tally.reduced(self.ranks)
            log0(
                f"ttt_phase:{number + 1}/{len(phases)} docs:{len(phase)} tokens:{so_far.tokens} "
                f"val_bpb:{so_far.bpb:.6f} elapsed:{time.perf_counter() - self.began:.1f}s"
            )
            if number + 1 < len(phases):
                steps = self.adapt_base(phase)
                log0(f"ttt_base:phase {number + 1} sgd_steps:{steps}")
        return self.tally.reduced(self.ranks)


# =====================================================================================================================
# main
# =====================================================================================================================


def main() -> None:
    args = Hyperparameters()
    code = Path(__file__).read_text(encoding="utf-8")
    ranks = join_ranks()
    device = ranks.device
    if 8 % ranks.world != 0:
        raise ValueError(f"WORLD_SIZE={ranks.world} must divide 8")
    accum = 8 // ranks.world
    open_log(args, ranks.master)
    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(
        subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False).stdout,
        console=False,
    )

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    # ---- tokenizer and validation stream

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    bos_id = int(sp.bos_id())
    table = build_byte_table(sp, args.vocab_size, device)
    val_tokens = load_val_stream(args.val_files)
    log0(f"tokenizer:{args.tokenizer_path} val_pattern:{args.val_files} val_tokens:{val_tokens.numel() - 1}")
    log0(f"train_shards:{len(glob.glob(args.train_files))} pattern:{args.train_files}")

    # ---- model

    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, p in base_model.named_parameters():
        if p.ndim < 2 or any(c in name for c in CONTROL_NAMES):
            p.data = p.data.float()
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled, device_ids=[device.index], broadcast_buffers=False) if ranks.many else compiled

    embeds, matrices, scalars = [], [], []
    for name, p in base_model.named_parameters():
        if name in ("tok_emb.weight", "ve_emb.weight"):
            embeds.append(p)
        elif p.ndim == 2 and not any(c in name for c in CONTROL_NAMES):
            matrices.append(p)
        else:
            scalars.append(p)
    opt_embed = torch.optim.AdamW(
        [{"params": embeds, "lr": args.embed_lr, "base_lr": args.embed_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    opt_muon = Muon(
        matrices,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    for group in opt_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    opt_scalar = torch.optim.AdamW(
        [{"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [opt_embed, opt_muon, opt_scalar]
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{ranks.world} grad_accum_steps:{accum} seed:{args.seed}")
    log0(f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len}")

    # ---- schedule

    max_wallclock_ms = 1000.0 * (args.max_wallclock_seconds - args.gptq_reserve_seconds)

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        left_ms = max(max_wallclock_ms - elapsed_ms, 0.0)
        return left_ms / max(warmdown_ms, 1e-9) if left_ms <= warmdown_ms else 1.0

    loader = TrainLoader(args.train_files, ranks)

    def micro_steps(source: TrainLoader) -> Tensor:
        total = torch.zeros((), device=device)
        for micro in range(accum):
            if ranks.many:
                model.require_backward_grad_sync = micro == accum - 1
            x, y = source.next_batch(args.train_batch_tokens, args.train_seq_len, accum)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            total += loss.detach()
            (loss / accum).backward()
        return total / accum

    def zero_grads() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # ---- warm-up: compile, then put everything back

    if args.warmup_steps > 0:
        kept_model = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
        kept_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for w in range(args.warmup_steps):
            zero_grads()
            micro_steps(loader)
            for opt in optimizers:
                opt.step()
            zero_grads()
            if w + 1 == args.warmup_steps:
                log0(f"warmup_step:{w + 1}/{args.warmup_steps}")
        base_model.load_state_dict(kept_model, strict=True)
        for opt, kept in zip(optimizers, kept_opts, strict=True):
            opt.load_state_dict(kept)
        zero_grads()
        loader = TrainLoader(args.train_files, ranks)

    # ---- training

    ema = {n: t.detach().float().clone() for n, t in base_model.state_dict().items()}
    training_time_ms = 0.0
    stop_after: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last = step == args.iterations or (stop_after is not None and step >= stop_after)
        if last or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            curve = eval_val(args, base_model, ranks, val_tokens, table)
            log0(
                f"step:{step}/{args.iterations} val_loss:{curve.loss:.4f} val_bpb:{curve.bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last:
            if stop_after is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_mul(step, elapsed_ms)
        zero_grads()
        train_loss = micro_steps(loader)
        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        for group in opt_muon.param_groups:
            group["momentum"] = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        zero_grads()
        with torch.no_grad():
            for n, t in base_model.state_dict().items():
                ema[n].mul_(args.ema_decay).add_(t.detach().float(), alpha=1.0 - args.ema_decay)

        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )
        if stop_after is None and ranks.any(approx_ms >= max_wallclock_ms):
            stop_after = step
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- average, Hessians, int6: all within what GPTQ_RESERVE_SECONDS kept back

    torch.cuda.synchronize()
    t_quant = time.perf_counter()
    log0("ema:applying EMA weights")
    now = base_model.state_dict()
    base_model.load_state_dict({n: ema[n].to(now[n].dtype) for n in now}, strict=True)
    hessians = collect_hessians(base_model, loader, args, ranks, accum)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t_quant)
    log0(f"gptq:hessians of {len(hessians)} matrices from train shards in {calib_ms:.0f}ms")
    log0(f"gptq:train+calibration {training_time_ms + calib_ms:.0f}ms of {1000.0 * args.max_wallclock_seconds:.0f}ms")

    packed = quantize_state(base_model, hessians, args)
    blob = pack_artifact(packed)
    if ranks.master:
        with open(args.artifact_path, "wb") as f:
            f.write(blob)
        code_bytes = len(code.encode("utf-8"))
        artifact_bytes = os.path.getsize(args.artifact_path)
        log0(f"Serialized model int{args.matrix_bits}+lzma: {artifact_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {artifact_bytes + code_bytes} bytes (limit 16000000)")
    ranks.barrier()

    # ---- round trip

    del compiled, model, optimizers, opt_embed, opt_muon, opt_scalar, ema, hessians
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    with open(args.artifact_path, "rb") as f:
        stored = unpack_artifact(f.read())
    eval_model = GPT(args).to(device).float()
    eval_model.load_state_dict(dequantize_state(stored), strict=True)
    trip = eval_val(args, eval_model, ranks, val_tokens, table)
    log0(f"final_roundtrip val_loss:{trip.loss:.4f} val_bpb:{trip.bpb:.4f}")

    if args.sliding_enabled or not args.ttt_enabled:
        slid = eval_sliding(args, eval_model, ranks, val_tokens, table)
        log0(f"final_sliding_exact val_loss:{slid.loss:.8f} val_bpb:{slid.bpb:.8f} tokens:{slid.tokens}")

    # ---- phased test-time training: the reported score

    if args.ttt_enabled:
        documents = split_documents(val_tokens, bos_id)
        log0(f"ttt:documents:{len(documents)} phases:{args.ttt_phases} chunk:{args.ttt_chunk} rank:{args.ttt_lora_rank}")
        eval_model.eval()
        evaluator = PhasedEvaluator(args, eval_model, ranks, val_tokens, table, t_eval)
        final = evaluator.run(documents)
        torch.cuda.synchronize()
        eval_s = time.perf_counter() - t_eval
        log0(f"final_ttt_phased val_loss:{final.loss:.4f} val_bpb:{final.bpb:.4f} eval_time:{eval_s:.1f}s")
        log0(f"final_ttt_phased_exact val_loss:{final.loss:.8f} val_bpb:{final.bpb:.8f} tokens:{final.tokens}")
    if ranks.many:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
