"""
kerrera: 11 layers of 512, int6 rows + zstd-22, SWA over the warmdown, sliding windows (stride 64) mixed with an online
n-gram bank.

The bank starts empty. It answers with a whole distribution over the vocabulary (a row of counts per context, divided by the
row's sum, interpolated from the shortest context to the longest), and it is given the tokens of a chunk only after every
rank has scored that chunk. After the same point the gains of the network take a few SGD steps on the chunk.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import json
import math
import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# HYPERPARAMETERS
# -----------------------------


def _env(name: str, default, cast=None):
    raw = os.environ.get(name)
    if raw is None:
        return default
    if cast is None:
        cast = type(default)
    if cast is bool:
        return raw.strip().lower() not in ("0", "false", "no", "")
    return cast(raw)


class Hyperparameters:
    # data
    data_path = _env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = _env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = _env("RUN_ID", str(uuid.uuid4()))
    seed = _env("SEED", 1337)
    bos_id = _env("BOS_ID", 1)

    # shape
    vocab_size = _env("VOCAB_SIZE", 1024)
    num_layers = _env("NUM_LAYERS", 11)
    model_dim = _env("MODEL_DIM", 512)
    num_heads = _env("NUM_HEADS", 8)
    num_kv_heads = _env("NUM_KV_HEADS", 4)
    mlp_mult = _env("MLP_MULT", 3.0)
    rope_base = _env("ROPE_BASE", 10000.0)
    rope_dims = _env("ROPE_DIMS", 32)
    logit_softcap = _env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = _env("QK_GAIN_INIT", 1.5)
    tied_embed_init_std = _env("TIED_EMBED_INIT_STD", 0.005)
    bigram_rows = _env("BIGRAM_ROWS", 4096)
    bigram_dim = _env("BIGRAM_DIM", 96)
    smear = _env("SMEAR", True)

    # schedule
    iterations = _env("ITERATIONS", 20000)
    warmup_steps = _env("WARMUP_STEPS", 20)
    warmdown_iters = _env("WARMDOWN_ITERS", 3000)
    max_wallclock_seconds = _env("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve_seconds = _env("RESERVE_SECONDS", 45.0)
    train_batch_tokens = _env("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = _env("TRAIN_SEQ_LEN", 1024)
    train_log_every = _env("TRAIN_LOG_EVERY", 200)
    val_loss_every = _env("VAL_LOSS_EVERY", 0)
    val_batch_size = _env("VAL_BATCH_SIZE", 524_288)

    # optimisers
    embed_lr = _env("EMBED_LR", 0.6)
    tied_embed_lr = _env("TIED_EMBED_LR", 0.035)
    matrix_lr = _env("MATRIX_LR", 0.025)
    scalar_lr = _env("SCALAR_LR", 0.025)
    muon_momentum = _env("MUON_MOMENTUM", 0.99)
    muon_momentum_start = _env("MUON_MOMENTUM_START", 0.92)
    muon_momentum_warmup = _env("MUON_MOMENTUM_WARMUP", 1500)
    muon_backend_steps = _env("MUON_BACKEND_STEPS", 5)
    muon_weight_decay = _env("MUON_WEIGHT_DECAY", 0.04)
    adam_weight_decay = _env("ADAM_WEIGHT_DECAY", 0.01)
    beta1 = _env("BETA1", 0.9)
    beta2 = _env("BETA2", 0.95)
    adam_eps = _env("ADAM_EPS", 1e-8)
    grad_clip_norm = _env("GRAD_CLIP_NORM", 0.3)

    # checkpoint averaging
    swa_enabled = _env("SWA_ENABLED", True)
    swa_start_scale = _env("SWA_START_SCALE", 0.45)
    swa_every = _env("SWA_EVERY", 50)

    # quantisation
    calib_batches = _env("CALIB_BATCHES", 24)
    calib_batch_seqs = _env("CALIB_BATCH_SEQS", 32)
    clip_candidates = _env("CLIP_CANDIDATES", "1.0,0.99995,0.9999,0.9995,0.999,0.995")
    zstd_level = _env("ZSTD_LEVEL", 22)
    size_limit = _env("SIZE_LIMIT", 16_000_000)
    artifact_path = _env("ARTIFACT_PATH", "final_model.int6.ptz")

    # evaluation
    eval_stride = _env("EVAL_STRIDE", 64)
    eval_seq_len = _env("EVAL_SEQ_LEN", 1024)
    eval_batch_windows = _env("EVAL_BATCH_WINDOWS", 128)
    eval_chunk_tokens = _env("EVAL_CHUNK_TOKENS", 1_048_576)
    eval_budget_seconds = _env("EVAL_BUDGET_SECONDS", 600.0)

    # n-gram bank
    ngram_enabled = _env("NGRAM_ENABLED", True)
    ngram_max_context = _env("NGRAM_MAX_CONTEXT", 4)
    ngram_rows = _env("NGRAM_ROWS", 1 << 20)
    ngram_gamma = _env("NGRAM_GAMMA", 0.75)
    ngram_weight_max = _env("NGRAM_WEIGHT_MAX", 0.45)
    ngram_entropy_mid = _env("NGRAM_ENTROPY_MID", 2.6)
    ngram_entropy_slope = _env("NGRAM_ENTROPY_SLOPE", 1.1)
    ngram_evidence = _env("NGRAM_EVIDENCE", 6.0)

    # adaptation of the gains, after a chunk is scored
    adapt_enabled = _env("ADAPT_ENABLED", True)
    adapt_lr = _env("ADAPT_LR", 2e-3)
    adapt_momentum = _env("ADAPT_MOMENTUM", 0.9)
    adapt_seqs = _env("ADAPT_SEQS", 32)
    adapt_epochs = _env("ADAPT_EPOCHS", 1)


CONTROL_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear",
    "bigram_scale",
)

# -----------------------------
# LOGGING AND DISTRIBUTION
# -----------------------------


class RankInfo:
    """Who this process is: rank, world, device. Sets the process group up when torchrun started us."""

    def __init__(self) -> None:
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        if 8 % self.world != 0:
            raise ValueError(f"WORLD_SIZE={self.world} must divide 8")
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()
        self.master = self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(x, op=dist.ReduceOp.SUM)
        return x

    def mean_grads(self, params: list[nn.Parameter]) -> None:
        if not self.distributed:
            return
        flat = torch.cat([p.grad.reshape(-1).float() for p in params])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        at = 0
        for p in params:
            n = p.numel()
            p.grad.copy_(flat[at : at + n].view_as(p))
            at += n

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class RunLog:
    def __init__(self, run_id: str, master: bool) -> None:
        self.master = master
        self.path = Path("logs") / f"{run_id}.txt"
        if master:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            print(text, file=f)


class Stopwatch:
    """Wall-clock milliseconds, with the device drained at both ends."""

    def __init__(self) -> None:
        self.total = 0.0
        self.started: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.started = time.perf_counter()

    def stop(self) -> float:
        torch.cuda.synchronize()
        if self.started is not None:
            self.total += 1000.0 * (time.perf_counter() - self.started)
            self.started = None
        return self.total

    def now(self) -> float:
        running = 0.0 if self.started is None else 1000.0 * (time.perf_counter() - self.started)
        return self.total + running


# -----------------------------
# DATA
# -----------------------------

HEADER_INTS = 256
HEADER_MAGIC = 20240520


def load_data_shard(file: Path) -> Tensor:
    header_bytes = HEADER_INTS * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != HEADER_MAGIC or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    if file.stat().st_size != header_bytes + num_tokens * np.dtype("<u2").itemsize:
        raise ValueError(f"Shard size mismatch for {file}")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[Path]:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return files


def load_validation_tokens(pattern: str) -> Tensor:
    return torch.cat([load_data_shard(file) for file in list_shards(pattern)]).contiguous()


class TokenStream:
    """Reads shards in order and wraps around for ever."""

    def __init__(self, pattern: str, start_shard: int = 0) -> None:
        self.files = list_shards(pattern)
        self.file_idx = start_shard % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
        self.pos = 0

    def _advance_file(self) -> None:
        self.file_idx = (self.file_idx + 1) % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        chunks: list[Tensor] = []
        remaining = n
        while remaining > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self._advance_file()
                continue
            k = min(remaining, avail)
            chunks.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            remaining -= k
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class DistributedTokenLoader:
    """Each call takes one contiguous slab for all ranks and hands this rank its own span."""

    def __init__(self, pattern: str, info: RankInfo, start_shard: int = 0) -> None:
        self.info = info
        self.stream = TokenStream(pattern, start_shard)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.info.world * grad_accum_steps)
        local_tokens -= local_tokens % seq_len
        span = local_tokens + 1
        slab = self.stream.take(span * self.info.world)
        begin = self.info.rank * span
        local = slab[begin : begin + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.info.device, non_blocking=True), y.to(self.info.device, non_blocking=True)


# -----------------------------
# BYTES OF TOKENS
# -----------------------------


class ByteTable:
    """How many bytes of text a target token stands for, given the token before it.

    `plain` holds the UTF-8 length of the piece without its leading mark, a byte-fallback piece being one byte. The mark
    itself is one space, which is text unless the token before is a control token (the space that sentencepiece puts in
    front of a document is none of the document's).
    """

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> None:
        size = max(int(sp.vocab_size()), vocab_size)
        plain = np.zeros((size,), dtype=np.int32)
        spaced = np.zeros((size,), dtype=np.bool_)
        control = np.ones((size,), dtype=np.bool_)
        for token in range(int(sp.vocab_size())):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            control[token] = False
            if sp.is_byte(token):
                plain[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith("\u2581"):
                spaced[token] = True
                piece = piece[1:]
            plain[token] = len(piece.encode("utf-8"))
        self.plain = torch.tensor(plain, dtype=torch.int32, device=device)
        self.spaced = torch.tensor(spaced, dtype=torch.bool, device=device)
        self.control = torch.tensor(control, dtype=torch.bool, device=device)

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        length = self.plain[target]
        length = length + (self.spaced[target] & ~self.control[previous]).to(torch.int32)
        return length.to(torch.float64)


# -----------------------------
# MUON
# -----------------------------


@torch.compile
def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; each rank does its share of the matrices and the updates are summed."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0) -> None:
        defaults = dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                update = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr)
                at += p.numel()
        return None


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """fp32 weights, bf16 products."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.cached_len = 0
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.cos is None or self.cached_len != seq_len or self.cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self.cos = freqs.cos()[None, None, :, :]
            self.sin = freqs.sin()[None, None, :, :]
            self.cached_len = seq_len
        return self.cos.to(dtype=dtype), self.sin.to(dtype=dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first 2*half dims of every head, leaves the others."""
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, rope_dims: int, qk_gain_init: float
    ) -> None:
        super().__init__()
        if dim % num_heads != 0 or num_heads % num_kv_heads != 0:
            raise ValueError("model_dim must be a multiple of num_heads, num_heads of num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(min(rope_dims, self.head_dim), rope_base)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary(q, cos, sin) * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        k = apply_rotary(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: float) -> None:
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class SmearGate(nn.Module):
    """Lets a share of the previous token's embedding into each position, but never into the start of a document."""

    def __init__(self, dim: int, bos_id: int) -> None:
        super().__init__()
        self.bos_id = bos_id
        self.smear = nn.Parameter(torch.full((dim,), -3.0, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.smear).to(x.dtype)
        shifted = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + gate * inside * shifted


class BigramEmbedding(nn.Module):
    """A hashed table for (previous token, token); the row of a document's first token is row 0."""

    def __init__(self, rows: int, width: int, dim: int, bos_id: int) -> None:
        super().__init__()
        self.rows = rows
        self.bos_id = bos_id
        self.table = nn.Embedding(rows, width)
        nn.init.normal_(self.table.weight, std=0.01)
        self.lift = CastedLinear(width, dim, bias=False)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def row_ids(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0))
        mixed = torch.bitwise_xor(36313 * ids, 27191 * prev) % (self.rows - 1) + 1
        return torch.where(ids == self.bos_id, torch.zeros_like(mixed), mixed)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lift(self.table(self.row_ids(ids))) * self.bigram_scale


class Block(nn.Module):
    def __init__(self, args: Hyperparameters) -> None:
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(
            dim, args.num_heads, args.num_kv_heads, args.rope_base, args.rope_dims, args.qk_gain_init
        )
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(self.attn_norm(x))
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters) -> None:
        super().__init__()
        dim = args.model_dim
        self.softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        self.bigram = BigramEmbedding(args.bigram_rows, args.bigram_dim, dim, args.bos_id) if args.bigram_rows else None
        self.smear_gate = SmearGate(dim, args.bos_id) if args.smear else None
        self.num_encoder = args.num_layers // 2
        self.num_decoder = args.num_layers - self.num_encoder
        self.num_skips = min(self.num_encoder, self.num_decoder)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args) for _ in range(args.num_layers)])
        self.final_norm = RMSNorm()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.size(0) >= 64 and module.weight.size(1) >= 64:
                    nn.init.orthogonal_(module.weight)

    def features(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids)
        if self.bigram is not None:
            x = x + self.bigram(ids)
        x = F.rms_norm(x, (x.size(-1),))
        if self.smear_gate is not None:
            x = self.smear_gate(x, ids)
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder):
            if skips and i < self.num_skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder + i](x, x0)
        return self.final_norm(x)

    def head(self, h: Tensor) -> Tensor:
        raw = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.features(ids).reshape(-1, self.tok_emb.embedding_dim))
        return F.cross_entropy(logits.float(), targets.reshape(-1), reduction="mean")


