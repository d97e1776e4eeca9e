"""fraoch: one small GPT, one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

The order of things, each a short function further down:

    data      shards of uint16 tokens, a loader that walks them, the byte tables of the tokenizer
    model     GPT with grouped-query attention, rotary positions, U-net skips, a hashed pair embedding, biases and gains
    optim     Muon for the matrices, AdamW for the rest, one EMA of everything
    train     until the clock says stop
    pack      int5 with a scale per row (searched on the weights alone), a rANS coder in numpy, one file
    score     the packed file is read back and scored over the whole validation split:
              windows are planned as a tensor of (start, first, stop) rows, a chunk of rows is scored,
              only then do gains and biases take SGD steps on it and the pair counts grow by it

The last line printed is the score, in bits per byte.
"""

import glob
import hashlib
import json
import math
import os
import random
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# settings: name=default, each may be set in the environment in capitals

DEFAULTS = dict(
    # where things are
    data_dir="./data/datasets/fineweb10B_sp1024",
    tokenizer="./data/tokenizers/fineweb_1024_bpe.model",
    out="final_model.rans",
    run_id="fraoch",
    log_dir="logs",
    seed=1337,
    # model
    vocab=1024,
    dim=512,
    layers=11,
    heads=8,
    kv_heads=4,
    mlp_mult=3,
    rope_base=10000.0,
    rope_dims=32,
    softcap=30.0,
    qk_gain=1.5,
    pair_buckets=4096,
    pair_dim=128,
    # training
    steps=20000,
    train_seconds=575.0,
    train_seq=1024,
    train_tokens=524288,
    warmup_steps=20,
    warmdown=0.45,
    lr_muon=0.025,
    lr_embed=0.035,
    lr_scalar=0.025,
    muon_momentum=0.95,
    muon_ramp=1000,
    muon_decay=0.04,
    adam_decay=0.01,
    clip=0.3,
    ema=0.997,
    qat_from=0.85,
    log_every=100,
    val_every=2000,
    # packing
    levels=15,
    embed_levels=127,
    scale_steps=24,
    scale_low=0.55,
    rans_bits=14,
    rans_lanes=2048,
    limit=16_000_000,
    # evaluation
    eval_seq=1024,
    stride=64,
    eval_batch=64,
    eval_seconds=560.0,
    ttt=True,
    ttt_windows=512,
    ttt_lr=0.004,
    ttt_momentum=0.9,
    ttt_epochs=2,
    ttt_clip=1.0,
    cache=True,
    cache_weight=0.06,
    cache_half=400.0,
    cache_prior=8.0,
    selftest=True,
)


def from_env(defaults: dict) -> SimpleNamespace:
    """The settings, each cast to the type of its default."""

    def read(name, default):
        text = os.environ.get(name.upper())
        if text is None:
            return default
        if isinstance(default, bool):
            return text.lower() not in ("0", "false", "no", "")
        return type(default)(text)

    return SimpleNamespace(**{name: read(name, default) for name, default in defaults.items()})


cfg = from_env(DEFAULTS)

# ---------------------------------------------------------------------------------------------------------------------
# ranks and the log


def start_ranks() -> SimpleNamespace:
    """Who we are. Without torchrun: one rank that talks to nobody."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", device_id=device)
    assert 8 % world == 0, "the batch is cut in eighths"
    return SimpleNamespace(world=world, rank=rank, device=device, accum=8 // world, first=rank == 0)


def total(t: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if me.world > 1:
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return t


def slowest(seconds: float) -> float:
    """The largest of the ranks' clocks, so that all of them decide alike."""
    if me.world == 1:
        return seconds
    t = torch.tensor(seconds, device=me.device, dtype=torch.float64)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


def barrier() -> None:
    if me.world > 1:
        dist.barrier()


def say(*words) -> None:
    """Rank 0 prints, and keeps what it printed."""
    if not me.first:
        return
    line = " ".join(str(word) for word in words)
    print(line, flush=True)
    with open(Path(cfg.log_dir) / f"{cfg.run_id}.txt", "a", encoding="utf-8") as log:
        log.write(line + "\n")


def now() -> float:
    """The clock, once the device has done all that it was told."""
    torch.cuda.synchronize()
    return time.perf_counter()


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def fast_maths() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 32
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def amp():
    return torch.autocast("cuda", dtype=torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# data: 256 int32 of header (magic, version, number of tokens), then uint16 tokens

MAGIC, VERSION, HEADER = 20240520, 1, 256


def read_shard(path: str) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=HEADER)
    if header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path} is no shard")
    body = np.fromfile(path, dtype="<u2", count=int(header[2]), offset=4 * HEADER)
    if body.size != header[2]:
        raise ValueError(f"{path} is cut short: {body.size} of {header[2]} tokens")
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def shards(kind: str) -> list[str]:
    found = sorted(glob.glob(os.path.join(cfg.data_dir, f"fineweb_{kind}_*.bin")))
    if not found:
        raise FileNotFoundError(f"no {kind} shards in {cfg.data_dir}")
    return found


