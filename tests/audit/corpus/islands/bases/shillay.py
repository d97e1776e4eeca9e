"""
Shillay: a small transformer and three Dirichlet count models, combined as an online ensemble.

Estimation protocol (adaptive compressor, one left-to-right pass):
  1. the validation stream is cut into blocks of windows; each target belongs to exactly one window of one block;
  2. all experts give a distribution over the whole vocabulary from the past alone; they are mixed linearly;
  3. the block's losses are written to the ledger;
  4. only then: mixture weights (exponentiated gradient), output adapter (one Adam step an epoch), counts.
The score is total nats / ln 2 / total bytes of the text. A block bootstrap gives a confidence interval, which is logged only.

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import dataclasses
import glob
import json
import math
import os
import random
import struct
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

SIZE_LIMIT = 16_000_000  # bytes, decimal
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
BOS_ID = 1


def _s(name: str, default: str) -> str:
    return os.environ.get(name, default)


def _i(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _f(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


@dataclass(frozen=True)
class Config:
    # files
    run_id: str = _s("RUN_ID", str(uuid.uuid4())[:8])
    data_dir: str = _s("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_glob: str = _s("TRAIN_GLOB", "fineweb_train_*.bin")
    val_glob: str = _s("VAL_GLOB", "fineweb_val_*.bin")
    tokenizer: str = _s("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    artifact: str = _s("ARTIFACT", "final_model.shl.z")
    seed: int = _i("SEED", 1337)
    # clocks
    train_cap_s: float = _f("TRAIN_CAP_S", 600.0)
    reserve_s: float = _f("RESERVE_S", 22.0)  # averaging, calibration, quantisation, packing
    eval_cap_s: float = _f("EVAL_CAP_S", 600.0)
    # training
    iterations: int = _i("ITERATIONS", 20_000)
    batch_tokens: int = _i("TRAIN_BATCH_TOKENS", 524_288)
    seq_len: int = _i("TRAIN_SEQ_LEN", 1024)
    warmup_steps: int = _i("WARMUP_STEPS", 20)
    warmdown_steps: int = _i("WARMDOWN_STEPS", 2800)
    log_every: int = _i("TRAIN_LOG_EVERY", 200)
    val_every: int = _i("VAL_LOSS_EVERY", 4000)
    # model
    vocab: int = _i("VOCAB_SIZE", 1024)
    dim: int = _i("MODEL_DIM", 512)
    layers: int = _i("NUM_LAYERS", 10)
    heads: int = _i("NUM_HEADS", 8)
    kv_heads: int = _i("NUM_KV_HEADS", 4)
    mlp_mult: int = _i("MLP_MULT", 3)
    rope_base: float = _f("ROPE_BASE", 10_000.0)
    softcap: float = _f("LOGIT_SOFTCAP", 30.0)
    qk_gain: float = _f("QK_GAIN_INIT", 1.5)
    embed_std: float = _f("TIED_EMBED_INIT_STD", 0.005)
    # optimiser
    embed_lr: float = _f("TIED_EMBED_LR", 0.035)
    matrix_lr: float = _f("MATRIX_LR", 0.025)
    scalar_lr: float = _f("SCALAR_LR", 0.025)
    muon_momentum: float = _f("MUON_MOMENTUM", 0.97)
    muon_momentum_start: float = _f("MUON_MOMENTUM_START", 0.90)
    muon_momentum_steps: int = _i("MUON_MOMENTUM_STEPS", 1200)
    muon_ns_steps: int = _i("MUON_NS_STEPS", 5)
    muon_wd: float = _f("MUON_WD", 0.03)
    adam_b1: float = _f("ADAM_BETA1", 0.9)
    adam_b2: float = _f("ADAM_BETA2", 0.95)
    clip: float = _f("GRAD_CLIP", 0.3)
    ema_decay: float = _f("EMA_DECAY", 0.997)
    # quantisation
    group: int = _i("QUANT_GROUP", 128)
    calib_batches: int = _i("CALIB_BATCHES", 12)
    scale_grid: int = _i("SCALE_GRID", 24)
    scale_lo: float = _f("SCALE_LO", 0.60)
    # evaluation
    eval_seq: int = _i("EVAL_SEQ_LEN", 1024)
    stride: int = _i("EVAL_STRIDE", 64)
    eval_batch: int = _i("EVAL_BATCH", 32)
    block_tokens: int = _i("BLOCK_TOKENS", 131_072)
    alpha1: float = _f("ALPHA_UNIGRAM", 1024.0)
    alpha2: float = _f("ALPHA_BIGRAM", 64.0)
    alpha3: float = _f("ALPHA_TRIGRAM", 6.0)
    eg_rate: float = _f("EG_RATE", 0.35)
    eg_floor: float = _f("EG_FLOOR", 1e-4)
    w_neural: float = _f("W_NEURAL", 0.97)
    adapt_lr: float = _f("ADAPT_LR", 5e-4)
    adapt_epochs: int = _i("ADAPT_EPOCHS", 2)
    audit_every: int = _i("AUDIT_EVERY", 32)
    bootstrap: int = _i("BOOTSTRAP", 2000)

    def check(self) -> None:
        assert self.dim % self.heads == 0 and self.heads % self.kv_heads == 0
        assert self.block_tokens % self.stride == 0 and self.eval_seq >= self.stride
        assert 0.0 < self.w_neural < 1.0 and self.eg_rate > 0 and 0 <= self.eg_floor < 0.01
        assert 0.0 < self.ema_decay < 1.0 and self.dim % self.group == 0
        assert self.vocab <= 1024, "the trigram table is dense: vocab ** 3 int32 cells"


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @staticmethod
    def start() -> Ranks:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        assert torch.cuda.is_available(), "CUDA is required"
        assert 8 % world == 0, f"world size {world} must divide 8"
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group(backend="nccl", device_id=device)
            dist.barrier()
        return Ranks(rank, world, device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x, op=dist.ReduceOp.SUM)
        return x

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def agree(self, flag: bool) -> bool:
        """True on all ranks as soon as it is on one."""
        t = torch.tensor(int(flag), device=self.device)
        if self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def stop(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


class Log:
    def __init__(self, cfg: Config, ranks: Ranks) -> None:
        self.on = ranks.first
        self.path = Path("logs") / f"{cfg.run_id}.txt"
        if self.on:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, text: str) -> None:
        if not self.on:
            return
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(text + "\n")


class Clock:
    """Wall clock of one phase; never paused."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.t0


