"""SP8192 + looped middle layers + GPTQ int6 + phased per-document LoRA test-time training."""
import collections
import copy
import fcntl
import glob
import io
import math
import os
import random
import re
import struct
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func
except ImportError:
    flash_attn_3_func = None


def env_int(key, default):
    return int(os.environ.get(key, default))


def env_float(key, default):
    return float(os.environ.get(key, default))


def env_flag(key, default):
    return bool(int(os.environ.get(key, default)))


class Hyperparameters:
    # paths
    data_dir = os.environ.get("DATA_DIR", "./data/")
    vocab_size = env_int("VOCAB_SIZE", 8192)
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)

    # schedule
    iterations = env_int("ITERATIONS", 20000)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env_float("GPTQ_RESERVE_SECONDS", 16.0)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    warmdown_frac = env_float("WARMDOWN_FRAC", 0.72)
    min_lr = env_float("MIN_LR", 0.0)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 2048 * 48 * 8)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)

    # validation
    val_batch_tokens = env_int("VAL_BATCH_TOKENS", 2048 * 32 * 8)
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    sliding_enabled = env_flag("SLIDING_ENABLED", 0)

    # model
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 4.0)
    rope_base = env_float("ROPE_BASE", 10000.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 5.0)
    tied_embed_init_std = env_float("TIED_EMBED_INIT_STD", 0.005)
    xsa_last_n = env_int("XSA_LAST_N", 11)
    ln_scale = env_flag("LN_SCALE", 1)
    smear_enabled = env_flag("SMEAR_ENABLED", 1)
    parallel_start = env_int("PARALLEL_START", 7)
    loop_start = env_int("LOOP_START", 3)
    loop_end = env_int("LOOP_END", 5)
    num_loops = env_int("NUM_LOOPS", 2)
    enable_looping_at = env_float("ENABLE_LOOPING_AT", 0.35)
    bos_id = env_int("BOS_ID", 1)

    # optimiser
    embed_lr = env_float("EMBED_LR", 0.03)
    matrix_lr = env_float("MATRIX_LR", 0.022)
    scalar_lr = env_float("SCALAR_LR", 0.02)
    muon_momentum = env_float("MUON_MOMENTUM", 0.97)
    muon_momentum_warmup_start = env_float("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_warmup_steps = env_int("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_backend_steps = env_int("MUON_BACKEND_STEPS", 5)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    adam_wd = env_float("ADAM_WD", 0.02)
    embed_wd = env_float("EMBED_WD", 0.085)
    muon_wd = env_float("MUON_WD", 0.095)
    grad_clip_norm = env_float("GRAD_CLIP_NORM", 0.3)
    ema_decay = env_float("EMA_DECAY", 0.9965)

    # quantisation
    matrix_bits = env_int("MATRIX_BITS", 6)
    embed_bits = env_int("EMBED_BITS", 8)
    matrix_clip_sigmas = env_float("MATRIX_CLIP_SIGMAS", 12.85)
    embed_clip_sigmas = env_float("EMBED_CLIP_SIGMAS", 20.0)
    gptq_calibration_batches = env_int("GPTQ_CALIBRATION_BATCHES", 32)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    size_limit = 16_000_000

    # test-time training
    ttt_enabled = env_flag("TTT_ENABLED", 1)
    ttt_lora_rank = env_int("TTT_LORA_RANK", 96)
    ttt_lora_alpha = env_float("TTT_LORA_ALPHA", 144.0)
    ttt_lora_lr = env_float("TTT_LORA_LR", 1e-4)
    ttt_weight_decay = env_float("TTT_WEIGHT_DECAY", 0.5)
    ttt_beta1 = env_float("TTT_BETA1", 0.0)
    ttt_beta2 = env_float("TTT_BETA2", 0.999)
    ttt_chunk = env_int("TTT_CHUNK", 48)
    ttt_batch = env_int("TTT_BATCH", 64)
    ttt_grad_steps = env_int("TTT_GRAD_STEPS", 1)
    ttt_eval_seq_len = env_int("TTT_EVAL_SEQ_LEN", 2048)
    ttt_deadline_s = env_float("TTT_DEADLINE_S", 540.0)
    phase_prefix_docs = env_int("PHASE_PREFIX_DOCS", 2400)
    phase_count = env_int("PHASE_COUNT", 3)
    phase_lr = env_float("PHASE_LR", 1e-3)
    phase_momentum = env_float("PHASE_MOMENTUM", 0.9)
    phase_epochs = env_int("PHASE_EPOCHS", 1)
    phase_chunk_tokens = env_int("PHASE_CHUNK_TOKENS", 32768)
    phase_seq_len = env_int("PHASE_SEQ_LEN", 2048)
    phase_grad_clip = env_float("PHASE_GRAD_CLIP", 1.0)

    # runtime
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = env_int("RANK", 0)
    world_size = env_int("WORLD_SIZE", 1)
    local_rank = env_int("LOCAL_RANK", 0)
    is_main = rank == 0
    grad_accum_steps = 8 // world_size
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    artifact_path = "final_model.int6.ptz"


_LOG_STATE = {"h": None}


def log(msg, console=True):
    h = _LOG_STATE["h"]
    if h is None:
        print(msg)
        return
    if not h.is_main:
        return
    if console:
        print(msg)
    with open(h.logfile, "a", encoding="utf-8") as sink:
        print(msg, file=sink)


# ---------------------------------------------------------------- data

SHARD_MAGIC = 20240520
SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype("<i4").itemsize


def shard_length(path):
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header in {path}")
    n = int(header[2])
    if os.path.getsize(path) != SHARD_HEADER_BYTES + 2 * n:
        raise ValueError(f"{path}: file size does not match its header")
    return n


def open_shard(path):
    return np.memmap(path, mode="r", dtype="<u2", offset=SHARD_HEADER_BYTES, shape=(shard_length(path),))


def read_whole_shard(path):
    n = shard_length(path)
    body = np.fromfile(path, dtype="<u2", count=n, offset=SHARD_HEADER_BYTES)
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def sorted_glob(pattern):
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no files match {pattern}")
    return paths


class ShuffledWindows:
    """Random non-overlapping windows of the rank's own train shards, with a new phase for each visit."""

    def __init__(self, h, device):
        self.seq_len = h.train_seq_len
        self.device = device
        self.world_size = h.world_size
        every = sorted_glob(h.train_files)
        self.paths = every[h.rank :: h.world_size] or every
        self.rng = np.random.Generator(np.random.PCG64(h.seed * 1000 + h.rank))
        self.sizes = [shard_length(p) for p in self.paths]
        self.queues = [[] for _ in self.paths]
        for i in range(len(self.paths)):
            self._refill(i)

    def _refill(self, i):
        room = self.sizes[i] - self.seq_len - 1
        phase = int(self.rng.integers(min(self.seq_len, max(room, 1))))
        count = (self.sizes[i] - 1 - phase) // self.seq_len
        self.queues[i] = (phase + self.rng.permutation(count) * self.seq_len).tolist()

    def next_batch(self, global_tokens, accum_steps):
        per_rank = global_tokens // (self.world_size * accum_steps)
        rows = per_rank // self.seq_len
        x = torch.empty(rows, self.seq_len, dtype=torch.int64)
        y = torch.empty(rows, self.seq_len, dtype=torch.int64)
        weights = np.array([len(q) for q in self.queues], dtype=np.float64)
        for r in range(rows):
            if weights.sum() <= 0:
                for i in range(len(self.paths)):
                    self._refill(i)
                weights = np.array([len(q) for q in self.queues], dtype=np.float64)
            i = int(self.rng.choice(len(self.paths), p=weights / weights.sum()))
            at = self.queues[i].pop()
            weights[i] -= 1
            window = torch.from_numpy(np.asarray(open_shard(self.paths[i])[at : at + self.seq_len + 1], dtype=np.int64))
            x[r] = window[:-1]
            y[r] = window[1:]
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


def piece_tables(sp, vocab_size, device):
    """Bytes per piece without its leading space, whether it has one, and whether a space before it is suppressed."""
    n = max(int(sp.vocab_size()), vocab_size)
    width = np.zeros((n,), dtype=np.int16)
    spaced = np.zeros((n,), dtype=np.bool_)
    wall = np.ones((n,), dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        wall[i] = False
        if sp.is_byte(i):
            width[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            spaced[i] = True
            piece = piece[1:]
        width[i] = len(piece.encode("utf-8"))
    return (
        torch.tensor(width, dtype=torch.int16, device=device),
        torch.tensor(spaced, dtype=torch.bool, device=device),
        torch.tensor(wall, dtype=torch.bool, device=device),
    )


@dataclass(frozen=True)
class DocSpan:
    """A document of the validation stream: `start` is its BOS, `stop` one past the last token it predicts."""

    index: int
    start: int
    stop: int

    @property
    def pred_len(self):
        return self.stop - self.start - 1


def split_documents(tokens, bos_id):
    """Each document predicts its own tokens and the BOS that follows it, so that every token but the first is scored."""
    starts = (tokens == bos_id).nonzero(as_tuple=True)[0].tolist()
    if not starts or starts[0] != 0:
        starts = [0] + starts
    docs = []
    for i, start in enumerate(starts):
        stop = starts[i + 1] + 1 if i + 1 < len(starts) else tokens.numel()
        if stop - start >= 2:
            docs.append(DocSpan(len(docs), start, stop))
    return docs


class ValidationStream:
    def __init__(self, h, device):
        sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {int(sp.vocab_size())} pieces")
        self.sp = sp
        self.tokens = torch.cat([read_whole_shard(p) for p in sorted_glob(h.val_files)]).to(torch.int32)
        self.width, self.spaced, self.wall = piece_tables(sp, h.vocab_size, device)
        self.device = device

    def byte_counts(self, prev_ids, target_ids):
        count = self.width[target_ids].to(torch.float64)
        count += (self.spaced[target_ids] & ~self.wall[prev_ids]).to(torch.float64)
        return count


# ---------------------------------------------------------------- model


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, dims, base):
        super().__init__()
        self.dims = dims
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, dims, 2).float() / dims), persistent=False)

    def forward(self, length, device, dtype):
        t = torch.arange(length, device=device, dtype=torch.float32)
        angle = torch.outer(t, self.inv_freq.to(device))
        return angle.cos()[None, :, None, :].to(dtype), angle.sin()[None, :, None, :].to(dtype)


