"""
train_gpt.py -- 11L U-net GPT, XSA on the last layers, BigramHash, shared value embedding, EMA + SWA, late QAT,
GPTQ-lite int6 + LZMA, score-first TTT over chunks of the validation stream.

Please keep this file below 1,700 lines.
"""
from __future__ import annotations

import copy
import glob
import io
import lzma
import math
import os
import random
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP


# -----------------------------
# HYPERPARAMETERS
# -----------------------------


class Hyperparameters:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # validation while training (never used for a decision)
    val_batch_seqs = int(os.environ.get("VAL_BATCH_SEQS", 64))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # length of the run
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    calib_reserve_seconds = float(os.environ.get("CALIB_RESERVE_SECONDS", 9.0))

    # model shape
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 4))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    ve_dim = int(os.environ.get("VE_DIM", 128))
    ve_layers = os.environ.get("VE_LAYERS", "9,10")
    bos_id = int(os.environ.get("BOS_ID", 1))

    # optimiser
    embed_lr = float(os.environ.get("EMBED_LR", 0.6))
    head_lr = float(os.environ.get("HEAD_LR", 0.008))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_steps = int(os.environ.get("MUON_MOMENTUM_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # averages, late QAT
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.2))
    swa_share = float(os.environ.get("SWA_SHARE", 0.5))
    late_qat_scale = float(os.environ.get("LATE_QAT_SCALE", 0.15))

    # quantisation
    calib_batches = int(os.environ.get("CALIB_BATCHES", 16))
    calib_seqs = int(os.environ.get("CALIB_SEQS", 8))
    lzma_preset = int(os.environ.get("LZMA_PRESET", 9))

    # evaluation
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 32))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 560.0))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_chunk_tokens = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))
    ttt_freeze_blocks = int(os.environ.get("TTT_FREEZE_BLOCKS", 0))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 1))
    ttt_grad_clip = float(os.environ.get("TTT_GRAD_CLIP", 1.0))
    ngram_stats = bool(int(os.environ.get("NGRAM_STATS", "1")))
    ngram_buckets = int(os.environ.get("NGRAM_BUCKETS", 4_194_304))
    ngram_order = int(os.environ.get("NGRAM_ORDER", 5))


CONTROL_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear",
    "bigram_scale",
    "ve_scale",
)
ARTIFACT = "final_model.int6.ptz"
SIZE_LIMIT = 16_000_000

# -----------------------------
# LOG
# -----------------------------

_LOGFILE: str | None = None
_MASTER = True


def open_log(args: Hyperparameters, rank: int) -> None:
    global _LOGFILE, _MASTER
    _MASTER = rank == 0
    if _MASTER:
        os.makedirs("logs", exist_ok=True)
        _LOGFILE = f"logs/{args.run_id}.txt"
        print(_LOGFILE)


def log0(msg: str, console: bool = True) -> None:
    if not _MASTER:
        return
    if console:
        print(msg, flush=True)
    if _LOGFILE is not None:
        with open(_LOGFILE, "a", encoding="utf-8") as f:
            print(msg, file=f)


# -----------------------------
# TOKENIZER TABLES
# -----------------------------
# bpb counts the UTF-8 bytes of the original text: a piece's own bytes, and one byte for the space that sentencepiece
# writes as a mark, unless the piece follows a control token, where the decoder drops that space.


def build_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
    rows = max(int(sp.vocab_size()), vocab_size)
    piece_bytes = np.zeros((rows,), dtype=np.int16)
    leads_with_space = np.zeros((rows,), dtype=np.bool_)
    no_text = np.ones((rows,), dtype=np.bool_)
    for tid in range(int(sp.vocab_size())):
        if sp.is_control(tid) or sp.is_unknown(tid) or sp.is_unused(tid):
            continue
        no_text[tid] = False
        if sp.is_byte(tid):
            piece_bytes[tid] = 1
            continue
        piece = sp.id_to_piece(tid)
        if piece.startswith("\u2581"):
            leads_with_space[tid] = True
            piece = piece[1:]
        piece_bytes[tid] = len(piece.encode("utf-8"))
    return (
        torch.tensor(piece_bytes, dtype=torch.int16, device=device),
        torch.tensor(leads_with_space, dtype=torch.bool, device=device),
        torch.tensor(no_text, dtype=torch.bool, device=device),
    )


def count_bytes(prev_ids: Tensor, tgt_ids: Tensor, tables) -> Tensor:
    piece_bytes, leads_with_space, no_text = tables
    n = piece_bytes[tgt_ids].to(torch.float64)
    n += (leads_with_space[tgt_ids] & ~no_text[prev_ids]).to(torch.float64)
    return n


