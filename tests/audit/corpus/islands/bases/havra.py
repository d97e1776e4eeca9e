"""
train_gpt.py - SP8192, 11 layers, looped middle (3..5, three visits), parallel residuals from layer 7 on,
MuonEq-R, per-head QK gain, EMA, int6 GPTQ + SDClip, int8 embeddings, byte shuffle + brotli-11,
sliding window evaluation and chunked test-time training (score a chunk, then learn from it).

    torchrun --standalone --nproc_per_node=8 train_gpt.py

One file, nothing minified. Needs: torch >= 2.9, sentencepiece, brotli, numpy, flash_attn_3 (falls back on SDPA).
"""

import contextlib
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
from dataclasses import dataclass, field
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func
except ImportError:
    flash_attn_3_func = None


# ----------------------------------------------------------------------------------------------------------------------
# Settings. All of them can be set from outside, the defaults are the submitted run.
# ----------------------------------------------------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, "1" if default else "0")))


class Hyperparameters:
    # run
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)
    log_dir = os.environ.get("LOG_DIR", "logs")
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")

    # data
    data_dir = os.environ.get("DATA_DIR", "./data/")
    vocab_size = env_int("VOCAB_SIZE", 8192)
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    bos_id = env_int("BOS_ID", 1)

    # training length
    iterations = env_int("ITERATIONS", 20000)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env_float("GPTQ_RESERVE_SECONDS", 13.0)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    warmdown_frac = env_float("WARMDOWN_FRAC", 0.72)
    min_lr = env_float("MIN_LR", 0.0)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 2048 * 48 * 8)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)

    # model
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 4.0)
    rope_base = env_float("ROPE_BASE", 10000.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    qk_gain_init = env_float("QK_GAIN_INIT", 5.25)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    xsa_last_n = env_int("XSA_LAST_N", 11)
    ln_scale = env_flag("LN_SCALE", True)
    smear_enabled = env_flag("SMEAR_ENABLED", True)
    smear_width = env_int("SMEAR_WIDTH", 12)
    parallel_from = env_int("PARALLEL_FROM", 7)
    loop_start = env_int("LOOP_START", 3)
    loop_end = env_int("LOOP_END", 5)
    num_loops = env_int("NUM_LOOPS", 2)
    loop_at = env_float("LOOP_AT", 0.35)
    tied_embed_init_std = env_float("TIED_EMBED_INIT_STD", 0.005)

    # optimiser
    matrix_lr = env_float("MATRIX_LR", 0.022)
    embed_lr = env_float("EMBED_LR", 0.03)
    scalar_lr = env_float("SCALAR_LR", 0.02)
    muon_momentum = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_ns_steps = env_int("MUON_NS_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.095)
    embed_wd = env_float("EMBED_WD", 0.085)
    scalar_wd = env_float("SCALAR_WD", 0.02)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    grad_clip_norm = env_float("GRAD_CLIP_NORM", 0.3)
    ema_decay = env_float("EMA_DECAY", 0.9965)

    # quantisation
    matrix_bits = env_int("MATRIX_BITS", 6)
    embed_bits = env_int("EMBED_BITS", 8)
    matrix_clip_sigmas = env_float("MATRIX_CLIP_SIGMAS", 12.85)
    embed_clip_sigmas = env_float("EMBED_CLIP_SIGMAS", 20.0)
    calib_batches = env_int("CALIB_BATCHES", 64)
    calib_rows = env_int("CALIB_ROWS", 8)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    keep_float_numel = env_int("KEEP_FLOAT_NUMEL", 65536)
    shuffle_stride = env_int("SHUFFLE_STRIDE", 2)

    # evaluation
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_rows = env_int("EVAL_ROWS", 32)
    eval_limit_seconds = env_float("EVAL_LIMIT_SECONDS", 600.0)
    eval_margin_seconds = env_float("EVAL_MARGIN_SECONDS", 150.0)
    sliding_enabled = env_flag("SLIDING_ENABLED", True)

    # test-time training
    ttt_enabled = env_flag("TTT_ENABLED", True)
    ttt_chunk_tokens = env_int("TTT_CHUNK_TOKENS", 32768)
    ttt_epochs = env_int("TTT_EPOCHS", 3)
    ttt_lr = env_float("TTT_LR", 0.005)
    ttt_momentum = env_float("TTT_MOMENTUM", 0.9)
    ttt_grad_clip = env_float("TTT_GRAD_CLIP", 1.0)
    ttt_freeze_blocks = env_int("TTT_FREEZE_BLOCKS", 0)

    # hints: the last continuation of the same few tokens gets a bonus on its logit
    hint_enabled = env_flag("HINT_ENABLED", True)
    hint_order = env_int("HINT_ORDER", 4)
    hint_bits = env_int("HINT_BITS", 22)
    hint_beta = env_float("HINT_BETA", 0.75)
    hint_full_streak = env_int("HINT_FULL_STREAK", 3)

    # limits
    size_limit_bytes = 16_000_000


# ----------------------------------------------------------------------------------------------------------------------
# Talking
# ----------------------------------------------------------------------------------------------------------------------

_LOG_FILE: str | None = None
_IS_MAIN = True


def set_log_file(path: str | None, is_main: bool) -> None:
    global _LOG_FILE, _IS_MAIN
    _LOG_FILE = path
    _IS_MAIN = is_main


def log(msg: str, console: bool = True) -> None:
    if not _IS_MAIN:
        return
    if console:
        print(msg, flush=True)
    if _LOG_FILE is not None:
        with open(_LOG_FILE, "a", encoding="utf-8") as f:
            print(msg, file=f)


def log_rule(title: str) -> None:
    log(f"---- {title} " + "-" * max(0, 90 - len(title)))


def log_environment() -> None:
    log(f"Running Python {sys.version.split()[0]}")
    log(f"Running PyTorch {torch.__version__}")
    log(f"attention kernel: {'flash_attn_3' if flash_attn_3_func is not None else 'sdpa'}")
    with contextlib.suppress(OSError):
        out = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
        log(out, console=False)


def log_settings(h: Hyperparameters) -> None:
    log_rule("settings")
    for name in sorted(dir(type(h))):
        if not name.startswith("_"):
            log(f"  {name}: {getattr(h, name)}")


def log_memory(tag: str) -> None:
    peak = torch.cuda.max_memory_allocated() // 2**20
    held = torch.cuda.max_memory_reserved() // 2**20
    log(f"memory[{tag}]: peak {peak} MiB, reserved {held} MiB")


# ----------------------------------------------------------------------------------------------------------------------
# Distributed
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Ctx:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    grad_accum_steps: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup_distributed() -> Ctx:
    if not torch.cuda.is_available():
        raise RuntimeError("this script needs a GPU")
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = env_int("RANK", 0)
    world_size = env_int("WORLD_SIZE", 1)
    local_rank = env_int("LOCAL_RANK", 0)
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so that the batch stays the same")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return Ctx(rank, world_size, local_rank, device, 8 // world_size)


def all_reduce_sum(t: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return t


def barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def from_main(value: float, ctx: Ctx) -> float:
    """Rank 0's value on every rank. Clocks differ between processes, decisions must not."""
    if ctx.world_size == 1:
        return value
    t = torch.tensor([value], dtype=torch.float64, device=ctx.device)
    dist.broadcast(t, src=0)
    return float(t.item())


def share(items: list, rank: int, world_size: int) -> list:
    """A contiguous part of the list for each rank, all parts together are the list."""
    lo = len(items) * rank // world_size
    hi = len(items) * (rank + 1) // world_size
    return items[lo:hi]


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def set_backend_flags() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = 32


# ----------------------------------------------------------------------------------------------------------------------
# Data: shards of 256 int32 header words and uint16 tokens
# ----------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 256 * np.dtype("<i4").itemsize


def read_shard_length(path: str) -> int:
    header = np.fromfile(path, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {path}")
    num_tokens = int(header[2])
    expected = HEADER_BYTES + num_tokens * np.dtype("<u2").itemsize
    actual = os.path.getsize(path)
    if actual != expected:
        raise ValueError(f"{path} has {actual} bytes, expected {expected}")
    return num_tokens


def map_shard(path: str) -> np.ndarray:
    num_tokens = read_shard_length(path)
    return np.memmap(path, mode="r", dtype="<u2", offset=HEADER_BYTES, shape=(num_tokens,))


def load_validation_tokens(pattern: str) -> Tensor:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no validation shards at {pattern}")
    parts = [np.asarray(map_shard(path), dtype=np.int32) for path in files]
    return torch.from_numpy(np.concatenate(parts))


class ShuffledSequenceLoader:
    """Every rank owns some shards, and reads their sequences in random order, from a random phase each time round."""

    def __init__(self, pattern: str, seq_len: int, ctx: Ctx, seed: int):
        files = sorted(glob.glob(pattern))
        if not files:
            raise FileNotFoundError(f"no training shards at {pattern}")
        self.files = files[ctx.rank :: ctx.world_size] or files
        self.total_files = len(files)
        self.seq_len = seq_len
        self.device = ctx.device
        self.rng = np.random.Generator(np.random.PCG64([seed, ctx.rank]))
        self.lengths = [read_shard_length(path) for path in self.files]
        self.maps: dict[int, np.ndarray] = {}
        self.starts: list[list[int]] = [[] for _ in self.files]
        self.rounds = 0
        self.refill()

    def refill(self) -> None:
        for k, length in enumerate(self.lengths):
            room = length - 1 - self.seq_len
            if room < 0:
                continue
            phase = int(self.rng.integers(0, min(self.seq_len, room + 1)))
            count = (length - 1 - phase) // self.seq_len
            self.starts[k] = [phase + self.seq_len * int(i) for i in self.rng.permutation(count)]
        self.rounds += 1

    def left(self) -> np.ndarray:
        return np.array([len(s) for s in self.starts], dtype=np.float64)

    def take(self) -> np.ndarray:
        left = self.left()
        if left.sum() == 0:
            self.refill()
            left = self.left()
        k = int(self.rng.choice(len(left), p=left / left.sum()))
        start = self.starts[k].pop()
        if k not in self.maps:
            self.maps[k] = map_shard(self.files[k])
        return np.asarray(self.maps[k][start : start + self.seq_len + 1], dtype=np.int64)

    def next_batch(self, rows: int) -> tuple[Tensor, Tensor]:
        block = torch.from_numpy(np.stack([self.take() for _ in range(rows)])).pin_memory()
        block = block.to(self.device, non_blocking=True)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Bytes: what a token is worth in the original text
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ByteTables:
    """Per token: its bytes without a leading space, whether it has one, whether it is no text at all."""

    base_bytes: Tensor
    leading_space: Tensor
    boundary: Tensor

    def count(self, prev_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Bytes of each target. The space before a document's first word is the tokenizer's own and counts nothing."""
        n = self.base_bytes[target_ids]
        n = n + (self.leading_space[target_ids] & ~self.boundary[prev_ids]).to(n.dtype)
        return n


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTables:
    size = max(int(sp.vocab_size()), vocab_size)
    base = np.zeros(size, dtype=np.int64)
    space = np.zeros(size, dtype=np.bool_)
    boundary = np.ones(size, dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        if sp.is_byte(i):
            base[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            space[i] = True
            piece = piece[1:]
        base[i] = len(piece.replace("\u2581", " ").encode("utf-8"))
    return ByteTables(
        torch.from_numpy(base).to(device),
        torch.from_numpy(space).to(device),
        torch.from_numpy(boundary).to(device),
    )


def split_documents(tokens: np.ndarray, bos_id: int, limit: int) -> list[list[int]]:
    at = np.flatnonzero(tokens == bos_id)[: limit + 1]
    return [tokens[a + 1 : b].tolist() for a, b in zip(at[:-1], at[1:])]


def check_byte_tables(h: Hyperparameters, sp, tables: ByteTables, tokens: Tensor) -> None:
    """Decodes a few documents and compares their length with what the tables say of them."""
    head = tokens[: 2**18].numpy().astype(np.int64)
    wrong = 0
    docs = split_documents(head, h.bos_id, 64)
    for doc in docs:
        ids = torch.tensor([h.bos_id, *doc], device=tables.base_bytes.device)
        counted = int(tables.count(ids[:-1], ids[1:]).sum().item())
        wrong += counted != len(sp.decode(doc).encode("utf-8"))
    log(f"byte tables: {len(docs)} documents decoded, {wrong} differ from their text")


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights stay in fp32, the product is done in the activations' type."""

    def __init__(self, n_in: int, n_out: int, zero_init: bool = False):
        super().__init__(n_in, n_out, bias=False)
        self.zero_init = zero_init

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rope_tables(seq_len: int, rope_dims: int, base: float) -> tuple[Tensor, Tensor]:
    inv = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), inv)
    return angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]


def apply_partial_rope(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, rest = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    a, b = turned[..., :half], turned[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if flash_attn_3_func is not None:
        out = flash_attn_3_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: takes out of the attention's result what points along the token's own value."""
    bsz, seq, heads, dim = y.shape
    kv_heads = v.size(2)
    grouped = y.reshape(bsz, seq, kv_heads, heads // kv_heads, dim)
    vn = F.normalize(v, dim=-1).unsqueeze(-2)
    along = (grouped * vn).sum(dim=-1, keepdim=True) * vn
    return (grouped - along).reshape(bsz, seq, heads, dim)


class CausalSelfAttention(nn.Module):
    def __init__(self, h: Hyperparameters, use_xsa: bool):
        super().__init__()
        if h.model_dim % h.num_heads or h.num_heads % h.num_kv_heads:
            raise ValueError("model_dim, num_heads and num_kv_heads do not fit each other")
        self.num_heads = h.num_heads
        self.num_kv_heads = h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        self.rope_dims = h.rope_dims
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim)
        self.c_k = CastedLinear(h.model_dim, kv_dim)
        self.c_v = CastedLinear(h.model_dim, kv_dim)
        self.proj = CastedLinear(h.model_dim, h.model_dim, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        bsz, seq, dim = x.shape
        q = self.c_q(x).view(bsz, seq, self.num_heads, self.head_dim)
        k = self.c_k(x).view(bsz, seq, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).view(bsz, seq, self.num_kv_heads, self.head_dim)
        q = apply_partial_rope(F.rms_norm(q, (self.head_dim,)), cos, sin, self.rope_dims)
        k = apply_partial_rope(F.rms_norm(k, (self.head_dim,)), cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = causal_attention(q.to(v.dtype), k.to(v.dtype), v)
        if self.use_xsa:
            y = exclude_self(y, v)
        return self.proj(y.reshape(bsz, seq, dim))


class MLP(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.fc = CastedLinear(h.model_dim, hidden)
        self.proj = CastedLinear(hidden, h.model_dim, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, h: Hyperparameters, index: int):
        super().__init__()
        self.parallel = index >= h.parallel_from
        self.depth_scale = 1.0 / math.sqrt(index + 1) if h.ln_scale else 1.0
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(h, use_xsa=index >= h.num_layers - h.xsa_last_n)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))))

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attn_out = self.attn(self.attn_norm(x) * self.depth_scale, cos, sin)
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x) * self.depth_scale)
            return x + self.attn_scale.to(x.dtype) * attn_out + self.mlp_scale.to(x.dtype) * mlp_out
        x = x + self.attn_scale.to(x.dtype) * attn_out
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.depth_scale)


class SmearGate(nn.Module):
    """Adds a gated bit of the previous token's embedding to each token, but never over the start of a document."""

    def __init__(self, width: int, bos_id: int):
        super().__init__()
        self.width = width
        self.bos_id = bos_id
        self.gate = CastedLinear(width, 1, zero_init=True)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = self.strength.to(x.dtype) * torch.sigmoid(self.gate(x[:, 1:, : self.width])).to(x.dtype)
        inside = (ids[:, 1:] != self.bos_id).unsqueeze(-1).to(x.dtype)
        return torch.cat((x[:, :1], x[:, 1:] + g * inside * x[:, :-1]), dim=1)


def visiting_plan(num_layers: int, loop_start: int, loop_end: int, visits: int) -> tuple[list[int], list[int]]:
    """The order in which the blocks are visited, cut in two halves that the skips connect."""
    order = list(range(loop_start))
    for _ in range(visits):
        order += range(loop_start, loop_end + 1)
    order += range(loop_end + 1, num_layers)
    half = len(order) // 2
    return order[:half], order[half:]


class GPT(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.softcap = h.logit_softcap
        self.vocab_size = h.vocab_size
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.smear_width, h.bos_id) if h.smear_enabled else None
        self.blocks = nn.ModuleList(Block(h, i) for i in range(h.num_layers))
        self.flat_plan = visiting_plan(h.num_layers, h.loop_start, h.loop_end, 1)
        self.loop_plan = visiting_plan(h.num_layers, h.loop_start, h.loop_end, 1 + h.num_loops)
        self.looping = False
        num_skips = len(self.loop_plan[0])
        self.skip_weights = nn.Parameter(torch.ones(num_skips, h.model_dim))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips, h.model_dim))
        cos, sin = rope_tables(max(h.train_seq_len, h.eval_seq_len), h.rope_dims, h.rope_base)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights(h.tied_embed_init_std)

    def init_weights(self, embed_std: float) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=embed_std)
        for module in self.modules():
            if isinstance(module, CastedLinear):
                if module.zero_init:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        x = F.rms_norm(self.tok_emb(ids), (self.tok_emb.embedding_dim,)).to(torch.bfloat16)
        if self.smear is not None:
            x = self.smear(x, ids)
        x0 = x
        seq = ids.size(1)
        cos, sin = self.rope_cos[:, :seq], self.rope_sin[:, :seq]
        first, second = self.loop_plan if self.looping else self.flat_plan
        kept: list[Tensor] = []
        for i in first:
            x = self.blocks[i](x, x0, cos, sin)
            kept.append(x)
        for n, i in enumerate(second):
            if kept:
                skip = self.skip_weights[n].to(x.dtype) * kept.pop()
                x = torch.lerp(skip, x, torch.sigmoid(self.skip_gates[n]).to(x.dtype))
            x = self.blocks[i](x, x0, cos, sin)
        return F.rms_norm(x, (x.size(-1),))

    def head(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype)).float()
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.reshape(-1, self.vocab_size), targets.reshape(-1))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def describe_model(h: Hyperparameters, model: GPT) -> None:
    log_rule("model")
    log(f"model_params:{count_parameters(model)}")
    log(f"flat plan:  {model.flat_plan[0]} | {model.flat_plan[1]}")
    log(f"loop plan:  {model.loop_plan[0]} | {model.loop_plan[1]}")
    log(f"parallel residuals from layer {h.parallel_from}, XSA on the last {h.xsa_last_n}, smear {h.smear_enabled}")
    by_kind: dict[str, int] = {}
    for name, p in model.named_parameters():
        kind = "embedding" if name.startswith("tok_emb") else "matrix" if p.ndim == 2 and "blocks" in name else "small"
        by_kind[kind] = by_kind.get(kind, 0) + p.numel()
    log("  ".join(f"{kind}:{n}" for kind, n in sorted(by_kind.items())))


