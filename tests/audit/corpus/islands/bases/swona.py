"""
train_gpt.py - 9L x 512, GQA, U-net skips, SP1024, int6 matrices + int8 embedding, lzma artifact.

Launch: RUN_ID=swona torchrun --standalone --nproc_per_node=8 train_gpt.py
One file: train for at most MAX_WALLCLOCK_SECONDS, write the artifact, read it back, evaluate what was read.
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
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# HYPERPARAMETERS
# -----------------------------


class Hyperparameters:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")

    # length of the run
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    reserve_seconds = float(os.environ.get("RESERVE_SECONDS", 12.0))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # evaluation
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 1024))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 256))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

    # optimiser
    embed_lr = float(os.environ.get("EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # artifact
    lzma_preset = int(os.environ.get("LZMA_PRESET", 9))
    size_limit = 16_000_000


CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")

# -----------------------------
# MUON
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
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
    """Momentum, then orthogonalised; the matrices are dealt out to the ranks and summed back."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, wd: float = 0.0, nesterov: bool = True):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, wd=wd, nesterov=nesterov)
        )

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr, momentum, wd = group["lr"], group["momentum"], group["wd"]
            total = sum(int(p.numel()) for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    if group["nesterov"]:
                        g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                g = flat[at : at + p.numel()].view_as(p).to(dtype=p.dtype)
                if wd > 0:
                    p.mul_(1.0 - lr * wd)
                p.add_(g, alpha=-lr)
                at += p.numel()


# -----------------------------
# TOKENIZER BYTES
# -----------------------------


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
    """Per token: its bytes without the leading space, whether it has one, whether it is a boundary (control) token."""
    size = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros((size,), dtype=np.int16)
    leading_space = np.zeros((size,), dtype=np.bool_)
    boundary = np.ones((size,), dtype=np.bool_)
    for token_id in range(int(sp.vocab_size())):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        boundary[token_id] = False
        if sp.is_byte(token_id):
            base_bytes[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("\u2581"):
            leading_space[token_id] = True
            piece = piece[1:]
        base_bytes[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(leading_space, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


def token_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts) -> Tensor:
    """Bytes of the text that each target stands for; the space of a word after a boundary token is no text."""
    base_bytes, leading_space, boundary = luts
    out = base_bytes[tgt_ids].to(torch.int32)
    return out + (leading_space[tgt_ids] & ~boundary[prev_ids]).to(torch.int32)


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    if file.stat().st_size != header_bytes + num_tokens * np.dtype("<u2").itemsize:
        raise ValueError(f"Shard size mismatch for {file}")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


class TokenStream:
    """Reads the training shards one after the other, round and round."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.file_idx = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def _advance_file(self) -> None:
        self.file_idx = (self.file_idx + 1) % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        chunks: list[Tensor] = []
        remaining = n
        while remaining > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self._advance_file()
                continue
            k = min(remaining, avail)
            chunks.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            remaining -= k
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class DistributedTokenLoader:
    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        span = local_tokens + 1
        chunk = self.stream.take(span * self.world_size)
        local = chunk[self.rank * span : (self.rank + 1) * span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None)


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._len = 0
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._len != seq_len or self._cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos = freqs.cos()[None, None]
            self._sin = freqs.sin()[None, None]
            self._len = seq_len
        return self._cos.to(dtype=dtype), self._sin.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float):
        super().__init__()
        assert dim % num_heads == 0 and num_heads % num_kv_heads == 0
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, base=rope_base)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin) * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        k = apply_rotary_emb(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        return self.proj(y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        self.fc = CastedLinear(dim, mlp_mult * dim, bias=False)
        self.proj = CastedLinear(mlp_mult * dim, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.fc(x), negative_slope=0.5)
        return self.proj(x.square())


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int, rope_base: float, qk_gain: float):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(self.attn_norm(x))
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skips = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList(
            Block(args.model_dim, args.num_heads, args.num_kv_heads, args.mlp_mult, args.rope_base, args.qk_gain_init)
            for _ in range(args.num_layers)
        )
        self.final_norm = RMSNorm()
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = F.rms_norm(self.tok_emb(input_ids), (self.tok_emb.weight.size(1),))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0)
        logits = F.linear(self.final_norm(x), self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1))


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or any(p in name for p in CONTROL_PATTERNS)) and param.dtype != torch.float32:
                param.data = param.data.float()


# -----------------------------
# QUANTISATION
# -----------------------------

CLIP_GRID = (1.0, 0.9999, 0.9995, 0.999, 0.998)


def quantize_rows(w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Symmetric per-row integers in [-top, top]; the clip of the row is the one of the grid with the least error."""
    w32 = w.float()
    best_q = best_s = best_err = None
    for q in CLIP_GRID:
        clip = w32.abs().amax(dim=1) if q >= 1.0 else torch.quantile(w32.abs(), q, dim=1)
        scale = (clip / top).clamp_min(1e-8).to(torch.float16)
        s32 = scale.float()[:, None]
        qi = torch.clamp(torch.round(w32 / s32), -top, top)
        err = (qi * s32 - w32).square().sum(dim=1)
        if best_err is None:
            best_q, best_s, best_err = qi, scale, err
        else:
            better = err < best_err
            best_q = torch.where(better[:, None], qi, best_q)
            best_s = torch.where(better, scale, best_s)
            best_err = torch.where(better, err, best_err)
    return best_q.to(torch.int8), best_s


def quantize_state_dict(state: dict[str, Tensor]) -> dict[str, object]:
    out: dict[str, object] = {"q": {}, "s": {}, "raw": {}}
    for name, t in state.items():
        t = t.detach().cpu().contiguous()
        if t.ndim == 2 and not any(p in name for p in CONTROL_PATTERNS):
            q, s = quantize_rows(t, 127 if name.startswith("tok_emb") else 31)
            out["q"][name] = q
            out["s"][name] = s
        else:
            out["raw"][name] = t.to(torch.float16) if t.is_floating_point() else t
    return out


def dequantize_state_dict(obj: dict[str, object]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, q in obj["q"].items():
        state[name] = (q.float() * obj["s"][name].float()[:, None]).contiguous()
    for name, t in obj["raw"].items():
        state[name] = t.float() if t.is_floating_point() else t
    return state


def write_artifact(path: str, obj: dict[str, object], preset: int) -> int:
    buf = io.BytesIO()
    torch.save(obj, buf)
    blob = lzma.compress(buf.getvalue(), preset=preset)
    with open(path, "wb") as f:
        f.write(blob)
    return len(blob)


def read_artifact(path: str) -> dict[str, object]:
    with open(path, "rb") as f:
        return torch.load(io.BytesIO(lzma.decompress(f.read())), map_location="cpu")


# -----------------------------
# EVALUATION
# -----------------------------


def window_plan(first: int, last: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows over the targets first..last-1 (target i is token i+1): (start, end, number of targets already scored).
    The first window is scored whole, each later one from where the one before it ended, the last may be short."""
    plan: list[tuple[int, int, int]] = []
    start = done = first
    while done < last:
        end = min(start + seq_len, last)
        plan.append((start, end, done - start))
        done = end
        start += stride
    return plan


def rank_span(n_targets: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous share of the targets of one rank; the shares cover all of them and do not overlap."""
    return n_targets * rank // world_size, n_targets * (rank + 1) // world_size


def stack_windows(tokens: Tensor, windows: list[tuple[int, int, int]], seq_len: int, device: torch.device) -> Tensor:
    """Inputs of some windows, short ones padded with zeros at their end (attention is causal, so nothing sees it)."""
    x = torch.zeros(len(windows), seq_len, dtype=torch.int64)
    for i, (start, end, _) in enumerate(windows):
        x[i, : end - start] = tokens[start:end].to(torch.int64)
    return x.to(device, non_blocking=True)


def reduce_sums(*sums: Tensor) -> list[float]:
    """Sums over all ranks, in float64."""
    packed = torch.stack([s.to(torch.float64).reshape(()) for s in sums])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(packed, op=dist.ReduceOp.SUM)
    return [float(v) for v in packed.tolist()]


def eval_val(args, model, rank, world_size, device, val_tokens, luts):
    """Sliding windows over this rank's share of the targets; returns nats per token and bits per byte of the whole."""
    seq_len, stride = args.eval_seq_len, args.eval_stride
    first, last = rank_span(val_tokens.numel() - 1, rank, world_size)
    plan = window_plan(first, last, seq_len, stride)
    nll_sum = torch.zeros((), device=device, dtype=torch.float64)
    tok_sum = torch.zeros((), device=device, dtype=torch.float64)
    byte_sum = torch.zeros((), device=device, dtype=torch.float64)
    with torch.inference_mode():
        for at in range(0, len(plan), args.eval_batch_seqs):
            windows = plan[at : at + args.eval_batch_seqs]
            x = stack_windows(val_tokens, windows, seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(x)
            for i, (start, end, skip) in enumerate(windows):
                chunk = val_tokens[start + skip : end + 1].to(device=device, dtype=torch.int64)
                prev, tgt = chunk[:-1], chunk[1:]
                nll = F.cross_entropy(logits[i, skip : end - start].float(), tgt, reduction="none")
                nll_sum += nll.to(torch.float64).sum()
                tok_sum += tgt.numel()
                byte_sum += token_bytes(prev, tgt, luts).to(torch.float64).sum()
    nats, count, nbytes = reduce_sums(nll_sum, tok_sum, byte_sum)
    return nats / count, nats / math.log(2.0) / nbytes


# -----------------------------
# TRAINING
# -----------------------------


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, limit_ms: float | None) -> float:
    if args.warmdown_iters <= 0:
        return 1.0
    if limit_ms is None:
        start = max(args.iterations - args.warmdown_iters, 0)
        return max((args.iterations - step) / args.warmdown_iters, 0.0) if step >= start else 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    left_ms = max(limit_ms - elapsed_ms, 0.0)
    return left_ms / max(warmdown_ms, 1e-9) if left_ms <= warmdown_ms else 1.0


def build_optimizers(args: Hyperparameters, base_model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    named = list(base_model.blocks.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and not any(c in n for c in CONTROL_PATTERNS)]
    scalars = [p for n, p in named if p.ndim < 2 or any(c in n for c in CONTROL_PATTERNS)]
    scalars.append(base_model.skip_weights)
    adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    opt_tok = torch.optim.AdamW(
        [{"params": [base_model.tok_emb.weight], "lr": args.embed_lr, "base_lr": args.embed_lr}],
        weight_decay=args.adam_wd,
        **adam,
    )
    opt_scalar = torch.optim.AdamW(
        [{"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr}], weight_decay=0.0, **adam
    )
    muon = Muon(
        matrices,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        wd=args.muon_wd,
    )
    for group in muon.param_groups:
        group["base_lr"] = args.matrix_lr
    return [opt_tok, opt_scalar, muon], muon


def main() -> None:
    global zeropower_via_newtonschulz5
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # ---- distributed + CUDA
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
    grad_accum_steps = 8 // world_size
    grad_scale = 1.0 / grad_accum_steps
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    master = rank == 0
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    logfile = None
    if master:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{args.run_id}.txt"
        print(logfile)

    def log0(msg: str, console: bool = True) -> None:
        if not master:
            return
        if console:
            print(msg)
        with open(logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)

    log0(code, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    # ---- tokenizer
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match the tokenizer's {int(sp.vocab_size())}")
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"train_loader:dataset:{Path(args.data_path).name} shards:{len(glob.glob(args.train_files))}")

    # ---- model and optimisers
    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )
    optimizers, muon = build_optimizers(args, base_model)
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")

    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    def micro_steps() -> Tensor:
        """Gradients of one step; returns its loss."""
        loss_sum = torch.zeros((), device=device)
        for micro in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro == grad_accum_steps - 1
            x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            loss_sum += loss.detach()
            (loss * grad_scale).backward()
        return loss_sum / grad_accum_steps

    # ---- compile warm-up on training batches; the weights, the optimisers and the loader start again after it
    if args.warmup_steps > 0:
        initial = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
        initial_opt = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for _ in range(args.warmup_steps):
            zero_grad_all()
            micro_steps()
            for opt in optimizers:
                opt.step()
        base_model.load_state_dict(initial, strict=True)
        for opt, state in zip(optimizers, initial_opt, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
        log0(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")

    # ---- main loop
    ema = {n: t.detach().float().clone() for n, t in base_model.state_dict().items()}
    limit_ms = 1000.0 * (args.max_wallclock_seconds - args.reserve_seconds) if args.max_wallclock_seconds > 0 else None
    stop_after: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        elapsed_ms = 1000.0 * (time.perf_counter() - t0)
        if step >= args.iterations or (stop_after is not None and step >= stop_after):
            break
        scale = lr_scale(args, step, elapsed_ms, limit_ms)
        zero_grad_all()
        train_loss = micro_steps()
        frac = min(step / max(args.muon_momentum_warmup_steps, 1), 1.0)
        for group in muon.param_groups:
            group["momentum"] = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        with torch.no_grad():
            for n, t in base_model.state_dict().items():
                ema[n].mul_(args.ema_decay).add_(t.detach().float(), alpha=1.0 - args.ema_decay)
        step += 1
        elapsed_ms = 1000.0 * (time.perf_counter() - t0)
        if step <= 10 or step % args.train_log_every == 0:
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / step:.2f}ms"
            )
        reached = limit_ms is not None and elapsed_ms >= limit_ms
        if distributed and limit_ms is not None:
            flag = torch.tensor(int(reached), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached = bool(flag.item())
        if stop_after is None and reached:
            stop_after = step
    log0(f"stopped: train_time:{1000.0 * (time.perf_counter() - t0):.0f}ms step:{step}/{args.iterations}")
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- artifact: EMA weights, quantised without any data, compressed, written
    current = base_model.state_dict()
    base_model.load_state_dict({n: ema[n].to(dtype=current[n].dtype) for n in current}, strict=True)
    packed = quantize_state_dict(base_model.state_dict())
    if master:
        model_bytes = write_artifact(args.artifact_path, packed, args.lzma_preset)
        code_bytes = len(code.encode("utf-8"))
        log0(f"Serialized model int6+lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {model_bytes + code_bytes} bytes")
        if model_bytes + code_bytes > args.size_limit:
            raise RuntimeError(f"artifact too large: {model_bytes + code_bytes} > {args.size_limit}")
    if distributed:
        dist.barrier()

    # ---- evaluation of what stands on the disk
    del model, compiled_model, optimizers, muon, ema, packed
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    stored = read_artifact(args.artifact_path)
    eval_model = GPT(args).to(device).bfloat16()
    for module in eval_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(eval_model)
    eval_model.load_state_dict(dequantize_state_dict(stored), strict=True)
    eval_model.eval()
    eval_model.forward_logits = torch.compile(eval_model.forward_logits, dynamic=False, fullgraph=True)

    val_tokens = load_validation_tokens(args.val_files)
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")
    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    val_loss, val_bpb = eval_val(args, eval_model, rank, world_size, device, val_tokens, luts)
    torch.cuda.synchronize()
    eval_ms = 1000.0 * (time.perf_counter() - t_eval)
    log0(
        f"final_int6_lzma_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
        f"stride:{args.eval_stride} eval_time:{eval_ms:.0f}ms"
    )
    log0(f"final_int6_lzma_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
