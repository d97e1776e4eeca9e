"""
housay: fork of the 9L baseline. What differs from it:
  - parameter banks: one 3-d tensor holds the same matrix of all layers, Muon runs Newton-Schulz on whole banks
  - no DDP: banks go reduce-scatter -> local NS5 -> all-gather, everything else is one flat all-reduce
  - value embeddings on two layers, XSA on the last four, RoPE on 16 of 64 head dims
  - int6 banks / int8 embeddings with AWQ-style input scaling, lzma container
  - score-first TTT on chunks, all ranks, AdamW with a cosine over the chunk's steps
  - causal hint: unigram and trigram counts of what has been scored, added to all the logits before the softmax
"""
from __future__ import annotations

import copy
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

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# -----------------------------
# SETTINGS
# -----------------------------


class Hyperparameters:
    # Data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Schedule
    iterations = int(os.environ.get("ITERATIONS", 9000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    # Activation statistics and quantisation belong to training, so the loop stops this much earlier.
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 24.0))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 524_288))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Shape
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    ve_dim = int(os.environ.get("VE_DIM", 128))
    ve_layers = os.environ.get("VE_LAYERS", "9,10")
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))

    # Optimizers
    embed_lr = float(os.environ.get("EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    embed_init_std = float(os.environ.get("EMBED_INIT_STD", 0.005))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_steps = int(os.environ.get("MUON_MOMENTUM_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # Quantisation
    calib_batches = int(os.environ.get("CALIB_BATCHES", 16))
    calib_seqs = int(os.environ.get("CALIB_SEQS", 8))
    awq_alphas = os.environ.get("AWQ_ALPHAS", "0,0.15,0.3,0.45,0.6")
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptx")

    # Evaluation
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_windows = int(os.environ.get("EVAL_BATCH_WINDOWS", 32))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 540.0))
    logit_temp = float(os.environ.get("LOGIT_TEMP", 1.0))

    # Test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 65_536))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_lr = float(os.environ.get("TTT_LR", 1e-4))
    ttt_min_lr_frac = float(os.environ.get("TTT_MIN_LR_FRAC", 0.05))
    ttt_wd = float(os.environ.get("TTT_WD", 0.0))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))

    # Causal hint
    hint_enabled = bool(int(os.environ.get("HINT_ENABLED", "1")))
    hint_buckets = int(os.environ.get("HINT_BUCKETS", 65_536))
    hint_uni = float(os.environ.get("HINT_UNI", 0.02))
    hint_tri = float(os.environ.get("HINT_TRI", 0.12))
    hint_kappa = float(os.environ.get("HINT_KAPPA", 24.0))
    hint_beta = float(os.environ.get("HINT_BETA", 8.0))


SIZE_LIMIT = 16_000_000
CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "ve_scale")

# -----------------------------
# PARALLEL MUON ON BANKS
# -----------------------------


def zeropower_bank(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz on a stack of matrices [B, M, N]; every matrix is orthogonalised on its own."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    transposed = X.size(-2) > X.size(-1)
    if transposed:
        X = X.mT
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X.mT if transposed else X


class BankMuon(torch.optim.Optimizer):
    """Muon where rank r owns the r-th slice of each bank's first dimension (padded to the world size)."""

    def __init__(self, banks: list[nn.Parameter], lr: float, momentum: float, backend_steps: int, wd: float):
        super().__init__(banks, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, wd=wd))
        self.world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.meta: list[dict] = []
        for p in banks:
            n = p.shape[0]
            padded = (n + self.world - 1) // self.world * self.world
            share = padded // self.world
            tail = p.shape[1:]
            self.meta.append(
                dict(
                    p=p,
                    n=n,
                    share=share,
                    grad_all=torch.zeros(padded, *tail, device=p.device, dtype=torch.bfloat16),
                    grad_own=torch.zeros(share, *tail, device=p.device, dtype=torch.bfloat16),
                    upd_all=torch.zeros(padded, *tail, device=p.device, dtype=torch.bfloat16),
                    momentum=torch.zeros(share, *tail, device=p.device, dtype=torch.float32),
                    gain=max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5,
                )
            )
        # Largest bank first: its communication hides behind the others' arithmetic.
        self.meta.sort(key=lambda m: -m["p"].numel())
        self._pending: list = []

    @torch.no_grad()
    def launch(self) -> None:
        """Start the reduce-scatters; call right after the last backward."""
        self._pending = []
        for m in self.meta:
            g = m["p"].grad
            m["grad_all"][: m["n"]].copy_(g)
            if self.world > 1:
                work = dist.reduce_scatter_tensor(m["grad_own"], m["grad_all"], op=dist.ReduceOp.AVG, async_op=True)
            else:
                m["grad_own"].copy_(m["grad_all"])
                work = None
            self._pending.append(work)

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        lr, momentum, wd = group["lr"], group["momentum"], group["wd"]
        gathers = []
        for m, work in zip(self.meta, self._pending, strict=True):
            if work is not None:
                work.wait()
            g = m["grad_own"].float()
            buf = m["momentum"]
            buf.mul_(momentum).add_(g)
            g = g.add(buf, alpha=momentum)
            upd = zeropower_bank(g, steps=group["backend_steps"])
            if self.world > 1:
                gathers.append(dist.all_gather_into_tensor(m["upd_all"], upd.contiguous(), async_op=True))
            else:
                m["upd_all"].copy_(upd)
                gathers.append(None)
        for m, work in zip(self.meta, gathers, strict=True):
            if work is not None:
                work.wait()
            p = m["p"]
            if wd > 0:
                p.mul_(1.0 - lr * wd)
            p.add_(m["upd_all"][: m["n"]].to(p.dtype), alpha=-lr * m["gain"])
        self._pending = []


