# SP8192 / 11L x 512 / depth-recurrent middle / parallel residual tail / XSA + VE / MuonEq-R / EMA
# full-Hessian GPTQ (SDClip) -> byte shuffle -> brotli, then score-first SGD TTT with a bigram cache and a hint tilt on top.
import collections
import glob
import json
import math
import os
import platform
import queue
import random
import threading
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

try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func
except ImportError:
    flash_attn_3_func = None


class Hyperparameters:
    # paths
    data_dir = os.environ.get("DATA_DIR", "./data/")
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    log_dir = os.environ.get("LOG_DIR", "logs")
    quantized_model_path = os.environ.get("QUANTIZED_MODEL_PATH", "final_model.int6.ptz")
    eval_only = bool(int(os.environ.get("EVAL_ONLY", "0")))
    seed = int(os.environ.get("SEED", 1337))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 20000))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 2048 * 32 * 8))
    prefetch_batches = int(os.environ.get("PREFETCH_BATCHES", 4))

    # model
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.0))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    skip_gates_enabled = bool(int(os.environ.get("SKIP_GATES_ENABLED", "1")))
    attn_gate_enabled = bool(int(os.environ.get("ATTN_GATE_ENABLED", "1")))
    attn_gate_width = int(os.environ.get("ATTN_GATE_WIDTH", 12))
    smear_enabled = bool(int(os.environ.get("SMEAR_ENABLED", "1")))
    smear_width = int(os.environ.get("SMEAR_WIDTH", 12))
    ve_enabled = bool(int(os.environ.get("VE_ENABLED", "1")))
    ve_dim = int(os.environ.get("VE_DIM", 64))
    ve_layers = os.environ.get("VE_LAYERS", "8,9,10")
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

    # depth recurrence + parallel residuals
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))
    parallel_residual_start = int(os.environ.get("PARALLEL_RESIDUAL_START", 7))

    # optimizer
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
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

    # quantization / artifact
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 64))
    gptq_batch_seqs = int(os.environ.get("GPTQ_BATCH_SEQS", 16))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 34.0))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 7))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 15.0))
    lqer_rank = int(os.environ.get("LQER_RANK", 4))
    lqer_top_k = int(os.environ.get("LQER_TOP_K", 3))
    brotli_quality = int(os.environ.get("BROTLI_QUALITY", 11))
    size_limit = int(os.environ.get("SIZE_LIMIT", 16_000_000))

    # evaluation
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    eval_temperature = float(os.environ.get("EVAL_TEMPERATURE", 1.0))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 600.0))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "1")))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.005))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 2))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))
    cache_enabled = bool(int(os.environ.get("CACHE_ENABLED", "1")))
    cache_lambda = float(os.environ.get("CACHE_LAMBDA", 0.06))
    cache_alpha = float(os.environ.get("CACHE_ALPHA", 4.0))
    cache_halfcount = float(os.environ.get("CACHE_HALFCOUNT", 200.0))
    hint_enabled = bool(int(os.environ.get("HINT_ENABLED", "1")))
    hint_orders = os.environ.get("HINT_ORDERS", "12,6")
    hint_bits = int(os.environ.get("HINT_BITS", 22))
    hint_min_count = float(os.environ.get("HINT_MIN_COUNT", 2.0))
    hint_beta = float(os.environ.get("HINT_BETA", 1.4))

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size


_LOG_FILE: str | None = None


def set_log_file(h):
    global _LOG_FILE
    if h.is_main_process:
        os.makedirs(h.log_dir, exist_ok=True)
        _LOG_FILE = os.path.join(h.log_dir, f"{h.run_id}.txt")


def log(msg, console=True):
    if _LOG_FILE is None:
        return
    if console:
        print(msg, flush=True)
    with open(_LOG_FILE, "a", encoding="utf-8") as f:
        print(msg, file=f)


class Stopwatch:
    """Accumulates seconds while running. The training one also covers calibration and GPTQ."""

    def __init__(self):
        self.total = 0.0
        self.t0 = None

    def start(self):
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()
        return self

    def pause(self):
        if self.t0 is not None:
            torch.cuda.synchronize()
            self.total += time.perf_counter() - self.t0
            self.t0 = None
        return self.total

    def seconds(self):
        return self.total + (time.perf_counter() - self.t0 if self.t0 is not None else 0.0)


# ---------------------------------------------------------------- data

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
_SHARD_NTOKENS: dict[str, int] = {}
_SHARD_MMAP: dict[str, np.memmap] = {}


def shard_num_tokens(file):
    key = str(file)
    if key not in _SHARD_NTOKENS:
        header = np.fromfile(file, dtype="<i4", count=SHARD_HEADER_INTS)
        if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
            raise ValueError(f"bad shard header in {file}")
        n = int(header[2])
        want = SHARD_HEADER_BYTES + n * np.dtype("<u2").itemsize
        if Path(file).stat().st_size != want:
            raise ValueError(f"shard size mismatch in {file}: expected {want} bytes")
        _SHARD_NTOKENS[key] = n
    return _SHARD_NTOKENS[key]


def shard_memmap(file):
    key = str(file)
    if key not in _SHARD_MMAP:
        n = shard_num_tokens(file)
        _SHARD_MMAP[key] = np.memmap(file, mode="r", dtype="<u2", offset=SHARD_HEADER_BYTES, shape=(n,))
    return _SHARD_MMAP[key]


