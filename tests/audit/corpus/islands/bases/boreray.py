"""
A small transformer and a large contingency table.

Let x_0, ..., x_{T-1} be the validation stream over the alphabet V (1,024 SentencePiece tokens). The submission predicts

    p_t(a) = (1 - w_t) * m_t(a) + w_t * g_t(a),        a in V,

where
    m_t   is the softmax of a 10-layer transformer that sees at most 1,024 past tokens,
    g_t   is a hierarchical Dirichlet n-gram predictor whose counts come from *completed chunks* of the same stream,
    w_t   is a logistic function of the entropy of m_t and of the depth of the backoff; it does not know x_t.

Both m_t and g_t are explicit vectors of 1,024 non-negative numbers that sum to one, hence so is p_t: a convex combination.
No hashing of the predicted token takes place anywhere. Contexts of three and four tokens share rows of a table (a
collision merges two *contexts*, which costs us precision but not the unit sum).

What is done when, and on whose time:

    warm-up            random tokens, weights restored                    before the clock
    training           until train_seconds - reserve_seconds              in the ten minutes
    EMA, moments       weights averaged, 12 batches of training data      in the ten minutes (reserve)
    codes, zlib        clip search per row, one file                      in the ten minutes (reserve)
    evaluation         one pass over the stream, chunk by chunk           about four minutes of its own ten

Notation in the code: m = transformer, g = n-gram predictor, p = mixture, w = weight, h = second moments or hidden
states, d = Dirichlet mass, n = number of times a context was met, T = length of the stream, K = longest context.

Run:    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import glob
import io
import json
import math
import os
import random
import sys
import time
import uuid
import zlib
from types import SimpleNamespace

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LN2 = math.log(2.0)
BOS = 1  # every document of the stream begins with this token


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


def env(name, default):
    """Setting `name` from the environment, in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    return type(default)(raw)


def read_settings() -> SimpleNamespace:
    c = SimpleNamespace()

    # data
    c.data_path = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    c.train_files = os.path.join(c.data_path, "fineweb_train_*.bin")
    c.val_files = os.path.join(c.data_path, "fineweb_val_*.bin")
    c.tokenizer_path = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    c.run_id = env("RUN_ID", str(uuid.uuid4()))
    c.seed = env("SEED", 1337)

    # clock. The reserve pays for the EMA swap, the moments, the clip search and the writing of the artifact.
    c.train_seconds = env("TRAIN_SECONDS", 600.0)
    c.reserve_seconds = env("RESERVE_SECONDS", 24.0)
    c.max_steps = env("MAX_STEPS", 20000)
    c.warmup_steps = env("WARMUP_STEPS", 12)
    c.log_every = env("LOG_EVERY", 200)
    c.val_every = env("VAL_EVERY", 0)

    # batch
    c.batch_tokens = env("BATCH_TOKENS", 524288)
    c.seq_len = env("SEQ_LEN", 1024)

    # model
    c.vocab = env("VOCAB", 1024)
    c.layers = env("LAYERS", 10)
    c.dim = env("DIM", 512)
    c.heads = env("HEADS", 8)
    c.kv_heads = env("KV_HEADS", 4)
    c.hidden = env("HIDDEN", 1280)
    c.rope_base = env("ROPE_BASE", 10000.0)
    c.softcap = env("SOFTCAP", 30.0)
    c.embed_std = env("EMBED_STD", 0.005)
    c.q_gain = env("Q_GAIN", 1.5)

    # optimiser
    c.matrix_lr = env("MATRIX_LR", 0.032)
    c.embed_lr = env("EMBED_LR", 0.05)
    c.scalar_lr = env("SCALAR_LR", 0.03)
    c.muon_momentum = env("MUON_MOMENTUM", 0.95)
    c.muon_momentum_start = env("MUON_MOMENTUM_START", 0.85)
    c.muon_momentum_steps = env("MUON_MOMENTUM_STEPS", 600)
    c.muon_iterations = env("MUON_ITERATIONS", 5)
    c.muon_decay = env("MUON_DECAY", 0.02)
    c.beta1 = env("BETA1", 0.9)
    c.beta2 = env("BETA2", 0.95)
    c.adam_eps = env("ADAM_EPS", 1e-8)
    c.grad_clip = env("GRAD_CLIP", 0.5)
    c.cooldown = env("COOLDOWN", 0.42)

    # averaging
    c.ema_decay = env("EMA_DECAY", 0.997)
    c.ema_start = env("EMA_START", 200)

    # quantisation
    c.moment_batches = env("MOMENT_BATCHES", 12)
    c.clip_grid = env("CLIP_GRID", 24)
    c.clip_low = env("CLIP_LOW", 0.55)
    c.size_limit = env("SIZE_LIMIT", 16_000_000)
    c.artifact = env("ARTIFACT", "final_model.int6.ptz")

    # evaluation
    c.stride = env("STRIDE", 64)
    c.eval_windows = env("EVAL_WINDOWS", 128)
    c.chunk_blocks = env("CHUNK_BLOCKS", 16384)
    c.eval_seconds = env("EVAL_SECONDS", 600.0)

    # n-gram predictor
    c.order = env("NGRAM_ORDER", 4)
    c.rows = env("NGRAM_ROWS", 1 << 20)
    c.min_count = env("NGRAM_MIN_COUNT", 1)
    c.strength = (0.0, 48.0, 12.0, 4.0, 2.0)  # Dirichlet mass of orders 0..4; order 0 has the flat prior
    c.w_max = env("W_MAX", 0.55)
    c.w_slope = env("W_SLOPE", 1.1)
    c.w_centre = env("W_CENTRE", 2.6)

    # adaptation of the small parameters, after a chunk has been scored
    c.adapt = env("ADAPT", True)
    c.adapt_lr = env("ADAPT_LR", 2e-3)
    c.adapt_momentum = env("ADAPT_MOMENTUM", 0.9)
    c.adapt_batch = env("ADAPT_BATCH", 32)
    c.adapt_epochs = env("ADAPT_EPOCHS", 1)

    # diagnostics, none of which enters the score
    c.audit_rows = env("AUDIT_ROWS", 512)
    c.bootstrap = env("BOOTSTRAP", 2000)
    c.byte_check_docs = env("BYTE_CHECK_DOCS", 200)
    return c


