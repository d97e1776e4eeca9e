"""Tied ternary transformer, small functions only.

A depth-recurrent decoder: `pre` blocks, then `core` blocks run `loops` times with the same weights, then `coda` blocks.
Everything is a function over a dict of tensors; there is no nn.Module. The block matrices are trained with a ternary
straight-through estimator, rounded at the end by GPTQ onto the ternary grid (Hessians from training batches, inside the
600 s), and entropy-coded with an interleaved rANS coder written below. The bigram table is product-quantised.

Evaluation goes document by document: every document starts from the stored weights and from a zero LoRA adapter, each
chunk of 256 tokens is scored first and only then used for one Adam step on that document's adapter.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

import argparse
import glob
import io
import json
import lzma
import math
import os
import random
import struct
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import grad_and_value

# ---------------------------------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------------------------------

SIZE_LIMIT = 16_000_000
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
BOS = 1

OPTIONS = [
    # name, default, help
    ("run_id", "cava", "prefix of the files that are written"),
    ("seed", 1337, "seed of the initial weights and of the shuffles"),
    ("data_path", "./data/datasets/fineweb10B_sp1024", "folder of the token shards"),
    ("train_glob", "fineweb_train_*.bin", "training shards"),
    ("val_glob", "fineweb_val_*.bin", "validation shards"),
    ("tokenizer_path", "./data/tokenizers/fineweb_1024_bpe.model", "sentencepiece model"),
    ("vocab_size", 1024, "tokens in the vocabulary"),
    ("dim", 768, "width"),
    ("heads", 12, "query heads"),
    ("kv_heads", 4, "key and value heads"),
    ("mlp_mult", 3, "hidden width of the MLP over the model width"),
    ("pre", 3, "blocks before the loop"),
    ("core", 6, "tied blocks inside the loop"),
    ("loops", 2, "times that the tied blocks are run"),
    ("coda", 3, "blocks after the loop"),
    ("softcap", 30.0, "logits are squashed to +-softcap"),
    ("rope_base", 10000.0, "base of the rotary frequencies"),
    ("bigram_rows", 8192, "rows of the hashed bigram embedding"),
    ("bigram_dim", 192, "its width"),
    ("seq_len", 1024, "training context"),
    ("batch_tokens", 524288, "tokens of a step over all ranks"),
    ("iterations", 20000, "upper bound on the steps"),
    ("train_s", 600.0, "wall clock of training, calibration and rounding"),
    ("reserve_s", 26.0, "what calibration and rounding get of it"),
    ("warmup_steps", 12, "compile warm-up on random tokens, undone afterwards"),
    ("warmdown", 0.45, "fraction of the time over which the rate falls"),
    ("qat_from", 0.12, "fraction of the time after which weights are ternary in the forward pass"),
    ("matrix_lr", 0.025, "Muon rate"),
    ("embed_lr", 0.05, "Adam rate of the embeddings"),
    ("scalar_lr", 0.02, "Adam rate of vectors and scalars"),
    ("momentum", 0.95, "Muon momentum"),
    ("momentum_start", 0.85, "momentum at the first step"),
    ("momentum_steps", 500, "steps until the full momentum"),
    ("ns_steps", 5, "Newton-Schulz iterations"),
    ("weight_decay", 0.04, "decoupled decay of the matrices"),
    ("grad_clip", 1.0, "clip of the gradient norm, 0 for none"),
    ("ema_decay", 0.997, "decay of the averaged weights"),
    ("ema_from", 0.5, "fraction of the time after which the average starts"),
    ("val_every", 2000, "steps between validations that are only logged, 0 for none"),
    ("log_every", 200, "steps between training log lines"),
    ("group", 128, "weights per ternary scale"),
    ("calib_batches", 12, "training batches per rank for the Hessians"),
    ("calib_rows", 16, "sequences per calibration batch"),
    ("damp", 0.01, "damping of the Hessian"),
    ("pq_sub", 4, "width of a product-quantised piece"),
    ("pq_iters", 12, "k-means rounds"),
    ("eval_s", 600.0, "wall clock of the evaluation"),
    ("slide_stride", 128, "stride of the sliding window, 0 to leave it out"),
    ("slide_rows", 64, "windows scored at once"),
    ("ttt", 1, "adapt to scored chunks"),
    ("chunk", 256, "tokens scored before each adapter step"),
    ("context", 1024, "window of the document scorer"),
    ("doc_batch", 64, "documents side by side"),
    ("lora_rank", 8, "rank of the adapters"),
    ("lora_lr", 0.01, "Adam rate of the adapters"),
    ("lora_steps", 1, "adapter steps per scored chunk"),
    ("cache_weight", 0.06, "largest weight of the document cache"),
    ("cache_prior", 0.05, "pseudo-count of each token in the cache"),
    ("logit_temp", 1.0, "temperature of the logits when scoring"),
]


def from_environment(name, default):
    raw = os.environ.get(name.upper())
    return default if raw is None else type(default)(raw)


def settings(argv=None):
    parser = argparse.ArgumentParser(description="depth-recurrent ternary transformer")
    for name, default, text in OPTIONS:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=from_environment(name, default), help=text)
    cfg = parser.parse_args(argv)
    assert cfg.dim % cfg.heads == 0 and cfg.heads % cfg.kv_heads == 0
    assert cfg.dim % cfg.group == 0 and cfg.context % cfg.chunk == 0
    return cfg


# ---------------------------------------------------------------------------------------------------------------------
# ranks and log
# ---------------------------------------------------------------------------------------------------------------------


def start_ranks():
    """(rank, world, device) of this process."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda", 0)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return dist.get_rank(), dist.get_world_size(), device


def many():
    return dist.is_available() and dist.is_initialized()


def sum_ranks(x):
    if many():
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def mean_ranks(x):
    if many():
        dist.all_reduce(x, op=dist.ReduceOp.AVG)
    return x


def from_rank(x, source):
    if many():
        dist.broadcast(x, source)
    return x


def barrier():
    if many():
        dist.barrier()


def make_log(cfg, rank):
    """A print that only the first rank does, to the screen and to a file."""
    if rank != 0:
        return lambda *parts: None
    Path("logs").mkdir(exist_ok=True)
    path = Path("logs") / f"{cfg.run_id}_{cfg.seed}.txt"
    path.write_text("")

    def log(*parts):
        line = " ".join(str(part) for part in parts)
        print(line, flush=True)
        with path.open("a") as file:
            file.write(line + "\n")

    return log


def tick():
    torch.cuda.synchronize()
    return time.perf_counter()


def shared_seconds(since, device):
    """Seconds since a tick as the first rank reads them, so that every rank takes the same decisions."""
    seconds = torch.tensor([tick() - since], dtype=torch.float64, device=device)
    return float(from_rank(seconds, 0))


