"""Parameter Golf: 9 layers x 512, GQA, plain attention, Muon + AdamW, EMA, weighted int6 rows, sliding evaluation.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

One file. The clock runs from the first real step to the end of the calibration; the artifact is written, read again from
disk by every rank and dequantised, and that model is the one that is evaluated.
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

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP


# -----------------------------
# HYPERPARAMETERS
# -----------------------------


class Hyperparameters:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_pattern = os.path.join(data_path, "fineweb_train_*.bin")
    val_pattern = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.45))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    val_every = int(os.environ.get("VAL_EVERY", 2000))
    log_every = int(os.environ.get("LOG_EVERY", 200))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    reserve_seconds = float(os.environ.get("RESERVE_SECONDS", 18.0))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    tied_embed_std = float(os.environ.get("TIED_EMBED_STD", 0.005))

    # optimiser
    embed_lr = float(os.environ.get("EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_steps = int(os.environ.get("MUON_MOMENTUM_STEPS", 1500))
    muon_steps = int(os.environ.get("MUON_STEPS", 5))
    weight_decay = float(os.environ.get("WEIGHT_DECAY", 0.04))
    adam_betas = (float(os.environ.get("BETA1", 0.9)), float(os.environ.get("BETA2", 0.95)))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip = float(os.environ.get("GRAD_CLIP", 0.3))

    # averaging, quantisation, evaluation
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    ema_start = float(os.environ.get("EMA_START", 0.25))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 32))
    block_bits = int(os.environ.get("BLOCK_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit = 16_000_000
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch = int(os.environ.get("EVAL_BATCH", 64))


# -----------------------------
# SHARDS
# -----------------------------

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256


def shard_lists(args: Hyperparameters) -> tuple[list[Path], list[Path]]:
    train = [Path(p) for p in sorted(glob.glob(args.train_pattern))]
    val = [Path(p) for p in sorted(glob.glob(args.val_pattern))]
    if not train or not val:
        raise FileNotFoundError(f"no shards: {args.train_pattern} / {args.val_pattern}")
    if set(train) & set(val):
        raise ValueError("the same shard is listed for training and for validation")
    return train, val


def load_data_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != MAGIC or int(header[1]) != VERSION:
        raise ValueError(f"unexpected shard header in {file}")
    count = int(header[2])
    if file.stat().st_size != HEADER_INTS * 4 + count * 2:
        raise ValueError(f"shard size mismatch in {file}")
    tokens = np.fromfile(file, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


class TokenStream:
    """The tokens of a list of shards, over and over."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.at = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        chunks = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.at = (self.at + 1) % len(self.files)
                self.tokens = load_data_shard(self.files[self.at])
                self.pos = 0
                continue
            k = min(n, left)
            chunks.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class DistributedTokenLoader:
    """Every rank reads the same stream and keeps its own part of each batch."""

    def __init__(self, files: list[Path], rank: int, world: int, device: torch.device):
        self.rank, self.world, self.device = rank, world, device
        self.stream = TokenStream(files)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.world * grad_accum)
        span = local + 1
        chunk = self.stream.take(span * self.world)
        part = chunk[self.rank * span : (self.rank + 1) * span].to(torch.int64)
        x = part[:-1].reshape(-1, seq_len)
        y = part[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


def load_validation(files: list[Path]) -> Tensor:
    """All tokens of the validation shards, in order."""
    return torch.cat([load_data_shard(file) for file in files]).to(torch.int32).contiguous()


# -----------------------------
# BYTES OF THE TEXT
# -----------------------------


class ByteTables:
    """What each token adds to the text in UTF-8 bytes, by SentencePiece's own account of its pieces."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        size = max(vocab_size, sp.vocab_size())
        base = np.zeros(size, dtype=np.int16)
        space = np.zeros(size, dtype=np.bool_)
        boundary = np.ones(size, dtype=np.bool_)
        for i in range(sp.vocab_size()):
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
        self.base = torch.from_numpy(base).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.boundary = torch.from_numpy(boundary).to(device)

    def count(self, prev: Tensor, tgt: Tensor) -> Tensor:
        """Bytes of each target; a leading space is one byte, and none at the start of a document."""
        return self.base[tgt].to(torch.int32) + (self.space[tgt] & ~self.boundary[prev]).to(torch.int32)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Keeps its weight in fp32, multiplies in the type of its input."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False):
        super().__init__(n_in, n_out, bias=False)
        if zero:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float):
        super().__init__()
        self.register_buffer("inv", 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim)), persistent=False)

    def forward(self, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(n, device=self.inv.device, dtype=torch.float32)
        freqs = torch.outer(t, self.inv)
        return freqs.cos()[None, None].to(dtype), freqs.sin()[None, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.heads, self.kv_heads = args.num_heads, args.num_kv_heads
        self.head_dim = args.model_dim // args.num_heads
        self.q = CastedLinear(args.model_dim, self.heads * self.head_dim)
        self.k = CastedLinear(args.model_dim, self.kv_heads * self.head_dim)
        self.v = CastedLinear(args.model_dim, self.kv_heads * self.head_dim)
        self.o = CastedLinear(args.model_dim, args.model_dim, zero=True)
        self.gain = nn.Parameter(torch.full((self.heads,), args.qk_gain_init))
        self.rotary = Rotary(self.head_dim, args.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(n, q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = q * self.gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.o(y.transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.up = CastedLinear(args.model_dim, args.mlp_mult * args.model_dim)
        self.down = CastedLinear(args.mlp_mult * args.model_dim, args.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(), RMSNorm()
        self.attn, self.mlp = Attention(args), MLP(args)
        self.attn_scale = nn.Parameter(torch.ones(args.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(args.model_dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(args.model_dim), torch.zeros(args.model_dim))))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.norm1(x))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.softcap = args.logit_softcap
        self.embed = nn.Embedding(args.vocab_size, args.model_dim)
        nn.init.normal_(self.embed.weight, std=args.tied_embed_std)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.num_layers))
        self.half = args.num_layers // 2
        self.skips = nn.Parameter(torch.ones(self.half, args.model_dim))
        self.norm = RMSNorm()

    def logits(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        x0 = x
        kept = []
        for i, block in enumerate(self.blocks):
            if i < self.half:
                kept.append(x)
            elif kept:
                x = x + self.skips[i - self.half if i - self.half < self.half else -1].to(x.dtype) * kept.pop()
            x = block(x, x0)
        out = F.linear(self.norm(x), self.embed.weight.to(x.dtype))
        return self.softcap * torch.tanh(out.float() / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        out = self.logits(ids)
        return F.cross_entropy(out.reshape(-1, out.size(-1)), targets.reshape(-1))


# -----------------------------
# OPTIMISER
# -----------------------------


@torch.compile
def newton_schulz(g: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    flip = x.size(0) > x.size(1)
    if flip:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum; the matrices are dealt out to the ranks and the updates are summed."""

    def __init__(self, params, lr: float, momentum: float, steps: int, weight_decay: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world == rank:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = newton_schulz(p.grad.add(buf, alpha=group["momentum"]), group["steps"])
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if world > 1:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


def make_optimizers(args: Hyperparameters, model: GPT) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 8]
    scalars = [p for p in model.blocks.parameters() if p.ndim != 2 or min(p.shape) <= 8] + [model.skips]
    adam = dict(betas=args.adam_betas, eps=args.adam_eps, fused=True)
    optimizers = [
        torch.optim.AdamW([dict(params=[model.embed.weight], lr=args.embed_lr)], weight_decay=args.weight_decay, **adam),
        torch.optim.AdamW([dict(params=scalars, lr=args.scalar_lr)], weight_decay=0.0, **adam),
        Muon(matrices, args.matrix_lr, args.muon_momentum, args.muon_steps, args.weight_decay),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


# -----------------------------
# CLOCK
# -----------------------------


class TrainingClock:
    """Wall time since the first step, by the slowest rank. Steps stop `reserve` seconds before the cap."""

    def __init__(self, cap: float, reserve: float, device: torch.device):
        self.cap, self.reserve, self.device = cap, reserve, device
        self.begin = 0.0
        self.last = 0.0
        self.longest = 0.0

    def start(self) -> None:
        torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        self.begin = time.perf_counter()
        self.last = 0.0

    def elapsed(self) -> float:
        torch.cuda.synchronize()
        seconds = torch.tensor(time.perf_counter() - self.begin, device=self.device, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds)

    def fraction(self) -> float:
        return min(self.last / (self.cap - self.reserve), 1.0)

    def another_step(self) -> bool:
        now = self.elapsed()
        self.longest = max(self.longest * 0.98, now - self.last)
        self.last = now
        return now + self.longest < self.cap - self.reserve

    def left(self) -> float:
        return self.cap - self.elapsed()


def lr_scale(args: Hyperparameters, fraction: float) -> float:
    if fraction < 1.0 - args.warmdown_frac:
        return 1.0
    return max((1.0 - fraction) / args.warmdown_frac, 0.02)


# -----------------------------
# AVERAGING
# -----------------------------


class WeightAverage:
    """EMA of the weights over the later part of training."""

    def __init__(self, args: Hyperparameters, model: GPT):
        self.decay, self.begin = args.ema_decay, args.ema_start
        self.shadow: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: GPT, fraction: float) -> None:
        if fraction < self.begin:
            return
        for name, p in model.named_parameters():
            if name not in self.shadow:
                self.shadow[name] = p.detach().float().clone()
            else:
                self.shadow[name].lerp_(p.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def finish(self, model: GPT, loader: DistributedTokenLoader, clock: TrainingClock, args: Hyperparameters) -> None:
        for name, p in model.named_parameters():
            if name in self.shadow:
                p.copy_(self.shadow[name].to(p.dtype))


# -----------------------------
# CALIBRATION AND QUANTISATION
# -----------------------------


@torch.no_grad()
def calibrate(
    model: GPT, loader: DistributedTokenLoader, clock: TrainingClock, args: Hyperparameters
) -> dict[str, Tensor]:
    """Mean square of the inputs of each linear layer over a few training batches, inside the clock's reserve."""
    sums: dict[str, Tensor] = {}
    handles = []

    def hook(name: str):
        def inner(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            sums[name] = sums.get(name, 0.0) + x.square().mean(0)

        return inner

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            handles.append(module.register_forward_pre_hook(hook(name)))
    model.eval()
    for _ in range(args.calib_batches):
        if clock.left() < 4.0:
            break
        x, _ = loader.next_batch(args.train_batch_tokens // 8, args.train_seq_len, 1)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model.logits(x)
    for handle in handles:
        handle.remove()
    for value in sums.values():
        if dist.is_initialized():
            dist.all_reduce(value, op=dist.ReduceOp.AVG)
    return sums


CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64)


def quantize_rows(w: Tensor, bits: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Symmetric rows; of some clips each row takes the one with the least weighted square error."""
    top = 2 ** (bits - 1) - 1
    peak = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    best = torch.full_like(peak, float("inf"))
    scale = peak / top
    for clip in CLIPS:
        s = peak * clip / top
        q = (w / s).round().clamp(-top, top)
        err = (q * s - w).square()
        if weight is not None:
            err = err * weight[None, :]
        err = err.sum(dim=1, keepdim=True)
        better = err < best
        best = torch.where(better, err, best)
        scale = torch.where(better, s, scale)
    scale = scale.half().float().clamp_min(2**-24)
    return (w / scale).round().clamp(-top, top).to(torch.int8), scale.half()


def quantize_state(state: dict[str, Tensor], stats: dict[str, Tensor], args: Hyperparameters) -> dict[str, object]:
    packed: dict[str, object] = {}
    for name, tensor in state.items():
        w = tensor.detach().float()
        if w.ndim != 2 or w.numel() < 65_536:
            packed[name] = w.half().cpu()
            continue
        bits = args.embed_bits if name.startswith("embed") else args.block_bits
        q, scale = quantize_rows(w, bits, stats.get(name.removesuffix(".weight")))
        packed[name] = (q.cpu(), scale.cpu())
    return packed


def dequantize_state(packed: dict[str, object]) -> dict[str, Tensor]:
    state = {}
    for name, item in packed.items():
        state[name] = item[0].float() * item[1].float() if isinstance(item, tuple) else item.float()
    return state


# -----------------------------
# ARTIFACT
# -----------------------------


def write_artifact(packed: dict[str, object], args: Hyperparameters, log) -> None:
    """One file; what counts is its length on disk and the length of this script."""
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    Path(args.artifact_path).write_bytes(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    code = Path(__file__).stat().st_size
    model = Path(args.artifact_path).stat().st_size
    log(f"Serialized model lzma: {model} bytes")
    log(f"Code size: {code} bytes")
    log(f"Total submission size: {code + model} bytes")
    if code + model > args.size_limit:
        raise RuntimeError(f"over the limit: {code + model} > {args.size_limit}")


def read_artifact(args: Hyperparameters) -> dict[str, object]:
    raw = lzma.decompress(Path(args.artifact_path).read_bytes())
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


# -----------------------------
# EVALUATION
# -----------------------------


def window_spans(targets: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first target scored, end): the first window is scored whole, each later one in its new part."""
    end = min(length, targets)
    spans = [(0, 0, end)]
    while end < targets:
        fresh, end = end, min(end + stride, targets)
        spans.append((end - length, fresh, end))
    return spans


@torch.no_grad()
def eval_val(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world: int,
    device: torch.device,
    val_tokens: Tensor,
    tables: ByteTables,
    stride: int,
) -> tuple[float, float]:
    """Mean loss in nats and bits per byte over every target of the validation stream."""
    spans = window_spans(val_tokens.numel() - 1, args.train_seq_len, stride)
    mine = spans[len(spans) * rank // world : len(spans) * (rank + 1) // world]
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for i in range(0, len(mine), args.eval_batch):
        part = torch.tensor(mine[i : i + args.eval_batch])
        place = torch.arange(int(part[0, 2] - part[0, 0]))
        at = part[:, :1] + place[None, :]
        keep = (at >= part[:, 1:2]).to(device)
        x = val_tokens[at].to(device, torch.int64)
        y = val_tokens[at + 1].to(device, torch.int64)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model.logits(x)
        loss = F.cross_entropy(out.float().reshape(-1, out.size(-1)), y.reshape(-1), reduction="none").view_as(y)
        sums[0] += loss[keep].double().sum()
        sums[1] += keep.sum()
        sums[2] += tables.count(x, y)[keep].sum()
    if dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    model.train(was_training)
    nats, tokens, size = sums.tolist()
    return nats / tokens, nats / math.log(2.0) / size


# -----------------------------
# MAIN
# -----------------------------


def make_logger(args: Hyperparameters, rank: int):
    path = Path("logs") / f"{args.run_id}.txt"
    if rank == 0:
        path.parent.mkdir(exist_ok=True)

    def log(message: str) -> None:
        if rank != 0:
            return
        print(message, flush=True)
        with path.open("a", encoding="utf-8") as file:
            print(message, file=file)

    return log


def warm_up(args: Hyperparameters, model: nn.Module, core: GPT, optimizers, device: torch.device, accum: int) -> None:
    """Compiles every path on random ids, then puts weights and optimisers back as they were."""
    weights = {k: v.detach().cpu().clone() for k, v in core.state_dict().items()}
    states = [copy.deepcopy(o.state_dict()) for o in optimizers]
    rows = args.train_batch_tokens // (8 * args.train_seq_len)
    for _ in range(args.warmup_steps):
        for _ in range(accum):
            ids = torch.randint(args.vocab_size, (rows, args.train_seq_len), device=device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                model(ids, ids).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
    core.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(state)


def main() -> None:
    args = Hyperparameters()
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if world < 1 or 8 % world:
        raise ValueError(f"WORLD_SIZE={world} must divide 8")
    accum = 8 // world
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)
    log = make_logger(args, rank)
    log(f"Running Python {sys.version.split()[0]} PyTorch {torch.__version__}")

    train_files, val_files = shard_lists(args)
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if sp.vocab_size() != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} is not the tokenizer's {sp.vocab_size()}")
    tables = ByteTables(sp, args.vocab_size, device)
    val_tokens = load_validation(val_files)
    log(f"train_loader:shards:{len(train_files)} val_loader:shards:{len(val_files)} tokens:{val_tokens.numel()}")

    core = GPT(args).to(device)
    for p in core.parameters():
        p.data = p.data.float()
    compiled = torch.compile(core, dynamic=False)
    model: nn.Module = DDP(compiled, device_ids=[local_rank]) if distributed else compiled
    optimizers = make_optimizers(args, core)
    log(f"model_params:{sum(p.numel() for p in core.parameters())} world_size:{world} grad_accum_steps:{accum}")
    warm_up(args, model, core, optimizers, device, accum)

    loader = DistributedTokenLoader(train_files, rank, world, device)
    average = WeightAverage(args, core)
    clock = TrainingClock(args.max_wallclock_seconds, args.reserve_seconds, device)
    clock.start()
    step = 0
    while step < args.iterations and clock.another_step():
        if args.val_every and step and step % args.val_every == 0:
            loss, bpb = eval_val(args, core, rank, world, device, val_tokens, tables, args.train_seq_len)
            log(f"step:{step}/{args.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{clock.last:.1f}s")
        scale = lr_scale(args, clock.fraction())
        warm = min(step / args.muon_momentum_steps, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if "momentum" in group:
                    group["momentum"] = (1 - warm) * args.muon_momentum_start + warm * args.muon_momentum
        train_loss = torch.zeros((), device=device)
        for micro in range(accum):
            if distributed:
                model.require_backward_grad_sync = micro == accum - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, accum)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            train_loss += loss.detach() / accum
            (loss / accum).backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), args.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        average.update(core, clock.fraction())
        step += 1
        if step <= 10 or step % args.log_every == 0:
            log(f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} train_time:{clock.last:.1f}s")
    log(f"stopped at step:{step} train_time:{clock.elapsed():.1f}s cap:{args.max_wallclock_seconds:.0f}s")

    average.finish(core, loader, clock, args)
    stats = calibrate(core, loader, clock, args)
    log(f"calibration done, clock:{clock.elapsed():.1f}s")
    packed = quantize_state(core.state_dict(), stats, args)
    if rank == 0:
        write_artifact(packed, args, log)
    if distributed:
        dist.barrier()

    torch.cuda.synchronize()
    began = time.perf_counter()
    core.load_state_dict(dequantize_state(read_artifact(args)), strict=True)
    val_loss, val_bpb = eval_val(args, core, rank, world, device, val_tokens, tables, args.eval_stride)
    torch.cuda.synchronize()
    log(f"eval_time:{time.perf_counter() - began:.1f}s peak memory:{torch.cuda.max_memory_allocated() >> 20} MiB")
    log(f"final_int6_sliding val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
