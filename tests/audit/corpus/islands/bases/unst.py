"""
My first Parameter Golf entry!  It is the naive baseline with a handful of modest changes:

  * 10 layers instead of 9 and a 3x MLP, because int4 weights leave room for it
  * quantisation-aware training: fake int8 first, fake int4 rows near the end of the run
  * a cosine warmdown instead of a linear one, and an EMA of the weights
  * the (tied) embedding is kept in FP16, everything else becomes int4/int8 rows, then zlib
  * a sliding window eval and, last of all, a very simple test-time training loop

I tried to keep everything in one file and to print a lot, so the log tells you what happened.
"""

from __future__ import annotations

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
import zlib
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# ---------------------------------------------------------------------------------------------
# KNOBS
# ---------------------------------------------------------------------------------------------
# Everything can be changed from the environment. The defaults are what I submit.


class Knobs:
    # where things are
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int4.ptz")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # how long and how big
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 14.0))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 2000))

    # the model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 10))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    embed_init_std = float(os.environ.get("EMBED_INIT_STD", 0.005))

    # optimisers
    embed_lr = float(os.environ.get("EMBED_LR", 0.05))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.035))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.035))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.95))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.85))
    muon_momentum_steps = int(os.environ.get("MUON_MOMENTUM_STEPS", 500))
    muon_ns_steps = int(os.environ.get("MUON_NS_STEPS", 5))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip = float(os.environ.get("GRAD_CLIP", 0.3))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.4))
    warmdown_floor = float(os.environ.get("WARMDOWN_FLOOR", 0.02))

    # EMA and QAT
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    ema_start_frac = float(os.environ.get("EMA_START_FRAC", 0.6))
    qat_int8_frac = float(os.environ.get("QAT_INT8_FRAC", 0.45))
    qat_int4_frac = float(os.environ.get("QAT_INT4_FRAC", 0.7))
    int8_edge_blocks = int(os.environ.get("INT8_EDGE_BLOCKS", 1))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 8))

    # evaluation
    val_batch_seqs = int(os.environ.get("VAL_BATCH_SEQS", 64))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 128))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 600.0))

    # test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 16))
    ttt_lr = float(os.environ.get("TTT_LR", 1.5e-4))
    ttt_last_blocks = int(os.environ.get("TTT_LAST_BLOCKS", 3))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))


SIZE_LIMIT = 16_000_000  # decimal megabytes, code and weights together
IGNORE = -100  # target of padded positions

# ---------------------------------------------------------------------------------------------
# PRINTING
# ---------------------------------------------------------------------------------------------
# Only rank 0 talks. Everything also goes to logs/<run_id>.txt so that I can read it later.


class Talker:
    def __init__(self) -> None:
        self.enabled = False
        self.path: str | None = None

    def open(self, run_id: str, master: bool) -> None:
        self.enabled = master
        if master:
            os.makedirs("logs", exist_ok=True)
            self.path = f"logs/{run_id}.txt"
            print(f"log file is {self.path}")

    def __call__(self, message: str, console: bool = True) -> None:
        if not self.enabled:
            return
        if console:
            print(message, flush=True)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as f:
                print(message, file=f)


say = Talker()

# ---------------------------------------------------------------------------------------------
# LITTLE DISTRIBUTED HELPERS
# ---------------------------------------------------------------------------------------------
# I kept forgetting the "is it initialised?" check, so here it is once and for all.