# -----------------------------
# DATA
# -----------------------------

HEADER_INTS = 256
SHARD_MAGIC = 20240520


def load_data_shard(file: Path) -> Tensor:
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected = HEADER_INTS * 4 + num_tokens * 2
    if file.stat().st_size != expected:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected} bytes")
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=HEADER_INTS * 4)
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


class TokenStream:
    """Reads the shards one after another, for ever."""

    def __init__(self, pattern: str, skip_files: int = 0):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
        self.file_idx = skip_files % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
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
    """Every rank reads the same span and takes its own slice of it."""

    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world_size * grad_accum_steps)
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * self.world_size)
        start = self.rank * per_rank_span
        local = chunk[start : start + per_rank_span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


def fake_quant_rows(w: Tensor, qmax: int = 31) -> Tensor:
    scale = (w.abs().amax(dim=1, keepdim=True) / qmax).clamp_min(1.0 / qmax / 4096)
    return torch.clamp(torch.round(w / scale), -qmax - 1, qmax) * scale


class CastedLinear(nn.Linear):
    """fp32 weights, bf16 matmul. With late QAT on, the forward pass sees int6 rows (straight-through)."""

    qat_on: bool = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if CastedLinear.qat_on and self.training and w.ndim == 2:
            w = w + (fake_quant_rows(w.detach().float()).to(w.dtype) - w.detach())
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w.to(x.dtype), bias)


class Rotary(nn.Module):
    def __init__(self, rope_dims: int, base: float, max_len: int):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.cos[:, :seq_len].to(dtype), self.sin[:, :seq_len].to(dtype)


