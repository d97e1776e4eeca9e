"""flotta: 11L/512d with depth recurrence, Muon, EMA, GPTQ int6/int7 + brotli, score-first TTT,
a token-only n-gram hint channel and an entropy-adaptive temperature.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Everything that runs is in this file. Settings are the fields of `Hyper`; each can be set by an environment
variable of the same name in capitals (SEED=42 torchrun ...).
"""

from __future__ import annotations

import glob
import hashlib
import io
import math
import os
import random
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numba import njit
from torch import Tensor, nn

torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.allow_tf32 = True
torch._dynamo.config.cache_size_limit = 64

# ------------------------------------------------------------------------------------------------
# settings
# ------------------------------------------------------------------------------------------------


def env(name: str, default):
    """The environment's value for a field, in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.lower() not in ("", "0", "false", "no")
    return type(default)(raw)


@dataclass
class Hyper:
    # run
    seed: int = env("SEED", 1337)
    run_id: str = env("RUN_ID", "flotta")
    data_dir: str = env("DATA_DIR", "./data/datasets/fineweb10B_sp8192")
    tokenizer: str = env("TOKENIZER", "./data/tokenizers/fineweb_8192_bpe.model")
    artifact: str = env("ARTIFACT", "final_model.flt")
    size_limit: int = env("SIZE_LIMIT", 16_000_000)

    # shape
    vocab: int = env("VOCAB", 8192)
    layers: int = env("LAYERS", 11)
    dim: int = env("DIM", 512)
    heads: int = env("HEADS", 8)
    kv_heads: int = env("KV_HEADS", 4)
    mlp_hidden: int = env("MLP_HIDDEN", 1920)
    rope_dims: int = env("ROPE_DIMS", 16)
    rope_base: float = env("ROPE_BASE", 10000.0)
    qk_gain: float = env("QK_GAIN", 5.0)
    softcap: float = env("SOFTCAP", 30.0)
    xsa_from: int = env("XSA_FROM", 0)
    smear: bool = env("SMEAR", True)
    smear_dims: int = env("SMEAR_DIMS", 12)
    bos: int = env("BOS", 1)

    # depth recurrence: layers loop_lo..loop_hi are run `loops` extra times
    loop_lo: int = env("LOOP_LO", 3)
    loop_hi: int = env("LOOP_HI", 5)
    loops: int = env("LOOPS", 2)
    loop_at: float = env("LOOP_AT", 0.35)

    # training
    seq: int = env("SEQ", 2048)
    batch_tokens: int = env("BATCH_TOKENS", 786_432)
    iterations: int = env("ITERATIONS", 20_000)
    max_wallclock_s: float = env("MAX_WALLCLOCK_S", 600.0)
    gptq_reserve_s: float = env("GPTQ_RESERVE_S", 26.0)
    gptq_solve_s: float = env("GPTQ_SOLVE_S", 16.0)
    warm_steps: int = env("WARM_STEPS", 12)
    lr_warmup: int = env("LR_WARMUP", 20)
    warmdown: float = env("WARMDOWN", 0.70)
    min_lr: float = env("MIN_LR", 0.02)
    matrix_lr: float = env("MATRIX_LR", 0.022)
    embed_lr: float = env("EMBED_LR", 0.03)
    scalar_lr: float = env("SCALAR_LR", 0.02)
    matrix_wd: float = env("MATRIX_WD", 0.09)
    embed_wd: float = env("EMBED_WD", 0.085)
    scalar_wd: float = env("SCALAR_WD", 0.02)
    momentum: float = env("MOMENTUM", 0.97)
    momentum_lo: float = env("MOMENTUM_LO", 0.92)
    momentum_steps: int = env("MOMENTUM_STEPS", 1500)
    ns_steps: int = env("NS_STEPS", 5)
    beta1: float = env("BETA1", 0.9)
    beta2: float = env("BETA2", 0.95)
    grad_clip: float = env("GRAD_CLIP", 0.3)
    ema: float = env("EMA", 0.9965)
    log_every: int = env("LOG_EVERY", 200)
    val_every: int = env("VAL_EVERY", 0)

    # quantisation
    calib_batches: int = env("CALIB_BATCHES", 64)
    calib_rows: int = env("CALIB_ROWS", 8)
    gptq_damp: float = env("GPTQ_DAMP", 0.01)
    gptq_block: int = env("GPTQ_BLOCK", 128)
    clip_matrix: float = env("CLIP_MATRIX", 12.85)
    clip_embed: float = env("CLIP_EMBED", 17.0)

    # evaluation
    stride: int = env("STRIDE", 64)
    eval_rows: int = env("EVAL_ROWS", 64)
    eval_budget_s: float = env("EVAL_BUDGET_S", 480.0)
    diag_plain: bool = env("DIAG_PLAIN", True)
    ttt: bool = env("TTT", True)
    ttt_chunk: int = env("TTT_CHUNK", 32_768)
    ttt_epochs: int = env("TTT_EPOCHS", 3)
    ttt_lr: float = env("TTT_LR", 0.005)
    ttt_momentum: float = env("TTT_MOMENTUM", 0.9)
    ttt_rows: int = env("TTT_ROWS", 2)
    ttt_clip: float = env("TTT_CLIP", 1.0)

    # entropy-adaptive temperature. Slope and pivot were fitted on the last train shard in January.
    temp_slope: float = env("TEMP_SLOPE", 0.06)
    temp_pivot: float = env("TEMP_PIVOT", 0.28)
    temp_lo: float = env("TEMP_LO", 0.94)
    temp_hi: float = env("TEMP_HI", 1.04)

    # hints
    tilt: bool = env("TILT", True)
    hint_bits: int = env("HINT_BITS", 22)
    hint_min: int = env("HINT_MIN", 1)
    tilt_gain: float = env("TILT_GAIN", 0.62)
    tilt_shift: float = env("TILT_SHIFT", 0.35)
    tilt_max: float = env("TILT_MAX", 3.2)

    # switches for looking at things, all off
    selftest: bool = env("SELFTEST", False)

    @property
    def train_glob(self) -> str:
        return f"{self.data_dir}/fineweb_train_*.bin"

    @property
    def val_glob(self) -> str:
        return f"{self.data_dir}/fineweb_val_*.bin"

    def check(self) -> None:
        assert self.dim % self.heads == 0 and self.heads % self.kv_heads == 0
        assert self.rope_dims % 2 == 0 and self.rope_dims <= self.dim // self.heads
        assert 0 <= self.loop_lo <= self.loop_hi < self.layers
        assert self.ttt_chunk % self.seq == 0 and self.seq % self.stride == 0
        assert self.gptq_solve_s < self.gptq_reserve_s < self.max_wallclock_s


# ------------------------------------------------------------------------------------------------
# ranks, clock, log
# ------------------------------------------------------------------------------------------------


@dataclass
class World:
    rank: int
    size: int
    local: int
    device: torch.device

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum_(self, t: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one: ranks must leave a loop together."""
        if self.size == 1:
            return flag
        t = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item() > 0)

    def from_lead(self, value: float) -> float:
        """Rank 0's value, for what all ranks must agree on to the last bit."""
        if self.size == 1:
            return value
        t = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(t, src=0)
        return t.item()


