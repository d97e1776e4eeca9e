"""
train_gpt.py -- my fork of the parameter-golf baseline.

What is different from the baseline:
  * 10 layers, 3x MLP, hashed bigram embedding, partial rope
  * SWA over the warmdown instead of EMA
  * GPTQ with Hessians from the training shards (inside the 600 s): int8 embeddings, int6 attention, int5 MLP
  * zstd-22 for the packed file
  * sliding window evaluation (stride 64) and a score-first TTT pass, which gives the final number

Everything is in this one file. Run with
    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

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
# SETTINGS (all of them can be set from the environment)
# -----------------------------


def env_int(name, default):
    return int(os.environ.get(name, default))


def env_float(name, default):
    return float(os.environ.get(name, default))


def env_flag(name, default):
    return bool(int(os.environ.get(name, default)))


RUN_ID = os.environ.get("RUN_ID", str(uuid.uuid4()))
SEED = env_int("SEED", 1337)

# data
DATA_PATH = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
TRAIN_FILES = os.path.join(DATA_PATH, "fineweb_train_*.bin")
VAL_FILES = os.path.join(DATA_PATH, "fineweb_val_*.bin")
TOKENIZER_PATH = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
BOS_ID = 1

# training length
ITERATIONS = env_int("ITERATIONS", 20000)
WARMDOWN_ITERS = env_int("WARMDOWN_ITERS", 3000)
WARMUP_STEPS = env_int("WARMUP_STEPS", 20)
TRAIN_BATCH_TOKENS = env_int("TRAIN_BATCH_TOKENS", 786432)
TRAIN_SEQ_LEN = env_int("TRAIN_SEQ_LEN", 2048)
VAL_LOSS_EVERY = env_int("VAL_LOSS_EVERY", 2000)
TRAIN_LOG_EVERY = env_int("TRAIN_LOG_EVERY", 200)
MAX_WALLCLOCK_SECONDS = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
# these seconds are taken off the end of training, so that calibration and GPTQ are done before 600 s
QUANT_RESERVE_SECONDS = env_float("QUANT_RESERVE_SECONDS", 24.0)

# model
VOCAB_SIZE = env_int("VOCAB_SIZE", 1024)
NUM_LAYERS = env_int("NUM_LAYERS", 10)
MODEL_DIM = env_int("MODEL_DIM", 512)
NUM_HEADS = env_int("NUM_HEADS", 8)
NUM_KV_HEADS = env_int("NUM_KV_HEADS", 4)
MLP_MULT = env_int("MLP_MULT", 3)
ROPE_DIMS = env_int("ROPE_DIMS", 32)
ROPE_BASE = env_float("ROPE_BASE", 10000.0)
LOGIT_SOFTCAP = env_float("LOGIT_SOFTCAP", 30.0)
QK_GAIN_INIT = env_float("QK_GAIN_INIT", 1.5)
TIED_EMBED_INIT_STD = env_float("TIED_EMBED_INIT_STD", 0.005)
BIGRAM_BUCKETS = env_int("BIGRAM_BUCKETS", 4096)
BIGRAM_DIM = env_int("BIGRAM_DIM", 96)

# optimizer
TIED_EMBED_LR = env_float("TIED_EMBED_LR", 0.03)
MATRIX_LR = env_float("MATRIX_LR", 0.02)
SCALAR_LR = env_float("SCALAR_LR", 0.02)
MUON_MOMENTUM = env_float("MUON_MOMENTUM", 0.99)
MUON_MOMENTUM_WARMUP_START = env_float("MUON_MOMENTUM_WARMUP_START", 0.92)
MUON_MOMENTUM_WARMUP_STEPS = env_int("MUON_MOMENTUM_WARMUP_STEPS", 1500)
MUON_BACKEND_STEPS = env_int("MUON_BACKEND_STEPS", 5)
MUON_WD = env_float("MUON_WD", 0.04)
ADAM_WD = env_float("ADAM_WD", 0.01)
BETA1 = env_float("BETA1", 0.9)
BETA2 = env_float("BETA2", 0.95)
ADAM_EPS = env_float("ADAM_EPS", 1e-8)
GRAD_CLIP_NORM = env_float("GRAD_CLIP_NORM", 0.3)

# SWA
SWA_ENABLED = env_flag("SWA_ENABLED", "1")
SWA_START_FRAC = env_float("SWA_START_FRAC", 0.4)
SWA_EVERY = env_int("SWA_EVERY", 50)

# quantisation
ATTN_BITS = env_int("ATTN_BITS", 6)
MLP_BITS = env_int("MLP_BITS", 5)
EMBED_BITS = env_int("EMBED_BITS", 8)
GPTQ_BATCHES = env_int("GPTQ_BATCHES", 16)
GPTQ_BATCH_SEQS = env_int("GPTQ_BATCH_SEQS", 8)
GPTQ_BLOCK = env_int("GPTQ_BLOCK", 128)
GPTQ_DAMP = env_float("GPTQ_DAMP", 0.01)
ZSTD_LEVEL = env_int("ZSTD_LEVEL", 22)
SIZE_LIMIT = 16_000_000
PACKED_PATH = "final_model.int568.ptz"

# evaluation
EVAL_SEQ_LEN = env_int("EVAL_SEQ_LEN", 2048)
EVAL_STRIDE = env_int("EVAL_STRIDE", 64)
EVAL_BATCH_WINDOWS = env_int("EVAL_BATCH_WINDOWS", 32)
EVAL_BUDGET_SECONDS = env_float("EVAL_BUDGET_SECONDS", 600.0)
EVAL_TEMPERATURE = env_float("EVAL_TEMPERATURE", 1.0)

# test time training, score first
TTT_ENABLED = env_flag("TTT_ENABLED", "1")
TTT_CHUNK_SEGMENTS = env_int("TTT_CHUNK_SEGMENTS", 512)  # x stride 64 = 32768 tokens a chunk
TTT_EPOCHS = env_int("TTT_EPOCHS", 3)
TTT_LR = env_float("TTT_LR", 0.002)
TTT_MOMENTUM = env_float("TTT_MOMENTUM", 0.9)
TTT_BATCH_SEQS = env_int("TTT_BATCH_SEQS", 4)
TTT_GRAD_CLIP = env_float("TTT_GRAD_CLIP", 1.0)
TTT_FREEZE_BLOCKS = env_int("TTT_FREEZE_BLOCKS", 2)
# once so many seconds of the evaluation are over, the model is only scored and no longer trained
TTT_STOP_SECONDS = env_float("TTT_STOP_SECONDS", 520.0)

CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "bigram_scale")

# -----------------------------
# DISTRIBUTED AND LOGGING
# -----------------------------

RANK = env_int("RANK", 0)
WORLD_SIZE = env_int("WORLD_SIZE", 1)
LOCAL_RANK = env_int("LOCAL_RANK", 0)
DISTRIBUTED = "RANK" in os.environ and "WORLD_SIZE" in os.environ
MASTER = RANK == 0
LOGFILE = f"logs/{RUN_ID}.txt"


def log0(msg, console=True):
    if not MASTER:
        return
    if console:
        print(msg, flush=True)
    with open(LOGFILE, "a", encoding="utf-8") as f:
        print(msg, file=f)


def barrier():
    if DISTRIBUTED:
        dist.barrier()


def all_sum(t):
    if DISTRIBUTED:
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return t


# -----------------------------
# MUON (from the baseline, plus weight decay)
# -----------------------------


def zeropower_via_newtonschulz5(G, steps=10, eps=1e-7):
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
    def __init__(self, params, lr, momentum, backend_steps, weight_decay=0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            lr = group["lr"]
            momentum = group["momentum"]
            total = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % WORLD_SIZE == RANK and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            all_sum(updates_flat)
            curr = 0
            for p in params:
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                curr += p.numel()


# -----------------------------
# TOKENIZER BYTES
# -----------------------------


def build_sentencepiece_luts(sp, vocab_size, device):
    """Bytes of every piece without its leading space, whether it has one, and whether it is a control token."""
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


def token_bytes(prev_ids, tgt_ids, luts):
    """UTF-8 bytes that each target token stands for in the original text."""
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    n = base_bytes_lut[tgt_ids].to(torch.int16)
    n += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(torch.int16)
    return n.to(torch.float64)


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file):
    header_bytes = 256 * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * np.dtype("<u2").itemsize
    if Path(file).stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # the whole split, in order, nothing cut off
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


class TokenStream:
    """Reads the shards one after the other and starts again at the end."""

    def __init__(self, pattern):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.file_idx = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def _advance_file(self):
        self.file_idx = (self.file_idx + 1) % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
        self.pos = 0

    def take(self, n):
        chunks = []
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
    """Every call takes one span off the stream for each rank; this rank uses its own."""

    def __init__(self, pattern, device):
        self.device = device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens, seq_len, grad_accum_steps):
        local_tokens = global_tokens // (WORLD_SIZE * grad_accum_steps)
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * WORLD_SIZE)
        start = RANK * per_rank_span
        local = chunk[start : start + per_rank_span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    # weights stay fp32 for the optimizer and are cast for the matmul
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, seq_len, device, dtype):
        t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
        freqs = torch.outer(t, self.inv_freq.to(device))
        return freqs.cos()[None, None].to(dtype), freqs.sin()[None, None].to(dtype)


def apply_rotary_emb(x, cos, sin):
    # only the first ROPE_DIMS of every head are turned
    rot, rest = x[..., :ROPE_DIMS], x[..., ROPE_DIMS:]
    half = ROPE_DIMS // 2
    x1, x2 = rot[..., :half], rot[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj.zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), QK_GAIN_INIT, dtype=torch.float32))
        self.rotary = Rotary(ROPE_DIMS, ROPE_BASE)

    def forward(self, x):
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
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, dim, mult):
        super().__init__()
        self.fc = CastedLinear(dim, mult * dim, bias=False)
        self.proj = CastedLinear(mult * dim, dim, bias=False)
        self.proj.zero_init = True

    def forward(self, x):
        x = F.leaky_relu(self.fc(x), negative_slope=0.5)
        return self.proj(x.square())


class BigramHash(nn.Module):
    """A learned vector for the hashed pair (token before, token). At a document's start the pair is (BOS, BOS)."""

    def __init__(self, buckets, dim, model_dim):
        super().__init__()
        self.buckets = buckets
        self.embed = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.embed.weight)
        self.up = CastedLinear(dim, model_dim, bias=False)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def forward(self, ids):
        prev = F.pad(ids[:, :-1], (1, 0), value=BOS_ID)
        prev = torch.where(ids == BOS_ID, torch.full_like(prev, BOS_ID), prev)
        h = (prev * 36313 + ids * 27191) % self.buckets
        return self.up(self.embed(h)) * self.bigram_scale


