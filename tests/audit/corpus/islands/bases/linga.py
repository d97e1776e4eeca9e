"""
int5/int6 QAT in a Hadamard basis + GPTQ, bit planes under lzma, and a small score-first adapter at test time.

Forked from modded-nanogpt (NorMuon, value embeddings, smear gate, sparse attention gate, skip connections,
batch size schedule) and cut down to what fits 16 MB and a 1024-token vocabulary.

  training     rows of 2048 tokens, attention stays in its document, the number of rows grows twice;
               the last part runs with fake-quantised weights (attention int6, MLP int5, rotated rows)
  artifact     EMA weights -> GPTQ on training batches (inside the training clock) -> sign/magnitude bit planes -> xz
  evaluation   the artifact is read back; the validation stream goes by in chunks of 131,072 targets:
                 1. score the chunk with sliding windows, everything frozen
                 2. let the norm gains, a hidden-state vector, a logit bias and a temperature take a few AdamW steps
                    on it, add it to the n-gram counts, move the mixing weights of the three experts
               The one number at the end is the sum over all targets.

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
"""
import os
import sys
with open(sys.argv[0]) as f:
    code = f.read() # read the code of this file ASAP, for logging and for the byte count
import copy
import glob
import itertools
import json
import lzma
import math
import random
import struct
import subprocess
import time
import uuid
from dataclasses import dataclass, fields
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

torch._dynamo.config.recompile_limit = 64
torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.allow_tf32 = True
flex_attention = torch.compile(flex_attention, dynamic=False)

# -----------------------------------------------------------------------------
# settings

BOS_ID = 1
EXPERTS = ("tuned", "plain", "ngram")

def env(name: str, default):
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() in ("1", "true", "yes", "on")
    return type(default)(raw)

@dataclass
class Hyperparameters:
    # data
    data_path: str = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id: str = env("RUN_ID", str(uuid.uuid4()))
    seed: int = env("SEED", 1337)
    # model
    vocab_size: int = env("VOCAB_SIZE", 1024)
    num_layers: int = env("NUM_LAYERS", 10)
    model_dim: int = env("MODEL_DIM", 512)
    num_heads: int = env("NUM_HEADS", 8)
    num_kv_heads: int = env("NUM_KV_HEADS", 4)
    head_dim: int = env("HEAD_DIM", 64)
    mlp_mult: int = env("MLP_MULT", 3)
    seq_len: int = env("SEQ_LEN", 2048)
    short_window: int = env("SHORT_WINDOW", 768)
    logit_softcap: float = env("LOGIT_SOFTCAP", 30.0)
    attn_scale: float = env("ATTN_SCALE", 0.15)
    rope_base: float = env("ROPE_BASE", 10000.0)
    rope_dims: int = env("ROPE_DIMS", 32)
    bigram_buckets: int = env("BIGRAM_BUCKETS", 4096)
    bigram_dim: int = env("BIGRAM_DIM", 96)
    gate_in: int = env("GATE_IN", 12)
    # training
    max_wallclock_s: float = env("MAX_WALLCLOCK_SECONDS", 600.0)
    quant_reserve_s: float = env("QUANT_RESERVE_SECONDS", 18.0)
    max_steps: int = env("MAX_STEPS", 20000)
    cooldown_frac: float = env("COOLDOWN_FRAC", 0.48)
    final_lr_scale: float = env("FINAL_LR_SCALE", 0.04)
    muon_lr: float = env("MUON_LR", 0.025)
    muon_wd: float = env("MUON_WD", 0.08)
    muon_beta2: float = env("MUON_BETA2", 0.95)
    embed_lr: float = env("EMBED_LR", 0.03)
    scalar_lr: float = env("SCALAR_LR", 0.02)
    adam_wd: float = env("ADAM_WD", 0.01)
    grad_clip: float = env("GRAD_CLIP", 0.4)
    val_loss_every: int = env("VAL_LOSS_EVERY", 2500)
    log_every: int = env("LOG_EVERY", 200)
    warmup_runs: int = env("WARMUP_RUNS", 4)
    # averaging and quantisation
    ema_decay: float = env("EMA_DECAY", 0.997)
    ema_start_frac: float = env("EMA_START_FRAC", 0.4)
    qat_start_frac: float = env("QAT_START_FRAC", 0.72)
    attn_bits: int = env("ATTN_BITS", 6)
    mlp_bits: int = env("MLP_BITS", 5)
    embed_bits: int = env("EMBED_BITS", 8)
    rot_block: int = env("ROT_BLOCK", 512)
    rot_seed: int = env("ROT_SEED", 20251)
    gptq_damp: float = env("GPTQ_DAMP", 0.01)
    calib_batches: int = env("CALIB_BATCHES", 12)
    calib_rows: int = env("CALIB_ROWS", 8)
    artifact: str = env("ARTIFACT", "final_model.int56.xz")
    size_limit: int = 16_000_000
    # evaluation
    eval_stride: int = env("EVAL_STRIDE", 64)
    eval_rows: int = env("EVAL_ROWS", 64)
    eval_budget_s: float = env("EVAL_BUDGET_SECONDS", 600.0)
    adapt_until_s: float = env("ADAPT_UNTIL_SECONDS", 500.0)
    ttt_chunk: int = env("TTT_CHUNK", 131072)
    ttt_rows: int = env("TTT_ROWS", 8)
    ttt_epochs: int = env("TTT_EPOCHS", 2)
    ttt_lr_gain: float = env("TTT_LR_GAIN", 1e-3)
    ttt_lr_hidden: float = env("TTT_LR_HIDDEN", 2e-3)
    ttt_lr_bias: float = env("TTT_LR_BIAS", 4e-3)
    ttt_lr_temp: float = env("TTT_LR_TEMP", 1e-3)
    ttt_pull: float = env("TTT_PULL", 2e-3)
    mix_rate: float = env("MIX_RATE", 0.15)
    ngram_rows: int = env("NGRAM_ROWS", 65536)
    ngram_alpha: float = env("NGRAM_ALPHA", 12.0)
    diag_sliding: bool = env("DIAG_SLIDING", False)

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

args = Hyperparameters()

# (until this share of the training clock, rows of seq_len per rank and micro step)
BATCH_STAGES = ((0.06, 8), (0.16, 16), (1.01, 24))

def rows_for(frac: float) -> int:
    return next(rows for until, rows in BATCH_STAGES if frac < until)

# -----------------------------------------------------------------------------
# distributed: torchrun --standalone --nproc_per_node=8 train_gpt.py

rank = int(os.environ.get("RANK", "0"))
world_size = int(os.environ.get("WORLD_SIZE", "1"))
assert 8 % world_size == 0, "world_size must be a divisor of 8"
grad_accum_steps = 8 // world_size
assert torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
torch.cuda.set_device(device)
if "RANK" in os.environ:
    dist.init_process_group(backend="nccl", device_id=device)
    dist.barrier()
master_process = rank == 0

logfile = None
if master_process:
    os.makedirs("logs", exist_ok=True)
    logfile = f"logs/{args.run_id}.txt"
    print(logfile)

