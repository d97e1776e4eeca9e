"""SP8192, looped middle layers, parallel residuals, MuonEq-R, EMA, GPTQ-SD (int6 matrices, int8 embedding), byte shuffle
and brotli, then chunk-wise score-first test-time training. Every setting comes from the environment."""

import base64
import collections
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
from types import SimpleNamespace
from typing import Callable, Iterable

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------
# settings
# ----------------------------------------


def env(name: str, default):
    """A setting in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() not in ("", "0", "false", "no")
    return type(default)(raw)


def read_settings() -> SimpleNamespace:
    s = SimpleNamespace()
    # where things are
    s.data_dir = env("DATA_DIR", "./data")
    s.vocab_size = env("VOCAB_SIZE", 8192)
    s.dataset = os.path.join(s.data_dir, "datasets", f"fineweb10B_sp{s.vocab_size}")
    s.train_pattern = os.path.join(s.dataset, "fineweb_train_*.bin")
    s.val_pattern = os.path.join(s.dataset, "fineweb_val_*.bin")
    s.tokenizer_path = os.path.join(s.data_dir, "tokenizers", f"fineweb_{s.vocab_size}_bpe.model")
    s.run_id = env("RUN_ID", str(uuid.uuid4()))
    s.log_path = os.path.join("logs", f"{s.run_id}.txt")
    s.seed = env("SEED", 1337)
    s.float_path = "final_model.pt"
    s.packed_path = "final_model.int6.ptz"

    # length of the run
    s.iterations = env("ITERATIONS", 20000)
    s.warmup_steps = env("WARMUP_STEPS", 20)
    s.warmdown_frac = env("WARMDOWN_FRAC", 0.72)
    s.max_wallclock_seconds = env("MAX_WALLCLOCK_SECONDS", 600.0)
    s.gptq_reserve_seconds = env("GPTQ_RESERVE_SECONDS", 14.0)
    s.train_batch_tokens = env("TRAIN_BATCH_TOKENS", 2048 * 48 * 8)
    s.train_seq_len = env("TRAIN_SEQ_LEN", 2048)
    s.train_log_every = env("TRAIN_LOG_EVERY", 500)
    s.val_loss_every = env("VAL_LOSS_EVERY", 4000)

    # model
    s.num_layers = env("NUM_LAYERS", 11)
    s.model_dim = env("MODEL_DIM", 512)
    s.num_heads = env("NUM_HEADS", 8)
    s.num_kv_heads = env("NUM_KV_HEADS", 4)
    s.mlp_mult = env("MLP_MULT", 4.0)
    s.rope_base = env("ROPE_BASE", 10000.0)
    s.rope_dims = env("ROPE_DIMS", 16)
    s.qk_gain_init = env("QK_GAIN_INIT", 5.25)
    s.logit_softcap = env("LOGIT_SOFTCAP", 30.0)
    s.embed_init_std = env("EMBED_INIT_STD", 0.005)
    s.skip_gates = env("SKIP_GATES", True)
    s.depth_scale = env("DEPTH_SCALE", True)
    s.parallel_from = env("PARALLEL_FROM", 7)
    s.loop_first = env("LOOP_FIRST", 3)
    s.loop_last = env("LOOP_LAST", 5)
    s.loop_extra = env("LOOP_EXTRA", 2)
    s.loop_at = env("LOOP_AT", 0.35)

    # optimisers
    s.embed_lr = env("EMBED_LR", 0.03)
    s.matrix_lr = env("MATRIX_LR", 0.022)
    s.scalar_lr = env("SCALAR_LR", 0.02)
    s.min_lr_frac = env("MIN_LR_FRAC", 0.0)
    s.muon_momentum = env("MUON_MOMENTUM", 0.99)
    s.muon_momentum_start = env("MUON_MOMENTUM_START", 0.92)
    s.muon_momentum_steps = env("MUON_MOMENTUM_STEPS", 1500)
    s.muon_ns_steps = env("MUON_NS_STEPS", 5)
    s.muon_row_norm = env("MUON_ROW_NORM", True)
    s.muon_wd = env("MUON_WD", 0.095)
    s.embed_wd = env("EMBED_WD", 0.085)
    s.adam_wd = env("ADAM_WD", 0.02)
    s.beta1 = env("BETA1", 0.9)
    s.beta2 = env("BETA2", 0.95)
    s.adam_eps = env("ADAM_EPS", 1e-8)
    s.grad_clip = env("GRAD_CLIP", 0.3)
    s.ema_decay = env("EMA_DECAY", 0.9965)

    # quantisation
    s.matrix_bits = env("MATRIX_BITS", 6)
    s.embed_bits = env("EMBED_BITS", 8)
    s.matrix_clip_sds = env("MATRIX_CLIP_SDS", 12.85)
    s.embed_clip_sds = env("EMBED_CLIP_SDS", 20.0)
    s.gptq_batches = env("GPTQ_BATCHES", 64)
    s.gptq_block = env("GPTQ_BLOCK", 128)
    s.gptq_damp = env("GPTQ_DAMP", 0.01)
    s.shuffle_stride = env("SHUFFLE_STRIDE", 2)
    s.size_limit = env("SIZE_LIMIT", 16_000_000)

    # evaluation
    s.eval_seq_len = env("EVAL_SEQ_LEN", 2048)
    s.eval_stride = env("EVAL_STRIDE", 64)
    s.eval_batch = env("EVAL_BATCH", 32)
    s.eval_cap_seconds = env("EVAL_CAP_SECONDS", 600.0)
    s.sliding_enabled = env("SLIDING_ENABLED", True)
    s.ttt_enabled = env("TTT_ENABLED", True)
    s.ttt_chunk_tokens = env("TTT_CHUNK_TOKENS", 32768)
    s.ttt_epochs = env("TTT_EPOCHS", 3)
    s.ttt_lr = env("TTT_LR", 0.005)
    s.ttt_momentum = env("TTT_MOMENTUM", 0.9)
    s.ttt_rows = env("TTT_ROWS", 2)
    s.ttt_clip = env("TTT_CLIP", 1.0)
    s.hash_embed = env("HASH_EMBED", True)
    s.hash_buckets = env("HASH_BUCKETS", 16384)
    s.hash_lr_mult = env("HASH_LR_MULT", 10.0)
    return s


CONTROL_NAMES = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "skip_gates",
)

# ----------------------------------------
# ranks and log
# ----------------------------------------


def open_ranks() -> SimpleNamespace:
    """Where this process stands among the others."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 1 or 8 % world != 0:
        raise ValueError(f"WORLD_SIZE={world} must divide 8")
    env_ = SimpleNamespace(
        rank=int(os.environ.get("RANK", "0")),
        local=int(os.environ.get("LOCAL_RANK", "0")),
        world=world,
        accum=8 // world,
        many="RANK" in os.environ and "WORLD_SIZE" in os.environ,
    )
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    env_.device = torch.device("cuda", env_.local)
    torch.cuda.set_device(env_.device)
    if env_.many:
        dist.init_process_group(backend="nccl", device_id=env_.device)
        dist.barrier()
    env_.main = env_.rank == 0
    return env_


