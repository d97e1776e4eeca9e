"""
SP8192 + CaseOps, 11L x 512, phased doc-LoRA TTT, n-gram hints.

Run (8xH100):
    RUN_ID=texa SEED=1337 torchrun --standalone --nproc_per_node=8 train_gpt.py

Everything that matters is an environment variable, see Hyperparameters.
"""

from __future__ import annotations

import glob
import io
import json
import lzma
import math
import os
import random
import struct
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

try:
    import brotli

    HAVE_BROTLI = True
except ImportError:
    HAVE_BROTLI = False


# -----------------------------------------------------------------------------
# settings
# -----------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_flag(name: str, default: str) -> bool:
    return os.environ.get(name, default).strip().lower() in ("1", "true", "yes", "on")


class Hyperparameters:
    # ---- data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp8192_caseops")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    # the digit class keeps the byte sidecar (fineweb_val_bytes_*.bin) out of the token glob
    val_files = os.path.join(data_path, "fineweb_val_[0-9]*.bin")
    val_byte_files = os.path.join(data_path, "fineweb_val_bytes_[0-9]*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_8192_caseops_bpe.model")
    caseops = env_flag("CASEOPS", "1")
    bos_id = env_int("BOS_ID", 1)
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)
    out_dir = os.environ.get("OUT_DIR", ".")

    # ---- schedule
    iterations = env_int("ITERATIONS", 20_000)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    lr_warmup_steps = env_int("LR_WARMUP_STEPS", 30)
    warmdown_frac = env_float("WARMDOWN_FRAC", 0.72)
    min_lr_scale = env_float("MIN_LR_SCALE", 0.05)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env_float("GPTQ_RESERVE_SECONDS", 14.0)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)

    # ---- model
    vocab_size = env_int("VOCAB_SIZE", 8192)
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 4.0)
    rope_base = env_float("ROPE_BASE", 10_000.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 5.0)
    xsa_last_n = env_int("XSA_LAST_N", 11)
    smear_gate = env_flag("SMEAR_GATE", "1")
    smear_width = env_int("SMEAR_WIDTH", 12)
    leaky_slope = env_float("LEAKY_SLOPE", 0.5)
    tied_embed_init_std = env_float("TIED_EMBED_INIT_STD", 0.005)
    loop_start = env_int("LOOP_START", 3)
    loop_end = env_int("LOOP_END", 5)
    loop_at_frac = env_float("LOOP_AT_FRAC", 0.35)

    # ---- optimisers
    embed_lr = env_float("EMBED_LR", 0.03)
    matrix_lr = env_float("MATRIX_LR", 0.026)
    scalar_lr = env_float("SCALAR_LR", 0.02)
    muon_momentum = env_float("MUON_MOMENTUM", 0.97)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_backend_steps = env_int("MUON_BACKEND_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.095)
    embed_wd = env_float("EMBED_WD", 0.085)
    adam_wd = env_float("ADAM_WD", 0.02)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    grad_clip = env_float("GRAD_CLIP", 0.3)
    ema_decay = env_float("EMA_DECAY", 0.9965)

    # ---- quantisation
    matrix_bits = env_int("MATRIX_BITS", 6)
    embed_bits = env_int("EMBED_BITS", 7)
    matrix_clip_sigmas = env_float("MATRIX_CLIP_SIGMAS", 12.85)
    embed_clip_sigmas = env_float("EMBED_CLIP_SIGMAS", 15.0)
    calib_batches = env_int("CALIB_BATCHES", 16)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    size_limit = env_int("SIZE_LIMIT", 16_000_000)

    # ---- test-time training
    ttt_enabled = env_flag("TTT_ENABLED", "1")
    ttt_phases = env_int("TTT_PHASES", 4)
    ttt_chunk = env_int("TTT_CHUNK", 128)
    ttt_seq_len = env_int("TTT_SEQ_LEN", 2048)
    ttt_batch_docs = env_int("TTT_BATCH_DOCS", 48)
    ttt_lora_rank = env_int("TTT_LORA_RANK", 80)
    ttt_head_rank = env_int("TTT_HEAD_RANK", 32)
    ttt_lora_alpha = env_float("TTT_LORA_ALPHA", 96.0)
    ttt_lora_lr = env_float("TTT_LORA_LR", 1e-4)
    ttt_lora_wd = env_float("TTT_LORA_WD", 0.5)
    ttt_beta1 = env_float("TTT_BETA1", 0.0)
    ttt_beta2 = env_float("TTT_BETA2", 0.99)
    ttt_steps = env_int("TTT_STEPS", 1)
    global_lr = env_float("GLOBAL_LR", 1e-3)
    global_momentum = env_float("GLOBAL_MOMENTUM", 0.9)
    global_epochs = env_int("GLOBAL_EPOCHS", 1)
    global_seq_len = env_int("GLOBAL_SEQ_LEN", 2048)
    global_batch_seqs = env_int("GLOBAL_BATCH_SEQS", 8)
    global_max_tokens = env_int("GLOBAL_MAX_TOKENS", 6_000_000)
    global_clip = env_float("GLOBAL_CLIP", 1.0)

    # ---- n-gram hints
    hints_enabled = env_flag("HINTS", "1")
    hint_orders = tuple(int(n) for n in os.environ.get("HINT_ORDERS", "16,10,6").split(","))
    hint_bits = env_int("HINT_BITS", 22)
    hint_min_count = env_int("HINT_MIN_COUNT", 2)
    hint_beta = env_float("HINT_BETA", 0.9)
    hint_beta_step = env_float("HINT_BETA_STEP", 0.35)
    hint_beta_max = env_float("HINT_BETA_MAX", 2.6)


# -----------------------------------------------------------------------------
# logging and ranks
# -----------------------------------------------------------------------------


class World:
    """Ranks and the log. Works without torchrun too (one GPU)."""

    def __init__(self, run_id: str, out_dir: str):
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if 8 % self.size != 0:
            raise ValueError(f"WORLD_SIZE={self.size} must divide 8")
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()
        self.master = self.rank == 0
        self.logfile = None
        if self.master:
            os.makedirs(os.path.join(out_dir, "logs"), exist_ok=True)
            self.logfile = os.path.join(out_dir, "logs", f"{run_id}.txt")
            print(self.logfile)

    def log(self, msg: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(msg, flush=True)
        with open(self.logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def sum_(self, t: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)
        return t

    def any(self, flag: bool) -> bool:
        if not self.distributed:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


# -----------------------------------------------------------------------------
# shards
# -----------------------------------------------------------------------------

SHARD_MAGIC = 20240520
HEADER_INTS = 256


def load_data_shard(file: Path) -> Tensor:
    header_bytes = HEADER_INTS * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"bad shard header: {file}")
    num_tokens = int(header[2])
    expected = header_bytes + num_tokens * np.dtype("<u2").itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"shard {file} has {file.stat().st_size} bytes, expected {expected}")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


class TokenStream:
    """Endless walk over the shards of a pattern, in sorted order."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no files for pattern {pattern}")
        self.file_idx = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def _advance(self) -> None:
        self.file_idx = (self.file_idx + 1) % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        chunks = []
        left = n
        while left > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self._advance()
                continue
            k = min(left, avail)
            chunks.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            left -= k
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class DistributedTokenLoader:
    def __init__(self, pattern: str, world: World):
        self.world = world
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world.size * accum)
        span = local_tokens + 1
        chunk = self.stream.take(span * self.world.size)
        start = self.world.rank * span
        local = chunk[start : start + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return (
            x.to(self.world.device, non_blocking=True),
            y.to(self.world.device, non_blocking=True),
        )


# -----------------------------------------------------------------------------
# bytes
# -----------------------------------------------------------------------------


def build_piece_tables(sp: spm.SentencePieceProcessor, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes without the leading space, has a leading space, is a control/unknown token), by id."""
    table_size = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros((table_size,), dtype=np.int16)
    leading_space = np.zeros((table_size,), dtype=np.bool_)
    boundary = np.ones((table_size,), dtype=np.bool_)
    for tid in range(int(sp.vocab_size())):
        if sp.is_control(tid) or sp.is_unknown(tid) or sp.is_unused(tid):
            continue
        boundary[tid] = False
        if sp.is_byte(tid):
            base_bytes[tid] = 1
            continue
        piece = sp.id_to_piece(tid)
        if piece.startswith("\u2581"):
            leading_space[tid] = True
            piece = piece[1:]
        base_bytes[tid] = len(piece.encode("utf-8"))
    return base_bytes, leading_space, boundary


class ValData:
    """Validation tokens, documents and the bytes of the original text that each token stands for."""

    def __init__(self, h: Hyperparameters, world: World):
        files = [Path(p) for p in sorted(glob.glob(h.val_files))]
        if not files:
            raise FileNotFoundError(f"no files for pattern {h.val_files}")
        self.tokens = torch.cat([load_data_shard(f) for f in files]).to(torch.int64)
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {int(self.sp.vocab_size())}")
        if h.caseops:
            self.token_bytes = self._from_sidecar(h)
        else:
            self.token_bytes = self._from_pieces(h)
        if self.token_bytes.numel() != self.tokens.numel():
            raise ValueError("bytes and tokens do not align")
        self.docs = self._find_docs(h.bos_id)
        self.total_targets = self.tokens.numel() - 1
        self.total_bytes = int(self.token_bytes[1:].to(torch.int64).sum())
        world.log(
            f"val: tokens:{self.tokens.numel()} docs:{len(self.docs)} bytes:{self.total_bytes} "
            f"source:{'sidecar' if h.caseops else 'pieces'}"
        )

    def _from_sidecar(self, h: Hyperparameters) -> Tensor:
        # written by the data script together with the tokens: for each token the number of UTF-8 bytes of the text
        # before the case transform; the sentinels of the transform carry 0, BOS carries 0
        files = [Path(p) for p in sorted(glob.glob(h.val_byte_files))]
        if not files:
            raise FileNotFoundError(f"no byte sidecar for {h.val_byte_files}")
        return torch.cat([load_data_shard(f) for f in files]).to(torch.int32)

    def _from_pieces(self, h: Hyperparameters) -> Tensor:
        base_bytes, leading_space, boundary = build_piece_tables(self.sp, h.vocab_size)
        ids = self.tokens.numpy()
        out = base_bytes[ids].astype(np.int32)
        prev_boundary = np.ones(ids.shape, dtype=np.bool_)
        prev_boundary[1:] = boundary[ids[:-1]]
        out += (leading_space[ids] & ~prev_boundary).astype(np.int32)
        return torch.from_numpy(out)

    def _find_docs(self, bos_id: int) -> list[tuple[int, int]]:
        """(start, number of targets) of each document; the BOS of the next document is the last target of this one."""
        starts = (self.tokens == bos_id).nonzero().flatten().tolist()
        if not starts or starts[0] != 0:
            raise ValueError("the validation stream must begin with BOS")
        ends = [s + 1 for s in starts[1:]] + [self.tokens.numel()]
        docs = [(s, e - s - 1) for s, e in zip(starts, ends)]
        docs = [d for d in docs if d[1] > 0]
        if sum(n for _, n in docs) != self.tokens.numel() - 1:
            raise AssertionError("documents do not cover the stream")
        return docs


def bits_per_byte(loss_sum: float, byte_sum: float) -> float:
    return loss_sum / math.log(2.0) / byte_sum


# -----------------------------------------------------------------------------
# model
# -----------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """fp32 weights, computes in the dtype of the input."""

    def __init__(self, in_features: int, out_features: int, zero: bool = False):
        super().__init__(in_features, out_features, bias=False)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float, train_seq_len: int):
        super().__init__()
        self.dims = dims
        inv_freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.cache_len = 0
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        self.train_seq_len = train_seq_len

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.cos is None or self.cache_len < seq_len or self.cos.device != device:
            n = max(seq_len, self.train_seq_len)
            t = torch.arange(n, device=device, dtype=torch.float32)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self.cos = freqs.cos()[None, :, None, :]
            self.sin = freqs.sin()[None, :, None, :]
            self.cache_len = n
        return self.cos[:, :seq_len].to(dtype), self.sin[:, :seq_len].to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    rot, rest = x[..., :dims], x[..., dims:]
    half = dims // 2
    a, b = rot[..., :half], rot[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class SmearGate(nn.Module):
    """Adds a gated copy of the previous token's embedding, never across the start of a document."""

    def __init__(self, width: int, bos_id: int):
        super().__init__()
        self.width = width
        self.bos_id = bos_id
        self.gate = CastedLinear(width, 1, zero=True)
        self.lam = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = self.lam.to(x.dtype) * torch.sigmoid(self.gate(x[:, 1:, : self.width]))
        g = g * (ids[:, 1:] != self.bos_id).to(x.dtype).unsqueeze(-1)
        return torch.cat((x[:, :1], x[:, 1:] + g * x[:, :-1]), dim=1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h: Hyperparameters, use_xsa: bool):
        super().__init__()
        self.n_head = h.num_heads
        self.n_kv = h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        self.rope_dims = h.rope_dims
        self.use_xsa = use_xsa
        kv_dim = self.n_kv * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim)
        self.c_k = CastedLinear(h.model_dim, kv_dim)
        self.c_v = CastedLinear(h.model_dim, kv_dim)
        self.proj = CastedLinear(h.model_dim, h.model_dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(h.rope_dims, h.rope_base, h.train_seq_len)

    def _exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        """Removes from the output what points along the token's own value (XSA)."""
        bsz, t, nh, d = y.shape
        group = nh // self.n_kv
        yg = y.reshape(bsz, t, self.n_kv, group, d)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (yg - (yg * vn).sum(-1, keepdim=True) * vn).reshape(bsz, t, nh, d)

    def forward(self, x: Tensor, dq: Tensor | None = None, dv: Tensor | None = None) -> Tensor:
        bsz, t, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if dq is not None:
            q = q + dq
        if dv is not None:
            v = v + dv
        q = q.reshape(bsz, t, self.n_head, self.head_dim)
        k = k.reshape(bsz, t, self.n_kv, self.head_dim)
        v = v.reshape(bsz, t, self.n_kv, self.head_dim)
        q, k = rms_norm(q), rms_norm(k)
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = apply_rotary(q, cos, sin, self.rope_dims)
        k = apply_rotary(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.n_kv != self.n_head,
        ).transpose(1, 2)
        if self.use_xsa:
            y = self._exclude_self(y, v)
        return self.proj(y.reshape(bsz, t, dim))


class MLP(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.slope = h.leaky_slope
        self.fc = CastedLinear(h.model_dim, hidden)
        self.proj = CastedLinear(hidden, h.model_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())


class Block(nn.Module):
    def __init__(self, h: Hyperparameters, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(h, use_xsa=layer >= h.num_layers - h.xsa_last_n)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, q_lora=None, v_lora=None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        n = rms_norm(x) * self.depth_scale
        dq = q_lora(n) if q_lora is not None else None
        dv = v_lora(n) if v_lora is not None else None
        x = x + self.attn_scale.to(x.dtype) * self.attn(n, dq, dv)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.depth_scale)
        return x


class GPT(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.h = h
        self.logit_softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.tied_embed_init_std)
        self.smear = SmearGate(h.smear_width, h.bos_id) if h.smear_gate else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = nn.Identity()  # a place for the calibration hook
        self.looping = False
        plain = list(range(h.num_layers))
        loop = list(range(h.loop_start, h.loop_end + 1))
        looped = plain[: h.loop_start] + loop + loop + plain[h.loop_end + 1 :]
        self.orders = {False: self._split(plain), True: self._split(looped)}
        n_skip = max(len(enc) for enc, _ in self.orders.values())
        self.skip_weights = nn.Parameter(torch.ones(n_skip, h.model_dim, dtype=torch.float32))

    @staticmethod
    def _split(order: list[int]) -> tuple[list[int], list[int]]:
        half = len(order) // 2
        return order[:half], order[half:]

    def hidden(self, ids: Tensor, lora: "DocLoRA | None" = None, rows: Tensor | None = None) -> Tensor:
        x = rms_norm(self.tok_emb(ids).to(torch.bfloat16))
        if self.smear is not None:
            x = self.smear(x, ids)
        x0 = x
        enc, dec = self.orders[self.looping]
        skips: list[Tensor] = []
        for i in enc:
            x = self.blocks[i](x, x0, *self._loras(lora, rows, i))
            skips.append(x)
        for j, i in enumerate(dec):
            if skips:
                x = x + self.skip_weights[j].to(x.dtype) * skips.pop()
            x = self.blocks[i](x, x0, *self._loras(lora, rows, i))
        return self.final_norm(rms_norm(x))

    @staticmethod
    def _loras(lora, rows, i):
        if lora is None:
            return None, None
        return (lambda n: lora.q[i](n, rows)), (lambda n: lora.v[i](n, rows))

    def logits(
        self,
        ids: Tensor,
        lora: "DocLoRA | None" = None,
        rows: Tensor | None = None,
        tail: int = 0,
    ) -> Tensor:
        x = self.hidden(ids, lora, rows)[:, tail:]
        out = F.linear(x, self.tok_emb.weight.to(x.dtype))
        if lora is not None:
            out = out + lora.head(x, rows)
        return self.logit_softcap * torch.tanh(out / self.logit_softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(ids).float()
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="mean")


# -----------------------------------------------------------------------------
# one LoRA per document of a batch
# -----------------------------------------------------------------------------


class BatchedLoRA(nn.Module):
    def __init__(self, n_docs: int, d_in: int, d_out: int, rank: int, alpha: float, device: torch.device):
        super().__init__()
        self.scale = alpha / rank
        self.bound = 1.0 / math.sqrt(d_in)
        self.a = nn.Parameter(torch.empty(n_docs, rank, d_in, device=device))
        self.b = nn.Parameter(torch.zeros(n_docs, d_out, rank, device=device))

    def forget(self, gen: torch.Generator) -> None:
        with torch.no_grad():
            self.a.uniform_(-self.bound, self.bound, generator=gen)
            self.b.zero_()

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        a = self.a[rows].to(x.dtype)
        b = self.b[rows].to(x.dtype)
        return torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2)) * self.scale