# ----------------------------------------------------------------------------------------------------------------------
# Processes, logs, clocks
# ----------------------------------------------------------------------------------------------------------------------


def start_processes() -> SimpleNamespace:
    """Rank, world and device. A single process works too (world = 1)."""
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if not torch.cuda.is_available():
        raise RuntimeError("this script wants a GPU")
    if 8 % world:
        raise ValueError(f"the number of processes must divide 8, not {world}")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return SimpleNamespace(rank=rank, world=world, device=device, distributed=distributed, main=rank == 0)


def barrier(dv) -> None:
    torch.cuda.synchronize()
    if dv.distributed:
        dist.barrier()


def total_over_ranks(x: Tensor, dv) -> Tensor:
    """Sum over ranks, in place."""
    if dv.distributed:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def slowest(seconds: float, dv) -> float:
    """The largest of the ranks' clocks: all ranks take the same decision from it."""
    t = torch.tensor([seconds], device=dv.device, dtype=torch.float64)
    if dv.distributed:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return float(t.item())


def make_log(c, dv):
    path = os.path.join("logs", f"{c.run_id}.txt")
    if dv.main:
        os.makedirs("logs", exist_ok=True)

    def log(message: str, console: bool = True) -> None:
        if not dv.main:
            return
        if console:
            print(message, flush=True)
        with open(path, "a", encoding="utf-8") as f:
            print(message, file=f)

    return log


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and bytes
#
# Score = sum_t -ln p_t(x_t) / ln 2 / B with B the number of UTF-8 bytes of the original text. For a SentencePiece
# model B is additive over tokens but for one thing: the mark U+2581 at the head of a piece stands for one space, and
# this space does not exist at the beginning of a document (the tokenizer put it there). So
#
#     bytes(x_t | x_{t-1}) = len(piece without its mark) + [piece has a mark and x_{t-1} is no control token].
# ----------------------------------------------------------------------------------------------------------------------


