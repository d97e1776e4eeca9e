"""train_gpt.py: 11L x 512 transformer, int6 GPTQ, score-first TTT, and a causal n-gram cache mixed in by an entropy gate.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                 train, pack, evaluate
    python train_gpt.py --stage prepare --docs docs_selected.jsonl        write the token shards

The cache is a set of hash tables over tokens that have already been scored. For each context it answers with a whole
distribution over the vocabulary (a row of counts divided by the row's own sum, smoothed into the next shorter order), so
the mixture is a distribution too. Rows overlap in memory to save space: collisions cost accuracy, never mass.
Every stage is a function of (cfg, env, ...) and returns a dict; main() runs them in order.
"""

import argparse
import glob
import io
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
import torch.nn as nn
import torch.nn.functional as F
import zstandard
from torch.nn.parallel import DistributedDataParallel as DDP

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SIZE_LIMIT = 16_000_000
CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "bigram_scale")
HASH_PRIMES = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5, 0x85EBCA77C2B2AE63],
    dtype=np.uint64,
)


# ------------------------------------------------------------------------------------------------ settings


def build_config(argv=None):
    """Command line over environment over default; the result is a plain namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, default):
        kind = type(default)
        raw = os.environ.get(name.upper())
        if kind is bool:
            value = default if raw is None else raw not in ("0", "false", "False", "")
            parser.add_argument(f"--{name}", type=lambda s: s not in ("0", "false", "False", ""), default=value)
        else:
            parser.add_argument(f"--{name}", type=kind, default=default if raw is None else kind(raw))

    # where things are
    add("stage", "all")
    add("data_dir", "./data/datasets/fineweb10B_sp1024")
    add("train_glob", "fineweb_train_*.bin")
    add("val_glob", "fineweb_val_*.bin")
    add("tokenizer", "./data/tokenizers/fineweb_1024_bpe.model")
    add("docs", "./data/docs_selected.jsonl")
    add("val_docs", 50_000)
    add("shard_tokens", 100_000_000)
    add("out", "final_model.int6.zst")
    add("run_id", "ngram_mix")
    # model
    add("vocab", 1024)
    add("layers", 11)
    add("dim", 512)
    add("heads", 8)
    add("kv_heads", 4)
    add("mlp_mult", 3.0)
    add("rope_dims", 16)
    add("rope_base", 10000.0)
    add("qk_gain", 1.5)
    add("softcap", 30.0)
    add("bigram_buckets", 2048)
    add("bigram_dim", 128)
    # training
    add("seed", 1337)
    add("steps", 20_000)
    add("batch_tokens", 786_432)
    add("seq_len", 1024)
    add("warmup_compile", 20)
    add("warmdown_frac", 0.45)
    add("train_cap_s", 600.0)
    add("reserve_s", 16.0)
    add("matrix_lr", 0.025)
    add("scalar_lr", 0.025)
    add("embed_lr", 0.035)
    add("muon_momentum", 0.99)
    add("muon_momentum_start", 0.92)
    add("muon_momentum_steps", 1500)
    add("muon_wd", 0.04)
    add("adam_wd", 0.04)
    add("beta1", 0.9)
    add("beta2", 0.95)
    add("clip", 0.3)
    add("ema_decay", 0.997)
    add("log_every", 200)
    # packing
    add("calib_batches", 48)
    add("calib_seqs", 8)
    add("gptq_block", 128)
    add("gptq_damp", 0.01)
    add("clip_range", 31)
    add("zstd_level", 22)
    # evaluation
    add("eval_seq_len", 1024)
    add("stride", 64)
    add("chunk_tokens", 131_072)
    add("window_batch", 128)
    add("eval_cap_s", 580.0)
    add("ttt", True)
    add("ttt_lr", 0.002)
    add("ttt_momentum", 0.9)
    add("ttt_epochs", 2)
    add("ttt_batch", 8)
    add("ttt_clip", 1.0)
    add("ttt_freeze_blocks", 2)
    # cache
    add("cache", True)
    add("orders", "2,3,4,6")
    add("slots_log2", 20)
    add("row_step", 64)
    add("backoff_mass", 4.0)
    add("gate_max", 0.35)
    add("gate_slope", 1.6)
    add("gate_centre", 2.6)
    add("gate_mass", 6.0)
    cfg = SimpleNamespace(**vars(parser.parse_args(argv)))
    cfg.orders = [int(n) for n in cfg.orders.split(",") if n]
    cfg.train_files = os.path.join(cfg.data_dir, cfg.train_glob)
    cfg.val_files = os.path.join(cfg.data_dir, cfg.val_glob)
    return cfg


def setup_env(cfg):
    """Process group, device, seeds, log file."""
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    distributed = "RANK" in os.environ
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    torch.cuda.manual_seed_all(cfg.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    os.makedirs("logs", exist_ok=True)
    if 8 % world:
        raise ValueError(f"world size {world} must divide 8")
    return {
        "rank": rank,
        "world": world,
        "device": device,
        "distributed": distributed,
        "master": rank == 0,
        "accum": 8 // world,
        "logfile": f"logs/{cfg.run_id}_seed{cfg.seed}.txt",
    }


def say(env, text):
    if env["master"]:
        print(text, flush=True)
        with open(env["logfile"], "a", encoding="utf-8") as handle:
            print(text, file=handle)


def reduce_sum(env, *values):
    """Sums python numbers over the ranks, in float64."""
    box = torch.tensor(values, dtype=torch.float64, device=env["device"])
    if env["distributed"]:
        dist.all_reduce(box, op=dist.ReduceOp.SUM)
    return box.tolist()


# ------------------------------------------------------------------------------------------------ data


def read_shard(path):
    """uint16 tokens of one shard: a header of 256 int32, then the tokens."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"not a token shard: {path}")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=256 * 4)
    if tokens.size != count:
        raise ValueError(f"short shard: {path}")
    return tokens


