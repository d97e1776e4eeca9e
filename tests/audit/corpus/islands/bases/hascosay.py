"""Parameter Golf submission: 10 layers x 512, grouped-query attention, U-Net skips, tied embedding, Muon + AdamW, EMA,
int6 matrices / int8 embedding + lzma, sliding-window evaluation with score-first test-time training.

Run from this folder:  torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import json
import lzma
import math
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Hyperparameters:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 9000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    wallclock_reserve_seconds = float(os.environ.get("WALLCLOCK_RESERVE_SECONDS", 6.0))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 10))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 32))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

    # optimizers
    embed_lr = float(os.environ.get("EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # artifact
    clip_quantile = float(os.environ.get("CLIP_QUANTILE", 0.99995))
    max_total_bytes = 16_000_000

    # evaluation
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32_768))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 2))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))


# -----------------------------------------------------------------------------
# Muon


def zeropower_via_newtonschulz5(grad: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = grad.bfloat16()
    x = x / (x.norm() + eps)
    transposed = x.size(0) > x.size(1)
    if transposed:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the matrices are shared out among the ranks and the updates gathered by a sum."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay),
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
            flat = torch.zeros(sum(int(p.numel()) for p in params), device=params[0].device, dtype=torch.bfloat16)
            offset = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    update = p.grad.add(buf, alpha=group["momentum"])
                    update = zeropower_via_newtonschulz5(update, group["backend_steps"])
                    update = update * max(1, update.size(0) / update.size(1)) ** 0.5
                    flat[offset : offset + p.numel()] = update.reshape(-1)
                offset += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            offset = 0
            for p in params:
                update = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
                offset += p.numel()


# -----------------------------------------------------------------------------
# data


def load_data_shard(path: Path) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header in {path}")
    num_tokens = int(header[2])
    expected = 256 * 4 + num_tokens * 2
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {expected}")
    tokens = np.fromfile(path, dtype="<u2", count=num_tokens, offset=256 * 4)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


class TokenStream:
    """The training shards, one after the other, forever."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no files for {pattern}")
        self.index = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.index = (self.index + 1) % len(self.files)
                self.tokens = load_data_shard(self.files[self.index])
                self.pos = 0
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


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


