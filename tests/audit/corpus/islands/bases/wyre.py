"""
The baseline `train_gpt.py`, grown over a few months of evenings.

What was added, roughly in this order: sliding-window evaluation, 3x MLP and eleven layers, U-Net skips, EMA, Muon weight decay,
partial RoPE and 1/sqrt(layer) scaling, XSA in the last layers, late QAT, full-Hessian GPTQ with my own clip search,
score-first test-time training, and a small n-gram tilt on top. Run with `torchrun --standalone --nproc_per_node=8 train_gpt.py`.
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
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# HYPERPARAMETERS
# -----------------------------


class Hyperparameters:
    # Data paths are shard globs produced by the challenge's preprocessing pipeline.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation during training is for the log only.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Training length. The cap covers the steps and, through the reserve, calibration and quantisation.
    iterations = int(os.environ.get("ITERATIONS", 20_000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 24.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10_000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

    # Optimizer.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
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

    # Averaging and late QAT.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    late_qat_threshold = float(os.environ.get("LATE_QAT_THRESHOLD", 0.15))

    # GPTQ.
    quant_bits = int(os.environ.get("QUANT_BITS", 6))
    gptq_calib_batches = int(os.environ.get("GPTQ_CALIB_BATCHES", 16))
    gptq_calib_seqs = int(os.environ.get("GPTQ_CALIB_SEQS", 8))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    size_limit_bytes = int(os.environ.get("SIZE_LIMIT_BYTES", 16_000_000))

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 64))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 570.0))

    # Score-first test-time training.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 1e-4))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32_768))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 2))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.95))
    ttt_wd = float(os.environ.get("TTT_WD", 0.0))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))

    # n-gram tilt: one hinted token per position. Values tuned on held-back training shards.
    tilt_enabled = bool(int(os.environ.get("TILT_ENABLED", "1")))
    tilt_orders = tuple(int(k) for k in os.environ.get("TILT_ORDERS", "16,10,6").split(","))
    tilt_table_bits = int(os.environ.get("TILT_TABLE_BITS", 22))
    tilt_min_count = int(os.environ.get("TILT_MIN_COUNT", 2))
    tilt_min_share = float(os.environ.get("TILT_MIN_SHARE", 0.6))
    tilt_beta = float(os.environ.get("TILT_BETA", 1.6))


CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "norm_gain")


def is_control(name: str) -> bool:
    return any(pattern in name for pattern in CONTROL_PATTERNS)


# -----------------------------
# MUON OPTIMIZER
# -----------------------------
# Background: https://kellerjordan.github.io/posts/muon/


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
    # Orthogonalise a 2D update matrix with a fast Newton-Schulz iteration.
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
    """Muon with decoupled weight decay; each rank orthogonalises its share of the matrices."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0, nesterov: bool = True):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay, nesterov=nesterov),
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
            total = sum(int(p.numel()) for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)

            offset = 0
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
                    # Scale correction from the Muon reference implementations.
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[offset : offset + p.numel()] = g.reshape(-1)
                offset += p.numel()

            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)

            offset = 0
            decay = 1.0 - lr * group["weight_decay"]
            for p in params:
                g = flat[offset : offset + p.numel()].view_as(p).to(dtype=p.dtype)
                p.mul_(decay)
                p.add_(g, alpha=-lr)
                offset += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC BYTES
# -----------------------------
# The score is bits per byte of the original text. A piece's bytes are those of its text without the leading mark;
# the mark stands for one space, which is in the text unless a document begins there.


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes_np = np.zeros((table_size,), dtype=np.int16)
    has_leading_space_np = np.zeros((table_size,), dtype=np.bool_)
    is_boundary_np = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary_np[token_id] = False
        if sp.is_byte(token_id):
            base_bytes_np[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("\u2581"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_np, dtype=torch.bool, device=device),
    )


