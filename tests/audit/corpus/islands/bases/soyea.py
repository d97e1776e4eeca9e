"""
train_gpt.py -- my first parameter golf entry :)

Started from the challenge's baseline train_gpt.py and kept pasting in whatever looked good in the PRs:
bigram hash embedding, smear gate, mixed int5/int6, EMA, sliding window, LoRA test time training, a tiny bigram cache.
Sorry for the mess, it works on my 8xH100 pod. Run with:

    torchrun --standalone --nproc_per_node=8 train_gpt.py
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
import zlib
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# zstd is better than zlib by like 1.5%, but not every pod image has it
try:
    import zstandard

    COMPRESSOR = "zstd"
except ImportError:
    zstandard = None
    COMPRESSOR = "zlib"

# -----------------------------
# HYPERPARAMETERS
# -----------------------------
# everything can be set from the env. the camelCase ones are mine, the rest came with the baseline


class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # validation during training, only to look at
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 1000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # training length
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    # seconds of the 600 that i keep back for the activation stats + quantization + zstd at the end
    reserveSeconds = float(os.environ.get("RESERVE_SECONDS", 40.0))

    # model shape
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 10))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    bigramBuckets = int(os.environ.get("BIGRAM_BUCKETS", 8192))
    bigramDim = int(os.environ.get("BIGRAM_DIM", 128))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # optimizer
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.02))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muonWd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.01))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # averaging
    emaDecay = float(os.environ.get("EMA_DECAY", 0.997))
    emaEvery = int(os.environ.get("EMA_EVERY", 1))

    # quantization
    calib_batches = int(os.environ.get("CALIB_BATCHES", 8))
    calib_tokens = int(os.environ.get("CALIB_TOKENS", 131_072))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    sizeLimit = int(os.environ.get("SIZE_LIMIT", 16_000_000))

    # evaluation
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 1024))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 64))
    eval_temp = float(os.environ.get("EVAL_TEMP", 1.0))
    evalSeconds = float(os.environ.get("EVAL_SECONDS", 560.0))

    # test time training
    do_ttt = bool(int(os.environ.get("DO_TTT", "1")))
    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 8))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 0.01))
    ttt_chunk_size = int(os.environ.get("TTT_CHUNK_SIZE", 256))
    ttt_batch_docs = int(os.environ.get("TTT_BATCH_DOCS", 64))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 1))

    # bigram cache (per document, goes away at each BOS)
    cacheMax = float(os.environ.get("CACHE_MAX", 0.12))
    cacheAlpha = float(os.environ.get("CACHE_ALPHA", 12.0))


# yes, globals. main() fills them and everybody looks at them
RANK = 0
WORLD_SIZE = 1
MASTER = True
LOGFILE = None


def say(*things):
    """print on rank 0 and keep a copy in the log file"""
    if not MASTER:
        return
    msg = " ".join(str(t) for t in things)
    print(msg, flush=True)
    if LOGFILE is not None:
        with open(LOGFILE, "a", encoding="utf-8") as f:
            print(msg, file=f)


# -----------------------------
# MUON OPTIMIZER
# -----------------------------
# straight from modded-nanogpt through the baseline. I only added the weight decay


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

            total_params = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total_params, device=params[0].device, dtype=torch.bfloat16)

            curr = 0
            for i, p in enumerate(params):
                # each rank does its own share of the newton-schulz, then everything is summed
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
                if group["wd"] > 0:
                    p.mul_(1.0 - lr * group["wd"])
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER -> BYTES
# -----------------------------
# BPB needs the number of bytes of each token. This is the baseline's code, don't touch it!!
# a piece that starts with the space mark is one byte longer, unless the token before it is a control token


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
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


def count_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts) -> Tensor:
    """bytes of each target token, same shape as tgt_ids"""
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    nbytes = base_bytes_lut[tgt_ids].to(torch.float64)
    nbytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.float64)
    return nbytes


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    # SHARD HEADER INTS & SHARD_MAGIC
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
    return tokens


class TokenStream:
    # Reads shards sequentially and wraps around forever.
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
    # Each call consumes a contiguous chunk from the shared token stream, then slices out one disjoint span per rank.
    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        local_tokens = max(local_tokens // seq_len, 1) * seq_len
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * self.world_size)
        start = self.rank * per_rank_span
        local = chunk[start : start + per_rank_span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# TRANSFORMER
# -----------------------------

CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear",
    "bigram.scale",
)


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    # Keep weights in fp32 for optimizer/state quality, cast at matmul time for bf16 compute.
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            small = param.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if small and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Caches cos/sin tables per sequence length on the current device.
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
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
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

    def forward(self, x: Tensor, q_delta=None, v_delta=None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x)
        k = self.c_k(x)
        v = self.c_v(x)
        # the deltas are the LoRA parts, only there in test time training
        if q_delta is not None:
            q = q + q_delta
        if v_delta is not None:
            v = v + v_delta
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    # relu^2 MLP from the original modded-nanogpt setup
    def __init__(self, dim: int, mlp_mult: float):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        return self.proj(x.square())


class SmearGate(nn.Module):
    """mixes a bit of the previous token's embedding in. Not across a BOS (see #1851), the gate is masked there"""

    def __init__(self, dim: int):
        super().__init__()
        self.smear = nn.Parameter(torch.full((dim,), -2.0, dtype=torch.float32))

    def forward(self, x: Tensor, input_ids: Tensor, bos_id: int) -> Tensor:
        g = torch.sigmoid(self.smear.to(dtype=x.dtype))[None, None, :]
        x_prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        notBos = (input_ids != bos_id).unsqueeze(-1).to(x.dtype)
        return x + g * notBos * (x_prev - x)