class DocLoRA(nn.Module):
    def __init__(self, h: Hyperparameters, n_docs: int, device: torch.device):
        super().__init__()
        kv_dim = h.num_kv_heads * (h.model_dim // h.num_heads)
        mk = lambda d_out, rank: BatchedLoRA(n_docs, h.model_dim, d_out, rank, h.ttt_lora_alpha, device)
        self.q = nn.ModuleList([mk(h.model_dim, h.ttt_lora_rank) for _ in range(h.num_layers)])
        self.v = nn.ModuleList([mk(kv_dim, h.ttt_lora_rank) for _ in range(h.num_layers)])
        self.head = mk(h.vocab_size, h.ttt_head_rank)
        self.gen = torch.Generator(device=device)

    def forget(self, seed: int) -> None:
        self.gen.manual_seed(seed)
        for m in self.modules():
            if isinstance(m, BatchedLoRA):
                m.forget(self.gen)


# -----------------------------------------------------------------------------
# optimisers
# -----------------------------------------------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(g: Tensor, steps: int) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    transposed = g.size(0) > g.size(1)
    if transposed:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        poly = b * gram + c * gram @ gram
        x = a * x + poly @ x
    return x.T if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum + orthogonalisation. Each rank updates its share of the matrices; one all-reduce spreads them."""

    def __init__(self, params, world: World, lr: float, momentum: float, backend_steps: int, weight_decay: float):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )
        self.world = world

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            lr, momentum, wd = group["lr"], group["momentum"], group["weight_decay"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cur = 0
            for i, p in enumerate(params):
                if i % self.world.size == self.world.rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "buf" not in state:
                        state["buf"] = torch.zeros_like(g)
                    buf = state["buf"]
                    buf.mul_(momentum).add_(g)
                    g = g.add(buf, alpha=momentum)
                    # row normalisation before the iteration (MuonEq-R)
                    g = g / g.norm(dim=-1, keepdim=True).clamp_min(1e-7)
                    g = zeropower_via_newtonschulz5(g, group["backend_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[cur : cur + p.numel()] = g.reshape(-1).to(torch.bfloat16)
                cur += p.numel()
            self.world.sum_(flat)
            cur = 0
            for p in params:
                upd = flat[cur : cur + p.numel()].view_as(p).to(p.dtype)
                if wd > 0:
                    p.mul_(1.0 - lr * wd)
                p.add_(upd, alpha=-lr)
                cur += p.numel()


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for the embedding and for everything small."""

    def __init__(self, h: Hyperparameters, model: GPT, world: World):
        self.h = h
        self.world = world
        self.model = model
        matrices, scalars = [], []
        for name, p in model.named_parameters():
            if name.startswith("tok_emb"):
                continue
            if p.ndim == 2 and name.startswith("blocks.") and "resid_mix" not in name:
                matrices.append(p)
            else:
                scalars.append(p)
        betas = (h.beta1, h.beta2)
        self.muon = Muon(matrices, world, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, h.muon_wd)
        self.embed = torch.optim.AdamW(
            [model.tok_emb.weight],
            lr=h.embed_lr,
            betas=betas,
            eps=h.adam_eps,
            weight_decay=h.embed_wd,
            fused=True,
        )
        self.scalar = torch.optim.AdamW(
            scalars, lr=h.scalar_lr, betas=betas, eps=h.adam_eps, weight_decay=h.adam_wd, fused=True
        )
        self.all = [self.muon, self.embed, self.scalar]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def zero(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def reduce_grads(self) -> None:
        for p in self.model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.world.mean_(p.grad)

    def step(self, step: int, scale: float) -> None:
        h = self.h
        frac = min(step / h.muon_momentum_steps, 1.0) if h.muon_momentum_steps > 0 else 1.0
        for group in self.muon.param_groups:
            group["momentum"] = (1 - frac) * h.muon_momentum_start + frac * h.muon_momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        self.reduce_grads()
        if h.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), h.grad_clip)
        for opt in self.all:
            opt.step()
        self.zero()