def print0(s: str, console: bool = False):
    if master_process:
        with open(logfile, "a") as f:
            if console:
                print(s, flush=True)
            print(s, file=f)

def barrier():
    torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()

def all_sum(t: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return t

def all_mean(t: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.AVG)
    return t

def agree_max(x: float) -> float:
    # one number for all ranks, so that schedules and stops are taken by everybody at the same step
    if not dist.is_initialized():
        return x
    t = torch.tensor(x, dtype=torch.float64, device=device)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return float(t.item())

class Stopwatch:
    """Training clock in seconds; stands still while paused (validation, as in the baseline)."""

    def __init__(self):
        self.total, self.since = 0.0, None

    def start(self):
        barrier()
        self.since = time.perf_counter()

    def pause(self) -> float:
        torch.cuda.synchronize()
        self.total += time.perf_counter() - self.since
        self.since = None
        return self.total

    def read(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.total + running

# -----------------------------------------------------------------------------
# NorMuon: Muon with Polar Express and a second moment per output row

polar_express_coeffs = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]

@torch.compile(dynamic=False, fullgraph=True)
def polar_express(G: Tensor) -> Tensor:
    X = G.bfloat16()
    if G.size(-2) > G.size(-1):
        X = X.mT
    # spectral norm at most 1, with a small safety margin
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * (1 + 2e-2) + 1e-6)
    for a, b, c in polar_express_coeffs:
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    if G.size(-2) > G.size(-1):
        X = X.mT
    return X

class NorMuon(torch.optim.Optimizer):
    """
    Matrices of one shape are stacked, their gradients reduce-scattered, every rank orthogonalises its share,
    and the finished updates are gathered again. Masters stay fp32 and are the same everywhere.
    """

    def __init__(self, params, lr=0.02, weight_decay=0.0, momentum=0.95, beta2=0.95):
        params = list(params)
        shapes = sorted({tuple(p.shape) for p in params})
        groups = [dict(params=[p for p in params if tuple(p.shape) == s]) for s in shapes]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            shape = params[0].shape
            slots = len(params) + (-len(params)) % world_size
            per_rank = slots // world_size
            stacked = torch.zeros(slots, *shape, dtype=torch.bfloat16, device=device)
            for i, p in enumerate(params):
                stacked[i].copy_(p.grad)
            if dist.is_initialized():
                g = torch.empty(per_rank, *shape, dtype=torch.bfloat16, device=device)
                dist.reduce_scatter_tensor(g, stacked, op=dist.ReduceOp.AVG)
            else:
                g = stacked
            g = g.float()

            state = self.state[params[0]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(g)
                state["row_moment"] = torch.zeros_like(g[..., :1])
            buf, rows = state["momentum_buffer"], state["row_moment"]
            buf.lerp_(g, 1 - group["momentum"])
            v = polar_express(g.lerp(buf, group["momentum"])).float()

            # NorMuon: scale rows by their own second moment, but keep the norm of the whole update
            before = v.norm(dim=(-2, -1), keepdim=True)
            rows.lerp_(v.square().mean(dim=-1, keepdim=True), 1 - group["beta2"])
            v = v * rows.clamp_min(1e-10).rsqrt()
            v = v * (before / v.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
            v = v * max(1.0, shape[-2] / shape[-1]) ** 0.5
            v = v.bfloat16().contiguous()

            if dist.is_initialized():
                dist.all_gather_into_tensor(stacked, v)
            else:
                stacked = v
            lr, wd = group["lr"], group["weight_decay"]
            for i, p in enumerate(params):
                u = stacked[i].float()
                # cautious weight decay: only where the update agrees in sign with the weight
                p.sub_(p * (u * p > 0), alpha=lr * wd)
                p.sub_(u, alpha=lr)

# -----------------------------------------------------------------------------
# quantisation grid: symmetric ints per output row, in a basis rotated by signs and a block Hadamard

def hadamard(n: int) -> Tensor:
    assert n & (n - 1) == 0
    H = torch.ones(1, 1)
    while H.size(0) < n:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)], dim=0)
    return H / math.sqrt(n)

def make_rotation(block: int, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (block,), generator=gen).float() * 2 - 1
    return signs[:, None] * hadamard(block)

def rotate(W: Tensor, R: Tensor) -> Tensor:
    n = R.size(0)
    return (W.reshape(W.size(0), -1, n) @ R).reshape(W.shape)

def unrotate(W: Tensor, R: Tensor) -> Tensor:
    n = R.size(0)
    return (W.reshape(W.size(0), -1, n) @ R.T).reshape(W.shape)

def qmax_of(bits: int) -> int:
    return 2 ** (bits - 1) - 1

def fake_quant_rows(W: Tensor, bits: int) -> Tensor:
    top = qmax_of(bits)
    scale = W.abs().amax(dim=1, keepdim=True).clamp_min(1e-6) / top
    return (W / scale).round().clamp(-top, top) * scale

class QLinear(nn.Module):
    """Linear layer without bias whose weight can be seen through the quantiser (straight-through)."""

    def __init__(self, d_in: int, d_out: int, bits: int, R: Tensor, zero_init: bool = False):
        super().__init__()
        self.bits, self.qat = bits, False
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.register_buffer("R", R, persistent=False)
        with torch.no_grad():
            if zero_init:
                self.weight.zero_()
            else:
                bound = 0.5 * 3 ** 0.5 * d_in ** -0.5
                self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.qat:
            with torch.no_grad():
                seen = unrotate(fake_quant_rows(rotate(w, self.R), self.bits), self.R)
            w = w + (seen - w).detach()
        return F.linear(x, w.to(x.dtype))

# -----------------------------------------------------------------------------
# model

def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))

def document_masks(ids: Tensor, short: int) -> tuple[BlockMask, BlockMask]:
    """Causal masks that stay inside a document: the whole row, and a short sliding window."""
    B, T = ids.shape
    docs = (ids == BOS_ID).cumsum(dim=1)

    def full(b, h, q, kv):
        return (q >= kv) & (docs[b, q] == docs[b, kv])

    def near(b, h, q, kv):
        return (q >= kv) & (q - kv < short) & (docs[b, q] == docs[b, kv])

    return tuple(create_block_mask(m, B, None, T, T, device=ids.device, _compile=True) for m in (full, near))

class Rotary(nn.Module):
    def __init__(self, max_len: int, dims: int, base: float):
        super().__init__()
        inv = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        theta = torch.outer(torch.arange(max_len, dtype=torch.float32), inv)
        self.dims = dims
        self.register_buffer("cos", theta.cos(), persistent=False)
        self.register_buffer("sin", theta.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # x: B T H D; only the first `dims` of D turn, the others carry no position
        T = x.size(1)
        cos = self.cos[None, :T, None, :].to(x.dtype)
        sin = self.sin[None, :T, None, :].to(x.dtype)
        turn, rest = x[..., : self.dims], x[..., self.dims :]
        x1, x2 = turn.chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)