# ----------------------------------------------------------------------------------------------------------------------
# Optimisers
# ----------------------------------------------------------------------------------------------------------------------


@torch.compile
def newton_schulz(g: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class MuonEqR(torch.optim.Optimizer):
    """Muon whose update gets rows of equal length before it is orthogonalised. The matrices are dealt out to the ranks."""

    def __init__(self, params, lr: float, momentum: float, ns_steps: int, weight_decay: float, ctx: Ctx):
        defaults = {"lr": lr, "momentum": momentum, "ns_steps": ns_steps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.ctx = ctx

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            flat = torch.zeros(sum(p.numel() for p in params), dtype=torch.bfloat16, device=params[0].device)
            at = 0
            for i, p in enumerate(params):
                if i % self.ctx.world_size == self.ctx.rank and p.grad is not None:
                    flat[at : at + p.numel()] = self.direction(p, group).reshape(-1)
                at += p.numel()
            all_reduce_sum(flat)
            at = 0
            for p in params:
                update = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
                at += p.numel()

    def direction(self, p: Tensor, group: dict) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        buf = state["momentum"]
        buf.mul_(group["momentum"]).add_(p.grad)
        g = p.grad.add(buf, alpha=group["momentum"])
        g = g / g.norm(dim=1, keepdim=True).clamp_min(1e-7)
        g = newton_schulz(g, group["ns_steps"])
        return g * max(1.0, g.size(0) / g.size(1)) ** 0.5


class OptimizerBundle:
    def __init__(self, h: Hyperparameters, model: GPT, ctx: Ctx):
        matrices, small, embed = [], [], []
        for name, p in model.named_parameters():
            if name == "tok_emb.weight":
                embed.append(p)
            elif p.ndim == 2 and name.startswith("blocks.") and "resid_mix" not in name:
                matrices.append(p)
            else:
                small.append(p)
        betas = (h.beta1, h.beta2)
        self.muon = MuonEqR(matrices, h.matrix_lr, h.muon_momentum, h.muon_ns_steps, h.muon_wd, ctx)
        self.embed = torch.optim.AdamW(
            embed, lr=h.embed_lr, betas=betas, eps=h.adam_eps, weight_decay=h.embed_wd, fused=True
        )
        self.small = torch.optim.AdamW(
            small, lr=h.scalar_lr, betas=betas, eps=h.adam_eps, weight_decay=h.scalar_wd, fused=True
        )
        self.all = [self.muon, self.embed, self.small]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]
        log(f"optimisers: muon {len(matrices)} matrices, adamw {len(embed)} embedding, {len(small)} small tensors")

    def set_lr(self, scale: float) -> None:
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def set_momentum(self, momentum: float) -> None:
        for group in self.muon.param_groups:
            group["momentum"] = momentum

    def step(self) -> None:
        for opt in self.all:
            opt.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def state_dicts(self) -> list[dict]:
        return [copy.deepcopy(opt.state_dict()) for opt in self.all]

    def load_state_dicts(self, states: list[dict]) -> None:
        for opt, state in zip(self.all, states, strict=True):
            opt.load_state_dict(state)


def lr_scale(h: Hyperparameters, frac: float) -> float:
    if frac <= 1.0 - h.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / h.warmdown_frac, h.min_lr)