_log_target: list[str] = []


def log(message: object, console: bool = True) -> None:
    if not _log_target:
        return
    if console:
        print(message, flush=True)
    with open(_log_target[0], "a", encoding="utf-8") as f:
        print(message, file=f)


def sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def mean_gradients(params: Iterable[nn.Parameter], world: int) -> None:
    """Averages gradients over the ranks; a missing one counts as zero, so that all ranks take part alike."""
    if world == 1:
        return
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
        p.grad.div_(world)


def share_of(items: list, rank: int, world: int) -> list:
    """The contiguous part of a list that belongs to a rank; the parts of all ranks make up the list."""
    low = len(items) * rank // world
    high = len(items) * (rank + 1) // world
    return items[low:high]


# ----------------------------------------
# data
# ----------------------------------------

HEADER_INTS = 256
SHARD_MAGIC = 20240520
_shard_lengths: dict[str, int] = {}
_shard_maps: dict[str, np.memmap] = {}


def shard_length(path: Path) -> int:
    key = str(path)
    if key not in _shard_lengths:
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
        if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
            raise ValueError(f"unexpected shard header: {path}")
        _shard_lengths[key] = int(header[2])
    return _shard_lengths[key]


def map_shard(path: Path) -> np.memmap:
    key = str(path)
    if key not in _shard_maps:
        _shard_maps[key] = np.memmap(
            path,
            mode="r",
            dtype="<u2",
            offset=HEADER_INTS * np.dtype("<i4").itemsize,
            shape=(shard_length(path),),
        )
    return _shard_maps[key]


def find_shards(pattern: str) -> list[Path]:
    found = [Path(p) for p in sorted(glob.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"no shards match {pattern}")
    return found


def read_validation(pattern: str) -> Tensor:
    """The whole validation stream, in order."""
    parts = [np.array(map_shard(p), dtype=np.uint16) for p in find_shards(pattern)]
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))


