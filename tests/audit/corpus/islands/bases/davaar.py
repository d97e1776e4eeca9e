"""SP8192 + 3-layer depth recurrence + parallel residuals + QK gain 5.0 + MuonEq-R + GPTQ/SDClip + causal hint tilt.

torchrun --standalone --nproc_per_node=8 train_gpt.py

One file: trains for ten minutes, quantises inside the same ten minutes' data budget, writes the artifact, reads it back and
scores the whole validation split with score-first test-time training. The n-gram hints are learned from scored chunks only.
"""

import copy
import glob
import io
import json
import math
import os
import random
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


# ----------------------------------------
# Hyperparameters
# ----------------------------------------


def env(name, default):
    """Reads a setting from the environment in the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return bool(int(raw))
    return type(default)(raw)


class Hyperparameters:
    # Data
    data_dir = env("DATA_DIR", "./data/")
    vocab_size = env("VOCAB_SIZE", 8192)
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    run_id = env("RUN_ID", str(uuid.uuid4()))
    seed = env("SEED", 1337)
    bos_id = 1

    # Training length
    iterations = env("ITERATIONS", 20000)
    max_wallclock_seconds = env("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env("GPTQ_RESERVE_SECONDS", 14.0)
    warmup_steps = env("WARMUP_STEPS", 20)
    warmdown_frac = env("WARMDOWN_FRAC", 0.72)
    min_lr = env("MIN_LR", 0.0)
    train_batch_tokens = env("TRAIN_BATCH_TOKENS", 2048 * 48 * 8)
    train_seq_len = env("TRAIN_SEQ_LEN", 2048)
    train_log_every = env("TRAIN_LOG_EVERY", 500)

    # Validation and evaluation
    eval_seq_len = env("EVAL_SEQ_LEN", 2048)
    eval_stride = env("EVAL_STRIDE", 64)
    val_batch_tokens = env("VAL_BATCH_TOKENS", 2048 * 32 * 8)
    val_loss_every = env("VAL_LOSS_EVERY", 4000)
    sliding_window_enabled = env("SLIDING_WINDOW_ENABLED", False)
    eval_batch_windows = env("EVAL_BATCH_WINDOWS", 32)
    max_eval_seconds = env("MAX_EVAL_SECONDS", 470.0)

    # Test-time training
    ttt_enabled = env("TTT_ENABLED", True)
    ttt_lr = env("TTT_LR", 0.005)
    ttt_epochs = env("TTT_EPOCHS", 3)
    ttt_momentum = env("TTT_MOMENTUM", 0.9)
    ttt_chunk_tokens = env("TTT_CHUNK_TOKENS", 32768)
    ttt_batch_seqs = env("TTT_BATCH_SEQS", 2)
    ttt_grad_clip = env("TTT_GRAD_CLIP", 1.0)

    # Hint tilt
    hint_enabled = env("HINT_ENABLED", True)
    hint_beta = env("HINT_BETA", 1.6)
    hint_min_conf = env("HINT_MIN_CONF", 2)
    hint_bits = env("HINT_BITS", 22)
    hint_orders = (6, 4, 3)

    # Model
    num_layers = env("NUM_LAYERS", 11)
    model_dim = env("MODEL_DIM", 512)
    num_heads = env("NUM_HEADS", 8)
    num_kv_heads = env("NUM_KV_HEADS", 4)
    mlp_mult = env("MLP_MULT", 4.0)
    rope_base = env("ROPE_BASE", 10000.0)
    rope_dims = env("ROPE_DIMS", 16)
    xsa_last_n = env("XSA_LAST_N", 11)
    qk_gain_init = env("QK_GAIN_INIT", 5.0)
    logit_softcap = env("LOGIT_SOFTCAP", 30.0)
    tied_embed_init_std = env("TIED_EMBED_INIT_STD", 0.005)
    parallel_start_layer = env("PARALLEL_START_LAYER", 7)
    smear_gate = env("SMEAR_GATE", True)
    num_loops = env("NUM_LOOPS", 2)
    loop_start = env("LOOP_START", 3)
    loop_end = env("LOOP_END", 5)
    enable_looping_at = env("ENABLE_LOOPING_AT", 0.35)

    # Optimizer
    matrix_lr = env("MATRIX_LR", 0.022)
    scalar_lr = env("SCALAR_LR", 0.02)
    tied_embed_lr = env("TIED_EMBED_LR", 0.03)
    muon_momentum = env("MUON_MOMENTUM", 0.99)
    muon_momentum_warmup_start = env("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_warmup_steps = env("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_backend_steps = env("MUON_BACKEND_STEPS", 5)
    muon_wd = env("MUON_WD", 0.095)
    embed_wd = env("EMBED_WD", 0.085)
    adam_wd = env("ADAM_WD", 0.02)
    beta1 = env("BETA1", 0.9)
    beta2 = env("BETA2", 0.95)
    adam_eps = env("ADAM_EPS", 1e-8)
    grad_clip_norm = env("GRAD_CLIP_NORM", 0.3)
    ema_decay = env("EMA_DECAY", 0.9965)

    # Quantisation and packing
    matrix_bits = env("MATRIX_BITS", 6)
    embed_bits = env("EMBED_BITS", 8)
    matrix_clip_sigmas = env("MATRIX_CLIP_SIGMAS", 12.85)
    embed_clip_sigmas = env("EMBED_CLIP_SIGMAS", 20.0)
    gptq_calibration_batches = env("GPTQ_CALIBRATION_BATCHES", 64)
    gptq_damp = env("GPTQ_DAMP", 0.01)
    gptq_block = env("GPTQ_BLOCK", 128)
    brotli_quality = env("BROTLI_QUALITY", 11)
    size_limit = 16_000_000
    model_path = env("MODEL_PATH", "final_model.int6.ptz")

    # Distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main = rank == 0
    grad_accum_steps = max(8 // world_size, 1)

    logfile = f"logs/{run_id}.txt"


_logfile = None


def set_logfile(h):
    global _logfile
    if h.is_main:
        os.makedirs("logs", exist_ok=True)
        _logfile = h.logfile


def log(msg, console=True):
    """Writes a line to the log and the console; only the first rank says anything."""
    if _logfile is None:
        return
    if console:
        print(msg, flush=True)
    with open(_logfile, "a", encoding="utf-8") as f:
        print(msg, file=f)


# ----------------------------------------
# Data
# ----------------------------------------

SHARD_HEADER_INTS = 256
SHARD_MAGIC = 20240520
SHARD_VERSION = 1


def read_shard_length(path):
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"unexpected shard header in {path}")
    return int(header[2])


def load_data_shard(path):
    """All the tokens of a shard, as uint16."""
    count = read_shard_length(path)
    header_bytes = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=header_bytes)
    if tokens.size != count:
        raise ValueError(f"short read in {path}: {tokens.size} of {count}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def shard_files(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return files


def build_sentencepiece_luts(sp, vocab_size, device):
    """Per token: the bytes of its text, whether it opens with a space, and whether it is a control token."""
    sp_vocab = int(sp.vocab_size())
    size = max(sp_vocab, vocab_size)
    base_bytes = np.zeros((size,), dtype=np.int16)
    leading_space = np.zeros((size,), dtype=np.bool_)
    boundary = np.ones((size,), dtype=np.bool_)
    for token_id in range(sp_vocab):
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
        base_bytes[token_id] = len(piece.replace("\u2581", " ").encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(leading_space, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


class ValidationData:
    """The validation split: its tokens in order, and the tables that turn tokens into bytes."""

    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"tokenizer has {self.sp.vocab_size()} pieces, VOCAB_SIZE is {h.vocab_size}")
        self.tokens = self.load(h.val_files)
        luts = build_sentencepiece_luts(self.sp, h.vocab_size, device)
        self.base_bytes_lut, self.leading_space_lut, self.boundary_lut = luts

    def load(self, pattern):
        parts = [load_data_shard(f) for f in shard_files(pattern)]
        return torch.cat([p.to(torch.int32) for p in parts]).contiguous()

    @property
    def num_targets(self):
        return self.tokens.numel() - 1

    def count_bytes(self, prev, tgt):
        """The bytes of each target's text; a leading space counts unless a control token stands before it."""
        nbytes = self.base_bytes_lut[tgt].to(torch.int16)
        nbytes += (self.leading_space_lut[tgt] & ~self.boundary_lut[prev]).to(torch.int16)
        return nbytes.to(torch.float64)