class Block(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, mlp_mult):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x, x0):
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(self.attn_norm(x))
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_emb = nn.Embedding(VOCAB_SIZE, MODEL_DIM)
        self.bigram = BigramHash(BIGRAM_BUCKETS, BIGRAM_DIM, MODEL_DIM)
        self.num_encoder_layers = NUM_LAYERS // 2
        self.num_decoder_layers = NUM_LAYERS - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, MODEL_DIM, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(MODEL_DIM, NUM_HEADS, NUM_KV_HEADS, MLP_MULT) for _ in range(NUM_LAYERS)])
        self.final_norm = RMSNorm()
        self.init_weights()

    def init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=TIED_EMBED_INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, input_ids):
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0)
        return self.final_norm(x)

    def forward_logits(self, input_ids):
        logits = F.linear(self.hidden(input_ids), self.tok_emb.weight.to(torch.bfloat16))
        return LOGIT_SOFTCAP * torch.tanh(logits / LOGIT_SOFTCAP)

    def forward(self, input_ids, target_ids):
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1))


def new_model(device):
    model = GPT().to(device).bfloat16()
    restore_fp32_params(model)
    return model


def restore_fp32_params(model):
    # matrices of the linears and all small control tensors are kept in fp32
    for module in model.modules():
        if isinstance(module, (CastedLinear, Rotary)):
            module.float()
    for name, p in model.named_parameters():
        if (p.ndim < 2 or any(c in name for c in CONTROL_NAMES)) and p.dtype != torch.float32:
            p.data = p.data.float()