class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.shadow[k].mul_(self.decay).add_(v.detach().float(), alpha=1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        sd = model.state_dict()
        model.load_state_dict({k: self.shadow[k].to(sd[k].dtype) for k in sd}, strict=True)


# -----------------------------------------------------------------------------
# training
# -----------------------------------------------------------------------------


def plain_val(h: Hyperparameters, world: World, model: nn.Module, val: ValData, batch_seqs: int = 32):
    """Loss and bpb over the whole stream in windows that do not overlap. For the log during training."""
    was_training = model.training
    model.eval()
    seq = h.train_seq_len
    n = val.total_targets
    windows = [(s, min(s + seq, n)) for s in range(0, n, seq)]
    full = [w for w in windows if w[1] - w[0] == seq]
    rest = [w for w in windows if w[1] - w[0] < seq]
    mine = full[world.rank :: world.size]
    loss_sum = torch.zeros((), device=world.device, dtype=torch.float64)
    byte_sum = torch.zeros((), device=world.device, dtype=torch.float64)
    count = torch.zeros((), device=world.device, dtype=torch.float64)
    jobs = [mine[i : i + batch_seqs] for i in range(0, len(mine), batch_seqs)]
    if world.rank == 0 and rest:
        jobs.append(rest)
    with torch.no_grad():
        for job in jobs:
            x = torch.stack([val.tokens[a:b] for a, b in job]).to(world.device)
            y = torch.stack([val.tokens[a + 1 : b + 1] for a, b in job]).to(world.device)
            nb = torch.stack([val.token_bytes[a + 1 : b + 1] for a, b in job]).to(world.device)
            logits = model.logits(x).float()
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none")
            loss_sum += nll.to(torch.float64).sum()
            byte_sum += nb.to(torch.float64).sum()
            count += float(y.numel())
    for t in (loss_sum, byte_sum, count):
        world.sum_(t)
    model.train(was_training)
    return (loss_sum / count).item(), bits_per_byte(loss_sum.item(), byte_sum.item())


def lr_scale(h: Hyperparameters, step: int, frac: float) -> float:
    if step < h.lr_warmup_steps:
        return (step + 1) / h.lr_warmup_steps
    if frac <= 1.0 - h.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / h.warmdown_frac, h.min_lr_scale)


