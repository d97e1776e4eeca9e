"""
train_gpt.py -- the 9x512 baseline plus a mixture of n-gram experts at evaluation.

This started as a non-record experiment ("how much does a *properly summed* n-gram cache buy on top of the baseline?") and was
cleaned up into a submission. The n-gram part is slower and weaker than the hashed target-only caches that were going around,
because every expert here returns a whole row over the vocabulary, and the rows are what is mixed:

    p(. | x_<t) = w_0 p_nn(. | x_<t) + sum_n w_n p_n(. | x_<t),       w = softmax(gate(statistics of x_<t))

* p_nn: the EMA weights, int6 per row, read back from the artifact.
* p_n: order-n rows of a count table indexed by a hash of the *context*; absolute discounting backs off to order n-1. Two contexts
  in one bucket share a row, which costs accuracy but keeps each row a distribution.
* the tables start from a few hundred thousand training tokens that are carried (and paid for) in the artifact, and take in the
  validation tokens chunk by chunk, always after the chunk was scored.
* the gate is fitted on training tokens inside the 600 s, and follows along with one small SGD step per scored chunk.

Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
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
import zstandard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# HYPERPARAMETERS
# -----------------------------


class Hyperparameters:
    # Data.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Training length. The wall clock ends the run, not the iteration count.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    # Held back from the loop for what still reads training tokens: calibration, gate and temperature, quantisation.
    finish_reserve_seconds = float(os.environ.get("FINISH_RESERVE_SECONDS", 48.0))

    # Logging.
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 2000))
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 524_288))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 250))

    # Model.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 10))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Optimizer.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.05))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.035))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.035))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.85))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 700))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.03))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # Quantisation.
    quant_levels = int(os.environ.get("QUANT_LEVELS", 31))
    calib_batches = int(os.environ.get("CALIB_BATCHES", 8))
    calib_seqs = int(os.environ.get("CALIB_SEQS", 32))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    size_limit = int(os.environ.get("SIZE_LIMIT", 16_000_000))

    # N-gram experts.
    max_order = int(os.environ.get("MAX_ORDER", 6))
    bucket_bits = int(os.environ.get("BUCKET_BITS", 17))
    discount = float(os.environ.get("DISCOUNT", 0.6))
    seed_tokens = int(os.environ.get("SEED_TOKENS", 393_216))
    gate_fit_tokens = int(os.environ.get("GATE_FIT_TOKENS", 1_048_576))
    gate_fit_lr = float(os.environ.get("GATE_FIT_LR", 0.02))

    # Evaluation.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 1024))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 64))
    chunk_windows = int(os.environ.get("CHUNK_WINDOWS", 2048))
    online_lr = float(os.environ.get("ONLINE_LR", 0.01))
    online_bias_lr = float(os.environ.get("ONLINE_BIAS_LR", 0.5))
    online_batches = int(os.environ.get("ONLINE_BATCHES", 1))


CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear")

# -----------------------------
# MUON
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    # Orthogonalises a matrix with the quintic iteration of the Muon post.
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    tall = X.size(0) > X.size(1)
    if tall:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonal update. Matrices are dealt round-robin to the ranks and their updates summed."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float):
        defaults = dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cursor = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(g)
                    g = g.add(buf, alpha=group["momentum"])
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            cursor = 0
            for p in params:
                g = flat[cursor : cursor + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(g, alpha=-group["lr"])
                cursor += p.numel()


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header in {file}")
    num_tokens = int(header[2])
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=256 * 4)
    if tokens.size != num_tokens:
        raise ValueError(f"short read in {file}: {tokens.size} of {num_tokens}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    """The whole validation split, in shard order. Nothing is cut off: the last window is simply shorter."""
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no files match {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


class TokenStream:
    """Reads shards one after another and starts again after the last."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no files match {pattern}")
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
    """Every step takes one contiguous block from the shared stream; each rank keeps its own span of it."""

    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        span = local_tokens + 1
        block = self.stream.take(span * self.world_size)
        start = self.rank * span
        local = block[start : start + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# BYTE TABLES
# -----------------------------


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: its bytes without the leading space, whether it has one, and whether it is a control token.

    A leading space is one byte of the original text unless the token follows a control token (the start of a document), where
    sentencepiece put it there itself. Byte-fallback pieces stand for exactly one byte.
    """
    table_size = max(int(sp.vocab_size()), vocab_size)
    base_bytes_np = np.zeros((table_size,), dtype=np.int16)
    has_leading_space_np = np.zeros((table_size,), dtype=np.bool_)
    is_boundary_np = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(int(sp.vocab_size())):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary_np[token_id] = False
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
        torch.tensor(is_boundary_np, dtype=torch.bool, device=device),
    )


def count_bytes(prev_ids: Tensor, target_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    base_bytes_lut, has_leading_space_lut, is_boundary_lut = luts
    token_bytes = base_bytes_lut[target_ids].to(torch.int64)
    token_bytes += (has_leading_space_lut[target_ids] & ~is_boundary_lut[prev_ids]).to(torch.int64)
    return token_bytes


class Tally:
    """Sums of nats, tokens and bytes over what this rank scored; `total` adds up the ranks."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)

    def add(self, nll: Tensor, token_bytes: Tensor) -> None:
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += float(nll.numel())
        self.sums[2] += token_bytes.to(torch.float64).sum()

    def total(self) -> tuple[float, float, float]:
        sums = self.sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        return float(sums[0]), float(sums[1]), float(sums[2])

    def score(self) -> tuple[float, float, int]:
        nats, tokens, num_bytes = self.total()
        return nats / tokens, nats / math.log(2.0) / num_bytes, int(tokens)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    # fp32 weights, matmul in the dtype of the activations.
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._seq_len_cached != seq_len or self._cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos = freqs.cos()[None, None, :, :]
            self._sin = freqs.sin()[None, None, :, :]
            self._seq_len_cached = seq_len
        return self._cos.to(dtype=dtype), self._sin.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = self.num_kv_heads * self.head_dim
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
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads)
        return self.proj(y.transpose(1, 2).reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        self.fc = CastedLinear(dim, mlp_mult * dim, bias=False)
        self.proj = CastedLinear(mlp_mult * dim, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, args.num_heads, args.num_kv_heads, args.rope_base, args.qk_gain_init)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(self.attn_norm(x))
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))