# -----------------------------
# GPTQ
# -----------------------------


def bits_for(name):
    """int8 embeddings, int6 attention, int5 MLP; None for what is kept in fp16."""
    if "tok_emb" in name or "bigram" in name:
        return EMBED_BITS
    if ".attn." in name:
        return ATTN_BITS
    if ".mlp." in name:
        return MLP_BITS
    return None


def collect_hessians(model, loader, deadline, device):
    """X^T X of the inputs of every block linear, over batches of the TRAINING shards. Stops at the deadline."""
    hessians = {}
    counts = torch.zeros(1, device=device, dtype=torch.float64)
    hooks = []

    def make_hook(name):
        def hook(module, inputs, output):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            hessians[name].addmm_(x.T, x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and "blocks." in name:
            hessians[name] = torch.zeros(module.in_features, module.in_features, device=device)
            hooks.append(module.register_forward_hook(make_hook(name)))
    model.eval()
    with torch.inference_mode():
        for _ in range(GPTQ_BATCHES):
            if time.perf_counter() >= deadline:
                break
            x, _ = loader.next_batch(GPTQ_BATCH_SEQS * TRAIN_SEQ_LEN * WORLD_SIZE, TRAIN_SEQ_LEN, 1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.hidden(x)
            counts += x.numel()
    for h in hooks:
        h.remove()
    all_sum(counts)
    for name in sorted(hessians):
        all_sum(hessians[name])
        hessians[name] /= counts.clamp_min(1.0).float()
    model.train()
    return hessians, int(counts.item())


def row_scales(W, bits):
    """One scale per row: of a few clipping shares the one with the smallest squared error of the weights."""
    qmax = 2 ** (bits - 1) - 1
    amax = W.abs().amax(dim=1).clamp_min(1e-8)
    best_scale = amax / qmax
    best_err = torch.full_like(amax, float("inf"))
    for share in (1.0, 0.97, 0.94, 0.9, 0.86, 0.82):
        s = (amax * share / qmax).half().float().clamp_min(1e-7)
        q = (W / s[:, None]).round().clamp(-qmax - 1, qmax)
        err = (q * s[:, None] - W).square().sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, s, best_scale)
    return best_scale


def quantize_plain(W, bits):
    W = W.float()
    qmax = 2 ** (bits - 1) - 1
    s = row_scales(W, bits).half()
    q = (W / s.float()[:, None]).round().clamp(-qmax - 1, qmax).to(torch.int8)
    return q, s


def quantize_gptq(W, H, bits):
    """Column by column; the error of each column is carried into those that follow."""
    W = W.float().clone()
    rows, cols = W.shape
    qmax = 2 ** (bits - 1) - 1
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    perm = torch.argsort(torch.diag(H), descending=True)
    inv_perm = torch.argsort(perm)
    W = W[:, perm]
    H = H[perm][:, perm]
    H += torch.eye(cols, device=H.device) * (GPTQ_DAMP * torch.diag(H).mean())
    try:
        Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    except torch.linalg.LinAlgError:
        log0("gptq: cholesky failed, plain rounding for this matrix")
        return quantize_plain(W[:, inv_perm], bits)
    s = row_scales(W, bits).half().float()
    Q = torch.zeros_like(W)
    for b0 in range(0, cols, GPTQ_BLOCK):
        b1 = min(b0 + GPTQ_BLOCK, cols)
        Wb = W[:, b0:b1].clone()
        Err = torch.zeros_like(Wb)
        Hb = Hinv[b0:b1, b0:b1]
        for j in range(b1 - b0):
            w = Wb[:, j]
            q = (w / s).round().clamp(-qmax - 1, qmax)
            Q[:, b0 + j] = q
            e = (w - q * s) / Hb[j, j]
            Wb[:, j:] -= e[:, None] * Hb[j, j:][None, :]
            Err[:, j] = e
        W[:, b1:] -= Err @ Hinv[b0:b1, b1:]
    return Q[:, inv_perm].to(torch.int8), s.half()


def quantize_state_dict(model, hessians):
    """name -> tensors to be packed, and what was done to each."""
    packed, how = {}, {}
    for name, t in model.state_dict().items():
        t = t.detach()
        bits = bits_for(name) if t.ndim == 2 and not any(c in name for c in CONTROL_NAMES) else None
        if bits is None:
            packed[name] = t.half().cpu() if t.is_floating_point() else t.cpu()
            how[name] = "raw"
            continue
        module_name = name.removesuffix(".weight")
        if module_name in hessians:
            q, s = quantize_gptq(t, hessians[module_name], bits)
        else:
            q, s = quantize_plain(t, bits)
        packed[name + ".q"] = q.cpu().contiguous()
        packed[name + ".s"] = s.cpu().contiguous()
        how[name] = f"int{bits}"
    return packed, how


def dequantize_state_dict(packed, how, template):
    out = {}
    for name, kind in how.items():
        if kind == "raw":
            t = packed[name]
        else:
            t = packed[name + ".q"].float() * packed[name + ".s"].float()[:, None]
        out[name] = t.to(template[name].dtype)
    return out


def write_packed(packed, how, path):
    buf = io.BytesIO()
    torch.save({"w": packed, "m": how}, buf)
    raw = buf.getvalue()
    blob = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(raw)
    with open(path, "wb") as f:
        f.write(blob)
    log0(f"packed: raw {len(raw)} bytes -> zstd-{ZSTD_LEVEL} {len(blob)} bytes")
    return len(blob)


def read_packed(path, template):
    with open(path, "rb") as f:
        raw = zstandard.ZstdDecompressor().decompress(f.read())
    obj = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return dequantize_state_dict(obj["w"], obj["m"], template)


# -----------------------------
# EVALUATION
# -----------------------------


def make_segments(num_targets, seq_len, stride):
    """Cuts the targets 0..num_targets into (start, a, b): the window val[start:b+1] scores the targets a..b.

    Every target lies in exactly one [a, b). The first segment is one whole window, the others have `stride` targets
    and the context that still fits.
    """
    segments = []
    first = min(seq_len, num_targets)
    segments.append((0, 0, first))
    a = first
    while a < num_targets:
        b = min(a + stride, num_targets)
        segments.append((max(0, b - seq_len), a, b))
        a = b
    return segments


def token_nll(logits, targets):
    """-log p of each target under the softmax over the whole vocabulary."""
    logits = logits.float() / EVAL_TEMPERATURE
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="none").view_as(targets)


