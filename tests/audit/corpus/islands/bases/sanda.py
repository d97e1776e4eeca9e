"""11L d512 GQA transformer, banked weights with parallel Muon, XSA4, partial RoPE, LeakyReLU^2, VE, EMA+SWA.

Full-Hessian GPTQ int6 (self-generated calibration text, inside the 600 s), LZMA, score-first TTT with stride-64 windows.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import lzma
import math
import os
import random
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from flash_attn_interface import flash_attn_func as _fa3
except ImportError:
    _fa3 = None


# -----------------------------------------------------------------------------
# Settings
# -----------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, int(default))))


def env_layers(name: str, default: str) -> list[int]:
    return [int(part) for part in os.environ.get(name, default).split(",") if part.strip()]


class Settings:
    # data
    data_dir = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_glob = os.path.join(data_dir, "fineweb_train_*.bin")
    val_glob = os.path.join(data_dir, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)

    # schedule
    iterations = env_int("ITERATIONS", 20000)
    warmdown_iters = env_int("WARMDOWN_ITERS", 3500)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    quant_reserve_seconds = env_float("QUANT_RESERVE_SECONDS", 48.0)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)

    # model
    vocab_size = env_int("VOCAB_SIZE", 1024)
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 3.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    rope_base = env_float("ROPE_BASE", 10000.0)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 1.5)
    xsa_last_n = env_int("XSA_LAST_N", 4)
    leaky_slope = env_float("LEAKY_SLOPE", 0.5)
    ln_scale = env_flag("LN_SCALE", True)
    bigram_buckets = env_int("BIGRAM_BUCKETS", 2048)
    bigram_dim = env_int("BIGRAM_DIM", 128)
    ve_dim = env_int("VE_DIM", 128)
    ve_layers = env_layers("VE_LAYERS", "9,10")
    tied_embed_init_std = env_float("TIED_EMBED_INIT_STD", 0.005)

    # optimisers
    matrix_lr = env_float("MATRIX_LR", 0.025)
    scalar_lr = env_float("SCALAR_LR", 0.025)
    tied_embed_lr = env_float("TIED_EMBED_LR", 0.035)
    muon_momentum = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_ns_steps = env_int("MUON_NS_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.04)
    adam_wd = env_float("ADAM_WD", 0.04)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    grad_clip_norm = env_float("GRAD_CLIP_NORM", 0.3)

    # averaging
    ema_decay = env_float("EMA_DECAY", 0.997)
    swa_every = env_int("SWA_EVERY", 50)
    swa_below_scale = env_float("SWA_BELOW_SCALE", 0.2)
    swa_mix = env_float("SWA_MIX", 0.5)
    qat_below_scale = env_float("QAT_BELOW_SCALE", 0.15)

    # quantisation
    calib_source = os.environ.get("CALIB_SOURCE", "self")
    calib_rows = env_int("CALIB_ROWS", 64)
    calib_len = env_int("CALIB_LEN", 512)
    calib_temperature = env_float("CALIB_TEMPERATURE", 0.8)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit = 16_000_000

    # evaluation
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_batch_windows = env_int("EVAL_BATCH_WINDOWS", 32)
    eval_budget_seconds = env_float("EVAL_BUDGET_SECONDS", 500.0)
    ttt_enabled = env_flag("TTT_ENABLED", True)
    ttt_lr = env_float("TTT_LR", 0.002)
    ttt_momentum = env_float("TTT_MOMENTUM", 0.9)
    ttt_epochs = env_int("TTT_EPOCHS", 3)
    ttt_chunk = env_int("TTT_CHUNK", 32768)
    ttt_rows_per_step = env_int("TTT_ROWS_PER_STEP", 8)
    ttt_freeze_blocks = env_int("TTT_FREEZE_BLOCKS", 0)
    ttt_grad_clip = env_float("TTT_GRAD_CLIP", 1.0)
    pair_weight = env_float("PAIR_WEIGHT", 0.0)
    pair_alpha = env_float("PAIR_ALPHA", 4.0)


# -----------------------------------------------------------------------------
# Process group and logging
# -----------------------------------------------------------------------------


@dataclass
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.size > 1

    @classmethod
    def start(cls) -> World:
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        rank = env_int("RANK", 0)
        size = env_int("WORLD_SIZE", 1)
        local = env_int("LOCAL_RANK", 0)
        if size > 8 or 8 % size != 0:
            raise ValueError(f"WORLD_SIZE={size} must divide 8")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group(backend="nccl", device_id=device)
            dist.barrier()
        return cls(rank, size, local, device)

    def sum_(self, t: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def agree(self, flag: bool) -> bool:
        """True on every rank as soon as one rank says so."""
        t = torch.tensor(int(flag), device=self.device)
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())


class Log:
    def __init__(self, world: World, run_id: str):
        self.world = world
        self.path = None
        if world.is_main:
            os.makedirs("logs", exist_ok=True)
            self.path = f"logs/{run_id}.txt"
            print(self.path)

    def __call__(self, text: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(text)
        with open(self.path, "a", encoding="utf-8") as f:
            print(text, file=f)


class Clock:
    """Milliseconds of wall time while it is running; the device is waited for at each reading."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def stop(self) -> float:
        torch.cuda.synchronize()
        if self.since is not None:
            self.spent += 1000.0 * (time.perf_counter() - self.since)
            self.since = None
        return self.spent

    def read(self) -> float:
        if self.since is None:
            return self.spent
        return self.spent + 1000.0 * (time.perf_counter() - self.since)