def train_batches():
    """Endless (x, y) of this rank. All ranks walk the same stream and each takes its own slice of every step."""
    paths, turn = shards("train"), 0
    random.Random(cfg.seed).shuffle(paths)
    tokens, at = read_shard(paths[0]), 0
    share = cfg.train_tokens // 8
    assert share % cfg.train_seq == 0
    span = share * me.world
    while True:
        if at + span + 1 > len(tokens):
            turn = (turn + 1) % len(paths)
            tokens, at = read_shard(paths[turn]), 0
        lo = at + me.rank * share
        part = tokens[lo : lo + share + 1].to(torch.int64).pin_memory().to(me.device, non_blocking=True)
        yield part[:-1].view(-1, cfg.train_seq), part[1:].view(-1, cfg.train_seq)
        at += span


def noise_batches():
    """What the loader yields in shape, and nothing in content: for warming up the compiler."""
    gen = torch.Generator(device=me.device).manual_seed(0)
    shape = (cfg.train_tokens // 8 // cfg.train_seq, cfg.train_seq + 1)
    while True:
        part = torch.randint(cfg.vocab, shape, device=me.device, generator=gen)
        yield part[:, :-1].contiguous(), part[:, 1:].contiguous()


def val_tokens() -> Tensor:
    """The whole validation split, in order."""
    return torch.cat([read_shard(path) for path in shards("val")]).to(torch.int64).to(me.device)


class ByteTable:
    """How many bytes of the original text a token stands for.

    size  bytes of the piece without its leading mark
    space the piece begins with the mark, that is, with one space
    edge  the piece is no text (control, unknown, unused): after it, the mark is no space
    """

    def __init__(self, path: str, vocab: int):
        sp = spm.SentencePieceProcessor(model_file=path)
        n = max(vocab, sp.vocab_size())
        size, space, edge = np.zeros(n, np.int64), np.zeros(n, bool), np.ones(n, bool)
        for i in range(sp.vocab_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            edge[i] = False
            if sp.is_byte(i):
                size[i] = 1
                continue
            piece = sp.id_to_piece(i)
            space[i] = piece.startswith("\u2581")
            size[i] = len(piece.removeprefix("\u2581").replace("\u2581", " ").encode("utf-8"))
        self.size, self.space, self.edge = (torch.from_numpy(t).to(me.device) for t in (size, space, edge))

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target, given the token before it."""
        return self.size[target] + (self.space[target] & ~self.edge[prev])


# ---------------------------------------------------------------------------------------------------------------------
# model


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Norm(nn.Module):
    """RMS norm with a gain."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x) * self.gain.to(x.dtype)


class Linear(nn.Linear):
    """Weights are kept in fp32 and used in the type of the input; late in training, as if they were packed."""

    rounded = False

    def forward(self, x: Tensor) -> Tensor:
        w = as_packed(self.weight) if Linear.rounded and self.training else self.weight
        b = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, w.to(x.dtype), b)


def as_packed(w: Tensor) -> Tensor:
    """The weight on its int5 grid, with the gradient passed straight through."""
    with torch.no_grad():
        scale = w.abs().amax(1, keepdim=True).clamp_min(1e-8) / cfg.levels
        grid = (w / scale).round().clamp(-cfg.levels, cfg.levels) * scale
    return w + (grid - w).detach()


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float, length: int):
        super().__init__()
        angle = torch.outer(torch.arange(length).float(), base ** (-torch.arange(0, dims, 2).float() / dims))
        self.register_buffer("cos", angle.cos()[None, :, None], persistent=False)
        self.register_buffer("sin", angle.sin()[None, :, None], persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        turn, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turn.chunk(2, dim=-1)
        cos, sin = self.cos[:, : x.size(1)].to(x.dtype), self.sin[:, : x.size(1)].to(x.dtype)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    """Causal, grouped queries, normed queries and keys, and a share of the first layer's values."""

    def __init__(self, first: bool):
        super().__init__()
        self.hd = cfg.dim // cfg.heads
        kv = cfg.kv_heads * self.hd
        self.q = Linear(cfg.dim, cfg.dim, bias=False)
        self.k = Linear(cfg.dim, kv, bias=False)
        self.v = Linear(cfg.dim, kv, bias=False)
        self.out = Linear(cfg.dim, cfg.dim, bias=True)
        self.gain = nn.Parameter(torch.full((cfg.heads,), cfg.qk_gain))
        self.share = None if first else nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, v0: Tensor | None, rotary: Rotary) -> tuple[Tensor, Tensor]:
        b, t, _ = x.shape
        q = rotary(rms(self.q(x).view(b, t, cfg.heads, self.hd)))
        k = rotary(rms(self.k(x).view(b, t, cfg.kv_heads, self.hd)))
        v = self.v(x).view(b, t, cfg.kv_heads, self.hd)
        if self.share is not None:
            w = self.share.to(v.dtype)
            v = w[0] * v + w[1] * v0
        q, k = (q * self.gain[None, None, :, None]).to(v.dtype), k.to(v.dtype)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).reshape(b, t, cfg.dim)), v


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Linear(cfg.dim, cfg.mlp_mult * cfg.dim, bias=True)
        self.down = Linear(cfg.mlp_mult * cfg.dim, cfg.dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        self.norm_a, self.norm_m = Norm(cfg.dim), Norm(cfg.dim)
        self.attn, self.mlp = Attention(index == 0), MLP()
        self.scale_a = nn.Parameter(torch.ones(cfg.dim))
        self.scale_m = nn.Parameter(torch.ones(cfg.dim))
        self.from_x0 = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.depth = (index + 1) ** -0.5

    def forward(self, x: Tensor, x0: Tensor, v0: Tensor | None, rotary: Rotary) -> tuple[Tensor, Tensor]:
        w = self.from_x0.to(x.dtype)
        x = w[0] * x + w[1] * x0
        a, v = self.attn(self.norm_a(x) * self.depth, v0, rotary)
        x = x + self.scale_a.to(x.dtype) * a
        x = x + self.scale_m.to(x.dtype) * self.mlp(self.norm_m(x) * self.depth)
        return x, v


class GPT(nn.Module):
    """Tokens in, capped logits out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab, cfg.dim)
        self.pair = nn.Embedding(cfg.pair_buckets, cfg.pair_dim)
        self.pair_up = Linear(cfg.pair_dim, cfg.dim, bias=True)
        self.pair_gain = nn.Parameter(torch.tensor([0.05]))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base, max(cfg.train_seq, cfg.eval_seq))
        self.blocks = nn.ModuleList(Block(i) for i in range(cfg.layers))
        self.half = cfg.layers // 2
        self.skips = nn.ParameterList(nn.Parameter(torch.ones(cfg.dim)) for _ in range(self.half))
        self.norm = Norm(cfg.dim)
        self.head_bias = nn.Parameter(torch.zeros(cfg.vocab))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Initial weights: orthogonal matrices, zero outputs, small embeddings."""
        for name, p in self.named_parameters():
            if p.ndim == 2 and not name.startswith(("embed", "pair.")):
                nn.init.orthogonal_(p)
            if name.endswith(("attn.out.weight", "mlp.down.weight", "pair.weight")) or name.endswith(".bias"):
                p.zero_()
        nn.init.normal_(self.embed.weight, std=0.005)

    def pairs(self, x: Tensor) -> Tensor:
        """The bucket of (token before, token); the first position of a window has none before it."""
        before = F.pad(x[:, :-1], (1, 0))
        return ((before * 36313) ^ (x * 27191)) % cfg.pair_buckets

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.pair_gain * self.pair_up(self.pair(self.pairs(x)))
        h = x0 = rms(h)
        v0, saved = None, []
        for i, block in enumerate(self.blocks):
            if i >= cfg.layers - self.half:
                h = h + self.skips[cfg.layers - 1 - i].to(h.dtype) * saved.pop()
            h, v = block(h, x0, v0, self.rotary)
            v0 = v if v0 is None else v0
            if i < self.half:
                saved.append(h)
        logits = F.linear(self.norm(h), self.embed.weight.to(h.dtype)) + self.head_bias
        return cfg.softcap * torch.tanh(logits.float() / cfg.softcap)


def loss_of(net, x: Tensor, y: Tensor) -> Tensor:
    with amp():
        logits = net(x)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# optim


def newton_schulz(g: Tensor, rounds: int = 5) -> Tensor:
    """The nearest thing to an orthogonal matrix that five cheap rounds give."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(rounds):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. Each rank works on every world-th matrix; the updates are summed."""

    def __init__(self, params, lr: float, momentum: float, decay: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=me.device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % me.world == me.rank:
                    flat[at : at + p.numel()] = self.direction(p, group["momentum"]).flatten()
                at += p.numel()
            total(flat)
            at = 0
            for p in params:
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(flat[at : at + p.numel()].view_as(p), alpha=-group["lr"])
                at += p.numel()

    def direction(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if "m" not in state:
            state["m"] = torch.zeros_like(p)
        m = state["m"].mul_(momentum).add_(p.grad)
        return newton_schulz(p.grad.add(m, alpha=momentum)) * max(1, p.size(0) / p.size(1)) ** 0.5


def make_optimizers(net: GPT) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings, gains and biases."""
    named = list(net.named_parameters())
    matrix = [p for name, p in named if p.ndim == 2 and not name.startswith(("embed", "pair."))]
    table = [p for name, p in named if name.startswith(("embed", "pair."))]
    small = [p for _, p in named if p.ndim < 2]
    adam = torch.optim.AdamW(
        [
            dict(params=table, lr=cfg.lr_embed, weight_decay=cfg.adam_decay),
            dict(params=small, lr=cfg.lr_scalar, weight_decay=0.0),
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    muon = Muon(matrix, cfg.lr_muon, cfg.muon_momentum, cfg.muon_decay)
    for opt in (adam, muon):
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return [adam, muon]


def set_rates(opts: list, step: int, done: float) -> None:
    """done: how much of the run is behind us, by steps or by the clock, whichever is further."""
    scale = min(1.0, (1 - done) / cfg.warmdown)
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * max(scale, 0.0)
    ramp = min(1.0, step / cfg.muon_ramp)
    opts[1].param_groups[0]["momentum"] = (1 - ramp) * 0.85 + ramp * cfg.muon_momentum


def mean_grads(params: list[Tensor]) -> None:
    """Gradients averaged over the ranks, in one message."""
    if me.world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    total(flat).div_(me.world)
    at = 0
    for p in params:
        p.grad.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()


class EMA:
    """A slow copy of the weights, which is what we pack."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.slow = [p.detach().clone() for p in net.parameters()]

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.slow, list(net.parameters()), 1 - decay)

    @torch.no_grad()
    def give(self, net: nn.Module) -> None:
        for p, slow in zip(net.parameters(), self.slow):
            p.copy_(slow)


# ---------------------------------------------------------------------------------------------------------------------
# train


def one_step(net: GPT, fast, opts: list, batches) -> Tensor:
    """Gradients of one batch, averaged over the ranks, and a step of every optimizer. Returns this rank's loss."""
    params = list(net.parameters())
    loss_sum = torch.zeros((), device=me.device)
    for _ in range(me.accum):
        loss = loss_of(fast, *next(batches)) / me.accum
        loss.backward()
        loss_sum += loss.detach()
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    mean_grads(params)
    torch.nn.utils.clip_grad_norm_(params, cfg.clip)
    for opt in opts:
        opt.step()
        opt.zero_grad(set_to_none=True)
    return loss_sum


def warm_up(net: GPT, fast) -> None:
    """Compiles both forms of the network on noise, then puts everything back where it was."""
    kept = {name: t.detach().clone() for name, t in net.state_dict().items()}
    opts, batches = make_optimizers(net), noise_batches()
    for step in range(cfg.warmup_steps):
        Linear.rounded = step >= cfg.warmup_steps // 2
        one_step(net, fast, opts, batches)
    Linear.rounded = False
    net.load_state_dict(kept)


def train(net: GPT, fast, val: Tensor, tab: ByteTable) -> float:
    """Trains until the steps or the seconds are used up; leaves the EMA in net. Returns the seconds trained."""
    opts, ema, batches = make_optimizers(net), EMA(net, cfg.ema), train_batches()
    step, spent, since = 0, 0.0, now()
    while True:
        spent_now = slowest(spent + now() - since)
        done = max(step / cfg.steps, spent_now / cfg.train_seconds)
        if cfg.val_every and (done >= 1 or (step and step % cfg.val_every == 0)):
            spent = spent_now
            nats, bpb = report(score_plain(fast, val, tab), val)
            say(f"step {step} val_loss {nats:.4f} val_bpb {bpb:.4f} train_time {spent:.1f}s")
            since = now()
        if done >= 1:
            break
        Linear.rounded = done >= cfg.qat_from
        set_rates(opts, step, done)
        net.train()
        loss = one_step(net, fast, opts, batches)
        ema.update(net, step)
        step += 1
        if step % cfg.log_every == 0:
            mean = total(loss.clone()).item() / me.world
            say(f"step {step} train_loss {mean:.4f} train_time {spent_now:.1f}s avg {1000 * spent_now / step:.1f}ms")
    Linear.rounded = False
    ema.give(net)
    say(f"trained {step} steps in {spent_now:.1f}s, peak {torch.cuda.max_memory_allocated() >> 20} MiB")
    return spent_now


# ---------------------------------------------------------------------------------------------------------------------
# rANS: `lanes` coders side by side, states of 64 bits, words of 32

FLOOR = np.uint64(1 << 31)
WORD = np.uint64(32)


def frequencies(symbols: np.ndarray, alphabet: int, bits: int) -> np.ndarray:
    """Counts scaled to sum to 2**bits, none below one."""
    count = np.bincount(symbols, minlength=alphabet).astype(np.float64)
    room = (1 << bits) - alphabet
    freq = 1 + np.floor(count / count.sum() * room).astype(np.int64)
    freq[freq.argmax()] += (1 << bits) - freq.sum()
    return freq


def rans_encode(symbols: np.ndarray, freq: np.ndarray, bits: int, lanes: int) -> bytes:
    """Symbol i goes to lane i % lanes, the last first, so that the decoder may go forwards."""
    short = -len(symbols) % lanes
    grid = np.concatenate([symbols, np.full(short, freq.argmax(), symbols.dtype)]).reshape(-1, lanes)
    f = freq.astype(np.uint64)
    c = np.concatenate([[0], np.cumsum(freq)[:-1]]).astype(np.uint64)
    top = f << np.uint64(63 - bits)
    state = np.full(lanes, FLOOR, np.uint64)
    words = []
    for row in grid[::-1]:
        full = state >= top[row]
        words.append((state[full] & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        state[full] >>= WORD
        fr = f[row]
        state = ((state // fr) << np.uint64(bits)) + state % fr + c[row]
    body = np.concatenate(words[::-1])
    return struct.pack("<I", len(body)) + state.astype("<u8").tobytes() + body.astype("<u4").tobytes()


def rans_decode(blob: bytes, freq: np.ndarray, count: int, bits: int, lanes: int) -> np.ndarray:
    (n,) = struct.unpack_from("<I", blob)
    state = np.frombuffer(blob, "<u8", lanes, 4).astype(np.uint64)
    words = np.frombuffer(blob, "<u4", n, 4 + 8 * lanes).astype(np.uint64)
    f = freq.astype(np.uint64)
    c = np.concatenate([[0], np.cumsum(freq)[:-1]]).astype(np.uint64)
    symbol_at = np.repeat(np.arange(len(freq)), freq)
    mask = np.uint64((1 << bits) - 1)
    out, at = np.empty((-(-count // lanes), lanes), np.uint8), 0
    for row in out:
        slot = state & mask
        row[:] = symbol_at[slot.astype(np.int64)]
        state = f[row] * (state >> np.uint64(bits)) + slot - c[row]
        low = state < FLOOR
        k = int(low.sum())
        state[low] = (state[low] << WORD) | words[at : at + k]
        at += k
    assert at == n and (state == FLOOR).all(), "the stream does not end where it began"
    return out.reshape(-1)[:count]


def rans_size(freq: np.ndarray, symbols: np.ndarray, bits: int) -> float:
    """Bytes that the symbols would take in a perfect coder of these frequencies."""
    return float((bits - np.log2(freq))[symbols].sum() / 8)


# ---------------------------------------------------------------------------------------------------------------------
# pack: grids of int5 (tables: int8) with an fp16 scale per row, the rest in fp16


def grid_levels(name: str) -> int:
    return cfg.embed_levels if name.startswith("embed") else cfg.levels


@torch.no_grad()
def search_scales(w: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """For each row, the scale of the least squared error, among shrunken forms of the one that clips nothing."""
    w = w.float()
    widest = w.abs().amax(1, keepdim=True).clamp_min(1e-6) / levels
    best, error = widest.half().float(), torch.full_like(widest, math.inf)
    for ratio in torch.linspace(cfg.scale_low, 1.0, cfg.scale_steps).tolist():
        scale = (widest * ratio).half().float().clamp_min(1e-7)
        err = (w - (w / scale).round().clamp(-levels, levels) * scale).square().sum(1, keepdim=True)
        best = torch.where(err < error, scale, best)
        error = torch.minimum(err, error)
    q = (w / best).round().clamp(-levels, levels)
    return (q + levels).to(torch.uint8), best.half()


def pack(net: GPT) -> bytes:
    """The whole model as bytes: header, then per kind of grid one rANS stream, then scales, then what is small."""
    streams: dict[int, list[np.ndarray]] = {}
    scales, small, entries = [], [], []
    for name, p in net.named_parameters():
        if p.ndim == 2:
            levels = grid_levels(name)
            q, scale = search_scales(p, levels)
            streams.setdefault(levels, []).append(q.cpu().numpy().ravel())
            scales.append(scale.cpu().numpy().ravel())
            entries.append([name, list(p.shape), levels])
        else:
            small.append(p.detach().half().cpu().numpy().ravel())
            entries.append([name, list(p.shape), 0])
    head = dict(entries=entries, bits=cfg.rans_bits, lanes=cfg.rans_lanes, streams=[])
    body = b""
    for levels, parts in sorted(streams.items()):
        symbols = np.concatenate(parts)
        freq = frequencies(symbols, 2 * levels + 1, cfg.rans_bits)
        blob = rans_encode(symbols, freq, cfg.rans_bits, cfg.rans_lanes)
        ideal = rans_size(freq, symbols, cfg.rans_bits)
        say(f"stream of {2 * levels + 1} symbols: {len(symbols)} in {len(blob)} bytes, ideal {ideal:.0f}")
        head["streams"].append([levels, len(symbols), len(blob), freq.tolist()])
        body += blob
    body += np.concatenate(scales).astype("<f2").tobytes() + np.concatenate(small).astype("<f2").tobytes()
    text = json.dumps(head, separators=(",", ":")).encode()
    return struct.pack("<I", len(text)) + text + body


def unpack(data: bytes) -> dict[str, Tensor]:
    """The weights that a packed model stands for."""
    (n,) = struct.unpack_from("<I", data)
    head = json.loads(data[4 : 4 + n])
    at, grids = 4 + n, {}
    for levels, count, size, freq in head["streams"]:
        blob = data[at : at + size]
        grids[levels] = rans_decode(blob, np.array(freq), count, head["bits"], head["lanes"])
        at += size
    rows = sum(shape[0] for _, shape, levels in head["entries"] if levels)
    scales = np.frombuffer(data, "<f2", rows, at)
    small = np.frombuffer(data, "<f2", offset=at + 2 * rows)
    used, row, cell, state = {levels: 0 for levels in grids}, 0, 0, {}
    for name, shape, levels in head["entries"]:
        size = math.prod(shape)
        if levels:
            q = grids[levels][used[levels] : used[levels] + size].astype(np.float32).reshape(shape) - levels
            state[name] = torch.from_numpy(q * scales[row : row + shape[0], None].astype(np.float32))
            used[levels] += size
            row += shape[0]
        else:
            state[name] = torch.from_numpy(small[cell : cell + size].astype(np.float32).reshape(shape))
            cell += size
    assert cell == len(small) and row == rows
    return state


def code_bytes() -> int:
    return len(Path(__file__).read_bytes())


def write_model(net: GPT) -> None:
    """Rank 0 packs, weighs and writes; too heavy is an error."""
    if me.first:
        data = pack(net)
        Path(cfg.out).write_bytes(data)
        size, code = Path(cfg.out).stat().st_size, code_bytes()
        say(f"model {size} bytes, code {code} bytes, total {size + code} of {cfg.limit}")
        assert size + code <= cfg.limit, "too large"
    barrier()


def read_model() -> GPT:
    """A fresh network with the weights of the packed file, as every rank reads it."""
    net = GPT().to(me.device)
    net.load_state_dict(unpack(Path(cfg.out).read_bytes()))
    return net


@torch.no_grad()
def check_round_trip(net: GPT, back: GPT) -> None:
    """What was read is what was meant: every weight within half a step of its row, or at the end of the grid."""
    worst = 0.0
    for (name, p), r in zip(net.named_parameters(), back.parameters()):
        if p.ndim == 2:
            levels = grid_levels(name)
            q, scale = search_scales(p, levels)
            meant = (q.float() - levels) * scale.float()
            assert torch.equal(meant, r), f"{name} came back as something else"
            worst = max(worst, ((p - r).norm() / p.norm().clamp_min(1e-12)).item())
        else:
            assert torch.equal(p.half().float(), r), f"{name} came back as something else"
    say(f"round trip exact, worst relative error of rounding {worst:.4f}")


# ---------------------------------------------------------------------------------------------------------------------
# score


def plan(targets: int, seq: int, stride: int) -> Tensor:
    """Windows as (start, first, stop) rows, in order.

    A window reads tokens start .. stop - 1 and predicts the one after each. It is scored from position `first` on, which
    is where the window before it stopped: so each of the targets is scored once, the last ones included.
    """
    assert targets >= seq, "less text than a window"
    stop = torch.cat([torch.arange(seq, targets, stride), torch.tensor([targets])])
    first = torch.cat([torch.tensor([0]), stop[:-1]])
    return torch.stack([stop - seq, first, stop], dim=1).to(me.device)


class PairCache:
    """What followed each token in the text scored so far, as a distribution over the whole vocabulary.

    p(a | prev) = (n[prev, a] + prior * u(a)) / (n[prev] + prior), with u the (smoothed) frequencies of all tokens so far.
    It is mixed with the model's distribution by a weight that knows only how often prev was seen.
    """

    def __init__(self, vocab: int):
        self.n = torch.zeros(vocab, vocab, device=me.device)
        self.u = torch.ones(vocab, device=me.device)

    @torch.no_grad()
    def add(self, tokens: Tensor) -> None:
        """Counts the pairs of a stretch of text that has been scored."""
        vocab = len(self.u)
        prev, nxt = tokens[:-1], tokens[1:]
        self.n += torch.bincount(prev * vocab + nxt, minlength=vocab * vocab).view(vocab, vocab)
        self.u += torch.bincount(nxt, minlength=vocab)

    def dist(self, prev: Tensor) -> Tensor:
        """p(. | prev), a row for each prev."""
        n = self.n[prev]
        u = self.u / self.u.sum()
        return (n + cfg.cache_prior * u) / (n.sum(1, keepdim=True) + cfg.cache_prior)

    def weight(self, prev: Tensor) -> Tensor:
        """The cache's share, a column: none for a token never seen, cfg.cache_weight in the end."""
        seen = self.n[prev].sum(1, keepdim=True)
        return cfg.cache_weight * seen / (seen + cfg.cache_half)

    def mix(self, logp: Tensor, prev: Tensor) -> Tensor:
        """Log probabilities of the mixture, over the whole vocabulary."""
        w = self.weight(prev)
        return ((1 - w) * logp.exp() + w * self.dist(prev)).log()


@torch.no_grad()
def score_rows(fast, val: Tensor, rows: Tensor, tab: ByteTable, cache: PairCache | None = None) -> Tensor:
    """(nats, tokens, bytes) of the rows, with the network and the cache as they are."""
    tally = torch.zeros(3, dtype=torch.float64, device=me.device)
    span = torch.arange(cfg.eval_seq, device=me.device)
    for batch in rows.split(cfg.eval_batch):
        start, first, _ = batch.unbind(1)
        at = start[:, None] + span
        x, y = val[at], val[at + 1]
        mine = at >= first[:, None]
        with amp():
            logits = fast(x)
        logp = F.log_softmax(logits[mine].float(), dim=-1)
        prev, target = x[mine], y[mine]
        if cache is not None:
            logp = cache.mix(logp, prev)
        nats = -logp.gather(1, target[:, None]).squeeze(1)
        tally[0] += nats.double().sum()
        tally[1] += target.numel()
        tally[2] += tab.count(prev, target).double().sum()
    return tally


def report(tally: Tensor, val: Tensor) -> tuple[float, float]:
    """Nats per token and bits per byte, from what all ranks have counted. Every target must have been counted once."""
    nats, tokens, size = total(tally.clone()).tolist()
    assert tokens == len(val) - 1, f"{tokens:.0f} tokens scored, {len(val) - 1} expected"
    return nats / tokens, nats / math.log(2) / size


def score_plain(fast, val: Tensor, tab: ByteTable) -> Tensor:
    """This rank's tally over windows that do not overlap: quick, for the log."""
    fast.eval()
    return score_rows(fast, val, plan(len(val) - 1, cfg.eval_seq, cfg.eval_seq)[me.rank :: me.world], tab)


# ---------------------------------------------------------------------------------------------------------------------
# score first, adapt afterwards


def soft_parts(net: GPT) -> list[Tensor]:
    """What may move while we score: gains and biases. The matrices stay as they were packed."""
    for p in net.parameters():
        p.requires_grad_(p.ndim < 2)
    return [p for p in net.parameters() if p.requires_grad]


@torch.no_grad()
def fingerprint(net: GPT) -> str:
    """A hash of the matrices and tables, to show that they did not move."""
    sha = hashlib.sha256()
    for p in net.parameters():
        if p.ndim == 2:
            sha.update(p.float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def adapt(fast, opt, params: list[Tensor], val: Tensor, lo: int, hi: int) -> None:
    """SGD on the text from lo to hi, all of which has been scored. Each rank takes its share of the sequences."""
    starts = torch.arange(lo, hi - cfg.eval_seq + 1, cfg.eval_seq, device=me.device)
    starts = starts[: len(starts) // me.world * me.world][me.rank :: me.world]
    if not len(starts):
        return
    span = torch.arange(cfg.eval_seq, device=me.device)
    at = starts[:, None] + span
    for _ in range(cfg.ttt_epochs):
        opt.zero_grad(set_to_none=True)
        loss_of(fast, val[at], val[at + 1]).backward()
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        mean_grads(params)
        torch.nn.utils.clip_grad_norm_(params, cfg.ttt_clip)
        opt.step()


def score_online(net: GPT, fast, val: Tensor, tab: ByteTable) -> Tensor:
    """This rank's tally over overlapping windows, chunk by chunk.

    All ranks score their rows of a chunk with what was learnt from the chunks before it. The average of the gradients
    makes them wait for one another, so nobody learns from a chunk before everybody has scored it.
    """
    net.eval()
    began = now()
    params = soft_parts(net)
    opt = torch.optim.SGD(params, lr=cfg.ttt_lr, momentum=cfg.ttt_momentum)
    cache = PairCache(cfg.vocab) if cfg.cache else None
    chunks = plan(len(val) - 1, cfg.eval_seq, cfg.stride).split(cfg.ttt_windows)
    tally = torch.zeros(3, dtype=torch.float64, device=me.device)
    learning = cfg.ttt
    for i, rows in enumerate(chunks):
        tally += score_rows(fast, val, rows[me.rank :: me.world], tab, cache)
        if i + 1 == len(chunks):
            break
        lo, hi = rows[0, 1].item(), rows[-1, 2].item()
        if cache is not None:
            cache.add(val[lo : hi + 1])
        if learning:
            opt.param_groups[0]["lr"] = cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * i / len(chunks)))
            adapt(fast, opt, params, val, lo, hi)
        if i % 100 == 0:
            spent = slowest(now() - began)
            learning = learning and spent < cfg.eval_seconds * 0.8
            nats, tokens, size = total(tally.clone()).tolist()
            say(f"chunk {i}/{len(chunks)} so far {nats / math.log(2) / size:.4f} bpb, {spent:.0f}s, learning {learning}")
    return tally


# ---------------------------------------------------------------------------------------------------------------------
# self-tests: a second or two, before anything is trained


def test_rans() -> None:
    """Decoding gives back what was encoded, in about as many bytes as it should take."""
    rng = np.random.default_rng(0)
    for levels in (cfg.levels, cfg.embed_levels):
        symbols = np.clip(np.rint(rng.normal(levels, levels / 3, 300_001)), 0, 2 * levels).astype(np.uint8)
        freq = frequencies(symbols, 2 * levels + 1, cfg.rans_bits)
        assert freq.sum() == 1 << cfg.rans_bits and freq.min() >= 1
        blob = rans_encode(symbols, freq, cfg.rans_bits, cfg.rans_lanes)
        back = rans_decode(blob, freq, len(symbols), cfg.rans_bits, cfg.rans_lanes)
        assert np.array_equal(symbols, back)
        assert len(blob) < rans_size(freq, symbols, cfg.rans_bits) + 16 * cfg.rans_lanes


def test_plan() -> None:
    """Each target once, in order, never outside of its window."""
    for targets in (cfg.eval_seq, cfg.eval_seq + 1, 5 * cfg.eval_seq + 17):
        rows = plan(targets, cfg.eval_seq, cfg.stride).tolist()
        assert rows[0][1] == 0 and rows[-1][2] == targets
        assert all(a[2] == b[1] for a, b in zip(rows, rows[1:]))
        assert all(0 <= start <= first < stop == start + cfg.eval_seq for start, first, stop in rows)


def test_cache() -> None:
    """The mixture sums to one, before and after the cache has seen text."""
    gen = torch.Generator(device=me.device).manual_seed(1)
    text = torch.randint(cfg.vocab, (5000,), device=me.device, generator=gen)
    cache = PairCache(cfg.vocab)
    for _ in range(2):
        logp = torch.randn(64, cfg.vocab, device=me.device, generator=gen).log_softmax(-1)
        sums = cache.mix(logp, text[:64]).double().exp().sum(1)
        assert (sums - 1).abs().max() < 1e-4
        cache.add(text)


def test_causal(net: GPT) -> None:
    """A changed token changes no logit before it."""
    net.eval()
    gen = torch.Generator(device=me.device).manual_seed(2)
    x = torch.randint(cfg.vocab, (1, cfg.eval_seq), device=me.device, generator=gen)
    other = x.clone()
    other[0, cfg.eval_seq // 2] = (x[0, cfg.eval_seq // 2] + 1) % cfg.vocab
    with torch.no_grad(), amp():
        gap = (net(x) - net(other)).abs().amax(-1)[0]
    assert gap[: cfg.eval_seq // 2].max() < 1e-3 and gap[cfg.eval_seq // 2 :].max() > 0
    net.train()


def test_bytes(tab: ByteTable) -> None:
    """Bytes per token on the first of the training text, for the log; and no piece of text weighs nothing."""
    ids = read_shard(shards("train")[0])[:1_000_001].to(torch.int64).to(me.device)
    size = tab.count(ids[:-1], ids[1:]).sum().item()
    say(f"training text has {size / 1e6:.4f} bytes per token")
    assert tab.edge[: cfg.vocab].any() and not tab.edge[: cfg.vocab].all()
    assert ((tab.size + tab.space)[~tab.edge] > 0).all()


def self_tests(net: GPT, tab: ByteTable) -> None:
    test_rans()
    test_plan()
    test_cache()
    test_causal(net)
    test_bytes(tab)
    say("self-tests passed")


# ---------------------------------------------------------------------------------------------------------------------
# the run


def describe(net: GPT) -> None:
    say(Path(__file__).read_text(encoding="utf-8"))
    say(f"python {sys.version.split()[0]} torch {torch.__version__} ranks {me.world}")
    say(json.dumps(vars(cfg)))
    kinds = {"matrices": 2, "gains and biases": 1}
    for kind, ndim in kinds.items():
        say(f"{kind}: {sum(p.numel() for p in net.parameters() if p.ndim == ndim)}")


def write_record(nats: float, bpb: float, spent: float) -> None:
    """The run in one file, beside the log."""
    if not me.first:
        return
    model, code = Path(cfg.out).stat().st_size, code_bytes()
    record = dict(
        run=cfg.run_id,
        seed=cfg.seed,
        val_loss=round(nats, 8),
        val_bpb=round(bpb, 8),
        bytes_model=model,
        bytes_code=code,
        bytes_total=model + code,
        eval_seconds=round(spent, 1),
        sha_code=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        sha_model=hashlib.sha256(Path(cfg.out).read_bytes()).hexdigest(),
    )
    path = Path(cfg.log_dir) / f"{cfg.run_id}_seed{cfg.seed}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def build_and_train(val: Tensor, tab: ByteTable) -> None:
    """From nothing to the packed file."""
    net = GPT().to(me.device)
    describe(net)
    if cfg.selftest:
        self_tests(net, tab)
    fast = torch.compile(net, dynamic=False, fullgraph=True)
    warm_up(net, fast)
    barrier()
    began = now()
    train(net, fast, val, tab)
    write_model(net)
    say(f"train and pack {slowest(now() - began):.1f}s")
    if me.first:
        check_round_trip(net, read_model())
    barrier()


def evaluate(val: Tensor, tab: ByteTable) -> None:
    """From the packed file to the score."""
    began = now()
    net = read_model()
    fast = torch.compile(net, dynamic=False, fullgraph=True)
    nats, bpb = report(score_plain(fast, val, tab), val)
    say(f"packed, plain: val_loss {nats:.4f} val_bpb {bpb:.4f} ({now() - began:.1f}s)")
    before = fingerprint(net)
    nats, bpb = report(score_online(net, fast, val, tab), val)
    assert fingerprint(net) == before, "a matrix moved"
    spent = slowest(now() - began)
    say(f"evaluation {spent:.1f}s of 600")
    write_record(nats, bpb, spent)
    say(f"final val_loss {nats:.8f} val_bpb {bpb:.8f}")


def main() -> None:
    fast_maths()
    seed_all(cfg.seed)
    Path(cfg.log_dir).mkdir(exist_ok=True)
    tab = ByteTable(cfg.tokenizer, cfg.vocab)
    val = val_tokens()
    build_and_train(val, tab)
    evaluate(val, tab)
    if me.world > 1:
        dist.destroy_process_group()


me = start_ranks()

if __name__ == "__main__":
    main()
