"""
train_gpt.py -- team isay

11 layers x 512, banked weights, flex-attention with document block masks (long/short windows), value residual, per-head
attention gates, smear gate, softcapped logits. Muon runs batched Newton-Schulz over the banks, sharded over the ranks.
EMA weights -> GPTQ (int6 attention, int5 MLP, int8 embedding) with Hessians from training shards, inside the 600 s.
Evaluation: (1) plain sliding window, logged for reference, (2) score-first LoRA TTT per document, which is the score.

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import base64
import glob
import io
import lzma
import math
import os
import random
import subprocess
import sys
import time
import uuid
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
# settings
# -----------------------------------------------------------------------------


def env(name: str, default):
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.lower() in ("1", "true", "yes")
    return type(default)(raw)


class Args:
    # data
    data_path = env("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = env("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    vocab_size = env("VOCAB_SIZE", 1024)
    bos_id = env("BOS_ID", 1)
    run_id = env("RUN_ID", str(uuid.uuid4()))
    seed = env("SEED", 1337)

    # length of the run
    iterations = env("ITERATIONS", 20000)
    max_wallclock_seconds = env("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env("GPTQ_RESERVE_SECONDS", 40.0)
    warmup_steps = env("WARMUP_STEPS", 12)
    warmdown_frac = env("WARMDOWN_FRAC", 0.55)
    train_batch_tokens = env("TRAIN_BATCH_TOKENS", 786432)
    train_log_every = env("TRAIN_LOG_EVERY", 200)
    val_loss_every = env("VAL_LOSS_EVERY", 2500)

    # model
    num_layers = env("NUM_LAYERS", 11)
    model_dim = env("MODEL_DIM", 512)
    num_heads = env("NUM_HEADS", 8)
    num_kv_heads = env("NUM_KV_HEADS", 4)
    mlp_hidden = env("MLP_HIDDEN", 1536)
    rope_base = env("ROPE_BASE", 10000.0)
    rope_dims = env("ROPE_DIMS", 32)
    logit_softcap = env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env("QK_GAIN_INIT", 1.5)
    gate_inputs = env("GATE_INPUTS", 12)
    long_window = env("LONG_WINDOW", 2048)
    short_window = env("SHORT_WINDOW", 768)
    long_every = env("LONG_EVERY", 3)

    # optimizer
    matrix_lr = env("MATRIX_LR", 0.025)
    embed_lr = env("EMBED_LR", 0.035)
    scalar_lr = env("SCALAR_LR", 0.025)
    muon_momentum = env("MUON_MOMENTUM", 0.97)
    muon_momentum_start = env("MUON_MOMENTUM_START", 0.90)
    muon_momentum_warmup = env("MUON_MOMENTUM_WARMUP", 1200)
    muon_steps = env("MUON_STEPS", 5)
    muon_wd = env("MUON_WD", 0.04)
    adam_wd = env("ADAM_WD", 0.02)
    beta1 = env("BETA1", 0.9)
    beta2 = env("BETA2", 0.95)
    ema_decay = env("EMA_DECAY", 0.997)

    # quantisation
    attn_bits = env("ATTN_BITS", 6)
    mlp_bits = env("MLP_BITS", 5)
    gptq_batches = env("GPTQ_BATCHES", 8)
    gptq_batch_tokens = env("GPTQ_BATCH_TOKENS", 32768)
    gptq_block = env("GPTQ_BLOCK", 128)
    gptq_damp = env("GPTQ_DAMP", 0.01)
    clip_sigmas_attn = env("CLIP_SIGMAS_ATTN", 12.0)
    clip_sigmas_mlp = env("CLIP_SIGMAS_MLP", 10.0)
    artifact = env("ARTIFACT", "final_model.isay.xz")
    size_limit = 16_000_000
    self_extract = env("SELF_EXTRACT", False)

    # evaluation
    eval_seq_len = env("EVAL_SEQ_LEN", 2048)
    eval_stride = env("EVAL_STRIDE", 128)
    eval_rows = env("EVAL_ROWS", 48)
    ttt_rank = env("TTT_RANK", 8)
    ttt_chunk = env("TTT_CHUNK", 256)
    ttt_context = env("TTT_CONTEXT", 1024)
    ttt_docs = env("TTT_DOCS", 64)
    ttt_lr = env("TTT_LR", 0.008)
    ttt_alpha = env("TTT_ALPHA", 16.0)
    ttt_epochs = env("TTT_EPOCHS", 1)
    eval_budget_seconds = env("EVAL_BUDGET_SECONDS", 600.0)


# -----------------------------------------------------------------------------
# ranks
# -----------------------------------------------------------------------------


class Ranks:
    """What a process knows of the others. Works without torchrun too (one rank)."""

    def __init__(self) -> None:
        self.on = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if 8 % self.world:
            raise ValueError(f"WORLD_SIZE={self.world} must divide 8")
        self.accum = 8 // self.world
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.on:
            dist.init_process_group("nccl", device_id=self.device)

    @property
    def master(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.on:
            dist.barrier()

    def add_up(self, t: Tensor) -> Tensor:
        if self.on:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def largest(self, value: float) -> float:
        t = torch.tensor(value, device=self.device, dtype=torch.float64)
        if self.on:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return float(t.item())

    def mine(self, items: list) -> list:
        return items[self.rank :: self.world]

    def close(self) -> None:
        if self.on:
            dist.destroy_process_group()


class Log:
    def __init__(self, ranks: Ranks, run_id: str) -> None:
        self.path = None
        if ranks.master:
            os.makedirs("logs", exist_ok=True)
            self.path = Path("logs") / f"{run_id}.txt"

    def __call__(self, text: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            print(text, file=f)


# -----------------------------------------------------------------------------
# data
# -----------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_HEADER = 256


def read_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER)
    if header.size != SHARD_HEADER or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"bad shard header: {file}")
    count = int(header[2])
    tokens = np.fromfile(file, dtype="<u2", count=count, offset=SHARD_HEADER * 4)
    if tokens.size != count:
        raise ValueError(f"short shard: {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def read_validation(pattern: str) -> Tensor:
    files = sorted(Path(p) for p in glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no validation shards: {pattern}")
    return torch.cat([read_shard(f).to(torch.int32) for f in files])


class ShardStream:
    """All training shards in order, again and again, as one stream of tokens."""

    def __init__(self, pattern: str) -> None:
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no training shards: {pattern}")
        self.file = 0
        self.pos = 0
        self.tokens = read_shard(self.files[0])

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.file = (self.file + 1) % len(self.files)
                self.tokens = read_shard(self.files[self.file])
                self.pos = 0
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Every rank walks the same stream and keeps its own span of each global batch."""

    def __init__(self, pattern: str, ranks: Ranks) -> None:
        self.stream = ShardStream(pattern)
        self.ranks = ranks

    def next(self, tokens_per_rank: int) -> tuple[Tensor, Tensor]:
        span = tokens_per_rank + 1
        chunk = self.stream.take(span * self.ranks.world)
        own = chunk[self.ranks.rank * span : (self.ranks.rank + 1) * span].to(torch.int64)
        own = own.pin_memory().to(self.ranks.device, non_blocking=True)
        return own[None, :-1], own[None, 1:]