def byte_tables(sp: spm.SentencePieceProcessor, vocab: int, device) -> SimpleNamespace:
    size = max(int(sp.vocab_size()), vocab)
    body = np.zeros(size, dtype=np.int64)  # bytes without a leading space
    space = np.zeros(size, dtype=bool)  # does the piece begin with the mark?
    control = np.ones(size, dtype=bool)  # BOS, EOS, unknown, unused: no text
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        control[i] = False
        if sp.is_byte(i):
            body[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            space[i] = True
            piece = piece[1:]
        body[i] = len(piece.encode("utf-8"))
    as_tensor = lambda a: torch.from_numpy(a).to(device)  # noqa: E731
    return SimpleNamespace(body=as_tensor(body), space=as_tensor(space), control=as_tensor(control))


def bytes_of(tables, previous: Tensor, target: Tensor) -> Tensor:
    """Bytes of each target token, given the token before it."""
    lead = tables.space[target] & ~tables.control[previous]
    return tables.body[target] + lead.to(torch.int64)


def compare_bytes_with_text(sp, tables, val: Tensor, c, log) -> None:
    """
    A check of the tables against decoded text, on a few whole documents. Byte-fallback sequences that are no valid
    UTF-8 decode to U+FFFD, so documents that contain one are passed over.
    """
    starts = (val[: 4_000_000] == BOS).nonzero().flatten().tolist()
    by_table, by_text, used = 0, 0, 0
    for a, b in zip(starts[: c.byte_check_docs], starts[1 : c.byte_check_docs + 1]):
        ids = val[a + 1 : b]
        text = sp.decode(ids.tolist())
        if "\ufffd" in text or ids.numel() == 0:
            continue
        by_text += len(text.encode("utf-8"))
        by_table += int(bytes_of(tables, val[a:b - 1], ids).sum())
        used += 1
    log(f"bytes: {used} documents, table {by_table}, decoded text {by_text}")


# ----------------------------------------------------------------------------------------------------------------------
# Shards
# ----------------------------------------------------------------------------------------------------------------------


def read_shard(path: str) -> np.ndarray:
    """Tokens of one .bin file: 256 int32 of header, then uint16."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"{path}: unexpected header")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=256 * 4)
    if tokens.size != count:
        raise ValueError(f"{path}: {tokens.size} tokens, the header promises {count}")
    return tokens


def read_validation(pattern: str) -> Tensor:
    """The whole validation stream, in file order, as int64."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(pattern)
    return torch.from_numpy(np.concatenate([read_shard(f) for f in files]).astype(np.int64))


def train_batches(pattern: str, dv, tokens_per_rank: int, seq_len: int):
    """
    Endless (x, y) pairs. Each step takes one contiguous span for all ranks together, of which rank r reads the r-th
    part; the last token of a span is the first of the next, so that no transition is lost.
    """
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(pattern)
    at, shard, position = 0, read_shard(files[0]), 0
    need = tokens_per_rank * dv.world + 1
    while True:
        parts, have = [], 0
        while have < need:
            if position >= len(shard):
                at = (at + 1) % len(files)
                shard, position = read_shard(files[at]), 0
            part = shard[position : position + need - have]
            parts.append(part)
            position += len(part)
            have += len(part)
        position -= 1
        span = parts[0] if len(parts) == 1 else np.concatenate(parts)
        low = dv.rank * tokens_per_rank
        local = torch.from_numpy(span[low : low + tokens_per_rank + 1].astype(np.int64))
        local = local.pin_memory().to(dv.device, non_blocking=True)
        yield local[:-1].view(-1, seq_len), local[1:].view(-1, seq_len)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Dense(nn.Linear):
    """Weights live in fp32 and act in the type of the input."""

    def __init__(self, fan_in: int, fan_out: int, zero: bool = False):
        super().__init__(fan_in, fan_out, bias=False)
        if zero:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotary_tables(length: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    inverse = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, time, head, width]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Block(nn.Module):
    """Attention and MLP, each with a learned gain per channel and a mix of the stream with the embedding."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.width = c.heads, c.kv_heads, c.dim // c.heads
        self.wq = Dense(c.dim, c.dim)
        self.wk = Dense(c.dim, c.kv_heads * self.width)
        self.wv = Dense(c.dim, c.kv_heads * self.width)
        self.wo = Dense(c.dim, c.dim, zero=True)
        self.up = Dense(c.dim, c.hidden)
        self.down = Dense(c.hidden, c.dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((c.heads,), float(c.q_gain)))
        self.attn_gain = nn.Parameter(torch.ones(c.dim))
        self.mlp_gain = nn.Parameter(torch.ones(c.dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(c.dim), torch.zeros(c.dim))))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = rotate(rms(self.wq(x).view(n, t, self.heads, self.width)), cos, sin)
        k = rotate(rms(self.wk(x).view(n, t, self.kv_heads, self.width)), cos, sin)
        v = self.wv(x).view(n, t, self.kv_heads, self.width)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.wo(y.transpose(1, 2).reshape(n, t, -1))

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_gain.to(x.dtype) * self.attend(rms(x), cos, sin)
        h = F.relu(self.up(rms(x)))
        return x + self.mlp_gain.to(x.dtype) * self.down(h * h)


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.softcap = c.softcap
        self.embed = nn.Embedding(c.vocab, c.dim)
        nn.init.normal_(self.embed.weight, std=c.embed_std)
        self.smear_gate = nn.Parameter(torch.full((c.dim,), -2.0))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.encoder = c.layers // 2
        self.skip = nn.Parameter(torch.ones(c.layers - self.encoder, c.dim))
        self.out_bias = nn.Parameter(torch.zeros(c.vocab))
        cos, sin = rotary_tables(c.seq_len, c.dim // c.heads, c.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def smear(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Adds a gated copy of the previous token's vector, except where a document begins."""
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (tokens != BOS).to(x.dtype).unsqueeze(-1)
        return x + torch.sigmoid(self.smear_gate).to(x.dtype) * previous * inside

    def features(self, tokens: Tensor) -> Tensor:
        """[batch, time] -> [batch, time, dim]; position i sees tokens 0..i."""
        t = tokens.size(1)
        x = rms(self.embed(tokens).to(torch.bfloat16))
        x = self.smear(x, tokens)
        cos, sin = self.cos[:, :t].to(x.dtype), self.sin[:, :t].to(x.dtype)
        x0, kept = x, []
        for i, block in enumerate(self.blocks):
            if i >= self.encoder and kept:
                x = x + self.skip[i - self.encoder].to(x.dtype) * kept.pop()
            x = block(x, x0, cos, sin)
            if i < self.encoder:
                kept.append(x)
        return rms(x)

    def logits(self, h: Tensor) -> Tensor:
        """Tied head, soft cap, bias; fp32."""
        z = F.linear(h, self.embed.weight.to(h.dtype)).float() + self.out_bias.float()
        return self.softcap * torch.tanh(z / self.softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        z = self.logits(self.features(tokens))
        return F.cross_entropy(z.flatten(0, 1), targets.flatten())


def small_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Gains, gates and biases: what the adaptation may move (about 12 thousand numbers of 21 million)."""
    return [p for p in model.parameters() if p.ndim < 2]


# ----------------------------------------------------------------------------------------------------------------------
# Optimisers
# ----------------------------------------------------------------------------------------------------------------------


def orthogonal(g: Tensor, iterations: int) -> Tensor:
    """
    Newton-Schulz towards U V' of g = U S V'. The quintic a + b s^2 + c s^4 has a steep slope at zero and keeps the
    singular values near one; it need not converge, a spectrum in about [0.7, 1.2] does as well.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(iterations):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation. Rank r treats the matrices i = r mod world; the updates are summed."""

    def __init__(self, params, lr: float, momentum: float, iterations: int, decay: float, dv):
        super().__init__(params, dict(lr=lr, momentum=momentum, iterations=iterations, decay=decay))
        self.dv = dv

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            offset = 0
            for i, p in enumerate(params):
                if i % self.dv.world == self.dv.rank and p.grad is not None:
                    state = self.state[p]
                    if "m" not in state:
                        state["m"] = torch.zeros_like(p)
                    m = state["m"]
                    m.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(m, alpha=group["momentum"])
                    u = orthogonal(g, group["iterations"])
                    u = u * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[offset : offset + p.numel()] = u.flatten()
                offset += p.numel()
            total_over_ranks(flat, self.dv)
            offset = 0
            for p in params:
                u = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["decay"]).add_(u, alpha=-group["lr"])
                offset += p.numel()


def make_optimisers(model: Transformer, c, dv) -> tuple[Muon, torch.optim.Optimizer]:
    matrices, scalars = [], []
    for name, p in model.named_parameters():
        if name == "embed.weight":
            continue
        is_matrix = p.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight")
        (matrices if is_matrix else scalars).append(p)
    muon = Muon(matrices, c.matrix_lr, c.muon_momentum, c.muon_iterations, c.muon_decay, dv)
    adam = torch.optim.AdamW(
        [
            {"params": [model.embed.weight], "lr": c.embed_lr},
            {"params": scalars, "lr": c.scalar_lr},
        ],
        betas=(c.beta1, c.beta2),
        eps=c.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    for opt in (muon, adam):
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return muon, adam


def average_gradients(params: list[nn.Parameter], dv) -> None:
    """Mean over ranks, one collective for all tensors."""
    grads = [p.grad for p in params if p.grad is not None]
    if not dv.distributed or not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    flat.div_(dv.world)
    offset = 0
    for g in grads:
        g.copy_(flat[offset : offset + g.numel()].view_as(g))
        offset += g.numel()


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def rate(fraction: float, c) -> float:
    """Learning rate relative to its peak when this fraction of the time is spent: flat, then linear to zero."""
    return min(1.0, max(0.0, (1.0 - fraction) / c.cooldown))


def momentum_at(step: int, c) -> float:
    s = min(step / c.muon_momentum_steps, 1.0)
    return (1.0 - s) * c.muon_momentum_start + s * c.muon_momentum


def ema_begin(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def ema_update(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """e <- decay * e + (1 - decay) * w; the effective window is 1 / (1 - decay) steps."""
    names = list(ema)
    weights = dict(model.named_parameters())
    torch._foreach_lerp_([ema[n] for n in names], [weights[n].detach() for n in names], 1.0 - decay)


@torch.no_grad()
def ema_apply(ema: dict[str, Tensor], model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.copy_(ema[name])


def compile_warmup(fast, model, optimisers, c, dv, shape: tuple[int, int]) -> None:
    """
    Builds the kernels on random tokens; weights and optimiser states are put back afterwards, so that the clock starts
    with an untouched model.
    """
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    moments = [opt.state_dict() for opt in optimisers]
    moments = [json_free_copy(m) for m in moments]
    generator = torch.Generator(device=dv.device).manual_seed(0)
    for _ in range(c.warmup_steps):
        x = torch.randint(0, c.vocab, shape, device=dv.device, generator=generator)
        fast(x, x.roll(-1, 1)).backward()
        average_gradients(list(model.parameters()), dv)
        for opt in optimisers:
            opt.step()
        model.zero_grad(set_to_none=True)
    model.load_state_dict(weights)
    for opt, m in zip(optimisers, moments):
        opt.state.clear()
        opt.load_state_dict(m)


def json_free_copy(state):
    """Deep copy of an optimiser's state dict (tensors cloned)."""
    if isinstance(state, dict):
        return {k: json_free_copy(v) for k, v in state.items()}
    if isinstance(state, list):
        return [json_free_copy(v) for v in state]
    return state.clone() if isinstance(state, Tensor) else state


def train(model: Transformer, c, dv, tables, log) -> tuple[float, int]:
    """
    Trains until the clock, shared by all ranks, reaches train_seconds - reserve_seconds. Leaves the averaged weights in
    the model. Returns the time at which the clock started (for those who spend the reserve) and the steps taken.
    """
    accumulate = 8 // dv.world
    per_rank = c.batch_tokens // (dv.world * accumulate)
    if per_rank % c.seq_len:
        raise ValueError("BATCH_TOKENS must give whole sequences to each rank")
    batches = train_batches(c.train_files, dv, per_rank, c.seq_len)
    optimisers = make_optimisers(model, c, dv)
    muon = optimisers[0]
    params = list(model.parameters())
    fast = torch.compile(model, dynamic=False)
    compile_warmup(fast, model, optimisers, c, dv, (per_rank // c.seq_len, c.seq_len))
    log(f"warmup: {c.warmup_steps} steps on random tokens, state restored")

    budget = c.train_seconds - c.reserve_seconds
    ema = None
    barrier(dv)
    started = time.perf_counter()
    step, elapsed, paused = 0, 0.0, 0.0
    while step < c.max_steps:
        # The ranks agree on the time every fifth step; five steps are about half a second, the reserve covers that.
        if step % 5 == 0:
            elapsed = slowest(time.perf_counter() - started - paused, dv)
            if elapsed >= budget:
                break
        if c.val_every and step and step % c.val_every == 0:
            torch.cuda.synchronize()
            before = time.perf_counter()
            nats, bpb = validate(model, read_validation(c.val_files), tables, c, dv)
            log(f"step {step} diag_val_loss {nats:.4f} diag_val_bpb {bpb:.4f}")
            paused += time.perf_counter() - before
        scale = rate(elapsed / budget, c)
        for opt in optimisers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        for group in muon.param_groups:
            group["momentum"] = momentum_at(step, c)

        loss_sum = torch.zeros((), device=dv.device)
        for _ in range(accumulate):
            x, y = next(batches)
            loss = fast(x, y) / accumulate
            loss.backward()
            loss_sum += loss.detach()
        average_gradients(params, dv)
        if c.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(params, c.grad_clip)
        for opt in optimisers:
            opt.step()
        model.zero_grad(set_to_none=True)
        step += 1

        if step == c.ema_start:
            ema = ema_begin(model)
        elif ema is not None:
            ema_update(ema, model, c.ema_decay)
        if step % c.log_every == 0 or step <= 5:
            spent = time.perf_counter() - started - paused
            log(f"step {step} train_loss {loss_sum.item():.4f} lr {scale:.3f} seconds {spent:.1f}")

    if ema is not None:
        ema_apply(ema, model)
    barrier(dv)
    log(f"training: {step} steps in {time.perf_counter() - started - paused:.1f} s")
    return started + paused, step


# ----------------------------------------------------------------------------------------------------------------------
# Quantisation
#
# For a matrix W (rows = outputs) and inputs x with second moments h_j = E x_j^2 the expected squared error of row r is,
# if we neglect the correlations between inputs,
#
#     E ((W_r - Q_r) x)^2  ~  sum_j h_j (W_rj - Q_rj)^2.
#
# The step of each row is chosen on a grid so as to minimise this. h is estimated on a few training batches, read within
# the ten minutes of training. Matrices of the blocks get 6 bits (levels -31..31), the embedding, which is also the head
# and meets every prediction twice, gets 8 bits (-127..127) with a step per row. All else stays in fp16.
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def input_moments(model: Transformer, c, dv) -> dict[str, Tensor]:
    """E x_j^2 of the inputs of each Dense layer, over training batches and over ranks."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    hooks = []

    def watch(name):
        def hook(_module, inputs):
            x = inputs[0].detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0.0) + x.square().sum(0)
            rows[name] = rows.get(name, 0) + x.size(0)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Dense):
            hooks.append(module.register_forward_pre_hook(watch(name + ".weight")))
    source = train_batches(c.train_files, dv, 32 * c.seq_len, c.seq_len)
    for _ in range(c.moment_batches):
        x, _ = next(source)
        model.features(x)
    for hook in hooks:
        hook.remove()
    moments = {}
    for name in sorted(sums):
        total = total_over_ranks(sums[name].double(), dv)
        moments[name] = (total / (rows[name] * dv.world)).float()
    return moments


def round_to_levels(w: Tensor, step: Tensor, top: int) -> Tensor:
    return torch.clamp(torch.round(w / step[:, None]), -top, top)


@torch.no_grad()
def quantise_matrix(w: Tensor, h: Tensor | None, bits: int, c) -> tuple[Tensor, Tensor]:
    """Codes (int8) and steps (fp16, one per row) that minimise the weighted squared error on the grid of clips."""
    top = 2 ** (bits - 1) - 1
    w = w.float()
    weight = torch.ones(w.size(1), device=w.device) if h is None else h / h.mean().clamp_min(1e-12)
    widest = w.abs().amax(1).clamp_min(1e-8)
    best = torch.full((w.size(0),), float("inf"), device=w.device)
    step = widest / top
    for share in torch.linspace(c.clip_low, 1.0, c.clip_grid).tolist():
        candidate = (widest * share / top).half().float().clamp_min(6e-8)
        error = ((w - round_to_levels(w, candidate, top) * candidate[:, None]).square() * weight).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        step = torch.where(better, candidate, step)
    step = step.half()
    codes = round_to_levels(w, step.float().clamp_min(6e-8), top).to(torch.int8)
    return codes, step


def bits_of(name: str, p: Tensor) -> int:
    """8 for the embedding, 6 for the matrices of the blocks, 0 (that is, fp16) for the rest."""
    if name == "embed.weight":
        return 8
    if p.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight"):
        return 6
    return 0


def quantise(model: Transformer, moments: dict[str, Tensor], c) -> dict[str, object]:
    packed: dict[str, object] = {}
    for name, p in model.named_parameters():
        bits = bits_of(name, p)
        if bits:
            codes, step = quantise_matrix(p.detach(), moments.get(name), bits, c)
            packed[name] = (codes.cpu(), step.cpu())
        else:
            packed[name] = p.detach().half().cpu()
    return packed


def write_artifact(packed: dict[str, object], path: str) -> int:
    """
    torch.save into zlib. A 6-bit code in its own byte costs about 5.5 bits after deflate, since the codes are close to
    Gaussian; packing four of them into three bytes would hide the skewness from the coder and cost six.
    """
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    blob = zlib.compress(buffer.getvalue(), 9)
    with open(path, "wb") as f:
        f.write(blob)
    return len(blob)


def read_artifact(path: str, c, dv) -> Transformer:
    """A fresh model with the weights of the artifact and nothing else."""
    with open(path, "rb") as f:
        packed = torch.load(io.BytesIO(zlib.decompress(f.read())), map_location="cpu", weights_only=True)
    model = Transformer(c)
    state = {}
    for name, entry in packed.items():
        if isinstance(entry, tuple):
            codes, step = entry
            state[name] = codes.float() * step.float()[:, None]
        else:
            state[name] = entry.float()
    model.load_state_dict(state)
    return model.to(dv.device)


def code_bytes() -> int:
    with open(__file__, "rb") as f:
        return len(f.read())


def report_size(model_bytes: int, c, log) -> int:
    code = code_bytes()
    total = code + model_bytes
    log(f"size: code {code} + model {model_bytes} = {total} bytes")
    if total > c.size_limit:
        raise RuntimeError(f"{total} bytes are more than {c.size_limit}")
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Plain validation (no cache, disjoint windows): a diagnostic, printed under its own name
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model: Transformer, val: Tensor, tables, c, dv) -> tuple[float, float]:
    """Loss in nats per token and bits per byte of the transformer alone on disjoint windows."""
    windows = (val.numel() - 1) // c.seq_len
    low, high = windows * dv.rank // dv.world, windows * (dv.rank + 1) // dv.world
    sums = torch.zeros(3, dtype=torch.float64, device=dv.device)
    for a in range(low, high, c.eval_windows):
        b = min(a + c.eval_windows, high)
        local = val[a * c.seq_len : b * c.seq_len + 1].to(dv.device)
        x, y = local[:-1].view(-1, c.seq_len), local[1:].view(-1, c.seq_len)
        z = model.logits(model.features(x))
        sums[0] += F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum").double()
        sums[1] += y.numel()
        sums[2] += bytes_of(tables, x, y).sum()
    total_over_ranks(sums, dv)
    nats, count, size = sums.tolist()
    return nats / count, nats / LN2 / size


# ----------------------------------------------------------------------------------------------------------------------
# The n-gram predictor
#
# Let c_k(u, a) be the number of times token a followed the k-token context u in the completed chunks, and n_k(u) the sum
# of c_k(u, a) over a in V. With g_0 the smoothed unigram distribution we set, for k = 1, 2, ..., K,
#
#     g_k(a) = (c_k(u, a) + d_k g_{k-1}(a)) / (n_k(u) + d_k)     if n_k(u) >= min_count,      g_k = g_{k-1} otherwise.
#
# Summing over a: (n_k + d_k) / (n_k + d_k) = 1, by induction for every k. This is the posterior mean under a Dirichlet
# prior with mass d_k centred at the shorter context's predictor (MacKay and Peto, 1995).
#
# Rows. k = 1: the token, 1,024 rows. k = 2: the pair, 1,024^2 = 2^20 rows, exact. k > 2: a hash of the context into 2^20
# rows. Columns are tokens in every table, so a row is always a complete vector of counts. int32, 4 GiB per order >= 2.
#
# A context does not reach over the beginning of a document: what lies before the last BOS reads as BOS.
# ----------------------------------------------------------------------------------------------------------------------


def new_cache(c, dv) -> SimpleNamespace:
    """Empty tables: no count is older than the evaluation."""
    counts: list[Tensor | None] = [None]
    for k in range(1, c.order + 1):
        rows = c.vocab if k == 1 else c.vocab**2 if k == 2 else c.rows
        counts.append(torch.zeros(rows, c.vocab, dtype=torch.int32, device=dv.device))
    unigram = torch.zeros(c.vocab, dtype=torch.float64, device=dv.device)
    return SimpleNamespace(counts=counts, unigram=unigram, seen=0)


def contexts(val: Tensor, positions: Tensor, order: int) -> Tensor:
    """[N] positions -> [N, order]; column j holds the token j + 1 places before the position."""
    columns: list[Tensor] = []
    for back in range(1, order + 1):
        where = positions - back
        token = torch.where(where >= 0, val[where.clamp_min(0)], BOS)
        if columns:
            token = torch.where(columns[-1] == BOS, BOS, token)
        columns.append(token)
    return torch.stack(columns, dim=-1)


def row_of(context: Tensor, k: int, c) -> Tensor:
    """Row of the k-token context in table k."""
    if k == 1:
        return context[:, 0]
    if k == 2:
        return context[:, 0] * c.vocab + context[:, 1]
    h = torch.full_like(context[:, 0], 0x9E3779B9 + k)
    for j in range(k):
        h = (h ^ (context[:, j] + 1)) * 0x100000001B3
        h = h ^ (h >> 29)
    return h & (c.rows - 1)


@torch.no_grad()
def add_to_cache(cache, val: Tensor, low: int, high: int, c) -> None:
    """Counts the tokens at positions low <= t < high, each with its own past."""
    for a in range(low, high, 1 << 20):
        positions = torch.arange(a, min(a + (1 << 20), high), device=val.device)
        token = val[positions]
        context = contexts(val, positions, c.order)
        ones = torch.ones_like(token, dtype=torch.int32)
        for k in range(1, c.order + 1):
            flat = row_of(context, k, c) * c.vocab + token
            cache.counts[k].view(-1).index_add_(0, flat, ones)
        cache.unigram += torch.bincount(token, minlength=c.vocab).double()
    cache.seen += high - low


@torch.no_grad()
def ngram_distribution(cache, context: Tensor, c) -> tuple[Tensor, Tensor]:
    """
    [N, K] contexts -> [N, V] probabilities and [N] depths (the longest context with enough evidence, 0..K).
    """
    n_rows = context.size(0)
    base = ((cache.unigram + 1.0) / (cache.unigram + 1.0).sum()).float()
    g = base.expand(n_rows, c.vocab)
    depth = torch.zeros(n_rows, device=context.device)
    for k in range(1, c.order + 1):
        counts = cache.counts[k][row_of(context, k, c)].float()
        n = counts.sum(-1, keepdim=True)
        d = c.strength[k]
        deeper = (counts + d * g) / (n + d)
        enough = n >= c.min_count
        g = torch.where(enough, deeper, g)
        depth = torch.where(enough[:, 0], float(k), depth)
    return g, depth


# ----------------------------------------------------------------------------------------------------------------------
# The mixture
# ----------------------------------------------------------------------------------------------------------------------


def mixing_weight(entropy: Tensor, depth: Tensor, c) -> Tensor:
    """
    w = w_max * sigmoid(slope * (H - centre)) * depth / K. Where the transformer is sure (H small) it is left alone;
    where it is not, a deep match in the stream says more than it does. The constants were chosen on training shards.
    """
    return c.w_max * torch.sigmoid(c.w_slope * (entropy - c.w_centre)) * depth / c.order


def mix(log_m: Tensor, g: Tensor, depth: Tensor, c) -> tuple[Tensor, Tensor, Tensor]:
    """[N, V] log-probabilities and [N, V] probabilities -> mixture [N, V], its weights [N], entropies [N]."""
    m = log_m.exp()
    entropy = -(m * log_m).sum(-1)
    w = mixing_weight(entropy, depth, c)
    return torch.lerp(m, g, w[:, None]), w, entropy


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
#
# The targets x_1 .. x_{T-1} are cut into blocks of `stride`; a block is predicted from one window that ends with the
# block and holds up to seq_len inputs, so each target is in exactly one block and is scored exactly once. Blocks are
# grouped into chunks. All ranks work on the same chunk, each on its own contiguous part:
#
#     score chunk j with counts and gains that know chunks 0 .. j-1 only;  wait for all ranks;  count chunk j;  adapt.
#
# The counts are functions of the token stream, hence equal on all ranks, and are kept by each rank for itself.
# ----------------------------------------------------------------------------------------------------------------------


def part_of_rank(low: int, high: int, dv) -> tuple[int, int]:
    n = high - low
    return low + n * dv.rank // dv.world, low + n * (dv.rank + 1) // dv.world


def block_windows(blocks: Tensor, val: Tensor, c) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Inputs [B, L], target positions [B, S], their offsets in the windows [B, S] and which of them exist [B, S] (the last
    block may be short). Windows at the very beginning reach beyond their targets; attention is causal, so that has no
    influence.
    """
    last = val.numel() - 1
    low = blocks * c.stride + 1
    start = (low + c.stride - 1 - c.seq_len).clamp(0, last - c.seq_len)
    inputs = val[start[:, None] + torch.arange(c.seq_len, device=val.device)]
    position = low[:, None] + torch.arange(c.stride, device=val.device)
    exists = position <= last
    position = position.clamp_max(last)
    return inputs, position, position - 1 - start[:, None], exists


@torch.no_grad()
def window_log_probabilities(model, features, inputs: Tensor, offset: Tensor) -> Tensor:
    """[B, L] inputs, [B, S] offsets -> [B * S, V] log-probabilities of the transformer."""
    h = features(inputs)
    h = h.gather(1, offset[:, :, None].expand(-1, -1, h.size(-1)))
    return F.log_softmax(model.logits(h), dim=-1).flatten(0, 1)


@torch.no_grad()
def score_blocks(model, features, cache, blocks: Tensor, val: Tensor, tables, c) -> SimpleNamespace:
    """Losses of the targets of some blocks. Nothing that outlives the call is changed."""
    inputs, position, offset, exists = block_windows(blocks, val, c)
    log_m = window_log_probabilities(model, features, inputs, offset)
    position, exists = position.flatten(), exists.flatten()
    g, depth = ngram_distribution(cache, contexts(val, position, c.order), c)
    p, w, entropy = mix(log_m, g, depth, c)
    target = val[position]
    loss = -p.gather(1, target[:, None]).squeeze(1).log()
    loss_m = -log_m.gather(1, target[:, None]).squeeze(1)
    size = bytes_of(tables, val[position - 1], target)
    return SimpleNamespace(
        loss=loss[exists].double(),
        loss_m=loss_m[exists].double(),
        size=size[exists],
        w=w[exists],
        entropy=entropy[exists],
        depth=depth[exists],
        p=p,
    )


def adapt(model: Transformer, optimiser, val: Tensor, low: int, high: int, c, dv) -> float:
    """
    SGD on the small parameters over the scored targets low <= t < high. The chunk is cut into whole sequences, rank r
    takes the r-th part; gradients are averaged, so the gains stay equal on all ranks.
    """
    per_rank = (high - low) // c.seq_len // dv.world
    first = low - 1 + dv.rank * per_rank * c.seq_len
    params = small_parameters(model)
    total, steps = 0.0, 0
    for _ in range(c.adapt_epochs):
        for a in range(0, per_rank - c.adapt_batch + 1, c.adapt_batch):
            begin = first + a * c.seq_len
            local = val[begin : begin + c.adapt_batch * c.seq_len + 1]
            x, y = local[:-1].view(-1, c.seq_len), local[1:].view(-1, c.seq_len)
            loss = model(x, y)
            loss.backward()
            average_gradients(params, dv)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            total, steps = total + float(loss.detach()), steps + 1
    return total / max(steps, 1)


def prepare_adaptation(model: Transformer, c) -> torch.optim.Optimizer:
    for p in model.parameters():
        p.requires_grad_(False)
    params = small_parameters(model)
    for p in params:
        p.requires_grad_(True)
    return torch.optim.SGD(params, lr=c.adapt_lr, momentum=c.adapt_momentum)


def adaptation_rate(chunk: int, chunks: int, c) -> float:
    """Cosine from adapt_lr to zero over the stream."""
    return c.adapt_lr * 0.5 * (1.0 + math.cos(math.pi * chunk / max(chunks, 1)))


def evaluate(model: Transformer, val: Tensor, tables, c, dv, log) -> SimpleNamespace:
    """One pass from left to right. Returns sums over all ranks: the score and what the diagnostics want."""
    last = val.numel() - 1
    blocks = -(-last // c.stride)
    chunks = -(-blocks // c.chunk_blocks)
    cache = new_cache(c, dv)
    optimiser = prepare_adaptation(model, c)
    features = torch.compile(model.features)
    per_chunk = torch.zeros(chunks, 4, dtype=torch.float64, device=dv.device)  # loss, transformer's loss, tokens, bytes
    by_depth = torch.zeros(c.order + 1, 3, dtype=torch.float64, device=dv.device)  # tokens, loss, transformer's loss
    by_entropy = torch.zeros(14, 4, dtype=torch.float64, device=dv.device)  # tokens, loss, transformer's loss, weight
    worst = 0.0
    started = time.perf_counter()
    for j in range(chunks):
        first, end = j * c.chunk_blocks, min((j + 1) * c.chunk_blocks, blocks)
        a, b = part_of_rank(first, end, dv)
        for i in range(a, b, c.eval_windows):
            some = torch.arange(i, min(i + c.eval_windows, b), device=dv.device)
            s = score_blocks(model, features, cache, some, val, tables, c)
            per_chunk[j, 0] += s.loss.sum()
            per_chunk[j, 1] += s.loss_m.sum()
            per_chunk[j, 2] += s.loss.numel()
            per_chunk[j, 3] += s.size.sum()
            tabulate(by_depth, s.depth.long(), torch.ones_like(s.loss), s.loss, s.loss_m)
            decile = (2.0 * s.entropy).long().clamp(0, 13)
            tabulate(by_entropy, decile, torch.ones_like(s.loss), s.loss, s.loss_m, s.w.double())
            if i == a:
                worst = max(worst, unit_sum_error(s.p, c))
        barrier(dv)
        low, high = first * c.stride + 1, min(end * c.stride, last) + 1
        add_to_cache(cache, val, low, high, c)
        if c.adapt and j + 1 < chunks:
            for group in optimiser.param_groups:
                group["lr"] = adaptation_rate(j, chunks, c)
            adapt(model, optimiser, val, low, high, c, dv)
        if j % 10 == 0 or j + 1 == chunks:
            spent = time.perf_counter() - started
            log(f"chunk {j + 1}/{chunks} tokens_counted {cache.seen} seconds {spent:.1f}")
    seconds = slowest(time.perf_counter() - started, dv)
    for sums in (per_chunk, by_depth, by_entropy):
        total_over_ranks(sums, dv)
    nats, nats_m, tokens, size = per_chunk.sum(0).tolist()
    if int(tokens) != last:
        raise RuntimeError(f"{int(tokens)} targets scored, there are {last}")
    if seconds > c.eval_seconds:
        log(f"warning: the evaluation took {seconds:.1f} s, more than {c.eval_seconds:.0f}")
    return SimpleNamespace(
        loss=nats / tokens,
        bpb=nats / LN2 / size,
        bpb_m=nats_m / LN2 / size,
        tokens=int(tokens),
        bytes=int(size),
        seconds=seconds,
        worst=worst,
        per_chunk=per_chunk.cpu(),
        by_depth=by_depth.cpu(),
        by_entropy=by_entropy.cpu(),
        cache=cache,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Diagnostics
# ----------------------------------------------------------------------------------------------------------------------


def tabulate(table: Tensor, group: Tensor, *columns: Tensor) -> None:
    """table[group, column] += value."""
    table.index_add_(0, group, torch.stack([x.double() for x in columns], dim=-1))


def unit_sum_error(p: Tensor, c) -> float:
    """Largest |sum_a p(a) - 1| over some rows, in fp64. Should be of the order of fp32 rounding, 1e-6."""
    rows = p[: c.audit_rows].double()
    return float((rows.sum(-1) - 1.0).abs().max())


def bootstrap_error(per_chunk: Tensor, c) -> float:
    """
    Standard error of bits per byte, by resampling whole chunks (tokens within a document are anything but
    independent). A ratio estimator: both numerator and denominator are resampled.
    """
    n = per_chunk.size(0)
    generator = torch.Generator().manual_seed(1)
    draw = torch.randint(0, n, (c.bootstrap, n), generator=generator)
    nats = per_chunk[:, 0][draw].sum(1)
    size = per_chunk[:, 3][draw].sum(1)
    return float((nats / LN2 / size).std())


def paired_gain(per_chunk: Tensor) -> tuple[float, float]:
    """Mean and standard error over chunks of (transformer's loss - mixture's loss) per token."""
    gain = (per_chunk[:, 1] - per_chunk[:, 0]) / per_chunk[:, 2]
    return float(gain.mean()), float(gain.std() / math.sqrt(max(gain.numel(), 1)))


def print_tables(r, c, log) -> None:
    log("depth      tokens   loss  transformer")
    for k in range(c.order + 1):
        n, loss, loss_m = r.by_depth[k].tolist()
        if n:
            log(f"{k:5d} {int(n):11d} {loss / n:6.3f} {loss_m / n:12.3f}")
    log("entropy    tokens   loss  transformer  weight")
    for k in range(r.by_entropy.size(0)):
        n, loss, loss_m, w = r.by_entropy[k].tolist()
        if n:
            log(f"{k / 2:7.1f} {int(n):9d} {loss / n:6.3f} {loss_m / n:12.3f} {w / n:7.3f}")
    gain, error = paired_gain(r.per_chunk)
    log(f"paired gain of the mixture {gain:.4f} +- {error:.4f} nats per token")
    log(f"bootstrap standard error of val_bpb {bootstrap_error(r.per_chunk, c):.5f}")
    log(f"largest deviation of a sum from one {r.worst:.2e}")


@torch.no_grad()
def occupancy(cache, c, log) -> None:
    """How full the tables are: rows in use, mass per used row, and the share of rows met only once."""
    log("order       rows       used  mean_count  singletons")
    for k in range(1, c.order + 1):
        table = cache.counts[k]
        n = torch.cat([part.sum(-1, dtype=torch.int64) for part in table.split(1 << 16)])
        used = int((n > 0).sum())
        mean = float(n.sum()) / max(used, 1)
        single = int((n == 1).sum()) / max(used, 1)
        log(f"{k:5d} {table.size(0):10d} {used:10d} {mean:11.1f} {single:11.3f}")


@torch.no_grad()
def reliability(model: Transformer, c, dv, log) -> None:
    """
    Is the transformer calibrated? Bins the probability of its favourite token on a few training sequences and compares
    with the frequency of hits. Ten bins of equal width; a perfectly calibrated model has two equal columns.
    """
    x, y = next(train_batches(c.train_files, dv, 16 * c.seq_len, c.seq_len))
    p = torch.softmax(model.logits(model.features(x)), dim=-1)
    top, guess = p.max(-1)
    table = torch.zeros(10, 3, dtype=torch.float64, device=dv.device)
    group = (10.0 * top).long().clamp(0, 9).flatten()
    tabulate(table, group, torch.ones_like(top).flatten(), top.flatten(), (guess == y).double().flatten())
    total_over_ranks(table, dv)
    log("confidence   tokens  predicted  observed   (training data)")
    for k in range(10):
        n, predicted, observed = table[k].tolist()
        if n:
            log(f"{k / 10:10.1f} {int(n):8d} {predicted / n:10.3f} {observed / n:9.3f}")


def quantisation_table(model: Transformer, packed: dict[str, object], log) -> None:
    """Relative squared error of the codes, per kind of matrix, averaged over layers."""
    sums: dict[str, list[float]] = {}
    for name, p in model.named_parameters():
        entry = packed[name]
        if not isinstance(entry, tuple):
            continue
        codes, step = entry
        w = p.detach().float().cpu()
        error = (w - codes.float() * step.float()[:, None]).square().sum() / w.square().sum().clamp_min(1e-12)
        kind = name.split(".")[-2]
        sums.setdefault(kind, []).append(float(error))
    for kind, errors in sorted(sums.items()):
        log(f"quantised {kind:6s} matrices {len(errors):2d} relative error {sum(errors) / len(errors):.2e}")


def write_record(r, c, steps: int, train_seconds: float, model_bytes: int) -> None:
    """The figures of this run, for the README's table."""
    record = {
        "seed": c.seed,
        "val_loss": round(r.loss, 8),
        "val_bpb": round(r.bpb, 8),
        "steps": steps,
        "train_seconds": round(train_seconds, 1),
        "eval_seconds": round(r.seconds, 1),
        "bytes_model": model_bytes,
        "bytes_code": code_bytes(),
        "bytes_total": model_bytes + code_bytes(),
    }
    with open(os.path.join("logs", f"{c.run_id}.json"), "w", encoding="utf-8") as f:
        json.dump(record, f, indent=2)


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def describe(c, dv, model, log) -> None:
    with open(__file__, encoding="utf-8") as f:
        log(f.read(), console=False)
    log(f"python {sys.version.split()[0]} torch {torch.__version__} world {dv.world} seed {c.seed}")
    log(f"parameters {sum(p.numel() for p in model.parameters())}")
    log("settings " + json.dumps({k: v for k, v in vars(c).items()}, default=str), console=False)


def set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main() -> None:
    c = read_settings()
    dv = start_processes()
    log = make_log(c, dv)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    set_seeds(c.seed)

    sp = spm.SentencePieceProcessor(model_file=c.tokenizer_path)
    if int(sp.vocab_size()) != c.vocab:
        raise ValueError(f"tokenizer of {sp.vocab_size()} pieces, VOCAB is {c.vocab}")
    tables = byte_tables(sp, c.vocab, dv.device)

    # --- the ten minutes: weights, averages, moments, codes, file ---
    model = Transformer(c).to(dv.device)
    describe(c, dv, model, log)
    started, steps = train(model, c, dv, tables, log)
    reliability(model, c, dv, log)
    moments = input_moments(model, c, dv)
    if dv.main:
        packed = quantise(model, moments, c)
        model_bytes = write_artifact(packed, c.artifact)
    barrier(dv)
    spent = slowest(time.perf_counter() - started, dv)
    log(f"training and quantisation: {steps} steps, {spent:.1f} s of {c.train_seconds:.0f}")
    if dv.main:
        report_size(model_bytes, c, log)
        quantisation_table(model, packed, log)

    # --- the artifact, read back, meets the validation stream ---
    val = read_validation(c.val_files).to(dv.device)
    log(f"validation: {val.numel()} tokens")
    del model, moments
    torch.cuda.empty_cache()
    model = read_artifact(c.artifact, c, dv)
    r = evaluate(model, val, tables, c, dv, log)
    log(f"peak memory {torch.cuda.max_memory_allocated() // 2**20} MiB")
    log(f"evaluation: {r.seconds:.1f} s, {r.tokens} targets, {r.bytes} bytes")
    log(f"final_mixture val_loss:{r.loss:.4f} val_bpb:{r.bpb:.4f}")
    log(f"final_mixture_exact val_loss:{r.loss:.8f} val_bpb:{r.bpb:.8f}")

    # --- for the README's tables only ---
    log(f"diag_transformer_alone bpb {r.bpb_m:.5f}")
    print_tables(r, c, log)
    if dv.main:
        write_record(r, c, steps, spent, model_bytes)
        occupancy(r.cache, c, log)
        compare_bytes_with_text(sp, tables, val, c, log)
    barrier(dv)
    if dv.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