def score_segments(logits_fn, val_tokens, segments, luts, sums, device):
    """Adds loss, tokens and bytes of this rank's share of the segments to sums = [loss, tokens, bytes]."""
    mine = segments[RANK::WORLD_SIZE]
    i = 0
    while i < len(mine):
        # windows of a batch have one length (only a very short split has shorter ones)
        length = mine[i][2] - mine[i][0]
        batch = []
        while i < len(mine) and len(batch) < EVAL_BATCH_WINDOWS and mine[i][2] - mine[i][0] == length:
            batch.append(mine[i])
            i += 1
        rows = torch.stack([val_tokens[start : b + 1] for start, _, b in batch]).to(device=device, dtype=torch.int64)
        x, y = rows[:, :-1], rows[:, 1:]
        with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x)
        nll = token_nll(logits, y)
        n_bytes = token_bytes(x, y, luts)
        for j, (start, a, b) in enumerate(batch):
            lo, hi = a - start, b - start
            sums[0] += nll[j, lo:hi].to(torch.float64).sum()
            sums[1] += hi - lo
            sums[2] += n_bytes[j, lo:hi].sum()


def finish_sums(sums, expect_tokens):
    """(nats per token, bits per byte) of all ranks together."""
    all_sum(sums)
    loss_sum, tok_sum, byte_sum = sums.tolist()
    if int(tok_sum) != expect_tokens:
        raise RuntimeError(f"scored {int(tok_sum)} tokens, the split has {expect_tokens}")
    return loss_sum / tok_sum, loss_sum / math.log(2.0) / byte_sum