def is_control_name(name: str) -> bool:
    return any(pattern in name for pattern in CONTROL_PATTERNS)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or is_control_name(name)) and param.dtype != torch.float32:
                param.data = param.data.float()


def build_model(args: Hyperparameters, device: torch.device) -> GPT:
    model = GPT(args).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
        if isinstance(module, Rotary):
            module.inv_freq.data = module.inv_freq.data.float()
    restore_low_dim_params_to_fp32(model)
    return model


def build_optimizers(args: Hyperparameters, model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    matrices, scalars = [], []
    for name, p in model.blocks.named_parameters():
        if p.ndim == 2 and not is_control_name(name):
            matrices.append(p)
        else:
            scalars.append(p)
    scalars.append(model.skip_weights)
    tables = [model.tok_emb.weight]
    if model.smear_gate is not None:
        scalars.append(model.smear_gate.smear)
    if model.bigram is not None:
        tables.append(model.bigram.table.weight)
        matrices.append(model.bigram.lift.weight)
        scalars.append(model.bigram.bigram_scale)
    adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    tok = torch.optim.AdamW(
        [{"params": tables, "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        weight_decay=args.adam_weight_decay,
        **adam,
    )
    muon = Muon(matrices, args.matrix_lr, args.muon_momentum, args.muon_backend_steps, args.muon_weight_decay)
    for group in muon.param_groups:
        group["base_lr"] = args.matrix_lr
    small = torch.optim.AdamW(
        [{"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        weight_decay=args.adam_weight_decay,
        **adam,
    )
    return [tok, muon, small], muon


# -----------------------------
# CHECKPOINT AVERAGE
# -----------------------------


class CheckpointAverage:
    """Equal-weight mean (in fp32) of the weights seen during the late warmdown."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        state = model.state_dict()
        if self.count == 0:
            self.sums = {name: t.detach().float().clone() for name, t in state.items()}
        else:
            for name, t in state.items():
                self.sums[name].add_(t.detach().float())
        self.count += 1

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        if self.count == 0:
            return
        reference = model.state_dict()
        mean = {name: (s / self.count).to(reference[name].dtype) for name, s in self.sums.items()}
        model.load_state_dict(mean, strict=True)


# -----------------------------
# INT6 ROWS + ZSTD
# -----------------------------

INT6_MAX = 31
INT8_MAX = 127
KEEP_FLOAT_NUMEL = 8192


def moment_hooks(model: GPT, sums: dict[str, Tensor]) -> list:
    """Hooks that add up the squares of every linear layer's inputs, by input channel."""
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, CastedLinear):
            continue

        def hook(mod, inputs, name=name):
            x = inputs[0].detach()
            sq = x.reshape(-1, x.size(-1)).float().square().sum(dim=0).double()
            sums[name] = sums[name] + sq if name in sums else sq

        handles.append(module.register_forward_pre_hook(hook))
    return handles


@torch.no_grad()
def input_moments(args: Hyperparameters, model: GPT, info: RankInfo) -> dict[str, Tensor]:
    """Mean square of each input channel of each linear layer, over a few batches of the training shards."""
    loader = DistributedTokenLoader(args.train_files, info, start_shard=3)
    sums: dict[str, Tensor] = {}
    handles = moment_hooks(model, sums)
    model.eval()
    tokens = args.calib_batch_seqs * args.train_seq_len * info.world
    seen = 0
    for _ in range(args.calib_batches):
        x, _ = loader.next_batch(tokens, args.train_seq_len, 1)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.features(x)
        seen += x.numel()
    for handle in handles:
        handle.remove()
    model.train()
    count = info.sum(torch.tensor(float(seen), device=info.device, dtype=torch.float64))
    return {name: (info.sum(s) / count).float() for name, s in sums.items()}


def quantize_rows(weight: Tensor, limit: int, importance: Tensor | None, shares: list[float]) -> tuple[Tensor, Tensor]:
    """Rows to codes in [-limit, limit] and a scale each; the clip of each row is the candidate of least weighted error."""
    w = weight.float()
    weights = torch.ones(w.size(1), device=w.device) if importance is None else importance.clamp_min(1e-12)
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best_scale = torch.ones(w.size(0), device=w.device)
    ordered = w.abs().sort(dim=1).values
    for share in shares:
        column = min(int(round(share * (w.size(1) - 1))), w.size(1) - 1)
        clip = ordered[:, column].clamp_min(1e-8)
        scale = (clip / limit).half().float().clamp_min(1e-7)
        codes = torch.clamp(torch.round(w / scale[:, None]), -limit, limit)
        err = ((codes * scale[:, None] - w).square() * weights[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    codes = torch.clamp(torch.round(w / best_scale[:, None]), -limit, limit).to(torch.int8)
    return codes, best_scale.half()


def quantize_state(args: Hyperparameters, model: GPT, moments: dict[str, Tensor]) -> dict:
    shares = [float(s) for s in args.clip_candidates.split(",")]
    packed: dict = {"codes": {}, "scales": {}, "plain": {}, "dtypes": {}}
    for name, tensor in model.state_dict().items():
        t = tensor.detach()
        if not t.is_floating_point() or t.numel() <= KEEP_FLOAT_NUMEL or is_control_name(name):
            packed["plain"][name] = (t.half() if t.is_floating_point() and not is_control_name(name) else t).cpu()
            packed["dtypes"][name] = str(t.dtype).removeprefix("torch.")
            continue
        limit = INT8_MAX if name == "tok_emb.weight" else INT6_MAX
        codes, scales = quantize_rows(t, limit, moments.get(name.removesuffix(".weight")), shares)
        packed["codes"][name] = codes.cpu()
        packed["scales"][name] = scales.cpu()
        packed["dtypes"][name] = str(t.dtype).removeprefix("torch.")
    return packed


def dequantize_state(packed: dict) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, codes in packed["codes"].items():
        dtype = getattr(torch, packed["dtypes"][name])
        out[name] = (codes.float() * packed["scales"][name].float()[:, None]).to(dtype)
    for name, t in packed["plain"].items():
        out[name] = t.to(getattr(torch, packed["dtypes"][name]))
    return out


def drop_ones(packed: dict, share: float) -> int:
    """Sets a share of the codes +-1 to zero, those of the rows with the smallest scales first."""
    dropped = 0
    for name, codes in packed["codes"].items():
        if name == "tok_emb.weight":
            continue
        ones = codes.abs() == 1
        cost = packed["scales"][name].float()[:, None].expand_as(codes)[ones]
        if cost.numel() == 0:
            continue
        k = max(1, int(share * cost.numel()))
        threshold = cost.kthvalue(k).values
        mask = ones & (packed["scales"][name].float()[:, None] <= threshold)
        dropped += int(mask.sum())
        codes[mask] = 0
    return dropped


def serialize(packed: dict, level: int) -> bytes:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    return zstandard.ZstdCompressor(level=level).compress(buffer.getvalue())


def deserialize(blob: bytes) -> dict:
    raw = zstandard.ZstdDecompressor().decompress(blob)
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=False)


def pack_to_limit(args: Hyperparameters, packed: dict, code_bytes: int, log: RunLog) -> bytes:
    """The compressed artifact, small enough that it and the code stay within the limit together."""
    room = args.size_limit - code_bytes
    blob = serialize(packed, args.zstd_level)
    share = 0.04
    while len(blob) > room and share < 0.7:
        dropped = drop_ones(packed, share)
        blob = serialize(packed, args.zstd_level)
        log(f"pack: dropped {dropped} codes of +-1 (share {share:.2f}), now {len(blob)} bytes of {room}")
        share += 0.08
    if len(blob) > room:
        raise RuntimeError(f"artifact of {len(blob)} bytes does not fit into {room}")
    return blob


# -----------------------------
# N-GRAM BANK
# -----------------------------


class NgramBank:
    """Counts of the tokens that followed each context, for contexts of 0 to `max_context` tokens.

    A context owns a whole row of `vocab` counts. Where vocab**length rows would be too many, contexts share rows by a hash;
    a shared row is still a distribution over the vocabulary once it is divided by its sum. A context never reaches over the
    start of a document. Every rank keeps the same tables.
    """

    PRIMES = (1000003, 7368787, 15485863, 32452843, 49979687)

    def __init__(self, args: Hyperparameters, tokens: Tensor, device: torch.device) -> None:
        self.vocab = args.vocab_size
        self.gamma = args.ngram_gamma
        self.evidence = args.ngram_evidence
        self.weight_max = args.ngram_weight_max
        self.entropy_mid = args.ngram_entropy_mid
        self.entropy_slope = args.ngram_entropy_slope
        self.tokens = tokens
        self.max_context = args.ngram_max_context
        index = torch.arange(tokens.numel(), device=device)
        starts = torch.where(tokens == args.bos_id, index, torch.zeros_like(index))
        self.depth = index - torch.cummax(starts, dim=0).values
        self.rows = [min(self.vocab**length, args.ngram_rows) for length in range(self.max_context + 1)]
        self.tables = [torch.zeros(rows, self.vocab, dtype=torch.int32, device=device) for rows in self.rows]

    def context_rows(self, at: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Rows of the contexts of `length` tokens that end at positions `at`, and which of them exist."""
        exists = self.depth[at] >= length - 1
        if length == 0:
            return torch.zeros_like(at), torch.ones_like(exists)
        exact = self.vocab**length <= self.rows[length]
        row = torch.zeros_like(at)
        for back in range(length - 1, -1, -1):
            token = self.tokens[(at - back).clamp_min(0)]
            if exact:
                row = row * self.vocab + token
            else:
                row = torch.bitwise_xor(row * 31, (token + 1) * self.PRIMES[back])
        return row % self.rows[length], exists

    @torch.no_grad()
    def learn(self, begin: int, end: int, piece: int = 262_144) -> None:
        """Adds the tokens at positions begin+1..end, each under the contexts that end before it."""
        for lo in range(begin, end, piece):
            at = torch.arange(lo, min(lo + piece, end), device=self.tokens.device)
            following = self.tokens[at + 1]
            for length, table in enumerate(self.tables):
                rows, exists = self.context_rows(at, length)
                cell = (rows * self.vocab + following)[exists]
                table.view(-1).index_add_(0, cell, torch.ones_like(cell, dtype=torch.int32))

    @torch.no_grad()
    def distribution(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """For each position: the bank's distribution of the next token, and the evidence in its longest contexts."""
        counts = self.tables[0][0].float()
        base = (counts + 1.0) / (counts.sum() + self.vocab)
        p = base[None, :].expand(at.numel(), self.vocab)
        support = torch.zeros(at.numel(), device=at.device)
        for length in range(1, self.max_context + 1):
            rows, exists = self.context_rows(at, length)
            counts = self.tables[length][rows].float() * exists[:, None]
            total = counts.sum(dim=1)
            kinds = (counts > 0).sum(dim=1).float()
            trust = total / (total + self.gamma * kinds).clamp_min(1.0e-9)
            p = trust[:, None] * (counts / total.clamp_min(1.0)[:, None]) + (1.0 - trust)[:, None] * p
            if length >= 2:
                support = support + total * (length / self.max_context)
        return p, support

    @torch.no_grad()
    def mix(self, log_p: Tensor, at: Tensor) -> Tensor:
        """The network's log-distributions [N, V] mixed with the bank's; the weight reads the context alone."""
        p_bank, support = self.distribution(at)
        p_net = log_p.exp()
        entropy = -(p_net * log_p).sum(dim=1)
        weight = self.weight_max * torch.sigmoid(self.entropy_slope * (entropy - self.entropy_mid))
        weight = weight * support / (support + self.evidence)
        mixed = (1.0 - weight)[:, None] * p_net + weight[:, None] * p_bank
        return mixed.clamp_min(1e-30).log()


# -----------------------------
# EVALUATION
# -----------------------------


def eval_blocks(
    args: Hyperparameters, model: nn.Module, info: RankInfo, val_tokens: Tensor, table: ByteTable, grad_accum_steps: int
) -> tuple[float, float]:
    """Quick look: blocks of train_seq_len side by side, no bank, no adaptation. Only ever logged."""
    seq_len = args.train_seq_len
    local_tokens = args.val_batch_size // (info.world * grad_accum_steps)
    local_seqs = max(1, local_tokens // seq_len)
    total_seqs = (val_tokens.numel() - 1) // seq_len
    first = total_seqs * info.rank // info.world
    last = total_seqs * (info.rank + 1) // info.world
    loss_sum = torch.zeros((), device=info.device, dtype=torch.float64)
    token_sum = torch.zeros((), device=info.device, dtype=torch.float64)
    byte_sum = torch.zeros((), device=info.device, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for s in range(first, last, local_seqs):
            e = min(s + local_seqs, last)
            block = val_tokens[s * seq_len : e * seq_len + 1].to(device=info.device, dtype=torch.int64)
            x, y = block[:-1].reshape(-1, seq_len), block[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y).detach()
            loss_sum += loss.double() * y.numel()
            token_sum += float(y.numel())
            byte_sum += table.count(x.reshape(-1), y.reshape(-1)).sum()
    for t in (loss_sum, token_sum, byte_sum):
        info.sum(t)
    model.train()
    mean = (loss_sum / token_sum).item()
    return mean, mean / math.log(2.0) * (token_sum / byte_sum).item()


class Ledger:
    """This rank's sums; `close` adds the ranks up and says how many targets were charged."""

    def __init__(self, device: torch.device) -> None:
        self.nats = torch.zeros((), device=device, dtype=torch.float64)
        self.tokens = torch.zeros((), device=device, dtype=torch.float64)
        self.bytes = torch.zeros((), device=device, dtype=torch.float64)

    def charge(self, nats: Tensor, num_bytes: Tensor) -> None:
        self.nats += nats.double().sum()
        self.bytes += num_bytes.sum()
        self.tokens += float(nats.numel())

    def close(self, info: RankInfo) -> tuple[float, float, int]:
        for t in (self.nats, self.tokens, self.bytes):
            info.sum(t)
        loss = (self.nats / self.tokens).item()
        bpb = (self.nats / math.log(2.0) / self.bytes).item()
        return loss, bpb, int(self.tokens.item())


class Windows:
    """The windows of one chunk: `stride` targets each, seen with as much context as the sequence length allows.

    Position i of the stream is the input whose target is the token at i + 1. A window charges the positions
    first..first+stride-1 that lie before `end`; its inputs begin at `begin`, so that the last charged position is the
    window's last where the stream permits.
    """

    def __init__(self, start: int, end: int, total: int, seq_len: int, stride: int, device: torch.device) -> None:
        self.first = torch.arange(start, end, stride, device=device)
        self.end = end
        self.stride = stride
        self.seq_len = seq_len
        self.begin = (self.first + stride - seq_len).clamp(0, max(total - seq_len, 0))

    def share(self, rank: int, world: int) -> tuple[Tensor, Tensor]:
        return self.first[rank::world], self.begin[rank::world]

    def charged(self, first: Tensor) -> tuple[Tensor, Tensor]:
        positions = first[:, None] + torch.arange(self.stride, device=first.device)[None, :]
        return positions, positions < self.end


class SlidingScorer:
    """Scores the validation stream chunk by chunk, left to right, every target once."""

    def __init__(self, args: Hyperparameters, model: GPT, info: RankInfo, stream: Tensor, table: ByteTable) -> None:
        if args.eval_chunk_tokens % args.eval_stride != 0:
            raise ValueError("EVAL_CHUNK_TOKENS must be a multiple of EVAL_STRIDE")
        self.args = args
        self.model = model
        self.info = info
        self.stream = stream
        self.table = table
        self.total = stream.numel() - 1
        self.ledger = Ledger(info.device)
        self.bank = NgramBank(args, stream, info.device) if args.ngram_enabled else None
        self.features = torch.compile(model.features, dynamic=False)
        self.gains = [p for name, p in model.named_parameters() if is_control_name(name)]

    def window_log_probs(self, begin: Tensor, positions: Tensor) -> Tensor:
        """[windows, stride, V]: the network's log-distributions at the charged positions."""
        span = torch.arange(self.args.eval_seq_len, device=begin.device)
        ids = self.stream[begin[:, None] + span[None, :]]
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            hidden = self.features(ids)
        local = (positions - begin[:, None]).clamp(0, self.args.eval_seq_len - 1)
        picked = hidden.gather(1, local[:, :, None].expand(-1, -1, hidden.size(-1)))
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = self.model.head(picked)
        return F.log_softmax(logits.float(), dim=-1)

    @torch.no_grad()
    def score_chunk(self, start: int, end: int) -> None:
        args = self.args
        windows = Windows(start, end, self.total, args.eval_seq_len, args.eval_stride, self.info.device)
        firsts, begins = windows.share(self.info.rank, self.info.world)
        size = args.eval_batch_windows
        for i in range(0, firsts.numel(), size):
            first, begin = firsts[i : i + size], begins[i : i + size]
            count = first.numel()
            if count < size:
                first = torch.cat((first, first[-1:].expand(size - count)))
                begin = torch.cat((begin, begin[-1:].expand(size - count)))
            positions, valid = windows.charged(first)
            valid[count:] = False
            log_p = self.window_log_probs(begin, positions)[valid]
            at = positions[valid]
            if self.bank is not None:
                log_p = self.bank.mix(log_p, at)
            target = self.stream[at + 1]
            nats = -log_p.gather(1, target[:, None]).squeeze(1)
            self.ledger.charge(nats, self.table.count(self.stream[at], target))

    def adapt_chunk(self, start: int, end: int, optimizer: torch.optim.Optimizer) -> None:
        """A few SGD steps of the gains on the chunk, the sequences shared out over the ranks."""
        args, info = self.args, self.info
        seq_len = args.eval_seq_len
        group = args.adapt_seqs * info.world
        total_seqs = (end - start) // seq_len
        for _ in range(args.adapt_epochs):
            for s in range(0, total_seqs - group + 1, group):
                own = start + (s + info.rank * args.adapt_seqs) * seq_len
                block = self.stream[own : own + args.adapt_seqs * seq_len + 1]
                x, y = block[:-1].reshape(-1, seq_len), block[1:].reshape(-1, seq_len)
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = self.model(x, y)
                loss.backward()
                info.mean_grads(self.gains)
                torch.nn.utils.clip_grad_norm_(self.gains, 1.0)
                optimizer.step()

    def run(self, log: RunLog) -> tuple[float, float]:
        args = self.args
        for p in self.model.parameters():
            p.requires_grad_(False)
        for p in self.gains:
            p.requires_grad_(True)
        optimizer = torch.optim.SGD(self.gains, lr=args.adapt_lr, momentum=args.adapt_momentum)
        self.model.eval()
        starts = list(range(0, self.total, args.eval_chunk_tokens))
        for number, start in enumerate(starts):
            end = min(start + args.eval_chunk_tokens, self.total)
            self.score_chunk(start, end)
            if self.bank is not None:
                self.bank.learn(start, end)
            if args.adapt_enabled and number + 1 < len(starts):
                scale = 0.5 * (1.0 + math.cos(math.pi * number / len(starts)))
                for group in optimizer.param_groups:
                    group["lr"] = args.adapt_lr * scale
                self.adapt_chunk(start, end, optimizer)
            if number % 10 == 0:
                nats, num_bytes = self.ledger.nats.item(), max(self.ledger.bytes.item(), 1.0)
                log(f"chunk:{number + 1}/{len(starts)} rank0_bpb:{nats / math.log(2.0) / num_bytes:.4f}")
        loss, bpb, charged = self.ledger.close(self.info)
        if charged != self.total:
            raise RuntimeError(f"charged {charged} targets of {self.total}")
        return loss, bpb


# -----------------------------
# TRAINING
# -----------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def set_backends() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)


class Schedule:
    """Learning-rate scale by step and clock: flat, then down to zero over what the clock leaves of the warmdown."""

    def __init__(self, args: Hyperparameters) -> None:
        self.iterations = args.iterations
        self.warmdown = args.warmdown_iters
        self.budget_ms = train_budget_ms(args)

    def scale(self, step: int, elapsed_ms: float) -> float:
        if self.warmdown <= 0:
            return 1.0
        if self.budget_ms is None:
            start = max(self.iterations - self.warmdown, 0)
            return max((self.iterations - step) / self.warmdown, 0.0) if step >= start else 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = self.warmdown * step_ms
        remaining_ms = max(self.budget_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


def train_budget_ms(args: Hyperparameters) -> float | None:
    """What the optimiser steps may take; the reserve is for the calibration and the quantisation."""
    if args.max_wallclock_seconds <= 0:
        return None
    return 1000.0 * max(args.max_wallclock_seconds - args.reserve_seconds, 0.0)


class Trainer:
    def __init__(
        self, args: Hyperparameters, info: RankInfo, log: RunLog, base: GPT, val_tokens: Tensor, table: ByteTable
    ) -> None:
        self.args, self.info, self.log, self.base = args, info, log, base
        self.val_tokens, self.table = val_tokens, table
        self.grad_accum = 8 // info.world
        compiled = torch.compile(base, dynamic=False, fullgraph=True)
        self.model = DDP(compiled, device_ids=[info.local], broadcast_buffers=False) if info.distributed else compiled
        self.optimizers, self.muon = build_optimizers(args, base)
        self.schedule = Schedule(args)
        self.average = CheckpointAverage()
        self.clock = Stopwatch()

    def gradients(self, loader: DistributedTokenLoader) -> Tensor:
        args = self.args
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)
        train_loss = torch.zeros((), device=self.info.device)
        for micro in range(self.grad_accum):
            if self.info.distributed:
                self.model.require_backward_grad_sync = micro == self.grad_accum - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, self.grad_accum)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = self.model(x, y)
            train_loss += loss.detach()
            (loss / self.grad_accum).backward()
        return train_loss / self.grad_accum

    def apply(self, step: int, scale: float) -> None:
        args = self.args
        frac = min(step / args.muon_momentum_warmup, 1.0) if args.muon_momentum_warmup > 0 else 1.0
        momentum = (1.0 - frac) * args.muon_momentum_start + frac * args.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.base.parameters(), args.grad_clip_norm)
        for opt in self.optimizers:
            opt.step()

    def warm_up(self) -> None:
        """Primes the compiled kernels on training batches, then puts weights and optimisers back as they were."""
        args = self.args
        if args.warmup_steps <= 0:
            return
        weights = {name: t.detach().cpu().clone() for name, t in self.base.state_dict().items()}
        states = [copy.deepcopy(opt.state_dict()) for opt in self.optimizers]
        self.model.train()
        loader = DistributedTokenLoader(args.train_files, self.info)
        for warmup_step in range(args.warmup_steps):
            self.gradients(loader)
            self.apply(0, 1.0)
            if warmup_step + 1 == args.warmup_steps or (warmup_step + 1) % 10 == 0:
                self.log(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
        self.base.load_state_dict(weights, strict=True)
        for opt, state in zip(self.optimizers, states, strict=True):
            opt.load_state_dict(state)
            opt.zero_grad(set_to_none=True)
        if self.info.distributed:
            self.model.require_backward_grad_sync = True

    def look(self, step: int) -> None:
        """Logs the validation loss; the clock of the training stands still meanwhile."""
        elapsed = self.clock.stop()
        loss, bpb = eval_blocks(
            self.args, self.model, self.info, self.val_tokens, self.table, self.grad_accum
        )
        self.log(f"step:{step} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{elapsed:.0f}ms")
        self.clock.start()

    def out_of_time(self) -> bool:
        budget = self.schedule.budget_ms
        if budget is None:
            return False
        late = torch.tensor(float(self.clock.now() >= budget), device=self.info.device)
        if self.info.distributed:
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        return late.item() > 0

    def run(self) -> int:
        args = self.args
        loader = DistributedTokenLoader(args.train_files, self.info)
        self.model.train()
        self.info.barrier()
        self.clock.start()
        step = 0
        while step < args.iterations:
            if args.val_loss_every > 0 and step % args.val_loss_every == 0:
                self.look(step)
            scale = self.schedule.scale(step, self.clock.now())
            train_loss = self.gradients(loader)
            self.apply(step, scale)
            step += 1
            if args.swa_enabled and scale < args.swa_start_scale and step % args.swa_every == 0:
                self.average.add(self.base)
            if step <= 5 or step % args.train_log_every == 0:
                elapsed = self.clock.now()
                self.log(
                    f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                    f"train_time:{elapsed:.0f}ms step_avg:{elapsed / step:.2f}ms scale:{scale:.4f}"
                )
            if self.out_of_time():
                self.log(f"stopping_early: wallclock_cap train_time:{self.clock.now():.0f}ms step:{step}")
                break
        self.log(f"swa: averaging {self.average.count} checkpoints")
        self.average.load_into(self.base)
        return step


# -----------------------------
# MAIN
# -----------------------------


def describe(args: Hyperparameters, info: RankInfo, log: RunLog, code: str) -> None:
    log(code, console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)
    settings = {k: v for k, v in vars(Hyperparameters).items() if not k.startswith("_")}
    log(json.dumps(settings, default=str), console=False)
    log(f"world_size:{info.world} grad_accum_steps:{8 // info.world} seed:{args.seed}")


def make_artifact(args: Hyperparameters, trainer: Trainer, code_bytes: int, log: RunLog) -> None:
    """Calibrates and quantises on the training clock, then writes the compressed artifact."""
    info = trainer.info
    moments = input_moments(args, trainer.base, info)
    packed = quantize_state(args, trainer.base, moments)
    elapsed = trainer.clock.stop()
    log(f"quantised: train+calibration {elapsed:.0f}ms of {1000.0 * args.max_wallclock_seconds:.0f}ms")
    if info.master:
        blob = pack_to_limit(args, packed, code_bytes, log)
        Path(args.artifact_path).write_bytes(blob)
    info.barrier()
    model_bytes = os.path.getsize(args.artifact_path)
    total = model_bytes + code_bytes
    log(f"Serialized model int6+zstd: {model_bytes} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size: {total} bytes (limit {args.size_limit})")
    if total > args.size_limit:
        raise RuntimeError(f"submission of {total} bytes is over {args.size_limit}")


def load_artifact(args: Hyperparameters, info: RankInfo) -> GPT:
    packed = deserialize(Path(args.artifact_path).read_bytes())
    model = build_model(args, info.device)
    model.load_state_dict(dequantize_state(packed), strict=True)
    return model


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    code_bytes = len(code.encode("utf-8"))
    args = Hyperparameters()
    info = RankInfo()
    log = RunLog(args.run_id, info.master)
    set_backends()
    seed_everything(args.seed)
    describe(args, info, log, code)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    table = ByteTable(sp, args.vocab_size, info.device)
    val_tokens = load_validation_tokens(args.val_files)
    log(f"train_shards:{len(list_shards(args.train_files))} val_tokens:{val_tokens.numel() - 1}")

    base = build_model(args, info.device)
    log(f"model_params:{sum(p.numel() for p in base.parameters())}")
    trainer = Trainer(args, info, log, base, val_tokens, table)
    trainer.warm_up()
    steps = trainer.run()
    peak = torch.cuda.max_memory_allocated() // 1024 // 1024
    log(f"trained {steps} steps, peak memory allocated: {peak} MiB")
    make_artifact(args, trainer, code_bytes, log)
    del trainer, base
    torch.cuda.empty_cache()
    torch._dynamo.reset()

    clock = Stopwatch()
    clock.start()
    model = load_artifact(args, info)
    loss, bpb = eval_blocks(args, model, info, val_tokens, table, 1)
    log(f"final_int6_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{clock.now():.0f}ms")

    stream = val_tokens.to(device=info.device, dtype=torch.int64)
    scorer = SlidingScorer(args, model, info, stream, table)
    loss, bpb = scorer.run(log)
    elapsed = clock.stop()
    log(
        f"final_sliding_ngram val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{args.eval_stride} "
        f"tokens:{scorer.total} eval_time:{elapsed:.0f}ms"
    )
    log(f"final_sliding_ngram_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if elapsed > 1000.0 * args.eval_budget_seconds:
        log(f"warning: evaluation took {elapsed:.0f}ms, more than {args.eval_budget_seconds:.0f}s")
    info.close()


if __name__ == "__main__":
    main()