class ShuffledSequenceLoader:
    """Training sequences: each rank owns every n-th shard and draws its sequences in a random order."""

    def __init__(self, h, device, pattern=None):
        self.h = h
        self.device = device
        self.seq_len = h.train_seq_len
        self.rng = np.random.Generator(np.random.PCG64(h.seed * 1000 + h.rank))
        files = shard_files(pattern or h.train_files)
        self.files = files[h.rank :: h.world_size] or files
        self.num_tokens = [read_shard_length(f) for f in self.files]
        self.maps = [None] * len(self.files)
        self.starts = [self._deal(i) for i in range(len(self.files))]

    def _deal(self, i):
        phase = int(self.rng.integers(self.seq_len))
        count = max((self.num_tokens[i] - 1 - phase) // self.seq_len, 0)
        return list(phase + self.seq_len * self.rng.permutation(count))

    def _map(self, i):
        if self.maps[i] is None:
            offset = SHARD_HEADER_INTS * np.dtype("<i4").itemsize
            self.maps[i] = np.memmap(self.files[i], dtype="<u2", mode="r", offset=offset, shape=(self.num_tokens[i],))
        return self.maps[i]

    def next_batch(self, global_tokens, grad_accum_steps):
        """Inputs and targets of this rank for one micro-step."""
        per_rank = global_tokens // (self.h.world_size * grad_accum_steps)
        count = max(per_rank // self.seq_len, 1)
        x = torch.empty((count, self.seq_len), dtype=torch.int64)
        y = torch.empty((count, self.seq_len), dtype=torch.int64)
        for row in range(count):
            left = np.array([len(s) for s in self.starts], dtype=np.float64)
            if left.sum() == 0:
                self.starts = [self._deal(i) for i in range(len(self.files))]
                left = np.array([len(s) for s in self.starts], dtype=np.float64)
            i = int(self.rng.choice(len(self.files), p=left / left.sum()))
            start = int(self.starts[i].pop())
            window = torch.from_numpy(np.array(self._map(i)[start : start + self.seq_len + 1], dtype=np.int64))
            x[row] = window[:-1]
            y[row] = window[1:]
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# ----------------------------------------
# Model
# ----------------------------------------

CONTROL_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "skip_gates",
    "lane_mix",
    "smear",
)


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    """Keeps fp32 weights and multiplies in the type of its input."""

    def forward(self, x):
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, rope_dims, base, train_seq_len):
        super().__init__()
        self.rope_dims = rope_dims
        self.base = base
        self.train_seq_len = train_seq_len
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._cached = (0, None, None)

    def forward(self, seq_len, device, dtype):
        length, cos, sin = self._cached
        if cos is None or length != seq_len or cos.device != device:
            if seq_len > self.train_seq_len:
                scale = seq_len / self.train_seq_len
                base = self.base * scale ** (self.rope_dims / (self.rope_dims - 2))
                steps = torch.arange(0, self.rope_dims, 2, dtype=torch.float32, device=device)
                inv_freq = 1.0 / (base ** (steps / self.rope_dims))
            else:
                inv_freq = self.inv_freq.to(device)
            freqs = torch.outer(torch.arange(seq_len, device=device, dtype=inv_freq.dtype), inv_freq)
            cos, sin = freqs.cos()[None, None], freqs.sin()[None, None]
            self._cached = (seq_len, cos, sin)
        return cos.to(dtype), sin.to(dtype)