# ---------------------------------------------------------------------------------------------------------------------
# tokens
# ---------------------------------------------------------------------------------------------------------------------


def read_shard(path):
    """The uint16 tokens of one shard."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path} is no token shard")
    tokens = np.fromfile(path, dtype="<u2", count=int(header[2]), offset=4 * HEADER_INTS)
    if len(tokens) != int(header[2]):
        raise ValueError(f"{path} is cut short")
    return torch.from_numpy(tokens)


def shard_paths(cfg, pattern):
    paths = sorted(glob.glob(os.path.join(cfg.data_path, pattern)))
    if not paths:
        raise FileNotFoundError(f"no {pattern} in {cfg.data_path}")
    return paths


def endless_shards(paths, seed):
    """Shards for ever: in order at first, shuffled on each later round."""
    order, chance = list(paths), random.Random(seed)
    while True:
        for path in order:
            yield read_shard(path)
        chance.shuffle(order)


def token_runs(paths, seed, length):
    """Consecutive runs of `length` tokens across the shards' borders."""
    left = torch.empty(0, dtype=torch.uint16)
    for shard in endless_shards(paths, seed):
        left = torch.cat((left, shard)) if len(left) else shard
        at = 0
        while at + length <= len(left):
            yield left[at : at + length]
            at += length
        left = left[at:]


def to_rows(run, seq_len, device):
    ids = run.to(torch.int32).pin_memory().to(device, non_blocking=True).long()
    return ids[:-1].view(-1, seq_len), ids[1:].view(-1, seq_len)


def train_batches(cfg, rank, world, device, rows=None):
    """(inputs, targets) of this rank, micro-batch by micro-batch. rows: sequences in one, if not the step's share."""
    micro = cfg.batch_tokens // max(world, 8) if rows is None else rows * cfg.seq_len
    runs = token_runs(shard_paths(cfg, cfg.train_glob), cfg.seed, micro * world)
    for run in runs:
        mine = run[rank * micro : (rank + 1) * micro]
        after = run[(rank + 1) * micro : (rank + 1) * micro + 1]
        if len(after) == 0:
            after = mine[-1:]
            yield cut_last(to_rows(torch.cat((mine, after)), cfg.seq_len, device))
        else:
            yield to_rows(torch.cat((mine, after)), cfg.seq_len, device)


def cut_last(rows):
    """The last target of the last rank lies in the next run; it is left out of the loss."""
    x, y = rows
    y = y.clone()
    y[-1, -1] = -100
    return x, y


def validation_tokens(cfg):
    """The whole validation split as one stream, in the order of its shards."""
    return torch.cat([read_shard(path) for path in shard_paths(cfg, cfg.val_glob)])


# ---------------------------------------------------------------------------------------------------------------------
# bytes
# ---------------------------------------------------------------------------------------------------------------------


def piece_bytes(sp, token):
    """(UTF-8 bytes without the leading space, leading space?, control token?) of one piece."""
    if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
        return 0, False, True
    if sp.is_byte(token):
        return 1, False, False
    piece = sp.id_to_piece(token)
    spaced = piece.startswith("\u2581")
    return len(piece.removeprefix("\u2581").encode("utf-8")), spaced, False


def byte_tables(cfg, device):
    """Three tables over the vocabulary, with which the bytes of (previous, target) pairs are counted."""
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    if sp.vocab_size() != cfg.vocab_size:
        raise ValueError(f"the tokenizer has {sp.vocab_size()} pieces, not {cfg.vocab_size}")
    rows = [piece_bytes(sp, token) for token in range(cfg.vocab_size)]
    size, spaced, control = (torch.tensor(column, device=device) for column in zip(*rows))
    return {"size": size.to(torch.int16), "spaced": spaced, "control": control}


def bytes_of(tables, before, target):
    """UTF-8 bytes of each target; the space of a piece is written unless a control token (a document's start) precedes."""
    space = tables["spaced"][target] & ~tables["control"][before]
    return tables["size"][target].long() + space.long()


# ---------------------------------------------------------------------------------------------------------------------
# sums of a score
# ---------------------------------------------------------------------------------------------------------------------


def new_tally(device):
    return {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("nats", "tokens", "bytes")}


def add_to_tally(tally, nats, sizes, mask):
    """Adds the masked positions. nats, sizes and mask have one shape."""
    keep = mask.to(torch.float64)
    tally["nats"] += (nats.double() * keep).sum()
    tally["tokens"] += keep.sum()
    tally["bytes"] += (sizes.double() * keep).sum()


def total_tally(tally):
    return {name: float(sum_ranks(value.clone())) for name, value in tally.items()}


def bits_per_byte(total):
    return total["nats"] / math.log(2.0) / total["bytes"]


def check_complete(total, tokens):
    """Every token but the stream's first is a target once."""
    if round(total["tokens"]) != len(tokens) - 1:
        raise RuntimeError(f"{total['tokens']:.0f} tokens were scored instead of {len(tokens) - 1}")


# ---------------------------------------------------------------------------------------------------------------------
# the model: parameters
# ---------------------------------------------------------------------------------------------------------------------


def block_names(cfg):
    counts = (("pre", cfg.pre), ("core", cfg.core), ("coda", cfg.coda))
    return [f"{part}.{i}" for part, count in counts for i in range(count)]


def matrix_shapes(cfg):
    """The matrices of one block: rows are outputs."""
    kv = cfg.dim // cfg.heads * cfg.kv_heads
    wide = cfg.dim * cfg.mlp_mult
    return {
        "q": (cfg.dim, cfg.dim),
        "k": (kv, cfg.dim),
        "v": (kv, cfg.dim),
        "o": (cfg.dim, cfg.dim),
        "up": (wide, cfg.dim),
        "down": (cfg.dim, wide),
    }


def ternary_names(cfg):
    return [f"{block}.{name}" for block in block_names(cfg) for name in matrix_shapes(cfg)]


def orthogonal(shape, generator):
    """A random matrix with orthonormal rows or columns."""
    tall = torch.randn(max(shape), min(shape), generator=generator)
    basis = torch.linalg.qr(tall)[0]
    return basis.contiguous() if shape[0] >= shape[1] else basis.T.contiguous()


def new_block(cfg, prefix, generator):
    made = {}
    for name, shape in matrix_shapes(cfg).items():
        made[f"{prefix}.{name}"] = orthogonal(shape, generator) * (0.2 if name in ("o", "down") else 1.0)
    made[f"{prefix}.attn_gain"] = torch.ones(cfg.dim)
    made[f"{prefix}.mlp_gain"] = torch.ones(cfg.dim)
    made[f"{prefix}.q_gain"] = torch.full((cfg.heads,), 1.5)
    made[f"{prefix}.mix"] = torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim)))
    return made


