"""
11L x 512 SP8192 + depth recurrence + score-first TTT + causal n-gram hint tilt.

One file: training, GPTQ int6 / int7-embedding packing, and the evaluation that is reported. The n-gram part is plain numba
(no external sources): tables are filled in the order of the text, the hint of a position is fixed before its token is read,
and the tilted distribution is renormalised in closed form, since only one logit moves.
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
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numba import njit
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# HYPERPARAMETERS
# -----------------------------


class Hyperparameters:
    # Data.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp8192")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_8192_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 42))

    # Length of the run.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 14.0))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 524_288))

    # Model.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.25))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))
    parallel_start = int(os.environ.get("PARALLEL_START", 7))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    smear_gate = bool(int(os.environ.get("SMEAR_GATE", "1")))

    # Optimizer.
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # Packing.
    gptq_batches = int(os.environ.get("GPTQ_BATCHES", 64))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 7))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 15.0))
    size_limit = 16_000_000

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_windows = int(os.environ.get("EVAL_BATCH_WINDOWS", 32))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 65_536))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 32))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))

    # Hint tilt.
    hint_enabled = bool(int(os.environ.get("HINT_ENABLED", "1")))
    hint_orders = tuple(int(x) for x in os.environ.get("HINT_ORDERS", "4,6,9,13,18").split(","))
    hint_table_bits = int(os.environ.get("HINT_TABLE_BITS", 22))
    hint_token_beta = float(os.environ.get("HINT_TOKEN_BETA", 2.4))
    hint_within_beta = float(os.environ.get("HINT_WITHIN_BETA", 0.85))
    hint_word_beta = float(os.environ.get("HINT_WORD_BETA", 0.6))
    hint_min_rate = float(os.environ.get("HINT_MIN_RATE", 0.45))

    # Files.
    logfile = os.path.join("logs", f"{run_id}.txt")
    model_path = "final_model.pt"
    quantized_model_path = "final_model.int6.ptz"


CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates", "smear")
_log_handle = None


def log0(message: str, console: bool = True) -> None:
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    if console:
        print(message, flush=True)
    if _log_handle is not None:
        _log_handle.write(message + "\n")
        _log_handle.flush()


# -----------------------------
# DATA
# -----------------------------

SHARD_MAGIC = 20240520
HEADER_INTS = 256


def read_header(file: Path) -> int:
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    return int(header[2])


def load_data_shard(file: Path) -> Tensor:
    count = read_header(file)
    tokens = np.fromfile(file, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


class ShuffledShardLoader:
    """Sequences of the training shards. Each rank owns every world_size-th shard and draws its sequences in a random order."""

    def __init__(self, pattern: str, seq_len: int, rank: int, world_size: int, device: torch.device, seed: int):
        files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.files = files[rank::world_size] or files
        self.seq_len = seq_len
        self.device = device
        self.rng = np.random.default_rng(seed * 1009 + rank)
        self.maps = [
            np.memmap(f, dtype="<u2", mode="r", offset=HEADER_INTS * 4, shape=(read_header(f),)) for f in self.files
        ]
        self.starts: list[tuple[int, int]] = []

    def _refill(self) -> None:
        for i, shard in enumerate(self.maps):
            phase = int(self.rng.integers(0, self.seq_len))
            count = (len(shard) - 1 - phase) // self.seq_len
            self.starts.extend((i, phase + j * self.seq_len) for j in range(count))
        self.rng.shuffle(self.starts)

    def next_batch(self, sequences: int) -> tuple[Tensor, Tensor]:
        rows = []
        for _ in range(sequences):
            if not self.starts:
                self._refill()
            shard, start = self.starts.pop()
            rows.append(np.asarray(self.maps[shard][start : start + self.seq_len + 1]).astype(np.int64))
        block = torch.from_numpy(np.stack(rows)).pin_memory().to(self.device, non_blocking=True)
        return block[:, :-1], block[:, 1:]


# -----------------------------
# BYTES PER TOKEN
# -----------------------------


class ByteTables:
    """What each piece of the vocabulary adds to the byte count, and where words begin."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        size = max(int(sp.vocab_size()), vocab_size)
        base_bytes = np.zeros((size,), dtype=np.int16)
        leading_space = np.zeros((size,), dtype=np.bool_)
        boundary = np.ones((size,), dtype=np.bool_)
        for token_id in range(int(sp.vocab_size())):
            if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
                continue
            boundary[token_id] = False
            if sp.is_byte(token_id):
                base_bytes[token_id] = 1
                continue
            piece = sp.id_to_piece(token_id)
            if piece.startswith("\u2581"):
                leading_space[token_id] = True
                piece = piece[1:]
            base_bytes[token_id] = len(piece.encode("utf-8"))
        self.starts_word = leading_space | boundary
        self.base_bytes = torch.tensor(base_bytes, dtype=torch.int16, device=device)
        self.leading_space = torch.tensor(leading_space, dtype=torch.bool, device=device)
        self.boundary = torch.tensor(boundary, dtype=torch.bool, device=device)

    def count(self, targets: Tensor, previous: Tensor) -> Tensor:
        """Bytes of the original text under each target. The space of a leading mark exists unless a document starts there."""
        space = self.leading_space[targets] & ~self.boundary[previous]
        return self.base_bytes[targets].to(torch.float64) + space.to(torch.float64)