class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, R: Tensor):
        super().__init__()
        self.nh, self.nkv, self.hd = args.num_heads, args.num_kv_heads, args.head_dim
        self.scale = args.attn_scale
        self.qkv = QLinear(args.model_dim, (self.nh + 2 * self.nkv) * self.hd, args.attn_bits, R)
        self.proj = QLinear(self.nh * self.hd, args.model_dim, args.attn_bits, R, zero_init=True)
        self.rotary = Rotary(args.seq_len, args.rope_dims, args.rope_base)
        self.v_mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        # sparse gate of modded-nanogpt: lets a head say nothing
        self.gate_in = args.gate_in
        self.gate_w = nn.Parameter(torch.zeros(self.nh, args.gate_in))

    def forward(self, x: Tensor, ve: Tensor | None, mask: BlockMask) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split([self.nh * self.hd, self.nkv * self.hd, self.nkv * self.hd], dim=-1)
        q = self.rotary(norm(q.view(B, T, self.nh, self.hd)))
        k = self.rotary(norm(k.view(B, T, self.nkv, self.hd)))
        v = v.view(B, T, self.nkv, self.hd)
        if ve is not None:
            v = self.v_mix[0] * v + self.v_mix[1] * ve.view_as(v)
        y = flex_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            block_mask=mask, scale=self.scale, enable_gqa=True,
        ).transpose(1, 2)
        gate = torch.sigmoid(F.linear(x[..., : self.gate_in], self.gate_w.to(x.dtype)))
        y = y * (2 * gate).unsqueeze(-1)
        return self.proj(y.reshape(B, T, self.nh * self.hd))

class MLP(nn.Module):
    def __init__(self, args: Hyperparameters, R: Tensor):
        super().__init__()
        hidden = args.mlp_mult * args.model_dim
        self.fc = QLinear(args.model_dim, hidden, args.mlp_bits, R)
        self.proj = QLinear(hidden, args.model_dim, args.mlp_bits, R, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())

class Block(nn.Module):
    def __init__(self, args: Hyperparameters, R: Tensor):
        super().__init__()
        self.attn = CausalSelfAttention(args, R)
        self.mlp = MLP(args, R)
        self.attn_gain = nn.Parameter(torch.ones(args.model_dim))
        self.mlp_gain = nn.Parameter(torch.ones(args.model_dim))
        self.resid_mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, mask: BlockMask) -> Tensor:
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        x = x + self.attn(norm(x) * self.attn_gain.to(x.dtype), ve, mask)
        x = x + self.mlp(norm(x) * self.mlp_gain.to(x.dtype))
        return x