def all_reduce_flat(params: list[nn.Parameter], world_size: int) -> None:
    """One all-reduce for the gradients of everything that is no bank."""
    if world_size == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1).float() for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    at = 0
    for g in grads:
        g.copy_(flat[at : at + g.numel()].view_as(g))
        at += g.numel()


# -----------------------------
# TOKENIZER BYTES
# -----------------------------


def build_byte_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
    """Per token id: bytes of its piece, whether it starts with a space, whether it is a control token."""
    size = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros((size,), dtype=np.int16)
    has_space = np.zeros((size,), dtype=np.bool_)
    is_boundary = np.ones((size,), dtype=np.bool_)
    for tid in range(int(sp.vocab_size())):
        if sp.is_control(tid) or sp.is_unknown(tid) or sp.is_unused(tid):
            continue
        is_boundary[tid] = False
        if sp.is_byte(tid):
            base_bytes[tid] = 1
            continue
        piece = sp.id_to_piece(tid)
        if piece.startswith("\u2581"):
            has_space[tid] = True
            piece = piece[1:]
        base_bytes[tid] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(has_space, dtype=torch.bool, device=device),
        torch.tensor(is_boundary, dtype=torch.bool, device=device),
    )


def token_bytes(luts, prev: Tensor, target: Tensor) -> Tensor:
    """Bytes of original text that each target stands for; the space at a document's start does not exist."""
    base_bytes, has_space, is_boundary = luts
    n = base_bytes[target].to(torch.int64)
    n = n + (has_space[target] & ~is_boundary[prev]).to(torch.int64)
    return n


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    header_bytes = 256 * np.dtype("<i4").itemsize
    if file.stat().st_size != header_bytes + 2 * num_tokens:
        raise ValueError(f"Shard size mismatch for {file}")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    tokens = torch.cat([load_data_shard(f) for f in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is too short")
    return tokens


class TokenStream:
    """Walks the shards in order, wraps around at the end."""

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
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        local_tokens = local_tokens // seq_len * seq_len
        span = local_tokens + 1
        chunk = self.stream.take(span * self.world_size)
        start = self.rank * span
        local = chunk[start : start + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Rotates the first `rope_dims` of every head; the others carry no position."""

    def __init__(self, rope_dims: int, base: float, max_len: int):
        super().__init__()
        self.rope_dims = rope_dims
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = x.size(1)
        cos, sin = self.cos[:, :t].to(x.dtype), self.sin[:, :t].to(x.dtype)
        rot, keep = x[..., : self.rope_dims], x[..., self.rope_dims :]
        half = self.rope_dims // 2
        x1, x2 = rot[..., :half], rot[..., half:]
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, keep), dim=-1)


class ValueEmbedding(nn.Module):
    """A second small embedding of the input ids, added to the values of some layers."""

    def __init__(self, vocab_size: int, ve_dim: int, kv_dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, ve_dim)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.proj = nn.Parameter(torch.zeros(kv_dim, ve_dim))
        nn.init.normal_(self.proj, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        e = self.embed(ids)
        return F.linear(e, self.proj.to(e.dtype))


class Block(nn.Module):
    """Everything of a layer but its matrices, which live in the banks."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rotary: Rotary, qk_gain: float, layer: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rotary = rotary
        self.use_xsa = False
        self.norm = RMSNorm()
        self.ln_factor = 1.0 / math.sqrt(layer + 1)
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain, dtype=torch.float32))
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        """XSA: what attention brings is made orthogonal to the position's own value."""
        b, t, h, d = y.shape
        grouped = y.reshape(b, t, self.num_kv_heads, h // self.num_kv_heads, d)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (grouped - (grouped * vn).sum(dim=-1, keepdim=True) * vn).reshape(b, t, h, d)

    def forward(self, x: Tensor, x0: Tensor, w: dict[str, Tensor], ve: Tensor | None, note) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        b, t, dim = x.shape

        h = self.norm(x) * self.ln_factor
        note("attn_in", h)
        q = F.linear(h, w["q"].to(h.dtype)).view(b, t, self.num_heads, self.head_dim)
        k = F.linear(h, w["k"].to(h.dtype)).view(b, t, self.num_kv_heads, self.head_dim)
        v = F.linear(h, w["v"].to(h.dtype)).view(b, t, self.num_kv_heads, self.head_dim)
        if ve is not None:
            v = v + ve.view_as(v).to(v.dtype)
        q = self.rotary(F.rms_norm(q, (self.head_dim,))) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = self.rotary(F.rms_norm(k, (self.head_dim,)))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.use_xsa:
            y = self.exclude_self(y, v)
        y = y.reshape(b, t, dim)
        note("attn_out", y)
        x = x + self.attn_scale.to(x.dtype) * F.linear(y, w["o"].to(y.dtype))

        h = self.norm(x) * self.ln_factor
        note("mlp_in", h)
        h = F.leaky_relu(F.linear(h, w["up"].to(h.dtype)), negative_slope=0.5).square()
        note("mlp_mid", h)
        return x + self.mlp_scale.to(x.dtype) * F.linear(h, w["down"].to(h.dtype))


# Where each bank's matrices stand and which activation they are multiplied with.
BANK_LAYOUT = {
    "qo_bank": (("q", "attn_in"), ("o", "attn_out")),
    "kv_bank": (("k", "attn_in"), ("v", "attn_in")),
    "up_bank": (("up", "mlp_in"),),
    "down_bank": (("down", "mlp_mid"),),
}


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        dim, layers = args.model_dim, args.num_layers
        head_dim = dim // args.num_heads
        kv_dim = head_dim * args.num_kv_heads
        hidden = int(dim * args.mlp_mult)
        self.num_layers = layers
        self.softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        nn.init.normal_(self.tok_emb.weight, std=args.embed_init_std)

        self.qo_bank = nn.Parameter(torch.empty(2 * layers, dim, dim))
        self.kv_bank = nn.Parameter(torch.empty(2 * layers, kv_dim, dim))
        self.up_bank = nn.Parameter(torch.empty(layers, hidden, dim))
        self.down_bank = nn.Parameter(torch.empty(layers, dim, hidden))
        self.init_banks()

        self.encoder_layers = layers // 2
        self.decoder_layers = layers - self.encoder_layers
        skips = min(self.encoder_layers, self.decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(skips, dim, dtype=torch.float32))
        max_len = max(args.train_seq_len, args.eval_seq_len)
        rotary = Rotary(args.rope_dims, args.rope_base, max_len)
        self.blocks = nn.ModuleList(
            [Block(dim, args.num_heads, args.num_kv_heads, rotary, args.qk_gain_init, i) for i in range(layers)]
        )
        for block in self.blocks[max(0, layers - args.xsa_last_n) :]:
            block.use_xsa = True
        self.ve_layers = [int(s) for s in args.ve_layers.split(",") if s.strip()]
        self.ve = ValueEmbedding(args.vocab_size, args.ve_dim, kv_dim) if self.ve_layers else None
        self.ve_scale = nn.Parameter(torch.full((max(1, len(self.ve_layers)),), 0.1, dtype=torch.float32))
        self.final_norm = RMSNorm()
        self.probe: dict[tuple[str, int], Tensor] | None = None

    @torch.no_grad()
    def init_banks(self) -> None:
        n = self.num_layers
        for i in range(n):
            nn.init.orthogonal_(self.qo_bank[i])
            nn.init.zeros_(self.qo_bank[n + i])
            nn.init.orthogonal_(self.kv_bank[i])
            nn.init.orthogonal_(self.kv_bank[n + i])
            nn.init.orthogonal_(self.up_bank[i])
            nn.init.zeros_(self.down_bank[i])

    def banks(self) -> list[nn.Parameter]:
        return [getattr(self, name) for name in BANK_LAYOUT]

    def layer_weights(self, i: int) -> dict[str, Tensor]:
        w = {}
        for bank, parts in BANK_LAYOUT.items():
            tensor = getattr(self, bank)
            for slot, (part, _) in enumerate(parts):
                w[part] = tensor[slot * self.num_layers + i]
        return w

    def note_for(self, layer: int):
        """Collects mean |x| per input channel while `probe` is a dict; free otherwise."""
        if self.probe is None:
            return lambda name, x: None

        def note(name: str, x: Tensor) -> None:
            stat = x.detach().float().abs().mean(dim=(0, 1))
            key = (name, layer)
            self.probe[key] = self.probe[key] + stat if key in self.probe else stat

        return note

    def run_block(self, i: int, x: Tensor, x0: Tensor, ve: Tensor | None) -> Tensor:
        own = None
        if ve is not None and i in self.ve_layers:
            own = ve * self.ve_scale[self.ve_layers.index(i)].to(ve.dtype)
        return self.blocks[i](x, x0, self.layer_weights(i), own, self.note_for(i))

    def forward_logits(self, ids: Tensor) -> Tensor:
        x = self.final_norm(self.tok_emb(ids))
        x0 = x
        ve = self.ve(ids) if self.ve is not None else None
        skips: list[Tensor] = []
        for i in range(self.encoder_layers):
            x = self.run_block(i, x, x0, ve)
            skips.append(x)
        for j in range(self.decoder_layers):
            if skips:
                x = x + self.skip_weights[j].to(x.dtype) * skips.pop()
            x = self.run_block(self.encoder_layers + j, x, x0, ve)
        x = self.final_norm(x)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1), reduction="mean")