class ByteTables:
    """UTF-8 bytes of the original text per token: the piece without its mark, plus a space where the mark stands for one."""

    def __init__(self, path: str, vocab_size: int, device: torch.device) -> None:
        sp = spm.SentencePieceProcessor(model_file=path)
        if int(sp.vocab_size()) > vocab_size:
            raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE={vocab_size}")
        size = max(int(sp.vocab_size()), vocab_size)
        length = np.zeros(size, dtype=np.int16)
        spaced = np.zeros(size, dtype=np.bool_)
        silent = np.ones(size, dtype=np.bool_)
        for i in range(int(sp.vocab_size())):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            silent[i] = False
            if sp.is_byte(i):
                length[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith("\u2581"):
                spaced[i] = True
                piece = piece[1:]
            length[i] = len(piece.encode("utf-8"))
        self.length = torch.tensor(length, device=device)
        self.spaced = torch.tensor(spaced, device=device)
        self.silent = torch.tensor(silent, device=device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        n = self.length[target].to(torch.float64)
        return n + (self.spaced[target] & ~self.silent[prev]).to(torch.float64)


class Tally:
    """Sum of nats, scored tokens and bytes; one float64 vector, summed over the ranks at the end."""

    def __init__(self, ranks: Ranks, tables: ByteTables) -> None:
        self.ranks = ranks
        self.tables = tables
        self.sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)

    def add(self, nll: Tensor, prev: Tensor, target: Tensor, counted: Tensor) -> None:
        keep = counted.to(torch.float64)
        self.sums[0] += (nll.to(torch.float64) * keep).sum()
        self.sums[1] += keep.sum()
        self.sums[2] += (self.tables.count(prev, target) * keep).sum()

    def close(self, expected: int | None = None) -> tuple[float, float]:
        total = self.ranks.add_up(self.sums.clone())
        nats, tokens, nbytes = (float(v) for v in total.tolist())
        if expected is not None and int(round(tokens)) != expected:
            raise RuntimeError(f"scored {tokens:.0f} tokens, expected {expected}")
        return nats / tokens, nats / math.log(2.0) / nbytes


# -----------------------------------------------------------------------------
# model
# -----------------------------------------------------------------------------

flex = torch.compile(flex_attention, dynamic=False)


def segment_ids(ids: Tensor, bos_id: int) -> Tensor:
    return (ids == bos_id).to(torch.int32).cumsum(dim=1)


def window_mask(seg: Tensor, window: int) -> BlockMask:
    """Causal, inside one document, at most `window` tokens back."""
    rows, length = seg.shape

    def allowed(b, h, q, kv):
        return (q >= kv) & (q - kv < window) & (seg[b, q] == seg[b, kv])

    return create_block_mask(allowed, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=seg.device, _compile=True)


def block_masks(ids: Tensor, args: type[Args]) -> tuple[BlockMask, BlockMask]:
    seg = segment_ids(ids, args.bos_id)
    return window_mask(seg, args.long_window), window_mask(seg, args.short_window)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Half-truncated rotary embedding on the first `dims` channels of a head."""

    def __init__(self, dims: int, base: float, longest: int) -> None:
        super().__init__()
        inv = (1.0 / base) ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angle = torch.outer(torch.arange(longest, dtype=torch.float32), inv)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        cos = self.cos[None, : x.size(1), None, :]
        sin = self.sin[None, : x.size(1), None, :]
        turn, keep = x[..., : self.dims], x[..., self.dims :]
        a, b = turn.float().chunk(2, dim=-1)
        turned = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
        return torch.cat((turned.type_as(x), keep), dim=-1)


class DocLoRA(nn.Module):
    """One low-rank correction per document of a batch, for queries, values and the logits."""

    def __init__(self, docs: int, model: "GPT", rank: int, alpha: float) -> None:
        super().__init__()
        a = model.args
        device = model.embed.weight.device
        d, kv, n = a.model_dim, a.num_kv_heads * model.head_dim, a.num_layers
        self.scale = alpha / rank
        self.q_a = nn.Parameter(torch.empty(n, docs, rank, d, device=device))
        self.q_b = nn.Parameter(torch.empty(n, docs, d, rank, device=device))
        self.v_a = nn.Parameter(torch.empty(n, docs, rank, d, device=device))
        self.v_b = nn.Parameter(torch.empty(n, docs, kv, rank, device=device))
        self.h_a = nn.Parameter(torch.empty(docs, rank, d, device=device))
        self.h_b = nn.Parameter(torch.empty(docs, a.vocab_size, rank, device=device))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        gen = torch.Generator(device=self.q_a.device).manual_seed(77)
        for p in (self.q_a, self.v_a, self.h_a):
            bound = 1.0 / math.sqrt(p.size(-1))
            p.uniform_(-bound, bound, generator=gen)
        for p in (self.q_b, self.v_b, self.h_b):
            p.zero_()

    def _low(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.scale * torch.bmm(torch.bmm(x, a.to(x.dtype).transpose(1, 2)), b.to(x.dtype).transpose(1, 2))

    def query(self, x: Tensor, layer: int) -> Tensor:
        return self._low(x, self.q_a[layer], self.q_b[layer])

    def value(self, x: Tensor, layer: int) -> Tensor:
        return self._low(x, self.v_a[layer], self.v_b[layer])

    def logits(self, x: Tensor) -> Tensor:
        return self._low(x, self.h_a, self.h_b)


class GPT(nn.Module):
    """Weights of equal shape lie in banks (one tensor for all layers), so that Muon and GPTQ take them in batches."""

    def __init__(self, args: type[Args], longest: int) -> None:
        super().__init__()
        self.args = args
        d, n = args.model_dim, args.num_layers
        self.head_dim = d // args.num_heads
        kv = args.num_kv_heads * self.head_dim
        self.embed = nn.Embedding(args.vocab_size, d)
        self.qo_bank = nn.Parameter(torch.empty(2 * n, d, d))
        self.kv_bank = nn.Parameter(torch.empty(2 * n, kv, d))
        self.up_bank = nn.Parameter(torch.empty(n, args.mlp_hidden, d))
        self.down_bank = nn.Parameter(torch.empty(n, d, args.mlp_hidden))
        self.attn_scale = nn.Parameter(torch.ones(n, d))
        self.mlp_scale = nn.Parameter(torch.ones(n, d))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(n, d), torch.zeros(n, d)), dim=1))
        self.q_gain = nn.Parameter(torch.full((n, args.num_heads), args.qk_gain_init))
        self.v_mix = nn.Parameter(torch.tensor([[1.0, 0.0]] + [[0.5, 0.5]] * (n - 1)))
        self.head_gate = nn.Parameter(torch.zeros(n, args.num_heads, args.gate_inputs))
        self.smear_gate = nn.Parameter(torch.zeros(args.gate_inputs))
        self.smear_scale = nn.Parameter(torch.zeros(1))
        self.skip_weights = nn.Parameter(torch.ones(n // 2, d))
        self.rotary = Rotary(args.rope_dims, args.rope_base, longest)
        self.tap = None
        self._init()

    @torch.no_grad()
    def _init(self) -> None:
        n = self.args.num_layers
        nn.init.normal_(self.embed.weight, std=0.005)
        for bank in (self.qo_bank, self.kv_bank, self.up_bank, self.down_bank):
            for w in bank:
                nn.init.orthogonal_(w)
        self.qo_bank[n:].zero_()
        self.down_bank.zero_()

    def banks(self) -> list[nn.Parameter]:
        return [self.qo_bank, self.kv_bank, self.up_bank, self.down_bank]

    def is_long(self, layer: int) -> bool:
        return layer % self.args.long_every == 0 or layer == self.args.num_layers - 1

    def _linear(self, x: Tensor, w: Tensor, key: str) -> Tensor:
        if self.tap is not None:
            self.tap.see(key, x)
        return F.linear(x, w.to(x.dtype))

    def _attention(self, x: Tensor, v0: Tensor | None, layer: int, mask: BlockMask, lora: DocLoRA | None):
        a, n = self.args, self.args.num_layers
        rows, length, _ = x.shape
        q = self._linear(x, self.qo_bank[layer], f"attn_in.{layer}")
        k = F.linear(x, self.kv_bank[layer].to(x.dtype))
        v = F.linear(x, self.kv_bank[n + layer].to(x.dtype))
        if lora is not None:
            q = q + lora.query(x, layer)
            v = v + lora.value(x, layer)
        q = q.view(rows, length, a.num_heads, self.head_dim)
        k = k.view(rows, length, a.num_kv_heads, self.head_dim)
        v = v.view(rows, length, a.num_kv_heads, self.head_dim)
        q, k = self.rotary(norm(q)), self.rotary(norm(k))
        q = q * self.q_gain[layer].to(q.dtype)[None, None, :, None]
        if v0 is None:
            v0 = v
        mix = self.v_mix[layer].to(v.dtype)
        v = mix[0] * v + mix[1] * v0
        y = flex(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=True)
        y = y.transpose(1, 2)
        gate = torch.sigmoid(F.linear(x[..., : a.gate_inputs], self.head_gate[layer].to(x.dtype)))
        y = (2.0 * gate)[..., None] * y
        y = y.reshape(rows, length, -1)
        return self._linear(y, self.qo_bank[n + layer], f"attn_out.{layer}"), v0

    def _mlp(self, x: Tensor, layer: int) -> Tensor:
        h = self._linear(x, self.up_bank[layer], f"mlp_in.{layer}")
        h = F.leaky_relu(h, 0.5).square()
        return self._linear(h, self.down_bank[layer], f"mlp_mid.{layer}")

    def _smear(self, x: Tensor, ids: Tensor) -> Tensor:
        """A little of the previous token's embedding; never across the start of a document."""
        prev = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        gate = torch.sigmoid((x[..., : self.args.gate_inputs] * self.smear_gate.to(x.dtype)).sum(-1, keepdim=True))
        inside = (ids != self.args.bos_id)[..., None].to(x.dtype)
        return x + self.smear_scale.to(x.dtype) * gate * inside * prev

    def hidden(self, ids: Tensor, masks: tuple[BlockMask, BlockMask], lora: DocLoRA | None = None) -> Tensor:
        n = self.args.num_layers
        x = norm(self.embed(ids).to(torch.bfloat16))
        x = self._smear(x, ids)
        x0, v0, skips = x, None, []
        for layer in range(n):
            if layer < n // 2:
                skips.append(x)
            elif skips and layer > n // 2:
                k = len(skips) - 1
                x = x + self.skip_weights[k].to(x.dtype) * skips.pop()
            mix = self.resid_mix[layer].to(x.dtype)
            x = mix[0] * x + mix[1] * x0
            mask = masks[0] if self.is_long(layer) else masks[1]
            y, v0 = self._attention(norm(x), v0, layer, mask, lora)
            x = x + self.attn_scale[layer].to(x.dtype) * y
            x = x + self.mlp_scale[layer].to(x.dtype) * self._mlp(norm(x), layer)
        return norm(x)

    def logits(self, ids: Tensor, masks: tuple[BlockMask, BlockMask], lora: DocLoRA | None = None) -> Tensor:
        h = self.hidden(ids, masks, lora)
        out = F.linear(h, self.embed.weight.to(h.dtype))
        if lora is not None:
            out = out + lora.logits(h)
        cap = self.args.logit_softcap
        return cap * torch.tanh(out.float() / cap)

    def forward(self, ids: Tensor, targets: Tensor, masks, lora: DocLoRA | None = None) -> Tensor:
        """Loss of every position, in nats, in the shape of `targets`."""
        out = self.logits(ids, masks, lora)
        return F.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


# -----------------------------------------------------------------------------
# optimizer
# -----------------------------------------------------------------------------


@torch.compile
def newton_schulz(g: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Quintic iteration on a stack of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class BankMuon(torch.optim.Optimizer):
    """Muon over banks. A bank's matrices are dealt over the ranks: reduce-scatter, iterate, all-gather."""

    def __init__(self, banks: list[nn.Parameter], lr: float, momentum: float, steps: int, wd: float, ranks: Ranks):
        super().__init__(banks, dict(lr=lr, momentum=momentum, steps=steps, wd=wd))
        self.ranks = ranks

    def _padded(self, g: Tensor) -> Tensor:
        lack = -g.size(0) % self.ranks.world
        return g if not lack else torch.cat((g, g.new_zeros(lack, *g.shape[1:])))

    @torch.no_grad()
    def step(self) -> None:
        world = self.ranks.world
        for group in self.param_groups:
            waiting = []
            for p in group["params"]:
                full = self._padded(p.grad.bfloat16())
                if self.ranks.on:
                    own = torch.empty_like(full[: full.size(0) // world])
                    work = dist.reduce_scatter_tensor(own, full, op=dist.ReduceOp.AVG, async_op=True)
                else:
                    own, work = full, None
                waiting.append((p, own, work))
            gathered = []
            for p, own, work in waiting:
                if work is not None:
                    work.wait()
                state = self.state[p]
                if "buf" not in state:
                    state["buf"] = torch.zeros_like(own, dtype=torch.float32)
                buf = state["buf"]
                buf.lerp_(own.float(), 1.0 - group["momentum"])
                update = newton_schulz(own.float().lerp(buf, group["momentum"]), group["steps"])
                if self.ranks.on:
                    whole = torch.empty(own.size(0) * world, *own.shape[1:], device=own.device, dtype=update.dtype)
                    work = dist.all_gather_into_tensor(whole, update.contiguous(), async_op=True)
                else:
                    whole, work = update, None
                gathered.append((p, whole, work))
            for p, whole, work in gathered:
                if work is not None:
                    work.wait()
                shape = max(1.0, p.size(-2) / p.size(-1)) ** 0.5
                p.mul_(1.0 - group["lr"] * group["wd"])
                p.add_(whole[: p.size(0)].to(p.dtype), alpha=-group["lr"] * shape)


class Ema:
    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        names, live = zip(*model.named_parameters())
        torch._foreach_lerp_([self.shadow[k] for k in names], [p.detach().float() for p in live], 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for k, p in model.named_parameters():
            p.copy_(self.shadow[k].to(p.dtype))


# -----------------------------------------------------------------------------
# training
# -----------------------------------------------------------------------------


class Clock:
    """Wall clock with the device drained at both ends; stands still between pause() and go()."""

    def __init__(self) -> None:
        self.done = 0.0
        self.since = None

    def go(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def pause(self) -> None:
        torch.cuda.synchronize()
        if self.since is not None:
            self.done += time.perf_counter() - self.since
            self.since = None

    def seconds(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.done + running


class Optimizers:
    """Muon for the banks, Adam for the embedding and for scales, gates and mixes."""

    def __init__(self, model: GPT, args: type[Args], ranks: Ranks) -> None:
        self.model, self.args, self.ranks = model, args, ranks
        banks = model.banks()
        held = {id(p) for p in banks} | {id(model.embed.weight)}
        self.small = [p for p in model.parameters() if id(p) not in held]
        self.muon = BankMuon(banks, args.matrix_lr, args.muon_momentum, args.muon_steps, args.muon_wd, ranks)
        betas = (args.beta1, args.beta2)
        self.adam = torch.optim.AdamW(
            [
                dict(params=[model.embed.weight], lr=args.embed_lr, base=args.embed_lr, weight_decay=args.adam_wd),
                dict(params=self.small, lr=args.scalar_lr, base=args.scalar_lr, weight_decay=0.0),
            ],
            betas=betas,
            eps=1e-8,
            fused=True,
        )

    def zero(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self, step: int, scale: float) -> None:
        a = self.args
        if self.ranks.on:
            work = [
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG, async_op=True)
                for p in [self.model.embed.weight, *self.small]
            ]
            for w in work:
                w.wait()
        warm = min(step / max(a.muon_momentum_warmup, 1), 1.0)
        for group in self.muon.param_groups:
            group["momentum"] = (1.0 - warm) * a.muon_momentum_start + warm * a.muon_momentum
            group["lr"] = a.matrix_lr * scale
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * scale
        self.muon.step()
        self.adam.step()


def lr_scale(elapsed: float, budget: float, warmdown: float) -> float:
    left = 1.0 - min(elapsed / budget, 1.0)
    return min(1.0, left / warmdown)


def warm_up(step_model, model: GPT, args: type[Args], ranks: Ranks, local_tokens: int) -> None:
    """Compiles forward, backward and the optimizer on random tokens; weights and moments start afresh afterwards."""
    start = {k: v.detach().clone() for k, v in model.state_dict().items()}
    opt = Optimizers(model, args, ranks)
    gen = torch.Generator(device=ranks.device).manual_seed(args.seed)
    for i in range(args.warmup_steps):
        noise = torch.randint(0, args.vocab_size, (1, local_tokens + 1), device=ranks.device, generator=gen)
        x, y = noise[:, :-1], noise[:, 1:]
        step_model(x, y, block_masks(x, args)).mean().backward()
        opt.step(i, 0.0)
        opt.zero()
    model.load_state_dict(start)
    model.zero_grad(set_to_none=True)


class Monitor:
    """Loss on the head of the validation split while training goes on. For the log only; the clock is paused."""

    def __init__(self, val: Tensor, args: type[Args], ranks: Ranks, tables: ByteTables, log: Log) -> None:
        self.args, self.ranks, self.tables, self.log = args, ranks, tables, log
        self.head = val[: 8 * 65536 + 1]

    @torch.no_grad()
    def __call__(self, model: GPT, step: int, seconds: float) -> None:
        tally = Tally(self.ranks, self.tables)
        span = self.args.eval_seq_len * 8
        for at in self.ranks.mine(list(range(0, self.head.numel() - span, span))):
            piece = self.head[at : at + span + 1].to(self.ranks.device, torch.int64)
            x, y = piece[None, :-1], piece[None, 1:]
            tally.add(model(x, y, block_masks(x, self.args)), x, y, torch.ones_like(y))
        loss, bpb = tally.close()
        self.log(f"monitor step:{step} head_loss:{loss:.4f} head_bpb:{bpb:.4f} train_time:{1000 * seconds:.0f}ms")


def train(model: GPT, args: type[Args], ranks: Ranks, log: Log, monitor: Monitor) -> tuple[Clock, TrainLoader]:
    local_tokens = args.train_batch_tokens // (ranks.world * ranks.accum)
    step_model = torch.compile(model, dynamic=False)
    warm_up(step_model, model, args, ranks, local_tokens)
    loader = TrainLoader(args.train_files, ranks)
    opt = Optimizers(model, args, ranks)
    ema = Ema(model, args.ema_decay)
    budget = args.max_wallclock_seconds - args.gptq_reserve_seconds
    ranks.barrier()
    clock = Clock()
    clock.go()
    step = 0
    while step < args.iterations:
        elapsed = ranks.largest(clock.seconds())
        if elapsed >= budget:
            log(f"stopping: wallclock train_time:{1000 * elapsed:.0f}ms step:{step}/{args.iterations}")
            break
        if args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0:
            clock.pause()
            monitor(model, step, elapsed)
            clock.go()
        total = torch.zeros((), device=ranks.device)
        for _ in range(ranks.accum):
            x, y = loader.next(local_tokens)
            loss = step_model(x, y, block_masks(x, args)).mean()
            (loss / ranks.accum).backward()
            total += loss.detach() / ranks.accum
        opt.step(step, lr_scale(elapsed, budget, args.warmdown_frac))
        opt.zero()
        ema.update(model)
        step += 1
        if step <= 10 or step % args.train_log_every == 0:
            now = clock.seconds()
            log(
                f"step:{step}/{args.iterations} train_loss:{total.item():.4f} "
                f"train_time:{1000 * now:.0f}ms step_avg:{1000 * now / step:.2f}ms"
            )
    ema.copy_to(model)
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    return clock, loader


# -----------------------------------------------------------------------------
# quantisation
# -----------------------------------------------------------------------------


class HessianTap:
    """Collects X^T X of the inputs of the linear layers while a forward pass runs."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def see(self, key: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.size(-1)).float()
        if key not in self.sums:
            self.sums[key] = torch.zeros(flat.size(1), flat.size(1), device=flat.device)
        self.sums[key].addmm_(flat.T, flat)


@torch.no_grad()
def collect_hessians(model: GPT, loader: TrainLoader, args: type[Args], ranks: Ranks) -> dict[str, Tensor]:
    tap = HessianTap()
    model.tap = tap
    for _ in range(args.gptq_batches):
        x, _ = loader.next(args.gptq_batch_tokens)
        model.hidden(x, block_masks(x, args))
    model.tap = None
    seen = float(args.gptq_batches * args.gptq_batch_tokens * ranks.world)
    out = {}
    for key in sorted(tap.sums):
        out[key] = (ranks.add_up(tap.sums[key].double()) / seen).float()
    return out


def row_scale(w: Tensor, sigmas: float, top: int) -> Tensor:
    spread = torch.minimum(w.std(dim=1) * sigmas, w.abs().amax(dim=1))
    return (spread / top).clamp_min(1e-8).half().float()


@torch.no_grad()
def gptq(w: Tensor, hessian: Tensor, bits: int, sigmas: float, args: type[Args]) -> tuple[Tensor, Tensor]:
    """Column by column with error feedback, in order of falling Hessian diagonal."""
    w = w.detach().float().clone()
    top = 2 ** (bits - 1) - 1
    scale = row_scale(w, sigmas, top)
    h = hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(args.gptq_damp * h.diagonal().mean())
    order = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, order], h[order][:, order]
    inv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for a in range(0, w.size(1), args.gptq_block):
        b = min(a + args.gptq_block, w.size(1))
        block, err = w[:, a:b].clone(), torch.zeros_like(w[:, a:b])
        for j in range(b - a):
            col = block[:, j]
            code = (col / scale).round().clamp(-top - 1, top)
            q[:, a + j] = code
            err[:, j] = (col - code * scale) / inv[a + j, a + j]
            block[:, j:] -= err[:, j : j + 1] * inv[a + j : a + j + 1, a + j : b]
        w[:, b:] -= err @ inv[a:b, b:]
    return q[:, torch.argsort(order)].to(torch.int8), scale.half()


def int8_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = (w.float().abs().amax(dim=1) / 127.0).clamp_min(1e-8).half()
    return (w.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def plan(args: type[Args]) -> list[tuple[str, int, str, int, float]]:
    """Every matrix of the banks: bank, index, key of its Hessian, bits, clip."""
    n, jobs = args.num_layers, []
    for i in range(n):
        attn, mlp = (args.attn_bits, args.clip_sigmas_attn), (args.mlp_bits, args.clip_sigmas_mlp)
        jobs += [("qo_bank", i, f"attn_in.{i}", *attn), ("qo_bank", n + i, f"attn_out.{i}", *attn)]
        jobs += [("kv_bank", i, f"attn_in.{i}", *attn), ("kv_bank", n + i, f"attn_in.{i}", *attn)]
        jobs += [("up_bank", i, f"mlp_in.{i}", *mlp), ("down_bank", i, f"mlp_mid.{i}", *mlp)]
    return jobs


def quantise(model: GPT, hessians: dict[str, Tensor], args: type[Args], ranks: Ranks) -> dict[str, Tensor]:
    """Matrices are dealt over the ranks and gathered on all of them."""
    own = {}
    for bank, i, key, bits, sigmas in ranks.mine(plan(args)):
        code, scale = gptq(getattr(model, bank)[i], hessians[key], bits, sigmas, args)
        own[f"{bank}.{i}.q"], own[f"{bank}.{i}.s"] = code.cpu(), scale.cpu()
    parts = [own]
    if ranks.on:
        parts = [None] * ranks.world
        dist.all_gather_object(parts, own)
    packed = {k: v for part in parts for k, v in part.items()}
    code, scale = int8_rows(model.embed.weight.detach())
    packed["embed.q"], packed["embed.s"] = code.cpu(), scale.cpu()
    banks = {"qo_bank", "kv_bank", "up_bank", "down_bank"}
    for name, p in model.named_parameters():
        if name not in banks and name != "embed.weight":
            packed[name] = p.detach().cpu().half()
    return packed


LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 7, "dict_size": 1 << 26, "lc": 0, "lp": 0, "pb": 0}]


def pack(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({k: tensors[k] for k in sorted(tensors)}, buffer)
    return lzma.compress(buffer.getvalue(), format=lzma.FORMAT_XZ, filters=LZMA_FILTERS)


def unpack(raw: bytes) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(lzma.decompress(raw)), map_location="cpu", weights_only=True)


def self_extracting(source: str) -> str:
    """This file as a small loader around its compressed text. Not part of the submission; see SELF_EXTRACT."""
    body = base64.b85encode(lzma.compress(source.encode("utf-8"), preset=9)).decode()
    return f'import base64 as b,lzma as l\nexec(l.decompress(b.b85decode("{body}")))\n'


def write_artifact(packed: dict[str, Tensor], args: type[Args], log: Log) -> None:
    raw = pack(packed)
    Path(args.artifact).write_bytes(raw)
    source = Path(__file__).read_text(encoding="utf-8")
    if args.self_extract:
        Path("train_gpt_packed.py").write_text(self_extracting(source), encoding="utf-8")
    code_bytes = len(source.encode("utf-8"))
    total = len(raw) + code_bytes
    log(f"Serialized model int{args.attn_bits}/int{args.mlp_bits}+xz: {len(raw)} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size: {total} bytes")
    if total > args.size_limit:
        raise RuntimeError(f"submission has {total} bytes, limit {args.size_limit}")


@torch.no_grad()
def read_artifact(args: type[Args], ranks: Ranks, longest: int) -> GPT:
    """A fresh model from the bytes on disk and nothing else."""
    packed = unpack(Path(args.artifact).read_bytes())
    model = GPT(args, longest).to(ranks.device)
    for bank, i, _, _, _ in plan(args):
        code, scale = packed[f"{bank}.{i}.q"].float(), packed[f"{bank}.{i}.s"].float()
        getattr(model, bank)[i].copy_((code * scale[:, None]).to(ranks.device))
    model.embed.weight.copy_((packed["embed.q"].float() * packed["embed.s"].float()[:, None]).to(ranks.device))
    for name, p in model.named_parameters():
        if name in packed:
            p.copy_(packed[name].to(ranks.device, p.dtype))
    model.requires_grad_(False)
    return model.eval()


# -----------------------------------------------------------------------------
# evaluation
# -----------------------------------------------------------------------------


def sliding_spans(total: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(start of the window, first and last+1 target counted in it); the counted parts tile 0..total exactly."""
    first = min(seq_len, total)
    spans = [(0, 0, first)]
    at = first
    while at < total:
        end = min(at + stride, total)
        spans.append((end - first, at, end))
        at = end
    return spans


@torch.no_grad()
def eval_sliding(model: GPT, val: Tensor, args: type[Args], ranks: Ranks, tables: ByteTables) -> tuple[float, float]:
    """Plain sliding window with the frozen model. A reference for the log."""
    total = val.numel() - 1
    spans = ranks.mine(sliding_spans(total, args.eval_seq_len, args.eval_stride))
    width = min(args.eval_seq_len, total)
    offsets = torch.arange(width)
    score = torch.compile(model, dynamic=False)
    tally = Tally(ranks, tables)
    for a in range(0, len(spans), args.eval_rows):
        batch = spans[a : a + args.eval_rows]
        lack = args.eval_rows - len(batch)
        batch = batch + [(0, 0, 0)] * lack
        start, lo, hi = (torch.tensor(col) for col in zip(*batch))
        index = start[:, None] + offsets[None, :]
        counted = ((index >= lo[:, None]) & (index < hi[:, None])).to(ranks.device)
        x = val[index].to(ranks.device, torch.int64)
        y = val[index + 1].to(ranks.device, torch.int64)
        tally.add(score(x, y, block_masks(x, args)), x, y, counted)
    return tally.close(expected=total)


def split_documents(val: Tensor, bos_id: int) -> list[tuple[int, int]]:
    """(start, number of targets) of each document. The next document's BOS is the last target of this one."""
    starts = (val == bos_id).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        starts = [0, *starts]
    ends = [*starts[1:], val.numel() - 1]
    return [(s, e - s) for s, e in zip(starts, ends) if e > s]


def group_documents(docs: list[tuple[int, int]], size: int, chunk: int) -> list[list[tuple[int, int]]]:
    """Groups of about equal numbers of chunks, the long ones first. Every document has its own LoRA, so order is free."""
    ranked = sorted(docs, key=lambda d: (-math.ceil(d[1] / chunk), d[0]))
    return [ranked[i : i + size] for i in range(0, len(ranked), size)]


class DocBatch:
    """The documents of one group as rows of padded tokens on the device."""

    def __init__(self, val: Tensor, group: list[tuple[int, int]], rows: int, chunk: int, device: torch.device) -> None:
        self.chunk = chunk
        self.chunks = max(math.ceil(n / chunk) for _, n in group)
        self.tokens = torch.zeros(rows, self.chunks * chunk + 1, dtype=torch.int64)
        lengths = torch.zeros(rows, dtype=torch.int64)
        for row, (start, n) in enumerate(group):
            self.tokens[row, : n + 1] = val[start : start + n + 1].to(torch.int64)
            lengths[row] = n
        self.tokens = self.tokens.to(device)
        self.lengths = lengths.to(device)

    def window(self, c: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and the mask of the targets that belong to chunk c, with up to `context` tokens in all."""
        lo, hi = c * self.chunk, (c + 1) * self.chunk
        left = max(0, hi - context)
        x = self.tokens[:, left:hi]
        y = self.tokens[:, left + 1 : hi + 1]
        place = torch.arange(left, hi, device=x.device)[None, :]
        counted = (place >= lo) & (place < self.lengths[:, None])
        return x, y, counted

    def goes_on(self, c: int) -> Tensor:
        return self.lengths > (c + 1) * self.chunk


def lora_step(step_model, lora: DocLoRA, opt, x: Tensor, y: Tensor, masks, weight: Tensor) -> None:
    """One step on a chunk that is already scored; `weight` sums to one in every row that has more to come."""
    opt.zero_grad(set_to_none=True)
    with torch.enable_grad():
        nll = step_model(x, y, masks, lora)
        (nll * weight).sum().backward()
    opt.step()


def eval_ttt(
    model: GPT, val: Tensor, args: type[Args], ranks: Ranks, tables: ByteTables, log: Log
) -> tuple[float, float]:
    """Score-first test-time training. A chunk is scored with what the document's earlier chunks taught, then learnt."""
    docs = split_documents(val, args.bos_id)
    groups = ranks.mine(group_documents(docs, args.ttt_docs, args.ttt_chunk))
    step_model = torch.compile(model, dynamic=False)
    lora = DocLoRA(args.ttt_docs, model, args.ttt_rank, args.ttt_alpha)
    tally = Tally(ranks, tables)
    began = time.perf_counter()
    for g, group in enumerate(groups):
        lora.reset()
        opt = torch.optim.Adam(lora.parameters(), lr=args.ttt_lr, betas=(0.9, 0.95), eps=1e-10)
        batch = DocBatch(val, group, args.ttt_docs, args.ttt_chunk, ranks.device)
        for c in range(batch.chunks):
            x, y, counted = batch.window(c, args.ttt_context)
            masks = block_masks(x, args)
            with torch.no_grad():
                nll = step_model(x, y, masks, lora)
            tally.add(nll, x, y, counted)
            if c + 1 == batch.chunks:
                break
            weight = (counted & batch.goes_on(c)[:, None]).float()
            weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1.0)
            for _ in range(args.ttt_epochs):
                lora_step(step_model, lora, opt, x, y, masks, weight)
        if g % 20 == 0:
            nats, tokens, nbytes = tally.sums.tolist()
            log(
                f"ttt group:{g + 1}/{len(groups)} chunks:{batch.chunks} so_far_bpb:{nats / math.log(2.0) / nbytes:.4f} "
                f"time:{time.perf_counter() - began:.1f}s"
            )
    return tally.close(expected=val.numel() - 1)


def evaluate(args: type[Args], ranks: Ranks, val: Tensor, tables: ByteTables, log: Log, longest: int) -> None:
    ranks.barrier()
    clock = Clock()
    clock.go()
    model = read_artifact(args, ranks, longest)
    loss, bpb = eval_sliding(model, val, args, ranks, tables)
    slid = ranks.largest(clock.seconds())
    log(f"sliding_window (reference) val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{args.eval_stride} time:{slid:.1f}s")
    torch._dynamo.reset()
    loss, bpb = eval_ttt(model, val, args, ranks, tables, log)
    clock.pause()
    spent = ranks.largest(clock.seconds())
    log(f"legal_ttt val_loss:{loss:.4f} val_bpb:{bpb:.4f} time:{spent - slid:.1f}s")
    log(f"eval_time_total:{spent:.1f}s limit:{args.eval_budget_seconds:.0f}s")
    if spent > args.eval_budget_seconds:
        raise RuntimeError(f"evaluation took {spent:.1f} s")
    log(f"final_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


# -----------------------------------------------------------------------------
# main
# -----------------------------------------------------------------------------


def set_up(args: type[Args]) -> None:
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    torch._inductor.config.coordinate_descent_tuning = False


def machine() -> str:
    try:
        return subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True).stdout
    except FileNotFoundError:
        return "no nvidia-smi"


def main() -> None:
    args = Args
    ranks = Ranks()
    log = Log(ranks, args.run_id)
    set_up(args)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    log(machine(), console=False)

    tables = ByteTables(args.tokenizer_path, args.vocab_size, ranks.device)
    val = read_validation(args.val_files)
    train_files = sorted(glob.glob(args.train_files))
    log(f"train_shards:{len(train_files)} val_tokens:{val.numel() - 1}")

    longest = max(args.train_batch_tokens // 8, args.eval_seq_len * 8, args.gptq_batch_tokens)
    model = GPT(args, longest).to(ranks.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())} world_size:{ranks.world} accum:{ranks.accum}")
    log(f"seed:{args.seed} long_window:{args.long_window} short_window:{args.short_window}")

    # training, calibration, quantisation and packing all lie under the one cap
    monitor = Monitor(val, args, ranks, tables, log)
    clock, loader = train(model, args, ranks, log, monitor)
    trained = clock.seconds()
    hessians = collect_hessians(model, loader, args, ranks)
    packed = quantise(model, hessians, args, ranks)
    if ranks.master:
        write_artifact(packed, args, log)
    ranks.barrier()
    clock.pause()
    spent = ranks.largest(clock.seconds())
    log(f"gptq+packing took {spent - trained:.1f}s, train+gptq+packing {spent:.1f}s of {args.max_wallclock_seconds:.0f}s")
    if spent > args.max_wallclock_seconds:
        raise RuntimeError(f"training took {spent:.1f} s")

    del loader, hessians, packed, model, monitor
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    evaluate(args, ranks, val, tables, log, longest)
    ranks.close()


if __name__ == "__main__":
    main()