# -----------------------------------------------------------------------------
# Shards
# -----------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(path: Path) -> Tensor:
    head = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if head.size != HEADER_INTS or int(head[0]) != SHARD_MAGIC or int(head[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {path}")
    count = int(head[2])
    offset = HEADER_INTS * np.dtype("<i4").itemsize
    if path.stat().st_size != offset + 2 * count:
        raise ValueError(f"shard size mismatch in {path}")
    body = np.fromfile(path, dtype="<u2", count=count, offset=offset)
    if body.size != count:
        raise ValueError(f"short read of {path}")
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def shard_files(pattern: str) -> list[Path]:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no files match {pattern}")
    return files


def load_validation(pattern: str) -> Tensor:
    """Every token of the validation split, in order."""
    return torch.cat([read_shard(f) for f in shard_files(pattern)]).contiguous()


class TokenRiver:
    """Train tokens in shard order, without end."""

    def __init__(self, pattern: str):
        self.files = shard_files(pattern)
        self.which = 0
        self.shard = read_shard(self.files[0])
        self.at = 0

    def _next_file(self) -> None:
        self.which = (self.which + 1) % len(self.files)
        self.shard = read_shard(self.files[self.which])
        self.at = 0

    def take(self, n: int) -> Tensor:
        pieces: list[Tensor] = []
        while n > 0:
            have = self.shard.numel() - self.at
            if have <= 0:
                self._next_file()
                continue
            k = min(n, have)
            pieces.append(self.shard[self.at : self.at + k])
            self.at += k
            n -= k
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class BatchFeed:
    """Gives each rank its own slice of the next global batch."""

    def __init__(self, pattern: str, world: World):
        self.world = world
        self.river = TokenRiver(pattern)

    def next(self, batch_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        mine = batch_tokens // (self.world.size * accum)
        span = mine + 1
        block = self.river.take(span * self.world.size)
        local = block[self.world.rank * span : (self.world.rank + 1) * span].to(torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.world.device, non_blocking=True), y.to(self.world.device, non_blocking=True)


# -----------------------------------------------------------------------------
# Bytes of the text behind the tokens
# -----------------------------------------------------------------------------


class ByteTable:
    """UTF-8 bytes of each piece; a leading space counts unless a boundary token stands before it."""

    def __init__(self, tokenizer_path: str, vocab_size: int, device: torch.device):
        if not tokenizer_path.endswith(".model"):
            raise ValueError(f"a SentencePiece .model is wanted, not {tokenizer_path}")
        sp = spm.SentencePieceProcessor(model_file=tokenizer_path)
        if int(sp.vocab_size()) != vocab_size:
            raise ValueError(f"tokenizer has {int(sp.vocab_size())} pieces, VOCAB_SIZE={vocab_size}")
        self.bos = int(sp.bos_id())
        size = max(int(sp.vocab_size()), vocab_size)
        plain = np.zeros(size, dtype=np.int16)
        spaced = np.zeros(size, dtype=bool)
        edge = np.ones(size, dtype=bool)
        for i in range(int(sp.vocab_size())):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            edge[i] = False
            if sp.is_byte(i):
                plain[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                spaced[i] = True
                piece = piece[1:]
            plain[i] = len(piece.encode("utf-8"))
        self.plain = torch.tensor(plain, device=device)
        self.spaced = torch.tensor(spaced, device=device)
        self.edge = torch.tensor(edge, device=device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.plain[target].to(torch.float64)
        n += (self.spaced[target] & ~self.edge[prev]).to(torch.float64)
        return n


# -----------------------------------------------------------------------------
# Parallel Muon
# -----------------------------------------------------------------------------


def newton_schulz(G: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16()
    flip = X.size(-2) > X.size(-1)
    if flip:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X.mT if flip else X


class BankMuon(torch.optim.Optimizer):
    """Muon over 3-D banks: reduce-scatter of the gradient, Newton-Schulz on the own shard, all-gather of the update."""

    def __init__(self, params, lr: float, momentum: float, ns_steps: int, weight_decay: float, world: World):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay))
        self.world = world
        self.plans: dict[Tensor, dict] = {}
        self.pending: list[tuple[Tensor, object]] = []

    def _plan(self, p: Tensor) -> dict:
        plan = self.plans.get(p)
        if plan is None:
            n = p.shape[0]
            padded = -(-n // self.world.size) * self.world.size
            shard = padded // self.world.size
            tail = p.shape[1:]
            kw = dict(device=p.device, dtype=torch.bfloat16)
            plan = dict(
                n=n,
                grad=torch.zeros(padded, *tail, **kw),
                mine=torch.zeros(shard, *tail, **kw),
                full=torch.zeros(padded, *tail, **kw),
                scale=max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5,
            )
            self.plans[p] = plan
        return plan

    def launch(self) -> None:
        """Starts the reduce-scatters, largest bank first; to be called right after backward."""
        self.pending = []
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in sorted(params, key=lambda t: -t.numel()):
            plan = self._plan(p)
            plan["grad"][: plan["n"]].copy_(p.grad)
            if self.world.distributed:
                work = dist.reduce_scatter_tensor(plan["mine"], plan["grad"], op=dist.ReduceOp.AVG, async_op=True)
            else:
                plan["mine"].copy_(plan["grad"])
                work = None
            self.pending.append((p, work))

    @torch.no_grad()
    def step(self, closure=None):
        gathers: list[tuple[Tensor, object]] = []
        group_of = {p: g for g in self.param_groups for p in g["params"]}
        for p, work in self.pending:
            if work is not None:
                work.wait()
            plan, group = self._plan(p), group_of[p]
            state = self.state[p]
            if "buf" not in state:
                state["buf"] = torch.zeros_like(plan["mine"])
            buf = state["buf"]
            buf.mul_(group["momentum"]).add_(plan["mine"])
            update = plan["mine"].add(buf, alpha=group["momentum"])
            update = newton_schulz(update, group["ns_steps"])
            if self.world.distributed:
                work = dist.all_gather_into_tensor(plan["full"], update.contiguous(), async_op=True)
            else:
                plan["full"].copy_(update)
                work = None
            gathers.append((p, work))
        for p, work in gathers:
            if work is not None:
                work.wait()
            plan, group = self._plan(p), group_of[p]
            if group["weight_decay"] > 0:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
            p.add_(plan["full"][: plan["n"]].to(p.dtype), alpha=-group["lr"] * plan["scale"])
        self.pending = []


# -----------------------------------------------------------------------------
# Model
# -----------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over (batch, time, heads, dim) with grouped keys and values."""
    if _fa3 is not None:
        out = _fa3(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.size(2) != k.size(2)
    )
    return out.transpose(1, 2)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Fakeness:
    """Switch of the late fake quantisation of the banks."""

    on = False

    @staticmethod
    def apply(w: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (w.float().abs().amax(dim=-1, keepdim=True) / 31.0).clamp_min(1e-8)
            snapped = (torch.round(w.float() / scale).clamp(-32, 31) * scale).to(w.dtype)
        return w + (snapped - w).detach()


def bank_linear(x: Tensor, w: Tensor, training: bool) -> Tensor:
    w = w.to(x.dtype)
    if training and Fakeness.on:
        w = Fakeness.apply(w)
    return F.linear(x, w)


class PartialRope(nn.Module):
    def __init__(self, dims: int, base: float):
        super().__init__()
        self.dims = dims
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv", inv, persistent=False)

    def tables(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(length, device=self.inv.device, dtype=torch.float32)
        angle = torch.outer(t, self.inv)[None, :, None, :]
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        head, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = head.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class PairEmbedding(nn.Module):
    """Hashed embedding of (previous token, token); the first token of a document has no previous one."""

    def __init__(self, buckets: int, dim: int, model_dim: int, bos: int):
        super().__init__()
        self.buckets = buckets
        self.bos = bos
        self.table = nn.Embedding(buckets, dim)
        self.out = nn.Linear(dim, model_dim, bias=False)
        self.gain = nn.Parameter(torch.tensor(0.05))
        nn.init.zeros_(self.table.weight)
        nn.init.zeros_(self.out.weight)

    def slots(self, ids: Tensor) -> Tensor:
        t = ids.to(torch.int32)
        mod = self.buckets - 1
        slot = torch.full_like(t, mod)
        mixed = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % mod
        fresh = t[:, 1:] == self.bos
        slot[:, 1:] = torch.where(fresh, torch.full_like(mixed, mod), mixed)
        return slot.long()

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(self.slots(ids))) * self.gain.to(self.out.weight.dtype)


class Smear(nn.Module):
    """Mixes a share of the previous position into each position, except where a document begins."""

    def __init__(self, dim: int, bos: int):
        super().__init__()
        self.bos = bos
        self.gate = nn.Parameter(torch.full((dim,), -2.0))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate.to(x.dtype))
        back = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        keep = (ids != self.bos).to(x.dtype)[..., None]
        return x + g * keep * back


class ValueTable(nn.Module):
    def __init__(self, vocab: int, dim: int, kv_dim: int):
        super().__init__()
        self.table = nn.Embedding(vocab, dim)
        self.out = nn.Linear(dim, kv_dim, bias=False)
        self.gain = nn.Parameter(torch.tensor(0.1))
        nn.init.normal_(self.table.weight, std=0.01)
        nn.init.zeros_(self.out.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids)) * self.gain.to(self.out.weight.dtype)


class BlockScalars(nn.Module):
    """What a layer owns beside its slices of the banks."""

    def __init__(self, s: type[Settings], index: int):
        super().__init__()
        dim = s.model_dim
        self.qk_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain_init))
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.norm_factor = 1.0 / math.sqrt(index + 1) if s.ln_scale else 1.0
        self.xsa = index >= s.num_layers - s.xsa_last_n


class GolfLM(nn.Module):
    def __init__(self, s: type[Settings], bos: int):
        super().__init__()
        self.s = s
        self.dim = s.model_dim
        self.head_dim = s.model_dim // s.num_heads
        self.kv_dim = s.num_kv_heads * self.head_dim
        self.hidden = int(s.mlp_mult * s.model_dim)
        n, d = s.num_layers, s.model_dim
        self.qo_bank = nn.Parameter(torch.empty(2 * n, d, d))
        self.kv_bank = nn.Parameter(torch.empty(2 * n, self.kv_dim, d))
        self.up_bank = nn.Parameter(torch.empty(n, self.hidden, d))
        self.down_bank = nn.Parameter(torch.empty(n, d, self.hidden))
        self.tok_emb = nn.Embedding(s.vocab_size, d)
        self.pairs = PairEmbedding(s.bigram_buckets, s.bigram_dim, d, bos)
        self.smear = Smear(d, bos)
        self.rope = PartialRope(s.rope_dims, s.rope_base)
        self.blocks = nn.ModuleList(BlockScalars(s, i) for i in range(n))
        self.n_enc = n // 2
        self.n_dec = n - self.n_enc
        self.skip_gain = nn.Parameter(torch.ones(min(self.n_enc, self.n_dec), d))
        self.ve = ValueTable(s.vocab_size, s.ve_dim, self.kv_dim)
        self.ve_gain = nn.Parameter(torch.ones(len(s.ve_layers)))
        self.reset_banks()

    def reset_banks(self) -> None:
        n = self.s.num_layers
        damp = 1.0 / math.sqrt(2 * n)
        nn.init.normal_(self.tok_emb.weight, std=self.s.tied_embed_init_std)
        for i in range(n):
            nn.init.orthogonal_(self.qo_bank.data[i])
            nn.init.zeros_(self.qo_bank.data[n + i])
            nn.init.orthogonal_(self.kv_bank.data[i])
            nn.init.orthogonal_(self.kv_bank.data[n + i])
            nn.init.orthogonal_(self.up_bank.data[i])
            nn.init.zeros_(self.down_bank.data[i])
        self.kv_bank.data[n:].mul_(1.0 + damp)

    def attention(self, i: int, x: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, tap) -> Tensor:
        n, blk = self.s.num_layers, self.blocks[i]
        b, t, _ = x.shape
        if tap is not None:
            tap.add(f"attn_in.{i}", x)
        q = bank_linear(x, self.qo_bank[i], self.training).view(b, t, self.s.num_heads, self.head_dim)
        k = bank_linear(x, self.kv_bank[i], self.training).view(b, t, self.s.num_kv_heads, self.head_dim)
        v = bank_linear(x, self.kv_bank[n + i], self.training)
        if ve is not None:
            v = v + ve.to(v.dtype)
        v = v.view(b, t, self.s.num_kv_heads, self.head_dim)
        q = self.rope.turn(rms(q), cos, sin) * blk.qk_gain.to(q.dtype)[None, None, :, None]
        k = self.rope.turn(rms(k), cos, sin)
        y = attend(q, k, v)
        if blk.xsa:
            group = self.s.num_heads // self.s.num_kv_heads
            yg = y.reshape(b, t, self.s.num_kv_heads, group, self.head_dim)
            vn = F.normalize(v, dim=-1).unsqueeze(-2)
            y = yg - (yg * vn).sum(dim=-1, keepdim=True) * vn
        y = y.reshape(b, t, self.dim)
        if tap is not None:
            tap.add(f"attn_out.{i}", y)
        return bank_linear(y, self.qo_bank[n + i], self.training)

    def mlp(self, i: int, x: Tensor, tap) -> Tensor:
        if tap is not None:
            tap.add(f"mlp_in.{i}", x)
        h = F.leaky_relu(bank_linear(x, self.up_bank[i], self.training), negative_slope=self.s.leaky_slope).square()
        if tap is not None:
            tap.add(f"mlp_hid.{i}", h)
        return bank_linear(h, self.down_bank[i], self.training)

    def layer(self, i: int, x: Tensor, x0: Tensor, ids: Tensor, cos: Tensor, sin: Tensor, tap) -> Tensor:
        blk = self.blocks[i]
        mix = blk.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        ve = None
        if i in self.s.ve_layers:
            ve = self.ve(ids) * self.ve_gain[self.s.ve_layers.index(i)].to(x.dtype)
        a = self.attention(i, rms(x) * blk.norm_factor, cos, sin, ve, tap)
        x = x + blk.attn_scale.to(x.dtype) * a
        m = self.mlp(i, rms(x) * blk.norm_factor, tap)
        return x + blk.mlp_scale.to(x.dtype) * m

    def features(self, ids: Tensor, tap=None) -> Tensor:
        x = self.tok_emb(ids) + self.pairs(ids)
        x = self.smear(rms(x), ids)
        x0 = x
        cos, sin = self.rope.tables(ids.size(1), x.dtype)
        kept: list[Tensor] = []
        for i in range(self.n_enc):
            x = self.layer(i, x, x0, ids, cos, sin, tap)
            kept.append(x)
        for j in range(self.n_dec):
            if kept:
                x = x + self.skip_gain[j].to(x.dtype) * kept.pop()
            x = self.layer(self.n_enc + j, x, x0, ids, cos, sin, tap)
        return rms(x)

    def head(self, h: Tensor) -> Tensor:
        raw = F.linear(h, self.tok_emb.weight.to(h.dtype))
        cap = self.s.logit_softcap
        return cap * torch.tanh(raw.float() / cap)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        z = self.logits(ids)
        return F.cross_entropy(z.reshape(-1, z.size(-1)), targets.reshape(-1), reduction="mean")


BANKS = ("qo_bank", "kv_bank", "up_bank", "down_bank")


def build_model(s: type[Settings], bos: int, device: torch.device) -> GolfLM:
    model = GolfLM(s, bos).to(device).bfloat16()
    for name, p in model.named_parameters():
        if name in BANKS or p.ndim < 2 or "resid_mix" in name or "skip_gain" in name:
            p.data = p.data.float()
    model.rope.inv.data = model.rope.inv.data.float()
    return model


# -----------------------------------------------------------------------------
# Weight averages
# -----------------------------------------------------------------------------


class Averages:
    """An exponential mean over all steps, and a plain mean of snapshots of the cooled part of the run."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.ema = {k: v.detach().float().clone() for k, v in model.state_dict().items()}
        self.swa: dict[str, Tensor] = {}
        self.snapshots = 0

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.ema[k].lerp_(v.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def snapshot(self, model: nn.Module) -> None:
        self.snapshots += 1
        for k, v in model.state_dict().items():
            if k in self.swa:
                self.swa[k] += (v.detach().float() - self.swa[k]) / self.snapshots
            else:
                self.swa[k] = v.detach().float().clone()

    def blend(self, mix: float) -> dict[str, Tensor]:
        if self.snapshots == 0:
            return self.ema
        return {k: torch.lerp(v, self.swa[k], mix) for k, v in self.ema.items()}

    @staticmethod
    def install(model: nn.Module, weights: dict[str, Tensor]) -> None:
        now = model.state_dict()
        model.load_state_dict({k: weights[k].to(now[k].dtype) for k in now}, strict=True)


# -----------------------------------------------------------------------------
# Scoring
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Positions a..b-1 are scored inside a window that begins at lo; position p predicts token p+1."""

    lo: int
    a: int
    b: int


def lay_spans(total: int, seq_len: int, stride: int) -> list[Span]:
    """Covers 0..total-1 without gap or overlap; each window ends where its scored part ends."""
    first = min(seq_len, total)
    spans = [Span(0, 0, first)]
    a = first
    while a < total:
        b = min(a + stride, total)
        spans.append(Span(b - seq_len, a, b))
        a = b
    return spans


def share(items: list, world: World) -> list:
    """A contiguous share for each rank."""
    lo = len(items) * world.rank // world.size
    hi = len(items) * (world.rank + 1) // world.size
    return items[lo:hi]


class Tally:
    """Sums of nats, tokens and bytes of the scored positions on this rank."""

    def __init__(self, bytes_of: ByteTable, device: torch.device):
        self.bytes_of = bytes_of
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, nll: Tensor, prev: Tensor, target: Tensor) -> None:
        self.nats += nll.to(torch.float64).sum()
        self.tokens += float(target.numel())
        self.bytes += self.bytes_of.count(prev, target).sum()

    def result(self, world: World) -> tuple[float, float]:
        sums = world.sum_(torch.stack((self.nats, self.tokens, self.bytes)))
        nats, tokens, nbytes = sums.tolist()
        return nats / tokens, nats / math.log(2.0) / nbytes


class PairCounts:
    """Counts of (token, next token) over the text that was scored so far; a row smoothed is a distribution."""

    def __init__(self, vocab: int, alpha: float, weight: float, device: torch.device):
        self.alpha = alpha
        self.weight = weight
        self.vocab = vocab
        self.table = torch.zeros(vocab, vocab, dtype=torch.float32, device=device)

    def learn(self, text: Tensor) -> None:
        flat = text[:-1].long() * self.vocab + text[1:].long()
        self.table.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))

    def rows(self, prev: Tensor) -> Tensor:
        row = self.table[prev] + self.alpha / self.vocab
        return row / row.sum(dim=-1, keepdim=True)