# ---------------------------------------------------------------------------------------------------------------------
# Bytes of the text
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes of a token; a leading space counts unless the token before it ends no text (control, unknown)."""

    own: Tensor  # int16 [V]
    space: Tensor  # bool [V], the piece begins with the mark
    silent: Tensor  # bool [V], control and unknown pieces: no bytes

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.own[target].to(torch.int64)
        return n + (self.space[target] & ~self.silent[prev]).to(torch.int64)


def byte_table(sp: spm.SentencePieceProcessor, vocab: int, device: torch.device) -> ByteTable:
    size = max(int(sp.vocab_size()), vocab)
    own = np.zeros(size, dtype=np.int16)
    space = np.zeros(size, dtype=np.bool_)
    silent = np.ones(size, dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        silent[i] = False
        if sp.is_byte(i):
            own[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("▁"):
            space[i] = True
            piece = piece[1:]
        own[i] = len(piece.encode("utf-8"))
    put = lambda a: torch.from_numpy(a).to(device)  # noqa: E731
    return ByteTable(put(own), put(space), put(silent))


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def read_shard(path: Path) -> Tensor:
    head_bytes = SHARD_HEADER_INTS * 4
    head = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if head.size != SHARD_HEADER_INTS or int(head[0]) != SHARD_MAGIC or int(head[1]) != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    n = int(head[2])
    if path.stat().st_size != head_bytes + 2 * n:
        raise ValueError(f"{path}: {n} tokens announced, the size says otherwise")
    ids = np.fromfile(path, dtype="<u2", count=n, offset=head_bytes)
    assert ids.size == n
    return torch.from_numpy(ids.astype(np.uint16, copy=False))


def shard_paths(folder: str, pattern: str) -> list[Path]:
    found = sorted(Path(p) for p in glob.glob(os.path.join(folder, pattern)))
    if not found:
        raise FileNotFoundError(f"no shard matches {folder}/{pattern}")
    return found


def validation_stream(cfg: Config) -> Tensor:
    """All validation tokens, in order."""
    return torch.cat([read_shard(p) for p in shard_paths(cfg.data_dir, cfg.val_glob)]).contiguous()


class TokenStream:
    """Endless training tokens, shard after shard."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.at, self.pos = 0, 0
        self.tokens = read_shard(paths[0])

    def _next(self) -> None:
        self.at = (self.at + 1) % len(self.paths)
        self.tokens, self.pos = read_shard(self.paths[self.at]), 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self._next()
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Every rank reads the same stream and keeps its own disjoint span of it."""

    def __init__(self, cfg: Config, ranks: Ranks) -> None:
        self.ranks = ranks
        self.stream = TokenStream(shard_paths(cfg.data_dir, cfg.train_glob))

    def batch(self, tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """tokens: of one micro-batch over all ranks."""
        span = tokens // self.ranks.world + 1
        all_ranks = self.stream.take(span * self.ranks.world)
        mine = all_ranks[self.ranks.rank * span : (self.ranks.rank + 1) * span].to(torch.int64)
        mine = mine.pin_memory().to(self.ranks.device, non_blocking=True)
        return mine[:-1].view(-1, seq_len), mine[1:].view(-1, seq_len)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

SCALAR_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "smear")


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """fp32 master weights, computed in the type of the activations."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.zero = zero

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        self.register_buffer("inv", inv, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, H, D]
        t = torch.arange(x.size(1), device=x.device, dtype=torch.float32)
        angle = torch.outer(t, self.inv.float())[None, :, None, :]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.h, self.kv, self.d = cfg.heads, cfg.kv_heads, cfg.dim // cfg.heads
        self.c_q = Linear(cfg.dim, cfg.dim)
        self.c_k = Linear(cfg.dim, self.kv * self.d)
        self.c_v = Linear(cfg.dim, self.kv * self.d)
        self.proj = Linear(cfg.dim, cfg.dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((self.h,), cfg.qk_gain))
        self.rotary = Rotary(self.d, cfg.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q = self.rotary(rms(self.c_q(x).view(b, t, self.h, self.d)))
        k = self.rotary(rms(self.c_k(x).view(b, t, self.kv, self.d)))
        v = self.c_v(x).view(b, t, self.kv, self.d)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.kv != self.h
        )
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.fc = Linear(cfg.dim, cfg.mlp_mult * cfg.dim)
        self.proj = Linear(cfg.mlp_mult * cfg.dim, cfg.dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: Config, depth: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(cfg), MLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim))))
        self.damp = 1.0 / math.sqrt(depth + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        m = self.resid_mix.to(x.dtype)
        x = m[0] * x + m[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.damp)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.damp)