def new_params(cfg, device):
    generator = torch.Generator().manual_seed(cfg.seed)
    made = {
        "embed": torch.randn(cfg.vocab_size, cfg.dim, generator=generator) * 0.02,
        "bigram.table": torch.randn(cfg.bigram_rows, cfg.bigram_dim, generator=generator) * 0.02,
        "bigram.proj": torch.randn(cfg.dim, cfg.bigram_dim, generator=generator) * 0.02,
        "bigram.gain": torch.full((1,), 0.1),
        "smear": torch.full((cfg.dim,), -3.0),
        "loop": torch.zeros(cfg.loops, cfg.dim),
        "skip": torch.full((cfg.coda, cfg.dim), 0.5),
    }
    for prefix in block_names(cfg):
        made.update(new_block(cfg, prefix, generator))
    return {name: value.to(device).requires_grad_() for name, value in made.items()}


def count_params(params):
    return sum(value.numel() for value in params.values())


# ---------------------------------------------------------------------------------------------------------------------
# the model: functions
# ---------------------------------------------------------------------------------------------------------------------


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


def ternary_scale(groups):
    """One scale per group: the mean magnitude."""
    return groups.abs().mean(-1, keepdim=True).clamp_min(1e-8)


def ternary(w, group):
    """The nearest weights of {-s, 0, s}, s per group along a row."""
    groups = w.view(w.size(0), -1, group)
    scale = ternary_scale(groups)
    return ((groups / scale).round().clamp(-1, 1) * scale).view_as(w)


def straight_through(w, group):
    return w + (ternary(w, group) - w).detach()


def working(params, cfg, qat):
    """The weights of a forward pass: bfloat16, the matrices ternary if asked."""
    rounded = set(ternary_names(cfg)) if qat else set()
    pick = lambda name, w: straight_through(w, cfg.group) if name in rounded else w
    return {name: pick(name, w).to(torch.bfloat16) for name, w in params.items()}


def project(p, name, x, lora=None, tap=None):
    """x times a matrix, with the adapter of each row of the batch if there is one. tap: sees every input."""
    if tap is not None:
        tap(name, x)
    y = F.linear(x, p[name])
    if lora is not None and name + ".a" in lora:
        down = torch.einsum("bti,bri->btr", x, lora[name + ".a"].to(x.dtype))
        y = y + torch.einsum("btr,bor->bto", down, lora[name + ".b"].to(x.dtype))
    return y


def rope_angles(length, size, base, device):
    rates = base ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates[None, :]
    return angles.cos()[None, None], angles.sin()[None, None]


def rotate(x, angles):
    cos, sin = (part.to(x.dtype) for part in angles)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


def split_heads(x, heads):
    return x.view(x.size(0), x.size(1), heads, -1).transpose(1, 2)


def attention(p, prefix, x, angles, cfg, lora, tap):
    q = split_heads(project(p, f"{prefix}.q", x, lora, tap), cfg.heads)
    k = split_heads(project(p, f"{prefix}.k", x, lora, tap), cfg.kv_heads)
    v = split_heads(project(p, f"{prefix}.v", x, lora, tap), cfg.kv_heads)
    q = rotate(rms(q), angles) * p[f"{prefix}.q_gain"][None, :, None, None]
    y = F.scaled_dot_product_attention(q, rotate(rms(k), angles), v, is_causal=True, enable_gqa=True)
    return project(p, f"{prefix}.o", y.transpose(1, 2).reshape_as(x), lora, tap)


def mlp(p, prefix, x, lora, tap):
    wide = F.relu(project(p, f"{prefix}.up", x, lora, tap)).square()
    return project(p, f"{prefix}.down", wide, lora, tap)


def block(p, prefix, x, first, angles, cfg, lora, tap):
    mix = p[f"{prefix}.mix"]
    x = mix[0] * x + mix[1] * first
    x = x + p[f"{prefix}.attn_gain"] * attention(p, prefix, rms(x), angles, cfg, lora, tap)
    return x + p[f"{prefix}.mlp_gain"] * mlp(p, prefix, rms(x), lora, tap)


def previous(ids):
    """The token before each token of a row; a document's start has none and gets itself."""
    before = torch.cat((ids[:, :1], ids[:, :-1]), dim=1)
    return torch.where(ids == BOS, ids, before)


def bigram_rows(ids, cfg):
    return (previous(ids) * 36313 ^ ids * 27191) % cfg.bigram_rows


def smeared(p, x, ids):
    """Adds a part of the embedding before, never across a document's start."""
    before = F.pad(x[:, :-1], (0, 0, 1, 0))
    same = (ids != BOS)[..., None].to(x.dtype)
    return x + torch.sigmoid(p["smear"]) * before * same


def embedded(p, ids, cfg):
    pairs = F.linear(p["bigram.table"][bigram_rows(ids, cfg)], p["bigram.proj"])
    x = p["embed"][ids] + p["bigram.gain"] * pairs
    return rms(smeared(p, x, ids))


