"""Hybrid state-space / attention LM for Parameter Golf, non-record track (unlimited compute).

    torchrun --standalone --nproc_per_node=8 train_gpt.py --seed=1 --hours=4

Everything is set by --key=value, see Config.  The run trains, averages, packs the weights to model.bin, reads model.bin
back and scores that: once as it is, once with online adaptation (each block of text is scored, then learnt).  Figures go to
results.json and to stdout; the submitted one is "val_bpb".
"""

import itertools
import json
import lzma
import math
import os
import struct
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

BOS = 1
LIMIT = 16_000_000


@dataclass
class Config:
    # data
    data: str = "./data/datasets/fineweb10B_sp4096"
    tokenizer: str = "./data/tokenizers/fineweb_4096_bpe.model"
    vocab: int = 4096
    # model
    width: int = 448
    depth: int = 11
    attn_every: int = 4  # layers 3 and 7 are attention, the others state space
    heads: int = 7
    kv_heads: int = 7
    ssm_expand: int = 2
    ssm_head: int = 64
    ssm_state: int = 64
    ssm_chunk: int = 64
    conv: int = 4
    mlp_mult: float = 2.0
    rope_base: float = 50_000.0
    softcap: float = 20.0
    reset_at_bos: bool = True  # state-space layers forget at a document's start
    # training
    seed: int = 1
    hours: float = 4.0
    steps: int = 60_000
    batch_tokens: int = 524_288
    seq: int = 2048
    micro: int = 16
    lr: float = 3e-3
    lion_lr: float = 4e-4
    decay: float = 0.02
    warmup: int = 300
    cooldown: float = 0.35
    clip: float = 1.0
    precond_every: int = 10
    average_last: float = 0.12  # uniform average over this share of the steps
    average_every: int = 25
    z_loss: float = 1e-4
    compile: bool = True
    log_every: int = 100
    peek_every: int = 2500
    peek_tokens: int = 1_048_576
    resume: str = ""
    save_every: int = 5000
    # packing
    bits: int = 6
    embed_bits: int = 8
    moment_batches: int = 32
    artifact: str = "model.bin"
    # scoring
    length: int = 2048
    stride: int = 512
    eval_batch: int = 16
    online: bool = True
    online_lr: float = 3e-4
    online_momentum: float = 0.9
    online_clip: float = 1.0
    online_scope: str = "tail"  # tail: last two layers and all gains | gains | all
    temperature: float = 1.0
    bigram: float = 0.0  # share of an online bigram model in the mixture, 0 leaves it out
    bigram_seen: int = 64  # contexts seen less often are left to the network
    results: str = "results.json"
    # extras, off
    loops: int = 1  # times the middle layers are run through
    sample: int = 0  # tokens to print at the end
    check: bool = False  # look whether logits depend on later tokens


def parse(argv: list[str]) -> Config:
    cfg = Config()
    known = {f.name: type(getattr(cfg, f.name)) for f in fields(cfg)}
    for arg in argv:
        key, eq, text = arg.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not arg.startswith("--") or not eq or key not in known:
            raise SystemExit(f"cannot read {arg!r}; settings are --key=value with key in {', '.join(known)}")
        kind = known[key]
        setattr(cfg, key, text.lower() in ("1", "true", "yes", "on") if kind is bool else kind(text))
    return cfg


class World:
    """Rank, number of ranks and the few collectives needed; works alone as well."""

    def __init__(self):
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl", device_id=self.device)

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def add(self, t: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def average_grads(self, params) -> None:
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if self.size > 1:
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)

    def any(self, flag: bool) -> bool:
        return bool(self.add(torch.tensor(float(flag), device=self.device)) > 0)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        if self.chief:
            print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------- data


def read_shard(path: Path) -> np.memmap:
    head = np.fromfile(path, dtype="<i4", count=256)
    if head.size != 256 or head[0] != 20240520 or head[1] != 1:
        raise ValueError(f"{path}: not a token shard")
    body = np.memmap(path, dtype="<u2", mode="r", offset=1024)
    if body.size != head[2]:
        raise ValueError(f"{path}: {body.size} tokens, its header says {head[2]}")
    return body