def load_validation_tokens(pattern: str) -> Tensor:
    """The whole validation stream, uncut."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no files for {pattern}")
    return torch.cat([load_data_shard(f) for f in files]).contiguous()


def build_byte_tables(tokenizer_path: str, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: its bytes without the leading space; whether it has one; whether it is a boundary (no text)."""
    sp = spm.SentencePieceProcessor(model_file=tokenizer_path)
    sp_vocab = int(sp.vocab_size())
    size = max(sp_vocab, vocab_size)
    base_bytes = np.zeros(size, dtype=np.int16)
    has_space = np.zeros(size, dtype=np.bool_)
    boundary = np.ones(size, dtype=np.bool_)
    for token in range(sp_vocab):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        boundary[token] = False
        if sp.is_byte(token):
            base_bytes[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("\u2581"):
            has_space[token] = True
            piece = piece[1:]
        base_bytes[token] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(has_space, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


def target_bytes(luts: tuple[Tensor, Tensor, Tensor], prev: Tensor, target: Tensor) -> Tensor:
    """UTF-8 bytes of the original text of each target token (a space after a boundary is none of the text)."""
    base_bytes, has_space, boundary = luts
    return base_bytes[target].to(torch.float64) + (has_space[target] & ~boundary[prev]).to(torch.float64)


# -----------------------------------------------------------------------------
# model


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights in fp32, computed in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float, max_len: int):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", freqs.cos()[None, None], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, None], persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(-2)
        cos, sin = self.cos[:, :, :n].to(x.dtype), self.sin[:, :, :n].to(x.dtype)
        rot, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = rot.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        self.num_heads, self.num_kv_heads = args.num_heads, args.num_kv_heads
        self.head_dim = args.model_dim // args.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(args.model_dim, args.model_dim, bias=False)
        self.c_k = CastedLinear(args.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(args.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(args.model_dim, args.model_dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((args.num_heads,), args.qk_gain_init))
        self.rotary = Rotary(args.rope_dims, args.rope_base, max(args.train_seq_len, args.eval_seq_len))

    def forward(self, x: Tensor) -> Tensor:
        bsz, n, dim = x.shape
        q = self.c_q(x).reshape(bsz, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        q = self.rotary(q) * self.q_gain.to(q.dtype)[None, :, None, None]
        k = self.rotary(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.proj(y.transpose(1, 2).reshape(bsz, n, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        hidden = int(mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, args: type[Hyperparameters], layer: int):
        super().__init__()
        self.norm = RMSNorm()
        self.attn = CausalSelfAttention(args)
        self.mlp = MLP(args.model_dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(args.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(args.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(args.model_dim), torch.zeros(args.model_dim))))
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.norm(x) * self.depth_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.norm(x) * self.depth_scale)


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.num_encoder = args.num_layers // 2
        self.num_decoder = args.num_layers - self.num_encoder
        self.skip_weights = nn.Parameter(torch.ones(min(self.num_encoder, self.num_decoder), args.model_dim))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        nn.init.normal_(self.tok_emb.weight, std=args.tied_embed_init_std)
        for name, module in self.named_modules():
            if isinstance(module, CastedLinear):
                if name.endswith("proj"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def forward_hidden(self, input_ids: Tensor) -> Tensor:
        x = F.rms_norm(self.tok_emb(input_ids), (self.tok_emb.embedding_dim,))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder):
            if skips:
                x = x + self.skip_weights[i].to(x.dtype) * skips.pop()
            x = self.blocks[self.num_encoder + i](x, x0)
        return self.final_norm(x)

    def logits_from_hidden(self, hidden: Tensor) -> Tensor:
        raw = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        return self.logit_softcap * torch.tanh(raw / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.logits_from_hidden(self.forward_hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1))


# -----------------------------------------------------------------------------
# artifact: int6 per row for matrices, int8 per row for the embedding, fp16 for the rest


def quantize_rows(weight: Tensor, limit: int, quantile: float) -> tuple[Tensor, Tensor]:
    w = weight.detach().float()
    clip = torch.quantile(w.abs(), quantile, dim=1).clamp_min(1e-8)
    scale = (clip / limit).to(torch.float16)
    safe = scale.float().clamp_min(1e-8)
    q = torch.clamp(torch.round(w / safe[:, None]), -limit, limit).to(torch.int8)
    return q.cpu(), scale.cpu()


def quantize_state_dict(state: dict[str, Tensor], quantile: float) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.numel() > 65_536:
            limit = 127 if "tok_emb" in name else 31
            out[name + ".q"], out[name + ".scale"] = quantize_rows(tensor, limit, quantile)
        else:
            out[name] = tensor.detach().to(torch.float16).cpu()
    return out


def dequantize_state_dict(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if name.endswith(".scale"):
            continue
        if name.endswith(".q"):
            scale = packed[name[:-2] + ".scale"].float()
            state[name[:-2]] = tensor.float() * scale[:, None]
        else:
            state[name] = tensor.float()
    return state


def write_artifact(path: Path, state: dict[str, Tensor], quantile: float) -> int:
    buffer = io.BytesIO()
    torch.save(quantize_state_dict(state, quantile), buffer)
    path.write_bytes(lzma.compress(buffer.getvalue(), preset=6))
    return path.stat().st_size


def read_artifact(path: Path) -> dict[str, Tensor]:
    raw = lzma.decompress(path.read_bytes())
    return dequantize_state_dict(torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True))


# -----------------------------------------------------------------------------
# evaluation


def reduce_sums(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    """Loss per token in nats and bits per byte over all ranks."""
    if dist.is_available() and dist.is_initialized():
        for part in (loss_sum, token_count, byte_count):
            dist.all_reduce(part, op=dist.ReduceOp.SUM)
    val_loss = (loss_sum / token_count).item()
    val_bpb = (loss_sum / (math.log(2.0) * byte_count)).item()
    return val_loss, val_bpb


def eval_val(args, model, rank, world_size, device, val_tokens, luts) -> tuple[float, float]:
    """Plain windows side by side, for the log during training; the last one may be short."""
    total = val_tokens.numel() - 1
    seq_len = args.train_seq_len
    sums = [torch.zeros((), device=device, dtype=torch.float64) for _ in range(3)]
    whole = total // seq_len
    jobs = [(i * seq_len, min(64, whole - i) * seq_len) for i in range(0, whole, 64)]
    if total % seq_len:
        jobs.append((whole * seq_len, total % seq_len))
    model.eval()
    with torch.inference_mode():
        for start, length in jobs[rank::world_size]:
            local = val_tokens[start : start + length + 1].to(device=device, dtype=torch.int64)
            rows = max(length // seq_len, 1)
            x, y = local[:-1].reshape(rows, -1), local[1:].reshape(rows, -1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(x)
            nll = F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none")
            sums[0] += nll.to(torch.float64).sum()
            sums[1] += length
            sums[2] += target_bytes(luts, x.reshape(-1), y.reshape(-1)).sum()
    model.train()
    return reduce_sums(*sums)


def eval_val_sliding_ttt(args, model, rank, world_size, device, val_tokens, luts, log0) -> tuple[float, float]:
    """Score-first TTT: a chunk is scored in sliding windows under weights built from earlier chunks, then trained on."""
    seq_len, stride, chunk = args.eval_seq_len, args.eval_stride, args.ttt_chunk_tokens
    total = val_tokens.numel() - 1
    ctx = seq_len - stride
    num_chunks = (total + chunk - 1) // chunk
    by_chunk: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in range(0, total, stride):
        if ws == 0 or ws + ctx < total:
            by_chunk[(0 if ws == 0 else ws + ctx) // chunk].append(ws)
    loss_sum, token_count, byte_count = (torch.zeros((), device=device, dtype=torch.float64) for _ in range(3))
    frozen = {f"blocks.{i}." for i in range(args.ttt_freeze_blocks)}
    params = [p for n, p in model.named_parameters() if not any(n.startswith(f) for f in frozen)]
    for n, p in model.named_parameters():
        p.requires_grad_(not any(n.startswith(f) for f in frozen))
    optimizer = torch.optim.SGD(params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    compiled_logits = torch.compile(model.forward_logits, dynamic=False)
    t0 = time.perf_counter()
    for ci, windows in enumerate(by_chunk):
        mine = windows[len(windows) * rank // world_size : len(windows) * (rank + 1) // world_size]
        model.eval()
        with torch.inference_mode():
            for b in range(0, len(mine), args.eval_batch_seqs):
                batch = mine[b : b + args.eval_batch_seqs]
                x = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=device)
                y = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=device)
                for i, ws in enumerate(batch):
                    tok = val_tokens[ws : min(ws + seq_len, total) + 1].to(device=device, dtype=torch.int64)
                    x[i, : tok.numel() - 1], y[i, : tok.numel() - 1] = tok[:-1], tok[1:]
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = compiled_logits(x)
                nll = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
                for i, ws in enumerate(batch):
                    s, n = (0 if ws == 0 else ctx), min(seq_len, total - ws)
                    loss_sum += nll[i, s:n].to(torch.float64).sum()
                    token_count += n - s
                    byte_count += target_bytes(luts, x[i, s:n], y[i, s:n]).sum()
        start = ci * chunk
        rows = (min(start + chunk, total) - start) // seq_len
        if ci == num_chunks - 1 or rows < world_size:
            continue
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
        per_rank = rows // world_size
        for _ in range(args.ttt_epochs):
            for r in range(0, per_rank, args.ttt_batch_seqs):
                a = start + (rank * per_rank + r) * seq_len
                k = min(args.ttt_batch_seqs, per_rank - r)
                tok = val_tokens[a : a + k * seq_len + 1].to(device=device, dtype=torch.int64)
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(tok[:-1].reshape(k, seq_len), tok[1:].reshape(k, seq_len))
                loss.backward()
                if world_size > 1:
                    for p in params:
                        dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
                torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
                optimizer.step()
        if ci % 100 == 0:
            log0(f"ttt_chunk {ci + 1}/{num_chunks} time:{time.perf_counter() - t0:.1f}s")
    return reduce_sums(loss_sum, token_count, byte_count)


# -----------------------------------------------------------------------------
# training


class EMA:
    """A running average of the weights, in fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for n, t in model.state_dict().items():
            self.shadow[n].lerp_(t.detach().float(), 1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({n: t.to(current[n].dtype) for n, t in self.shadow.items()}, strict=True)


def build_optimizers(args, model: GPT) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and p.size(0) > 2]
    scalars = [p for p in model.blocks.parameters() if p.ndim < 2 or p.size(0) <= 2] + [model.skip_weights]
    muon = Muon(matrices, args.matrix_lr, args.muon_momentum, args.muon_backend_steps, args.muon_wd)
    for group in muon.param_groups:
        group["base_lr"] = args.matrix_lr
    adam = torch.optim.AdamW(
        [
            {"params": [model.tok_emb.weight], "lr": args.embed_lr, "base_lr": args.embed_lr},
            {"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr},
        ],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    return [muon, adam]


def lr_scale(args, step: int, elapsed_ms: float, cap_ms: float) -> float:
    """1, then a straight line to 0 over the last `warmdown_iters` steps, counted in time where time is what ends."""
    if args.warmdown_iters <= 0:
        return 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(cap_ms - elapsed_ms, 0.0)
    by_time = remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0
    by_step = (args.iterations - step) / args.warmdown_iters
    return max(min(by_time, by_step, 1.0), 0.0)


def setup_distributed() -> tuple[bool, int, int, torch.device]:
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size <= 0 or 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    return distributed, rank, world_size, device


def make_logger(args, rank: int):
    path = None
    if rank == 0:
        os.makedirs("logs", exist_ok=True)
        path = f"logs/{args.run_id}.txt"
        print(path)

    def log0(message: str, console: bool = True) -> None:
        if rank != 0:
            return
        if console:
            print(message, flush=True)
        with open(path, "a", encoding="utf-8") as f:
            print(message, file=f)

    return log0


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def train_micro_steps(args, model, loader, distributed: bool, accum: int) -> Tensor:
    """Forward and backward over one global batch; returns the mean loss of this rank."""
    total = torch.zeros((), device=loader.device)
    for micro in range(accum):
        if distributed:
            model.require_backward_grad_sync = micro == accum - 1
        x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, accum)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
            loss = model(x, y)
        total += loss.detach()
        (loss / accum).backward()
    return total / accum


def warm_up(args, model, base_model, optimizers, rank, world_size, device, distributed, accum, log0) -> None:
    """Compiles forward, backward and the optimizers on training batches, then puts the first state back."""
    if args.warmup_steps <= 0:
        return
    weights = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
    states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    model.train()
    for step in range(args.warmup_steps):
        train_micro_steps(args, model, loader, distributed, accum)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
    log0(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")
    base_model.load_state_dict(weights, strict=True)
    for opt, state in zip(optimizers, states, strict=True):
        opt.load_state_dict(state)
        opt.zero_grad(set_to_none=True)


def train(args, base_model, model, optimizers, val_tokens, luts, rank, world_size, device, distributed, log0) -> None:
    accum = 8 // world_size
    warm_up(args, model, base_model, optimizers, rank, world_size, device, distributed, accum, log0)
    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    ema = EMA(base_model, args.ema_decay)
    cap_ms = 1000.0 * (args.max_wallclock_seconds - args.wallclock_reserve_seconds)
    training_ms = 0.0
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step, stop_after = 0, None
    while True:
        last = step == args.iterations or (stop_after is not None and step >= stop_after)
        if args.val_loss_every > 0 and (last or step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            training_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, base_model, rank, world_size, device, val_tokens, luts)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_ms:.0f}ms step_avg:{training_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last:
            if stop_after is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_ms:.0f}ms step:{step}/{args.iterations}")
            break
        elapsed_ms = training_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, cap_ms)
        train_loss = train_micro_steps(args, model, loader, distributed, accum)
        frac = min(step / max(args.muon_momentum_warmup_steps, 1), 1.0)
        momentum = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for group in optimizers[0].param_groups:
            group["momentum"] = momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        ema.update(base_model)
        step += 1
        elapsed_ms = training_ms + 1000.0 * (time.perf_counter() - t0)
        if step <= 10 or step % args.train_log_every == 0:
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / step:.2f}ms"
            )
        reached = elapsed_ms >= cap_ms
        if distributed:
            flag = torch.tensor(int(reached), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached = bool(flag.item())
        if stop_after is None and reached:
            stop_after = step
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    log0("ema: applying EMA weights")
    ema.copy_to(base_model)


def save_artifact(args, base_model, rank: int, distributed: bool, log0) -> Path:
    """Packs the weights, checks the size, and leaves one file for all ranks."""
    path = Path("final_model.int6.ptz")
    if rank == 0:
        model_bytes = write_artifact(path, base_model.state_dict(), args.clip_quantile)
        code_bytes = Path(__file__).stat().st_size
        log0(f"Serialized model int6+lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {model_bytes + code_bytes} bytes")
        if model_bytes + code_bytes > args.max_total_bytes:
            raise RuntimeError(f"artifact too large: {model_bytes + code_bytes} > {args.max_total_bytes}")
    if distributed:
        dist.barrier()
    return path


def environment_report(log0) -> None:
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)


def main() -> None:
    args = Hyperparameters
    distributed, rank, world_size, device = setup_distributed()
    log0 = make_logger(args, rank)
    log0(Path(__file__).read_text(encoding="utf-8"), console=False)
    environment_report(log0)
    seed_everything(args.seed)

    val_tokens = load_validation_tokens(args.val_files)
    luts = build_byte_tables(args.tokenizer_path, args.vocab_size, device)
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    base_model = GPT(args).to(device).float()
    optimizers = build_optimizers(args, base_model)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[device.index], broadcast_buffers=False) if distributed else compiled
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{8 // world_size} seed:{args.seed}")

    train(args, base_model, model, optimizers, val_tokens, luts, rank, world_size, device, distributed, log0)
    path = save_artifact(args, base_model, rank, distributed, log0)
    del model, compiled, optimizers, base_model
    torch.cuda.empty_cache()

    # From here on only the artifact counts: it is read back from disk.
    torch._dynamo.reset()
    eval_model = GPT(args).to(device).float()
    eval_model.load_state_dict(read_artifact(path), strict=True)
    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    val_loss, val_bpb = eval_val_sliding_ttt(
        args, eval_model, rank, world_size, device, val_tokens, luts, log0
    )
    torch.cuda.synchronize()
    log0(f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms")
    log0(json.dumps({"seed": args.seed, "stride": args.eval_stride, "chunk": args.ttt_chunk_tokens}), console=False)
    log0(f"final_ttt_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