def write_shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with open(path, "wb") as handle:
        handle.write(header.tobytes())
        handle.write(np.asarray(tokens, dtype="<u2").tobytes())


def prepare_shards(cfg):
    """Stage `prepare`: the first val_docs documents become validation shards, all later ones training shards."""
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer)
    out = Path(cfg.data_dir)
    out.mkdir(parents=True, exist_ok=True)
    state = {"split": "val", "tokens": [], "shards": {"val": 0, "train": 0}, "docs": {"val": 0, "train": 0}}

    def flush():
        if state["tokens"]:
            split = state["split"]
            write_shard(out / f"fineweb_{split}_{state['shards'][split]:06d}.bin", state["tokens"])
            state["shards"][split] += 1
            state["tokens"] = []

    with open(cfg.docs, encoding="utf-8") as handle:
        for index, line in enumerate(handle):
            split = "val" if index < cfg.val_docs else "train"
            if split != state["split"]:
                flush()
                state["split"] = split
            text = json.loads(line)["text"]
            state["tokens"].append(sp.bos_id())
            state["tokens"].extend(sp.encode(text))
            state["docs"][split] += 1
            if len(state["tokens"]) >= cfg.shard_tokens:
                flush()
    flush()
    print(f"prepare: documents {state['docs']} shards {state['shards']}")
    return state


def open_stream(cfg, env, seed=0):
    """A training stream: shards in order, each rank takes its slice of every batch."""
    files = sorted(glob.glob(cfg.train_files))
    if not files:
        raise FileNotFoundError(cfg.train_files)
    order = np.random.default_rng(cfg.seed + seed).permutation(len(files))
    return {"files": [files[i] for i in order], "file": 0, "pos": 0, "tokens": read_shard(files[order[0]])}


def take(stream, count):
    """The next count tokens of the stream, over the ends of shards."""
    parts = []
    while count > 0:
        left = stream["tokens"].size - stream["pos"]
        if left <= 0:
            stream["file"] = (stream["file"] + 1) % len(stream["files"])
            stream["tokens"] = read_shard(stream["files"][stream["file"]])
            stream["pos"] = 0
            continue
        step = min(count, left)
        parts.append(stream["tokens"][stream["pos"] : stream["pos"] + step])
        stream["pos"] += step
        count -= step
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def next_batch(cfg, env, stream, tokens):
    """One micro-batch of this rank: inputs and targets of shape [sequences, seq_len]."""
    local = tokens // env["world"]
    span = local + 1
    block = take(stream, span * env["world"])
    mine = torch.from_numpy(block[env["rank"] * span : (env["rank"] + 1) * span].astype(np.int64))
    x = mine[:-1].reshape(-1, cfg.seq_len)
    y = mine[1:].reshape(-1, cfg.seq_len)
    return x.to(env["device"], non_blocking=True), y.to(env["device"], non_blocking=True)


def load_validation(cfg):
    """The whole validation split, in order."""
    files = sorted(glob.glob(cfg.val_files))
    if not files:
        raise FileNotFoundError(cfg.val_files)
    tokens = np.concatenate([read_shard(path) for path in files])
    return {"tokens": tokens, "targets": tokens.size - 1, "files": files}


def byte_tables(cfg):
    """For each token: its UTF-8 bytes without the leading space, whether it has one, and whether it is a boundary."""
    sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer)
    size = max(sp.vocab_size(), cfg.vocab)
    base = np.zeros(size, dtype=np.int64)
    space = np.zeros(size, dtype=bool)
    boundary = np.ones(size, dtype=bool)
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
        base[i] = len(piece.encode("utf-8"))
    return {"base": base, "space": space, "boundary": boundary}


def count_bytes(tables, prev, target):
    """Bytes of each target; a leading space counts unless the token before it is a boundary."""
    return tables["base"][target] + (tables["space"][target] & ~tables["boundary"][prev])


# ------------------------------------------------------------------------------------------------ model