class Smear(nn.Module):
    """A little of the previous token's embedding; nothing is carried into a document's first token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.smear = nn.Parameter(torch.full((dim,), -2.0))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.smear).to(x.dtype)
        before = F.pad(x, (0, 0, 1, -1))
        keep = (ids != BOS_ID).to(x.dtype).unsqueeze(-1)
        return x + g * keep * before


class GPT(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.softcap = cfg.softcap
        self.embed = nn.Embedding(cfg.vocab, cfg.dim)
        self.smear = Smear(cfg.dim)
        self.n_enc = cfg.layers // 2
        self.n_dec = cfg.layers - self.n_enc
        self.skip_weight = nn.Parameter(torch.ones(min(self.n_enc, self.n_dec), cfg.dim))
        self.blocks = nn.ModuleList([Block(cfg, i) for i in range(cfg.layers)])
        self._init(cfg)

    @torch.no_grad()
    def _init(self, cfg: Config) -> None:
        nn.init.normal_(self.embed.weight, std=cfg.embed_std)
        for m in self.modules():
            if isinstance(m, Linear):
                if m.zero:
                    nn.init.zeros_(m.weight)
                else:
                    nn.init.orthogonal_(m.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = rms(self.smear(self.embed(ids), ids))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.n_enc):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.n_dec):
            if skips:
                x = x + self.skip_weight[i].to(x.dtype) * skips.pop()
            x = self.blocks[self.n_enc + i](x, x0)
        return rms(x)

    def head(self, h: Tensor) -> Tensor:
        raw = F.linear(h, self.embed.weight.to(h.dtype)).float()
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers
# ---------------------------------------------------------------------------------------------------------------------


@torch.compile
def orthogonalise(g: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration (quintic) towards the nearest semi-orthogonal matrix."""
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
    """Momentum, orthogonalised; the matrices are dealt out over the ranks and the updates summed."""

    def __init__(self, params: list[nn.Parameter], ranks: Ranks, lr: float, momentum: float, ns: int, wd: float) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, ns=ns, wd=wd))
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            params: list[nn.Parameter] = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=self.ranks.device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.ranks.world == self.ranks.rank and p.grad is not None:
                    state = self.state[p]
                    if "m" not in state:
                        state["m"] = torch.zeros_like(p.grad)
                    m: Tensor = state["m"]
                    m.mul_(group["momentum"]).add_(p.grad)
                    u = orthogonalise(p.grad.add(m, alpha=group["momentum"]), group["ns"])
                    u = u * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = u.flatten()
                at += p.numel()
            self.ranks.total(flat)
            at = 0
            for p in params:
                u = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["wd"]).add_(u, alpha=-group["lr"])
                at += p.numel()


def build_optimisers(cfg: Config, ranks: Ranks, model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and n.startswith("blocks.") and not _scalar(n)]
    scalars = [p for n, p in named if _scalar(n)]
    assert len(matrices) + len(scalars) + 1 == len(named)
    muon = Muon(matrices, ranks, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_ns_steps, cfg.muon_wd)
    betas = (cfg.adam_b1, cfg.adam_b2)
    embed = torch.optim.Adam([model.embed.weight], lr=cfg.embed_lr, betas=betas, eps=1e-8, fused=True)
    scalar = torch.optim.Adam(scalars, lr=cfg.scalar_lr, betas=betas, eps=1e-8, fused=True)
    opts: list[torch.optim.Optimizer] = [embed, scalar, muon]
    for opt in opts:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return opts, muon


def _scalar(name: str) -> bool:
    return any(key in name for key in SCALAR_NAMES)


