"""
SP8192 | 11L x 512 | layers 3-5 looped | parallel residuals from layer 7 | XSA everywhere | int6 GPTQ (SDClip) | score-first TTT

One file does everything: train (600 s cap, hessians included), quantise, pack, read the pack back, score.
Hard stop rule that I keep for myself: this file stays below 1600 lines so that people can still read it.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

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

# -----------------------------------------------------------------------------
# HYPERPARAMETERS
# -----------------------------------------------------------------------------


class Hyperparameters:
    # where things are
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp8192")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_8192_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")

    # length of the run
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))

    # scoring
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    sliding_control = bool(int(os.environ.get("SLIDING_CONTROL", "1")))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    bos_id = int(os.environ.get("BOS_ID", 1))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.25))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    parallel_from = int(os.environ.get("PARALLEL_FROM", 7))
    skip_gates = bool(int(os.environ.get("SKIP_GATES", "1")))
    smear = bool(int(os.environ.get("SMEAR", "1")))
    smear_width = int(os.environ.get("SMEAR_WIDTH", 12))

    # depth recurrence: blocks loop_start..loop_end are run 1 + num_loops times once `enable_looping_at` of the run is over
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))

    # optimisers
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_row_normalize = bool(int(os.environ.get("MUON_ROW_NORMALIZE", "1")))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # packing
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 14.0))
    gptq_margin_seconds = float(os.environ.get("GPTQ_MARGIN_SECONDS", 1.5))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    brotli_quality = int(os.environ.get("BROTLI_QUALITY", 11))
    shuffle_stride = int(os.environ.get("SHUFFLE_STRIDE", 2))

    # test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 8))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))
    ttt_log_every = int(os.environ.get("TTT_LOG_EVERY", 100))


CONTROL_TENSOR_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates", "smear")
SIZE_LIMIT = 16_000_000
SHUFFLE_MAGIC = b"BSHF"

# -----------------------------------------------------------------------------
# LOGGING
# -----------------------------------------------------------------------------

_log_state = {"master": True, "file": None}


def open_log(run_id: str, master: bool) -> None:
    _log_state["master"] = master
    if master:
        os.makedirs("logs", exist_ok=True)
        _log_state["file"] = f"logs/{run_id}.txt"
        print(_log_state["file"], flush=True)


def log0(msg: str, console: bool = True) -> None:
    if not _log_state["master"]:
        return
    if console:
        print(msg, flush=True)
    if _log_state["file"] is not None:
        with open(_log_state["file"], "a", encoding="utf-8") as f:
            print(msg, file=f)


class Spans:
    """Wall-clock by name; printed once at the end so that nobody has to add up log lines."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: dict[str, float] = {}

    def start(self, name: str) -> None:
        torch.cuda.synchronize()
        self._open[name] = time.perf_counter()

    def stop(self, name: str) -> float:
        torch.cuda.synchronize()
        took = time.perf_counter() - self._open.pop(name)
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        return took

    def total(self, prefix: str) -> float:
        return sum(s for name, s in self.seconds.items() if name.startswith(prefix))

    def report(self) -> None:
        for name, s in self.seconds.items():
            log0(f"span {name}: {s:.1f}s")


# -----------------------------------------------------------------------------
# DATA
# -----------------------------------------------------------------------------

SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype("<i4").itemsize


def shard_token_count(path: Path) -> int:
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header: {path}")
    n = int(header[2])
    if path.stat().st_size != SHARD_HEADER_BYTES + 2 * n:
        raise ValueError(f"shard size does not match its header: {path}")
    return n


def load_data_shard(path: Path) -> Tensor:
    n = shard_token_count(path)
    tokens = np.fromfile(path, dtype="<u2", count=n, offset=SHARD_HEADER_BYTES)
    if tokens.size != n:
        raise ValueError(f"short read: {path}")
    return torch.from_numpy(tokens.astype(np.int32))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no validation shards: {pattern}")
    # no rounding to a multiple of seq_len here: the window plan deals with the ragged end
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


_MMAPS: dict[str, np.memmap] = {}


def shard_memmap(path: Path) -> np.memmap:
    key = str(path)
    if key not in _MMAPS:
        n = shard_token_count(path)
        _MMAPS[key] = np.memmap(path, mode="r", dtype="<u2", offset=SHARD_HEADER_BYTES, shape=(n,))
    return _MMAPS[key]


