import collections
import copy
import glob
import io
import math
import os
import random
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


def env(name, default):
    kind = type(default)
    raw = os.environ.get(name)
    if raw is None:
        return default
    return bool(int(raw)) if kind is bool else kind(raw)


class Hyperparameters:
    data_dir = env("DATA_DIR", "./data/")
    vocab_size = env("VOCAB_SIZE", 8192)
    seed = env("SEED", 1337)
    run_id = env("RUN_ID", str(uuid.uuid4()))

    # schedule
    iterations = env("ITERATIONS", 20000)
    warmup_steps = env("WARMUP_STEPS", 20)
    warmdown_frac = env("WARMDOWN_FRAC", 0.72)
    min_lr = env("MIN_LR", 0.0)
    train_batch_tokens = env("TRAIN_BATCH_TOKENS", 2048 * 48 * 8)
    train_seq_len = env("TRAIN_SEQ_LEN", 2048)
    train_log_every = env("TRAIN_LOG_EVERY", 500)
    max_wallclock_seconds = env("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env("GPTQ_RESERVE_SECONDS", 14.0)

    # validation
    val_batch_tokens = env("VAL_BATCH_TOKENS", 2048 * 32 * 8)
    eval_seq_len = env("EVAL_SEQ_LEN", 2048)
    val_loss_every = env("VAL_LOSS_EVERY", 4000)
    sliding_window_enabled = env("SLIDING_WINDOW_ENABLED", True)
    eval_stride = env("EVAL_STRIDE", 64)
    eval_limit_seconds = env("EVAL_LIMIT_SECONDS", 600.0)

    # model
    num_layers = env("NUM_LAYERS", 11)
    xsa_last_n = env("XSA_LAST_N", 11)
    model_dim = env("MODEL_DIM", 512)
    num_heads = env("NUM_HEADS", 8)
    num_kv_heads = env("NUM_KV_HEADS", 4)
    mlp_mult = env("MLP_MULT", 4.0)
    rope_base = env("ROPE_BASE", 10000.0)
    rope_dims = env("ROPE_DIMS", 16)
    logit_softcap = env("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env("QK_GAIN_INIT", 5.0)
    tied_embed_init_std = env("TIED_EMBED_INIT_STD", 0.005)
    ln_scale = env("LN_SCALE", True)
    skip_gates_enabled = env("SKIP_GATES_ENABLED", True)
    parallel_residual_start = env("PARALLEL_RESIDUAL_START", 7)
    num_loops = env("NUM_LOOPS", 2)
    loop_start = env("LOOP_START", 3)
    loop_end = env("LOOP_END", 5)
    enable_looping_at = env("ENABLE_LOOPING_AT", 0.35)

    # optimizer
    tied_embed_lr = env("TIED_EMBED_LR", 0.03)
    matrix_lr = env("MATRIX_LR", 0.022)
    scalar_lr = env("SCALAR_LR", 0.02)
    muon_momentum = env("MUON_MOMENTUM", 0.99)
    muon_momentum_warmup_start = env("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_warmup_steps = env("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_backend_steps = env("MUON_BACKEND_STEPS", 5)
    muon_row_normalize = env("MUON_ROW_NORMALIZE", True)
    muon_wd = env("MUON_WD", 0.095)
    embed_wd = env("EMBED_WD", 0.085)
    adam_wd = env("ADAM_WD", 0.02)
    beta1 = env("BETA1", 0.9)
    beta2 = env("BETA2", 0.95)
    adam_eps = env("ADAM_EPS", 1e-8)
    grad_clip_norm = env("GRAD_CLIP_NORM", 0.3)
    ema_decay = env("EMA_DECAY", 0.9965)

    # quantisation
    matrix_bits = env("MATRIX_BITS", 6)
    embed_bits = env("EMBED_BITS", 7)
    matrix_clip_sigmas = env("MATRIX_CLIP_SIGMAS", 12.85)
    embed_clip_sigmas = env("EMBED_CLIP_SIGMAS", 15.0)
    gptq_calibration_batches = env("GPTQ_CALIBRATION_BATCHES", 64)
    size_limit = env("SIZE_LIMIT", 16_000_000)

    # test-time training
    ttt_enabled = env("TTT_ENABLED", True)
    ttt_lora_rank = env("TTT_LORA_RANK", 96)
    ttt_lora_lr = env("TTT_LORA_LR", 1e-4)
    ttt_chunk_size = env("TTT_CHUNK_SIZE", 48)
    ttt_batch_size = env("TTT_BATCH_SIZE", 64)
    ttt_beta2 = env("TTT_BETA2", 0.999)
    ttt_weight_decay = env("TTT_WEIGHT_DECAY", 0.5)
    ttt_grad_steps = env("TTT_GRAD_STEPS", 1)
    tilt_order = env("TILT_ORDER", 4)
    tilt_betas = env("TILT_BETAS", "0.55,1.05,1.6")

    # ranks
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = env("RANK", 0)
    world_size = env("WORLD_SIZE", 1)
    local_rank = env("LOCAL_RANK", 0)
    is_main_process = rank == 0
    grad_accum_steps = max(8 // world_size, 1)

    # paths
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    quantized_model_path = "final_model.int6.ptz"


_log_to = None


def set_logging(h):
    global _log_to
    _log_to = h


def log(msg, console=True):
    if _log_to is None:
        print(msg)
        return
    if _log_to.is_main_process:
        if console:
            print(msg, flush=True)
        with open(_log_to.logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)


# ---- data


SHARD_HEADER = 256 * np.dtype("<i4").itemsize
_mmaps = {}


def shard_tokens(file):
    key = str(file)
    if key not in _mmaps:
        header = np.fromfile(file, dtype="<i4", count=256)
        if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
            raise ValueError(f"bad shard header: {file}")
        n = int(header[2])
        if os.path.getsize(file) != SHARD_HEADER + 2 * n:
            raise ValueError(f"shard size does not match its header: {file}")
        _mmaps[key] = np.memmap(file, mode="r", dtype="<u2", offset=SHARD_HEADER, shape=(n,))
    return _mmaps[key]


def load_shard(file):
    return torch.from_numpy(np.array(shard_tokens(file), dtype=np.uint16))


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(pattern)
    return torch.cat([load_shard(f) for f in files]).contiguous()


def build_sentencepiece_luts(sp, vocab_size, device):
    sp_vocab = int(sp.vocab_size())
    if sp.piece_to_id("\u2581") == sp.unk_id():
        raise ValueError("the tokenizer has no piece for a single space")
    size = max(sp_vocab, vocab_size)
    base_bytes = np.zeros((size,), dtype=np.int16)
    has_space = np.zeros((size,), dtype=np.bool_)
    is_boundary = np.ones((size,), dtype=np.bool_)
    for i in range(sp_vocab):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        is_boundary[i] = False
        if sp.is_byte(i):
            base_bytes[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            has_space[i] = True
            piece = piece[1:]
        base_bytes[i] = len(piece.encode("utf-8"))
    as_tensor = lambda a, dt: torch.tensor(a, dtype=dt, device=device)
    return as_tensor(base_bytes, torch.int16), as_tensor(has_space, torch.bool), as_tensor(is_boundary, torch.bool)


class ValidationData:
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {self.sp.vocab_size()}")
        self.bos_id = self.sp.bos_id()
        self.tokens = load_validation_tokens(h.val_files)
        self.base_bytes, self.has_space, self.is_boundary = build_sentencepiece_luts(self.sp, h.vocab_size, device)

    def byte_counts(self, prev_ids, target_ids):
        n = self.base_bytes[target_ids].to(torch.int32)
        n += (self.has_space[target_ids] & ~self.is_boundary[prev_ids]).to(torch.int32)
        return n


class SequenceLoader:
    """Sequences in a random order, shard by shard; every rank has shards of its own."""

    def __init__(self, h, device, seed_offset=0, pattern=None):
        self.world_size, self.rank, self.device = h.world_size, h.rank, device
        self.seq_len = h.train_seq_len
        files = [Path(p) for p in sorted(glob.glob(pattern or h.train_files))]
        if not files:
            raise FileNotFoundError(pattern or h.train_files)
        self.files = files[h.rank :: h.world_size] if len(files) >= h.world_size else files
        self.rng = np.random.Generator(np.random.PCG64([h.seed + seed_offset, h.rank]))
        self.num_tokens = [len(shard_tokens(f)) for f in self.files]
        self.starts = [[] for _ in self.files]
        for si in range(len(self.files)):
            self._refill(si)

    def _refill(self, si):
        n = self.num_tokens[si]
        phase = int(self.rng.integers(min(self.seq_len, max(1, n - self.seq_len - 1))))
        count = (n - 1 - phase) // self.seq_len
        self.starts[si] = (phase + self.rng.permutation(count) * self.seq_len).tolist()

    def next_batch(self, global_tokens, grad_accum_steps):
        rows = global_tokens // (self.world_size * grad_accum_steps) // self.seq_len
        left = np.array([len(s) for s in self.starts], dtype=np.float64)
        x = torch.empty((rows, self.seq_len), dtype=torch.int64)
        y = torch.empty((rows, self.seq_len), dtype=torch.int64)
        for r in range(rows):
            if left.sum() <= 0:
                for si in range(len(self.files)):
                    self._refill(si)
                left = np.array([len(s) for s in self.starts], dtype=np.float64)
            si = int(self.rng.choice(len(self.files), p=left / left.sum()))
            start = self.starts[si].pop()
            left[si] -= 1
            window = np.array(shard_tokens(self.files[si])[start : start + self.seq_len + 1], dtype=np.int64)
            window = torch.from_numpy(window)
            x[r], y[r] = window[:-1], window[1:]
        x = x.pin_memory().to(self.device, non_blocking=True)
        return x, y.pin_memory().to(self.device, non_blocking=True)


# ---- model


class RMSNorm(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    def forward(self, x):
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, head_dim, base, train_seq_len, rope_dims):
        super().__init__()
        self.base, self.train_seq_len = base, train_seq_len
        self.rope_dims = rope_dims if rope_dims > 0 else head_dim
        self.register_buffer("inv_freq", self._freqs(base), persistent=False)
        self._key, self._cos, self._sin = None, None, None

    def _freqs(self, base):
        return 1.0 / base ** (torch.arange(0, self.rope_dims, 2, dtype=torch.float32) / self.rope_dims)

    def forward(self, seq_len, device, dtype):
        if self._key != (seq_len, device):
            inv_freq = self.inv_freq.to(device)
            if seq_len > self.train_seq_len:
                scale = seq_len / self.train_seq_len
                rd = self.rope_dims
                inv_freq = self._freqs(self.base * scale ** (rd / (rd - 2))).to(device)
            angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), inv_freq)
            self._cos = angles.cos()[None, :, None, :]
            self._sin = angles.sin()[None, :, None, :]
            self._key = (seq_len, device)
        return self._cos.to(dtype), self._sin.to(dtype)


def apply_rotary(x, cos, sin, rope_dims):
    rot, keep = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    a, b = rot[..., :half], rot[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, keep), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.num_heads, self.num_kv_heads = h.num_heads, h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init))
        self.rope_dims = h.rope_dims
        self.rotary = Rotary(self.head_dim, h.rope_base, h.train_seq_len, h.rope_dims)
        self.use_xsa = False

    def _xsa(self, y, v):
        B, T, nh, hd = y.shape
        nkv = v.size(-2)
        y_g = y.reshape(B, T, nkv, nh // nkv, hd)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, T, nh, hd)

    def forward(self, x, lora=None, slot=0):
        B, T, D = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if lora is not None:
            q = q + lora.q[slot](x)
            k = k + lora.k[slot](x)
            v = v + lora.v[slot](x)
        q = q.reshape(B, T, self.num_heads, self.head_dim)
        k = k.reshape(B, T, self.num_kv_heads, self.head_dim)
        v = v.reshape(B, T, self.num_kv_heads, self.head_dim)
        q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(T, x.device, q.dtype)
        q, k = apply_rotary(q, cos, sin, self.rope_dims), apply_rotary(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = flash_attn_3_func(q, k, v, causal=True)
        if self.use_xsa:
            y = self._xsa(y, v)
        return self.proj(y.reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, dim, mult):
        super().__init__()
        hidden = int(mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x, lora=None, slot=0):
        up = self.fc(x)
        out = self.proj(F.leaky_relu(up, negative_slope=0.5).square())
        return out if lora is None else out + lora.mlp[slot](x)


class Block(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attn = CausalSelfAttention(h)
        self.mlp = MLP(h.model_dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))))
        self.norm_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = layer_idx >= h.parallel_residual_start

    def forward(self, x, x0, lora=None, slot=0):
        mix = self.resid_mix.to(x.dtype)
        x_in = mix[0] * x + mix[1] * x0
        a_scale, m_scale = self.attn_scale.to(x.dtype), self.mlp_scale.to(x.dtype)
        attn_out = self.attn(self.attn_norm(x_in) * self.norm_factor, lora, slot)
        if self.parallel:
            mlp_out = self.mlp(self.mlp_norm(x_in) * self.norm_factor, lora, slot)
            return x_in + a_scale * attn_out + m_scale * mlp_out
        x_mid = x_in + a_scale * attn_out
        return x_mid + m_scale * self.mlp(self.mlp_norm(x_mid) * self.norm_factor, lora, slot)


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.logit_softcap = h.logit_softcap
        self.tied_embed_init_std = h.tied_embed_init_std
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
            self.blocks[i].attn.use_xsa = True
        order = list(range(h.loop_start))
        for _ in range(h.num_loops + 1):
            order += range(h.loop_start, h.loop_end + 1)
        order += range(h.loop_end + 1, h.num_layers)
        self.looped_order = order if h.num_loops > 0 else list(range(h.num_layers))
        self.plain_order = list(range(h.num_layers))
        self.looping_active = False
        num_skips = len(self.looped_order) // 2
        self.skip_weights = nn.Parameter(torch.ones(num_skips, h.model_dim))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips, h.model_dim)) if h.skip_gates_enabled else None
        self.final_norm = RMSNorm()
        self._init_weights()

    def _init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    @property
    def num_slots(self):
        return len(self.looped_order)

    def hidden(self, ids, lora=None):
        x = F.rms_norm(self.tok_emb(ids), (self.tok_emb.embedding_dim,))
        x0 = x
        order = self.looped_order if self.looping_active else self.plain_order
        half = len(order) // 2
        skips = []
        for slot, i in enumerate(order):
            if slot >= half and skips:
                k = slot - half
                skip = self.skip_weights[k].to(x.dtype)[None, None, :] * skips.pop()
                if self.skip_gates is not None:
                    g = torch.sigmoid(self.skip_gates[k].to(x.dtype))[None, None, :]
                    x = torch.lerp(skip, x, g)
                else:
                    x = x + skip
            x = self.blocks[i](x, x0, lora, slot)
            if slot < half:
                skips.append(x)
        return self.final_norm(x)

    def head(self, x, lora=None):
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        if lora is not None:
            logits = logits + lora.head(x)
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, ids, lora=None):
        return self.head(self.hidden(ids, lora), lora)

    def forward(self, ids, targets):
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="mean")