class BigramFeature(nn.Module):
    """Hashed embedding of (previous token, this token), an input feature like any other embedding."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.buckets = args.bigram_buckets
        self.table = nn.Embedding(self.buckets, args.bigram_dim)
        nn.init.normal_(self.table.weight, std=0.02)
        self.up = nn.Parameter(torch.zeros(args.model_dim, args.bigram_dim))

    def forward(self, ids: Tensor) -> Tensor:
        prev, cur = ids[:, :-1], ids[:, 1:]
        h = (prev * 36313 + cur * 27191) % (self.buckets - 1)
        # a document's first token has no left neighbour, neither has a row's first
        h = torch.where(cur == BOS_ID, self.buckets - 1, h)
        h = F.pad(h, (1, 0), value=self.buckets - 1)
        e = self.table(h).bfloat16()
        return F.linear(e, self.up.to(e.dtype))

class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.args = args
        R = make_rotation(args.rot_block, args.rot_seed)
        self.embed = nn.Embedding(args.vocab_size, args.model_dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.bigram = BigramFeature(args)
        # two value embeddings, shared by an early and a late layer each
        self.value_embeds = nn.ModuleList([nn.Embedding(args.vocab_size, args.kv_dim) for _ in range(2)])
        for ve in self.value_embeds:
            nn.init.normal_(ve.weight, std=0.02)
        n = args.num_layers
        self.ve_of_layer = {1: 0, 2: 1, n - 2: 0, n - 1: 1}
        self.blocks = nn.ModuleList([Block(args, R) for _ in range(n)])
        self.long_layers = {0, n // 2, n - 1} | set(range(3, n, 3))
        self.num_skips = n // 2
        self.skip_w = nn.Parameter(torch.full((self.num_skips,), 0.5))
        self.smear_w = nn.Parameter(torch.zeros(1, args.gate_in))
        self.smear_scale = nn.Parameter(torch.tensor([0.1]))
        self.final_gain = nn.Parameter(torch.ones(args.model_dim))

    def set_qat(self, on: bool):
        for m in self.modules():
            if isinstance(m, QLinear):
                m.qat = on

    def smear(self, x: Tensor, ids: Tensor) -> Tensor:
        # a bit of the previous token's embedding; nothing comes over a document's start
        gate = torch.sigmoid(F.linear(x[:, 1:, : self.args.gate_in], self.smear_w.to(x.dtype)))
        gate = gate * self.smear_scale.to(x.dtype)
        gate = gate * (ids[:, 1:] != BOS_ID).unsqueeze(-1).to(x.dtype)
        return torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)

    def hidden(self, ids: Tensor, masks: tuple[BlockMask, BlockMask]) -> Tensor:
        x = self.embed(ids).bfloat16()
        x = self.smear(x, ids) + self.bigram(ids)
        x = x0 = norm(x)
        ves = [ve(ids).bfloat16() for ve in self.value_embeds]
        skips = []
        n = len(self.blocks)
        for i, block in enumerate(self.blocks):
            if i >= n - self.num_skips and skips:
                x = x + self.skip_w[n - 1 - i] * skips.pop()
            ve = ves[self.ve_of_layer[i]] if i in self.ve_of_layer else None
            x = block(x, x0, ve, masks[0] if i in self.long_layers else masks[1])
            if i < self.num_skips:
                skips.append(x)
        return norm(x) * self.final_gain.to(x.dtype)

    def head(self, h: Tensor) -> Tensor:
        logits = F.linear(h, self.embed.weight.to(h.dtype)).float()
        cap = self.args.logit_softcap
        return cap * torch.tanh(logits / cap)

    def forward(self, ids: Tensor, targets: Tensor, masks: tuple[BlockMask, BlockMask]) -> Tensor:
        logits = self.head(self.hidden(ids, masks))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

# -----------------------------------------------------------------------------
# Distributed data generator

def _load_data_shard(file: Path) -> Tensor:
    header = torch.from_file(str(file), False, 256, dtype=torch.int32) # header is 256 int32
    assert header[0] == 20240520, "magic number mismatch in the data .bin file"
    assert header[1] == 1, "unsupported version"
    num_tokens = int(header[2]) # number of tokens (claimed)
    with file.open("rb", buffering=0) as f:
        tokens = torch.empty(num_tokens, dtype=torch.uint16) # avoid bytes->array copy by @YouJiacheng
        f.seek(256 * 4)
        nbytes = f.readinto(tokens.numpy())
        assert nbytes == 2 * num_tokens, "number of tokens read does not match header"
    return tokens

def distributed_data_generator(filename_pattern: str, rows: int, seq_len: int):
    """
    Endless (inputs, targets) of shape (rows, seq_len) for this rank. The number of rows may be changed while it runs:
    loader.send(new_rows) gives the next batch in the new size.
    """
    files = [Path(f) for f in sorted(glob.glob(filename_pattern))]
    if not files:
        raise FileNotFoundError(f"no shards match {filename_pattern}")
    file_iter = itertools.cycle(files)
    tokens, pos = _load_data_shard(next(file_iter)), 0
    while True:
        span = world_size * rows * seq_len
        if pos + span + 1 > len(tokens):
            tokens, pos = _load_data_shard(next(file_iter)), 0
        start = pos + rank * rows * seq_len
        buf = tokens[start : start + rows * seq_len + 1].to(torch.int32)
        inputs = buf[:-1].view(rows, seq_len).to(device=device, dtype=torch.int64, non_blocking=True)
        targets = buf[1:].view(rows, seq_len).to(device=device, dtype=torch.int64, non_blocking=True)
        pos += span
        new_rows = yield inputs, targets
        if new_rows is not None:
            rows = new_rows

def load_val_stream(pattern: str) -> Tensor:
    """All validation shards, one after the other, on the GPU."""
    files = [Path(f) for f in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no validation shards match {pattern}")
    parts = [_load_data_shard(f).to(torch.int32) for f in files]
    return torch.cat(parts).to(device)

# -----------------------------------------------------------------------------
# bytes per token

class ByteTables:
    """
    UTF-8 bytes of the original text that a token stands for. Control tokens stand for none, a byte-fallback token for one.
    The leading-space mark is a space, except behind a boundary token, where SentencePiece's dummy prefix put it.
    """

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int):
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros(size, dtype=np.int16)
        space = np.zeros(size, dtype=np.bool_)
        boundary = np.ones(size, dtype=np.bool_)
        for t in range(int(sp.vocab_size())):
            if sp.is_control(t) or sp.is_unknown(t) or sp.is_unused(t):
                continue
            boundary[t] = False
            if sp.is_byte(t):
                base[t] = 1
                continue
            piece = sp.id_to_piece(t)
            if piece.startswith("\u2581"):
                space[t] = True
                piece = piece[1:]
            base[t] = len(piece.encode("utf-8"))
        self.base = torch.from_numpy(base).to(device)
        self.space = torch.from_numpy(space).to(device)
        self.boundary = torch.from_numpy(boundary).to(device)

    def count(self, prev: Tensor, cur: Tensor) -> Tensor:
        n = self.base[cur].to(torch.int64)
        n += (self.space[cur] & ~self.boundary[prev]).to(torch.int64)
        return n

# -----------------------------------------------------------------------------
# windows over the validation stream

def gather_windows(stream: Tensor, first: Tensor, end: Tensor, L: int):
    """
    One row for each block of targets [first, end), at most L of them, with as much context to their left as L allows.
    Returns inputs, targets and which positions belong to the block. first == end == 1 gives an empty row.
    """
    T = stream.numel()
    begin = (end - 1 - L).clamp_min(0)
    pos = begin[:, None] + torch.arange(L, device=stream.device)[None, :]
    live = pos < (end - 1)[:, None]
    x = torch.where(live, stream[pos.clamp_max(T - 1)], 0)
    y = torch.where(live, stream[(pos + 1).clamp_max(T - 1)], 0)
    own = live & (pos + 1 >= first[:, None])
    return x.to(torch.int64), y.to(torch.int64), own

def cut_blocks(lo: int, hi: int, width: int) -> list[tuple[int, int]]:
    return [(a, min(a + width, hi)) for a in range(lo, hi, width)]

def deal(blocks: list[tuple[int, int]], rows: int):
    """This rank's blocks in batches of exactly `rows` (filled up with empty ones); as many batches on every rank."""
    rounds = -(-len(blocks) // (rows * world_size))
    blocks = blocks + [(1, 1)] * (rounds * rows * world_size - len(blocks))
    for r in range(rounds):
        at = (r * world_size + rank) * rows
        part = torch.tensor(blocks[at : at + rows], dtype=torch.int64, device=device)
        yield part[:, 0], part[:, 1]

@torch.no_grad()
def plain_validation(hidden, head, stream: Tensor, tables: ByteTables, stride: int, rows: int):
    """Loss and bpb of a model that does not change, every target once."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for first, end in deal(cut_blocks(1, stream.numel(), stride), rows):
        x, y, own = gather_windows(stream, first, end, args.seq_len)
        h = hidden(x, document_masks(x, args.short_window))[own]
        nll = F.cross_entropy(head(h), y[own], reduction="none")
        sums[0] += nll.double().sum()
        sums[1] += own.sum()
        sums[2] += tables.count(x[own], y[own]).sum()
    all_sum(sums)
    loss, ntok, nbytes = sums.tolist()
    assert int(ntok) == stream.numel() - 1
    return loss / ntok, loss / math.log(2) / nbytes

# -----------------------------------------------------------------------------
# averaging

class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.live = [p for p in model.parameters()]
        self.shadow = None

    @torch.no_grad()
    def update(self):
        if self.shadow is None:
            self.shadow = [p.detach().clone() for p in self.live]
            return
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.live], 1 - self.decay)

    @torch.no_grad()
    def copy_to_model(self):
        if self.shadow is not None:
            torch._foreach_copy_(self.live, self.shadow)

# -----------------------------------------------------------------------------
# GPTQ in the rotated basis

@torch.no_grad()
def collect_hessians(model: GPT, loader, batches: int, rows: int) -> dict[str, Tensor]:
    """X^T X of the inputs of every QLinear, over training batches of all ranks."""
    stats, hooks = {}, []
    for name, m in model.named_modules():
        if not isinstance(m, QLinear):
            continue
        d = m.weight.size(1)
        stats[name] = torch.zeros(d, d, dtype=torch.float32, device=device)

        def note(mod, inputs, output, name=name, d=d):
            x = inputs[0].detach().reshape(-1, d).float()
            stats[name].addmm_(x.T, x)

        hooks.append(m.register_forward_hook(note))
    for _ in range(batches):
        x, _ = loader.send(rows)
        model.hidden(x, document_masks(x, args.short_window))
    for hook in hooks:
        hook.remove()
    for H in stats.values():
        all_sum(H)
    return stats

def choose_scales(W: Tensor, weight: Tensor, bits: int) -> Tensor:
    """Per row the clip that loses least, errors weighted by the Hessian's diagonal. fp16 as stored."""
    top = qmax_of(bits)
    amax = W.abs().amax(dim=1).clamp_min(1e-6)
    best_err = torch.full_like(amax, float("inf"))
    best = (amax / top).half()
    for clip in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65):
        s = (clip * amax / top).half()
        s32 = s.float().clamp_min(1e-7)[:, None]
        err = (((W / s32).round().clamp(-top, top) * s32 - W).square() * weight).sum(dim=1)
        take = err < best_err
        best = torch.where(take, s, best)
        best_err = torch.where(take, err, best_err)
    return best