# -----------------------------
# OPTIMIZER
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    transposed = X.size(0) > X.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    """Muon with row-normalised updates; the matrices are dealt out to the ranks and the updates summed."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
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
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(p.grad)
                    g = p.grad.add(buf, alpha=momentum)
                    g = g / g.norm(dim=-1, keepdim=True).clamp_min(1e-7)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-lr)
                at += p.numel()


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, rope_dims: int, base: float):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._cached_len = 0
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._cached_len != seq_len or self._cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=torch.float32)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos = freqs.cos()[None, None]
            self._sin = freqs.sin()[None, None]
            self._cached_len = seq_len
        return self._cos.to(dtype), self._sin.to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    rotated, passed = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = rotated[..., :half], rotated[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, passed), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h: type[Hyperparameters], use_xsa: bool):
        super().__init__()
        self.num_heads = h.num_heads
        self.num_kv_heads = h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        self.rope_dims = h.rope_dims
        self.use_xsa = use_xsa
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(h.rope_dims, h.rope_base)

    def _remove_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: what a head says about its own position's value is taken out of its output."""
        B, H, T, D = y.shape
        groups = H // v.size(1)
        y = y.view(B, v.size(1), groups, T, D)
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        y = y - (y * vn).sum(dim=-1, keepdim=True) * vn
        return y.reshape(B, H, T, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(T, x.device, q.dtype)
        q = apply_rotary(q, cos, sin, self.rope_dims) * self.q_gain.to(q.dtype)[None, :, None, None]
        k = apply_rotary(k, cos, sin, self.rope_dims)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if self.use_xsa:
            y = self._remove_self(y, v)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        self.fc = CastedLinear(dim, int(dim * mult), bias=False)
        self.proj = CastedLinear(int(dim * mult), dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class SmearGate(nn.Module):
    """Lets a little of the previous token's embedding through; nothing crosses the start of a document."""

    def __init__(self, dim: int):
        super().__init__()
        self.smear_gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, is_start: Tensor) -> Tensor:
        g = torch.sigmoid(self.smear_gate - 2.0).to(x.dtype)
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        previous = previous.masked_fill(is_start.unsqueeze(-1), 0.0)
        return x + g * previous


class Block(nn.Module):
    def __init__(self, h: type[Hyperparameters], index: int):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(h, use_xsa=index >= h.num_layers - h.xsa_last_n)
        self.mlp = MLP(h.model_dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        self.depth_scale = 1.0 / math.sqrt(index + 1)
        self.parallel = index >= h.parallel_start

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attn = self.attn_scale.to(x.dtype) * self.attn(self.attn_norm(x) * self.depth_scale)
        if self.parallel:
            return x + attn + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.depth_scale)
        x = x + attn
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.depth_scale)


class GPT(nn.Module):
    def __init__(self, h: type[Hyperparameters], bos_id: int):
        super().__init__()
        self.h = h
        self.bos_id = bos_id
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.model_dim) if h.smear_gate else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        self.looping_active = False
        once = list(range(h.num_layers))
        looped = (
            list(range(h.loop_start))
            + list(range(h.loop_start, h.loop_end + 1)) * 3
            + list(range(h.loop_end + 1, h.num_layers))
        )
        self.orders = {False: self._halves(once), True: self._halves(looped)}
        skips = min(len(self.orders[True][0]), len(self.orders[True][1]))
        self.skip_weights = nn.Parameter(torch.ones(skips, h.model_dim, dtype=torch.float32))
        self.skip_gates = nn.Parameter(torch.zeros(skips, h.model_dim, dtype=torch.float32))
        self._init_weights()

    @staticmethod
    def _halves(order: list[int]) -> tuple[list[int], list[int]]:
        middle = len(order) // 2
        return order[:middle], order[middle:]

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=0.005)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = F.rms_norm(self.tok_emb(input_ids).to(torch.bfloat16), (self.h.model_dim,))
        if self.smear is not None:
            x = self.smear(x, input_ids == self.bos_id)
        x0 = x
        down, up = self.orders[self.looping_active]
        skips: list[Tensor] = []
        for i in down:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for n, i in enumerate(up):
            if skips and n < self.skip_weights.size(0):
                skip = self.skip_weights[n].to(x.dtype) * skips.pop()
                gate = torch.sigmoid(self.skip_gates[n]).to(x.dtype)
                x = gate * x + (1.0 - gate) * skip
            x = self.blocks[i](x, x0)
        return self.final_norm(x)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        logits = F.linear(self.hidden(input_ids), self.tok_emb.weight.to(torch.bfloat16))
        return self.h.logit_softcap * torch.tanh(logits / self.h.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1))