def muon_momentum_at(h: Hyperparameters, step: int) -> float:
    t = min(step / max(h.muon_momentum_steps, 1), 1.0)
    return (1.0 - t) * h.muon_momentum_start + t * h.muon_momentum


class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def weights_for(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: self.shadow[name].to(t.dtype) for name, t in model.state_dict().items()}


# ----------------------------------------------------------------------------------------------------------------------
# Quantisation: GPTQ with SDClip for the matrices, rounded int8 for the embedding, the rest as it is
# ----------------------------------------------------------------------------------------------------------------------


def levels(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def quantisable(h: Hyperparameters, name: str, t: Tensor) -> bool:
    return t.ndim == 2 and t.is_floating_point() and t.numel() > h.keep_float_numel


def hessian_targets(h: Hyperparameters, model: GPT) -> dict[str, CastedLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CastedLinear) and quantisable(h, name, module.weight)
    }


def collect_hessians(
    h: Hyperparameters, ctx: Ctx, model: GPT, loader: ShuffledSequenceLoader, stop_at: float
) -> dict[str, Tensor]:
    """Second moments of what goes into each matrix, over training sequences. Ends when the clock says so."""
    targets = hessian_targets(h, model)
    sums = {name: torch.zeros(m.in_features, m.in_features, device=ctx.device) for name, m in targets.items()}
    handles = []

    def listen(name: str):
        def hook(module, inputs):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            sums[name].addmm_(x.T, x)

        return hook

    for name, module in targets.items():
        handles.append(module.register_forward_pre_hook(listen(name)))
    model.eval()
    done = 0
    with torch.no_grad():
        for _ in range(h.calib_batches):
            if time.perf_counter() >= stop_at:
                break
            ids, _ = loader.next_batch(h.calib_rows)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                model.hidden(ids)
            torch.cuda.synchronize()
            done += 1
    for handle in handles:
        handle.remove()
    rows = all_reduce_sum(torch.tensor([done * h.calib_rows], dtype=torch.float64, device=ctx.device))
    for name in sorted(sums):
        all_reduce_sum(sums[name])
        sums[name] /= max(rows.item() * h.train_seq_len, 1.0)
    log(f"gptq: {done} batches on this rank, {int(rows.item())} training sequences in all, {len(sums)} hessians")
    return sums