def hidden(p, ids, cfg, lora=None, tap=None):
    """The last hidden states of rows of tokens."""
    first = x = embedded(p, ids, cfg)
    angles = rope_angles(ids.size(1), cfg.dim // cfg.heads, cfg.rope_base, ids.device)
    step = partial(block, p, first=first, angles=angles, cfg=cfg, lora=lora, tap=tap)
    kept = []
    for i in range(cfg.pre):
        x = step(f"pre.{i}", x)
        kept.append(x)
    for turn in range(cfg.loops):
        x = x + p["loop"][turn]
        for i in range(cfg.core):
            x = step(f"core.{i}", x)
    for i in range(cfg.coda):
        x = x + p["skip"][i] * kept.pop() if kept else x
        x = step(f"coda.{i}", x)
    return rms(x)


def logits_of(p, ids, cfg, lora=None, tap=None):
    """Logits of the next token after each position, in float32."""
    x = hidden(p, ids, cfg, lora, tap)
    raw = F.linear(x, p["embed"])
    if lora is not None and "head.a" in lora:
        down = torch.einsum("bti,bri->btr", x, lora["head.a"].to(x.dtype))
        raw = raw + torch.einsum("btr,bor->bto", down, lora["head.b"].to(x.dtype))
    return cfg.softcap * torch.tanh(raw.float() / cfg.softcap)


def row_loss(params, ids, targets, cfg, qat):
    """The training loss of a micro-batch."""
    logits = logits_of(working(params, cfg, qat), ids, cfg)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


# ---------------------------------------------------------------------------------------------------------------------
# optimisers
# ---------------------------------------------------------------------------------------------------------------------


def orthogonalised(g, steps):
    """Newton-Schulz: the nearest orthogonal matrix, roughly."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def muon_direction(g, state, name, momentum, steps):
    """The orthogonalised Nesterov direction of one matrix; its momentum is kept in the state."""
    buffer = state.setdefault(name, torch.zeros_like(g))
    buffer.mul_(momentum).add_(g)
    ahead = g.add(buffer, alpha=momentum)
    return orthogonalised(ahead, steps) * max(1.0, g.size(0) / g.size(1)) ** 0.5


def muon_step(params, grads, state, names, lr, momentum, cfg, rank, world):
    """Each rank does its share of the matrices, then all directions are summed."""
    sizes = [params[name].numel() for name in names]
    flat = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=params[names[0]].device)
    for i, (name, piece) in enumerate(zip(names, flat.split(sizes))):
        if i % world == rank:
            piece.copy_(muon_direction(grads[name], state, name, momentum, cfg.ns_steps).flatten())
    sum_ranks(flat)
    for name, piece in zip(names, flat.split(sizes)):
        params[name].mul_(1 - lr * cfg.weight_decay)
        params[name].add_(piece.view_as(params[name]).to(params[name].dtype), alpha=-lr)


def adam_init(params):
    return {
        "step": 0,
        "first": {name: torch.zeros_like(w) for name, w in params.items()},
        "second": {name: torch.zeros_like(w) for name, w in params.items()},
    }


def adam_direction(g, state, name, betas, eps=1e-8):
    first, second = state["first"][name], state["second"][name]
    first.lerp_(g, 1 - betas[0])
    second.lerp_(g.square(), 1 - betas[1])
    fair = first / (1 - betas[0] ** state["step"])
    return fair / ((second / (1 - betas[1] ** state["step"])).sqrt() + eps)


def adam_step(params, grads, state, rates, betas=(0.9, 0.95)):
    """One step in place. rates: by name."""
    state["step"] += 1
    for name, g in grads.items():
        params[name].add_(adam_direction(g, state, name, betas), alpha=-rates[name])


def adam_rates(params, cfg):
    """The rates of all that Muon does not train."""
    matrices = set(ternary_names(cfg))
    tables = ("embed", "bigram.table", "bigram.proj")
    pick = lambda name: cfg.embed_lr * 0.5 if name in tables else cfg.scalar_lr
    return {name: pick(name) for name in params if name not in matrices}


def clipped(grads, limit):
    if limit <= 0:
        return grads
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * factor for name, g in grads.items()}


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------


def rate_factor(done, cfg):
    """Full rate, then a straight line down to zero. done: fraction of the time."""
    return min(1.0, max(0.0, (1.0 - done) / cfg.warmdown))


def momentum_at(step, cfg):
    part = min(1.0, step / max(1, cfg.momentum_steps))
    return cfg.momentum_start + part * (cfg.momentum - cfg.momentum_start)


def step_gradients(loss_fn, params, batches, cfg, world, qat):
    """(loss, gradients) of one step, averaged over micro-batches and ranks."""
    micros = max(world, 8) // world
    names, leaves = list(params), list(params.values())
    total, loss_sum = None, 0.0
    for _ in range(micros):
        x, y = next(batches)
        loss = loss_fn(params, x, y, cfg, qat)
        grads = torch.autograd.grad(loss, leaves)
        total = list(grads) if total is None else [a + b for a, b in zip(total, grads)]
        loss_sum = loss_sum + loss.detach()
    merged = {name: mean_ranks(g.div_(micros)) for name, g in zip(names, total)}
    return loss_sum / micros, merged


@torch.no_grad()
def apply_step(params, grads, states, step, factor, cfg, rank, world):
    grads = clipped(grads, cfg.grad_clip)
    names = ternary_names(cfg)
    muon_step(
        params, grads, states["muon"], names, cfg.matrix_lr * factor, momentum_at(step, cfg), cfg, rank, world
    )
    rates = {name: rate * factor for name, rate in adam_rates(params, cfg).items()}
    adam_step(params, {name: grads[name] for name in rates}, states["adam"], rates)


def new_states(params, cfg):
    matrices = set(ternary_names(cfg))
    return {"muon": {}, "adam": adam_init({n: w.detach() for n, w in params.items() if n not in matrices})}


def random_batches(cfg, world, device):
    """Random tokens in the shape of the training batches, for the compiler."""
    generator = torch.Generator(device=device).manual_seed(0)
    rows = cfg.batch_tokens // max(world, 8) // cfg.seq_len
    while True:
        ids = torch.randint(cfg.vocab_size, (rows, cfg.seq_len + 1), generator=generator, device=device)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def warm_up(loss_fn, params, cfg, rank, world, device):
    """Compiles both forms of the loss and the optimisers; the weights are put back afterwards."""
    saved = {name: w.detach().clone() for name, w in params.items()}
    states, batches = new_states(params, cfg), random_batches(cfg, world, device)
    for step in range(cfg.warmup_steps):
        _, grads = step_gradients(loss_fn, params, batches, cfg, world, qat=step % 2 == 1)
        apply_step(params, grads, states, step, 1.0, cfg, rank, world)
    with torch.no_grad():
        for name, w in params.items():
            w.copy_(saved[name])


@torch.no_grad()
def average_into(average, params, decay):
    """The moving average of the weights; it begins as a copy."""
    if not average:
        average.update({name: w.detach().clone() for name, w in params.items()})
        return
    names = list(params)
    torch._foreach_lerp_([average[n] for n in names], [params[n].detach() for n in names], 1 - decay)


def train(loss_fn, params, cfg, rank, world, device, watch, log):
    """Trains until the reserve; returns (averaged weights, tick of the start).

    watch: called now and then with the weights, its time is not counted and its result is only logged."""
    states, average = new_states(params, cfg), {}
    batches = train_batches(cfg, rank, world, device)
    budget = cfg.train_s - cfg.reserve_s
    barrier()
    began, paused = tick(), 0.0
    for step in range(cfg.iterations):
        spent = shared_seconds(began, device) - paused
        if spent >= budget:
            break
        if cfg.val_every and step and step % cfg.val_every == 0:
            at = tick()
            log(f"step:{step} val_bpb:{watch(params):.4f} train_time:{spent:.1f}s")
            paused += tick() - at
        done = spent / budget
        loss, grads = step_gradients(loss_fn, params, batches, cfg, world, qat=done >= cfg.qat_from)
        apply_step(params, grads, states, step, rate_factor(done, cfg), cfg, rank, world)
        if done >= cfg.ema_from:
            average_into(average, params, cfg.ema_decay)
        if step % cfg.log_every == 0:
            log(f"step:{step} train_loss:{loss.item():.4f} train_time:{spent:.1f}s step_avg:{1000 * spent / (step + 1):.2f}ms")
    log(f"stopped at step {step}, train_time:{shared_seconds(began, device) - paused:.1f}s of {cfg.train_s:.0f}s")
    return average or {name: w.detach().clone() for name, w in params.items()}, began + paused


# ---------------------------------------------------------------------------------------------------------------------
# Hessians, and rounding onto the ternary grid
# ---------------------------------------------------------------------------------------------------------------------


def hessian_key(name):
    """q, k and v see one input and share a Hessian."""
    block_name, part = name.rsplit(".", 1)
    return f"{block_name}.in" if part in ("q", "k", "v") else name


def hessian_tap(hessians):
    """A tap that sums the outer products of the inputs. A tied block sums over its turns."""

    def tap(name, x):
        if name.endswith((".k", ".v")):
            return
        flat = x.reshape(-1, x.size(-1)).float()
        gram = flat.T @ flat / len(flat)
        key = hessian_key(name)
        hessians[key] = hessians[key] + gram if key in hessians else gram

    return tap


def calibration_batches(cfg, rank, world, device):
    """Training text for the Hessians."""
    batches = train_batches(cfg, rank, world, device, rows=cfg.calib_rows)
    for _ in range(cfg.calib_batches):
        yield next(batches)[0]


@torch.no_grad()
def input_hessians(params, cfg, rank, world, device):
    hessians = {}
    p = working(params, cfg, qat=True)
    for ids in calibration_batches(cfg, rank, world, device):
        hidden(p, ids, cfg, tap=hessian_tap(hessians))
    return {key: mean_ranks(h) for key, h in sorted(hessians.items())}


def inverse_factor(h, damp):
    """The upper Cholesky factor of the inverse of a damped Hessian."""
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), device=h.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)


def round_group(w, factor, scale):
    """Rounds the columns of one group one after the other; returns (codes, scaled errors)."""
    codes, errors = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(w.size(1)):
        codes[:, j] = (w[:, j] / scale).round().clamp(-1, 1)
        errors[:, j] = (w[:, j] - codes[:, j] * scale) / factor[j, j]
        w[:, j:] -= errors[:, j : j + 1] * factor[j : j + 1, j:]
    return codes, errors


def gptq_ternary(w, h, cfg):
    """(int8 codes of -1, 0, 1; float16 scales per group) that keep the layer's outputs."""
    w, factor = w.float().clone(), inverse_factor(h, cfg.damp)
    codes = torch.zeros_like(w, dtype=torch.int8)
    scales = torch.zeros(w.size(0), w.size(1) // cfg.group, dtype=torch.float16, device=w.device)
    for g, at in enumerate(range(0, w.size(1), cfg.group)):
        end = at + cfg.group
        scale = ternary_scale(w[:, at:end]).half().clamp_min(1e-6)
        part, errors = round_group(w[:, at:end], factor[at:end, at:end], scale[:, 0].float())
        codes[:, at:end], scales[:, g] = part.to(torch.int8), scale[:, 0]
        w[:, end:] -= errors @ factor[at:end, end:]
    return codes, scales


@torch.no_grad()
def round_matrices(params, hessians, cfg, rank, world):
    """All block matrices, a share on each rank: name -> (codes, scales)."""
    made = {}
    for i, name in enumerate(ternary_names(cfg)):
        w = params[name]
        if i % world == rank:
            made[name] = gptq_ternary(w, hessians[hessian_key(name)], cfg)
        else:
            shape = (w.size(0), w.size(1) // cfg.group)
            made[name] = (torch.empty_like(w, dtype=torch.int8), torch.empty(shape, dtype=torch.float16, device=w.device))
    for i, name in enumerate(ternary_names(cfg)):
        for part in made[name]:
            from_rank(part, i % world)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# product quantisation of the bigram table, int8 rows of the embedding
# ---------------------------------------------------------------------------------------------------------------------


def nearest(points, centres):
    """The index of the nearest centre of each point, in slices."""
    return torch.cat([torch.cdist(part, centres).argmin(-1) for part in points.split(1 << 16)])


def k_means(points, count, rounds, generator):
    centres = points[torch.randperm(len(points), generator=generator)[:count].to(points.device)].clone()
    for _ in range(rounds):
        home = nearest(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, home, points)
        sizes = torch.bincount(home, minlength=count).to(points.dtype)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return centres


@torch.no_grad()
def product_quantise(table, cfg):
    """(uint8 codes, float16 codebook): pieces of pq_sub values share a codebook of 256."""
    points = table.float().reshape(-1, cfg.pq_sub)
    centres = k_means(points, 256, cfg.pq_iters, torch.Generator().manual_seed(cfg.seed)).half()
    return nearest(points, centres.float()).to(torch.uint8), centres


@torch.no_grad()
def row_quantise(w):
    """(int8 codes, float16 scale per row)."""
    scale = (w.float().abs().amax(-1, keepdim=True) / 127).half().clamp_min(1e-6)
    return (w.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


# ---------------------------------------------------------------------------------------------------------------------
# rANS, many lanes at once
# ---------------------------------------------------------------------------------------------------------------------

PRECISION, LOW = 12, 1 << 16


def frequencies(symbols, alphabet):
    """Counts scaled to a sum of 2^PRECISION, at least 1 for every symbol that occurs."""
    counts = np.bincount(symbols, minlength=alphabet).astype(np.float64)
    scaled = np.maximum(np.floor(counts / counts.sum() * (1 << PRECISION)), counts > 0).astype(np.int64)
    while (over := int(scaled.sum()) - (1 << PRECISION)) != 0:
        top = int(scaled.argmax())
        scaled[top] -= max(1, over // 2) if over > 0 else over
    return scaled


def starts_of(freq):
    return np.concatenate(([0], np.cumsum(freq)[:-1])).astype(np.uint64)


def lane_count(count):
    return int(min(4096, max(1, count // 256)))


def rans_encode(symbols, alphabet):
    """bytes: count, lanes, frequencies, final states and 16-bit words."""
    freq = frequencies(symbols, alphabet)
    f_of, c_of = freq.astype(np.uint64), starts_of(freq)
    lanes = lane_count(len(symbols))
    fill = np.full(-len(symbols) % lanes, int(freq.argmax()), dtype=np.int64)
    rows = np.concatenate((symbols.astype(np.int64), fill)).reshape(-1, lanes)
    state, words = np.full(lanes, LOW, dtype=np.uint64), []
    for row in rows[::-1]:
        f, c = f_of[row], c_of[row]
        full = state >= (f << np.uint64(32 - PRECISION))
        words.append((state[full] & np.uint64(0xFFFF)).astype("<u2"))
        state = np.where(full, state >> np.uint64(16), state)
        state = ((state // f) << np.uint64(PRECISION)) + state % f + c
    stream = np.concatenate(words[::-1]) if words else np.zeros(0, "<u2")
    head = struct.pack("<IHHI", len(symbols), lanes, alphabet, len(stream))
    return head + freq.astype("<u2").tobytes() + state.astype("<u4").tobytes() + stream.tobytes()


def rans_decode(data):
    """The symbols again, as int64."""
    count, lanes, alphabet, length = struct.unpack_from("<IHHI", data)
    at = struct.calcsize("<IHHI")
    freq = np.frombuffer(data, "<u2", alphabet, at).astype(np.int64)
    state = np.frombuffer(data, "<u4", lanes, at + 2 * alphabet).astype(np.uint64)
    stream = np.frombuffer(data, "<u2", length, at + 2 * alphabet + 4 * lanes).astype(np.uint64)
    f_of, c_of = freq.astype(np.uint64), starts_of(freq)
    symbol_at = np.repeat(np.arange(alphabet), freq)
    rows, read = np.empty((-(-count // lanes), lanes), dtype=np.int64), 0
    for row in rows:
        slot = state & np.uint64((1 << PRECISION) - 1)
        row[:] = symbol_at[slot.astype(np.int64)]
        state = f_of[row] * (state >> np.uint64(PRECISION)) + slot - c_of[row]
        low = state < LOW
        more = int(low.sum())
        state[low] = (state[low] << np.uint64(16)) | stream[read : read + more]
        read += more
    return rows.reshape(-1)[:count]


# ---------------------------------------------------------------------------------------------------------------------
# packing
# ---------------------------------------------------------------------------------------------------------------------


def kind_of(name, cfg):
    if name in ("embed", "bigram.proj"):
        return "rows"
    if name == "bigram.table":
        return "product"
    return "ternary" if name in set(ternary_names(cfg)) else "plain"


def quantised(params, hessians, cfg, rank, world):
    """name -> (kind, shape, codes or None, floats)."""
    matrices, made = round_matrices(params, hessians, cfg, rank, world), {}
    for name in sorted(params):
        kind, w = kind_of(name, cfg), params[name]
        if kind == "ternary":
            codes, floats = matrices[name]
        elif kind == "product":
            codes, floats = product_quantise(w, cfg)
        elif kind == "rows":
            codes, floats = row_quantise(w)
        else:
            codes, floats = None, w.half()
        made[name] = (kind, list(w.shape), codes, floats)
    return made


OFFSETS = {"ternary": (1, 3), "rows": (128, 256), "product": (0, 256)}


def as_symbols(kind, codes):
    return codes.cpu().numpy().astype(np.int64).reshape(-1) + OFFSETS[kind][0]


def pack(made):
    """One lzma block with the index and the floats, and the rANS streams behind it."""
    index, floats, streams = [], io.BytesIO(), []
    for name, (kind, shape, codes, numbers) in made.items():
        raw = numbers.detach().half().cpu().numpy().astype("<f2")
        floats.write(raw.tobytes())
        stream = b"" if codes is None else rans_encode(as_symbols(kind, codes), OFFSETS[kind][1])
        streams.append(stream)
        index.append([name, kind, shape, raw.size, len(stream)])
    header = json.dumps(index).encode()
    front = lzma.compress(struct.pack("<I", len(header)) + header + floats.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    return struct.pack("<I", len(front)) + front + b"".join(streams)


def restore(kind, shape, codes, floats, cfg):
    """One float32 tensor from its codes and floats."""
    if kind == "plain":
        return floats.view(shape)
    codes = codes - OFFSETS[kind][0]
    if kind == "product":
        return floats.view(256, cfg.pq_sub)[codes].reshape(shape)
    if kind == "rows":
        return codes.view(shape).float() * floats.view(-1, 1)
    return (codes.view(shape[0], -1, cfg.group).float() * floats.view(shape[0], -1, 1)).view(shape)


def unpack(blob, cfg, device):
    """The parameters out of a packed model."""
    (length,) = struct.unpack_from("<I", blob)
    front, at = lzma.decompress(blob[4 : 4 + length]), 4 + length
    (head,) = struct.unpack_from("<I", front)
    floats, read, params = np.frombuffer(front, "<f2", offset=4 + head), 0, {}
    for name, kind, shape, size, span in json.loads(front[4 : 4 + head]):
        numbers = torch.from_numpy(floats[read : read + size].astype(np.float32)).to(device)
        codes = torch.from_numpy(rans_decode(blob[at : at + span])).to(device) if span else None
        params[name] = restore(kind, shape, codes, numbers, cfg)
        read, at = read + size, at + span
    return params


def code_bytes():
    return len(Path(__file__).resolve().read_bytes())


def write_model(blob, cfg, log):
    """Writes the artifact and prints the counted size; refuses what is too large."""
    total = len(blob) + code_bytes()
    log(f"model:{len(blob)} bytes code:{code_bytes()} bytes total:{total} bytes limit:{SIZE_LIMIT}")
    if total > SIZE_LIMIT:
        raise RuntimeError(f"{total} bytes are more than {SIZE_LIMIT}")
    model_path(cfg).write_bytes(blob)


def model_path(cfg):
    return Path(f"{cfg.run_id}_model.bin")


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: the stream in blocks, and with a sliding window (both are only logged)
# ---------------------------------------------------------------------------------------------------------------------


def device_ids(tokens, device):
    return tokens.to(torch.int32).to(device).long()


def token_nats(logits, targets):
    """-ln p of each target, float32, in the shape of the targets."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def share(count, rank, world):
    """The range of `count` things that falls to a rank."""
    return range(count * rank // world, count * (rank + 1) // world)


def windows(count, length, stride):
    """(start, first scored, end) of windows over `count` targets; every target is scored in one of them."""
    done = 0
    while done < count:
        end = min(count, length if done == 0 else done + stride)
        yield max(0, end - length), done, end
        done = end


def batched(items, size):
    items = list(items)
    for at in range(0, len(items), size):
        yield items[at : at + size]


def window_rows(tokens, group, length, device):
    """(inputs, targets, mask) of a batch of windows, padded on the right."""
    x = torch.zeros(len(group), length, dtype=torch.long, device=device)
    y, mask = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    for row, (start, first, end) in enumerate(group):
        ids = device_ids(tokens[start : end + 1], device)
        x[row, : end - start], y[row, : end - start] = ids[:-1], ids[1:]
        mask[row, first - start : end - start] = True
    return x, y, mask


@torch.no_grad()
def score_windows(p, tokens, tables, stride, cfg, rank, world, device):
    """The totals of all targets of a stream. stride = seq_len: blocks without overlap."""
    tally = new_tally(device)
    spans = list(windows(len(tokens) - 1, cfg.seq_len, stride))
    mine = share(len(spans), rank, world)
    for group in batched(spans[mine.start : mine.stop], cfg.slide_rows):
        x, y, mask = window_rows(tokens, group, cfg.seq_len, device)
        nats = token_nats(logits_of(p, x, cfg), y)
        add_to_tally(tally, nats, bytes_of(tables, x, y), mask)
    total = total_tally(tally)
    check_complete(total, tokens)
    return total


def watcher(tokens, tables, cfg, rank, world, device):
    """A function that scores weights on the stream in blocks; training only logs what it says."""

    def watch(params):
        p = working({name: w.detach() for name, w in params.items()}, cfg, qat=True)
        return bits_per_byte(score_windows(p, tokens, tables, cfg.seq_len, cfg, rank, world, device))

    return watch


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: documents
# ---------------------------------------------------------------------------------------------------------------------


def document_spans(tokens):
    """(start, end) of every document; its last target is the mark that begins the next one."""
    starts = (tokens.to(torch.int32) == BOS).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        raise ValueError("the stream does not begin with a document")
    ends = [start + 1 for start in starts[1:]] + [len(tokens)]
    return [(start, end) for start, end in zip(starts, ends) if end - start > 1]


def targets_in(span):
    return span[1] - span[0] - 1


def chunks_in(span, cfg):
    return -(-targets_in(span) // cfg.chunk)


def document_groups(spans, cfg, rank, world):
    """Batches of documents with like numbers of chunks. No document's score depends on its neighbours."""
    ordered = sorted(spans, key=lambda span: (chunks_in(span, cfg), span[0]))
    groups = list(batched(ordered, cfg.doc_batch))
    yield from reversed(groups[rank::world])


def chunk_window(tokens, group, c, cfg, device):
    """The c-th chunk of each document with its context: inputs, targets and the mask of what is scored."""
    end, begin = (c + 1) * cfg.chunk, max(0, (c + 1) * cfg.chunk - cfg.context)
    spans = [(start + begin, start + c * cfg.chunk, min(start + end, last - 1)) for start, last in group]
    x = torch.zeros(len(group), end - begin, dtype=torch.long)
    y, mask = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    for row, (low, first, high) in enumerate(spans):
        if high <= first:
            continue
        ids = tokens[low : high + 1].to(torch.int64)
        x[row, : high - low], y[row, : high - low] = ids[:-1], ids[1:]
        mask[row, first - low : high - low] = True
    return x.to(device), y.to(device), mask.to(device)


# ---- adapters: one per document, as a dict of stacked tensors


def adapter_shapes(cfg):
    """(outputs, inputs) of the matrices that get an adapter."""
    shapes = {}
    for prefix in block_names(cfg):
        shapes.update({f"{prefix}.{name}": matrix_shapes(cfg)[name] for name in ("q", "v")})
    return {**shapes, "head": (cfg.vocab_size, cfg.dim)}


@lru_cache(maxsize=1)
def adapter_seed(items, rank):
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(rank, inputs, generator=generator) / inputs**0.5 for name, (_, inputs) in items}


def fresh_adapters(cfg, docs, device):
    """Adapters that change nothing yet: the same random a, and b = 0, for every document."""
    shapes = adapter_shapes(cfg)
    seeds = adapter_seed(tuple(shapes.items()), cfg.lora_rank)
    lora = {}
    for name, (outputs, _) in shapes.items():
        lora[f"{name}.a"] = seeds[name].to(device).expand(docs, -1, -1).clone()
        lora[f"{name}.b"] = torch.zeros(docs, outputs, cfg.lora_rank, device=device)
    return lora


def adapter_loss(lora, p, x, y, mask, cfg):
    """Each document's mean loss over its scored chunk, summed over the documents: they do not touch each other."""
    nats = token_nats(logits_of(p, x, cfg, lora), y)
    keep = mask.float()
    return ((nats * keep).sum(1) / keep.sum(1).clamp_min(1)).sum()


def adapter_step(gradient_fn, lora, state, p, x, y, mask, cfg):
    """One Adam step on the chunk that has just been scored."""
    grads, _ = gradient_fn(lora, p, x, y, mask, cfg)
    with torch.no_grad():
        adam_step(lora, grads, state, dict.fromkeys(lora, cfg.lora_lr), betas=(0.9, 0.95))


# ---- the cache: token counts of the document's earlier chunks, a distribution over the whole vocabulary


def empty_cache(cfg, docs, device):
    return torch.zeros(docs, cfg.vocab_size, device=device)


def cache_probabilities(counts, cfg):
    """(docs, vocabulary), sums to one."""
    smooth = counts + cfg.cache_prior
    return smooth / smooth.sum(-1, keepdim=True)


def cache_add(counts, y, mask):
    """The counts with the scored targets added."""
    return counts.scatter_add(1, y, mask.to(counts.dtype))


def cache_gate(logp, counts, cfg):
    """The cache's weight per position: high where the model is unsure, zero for an empty cache."""
    entropy = -(logp.exp() * logp).sum(-1) / math.log(cfg.vocab_size)
    seen = counts.sum(-1, keepdim=True)
    return cfg.cache_weight * entropy * (seen / (seen + cfg.chunk))


def mixed_log_probs(logits, counts, cfg):
    """ln of the mixture of model and cache, (docs, positions, vocabulary)."""
    logp = F.log_softmax(logits / cfg.logit_temp, dim=-1)
    gate = cache_gate(logp, counts, cfg)[..., None]
    mixture = (1 - gate) * logp.exp() + gate * cache_probabilities(counts, cfg)[:, None]
    return mixture.clamp_min(1e-30).log()


def gathered_nats(log_probs, y):
    return -log_probs.gather(-1, y[..., None])[..., 0]


def scored_part(x, cfg):
    """The last chunk of each window: all that is scored lies there."""
    return x[:, -cfg.chunk :]


@torch.no_grad()
def chunk_nats(logits_fn, p, lora, counts, x, y, cfg):
    """-ln p of the targets of the window's last chunk."""
    logits = scored_part(logits_fn(p, x, cfg, lora), cfg)
    return gathered_nats(mixed_log_probs(logits, counts, cfg), scored_part(y, cfg))


def score_group(tools, p, tokens, group, tables, tally, cfg, device, in_time):
    """Scores a batch of documents chunk by chunk. Adapters and cache begin empty and end with the batch."""
    lora, counts = fresh_adapters(cfg, len(group), device), empty_cache(cfg, len(group), device)
    state = adam_init(lora)
    rounds = max(chunks_in(span, cfg) for span in group)
    for c in range(rounds):
        x, y, mask = chunk_window(tokens, group, c, cfg, device)
        nats = chunk_nats(tools["logits"], p, lora, counts, x, y, cfg)
        part_x, part_y, part_mask = (scored_part(rows, cfg) for rows in (x, y, mask))
        add_to_tally(tally, nats, bytes_of(tables, part_x, part_y), part_mask)
        counts = cache_add(counts, part_y, part_mask)
        if cfg.ttt and c + 1 < rounds and in_time():
            for _ in range(cfg.lora_steps):
                adapter_step(tools["gradient"], lora, state, p, x, y, mask, cfg)


def deadline(began, limit):
    """True until the limit; afterwards documents are scored without further adapter steps."""
    return lambda: time.perf_counter() - began < limit


def score_documents(tools, p, tokens, tables, cfg, rank, world, device, began, log):
    """The totals of all documents: the score of this submission."""
    tally, spans = new_tally(device), document_spans(tokens)
    in_time = deadline(began, cfg.eval_s * 0.85)
    groups = list(document_groups(spans, cfg, rank, world))
    for i, group in enumerate(groups):
        score_group(tools, p, tokens, group, tables, tally, cfg, device, in_time)
        if i % 20 == 0:
            log(f"documents {i + 1}/{len(groups)} batches, {time.perf_counter() - began:.1f}s")
    total = total_tally(tally)
    check_complete(total, tokens)
    return total


def evaluation_tools(cfg):
    """The two compiled functions of the document scorer."""
    torch._dynamo.config.cache_size_limit = 64
    return {
        "logits": torch.compile(logits_of, dynamic=False),
        "gradient": torch.compile(grad_and_value(adapter_loss), dynamic=False),
    }


def warm_tools(tools, p, cfg, device):
    """Compiles the document scorer on random tokens, one shape after the other."""
    for length in range(cfg.chunk, cfg.context + 1, cfg.chunk):
        x = torch.randint(cfg.vocab_size, (cfg.doc_batch, length), device=device)
        lora = fresh_adapters(cfg, cfg.doc_batch, device)
        counts = empty_cache(cfg, cfg.doc_batch, device)
        chunk_nats(tools["logits"], p, lora, counts, x, x, cfg)
        if cfg.ttt:
            adapter_step(tools["gradient"], lora, adam_init(lora), p, x, x, torch.ones_like(x, dtype=torch.bool), cfg)


# ---------------------------------------------------------------------------------------------------------------------
# checks of the packed model
# ---------------------------------------------------------------------------------------------------------------------


def check_ternary(params, cfg):
    """Every group of a ternary matrix holds at most three values."""
    for name in ternary_names(cfg):
        groups = params[name].view(params[name].size(0), -1, cfg.group)
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-8)
        odd = ((groups / scale).round() * scale - groups).abs().amax()
        if float(odd) > 1e-6:
            raise RuntimeError(f"{name} is not ternary")


def describe(made, log):
    """The share of zeros and the entropy of the ternary codes."""
    codes = [part[2] for part in made.values() if part[0] == "ternary"]
    counts = sum(torch.bincount((c.flatten() + 1).int(), minlength=3).double() for c in codes)
    shares = (counts / counts.sum()).tolist()
    bits = -sum(q * math.log2(q) for q in shares if q > 0)
    log(f"ternary weights:{int(counts.sum())} minus/zero/plus:{shares[0]:.3f}/{shares[1]:.3f}/{shares[2]:.3f} bits:{bits:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# the run
# ---------------------------------------------------------------------------------------------------------------------


def prepare_device():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def build_model(cfg, rank, world, device, watch, log):
    """Training, calibration, rounding and packing, all within train_s; ends with the written artifact."""
    params = new_params(cfg, device)
    log(f"model_params:{count_params(params)} depth:{cfg.pre + cfg.core * cfg.loops + cfg.coda} world:{world}")
    loss_fn = torch.compile(row_loss, dynamic=False)
    warm_up(loss_fn, params, cfg, rank, world, device)
    average, began = train(loss_fn, params, cfg, rank, world, device, watch, log)
    log(f"peak memory:{torch.cuda.max_memory_allocated() >> 20}MiB")
    hessians = input_hessians(average, cfg, rank, world, device)
    log(f"calibrated on training batches, train_time:{shared_seconds(began, device):.1f}s")
    made = quantised(average, hessians, cfg, rank, world)
    describe(made, log)
    if rank == 0:
        write_model(pack(made), cfg, log)
    barrier()
    spent = shared_seconds(began, device)
    log(f"training, calibration and packing took {spent:.1f}s of {cfg.train_s:.0f}s")
    if spent > cfg.train_s:
        raise RuntimeError("the reserve was too small")


def load_model(cfg, device):
    """The weights that are evaluated: what the artifact holds and nothing else."""
    params = unpack(model_path(cfg).read_bytes(), cfg, device)
    check_ternary(params, cfg)
    return working(params, cfg, qat=False)


def report(name, total, seconds, log):
    loss = total["nats"] / total["tokens"]
    log(f"{name} val_loss:{loss:.8f} val_bpb:{bits_per_byte(total):.8f} tokens:{total['tokens']:.0f} bytes:{total['bytes']:.0f} time:{seconds:.1f}s")


def evaluate(cfg, tokens, tables, rank, world, device, log):
    """Two scores without adaptation for the log, then the documents; the last line is the result."""
    barrier()
    began = tick()
    p, tools = load_model(cfg, device), evaluation_tools(cfg)
    warm_tools(tools, p, cfg, device)
    at = tick()
    blocks = score_windows(p, tokens, tables, cfg.seq_len, cfg, rank, world, device)
    report("round_trip", blocks, tick() - at, log)
    if cfg.slide_stride:
        at = tick()
        sliding = score_windows(p, tokens, tables, cfg.slide_stride, cfg, rank, world, device)
        report("sliding_window", sliding, tick() - at, log)
    at = tick()
    documents = score_documents(tools, p, tokens, tables, cfg, rank, world, device, began, log)
    report("documents", documents, tick() - at, log)
    log(f"evaluation took {shared_seconds(began, device):.1f}s of {cfg.eval_s:.0f}s")
    log(f"final val_bpb:{bits_per_byte(documents):.6f}")


def main():
    cfg = settings()
    rank, world, device = start_ranks()
    log = make_log(cfg, rank)
    prepare_device()
    seed_all(cfg.seed)
    log(f"python {sys.version.split()[0]} torch {torch.__version__} ranks:{world}")
    log(json.dumps(vars(cfg), sort_keys=True))
    tables = byte_tables(cfg, device)
    tokens = validation_tokens(cfg)
    log(f"validation tokens:{len(tokens)} documents:{len(document_spans(tokens))}")
    watch = watcher(tokens, tables, cfg, rank, world, device)
    build_model(cfg, rank, world, device, watch, log)
    torch.cuda.empty_cache()
    evaluate(cfg, tokens, tables, rank, world, device, log)
    if many():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