# -----------------------------
# GPTQ AND PACKING
# -----------------------------


def collect_hessians(
    model: GPT, loader: ShuffledShardLoader, batches: int, sequences: int, device: torch.device
) -> dict[str, Tensor]:
    """X^T X of the input of every linear layer, and of the tied head, over batches of training data."""
    hessians: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str):
        def hook(module, inputs, output):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in hessians:
                hessians[name] = torch.zeros(x.size(1), x.size(1), device=device)
            hessians[name].addmm_(x.T, x)

        return hook

    def watch_head(module, inputs, output):
        x = output.detach().reshape(-1, output.size(-1)).float()
        if "tok_emb.weight" not in hessians:
            hessians["tok_emb.weight"] = torch.zeros(x.size(1), x.size(1), device=device)
        hessians["tok_emb.weight"].addmm_(x.T, x)

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
            hooks.append(module.register_forward_hook(watch(name + ".weight")))
    hooks.append(model.final_norm.register_forward_hook(watch_head))
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(batches):
            x, _ = loader.next_batch(sequences)
            model.forward_logits(x)
    for hook in hooks:
        hook.remove()
    for hessian in hessians.values():
        if dist.is_initialized():
            dist.all_reduce(hessian, op=dist.ReduceOp.SUM)
        hessian /= batches
    return {name: hessian.cpu() for name, hessian in hessians.items()}


def gptq_quantize(weight: Tensor, hessian: Tensor, clip_sigmas: float, bits: int, block: int, damp: float):
    """Column by column with error feedback, columns in order of falling curvature; one fp16 scale a row."""
    qmax = 2 ** (bits - 1) - 1
    W = weight.float().clone()
    rows, cols = W.shape
    H = hessian.float().to(W.device).clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    H.diagonal().add_(damp * H.diag().mean())
    perm = torch.argsort(H.diag(), descending=True)
    inverse = torch.argsort(perm)
    W[:, dead] = 0
    W = W[:, perm]
    H = H[perm][:, perm]
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    scale = (clip_sigmas * weight.float().std(dim=1) / qmax).clamp_min(1e-10).to(torch.float16)
    sf = scale.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W.device)
    for i1 in range(0, cols, block):
        i2 = min(i1 + block, cols)
        W1 = W[:, i1:i2].clone()
        E1 = torch.zeros_like(W1)
        inv = Hinv[i1:i2, i1:i2]
        for j in range(i2 - i1):
            w = W1[:, j]
            q = torch.clamp(torch.round(w / sf), -qmax, qmax)
            Q[:, i1 + j] = q.to(torch.int8)
            err = (w - q * sf) / inv[j, j]
            E1[:, j] = err
            W1[:, j:] -= err.unsqueeze(1) * inv[j, j:].unsqueeze(0)
        W[:, i2:] -= E1 @ Hinv[i1:i2, i2:]
    return Q[:, inverse].contiguous().cpu(), scale.cpu()


def quantize_state(h: type[Hyperparameters], state: dict[str, Tensor], hessians: dict[str, Tensor], device):
    packed: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for name, tensor in state.items():
        t = tensor.detach()
        if name not in hessians:
            packed[name] = (t.to(torch.float16) if t.is_floating_point() else t).cpu()
            meta[name] = "passthrough"
            continue
        embedding = name == "tok_emb.weight"
        bits = h.embed_bits if embedding else h.matrix_bits
        sigmas = h.embed_clip_sigmas if embedding else h.matrix_clip_sigmas
        q, s = gptq_quantize(t.to(device), hessians[name], sigmas, bits, h.gptq_block, h.gptq_damp)
        packed[name + ".q"] = q
        packed[name + ".scale"] = s
        meta[name] = f"gptq int{bits}"
    return packed, meta