class BigramHashEmbedding(nn.Module):
    """hash of (previous token, this token) -> small embedding -> model dim. inputs only!"""

    def __init__(self, buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(dim, model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def bigram_hash(self, ids: Tensor, bos_id: int) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0), value=bos_id)
        h = torch.bitwise_xor(36313 * ids, 27191 * prev) % (self.buckets - 1)
        # nothing before a BOS
        return torch.where(ids == bos_id, torch.full_like(h, self.buckets - 1), h)

    def forward(self, ids: Tensor, bos_id: int) -> Tensor:
        h = self.proj(self.embed(self.bigram_hash(ids, bos_id)))
        return h * self.scale.to(dtype=h.dtype)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: float, rope_base: float, qk_gain: float):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor, q_lora=None, v_lora=None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        n = self.attn_norm(x)
        qd = q_lora(n) if q_lora is not None else None
        vd = v_lora(n) if v_lora is not None else None
        attn_out = self.attn(n, qd, vd)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.bos_id = args.bos_id
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramHashEmbedding(args.bigramBuckets, args.bigramDim, args.model_dim)
        self.smear_gate = SmearGate(args.model_dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList(
            [
                Block(
                    args.model_dim,
                    args.num_heads,
                    args.num_kv_heads,
                    args.mlp_mult,
                    args.rope_base,
                    args.qk_gain_init,
                )
                for _ in range(args.num_layers)
            ]
        )
        self.final_norm = RMSNorm()
        self._init_weights(args.tied_embed_init_std)

    def _init_weights(self, std: float) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name != "bigram.proj":
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def forward_logits(self, input_ids: Tensor, lora=None) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids, self.bos_id)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear_gate(x, input_ids, self.bos_id)
        x0 = x
        skips: list[Tensor] = []
        # first half stores skips, second half eats them in reverse order
        for i in range(self.num_encoder_layers):
            ql = lora.q_loras[i] if lora is not None else None
            vl = lora.v_loras[i] if lora is not None else None
            x = self.blocks[i](x, x0, ql, vl)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            bi = self.num_encoder_layers + i
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            ql = lora.q_loras[bi] if lora is not None else None
            vl = lora.v_loras[bi] if lora is not None else None
            x = self.blocks[bi](x, x0, ql, vl)
        x = self.final_norm(x)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        if lora is not None:
            logits = logits + lora.head_lora(x)
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1), reduction="mean")


# -----------------------------
# LORA FOR TEST TIME TRAINING
# -----------------------------


