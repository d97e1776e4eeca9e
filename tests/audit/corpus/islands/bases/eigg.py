"""SP8192 / 11L x 512 / looped 3-5 / sparse attention gate / asym logit cap / GPTQ int6 + LQER / phased per-document LoRA TTT.

Run on 8xH100:

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Everything that is needed lives in this file. Plain SP8192 tokens, no case folding, no sidecar.
"""

import collections
import copy
import glob
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import brotli
except ImportError:
    brotli = None

try:
    from flash_attn_interface import flash_attn_func
except ImportError:
    flash_attn_func = None

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BOS_ID = 1
SIZE_LIMIT = 16_000_000


# ----------------------------------------------------------------------------------------------------
# settings
# ----------------------------------------------------------------------------------------------------


def env_int(name, default):
    return int(os.environ.get(name, default))


def env_float(name, default):
    return float(os.environ.get(name, default))


def env_flag(name, default):
    return bool(int(os.environ.get(name, "1" if default else "0")))


class Hyperparameters:
    # data
    data_dir = os.environ.get("DATA_DIR", "./data")
    seed = env_int("SEED", 1337)
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    vocab_size = env_int("VOCAB_SIZE", 8192)
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")

    # schedule
    iterations = env_int("ITERATIONS", 20000)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env_float("GPTQ_RESERVE_SECONDS", 14.0)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    warmdown_frac = env_float("WARMDOWN_FRAC", 0.78)
    min_lr = env_float("MIN_LR", 0.08)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    val_batch_tokens = env_int("VAL_BATCH_TOKENS", 524288)

    # model
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 4.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    rope_base = env_float("ROPE_BASE", 10000.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 5.0)
    xsa_last_n = env_int("XSA_LAST_N", 11)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    tied_init_std = env_float("TIED_INIT_STD", 0.005)
    num_loops = env_int("NUM_LOOPS", 2)
    loop_start = env_int("LOOP_START", 3)
    loop_end = env_int("LOOP_END", 5)
    enable_looping_at = env_float("ENABLE_LOOPING_AT", 0.35)
    parallel_start = env_int("PARALLEL_START", 8)
    gate_window = env_int("GATE_WINDOW", 12)
    sparse_gate_scale = env_float("SPARSE_GATE_SCALE", 0.5)
    smear_gate = env_flag("SMEAR_GATE", True)
    fused_act = env_flag("FUSED_ACT", False)

    # optimisers
    matrix_lr = env_float("MATRIX_LR", 0.026)
    scalar_lr = env_float("SCALAR_LR", 0.02)
    embed_lr = env_float("EMBED_LR", 0.03)
    muon_momentum = env_float("MUON_MOMENTUM", 0.97)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_ns_steps = env_int("MUON_NS_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.095)
    adam_wd = env_float("ADAM_WD", 0.02)
    embed_wd = env_float("EMBED_WD", 0.085)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.99)
    grad_clip = env_float("GRAD_CLIP", 0.3)
    ema_decay = env_float("EMA_DECAY", 0.9965)

    # quantisation
    matrix_bits = env_int("MATRIX_BITS", 6)
    embed_bits = env_int("EMBED_BITS", 7)
    matrix_clip_sigmas = env_float("MATRIX_CLIP_SIGMAS", 12.85)
    mlp_clip_sigmas = env_float("MLP_CLIP_SIGMAS", 12.0)
    embed_clip_sigmas = env_float("EMBED_CLIP_SIGMAS", 15.0)
    gptq_calibration_batches = env_int("GPTQ_CALIBRATION_BATCHES", 16)
    lqer_rank = env_int("LQER_RANK", 4)
    lqer_top_k = env_int("LQER_TOP_K", 3)
    compressor = os.environ.get("COMPRESSOR", "pergroup")

    # evaluation
    eval_mode = os.environ.get("EVAL_MODE", "ttt_phased")  # ttt_phased | ttt_lora | sliding
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    ttt_rank = env_int("TTT_RANK", 80)
    ttt_alpha = env_float("TTT_ALPHA", 144.0)
    ttt_lr = env_float("TTT_LR", 0.0001)
    ttt_beta1 = env_float("TTT_BETA1", 0.0)
    ttt_beta2 = env_float("TTT_BETA2", 0.99)
    ttt_wd = env_float("TTT_WD", 0.5)
    ttt_chunk = env_int("TTT_CHUNK", 48)
    ttt_batch = env_int("TTT_BATCH", 32)
    ttt_grad_steps = env_int("TTT_GRAD_STEPS", 1)
    ttt_k_lora = env_flag("TTT_K_LORA", True)
    ttt_o_lora = env_flag("TTT_O_LORA", True)
    ttt_mlp_lora = env_flag("TTT_MLP_LORA", True)
    phase_docs = env_int("PHASE_DOCS", 2500)
    num_phases = env_int("NUM_PHASES", 3)
    global_lr = env_float("GLOBAL_LR", 0.001)
    global_momentum = env_float("GLOBAL_MOMENTUM", 0.9)
    global_epochs = env_int("GLOBAL_EPOCHS", 1)
    global_rows = env_int("GLOBAL_ROWS", 2)

    # distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = env_int("RANK", 0)
    world_size = env_int("WORLD_SIZE", 1)
    local_rank = env_int("LOCAL_RANK", 0)
    is_main = rank == 0
    grad_accum_steps = max(1, 8 // world_size)

    # files
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    artifact_path = "final_model.int6.ptz"


_logfile = None


def set_logging(h):
    global _logfile
    if h.is_main:
        os.makedirs("logs", exist_ok=True)
        _logfile = h.logfile


def log(msg, console=True):
    if _logfile is None:
        return
    if console:
        print(msg, flush=True)
    with open(_logfile, "a", encoding="utf-8") as f:
        print(msg, file=f)


# ----------------------------------------------------------------------------------------------------
# data
# ----------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_HEADER = 256


def shard_length(path):
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if header.size != SHARD_HEADER or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"not a token shard: {path}")
    return int(header[2])


def load_shard(path):
    n = shard_length(path)
    tokens = np.fromfile(path, dtype="<u2", count=n, offset=SHARD_HEADER * 4)
    if tokens.size != n:
        raise ValueError(f"short shard: {path}")
    return torch.from_numpy(tokens)