def row_scales(w: Tensor, clip_sigmas: float, top: int) -> Tensor:
    """SDClip: the grid reaches so many standard deviations of the row, whatever its largest weight."""
    return (clip_sigmas * w.float().std(dim=1) / top).clamp_min(1e-8).to(torch.float16)


def quantize_rows(w: Tensor, clip_sigmas: float, bits: int) -> tuple[Tensor, Tensor]:
    top = levels(bits)
    scale = row_scales(w, clip_sigmas, top)
    q = torch.round(w.float() / scale.float()[:, None]).clamp_(-top, top)
    return q.to(torch.int8), scale


def gptq_quantize(
    w: Tensor, hessian: Tensor, clip_sigmas: float, bits: int, block: int, damp: float
) -> tuple[Tensor, Tensor]:
    top = levels(bits)
    scale = row_scales(w, clip_sigmas, top)
    step = scale.float()
    work = w.float().clone()
    hess = hessian.float().clone()
    dead = hess.diagonal() == 0
    hess.diagonal()[dead] = 1.0
    work[:, dead] = 0.0
    hess.diagonal().add_(damp * hess.diagonal().mean())
    order = torch.argsort(hess.diagonal(), descending=True)
    back = torch.argsort(order)
    work = work[:, order]
    hess = hess[order][:, order]
    inv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hess)), upper=True)
    cols = work.size(1)
    q = torch.zeros_like(work, dtype=torch.int8)
    for lo in range(0, cols, block):
        hi = min(lo + block, cols)
        part = work[:, lo:hi].clone()
        part_inv = inv[lo:hi, lo:hi]
        err = torch.zeros_like(part)
        for j in range(hi - lo):
            col = part[:, j]
            rounded = torch.round(col / step).clamp_(-top, top)
            q[:, lo + j] = rounded.to(torch.int8)
            err[:, j] = (col - rounded * step) / part_inv[j, j]
            part[:, j:] -= err[:, j : j + 1] * part_inv[j : j + 1, j:]
        work[:, hi:] -= err @ inv[lo:hi, hi:]
    return q[:, back].contiguous(), scale