def rotate(x, cos, sin, dims):
    turned, rest = x[..., :dims], x[..., dims:]
    half = dims // 2
    a, b = turned[..., :half], turned[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def attend(q, k, v):
    """Causal attention; q: [B, T, H, D], k and v: [B, T, KV, D]."""
    if flash_attn_3_func is not None:
        out = flash_attn_3_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.heads = h.num_heads
        self.kv_heads = h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.proj.zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.heads,), h.qk_gain_init))
        self.rope_dims = h.rope_dims
        self.rotary = Rotary(h.rope_dims, h.rope_base)
        self.use_xsa = False

    def _exclude_self(self, y, v):
        b, t, hn, d = y.shape
        grouped = y.reshape(b, t, self.kv_heads, hn // self.kv_heads, d)
        unit = F.normalize(v, dim=-1).unsqueeze(-2)
        return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).reshape(b, t, hn, d)

    def forward(self, x, slot=None):
        b, t, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if slot is not None:
            q = q + slot.q(x)
            k = k + slot.k(x)
            v = v + slot.v(x)
        q = q.reshape(b, t, self.heads, self.head_dim)
        k = k.reshape(b, t, self.kv_heads, self.head_dim)
        v = v.reshape(b, t, self.kv_heads, self.head_dim)
        q, k = F.rms_norm(q, (q.size(-1),)), F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = rotate(q, cos, sin, self.rope_dims) * self.q_gain.to(q.dtype)[None, None, :, None]
        k = rotate(k, cos, sin, self.rope_dims)
        y = attend(q, k, v)
        if self.use_xsa:
            y = self._exclude_self(y, v)
        y = y.reshape(b, t, dim)
        out = self.proj(y)
        if slot is not None:
            out = out + slot.o(y)
        return out