def join_world() -> World:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed")
    if 8 % size:
        raise SystemExit(f"world size {size} does not divide 8")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl", device_id=device)
        dist.barrier()
    return World(rank, size, local, device)


class Stopwatch:
    """Seconds since start(), less what lay between pause() and resume()."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.held = 0.0
        self.paused_at: float | None = None

    def start(self) -> Stopwatch:
        torch.cuda.synchronize()
        self.begun, self.held, self.paused_at = time.perf_counter(), 0.0, None
        return self

    def pause(self) -> None:
        torch.cuda.synchronize()
        self.paused_at = time.perf_counter()

    def resume(self) -> None:
        torch.cuda.synchronize()
        assert self.paused_at is not None
        self.held += time.perf_counter() - self.paused_at
        self.paused_at = None

    def seconds(self) -> float:
        torch.cuda.synchronize()
        end = time.perf_counter() if self.paused_at is None else self.paused_at
        return end - self.begun - self.held


class Log:
    """Prints on the lead rank and keeps a copy under logs/."""

    def __init__(self, world: World, run_id: str, seed: int) -> None:
        self.lead = world.lead
        self.path = Path("logs") / f"{run_id}_seed{seed}_{uuid.uuid4().hex[:6]}.txt"
        if self.lead:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, text: str, show: bool = True) -> None:
        if not self.lead:
            return
        if show:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(text + "\n")


def log_header(log: Log, h: Hyper, world: World) -> None:
    code = Path(__file__).read_bytes()
    log(code.decode("utf-8", "replace"), show=False)
    log("=" * 100, show=False)
    log(f"python {sys.version.split()[0]} torch {torch.__version__} numpy {np.__version__}")
    log(f"code_sha256:{hashlib.sha256(code).hexdigest()} world:{world.size} seed:{h.seed}")
    for key, value in asdict(h).items():
        log(f"  {key}: {value}", show=False)
    try:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout
        log(smi, show=False)
    except (OSError, subprocess.TimeoutExpired):
        pass


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


# ------------------------------------------------------------------------------------------------
# tokens and their bytes
# ------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_INTS = 20240520, 1, 256


def shard_length(path: str) -> int:
    head = np.fromfile(path, dtype="<i4", count=SHARD_INTS)
    if head.size != SHARD_INTS or head[0] != SHARD_MAGIC or head[1] != SHARD_VERSION:
        raise ValueError(f"{path} is not a token shard")
    return int(head[2])


def shard_view(path: str) -> np.ndarray:
    """The tokens of one shard, mapped, not read."""
    n = shard_length(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_INTS * 4, shape=(n,))


def read_val(pattern: str) -> np.ndarray:
    """All validation tokens in file order, nothing cut off at the end."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(pattern)
    return np.concatenate([np.asarray(shard_view(f)) for f in files])


class TrainLoader:
    """Rows of seq + 1 tokens in random order: shards are shuffled, each is cut at a random phase and its
    rows are shuffled. All ranks draw the same list and copy only every world-th row of it."""

    def __init__(self, pattern: str, seq: int, world: World, seed: int) -> None:
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(pattern)
        self.seq, self.world = seq, world
        self.rng = np.random.default_rng(seed)
        self.queue: list[int] = []
        self.view: np.ndarray | None = None
        self.starts = np.zeros(0, dtype=np.int64)
        self.at = 0

    def _next_shard(self) -> None:
        if not self.queue:
            self.queue = self.rng.permutation(len(self.files)).tolist()
        self.view = shard_view(self.files[self.queue.pop()])
        phase = int(self.rng.integers(0, self.seq))
        rows = max(0, (len(self.view) - 1 - phase) // self.seq)
        self.starts = phase + self.seq * self.rng.permutation(rows).astype(np.int64)
        self.at = 0

    def batch(self, rows_per_rank: int) -> tuple[Tensor, Tensor]:
        need = rows_per_rank * self.world.size
        picked: list[tuple[np.ndarray, int]] = []
        while len(picked) < need:
            if self.view is None or self.at >= len(self.starts):
                self._next_shard()
                continue
            take = self.starts[self.at : self.at + need - len(picked)]
            picked += [(self.view, int(s)) for s in take]
            self.at += len(take)
        mine = picked[self.world.rank :: self.world.size]
        rows = np.stack([view[s : s + self.seq + 1] for view, s in mine]).astype(np.int64)
        both = torch.from_numpy(rows).pin_memory().to(self.world.device, non_blocking=True)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


@dataclass
class ByteTables:
    """What a token adds to the text, in bytes of UTF-8: its own bytes, and one more for a leading space unless the
    token before it is a control token (the decoder drops the space there)."""

    own: Tensor
    space: Tensor
    control: Tensor

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        return self.own[target] + (self.space[target] & ~self.control[prev]).to(self.own.dtype)


def byte_tables(sp: spm.SentencePieceProcessor, vocab: int, device: torch.device) -> ByteTables:
    size = max(vocab, sp.vocab_size())
    own = np.zeros(size, dtype=np.int32)
    space = np.zeros(size, dtype=bool)
    control = np.ones(size, dtype=bool)
    for i in range(sp.vocab_size()):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        control[i] = False
        if sp.is_byte(i):
            own[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            space[i] = True
            piece = piece[1:]
        own[i] = len(piece.encode("utf-8"))
    return ByteTables(
        torch.from_numpy(own).to(device), torch.from_numpy(space).to(device), torch.from_numpy(control).to(device)
    )


@dataclass
class Tally:
    """Sums over scored targets: nats, targets, bytes. float64, summed over ranks once at the end."""

    sums: Tensor

    @classmethod
    def fresh(cls, device: torch.device) -> Tally:
        return cls(torch.zeros(3, dtype=torch.float64, device=device))

    def add(self, nll: Tensor, nbytes: Tensor) -> None:
        self.sums[0] += nll.double().sum()
        self.sums[1] += nll.numel()
        self.sums[2] += nbytes.double().sum()

    def result(self, world: World) -> Score:
        nats, count, nbytes = world.sum_(self.sums.clone()).tolist()
        return Score(nats / count, nats / math.log(2.0) / nbytes, int(count), int(nbytes))


@dataclass
class Score:
    loss: float
    bpb: float
    tokens: int
    nbytes: int

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f} tokens:{self.tokens} bytes:{self.nbytes}"


# ------------------------------------------------------------------------------------------------
# model
# ------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Dense(nn.Linear):
    """A linear map without bias; float32 weights, cast to the type of its input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Rotary positions on the first `dims` of each head."""

    def __init__(self, dims: int, base: float, length: int) -> None:
        super().__init__()
        self.dims = dims
        freq = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angle = torch.outer(torch.arange(length, dtype=torch.float32), freq)
        self.register_buffer("cos", angle.cos()[None, None], persistent=False)
        self.register_buffer("sin", angle.sin()[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length, half = x.size(2), self.dims // 2
        cos, sin = self.cos[:, :, :length].to(x.dtype), self.sin[:, :, :length].to(x.dtype)
        a, b, rest = x[..., :half], x[..., half : self.dims], x[..., self.dims :]
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, h: Hyper, rotary: Rotary, exclusive: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = h.heads, h.kv_heads, h.dim // h.heads
        self.exclusive = exclusive
        self.rotary = rotary
        self.q = Dense(h.dim, h.dim)
        self.k = Dense(h.dim, self.kv_heads * self.head)
        self.v = Dense(h.dim, self.kv_heads * self.head)
        self.o = Dense(h.dim, h.dim)
        self.gain = nn.Parameter(torch.full((h.heads,), h.qk_gain))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.size(0), x.size(1), heads, self.head).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = self.rotary(norm(self._split(self.q(x), self.heads)))
        k = self.rotary(norm(self._split(self.k(x), self.kv_heads)))
        v = self._split(self.v(x), self.kv_heads)
        q = q * self.gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True, enable_gqa=True)
        if self.exclusive:
            y = self._without_self(y, v)
        return self.o(y.transpose(1, 2).reshape(batch, length, dim))

    def _without_self(self, y: Tensor, v: Tensor) -> Tensor:
        """Takes out of each head's output its part along the position's own value (XSA)."""
        batch, heads, length, head = y.shape
        grouped = y.view(batch, self.kv_heads, heads // self.kv_heads, length, head)
        unit = F.normalize(v.to(y.dtype), dim=-1).unsqueeze(2)
        along = (grouped * unit).sum(-1, keepdim=True) * unit
        return (grouped - along).view(batch, heads, length, head)


class Mlp(nn.Module):
    def __init__(self, h: Hyper) -> None:
        super().__init__()
        self.up = Dense(h.dim, h.mlp_hidden)
        self.down = Dense(h.mlp_hidden, h.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, h: Hyper, index: int, rotary: Rotary) -> None:
        super().__init__()
        self.attn = Attention(h, rotary, exclusive=index >= h.xsa_from)
        self.mlp = Mlp(h)
        self.attn_scale = nn.Parameter(torch.ones(h.dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(h.dim), torch.zeros(h.dim))))
        self.depth_scale = (index + 1) ** -0.5

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x) * self.depth_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x) * self.depth_scale)