class Team:
    """Who am I, and how many of us are there?"""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.device = torch.device("cuda", self.local_rank)

    @property
    def master(self) -> bool:
        return self.rank == 0

    def start(self) -> None:
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    def stop(self) -> None:
        if self.distributed:
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def add_up(self, tensor: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def slowest(self, value: float) -> float:
        """The largest of all ranks' values. I use it for clocks, so that we all agree on the time."""
        if not self.distributed:
            return value
        box = torch.tensor([value], device=self.device, dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return float(box.item())


def now_ms() -> float:
    torch.cuda.synchronize()
    return 1000.0 * time.perf_counter()


# ---------------------------------------------------------------------------------------------
# MUON
# ---------------------------------------------------------------------------------------------
# Straight from the baseline (which has it from modded-nanogpt). I did not touch the maths.


def newton_schulz(grad: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = grad.bfloat16()
    x = x / (x.norm() + eps)
    tall = grad.size(0) > grad.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        poly = b * gram + c * gram @ gram
        x = a * x + poly @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalise. Each rank does its share of the matrices, the updates are summed."""

    def __init__(self, params, lr: float, momentum: float, ns_steps: int, team: Team) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps))
        self.team = team

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            total = sum(int(p.numel()) for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cursor = 0
            for i, p in enumerate(params):
                if i % self.team.world == self.team.rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(g)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(g)
                    g = g.add(buf, alpha=group["momentum"])
                    g = newton_schulz(g, steps=group["ns_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()
            self.team.add_up(flat)
            cursor = 0
            for p in params:
                g = flat[cursor : cursor + p.numel()].view_as(p).to(dtype=p.dtype)
                p.add_(g, alpha=-group["lr"])
                cursor += p.numel()


# ---------------------------------------------------------------------------------------------
# DATA SHARDS
# ---------------------------------------------------------------------------------------------
# A shard is 256 int32 of header (magic, version, number of tokens, ...) and then uint16 tokens.

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"this does not look like a shard: {file}")
    count = int(header[2])
    expected = HEADER_INTS * 4 + count * 2
    if file.stat().st_size != expected:
        raise ValueError(f"shard {file} has {file.stat().st_size} bytes, expected {expected}")
    tokens = np.fromfile(file, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[Path]:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no files match {pattern}")
    return files


def load_val_tokens(pattern: str) -> Tensor:
    """The whole validation split. The baseline drops the ragged end, I keep it (see make_rows)."""
    return torch.cat([read_shard(file) for file in list_shards(pattern)]).contiguous()


class ShardStream:
    """Reads the train shards one after another, forever."""

    def __init__(self, pattern: str) -> None:
        self.files = list_shards(pattern)
        self.which = 0
        self.tokens = read_shard(self.files[0])
        self.pos = 0

    def _next_file(self) -> None:
        self.which = (self.which + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.which])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self._next_file()
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Every rank reads the same stream and keeps its own slice of each global batch."""

    def __init__(self, pattern: str, team: Team) -> None:
        self.stream = ShardStream(pattern)
        self.team = team

    def next_batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.team.world * accum)
        span = local + 1
        chunk = self.stream.take(span * self.team.world)
        mine = chunk[self.team.rank * span : (self.team.rank + 1) * span].to(dtype=torch.int64)
        x = mine[:-1].reshape(-1, seq_len)
        y = mine[1:].reshape(-1, seq_len)
        return x.to(self.team.device, non_blocking=True), y.to(self.team.device, non_blocking=True)


# ---------------------------------------------------------------------------------------------
# BYTES
# ---------------------------------------------------------------------------------------------
# val_bpb needs to know how many bytes each token stands for. sentencepiece writes a leading space
# as the mark U+2581. That space is one byte of the text, except right after a control token
# (there the detokeniser drops it). Byte fallback tokens are one byte each.

MARK = "\u2581"


class ByteTables:
    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> None:
        size = max(int(sp.vocab_size()), vocab_size)
        own = np.zeros(size, dtype=np.int16)
        space = np.zeros(size, dtype=np.bool_)
        edge = np.ones(size, dtype=np.bool_)
        for token in range(int(sp.vocab_size())):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            edge[token] = False
            if sp.is_byte(token):
                own[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith(MARK):
                space[token] = True
                piece = piece[len(MARK) :]
            own[token] = len(piece.replace(MARK, " ").encode("utf-8"))
        self.own = torch.tensor(own, dtype=torch.int16, device=device)
        self.space = torch.tensor(space, dtype=torch.bool, device=device)
        self.edge = torch.tensor(edge, dtype=torch.bool, device=device)

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target token, given the token before it."""
        n = self.own[target].to(torch.int16)
        n = n + (self.space[target] & ~self.edge[previous]).to(torch.int16)
        return n.to(torch.float64)


class Tally:
    """Adds up losses, tokens and bytes, and says what they mean."""

    def __init__(self, tables: ByteTables, device: torch.device) -> None:
        self.tables = tables
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)  # loss, tokens, bytes

    def add(self, nll: Tensor, x: Tensor, y: Tensor, keep: Tensor) -> None:
        """nll, x, y, keep: all of one shape. keep: which positions count."""
        self.sums[0] += nll[keep].to(torch.float64).sum()
        self.sums[1] += keep.sum()
        self.sums[2] += self.tables.count(x[keep], y[keep]).sum()

    def finish(self, team: Team) -> tuple[float, float, int]:
        """Mean loss in nats, bits per byte, number of tokens, over all ranks."""
        total = self.sums.clone()
        team.add_up(total)
        loss_sum, tokens, nbytes = (float(v) for v in total.tolist())
        val_loss = loss_sum / tokens
        val_bpb = loss_sum / math.log(2.0) / nbytes
        return val_loss, val_bpb, int(tokens)


# ---------------------------------------------------------------------------------------------
# FAKE QUANTISATION
# ---------------------------------------------------------------------------------------------
# One scale per row, symmetric. int8 uses -127..127, int4 uses -7..7. In training we only pretend
# (straight-through estimator): forward sees the rounded weight, backward goes to the real one.


def top_level(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def fake_quant_rows(w: Tensor, bits: int) -> Tensor:
    level = top_level(bits)
    scale = w.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / level
    if bits <= 4:
        # a little clipping helps a lot at 4 bits, the export looks for the best clip later
        scale = scale * 0.85
    rounded = torch.clamp(torch.round(w / scale), -level, level) * scale
    return w + (rounded - w).detach()


class QuantLinear(nn.Linear):
    """A Linear that keeps fp32 weights, computes in the input's dtype and can fake-quantise itself."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.final_bits = 4
        self.qat_bits = 0

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.qat_bits > 0 and self.training:
            w = fake_quant_rows(w, self.qat_bits)
        return F.linear(x, w.to(x.dtype))


def set_qat_stage(model: nn.Module, stage: int) -> None:
    """stage 0: off; 8: everybody int8; 4: everybody at the width of the export."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.qat_bits = 0 if stage == 0 else (8 if stage == 8 else module.final_bits)


# ---------------------------------------------------------------------------------------------
# THE MODEL
# ---------------------------------------------------------------------------------------------


class GainNorm(nn.Module):
    """RMSNorm with a learned gain. The gains are tiny and the TTT loop likes to tune them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),)) * self.gain.to(x.dtype)


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(length, device=device, dtype=torch.float32)
        angles = torch.outer(t, self.inv_freq.to(device))
        return angles.cos()[None, None].to(dtype), angles.sin()[None, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped keys and values, RoPE, and normalised queries and keys."""

    def __init__(self, dim: int, heads: int, kv_heads: int, rope_base: float, gain: float) -> None:
        super().__init__()
        if dim % heads or heads % kv_heads:
            raise ValueError("heads do not fit")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.to_q = QuantLinear(dim, dim)
        self.to_k = QuantLinear(dim, kv_heads * self.head_dim)
        self.to_v = QuantLinear(dim, kv_heads * self.head_dim)
        self.to_out = QuantLinear(dim, dim)
        nn.init.zeros_(self.to_out.weight)
        self.q_gain = nn.Parameter(torch.full((heads,), gain, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.to_q(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.to_k(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.to_v(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(t, x.device, q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.to_out(out.transpose(1, 2).reshape(b, t, d))


class ReluSquaredMLP(nn.Module):
    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        self.up = QuantLinear(dim, mult * dim)
        self.down = QuantLinear(mult * dim, dim)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, k: type[Knobs]) -> None:
        super().__init__()
        self.attn_norm = GainNorm(k.model_dim)
        self.mlp_norm = GainNorm(k.model_dim)
        self.attn = Attention(k.model_dim, k.num_heads, k.num_kv_heads, k.rope_base, k.qk_gain_init)
        self.mlp = ReluSquaredMLP(k.model_dim, k.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(k.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(k.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(k.model_dim), torch.zeros(k.model_dim))).float())

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.attn_norm(x))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x))


class TinyGPT(nn.Module):
    """U-net-ish GPT of the baseline: the second half of the layers sees the first half's outputs."""

    def __init__(self, k: type[Knobs]) -> None:
        super().__init__()
        self.softcap = k.logit_softcap
        self.wte = nn.Embedding(k.vocab_size, k.model_dim)
        nn.init.normal_(self.wte.weight, mean=0.0, std=k.embed_init_std)
        self.encoders = k.num_layers // 2
        self.decoders = k.num_layers - self.encoders
        self.skips = min(self.encoders, self.decoders)
        self.skip_weights = nn.Parameter(torch.ones(self.skips, k.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(k) for _ in range(k.num_layers)])
        self.final_norm = GainNorm(k.model_dim)
        # the first and the last block(s) suffer most from 4 bits, so they get 8
        for i, block in enumerate(self.blocks):
            edge = i < k.int8_edge_blocks or i >= k.num_layers - k.int8_edge_blocks
            for module in block.modules():
                if isinstance(module, QuantLinear):
                    module.final_bits = 8 if edge else 4

    def hidden(self, x: Tensor) -> Tensor:
        h = self.wte(x)
        h = F.rms_norm(h, (h.size(-1),))
        h0 = h
        stack: list[Tensor] = []
        for i in range(self.encoders):
            h = self.blocks[i](h, h0)
            stack.append(h)
        for i in range(self.decoders):
            if stack:
                h = h + self.skip_weights[i].to(h.dtype) * stack.pop()
            h = self.blocks[self.encoders + i](h, h0)
        return self.final_norm(h)

    def head(self, h: Tensor) -> Tensor:
        """Tied: the embedding is the output matrix as well."""
        raw = F.linear(h, self.wte.weight.to(h.dtype))
        return self.softcap * torch.tanh(raw / self.softcap)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.logits(x)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), ignore_index=IGNORE)