def load_shard(file):
    n = shard_num_tokens(file)
    tokens = np.fromfile(file, dtype="<u2", count=n, offset=SHARD_HEADER_BYTES)
    if tokens.size != n:
        raise ValueError(f"short read in {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern):
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no validation shards match {pattern}")
    return torch.cat([load_shard(f) for f in files]).contiguous()


def build_byte_tables(sp, vocab_size, device):
    """Per-token UTF-8 byte counts: bytes of the piece without its mark, whether it opens with a space, whether it is a boundary."""
    sp_size = int(sp.vocab_size())
    if sp_size > vocab_size:
        raise ValueError(f"tokenizer has {sp_size} pieces, model only {vocab_size}")
    base_bytes = np.zeros(vocab_size, dtype=np.int16)
    has_leading_space = np.zeros(vocab_size, dtype=np.bool_)
    is_boundary = np.ones(vocab_size, dtype=np.bool_)
    for token_id in range(sp_size):
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
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but tokenizer has {int(self.sp.vocab_size())}")
        self.tokens = load_validation_tokens(h.val_files)
        self.base_bytes, self.has_leading_space, self.is_boundary = build_byte_tables(self.sp, h.vocab_size, device)

    @property
    def num_targets(self):
        return self.tokens.numel() - 1

    def byte_count(self, prev, tgt):
        n = self.base_bytes[tgt].to(torch.float64)
        n += (self.has_leading_space[tgt] & ~self.is_boundary[prev]).to(torch.float64)
        return n


class ShuffledSequenceLoader:
    """Every rank owns a stripe of the shards and draws whole sequences from them without replacement."""

    def __init__(self, h, device, seed_offset=0):
        self.seq_len, self.world_size, self.device = h.train_seq_len, h.world_size, device
        all_files = sorted(glob.glob(h.train_files))
        if len(all_files) < h.world_size:
            raise FileNotFoundError(f"{len(all_files)} training shards for {h.world_size} ranks: {h.train_files}")
        self.files = all_files[h.rank :: h.world_size]
        self.rng = np.random.Generator(np.random.PCG64(h.seed * 1000 + h.rank + seed_offset))
        self.num_tokens = [shard_num_tokens(f) for f in self.files]
        self.start_inds: list[list[int]] = [[] for _ in self.files]
        for si in range(len(self.files)):
            self._reset_shard(si)

    def _reset_shard(self, si):
        max_phase = min(self.seq_len - 1, max(0, self.num_tokens[si] - self.seq_len - 1))
        phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
        num_sequences = (self.num_tokens[si] - 1 - phase) // self.seq_len
        order = self.rng.permutation(num_sequences)
        self.start_inds[si] = (phase + order * self.seq_len).tolist()

    def _sample(self, batch):
        remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
        buf = torch.empty((batch, self.seq_len + 1), dtype=torch.int64)
        for bi in range(batch):
            total = remaining.sum()
            if total <= 0:
                for si in range(len(self.files)):
                    self._reset_shard(si)
                remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
                total = remaining.sum()
            si = int(self.rng.choice(len(self.files), p=remaining / total))
            start = self.start_inds[si].pop()
            remaining[si] -= 1
            mm = shard_memmap(self.files[si])
            buf[bi] = torch.from_numpy(np.array(mm[start : start + self.seq_len + 1], dtype=np.int64))
        return buf

    def next_batch(self, global_tokens, grad_accum_steps):
        batch = max(1, global_tokens // (self.world_size * grad_accum_steps * self.seq_len))
        return self.to_device(self._sample(batch))

    def to_device(self, buf):
        buf = buf.pin_memory().to(self.device, non_blocking=True)
        return buf[:, :-1], buf[:, 1:]


class PrefetchLoader:
    """Background thread around a ShuffledSequenceLoader with a fixed batch shape."""

    def __init__(self, loader, batch, depth):
        self.loader, self.batch = loader, batch
        self.q: queue.Queue = queue.Queue(maxsize=max(1, depth))
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        while not self.stop.is_set():
            buf = self.loader._sample(self.batch)
            while not self.stop.is_set():
                try:
                    self.q.put(buf, timeout=0.2)
                    break
                except queue.Full:
                    continue

    def next_batch(self):
        return self.loader.to_device(self.q.get())

    def close(self):
        self.stop.set()
        self.thread.join(timeout=2.0)


# ---------------------------------------------------------------- model

CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates", "attn_gate", "smear", "ve_scale")


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None)


class Rotary(nn.Module):
    def __init__(self, rope_dims, base, max_len):
        super().__init__()
        self.rope_dims = rope_dims
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, x):
        T = x.size(1)
        cos, sin = self.cos[:, :T].to(x.dtype), self.sin[:, :T].to(x.dtype)
        rot, rest = x[..., : self.rope_dims], x[..., self.rope_dims :]
        half = self.rope_dims // 2
        a, b = rot[..., :half], rot[..., half:]
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def causal_attention(q, k, v):
    if flash_attn_3_func is not None:
        return flash_attn_3_func(q, k, v, causal=True)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.size(2) != k.size(2)
    )
    return out.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        dim, self.num_heads, self.num_kv_heads = h.model_dim, h.num_heads, h.num_kv_heads
        if dim % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("model_dim / num_heads / num_kv_heads do not divide")
        self.head_dim = dim // self.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(h.rope_dims, h.rope_base, max(h.train_seq_len, h.eval_seq_len))
        self.use_xsa = layer_idx >= h.num_layers - h.xsa_last_n
        self.gate_width = h.attn_gate_width
        self.attn_gate = CastedLinear(h.attn_gate_width, self.num_heads, bias=False) if h.attn_gate_enabled else None
        if self.attn_gate is not None:
            self.attn_gate._zero_init = True

    def _xsa(self, y, v):
        # remove from every head's output the part along its own value vector
        B, T, H, D = y.shape
        yg = y.reshape(B, T, self.num_kv_heads, H // self.num_kv_heads, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (yg - (yg * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, T, H, D)

    def forward(self, x, ve=None):
        B, T, C = x.shape
        q = self.c_q(x).reshape(B, T, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        v = self.c_v(x)
        if ve is not None:
            v = v + ve
        v = v.reshape(B, T, self.num_kv_heads, self.head_dim)
        q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        q, k = self.rotary(q), self.rotary(k)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = causal_attention(q, k, v)
        if self.use_xsa:
            y = self._xsa(y, v)
        if self.attn_gate is not None:
            y = y * (2 * torch.sigmoid(self.attn_gate(x[..., : self.gate_width]))).unsqueeze(-1)
        return self.proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, h):
        super().__init__()
        hidden = int(h.model_dim * h.mlp_mult)
        self.fc = CastedLinear(h.model_dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, h.model_dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attn, self.mlp = CausalSelfAttention(h, layer_idx), MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = layer_idx >= h.parallel_residual_start

    def forward(self, x, x0, ve=None):
        mix = self.resid_mix.to(x.dtype)
        x_in = mix[0] * x + mix[1] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor, ve)
        attn_out = self.attn_scale.to(x.dtype) * attn_out
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
            return x_in + attn_out + self.mlp_scale.to(x.dtype) * mlp_out
        x_mid = x_in + attn_out
        return x_mid + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x_mid) * self.ln_scale_factor)