class Smear(nn.Module):
    """Adds to each embedding a gated share of the one before it, within a document."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.gate = nn.Parameter(torch.zeros(dims))
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, opens: Tensor) -> Tensor:
        gate = torch.sigmoid((x[..., : self.dims] * self.gate.to(x.dtype)).sum(-1, keepdim=True))
        gate = gate * self.share.to(x.dtype)
        gate = gate.masked_fill(opens.unsqueeze(-1), 0.0)
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        return x + gate * before


class Model(nn.Module):
    def __init__(self, h: Hyper) -> None:
        super().__init__()
        self.h = h
        self.embed = nn.Embedding(h.vocab, h.dim)
        self.smear = Smear(h.smear_dims) if h.smear else None
        rotary = Rotary(h.rope_dims, h.rope_base, h.seq)
        self.blocks = nn.ModuleList(Block(h, i, rotary) for i in range(h.layers))
        self.plain_order = list(range(h.layers))
        loop = list(range(h.loop_lo, h.loop_hi + 1))
        self.loop_order = list(range(h.loop_hi + 1)) + loop * h.loops + list(range(h.loop_hi + 1, h.layers))
        skips = len(self.loop_order) // 2
        self.skip_scale = nn.Parameter(torch.ones(skips, h.dim))
        self.skip_gate = nn.Parameter(torch.zeros(skips, h.dim))
        self.head_in = nn.Identity()  # a place to hang the hook for the head's Hessian
        self.looping = False
        self._init()

    def _init(self) -> None:
        nn.init.normal_(self.embed.weight, std=0.005)
        for name, module in self.named_modules():
            if isinstance(module, Dense):
                if name.endswith((".o", ".down")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = norm(self.embed(ids)).to(torch.bfloat16)
        if self.smear is not None:
            x = self.smear(x, ids == self.h.bos)
        x0 = x
        order = self.loop_order if self.looping else self.plain_order
        half = len(order) // 2
        kept: list[Tensor] = []
        for i in order[:half]:
            x = self.blocks[i](x, x0)
            kept.append(x)
        for n, i in enumerate(order[half:]):
            if kept:
                gate = torch.sigmoid(self.skip_gate[n]).to(x.dtype)
                skip = self.skip_scale[n].to(x.dtype) * kept.pop()
                x = torch.lerp(skip, x, gate)
            x = self.blocks[i](x, x0)
        return self.head_in(norm(x))

    def head(self, x: Tensor) -> Tensor:
        raw = F.linear(x, self.embed.weight.to(x.dtype)).float()
        return self.h.softcap * torch.tanh(raw / self.h.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_model(h: Hyper, device: torch.device) -> Model:
    return Model(h).to(device)


def describe(model: Model, log: Log) -> None:
    groups: dict[str, int] = {}
    for name, p in model.named_parameters():
        key = name.split(".")[2] if name.startswith("blocks.") else name.split(".")[0]
        groups[key] = groups.get(key, 0) + p.numel()
    log("params:" + str(sum(groups.values())) + " " + " ".join(f"{k}={v}" for k, v in sorted(groups.items())))
    log(f"order plain:{model.plain_order} looped:{model.loop_order}")


# ------------------------------------------------------------------------------------------------
# optimisers
# ------------------------------------------------------------------------------------------------


@torch.compile(dynamic=False)
def orthogonalise(g: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration of Muon: about the nearest orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.T if tall else x


class Muon:
    """Muon with the work shared out: rank r orthogonalises every world-th matrix, then all updates are summed."""

    def __init__(self, params: list[nn.Parameter], h: Hyper, world: World) -> None:
        self.params, self.h, self.world = params, h, world
        self.lr, self.momentum = h.matrix_lr, h.momentum_lo
        self.buffers = [torch.zeros_like(p) for p in params]
        self.sizes = [p.numel() for p in params]
        self.flat = torch.zeros(sum(self.sizes), dtype=torch.bfloat16, device=params[0].device)

    @torch.no_grad()
    def step(self) -> None:
        self.flat.zero_()
        at = 0
        for i, (p, buf, size) in enumerate(zip(self.params, self.buffers, self.sizes)):
            if i % self.world.size == self.world.rank and p.grad is not None:
                buf.lerp_(p.grad, 1 - self.momentum)
                g = p.grad.lerp(buf, self.momentum)
                g = g / (g.norm(dim=1, keepdim=True) + 1e-7)
                update = orthogonalise(g, self.h.ns_steps)
                update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                self.flat[at : at + size] = update.flatten()
            at += size
        self.world.sum_(self.flat)
        at = 0
        for p, size in zip(self.params, self.sizes):
            p.mul_(1 - self.lr * self.h.matrix_wd)
            p.add_(self.flat[at : at + size].view_as(p).to(p.dtype), alpha=-self.lr)
            at += size

    def reset(self) -> None:
        for buf in self.buffers:
            buf.zero_()


@dataclass
class Optimisers:
    muon: Muon
    adam: torch.optim.AdamW

    @classmethod
    def of(cls, model: Model, h: Hyper, world: World) -> Optimisers:
        matrices = [m.weight for m in model.modules() if isinstance(m, Dense)]
        taken = {id(p) for p in matrices} | {id(model.embed.weight)}
        scalars = [p for p in model.parameters() if id(p) not in taken]
        groups = [
            dict(params=[model.embed.weight], lr=h.embed_lr, base_lr=h.embed_lr, weight_decay=h.embed_wd),
            dict(params=scalars, lr=h.scalar_lr, base_lr=h.scalar_lr, weight_decay=h.scalar_wd),
        ]
        adam = torch.optim.AdamW(groups, betas=(h.beta1, h.beta2), eps=1e-8, fused=True)
        return cls(Muon(matrices, h, world), adam)

    def step(self, h: Hyper, step: int, scale: float) -> None:
        warm = min(1.0, step / max(1, h.momentum_steps))
        self.muon.momentum = (1 - warm) * h.momentum_lo + warm * h.momentum
        self.muon.lr = h.matrix_lr * scale
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        self.muon.step()
        self.adam.step()

    def reset(self) -> None:
        self.muon.reset()
        self.adam.state.clear()


def mean_grads(model: Model, world: World) -> None:
    """Averages the gradients of all ranks in one flat buffer."""
    if world.size == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    at = 0
    for g in grads:
        g.copy_(flat[at : at + g.numel()].view_as(g))
        at += g.numel()


class Average:
    """Exponential moving average of all parameters."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.live = list(model.parameters())
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        for p, m in zip(self.live, self.mean):
            p.copy_(m)