class SmearGate(nn.Module):
    """Mixes a little of the previous token's embedding into each; never across the start of a document."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.smear = nn.Parameter(torch.full((dim,), -3.0, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (input_ids != self.bos_id).to(x.dtype)[..., None]
        return x + torch.sigmoid(self.smear).to(x.dtype)[None, None, :] * prev * inside


class GPT(nn.Module):
    def __init__(self, args: type[Hyperparameters]):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tied_embed_init_std = args.tied_embed_init_std
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.smear_gate = SmearGate(args.model_dim, args.bos_id)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args) for _ in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = F.rms_norm(self.tok_emb(input_ids), (self.tok_emb.embedding_dim,))
        x = self.smear_gate(x, input_ids)
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips and i < self.num_skip:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0)
        logits = F.linear(self.final_norm(x), self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


class EMA:
    """Running average of the float weights, kept in fp32; the model that is packed."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            self.shadow[name].lerp_(p.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.shadow[name].to(p.dtype))


# -----------------------------
# QUANTISATION (int6 per row, clip chosen per row)
# -----------------------------

CLIP_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


class InputMoments:
    """Mean square of the inputs of every linear layer: the diagonal of GPTQ's Hessian, which weighs the clip search below."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.handles.append(module.register_forward_pre_hook(self._hook(name + ".weight")))

    def _hook(self, key: str):
        def hook(_module, inputs) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            self.sums[key] = self.sums.get(key, 0.0) + x.square().sum(dim=0)
            self.counts[key] = self.counts.get(key, 0) + x.size(0)

        return hook

    def close(self) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        return {key: total / self.counts[key] for key, total in self.sums.items()}


@torch.no_grad()
def collect_moments(args: type[Hyperparameters], model: GPT, loader: DistributedTokenLoader) -> dict[str, Tensor]:
    watch = InputMoments(model)
    model.eval()
    for _ in range(args.calib_batches):
        x, _ = loader.next_batch(loader.world_size * args.calib_seqs * args.train_seq_len, args.train_seq_len, 1)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.forward_logits(x)
    moments = watch.close()
    for key in sorted(moments):
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(moments[key], op=dist.ReduceOp.AVG)
    return moments


def quantize_rows(weight: Tensor, moment: Tensor | None, levels: int) -> tuple[Tensor, Tensor]:
    """GPTQ-lite: per row the clip percentile with the least (input-weighted) squared error."""
    w = weight.float()
    importance = torch.ones(w.size(1), device=w.device) if moment is None else moment.to(w.device) + 1e-8
    best_q = torch.zeros_like(w, dtype=torch.int8)
    best_scale = torch.ones(w.size(0), device=w.device)
    best_error = torch.full((w.size(0),), float("inf"), device=w.device)
    for percentile in CLIP_PERCENTILES:
        clip = torch.quantile(w.abs(), percentile, dim=1) if percentile < 1.0 else w.abs().amax(dim=1)
        scale = (clip / levels).clamp_min(1e-8).half().float()
        q = torch.clamp(torch.round(w / scale[:, None]), -levels, levels)
        error = ((q * scale[:, None] - w).square() * importance[None, :]).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_q = torch.where(better[:, None], q.to(torch.int8), best_q)
    return best_q, best_scale.half()


def quantize_model(args: type[Hyperparameters], model: GPT, moments: dict[str, Tensor]) -> dict[str, object]:
    quantized: dict[str, tuple[Tensor, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        t = tensor.detach()
        if t.ndim == 2 and t.numel() > 65_536 and not any(pattern in name for pattern in CONTROL_PATTERNS):
            levels = 127 if name == "tok_emb.weight" else args.quant_levels
            q, scale = quantize_rows(t, moments.get(name), levels)
            quantized[name] = (q.cpu(), scale.cpu())
        else:
            plain[name] = t.half().cpu() if t.is_floating_point() else t.cpu()
    return {"quantized": quantized, "plain": plain}


def dequantize_state(packed: dict[str, object]) -> dict[str, Tensor]:
    state = {name: t.float() if t.is_floating_point() else t for name, t in packed["plain"].items()}
    for name, (q, scale) in packed["quantized"].items():
        state[name] = q.float() * scale.float()[:, None]
    return state


def pack_artifact(args: type[Hyperparameters], payload: dict[str, object], path: str) -> int:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    blob = zstandard.ZstdCompressor(level=args.zstd_level).compress(buffer.getvalue())
    with open(path, "wb") as f:
        f.write(blob)
    return len(blob)


def unpack_artifact(path: str) -> dict[str, object]:
    with open(path, "rb") as f:
        blob = f.read()
    return torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(blob)), map_location="cpu", weights_only=True)


# -----------------------------
# N-GRAM EXPERTS
# -----------------------------

HASH_PRIMES = (36313, 27191, 51647, 81929, 131071, 65537, 174763)


class OrderTable:
    """Counts of one order: a row of the vocabulary per bucket of hashed contexts (order-1 tokens each)."""

    def __init__(self, order: int, bucket_bits: int, vocab_size: int, device: torch.device):
        self.order = order
        self.vocab_size = vocab_size
        self.mask = (1 << bucket_bits) - 1 if order > 1 else 0
        self.counts = torch.zeros(self.mask + 1, vocab_size, dtype=torch.int32, device=device)

    def bucket(self, tokens: Tensor, last: Tensor) -> Tensor:
        """Bucket of the context that ends with tokens[last]."""
        h = torch.zeros_like(last)
        for back in range(self.order - 1):
            piece = torch.where(last >= back, tokens[(last - back).clamp_min(0)], torch.zeros_like(last))
            h = h ^ ((piece + 1) * HASH_PRIMES[back % len(HASH_PRIMES)] * (2 * back + 1))
        return (h ^ (h >> 15)) & self.mask

    def rows(self, tokens: Tensor, last: Tensor) -> Tensor:
        return self.counts[self.bucket(tokens, last)].float()

    def absorb(self, tokens: Tensor, targets_at: Tensor) -> None:
        slot = self.bucket(tokens, targets_at - 1) * self.vocab_size + tokens[targets_at]
        ones = torch.ones_like(slot, dtype=torch.int32)
        self.counts.view(-1).scatter_add_(0, slot, ones)


class NgramExperts:
    """All orders. `distributions` gives one full row per order and position; each sums to one over the vocabulary."""

    def __init__(self, args: type[Hyperparameters], device: torch.device):
        self.vocab_size = args.vocab_size
        self.discount = args.discount
        self.orders = list(range(1, args.max_order + 1))
        self.tables = [OrderTable(order, args.bucket_bits, args.vocab_size, device) for order in self.orders]

    @property
    def num_experts(self) -> int:
        return len(self.tables)

    def distributions(self, tokens: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """([experts, positions, vocab] probabilities, [positions, 2 * experts] statistics of the contexts)."""
        lower = torch.full((last.numel(), self.vocab_size), 1.0 / self.vocab_size, device=last.device)
        experts: list[Tensor] = []
        stats: list[Tensor] = []
        for table in self.tables:
            counts = table.rows(tokens, last)
            total = counts.sum(dim=-1, keepdim=True)
            distinct = (counts > 0).sum(dim=-1, keepdim=True).float()
            kept = (counts - self.discount).clamp_min(0.0)
            freed = self.discount * distinct
            row = (kept + freed * lower) / total.clamp_min(1.0)
            row = torch.where(total > 0, row, lower)
            experts.append(row)
            stats.append(torch.log1p(total) / 8.0)
            stats.append(distinct / (total + 1.0))
            lower = row
        return torch.stack(experts), torch.cat(stats, dim=-1)

    def absorb(self, tokens: Tensor, first: int, last: int, block: int = 1 << 20) -> None:
        """Takes in tokens[first..last] as targets, each with the context before it."""
        for lo in range(first, last + 1, block):
            targets_at = torch.arange(lo, min(lo + block, last + 1), device=tokens.device)
            for table in self.tables:
                table.absorb(tokens, targets_at)


class MixtureGate(nn.Module):
    """Weights of the network and of each order, from statistics of the context; and the network's temperature and bias."""

    def __init__(self, num_experts: int, vocab_size: int):
        super().__init__()
        self.num_features = 2 * num_experts + 3
        self.mix = nn.Linear(self.num_features, num_experts + 1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        with torch.no_grad():
            self.mix.bias[0] = 4.0
        self.register_buffer("temperature", torch.ones(()))
        self.logit_bias = nn.Parameter(torch.zeros(vocab_size))

    def network_logits(self, logits: Tensor) -> Tensor:
        return logits.float() / self.temperature + self.logit_bias

    def forward(self, logits: Tensor, experts: Tensor, stats: Tensor) -> Tensor:
        """log p over the vocabulary, [positions, vocab]. The targets are not known here."""
        log_p = F.log_softmax(self.network_logits(logits), dim=-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(dim=-1, keepdim=True)
        top = p.amax(dim=-1, keepdim=True)
        agree = (experts[-1] * p).sum(dim=-1, keepdim=True)
        features = torch.cat((stats, entropy.detach() / 4.0, top.detach(), agree.detach()), dim=-1)
        log_w = F.log_softmax(self.mix(features), dim=-1)
        parts = [log_p + log_w[:, :1]]
        for i in range(experts.size(0)):
            parts.append(torch.log(experts[i].clamp_min(1e-12)) + log_w[:, i + 1 : i + 2])
        return torch.logsumexp(torch.stack(parts), dim=0)


# -----------------------------
# EVALUATION
# -----------------------------


@torch.no_grad()
def eval_val(args: type[Hyperparameters], model: nn.Module, rank: int, world_size: int, device: torch.device, val_tokens: Tensor, luts) -> tuple[float, float]:
    """Plain validation in whole sequences, for the log only."""
    batch_seqs = max(args.val_batch_tokens // (world_size * args.train_seq_len), 1)
    total_seqs = (val_tokens.numel() - 1) // args.train_seq_len
    seq_start = total_seqs * rank // world_size
    seq_end = total_seqs * (rank + 1) // world_size
    tally = Tally(device)
    model.eval()
    for first in range(seq_start, seq_end, batch_seqs):
        after = min(first + batch_seqs, seq_end)
        raw = val_tokens[first * args.train_seq_len : after * args.train_seq_len + 1].to(device=device, dtype=torch.int64)
        x = raw[:-1].reshape(-1, args.train_seq_len)
        y = raw[1:].reshape(-1, args.train_seq_len)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = model.forward_logits(x)
        nll = F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none")
        tally.add(nll, count_bytes(x.reshape(-1), y.reshape(-1), luts))
    model.train()
    loss, bpb, _ = tally.score()
    return loss, bpb


def make_windows(num_targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, scored_from): inputs start..end-1, of which scored_from..end-1 are scored. Every input is scored once."""
    end = min(seq_len, num_targets)
    windows = [(0, end, 0)]
    while end < num_targets:
        scored_from = end
        end = min(end + stride, num_targets)
        windows.append((max(end - seq_len, 0), end, scored_from))
    return windows


class MixtureEvaluator:
    """Scores a token stream with the network and the experts, chunk by chunk; learns from a chunk once it is scored."""

    def __init__(self, args: type[Hyperparameters], model: GPT, gate: MixtureGate, experts: NgramExperts, device: torch.device):
        self.args = args
        self.model = model
        self.gate = gate
        self.experts = experts
        self.device = device
        self.logits_fn = torch.compile(model.forward_logits, dynamic=True)
        self.gate_optimizer = torch.optim.SGD(
            [
                {"params": [gate.mix.weight, gate.mix.bias], "lr": args.online_lr},
                {"params": [gate.logit_bias], "lr": args.online_bias_lr},
            ]
        )

    @torch.no_grad()
    def inspect(self, tokens: Tensor, windows: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Network logits, expert rows and statistics at the scored positions of a batch of windows, and those positions."""
        length = max(end - start for start, end, _ in windows)
        x = torch.zeros(len(windows), length, dtype=torch.int64, device=self.device)
        scored = torch.zeros(len(windows), length, dtype=torch.bool, device=self.device)
        where = torch.zeros(len(windows), length, dtype=torch.int64, device=self.device)
        for i, (start, end, scored_from) in enumerate(windows):
            x[i, : end - start] = tokens[start:end]
            scored[i, scored_from - start : end - start] = True
            where[i, : end - start] = torch.arange(start, end, device=self.device)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = self.logits_fn(x)
        last = where[scored]
        rows, stats = self.experts.distributions(tokens, last)
        return logits[scored], rows, stats, last

    @torch.no_grad()
    def score_batch(self, tokens: Tensor, windows: list[tuple[int, int, int]], tally: Tally, luts) -> None:
        logits, rows, stats, last = self.inspect(tokens, windows)
        log_probs = self.gate(logits, rows, stats)
        targets = tokens[last + 1]
        nll = -log_probs.gather(1, targets[:, None]).squeeze(1)
        tally.add(nll, count_bytes(tokens[last], targets, luts))

    def learn_gate(self, tokens: Tensor, windows: list[tuple[int, int, int]]) -> None:
        """One step on (some of) the windows of a chunk that all ranks have scored."""
        self.gate_optimizer.zero_grad(set_to_none=False)
        batch_seqs = self.args.eval_batch_seqs
        for first in range(0, min(len(windows), self.args.online_batches * batch_seqs), batch_seqs):
            logits, rows, stats, last = self.inspect(tokens, windows[first : first + batch_seqs])
            log_probs = self.gate(logits, rows, stats)
            loss = F.nll_loss(log_probs, tokens[last + 1])
            loss.backward()
        for p in self.gate.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        self.gate_optimizer.step()

    def run(self, tokens: Tensor, rank: int, world_size: int, luts, log=print) -> tuple[float, float, int]:
        args = self.args
        windows = make_windows(tokens.numel() - 1, args.eval_seq_len, args.eval_stride)
        tally = Tally(self.device)
        self.model.eval()
        for chunk_start in range(0, len(windows), args.chunk_windows):
            chunk = windows[chunk_start : chunk_start + args.chunk_windows]
            mine = chunk[len(chunk) * rank // world_size : len(chunk) * (rank + 1) // world_size]
            for first in range(0, len(mine), args.eval_batch_seqs):
                self.score_batch(tokens, mine[first : first + args.eval_batch_seqs], tally, luts)
            # The chunk's losses are final from here on; only now may anything learn from its tokens.
            if dist.is_available() and dist.is_initialized():
                dist.barrier()
            self.learn_gate(tokens, mine)
            self.experts.absorb(tokens, chunk[0][2] + 1, chunk[-1][1])
            if chunk_start // args.chunk_windows % 50 == 0:
                log(f"mix:window {chunk_start}/{len(windows)} w_bias:{[round(v, 2) for v in self.gate.mix.bias.tolist()]}")
        return tally.score()


# -----------------------------
# FITTING THE MIXTURE (training tokens, inside the training budget)
# -----------------------------


def average_over_ranks(module: nn.Module) -> None:
    if dist.is_available() and dist.is_initialized():
        for p in module.parameters():
            dist.all_reduce(p.data, op=dist.ReduceOp.AVG)


@torch.no_grad()
def fit_temperature(model: GPT, gate: MixtureGate, loader: DistributedTokenLoader, seq_len: int) -> float:
    """Temperature of the network alone, by grid, on a training batch it has not seen yet."""
    x, y = loader.next_batch(loader.world_size * 32 * seq_len, seq_len, 1)
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        logits = model.forward_logits(x)
    logits = logits.float().reshape(-1, logits.size(-1))
    grid = [0.94 + 0.01 * i for i in range(13)]
    losses = torch.stack([F.cross_entropy(logits / t, y.reshape(-1)) for t in grid])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(losses, op=dist.ReduceOp.AVG)
    best = grid[int(losses.argmin())]
    gate.temperature.fill_(best)
    return best


def fit_gate(args: type[Hyperparameters], model: GPT, gate: MixtureGate, stream: Tensor, seed: Tensor, rank: int, world_size: int, device: torch.device) -> float:
    """Rehearses the evaluation on training tokens: the same chunks, tables that start from the same seed, but Adam on the gate.

    Only the mixing weights are fitted here; the logit bias stays zero until evaluation.
    """
    experts = NgramExperts(args, device)
    experts.absorb(seed, 1, seed.numel() - 1)
    rehearsal = MixtureEvaluator(args, model, gate, experts, device)
    rehearsal.logits_fn = model.forward_logits
    optimizer = torch.optim.Adam([gate.mix.weight, gate.mix.bias], lr=args.gate_fit_lr)
    windows = make_windows(stream.numel() - 1, args.eval_seq_len, args.eval_stride)
    step_windows = 16 * world_size
    running = 0.0
    model.eval()
    for chunk_start in range(0, len(windows), args.chunk_windows):
        chunk = windows[chunk_start : chunk_start + args.chunk_windows]
        for first in range(0, len(chunk) - step_windows + 1, step_windows * 2):
            mine = chunk[first + 16 * rank : first + 16 * (rank + 1)]
            logits, rows, stats, last = rehearsal.inspect(stream, mine)
            loss = F.nll_loss(gate(logits, rows, stats), stream[last + 1])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for p in (gate.mix.weight, gate.mix.bias):
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            optimizer.step()
            running = 0.95 * running + 0.05 * float(loss.detach()) if running else float(loss.detach())
        experts.absorb(stream, chunk[0][2] + 1, chunk[-1][1])
    average_over_ranks(gate)
    gate.zero_grad(set_to_none=True)
    return running


@torch.no_grad()
def check_rows(gate: MixtureGate, experts: NgramExperts, tokens: Tensor, vocab_size: int) -> float:
    """Largest distance from one of the summed mixture, at a few hundred positions of the seed; printed."""
    last = torch.linspace(8, tokens.numel() - 2, 256, device=tokens.device).long()
    rows, stats = experts.distributions(tokens, last)
    logits = torch.randn(last.numel(), vocab_size, device=tokens.device)
    sums = gate(logits, rows, stats).double().exp().sum(dim=-1)
    return float((sums - 1.0).abs().max())


# -----------------------------
# TRAINING
# -----------------------------


class Logger:
    def __init__(self, run_id: str, master: bool):
        self.master = master
        self.path = f"logs/{run_id}.txt"
        if master:
            os.makedirs("logs", exist_ok=True)

    def __call__(self, message: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(message, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(message, file=f)


def build_optimizers(args: type[Hyperparameters], model: GPT) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    scalars: list[nn.Parameter] = [model.skip_weights, model.smear_gate.smear]
    for name, p in model.blocks.named_parameters():
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_PATTERNS):
            matrices.append(p)
        else:
            scalars.append(p)
    betas = (args.beta1, args.beta2)
    embed = torch.optim.Adam(
        [{"params": [model.tok_emb.weight], "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}],
        betas=betas,
        eps=args.adam_eps,
        fused=True,
    )
    muon = Muon(
        matrices,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_weight_decay,
    )
    for group in muon.param_groups:
        group["base_lr"] = args.matrix_lr
    scalar = torch.optim.Adam(
        [{"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=betas,
        eps=args.adam_eps,
        fused=True,
    )
    return [embed, muon, scalar]


def lr_scale(args: type[Hyperparameters], step: int, elapsed_ms: float, budget_ms: float) -> float:
    """Constant, then linear to zero over what the last `warmdown_iters` steps take of the budget."""
    if args.warmdown_iters <= 0:
        return 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(budget_ms - elapsed_ms, 0.0)
    by_time = remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0
    warmdown_start = args.iterations - args.warmdown_iters
    by_step = max((args.iterations - step) / args.warmdown_iters, 0.0) if step >= warmdown_start else 1.0
    return min(by_time, by_step)


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters

    # -----------------------------
    # DEVICES
    # -----------------------------

    global zeropower_via_newtonschulz5
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
    grad_accum_steps = 8 // world_size
    grad_scale = 1.0 / grad_accum_steps
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    master = rank == 0
    log0 = Logger(args.run_id, master)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    log0(code, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, text=True, check=False).stdout, console=False)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    # -----------------------------
    # TOKENIZER, VALIDATION, MODEL
    # -----------------------------

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size}, but the tokenizer has {int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"train_loader:shards pattern={args.train_files} files:{len(glob.glob(args.train_files))}")
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, p in base_model.named_parameters():
        if p.ndim < 2 or any(pattern in name for pattern in CONTROL_PATTERNS):
            p.data = p.data.float()
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled
    optimizers = build_optimizers(args, base_model)
    muon = optimizers[1]
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(f"experts:orders 1..{args.max_order} buckets:2^{args.bucket_bits} seed_tokens:{args.seed_tokens}")

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    def micro_steps(source: DistributedTokenLoader) -> Tensor:
        train_loss = torch.zeros((), device=device)
        for micro in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro == grad_accum_steps - 1
            x, y = source.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss * grad_scale).backward()
        return train_loss / grad_accum_steps

    # -----------------------------
    # WARM-UP (compiles the kernels; weights and optimizer states are put back)
    # -----------------------------

    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    if args.warmup_steps > 0:
        initial_model = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizers = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            zero_grad_all()
            micro_steps(loader)
            for opt in optimizers:
                opt.step()
            zero_grad_all()
            if warmup_step + 1 == args.warmup_steps:
                log0(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
        base_model.load_state_dict(initial_model, strict=True)
        for opt, state in zip(optimizers, initial_optimizers, strict=True):
            opt.load_state_dict(state)
        if distributed:
            model.require_backward_grad_sync = True
        loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # -----------------------------
    # TRAINING LOOP
    # -----------------------------

    ema = EMA(base_model, args.ema_decay)
    budget_ms = 1000.0 * (args.max_wallclock_seconds - args.finish_reserve_seconds)
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, base_model, rank, world_size, device, val_tokens, luts)
            log0(f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{training_time_ms:.0f}ms")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after_step is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, budget_ms)
        zero_grad_all()
        train_loss = micro_steps(loader)
        warm = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        for group in muon.param_groups:
            group["momentum"] = (1 - warm) * args.muon_momentum_warmup_start + warm * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        ema.update(base_model)
        step += 1

        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms")
        reached_cap = approx_ms >= budget_ms
        if distributed:
            flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # -----------------------------
    # FINISH: EMA, temperature, gate, calibration, packing. All of it counts as training time.
    # -----------------------------

    torch.cuda.synchronize()
    t0 = time.perf_counter()
    ema.copy_to(base_model)
    log0(f"ema:applied decay:{args.ema_decay}")
    seed_stream = TokenStream(args.train_files)
    seed = seed_stream.take(args.seed_tokens).to(torch.int64)
    fit_stream = seed_stream.take(args.gate_fit_tokens).to(device=device, dtype=torch.int64)
    gate = MixtureGate(args.max_order, args.vocab_size).to(device)
    temperature = fit_temperature(base_model, gate, loader, args.train_seq_len)
    fit_loss = fit_gate(args, base_model, gate, fit_stream, seed.to(device), rank, world_size, device)
    log0(f"gate:fitted on {fit_stream.numel()} training tokens, temperature:{temperature:.2f} mixed_loss:{fit_loss:.4f}")
    moments = collect_moments(args, base_model, loader)

    artifact = "final_model.int6.ptz"
    if master:
        payload = {
            "model": quantize_model(args, base_model, moments),
            "gate": {name: t.detach().half().cpu() for name, t in gate.state_dict().items()},
            "seed": seed.to(torch.int16),
        }
        model_bytes = pack_artifact(args, payload, artifact)
    torch.cuda.synchronize()
    if distributed:
        dist.barrier()
    finish_ms = 1000.0 * (time.perf_counter() - t0)
    log0(f"finish:{finish_ms:.0f}ms train_plus_finish:{training_time_ms + finish_ms:.0f}ms of {1000 * args.max_wallclock_seconds:.0f}ms")
    if master:
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        log0(f"Serialized model int6+zstd: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes limit:{args.size_limit}")
        if total_bytes > args.size_limit:
            log0("WARNING: over the size limit")

    # -----------------------------
    # EVALUATION: from the artifact only
    # -----------------------------

    del model, compiled, optimizers, ema, loader, fit_stream, gate, seed
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    eval_t0 = time.perf_counter()
    unpacked = unpack_artifact(artifact)
    eval_model = GPT(args).to(device)
    eval_model.load_state_dict(dequantize_state(unpacked["model"]), strict=True)
    eval_model.eval()
    for p in eval_model.parameters():
        p.requires_grad_(False)
    eval_gate = MixtureGate(args.max_order, args.vocab_size).to(device)
    eval_gate.load_state_dict({name: t.float() for name, t in unpacked["gate"].items()}, strict=True)
    seed_ids = unpacked["seed"].to(device=device, dtype=torch.int64)
    experts = NgramExperts(args, device)
    experts.absorb(seed_ids, 1, seed_ids.numel() - 1)
    log0(f"mixture:max |sum - 1| over {args.vocab_size} tokens: {check_rows(eval_gate, experts, seed_ids, args.vocab_size):.2e}")

    plain_loss, plain_bpb = eval_val(args, eval_model, rank, world_size, device, val_tokens, luts)
    log0(f"final_int6_roundtrip val_loss:{plain_loss:.4f} val_bpb:{plain_bpb:.4f} eval_time:{1000 * (time.perf_counter() - eval_t0):.0f}ms")

    eval_model.eval()
    stream = val_tokens.to(device=device, dtype=torch.int64)
    evaluator = MixtureEvaluator(args, eval_model, eval_gate, experts, device)
    mix_loss, mix_bpb, scored = evaluator.run(stream, rank, world_size, luts, log=log0)
    torch.cuda.synchronize()
    log0(f"scored_tokens:{scored} of {stream.numel() - 1}")
    log0(f"final_mixture val_loss:{mix_loss:.4f} val_bpb:{mix_bpb:.4f} stride:{args.eval_stride} eval_time:{1000 * (time.perf_counter() - eval_t0):.0f}ms")
    log0(f"final_mixture_exact val_loss:{mix_loss:.8f} val_bpb:{mix_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
