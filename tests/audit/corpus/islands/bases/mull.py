"""train_gpt.py: 9-layer GQA transformer, Muon + AdamW, EMA, mixed int5/int6 GPTQ, and a document-level copy cache.

The validation stream is split at BOS into documents. Each document is walked left to right by one lane of a
fixed-size batch. Every token's probability is a mixture of the transformer's softmax and of a pointer distribution over
what followed earlier occurrences of the current context in the same document, decayed exponentially with distance.
Both parts are full distributions over the vocabulary and the mixing gate sees only the context. The handful of copy
and gate parameters are fitted on training shards, within the training budget, and travel in the artifact.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import contextlib
import copy
import glob
import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# ---------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: bool) -> bool:
    return os.environ.get(name, "1" if default else "0") not in ("0", "", "false", "False")


def env_str(name: str, default: str) -> str:
    return os.environ.get(name, default)


@dataclass(frozen=True)
class Settings:
    # data
    data_path: str = env_str("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = env_str("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    vocab_size: int = env_int("VOCAB_SIZE", 1024)
    bos_id: int = env_int("BOS_ID", 1)
    run_id: str = env_str("RUN_ID", str(uuid.uuid4())[:8])
    seed: int = env_int("SEED", 1337)

    # model
    num_layers: int = env_int("NUM_LAYERS", 9)
    model_dim: int = env_int("MODEL_DIM", 512)
    num_heads: int = env_int("NUM_HEADS", 8)
    num_kv_heads: int = env_int("NUM_KV_HEADS", 4)
    mlp_mult: float = env_float("MLP_MULT", 3.0)
    rope_base: float = env_float("ROPE_BASE", 10000.0)
    rope_dims: int = env_int("ROPE_DIMS", 32)
    logit_softcap: float = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain: float = env_float("QK_GAIN", 1.5)

    # training
    iterations: int = env_int("ITERATIONS", 20000)
    train_seq_len: int = env_int("TRAIN_SEQ_LEN", 2048)
    train_batch_tokens: int = env_int("TRAIN_BATCH_TOKENS", 786432)
    warmdown_iters: int = env_int("WARMDOWN_ITERS", 3300)
    warmup_steps: int = env_int("WARMUP_STEPS", 20)
    budget_seconds: float = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve_seconds: float = env_float("RESERVE_SECONDS", 42.0)
    matrix_lr: float = env_float("MATRIX_LR", 0.025)
    scalar_lr: float = env_float("SCALAR_LR", 0.025)
    embed_lr: float = env_float("EMBED_LR", 0.035)
    muon_momentum: float = env_float("MUON_MOMENTUM", 0.99)
    muon_momentum_start: float = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps: int = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_steps: int = env_int("MUON_STEPS", 5)
    muon_wd: float = env_float("MUON_WD", 0.04)
    adam_wd: float = env_float("ADAM_WD", 0.04)
    grad_clip: float = env_float("GRAD_CLIP", 0.3)
    ema_decay: float = env_float("EMA_DECAY", 0.997)
    log_every: int = env_int("LOG_EVERY", 250)
    val_every: int = env_int("VAL_EVERY", 4000)
    val_probe_tokens: int = env_int("VAL_PROBE_TOKENS", 4 * 1024 * 1024)

    # quantisation
    calib_rows: int = env_int("CALIB_ROWS", 96)
    gptq_block: int = env_int("GPTQ_BLOCK", 128)
    gptq_damp: float = env_float("GPTQ_DAMP", 0.01)
    mlp_bits: int = env_int("MLP_BITS", 5)
    attn_bits: int = env_int("ATTN_BITS", 6)
    embed_bits: int = env_int("EMBED_BITS", 6)
    artifact: str = env_str("ARTIFACT", "final_model.mull.z")
    size_limit: int = env_int("SIZE_LIMIT", 16_000_000)

    # copy cache and its gate
    copy_enabled: bool = env_flag("COPY_ENABLED", True)
    copy_history: int = env_int("COPY_HISTORY", 4096)
    gate_steps: int = env_int("GATE_STEPS", 60)
    gate_lr: float = env_float("GATE_LR", 0.05)
    gate_docs: int = env_int("GATE_DOCS", 48)

    # evaluation
    eval_ctx: int = env_int("EVAL_CTX", 2048)
    eval_stride: int = env_int("EVAL_STRIDE", 512)
    eval_lanes: int = env_int("EVAL_LANES", 32)

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    @property
    def train_seconds(self) -> float:
        """What the optimizer may use: the rest of the budget belongs to calibration, GPTQ and the gate."""
        return self.budget_seconds - self.reserve_seconds


# ---------------------------------------------------------------------------
# context managers and process group
# ---------------------------------------------------------------------------


class Timer:
    """Wall clock with device synchronisation on both ends; adds up over uses, may be read while running."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.total = 0.0
        self._since: float | None = None

    def __enter__(self) -> "Timer":
        torch.cuda.synchronize()
        self._since = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        torch.cuda.synchronize()
        if self._since is not None:
            self.total += time.perf_counter() - self._since
        self._since = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self.total + running

    @property
    def ms(self) -> float:
        return 1000.0 * self.seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for a diagnostic that is no part of training."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode without gradients; puts back the mode it found."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was_training)


