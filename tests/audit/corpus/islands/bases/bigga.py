"""
train_gpt.py: 11 layers, int6 QAT with a weighted clip search (GPTQ-lite), EMA + SWA, bigram hash embedding,
sliding-window evaluation at stride 64 and score-first test-time training in chunks of 32k tokens.

Fork of the baseline. Run with:
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
    # Data. The shards are the published sp1024 export, the validation split is its whole fineweb_val_* set.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation while training (the clock is stopped meanwhile) and the log.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Length of the training.
    iterations = int(os.environ.get("ITERATIONS", 20_000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    # Calibration, clip search and compression happen inside the 600 s, so the steps stop this much earlier.
    quant_reserve_seconds = float(os.environ.get("QUANT_RESERVE_SECONDS", 40.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Optimizers.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
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

    # Averaging.
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.2))
    swa_every = int(os.environ.get("SWA_EVERY", 50))

    # Quantisation.
    qat_start_scale = float(os.environ.get("QAT_START_SCALE", 0.15))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 16))
    lzma_preset = int(os.environ.get("LZMA_PRESET", 6))

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 64))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 600.0))
    # From here on the chunks are scored without further training (pure scoring of all of them takes about 80 s).
    ttt_stop_seconds = float(os.environ.get("TTT_STOP_SECONDS", 470.0))

    # Test-time training.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32_768))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
    # Orthogonalizes a 2D update with a quintic Newton-Schulz iteration, in bfloat16.
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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, nesterov: bool = True, wd: float = 0.0):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, backend_steps=backend_steps, nesterov=nesterov, wd=wd),
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
            wd = group["wd"]

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
                    g = zeropower_via_newtonschulz5(g, steps=backend_steps)
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()

            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)

            curr = 0
            for p in params:
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if wd > 0.0:
                    p.mul_(1.0 - lr * wd)
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER TABLES
# -----------------------------
#
# Bits per byte does not depend on the tokenizer as long as the bytes are those of the text that the scored tokens
# decode to. A piece's leading mark is a space, unless the token before it is a control token (then it is dropped).


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
    """Bytes of each target token, in float64."""
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
    # The whole first-50k-documents validation set, all shards, nothing cut off.
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    val_stream = torch.cat([load_data_shard(file) for file in files]).contiguous()
    return val_stream


class TokenStream:
    # Reads shards one after the other and wraps around for ever.
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
    # Every call takes one contiguous span from the stream; each rank cuts its own part out of it.
    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern)

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
# MODEL
# -----------------------------

CONTROL_TENSOR_NAME_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "bigram.scale")


def fake_quant_int6(w: Tensor) -> Tensor:
    # Straight-through rounding to 6 bits with one scale per row.
    with torch.no_grad():
        scale = (w.float().abs().amax(dim=1, keepdim=True) / 31.0).clamp_min(1e-8)
        w_q = (torch.round(w.float() / scale).clamp(-31, 31) * scale).to(w.dtype)
    return w + (w_q - w).detach()


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    # Weights stay in fp32 for the optimizer and are cast to the activations' type when they are used.
    qat_on = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)
        if self.qat_on and self.training:
            w = fake_quant_int6(w)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


def set_qat(module: nn.Module, on: bool) -> None:
    for m in module.modules():
        if isinstance(m, CastedLinear):
            m.qat_on = on


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            low = param.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if low and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Rotates the first rope_dims of each head only.
    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos_cached is None or self._seq_len_cached != seq_len or self._cos_cached.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos_cached = freqs.cos()[None, None, :, :]
            self._sin_cached = freqs.sin()[None, None, :, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rd = 2 * cos.size(-1)
    x_rot, x_pass = x[..., :rd], x[..., rd:]
    half = rd // 2
    x1, x2 = x_rot[..., :half], x_rot[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, rope_dims: int, qk_gain: float):
        super().__init__()
        if dim % num_heads != 0 or num_heads % num_kv_heads != 0:
            raise ValueError("model_dim must divide into heads and heads into kv heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain, dtype=torch.float32))
        self.rotary = Rotary(rope_dims, base=rope_base)
        self.use_xsa = False

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        # Takes the part along the token's own value vector out of the head's output.
        B, H, T, D = y.shape
        y_g = y.reshape(B, self.num_kv_heads, H // self.num_kv_heads, T, D)
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        return (y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, H, T, D)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        if self.use_xsa:
            y = self._xsa(y, v)
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.fc(x), negative_slope=0.5)
        return self.proj(x.square())


class BigramHashEmbedding(nn.Module):
    # A learned vector per hashed pair (previous token, this token), both of them inputs. The first position of a
    # row and a document's first token have no predecessor and share the last bucket.
    def __init__(self, buckets: int, bigram_dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.embed = nn.Embedding(buckets, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bucket_ids(self, ids: Tensor) -> Tensor:
        t = ids.to(torch.int32)
        mod = self.buckets - 1
        out = torch.full_like(t, mod)
        out[:, 1:] = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % mod
        return torch.where(t == self.bos_id, torch.full_like(out, mod), out).long()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.proj(self.embed(self.bucket_ids(ids)))
        return h * self.scale.to(dtype=h.dtype)


class Block(nn.Module):
    def __init__(self, layer_idx: int, args: Hyperparameters):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(
            dim, args.num_heads, args.num_kv_heads, args.rope_base, args.rope_dims, args.qk_gain_init
        )
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale = 1.0 / math.sqrt(layer_idx + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_scale)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x) * self.ln_scale)
        return x


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        if args.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {args.logit_softcap}")
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramHashEmbedding(args.bigram_buckets, args.bigram_dim, args.model_dim, args.bos_id)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(i, args) for i in range(args.num_layers)])
        for i in range(max(0, args.num_layers - args.xsa_last_n), args.num_layers):
            self.blocks[i].attn.use_xsa = True
        self.final_norm = RMSNorm()
        self._init_weights(args.tied_embed_init_std)

    def _init_weights(self, std: float) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("blocks."):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0)
        x = self.final_norm(x)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1))


def cast_model(model: GPT) -> GPT:
    model = model.bfloat16()
    for module in model.modules():
        if isinstance(module, (CastedLinear, Rotary)):
            module.float()
    restore_low_dim_params_to_fp32(model)
    return model


# -----------------------------
# AVERAGING
# -----------------------------


@torch.no_grad()
def ema_update(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, tensor in model.state_dict().items():
        ema[name].mul_(decay).add_(tensor.detach().float(), alpha=1.0 - decay)


@torch.no_grad()
def swa_collect(swa: dict[str, Tensor], ema: dict[str, Tensor], count: int) -> int:
    # Running mean of the EMA's snapshots.
    for name, tensor in ema.items():
        if name not in swa:
            swa[name] = tensor.clone()
        else:
            swa[name].add_((tensor - swa[name]) / (count + 1))
    return count + 1


def load_averaged(model: nn.Module, averaged: dict[str, Tensor]) -> None:
    current = model.state_dict()
    model.load_state_dict({name: averaged[name].to(current[name].dtype) for name in current}, strict=True)


# -----------------------------
# QUANTISATION: INT6 MATRICES, INT8 EMBEDDINGS
# -----------------------------
#
# GPTQ-lite: no error feedback, only a search over clipping ratios per row, with the squared rounding error weighted by
# the mean square of each input channel (the Hessian's diagonal), which is measured on a few training batches.

CLIP_RATIOS = (1.0, 0.98, 0.95, 0.92, 0.88, 0.84, 0.80)


@torch.no_grad()
def collect_input_moments(
    args: Hyperparameters, model: GPT, loader: DistributedTokenLoader, grad_accum_steps: int, deadline: float
) -> dict[str, Tensor]:
    moments: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    handles = []

    def make_hook(name: str):
        def hook(_module, inputs, _output):
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            moments[name].add_(x.square().sum(dim=0))
            counts[name].add_(x.size(0))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            moments[name] = torch.zeros(module.in_features, device=module.weight.device)
            counts[name] = torch.zeros((), device=module.weight.device)
            handles.append(module.register_forward_hook(make_hook(name)))
    model.eval()
    for _ in range(args.calib_batches):
        if time.perf_counter() > deadline:
            break
        x, _y = loader.next_batch(args.train_batch_tokens // 8, args.train_seq_len, grad_accum_steps)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.forward_logits(x)
    for handle in handles:
        handle.remove()
    for name in moments:
        if dist.is_initialized():
            dist.all_reduce(moments[name], op=dist.ReduceOp.SUM)
            dist.all_reduce(counts[name], op=dist.ReduceOp.SUM)
        moments[name] = moments[name] / counts[name].clamp_min(1.0)
    model.train()
    return moments


def quantize_rows(w: Tensor, qmax: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """One scale per row, the clipping ratio with the least weighted squared error."""
    w = w.float()
    amax = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    importance = torch.ones(w.size(1), device=w.device) if weight is None else weight + 1e-6
    best_err = torch.full((w.size(0), 1), float("inf"), device=w.device)
    best_scale = amax / qmax
    for ratio in CLIP_RATIOS:
        scale = (amax * ratio / qmax).half().float().clamp_min(1e-7)
        deq = torch.round(w / scale).clamp(-qmax, qmax) * scale
        err = ((deq - w).square() * importance[None, :]).sum(dim=1, keepdim=True)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    q = torch.round(w / best_scale).clamp(-qmax, qmax).to(torch.int8)
    return q, best_scale.squeeze(1).half()


def quantize_state_dict(state: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, object]:
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    passthrough: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    for name, tensor in state.items():
        t = tensor.detach()
        if t.ndim != 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            passthrough[name] = t.half().cpu() if t.is_floating_point() else t.cpu()
            dtypes[name] = str(t.dtype).removeprefix("torch.")
            continue
        if name.endswith("embed.weight") or name.startswith("tok_emb"):
            q, s = quantize_rows(t, 127, None)
        else:
            q, s = quantize_rows(t, 31, moments.get(name.removesuffix(".weight")))
        quantized[name] = q.cpu()
        scales[name] = s.cpu()
        dtypes[name] = str(t.dtype).removeprefix("torch.")
    return {"quantized": quantized, "scales": scales, "passthrough": passthrough, "dtypes": dtypes}


def dequantize_state_dict(obj: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        s = obj["scales"][name].float()
        out[name] = (q.float() * s[:, None]).to(getattr(torch, obj["dtypes"][name]))
    for name, t in obj["passthrough"].items():
        out[name] = t.to(getattr(torch, obj["dtypes"][name]))
    return out


def pack_artifact(obj: dict[str, object], preset: int) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return lzma.compress(buffer.getvalue(), preset=preset)


def unpack_artifact(blob: bytes) -> dict[str, object]:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=True)


# -----------------------------
# EVALUATION
# -----------------------------
#
# All totals are [sum of nats, tokens, bytes] in float64.


def reduce_totals(totals: Tensor) -> Tensor:
    totals = totals.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals, op=dist.ReduceOp.SUM)
    return totals


def loss_and_bpb(totals: Tensor) -> tuple[float, float]:
    nats, tokens, num_bytes = (float(v) for v in totals)
    return nats / tokens, nats / math.log(2.0) / num_bytes


def eval_val(
    args: Hyperparameters,
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_gpu: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    # Quick diagnostic over sequences that do not overlap. What is handed in is the number of eval_val_ttt.
    seq_len = args.train_seq_len
    local_seqs = max(1, args.val_batch_size // (world_size * seq_len))
    total_seqs = (val_gpu.numel() - 1) // seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    diag = torch.zeros(3, device=device, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for s in range(seq_start, seq_end, local_seqs):
            e = min(s + local_seqs, seq_end)
            local = val_gpu[s * seq_len : e * seq_len + 1]
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                batch_loss = model(x, y).detach()
            diag[0] += batch_loss.to(torch.float64) * y.numel()
            diag[1] += y.numel()
            diag[2] += count_bytes(x.reshape(-1), y.reshape(-1), luts).sum()
    model.train()
    return loss_and_bpb(reduce_totals(diag))


def make_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int]]:
    """(start of the window, first position in it that is scored). Positions 0..total-1 are each scored once: the first
    window scores all of itself, every other one only what lies beyond the window before it."""
    if total < seq_len:
        raise ValueError(f"validation set has {total} positions, fewer than one window of {seq_len}")
    windows = [(0, 0)]
    done = seq_len
    while done < total:
        end = min(done + stride, total)
        windows.append((end - seq_len, seq_len - (end - done)))
        done = end
    return windows


def gather_windows(val_gpu: Tensor, batch: list[tuple[int, int]], seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    starts = torch.tensor([w[0] for w in batch], device=val_gpu.device)
    firsts = torch.tensor([w[1] for w in batch], device=val_gpu.device)
    offsets = torch.arange(seq_len + 1, device=val_gpu.device)
    span = val_gpu[starts[:, None] + offsets[None, :]]
    scored = offsets[None, :-1] >= firsts[:, None]
    return span[:, :-1].contiguous(), span[:, 1:].contiguous(), scored


def token_nll(logits: Tensor, y: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits.float(), dim=-1)
    return -log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def score_batch(
    logits_fn, val_gpu: Tensor, batch: list[tuple[int, int]], seq_len: int, luts: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    x, y, scored = gather_windows(val_gpu, batch, seq_len)
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        logits = logits_fn(x)
    nll = token_nll(logits, y)
    out = torch.zeros(3, device=val_gpu.device, dtype=torch.float64)
    out[0] = nll[scored].to(torch.float64).sum()
    out[1] = scored.sum()
    out[2] = count_bytes(x[scored], y[scored], luts).sum()
    return out


def eval_val_sliding(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_gpu: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Fixed weights, stride 64. Used as the final number when TTT_ENABLED=0."""
    windows = make_windows(val_gpu.numel() - 1, args.eval_seq_len, args.eval_stride)
    lo = len(windows) * rank // world_size
    hi = len(windows) * (rank + 1) // world_size
    logits_fn = torch.compile(model.forward_logits, dynamic=False)
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    model.eval()
    for i in range(lo, hi, args.eval_batch_seqs):
        sums += score_batch(logits_fn, val_gpu, windows[i : min(i + args.eval_batch_seqs, hi)], args.eval_seq_len, luts)
    sums = reduce_totals(sums)
    if int(sums[1]) != val_gpu.numel() - 1:
        raise RuntimeError(f"scored {int(sums[1])} tokens of {val_gpu.numel() - 1}")
    return loss_and_bpb(sums)