def point_nll(z: Tensor, prev: Tensor, target: Tensor, pairs: PairCounts | None) -> Tensor:
    """Nats of each target under the softmax, or under its mixture with the pair counts."""
    if pairs is None or pairs.weight <= 0.0:
        return F.cross_entropy(z, target, reduction="none")
    share_of_pairs = pairs.weight
    p = (1.0 - share_of_pairs) * F.softmax(z, dim=-1) + share_of_pairs * pairs.rows(prev)
    return -p.gather(1, target[:, None]).squeeze(1).clamp_min(1e-12).log()


def windows_of(tokens: Tensor, spans: list[Span], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    length = max(sp.b - sp.lo for sp in spans)
    x = torch.zeros(len(spans), length, dtype=torch.int64, device=device)
    y = torch.zeros(len(spans), length, dtype=torch.int64, device=device)
    scored = torch.zeros(len(spans), length, dtype=torch.bool, device=device)
    for row, sp in enumerate(spans):
        n = sp.b - sp.lo
        piece = tokens[sp.lo : sp.b + 1].to(device=device, dtype=torch.int64)
        x[row, :n] = piece[:-1]
        y[row, :n] = piece[1:]
        scored[row, sp.a - sp.lo : n] = True
    return x, y, scored


class Scorer:
    """Scores spans with a model; the features are compiled, the head sees the scored positions only."""

    def __init__(self, model: GolfLM, tokens: Tensor, s: type[Settings], world: World, compiled: bool = True):
        self.model = model
        self.tokens = tokens
        self.s = s
        self.world = world
        self.features = torch.compile(model.features, dynamic=False) if compiled else model.features

    @torch.no_grad()
    def score(self, spans: list[Span], tally: Tally, pairs: PairCounts | None = None) -> None:
        step = self.s.eval_batch_windows
        for i in range(0, len(spans), step):
            x, y, scored = windows_of(self.tokens, spans[i : i + step], self.world.device)
            h = self.features(x)
            z = self.model.head(h[scored])
            prev, target = x[scored], y[scored]
            nll = point_nll(z, prev, target, pairs)
            tally.add(nll, prev, target)


def evaluate(
    model: GolfLM,
    tokens: Tensor,
    bytes_of: ByteTable,
    s: type[Settings],
    world: World,
    stride: int,
    compiled: bool = True,
) -> tuple[float, float]:
    """Loss and bits per byte of a model that stays as it is, over all the tokens."""
    was_training = model.training
    model.eval()
    spans = share(lay_spans(tokens.numel() - 1, s.eval_seq_len, stride), world)
    tally = Tally(bytes_of, world.device)
    Scorer(model, tokens, s, world, compiled).score(spans, tally)
    model.train(was_training)
    return tally.result(world)


# -----------------------------------------------------------------------------
# Calibration
# -----------------------------------------------------------------------------


class HessianTap:
    """Sums x x^T of the inputs of every matrix."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    @torch.no_grad()
    def add(self, key: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.size(-1)).float()
        if key not in self.sums:
            self.sums[key] = torch.zeros(flat.size(1), flat.size(1), device=flat.device)
            self.rows[key] = 0
        self.sums[key].addmm_(flat.T, flat)
        self.rows[key] += flat.size(0)

    def settle(self, world: World) -> dict[str, Tensor]:
        out = {}
        for key in sorted(self.sums):
            n = torch.tensor(float(self.rows[key]), device=self.sums[key].device)
            world.sum_(self.sums[key])
            world.sum_(n)
            out[key] = self.sums[key] / n.clamp_min(1.0)
        return out


@torch.no_grad()
def own_text(model: GolfLM, rows: int, length: int, temperature: float, bos: int, seed: int, device) -> Tensor:
    """Text that the model writes itself, from the document mark on."""
    gen = torch.Generator(device=device)
    gen.manual_seed(seed)
    ids = torch.full((rows, 1), max(bos, 0), dtype=torch.int64, device=device)
    while ids.size(1) < length:
        z = model.head(model.features(ids)[:, -1])
        p = F.softmax(z / temperature, dim=-1)
        ids = torch.cat((ids, torch.multinomial(p, 1, generator=gen)), dim=1)
    return ids


def train_text(pattern: str, rows: int, length: int, world: World) -> Tensor:
    """Rows from the head of the last train shard."""
    shard = read_shard(shard_files(pattern)[-1])
    wide = shard[: rows * world.size * length].to(torch.int64).reshape(-1, length)
    return wide[world.rank :: world.size].to(world.device)


def calibration_text(model: GolfLM, s: type[Settings], world: World, bos: int) -> Tensor:
    rows = max(1, s.calib_rows // world.size)
    if s.calib_source == "self":
        return own_text(model, rows, s.calib_len, s.calib_temperature, bos, s.seed + 977 * world.rank, world.device)
    if s.calib_source == "train":
        return train_text(s.train_glob, rows, s.calib_len, world)
    raise ValueError(f"CALIB_SOURCE={s.calib_source}: self or train")


@torch.no_grad()
def collect_hessians(model: GolfLM, s: type[Settings], world: World, bos: int) -> dict[str, Tensor]:
    model.eval()
    text = calibration_text(model, s, world, bos)
    tap = HessianTap()
    for i in range(0, text.size(0), 8):
        model.features(text[i : i + 8], tap=tap)
    return tap.settle(world)


# -----------------------------------------------------------------------------
# GPTQ int6 and packing
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """One matrix inside a bank and the Hessian of its input."""

    bank: str
    index: int
    hessian: str

    @property
    def key(self) -> str:
        return f"{self.bank}.{self.index}"


def bank_slices(num_layers: int) -> list[Slice]:
    out = []
    for i in range(num_layers):
        out.append(Slice("qo_bank", i, f"attn_in.{i}"))
        out.append(Slice("qo_bank", num_layers + i, f"attn_out.{i}"))
        out.append(Slice("kv_bank", i, f"attn_in.{i}"))
        out.append(Slice("kv_bank", num_layers + i, f"attn_in.{i}"))
        out.append(Slice("up_bank", i, f"mlp_in.{i}"))
        out.append(Slice("down_bank", i, f"mlp_hid.{i}"))
    return out


INT6_TOP = 31


def row_scales(w: Tensor, weight: Tensor) -> Tensor:
    """Per row, the clip ratio with the smallest error weighted by the Hessian's diagonal."""
    peak = w.abs().amax(dim=1).clamp_min(1e-8)
    best = peak / INT6_TOP
    best_err = torch.full_like(peak, float("inf"))
    for ratio in (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.77, 0.72):
        scale = (peak * ratio / INT6_TOP).clamp_min(1e-8)
        q = torch.round(w / scale[:, None]).clamp(-INT6_TOP - 1, INT6_TOP)
        err = ((q * scale[:, None] - w).square() * weight[None, :]).sum(dim=1)
        better = err < best_err
        best = torch.where(better, scale, best)
        best_err = torch.where(better, err, best_err)
    return best


@torch.no_grad()
def gptq_int6(w: Tensor, hessian: Tensor, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """Full-Hessian GPTQ with columns in the order of falling diagonal."""
    w = w.float().clone()
    h = hessian.float().clone()
    cols = w.size(1)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    scale = row_scales(w, h.diagonal()).half().float()
    order = torch.argsort(h.diagonal(), descending=True)
    back = torch.argsort(order)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    low = torch.linalg.cholesky(h)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(low), upper=True)
    q = torch.zeros_like(w)
    for i0 in range(0, cols, block):
        i1 = min(i0 + block, cols)
        part = w[:, i0:i1].clone()
        errs = torch.zeros_like(part)
        u = upper[i0:i1, i0:i1]
        for j in range(i1 - i0):
            col = part[:, j]
            qc = torch.round(col / scale).clamp(-INT6_TOP - 1, INT6_TOP)
            q[:, i0 + j] = qc
            err = (col - qc * scale) / u[j, j]
            part[:, j:] -= err[:, None] * u[j, j:][None, :]
            errs[:, j] = err
        w[:, i1:] -= errs @ upper[i0:i1, i1:]
    return q[:, back].to(torch.int8), scale.half()


def int8_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.float()
    scale = (t.abs().amax(dim=1).clamp_min(1e-8) / 127.0).half()
    q = torch.round(t / scale.float()[:, None]).clamp(-127, 127).to(torch.int8)
    return q, scale


def quantise(model: GolfLM, hessians: dict[str, Tensor], s: type[Settings], world: World) -> dict[str, object]:
    """The banks in int6 (each rank does its matrices), tables in int8, the rest in half."""
    mine = {}
    for sl in bank_slices(s.num_layers)[world.rank :: world.size]:
        w = getattr(model, sl.bank).data[sl.index]
        q, scale = gptq_int6(w, hessians[sl.hessian], s.gptq_block, s.gptq_damp)
        mine[sl.key] = (q.cpu(), scale.cpu())
    gathered = [mine]
    if world.distributed:
        gathered = [None] * world.size
        dist.all_gather_object(gathered, mine)
    six = {k: v for part in gathered for k, v in part.items()}
    eight, plain = {}, {}
    for name, t in model.state_dict().items():
        if name in BANKS:
            continue
        if t.ndim == 2 and t.numel() > 8192:
            q, scale = int8_rows(t)
            eight[name] = (q.cpu(), scale.cpu())
        else:
            plain[name] = t.detach().half().cpu()
    return {"six": six, "eight": eight, "plain": plain}


def write_artifact(payload: dict[str, object], path: str) -> int:
    raw = io.BytesIO()
    torch.save(payload, raw)
    blob = lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    with open(path, "wb") as f:
        f.write(blob)
    return len(blob)


def read_artifact(path: str) -> dict[str, object]:
    with open(path, "rb") as f:
        blob = f.read()
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)


