import collections
import copy
import glob
import io
import math
import os
import random
import re
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

from flash_attn_interface import flash_attn_func as flash_attn_3_func

# SP8192 + 3-layer depth recurrence + parallel residuals + QK-gain 5.25 + EMA + GPTQ int6 (SDClip) + score-first TTT


class Hyperparameters:
    # run
    data_dir = os.environ.get("DATA_DIR", "./data/")
    seed = int(os.environ.get("SEED", 1337))
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    min_lr = float(os.environ.get("MIN_LR", 0.0))

    # validation
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 2048 * 32 * 8))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 560.0))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.25))
    skip_gates_enabled = bool(int(os.environ.get("SKIP_GATES_ENABLED", "1")))

    # depth recurrence: layers loop_start..loop_end run num_loops extra times
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))
    # parallel residuals: attention and MLP read the same input from this layer on
    parallel_residual_start = int(os.environ.get("PARALLEL_RESIDUAL_START", 7))

    # optimizer
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
    embed_std = float(os.environ.get("EMBED_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_row_normalize = bool(int(os.environ.get("MUON_ROW_NORMALIZE", "1")))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # quantisation: scale = k * std(row) / clip_range
    compressor = os.environ.get("COMPRESSOR", "brotli")
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 13.0))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))
    size_limit = int(os.environ.get("SIZE_LIMIT", 16_000_000))

    # test-time training, score first
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 8))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = max(1, 8 // world_size)

    # files
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    quantized_model_path = "final_model.int6.ptz"


_logger_hparams = None


def set_logging_hparams(h: Hyperparameters) -> None:
    global _logger_hparams
    _logger_hparams = h


def log(msg: object, console: bool = True) -> None:
    if _logger_hparams is None:
        print(msg)
        return
    if not _logger_hparams.is_main_process:
        return
    if console:
        print(msg, flush=True)
    if _logger_hparams.logfile is not None:
        with open(_logger_hparams.logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)


# ---------------------------------------------------------------------------------------------------------------
# data

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
_SHARD_NTOKENS: dict[str, int] = {}
_MMAPS: dict[str, np.memmap] = {}


def shard_num_tokens(file: Path) -> int:
    key = str(file)
    if key not in _SHARD_NTOKENS:
        header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
        if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
            raise ValueError(f"Unexpected shard header for {file}")
        n = int(header[2])
        if file.stat().st_size != SHARD_HEADER_BYTES + 2 * n:
            raise ValueError(f"Shard size mismatch for {file}")
        _SHARD_NTOKENS[key] = n
    return _SHARD_NTOKENS[key]


def shard_memmap(file: Path) -> np.memmap:
    key = str(file)
    if key not in _MMAPS:
        n = shard_num_tokens(file)
        _MMAPS[key] = np.memmap(file, mode="r", dtype="<u2", offset=SHARD_HEADER_BYTES, shape=(n,))
    return _MMAPS[key]


def load_data_shard(file: Path) -> Tensor:
    return torch.from_numpy(np.array(shard_memmap(file), dtype=np.uint16, copy=True))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError("Validation split is empty")
    return tokens


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
    """Bytes of each piece without its leading space; whether it has one; whether it is a control token."""
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes = np.zeros((table_size,), dtype=np.int16)
    has_leading_space = np.zeros((table_size,), dtype=np.bool_)
    is_boundary = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary[token_id] = False
        if sp.is_byte(token_id):
            base_bytes[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("\u2581"):
            has_leading_space[token_id] = True
            piece = piece[1:]
        base_bytes[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space, dtype=torch.bool, device=device),
        torch.tensor(is_boundary, dtype=torch.bool, device=device),
    )


class ValidationData:
    def __init__(self, h: Hyperparameters, device: torch.device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but tokenizer has {int(self.sp.vocab_size())}")
        self.val_tokens = load_validation_tokens(h.val_files)
        luts = build_sentencepiece_luts(self.sp, h.vocab_size, device)
        self.base_bytes_lut, self.has_leading_space_lut, self.is_boundary_lut = luts

    def count_bytes(self, prev_ids: Tensor, tgt_ids: Tensor) -> Tensor:
        token_bytes = self.base_bytes_lut[tgt_ids].to(torch.int16)
        token_bytes += (self.has_leading_space_lut[tgt_ids] & ~self.is_boundary_lut[prev_ids]).to(torch.int16)
        return token_bytes.to(torch.float64).sum()


class ShuffledSequenceLoader:
    """Sequences drawn without replacement from the train shards; every rank owns every world_size-th shard."""

    def __init__(self, h: Hyperparameters, device: torch.device, seed_offset: int = 0):
        self.world_size = h.world_size
        self.seq_len = h.train_seq_len
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"No files found for pattern: {h.train_files}")
        self.files = all_files[h.rank :: h.world_size] or all_files
        self.rng = np.random.Generator(np.random.PCG64(h.seed + seed_offset + 7919 * h.rank))
        self.num_tokens = [shard_num_tokens(f) for f in self.files]
        self.start_inds: list[list[int]] = [[] for _ in self.files]
        for si in range(len(self.files)):
            self._reset_shard(si)

    def _reset_shard(self, si: int) -> None:
        max_phase = min(self.seq_len - 1, max(0, self.num_tokens[si] - self.seq_len - 1))
        phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
        num_sequences = (self.num_tokens[si] - 1 - phase) // self.seq_len
        order = self.rng.permutation(num_sequences)
        self.start_inds[si] = (phase + order * self.seq_len).tolist()

    def next_batch(self, global_tokens: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        device_batch_size = global_tokens // (self.world_size * grad_accum_steps) // self.seq_len
        remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
        buf = np.empty((device_batch_size, self.seq_len + 1), dtype=np.int64)
        for bi in range(device_batch_size):
            if remaining.sum() <= 0:
                for si in range(len(self.files)):
                    self._reset_shard(si)
                remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
            si = int(self.rng.choice(len(self.files), p=remaining / remaining.sum()))
            start = self.start_inds[si].pop()
            remaining[si] -= 1
            buf[bi] = shard_memmap(self.files[si])[start : start + self.seq_len + 1]
        batch = torch.from_numpy(buf).pin_memory().to(self.device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]


# ---------------------------------------------------------------------------------------------------------------
# model

CONTROL_TENSOR_NAME_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates")


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, rope_dims: int, base: float, max_seq_len: int):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        freqs = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.cos[:, :seq_len].to(dtype), self.sin[:, :seq_len].to(dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    rotated = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
    return torch.cat((rotated, x_pass), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        dim = h.model_dim
        if dim % h.num_heads != 0 or h.num_heads % h.num_kv_heads != 0:
            raise ValueError("model_dim, num_heads and num_kv_heads do not divide")
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
        self.use_xsa = False

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        # exclusive self attention: take out of the output what lies along the position's own value
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        y_g = y.reshape(B, T, Hkv, H // Hkv, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, T, H, D)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = flash_attn_3_func(q, k, v, causal=True)
        if self.use_xsa:
            y = self._xsa(y, v)
        return self.proj(y.reshape(bsz, seqlen, dim))


class MLP(nn.Module):
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
        self.attn = CausalSelfAttention(h)
        self.mlp = MLP(dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = layer_idx >= h.parallel_residual_start

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor)
        attn_out = self.attn_scale.to(dtype=x_in.dtype)[None, None, :] * attn_out
        mlp_scale = self.mlp_scale.to(dtype=x_in.dtype)[None, None, :]
        if self.parallel:
            return x_in + attn_out + mlp_scale * self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
        x_out = x_in + attn_out
        return x_out + mlp_scale * self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)


class GPT(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.logit_softcap = h.logit_softcap
        self.embed_std = h.embed_std
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
            self.blocks[i].attn.use_xsa = True
        self.final_norm = RMSNorm()
        self.looping_active = False
        if h.num_loops > 0:
            loop_seg = list(range(h.loop_start, h.loop_end + 1))
            order = list(range(h.loop_start)) + loop_seg * (h.num_loops + 1) + list(range(h.loop_end + 1, h.num_layers))
        else:
            order = list(range(h.num_layers))
        self.loop_encoder, self.loop_decoder = order[: len(order) // 2], order[len(order) // 2 :]
        half = h.num_layers // 2
        self.flat_encoder, self.flat_decoder = list(range(half)), list(range(half, h.num_layers))
        self.num_skip_weights = min(len(self.loop_encoder), len(self.loop_decoder))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, h.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(self.num_skip_weights, h.model_dim, dtype=torch.float32))
            if h.skip_gates_enabled
            else None
        )
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.embed_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def forward_hidden(self, input_ids: Tensor) -> Tensor:
        x = F.rms_norm(self.tok_emb(input_ids), (self.tok_emb.weight.size(1),))
        x0 = x
        skips: list[Tensor] = []
        encoder = self.loop_encoder if self.looping_active else self.flat_encoder
        decoder = self.loop_decoder if self.looping_active else self.flat_decoder
        for i in encoder:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for skip_idx, i in enumerate(decoder):
            if skip_idx < self.num_skip_weights and skips:
                scaled_skip = self.skip_weights[skip_idx].to(dtype=x.dtype)[None, None, :] * skips.pop()
                if self.skip_gates is not None:
                    g = torch.sigmoid(self.skip_gates[skip_idx].to(dtype=x.dtype))[None, None, :]
                    x = torch.lerp(scaled_skip, x, g)
                else:
                    x = x + scaled_skip
            x = self.blocks[i](x, x0)
        return self.final_norm(x)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        logits = F.linear(self.forward_hidden(input_ids), self.tok_emb.weight.to(torch.bfloat16))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


# ---------------------------------------------------------------------------------------------------------------
# optimizers


@torch.compile
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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float, row_normalize: bool):
        defaults = dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        super().__init__(params, dict(defaults, row_normalize=row_normalize))

    @torch.no_grad()
    def step(self):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            lr, momentum = group["lr"], group["momentum"]
            updates_flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
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
                    if group["row_normalize"]:
                        g = g / g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).to(g.dtype)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(updates_flat[curr : curr + p.numel()].view_as(p).to(p.dtype), alpha=-lr)
                curr += p.numel()


def is_control(name: str) -> bool:
    return any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)


