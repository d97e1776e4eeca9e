"""
train_gpt.py -- 11 layers, 512 wide, SP1024, parallel Muon, SmearGate, EMA, int6 + lzma, sliding evaluation.

Everything that is counted lives in this file. Run on 8xH100:
    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import lzma
import math
import os
import random
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# ----------------------------------------------------------------------------
# HYPERPARAMETERS
# ----------------------------------------------------------------------------


class Hyperparameters:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # evaluation
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 0))

    # training length
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    stop_reserve_seconds = float(os.environ.get("STOP_RESERVE_SECONDS", 2.0))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))

    # optimizer
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_steps = int(os.environ.get("MUON_MOMENTUM_STEPS", 1500))
    muon_ns_steps = int(os.environ.get("MUON_NS_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # artifact
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit = 16_000_000


# ----------------------------------------------------------------------------
# MUON
# ----------------------------------------------------------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X /= X.norm() + eps
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            total = sum(p.numel() for p in params)
            updates = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(updates, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                g = updates[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["weight_decay"] > 0:
                    p.data.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                curr += p.numel()


# ----------------------------------------------------------------------------
# BYTE ACCOUNTING
# ----------------------------------------------------------------------------


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
    """Bytes of a piece without its leading space, whether it has one, and whether it is no text at all."""
    table = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros((table,), dtype=np.int16)
    has_space = np.zeros((table,), dtype=np.bool_)
    is_boundary = np.ones((table,), dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        is_boundary[i] = False
        if sp.is_byte(i):
            base_bytes[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("▁"):
            has_space[i] = True
            piece = piece[1:]
        base_bytes[i] = len(piece.replace("▁", " ").encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(has_space, dtype=torch.bool, device=device),
        torch.tensor(is_boundary, dtype=torch.bool, device=device),
    )


# ----------------------------------------------------------------------------
# DATA
# ----------------------------------------------------------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header for {file}")
    num_tokens = int(header[2])
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens.size != num_tokens:
        raise ValueError(f"short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no files match {pattern}")
    return torch.cat([load_data_shard(f) for f in files]).contiguous()


class TokenStream:
    """Reads the training shards one after the other, forever."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no files match {pattern}")
        self.file_idx = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        chunks: list[Tensor] = []
        left = n
        while left > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self.file_idx = (self.file_idx + 1) % len(self.files)
                self.tokens = load_data_shard(self.files[self.file_idx])
                self.pos = 0
                continue
            k = min(left, avail)
            chunks.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            left -= k
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class DistributedTokenLoader:
    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // self.world_size
        span = local + 1
        chunk = self.stream.take(span * self.world_size)
        start = self.rank * span
        part = chunk[start : start + span].to(dtype=torch.int64)
        x = part[:-1].reshape(-1, seq_len)
        y = part[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# ----------------------------------------------------------------------------
# MODEL
# ----------------------------------------------------------------------------

CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear")


class CastedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def restore_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            if (p.ndim < 2 or any(c in name for c in CONTROL_PATTERNS)) and p.dtype != torch.float32:
                p.data = p.data.float()


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        freqs = pos.float()[..., None] * self.inv_freq.to(pos.device)
        return freqs.cos()[:, None].to(dtype), freqs.sin()[:, None].to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init))
        self.rotary = Rotary(self.head_dim, rope_base)

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        B, T, D = x.shape
        q = self.c_q(x).reshape(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = F.rms_norm(q, (q.size(-1),)), F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(pos, q.dtype)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        hidden = int(mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class SmearGate(nn.Module):
    """Adds a part of the previous token's embedding; nothing is carried over into the first token of a document."""

    def __init__(self, dim: int):
        super().__init__()
        self.smear = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        prev = prev.masked_fill(first[..., None], 0.0)
        g = torch.sigmoid(self.smear).to(x.dtype)
        return (1 - g) * x + g * prev


class Block(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        dim = args.model_dim
        self.attn = CausalSelfAttention(dim, args.num_heads, args.num_kv_heads, args.rope_base, args.qk_gain_init)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))

    def forward(self, x: Tensor, x0: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(F.rms_norm(x, (x.size(-1),)), pos, mask)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(F.rms_norm(x, (x.size(-1),)))


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        self.bos_id = args.bos_id
        self.softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.smear_gate = SmearGate(args.model_dim)
        self.enc = args.num_layers // 2
        self.dec = args.num_layers - self.enc
        self.skip_weights = nn.Parameter(torch.ones(min(self.enc, self.dec), args.model_dim))
        self.blocks = nn.ModuleList([Block(args) for _ in range(args.num_layers)])
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                if name.endswith("proj"):
                    nn.init.zeros_(m.weight)
                else:
                    nn.init.orthogonal_(m.weight)

    def forward_logits(self, ids: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        if pos is None:
            pos = torch.arange(ids.size(1), device=ids.device)[None]
        x = F.rms_norm(self.tok_emb(ids), (self.tok_emb.embedding_dim,))
        x = self.smear_gate(x, ids == self.bos_id)
        x0, skips = x, []
        for i in range(self.enc):
            x = self.blocks[i](x, x0, pos, mask)
            skips.append(x)
        for i in range(self.dec):
            if skips:
                x = x + self.skip_weights[i].to(x.dtype) * skips.pop()
            x = self.blocks[self.enc + i](x, x0, pos, mask)
        x = F.rms_norm(x, (x.size(-1),))
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target.reshape(-1))


# ----------------------------------------------------------------------------
# WEIGHT AVERAGING
# ----------------------------------------------------------------------------


class Averager:
    """An exponential moving average of the weights, updated after every step."""

    def __init__(self, model: nn.Module, args: type[Hyperparameters]):
        self.decay = args.ema_decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, train_loss: Tensor, scale: float) -> None:
        for k, v in model.state_dict().items():
            self.shadow[k].mul_(self.decay).add_(v.detach().float(), alpha=1.0 - self.decay)

    def result(self) -> dict[str, Tensor]:
        return self.shadow


# ----------------------------------------------------------------------------
# QUANTISATION
# ----------------------------------------------------------------------------


def quantize_rows(w: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Per-row symmetric rounding; of five clips the one with the least squared error is kept."""
    w = w.float()
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best_q = torch.zeros_like(w, dtype=torch.int8)
    best_s = torch.ones(w.size(0), device=w.device)
    for clip in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        top = torch.quantile(w.abs(), clip, dim=1) if clip < 1.0 else w.abs().amax(dim=1)
        s = (top / levels).clamp_min(1e-8)
        q = torch.clamp(torch.round(w / s[:, None]), -levels, levels)
        err = (q * s[:, None] - w).square().sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_q[better] = q[better].to(torch.int8)
        best_s = torch.where(better, s, best_s)
    return best_q, best_s.half()


def quantize_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, t in state.items():
        if t.ndim == 2 and t.numel() > 65_536:
            q, s = quantize_rows(t, 127 if "tok_emb" in name else 31)
            out[name + ".q"], out[name + ".s"] = q.cpu(), s.cpu()
        else:
            out[name] = t.half().cpu() if t.is_floating_point() else t.cpu()
    return out


def dequantize_state(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, t in packed.items():
        if name.endswith(".q"):
            out[name[:-2]] = t.float() * packed[name[:-2] + ".s"].float()[:, None]
        elif not name.endswith(".s"):
            out[name] = t.float() if t.is_floating_point() else t
    return out


def write_artifact(path: str, state: dict[str, Tensor]) -> int:
    buf = io.BytesIO()
    torch.save(quantize_state(state), buf)
    blob = lzma.compress(buf.getvalue(), preset=9)
    Path(path).write_bytes(blob)
    return len(blob)


def read_artifact(path: str) -> dict[str, Tensor]:
    raw = lzma.decompress(Path(path).read_bytes())
    return dequantize_state(torch.load(io.BytesIO(raw), map_location="cpu"))


# ----------------------------------------------------------------------------
# EVALUATION
# ----------------------------------------------------------------------------


@torch.no_grad()
def evaluate(args, model, tables, val_tokens, rank, world_size, device, stride):
    """Sliding windows: the first is scored whole, each later one only in the part that is new."""
    base_bytes, has_space, is_boundary = tables
    seq_len = args.train_seq_len
    total = val_tokens.numel() - 1
    spans, done, begin = [], 0, 0
    while done < total:
        end = min(begin + seq_len, total)
        spans.append((begin, done, end))
        done = end
        begin = done + stride - seq_len if done + stride <= total else max(total - seq_len, 0)
    mine = spans[rank::world_size]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    tok_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    for at in range(0, len(mine), args.eval_batch_seqs):
        group = mine[at : at + args.eval_batch_seqs]
        x = torch.zeros(len(group), seq_len, dtype=torch.int64, device=device)
        y = torch.zeros(len(group), seq_len, dtype=torch.int64, device=device)
        keep = torch.zeros(len(group), seq_len, dtype=torch.bool, device=device)
        for r, (b, d, e) in enumerate(group):
            piece = val_tokens[b : e + 1].to(device=device, dtype=torch.int64)
            x[r, : e - b], y[r, : e - b] = piece[:-1], piece[1:]
            keep[r, d - b : e - b] = True
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = model.forward_logits(x)
        nll = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
        loss_sum += nll[keep].double().sum()
        tok_count += keep.sum()
        nbytes = base_bytes[y].to(torch.int32) + (has_space[y] & ~is_boundary[x]).to(torch.int32)
        byte_count += nbytes[keep].sum()
    if dist.is_available() and dist.is_initialized():
        for t in (loss_sum, tok_count, byte_count):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    model.train()
    val_loss = (loss_sum / tok_count).item()
    return val_loss, loss_sum.item() / math.log(2.0) / byte_count.item()


# ----------------------------------------------------------------------------
# CLOCK
# ----------------------------------------------------------------------------


class Clock:
    """Training time. Stands still while the mid-run validation is computed, which trains nothing."""

    def __init__(self, limit_s: float):
        self.limit_ms = 1000.0 * limit_s
        self.total_ms = 0.0
        self.t0 = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def stop(self) -> None:
        torch.cuda.synchronize()
        self.total_ms += 1000.0 * (time.perf_counter() - self.t0)
        self.t0 = None

    def elapsed_ms(self) -> float:
        running = 0.0 if self.t0 is None else 1000.0 * (time.perf_counter() - self.t0)
        return self.total_ms + running

    def over(self) -> bool:
        return self.elapsed_ms() >= self.limit_ms


# ----------------------------------------------------------------------------
# TRAINING
# ----------------------------------------------------------------------------


def build_optimizers(args, model):
    matrix, scalar = [], []
    for name, p in model.named_parameters():
        if name == "tok_emb.weight":
            continue
        (matrix if p.ndim == 2 and not any(c in name for c in CONTROL_PATTERNS) else scalar).append(p)
    betas = (args.beta1, args.beta2)
    embed_group = [{"params": [model.tok_emb.weight], "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}]
    opt_tok = torch.optim.AdamW(embed_group, betas=betas, eps=1e-8, weight_decay=args.adam_wd, fused=True)
    opt_muon = Muon(matrix, args.matrix_lr, args.muon_momentum, args.muon_ns_steps, args.muon_wd)
    scalar_group = [{"params": scalar, "lr": args.scalar_lr, "base_lr": args.scalar_lr}]
    opt_scalar = torch.optim.AdamW(scalar_group, betas=betas, eps=1e-8, weight_decay=args.adam_wd, fused=True)
    for g in opt_muon.param_groups:
        g["base_lr"] = args.matrix_lr
    return [opt_tok, opt_muon, opt_scalar]


def lr_scale(args, step: int, elapsed_ms: float, limit_ms: float) -> float:
    if args.warmdown_iters <= 0:
        return 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    left = max(limit_ms - elapsed_ms, 0.0)
    by_time = left / max(warmdown_ms, 1e-9) if left <= warmdown_ms else 1.0
    return min(by_time, max((args.iterations - step) / args.warmdown_iters, 0.0), 1.0)


def train_step(args, base_model, model, optimizers, loader, accum, step, scale):
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), device=loader.device)
    for micro in range(accum):
        if isinstance(model, DDP):
            model.require_backward_grad_sync = micro == accum - 1
        x, y = loader.next_batch(args.train_batch_tokens // accum, args.train_seq_len)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        loss_sum += loss.detach()
        (loss / accum).backward()
    frac = min(step / args.muon_momentum_steps, 1.0) if args.muon_momentum_steps > 0 else 1.0
    for group in optimizers[1].param_groups:
        group["momentum"] = (1 - frac) * args.muon_momentum_start + frac * args.muon_momentum
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * scale
    if args.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
    for opt in optimizers:
        opt.step()
    return loss_sum / accum


def agree(flag: bool, device: torch.device) -> bool:
    """True on every rank as soon as it is true on one."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    t = torch.tensor(int(flag), device=device)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return bool(t.item())


def warm_up(args, base_model, model, optimizers, accum, rank, world_size, device, log0) -> None:
    """Primes the compiled kernels on training batches, then puts weights and optimizers back as they were."""
    if args.warmup_steps <= 0:
        return
    weights = {k: v.detach().clone() for k, v in base_model.state_dict().items()}
    opt_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    for i in range(args.warmup_steps):
        train_step(args, base_model, model, optimizers, loader, accum, 0, 1.0)
        if i == 0 or i + 1 == args.warmup_steps:
            log0(f"warmup_step:{i + 1}/{args.warmup_steps}")
    base_model.load_state_dict(weights, strict=True)
    for opt, saved in zip(optimizers, opt_states, strict=True):
        opt.load_state_dict(saved)
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)


def main() -> None:
    args = Hyperparameters
    code = Path(__file__).read_text(encoding="utf-8")
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accum = max(8 // world_size, 1)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    logfile = f"logs/{args.run_id}.txt"
    if rank == 0:
        os.makedirs("logs", exist_ok=True)

    def log0(msg: str, console: bool = True) -> None:
        if rank == 0:
            if console:
                print(msg)
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0(f"Running Python {sys.version}", console=False)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    tables = build_byte_tables(sp, args.vocab_size, device)
    val_tokens = load_validation_tokens(args.val_files)
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    base_model = GPT(args).to(device).bfloat16()
    for m in base_model.modules():
        if isinstance(m, CastedLinear):
            m.float()
    restore_fp32(base_model)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled
    optimizers = build_optimizers(args, base_model)
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{accum} seed:{args.seed}")

    warm_up(args, base_model, model, optimizers, accum, rank, world_size, device, log0)

    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    averager = Averager(base_model, args)
    clock = Clock(args.max_wallclock_seconds - args.stop_reserve_seconds)
    clock.start()
    step = 0
    while step < args.iterations:
        if args.val_loss_every > 0 and step % args.val_loss_every == 0:
            clock.stop()
            vl, vb = evaluate(args, base_model, tables, val_tokens, rank, world_size, device, args.train_seq_len)
            log0(f"step:{step}/{args.iterations} val_loss:{vl:.4f} val_bpb:{vb:.4f} train_time:{clock.total_ms:.0f}ms")
            clock.start()
        scale = lr_scale(args, step, clock.elapsed_ms(), clock.limit_ms)
        train_loss = train_step(args, base_model, model, optimizers, loader, accum, step, scale)
        step += 1
        averager.update(base_model, step, train_loss, scale)
        if step <= 10 or step % args.train_log_every == 0:
            ms = clock.elapsed_ms()
            log0(f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} train_time:{ms:.0f}ms")
        if agree(clock.over(), device):
            log0(f"stopping_early: wallclock_cap train_time:{clock.elapsed_ms():.0f}ms step:{step}/{args.iterations}")
            break
    state = averager.result()
    clock.stop()
    log0(f"train_time:{clock.total_ms:.0f}ms peak memory: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    if rank == 0:
        write_artifact(args.artifact_path, state)
    if distributed:
        dist.barrier()
    model_bytes = os.path.getsize(args.artifact_path)
    code_bytes = len(code.encode("utf-8"))
    log0(f"Serialized model int6+lzma: {model_bytes} bytes")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size: {model_bytes + code_bytes} bytes")
    if model_bytes + code_bytes > args.size_limit:
        raise RuntimeError("over the size limit")

    eval_model = GPT(args).to(device)
    eval_model.load_state_dict(read_artifact(args.artifact_path), strict=True)
    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    val_loss, val_bpb = evaluate(args, eval_model, tables, val_tokens, rank, world_size, device, args.eval_stride)
    torch.cuda.synchronize()
    took = 1000.0 * (time.perf_counter() - t_eval)
    log0(f"final_int6_sliding val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{took:.0f}ms")
    log0(f"final_int6_sliding_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