def lr_scale(h: Hyper, step: int, frac: float) -> float:
    if step < h.lr_warmup:
        return (step + 1) / h.lr_warmup
    if frac < 1 - h.warmdown:
        return 1.0
    return max(h.min_lr, (1 - frac) / h.warmdown)


# ------------------------------------------------------------------------------------------------
# training
# ------------------------------------------------------------------------------------------------


def train_step(model: Model, fast, loader: TrainLoader, h: Hyper, world: World) -> Tensor:
    """Gradients of one batch, averaged over micro batches and ranks; returns this rank's mean loss."""
    accumulate = 8 // world.size
    rows = h.batch_tokens // (h.seq * 8)
    total = torch.zeros((), device=world.device)
    for _ in range(accumulate):
        x, y = loader.batch(rows)
        loss = fast(x, y) / accumulate
        loss.backward()
        total += loss.detach()
    mean_grads(model, world)
    return total


def warm_up(model: Model, fast, opts: Optimisers, h: Hyper, world: World) -> None:
    """Compiles both orders of layers on train rows, then puts everything back as it was."""
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    loader = TrainLoader(h.train_glob, h.seq, world, h.seed + 1)
    for looping in (False, True):
        model.looping = looping
        for step in range(h.warm_steps):
            train_step(model, fast, loader, h, world)
            opts.step(h, step, 1.0)
            model.zero_grad(set_to_none=True)
    model.looping = False
    model.load_state_dict(before)
    opts.reset()
    torch.cuda.synchronize()


def train(model: Model, fast, opts: Optimisers, h: Hyper, world: World, clock: Stopwatch, log: Log, probe=None) -> None:
    """Trains until the budget is used up: the cap less what Hessians and GPTQ need. probe: called for a look at the
    validation loss every val_every steps, with the clock held."""
    loader = TrainLoader(h.train_glob, h.seq, world, h.seed)
    average = Average(model, h.ema)
    budget = h.max_wallclock_s - h.gptq_reserve_s
    step = 0
    model.train()
    while True:
        spent = world.from_lead(clock.seconds())
        frac = max(spent / budget, step / h.iterations)
        if frac >= 1.0:
            break
        if not model.looping and frac >= h.loop_at:
            model.looping = True
            log(f"step:{step} looping on at {spent:.1f}s")
        loss = train_step(model, fast, loader, h, world)
        if h.grad_clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), h.grad_clip)
        opts.step(h, step, lr_scale(h, step, frac))
        model.zero_grad(set_to_none=True)
        average.update()
        step += 1
        if step % h.log_every == 0 or step <= 5:
            log(f"step:{step} train_loss:{loss.item():.4f} train_time:{spent:.1f}s avg:{1000 * spent / step:.2f}ms")
        if h.val_every and probe is not None and step % h.val_every == 0:
            clock.pause()
            log(f"step:{step} {probe()}")
            clock.resume()
    log(f"stopped at step {step} after {clock.seconds():.1f}s, peak {torch.cuda.max_memory_allocated() >> 20} MiB")
    average.apply()
    log("ema applied")


# ------------------------------------------------------------------------------------------------
# quantisation: GPTQ over Hessians of train rows, int6 with some int7, clip at a multiple of the row's deviation
# ------------------------------------------------------------------------------------------------


def quantised_layers(model: Model) -> dict[str, nn.Module]:
    """What is quantised, by the name of its weight, with the module whose input gives the Hessian."""
    found: dict[str, nn.Module] = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Dense)}
    found["embed.weight"] = model.head_in
    return found


def bits_of(name: str, h: Hyper) -> int:
    """int7 for the embedding and for values and outputs of the looped layers, which are used three times."""
    if name == "embed.weight":
        return 7
    layer = int(name.split(".")[1])
    if h.loop_lo <= layer <= h.loop_hi and name.endswith((".v.weight", ".o.weight")):
        return 7
    return 6