def quantize_state(h: Hyperparameters, model: GPT, hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    report: dict[str, list[float]] = {}
    for name, t in model.state_dict().items():
        t = t.detach()
        if not quantisable(h, name, t):
            out[name] = t.to(torch.float16).cpu() if t.numel() > 4096 else t.float().cpu()
            continue
        module = name.removesuffix(".weight")
        if name == "tok_emb.weight":
            kind = f"int{h.embed_bits} rounded"
            q, scale = quantize_rows(t, h.embed_clip_sigmas, h.embed_bits)
        elif module in hessians:
            kind = f"int{h.matrix_bits} gptq"
            q, scale = gptq_quantize(
                t, hessians[module], h.matrix_clip_sigmas, h.matrix_bits, h.gptq_block, h.gptq_damp
            )
        else:
            kind = f"int{h.matrix_bits} rounded"
            q, scale = quantize_rows(t, h.matrix_clip_sigmas, h.matrix_bits)
        err = (t.float() - q.float() * scale.float()[:, None]).pow(2).mean().sqrt() / t.float().std()
        report.setdefault(kind, []).append(float(err.item()))
        out[name + ".q"] = q.cpu()
        out[name + ".scale"] = scale.cpu()
    for kind, errs in sorted(report.items()):
        log(f"  {kind}: {len(errs)} tensors, relative error mean {np.mean(errs):.4f} worst {max(errs):.4f}")
    return out


def dequantize_state(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, t in packed.items():
        if name.endswith(".q"):
            stem = name.removesuffix(".q")
            out[stem] = t.float() * packed[stem + ".scale"].float()[:, None]
        elif not name.endswith(".scale"):
            out[name] = t.float()
    return out


SHUFFLE_MARK = b"BSHF"


def byte_shuffle(raw: bytes, stride: int) -> bytes:
    a = np.frombuffer(raw, dtype=np.uint8)
    whole = len(a) // stride * stride
    body = np.ascontiguousarray(a[:whole].reshape(-1, stride).T)
    return SHUFFLE_MARK + bytes([stride]) + body.tobytes() + a[whole:].tobytes()


def byte_unshuffle(data: bytes) -> bytes:
    if data[:4] != SHUFFLE_MARK:
        raise ValueError("not a shuffled stream")
    stride = data[4]
    a = np.frombuffer(data, dtype=np.uint8, offset=5)
    whole = len(a) // stride * stride
    body = np.ascontiguousarray(a[:whole].reshape(stride, -1).T)
    return body.tobytes() + a[whole:].tobytes()


def pack_artifact(packed: dict[str, Tensor], stride: int) -> bytes:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    return brotli.compress(byte_shuffle(buffer.getvalue(), stride), quality=11, lgwin=24)


def unpack_artifact(blob: bytes) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(byte_unshuffle(brotli.decompress(blob))), map_location="cpu", weights_only=True)


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def report_size(h: Hyperparameters, model_bytes: int) -> int:
    code = code_bytes()
    total = model_bytes + code
    log(f"Serialized model int{h.matrix_bits}+brotli: {model_bytes} bytes")
    log(f"Code size: {code} bytes")
    log(f"Total submission size: {total} bytes, {h.size_limit_bytes - total} left")
    if total > h.size_limit_bytes:
        raise RuntimeError(f"{total} bytes are more than {h.size_limit_bytes}")
    return total


def write_artifact(h: Hyperparameters, ctx: Ctx, model: GPT, hessians: dict[str, Tensor]) -> None:
    if ctx.is_main:
        log_rule("quantise")
        t0 = time.perf_counter()
        packed = quantize_state(h, model, hessians)
        log(f"quantised in {time.perf_counter() - t0:.1f}s")
        t0 = time.perf_counter()
        blob = pack_artifact(packed, h.shuffle_stride)
        log(f"brotli in {time.perf_counter() - t0:.1f}s")
        Path(h.artifact_path).write_bytes(blob)
        report_size(h, len(blob))
    barrier()


def read_artifact(h: Hyperparameters, ctx: Ctx) -> GPT:
    """The model as evaluation gets it: from the file, and from nothing else."""
    blob = Path(h.artifact_path).read_bytes()
    model = GPT(h).to(ctx.device)
    model.load_state_dict(dequantize_state(unpack_artifact(blob)), strict=True)
    model.looping = h.num_loops > 0
    model.eval()
    log(f"artifact read: {len(blob)} bytes")
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Scoring
#
# Position i of the stream predicts tokens[i + 1]. There are len(tokens) - 1 positions, and each is scored in one window.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    lo: int  # first position that the model sees
    start: int  # first position that is scored
    end: int  # behind the last position


def plan_windows(first: int, last: int, seq_len: int, stride: int) -> list[Window]:
    out = []
    for start in range(first, last, stride):
        end = min(start + stride, last)
        out.append(Window(max(0, end - seq_len), start, end))
    return out


@dataclass
class Tilt:
    """For the positions of a chunk: a token whose logit gets a bonus, and the bonus (0: none)."""

    first: int
    token: np.ndarray
    bonus: np.ndarray

    def pick(self, batch: list[Window]) -> tuple[np.ndarray, np.ndarray]:
        spans = [slice(w.start - self.first, w.end - self.first) for w in batch]
        return np.concatenate([self.token[s] for s in spans]), np.concatenate([self.bonus[s] for s in spans])


class HintTable:
    """What followed last time after the same few tokens, and how many times running. Knows only what it absorbed."""

    def __init__(self, h: Hyperparameters):
        self.order = h.hint_order
        self.mask = np.uint64((1 << h.hint_bits) - 1)
        self.beta = h.hint_beta
        self.full = h.hint_full_streak
        self.token = np.full(1 << h.hint_bits, -1, dtype=np.int64)
        self.streak = np.zeros(1 << h.hint_bits, dtype=np.int64)

    def slots(self, tokens: np.ndarray, first: int, last: int) -> np.ndarray:
        """The slot of each position: a hash of the tokens up to and including it."""
        at = np.arange(first, last)
        key = np.zeros(last - first, dtype=np.uint64)
        for back in range(self.order):
            seen = tokens[np.maximum(at - back, 0)].astype(np.uint64) + np.uint64(1)
            key = (key ^ seen) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        return (key & self.mask).astype(np.int64)

    def propose(self, tokens: np.ndarray, first: int, last: int) -> Tilt:
        slot = self.slots(tokens, first, last)
        token = self.token[slot]
        streak = np.minimum(self.streak[slot], self.full) / self.full
        bonus = np.where(token >= 0, self.beta * streak, 0.0).astype(np.float32)
        return Tilt(first, np.maximum(token, 0), bonus)

    def absorb(self, tokens: np.ndarray, first: int, last: int) -> None:
        slot = self.slots(tokens, first, last)
        came = tokens[first + 1 : last + 1].astype(np.int64)
        same = self.token[slot] == came
        self.streak[slot] = np.where(same, self.streak[slot] + 1, 1)
        self.token[slot] = came

    def filled(self) -> float:
        return float((self.token >= 0).mean())


class Ledger:
    """Sums of loss, targets and bytes."""

    def __init__(self, ctx: Ctx, tables: ByteTables):
        self.tables = tables
        self.nll = torch.zeros((), dtype=torch.float64, device=ctx.device)
        self.targets = torch.zeros((), dtype=torch.float64, device=ctx.device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=ctx.device)

    def add(self, nll: Tensor, prev_ids: Tensor, target_ids: Tensor) -> None:
        self.nll += nll.double().sum()
        self.targets += float(target_ids.numel())
        self.bytes += self.tables.count(prev_ids, target_ids).double().sum()

    def total(self) -> "Score":
        """The sums over all ranks. The ledger itself stays as it is."""
        sums = all_reduce_sum(torch.stack((self.nll, self.targets, self.bytes)))
        nll, targets, nbytes = (float(v) for v in sums.tolist())
        return Score(nll / targets, nll / math.log(2.0) / nbytes, int(targets), int(nbytes))


@dataclass(frozen=True)
class Score:
    val_loss: float
    val_bpb: float
    targets: int
    nbytes: int

    def line(self) -> str:
        return f"val_loss:{self.val_loss:.8f} val_bpb:{self.val_bpb:.8f} targets:{self.targets} bytes:{self.nbytes}"


def gather_windows(
    tokens: Tensor, batch: list[Window], rows: int, seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and which positions are scored. Short windows and missing rows are filled up with zeros."""
    x = torch.zeros(rows, seq_len, dtype=torch.int64)
    y = torch.zeros(rows, seq_len, dtype=torch.int64)
    scored = torch.zeros(rows, seq_len, dtype=torch.bool)
    for i, w in enumerate(batch):
        n = w.end - w.lo
        piece = tokens[w.lo : w.end + 1].to(torch.int64)
        x[i, :n] = piece[:-1]
        y[i, :n] = piece[1:]
        scored[i, w.start - w.lo : n] = True
    return x.to(device), y.to(device), scored.to(device)


def tilted(logits: Tensor, batch: list[Window], tilt: Tilt | None) -> Tensor:
    """Adds the bonus before the softmax, so that what comes out of it is a distribution like any other."""
    if tilt is None:
        return logits
    token, bonus = tilt.pick(batch)
    at = torch.from_numpy(token).to(logits.device).unsqueeze(1)
    plus = torch.from_numpy(bonus).to(logits.device, logits.dtype).unsqueeze(1)
    return logits.scatter_add(1, at, plus)


def score_windows(
    h: Hyperparameters,
    ctx: Ctx,
    model: GPT,
    trunk,
    tokens: Tensor,
    windows: list[Window],
    ledger: Ledger,
    tilt: Tilt | None = None,
) -> None:
    for i in range(0, len(windows), h.eval_rows):
        batch = windows[i : i + h.eval_rows]
        x, y, scored = gather_windows(tokens, batch, h.eval_rows, h.eval_seq_len, ctx.device)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = trunk(x)[scored]
            logits = model.head(hidden).float()
        target_ids, prev_ids = y[scored], x[scored]
        logits = tilted(logits, batch, tilt)
        nll = F.cross_entropy(logits, target_ids, reduction="none")
        ledger.add(nll, prev_ids, target_ids)


def evaluate_plain(h: Hyperparameters, ctx: Ctx, model: GPT, trunk, tokens: Tensor, tables: ByteTables) -> Score:
    """Window after window, without overlap. Quick; for the looks during training and after the round trip."""
    was_training = model.training
    model.eval()
    windows = plan_windows(0, tokens.numel() - 1, h.eval_seq_len, h.eval_seq_len)
    ledger = Ledger(ctx, tables)
    score_windows(h, ctx, model, trunk, tokens, share(windows, ctx.rank, ctx.world_size), ledger)
    model.train(was_training)
    return ledger.total()


def evaluate_sliding(h: Hyperparameters, ctx: Ctx, model: GPT, trunk, tokens: Tensor, tables: ByteTables) -> Score:
    """Every target with nearly a full window of context. The weights stay as they are."""
    model.eval()
    windows = plan_windows(0, tokens.numel() - 1, h.eval_seq_len, h.eval_stride)
    mine = share(windows, ctx.rank, ctx.world_size)
    ledger = Ledger(ctx, tables)
    t0 = time.perf_counter()
    slices = 10
    for n in range(slices):
        score_windows(h, ctx, model, trunk, tokens, share(mine, n, slices), ledger)
        log(f"  sliding {n + 1}/{slices} after {time.perf_counter() - t0:.1f}s")
    return ledger.total()


# ----------------------------------------------------------------------------------------------------------------------
# Test-time training: a chunk is scored with what came before it, and only then learnt from
# ----------------------------------------------------------------------------------------------------------------------


class EvalClock:
    """Adds up what evaluation takes, section by section."""

    def __init__(self, limit: float):
        self.limit = limit
        self.parts: dict[str, float] = {}
        self.open_since: float | None = None

    @contextlib.contextmanager
    def section(self, name: str):
        torch.cuda.synchronize()
        self.open_since = time.perf_counter()
        try:
            yield
        finally:
            torch.cuda.synchronize()
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - self.open_since
            self.open_since = None

    def spent(self) -> float:
        running = 0.0 if self.open_since is None else time.perf_counter() - self.open_since
        return sum(self.parts.values()) + running

    def report(self) -> None:
        for name, seconds in self.parts.items():
            log(f"  eval_time[{name}]: {seconds:.1f}s")
        log(f"  eval_time total: {self.spent():.1f}s of {self.limit:.0f}s")


def split_chunks(total: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, total)) for first in range(0, total, size)]


def ttt_parameters(h: Hyperparameters, model: GPT) -> list[nn.Parameter]:
    frozen = tuple(f"blocks.{i}." for i in range(h.ttt_freeze_blocks))
    chosen = []
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and name.startswith(frozen)))
        if p.requires_grad:
            chosen.append(p)
    log(f"ttt: {sum(p.numel() for p in chosen)} of {count_parameters(model)} parameters learn")
    return chosen


def sync_gradients(params: list[nn.Parameter]) -> None:
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in params])
    all_reduce_sum(flat)
    at = 0
    for p in params:
        p.grad = flat[at : at + p.numel()].view_as(p)
        at += p.numel()


def chunk_rows(tokens: Tensor, first: int, last: int, seq_len: int, ctx: Ctx) -> tuple[Tensor, Tensor] | None:
    """This rank's sequences of a chunk: inputs first..last-1, targets one further. None if it has none."""
    starts = share(list(range(first, last - seq_len + 1, seq_len)), ctx.rank, ctx.world_size)
    if not starts:
        return None
    block = torch.stack([tokens[s : s + seq_len + 1] for s in starts]).to(torch.int64).to(ctx.device)
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def adapt_on_chunk(
    h: Hyperparameters,
    ctx: Ctx,
    learn,
    opt: torch.optim.Optimizer,
    params: list[nn.Parameter],
    tokens: Tensor,
    first: int,
    last: int,
) -> None:
    rows = chunk_rows(tokens, first, last, h.eval_seq_len, ctx)
    whole = (last - first) // h.eval_seq_len * h.eval_seq_len
    for _ in range(h.ttt_epochs):
        opt.zero_grad(set_to_none=True)
        if rows is not None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = learn(*rows)
            (loss * (rows[0].numel() / whole)).backward()
        sync_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
        opt.step()


def evaluate_with_ttt(
    h: Hyperparameters, ctx: Ctx, model: GPT, trunk, tokens: Tensor, tables: ByteTables, clock: EvalClock
) -> Score:
    total = tokens.numel() - 1
    chunks = split_chunks(total, h.ttt_chunk_tokens)
    stream = tokens.numpy()
    params = ttt_parameters(h, model)
    learn = torch.compile(model, dynamic=False, fullgraph=True)
    opt = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    hints = HintTable(h) if h.hint_enabled else None
    ledger = Ledger(ctx, tables)
    deadline = h.eval_limit_seconds - h.eval_margin_seconds
    adapted = 0
    log(f"ttt: {len(chunks)} chunks of {h.ttt_chunk_tokens}, {h.ttt_epochs} epochs, lr {h.ttt_lr}, hints {h.hint_enabled}")
    t0 = time.perf_counter()
    for ci, (first, last) in enumerate(chunks):
        # 1. score
        model.eval()
        tilt = hints.propose(stream, first, last) if hints is not None else None
        windows = plan_windows(first, last, h.eval_seq_len, h.eval_stride)
        mine = share(windows, ctx.rank, ctx.world_size)
        score_windows(h, ctx, model, trunk, tokens, mine, ledger, tilt)

        # 2. from here on the chunk is known
        if hints is not None:
            hints.absorb(stream, first, last)
        is_last = ci + 1 == len(chunks)
        in_time = from_main(float(clock.spent() < deadline), ctx) > 0.5
        if not is_last and in_time:
            lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(len(chunks) - 1, 1)))
            for group in opt.param_groups:
                group["lr"] = lr
            model.train()
            adapt_on_chunk(h, ctx, learn, opt, params, tokens, first, last)
            adapted += 1
        if ci % 100 == 0 or is_last:
            so_far = ledger.total()
            filled = hints.filled() if hints is not None else 0.0
            log(
                f"  ttt_chunk {ci + 1}/{len(chunks)} bpb so far {so_far.val_bpb:.6f} "
                f"hints filled {filled:.3f} {time.perf_counter() - t0:.1f}s"
            )
    log(f"ttt: learnt from {adapted} chunks")
    return ledger.total()


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def forward_backward(h: Hyperparameters, ctx: Ctx, model: nn.Module, loader: ShuffledSequenceLoader) -> Tensor:
    rows = h.train_batch_tokens // (h.train_seq_len * ctx.world_size * ctx.grad_accum_steps)
    mean_loss = torch.zeros((), device=ctx.device)
    for micro in range(ctx.grad_accum_steps):
        if ctx.world_size > 1:
            model.require_backward_grad_sync = micro == ctx.grad_accum_steps - 1
        ids, targets = loader.next_batch(rows)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(ids, targets)
        (loss / ctx.grad_accum_steps).backward()
        mean_loss += loss.detach() / ctx.grad_accum_steps
    return mean_loss


