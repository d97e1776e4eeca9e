"""
train_gpt.py, parameter golf, 16 MB track.

A modded-nanogpt style stack: Polar Express Muon, value embeddings, smear gate, flex attention with document masks
and alternating windows, SWA in the warmdown, int6/int8 rows + zlib.

Evaluation is document-wise. The validation stream is split at BOS; documents are taken in batches in file order, every
document owns a small LoRA that starts from zero, and each chunk is scored before its LoRA takes a step on it.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

import os
import sys

with open(sys.argv[0], encoding="utf-8") as f:
    code = f.read()

import copy
import glob
import io
import math
import random
import time
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# -----------------------------------------------------------------------------
# Settings


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_str(name: str, default: str) -> str:
    return os.environ.get(name, default)


def env_flag(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, "1" if default else "0")))


@dataclass
class Hyperparameters:
    # data
    data_path: str = env_str("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = env_str("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = env_str("RUN_ID", str(uuid.uuid4()))
    seed: int = env_int("SEED", 1337)
    vocab_size: int = env_int("VOCAB_SIZE", 1024)
    bos_id: int = env_int("BOS_ID", 1)
    # model
    num_layers: int = env_int("NUM_LAYERS", 9)
    model_dim: int = env_int("MODEL_DIM", 512)
    num_heads: int = env_int("NUM_HEADS", 8)
    num_kv_heads: int = env_int("NUM_KV_HEADS", 4)
    mlp_mult: int = env_int("MLP_MULT", 3)
    num_value_embeds: int = env_int("NUM_VALUE_EMBEDS", 3)
    short_window: int = env_int("SHORT_WINDOW", 384)
    rope_base: float = env_float("ROPE_BASE", 10000.0)
    logit_softcap: float = env_float("LOGIT_SOFTCAP", 30.0)
    # schedule
    train_batch_tokens: int = env_int("TRAIN_BATCH_TOKENS", 524288)
    train_seq_len: int = env_int("TRAIN_SEQ_LEN", 2048)
    iterations: int = env_int("ITERATIONS", 20000)
    warmup_steps: int = env_int("WARMUP_STEPS", 10)
    warmdown_iters: int = env_int("WARMDOWN_ITERS", 2200)
    max_wallclock_seconds: float = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve_seconds: float = env_float("RESERVE_SECONDS", 16.0)
    val_loss_every: int = env_int("VAL_LOSS_EVERY", 1000)
    train_log_every: int = env_int("TRAIN_LOG_EVERY", 250)
    # optimizers
    muon_lr: float = env_float("MUON_LR", 0.023)
    muon_wd: float = env_float("MUON_WD", 0.03)
    muon_momentum: float = env_float("MUON_MOMENTUM", 0.95)
    muon_momentum_start: float = env_float("MUON_MOMENTUM_START", 0.85)
    muon_momentum_steps: int = env_int("MUON_MOMENTUM_STEPS", 400)
    embed_lr: float = env_float("EMBED_LR", 0.04)
    head_lr: float = env_float("HEAD_LR", 0.008)
    scalar_lr: float = env_float("SCALAR_LR", 0.02)
    adam_betas: tuple = (0.8, 0.95)
    adam_eps: float = 1e-10
    grad_clip: float = env_float("GRAD_CLIP", 1.0)
    # averaging
    swa_enabled: bool = env_flag("SWA_ENABLED", True)
    swa_start: float = env_float("SWA_START", 0.4)
    swa_every: int = env_int("SWA_EVERY", 40)
    # quantisation
    matrix_bits: int = env_int("MATRIX_BITS", 6)
    embed_bits: int = env_int("EMBED_BITS", 8)
    calib_batches: int = env_int("CALIB_BATCHES", 8)
    temp_batches: int = env_int("TEMP_BATCHES", 4)
    artifact_path: str = env_str("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit: int = 16_000_000
    # evaluation
    eval_seq_len: int = env_int("EVAL_SEQ_LEN", 1024)
    eval_batch_rows: int = env_int("EVAL_BATCH_ROWS", 32)
    eval_budget_seconds: float = env_float("EVAL_BUDGET_SECONDS", 600.0)
    eval_margin_seconds: float = env_float("EVAL_MARGIN_SECONDS", 90.0)
    ttt_enabled: bool = env_flag("TTT_ENABLED", True)
    ttt_docs: int = env_int("TTT_DOCS", 64)
    ttt_chunk: int = env_int("TTT_CHUNK", 256)
    ttt_rank: int = env_int("TTT_RANK", 8)
    ttt_lr: float = env_float("TTT_LR", 0.01)
    ttt_betas: tuple = (0.9, 0.95)
    cache_weight: float = env_float("CACHE_WEIGHT", 0.06)
    cache_half: float = env_float("CACHE_HALF", 400.0)
    cache_prior: float = env_float("CACHE_PRIOR", 64.0)

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")


# -----------------------------------------------------------------------------
# Distributed helpers and logging


@dataclass
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))

    @property
    def master(self) -> bool:
        return self.rank == 0


def init_world() -> World:
    world = World(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
    world.device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(world.device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl", device_id=world.device)
        dist.barrier()
    return world


LOGFILE: str | None = None
MASTER = True


def open_log(args: Hyperparameters, world: World) -> None:
    global LOGFILE, MASTER
    MASTER = world.master
    if world.master:
        os.makedirs("logs", exist_ok=True)
        LOGFILE = f"logs/{args.run_id}.txt"
        print(LOGFILE)


def print0(s: str, console: bool = True) -> None:
    if not MASTER:
        return
    if console:
        print(s, flush=True)
    if LOGFILE is not None:
        with open(LOGFILE, "a", encoding="utf-8") as f:
            print(s, file=f)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def reduce_sum(t: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return t


def reduce_avg(t: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.AVG)
    return t


def any_rank(flag: bool, device: torch.device) -> bool:
    t = torch.tensor(int(flag), device=device)
    if dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return bool(t.item())


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


# -----------------------------------------------------------------------------
# Tokens: shards, loader, byte tables

SHARD_MAGIC = 20240520
SHARD_HEADER_INTS = 256


def load_shard(path: Path) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"bad shard header in {path}")
    num_tokens = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=num_tokens, offset=SHARD_HEADER_INTS * 4)
    if tokens.size != num_tokens:
        raise ValueError(f"short read in {path}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[Path]:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return files


def load_validation_tokens(pattern: str) -> Tensor:
    return torch.cat([load_shard(p) for p in list_shards(pattern)]).contiguous()


class TokenStream:
    """Walks the shards in order and starts over at the end."""

    def __init__(self, pattern: str):
        self.files = list_shards(pattern)
        self.index = 0
        self.pos = 0
        self.tokens = load_shard(self.files[0])

    def _advance(self) -> None:
        self.index = (self.index + 1) % len(self.files)
        self.tokens = load_shard(self.files[self.index])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts: list[Tensor] = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self._advance()
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """One disjoint span of the stream per rank and step, cut into rows."""

    def __init__(self, pattern: str, args: Hyperparameters, world: World):
        self.stream = TokenStream(pattern)
        self.args = args
        self.world = world
        self.local_tokens = args.train_batch_tokens // world.size
        assert self.local_tokens % args.train_seq_len == 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        span = self.local_tokens + 1
        chunk = self.stream.take(span * self.world.size)
        start = self.world.rank * span
        local = chunk[start : start + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, self.args.train_seq_len)
        y = local[1:].reshape(-1, self.args.train_seq_len)
        return x.to(self.world.device, non_blocking=True), y.to(self.world.device, non_blocking=True)


@dataclass
class ByteTables:
    base: Tensor  # bytes of the piece without its leading-space mark
    space: Tensor  # the piece begins with a space
    boundary: Tensor  # control, unknown or unused: no space is emitted after it

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.base[target].to(torch.int32)
        n += (self.space[target] & ~self.boundary[prev]).to(torch.int32)
        return n


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> ByteTables:
    size = max(int(sp.vocab_size()), vocab_size)
    base = np.zeros(size, dtype=np.int16)
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
        base[i] = len(piece.encode("utf-8"))
    return ByteTables(
        base=torch.from_numpy(base).to(device),
        space=torch.from_numpy(space).to(device),
        boundary=torch.from_numpy(boundary).to(device),
    )


# -----------------------------------------------------------------------------
# Muon with the Polar Express sign method

POLAR_COEFFS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


@torch.compile(dynamic=False, fullgraph=True)
def polar_express(G: Tensor) -> Tensor:
    X = G.bfloat16()
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * (1 + 2e-2) + 1e-6)
    for a, b, c in POLAR_COEFFS:
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X
    if tall:
        X = X.mT
    return X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. The matrices are shared out over the ranks, the updates are summed back."""

    def __init__(self, params, lr: float, momentum: float, weight_decay: float, world: World):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.world = world

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            offset = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank and p.grad is not None:
                    flat[offset : offset + p.numel()] = self._direction(p, group["momentum"]).flatten()
                offset += p.numel()
            reduce_sum(flat)
            offset = 0
            for p in params:
                update = flat[offset : offset + p.numel()].view_as(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * max(1.0, p.size(-2) / p.size(-1)) ** 0.5)
                offset += p.numel()

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if "buf" not in state:
            state["buf"] = torch.zeros_like(p.grad)
        buf = state["buf"]
        buf.lerp_(p.grad, 1 - momentum)
        return polar_express(p.grad.lerp(buf, momentum))