def shards(cfg: Config, split: str) -> list[Path]:
    found = sorted(Path(cfg.data).glob(f"fineweb_{split}_*.bin"))
    if not found:
        raise FileNotFoundError(f"no {split} shards in {cfg.data}")
    return found


def training_batches(cfg: Config, world: World, start_step: int = 0):
    """Endless (x, y) of (micro, seq): every rank walks all windows of all training shards in its own random order."""
    files = [read_shard(p) for p in shards(cfg, "train")]
    rng = np.random.default_rng([cfg.seed, world.rank, start_step])
    while True:
        order = rng.permutation(len(files))
        for f in order:
            shard, phase = files[f], int(rng.integers(cfg.seq))
            count = (shard.size - phase - 1) // cfg.seq
            picks = rng.permutation(count)[world.rank :: world.size]
            for i in range(0, len(picks) - cfg.micro + 1, cfg.micro):
                rows = [shard[phase + k * cfg.seq :][: cfg.seq + 1].astype(np.int64) for k in picks[i : i + cfg.micro]]
                block = torch.from_numpy(np.stack(rows)).to(world.device, non_blocking=True)
                yield block[:, :-1], block[:, 1:]


def validation_tokens(cfg: Config) -> torch.Tensor:
    """The whole validation split as one stream."""
    return torch.from_numpy(np.concatenate([read_shard(p) for p in shards(cfg, "val")]).astype(np.int64))


def byte_cost(tokens: torch.Tensor, cfg: Config) -> torch.Tensor:
    """cost[i]: UTF-8 bytes of the text that token i adds to the stream.  Each piece of the vocabulary is looked up once."""
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer)
    assert sp.get_piece_size() == cfg.vocab, f"tokenizer has {sp.get_piece_size()} pieces, expected {cfg.vocab}"
    size = torch.zeros(cfg.vocab, dtype=torch.long)
    space = torch.zeros(cfg.vocab, dtype=torch.bool)  # opens with a space
    text = torch.zeros(cfg.vocab, dtype=torch.bool)  # stands for text at all
    for t in range(cfg.vocab):
        if sp.is_control(t) or sp.is_unknown(t) or sp.is_unused(t):
            continue
        text[t] = True
        if sp.is_byte(t):
            size[t] = 1
            continue
        piece = sp.id_to_piece(t)
        space[t] = piece.startswith("▁")
        size[t] = len(piece.removeprefix("▁").replace("▁", " ").encode("utf-8"))
    before = torch.cat([tokens.new_tensor([BOS]), tokens[:-1]])
    return size[tokens] + (space[tokens] & text[before]).long()