class BatchedLoRA(nn.Module):
    """One low-rank map per document of the batch."""

    def __init__(self, bsz, n_in, n_out, rank):
        super().__init__()
        self.bound = 1.0 / math.sqrt(n_in)
        self.A = nn.Parameter(torch.empty(bsz, rank, n_in).uniform_(-self.bound, self.bound))
        self.B = nn.Parameter(torch.zeros(bsz, n_out, rank))

    def reset(self):
        with torch.no_grad():
            self.A.uniform_(-self.bound, self.bound)
            self.B.zero_()

    def forward(self, x):
        return (x @ self.A.to(x.dtype).transpose(1, 2)) @ self.B.to(x.dtype).transpose(1, 2)


class DocumentLoRA(nn.Module):
    def __init__(self, bsz, model, rank):
        super().__init__()
        dim = model.tok_emb.embedding_dim
        kv = model.blocks[0].attn.c_k.weight.size(0)
        make = lambda n_out: nn.ModuleList([BatchedLoRA(bsz, dim, n_out, rank) for _ in range(model.num_slots)])
        self.q, self.k, self.v, self.mlp = make(dim), make(kv), make(kv), make(dim)
        self.head = BatchedLoRA(bsz, dim, model.tok_emb.num_embeddings, rank)

    def reset(self):
        for module in self.modules():
            if isinstance(module, BatchedLoRA):
                module.reset()