class ShuffledSequenceLoader:
    """Every rank owns every world_size-th shard, cuts it into sequences at a random phase and draws them without
    replacement. A used-up shard gets a new phase and a new permutation."""

    def __init__(self, args: Hyperparameters, rank: int, world_size: int, device: torch.device, salt: int = 0):
        files = [Path(p) for p in sorted(glob.glob(args.train_files))]
        if not files:
            raise FileNotFoundError(f"no training shards: {args.train_files}")
        mine = files[rank::world_size] or files
        self.files = mine
        self.seq_len = args.train_seq_len
        self.device = device
        self.world_size = world_size
        self.rng = np.random.default_rng(args.seed * 1009 + rank + 7919 * salt)
        self.counts = [shard_token_count(f) for f in self.files]
        self.queues: list[np.ndarray] = [np.empty(0, dtype=np.int64) for _ in self.files]
        for si in range(len(self.files)):
            self._refill(si)

    def _refill(self, si: int) -> None:
        slack = min(self.seq_len, self.counts[si] - self.seq_len - 1)
        phase = int(self.rng.integers(slack)) if slack > 0 else 0
        n_seq = (self.counts[si] - 1 - phase) // self.seq_len
        self.queues[si] = phase + self.seq_len * self.rng.permutation(n_seq)

    def _draw(self) -> tuple[int, int]:
        left = np.array([len(q) for q in self.queues], dtype=np.float64)
        if left.sum() == 0:
            for si in range(len(self.files)):
                self._refill(si)
            left = np.array([len(q) for q in self.queues], dtype=np.float64)
        si = int(self.rng.choice(len(self.files), p=left / left.sum()))
        start = int(self.queues[si][-1])
        self.queues[si] = self.queues[si][:-1]
        return si, start

    def next_batch(self, global_tokens: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        n_seqs = global_tokens // (self.world_size * grad_accum_steps * self.seq_len)
        rows = np.empty((n_seqs, self.seq_len + 1), dtype=np.int64)
        for i in range(n_seqs):
            si, start = self._draw()
            rows[i] = shard_memmap(self.files[si])[start : start + self.seq_len + 1]
        batch = torch.from_numpy(rows).pin_memory().to(self.device, non_blocking=True)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


# -----------------------------------------------------------------------------
# BYTES PER TOKEN
# -----------------------------------------------------------------------------


class ByteTables:
    """What a target token costs in bytes of the text: its own bytes, plus one for a leading space unless the token
    before it is a boundary (control, unknown, unused), where SentencePiece drops that space when it decodes."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros(size, dtype=np.int16)
        space = np.zeros(size, dtype=np.bool_)
        boundary = np.ones(size, dtype=np.bool_)
        for token_id in range(int(sp.vocab_size())):
            if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
                continue
            boundary[token_id] = False
            if sp.is_byte(token_id):
                base[token_id] = 1
                continue
            piece = sp.id_to_piece(token_id)
            if piece.startswith("\u2581"):
                space[token_id] = True
                piece = piece[1:]
            base[token_id] = len(piece.encode("utf-8"))
        self.base = torch.from_numpy(base).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.boundary = torch.from_numpy(boundary).to(device)

    def of(self, prev: Tensor, target: Tensor) -> Tensor:
        own = self.base[target].to(torch.float64)
        lead = self.space[target] & ~self.boundary[prev]
        return own + lead.to(torch.float64)


def audit_byte_tables(tables: ByteTables, sp: spm.SentencePieceProcessor, tokens: Tensor, bos_id: int) -> None:
    """Decodes some documents and compares their length with what the tables say."""
    head = tokens[:200_000].tolist()
    starts = [i for i, t in enumerate(head) if t == bos_id][:65]
    said = real = 0
    for a, b in zip(starts[:-1], starts[1:]):
        ids = torch.tensor(head[a:b], device=tables.base.device, dtype=torch.int64)
        said += int(tables.of(ids[:-1], ids[1:]).sum().item())
        real += len(sp.decode(head[a + 1 : b]).encode("utf-8"))
    log0(f"byte_tables: {len(starts)} documents decoded:{real} tables:{said} diff:{said - real}")


# -----------------------------------------------------------------------------
# MUON
# -----------------------------------------------------------------------------


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
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    """Each matrix is orthogonalised by one rank; the updates travel in one flat bf16 buffer."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float, row_normalize: bool):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                backend_steps=backend_steps,
                weight_decay=weight_decay,
                row_normalize=row_normalize,
            ),
        )

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    g = g.add(buf, alpha=momentum)
                    if group["row_normalize"]:
                        g = g / g.norm(dim=-1, keepdim=True).clamp_min(1e-7)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                update = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                if group["weight_decay"] > 0.0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr)
                at += p.numel()
        return None


# -----------------------------------------------------------------------------
# MODEL
# -----------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return rms(x)


