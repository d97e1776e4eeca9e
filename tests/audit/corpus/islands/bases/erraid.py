"""
SP8192 + depth recurrence (layers 3-5) + parallel residuals (7+) + MuonEq-R + EMA
+ GPTQ int6 with SDClip + brotli + score-first chunked TTT.

Run from the record folder:
    SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import collections
import copy
import glob
import io
import math
import os
import random
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import brotli
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
    # Data paths are shard globs produced by the existing preprocessing pipeline.
    data_dir = os.environ.get("DATA_DIR", "./data")
    data_path = os.environ.get("DATA_PATH", os.path.join(data_dir, "datasets", "fineweb10B_sp8192"))
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get(
        "TOKENIZER_PATH", os.path.join(data_dir, "tokenizers", "fineweb_8192_bpe.model")
    )
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation cadence during training.
    val_batch_seqs = int(os.environ.get("VAL_BATCH_SEQS", 32))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Training length.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.25))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    smear_enabled = bool(int(os.environ.get("SMEAR_ENABLED", "1")))
    bos_id = int(os.environ.get("BOS_ID", 1))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    skip_gates_enabled = bool(int(os.environ.get("SKIP_GATES_ENABLED", "1")))

    # Depth recurrence and parallel residuals.
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))
    parallel_start_layer = int(os.environ.get("PARALLEL_START_LAYER", 7))

    # Optimizer.
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    scalar_wd = float(os.environ.get("SCALAR_WD", 0.02))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_row_normalize = bool(int(os.environ.get("MUON_ROW_NORMALIZE", "1")))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # GPTQ. The reserve comes off the training clock; calibration and the solver both live inside it.
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 30.0))
    gptq_solve_seconds = float(os.environ.get("GPTQ_SOLVE_SECONDS", 18.0))
    gptq_block_size = int(os.environ.get("GPTQ_BLOCK_SIZE", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    compressor_quality = int(os.environ.get("COMPRESSOR_QUALITY", 11))

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))

    # Test-time training.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 4))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))

    # Output.
    model_path = os.environ.get("MODEL_PATH", "final_model.pt")
    quantized_model_path = os.environ.get("QUANTIZED_MODEL_PATH", "final_model.int6.ptz")


CONTROL_TENSOR_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "skip_gates",
    "smear",
)
SIZE_LIMIT_BYTES = 16_000_000

# -----------------------------
# LOGGING
# -----------------------------

_logger = {"path": None, "master": True}


def set_logging(h: Hyperparameters, rank: int) -> None:
    _logger["master"] = rank == 0
    if rank == 0:
        os.makedirs("logs", exist_ok=True)
        _logger["path"] = f"logs/{h.run_id}.txt"


def log(msg: str, console: bool = True) -> None:
    if not _logger["master"]:
        return
    if console:
        print(msg, flush=True)
    if _logger["path"] is not None:
        with open(_logger["path"], "a", encoding="utf-8") as f:
            print(msg, file=f)


def log_environment(h: Hyperparameters, code: str) -> None:
    log(code, console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)
    log("Hyperparameters:")
    for name in sorted(vars(Hyperparameters)):
        if not name.startswith("_"):
            log(f"  {name}: {getattr(h, name)}")


# -----------------------------
# MUON (row-normalised: MuonEq-R)
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
    # Orthogonalize a 2D update matrix with a fast Newton-Schulz iteration.
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
    def __init__(
        self,
        params,
        lr: float,
        momentum: float,
        backend_steps: int,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        row_normalize: bool = False,
    ):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                backend_steps=backend_steps,
                nesterov=nesterov,
                weight_decay=weight_decay,
                row_normalize=row_normalize,
            ),
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0

        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr = group["lr"]
            momentum = group["momentum"]
            backend_steps = group["backend_steps"]
            nesterov = group["nesterov"]

            total_params = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total_params, device=params[0].device, dtype=torch.bfloat16)

            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    if nesterov:
                        g = g.add(buf, alpha=momentum)
                    if group["row_normalize"]:
                        row_norms = g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7)
                        g = g / row_norms.to(g.dtype)
                    g = zeropower_via_newtonschulz5(g, steps=backend_steps)
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()

            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)

            wd = group["weight_decay"]
            curr = 0
            for p in params:
                if wd > 0.0:
                    p.data.mul_(1.0 - lr * wd)
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


class Optimizers:
    """Muon for the matrices, AdamW for the embedding and for everything small."""

    def __init__(self, h: Hyperparameters, base_model: GPT):
        matrix_params, scalar_params = [], []
        for name, p in base_model.named_parameters():
            if name == "tok_emb.weight":
                continue
            if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_PATTERNS):
                matrix_params.append(p)
            else:
                scalar_params.append(p)
        self.optimizer_tok = torch.optim.AdamW(
            [{"params": [base_model.tok_emb.weight], "lr": h.embed_lr, "base_lr": h.embed_lr}],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            weight_decay=h.embed_wd,
            fused=True,
        )
        self.optimizer_muon = Muon(
            matrix_params,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.optimizer_muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.optimizer_scalar = torch.optim.AdamW(
            [{"params": scalar_params, "lr": h.scalar_lr, "base_lr": h.scalar_lr}],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            weight_decay=h.scalar_wd,
            fused=True,
        )
        self.optimizers = [self.optimizer_tok, self.optimizer_muon, self.optimizer_scalar]

    def __iter__(self):
        return iter(self.optimizers)

    def zero_grad_all(self) -> None:
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)

    def set_schedule(self, lr_scale: float, momentum: float) -> None:
        for group in self.optimizer_muon.param_groups:
            group["momentum"] = momentum
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale

    def step(self) -> None:
        for opt in self.optimizers:
            opt.step()
        self.zero_grad_all()


# -----------------------------
# TOKENIZER BYTE TABLES
# -----------------------------


def build_sentencepiece_luts(
    sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes_np = np.zeros((table_size,), dtype=np.int16)
    has_leading_space_np = np.zeros((table_size,), dtype=np.bool_)
    is_boundary_token_np = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary_token_np[token_id] = False
        if sp.is_byte(token_id):
            base_bytes_np[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("▁"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


def count_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    token_bytes = base_bytes_lut[tgt_ids].to(torch.float64)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.float64)
    return token_bytes


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * token_bytes
    if file.stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-doc validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is empty")
    return tokens


class TokenStream:
    # Reads shards sequentially and wraps around forever. No workers, deterministic.
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
    # Each call takes one contiguous span from the stream and hands every rank its own slice.
    # The extra token per slice lets us build (x, y) by shifting.
    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        local_tokens = (local_tokens // seq_len) * seq_len
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * self.world_size)
        start = self.rank * per_rank_span
        local = chunk[start : start + per_rank_span].to(dtype=torch.int64)
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
    # Weights stay fp32 for the optimizer, matmul runs in the dtype of the activations.
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    # Partial RoPE, tables built once for the longest sequence we ever see.
    def __init__(self, rope_dims: int, base: float, max_len: int):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        t = torch.arange(max_len, dtype=torch.float32)
        freqs = torch.outer(t, inv_freq)
        self.register_buffer("cos", freqs.cos()[None, None, :, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, None, :, :], persistent=False)

    def forward(self, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.cos[:, :, :seq_len].to(dtype), self.sin[:, :, :seq_len].to(dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    rotated = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((rotated, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = h.model_dim
        if dim % h.num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if h.num_heads % h.num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = h.num_heads
        self.num_kv_heads = h.num_kv_heads
        self.head_dim = dim // h.num_heads
        self.rope_dims = h.rope_dims
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(h.rope_dims, h.rope_base, max(h.train_seq_len, h.eval_seq_len))
        self.use_xsa = layer_idx >= h.num_layers - h.xsa_last_n

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        # Exclusive self attention: remove the component along the token's own value vector.
        bsz, n_heads, seqlen, d = y.shape
        group = n_heads // v.size(1)
        y_g = y.reshape(bsz, v.size(1), group, seqlen, d)
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        y_g = y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return y_g.reshape(bsz, n_heads, seqlen, d)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        if self.use_xsa:
            y = self._xsa(y, v)
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    # leaky-relu squared
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, h: Hyperparameters, layer_idx: int):
        super().__init__()
        dim = h.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(h, layer_idx)
        self.mlp = MLP(dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = layer_idx >= h.parallel_start_layer

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_scale = self.attn_scale.to(dtype=x.dtype)[None, None, :]
        mlp_scale = self.mlp_scale.to(dtype=x.dtype)[None, None, :]
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor)
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
            return x_in + attn_scale * attn_out + mlp_scale * mlp_out
        x_out = x_in + attn_scale * attn_out
        return x_out + mlp_scale * self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)


class SmearGate(nn.Module):
    # Adds a gated share of the previous token's embedding, stopping at document starts.
    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.smear_gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.smear_gate - 3.0).to(x.dtype)
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        keep = (input_ids != self.bos_id).to(x.dtype).unsqueeze(-1)
        return x + gate * prev * keep


class GPT(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        if h.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {h.logit_softcap}")
        self.logit_softcap = h.logit_softcap
        self.tied_embed_init_std = h.tied_embed_init_std
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.model_dim, h.bos_id) if h.smear_enabled else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        self.looping_active = False

        # Execution order with and without the recurrent segment.
        segment = list(range(h.loop_start, h.loop_end + 1))
        looped = list(range(h.loop_start))
        for _ in range(h.num_loops + 1):
            looped.extend(segment)
        looped.extend(range(h.loop_end + 1, h.num_layers))
        half = len(looped) // 2
        self.loop_encoder = looped[:half] if h.num_loops > 0 else list(range(h.num_layers // 2))
        self.loop_decoder = looped[half:] if h.num_loops > 0 else list(range(h.num_layers // 2, h.num_layers))
        self.plain_encoder = list(range(h.num_layers // 2))
        self.plain_decoder = list(range(h.num_layers // 2, h.num_layers))
        num_skips = max(
            min(len(self.loop_encoder), len(self.loop_decoder)),
            min(len(self.plain_encoder), len(self.plain_decoder)),
        )
        self.skip_weights = nn.Parameter(torch.ones(num_skips, h.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(num_skips, h.model_dim, dtype=torch.float32)) if h.skip_gates_enabled else None
        )
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def embed(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids).to(torch.bfloat16)
        x = F.rms_norm(x, (x.size(-1),))
        if self.smear is not None:
            x = self.smear(x, input_ids)
        return x

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x0 = x
        encoder = self.loop_encoder if self.looping_active else self.plain_encoder
        decoder = self.loop_decoder if self.looping_active else self.plain_decoder
        skips: list[Tensor] = []
        for i in encoder:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for n, i in enumerate(decoder):
            if skips:
                skip = self.skip_weights[n].to(dtype=x.dtype)[None, None, :] * skips.pop()
                if self.skip_gates is not None:
                    g = torch.sigmoid(self.skip_gates[n].to(dtype=x.dtype))[None, None, :]
                    x = torch.lerp(skip, x, g)
                else:
                    x = x + skip
            x = self.blocks[i](x, x0)
        return self.final_norm(x)

    def project(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        return self.project(self.hidden(input_ids))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean"
        )


# -----------------------------
# EMA
# -----------------------------


class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({name: t.to(current[name].dtype) for name, t in self.shadow.items()}, strict=True)


# -----------------------------
# CLOCK
# -----------------------------


class TrainClock:
    """Counts training time only: started after warmup, stopped while validation runs."""

    def __init__(self, limit_seconds: float):
        self.limit_ms = 1000.0 * limit_seconds
        self.spent_ms = 0.0
        self.t0: float | None = None

    def start(self) -> None:
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def stop(self) -> None:
        torch.cuda.synchronize()
        self.spent_ms = self.elapsed_ms()
        self.t0 = None

    def elapsed_ms(self) -> float:
        running = 0.0 if self.t0 is None else 1000.0 * (time.perf_counter() - self.t0)
        return self.spent_ms + running

    def left_ms(self) -> float:
        return self.limit_ms - self.elapsed_ms()


# -----------------------------
# GPTQ
# -----------------------------


def collect_hessians(
    model: GPT,
    loader: DistributedTokenLoader,
    h: Hyperparameters,
    device: torch.device,
    clock: TrainClock,
    world_size: int,
    grad_accum_steps: int,
) -> tuple[dict[str, Tensor], int]:
    """X^T X of the inputs of every linear layer, over a few more training batches."""
    hessians: dict[str, Tensor] = {}
    hooks = []

    def make_hook(name: str):
        def hook_fn(module, inputs, output):
            x = inputs[0].detach()
            x = x.reshape(-1, x.shape[-1]).float()
            if name not in hessians:
                hessians[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=device)
            hessians[name].addmm_(x.T, x)

        return hook_fn

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_hook(make_hook(name + ".weight")))

    model.eval()
    num_batches = 0
    with torch.no_grad():
        for _ in range(h.gptq_calibration_batches):
            out_of_time = torch.tensor(float(clock.left_ms() < 1000.0 * h.gptq_solve_seconds), device=device)
            if world_size > 1:
                dist.all_reduce(out_of_time, op=dist.ReduceOp.MAX)
            if out_of_time.item() > 0:
                break
            x, _ = loader.next_batch(h.train_batch_tokens // 4, h.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.hidden(x)
            num_batches += 1
    for hook in hooks:
        hook.remove()
    if world_size > 1:
        for name in sorted(hessians):
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
    for name in hessians:
        hessians[name] /= max(num_batches * world_size, 1)
    return hessians, num_batches


def sdclip_scale(W: Tensor, clip_sigmas: float, clip_range: int) -> Tensor:
    # One scale per row: clip at k standard deviations, so that the codes entropy-code well.
    row_std = W.std(dim=1)
    return (clip_sigmas * row_std / clip_range).clamp_min(1e-10).to(torch.float16).float()


def quantize_rows(w: Tensor, clip_sigmas: float, clip_range: int) -> tuple[Tensor, Tensor]:
    W = w.detach().float()
    scale = sdclip_scale(W, clip_sigmas, clip_range)
    q = torch.clamp(torch.round(W / scale[:, None].clamp_min(1e-7)), -clip_range, clip_range).to(torch.int8)
    return q, scale.clamp_min(1e-7).to(torch.float16)


def gptq_quantize_weight(
    w: Tensor, H: Tensor, h: Hyperparameters, clip_sigmas: float, clip_range: int
) -> tuple[Tensor, Tensor]:
    W = w.detach().float().clone()
    rows, cols = W.shape
    H = H.float().clone()

    # Zero out dead columns and add damping
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    damp = h.gptq_damp * H.diag().mean()
    H.diagonal().add_(damp)
    scale = sdclip_scale(W, clip_sigmas, clip_range).clamp_min(1e-7)
    W[:, dead] = 0.0

    # Column reordering by descending Hessian diagonal
    perm = torch.argsort(H.diag(), descending=True)
    inv_perm = torch.argsort(perm)
    W = W[:, perm]
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)

    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W.device)
    for b0 in range(0, cols, h.gptq_block_size):
        b1 = min(b0 + h.gptq_block_size, cols)
        block = W[:, b0:b1].clone()
        hinv_block = Hinv[b0:b1, b0:b1]
        err = torch.zeros_like(block)
        for j in range(b1 - b0):
            col = block[:, j]
            d = hinv_block[j, j]
            q = torch.clamp(torch.round(col / scale), -clip_range, clip_range)
            Q[:, b0 + j] = q.to(torch.int8)
            e = (col - q * scale) / d
            err[:, j] = e
            block[:, j:] -= e.unsqueeze(1) * hinv_block[j, j:].unsqueeze(0)
        if b1 < cols:
            W[:, b1:] -= err @ Hinv[b0:b1, b1:]
    return Q[:, inv_perm].contiguous(), scale.to(torch.float16)


def quantize_model(
    base_model: GPT, hessians: dict[str, Tensor], h: Hyperparameters
) -> tuple[dict[str, Tensor], dict[str, str]]:
    result: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    matrix_range = 2 ** (h.matrix_bits - 1) - 1
    embed_range = 2 ** (h.embed_bits - 1) - 1
    for name, tensor in base_model.state_dict().items():
        t = tensor.detach()
        if t.ndim != 2 or t.numel() <= 65536 or any(p in name for p in CONTROL_TENSOR_PATTERNS):
            result[name] = t.to(torch.float16).cpu() if t.is_floating_point() else t.cpu()
            meta[name] = "passthrough (float16)"
            continue
        if name == "tok_emb.weight":
            q, s = quantize_rows(t, h.embed_clip_sigmas, embed_range)
            meta[name] = f"rounded (int{h.embed_bits})"
        elif name in hessians:
            q, s = gptq_quantize_weight(t, hessians[name], h, h.matrix_clip_sigmas, matrix_range)
            meta[name] = f"gptq (int{h.matrix_bits})"
        else:
            q, s = quantize_rows(t, h.matrix_clip_sigmas, matrix_range)
            meta[name] = f"rounded (int{h.matrix_bits})"
        result[name + ".q"] = q.cpu()
        result[name + ".scale"] = s.cpu()
    return result, meta


def dequantize_model(
    result: dict[str, Tensor], meta: dict[str, str], template: dict[str, Tensor]
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, orig in template.items():
        kind = meta[name]
        if kind.startswith("passthrough"):
            out[name] = result[name].to(orig.dtype)
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        out[name] = (q.float() * s.float().view(q.shape[0], *([1] * (q.ndim - 1)))).to(orig.dtype)
    return out


# -----------------------------
# COMPRESSION
# -----------------------------

_BSHF_MAGIC = b"BSHF"


def byte_shuffle(data: bytes, stride: int = 2) -> bytes:
    src = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(len(src), dtype=np.uint8)
    pos = 0
    for lane in range(stride):
        part = src[lane::stride]
        out[pos : pos + len(part)] = part
        pos += len(part)
    return _BSHF_MAGIC + bytes([stride]) + out.tobytes()


def byte_unshuffle(data: bytes) -> bytes:
    if data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    n = len(payload)
    out = np.empty(n, dtype=np.uint8)
    pos = 0
    for lane in range(stride):
        lane_len = n // stride + (1 if lane < n % stride else 0)
        out[lane::stride] = payload[pos : pos + lane_len]
        pos += lane_len
    return out.tobytes()


def compress_blob(raw: bytes, quality: int) -> bytes:
    return brotli.compress(byte_shuffle(raw), quality=quality, lgwin=24)


def decompress_blob(blob: bytes) -> bytes:
    return byte_unshuffle(brotli.decompress(blob))


def serialize(
    h: Hyperparameters, result: dict[str, Tensor], meta: dict[str, str], code: str, rank: int
) -> None:
    if rank == 0:
        buf = io.BytesIO()
        torch.save({"w": result, "m": meta}, buf)
        blob = compress_blob(buf.getvalue(), h.compressor_quality)
        with open(h.quantized_model_path, "wb") as f:
            f.write(blob)
        model_bytes = os.path.getsize(h.quantized_model_path)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        log(f"Serialized model quantized+brotli: {model_bytes} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size quantized+brotli: {total_bytes} bytes")
        if total_bytes > SIZE_LIMIT_BYTES:
            log(f"WARNING: over the limit by {total_bytes - SIZE_LIMIT_BYTES} bytes")
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def deserialize(h: Hyperparameters, device: torch.device) -> GPT:
    """A fresh model from the file on disk, nothing else."""
    eval_model = GPT(h).to(device)
    with open(h.quantized_model_path, "rb") as f:
        blob = f.read()
    state = torch.load(io.BytesIO(decompress_blob(blob)), map_location="cpu")
    template = {name: t.cpu() for name, t in eval_model.state_dict().items()}
    eval_model.load_state_dict(dequantize_model(state["w"], state["m"], template), strict=True)
    eval_model.looping_active = h.num_loops > 0
    return eval_model


# -----------------------------
# EVALUATION
# -----------------------------


def new_sums(device: torch.device) -> Tensor:
    # [sum of nats, tokens, bytes]
    return torch.zeros(3, dtype=torch.float64, device=device)


def reduce_sums(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    return sums


def loss_and_bpb(sums: Tensor) -> tuple[float, float]:
    nats, tokens, nbytes = sums.tolist()
    return nats / tokens, nats / (math.log(2.0) * nbytes)


def build_windows(val_tokens: Tensor, starts: list[int], seq_len: int, device: torch.device):
    """Inputs, targets and lengths of the windows that begin at the given positions, zero-padded on the right."""
    total_tokens = val_tokens.numel() - 1
    bsz = len(starts)
    x_batch = torch.zeros(bsz, seq_len, dtype=torch.int64)
    y_batch = torch.zeros(bsz, seq_len, dtype=torch.int64)
    wlens: list[int] = []
    for i, ws in enumerate(starts):
        wend = min(ws + seq_len, total_tokens)
        wlen = wend - ws
        wlens.append(wlen)
        span = val_tokens[ws : wend + 1].to(torch.int64)
        x_batch[i, :wlen] = span[:-1]
        y_batch[i, :wlen] = span[1:]
    return x_batch.to(device), y_batch.to(device), wlens


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    flat = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="none")
    return flat.reshape(targets.shape)


def eval_val(
    h: Hyperparameters,
    logits_fn,
    device: torch.device,
    rank: int,
    world_size: int,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Plain evaluation: the stream cut into consecutive sequences, each scored whole."""
    seq_len = h.eval_seq_len
    starts = list(range(0, val_tokens.numel() - 1, seq_len))
    lo = len(starts) * rank // world_size
    hi = len(starts) * (rank + 1) // world_size
    mine = starts[lo:hi]
    plain_sums = new_sums(device)
    with torch.no_grad():
        for b in range(0, len(mine), h.val_batch_seqs):
            x, y, wlens = build_windows(val_tokens, mine[b : b + h.val_batch_seqs], seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = token_nll(logits, y)
            for i, wlen in enumerate(wlens):
                plain_sums[0] += nll[i, :wlen].to(torch.float64).sum()
                plain_sums[1] += float(wlen)
                plain_sums[2] += count_bytes(x[i, :wlen], y[i, :wlen], luts).sum()
    return loss_and_bpb(reduce_sums(plain_sums))


def sliding_starts(total_tokens: int, seq_len: int, stride: int) -> list[int]:
    # A window is used only if it reaches a target that no earlier window has scored.
    context_size = seq_len - stride
    return [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context_size < total_tokens]


def score_windows(
    h: Hyperparameters,
    logits_fn,
    val_tokens: Tensor,
    starts: list[int],
    luts: tuple[Tensor, Tensor, Tensor],
    device: torch.device,
    sums: Tensor,
) -> None:
    """Adds the losses of the targets that these windows own to sums, in place."""
    seq_len = h.eval_seq_len
    context_size = seq_len - h.eval_stride
    with torch.no_grad():
        for b in range(0, len(starts), h.eval_batch_seqs):
            batch_ws = starts[b : b + h.eval_batch_seqs]
            x, y, wlens = build_windows(val_tokens, batch_ws, seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = token_nll(logits, y)
            for i, ws in enumerate(batch_ws):
                wlen = wlens[i]
                s = 0 if ws == 0 else context_size
                scored_nll = nll[i, s:wlen].to(torch.float64)
                tgt = y[i, s:wlen]
                prev = x[i, s:wlen]
                sums[0] += scored_nll.sum()
                sums[1] += float(wlen - s)
                sums[2] += count_bytes(prev, tgt, luts).sum()


def eval_val_sliding(
    h: Hyperparameters,
    logits_fn,
    device: torch.device,
    rank: int,
    world_size: int,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Every target once, each with at least seq_len - stride tokens of context where the stream has them."""
    starts = sliding_starts(val_tokens.numel() - 1, h.eval_seq_len, h.eval_stride)
    lo = len(starts) * rank // world_size
    hi = len(starts) * (rank + 1) // world_size
    sliding_sums = new_sums(device)
    score_windows(h, logits_fn, val_tokens, starts[lo:hi], luts, device, sliding_sums)
    return loss_and_bpb(reduce_sums(sliding_sums))


# -----------------------------
# TEST-TIME TRAINING
# -----------------------------


def assign_chunks(starts: list[int], h: Hyperparameters) -> dict[int, list[int]]:
    # A window belongs to the chunk in which the first target that it owns lies.
    context_size = h.eval_seq_len - h.eval_stride
    by_chunk: dict[int, list[int]] = collections.defaultdict(list)
    for ws in starts:
        first_scored = ws if ws == 0 else ws + context_size
        by_chunk[first_scored // h.ttt_chunk_tokens].append(ws)
    return by_chunk


def ttt_parameters(model: GPT, h: Hyperparameters) -> list[nn.Parameter]:
    frozen = set(range(min(h.ttt_freeze_blocks, len(model.blocks))))
    params = []
    for name, p in model.named_parameters():
        match = re.match(r"blocks\.(\d+)\.", name)
        p.requires_grad_(match is None or int(match.group(1)) not in frozen)
        if p.requires_grad:
            params.append(p)
    return params


def ttt_sync_grads(params: list[nn.Parameter], world_size: int) -> None:
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if world_size > 1:
            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)


def ttt_train_chunk(
    h: Hyperparameters,
    model: GPT,
    train_fn,
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    val_tokens: Tensor,
    chunk_start: int,
    chunk_end: int,
    device: torch.device,
    rank: int,
    world_size: int,
) -> None:
    """A few epochs of SGD on the sequences of one chunk. All ranks take the same steps."""
    seq_len = h.eval_seq_len
    num_seqs = (chunk_end - chunk_start) // seq_len
    if num_seqs == 0:
        return
    seq_ids = list(range(rank, num_seqs, world_size))
    steps = -(-num_seqs // (world_size * h.ttt_batch_seqs))
    model.train()
    for _ in range(h.ttt_epochs):
        for step in range(steps):
            ids = seq_ids[step * h.ttt_batch_seqs : (step + 1) * h.ttt_batch_seqs]
            total = len(range(step * h.ttt_batch_seqs * world_size, num_seqs)[: h.ttt_batch_seqs * world_size])
            optimizer.zero_grad(set_to_none=True)
            if ids:
                rows = [chunk_start + n * seq_len for n in ids]
                x = torch.stack([val_tokens[r : r + seq_len] for r in rows]).to(device=device, dtype=torch.int64)
                y = torch.stack([val_tokens[r + 1 : r + seq_len + 1] for r in rows]).to(
                    device=device, dtype=torch.int64
                )
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = train_fn(x, y)
                (loss * (len(ids) / total)).backward()
            ttt_sync_grads(params, world_size)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            optimizer.step()
    model.eval()


def eval_val_ttt(
    h: Hyperparameters,
    model: GPT,
    device: torch.device,
    rank: int,
    world_size: int,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Score-first TTT: chunk c is scored with weights adapted on the chunks before it, then trained on."""
    total_tokens = val_tokens.numel() - 1
    starts = sliding_starts(total_tokens, h.eval_seq_len, h.eval_stride)
    chunk_windows = assign_chunks(starts, h)
    num_chunks = max(chunk_windows) + 1
    log(f"ttt:start chunks={num_chunks} lr={h.ttt_lr} epochs={h.ttt_epochs} freeze_blocks={h.ttt_freeze_blocks}")

    logits_fn = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    train_fn = torch.compile(model, dynamic=False, fullgraph=True)
    params = ttt_parameters(model, h)
    optimizer = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    ttt_sums = new_sums(device)
    t0 = time.perf_counter()
    model.eval()

    for ci in range(num_chunks):
        # Phase 1: score this chunk's windows, split over the ranks.
        windows = chunk_windows[ci]
        lo = len(windows) * rank // world_size
        hi = len(windows) * (rank + 1) // world_size
        score_windows(h, logits_fn, val_tokens, windows[lo:hi], luts, device, ttt_sums)

        # Phase 2: train on the chunk that has just been scored; the last one has no successor.
        if ci < num_chunks - 1 and h.ttt_epochs > 0:
            chunk_start = ci * h.ttt_chunk_tokens
            chunk_end = min(chunk_start + h.ttt_chunk_tokens, total_tokens)
            cos_lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for group in optimizer.param_groups:
                group["lr"] = cos_lr
            ttt_train_chunk(h, model, train_fn, optimizer, params, val_tokens, chunk_start, chunk_end,
                            device, rank, world_size)

        if rank == 0 and (ci % 100 == 0 or ci == num_chunks - 1):
            so_far = ttt_sums.tolist()
            bpb = so_far[0] / (math.log(2.0) * max(so_far[2], 1.0))
            log(f"  ttt_chunk [{ci + 1}/{num_chunks}] rank0_bpb={bpb:.6f} time={time.perf_counter() - t0:.1f}s")

    return loss_and_bpb(reduce_sums(ttt_sums))


def timed_eval(label: str, fn, *args) -> tuple[float, float]:
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms")
    return val_loss, val_bpb


def run_evaluation(
    h: Hyperparameters,
    device: torch.device,
    rank: int,
    world_size: int,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    eval_model = deserialize(h, device)
    eval_model.eval()
    compiled_logits = torch.compile(eval_model.forward_logits, dynamic=False, fullgraph=True)
    common = (device, rank, world_size, val_tokens, luts)

    val_loss, val_bpb = timed_eval("quantized", eval_val, h, compiled_logits, *common)
    if h.sliding_window_enabled:
        val_loss, val_bpb = timed_eval("quantized_sliding", eval_val_sliding, h, compiled_logits, *common)
    if h.ttt_enabled:
        del eval_model, compiled_logits
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        ttt_model = deserialize(h, device)
        val_loss, val_bpb = timed_eval("quantized_ttt", eval_val_ttt, h, ttt_model, *common)
    return val_loss, val_bpb


# -----------------------------
# TRAINING
# -----------------------------


def lr_scale_at(frac: float, h: Hyperparameters) -> float:
    if h.warmdown_frac <= 0.0 or frac < 1.0 - h.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / h.warmdown_frac, h.min_lr)


def muon_momentum_at(step: int, h: Hyperparameters) -> float:
    frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
    return (1.0 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum


def train_step(
    h: Hyperparameters,
    model: nn.Module,
    base_model: GPT,
    optimizers: Optimizers,
    loader: DistributedTokenLoader,
    device: torch.device,
    grad_accum_steps: int,
    distributed: bool,
) -> Tensor:
    optimizers.zero_grad_all()
    train_loss = torch.zeros((), device=device)
    for micro_step in range(grad_accum_steps):
        if distributed:
            model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        x, y = loader.next_batch(h.train_batch_tokens, h.train_seq_len, grad_accum_steps)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
            loss = model(x, y)
        train_loss += loss.detach()
        (loss / grad_accum_steps).backward()
    if h.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
    optimizers.step()
    return train_loss / grad_accum_steps


def warmup_compile(
    h: Hyperparameters,
    model: nn.Module,
    base_model: GPT,
    optimizers: Optimizers,
    device: torch.device,
    rank: int,
    world_size: int,
    grad_accum_steps: int,
    distributed: bool,
) -> None:
    """Primes the compiled paths on training batches, then restores the initial weights and optimizer state."""
    if h.warmup_steps <= 0:
        return
    initial_model = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
    initial_opt = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    loader = DistributedTokenLoader(h.train_files, rank, world_size, device)
    for looping in (False, True) if h.num_loops > 0 else (False,):
        base_model.looping_active = looping
        for _ in range(h.warmup_steps):
            train_step(h, model, base_model, optimizers, loader, device, grad_accum_steps, distributed)
    base_model.looping_active = False
    base_model.load_state_dict(initial_model, strict=True)
    for opt, state in zip(optimizers, initial_opt, strict=True):
        opt.load_state_dict(state)
    optimizers.zero_grad_all()
    log(f"warmup: {h.warmup_steps} steps per path done, state restored")


def train_model(
    h: Hyperparameters,
    base_model: GPT,
    device: torch.device,
    rank: int,
    world_size: int,
    grad_accum_steps: int,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[TrainClock, DistributedTokenLoader]:
    distributed = world_size > 1
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    model = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )
    optimizers = Optimizers(h, base_model)
    warmup_compile(
        h, model, base_model, optimizers, device, rank, world_size, grad_accum_steps, distributed
    )

    train_loader = DistributedTokenLoader(h.train_files, rank, world_size, device)
    ema = EMA(base_model, h.ema_decay)
    loop_budget_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
    log(f"training budget: {loop_budget_ms:.0f}ms of {1000.0 * h.max_wallclock_seconds:.0f}ms")

    clock = TrainClock(h.max_wallclock_seconds)
    clock.start()
    stop_after_step: int | None = None
    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)

        if last_step or (h.val_loss_every > 0 and step % h.val_loss_every == 0):
            clock.stop()
            base_model.eval()
            val_loss, val_bpb = eval_val(
                h, base_model.forward_logits, device, rank, world_size, val_tokens, luts
            )
            base_model.train()
            log(
                f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{clock.elapsed_ms():.0f}ms"
            )
            clock.start()

        if last_step:
            if step < h.iterations:
                log(
                    f"stopping_early: wallclock_cap train_time:{clock.elapsed_ms():.0f}ms "
                    f"step:{step}/{h.iterations}"
                )
            break

        frac = max(step / h.iterations, clock.elapsed_ms() / max(loop_budget_ms, 1.0))
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f}")
        optimizers.set_schedule(lr_scale_at(min(frac, 1.0), h), muon_momentum_at(step, h))
        train_loss = train_step(
            h, model, base_model, optimizers, train_loader, device, grad_accum_steps, distributed
        )
        ema.update(base_model)
        step += 1

        approx_ms = clock.elapsed_ms()
        if step <= 10 or step % h.train_log_every == 0:
            log(f"step:{step}/{h.iterations} train_loss:{train_loss.item():.4f} train_time:{approx_ms:.0f}ms")

        # All ranks have to agree on the step at which they stop.
        reached_cap = approx_ms >= loop_budget_ms
        if distributed:
            cap_flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(cap_flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(cap_flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    ema.copy_to(base_model)
    base_model.looping_active = h.num_loops > 0
    log(f"ema: applied averaged weights, decay={h.ema_decay}")
    return clock, train_loader


# -----------------------------
# MAIN
# -----------------------------


def setup_distributed() -> tuple[torch.device, int, int]:
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
    return device, rank, world_size


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    h = Hyperparameters()
    device, rank, world_size = setup_distributed()
    grad_accum_steps = 8 // world_size
    set_logging(h, rank)
    log_environment(h, code)

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 32
    seed_everything(h.seed)

    sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
    if int(sp.vocab_size()) != h.vocab_size:
        raise ValueError(f"VOCAB_SIZE={h.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    luts = build_sentencepiece_luts(sp, h.vocab_size, device)
    val_tokens = load_validation_tokens(h.val_files)
    log(f"train_shards:{len(glob.glob(h.train_files))} val_tokens:{val_tokens.numel() - 1}")

    base_model = GPT(h).to(device)
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log(f"loop order: encoder={base_model.loop_encoder} decoder={base_model.loop_decoder}")
    log(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{h.seed}")

    clock, train_loader = train_model(
        h, base_model, device, rank, world_size, grad_accum_steps, val_tokens, luts
    )

    # Calibration and solver run on what is left of the 600 s.
    hessians, calib_batches = collect_hessians(
        base_model, train_loader, h, device, clock, world_size, grad_accum_steps
    )
    log(f"gptq: {len(hessians)} hessians from {calib_batches} train batches, at {clock.elapsed_ms():.0f}ms")
    result, meta = quantize_model(base_model, hessians, h)
    clock.stop()
    log(f"gptq: quantized at train_time:{clock.elapsed_ms():.0f}ms, left {clock.left_ms():.0f}ms")
    groups = collections.Counter(meta.values())
    log("quantized tensors: " + ", ".join(f"{kind} x{n}" for kind, n in sorted(groups.items())))
    serialize(h, result, meta, code, rank)

    del base_model, hessians, result
    torch._dynamo.reset()
    torch.cuda.empty_cache()

    val_loss, val_bpb = run_evaluation(h, device, rank, world_size, val_tokens, luts)
    log(f"final_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