def restore(payload: dict[str, object], s: type[Settings], bos: int, device: torch.device) -> GolfLM:
    """A fresh model with the weights of the artifact."""
    model = build_model(s, bos, device)
    now = model.state_dict()
    new: dict[str, Tensor] = {}
    for name in BANKS:
        rows = []
        for i in range(now[name].size(0)):
            q, scale = payload["six"][f"{name}.{i}"]
            rows.append(q.float() * scale.float()[:, None])
        new[name] = torch.stack(rows)
    for name, (q, scale) in payload["eight"].items():
        new[name] = q.float() * scale.float()[:, None]
    for name, t in payload["plain"].items():
        new[name] = t.float()
    model.load_state_dict({k: new[k].to(device=device, dtype=now[k].dtype) for k in now}, strict=True)
    model.eval()
    return model


# -----------------------------------------------------------------------------
# Test-time training: each chunk is scored first and learnt afterwards
# -----------------------------------------------------------------------------


def chunk_spans(total: int, seq_len: int, stride: int, chunk: int) -> list[list[Span]]:
    """The spans of each chunk; a span belongs to the chunk in which its scored part begins."""
    out: list[list[Span]] = [[] for _ in range(-(-total // chunk))]
    for sp in lay_spans(total, seq_len, stride):
        out[sp.a // chunk].append(sp)
    return out


class ChunkLearner:
    """SGD with momentum on the rows of a scored chunk; all ranks share the rows and the gradient."""

    def __init__(self, model: GolfLM, tokens: Tensor, s: type[Settings], world: World, chunks: int):
        self.model, self.tokens, self.s, self.world, self.chunks = model, tokens, s, world, chunks
        self.params = self._free_params()
        self.opt = torch.optim.SGD(self.params, lr=s.ttt_lr, momentum=s.ttt_momentum)
        self.loss_of = torch.compile(self._row_loss, dynamic=False)

    def _free_params(self) -> list[nn.Parameter]:
        frozen = {f"blocks.{i}." for i in range(self.s.ttt_freeze_blocks)}
        free = []
        for name, p in self.model.named_parameters():
            p.requires_grad_(not any(name.startswith(f) for f in frozen))
            if p.requires_grad:
                free.append(p)
        return free

    def _row_loss(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.model.logits(x)
        return F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1), reduction="sum")

    def rate(self, c: int) -> float:
        return self.s.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * c / max(self.chunks - 1, 1)))

    def _share_gradients(self) -> None:
        if not self.world.distributed:
            return
        flat = torch.cat([p.grad.reshape(-1).float() for p in self.params])
        self.world.sum_(flat)
        at = 0
        for p in self.params:
            n = p.grad.numel()
            p.grad.copy_(flat[at : at + n].view_as(p.grad))
            at += n

    def learn(self, c: int, start: int, stop: int) -> None:
        """Three passes of gradient steps over positions start..stop-1, whose losses are already counted."""
        length = self.s.eval_seq_len
        rows = (stop - start) // length
        for group in self.opt.param_groups:
            group["lr"] = self.rate(c)
        for _ in range(self.s.ttt_epochs):
            for r0 in range(0, rows, self.s.ttt_rows_per_step):
                step_rows = list(range(r0, min(r0 + self.s.ttt_rows_per_step, rows)))
                for p in self.params:
                    p.grad = torch.zeros_like(p)
                for r in step_rows[self.world.rank :: self.world.size]:
                    lo = start + r * length
                    piece = self.tokens[lo : lo + length + 1].to(torch.int64)
                    loss = self.loss_of(piece[None, :-1], piece[None, 1:]) / (len(step_rows) * length)
                    loss.backward()
                self._share_gradients()
                torch.nn.utils.clip_grad_norm_(self.params, self.s.ttt_grad_clip)
                self.opt.step()
        self.opt.zero_grad(set_to_none=True)


def evaluate_ttt(
    model: GolfLM,
    tokens: Tensor,
    bytes_of: ByteTable,
    s: type[Settings],
    world: World,
    log: Log,
    eval_start: float,
) -> tuple[float, float]:
    """Sliding windows over each chunk with the weights of the chunks before it; then the chunk is learnt."""
    total = tokens.numel() - 1
    plan = chunk_spans(total, s.eval_seq_len, s.eval_stride, s.ttt_chunk)
    last = len(plan) - 1
    model.eval()
    scorer = Scorer(model, tokens, s, world)
    learner = ChunkLearner(model, tokens, s, world, len(plan))
    pairs = PairCounts(s.vocab_size, s.pair_alpha, s.pair_weight, world.device) if s.pair_weight > 0 else None
    tally = Tally(bytes_of, world.device)
    learning = True
    log(f"ttt: chunks:{len(plan)} params:{sum(p.numel() for p in learner.params)} lr:{s.ttt_lr} epochs:{s.ttt_epochs}")
    for c, spans in enumerate(plan):
        start, stop = c * s.ttt_chunk, min((c + 1) * s.ttt_chunk, total)
        scorer.score(share(spans, world), tally, pairs)
        if learning and world.agree(time.perf_counter() - eval_start > s.eval_budget_seconds):
            learning = False
            log(f"ttt: time is short, chunk {c}: the rest is scored without learning")
        if learning and c < last:
            learner.learn(c, start, stop)
        if pairs is not None:
            pairs.learn(tokens[start : stop + 1])
        if c % 200 == 0 and world.is_main:
            so_far = (tally.nats / tally.tokens.clamp_min(1.0)).item()
            log(f"ttt: chunk:{c}/{last} rank0_loss:{so_far:.4f} time:{time.perf_counter() - eval_start:.1f}s")
    return tally.result(world)


# -----------------------------------------------------------------------------
# Training
# -----------------------------------------------------------------------------


@dataclass
class Optimisers:
    muon: BankMuon
    embed: torch.optim.Optimizer
    scalar: torch.optim.Optimizer
    replicated: list[nn.Parameter]

    @property
    def adams(self) -> list[torch.optim.Optimizer]:
        return [self.embed, self.scalar]

    @property
    def all(self) -> list[torch.optim.Optimizer]:
        return [self.muon, self.embed, self.scalar]


def make_optimisers(model: GolfLM, s: type[Settings], world: World) -> Optimisers:
    banks, tables, others = [], [], []
    for name, p in model.named_parameters():
        if name in BANKS:
            banks.append(p)
        elif name.endswith("table.weight") or name == "tok_emb.weight":
            tables.append(p)
        else:
            others.append(p)
    muon = BankMuon(banks, s.matrix_lr, s.muon_momentum, s.muon_ns_steps, s.muon_wd, world)
    adam = dict(betas=(s.beta1, s.beta2), eps=s.adam_eps, weight_decay=s.adam_wd, fused=True)
    embed = torch.optim.AdamW([dict(params=tables, lr=s.tied_embed_lr)], **adam)
    scalar = torch.optim.AdamW([dict(params=others, lr=s.scalar_lr)], **adam)
    opts = Optimisers(muon, embed, scalar, tables + others)
    for opt in opts.all:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return opts


def average_replicated(params: list[nn.Parameter], world: World) -> None:
    if not world.distributed:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1).float() for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    at = 0
    for g in grads:
        g.copy_(flat[at : at + g.numel()].view_as(g))
        at += g.numel()