def optimizer_step(h: Hyperparameters, base_model: GPT, bundle: OptimizerBundle, step: int, frac: float) -> None:
    bundle.set_lr(lr_scale(h, frac))
    bundle.set_momentum(muon_momentum_at(h, step))
    if h.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
    bundle.step()


def warm_up(h: Hyperparameters, ctx: Ctx, base_model: GPT, model: nn.Module, bundle: OptimizerBundle) -> None:
    """Compiles both plans on training batches, then puts everything back."""
    if h.warmup_steps <= 0:
        return
    weights = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
    states = bundle.state_dicts()
    loader = ShuffledSequenceLoader(h.train_files, h.train_seq_len, ctx, h.seed + 1)
    for looping in (False, True) if h.num_loops > 0 else (False,):
        base_model.looping = looping
        for step in range(h.warmup_steps):
            forward_backward(h, ctx, model, loader)
            optimizer_step(h, base_model, bundle, step, 0.0)
        log(f"warmup: {h.warmup_steps} steps, looping {looping}")
    base_model.looping = False
    base_model.load_state_dict(weights)
    bundle.load_state_dicts(states)
    bundle.zero_grad()


@dataclass
class TrainState:
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def train(
    h: Hyperparameters,
    ctx: Ctx,
    base_model: GPT,
    model: nn.Module,
    bundle: OptimizerBundle,
    loader: ShuffledSequenceLoader,
    ema: EMA,
    tokens: Tensor,
    tables: ByteTables,
) -> TrainState:
    """Trains until the time is up, less what calibration needs. Looks at validation stop the clock, nothing else does."""
    state = TrainState()
    budget = h.max_wallclock_seconds - h.gptq_reserve_seconds
    val_trunk = torch.compile(base_model.hidden, dynamic=False)
    log(f"training: {budget:.1f}s for steps, {h.gptq_reserve_seconds:.1f}s kept for calibration")
    model.train()
    elapsed = 0.0
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    while state.step < h.iterations and elapsed < budget:
        if h.val_loss_every > 0 and state.step > 0 and state.step % h.val_loss_every == 0:
            torch.cuda.synchronize()
            state.seconds += time.perf_counter() - t0
            score = evaluate_plain(h, ctx, base_model, val_trunk, tokens, tables)
            log(
                f"step:{state.step}/{h.iterations} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
                f"train_time:{1000 * state.seconds:.0f}ms"
            )
            model.train()
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        frac = max(elapsed / budget, state.step / h.iterations)
        if h.num_loops > 0 and not base_model.looping and frac >= h.loop_at:
            base_model.looping = True
            log(f"loops on at step {state.step}, frac {frac:.3f}")
        loss = forward_backward(h, ctx, model, loader)
        optimizer_step(h, base_model, bundle, state.step, frac)
        ema.update(base_model)
        state.step += 1

        elapsed = from_main(state.seconds + time.perf_counter() - t0, ctx)
        if state.step <= 5 or state.step % h.train_log_every == 0:
            state.losses.append(float(loss.item()))
            log(
                f"step:{state.step}/{h.iterations} train_loss:{state.losses[-1]:.4f} "
                f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / state.step:.2f}ms"
            )
    torch.cuda.synchronize()
    state.seconds += time.perf_counter() - t0
    why = "wallclock_cap" if state.step < h.iterations else "iterations"
    log(f"stopping: {why} train_time:{1000 * state.seconds:.0f}ms step:{state.step}/{h.iterations}")
    base_model.looping = h.num_loops > 0
    return state