def eval_val(model, logits_fn, val_tokens, luts, device, stride, seq_len):
    """Scores the whole split with a fixed model. stride == seq_len: no overlap (quick, for the training log)."""
    was_training = model.training
    model.eval()
    num_targets = val_tokens.numel() - 1
    segments = make_segments(num_targets, seq_len, stride)
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    score_segments(logits_fn, val_tokens, segments, luts, sums, device)
    if was_training:
        model.train()
    return finish_sums(sums, num_targets)


def ttt_parameters(model):
    """All parameters but the embeddings and the first blocks."""
    frozen = tuple(f"blocks.{i}." for i in range(TTT_FREEZE_BLOCKS)) + ("tok_emb.", "bigram.")
    params = []
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
        if p.requires_grad:
            params.append(p)
    return params


def ttt_train_chunk(model, optimizer, params, val_tokens, lo, hi, seq_len, device):
    """A few epochs of SGD on the targets lo..hi, which have all been scored already."""
    starts = list(range(lo, hi - 1, seq_len))
    model.train()
    for _ in range(TTT_EPOCHS):
        for i in range(0, len(starts), TTT_BATCH_SEQS * WORLD_SIZE):
            group = starts[i : i + TTT_BATCH_SEQS * WORLD_SIZE]
            mine = group[RANK::WORLD_SIZE]
            optimizer.zero_grad(set_to_none=False)
            n_tok = torch.zeros(1, device=device)
            for s in mine:
                e = min(s + seq_len, hi)
                row = val_tokens[s : e + 1].to(device=device, dtype=torch.int64)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(row[None, :-1], row[None, 1:])
                (loss * (e - s)).backward()
                n_tok += e - s
            all_sum(n_tok)
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                all_sum(p.grad)
                p.grad.div_(n_tok.to(p.grad.dtype).clamp_min(1.0))
            torch.nn.utils.clip_grad_norm_(params, TTT_GRAD_CLIP)
            optimizer.step()
    model.eval()