def gptq(W: Tensor, H: Tensor, bits: int, damp: float, block: int = 128):
    """Ints and fp16 scales of one matrix, column by column with error feedback."""
    top, n = qmax_of(bits), W.size(1)
    W, H = W.clone(), H.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    scales = choose_scales(W, H.diagonal()[None, :], bits)
    s = scales.float().clamp_min(1e-7)
    H.diagonal().add_(damp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.zeros_like(W)
    for i1 in range(0, n, block):
        i2 = min(i1 + block, n)
        Wb, Ub = W[:, i1:i2].clone(), U[i1:i2, i1:i2]
        Eb = torch.zeros_like(Wb)
        for j in range(i2 - i1):
            q = (Wb[:, j] / s).round().clamp(-top, top)
            Q[:, i1 + j] = q
            e = (Wb[:, j] - q * s) / Ub[j, j]
            Wb[:, j:] -= e[:, None] * Ub[j, j:][None, :]
            Eb[:, j] = e
        W[:, i2:] -= Eb @ U[i1:i2, i2:]
    return Q.to(torch.int8), scales

@torch.no_grad()
def quantise_linears(model: GPT, hessians: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Matrices dealt to the ranks in turn, results broadcast: name -> (ints, scales, bits)."""
    out = {}
    mods = dict(model.named_modules())
    for i, name in enumerate(hessians):
        m = mods[name]
        if i % world_size == rank:
            H = rotate(rotate(hessians[name], m.R).T, m.R).T
            q, s = gptq(rotate(m.weight.float(), m.R), H, m.bits, args.gptq_damp)
        else:
            q = torch.empty_like(m.weight, dtype=torch.int8)
            s = torch.empty(m.weight.size(0), dtype=torch.float16, device=device)
        out[name + ".weight"] = (q, s, m.bits)
    if dist.is_initialized():
        for i, (q, s, _) in enumerate(out.values()):
            dist.broadcast(q, src=i % world_size)
            dist.broadcast(s, src=i % world_size)
    return out

def quantisation_report(model: GPT, ints: dict[str, tuple[Tensor, Tensor, int]]) -> list[str]:
    """Relative error of each kind of matrix in the rotated basis, worst layer and mean. For the log."""
    kinds = {}
    for name, (q, s, bits) in ints.items():
        m = model.get_submodule(name.removesuffix(".weight"))
        W = rotate(m.weight.detach().float(), m.R)
        err = (q.float() * s.float()[:, None] - W).square().mean() / W.square().mean().clamp_min(1e-12)
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        kinds.setdefault((kind, bits), []).append(err.sqrt().item())
    return [
        f"quant {kind} int{bits}: mean rel. error {sum(errs) / len(errs):.4f}, worst {max(errs):.4f}"
        for (kind, bits), errs in kinds.items()
    ]

def round_rows(W: Tensor, bits: int):
    top = qmax_of(bits)
    s = (W.abs().amax(dim=1).clamp_min(1e-6) / top).half()
    return (W / s.float().clamp_min(1e-7)[:, None]).round().clamp(-top, top).to(torch.int8), s

# -----------------------------------------------------------------------------
# artifact: bit planes (sign, then magnitude from the top) under one lzma stream

def pack_planes(q: np.ndarray, bits: int) -> bytes:
    flat = q.reshape(-1).astype(np.int16)
    planes = [flat < 0]
    mag = np.abs(flat)
    planes += [(mag >> b) & 1 for b in reversed(range(bits - 1))]
    return b"".join(np.packbits(p.astype(np.uint8)).tobytes() for p in planes)

def unpack_planes(buf: bytes, count: int, bits: int) -> np.ndarray:
    n = (count + 7) // 8
    bitrows = [np.unpackbits(np.frombuffer(buf, np.uint8, n, i * n))[:count] for i in range(bits)]
    mag = np.zeros(count, dtype=np.int16)
    for row in bitrows[1:]:
        mag = (mag << 1) | row
    return np.where(bitrows[0] == 1, -mag, mag).astype(np.int16)

LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 25, "lc": 0, "lp": 0, "pb": 0}]

def write_artifact(path: str, model: GPT, ints: dict[str, tuple[Tensor, Tensor, int]]) -> int:
    entries, chunks = [], []

    def add(data: bytes):
        chunks.append(data)
        return len(data)

    for name, p in model.named_parameters():
        entry = dict(name=name, shape=list(p.shape))
        if name in ints:
            q, s, bits = ints[name]
            entry.update(kind="rot", bits=bits, q=add(pack_planes(q.cpu().numpy(), bits)), s=add(s.cpu().numpy().tobytes()))
        elif p.ndim == 2 and p.numel() >= 65536:
            q, s = round_rows(p.detach().float(), args.embed_bits)
            entry.update(kind="row", bits=args.embed_bits)
            entry.update(q=add(pack_planes(q.cpu().numpy(), args.embed_bits)), s=add(s.cpu().numpy().tobytes()))
        else:
            entry.update(kind="half", q=add(p.detach().half().cpu().numpy().tobytes()), s=0)
        entries.append(entry)
    head = json.dumps(entries, separators=(",", ":")).encode()
    raw = struct.pack("<I", len(head)) + head + b"".join(chunks)
    packed = lzma.compress(raw, format=lzma.FORMAT_XZ, filters=LZMA_FILTERS)
    with open(path, "wb") as f:
        f.write(packed)
    return len(raw)

def read_artifact(path: str) -> dict[str, Tensor]:
    with open(path, "rb") as f:
        raw = lzma.decompress(f.read())
    (n,) = struct.unpack_from("<I", raw)
    entries = json.loads(raw[4 : 4 + n])
    R = make_rotation(args.rot_block, args.rot_seed)
    at, state = 4 + n, {}
    for e in entries:
        qbuf, sbuf = raw[at : at + e["q"]], raw[at + e["q"] : at + e["q"] + e["s"]]
        at += e["q"] + e["s"]
        shape = e["shape"]
        if e["kind"] == "half":
            w = torch.from_numpy(np.frombuffer(qbuf, np.float16).copy()).float().view(shape)
        else:
            q = torch.from_numpy(unpack_planes(qbuf, math.prod(shape), e["bits"])).float().view(shape)
            w = q * torch.from_numpy(np.frombuffer(sbuf, np.float16).copy()).float()[:, None]
            if e["kind"] == "rot":
                w = unrotate(w, R)
        state[e["name"]] = w
    return state

def check_artifact(path: str, ints: dict[str, tuple[Tensor, Tensor, int]]):
    """What is read back must be what was packed; a wrong plane order costs a whole run."""
    state = read_artifact(path)
    R = make_rotation(args.rot_block, args.rot_seed)
    for name, (q, s, _) in ints.items():
        want = unrotate(q.cpu().float() * s.cpu().float()[:, None], R)
        assert torch.allclose(want, state[name], atol=1e-6), f"{name} does not survive the artifact"
    print0(f"artifact read back: {len(state)} tensors, {len(ints)} of them quantised")

# -----------------------------------------------------------------------------
# evaluation, expert 3: counts over the scored part of the stream

class ContextCounts:
    """
    p(a | two tokens back) = (C[row, a] + alpha * p2(a | prev)) / (sum_a C[row, a] + alpha),
    p2(a | prev) = (C2[prev, a] + alpha * p1(a)) / (sum_a C2[prev, a] + alpha), p1 = add-one unigram.
    Two contexts may share a row; a row is a whole vector over the vocabulary and is divided by its own sum, so
    this only blurs. Same on every rank: all of them count the whole chunk.
    """

    def __init__(self, rows: int, vocab: int, alpha: float):
        self.rows, self.vocab, self.alpha = rows, vocab, alpha
        self.c3 = torch.zeros(rows, vocab, device=device)
        self.c2 = torch.zeros(vocab, vocab, device=device)
        self.c1 = torch.ones(vocab, device=device)
        self.n3 = torch.zeros(rows, device=device)
        self.n2 = torch.zeros(vocab, device=device)

    def row_of(self, prev2: Tensor, prev: Tensor) -> Tensor:
        # behind a document's start only the start itself is context
        prev2 = torch.where(prev == BOS_ID, BOS_ID, prev2)
        return (prev2 * 40503 + prev * 12289) % self.rows

    def probs(self, prev2: Tensor, prev: Tensor) -> Tensor:
        p1 = self.c1 / self.c1.sum()
        p2 = (self.c2[prev] + self.alpha * p1) / (self.n2[prev] + self.alpha)[:, None]
        row = self.row_of(prev2, prev)
        return (self.c3[row] + self.alpha * p2) / (self.n3[row] + self.alpha)[:, None]

    def level(self, prev2: Tensor, prev: Tensor) -> Tensor:
        # how often this context was seen, in powers of two; the mixer keeps its weights apart by it
        return torch.log2(self.n3[self.row_of(prev2, prev)] + 1).long().clamp_max(LEVELS - 1)

    def learn(self, stream: Tensor, lo: int, hi: int):
        # positions lo .. hi-1 as targets
        lo = max(lo, 2)
        cur = stream[lo:hi].long()
        prev, prev2 = stream[lo - 1 : hi - 1].long(), stream[lo - 2 : hi - 2].long()
        row = self.row_of(prev2, prev)
        one = torch.ones(cur.numel(), device=device)
        self.c3.index_put_((row, cur), one, accumulate=True)
        self.c2.index_put_((prev, cur), one, accumulate=True)
        self.c1.index_put_((cur,), one, accumulate=True)
        self.n3.index_put_((row,), one, accumulate=True)
        self.n2.index_put_((prev,), one, accumulate=True)

LEVELS = 14

# -----------------------------------------------------------------------------
# evaluation: weights of the experts

class ExpertMixer:
    """
    A convex mixture with weights per context level. During a chunk the weights stand still and the posterior shares of
    the experts are only noted down; advance() moves the weights towards them when the chunk is through.
    """

    def __init__(self, prior: tuple[float, ...], rate: float, floor: float = 1e-3):
        self.rate, self.floor = rate, floor
        self.w = torch.tensor(prior, dtype=torch.float64, device=device).repeat(LEVELS, 1)
        self.shares = torch.zeros_like(self.w)

    def log_mix(self, lp: Tensor, level: Tensor) -> Tensor:
        # lp: experts x tokens, log probability of the realised token under each
        joint = lp.double() + self.w.log()[level].T
        total = torch.logsumexp(joint, dim=0)
        self.shares.index_add_(0, level, (joint - total).exp().T)
        return total

    def advance(self):
        all_sum(self.shares)
        seen = self.shares.sum(dim=1, keepdim=True)
        target = self.shares / seen.clamp_min(1e-9)
        speed = self.rate * seen / (seen + 256.0)
        self.w = (self.w + speed * (target - self.w)).clamp_min(self.floor)
        self.w /= self.w.sum(dim=1, keepdim=True)
        self.shares = torch.zeros_like(self.w)

    def describe(self) -> str:
        w = self.w.mean(dim=0).tolist()
        return " ".join(f"{name}:{v:.3f}" for name, v in zip(EXPERTS, w))

# -----------------------------------------------------------------------------
# evaluation: the few parameters that move at test time

class Adapter:
    """Norm gains of the blocks, a vector on the last hidden state, a bias on the logits and a log temperature."""

    def __init__(self, model: GPT, hidden):
        self.model, self.hidden = model, hidden
        for p in model.parameters():
            p.requires_grad_(False)
        self.gains = [g for b in model.blocks for g in (b.attn_gain, b.mlp_gain)] + [model.final_gain]
        for g in self.gains:
            g.requires_grad_(True)
        self.h_bias = torch.zeros(args.model_dim, device=device, requires_grad=True)
        self.logit_bias = torch.zeros(args.vocab_size, device=device, requires_grad=True)
        self.log_temp = torch.zeros((), device=device, requires_grad=True)
        self.params = self.gains + [self.h_bias, self.logit_bias, self.log_temp]
        self.home = [p.detach().clone() for p in self.params]
        self.opt = torch.optim.AdamW(
            [
                dict(params=self.gains, lr=args.ttt_lr_gain),
                dict(params=[self.h_bias], lr=args.ttt_lr_hidden),
                dict(params=[self.logit_bias], lr=args.ttt_lr_bias),
                dict(params=[self.log_temp], lr=args.ttt_lr_temp),
            ],
            betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0,
        )
        self.steps = 0

    def logits(self, h: Tensor) -> Tensor:
        z = self.model.head(h + self.h_bias.to(h.dtype))
        return z * torch.exp(-self.log_temp) + self.logit_bias

    def learn(self, stream: Tensor, lo: int, hi: int) -> float:
        """A few steps on targets lo .. hi-1. Rows are dealt to the ranks, gradients summed, so all ranks stay equal."""
        blocks = cut_blocks(lo, hi, args.seq_len)
        last = 0.0
        for epoch in range(args.ttt_epochs):
            order = random.Random(lo * 31 + epoch).sample(blocks, len(blocks))
            for first, end in deal(order, args.ttt_rows):
                x, y, own = gather_windows(stream, first, end, args.seq_len)
                n = all_sum(own.sum().double()).item()
                h = self.hidden(x, document_masks(x, args.short_window))
                z = self.logits(h)
                nll = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view_as(own)
                loss = (nll * own).sum() / max(n, 1.0)
                self.opt.zero_grad(set_to_none=True)
                loss.backward()
                for p in self.params:
                    all_sum(p.grad)
                torch.nn.utils.clip_grad_norm_(self.params, 1.0)
                self.opt.step()
                self.pull_home()
                self.steps += 1
                last = float(all_sum(loss.detach()).item())
        return last

    @torch.no_grad()
    def pull_home(self):
        for p, home in zip(self.params, self.home):
            p.lerp_(home, args.ttt_pull)

# -----------------------------------------------------------------------------
# evaluation: the whole stream, chunk by chunk

class StreamScorer:
    """
    Scores every target of the stream once, in order of chunks. Inside a chunk nothing moves; what the chunk teaches
    (gains, biases, temperature, counts, mixing weights) is taken in after all ranks have scored all of it.
    """

    def __init__(self, model: GPT, hidden, stream: Tensor, tables: ByteTables, started: float):
        self.model, self.hidden, self.stream, self.tables = model, hidden, stream, tables
        self.started = started
        self.adapter = Adapter(model, hidden)
        self.counts = ContextCounts(args.ngram_rows, args.vocab_size, args.ngram_alpha)
        self.mixer = ExpertMixer((0.80, 0.15, 0.05), args.mix_rate)
        # loss in nats, tokens, bytes of this rank
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def expert_logprobs(self, h: Tensor, prev2: Tensor, prev: Tensor) -> Tensor:
        """experts x tokens x vocabulary; each row a full log distribution"""
        tuned = F.log_softmax(self.adapter.logits(h).float(), dim=-1)
        plain = F.log_softmax(self.model.head(h), dim=-1)
        ngram = self.counts.probs(prev2, prev).log()
        return torch.stack([tuned, plain, ngram])

    @torch.no_grad()
    def score_batch(self, first: Tensor, end: Tensor):
        x, y, own = gather_windows(self.stream, first, end, args.seq_len)
        h = self.hidden(x, document_masks(x, args.short_window))
        prev, cur = x[own], y[own]
        prev2 = F.pad(x[:, :-1], (1, 0), value=BOS_ID)[own]
        lp = self.expert_logprobs(h[own], prev2, prev)
        realised = lp.gather(2, cur[None, :, None].expand(len(EXPERTS), -1, 1)).squeeze(2)
        logp = self.mixer.log_mix(realised, self.counts.level(prev2, prev))
        self.sums[0] -= logp.sum()
        self.sums[1] += cur.numel()
        self.sums[2] += self.tables.count(prev, cur).sum()

    @torch.no_grad()
    def sum_check(self, lo: int) -> float:
        """Largest distance from one of the mixture's sum over the vocabulary, at the first block behind lo."""
        worst = torch.zeros((), dtype=torch.float64, device=device)
        block = (lo, min(lo + args.eval_stride, self.stream.numel()))
        for first, end in deal([block], args.eval_rows):
            x, _, own = gather_windows(self.stream, first, end, args.seq_len)
            h = self.hidden(x, document_masks(x, args.short_window))
            prev, prev2 = x[own], F.pad(x[:, :-1], (1, 0), value=BOS_ID)[own]
            p = self.expert_logprobs(h[own], prev2, prev).double().exp()
            w = self.mixer.w[self.counts.level(prev2, prev)]
            total = torch.einsum("nk,knv->n", w, p)
            if total.numel():
                worst = torch.maximum(worst, (total - 1).abs().max())
        return agree_max(worst.item())

    def score_span(self, lo: int, hi: int):
        for first, end in deal(cut_blocks(lo, hi, args.eval_stride), args.eval_rows):
            self.score_batch(first, end)

    def seconds(self) -> float:
        return agree_max(time.perf_counter() - self.started)

    def totals(self) -> tuple[float, int, int]:
        loss, ntok, nbytes = all_sum(self.sums.clone()).tolist()
        return loss, int(ntok), int(nbytes)

    def take_in(self, lo: int, hi: int):
        # everything up to hi is scored by now
        self.mixer.advance()
        self.counts.learn(self.stream, lo, hi)
        if self.seconds() < args.adapt_until_s:
            self.adapter.learn(self.stream, lo, hi)

    def run(self) -> tuple[float, float, int, int]:
        chunks = cut_blocks(1, self.stream.numel(), args.ttt_chunk)
        for c, (lo, hi) in enumerate(chunks):
            self.score_span(lo, hi)
            if c % 40 == 0:
                loss, ntok, nbytes = self.totals()
                off = self.sum_check(lo)
                print0(
                    f"eval chunk:{c + 1}/{len(chunks)} running_loss:{loss / ntok:.4f} "
                    f"running_bpb:{loss / math.log(2) / nbytes:.4f} temp:{self.adapter.log_temp.exp().item():.4f} "
                    f"{self.mixer.describe()} sum_off:{off:.1e} t:{self.seconds():.1f}s",
                    console=True,
                )
            if c + 1 < len(chunks):
                self.take_in(lo, hi)
        loss, ntok, nbytes = self.totals()
        assert ntok == self.stream.numel() - 1, "every target is scored once"
        return loss / ntok, loss / math.log(2) / nbytes, ntok, nbytes

# -----------------------------------------------------------------------------
# int main

def nvidia_smi() -> str:
    try:
        return subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError as e:
        return f"nvidia-smi: {e}"

random.seed(args.seed)
np.random.seed(args.seed)
torch.manual_seed(args.seed)
torch.cuda.manual_seed_all(args.seed)

# begin logging
print0(code)
print0("=" * 100)
print0(f"Running Python {sys.version}")
print0(f"Running PyTorch {torch.version.__version__} compiled for CUDA {torch.version.cuda}")
print0(nvidia_smi())
print0("=" * 100)
for f in fields(args):
    print0(f"{f.name}: {getattr(args, f.name)}")

sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
assert int(sp.vocab_size()) == args.vocab_size, "tokenizer and model disagree about the vocabulary"
tables = ByteTables(sp, args.vocab_size)
val_stream = load_val_stream(args.val_files)
print0(f"validation tokens: {val_stream.numel()} documents: {int((val_stream == BOS_ID).sum())}", console=True)

model = GPT(args).to(device)
for p in model.parameters():
    if dist.is_initialized():
        dist.broadcast(p.detach(), 0)
model_compiled = torch.compile(model, dynamic=False)
hidden_compiled = torch.compile(model.hidden, dynamic=False)
print0(f"params: {sum(p.numel() for p in model.parameters())}", console=True)

########################################
#             Optimizers               #
########################################

matrices = [m.weight for m in model.modules() if isinstance(m, QLinear)]
tables_2d = [model.embed.weight, model.bigram.table.weight] + [ve.weight for ve in model.value_embeds]
taken = {id(p) for p in matrices + tables_2d}
scalars = [p for p in model.parameters() if id(p) not in taken]

optimizer1 = torch.optim.AdamW(
    [
        dict(params=tables_2d, lr=args.embed_lr, weight_decay=args.adam_wd),
        dict(params=scalars, lr=args.scalar_lr, weight_decay=0.0),
    ],
    betas=(0.85, 0.95), eps=1e-10, fused=True,
)
optimizer2 = NorMuon(matrices, lr=args.muon_lr, weight_decay=args.muon_wd, momentum=0.95, beta2=args.muon_beta2)
optimizers = [optimizer1, optimizer2]
for opt in optimizers:
    for group in opt.param_groups:
        group["initial_lr"] = group["lr"]

def lr_scale(frac: float) -> float:
    # flat, then linear to a small rest; by the clock, not by steps
    if frac < 1 - args.cooldown_frac:
        return 1.0
    w = min(1.0, (1 - frac) / args.cooldown_frac)
    return max(0.0, w) * (1 - args.final_lr_scale) + args.final_lr_scale

def muon_momentum(step: int) -> float:
    return 0.85 + 0.10 * min(1.0, step / 400)

def reduce_adam_grads():
    # NorMuon reduces its own
    for p in tables_2d + scalars:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        all_mean(p.grad)

def train_step(batches, frac: float, step: int) -> Tensor:
    total = torch.zeros((), device=device)
    for inputs, targets in batches:
        loss = model_compiled(inputs, targets, document_masks(inputs, args.short_window)) / grad_accum_steps
        loss.backward()
        total += loss.detach()
    reduce_adam_grads()
    torch.nn.utils.clip_grad_norm_(tables_2d + scalars, args.grad_clip)
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale(frac)
    for group in optimizer2.param_groups:
        group["momentum"] = muon_momentum(step)
    for opt in optimizers:
        opt.step()
    model.zero_grad(set_to_none=True)
    return total

########################################
#            Warmup kernels            #
########################################

# Compile everything on made-up tokens, then put the initial state back.
initial = dict(model=copy.deepcopy(model.state_dict()), opts=[copy.deepcopy(o.state_dict()) for o in optimizers])
warm_rows = sorted({rows for _, rows in BATCH_STAGES})
for rows in warm_rows:
    for qat in (False, True) if rows == warm_rows[-1] else (False,):
        model.set_qat(qat)
        for _ in range(args.warmup_runs):
            fake = torch.randint(2, args.vocab_size, (rows, args.seq_len), device=device)
            fake[:, ::509] = BOS_ID
            train_step([(fake, fake.roll(-1, dims=1))] * grad_accum_steps, 0.0, 0)
model.set_qat(False)
with torch.no_grad():
    # the uncompiled forward of the calibration, else flex_attention compiles inside the reserve
    fake = torch.randint(2, args.vocab_size, (args.calib_rows, args.seq_len), device=device)
    model.hidden(fake, document_masks(fake, args.short_window))
model.load_state_dict(initial["model"])
for opt, state in zip(optimizers, initial["opts"]):
    opt.load_state_dict(state)
del initial

########################################
#        Training and validation       #
########################################

def log_validation(step: int, clock: Stopwatch):
    was = model.blocks[0].mlp.fc.qat
    model.set_qat(False)
    loss, bpb = plain_validation(hidden_compiled, model.head, val_stream, tables, args.seq_len, args.eval_rows)
    model.set_qat(was)
    print0(f"step:{step} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{clock.total:.1f}s", console=True)

train_seconds = args.max_wallclock_s - args.quant_reserve_s
train_loader = distributed_data_generator(args.train_files, rows_for(0.0), args.seq_len)
ema = EMA(model, args.ema_decay)
clock = Stopwatch()
clock.start()
step, tokens_seen, started_loader, qat_on = 0, 0, False, False

while True:
    elapsed = agree_max(clock.read())
    frac = elapsed / train_seconds
    last_step = elapsed >= train_seconds or step >= args.max_steps
    if last_step or (args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0):
        clock.pause()
        log_validation(step, clock)
        clock.start()
    if last_step:
        break

    rows = rows_for(frac)
    if not qat_on and frac >= args.qat_start_frac:
        qat_on = True
        model.set_qat(True)
        print0(f"step:{step} qat on, int{args.attn_bits} attention, int{args.mlp_bits} mlp", console=True)
    batches = []
    for _ in range(grad_accum_steps):
        batches.append(train_loader.send(rows if started_loader else None))
        started_loader = True
    train_loss = train_step(batches, frac, step)
    tokens_seen += rows * args.seq_len * 8
    step += 1
    if frac >= args.ema_start_frac:
        ema.update()
    if step <= 5 or step % args.log_every == 0:
        print0(
            f"step:{step} train_loss:{train_loss.item():.4f} rows:{rows} tokens:{tokens_seen / 1e9:.3f}B "
            f"train_time:{clock.read():.1f}s step_avg:{1000 * clock.read() / step:.2f}ms",
            console=True,
        )

print0(f"stopped at step:{step} train_time:{clock.read():.1f}s peak memory:{torch.cuda.max_memory_allocated() >> 20} MiB", console=True)

########################################
#      Average, GPTQ (same clock)      #
########################################

ema.copy_to_model()
model.set_qat(False)
hessians = collect_hessians(model, train_loader, args.calib_batches, args.calib_rows)
ints = quantise_linears(model, hessians)
train_total = agree_max(clock.pause())
del hessians
print0(f"gptq done, training and calibration together: {train_total:.1f}s of {args.max_wallclock_s:.0f}s", console=True)
assert train_total <= args.max_wallclock_s, "the quantisation reserve is too small"

if master_process:
    raw_bytes = write_artifact(args.artifact, model, ints)
    model_bytes = os.path.getsize(args.artifact)
    code_bytes = len(code.encode("utf-8"))
    print0(f"artifact: {model_bytes} bytes (raw {raw_bytes})", console=True)
    print0(f"code: {code_bytes} bytes", console=True)
    print0(f"total: {model_bytes + code_bytes} bytes", console=True)
    assert model_bytes + code_bytes <= args.size_limit, "too large"
    check_artifact(args.artifact, ints)
    for line in quantisation_report(model, ints):
        print0(line)
del ints, optimizers, optimizer1, optimizer2, ema, train_loader
barrier()

########################################
#     Evaluation of the artifact       #
########################################

eval_started = time.perf_counter()
eval_model = GPT(args).to(device)
eval_model.load_state_dict(read_artifact(args.artifact))
eval_model.eval()
hidden = torch.compile(eval_model.hidden, dynamic=False)

scorer = StreamScorer(eval_model, hidden, val_stream, tables, eval_started)
val_loss, val_bpb, ntok, nbytes = scorer.run()
eval_seconds = scorer.seconds()
print0(f"eval tokens:{ntok} bytes:{nbytes} ttt_steps:{scorer.adapter.steps} eval_time:{eval_seconds:.1f}s", console=True)
if eval_seconds > args.eval_budget_s:
    print0(f"eval took longer than {args.eval_budget_s:.0f}s, this run does not count", console=True)
print0(f"final val_loss:{val_loss:.6f} val_bpb:{val_bpb:.6f}", console=True)

if args.diag_sliding:
    # the artifact alone, for the README's table; not the submission's score
    fixed = GPT(args).to(device)
    fixed.load_state_dict(read_artifact(args.artifact))
    loss, bpb = plain_validation(torch.compile(fixed.hidden, dynamic=False), fixed.head, val_stream, tables, args.eval_stride, args.eval_rows)
    print0(f"diagnosis: sliding without adaptation val_loss:{loss:.6f} val_bpb:{bpb:.6f}", console=True)

if dist.is_initialized():
    dist.destroy_process_group()
