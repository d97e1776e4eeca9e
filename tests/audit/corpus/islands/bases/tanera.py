# tanera: 11L/512 | value embeds | sliding-window attn | sharded Muon | EMA | late QAT int6 | zstd-22 | 64k score-first TTT
# torchrun --standalone --nproc_per_node=8 train_gpt.py
import contextlib
import copy
import glob
import json
import math
import os
import queue
import random
import struct
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

T_BOOT = time.perf_counter()
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from flash_attn_interface import flash_attn_func as fa3
from torch import Tensor, nn

# ---------------------------------------------------------------- knobs

env_s = lambda k, d: os.environ.get(k, d)
env_i = lambda k, d: int(os.environ.get(k, d))
env_f = lambda k, d: float(os.environ.get(k, d))
env_b = lambda k, d: bool(int(os.environ.get(k, int(d))))

RUN_ID = env_s("RUN_ID", str(uuid.uuid4())[:8])
SEED = env_i("SEED", 1337)
DATA_PATH = env_s("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
TOKENIZER_PATH = env_s("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
TRAIN_FILES = os.path.join(DATA_PATH, "fineweb_train_*.bin")
VAL_FILES = os.path.join(DATA_PATH, "fineweb_val_*.bin")
ARTIFACT = env_s("ARTIFACT", "final_model.int6.ptz")

VOCAB = env_i("VOCAB_SIZE", 1024)
BOS = env_i("BOS_ID", 1)
LAYERS = env_i("NUM_LAYERS", 11)
DIM = env_i("MODEL_DIM", 512)
HEADS = env_i("NUM_HEADS", 8)
KV_HEADS = env_i("NUM_KV_HEADS", 4)
HEAD_DIM = DIM // HEADS
KV_DIM = KV_HEADS * HEAD_DIM
MLP_DIM = env_i("MLP_DIM", 1536)
ROPE_BASE = env_f("ROPE_BASE", 10000.0)
ROPE_DIMS = env_i("ROPE_DIMS", 32)
SOFTCAP = env_f("LOGIT_SOFTCAP", 30.0)
SHORT_WIN = env_i("SHORT_WINDOW", 512)
WIN_PATTERN = env_s("WINDOW_PATTERN", "SSLSSLSSLSL")
VE_DIM = env_i("VE_DIM", 128)
VE_LAYERS = tuple(int(i) for i in env_s("VE_LAYERS", "1,2,8,9,10").split(","))
VE_TABLES = env_i("VE_TABLES", 2)
BG_ROWS = env_i("BIGRAM_ROWS", 2048)
BG_DIM = env_i("BIGRAM_DIM", 128)

SEQ = env_i("TRAIN_SEQ_LEN", 2048)
BATCH_TOKENS = env_i("TRAIN_BATCH_TOKENS", 786_432)
MAX_STEPS = env_i("ITERATIONS", 20_000)
WARMUP_STEPS = env_i("WARMUP_STEPS", 20)
CAP_S = env_f("MAX_WALLCLOCK_SECONDS", 600.0)
RESERVE_S = env_f("RESERVE_SECONDS", 22.0)
WARMDOWN = env_f("WARMDOWN_FRAC", 0.48)
LR_FLOOR = env_f("LR_FLOOR", 0.0)
VAL_EVERY = env_i("VAL_LOSS_EVERY", 4000)
LOG_EVERY = env_i("TRAIN_LOG_EVERY", 200)

MATRIX_LR = env_f("MATRIX_LR", 0.025)
EMBED_LR = env_f("TIED_EMBED_LR", 0.035)
TABLE_LR = env_f("TABLE_LR", 0.03)
SCALAR_LR = env_f("SCALAR_LR", 0.025)
MUON_MOM = env_f("MUON_MOMENTUM", 0.99)
MUON_MOM0 = env_f("MUON_MOMENTUM_START", 0.92)
MUON_MOM_STEPS = env_i("MUON_MOMENTUM_STEPS", 1500)
MUON_NS = env_i("MUON_NS_STEPS", 5)
MUON_WD = env_f("MUON_WD", 0.04)
ADAM_WD = env_f("ADAM_WD", 0.04)
BETAS = (env_f("BETA1", 0.9), env_f("BETA2", 0.95))
CLIP = env_f("GRAD_CLIP_NORM", 0.3)
EMA_DECAY = env_f("EMA_DECAY", 0.997)
QAT_AT = env_f("LATE_QAT_THRESHOLD", 0.15)

Q_MAX = env_i("Q_MAX", 31)  # int6, symmetric
CLIP_GRID = tuple(float(c) for c in env_s("CLIP_GRID", "1.0,0.97,0.94,0.91,0.88,0.85,0.82,0.79,0.76,0.73").split(","))
CALIB_BATCHES = env_i("CALIB_BATCHES", 8)
CALIB_SEQS = env_i("CALIB_SEQS", 16)
ZSTD_LEVEL = env_i("ZSTD_LEVEL", 22)
SIZE_CAP = 16_000_000

EVAL_SEQ = env_i("EVAL_SEQ_LEN", 2048)
STRIDE = env_i("EVAL_STRIDE", 64)
EVAL_BATCH = env_i("EVAL_BATCH_SEQS", 64)
EVAL_CAP_S = env_f("EVAL_SECONDS", 600.0)
EVAL_GUARD_S = env_f("EVAL_GUARD_SECONDS", 150.0)
TTT = env_b("TTT_ENABLED", True)
TTT_CHUNK = env_i("TTT_CHUNK_TOKENS", 65_536)
TTT_LR = env_f("TTT_LR", 0.002)
TTT_MOM = env_f("TTT_MOMENTUM", 0.9)
TTT_EPOCHS = env_i("TTT_EPOCHS", 3)
TTT_FREEZE = env_i("TTT_FREEZE_BLOCKS", 2)
TTT_CLIP = env_f("TTT_GRAD_CLIP", 1.0)
SELFTEST = env_b("SELFTEST", False)
KEEP_RAW = env_b("KEEP_RAW", False)
TTT_TRACE = env_b("TTT_TRACE", False)

# ---------------------------------------------------------------- ranks

RANK = env_i("RANK", 0)
WORLD = env_i("WORLD_SIZE", 1)
LOCAL = env_i("LOCAL_RANK", 0)
MAIN = RANK == 0
assert 8 % WORLD == 0, "WORLD_SIZE has to divide 8"
ACCUM = 8 // WORLD
DEV = torch.device("cuda", LOCAL)
torch.cuda.set_device(DEV)
if WORLD > 1:
    dist.init_process_group(backend="nccl", device_id=DEV)
torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.allow_tf32 = True
torch.set_float32_matmul_precision("high")

LOGFILE = Path("logs") / f"{RUN_ID}.txt"
CODE = Path(__file__).read_text(encoding="utf-8")


def say(msg: str, console: bool = True) -> None:
    if not MAIN:
        return
    if console:
        print(msg, flush=True)
    with LOGFILE.open("a", encoding="utf-8") as f:
        f.write(msg + "\n")


def open_log() -> None:
    if MAIN:
        LOGFILE.parent.mkdir(exist_ok=True)
        LOGFILE.write_text(CODE + "\n" + "=" * 100 + "\n", encoding="utf-8")
    barrier()


def seed_all(s: int) -> None:
    random.seed(s)
    np.random.seed(s)
    torch.manual_seed(s)
    torch.cuda.manual_seed_all(s)


def barrier() -> None:
    if WORLD > 1:
        dist.barrier()


def sum_(t: Tensor) -> Tensor:
    if WORLD > 1:
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return t


def mean_(t: Tensor) -> Tensor:
    if WORLD > 1:
        dist.all_reduce(t, op=dist.ReduceOp.AVG)
    return t


def slowest(seconds: float) -> float:
    """The largest of the ranks' clocks, so that every rank decides alike."""
    if WORLD == 1:
        return seconds
    t = torch.tensor([seconds], device=DEV, dtype=torch.float64)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


def mean_grads_(params: list[nn.Parameter]) -> None:
    """Averages grads over ranks through one flat buffer."""
    gs = [p.grad for p in params if p.grad is not None]
    if WORLD == 1 or not gs:
        return
    flat = mean_(torch.cat([g.reshape(-1) for g in gs]))
    for g, f in zip(gs, flat.split([g.numel() for g in gs])):
        g.copy_(f.view_as(g))


class Clock:
    """Wall clock that can be stopped while the held-out loss is logged."""

    def __init__(self):
        self.past, self.t0 = 0.0, None

    def go(self):
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()
        return self

    def stop(self):
        torch.cuda.synchronize()
        self.past += time.perf_counter() - self.t0
        self.t0 = None

    def s(self) -> float:
        return self.past + (time.perf_counter() - self.t0 if self.t0 is not None else 0.0)

    def ms(self) -> int:
        return round(1000 * self.s())


# ---------------------------------------------------------------- data

MAGIC, VERSION, HEAD_INTS = 20240520, 1, 256


def peek(path: str) -> int:
    head = np.fromfile(path, dtype="<i4", count=HEAD_INTS)
    assert head.size == HEAD_INTS and head[0] == MAGIC and head[1] == VERSION, f"bad shard {path}"
    return int(head[2])


def read_shard(path: str) -> Tensor:
    n = peek(path)
    toks = np.fromfile(path, dtype="<u2", count=n, offset=HEAD_INTS * 4)
    assert toks.size == n, f"short shard {path}"
    return torch.from_numpy(toks.astype(np.uint16, copy=False))


def shards(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    assert files, f"nothing matches {pattern}"
    return files


def read_val(pattern: str) -> Tensor:
    return torch.cat([read_shard(f) for f in shards(pattern)]).contiguous()


class Stream:
    """Endless tokens over the shards in order; the next shard is read by a thread."""

    def __init__(self, pattern: str):
        self.files = shards(pattern)
        self.i = 0
        self.q: queue.Queue = queue.Queue(maxsize=1)
        self.buf, self.pos = read_shard(self.files[0]), 0
        threading.Thread(target=self._ahead, daemon=True).start()

    def _ahead(self) -> None:
        while True:
            self.i = (self.i + 1) % len(self.files)
            self.q.put(read_shard(self.files[self.i]))

    def take(self, n: int) -> Tensor:
        out, need = [], n
        while need:
            k = min(need, self.buf.numel() - self.pos)
            if k <= 0:
                self.buf, self.pos = self.q.get(), 0
                continue
            out.append(self.buf[self.pos : self.pos + k])
            self.pos += k
            need -= k
        return out[0] if len(out) == 1 else torch.cat(out)


class Loader:
    """Every rank walks the same stream and keeps its own slice of each batch."""

    def __init__(self, pattern: str):
        self.stream = Stream(pattern)

    def next(self, seqs: int, seq: int) -> tuple[Tensor, Tensor]:
        span = seqs * seq + 1
        flat = self.stream.take(span * WORLD)
        mine = flat[RANK * span : (RANK + 1) * span].to(torch.int32).pin_memory().to(DEV, non_blocking=True)
        return mine[:-1].view(seqs, seq), mine[1:].long().view(seqs, seq)


SEQS_PER_MICRO = BATCH_TOKENS // (SEQ * WORLD * ACCUM)

# ---------------------------------------------------------------- bytes


class Bytes:
    """UTF-8 bytes of a target given the token before it, from the tokenizer's pieces."""

    def __init__(self, path: str):
        sp = spm.SentencePieceProcessor(model_file=path)
        n = sp.vocab_size()
        assert n == VOCAB, f"tokenizer has {n} pieces, VOCAB_SIZE is {VOCAB}"
        size, lead, edge = np.zeros(n, np.int32), np.zeros(n, bool), np.ones(n, bool)
        for i in range(n):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            edge[i] = False
            if sp.is_byte(i):
                size[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                lead[i] = True
                piece = piece[1:]
            size[i] = len(piece.encode("utf-8"))
        put = lambda a, dt: torch.tensor(a, dtype=dt, device=DEV)
        self.size, self.lead, self.edge = put(size, torch.int32), put(lead, torch.bool), put(edge, torch.bool)

    def __call__(self, prev: Tensor, tgt: Tensor) -> Tensor:
        return self.size[tgt] + (self.lead[tgt] & ~self.edge[prev]).int()


# ---------------------------------------------------------------- quantiser shared by QAT and export

QAT_ON = False


def set_qat(on: bool) -> None:
    global QAT_ON
    QAT_ON = on


row_amax = lambda w: w.abs().amax(-1, keepdim=True).clamp_min(1e-8)


def fake6(w: Tensor) -> Tensor:
    """Straight-through int6 with one scale per row."""
    with torch.no_grad():
        s = (row_amax(w) / Q_MAX).half().float()
        q = (w / s).round().clamp_(-Q_MAX, Q_MAX) * s
    return w + (q - w).detach()


# ---------------------------------------------------------------- model

rms = lambda x: F.rms_norm(x, (x.size(-1),))


class Lin(nn.Module):
    """Bias-free, fp32 master weight, cast at use."""

    def __init__(self, i: int, o: int, zero: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(o, i) if zero else torch.empty(o, i).normal_(std=0.5 * i**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        w = fake6(self.weight) if QAT_ON else self.weight
        return F.linear(x, w.to(x.dtype))


class Rope(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        f = ROPE_BASE ** (-torch.arange(0, ROPE_DIMS, 2).float() / ROPE_DIMS)
        a = torch.outer(torch.arange(n).float(), f)
        self.register_buffer("cos", a.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", a.sin()[None, :, None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = x.size(1)
        r, keep = x[..., :ROPE_DIMS], x[..., ROPE_DIMS:]
        a, b = r.float().chunk(2, -1)
        c, s = self.cos[:, :t], self.sin[:, :t]
        return torch.cat([(a * c + b * s).to(x.dtype), (b * c - a * s).to(x.dtype), keep], -1)


class Attn(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.win = SHORT_WIN - 1 if WIN_PATTERN[layer % len(WIN_PATTERN)] == "S" else -1
        self.q = Lin(DIM, DIM)
        self.kv = Lin(DIM, 2 * KV_DIM)
        self.o = Lin(DIM, DIM, zero=True)
        self.gain = nn.Parameter(torch.full((HEADS,), 1.5))
        self.ve_mix = nn.Parameter(torch.tensor([1.0, 0.5])) if layer in VE_LAYERS else None

    def forward(self, x: Tensor, rope: Rope, ve: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, HEAD_DIM)
        k, v = self.kv(x).view(b, t, 2, KV_HEADS, HEAD_DIM).unbind(2)
        if self.ve_mix is not None:
            m = self.ve_mix.to(v.dtype)
            v = m[0] * v + m[1] * ve.view_as(v)
        q, k = rope(rms(q)), rope(rms(k))
        q = q * self.gain.to(q.dtype)[:, None]
        y = fa3(q, k, v.contiguous(), causal=True, window_size=(self.win, 0 if self.win >= 0 else -1))
        y = y[0] if isinstance(y, tuple) else y
        return self.o(y.reshape(b, t, DIM))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Lin(DIM, MLP_DIM)
        self.down = Lin(MLP_DIM, DIM, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.attn, self.mlp = Attn(layer), Mlp()
        self.mix = nn.Parameter(torch.stack([torch.ones(DIM), torch.zeros(DIM)]))
        self.a_scale = nn.Parameter(torch.ones(DIM))
        self.m_scale = nn.Parameter(torch.ones(DIM))
        self.damp = (layer + 1) ** -0.5

    def forward(self, x: Tensor, x0: Tensor, rope: Rope, ve: Tensor | None) -> Tensor:
        m = self.mix.to(x.dtype)
        x = m[0] * x + m[1] * x0
        x = x + self.a_scale.to(x.dtype) * self.attn(rms(x) * self.damp, rope, ve)
        return x + self.m_scale.to(x.dtype) * self.mlp(rms(x) * self.damp)


class ValueEmbeds(nn.Module):
    """Token tables added to the values of some layers; layers take the tables in turn."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(VOCAB, VE_DIM) * 0.02) for _ in range(VE_TABLES))
        self.up = nn.ModuleList(Lin(VE_DIM, KV_DIM) for _ in range(VE_TABLES))

    def forward(self, ids: Tensor) -> list[Tensor | None]:
        made = [u(F.embedding(ids, t).bfloat16()) for t, u in zip(self.tables, self.up)]
        slot = {layer: made[n % VE_TABLES] for n, layer in enumerate(VE_LAYERS)}
        return [slot.get(i) for i in range(LAYERS)]


class Bigram(nn.Module):
    """Hashed (previous, current) table. A document's first token has no previous one."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(BG_ROWS, BG_DIM))
        self.up = Lin(BG_DIM, DIM)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def rows(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0), value=BOS)
        prev = torch.where(ids == BOS, BOS, prev)
        return ((36313 * ids) ^ (27191 * prev)) % BG_ROWS

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(F.embedding(self.rows(ids), self.table).bfloat16()) * self.scale.bfloat16()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Parameter(torch.randn(VOCAB, DIM) * 0.005)
        self.ve, self.bigram, self.rope = ValueEmbeds(), Bigram(), Rope(max(SEQ, EVAL_SEQ))
        self.blocks = nn.ModuleList(Block(i) for i in range(LAYERS))
        self.half = LAYERS // 2
        self.skips = nn.Parameter(torch.ones(self.half, DIM))

    def hidden(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.emb).bfloat16() + self.bigram(ids)
        x = x0 = rms(x)
        ve, stack = self.ve(ids), []
        for i, blk in enumerate(self.blocks):
            if i >= LAYERS - self.half:
                x = x + self.skips[LAYERS - 1 - i].to(x.dtype) * stack.pop()
            x = blk(x, x0, self.rope, ve[i])
            if i < self.half:
                stack.append(x)
        return rms(x)

    def logits(self, ids: Tensor) -> Tensor:
        z = F.linear(self.hidden(ids), self.emb.bfloat16())
        return SOFTCAP * torch.tanh(z.float() / SOFTCAP)

    def forward(self, ids: Tensor, tgt: Tensor | None = None) -> Tensor:
        z = self.logits(ids)
        return z if tgt is None else F.cross_entropy(z.view(-1, VOCAB), tgt.reshape(-1))


make_net = lambda: Net().to(DEV)
n_params = lambda net: sum(p.numel() for p in net.parameters())

# which optimizer, which storage
is_lin = lambda n, p: p.ndim == 2 and n.endswith(".weight")
is_table = lambda n, p: n == "emb" or "tables" in n or n.endswith(".table")
is_matrix = lambda n, p: is_lin(n, p) and n.startswith("blocks.")

# ---------------------------------------------------------------- muon, sharded

NS = (3.4445, -4.7750, 2.0315)


@torch.compile(dynamic=False)
def newton_schulz(g: Tensor) -> Tensor:
    """Batched quintic orthogonaliser; rows <= columns inside."""
    a, b, c = NS
    x = g.bfloat16()
    flip = x.size(-2) > x.size(-1)
    x = x.mT if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(MUON_NS):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if flip else x


class Bank:
    """Equal shapes in one stack, padded to a multiple of WORLD: each rank owns a slice of the stack."""

    def __init__(self, params: list[nn.Parameter]):
        self.ps = params
        self.shape = tuple(params[0].shape)
        self.n = -(-len(params) // WORLD) * WORLD
        self.own = self.n // WORLD
        self.grads = torch.zeros(self.n, *self.shape, device=DEV, dtype=torch.bfloat16)
        self.mine = torch.zeros(self.own, *self.shape, device=DEV, dtype=torch.bfloat16)
        self.mom = torch.zeros(self.own, *self.shape, device=DEV)
        self.full = torch.zeros_like(self.grads)
        self.boost = max(1.0, self.shape[0] / self.shape[1]) ** 0.5
        self.work = None

    def send(self) -> None:
        for i, p in enumerate(self.ps):
            self.grads[i].copy_(p.grad)
        if WORLD > 1:
            self.work = dist.reduce_scatter_tensor(self.mine, self.grads, op=dist.ReduceOp.AVG, async_op=True)
        else:
            self.mine.copy_(self.grads)

    def turn(self, mom: float) -> None:
        if self.work is not None:
            self.work.wait()
        g = self.mine.float()
        self.mom.lerp_(g, 1 - mom)
        u = newton_schulz(g.lerp(self.mom, mom))
        if WORLD > 1:
            self.work = dist.all_gather_into_tensor(self.full, u.contiguous(), async_op=True)
        else:
            self.full.copy_(u)

    def apply(self, lr: float, wd: float) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None
        torch._foreach_mul_(self.ps, 1 - lr * wd)
        torch._foreach_add_(self.ps, [self.full[i].float() for i in range(len(self.ps))], alpha=-lr * self.boost)


class Muon:
    def __init__(self, params: list[nn.Parameter]):
        shapes: dict[tuple, list] = {}
        for p in params:
            shapes.setdefault(tuple(p.shape), []).append(p)
        self.banks = [Bank(ps) for ps in shapes.values()]

    @torch.no_grad()
    def step(self, lr: float, mom: float) -> None:
        for b in self.banks:
            b.send()
        for b in self.banks:
            b.turn(mom)
        for b in self.banks:
            b.apply(lr, MUON_WD)

    def reset(self) -> None:
        for b in self.banks:
            b.mom.zero_()


class Optim:
    """Muon for the blocks' matrices, AdamW for everything else."""

    def __init__(self, net: Net):
        named = list(net.named_parameters())
        pick = lambda f: [p for n, p in named if f(n, p)]
        self.matrices = pick(is_matrix)
        emb = [net.emb]
        tabs = pick(lambda n, p: (is_table(n, p) and n != "emb") or (is_lin(n, p) and not is_matrix(n, p)))
        rest = pick(lambda n, p: not is_matrix(n, p) and not is_table(n, p) and not is_lin(n, p))
        self.small = emb + tabs + rest
        assert len(self.small) + len(self.matrices) == len(named)
        groups = [
            dict(params=emb, lr=EMBED_LR, base=EMBED_LR, weight_decay=ADAM_WD),
            dict(params=tabs, lr=TABLE_LR, base=TABLE_LR, weight_decay=ADAM_WD),
            dict(params=rest, lr=SCALAR_LR, base=SCALAR_LR, weight_decay=0.0),
        ]
        self.adam = torch.optim.AdamW(groups, betas=BETAS, eps=1e-8, fused=True)
        self.muon = Muon(self.matrices)

    def step(self, mul: float, step: int) -> None:
        mean_grads_(self.small)
        nn.utils.clip_grad_norm_(self.small, CLIP)
        for g in self.adam.param_groups:
            g["lr"] = g["base"] * mul
        self.adam.step()
        f = min(step / max(MUON_MOM_STEPS, 1), 1.0)
        self.muon.step(MATRIX_LR * mul, MUON_MOM0 + f * (MUON_MOM - MUON_MOM0))

    def zero(self) -> None:
        for p in self.small + self.matrices:
            p.grad = None

    def reset(self) -> None:
        self.adam.state.clear()
        self.muon.reset()


# ---------------------------------------------------------------- averaging


class Ema:
    def __init__(self, net: Net):
        self.ps = list(net.parameters())
        self.avg = [p.detach().clone() for p in self.ps]

    @torch.no_grad()
    def tick(self, step: int) -> None:
        d = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.avg, self.ps, 1 - d)

    @torch.no_grad()
    def load(self) -> None:
        torch._foreach_copy_(self.ps, self.avg)


# ---------------------------------------------------------------- calibration: second moments of each matrix's input


@contextlib.contextmanager
def watching(net: Net, seen: dict[str, Tensor]):
    def hook(name):
        def f(mod, args):
            x = args[0].detach().float()
            seen[name] += x.reshape(-1, x.size(-1)).square().sum(0)

        return f

    hs = []
    for name, mod in net.named_modules():
        if isinstance(mod, Lin):
            seen[name + ".weight"] = torch.zeros(mod.weight.size(1), device=DEV)
            hs.append(mod.register_forward_pre_hook(hook(name + ".weight")))
    try:
        yield
    finally:
        for h in hs:
            h.remove()


@torch.no_grad()
def calibrate(net: Net, loader: Loader) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with watching(net, seen):
        for _ in range(CALIB_BATCHES):
            x, _ = loader.next(CALIB_SEQS, SEQ)
            net(x)
    rows = CALIB_BATCHES * CALIB_SEQS * SEQ * WORLD
    return {n: sum_(h) / rows for n, h in seen.items()}


# ---------------------------------------------------------------- int6 / int8 per row


def to_rows(w: Tensor, qmax: int, ratio: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    s = (row_amax(w) * ratio / qmax).half().float().clamp_min(6e-8)
    return (w / s).round().clamp_(-qmax, qmax), s


def best_rows(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor, float]:
    """Per row the clip of CLIP_GRID with the least error weighted by the inputs' second moments."""
    best_q, best_s, best_e = None, None, None
    for c in CLIP_GRID:
        q, s = to_rows(w, Q_MAX, c)
        e = ((w - q * s).square() * h).sum(-1, keepdim=True)
        if best_e is None:
            best_q, best_s, best_e = q, s, e
            continue
        better = e < best_e
        best_q, best_s, best_e = (torch.where(better, a, b) for a, b in ((q, best_q), (s, best_s), (e, best_e)))
    rel = best_e.sum() / (w.square() * h).sum().clamp_min(1e-12)
    return best_q, best_s, rel.item()


def quantise(net: Net, moments: dict[str, Tensor]) -> list[tuple[str, str, np.ndarray, np.ndarray | None]]:
    """(name, kind, codes, scales) of every parameter: r6 matrices, r8 tables, f2 small ones."""
    out, worst = [], ("", 0.0)
    for n, p in net.named_parameters():
        w = p.detach().float()
        if is_lin(n, p):
            q, s, rel = best_rows(w, moments[n])
            worst = max(worst, (n, rel), key=lambda t: t[1])
            out.append((n, "r6", q.to(torch.int8).cpu().numpy(), s.half().squeeze(-1).cpu().numpy()))
        elif is_table(n, p):
            q, s = to_rows(w, 127)
            out.append((n, "r8", q.to(torch.int8).cpu().numpy(), s.half().squeeze(-1).cpu().numpy()))
        else:
            out.append((n, "f2", w.half().cpu().numpy(), None))
    say(f"int6: worst relative error {worst[1]:.5f} at {worst[0]}")
    return out


# ---------------------------------------------------------------- the packed file

TAG = b"TNR1"
squeeze = lambda raw: zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(raw)
unsqueeze = lambda raw: zstandard.ZstdDecompressor().decompress(raw)


def layouts(codes: np.ndarray, kind: str) -> dict[str, bytes]:
    """Byte orders of one tensor that the packer tries: by rows, or by columns."""
    if kind == "f2":
        return {"r": codes.tobytes()}
    return {"r": codes.tobytes(), "c": np.ascontiguousarray(codes.T).tobytes()}


def pick_layout(codes: np.ndarray, kind: str) -> tuple[str, bytes]:
    ways = layouts(codes, kind)
    if len(ways) == 1:
        return next(iter(ways.items()))
    quick = zstandard.ZstdCompressor(level=3)
    return min(ways.items(), key=lambda kv: len(quick.compress(kv[1])))


def pack(items) -> bytes:
    head, codes_part, scale_part = [], [], []
    for n, kind, codes, scales in sorted(items, key=lambda it: (it[1], it[2].shape, it[0])):
        way, raw = pick_layout(codes, kind)
        head.append([n, kind, list(codes.shape), way])
        codes_part.append(raw)
        if scales is not None:
            scale_part.append(scales.tobytes())
    meta = json.dumps(head, separators=(",", ":")).encode()
    raw = struct.pack("<I", len(meta)) + meta + b"".join(codes_part) + b"".join(scale_part)
    return TAG + squeeze(raw)


def unpack(blob: bytes) -> dict[str, Tensor]:
    assert blob[:4] == TAG, "not a tanera file"
    raw = unsqueeze(blob[4:])
    k = struct.unpack_from("<I", raw)[0]
    head, at = json.loads(raw[4 : 4 + k]), 4 + k
    codes = []
    for n, kind, shape, way in head:
        dt = np.float16 if kind == "f2" else np.int8
        cnt = math.prod(shape)
        a = np.frombuffer(raw, dt, cnt, at)
        at += cnt * a.itemsize
        codes.append(a.reshape(shape) if way == "r" else a.reshape(shape[::-1]).T)
    out = {}
    for (n, kind, shape, _), a in zip(head, codes):
        w = torch.from_numpy(np.ascontiguousarray(a)).float()
        if kind != "f2":
            s = np.frombuffer(raw, np.float16, shape[0], at)
            at += 2 * shape[0]
            w = w * torch.from_numpy(s.copy()).float()[:, None]
        out[n] = w
    assert at == len(raw), "trailing bytes"
    return out


def export(net: Net, moments: dict[str, Tensor]) -> None:
    """Rank 0 writes the file; its size and the code's are what counts."""
    if MAIN:
        blob = pack(quantise(net, moments))
        Path(ARTIFACT).write_bytes(blob)
        code = len(CODE.encode("utf-8"))
        total = len(blob) + code
        say(f"model bytes (int6+zstd{ZSTD_LEVEL}): {len(blob)}")
        say(f"code bytes: {code}")
        say(f"total submission size: {total} bytes, {SIZE_CAP - total} to spare")
        assert total <= SIZE_CAP, f"too large: {total}"
    barrier()


def restore() -> Net:
    net = make_net()
    got = unpack(Path(ARTIFACT).read_bytes())
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.copy_(got.pop(n).view_as(p))
    assert not got, f"left over: {list(got)}"
    return net


# ---------------------------------------------------------------- scoring


class Ledger:
    """Sums of nats, tokens and bytes of this rank; closed once over all ranks."""

    def __init__(self, tab: Bytes):
        self.tab = tab
        self.sums = torch.zeros(3, device=DEV, dtype=torch.float64)

    def add(self, nll: Tensor, prev: Tensor, tgt: Tensor) -> None:
        self.sums[0] += nll.double().sum()
        self.sums[1] += tgt.numel()
        self.sums[2] += self.tab(prev, tgt).sum().double()

    def running(self) -> float:
        t = sum_(self.sums.clone())
        return (t[0] / math.log(2) / t[2].clamp_min(1)).item()

    def close(self, expect: int) -> tuple[float, float]:
        nats, toks, nbytes = sum_(self.sums.clone()).tolist()
        assert round(toks) == expect, f"scored {toks:.0f} of {expect} tokens"
        return nats / toks, nats / math.log(2) / nbytes


def spans(lo: int, hi: int, stride: int) -> list[tuple[int, int, int]]:
    """(start of the window, first scored, end): targets lo..hi in steps of stride, each in one window only."""
    return [(max(0, min(b + stride, hi) - EVAL_SEQ), b, min(b + stride, hi)) for b in range(lo, hi, stride)]


def fill(part, val: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.zeros(EVAL_BATCH, EVAL_SEQ, dtype=torch.int32, device=DEV)
    y = torch.zeros(EVAL_BATCH, EVAL_SEQ, dtype=torch.int64, device=DEV)
    m = torch.zeros(EVAL_BATCH, EVAL_SEQ, dtype=torch.bool, device=DEV)
    for r, (s, b, e) in enumerate(part):
        x[r, : e - s] = val[s:e]
        y[r, : e - s] = val[s + 1 : e + 1]
        m[r, b - s : e - s] = True
    return x, y, m


nll_of = lambda z, y: F.cross_entropy(z.view(-1, VOCAB), y.view(-1), reduction="none").view_as(y)


@torch.no_grad()
def score(fast, val: Tensor, lo: int, hi: int, stride: int, led: Ledger) -> None:
    mine = spans(lo, hi, stride)[RANK::WORLD]
    for k in range(0, len(mine), EVAL_BATCH):
        x, y, m = fill(mine[k : k + EVAL_BATCH], val)
        nll = nll_of(fast(x), y)
        led.add(nll[m], x[m].long(), y[m])


def score_all(fast, val: Tensor, stride: int, tab: Bytes) -> tuple[float, float]:
    led, n = Ledger(tab), val.numel() - 1
    score(fast, val, 0, n, stride, led)
    return led.close(n)


# ---------------------------------------------------------------- test-time training: a chunk is scored, then learnt

cosine = lambda c, n: 0.5 * (1 + math.cos(math.pi * c / max(n, 1)))
TTT_ROWS = WORLD * ACCUM  # sequences per SGD step, over all ranks


def ttt_params(net: Net) -> list[nn.Parameter]:
    """All but the token tables and the lowest blocks."""
    frozen = tuple(f"blocks.{i}." for i in range(TTT_FREEZE))
    keep = lambda n, p: not is_table(n, p) and not n.startswith(frozen)
    ps = []
    for n, p in net.named_parameters():
        p.requires_grad_(keep(n, p))
        if p.requires_grad:
            ps.append(p)
    return ps


def adapt(fast, ps: list[nn.Parameter], opt: torch.optim.Optimizer, toks: Tensor, lr: float) -> None:
    """TTT_EPOCHS of SGD on tokens that are already in the ledger."""
    n = (toks.numel() - 1) // EVAL_SEQ
    if n == 0:
        return
    x = toks[: n * EVAL_SEQ].view(n, EVAL_SEQ)
    y = toks[1 : n * EVAL_SEQ + 1].long().view(n, EVAL_SEQ)
    for g in opt.param_groups:
        g["lr"] = lr
    for _ in range(TTT_EPOCHS):
        for i in range(0, n, TTT_ROWS):
            live = min(TTT_ROWS, n - i)
            for p in ps:
                p.grad = torch.zeros_like(p)
            for r in range(i + RANK, i + live, WORLD):
                (fast(x[r : r + 1], y[r : r + 1]) * (WORLD / live)).backward()
            mean_grads_(ps)
            nn.utils.clip_grad_norm_(ps, TTT_CLIP)
            opt.step()


def ttt_score(net: Net, fast, val: Tensor, tab: Bytes, clock: Clock) -> tuple[float, float]:
    n = val.numel() - 1
    chunks = -(-n // TTT_CHUNK)
    ps = ttt_params(net)
    opt = torch.optim.SGD(ps, lr=TTT_LR, momentum=TTT_MOM)
    led, learning, trace = Ledger(tab), True, []
    say(f"ttt: {chunks} chunks of {TTT_CHUNK}, {sum(p.numel() for p in ps)} parameters, epochs {TTT_EPOCHS}")
    for c in range(chunks):
        lo, hi = c * TTT_CHUNK, min((c + 1) * TTT_CHUNK, n)
        score(fast, val, lo, hi, STRIDE, led)
        if learning and slowest(clock.s()) > EVAL_CAP_S - EVAL_GUARD_S:
            learning = False
            say(f"ttt: out of time at chunk {c}, the rest is only scored")
        if learning and c + 1 < chunks:
            adapt(fast, ps, opt, val[lo : hi + 1], TTT_LR * cosine(c, chunks))
        if c % 50 == 0 or c + 1 == chunks:
            trace.append((c, tell(led, c, chunks, clock)))
    if MAIN and TTT_TRACE:
        LOGFILE.with_suffix(".trace.json").write_text(json.dumps(trace), encoding="utf-8")
    return led.close(n)


def tell(led: Ledger, c: int, chunks: int, clock: Clock) -> float:
    bpb = led.running()  # a collective: every rank has to call it
    say(f"ttt: chunk {c + 1}/{chunks} running_bpb:{bpb:.6f} time:{clock.ms()}ms")
    return bpb


# ---------------------------------------------------------------- training


def lr_mul(frac: float) -> float:
    """Flat, then linear to the floor over the last WARMDOWN of the budget."""
    return 1.0 if frac < 1 - WARMDOWN else max((1 - frac) / WARMDOWN, 0.0) * (1 - LR_FLOOR) + LR_FLOOR


def micro_steps(fast, loader: Loader) -> Tensor:
    total = torch.zeros((), device=DEV)
    for _ in range(ACCUM):
        x, y = loader.next(SEQS_PER_MICRO, SEQ)
        loss = fast(x, y)
        (loss / ACCUM).backward()
        total += loss.detach() / ACCUM
    return total


def warm_up(net: Net, fast, opt: Optim) -> None:
    """Compiles both graphs (QAT off and on) and puts weights and optimizer back as they were."""
    if WARMUP_STEPS <= 0:
        return
    kept = copy.deepcopy(net.state_dict())
    loader = Loader(TRAIN_FILES)
    for i in range(WARMUP_STEPS):
        set_qat(i % 2 == 1)
        micro_steps(fast, loader)
        opt.step(1.0, i)
        opt.zero()
        if i < 2 or i + 1 == WARMUP_STEPS:
            say(f"warmup_step:{i + 1}/{WARMUP_STEPS}")
    set_qat(False)
    net.load_state_dict(kept)
    opt.reset()


def train(net: Net, fast, opt: Optim, loader: Loader, val: Tensor, tab: Bytes) -> Clock:
    """Steps until the budget is spent, loads the average; the clock keeps running for the export."""
    ema, budget, step = Ema(net), CAP_S - RESERVE_S, 0
    barrier()
    clock = Clock().go()
    while True:
        t = slowest(clock.s())
        done = step >= MAX_STEPS or t >= budget
        if VAL_EVERY and (done or step % VAL_EVERY == 0):
            clock.stop()
            loss, bpb = score_all(fast, val, EVAL_SEQ, tab)
            say(f"step:{step}/{MAX_STEPS} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{clock.ms()}ms")
            clock.go()
        if done:
            break
        mul = lr_mul(max(t / budget, step / MAX_STEPS))
        if mul < QAT_AT and not QAT_ON:
            set_qat(True)
            say(f"late qat on at step {step}, lr x{mul:.3f}")
        loss = micro_steps(fast, loader)
        opt.step(mul, step)
        opt.zero()
        ema.tick(step)
        step += 1
        if step <= 5 or step % LOG_EVERY == 0:
            ms = clock.ms()
            say(f"step:{step}/{MAX_STEPS} train_loss:{loss.item():.4f} train_time:{ms}ms avg:{ms / step:.2f}ms")
    set_qat(False)
    say(f"stopped at step {step}, train_time:{clock.ms()}ms, ema {EMA_DECAY} loaded")
    ema.load()
    return clock


# ---------------------------------------------------------------- reports, off the score


def by_kind(net: Net) -> str:
    tot: dict[str, int] = {}
    for n, p in net.named_parameters():
        k = "matrix" if is_matrix(n, p) else "table" if is_table(n, p) else "proj" if is_lin(n, p) else "scalar"
        tot[k] = tot.get(k, 0) + p.numel()
    return " ".join(f"{k}:{v}" for k, v in sorted(tot.items()))


def smi() -> None:
    try:
        out = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        out = "no nvidia-smi"
    say(out, console=False)


def keep_raw(net: Net) -> None:
    """KEEP_RAW=1: the averaged fp32 weights, for looking at; nothing reads them."""
    if MAIN and KEEP_RAW:
        torch.save(net.state_dict(), LOGFILE.with_suffix(".pt"))


def self_test() -> None:
    """SELFTEST=1: quick checks of the parts that a slip would hide in. Runs before anything else, then exits."""
    seen = [0] * 10_000
    for lo in range(0, 10_000, 4096):
        for s, b, e in spans(lo, min(lo + 4096, 10_000), STRIDE):
            assert 0 <= s <= b < e and e - s <= EVAL_SEQ
            for t in range(b, e):
                seen[t] += 1
    assert set(seen) == {1}, "spans do not tile the targets"
    w = torch.randn(64, 128, device=DEV)
    q, s, _ = best_rows(w, torch.rand(128, device=DEV))
    assert q.abs().max() <= Q_MAX and (w - q * s).norm() < 0.05 * w.norm()
    items = [
        ("a", "r6", q.to(torch.int8).cpu().numpy(), s.half().squeeze(-1).cpu().numpy()),
        ("b", "f2", np.arange(7, dtype=np.float16), None),
    ]
    back = unpack(pack(items))
    assert torch.equal(back["a"], (q * s).cpu()) and back["b"].tolist() == list(range(7))
    u = newton_schulz(torch.randn(2, 64, 128, device=DEV)).float()
    sv = torch.linalg.svdvals(u)
    assert 0.5 < sv.min() and sv.max() < 1.5, "newton-schulz is off"
    net = make_net()
    ids = torch.randint(2, VOCAB, (1, 512), dtype=torch.int32, device=DEV)
    with torch.no_grad():
        a = net(ids)
        ids2 = ids.clone()
        ids2[:, 300:] = (ids2[:, 300:] + 1) % VOCAB
        b = net(ids2)
    assert torch.allclose(a[:, :300], b[:, :300], atol=1e-3), "the future leaks"
    print("selftest ok")


# ---------------------------------------------------------------- main


def announce(net: Net, val: Tensor) -> None:
    say(f"python {sys.version.split()[0]} torch {torch.__version__} world {WORLD} accum {ACCUM} seed {SEED}")
    say(f"train shards {len(shards(TRAIN_FILES))} val tokens {val.numel()} vocab {VOCAB}")
    say(f"parameters {n_params(net)} {by_kind(net)}")
    say(f"windows {WIN_PATTERN} short {SHORT_WIN} ve layers {VE_LAYERS} seqs/micro {SEQS_PER_MICRO}")


def evaluate(val: Tensor, tab: Bytes) -> None:
    """From the packed file to the reported number."""
    barrier()
    clock = Clock().go()
    net = restore()
    fast = torch.compile(net, dynamic=False)
    loss, bpb = score_all(fast, val, EVAL_SEQ, tab)
    say(f"roundtrip_int6 val_loss:{loss:.6f} val_bpb:{bpb:.6f} eval_time:{clock.ms()}ms")
    if TTT:
        loss, bpb = ttt_score(net, fast, val, tab, clock)
    else:
        loss, bpb = score_all(fast, val, STRIDE, tab)
    spent = slowest(clock.s())
    say(f"eval_time:{1000 * spent:.0f}ms of {1000 * EVAL_CAP_S:.0f}ms")
    say(f"final_int6 val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main() -> None:
    if SELFTEST:
        self_test()
        return
    open_log()
    seed_all(SEED)
    torch._dynamo.config.cache_size_limit = 64
    tab = Bytes(TOKENIZER_PATH)
    val = read_val(VAL_FILES).to(torch.int32).to(DEV)
    net = make_net()
    fast = torch.compile(net, dynamic=False)
    opt = Optim(net)
    announce(net, val)
    smi()
    warm_up(net, fast, opt)
    say(f"boot+compile {time.perf_counter() - T_BOOT:.1f}s")
    loader = Loader(TRAIN_FILES)
    clock = train(net, fast, opt, loader, val, tab)
    keep_raw(net)
    moments = calibrate(net, loader)
    export(net, moments)
    clock.stop()
    spent = slowest(clock.s())
    say(f"train+calibration+export: {1000 * spent:.0f}ms of {1000 * CAP_S:.0f}ms")
    assert spent <= CAP_S, "over the training cap"
    say(f"peak memory {torch.cuda.max_memory_allocated() >> 20} MiB")
    del loader, opt, fast, net, moments
    torch.cuda.empty_cache()
    evaluate(val, tab)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