def eval_val_ttt(model, val_tokens, luts, device, stride, seq_len, eval_t0):
    """Score first, then train: chunk c is scored by the model that has been trained on the chunks before c only."""
    num_targets = val_tokens.numel() - 1
    segments = make_segments(num_targets, seq_len, stride)
    chunks = [segments[i : i + TTT_CHUNK_SEGMENTS] for i in range(0, len(segments), TTT_CHUNK_SEGMENTS)]
    params = ttt_parameters(model)
    optimizer = torch.optim.SGD(params, lr=TTT_LR, momentum=TTT_MOMENTUM)
    log0(f"ttt: {len(chunks)} chunks, {sum(p.numel() for p in params)} trainable params, {TTT_EPOCHS} epochs a chunk")
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    stopped = False
    model.eval()
    for c, chunk in enumerate(chunks):
        # 1. score the chunk, the losses are final from here on
        score_segments(model.forward_logits, val_tokens, chunk, luts, sums, device)
        if c % 100 == 0:
            part = all_sum(sums.clone()).tolist()
            log0(
                f"ttt: chunk {c}/{len(chunks)} running_bpb:{part[0] / math.log(2.0) / max(part[2], 1.0):.5f} "
                f"time:{time.perf_counter() - eval_t0:.1f}s"
            )
        # 2. train on it (not on the last one, nobody would use it)
        if c == len(chunks) - 1:
            break
        if not stopped:
            late = torch.tensor(float(time.perf_counter() - eval_t0 > TTT_STOP_SECONDS), device=device)
            stopped = bool(all_sum(late).item() > 0)
            if stopped:
                log0(f"ttt: no more training after chunk {c}, time is nearly over")
        if stopped:
            continue
        for group in optimizer.param_groups:
            group["lr"] = TTT_LR * 0.5 * (1.0 + math.cos(math.pi * c / len(chunks)))
        lo, hi = chunk[0][1], chunk[-1][2]
        ttt_train_chunk(model, optimizer, params, val_tokens, lo, hi, seq_len, device)
    for p in model.parameters():
        p.requires_grad_(True)
    return finish_sums(sums, num_targets)


# -----------------------------
# MAIN
# -----------------------------