class SmearGate(nn.Module):
    """Lets a token look at the embedding of the one before it. Documents start at BOS and take nothing from the left."""

    def __init__(self, h):
        super().__init__()
        self.width, self.bos_id = h.smear_width, h.bos_id
        self.gate = CastedLinear(h.smear_width, 1, bias=False)
        self.gate._zero_init = True
        self.smear_lambda = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def forward(self, x, ids):
        prev = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        g = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.gate(x[..., : self.width]))
        keep = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + g * keep * prev


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.logit_softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h) if h.smear_enabled else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        self.ve_layers = [int(s) for s in h.ve_layers.split(",") if s.strip()] if h.ve_enabled else []
        if self.ve_layers:
            kv_dim = h.num_kv_heads * (h.model_dim // h.num_heads)
            self.ve_emb = nn.Embedding(h.vocab_size, h.ve_dim)
            self.ve_proj = CastedLinear(h.ve_dim, kv_dim, bias=False)
            self.ve_scale = nn.Parameter(torch.full((len(self.ve_layers),), 0.1, dtype=torch.float32))
        self.looping_active = False
        flat = list(range(h.num_layers))
        if h.num_loops > 0:
            seg = list(range(h.loop_start, h.loop_end + 1))
            looped = list(range(h.loop_start)) + seg * (h.num_loops + 1) + list(range(h.loop_end + 1, h.num_layers))
        else:
            looped = flat
        self.plans = {False: self._split(flat), True: self._split(looped)}
        n_skip = max(min(len(e), len(d)) for e, d in self.plans.values())
        self.skip_weights = nn.Parameter(torch.ones(n_skip, h.model_dim, dtype=torch.float32))
        self.skip_gates = (
            nn.Parameter(torch.zeros(n_skip, h.model_dim, dtype=torch.float32)) if h.skip_gates_enabled else None
        )
        self._init_weights(h)

    @staticmethod
    def _split(order):
        cut = len(order) // 2
        return order[:cut], order[cut:]

    def _init_weights(self, h):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.tied_embed_init_std)
        if self.ve_layers:
            nn.init.normal_(self.ve_emb.weight, mean=0.0, std=0.01)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def _block(self, i, x, x0, ids_ve):
        ve = None
        if i in self.ve_layers:
            ve = ids_ve * self.ve_scale[self.ve_layers.index(i)].to(x.dtype)
        return self.blocks[i](x, x0, ve)

    def hidden(self, ids):
        x = F.rms_norm(self.tok_emb(ids).to(torch.bfloat16), (self.tok_emb.weight.size(1),))
        if self.smear is not None:
            x = self.smear(x, ids)
        x0 = x
        ids_ve = self.ve_proj(self.ve_emb(ids).to(x.dtype)) if self.ve_layers else None
        enc, dec = self.plans[self.looping_active]
        skips = []
        for i in enc:
            x = self._block(i, x, x0, ids_ve)
            skips.append(x)
        for j, i in enumerate(dec):
            if skips:
                skip = self.skip_weights[j].to(x.dtype) * skips.pop()
                if self.skip_gates is not None:
                    g = torch.sigmoid(self.skip_gates[j].to(x.dtype))
                    x = torch.lerp(skip, x, g)
                else:
                    x = x + skip
            x = self._block(i, x, x0, ids_ve)
        return self.final_norm(x)

    def forward_logits(self, ids):
        logits = F.linear(self.hidden(ids), self.tok_emb.weight.to(torch.bfloat16))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, ids, targets):
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="mean")


def build_model(h, device):
    model = GPT(h).to(device)
    model.requires_grad_(True)
    return model


# ---------------------------------------------------------------- optimizers