def apply_rotary(x, cos, sin, rope_dims):
    turned, kept = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    a, b = turned[..., :half], turned[..., half:]
    turned = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
    return torch.cat((turned, kept), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h):
        super().__init__()
        if h.model_dim % h.num_heads or h.num_heads % h.num_kv_heads:
            raise ValueError("model_dim, num_heads and num_kv_heads do not divide")
        self.num_heads = h.num_heads
        self.num_kv_heads = h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rope_dims = h.rope_dims
        self.rotary = Rotary(h.rope_dims, h.rope_base, h.train_seq_len)
        self.use_xsa = False

    def _exclude_self(self, y, v):
        """Takes the part along each position's own value out of its output, per group of heads."""
        b, heads, t, d = y.shape
        grouped = y.reshape(b, self.num_kv_heads, heads // self.num_kv_heads, t, d)
        vn = F.normalize(v, dim=-1).unsqueeze(2)
        along = (grouped * vn).sum(dim=-1, keepdim=True) * vn
        return (grouped - along).reshape(b, heads, t, d)

    def forward(self, x):
        b, t, dim = x.shape
        q = self.c_q(x).reshape(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = apply_rotary(q, cos, sin, self.rope_dims)
        k = apply_rotary(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads)
        if self.use_xsa:
            y = self._exclude_self(y, v)
        return self.proj(y.transpose(1, 2).reshape(b, t, dim))


class MLP(nn.Module):
    def __init__(self, dim, mult):
        super().__init__()
        hidden = int(mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(h)
        self.mlp = MLP(h.model_dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        ones, zeros = torch.ones(h.model_dim), torch.zeros(h.model_dim)
        self.resid_mix = nn.Parameter(torch.stack((ones, zeros)).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1)
        self.parallel = layer_idx >= h.parallel_start_layer

    def forward(self, x, x0):
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor)
        attn_out = self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
            return x_in + attn_out + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out
        x_out = x_in + attn_out
        mlp_out = self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)
        return x_out + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class SmearGate(nn.Module):
    """Adds a little of the token before; a document's first token takes nothing from the one before it."""

    def __init__(self, dim, bos_id):
        super().__init__()
        self.bos_id = bos_id
        self.smear = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x, input_ids):
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        inside = (input_ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + torch.tanh(self.smear).to(x.dtype)[None, None, :] * before * inside


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.logit_softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.model_dim, h.bos_id) if h.smear_gate else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
            self.blocks[i].attn.use_xsa = True
        self.looping_active = False
        once = list(range(h.num_layers))
        self.plain_encoder, self.plain_decoder = self._halves(once)
        repeated = list(range(h.loop_start, h.loop_end + 1)) * (h.num_loops + 1)
        looped = once[: h.loop_start] + repeated + once[h.loop_end + 1 :]
        self.loop_encoder, self.loop_decoder = self._halves(looped)
        self.num_skips = min(len(self.loop_encoder), len(self.loop_decoder))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, h.model_dim, dtype=torch.float32))
        self.skip_gates = nn.Parameter(torch.zeros(self.num_skips, h.model_dim, dtype=torch.float32))
        self._init_weights(h)

    @staticmethod
    def _halves(order):
        middle = len(order) // 2
        return order[:middle], order[middle:]

    def _init_weights(self, h):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, input_ids):
        """The last hidden states, normalised, of every position."""
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        if self.smear is not None:
            x = self.smear(x, input_ids)
        x0 = x
        skips = []
        encoder = self.loop_encoder if self.looping_active else self.plain_encoder
        decoder = self.loop_decoder if self.looping_active else self.plain_decoder
        for i in encoder:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for n, i in enumerate(decoder):
            if n < self.num_skips and skips:
                skip = self.skip_weights[n].to(dtype=x.dtype)[None, None, :] * skips.pop()
                gate = torch.sigmoid(self.skip_gates[n].to(dtype=x.dtype))[None, None, :]
                x = torch.lerp(skip, x, gate)
            x = self.blocks[i](x, x0)
        return self.final_norm(x)

    def head(self, hid):
        logits = F.linear(hid, self.tok_emb.weight.to(hid.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids):
        return self.head(self.hidden(input_ids))

    def forward(self, input_ids, target_ids):
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


def restore_fp32_params(model):
    """Weights of the linear layers and all small parameters stay in fp32 when the rest is bf16."""
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        if (param.ndim < 2 or any(p in name for p in CONTROL_PATTERNS)) and param.dtype != torch.float32:
            param.data = param.data.float()


def build_model(h, device):
    model = GPT(h).to(device).bfloat16()
    restore_fp32_params(model)
    return model


# ----------------------------------------
# Optimisers
# ----------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(G, steps=5, eps=1e-7):
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X /= X.norm() + eps
    tall = G.size(0) > G.size(1)
    if tall:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if tall else X


class MuonEqR(torch.optim.Optimizer):
    """Muon whose momentum is brought to rows of equal norm before the orthogonalisation; ranks share the matrices."""

    def __init__(self, params, lr, momentum, backend_steps, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        spread = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if spread else 1
        rank = dist.get_rank() if spread else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    flat[at : at + p.numel()] = self._direction(p, group).reshape(-1)
                at += p.numel()
            if spread:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                if group["weight_decay"] > 0.0:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(dtype=p.dtype), alpha=-group["lr"])
                at += p.numel()
        return loss

    def _direction(self, p, group):
        g = p.grad
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(g)
        buf = state["momentum_buffer"]
        buf.mul_(group["momentum"]).add_(g)
        g = g.add(buf, alpha=group["momentum"])
        g = g / g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).to(g.dtype)
        g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
        return g * max(1, g.size(0) / g.size(1)) ** 0.5


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for the embedding and for everything small."""

    def __init__(self, h, model):
        named = list(model.named_parameters())
        matrices = [p for n, p in named if n.startswith("blocks.") and p.ndim == 2 and not self._control(n)]
        scalars = [p for n, p in named if n != "tok_emb.weight" and (p.ndim < 2 or self._control(n))]
        adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.tok = torch.optim.AdamW(
            [{"params": [model.tok_emb.weight], "lr": h.tied_embed_lr, "base_lr": h.tied_embed_lr}],
            weight_decay=h.embed_wd,
            **adam,
        )
        self.muon = MuonEqR(matrices, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, h.muon_wd)
        for group in self.muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.scalar = torch.optim.AdamW(
            [{"params": scalars, "lr": h.scalar_lr, "base_lr": h.scalar_lr}], weight_decay=h.adam_wd, **adam
        )
        self.all = [self.tok, self.muon, self.scalar]

    @staticmethod
    def _control(name):
        return any(pattern in name for pattern in CONTROL_PATTERNS)

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def step(self, scale, momentum):
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
            opt.step()
        self.zero_grad()

    def state(self):
        return [copy.deepcopy(opt.state_dict()) for opt in self.all]

    def restore(self, states):
        for opt, state in zip(self.all, states, strict=True):
            opt.load_state_dict(state)
        self.zero_grad()


class WeightEMA:
    """A running average of the weights, in fp32."""

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for name, value in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(value.detach().float(), alpha=1.0 - self.decay)

    def apply_to(self, model):
        current = model.state_dict()
        model.load_state_dict({k: v.to(dtype=current[k].dtype) for k, v in self.shadow.items()}, strict=True)


# ----------------------------------------
# Quantisation and packing
# ----------------------------------------


def collect_hessians(model, loader, h, device, deadline):
    """Second moments of the inputs of every matrix, over training batches, until the batches or the time run out."""
    hessians, hooks = {}, []

    def accumulate(name, x):
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if name not in hessians:
            hessians[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=device)
        hessians[name].addmm_(x.T, x)

    def input_hook(name):
        return lambda module, inputs, output: accumulate(name, inputs[0])

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_hook(input_hook(name + ".weight")))
    hooks.append(model.final_norm.register_forward_hook(lambda m, i, output: accumulate("tok_emb.weight", output)))
    model.eval()
    batches = 0
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        while batches < h.gptq_calibration_batches and (batches == 0 or time.perf_counter() < deadline):
            x, _ = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps * 4)
            model.forward_logits(x)
            torch.cuda.synchronize()
            batches += 1
    for hook in hooks:
        hook.remove()
    seen = torch.tensor(float(batches), device=device)
    if dist.is_initialized():
        dist.all_reduce(seen)
        for name in sorted(hessians):
            dist.all_reduce(hessians[name])
    for name in hessians:
        hessians[name] /= seen
    model.train()
    return hessians, int(seen.item())


def gptq_quantize_weight(W, H, clip_sigmas, bits, damp, block_size):
    """GPTQ with a per-row scale that clips at so many standard deviations (SDClip)."""
    qmax = 2 ** (bits - 1) - 1
    W = W.float().clone()
    H = H.float().clone()
    rows, cols = W.shape
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    order = torch.argsort(torch.diag(H), descending=True)
    undo = torch.argsort(order)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(damp * H.diag().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    scale = (clip_sigmas * W.std(dim=1) / qmax).clamp_min(1e-10).to(torch.float16)
    s = scale.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W.device)
    for a in range(0, cols, block_size):
        b = min(a + block_size, cols)
        block = W[:, a:b].clone()
        errors = torch.zeros_like(block)
        Ub = U[a:b, a:b]
        for j in range(b - a):
            w = block[:, j]
            q = torch.clamp(torch.round(w / s), -qmax, qmax)
            Q[:, a + j] = q.to(torch.int8)
            err = (w - q * s) / Ub[j, j]
            errors[:, j] = err
            block[:, j:] -= err.unsqueeze(1) * Ub[j, j:].unsqueeze(0)
        if b < cols:
            W[:, b:] -= errors @ U[a:b, b:]
    return Q[:, undo].contiguous(), scale


def quantize_state_dict(state, hessians, h):
    packed, meta = {}, {}
    for name, tensor in state.items():
        t = tensor.detach()
        if t.ndim == 2 and name in hessians:
            embed = name == "tok_emb.weight"
            bits = h.embed_bits if embed else h.matrix_bits
            sigmas = h.embed_clip_sigmas if embed else h.matrix_clip_sigmas
            q, scale = gptq_quantize_weight(t, hessians[name], sigmas, bits, h.gptq_damp, h.gptq_block)
            packed[name + ".q"] = q.cpu()
            packed[name + ".scale"] = scale.cpu()
            meta[name] = f"gptq int{bits}"
        else:
            packed[name] = t.to(torch.float16).cpu() if t.is_floating_point() else t.cpu()
            meta[name] = "passthrough"
    return packed, meta


def dequantize_state_dict(packed, meta, template):
    out = {}
    for name, kind in meta.items():
        dtype = template[name].dtype
        if kind == "passthrough":
            out[name] = packed[name].to(dtype)
        else:
            q, scale = packed[name + ".q"], packed[name + ".scale"]
            out[name] = (q.float() * scale.float().unsqueeze(1)).to(dtype)
    return out


SHUFFLE_MAGIC = b"BSH2"


def byte_shuffle(data, stride=2):
    """All even bytes before all odd ones: brotli finds more to say about them."""
    src = np.frombuffer(data, dtype=np.uint8)
    return SHUFFLE_MAGIC + bytes([stride]) + b"".join(src[i::stride].tobytes() for i in range(stride))


def byte_unshuffle(data):
    if data[: len(SHUFFLE_MAGIC)] != SHUFFLE_MAGIC:
        raise ValueError("the artifact is not byte-shuffled")
    stride = data[len(SHUFFLE_MAGIC)]
    body = np.frombuffer(data, dtype=np.uint8, offset=len(SHUFFLE_MAGIC) + 1)
    out = np.empty(body.size, dtype=np.uint8)
    at = 0
    for i in range(stride):
        length = out[i::stride].size
        out[i::stride] = body[at : at + length]
        at += length
    return out.tobytes()


def serialize(h, model, hessians):
    """Quantises, packs and writes the artifact; prints what it costs."""
    code_bytes = len(Path(__file__).read_bytes())
    packed, meta = quantize_state_dict(model.state_dict(), hessians, h)
    buffer = io.BytesIO()
    torch.save({"w": packed, "m": meta}, buffer)
    blob = brotli.compress(byte_shuffle(buffer.getvalue()), quality=h.brotli_quality)
    if h.is_main:
        Path(h.model_path).write_bytes(blob)
    model_bytes = len(blob)
    total_bytes = model_bytes + code_bytes
    log(f"Code size: {code_bytes} bytes")
    log(f"Serialized model int{h.matrix_bits}+brotli: {model_bytes} bytes")
    log(f"Total submission size int{h.matrix_bits}+brotli: {total_bytes} bytes")
    if total_bytes > h.size_limit:
        raise RuntimeError(f"the submission has {total_bytes} bytes, {h.size_limit} are allowed")
    if h.distributed:
        dist.barrier()


def deserialize(h, device):
    """The model as it is in the artifact, with its loops on."""
    model = build_model(h, device)
    blob = Path(h.model_path).read_bytes()
    stored = torch.load(io.BytesIO(byte_unshuffle(brotli.decompress(blob))), map_location="cpu")
    weights = dequantize_state_dict(stored["w"], stored["m"], model.state_dict())
    model.load_state_dict(weights, strict=True)
    model.looping_active = h.num_loops > 0
    return model


# ----------------------------------------
# Evaluation
# ----------------------------------------


class Tally:
    """Sums of what was scored: loss in nats, tokens and bytes, each in fp64."""

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nll, nbytes):
        self.sums[0] += nll.to(torch.float64).sum()
        self.sums[1] += float(nll.numel())
        self.sums[2] += nbytes.to(torch.float64).sum()

    def reduce(self):
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums, op=dist.ReduceOp.SUM)
        return self

    def result(self):
        """Mean loss in nats, and bits per byte."""
        loss, tokens, nbytes = self.sums.tolist()
        return loss / tokens, loss / math.log(2.0) / nbytes


def eval_val(h, device, val_data, model):
    """The validation loss over whole sequences, without sliding."""
    seq_len = h.eval_seq_len
    total_seqs = val_data.num_targets // seq_len
    batch_seqs = max(h.val_batch_tokens // (h.world_size * seq_len), 1)
    first = total_seqs * h.rank // h.world_size
    last = total_seqs * (h.rank + 1) // h.world_size
    tally = Tally(device)
    model.eval()
    with torch.no_grad():
        for a in range(first, last, batch_seqs):
            b = min(a + batch_seqs, last)
            local = val_data.tokens[a * seq_len : b * seq_len + 1].to(device=device, dtype=torch.int64)
            x, y = local[:-1].reshape(-1, seq_len), local[1:].reshape(-1, seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y).detach()
            nll = loss.to(torch.float64).expand(y.numel())
            tally.add(nll, val_data.count_bytes(x.reshape(-1), y.reshape(-1)))
    model.train()
    return tally.reduce().result()


def window_starts(h, total):
    """Starts of the windows: after the first, each scores the next `eval_stride` targets and no other."""
    context = h.eval_seq_len - h.eval_stride
    return [ws for ws in range(0, total, h.eval_stride) if ws == 0 or ws + context < total]


def first_scored(h, ws):
    return 0 if ws == 0 else h.eval_seq_len - h.eval_stride


def window_batch(h, device, tokens, starts):
    """Inputs, targets and lengths of a batch of windows, padded at the right."""
    total = tokens.numel() - 1
    x = torch.zeros(len(starts), h.eval_seq_len, dtype=torch.int64)
    y = torch.zeros(len(starts), h.eval_seq_len, dtype=torch.int64)
    lengths = []
    for i, ws in enumerate(starts):
        end = min(ws + h.eval_seq_len, total)
        piece = tokens[ws : end + 1].to(torch.int64)
        x[i, : end - ws] = piece[:-1]
        y[i, : end - ws] = piece[1:]
        lengths.append(end - ws)
    return x.to(device), y.to(device), lengths


def eval_val_sliding(h, device, val_data, model, logits_fn=None):
    """The validation loss with a full context for every token; the weights stay as they are."""
    starts = window_starts(h, val_data.num_targets)
    mine = starts[len(starts) * h.rank // h.world_size : len(starts) * (h.rank + 1) // h.world_size]
    logits_fn = logits_fn or model.forward_logits
    tally = Tally(device)
    model.eval()
    with torch.no_grad():
        for at in range(0, len(mine), h.eval_batch_windows):
            batch = mine[at : at + h.eval_batch_windows]
            x, y, lengths = window_batch(h, device, val_data.tokens, batch)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            for i, ws in enumerate(batch):
                s, e = first_scored(h, ws), lengths[i]
                nll = F.cross_entropy(logits[i, s:e].float(), y[i, s:e], reduction="none")
                tally.add(nll, val_data.count_bytes(x[i, s:e], y[i, s:e]))
    model.train()
    return tally.reduce().result()


class HintTable:
    """Which token mostly followed a context so far. Learns from scored chunks only; speaks before the next one is read."""

    def __init__(self, h, device):
        self.h = h
        self.device = device
        self.vocab = h.vocab_size
        self.orders = h.hint_orders
        self.mask = (1 << h.hint_bits) - 1
        shape = (len(self.orders), 1 << h.hint_bits)
        self.token = torch.zeros(shape, dtype=torch.int64, device=device)
        self.conf = torch.zeros(shape, dtype=torch.int64, device=device)
        self.tag = torch.zeros(shape, dtype=torch.int64, device=device)

    def _locate(self, tokens, start, end, order):
        """Slot, tag and validity of the contexts that end at the positions start..end-1."""
        lead = min(start, order - 1)
        text = tokens[start - lead : end].to(device=self.device, dtype=torch.int64)
        n = end - start
        text = F.pad(text, (order - 1 - lead, 0), value=self.h.bos_id)
        key = torch.zeros(n, dtype=torch.int64, device=self.device)
        inside = torch.ones(n, dtype=torch.bool, device=self.device)
        for back in range(order):
            column = text[order - 1 - back : order - 1 - back + n]
            key = (key ^ (column + 1)) * 0x2545F4914F6CDD1D
            key = key ^ (key >> 31)
            if back < order - 1:
                inside &= column != self.h.bos_id
        return key & self.mask, (key >> 33) & 0x3FFFFFFF, inside

    def lookup(self, tokens, start, end):
        """The hinted token of each position (-1: none) and how often it was confirmed; reads inputs up to the position."""
        hint = torch.full((end - start,), -1, dtype=torch.int64, device=self.device)
        conf = torch.zeros(end - start, dtype=torch.int64, device=self.device)
        for level, order in enumerate(self.orders):
            slot, tag, inside = self._locate(tokens, start, end, order)
            seen = self.conf[level, slot]
            use = (hint < 0) & inside & (self.tag[level, slot] == tag) & (seen >= self.h.hint_min_conf)
            hint = torch.where(use, self.token[level, slot], hint)
            conf = torch.where(use, seen, conf)
        return hint, conf

    def absorb(self, tokens, start, end):
        """Learns what followed the positions start..end-1."""
        followed = tokens[start + 1 : end + 1].to(device=self.device, dtype=torch.int64)
        for level, order in enumerate(self.orders):
            slot, tag, inside = self._locate(tokens, start, end, order)
            pairs, counts = torch.unique(slot[inside] * self.vocab + followed[inside], return_counts=True)
            if pairs.numel() == 0:
                continue
            slots, where = torch.unique(pairs // self.vocab, return_inverse=True)
            best = torch.zeros_like(slots)
            best.scatter_reduce_(0, where, counts * self.vocab + pairs % self.vocab, "amax")
            count, token = best // self.vocab, best % self.vocab
            newest = torch.zeros(self.mask + 1, dtype=torch.int64, device=self.device)
            newest.scatter_reduce_(0, slot[inside], tag[inside], "amax")
            tags = newest[slots]
            held = self.conf[level, slots]
            same = (self.token[level, slots] == token) & (self.tag[level, slots] == tags)
            wins = ~same & (count > held)
            self.conf[level, slots] = torch.where(same, held + count, (held - count).abs())
            self.token[level, slots] = torch.where(wins, token, self.token[level, slots])
            self.tag[level, slots] = torch.where(wins, tags, self.tag[level, slots])


def hint_strength(h, conf):
    """The exponent of the tilt; grows with the confirmations of the hint."""
    return h.hint_beta * torch.log1p(conf.float()).div(math.log(17.0)).clamp(max=1.0)


def tilted_nll(h, logits, tgt, hint, conf):
    """-log p'(tgt) under p'(v) = p(v) * exp(beta * [v == hint]) / Z, with Z = 1 + p(hint) * (exp(beta) - 1)."""
    logp = F.log_softmax(logits.float(), dim=-1)
    plain = -logp.gather(1, tgt.unsqueeze(1)).squeeze(1)
    beta = hint_strength(h, conf)
    p_hint = logp.gather(1, hint.clamp_min(0).unsqueeze(1)).squeeze(1).exp()
    log_z = torch.log1p(p_hint * torch.expm1(beta))
    tilted = plain - beta * (tgt == hint).float() + log_z
    return torch.where(hint >= 0, tilted, plain)


def chunk_windows(h, total):
    """The windows of each chunk, by the first target that they score. No window scores into the next chunk."""
    if h.ttt_chunk_tokens % h.eval_stride or h.eval_seq_len % h.eval_stride:
        raise ValueError("the stride must divide the chunk and the window")
    chunks = [[] for _ in range(math.ceil(total / h.ttt_chunk_tokens))]
    for ws in window_starts(h, total):
        chunks[(ws + first_scored(h, ws)) // h.ttt_chunk_tokens].append(ws)
    return chunks


def score_chunk(h, device, val_data, model, logits_fn, windows, chunk_start, chunk_end, hints, tally):
    """Scores this rank's share of a chunk's windows with the weights and hints of the chunks before."""
    mine = windows[len(windows) * h.rank // h.world_size : len(windows) * (h.rank + 1) // h.world_size]
    if hints is not None:
        hint, conf = hints.lookup(val_data.tokens, chunk_start, chunk_end)
    model.eval()
    with torch.no_grad():
        for at in range(0, len(mine), h.eval_batch_windows):
            batch = mine[at : at + h.eval_batch_windows]
            x, y, lengths = window_batch(h, device, val_data.tokens, batch)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = logits_fn(x)
            for i, ws in enumerate(batch):
                s, e = first_scored(h, ws), lengths[i]
                tgt = y[i, s:e]
                if hints is not None:
                    a, b = ws + s - chunk_start, ws + e - chunk_start
                    nll = tilted_nll(h, logits[i, s:e], tgt, hint[a:b], conf[a:b])
                else:
                    nll = F.cross_entropy(logits[i, s:e].float(), tgt, reduction="none")
                tally.add(nll, val_data.count_bytes(x[i, s:e], tgt))


def train_chunk(h, device, tokens, model, optimizer, params, chunk_start, chunk_end):
    """A few epochs of SGD on a chunk that has been scored; ranks share its sequences and average their gradients."""
    seq_len = h.train_seq_len
    num_seqs = (chunk_end - chunk_start) // seq_len
    per_rank = num_seqs // h.world_size
    first = h.rank * per_rank
    model.train()
    for _ in range(h.ttt_epochs):
        for a in range(first, first + per_rank, h.ttt_batch_seqs):
            b = min(a + h.ttt_batch_seqs, first + per_rank)
            left = chunk_start + a * seq_len
            local = tokens[left : left + (b - a) * seq_len + 1].to(device=device, dtype=torch.int64)
            x, y = local[:-1].reshape(-1, seq_len), local[1:].reshape(-1, seq_len)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            loss.backward()
            if h.distributed:
                for p in params:
                    if p.grad is not None:
                        dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            optimizer.step()


def out_of_time(h, device, since):
    """Whether the slowest rank has used up the time for adapting; the same answer on every rank."""
    used = torch.tensor(time.perf_counter() - since, dtype=torch.float64, device=device)
    if h.distributed:
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
    return used.item() > h.max_eval_seconds


def warm_up_ttt(h, device, model, logits_fn):
    """Compiles the forward passes on random tokens and leaves the weights alone."""
    x = torch.randint(0, h.vocab_size, (h.eval_batch_windows, h.eval_seq_len), device=device)
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        logits_fn(x)
    torch.cuda.synchronize()


def eval_val_ttt(h, device, val_data, model, since):
    """Score-first test-time training: each chunk is scored, and only then learned from. One pass over all tokens."""
    total = val_data.num_targets
    chunks = chunk_windows(h, total)
    logits_fn = torch.compile(model.forward_logits, dynamic=False)
    hints = HintTable(h, device) if h.hint_enabled else None
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    warm_up_ttt(h, device, model, logits_fn)
    log(f"ttt:start chunks:{len(chunks)} chunk_tokens:{h.ttt_chunk_tokens} lr:{h.ttt_lr} epochs:{h.ttt_epochs}")
    tally = Tally(device)
    adapting = True
    for ci, windows in enumerate(chunks):
        chunk_start = ci * h.ttt_chunk_tokens
        chunk_end = min(chunk_start + h.ttt_chunk_tokens, total)
        score_chunk(h, device, val_data, model, logits_fn, windows, chunk_start, chunk_end, hints, tally)
        is_last = ci == len(chunks) - 1
        if not is_last:
            if hints is not None:
                hints.absorb(val_data.tokens, chunk_start, chunk_end)
            if adapting and out_of_time(h, device, since):
                adapting = False
                log(f"ttt:no more adaptation after chunk {ci}")
            if adapting:
                cosine = 0.5 * (1.0 + math.cos(math.pi * ci / max(len(chunks) - 1, 1)))
                for group in optimizer.param_groups:
                    group["lr"] = h.ttt_lr * cosine
                train_chunk(h, device, val_data.tokens, model, optimizer, params, chunk_start, chunk_end)
        if ci % 100 == 0 or is_last:
            loss, tokens, nbytes = tally.sums.tolist()
            log(f"ttt:chunk {ci + 1}/{len(chunks)} rank0_bpb:{loss / math.log(2.0) / max(nbytes, 1.0):.6f}")
    model.eval()
    return tally.reduce().result()


def timed_eval(label, fn, *args):
    """Runs an evaluation and prints its loss, its bits per byte and its time."""
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms")
    return val_loss, val_bpb


# ----------------------------------------
# Training
# ----------------------------------------


class Schedule:
    """Learning rate, momentum and the start of the loops, by how much of the time is gone."""

    def __init__(self, h):
        self.h = h
        self.cap_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)

    def frac(self, step, elapsed_ms):
        return max(step / max(self.h.iterations, 1), elapsed_ms / max(self.cap_ms, 1e-9))

    def lr_scale(self, frac):
        if frac >= 1.0 - self.h.warmdown_frac:
            return max((1.0 - frac) / self.h.warmdown_frac, self.h.min_lr)
        return 1.0

    def momentum(self, step):
        f = min(step / self.h.muon_momentum_warmup_steps, 1.0) if self.h.muon_momentum_warmup_steps > 0 else 1.0
        return (1.0 - f) * self.h.muon_momentum_warmup_start + f * self.h.muon_momentum


def train_step(h, model, base_model, loader, optimizers, scale, momentum):
    """One update over the global batch; returns this rank's mean loss."""
    total = 0.0
    for micro in range(h.grad_accum_steps):
        if h.distributed:
            model.require_backward_grad_sync = micro == h.grad_accum_steps - 1
        x, y = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        total = total + loss.detach() / h.grad_accum_steps
        (loss / h.grad_accum_steps).backward()
    if h.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
    optimizers.step(scale, momentum)
    return total