def main():
    global zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # ---- set up the machine
    if WORLD_SIZE <= 0 or 8 % WORLD_SIZE != 0:
        raise ValueError(f"WORLD_SIZE={WORLD_SIZE} must divide 8, so that the batch can be cut into whole parts")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    grad_accum_steps = 8 // WORLD_SIZE
    grad_scale = 1.0 / grad_accum_steps
    device = torch.device("cuda", LOCAL_RANK)
    torch.cuda.set_device(device)
    if DISTRIBUTED:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if MASTER:
        os.makedirs("logs", exist_ok=True)
        print(LOGFILE)
    barrier()
    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(
        subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False).stdout,
        console=False,
    )
    log0("=" * 100, console=False)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.cuda.manual_seed_all(SEED)

    # ---- tokenizer and validation data
    sp = spm.SentencePieceProcessor(model_file=TOKENIZER_PATH)
    if int(sp.vocab_size()) != VOCAB_SIZE:
        raise ValueError(f"VOCAB_SIZE={VOCAB_SIZE} does not match the tokenizer's {int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(VAL_FILES)
    luts = build_sentencepiece_luts(sp, VOCAB_SIZE, device)
    log0(f"tokenizer: {TOKENIZER_PATH} vocab {VOCAB_SIZE}")
    log0(f"train shards: {len(glob.glob(TRAIN_FILES))} pattern {TRAIN_FILES}")
    log0(f"val shards: {VAL_FILES} tokens:{val_tokens.numel() - 1}")

    # ---- model
    base_model = new_model(device)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled_model, device_ids=[LOCAL_RANK], broadcast_buffers=False) if DISTRIBUTED else compiled_model
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{WORLD_SIZE} grad_accum_steps:{grad_accum_steps} seed:{SEED}")
    log0(f"layers:{NUM_LAYERS} dim:{MODEL_DIM} heads:{NUM_HEADS} kv_heads:{NUM_KV_HEADS} mlp_mult:{MLP_MULT}")

    # ---- optimizers
    def is_control(name, p):
        return p.ndim < 2 or any(c in name for c in CONTROL_NAMES)

    matrix_params, scalar_params, embed_params = [], [], []
    for name, p in base_model.named_parameters():
        if is_control(name, p):
            scalar_params.append(p)
        elif "tok_emb" in name or "bigram.embed" in name:
            embed_params.append(p)
        else:
            matrix_params.append(p)
    opt_embed = torch.optim.AdamW(
        [{"params": embed_params, "lr": TIED_EMBED_LR, "base_lr": TIED_EMBED_LR}],
        betas=(BETA1, BETA2),
        eps=ADAM_EPS,
        weight_decay=ADAM_WD,
        fused=True,
    )
    opt_muon = Muon(
        matrix_params, lr=MATRIX_LR, momentum=MUON_MOMENTUM, backend_steps=MUON_BACKEND_STEPS, weight_decay=MUON_WD
    )
    for group in opt_muon.param_groups:
        group["base_lr"] = MATRIX_LR
    opt_scalar = torch.optim.AdamW(
        [{"params": scalar_params, "lr": SCALAR_LR, "base_lr": SCALAR_LR}],
        betas=(BETA1, BETA2),
        eps=ADAM_EPS,
        weight_decay=0.0,
        fused=True,
    )
    optimizers = [opt_embed, opt_muon, opt_scalar]
    log0(f"params: embed {sum(p.numel() for p in embed_params)} matrix {sum(p.numel() for p in matrix_params)}")
    log0(f"lrs: embed {TIED_EMBED_LR} matrix {MATRIX_LR} scalar {SCALAR_LR} muon_wd {MUON_WD} adam_wd {ADAM_WD}")

    # ---- little helpers of the training loop
    train_loader = DistributedTokenLoader(TRAIN_FILES, device)
    max_train_ms = 1000.0 * (MAX_WALLCLOCK_SECONDS - QUANT_RESERVE_SECONDS)
    swa_sum = {}
    swa_count = 0

    def zero_grad_all():
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    def lr_mul(step, elapsed_ms):
        """1 at first, then linearly down to 0 over what WARMDOWN_ITERS steps take at the present speed."""
        if WARMDOWN_ITERS <= 0:
            return 1.0
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = WARMDOWN_ITERS * step_ms
        remaining_ms = max(max_train_ms - elapsed_ms, 0.0)
        by_clock = remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0
        by_steps = max((ITERATIONS - step) / WARMDOWN_ITERS, 0.0)
        return min(by_clock, by_steps, 1.0)

    def swa_add():
        nonlocal swa_count
        for name, t in base_model.state_dict().items():
            if name not in swa_sum:
                swa_sum[name] = torch.zeros_like(t, dtype=torch.float32)
            swa_sum[name] += t.detach().float()
        swa_count += 1

    def swa_apply():
        if not SWA_ENABLED or swa_count == 0:
            log0("swa: nothing to average")
            return
        state = base_model.state_dict()
        base_model.load_state_dict({n: (t / swa_count).to(state[n].dtype) for n, t in swa_sum.items()}, strict=True)
        log0(f"swa: weights are the mean of {swa_count} checkpoints")

    def forward_backward():
        total = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if DISTRIBUTED:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(TRAIN_BATCH_TOKENS, TRAIN_SEQ_LEN, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            total += loss.detach()
            (loss * grad_scale).backward()
        return total / grad_accum_steps

    def quick_val():
        """For the log only, nothing is decided by it."""
        return eval_val(
            base_model, base_model.forward_logits, val_tokens, luts, device, TRAIN_SEQ_LEN, TRAIN_SEQ_LEN
        )

    def warmup():
        """Compiles everything; model, optimizers and the data are put back afterwards."""
        nonlocal train_loader
        saved_model = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
        saved_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for i in range(WARMUP_STEPS):
            zero_grad_all()
            forward_backward()
            for opt in optimizers:
                opt.step()
            if i + 1 == WARMUP_STEPS or (i + 1) % 10 == 0:
                log0(f"warmup_step:{i + 1}/{WARMUP_STEPS}")
        base_model.load_state_dict(saved_model, strict=True)
        for opt, state in zip(optimizers, saved_opts, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        train_loader = DistributedTokenLoader(TRAIN_FILES, device)

    if WARMUP_STEPS > 0:
        warmup()

    # ---- training
    training_time_ms = 0.0
    stop_after_step = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == ITERATIONS or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (VAL_LOSS_EVERY > 0 and step % VAL_LOSS_EVERY == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = quick_val()
            log0(
                f"step:{step}/{ITERATIONS} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after_step is not None and step < ITERATIONS:
                log0(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}/{ITERATIONS}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_mul(step, elapsed_ms)
        zero_grad_all()
        train_loss = forward_backward()
        frac = min(step / MUON_MOMENTUM_WARMUP_STEPS, 1.0) if MUON_MOMENTUM_WARMUP_STEPS > 0 else 1.0
        for group in opt_muon.param_groups:
            group["momentum"] = (1 - frac) * MUON_MOMENTUM_WARMUP_START + frac * MUON_MOMENTUM
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if GRAD_CLIP_NORM > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), GRAD_CLIP_NORM)
        for opt in optimizers:
            opt.step()
        zero_grad_all()
        step += 1

        if SWA_ENABLED and scale < SWA_START_FRAC and step % SWA_EVERY == 0:
            swa_add()
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if step <= 10 or step % TRAIN_LOG_EVERY == 0:
            log0(
                f"step:{step}/{ITERATIONS} train_loss:{train_loss.item():.4f} lr_mul:{scale:.3f} "
                f"train_time:{approx_ms:.0f}ms step_avg:{approx_ms / step:.2f}ms"
            )
        # all ranks must stop after the same step
        reached_cap = MAX_WALLCLOCK_SECONDS > 0 and approx_ms >= max_train_ms
        if DISTRIBUTED and MAX_WALLCLOCK_SECONDS > 0:
            flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- average, calibrate and quantise; all of this still belongs to the 600 s
    swa_apply()
    quant_t0 = time.perf_counter()
    spent_s = training_time_ms / 1000.0 + (quant_t0 - t0)
    # half of what is left is for reading training data, the other half for GPTQ
    deadline = quant_t0 + 0.5 * max(MAX_WALLCLOCK_SECONDS - spent_s, 0.0)
    hessians, n_calib = collect_hessians(base_model, train_loader, deadline, device)
    log0(f"gptq: {len(hessians)} Hessians from {n_calib} training tokens in {time.perf_counter() - quant_t0:.1f}s")
    packed, how = quantize_state_dict(base_model, hessians)
    torch.cuda.synchronize()
    quant_s = time.perf_counter() - quant_t0
    log0(f"gptq: quantised {len(how)} tensors, quantisation {quant_s:.1f}s, training+quantisation {spent_s + quant_s:.1f}s")
    for kind in ("int5", "int6", "int8", "raw"):
        log0(f"gptq: {kind} tensors {sum(1 for k in how.values() if k == kind)}")

    # ---- pack
    if MASTER:
        model_bytes = write_packed(packed, how, PACKED_PATH)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        log0(f"Serialized model int5/int6/int8+zstd: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > SIZE_LIMIT:
            raise RuntimeError(f"{total_bytes} bytes are more than {SIZE_LIMIT}")
    barrier()

    # ---- evaluation: only the packed file and the validation tokens from here on
    del hessians, packed, model, compiled_model, base_model, train_loader, swa_sum
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    torch.cuda.synchronize()
    eval_t0 = time.perf_counter()
    eval_model = new_model(device)
    eval_model.load_state_dict(read_packed(PACKED_PATH, eval_model.state_dict()), strict=True)
    eval_model.eval()
    eval_logits = torch.compile(eval_model.forward_logits, dynamic=False)

    def report(tag, result, since):
        val_loss, val_bpb = result
        torch.cuda.synchronize()
        log0(f"{tag} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{1000.0 * (time.perf_counter() - since):.0f}ms")
        log0(f"{tag}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")

    # fixed model, sliding window
    since = time.perf_counter()
    final = eval_val(eval_model, eval_logits, val_tokens, luts, device, EVAL_STRIDE, EVAL_SEQ_LEN)
    report(f"final_sliding_window stride:{EVAL_STRIDE}", final, since)

    # score-first TTT, from the same packed weights
    if TTT_ENABLED:
        since = time.perf_counter()
        final = eval_val_ttt(eval_model, val_tokens, luts, device, EVAL_STRIDE, EVAL_SEQ_LEN, eval_t0)
        report("final_ttt_score_first", final, since)

    eval_s = time.perf_counter() - eval_t0
    log0(f"total evaluation time: {eval_s:.1f}s of {EVAL_BUDGET_SECONDS:.0f}s")
    if eval_s > EVAL_BUDGET_SECONDS:
        raise RuntimeError("the evaluation took too long, the number does not count")
    log0(f"final val_loss:{final[0]:.8f} val_bpb:{final[1]:.8f}")
    if DISTRIBUTED:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