def build_byte_tables(sp, vocab_size, device):
    """bytes of a piece without its leading space; has it a leading space; is it no text at all (BOS and friends)."""
    n = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros(n, dtype=np.int16)
    leading_space = np.zeros(n, dtype=np.bool_)
    boundary = np.ones(n, dtype=np.bool_)
    for t in range(int(sp.vocab_size())):
        if sp.is_control(t) or sp.is_unknown(t) or sp.is_unused(t):
            continue
        boundary[t] = False
        if sp.is_byte(t):
            base_bytes[t] = 1
            continue
        piece = sp.id_to_piece(t)
        if piece.startswith("\u2581"):
            leading_space[t] = True
            piece = piece[1:]
        base_bytes[t] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(leading_space, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


class ValidationData:
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size}, tokenizer has {int(self.sp.vocab_size())}")
        files = sorted(glob.glob(h.val_files))
        if not files:
            raise FileNotFoundError(h.val_files)
        self.tokens = torch.cat([load_shard(f) for f in files]).contiguous()
        self.base_bytes, self.leading_space, self.boundary = build_byte_tables(self.sp, h.vocab_size, device)

    def token_bytes(self, x, y):
        """Bytes that target y stands for when it follows x."""
        n = self.base_bytes[y].to(torch.float64)
        return n + (self.leading_space[y] & ~self.boundary[x]).to(torch.float64)


class ShuffledShardLoader:
    """Every shard is cut into sequences at a random phase; sequences are dealt to the ranks in shuffled order."""

    def __init__(self, h, device, seed_offset=0):
        self.files = sorted(glob.glob(h.train_files))
        if not self.files:
            raise FileNotFoundError(h.train_files)
        self.h, self.device = h, device
        self.rng = np.random.Generator(np.random.PCG64(h.seed + seed_offset))
        self.order = []
        self.pending = collections.deque()
        self.tokens = None

    def _next_shard(self):
        if not self.order:
            self.order = list(self.rng.permutation(len(self.files)))
        self.tokens = load_shard(self.files[self.order.pop()])
        seq = self.h.train_seq_len
        phase = int(self.rng.integers(seq))
        count = (self.tokens.numel() - 1 - phase) // seq
        starts = phase + seq * self.rng.permutation(count)
        usable = count - count % self.h.world_size
        self.pending.extend(int(s) for s in starts[:usable][self.h.rank :: self.h.world_size])

    def next_batch(self, global_tokens):
        seq = self.h.train_seq_len
        rows = max(1, global_tokens // (seq * self.h.world_size))
        out = torch.empty(rows, seq + 1, dtype=torch.int64)
        for r in range(rows):
            while not self.pending:
                self._next_shard()
            s = self.pending.popleft()
            out[r] = self.tokens[s : s + seq + 1].to(torch.int64)
        out = out.pin_memory().to(self.device, non_blocking=True)
        return out[:, :-1].contiguous(), out[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------------------
# optional fused activation: leaky_relu(x, 0.5) ** 2
# ----------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _leaky_sq_fwd(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        a = tl.where(x > 0, x, 0.5 * x)
        tl.store(y_ptr + offs, a * a, mask=mask)

    @triton.jit
    def _leaky_sq_bwd(x_ptr, g_ptr, d_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(x > 0, 2.0 * x, 0.5 * x)
        tl.store(d_ptr + offs, g * d, mask=mask)


class FusedLeakySquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y = torch.empty_like(x)
        n = x.numel()
        _leaky_sq_fwd[(triton.cdiv(n, 1024),)](x, y, n, BLOCK=1024)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        d = torch.empty_like(x)
        n = x.numel()
        _leaky_sq_bwd[(triton.cdiv(n, 1024),)](x, g.contiguous(), d, n, BLOCK=1024)
        return d


def leaky_square(x, fused):
    if fused and triton is not None and x.is_cuda:
        return FusedLeakySquare.apply(x)
    return F.leaky_relu(x, negative_slope=0.5).square()


# ----------------------------------------------------------------------------------------------------
# model
# ----------------------------------------------------------------------------------------------------


def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    def __init__(self, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, rope_dims, base):
        super().__init__()
        inv = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        self.register_buffer("inv_freq", inv, persistent=False)

    def forward(self, length, device, dtype):
        t = torch.arange(length, device=device, dtype=torch.float32)
        freqs = torch.outer(t, self.inv_freq.to(device))
        return freqs.cos()[None, :, None, :].to(dtype), freqs.sin()[None, :, None, :].to(dtype)


def apply_rope(x, cos, sin, rope_dims):
    rot, rest = x[..., :rope_dims], x[..., rope_dims:]
    a, b = rot.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def causal_attention(q, k, v):
    """(B, T, H, D) in and out."""
    if flash_attn_func is not None:
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, h, use_xsa):
        super().__init__()
        self.heads, self.kv_heads = h.num_heads, h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        self.rope_dims = h.rope_dims
        self.gate_window, self.gate_scale = h.gate_window, h.sparse_gate_scale
        self.use_xsa = use_xsa
        kv_dim = self.kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim)
        self.c_k = CastedLinear(h.model_dim, kv_dim)
        self.c_v = CastedLinear(h.model_dim, kv_dim)
        self.proj = CastedLinear(h.model_dim, h.model_dim)
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.gate_w = nn.Parameter(torch.zeros(h.num_heads, h.gate_window))
        self.rotary = Rotary(h.rope_dims, h.rope_base)

    def _xsa(self, y, v):
        b, t, hq, d = y.shape
        y_g = y.reshape(b, t, self.kv_heads, hq // self.kv_heads, d)
        v_n = F.normalize(v, dim=-1).unsqueeze(-2)
        return (y_g - (y_g * v_n).sum(-1, keepdim=True) * v_n).reshape(b, t, hq, d)

    def forward(self, x, lora=None, slot=0):
        b, t, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if lora is not None:
            q = q + lora.q[slot](x)
            v = v + lora.v[slot](x)
            if lora.k is not None:
                k = k + lora.k[slot](x)
        q = rms_norm(q.reshape(b, t, self.heads, self.head_dim))
        k = rms_norm(k.reshape(b, t, self.kv_heads, self.head_dim))
        v = v.reshape(b, t, self.kv_heads, self.head_dim)
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = apply_rope(q, cos, sin, self.rope_dims)
        k = apply_rope(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = causal_attention(q, k, v)
        if self.use_xsa:
            y = self._xsa(y, v)
        gate = torch.sigmoid(self.gate_scale * F.linear(x[..., : self.gate_window], self.gate_w.to(x.dtype)))
        y = (y * (2.0 * gate).unsqueeze(-1)).reshape(b, t, dim)
        out = self.proj(y)
        if lora is not None and lora.o is not None:
            out = out + lora.o[slot](y)
        return out


class MLP(nn.Module):
    def __init__(self, h):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.fc = CastedLinear(h.model_dim, hidden)
        self.proj = CastedLinear(hidden, h.model_dim)
        self.fused = h.fused_act

    def forward(self, x, lora=None, slot=0):
        out = self.proj(leaky_square(self.fc(x), self.fused))
        if lora is not None and lora.mlp is not None:
            out = out + lora.mlp[slot](x)
        return out


class Block(nn.Module):
    def __init__(self, h, index):
        super().__init__()
        self.attn = Attention(h, use_xsa=index >= h.num_layers - h.xsa_last_n)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(h.model_dim), torch.zeros(h.model_dim)]))
        self.depth_scale = 1.0 / math.sqrt(index + 1)
        self.parallel = index >= h.parallel_start

    def forward(self, x, x0, lora=None, slot=0):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        n = rms_norm(x) * self.depth_scale
        a = self.attn_scale.to(x.dtype) * self.attn(n, lora, slot)
        if self.parallel:
            return x + a + self.mlp_scale.to(x.dtype) * self.mlp(n, lora, slot)
        x = x + a
        n = rms_norm(x) * self.depth_scale
        return x + self.mlp_scale.to(x.dtype) * self.mlp(n, lora, slot)