NS_COEFFS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@torch.compile
def newton_schulz(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for i in range(steps):
        a, b, c = NS_COEFFS[min(i, len(NS_COEFFS) - 1)]
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    """MuonEq-R: rows of the momentum are normalised before Newton-Schulz. Work is striped over the ranks."""

    def __init__(self, params, lr, momentum, backend_steps, weight_decay, row_normalize):
        defaults = dict(
            lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay, row_normalize=row_normalize
        )
        super().__init__(params, defaults)

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
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
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
                    g = newton_schulz(g, steps=group["backend_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1).bfloat16()
                at += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                if group["weight_decay"] > 0:
                    p.data.mul_(1.0 - lr * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-lr)
                at += p.numel()


class Optimizers:
    def __init__(self, h, base_model):
        matrix, scalar = [], []
        for name, p in base_model.named_parameters():
            if name in ("tok_emb.weight", "ve_emb.weight"):
                continue
            is_control = any(s in name for s in CONTROL_PATTERNS)
            (scalar if is_control or p.ndim < 2 else matrix).append(p)
        embeds = [{"params": [base_model.tok_emb.weight], "lr": h.tied_embed_lr, "base_lr": h.tied_embed_lr}]
        if base_model.ve_layers:
            embeds.append({"params": [base_model.ve_emb.weight], "lr": h.tied_embed_lr, "base_lr": h.tied_embed_lr})
        adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.tok = torch.optim.AdamW(embeds, weight_decay=h.embed_wd, **adam)
        self.muon = Muon(
            matrix,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.scalar = torch.optim.AdamW(
            [{"params": scalar, "lr": h.scalar_lr, "base_lr": h.scalar_lr}], weight_decay=h.adam_wd, **adam
        )
        self.all = [self.tok, self.muon, self.scalar]

    def __iter__(self):
        return iter(self.all)

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def step(self, lr_scale, momentum):
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
            opt.step()
        self.zero_grad()


class EMA:
    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        live = model.state_dict()
        names = list(self.shadow)
        torch._foreach_lerp_([self.shadow[n] for n in names], [live[n].detach().float() for n in names], 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model):
        live = model.state_dict()
        model.load_state_dict({n: self.shadow[n].to(live[n].dtype) for n in live}, strict=True)


# ---------------------------------------------------------------- quantization


def classify_param(name):
    if "tok_emb" in name or "ve_emb" in name:
        return "embed"
    if ".mlp." in name:
        return "mlp"
    if ".attn." in name or "ve_proj" in name:
        return "attn"
    return "other"


def is_quantized(name, t):
    if any(s in name for s in CONTROL_PATTERNS):
        return False
    return t.is_floating_point() and t.ndim == 2 and t.numel() > 65536


def collect_hessians(h, model, loader, device, clock):
    """X^T X of the inputs of every linear layer, over batches of training data, inside the training clock."""
    hessians: dict[str, Tensor] = {}
    counts: dict[str, int] = collections.defaultdict(int)
    hooks = []

    def accumulate(name, x):
        x = x.detach().reshape(-1, x.size(-1)).float()
        if name not in hessians:
            hessians[name] = torch.zeros(x.size(1), x.size(1), dtype=torch.float32, device=device)
        hessians[name].addmm_(x.T, x)
        counts[name] += x.size(0)

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and is_quantized(name + ".weight", module.weight):
            hooks.append(module.register_forward_pre_hook(lambda m, a, n=name + ".weight": accumulate(n, a[0])))
    hooks.append(model.final_norm.register_forward_hook(lambda m, a, out: accumulate("tok_emb.weight", out)))
    model.eval()
    done = 0
    deadline = h.max_wallclock_seconds - 0.6 * h.gptq_reserve_seconds
    per_rank = max(1, h.gptq_calibration_batches // h.world_size)
    with torch.no_grad():
        for _ in range(per_rank):
            if clock.seconds() > deadline:
                break
            x, _y = loader.next_batch(h.gptq_batch_seqs * h.train_seq_len * h.world_size, 1)
            model.forward_logits(x)
            torch.cuda.synchronize()
            done += 1
    for hook in hooks:
        hook.remove()
    model.train()
    if done == 0:
        raise RuntimeError("no time left for calibration: raise GPTQ_RESERVE_SECONDS")
    for name in sorted(hessians):
        n = torch.tensor(float(counts[name]), device=device)
        if h.distributed:
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
            dist.all_reduce(n, op=dist.ReduceOp.SUM)
        hessians[name] /= n
    return hessians, done


def gptq_quantize(w, H, clip_sigmas, clip_range, block=128, damp=0.01):
    """Full-Hessian GPTQ with act-order; row scale from k sigmas (SDClip)."""
    W0 = w.float()
    rows, cols = W0.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    H.diagonal().add_(damp * H.diag().mean())
    perm = torch.argsort(H.diag(), descending=True)
    inv_perm = torch.argsort(perm)
    W = W0[:, perm].clone()
    W[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)
    scale = (clip_sigmas * W0.std(dim=1) / clip_range).clamp_min(1e-7).to(torch.float16)
    s = scale.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    for i1 in range(0, cols, block):
        i2 = min(i1 + block, cols)
        Wb, Hb = W[:, i1:i2].clone(), Hinv[i1:i2, i1:i2]
        err = torch.zeros_like(Wb)
        for j in range(i2 - i1):
            col = Wb[:, j]
            q = torch.clamp(torch.round(col / s), -clip_range, clip_range)
            Q[:, i1 + j] = q.to(torch.int8)
            e = (col - q * s) / Hb[j, j]
            err[:, j] = e
            Wb[:, j:] -= e.unsqueeze(1) * Hb[j, j:].unsqueeze(0)
        if i2 < cols:
            W[:, i2:] -= err @ Hinv[i1:i2, i2:]
    return Q[:, inv_perm].contiguous(), scale


def round_quantize(w, clip_sigmas, clip_range):
    w = w.float()
    scale = (clip_sigmas * w.std(dim=1) / clip_range).clamp_min(1e-7).to(torch.float16)
    q = torch.clamp(torch.round(w / scale.float()[:, None]), -clip_range, clip_range).to(torch.int8)
    return q, scale


def low_rank_residual(w, q, scale, rank):
    """LQER: int8 factors for the largest quantization errors."""
    E = w.float() - q.float() * scale.float()[:, None]
    U, S, V = torch.svd_lowrank(E, q=rank + 8, niter=4)
    A = U[:, :rank] * S[:rank].sqrt()
    B = (V[:, :rank] * S[:rank].sqrt()).T
    sa = (A.abs().amax(dim=0) / 127).clamp_min(1e-7).to(torch.float16)
    sb = (B.abs().amax(dim=1) / 127).clamp_min(1e-7).to(torch.float16)
    qa = torch.round(A / sa.float()).clamp(-127, 127).to(torch.int8)
    qb = torch.round(B / sb.float()[:, None]).clamp(-127, 127).to(torch.int8)
    gain = float(S[:rank].square().sum())
    return (qa, sa, qb, sb), gain


def quantize_state_dict(h, state, hessians):
    out: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    residuals = []
    report = collections.Counter()
    for name, t in state.items():
        t = t.detach()
        if not is_quantized(name, t):
            out[name] = (t.to(torch.float16) if t.is_floating_point() else t).cpu().contiguous()
            meta[name] = "pass"
            report["pass"] += t.numel()
            continue
        kind = classify_param(name)
        bits = h.embed_bits if kind == "embed" else h.matrix_bits
        sigmas = h.embed_clip_sigmas if kind == "embed" else h.matrix_clip_sigmas
        clip_range = 2 ** (bits - 1) - 1
        if name in hessians:
            q, s = gptq_quantize(t, hessians[name], sigmas, clip_range, h.gptq_block, h.gptq_damp)
            meta[name] = f"gptq{bits}"
        else:
            q, s = round_quantize(t, sigmas, clip_range)
            meta[name] = f"int{bits}"
        report[meta[name]] += t.numel()
        out[name + ".q"], out[name + ".scale"] = q.cpu(), s.cpu()
        if h.lqer_rank > 0 and kind != "embed":
            factors, gain = low_rank_residual(t, q, s, h.lqer_rank)
            residuals.append((gain, name, factors))
    residuals.sort(key=lambda r: -r[0])
    for _gain, name, (qa, sa, qb, sb) in residuals[: h.lqer_top_k]:
        out[name + ".la"], out[name + ".las"], out[name + ".lb"], out[name + ".lbs"] = qa.cpu(), sa.cpu(), qb.cpu(), sb.cpu()
        meta[name] += "+lqer"
    return out, meta, dict(report)


def dequantize_state_dict(tensors, meta, template):
    state = {}
    for name, like in template.items():
        kind = meta[name]
        if kind == "pass":
            state[name] = tensors[name].to(like.dtype)
            continue
        w = tensors[name + ".q"].float() * tensors[name + ".scale"].float()[:, None]
        if kind.endswith("+lqer"):
            A = tensors[name + ".la"].float() * tensors[name + ".las"].float()
            B = tensors[name + ".lb"].float() * tensors[name + ".lbs"].float()[:, None]
            w = w + A @ B
        state[name] = w.to(like.dtype)
    return state


# ---------------------------------------------------------------- artifact

SHUFFLE_MAGIC = b"BSHF"


def byte_shuffle(data, stride=2):
    src = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(len(src), dtype=np.uint8)
    at = 0
    for phase in range(stride):
        part = src[phase::stride]
        out[at : at + len(part)] = part
        at += len(part)
    return SHUFFLE_MAGIC + bytes([stride]) + out.tobytes()


def byte_unshuffle(data):
    if data[:4] != SHUFFLE_MAGIC:
        return data
    stride = data[4]
    src = np.frombuffer(data, dtype=np.uint8, offset=5)
    n = len(src)
    out = np.empty(n, dtype=np.uint8)
    at = 0
    for phase in range(stride):
        size = n // stride + (1 if phase < n % stride else 0)
        out[phase::stride] = src[at : at + size]
        at += size
    return out.tobytes()


def pack(payload):
    """Tensors go one after the other, sorted by kind, so that brotli sees long runs of the same sort of bytes."""
    index, blobs = [], []
    tensors = payload["tensors"]
    for name in sorted(tensors, key=lambda n: (str(tensors[n].dtype), n.rsplit(".", 1)[-1], n)):
        t = tensors[name].contiguous()
        raw = t.numpy().tobytes()
        if t.dtype == torch.float16:
            raw = byte_shuffle(raw, 2)
        index.append([name, str(t.dtype).removeprefix("torch."), list(t.shape), len(raw)])
        blobs.append(raw)
    head = json.dumps({"index": index, "meta": payload["meta"]}, separators=(",", ":")).encode()
    return len(head).to_bytes(4, "little") + head + b"".join(blobs)


def unpack(raw):
    n = int.from_bytes(raw[:4], "little")
    head = json.loads(raw[4 : 4 + n])
    tensors, at = {}, 4 + n
    for name, dtype, shape, size in head["index"]:
        body = raw[at : at + size]
        at += size
        if dtype == "float16":
            body = byte_unshuffle(body)
        tensors[name] = torch.from_numpy(np.frombuffer(body, dtype=dtype).copy()).reshape(shape)
    return {"tensors": tensors, "meta": head["meta"]}


def serialize(h, tensors, meta, code):
    """Writes the artifact (main process) and returns its size and the size of the code."""
    blob = brotli.compress(pack({"tensors": tensors, "meta": meta}), quality=h.brotli_quality, lgwin=24)
    with open(h.quantized_model_path, "wb") as f:
        f.write(blob)
    code_bytes = len(code.encode("utf-8"))
    total = len(blob) + code_bytes
    log(f"Serialized model brotli: {len(blob)} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size: {total} bytes")
    if total > h.size_limit:
        raise RuntimeError(f"artifact too big: {total} > {h.size_limit}")
    return len(blob), code_bytes


def deserialize(h, device):
    with open(h.quantized_model_path, "rb") as f:
        payload = unpack(brotli.decompress(f.read()))
    model = build_model(h, device)
    template = model.state_dict()
    state = dequantize_state_dict(payload["tensors"], payload["meta"], template)
    model.load_state_dict(state, strict=True)
    model.looping_active = h.num_loops > 0
    model.eval()
    return model


# ---------------------------------------------------------------- evaluation


def all_sum(h, *values):
    t = torch.stack([v.to(torch.float64) for v in values])
    if h.distributed:
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return t.tolist()


def loss_and_bpb(loss_sum, tokens, nbytes):
    loss = loss_sum / tokens
    return loss, loss_sum / math.log(2.0) / nbytes


@torch.no_grad()
def eval_val(h, device, val_data, model):
    """Quick non-overlapping evaluation; every target once, the odd tail on the last rank."""
    T = h.eval_seq_len
    n_seqs, tail = divmod(val_data.num_targets, T)
    lo, hi = n_seqs * h.rank // h.world_size, n_seqs * (h.rank + 1) // h.world_size
    step = max(1, h.val_batch_tokens // (h.world_size * T))
    spans = [(s * T, min(s + step, hi) * T, T) for s in range(lo, hi, step)]
    if tail and h.rank == h.world_size - 1:
        spans.append((n_seqs * T, n_seqs * T + tail, tail))
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    tok_sum, byte_sum = torch.zeros_like(loss_sum), torch.zeros_like(loss_sum)
    was_training = model.training
    model.eval()
    for a, b, width in spans:
        chunk = val_data.tokens[a : b + 1].to(device=device, dtype=torch.int64)
        x, y = chunk[:-1].view(-1, width), chunk[1:].view(-1, width)
        loss_sum += model(x, y).to(torch.float64) * y.numel()
        tok_sum += y.numel()
        byte_sum += val_data.byte_count(x.reshape(-1), y.reshape(-1)).sum()
    model.train(was_training)
    return loss_and_bpb(*all_sum(h, loss_sum, tok_sum, byte_sum))


def window_plan(h, total):
    """(start, length, first scored offset) of every window; each target belongs to exactly one window."""
    T, stride = h.eval_seq_len, h.eval_stride
    context = T - stride
    plan = []
    for ws in range(0, total, stride):
        if ws > 0 and ws + context >= total:
            break
        wlen = min(ws + T, total) - ws
        plan.append((ws, wlen, 0 if ws == 0 else context))
    return plan


def load_windows(h, device, val_data, batch):
    T = h.eval_seq_len
    x = torch.zeros(h.eval_batch_seqs, T, dtype=torch.int64)
    y = torch.zeros(h.eval_batch_seqs, T, dtype=torch.int64)
    for i, (ws, wlen, _s) in enumerate(batch):
        chunk = val_data.tokens[ws : ws + wlen + 1].to(torch.int64)
        x[i, :wlen], y[i, :wlen] = chunk[:-1], chunk[1:]
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def scored_rows(batch, *planes):
    """The scored positions of a batch of windows, one after the other."""
    return [torch.cat([p[i, s:wlen] for i, (_ws, wlen, s) in enumerate(batch)]) for p in planes]


@torch.no_grad()
def eval_val_sliding(h, device, val_data, compiled_logits):
    plan = window_plan(h, val_data.num_targets)
    mine = plan[len(plan) * h.rank // h.world_size : len(plan) * (h.rank + 1) // h.world_size]
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    tok_sum, byte_sum = torch.zeros_like(loss_sum), torch.zeros_like(loss_sum)
    for b in range(0, len(mine), h.eval_batch_seqs):
        batch = mine[b : b + h.eval_batch_seqs]
        x, y = load_windows(h, device, val_data, batch)
        rows, prev, tgt = scored_rows(batch, compiled_logits(x), x, y)
        logp = F.log_softmax(rows.float() / h.eval_temperature, dim=-1)
        nll = -logp.gather(-1, tgt.unsqueeze(-1)).squeeze(-1)
        loss_sum += nll.to(torch.float64).sum()
        tok_sum += tgt.numel()
        byte_sum += val_data.byte_count(prev, tgt).sum()
    return loss_and_bpb(*all_sum(h, loss_sum, tok_sum, byte_sum))


class BigramCache:
    """Counts of (previous token, token) over the scored part of the stream, as a full V x V table."""

    def __init__(self, h, device):
        self.h = h
        self.counts = torch.zeros(h.vocab_size, h.vocab_size, dtype=torch.float32, device=device)
        self.unigram = torch.ones(h.vocab_size, dtype=torch.float32, device=device)

    def distribution(self, prev):
        """For each row a distribution over the whole vocabulary, and its weight in the mixture (a function of the context)."""
        row = self.counts[prev]
        base = self.unigram / self.unigram.sum()
        n = row.sum(dim=-1, keepdim=True)
        p = (row + self.h.cache_alpha * base) / (n + self.h.cache_alpha)
        lam = self.h.cache_lambda * n / (n + self.h.cache_halfcount)
        return p, lam

    def update(self, tokens):
        prev, nxt = tokens[:-1], tokens[1:]
        ones = torch.ones(nxt.numel(), dtype=torch.float32, device=nxt.device)
        self.counts.index_put_((prev, nxt), ones, accumulate=True)
        self.unigram.index_add_(0, nxt, ones)


class HintTable:
    """For hashed contexts of a few orders, the continuation that leads the vote so far. Never looks past the context."""

    MULT = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, h):
        self.h = h
        self.orders = sorted((int(s) for s in h.hint_orders.split(",") if s.strip()), reverse=True)
        size = 1 << h.hint_bits
        self.tok = {k: np.full(size, -1, dtype=np.int64) for k in self.orders}
        self.cnt = {k: np.zeros(size, dtype=np.float32) for k in self.orders}

    def _keys(self, tokens, lo, hi, k):
        """Bucket of the k tokens that end at i, for i in [lo, hi), and whether they lie inside one document."""
        idx = np.arange(lo, hi)
        key = np.zeros(hi - lo, dtype=np.uint64)
        ok = idx >= k - 1
        for j in range(k):
            t = tokens[np.maximum(idx - j, 0)]
            if j < k - 1:
                ok &= t != self.h.bos_id
            key = (key ^ (t.astype(np.uint64) + np.uint64(1))) * self.MULT
            key ^= key >> np.uint64(29)
        return (key >> np.uint64(64 - self.h.hint_bits)).astype(np.int64), ok

    def lookup(self, tokens, lo, hi):
        hint = np.full(hi - lo, -1, dtype=np.int64)
        beta = np.zeros(hi - lo, dtype=np.float32)
        for k in self.orders:
            keys, ok = self._keys(tokens, lo, hi, k)
            c = self.cnt[k][keys]
            use = ok & (hint < 0) & (c >= self.h.hint_min_count)
            hint[use] = self.tok[k][keys[use]]
            beta[use] = self.h.hint_beta * c[use] / (c[use] + 2.0)
        return hint, beta

    def update(self, tokens, lo, hi):
        nxt = tokens[lo + 1 : hi + 1]
        V = self.h.vocab_size
        for k in self.orders:
            keys, ok = self._keys(tokens, lo, hi, k)
            pair, cnt = np.unique(keys[ok] * V + nxt[ok], return_counts=True)
            if not pair.size:
                continue
            bucket, tok = pair // V, pair % V
            order = np.lexsort((cnt, bucket))
            bucket, tok, cnt = bucket[order], tok[order], cnt[order]
            last = np.append(bucket[1:] != bucket[:-1], True)
            b, t, c = bucket[last], tok[last], cnt[last].astype(np.float32)
            same = self.tok[k][b] == t
            vote = np.where(same, self.cnt[k][b] + c, self.cnt[k][b] - c)
            self.tok[k][b] = np.where(same | (vote >= 0), self.tok[k][b], t)
            self.cnt[k][b] = np.abs(vote)


def next_token_logprobs(h, rows, prev, cache, hint, beta):
    """log p over the vocabulary: the network, mixed with the bigram cache, tilted towards the hint, normalised again."""
    logp = F.log_softmax(rows.float() / h.eval_temperature, dim=-1)
    if cache is not None:
        p_cache, lam = cache.distribution(prev)
        logp = torch.log((1.0 - lam) * logp.exp() + lam * p_cache)
    if hint is not None:
        b = torch.where(hint >= 0, beta, torch.zeros_like(beta))
        tilted = logp.scatter_add(1, hint.clamp_min(0).unsqueeze(1), b.unsqueeze(1))
        logp = tilted - torch.logsumexp(tilted, dim=-1, keepdim=True)
    return logp


def ttt_parameters(h, model):
    frozen = [f"blocks.{i}." for i in range(min(h.ttt_freeze_blocks, h.num_layers))]
    params = []
    for name, p in model.named_parameters():
        p.requires_grad_(not any(name.startswith(f) for f in frozen))
        if p.requires_grad:
            params.append(p)
    return params


def ttt_train_chunk(h, device, val_data, model, train_fn, optimizer, params, start, end):
    """SGD on tokens [start, end] of the stream; all ranks take the same number of steps and average their gradients."""
    T = h.eval_seq_len
    per_rank = (end - start) // T // h.world_size
    first = h.rank * per_rank
    model.train()
    for _epoch in range(h.ttt_epochs):
        for b in range(0, per_rank, h.ttt_batch_seqs):
            n = min(h.ttt_batch_seqs, per_rank - b)
            a = start + (first + b) * T
            chunk = val_data.tokens[a : a + n * T + 1].to(device=device, dtype=torch.int64)
            x, y = chunk[:-1].view(n, T), chunk[1:].view(n, T)
            optimizer.zero_grad(set_to_none=True)
            loss = train_fn(x, y)
            loss.backward()
            if h.distributed:
                for p in params:
                    if p.grad is not None:
                        dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            optimizer.step()
    model.eval()


def eval_val_ttt(h, device, val_data, model, compiled_logits, train_fn):
    """Chunk by chunk: score with the state built from the chunks before, then let the chunk into the state."""
    total = val_data.num_targets
    tokens_np = val_data.tokens.to(torch.int64).numpy()
    num_chunks = (total + h.ttt_chunk_tokens - 1) // h.ttt_chunk_tokens
    chunks: list[list[tuple[int, int, int]]] = [[] for _ in range(num_chunks)]
    for w in window_plan(h, total):
        chunks[(w[0] + w[2]) // h.ttt_chunk_tokens].append(w)
    params = ttt_parameters(h, model)
    optimizer = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    cache = BigramCache(h, device) if h.cache_enabled else None
    hints = HintTable(h) if h.hint_enabled else None
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    tok_sum, byte_sum = torch.zeros_like(loss_sum), torch.zeros_like(loss_sum)
    log(f"ttt:chunks={num_chunks} chunk_tokens={h.ttt_chunk_tokens} lr={h.ttt_lr} epochs={h.ttt_epochs} params={sum(p.numel() for p in params)}")
    t0 = time.perf_counter()
    model.eval()
    for ci, windows in enumerate(chunks):
        start, end = ci * h.ttt_chunk_tokens, min((ci + 1) * h.ttt_chunk_tokens, total)
        if windows:
            lo, hi = windows[0][0] + windows[0][2], windows[-1][0] + windows[-1][1]
            if hints is not None:
                hint_np, beta_np = hints.lookup(tokens_np, lo, hi)
                hint_all, beta_all = torch.from_numpy(hint_np).to(device), torch.from_numpy(beta_np).to(device)
            mine = windows[len(windows) * h.rank // h.world_size : len(windows) * (h.rank + 1) // h.world_size]
            with torch.no_grad():
                for b in range(0, len(mine), h.eval_batch_seqs):
                    batch = mine[b : b + h.eval_batch_seqs]
                    x, y = load_windows(h, device, val_data, batch)
                    rows, prev, tgt = scored_rows(batch, compiled_logits(x), x, y)
                    hint = beta = None
                    if hints is not None:
                        at = torch.cat([torch.arange(ws + s - lo, ws + wlen - lo) for ws, wlen, s in batch]).to(device)
                        hint, beta = hint_all[at], beta_all[at]
                    logp = next_token_logprobs(h, rows, prev, cache, hint, beta)
                    nll = -logp.gather(-1, tgt.unsqueeze(-1)).squeeze(-1)
                    loss_sum += nll.to(torch.float64).sum()
                    tok_sum += tgt.numel()
                    byte_sum += val_data.byte_count(prev, tgt).sum()
        if ci == num_chunks - 1:
            break
        if cache is not None:
            cache.update(val_data.tokens[start : end + 1].to(device=device, dtype=torch.int64))
        if hints is not None:
            hints.update(tokens_np, start, end)
        if h.ttt_epochs > 0:
            lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(1, num_chunks - 1)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            ttt_train_chunk(h, device, val_data, model, train_fn, optimizer, params, start, end)
        if ci % 100 == 0:
            running = loss_sum.item() / math.log(2.0) / max(byte_sum.item(), 1.0)
            log(f"  ttt_chunk [{ci + 1}/{num_chunks}] rank0_bpb:{running:.6f} time:{time.perf_counter() - t0:.1f}s")
    loss_all, tok_all, byte_all = all_sum(h, loss_sum, tok_sum, byte_sum)
    log(f"ttt:scored_tokens={int(tok_all)} expected={total} bytes={int(byte_all)}")
    return loss_and_bpb(loss_all, tok_all, byte_all)


def timed_eval(label, fn, *args):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{ms:.0f}ms")
    return val_loss, val_bpb


# ---------------------------------------------------------------- training


def lr_scale_at(h, frac):
    if h.warmdown_frac <= 0:
        return 1.0
    if frac >= 1.0 - h.warmdown_frac:
        return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
    return 1.0


def muon_momentum_at(h, step):
    f = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
    return (1.0 - f) * h.muon_momentum_warmup_start + f * h.muon_momentum


def optimizer_step(h, base_model, model, optimizers, next_batch, lr_scale, momentum):
    train_loss = torch.zeros((), device=next(base_model.parameters()).device)
    for micro in range(h.grad_accum_steps):
        if h.distributed:
            model.require_backward_grad_sync = micro == h.grad_accum_steps - 1
        x, y = next_batch()
        loss = model(x, y)
        train_loss += loss.detach()
        (loss / h.grad_accum_steps).backward()
    if h.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
    optimizers.step(lr_scale, momentum)
    return train_loss / h.grad_accum_steps


def warm_up(h, base_model, model, device):
    """Compiles both depths on training batches, then puts the initial weights back."""
    if h.warmup_steps <= 0:
        return
    initial = {n: t.detach().clone() for n, t in base_model.state_dict().items()}
    optimizers = Optimizers(h, base_model)
    loader = ShuffledSequenceLoader(h, device, seed_offset=500)
    next_batch = lambda: loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)  # noqa: E731
    for looping in [False, True] if h.num_loops > 0 else [False]:
        base_model.looping_active = looping
        for step in range(h.warmup_steps):
            optimizer_step(h, base_model, model, optimizers, next_batch, 1.0, h.muon_momentum)
            if step == 0 or step + 1 == h.warmup_steps:
                log(f"warmup_step:{step + 1}/{h.warmup_steps} looping:{int(looping)}")
    base_model.looping_active = False
    base_model.load_state_dict(initial, strict=True)
    optimizers.zero_grad()
    del optimizers, initial
    torch.cuda.empty_cache()


def train_model(h, device, val_data, clock):
    base_model = build_model(h, device)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[h.local_rank], broadcast_buffers=False) if h.distributed else compiled
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log(f"plans flat:{base_model.plans[False]} looped:{base_model.plans[True]}")
    warm_up(h, base_model, model, device)
    optimizers = Optimizers(h, base_model)
    ema = EMA(base_model, h.ema_decay)
    batch = max(1, h.train_batch_tokens // (h.world_size * h.grad_accum_steps * h.train_seq_len))
    loader = PrefetchLoader(ShuffledSequenceLoader(h, device), batch, h.prefetch_batches)
    cap = h.max_wallclock_seconds - h.gptq_reserve_seconds
    step, stop_at = 0, None
    train_loss = torch.zeros((), device=device)
    model.train()
    clock.start()
    while True:
        last = step == h.iterations or (stop_at is not None and step >= stop_at)
        if last or (h.val_loss_every > 0 and step % h.val_loss_every == 0):
            clock.pause()
            val_loss, val_bpb = eval_val(h, device, val_data, compiled)
            t = clock.total
            log(f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{t:.1f}s step_avg:{1000 * t / max(step, 1):.2f}ms")
            clock.start()
        if last:
            break
        frac = max(step / max(h.iterations, 1), clock.seconds() / max(cap, 1e-9))
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"looping on at step:{step} frac:{frac:.3f}")
        train_loss = optimizer_step(
            h, base_model, model, optimizers, loader.next_batch, lr_scale_at(h, frac), muon_momentum_at(h, step)
        )
        ema.update(base_model)
        step += 1
        elapsed = clock.seconds()
        if step <= 5 or step % h.train_log_every == 0:
            tok_s = step * h.train_batch_tokens / max(elapsed, 1e-9)
            log(f"step:{step}/{h.iterations} train_loss:{train_loss.item():.4f} train_time:{elapsed:.1f}s tok/s:{tok_s:.0f}")
        if stop_at is None:
            over = torch.tensor(int(elapsed >= cap), device=device)
            if h.distributed:
                dist.all_reduce(over, op=dist.ReduceOp.MAX)
            if over.item():
                stop_at = step
                log(f"stopping_early: wallclock_cap train_time:{elapsed:.1f}s step:{step}/{h.iterations}")
    loader.close()
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    log("ema: applying EMA weights")
    ema.copy_to(base_model)
    base_model.looping_active = h.num_loops > 0
    return base_model, compiled


def compress_model(h, device, base_model, clock, code):
    """Calibration and GPTQ run on the training clock, out of the reserve; only packing comes after it."""
    loader = ShuffledSequenceLoader(h, device, seed_offset=900)
    t0 = clock.seconds()
    hessians, batches = collect_hessians(h, base_model, loader, device, clock)
    t1 = clock.seconds()
    log(f"gptq:calibrated on {batches} train batches per rank in {t1 - t0:.1f}s")
    if h.is_main_process:
        tensors, meta, report = quantize_state_dict(h, base_model.state_dict(), hessians)
    clock.pause()
    if h.is_main_process:
        log(f"gptq:quantized {report} in {clock.total - t1:.1f}s")
        log(f"train+calibration+gptq: {clock.total:.1f}s of {h.max_wallclock_seconds:.0f}s")
        serialize(h, tensors, meta, code)
    if h.distributed:
        dist.barrier()


def evaluate_artifact(h, device, val_data):
    """Everything that is reported comes from here: the artifact is read back, nothing else is carried over."""
    model = deserialize(h, device)
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    compiled_logits = torch.compile(model.forward_logits, dynamic=False, fullgraph=True)
    results = {}
    results["quantized"] = timed_eval("quantized", eval_val, h, device, val_data, compiled)
    if h.sliding_window_enabled:
        results["sliding"] = timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val_data, compiled_logits)
    if h.ttt_enabled:
        results["ttt"] = timed_eval("quantized_ttt", eval_val_ttt, h, device, val_data, model, compiled_logits, compiled)
    return results


def train_and_eval(h, device, code):
    seed_everything(h.seed)
    val_data = ValidationData(h, device)
    log(f"val_tokens:{val_data.num_targets} train_shards:{len(glob.glob(h.train_files))}")
    clock = Stopwatch()
    if not h.eval_only:
        base_model, compiled = train_model(h, device, val_data, clock)
        compress_model(h, device, base_model, clock, code)
    watch = Stopwatch().start()
    if not h.eval_only:
        timed_eval("pre-quantization post-ema", eval_val, h, device, val_data, compiled)
        del base_model, compiled
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    results = evaluate_artifact(h, device, val_data)
    log(f"evaluation took {watch.pause():.1f}s of {h.eval_budget_seconds:.0f}s")
    name = "ttt" if h.ttt_enabled else "sliding" if h.sliding_window_enabled else "quantized"
    log(f"final_{name}_exact val_loss:{results[name][0]:.8f} val_bpb:{results[name][1]:.8f}")


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def describe(h, code):
    log(f"Running Python {platform.python_version()} PyTorch {torch.__version__} world_size:{h.world_size} grad_accum_steps:{h.grad_accum_steps}")
    for key in sorted(k for k in dir(h) if not k.startswith("_")):
        log(f"  {key}: {getattr(h, key)}", console=False)
    log(code, console=False)


def main():
    h = Hyperparameters()
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if h.world_size <= 0 or 8 % h.world_size:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    set_log_file(h)
    code = Path(__file__).read_text(encoding="utf-8")
    describe(h, code)
    train_and_eval(h, device, code)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