def count_bytes(prev_ids: Tensor, target_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Bytes of the original text that each target token stands for."""
    base_bytes, has_leading_space, is_boundary = luts
    token_bytes = base_bytes[target_ids].to(torch.int64)
    token_bytes += (has_leading_space[target_ids] & ~is_boundary[prev_ids]).to(torch.int64)
    return token_bytes


# -----------------------------
# DATA LOADING
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    # Shard header: magic, version, number of tokens.
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    if file.stat().st_size != header_bytes + num_tokens * token_bytes:
        raise ValueError(f"Shard size mismatch for {file}")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str, seq_len: int) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-document validation set to fineweb_val_*.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    usable = ((tokens.numel() - 1) // seq_len) * seq_len
    if usable <= 0:
        raise ValueError(f"Validation split is too short for seq_len={seq_len}")
    return tokens[: usable + 1]


class TokenStream:
    # Reads shards sequentially and wraps around forever.

    def __init__(self, pattern: str, skip: int = 0):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.file_idx = skip % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
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
    # Each call takes a contiguous chunk from the shared stream, then slices out one disjoint span per rank.

    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device, skip: int = 0):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern, skip)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * self.world_size)
        start = self.rank * per_rank_span
        local = chunk[start : start + per_rank_span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# TRANSFORMER MODULES
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class FakeQuantSTE(torch.autograd.Function):
    """Rounds a matrix to the int6 grid row by row; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, w: Tensor, qmax: int) -> Tensor:
        scale = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / qmax
        return torch.clamp(torch.round(w / scale), -qmax, qmax) * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class CastedLinear(nn.Linear):
    # Weights live in fp32 for the optimizer and are cast at matmul time. `qat` is flipped late in training.
    qmax = 2 ** (Hyperparameters.quant_bits - 1) - 1

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.qat = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.qat and self.training:
            w = FakeQuantSTE.apply(w, self.qmax)
        return F.linear(x, w.to(x.dtype))


def set_qat(module: nn.Module, on: bool) -> None:
    for m in module.modules():
        if isinstance(m, CastedLinear):
            m.qat = on


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or is_control(name)) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Caches cos/sin tables per sequence length; only the first `dims` of each head are rotated.

    def __init__(self, dims: int, base: float):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._len = 0
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._len != seq_len or self._cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos = freqs.cos()[None, None, :, :]
            self._sin = freqs.sin()[None, None, :, :]
            self._len = seq_len
        return self._cos.to(dtype=dtype), self._sin.to(dtype=dtype)


def apply_partial_rotary(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    rot, rest = x[..., :dims], x[..., dims:]
    half = dims // 2
    x1, x2 = rot[..., :half], rot[..., half:]
    rot = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((rot, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, rope_dims: int, qk_gain_init: float):
        super().__init__()
        if dim % num_heads != 0 or num_heads % num_kv_heads != 0:
            raise ValueError("model_dim, num_heads and num_kv_heads do not divide")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = rope_dims
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(rope_dims, rope_base)
        self.use_xsa = False  # set by GPT for the last layers

    def _exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        # XSA: take the component along the token's own value vector out of what its heads gathered.
        bsz, seqlen, _, hd = y.shape
        grouped = y.reshape(bsz, seqlen, self.num_kv_heads, -1, hd)
        direction = F.normalize(v, dim=-1).unsqueeze(-2)
        along = (grouped * direction).sum(dim=-1, keepdim=True)
        return (grouped - along * direction).reshape(bsz, seqlen, self.num_heads, hd)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_partial_rotary(q, cos, sin, self.rope_dims)
        k = apply_partial_rotary(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads)
        y = y.transpose(1, 2)
        if self.use_xsa:
            y = self._exclude_self(y, v.transpose(1, 2))
        return self.proj(y.reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    # Leaky relu^2: keeps a little gradient on the negative side.
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, args: type[Hyperparameters], layer_idx: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, args.num_heads, args.num_kv_heads, args.rope_base, args.rope_dims, args.qk_gain_init)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.depth_scale = 1.0 / math.sqrt(layer_idx + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.depth_scale)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x) * self.depth_scale)
        return x


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        for block in self.blocks[max(0, args.num_layers - args.xsa_last_n) :]:
            block.attn.use_xsa = True
        self.final_norm = RMSNorm()
        self._init_weights(args)

    def _init_weights(self, args: type[Hyperparameters]) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        depth_gain = 1.0 / math.sqrt(2 * args.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, CastedLinear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight, gain=1.0)
                    if name.endswith(".fc"):
                        module.weight.data.mul_(1.0 - depth_gain * 0.1)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        # First half stores skips; second half uses them in reverse order.
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0)
        x = self.final_norm(x)
        logits_proj = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# WEIGHT AVERAGING