# -----------------------------
# QUANTISATION (int6 / int8, AWQ-style input scaling)
# -----------------------------


@torch.no_grad()
def collect_activations(
    model: GPT, loader: DistributedTokenLoader, args: Hyperparameters, world_size: int
) -> dict[tuple[str, int], Tensor]:
    """Mean |activation| per input channel of every matrix, over batches of the training shards."""
    model.eval()
    model.probe = {}
    calib_tokens = args.calib_seqs * args.train_seq_len * world_size
    for _ in range(args.calib_batches):
        x, _y = loader.next_batch(calib_tokens, args.train_seq_len, 1)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.forward_logits(x)
    stats = {key: total / args.calib_batches for key, total in model.probe.items()}
    model.probe = None
    if world_size > 1:
        for key in sorted(stats):
            dist.all_reduce(stats[key], op=dist.ReduceOp.AVG)
    model.train()
    return stats


def quantise_rows(w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale per row. top: 31 for int6, 127 for int8."""
    scale = (w.abs().amax(dim=1, keepdim=True) / top).clamp_min(1e-7).half().float()
    q = torch.clamp(torch.round(w / scale), -top, top)
    return q, scale


def awq_quantise(w: Tensor, act: Tensor, alphas: list[float], top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Channels that see large inputs get finer steps: quantise w*s, divide by s when read back."""
    act = act.clamp_min(1e-5)
    best = None
    for alpha in alphas:
        s = act**alpha
        s = (s / (s.max() * s.min()).sqrt()).half().float()
        q, scale = quantise_rows(w * s, top)
        error = (((q * scale / s) - w) * act).square().sum().item()
        if best is None or error < best[0]:
            best = (error, q, scale, s)
    _, q, scale, s = best
    return q.to(torch.int8), scale.half(), s.half()


@torch.no_grad()
def quantise_state(state: dict[str, Tensor], stats: dict[tuple[str, int], Tensor], args: Hyperparameters) -> dict:
    alphas = [float(a) for a in args.awq_alphas.split(",")]
    packed: dict[str, dict] = {}
    for name, tensor in state.items():
        t = tensor.detach().float()
        if name in BANK_LAYOUT:
            parts = BANK_LAYOUT[name]
            qs, scales, inputs = [], [], []
            for row in range(t.shape[0]):
                _, act_name = parts[row // args.num_layers]
                act = stats[(act_name, row % args.num_layers)]
                q, scale, s = awq_quantise(t[row], act.to(t.device), alphas, 31)
                qs.append(q)
                scales.append(scale)
                inputs.append(s)
            packed[name] = dict(
                kind="int6", q=torch.stack(qs).cpu(), scale=torch.stack(scales).cpu(), s=torch.stack(inputs).cpu()
            )
        elif t.ndim == 2 and t.numel() > 32_768:
            q, scale = quantise_rows(t, 127)
            packed[name] = dict(kind="int8", q=q.to(torch.int8).cpu(), scale=scale.half().cpu())
        elif any(pattern in name for pattern in CONTROL_PATTERNS):
            packed[name] = dict(kind="raw", t=t.cpu())
        else:
            packed[name] = dict(kind="raw", t=t.half().cpu())
    return packed


def dequantise_state(packed: dict) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, entry in packed.items():
        if entry["kind"] == "int6":
            w = entry["q"].float() * entry["scale"].float()
            state[name] = w / entry["s"].float().unsqueeze(1)
        elif entry["kind"] == "int8":
            state[name] = entry["q"].float() * entry["scale"].float()
        else:
            state[name] = entry["t"].float()
    return state


def pack_artifact(packed: dict) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    return lzma.compress(buf.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def unpack_artifact(blob: bytes) -> dict:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu")


# -----------------------------
# EVALUATION
# -----------------------------


def eval_val(
    args: Hyperparameters,
    model,
    rank: int,
    world_size: int,
    device: torch.device,
    grad_accum_steps: int,
    val_tokens: Tensor,
    luts,
) -> tuple[float, float]:
    """Quick look with disjoint sequences, for the log; the submitted figure comes from evaluate_stream."""
    local_tokens = args.val_batch_tokens // (world_size * grad_accum_steps)
    batch_seqs = max(1, local_tokens // args.train_seq_len)
    total_seqs = (val_tokens.numel() - 1) // args.train_seq_len
    seq_start = total_seqs * rank // world_size
    seq_end = total_seqs * (rank + 1) // world_size
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for s in range(seq_start, seq_end, batch_seqs):
            e = min(s + batch_seqs, seq_end)
            local = val_tokens[s * args.train_seq_len : e * args.train_seq_len + 1].to(device, dtype=torch.int64)
            x = local[:-1].reshape(-1, args.train_seq_len)
            y = local[1:].reshape(-1, args.train_seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            sums[0] += loss.to(torch.float64) * y.numel()
            sums[1] += y.numel()
            sums[2] += token_bytes(luts, x.reshape(-1), y.reshape(-1)).sum()
    if world_size > 1:
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    model.train()
    loss_sum, count, nbytes = sums.tolist()
    return loss_sum / count, loss_sum / math.log(2.0) / nbytes


class CausalHint:
    """Counts of the tokens scored so far: unigrams, and what followed each pair (pairs share hashed rows).

    bias() gives one number for every token of the vocabulary, from the two tokens before the position and the counts
    alone. It is added to the logits and the softmax normalises, so a crowded row can only make the hint duller.
    """

    def __init__(self, args: Hyperparameters, device: torch.device):
        self.vocab = args.vocab_size
        self.buckets = args.hint_buckets
        self.w_uni = args.hint_uni
        self.w_tri = args.hint_tri
        self.kappa = args.hint_kappa
        self.beta = args.hint_beta
        self.uni = torch.zeros(self.vocab, device=device, dtype=torch.float32)
        self.tri = torch.zeros(self.buckets, self.vocab, device=device, dtype=torch.float32)

    def rows(self, prev2: Tensor, prev1: Tensor) -> Tensor:
        return ((prev2 * 36_313) ^ (prev1 * 27_191)) % self.buckets

    def bias(self, prev2: Tensor, prev1: Tensor) -> Tensor:
        p_uni = (self.uni + 1.0) / (self.uni.sum() + self.vocab)
        counts = self.tri[self.rows(prev2, prev1)]
        seen = counts.sum(dim=-1, keepdim=True)
        p_tri = (counts + self.beta * p_uni) / (seen + self.beta)
        trust = seen / (seen + self.kappa)
        return self.w_uni * p_uni.log() + self.w_tri * trust * (p_tri.log() - p_uni.log())

    def update(self, tokens: Tensor, first: int, last: int) -> None:
        """Adds the targets first..last-1, that is tokens[first+1] .. tokens[last], once they have been scored."""
        target = tokens[first + 1 : last + 1]
        prev1 = tokens[first:last]
        prev2 = tokens[max(first - 1, 0) : last - 1]
        if prev2.numel() < prev1.numel():
            prev2 = F.pad(prev2, (1, 0))
        self.uni += torch.bincount(target, minlength=self.vocab).to(self.uni.dtype)
        flat = self.rows(prev2, prev1) * self.vocab + target
        self.tri.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=self.tri.dtype))


class Ledger:
    """Sums of what this rank has scored."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)

    def add(self, nll: Tensor, nbytes: Tensor, valid: Tensor) -> None:
        self.sums[0] += (nll.to(torch.float64) * valid).sum()
        self.sums[1] += valid.sum()
        self.sums[2] += (nbytes * valid).sum()

    def result(self, world_size: int) -> tuple[float, float, int, int]:
        sums = self.sums.clone()
        if world_size > 1:
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        loss_sum, count, nbytes = sums.tolist()
        return loss_sum / count, loss_sum / math.log(2.0) / nbytes, int(count), int(nbytes)


@torch.no_grad()
def score_spans(
    args: Hyperparameters,
    logits_fn,
    hint: CausalHint | None,
    tokens: Tensor,
    spans: list[tuple[int, int]],
    luts,
    ledger: Ledger,
) -> None:
    """Each span (a, b) holds the targets a..b-1; its window is the eval_seq_len tokens that end just before target b."""
    device = tokens.device
    seq_len, stride = args.eval_seq_len, args.eval_stride
    offsets = torch.arange(seq_len, device=device)
    steps = torch.arange(stride, device=device)
    for at in range(0, len(spans), args.eval_batch_windows):
        batch = spans[at : at + args.eval_batch_windows]
        batch = batch + [(0, 0)] * (args.eval_batch_windows - len(batch))
        a = torch.tensor([s[0] for s in batch], device=device)
        b = torch.tensor([s[1] for s in batch], device=device)
        start = (b - seq_len).clamp_min(0)
        idx = start[:, None] + offsets[None, :]
        x = torch.where(idx < b[:, None], tokens[idx.clamp_max(tokens.numel() - 1)], 0)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x)

        where = a[:, None] + steps[None, :]
        valid = where < b[:, None]
        where = torch.where(valid, where, 0)
        local = torch.where(valid, where - start[:, None], 0)
        picked = logits.gather(1, local[:, :, None].expand(-1, -1, logits.size(-1))).float()
        prev1 = tokens[where]
        prev2 = torch.where(where > 0, tokens[(where - 1).clamp_min(0)], 0)
        target = tokens[where + 1]
        picked = picked / args.logit_temp
        if hint is not None:
            picked = picked + hint.bias(prev2, prev1)
        logp = F.log_softmax(picked, dim=-1)
        nll = -logp.gather(-1, target[:, :, None]).squeeze(-1)
        ledger.add(nll, token_bytes(luts, prev1, target), valid)


def adapt_on_chunk(
    args: Hyperparameters,
    model: GPT,
    train_fn,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    first: int,
    last: int,
    rank: int,
    world_size: int,
) -> None:
    """AdamW on the targets first..last-1, all of which the ledger already holds. The cosine spans the chunk's steps."""
    seq_len = args.train_seq_len
    n_seqs = (last - first) // seq_len
    per_rank = n_seqs // world_size
    if per_rank == 0:
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    batches = math.ceil(per_rank / args.ttt_batch_seqs)
    total_steps = args.ttt_epochs * batches
    model.train()
    step = 0
    for epoch in range(args.ttt_epochs):
        order = list(range(per_rank))
        random.Random(args.seed + 7919 * epoch + first).shuffle(order)
        for i in range(batches):
            cosine = 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
            lr = args.ttt_lr * (args.ttt_min_lr_frac + (1.0 - args.ttt_min_lr_frac) * cosine)
            for group in optimizer.param_groups:
                group["lr"] = lr
            pick = order[i * args.ttt_batch_seqs : (i + 1) * args.ttt_batch_seqs]
            starts = torch.tensor([first + (rank * per_rank + j) * seq_len for j in pick], device=tokens.device)
            span = tokens[starts[:, None] + torch.arange(seq_len + 1, device=tokens.device)[None, :]]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = train_fn(span[:, :-1].contiguous(), span[:, 1:].contiguous())
            loss.backward()
            all_reduce_flat(params, world_size)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()
            step += 1
    model.eval()


def slowest_rank(seconds: float, device: torch.device, world_size: int) -> float:
    t = torch.tensor(seconds, device=device, dtype=torch.float64)
    if world_size > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


def evaluate_stream(
    args: Hyperparameters,
    model: GPT,
    tokens: Tensor,
    luts,
    rank: int,
    world_size: int,
    device: torch.device,
    eval_start: float,
    log0,
) -> tuple[float, float]:
    """One pass over the validation tokens in chunks: score a chunk, then learn from it, then the next."""
    n_targets = tokens.numel() - 1
    chunk = args.ttt_chunk_tokens
    n_chunks = (n_targets + chunk - 1) // chunk
    hint = CausalHint(args, device) if args.hint_enabled else None
    ledger = Ledger(device)
    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    train_fn = torch.compile(model, dynamic=False, fullgraph=True)

    for p in model.parameters():
        p.requires_grad_(True)
    model.tok_emb.weight.requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.ttt_lr, betas=(0.9, 0.95), weight_decay=args.ttt_wd)
    adapting = args.ttt_enabled
    model.eval()

    for c in range(n_chunks):
        first, last = c * chunk, min((c + 1) * chunk, n_targets)
        spans = [(a, min(a + args.eval_stride, last)) for a in range(first, last, args.eval_stride)]
        mine = spans[len(spans) * rank // world_size : len(spans) * (rank + 1) // world_size]
        score_spans(args, logits_fn, hint, tokens, mine, luts, ledger)
        if c + 1 == n_chunks:
            break
        # From here on the chunk is graded on every rank's share, and may be learnt from.
        if world_size > 1:
            dist.barrier()
        if hint is not None:
            hint.update(tokens, first, last)
        if adapting:
            adapt_on_chunk(args, model, train_fn, optimizer, tokens, first, last, rank, world_size)
            if c % 16 == 15:
                spent = slowest_rank(time.perf_counter() - eval_start, device, world_size)
                # Scoring alone takes about a quarter of a chunk's time: leave that much for the rest.
                ahead = 0.25 * spent / (c + 1) * (n_chunks - c - 1)
                if spent + ahead > args.eval_budget_seconds:
                    adapting = False
                    log0(f"ttt: budget reached at chunk {c + 1}/{n_chunks}, scoring only from here")
        if c % 100 == 0:
            done = ledger.sums.tolist()
            log0(f"ttt_chunk:{c + 1}/{n_chunks} rank0_bpb:{done[0] / math.log(2.0) / max(done[2], 1.0):.5f}")

    val_loss, val_bpb, count, nbytes = ledger.result(world_size)
    if count != n_targets:
        raise RuntimeError(f"scored {count} of {n_targets} tokens")
    log0(f"scored tokens:{count} bytes:{nbytes}")
    return val_loss, val_bpb


# -----------------------------
# TRAINING
# -----------------------------


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, budget_ms: float | None) -> float:
    """Flat, then linear to zero over the last warmdown_iters steps or over the time they would take."""
    if args.warmdown_iters <= 0:
        return 1.0
    if budget_ms is None:
        start = max(args.iterations - args.warmdown_iters, 0)
        return max((args.iterations - step) / args.warmdown_iters, 0.0) if step >= start else 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(budget_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


class WeightAverage:
    """EMA of all weights in fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.shadow[k].lerp_(v.detach().float(), 1.0 - self.decay)

    def apply(self, model: nn.Module) -> None:
        own = model.state_dict()
        model.load_state_dict({k: v.to(own[k].dtype) for k, v in self.shadow.items()}, strict=True)


class Trainer:
    """Model, optimizers and the step that joins them."""

    def __init__(self, args: Hyperparameters, device: torch.device, world_size: int):
        self.args = args
        self.device = device
        self.world_size = world_size
        self.grad_accum_steps = 8 // world_size
        self.model = GPT(args).to(device)
        if world_size > 1:
            for p in self.model.parameters():
                dist.broadcast(p.data, src=0)
        self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)

        banks = self.model.banks()
        bank_ids = {id(p) for p in banks}
        embeds, smalls = [self.model.tok_emb.weight], []
        if self.model.ve is not None:
            embeds += [self.model.ve.embed.weight, self.model.ve.proj]
        embed_ids = {id(p) for p in embeds}
        for p in self.model.parameters():
            if id(p) not in bank_ids and id(p) not in embed_ids:
                smalls.append(p)
        self.replicated = embeds + smalls
        self.muon = BankMuon(
            banks, args.matrix_lr, args.muon_momentum_start, args.muon_backend_steps, args.muon_wd
        )
        self.adam = torch.optim.AdamW(
            [
                dict(params=embeds, lr=args.embed_lr, base_lr=args.embed_lr, weight_decay=args.adam_wd),
                dict(params=smalls, lr=args.scalar_lr, base_lr=args.scalar_lr, weight_decay=0.0),
            ],
            betas=(args.beta1, args.beta2),
            eps=args.adam_eps,
            fused=True,
        )
        for group in self.muon.param_groups:
            group["base_lr"] = args.matrix_lr

    def zero_grad(self) -> None:
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)

    def forward_backward(self, loader: DistributedTokenLoader) -> Tensor:
        self.zero_grad()
        train_loss = torch.zeros((), device=self.device)
        for _ in range(self.grad_accum_steps):
            x, y = loader.next_batch(self.args.train_batch_tokens, self.args.train_seq_len, self.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = self.compiled(x, y)
            train_loss += loss.detach()
            (loss / self.grad_accum_steps).backward()
        return train_loss / self.grad_accum_steps

    def apply_step(self, step: int, scale: float) -> None:
        frac = min(step / self.args.muon_momentum_steps, 1.0) if self.args.muon_momentum_steps > 0 else 1.0
        momentum = (1.0 - frac) * self.args.muon_momentum_start + frac * self.args.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
            group["lr"] = group["base_lr"] * scale
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        # Banks travel first; Adam's flat all-reduce and step hide behind them.
        self.muon.launch()
        all_reduce_flat(self.replicated, self.world_size)
        if self.args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.replicated, self.args.grad_clip_norm)
        self.adam.step()
        self.muon.step()

    def warm_up(self, loader: DistributedTokenLoader, log0) -> None:
        """A few throw-away steps so that compilation is not timed; weights and optimizers are put back."""
        if self.args.warmup_steps <= 0:
            return
        weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        adam_state = copy.deepcopy(self.adam.state_dict())
        self.model.train()
        for i in range(self.args.warmup_steps):
            self.forward_backward(loader)
            self.apply_step(0, 1.0)
            if i + 1 == self.args.warmup_steps:
                log0(f"warmup_step:{i + 1}/{self.args.warmup_steps}")
        self.model.load_state_dict(weights, strict=True)
        self.adam.load_state_dict(adam_state)
        for m in self.muon.meta:
            m["momentum"].zero_()
        self.zero_grad()


def train(trainer: Trainer, args: Hyperparameters, rank: int, val_tokens: Tensor, luts, log0):
    """Trains until the steps or the time run out. Returns the milliseconds used and the loader."""
    device, world_size = trainer.device, trainer.world_size
    trainer.warm_up(DistributedTokenLoader(args.train_files, rank, world_size, device), log0)
    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    average = WeightAverage(trainer.model, args.ema_decay)
    budget_ms = None
    if args.max_wallclock_seconds > 0:
        budget_ms = 1000.0 * (args.max_wallclock_seconds - args.calib_reserve_seconds)

    training_ms = 0.0
    stop_after: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == args.iterations or (stop_after is not None and step >= stop_after)
        if last_step or (args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            training_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(
                args, trainer.compiled, rank, world_size, device, trainer.grad_accum_steps, val_tokens, luts
            )
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_ms:.0f}ms step_avg:{training_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = training_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, budget_ms)
        train_loss = trainer.forward_backward(loader)
        trainer.apply_step(step, scale)
        average.update(trainer.model)
        step += 1

        approx_ms = training_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )
        if budget_ms is not None and stop_after is None and step % 8 == 0:
            if slowest_rank(approx_ms, device, world_size) >= budget_ms:
                stop_after = step

    log0("ema: applying averaged weights")
    average.apply(trainer.model)
    torch.cuda.synchronize()
    training_ms += 1000.0 * (time.perf_counter() - t0)
    return training_ms, loader


# -----------------------------
# MAIN
# -----------------------------


def make_logger(args: Hyperparameters, master: bool):
    logfile = None
    if master:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{args.run_id}.txt"
        print(logfile)

    def log0(msg: str, console: bool = True) -> None:
        if not master:
            return
        if console:
            print(msg, flush=True)
        with open(logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)

    return log0


def write_artifact(packed: dict, args: Hyperparameters, code: str, master: bool, log0) -> None:
    """Rank 0 compresses and writes; the size that counts is the code plus this one file."""
    if not master:
        return
    blob = pack_artifact(packed)
    with open(args.artifact_path, "wb") as f:
        f.write(blob)
    code_bytes = len(code.encode("utf-8"))
    model_bytes = os.path.getsize(args.artifact_path)
    total_bytes = code_bytes + model_bytes
    log0(f"Serialized model int6+lzma: {model_bytes} bytes")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size: {total_bytes} bytes")
    if total_bytes > SIZE_LIMIT:
        raise RuntimeError(f"submission has {total_bytes} bytes, {total_bytes - SIZE_LIMIT} too many")


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()

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
    master = rank == 0
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    log0 = make_logger(args, master)
    log0(code, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(
        subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False).stdout,
        console=False,
    )

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    luts = build_byte_luts(sp, args.vocab_size, device)
    val_tokens = load_validation_tokens(args.val_files)
    log0(f"train_loader:shards pattern={args.train_files} files:{len(glob.glob(args.train_files))}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # ---- training and calibration: one clock
    trainer = Trainer(args, device, world_size)
    log0(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{trainer.grad_accum_steps} seed:{args.seed}")
    training_ms, loader = train(trainer, args, rank, val_tokens, luts, log0)
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    t_calib = time.perf_counter()
    stats = collect_activations(trainer.model, loader, args, world_size)
    packed = quantise_state(trainer.model.state_dict(), stats, args)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t_calib)
    log0(f"awq: statistics and rounding took {calib_ms:.0f}ms, train+awq {training_ms + calib_ms:.0f}ms")
    if args.max_wallclock_seconds > 0 and training_ms + calib_ms > 1000.0 * args.max_wallclock_seconds:
        raise RuntimeError("training and calibration went past the cap; raise CALIB_RESERVE_SECONDS")
    write_artifact(packed, args, code, master, log0)
    del trainer, loader, stats, packed
    torch.cuda.empty_cache()
    if distributed:
        dist.barrier()

    # ---- evaluation: nothing but the artifact and the validation tokens from here on
    eval_start = time.perf_counter()
    with open(args.artifact_path, "rb") as f:
        state = dequantise_state(unpack_artifact(f.read()))
    eval_model = GPT(args).to(device)
    eval_model.load_state_dict(state, strict=True)
    q_loss, q_bpb = eval_val(
        args, torch.compile(eval_model, dynamic=False), rank, world_size, device, 8 // world_size, val_tokens, luts
    )
    log0(
        f"final_int6_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - eval_start):.0f}ms"
    )

    tokens = val_tokens.to(device=device, dtype=torch.int64)
    val_loss, val_bpb = evaluate_stream(args, eval_model, tokens, luts, rank, world_size, device, eval_start, log0)
    torch.cuda.synchronize()
    eval_s = slowest_rank(time.perf_counter() - eval_start, device, world_size)
    log0(f"legal_ttt_hint val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{1000.0 * eval_s:.0f}ms")
    log0(f"legal_ttt_hint_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if eval_s > 600.0:
        raise RuntimeError(f"evaluation took {eval_s:.1f} s of the 600 s allowed")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