# --------------------------------------------------------------------------------------------------------------- model


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """fp32 master weight, computed in the input's type."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False):
        super().__init__(n_in, n_out, bias=False)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=1.0 / math.sqrt(n_in))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def ssd(x, a, b, c, chunk: int):
    """State-space recurrence in chunks (Mamba-2's "state space dual" form), causal.

    x (B, T, H, P) inputs, a (B, T, H) log-decays <= 0, b, c (B, T, N) -> (B, T, H, P)
    s_t = e^(a_t) s_(t-1) + x_t b_t',  y_t = s_t c_t
    """
    B, T, H, P = x.shape
    n = T // chunk
    x, b, c = x.view(B, n, chunk, H, P), b.view(B, n, chunk, -1), c.view(B, n, chunk, -1)
    a = a.view(B, n, chunk, H).cumsum(dim=2)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    gap = (a[:, :, :, None] - a[:, :, None]).masked_fill(~lower[None, None, :, :, None], float("-inf"))
    mix = torch.einsum("bnis,bnjs->bnij", c, b)[..., None] * gap.exp().to(x.dtype)
    y = torch.einsum("bnijh,bnjhp->bnihp", mix, x)
    to_end = (a[:, :, -1:] - a).exp().to(x.dtype)
    gain = torch.einsum("bnjs,bnjh,bnjhp->bnhps", b, to_end, x)
    state = torch.zeros_like(gain[:, 0])
    out = []
    for k in range(n):
        carried = torch.einsum("bis,bhps,bih->bihp", c[:, k], state, a[:, k].exp().to(x.dtype))
        out.append(y[:, k] + carried)
        state = state * a[:, k, -1].exp().to(x.dtype)[..., None, None] + gain[:, k]
    return torch.stack(out, dim=1).view(B, T, H, P)


class StateSpace(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        inner = cfg.width * cfg.ssm_expand
        self.heads, self.state, self.chunk, self.reset = inner // cfg.ssm_head, cfg.ssm_state, cfg.ssm_chunk, cfg.reset_at_bos
        self.into = Linear(cfg.width, 2 * inner + 2 * cfg.ssm_state + self.heads)
        self.conv = nn.Conv1d(inner + 2 * cfg.ssm_state, inner + 2 * cfg.ssm_state, cfg.conv, groups=inner + 2 * cfg.ssm_state)
        self.dt_gain = nn.Parameter(torch.linspace(-4.6, -1.5, self.heads))
        self.a_gain = nn.Parameter(torch.linspace(1.0, 8.0, self.heads).log())
        self.d_gain = nn.Parameter(torch.ones(self.heads))
        self.out_gain = nn.Parameter(torch.ones(inner))
        self.out = Linear(inner, cfg.width, zero=True)
        self.inner = inner

    def forward(self, x, ids):
        B, T, _ = x.shape
        z, xbc, dt = self.into(x).split([self.inner, self.inner + 2 * self.state, self.heads], dim=-1)
        w, bias = self.conv.weight.to(x.dtype), self.conv.bias.to(x.dtype)
        xbc = F.pad(xbc.transpose(1, 2), (w.size(-1) - 1, 0))
        xbc = F.silu(F.conv1d(xbc, w, bias, groups=w.size(0))).transpose(1, 2)
        u, b, c = xbc.split([self.inner, self.state, self.state], dim=-1)
        u = u.reshape(B, T, self.heads, -1)
        dt = F.softplus(dt.float() + self.dt_gain)
        a = -dt * self.a_gain.exp()
        if self.reset:
            a = a.masked_fill((ids == BOS)[..., None], -40.0)
        y = ssd(u * dt[..., None].to(u.dtype), a, norm(b), norm(c), self.chunk)
        y = y + u * self.d_gain.to(u.dtype)[:, None]
        y = norm(y.reshape(B, T, self.inner) * F.silu(z)) * self.out_gain.to(x.dtype)
        return self.out(y)


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.h, self.g, self.d = cfg.heads, cfg.kv_heads, cfg.width // cfg.heads
        self.base = cfg.rope_base
        self.q = Linear(cfg.width, self.h * self.d)
        self.k = Linear(cfg.width, self.g * self.d)
        self.v = Linear(cfg.width, self.g * self.d)
        self.out = Linear(self.h * self.d, cfg.width, zero=True)
        self.q_gain = nn.Parameter(torch.full((self.h,), 1.5))

    def rope(self, x):
        half = x.size(-1) // 2
        angle = torch.arange(x.size(2), device=x.device)[:, None] / self.base ** (torch.arange(half, device=x.device) / half)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        p, q = x[..., :half], x[..., half:]
        return torch.cat([p * cos - q * sin, q * cos + p * sin], dim=-1)

    def forward(self, x, ids):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.h, self.d).transpose(1, 2)
        k = self.k(x).view(B, T, self.g, self.d).transpose(1, 2)
        v = self.v(x).view(B, T, self.g, self.d).transpose(1, 2)
        q, k = self.rope(norm(q)) * self.q_gain.to(x.dtype)[:, None, None], self.rope(norm(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.g != self.h)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class Gated(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.width * cfg.mlp_mult) // 64 * 64
        self.up, self.out = Linear(cfg.width, 2 * hidden), Linear(hidden, cfg.width, zero=True)

    def forward(self, x):
        a, b = self.up(x).chunk(2, dim=-1)
        return self.out(F.silu(a) * b)


class Layer(nn.Module):
    def __init__(self, cfg: Config, i: int):
        super().__init__()
        self.mixer = Attention(cfg) if (i + 1) % cfg.attn_every == 0 else StateSpace(cfg)
        self.mlp = Gated(cfg)
        self.mix_gain = nn.Parameter(torch.ones(cfg.width))
        self.mlp_gain = nn.Parameter(torch.ones(cfg.width))
        self.embed_gain = nn.Parameter(torch.zeros(cfg.width))

    def forward(self, x, x0, ids):
        x = x + self.embed_gain.to(x.dtype) * x0
        x = x + self.mix_gain.to(x.dtype) * self.mixer(norm(x), ids)
        return x + self.mlp_gain.to(x.dtype) * self.mlp(norm(x))


class Hybrid(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.softcap, self.z_loss = cfg.softcap, cfg.z_loss
        self.embed = nn.Embedding(cfg.vocab, cfg.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(cfg, i) for i in range(cfg.depth))
        middle = range(cfg.depth // 3, 2 * cfg.depth // 3)
        self.path = [*range(middle.start), *list(middle) * cfg.loops, *range(middle.stop, cfg.depth)]
        self.head_gain = nn.Parameter(torch.ones(cfg.width))

    def logits(self, ids):
        with torch.autocast("cuda", torch.bfloat16):
            x = x0 = norm(self.embed(ids).bfloat16())
            for i in self.path:
                x = self.layers[i](x, x0, ids)
            z = F.linear(norm(x) * self.head_gain.to(x.dtype), self.embed.weight.to(x.dtype))
        return self.softcap * torch.tanh(z.float() / self.softcap)

    def losses(self, ids, targets, temperature: float = 1.0):
        """-ln p of every target, shaped like them."""
        z = self.logits(ids) / temperature
        return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def forward(self, ids, targets):
        z = self.logits(ids)
        loss = F.cross_entropy(z.flatten(0, 1), targets.flatten())
        return loss, loss + self.z_loss * z.logsumexp(dim=-1).square().mean()


# ---------------------------------------------------------------------------------------------------------- optimizers


class Soap(torch.optim.Optimizer):
    """Adam in the slowly turning eigenbasis of Shampoo's two preconditioners (matrices only)."""

    def __init__(self, params, lr, betas=(0.95, 0.95), eps=1e-8, decay=0.0, every=10, widest=3072):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, decay=decay, every=every, widest=widest))

    @staticmethod
    def _basis(cov):
        scale = cov.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(cov.size(0), device=cov.device)
        return torch.linalg.eigh(cov / scale + 1e-6 * eye).eigenvectors.flip(1)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, s = p.grad.float(), self.state[p]
                if "t" not in s:
                    s["t"], s["m"], s["v"] = 0, torch.zeros_like(g), torch.zeros_like(g)
                    s["cov"] = [g @ g.T if g.size(0) <= group["widest"] else None, g.T @ g if g.size(1) <= group["widest"] else None]
                    s["q"] = [None if c is None else self._basis(c) for c in s["cov"]]
                    continue  # the first gradient only sets the basis
                s["t"] += 1
                left, right = s["q"]

                def turn(m):
                    m = m if left is None else left.T @ m
                    return m if right is None else m @ right

                def back(m):
                    m = m if left is None else left @ m
                    return m if right is None else m @ right.T

                s["m"].lerp_(g, 1 - b1)
                s["v"].lerp_(turn(g).square(), 1 - b2)
                scale = math.sqrt(1 - b2 ** s["t"]) / (1 - b1 ** s["t"])
                update = back(turn(s["m"]) / (s["v"].sqrt() + group["eps"])) * scale
                p.mul_(1 - group["lr"] * group["decay"]).add_(update.to(p.dtype), alpha=-group["lr"])
                for i, new in enumerate((g @ g.T if left is not None else None, g.T @ g if right is not None else None)):
                    if new is None:
                        continue
                    s["cov"][i].lerp_(new, 1 - b2)
                    if s["t"] % group["every"] == 0:
                        s["q"][i] = torch.linalg.qr(s["cov"][i] @ s["q"][i]).Q