class BatchedLinearLoRA(nn.Module):
    """one LoRA for every document of the batch. B starts at zero so a fresh one does nothing"""

    def __init__(self, bsz: int, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.in_features = in_features
        self.A = nn.Parameter(torch.empty(bsz, rank, in_features))
        self.B = nn.Parameter(torch.zeros(bsz, out_features, rank))
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.A.to(x.dtype).transpose(1, 2)) @ self.B.to(x.dtype).transpose(1, 2)

    def reset(self) -> None:
        bound = 1.0 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.A.uniform_(-bound, bound)
            self.B.zero_()


class BatchedTTTLoRA(nn.Module):
    def __init__(self, bsz: int, args):
        super().__init__()
        dim = args.model_dim
        kv_dim = dim // args.num_heads * args.num_kv_heads
        r = args.ttt_lora_rank
        self.head_lora = BatchedLinearLoRA(bsz, dim, args.vocab_size, r)
        self.q_loras = nn.ModuleList([BatchedLinearLoRA(bsz, dim, dim, r) for _ in range(args.num_layers)])
        self.v_loras = nn.ModuleList([BatchedLinearLoRA(bsz, dim, kv_dim, r) for _ in range(args.num_layers)])

    def reset(self) -> None:
        for m in self.modules():
            if isinstance(m, BatchedLinearLoRA):
                m.reset()


# -----------------------------
# BIGRAM CACHE
# -----------------------------


class BigramCache:
    """
    Counts of (token -> next token) inside of the document so far. No hashing: the vocab is 1024, the whole 1024x1024
    table fits for every document of the batch. So the mixture is a real distribution over all 1024 tokens.
    """

    def __init__(self, bsz: int, vocab_size: int, device: torch.device, cacheMax: float, cacheAlpha: float):
        self.V = vocab_size
        self.counts = torch.zeros(bsz, vocab_size, vocab_size, device=device)
        self.cacheMax = cacheMax
        self.cacheAlpha = cacheAlpha

    def reset(self):
        self.counts.zero_()

    def mix(self, b: int, probs: Tensor, prev: Tensor) -> Tensor:
        """probs: (n, V) of the model, prev: (n,) the tokens before. gives (n, V), sums to one again"""
        rows = self.counts[b][prev]
        total = rows.sum(dim=-1, keepdim=True)
        # how much we have seen after this token decides how much we trust the cache
        lam = self.cacheMax * total / (total + self.cacheAlpha)
        cacheProbs = rows / total.clamp_min(1.0)
        return (1.0 - lam) * probs + lam * cacheProbs

    def add(self, b: int, prev: Tensor, nxt: Tensor):
        flat = self.counts[b].view(-1)
        flat.index_add_(0, prev * self.V + nxt, torch.ones_like(prev, dtype=flat.dtype))


# -----------------------------
# QUANTIZATION (mixed int5 / int6, "GPTQ-lite")
# -----------------------------
# No real GPTQ, I didn't understand the cholesky part. For every row we try a couple of clip values and keep the one
# with the smallest error, where the error of an input channel is weighted by how large its activations are
# (mean of x^2 on TRAINING batches). Gets most of the way.

CLIP_CANDIDATES = (0.70, 0.78, 0.84, 0.89, 0.93, 0.96, 0.98, 1.0)


def bitsForName(name: str, num_layers: int) -> int:
    """which tensor gets how many bits. mlp int5, attention int6, first and last block int6 everywhere"""
    if "tok_emb" in name or "bigram.embed" in name:
        return 8 if "tok_emb" in name else 6
    if name.startswith("blocks."):
        layer = int(name.split(".")[1])
        if layer == 0 or layer == num_layers - 1:
            return 6
        if ".mlp." in name:
            return 5
    return 6


def quantize_row_clip(w: Tensor, bits: int, act: Tensor | None) -> tuple[Tensor, Tensor]:
    """int quantization per row, with the clip search"""
    w32 = w.float()
    qmax = 2 ** (bits - 1) - 1
    weight = torch.ones(w32.size(1), device=w32.device) if act is None else act.to(w32.device).float()
    weight = weight / weight.mean().clamp_min(1e-12)
    rowMax = w32.abs().amax(dim=1).clamp_min(1e-8)
    bestErr = torch.full_like(rowMax, float("inf"))
    bestScale = rowMax / qmax
    for c in CLIP_CANDIDATES:
        scale = (rowMax * c / qmax).half().float().clamp_min(1e-7)
        q = torch.clamp(torch.round(w32 / scale[:, None]), -qmax - 1, qmax)
        err = ((q * scale[:, None] - w32).square() * weight[None, :]).sum(dim=1)
        better = err < bestErr
        bestErr = torch.where(better, err, bestErr)
        bestScale = torch.where(better, scale, bestScale)
    q = torch.clamp(torch.round(w32 / bestScale[:, None]), -qmax - 1, qmax).to(torch.int8)
    return q, bestScale.half()