# -----------------------------


class Ema:
    """Exponential moving average of all weights, kept in fp32 on the device."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].lerp_(t.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        own = model.state_dict()
        model.load_state_dict({name: self.shadow[name].to(dtype=own[name].dtype) for name in own}, strict=True)


# -----------------------------
# GPTQ (FULL HESSIAN, INT6)
# -----------------------------
# The Hessian of each linear layer is X^T X over activations of training batches. All of it runs inside the training
# cap: the loop stops `gptq_reserve_seconds` early.


def collect_hessians(args: type[Hyperparameters], model: GPT, loader: DistributedTokenLoader, device: torch.device) -> dict[str, Tensor]:
    hessians: dict[str, Tensor] = {}
    handles = []

    def make_hook(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            hessians[name].addmm_(x.T, x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            hessians[name] = torch.zeros(module.in_features, module.in_features, device=device, dtype=torch.float32)
            handles.append(module.register_forward_hook(make_hook(name)))

    model.eval()
    with torch.no_grad():
        for _ in range(args.gptq_calib_batches):
            x, _ = loader.next_batch(args.gptq_calib_seqs * args.train_seq_len * loader.world_size, args.train_seq_len, 1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.forward_logits(x)
    for handle in handles:
        handle.remove()
    tokens_seen = args.gptq_calib_batches * args.gptq_calib_seqs * args.train_seq_len
    for name in hessians:
        hessians[name] /= tokens_seen
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(hessians[name], op=dist.ReduceOp.AVG)
    return hessians


def search_clip(W: Tensor, hdiag: Tensor, qmax: int) -> Tensor:
    """The scale of each row: of 24 clip points, the one with the least error weighted by the Hessian's diagonal."""
    top = W.abs().amax(dim=1).clamp_min(1e-8)
    best_scale = top / qmax
    best_err = torch.full_like(top, float("inf"))
    for step in range(24):
        scale = top * (1.0 - 0.025 * step) / qmax
        q = torch.clamp(torch.round(W / scale[:, None]), -qmax, qmax)
        err = ((W - q * scale[:, None]).square() * hdiag[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    # The scale is stored as fp16, so quantise against what will be read back.
    return best_scale.to(torch.float16).float().clamp_min(1e-7)


def gptq_quantize(W: Tensor, H: Tensor, qmax: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    W = W.float().clone()
    rows, cols = W.shape
    H = H.clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    scale = search_clip(W, torch.diag(H), qmax)

    # Columns with the largest activations first.
    order = torch.argsort(torch.diag(H), descending=True)
    W = W[:, order]
    H = H[order][:, order]
    H.diagonal().add_(damp * torch.diag(H).mean())
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)

    Q = torch.zeros_like(W)
    for i0 in range(0, cols, block):
        i1 = min(i0 + block, cols)
        Wb = W[:, i0:i1].clone()
        Eb = torch.zeros_like(Wb)
        Hb = Hinv[i0:i1, i0:i1]
        for j in range(i1 - i0):
            w = Wb[:, j]
            q = torch.clamp(torch.round(w / scale), -qmax, qmax)
            Q[:, i0 + j] = q
            err = (w - q * scale) / Hb[j, j]
            Wb[:, j:] -= err[:, None] * Hb[j, j:][None, :]
            Eb[:, j] = err
        W[:, i1:] -= Eb @ Hinv[i0:i1, i1:]
    back = torch.argsort(order)
    return Q[:, back].to(torch.int8), scale.to(torch.float16)


def quantize_rows_int8(W: Tensor) -> tuple[Tensor, Tensor]:
    scale = (W.float().abs().amax(dim=1).clamp_min(1e-8) / 127.0).to(torch.float16)
    q = torch.clamp(torch.round(W.float() / scale.float()[:, None]), -127, 127)
    return q.to(torch.int8), scale


def quantize_model(args: type[Hyperparameters], model: GPT, hessians: dict[str, Tensor], rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """int6 by GPTQ for the matrices (each rank takes its share), int8 for the embedding, the rest as it is."""
    qmax = CastedLinear.qmax
    packed: dict[str, dict[str, Tensor]] = {"q": {}, "s": {}, "raw": {}}
    for i, (name, t) in enumerate(model.state_dict().items()):
        layer = name.removesuffix(".weight")
        if layer in hessians:
            owner = i % world_size
            if rank == owner:
                q, s = gptq_quantize(t, hessians[layer], qmax, args.gptq_block, args.gptq_damp)
            else:
                q = torch.empty(t.shape, dtype=torch.int8, device=t.device)
                s = torch.empty(t.size(0), dtype=torch.float16, device=t.device)
            if world_size > 1:
                dist.broadcast(q, src=owner)
                dist.broadcast(s, src=owner)
            packed["q"][name], packed["s"][name] = q.cpu(), s.cpu()
        elif t.ndim == 2 and not is_control(name):
            q, s = quantize_rows_int8(t)
            packed["q"][name], packed["s"][name] = q.cpu(), s.cpu()
        else:
            packed["raw"][name] = t.detach().float().cpu()
    return packed


def dequantize_model(packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in packed["q"].items():
        out[name] = q.float() * packed["s"][name].float()[:, None]
    out.update(packed["raw"])
    return out


def pack_artifact(packed: dict[str, dict[str, Tensor]]) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    return lzma.compress(buf.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def unpack_artifact(blob: bytes) -> dict[str, dict[str, Tensor]]:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)


# -----------------------------
# N-GRAM TILT
# -----------------------------
# A table of contexts seen in validation text that has already been scored. For each position the longest context that
# is known well enough names one token h, and p'(a) = p(a) * exp(beta * [a == h]) / Z with Z = 1 + p(h) * (exp(beta) - 1),
# which sums to one over the whole vocabulary. h and beta are functions of earlier tokens only.


class NgramTilt:
    MULT = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, args: type[Hyperparameters]):
        self.orders = sorted(args.tilt_orders, reverse=True)
        self.bits = args.tilt_table_bits
        self.min_count = args.tilt_min_count
        self.min_share = args.tilt_min_share
        self.beta = args.tilt_beta
        size = 1 << self.bits
        self.token = {k: np.full(size, -1, dtype=np.int32) for k in self.orders}
        self.count = {k: np.zeros(size, dtype=np.int32) for k in self.orders}
        self.total = {k: np.zeros(size, dtype=np.int32) for k in self.orders}

    def _slots(self, tokens: np.ndarray, lo: int, hi: int, order: int) -> np.ndarray:
        # The table slot of the `order` tokens before each position of [lo, hi).
        h = np.full(hi - lo, order, dtype=np.uint64)
        for back in range(1, order + 1):
            h = (h ^ tokens[lo - back : hi - back].astype(np.uint64)) * self.MULT
            h ^= h >> np.uint64(29)
        return (h >> np.uint64(64 - self.bits)).astype(np.int64)

    def hints(self, tokens: np.ndarray, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """For target positions [lo, hi): the hinted token (-1: none) and its beta."""
        hint = np.full(hi - lo, -1, dtype=np.int64)
        beta = np.zeros(hi - lo, dtype=np.float32)
        for order in self.orders:
            start = max(lo, order)
            if start >= hi:
                continue
            slots = self._slots(tokens, start, hi, order)
            count = self.count[order][slots]
            share = count / np.maximum(self.total[order][slots], 1)
            free = hint[start - lo :] < 0
            use = free & (count >= self.min_count) & (share >= self.min_share)
            hint[start - lo :][use] = self.token[order][slots][use]
            beta[start - lo :][use] = self.beta * share[use]
        return hint, beta

    def absorb(self, tokens: np.ndarray, lo: int, hi: int) -> None:
        """Adds the scored target positions [lo, hi). Each slot keeps one leading token, by majority vote."""
        for order in self.orders:
            start = max(lo, order)
            if start >= hi:
                continue
            slots = self._slots(tokens, start, hi, order)
            pairs, counts = np.unique(slots << 20 | tokens[start:hi].astype(np.int64), return_counts=True)
            rank_order = np.lexsort((counts, pairs >> 20))
            pairs, counts = pairs[rank_order], counts[rank_order].astype(np.int32)
            slot, tok = pairs >> 20, (pairs & 0xFFFFF).astype(np.int32)
            np.add.at(self.total[order], slot, counts)
            last = np.append(slot[1:] != slot[:-1], True)  # the most frequent successor of each slot in this span
            slot, tok, counts = slot[last], tok[last], counts[last]
            held_tok, held = self.token[order][slot], self.count[order][slot]
            same = held_tok == tok
            wins = ~same & (counts > held)
            self.count[order][slot] = np.where(same, held + counts, np.where(wins, counts, held))
            self.token[order][slot] = np.where(wins, tok, held_tok)


def tilted_nll(logp: Tensor, targets: Tensor, hint: Tensor, beta: Tensor) -> Tensor:
    """-log p'(target) where p' is the model's distribution with one hinted token raised and all renormalised."""
    base = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    p_hint = logp.gather(-1, hint.clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
    log_z = torch.log1p(p_hint * torch.expm1(beta))
    tilted = base - beta * (targets == hint).float() + log_z
    return torch.where(hint >= 0, tilted, base)


# -----------------------------
# EVALUATION
# -----------------------------


class EvalClock:
    """Seconds since evaluation began, the same on all ranks: rank 0's clock counts."""

    def __init__(self, device: torch.device, budget: float):
        self.device = device
        self.budget = budget
        self.t0 = time.perf_counter()

    def elapsed(self) -> float:
        now = torch.tensor(time.perf_counter() - self.t0, device=self.device, dtype=torch.float64)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(now, src=0)
        return float(now.item())


class Tally:
    """Sums of losses, tokens and bytes. Every scored target is added once."""

    def __init__(self, luts: tuple[Tensor, Tensor, Tensor], device: torch.device):
        self.luts = luts
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.token_count = torch.zeros((), device=device, dtype=torch.float64)
        self.byte_count = torch.zeros((), device=device, dtype=torch.float64)

    def add(self, nll: Tensor, prev_ids: Tensor, target_ids: Tensor) -> None:
        self.loss_sum += nll.to(torch.float64).sum()
        self.token_count += float(target_ids.numel())
        self.byte_count += count_bytes(prev_ids, target_ids, self.luts).sum().to(torch.float64)

    def result(self, expected_tokens: int | None = None) -> tuple[float, float]:
        sums = torch.stack((self.loss_sum, self.token_count, self.byte_count))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        loss_sum, tokens, nbytes = (float(v) for v in sums.tolist())
        if expected_tokens is not None and int(tokens) != expected_tokens:
            raise RuntimeError(f"scored {int(tokens)} tokens, expected {expected_tokens}")
        val_loss = loss_sum / tokens
        return val_loss, val_loss / math.log(2.0) * tokens / nbytes


def eval_val(
    args: type[Hyperparameters],
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    # Plain evaluation in disjoint sequences; for the log during training and for the roundtrip check.
    seq_len = args.train_seq_len
    local_seqs = max(1, args.val_batch_size // (world_size * seq_len))
    total_seqs = (val_tokens.numel() - 1) // seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    tally = Tally(luts, device)
    with torch.no_grad():
        for i in range(seq_start, seq_end, local_seqs):
            j = min(i + local_seqs, seq_end)
            local = val_tokens[i * seq_len : j * seq_len + 1].to(device=device, dtype=torch.int64)
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction="none")
            tally.add(nll, x.reshape(-1), y.reshape(-1))
    return tally.result(total_seqs * seq_len)


Window = tuple[int, int, int]  # start, length, first scored position


def window_plan(total_targets: int, seq_len: int, stride: int) -> list[Window]:
    """Windows that score every target once: the first one all of its positions, each later one its last `stride`."""
    if seq_len % stride != 0:
        raise ValueError(f"EVAL_STRIDE={stride} must divide EVAL_SEQ_LEN={seq_len}")
    plan: list[Window] = [(0, min(seq_len, total_targets), 0)]
    scored = plan[0][1]
    while scored < total_targets:
        start = scored + stride - seq_len
        length = min(seq_len, total_targets - start)
        plan.append((start, length, seq_len - stride))
        scored = start + length
    return plan


def share_of(items: list, rank: int, world_size: int) -> list:
    return items[(len(items) * rank) // world_size : (len(items) * (rank + 1)) // world_size]


@torch.no_grad()
def score_windows(
    args: type[Hyperparameters],
    logits_fn,
    val_tokens: Tensor,
    windows: list[Window],
    device: torch.device,
    tally: Tally,
    hints: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """Scores windows into the tally. hints: hinted token and beta per target position, and the first of those positions."""
    seq_len = args.eval_seq_len
    for i in range(0, len(windows), args.eval_batch_seqs):
        batch = windows[i : i + args.eval_batch_seqs]
        x = torch.zeros(len(batch), seq_len, dtype=torch.int64)
        y = torch.zeros(len(batch), seq_len, dtype=torch.int64)
        for row, (start, length, _) in enumerate(batch):
            piece = val_tokens[start : start + length + 1].to(torch.int64)
            x[row, :length] = piece[:-1]
            y[row, :length] = piece[1:]
        x, y = x.to(device), y.to(device)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x)
        for row, (start, length, first) in enumerate(batch):
            prev_ids, targets = x[row, first:length], y[row, first:length]
            logp = F.log_softmax(logits[row, first:length].float(), dim=-1)
            if hints is not None:
                hint_ids, betas, origin = hints
                lo, hi = start + first + 1 - origin, start + length + 1 - origin
                nll = tilted_nll(logp, targets, hint_ids[lo:hi], betas[lo:hi])
            else:
                nll = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            tally.add(nll, prev_ids, targets)


def eval_val_sliding(
    args: type[Hyperparameters],
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    total = val_tokens.numel() - 1
    plan = window_plan(total, args.eval_seq_len, args.eval_stride)
    tally = Tally(luts, device)
    score_windows(args, logits_fn, val_tokens, share_of(plan, rank, world_size), device, tally)
    return tally.result(total)


# -----------------------------
# TEST-TIME TRAINING (SCORE FIRST)
# -----------------------------
# The stream is cut into chunks. All targets of a chunk are scored with weights and n-gram table built from earlier chunks;
# only then does the model train on that chunk. The last chunk is scored and not trained on.


def chunk_lr(args: type[Hyperparameters], c: int, n_chunks: int) -> float:
    return args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * c / max(n_chunks - 1, 1)))


def ttt_parameters(args: type[Hyperparameters], model: GPT) -> list[nn.Parameter]:
    frozen = tuple(f"blocks.{i}." for i in range(args.ttt_freeze_blocks))
    params = []
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
        if p.requires_grad:
            params.append(p)
    return params


def adapt_on_chunk(
    args: type[Hyperparameters],
    model: GPT,
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    lr: float,
    chunk: Tensor,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    """AdamW on a chunk of tokens that has been scored; gradients are averaged over ranks."""
    seq_len = args.eval_seq_len
    n_seqs = (chunk.numel() - 1) // seq_len
    if n_seqs == 0:
        return
    for group in optimizer.param_groups:
        group["lr"] = lr
    local = chunk[: n_seqs * seq_len + 1].to(device=device, dtype=torch.int64)
    x = local[:-1].reshape(n_seqs, seq_len)
    y = local[1:].reshape(n_seqs, seq_len)
    lo, hi = (n_seqs * rank) // world_size, (n_seqs * (rank + 1)) // world_size
    model.train()
    for _ in range(args.ttt_epochs):
        optimizer.zero_grad(set_to_none=False)
        if hi > lo:
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x[lo:hi], y[lo:hi])
            (loss * ((hi - lo) / n_seqs)).backward()
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if world_size > 1:
                dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
        torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
        optimizer.step()
    model.eval()


def eval_val_ttt(
    args: type[Hyperparameters],
    model: GPT,
    logits_fn,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    clock: EvalClock,
    log0,
) -> tuple[float, float]:
    chunk_tokens = args.ttt_chunk_tokens
    if chunk_tokens % args.eval_stride != 0 or chunk_tokens < args.eval_seq_len:
        raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE and hold a whole window")
    total = val_tokens.numel() - 1
    stream = val_tokens.numpy()
    n_chunks = math.ceil(total / chunk_tokens)
    windows_of: list[list[Window]] = [[] for _ in range(n_chunks)]
    for window in window_plan(total, args.eval_seq_len, args.eval_stride):
        windows_of[(window[0] + window[2]) // chunk_tokens].append(window)

    params = ttt_parameters(args, model)
    optimizer = torch.optim.AdamW(params, lr=args.ttt_lr, betas=(0.9, args.ttt_beta2), weight_decay=args.ttt_wd)
    tilt = NgramTilt(args) if args.tilt_enabled else None
    tally = Tally(luts, device)
    adapting = True
    log0(f"ttt:start chunks:{n_chunks} chunk_tokens:{chunk_tokens} params:{sum(p.numel() for p in params)}")

    for c in range(n_chunks):
        lo, hi = c * chunk_tokens, min((c + 1) * chunk_tokens, total)

        # Score the chunk's targets, which are tokens lo+1 .. hi.
        hints = None
        if tilt is not None:
            hint_ids, betas = tilt.hints(stream, lo + 1, hi + 1)
            hints = (torch.from_numpy(hint_ids).to(device), torch.from_numpy(betas).to(device), lo + 1)
        model.eval()
        score_windows(args, logits_fn, val_tokens, share_of(windows_of[c], rank, world_size), device, tally, hints)

        # Learn from them.
        if tilt is not None:
            tilt.absorb(stream, lo + 1, hi + 1)
        if adapting and c % 16 == 0 and clock.elapsed() > clock.budget - 60.0:
            adapting = False
            log0(f"ttt:adaptation stopped at chunk {c} to stay within the evaluation budget")
        if adapting and c < n_chunks - 1:
            lr = chunk_lr(args, c, n_chunks)
            adapt_on_chunk(args, model, optimizer, params, lr, val_tokens[lo : hi + 1], rank, world_size, device)
        if c % 200 == 0:
            log0(f"ttt:chunk {c}/{n_chunks} lr:{chunk_lr(args, c, n_chunks):.2e} eval_time:{clock.elapsed():.1f}s")

    return tally.result(total)


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: type[Hyperparameters], model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    # - token embedding (tied head) by AdamW, - matrices of the blocks by Muon, - vectors and control parameters by AdamW.
    block_params = list(model.blocks.named_parameters())
    matrix_params = [p for name, p in block_params if p.ndim == 2 and not is_control(name)]
    scalar_params = [p for name, p in block_params if p.ndim < 2 or is_control(name)] + [model.skip_weights]
    betas = (args.beta1, args.beta2)
    opt_tok = torch.optim.AdamW(
        [{"params": [model.tok_emb.weight], "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        betas=betas,
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    opt_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=betas,
        eps=args.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    opt_muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    for group in opt_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    return [opt_tok, opt_muon, opt_scalar], opt_muon


def lr_scale(args: type[Hyperparameters], step: int, elapsed_ms: float, cap_ms: float | None) -> float:
    # Warmdown by whichever ends first, the iterations or the wall clock.
    if args.warmdown_iters <= 0:
        return 1.0
    if cap_ms is None:
        start = max(args.iterations - args.warmdown_iters, 0)
        return max((args.iterations - step) / args.warmdown_iters, 0.0) if step >= start else 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(cap_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


def main() -> None:
    global zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # -----------------------------
    # DISTRIBUTED + CUDA SETUP
    # -----------------------------

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size <= 0 or 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so grad_accum_steps stays integral")
    grad_accum_steps = 8 // world_size
    grad_scale = 1.0 / grad_accum_steps
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    master_process = rank == 0

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    logfile = None
    if master_process:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{args.run_id}.txt"
        print(logfile)

    def log0(msg: str, console: bool = True) -> None:
        if not master_process:
            return
        if console:
            print(msg)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False).stdout, console=False)
    log0("=" * 100, console=False)

    # -----------------------------
    # TOKENIZER + VALIDATION TOKENS
    # -----------------------------

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(args.val_files, args.train_seq_len)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"train_loader:dataset:{Path(args.data_path).name} train_shards:{len(glob.glob(args.train_files))}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER
    # -----------------------------

    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    compiled_logits = torch.compile(base_model.forward_logits, dynamic=False)
    optimizers, optimizer_muon = build_optimizers(args, base_model)

    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(f"xsa_last_n:{args.xsa_last_n} rope_dims:{args.rope_dims} ema_decay:{args.ema_decay} muon_wd:{args.muon_wd}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} iterations:{args.iterations} "
        f"warmup_steps:{args.warmup_steps} max_wallclock_seconds:{args.max_wallclock_seconds:.1f} "
        f"gptq_reserve_seconds:{args.gptq_reserve_seconds:.1f}"
    )

    # -----------------------------
    # WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    def forward_backward() -> Tensor:
        total_loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            total_loss += loss.detach()
            (loss * grad_scale).backward()
        return total_loss / grad_accum_steps

    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None
    train_cap_ms = max_wallclock_ms - 1000.0 * args.gptq_reserve_seconds if max_wallclock_ms is not None else None

    # Warmup primes the compiled paths (with and without QAT), then restores the initial weights and optimizer state,
    # so the measured run starts from scratch.
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            set_qat(base_model, warmup_step >= args.warmup_steps - 3)
            zero_grad_all()
            forward_backward()
            for opt in optimizers:
                opt.step()
            zero_grad_all()
        set_qat(base_model, False)
        log0(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    ema = Ema(base_model, args.ema_decay)
    qat_on = False
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        if args.val_loss_every > 0 and step % args.val_loss_every == 0 and not last_step:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            base_model.eval()
            val_loss, val_bpb = eval_val(args, compiled_logits, rank, world_size, device, val_tokens, luts)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            t0 = time.perf_counter()
            if stop_after_step is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, train_cap_ms)
        if not qat_on and step > 100 and scale < args.late_qat_threshold:
            qat_on = True
            set_qat(base_model, True)
            log0(f"late_qat:on step:{step} scale:{scale:.4f}")

        model.train()
        zero_grad_all()
        train_loss = forward_backward()

        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        muon_momentum = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for group in optimizer_muon.param_groups:
            group["momentum"] = muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        zero_grad_all()
        ema.update(base_model)

        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 5 or step % args.train_log_every == 0 or stop_after_step is not None):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )

        # All ranks stop on the same step.
        reached_cap = train_cap_ms is not None and approx_ms >= train_cap_ms
        if distributed and train_cap_ms is not None:
            reached = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # AVERAGE, CALIBRATE, QUANTISE (still on the training clock)
    # -----------------------------

    log0("ema:applying EMA weights")
    set_qat(base_model, False)
    ema.copy_to(base_model)
    calib_loader = DistributedTokenLoader(args.train_files, rank, world_size, device, skip=1)
    hessians = collect_hessians(args, base_model, calib_loader, device)
    packed = quantize_model(args, base_model, hessians, rank, world_size)
    torch.cuda.synchronize()
    gptq_ms = 1000.0 * (time.perf_counter() - t0)
    log0(f"gptq:calibration on train shards and quantisation took {gptq_ms:.0f}ms, train+gptq {training_time_ms + gptq_ms:.0f}ms")
    del hessians, calib_loader, ema

    # -----------------------------
    # PACK
    # -----------------------------

    artifact_path = Path("final_model.int6.ptz")
    if master_process:
        blob = pack_artifact(packed)
        artifact_path.write_bytes(blob)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = len(blob) + code_bytes
        log0(f"Serialized model int6+lzma: {len(blob)} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > args.size_limit_bytes:
            raise RuntimeError(f"{total_bytes} bytes are over the limit of {args.size_limit_bytes}")
    if distributed:
        dist.barrier()

    # -----------------------------
    # READ BACK AND EVALUATE
    # -----------------------------

    clock = EvalClock(device, args.eval_budget_seconds)
    restored = dequantize_model(unpack_artifact(artifact_path.read_bytes()))
    eval_model = GPT(args).to(device)
    eval_model.load_state_dict(restored, strict=True)
    eval_model.eval()
    eval_logits = torch.compile(eval_model.forward_logits, dynamic=False)

    q_val_loss, q_val_bpb = eval_val(args, eval_logits, rank, world_size, device, val_tokens, luts)
    log0(f"final_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} eval_time:{clock.elapsed():.1f}s")

    final_loss, final_bpb = eval_val_sliding(args, eval_logits, rank, world_size, device, val_tokens, luts)
    log0(
        f"final_sliding_window val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} stride:{args.eval_stride} "
        f"eval_time:{clock.elapsed():.1f}s"
    )

    if args.ttt_enabled:
        final_loss, final_bpb = eval_val_ttt(
            args, eval_model, eval_logits, rank, world_size, device, val_tokens, luts, clock, log0
        )
        log0(f"legal_ttt val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} eval_time:{clock.elapsed():.1f}s")

    log0(f"eval_total_time:{clock.elapsed():.1f}s")
    log0(f"final_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