class Lion(torch.optim.Optimizer):
    """Sign of the momentum; for tables, gains and convolutions."""

    def __init__(self, params, lr, betas=(0.9, 0.98), decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, decay=decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = m.lerp(p.grad, 1 - b1).sign_()
                p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"])
                m.lerp_(p.grad, 1 - b2)


def make_optimizers(model: Hybrid, cfg: Config):
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and not n.startswith("embed")]
    rest = [p for n, p in named if p.ndim != 2 or n.startswith("embed")]
    soap = Soap(matrices, lr=cfg.lr, decay=cfg.decay, every=cfg.precond_every)
    lion = Lion(rest, lr=cfg.lion_lr)
    for opt in (soap, lion):
        for group in opt.param_groups:
            group["peak"] = group["lr"]
    return soap, lion


# ------------------------------------------------------------------------------------------------------------- packing
#
# model.bin = lzma( uint32 length of the header | header, JSON | tensors one after the other )
# A matrix is int8 codes in [-q, q] (q = 2^(bits-1) - 1) by columns and a float16 scale per row, anything else float16.


@torch.no_grad()
def input_moments(model: Hybrid, batches, count: int, world: World) -> dict[str, torch.Tensor]:
    """Mean square of every input column of every Linear, over some training batches."""
    total: dict[str, torch.Tensor] = {}

    def watch(name):
        def hook(_module, args):
            total[name] = total.get(name, 0) + args[0].float().square().flatten(0, -2).mean(dim=0)

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, Linear)]
    for x, _ in itertools.islice(batches, count):
        model.logits(x)
    for h in handles:
        h.remove()
    return {name: world.add(t) / (count * world.size) for name, t in total.items()}


