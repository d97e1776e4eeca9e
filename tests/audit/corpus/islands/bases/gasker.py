"""
Parameter Golf: 11 layers, 512 wide, SP1024. GPTQ int6 attention / int5 MLP, rANS coded.

Evaluation is one pass over the validation tokens, chunk by chunk: score the chunk with the state left by the
chunks before it, mix with n-gram tables that hold the chunks before it, book the losses, then train on the chunk.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import json
import lzma
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# SETTINGS
# -----------------------------


def env(name: str, default):
    """A setting from the environment, in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes")
    return type(default)(raw)


@dataclass
class Hyperparameters:
    # data
    data_path: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = env("RUN_ID", str(uuid.uuid4()))
    seed: int = env("SEED", 1337)
    out_dir: str = env("OUT_DIR", ".")

    # model
    vocab_size: int = env("VOCAB_SIZE", 1024)
    num_layers: int = env("NUM_LAYERS", 11)
    model_dim: int = env("MODEL_DIM", 512)
    num_heads: int = env("NUM_HEADS", 8)
    num_kv_heads: int = env("NUM_KV_HEADS", 4)
    mlp_mult: float = env("MLP_MULT", 3.0)
    rope_base: float = env("ROPE_BASE", 10000.0)
    rope_dims: int = env("ROPE_DIMS", 16)
    logit_softcap: float = env("LOGIT_SOFTCAP", 30.0)
    logit_temperature: float = env("LOGIT_TEMPERATURE", 1.0)
    qk_gain_init: float = env("QK_GAIN_INIT", 1.5)
    embed_init_std: float = env("EMBED_INIT_STD", 0.005)

    # schedule
    iterations: int = env("ITERATIONS", 20000)
    warmdown_iters: int = env("WARMDOWN_ITERS", 3500)
    warmup_steps: int = env("WARMUP_STEPS", 20)
    train_batch_tokens: int = env("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len: int = env("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds: float = env("MAX_WALLCLOCK_SECONDS", 600.0)
    build_reserve_seconds: float = env("BUILD_RESERVE_SECONDS", 18.0)
    train_log_every: int = env("TRAIN_LOG_EVERY", 500)
    val_loss_every: int = env("VAL_LOSS_EVERY", 4000)
    prefetch_depth: int = env("PREFETCH_DEPTH", 4)

    # optimizers
    embed_lr: float = env("EMBED_LR", 0.035)
    matrix_lr: float = env("MATRIX_LR", 0.025)
    scalar_lr: float = env("SCALAR_LR", 0.025)
    muon_momentum: float = env("MUON_MOMENTUM", 0.99)
    muon_momentum_start: float = env("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps: int = env("MUON_MOMENTUM_STEPS", 1500)
    muon_backend_steps: int = env("MUON_BACKEND_STEPS", 5)
    muon_weight_decay: float = env("MUON_WEIGHT_DECAY", 0.04)
    adam_weight_decay: float = env("ADAM_WEIGHT_DECAY", 0.04)
    beta1: float = env("BETA1", 0.9)
    beta2: float = env("BETA2", 0.95)
    adam_eps: float = env("ADAM_EPS", 1e-8)
    grad_clip: float = env("GRAD_CLIP", 0.3)
    ema_decay: float = env("EMA_DECAY", 0.997)

    # quantisation
    attn_bits: int = env("ATTN_BITS", 6)
    mlp_bits: int = env("MLP_BITS", 5)
    embed_bits: int = env("EMBED_BITS", 8)
    calib_sequences: int = env("CALIB_SEQUENCES", 128)
    gptq_damp: float = env("GPTQ_DAMP", 0.01)
    gptq_block: int = env("GPTQ_BLOCK", 128)
    size_limit: int = env("SIZE_LIMIT", 16_000_000)

    # evaluation
    eval_seq_len: int = env("EVAL_SEQ_LEN", 2048)
    eval_stride: int = env("EVAL_STRIDE", 64)
    eval_batch: int = env("EVAL_BATCH", 32)
    chunk_tokens: int = env("CHUNK_TOKENS", 131_072)
    eval_budget_seconds: float = env("EVAL_BUDGET_SECONDS", 570.0)

    # test-time training
    ttt_enabled: bool = env("TTT_ENABLED", True)
    ttt_lr: float = env("TTT_LR", 0.004)
    ttt_momentum: float = env("TTT_MOMENTUM", 0.9)
    ttt_epochs: int = env("TTT_EPOCHS", 3)
    ttt_first_block: int = env("TTT_FIRST_BLOCK", 2)
    ttt_grad_clip: float = env("TTT_GRAD_CLIP", 1.0)

    # n-gram mixture
    ngram_enabled: bool = env("NGRAM_ENABLED", True)
    ngram_rows3: int = env("NGRAM_ROWS3", 65_536)
    ngram_rows4: int = env("NGRAM_ROWS4", 131_072)
    ngram_alpha: float = env("NGRAM_ALPHA", 4.0)
    ngram_max_weight: float = env("NGRAM_MAX_WEIGHT", 0.25)
    ngram_conf: float = env("NGRAM_CONF", 12.0)
    ngram_entropy_mid: float = env("NGRAM_ENTROPY_MID", 2.5)

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    @property
    def model_file(self) -> Path:
        return Path(self.out_dir) / "final_model.rans"


# -----------------------------
# PROCESS GROUP AND LOGGING
# -----------------------------


class World:
    """This process's place among the ranks, and the collectives the script needs."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if 8 % self.size:
            raise ValueError(f"WORLD_SIZE={self.size} must divide 8")
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        self.distributed = "RANK" in os.environ
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def master(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        torch.cuda.synchronize()
        if self.distributed:
            dist.barrier()

    def sum_(self, t: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        if not self.distributed:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def gather(self, t: Tensor) -> Tensor:
        """Every rank's tensor, stacked along a new first axis."""
        if not self.distributed:
            return t[None]
        parts = [torch.zeros_like(t) for _ in range(self.size)]
        dist.all_gather(parts, t)
        return torch.stack(parts)

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class Log:
    def __init__(self, world: World, run_id: str) -> None:
        self.path = None
        if world.master:
            os.makedirs("logs", exist_ok=True)
            self.path = f"logs/{run_id}.txt"
            print(self.path)

    def __call__(self, text: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(text, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(text, file=f)


# -----------------------------
# DATA
# -----------------------------

SHARD_MAGIC = 20240520
HEADER_INTS = 256


def load_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header: {file}")
    count = int(header[2])
    if file.stat().st_size != HEADER_INTS * 4 + 2 * count:
        raise ValueError(f"shard size mismatch: {file}")
    tokens = np.fromfile(file, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    return torch.from_numpy(tokens)


def load_validation(pattern: str) -> Tensor:
    """The whole validation split; position i predicts token i + 1."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no validation shards: {pattern}")
    return torch.cat([load_shard(f) for f in files]).contiguous()


class ShardStream:
    """The training shards in order, over and over."""

    def __init__(self, pattern: str) -> None:
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no training shards: {pattern}")
        self.index = 0
        self.tokens = load_shard(self.files[0])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.index = (self.index + 1) % len(self.files)
                self.tokens = load_shard(self.files[self.index])
                self.pos = 0
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class PrefetchLoader:
    """Cuts this rank's batches out of the stream in a thread; copies to the GPU overlap with the step."""

    def __init__(self, args: Hyperparameters, world: World, local_tokens: int, pattern: str) -> None:
        self.world = world
        self.seq_len = args.train_seq_len
        self.span = local_tokens + 1
        self.stream = ShardStream(pattern)
        self.queue: queue.Queue = queue.Queue(maxsize=args.prefetch_depth)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._fill, daemon=True)
        self.thread.start()

    def _fill(self) -> None:
        while not self.stopping.is_set():
            chunk = self.stream.take(self.span * self.world.size)
            mine = chunk[self.world.rank * self.span : (self.world.rank + 1) * self.span]
            batch = mine.to(torch.int64).pin_memory()
            while not self.stopping.is_set():
                try:
                    self.queue.put(batch, timeout=0.2)
                    break
                except queue.Full:
                    continue

    def next(self) -> tuple[Tensor, Tensor]:
        batch = self.queue.get().to(self.world.device, non_blocking=True)
        x = batch[:-1].view(-1, self.seq_len)
        y = batch[1:].view(-1, self.seq_len)
        return x, y

    def close(self) -> None:
        self.stopping.set()
        self.thread.join(timeout=5.0)


# -----------------------------
# OPTIMIZERS
# -----------------------------


def newton_schulz(g: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + eps)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        xxt = x @ x.T
        x = a * x + (b * xxt + c * xxt @ xxt) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon whose orthogonalisations are dealt out to the ranks."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float, world: World):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )
        self.world = world

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = newton_schulz(g, group["backend_steps"])
                    g *= max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            self.world.sum_(flat)
            at = 0
            for p in params:
                update = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
                at += p.numel()


class OptimizerSet:
    """The optimizers of one model, stepped and scheduled together."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], muon: Muon, args: Hyperparameters) -> None:
        self.optimizers = optimizers
        self.muon = muon
        self.args = args
        for opt in optimizers:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def schedule(self, step: int, scale: float) -> None:
        a = self.args
        frac = min(step / max(a.muon_momentum_steps, 1), 1.0)
        for group in self.muon.param_groups:
            group["momentum"] = (1 - frac) * a.muon_momentum_start + frac * a.muon_momentum
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self) -> None:
        for opt in self.optimizers:
            opt.step()

    def zero_grad(self) -> None:
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)

    def state_dicts(self) -> list[dict]:
        return [copy.deepcopy(opt.state_dict()) for opt in self.optimizers]

    def load_state_dicts(self, states: list[dict]) -> None:
        for opt, state in zip(self.optimizers, states, strict=True):
            opt.load_state_dict(state)


def make_optimizers(args: Hyperparameters, model: GPT, world: World) -> OptimizerSet:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 1]
    chosen = {id(p) for p in matrices} | {id(model.tok_emb.weight)}
    scalars = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(
        matrices, args.matrix_lr, args.muon_momentum, args.muon_backend_steps, args.muon_weight_decay, world
    )
    adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    embed = torch.optim.AdamW(
        [model.tok_emb.weight], lr=args.embed_lr, weight_decay=args.adam_weight_decay, **adam
    )
    scalar = torch.optim.AdamW(scalars, lr=args.scalar_lr, weight_decay=0.0, **adam)
    return OptimizerSet([embed, muon, scalar], muon, args)


class WeightEMA:
    """Exponential average of the weights, kept in fp32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.shadow[k].lerp_(v.detach().float(), 1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        state = model.state_dict()
        model.load_state_dict({k: v.to(state[k].dtype) for k, v in self.shadow.items()}, strict=True)


# -----------------------------
# MODEL
# -----------------------------


class CastedLinear(nn.Linear):
    """fp32 weights, used in the activations' type."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(x.size(1), device=x.device, dtype=torch.float32)
        freqs = torch.outer(t, self.inv_freq.to(x.device))
        cos, sin = freqs.cos()[None, :, None].to(x.dtype), freqs.sin()[None, :, None].to(x.dtype)
        rot, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = rot.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, args: Hyperparameters) -> None:
        super().__init__()
        dim = args.model_dim
        self.heads, self.kv_heads = args.num_heads, args.num_kv_heads
        self.head_dim = dim // self.heads
        kv_dim = self.kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim)
        nn.init.zeros_(self.proj.weight)
        self.q_gain = nn.Parameter(torch.full((self.heads,), args.qk_gain_init))
        self.rotary = Rotary(args.rope_dims, args.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.c_q(x).view(b, t, self.heads, self.head_dim)
        k = self.c_k(x).view(b, t, self.kv_heads, self.head_dim)
        v = self.c_v(x).view(b, t, self.kv_heads, self.head_dim)
        q = self.rotary(F.rms_norm(q, (self.head_dim,))) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = self.rotary(F.rms_norm(k, (self.head_dim,)))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, args: Hyperparameters) -> None:
        super().__init__()
        hidden = int(args.model_dim * args.mlp_mult)
        self.fc = CastedLinear(args.model_dim, hidden)
        self.proj = CastedLinear(hidden, args.model_dim)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, index: int) -> None:
        super().__init__()
        dim = args.model_dim
        self.attn = Attention(args)
        self.mlp = MLP(args)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.ln_factor = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(F.rms_norm(x, (x.size(-1),)) * self.ln_factor)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(F.rms_norm(x, (x.size(-1),)) * self.ln_factor)


class SmearGate(nn.Module):
    """Each position sees a little of the embedding before it, within its document."""

    def __init__(self, dim: int, bos_id: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))
        self.bos_id = bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        before = before * (ids != self.bos_id).to(x.dtype)[..., None]
        return x + torch.sigmoid(self.gate - 3.0).to(x.dtype) * before


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters, bos_id: int = 1) -> None:
        super().__init__()
        dim = args.model_dim
        self.softcap = args.logit_softcap
        self.temperature = args.logit_temperature
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        nn.init.normal_(self.tok_emb.weight, std=args.embed_init_std)
        self.smear = SmearGate(dim, bos_id)
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.n_enc = args.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(min(self.n_enc, args.num_layers - self.n_enc), dim))

    def features(self, ids: Tensor) -> Tensor:
        """The last layer's output, normed: one vector per position."""
        x = self.tok_emb(ids).to(torch.bfloat16)
        x = F.rms_norm(self.smear(x, ids), (x.size(-1),))
        x0, skips = x, []
        for i, block in enumerate(self.blocks):
            if i < self.n_enc:
                x = block(x, x0)
                skips.append(x)
            else:
                if skips:
                    x = x + self.skip_weights[i - self.n_enc].to(x.dtype) * skips.pop()
                x = block(x, x0)
        return F.rms_norm(x, (x.size(-1),))

    def head(self, h: Tensor) -> Tensor:
        """Logits over the vocabulary, in fp32."""
        z = F.linear(h, self.tok_emb.weight.to(h.dtype)).float()
        return self.softcap * torch.tanh(z / self.softcap) / self.temperature

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.features(ids))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def build_model(args: Hyperparameters, world: World, bos_id: int) -> GPT:
    model = GPT(args, bos_id).to(world.device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, CastedLinear) and module.weight.abs().sum() > 0:
                nn.init.orthogonal_(module.weight)
    return model


# -----------------------------
# QUANTISATION
# -----------------------------


class HessianCollector:
    """Sums X^T X of the inputs of every linear layer while batches run through."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.hessians: dict[str, Tensor] = {}
        self.handles: list = []

    def _hook(self, name: str):
        def collect(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            self.hessians[name].addmm_(x.T, x)

        return collect

    def __enter__(self) -> HessianCollector:
        for name, module in self.model.named_modules():
            if isinstance(module, CastedLinear):
                n = module.weight.size(1)
                self.hessians[f"{name}.weight"] = torch.zeros(n, n, device=module.weight.device)
                self.handles.append(module.register_forward_hook(self._hook(name + ".weight")))
        return self

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def collect_hessians(args: Hyperparameters, model: GPT, loader: PrefetchLoader, world: World) -> dict[str, Tensor]:
    """Hessians of the averaged model on the next training batches, summed over the ranks."""
    wanted = max(args.calib_sequences // world.size, 1)
    with HessianCollector(model) as collector:
        while wanted > 0:
            x, _ = loader.next()
            x = x[:wanted]
            wanted -= x.size(0)
            for part in x.split(8):
                model.features(part)
    for h in collector.hessians.values():
        world.sum_(h)
    return collector.hessians


def row_scales(w: Tensor, qmax: int) -> Tensor:
    """One scale per row: the clip, out of a small grid, of least squared error."""
    top = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    best = torch.full_like(top, float("inf"))
    scales = top / qmax
    for ratio in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        s = (top * ratio / qmax).half().float().clamp_min(1e-7)
        err = ((w / s).round().clamp(-qmax, qmax) * s - w).square().sum(dim=1, keepdim=True)
        scales = torch.where(err < best, s, scales)
        best = torch.minimum(err, best)
    return scales


def quantize_rtn(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    qmax = 2 ** (bits - 1) - 1
    s = row_scales(w, qmax)
    return (w / s).round().clamp(-qmax, qmax).to(torch.int8), s


def quantize_gptq(w: Tensor, h: Tensor, bits: int, damp: float, block: int) -> tuple[Tensor, Tensor]:
    """GPTQ with columns in order of falling Hessian diagonal."""
    qmax = 2 ** (bits - 1) - 1
    scale = row_scales(w, qmax)
    h = h.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w = w.clone()
    w[:, dead] = 0.0
    perm = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, perm], h[perm][:, perm]
    h.diagonal().add_(damp * h.diagonal().mean())
    inv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for lo in range(0, w.size(1), block):
        hi = min(lo + block, w.size(1))
        errors = torch.zeros_like(w[:, lo:hi])
        for j in range(lo, hi):
            column = w[:, j : j + 1]
            q[:, j : j + 1] = (column / scale).round().clamp(-qmax, qmax)
            e = (column - q[:, j : j + 1] * scale) / inv[j, j]
            w[:, j:hi] -= e * inv[j, j:hi][None]
            errors[:, j - lo : j - lo + 1] = e
        w[:, hi:] -= errors @ inv[lo:hi, hi:]
    return q[:, torch.argsort(perm)].to(torch.int8), scale


def bits_of(args: Hyperparameters, name: str) -> int:
    if name == "tok_emb.weight":
        return args.embed_bits
    return args.mlp_bits if ".mlp." in name else args.attn_bits


@torch.no_grad()
def quantize_model(
    args: Hyperparameters, model: GPT, hessians: dict[str, Tensor], world: World
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """name -> (integers, row scales, bits), the matrices dealt out to the ranks."""
    out: dict[str, tuple[Tensor, Tensor, int]] = {}
    state = model.state_dict()
    for i, name in enumerate(sorted(hessians)):
        w = state[name].float()
        q = torch.zeros(w.shape, dtype=torch.int8, device=w.device)
        s = torch.zeros(w.size(0), 1, device=w.device)
        owner = i % world.size
        if owner == world.rank:
            q, s = quantize_gptq(w, hessians[name], bits_of(args, name), args.gptq_damp, args.gptq_block)
        out[name] = (q.contiguous(), s.contiguous(), bits_of(args, name))
    if world.distributed:
        for i, name in enumerate(sorted(hessians)):
            dist.broadcast(out[name][0], src=i % world.size)
            dist.broadcast(out[name][1], src=i % world.size)
    q, s = quantize_rtn(state["tok_emb.weight"].float(), args.embed_bits)
    out["tok_emb.weight"] = (q, s, args.embed_bits)
    return out


# -----------------------------
# rANS
# -----------------------------


class Rans:
    """Interleaved rANS: LANES states of 32 bits, 16-bit words, static frequencies per tensor."""

    PROB_BITS = 14
    LANES = 2048
    LOW = 1 << 16

    @classmethod
    def frequencies(cls, symbols: np.ndarray, alphabet: int) -> np.ndarray:
        """Counts scaled to sum to 2^PROB_BITS, every present symbol with one at least."""
        counts = np.bincount(symbols, minlength=alphabet).astype(np.float64)
        total = 1 << cls.PROB_BITS
        freq = np.where(counts > 0, np.maximum(np.floor(counts / counts.sum() * total), 1), 0).astype(np.int64)
        freq[int(freq.argmax())] += total - int(freq.sum())
        return freq

    @classmethod
    def encode(cls, symbols: np.ndarray, freq: np.ndarray) -> bytes:
        cum = np.concatenate(([0], np.cumsum(freq)[:-1])).astype(np.uint64)
        f64 = freq.astype(np.uint64)
        steps = -(-symbols.size // cls.LANES)
        padded = np.full(steps * cls.LANES, int(freq.argmax()), dtype=np.int64)
        padded[: symbols.size] = symbols
        lanes = padded.reshape(steps, cls.LANES)
        x = np.full(cls.LANES, cls.LOW, dtype=np.uint64)
        words: list[np.ndarray] = []
        shift = np.uint64(32 - cls.PROB_BITS)
        for row in lanes[::-1]:
            f, c = f64[row], cum[row]
            full = x >= (f << shift)
            words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
            x[full] >>= np.uint64(16)
            x = ((x // f) << np.uint64(cls.PROB_BITS)) + x % f + c
        return x.astype("<u4").tobytes() + b"".join(w.tobytes() for w in reversed(words))

    @classmethod
    def decode(cls, data: bytes, count: int, freq: np.ndarray) -> np.ndarray:
        cum = np.concatenate(([0], np.cumsum(freq)[:-1])).astype(np.uint64)
        f64 = freq.astype(np.uint64)
        slots = np.repeat(np.arange(freq.size), freq)
        steps = -(-count // cls.LANES)
        x = np.frombuffer(data, dtype="<u4", count=cls.LANES).astype(np.uint64)
        words = np.frombuffer(data, dtype="<u2", offset=4 * cls.LANES).astype(np.uint64)
        out = np.empty((steps, cls.LANES), dtype=np.int64)
        mask, at = np.uint64((1 << cls.PROB_BITS) - 1), 0
        for t in range(steps):
            slot = x & mask
            s = slots[slot.astype(np.int64)]
            out[t] = s
            x = f64[s] * (x >> np.uint64(cls.PROB_BITS)) + slot - cum[s]
            empty = x < cls.LOW
            n = int(empty.sum())
            x[empty] = (x[empty] << np.uint64(16)) | words[at : at + n]
            at += n
        return out.reshape(-1)[:count]


# -----------------------------
# PACKING
# -----------------------------

MAGIC = b"GSK1"


class Packer:
    """The artifact: magic, header (lzma'd JSON), then the tensors' bytes in the header's order."""

    @staticmethod
    def pack(state: dict[str, Tensor], quantized: dict[str, tuple[Tensor, Tensor, int]]) -> bytes:
        entries: list[dict] = []
        body = io.BytesIO()
        small = io.BytesIO()
        for name in sorted(state):
            if name not in quantized:
                t = state[name].detach().cpu()
                small.write(t.half().numpy().tobytes())
                entries.append({"name": name, "shape": list(t.shape), "kind": "half"})
                continue
            q, s, bits = quantized[name]
            symbols = (q.cpu().numpy().astype(np.int64) + (1 << (bits - 1))).reshape(-1)
            freq = Rans.frequencies(symbols, 1 << bits)
            blob = Rans.encode(symbols, freq)
            body.write(blob)
            small.write(s.cpu().half().numpy().tobytes())
            entries.append(
                {
                    "name": name,
                    "shape": list(q.shape),
                    "kind": "rans",
                    "bits": bits,
                    "bytes": len(blob),
                    "freq": freq.tolist(),
                }
            )
        rest = lzma.compress(small.getvalue(), preset=9)
        header = lzma.compress(json.dumps({"small": len(rest), "tensors": entries}).encode(), preset=9)
        return MAGIC + struct.pack("<I", len(header)) + header + rest + body.getvalue()

    @staticmethod
    def unpack(data: bytes) -> dict[str, Tensor]:
        if data[:4] != MAGIC:
            raise ValueError("not a packed model")
        (size,) = struct.unpack_from("<I", data, 4)
        header = json.loads(lzma.decompress(data[8 : 8 + size]))
        at = 8 + size
        small = io.BytesIO(lzma.decompress(data[at : at + header["small"]]))
        at += header["small"]
        out: dict[str, Tensor] = {}
        for e in header["tensors"]:
            shape = tuple(e["shape"])
            if e["kind"] == "half":
                raw = small.read(2 * math.prod(shape))
                out[e["name"]] = torch.from_numpy(np.frombuffer(raw, np.float16).astype(np.float32)).view(shape)
                continue
            freq = np.asarray(e["freq"], dtype=np.int64)
            symbols = Rans.decode(data[at : at + e["bytes"]], math.prod(shape), freq)
            at += e["bytes"]
            q = torch.from_numpy(symbols.astype(np.float32) - (1 << (e["bits"] - 1))).view(shape)
            s = torch.from_numpy(np.frombuffer(small.read(2 * shape[0]), np.float16).astype(np.float32))
            out[e["name"]] = q * s[:, None]
        return out


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def write_artifact(
    args: Hyperparameters, model: GPT, quantized: dict[str, tuple[Tensor, Tensor, int]], log: Log
) -> None:
    blob = Packer.pack(model.state_dict(), quantized)
    args.model_file.write_bytes(blob)
    code, size = code_bytes(), args.model_file.stat().st_size
    total = code + size
    log(f"Serialized model rans: {size} bytes")
    log(f"Code size: {code} bytes")
    log(f"Total submission size: {total} bytes")
    if total > args.size_limit:
        raise RuntimeError(f"submission of {total} bytes exceeds {args.size_limit}")


# -----------------------------
# EVALUATION
# -----------------------------


class ByteCounter:
    """UTF-8 bytes of the original text per token, from the tokenizer's pieces."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> None:
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros(size, dtype=np.int16)
        space = np.zeros(size, dtype=np.bool_)
        edge = np.ones(size, dtype=np.bool_)
        for i in range(int(sp.vocab_size())):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            edge[i] = False
            if sp.is_byte(i):
                base[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("▁"):
                space[i] = True
                piece = piece[1:]
            base[i] = len(piece.encode("utf-8"))
        self.base = torch.from_numpy(base).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.edge = torch.from_numpy(edge).to(device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target; a leading space counts unless a document begins before it."""
        n = self.base[target].to(torch.int64)
        return n + (self.space[target] & ~self.edge[prev]).to(torch.int64)


@dataclass(frozen=True)
class Window:
    """Inputs start .. end - 1; the targets of inputs first .. end - 1 are scored."""

    start: int
    first: int
    end: int


class WindowPlan:
    """Cuts the inputs 0 .. n - 1 into chunks, and a chunk into windows that score each of its targets once."""

    def __init__(self, n: int, args: Hyperparameters) -> None:
        self.n = n
        self.seq_len = args.eval_seq_len
        self.stride = args.eval_stride
        self.chunk = args.chunk_tokens

    def chunks(self) -> list[tuple[int, int]]:
        return [(lo, min(lo + self.chunk, self.n)) for lo in range(0, self.n, self.chunk)]

    def windows(self, lo: int, hi: int) -> list[Window]:
        out = []
        for first in range(lo, hi, self.stride):
            end = min(first + self.stride, hi)
            out.append(Window(max(0, end - self.seq_len), first, end))
        return out


class NgramMixer:
    """Counts of the scored tokens after each context, a whole vocabulary per row, backed off from 4-grams down.

    A row belongs to a hash of the context alone, so that colliding contexts share a row and every row,
    divided by its own sum, is a distribution.
    """

    def __init__(self, args: Hyperparameters, device: torch.device) -> None:
        self.vocab = args.vocab_size
        self.alpha = args.ngram_alpha
        self.max_weight = args.ngram_max_weight
        self.conf = args.ngram_conf
        self.mid = args.ngram_entropy_mid
        self.rows = (self.vocab, args.ngram_rows3, args.ngram_rows4)
        self.counts = [torch.zeros(r, self.vocab, device=device) for r in self.rows]
        self.totals = [torch.zeros(r, device=device) for r in self.rows]

    def _row(self, order: int, history: Tensor) -> Tensor:
        """Row numbers in the table of order + 2, from the last order + 1 tokens. history: [n, 3], latest last."""
        if order == 0:
            return history[:, 2]
        key = history[:, 2] * 36313 + history[:, 1] * 27191
        if order == 2:
            key = key + history[:, 0] * 51647
        return (key ^ (key >> 15)) % self.rows[order]

    def predict(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities over the vocabulary and the evidence seen for the contexts."""
        p = torch.full((history.size(0), self.vocab), 1.0 / self.vocab, device=history.device)
        evidence = torch.zeros(history.size(0), device=history.device)
        for order in range(3):
            row = self._row(order, history)
            total = self.totals[order][row]
            p = (self.counts[order][row] + self.alpha * p) / (total + self.alpha)[:, None]
            evidence = total
        return p, evidence

    def blend(self, logp: Tensor, history: Tensor) -> Tensor:
        """log of (1 - w) * model + w * n-gram; w depends on the context's evidence and the model's entropy."""
        p, evidence = self.predict(history)
        entropy = -(logp.exp() * logp).sum(dim=-1)
        w = self.max_weight * evidence / (evidence + self.conf) * torch.sigmoid(entropy - self.mid)
        return torch.logaddexp(logp + torch.log1p(-w)[:, None], (p * w[:, None]).clamp_min(1e-30).log())

    def absorb(self, history: Tensor, target: Tensor) -> None:
        one = torch.ones(target.numel(), device=target.device)
        for order in range(3):
            row = self._row(order, history)
            self.counts[order].view(-1).index_add_(0, row * self.vocab + target, one)
            self.totals[order].index_add_(0, row, one)


class ChunkScorer:
    """Scores this rank's windows of a chunk and books the sums."""

    def __init__(
        self,
        args: Hyperparameters,
        model: GPT,
        tokens: Tensor,
        plan: WindowPlan,
        counter: ByteCounter,
        mixer: NgramMixer | None,
        world: World,
    ) -> None:
        self.batch = args.eval_batch
        self.model = model
        self.features = torch.compile(model.features, dynamic=False)
        self.tokens = tokens
        self.plan = plan
        self.counter = counter
        self.mixer = mixer
        self.world = world
        self.sums = torch.zeros(3, dtype=torch.float64, device=tokens.device)  # nats, tokens, bytes

    def histories(self, positions: Tensor) -> Tensor:
        """The three tokens up to and with each input position, latest last."""
        offsets = torch.tensor([-2, -1, 0], device=positions.device)
        return self.tokens[(positions[:, None] + offsets).clamp_min(0)]

    def score(self, lo: int, hi: int) -> None:
        mine = self.plan.windows(lo, hi)[self.world.rank :: self.world.size]
        self.model.eval()
        with torch.no_grad():
            for i in range(0, len(mine), self.batch):
                self._score_batch(mine[i : i + self.batch])

    def _score_batch(self, windows: list[Window]) -> None:
        ids = torch.zeros(self.batch, self.plan.seq_len, dtype=torch.int64, device=self.tokens.device)
        for r, w in enumerate(windows):
            ids[r, : w.end - w.start] = self.tokens[w.start : w.end]
        h = self.features(ids)
        rows = [h[r, w.first - w.start : w.end - w.start] for r, w in enumerate(windows)]
        positions = torch.cat([torch.arange(w.first, w.end, device=ids.device) for w in windows])
        logp = F.log_softmax(self.model.head(torch.cat(rows)), dim=-1)
        if self.mixer is not None:
            logp = self.mixer.blend(logp, self.histories(positions))
        prev, target = self.tokens[positions], self.tokens[positions + 1]
        nll = -logp.gather(1, target[:, None])[:, 0]
        self.sums[0] += nll.double().sum()
        self.sums[1] += target.numel()
        self.sums[2] += self.counter.count(prev, target).sum()

    def result(self) -> tuple[float, float, int, int]:
        """Loss in nats per token, bits per byte, tokens and bytes, over all ranks."""
        nats, count, size = self.world.gather(self.sums).sum(dim=0).tolist()
        return nats / count, nats / math.log(2.0) / size, int(count), int(size)


class TTTTrainer:
    """SGD on chunks that have been scored; every rank takes a share of the sequences, gradients are averaged."""

    def __init__(self, args: Hyperparameters, model: GPT, tokens: Tensor, chunks: int, world: World) -> None:
        self.args = args
        self.model = model
        self.tokens = tokens
        self.chunks = chunks
        self.world = world
        for p in model.parameters():
            p.requires_grad_(False)
        self.params = [p for block in model.blocks[args.ttt_first_block :] for p in block.parameters()]
        for p in self.params:
            p.requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.params, lr=args.ttt_lr, momentum=args.ttt_momentum)

    def fit(self, chunk: int, lo: int, hi: int) -> None:
        """Trains on the inputs lo .. hi - 1, whose targets are all scored."""
        a = self.args
        n = (hi - lo) // a.eval_seq_len
        if n < self.world.size:
            return
        n -= n % self.world.size
        x = self.tokens[lo : lo + n * a.eval_seq_len].view(n, a.eval_seq_len)[self.world.rank :: self.world.size]
        y = self.tokens[lo + 1 : lo + 1 + n * a.eval_seq_len].view(n, a.eval_seq_len)[
            self.world.rank :: self.world.size
        ]
        for group in self.optimizer.param_groups:
            group["lr"] = a.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * chunk / max(self.chunks - 1, 1)))
        self.model.train()
        for _ in range(a.ttt_epochs):
            self.optimizer.zero_grad(set_to_none=True)
            self.model(x, y).backward()
            for p in self.params:
                self.world.sum_(p.grad).div_(self.world.size)
            torch.nn.utils.clip_grad_norm_(self.params, a.ttt_grad_clip)
            self.optimizer.step()


class OnePassEvaluator:
    """Each chunk is scored, then counted, then trained on; nothing is scored twice."""

    def __init__(
        self, args: Hyperparameters, model: GPT, tokens: Tensor, counter: ByteCounter, world: World, log: Log
    ) -> None:
        self.args = args
        self.world = world
        self.log = log
        self.tokens = tokens
        self.plan = WindowPlan(tokens.numel() - 1, args)
        self.chunks = self.plan.chunks()
        self.mixer = NgramMixer(args, tokens.device) if args.ngram_enabled else None
        self.trainer = TTTTrainer(args, model, tokens, len(self.chunks), world) if args.ttt_enabled else None
        self.scorer = ChunkScorer(args, model, tokens, self.plan, counter, self.mixer, world)

    def run(self, started: float) -> tuple[float, float]:
        adapting = self.trainer is not None
        for c, (lo, hi) in enumerate(self.chunks):
            self.scorer.score(lo, hi)
            if c + 1 == len(self.chunks):
                break
            if self.mixer is not None:
                positions = torch.arange(lo, hi, device=self.tokens.device)
                self.mixer.absorb(self.scorer.histories(positions), self.tokens[positions + 1])
            if adapting:
                self.trainer.fit(c, lo, hi)
            if c % 32 == 0:
                loss, bpb, count, _ = self.scorer.result()
                spent = time.perf_counter() - started
                self.log(f"  chunk {c + 1}/{len(self.chunks)} tokens:{count} bpb:{bpb:.6f} time:{spent:.1f}s")
                left = self.args.eval_budget_seconds - spent
                if adapting and self.world.any(left < spent / (c + 1) * 0.6 * (len(self.chunks) - c - 1)):
                    adapting = False
                    self.log("  adaptation ends here, the rest is scored with the weights as they are")
        loss, bpb, count, size = self.scorer.result()
        if count != self.plan.n:
            raise RuntimeError(f"scored {count} tokens of {self.plan.n}")
        self.log(f"eval tokens:{count} bytes:{size} bytes_per_token:{size / count:.4f}")
        return loss, bpb


@torch.no_grad()
def quick_validate(
    args: Hyperparameters, model: nn.Module, tokens: Tensor, counter: ByteCounter, world: World
) -> tuple[float, float]:
    """Plain validation in disjoint windows, for the log."""
    seq = args.train_seq_len
    n = (tokens.numel() - 1) // seq
    sums = torch.zeros(3, dtype=torch.float64, device=tokens.device)
    model.eval()
    for i in range(world.rank * 16, n, world.size * 16):
        k = min(16, n - i)
        x = tokens[i * seq : (i + k) * seq].view(k, seq)
        y = tokens[i * seq + 1 : (i + k) * seq + 1].view(k, seq)
        sums[0] += model(x, y).double() * y.numel()
        sums[1] += y.numel()
        sums[2] += counter.count(x, y).sum()
    model.train()
    nats, count, size = world.gather(sums).sum(dim=0).tolist()
    return nats / count, nats / math.log(2.0) / size


# -----------------------------
# TRAINING
# -----------------------------


class Clock:
    """Training time in milliseconds; stands still while paused."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def resume(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def pause(self) -> float:
        torch.cuda.synchronize()
        self.spent = self.now()
        self.since = None
        return self.spent

    def now(self) -> float:
        return self.spent + (0.0 if self.since is None else 1000.0 * (time.perf_counter() - self.since))


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, budget_ms: float) -> float:
    """Constant, then linear to zero; the warmdown is measured in time once steps have a known length."""
    if args.warmdown_iters <= 0:
        return 1.0
    if budget_ms <= 0 or step < 10:
        left = args.iterations - step
        return min(1.0, left / args.warmdown_iters)
    warmdown_ms = args.warmdown_iters * elapsed_ms / step
    return min(1.0, max(budget_ms - elapsed_ms, 0.0) / warmdown_ms)


def accumulate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradients of the mean loss over micro batches; syncs the ranks at the last one."""
    total = torch.zeros((), device=batches[0][0].device)
    for i, (x, y) in enumerate(batches):
        if isinstance(model, DDP):
            model.require_backward_grad_sync = i == len(batches) - 1
        loss = model(x, y)
        (loss / len(batches)).backward()
        total += loss.detach() / len(batches)
    return total


def warm_up(
    args: Hyperparameters,
    model: GPT,
    train_model: nn.Module,
    optimizers: OptimizerSet,
    loader: PrefetchLoader,
    grad_accum: int,
    log: Log,
) -> None:
    """Compiles and primes kernels with training steps that are taken back."""
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    states = optimizers.state_dicts()
    for i in range(args.warmup_steps):
        optimizers.zero_grad()
        accumulate(train_model, [loader.next() for _ in range(grad_accum)])
        optimizers.step()
        if i + 1 == args.warmup_steps:
            log(f"warmup_step:{i + 1}/{args.warmup_steps}")
    model.load_state_dict(weights)
    optimizers.load_state_dicts(states)
    optimizers.zero_grad()


def train(
    args: Hyperparameters,
    model: GPT,
    train_model: nn.Module,
    loader: PrefetchLoader,
    optimizers: OptimizerSet,
    val_tokens: Tensor,
    counter: ByteCounter,
    world: World,
    clock: Clock,
    grad_accum: int,
    log: Log,
) -> None:
    """Trains until the iterations or the time are used up; leaves the averaged weights in the model."""
    budget_ms = 1000.0 * (args.max_wallclock_seconds - args.build_reserve_seconds)
    ema = WeightEMA(model, args.ema_decay)
    world.barrier()
    clock.resume()
    step, stop = 0, False
    while step < args.iterations and not stop:
        if args.val_loss_every > 0 and step % args.val_loss_every == 0:
            clock.pause()
            val_loss, val_bpb = quick_validate(args, model, val_tokens, counter, world)
            log(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{clock.now():.0f}ms"
            )
            world.barrier()
            clock.resume()
        optimizers.schedule(step, lr_scale(args, step, clock.now(), budget_ms))
        optimizers.zero_grad()
        loss = accumulate(train_model, [loader.next() for _ in range(grad_accum)])
        if args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizers.step()
        ema.update(model)
        step += 1
        elapsed = clock.now()
        if step <= 10 or step % args.train_log_every == 0:
            log(
                f"step:{step}/{args.iterations} train_loss:{loss.item():.4f} "
                f"train_time:{elapsed:.0f}ms step_avg:{elapsed / step:.2f}ms"
            )
        stop = world.any(budget_ms > 0 and elapsed >= budget_ms)
    clock.pause()
    if stop:
        log(f"stopping_early: wallclock_cap train_time:{clock.now():.0f}ms step:{step}/{args.iterations}")
    ema.copy_to(model)
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024**2} MiB")


# -----------------------------
# STAGES
# -----------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def set_backends() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def log_environment(args: Hyperparameters, world: World, log: Log) -> None:
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version.split()[0]}, PyTorch {torch.__version__}")
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    log(smi.stdout, console=False)
    log(f"world_size:{world.size} seed:{args.seed}")


def build_artifact(
    args: Hyperparameters, world: World, sp: spm.SentencePieceProcessor, val_tokens: Tensor, log: Log
) -> None:
    """Training and quantisation, inside the wall-clock cap; then the artifact is written."""
    grad_accum = 8 // world.size
    counter = ByteCounter(sp, args.vocab_size, world.device)
    model = build_model(args, world, sp.bos_id())
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    train_model = DDP(compiled, device_ids=[world.local_rank], broadcast_buffers=False) if world.distributed else compiled
    optimizers = make_optimizers(args, model, world)
    local_tokens = args.train_batch_tokens // (world.size * grad_accum)

    loader = PrefetchLoader(args, world, local_tokens, args.train_files)
    if args.warmup_steps > 0:
        warm_up(args, model, train_model, optimizers, loader, grad_accum, log)
        loader.close()
        loader = PrefetchLoader(args, world, local_tokens, args.train_files)

    clock = Clock()
    train(
        args, model, train_model, loader, optimizers, val_tokens, counter, world, clock, grad_accum, log
    )
    clock.resume()
    hessians = collect_hessians(args, model, loader, world)
    calib_ms = clock.now()
    quantized = quantize_model(args, model, hessians, world)
    world.barrier()
    build_ms = clock.pause()
    loader.close()
    log(f"gptq: hessians ready at {calib_ms:.0f}ms, train+gptq {build_ms:.0f}ms")
    if build_ms > 1000.0 * args.max_wallclock_seconds:
        raise RuntimeError("training and quantisation took longer than the cap")
    if world.master:
        write_artifact(args, model, quantized, log)
    world.barrier()


def load_artifact(args: Hyperparameters, world: World, bos_id: int) -> GPT:
    """The model as the artifact holds it."""
    model = GPT(args, bos_id)
    model.load_state_dict(Packer.unpack(args.model_file.read_bytes()), strict=True)
    return model.to(world.device)


def evaluate(
    args: Hyperparameters, world: World, sp: spm.SentencePieceProcessor, val_tokens: Tensor, log: Log
) -> tuple[float, float]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    model = load_artifact(args, world, sp.bos_id())
    counter = ByteCounter(sp, args.vocab_size, world.device)
    log(f"eval: seq_len:{args.eval_seq_len} stride:{args.eval_stride} chunk:{args.chunk_tokens}")
    log(f"eval: ttt:{args.ttt_enabled} epochs:{args.ttt_epochs} ngram:{args.ngram_enabled}")
    evaluator = OnePassEvaluator(args, model, val_tokens, counter, world, log)
    loss, bpb = evaluator.run(started)
    world.barrier()
    log(f"final val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000.0 * (time.perf_counter() - started):.0f}ms")
    return loss, bpb


def main() -> None:
    args = Hyperparameters()
    world = World()
    log = Log(world, args.run_id)
    set_backends()
    seed_everything(args.seed)
    log_environment(args, world, log)
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} but the tokenizer has {sp.vocab_size()}")
    val_tokens = load_validation(args.val_files).to(torch.int64).to(world.device)
    log(f"val tokens:{val_tokens.numel() - 1} from {args.val_files}")

    build_artifact(args, world, sp, val_tokens, log)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    loss, bpb = evaluate(args, world, sp, val_tokens, log)
    log(f"final_one_pass_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    world.close()


if __name__ == "__main__":
    main()