def token_nll(logits: Tensor, y: Tensor) -> Tensor:
    """Loss of every position in nats, shaped like y. Padded positions come out as zero."""
    flat = F.cross_entropy(
        logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), ignore_index=IGNORE, reduction="none"
    )
    return flat.view_as(y)


def small_params_to_fp32(model: nn.Module) -> None:
    """Gains, scales and matrices stay in fp32. Only the embedding lookup is happy with bf16 activations."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dtype != torch.float32:
                p.data = p.data.float()


# ---------------------------------------------------------------------------------------------
# EMA
# ---------------------------------------------------------------------------------------------


class WeightEMA:
    """Exponential average of all parameters, in fp32. It starts late, when the lr starts to fall."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.started = False
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        if not self.started:
            for name, p in model.named_parameters():
                self.shadow[name].copy_(p)
            self.started = True
            return
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_into(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])


# ---------------------------------------------------------------------------------------------
# CALIBRATION
# ---------------------------------------------------------------------------------------------
# Not GPTQ, I did not dare. For each Linear I measure how strong each input channel is (mean square)
# on a few TRAIN batches. The export then picks, for each row, the clip with the least weighted error.


class ChannelMeter:
    def __init__(self, model: nn.Module) -> None:
        self.power: dict[str, Tensor] = {}
        self.rows: dict[str, float] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                self.power[name] = torch.zeros(module.in_features, device=module.weight.device, dtype=torch.float64)
                self.rows[name] = 0.0
                self.handles.append(module.register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str):
        def listen(module: nn.Module, args) -> None:
            x = args[0].detach().reshape(-1, args[0].size(-1)).float()
            self.power[name] += x.square().sum(dim=0).to(torch.float64)
            self.rows[name] += float(x.size(0))

        return listen

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def means(self, team: Team) -> dict[str, Tensor]:
        out = {}
        for name, power in self.power.items():
            team.add_up(power)
            out[name] = (power / max(self.rows[name] * team.world, 1.0)).float()
        return out