def quantize_row_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    # the old one of the baseline, without search. not used any more but I compare with it sometimes
    w32 = w.float()
    clip = torch.quantile(w32.abs(), 0.9999984, dim=1).clamp_min(1e-8)
    scale = clip / 127.0
    q = torch.clamp(torch.round(w32 / scale[:, None]), -127, 127).to(torch.int8)
    return q, scale.half()


def collect_act_stats(model: nn.Module, batches) -> dict[str, Tensor]:
    """mean of x^2 for each input channel of each linear layer"""
    sums: dict[str, Tensor] = {}
    handles = []
    seen = {"n": 0}

    def makeHook(name):
        def hook(mod, inp, out):
            x = inp[0].detach().float().reshape(-1, inp[0].size(-1))
            s = x.square().mean(dim=0)
            sums[name] = sums[name] + s if name in sums else s

        return hook

    for name, mod in model.named_modules():
        if isinstance(mod, CastedLinear):
            handles.append(mod.register_forward_hook(makeHook(name + ".weight")))
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for x, _ in batches:
            model.forward_logits(x)
            seen["n"] += 1
    for h in handles:
        h.remove()
    for name in sorted(sums):
        sums[name] /= max(seen["n"], 1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums[name], op=dist.ReduceOp.AVG)
    return sums


def mixed_quantize(state_dict: dict[str, Tensor], act_stats: dict[str, Tensor], num_layers: int) -> dict:
    out = {"q": {}, "s": {}, "raw": {}}
    for name, t in state_dict.items():
        t = t.detach()
        if t.ndim < 2 or t.numel() <= 16384 or any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS):
            out["raw"][name] = t.half().cpu() if t.is_floating_point() else t.cpu()
            continue
        q, s = quantize_row_clip(t, bitsForName(name, num_layers), act_stats.get(name))
        out["q"][name] = q.cpu()
        out["s"][name] = s.cpu()
    return out


def dequantize_mixed(obj: dict) -> dict[str, Tensor]:
    sd: dict[str, Tensor] = {}
    for name, t in obj["raw"].items():
        sd[name] = t.float() if t.is_floating_point() else t
    for name, q in obj["q"].items():
        sd[name] = q.float() * obj["s"][name].float()[:, None]
    return sd


def packModel(obj: dict, level: int) -> bytes:
    buf = io.BytesIO()
    torch.save(obj, buf)
    raw = buf.getvalue()
    if COMPRESSOR == "zstd":
        return b"Z" + zstandard.ZstdCompressor(level=level).compress(raw)
    return b"z" + zlib.compress(raw, 9)


def unpackModel(blob: bytes) -> dict:
    if blob[:1] == b"Z":
        raw = zstandard.ZstdDecompressor().decompress(blob[1:])
    else:
        raw = zlib.decompress(blob[1:])
    return torch.load(io.BytesIO(raw), map_location="cpu")


# -----------------------------
# EVALUATION
# -----------------------------
# three of them, each one pasted from the one before...