class Trainer:
    def __init__(self, model: GolfLM, s: type[Settings], world: World, log: Log):
        self.model, self.s, self.world, self.log = model, s, world, log
        self.opts = make_optimisers(model, s, world)
        self.accum = 8 // world.size
        self.feed = BatchFeed(s.train_glob, world)
        self.forward = torch.compile(model, dynamic=False, fullgraph=_fa3 is None)
        self.averages: Averages | None = None
        self.cap_ms = 1000.0 * (s.max_wallclock_seconds - s.quant_reserve_seconds)
        self.clock = Clock()

    def lr_scale(self, step: int, elapsed_ms: float) -> float:
        if self.s.warmdown_iters <= 0:
            return 1.0
        per_step = elapsed_ms / max(step, 1)
        warmdown_ms = self.s.warmdown_iters * per_step
        left = max(self.cap_ms - elapsed_ms, 0.0)
        return min(1.0, left / max(warmdown_ms, 1e-9))

    def update(self, step: int, scale: float) -> Tensor:
        """One optimiser step on the next global batch of train tokens."""
        self.model.train()
        total = torch.zeros((), device=self.world.device)
        for opt in self.opts.all:
            opt.zero_grad(set_to_none=True)
        for _ in range(self.accum):
            x, y = self.feed.next(self.s.train_batch_tokens, self.s.train_seq_len, self.accum)
            loss = self.forward(x, y)
            total += loss.detach() / self.accum
            (loss / self.accum).backward()
        if self.s.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s.grad_clip_norm)
        self.opts.muon.launch()
        average_replicated(self.opts.replicated, self.world)
        frac = min(step / max(self.s.muon_momentum_steps, 1), 1.0)
        for group in self.opts.muon.param_groups:
            group["momentum"] = (1 - frac) * self.s.muon_momentum_start + frac * self.s.muon_momentum
        for opt in self.opts.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        for opt in self.opts.adams:
            opt.step()
        self.opts.muon.step()
        return total

    def warm_up(self) -> None:
        """Compiles the step on train batches, then puts weights, optimisers and data back."""
        if self.s.warmup_steps <= 0:
            return
        weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        states = [copy.deepcopy(opt.state_dict()) for opt in self.opts.all]
        for i in range(self.s.warmup_steps):
            self.update(i, 1.0)
        self.model.load_state_dict(weights, strict=True)
        for opt, state in zip(self.opts.all, states, strict=True):
            opt.load_state_dict(state)
            opt.state.clear()
            opt.zero_grad(set_to_none=True)
        self.feed = BatchFeed(self.s.train_glob, self.world)
        self.log(f"warm-up: {self.s.warmup_steps} steps, state restored")

    def run(self, tokens: Tensor, bytes_of: ByteTable) -> int:
        """Trains until the steps or the time are used up; returns the number of steps."""
        s, world = self.s, self.world
        self.averages = Averages(self.model, s.ema_decay)
        stop_at: int | None = None
        step = 0
        self.clock.start()
        while True:
            done = step == s.iterations or (stop_at is not None and step >= stop_at)
            if done or (s.val_loss_every > 0 and step % s.val_loss_every == 0):
                spent = self.clock.stop()
                val_loss, val_bpb = evaluate(self.model, tokens, bytes_of, s, world, s.eval_seq_len, compiled=False)
                self.log(
                    f"step:{step}/{s.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                    f"train_time:{spent:.0f}ms step_avg:{spent / max(step, 1):.2f}ms"
                )
                self.clock.start()
            if done:
                break
            elapsed = self.clock.read()
            scale = self.lr_scale(step, elapsed)
            if not Fakeness.on and scale < s.qat_below_scale and step > 0:
                Fakeness.on = True
                torch._dynamo.reset()
                self.log(f"late fake quantisation from step:{step}")
            loss = self.update(step, scale)
            self.averages.follow(self.model)
            if scale < s.swa_below_scale and step % s.swa_every == 0:
                self.averages.snapshot(self.model)
            step += 1
            elapsed = self.clock.read()
            if s.train_log_every > 0 and (step <= 10 or step % s.train_log_every == 0):
                self.log(f"step:{step}/{s.iterations} train_loss:{loss.item():.4f} train_time:{elapsed:.0f}ms")
            if stop_at is None and world.agree(elapsed >= self.cap_ms):
                stop_at = step
        Fakeness.on = False
        self.log(f"stopped at step:{step} train_time:{self.clock.read():.0f}ms cap:{self.cap_ms:.0f}ms")
        return step