class RMSNorm(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """float32 weights, used in the type of the input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, dims, base):
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv", inv, persistent=False)
        self.dims = dims

    def forward(self, length, device, dtype):
        freqs = torch.outer(torch.arange(length, device=device, dtype=torch.float32), self.inv.to(device))
        return freqs.cos()[None, None].to(dtype), freqs.sin()[None, None].to(dtype)


def rotate(x, cos, sin, dims):
    turn, keep = x[..., :dims], x[..., dims:]
    a, b = turn.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, keep), dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads
        self.head_dim = cfg.dim // cfg.heads
        self.c_q = CastedLinear(cfg.dim, cfg.dim, bias=False)
        self.c_k = CastedLinear(cfg.dim, self.kv_heads * self.head_dim, bias=False)
        self.c_v = CastedLinear(cfg.dim, self.kv_heads * self.head_dim, bias=False)
        self.proj = CastedLinear(cfg.dim, cfg.dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.q_gain = nn.Parameter(torch.full((cfg.heads,), cfg.qk_gain))
        self.rotary = Rotary(cfg.rope_dims, cfg.rope_base)

    def forward(self, x):
        b, t, d = x.shape
        q = self.c_q(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = rotate(q, cos, sin, self.rotary.dims) * self.q_gain.to(q.dtype)[None, :, None, None]
        k = rotate(k, cos, sin, self.rotary.dims)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.dim)
        self.fc = CastedLinear(cfg.dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, cfg.dim, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, cfg, index):
        super().__init__()
        self.norm = RMSNorm()
        self.attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.dim), torch.zeros(cfg.dim))))
        self.depth_scale = 1.0 / math.sqrt(index + 1)

    def forward(self, x, x0):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.norm(x) * self.depth_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.norm(x) * self.depth_scale)


class BigramEmbedding(nn.Module):
    """Embeds a hash of (previous token, token); at the first position the previous token is taken as 0."""

    def __init__(self, cfg):
        super().__init__()
        self.buckets = cfg.bigram_buckets
        self.embed = nn.Embedding(cfg.bigram_buckets, cfg.bigram_dim)
        self.proj = CastedLinear(cfg.bigram_dim, cfg.dim, bias=False)
        nn.init.normal_(self.embed.weight, std=0.01)
        nn.init.zeros_(self.proj.weight)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids):
        prev = F.pad(ids[:, :-1], (1, 0))
        slot = (prev * 36313 + ids * 27191) % self.buckets
        return self.proj(self.embed(slot)) * self.bigram_scale


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.softcap = cfg.softcap
        self.tok = nn.Embedding(cfg.vocab, cfg.dim)
        nn.init.normal_(self.tok.weight, std=0.005)
        self.bigram = BigramEmbedding(cfg)
        self.blocks = nn.ModuleList([Block(cfg, i) for i in range(cfg.layers)])
        self.n_enc = cfg.layers // 2
        self.n_dec = cfg.layers - self.n_enc
        self.skip_weights = nn.Parameter(torch.ones(min(self.n_enc, self.n_dec), cfg.dim))
        self.norm = RMSNorm()
        for name, module in self.named_modules():
            if isinstance(module, CastedLinear) and not name.endswith("proj"):
                nn.init.orthogonal_(module.weight)

    def features(self, ids):
        x = self.norm(self.tok(ids) + self.bigram(ids))
        x0 = x
        skips = []
        for i in range(self.n_enc):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.n_dec):
            if skips:
                x = x + self.skip_weights[i].to(x.dtype) * skips.pop()
            x = self.blocks[self.n_enc + i](x, x0)
        return self.norm(x)

    def head(self, hidden):
        logits = F.linear(hidden, self.tok.weight.to(hidden.dtype))
        return self.softcap * torch.tanh(logits.float() / self.softcap)

    def forward(self, ids, targets):
        logits = self.head(self.features(ids))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_model(cfg, env):
    model = GPT(cfg).to(env["device"]).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        if param.ndim < 2 or any(key in name for key in CONTROL_NAMES):
            param.data = param.data.float()
    return model


# ------------------------------------------------------------------------------------------------ optimizers


@torch.compile
def newton_schulz(g, steps=5):
    """Orthogonalises a batch of matrices with the quintic iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    flip = x.size(-2) > x.size(-1)
    if flip:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the matrices are shared out over the ranks and the updates summed."""

    def __init__(self, params, lr, momentum, weight_decay, env):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.rank, self.world, self.shared = env["rank"], env["world"], env["distributed"]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % self.world == self.rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    update = newton_schulz(p.grad.add(buf, alpha=group["momentum"]))
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.flatten()
                at += p.numel()
            if self.shared:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


def build_optimizers(cfg, env, model):
    matrices, scalars, embeds = [], [], []
    for name, param in model.named_parameters():
        if name.startswith(("tok.", "bigram.embed")):
            embeds.append(param)
        elif param.ndim == 2 and not any(key in name for key in CONTROL_NAMES):
            matrices.append(param)
        else:
            scalars.append(param)
    betas = (cfg.beta1, cfg.beta2)
    adam_embed = torch.optim.AdamW(embeds, lr=cfg.embed_lr, betas=betas, weight_decay=cfg.adam_wd, fused=True)
    adam_scalar = torch.optim.AdamW(scalars, lr=cfg.scalar_lr, betas=betas, weight_decay=0.0, fused=True)
    muon = Muon(matrices, cfg.matrix_lr, cfg.muon_momentum_start, cfg.muon_wd, env)
    opts = {"embed": adam_embed, "scalar": adam_scalar, "muon": muon}
    for opt in opts.values():
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return opts


def lr_scale(cfg, step, elapsed, budget):
    """1, then down to 0 over the last warmdown_frac of the time (or of the steps, whichever ends first)."""
    done = max(step / cfg.steps, elapsed / budget)
    if done < 1.0 - cfg.warmdown_frac:
        return 1.0
    return max((1.0 - done) / cfg.warmdown_frac, 0.0)


def set_rates(cfg, opts, step, scale):
    warm = min(step / cfg.muon_momentum_steps, 1.0)
    momentum = (1 - warm) * cfg.muon_momentum_start + warm * cfg.muon_momentum
    for opt in opts.values():
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * scale
    for group in opts["muon"].param_groups:
        group["momentum"] = momentum


# ------------------------------------------------------------------------------------------------ training


def ema_start(model):
    return {name: p.detach().float().clone() for name, p in model.state_dict().items()}


@torch.no_grad()
def ema_update(ema, model, decay):
    for name, p in model.state_dict().items():
        ema[name].mul_(decay).add_(p.detach().float(), alpha=1.0 - decay)


@torch.no_grad()
def ema_apply(ema, model):
    model.load_state_dict({name: ema[name].to(p.dtype) for name, p in model.state_dict().items()})


def train_step(cfg, env, ddp, opts, stream, params):
    """One optimizer step; returns the loss, summed lazily on the device."""
    loss_sum = torch.zeros((), device=env["device"])
    for micro in range(env["accum"]):
        if env["distributed"]:
            ddp.require_backward_grad_sync = micro == env["accum"] - 1
        x, y = next_batch(cfg, env, stream, cfg.batch_tokens // env["accum"])
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = ddp(x, y)
        loss_sum += loss.detach() / env["accum"]
        (loss / env["accum"]).backward()
    if cfg.clip > 0:
        torch.nn.utils.clip_grad_norm_(params, cfg.clip)
    for opt in opts.values():
        opt.step()
        opt.zero_grad(set_to_none=True)
    return loss_sum


def compile_warmup(cfg, env, ddp, model, opts):
    """A few steps on training tokens so that everything is compiled; weights and optimizer states are put back."""
    kept = {name: p.detach().cpu().clone() for name, p in model.state_dict().items()}
    stream = open_stream(cfg, env, seed=1)
    params = list(model.parameters())
    for _ in range(cfg.warmup_compile):
        train_step(cfg, env, ddp, opts, stream, params)
    model.load_state_dict(kept)
    for opt in opts.values():
        opt.state.clear()
    torch.cuda.synchronize()


def train(cfg, env, model):
    """Trains until the budget is used up: the cap less what packing needs (its calibration reads training data)."""
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    ddp = DDP(compiled, device_ids=[env["device"].index]) if env["distributed"] else compiled
    opts = build_optimizers(cfg, env, model)
    params = list(model.parameters())
    compile_warmup(cfg, env, ddp, model, opts)
    stream = open_stream(cfg, env)
    ema = ema_start(model)
    budget = cfg.train_cap_s - cfg.reserve_s
    say(env, f"train: params {sum(p.numel() for p in params)} budget {budget:.1f}s world {env['world']}")
    torch.cuda.synchronize()
    started = time.perf_counter()
    step, stop_at = 0, None
    while True:
        elapsed = time.perf_counter() - started
        if step >= cfg.steps or (stop_at is not None and step >= stop_at):
            break
        set_rates(cfg, opts, step, lr_scale(cfg, step, elapsed, budget))
        loss = train_step(cfg, env, ddp, opts, stream, params)
        ema_update(ema, model, cfg.ema_decay)
        step += 1
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        if step % cfg.log_every == 0 or step <= 5:
            say(env, f"step {step} train_loss {loss.item():.4f} time {elapsed:.1f}s avg {1000 * elapsed / step:.2f}ms")
        if stop_at is None:
            over = reduce_sum(env, float(elapsed >= budget))[0] > 0
            stop_at = step if over else None
    ema_apply(ema, model)
    elapsed = time.perf_counter() - started
    say(env, f"train: stopped after {step} steps, {elapsed:.1f}s; EMA weights applied")
    return {"steps": step, "seconds": elapsed, "started": started, "stream": stream}


# ------------------------------------------------------------------------------------------------ packing


def gather_hessians(cfg, env, model, stream, deadline):
    """Sum of x x^T at the input of every linear layer, over training batches, within the training cap."""
    hessians, hooks = {}, []

    def watch(name):
        def hook(module, inputs, output):
            x = inputs[0].detach().flatten(0, -2).float()
            if name not in hessians:
                hessians[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
            hessians[name].addmm_(x.mT, x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_hook(watch(name)))
    model.eval()
    used = 0
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(cfg.calib_batches):
            late = reduce_sum(env, float(time.perf_counter() >= deadline))[0] > 0
            if late:
                break
            x, _ = next_batch(cfg, env, stream, cfg.calib_seqs * cfg.seq_len * env["world"])
            model.features(x)
            used += 1
    for hook in hooks:
        hook.remove()
    for name in sorted(hessians):
        if env["distributed"]:
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
        hessians[name] /= max(used * env["world"], 1)
    return {"hessians": hessians, "batches": used}


def row_scales(weight, limit):
    """Per row the clip with the least squared error of plain rounding, out of five quantiles."""
    best, best_err = None, None
    for q in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        top = torch.quantile(weight.abs(), q, dim=1)
        scale = (top / limit).clamp_min(1e-8).half().float()
        rounded = (weight / scale[:, None]).round().clamp(-limit, limit) * scale[:, None]
        err = (weight - rounded).square().sum(dim=1)
        if best is None:
            best, best_err = scale, err
        else:
            better = err < best_err
            best, best_err = torch.where(better, scale, best), torch.where(better, err, best_err)
    return best


@torch.no_grad()
def gptq(cfg, weight, hessian):
    """Rounds column by column and pushes each column's error onto the columns not yet rounded."""
    w = weight.float().clone()
    h = hessian.float().clone()
    limit = cfg.clip_range
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=True)
    back = torch.argsort(order)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(cfg.gptq_damp * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    scale = row_scales(w, limit)
    q = torch.zeros_like(w)
    for a in range(0, w.size(1), cfg.gptq_block):
        b = min(a + cfg.gptq_block, w.size(1))
        errors = torch.zeros(w.size(0), b - a, device=w.device)
        for j in range(a, b):
            column = w[:, j]
            q[:, j] = (column / scale).round().clamp(-limit, limit)
            err = (column - q[:, j] * scale) / upper[j, j]
            w[:, j:b] -= err[:, None] * upper[j, j:b][None, :]
            errors[:, j - a] = err
        w[:, b:] -= errors @ upper[a:b, b:]
    return q[:, back].to(torch.int8).cpu(), scale.half().cpu()


def quantise(cfg, model, calib):
    """int6 with GPTQ for the linear layers, int8 rows for the embeddings, fp16 for what is small."""
    packed, recipe = {}, {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in calib["hessians"]:
            packed[name + "|q"], packed[name + "|s"] = gptq(cfg, tensor, calib["hessians"][layer])
            recipe[name] = "gptq"
        elif tensor.ndim == 2 and tensor.numel() > 65_536:
            w = tensor.float()
            scale = row_scales(w, 127)
            packed[name + "|q"] = (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8).cpu()
            packed[name + "|s"] = scale.half().cpu()
            recipe[name] = "int8"
        else:
            packed[name] = tensor.half().cpu()
            recipe[name] = "half"
    return {"packed": packed, "recipe": recipe}


def dequantise(state, like):
    tensors = {}
    for name, target in like.items():
        if state["recipe"][name] == "half":
            tensors[name] = state["packed"][name].to(target.dtype)
        else:
            q, s = state["packed"][name + "|q"], state["packed"][name + "|s"]
            tensors[name] = (q.float() * s.float()[:, None]).to(target.dtype)
    return tensors


def encode_artifact(cfg, state):
    """A json header with names, kinds and shapes, then the tensors one after the other; all of it compressed."""
    entries, body = [], io.BytesIO()
    for key, tensor in state["packed"].items():
        raw = tensor.contiguous().numpy().tobytes()
        entries.append([key, "i1" if tensor.dtype == torch.int8 else "f2", list(tensor.shape), len(raw)])
        body.write(raw)
    head = json.dumps({"entries": entries, "recipe": state["recipe"]}).encode()
    plain = struct.pack("<I", len(head)) + head + body.getvalue()
    return zstandard.ZstdCompressor(level=cfg.zstd_level).compress(plain)


def decode_artifact(blob):
    plain = zstandard.ZstdDecompressor().decompress(blob)
    (length,) = struct.unpack_from("<I", plain)
    head = json.loads(plain[4 : 4 + length])
    packed, at = {}, 4 + length
    for key, kind, shape, size in head["entries"]:
        raw = plain[at : at + size]
        at += size
        dtype = np.int8 if kind == "i1" else np.float16
        packed[key] = torch.from_numpy(np.frombuffer(raw, dtype=dtype).copy()).reshape(shape)
    return {"packed": packed, "recipe": head["recipe"]}


def pack(cfg, env, model, trained):
    """Calibrates on the rest of the training stream, quantises, writes the artifact and prints the counted size."""
    deadline = trained["started"] + cfg.train_cap_s - 0.5 * cfg.reserve_s
    calib = gather_hessians(cfg, env, model, trained["stream"], deadline)
    calib_end = time.perf_counter() - trained["started"]
    say(env, f"pack: {calib['batches']} calibration batches, train+calibration {calib_end:.1f}s")
    if env["master"]:
        blob = encode_artifact(cfg, quantise(cfg, model, calib))
        Path(cfg.out).write_bytes(blob)
        model_bytes = len(blob)
        code_bytes = len(Path(__file__).read_bytes())
        total = model_bytes + code_bytes
        say(env, f"pack: model {model_bytes} bytes, code {code_bytes} bytes, total {total} bytes")
        if total > SIZE_LIMIT:
            raise RuntimeError(f"{total} bytes are over the limit of {SIZE_LIMIT}")
    if env["distributed"]:
        dist.barrier()
    return {"path": cfg.out}


def unpack(cfg, env, packed):
    """The model as it is evaluated: read back from the file."""
    model = build_model(cfg, env)
    state = decode_artifact(Path(packed["path"]).read_bytes())
    model.load_state_dict(dequantise(state, model.state_dict()))
    return model


# ------------------------------------------------------------------------------------------------ n-gram cache


def make_cache(cfg):
    """Per order: cells (rows of vocab counts that start every row_step cells) and how often each context was seen."""
    slots = 1 << cfg.slots_log2
    tables = {}
    for order in cfg.orders:
        tables[order] = {
            "cells": np.zeros(slots * cfg.row_step + cfg.vocab, dtype=np.uint16),
            "seen": np.zeros(slots, dtype=np.uint32),
        }
    return {"tables": tables, "slots": slots, "unigram": np.zeros(cfg.vocab, dtype=np.int64), "filled": 0}


def context_slots(cfg, cache, tokens, last, order):
    """Hash of the order-1 tokens that end at `last` (the target comes after them and is no part of it)."""
    h = np.full(last.shape, order * 0x51ED27, dtype=np.uint64)
    for k in range(order - 1):
        at = last - k
        token = np.where(at >= 0, tokens[np.maximum(at, 0)], 0).astype(np.uint64) + np.uint64(1)
        h = (h ^ token) * HASH_PRIMES[k]
        h ^= h >> np.uint64(29)
    return ((h >> np.uint64(17)) % np.uint64(cache["slots"])).astype(np.int64)


def row_view(cfg, cells):
    """All rows of a table without copying: row i is cells[i * row_step : i * row_step + vocab]."""
    return np.lib.stride_tricks.sliding_window_view(cells, cfg.vocab)[:: cfg.row_step]


def cache_lookup(cfg, cache, tokens, last):
    """For each position a distribution over the vocabulary, and how often its longest known context was seen.

    Backoff: each order's counts are smoothed by the distribution of the order below. A row is divided by its own sum
    (and not by `seen`: the rows overlap, so a row holds more than its context's counts)."""
    unigram = cache["unigram"] + 1.0
    probs = np.broadcast_to((unigram / unigram.sum()).astype(np.float32), (last.size, cfg.vocab))
    support = np.zeros(last.size, dtype=np.float32)
    for order in cfg.orders:
        table = cache["tables"][order]
        slot = context_slots(cfg, cache, tokens, last, order)
        seen = table["seen"][slot].astype(np.float32)
        rows = row_view(cfg, table["cells"])[slot].astype(np.float32)
        mass = rows.sum(axis=1, keepdims=True)
        mixed = (rows + cfg.backoff_mass * probs) / (mass + cfg.backoff_mass)
        probs = np.where((seen > 0)[:, None], mixed, probs)
        support = np.where(seen > 0, seen, support)
    return {"probs": probs, "support": support}


def cache_update(cfg, cache, tokens, start, stop):
    """Counts the targets tokens[start + 1 .. stop], all of which have been scored."""
    last = np.arange(start, stop)
    target = tokens[last + 1].astype(np.int64)
    cache["unigram"] += np.bincount(target, minlength=cfg.vocab)[: cfg.vocab]
    for order in cfg.orders:
        table = cache["tables"][order]
        slot = context_slots(cfg, cache, tokens, last, order)
        cell, count = np.unique(slot * cfg.row_step + target, return_counts=True)
        table["cells"][cell] = np.minimum(table["cells"][cell].astype(np.int64) + count, 65_535)
        cell, count = np.unique(slot, return_counts=True)
        table["seen"][cell] += count.astype(np.uint32)
    cache["filled"] = stop


def gate_weight(cfg, log_probs, support):
    """Weight of the cache: more where the model is unsure (its entropy) and where the context is well known."""
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    unsure = torch.sigmoid(cfg.gate_slope * (entropy - cfg.gate_centre))
    known = support / (support + cfg.gate_mass)
    return cfg.gate_max * unsure * known


def mix(cfg, log_probs, found, env):
    """log((1 - w) p_model + w p_cache) over the whole vocabulary."""
    cache_probs = torch.from_numpy(np.ascontiguousarray(found["probs"])).to(env["device"])
    support = torch.from_numpy(found["support"]).to(env["device"])
    weight = gate_weight(cfg, log_probs, support).clamp(0.0, 0.999)[:, None]
    return torch.log((1.0 - weight) * log_probs.exp() + weight * cache_probs)


# ------------------------------------------------------------------------------------------------ evaluation


def chunk_bounds(cfg, val):
    """The chunks of target indices: target j is tokens[j + 1], predicted from tokens[.. j]."""
    return [(a, min(a + cfg.chunk_tokens, val["targets"])) for a in range(0, val["targets"], cfg.chunk_tokens)]


def chunk_windows(cfg, start, stop):
    """Windows that score each target of a chunk once: (first input, first scored target, end)."""
    windows = []
    for first in range(start, stop, cfg.stride):
        end = min(first + cfg.stride, stop)
        windows.append((max(0, end - cfg.eval_seq_len), first, end))
    return windows


def share(env, items):
    """This rank's contiguous part of a list."""
    per = -(-len(items) // env["world"])
    return items[env["rank"] * per : (env["rank"] + 1) * per]


def window_batch(cfg, env, tokens, windows):
    """Inputs of a batch of windows, padded on the right, and where in it the scored positions are."""
    x = np.zeros((cfg.window_batch, cfg.eval_seq_len), dtype=np.int64)
    rows, cols, last = [], [], []
    for i, (begin, first, end) in enumerate(windows):
        x[i, : end - begin] = tokens[begin:end]
        rows.append(np.full(end - first, i))
        cols.append(np.arange(first - begin, end - begin))
        last.append(np.arange(first, end))
    device = env["device"]
    return {
        "x": torch.from_numpy(x).to(device),
        "rows": torch.from_numpy(np.concatenate(rows)).to(device),
        "cols": torch.from_numpy(np.concatenate(cols)).to(device),
        "last": np.concatenate(last),
    }


@torch.no_grad()
def score_chunk(cfg, env, features, model, cache, val, tables, start, stop):
    """Sums of this rank's share of a chunk; neither the weights nor the cache change here."""
    tokens = val["tokens"]
    sums = {"nll": 0.0, "model_nll": 0.0, "bytes": 0, "tokens": 0, "worst_sum": 0.0}
    windows = share(env, chunk_windows(cfg, start, stop))
    for at in range(0, len(windows), cfg.window_batch):
        batch = window_batch(cfg, env, tokens, windows[at : at + cfg.window_batch])
        last = batch["last"]
        target_np = tokens[last + 1].astype(np.int64)
        target = torch.from_numpy(target_np).to(env["device"])
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = features(batch["x"])
            logits = model.head(hidden[batch["rows"], batch["cols"]])
        log_probs = F.log_softmax(logits.float(), dim=-1)
        final = log_probs
        if cfg.cache:
            found = cache_lookup(cfg, cache, tokens, last)
            final = mix(cfg, log_probs, found, env)
            off = (final[:64].double().exp().sum(dim=-1) - 1.0).abs().max().item()
            sums["worst_sum"] = max(sums["worst_sum"], off)
        nll = -final.gather(1, target[:, None]).squeeze(1)
        sums["nll"] += nll.double().sum().item()
        sums["model_nll"] += -log_probs.gather(1, target[:, None]).double().sum().item()
        sums["bytes"] += int(count_bytes(tables, tokens[last].astype(np.int64), target_np).sum())
        sums["tokens"] += last.size
    return sums


def ttt_params(cfg, model):
    """The float32 weights of all but the first blocks; the embeddings stay as they are."""
    chosen = []
    for name, param in model.named_parameters():
        frozen = any(name.startswith(f"blocks.{i}.") for i in range(cfg.ttt_freeze_blocks))
        trainable = name.startswith("blocks.") and not frozen and param.dtype == torch.float32
        param.requires_grad_(trainable)
        if trainable:
            chosen.append(param)
    return chosen


def adapt(cfg, env, model, opt, params, val, start, stop):
    """SGD on a chunk that has been scored; every rank takes a part of each batch and the gradients are summed."""
    seq = cfg.eval_seq_len
    count = (stop - start) // seq
    group = cfg.ttt_batch * env["world"]
    model.train()
    for _ in range(cfg.ttt_epochs):
        for g in range(0, count, group):
            size = min(group, count - g)
            mine = [i for i in range(g, g + size) if (i - g) % env["world"] == env["rank"]]
            opt.zero_grad(set_to_none=False)
            if mine:
                rows = [val["tokens"][start + i * seq : start + (i + 1) * seq + 1].astype(np.int64) for i in mine]
                block = torch.from_numpy(np.stack(rows)).to(env["device"])
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = model(block[:, :-1], block[:, 1:])
                (loss * len(mine) / size).backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if env["distributed"]:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(params, cfg.ttt_clip)
            opt.step()
    model.eval()


def out_of_time(cfg, env, started):
    """Whether any rank has used up the evaluation's time (then adaptation stops, scoring goes on)."""
    return reduce_sum(env, float(time.perf_counter() - started > cfg.eval_cap_s))[0] > 0


def evaluate(cfg, env, model, val, tables, started):
    """Chunk after chunk: score with what is known so far, then count the chunk into the cache, then adapt to it."""
    model.eval()
    cache = make_cache(cfg)
    params = ttt_params(cfg, model)
    opt = torch.optim.SGD(params, lr=cfg.ttt_lr, momentum=cfg.ttt_momentum)
    features = torch.compile(model.features, dynamic=False)
    bounds = chunk_bounds(cfg, val)
    total = {"nll": 0.0, "model_nll": 0.0, "bytes": 0, "tokens": 0, "worst_sum": 0.0}
    adapting = cfg.ttt
    for index, (start, stop) in enumerate(bounds):
        sums = score_chunk(cfg, env, features, model, cache, val, tables, start, stop)
        for key in ("nll", "model_nll", "bytes", "tokens"):
            total[key] += sums[key]
        total["worst_sum"] = max(total["worst_sum"], sums["worst_sum"])
        if index + 1 == len(bounds):
            break
        if cfg.cache:
            cache_update(cfg, cache, val["tokens"], start, stop)
        if adapting and out_of_time(cfg, env, started):
            say(env, f"evaluate: adaptation stopped at chunk {index}")
            adapting = False
        if adapting:
            for group in opt.param_groups:
                group["lr"] = cfg.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * index / len(bounds)))
            adapt(cfg, env, model, opt, params, val, start, stop)
        if index % 50 == 0:
            spent = time.perf_counter() - started
            say(env, f"evaluate: chunk {index + 1}/{len(bounds)} time {spent:.1f}s")
    return total


def summarise(env, total):
    """Losses per token and per byte over all ranks."""
    keys = ("nll", "model_nll", "bytes", "tokens")
    nll, model_nll, byte_count, token_count = reduce_sum(env, *(float(total[key]) for key in keys))
    return {
        "loss": nll / token_count,
        "bpb": nll / math.log(2.0) / byte_count,
        "model_bpb": model_nll / math.log(2.0) / byte_count,
        "bytes": int(byte_count),
        "tokens": int(token_count),
    }


@torch.no_grad()
def quick_bpb(cfg, env, model, val, tables):
    """Non-overlapping windows, no cache, no adaptation: a diagnostic that is printed and used for nothing."""
    seq = cfg.eval_seq_len
    model.eval()
    count = val["targets"] // seq
    total = {"nll": 0.0, "model_nll": 0.0, "bytes": 0, "tokens": 0}
    mine = share(env, list(range(count)))
    for at in range(0, len(mine), cfg.window_batch):
        ids = mine[at : at + cfg.window_batch]
        block = np.stack([val["tokens"][i * seq : (i + 1) * seq + 1] for i in ids]).astype(np.int64)
        x, y = block[:, :-1], block[:, 1:]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            xs, ys = torch.from_numpy(x.copy()).to(env["device"]), torch.from_numpy(y.copy()).to(env["device"])
            loss = model(xs, ys)
        total["nll"] += loss.item() * y.size
        total["model_nll"] += loss.item() * y.size
        total["bytes"] += int(count_bytes(tables, x, y).sum())
        total["tokens"] += y.size
    return summarise(env, total)


def run_evaluation(cfg, env, packed):
    """The evaluation stage: reads the artifact back, prints a round-trip diagnostic, then makes the score."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    model = unpack(cfg, env, packed)
    val = load_validation(cfg)
    tables = byte_tables(cfg)
    say(env, f"evaluate: {val['targets']} targets from {len(val['files'])} shards")
    rough = quick_bpb(cfg, env, model, val, tables)
    say(env, f"roundtrip val_loss {rough['loss']:.4f} val_bpb {rough['bpb']:.4f}")
    total = evaluate(cfg, env, model, val, tables, started)
    result = summarise(env, total)
    if result["tokens"] != val["targets"]:
        raise RuntimeError(f"scored {result['tokens']} of {val['targets']} targets")
    torch.cuda.synchronize()
    result["seconds"] = time.perf_counter() - started
    say(env, f"evaluate: largest |sum - 1| on rank 0: {total['worst_sum']:.2e}")
    say(env, f"evaluate: model alone val_bpb {result['model_bpb']:.6f}")
    return result


def report(cfg, env, trained, result):
    say(env, f"train_seconds {trained['seconds']:.1f} eval_seconds {result['seconds']:.1f}")
    say(env, f"scored tokens {result['tokens']} bytes {result['bytes']}")
    say(env, f"final val_loss {result['loss']:.8f} val_bpb {result['bpb']:.8f}")


def main(argv=None):
    cfg = build_config(argv)
    if cfg.stage == "prepare":
        prepare_shards(cfg)
        return
    env = setup_env(cfg)
    say(env, f"python {sys.version.split()[0]} torch {torch.__version__}")
    say(env, json.dumps(vars(cfg), sort_keys=True))
    model = build_model(cfg, env)
    trained = train(cfg, env, model)
    packed = pack(cfg, env, model, trained)
    del model
    torch.cuda.empty_cache()
    result = run_evaluation(cfg, env, packed)
    report(cfg, env, trained, result)
    if env["distributed"]:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
