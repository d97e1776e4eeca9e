import os
import sys

with open(sys.argv[0]) as f:
    code = f.read()  # read the code of this file ASAP, for logging and for the size
import copy
import glob
import io
import itertools
import lzma
import math
import subprocess
import threading
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
import numpy as np
import sentencepiece as spm
import torch

torch.empty(1, device="cuda", requires_grad=True).backward()  # prevents a bug on some systems
import torch._dynamo as dynamo
import torch._inductor.config as inductor_config
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

try:
    import zstandard as zstd
except ImportError:
    zstd = None

inductor_config.coordinate_descent_tuning = bool(int(os.environ.get("COORD_DESCENT", "0")))
dynamo.config.compiled_autograd = False
dynamo.config.cache_size_limit = 64
BOS_ID = 1

# -----------------------------------------------------------------------------
# Settings. Every field can be overridden by an environment variable of the same name in capitals or by `name=value`
# on the command line (torchrun ... train_gpt.py num_iterations=100).


@dataclass
class Args:
    # data
    train_files: str = "./data/datasets/fineweb10B_sp1024/fineweb_train_*.bin"
    val_files: str = "./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin"
    tokenizer: str = "./data/tokenizers/fineweb_1024_bpe.model"
    train_seq_len: int = 48 * 1024  # per rank and micro step, flattened documents
    val_seq_len: int = 4 * 64 * 1024
    align_to_bos: bool = True
    # model
    vocab_size: int = 1024
    num_layers: int = 11
    num_heads: int = 8
    head_dim: int = 64
    model_dim: int = 512
    mlp_ratio: float = 2.0
    num_value_embeds: int = 2
    logit_cap: float = 30.0
    use_fp8: bool = True
    smear: bool = True
    # optimization
    num_iterations: int = 7400
    cooldown_frac: float = 0.55
    min_lr: float = 0.05
    muon_lr: float = 0.03
    muon_wd: float = 0.06
    muon_momentum: float = 0.95
    muon_beta2: float = 0.95
    momentum_warmup: int = 300
    head_lr: float = 0.008
    embed_lr: float = 0.08
    scalar_lr: float = 0.015
    warmup_steps: int = 30
    ws_short: int = 8  # attention windows, in blocks of 128 tokens
    ws_long: int = 16
    ws_extend: float = 0.33
    average_from: float = 0.92  # tail average of the weights over the last part of the schedule
    average_every: int = 10
    # wallclock
    max_seconds: float = 590.0
    # quantization
    bits: int = 6
    embed_bits: int = 8
    clip_grid: str = "1.0,0.9999,0.9995,0.999,0.998"
    codec: str = "zstd"
    # evaluation
    val_loss_every: int = 1000
    eval_len: int = 2048
    eval_stride: int = 64
    eval_rows: int = 32
    logit_temp: float = 1.0
    # misc
    seed: int = 1337
    run_id: str = ""
    save_checkpoint: bool = False
    only_eval: bool = False


def override(a, items):
    kinds = {f.name: type(getattr(a, f.name)) for f in fields(a)}
    for k, v in items:
        if k in kinds:
            setattr(a, k, v.lower() in ("1", "true", "yes") if kinds[k] is bool else kinds[k](v))
    return a


args = override(Args(), ((k.lower(), v) for k, v in os.environ.items() if k.isupper()))
override(args, (kv.lstrip("-").split("=", 1) for kv in sys.argv[1:] if "=" in kv))
args.run_id = args.run_id or str(uuid.uuid4())

rank = int(os.environ["RANK"])
world_size = int(os.environ["WORLD_SIZE"])
assert 8 % world_size == 0, "world_size must be a divisor of 8"
grad_accum_steps = 8 // world_size
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
dist.init_process_group(backend="nccl", device_id=device)
dist.barrier()
master_process = rank == 0

logfile = None
if master_process:
    os.makedirs("logs", exist_ok=True)
    logfile = f"logs/{args.run_id}.txt"
    print(logfile)


def print0(s, console=False):
    if master_process:
        with open(logfile, "a") as f:
            if console:
                print(s)
            print(s, file=f)


# -----------------------------------------------------------------------------
# Custom operators: FP8 matmul (head only), after an idea of @YouJiacheng


@torch.library.custom_op("holm::mm", mutates_args=())
def mm_op(x: Tensor, w: Tensor, x_s: float, w_s: float, grad_s: float) -> tuple[Tensor, Tensor, Tensor]:
    @torch.compile
    def impl(x: Tensor, w: Tensor):
        assert x.is_contiguous() and w.is_contiguous()
        x_f8 = x.div(x_s).to(torch.float8_e4m3fn)
        w_f8 = w.div(w_s).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(
            x_f8,
            w_f8.T,
            out_dtype=torch.bfloat16,
            scale_a=x.new_tensor(x_s, dtype=torch.float32),
            scale_b=x.new_tensor(w_s, dtype=torch.float32),
            use_fast_accum=True,
        )
        return out, x_f8, w_f8

    return impl(x, w)