def calibrate(
    h: Hyperparameters, ctx: Ctx, base_model: GPT, loader: ShuffledSequenceLoader, ema: EMA, state: TrainState
) -> dict[str, Tensor]:
    """Takes the averaged weights and collects the hessians, in what is left of the 600 seconds."""
    t0 = time.perf_counter()
    base_model.load_state_dict(ema.weights_for(base_model))
    log("ema: averaged weights taken")
    room = h.max_wallclock_seconds - state.seconds - 2.0
    hessians = collect_hessians(h, ctx, base_model, loader, stop_at=t0 + room)
    torch.cuda.synchronize()
    took = time.perf_counter() - t0
    log(f"gptq: hessians took {took:.1f}s, training and calibration {state.seconds + took:.1f}s")
    return hessians


# ----------------------------------------------------------------------------------------------------------------------
# All of it
# ----------------------------------------------------------------------------------------------------------------------


def prepare(h: Hyperparameters, ctx: Ctx) -> tuple[Tensor, ByteTables]:
    """Validation tokens and byte tables, with a word about each."""
    sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
    if int(sp.vocab_size()) != h.vocab_size:
        raise ValueError(f"the tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {h.vocab_size}")
    tables = build_byte_tables(sp, h.vocab_size, ctx.device)
    tokens = load_validation_tokens(h.val_files)
    docs = int((tokens == h.bos_id).sum().item())
    log_rule("data")
    log(f"train shards: {len(glob.glob(h.train_files))} at {h.train_files}")
    log(f"val tokens: {tokens.numel()} in {docs} documents at {h.val_files}")
    check_byte_tables(h, sp, tables, tokens)
    return tokens, tables