# -----------------------------
# TEST-TIME TRAINING
# -----------------------------


def ttt_parameters(model: GPT) -> list[nn.Parameter]:
    # All blocks; the embeddings and the skip weights stay as they are in the artifact.
    params = []
    for name, p in model.named_parameters():
        train_it = name.startswith("blocks.")
        p.requires_grad_(train_it)
        if train_it:
            params.append(p)
    return params


def train_on_chunk(
    args: Hyperparameters,
    model: GPT,
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    span: Tensor,
    rank: int,
    world_size: int,
) -> None:
    """A few epochs of SGD on a chunk. Every rank takes some of the sequences and the gradients are summed, so the
    weights stay the same everywhere."""
    seq_len = args.train_seq_len
    n = (span.numel() - 1) // seq_len
    if n == 0:
        return
    xs = span[: n * seq_len].view(n, seq_len)
    ys = span[1 : n * seq_len + 1].view(n, seq_len)
    per_step = args.ttt_batch_seqs * world_size
    model.train()
    for _ in range(args.ttt_epochs):
        for s in range(0, n, per_step):
            e = min(s + per_step, n)
            xb, yb = xs[s:e][rank::world_size], ys[s:e][rank::world_size]
            optimizer.zero_grad(set_to_none=True)
            if xb.size(0) > 0:
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(xb, yb)
                (loss * (xb.size(0) / (e - s))).backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if world_size > 1:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()