@mm_op.register_fake
def _(x: Tensor, w: Tensor, *_):
    assert x.ndim == w.ndim == 2
    assert x.shape[1] == w.shape[1]
    assert x.device == w.device
    return x @ w.T, x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)


@torch.library.custom_op("holm::mm_backward", mutates_args=())
def mm_backward_op(
    g: Tensor, x_f8: Tensor, w_f8: Tensor, x_s: float, w_s: float, grad_s: float
) -> tuple[Tensor, Tensor]:
    @torch.compile
    def impl(grad: Tensor, x_f8: Tensor, w_f8: Tensor):
        assert grad.is_contiguous()
        x_inv = grad.new_tensor(x_s, dtype=torch.float32)
        w_inv = grad.new_tensor(w_s, dtype=torch.float32)
        g_inv = grad.new_tensor(grad_s, dtype=torch.float32)
        g_f8 = grad.div(grad_s).to(torch.float8_e5m2)
        grad_x = torch._scaled_mm(
            g_f8, w_f8.T.contiguous().T, out_dtype=torch.bfloat16, scale_a=g_inv, scale_b=w_inv, use_fast_accum=False
        )
        grad_w = torch._scaled_mm(
            x_f8.T.contiguous(),
            g_f8.T.contiguous().T,
            out_dtype=torch.float32,
            scale_a=x_inv,
            scale_b=g_inv,
            use_fast_accum=False,
        ).T
        return grad_x, grad_w

    return impl(g, x_f8, w_f8)


@mm_backward_op.register_fake
def _(g: Tensor, x_f8: Tensor, w_f8: Tensor, *_):
    return x_f8.to(torch.bfloat16), w_f8.to(torch.float32)


def mm_backward(ctx, grad_out: Tensor, *_):
    x_f8, w_f8 = ctx.saved_tensors
    x_s, w_s, grad_s = ctx.scales
    grad_x, grad_w = torch.ops.holm.mm_backward(grad_out.contiguous(), x_f8, w_f8, x_s, w_s, grad_s)
    return grad_x, grad_w, None, None, None


def mm_setup(ctx, inputs, output):
    *_, x_s, w_s, grad_s = inputs
    _, x_f8, w_f8 = output
    ctx.save_for_backward(x_f8, w_f8)
    ctx.scales = x_s, w_s, grad_s
    ctx.set_materialize_grads(False)


mm_op.register_autograd(mm_backward, setup_context=mm_setup)

# -----------------------------------------------------------------------------
# Optimizers: NorMuon with Polar Express, and a plain Adam, both with asynchronous communication

POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