class CastedLinear(nn.Linear):
    """fp32 master weight, matmul in the dtype of the activations."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def rope_tables(max_len: int, rope_dims: int, base: float) -> tuple[Tensor, Tensor]:
    inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
    return angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    turned, still = x[..., :rope_dims], x[..., rope_dims:]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, still), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if flash_attn_3_func is not None:
        out = flash_attn_3_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    groups = q.size(2) // k.size(2)
    k = k.repeat_interleave(groups, dim=2)
    v = v.repeat_interleave(groups, dim=2)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return y.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, use_xsa: bool):
        super().__init__()
        if args.model_dim % args.num_heads or args.num_heads % args.num_kv_heads:
            raise ValueError("model_dim / num_heads / num_kv_heads do not divide")
        self.num_heads = args.num_heads
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = args.model_dim // args.num_heads
        self.rope_dims = args.rope_dims
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(args.model_dim, args.model_dim, bias=False)
        self.c_k = CastedLinear(args.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(args.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(args.model_dim, args.model_dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), args.qk_gain_init, dtype=torch.float32))

    def exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: takes out of each head's output what lies along the token's own value."""
        B, T, H, D = y.shape
        yg = y.reshape(B, T, self.num_kv_heads, H // self.num_kv_heads, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (yg - (yg * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, T, H, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).reshape(B, T, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        q, k = rms(q), rms(k)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q = apply_rope(q, cos, sin, self.rope_dims)
        k = apply_rope(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = attend(q.to(v.dtype), k.to(v.dtype), v)
        if self.use_xsa:
            y = self.exclude_self(y, v)
        return self.proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        hidden = int(dim * mult)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class SmearGate(nn.Module):
    """Adds a gated copy of the previous token's embedding. A document's first token gets nothing from the one before it."""

    def __init__(self, width: int, bos_id: int):
        super().__init__()
        self.width = width
        self.bos_id = bos_id
        self.smear_gate = CastedLinear(width, 1, bias=False)
        self.smear_gate._zero_init = True
        self.smear_lambda = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.smear_gate(x[:, 1:, : self.width]))
        inside = (input_ids[:, 1:] != self.bos_id).to(x.dtype).unsqueeze(-1)
        carried = self.smear_lambda.to(x.dtype) * gate * inside * x[:, :-1]
        return torch.cat((x[:, :1], x[:, 1:] + carried), dim=1)


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(args, use_xsa=layer_idx >= args.num_layers - args.xsa_last_n)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.norm_scale = 1.0 / math.sqrt(layer_idx + 1) if args.ln_scale else 1.0
        self.parallel = layer_idx >= args.parallel_from

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attn_out = self.attn_scale.to(x.dtype) * self.attn(self.attn_norm(x) * self.norm_scale, cos, sin)
        if self.parallel:
            return x + attn_out + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.norm_scale)
        x = x + attn_out
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.norm_scale)


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.smear = SmearGate(args.smear_width, args.bos_id) if args.smear else None
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self.looping_active = False

        plain = list(range(args.num_layers))
        middle = list(range(args.loop_start, args.loop_end + 1))
        looped = plain[: args.loop_start] + middle * (1 + args.num_loops) + plain[args.loop_end + 1 :]
        self.order_plain = (plain[: len(plain) // 2], plain[len(plain) // 2 :])
        self.order_looped = (looped[: len(looped) // 2], looped[len(looped) // 2 :])
        n_skips = max(len(self.order_plain[0]), len(self.order_looped[0]))
        self.skip_weights = nn.Parameter(torch.ones(n_skips, args.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(n_skips, args.model_dim, dtype=torch.float32)) if args.skip_gates else None
        )
        longest = max(args.train_seq_len, args.eval_seq_len)
        cos, sin = rope_tables(longest, args.rope_dims, args.rope_base)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._init_weights(args)

    def _init_weights(self, args: Hyperparameters) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, input_ids: Tensor) -> Tensor:
        T = input_ids.size(1)
        cos, sin = self.rope_cos[:, :T], self.rope_sin[:, :T]
        x = rms(self.tok_emb(input_ids))
        if self.smear is not None:
            x = self.smear(x, input_ids)
        x0 = x
        first, second = self.order_looped if self.looping_active else self.order_plain
        kept: list[Tensor] = []
        for i in first:
            x = self.blocks[i](x, x0, cos, sin)
            kept.append(x)
        for n, i in enumerate(second):
            if kept and n < self.skip_weights.size(0):
                skip = self.skip_weights[n].to(x.dtype) * kept.pop()
                if self.skip_gates is not None:
                    gate = torch.sigmoid(self.skip_gates[n].to(x.dtype))
                    x = torch.lerp(skip, x, gate)
                else:
                    x = x + skip
            x = self.blocks[i](x, x0, cos, sin)
        return self.final_norm(x)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = self.hidden(input_ids)
        raw = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(raw / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


def is_control(name: str) -> bool:
    return any(pattern in name for pattern in CONTROL_TENSOR_PATTERNS)


def count_parameters(model: nn.Module) -> str:
    groups = {"embed": 0, "matrix": 0, "control": 0}
    for name, p in model.named_parameters():
        kind = "embed" if name.startswith("tok_emb") else "control" if is_control(name) or p.ndim < 2 else "matrix"
        groups[kind] += p.numel()
    return " ".join(f"{kind}:{n}" for kind, n in groups.items()) + f" total:{sum(groups.values())}"


# -----------------------------------------------------------------------------
# OPTIMISERS AND AVERAGES
# -----------------------------------------------------------------------------


class Optimizers:
    def __init__(self, args: Hyperparameters, model: GPT):
        matrices, scalars = [], []
        for name, p in model.named_parameters():
            if name == "tok_emb.weight":
                continue
            (scalars if p.ndim < 2 or is_control(name) else matrices).append(p)
        common = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
        embed = torch.optim.AdamW(
            [{"params": [model.tok_emb.weight], "base_lr": args.tied_embed_lr}],
            lr=args.tied_embed_lr,
            weight_decay=args.embed_wd,
            **common,
        )
        self.muon = Muon(
            matrices,
            lr=args.matrix_lr,
            momentum=args.muon_momentum_warmup_start,
            backend_steps=args.muon_backend_steps,
            weight_decay=args.muon_wd,
            row_normalize=args.muon_row_normalize,
        )
        for group in self.muon.param_groups:
            group["base_lr"] = args.matrix_lr
        scalar = torch.optim.AdamW(
            [{"params": scalars, "base_lr": args.scalar_lr}], lr=args.scalar_lr, weight_decay=args.adam_wd, **common
        )
        self.all = [embed, self.muon, scalar]
        self.args = args

    def set_schedule(self, step: int, lr_mul: float) -> None:
        args = self.args
        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_mul

    def step(self) -> None:
        for opt in self.all:
            opt.step()

    def zero_grad(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def state_dicts(self) -> list[dict]:
        return [copy.deepcopy(opt.state_dict()) for opt in self.all]

    def load_state_dicts(self, states: list[dict]) -> None:
        for opt, state in zip(self.all, states):
            opt.load_state_dict(state)


class EMA:
    """fp32 running average of the whole state dict."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        keys, live = [], []
        for name, t in model.state_dict().items():
            keys.append(self.shadow[name])
            live.append(t.detach().float())
        torch._foreach_lerp_(keys, live, 1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        state = model.state_dict()
        model.load_state_dict({name: t.to(state[name].dtype) for name, t in self.shadow.items()}, strict=True)


def lr_multiplier(frac: float, args: Hyperparameters) -> float:
    """frac: how much of the run is over."""
    if args.warmdown_frac <= 0.0 or frac < 1.0 - args.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / args.warmdown_frac, args.min_lr)


# -----------------------------------------------------------------------------
# GPTQ
# -----------------------------------------------------------------------------


class HessianCollector:
    """Sums X^T X at the input of every big linear layer, and at the input of the tied head for the embedding."""

    def __init__(self, model: GPT, min_numel: int = 65536):
        self.hessians: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.handles = []
        device = next(model.parameters()).device
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear) and module.weight.numel() >= min_numel:
                self._watch(f"{name}.weight", module.weight.size(1), module, device, output=False)
        self._watch("tok_emb.weight", model.tok_emb.weight.size(1), model.final_norm, device, output=True)

    def _watch(self, key: str, width: int, module: nn.Module, device: torch.device, output: bool) -> None:
        self.hessians[key] = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.rows[key] = 0

        def hook(_module, inputs, result):
            x = (result if output else inputs[0]).detach().float().reshape(-1, width)
            self.hessians[key].addmm_(x.T, x)
            self.rows[key] += x.size(0)

        self.handles.append(module.register_forward_hook(hook))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def averaged(self, distributed: bool) -> dict[str, Tensor]:
        out = {}
        for key in self.hessians:
            h = self.hessians[key]
            n = torch.tensor(float(self.rows[key]), dtype=torch.float64, device=h.device)
            if distributed:
                dist.all_reduce(h, op=dist.ReduceOp.SUM)
                dist.all_reduce(n, op=dist.ReduceOp.SUM)
            out[key] = h / max(float(n.item()), 1.0)
        return out


def collect_hessians(
    args: Hyperparameters, model: GPT, loader: ShuffledSequenceLoader, deadline: float
) -> tuple[dict[str, Tensor], int]:
    """Runs training batches through the averaged model until there are enough of them or the time is up.
    deadline: the end of the training cap on perf_counter's scale; no batch is started within the margin before it."""
    distributed = dist.is_available() and dist.is_initialized()
    collector = HessianCollector(model)
    model.eval()
    done = 0
    per_batch_tokens = 8 * args.train_seq_len * loader.world_size
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        while done < args.gptq_calibration_batches:
            torch.cuda.synchronize()
            if time.perf_counter() > deadline - args.gptq_margin_seconds:
                break
            x, _ = loader.next_batch(per_batch_tokens, 1)
            model.forward_logits(x)
            done += 1
    collector.close()
    hessians = collector.averaged(distributed)
    torch.cuda.synchronize()
    return hessians, done


def sdclip_scale(weight: Tensor, sigmas: float, bits: int) -> Tensor:
    """One step width per row, from the row's standard deviation."""
    top = 2 ** (bits - 1) - 1
    return (sigmas * weight.std(dim=1) / top).clamp_min(1e-10).to(torch.float16).float()


def quantize_rows(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.clamp(torch.round(weight / scale[:, None]), -top, top)


def gptq_quantize(
    weight: Tensor, hessian: Tensor, sigmas: float, bits: int, block: int, damp: float
) -> tuple[Tensor, Tensor]:
    """Column by column, pushing each column's rounding error onto the columns that are still open."""
    W = weight.float().clone()
    rows, cols = W.shape
    scale = sdclip_scale(W, sigmas, bits)
    H = hessian.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    H.diagonal().add_(damp * torch.diag(H).mean())
    perm = torch.argsort(torch.diag(H), descending=True)
    inverse_perm = torch.argsort(perm)
    W = W[:, perm]
    H = H[perm][:, perm]
    try:
        Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
        U = torch.linalg.cholesky(Hinv, upper=True)
    except torch.linalg.LinAlgError:
        q = quantize_rows(weight.float(), scale, bits)
        return q.to(torch.int8), scale.to(torch.float16)
    Q = torch.zeros_like(W)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        Wb = W[:, start:end].clone()
        err = torch.zeros_like(Wb)
        Ub = U[start:end, start:end]
        for j in range(end - start):
            w = Wb[:, j]
            q = quantize_rows(w[:, None], scale, bits)[:, 0]
            Q[:, start + j] = q
            e = (w - q * scale) / Ub[j, j]
            Wb[:, j:] -= e[:, None] * Ub[j, j:][None, :]
            err[:, j] = e
        if end < cols:
            W[:, end:] -= err @ U[start:end, end:]
    return Q[:, inverse_perm].to(torch.int8), scale.to(torch.float16)


def quantize_state(args: Hyperparameters, state: dict[str, Tensor], hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    bits_of: dict[str, int] = {}
    err_num = err_den = 0.0
    for name, t in state.items():
        t = t.detach()
        if name not in hessians or t.ndim != 2:
            packed[name] = t.to(torch.float32 if is_control(name) and t.ndim < 2 else torch.float16).cpu().contiguous()
            continue
        embed = name == "tok_emb.weight"
        bits = args.embed_bits if embed else args.matrix_bits
        sigmas = args.embed_clip_sigmas if embed else args.matrix_clip_sigmas
        q, s = gptq_quantize(t, hessians[name], sigmas, bits, args.gptq_block, args.gptq_damp)
        err_num += float((t.float() - q.float() * s.float()[:, None]).square().sum())
        err_den += float(t.float().square().sum())
        packed[name + ".q"] = q.cpu().contiguous()
        packed[name + ".s"] = s.cpu().contiguous()
        bits_of[name] = bits
    log0(f"gptq: {len(bits_of)} matrices, relative squared error {err_num / max(err_den, 1e-12):.6f}")
    return packed


def dequantize_state(packed: dict[str, Tensor], template: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, like in template.items():
        if name + ".q" in packed:
            q, s = packed[name + ".q"], packed[name + ".s"]
            state[name] = (q.float() * s.float()[:, None]).to(like.dtype)
        else:
            state[name] = packed[name].to(like.dtype)
    return state


# -----------------------------------------------------------------------------
# PACKING
# -----------------------------------------------------------------------------


def byte_shuffle(raw: bytes, stride: int) -> bytes:
    if stride <= 1 or len(raw) < stride:
        return raw
    src = np.frombuffer(raw, dtype=np.uint8)
    lanes = np.concatenate([src[lane::stride] for lane in range(stride)])
    return SHUFFLE_MAGIC + bytes([stride]) + lanes.tobytes()


def byte_unshuffle(data: bytes) -> bytes:
    if data[:4] != SHUFFLE_MAGIC:
        return data
    stride = data[4]
    lanes = np.frombuffer(data, dtype=np.uint8, offset=5)
    out = np.empty(lanes.size, dtype=np.uint8)
    at = 0
    for lane in range(stride):
        n = len(range(lane, lanes.size, stride))
        out[lane::stride] = lanes[at : at + n]
        at += n
    return out.tobytes()


def pack_artifact(args: Hyperparameters, packed: dict[str, Tensor]) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    return brotli.compress(byte_shuffle(buf.getvalue(), args.shuffle_stride), quality=args.brotli_quality)


def unpack_artifact(blob: bytes) -> dict[str, Tensor]:
    raw = byte_unshuffle(brotli.decompress(blob))
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def write_artifact(args: Hyperparameters, packed: dict[str, Tensor]) -> None:
    """Rank 0 only. Says what it all weighs."""
    blob = pack_artifact(args, packed)
    with open(args.artifact_path, "wb") as f:
        f.write(blob)
    model_bytes = os.path.getsize(args.artifact_path)
    code_bytes = len(Path(__file__).read_bytes())
    log0(f"Serialized model int{args.matrix_bits}+brotli: {model_bytes} bytes")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size: {model_bytes + code_bytes} bytes")
    if model_bytes + code_bytes > SIZE_LIMIT:
        raise SystemExit(f"too big by {model_bytes + code_bytes - SIZE_LIMIT} bytes")


def read_artifact(args: Hyperparameters, device: torch.device) -> GPT:
    with open(args.artifact_path, "rb") as f:
        packed = unpack_artifact(f.read())
    model = GPT(args).to(device)
    model.load_state_dict(dequantize_state(packed, model.state_dict()), strict=True)
    model.looping_active = args.num_loops > 0
    model.eval()
    return model


# -----------------------------------------------------------------------------
# SCORING
# -----------------------------------------------------------------------------


class ValidationSet:
    """All validation tokens on the device. Target i (0 <= i < n_targets) is token i + 1, given tokens 0..i."""

    def __init__(self, args: Hyperparameters, device: torch.device):
        self.sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
        if int(self.sp.vocab_size()) != args.vocab_size:
            raise ValueError(f"VOCAB_SIZE={args.vocab_size}, the tokenizer has {int(self.sp.vocab_size())}")
        tokens = load_validation_tokens(args.val_files)
        self.tables = ByteTables(self.sp, args.vocab_size, device)
        self.tokens = tokens.to(device=device, dtype=torch.int64)
        self.n_targets = self.tokens.numel() - 1


class Window:
    """Inputs start .. start+length-1; of its targets those from `first` on (counted inside the window) are scored."""

    __slots__ = ("start", "length", "first")

    def __init__(self, start: int, length: int, first: int):
        self.start = start
        self.length = length
        self.first = first


def plan_windows(n_targets: int, seq_len: int, stride: int) -> list[Window]:
    context = seq_len - stride
    plan = []
    for start in range(0, n_targets, stride):
        if start > 0 and start + context >= n_targets:
            break
        length = min(seq_len, n_targets - start)
        plan.append(Window(start, length, 0 if start == 0 else context))
    return plan


def check_plan(plan: list[Window], n_targets: int) -> None:
    """The scored stretches must follow each other without a gap or an overlap."""
    at = 0
    for w in plan:
        if w.start + w.first != at:
            raise AssertionError(f"window at {w.start}: scores from {w.start + w.first}, expected {at}")
        at = w.start + w.length
    if at != n_targets:
        raise AssertionError(f"plan ends at {at}, not at {n_targets}")


class Tally:
    def __init__(self, tables: ByteTables, device: torch.device):
        self.tables = tables
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, nll: Tensor, prev: Tensor, target: Tensor, keep: Tensor) -> None:
        self.nll += nll.to(torch.float64)[keep].sum()
        self.tokens += keep.sum()
        self.bytes += self.tables.of(prev[keep], target[keep]).sum()

    def reduce(self) -> None:
        if dist.is_available() and dist.is_initialized():
            for t in (self.nll, self.tokens, self.bytes):
                dist.all_reduce(t, op=dist.ReduceOp.SUM)

    def result(self) -> tuple[float, float]:
        loss = (self.nll / self.tokens).item()
        bpb = (self.nll / math.log(2.0) / self.bytes).item()
        return loss, bpb

    def running_bpb(self) -> float:
        return (self.nll / math.log(2.0) / self.bytes.clamp_min(1.0)).item()


def gather_batch(
    val: ValidationSet, batch: list[Window], rows: int, seq_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """inputs, targets and the mask of scored places, always `rows` x seq_len so that nothing recompiles."""
    device = val.tokens.device
    starts = torch.zeros(rows, dtype=torch.int64)
    lengths = torch.zeros(rows, dtype=torch.int64)
    firsts = torch.zeros(rows, dtype=torch.int64)
    for i, w in enumerate(batch):
        starts[i], lengths[i], firsts[i] = w.start, w.length, w.first
    starts, lengths, firsts = (t.to(device)[:, None] for t in (starts, lengths, firsts))
    place = torch.arange(seq_len, device=device)[None, :]
    inside = place < lengths
    at = torch.where(inside, starts + place, torch.zeros_like(starts))
    x = torch.where(inside, val.tokens[at], torch.zeros_like(at))
    y = torch.where(inside, val.tokens[at + 1], torch.zeros_like(at))
    return x, y, inside & (place >= firsts)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    flat = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="none")
    return flat.view_as(targets)


def score_windows(args: Hyperparameters, logits_fn, val: ValidationSet, windows: list[Window], tally: Tally) -> None:
    """Adds every scored target of these windows to the tally. Changes nothing else."""
    rows, seq_len = args.eval_batch_seqs, args.eval_seq_len
    for i in range(0, len(windows), rows):
        x, y, keep = gather_batch(val, windows[i : i + rows], rows, seq_len)
        with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x)
        tally.add(token_nll(logits, y), x, y, keep)


def share(items: list, rank: int, world_size: int) -> list:
    lo = len(items) * rank // world_size
    hi = len(items) * (rank + 1) // world_size
    return items[lo:hi]


def eval_frozen(
    args: Hyperparameters, model: GPT, val: ValidationSet, rank: int, world_size: int, device: torch.device, stride: int
) -> tuple[float, float]:
    """Fixed weights over the whole split. stride == seq_len: plain blocks without a shared context."""
    plan = plan_windows(val.n_targets, args.eval_seq_len, stride)
    check_plan(plan, val.n_targets)
    was_training = model.training
    model.eval()
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    tally = Tally(val.tables, device)
    score_windows(args, logits_fn, val, share(plan, rank, world_size), tally)
    tally.reduce()
    model.train(was_training)
    return tally.result()


# -----------------------------------------------------------------------------
# TEST-TIME TRAINING
# -----------------------------------------------------------------------------


class ChunkTrainer:
    """Plain SGD on a chunk whose targets have all been scored. Every rank ends with the same weights: gradients are
    sums over the rank's own sequences, divided by the number of tokens of the whole batch, then all_reduced."""

    def __init__(self, args: Hyperparameters, model: GPT, rank: int, world_size: int):
        self.args = args
        self.model = model
        self.rank = rank
        self.world_size = world_size
        self.params = self._choose()
        self.optimizer = torch.optim.SGD(self.params, lr=args.ttt_lr, momentum=args.ttt_momentum)
        self.steps = 0

    def _choose(self) -> list[nn.Parameter]:
        frozen = tuple(f"blocks.{i}." for i in range(self.args.ttt_freeze_blocks))
        chosen = []
        for name, p in self.model.named_parameters():
            keep = not (frozen and name.startswith(frozen))
            p.requires_grad_(keep)
            if keep:
                chosen.append(p)
        return chosen

    def set_lr(self, chunk: int, n_chunks: int) -> float:
        lr = self.args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * chunk / max(n_chunks - 1, 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _step(self, rows_x: Tensor, rows_y: Tensor, total_tokens: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if rows_x.size(0) > 0:
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = self.model(rows_x, rows_y)
            (loss * (rows_y.numel() / total_tokens)).backward()
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if dist.is_available() and dist.is_initialized():
            for p in self.params:
                dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
        torch.nn.utils.clip_grad_norm_(self.params, self.args.ttt_grad_clip)
        self.optimizer.step()
        self.steps += 1

    def train_on(self, tokens: Tensor) -> None:
        """tokens: the chunk's inputs and, one further, its last target."""
        seq_len = self.args.eval_seq_len
        n_seqs = (tokens.numel() - 1) // seq_len
        if n_seqs == 0:
            return
        x = tokens[: n_seqs * seq_len].view(n_seqs, seq_len)
        y = tokens[1 : n_seqs * seq_len + 1].view(n_seqs, seq_len)
        per_step = self.args.ttt_batch_seqs * self.world_size
        self.model.train()
        for _ in range(self.args.ttt_epochs):
            for at in range(0, n_seqs, per_step):
                rows = list(range(at, min(at + per_step, n_seqs)))
                mine = share(rows, self.rank, self.world_size)
                self._step(x[mine], y[mine], len(rows) * seq_len)
        self.model.eval()


def split_by_chunk(plan: list[Window], chunk_tokens: int, n_targets: int) -> list[list[Window]]:
    """A window belongs to the chunk of its first scored target. With chunk_tokens a multiple of the stride no window
    scores beyond the end of its chunk."""
    n_chunks = (n_targets + chunk_tokens - 1) // chunk_tokens
    chunks: list[list[Window]] = [[] for _ in range(n_chunks)]
    for w in plan:
        chunks[(w.start + w.first) // chunk_tokens].append(w)
    return chunks


def eval_ttt(
    args: Hyperparameters, model: GPT, val: ValidationSet, rank: int, world_size: int, device: torch.device
) -> tuple[float, float]:
    """Chunk after chunk: score all of its targets with the weights as they are, then train on it."""
    if args.ttt_chunk_tokens % args.eval_stride or args.ttt_chunk_tokens < args.eval_seq_len:
        raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE and not below EVAL_SEQ_LEN")
    plan = plan_windows(val.n_targets, args.eval_seq_len, args.eval_stride)
    check_plan(plan, val.n_targets)
    chunks = split_by_chunk(plan, args.ttt_chunk_tokens, val.n_targets)
    n_chunks = len(chunks)
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    trainer = ChunkTrainer(args, model, rank, world_size)
    tally = Tally(val.tables, device)
    log0(
        f"ttt: chunks:{n_chunks} chunk_tokens:{args.ttt_chunk_tokens} lr:{args.ttt_lr} momentum:{args.ttt_momentum} "
        f"epochs:{args.ttt_epochs} trainable:{sum(p.numel() for p in trainer.params)}"
    )
    started = time.perf_counter()
    model.eval()
    for ci, windows in enumerate(chunks):
        score_windows(args, logits_fn, val, share(windows, rank, world_size), tally)
        if ci + 1 < n_chunks:
            lo = ci * args.ttt_chunk_tokens
            hi = min(lo + args.ttt_chunk_tokens, val.n_targets)
            trainer.set_lr(ci, n_chunks)
            trainer.train_on(val.tokens[lo : hi + 1])
        if args.ttt_log_every and ci % args.ttt_log_every == 0:
            log0(f"ttt chunk:{ci + 1}/{n_chunks} rank0_bpb:{tally.running_bpb():.5f} t:{time.perf_counter() - started:.1f}s")
    tally.reduce()
    log0(f"ttt: scored tokens:{int(tally.tokens.item())} bytes:{int(tally.bytes.item())} sgd steps:{trainer.steps}")
    return tally.result()


# -----------------------------------------------------------------------------
# TRAINING
# -----------------------------------------------------------------------------


class TrainingClock:
    """Milliseconds that count against the cap. Rank 0's reading is the one that everybody uses."""

    def __init__(self, device: torch.device):
        self.device = device
        self.banked_ms = 0.0
        self.t0 = time.perf_counter()

    def pause(self) -> None:
        torch.cuda.synchronize()
        self.banked_ms += 1000.0 * (time.perf_counter() - self.t0)

    def resume(self) -> None:
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def local_ms(self) -> float:
        return self.banked_ms + 1000.0 * (time.perf_counter() - self.t0)

    def shared_ms(self) -> float:
        torch.cuda.synchronize()
        ms = torch.tensor(self.local_ms(), dtype=torch.float64, device=self.device)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(ms, src=0)
        return float(ms.item())


def warm_up_compiler(
    args: Hyperparameters,
    base_model: GPT,
    model: nn.Module,
    optimizers: Optimizers,
    loader: ShuffledSequenceLoader,
    grad_accum_steps: int,
) -> None:
    """Runs some steps in both depths so that all graphs exist, then puts weights and optimisers back."""
    if args.warmup_steps <= 0:
        return
    weights = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
    states = optimizers.state_dicts()
    model.train()
    for looping in (False, True) if args.num_loops > 0 else (False,):
        base_model.looping_active = looping
        for step in range(args.warmup_steps):
            train_step(args, model, optimizers, loader, grad_accum_steps)
        log0(f"warmup: looping:{looping} steps:{args.warmup_steps}")
    base_model.looping_active = False
    base_model.load_state_dict(weights, strict=True)
    optimizers.load_state_dicts(states)
    optimizers.zero_grad()


def train_step(
    args: Hyperparameters,
    model: nn.Module,
    optimizers: Optimizers,
    loader: ShuffledSequenceLoader,
    grad_accum_steps: int,
) -> Tensor:
    optimizers.zero_grad()
    total = 0.0
    for micro in range(grad_accum_steps):
        if isinstance(model, DDP):
            model.require_backward_grad_sync = micro == grad_accum_steps - 1
        x, y = loader.next_batch(args.train_batch_tokens, grad_accum_steps)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        total = total + loss.detach()
        (loss / grad_accum_steps).backward()
    if args.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip_norm)
    optimizers.step()
    return total / grad_accum_steps


def train(
    args: Hyperparameters,
    base_model: GPT,
    val: ValidationSet,
    rank: int,
    local_rank: int,
    world_size: int,
    device: torch.device,
) -> tuple[EMA, float]:
    """Returns the averaged weights and the seconds of the cap that are used up."""
    grad_accum_steps = max(8 // world_size, 1)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    distributed = dist.is_available() and dist.is_initialized()
    model = DDP(compiled, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled
    optimizers = Optimizers(args, base_model)

    warm_up_compiler(
        args, base_model, model, optimizers, ShuffledSequenceLoader(args, rank, world_size, device, salt=1), grad_accum_steps
    )

    loader = ShuffledSequenceLoader(args, rank, world_size, device)
    ema = EMA(base_model, args.ema_decay)
    budget_ms = 1000.0 * (args.max_wallclock_seconds - args.gptq_reserve_seconds)
    log0(f"train: budget:{budget_ms:.0f}ms reserve:{args.gptq_reserve_seconds}s grad_accum_steps:{grad_accum_steps}")

    model.train()
    if distributed:
        dist.barrier()
    clock = TrainingClock(device)
    clock.resume()
    step = 0
    elapsed_ms = 0.0
    while True:
        out_of_time = elapsed_ms >= budget_ms
        last_step = step >= args.iterations or out_of_time
        if args.val_loss_every > 0 and (last_step or (step > 0 and step % args.val_loss_every == 0)):
            clock.pause()
            val_loss, val_bpb = eval_frozen(args, base_model, val, rank, world_size, device, args.eval_seq_len)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / max(step, 1):.2f}ms"
            )
            clock.resume()
        if last_step:
            break

        frac = max(step / max(args.iterations, 1), elapsed_ms / max(budget_ms, 1.0))
        if args.num_loops > 0 and not base_model.looping_active and frac >= args.enable_looping_at:
            base_model.looping_active = True
            log0(f"layer_loop:on step:{step} frac:{frac:.3f} first:{base_model.order_looped[0]} second:{base_model.order_looped[1]}")
        optimizers.set_schedule(step, lr_multiplier(frac, args))
        train_loss = train_step(args, model, optimizers, loader, grad_accum_steps)
        ema.update(base_model)
        step += 1
        elapsed_ms = clock.shared_ms()
        if args.train_log_every > 0 and (step <= 5 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / step:.2f}ms"
            )

    log0(f"stopping: train_time:{elapsed_ms:.0f}ms step:{step}/{args.iterations}")
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    return ema, elapsed_ms / 1000.0


# -----------------------------------------------------------------------------
# MAIN
# -----------------------------------------------------------------------------


def setup() -> tuple[int, int, int, torch.device]:
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size > 8 or 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return rank, world_size, local_rank, device


def describe_run(args: Hyperparameters, world_size: int) -> None:
    log0(Path(__file__).read_text(encoding="utf-8"), console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)
    log0("=" * 100, console=False)
    for name in sorted(vars(Hyperparameters)):
        if not name.startswith("_"):
            log0(f"  {name}: {getattr(args, name)}", console=False)
    log0(f"world_size:{world_size} seed:{args.seed} flash_attn_3:{flash_attn_3_func is not None}")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")


def train_and_pack(
    args: Hyperparameters, val: ValidationSet, rank: int, local_rank: int, world_size: int, device: torch.device, spans: Spans
) -> None:
    base_model = GPT(args).to(device)
    log0(f"model_params: {count_parameters(base_model)}")

    ema, used = train(args, base_model, val, rank, local_rank, world_size, device)

    # still on the 600 s: average, then hessians from training shards
    spans.start("train/hessians")
    deadline = time.perf_counter() + args.max_wallclock_seconds - used
    ema.copy_to(base_model)
    base_model.looping_active = args.num_loops > 0
    calib_loader = ShuffledSequenceLoader(args, rank, world_size, device, salt=2)
    hessians, n_batches = collect_hessians(args, base_model, calib_loader, deadline)
    took = spans.stop("train/hessians")
    log0(f"gptq: {n_batches} training batches in {took:.1f}s, train + hessians {used + took:.1f}s of {args.max_wallclock_seconds:.0f}s")

    # from here on only the weights and the hessians are used
    torch._dynamo.reset()
    loss, bpb = eval_frozen(args, base_model, val, rank, world_size, device, args.eval_seq_len)
    log0(f"pre-quantization post-ema val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if rank == 0:
        packed = quantize_state(args, base_model.state_dict(), hessians)
        write_artifact(args, packed)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def evaluate(
    args: Hyperparameters, val: ValidationSet, rank: int, world_size: int, device: torch.device, spans: Spans
) -> None:
    """Everything below starts from the file that was written."""
    torch._dynamo.reset()
    model = read_artifact(args, device)

    spans.start("eval/blocks")
    loss, bpb = eval_frozen(args, model, val, rank, world_size, device, args.eval_seq_len)
    took = spans.stop("eval/blocks")
    log0(f"quantized val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * took:.0f}ms")

    if args.sliding_control or not args.ttt_enabled:
        spans.start("eval/sliding")
        loss, bpb = eval_frozen(args, model, val, rank, world_size, device, args.eval_stride)
        took = spans.stop("eval/sliding")
        log0(f"quantized_sliding_window val_loss:{loss:.8f} val_bpb:{bpb:.8f} stride:{args.eval_stride} eval_time:{1000 * took:.0f}ms")

    if args.ttt_enabled:
        spans.start("eval/ttt")
        loss, bpb = eval_ttt(args, model, val, rank, world_size, device)
        took = spans.stop("eval/ttt")
        log0(f"quantized_ttt val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * took:.0f}ms")

    log0(f"eval total: {spans.total('eval/'):.1f}s")
    log0(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main() -> None:
    args = Hyperparameters()
    rank, world_size, local_rank, device = setup()
    open_log(args.run_id, rank == 0)
    seed_everything(args.seed)
    describe_run(args, world_size)
    spans = Spans()

    val = ValidationSet(args, device)
    log0(f"train shards: {len(glob.glob(args.train_files))}")
    log0(f"val tokens: {val.tokens.numel()} targets: {val.n_targets}")
    if rank == 0:
        audit_byte_tables(val.tables, val.sp, val.tokens, args.bos_id)

    train_and_pack(args, val, rank, local_rank, world_size, device, spans)
    torch.cuda.empty_cache()
    evaluate(args, val, rank, world_size, device, spans)
    spans.report()

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