class SmearGate(nn.Module):
    """Adds a gated share of the previous position's embedding. Off at the first token of a document."""

    def __init__(self, window):
        super().__init__()
        self.window = window
        self.smear_w = nn.Parameter(torch.zeros(1, window))
        self.smear_lambda = nn.Parameter(torch.zeros(1))

    def forward(self, x, ids, before):
        shifted = torch.cat([before, x[:, :-1]], dim=1)
        gate = torch.sigmoid(F.linear(x[..., : self.window], self.smear_w.to(x.dtype)))
        gate = self.smear_lambda.to(x.dtype) * gate
        gate = gate * (ids != BOS_ID).unsqueeze(-1).to(x.dtype)
        return x + gate * shifted


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h = h
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.gate_window) if h.smear_gate else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.looping = False
        self._plan()
        n_skip = len(self.enc_looped)
        self.skip_weights = nn.Parameter(torch.ones(n_skip, h.model_dim))
        self.skip_gates = nn.Parameter(torch.zeros(n_skip, h.model_dim))
        # asymmetric soft cap of the logits: one bound above zero, another below
        self.cap_pos = nn.Parameter(torch.tensor(h.logit_softcap))
        self.cap_neg = nn.Parameter(torch.tensor(h.logit_softcap))
        self._init_weights()

    def _plan(self):
        h = self.h
        plain = list(range(h.num_layers))
        loop = list(range(h.loop_start, h.loop_end + 1))
        looped = plain[: h.loop_start] + loop * (h.num_loops + 1) + plain[h.loop_end + 1 :]
        self.enc_plain, self.dec_plain = plain[: len(plain) // 2], plain[len(plain) // 2 :]
        self.enc_looped, self.dec_looped = looped[: len(looped) // 2], looped[len(looped) // 2 :]

    def _init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.h.tied_init_std)
        for name, module in self.named_modules():
            if isinstance(module, CastedLinear):
                if name.endswith("proj"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def num_slots(self):
        return len(self.enc_looped) + len(self.dec_looped)

    def hidden(self, ids, before_ids=None, lora=None):
        x = self.tok_emb(ids).to(torch.bfloat16)
        if self.smear is not None:
            if before_ids is None:
                before = torch.zeros_like(x[:, :1])
            else:
                before = self.tok_emb(before_ids).to(x.dtype).unsqueeze(1)
            x = self.smear(x, ids, before)
        x = rms_norm(x)
        x0 = x
        enc = self.enc_looped if self.looping else self.enc_plain
        dec = self.dec_looped if self.looping else self.dec_plain
        skips = []
        slot = 0
        for i in enc:
            x = self.blocks[i](x, x0, lora, slot)
            skips.append(x)
            slot += 1
        for j, i in enumerate(dec):
            if skips and j < self.skip_weights.size(0):
                w = self.skip_weights[j].to(x.dtype) * skips.pop()
                g = torch.sigmoid(self.skip_gates[j].to(x.dtype))
                x = torch.lerp(w, x, g)
            x = self.blocks[i](x, x0, lora, slot)
            slot += 1
        return rms_norm(x)

    def asym_cap(self, z):
        z = z.float()
        pos = self.cap_pos * torch.tanh(z / self.cap_pos)
        neg = self.cap_neg * torch.tanh(z / self.cap_neg)
        return torch.where(z >= 0, pos, neg)

    def logits(self, hid, lora=None):
        z = F.linear(hid, self.tok_emb.weight.to(hid.dtype))
        if lora is not None:
            z = z + lora.head(hid)
        return self.asym_cap(z)

    def token_losses(self, ids, targets, before_ids=None, lora=None):
        z = self.logits(self.hidden(ids, before_ids, lora), lora)
        nll = F.cross_entropy(z.reshape(-1, z.size(-1)), targets.reshape(-1), reduction="none")
        return nll.reshape(targets.shape)

    def forward(self, ids, targets):
        return self.token_losses(ids, targets).mean()

    def forward_ttt(self, ids, targets, before_ids, lora):
        return self.token_losses(ids, targets, before_ids, lora)


# ----------------------------------------------------------------------------------------------------
# batched LoRA: one adapter per row, so that every document of a batch has its own
# ----------------------------------------------------------------------------------------------------


class BatchedLinearLoRA(nn.Module):
    def __init__(self, bsz, fan_in, fan_out, rank, alpha):
        super().__init__()
        self.bound = 1.0 / math.sqrt(fan_in)
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(bsz, rank, fan_in).uniform_(-self.bound, self.bound))
        self.B = nn.Parameter(torch.zeros(bsz, fan_out, rank))

    def reset(self):
        with torch.no_grad():
            self.A.uniform_(-self.bound, self.bound)
            self.B.zero_()

    def forward(self, x):
        low = torch.bmm(x, self.A.to(x.dtype).transpose(1, 2))
        return torch.bmm(low, self.B.to(x.dtype).transpose(1, 2)) * self.scale


class BatchedTTTLoRA(nn.Module):
    def __init__(self, bsz, model, h):
        super().__init__()
        self.bsz = bsz
        dim, slots = h.model_dim, model.num_slots()
        kv = h.num_kv_heads * (dim // h.num_heads)

        def stack(fan_in, fan_out):
            return nn.ModuleList(
                [BatchedLinearLoRA(bsz, fan_in, fan_out, h.ttt_rank, h.ttt_alpha) for _ in range(slots)]
            )

        self.q = stack(dim, dim)
        self.v = stack(dim, kv)
        self.k = stack(dim, kv) if h.ttt_k_lora else None
        self.o = stack(dim, dim) if h.ttt_o_lora else None
        self.mlp = stack(dim, dim) if h.ttt_mlp_lora else None
        self.head = BatchedLinearLoRA(bsz, dim, h.vocab_size, h.ttt_rank, h.ttt_alpha)

    def reset(self):
        for module in self.modules():
            if isinstance(module, BatchedLinearLoRA):
                module.reset()


# ----------------------------------------------------------------------------------------------------
# Muon with Polar Express coefficients
# ----------------------------------------------------------------------------------------------------

POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


@torch.compile
def polar_express(g, steps: int = 5):
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, ns_steps, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world == rank:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = polar_express(g, steps=group["ns_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if world > 1:
                dist.all_reduce(flat)
            at = 0
            for p in params:
                g = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(g, alpha=-group["lr"])
                at += p.numel()


class Optimizers:
    def __init__(self, h, model):
        matrices, scalars = [], []
        for name, p in model.named_parameters():
            if name == "tok_emb.weight":
                continue
            if p.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight"):
                matrices.append(p)
            else:
                scalars.append(p)
        betas = (h.beta1, h.beta2)
        self.muon = Muon(matrices, h.matrix_lr, h.muon_momentum, h.muon_ns_steps, h.muon_wd)
        self.embed = torch.optim.AdamW(
            [model.tok_emb.weight], lr=h.embed_lr, betas=betas, eps=1e-8, weight_decay=h.embed_wd, fused=True
        )
        self.scalar = torch.optim.AdamW(
            scalars, lr=h.scalar_lr, betas=betas, eps=1e-8, weight_decay=h.adam_wd, fused=True
        )
        self.all = [self.muon, self.embed, self.scalar]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def set_scale(self, scale, momentum):
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum

    def step(self):
        for opt in self.all:
            opt.step()

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)


def average_grads(h, params, op=None):
    """All gradients as one buffer over the wire."""
    if not h.distributed:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG if op is None else op)
    at = 0
    for g in grads:
        g.copy_(flat[at : at + g.numel()].view_as(g))
        at += g.numel()


# ----------------------------------------------------------------------------------------------------
# GPTQ + LQER
# ----------------------------------------------------------------------------------------------------


def collect_hessians(h, model, loader, deadline):
    """X^T X of every linear layer's input, over training batches, until `deadline` (perf_counter) at the latest."""
    hessians, handles = {}, []

    def hook(name):
        def fn(_, inputs, __):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in hessians:
                hessians[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
            hessians[name].addmm_(x.T, x)

        return fn

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            handles.append(module.register_forward_hook(hook(name + ".weight")))
    model.eval()
    batches = 0
    with torch.no_grad():
        for _ in range(h.gptq_calibration_batches):
            stop = torch.tensor(float(time.perf_counter() > deadline), device=loader.device)
            if h.distributed:
                dist.all_reduce(stop, op=dist.ReduceOp.MAX)
            if stop.item() > 0:
                break
            x, _ = loader.next_batch(h.world_size * h.train_seq_len * 16)
            hid = model.hidden(x)
            flat = hid.reshape(-1, hid.size(-1)).float()
            if "tok_emb.weight" not in hessians:
                hessians["tok_emb.weight"] = torch.zeros(flat.size(1), flat.size(1), device=flat.device)
            hessians["tok_emb.weight"].addmm_(flat.T, flat)
            batches += 1
    for handle in handles:
        handle.remove()
    for name in hessians:
        if h.distributed:
            dist.all_reduce(hessians[name])
        hessians[name] = hessians[name].cpu() / max(1, batches)
    return hessians, batches


def gptq_quantize(weight, hessian, clip_sigmas, bits, block=128):
    qmax = 2 ** (bits - 1) - 1
    w = weight.detach().float().cuda().clone()
    rows, cols = w.shape
    hess = hessian.float().cuda().clone()
    diag = torch.diagonal(hess)
    dead = diag <= 0
    diag[dead] = 1.0
    w[:, dead] = 0.0
    diag += 0.01 * diag.mean()
    perm = torch.argsort(torch.diagonal(hess), descending=True)
    inverse_perm = torch.argsort(perm)
    w = w[:, perm]
    hess = hess[perm][:, perm]
    hinv = torch.cholesky_inverse(torch.linalg.cholesky(hess))
    hinv = torch.linalg.cholesky(hinv, upper=True)
    scale = (clip_sigmas * w.std(dim=1) / qmax).clamp_min(1e-8).half().float()
    q = torch.zeros(rows, cols, device=w.device)
    for lo in range(0, cols, block):
        hi = min(lo + block, cols)
        errors = torch.zeros(rows, hi - lo, device=w.device)
        for j in range(lo, hi):
            col = w[:, j]
            qc = torch.clamp(torch.round(col / scale), -qmax, qmax)
            q[:, j] = qc
            err = (col - qc * scale) / hinv[j, j]
            w[:, j:hi] -= err.unsqueeze(1) * hinv[j, j:hi].unsqueeze(0)
            errors[:, j - lo] = err
        w[:, hi:] -= errors @ hinv[lo:hi, hi:]
    return q[:, inverse_perm].to(torch.int8).cpu(), scale.half().cpu()


def int4_rows(m):
    """Rows to 4 bits with a scale each; kept as int8, the compressor gets rid of the empty bits."""
    scale = (m.abs().amax(dim=1) / 7.0).clamp_min(1e-8).half().float()
    return torch.clamp(torch.round(m / scale[:, None]), -7, 7).to(torch.int8), scale.half()


def lqer_factors(error, rank):
    u, s, vt = torch.linalg.svd(error.float(), full_matrices=False)
    root = s[:rank].sqrt()
    left = (u[:, :rank] * root).T.contiguous()
    right = (root[:, None] * vt[:rank]).contiguous()
    return left, right


def quantize_state(h, state, hessians):
    out, kinds, errors = {}, {}, {}
    for name, tensor in state.items():
        t = tensor.detach().cpu()
        if t.ndim != 2 or name not in hessians:
            out[name] = t.half() if t.numel() > 4096 else t.float()
            kinds[name] = "raw"
            continue
        embed = name == "tok_emb.weight"
        bits = h.embed_bits if embed else h.matrix_bits
        sigmas = h.embed_clip_sigmas if embed else h.mlp_clip_sigmas if ".mlp." in name else h.matrix_clip_sigmas
        q, s = gptq_quantize(t, hessians[name], sigmas, bits)
        out[name + ".q"], out[name + ".s"] = q, s
        kinds[name] = f"gptq{bits}"
        errors[name] = t.float() - q.float() * s.float()[:, None]
    worst = sorted(errors, key=lambda n: -float(errors[n].norm()))[: h.lqer_top_k]
    for name in worst:
        left, right = lqer_factors(errors[name], h.lqer_rank)
        out[name + ".la"], out[name + ".las"] = int4_rows(left)
        out[name + ".lb"], out[name + ".lbs"] = int4_rows(right)
        kinds[name] += "+lqer"
    tally = collections.Counter(kinds.values())
    log("quantized: " + ", ".join(f"{k} x{v}" for k, v in sorted(tally.items())))
    return out, kinds


def dequantize_state(packed, kinds):
    state = {}
    for name, kind in kinds.items():
        if kind == "raw":
            state[name] = packed[name].float()
            continue
        w = packed[name + ".q"].float() * packed[name + ".s"].float()[:, None]
        if kind.endswith("+lqer"):
            left = packed[name + ".la"].float() * packed[name + ".las"].float()[:, None]
            right = packed[name + ".lb"].float() * packed[name + ".lbs"].float()[:, None]
            w = w + left.T @ right
        state[name] = w
    return state


# ----------------------------------------------------------------------------------------------------
# container: tensors of one role lie together, each group is squeezed by whatever does it best
# ----------------------------------------------------------------------------------------------------

DTYPES = {"int8": torch.int8, "float16": torch.float16, "float32": torch.float32}


def group_of(name):
    name = re.sub(r"blocks\.\d+\.", "", name)
    if name.endswith(".q"):
        return name
    return "small"


def lrzip_pack(raw):
    """ZPAQ mode of lrzip. Returns None where the binary is missing."""
    if shutil.which("lrzip") is None:
        return None
    with tempfile.TemporaryDirectory() as tmp:
        src, dst = os.path.join(tmp, "a"), os.path.join(tmp, "a.lrz")
        Path(src).write_bytes(raw)
        done = subprocess.run(["lrzip", "-q", "-z", "-L", "9", "-o", dst, src], capture_output=True)
        return Path(dst).read_bytes() if done.returncode == 0 else None


def lrzip_unpack(blob):
    with tempfile.TemporaryDirectory() as tmp:
        src, dst = os.path.join(tmp, "a.lrz"), os.path.join(tmp, "a")
        Path(src).write_bytes(blob)
        subprocess.run(["lrzip", "-q", "-d", "-o", dst, src], check=True, capture_output=True)
        return Path(dst).read_bytes()


def squeeze(raw, mode):
    options = [(b"x", lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))]
    if brotli is not None:
        options.append((b"b", brotli.compress(raw, quality=11, lgwin=24)))
    if mode == "pergroup":
        packed = lrzip_pack(raw)
        if packed is not None:
            options.append((b"l", packed))
    code, blob = min(options, key=lambda o: len(o[1]))
    return code + blob


def unsqueeze(blob):
    code, body = blob[:1], blob[1:]
    if code == b"x":
        return lzma.decompress(body)
    if code == b"b":
        return brotli.decompress(body)
    return lrzip_unpack(body)


def write_artifact(h, packed, kinds):
    groups = collections.OrderedDict()
    for name in sorted(packed):
        groups.setdefault(group_of(name), []).append(name)
    header = {"kinds": kinds, "groups": []}
    blobs = []
    for group, names in groups.items():
        raw = io.BytesIO()
        entries = []
        for name in names:
            t = packed[name].contiguous()
            # int8 matrices go in column by column: neighbours then share a scale's magnitude less, but rows a sign more
            turned = t.ndim == 2 and t.dtype == torch.int8
            raw.write((t.T.contiguous() if turned else t).numpy().tobytes())
            entries.append([name, str(t.dtype).replace("torch.", ""), list(t.shape), turned])
        blob = squeeze(raw.getvalue(), h.compressor)
        header["groups"].append({"entries": entries, "size": len(blob)})
        blobs.append(blob)
        log(f"pack: {group} {raw.tell()} -> {len(blob)} ({blob[:1].decode()})", console=False)
    head = lzma.compress(json.dumps(header, separators=(",", ":")).encode())
    with open(h.artifact_path, "wb") as f:
        f.write(struct.pack("<I", len(head)) + head)
        for blob in blobs:
            f.write(blob)
    return os.path.getsize(h.artifact_path)


def read_artifact(h):
    data = Path(h.artifact_path).read_bytes()
    (n,) = struct.unpack("<I", data[:4])
    header = json.loads(lzma.decompress(data[4 : 4 + n]))
    at = 4 + n
    packed = {}
    for group in header["groups"]:
        raw = unsqueeze(data[at : at + group["size"]])
        at += group["size"]
        pos = 0
        for name, dtype, shape, turned in group["entries"]:
            kind = DTYPES[dtype]
            count = math.prod(shape)
            size = count * torch.empty(0, dtype=kind).element_size()
            t = torch.frombuffer(bytearray(raw[pos : pos + size]), dtype=kind)
            pos += size
            packed[name] = t.reshape(shape[1], shape[0]).T.contiguous() if turned else t.reshape(shape)
    return packed, header["kinds"]


def serialize(h, state, hessians):
    """Quantises, writes the artifact and reports the counted size."""
    code_bytes = len(Path(__file__).read_bytes())
    model_bytes = 0
    if h.is_main:
        packed, kinds = quantize_state(h, state, hessians)
        model_bytes = write_artifact(h, packed, kinds)
        total = model_bytes + code_bytes
        log(f"Code size: {code_bytes} bytes")
        log(f"Serialized model {h.compressor}: {model_bytes} bytes")
        log(f"Total submission size: {total} bytes")
        if total > SIZE_LIMIT:
            log(f"WARNING: {total - SIZE_LIMIT} bytes over the limit")
    if h.distributed:
        dist.barrier()
    return model_bytes


def deserialize(h, device):
    packed, kinds = read_artifact(h)
    model = GPT(h).to(device)
    model.load_state_dict(dequantize_state(packed, kinds), strict=True)
    model.looping = h.num_loops > 0
    return model


# ----------------------------------------------------------------------------------------------------
# scoring
# ----------------------------------------------------------------------------------------------------


class ScoreSheet:
    """Sums of one pass over the validation stream."""

    def __init__(self, h, device, val_data):
        self.h, self.val_data = h, val_data
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, nll, x, y, mask):
        m = mask.to(torch.float64)
        self.loss += (nll.to(torch.float64) * m).sum()
        self.bytes += (self.val_data.token_bytes(x, y) * m).sum()
        self.tokens += m.sum()

    def finish(self):
        if self.h.distributed:
            for t in (self.loss, self.bytes, self.tokens):
                dist.all_reduce(t)
        val_loss = (self.loss / self.tokens).item()
        bits = self.loss.item() / math.log(2.0)
        return val_loss, bits / self.bytes.item(), int(self.tokens.item())


def eval_val(h, device, val_data, model):
    """Plain evaluation in disjoint rows of the evaluation length. The last, shorter row goes to rank 0."""
    seq = h.eval_seq_len
    tokens = val_data.tokens
    total = tokens.numel() - 1
    full = total // seq
    rows_per_step = max(1, h.val_batch_tokens // (seq * h.world_size))
    lo, hi = full * h.rank // h.world_size, full * (h.rank + 1) // h.world_size
    sheet = ScoreSheet(h, device, val_data)
    model.eval()
    with torch.inference_mode():
        for r in range(lo, hi, rows_per_step):
            e = min(r + rows_per_step, hi)
            chunk = tokens[r * seq : e * seq + 1].to(device=device, dtype=torch.int64)
            x, y = chunk[:-1].reshape(-1, seq), chunk[1:].reshape(-1, seq)
            nll = model.token_losses(x, y)
            sheet.add(nll, x, y, torch.ones_like(nll, dtype=torch.bool))
        if h.rank == 0 and full * seq < total:
            chunk = tokens[full * seq : total + 1].to(device=device, dtype=torch.int64)
            x, y = chunk[None, :-1], chunk[None, 1:]
            nll = model.token_losses(x, y)
            sheet.add(nll, x, y, torch.ones_like(nll, dtype=torch.bool))
    model.train()
    return sheet.finish()


def eval_val_sliding(h, device, val_data, model, batch_rows=32):
    """Windows of eval_seq_len every eval_stride tokens; each scores what no earlier window has scored."""
    seq, stride = h.eval_seq_len, h.eval_stride
    tokens = val_data.tokens
    total = tokens.numel() - 1
    context = seq - stride
    starts = [ws for ws in range(0, total, stride) if ws == 0 or ws + context < total]
    mine = starts[len(starts) * h.rank // h.world_size : len(starts) * (h.rank + 1) // h.world_size]
    sheet = ScoreSheet(h, device, val_data)
    model.eval()
    with torch.no_grad():
        for b in range(0, len(mine), batch_rows):
            batch = mine[b : b + batch_rows]
            x = torch.zeros(len(batch), seq, dtype=torch.int64, device=device)
            y = torch.zeros(len(batch), seq, dtype=torch.int64, device=device)
            fresh = torch.zeros(len(batch), seq, dtype=torch.bool, device=device)
            for i, ws in enumerate(batch):
                end = min(ws + seq, total)
                chunk = tokens[ws : end + 1].to(device=device, dtype=torch.int64)
                x[i, : end - ws], y[i, : end - ws] = chunk[:-1], chunk[1:]
                fresh[i, (0 if ws == 0 else context) : end - ws] = True
            nll = model.token_losses(x, y)
            sheet.add(nll, x, y, fresh)
    model.train()
    return sheet.finish()


# ----------------------------------------------------------------------------------------------------
# test-time training: per-document LoRA in chunks, scored first and trained on after
# ----------------------------------------------------------------------------------------------------


def find_docs(tokens):
    """(start, length) of every document. The BOS of the next one belongs to it as a last target, so that
    the targets of all documents together are exactly tokens[1:]."""
    bos = (tokens.to(torch.int32) == BOS_ID).nonzero(as_tuple=True)[0].tolist()
    if not bos or bos[0] != 0:
        raise ValueError("validation stream must begin with a document")
    docs = []
    for i, start in enumerate(bos):
        end = bos[i + 1] + 1 if i + 1 < len(bos) else tokens.numel()
        if end - start >= 2:
            docs.append((start, end - start))
    return docs


def split_phases(h, docs):
    """num_phases groups out of the first phase_docs documents, one of the rest."""
    head = min(h.phase_docs, len(docs))
    cuts = [head * p // h.num_phases for p in range(h.num_phases + 1)]
    groups = [docs[a:b] for a, b in zip(cuts[:-1], cuts[1:])]
    groups.append(docs[head:])
    return [g for g in groups if g]


def length_batches(h, docs):
    """Batches of documents of like length, longest first. Rank r takes every world_size-th."""
    ordered = sorted(docs, key=lambda d: (-d[1], d[0]))
    return [ordered[i : i + h.ttt_batch] for i in range(0, len(ordered), h.ttt_batch)]


def chunk_window(ci, pred_len, num_chunks, chunk, seq_len):
    """Of a document's chunk: where its window begins, how long it is, and which part of the window the chunk is."""
    lo = ci * chunk
    hi = pred_len if ci == num_chunks - 1 else lo + chunk
    win_start = max(0, hi - seq_len)
    return win_start, hi - win_start, lo - win_start, hi - lo


def make_lora_optimizer(h, lora):
    return torch.optim.AdamW(
        lora.parameters(),
        lr=h.ttt_lr,
        betas=(h.ttt_beta1, h.ttt_beta2),
        eps=1e-10,
        weight_decay=h.ttt_wd,
        fused=True,
    )


def gather_chunk(h, device, tokens, docs, pred, num_chunks, ci):
    """Rows of one chunk step: inputs, targets, the token before each window, offset and length of the chunk."""
    bsz = len(docs)
    spans = [
        chunk_window(ci, pred[b], num_chunks[b], h.ttt_chunk, h.eval_seq_len) if ci < num_chunks[b] else (0, 0, 0, 0)
        for b in range(bsz)
    ]
    width = max(s[1] for s in spans)
    x = torch.zeros(bsz, width, dtype=torch.int64)
    y = torch.zeros(bsz, width, dtype=torch.int64)
    before = torch.zeros(bsz, dtype=torch.int64)
    for b, (win_start, win_len, _, chunk_len) in enumerate(spans):
        if chunk_len == 0:
            continue
        lo = docs[b][0] + win_start
        row = tokens[lo : lo + win_len + 1].to(torch.int64)
        x[b, :win_len], y[b, :win_len] = row[:-1], row[1:]
        before[b] = int(tokens[max(lo - 1, 0)])
    offs = torch.tensor([s[2] for s in spans], device=device)
    lens = torch.tensor([s[3] for s in spans], device=device)
    return x.to(device), y.to(device), before.to(device), offs, lens


def chunk_mask(width, offs, lens):
    pos = torch.arange(width, device=offs.device)[None, :]
    return (pos >= offs[:, None]) & (pos < (offs + lens)[:, None])


def score_batch(h, device, val_data, forward_ttt, lora, docs, sheet):
    """One batch of documents, chunk by chunk: the chunk's losses are booked, then the adapters learn from them."""
    lora.reset()
    opt = make_lora_optimizer(h, lora)
    pred = [n - 1 for _, n in docs]
    num_chunks = [(p + h.ttt_chunk - 1) // h.ttt_chunk for p in pred]
    for ci in range(max(num_chunks)):
        x, y, before, offs, lens = gather_chunk(h, device, val_data.tokens, docs, pred, num_chunks, ci)
        mask = chunk_mask(x.size(1), offs, lens)
        more = torch.tensor([float(ci < n - 1) for n in num_chunks], device=device)
        train_now = any(ci < n - 1 for n in num_chunks)
        with torch.set_grad_enabled(train_now):
            nll = forward_ttt(x, y, before, lora)
        with torch.no_grad():
            sheet.add(nll.detach(), x, y, mask)
        if not train_now:
            continue
        for g in range(h.ttt_grad_steps):
            if g > 0:
                nll = forward_ttt(x, y, before, lora)
            per_doc = (nll * mask).sum(dim=1) / lens.clamp_min(1)
            loss = (per_doc * more).sum()
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()


def score_group(h, device, val_data, model, forward_ttt, docs, sheet, label):
    batches = length_batches(h, docs)
    t0 = time.perf_counter()
    loras = {}
    for i, batch in enumerate(batches):
        if i % h.world_size != h.rank:
            continue
        if len(batch) not in loras:
            loras[len(batch)] = BatchedTTTLoRA(len(batch), model, h).to(device)
        score_batch(h, device, val_data, forward_ttt, loras[len(batch)], batch, sheet)
        if i % (h.world_size * 8) == 0:
            running = (sheet.loss / sheet.bytes.clamp_min(1.0)).item() / math.log(2.0)
            log(
                f"{label}: batch {i + 1}/{len(batches)} longest:{batch[0][1]} rank0_bpb:{running:.5f} "
                f"time:{time.perf_counter() - t0:.1f}s"
            )
    if h.distributed:
        dist.barrier()


def global_sgd_on_scored(h, device, val_data, model, docs, phase):
    """Trains the base weights on documents that all have been scored. The same step on every rank."""
    seq = h.eval_seq_len
    rows = []
    for start, n in docs:
        for s in range(0, n - 1, seq):
            rows.append((start + s, min(seq, n - 1 - s)))
    random.Random(h.seed + phase).shuffle(rows)
    params = [p for p in model.parameters()]
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=h.global_lr, momentum=h.global_momentum)
    per_step = h.global_rows * h.world_size
    steps = h.global_epochs * ((len(rows) + per_step - 1) // per_step)
    done = 0
    for _ in range(h.global_epochs):
        for at in range(0, len(rows), per_step):
            step_rows = rows[at : at + per_step]
            mine = step_rows[h.rank :: h.world_size]
            count = sum(n for _, n in step_rows)
            lr = h.global_lr * 0.5 * (1.0 + math.cos(math.pi * done / steps))
            for group in opt.param_groups:
                group["lr"] = lr
            opt.zero_grad(set_to_none=False)
            for lo, n in mine:
                chunk = val_data.tokens[lo : lo + n + 1].to(device=device, dtype=torch.int64)
                (model.token_losses(chunk[None, :-1], chunk[None, 1:]).sum() / count).backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            average_grads(h, params, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            done += 1
    for p in params:
        p.requires_grad_(False)
        p.grad = None
    log(f"global_sgd: phase {phase} docs:{len(docs)} rows:{len(rows)} steps:{done}")


def warm_ttt(h, device, model, forward_ttt):
    """Compiles forward and backward on made-up tokens, with an adapter that is thrown away."""
    lora = BatchedTTTLoRA(h.ttt_batch, model, h).to(device)
    opt = make_lora_optimizer(h, lora)
    gen = torch.Generator(device="cpu").manual_seed(0)
    for width in (h.ttt_chunk, h.ttt_chunk * 4, h.eval_seq_len):
        ids = torch.randint(2, h.vocab_size, (h.ttt_batch, width + 1), generator=gen).to(device)
        nll = forward_ttt(ids[:, :-1], ids[:, 1:], ids[:, 0], lora)
        opt.zero_grad(set_to_none=True)
        nll.mean().backward()
        opt.step()
    with torch.no_grad():
        forward_ttt(ids[:, :-1], ids[:, 1:], ids[:, 0], lora)


def eval_val_ttt_lora(h, device, val_data, model, forward_ttt):
    """Adapters only: every document from the same base weights."""
    sheet = ScoreSheet(h, device, val_data)
    docs = find_docs(val_data.tokens)
    score_group(h, device, val_data, model, forward_ttt, docs, sheet, "ttt_lora")
    return sheet.finish()


def eval_val_ttt_phased(h, device, val_data, model, forward_ttt):
    """Adapters, and between the groups of documents a global phase on the group that was just scored."""
    sheet = ScoreSheet(h, device, val_data)
    groups = split_phases(h, find_docs(val_data.tokens))
    log(f"ttt_phased: groups {[len(g) for g in groups]}")
    for phase, group in enumerate(groups):
        score_group(h, device, val_data, model, forward_ttt, group, sheet, f"ttt_phased[{phase}]")
        if phase + 1 < len(groups):
            global_sgd_on_scored(h, device, val_data, model, group, phase)
    return sheet.finish()


# ----------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------


class Ema:
    def __init__(self, model, decay):
        self.decay = decay
        self.state = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for n, t in model.state_dict().items():
            self.state[n].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)


class Trainer:
    def __init__(self, h, device):
        self.h, self.device = h, device
        self.model = GPT(h).to(device).float()
        if h.distributed:
            for p in self.model.parameters():
                dist.broadcast(p.data, src=0)
        self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
        self.opts = Optimizers(h, self.model)
        self.params = list(self.model.parameters())
        self.loader = ShuffledShardLoader(h, device)
        self.cap_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)

    def scale_at(self, step, elapsed_ms):
        frac = max(step / max(self.h.iterations, 1), elapsed_ms / max(self.cap_ms, 1e-9))
        left = max(0.0, 1.0 - frac)
        if left >= self.h.warmdown_frac:
            return 1.0
        return max(self.h.min_lr, left / self.h.warmdown_frac)

    def momentum_at(self, step):
        f = min(1.0, step / max(1, self.h.muon_momentum_steps))
        return (1.0 - f) * self.h.muon_momentum_start + f * self.h.muon_momentum

    def train_step(self, step, scale):
        h = self.h
        self.opts.zero_grad()
        total = torch.zeros((), device=self.device)
        for _ in range(h.grad_accum_steps):
            x, y = self.loader.next_batch(h.train_batch_tokens // h.grad_accum_steps)
            loss = self.compiled(x, y) / h.grad_accum_steps
            loss.backward()
            total += loss.detach()
        average_grads(h, self.params)
        if h.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.params, h.grad_clip)
        self.opts.set_scale(scale, self.momentum_at(step))
        self.opts.step()
        return total

    def warmup(self):
        """Compiles both layouts, then puts everything back as it was."""
        if self.h.warmup_steps <= 0:
            return
        weights = {n: t.detach().cpu().clone() for n, t in self.model.state_dict().items()}
        opt_states = [copy.deepcopy(o.state_dict()) for o in self.opts.all]
        for looping in (False, True):
            self.model.looping = looping and self.h.num_loops > 0
            for s in range(self.h.warmup_steps // 2):
                self.train_step(s, 1.0)
        self.model.looping = False
        self.model.load_state_dict(weights)
        for o, s in zip(self.opts.all, opt_states):
            o.load_state_dict(s)
        self.opts.zero_grad()
        self.loader = ShuffledShardLoader(self.h, self.device)
        log(f"warmup: {self.h.warmup_steps} steps, state restored")

    def run(self, val_data):
        """Returns the averaged weights, and the perf_counter time at which the 600 s are over."""
        h = self.h
        self.warmup()
        ema = Ema(self.model, h.ema_decay)
        train_ms, stop_at, step = 0.0, None, 0
        self.model.train()
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        while True:
            last = step == h.iterations or (stop_at is not None and step >= stop_at)
            if not last and h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0:
                torch.cuda.synchronize()
                train_ms += 1000.0 * (time.perf_counter() - t0)
                val_loss, val_bpb, _ = eval_val(h, self.device, val_data, self.model)
                log(f"step:{step} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{train_ms:.0f}ms")
                torch.cuda.synchronize()
                t0 = time.perf_counter()
            if last:
                torch.cuda.synchronize()
                train_ms += 1000.0 * (time.perf_counter() - t0)
                break
            elapsed = train_ms + 1000.0 * (time.perf_counter() - t0)
            if not self.model.looping and h.num_loops > 0 and elapsed >= h.enable_looping_at * self.cap_ms:
                self.model.looping = True
                log(f"looping on: step:{step} elapsed:{elapsed:.0f}ms")
            loss = self.train_step(step, self.scale_at(step, elapsed))
            ema.update(self.model)
            step += 1
            elapsed = train_ms + 1000.0 * (time.perf_counter() - t0)
            if step <= 5 or step % h.train_log_every == 0:
                log(f"step:{step}/{h.iterations} train_loss:{loss.item():.4f} train_time:{elapsed:.0f}ms")
            if stop_at is None:
                over = torch.tensor(float(elapsed >= self.cap_ms), device=self.device)
                if h.distributed:
                    dist.all_reduce(over, op=dist.ReduceOp.MAX)
                if over.item() > 0:
                    stop_at = step
                    log(f"stopping_early: wallclock_cap train_time:{elapsed:.0f}ms step:{step}")
        log(f"training: {step} steps in {train_ms:.0f}ms, average step {train_ms / max(step, 1):.2f}ms")
        log(f"peak memory: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
        deadline = time.perf_counter() + h.max_wallclock_seconds - train_ms / 1000.0
        return ema.state, deadline


def build_artifact(h, device, val_data):
    """Train, average, calibrate (inside the reserve), quantise, write."""
    trainer = Trainer(h, device)
    log(f"model_params:{sum(p.numel() for p in trainer.params)}")
    averaged, deadline = trainer.run(val_data)
    model = trainer.model
    model.load_state_dict({n: t.to(model.state_dict()[n].dtype) for n, t in averaged.items()})
    model.looping = h.num_loops > 0
    t0 = time.perf_counter()
    margin = 2.0
    hessians, batches = collect_hessians(h, model, trainer.loader, deadline - margin)
    log(f"gptq: {batches} training batches in {time.perf_counter() - t0:.1f}s, {deadline - time.perf_counter():.1f}s left")
    if batches == 0:
        raise RuntimeError("no time left for calibration, raise GPTQ_RESERVE_SECONDS")
    val_loss, val_bpb, _ = eval_val(h, device, val_data, model)
    log(f"pre_quant val_loss:{val_loss:.6f} val_bpb:{val_bpb:.6f}")
    serialize(h, model.state_dict(), hessians)


def final_eval(h, device, val_data):
    """The reported number, from the artifact on disk. One clock for everything in here."""
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    model = deserialize(h, device)
    for p in model.parameters():
        p.requires_grad_(False)
    if h.eval_mode == "sliding":
        result = eval_val_sliding(h, device, val_data, model)
    else:
        forward_ttt = torch.compile(model.forward_ttt, dynamic=True)
        warm_ttt(h, device, model, forward_ttt)
        run = eval_val_ttt_phased if h.eval_mode == "ttt_phased" else eval_val_ttt_lora
        result = run(h, device, val_data, model, forward_ttt)
    val_loss, val_bpb, scored = result
    torch.cuda.synchronize()
    seconds = time.perf_counter() - t0
    log(f"quantized_{h.eval_mode} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{1000.0 * seconds:.0f}ms")
    log(f"scored tokens: {scored} of {val_data.tokens.numel() - 1}")
    return val_bpb


def main():
    h = Hyperparameters()
    if not torch.cuda.is_available():
        raise RuntimeError("needs CUDA")
    if 8 % h.world_size != 0:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8")
    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group("nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    set_logging(h)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"python {sys.version.split()[0]} torch {torch.__version__} world_size:{h.world_size} seed:{h.seed}")
    for k in sorted(k for k in vars(Hyperparameters) if not k.startswith("_")):
        log(f"  {k}: {getattr(h, k)}", console=False)
    val_data = ValidationData(h, device)
    log(f"val: {val_data.tokens.numel()} tokens, train shards: {len(glob.glob(h.train_files))}")
    build_artifact(h, device, val_data)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    final_eval(h, device, val_data)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