def warm_up(h: Hyperparameters, world: World, model: GPT, compiled: nn.Module, opts: Optimizers, accum: int) -> None:
    """Compiles both layer orders on a few training batches and puts everything back."""
    if h.warmup_steps <= 0:
        return
    weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    loader = DistributedTokenLoader(h.train_files, world)
    for looping in (False, True):
        model.looping = looping
        for step in range(h.warmup_steps):
            for _ in range(accum):
                x, y = loader.next_batch(h.train_batch_tokens, h.train_seq_len, accum)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = compiled(x, y) / accum
                loss.backward()
            opts.step(step, 0.1)
        world.log(f"warmup looping:{looping} steps:{h.warmup_steps}")
    model.looping = False
    model.load_state_dict(weights, strict=True)
    for opt in opts.all:
        opt.state.clear()
    opts.zero()


def train(h: Hyperparameters, world: World, model: GPT, val: ValData) -> tuple[float, DistributedTokenLoader]:
    """Trains until the reserve begins. Returns (seconds used, the loader, for the calibration)."""
    accum = 8 // world.size
    compiled = torch.compile(model, dynamic=False, fullgraph=False)
    opts = Optimizers(h, model, world)
    n_params = sum(p.numel() for p in model.parameters())
    world.log(f"model_params:{n_params} world_size:{world.size} grad_accum:{accum} seed:{h.seed}")
    warm_up(h, world, model, compiled, opts, accum)

    ema = EMA(model, h.ema_decay)
    loader = DistributedTokenLoader(h.train_files, world)
    cap = h.max_wallclock_seconds - h.gptq_reserve_seconds
    elapsed = 0.0
    step = 0
    stop_after: int | None = None
    torch.cuda.synchronize()
    world.barrier()
    t0 = time.perf_counter()
    while True:
        last = step == h.iterations or (stop_after is not None and step >= stop_after)
        if last or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
            torch.cuda.synchronize()
            elapsed += time.perf_counter() - t0
            v_loss, v_bpb = plain_val(h, world, model, val)
            world.log(
                f"step:{step}/{h.iterations} val_loss:{v_loss:.4f} val_bpb:{v_bpb:.4f} "
                f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            world.barrier()
            t0 = time.perf_counter()
        if last:
            break

        now = elapsed + time.perf_counter() - t0
        frac = max(now / cap, step / h.iterations)
        if not model.looping and world.any(frac >= h.loop_at_frac):
            model.looping = True
            world.log(f"looping on at step:{step} time:{now:.1f}s")
        scale = lr_scale(h, step, frac)
        train_loss = torch.zeros((), device=world.device)
        for _ in range(accum):
            x, y = loader.next_batch(h.train_batch_tokens, h.train_seq_len, accum)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = compiled(x, y)
            train_loss += loss.detach() / accum
            (loss / accum).backward()
        opts.step(step, scale)
        ema.update(model)
        step += 1

        now = elapsed + time.perf_counter() - t0
        if step <= 5 or step % h.train_log_every == 0:
            world.log(
                f"step:{step}/{h.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{1000 * now:.0f}ms step_avg:{1000 * now / step:.2f}ms"
            )
        if stop_after is None and step % 8 == 0 and world.any(now >= cap):
            stop_after = step
            world.log(f"stopping: wallclock train_time:{1000 * now:.0f}ms step:{step}/{h.iterations}")

    world.log(f"peak memory: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    world.log("ema: applying")
    ema.copy_to(model)
    return elapsed, loader


# -----------------------------------------------------------------------------
# GPTQ
# -----------------------------------------------------------------------------


def collect_hessians(
    h: Hyperparameters, world: World, model: GPT, loader: DistributedTokenLoader
) -> dict[str, Tensor]:
    """X^T X of the inputs of every matrix, over a few batches of the training stream."""
    hessians: dict[str, Tensor] = {}
    handles = []

    def add(name: str, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.size(-1)).float()
        if name not in hessians:
            hessians[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
        hessians[name].addmm_(x.T, x)

    for name, m in model.named_modules():
        if isinstance(m, CastedLinear) and name.startswith("blocks."):
            handles.append(
                m.register_forward_pre_hook(lambda mod, args, key=name + ".weight": add(key, args[0]))
            )
    handles.append(model.final_norm.register_forward_hook(lambda mod, args, out: add("tok_emb.weight", out)))
    model.eval()
    with torch.no_grad():
        for _ in range(h.calib_batches):
            x, _ = loader.next_batch(65_536 * world.size, h.train_seq_len, 1)
            model.hidden(x)
    for handle in handles:
        handle.remove()
    for name in sorted(hessians):
        world.mean_(hessians[name])
        hessians[name] /= h.calib_batches
    return hessians


def gptq_matrix(w: Tensor, hess: Tensor, bits: int, clip_sigmas: float, block: int, damp: float):
    """Row-wise symmetric quantisation with error feedback. Returns (int8 codes, fp16 scale per row)."""
    w = w.float().clone()
    rows, cols = w.shape
    qmax = 2 ** (bits - 1) - 1
    scale = (w.std(dim=1) * clip_sigmas / qmax).clamp_min(1e-8)
    limit = w.abs().amax(dim=1) / qmax
    scale = torch.minimum(scale, limit.clamp_min(1e-8)).half().float().clamp_min(1e-7)
    hess = hess.float().clone()
    dead = hess.diagonal() == 0
    hess.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(hess.diagonal(), descending=True)
    inverse = torch.argsort(order)
    w = w[:, order]
    hess = hess[order][:, order]
    hess.diagonal().add_(damp * hess.diagonal().mean())
    chol = torch.linalg.cholesky(hess)
    hinv = torch.linalg.cholesky(torch.cholesky_inverse(chol), upper=True)
    codes = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    for c0 in range(0, cols, block):
        c1 = min(c0 + block, cols)
        wb = w[:, c0:c1].clone()
        err = torch.zeros_like(wb)
        for j in range(c1 - c0):
            col = wb[:, j]
            q = torch.round(col / scale).clamp(-qmax, qmax)
            codes[:, c0 + j] = q.to(torch.int8)
            e = (col - q * scale) / hinv[c0 + j, c0 + j]
            wb[:, j:] -= e.unsqueeze(1) * hinv[c0 + j, c0 + j : c1].unsqueeze(0)
            err[:, j] = e
        if c1 < cols:
            w[:, c1:] -= err @ hinv[c0:c1, c1:]
    return codes[:, inverse].contiguous(), scale.half()


def quantize_model(h: Hyperparameters, model: GPT, hessians: dict[str, Tensor]) -> dict[str, dict]:
    """Each tensor as {kind, ...}: int6 matrices, int7 embedding, fp16 for the rest."""
    out: dict[str, dict] = {}
    for name, t in model.state_dict().items():
        if name in hessians:
            is_embed = name == "tok_emb.weight"
            bits = h.embed_bits if is_embed else h.matrix_bits
            sigmas = h.embed_clip_sigmas if is_embed else h.matrix_clip_sigmas
            codes, scale = gptq_matrix(t, hessians[name], bits, sigmas, h.gptq_block, h.gptq_damp)
            out[name] = {"kind": "int", "bits": bits, "codes": codes.cpu(), "scale": scale.cpu()}
        else:
            out[name] = {"kind": "fp16", "value": t.detach().half().cpu()}
    return out


# -----------------------------------------------------------------------------
# packing: tensors of one role go into one stream, each stream is compressed by what does it best
# -----------------------------------------------------------------------------

PACK_MAGIC = b"TXA1"


def role_of(name: str) -> str:
    if name.startswith("tok_emb"):
        return "embed"
    for key in ("c_q", "c_k", "c_v", "attn.proj", "mlp.fc", "mlp.proj"):
        if f".{key}.weight" in name:
            return key
    return "misc"


def squeeze(raw: bytes) -> tuple[str, bytes]:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    best = ("lzma", lzma.compress(raw, format=lzma.FORMAT_RAW, filters=filters))
    if HAVE_BROTLI:
        other = brotli.compress(raw, quality=11, lgwin=24)
        if len(other) < len(best[1]):
            best = ("brotli", other)
    return best


def unsqueeze(codec: str, raw: bytes) -> bytes:
    if codec == "brotli":
        return brotli.decompress(raw)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.decompress(raw, format=lzma.FORMAT_RAW, filters=filters)


def pack(tensors: dict[str, dict]) -> bytes:
    streams: dict[str, list[bytes]] = {}
    index: list[list] = []
    for name in sorted(tensors, key=lambda n: (role_of(n), n)):
        t = tensors[name]
        role = role_of(name)
        if t["kind"] == "int":
            # columns first: neighbours along the output dimension look alike
            body = t["codes"].numpy().T.copy().tobytes()
            streams.setdefault(role, []).append(body)
            streams.setdefault("scales", []).append(t["scale"].numpy().tobytes())
            index.append([name, "int", t["bits"], list(t["codes"].shape), role])
        else:
            value = t["value"].numpy()
            streams.setdefault("misc", []).append(value.tobytes())
            index.append([name, "fp16", 16, list(value.shape), "misc"])
    blobs = []
    table = []
    for role in sorted(streams):
        raw = b"".join(streams[role])
        codec, comp = squeeze(raw)
        table.append([role, codec, len(comp)])
        blobs.append(comp)
    head = lzma.compress(json.dumps({"index": index, "streams": table}).encode())
    return PACK_MAGIC + struct.pack("<I", len(head)) + head + b"".join(blobs)


def unpack(blob: bytes) -> dict[str, Tensor]:
    if blob[:4] != PACK_MAGIC:
        raise ValueError("not an artifact of this script")
    (head_len,) = struct.unpack("<I", blob[4:8])
    head = json.loads(lzma.decompress(blob[8 : 8 + head_len]))
    pos = 8 + head_len
    streams: dict[str, io.BytesIO] = {}
    for role, codec, length in head["streams"]:
        streams[role] = io.BytesIO(unsqueeze(codec, blob[pos : pos + length]))
        pos += length
    out: dict[str, Tensor] = {}
    for name, kind, _bits, shape, role in head["index"]:
        n = int(np.prod(shape)) if shape else 1
        if kind == "int":
            codes = np.frombuffer(streams[role].read(n), dtype=np.int8).reshape(shape[1], shape[0]).T
            scale = np.frombuffer(streams["scales"].read(2 * shape[0]), dtype=np.float16)
            out[name] = torch.from_numpy(codes.astype(np.float32) * scale.astype(np.float32)[:, None])
        else:
            value = np.frombuffer(streams["misc"].read(2 * n), dtype=np.float16).reshape(shape)
            out[name] = torch.from_numpy(value.astype(np.float32))
    return out


def save_artifact(h: Hyperparameters, world: World, tensors: dict[str, dict], path: Path) -> int:
    """Writes the artifact, logs what counts, fails when it is too large. Returns the total."""
    total = 0
    if world.master:
        blob = pack(tensors)
        path.write_bytes(blob)
        code_bytes = len(Path(__file__).read_bytes())
        total = len(blob) + code_bytes
        world.log(f"artifact: {len(blob)} bytes")
        world.log(f"code: {code_bytes} bytes")
        world.log(f"total: {total} bytes limit:{h.size_limit}")
        if total > h.size_limit:
            raise RuntimeError(f"{total} bytes are more than {h.size_limit}")
    world.barrier()
    return total


def load_artifact(h: Hyperparameters, world: World, path: Path) -> GPT:
    model = GPT(h).to(world.device)
    state = unpack(path.read_bytes())
    reference = model.state_dict()
    model.load_state_dict({k: v.to(reference[k].dtype) for k, v in state.items()}, strict=True)
    model.looping = True
    model.eval()
    return model


# -----------------------------------------------------------------------------
# n-gram hints
# -----------------------------------------------------------------------------


class HintTable:
    """For a few context lengths: which token followed this context, among the tokens scored so far on this rank.

    An entry holds the whole 64-bit key of its context, the candidate and a vote count. A hint only ever names ONE
    token; what is done with it (an exponential tilt with its exact normaliser) happens in tilted_nll.
    """

    MULT = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, h: Hyperparameters):
        self.orders = sorted(h.hint_orders, reverse=True)
        self.shift = np.uint64(64 - h.hint_bits)
        size = 1 << h.hint_bits
        self.key = [np.zeros(size, dtype=np.uint64) for _ in self.orders]
        self.cand = [np.zeros(size, dtype=np.int32) for _ in self.orders]
        self.votes = [np.zeros(size, dtype=np.int32) for _ in self.orders]
        self.min_count = h.hint_min_count
        self.beta = h.hint_beta
        self.beta_step = h.hint_beta_step
        self.beta_max = h.hint_beta_max
        self.seen = 0

    def context_keys(self, doc: np.ndarray) -> list[np.ndarray]:
        """keys[k][i] hashes doc[i-n+1 .. i], the n tokens before target doc[i+1]; 0 where there are fewer."""
        ids = doc.astype(np.uint64) + np.uint64(1)
        out = []
        for n in self.orders:
            key = np.zeros(len(doc), dtype=np.uint64)
            if len(doc) >= n:
                acc = np.zeros(len(doc) - n + 1, dtype=np.uint64)
                for k in range(n):
                    acc = (acc ^ ids[k : len(doc) - n + 1 + k]) * self.MULT
                    acc ^= acc >> np.uint64(29)
                acc = acc * self.MULT
                key[n - 1 :] = np.maximum(acc, np.uint64(1))
            out.append(key)
        return out

    def look(self, keys: list[np.ndarray], lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """(hint or -1, beta) for the targets that follow positions lo..hi-1. The longest context wins."""
        hint = np.full(hi - lo, -1, dtype=np.int64)
        beta = np.zeros(hi - lo, dtype=np.float32)
        for k in range(len(self.orders)):
            kk = keys[k][lo:hi]
            slot = (kk >> self.shift).astype(np.int64)
            votes = self.votes[k][slot]
            ok = (kk != 0) & (self.key[k][slot] == kk) & (votes >= self.min_count) & (hint < 0)
            strength = self.beta + self.beta_step * np.log1p(votes.astype(np.float32))
            hint[ok] = self.cand[k][slot][ok]
            beta[ok] = np.minimum(strength, self.beta_max)[ok]
        return hint, beta

    def learn(self, keys: list[np.ndarray], doc: np.ndarray, lo: int, hi: int) -> None:
        """Adds the targets of positions lo..hi-1. To be called when they have been scored."""
        target = doc[lo + 1 : hi + 1].astype(np.int32)
        for k in range(len(self.orders)):
            kk = keys[k][lo:hi]
            use = kk != 0
            kk, tt = kk[use], target[use]
            slot = (kk >> self.shift).astype(np.int64)
            known = self.key[k][slot] == kk
            agree = known & (self.cand[k][slot] == tt)
            np.add.at(self.votes[k], slot[agree], 1)
            against = ~agree
            np.add.at(self.votes[k], slot[against], -1)
            lost = against & (self.votes[k][slot] <= 0)
            self.key[k][slot[lost]] = kk[lost]
            self.cand[k][slot[lost]] = tt[lost]
            self.votes[k][slot[lost]] = 1
        self.seen += hi - lo


def tilted_nll(logits: Tensor, targets: Tensor, hints: Tensor, betas: Tensor) -> Tensor:
    """-ln of p(a) exp(beta [a = hint]) / Z at the target, with Z = 1 + p(hint) (exp(beta) - 1)."""
    logp = F.log_softmax(logits.float(), dim=-1)
    nll = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    has_hint = hints >= 0
    p_hint = logp.gather(-1, hints.clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
    beta = torch.where(has_hint, betas, torch.zeros_like(betas))
    log_z = torch.log1p(p_hint * torch.expm1(beta))
    bonus = beta * (hints == targets).to(beta.dtype)
    return nll - bonus + log_z


# -----------------------------------------------------------------------------
# phased evaluation
# -----------------------------------------------------------------------------


class Tally:
    """Sums over scored targets."""

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device, dtype=torch.float64)
        self.bytes = torch.zeros((), device=device, dtype=torch.float64)
        self.count = torch.zeros((), device=device, dtype=torch.float64)

    def add(self, nll: Tensor, nbytes: Tensor, mask: Tensor) -> None:
        self.loss += (nll.to(torch.float64) * mask).sum()
        self.bytes += (nbytes.to(torch.float64) * mask).sum()
        self.count += mask.to(torch.float64).sum()

    def merged(self, world: World) -> tuple[float, float, int]:
        out = torch.stack((self.loss, self.bytes, self.count))
        world.sum_(out)
        return out[0].item(), out[1].item(), int(out[2].item())


def phase_slices(n_docs: int, phases: int) -> list[tuple[int, int]]:
    edges = [i * n_docs // phases for i in range(phases + 1)]
    return [(a, b) for a, b in zip(edges, edges[1:]) if b > a]


def global_sgd(h: Hyperparameters, world: World, model: GPT, stream: Tensor, log_name: str) -> None:
    """A few SGD steps of the whole network on a stretch of the stream; every rank takes its share of each step."""
    if stream.numel() > h.global_max_tokens + 1:
        stream = stream[-(h.global_max_tokens + 1) :]
    seq = h.global_seq_len
    n_seqs = (stream.numel() - 1) // seq
    per_step = h.global_batch_seqs * world.size
    n_steps = n_seqs // per_step
    if n_steps == 0:
        return
    params = [p for p in model.parameters() if p.ndim >= 1]
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=h.global_lr, momentum=h.global_momentum)
    total = n_steps * h.global_epochs
    done = 0
    t0 = time.perf_counter()
    running = 0.0
    for _ in range(h.global_epochs):
        for s in range(n_steps):
            first = s * per_step + world.rank * h.global_batch_seqs
            spans = [(i * seq, (i + 1) * seq) for i in range(first, first + h.global_batch_seqs)]
            x = torch.stack([stream[a:b] for a, b in spans]).to(world.device)
            y = torch.stack([stream[a + 1 : b + 1] for a, b in spans]).to(world.device)
            for group in opt.param_groups:
                group["lr"] = h.global_lr * 0.5 * (1.0 + math.cos(math.pi * done / total))
            opt.zero_grad(set_to_none=True)
            loss = model(x, y)
            loss.backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                world.mean_(p.grad)
            torch.nn.utils.clip_grad_norm_(params, h.global_clip)
            opt.step()
            running += loss.item()
            done += 1
    opt.zero_grad(set_to_none=True)
    world.log(
        f"{log_name}: steps:{done} tokens:{n_steps * per_step * seq} loss:{running / done:.4f} "
        f"time:{time.perf_counter() - t0:.1f}s"
    )


def lora_optimizer(h: Hyperparameters, lora: DocLoRA) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        lora.parameters(),
        lr=h.ttt_lora_lr,
        betas=(h.ttt_beta1, h.ttt_beta2),
        eps=1e-10,
        weight_decay=h.ttt_lora_wd,
        fused=True,
    )


def score_documents(
    h: Hyperparameters,
    world: World,
    model: GPT,
    lora: DocLoRA,
    val: ValData,
    batch: list[tuple[int, int]],
    table: HintTable | None,
    tally: Tally,
    seed: int,
) -> None:
    """Scores a batch of whole documents, chunk by chunk; each document has its own LoRA, which learns a chunk after
    the chunk was scored. Windows end with the chunk and reach back ttt_seq_len tokens at most."""
    device = world.device
    n_rows = len(batch)
    chunk, seq_len = h.ttt_chunk, h.ttt_seq_len
    lengths = [n for _, n in batch]
    longest = max(lengths)
    tokens = torch.zeros(n_rows, longest + 1, dtype=torch.int64)
    nbytes = torch.zeros(n_rows, longest + 1, dtype=torch.int32)
    docs_np: list[np.ndarray] = []
    keys: list[list[np.ndarray]] = []
    for r, (start, n) in enumerate(batch):
        tokens[r, : n + 1] = val.tokens[start : start + n + 1]
        nbytes[r, : n + 1] = val.token_bytes[start : start + n + 1]
        docs_np.append(val.tokens[start : start + n + 1].numpy())
        keys.append(table.context_keys(docs_np[-1]) if table is not None else [])
    tokens, nbytes = tokens.to(device), nbytes.to(device)
    lengths_t = torch.tensor(lengths, device=device)

    for p in model.parameters():
        p.requires_grad_(False)
    lora.forget(seed)
    opt = lora_optimizer(h, lora)
    n_chunks = (longest + chunk - 1) // chunk
    for ci in range(n_chunks):
        lo = ci * chunk
        hi = min(lo + chunk, longest)
        win = max(0, hi - seq_len)
        off = lo - win
        rows = (lengths_t > lo).nonzero().flatten()
        row_list = rows.tolist()
        x = tokens[rows, win:hi]
        y = tokens[rows, lo + 1 : hi + 1]
        position = torch.arange(lo, hi, device=device)
        mask = (position[None, :] < lengths_t[rows][:, None]).to(torch.float32)

        hints = np.full((len(row_list), hi - lo), -1, dtype=np.int64)
        betas = np.zeros((len(row_list), hi - lo), dtype=np.float32)
        if table is not None:
            for i, r in enumerate(row_list):
                end = min(hi, lengths[r])
                hints[i, : end - lo], betas[i, : end - lo] = table.look(keys[r], lo, end)
        hints_t = torch.from_numpy(hints).to(device)
        betas_t = torch.from_numpy(betas).to(device)

        with torch.no_grad():
            logits = model.logits(x, lora, rows, tail=off)
            nll = tilted_nll(logits, y, hints_t, betas_t)
            tally.add(nll, nbytes[rows, lo + 1 : hi + 1], mask)

        # documents that end in this chunk need no more training
        if ci == n_chunks - 1:
            break
        going = (lengths_t[rows] > hi).to(torch.float32)
        for _ in range(h.ttt_steps):
            logits = model.logits(x, lora, rows, tail=off).float()
            ce = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none")
            ce = ce.reshape(y.shape) * mask * going[:, None]
            loss = ce.sum(dim=1).div(mask.sum(dim=1)).sum()
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
    # the whole batch is scored: its n-grams may hint in the batches to come, which lie later in the stream
    if table is not None:
        for r in range(n_rows):
            table.learn(keys[r], docs_np[r], 0, lengths[r])


def evaluate_phased(h: Hyperparameters, world: World, model: GPT, val: ValData) -> tuple[float, float]:
    """All documents in the order of the stream, in phases. After a phase (but the last) the network itself takes SGD
    steps on the stretch of the stream that all ranks have finished scoring."""
    t0 = time.perf_counter()
    tally = Tally(world.device)
    table = HintTable(h) if h.hints_enabled else None
    lora = DocLoRA(h, h.ttt_batch_docs, world.device)
    phases = phase_slices(len(val.docs), h.ttt_phases)
    for pi, (first, end) in enumerate(phases):
        docs = val.docs[first:end]
        mine = docs[world.rank :: world.size]
        for b in range(0, len(mine), h.ttt_batch_docs):
            batch = mine[b : b + h.ttt_batch_docs]
            score_documents(h, world, model, lora, val, batch, table, tally, h.seed + 1000 * pi + b)
            if world.master and (b // h.ttt_batch_docs) % 20 == 0:
                so_far = bits_per_byte(tally.loss.item(), max(tally.bytes.item(), 1.0))
                world.log(
                    f"ttt phase:{pi + 1}/{len(phases)} doc:{b}/{len(mine)} rank0_bpb:{so_far:.5f} "
                    f"time:{time.perf_counter() - t0:.1f}s"
                )
        torch.cuda.synchronize()
        world.barrier()
        if pi < len(phases) - 1:
            a = docs[0][0]
            z = docs[-1][0] + docs[-1][1]
            global_sgd(h, world, model, val.tokens[a : z + 1], f"global_sgd phase:{pi + 1}")
    loss_sum, byte_sum, count = tally.merged(world)
    if count != val.total_targets:
        raise AssertionError(f"scored {count} targets, the stream has {val.total_targets}")
    if int(byte_sum) != val.total_bytes:
        raise AssertionError(f"counted {int(byte_sum)} bytes, the stream has {val.total_bytes}")
    return loss_sum / count, bits_per_byte(loss_sum, byte_sum)


# -----------------------------------------------------------------------------
# main
# -----------------------------------------------------------------------------


def describe(h: Hyperparameters, world: World) -> None:
    world.log(f"Running Python {sys.version}", console=False)
    world.log(f"Running PyTorch {torch.__version__}", console=False)
    if world.master:
        smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        world.log(smi.stdout, console=False)
    world.log(Path(__file__).read_text(encoding="utf-8"), console=False)
    world.log("=" * 100, console=False)
    for name in sorted(vars(Hyperparameters)):
        if not name.startswith("_"):
            world.log(f"  {name}: {getattr(h, name)}", console=False)


def set_backends() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    from torch.backends.cuda import (
        enable_cudnn_sdp,
        enable_flash_sdp,
        enable_math_sdp,
        enable_mem_efficient_sdp,
    )

    enable_cudnn_sdp(False)
    enable_flash_sdp(True)
    enable_mem_efficient_sdp(False)
    enable_math_sdp(False)


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def train_and_save(h: Hyperparameters, world: World, val: ValData, path: Path) -> None:
    model = GPT(h).to(world.device)
    model.train()
    train_seconds, loader = train(h, world, model, val)

    torch.cuda.synchronize()
    t_calib = time.perf_counter()
    model.looping = True
    hessians = collect_hessians(h, world, model, loader)
    torch.cuda.synchronize()
    calib_seconds = time.perf_counter() - t_calib
    world.log(
        f"calibration: {calib_seconds:.1f}s on train shards, "
        f"train+calibration: {train_seconds + calib_seconds:.1f}s of {h.max_wallclock_seconds:.0f}s"
    )

    post_loss, post_bpb = plain_val(h, world, model, val)
    world.log(f"pre_quantization val_loss:{post_loss:.5f} val_bpb:{post_bpb:.5f}")
    tensors = quantize_model(h, model, hessians)
    save_artifact(h, world, tensors, path)
    del model, tensors, hessians
    torch.cuda.empty_cache()


def evaluate(h: Hyperparameters, world: World, val: ValData, path: Path) -> None:
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    model = load_artifact(h, world, path)
    q_loss, q_bpb = plain_val(h, world, model, val)
    world.log(f"quantized val_loss:{q_loss:.5f} val_bpb:{q_bpb:.5f}")
    if not h.ttt_enabled:
        world.log(f"final val_loss:{q_loss:.8f} val_bpb:{q_bpb:.8f}")
        return
    loss, bpb = evaluate_phased(h, world, model, val)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - t0
    world.log(f"final_phased_ttt val_loss:{loss:.5f} val_bpb:{bpb:.5f} eval_time:{1000 * seconds:.0f}ms")
    world.log(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main() -> None:
    h = Hyperparameters()
    world = World(h.run_id, h.out_dir)
    set_backends()
    set_seed(h.seed)
    describe(h, world)
    val = ValData(h, world)
    path = Path(h.out_dir) / f"final_model_{h.run_id}.ptz"
    train_and_save(h, world, val, path)
    evaluate(h, world, val, path)
    world.close()


if __name__ == "__main__":
    main()