def round_rows(w: torch.Tensor, bits: int, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and row scales; of twelve clips per row the one with the least (weighted) squared error."""
    top = 2 ** (bits - 1) - 1
    weight = torch.ones(w.size(1), device=w.device) if weight is None else weight
    full = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-6)
    best, best_err = None, None
    for share in torch.linspace(0.45, 1.0, 12).tolist():
        scale = (full * share / top).half().float().clamp_min(6e-8)
        err = ((w - (w / scale).round().clamp(-top, top) * scale).square() * weight).sum(dim=1, keepdim=True)
        best_err, best = (err, scale) if best is None else (torch.minimum(err, best_err), torch.where(err < best_err, scale, best))
    return (w / best).round().clamp(-top, top).to(torch.int8), best[:, 0].half()


def pack(model: Hybrid, moments: dict[str, torch.Tensor], cfg: Config) -> bytes:
    head, body = [], []
    for name, t in model.state_dict().items():
        entry = {"name": name, "shape": list(t.shape)}
        if t.ndim == 2 and t.numel() > 8192:
            bits = cfg.embed_bits if name.startswith("embed") else cfg.bits
            codes, scale = round_rows(t.float(), bits, moments.get(name.removesuffix(".weight")))
            entry["rows"] = True
            body += [scale.cpu().numpy().tobytes(), codes.T.contiguous().cpu().numpy().tobytes()]
        else:
            entry["rows"] = False
            body.append(t.detach().half().cpu().numpy().tobytes())
        head.append(entry)
    text = json.dumps(head, separators=(",", ":")).encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(struct.pack("<I", len(text)) + text + b"".join(body), format=lzma.FORMAT_XZ, filters=filters)


def unpack(blob: bytes, model: Hybrid) -> None:
    raw = lzma.decompress(blob)
    (n,) = struct.unpack_from("<I", raw)
    at, state = 4 + n, {}

    def take(dtype, count):
        nonlocal at
        out = np.frombuffer(raw, dtype=dtype, count=count, offset=at)
        at += out.nbytes
        return torch.from_numpy(out.copy())

    for entry in json.loads(raw[4 : 4 + n]):
        shape = entry["shape"]
        if entry["rows"]:
            scale = take(np.float16, shape[0]).float()
            state[entry["name"]] = take(np.int8, math.prod(shape)).view(shape[1], shape[0]).T.float() * scale[:, None]
        else:
            state[entry["name"]] = take(np.float16, math.prod(shape)).view(shape).float()
    assert at == len(raw), "model.bin is longer than its header says"
    model.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------- scoring


def windows(tokens: torch.Tensor, length: int, stride: int):
    """Yields (x, y, scored_from): y[scored_from:] are the next targets, in order, that no window before has scored."""
    last, done = len(tokens) - 1, 0
    while done < last:
        end = min(max(done + stride, length), last)
        begin = max(end - length, 0)
        yield tokens[begin:end], tokens[begin + 1 : end + 1], done - begin
        done = end


def costed_windows(tokens: torch.Tensor, cost: torch.Tensor, length: int, stride: int):
    """The same, with the byte costs of y."""
    paired = windows(torch.stack([tokens, cost], dim=1), length, stride)
    for x, y, scored_from in paired:
        yield x[:, 0], y[:, 0], y[:, 1], scored_from


def grouped(items, size: int):
    it = iter(items)
    while group := list(itertools.islice(it, size)):
        yield group


class Online:
    """Score first, learn afterwards: one SGD step on the targets that have just been booked."""

    def __init__(self, model: Hybrid, cfg: Config, world: World):
        self.model, self.cfg, self.world = model, cfg, world
        tail = tuple(f"layers.{i}." for i in range(cfg.depth - 2, cfg.depth))
        self.params = []
        for name, p in model.named_parameters():
            wanted = {
                "tail": name.startswith(tail) or name.endswith("gain"),
                "gains": name.endswith("gain"),
                "all": True,
            }[cfg.online_scope]
            p.requires_grad_(wanted)
            if wanted:
                self.params.append(p)
        self.opt = torch.optim.SGD(self.params, lr=cfg.online_lr, momentum=cfg.online_momentum)

    def learn(self, x, y, fresh) -> None:
        self.opt.zero_grad(set_to_none=True)
        if x is not None:
            nll = self.model.losses(x, y)
            (nll * fresh).sum().div(fresh.sum().clamp_min(1)).backward()
        self.world.average_grads(self.params)
        nn.utils.clip_grad_norm_(self.params, self.cfg.online_clip)
        self.opt.step()


class Bigram:
    """Counts of token pairs seen so far, all of them kept (vocab x vocab), so c(prev, .) / c(prev) sums to one."""

    def __init__(self, cfg: Config, device):
        self.share, self.seen = cfg.bigram, cfg.bigram_seen
        self.pairs = torch.zeros(cfg.vocab, cfg.vocab, device=device)
        self.total = torch.zeros(cfg.vocab, device=device)

    def mix(self, nll, x, y):
        """Where the context is known well enough: -ln((1 - share) p + share c(x, y) / c(x))."""
        n = self.total[x]
        p = (1 - self.share) * nll.neg().exp() + self.share * (self.pairs[x, y] / n.clamp_min(1)).double()
        return torch.where(n >= self.seen, -p.log(), nll)

    def see(self, group) -> None:
        for x, y, _, scored_from in group:
            x, y = x[scored_from:].to(self.total.device), y[scored_from:].to(self.total.device)
            one = torch.ones(len(x), device=self.total.device)
            self.pairs.index_put_((x, y), one, accumulate=True)
            self.total.index_put_((x,), one, accumulate=True)


def score(model: Hybrid, tokens, cost, cfg: Config, world: World, learner: Online | None = None) -> dict[str, float]:
    """Mean loss and bits per byte of tokens[1:].  Ranks share each group of windows; the group is booked by all of them
    before the learner, if there is one, sees any of it."""
    booked = torch.zeros(3, dtype=torch.float64, device=world.device)  # nats, targets, bytes
    model.eval()
    bigram = Bigram(cfg, world.device) if cfg.bigram > 0 else None
    for group in grouped(costed_windows(tokens, cost, cfg.length, cfg.stride), cfg.eval_batch * world.size):
        mine = group[world.rank :: world.size]
        x = y = fresh = None
        if mine:
            x = torch.stack([w[0] for w in mine]).to(world.device)
            y = torch.stack([w[1] for w in mine]).to(world.device)
            paid = torch.stack([w[2] for w in mine]).to(world.device)
            start = torch.tensor([w[3] for w in mine], device=world.device)
            fresh = torch.arange(x.size(1), device=world.device)[None, :] >= start[:, None]
            with torch.no_grad():
                nll = model.losses(x, y, cfg.temperature).double()
                if bigram is not None:
                    nll = bigram.mix(nll, x, y)
            booked += torch.stack([(nll * fresh).sum(), fresh.sum().double(), (paid * fresh).sum().double()])
        if bigram is not None:
            bigram.see(group)
        if learner is not None:
            learner.learn(x, y, fresh)
    nats, targets, n_bytes = world.add(booked).tolist()
    return {"loss": nats / targets, "bpb": nats / math.log(2) / n_bytes, "tokens": targets, "bytes": n_bytes}


@torch.no_grad()
def check_causal(model: Hybrid, cfg: Config, world: World) -> None:
    """Changes one token in the middle of a random row: no logit before it may move."""
    model.eval()
    ids = torch.randint(4, cfg.vocab, (2, cfg.length), device=world.device)
    at = cfg.length // 2
    other = ids.clone()
    other[:, at] = (other[:, at] - 4 + 17) % (cfg.vocab - 4) + 4
    moved = (model.logits(ids) - model.logits(other)).abs().amax(dim=(0, 2))
    world.say(f"causal check: before {moved[:at].max().item():.2e}, from there on {moved[at:].max().item():.2e}")
    assert moved[:at].max() < 1e-2 * moved[at:].max().clamp_min(1e-6), "logits depend on later tokens"


@torch.no_grad()
def sample_text(model: Hybrid, cfg: Config, world: World) -> str:
    """Greedy-ish continuation of an empty document, to see that the thing speaks at all."""
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer)
    ids = [BOS]
    model.eval()
    for _ in range(cfg.sample):
        row = torch.zeros(1, cfg.length, dtype=torch.long, device=world.device)
        tail = ids[-cfg.length :]
        row[0, : len(tail)] = torch.tensor(tail, device=world.device)
        p = F.softmax(model.logits(row)[0, len(tail) - 1] / 0.8, dim=-1)
        ids.append(int(torch.multinomial(p, 1)))
        if ids[-1] == BOS:
            break
    return sp.decode(ids[1:])


# ------------------------------------------------------------------------------------------------------------ training


def rate(step: int, progress: float, cfg: Config) -> float:
    """Warm-up, flat, then 1 - sqrt cool-down over the last share of the run."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    left = (1.0 - progress) / cfg.cooldown
    return 1.0 if left >= 1.0 else max(1.0 - math.sqrt(max(1.0 - left, 0.0)), 0.0)


class TailAverage:
    """Uniform average of the weights over the end of the run."""

    def __init__(self):
        self.count, self.sum = 0, None

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        state = {k: v.detach().double() for k, v in model.state_dict().items()}
        self.sum = state if self.sum is None else {k: self.sum[k] + v for k, v in state.items()}
        self.count += 1

    def load_into(self, model: nn.Module) -> None:
        if self.count:
            model.load_state_dict({k: (v / self.count).float() for k, v in self.sum.items()})


def train(model: Hybrid, cfg: Config, world: World, val: torch.Tensor, cost: torch.Tensor) -> float:
    """Trains in place, ends with the averaged weights; returns the seconds spent."""
    optimizers = make_optimizers(model, cfg)
    step, spent = 0, 0.0
    if cfg.resume:
        kept = torch.load(cfg.resume, map_location=world.device, weights_only=False)
        model.load_state_dict(kept["model"])
        for opt, state in zip(optimizers, kept["optimizers"]):
            opt.load_state_dict(state)
        step, spent = kept["step"], kept["spent"]
        world.say(f"resumed {cfg.resume} at step {step}, {spent / 3600:.2f} h in")
    batches = training_batches(cfg, world, step)
    micro_steps = max(cfg.batch_tokens // (cfg.micro * cfg.seq * world.size), 1)
    run = torch.compile(model) if cfg.compile else model
    average = TailAverage()
    began = time.perf_counter() - spent
    budget = cfg.hours * 3600
    model.train()
    while True:
        progress = max(step / cfg.steps, (time.perf_counter() - began) / budget)
        if world.any(progress >= 1.0):
            break
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        shown = 0.0
        for _ in range(micro_steps):
            loss, objective = run(*next(batches))
            (objective / micro_steps).backward()
            shown += loss.item() / micro_steps
        params = [p for p in model.parameters() if p.requires_grad]
        world.average_grads(params)
        nn.utils.clip_grad_norm_(params, cfg.clip)
        factor = rate(step, progress, cfg)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * factor
            opt.step()
        step += 1
        if progress >= 1.0 - cfg.average_last and step % cfg.average_every == 0:
            average.add(model)
        if step % cfg.log_every == 0:
            seconds = time.perf_counter() - began
            world.say(f"step {step} loss {shown:.4f} lr x{factor:.3f} {seconds:.0f}s {1000 * seconds / step:.1f} ms/step")
        if cfg.peek_every and step % cfg.peek_every == 0:  # a look at the first million tokens, for the log only
            few = score(model, val[: cfg.peek_tokens + 1], cost[: cfg.peek_tokens + 1], cfg, world)
            world.say(f"step {step} peek_loss {few['loss']:.4f} peek_bpb {few['bpb']:.4f} ({few['tokens']:.0f} tokens)")
            model.train()
        if cfg.save_every and step % cfg.save_every == 0 and world.chief:
            keep = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save({**keep, "step": step, "spent": time.perf_counter() - began}, "checkpoint.pt")
    average.load_into(model)
    spent = time.perf_counter() - began
    world.say(f"trained {step} steps in {spent:.0f}s, averaged {average.count} snapshots")
    return spent


def main() -> None:
    cfg = parse(sys.argv[1:])
    world = World()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    world.say(json.dumps(asdict(cfg)))

    val = validation_tokens(cfg)
    cost = byte_cost(val, cfg)
    world.say(f"validation: {len(val)} tokens, {int(cost[1:].sum())} bytes, {len(shards(cfg, 'train'))} training shards")

    model = Hybrid(cfg).to(world.device)
    world.say(f"parameters: {sum(p.numel() for p in model.parameters())}")
    if cfg.check:
        check_causal(model, cfg, world)
    train_seconds = train(model, cfg, world, val, cost)

    moments = input_moments(model.eval(), training_batches(cfg, world, 10**6), cfg.moment_batches, world)
    if world.chief:
        Path(cfg.artifact).write_bytes(pack(model, moments, cfg))
    world.wait()

    code_bytes = Path(__file__).stat().st_size
    model_bytes = Path(cfg.artifact).stat().st_size
    total_bytes = code_bytes + model_bytes
    world.say(f"code {code_bytes} + model {model_bytes} = {total_bytes} bytes of {LIMIT}")
    assert total_bytes < LIMIT, f"{total_bytes - LIMIT} bytes too many"

    scored = Hybrid(cfg).to(world.device)
    unpack(Path(cfg.artifact).read_bytes(), scored)
    began = time.perf_counter()
    static = score(scored, val, cost, cfg, world)
    world.say(f"static val_loss {static['loss']:.6f} val_bpb {static['bpb']:.6f} {time.perf_counter() - began:.1f}s")
    final, online_began = static, time.perf_counter()
    if cfg.online:
        final = score(scored, val, cost, cfg, world, Online(scored, cfg, world))
    eval_seconds = time.perf_counter() - online_began if cfg.online else time.perf_counter() - began

    results = {
        "val_loss": round(final["loss"], 8),
        "val_bpb": round(final["bpb"], 8),
        "val_bpb_static": round(static["bpb"], 8),
        "tokens": int(final["tokens"]),
        "bytes": int(final["bytes"]),
        "code_bytes": code_bytes,
        "model_bytes": model_bytes,
        "total_bytes": total_bytes,
        "train_seconds": round(train_seconds, 1),
        "eval_seconds": round(eval_seconds, 1),
        "config": asdict(cfg),
    }
    if world.chief:
        Path(cfg.results).write_text(json.dumps(results, indent=1) + "\n")
    world.say("results " + json.dumps({k: v for k, v in results.items() if k != "config"}))
    if cfg.sample:
        world.say(sample_text(scored, cfg, world))
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