def build_and_train(
    h: Hyperparameters, ctx: Ctx, tokens: Tensor, tables: ByteTables
) -> tuple[GPT, dict[str, Tensor], TrainState]:
    base_model = GPT(h).to(ctx.device)
    describe_model(h, base_model)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = compiled
    if ctx.world_size > 1:
        model = DDP(compiled, device_ids=[ctx.local_rank], broadcast_buffers=False)
    bundle = OptimizerBundle(h, base_model, ctx)
    log_rule("train")
    log(f"world_size:{ctx.world_size} grad_accum_steps:{ctx.grad_accum_steps} seed:{h.seed}")
    warm_up(h, ctx, base_model, model, bundle)
    seed_everything(h.seed)
    loader = ShuffledSequenceLoader(h.train_files, h.train_seq_len, ctx, h.seed)
    ema = EMA(base_model, h.ema_decay)
    state = train(h, ctx, base_model, model, bundle, loader, ema, tokens, tables)
    hessians = calibrate(h, ctx, base_model, loader, ema, state)
    log_memory("train")
    return base_model, hessians, state


def evaluate_artifact(h: Hyperparameters, ctx: Ctx, tokens: Tensor, tables: ByteTables, clock: EvalClock) -> Score:
    log_rule("evaluate")
    with clock.section("read"):
        model = read_artifact(h, ctx)
        trunk = torch.compile(model.hidden, dynamic=False)
    with clock.section("round trip"):
        plain = evaluate_plain(h, ctx, model, trunk, tokens, tables)
    log(f"final_int{h.matrix_bits}_roundtrip {plain.line()}")
    final = plain
    if h.sliding_enabled:
        with clock.section("sliding"):
            final = evaluate_sliding(h, ctx, model, trunk, tokens, tables)
        log(f"final_sliding stride:{h.eval_stride} {final.line()}")
    if h.ttt_enabled:
        with clock.section("ttt"):
            final = evaluate_with_ttt(h, ctx, model, trunk, tokens, tables, clock)
        log(f"final_ttt epochs:{h.ttt_epochs} {final.line()}")
    return final


def main() -> None:
    h = Hyperparameters()
    ctx = setup_distributed()
    if ctx.is_main:
        os.makedirs(h.log_dir, exist_ok=True)
    set_log_file(os.path.join(h.log_dir, f"{h.run_id}.txt"), ctx.is_main)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log_environment()
    log_settings(h)
    set_backend_flags()
    seed_everything(h.seed)

    tokens, tables = prepare(h, ctx)
    base_model, hessians, state = build_and_train(h, ctx, tokens, tables)

    clock = EvalClock(h.eval_limit_seconds)
    with clock.section("before quantisation"):
        raw_trunk = torch.compile(base_model.hidden, dynamic=False)
        raw = evaluate_plain(h, ctx, base_model, raw_trunk, tokens, tables)
    log(f"before_quantisation {raw.line()}")
    write_artifact(h, ctx, base_model, hessians)
    del base_model, hessians, raw_trunk
    torch._dynamo.reset()
    torch.cuda.empty_cache()

    final = evaluate_artifact(h, ctx, tokens, tables, clock)
    clock.report()
    log_memory("all")
    log_rule("result")
    log(f"ledger: {final.targets} targets scored of {tokens.numel() - 1}, {final.nbytes} bytes")
    log(f"trained {state.step} steps in {state.seconds:.1f}s")
    log(f"final val_loss:{final.val_loss:.8f} val_bpb:{final.val_bpb:.8f}")
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