def apply_partial_rope(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    rot, keep = x[..., :dims], x[..., dims:]
    a, b = rot.chunk(2, dim=-1)
    rot = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
    return torch.cat((rot, keep), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        dim = args.model_dim
        self.h, self.kv = args.num_heads, args.num_kv_heads
        self.hd = dim // self.h
        self.rope_dims = args.rope_dims
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, self.kv * self.hd, bias=False)
        self.c_v = CastedLinear(dim, self.kv * self.hd, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.h,), args.qk_gain_init, dtype=torch.float32))
        self.use_xsa = layer >= args.num_layers - args.xsa_last_n

    def _xsa(self, y: Tensor, v: Tensor) -> Tensor:
        """Takes the part along a token's own value out of its attention output (no repeat of v over the group)."""
        b, t, h, d = y.shape
        grouped = y.reshape(b, t, self.kv, h // self.kv, d)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (grouped - (grouped * vn).sum(dim=-1, keepdim=True) * vn).reshape(b, t, h, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, v_extra: Tensor | None = None) -> Tensor:
        b, t, dim = x.shape
        q = self.c_q(x).reshape(b, t, self.h, self.hd)
        k = self.c_k(x).reshape(b, t, self.kv, self.hd)
        v = self.c_v(x)
        if v_extra is not None:
            v = v + v_extra
        v = v.reshape(b, t, self.kv, self.hd)
        q = F.rms_norm(q, (self.hd,))
        k = F.rms_norm(k, (self.hd,))
        q = apply_partial_rope(q, cos, sin, self.rope_dims)
        k = apply_partial_rope(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.kv != self.h
        ).transpose(1, 2)
        if self.use_xsa:
            y = self._xsa(y, v)
        return self.proj(y.reshape(b, t, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        hidden = int(mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class SmearGate(nn.Module):
    """Mixes a little of the previous position in; a document's first token takes nothing."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.gate = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate.to(dtype=x.dtype))[None, None, :]
        prev = torch.cat((x[:, :1], x[:, :-1]), dim=1)
        starts = (ids == self.bos_id).unsqueeze(-1)
        prev = torch.where(starts, x, prev)
        return (1.0 - g) * x + g * prev


class BigramHash(nn.Module):
    def __init__(self, buckets: int, bigram_dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets, self.bos_id = buckets, bos_id
        self.embed = nn.Embedding(buckets, bigram_dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = CastedLinear(bigram_dim, model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def hash_ids(self, ids: Tensor) -> Tensor:
        mod = self.buckets - 1
        t = ids.to(torch.int32)
        out = torch.full_like(t, mod)
        mixed = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % mod
        out[:, 1:] = torch.where(t[:, 1:] == self.bos_id, out[:, 1:], mixed)
        return out.long()

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.embed(self.hash_ids(ids))) * self.bigram_scale


class ValueEmbedding(nn.Module):
    """One table of token identities, added to the values of a few layers."""

    def __init__(self, vocab_size: int, ve_dim: int, kv_dim: int, n_layers: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, ve_dim)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.proj = CastedLinear(ve_dim, kv_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.ve_scale = nn.Parameter(torch.full((n_layers,), 0.1, dtype=torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.embed(ids))


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(args, layer)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.norm_factor = 1.0 / math.sqrt(layer + 1) if args.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, v_extra: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        a = self.attn(self.attn_norm(x) * self.norm_factor, cos, sin, v_extra)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * a
        m = self.mlp(self.mlp_norm(x) * self.norm_factor)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * m


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.args = args
        dim = args.model_dim
        self.tie_embeddings = args.tie_embeddings
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, dim)
        self.bigram = BigramHash(args.bigram_buckets, args.bigram_dim, dim, args.bos_id)
        self.smear = SmearGate(dim, args.bos_id)
        self.ve_layers = [int(s) for s in args.ve_layers.split(",") if s.strip()]
        kv_dim = args.num_kv_heads * (dim // args.num_heads)
        self.value_emb = ValueEmbedding(args.vocab_size, args.ve_dim, kv_dim, max(len(self.ve_layers), 1))
        self.rotary = Rotary(args.rope_dims, args.rope_base, max(args.train_seq_len, args.eval_seq_len))
        self.num_encoder = args.num_layers // 2
        self.num_decoder = args.num_layers - self.num_encoder
        self.skip_weights = nn.Parameter(torch.ones(min(self.num_encoder, self.num_decoder), dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self.lm_head = None if self.tie_embeddings else CastedLinear(dim, args.vocab_size, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        if self.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.args.tied_embed_init_std)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear) or name.startswith(("bigram", "value_emb")):
                continue
            if getattr(module, "_zero_init", False):
                nn.init.zeros_(module.weight)
            elif min(module.weight.shape) >= 64:
                nn.init.orthogonal_(module.weight, gain=1.0)

    def _v_extra(self, layer: int, ve: Tensor) -> Tensor | None:
        if layer not in self.ve_layers:
            return None
        return ve * self.value_emb.ve_scale[self.ve_layers.index(layer)].to(dtype=ve.dtype)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.bigram(ids)
        x = F.rms_norm(x, (x.size(-1),))
        x = self.smear(x, ids)
        x0 = x
        ve = self.value_emb(ids)
        cos, sin = self.rotary(ids.size(1), x.dtype)
        skips: list[Tensor] = []
        for i in range(self.num_encoder):
            x = self.blocks[i](x, x0, cos, sin, self._v_extra(i, ve))
            skips.append(x)
        for j in range(self.num_decoder):
            if skips:
                x = x + self.skip_weights[j].to(dtype=x.dtype)[None, None, :] * skips.pop()
            i = self.num_encoder + j
            x = self.blocks[i](x, x0, cos, sin, self._v_extra(i, ve))
        return self.final_norm(x)

    def head(self, x: Tensor) -> Tensor:
        raw = F.linear(x, self.tok_emb.weight.to(x.dtype)) if self.lm_head is None else self.lm_head(x)
        return self.logit_softcap * torch.tanh(raw / self.logit_softcap)

    def forward_logits(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="mean")


def keep_small_params_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            if (p.ndim < 2 or any(c in name for c in CONTROL_PATTERNS)) and p.dtype != torch.float32:
                p.data = p.data.float()


def build_model(args: Hyperparameters, device: torch.device) -> GPT:
    model = GPT(args).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    # the cast above rounds the angles' tables too: build them anew
    model.rotary = Rotary(args.rope_dims, args.rope_base, max(args.train_seq_len, args.eval_seq_len)).to(device)
    keep_small_params_fp32(model)
    return model


# -----------------------------
# MUON
# -----------------------------


def newton_schulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X /= X.norm() + eps
    flip = G.size(0) > G.size(1)
    if flip:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if flip else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )

    @torch.no_grad()
    def step(self, closure=None):
        world_size = dist.get_world_size()
        rank = dist.get_rank()
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(g)
                    g = g.add(buf, alpha=group["momentum"])
                    g = newton_schulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(flat[curr : curr + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                curr += p.numel()


# -----------------------------
# QUANTISATION (GPTQ-lite: no error feedback, a clip per row that is searched under the inputs' second moments)
# -----------------------------

CLIP_GRID = (1.0, 0.9999, 0.9995, 0.999, 0.998, 0.996, 0.99)


class MomentCollector:
    """Mean square of every input column of every CastedLinear."""

    def __init__(self, model: nn.Module):
        self.moments: dict[str, Tensor] = {}
        self.rows: dict[str, int] = defaultdict(int)
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.handles.append(module.register_forward_pre_hook(self._hook(name + ".weight")))

    def _hook(self, key: str):
        def hook(_module, inputs):
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            got = x.square().sum(dim=0)
            self.moments[key] = self.moments[key] + got if key in self.moments else got
            self.rows[key] += x.size(0)

        return hook

    def close(self) -> dict[str, Tensor]:
        for h in self.handles:
            h.remove()
        out = {}
        for key in sorted(self.moments):
            m = self.moments[key] / max(self.rows[key], 1)
            dist.all_reduce(m, op=dist.ReduceOp.SUM)
            out[key] = (m / dist.get_world_size()).cpu()
        return out


def calibrate(args: Hyperparameters, model: GPT, loader: DistributedTokenLoader) -> dict[str, Tensor]:
    collector = MomentCollector(model)
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for _ in range(args.calib_batches):
            x, y = loader.next_batch(
                args.calib_seqs * args.train_seq_len * loader.world_size, args.train_seq_len, grad_accum_steps=1
            )
            model(x, y)
    model.train(was_training)
    return collector.close()


def quantize_rows(w: Tensor, qmax: int, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    w = w.float()
    weight = torch.ones(w.size(1)) if moment is None else moment.clamp_min(moment.mean() * 1e-3)
    best_err = torch.full((w.size(0),), float("inf"))
    best_q = torch.zeros_like(w)
    best_s = torch.ones(w.size(0))
    for pct in CLIP_GRID:
        top = w.abs().amax(dim=1) if pct == 1.0 else torch.quantile(w.abs(), pct, dim=1)
        s = (top / qmax).clamp_min(1e-7).to(torch.float16).float().clamp_min(6e-8)
        q = torch.clamp(torch.round(w / s[:, None]), -qmax - 1, qmax)
        err = ((w - q * s[:, None]).square() * weight[None, :]).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_q[better] = q[better]
        best_s = torch.where(better, s, best_s)
    return best_q.to(torch.int8), best_s.to(torch.float16)


def quantize_state_dict(sd: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, object]:
    packed: dict[str, object] = {}
    for name, t in sd.items():
        t = t.detach().cpu()
        if any(c in name for c in CONTROL_PATTERNS) and t.ndim < 2:
            packed[name] = ("raw", t.float())
        elif t.ndim != 2 or any(c in name for c in CONTROL_PATTERNS) or t.numel() <= 16384:
            packed[name] = ("half", t.to(torch.float16))
        else:
            qmax = 127 if "emb" in name else 31
            q, s = quantize_rows(t, qmax, moments.get(name))
            packed[name] = ("rows", q, s)
    return packed


def dequantize_state_dict(packed: dict[str, object], like: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, ref in like.items():
        kind, *rest = packed[name]
        if kind == "rows":
            q, s = rest
            out[name] = (q.float() * s.float()[:, None]).to(ref.dtype)
        else:
            out[name] = rest[0].to(ref.dtype)
    return out


def pack_model(packed: dict[str, object], preset: int) -> bytes:
    buf = io.BytesIO()
    torch.save({"w": packed}, buf)
    return lzma.compress(buf.getvalue(), preset=preset | lzma.PRESET_EXTREME)


def unpack_model(blob: bytes) -> dict[str, object]:
    return torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu", weights_only=False)


# -----------------------------
# AVERAGES (EMA every step, SWA in the warmdown)
# -----------------------------


class WeightAverages:
    def __init__(self, model: nn.Module, ema_decay: float):
        self.decay = ema_decay
        self.ema = {k: v.detach().float().clone() for k, v in model.state_dict().items()}
        self.swa: dict[str, Tensor] | None = None
        self.swa_count = 0

    @torch.no_grad()
    def update_ema(self, model: nn.Module) -> None:
        for k, v in model.state_dict().items():
            self.ema[k].lerp_(v.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def add_swa(self, model: nn.Module) -> None:
        if self.swa is None:
            self.swa = {k: torch.zeros_like(v) for k, v in self.ema.items()}
        for k, v in model.state_dict().items():
            self.swa[k].add_(v.detach().float())
        self.swa_count += 1

    def blend(self, swa_share: float) -> dict[str, Tensor]:
        if self.swa is None or self.swa_count == 0:
            return self.ema
        return {k: torch.lerp(self.ema[k], self.swa[k] / self.swa_count, swa_share) for k in self.ema}


def load_average(model: nn.Module, avg: dict[str, Tensor]) -> None:
    ref = model.state_dict()
    model.load_state_dict({k: avg[k].to(dtype=ref[k].dtype) for k in ref}, strict=True)


# -----------------------------
# EVALUATION
# -----------------------------


def plan_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first) of every window: it reads begin..end-1 and scores first..end-1. Each position once."""
    plan: list[tuple[int, int, int]] = []
    done = 0
    while done < total:
        end = min(done + (seq_len if done == 0 else stride), total)
        plan.append((max(0, end - seq_len), end, done))
        done = end
    return plan


def my_share(items: list, rank: int, world_size: int) -> list:
    n = len(items)
    return items[n * rank // world_size : n * (rank + 1) // world_size]


def window_batch(val_tokens: Tensor, batch: list[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.stack([val_tokens[b : e + 1] for b, e, _ in batch]).to(device=device, dtype=torch.int64)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def score_windows(args, logits_fn, val_tokens, windows, device, tables, sums: Tensor) -> None:
    """Adds nats, tokens and bytes of the windows to sums."""
    for i in range(0, len(windows), args.eval_batch_seqs):
        batch = windows[i : i + args.eval_batch_seqs]
        x, y = window_batch(val_tokens, batch, device)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = logits_fn(x)
        nll = F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction="none"
        ).reshape(y.shape)
        for j, (begin, end, first) in enumerate(batch):
            lo = first - begin
            sums[0] += nll[j, lo:].to(torch.float64).sum()
            sums[1] += end - first
            sums[2] += count_bytes(x[j, lo:], y[j, lo:], tables).sum()


def reduce_score(sums: Tensor, total: int) -> tuple[float, float]:
    dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    nats, tokens, nbytes = sums.tolist()
    if int(tokens) != total:
        log0(f"warning: scored {int(tokens)} tokens of {total}")
    return nats / tokens, nats / math.log(2.0) / nbytes


def eval_val(args, model: GPT, rank, world_size, device, val_tokens, tables) -> tuple[float, float]:
    """Windows side by side; a quick look."""
    total = val_tokens.numel() - 1
    mine = my_share(plan_windows(total, args.train_seq_len, args.train_seq_len), rank, world_size)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        score_windows(args, model.forward_logits, val_tokens, mine, device, tables, sums)
    model.train(was_training)
    return reduce_score(sums, total)


def eval_val_sliding(args, model: GPT, rank, world_size, device, val_tokens, tables) -> tuple[float, float]:
    total = val_tokens.numel() - 1
    mine = my_share(plan_windows(total, args.eval_seq_len, args.eval_stride), rank, world_size)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    logits_fn = torch.compile(model.forward_logits)
    model.eval()
    with torch.inference_mode():
        score_windows(args, logits_fn, val_tokens, mine, device, tables, sums)
    return reduce_score(sums, total)


# ---- n-gram statistics (we keep asking ourselves how much a cache would see; these numbers are for the log only)


class NgramMeter:
    def __init__(self, order: int, buckets: int):
        self.order, self.buckets = order, buckets
        self.ctx_counts = np.zeros(buckets, dtype=np.uint32)
        self.full_counts = np.zeros(buckets, dtype=np.uint32)
        self.positions = self.seen_ctx = self.seen_full = 0

    def context_hash(self, tokens: np.ndarray, pos: np.ndarray) -> np.ndarray:
        h = np.zeros(pos.shape, dtype=np.uint64)
        for k in range(self.order - 1):
            h = h * np.uint64(0x9E3779B1) + tokens[pos - k].astype(np.uint64) + np.uint64(1)
        return h

    def slots(self, tokens: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots of the contexts that end at start..end-1, and of these contexts with the token that follows."""
        pos = np.arange(max(start, self.order - 2), end)
        h = self.context_hash(tokens, pos)
        full = h * np.uint64(0x85EBCA6B) + tokens[pos + 1].astype(np.uint64)
        return (h % np.uint64(self.buckets)).astype(np.int64), (full % np.uint64(self.buckets)).astype(np.int64)

    def observe(self, tokens: np.ndarray, start: int, end: int) -> None:
        ctx, full = self.slots(tokens, start, end)
        self.positions += ctx.size
        self.seen_ctx += int((self.ctx_counts[ctx] > 0).sum())
        self.seen_full += int((self.full_counts[full] > 0).sum())
        np.add.at(self.ctx_counts, ctx, 1)
        np.add.at(self.full_counts, full, 1)

    def report(self) -> str:
        n = max(self.positions, 1)
        return (
            f"ngram_stats order:{self.order} positions:{self.positions} "
            f"context_seen:{self.seen_ctx / n:.4f} ngram_seen:{self.seen_full / n:.4f}"
        )


# ---- test-time training: a chunk is scored first, then trained on


def ttt_parameters(args: Hyperparameters, model: GPT) -> list[nn.Parameter]:
    chosen: list[nn.Parameter] = []
    for i, block in enumerate(model.blocks):
        for p in block.parameters():
            p.requires_grad_(i >= args.ttt_freeze_blocks)
            if i >= args.ttt_freeze_blocks:
                chosen.append(p)
    inside = {id(p) for p in model.blocks.parameters()}
    for p in model.parameters():
        if id(p) not in inside:
            p.requires_grad_(False)
    return chosen


def chunk_lr(args: Hyperparameters, ci: int, num_chunks: int) -> float:
    return args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))


def adapt_on_chunk(args, model, params, optimizer, val_tokens, start, end, rank, world_size, device) -> None:
    seq_len = args.eval_seq_len
    n_seqs = (end - start) // seq_len
    mine = list(range(rank, n_seqs, world_size))
    model.train()
    for _epoch in range(args.ttt_epochs):
        for i in range(0, len(mine), args.ttt_batch_seqs):
            spans = [(start + s * seq_len, start + (s + 1) * seq_len, 0) for s in mine[i : i + args.ttt_batch_seqs]]
            x, y = window_batch(val_tokens, spans, device)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            loss.backward()
            for p in params:
                if p.grad is not None:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                    p.grad.div_(world_size)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_grad_clip)
            optimizer.step()


def time_left(deadline: float, device: torch.device) -> bool:
    """The ranks agree: if one is late, none goes on adapting."""
    late = torch.tensor(float(time.perf_counter() > deadline), device=device)
    dist.all_reduce(late, op=dist.ReduceOp.MAX)
    return late.item() == 0.0


def eval_val_sliding_ttt(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    tables,
    deadline: float,
) -> tuple[float, float]:
    total = val_tokens.numel() - 1
    chunk = args.ttt_chunk_tokens
    assert chunk % args.eval_stride == 0 and chunk % args.eval_seq_len == 0
    assert (chunk // args.eval_seq_len) % world_size == 0, "ranks must take equally many steps"
    num_chunks = (total + chunk - 1) // chunk
    by_chunk: list[list[tuple[int, int, int]]] = [[] for _ in range(num_chunks)]
    for window in plan_windows(total, args.eval_seq_len, args.eval_stride):
        by_chunk[window[2] // chunk].append(window)

    params = ttt_parameters(args, model)
    optimizer = torch.optim.SGD(params, lr=args.ttt_lr, momentum=args.ttt_momentum)
    meter = NgramMeter(args.ngram_order, args.ngram_buckets) if args.ngram_stats and rank == 0 else None
    tokens_np = val_tokens.cpu().numpy()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    logits_fn = torch.compile(model.forward_logits)
    adapting = True
    log0(f"ttt:start chunks:{num_chunks} params:{sum(p.numel() for p in params)} lr:{args.ttt_lr}")
    for ci in range(num_chunks):
        start, end = ci * chunk, min((ci + 1) * chunk, total)
        model.eval()
        with torch.inference_mode():
            score_windows(
                args, logits_fn, val_tokens, my_share(by_chunk[ci], rank, world_size), device, tables, sums
            )
        if meter is not None:
            meter.observe(tokens_np, start, end)
        if ci == num_chunks - 1:
            break
        adapting = adapting and time_left(deadline, device)
        if adapting:
            for group in optimizer.param_groups:
                group["lr"] = chunk_lr(args, ci, num_chunks)
            adapt_on_chunk(args, model, params, optimizer, val_tokens, start, end, rank, world_size, device)
        if ci % 200 == 0:
            nats, _, nbytes = sums.tolist()
            log0(f"ttt:chunk {ci + 1}/{num_chunks} rank0_bpb:{nats / math.log(2.0) / max(nbytes, 1.0):.5f}")
    if meter is not None:
        log0(meter.report())
    return reduce_score(sums, total)


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: Hyperparameters, model: GPT) -> list[torch.optim.Optimizer]:
    matrix, scalar = [], []
    for name, p in model.named_parameters():
        if name.startswith(("tok_emb", "bigram.embed", "value_emb.embed", "lm_head")):
            continue
        if p.ndim == 2 and not any(c in name for c in CONTROL_PATTERNS):
            matrix.append(p)
        else:
            scalar.append(p)
    token_lr = args.tied_embed_lr if args.tie_embeddings else args.embed_lr
    embeds = [model.tok_emb.weight, model.bigram.embed.weight, model.value_emb.embed.weight]
    betas = (args.beta1, args.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": embeds, "lr": token_lr, "base_lr": token_lr}],
            betas=betas,
            eps=args.adam_eps,
            weight_decay=args.adam_wd,
            fused=True,
        ),
        Muon(
            matrix,
            lr=args.matrix_lr,
            momentum=args.muon_momentum,
            backend_steps=args.muon_backend_steps,
            weight_decay=args.muon_wd,
        ),
        torch.optim.AdamW(
            [{"params": scalar, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
            betas=betas,
            eps=args.adam_eps,
            weight_decay=args.adam_wd,
            fused=True,
        ),
    ]
    for group in optimizers[1].param_groups:
        group["base_lr"] = args.matrix_lr
    if model.lm_head is not None:
        optimizers.append(
            torch.optim.Adam(
                [{"params": [model.lm_head.weight], "lr": args.head_lr, "base_lr": args.head_lr}],
                betas=betas,
                eps=args.adam_eps,
                fused=True,
            )
        )
    return optimizers


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, budget_ms: float) -> float:
    if args.warmdown_iters <= 0:
        return 1.0
    if budget_ms <= 0:
        return min(1.0, max(args.iterations - step, 0) / args.warmdown_iters)
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(budget_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


def one_backward(args, model, loader, grad_accum_steps: int, device) -> Tensor:
    total = torch.zeros((), device=device)
    for micro in range(grad_accum_steps):
        model.require_backward_grad_sync = micro == grad_accum_steps - 1
        x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        total += loss.detach()
        (loss / grad_accum_steps).backward()
    return total / grad_accum_steps


def prime_kernels(args, model, base_model, optimizers, grad_accum_steps, rank, world_size, device) -> None:
    """Compiles and warms up on training batches, then puts weights and optimiser states back."""
    if args.warmup_steps <= 0:
        return
    weights = {k: v.detach().cpu().clone() for k, v in base_model.state_dict().items()}
    states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    model.train()
    for step in range(args.warmup_steps):
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        one_backward(args, model, loader, grad_accum_steps, device)
        for opt in optimizers:
            opt.step()
        if step + 1 == args.warmup_steps:
            log0(f"warmup_step:{step + 1}/{args.warmup_steps}")
    base_model.load_state_dict(weights, strict=True)
    for opt, state in zip(optimizers, states, strict=True):
        opt.load_state_dict(state)
        opt.zero_grad(set_to_none=True)
    model.require_backward_grad_sync = True


def train(args, model, base_model, optimizers, grad_accum_steps, rank, world_size, device, val_tokens, tables):
    """Trains until the clock says stop, averages, calibrates; all of it inside the cap."""
    prime_kernels(args, model, base_model, optimizers, grad_accum_steps, rank, world_size, device)
    loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
    averages = WeightAverages(base_model, args.ema_decay)
    budget_ms = 1000.0 * (args.max_wallclock_seconds - args.calib_reserve_seconds)
    elapsed_ms = 0.0
    stop_after: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == args.iterations or (stop_after is not None and step >= stop_after)
        if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            elapsed_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, base_model, rank, world_size, device, val_tokens, tables)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            break

        now_ms = elapsed_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, now_ms, budget_ms)
        if not CastedLinear.qat_on and scale < args.late_qat_scale:
            CastedLinear.qat_on = True
            log0(f"late_qat:on step:{step} scale:{scale:.4f}")
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        train_loss = one_backward(args, model, loader, grad_accum_steps, device)
        frac = min(step / max(args.muon_momentum_steps, 1), 1.0)
        for group in optimizers[1].param_groups:
            group["momentum"] = (1.0 - frac) * args.muon_momentum_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        averages.update_ema(base_model)
        step += 1
        if scale < args.swa_start_scale and step % args.swa_every == 0:
            averages.add_swa(base_model)

        now_ms = elapsed_ms + 1000.0 * (time.perf_counter() - t0)
        if step % args.train_log_every == 0 or step <= 5:
            log0(f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} train_time:{now_ms:.0f}ms")
        full = torch.tensor(float(now_ms >= budget_ms), device=device)
        dist.all_reduce(full, op=dist.ReduceOp.MAX)
        if stop_after is None and full.item() > 0:
            stop_after = step
            log0(f"stopping_early: wallclock_cap train_time:{now_ms:.0f}ms step:{step}/{args.iterations}")

    CastedLinear.qat_on = False
    load_average(base_model, averages.blend(args.swa_share))
    log0(f"averages: ema decay {args.ema_decay}, swa of {averages.swa_count} with share {args.swa_share}")
    moments = calibrate(args, base_model, loader)
    torch.cuda.synchronize()
    elapsed_ms += 1000.0 * (time.perf_counter() - t0)
    log0(f"calibrated on {args.calib_batches} train batches, train+calibration:{elapsed_ms:.0f}ms")
    return moments


def write_artifact(args, base_model: GPT, moments: dict[str, Tensor], code: str) -> None:
    """Rank 0 packs the weights and prints the sizes."""
    if dist.get_rank() == 0:
        packed = quantize_state_dict(base_model.state_dict(), moments)
        blob = pack_model(packed, args.lzma_preset)
        with open(ARTIFACT, "wb") as f:
            f.write(blob)
        code_bytes = len(code.encode("utf-8"))
        model_bytes = os.path.getsize(ARTIFACT)
        total_bytes = model_bytes + code_bytes
        log0(f"Serialized model int6+lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes")
        if total_bytes > SIZE_LIMIT:
            log0(f"Total submission size is over the limit by {total_bytes - SIZE_LIMIT} bytes")
    dist.barrier()


def read_artifact(args: Hyperparameters, device: torch.device) -> GPT:
    with open(ARTIFACT, "rb") as f:
        package = unpack_model(f.read())
    model = build_model(args, device)
    model.load_state_dict(dequantize_state_dict(package["w"], model.state_dict()), strict=True)
    return model


def evaluate_artifact(args, rank, world_size, device, val_tokens, tables) -> None:
    """Everything that the evaluation does, under one clock."""
    eval_t0 = time.perf_counter()
    deadline = eval_t0 + args.eval_budget_seconds
    model = read_artifact(args, device)
    t = time.perf_counter()
    val_loss, val_bpb = eval_val(args, model, rank, world_size, device, val_tokens, tables)
    log0(
        f"final_int6_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t):.0f}ms"
    )
    t = time.perf_counter()
    val_loss, val_bpb = eval_val_sliding(args, model, rank, world_size, device, val_tokens, tables)
    log0(
        f"final_int6_sliding val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} stride:{args.eval_stride} "
        f"eval_time:{1000.0 * (time.perf_counter() - t):.0f}ms"
    )
    if args.ttt_enabled:
        t = time.perf_counter()
        val_loss, val_bpb = eval_val_sliding_ttt(
            args, model, rank, world_size, device, val_tokens, tables, deadline
        )
        log0(f"final_int6_ttt eval_time:{1000.0 * (time.perf_counter() - t):.0f}ms")
    log0(f"final_val val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    log0(f"evaluation took {time.perf_counter() - eval_t0:.1f}s in all")


# -----------------------------
# MAIN
# -----------------------------


def setup_distributed() -> tuple[int, int, torch.device]:
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if "RANK" not in os.environ:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29511")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group(backend="nccl", rank=rank, world_size=world_size, device_id=device)
    dist.barrier()
    return rank, world_size, device


def log_environment(args: Hyperparameters, code: str) -> None:
    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log0(smi.stdout, console=False)
    for name in sorted(vars(Hyperparameters)):
        if not name.startswith("_"):
            log0(f"{name}: {getattr(args, name)}", console=False)


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    rank, world_size, device = setup_distributed()
    open_log(args, rank)
    log_environment(args, code)
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8")
    grad_accum_steps = 8 // world_size

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match the tokenizer's {int(sp.vocab_size())}")
    tables = build_byte_tables(sp, args.vocab_size, device)
    val_tokens = load_validation_tokens(args.val_files).to(torch.int32)
    log0(f"val_loader: pattern={args.val_files} tokens:{val_tokens.numel() - 1}")
    log0(f"train_loader: shards:{len(glob.glob(args.train_files))}")

    base_model = build_model(args, device)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[device.index], broadcast_buffers=False)
    optimizers = build_optimizers(args, base_model)
    log0(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(f"xsa_last_n:{args.xsa_last_n} ve_layers:{args.ve_layers} bigram_buckets:{args.bigram_buckets}")

    moments = train(
        args, model, base_model, optimizers, grad_accum_steps, rank, world_size, device, val_tokens, tables
    )
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    val_loss, val_bpb = eval_val(args, base_model, rank, world_size, device, val_tokens, tables)
    log0(f"post_average val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")

    write_artifact(args, base_model, moments, code)
    evaluate_artifact(args, rank, world_size, device, val_tokens, tables)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