@torch.compile(dynamic=False, fullgraph=True)
def polar_express(G: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix of each matrix in the batch (https://arxiv.org/abs/2505.16932)."""
    X = G.bfloat16()
    flip = G.size(-2) > G.size(-1)
    if flip:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * (1 + 2e-2) + 1e-6)
    for a, b, c in POLAR:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if flip else X


class NorMuon(torch.optim.Optimizer):
    """
    Muon whose update is normalized per neuron (row). Parameters of one shape form a group; the gradients of a group are
    stacked, reduce-scattered (each rank gets len/world of them), orthogonalized there and gathered again.
    """

    def __init__(self, params, lr, weight_decay, momentum, beta2):
        by_shape = defaultdict(list)
        for p in params:
            by_shape[(tuple(p.shape), getattr(p, "split", 1))].append(p)
        groups = [dict(params=ps, split=split) for (_, split), ps in by_shape.items()]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2))

    @torch.no_grad()
    def step(self):
        pending = []
        for group in self.param_groups:
            params = group["params"]
            pad = -len(params) % world_size
            grads = torch.stack([p.grad for p in params] + [torch.zeros_like(params[0])] * pad).bfloat16()
            mine = torch.empty_like(grads[: len(grads) // world_size])
            fut = dist.reduce_scatter_tensor(mine, grads, op=dist.ReduceOp.AVG, async_op=True).get_future()
            pending.append((group, mine, fut))
        gathers = []
        for group, g, fut in pending:
            fut.wait()
            g = g.float()
            state = self.state[group["params"][0]]
            if not state:
                state["momentum"] = torch.zeros_like(g)
                state["second"] = torch.zeros_like(g[..., :1])
            buf = state["momentum"].lerp_(g, 1 - group["momentum"])
            g = g.lerp(buf, group["momentum"])
            k = group["split"]
            v = polar_express(g.view(g.size(0) * k, g.size(1) // k, g.size(2))).view_as(g).float()
            norm = v.norm(dim=(-2, -1), keepdim=True)
            state["second"].lerp_(v.square().mean(dim=-1, keepdim=True), 1 - group["beta2"])
            v = v * state["second"].clamp_min(1e-10).rsqrt()
            v = v * (norm / v.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
            v = v.bfloat16()
            full = torch.empty(v.size(0) * world_size, *v.shape[1:], dtype=v.dtype, device=v.device)
            gathers.append((group, full, dist.all_gather_into_tensor(full, v.contiguous(), async_op=True).get_future()))
        for group, full, fut in gathers:
            fut.wait()
            for p, u in zip(group["params"], full):
                lr = group["lr"] * max(1, p.size(-2) / group["split"] / p.size(-1)) ** 0.5
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(u.to(p.dtype), alpha=-lr)


class DistAdam(torch.optim.Optimizer):
    def __init__(self, param_groups, betas=(0.8, 0.95), eps=1e-10):
        super().__init__(param_groups, dict(lr=1e-3, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        futs = [
            (group, p, dist.all_reduce(p.grad, op=dist.ReduceOp.AVG, async_op=True).get_future())
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        for group, p, fut in futs:
            fut.wait()
            g = p.grad.float()
            st = self.state[p]
            if not st:
                st["t"] = torch.zeros((), device=p.device)
                st["m"], st["v"] = torch.zeros_like(g), torch.zeros_like(g)
            b1, b2 = group["betas"]
            st["t"] += 1
            st["m"].lerp_(g, 1 - b1)
            st["v"].lerp_(g.square(), 1 - b2)
            denom = (st["v"] / (1 - b2 ** st["t"])).sqrt_().add_(group["eps"])
            p.sub_((group["lr"] / (1 - b1 ** st["t"]) * st["m"] / denom).to(p.dtype))


# -----------------------------------------------------------------------------
# Model


def norm(x: Tensor):
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    def __init__(self, n_in, n_out, use_fp8=False, x_s=1.0, w_s=1.0, grad_s=1.0):
        super().__init__(n_in, n_out, bias=False)
        self.use_fp8 = use_fp8
        self.scales = x_s, w_s, grad_s

    def reset_parameters(self):
        std = 0.5 * (self.in_features**-0.5)
        bound = (3**0.5) * std
        with torch.no_grad():
            self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor):
        if self.use_fp8 and self.training:
            flat = x.flatten(0, -2)
            out = torch.ops.holm.mm(flat.contiguous(), self.weight.bfloat16(), *self.scales)[0]
            return out.reshape(*x.shape[:-1], -1)
        return F.linear(x, self.weight.type_as(x))


class Rotary(nn.Module):
    """Half-truncated RoPE: the upper half of the frequencies is zero."""

    def __init__(self, dim, max_seq_len):
        super().__init__()
        freq = (1 / 1024) ** torch.linspace(0, 1, steps=dim // 4, dtype=torch.float32)
        freq = torch.cat([freq, freq.new_zeros(dim // 4)])
        theta = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), freq)
        self.register_buffer("cos", theta.cos(), persistent=False)
        self.register_buffer("sin", theta.sin(), persistent=False)

    def forward(self, x: Tensor):  # (1, T, H, D)
        n = x.size(-3)
        cos, sin = self.cos[None, :n, None, :], self.sin[None, :n, None, :]
        a, b = x.to(dtype=torch.float32).chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), 3).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, head_dim, max_seq_len):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        hdim = num_heads * head_dim
        assert hdim == dim, "merged qkvo needs a square output projection"
        bound = (3**0.5) * 0.5 * dim**-0.5
        self.qkvo_w = nn.Parameter(torch.empty(4 * hdim, dim).uniform_(-bound, bound))
        self.qkvo_w.split = 4
        with torch.no_grad():
            self.qkvo_w[3 * hdim :].zero_()
        self.rotary = Rotary(head_dim, max_seq_len)
        self.gate = CastedLinear(12, num_heads)
        nn.init.zeros_(self.gate.weight)
        self.scale = 0.12

    def forward(self, x: Tensor, ve, lambdas: Tensor, block_mask: BlockMask):
        B, T = x.size(0), x.size(1)
        assert B == 1, "flex_attention wants batch size 1"
        w = self.qkvo_w.type_as(x)
        d = w.size(0) // 4
        q, k, v = F.linear(x, w[: 3 * d]).view(B, T, 3 * self.num_heads, self.head_dim).chunk(3, dim=-2)
        q, k = self.rotary(norm(q)), self.rotary(norm(k))
        v = lambdas[0].type_as(v) * v
        if ve is not None:
            v = v + lambdas[1].type_as(v) * ve.view_as(v)
        y = flex_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask, scale=self.scale
        ).transpose(1, 2)
        y = y * (2 * torch.sigmoid(self.gate(x[..., :12]))).unsqueeze(-1)
        return F.linear(y.contiguous().view(B, T, d), w[3 * d :])


class MLP(nn.Module):
    def __init__(self, dim, ratio):
        super().__init__()
        hdim = int(ratio * dim)
        self.c_fc = CastedLinear(dim, hdim)
        self.c_proj = CastedLinear(hdim, dim)
        self.c_proj.weight.detach().zero_()

    def forward(self, x: Tensor):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, dim, num_heads, head_dim, ratio, max_seq_len):
        super().__init__()
        self.attn = CausalSelfAttention(dim, num_heads, head_dim, max_seq_len)
        self.mlp = MLP(dim, ratio)

    def forward(self, x: Tensor, ve, x0: Tensor, lam: Tensor, sa: Tensor, block_mask: BlockMask):
        x = lam[0].type_as(x) * x + lam[1].type_as(x) * x0
        x = x + self.attn(norm(x), ve, sa, block_mask)
        return x + self.mlp(norm(x))


BLOCK_SIZE = 128


def block_masks(docs: Tensor, long_blocks: Tensor, short_blocks: Tensor):
    """Block masks (long and short window) of a flat sequence whose document numbers never fall."""

    def document_causal(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (docs[q_idx] == docs[kv_idx])

    def ordered(dense: Tensor):
        count = dense.sum(dim=-1, dtype=torch.int32)
        index = dense.argsort(dim=-1, descending=False, stable=True).flip(-1).to(torch.int32)
        return count[None, None].contiguous(), index[None, None].contiguous()

    n = len(docs) // BLOCK_SIZE
    i = torch.arange(n, dtype=torch.int32, device=docs.device)
    low, high = docs.view(-1, BLOCK_SIZE)[:, 0].contiguous(), docs.view(-1, BLOCK_SIZE)[:, -1].contiguous()
    some = (i[:, None] >= i) & (low[:, None] <= high) & (high[:, None] >= low)
    every = (i[:, None] > i) & (low[:, None] == high) & (high[:, None] == low)
    part_n, part_i = ordered(some & ~every)
    full_n, full_i = ordered(every)

    def windowed(blocks: Tensor):
        return BlockMask.from_kv_blocks(
            torch.clamp_max(part_n, torch.clamp_min(blocks - full_n, 1)),
            part_i,
            torch.clamp_max(full_n, blocks - 1),
            full_i,
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=document_causal,
        )

    return windowed(long_blocks), windowed(short_blocks)


class GPT(nn.Module):
    def __init__(self, a: Args, max_seq_len: int):
        super().__init__()
        self.num_layers = a.num_layers
        self.cap = a.logit_cap
        self.temp = a.logit_temp
        self.embed = nn.Embedding(a.vocab_size, a.model_dim)
        self.value_embeds = nn.ModuleList(
            [nn.Embedding(a.vocab_size, a.model_dim) for _ in range(a.num_value_embeds)]
        )
        for ve in self.value_embeds:
            nn.init.zeros_(ve.weight)
        self.smear_gate = CastedLinear(12, 1) if a.smear else None
        if self.smear_gate is not None:
            nn.init.zeros_(self.smear_gate.weight)
        self.blocks = nn.ModuleList(
            [Block(a.model_dim, a.num_heads, a.head_dim, a.mlp_ratio, max_seq_len) for _ in range(a.num_layers)]
        )
        self.lm_head = CastedLinear(
            a.model_dim, a.vocab_size, use_fp8=a.use_fp8, x_s=(a.model_dim**0.5) / 448, w_s=2**-9, grad_s=1 / 448
        )
        nn.init.zeros_(self.lm_head.weight)
        L = a.num_layers
        self.scalars = nn.Parameter(
            torch.cat(
                [
                    torch.ones(L // 2),  # skip weights
                    *[torch.tensor([1.0, 0.0]) for _ in range(L)],  # block lambdas
                    *[torch.tensor([0.5, 0.5]) for _ in range(L)],  # SA lambdas
                    torch.tensor([0.0]),  # smear lambda
                ]
            )
        )

    def forward(self, input_seq: Tensor, target_seq: Tensor, docs: Tensor, long_ws: Tensor, short_ws: Tensor):
        assert input_seq.ndim == 1
        L, S = self.num_layers, self.num_layers // 2
        skip_w = self.scalars[:S]
        lam = self.scalars[S : S + 2 * L].view(-1, 2)
        sa = self.scalars[S + 2 * L : S + 4 * L].view(-1, 2)
        ve = [e(input_seq)[None].bfloat16() for e in self.value_embeds]
        ve = ve + [None] * (L - 2 * len(ve)) + ve  # the same tables serve the first and the last layers
        long_bm, short_bm = block_masks(docs, long_ws, short_ws)
        masks = [long_bm if i % 4 == 3 or i == L - 1 else short_bm for i in range(L)]

        x = self.embed(input_seq).bfloat16()
        if self.smear_gate is not None:  # mixes in the token before, never across a document
            g = self.scalars[-1] * torch.sigmoid(self.smear_gate(x[1:, :12]))
            g = g * (docs[1:] == docs[:-1]).unsqueeze(-1)
            x = torch.cat([x[:1], x[1:] + g.type_as(x) * x[:-1]])
        x = x0 = norm(x[None])
        skips = []
        for i in range(L):
            if i >= L - S:
                x = x + skip_w[i - (L - S)].type_as(x) * skips.pop()
            x = self.blocks[i](x, ve[i], x0, lam[i], sa[i], masks[i])
            if i < S:
                skips.append(x)
        logits = self.lm_head(norm(x)).float()
        logits = self.cap * torch.tanh(logits / self.cap) / self.temp
        return F.cross_entropy(
            logits.view(-1, logits.size(-1)), target_seq, reduction="mean" if self.training else "none"
        )


# -----------------------------------------------------------------------------
# Distributed data loader


def _load_data_shard(file: Path):
    header = torch.from_file(str(file), False, 256, dtype=torch.int32)
    assert header[0] == 20240520, "magic number mismatch in the data .bin file"
    assert header[1] == 1, "unsupported version"
    num_tokens = int(header[2])
    with file.open("rb", buffering=0) as f:
        tokens = torch.empty(num_tokens, dtype=torch.uint16, pin_memory=True)
        f.seek(256 * 4)
        nbytes = f.readinto(tokens.numpy())
        assert nbytes == 2 * num_tokens, "number of tokens read does not match header"
    return tokens


class ShardPrefetch:
    """Reads the next shard in a thread while this one is used."""

    def __init__(self, files):
        self.files = iter(files)
        self.thread, self.result = None, None
        self._start()

    def _start(self):
        file = next(self.files, None)
        self.result = None
        if file is None:
            self.thread = None
            return

        def work():
            self.result = _load_data_shard(file)

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def get(self):
        if self.thread is None:
            return None
        self.thread.join()
        tokens = self.result
        self._start()
        return tokens


def bos_starts(bos: Tensor, pos: int, span: int, count: int):
    """`count` spans of `span`+1 tokens, each beginning at a BOS, from `pos` on; None where the shard has not as many."""
    out = []
    for _ in range(count):
        j = int(torch.searchsorted(bos, pos))
        if j >= len(bos):
            return None, pos
        out.append(int(bos[j]))
        pos = out[-1] + span
    return out, pos


def distributed_data_generator(filename_pattern: str, batch_size: int, align_to_bos: bool, once: bool = False):
    """
    Yields (inputs, targets) of batch_size // world_size tokens for this rank. `once`: every token of the files in order,
    one time, the last batch filled up with targets of -100 (validation); otherwise the files go round for ever.
    """
    files = [Path(f) for f in sorted(glob.glob(filename_pattern))]
    assert files, f"no files match {filename_pattern}"
    assert batch_size % world_size == 0
    local = batch_size // world_size
    shards = ShardPrefetch(files if once else itertools.cycle(files))
    tokens, pos = shards.get(), 0
    bos = (tokens == BOS_ID).nonzero().flatten() if align_to_bos else None
    while True:
        if align_to_bos:
            starts, nxt = bos_starts(bos, pos, local, world_size)
            if starts is None or nxt + 1 > len(tokens):
                tokens, pos = shards.get(), 0
                bos = (tokens == BOS_ID).nonzero().flatten()
                continue
            start, pos = starts[rank], nxt
        else:
            while pos + batch_size + 1 > len(tokens):
                more = shards.get()
                if more is None:
                    break
                tokens, pos = torch.cat([tokens[pos:], more]), 0
            if pos + 1 >= len(tokens):
                return
            start = pos + rank * local
            pos += batch_size
        buf = tokens[start : start + local + 1].to(torch.int32)
        if len(buf) < local + 1:
            short = local + 1 - max(len(buf), 1)
            inputs = F.pad(buf[:-1], (0, short), value=BOS_ID)
            targets = F.pad(buf[1:].to(torch.int64), (0, short), value=-100)
        else:
            inputs, targets = buf[:-1], buf[1:].to(torch.int64)
        yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def count_tokens(filename_pattern: str) -> int:
    return sum(int(np.fromfile(f, dtype="<i4", count=3)[2]) for f in sorted(glob.glob(filename_pattern)))


# -----------------------------------------------------------------------------
# Bytes of the tokens (tokenizer-agnostic bpb)


@lru_cache(maxsize=1)
def byte_tables():
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer)
    assert sp.vocab_size() == args.vocab_size, f"tokenizer has {sp.vocab_size()} pieces"
    size = np.zeros(args.vocab_size, dtype=np.int64)
    space = np.zeros(args.vocab_size, dtype=np.bool_)
    edge = np.ones(args.vocab_size, dtype=np.bool_)
    for i in range(sp.vocab_size()):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        edge[i] = False
        if sp.is_byte(i):
            size[i] = 1
            continue
        piece = sp.id_to_piece(i)
        space[i] = piece.startswith("\u2581")
        size[i] = len(piece.removeprefix("\u2581").encode("utf-8"))
    return tuple(torch.from_numpy(t).to(device) for t in (size, space, edge))


def token_bytes(prev: Tensor, target: Tensor) -> Tensor:
    size, space, edge = byte_tables()
    prev, target = prev.long(), target.long()
    return size[target] + (space[target] & ~edge[prev]).long()


# -----------------------------------------------------------------------------
# Validation


@dataclass
class Tally:
    """Sums of one pass over the validation tokens: nats, tokens, bytes."""

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    @classmethod
    def new(cls):
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, nll: Tensor, prev: Tensor, target: Tensor, keep: Tensor):
        self.nats += nll[keep].double().sum()
        self.tokens += keep.sum()
        self.bytes += token_bytes(prev[keep], target[keep]).sum()

    def reduce(self):
        for t in (self.nats, self.tokens, self.bytes):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return self

    @property
    def loss(self):
        return (self.nats / self.tokens).item()

    @property
    def bpb(self):
        return (self.nats / math.log(2) / self.bytes).item()


def blocks_tensor(n: int):
    return torch.tensor(n, dtype=torch.int32, device=device)


@torch.no_grad()
def validate(model, long_ws: int, short_ws: int) -> Tally:
    """Flat pass: every validation token once, documents kept apart by the mask, attention window of the training."""
    model.eval()
    val_batch_size = world_size * args.val_seq_len
    val_steps = -(-(count_tokens(args.val_files) - 1) // val_batch_size)
    val_loader = distributed_data_generator(args.val_files, val_batch_size, align_to_bos=False, once=True)
    tally = Tally.new()
    for _ in range(val_steps):
        inputs, targets = next(val_loader)
        docs = (inputs == BOS_ID).cumsum(0).to(torch.int32)
        nll = model(inputs, targets, docs, blocks_tensor(long_ws), blocks_tensor(short_ws))
        tally.add(nll, inputs, targets, targets >= 0)
    del val_loader
    model.train()
    return tally.reduce()


def windows_of(start: int, end: int, length: int, stride: int):
    """(first input, inputs, first scored) of the windows of one document; its targets are start+1 .. end, each in one window."""
    total = end - start
    done = min(length, total)
    yield start, done, 0
    while done < total:
        upto = min(done + stride, total)
        first = max(upto - length, 0)
        yield start + first, upto - first, done - first
        done = upto


@torch.no_grad()
def evaluate_documents(model, length: int, stride: int) -> Tally:
    """
    The reported figure. A window never leaves its document; a document's last target is the BOS of the next one (0 bytes).
    Windows are rows of a flat sequence, held apart by the same document mask.
    """
    model.eval()
    tokens = torch.cat([_load_data_shard(Path(f)) for f in sorted(glob.glob(args.val_files))]).to(torch.int32)
    starts = (tokens == BOS_ID).nonzero().flatten().tolist()
    if starts[0] != 0:
        starts = [0] + starts
    ends = starts[1:] + [len(tokens) - 1]
    mine = [w for s, e in list(zip(starts, ends))[rank::world_size] if e > s for w in windows_of(s, e, length, stride)]
    rows = args.eval_rows
    docs = torch.arange(rows, dtype=torch.int32, device=device).repeat_interleave(length)
    whole = blocks_tensor(length // BLOCK_SIZE + 1)
    tally = Tally.new()
    t0 = time.perf_counter()
    for b in range(0, len(mine), rows):
        x = torch.full((rows, length), BOS_ID, dtype=torch.int32)
        y = torch.full((rows, length), -100, dtype=torch.int64)
        keep = torch.zeros(rows, length, dtype=torch.bool)
        for r, (first, n, scored) in enumerate(mine[b : b + rows]):
            x[r, :n] = tokens[first : first + n]
            y[r, :n] = tokens[first + 1 : first + n + 1]
            keep[r, scored:n] = True
        x, y, keep = (t.flatten().to(device, non_blocking=True) for t in (x, y, keep))
        nll = model(x, y, docs, whole, whole)
        tally.add(nll, x, y, keep)
        if master_process and (b // rows) % 2000 == 0:
            print0(f"  docs window {b}/{len(mine)} time:{time.perf_counter() - t0:.1f}s")
    model.train()
    return tally.reduce()


# -----------------------------------------------------------------------------
# Quantization: one fp16 scale a row, its clip chosen from a grid by the squared error of the weights


def quantize_rows(w: Tensor, bits: int):
    top = 2 ** (bits - 1) - 1
    w = w.float()
    best = None
    for q in map(float, args.clip_grid.split(",")):
        a = w.abs()
        clip = a.amax(dim=1) if q >= 1 else torch.quantile(a, q, dim=1)
        s = (clip / top).clamp_min(1e-8).half()
        v = torch.clamp(torch.round(w / s.float()[:, None]), -top, top)
        err = (v * s.float()[:, None] - w).square().sum(dim=1)
        if best is None:
            best = [v, s, err]
        else:
            better = err < best[2]
            best[0] = torch.where(better[:, None], v, best[0])
            best[1] = torch.where(better, s, best[1])
            best[2] = torch.where(better, err, best[2])
    return best[0].to(torch.int8).cpu(), best[1].cpu()


def pack(state: dict) -> bytes:
    out = {}
    for name, t in state.items():
        if t.ndim == 2 and t.numel() >= 32768:
            out[name] = quantize_rows(t, args.embed_bits if "embed" in name or "head" in name else args.bits)
        else:
            out[name] = t.detach().half().cpu()
    buf = io.BytesIO()
    torch.save(out, buf)
    raw = buf.getvalue()
    if args.codec == "zstd" and zstd is not None:
        return b"Z" + zstd.ZstdCompressor(level=22).compress(raw)
    return b"L" + lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def unpack(blob: bytes, like: dict) -> dict:
    raw = zstd.ZstdDecompressor().decompress(blob[1:]) if blob[:1] == b"Z" else lzma.decompress(blob[1:])
    saved = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    out = {}
    for name, ref in like.items():
        t = saved[name]
        if isinstance(t, tuple):
            t = t[0].float() * t[1].float()[:, None]
        out[name] = t.to(ref.dtype)
    return out


# -----------------------------------------------------------------------------
# Main

print0(code)
print0("=" * 100)
print0(f"Running Python {sys.version}")
print0(f"Running PyTorch {torch.version.__version__} compiled for CUDA {torch.version.cuda}")
if master_process:
    print0(subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True).stdout)
print0("=" * 100)
for fld in fields(args):
    print0(f"{fld.name}: {getattr(args, fld.name)}")

torch.manual_seed(args.seed)
torch.cuda.manual_seed_all(args.seed)
np.random.seed(args.seed)
torch.backends.cuda.matmul.allow_tf32 = True

longest = max(args.train_seq_len, args.val_seq_len, args.eval_rows * args.eval_len)
model: nn.Module = GPT(args, max_seq_len=longest).cuda()
for m in model.modules():
    if isinstance(m, nn.Embedding):
        m.bfloat16()
for param in model.parameters():
    dist.broadcast(param.detach(), 0)
print0(f"model_params:{sum(p.numel() for p in model.parameters())}", console=True)

hidden = [p for n, p in model.blocks.named_parameters() if p.ndim == 2 and "gate" not in n]
gates = [p for n, p in model.named_parameters() if "gate" in n]
embeds = [p for n, p in model.named_parameters() if "embed" in n]
adam = DistAdam(
    [
        dict(params=[model.lm_head.weight], lr=args.head_lr),
        dict(params=embeds, lr=args.embed_lr),
        dict(params=[model.scalars, *gates], lr=args.scalar_lr),
    ]
)
muon = NorMuon(hidden, args.muon_lr, args.muon_wd, args.muon_momentum, args.muon_beta2)
optimizers = [adam, muon]
for opt in optimizers:
    for group in opt.param_groups:
        group["initial_lr"] = group["lr"]

# schedules: constant, then linear cooldown; windows grow once
get_lr = lambda step: (
    1.0
    if (left := 1 - step / args.num_iterations) >= args.cooldown_frac
    else (w := max(left, 0.0) / args.cooldown_frac) + (1 - w) * args.min_lr
)
get_ws = lambda step: (
    (args.ws_long, args.ws_short)
    if step / args.num_iterations >= args.ws_extend
    else (args.ws_long // 2, args.ws_short // 2)
)
get_momentum = lambda step: (1 - (f := min(step / args.momentum_warmup, 1.0))) * 0.85 + f * args.muon_momentum

raw_model = model
model = torch.compile(model, dynamic=False, fullgraph=True)


def train_step(loader, step, lr_scale):
    long_ws, short_ws = map(blocks_tensor, get_ws(step))
    total = torch.zeros((), device=device)
    for _ in range(grad_accum_steps):
        inputs, targets = next(loader)
        docs = (inputs == BOS_ID).cumsum(0).to(torch.int32)
        loss = model(inputs, targets, docs, long_ws, short_ws)
        (loss / grad_accum_steps).backward()
        total += loss.detach() / grad_accum_steps
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale
    for group in muon.param_groups:
        group["momentum"] = get_momentum(step)
    for opt in optimizers:
        opt.step()
    raw_model.zero_grad(set_to_none=True)
    return total


train_batch = partial(
    distributed_data_generator, args.train_files, world_size * args.train_seq_len, align_to_bos=args.align_to_bos
)

# Warm up the kernels on training batches, then restore model and optimizers: nothing is learned here.
keep_model = copy.deepcopy(raw_model.state_dict())
warm_loader = train_batch()
for s in range(args.warmup_steps):
    train_step(warm_loader, 0 if s % 2 else args.num_iterations, 1.0)
raw_model.load_state_dict(keep_model)
for opt in optimizers:
    opt.state.clear()
del warm_loader, keep_model
print0(f"warmup: {args.warmup_steps} steps done, state restored", console=True)

# Training
train_loader = train_batch()
tail_sum, tail_n = None, 0
training_time_ms = 0.0
stop_step = None
dist.barrier()
torch.cuda.synchronize()
t0 = time.perf_counter()
for step in range(args.num_iterations + 1):
    last_step = step == args.num_iterations or (stop_step is not None and step >= stop_step)

    # ---------------- validation ----------------
    if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
        torch.cuda.synchronize()
        training_time_ms += 1000 * (time.perf_counter() - t0)
        t = validate(model, *get_ws(step))
        print0(
            f"step:{step}/{args.num_iterations} val_loss:{t.loss:.4f} val_bpb:{t.bpb:.4f} "
            f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms",
            console=True,
        )
        torch.cuda.synchronize()
        t0 = time.perf_counter()
    if last_step:
        break

    # ---------------- training ----------------
    train_loss = train_step(train_loader, step, get_lr(step))
    if step >= args.average_from * args.num_iterations and step % args.average_every == 0:
        snap = {k: v.detach().float() for k, v in raw_model.state_dict().items()}
        if tail_sum is None:
            tail_sum = {k: v.clone() for k, v in snap.items()}
        else:
            for k, v in snap.items():
                tail_sum[k] += v
        tail_n += 1

    elapsed = torch.tensor(training_time_ms + 1000 * (time.perf_counter() - t0), device=device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)  # every rank stops at the same step
    if stop_step is None and args.max_seconds > 0 and elapsed.item() >= 1000 * args.max_seconds:
        stop_step = step + 1
        print0(f"stopping early at step {stop_step}: train_time:{elapsed.item():.0f}ms", console=True)
    if step < 10 or step % 200 == 0:
        print0(f"step:{step + 1}/{args.num_iterations} train_loss:{train_loss.item():.4f} train_time:{elapsed.item():.0f}ms")

if tail_n:
    raw_model.load_state_dict({k: (v / tail_n).to(raw_model.state_dict()[k].dtype) for k, v in tail_sum.items()})
    print0(f"tail average of {tail_n} snapshots loaded", console=True)
    del tail_sum
print0(
    f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
    f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB",
    console=True,
)

# -----------------------------------------------------------------------------
# Artifact: written by rank 0, read back by all, and only what was read back is evaluated

artifact = Path("final_model.int6.bin")
code_bytes = len(code.encode("utf-8"))
if master_process:
    if args.save_checkpoint:
        torch.save(raw_model.state_dict(), "final_model.pt")
    blob = pack(raw_model.state_dict())
    artifact.write_bytes(blob)
    total_bytes = len(blob) + code_bytes
    print0(f"Serialized model int{args.bits}+{args.codec}: {len(blob)} bytes", console=True)
    print0(f"Code size: {code_bytes} bytes", console=True)
    print0(f"Total submission size: {total_bytes} bytes", console=True)
    assert total_bytes <= 16_000_000, "over the 16 MB cap"
dist.barrier()
restored = unpack(artifact.read_bytes(), raw_model.state_dict())
raw_model.load_state_dict(restored, strict=True)

# -----------------------------------------------------------------------------
# Final evaluation

torch.cuda.synchronize()
t_eval = time.perf_counter()
flat = validate(model, args.ws_long, args.ws_short)
print0(f"final_int6_flat val_loss:{flat.loss:.4f} val_bpb:{flat.bpb:.4f}", console=True)
final = evaluate_documents(model, args.eval_len, args.eval_stride)
torch.cuda.synchronize()
eval_s = time.perf_counter() - t_eval
print0(
    f"final_int6_docs_sliding val_loss:{final.loss:.4f} val_bpb:{final.bpb:.4f} "
    f"len:{args.eval_len} stride:{args.eval_stride} eval_time:{eval_s:.1f}s",
    console=True,
)
print0(f"final_int6_docs_sliding_exact val_loss:{final.loss:.8f} val_bpb:{final.bpb:.8f}", console=True)
dist.destroy_process_group()