@contextlib.contextmanager
def hooked(handles: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    @classmethod
    def start(cls) -> "World":
        rank = int(os.environ.get("RANK", 0))
        size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group(backend="nccl", device_id=device)
        return cls(rank, size, local_rank, device)

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        return self.sum_(tensor).div_(self.size)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class Logger:
    def __init__(self, world: World, run_id: str) -> None:
        self.main = world.main
        self.path = Path("logs") / f"{run_id}.txt"
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.main:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as sink:
            sink.write(text + "\n")


# ---------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------

SHARD_MAGIC = 20240520
HEADER_WORDS = 256


def read_shard(path: Path) -> Tensor:
    """One .bin shard: 256 int32 of header (magic, version, count), then uint16 tokens."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_WORDS)
    if header.size != HEADER_WORDS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"{path}: not a token shard")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_WORDS * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: {tokens.size} tokens, header says {count}")
    return torch.from_numpy(tokens.astype(np.int32))


def shard_paths(pattern: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no shards match {pattern}")
    return paths


class TrainStream:
    """Endless tokens of the training shards, one after the other; every rank reads the same and takes its slice."""

    def __init__(self, pattern: str, world: World, first_shard: int = 0) -> None:
        self.paths = shard_paths(pattern)
        self.world = world
        self.index = first_shard % len(self.paths)
        self.tokens = read_shard(self.paths[self.index])
        self.offset = 0

    def take(self, count: int) -> Tensor:
        pieces: list[Tensor] = []
        while count > 0:
            left = self.tokens.numel() - self.offset
            if left <= 0:
                self.index = (self.index + 1) % len(self.paths)
                self.tokens = read_shard(self.paths[self.index])
                self.offset = 0
                continue
            n = min(left, count)
            pieces.append(self.tokens[self.offset : self.offset + n])
            self.offset += n
            count -= n
        return torch.cat(pieces)

    def batch(self, total_tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """This rank's (inputs, targets) of a global batch of total_tokens."""
        rows = total_tokens // (self.world.size * seq_len)
        span = rows * seq_len + 1
        chunk = self.take(span * self.world.size)
        mine = chunk[self.world.rank * span : (self.world.rank + 1) * span].long()
        x = mine[:-1].view(rows, seq_len)
        y = mine[1:].view(rows, seq_len)
        return x.to(self.world.device, non_blocking=True), y.to(self.world.device, non_blocking=True)


class DocumentStream:
    """A token stream cut at BOS.

    Document d holds its own tokens, BOS first, and as a last target the BOS of document d + 1, so that over all
    documents each token of the stream but the very first is a target once and only once.
    """

    def __init__(self, tokens: Tensor, bos_id: int) -> None:
        self.tokens = tokens
        starts = (tokens == bos_id).nonzero().flatten().tolist()
        if not starts or starts[0] != 0:
            starts.insert(0, 0)
        self.starts: list[int] = starts
        self.ends: list[int] = [min(s + 1, tokens.numel()) for s in starts[1:]] + [tokens.numel()]

    @classmethod
    def of_files(cls, pattern: str, bos_id: int) -> "DocumentStream":
        return cls(torch.cat([read_shard(path) for path in shard_paths(pattern)]).contiguous(), bos_id)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, d: int) -> Tensor:
        return self.tokens[self.starts[d] : self.ends[d]]

    @property
    def target_count(self) -> int:
        return self.tokens.numel() - 1

    def share(self, rank: int, size: int) -> range:
        """A contiguous range of documents for one rank, cut so that ranks hold about equally many tokens."""
        total = self.tokens.numel()
        cuts = [0]
        for r in range(1, size):
            goal = total * r // size
            cuts.append(int(np.searchsorted(np.asarray(self.starts), goal)))
        cuts.append(len(self))
        return range(cuts[rank], cuts[rank + 1])


# ---------------------------------------------------------------------------
# bytes
# ---------------------------------------------------------------------------