# ---- optimizers


@torch.compile
def zeropower_via_newtonschulz5(G, steps=5, eps=1e-7):
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16()
    X /= X.norm() + eps
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, backend_steps, weight_decay=0.0, row_normalize=True):
        defaults = dict(lr=lr, momentum=momentum, backend_steps=backend_steps)
        defaults.update(weight_decay=weight_decay, row_normalize=row_normalize)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        sharded = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if sharded else 1
        rank = dist.get_rank() if sharded else 0
        for group in self.param_groups:
            params = group["params"]
            lr, momentum = group["lr"], group["momentum"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
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
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if sharded:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                if group["weight_decay"] > 0:
                    p.data.mul_(1.0 - lr * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-lr)
                at += p.numel()


CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates")


class Optimizers:
    def __init__(self, h, model):
        named = list(model.blocks.named_parameters())
        is_control = lambda name: any(c in name for c in CONTROL)
        matrices = [p for n, p in named if p.ndim == 2 and not is_control(n)]
        scalars = [p for n, p in named if p.ndim < 2 or is_control(n)]
        scalars.append(model.skip_weights)
        if model.skip_gates is not None:
            scalars.append(model.skip_gates)
        adam = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.tok = torch.optim.AdamW(
            [dict(params=[model.tok_emb.weight], lr=h.tied_embed_lr, base_lr=h.tied_embed_lr)],
            weight_decay=h.embed_wd,
            **adam,
        )
        self.muon = Muon(
            matrices,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.scalar = torch.optim.AdamW(
            [dict(params=scalars, lr=h.scalar_lr, base_lr=h.scalar_lr)], weight_decay=h.adam_wd, **adam
        )
        self.all = [self.tok, self.muon, self.scalar]

    def set_lr(self, scale):
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def set_momentum(self, momentum):
        for group in self.muon.param_groups:
            group["momentum"] = momentum

    def step(self):
        for opt in self.all:
            opt.step()
        self.zero_grad()

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)


def restore_fp32(model):
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, p in model.named_parameters():
        if (p.ndim < 2 or any(c in name for c in CONTROL)) and p.dtype != torch.float32:
            p.data = p.data.float()


class Ema:
    def __init__(self, model, decay):
        self.decay = decay
        self.state = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for k, v in model.state_dict().items():
            self.state[k].mul_(self.decay).add_(v.detach().float(), alpha=1.0 - self.decay)

    def apply(self, model):
        own = model.state_dict()
        model.load_state_dict({k: v.to(own[k].dtype) for k, v in self.state.items()}, strict=True)


# ---- quantisation


@torch.no_grad()
def collect_hessians(model, loader, h, device):
    hessians, hooks = {}, []

    def accumulate(name, x):
        x = x.detach().float().reshape(-1, x.size(-1))
        if name not in hessians:
            hessians[name] = torch.zeros(x.size(1), x.size(1), device=device)
        hessians[name].addmm_(x.T, x)

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
            key = name + ".weight"
            hooks.append(module.register_forward_hook(lambda m, inp, out, key=key: accumulate(key, inp[0])))
    hooks.append(model.final_norm.register_forward_hook(lambda m, inp, out: accumulate("tok_emb.weight", out)))
    model.eval()
    per_rank = max(1, h.gptq_calibration_batches // h.world_size)
    for _ in range(per_rank):
        x, _ = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.forward_logits(x)
    for hook in hooks:
        hook.remove()
    for name in sorted(hessians):
        if h.distributed:
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
        hessians[name] /= per_rank * h.world_size
    return {k: v.cpu() for k, v in hessians.items()}


def gptq_quantize_weight(w, H, clip_sigmas, clip_range, block_size=128):
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    H.diagonal().add_(0.01 * H.diag().mean())
    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W = W_orig[:, perm].clone()
    W[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)
    s = (clip_sigmas * W_orig.std(dim=1) / clip_range).clamp_min(1e-10).to(torch.float16)
    sf = s.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W.device)
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        block = W[:, i1:i2].clone()
        hinv = Hinv[i1:i2, i1:i2]
        err = torch.zeros(rows, i2 - i1, device=W.device)
        for j in range(i2 - i1):
            q = torch.clamp(torch.round(block[:, j] / sf), -clip_range, clip_range)
            Q[:, i1 + j] = q.to(torch.int8)
            e = (block[:, j] - q * sf) / hinv[j, j]
            err[:, j] = e
            block[:, j:] -= e.unsqueeze(1) * hinv[j, j:].unsqueeze(0)
        if i2 < cols:
            W[:, i2:] -= err @ Hinv[i1:i2, i2:]
    return Q[:, invperm].contiguous(), s


def quantize_state_dict(state, hessians, h, device):
    result, meta = {}, {}
    counts = collections.Counter()
    for name, t in state.items():
        t = t.detach()
        if not t.is_floating_point() or t.numel() <= 65536:
            result[name] = (t.to(torch.float16) if t.is_floating_point() else t).cpu().contiguous()
            meta[name] = "passthrough"
            counts["passthrough"] += 1
            continue
        embed = name == "tok_emb.weight"
        bits = h.embed_bits if embed else h.matrix_bits
        sigmas = h.embed_clip_sigmas if embed else h.matrix_clip_sigmas
        q, s = gptq_quantize_weight(t.to(device), hessians[name].to(device), sigmas, 2 ** (bits - 1) - 1)
        result[name + ".q"], result[name + ".scale"] = q.cpu(), s.cpu()
        meta[name] = f"gptq int{bits}"
        counts[meta[name]] += 1
    log("quantised tensors: " + ", ".join(f"{k}: {n}" for k, n in sorted(counts.items())))
    return result, meta


def dequantize_state_dict(result, meta, template):
    out = {}
    for name, orig in template.items():
        if meta[name] == "passthrough":
            out[name] = result[name].to(orig.dtype)
        else:
            q, s = result[name + ".q"], result[name + ".scale"]
            out[name] = (q.float() * s.float().view(-1, *[1] * (q.ndim - 1))).to(orig.dtype)
    return out


SHUFFLE_MAGIC = b"BSHF"


def byte_shuffle(data, stride=2):
    src = np.frombuffer(data, dtype=np.uint8)
    planes = [src[pos::stride] for pos in range(stride)]
    return SHUFFLE_MAGIC + bytes([stride]) + np.concatenate(planes).tobytes()


def byte_unshuffle(data):
    if data[:4] != SHUFFLE_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    out = np.empty(len(payload), dtype=np.uint8)
    at = 0
    for pos in range(stride):
        n = len(payload) // stride + (1 if pos < len(payload) % stride else 0)
        out[pos::stride][:n] = payload[at : at + n]
        at += n
    return out.tobytes()


def pack(obj):
    buf = io.BytesIO()
    torch.save(obj, buf)
    return brotli.compress(byte_shuffle(buf.getvalue()), quality=11)


def unpack(blob):
    return torch.load(io.BytesIO(byte_unshuffle(brotli.decompress(blob))), map_location="cpu")


def serialize(h, model, hessians, device):
    code = Path(__file__).read_bytes()
    result, meta = quantize_state_dict(model.state_dict(), hessians, h, device)
    if h.is_main_process:
        blob = pack(dict(w=result, m=meta))
        with open(h.quantized_model_path, "wb") as f:
            f.write(blob)
        total = len(blob) + len(code)
        log(f"Serialized model int{h.matrix_bits}+brotli: {len(blob)} bytes")
        log(f"Code size: {len(code)} bytes")
        log(f"Total submission size: {total} bytes (limit {h.size_limit})")
        if total > h.size_limit:
            raise RuntimeError(f"submission too large: {total} > {h.size_limit}")
    if h.distributed:
        dist.barrier()


def deserialize(h, device):
    model = GPT(h).to(device).bfloat16()
    restore_fp32(model)
    packed = unpack(Path(h.quantized_model_path).read_bytes())
    model.load_state_dict(dequantize_state_dict(packed["w"], packed["m"], model.state_dict()), strict=True)
    model.looping_active = h.num_loops > 0
    return model


# ---- evaluation


def reduce_sums(h, *sums):
    if h.distributed:
        for s in sums:
            dist.all_reduce(s, op=dist.ReduceOp.SUM)
    return [float(s.item()) for s in sums]


def loss_and_bpb(loss_sum, token_count, byte_count):
    return loss_sum / token_count, loss_sum / math.log(2.0) / byte_count


def zeros(device, n=3):
    return [torch.zeros((), device=device, dtype=torch.float64) for _ in range(n)]


def eval_val(h, device, val, model):
    seq_len = h.eval_seq_len
    total = val.tokens.numel() - 1
    rows = (total + seq_len - 1) // seq_len
    lo, hi = rows * h.rank // h.world_size, rows * (h.rank + 1) // h.world_size
    batch = max(1, h.val_batch_tokens // (h.world_size * seq_len * h.grad_accum_steps))
    loss_sum, token_count, byte_count = zeros(device)
    model.eval()
    with torch.inference_mode():
        for r in range(lo, hi, batch):
            n = min(batch, hi - r)
            x = torch.zeros(n, seq_len, dtype=torch.int64)
            y = torch.zeros(n, seq_len, dtype=torch.int64)
            real = torch.zeros(n, seq_len, dtype=torch.bool)
            for i in range(n):
                start = (r + i) * seq_len
                window = val.tokens[start : start + seq_len + 1].to(torch.int64)
                x[i, : window.numel() - 1], y[i, : window.numel() - 1] = window[:-1], window[1:]
                real[i, : window.numel() - 1] = True
            x, y, real = x.to(device), y.to(device), real.to(device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(x)
            nll = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
            loss_sum += nll[real].double().sum()
            token_count += real.sum()
            byte_count += val.byte_counts(x, y)[real].sum()
    model.train()
    return loss_and_bpb(*reduce_sums(h, loss_sum, token_count, byte_count))


def eval_val_sliding(h, device, val, model, batch_seqs=32):
    seq_len, stride = h.eval_seq_len, h.eval_stride
    context = seq_len - stride
    total = val.tokens.numel() - 1
    starts = [ws for ws in range(0, total, stride) if ws == 0 or ws + context < total]
    lo, hi = len(starts) * h.rank // h.world_size, len(starts) * (h.rank + 1) // h.world_size
    mine = starts[lo:hi]
    loss_sum, token_count, byte_count = zeros(device)
    model.eval()
    forward = torch.compile(model.forward_logits, dynamic=False)
    with torch.inference_mode():
        for b in range(0, len(mine), batch_seqs):
            batch = mine[b : b + batch_seqs]
            x = torch.zeros(batch_seqs, seq_len, dtype=torch.int64)
            y = torch.zeros(batch_seqs, seq_len, dtype=torch.int64)
            counted = torch.zeros(batch_seqs, seq_len, dtype=torch.bool)
            for i, ws in enumerate(batch):
                we = min(ws + seq_len, total)
                window = val.tokens[ws : we + 1].to(torch.int64)
                x[i, : we - ws], y[i, : we - ws] = window[:-1], window[1:]
                counted[i, (0 if ws == 0 else context) : we - ws] = True
            x, y, counted = x.to(device), y.to(device), counted.to(device)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = forward(x)
            nll = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
            loss_sum += nll[counted].double().sum()
            token_count += counted.sum()
            byte_count += val.byte_counts(x, y)[counted].sum()
    return loss_and_bpb(*reduce_sums(h, loss_sum, token_count, byte_count))


# ---- test-time training, one LoRA per document


def find_documents(val):
    """(start, predicted tokens) of every document; the next document's BOS is its last target."""
    starts = (val.tokens.to(torch.int32) == val.bos_id).nonzero().flatten().tolist()
    total = val.tokens.numel()
    if not starts or starts[0] != 0:
        starts.insert(0, 0)
    docs = []
    for i, start in enumerate(starts):
        end = starts[i + 1] + 1 if i + 1 < len(starts) else total
        if end - start >= 2:
            docs.append((start, end - start - 1))
    return docs


def document_batches(h, docs):
    """Batches of documents of like length, longest first; each rank takes every world_size-th."""
    ranked = sorted(docs, key=lambda d: (-d[1], d[0]))
    batches = [ranked[i : i + h.ttt_batch_size] for i in range(0, len(ranked), h.ttt_batch_size)]
    return batches[h.rank :: h.world_size]


def match_hints(tokens, order, levels):
    """For every target of one document: the token that last followed the same n-gram before, and how sure that is."""
    n = len(tokens) - 1
    hint = np.full(n, -1, dtype=np.int64)
    level = np.zeros(n, dtype=np.int64)
    seen = {}
    for t in range(order - 1, n):
        key = tuple(tokens[t - order + 1 : t + 1])
        known = seen.get(key)
        if known is not None:
            hint[t], level[t] = known[0], min(known[1], levels)
        target = tokens[t + 1]
        seen[key] = (target, known[1] + 1) if known is not None and known[0] == target else (target, 1)
    return hint, level


class Tilt:
    """p'(a) = p(a) exp(beta [a = hint]) / Z with Z = 1 + p(hint) (exp(beta) - 1)."""

    def __init__(self, h, device):
        betas = [float(b) for b in h.tilt_betas.split(",") if b]
        self.levels = len(betas)
        self.betas = torch.tensor([0.0] + betas, device=device)

    def nll(self, logits, targets, hint, level):
        logp = F.log_softmax(logits.float(), dim=-1)
        own = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        beta = torch.where(hint >= 0, self.betas[level], torch.zeros_like(own))
        p_hint = logp.gather(-1, hint.clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
        log_z = torch.log1p(p_hint * torch.expm1(beta))
        return -(own + beta * (targets == hint) - log_z)


def chunk_window(ci, pred_len, chunk, seq_len):
    start = ci * chunk
    end = min(start + chunk, pred_len)
    win_start = max(0, end - seq_len)
    return win_start, end - win_start, start - win_start, end - start


def make_lora_optimizer(h, lora):
    return torch.optim.AdamW(
        lora.parameters(),
        lr=h.ttt_lora_lr,
        betas=(0.0, h.ttt_beta2),
        eps=1e-10,
        weight_decay=h.ttt_weight_decay,
        fused=True,
    )


def reset_optimizer(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            for v in opt.state.get(p, {}).values():
                if torch.is_tensor(v):
                    v.zero_()


def warm_up_ttt(h, device, model, forward):
    """Compiles the graphs on random tokens."""
    lora = DocumentLoRA(h.ttt_batch_size, model, h.ttt_lora_rank).to(device)
    opt = make_lora_optimizer(h, lora)
    for length in (h.ttt_chunk_size, 2 * h.ttt_chunk_size, h.eval_seq_len):
        ids = torch.randint(0, h.vocab_size, (h.ttt_batch_size, length + 1), device=device)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = forward(ids[:, :-1], lora)
        F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:]).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)


def eval_val_ttt(h, device, val, model):
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    forward = torch.compile(model.forward_logits, dynamic=True)
    warm_up_ttt(h, device, model, forward)
    docs = find_documents(val)
    batches = document_batches(h, docs)
    tilt = Tilt(h, device)
    chunk, seq_len = h.ttt_chunk_size, h.eval_seq_len
    loss_sum, token_count, byte_count = zeros(device)
    full_lora = DocumentLoRA(h.ttt_batch_size, model, h.ttt_lora_rank).to(device)
    full_opt = make_lora_optimizer(h, full_lora)
    t0 = time.perf_counter()
    for bi, batch in enumerate(batches):
        bsz = len(batch)
        if bsz == h.ttt_batch_size:
            lora, opt = full_lora, full_opt
            lora.reset()
            reset_optimizer(opt)
        else:
            lora = DocumentLoRA(bsz, model, h.ttt_lora_rank).to(device)
            opt = make_lora_optimizer(h, lora)
        pred_lens = [n for _, n in batch]
        num_chunks = [(n + chunk - 1) // chunk for n in pred_lens]
        texts = [val.tokens[s : s + n + 1].to(torch.int64) for s, n in batch]
        hinted = [match_hints(t.tolist(), h.tilt_order, tilt.levels) for t in texts]
        for ci in range(max(num_chunks)):
            width = min(seq_len, (ci + 1) * chunk)
            x = torch.zeros(bsz, width, dtype=torch.int64)
            y = torch.zeros(bsz, width, dtype=torch.int64)
            hint = torch.full((bsz, width), -1, dtype=torch.int64)
            level = torch.zeros(bsz, width, dtype=torch.int64)
            scored = torch.zeros(bsz, width, dtype=torch.bool)
            trained = torch.zeros(bsz, width, dtype=torch.bool)
            for i in range(bsz):
                if ci >= num_chunks[i]:
                    continue
                ws, wl, off, cl = chunk_window(ci, pred_lens[i], chunk, seq_len)
                x[i, :wl] = texts[i][ws : ws + wl]
                y[i, :wl] = texts[i][ws + 1 : ws + wl + 1]
                hint[i, :wl] = torch.from_numpy(hinted[i][0][ws : ws + wl])
                level[i, :wl] = torch.from_numpy(hinted[i][1][ws : ws + wl])
                scored[i, off : off + cl] = True
                trained[i, off : off + cl] = ci < num_chunks[i] - 1
            x, y, hint, level = x.to(device), y.to(device), hint.to(device), level.to(device)
            scored, trained = scored.to(device), trained.to(device)
            needs_train = ci < max(num_chunks) - 1
            with torch.set_grad_enabled(needs_train), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = forward(x, lora)
            with torch.no_grad():
                nll = tilt.nll(logits.detach(), y, hint, level)
                loss_sum += nll[scored].double().sum()
                token_count += scored.sum()
                byte_count += val.byte_counts(x, y)[scored].sum()
            if needs_train:
                for gs in range(h.ttt_grad_steps):
                    if gs > 0:
                        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                            logits = forward(x, lora)
                    ce = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
                    per_doc = (ce * trained).sum(dim=1) / trained.sum(dim=1).clamp_min(1)
                    opt.zero_grad(set_to_none=True)
                    per_doc.sum().backward()
                    opt.step()
        if bi % 20 == 0 or bi == len(batches) - 1:
            running = loss_sum.item() / math.log(2.0) / max(byte_count.item(), 1.0)
            log(f"ttt batch {bi + 1}/{len(batches)} bpb:{running:.6f} time:{time.perf_counter() - t0:.1f}s")
    sums = reduce_sums(h, loss_sum, token_count, byte_count)
    log(f"ttt scored tokens:{int(sums[1])} of {val.tokens.numel() - 1} bytes:{int(sums[2])}")
    return loss_and_bpb(*sums)


def timed_eval(label, fn, *args, **kwargs):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args, **kwargs)
    torch.cuda.synchronize()
    ms = 1000.0 * (time.perf_counter() - t0)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{ms:.0f}ms")
    return val_loss, val_bpb


# ---- training


def train_model(h, device, val):
    base = GPT(h).to(device).bfloat16()
    restore_fp32(base)
    compiled = torch.compile(base, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[h.local_rank], broadcast_buffers=False) if h.distributed else compiled
    log(f"model_params:{sum(p.numel() for p in base.parameters())}")
    optimizers = Optimizers(h, base)
    loader = SequenceLoader(h, device)
    budget_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
    log(f"train budget {budget_ms:.0f}ms, {h.gptq_reserve_seconds:.0f}s kept back for gptq")

    def progress(step, elapsed_ms):
        return max(step / max(h.iterations, 1), elapsed_ms / max(budget_ms, 1e-9))

    def lr_scale(frac):
        if frac >= 1.0 - h.warmdown_frac:
            return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
        return 1.0

    def one_step(step, scale):
        optimizers.zero_grad()
        train_loss = torch.zeros((), device=device)
        for micro in range(h.grad_accum_steps):
            if h.distributed:
                model.require_backward_grad_sync = micro == h.grad_accum_steps - 1
            x, y = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss / h.grad_accum_steps).backward()
        frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
        optimizers.set_momentum((1 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum)
        optimizers.set_lr(scale)
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base.parameters(), h.grad_clip_norm)
        optimizers.step()
        return train_loss / h.grad_accum_steps

    if h.warmup_steps > 0:
        saved_model = {k: v.detach().cpu().clone() for k, v in base.state_dict().items()}
        saved_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers.all]
        model.train()
        for looping in (False, True):
            base.looping_active = looping and h.num_loops > 0
            for i in range(h.warmup_steps):
                one_step(i, 1.0)
        base.looping_active = False
        base.load_state_dict(saved_model, strict=True)
        for opt, state in zip(optimizers.all, saved_opts, strict=True):
            opt.load_state_dict(state)
        optimizers.zero_grad()
        loader = SequenceLoader(h, device)
        log(f"warmup done: {h.warmup_steps} steps plain, {h.warmup_steps} looped, weights restored")

    ema = Ema(base, h.ema_decay)
    training_ms = 0.0
    stop_after = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last = step == h.iterations or (stop_after is not None and step >= stop_after)
        if last or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
            torch.cuda.synchronize()
            training_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val, base)
            log(f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last:
            if stop_after is not None and step < h.iterations:
                log(f"stopping_early: wallclock_cap train_time:{training_ms:.0f}ms step:{step}/{h.iterations}")
            break
        elapsed = training_ms + 1000.0 * (time.perf_counter() - t0)
        frac = progress(step, elapsed)
        if h.num_loops > 0 and not base.looping_active and frac >= h.enable_looping_at:
            base.looping_active = True
            log(f"looping enabled at step:{step} frac:{frac:.3f} order:{base.looped_order}")
        train_loss = one_step(step, lr_scale(frac))
        ema.update(base)
        step += 1
        elapsed = training_ms + 1000.0 * (time.perf_counter() - t0)
        if step <= 5 or step % h.train_log_every == 0:
            log(f"step:{step}/{h.iterations} train_loss:{train_loss.item():.4f} train_time:{elapsed:.0f}ms")
        reached = torch.tensor(int(elapsed >= budget_ms), device=device)
        if h.distributed:
            dist.all_reduce(reached, op=dist.ReduceOp.MAX)
        if stop_after is None and reached.item():
            stop_after = step
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024**2} MiB")
    t1 = time.perf_counter()
    ema.apply(base)
    base.looping_active = h.num_loops > 0
    calibration = SequenceLoader(h, device, seed_offset=1000)
    hessians = collect_hessians(base, calibration, h, device)
    torch.cuda.synchronize()
    training_ms += 1000.0 * (time.perf_counter() - t1)
    log(f"gptq: {len(hessians)} hessians, training and calibration took {training_ms:.0f}ms")
    return base, hessians