def time_left_for_ttt(args: Hyperparameters, eval_t0: float, device: torch.device) -> bool:
    # All ranks must decide alike, so the slowest clock counts.
    elapsed = torch.tensor(time.perf_counter() - eval_t0, device=device, dtype=torch.float64)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed) < args.ttt_stop_seconds


def eval_val_ttt(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_gpu: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    eval_t0: float,
    log0,
) -> tuple[float, float]:
    """Score-first TTT: all positions of chunk c are scored with the weights made from chunks before c, and only then is
    chunk c trained on. The last chunk is scored and never trained on."""
    seq_len, stride, chunk = args.eval_seq_len, args.eval_stride, args.ttt_chunk_tokens
    if chunk % stride or seq_len % stride or chunk < seq_len:
        raise ValueError("TTT_CHUNK_TOKENS and EVAL_SEQ_LEN must be multiples of EVAL_STRIDE")
    total = val_gpu.numel() - 1
    num_chunks = math.ceil(total / chunk)
    chunk_windows: list[list[tuple[int, int]]] = [[] for _ in range(num_chunks)]
    for start, first in make_windows(total, seq_len, stride):
        chunk_windows[(start + first) // chunk].append((start, first))

    params = ttt_parameters(model)
    optimizer = torch.optim.SGD(params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    logits_fn = torch.compile(model.forward_logits, dynamic=False)
    totals = torch.zeros(3, device=device, dtype=torch.float64)
    adapting = True
    log0(f"ttt:start chunks:{num_chunks} chunk_tokens:{chunk} params:{sum(p.numel() for p in params)}")

    for ci in range(num_chunks):
        # Score.
        model.eval()
        mine = chunk_windows[ci][rank::world_size]
        for i in range(0, len(mine), args.eval_batch_seqs):
            totals += score_batch(logits_fn, val_gpu, mine[i : i + args.eval_batch_seqs], seq_len, luts)

        # Then train on what was just scored: targets ci * chunk + 1 ... (ci + 1) * chunk.
        if ci == num_chunks - 1:
            break
        if adapting and not time_left_for_ttt(args, eval_t0, device):
            adapting = False
            log0(f"ttt:stop chunk:{ci}/{num_chunks} the rest is scored with the weights as they are")
        if adapting:
            lr = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            span = val_gpu[ci * chunk : min((ci + 1) * chunk, total) + 1]
            train_on_chunk(args, model, params, optimizer, span, rank, world_size)
        if ci % 200 == 0 and rank == 0:
            _loss, running_bpb = loss_and_bpb(totals)
            log0(f"ttt:chunk {ci}/{num_chunks} rank0_bpb:{running_bpb:.5f} time:{time.perf_counter() - eval_t0:.1f}s")

    totals = reduce_totals(totals)
    if int(totals[1]) != total:
        raise RuntimeError(f"scored {int(totals[1])} tokens of {total}")
    return loss_and_bpb(totals)


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: Hyperparameters, model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    embed_params = [model.tok_emb.weight, model.bigram.embed.weight]
    matrix_params: list[nn.Parameter] = [model.bigram.proj.weight]
    scalar_params: list[nn.Parameter] = [model.skip_weights, model.bigram.scale]
    for name, p in model.blocks.named_parameters():
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            matrix_params.append(p)
        else:
            scalar_params.append(p)
    betas = (args.beta1, args.beta2)
    optimizer_tok = torch.optim.AdamW(
        [{"params": embed_params, "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        betas=betas,
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizer_muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        wd=args.muon_wd,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizer_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=betas,
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    return [optimizer_tok, optimizer_muon, optimizer_scalar], optimizer_muon


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, train_cap_ms: float | None) -> float:
    if args.warmdown_iters <= 0:
        return 1.0
    if train_cap_ms is None:
        start = max(args.iterations - args.warmdown_iters, 0)
        return max((args.iterations - step) / args.warmdown_iters, 0.0) if step >= start else 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(train_cap_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


def main() -> None:
    global zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # -----------------------------
    # DISTRIBUTED + CUDA SETUP
    # -----------------------------

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size <= 0 or 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so that grad_accum_steps stays integral")
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
            print(msg, flush=True)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)

    # -----------------------------
    # TOKENIZER + VALIDATION SETUP
    # -----------------------------

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match the tokenizer's {int(sp.vocab_size())}")
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    val_tokens = load_validation_tokens(args.val_files)
    val_gpu = val_tokens.to(device=device, dtype=torch.int64)
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = cast_model(GPT(args).to(device))
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    optimizers, optimizer_muon = build_optimizers(args, base_model)
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} max_wallclock_seconds:{args.max_wallclock_seconds:.1f}"
    )

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

    # The clock of the training; the steps stop early enough for what follows them.
    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None
    train_cap_ms = max_wallclock_ms - 1000.0 * args.quant_reserve_seconds if max_wallclock_ms is not None else None

    # Warm-up compiles the graphs with and without fake quantisation; weights, optimizers and loader are then reset.
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            set_qat(base_model, warmup_step >= args.warmup_steps // 2)
            zero_grad_all()
            forward_backward()
            for opt in optimizers:
                opt.step()
        zero_grad_all()
        set_qat(base_model, False)
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
        log0(f"warmup_step:{args.warmup_steps}/{args.warmup_steps}")

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    ema = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
    swa: dict[str, Tensor] = {}
    swa_count = 0
    qat_on = False
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step:
            break

        if args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, base_model, rank, world_size, device, val_gpu, luts)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, train_cap_ms)
        if not qat_on and scale < args.qat_start_scale and step > 0:
            qat_on = True
            set_qat(base_model, True)
            log0(f"qat:on step:{step} scale:{scale:.4f}")

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

        step += 1
        ema_update(ema, base_model, args.ema_decay)
        if scale < args.swa_start_scale and step % args.swa_every == 0:
            swa_count = swa_collect(swa, ema, swa_count)

        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # All ranks stop at the same step.
        reached_cap = train_cap_ms is not None and approx_training_time_ms >= train_cap_ms
        if distributed and train_cap_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    t0 = time.perf_counter()
    log0(f"stopping: train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}")
    log0(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # -----------------------------
    # AVERAGE, QUANTISE, PACK (still on the training clock)
    # -----------------------------

    set_qat(base_model, False)
    averaged = swa if swa_count > 0 else ema
    load_averaged(base_model, averaged)
    log0(f"averaging: {'swa of ema' if swa_count > 0 else 'ema'} snapshots:{swa_count}")

    # Half of the reserve at most goes to the calibration, which reads the training shards.
    calib_deadline = t0 + 0.5 * args.quant_reserve_seconds
    moments = collect_input_moments(args, base_model, train_loader, grad_accum_steps, calib_deadline)
    quant_obj = quantize_state_dict(base_model.state_dict(), moments)
    artifact_path = Path("final_model.int6.ptz")
    code_bytes = len(code.encode("utf-8"))
    if master_process:
        artifact_path.write_bytes(pack_artifact(quant_obj, args.lzma_preset))
    if distributed:
        dist.barrier()
    torch.cuda.synchronize()
    quant_time_ms = 1000.0 * (time.perf_counter() - t0)
    log0(f"calibration+quantisation:{quant_time_ms:.0f}ms train+quant:{training_time_ms + quant_time_ms:.0f}ms")
    if max_wallclock_ms is not None and training_time_ms + quant_time_ms > max_wallclock_ms:
        raise RuntimeError("training, calibration and packing took longer than MAX_WALLCLOCK_SECONDS")
    model_bytes = artifact_path.stat().st_size
    total_bytes = model_bytes + code_bytes
    log0(f"Serialized model int6+lzma: {model_bytes} bytes")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size: {total_bytes} bytes")
    if total_bytes > 16_000_000:
        raise RuntimeError(f"submission has {total_bytes} bytes, more than 16000000")

    # -----------------------------
    # FINAL EVALUATION, from the artifact alone
    # -----------------------------

    eval_t0 = time.perf_counter()
    del model, compiled_model, base_model, optimizers, optimizer_muon, ema, swa, averaged, moments, quant_obj, train_loader
    torch.cuda.empty_cache()
    torch._dynamo.reset()

    eval_model = cast_model(GPT(args).to(device))
    restored = dequantize_state_dict(unpack_artifact(artifact_path.read_bytes()))
    eval_model.load_state_dict(restored, strict=True)

    q_loss, q_bpb = eval_val(args, eval_model, rank, world_size, device, val_gpu, luts)
    log0(f"diag_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} time:{time.perf_counter() - eval_t0:.1f}s")

    if args.ttt_enabled:
        label = "final_ttt"
        val_loss, val_bpb = eval_val_ttt(args, eval_model, rank, world_size, device, val_gpu, luts, eval_t0, log0)
    else:
        label = "final_sliding_window"
        val_loss, val_bpb = eval_val_sliding(args, eval_model, rank, world_size, device, val_gpu, luts)
    torch.cuda.synchronize()
    eval_seconds = time.perf_counter() - eval_t0
    log0(f"{label} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} stride:{args.eval_stride} eval_time:{eval_seconds:.1f}s")
    log0(f"{label}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if eval_seconds > args.eval_budget_seconds:
        log0(f"WARNING: evaluation took longer than {args.eval_budget_seconds:.0f}s, this run does not count")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