def warm_up_training(h, device, model, base_model, optimizers):
    """Compiles both shapes of the model; weights and optimisers are put back afterwards."""
    weights = {k: v.detach().cpu().clone() for k, v in base_model.state_dict().items()}
    states = optimizers.state()
    loader = ShuffledSequenceLoader(h, device)
    for looping in (False, True) if h.num_loops > 0 else (False,):
        base_model.looping_active = looping
        for _ in range(h.warmup_steps):
            train_step(h, model, base_model, loader, optimizers, 1.0, h.muon_momentum)
    base_model.looping_active = False
    base_model.load_state_dict(weights, strict=True)
    optimizers.restore(states)
    log(f"warmup: {h.warmup_steps} steps of each shape, state restored")


def train_model(h, device, val_data):
    """Trains until the time for it is gone; returns the averaged model, its loader and when training began."""
    base_model = build_model(h, device)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[h.local_rank], broadcast_buffers=False) if h.distributed else compiled
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    optimizers = Optimizers(h, base_model)
    if h.warmup_steps > 0:
        warm_up_training(h, device, model, base_model, optimizers)
    loader = ShuffledSequenceLoader(h, device)
    ema = WeightEMA(base_model, h.ema_decay)
    schedule = Schedule(h)
    if h.distributed:
        dist.barrier()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step, stop = 0, False
    while not stop:
        elapsed_ms = 1000.0 * (time.perf_counter() - begin)
        frac = schedule.frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f}")
        train_loss = train_step(
            h, model, base_model, loader, optimizers, schedule.lr_scale(frac), schedule.momentum(step)
        )
        ema.update(base_model)
        step += 1
        torch.cuda.synchronize()
        elapsed_ms = 1000.0 * (time.perf_counter() - begin)
        if step % h.train_log_every == 0 or step <= 5:
            tok_s = step * h.train_batch_tokens / elapsed_ms * 1000.0
            log(f"{step}/{h.iterations} train_loss:{train_loss.item():.4f} train_time:{elapsed_ms:.0f}ms tok/s:{tok_s:.0f}")
        if h.val_loss_every > 0 and step % h.val_loss_every == 0:
            val_loss, val_bpb = eval_val(h, device, val_data, base_model)
            log(f"{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
        reached = torch.tensor(int(elapsed_ms >= schedule.cap_ms or step >= h.iterations), device=device)
        if h.distributed:
            dist.all_reduce(reached, op=dist.ReduceOp.MAX)
        stop = bool(reached.item())
    log(f"stopping: step:{step}/{h.iterations} train_time:{elapsed_ms:.0f}ms")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    ema.apply_to(base_model)
    log(f"ema: weights with decay {h.ema_decay} taken")
    return base_model, loader, begin


# ----------------------------------------
# The whole run
# ----------------------------------------


def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    val_data = ValidationData(h, device)
    log(f"train_shards:{len(shard_files(h.train_files))} val_tokens:{val_data.num_targets}")

    base_model, loader, begin = train_model(h, device, val_data)
    deadline = begin + h.max_wallclock_seconds - 2.0
    hessians, batches = collect_hessians(base_model, loader, h, device, deadline)
    log(f"gptq: {batches} train batches, done {time.perf_counter() - begin:.1f}s after the start of training")
    serialize(h, base_model, hessians)
    del hessians, base_model, loader
    torch.cuda.empty_cache()

    since = time.perf_counter()
    model = deserialize(h, device)
    timed_eval("quantized", eval_val, h, device, val_data, model)
    if h.sliding_window_enabled:
        timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val_data, model)
    if h.ttt_enabled:
        val_loss, val_bpb = timed_eval("quantized_ttt", eval_val_ttt, h, device, val_data, model, since)
    else:
        val_loss, val_bpb = timed_eval("quantized_sliding", eval_val_sliding, h, device, val_data, model)
    log(f"final_eval_time:{time.perf_counter() - since:.1f}s")
    log(f"final_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if h.is_main:
        figures = {"run_id": h.run_id, "seed": h.seed, "val_loss": val_loss, "val_bpb": val_bpb}
        Path(f"logs/{h.run_id}.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")


def main():
    h = Hyperparameters()
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if 8 % h.world_size != 0:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    set_logfile(h)
    settings = {k: v for k, v in sorted(vars(Hyperparameters).items()) if not k.startswith("_")}
    log("Hyperparameters:")
    for name, value in settings.items():
        log(f"  {name}: {value}")
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version.split()[0]} PyTorch {torch.__version__}")
    if h.is_main:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        log(smi.stdout, console=False)
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