def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    val = ValidationData(h, device)
    log(f"train shards:{len(glob.glob(h.train_files))} val tokens:{val.tokens.numel() - 1}")
    base, hessians = train_model(h, device, val)
    timed_eval("pre-quantization", eval_val, h, device, val, base)
    serialize(h, base, hessians, device)
    del base, hessians
    torch.cuda.empty_cache()

    eval_start = time.perf_counter()
    model = deserialize(h, device)
    torch._dynamo.reset()
    result = timed_eval("quantized", eval_val, h, device, val, model)
    if h.sliding_window_enabled:
        result = timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val, model)
    if h.ttt_enabled:
        torch._dynamo.reset()
        result = timed_eval("quantized_ttt", eval_val_ttt, h, device, val, model)
    total_eval = time.perf_counter() - eval_start
    log(f"total_eval_time:{total_eval:.1f}s (limit {h.eval_limit_seconds:.0f}s)")
    if total_eval > h.eval_limit_seconds:
        raise RuntimeError("evaluation took too long")
    log(f"final_val_loss:{result[0]:.8f} final_val_bpb:{result[1]:.8f}")


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
    torch._dynamo.config.optimize_ddp = False
    if h.is_main_process:
        os.makedirs("logs", exist_ok=True)
        set_logging(h)
        for name in sorted(dir(h)):
            value = getattr(h, name)
            if not name.startswith("_") and not callable(value):
                log(f"  {name}: {value}", console=False)
        log(Path(__file__).read_text(encoding="utf-8"), console=False)
        log(f"python {sys.version.split()[0]} torch {torch.__version__}", console=False)
    set_logging(h)
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