def dequantize_state(packed: dict[str, Tensor], meta: dict[str, str], like: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, kind in meta.items():
        dtype = like[name].dtype
        if kind == "passthrough":
            out[name] = packed[name].to(dtype)
        else:
            q, s = packed[name + ".q"], packed[name + ".scale"].float()
            out[name] = (q.float() * s.view(-1, 1)).to(dtype)
    return out


def byte_shuffle(raw: bytes, stride: int = 2) -> bytes:
    src = np.frombuffer(raw, dtype=np.uint8)
    return bytes([stride]) + b"".join(src[i::stride].tobytes() for i in range(stride))


def byte_unshuffle(blob: bytes) -> bytes:
    stride, body = blob[0], np.frombuffer(blob, dtype=np.uint8, offset=1)
    out = np.empty(body.size, dtype=np.uint8)
    at = 0
    for i in range(stride):
        count = len(range(i, body.size, stride))
        out[i::stride] = body[at : at + count]
        at += count
    return out.tobytes()


def pack_model(packed: dict[str, Tensor], meta: dict[str, str]) -> bytes:
    buf = io.BytesIO()
    torch.save({"w": packed, "m": meta}, buf)
    return brotli.compress(byte_shuffle(buf.getvalue()), quality=11)


def unpack_model(blob: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    saved = torch.load(io.BytesIO(byte_unshuffle(brotli.decompress(blob))), map_location="cpu")
    return saved["w"], saved["m"]


# -----------------------------
# CAUSAL N-GRAM HINTS
# -----------------------------
#
# One pass over the validation stream, strictly left to right. At position t the keys are made of tokens[:t]; every expert
# looks up its candidate; the candidate with the best hit rate so far becomes the hint of t. Only after hint[t] and
# strength[t] are written is tokens[t] read, to count hits and to feed the tables.

MIX_A = np.uint64(0x9E3779B97F4A7C15)
MIX_B = np.uint64(0xBF58476D1CE4E5B9)
SHIFT = np.uint64(29)
CONF_BINS = 8


@njit(cache=True)
def mix(key, value):
    key = (key ^ (np.uint64(value) + MIX_A)) * MIX_B
    return key ^ (key >> SHIFT)


@njit(cache=True)
def look_up(check, cand, votes, total, slot, tag):
    """The candidate of a slot and its share of the votes; -1 where the slot is empty or another context's."""
    if total[slot] < 2 or check[slot] != tag:
        return -1, 0.0
    return cand[slot], votes[slot] / total[slot]


@njit(cache=True)
def feed(check, cand, votes, total, slot, tag, token):
    """Majority vote of a slot: a challenger takes over once the holder's votes are used up."""
    if check[slot] != tag:
        if total[slot] > 8:
            total[slot] >>= 1
            votes[slot] >>= 1
            return
        check[slot] = tag
        cand[slot] = token
        votes[slot] = 1
        total[slot] = 1
        return
    total[slot] += 1
    if cand[slot] == token:
        votes[slot] += 1
    elif votes[slot] > 1:
        votes[slot] -= 1
    else:
        cand[slot] = token
        votes[slot] = 1
    if total[slot] > 60000:
        total[slot] >>= 1
        votes[slot] >>= 1


@njit(cache=True)
def hint_kernel(
    tokens, start, stop, starts_word, bos_id, orders, betas, min_rate, mask, check, cand, votes, total, ends, seen,
    hits, tries, word, hint, strength,
):  # fmt: skip
    experts = betas.size
    tokenwise = orders.size
    within, wordstart = tokenwise, tokenwise + 1
    slots = np.zeros(experts, dtype=np.int64)
    tags = np.zeros(experts, dtype=np.uint32)
    live = np.zeros(experts, dtype=np.bool_)
    guess = np.zeros(experts, dtype=np.int64)
    bins = np.zeros(experts, dtype=np.int64)
    low = np.uint64(0xFFFFFFFF)
    for t in range(start, stop):
        # word[0]: hash of the word so far, word[1]: of the word before, word[2]: first position of this document.
        first = np.int64(word[2])
        for e in range(experts):
            live[e] = False
            guess[e] = -1
        for e in range(tokenwise):
            if t - first >= orders[e]:
                key = np.uint64(orders[e])
                for j in range(t - orders[e], t):
                    key = mix(key, tokens[j])
                slots[e] = np.int64(key & mask)
                tags[e] = np.uint32((key >> np.uint64(32)) & low)
                live[e] = True
        word_key = mix(mix(np.uint64(77), word[1]), word[0])
        word_slot = np.int64(word_key & mask)
        word_tag = np.uint32((word_key >> np.uint64(32)) & low)
        likely_end = 2 * ends[word_slot] > seen[word_slot]
        for e in (within, wordstart):
            slots[e] = word_slot
            tags[e] = word_tag
            live[e] = t > first

        best, best_rate = -1, min_rate
        for e in range(experts):
            if not live[e]:
                continue
            if (e == within and likely_end) or (e == wordstart and not likely_end):
                continue
            token, share = look_up(check[e], cand[e], votes[e], total[e], slots[e], tags[e])
            if token < 0:
                continue
            guess[e] = token
            bins[e] = min(CONF_BINS - 1, np.int64(share * CONF_BINS))
            rate = (hits[e, bins[e]] + 1.0) / (tries[e, bins[e]] + 3.0)
            if rate > best_rate:
                best, best_rate = e, rate
        if best >= 0:
            hint[t] = guess[best]
            strength[t] = betas[best] * best_rate

        # The hint of t is fixed. From here on the token itself may be read.
        token = np.int64(tokens[t])
        new_word = starts_word[token]
        for e in range(experts):
            if guess[e] >= 0:
                tries[e, bins[e]] += 1
                if guess[e] == token:
                    hits[e, bins[e]] += 1
        for e in range(tokenwise):
            if live[e]:
                feed(check[e], cand[e], votes[e], total[e], slots[e], tags[e], token)
        if t > first:
            seen[word_slot] += 1
            if new_word:
                ends[word_slot] += 1
                feed(check[wordstart], cand[wordstart], votes[wordstart], total[wordstart], word_slot, word_tag, token)
            else:
                feed(check[within], cand[within], votes[within], total[within], word_slot, word_tag, token)
        if token == bos_id:
            word[0], word[1], word[2] = np.uint64(0), np.uint64(0), np.uint64(t)
        elif new_word:
            word[1] = word[0]
            word[0] = mix(np.uint64(11), token)
        else:
            word[0] = mix(word[0], token)


class HintStream:
    """The n-gram state between calls. `advance(stop)` gives the hints of the next positions up to `stop`, each from its prefix."""

    def __init__(self, h: type[Hyperparameters], tokens: np.ndarray, starts_word: np.ndarray, bos_id: int):
        self.tokens = np.ascontiguousarray(tokens.astype(np.int32))
        self.starts_word = starts_word
        self.bos_id = bos_id
        self.orders = np.array(h.hint_orders, dtype=np.int64)
        token_betas = [h.hint_token_beta] * len(h.hint_orders)
        self.betas = np.array(token_betas + [h.hint_within_beta, h.hint_word_beta], dtype=np.float64)
        self.min_rate = h.hint_min_rate
        experts, size = self.betas.size, 1 << h.hint_table_bits
        self.mask = np.uint64(size - 1)
        self.check = np.zeros((experts, size), dtype=np.uint32)
        self.cand = np.zeros((experts, size), dtype=np.int32)
        self.votes = np.zeros((experts, size), dtype=np.int32)
        self.total = np.zeros((experts, size), dtype=np.int32)
        self.ends = np.zeros(size, dtype=np.int32)
        self.seen = np.zeros(size, dtype=np.int32)
        self.hits = np.zeros((experts, CONF_BINS), dtype=np.int64)
        self.tries = np.zeros((experts, CONF_BINS), dtype=np.int64)
        self.word = np.zeros(3, dtype=np.uint64)
        self.hint = np.full(self.tokens.size, -1, dtype=np.int64)
        self.strength = np.zeros(self.tokens.size, dtype=np.float32)
        self.position = 0

    def advance(self, stop: int) -> None:
        hint_kernel(
            self.tokens, self.position, stop, self.starts_word, self.bos_id, self.orders, self.betas, self.min_rate,
            self.mask, self.check, self.cand, self.votes, self.total, self.ends, self.seen, self.hits, self.tries,
            self.word, self.hint, self.strength,
        )  # fmt: skip
        self.position = stop

    def block(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        hint = torch.from_numpy(self.hint[start:stop]).to(device)
        return hint, torch.from_numpy(self.strength[start:stop]).to(device)


def tilted_nll(logits: Tensor, targets: Tensor, hint: Tensor, strength: Tensor) -> Tensor:
    """-ln p'(x) for p'(v) = p(v) exp(beta [v == hint]) / (1 + p(hint) (exp(beta) - 1)); p itself where there is no hint."""
    logp = F.log_softmax(logits.float(), dim=-1)
    nll = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    has_hint = hint >= 0
    p_hint = logp.gather(-1, hint.clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
    log_z = torch.log1p(p_hint * torch.expm1(strength))
    bonus = strength * (hint == targets).to(strength.dtype)
    return torch.where(has_hint, nll - bonus + log_z, nll)


# -----------------------------
# EVALUATION
# -----------------------------


def eval_val(
    h: type[Hyperparameters], model: nn.Module, val_tokens: Tensor, tables: ByteTables, rank: int, world_size: int, device
) -> tuple[float, float]:
    """Whole sequences side by side, for the training log only; the reported figure comes from evaluate_score_first."""
    seq = h.train_seq_len
    count = (val_tokens.numel() - 1) // seq
    mine = range(count * rank // world_size, count * (rank + 1) // world_size)
    per_batch = max(1, h.val_batch_tokens // (world_size * seq))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for s in range(mine.start, mine.stop, per_batch):
            e = min(s + per_batch, mine.stop)
            local = val_tokens[s * seq : e * seq + 1].to(device=device, dtype=torch.int64, non_blocking=True)
            x, y = local[:-1].view(-1, seq), local[1:].view(-1, seq)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                mean = model(x, y).detach()
            sums[0] += mean.double() * y.numel()
            sums[1] += y.numel()
            sums[2] += tables.count(y.reshape(-1), x.reshape(-1)).sum()
    if dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    model.train()
    loss = (sums[0] / sums[1]).item()
    return loss, loss / math.log(2.0) * (sums[1] / sums[2]).item()


class Tally:
    """Sums over the scored tokens of this rank; `totals` adds the ranks up."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll: Tensor, tokens: int, nbytes: Tensor) -> None:
        self.sums[0] += nll.double().sum()
        self.sums[1] += tokens
        self.sums[2] += nbytes.sum()

    def totals(self) -> tuple[float, int, float]:
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        return sums[0].item(), int(sums[1].item()), sums[2].item()


class WindowBatch:
    """Windows that end with the block they score. A block's tokens have up to eval_seq_len - stride tokens of context."""

    def __init__(self, h: type[Hyperparameters], val_tokens: Tensor, blocks: list[tuple[int, int]], device):
        rows, seq = h.eval_batch_windows, h.eval_seq_len
        x = torch.zeros(rows, seq, dtype=torch.int64)
        y = torch.zeros(rows, seq, dtype=torch.int64)
        scored = torch.zeros(rows, seq, dtype=torch.bool)
        for row, (start, stop) in enumerate(blocks):
            low = max(0, stop - seq)
            n = stop - low
            x[row, :n] = val_tokens[low:stop].to(torch.int64)
            y[row, :n] = val_tokens[low + 1 : stop + 1].to(torch.int64)
            scored[row, start - low : n] = True
        self.blocks = blocks
        self.x = x.to(device, non_blocking=True)
        self.y = y.to(device, non_blocking=True)
        self.scored = scored.to(device, non_blocking=True)


def score_chunk(
    h: type[Hyperparameters],
    forward_logits,
    val_tokens: Tensor,
    tables: ByteTables,
    stream: HintStream | None,
    chunk: tuple[int, int],
    tally: Tally,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    """Scores every target of the chunk once, with the weights as they are. The blocks are dealt out to the ranks."""
    blocks = [(b, min(b + h.eval_stride, chunk[1])) for b in range(chunk[0], chunk[1], h.eval_stride)]
    mine = blocks[rank::world_size]
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for i in range(0, len(mine), h.eval_batch_windows):
            batch = WindowBatch(h, val_tokens, mine[i : i + h.eval_batch_windows], device)
            logits = forward_logits(batch.x)[batch.scored].float()
            targets = batch.y[batch.scored]
            previous = batch.x[batch.scored]
            if stream is not None:
                parts = [stream.block(a + 1, b + 1, device) for a, b in batch.blocks]
                hint = torch.cat([p[0] for p in parts])
                strength = torch.cat([p[1] for p in parts])
                nll = tilted_nll(logits, targets, hint, strength)
            else:
                nll = F.cross_entropy(logits, targets, reduction="none")
            tally.add(nll, targets.numel(), tables.count(targets, previous))


def adapt_chunk(
    h: type[Hyperparameters],
    model: GPT,
    opt: torch.optim.Optimizer,
    val_tokens: Tensor,
    chunk: tuple[int, int],
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    """SGD on a chunk that has been scored. Every rank takes part in every step, so the weights stay the same on all of them."""
    seq = h.eval_seq_len
    starts = list(range(chunk[0], chunk[1] - seq + 1, seq))
    params = [p for group in opt.param_groups for p in group["params"]]
    model.train()
    for _ in range(h.ttt_epochs):
        for s in range(0, len(starts), h.ttt_batch_seqs):
            step_starts = starts[s : s + h.ttt_batch_seqs]
            mine = step_starts[rank::world_size]
            opt.zero_grad(set_to_none=True)
            if mine:
                rows = torch.stack([val_tokens[a : a + seq + 1] for a in mine]).to(device=device, dtype=torch.int64)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(rows[:, :-1], rows[:, 1:]) * (len(mine) / len(step_starts))
                loss.backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if dist.is_initialized():
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            opt.step()
    model.eval()


def evaluate_score_first(
    h: type[Hyperparameters],
    model: GPT,
    val_tokens: Tensor,
    tables: ByteTables,
    rank: int,
    world_size: int,
    device: torch.device,
) -> tuple[float, float]:
    """The reported figure. Chunk by chunk: hints from the prefix, scoring, and only then SGD on the chunk just scored."""
    total = val_tokens.numel() - 1
    chunks = [(c, min(c + h.ttt_chunk_tokens, total)) for c in range(0, total, h.ttt_chunk_tokens)]
    stream = None
    if h.hint_enabled:
        stream = HintStream(h, val_tokens.numpy(), tables.starts_word, model.bos_id)
    params = list(model.parameters())
    opt = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    forward_logits = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    tally = Tally(device)
    started = time.perf_counter()
    model.eval()
    for index, chunk in enumerate(chunks):
        if stream is not None:
            stream.advance(chunk[1] + 1)
        score_chunk(h, forward_logits, val_tokens, tables, stream, chunk, tally, rank, world_size, device)
        if h.ttt_enabled and index < len(chunks) - 1:
            for group in opt.param_groups:
                group["lr"] = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * index / max(1, len(chunks) - 1)))
            adapt_chunk(h, model, opt, val_tokens, chunk, rank, world_size, device)
        if index % 50 == 0 or index == len(chunks) - 1:
            loss_sum, count, byte_sum = tally.totals()
            log0(
                f"  chunk {index + 1}/{len(chunks)} tokens:{count} running_bpb:{loss_sum / math.log(2.0) / byte_sum:.6f} "
                f"time:{time.perf_counter() - started:.1f}s"
            )
    loss_sum, count, byte_sum = tally.totals()
    if count != total:
        raise RuntimeError(f"scored {count} tokens of {total}")
    if stream is not None:
        used = int((stream.hint >= 0).sum())
        log0(f"hints:{used} of {total} hit_rate:{stream.hits.sum() / max(1, stream.tries.sum()):.4f}")
    return loss_sum / count, loss_sum / math.log(2.0) / byte_sum


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(h: type[Hyperparameters], model: GPT) -> list[torch.optim.Optimizer]:
    named = list(model.blocks.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and not any(c in n for c in CONTROL_PATTERNS)]
    scalars = [p for n, p in named if p.ndim < 2 or any(c in n for c in CONTROL_PATTERNS)]
    scalars += [model.skip_weights, model.skip_gates]
    if model.smear is not None:
        scalars.append(model.smear.smear_gate)
    adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
    optimizers = [
        torch.optim.AdamW(
            [{"params": [model.tok_emb.weight], "lr": h.embed_lr}], weight_decay=h.embed_wd, **adam
        ),
        Muon(matrices, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, weight_decay=h.muon_wd),
        torch.optim.AdamW([{"params": scalars, "lr": h.scalar_lr}], weight_decay=0.02, **adam),
    ]
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def lr_scale(h: type[Hyperparameters], frac: float) -> float:
    if frac < 1.0 - h.warmdown_frac:
        return 1.0
    return max(0.0, (1.0 - frac) / h.warmdown_frac)


class Ema:
    """Running average of the weights, kept in fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for n, t in model.state_dict().items():
            self.average[n].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def load_into(self, model: nn.Module) -> None:
        state = {n: self.average[n].to(t.dtype) for n, t in model.state_dict().items()}
        model.load_state_dict(state, strict=True)


def shared_elapsed_ms(ms: float, device: torch.device) -> float:
    """The slowest rank's clock, so that all ranks take the same decisions."""
    if not dist.is_initialized():
        return ms
    value = torch.tensor(ms, dtype=torch.float64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def train(h, base_model: GPT, val_tokens: Tensor, tables: ByteTables, rank: int, world_size: int, device, local_rank: int):
    """Trains until the cap less the reserve, averages, and quantises within the reserve. Returns the packed tensors."""
    grad_accum = 8 // world_size
    per_rank = h.train_batch_tokens // (world_size * grad_accum * h.train_seq_len)
    loader = ShuffledShardLoader(h.train_files, h.train_seq_len, rank, world_size, device, h.seed)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = compiled
    if dist.is_initialized():
        model = DDP(compiled, device_ids=[local_rank], broadcast_buffers=False)
    optimizers = build_optimizers(h, base_model)

    def forward_backward() -> float:
        total = torch.zeros((), device=device)
        for micro in range(grad_accum):
            if isinstance(model, DDP):
                model.require_backward_grad_sync = micro == grad_accum - 1
            x, y = loader.next_batch(per_rank)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            total += loss.detach() / grad_accum
            (loss / grad_accum).backward()
        return total

    def zero_grads() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # Compile both depths before the clock starts, then put everything back.
    if h.warmup_steps > 0:
        before = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
        before_opt = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        base_model.train()
        for looping in (False, True):
            base_model.looping_active = looping
            for step in range(h.warmup_steps):
                zero_grads()
                forward_backward()
                for opt in optimizers:
                    opt.step()
            log0(f"warmup looping:{looping} steps:{h.warmup_steps}")
        base_model.looping_active = False
        base_model.load_state_dict(before, strict=True)
        for opt, state in zip(optimizers, before_opt, strict=True):
            opt.load_state_dict(state)
        zero_grads()
        loader = ShuffledShardLoader(h.train_files, h.train_seq_len, rank, world_size, device, h.seed)

    ema = Ema(base_model, h.ema_decay)
    budget_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
    training_time_ms = 0.0
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        elapsed_ms = shared_elapsed_ms(training_time_ms + 1000.0 * (time.perf_counter() - t0), device)
        frac = min(1.0, max(step / h.iterations, elapsed_ms / budget_ms))
        last = step >= h.iterations or elapsed_ms >= budget_ms
        if not last and h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, model, val_tokens, tables, rank, world_size, device)
            log0(f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last:
            break
        if not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log0(f"step:{step} depth recurrence on at frac {frac:.3f}")
        zero_grads()
        train_loss = forward_backward()
        warm = min(1.0, step / max(1, h.muon_momentum_warmup_steps))
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale(h, frac)
                if isinstance(opt, Muon):
                    group["momentum"] = (1 - warm) * h.muon_momentum_warmup_start + warm * h.muon_momentum
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        ema.update(base_model)
        step += 1
        if step <= 5 or step % h.train_log_every == 0:
            ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
            log0(f"step:{step}/{h.iterations} train_loss:{train_loss.item():.4f} train_time:{ms:.0f}ms")

    torch.cuda.synchronize()
    loop_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
    log0(f"stopping: step:{step} train_time:{loop_ms:.0f}ms peak:{torch.cuda.max_memory_allocated() // 2**20}MiB")
    ema.load_into(base_model)
    base_model.looping_active = True
    hessians = collect_hessians(base_model, loader, h.gptq_batches, max(1, per_rank // 4), device)
    packed, meta = quantize_state(h, base_model.state_dict(), hessians, device)
    torch.cuda.synchronize()
    total_ms = shared_elapsed_ms(training_time_ms + 1000.0 * (time.perf_counter() - t0), device)
    log0(f"train+gptq time:{total_ms:.0f}ms of {1000 * h.max_wallclock_seconds:.0f}ms")
    if total_ms > 1000.0 * h.max_wallclock_seconds:
        raise RuntimeError("training and calibration took longer than the cap; raise GPTQ_RESERVE_SECONDS")
    return packed, meta


def write_artifact(h: type[Hyperparameters], packed: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Compresses, writes and sizes the submission. The code that counts is the file that is run, wrapped or not."""
    blob = pack_model(packed, meta)
    code = Path(__file__).read_bytes()
    with open(h.quantized_model_path, "wb") as f:
        f.write(blob)
    size = len(code) + len(blob)
    log0(f"Code size: {len(code)} bytes (would be {len(lzma.compress(code, preset=9))} as lzma)")
    log0(f"Serialized model int{h.matrix_bits}+brotli: {len(blob)} bytes")
    log0(f"Total submission size: {size} bytes")
    if size > h.size_limit:
        raise RuntimeError(f"{size} bytes are more than {h.size_limit}")


# -----------------------------
# MAIN
# -----------------------------


def main() -> None:
    global _log_handle
    h = Hyperparameters
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if rank == 0:
        os.makedirs("logs", exist_ok=True)
        _log_handle = open(h.logfile, "a", encoding="utf-8")
    log0(Path(__file__).read_text(encoding="utf-8"), console=False)
    log0(f"Python {sys.version.split()[0]} PyTorch {torch.__version__} world_size:{world_size} seed:{h.seed}")

    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)

    sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
    if int(sp.vocab_size()) != h.vocab_size:
        raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {int(sp.vocab_size())} pieces")
    tables = ByteTables(sp, h.vocab_size, device)
    val_tokens = load_validation_tokens(h.val_files)
    log0(f"val_tokens:{val_tokens.numel() - 1} from {h.val_files}")

    base_model = GPT(h, int(sp.bos_id())).to(device)
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    packed, meta = train(h, base_model, val_tokens, tables, rank, world_size, device, local_rank)
    if rank == 0:
        torch.save(base_model.state_dict(), h.model_path)
        write_artifact(h, packed, meta)
    if distributed:
        dist.barrier()

    # Evaluation: everything below starts from the file.
    eval_start = time.perf_counter()
    del packed, meta
    torch._dynamo.reset()
    blob = Path(h.quantized_model_path).read_bytes()
    saved, saved_meta = unpack_model(blob)
    eval_model = GPT(h, int(sp.bos_id())).to(device)
    state = dequantize_state(saved, saved_meta, eval_model.state_dict())
    eval_model.load_state_dict(state, strict=True)
    eval_model.looping_active = True
    val_loss, val_bpb = eval_val(h, eval_model, val_tokens, tables, rank, world_size, device)
    log0(f"final_int6_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")

    val_loss, val_bpb = evaluate_score_first(h, eval_model, val_tokens, tables, rank, world_size, device)
    eval_seconds = shared_elapsed_ms(1000.0 * (time.perf_counter() - eval_start), device) / 1000.0
    log0(f"final_ttt_hint val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{eval_seconds:.1f}s")
    if eval_seconds > 600.0:
        log0("evaluation took longer than 600 s: not a valid run")
    log0(f"final_ttt_hint_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