def collect_hessians(
    model: Model, loader: TrainLoader, h: Hyper, world: World, clock: Stopwatch
) -> dict[str, Tensor]:
    """Input second moments of every quantised layer, from train rows; stops in time for the solver."""
    hessians: dict[str, Tensor] = {}
    handles = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2).float()
            if name not in hessians:
                hessians[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
            hessians[name].addmm_(x.T, x)

        return hook

    for name, module in quantised_layers(model).items():
        handles.append(module.register_forward_hook(watch(name)))
    seen = 0
    deadline = h.max_wallclock_s - h.gptq_solve_s
    model.eval()
    with torch.no_grad():
        for _ in range(h.calib_batches):
            if world.any(clock.seconds() >= deadline):
                break
            x, _unused = loader.batch(h.calib_rows)
            model.hidden(x)
            seen += x.numel()
    for handle in handles:
        handle.remove()
    for name in sorted(hessians):
        world.sum_(hessians[name])
        hessians[name] /= max(1, seen * world.size)
    return hessians


def row_scales(w: Tensor, bits: int, clip: float) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return (clip * w.std(dim=1) / top).clamp_min(1e-8).half().float()


def gptq(weight: Tensor, hessian: Tensor, bits: int, clip: float, h: Hyper) -> tuple[Tensor, Tensor]:
    """Rounds a matrix column by column, each column's error being spread over the columns not yet rounded."""
    w, hess = weight.detach().float().clone(), hessian.clone()
    rows, cols = w.shape
    top = 2 ** (bits - 1) - 1
    scale = row_scales(w, bits, clip)
    diag = hess.diagonal()
    dead = diag <= 0
    diag[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(hess.diagonal(), descending=True)
    back = torch.argsort(order)
    w, hess = w[:, order], hess[order][:, order].contiguous()
    hess.diagonal().add_(h.gptq_damp * hess.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hess))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.zeros_like(w)
    for lo in range(0, cols, h.gptq_block):
        hi = min(lo + h.gptq_block, cols)
        part, errors = w[:, lo:hi].clone(), torch.zeros(rows, hi - lo, device=w.device)
        local = upper[lo:hi, lo:hi]
        for j in range(hi - lo):
            code = (part[:, j] / scale).round().clamp_(-top, top)
            codes[:, lo + j] = code
            error = (part[:, j] - code * scale) / local[j, j]
            part[:, j:] -= error[:, None] * local[j, j:][None]
            errors[:, j] = error
        w[:, hi:] -= errors @ upper[lo:hi, hi:]
    return codes[:, back].to(torch.int8), scale.half()


def round_plain(weight: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    scale = row_scales(weight.detach().float(), bits, clip)
    top = 2 ** (bits - 1) - 1
    codes = (weight.detach().float() / scale[:, None]).round().clamp_(-top, top)
    return codes.to(torch.int8), scale.half()


@dataclass
class Packed:
    """What goes into the artifact: codes and scales of the matrices, the rest as half precision."""

    codes: dict[str, Tensor]
    scales: dict[str, Tensor]
    rest: dict[str, Tensor]


def quantise(model: Model, hessians: dict[str, Tensor], h: Hyper, world: World, log: Log) -> Packed:
    """Solves the layers, every rank its share, and gathers the parts on all ranks."""
    state = model.state_dict()
    names = sorted(quantised_layers(model))
    mine: dict[str, tuple[Tensor, Tensor]] = {}
    worst = ("", 0.0)
    for i, name in enumerate(names):
        if i % world.size != world.rank:
            continue
        w, bits = state[name], bits_of(name, h)
        clip = h.clip_embed if name == "embed.weight" else h.clip_matrix
        if name in hessians:
            codes, scale = gptq(w, hessians[name], bits, clip, h)
        else:
            codes, scale = round_plain(w, bits, clip)
        off = (w.float() - codes.float() * scale.float()[:, None]).square().mean().sqrt().item()
        if off > worst[1]:
            worst = (name, off)
        mine[name] = (codes.cpu(), scale.cpu())
    parts: list[dict[str, tuple[Tensor, Tensor]]] = [mine]
    if world.size > 1:
        parts = [{} for _ in range(world.size)]
        dist.all_gather_object(parts, mine)
    both = {name: pair for part in parts for name, pair in part.items()}
    assert sorted(both) == names
    rest = {k: v.detach().half().cpu() for k, v in state.items() if k not in both}
    log(f"quantised {len(names)} matrices, {len(rest)} left in half, worst of rank 0: {worst[0]} {worst[1]:.5f}")
    return Packed({n: both[n][0] for n in names}, {n: both[n][1] for n in names}, rest)


def unpack(packed: Packed) -> dict[str, Tensor]:
    state = {k: v.float() for k, v in packed.rest.items()}
    for name, codes in packed.codes.items():
        state[name] = codes.float() * packed.scales[name].float()[:, None]
    return state


# ------------------------------------------------------------------------------------------------
# the artifact
# ------------------------------------------------------------------------------------------------


def shuffle_bytes(raw: bytes, width: int) -> bytes:
    """All first bytes of each group of `width`, then all second ones: half floats compress better so."""
    cut = len(raw) - len(raw) % width
    body = np.frombuffer(raw[:cut], dtype=np.uint8).reshape(-1, width).T
    return np.ascontiguousarray(body).tobytes() + raw[cut:]


def unshuffle_bytes(raw: bytes, width: int) -> bytes:
    cut = len(raw) - len(raw) % width
    body = np.frombuffer(raw[:cut], dtype=np.uint8).reshape(width, -1).T
    return np.ascontiguousarray(body).tobytes() + raw[cut:]


def write_artifact(packed: Packed, h: Hyper, log: Log) -> None:
    buffer = io.BytesIO()
    torch.save({"codes": packed.codes, "scales": packed.scales, "rest": packed.rest}, buffer)
    began = time.perf_counter()
    shuffled = shuffle_bytes(buffer.getvalue(), 2)
    blob = brotli.compress(shuffled, quality=11, lgwin=24)
    Path(h.artifact).write_bytes(blob)
    code_bytes = len(Path(__file__).read_bytes())
    total = len(blob) + code_bytes
    log(f"raw:{buffer.getbuffer().nbytes} brotli in {time.perf_counter() - began:.1f}s")
    log(f"model_bytes:{len(blob)} code_bytes:{code_bytes} total_bytes:{total} limit:{h.size_limit}")
    if total > h.size_limit:
        raise SystemExit(f"too large by {total - h.size_limit} bytes")


def read_artifact(h: Hyper) -> Packed:
    blob = Path(h.artifact).read_bytes()
    raw = unshuffle_bytes(brotli.decompress(blob), 2)
    data = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return Packed(data["codes"], data["scales"], data["rest"])


def model_from_artifact(h: Hyper, device: torch.device) -> Model:
    model = build_model(h, device)
    model.load_state_dict(unpack(read_artifact(h)))
    model.looping = True
    return model


# ------------------------------------------------------------------------------------------------
# hints: for every target one token that the text so far makes likely, and how much to trust it
#
# Three context tables over the last 16, 9 and 5 tokens and one over (word before, pieces of this word so far).
# Each slot keeps one candidate and a vote count. Position i stands for the input token i; its hint is about token
# i + 1 and is made of tokens up to i: first the tables are told what followed the contexts that ended at i - 1
# (that is token i), then the contexts that end at i are looked up.
# ------------------------------------------------------------------------------------------------

ORDERS = np.array([16, 9, 5], dtype=np.int64)
CHANNELS = len(ORDERS) + 1
WORD = len(ORDERS)
BUCKETS = 16
FLAG_SPACE, FLAG_CONTROL = 1, 2

PRIME_A = np.uint64(0x9E3779B97F4A7C15)
PRIME_B = np.uint64(0xC2B2AE3D27D4EB4F)
SHIFT_29 = np.uint64(29)
SHIFT_32 = np.uint64(32)
ONE = np.uint64(1)


@njit(nogil=True)
def mix(state, token):
    """One step of a rolling 64-bit hash."""
    x = (state ^ (np.uint64(token) + ONE)) * PRIME_A
    return (x ^ (x >> SHIFT_29)) * PRIME_B


@njit(nogil=True)
def context_hash(tokens, i, order):
    """Hash of the `order` tokens that end at i."""
    x = np.uint64(order)
    for k in range(i - order + 1, i + 1):
        x = mix(x, tokens[k])
    return x


@njit(nogil=True)
def learn(keys, candidates, votes, slot, key, token):
    """Tells one slot what came: a vote for its candidate or against it."""
    if keys[slot] != key:
        keys[slot] = key
        candidates[slot] = token
        votes[slot] = 1
    elif candidates[slot] == token:
        if votes[slot] < 255:
            votes[slot] += 1
    elif votes[slot] > 1:
        votes[slot] -= 1
    else:
        candidates[slot] = token
        votes[slot] = 1


@njit(nogil=True)
def trust(hits, tries, channel, bucket, gain, shift, top):
    """The tilt of a hint by how often hints of its channel and vote count came true until now."""
    rate = (hits[channel, bucket] + 0.6) / (tries[channel, bucket] + 2.0)
    tilt = gain * (math.log(rate / (1.0 - rate)) + shift)
    return min(max(tilt, 0.0), top)


@njit(nogil=True)
def walk(
    tokens,
    lo,
    hi,
    orders,
    flags,
    keys,
    candidates,
    votes,
    hits,
    tries,
    slots,
    slot_keys,
    promised,
    promised_bucket,
    words,
    length,
    least,
    gain,
    shift,
    top,
    hint,
    tilt,
):
    """Goes over the inputs lo..hi-1 in order and writes the hint and tilt for the token after each."""
    mask = np.uint64(keys.shape[1] - 1)
    channels = keys.shape[0]
    word = channels - 1
    for i in range(lo, hi):
        token = np.int64(tokens[i])

        # what was promised for this token?
        for c in range(channels):
            if promised[c] >= 0:
                tries[c, promised_bucket[c]] += 1.0
                if promised[c] == token:
                    hits[c, promised_bucket[c]] += 1.0

        # the contexts that ended before it learn it
        for c in range(channels):
            if slots[c] >= 0:
                learn(keys[c], candidates[c], votes[c], slots[c], slot_keys[c], token)

        # the contexts that end with it
        if flags[token] & 2:
            length[0] = 0
            words[0] = np.uint64(0)
            words[1] = np.uint64(0)
        elif flags[token] & 1:
            words[1] = words[0]
            words[0] = mix(np.uint64(7), token)
        else:
            words[0] = mix(words[0], token)
        length[0] += 1
        for c in range(channels):
            if c == word:
                code = mix(words[1], 3) ^ words[0]
            elif length[0] >= orders[c]:
                code = context_hash(tokens, i, orders[c])
            else:
                slots[c] = -1
                continue
            slots[c] = np.int64(code & mask)
            slot_keys[c] = np.int64(code >> SHIFT_32)

        # every channel that knows its context makes a promise, the most trusted one is the hint
        best = 0.0
        chosen = -1
        for c in range(channels):
            promised[c] = -1
            s = slots[c]
            if s < 0 or keys[c, s] != slot_keys[c] or votes[c, s] < least:
                continue
            bucket = min(np.int64(votes[c, s]), tries.shape[1] - 1)
            promised[c] = candidates[c, s]
            promised_bucket[c] = bucket
            strength = trust(hits, tries, c, bucket, gain, shift, top)
            if strength > best:
                best = strength
                chosen = promised[c]
        hint[i - lo] = chosen
        tilt[i - lo] = best


class HintStream:
    """The tables, and the place in the text up to which they have been told."""

    def __init__(self, h: Hyper, flags: np.ndarray) -> None:
        self.h, self.flags = h, flags
        size = 1 << h.hint_bits
        self.keys = np.full((CHANNELS, size), -1, dtype=np.int64)
        self.candidates = np.zeros((CHANNELS, size), dtype=np.int32)
        self.votes = np.zeros((CHANNELS, size), dtype=np.uint8)
        self.hits = np.zeros((CHANNELS, BUCKETS), dtype=np.float64)
        self.tries = np.zeros((CHANNELS, BUCKETS), dtype=np.float64)
        self.slots = np.full(CHANNELS, -1, dtype=np.int64)
        self.slot_keys = np.zeros(CHANNELS, dtype=np.int64)
        self.words = np.zeros(2, dtype=np.uint64)
        self.promised = np.full(CHANNELS, -1, dtype=np.int64)
        self.promised_bucket = np.zeros(CHANNELS, dtype=np.int64)
        self.length = np.zeros(1, dtype=np.int64)  # of the document so far
        self.cursor = 0

    def chunk(self, tokens: np.ndarray, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """Hints and tilts for the tokens lo+1..hi. Chunks must come in order, each once."""
        assert lo == self.cursor, "the stream has moved on"
        hint = np.full(hi - lo, -1, dtype=np.int64)
        tilt = np.zeros(hi - lo, dtype=np.float32)
        walk(
            tokens,
            lo,
            hi,
            ORDERS,
            self.flags,
            self.keys,
            self.candidates,
            self.votes,
            self.hits,
            self.tries,
            self.slots,
            self.slot_keys,
            self.promised,
            self.promised_bucket,
            self.words,
            self.length,
            self.h.hint_min,
            self.h.tilt_gain,
            self.h.tilt_shift,
            self.h.tilt_max,
            hint,
            tilt,
        )
        self.cursor = hi
        return hint, tilt

    def report(self, log: Log) -> None:
        for c in range(CHANNELS):
            name = "word" if c == WORD else f"last{ORDERS[c]}"
            tries, hits = self.tries[c].sum(), self.hits[c].sum()
            log(f"hints {name}: {int(tries)} given, {100 * hits / max(1.0, tries):.2f}% came true")


def token_flags(tables: ByteTables) -> np.ndarray:
    """Per token: 1 if it begins a word, 2 if it is a control token."""
    space, control = tables.space.cpu().numpy(), tables.control.cpu().numpy()
    return (space * FLAG_SPACE + control * FLAG_CONTROL).astype(np.int64)


def hints_by_hand(tokens: np.ndarray, order: int) -> list[int]:
    """The last token seen after each context of `order` tokens, in plain Python; for the self test."""
    seen: dict[tuple[int, ...], int] = {}
    out: list[int] = []
    for i in range(len(tokens)):
        if i >= order:
            seen[tuple(tokens[i - order : i].tolist())] = int(tokens[i])
        here = tuple(tokens[max(0, i - order + 1) : i + 1].tolist())
        out.append(seen.get(here, -1))
    return out


# ------------------------------------------------------------------------------------------------
# the distribution that is scored: softmax at a temperature by its own entropy, tilted towards the hint
# ------------------------------------------------------------------------------------------------


def adaptive_log_probs(logits: Tensor, h: Hyper) -> Tensor:
    """Log probabilities over the vocabulary. The temperature is a fixed function of the entropy at temperature 1."""
    logp = F.log_softmax(logits, dim=-1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True) / math.log(logits.size(-1))
    temperature = 1.0 + h.temp_slope * (entropy - h.temp_pivot)
    temperature = temperature.clamp(h.temp_lo, h.temp_hi)
    return F.log_softmax(logits / temperature, dim=-1)


def tilt_log_norm(logp: Tensor, hint: Tensor, tilt: Tensor) -> Tensor:
    """log Z of p(v) exp(tilt [v = hint]): only one entry changes, so Z = 1 + p(hint) (exp(tilt) - 1)."""
    p_hint = logp.gather(-1, hint.clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
    return torch.log1p(p_hint * torch.expm1(tilt))


def token_nll(logp: Tensor, target: Tensor, hint: Tensor, tilt: Tensor) -> Tensor:
    """-log of the tilted distribution at the target."""
    tilt = torch.where(hint >= 0, tilt, torch.zeros_like(tilt))
    plain = -logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return plain - tilt * (hint == target) + tilt_log_norm(logp, hint, tilt)


# ------------------------------------------------------------------------------------------------
# evaluation
# ------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """The validation text: tokens on the host for the hints, on the device for the model, and the byte tables."""

    host: np.ndarray
    ids: Tensor
    tables: ByteTables

    @property
    def targets(self) -> int:
        return len(self.host) - 1


def load_text(h: Hyper, sp: spm.SentencePieceProcessor, world: World) -> Text:
    host = read_val(h.val_glob)
    ids = torch.from_numpy(host.astype(np.int32)).to(world.device)
    assert len(host) > h.seq + 1
    return Text(host, ids, byte_tables(sp, h.vocab, world.device))


@dataclass
class Span:
    """The inputs first..end-1 are scored (their targets are one further) with the context from start."""

    start: int
    first: int
    end: int


def chunk_spans(lo: int, hi: int, seq: int, stride: int) -> list[Span]:
    """Cuts lo..hi into spans of `stride`, each at the end of a window of seq tokens. The text's first window is
    scored whole. Every position is in exactly one span."""
    spans = []
    first = lo
    while first < hi:
        end = min(seq if first == 0 else first + stride, hi)
        spans.append(Span(max(0, end - seq), first, end))
        first = end
    return spans


def share_of(items: list, world: World) -> list:
    """This rank's contiguous part."""
    per = -(-len(items) // world.size)
    return items[world.rank * per : (world.rank + 1) * per]


@torch.no_grad()
def score_plain(model: Model, text: Text, h: Hyper, world: World) -> Score:
    """Loss over windows side by side, without hints, temperature or adaptation. For the log only."""
    model.eval()
    tally = Tally.fresh(world.device)
    offsets = torch.arange(h.seq, device=world.device)
    starts = share_of(list(range(0, text.targets, h.seq)), world)
    for at in range(0, len(starts), 16):
        pos = torch.tensor(starts[at : at + 16], device=world.device)[:, None] + offsets
        there = pos < text.targets  # the text's last window is short
        pos = pos.clamp_max(text.targets - 1)
        states = model.hidden(text.ids[pos].long())[there]
        prev, target = text.ids[pos[there]].long(), text.ids[pos[there] + 1].long()
        nll = F.cross_entropy(model.head(states), target, reduction="none")
        tally.add(nll, text.tables.count(prev, target))
    return tally.result(world)


@dataclass
class Hints:
    """Hints and tilts of one chunk on the device, by input position less lo."""

    lo: int
    token: Tensor
    tilt: Tensor

    def at(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        return self.token[pos - self.lo], self.tilt[pos - self.lo]


def chunk_hints(stream: HintStream, text: Text, lo: int, hi: int, h: Hyper, world: World) -> Hints:
    token, tilt = stream.chunk(text.host, lo, hi)
    if not h.tilt:
        tilt[:] = 0.0
    return Hints(lo, torch.from_numpy(token).to(world.device), torch.from_numpy(tilt).to(world.device))


@torch.no_grad()
def score_spans(model: Model, hidden, text: Text, spans: list[Span], hints: Hints, tally: Tally, h: Hyper) -> None:
    """Scores spans with the weights as they are. The batch is filled up with empty spans so that its shape is fixed."""
    device = text.ids.device
    offsets = torch.arange(h.seq, device=device)
    for at in range(0, len(spans), h.eval_rows):
        rows = spans[at : at + h.eval_rows]
        rows = rows + [Span(rows[0].start, 0, 0)] * (h.eval_rows - len(rows))
        bounds = torch.tensor([(s.start, s.first, s.end) for s in rows], device=device)
        pos = bounds[:, :1] + offsets
        inside = (pos >= bounds[:, 1:2]) & (pos < bounds[:, 2:3])
        states = hidden(text.ids[pos].long())
        pos = pos[inside]
        logp = adaptive_log_probs(model.head(states[inside]), h)
        prev, target = text.ids[pos].long(), text.ids[pos + 1].long()
        hint, tilt = hints.at(pos)
        nll = token_nll(logp, target, hint, tilt)
        tally.add(nll, text.tables.count(prev, target))


def adapt(model: Model, fast, opt: torch.optim.Optimizer, text: Text, lo: int, hi: int, h: Hyper, world: World) -> float:
    """SGD over a chunk whose targets lo+1..hi have all been scored. All ranks take the same steps."""
    starts = list(range(lo, hi - h.seq + 1, h.seq))
    offsets = torch.arange(h.seq, device=world.device)
    params = [p for group in opt.param_groups for p in group["params"]]
    per_step = h.ttt_rows * world.size
    last = torch.zeros((), device=world.device)
    model.train()
    for _ in range(h.ttt_epochs):
        for at in range(0, len(starts), per_step):
            batch = starts[at : at + per_step]
            mine = batch[world.rank :: world.size]
            opt.zero_grad(set_to_none=False)
            if mine:
                pos = torch.tensor(mine, device=world.device)[:, None] + offsets
                loss = fast(text.ids[pos].long(), text.ids[pos + 1].long()) * (len(mine) / len(batch))
                loss.backward()
                last = loss.detach()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            sum_grads(params, world)
            nn.utils.clip_grad_norm_(params, h.ttt_clip)
            opt.step()
    model.eval()
    return float(last)


def sum_grads(params: list[nn.Parameter], world: World) -> None:
    if world.size == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    world.sum_(flat)
    at = 0
    for p in params:
        p.grad.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()


def adapted_params(model: Model) -> list[nn.Parameter]:
    """Everything but the embedding, which is also the head."""
    return [p for name, p in model.named_parameters() if name != "embed.weight"]


def score_adaptive(model: Model, text: Text, h: Hyper, world: World, clock: Stopwatch, log: Log) -> Score:
    """The reported score. Chunk by chunk: hints from the tokens before, score, then adapt on the chunk."""
    stream = HintStream(h, token_flags(text.tables))
    tally = Tally.fresh(world.device)
    hidden = torch.compile(model.hidden, dynamic=False)
    fast = torch.compile(model, dynamic=False)
    for p in model.parameters():
        p.requires_grad_(False)
    params = adapted_params(model)
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    chunks = -(-text.targets // h.ttt_chunk)
    adapting = h.ttt
    model.eval()
    for c in range(chunks):
        lo, hi = c * h.ttt_chunk, min((c + 1) * h.ttt_chunk, text.targets)
        hints = chunk_hints(stream, text, lo, hi, h, world)
        spans = share_of(chunk_spans(lo, hi, h.seq, h.stride), world)
        score_spans(model, hidden, text, spans, hints, tally, h)
        late = world.any(clock.seconds() > h.eval_budget_s)
        if adapting and late:
            adapting = False
            log(f"chunk {c}: no more adaptation, {clock.seconds():.0f}s are used up")
        loss = 0.0
        if adapting and c + 1 < chunks:
            for group in opt.param_groups:
                group["lr"] = h.ttt_lr * 0.5 * (1 + math.cos(math.pi * c / chunks))
            loss = adapt(model, fast, opt, text, lo, hi, h, world)
        if c % 100 == 0 or c + 1 == chunks:
            so_far = tally.sums.tolist()
            running = so_far[0] / max(1.0, so_far[1])
            log(f"chunk {c + 1}/{chunks} own_loss:{running:.5f} adapt_loss:{loss:.4f} at {clock.seconds():.0f}s")
    stream.report(log)
    score = tally.result(world)
    assert score.tokens == text.targets, f"scored {score.tokens} of {text.targets} targets"
    return score


# ------------------------------------------------------------------------------------------------
# self tests: SELFTEST=1, on made-up tokens, before anything else
# ------------------------------------------------------------------------------------------------


def test_spans() -> None:
    for total in (2048, 2049, 5000, 65536, 65537, 100_000):
        marks = np.zeros(total, dtype=np.int64)
        for lo in range(0, total, 32_768):
            for span in chunk_spans(lo, min(lo + 32_768, total), 2048, 64):
                marks[span.first : span.end] += 1
                assert span.end - span.start == 2048
        assert (marks == 1).all()


def test_tilt(h: Hyper, device: torch.device) -> None:
    """The tilted distribution must sum to one over the vocabulary, with and without a hint."""
    logits = torch.randn(6, 97, device=device, dtype=torch.float64) * 3
    logp = adaptive_log_probs(logits, h)
    hint = torch.tensor([-1, 0, 5, 96, 40, -1], device=device)
    tilt = torch.tensor([2.0, 0.5, 0.0, 3.0, 1.0, 0.0], device=device, dtype=torch.float64)
    total = torch.zeros(6, device=device, dtype=torch.float64)
    for v in range(97):
        target = torch.full((6,), v, device=device)
        total += torch.exp(-token_nll(logp, target, hint, tilt))
    assert torch.allclose(total, torch.ones_like(total), atol=1e-9), total


def test_hints(h: Hyper) -> None:
    """Changing the tokens from a place on must not change the hints up to it."""
    rng = np.random.default_rng(0)
    flags = np.zeros(h.vocab, dtype=np.int64)
    flags[::3] = FLAG_SPACE
    flags[h.bos] = FLAG_CONTROL
    motif = rng.integers(2, 40, size=300)
    tokens = np.concatenate([motif, rng.integers(2, 40, size=100), motif, motif]).astype(np.uint16)
    other = tokens.copy()
    other[701:] = rng.integers(2, 40, size=len(tokens) - 701)
    one = HintStream(h, flags).chunk(tokens, 0, 900)
    two = HintStream(h, flags).chunk(other, 0, 900)
    assert (one[0][:701] == two[0][:701]).all() and (one[1][:701] == two[1][:701]).all()
    stream = HintStream(h, flags)
    parts = [stream.chunk(tokens, a, a + 300) for a in (0, 300, 600)]
    assert (np.concatenate([p[0] for p in parts]) == one[0]).all()
    by_hand = np.array(hints_by_hand(tokens[:900], 16))
    known = by_hand[420:690] >= 0
    assert known.mean() > 0.9 and (one[0][420:690][known] == by_hand[420:690][known]).mean() > 0.9


def test_bytes() -> None:
    raw = bytes(range(256)) * 3 + b"x"
    for width in (1, 2, 4):
        assert unshuffle_bytes(shuffle_bytes(raw, width), width) == raw


def self_tests(h: Hyper, world: World, log: Log) -> None:
    test_spans()
    test_tilt(h, world.device)
    test_hints(h)
    test_bytes()
    log("self tests passed")


# ------------------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------------------


def make_model(h: Hyper, text: Text, world: World, log: Log) -> Packed:
    """Training, Hessians and GPTQ, all under one clock."""
    model = build_model(h, world.device)
    describe(model, log)
    fast = torch.compile(model, dynamic=False, fullgraph=True)
    opts = Optimisers.of(model, h, world)
    warm_up(model, fast, opts, h, world)
    world.barrier()

    clock = Stopwatch().start()
    train(model, fast, opts, h, world, clock, log, probe=lambda: score_plain(model, text, h, world))
    calib = TrainLoader(h.train_glob, h.seq, world, h.seed + 2)
    hessians = collect_hessians(model, calib, h, world, clock)
    log(f"hessians of {len(hessians)} layers after {clock.seconds():.1f}s")
    packed = quantise(model, hessians, h, world, log)
    log(f"train+gptq:{clock.seconds():.1f}s cap:{h.max_wallclock_s:.0f}s")
    return packed


def evaluate(h: Hyper, text: Text, world: World, log: Log) -> Score:
    """Everything from reading the artifact on, under the second clock."""
    clock = Stopwatch().start()
    model = model_from_artifact(h, world.device)
    if h.diag_plain:
        log(f"diag_plain {score_plain(model, text, h, world)} eval_time:{clock.seconds():.1f}s")
    score = score_adaptive(model, text, h, world, clock, log)
    log(f"eval_time:{clock.seconds():.1f}s")
    return score


def main() -> None:
    h = Hyper()
    h.check()
    world = join_world()
    seed_all(h.seed)
    log = Log(world, h.run_id, h.seed)
    log_header(log, h, world)
    if h.selftest:
        self_tests(h, world, log)

    sp = spm.SentencePieceProcessor(model_file=h.tokenizer)
    assert sp.vocab_size() == h.vocab, f"{h.tokenizer} has {sp.vocab_size()} pieces"
    text = load_text(h, sp, world)
    log(f"train shards:{len(glob.glob(h.train_glob))} val tokens:{len(text.host)}")

    packed = make_model(h, text, world, log)
    if world.lead:
        write_artifact(packed, h, log)
    world.barrier()
    torch.cuda.empty_cache()

    score = evaluate(h, text, world, log)
    log(f"final_score {score}")
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