class Optimizers:
    def __init__(self, h: Hyperparameters, base_model: GPT):
        block_params = list(base_model.blocks.named_parameters())
        matrix_params = [p for n, p in block_params if p.ndim == 2 and not is_control(n)]
        scalar_params = [p for n, p in block_params if p.ndim < 2 or is_control(n)]
        scalar_params.append(base_model.skip_weights)
        if base_model.skip_gates is not None:
            scalar_params.append(base_model.skip_gates)
        adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.tok = torch.optim.AdamW(
            [{"params": [base_model.tok_emb.weight], "lr": h.embed_lr, "base_lr": h.embed_lr}],
            weight_decay=h.embed_wd,
            **adam,
        )
        self.muon = Muon(
            matrix_params,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.scalar = torch.optim.AdamW(
            [{"params": scalar_params, "lr": h.scalar_lr, "base_lr": h.scalar_lr}], weight_decay=h.adam_wd, **adam
        )
        self.all = [self.tok, self.muon, self.scalar]

    def set_scale(self, scale: float, muon_momentum: float) -> None:
        for group in self.muon.param_groups:
            group["momentum"] = muon_momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def zero_grad(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def step(self) -> None:
        for opt in self.all:
            opt.step()
        self.zero_grad()


def restore_fp32_params(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        if (param.ndim < 2 or is_control(name)) and param.dtype != torch.float32:
            param.data = param.data.float()


class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.state = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for n, t in model.state_dict().items():
            self.state[n].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def apply(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({n: t.to(dtype=current[n].dtype) for n, t in self.state.items()}, strict=True)


# ---------------------------------------------------------------------------------------------------------------
# GPTQ


def classify_param(name: str) -> str:
    if "tok_emb" in name:
        return "embed"
    if ".mlp." in name:
        return "mlp"
    if ".attn." in name:
        return "attn"
    return "other"


def collect_hessians(
    h: Hyperparameters, model: GPT, loader: ShuffledSequenceLoader, device: torch.device, deadline: float
) -> dict[str, Tensor]:
    """X^T X of every linear layer's input (and of the head's) over train batches, never past the deadline."""
    hessians: dict[str, Tensor] = {}
    hooks = []

    def make_hook(name: str, use_output: bool = False):
        def hook_fn(module, inp, out):
            x = (out if use_output else inp[0]).detach().float()
            x = x.reshape(-1, x.shape[-1])
            if name not in hessians:
                hessians[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=device)
            hessians[name].addmm_(x.T, x)

        return hook_fn

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
            hooks.append(module.register_forward_hook(make_hook(name + ".weight")))
    hooks.append(model.final_norm.register_forward_hook(make_hook("tok_emb.weight", use_output=True)))
    model.eval()
    n_batches = 0
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        while n_batches < h.gptq_calibration_batches and (n_batches == 0 or time.perf_counter() < deadline):
            x, _ = loader.next_batch(h.train_batch_tokens // 2, h.grad_accum_steps)
            model.forward_logits(x)
            torch.cuda.synchronize()
            n_batches += 1
    for hook in hooks:
        hook.remove()
    count = torch.tensor(float(n_batches), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.SUM)
        for name in sorted(hessians):
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
    log(f"GPTQ: {int(count.item())} calibration batches over all ranks")
    return {name: (H / count).cpu() for name, H in hessians.items()}


def gptq_quantize_weight(
    w: Tensor, H: Tensor, clip_sigmas: float, clip_range: int, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    H.diagonal().add_(0.01 * H.diag().mean())
    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_work = W_orig[:, perm].clone()
    W_work[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    # sigma clipping: the grid spans clip_sigmas standard deviations of the row, which is what brotli likes
    s = (clip_sigmas * W_orig.std(dim=1) / clip_range).clamp_min(1e-7).to(torch.float16)
    sf = s.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W_block = W_work[:, i1:i2].clone()
        Hinv_block = Hinv[i1:i2, i1:i2]
        Err = torch.zeros(rows, i2 - i1, device=w.device)
        for j in range(i2 - i1):
            w_col = W_block[:, j]
            q_col = torch.clamp(torch.round(w_col / sf), -clip_range, clip_range)
            Q[:, i1 + j] = q_col.to(torch.int8)
            err = (w_col - q_col * sf) / Hinv_block[j, j]
            Err[:, j] = err
            W_block[:, j:] -= err.unsqueeze(1) * Hinv_block[j, j:].unsqueeze(0)
        if i2 < cols:
            W_work[:, i2:] -= Err @ Hinv[i1:i2, i2:]
    return Q[:, invperm], s


def gptq_mixed_quantize(
    h: Hyperparameters, state_dict: dict[str, Tensor], hessians: dict[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    result: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for name, tensor in state_dict.items():
        t = tensor.detach()
        if not t.is_floating_point() or t.numel() <= 65536:
            result[name] = t.cpu().to(torch.float16) if t.is_floating_point() else t.cpu()
            meta[name] = "passthrough (float16)"
            continue
        is_embed = classify_param(name) == "embed"
        cs = h.embed_clip_sigmas if is_embed else h.matrix_clip_sigmas
        bits = h.embed_bits if is_embed else h.matrix_bits
        q, s = gptq_quantize_weight(t.to(device), hessians[name].to(device), cs, 2 ** (bits - 1) - 1)
        result[name + ".q"] = q.cpu()
        result[name + ".scale"] = s.cpu()
        meta[name] = f"gptq (int{bits})"
    categories = collections.defaultdict(set)
    for name, cat in meta.items():
        categories[cat].add(re.sub(r"\.\d+$", "", re.sub(r"blocks\.\d+", "blocks", name)))
    log("Quantized weights:")
    for cat in sorted(categories):
        log(f"  {cat}: {', '.join(sorted(categories[cat]))}")
    return result, meta


def dequantize_mixed(
    result: dict[str, Tensor], meta: dict[str, str], template_sd: dict[str, Tensor]
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, orig in template_sd.items():
        if meta[name].startswith("passthrough"):
            out[name] = result[name].to(orig.dtype)
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        out[name] = (q.float() * s.float().view(q.shape[0], *([1] * (q.ndim - 1)))).to(orig.dtype)
    return out


# ---------------------------------------------------------------------------------------------------------------
# packing

_BSHF_MAGIC = b"BSHF"


def _byte_shuffle(data: bytes, stride: int = 2) -> bytes:
    if stride <= 1 or len(data) < stride:
        return data
    src = np.frombuffer(data, dtype=np.uint8)
    planes = [src[pos::stride] for pos in range(stride)]
    return _BSHF_MAGIC + bytes([stride]) + np.concatenate(planes).tobytes()


def _byte_unshuffle(data: bytes) -> bytes:
    if data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    out = np.empty(payload.size, dtype=np.uint8)
    src = 0
    for pos in range(stride):
        n = payload.size // stride + (1 if pos < payload.size % stride else 0)
        out[pos::stride] = payload[src : src + n]
        src += n
    return out.tobytes()


def _compress(data: bytes, compressor: str) -> bytes:
    data = _byte_shuffle(data)
    if compressor == "brotli":
        return brotli.compress(data, quality=11)
    raise ValueError(f"Unknown compressor: {compressor!r}")


def _decompress(data: bytes, compressor: str) -> bytes:
    if compressor == "brotli":
        return _byte_unshuffle(brotli.decompress(data))
    raise ValueError(f"Unknown compressor: {compressor!r}")


def serialize(
    h: Hyperparameters, base_model: GPT, hessians: dict[str, Tensor], code: str, device: torch.device
) -> tuple[int, int]:
    code_bytes = len(code.encode("utf-8"))
    if h.is_main_process:
        torch.save(base_model.state_dict(), h.model_path)
        log(f"Serialized model: {os.path.getsize(h.model_path)} bytes")
        log(f"Code size: {code_bytes} bytes")
    t0 = time.perf_counter()
    quant_result, quant_meta = gptq_mixed_quantize(h, base_model.state_dict(), hessians, device)
    quant_buf = io.BytesIO()
    torch.save({"w": quant_result, "m": quant_meta}, quant_buf)
    quant_blob = _compress(quant_buf.getvalue(), h.compressor)
    quant_file_bytes = len(quant_blob)
    bytes_total = quant_file_bytes + code_bytes
    if h.is_main_process:
        with open(h.quantized_model_path, "wb") as f:
            f.write(quant_blob)
    log(f"Serialized model quantized+{h.compressor}: {quant_file_bytes} bytes in {time.perf_counter() - t0:.1f}s")
    log(f"Total submission size quantized+{h.compressor}: {bytes_total} bytes")
    if bytes_total > h.size_limit:
        raise RuntimeError(f"submission of {bytes_total} bytes is over the limit of {h.size_limit}")
    return bytes_total, quant_file_bytes


def deserialize(h: Hyperparameters, device: torch.device) -> GPT:
    eval_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(eval_model)
    with open(h.quantized_model_path, "rb") as f:
        quant_blob_disk = f.read()
    quant_state = torch.load(io.BytesIO(_decompress(quant_blob_disk, h.compressor)), map_location="cpu")
    eval_model.load_state_dict(dequantize_mixed(quant_state["w"], quant_state["m"], eval_model.state_dict()), strict=True)
    eval_model.looping_active = h.num_loops > 0
    return eval_model


# ---------------------------------------------------------------------------------------------------------------
# evaluation


def _loss_bpb(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> tuple[float, float]:
    val_loss = (loss_sum / token_count).item()
    val_bpb = val_loss / math.log(2.0) * (token_count.item() / byte_count.item())
    return val_loss, val_bpb


def _reduce_sums(loss_sum: Tensor, token_count: Tensor, byte_count: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for t in (loss_sum, token_count, byte_count):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)


def eval_val(h: Hyperparameters, device: torch.device, val_data: ValidationData, model: nn.Module) -> tuple[float, float]:
    """Non-overlapping windows; the quick figure while training and after quantisation."""
    seq_len = h.eval_seq_len
    local_batch_seqs = max(1, h.val_batch_tokens // (h.world_size * h.grad_accum_steps) // seq_len)
    total_tokens = val_data.val_tokens.numel() - 1
    total_seqs = (total_tokens + seq_len - 1) // seq_len
    seq_start = total_seqs * h.rank // h.world_size
    seq_end = total_seqs * (h.rank + 1) // h.world_size
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for bs in range(seq_start, seq_end, local_batch_seqs):
            raw_start = bs * seq_len
            raw_end = min(min(bs + local_batch_seqs, seq_end) * seq_len, total_tokens)
            local = val_data.val_tokens[raw_start : raw_end + 1].to(device=device, dtype=torch.int64)
            whole = (local.numel() - 1) // seq_len * seq_len
            for lo, hi in ((0, whole), (whole, local.numel() - 1)):
                if hi <= lo:
                    continue
                x = local[lo:hi].reshape(-1, seq_len if hi == whole else hi - lo)
                y = local[lo + 1 : hi + 1].reshape(x.shape)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    batch_loss = model(x, y)
                loss_sum += batch_loss.to(torch.float64) * float(y.numel())
                token_count += float(y.numel())
                byte_count += val_data.count_bytes(x.reshape(-1), y.reshape(-1))
    _reduce_sums(loss_sum, token_count, byte_count)
    model.train()
    return _loss_bpb(loss_sum, token_count, byte_count)


def _window_starts(total_tokens: int, seq_len: int, stride: int) -> list[int]:
    """Starts of the sliding windows; each token is scored in one of them, the first scores all of its own."""
    context_size = seq_len - stride
    return [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + context_size < total_tokens]


def _window_batch(val_tokens: Tensor, windows: list[int], batch_seqs: int, seq_len: int, device: torch.device):
    """Inputs and targets of some windows, filled up to a fixed shape so that nothing is compiled twice."""
    total_tokens = val_tokens.numel() - 1
    x_batch = torch.zeros(batch_seqs, seq_len, dtype=torch.int64, device=device)
    y_batch = torch.zeros(batch_seqs, seq_len, dtype=torch.int64, device=device)
    wlens = []
    for i, ws in enumerate(windows):
        wlen = min(ws + seq_len, total_tokens) - ws
        chunk = val_tokens[ws : ws + wlen + 1].to(dtype=torch.int64, device=device)
        x_batch[i, :wlen] = chunk[:-1]
        y_batch[i, :wlen] = chunk[1:]
        wlens.append(wlen)
    return x_batch, y_batch, wlens


def eval_val_sliding(
    h: Hyperparameters, device: torch.device, val_data: ValidationData, base_model: GPT
) -> tuple[float, float]:
    base_model.eval()
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    seq_len, stride, batch_seqs = h.eval_seq_len, h.eval_stride, h.eval_batch_seqs
    context_size = seq_len - stride
    window_starts = _window_starts(val_data.val_tokens.numel() - 1, seq_len, stride)
    my_s = len(window_starts) * h.rank // h.world_size
    my_e = len(window_starts) * (h.rank + 1) // h.world_size
    my_windows = window_starts[my_s:my_e]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    with torch.no_grad():
        for bi in range(0, len(my_windows), batch_seqs):
            batch_ws = my_windows[bi : bi + batch_seqs]
            x_batch, y_batch, wlens = _window_batch(val_data.val_tokens, batch_ws, batch_seqs, seq_len, device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x_batch)
            nll = F.cross_entropy(
                logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none"
            ).reshape(batch_seqs, seq_len)
            for i, ws in enumerate(batch_ws):
                wlen = wlens[i]
                s = 0 if ws == 0 else context_size
                loss_sum += nll[i, s:wlen].to(torch.float64).sum()
                token_count += float(wlen - s)
                byte_count += val_data.count_bytes(x_batch[i, s:wlen], y_batch[i, s:wlen])
    _reduce_sums(loss_sum, token_count, byte_count)
    base_model.train()
    return _loss_bpb(loss_sum, token_count, byte_count)


def _time_is_up(deadline: float, device: torch.device) -> bool:
    """Whether any rank has passed the deadline; all ranks get the same answer."""
    flag = torch.tensor(float(time.perf_counter() > deadline), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _ttt_train_chunk(
    h: Hyperparameters,
    device: torch.device,
    val_tokens: Tensor,
    base_model: GPT,
    optimizer: torch.optim.Optimizer,
    ttt_params: list[nn.Parameter],
    chunk_start: int,
    chunk_end: int,
) -> None:
    """Some epochs of SGD on one chunk. The last target is val_tokens[chunk_end], the chunk's last scored token."""
    seq_len = h.train_seq_len
    chunk_seqs = (chunk_end - chunk_start) // seq_len
    if chunk_seqs == 0:
        return
    my_seq_s = chunk_seqs * h.rank // h.world_size
    my_seq_e = chunk_seqs * (h.rank + 1) // h.world_size
    local_seqs = max(1, h.ttt_batch_seqs // h.world_size)
    num_steps = -(-(-(-chunk_seqs // h.world_size)) // local_seqs)
    base_model.train()
    for _ in range(h.ttt_epochs):
        for step in range(num_steps):
            lo = my_seq_s + step * local_seqs
            hi = min(lo + local_seqs, my_seq_e)
            optimizer.zero_grad(set_to_none=True)
            if lo < hi:
                start_tok = chunk_start + lo * seq_len
                local = val_tokens[start_tok : start_tok + (hi - lo) * seq_len + 1].to(device, dtype=torch.int64)
                x = local[:-1].reshape(-1, seq_len)
                y = local[1:].reshape(-1, seq_len)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = base_model(x, y)
                loss.backward()
            for p in ttt_params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                    p.grad.div_(h.world_size)
            torch.nn.utils.clip_grad_norm_(ttt_params, h.ttt_grad_clip)
            optimizer.step()


def eval_val_sliding_ttt(
    h: Hyperparameters, device: torch.device, val_data: ValidationData, base_model: GPT, deadline: float
) -> tuple[float, float]:
    """Chunk by chunk: score every window of the chunk, then train on it. Past the deadline it only scores."""
    seq_len, stride, batch_seqs = h.eval_seq_len, h.eval_stride, h.eval_batch_seqs
    context_size = seq_len - stride
    val_tokens = val_data.val_tokens
    total_tokens = val_tokens.numel() - 1
    ttt_chunk = h.ttt_chunk_tokens
    if ttt_chunk % stride or seq_len % stride or ttt_chunk < seq_len:
        raise ValueError("the chunk must hold whole strides, or a window would reach into the next one")
    num_chunks = (total_tokens + ttt_chunk - 1) // ttt_chunk
    chunk_windows: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in _window_starts(total_tokens, seq_len, stride):
        scored_start = ws if ws == 0 else ws + context_size
        chunk_windows[scored_start // ttt_chunk].append(ws)
    log(
        f"ttt:start chunks={num_chunks} ttt_lr={h.ttt_lr} ttt_epochs={h.ttt_epochs} "
        f"freeze_blocks={h.ttt_freeze_blocks} momentum={h.ttt_momentum}"
    )

    frozen = {f"blocks.{i}." for i in range(h.ttt_freeze_blocks)}
    ttt_params = []
    for name, p in base_model.named_parameters():
        p.requires_grad_(not any(name.startswith(prefix) for prefix in frozen))
        if p.requires_grad:
            ttt_params.append(p)
    log(f"ttt:params unfrozen={sum(p.numel() for p in ttt_params)}")
    optimizer = torch.optim.SGD(ttt_params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)

    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    token_count = torch.zeros((), device=device, dtype=torch.float64)
    byte_count = torch.zeros((), device=device, dtype=torch.float64)
    training = True
    t0 = time.perf_counter()
    for ci in range(num_chunks):
        windows = chunk_windows[ci]
        chunk_start = ci * ttt_chunk
        chunk_end = min((ci + 1) * ttt_chunk, total_tokens)

        # phase 1: score, with the weights that chunks before this one left
        my_s = len(windows) * h.rank // h.world_size
        my_e = len(windows) * (h.rank + 1) // h.world_size
        my_windows = windows[my_s:my_e]
        base_model.eval()
        with torch.no_grad():
            for bi in range(0, len(my_windows), batch_seqs):
                batch_ws = my_windows[bi : bi + batch_seqs]
                x_batch, y_batch, wlens = _window_batch(val_tokens, batch_ws, batch_seqs, seq_len, device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = logits_fn(x_batch)
                nll = F.cross_entropy(
                    logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none"
                ).reshape(batch_seqs, seq_len)
                for i, ws in enumerate(batch_ws):
                    wlen = wlens[i]
                    s = 0 if ws == 0 else context_size
                    loss_sum += nll[i, s:wlen].to(torch.float64).sum()
                    token_count += float(wlen - s)
                    byte_count += val_data.count_bytes(x_batch[i, s:wlen], y_batch[i, s:wlen])

        # phase 2: train on what has just been scored
        if training and _time_is_up(deadline, device):
            training = False
            log(f"ttt:out of time at chunk {ci}, scoring the rest without training")
        if training and ci < num_chunks - 1:
            cos_lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for group in optimizer.param_groups:
                group["lr"] = cos_lr
            _ttt_train_chunk(h, device, val_tokens, base_model, optimizer, ttt_params, chunk_start, chunk_end)

        if h.is_main_process and (ci % 100 == 0 or ci == num_chunks - 1):
            running = loss_sum.item() / max(token_count.item(), 1.0)
            bytes_seen = max(byte_count.item(), 1.0)
            rbpb = running / math.log(2.0) * token_count.item() / bytes_seen
            log(f"  ttt_chunk [{ci + 1}/{num_chunks}] bpb={rbpb:.6f} time={time.perf_counter() - t0:.1f}s")

    _reduce_sums(loss_sum, token_count, byte_count)
    if int(token_count.item()) != total_tokens:
        raise RuntimeError(f"scored {int(token_count.item())} tokens of {total_tokens}")
    for p in base_model.parameters():
        p.requires_grad_(True)
    base_model.eval()
    return _loss_bpb(loss_sum, token_count, byte_count)


def timed_eval(label: str, fn, *args) -> tuple[float, float]:
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms")
    return val_loss, val_bpb


# ---------------------------------------------------------------------------------------------------------------
# training


def train_model(
    h: Hyperparameters, device: torch.device, val_data: ValidationData
) -> tuple[GPT, nn.Module, dict[str, Tensor]]:
    base_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = DDP(compiled_model, device_ids=[h.local_rank], broadcast_buffers=False) if h.distributed else compiled_model
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")

    optimizers = Optimizers(h, base_model)
    train_loader = ShuffledSequenceLoader(h, device)
    calib_loader = ShuffledSequenceLoader(h, device, seed_offset=1_000_003)
    max_wallclock_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)

    def training_frac(step: int, elapsed_ms: float) -> float:
        return max(step / max(h.iterations, 1), elapsed_ms / max(max_wallclock_ms, 1e-9))

    def lr_mul(frac: float) -> float:
        if h.warmdown_frac <= 0 or frac < 1.0 - h.warmdown_frac:
            return 1.0
        return max((1.0 - frac) / h.warmdown_frac, h.min_lr)

    def step_fn(step: int, lr_scale: float) -> Tensor:
        optimizers.zero_grad()
        train_loss = torch.zeros((), device=device)
        for micro_step in range(h.grad_accum_steps):
            if h.distributed:
                model.require_backward_grad_sync = micro_step == h.grad_accum_steps - 1
            x, y = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss / h.grad_accum_steps).backward()
        frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum
        optimizers.set_scale(lr_scale, momentum)
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        optimizers.step()
        return train_loss / h.grad_accum_steps

    # compile both depths on train batches, then put weights, optimizers and loader back
    if h.warmup_steps > 0:
        initial_model_state = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers.all]
        model.train()
        for looping in (False, True) if h.num_loops > 0 else (False,):
            base_model.looping_active = looping
            for warmup_step in range(h.warmup_steps):
                step_fn(warmup_step, 1.0)
            log(f"warmup looping:{looping} steps:{h.warmup_steps}")
        base_model.looping_active = False
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers.all, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        optimizers.zero_grad()
        if h.distributed:
            model.require_backward_grad_sync = True
        train_loader = ShuffledSequenceLoader(h, device)

    ema = EMA(base_model, h.ema_decay)
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        should_validate = last_step or (h.val_loss_every > 0 and step % h.val_loss_every == 0)
        if should_validate and not last_step:
            # the clock stands still while the curve's points are taken; nothing of them flows back
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, model)
            log(f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            break
        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = training_frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{base_model.loop_encoder}+{base_model.loop_decoder}")
        train_loss = step_fn(step, lr_mul(frac))
        ema.update(base_model)
        step += 1
        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if h.train_log_every > 0 and (step <= 5 or step % h.train_log_every == 0):
            tok_per_sec = step * h.train_batch_tokens / (approx_training_time_ms / 1000.0)
            log(
                f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} "
                f"train_time: {approx_training_time_ms / 60000:.1f}m tok/s: {tok_per_sec:.0f}"
            )
        reached_cap = approx_training_time_ms >= max_wallclock_ms
        if h.distributed:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log(f"stopping: train_time: {training_time_ms:.0f}ms step: {step}/{h.iterations}")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # the reserve: average and calibrate before the 600 s are over
    t1 = time.perf_counter()
    deadline = t1 + h.max_wallclock_seconds - training_time_ms / 1000.0 - 1.5
    log("ema:applying EMA weights")
    ema.apply(base_model)
    hessians = collect_hessians(h, base_model, calib_loader, device, deadline)
    torch.cuda.synchronize()
    total_s = training_time_ms / 1000.0 + time.perf_counter() - t1
    log(f"train+calibration: {total_s:.1f}s of {h.max_wallclock_seconds:.0f}s")
    return base_model, compiled_model, hessians


def train_and_eval(h: Hyperparameters, device: torch.device) -> None:
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    val_data = ValidationData(h, device)
    log(f"train_shards: {len(glob.glob(h.train_files))}")
    log(f"val_tokens: {val_data.val_tokens.numel() - 1}")

    base_model, compiled_model, hessians = train_model(h, device, val_data)
    torch._dynamo.reset()
    timed_eval("pre-quantization post-ema", eval_val, h, device, val_data, compiled_model)
    serialize(h, base_model, hessians, Path(__file__).read_text(encoding="utf-8"), device)
    if h.distributed:
        dist.barrier()
    del base_model, compiled_model, hessians
    torch._dynamo.reset()
    torch.cuda.empty_cache()

    # everything from here on comes out of the packed file, on one clock
    eval_start = time.perf_counter()
    eval_deadline = eval_start + h.eval_budget_seconds
    eval_model = deserialize(h, device)
    timed_eval("quantized", eval_val, h, device, val_data, eval_model)
    final = ("none", float("nan"), float("nan"))
    if h.sliding_window_enabled:
        val_loss, val_bpb = timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val_data, eval_model)
        final = ("quantized_sliding_window", val_loss, val_bpb)
    if h.ttt_enabled:
        torch._dynamo.reset()
        val_loss, val_bpb = timed_eval(
            "quantized_ttt", eval_val_sliding_ttt, h, device, val_data, eval_model, eval_deadline
        )
        final = ("quantized_ttt", val_loss, val_bpb)
    log(f"total_eval_time: {time.perf_counter() - eval_start:.1f}s")
    log(f"final_{final[0]}_exact val_loss:{final[1]:.8f} val_bpb:{final[2]:.8f}")


def main() -> None:
    h = Hyperparameters()
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if h.world_size <= 0 or 8 % h.world_size != 0:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    if h.is_main_process:
        os.makedirs("logs", exist_ok=True)
    set_logging_hparams(h)
    log("=" * 100, console=False)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    log("Hyperparameters:")
    for k, v in sorted(vars(type(h)).items()):
        if not k.startswith("_"):
            log(f"  {k}: {v}")
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