class MLP(nn.Module):
    def __init__(self, h):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.fc = CastedLinear(h.model_dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, h.model_dim, bias=False)
        self.proj.zero_init = True

    def forward(self, x, slot=None):
        out = self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())
        return out if slot is None else out + slot.m(x)


class Block(nn.Module):
    def __init__(self, h, layer):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = Attention(h)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))))
        self.damp = 1.0 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        self.parallel = layer >= h.parallel_start

    def forward(self, x, x0, slot=None):
        mix = self.resid_mix.to(x.dtype)
        x_in = mix[0] * x + mix[1] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.damp, slot)
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.damp, slot)
            return x_in + self.attn_scale.to(x.dtype) * attn_out + self.mlp_scale.to(x.dtype) * mlp_out
        x_mid = x_in + self.attn_scale.to(x.dtype) * attn_out
        return x_mid + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x_mid) * self.damp, slot)


class SmearGate(nn.Module):
    """Adds a gated share of the previous token's embedding, never across a document's BOS."""

    def __init__(self, dim, bos_id):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))
        self.bos_id = bos_id

    def forward(self, x, ids, lead):
        before = torch.cat((lead.unsqueeze(1), x[:, :-1]), dim=1)
        inside = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + torch.tanh(self.gate.to(x.dtype)) * before * inside


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.tied_embed_init_std)
        self.smear = SmearGate(h.model_dim, h.bos_id) if h.smear_enabled else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        for block in self.blocks[h.num_layers - h.xsa_last_n :]:
            block.attn.use_xsa = True
        self.final_norm = RMSNorm()
        self.plain_order = list(range(h.num_layers))
        segment = list(range(h.loop_start, h.loop_end + 1))
        self.looped_order = list(range(h.loop_start)) + segment * (h.num_loops + 1)
        self.looped_order += list(range(h.loop_end + 1, h.num_layers))
        self.looping = False
        skips = len(self.looped_order) // 2
        self.skip_weights = nn.Parameter(torch.ones(skips, h.model_dim))
        self.skip_gates = nn.Parameter(torch.zeros(skips, h.model_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def order(self):
        return self.looped_order if self.looping else self.plain_order

    def slot_count(self):
        return len(self.order())

    def hidden(self, ids, lead=None, lora=None):
        x = self.tok_emb(ids)
        x = F.rms_norm(x, (x.size(-1),))
        if self.smear is not None:
            if lead is None:
                edge = torch.zeros_like(x[:, 0])
            else:
                edge = F.rms_norm(self.tok_emb(lead), (x.size(-1),)).to(x.dtype)
            x = self.smear(x, ids, edge)
        x0 = x
        order = self.order()
        half = len(order) // 2
        stack = []
        for n, layer in enumerate(order):
            if n >= len(order) - half:
                s = n - (len(order) - half)
                gate = torch.sigmoid(self.skip_gates[s].to(x.dtype))
                x = torch.lerp(self.skip_weights[s].to(x.dtype) * stack.pop(), x, gate)
            x = self.blocks[layer](x, x0, None if lora is None else lora.slots[n])
            if n < half:
                stack.append(x)
        return self.final_norm(x)

    def head(self, hid, lora=None):
        raw = F.linear(hid, self.tok_emb.weight.to(hid.dtype))
        if lora is not None:
            raw = raw + lora.lm_head(hid)
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward_logits(self, ids, lead=None):
        return self.head(self.hidden(ids, lead))

    def forward(self, ids, targets):
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="mean")

    def forward_ttt(self, ids, pick, lead, lora):
        """Logits at the positions `pick` [B, C] of each row, the adapters of the row applied."""
        hid = self.hidden(ids, lead, lora)
        hid = hid.gather(1, pick.unsqueeze(-1).expand(-1, -1, hid.size(-1)))
        return self.head(hid, lora)


# ---------------------------------------------------------------- adapters


class BatchedLinearLoRA(nn.Module):
    """One low-rank update per row of the batch; starts at zero."""

    def __init__(self, batch, d_in, d_out, rank, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.empty(batch, rank, d_in))
        self.B = nn.Parameter(torch.zeros(batch, d_out, rank))
        self.scale = alpha / rank
        self.bound = 1.0 / math.sqrt(d_in)
        self.reset()

    @torch.no_grad()
    def reset(self):
        self.A.uniform_(-self.bound, self.bound)
        self.B.zero_()

    def forward(self, x):
        down = torch.bmm(x, self.A.to(x.dtype).transpose(1, 2))
        return self.scale * torch.bmm(down, self.B.to(x.dtype).transpose(1, 2))


class LoRASlot(nn.Module):
    """The adapters of one layer visit (a looped layer has one set per visit)."""

    def __init__(self, h, batch):
        super().__init__()
        kv_dim = h.num_kv_heads * (h.model_dim // h.num_heads)

        def make(d_out):
            return BatchedLinearLoRA(batch, h.model_dim, d_out, h.ttt_lora_rank, h.ttt_lora_alpha)

        self.q = make(h.model_dim)
        self.k = make(kv_dim)
        self.v = make(kv_dim)
        self.o = make(h.model_dim)
        self.m = make(h.model_dim)


class DocumentAdapters(nn.Module):
    def __init__(self, h, batch, slots):
        super().__init__()
        self.slots = nn.ModuleList([LoRASlot(h, batch) for _ in range(slots)])
        self.lm_head = BatchedLinearLoRA(batch, h.model_dim, h.vocab_size, h.ttt_lora_rank, h.ttt_lora_alpha)

    def reset(self):
        for module in self.modules():
            if isinstance(module, BatchedLinearLoRA):
                module.reset()


def adapter_optimizer(h, lora):
    return torch.optim.AdamW(
        lora.parameters(),
        lr=h.ttt_lora_lr,
        betas=(h.ttt_beta1, h.ttt_beta2),
        eps=1e-10,
        weight_decay=h.ttt_weight_decay,
        fused=True,
    )


def clear_optimizer(opt):
    for state in opt.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


# ---------------------------------------------------------------- optimisers


@torch.compile
def newton_schulz(g, steps):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    flip = g.size(0) > g.size(1)
    if flip:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, backend_steps, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        spread = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if spread else 1
        rank = dist.get_rank() if spread else 0
        for group in self.param_groups:
            params = group["params"]
            updates = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(p.grad)
                    buf = state["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = g / g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).to(g.dtype)
                    g = newton_schulz(g, group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if spread:
                dist.all_reduce(updates, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(updates[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


SCALAR_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates", "smear.gate")


class OptimizerBank:
    def __init__(self, h, model):
        matrices, scalars = [], []
        for name, p in model.named_parameters():
            if name == "tok_emb.weight":
                continue
            if p.ndim == 2 and not any(pattern in name for pattern in SCALAR_PATTERNS):
                matrices.append(p)
            else:
                scalars.append(p)
        adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.embed = torch.optim.AdamW([model.tok_emb.weight], lr=h.embed_lr, weight_decay=h.embed_wd, **adam)
        self.scalar = torch.optim.AdamW(scalars, lr=h.scalar_lr, weight_decay=h.adam_wd, **adam)
        self.muon = Muon(matrices, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, h.muon_wd)
        self.all = [self.embed, self.scalar, self.muon]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def set_scale(self, scale):
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self):
        for opt in self.all:
            opt.step()
        self.zero_grad()

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def state_dicts(self):
        return [copy.deepcopy(opt.state_dict()) for opt in self.all]

    def load_state_dicts(self, saved):
        for opt, state in zip(self.all, saved):
            opt.load_state_dict(state)


class WeightAverage:
    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def load_into(self, model):
        current = model.state_dict()
        model.load_state_dict({name: t.to(current[name].dtype) for name, t in self.shadow.items()})


# ---------------------------------------------------------------- quantisation


def quantised_names(model):
    return [n for n, t in model.state_dict().items() if t.ndim == 2 and t.numel() > 65536]


def collect_hessians(h, model, loader, device):
    """Second moments of the inputs of every large matrix over train batches; the embedding takes those of the head."""
    grams = {}
    hooks = []

    def watcher(name):
        def hook(module, inputs, output):
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in grams:
                grams[name] = torch.zeros(x.size(1), x.size(1), device=device)
            grams[name].addmm_(x.T, x)

        return hook

    def head_watcher(module, inputs, output):
        x = output.detach().reshape(-1, output.size(-1)).float()
        if "tok_emb.weight" not in grams:
            grams["tok_emb.weight"] = torch.zeros(x.size(1), x.size(1), device=device)
        grams["tok_emb.weight"].addmm_(x.T, x)

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            hooks.append(module.register_forward_hook(watcher(name + ".weight")))
    hooks.append(model.final_norm.register_forward_hook(head_watcher))
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(h.gptq_calibration_batches):
            ids, _unused = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            model.forward_logits(ids)
    for hook in hooks:
        hook.remove()
    for name, gram in grams.items():
        if dist.is_initialized():
            dist.all_reduce(gram, op=dist.ReduceOp.SUM)
        grams[name] = (gram / (h.world_size * h.gptq_calibration_batches)).cpu()
    return grams


def gptq_matrix(w, gram, bits, clip_sigmas, block):
    """Column by column with error feedback; one scale a row, clipped at some sigmas of the row."""
    limit = 2 ** (bits - 1) - 1
    w = w.float().cuda()
    gram = gram.float().cuda()
    rows, cols = w.shape
    scale = (clip_sigmas * w.std(dim=1) / limit).clamp_min(1e-10).to(torch.float16)
    s = scale.float()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1.0
    w[:, dead] = 0.0
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    perm = gram.diagonal().argsort(descending=True)
    back = perm.argsort()
    w, gram = w[:, perm], gram[perm][:, perm]
    inv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    q = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    for lo in range(0, cols, block):
        hi = min(lo + block, cols)
        err = torch.zeros(rows, hi - lo, device=w.device)
        for j in range(lo, hi):
            code = (w[:, j] / s).round().clamp(-limit, limit)
            q[:, j] = code.to(torch.int8)
            e = (w[:, j] - code * s) / inv[j, j]
            w[:, j:hi] -= e[:, None] * inv[j, j:hi][None]
            err[:, j - lo] = e
        w[:, hi:] -= err @ inv[lo:hi, hi:]
    return q[:, back].cpu(), scale.cpu()


def quantise_state(h, model, grams):
    packed, kinds = {}, {}
    large = set(quantised_names(model))
    for name, t in model.state_dict().items():
        t = t.detach().cpu()
        if name not in large:
            packed[name] = t.to(torch.float16) if t.is_floating_point() else t
            kinds[name] = "passthrough"
            continue
        is_embed = name == "tok_emb.weight"
        bits = h.embed_bits if is_embed else h.matrix_bits
        sigmas = h.embed_clip_sigmas if is_embed else h.matrix_clip_sigmas
        q, scale = gptq_matrix(t, grams[name], bits, sigmas, h.gptq_block)
        packed[name + ".q"], packed[name + ".scale"] = q, scale
        kinds[name] = f"gptq int{bits}"
    by_kind = collections.Counter(kinds.values())
    log("quantised: " + ", ".join(f"{count} x {kind}" for kind, count in sorted(by_kind.items())))
    return packed


def dequantise_state(packed, template):
    out = {}
    for name, t in template.items():
        if name in packed:
            out[name] = packed[name].to(t.dtype)
        else:
            out[name] = (packed[name + ".q"].float() * packed[name + ".scale"].float()[:, None]).to(t.dtype)
    return out


def byte_shuffle(raw, stride=2):
    body = np.frombuffer(raw, dtype=np.uint8)
    lanes = [body[k::stride] for k in range(stride)]
    return struct.pack("<QB", len(raw), stride) + b"".join(lane.tobytes() for lane in lanes)


def byte_unshuffle(data):
    size, stride = struct.unpack_from("<QB", data)
    body = np.frombuffer(data, dtype=np.uint8, offset=9)
    out = np.empty(size, dtype=np.uint8)
    at = 0
    for k in range(stride):
        count = len(range(k, size, stride))
        out[k::stride] = body[at : at + count]
        at += count
    return out.tobytes()


def write_artifact(h, model, grams):
    packed = quantise_state(h, model, grams)
    sink = io.BytesIO()
    torch.save(packed, sink)
    blob = brotli.compress(byte_shuffle(sink.getvalue()), quality=11)
    code_bytes = len(Path(__file__).read_bytes())
    total_bytes = len(blob) + code_bytes
    if h.is_main:
        with open(h.artifact_path, "wb") as f:
            f.write(blob)
    log(f"Serialized model int6+brotli: {len(blob)} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size int6+brotli: {total_bytes} bytes (limit {h.size_limit})")
    if total_bytes > h.size_limit:
        raise RuntimeError(f"submission of {total_bytes} bytes is over the limit of {h.size_limit}")
    return total_bytes


def read_artifact(h, device):
    model = GPT(h).to(device).bfloat16()
    keep_scalars_fp32(model)
    packed = torch.load(io.BytesIO(byte_unshuffle(brotli.decompress(Path(h.artifact_path).read_bytes()))), map_location="cpu")
    model.load_state_dict(dequantise_state(packed, model.state_dict()), strict=True)
    model.looping = h.num_loops > 0
    return model


def keep_scalars_fp32(model):
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, p in model.named_parameters():
        if p.ndim < 2 or any(pattern in name for pattern in SCALAR_PATTERNS):
            p.data = p.data.float()


# ---------------------------------------------------------------- plain and sliding evaluation


def finish_sums(nll, tokens, byts):
    if dist.is_initialized():
        for t in (nll, tokens, byts):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    val_loss = nll.item() / tokens.item()
    return val_loss, nll.item() / math.log(2.0) / byts.item()


def eval_val(h, model, stream, device):
    """Whole sequences side by side; the figure printed while training and for the two round trips."""
    seq_len = h.eval_seq_len
    rows = max(1, h.val_batch_tokens // (seq_len * h.world_size * h.grad_accum_steps))
    n_pred = stream.tokens.numel() - 1
    starts = list(range(0, n_pred, seq_len))[h.rank :: h.world_size]
    nll = torch.zeros((), device=device, dtype=torch.float64)
    tokens = torch.zeros((), device=device, dtype=torch.float64)
    byts = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(starts), rows):
            group = starts[at : at + rows]
            x = torch.zeros(len(group), seq_len, dtype=torch.int64)
            y = torch.zeros(len(group), seq_len, dtype=torch.int64)
            keep = torch.zeros(len(group), seq_len, dtype=torch.bool)
            for r, start in enumerate(group):
                stop = min(start + seq_len, n_pred)
                x[r, : stop - start] = stream.tokens[start:stop]
                y[r, : stop - start] = stream.tokens[start + 1 : stop + 1]
                keep[r, : stop - start] = True
            x, y, keep = x.to(device), y.to(device), keep.to(device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(x)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none").view_as(y)
            nll += losses[keep].double().sum()
            tokens += keep.sum()
            byts += stream.byte_counts(x, y)[keep].sum()
    model.train()
    return finish_sums(nll, tokens, byts)


def sliding_windows(n_pred, seq_len, stride):
    """(start, stop, first scored position): the windows tile the stream, each token is scored in exactly one."""
    windows = []
    done = 0
    while done < n_pred:
        stop = min(n_pred, done + (seq_len if done == 0 else stride))
        start = max(0, stop - seq_len)
        windows.append((start, stop, done))
        done = stop
    return windows


def eval_sliding(h, model, stream, device, rows=32):
    n_pred = stream.tokens.numel() - 1
    windows = sliding_windows(n_pred, h.eval_seq_len, h.eval_stride)
    lo = len(windows) * h.rank // h.world_size
    hi = len(windows) * (h.rank + 1) // h.world_size
    mine = windows[lo:hi]
    nll = torch.zeros((), device=device, dtype=torch.float64)
    tokens = torch.zeros((), device=device, dtype=torch.float64)
    byts = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    for at in range(0, len(mine), rows):
        group = mine[at : at + rows]
        x = torch.zeros(len(group), h.eval_seq_len, dtype=torch.int64)
        y = torch.zeros(len(group), h.eval_seq_len, dtype=torch.int64)
        keep = torch.zeros(len(group), h.eval_seq_len, dtype=torch.bool)
        for r, (start, stop, first) in enumerate(group):
            x[r, : stop - start] = stream.tokens[start:stop]
            y[r, : stop - start] = stream.tokens[start + 1 : stop + 1]
            keep[r, first - start : stop - start] = True
        x, y, keep = x.to(device), y.to(device), keep.to(device)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            hid = model.hidden(x)
            logits = model.head(hid)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none").view_as(y)
        nll += losses[keep].double().sum()
        tokens += keep.sum()
        byts += stream.byte_counts(x, y)[keep].sum()
    model.train()
    return finish_sums(nll, tokens, byts)


# ---------------------------------------------------------------- phased test-time training


class DocLedger:
    """Sums per document in float64; a document belongs to one rank, so that the ranks' ledgers simply add up."""

    def __init__(self, n_docs, device):
        self.nll = torch.zeros(n_docs, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(n_docs, dtype=torch.float64, device=device)
        self.byts = torch.zeros(n_docs, dtype=torch.float64, device=device)

    @torch.no_grad()
    def post(self, doc_ids, nll, byts, mask):
        weight = mask.to(torch.float64)
        self.nll.index_add_(0, doc_ids, (nll.detach().to(torch.float64) * weight).sum(1))
        self.tokens.index_add_(0, doc_ids, weight.sum(1))
        self.byts.index_add_(0, doc_ids, (byts * weight).sum(1))

    def reduce(self):
        if dist.is_initialized():
            for t in (self.nll, self.tokens, self.byts):
                dist.all_reduce(t, op=dist.ReduceOp.SUM)

    def result(self):
        nll, tokens, byts = self.nll.sum().item(), self.tokens.sum().item(), self.byts.sum().item()
        return nll / tokens, nll / math.log(2.0) / byts


class BatchCounter:
    """A number in a file under a lock: the ranks take the next batch of the running phase from it."""

    def __init__(self, h):
        self.root = f"/tmp/pg_counter_{h.run_id}"
        self.h = h
        self.path = None

    def open_phase(self, phase):
        self.path = f"{self.root}_{phase}"
        if self.h.is_main:
            with open(self.path, "wb") as f:
                f.write(struct.pack("<i", 0))
        if dist.is_initialized():
            dist.barrier()

    def claim(self):
        with open(self.path, "r+b") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            (value,) = struct.unpack("<i", f.read(4))
            f.seek(0)
            f.write(struct.pack("<i", value + 1))
            f.flush()
            fcntl.flock(f, fcntl.LOCK_UN)
        return value

    def close_phase(self):
        if dist.is_initialized():
            dist.barrier()
        if self.h.is_main:
            os.unlink(self.path)


def length_batches(docs, size):
    """Long documents first, neighbours in length together."""
    ranked = sorted(docs, key=lambda d: (-d.pred_len, d.index))
    return [ranked[i : i + size] for i in range(0, len(ranked), size)]


class ChunkView:
    """The windows of chunk `c` of every document of a batch, left-aligned and padded to one width."""

    def __init__(self, h, tokens, docs, c, device):
        size, limit = h.ttt_chunk, h.ttt_eval_seq_len
        first = torch.tensor([d.start for d in docs], device=device)
        pred = torch.tensor([d.pred_len for d in docs], device=device)
        begin = torch.full_like(pred, c * size)
        end = torch.minimum(begin + size, pred)
        self.live = end > begin
        end = torch.where(self.live, end, torch.minimum(begin, pred))
        left = (end - limit).clamp_min(0)
        width = min((c + 1) * size, limit)
        self.last_chunk = (pred + size - 1) // size - 1
        span = torch.arange(width, device=device)[None]
        where = (first + left)[:, None] + span
        inside = span < (end - left)[:, None]
        self.ids = tokens[where.clamp_max(tokens.numel() - 1)].masked_fill(~inside, 0)
        self.lead = tokens[(first + left - 1).clamp_min(0)]
        step = torch.arange(size, device=device)[None]
        self.mask = (step < (end - begin)[:, None]) & self.live[:, None]
        place = (begin - left)[:, None] + step
        self.pick = place.clamp(0, width - 1)
        source = (first + begin)[:, None] + step
        self.prev = tokens[source.clamp_max(tokens.numel() - 1)]
        self.target = tokens[(source + 1).clamp_max(tokens.numel() - 1)]
        self.width = width


class PhasedEvaluator:
    def __init__(self, h, model, stream, device):
        self.h = h
        self.model = model
        self.stream = stream
        self.device = device
        self.tokens = stream.tokens.to(device=device, dtype=torch.int64)
        self.docs = split_documents(stream.tokens, h.bos_id)
        self.ledger = DocLedger(len(self.docs), device)
        self.counter = BatchCounter(h)
        self.forward = torch.compile(model.forward_ttt, dynamic=True)
        self.started = None
        self.late = 0
        for p in model.parameters():
            p.requires_grad_(False)
        self.lora = DocumentAdapters(h, h.ttt_batch, model.slot_count()).to(device)
        self.opt = adapter_optimizer(h, self.lora)

    # -- set-up

    def warm_up(self):
        """Compiles forward and backward on random tokens; its adapters are thrown away."""
        h = self.h
        gen = torch.Generator(device=self.device).manual_seed(h.seed + 7)
        for width in (h.ttt_chunk, 2 * h.ttt_chunk, 1024, h.ttt_eval_seq_len):
            spare = DocumentAdapters(h, h.ttt_batch, self.model.slot_count()).to(self.device)
            spare_opt = adapter_optimizer(h, spare)
            shape = (h.ttt_batch, width)
            ids = torch.randint(0, h.vocab_size, shape, device=self.device, generator=gen)
            goal = torch.randint(0, h.vocab_size, (h.ttt_batch, h.ttt_chunk), device=self.device, generator=gen)
            pick = torch.arange(h.ttt_chunk, device=self.device)[None].expand(h.ttt_batch, -1) + (width - h.ttt_chunk)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = self.forward(ids, pick, ids[:, 0], spare)
            F.cross_entropy(logits.flatten(0, 1).float(), goal.flatten()).backward()
            spare_opt.step()
            del spare, spare_opt
        torch.cuda.synchronize()

    # -- documents

    def losses(self, view):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = self.forward(view.ids, view.pick, view.lead, self.lora)
        flat = F.cross_entropy(logits.flatten(0, 1).float(), view.target.flatten(), reduction="none")
        return flat.view_as(view.target)

    def adapt(self, view, nll, c):
        """One or more adapter steps on a chunk whose losses are in the ledger already."""
        useful = view.mask & (view.last_chunk > c)[:, None]
        if not bool(useful.any()):
            return
        for k in range(self.h.ttt_grad_steps):
            if k > 0:
                nll = self.losses(view)
            per_doc = (nll * useful).sum(1) / useful.sum(1).clamp_min(1)
            self.opt.zero_grad(set_to_none=True)
            per_doc.sum().backward()
            self.opt.step()

    def score_batch(self, docs):
        h = self.h
        real = len(docs)
        padded = docs + [docs[-1]] * (h.ttt_batch - real)
        owner = torch.tensor([d.index for d in padded], device=self.device)
        counted = (torch.arange(h.ttt_batch, device=self.device) < real)[:, None]
        self.lora.reset()
        clear_optimizer(self.opt)
        chunks = max(-(-d.pred_len // h.ttt_chunk) for d in docs)
        for c in range(chunks):
            view = ChunkView(h, self.tokens, padded, c, self.device)
            training = self.seconds() < h.ttt_deadline_s
            with torch.set_grad_enabled(training):
                nll = self.losses(view)
            byts = self.stream.byte_counts(view.prev, view.target)
            self.ledger.post(owner, nll, byts, view.mask & counted)
            if training:
                self.adapt(view, nll, c)
            else:
                self.late += 1

    # -- base model

    def teach_base(self, docs):
        """SGD of the base model on documents that every rank has finished scoring."""
        h = self.h
        params = [p for p in self.model.parameters()]
        for p in params:
            p.requires_grad_(True)
        sgd = torch.optim.SGD(params, lr=h.phase_lr, momentum=h.phase_momentum)
        text = torch.cat([self.tokens[d.start : d.stop - 1] for d in docs] + [self.tokens[docs[-1].stop - 1 : docs[-1].stop]])
        n_pred = text.numel() - 1
        chunk_count = max(1, -(-n_pred // h.phase_chunk_tokens))
        for epoch in range(h.phase_epochs):
            for ci in range(chunk_count):
                lo, hi = ci * h.phase_chunk_tokens, min((ci + 1) * h.phase_chunk_tokens, n_pred)
                lr = h.phase_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(chunk_count - 1, 1)))
                for group in sgd.param_groups:
                    group["lr"] = lr
                rows = [(a, min(a + h.phase_seq_len, hi)) for a in range(lo, hi, h.phase_seq_len)]
                sgd.zero_grad(set_to_none=False)
                for p in params:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                for a, b in rows[h.rank :: h.world_size]:
                    with torch.autocast("cuda", dtype=torch.bfloat16):
                        loss = self.model(text[a:b][None], text[a + 1 : b + 1][None])
                    (loss * ((b - a) / (hi - lo))).backward()
                if dist.is_initialized():
                    for p in params:
                        dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                torch.nn.utils.clip_grad_norm_(params, h.phase_grad_clip)
                sgd.step()
        for p in params:
            p.grad = None
            p.requires_grad_(False)

    # -- phases

    def seconds(self):
        return time.perf_counter() - self.started

    def phases(self):
        """The prefix in stream order, cut into equal phases, and then everything else."""
        h = self.h
        prefix = min(h.phase_prefix_docs, len(self.docs))
        cuts = [prefix * k // h.phase_count for k in range(h.phase_count + 1)]
        parts = [(self.docs[a:b], True) for a, b in zip(cuts, cuts[1:]) if b > a]
        if prefix < len(self.docs):
            parts.append((self.docs[prefix:], False))
        return parts

    def score_part(self, number, docs):
        batches = length_batches(docs, self.h.ttt_batch)
        self.counter.open_phase(number)
        while True:
            k = self.counter.claim()
            if k >= len(batches):
                break
            self.score_batch(batches[k])
        self.counter.close_phase()
        return len(batches)

    def run(self):
        self.started = time.perf_counter()
        self.model.eval()
        for number, (docs, teach) in enumerate(self.phases()):
            n_batches = self.score_part(number, docs)
            log(f"ttt:phase {number} docs:{len(docs)} batches:{n_batches} time:{self.seconds():.1f}s")
            if teach:
                self.teach_base(docs)
        self.ledger.reduce()
        torch.cuda.synchronize()
        expected = self.tokens.numel() - 1
        log(
            f"ttt:coverage docs:{int((self.ledger.tokens > 0).sum())}/{len(self.docs)} "
            f"tokens:{int(self.ledger.tokens.sum())}/{expected} late_chunks:{self.late}"
        )
        return self.ledger.result()


# ---------------------------------------------------------------- training


def lr_scale(h, frac):
    if h.warmdown_frac <= 0 or frac < 1.0 - h.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / h.warmdown_frac, h.min_lr)


def train_model(h, device, stream, clock):
    base = GPT(h).to(device).bfloat16()
    keep_scalars_fp32(base)
    compiled = torch.compile(base, dynamic=False, fullgraph=True)
    log(f"model_params:{sum(p.numel() for p in base.parameters())}")
    bank = OptimizerBank(h, base)
    loader = ShuffledWindows(h, device)

    def backward_pass():
        total = torch.zeros((), device=device)
        for _ in range(h.grad_accum_steps):
            x, y = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = compiled(x, y)
            total += loss.detach() / h.grad_accum_steps
            (loss / h.grad_accum_steps).backward()
        if h.world_size > 1:
            for p in base.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        return total

    def one_step(step, scale):
        loss = backward_pass()
        ramp = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1.0 - ramp) * h.muon_momentum_warmup_start + ramp * h.muon_momentum
        for group in bank.muon.param_groups:
            group["momentum"] = momentum
        bank.set_scale(scale)
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base.parameters(), h.grad_clip_norm)
        bank.step()
        return loss

    # compile both depths, then put everything back as it was
    if h.warmup_steps > 0:
        saved = {k: v.detach().clone() for k, v in base.state_dict().items()}
        saved_opt = bank.state_dicts()
        base.train()
        for looping in (False, True) if h.num_loops > 0 else (False,):
            base.looping = looping
            for _ in range(h.warmup_steps):
                one_step(0, 1.0)
        base.looping = False
        base.load_state_dict(saved, strict=True)
        bank.load_state_dicts(saved_opt)
        bank.zero_grad()
        loader = ShuffledWindows(h, device)

    average = WeightAverage(base, h.ema_decay)
    budget_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds) if h.max_wallclock_seconds > 0 else None
    clock.start()
    stop_at = None
    step = 0
    while True:
        final = step == h.iterations or (stop_at is not None and step >= stop_at)
        if final or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
            clock.pause()
            val_loss, val_bpb = eval_val(h, base, stream, device)
            log(f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}")
            clock.resume()
        if final:
            break
        elapsed = clock.ms()
        frac = elapsed / budget_ms if budget_ms else step / h.iterations
        if h.num_loops > 0 and not base.looping and frac >= h.enable_looping_at:
            base.looping = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{base.looped_order}")
        loss = one_step(step, lr_scale(h, frac))
        average.update(base)
        step += 1
        elapsed = clock.ms()
        if step <= 5 or step % h.train_log_every == 0:
            log(f"{step}/{h.iterations} train_loss: {loss.item():.4f} train_time: {elapsed / 60000:.1f}m")
        over = budget_ms is not None and elapsed >= budget_ms
        if dist.is_initialized() and budget_ms is not None:
            flag = torch.tensor(int(over), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            over = bool(flag.item())
        if stop_at is None and over:
            stop_at = step
    log(f"stopping at step {step}, train_time: {clock.ms():.0f}ms, peak memory {torch.cuda.max_memory_allocated() >> 20} MiB")
    average.load_into(base)
    return base, loader


class TrainClock:
    """Wall clock of training and calibration; stands still only while validation figures are printed."""

    def __init__(self):
        self.total = 0.0
        self.since = None

    def start(self):
        torch.cuda.synchronize()
        self.total, self.since = 0.0, time.perf_counter()

    def pause(self):
        torch.cuda.synchronize()
        self.total += time.perf_counter() - self.since
        self.since = None

    def resume(self):
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def ms(self):
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return 1000.0 * (self.total + running)


# ---------------------------------------------------------------- main


def timed_eval(label, fn):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn()
    torch.cuda.synchronize()
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{1000 * (time.perf_counter() - t0):.0f}ms")
    return val_loss, val_bpb


def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    stream = ValidationStream(h, device)
    log(f"train_shards: {len(sorted_glob(h.train_files))} val_tokens: {stream.tokens.numel() - 1}")

    clock = TrainClock()
    model, loader = train_model(h, device, stream, clock)
    grams = collect_hessians(h, model, loader, device)
    torch.cuda.synchronize()
    log(f"gptq: {h.gptq_calibration_batches} train batches, train+calibration {clock.ms():.0f}ms")
    timed_eval("pre-quantization post-ema", lambda: eval_val(h, model, stream, device))
    write_artifact(h, model, grams)
    if dist.is_initialized():
        dist.barrier()
    del model, loader, grams
    torch.cuda.empty_cache()

    model = read_artifact(h, device)
    timed_eval("quantized", lambda: eval_val(h, model, stream, device))
    final = None
    if h.sliding_enabled or not h.ttt_enabled:
        final = timed_eval("quantized_sliding_window", lambda: eval_sliding(h, model, stream, device))
    if h.ttt_enabled:
        torch._dynamo.reset()
        evaluator = PhasedEvaluator(h, model, stream, device)
        evaluator.warm_up()
        final = timed_eval("quantized_ttt_phased", evaluator.run)
    log(f"final val_loss:{final[0]:.8f} val_bpb:{final[1]:.8f}")


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
        run_id = [h.run_id]
        dist.broadcast_object_list(run_id, src=0)
        Hyperparameters.run_id = run_id[0]
        Hyperparameters.logfile = f"logs/{run_id[0]}.txt"
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    if h.is_main:
        os.makedirs("logs", exist_ok=True)
    _LOG_STATE["h"] = h
    log("Hyperparameters:", console=False)
    for name in sorted(n for n in vars(Hyperparameters) if re.fullmatch(r"[a-z]\w*", n)):
        log(f"  {name}: {getattr(h, name)}", console=False)
    log(f"Python {sys.version.split()[0]} PyTorch {torch.__version__}", console=False)
    train_and_eval(h, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