def make_feed(
    shards: list[Path],
    seed: int,
    rank: int,
    world: int,
    seq_len: int,
    device: torch.device,
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Returns a function that gives the next rows of training text: random shards, random order within a shard."""
    own = shards[rank::world] if len(shards) >= world else shards
    rng = np.random.Generator(np.random.PCG64([seed, rank]))
    starts: dict[int, collections.deque] = {}

    def refill(index: int) -> None:
        length = shard_length(own[index])
        slack = min(seq_len - 1, max(0, length - seq_len - 1))
        phase = int(rng.integers(slack + 1)) if slack else 0
        count = (length - 1 - phase) // seq_len
        order = rng.permutation(count)
        starts[index] = collections.deque((phase + order * seq_len).tolist())

    for i in range(len(own)):
        refill(i)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.empty((rows, seq_len), dtype=torch.int64)
        y = torch.empty((rows, seq_len), dtype=torch.int64)
        for r in range(rows):
            weights = np.array([len(starts[i]) for i in range(len(own))], dtype=np.float64)
            if weights.sum() <= 0:
                for i in range(len(own)):
                    refill(i)
                weights = np.array([len(starts[i]) for i in range(len(own))], dtype=np.float64)
            pick = int(rng.choice(len(own), p=weights / weights.sum()))
            at = starts[pick].popleft()
            piece = np.array(map_shard(own[pick])[at : at + seq_len + 1], dtype=np.int64)
            x[r] = torch.from_numpy(piece[:-1])
            y[r] = torch.from_numpy(piece[1:])
        return (
            x.pin_memory().to(device, non_blocking=True),
            y.pin_memory().to(device, non_blocking=True),
        )

    return draw


# ----------------------------------------
# bytes of tokens
# ----------------------------------------


def byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> SimpleNamespace:
    """For each token: its bytes without a leading space, whether it has one, whether it stands before a text."""
    pieces = int(sp.vocab_size())
    size = max(pieces, vocab_size)
    width = np.zeros(size, dtype=np.int16)
    spaced = np.zeros(size, dtype=bool)
    edge = np.ones(size, dtype=bool)
    for token in range(pieces):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        edge[token] = False
        if sp.is_byte(token):
            width[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("\u2581"):
            spaced[token] = True
            piece = piece[1:]
        width[token] = len(piece.encode("utf-8"))
    return SimpleNamespace(
        width=torch.tensor(width, dtype=torch.int16, device=device),
        spaced=torch.tensor(spaced, dtype=torch.bool, device=device),
        edge=torch.tensor(edge, dtype=torch.bool, device=device),
        bos=int(sp.bos_id()),
    )


def count_bytes(tables: SimpleNamespace, before: Tensor, target: Tensor) -> Tensor:
    """UTF-8 bytes of each target token, given the token before it."""
    space = tables.spaced[target] & ~tables.edge[before]
    return tables.width[target].to(torch.float64) + space.to(torch.float64)


# ----------------------------------------
# model
# ----------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rope_tables(seq_len: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims))
    t = torch.arange(seq_len, dtype=torch.float32, device=device)
    angle = torch.outer(t, inv)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    turned, kept = x[..., :dims], x[..., dims:]
    half = dims // 2
    a, b = turned[..., :half], turned[..., half:]
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, kept), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(rows, length, heads, width) in and out; grouped query heads."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=q.size(2) != k.size(2),
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, s: SimpleNamespace):
        super().__init__()
        self.heads = s.num_heads
        self.kv_heads = s.num_kv_heads
        self.width = s.model_dim // s.num_heads
        self.rope_dims = s.rope_dims if s.rope_dims > 0 else self.width
        kv_dim = self.kv_heads * self.width
        self.c_q = CastLinear(s.model_dim, s.model_dim, bias=False)
        self.c_k = CastLinear(s.model_dim, kv_dim, bias=False)
        self.c_v = CastLinear(s.model_dim, kv_dim, bias=False)
        self.proj = CastLinear(s.model_dim, s.model_dim, bias=False)
        self.proj.zero_init = True
        self.q_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain_init, dtype=torch.float32))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, dim = x.shape
        q = self.c_q(x).reshape(rows, length, self.heads, self.width)
        k = self.c_k(x).reshape(rows, length, self.kv_heads, self.width)
        v = self.c_v(x).reshape(rows, length, self.kv_heads, self.width)
        q = rotate(rms(q), cos, sin, self.rope_dims)
        k = rotate(rms(k), cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = causal_attention(q, k, v)
        return self.proj(y.reshape(rows, length, dim))


class FeedForward(nn.Module):
    def __init__(self, s: SimpleNamespace):
        super().__init__()
        hidden = int(s.mlp_mult * s.model_dim)
        self.fc = CastLinear(s.model_dim, hidden, bias=False)
        self.proj = CastLinear(hidden, s.model_dim, bias=False)
        self.proj.zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Layer(nn.Module):
    def __init__(self, s: SimpleNamespace, index: int):
        super().__init__()
        dim = s.model_dim
        self.attn = Attention(s)
        self.mlp = FeedForward(s)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.depth_scale = 1.0 / math.sqrt(index + 1) if s.depth_scale else 1.0
        self.parallel = index >= s.parallel_from

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        a = self.attn(rms(x) * self.depth_scale, cos, sin)
        if self.parallel:
            m = self.mlp(rms(x) * self.depth_scale)
            return x + self.attn_scale.to(x.dtype) * a + self.mlp_scale.to(x.dtype) * m
        x = x + self.attn_scale.to(x.dtype) * a
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.depth_scale)


def layer_order(s: SimpleNamespace, looped: bool) -> tuple[list[int], list[int]]:
    """Which layers run in the first half (that leaves skips) and in the second (that takes them)."""
    order = list(range(s.num_layers))
    if looped:
        loop = list(range(s.loop_first, s.loop_last + 1))
        order = order[: s.loop_last + 1] + loop * s.loop_extra + order[s.loop_last + 1 :]
    middle = len(order) // 2
    return order[:middle], order[middle:]


def bigram_bucket(tokens: Tensor, buckets: int, bos: int) -> Tensor:
    """A bucket for each position from its token and the one before, which is not looked at over a document's start."""
    before = F.pad(tokens[:, :-1], (1, 0), value=0)
    before = torch.where(tokens == bos, torch.zeros_like(before), before)
    return (tokens * 36313 + before * 27191 + 7) % buckets


class LoopedGPT(nn.Module):
    def __init__(self, s: SimpleNamespace):
        super().__init__()
        self.s = s
        self.tok_emb = nn.Embedding(s.vocab_size, s.model_dim)
        self.layers = nn.ModuleList([Layer(s, i) for i in range(s.num_layers)])
        self.first_half, self.second_half = layer_order(s, False)
        most = max(len(h) for h in layer_order(s, True))
        self.skip_weights = nn.Parameter(torch.ones(most, s.model_dim, dtype=torch.float32))
        self.skip_gates = nn.Parameter(torch.zeros(most, s.model_dim, dtype=torch.float32)) if s.skip_gates else None
        self.hash_emb: nn.Embedding | None = None
        self.hash_bos = -1
        self._rope: dict[int, tuple[Tensor, Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.s.embed_init_std)
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                continue
            if getattr(module, "zero_init", False):
                nn.init.zeros_(module.weight)
            elif min(module.weight.shape) >= 64:
                nn.init.orthogonal_(module.weight, gain=1.0)

    def set_loop(self, on: bool) -> None:
        self.first_half, self.second_half = layer_order(self.s, on)

    def rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if length not in self._rope:
            dims = self.layers[0].attn.rope_dims
            self._rope[length] = rope_tables(length, dims, self.s.rope_base, device)
        return self._rope[length]

    def take_skip(self, x: Tensor, left: Tensor, i: int) -> Tensor:
        left = self.skip_weights[i].to(x.dtype) * left
        if self.skip_gates is None:
            return x + left
        gate = torch.sigmoid(self.skip_gates[i].to(x.dtype))
        return torch.lerp(left, x, gate)

    def hidden(self, tokens: Tensor) -> Tensor:
        cos, sin = self.rope(tokens.size(1), tokens.device)
        x = self.tok_emb(tokens)
        if self.hash_emb is not None:
            x = x + self.hash_emb(bigram_bucket(tokens, self.s.hash_buckets, self.hash_bos)).to(x.dtype)
        x = rms(x)
        x0 = x
        skips: list[Tensor] = []
        for index in self.first_half:
            x = self.layers[index](x, x0, cos, sin)
            skips.append(x)
        for i, index in enumerate(self.second_half):
            if skips:
                x = self.take_skip(x, skips.pop(), i)
            x = self.layers[index](x, x0, cos, sin)
        return rms(x)

    def logits(self, tokens: Tensor) -> Tensor:
        raw = F.linear(self.hidden(tokens), self.tok_emb.weight.to(torch.bfloat16))
        cap = self.s.logit_softcap
        return cap * torch.tanh(raw / cap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(tokens)
        return F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(),
            targets.reshape(-1),
            reduction="mean",
        )


def keep_float(model: nn.Module) -> None:
    """Scales and gates stay in float32; matrices are kept in float32 too and are cast where they are used."""
    for name, p in model.named_parameters():
        if p.ndim < 2 or any(c in name for c in CONTROL_NAMES):
            p.data = p.data.float()


def build_model(s: SimpleNamespace, device: torch.device) -> LoopedGPT:
    model = LoopedGPT(s).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastLinear):
            module.float()
    keep_float(model)
    return model


# ----------------------------------------
# optimisers
# ----------------------------------------


@torch.compile
def orthogonalise(g: Tensor, steps: int) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.T if tall else x


class MuonEqR(torch.optim.Optimizer):
    """Muon on rows of equal norm; the matrices are divided among the ranks."""

    def __init__(self, params, lr: float, momentum: float, ns_steps: int, row_norm: bool, weight_decay: float):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                ns_steps=ns_steps,
                row_norm=row_norm,
                weight_decay=weight_decay,
            ),
        )

    @torch.no_grad()
    def step(self) -> None:
        many = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if many else 1
        rank = dist.get_rank() if many else 0
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(
                sum(p.numel() for p in params),
                device=params[0].device,
                dtype=torch.bfloat16,
            )
            at = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(p.grad)
                    buffer = state["buffer"]
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buffer, alpha=group["momentum"])
                    if group["row_norm"]:
                        g = g / g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).to(g.dtype)
                    g = orthogonalise(g, group["ns_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if many:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


def make_optimizers(s: SimpleNamespace, model: LoopedGPT) -> list[torch.optim.Optimizer]:
    matrices, scalars = [], []
    for name, p in model.layers.named_parameters():
        if p.ndim == 2 and not any(c in name for c in CONTROL_NAMES):
            matrices.append(p)
        else:
            scalars.append(p)
    scalars.append(model.skip_weights)
    if model.skip_gates is not None:
        scalars.append(model.skip_gates)
    adam = dict(betas=(s.beta1, s.beta2), eps=s.adam_eps, fused=True)
    embed_opt = torch.optim.AdamW(
        [{"params": [model.tok_emb.weight], "lr": s.embed_lr}],
        weight_decay=s.embed_wd,
        **adam,
    )
    muon = MuonEqR(
        matrices,
        lr=s.matrix_lr,
        momentum=s.muon_momentum,
        ns_steps=s.muon_ns_steps,
        row_norm=s.muon_row_norm,
        weight_decay=s.muon_wd,
    )
    scalar_opt = torch.optim.AdamW(
        [{"params": scalars, "lr": s.scalar_lr}],
        weight_decay=s.adam_wd,
        **adam,
    )
    made = [embed_opt, muon, scalar_opt]
    for opt in made:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return made


# ----------------------------------------
# weight average
# ----------------------------------------


def ema_start(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().float().clone() for name, t in model.state_dict().items()}


@torch.no_grad()
def ema_update(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, t in model.state_dict().items():
        ema[name].mul_(decay).add_(t.detach().float(), alpha=1.0 - decay)


def ema_apply(ema: dict[str, Tensor], model: nn.Module) -> None:
    now = model.state_dict()
    model.load_state_dict({name: t.to(now[name].dtype) for name, t in ema.items()}, strict=True)


# ----------------------------------------
# quantisation
# ----------------------------------------


def collect_hessians(
    s: SimpleNamespace,
    model: LoopedGPT,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    rows: int,
    deadline: float,
    device: torch.device,
) -> tuple[dict[str, Tensor], int]:
    """X'X at the input of every matrix (and at the output head for the embedding), over training rows, until the
    deadline at the latest."""
    grams: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(_module, inputs, _output) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in grams:
                grams[name] = torch.zeros(x.size(1), x.size(1), dtype=torch.float32, device=device)
            grams[name].addmm_(x.T, x)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, CastLinear) and module.weight.numel() > 65536:
            handles.append(module.register_forward_hook(watch(name + ".weight")))

    def head_hook(_module, _inputs, output) -> None:
        x = output.detach().reshape(-1, output.size(-1)).float()
        key = "tok_emb.weight"
        if key not in grams:
            grams[key] = torch.zeros(x.size(1), x.size(1), dtype=torch.float32, device=device)
        grams[key].addmm_(x.T, x)

    handles.append(model.layers[-1].register_forward_hook(lambda m, i, o: head_hook(m, i, rms(o))))
    model.eval()
    done = 0
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(s.gptq_batches):
            stop = torch.tensor(int(time.perf_counter() > deadline), device=device)
            if int(sum_over_ranks(stop).item()) > 0:
                break
            x, _ = draw(rows)
            model.logits(x)
            done += 1
    for handle in handles:
        handle.remove()
    for gram in grams.values():
        sum_over_ranks(gram)
        gram.div_(max(done, 1))
    return {name: gram.cpu() for name, gram in grams.items()}, done


def quantise_plain(w: Tensor, sds: float, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    scale = (sds * w.float().std(dim=1) / top).clamp_min(1e-10).to(torch.float16)
    q = torch.clamp(torch.round(w.float() / scale.float()[:, None]), -top, top)
    return q.to(torch.int8), scale


def quantise_gptq(
    w: Tensor,
    gram: Tensor,
    sds: float,
    bits: int,
    block: int,
    damp: float,
) -> tuple[Tensor, Tensor]:
    """Column by column, the error of each handed on to the columns that follow. The clip is a number of standard
    deviations of the row."""
    top = 2 ** (bits - 1) - 1
    original = w.float().clone()
    rows, cols = original.shape
    h = gram.float().clone()
    dead = torch.diag(h) == 0
    h[dead, dead] = 1.0
    h.diagonal().add_(damp * torch.diag(h).mean())
    order = torch.argsort(torch.diag(h), descending=True)
    back = torch.argsort(order)
    work = original[:, order].clone()
    work[:, dead[order]] = 0.0
    h = h[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    scale = (sds * original.std(dim=1) / top).clamp_min(1e-10).to(torch.float16)
    sf = scale.float()
    q = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    for low in range(0, cols, block):
        high = min(low + block, cols)
        part = work[:, low:high].clone()
        left = torch.zeros_like(part)
        corner = upper[low:high, low:high]
        for j in range(high - low):
            column = part[:, j]
            level = torch.clamp(torch.round(column / sf), -top, top)
            q[:, low + j] = level.to(torch.int8)
            err = (column - level * sf) / corner[j, j]
            left[:, j] = err
            part[:, j:] -= err[:, None] * corner[j, j:][None, :]
        if high < cols:
            work[:, high:] -= left @ upper[low:high, high:]
    return q[:, back], scale


def quantise_state(
    s: SimpleNamespace,
    state: dict[str, Tensor],
    grams: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    out: dict[str, Tensor] = {}
    how: dict[str, str] = {}
    for name, tensor in state.items():
        t = tensor.detach()
        if not t.is_floating_point() or t.numel() <= 65536:
            out[name] = (t.to(torch.float16) if t.is_floating_point() else t).cpu().contiguous()
            how[name] = "kept (float16)"
            continue
        embed = "tok_emb" in name
        bits = s.embed_bits if embed else s.matrix_bits
        sds = s.embed_clip_sds if embed else s.matrix_clip_sds
        if name in grams:
            q, scale = quantise_gptq(t, grams[name].to(t.device), sds, bits, s.gptq_block, s.gptq_damp)
            how[name] = f"gptq (int{bits})"
        else:
            q, scale = quantise_plain(t, sds, bits)
            how[name] = f"rounded (int{bits})"
        out[name + ".q"] = q.cpu().contiguous()
        out[name + ".scale"] = scale.cpu().contiguous()
    return out, how


def dequantise_state(
    packed: dict[str, Tensor],
    how: dict[str, str],
    like: dict[str, Tensor],
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, model_tensor in like.items():
        if how[name].startswith("kept"):
            out[name] = packed[name].to(model_tensor.dtype)
            continue
        q = packed[name + ".q"].float()
        out[name] = (q * packed[name + ".scale"].float()[:, None]).to(model_tensor.dtype)
    return out


SHUFFLE_MARK = b"BSH1"


def shuffle_bytes(raw: bytes, stride: int) -> bytes:
    if stride <= 1 or len(raw) < stride:
        return raw
    src = np.frombuffer(raw, dtype=np.uint8)
    return SHUFFLE_MARK + bytes([stride]) + b"".join(src[i::stride].tobytes() for i in range(stride))


def unshuffle_bytes(raw: bytes) -> bytes:
    if raw[:4] != SHUFFLE_MARK:
        return raw
    stride = raw[4]
    src = np.frombuffer(raw, dtype=np.uint8, offset=5)
    out = np.empty(src.size, dtype=np.uint8)
    at = 0
    for i in range(stride):
        count = (src.size - i + stride - 1) // stride
        out[i::stride] = src[at : at + count]
        at += count
    return out.tobytes()


def squeeze(raw: bytes, stride: int) -> bytes:
    return brotli.compress(shuffle_bytes(raw, stride), quality=11, lgwin=24)


def unsqueeze(blob: bytes) -> bytes:
    return unshuffle_bytes(brotli.decompress(blob))


WRAPPER = 'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("%s")))\n'


def wrapped_code_bytes(source: str) -> int:
    """Size of this script as one that extracts itself."""
    packed = lzma.compress(
        source.encode("utf-8"),
        format=lzma.FORMAT_XZ,
        preset=9 | lzma.PRESET_EXTREME,
    )
    return len((WRAPPER % base64.b85encode(packed).decode("ascii")).encode("utf-8"))


def write_artifact(s: SimpleNamespace, model: LoopedGPT, grams: dict[str, Tensor], source: str, main: bool) -> int:
    """Quantises, packs and writes the model; returns the size of code and model."""
    packed, how = quantise_state(s, model.state_dict(), grams)
    kinds = collections.Counter(how.values())
    log("quantised: " + ", ".join(f"{count} tensors {kind}" for kind, count in sorted(kinds.items())))
    buffer = io.BytesIO()
    torch.save({"tensors": packed, "how": how}, buffer)
    blob = squeeze(buffer.getvalue(), s.shuffle_stride)
    model_bytes = len(blob)
    plain_code = len(source.encode("utf-8"))
    code_bytes = wrapped_code_bytes(source)
    total = model_bytes + code_bytes
    if main:
        with open(s.packed_path, "wb") as f:
            f.write(blob)
        log(f"Serialized model quantized+brotli: {model_bytes} bytes")
        log(f"Code size (wrapped): {code_bytes} bytes, as it stands: {plain_code} bytes")
        log(f"Total submission size quantized+brotli: {total} bytes")
        log(f"Total with the code as it stands: {model_bytes + plain_code} bytes")
    if model_bytes + max(code_bytes, plain_code) > s.size_limit:
        raise RuntimeError(f"over the size limit of {s.size_limit} bytes")
    return total


def load_artifact(s: SimpleNamespace, device: torch.device) -> LoopedGPT:
    model = build_model(s, device)
    with open(s.packed_path, "rb") as f:
        raw = unsqueeze(f.read())
    content = torch.load(io.BytesIO(raw), map_location="cpu")
    model.load_state_dict(
        dequantise_state(content["tensors"], content["how"], model.state_dict()),
        strict=True,
    )
    model.set_loop(True)
    return model


# ----------------------------------------
# evaluation
# ----------------------------------------

Window = tuple[int, int, int]  # begin, end, first position that counts
STAGE_SECONDS: dict[str, float] = {}


def plan_windows(total: int, seq_len: int, stride: int) -> list[Window]:
    """Windows in which each of the stream's positions counts once, with as much context as the stride leaves."""
    keep = seq_len - stride
    plan = [(0, min(seq_len, total), 0)]
    at = stride
    while at + keep < total:
        plan.append((at, min(at + seq_len, total), keep))
        at += stride
    return plan


def pack_windows(
    group: list[Window],
    tokens: Tensor,
    width: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.zeros((len(group), width), dtype=torch.int64)
    y = torch.zeros((len(group), width), dtype=torch.int64)
    live = torch.zeros((len(group), width), dtype=torch.bool)
    for r, (begin, end, first) in enumerate(group):
        piece = tokens[begin : end + 1].long()
        x[r, : end - begin] = piece[:-1]
        y[r, : end - begin] = piece[1:]
        live[r, first : end - begin] = True
    return x.to(device), y.to(device), live.to(device)


@torch.no_grad()
def score_windows(
    s: SimpleNamespace,
    logits_of: Callable[[Tensor], Tensor],
    windows: list[Window],
    tokens: Tensor,
    tables: SimpleNamespace,
    device: torch.device,
) -> Tensor:
    """Sum of losses, number of tokens and number of bytes over the positions that count."""
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for low in range(0, len(windows), s.eval_batch):
        group = windows[low : low + s.eval_batch]
        x, y, live = pack_windows(group, tokens, s.eval_seq_len, device)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_of(x)
        nll = F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(),
            y.reshape(-1),
            reduction="none",
        ).reshape(y.shape)
        totals[0] += nll[live].to(torch.float64).sum()
        totals[1] += live.sum()
        totals[2] += count_bytes(tables, x[live], y[live]).sum()
    return totals


def figures(totals: Tensor) -> tuple[float, float]:
    """Loss per token in nats and bits per byte."""
    loss_sum, tokens, nbytes = (float(v) for v in totals.tolist())
    return loss_sum / tokens, loss_sum / math.log(2.0) / nbytes


def score_stream(
    s: SimpleNamespace,
    ranks: SimpleNamespace,
    logits_of: Callable[[Tensor], Tensor],
    tokens: Tensor,
    tables: SimpleNamespace,
    stride: int,
) -> Tensor:
    """The whole stream, shared out among the ranks."""
    plan = plan_windows(tokens.numel() - 1, s.eval_seq_len, stride)
    mine = share_of(plan, ranks.rank, ranks.world)
    return sum_over_ranks(score_windows(s, logits_of, mine, tokens, tables, ranks.device))


def stage(name: str, run: Callable[[], Tensor]) -> tuple[float, float]:
    """Runs one stage of the evaluation, logs its figures and keeps its time."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    totals = run()
    torch.cuda.synchronize()
    STAGE_SECONDS[name] = time.perf_counter() - begun
    loss, bpb = figures(totals)
    log(
        f"{name} val_loss:{loss:.8f} val_bpb:{bpb:.8f} "
        f"tokens:{int(totals[1])} bytes:{int(totals[2])} eval_time:{1000 * STAGE_SECONDS[name]:.0f}ms"
    )
    return loss, bpb


# ----------------------------------------
# test-time training
# ----------------------------------------


def cosine(base: float, at: int, of: int) -> float:
    return base * 0.5 * (1.0 + math.cos(math.pi * at / max(of, 1)))


def plan_chunks(windows: list[Window], total: int, chunk: int) -> list[list[Window]]:
    """A window belongs to the chunk in which its first counting position lies."""
    chunks: list[list[Window]] = [[] for _ in range((total + chunk - 1) // chunk)]
    for window in windows:
        chunks[(window[0] + window[2]) // chunk].append(window)
    return chunks


def add_hash_embedding(s: SimpleNamespace, model: LoopedGPT, bos: int, device: torch.device) -> None:
    """A table of bigram vectors that starts at zero and learns at test time only."""
    model.hash_emb = nn.Embedding(s.hash_buckets, s.model_dim, device=device, dtype=torch.float32)
    nn.init.zeros_(model.hash_emb.weight)
    model.hash_bos = bos


def ttt_optimizer(s: SimpleNamespace, model: LoopedGPT) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    table = [] if model.hash_emb is None else list(model.hash_emb.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("hash_emb")]
    groups = [{"params": others, "lr": s.ttt_lr, "mult": 1.0}]
    if table:
        groups.append({"params": table, "lr": s.ttt_lr, "mult": s.hash_lr_mult})
    for p in others + table:
        p.requires_grad_(True)
    return torch.optim.SGD(groups, lr=s.ttt_lr, momentum=s.ttt_momentum), others + table


def chunk_rows(tokens: Tensor, starts: list[int], seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.stack([tokens[a : a + seq_len + 1].long() for a in starts])
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


def adapt_on_chunk(
    s: SimpleNamespace,
    ranks: SimpleNamespace,
    model: LoopedGPT,
    opt: torch.optim.Optimizer,
    params: list[nn.Parameter],
    tokens: Tensor,
    begin: int,
    end: int,
    chunk_lr: float,
) -> None:
    """Several epochs over one chunk; the learning rate falls along a cosine."""
    starts = list(range(begin, end - s.eval_seq_len + 1, s.eval_seq_len))
    per_step = ranks.world * s.ttt_rows
    steps = (len(starts) + per_step - 1) // per_step
    model.train()
    for epoch in range(s.ttt_epochs):
        for k in range(steps):
            lr = cosine(chunk_lr, epoch * steps + k, s.ttt_epochs * steps)
            for group in opt.param_groups:
                group["lr"] = lr * group["mult"]
            opt.zero_grad(set_to_none=True)
            at = k * per_step + ranks.rank * s.ttt_rows
            own = starts[at : at + s.ttt_rows]
            if own:
                x, y = chunk_rows(tokens, own, s.eval_seq_len, ranks.device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x, y)
                loss.backward()
            mean_gradients(params, ranks.world)
            torch.nn.utils.clip_grad_norm_(params, s.ttt_clip)
            opt.step()
    model.eval()


def score_first_ttt(
    s: SimpleNamespace,
    ranks: SimpleNamespace,
    model: LoopedGPT,
    tokens: Tensor,
    tables: SimpleNamespace,
) -> Tensor:
    """Every chunk is scored by the model that has learned from the chunks before it; only then is it learned."""
    total = tokens.numel() - 1
    windows = plan_windows(total, s.eval_seq_len, s.eval_stride)
    chunks = plan_chunks(windows, total, s.ttt_chunk_tokens)
    if s.hash_embed:
        add_hash_embedding(s, model, tables.bos, ranks.device)
    opt, params = ttt_optimizer(s, model)
    logits_of = torch.compile(model.logits, dynamic=False)
    totals = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    begun = time.perf_counter()
    model.eval()
    for c, members in enumerate(chunks):
        begin, end = c * s.ttt_chunk_tokens, min((c + 1) * s.ttt_chunk_tokens, total)
        mine = share_of(members, ranks.rank, ranks.world)
        totals += score_windows(s, logits_of, mine, tokens, tables, ranks.device)
        if c + 1 < len(chunks):
            chunk_lr = cosine(s.ttt_lr, c, len(chunks) - 1)
            adapt_on_chunk(s, ranks, model, opt, params, tokens, begin, end, chunk_lr)
        if ranks.main and c % 100 == 0:
            log(f"ttt chunk:{c + 1}/{len(chunks)} time:{time.perf_counter() - begun:.1f}s")
    return sum_over_ranks(totals)


# ----------------------------------------
# training
# ----------------------------------------


def make_clock() -> SimpleNamespace:
    """A stop watch: go(), halt() and read() in seconds."""
    state = {"sum": 0.0, "since": None}

    def go() -> None:
        torch.cuda.synchronize()
        state["since"] = time.perf_counter()

    def halt() -> None:
        torch.cuda.synchronize()
        state["sum"] += time.perf_counter() - state["since"]
        state["since"] = None

    def read() -> float:
        running = 0.0 if state["since"] is None else time.perf_counter() - state["since"]
        return state["sum"] + running

    return SimpleNamespace(go=go, halt=halt, read=read)


def progress_of(s: SimpleNamespace, step: int, seconds: float, budget: float | None) -> float:
    if budget is None:
        return step / max(s.iterations, 1)
    return max(step / max(s.iterations, 1), seconds / budget)


def lr_factor(s: SimpleNamespace, progress: float) -> float:
    if progress < 1.0 - s.warmdown_frac:
        return 1.0
    return max((1.0 - progress) / max(s.warmdown_frac, 1e-9), s.min_lr_frac)


def train_step(
    s: SimpleNamespace,
    ranks: SimpleNamespace,
    model: LoopedGPT,
    forward: Callable[[Tensor, Tensor], Tensor],
    opts: list[torch.optim.Optimizer],
    draw: Callable[[int], tuple[Tensor, Tensor]],
    step: int,
    factor: float,
) -> Tensor:
    """One optimiser step on one batch of training text; returns its loss."""
    rows = s.train_batch_tokens // (s.train_seq_len * ranks.world * ranks.accum)
    loss_sum = torch.zeros((), device=ranks.device)
    for opt in opts:
        opt.zero_grad(set_to_none=True)
    for _ in range(ranks.accum):
        x, y = draw(rows)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = forward(x, y)
        loss_sum += loss.detach()
        (loss / ranks.accum).backward()
    mean_gradients(model.parameters(), ranks.world)
    warm = min(step / max(s.muon_momentum_steps, 1), 1.0)
    momentum = (1.0 - warm) * s.muon_momentum_start + warm * s.muon_momentum
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * factor
            if isinstance(opt, MuonEqR):
                group["momentum"] = momentum
    if s.grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
    for opt in opts:
        opt.step()
    return loss_sum / ranks.accum


def warm_up(
    s: SimpleNamespace,
    ranks: SimpleNamespace,
    model: LoopedGPT,
    forward: Callable[[Tensor, Tensor], Tensor],
    opts: list[torch.optim.Optimizer],
    draw: Callable[[int], tuple[Tensor, Tensor]],
) -> None:
    """Compiles both layer orders on a few steps whose effect is undone."""
    weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    states = [copy.deepcopy(opt.state_dict()) for opt in opts]
    for looped in (False, True):
        model.set_loop(looped)
        for i in range(s.warmup_steps):
            train_step(s, ranks, model, forward, opts, draw, 0, 1.0)
            if i + 1 == s.warmup_steps:
                log(f"warmup loop:{int(looped)} steps:{i + 1}/{s.warmup_steps}")
    model.set_loop(False)
    model.load_state_dict(weights, strict=True)
    for opt, state in zip(opts, states):
        opt.load_state_dict(state)
        opt.zero_grad(set_to_none=True)


def should_stop(ranks: SimpleNamespace, seconds: float, budget: float | None) -> bool:
    """The ranks agree on when the time is up."""
    if budget is None:
        return False
    flag = torch.tensor(int(seconds >= budget), device=ranks.device)
    if ranks.many:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def train(
    s: SimpleNamespace,
    ranks: SimpleNamespace,
    model: LoopedGPT,
    tokens: Tensor,
    tables: SimpleNamespace,
) -> dict[str, Tensor]:
    """Trains until the cap less the reserve, then applies the average and collects the Hessians in the reserve."""
    shards = find_shards(s.train_pattern)
    model.rope(s.train_seq_len, ranks.device)
    forward = torch.compile(model, dynamic=False)
    opts = make_optimizers(s, model)
    feed = make_feed(shards, s.seed, ranks.rank, ranks.world, s.train_seq_len, ranks.device)
    if s.warmup_steps > 0:
        warm_up(s, ranks, model, forward, opts, feed)
        feed = make_feed(shards, s.seed, ranks.rank, ranks.world, s.train_seq_len, ranks.device)

    cap = s.max_wallclock_seconds if s.max_wallclock_seconds > 0 else None
    budget = None if cap is None else cap - s.gptq_reserve_seconds
    ema = ema_start(model)
    clock = make_clock()
    looped = False
    stopping = False
    step = 0
    clock.go()
    while True:
        last = stopping or step == s.iterations
        if last or (s.val_loss_every > 0 and step > 0 and step % s.val_loss_every == 0):
            clock.halt()
            totals = score_stream(s, ranks, model.logits, tokens, tables, s.eval_seq_len)
            val_loss, val_bpb = figures(totals)
            log(
                f"step:{step}/{s.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{1000 * clock.read():.0f}ms"
            )
            model.train()
            clock.go()
        if last:
            break
        progress = progress_of(s, step, clock.read(), budget)
        if not looped and progress >= s.loop_at:
            looped = True
            model.set_loop(True)
            log(f"loop on at step:{step} order:{model.first_half}+{model.second_half}")
        train_loss = train_step(s, ranks, model, forward, opts, feed, step, lr_factor(s, progress))
        ema_update(ema, model, s.ema_decay)
        step += 1
        seconds = clock.read()
        if s.train_log_every > 0 and (step <= 5 or step % s.train_log_every == 0):
            log(
                f"step:{step}/{s.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{seconds / 60:.2f}m tok/s:{step * s.train_batch_tokens / seconds:.0f}"
            )
        stopping = should_stop(ranks, seconds, budget)
        if stopping:
            log(f"stopping_early: wallclock_cap train_time:{1000 * seconds:.0f}ms step:{step}/{s.iterations}")

    log("ema: applying the average of the weights")
    ema_apply(ema, model)
    model.set_loop(True)
    deadline = math.inf if cap is None else time.perf_counter() + cap - clock.read()
    calib_feed = make_feed(shards, s.seed + 1, ranks.rank, ranks.world, s.train_seq_len, ranks.device)
    grams, batches = collect_hessians(s, model, calib_feed, 8, deadline - 2.0, ranks.device)
    clock.halt()
    log(f"hessians: {len(grams)} matrices, {batches} batches, train and calibration {1000 * clock.read():.0f}ms")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    return grams


# ----------------------------------------
# main
# ----------------------------------------


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def prepare_torch() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64


def describe(s: SimpleNamespace, ranks: SimpleNamespace, source: str) -> None:
    log(source, console=False)
    log(f"Python {sys.version}", console=False)
    log(f"PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(
        ["nvidia-smi"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    log(smi.stdout, console=False)
    log("settings:")
    for name, value in sorted(vars(s).items()):
        log(f"  {name}: {value}")
    log(f"world_size:{ranks.world} grad_accum:{ranks.accum}")


def load_tokenizer(s: SimpleNamespace, device: torch.device) -> SimpleNamespace:
    sp = spm.SentencePieceProcessor(model_file=s.tokenizer_path)
    if int(sp.vocab_size()) != s.vocab_size:
        raise ValueError(f"VOCAB_SIZE={s.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    return byte_tables(sp, s.vocab_size, device)


def evaluate_all(
    s: SimpleNamespace,
    ranks: SimpleNamespace,
    model: LoopedGPT,
    grams: dict[str, Tensor],
    tokens: Tensor,
    tables: SimpleNamespace,
    source: str,
) -> None:
    """The stages in turn; the last line holds the result."""
    model.eval()
    stage(
        "pre-quantization",
        lambda: score_stream(s, ranks, model.logits, tokens, tables, s.eval_seq_len),
    )
    write_artifact(s, model, grams, source, ranks.main)
    if ranks.many:
        dist.barrier()

    packed = load_artifact(s, ranks.device)
    packed.eval()
    result = stage(
        "quantized_roundtrip",
        lambda: score_stream(s, ranks, packed.logits, tokens, tables, s.eval_seq_len),
    )
    final = "roundtrip"
    if s.sliding_enabled:
        result = stage(
            "quantized_sliding_window",
            lambda: score_stream(s, ranks, torch.compile(packed.logits), tokens, tables, s.eval_stride),
        )
        final = "sliding_window"
    if s.ttt_enabled:
        del packed
        torch._dynamo.reset()
        learner = load_artifact(s, ranks.device)
        result = stage(
            "quantized_ttt",
            lambda: score_first_ttt(s, ranks, learner, tokens, tables),
        )
        final = "ttt"

    spent = sum(STAGE_SECONDS.values())
    log(f"eval stages took {spent:.1f}s of {s.eval_cap_seconds:.0f}s")
    if spent > s.eval_cap_seconds:
        raise RuntimeError("the evaluation took too long")
    log(f"final_{final}_exact val_loss:{result[0]:.8f} val_bpb:{result[1]:.8f}")


def main() -> None:
    s = read_settings()
    source = Path(__file__).read_text(encoding="utf-8")
    ranks = open_ranks()
    prepare_torch()
    if ranks.main:
        os.makedirs("logs", exist_ok=True)
        _log_target.append(s.log_path)
    describe(s, ranks, source)
    seed_all(s.seed)

    tables = load_tokenizer(s, ranks.device)
    tokens = read_validation(s.val_pattern)
    log(f"train shards: {len(find_shards(s.train_pattern))}")
    log(f"val tokens: {tokens.numel() - 1}, documents: {int((tokens == tables.bos).sum())}")

    model = build_model(s, ranks.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    grams = train(s, ranks, model, tokens, tables)
    if ranks.main:
        torch.save(model.state_dict(), s.float_path)
    evaluate_all(s, ranks, model, grams, tokens, tables, source)
    if ranks.many:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