@torch.no_grad()
def measure_channels(model: TinyGPT, loader: TrainLoader, k: type[Knobs], team: Team, accum: int) -> dict[str, Tensor]:
    meter = ChannelMeter(model)
    model.eval()
    for i in range(k.calib_batches):
        x, _ = loader.next_batch(k.train_batch_tokens, k.train_seq_len, accum)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.hidden(x)
        say(f"calibration: batch {i + 1}/{k.calib_batches} done", console=False)
    meter.close()
    model.train()
    return meter.means(team)


# ---------------------------------------------------------------------------------------------
# EXPORT: int8/int4 rows, FP16 embedding, zlib
# ---------------------------------------------------------------------------------------------

CLIP_GRID = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)


@torch.no_grad()
def quantise_rows(w: Tensor, bits: int, power: Tensor) -> tuple[Tensor, Tensor]:
    """The integers (int8 tensor) and the scale of each row."""
    level = top_level(bits)
    w = w.float()
    peak = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    weight = power.to(w.device).clamp_min(1e-12)[None, :]
    best_error = torch.full((w.size(0),), float("inf"), device=w.device)
    best_scale = torch.zeros(w.size(0), 1, device=w.device)
    for clip in CLIP_GRID:
        # round through fp16 here as well, because that is what gets stored
        scale = (clip * peak / level).half().float().clamp_min(1e-7)
        q = torch.clamp(torch.round(w / scale), -level, level)
        error = ((q * scale - w).square() * weight).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better[:, None], scale, best_scale)
    q = torch.clamp(torch.round(w / best_scale), -level, level).to(torch.int8)
    return q.cpu(), best_scale.squeeze(1).half().cpu()


def pack_nibbles(q: Tensor) -> Tensor:
    """Two int4 values per byte. The number of columns is even in all my matrices."""
    u = (q.to(torch.int16) + 8).to(torch.uint8)
    return (u[:, 0::2] | (u[:, 1::2] << 4)).contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    low = (packed & 15).to(torch.int16) - 8
    high = (packed >> 4).to(torch.int16) - 8
    return torch.stack((low, high), dim=2).reshape(packed.size(0), -1).to(torch.int8)