# -----------------------------------------------------------------------------
# Model


flex_attention = torch.compile(flex_attention, dynamic=False)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """fp32 weight, cast to the activation's type on use."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.observer: Tensor | None = None

    def reset_parameters(self) -> None:
        std = 0.5 * self.in_features**-0.5
        bound = 3**0.5 * std
        with torch.no_grad():
            self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer += x.detach().float().square().flatten(0, -2).sum(0)
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, head_dim: int, max_len: int, base: float):
        super().__init__()
        inv = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        theta = torch.outer(torch.arange(max_len, dtype=torch.float32), inv)
        self.register_buffer("cos", theta.cos(), persistent=False)
        self.register_buffer("sin", theta.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos = self.cos[None, : x.size(1), None, :].to(x.dtype)
        sin = self.sin[None, : x.size(1), None, :].to(x.dtype)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.heads = args.num_heads
        self.kv_heads = args.num_kv_heads
        self.head_dim = args.model_dim // args.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.c_q = CastedLinear(args.model_dim, args.model_dim)
        self.c_k = CastedLinear(args.model_dim, kv_dim)
        self.c_v = CastedLinear(args.model_dim, kv_dim)
        self.c_proj = CastedLinear(args.model_dim, args.model_dim)
        self.c_proj.weight.detach().zero_()
        self.q_gain = nn.Parameter(torch.full((self.heads,), 1.5))
        self.v_mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.rotary = Rotary(self.head_dim, max(args.train_seq_len, args.eval_seq_len), args.rope_base)

    def forward(self, x: Tensor, ve: Tensor | None, mask: BlockMask, dq: Tensor | None, dv: Tensor | None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if dq is not None:
            q = q + dq
        if dv is not None:
            v = v + dv
        q = q.view(B, T, self.heads, self.head_dim)
        k = k.view(B, T, self.kv_heads, self.head_dim)
        v = v.view(B, T, self.kv_heads, self.head_dim)
        mix = self.v_mix.to(v.dtype)
        v = mix[0] * v if ve is None else mix[0] * v + mix[1] * ve.view_as(v)
        q, k = self.rotary(norm(q)), self.rotary(norm(k))
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = flex_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=self.heads != self.kv_heads
        )
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: int):
        super().__init__()
        self.c_fc = CastedLinear(dim, mult * dim)
        self.c_proj = CastedLinear(mult * dim, dim)
        self.c_proj.weight.detach().zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(args)
        self.mlp = MLP(args.model_dim, args.mlp_mult)
        self.resid_mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.attn_scale = nn.Parameter(torch.ones(args.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(args.model_dim))
        self.long = layer % 3 == 0 or layer == args.num_layers - 1

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, mask: BlockMask, lora, layer: int) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        h = norm(x)
        dq = lora.q[layer](h) if lora is not None else None
        dv = lora.v[layer](h) if lora is not None else None
        x = x + self.attn_scale.to(x.dtype) * self.attn(h, ve, mask, dq, dv)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x))


class SmearGate(nn.Module):
    """Adds a part of the previous token's embedding; nothing crosses the start of a document."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -3.0))
        self.bos_id = bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        prev = prev * (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + torch.sigmoid(self.gate).to(x.dtype) * prev


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.args = args
        kv_dim = args.num_kv_heads * (args.model_dim // args.num_heads)
        self.embed = nn.Embedding(args.vocab_size, args.model_dim)
        self.value_embeds = nn.ModuleList(nn.Embedding(args.vocab_size, kv_dim) for _ in range(args.num_value_embeds))
        self.smear = SmearGate(args.model_dim, args.bos_id)
        self.blocks = nn.ModuleList(Block(args, i) for i in range(args.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(args.num_layers // 2))
        self.lm_head = CastedLinear(args.model_dim, args.vocab_size)
        self.lm_head.weight.detach().zero_()
        nn.init.normal_(self.embed.weight, std=0.02)
        for ve in self.value_embeds:
            nn.init.normal_(ve.weight, std=0.02)

    def value_embedding(self, layer: int, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        n = self.args.num_value_embeds
        if layer < n:
            return self.value_embeds[layer](ids).to(dtype)
        tail = layer - (self.args.num_layers - n)
        return self.value_embeds[tail](ids).to(dtype) if tail >= 0 else None

    def forward(self, ids: Tensor, long_mask: BlockMask, short_mask: BlockMask, lora=None) -> Tensor:
        x = self.embed(ids).to(torch.bfloat16)
        x = x0 = norm(self.smear(x, ids))
        half = len(self.blocks) // 2
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) - half:
                x = x + self.skip_weights[len(self.blocks) - 1 - i].to(x.dtype) * skips.pop()
            mask = long_mask if block.long else short_mask
            x = block(x, x0, self.value_embedding(i, ids, x.dtype), mask, lora, i)
            if i < half:
                skips.append(x)
        x = norm(x)
        logits = self.lm_head(x)
        if lora is not None:
            logits = logits + lora.head(x)
        cap = self.args.logit_softcap
        return cap * torch.tanh(logits.float() / cap)


def build_masks(ids: Tensor, bos_id: int, short_window: int) -> tuple[BlockMask, BlockMask]:
    """Causal inside a document, for every row; the short mask also looks back no further than its window."""
    docs = (ids == bos_id).cumsum(dim=1)
    B, T = ids.shape

    def document_causal(b, h, q, kv):
        return (q >= kv) & (docs[b, q] == docs[b, kv])

    def document_window(b, h, q, kv):
        return (q >= kv) & (q - kv < short_window) & (docs[b, q] == docs[b, kv])

    long_mask = create_block_mask(document_causal, B, None, T, T, device=ids.device, _compile=True)
    short_mask = create_block_mask(document_window, B, None, T, T, device=ids.device, _compile=True)
    return long_mask, short_mask


def run_model(model: nn.Module, args: Hyperparameters, ids: Tensor, lora=None) -> Tensor:
    long_mask, short_mask = build_masks(ids, args.bos_id, args.short_window)
    return model(ids, long_mask, short_mask, lora)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view_as(targets)


# -----------------------------------------------------------------------------
# LoRA, one per document of a batch


class BatchedLoRA(nn.Module):
    def __init__(self, docs: int, in_dim: int, out_dim: int, rank: int, device: torch.device):
        super().__init__()
        self.in_dim = in_dim
        self.A = nn.Parameter(torch.empty(docs, rank, in_dim, device=device))
        self.B = nn.Parameter(torch.zeros(docs, out_dim, rank, device=device))

    @torch.no_grad()
    def reset(self) -> None:
        self.A.uniform_(-(self.in_dim**-0.5), self.in_dim**-0.5)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.bmm(x, self.A.to(x.dtype).mT)
        return torch.bmm(h, self.B.to(x.dtype).mT)


class DocumentLoRA(nn.Module):
    def __init__(self, args: Hyperparameters, docs: int, device: torch.device):
        super().__init__()
        dim, rank = args.model_dim, args.ttt_rank
        kv_dim = args.num_kv_heads * (dim // args.num_heads)
        self.head = BatchedLoRA(docs, dim, args.vocab_size, rank, device)
        self.q = nn.ModuleList(BatchedLoRA(docs, dim, dim, rank, device) for _ in range(args.num_layers))
        self.v = nn.ModuleList(BatchedLoRA(docs, dim, kv_dim, rank, device) for _ in range(args.num_layers))
        self.reset()

    def reset(self) -> None:
        for m in self.modules():
            if isinstance(m, BatchedLoRA):
                m.reset()


def fresh_adam(lora: DocumentLoRA, args: Hyperparameters) -> torch.optim.Adam:
    return torch.optim.Adam(lora.parameters(), lr=args.ttt_lr, betas=args.ttt_betas, eps=1e-10, fused=True)


# -----------------------------------------------------------------------------
# Optimizers and schedule


def is_matrix(name: str, p: Tensor) -> bool:
    return p.ndim == 2 and name.startswith("blocks.")


def build_optimizers(model: GPT, args: Hyperparameters, world: World) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for n, p in named if is_matrix(n, p)]
    embeds = [p for n, p in named if n.startswith(("embed.", "value_embeds."))]
    heads = [p for n, p in named if n.startswith("lm_head.")]
    taken = {id(p) for p in matrices + embeds + heads}
    scalars = [p for _, p in named if id(p) not in taken]
    adam = torch.optim.AdamW(
        [
            dict(params=embeds, lr=args.embed_lr),
            dict(params=heads, lr=args.head_lr),
            dict(params=scalars, lr=args.scalar_lr),
        ],
        betas=args.adam_betas,
        eps=args.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    muon = Muon(matrices, args.muon_lr, args.muon_momentum, args.muon_wd, world)
    optimizers = [adam, muon]
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def lr_scale(step: int, elapsed_ms: float, args: Hyperparameters, cap_ms: float) -> float:
    """Flat, then linearly to zero; the length of the warmdown is measured in the step time so far."""
    if step == 0:
        return 1.0
    warmdown_ms = args.warmdown_iters * elapsed_ms / step
    left = max(cap_ms - elapsed_ms, 0.0)
    return min(left / max(warmdown_ms, 1e-9), 1.0)


def set_schedule(optimizers: list[torch.optim.Optimizer], scale: float, step: int, args: Hyperparameters) -> None:
    frac = min(step / max(args.muon_momentum_steps, 1), 1.0)
    momentum = (1 - frac) * args.muon_momentum_start + frac * args.muon_momentum
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * scale
            if isinstance(opt, Muon):
                group["momentum"] = momentum


def average_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            reduce_avg(p.grad)


# -----------------------------------------------------------------------------
# Stochastic weight averaging


class WeightAverage:
    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            if name in self.sums:
                self.sums[name] += t.float()
            else:
                self.sums[name] = t.float().clone()
        self.count += 1

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        if self.count == 0:
            return
        state = {n: (s / self.count).to(model.state_dict()[n].dtype) for n, s in self.sums.items()}
        model.load_state_dict(state, strict=True)


# -----------------------------------------------------------------------------
# Calibration on training rows: second moments of the inputs of every matrix, and one temperature


def linear_layers(model: nn.Module) -> dict[str, CastedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, CastedLinear)}


def row_groups(x: Tensor, y: Tensor, rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[i : i + rows], y[i : i + rows]) for i in range(0, x.size(0), rows)]


@torch.no_grad()
def collect_moments(model: GPT, args: Hyperparameters, loader: TrainLoader) -> dict[str, Tensor]:
    """E[x_j^2] for the inputs of each linear layer, from rows the loader would have trained on next."""
    layers = linear_layers(model)
    device = next(model.parameters()).device
    for m in layers.values():
        m.observer = torch.zeros(m.in_features, device=device)
    model.eval()
    for _ in range(args.calib_batches):
        x, y = loader.next_batch()
        for rows, _ in row_groups(x, y, 4)[:2]:
            run_model(model, args, rows)
    moments = {}
    for name, m in layers.items():
        moments[name + ".weight"] = reduce_avg(m.observer)
        m.observer = None
    return moments


TEMPERATURES = [0.94 + 0.01 * i for i in range(13)]


@torch.no_grad()
def fit_temperature(model: GPT, args: Hyperparameters, loader: TrainLoader) -> float:
    """The logit scale that suits fresh training rows best. It travels in the artifact."""
    device = next(model.parameters()).device
    sums = torch.zeros(len(TEMPERATURES), device=device, dtype=torch.float64)
    model.eval()
    for _ in range(args.temp_batches):
        x, y = loader.next_batch()
        for rows, targets in row_groups(x, y, 4)[:2]:
            logits = run_model(model, args, rows)
            for i, t in enumerate(TEMPERATURES):
                sums[i] += token_losses(logits / t, targets).double().mean()
    reduce_sum(sums)
    return TEMPERATURES[int(sums.argmin().item())]


# -----------------------------------------------------------------------------
# Quantisation: symmetric rows, the clip of each row searched under the moments of its inputs

CLIP_GRID = (1.0, 0.96, 0.92, 0.88, 0.84, 0.80, 0.75, 0.70)


def quantize_rows(w: Tensor, bits: int, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    w = w.float()
    qmax = 2 ** (bits - 1) - 1
    weight = torch.ones(w.size(1), device=w.device) if moments is None else moments.to(w.device) + 1e-8
    peak = w.abs().amax(dim=1).clamp_min(1e-8)
    best_err = torch.full_like(peak, float("inf"))
    best_scale = peak / qmax
    for clip in CLIP_GRID:
        scale = (peak * clip / qmax).half().float().clamp_min(1e-7)
        q = (w / scale[:, None]).round().clamp(-qmax, qmax)
        err = ((q * scale[:, None] - w).square() * weight).sum(1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    best_scale = best_scale.half()
    q = (w / best_scale.float()[:, None]).round().clamp(-qmax, qmax).to(torch.int8)
    return q.cpu(), best_scale.cpu()


def bits_for(name: str, t: Tensor, args: Hyperparameters) -> int:
    if t.ndim != 2:
        return 0
    if name.startswith(("embed.", "value_embeds.", "lm_head.")):
        return args.embed_bits
    return args.matrix_bits


def quantize_state(model: GPT, args: Hyperparameters, moments: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    packed: dict[str, dict[str, Tensor]] = {"q": {}, "scale": {}, "plain": {}}
    for name, t in model.state_dict().items():
        bits = bits_for(name, t, args)
        if bits == 0:
            packed["plain"][name] = t.half().cpu()
        else:
            packed["q"][name], packed["scale"][name] = quantize_rows(t, bits, moments.get(name))
    return packed


def dequantize_state(packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    state = {n: t.float() for n, t in packed["plain"].items()}
    for name, q in packed["q"].items():
        state[name] = q.float() * packed["scale"][name].float()[:, None]
    return state


def write_artifact(args: Hyperparameters, packed: dict, temperature: float) -> int:
    buf = io.BytesIO()
    torch.save({"weights": packed, "temperature": temperature}, buf)
    blob = zlib.compress(buf.getvalue(), 9)
    with open(args.artifact_path, "wb") as f:
        f.write(blob)
    return len(blob)


def read_artifact(args: Hyperparameters) -> tuple[dict[str, Tensor], float]:
    with open(args.artifact_path, "rb") as f:
        raw = zlib.decompress(f.read())
    obj = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return dequantize_state(obj["weights"]), float(obj["temperature"])


def report_size(args: Hyperparameters, model_bytes: int) -> int:
    code_bytes = len(code.encode("utf-8"))
    total = code_bytes + model_bytes
    print0(f"serialized model int6+zlib: {model_bytes} bytes")
    print0(f"code size: {code_bytes} bytes")
    print0(f"total submission size: {total} bytes (limit {args.size_limit})")
    if total > args.size_limit:
        raise SystemExit(f"over the size limit by {total - args.size_limit} bytes")
    return total


# -----------------------------------------------------------------------------
# Evaluation


@dataclass
class Tally:
    """Sums over scored tokens: nats, tokens, bytes."""

    sums: Tensor

    @staticmethod
    def empty(device: torch.device) -> "Tally":
        return Tally(torch.zeros(3, device=device, dtype=torch.float64))

    def add(self, nll: Tensor, prev: Tensor, target: Tensor, mask: Tensor, tables: ByteTables) -> None:
        self.sums[0] += nll[mask].double().sum()
        self.sums[1] += mask.sum()
        self.sums[2] += tables.count(prev[mask], target[mask]).double().sum()

    def reduce(self) -> tuple[float, float, int]:
        reduce_sum(self.sums)
        nats, tokens, num_bytes = self.sums.tolist()
        return nats / tokens, nats / math.log(2.0) / num_bytes, int(tokens)


@torch.no_grad()
def validate_rows(model: nn.Module, args: Hyperparameters, tokens: Tensor, tables: ByteTables, world: World):
    """The quick figure of the training log: adjoining rows, no overlap, no adaptation."""
    T = args.train_seq_len
    rows = (tokens.numel() - 1) // T
    tally = Tally.empty(world.device)
    mine = range(world.rank * args.eval_batch_rows, rows, world.size * args.eval_batch_rows)
    model.eval()
    for first in mine:
        last = min(first + args.eval_batch_rows, rows)
        span = tokens[first * T : last * T + 1].to(world.device, dtype=torch.int64)
        x, y = span[:-1].view(-1, T), span[1:].view(-1, T)
        nll = token_losses(run_model(model, args, x), y)
        tally.add(nll, x, y, torch.ones_like(y, dtype=torch.bool), tables)
    model.train()
    return tally.reduce()


@dataclass(frozen=True)
class Document:
    start: int  # where its BOS stands in the stream
    length: int  # how many tokens it predicts; the last is the next document's BOS

    def chunks(self, size: int) -> int:
        return (self.length + size - 1) // size


def split_documents(tokens: Tensor, bos_id: int) -> list[Document]:
    starts = np.flatnonzero(tokens.numpy() == bos_id).tolist()
    if not starts or starts[0] != 0:
        starts.insert(0, 0)
    ends = starts[1:] + [tokens.numel() - 1]
    return [Document(s, e - s) for s, e in zip(starts, ends) if e > s]


def document_batches(docs: list[Document], args: Hyperparameters, world: World) -> list[list[Document]]:
    batches = [docs[i : i + args.ttt_docs] for i in range(0, len(docs), args.ttt_docs)]
    return batches[world.rank :: world.size]


@dataclass
class Windows:
    """Chunk number c of every document of a batch, with as much of its past as fits in front of it."""

    x: Tensor
    y: Tensor
    mask: Tensor  # True at the chunk's positions
    more: Tensor  # the document goes on after this chunk


def chunk_windows(tokens: Tensor, batch: list[Document], c: int, args: Hyperparameters, device: torch.device) -> Windows:
    B, T = args.ttt_docs, args.eval_seq_len
    x = torch.full((B, T), args.bos_id, dtype=torch.int64)
    y = torch.zeros((B, T), dtype=torch.int64)
    mask = torch.zeros((B, T), dtype=torch.bool)
    more = torch.zeros(B, dtype=torch.bool)
    begin = c * args.ttt_chunk
    left = max(0, begin + args.ttt_chunk - T)
    for row, doc in enumerate(batch):
        if begin >= doc.length:
            continue
        end = min(begin + args.ttt_chunk, doc.length)
        span = tokens[doc.start + left : doc.start + end + 1].to(torch.int64)
        n = end - left
        x[row, :n], y[row, :n] = span[:-1], span[1:]
        mask[row, begin - left : n] = True
        more[row] = end < doc.length
    return Windows(*(t.to(device, non_blocking=True) for t in (x, y, mask, more)))


class DocumentCache:
    """How often each token has come so far in its document. Read as a distribution, filled after the scoring."""

    def __init__(self, args: Hyperparameters, device: torch.device):
        self.args = args
        self.counts = torch.zeros(args.ttt_docs, args.vocab_size, device=device)

    def distribution(self) -> Tensor:
        smoothed = self.counts + self.args.cache_prior / self.args.vocab_size
        return smoothed / smoothed.sum(dim=1, keepdim=True)

    def weight(self) -> Tensor:
        seen = self.counts.sum(dim=1)
        return self.args.cache_weight * seen / (seen + self.args.cache_half)

    def update(self, w: Windows) -> None:
        self.counts.scatter_add_(1, w.y, w.mask.to(self.counts.dtype))


def mixed_losses(logits: Tensor, w: Windows, cache: DocumentCache, temperature: float) -> Tensor:
    """-log p(target) under the mixture of the model and the document's cache; both sum to one over the vocabulary."""
    p_model = F.softmax(logits.detach().float() / temperature, dim=-1)
    lam = cache.weight()[:, None, None]
    p = (1.0 - lam) * p_model + lam * cache.distribution()[:, None, :]
    return -p.gather(-1, w.y.unsqueeze(-1)).squeeze(-1).clamp_min(1e-12).log()


def adapt(logits: Tensor, w: Windows, optimizer: torch.optim.Optimizer) -> None:
    """One step of every document's LoRA on the chunk that has just been scored."""
    train_mask = (w.mask & w.more[:, None]).float()
    per_doc = (token_losses(logits, w.y) * train_mask).sum(1) / train_mask.sum(1).clamp_min(1.0)
    optimizer.zero_grad(set_to_none=True)
    per_doc.sum().backward()
    optimizer.step()


def score_batch(
    model: nn.Module,
    args: Hyperparameters,
    tokens: Tensor,
    batch: list[Document],
    lora: DocumentLoRA | None,
    temperature: float,
    tally: Tally,
    tables: ByteTables,
    device: torch.device,
) -> None:
    """All chunks of a batch of documents, from left to right: score, fill the cache, then adapt."""
    cache = DocumentCache(args, device)
    optimizer = None
    if lora is not None:
        lora.reset()
        optimizer = fresh_adam(lora, args)
    for c in range(max(doc.chunks(args.ttt_chunk) for doc in batch)):
        w = chunk_windows(tokens, batch, c, args, device)
        will_adapt = lora is not None and bool(w.more.any())
        with torch.set_grad_enabled(will_adapt):
            logits = run_model(model, args, w.x, lora)
        nll = mixed_losses(logits, w, cache, temperature)
        tally.add(nll, w.x, w.y, w.mask, tables)
        cache.update(w)
        if will_adapt:
            adapt(logits, w, optimizer)


def score_documents(
    model: nn.Module,
    args: Hyperparameters,
    tokens: Tensor,
    tables: ByteTables,
    world: World,
    temperature: float,
    use_lora: bool,
    deadline: float = float("inf"),
) -> tuple[float, float, int]:
    """val_loss and val_bpb over the whole split. Past the deadline documents are scored without a LoRA."""
    docs = split_documents(tokens, args.bos_id)
    mine = document_batches(docs, args, world)
    tally = Tally.empty(world.device)
    lora = DocumentLoRA(args, args.ttt_docs, world.device) if use_lora else None
    model.eval()
    late = 0
    for i, batch in enumerate(mine):
        in_time = time.perf_counter() < deadline
        late += not in_time
        score_batch(model, args, tokens, batch, lora if in_time else None, temperature, tally, tables, world.device)
        if use_lora and (i + 1) % 20 == 0:
            nats, _, num_bytes = tally.sums.tolist()
            print0(f"ttt batch {i + 1}/{len(mine)} running_bpb:{nats / math.log(2.0) / num_bytes:.4f}")
    if late:
        print0(f"deadline passed, {late} batches of rank 0 were scored without a LoRA")
    val_loss, val_bpb, scored = tally.reduce()
    if scored != tokens.numel() - 1:
        raise RuntimeError(f"scored {scored} of {tokens.numel() - 1} tokens")
    return val_loss, val_bpb, scored


# -----------------------------------------------------------------------------
# Training


def random_rows(args: Hyperparameters, rows: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(0, args.vocab_size, (rows, length), device=device)


def warm_up(
    model: nn.Module, base_model: GPT, optimizers: list[torch.optim.Optimizer], args: Hyperparameters, world: World
) -> None:
    """Compiles the kernels on random tokens, then puts weights and optimizers back as they were."""
    saved = copy.deepcopy(base_model.state_dict())
    saved_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    rows = args.train_batch_tokens // world.size // args.train_seq_len
    for step in range(args.warmup_steps):
        x = random_rows(args, rows, args.train_seq_len, world.device)
        train_step(model, x, x.roll(-1, dims=1), args)
        average_gradients(base_model)
        for opt in optimizers:
            opt.step()
        base_model.zero_grad(set_to_none=True)
    with torch.no_grad():
        run_model(base_model, args, random_rows(args, 4, args.train_seq_len, world.device))
    base_model.load_state_dict(saved, strict=True)
    for opt, state in zip(optimizers, saved_opts):
        opt.load_state_dict(state)
    print0(f"warmup: {args.warmup_steps} steps on random tokens, state restored")


def train_step(model: nn.Module, x: Tensor, y: Tensor, args: Hyperparameters) -> Tensor:
    loss = token_losses(run_model(model, args, x), y).mean()
    loss.backward()
    return loss.detach()


def log_validation(
    model: nn.Module, args: Hyperparameters, tokens: Tensor, tables: ByteTables, world: World, step: int, elapsed_ms: float
) -> None:
    val_loss, val_bpb, _ = validate_rows(model, args, tokens, tables, world)
    print0(
        f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
        f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / max(step, 1):.2f}ms"
    )


class TrainClock:
    """Milliseconds of training; stands still while the validation loss is logged."""

    def __init__(self) -> None:
        self.total = 0.0
        self.t0 = 0.0

    def start(self) -> None:
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def stop(self) -> None:
        torch.cuda.synchronize()
        self.total += 1000.0 * (time.perf_counter() - self.t0)

    def now(self) -> float:
        return self.total + 1000.0 * (time.perf_counter() - self.t0)


def train(
    model: nn.Module,
    base_model: GPT,
    optimizers: list[torch.optim.Optimizer],
    loader: TrainLoader,
    args: Hyperparameters,
    world: World,
    val_tokens: Tensor,
    tables: ByteTables,
    clock: TrainClock,
) -> WeightAverage:
    """Steps until the wall clock, less what calibration and packing need, is used up."""
    cap_ms = 1000.0 * (args.max_wallclock_seconds - args.reserve_seconds)
    swa = WeightAverage()
    stop_at: int | None = None
    step = 0
    model.train()
    clock.start()
    while True:
        last = step == args.iterations or (stop_at is not None and step >= stop_at)
        if last or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            clock.stop()
            log_validation(model, args, val_tokens, tables, world, step, clock.total)
            clock.start()
        if last:
            break
        scale = lr_scale(step, clock.now(), args, cap_ms)
        set_schedule(optimizers, scale, step, args)
        x, y = loader.next_batch()
        loss = train_step(model, x, y, args)
        average_gradients(base_model)
        if args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip)
        for opt in optimizers:
            opt.step()
        base_model.zero_grad(set_to_none=True)
        step += 1
        if args.swa_enabled and scale < args.swa_start and step % args.swa_every == 0:
            swa.add(base_model)
        if step <= 10 or step % args.train_log_every == 0:
            print0(
                f"step:{step}/{args.iterations} train_loss:{loss.item():.4f} "
                f"train_time:{clock.now():.0f}ms step_avg:{clock.now() / step:.2f}ms"
            )
        if stop_at is None and any_rank(clock.now() >= cap_ms, world.device):
            stop_at = step
    print0(f"training stopped at step {step}, peak memory {torch.cuda.max_memory_allocated() // 2**20} MiB")
    return swa


def finish_training(
    base_model: GPT, swa: WeightAverage, loader: TrainLoader, args: Hyperparameters, clock: TrainClock, world: World
) -> int:
    """Average, calibrate, fit the temperature, quantise, write. All of it on the training clock."""
    if args.swa_enabled:
        swa.apply(base_model)
        print0(f"swa: average of {swa.count} snapshots")
    moments = collect_moments(base_model, args, loader)
    temperature = fit_temperature(base_model, args, loader)
    packed = quantize_state(base_model, args, moments)
    model_bytes = write_artifact(args, packed, temperature) if world.master else 0
    barrier()
    clock.stop()
    print0(f"calibrated, quantised and written, temperature:{temperature:.2f} train_time:{clock.total:.0f}ms")
    if clock.total > 1000.0 * args.max_wallclock_seconds:
        raise SystemExit("training and calibration took longer than the cap; raise RESERVE_SECONDS")
    return model_bytes


# -----------------------------------------------------------------------------
# The run


def build_model(args: Hyperparameters, world: World) -> GPT:
    model = GPT(args).to(world.device)
    if dist.is_initialized():
        for t in model.state_dict().values():
            dist.broadcast(t, 0)
    return model


def load_tokenizer(args: Hyperparameters) -> spm.SentencePieceProcessor:
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {args.vocab_size}")
    return sp


def log_environment(args: Hyperparameters, world: World) -> None:
    print0(code, console=False)
    print0("=" * 100, console=False)
    print0(f"Running Python {sys.version}")
    print0(f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}")
    print0(f"world_size:{world.size} seed:{args.seed}")
    for name, value in vars(args).items():
        print0(f"  {name}: {value}", console=False)
    print0("=" * 100, console=False)


def reload_model(base_model: GPT, args: Hyperparameters) -> float:
    """The model that is scored is the one on the disk."""
    state, temperature = read_artifact(args)
    base_model.load_state_dict(state, strict=True)
    base_model.requires_grad_(False)
    return temperature


def evaluate(
    model: nn.Module,
    base_model: GPT,
    args: Hyperparameters,
    val_tokens: Tensor,
    tables: ByteTables,
    world: World,
) -> None:
    barrier()
    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    temperature = reload_model(base_model, args)
    deadline = t_eval + args.eval_budget_seconds - args.eval_margin_seconds
    val_loss, val_bpb, scored = score_documents(
        model, args, val_tokens, tables, world, temperature, use_lora=False
    )
    print0(f"roundtrip documents val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} tokens:{scored}")
    print0(f"roundtrip eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms")
    if args.ttt_enabled:
        val_loss, val_bpb, scored = score_documents(
            model, args, val_tokens, tables, world, temperature, use_lora=True, deadline=deadline
        )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - t_eval
    print0(f"final documents_lora_ttt tokens:{scored} eval_time:{1000.0 * seconds:.0f}ms")
    if seconds > args.eval_budget_seconds:
        raise SystemExit(f"evaluation took {seconds:.1f}s, over the {args.eval_budget_seconds:.0f}s budget")
    print0(f"final val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")


def main() -> None:
    args = Hyperparameters()
    world = init_world()
    open_log(args, world)
    log_environment(args, world)
    seed_everything(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64

    sp = load_tokenizer(args)
    tables = build_byte_tables(sp, args.vocab_size, world.device)
    val_tokens = load_validation_tokens(args.val_files)
    print0(f"val tokens:{val_tokens.numel()} documents:{len(split_documents(val_tokens, args.bos_id))}")
    print0(f"train shards:{len(list_shards(args.train_files))} pattern:{args.train_files}")

    base_model = build_model(args, world)
    model = torch.compile(base_model, dynamic=False)
    optimizers = build_optimizers(base_model, args, world)
    print0(f"model parameters:{sum(p.numel() for p in base_model.parameters())}")
    warm_up(model, base_model, optimizers, args, world)

    loader = TrainLoader(args.train_files, args, world)
    clock = TrainClock()
    swa = train(model, base_model, optimizers, loader, args, world, val_tokens, tables, clock)
    model_bytes = finish_training(base_model, swa, loader, args, clock, world)

    if world.master:
        report_size(args, model_bytes)
    barrier()
    evaluate(model, base_model, args, val_tokens, tables, world)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