def eval_val(args, model, rank, world_size, device, grad_accum_steps, val_tokens, luts):
    """the baseline's one: non overlapping sequences. quick, for the curve during training and the roundtrip check"""
    seq_len = args.train_seq_len
    local_batch_tokens = args.val_batch_size // (world_size * grad_accum_steps)
    local_batch_seqs = max(local_batch_tokens // seq_len, 1)
    total_seqs = (val_tokens.numel() - 1) // seq_len
    seq_start = (total_seqs * rank) // world_size
    seq_end = (total_seqs * (rank + 1)) // world_size
    val_loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    val_token_count = torch.zeros((), device=device, dtype=torch.float64)
    val_byte_count = torch.zeros((), device=device, dtype=torch.float64)

    model.eval()
    with torch.no_grad():
        for batch_seq_start in range(seq_start, seq_end, local_batch_seqs):
            batch_seq_end = min(batch_seq_start + local_batch_seqs, seq_end)
            raw_start = batch_seq_start * seq_len
            raw_end = batch_seq_end * seq_len + 1
            local = val_tokens[raw_start:raw_end].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                batch_loss = model(x, y).detach()
            batch_token_count = float(y.numel())
            val_loss_sum += batch_loss.to(torch.float64) * batch_token_count
            val_token_count += batch_token_count
            val_byte_count += count_bytes(x, y, luts).sum()

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(val_loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(val_byte_count, op=dist.ReduceOp.SUM)

    val_loss = val_loss_sum / val_token_count
    bits_per_token = val_loss.item() / math.log(2.0)
    tokens_per_byte = val_token_count.item() / val_byte_count.item()
    model.train()
    return float(val_loss.item()), float(bits_per_token * tokens_per_byte)


def eval_val_sliding(args, base_model, rank, world_size, device, val_tokens, luts):
    """
    sliding window: every token gets (almost) a full context. Scores [pos, pos + stride) with whatever is before it.
    The version going around counts the tail a few times, this one goes by the tokens so each is counted once.
    """
    seq_len = args.eval_seq_len
    stride = args.eval_stride
    total = val_tokens.numel() - 1
    spans = [(p, min(p + stride, total)) for p in range(0, total, stride)]
    lo = (len(spans) * rank) // world_size
    hi = (len(spans) * (rank + 1)) // world_size
    my_spans = spans[lo:hi]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)

    base_model.eval()
    compiled_logits = torch.compile(base_model.forward_logits, dynamic=False)
    with torch.no_grad():
        for bi in range(0, len(my_spans), args.eval_batch_seqs):
            group = my_spans[bi : bi + args.eval_batch_seqs]
            # always the same batch shape, so that torch.compile compiles once
            x = torch.zeros(args.eval_batch_seqs, seq_len, dtype=torch.int64, device=device)
            y = torch.zeros(args.eval_batch_seqs, seq_len, dtype=torch.int64, device=device)
            where = []
            for j, (a, b) in enumerate(group):
                ws = max(0, b - seq_len)
                w = val_tokens[ws : b + 1].to(device=device, dtype=torch.int64)
                n = b - ws
                x[j, :n] = w[:-1]
                y[j, :n] = w[1:]
                where.append((a - ws, n))
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = compiled_logits(x)
            logits = logits.float() / args.eval_temp
            nll = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
            for j, (s, e) in enumerate(where):
                loss_sum += nll[j, s:e].to(torch.float64).sum()
                token_count += float(e - s)
                byte_count += count_bytes(x[j, s:e], y[j, s:e], luts).sum()
            if MASTER and (bi // args.eval_batch_seqs) % 500 == 0:
                print(f"  sliding {bi}/{len(my_spans)}", flush=True)

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)

    val_loss = (loss_sum / token_count).item()
    val_bpb = val_loss / math.log(2.0) * (token_count.item() / byte_count.item())
    base_model.train()
    return val_loss, val_bpb


def find_docs(tokens: Tensor, bos_id: int) -> list[tuple[int, int]]:
    """(start, how many predictions) for each document. The next document's BOS is the last target of a document"""
    starts = (tokens == bos_id).nonzero(as_tuple=True)[0].tolist()
    if not starts or starts[0] != 0:
        starts = [0] + starts
    last = tokens.numel() - 1
    docs = []
    for i, s in enumerate(starts):
        e = starts[i + 1] if i + 1 < len(starts) else last
        if e > s:
            docs.append((s, e - s))
    return docs


def chunk_window(ci: int, pred_len: int, num_chunks: int, chunk_size: int, eval_seq_len: int):
    """where chunk ci lies: window start, window length, first scored position in the window, how many are scored"""
    chunk_start = ci * chunk_size
    chunk_end = pred_len if ci == num_chunks - 1 else (ci + 1) * chunk_size
    win_start = max(0, chunk_end - eval_seq_len)
    win_len = chunk_end - win_start
    chunk_offset = chunk_start - win_start
    chunk_len = chunk_end - chunk_start
    return win_start, win_len, chunk_offset, chunk_len


def eval_val_ttt(args, base_model, rank, world_size, device, val_tokens, luts, t_eval0):
    """
    One LoRA per document. For each chunk of 256 tokens: FIRST score it, THEN train the LoRA on it (and count it in the
    cache). At the next BOS everything starts from zero again, so documents can go in any order.
    """
    docs = find_docs(val_tokens, args.bos_id)
    # short ones together with short ones, otherwise it's all padding
    docs.sort(key=lambda d: d[1])
    my_docs = docs[rank::world_size]
    bsz = args.ttt_batch_docs
    chunk_size = args.ttt_chunk_size
    seq_len = args.eval_seq_len

    base_model.eval()
    for p in base_model.parameters():
        p.requires_grad_(False)
    lora = BatchedTTTLoRA(bsz, args).to(device)
    cache = BigramCache(bsz, args.vocab_size, device, args.cacheMax, args.cacheAlpha)

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    stopped = False

    for bi in range(0, len(my_docs), bsz):
        batch = my_docs[bi : bi + bsz]
        lora.reset()
        cache.reset()
        opt = torch.optim.Adam(lora.parameters(), lr=args.ttt_lora_lr, betas=(0.9, 0.95), eps=1e-10)
        num_chunks = [(n + chunk_size - 1) // chunk_size for _, n in batch]
        for ci in range(max(num_chunks)):
            x = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
            y = torch.zeros(bsz, seq_len, dtype=torch.int64, device=device)
            trainMask = torch.zeros(bsz, seq_len, device=device)
            info = []
            longest = 1
            for b, (start, pred_len) in enumerate(batch):
                if ci >= num_chunks[b]:
                    continue
                ws, wl, off, n = chunk_window(ci, pred_len, num_chunks[b], chunk_size, seq_len)
                w = val_tokens[start + ws : start + ws + wl + 1].to(device=device, dtype=torch.int64)
                x[b, :wl] = w[:-1]
                y[b, :wl] = w[1:]
                if ci < num_chunks[b] - 1:
                    trainMask[b, off : off + n] = 1.0
                info.append((b, off, n))
                longest = max(longest, wl)
            x, y, trainMask = x[:, :longest], y[:, :longest], trainMask[:, :longest]

            # ---- score (nothing has seen this chunk yet)
            with torch.no_grad():
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = base_model.forward_logits(x, lora)
                for b, off, n in info:
                    prev = x[b, off : off + n]
                    tgt = y[b, off : off + n]
                    probs = torch.softmax(logits[b, off : off + n].float() / args.eval_temp, dim=-1)
                    probs = cache.mix(b, probs, prev)
                    nll = -torch.log(probs.gather(1, tgt[:, None]).squeeze(1))
                    loss_sum += nll.to(torch.float64).sum()
                    token_count += float(n)
                    byte_count += count_bytes(prev, tgt, luts).sum()
                for b, off, n in info:
                    cache.add(b, x[b, off : off + n], y[b, off : off + n])

            # ---- train (only if this document still has something to score)
            if not stopped and time.perf_counter() - t_eval0 > args.evalSeconds:
                stopped = True
                print(f"rank {rank}: eval time is running out, no more ttt from here", flush=True)
            if stopped or trainMask.sum() == 0:
                continue
            for _ in range(args.ttt_epochs):
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = base_model.forward_logits(x, lora)
                ce = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
                # mean for each document, then the sum: so the documents don't touch each other
                perDoc = (ce * trainMask).sum(dim=1) / trainMask.sum(dim=1).clamp_min(1.0)
                opt.zero_grad(set_to_none=True)
                perDoc.sum().backward()
                opt.step()
        if MASTER and (bi // bsz) % 20 == 0:
            print(f"  ttt docs {bi}/{len(my_docs)} {time.perf_counter() - t_eval0:.0f}s", flush=True)

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss_sum, op=dist.ReduceOp.SUM)
        dist.all_reduce(token_count, op=dist.ReduceOp.SUM)
        dist.all_reduce(byte_count, op=dist.ReduceOp.SUM)

    say(f"ttt scored tokens:{int(token_count.item())} bytes:{int(byte_count.item())}")
    val_loss = (loss_sum / token_count).item()
    val_bpb = val_loss / math.log(2.0) * (token_count.item() / byte_count.item())
    return val_loss, val_bpb


# -----------------------------
# LITTLE HELPERS
# -----------------------------


def swa_average(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    # tried SWA before EMA. EMA won by 0.001. leaving it here in case
    out = {}
    for k in states[0]:
        out[k] = sum(s[k].float() for s in states) / len(states)
    return out


def fake_quant_ste(w: Tensor, bits: int) -> Tensor:
    # QAT from some PR, did not help me (also breaks torch.compile on my torch version?)
    qmax = 2 ** (bits - 1) - 1
    scale = w.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / qmax
    wq = torch.clamp(torch.round(w / scale), -qmax - 1, qmax) * scale
    return w + (wq - w).detach()


class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module):
        for k, v in model.state_dict().items():
            self.shadow[k].mul_(self.decay).add_(v.detach().float(), alpha=1.0 - self.decay)

    def copyTo(self, model: nn.Module):
        model.load_state_dict({k: v.to(dtype=model.state_dict()[k].dtype) for k, v in self.shadow.items()})


def lr_scale(args, step: int, elapsed_ms: float, cap_ms: float | None) -> float:
    """warmdown by the clock: the last warmdown_iters steps (as many as still fit) go linearly to zero"""
    if args.warmdown_iters <= 0:
        return 1.0
    if cap_ms is None:
        warmdown_start = max(args.iterations - args.warmdown_iters, 0)
        if step < warmdown_start:
            return 1.0
        return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(cap_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    global RANK, WORLD_SIZE, MASTER, LOGFILE, zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # ---- distributed + cuda
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    RANK = int(os.environ.get("RANK", "0"))
    WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % WORLD_SIZE != 0:
        raise ValueError(f"WORLD_SIZE={WORLD_SIZE} must divide 8 so grad_accum_steps stays integral")
    grad_accum_steps = 8 // WORLD_SIZE
    grad_scale = 1.0 / grad_accum_steps
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    MASTER = RANK == 0
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    if MASTER:
        os.makedirs("logs", exist_ok=True)
        LOGFILE = f"logs/{args.run_id}.txt"
        print(LOGFILE)
        with open(LOGFILE, "a", encoding="utf-8") as f:
            print(code, file=f)
            print("=" * 100, file=f)
    say(f"Running Python {sys.version}")
    say(f"Running PyTorch {torch.__version__}")
    if MASTER:
        smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        say(smi.stdout)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    # ---- tokenizer + validation
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match the tokenizer ({int(sp.vocab_size())})")
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    say(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")
    say(f"train_loader:shards pattern={args.train_files} shards:{len(glob.glob(args.train_files))}")

    # ---- model + optimizers
    base_model = GPT(args).to(device).bfloat16()
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model

    block_named_params = list(base_model.blocks.named_parameters())
    matrix_params = [
        p
        for name, p in block_named_params
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    matrix_params.append(base_model.bigram.proj.weight)
    scalar_params = [
        p
        for name, p in block_named_params
        if p.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    scalar_params += [base_model.skip_weights, base_model.smear_gate.smear, base_model.bigram.scale]
    optimizer_tok = torch.optim.AdamW(
        [
            {"params": [base_model.tok_emb.weight], "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr},
            {"params": [base_model.bigram.embed.weight], "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr},
        ],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizer_muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        wd=args.muonWd,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizer_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    optimizers = [optimizer_tok, optimizer_muon, optimizer_scalar]

    n_params = sum(p.numel() for p in base_model.parameters())
    say(f"model_params:{n_params}")
    say(f"world_size:{WORLD_SIZE} grad_accum_steps:{grad_accum_steps} seed:{args.seed} compressor:{COMPRESSOR}")

    train_loader = DistributedTokenLoader(args.train_files, RANK, WORLD_SIZE, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    # the loop gets 600 minus the reserve, the rest is for stats + quantization. All together has to be below 600!
    max_wallclock_ms = None
    if args.max_wallclock_seconds > 0:
        max_wallclock_ms = 1000.0 * (args.max_wallclock_seconds - args.reserveSeconds)

    # ---- warmup: primes torch.compile, then everything is put back like it was
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            zero_grad_all()
            for micro_step in range(grad_accum_steps):
                if distributed:
                    model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
                x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    warmup_loss = model(x, y)
                (warmup_loss * grad_scale).backward()
            for opt in optimizers:
                opt.step()
            zero_grad_all()
            if warmup_step + 1 == args.warmup_steps:
                say(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        if distributed:
            model.require_backward_grad_sync = True
        train_loader = DistributedTokenLoader(args.train_files, RANK, WORLD_SIZE, device)

    # ---- the loop
    ema = EMA(base_model, args.emaDecay)
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)

        should_validate = last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0)
        if should_validate:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(
                args, model, RANK, WORLD_SIZE, device, grad_accum_steps, val_tokens, luts
            )
            say(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()

        if last_step:
            if stop_after_step is not None and step < args.iterations:
                say(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, max_wallclock_ms)
        zero_grad_all()
        train_loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss * grad_scale).backward()
        train_loss /= grad_accum_steps

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
        if step % args.emaEvery == 0:
            ema.update(base_model)
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0 or stop_after_step is not None):
            say(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # all ranks must stop at the same step
        reached_cap = max_wallclock_ms is not None and approx_training_time_ms >= max_wallclock_ms
        if distributed and max_wallclock_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    say(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # ---- EMA weights, activation stats, quantization: still inside of the 600 s, from the reserve
    say("applying EMA weights")
    ema.copyTo(base_model)
    calib_batches = []
    for _ in range(args.calib_batches):
        calib_batches.append(train_loader.next_batch(args.calib_tokens, args.train_seq_len, 1))
    act_stats = collect_act_stats(base_model, calib_batches)
    quant_obj = mixed_quantize(base_model.state_dict(), act_stats, args.num_layers)
    model_blob = packModel(quant_obj, args.zstd_level) if MASTER else b""
    if distributed:
        dist.barrier()
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    say(f"training + stats + quantization + packing took {training_time_ms:.0f}ms")
    if args.max_wallclock_seconds > 0 and training_time_ms > 1000.0 * args.max_wallclock_seconds:
        say("WARNING: over the training time! RESERVE_SECONDS has to be bigger")

    # ---- write it
    if MASTER:
        with open("final_model.ptz", "wb") as f:
            f.write(model_blob)
        model_bytes = os.path.getsize("final_model.ptz")
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        say(f"Serialized model {COMPRESSOR}: {model_bytes} bytes")
        say(f"Code size: {code_bytes} bytes")
        say(f"Total submission size: {total_bytes} bytes (limit {args.sizeLimit})")
        if total_bytes > args.sizeLimit:
            say("TOO BIG!! this one does not count")
    if distributed:
        dist.barrier()

    # -----------------------------
    # EVALUATION OF THE PACKED MODEL
    # -----------------------------
    t_eval0 = time.perf_counter()
    with open("final_model.ptz", "rb") as f:
        model_blob = f.read()
    base_model.load_state_dict(dequantize_mixed(unpackModel(model_blob)), strict=True)

    torch.cuda.synchronize()
    t_part = time.perf_counter()
    q_loss, q_bpb = eval_val(args, model, RANK, WORLD_SIZE, device, grad_accum_steps, val_tokens, luts)
    say(
        f"final_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_part):.0f}ms"
    )

    # only one of the two is the score, and which one is decided by DO_TTT before we start
    t_part = time.perf_counter()
    if args.do_ttt:
        final_loss, final_bpb = eval_val_ttt(
            args, base_model, RANK, WORLD_SIZE, device, val_tokens, luts, t_eval0
        )
        how = "ttt_lora"
    else:
        final_loss, final_bpb = eval_val_sliding(args, base_model, RANK, WORLD_SIZE, device, val_tokens, luts)
        how = "sliding_window"
    torch.cuda.synchronize()
    say(f"{how} eval_time:{1000.0 * (time.perf_counter() - t_part):.0f}ms")
    say(f"whole evaluation took {time.perf_counter() - t_eval0:.1f}s")
    say(f"final_{how}_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