def build_payload(model: TinyGPT, powers: dict[str, Tensor]) -> dict[str, dict]:
    bits_of = {f"{n}.weight": m.final_bits for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    payload: dict[str, dict] = {"rows8": {}, "rows4": {}, "scales": {}, "half": {}, "plain": {}}
    for name, p in model.named_parameters():
        if name in bits_of:
            q, scale = quantise_rows(p.data, bits_of[name], powers[name.removesuffix(".weight")])
            if bits_of[name] == 4:
                payload["rows4"][name] = pack_nibbles(q)
            else:
                payload["rows8"][name] = q
            payload["scales"][name] = scale
        elif p.ndim == 2 and p.numel() > 65_536:
            # this is the embedding. FP16 passthrough, it is the head as well and hates being rounded
            payload["half"][name] = p.data.half().cpu()
        else:
            payload["plain"][name] = p.data.float().cpu()
    return payload


def restore_payload(payload: dict[str, dict]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, packed in payload["rows4"].items():
        state[name] = unpack_nibbles(packed).float() * payload["scales"][name].float()[:, None]
    for name, q in payload["rows8"].items():
        state[name] = q.float() * payload["scales"][name].float()[:, None]
    for name, t in payload["half"].items():
        state[name] = t.float()
    for name, t in payload["plain"].items():
        state[name] = t.clone()
    return state


def write_artifact(payload: dict[str, dict], path: str) -> int:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    raw = buffer.getvalue()
    packed = zlib.compress(raw, level=9)
    Path(path).write_bytes(packed)
    say(f"artifact: {len(raw)} bytes raw, {len(packed)} bytes after zlib, written to {path}")
    return len(packed)


def read_artifact(path: str) -> dict[str, dict]:
    raw = zlib.decompress(Path(path).read_bytes())
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def report_sizes(artifact_path: str) -> int:
    code_bytes = len(Path(__file__).read_bytes())
    model_bytes = Path(artifact_path).stat().st_size
    total = code_bytes + model_bytes
    say(f"Code size: {code_bytes} bytes")
    say(f"Serialized model int4+zlib: {model_bytes} bytes")
    say(f"Total submission size: {total} bytes (limit {SIZE_LIMIT})")
    if total > SIZE_LIMIT:
        raise SystemExit(f"too big: {total} > {SIZE_LIMIT}")
    return total


# ---------------------------------------------------------------------------------------------
# VALIDATION: rows, windows and the two plain evals
# ---------------------------------------------------------------------------------------------
# Position i of the stream means: input token i, target token i + 1. There are numel() - 1 positions
# and I score all of them. Each rank has one contiguous part, cut at multiples of `unit`.


def my_share(total: int, unit: int, team: Team) -> tuple[int, int]:
    units = (total + unit - 1) // unit
    first = units * team.rank // team.world * unit
    last = min(units * (team.rank + 1) // team.world * unit, total)
    return first, last


def row_batches(tokens: Tensor, first: int, last: int, seq_len: int, rows: int, device: torch.device):
    """Batches of non-overlapping sequences, in order. The last sequence of the stream is padded."""
    for at in range(first, last, seq_len * rows):
        end = min(at + seq_len * rows, last)
        n = (end - at + seq_len - 1) // seq_len
        x = torch.zeros(n * seq_len, dtype=torch.int64)
        y = torch.full((n * seq_len,), IGNORE, dtype=torch.int64)
        x[: end - at] = tokens[at:end].to(torch.int64)
        y[: end - at] = tokens[at + 1 : end + 1].to(torch.int64)
        yield x.view(n, seq_len).to(device), y.view(n, seq_len).to(device)


def window_batches(tokens: Tensor, first: int, last: int, seq_len: int, stride: int, rows: int, device: torch.device):
    """Sliding windows. Each one scores its `stride` newest positions and sees up to seq_len in all.

    At the start of the stream there is less to see, so the windows there are padded on the right
    (the model is causal, it cannot look at the padding). Targets that are not scored are IGNOREd.
    """
    begins = list(range(first, last, stride))
    for b in range(0, len(begins), rows):
        group = begins[b : b + rows]
        x = torch.zeros(len(group), seq_len, dtype=torch.int64)
        y = torch.full((len(group), seq_len), IGNORE, dtype=torch.int64)
        for j, begin in enumerate(group):
            end = min(begin + stride, last)
            start = max(0, end - seq_len)
            x[j, : end - start] = tokens[start:end].to(torch.int64)
            y[j, begin - start : end - start] = tokens[begin + 1 : end + 1].to(torch.int64)
        yield x.to(device), y.to(device)


@torch.no_grad()
def eval_val(k: type[Knobs], team: Team, model: TinyGPT, val_tokens: Tensor, tables: ByteTables) -> tuple[float, float]:
    """The plain one: non-overlapping sequences."""
    was_training = model.training
    model.eval()
    tally = Tally(tables, team.device)
    first, last = my_share(val_tokens.numel() - 1, k.train_seq_len, team)
    for x, y in row_batches(val_tokens, first, last, k.train_seq_len, k.val_batch_seqs, team.device):
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            nll = token_nll(model.logits(x), y)
        tally.add(nll, x, y, y != IGNORE)
    model.train(was_training)
    val_loss, val_bpb, _ = tally.finish(team)
    return val_loss, val_bpb


@torch.no_grad()
def eval_val_sliding(
    k: type[Knobs], team: Team, model: TinyGPT, val_tokens: Tensor, tables: ByteTables
) -> tuple[float, float, int]:
    """The generous one: every token is scored once, with nearly a full window of context."""
    model.eval()
    run_logits = torch.compile(model.logits, dynamic=False)
    tally = Tally(tables, team.device)
    first, last = my_share(val_tokens.numel() - 1, k.eval_stride, team)
    t0 = time.perf_counter()
    done = 0
    for x, y in window_batches(
        val_tokens, first, last, k.train_seq_len, k.eval_stride, k.val_batch_seqs, team.device
    ):
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            nll = token_nll(run_logits(x), y)
        tally.add(nll, x, y, y != IGNORE)
        done += 1
        if done % 500 == 0:
            say(f"sliding: {done} batches of windows, {time.perf_counter() - t0:.1f}s", console=False)
    return tally.finish(team)


# ---------------------------------------------------------------------------------------------
# TEST-TIME TRAINING
# ---------------------------------------------------------------------------------------------
# The simplest loop I could think of. Go through my part of the validation stream in order. For each
# batch of sequences: first score it, then do ONE AdamW step on it. Whatever the model learns can
# only help the batches that come later. The ranks do not talk to each other until the very end.


def ttt_parameters(model: TinyGPT, last_blocks: int) -> list[nn.Parameter]:
    """The last few blocks and every norm gain. The embedding and the early matrices stay frozen."""
    late = {id(p) for block in model.blocks[len(model.blocks) - last_blocks :] for p in block.parameters()}
    chosen = []
    for name, p in model.named_parameters():
        wanted = id(p) in late or name.endswith("norm.gain")
        p.requires_grad_(wanted)
        if wanted:
            chosen.append(p)
    return chosen


def make_ttt_optimizer(params: list[nn.Parameter], k: type[Knobs]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=k.ttt_lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)


def ttt_score(model: TinyGPT, x: Tensor, y: Tensor) -> Tensor:
    """Losses of one batch, no gradients."""
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        logits = model.logits(x)
        return token_nll(logits, y)


def ttt_step(model: TinyGPT, opt: torch.optim.Optimizer, params, x: Tensor, y: Tensor, clip: float) -> float:
    """One step of AdamW on one batch."""
    opt.zero_grad(set_to_none=True)
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, clip)
    opt.step()
    return float(loss.detach())


def ttt_eval(
    k: type[Knobs], team: Team, model: TinyGPT, val_tokens: Tensor, tables: ByteTables
) -> tuple[float, float, int]:
    """Score a batch, learn from it, go on. Returns loss, bpb and the number of tokens scored."""
    params = ttt_parameters(model, k.ttt_last_blocks)
    opt = make_ttt_optimizer(params, k)
    say(f"ttt_eval: {sum(p.numel() for p in params)} trainable parameters, lr {k.ttt_lr}")
    model.eval()
    tally = Tally(tables, team.device)
    first, last = my_share(val_tokens.numel() - 1, k.train_seq_len, team)
    t0 = time.perf_counter()
    for i, (x, y) in enumerate(
        row_batches(val_tokens, first, last, k.train_seq_len, k.ttt_batch_seqs, team.device)
    ):
        # 1. score, with the model as the earlier batches left it
        nll = ttt_score(model, x, y)
        tally.add(nll, x, y, y != IGNORE)
        # 2. learn
        step_loss = ttt_step(model, opt, params, x, y, k.ttt_grad_clip)
        if i % 50 == 0:
            so_far = tally.sums.tolist()
            running = so_far[0] / math.log(2.0) / max(so_far[2], 1.0)
            say(f"ttt_eval: batch {i} step_loss {step_loss:.4f} running_bpb {running:.4f} {time.perf_counter() - t0:.1f}s")
    team.barrier()
    return tally.finish(team)


# ---------------------------------------------------------------------------------------------
# OPTIMISER SET-UP AND SCHEDULES
# ---------------------------------------------------------------------------------------------


def make_optimizers(model: TinyGPT, k: type[Knobs], team: Team) -> tuple[list[torch.optim.Optimizer], Muon]:
    matrices, vectors = [], []
    for name, p in model.named_parameters():
        if name == "wte.weight":
            continue
        if p.ndim == 2 and name.startswith("blocks.") and "resid_mix" not in name:
            matrices.append(p)
        else:
            vectors.append(p)
    adam = dict(betas=(k.beta1, k.beta2), eps=k.adam_eps, fused=True)
    opt_embed = torch.optim.Adam([{"params": [model.wte.weight], "lr": k.embed_lr}], **adam)
    opt_vector = torch.optim.Adam([{"params": vectors, "lr": k.scalar_lr}], **adam)
    opt_muon = Muon(matrices, lr=k.matrix_lr, momentum=k.muon_momentum, ns_steps=k.muon_ns_steps, team=team)
    opts: list[torch.optim.Optimizer] = [opt_embed, opt_vector, opt_muon]
    for opt in opts:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    say(f"optimizers: {len(matrices)} matrices for Muon, {len(vectors)} small tensors and the embedding for Adam")
    return opts, opt_muon


def lr_scale(progress: float, k: type[Knobs]) -> float:
    """Flat, then half a cosine down to a small floor. progress: 0 to 1, by the clock."""
    start = 1.0 - k.warmdown_frac
    if progress <= start:
        return 1.0
    t = min((progress - start) / max(k.warmdown_frac, 1e-9), 1.0)
    return k.warmdown_floor + (1.0 - k.warmdown_floor) * 0.5 * (1.0 + math.cos(math.pi * t))


def qat_stage(progress: float, k: type[Knobs]) -> int:
    if progress >= k.qat_int4_frac:
        return 4
    return 8 if progress >= k.qat_int8_frac else 0


# ---------------------------------------------------------------------------------------------
# TRAINING
# ---------------------------------------------------------------------------------------------


def grad_pass(model: nn.Module, loader: TrainLoader, k: type[Knobs], accum: int, team: Team) -> Tensor:
    """Forward and backward for one step's worth of tokens. Returns the mean loss."""
    total = torch.zeros((), device=team.device)
    for micro in range(accum):
        if team.distributed:
            model.require_backward_grad_sync = micro == accum - 1
        x, y = loader.next_batch(k.train_batch_tokens, k.train_seq_len, accum)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        total += loss.detach()
        (loss / accum).backward()
    return total / accum


def warm_up(model: nn.Module, base: TinyGPT, opts, k: type[Knobs], accum: int, team: Team) -> None:
    """A few steps so that torch.compile is done before the clock starts. Then everything is put back."""
    if k.warmup_steps <= 0:
        return
    weights = {name: t.detach().cpu().clone() for name, t in base.state_dict().items()}
    states = [copy.deepcopy(opt.state_dict()) for opt in opts]
    loader = TrainLoader(k.train_files, team)
    model.train()
    for step in range(k.warmup_steps):
        # visit all three QAT stages, each of them is a graph of its own
        set_qat_stage(base, (0, 8, 4)[min(3 * step // k.warmup_steps, 2)])
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        grad_pass(model, loader, k, accum, team)
        for opt in opts:
            opt.step()
        if step % 5 == 0 or step + 1 == k.warmup_steps:
            say(f"warmup_step:{step + 1}/{k.warmup_steps}")
    base.load_state_dict(weights, strict=True)
    for opt, state in zip(opts, states, strict=True):
        opt.load_state_dict(state)
        opt.zero_grad(set_to_none=True)
    set_qat_stage(base, 0)
    say("warm-up finished, weights and optimisers are back to where they were")


class TrainClock:
    """Counts training time only. I stop it around validation, like the baseline does."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.spent_ms = 0.0
        self.since: float | None = None

    def go(self) -> None:
        self.since = now_ms()

    def hold(self) -> None:
        if self.since is not None:
            self.spent_ms += now_ms() - self.since
            self.since = None

    def read(self) -> float:
        running = 0.0 if self.since is None else 1000.0 * time.perf_counter() - self.since
        return self.team.slowest(self.spent_ms + running)


def train(
    k: type[Knobs],
    team: Team,
    model: nn.Module,
    base: TinyGPT,
    opts: list[torch.optim.Optimizer],
    opt_muon: Muon,
    loader: TrainLoader,
    val_tokens: Tensor,
    tables: ByteTables,
    accum: int,
) -> tuple[WeightEMA, TrainClock]:
    budget_ms = 1000.0 * (k.max_wallclock_seconds - k.calib_reserve_seconds)
    clock = TrainClock(team)
    ema = WeightEMA(base, k.ema_decay)
    stage = 0
    step = 0
    team.barrier()
    clock.go()
    while True:
        elapsed_ms = clock.read()
        progress = min(elapsed_ms / budget_ms, 1.0)
        last_step = step >= k.iterations or elapsed_ms >= budget_ms
        if last_step or (k.val_loss_every > 0 and step % k.val_loss_every == 0):
            clock.hold()
            val_loss, val_bpb = eval_val(k, team, base, val_tokens, tables)
            say(
                f"step:{step}/{k.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{clock.spent_ms:.0f}ms step_avg:{clock.spent_ms / max(step, 1):.2f}ms"
            )
            clock.go()
        if last_step:
            clock.hold()
            if step < k.iterations:
                say(f"stopping_early: wallclock_cap train_time:{clock.spent_ms:.0f}ms step:{step}/{k.iterations}")
            break

        wanted = qat_stage(progress, k)
        if wanted != stage:
            say(f"qat: stage {stage} -> {wanted} at step {step} ({100.0 * progress:.1f}% of the time)")
            stage = wanted
            set_qat_stage(base, stage)

        scale = lr_scale(progress, k)
        warm = min(step / max(k.muon_momentum_steps, 1), 1.0)
        for group in opt_muon.param_groups:
            group["momentum"] = (1.0 - warm) * k.muon_momentum_start + warm * k.muon_momentum
        for opt in opts:
            opt.zero_grad(set_to_none=True)
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

        model.train()
        train_loss = grad_pass(model, loader, k, accum, team)
        if k.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(base.parameters(), k.grad_clip)
        for opt in opts:
            opt.step()
        if progress >= k.ema_start_frac:
            ema.update(base)
        step += 1
        if step <= 10 or step % k.train_log_every == 0:
            spent = clock.read()
            say(
                f"step:{step}/{k.iterations} train_loss:{train_loss.item():.4f} lr_scale:{scale:.3f} "
                f"train_time:{spent:.0f}ms step_avg:{spent / step:.2f}ms"
            )
    return ema, clock


# ---------------------------------------------------------------------------------------------
# MAIN
# ---------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def print_surroundings() -> None:
    say(f"Running Python {sys.version}")
    say(f"Running PyTorch {torch.__version__}")
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    say(smi.stdout, console=False)


def main() -> None:
    k = Knobs
    team = Team()
    team.start()
    say.open(k.run_id, team.master)
    print_surroundings()
    seed_everything(k.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if 8 % team.world:
        raise ValueError("the number of GPUs must divide 8")
    accum = 8 // team.world

    # ---- tokenizer and validation tokens
    sp = spm.SentencePieceProcessor(model_file=k.tokenizer_path)
    if int(sp.vocab_size()) != k.vocab_size:
        raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {k.vocab_size}")
    tables = ByteTables(sp, k.vocab_size, team.device)
    val_tokens = load_val_tokens(k.val_files)
    say(f"val tokens: {val_tokens.numel()} from {k.val_files}")
    say(f"train shards: {len(list_shards(k.train_files))} from {k.train_files}")

    # ---- model and optimisers
    base = TinyGPT(k).to(team.device)
    small_params_to_fp32(base)
    compiled = torch.compile(base, dynamic=False)
    model: nn.Module = DDP(compiled, device_ids=[team.local_rank]) if team.distributed else compiled
    opts, opt_muon = make_optimizers(base, k, team)
    say(f"model_params:{sum(p.numel() for p in base.parameters())}")
    say(f"world_size:{team.world} grad_accum_steps:{accum} seed:{k.seed}")
    say(f"layers:{k.num_layers} dim:{k.model_dim} heads:{k.num_heads} kv_heads:{k.num_kv_heads} tied embeddings")

    # ---- compile, then train against the clock
    warm_up(model, base, opts, k, accum, team)
    loader = TrainLoader(k.train_files, team)
    ema, clock = train(k, team, model, base, opts, opt_muon, loader, val_tokens, tables, accum)
    say(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- EMA weights and calibration, still on the training clock
    clock.go()
    set_qat_stage(base, 0)
    if ema.started:
        ema.copy_into(base)
        say("ema: using the averaged weights from here on")
    powers = measure_channels(base, loader, k, team, accum)
    clock.hold()
    train_seconds = team.slowest(clock.spent_ms) / 1000.0
    say(f"calibration finished, train + calibration took {train_seconds:.2f}s of {k.max_wallclock_seconds:.0f}s")
    if train_seconds > k.max_wallclock_seconds:
        raise SystemExit("calibration ran past the cap, raise CALIB_RESERVE_SECONDS")

    # ---- write the artifact
    if team.master:
        write_artifact(build_payload(base, powers), k.artifact_path)
    team.barrier()
    report_sizes(k.artifact_path)

    # ---- from here on only the artifact counts
    eval_t0 = time.perf_counter()
    payload = read_artifact(k.artifact_path)
    fresh = TinyGPT(k).to(team.device)
    fresh.load_state_dict(restore_payload(payload), strict=True)
    small_params_to_fp32(fresh)
    del model, compiled, base, ema
    torch.cuda.empty_cache()

    t0 = time.perf_counter()
    q_loss, q_bpb = eval_val(k, team, fresh, val_tokens, tables)
    say(f"final_int4_zlib_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} eval_time:{time.perf_counter() - t0:.1f}s")

    t0 = time.perf_counter()
    final_loss, final_bpb, scored = eval_val_sliding(k, team, fresh, val_tokens, tables)
    say(
        f"final_sliding_window val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} stride:{k.eval_stride} "
        f"tokens:{scored} eval_time:{time.perf_counter() - t0:.1f}s"
    )

    if k.ttt_enabled:
        t0 = time.perf_counter()
        final_loss, final_bpb, scored = ttt_eval(k, team, fresh, val_tokens, tables)
        say(
            f"final_ttt_eval val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} "
            f"tokens:{scored} eval_time:{time.perf_counter() - t0:.1f}s"
        )

    eval_seconds = team.slowest(time.perf_counter() - eval_t0)
    say(f"evaluation took {eval_seconds:.1f}s of {k.eval_budget_seconds:.0f}s")
    if eval_seconds > k.eval_budget_seconds:
        raise SystemExit("evaluation took too long")
    say(f"submission_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f} tokens:{scored}")
    team.stop()


if __name__ == "__main__":
    main()