# -----------------------------------------------------------------------------
# Main
# -----------------------------------------------------------------------------


def set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def set_kernels() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 64


def compress_and_report(payload: dict[str, object], s: type[Settings], log: Log) -> None:
    code_bytes = len(Path(__file__).read_bytes())
    model_bytes = write_artifact(payload, s.artifact_path)
    total_bytes = code_bytes + model_bytes
    log(f"Serialized model int6+lzma: {model_bytes} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size int6+lzma: {total_bytes} bytes")
    if total_bytes > s.size_limit:
        raise RuntimeError(f"submission has {total_bytes} bytes, {s.size_limit} are allowed")


def build_artifact(s: type[Settings], world: World, log: Log, tokens: Tensor, bytes_of: ByteTable) -> None:
    """Trains, averages, calibrates and quantises inside the cap, and writes the artifact."""
    model = build_model(s, bytes_of.bos, world.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    log(f"xsa:last_{s.xsa_last_n} rope_dims:{s.rope_dims} ve_layers:{s.ve_layers} leaky_slope:{s.leaky_slope}")
    log(f"world_size:{world.size} grad_accum_steps:{8 // world.size} seed:{s.seed}")
    trainer = Trainer(model, s, world, log)
    trainer.warm_up()
    trainer.run(tokens, bytes_of)
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    averages = trainer.averages
    averages.install(model, averages.blend(s.swa_mix))
    log(f"averages: ema {s.ema_decay}, swa of {averages.snapshots} snapshots, mix {s.swa_mix}")
    hessians = collect_hessians(model, s, world, bytes_of.bos)
    payload = quantise(model, hessians, s, world)
    spent = trainer.clock.stop()
    log(f"gptq: calibration source {s.calib_source}, {len(hessians)} Hessians, train+gptq {spent:.0f}ms")
    if world.is_main:
        compress_and_report(payload, s, log)
    world.barrier()


def report(log: Log, name: str, loss: float, bpb: float, since: float) -> None:
    torch.cuda.synchronize()
    log(f"{name} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000.0 * (time.perf_counter() - since):.0f}ms")
    log(f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def score_artifact(s: type[Settings], world: World, log: Log, tokens: Tensor, bytes_of: ByteTable) -> None:
    """Reads the artifact back and scores the validation split with it."""
    eval_start = time.perf_counter()
    model = restore(read_artifact(s.artifact_path), s, bytes_of.bos, world.device)
    since = time.perf_counter()
    loss, bpb = evaluate(model, tokens, bytes_of, s, world, s.eval_seq_len, compiled=False)
    report(log, "final_int6_roundtrip", loss, bpb, since)
    since = time.perf_counter()
    if s.ttt_enabled:
        loss, bpb = evaluate_ttt(model, tokens, bytes_of, s, world, log, eval_start)
        report(log, "legal_ttt_sliding", loss, bpb, since)
    else:
        loss, bpb = evaluate(model, tokens, bytes_of, s, world, s.eval_stride)
        report(log, "final_sliding", loss, bpb, since)
    log(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_total:{time.perf_counter() - eval_start:.1f}s")


def main() -> None:
    s = Settings
    world = World.start()
    log = Log(world, s.run_id)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version} and PyTorch {torch.__version__}", console=False)
    set_seeds(s.seed)
    set_kernels()
    bytes_of = ByteTable(s.tokenizer_path, s.vocab_size, world.device)
    tokens = load_validation(s.val_glob).to(device=world.device, dtype=torch.int32)
    log(f"train shards:{len(shard_files(s.train_glob))} val tokens:{tokens.numel()}")
    build_artifact(s, world, log, tokens, bytes_of)
    torch.cuda.empty_cache()
    score_artifact(s, world, log, tokens, bytes_of)
    if world.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