class Average:
    """Exponential moving average of the weights, fp32, kept on the device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.n = decay, 0
        self.mean = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        self.n += 1
        d = min(self.decay, self.n / (self.n + 10.0))
        for k, v in model.state_dict().items():
            self.mean[k].lerp_(v.detach().float(), 1.0 - d)

    def put(self, model: nn.Module) -> None:
        own = model.state_dict()
        model.load_state_dict({k: v.to(own[k].dtype) for k, v in self.mean.items()}, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def rate(cfg: Config, step: int, seconds: float, limit: float) -> float:
    """Constant, then linear to zero over the last `warmdown_steps` steps that still fit into the limit."""
    per_step = seconds / max(step, 1)
    left = min(cfg.iterations - step, (limit - seconds) / max(per_step, 1e-9))
    return 1.0 if left >= cfg.warmdown_steps else max(left, 0.0) / max(cfg.warmdown_steps, 1)


def micro_steps(ranks: Ranks) -> int:
    return 8 // ranks.world


def backward_all(cfg: Config, ranks: Ranks, net: nn.Module, model: GPT, loader: TrainLoader) -> Tensor:
    """Gradients of one batch in .grad, averaged over ranks; returns the mean loss of this rank."""
    n = micro_steps(ranks)
    mean = torch.zeros((), device=ranks.device)
    for _ in range(n):
        x, y = loader.batch(cfg.batch_tokens // n, cfg.seq_len)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = net(x, y)
        (loss / n).backward()
        mean += loss.detach() / n
    if ranks.world > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        at = 0
        for g in grads:
            g.copy_(flat[at : at + g.numel()].view_as(g))
            at += g.numel()
    return mean


def warm_up(cfg: Config, ranks: Ranks, net: nn.Module, model: GPT, opts: list[torch.optim.Optimizer]) -> None:
    """Compiles on training batches; weights and optimiser states are restored afterwards."""
    if cfg.warmup_steps <= 0:
        return
    kept = copy.deepcopy(model.state_dict())
    kept_opts = [copy.deepcopy(opt.state_dict()) for opt in opts]
    loader = TrainLoader(cfg, ranks)
    for _ in range(cfg.warmup_steps):
        backward_all(cfg, ranks, net, model, loader)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
    model.load_state_dict(kept, strict=True)
    for opt, state in zip(opts, kept_opts, strict=True):
        opt.load_state_dict(state)


@torch.no_grad()
def plain_loss(cfg: Config, ranks: Ranks, net: nn.Module, tokens: Tensor, table: ByteTable) -> tuple[float, float]:
    """Loss and bpb over adjoining sequences; a progress figure for the log, nothing depends on it."""
    n_seq = (tokens.numel() - 1) // cfg.eval_seq
    per = 64
    sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)
    net.eval()
    for lo in range(ranks.rank * per, n_seq, ranks.world * per):
        hi = min(lo + per, n_seq)
        span = tokens[lo * cfg.eval_seq : hi * cfg.eval_seq + 1].to(ranks.device, torch.int64)
        x, y = span[:-1].view(-1, cfg.eval_seq), span[1:].view(-1, cfg.eval_seq)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = net(x, y)
        sums[0] += loss.double() * y.numel()
        sums[1] += y.numel()
        sums[2] += table.count(x.flatten(), y.flatten()).sum()
    net.train()
    ranks.total(sums)
    nats, count, size = sums.tolist()
    return nats / count, nats / math.log(2) / size


def train(
    cfg: Config, ranks: Ranks, log: Log, model: GPT, net: nn.Module, clock: Clock, opts: list, muon: Muon, val, table
) -> Average:
    """Until the cap less the reserve. The clock also runs through the validation figures."""
    limit = cfg.train_cap_s - cfg.reserve_s
    loader = TrainLoader(cfg, ranks)
    average = Average(model, cfg.ema_decay)
    step, done = 0, False
    while not done:
        seconds = clock.seconds()
        done = step >= cfg.iterations or ranks.agree(seconds >= limit)
        if done or (cfg.val_every > 0 and step > 0 and step % cfg.val_every == 0):
            loss, bpb = plain_loss(cfg, ranks, net, val, table)
            log(f"step:{step}/{cfg.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1e3 * seconds:.0f}ms")
        if done:
            break
        scale = rate(cfg, step, seconds, limit)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        ramp = min(step / max(cfg.muon_momentum_steps, 1), 1.0)
        for group in muon.param_groups:
            group["momentum"] = (1 - ramp) * cfg.muon_momentum_start + ramp * cfg.muon_momentum
        loss = backward_all(cfg, ranks, net, model, loader)
        if cfg.clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        average.add(model)
        step += 1
        if step <= 5 or step % cfg.log_every == 0:
            now = clock.seconds()
            log(f"step:{step}/{cfg.iterations} train_loss:{loss.item():.4f} step_avg:{1e3 * now / step:.2f}ms")
    log(f"stopped: step:{step} train_time:{1e3 * clock.seconds():.0f}ms limit:{limit:.1f}s")
    return average


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation: per-group scales, each the minimiser of the weighted squared error over a grid
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def second_moments(cfg: Config, ranks: Ranks, model: GPT) -> dict[str, Tensor]:
    """E[x_j ** 2] of the inputs of every linear layer, over training batches."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []

    def watch(name: str):
        def hook(_m: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
            x = args[0].detach().float().flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + x.size(0)

        return hook

    for name, m in model.named_modules():
        if isinstance(m, Linear):
            hooks.append(m.register_forward_hook(watch(f"{name}.weight")))
    loader = TrainLoader(cfg, ranks)
    model.eval()
    for _ in range(cfg.calib_batches):
        x, y = loader.batch(64 * cfg.seq_len * ranks.world, cfg.seq_len)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(x, y)
    for h in hooks:
        h.remove()
    out: dict[str, Tensor] = {}
    for name, s in sums.items():
        both = torch.cat((s.double(), torch.tensor([counts[name]], device=s.device, dtype=torch.float64)))
        ranks.total(both)
        out[name] = (both[:-1] / both[-1]).float()
    return out


@torch.no_grad()
def quantise(w: Tensor, bits: int, group: int, weight: Tensor | None, cfg: Config) -> tuple[Tensor, Tensor]:
    """Symmetric integers and fp16 scales, one scale per row and group of columns.

    The scale minimises sum_j E[x_j^2] (w_j - s q_j)^2 over `scale_grid` fractions of the largest magnitude.
    """
    top = 2 ** (bits - 1) - 1
    rows, cols = w.shape
    assert cols % group == 0, (w.shape, group)
    g = w.float().view(rows, cols // group, group)
    h = torch.ones(cols, device=w.device) if weight is None else weight
    h = (h + 0.01 * h.mean() + 1e-12).view(1, cols // group, group)
    peak = g.abs().amax(-1, keepdim=True).clamp_min(1e-8)
    best = torch.full_like(peak, float("inf"))
    scale = peak / top
    for frac in torch.linspace(cfg.scale_lo, 1.0, cfg.scale_grid).tolist():
        s = (peak * frac / top).half().float().clamp_min(6e-8)
        q = (g / s).round().clamp(-top, top)
        err = (h * (g - s * q).square()).sum(-1, keepdim=True)
        better = err < best
        best = torch.where(better, err, best)
        scale = torch.where(better, s, scale)
    q = (g / scale).round().clamp(-top, top).to(torch.int8)
    return q.view(rows, cols), scale.squeeze(-1).half()


def restore(q: Tensor, scale: Tensor, group: int) -> Tensor:
    rows, cols = q.shape
    return (q.float().view(rows, cols // group, group) * scale.float().unsqueeze(-1)).view(rows, cols)


def bits_of(name: str) -> int:
    """int8 for the tied embedding, int6 for the matrices, 16 (fp16) for the rest."""
    if name == "embed.weight":
        return 8
    return 6 if name.startswith("blocks.") and not _scalar(name) else 16


# ---------------------------------------------------------------------------------------------------------------------
# Packing: one file = length of header, JSON header, zlib stream of the tensors
# ---------------------------------------------------------------------------------------------------------------------


def raw_bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().numpy().tobytes()


def pack(state: dict[str, Tensor], moments: dict[str, Tensor], cfg: Config) -> bytes:
    head: list[dict[str, object]] = []
    body: list[bytes] = []
    for name, t in sorted(state.items()):
        bits = bits_of(name)
        if bits == 16:
            head.append(dict(name=name, shape=list(t.shape), bits=16))
            body.append(raw_bytes(t.half()))
            continue
        q, s = quantise(t, bits, cfg.group, moments.get(name), cfg)
        head.append(dict(name=name, shape=list(t.shape), bits=bits, group=cfg.group))
        body += [raw_bytes(q), raw_bytes(s)]
    text = zlib.compress(json.dumps(head, separators=(",", ":")).encode(), 9)
    return struct.pack("<I", len(text)) + text + zlib.compress(b"".join(body), 9)


def unpack(blob: bytes) -> dict[str, Tensor]:
    (n,) = struct.unpack_from("<I", blob)
    head = json.loads(zlib.decompress(blob[4 : 4 + n]))
    body = zlib.decompress(blob[4 + n :])
    at = 0

    def take(kind: type, shape: list[int]) -> Tensor:
        nonlocal at
        count = math.prod(shape)
        a = np.frombuffer(body, dtype=kind, count=count, offset=at).reshape(shape)
        at += a.nbytes
        return torch.from_numpy(a.copy())

    out: dict[str, Tensor] = {}
    for e in head:
        if e["bits"] == 16:
            out[e["name"]] = take(np.float16, e["shape"]).float()
            continue
        rows, cols = e["shape"]
        q = take(np.int8, [rows, cols])
        s = take(np.float16, [rows, cols // e["group"]])
        out[e["name"]] = restore(q, s, e["group"])
    assert at == len(body), (at, len(body))
    return out


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def write_artifact(cfg: Config, log: Log, state: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    """Rank 0 only. Refuses to write more than the limit."""
    blob = pack(state, moments, cfg)
    code = code_bytes()
    total = code + len(blob)
    log(f"Serialized model int6+zlib: {len(blob)} bytes")
    log(f"Code size: {code} bytes")
    log(f"Total submission size: {total} bytes (limit {SIZE_LIMIT}, left {SIZE_LIMIT - total})")
    assert total <= SIZE_LIMIT, "the submission is too large"
    Path(cfg.artifact).write_bytes(blob)


def read_artifact(cfg: Config, device: torch.device) -> GPT:
    model = GPT(cfg).to(device).float()
    model.load_state_dict({k: v.to(device) for k, v in unpack(Path(cfg.artifact).read_bytes()).items()}, strict=True)
    model.eval().requires_grad_(False)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------------------------------

EXPERTS = ("neural", "unigram", "bigram", "trigram")
E = len(EXPERTS)


class DirichletCache:
    """Counts of scored tokens, as nested Dirichlet-multinomial predictives.

    p1(a)      = (n(a)     + alpha1 / V)     / (n      + alpha1)
    p2(a | v)  = (n(v,a)   + alpha2 p1(a))   / (n(v)   + alpha2)
    p3(a | uv) = (n(u,v,a) + alpha3 p2(a|v)) / (n(u,v) + alpha3)
    Tables are dense (no hashing), so each line sums to one over a.
    """

    def __init__(self, cfg: Config, device: torch.device) -> None:
        v = cfg.vocab
        self.v, self.device = v, device
        self.alpha = (cfg.alpha1, cfg.alpha2, cfg.alpha3)
        self.c1 = torch.zeros(v, device=device, dtype=torch.int32)
        self.c2 = torch.zeros(v, v, device=device, dtype=torch.int32)
        self.c3 = torch.zeros(v * v, v, device=device, dtype=torch.int32)
        self.n3 = torch.zeros(v * v, device=device, dtype=torch.int32)
        self.absorbed = 0

    def row(self, u: Tensor, v: Tensor) -> Tensor:
        return u * self.v + v

    def support(self, u: Tensor, v: Tensor) -> Tensor:
        """How often the context has been seen."""
        return self.n3[self.row(u, v)]

    def predict(self, u: Tensor, v: Tensor) -> Tensor:
        """[n, 3, V]: unigram, bigram and trigram predictives given the two tokens before."""
        a1, a2, a3 = self.alpha
        p1 = (self.c1.float() + a1 / self.v) / (float(self.c1.sum()) + a1)
        c2 = self.c2[v].float()
        p2 = (c2 + a2 * p1) / (c2.sum(-1, keepdim=True) + a2)
        c3 = self.c3[self.row(u, v)].float()
        p3 = (c3 + a3 * p2) / (c3.sum(-1, keepdim=True) + a3)
        return torch.stack((p1.expand_as(p2), p2, p3), dim=1)

    def absorb(self, u: Tensor, v: Tensor, x: Tensor) -> None:
        """Adds scored tokens x with their contexts."""
        one = torch.ones_like(x, dtype=torch.int32)
        self.c1.scatter_add_(0, x, one)
        self.c2.view(-1).scatter_add_(0, v * self.v + x, one)
        rows = self.row(u, v)
        self.c3.view(-1).scatter_add_(0, rows * self.v + x, one)
        self.n3.scatter_add_(0, rows, one)
        self.absorbed += x.numel()


class Adapter(nn.Module):
    """Output adapter of the neural expert: a gain on the last hidden state and a bias on the logits."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(cfg.dim, device=device))
        self.bias = nn.Parameter(torch.zeros(cfg.vocab, device=device))
        self.opt = torch.optim.Adam([self.gain, self.bias], lr=cfg.adapt_lr, betas=(0.9, 0.99))
        self.epochs = cfg.adapt_epochs

    def logits(self, model: GPT, h: Tensor) -> Tensor:
        return model.head(h * (1.0 + self.gain).to(h.dtype)) + self.bias

    def learn(self, model: GPT, ranks: Ranks, h: Tensor, x: Tensor, count: int) -> None:
        """Full-batch steps on a block that has been scored. count: tokens of the block over all ranks."""
        for _ in range(self.epochs):
            self.opt.zero_grad(set_to_none=False)
            for lo in range(0, x.numel(), 8192):
                with torch.enable_grad():
                    out = self.logits(model, h[lo : lo + 8192])
                    loss = F.cross_entropy(out, x[lo : lo + 8192], reduction="sum") / count
                loss.backward()
            for p in (self.gain, self.bias):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                ranks.total(p.grad)
            self.opt.step()


class Mixer:
    """Mixture weights by exponentiated gradient, one simplex per class of contexts.

    The class is the (log2) number of times that the trigram's context has been seen: known before the token.
    """

    CLASSES = 8

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.rate, self.floor = cfg.eg_rate, cfg.eg_floor
        start = torch.full((E,), (1.0 - cfg.w_neural) / (E - 1), device=device)
        start[0] = cfg.w_neural
        self.w = start.repeat(self.CLASSES, 1)
        self.reset()

    def reset(self) -> None:
        self.grad = torch.zeros(self.CLASSES, E, device=self.w.device, dtype=torch.float64)
        self.seen = torch.zeros(self.CLASSES, 1, device=self.w.device, dtype=torch.float64)

    def classes(self, support: Tensor) -> Tensor:
        return torch.log2(support.float() + 1.0).long().clamp_max(self.CLASSES - 1)

    def weights(self, cls: Tensor) -> Tensor:
        return self.w[cls]

    def note(self, cls: Tensor, ratio: Tensor) -> None:
        """ratio: p_k(x) / p(x), minus the gradient of the loss in w_k."""
        self.grad.index_add_(0, cls, ratio.double())
        self.seen.index_add_(0, cls, torch.ones(cls.numel(), 1, device=cls.device, dtype=torch.float64))

    def step(self, ranks: Ranks) -> None:
        """After the block's losses are in the ledger."""
        ranks.total(self.grad)
        ranks.total(self.seen)
        mean = torch.where(self.seen > 0, self.grad / self.seen.clamp_min(1), torch.ones_like(self.grad))
        logw = self.w.double().log() + self.rate * (mean - 1.0)
        w = torch.softmax(logw, dim=-1)
        self.w = (self.floor + (1.0 - E * self.floor) * w).float()
        self.reset()


# ---------------------------------------------------------------------------------------------------------------------
# Ledger
# ---------------------------------------------------------------------------------------------------------------------


class Ledger:
    """Sums per block, in fp64: nats, tokens, bytes, then the nats of each expert alone. Written once per block."""

    def __init__(self, n_blocks: int, device: torch.device) -> None:
        self.rows = torch.zeros(n_blocks, 3 + E, device=device, dtype=torch.float64)
        self.closed = [False] * n_blocks

    def enter(self, b: int, nats: Tensor, size: Tensor, alone: Tensor) -> None:
        assert not self.closed[b], "a block is scored once"
        self.rows[b, 0] += nats.double().sum()
        self.rows[b, 1] += nats.numel()
        self.rows[b, 2] += size.sum()
        self.rows[b, 3:] += alone.double().sum(0)

    def close(self, b: int, ranks: Ranks, expected: int) -> None:
        ranks.total(self.rows[b])
        assert int(self.rows[b, 1].item()) == expected, "each target of a block is scored exactly once"
        self.closed[b] = True

    def totals(self) -> tuple[float, float, float]:
        assert all(self.closed)
        nats, tokens, size = self.rows[:, :3].sum(0).tolist()
        return nats, tokens, size

    def alone_bpb(self) -> list[float]:
        s = self.rows.sum(0)
        return (s[3:] / math.log(2) / s[2]).tolist()


def bits_per_byte(nats: float, size: float) -> float:
    return nats / math.log(2) / size


def bootstrap_interval(rows: Tensor, draws: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bpb, blocks resampled with replacement (blocks, since losses within one are dependent)."""
    r = rows[:, :3].cpu().numpy()
    rng = np.random.default_rng(seed)
    pick = rng.integers(0, len(r), size=(draws, len(r)))
    stat = r[pick, 0].sum(1) / math.log(2) / r[pick, 2].sum(1)
    lo, hi = np.quantile(stat, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


# ---------------------------------------------------------------------------------------------------------------------
# Online ensemble
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Inputs tokens[begin:end]; input i predicts token i + 1. Scores the inputs first..end-1."""

    begin: int
    first: int
    end: int


def make_windows(n_targets: int, seq_len: int, stride: int) -> list[Window]:
    out = []
    for first in range(0, n_targets, stride):
        end = min(first + stride, n_targets)
        out.append(Window(max(0, end - seq_len), first, end))
    assert sum(w.end - w.first for w in out) == n_targets
    return out


def make_blocks(windows: list[Window], per_block: int) -> list[list[Window]]:
    return [windows[i : i + per_block] for i in range(0, len(windows), per_block)]


class OnlineEnsemble:
    """Scores a stream block by block with frozen state, then updates the state with the block."""

    def __init__(self, cfg: Config, ranks: Ranks, model: GPT, table: ByteTable) -> None:
        self.cfg, self.ranks, self.model, self.table = cfg, ranks, model, table
        self.hidden = torch.compile(model.hidden, dynamic=False, fullgraph=True)
        self.cache = DirichletCache(cfg, ranks.device)
        self.adapter = Adapter(cfg, ranks.device)
        self.mixer = Mixer(cfg, ranks.device)

    def context(self, tokens: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The two tokens before target t + 1; nothing is taken from before the document's first token."""
        v = tokens[t]
        u = tokens[(t - 1).clamp_min(0)]
        u = torch.where((t == 0) | (v == BOS_ID), torch.full_like(u, BOS_ID), u)
        return u, v

    @torch.no_grad()
    def encode(self, tokens: Tensor, batch: list[Window]) -> tuple[Tensor, Tensor]:
        """Hidden states at the scored positions, and the positions. Short windows are padded on the right."""
        x = torch.zeros(self.cfg.eval_batch, self.cfg.eval_seq, device=self.ranks.device, dtype=torch.int64)
        for i, w in enumerate(batch):
            x[i, : w.end - w.begin] = tokens[w.begin : w.end]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            h = self.hidden(x)
        keep = torch.cat([h[i, w.first - w.begin : w.end - w.begin] for i, w in enumerate(batch)])
        t = torch.cat([torch.arange(w.first, w.end, device=self.ranks.device) for w in batch])
        return keep, t

    @torch.no_grad()
    def experts(self, h: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """[n, E, V], each row a distribution over the vocabulary."""
        neural = torch.softmax(self.adapter.logits(self.model, h).float(), dim=-1)
        return torch.cat((neural.unsqueeze(1), self.cache.predict(u, v)), dim=1)

    @torch.no_grad()
    def predict(self, h: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mixture [n, V], the experts [n, E, V] and the classes [n]; the targets are no argument."""
        parts = self.experts(h, u, v)
        cls = self.mixer.classes(self.cache.support(u, v))
        w = self.mixer.weights(cls)
        return (w.unsqueeze(-1) * parts).sum(1), parts, cls

    def audit(self, p: Tensor) -> None:
        off = (p.double().sum(-1) - 1.0).abs().max().item()
        assert off < 1e-4 and bool((p >= 0).all()), f"not a distribution: off by {off:.2e}"

    @torch.no_grad()
    def score_block(self, tokens: Tensor, b: int, block: list[Window], ledger: Ledger) -> tuple[Tensor, Tensor]:
        """Enters the losses of this rank's windows; returns hidden states and targets for the update."""
        mine = block[self.ranks.rank :: self.ranks.world]
        kept_h: list[Tensor] = []
        kept_x: list[Tensor] = []
        for lo in range(0, len(mine), self.cfg.eval_batch):
            h, t = self.encode(tokens, mine[lo : lo + self.cfg.eval_batch])
            u, v = self.context(tokens, t)
            p, parts, cls = self.predict(h, u, v)
            if b % self.cfg.audit_every == 0:
                self.audit(p)
            x = tokens[t + 1]
            px = p.gather(1, x[:, None]).squeeze(1)
            nats = -px.clamp_min(1e-12).log()
            pk = parts.gather(2, x[:, None, None].expand(-1, E, 1)).squeeze(2)
            ledger.enter(b, nats, self.table.count(v, x), -pk.clamp_min(1e-12).log())
            self.mixer.note(cls, pk / px.clamp_min(1e-12)[:, None])
            kept_h.append(h)
            kept_x.append(x)
        if not mine:
            none = torch.zeros(0, self.cfg.dim, device=self.ranks.device, dtype=torch.bfloat16)
            return none, torch.zeros(0, device=self.ranks.device, dtype=torch.int64)
        return torch.cat(kept_h), torch.cat(kept_x)

    def update(self, tokens: Tensor, block: list[Window], h: Tensor, x: Tensor) -> None:
        """All state: weights, adapter, counts. Identical on every rank."""
        lo, hi = block[0].first, block[-1].end
        self.mixer.step(self.ranks)
        self.adapter.learn(self.model, self.ranks, h, x, hi - lo)
        t = torch.arange(lo, hi, device=self.ranks.device)
        u, v = self.context(tokens, t)
        self.cache.absorb(u, v, tokens[t + 1])

    def run(self, stream: Tensor, log: Log, clock: Clock) -> Ledger:
        cfg = self.cfg
        tokens = stream.to(self.ranks.device, torch.int64)
        n = tokens.numel() - 1
        blocks = make_blocks(make_windows(n, cfg.eval_seq, cfg.stride), cfg.block_tokens // cfg.stride)
        ledger = Ledger(len(blocks), self.ranks.device)
        for b, block in enumerate(blocks):
            lo, hi = block[0].first, block[-1].end
            assert self.cache.absorbed == lo, "the state holds exactly the targets before the block"
            h, x = self.score_block(tokens, b, block, ledger)
            ledger.close(b, self.ranks, hi - lo)
            self.update(tokens, block, h, x)
            if b % 50 == 0 or b + 1 == len(blocks):
                s = ledger.rows[: b + 1].sum(0)
                w = self.mixer.w.mean(0).tolist()
                log(
                    f"block {b + 1}/{len(blocks)} bpb:{bits_per_byte(s[0].item(), s[2].item()):.5f} "
                    f"w:{' '.join(f'{k}={a:.3f}' for k, a in zip(EXPERTS, w, strict=True))} t:{clock.seconds():.1f}s"
                )
        return ledger


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def describe(cfg: Config, ranks: Ranks, log: Log, model: GPT, val: Tensor) -> None:
    log(f"Running Python {sys.version.split()[0]} PyTorch {torch.__version__}")
    log("settings " + json.dumps(dataclasses.asdict(cfg), sort_keys=True))
    log(f"model_params:{sum(p.numel() for p in model.parameters())} world_size:{ranks.world} seed:{cfg.seed}")
    log(f"validation tokens:{val.numel()} scored:{val.numel() - 1}")


def fit(cfg: Config, ranks: Ranks, log: Log, val: Tensor, table: ByteTable) -> None:
    """Everything inside the training cap: from the first step to the artifact on disk."""
    model = GPT(cfg).to(ranks.device)
    if ranks.world > 1:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)
    describe(cfg, ranks, log, model, val)
    net = torch.compile(model, dynamic=False, fullgraph=True)
    opts, muon = build_optimisers(cfg, ranks, model)
    warm_up(cfg, ranks, net, model, opts)
    ranks.wait()
    clock = Clock()
    average = train(cfg, ranks, log, model, net, clock, opts, muon, val, table)
    average.put(model)
    moments = second_moments(cfg, ranks, model)
    log(f"calibrated on {cfg.calib_batches} training batches, train_time:{1e3 * clock.seconds():.0f}ms")
    if ranks.first:
        write_artifact(cfg, log, model.state_dict(), moments)
    ranks.wait()
    used = clock.seconds()
    log(f"artifact written, train_time:{1e3 * used:.0f}ms cap:{1e3 * cfg.train_cap_s:.0f}ms")
    assert used <= cfg.train_cap_s, "training, calibration and packing exceed the cap"
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")


def evaluate(cfg: Config, ranks: Ranks, log: Log, val: Tensor, table: ByteTable) -> None:
    """Everything inside the evaluation cap: from the artifact on disk to the score."""
    clock = Clock()
    model = read_artifact(cfg, ranks.device)
    ensemble = OnlineEnsemble(cfg, ranks, model, table)
    ledger = ensemble.run(val, log, clock)
    nats, tokens, size = ledger.totals()
    assert int(tokens) == val.numel() - 1, "every validation token is scored once"
    alone = " ".join(f"{k}={b:.5f}" for k, b in zip(EXPERTS, ledger.alone_bpb(), strict=True))
    log(f"experts alone, bpb: {alone}")
    lo, hi = bootstrap_interval(ledger.rows, cfg.bootstrap, cfg.seed)
    log(f"block bootstrap, 95% interval of bpb: [{lo:.5f}, {hi:.5f}] ({cfg.bootstrap} draws)")
    seconds = clock.seconds()
    log(f"tokens:{int(tokens)} bytes:{int(size)} eval_time:{1e3 * seconds:.0f}ms")
    assert seconds <= cfg.eval_cap_s, "the evaluation exceeds its cap"
    log(f"final_ensemble_exact val_loss:{nats / tokens:.8f} val_bpb:{bits_per_byte(nats, size):.8f}")


def main() -> None:
    cfg = Config()
    cfg.check()
    ranks = Ranks.start()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    set_seeds(cfg.seed)
    log = Log(cfg, ranks)
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer)
    assert int(sp.vocab_size()) == cfg.vocab, "tokenizer and model disagree"
    table = byte_table(sp, cfg.vocab, ranks.device)
    val = validation_stream(cfg)
    fit(cfg, ranks, log, val, table)
    torch.cuda.empty_cache()
    evaluate(cfg, ranks, log, val, table)
    ranks.stop()


if __name__ == "__main__":
    main()