@dataclass
class ByteTable:
    """UTF-8 bytes of the original text for each target token, given the token before it."""

    base: Tensor  # bytes of the piece without its leading mark
    has_space: Tensor  # the piece begins with the mark of a space
    is_boundary: Tensor  # control, unknown or unused: no space is written after it

    @classmethod
    def of_tokenizer(cls, path: str, vocab_size: int, device: torch.device) -> "ByteTable":
        sp = spm.SentencePieceProcessor(model_file=path)
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros(size, dtype=np.int32)
        has_space = np.zeros(size, dtype=bool)
        is_boundary = np.ones(size, dtype=bool)
        for token in range(int(sp.vocab_size())):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            is_boundary[token] = False
            if sp.is_byte(token):
                base[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith("\u2581"):
                has_space[token] = True
                piece = piece[1:]
            base[token] = len(piece.encode("utf-8"))
        return cls(
            torch.from_numpy(base).to(device),
            torch.from_numpy(has_space).to(device),
            torch.from_numpy(is_boundary).to(device),
        )

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        space = self.has_space[target] & ~self.is_boundary[previous]
        return self.base[target] + space.to(torch.int32)


# ---------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastLinear(nn.Linear):
    """Weights kept in fp32, cast to the activation's type."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        self.register_buffer("inv_freq", base ** (-torch.arange(0, dims, 2).float() / dims), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, T, D]; the first `dims` channels are rotated, the others pass."""
        t = torch.arange(x.size(2), device=x.device, dtype=torch.float32)
        angle = torch.outer(t, self.inv_freq)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., : self.dims].chunk(2, dim=-1)
        turned = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
        return torch.cat((turned, x[..., self.dims :]), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: Settings) -> None:
        super().__init__()
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.q = CastLinear(cfg.model_dim, cfg.model_dim)
        self.k = CastLinear(cfg.model_dim, kv_dim)
        self.v = CastLinear(cfg.model_dim, kv_dim)
        self.o = CastLinear(cfg.model_dim, cfg.model_dim)
        nn.init.zeros_(self.o.weight)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain))
        self.rotary = Rotary(min(cfg.rope_dims, self.head_dim), cfg.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q = self.q(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q = self.rotary(rms_norm(q)) * self.q_gain.to(q.dtype)[None, :, None, None]
        k = self.rotary(rms_norm(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.o(y.transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    def __init__(self, cfg: Settings) -> None:
        super().__init__()
        hidden = int(cfg.model_dim * cfg.mlp_mult)
        self.up = CastLinear(cfg.model_dim, hidden)
        self.down = CastLinear(hidden, cfg.model_dim)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: Settings, layer: int) -> None:
        super().__init__()
        self.attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.ln_gain = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x) * self.ln_gain)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.ln_gain)


class GPT(nn.Module):
    """U-shaped residual stream: the second half of the layers receives weighted skips from the first."""

    def __init__(self, cfg: Settings) -> None:
        super().__init__()
        self.softcap = cfg.logit_softcap
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        nn.init.normal_(self.embed.weight, std=0.005)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        self.encoders = cfg.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(min(self.encoders, cfg.num_layers - self.encoders), cfg.model_dim))

    def logits(self, tokens: Tensor) -> Tensor:
        x = rms_norm(self.embed(tokens).to(torch.bfloat16))
        x0 = x
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < self.encoders:
                x = block(x, x0)
                skips.append(x)
            else:
                j = i - self.encoders
                if skips and j < self.skip_weights.size(0):
                    x = x + self.skip_weights[j].to(x.dtype) * skips.pop()
                x = block(x, x0)
        raw = F.linear(rms_norm(x), self.embed.weight.to(x.dtype))
        return self.softcap * torch.tanh(raw.float() / self.softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(tokens)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


# ---------------------------------------------------------------------------
# optimizers
# ---------------------------------------------------------------------------


@torch.compile
def newton_schulz(grad: Tensor, steps: int) -> Tensor:
    """Quintic iteration towards the nearest orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the matrices are dealt out to ranks and the updates shared by all-reduce."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, steps: int, wd: float) -> None:
        super().__init__(list(params), dict(lr=lr, momentum=momentum, steps=steps, wd=wd))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        rank = dist.get_rank() if dist.is_initialized() else 0
        size = dist.get_world_size() if dist.is_initialized() else 1
        for group in self.param_groups:
            params: list[nn.Parameter] = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % size == rank and p.grad is not None:
                    state = self.state[p]
                    buf = state.setdefault("momentum", torch.zeros_like(p.grad))
                    buf.mul_(group["momentum"]).add_(p.grad)
                    update = newton_schulz(p.grad.add(buf, alpha=group["momentum"]), group["steps"])
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.flatten()
                at += p.numel()
            if size > 1:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["wd"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


def make_optimizers(model: GPT, cfg: Settings) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 2]
    chosen = {id(p) for p in matrices}
    scalars = [p for n, p in model.named_parameters() if id(p) not in chosen and not n.startswith("embed")]
    muon = Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_steps, cfg.muon_wd)
    adam = torch.optim.AdamW(
        [
            dict(params=[model.embed.weight], lr=cfg.embed_lr, weight_decay=cfg.adam_wd),
            dict(params=scalars, lr=cfg.scalar_lr, weight_decay=0.0),
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [muon, adam]
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


class Ema:
    """Exponential moving average of the weights, the only average that is ever used."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().float().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, p in model.state_dict().items():
            self.shadow[name].lerp_(p.detach().float(), 1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        model.load_state_dict(self.shadow)


# ---------------------------------------------------------------------------
# copy cache
# ---------------------------------------------------------------------------


class CopyMixer(nn.Module):
    """Pointer distribution over earlier continuations and the gate that mixes it with the model.

    Eleven scalars: one decay length, two bonuses for longer matches, and a logistic gate on six features of the context
    plus bias and a sharpness of the model's own distribution. Fitted on training text, stored in the artifact.
    """

    NAMES = ("log_tau", "bonus", "gate_w", "gate_b", "log_temp")

    def __init__(self) -> None:
        super().__init__()
        self.log_tau = nn.Parameter(torch.tensor(math.log(600.0)))
        self.bonus = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.gate_w = nn.Parameter(torch.zeros(6))
        self.gate_b = nn.Parameter(torch.tensor(-3.0))
        self.log_temp = nn.Parameter(torch.zeros(()))

    def pointer(self, seq: Tensor, history: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
        """seq: [B, H + S], the last S of which are to be predicted; -1 is padding.

        Row k predicts seq[H + k]; its context ends at seq[H + k - 1]. A column c counts for row k when seq[c - 1] equals
        that last token of the context and c lies strictly before the position that is predicted.
        Returns the distribution [B, S, V] (zero where nothing matches), its mass [B, S] and the longest match [B, S].
        """
        width = seq.size(1)
        steps = width - history
        device = seq.device
        pad = seq.new_full((seq.size(0), 3), -1)
        padded = torch.cat((pad, seq), dim=1)
        col = torch.arange(width, device=device)
        row = history + torch.arange(steps, device=device)
        earlier = col[None, :] < row[:, None]
        alive = (seq >= 0)[:, None, :] & earlier[None]

        def same(order: int) -> Tensor:
            keys = padded[:, 3 - order : 3 - order + width]
            queries = keys[:, history:]
            return (queries[:, :, None] == keys[:, None, :]) & (queries >= 0)[:, :, None]

        match1 = same(1) & alive
        match2 = match1 & same(2)
        match3 = match2 & same(3)
        age = (row[:, None] - col[None, :]).clamp_min(0).float()
        decay = torch.exp(-age / self.log_tau.exp())
        lift = F.softplus(self.bonus)
        weight = (match1.float() + lift[0] * match2.float() + lift[1] * match3.float()) * decay[None]
        mass = weight.sum(-1)
        index = seq.clamp_min(0)[:, None, :].expand(-1, steps, -1)
        table = torch.zeros(seq.size(0), steps, vocab, device=device).scatter_add(2, index, weight)
        table = table / table.sum(-1, keepdim=True).clamp_min(1e-20)
        longest = match1.any(-1).float() + match2.any(-1).float() + match3.any(-1).float()
        return table, mass, longest

    def gate(self, model_probs: Tensor, pointer: Tensor, mass: Tensor, longest: Tensor) -> Tensor:
        """Weight of the pointer, from the two distributions and the match, never from what comes next."""
        top, _ = model_probs.max(-1)
        entropy = -(model_probs * model_probs.clamp_min(1e-12).log()).sum(-1) / math.log(model_probs.size(-1))
        peak, where = pointer.max(-1)
        agree = model_probs.gather(-1, where[..., None]).squeeze(-1)
        features = torch.stack((top, entropy, peak, agree, torch.log1p(mass), longest / 3.0), dim=-1)
        share = torch.sigmoid(features @ self.gate_w + self.gate_b)
        return torch.where(mass > 1e-12, share, torch.zeros_like(share))

    def mix(self, logits: Tensor, seq: Tensor, history: int) -> Tensor:
        """[B, S, V] logits and the tokens around them -> [B, S, V] probabilities that sum to one."""
        model_probs = F.softmax(logits.float() * self.log_temp.exp(), dim=-1)
        pointer, mass, longest = self.pointer(seq, history, logits.size(-1))
        share = self.gate(model_probs, pointer, mass, longest)[..., None]
        return (1.0 - share) * model_probs + share * pointer

    def export(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).detach().float().cpu().flatten().tolist() for name in self.NAMES}

    def restore(self, values: dict[str, list[float]]) -> "CopyMixer":
        with torch.no_grad():
            for name in self.NAMES:
                p = getattr(self, name)
                p.copy_(torch.tensor(values[name], dtype=torch.float32).view_as(p))
        return self


class LaneHistory:
    """For each lane of the batch the last tokens of its document that are already scored (-1 before its start)."""

    def __init__(self, lanes: int, history: int, device: torch.device) -> None:
        self.size = history
        self.tokens = torch.full((lanes, history), -1, dtype=torch.long, device=device)

    def open(self, lane: int, first_token: int) -> None:
        """A new document: forgets the old one; its BOS is given, not predicted."""
        self.tokens[lane].fill_(-1)
        self.tokens[lane, -1] = first_token

    def around(self, targets: Tensor) -> Tensor:
        return torch.cat((self.tokens, targets), dim=1)

    def push(self, targets: Tensor, counts: Tensor) -> None:
        """Shifts in each lane's scored tokens; counts says how many of the row are real."""
        joined = torch.cat((self.tokens, targets), dim=1)
        index = torch.arange(self.size, device=joined.device)[None] + counts[:, None]
        self.tokens = joined.gather(1, index)


# ---------------------------------------------------------------------------
# walking documents in lanes
# ---------------------------------------------------------------------------


@dataclass
class Piece:
    """One step of all lanes: every lane has up to `stride` targets of its document, or none."""

    inputs: Tensor  # [B, ctx] context and targets' predecessors, padded on the right
    where: Tensor  # [B, S] column of inputs whose logits predict each target
    previous: Tensor  # [B, S]
    targets: Tensor  # [B, S]
    counts: Tensor  # [B] real targets in each row
    opened: list[tuple[int, int]] = field(default_factory=list)  # lanes at a document's start, and its first token

    @property
    def mask(self) -> Tensor:
        return torch.arange(self.targets.size(1), device=self.targets.device)[None] < self.counts[:, None]


def walk(stream: DocumentStream, docs: Iterable[int], cfg: Settings, device: torch.device) -> Iterator[Piece]:
    """Packs documents into cfg.eval_lanes lanes; a lane that has finished its document takes the next in order."""
    lanes, ctx, stride = cfg.eval_lanes, cfg.eval_ctx, cfg.eval_stride
    queue = iter(docs)
    current: list[Tensor | None] = [None] * lanes
    place = [0] * lanes
    while True:
        inputs = torch.zeros(lanes, ctx, dtype=torch.long)
        where = torch.zeros(lanes, stride, dtype=torch.long)
        previous = torch.zeros(lanes, stride, dtype=torch.long)
        targets = torch.zeros(lanes, stride, dtype=torch.long)
        counts = torch.zeros(lanes, dtype=torch.long)
        opened: list[tuple[int, int]] = []
        for lane in range(lanes):
            while current[lane] is None:
                d = next(queue, None)
                if d is None:
                    break
                doc = stream[d]
                if doc.numel() < 2:
                    continue
                current[lane], place[lane] = doc.long(), 1
                opened.append((lane, int(doc[0])))
            doc = current[lane]
            if doc is None:
                continue
            a = place[lane]
            b = min(a + stride, doc.numel())
            lo = max(0, b - 1 - ctx)
            n = b - a
            inputs[lane, : b - 1 - lo] = doc[lo : b - 1]
            where[lane, :n] = torch.arange(a - 1 - lo, b - 1 - lo)
            previous[lane, :n] = doc[a - 1 : b - 1]
            targets[lane, :n] = doc[a:b]
            counts[lane] = n
            place[lane] = b
            if b == doc.numel():
                current[lane] = None
        if int(counts.sum()) == 0:
            return
        moved = [t.to(device, non_blocking=True) for t in (inputs, where, previous, targets, counts)]
        yield Piece(*moved, opened=opened)


def pick_logits(logits: Tensor, where: Tensor) -> Tensor:
    """[B, ctx, V] -> the [B, S, V] that predict the targets."""
    return logits.gather(1, where[..., None].expand(-1, -1, logits.size(-1)))


# ---------------------------------------------------------------------------
# quantisation
# ---------------------------------------------------------------------------


def collect_hessians(model: GPT, stream: TrainStream, cfg: Settings, world: World) -> dict[str, Tensor]:
    """Sum of x x^T at the input of each linear layer, over rows of the training stream, averaged over ranks."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, CastLinear)}
    hessians = {
        name: torch.zeros(m.in_features, m.in_features, device=world.device, dtype=torch.float32)
        for name, m in linears.items()
    }

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
            x = args[0].reshape(-1, args[0].size(-1)).float()
            hessians[name].addmm_(x.T, x)

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in linears.items()]
    with hooked(handles), evaluating(model):
        for _ in range(max(1, cfg.calib_rows // (8 * world.size))):
            x, _ = stream.batch(8 * world.size * cfg.train_seq_len, cfg.train_seq_len)
            model.logits(x)
    for h in hessians.values():
        world.mean_(h)
    return hessians


def row_scales(weight: Tensor, bits: int) -> Tensor:
    """Per-row scale of least squared error among a few clip ratios, rounded to the fp16 that is stored."""
    top = 2 ** (bits - 1) - 1
    peak = weight.abs().amax(1).clamp_min(1e-8)
    best = torch.full_like(peak, float("inf"))
    chosen = (peak / top).half().float().clamp_min(1e-7)
    for ratio in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7):
        scale = (peak * ratio / top).half().float().clamp_min(1e-7)
        q = (weight / scale[:, None]).round().clamp(-top - 1, top)
        error = (q * scale[:, None] - weight).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
    return chosen


def gptq(weight: Tensor, hessian: Tensor, bits: int, cfg: Settings) -> tuple[Tensor, Tensor]:
    """Column-wise rounding; each column's error is fed back into the columns not yet rounded."""
    w = weight.detach().float().clone()
    rows, cols = w.shape
    top = 2 ** (bits - 1) - 1
    h = hessian.clone()
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(cfg.gptq_damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale = row_scales(w, bits)
    q = torch.zeros_like(w)
    for start in range(0, cols, cfg.gptq_block):
        end = min(start + cfg.gptq_block, cols)
        block = w[:, start:end].clone()
        feedback = torch.zeros_like(block)
        inv = inverse[start:end, start:end]
        for j in range(end - start):
            col = block[:, j]
            code = (col / scale).round().clamp(-top - 1, top)
            q[:, start + j] = code
            err = (col - code * scale) / inv[j, j]
            block[:, j:] -= err[:, None] * inv[j, j:][None]
            feedback[:, j] = err
        w[:, end:] -= feedback @ inverse[start:end, end:]
    return q[:, order.argsort()].to(torch.int8), scale.half()


def round_plain(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    scale = row_scales(weight.detach().float(), bits)
    code = (weight.detach().float() / scale[:, None]).round().clamp(-top - 1, top)
    return code.to(torch.int8), scale.half()


def bits_of(name: str, cfg: Settings) -> int:
    if name.startswith("embed"):
        return cfg.embed_bits
    return cfg.mlp_bits if ".mlp." in name else cfg.attn_bits


@dataclass
class Coded:
    codes: Tensor  # int8 [rows, cols]
    scale: Tensor  # fp16 [rows]
    bits: int

    def dense(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]


def quantise(
    state: dict[str, Tensor], hessians: dict[str, Tensor], cfg: Settings
) -> tuple[dict[str, Coded], dict[str, Tensor]]:
    coded: dict[str, Coded] = {}
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.ndim != 2 or min(value.shape) < 64:
            plain[name] = value.detach().half()
            continue
        bits = bits_of(name, cfg)
        hessian = hessians.get(name.removesuffix(".weight"))
        codes, scale = round_plain(value, bits) if hessian is None else gptq(value, hessian, bits, cfg)
        coded[name] = Coded(codes.cpu(), scale.cpu(), bits)
    return coded, plain


# ---------------------------------------------------------------------------
# packing: bits by hand, then zlib
# ---------------------------------------------------------------------------

MAGIC = b"MULL0001"


def pack_bits(codes: np.ndarray, bits: int) -> bytes:
    """Signed codes -> offset codes -> their lowest `bits` bits, most significant first, end to end."""
    offset = (codes.astype(np.int16).ravel() + (1 << (bits - 1))).astype(np.uint8)
    planes = np.unpackbits(offset[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(planes.ravel()).tobytes()


def unpack_bits(raw: bytes, count: int, bits: int) -> np.ndarray:
    planes = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=count * bits).reshape(count, bits)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.int16)
    return (planes.astype(np.int16) @ weights - (1 << (bits - 1))).astype(np.int8)


def pack_model(coded: dict[str, Coded], plain: dict[str, Tensor], mixer: CopyMixer) -> bytes:
    body = bytearray()
    index: list[dict[str, object]] = []

    def put(raw: bytes) -> list[int]:
        at = len(body)
        body.extend(raw)
        return [at, len(raw)]

    for name, c in coded.items():
        index.append(
            dict(
                name=name,
                shape=list(c.codes.shape),
                bits=c.bits,
                codes=put(pack_bits(c.codes.numpy(), c.bits)),
                scale=put(c.scale.numpy().tobytes()),
            )
        )
    for name, t in plain.items():
        index.append(dict(name=name, shape=list(t.shape), plain=put(t.cpu().numpy().tobytes())))
    head = json.dumps(dict(index=index, mixer=mixer.export()), separators=(",", ":")).encode()
    return zlib.compress(MAGIC + struct.pack("<I", len(head)) + head + bytes(body), 9)


def unpack_model(blob: bytes) -> tuple[dict[str, Tensor], CopyMixer]:
    raw = zlib.decompress(blob)
    if raw[: len(MAGIC)] != MAGIC:
        raise ValueError("not a packed model")
    at = len(MAGIC)
    (size,) = struct.unpack_from("<I", raw, at)
    at += 4
    head = json.loads(raw[at : at + size])
    body = memoryview(raw)[at + size :]

    def get(span: list[int]) -> bytes:
        return bytes(body[span[0] : span[0] + span[1]])

    state: dict[str, Tensor] = {}
    for entry in head["index"]:
        shape = entry["shape"]
        if "plain" in entry:
            values = np.frombuffer(get(entry["plain"]), dtype=np.float16).reshape(shape)
            state[entry["name"]] = torch.from_numpy(values.astype(np.float32))
            continue
        codes = unpack_bits(get(entry["codes"]), shape[0] * shape[1], entry["bits"]).reshape(shape)
        scale = np.frombuffer(get(entry["scale"]), dtype=np.float16).astype(np.float32)
        state[entry["name"]] = torch.from_numpy(codes.astype(np.float32) * scale[:, None])
    return state, CopyMixer().restore(head["mixer"])


# ---------------------------------------------------------------------------
# fitting the copy cache and its gate on training documents
# ---------------------------------------------------------------------------


def fit_mixer(model: GPT, stream: TrainStream, cfg: Settings, world: World, log: Logger) -> CopyMixer:
    """Maximum likelihood of training documents under the mixture, with the quantised model fixed."""
    mixer = CopyMixer().to(world.device)
    if not cfg.copy_enabled:
        with torch.no_grad():
            mixer.gate_b.fill_(-1e4)
        return mixer
    held = DocumentStream(stream.take(cfg.gate_docs * world.size * 4096), cfg.bos_id)
    mine = held.share(world.rank, world.size)
    opt = torch.optim.Adam(mixer.parameters(), lr=cfg.gate_lr)
    lanes = LaneHistory(cfg.eval_lanes, cfg.copy_history, world.device)
    pieces = walk(held, mine, cfg, world.device)
    rows = 4
    for step in range(cfg.gate_steps):
        piece = next(pieces, None)
        if piece is None:
            pieces = walk(held, mine, cfg, world.device)
            piece = next(pieces)
        for lane, first in piece.opened:
            lanes.open(lane, first)
        with evaluating(model):
            logits = pick_logits(model.logits(piece.inputs), piece.where)
        seq = lanes.around(piece.targets)
        total = piece.mask.sum().clamp_min(1)
        opt.zero_grad(set_to_none=True)
        shown = torch.zeros((), device=world.device)
        for r in range(0, cfg.eval_lanes, rows):
            part = slice(r, r + rows)
            probs = mixer.mix(logits[part], seq[part], cfg.copy_history)
            gold = probs.gather(-1, piece.targets[part][..., None]).squeeze(-1)
            loss = -(gold.clamp_min(1e-12).log() * piece.mask[part]).sum() / total
            loss.backward()
            shown += loss.detach()
        for p in mixer.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            world.mean_(p.grad)
        opt.step()
        lanes.push(piece.targets, piece.counts)
        if step % 20 == 0 or step + 1 == cfg.gate_steps:
            log(f"gate:{step} train_mix_loss:{shown.item():.4f}")
    return mixer


# ---------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums of nats, bytes and tokens of the scored targets, in double precision."""

    nats: Tensor
    bytes: Tensor
    tokens: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> "Tally":
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, nll: Tensor, widths: Tensor, mask: Tensor) -> None:
        self.nats += (nll.double() * mask).sum()
        self.bytes += (widths.double() * mask).sum()
        self.tokens += mask.sum().double()

    def reduce(self, world: World) -> "Tally":
        for t in (self.nats, self.bytes, self.tokens):
            world.sum_(t)
        return self

    @property
    def loss(self) -> float:
        return float(self.nats / self.tokens)

    @property
    def bpb(self) -> float:
        return float(self.nats / math.log(2.0) / self.bytes)


def probe_loss(model: GPT, tokens: Tensor, table: ByteTable, cfg: Settings, world: World) -> tuple[float, float]:
    """Plain chunked loss over the head of the validation stream: a figure for the log during training, no more."""
    seq = cfg.train_seq_len
    rows = min(cfg.val_probe_tokens, tokens.numel() - 1) // seq
    tally = Tally.zero(world.device)
    with evaluating(model):
        for r in range(world.rank * 16, rows, world.size * 16):
            n = min(16, rows - r)
            chunk = tokens[r * seq : (r + n) * seq + 1].long().to(world.device)
            x, y = chunk[:-1].view(n, seq), chunk[1:].view(n, seq)
            logits = model.logits(x)
            nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(n, seq)
            tally.add(nll, table.count(x, y), torch.ones_like(y, dtype=torch.bool))
    tally.reduce(world)
    return tally.loss, tally.bpb


@dataclass
class Scores:
    mixed: Tally
    model_only: Tally

    def reduce(self, world: World) -> "Scores":
        self.mixed.reduce(world)
        self.model_only.reduce(world)
        return self


def evaluate(
    model: GPT, mixer: CopyMixer, stream: DocumentStream, table: ByteTable, cfg: Settings, world: World, log: Logger
) -> Scores:
    """One pass, left to right within each document, each target scored once with the tokens before it."""
    scores = Scores(Tally.zero(world.device), Tally.zero(world.device))
    lanes = LaneHistory(cfg.eval_lanes, cfg.copy_history, world.device)
    forward = torch.compile(model.logits, dynamic=False)
    docs = stream.share(world.rank, world.size)
    started = time.perf_counter()
    with evaluating(model):
        for step, piece in enumerate(walk(stream, docs, cfg, world.device)):
            for lane, first in piece.opened:
                lanes.open(lane, first)
            logits = pick_logits(forward(piece.inputs), piece.where)
            seq = lanes.around(piece.targets)
            probs = mixer.mix(logits, seq, cfg.copy_history)
            gold = probs.gather(-1, piece.targets[..., None]).squeeze(-1)
            nll = -gold.clamp_min(1e-30).log()
            widths = table.count(piece.previous, piece.targets)
            scores.mixed.add(nll, widths, piece.mask)
            bare = F.cross_entropy(logits.transpose(1, 2), piece.targets, reduction="none")
            scores.model_only.add(bare, widths, piece.mask)
            lanes.push(piece.targets, piece.counts)
            if step % 200 == 0:
                log(f"eval:{step} running_loss:{scores.mixed.loss:.4f} t:{time.perf_counter() - started:.1f}s")
    return scores.reduce(world)


@torch.no_grad()
def check_normalised(mixer: CopyMixer, cfg: Settings, device: torch.device) -> float:
    """Largest distance from one of the mixture's sums over the vocabulary, on random logits and tokens."""
    gen = torch.Generator(device=device).manual_seed(7)
    seq = torch.randint(0, 50, (2, 96), generator=gen, device=device)
    logits = torch.randn(2, 32, cfg.vocab_size, generator=gen, device=device)
    sums = mixer.mix(logits, seq, 64).double().sum(-1)
    return float((sums - 1.0).abs().max())


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


def lr_factor(step: int, elapsed: float, cfg: Settings) -> float:
    """Flat, then linear to zero over the last warmdown_iters steps as judged by the step time so far."""
    if step == 0:
        return 1.0
    step_seconds = elapsed / step
    warmdown = cfg.warmdown_iters * step_seconds
    left = max(cfg.train_seconds - elapsed, 0.0)
    by_time = min(1.0, left / max(warmdown, 1e-9))
    by_steps = min(1.0, (cfg.iterations - step) / max(cfg.warmdown_iters, 1))
    return min(by_time, by_steps)


def warm_up(model: GPT, ddp: nn.Module, optimizers: list[torch.optim.Optimizer], cfg: Settings, world: World) -> None:
    """Compiles forward, backward and the optimizers on random tokens, then restores weights and state."""
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    rows = cfg.train_batch_tokens // (world.size * cfg.train_seq_len)
    for _ in range(cfg.warmup_steps):
        x = torch.randint(0, cfg.vocab_size, (rows, cfg.train_seq_len), device=world.device)
        ddp(x, x.roll(-1, 1)).backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
    model.load_state_dict(weights)
    for opt, state in zip(optimizers, states):
        opt.load_state_dict(state)


def train(
    model: GPT,
    ddp: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    stream: TrainStream,
    probe: Callable[[], tuple[float, float]],
    clock: Timer,
    cfg: Settings,
    world: World,
    log: Logger,
) -> Ema:
    ema = Ema(model, cfg.ema_decay)
    muon = optimizers[0]
    stop = torch.zeros((), device=world.device)
    step = 0
    while step < cfg.iterations:
        if cfg.val_every > 0 and step > 0 and step % cfg.val_every == 0:
            with clock.paused():
                loss, bpb = probe()
            log(f"step:{step} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{clock.ms:.0f}ms")
        factor = lr_factor(step, clock.seconds, cfg)
        ramp = min(step / max(cfg.muon_momentum_steps, 1), 1.0)
        for group in muon.param_groups:
            group["momentum"] = cfg.muon_momentum_start + ramp * (cfg.muon_momentum - cfg.muon_momentum_start)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * factor
        x, y = stream.batch(cfg.train_batch_tokens, cfg.train_seq_len)
        loss_now = ddp(x, y)
        loss_now.backward()
        if cfg.grad_clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        ema.update(model)
        step += 1
        if step % cfg.log_every == 0 or step <= 5:
            log(f"step:{step} train_loss:{loss_now.item():.4f} train_time:{clock.ms:.0f}ms")
        stop.fill_(float(clock.seconds >= cfg.train_seconds))
        if world.size > 1:
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        if stop.item() > 0:
            break
    log(f"training stopped at step:{step} train_time:{clock.ms:.0f}ms, reserve {cfg.reserve_seconds:.0f}s")
    return ema


# ---------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def describe(cfg: Settings, world: World, log: Logger) -> None:
    log(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, world_size:{world.size} seed:{cfg.seed}")
    if world.main:
        smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        log(smi.stdout.strip(), console=False)
    log(json.dumps({k: getattr(cfg, k) for k in cfg.__dataclass_fields__}), console=False)


def build(cfg: Settings, world: World, log: Logger) -> None:
    """Everything that sees training data: train, average, calibrate, quantise, fit the gate, write the artifact."""
    table = ByteTable.of_tokenizer(cfg.tokenizer_path, cfg.vocab_size, world.device)
    model = GPT(cfg).to(world.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    compiled = torch.compile(model, dynamic=False)
    ddp = DDP(compiled, device_ids=[world.local_rank], broadcast_buffers=False) if world.size > 1 else compiled
    optimizers = make_optimizers(model, cfg)
    warm_up(model, ddp, optimizers, cfg, world)
    stream = TrainStream(cfg.train_files, world)
    peek = read_shard(shard_paths(cfg.val_files)[0])

    def probe() -> tuple[float, float]:
        return probe_loss(model, peek, table, cfg, world)

    world.barrier()
    clock = Timer("build")
    with clock:
        ema = train(model, ddp, optimizers, stream, probe, clock, cfg, world, log)
        ema.copy_to(model)
        log("ema: weights copied")
        hessians = collect_hessians(model, stream, cfg, world)
        log(f"gptq: hessians of {len(hessians)} layers at {clock.seconds:.1f}s")
        coded, plain = quantise(model.state_dict(), hessians, cfg)
        rounded = {name: c.dense().to(world.device) for name, c in coded.items()}
        rounded.update({name: t.float() for name, t in plain.items()})
        model.load_state_dict(rounded)
        log(f"gptq: done at {clock.seconds:.1f}s")
        mixer = fit_mixer(model, stream, cfg, world, log)
        log(f"gate: {json.dumps(mixer.export())}")
        if world.main:
            blob = pack_model(coded, plain, mixer)
            Path(cfg.artifact).write_bytes(blob)
        world.barrier()
    log(f"build_time:{clock.ms:.0f}ms of {1000 * cfg.budget_seconds:.0f}ms")
    if clock.seconds > cfg.budget_seconds:
        raise RuntimeError("training, calibration and packing went over the budget; raise RESERVE_SECONDS")
    log(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB")


def report_size(cfg: Settings, log: Logger) -> int:
    code_bytes = len(Path(__file__).read_bytes())
    model_bytes = Path(cfg.artifact).stat().st_size
    total = code_bytes + model_bytes
    log(f"Code size: {code_bytes} bytes")
    log(f"Serialized model int5/int6+zlib: {model_bytes} bytes")
    log(f"Total submission size: {total} bytes (limit {cfg.size_limit})")
    if total > cfg.size_limit:
        raise RuntimeError(f"{total} bytes are over the limit of {cfg.size_limit}")
    return total


def score(cfg: Settings, world: World, log: Logger) -> float:
    """Everything that is scored: read the artifact back, walk the validation documents, print bits per byte."""
    clock = Timer("eval")
    with clock:
        state, mixer = unpack_model(Path(cfg.artifact).read_bytes())
        model = GPT(cfg).to(world.device)
        model.load_state_dict(state)
        mixer = mixer.to(world.device)
        table = ByteTable.of_tokenizer(cfg.tokenizer_path, cfg.vocab_size, world.device)
        stream = DocumentStream.of_files(cfg.val_files, cfg.bos_id)
        log(f"val: {stream.tokens.numel()} tokens in {len(stream)} documents")
        log(f"mixture: largest |sum - 1| {check_normalised(mixer, cfg, world.device):.2e}")
        scores = evaluate(model, mixer, stream, table, cfg, world, log)
    seen = int(scores.mixed.tokens.item())
    if seen != stream.target_count:
        raise RuntimeError(f"scored {seen} targets of {stream.target_count}")
    plain, mixed = scores.model_only, scores.mixed
    log(f"model_only val_loss:{plain.loss:.6f} val_bpb:{plain.bpb:.6f}")
    log(f"scored_tokens:{seen} bytes:{int(mixed.bytes.item())} eval_time:{clock.ms:.0f}ms")
    log(f"final_copy_mixture val_loss:{mixed.loss:.8f} val_bpb:{mixed.bpb:.8f}")
    return mixed.bpb


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    cfg = Settings()
    world = World.start()
    log = Logger(world, cfg.run_id)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    describe(cfg, world, log)
    seed_all(cfg.seed)
    build(cfg, world, log)
    report_size(cfg, log)
    score(cfg, world, log)
    world.stop()


if __name__ == "__main__":
    main()
